"""Scores: exact answers are what greedy generation gives, bits per byte what a hand calculation gives."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from forgekit.data.batches import encode_texts
from forgekit.data.gym import Problem, generate
from forgekit.data.tokenizer import chat_text, question, train_tokenizer
from forgekit.errors import DataError
from forgekit.infer.engine import Engine
from forgekit.infer.sampling import SamplingConfig
from forgekit.measure.problems import majority_share
from forgekit.measure.scores import byte_lengths, rows_at_once, score_problems, score_text
from forgekit.models.config import TRMTitansConfig
from forgekit.models.io import build_model

WORDS = "the quick brown fox jumps over the lazy dog, while 0123456789 été counts. " * 40
VOCAB = 320


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([WORDS], VOCAB)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    torch.set_num_threads(1)
    config = TRMTitansConfig(
        vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=2, ffn_hidden=32, d_mem=16, trm_hidden=16, window=8, t_max=2,
        memory_chunk=8, gate_hidden=8, max_seq_len=128,
    )  # fmt: skip
    model = build_model(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


class Uniform(torch.nn.Module):
    """Knows nothing: every token is as likely as any other."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(vocab_size=VOCAB)

    def forward(self, ids):
        return SimpleNamespace(logits=torch.zeros(*ids.shape, VOCAB), steps=None)


def test_right_is_what_greedy_generation_answers(model, tokenizer):
    """After a few steps on three problems of nine, score and generation agree on each of the nine."""
    taught = copy.deepcopy(model).train()
    problems = generate("copy", 1, 3, seed=5)
    others = [p for p in generate("copy", 2, 9, seed=6) + generate("far_recall", 1, 3, seed=6) if p not in problems]
    talks = [[{"role": "user", "content": p.prompt}, {"role": "assistant", "content": p.answer}] for p in problems]
    rows = [torch.tensor([tokenizer.encode(chat_text(talk)).ids]) for talk in talks]
    optimizer = torch.optim.AdamW(taught.parameters(), lr=0.01)
    for ids in rows * 60:
        optimizer.zero_grad()
        taught.training_loss(ids[:, :-1], ids[:, 1:]).total.backward()
        optimizer.step()
        taught.after_step()
    taught.eval()
    greedy = SamplingConfig(max_tokens=40, temperature=0.0)
    given = Engine(taught, tokenizer).generate([question(p.prompt) for p in problems + others], greedy)
    scores = score_problems(taught, tokenizer, problems + others)
    assert scores.right.tolist() == [float(a.text == p.answer) for a, p in zip(given, problems + others)]
    assert scores.right[:3].tolist() == [1.0] * 3 and scores.accuracy < 1


def test_scores_do_not_depend_on_the_batching_and_leave_the_mode(model, tokenizer):
    problems = generate("sort", 2, 12, seed=2) + generate("far_recall", 2, 5, seed=2)
    model.train()
    many = score_problems(model, tokenizer, problems)
    assert model.training
    model.eval()
    few = score_problems(model, tokenizer, problems, batch_tokens=1)
    assert not model.training
    np.testing.assert_allclose(many.nats, few.nats, rtol=1e-4)
    assert many.tokens.tolist() == few.tokens.tolist() == [len(tokenizer.encode(p.answer).ids) + 1 for p in problems], (
        "the end token counts"
    )
    assert 1 <= many.mean_steps <= 2


@pytest.mark.parametrize("vocabulary, length, rows", [(1024, 96, 341), (32768, 2048, 1), (32768, 16, 64)])
def test_logits_of_a_large_vocabulary_are_made_few_rows_at_a_time(vocabulary, length, rows):
    assert rows_at_once(SimpleNamespace(config=SimpleNamespace(vocab_size=vocabulary)), length) == rows


def test_a_uniform_model_pays_log_v_per_token(tokenizer):
    text = "the lazy dog, the quick été fox: " * 30
    tokens = encode_texts(tokenizer, [text])
    scores = score_text(Uniform(), tokenizer, [text], length=16, windows=4)
    assert scores.bits.tolist() == pytest.approx([16 * math.log2(VOCAB)] * 4)
    starts = np.linspace(0, len(tokens) - 17, 4).astype(int)
    sizes = byte_lengths(tokenizer)
    assert scores.bytes.tolist() == [sizes[tokens[s + 1 : s + 17]].sum() for s in starts]
    assert scores.bits_per_byte == pytest.approx(math.log2(VOCAB) * 64 / scores.bytes.sum())
    assert scores.per_window == pytest.approx(scores.bits / scores.bytes)


def test_byte_lengths_are_those_of_the_text(tokenizer):
    text = "été: the 12 foxes\n\t→ done"
    ids = tokenizer.encode(text).ids
    assert byte_lengths(tokenizer)[ids].sum() == len(text.encode())
    assert byte_lengths(tokenizer)[tokenizer.token_to_id("<|end|>")] == 0


def test_a_uniform_model_answers_by_the_lowest_token_and_pays_log_v(tokenizer):
    scores = score_problems(Uniform(), tokenizer, generate("copy", 1, 5, seed=1))
    assert scores.accuracy == 0 and scores.mean_steps == 0
    assert scores.nats == pytest.approx([math.log(VOCAB)] * 5)


def test_too_little_text_is_told(tokenizer):
    with pytest.raises(DataError, match="tokens are fewer than a window of 64; give more"):
        score_text(Uniform(), tokenizer, ["short"], length=64, windows=2)


def test_majority_share_is_the_most_frequent_answer():
    problems = [Problem("x", 1, str(i), answer) for i, answer in enumerate("aabac")]
    assert majority_share(problems) == 0.6
