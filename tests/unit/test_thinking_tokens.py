"""Thinking tokens of the house's own models: which rows were trained, where untrained ones start, what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny import gpt_config, made, same, trm_config, weights

from forgekit.data.batches import TextSource, encode_texts
from forgekit.data.plans import GymMix
from forgekit.data.thoughts import TraceSource, write_traces
from forgekit.data.tokenizer import SPARE, THINKING, train_tokenizer
from forgekit.errors import ArtifactError
from forgekit.models.io import read_model, write_model
from forgekit.models.thinking_tokens import MEANINGS, has_chat_format, prepare_thinking, untrained

TEXT = "think answer then because all not as but add 38 25 the quick brown fox 0123456789 "


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT * 30], 300)


def taught(model: torch.nn.Module, source, steps: int) -> torch.nn.Module:
    """The same model after some steps of learning."""
    optimizer, rng = torch.optim.AdamW(model.parameters(), lr=1e-2), np.random.default_rng(0)
    for _ in range(steps):
        inputs, labels = (torch.tensor(a, dtype=torch.long) for a in source.rows(rng, 8, 48))
        optimizer.zero_grad()
        model.training_loss(inputs, labels).total.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def parent(tokenizer):
    """A model that has learned from text and has never seen a thinking token."""
    return taught(made(gpt_config(vocab_size=300)), TextSource(encode_texts(tokenizer, [TEXT * 20])), 60)


@pytest.fixture
def model(parent):
    return copy.deepcopy(parent)


def table(model) -> torch.Tensor:
    return model.embedding.table.weight.detach()


def test_tokens_no_phase_has_shown_start_from_words(model, parent, tokenizer):
    assert untrained(model, tokenizer) == set(THINKING)
    done = prepare_thinking(model, tokenizer, seed=1)
    assert done.added == () and done.initialised == THINKING
    assert done.ids == {token: tokenizer.token_to_id(token) for token in THINKING}
    others = [i for i in range(300) if i not in done.ids.values()]
    assert torch.equal(table(model)[others], table(parent)[others])
    for token, index in done.ids.items():
        spellings = [tokenizer.encode(f"{blank}{MEANINGS[token]}").ids for blank in (" ", "")]
        middle = table(parent)[min(spellings, key=len)].mean(0)
        assert 0.02 < (table(model)[index] - middle).norm() / (table(parent).std() * 4) < 0.2, token
    assert torch.pdist(table(model)[list(done.ids.values())]).min() > 1e-3
    kept = {n: t for n, t in weights(model).items() if n != "embedding.table.weight"}
    assert same(kept, {n: t for n, t in weights(parent).items() if n != "embedding.table.weight"})
    assert any("</think> answer" in note for note in done.notes)


def test_a_second_call_leaves_them_alone(model, tokenizer):
    prepare_thinking(model, tokenizer, seed=1)
    before = weights(model)
    again = prepare_thinking(model, tokenizer, seed=2)
    assert again.initialised == () and same(before, weights(model))
    assert again.notes[-1] == f"left as they were: {' '.join(THINKING)}"


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "as it was"])
def test_what_was_learned_is_left_alone(model, tokenizer, prepared):
    if prepared:
        prepare_thinking(model, tokenizer, seed=1)
    mix = [GymMix(family=name, levels=(2,)) for name in ("add", "state")]
    source = TraceSource(tokenizer, write_traces(mix, 40, seed=0).traces)
    taught(model, source, 40)
    assert untrained(model, tokenizer) == set()
    before = weights(model)
    assert prepare_thinking(model, tokenizer, seed=2).initialised == () and same(before, weights(model))
    assert prepare_thinking(model, tokenizer, seed=2, fresh=True).initialised == THINKING
    assert not same(before, weights(model))


def test_only_untrained_rows_are_set(model, tokenizer):
    learned = tokenizer.token_to_id("<reason>")
    with torch.no_grad():
        model.embedding.table.weight[learned] = table(model)[tokenizer.encode(" the").ids[0]] * 0.9
    before = table(model)[learned].clone()
    done = prepare_thinking(model, tokenizer, seed=0)
    assert done.initialised == tuple(t for t in THINKING if t != "<reason>")
    assert torch.equal(table(model)[learned], before)


def test_the_caller_may_know_better(model, tokenizer):
    before = weights(model)
    assert prepare_thinking(model, tokenizer, seed=0, fresh=False).initialised == () and same(before, weights(model))


def test_rows_without_a_past_say_nothing_about_a_word(model, tokenizer):
    """A word's piece that no text held lies among the spare rows; the row starts from the other pieces."""
    silent, *rest = tokenizer.encode(" think").ids
    with torch.no_grad():
        model.embedding.table.weight[silent] = table(model)[tokenizer.token_to_id(SPARE[0])]
    prepare_thinking(model, tokenizer, seed=0)
    off = (table(model)[tokenizer.token_to_id("<think>")] - table(model)[rest].mean(0)).norm()
    assert off < 0.2 * table(model).std() * 4


def test_same_seed_same_rows(parent, tokenizer):
    one, two, three = (copy.deepcopy(parent) for _ in range(3))
    drawn = torch.random.get_rng_state()
    for model, seed in ((one, 4), (two, 4), (three, 5)):
        prepare_thinking(model, tokenizer, seed)
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert same(weights(one), weights(two)) and not same(weights(one), weights(three))


def test_what_the_model_says_does_not_change(model, parent, tokenizer):
    ids_BT = torch.tensor([tokenizer.encode("the quick brown fox add 38").ids])
    prepare_thinking(model, tokenizer, seed=0)
    others = [i for i in range(300) if i not in map(tokenizer.token_to_id, THINKING)]
    assert torch.allclose(model(ids_BT).logits[..., others], parent(ids_BT).logits[..., others], atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [gpt_config(vocab_size=300, emb_rank=4), trm_config(vocab_size=300)],
    ids=["factorised", "trm_titans"],
)
def test_every_family_keeps_them_when_saved(config, tokenizer, tmp_path):
    model = made(config)
    done = prepare_thinking(model, tokenizer, seed=0, fresh=True)
    write_model(model, tokenizer, tmp_path)
    again, words = read_model(tmp_path)
    assert same(weights(again), weights(model))
    assert {token: words.token_to_id(token) for token in THINKING} == done.ids


def test_a_table_without_room_is_refused(tokenizer):
    model = made(gpt_config(vocab_size=12))
    before = weights(model)
    with pytest.raises(ArtifactError, match="12 rows are too few for token 14"):
        prepare_thinking(model, tokenizer, seed=0)
    assert same(before, weights(model))


def test_a_foreign_tokenizer_without_them_is_refused(model):
    from tokenizers import Tokenizer, models

    bare = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(ArtifactError, match="has no <think>"):
        prepare_thinking(model, bare, seed=0)


def test_the_house_has_a_chat_format(tokenizer):
    assert has_chat_format(tokenizer)
