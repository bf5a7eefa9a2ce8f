"""Thinking tokens for models of another house: added, refused, found, kept by saving and loading."""

from __future__ import annotations

import pytest
import torch

from forgekit.data.plans import GymMix
from forgekit.data.thoughts import CLOSE, TraceSource, check
from forgekit.data.thoughts.traces import write_traces
from forgekit.data.tokenizer import THINKING, train_tokenizer
from forgekit.errors import ArtifactError
from forgekit.hub import HFTokenizer
from forgekit.models.hf import HFCausalLM
from forgekit.models.io import read_model, write_model
from forgekit.models.thinking_tokens import MEANINGS, has_chat_format, prepare_thinking

TEXT = ["think answer then because all not as but add 38 25 the quick brown fox " * 40]
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}[assistant]"


def their_tokenizer(present: tuple[str, ...] = (), special: bool = True, template: str | None = None, **named: str):
    """A byte-level tokenizer with ``<unk>`` and ``</s>``, and of the thinking tokens only ``present``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator(TEXT, trainer)
    words.add_tokens([AddedToken(token, special=special, normalized=False) for token in present])
    fast = PreTrainedTokenizerFast(tokenizer_object=words, **{"eos_token": "</s>", "unk_token": "<unk>", **named})
    fast.chat_template = template
    return HFTokenizer(fast)


def their_model(kind: str, tied: bool, rows: int) -> HFCausalLM:
    """A tiny Llama or GPT-2 with a table of so many rows."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    shared = {"vocab_size": rows, "tie_word_embeddings": tied, "eos_token_id": 1, "bos_token_id": 1}
    if kind == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlamaConfig(**shared, **sizes, num_key_value_heads=2, max_position_embeddings=256)
    else:
        config = GPT2Config(**shared, n_embd=16, n_layer=2, n_head=2, n_positions=256)
    torch.manual_seed(0)
    return HFCausalLM(AutoModelForCausalLM.from_config(config)).eval()


def matrices(model: HFCausalLM) -> list[torch.Tensor]:
    table, head = model.hf.get_input_embeddings().weight, model.hf.get_output_embeddings().weight
    return [table] if head is table else [table, head]


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["chat", "plain"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_missing_tokens_are_added_and_survive_saving(kind, tied, template, tmp_path):
    tokenizer = their_tokenizer(template=template)
    rows = tokenizer.get_vocab_size()
    model = their_model(kind, tied, rows)
    before = [m.detach().clone() for m in matrices(model)]
    ids_BT = torch.tensor([tokenizer.encode("the quick brown fox").ids])
    scores = model(ids_BT).logits
    drawn = torch.random.get_rng_state()
    done = prepare_thinking(model, tokenizer, seed=3)
    assert torch.equal(drawn, torch.random.get_rng_state()), "nobody else's random numbers are used up"
    assert done.added == done.initialised == THINKING
    assert list(done.ids.values()) == list(range(rows, rows + 8)) and model.config.vocab_size == rows + 8
    assert (matrices(model)[0] is model.hf.get_output_embeddings().weight) is tied
    assert len(matrices(model)) == len(before) == (1 if tied else 2)
    assert torch.allclose(model(ids_BT).logits[..., :rows], scores, atol=1e-6)
    for old, new in zip(before, matrices(model)):
        assert torch.equal(new[:rows], old) and new.shape[0] == rows + 8
        for token, index in done.ids.items():
            middle = old[tokenizer.encode(f" {MEANINGS[token]}").ids].mean(0)
            off = (new[index] - middle).detach().norm() / (old.std() * old.shape[1] ** 0.5)
            assert 0.02 < off < 0.2, "a tenth of the table's deviation"
        assert torch.pdist(new[rows:].detach()).min() > 1e-3
    assert has_chat_format(tokenizer) is (template is not None)
    assert any("no chat template" in note for note in done.notes) is (template is None)
    folder = tmp_path / "model"
    folder.mkdir()
    write_model(model, tokenizer, folder)
    again, words = read_model(folder)
    assert all(torch.equal(a, b) for a, b in zip(matrices(again), matrices(model)))
    assert (matrices(again)[0] is again.hf.get_output_embeddings().weight) is tied
    assert {token: words.token_to_id(token) for token in THINKING} == done.ids
    kept = prepare_thinking(again, words, seed=4)
    assert kept.added == kept.initialised == () and kept.ids == done.ids
    assert all(torch.equal(a, b) for a, b in zip(matrices(again), matrices(model)))


def test_texts_come_back_and_markers_are_hidden_as_the_houses_are(tmp_path):
    theirs, ours = their_tokenizer(), train_tokenizer(TEXT, 300)
    prepare_thinking(their_model("llama", True, theirs.get_vocab_size()), theirs, seed=0)
    theirs.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    loaded = HFTokenizer(AutoTokenizer.from_pretrained(tmp_path))
    for text in (
        "<think><step>8+5=13</think>63",
        "a <think> b<doubt>c </think> d",
        "<think><step> x>y <reason>1</think>",
    ):
        hidden = ours.decode(ours.encode(text).ids, skip_special_tokens=True)
        for words in (theirs, loaded):
            ids = words.encode(text, add_special_tokens=False).ids
            assert words.decode(ids, skip_special_tokens=False) == text
            assert words.decode(ids, skip_special_tokens=True) == hidden
            assert "<" not in hidden


@pytest.mark.parametrize("name", ["eos_token", "bos_token", "pad_token", "unk_token"])
def test_a_token_with_another_part_is_refused(name):
    tokenizer = their_tokenizer(("<think>",), **{name: "<think>"})
    model = their_model("llama", True, tokenizer.get_vocab_size())
    with pytest.raises(ArtifactError, match=rf"<think> is the model's {name}.*rename it"):
        prepare_thinking(model, tokenizer, seed=0)
    assert tokenizer.token_to_id("<step>") is None and model.config.vocab_size == tokenizer.get_vocab_size()


def test_an_ordinary_entry_of_the_vocabulary_is_refused():
    import json

    from tokenizers import Tokenizer

    tokenizer = their_tokenizer()
    values = json.loads(tokenizer.to_str())
    vocab = values["model"]["vocab"]
    vocab["<doubt>"] = len(vocab)
    tokenizer.fast._tokenizer = Tokenizer.from_str(json.dumps(values))
    tokenizer = HFTokenizer(tokenizer.fast)
    model = their_model("llama", True, tokenizer.get_vocab_size())
    with pytest.raises(ArtifactError, match=rf"<doubt> is an ordinary entry .*id {vocab['<doubt>']}"):
        prepare_thinking(model, tokenizer, seed=0)
    assert tokenizer.token_to_id("<think>") is None, "nothing was added before the refusal"


def test_a_token_that_is_never_read_whole_is_refused():
    from tokenizers import AddedToken

    tokenizer = their_tokenizer()
    tokenizer.backend.add_tokens([AddedToken("<mece>", single_word=True)])
    model = their_model("llama", True, tokenizer.get_vocab_size())
    with pytest.raises(ArtifactError, match="<mece> is not read as one token"):
        prepare_thinking(model, tokenizer, seed=0)


@pytest.mark.parametrize("special", [True, False])
def test_all_present_nothing_added(special):
    tokenizer = their_tokenizer(THINKING, special)
    model = their_model("llama", False, tokenizer.get_vocab_size())
    before = [m.detach().clone() for m in matrices(model)]
    table = matrices(model)[0]
    done = prepare_thinking(model, tokenizer, seed=0)
    assert done.added == done.initialised == () and len(done.ids) == 8
    assert any("not special" in note and "<doubt>" in note for note in done.notes) is not special
    assert matrices(model)[0] is table and all(torch.equal(a, b) for a, b in zip(before, matrices(model)))
    anew = prepare_thinking(model, tokenizer, seed=0, fresh=True)
    assert anew.added == () and anew.initialised == THINKING
    assert not any(torch.equal(a, b) for a, b in zip(before, matrices(model)))


def test_a_token_that_ends_the_models_texts_is_refused():
    tokenizer = their_tokenizer(THINKING)
    model = their_model("llama", True, tokenizer.get_vocab_size())
    model.hf.generation_config.eos_token_id = [1, tokenizer.token_to_id("</think>")]
    with pytest.raises(ArtifactError, match="</think> ends the model's texts"):
        prepare_thinking(HFCausalLM(model.hf), tokenizer, seed=0)


def test_a_token_that_the_table_has_no_row_for_gets_one():
    tokenizer = their_tokenizer(THINKING)
    rows = tokenizer.get_vocab_size() - 3
    model = their_model("llama", False, rows)
    done = prepare_thinking(model, tokenizer, seed=0)
    assert done.added == () and done.initialised == THINKING[-3:] and model.config.vocab_size == rows + 3


def test_spare_rows_are_used_before_the_table_grows():
    tokenizer = their_tokenizer(THINKING[:2], special=False)
    rows = tokenizer.get_vocab_size()
    model = their_model("gpt2", True, rows + 20)
    table = matrices(model)[0]
    learned = table[rows - 2 : rows].detach().clone()
    done = prepare_thinking(model, tokenizer, seed=0)
    assert matrices(model)[0] is table and model.config.vocab_size == rows + 20
    assert done.added == done.initialised == THINKING[2:]
    assert torch.equal(table[rows - 2 : rows], learned), "tokens that were there keep what they learned"


def test_the_same_seed_gives_the_same_rows():
    made = []
    for seed in (5, 5, 6):
        tokenizer = their_tokenizer()
        model = their_model("llama", False, tokenizer.get_vocab_size())
        prepare_thinking(model, tokenizer, seed)
        made.append([m.detach() for m in matrices(model)])
    assert all(map(torch.equal, made[0], made[1])) and not any(map(torch.equal, made[0], made[2]))


def test_a_template_that_opens_a_thought_is_told():
    tokenizer = their_tokenizer(THINKING, template=TEMPLATE + "<think>\n")
    model = their_model("llama", True, tokenizer.get_vocab_size())
    assert any("opens a thought itself" in note for note in prepare_thinking(model, tokenizer, 0).notes)


def test_a_tokenizer_that_changes_texts_is_told():
    from tokenizers import pre_tokenizers

    tokenizer = their_tokenizer()
    tokenizer.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    model = their_model("llama", True, tokenizer.get_vocab_size())
    notes = prepare_thinking(model, tokenizer, 0).notes
    assert any("does not give texts back" in note for note in notes), notes


def test_traces_train_a_prepared_model():
    tokenizer = their_tokenizer(template=TEMPLATE)
    model = their_model("llama", True, tokenizer.get_vocab_size())
    done = prepare_thinking(model, tokenizer, 0)
    traces = write_traces([GymMix(family="add", levels=(2,))], 20, seed=0).traces
    source = TraceSource(tokenizer, traces)
    for trace, start, prompt, size in zip(traces, source.start, source.prompt_size, source.size):
        text = tokenizer.decode(source.tokens[start + prompt : start + size - 1].tolist(), skip_special_tokens=False)
        thought, close, answer = text.partition(CLOSE)
        assert check(trace.problem.prompt, thought + close).valid and answer == trace.problem.answer
    assert set(done.ids.values()) <= set(source.tokens.tolist())
