"""Batches: pure functions of seed and step, labels on answers only, splits kept apart, shares exact."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Echo, train_config, trainer, trm_config
from tiny import made as model_of

from forgekit.data.batches import Batch, Mixture, ProblemSource, TextSource, encode_texts, told
from forgekit.data.gym import FAMILIES, generate, split_of
from forgekit.data.tokenizer import ASSISTANT, END, PAD, SYSTEM, USER, train_tokenizer
from forgekit.errors import DataError
from forgekit.infer.chat import conversation_ids
from forgekit.models.constants import IGNORE

quick = settings(max_examples=50, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["sort copy reverse recall the and of to 0 1 2 3 " * 20], 300)


@pytest.fixture(scope="module")
def problems():
    return generate("sort", 2, 50, seed=0) + generate("recall", 3, 50, seed=0)


def mixture(tokenizer, problems, **changes) -> Mixture:
    text = TextSource(encode_texts(tokenizer, ["the and of to " * 100]))
    sources = ((text, 1.0), (ProblemSource(tokenizer, problems), 2.0))
    return Mixture(**{"sources": sources, "rows": 9, "length": 64, "seed": 3, **changes})


def test_a_batch_depends_on_seed_and_step_alone(tokenizer, problems):
    one, two = mixture(tokenizer, problems), mixture(tokenizer, problems)
    later = one.batch(5)
    for step in (5, 0, 7, 5):
        a, b = one.batch(step), two.batch(step)
        assert np.array_equal(a.inputs, b.inputs) and np.array_equal(a.labels, b.labels)
    assert np.array_equal(later.inputs, one.batch(5).inputs)
    assert not np.array_equal(one.batch(5).inputs, one.batch(6).inputs)
    assert not np.array_equal(one.batch(5).inputs, mixture(tokenizer, problems, seed=4).batch(5).inputs)
    assert later.inputs.dtype == later.labels.dtype == np.int64 and later.inputs.shape == (9, 64)


def test_every_label_is_the_token_that_follows(tokenizer, problems):
    batch = mixture(tokenizer, problems).batch(0)
    inside = batch.labels[:, :-1] != IGNORE
    assert np.array_equal(batch.labels[:, :-1][inside], batch.inputs[:, 1:][inside])
    assert batch.supervised == (batch.labels != IGNORE).sum() > 0


def test_a_system_message_stands_before_its_problem(tokenizer, problems):
    source = ProblemSource(tokenizer, problems[:3], ["the", "", "of"])
    plain = ProblemSource(tokenizer, problems[:3])
    for i, message in enumerate(("the", "", "of")):
        start, size = source.start[i], source.size[i]
        text = tokenizer.decode(source.tokens[start : start + size].tolist(), skip_special_tokens=False)
        shown = f"{SYSTEM}{message}{END}" if message else ""
        own = plain.tokens[plain.start[i] : plain.start[i] + plain.size[i]]
        assert text == shown + tokenizer.decode(own.tolist(), skip_special_tokens=False)
        labels = source.labels[start : start + size]
        assert (labels != IGNORE).sum() == source.answer_size[i] == plain.answer_size[i]
    with pytest.raises(ValueError, match="shorter"):
        ProblemSource(tokenizer, problems[:3], ["the"])


def test_labels_lie_on_answers_and_on_nothing_else(tokenizer, problems):
    source = ProblemSource(tokenizer, problems)
    inputs, labels = source.rows(np.random.default_rng(0), 20, 90)
    known = {(p.prompt, p.answer) for p in problems}
    user, opened, end = (tokenizer.token_to_id(t) for t in (USER, ASSISTANT, END))
    answers = 0
    for row, label in zip(inputs, labels):
        row = [*row, label[-1]] if label[-1] != IGNORE else list(row)
        at = 0
        while at < len(row) and row[at] == user:
            stop = row.index(opened, at)
            close = row.index(end, stop)
            pair = tuple(tokenizer.decode(row[a:b]) for a, b in ((at + 1, stop - 1), (stop + 1, close)))
            assert pair in known
            assert list(label[at:stop]) == [IGNORE] * (stop - at)
            assert list(label[stop:close]) == row[stop + 1 : close + 1]
            at, answers = close + 1, answers + 1
        assert set(row[at:]) <= {tokenizer.token_to_id(PAD)} and set(label[at:]) <= {IGNORE}
    assert answers > 40


def test_text_is_supervised_everywhere_and_closed(tokenizer):
    tokens = encode_texts(tokenizer, ["the and", "", "of"])
    end = tokenizer.token_to_id(END)
    assert tokenizer.decode(list(tokens), skip_special_tokens=False) == f"the and{END}{END}of{END}"
    assert list(tokens).count(end) == 3 and tokens.dtype == np.int32
    assert len(encode_texts(tokenizer, [])) == 0
    inputs, labels = TextSource(np.arange(50)).rows(np.random.default_rng(0), 30, 10)
    assert np.array_equal(labels, inputs + 1) and {int(inputs.min()), int(inputs.max())} <= set(range(49))


def test_a_share_of_the_text_is_supervised_and_the_text_is_the_same():
    def rows(share: float, seed: int = 0):
        return TextSource(np.arange(5000), share).rows(np.random.default_rng(seed), 60, 100)

    (all_inputs, all_labels), (inputs, labels) = rows(1.0), rows(0.1)
    kept = labels != IGNORE
    assert np.array_equal(inputs, all_inputs) and np.array_equal(labels[kept], all_labels[kept])
    assert kept.mean() == pytest.approx(0.1, abs=0.016), "four standard errors of 6,000 draws"
    assert 0 < kept.any(axis=0).mean() and kept[:30].sum() > 200 < kept[30:].sum(), "spread over rows and places"
    assert np.array_equal(labels, rows(0.1)[1])
    assert not np.array_equal(kept, rows(0.1, seed=1)[1] != IGNORE)
    assert (rows(0.0)[1] == IGNORE).all()


def test_long_texts_are_encoded_in_pieces_without_loss(tokenizer):
    text = "the and of to " * 15_000
    assert tokenizer.decode(list(encode_texts(tokenizer, [text]))) == text


@pytest.mark.parametrize("split", ["train", "select", "report"])
def test_no_prompt_of_another_split_is_ever_drawn(tokenizer, split):
    pool = [p for name in ("sort", "add", "recall") for p in generate(name, 2, 60, seed=9, split=split)]
    source = ProblemSource(tokenizer, pool)
    user, opened = tokenizer.token_to_id(USER), tokenizer.token_to_id(ASSISTANT)
    inputs, _ = source.rows(np.random.default_rng(1), 30, 80)
    prompts = set()
    for row in inputs.tolist():
        for at in (i for i, t in enumerate(row) if t == user):
            if opened in row[at:]:
                prompts.add(tokenizer.decode(row[at + 1 : row.index(opened, at) - 1]))
    assert len(prompts) > 30 and {split_of(p) for p in prompts} == {split}


@quick
@given(rows=st.integers(1, 50), shares=st.lists(st.floats(0.01, 10), min_size=1, max_size=6))
def test_rows_are_shared_by_largest_remainder(rows, shares):
    counts = Mixture(tuple((None, s) for s in shares), rows, 8, 0)._counts()
    exact = [rows * s / sum(shares) for s in shares]
    assert sum(counts) == rows and all(abs(c - e) < 1 for c, e in zip(counts, exact))
    up = [e - int(e) for c, e in zip(counts, exact) if c > int(e)]
    down = [e - int(e) for c, e in zip(counts, exact) if c == int(e)]
    assert not up or not down or min(up) >= max(down) - 1e-9


def test_a_source_without_rows_is_not_asked():
    class Never:
        def rows(self, *_):
            raise AssertionError("no row is due")

    batch = Mixture(((TextSource(np.arange(99)), 1.0), (Never(), 0.0)), 4, 8, 0).batch(0)
    assert batch.inputs.shape == (4, 8)


def test_too_short_a_text_is_refused():
    with pytest.raises(DataError, match="text: 8 tokens are fewer than one row of 8; give more text"):
        TextSource(np.arange(8)).rows(np.random.default_rng(0), 1, 8)
    TextSource(np.arange(9)).rows(np.random.default_rng(0), 5, 8)


def test_problems_that_never_fit_are_refused_and_long_ones_left_out(tokenizer, problems):
    with pytest.raises(DataError, match="no problem fits 4 tokens; raise the context or lower levels"):
        ProblemSource(tokenizer, problems).rows(np.random.default_rng(0), 1, 4)
    long = generate("far_recall", 10, 5, seed=0)
    source = ProblemSource(tokenizer, problems + long)
    inputs, labels = source.rows(np.random.default_rng(0), 40, 60)
    assert (labels != IGNORE).any(axis=1).all()
    with pytest.raises(DataError, match="no problems"):
        ProblemSource(tokenizer, [])


def test_a_row_as_long_as_one_problem_holds_exactly_it(tokenizer, problems):
    one = [problems[0]]
    source = ProblemSource(tokenizer, one)
    length = int(source.size[0]) - 1
    inputs, labels = source.rows(np.random.default_rng(0), 3, length)
    assert inputs.shape == (3, length) and (labels[:, -1] == tokenizer.token_to_id(END)).all()


def test_supervised_counts_labels():
    assert Batch(np.zeros((2, 2)), np.array([[1, IGNORE], [IGNORE, 0]])).supervised == 2


def test_drawing_a_batch_costs_little_beside_training_on_it(tokenizer):
    pool = [p for name in FAMILIES for p in generate(name, 2, 30, seed=0)]
    source = mixture(tokenizer, pool, rows=16)
    config = trm_config(vocab_size=300, d_model=64, n_layers=3, ffn_hidden=256, d_mem=32, trm_hidden=64)
    run = trainer(train_config(rows=16, micro_batch=16, steps=4, checkpoint_every=0), source, model_of(config))
    report = run.run()
    started = time.perf_counter()
    Echo().batch(0)
    assert time.perf_counter() > started and report.data_seconds < 0.05 * report.seconds


class _Formless:
    """A Hugging Face tokenizer without a chat format: what it is given is kept."""

    def chat_text(self, messages, thinking="auto"):
        return None

    def token_to_id(self, token):
        return None

    def encode(self, text, add_special_tokens=True):
        return SimpleNamespace(ids=text)


@pytest.mark.parametrize("system", ["", "falsify"])
def test_a_model_without_a_chat_format_is_asked_in_chat_as_it_was_taught(system):
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": "add 1 2"})
    assert conversation_ids(_Formless(), messages) == told(_Formless(), "add 1 2", system)
