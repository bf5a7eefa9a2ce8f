"""Continuous batching: a request gets in company what it gets alone, whoever comes and goes, and its place is freed."""

import random
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from forgekit.data.tokenizer import train_tokenizer
from forgekit.errors import ForgeError
from forgekit.infer.batcher import (
    Batch,
    BatchConfig,
    Batcher,
    Cancelled,
    Closed,
    ContextExceeded,
    Expired,
    Job,
    ModelFailure,
    QueueFull,
    Request,
    Row,
)
from forgekit.infer.engine import Engine
from forgekit.infer.sampling import SamplingConfig, row_generator
from forgekit.infer.states import join_states, joinable, take_rows
from forgekit.models.base import Output
from tests.unit.tiny import gpt_config, made, trm_config

TOKENIZER = train_tokenizer(["hello world, this is some text with digits 123 and äöü 😀 €. "] * 5, 310)
V = TOKENIZER.get_vocab_size()
CONFIGS = {
    "gpt": gpt_config(vocab_size=V),
    "window": gpt_config(vocab_size=V, window=4, emb_rank=4),
    "titans": trm_config(vocab_size=V),
    "decay": trm_config(vocab_size=V, memory="decay", window=3, t_max=0, conv=False),
}
SAMPLED = SamplingConfig(max_tokens=9, temperature=1.0, top_k=40, top_p=0.9, repetition_penalty=1.2, seed=7)


pytestmark = pytest.mark.usefixtures("one_thread")


def engine_of(name):
    return Engine(made(CONFIGS[name], stir=0.3).eval(), TOKENIZER)


ENGINES = {name: engine_of(name) for name in CONFIGS}
each_family = pytest.mark.parametrize("name", CONFIGS)


def alone(engine, request):
    """What the engine says to a request that has it for itself."""
    (result,) = engine.generate([request.prompt], request.config)
    return result


def some_requests(rng, count):
    """Prompts of all lengths, each with settings of its own."""
    kinds = [
        SamplingConfig(),
        SAMPLED,
        SamplingConfig(temperature=0.7, min_p=0.01),
        SamplingConfig(repetition_penalty=1.5, stop=("th",)),
    ]
    return [
        Request(
            [rng.randrange(40, V) for _ in range(rng.choice([1, 2, 5, 23, 40]))],
            rng.choice(kinds).replace(max_tokens=rng.randint(1, 14), seed=rng.randrange(99)),
        )
        for _ in range(count)
    ]


def row_of(engine, request):
    prompt, generator = list(request.prompt), row_generator(request.config.seed, request.place)
    return Row(0, Job(1), request, prompt, engine.speech(prompt, request.config, None), generator)


def run_schedule(engine, requests, config, rng):
    """Let the requests in at random turns; every one's result."""
    batch, rows, waiting = Batch(engine, config), [], list(requests)
    while waiting or batch.rows:
        while waiting and rng.random() < 0.4:
            rows.append(row_of(engine, waiting.pop(0)))
            batch.add(rows[-1])
        batch.turn()
    return [row.job.results()[0] for row in rows], batch


# ---- states


@each_family
@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_joined_states_go_on_as_each_alone(name, seed):
    rng, model = random.Random(seed), ENGINES[name].model
    with torch.inference_mode():
        states = []
        for _ in range(3):  # read in one piece, then some tokens one by one: rings with cursors of all kinds
            ids = torch.randint(2, V, (rng.randint(1, 2), rng.randint(1, 9)))
            state = model(ids, model.initial_state(len(ids))).state
            for _ in range(rng.randint(0, 6)):
                state = model(torch.randint(2, V, (len(ids), 1)), state).state
            states.append(state)
        sizes = [len(state.position_B) for state in states]
        joined = join_states(states)
        for T in (1, 3, 1):
            new = torch.randint(2, V, (sum(sizes), T))
            out = model(new, joined)
            parts = [model(part, state) for part, state in zip(new.split(sizes), states)]
            want = torch.cat([part.logits for part in parts])
            torch.testing.assert_close(out.logits, want, rtol=1e-3, atol=1e-3)
            joined, states = out.state, [part.state for part in parts]
        pick = torch.tensor([sum(sizes) - 1, 0])
        out = model(new[pick], take_rows(joined, pick))
        want = torch.cat([model(new[-1:], take_rows(states[-1], torch.tensor([sizes[-1] - 1]))).logits,
                          model(new[:1], take_rows(states[0], torch.tensor([0]))).logits])  # fmt: skip
        torch.testing.assert_close(out.logits, want, rtol=1e-3, atol=1e-3)


def test_states_of_unknown_kinds_are_refused():
    assert not joinable(SimpleNamespace())
    with pytest.raises(TypeError, match="SimpleNamespace"):
        join_states([SimpleNamespace(), SimpleNamespace()])


# ---- the batch


@each_family
@settings(max_examples=3, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_rows_that_come_and_go_get_what_they_get_alone(name, seed):
    rng, engine = random.Random(seed), ENGINES[name]
    requests = some_requests(rng, 7)
    config = BatchConfig(prefill_tokens=rng.choice([1, 16, 64, 256]))
    results, batch = run_schedule(engine, requests, config, rng)
    assert batch.together
    for request, result in zip(requests, results, strict=True):
        want = alone(engine, request)
        assert result.tokens == want.tokens and result.text == want.text
        assert result.finish_reason == want.finish_reason and result.prompt_tokens == want.prompt_tokens
        assert result.mean_steps == pytest.approx(want.mean_steps)


@each_family
def test_row_by_row_not_a_bit_depends_on_the_company(name):
    engine, config = ENGINES[name], BatchConfig(together=False, prefill_tokens=16)
    request = Request(list(range(50, 90)), SAMPLED.replace(max_tokens=12), logprobs=3)
    company = some_requests(random.Random(3), 6)
    scores = []
    for others in ([], company):
        batch, mine = Batch(engine, config), row_of(engine, request)
        for row in (*(row_of(engine, other) for other in others[:3]), mine, *(row_of(engine, o) for o in others[3:])):
            batch.add(row)
        while batch.rows:
            batch.turn()
        scores.append([score for piece in mine.job for score in piece.scores])
    assert scores[0] == scores[1] and len(scores[0]) == 12


def test_the_cache_of_a_batch_that_never_rests_does_not_grow():
    engine = ENGINES["gpt"]
    batch, rng = Batch(engine, BatchConfig()), random.Random(0)
    batch.add(row_of(engine, Request([50] * 100, SamplingConfig(max_tokens=2))))
    widths = []
    for _ in range(60):
        if rng.random() < 0.5:
            batch.add(row_of(engine, Request([rng.randrange(40, V)] * 3, SamplingConfig(max_tokens=6))))
        batch.turn()
        widths += [group.state.layers[0].pos_BP.shape[1] for group in batch._running]
    assert max(widths) == 101 and max(widths[5:]) <= 9


class Recording(nn.Module):
    """Passes everything on and notes how many tokens it is fed, rows by columns."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config, self.fed = inner, inner.config, []

    def initial_state(self, batch):
        return self.inner.initial_state(batch)

    def forward(self, ids, state, lengths=None):
        self.fed.append(tuple(ids.shape))
        return self.inner(ids, state, lengths)


def test_a_long_prompt_does_not_hold_the_others_up():
    engine = Engine(Recording(ENGINES["titans"].model), TOKENIZER)
    batch = Batch(engine, BatchConfig(prefill_tokens=64))
    short = [row_of(engine, Request([60 + i] * 4, SamplingConfig(max_tokens=20))) for i in range(3)]
    for row in short:
        batch.add(row)
    for _ in range(3):
        batch.turn()
    before = [len(row.tokens) for row in short]
    batch.add(row_of(engine, Request([50] * 640, SamplingConfig(max_tokens=3))))
    for turn in range(1, 10):
        batch.turn()
        assert [len(row.tokens) - n for row, n in zip(short, before)] == [turn] * 3, "a turn without a token"
    assert max(rows * columns for rows, columns in engine.model.fed) <= 64
    assert (3, 1) in engine.model.fed, "running rows did not share a pass"


def test_several_prompts_are_read_in_one_pass():
    engine = Engine(Recording(ENGINES["titans"].model), TOKENIZER)
    batch = Batch(engine, BatchConfig())
    for n in (3, 9, 5):
        batch.add(row_of(engine, Request([50] * n, SamplingConfig(max_tokens=2))))
    batch.turn()
    assert engine.model.fed == [(3, 9), (3, 1)]


@dataclass
class Opaque:
    """A state that nothing is known about."""

    inside: object

    def rows(self, index):
        return Opaque(self.inside.rows(index))


class Strange(Recording):
    """A model of a family that nobody here knows."""

    def initial_state(self, batch):
        return Opaque(SimpleNamespace(inner=self.inner.initial_state(batch)))

    def forward(self, ids, state, lengths=None):
        out = super().forward(ids, state.inside.inner, lengths)
        return Output(out.logits, Opaque(SimpleNamespace(inner=out.state)), out.steps)


def test_models_whose_states_cannot_be_joined_run_row_by_row():
    engine = Engine(Strange(ENGINES["titans"].model), TOKENIZER)
    requests = [Request([50, 51], SAMPLED), Request([60] * 9), Request([70])]
    requests = [Request(r.prompt, r.config.replace(max_tokens=6)) for r in requests]
    results, batch = run_schedule(engine, requests, BatchConfig(), random.Random(1))
    assert not batch.together and {rows for rows, _ in engine.model.fed} == {1}
    assert results == [alone(ENGINES["titans"], request) for request in requests]


# ---- Hugging Face models


def hugging_face(kind):
    from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, Qwen2Config

    from forgekit.models.hf import HFCausalLM

    shape = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": None, "pad_token_id": 0}
    heads = {"intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 1}
    config = {
        "llama": lambda: LlamaConfig(**shape, **heads, max_position_embeddings=96),
        "sliding": lambda: Qwen2Config(
            **shape, **heads, use_sliding_window=True, sliding_window=4, max_window_layers=1, tie_word_embeddings=True
        ),
        "mamba": lambda: MambaConfig(**shape, state_size=4, eos_token_id=1),
    }[kind]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return Engine(HFCausalLM(model).eval(), TOKENIZER)


@pytest.mark.parametrize("kind", ["llama", "sliding"])
def test_hugging_face_models_are_batched_too(kind):
    engine = hugging_face(kind)
    for seed in range(2):
        rng = random.Random(seed)
        requests = some_requests(rng, 5)
        results, batch = run_schedule(engine, requests, BatchConfig(prefill_tokens=16), rng)
        assert batch.together
        assert [r.tokens for r in results] == [alone(engine, request).tokens for request in requests]


def test_hugging_face_models_with_other_caches_run_row_by_row():
    engine = hugging_face("mamba")
    requests = [Request([50] * 20, SamplingConfig(max_tokens=4)), Request([60], SAMPLED)]
    results, batch = run_schedule(engine, requests, BatchConfig(prefill_tokens=8), random.Random(1))
    assert not batch.together
    assert [r.tokens for r in results] == [alone(engine, request).tokens for request in requests]


# ---- the thread


def eventually(what, seconds=5.0):
    """Wait for something another thread does."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


class Slow(Recording):
    """Takes its time over every pass, and fails on demand."""

    def __init__(self, inner, seconds=0.005):
        super().__init__(inner)
        self.seconds, self.error = seconds, None

    def forward(self, ids, state, lengths=None):
        time.sleep(self.seconds)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return super().forward(ids, state, lengths)


ENDLESS = SamplingConfig(max_tokens=100_000, repetition_penalty=1.3)


def slow_engine():
    engine = Engine(Slow(ENGINES["gpt"].model), TOKENIZER)
    engine.end_ids = frozenset()
    return engine


@each_family
def test_who_joins_in_the_middle_changes_nothing(name):
    engine = ENGINES[name]
    long = Request([50, 51, 52], SAMPLED.replace(max_tokens=40, stop=("zz",)))
    short = [Request([60 + i] * (i + 1), SamplingConfig(max_tokens=5 + i)) for i in range(4)]
    with Batcher(engine) as batcher:
        job = batcher.submit([long])
        pieces = job.next()
        others = batcher.submit(short).results()
        pieces += list(job)
    want = alone(engine, long)
    assert "".join(piece.text for piece in pieces) == want.text
    assert [piece.result for piece in pieces if piece.result][0].tokens == want.tokens
    assert [r.tokens for r in others] == [alone(engine, request).tokens for request in short]


def test_several_continuations_of_one_prompt_are_those_of_the_engine():
    engine = ENGINES["titans"]
    with Batcher(engine) as batcher:
        results = batcher.submit([Request("hello", SAMPLED, place=i) for i in range(4)], stream=False).results()
    assert [r.tokens for r in results] == [r.tokens for r in engine.generate(["hello"] * 4, SAMPLED)]
    assert len({tuple(r.tokens) for r in results}) == 4


def test_thirty_two_at_once_and_more_waiting():
    engine = ENGINES["titans"]
    requests = some_requests(random.Random(5), 44)
    with Batcher(engine, BatchConfig(max_rows=32, max_waiting=12)) as batcher:
        jobs = [batcher.submit([request]) for request in requests]
        results = [job.results()[0] for job in jobs]
        eventually(lambda: batcher.load() == {"rows": 0, "waiting": 0})
    assert [r.tokens for r in results] == [alone(engine, request).tokens for request in requests]


def test_scores_are_the_models_own():
    engine = ENGINES["window"]
    request = Request([50, 51, 52], SAMPLED, logprobs=3)
    with Batcher(engine) as batcher:
        pieces = list(batcher.submit([request, Request([60], SAMPLED)]))
    assert not any(piece.scores for piece in pieces if piece.row == 1)
    scores = [score for piece in pieces if piece.row == 0 for score in piece.scores]
    tokens = alone(engine, request).tokens
    assert [score.token for score in scores] == tokens
    logp = engine.model(torch.tensor([request.prompt + tokens])).logits[0].log_softmax(-1)
    for score, row in zip(scores, logp[2:].detach()):
        assert score.logprob == pytest.approx(row[score.token].item(), abs=1e-3)
        values, ids = row.topk(3)
        assert [token for token, _ in score.top] == ids.tolist()
        assert [value for _, value in score.top] == pytest.approx(values.tolist(), abs=1e-3)


def test_the_context_ends_a_text_and_refuses_a_prompt():
    with Batcher(ENGINES["gpt"], BatchConfig(context=8)) as batcher:
        (result,) = batcher.submit([Request([50] * 5, ENDLESS)]).results()
        assert result.finish_reason == "context" and len(result.tokens) == 3
        with pytest.raises(ContextExceeded, match="9 tokens, the context is 8"):
            batcher.submit([Request([50] * 9)])
        for wrong, message in ([], "no tokens"), ("", "no tokens"), ([V], "outside"):
            with pytest.raises(ForgeError, match=message):
                batcher.submit([Request(wrong)])
        assert batcher.load()["rows"] == 0


def test_a_full_queue_refuses_and_a_cancelled_request_makes_room():
    with Batcher(slow_engine(), BatchConfig(max_rows=2, max_waiting=1)) as batcher:
        running = batcher.submit([Request([50], ENDLESS), Request([51], ENDLESS)])
        running.next()
        waiting = batcher.submit([Request([52], ENDLESS)])
        with pytest.raises(QueueFull, match="all 3 places"):
            batcher.submit([Request([53])])
        assert batcher.load() == {"rows": 3, "waiting": 1}
        running.cancel()
        with pytest.raises(Cancelled):
            list(running)
        assert waiting.next(), "the freed place was not given on"
        waiting.cancel()
        eventually(lambda: batcher.load()["rows"] == 0)


def test_a_request_expires_running_or_waiting():
    with Batcher(slow_engine(), BatchConfig(max_rows=1)) as batcher:
        running = batcher.submit([Request([50], ENDLESS)], limit=0.15)
        waiting = batcher.submit([Request([51], ENDLESS)], limit=0.05)
        for job in (waiting, running):
            with pytest.raises(Expired, match="longer than its limit"):
                list(job)
        eventually(lambda: batcher.load()["rows"] == 0)


def test_a_failed_pass_ends_its_requests_only():
    engine = slow_engine()
    with Batcher(engine) as batcher:
        job = batcher.submit([Request([50], ENDLESS)])
        job.next()
        engine.model.error = RuntimeError("out of memory\nlong story")
        with pytest.raises(ModelFailure, match="^model: RuntimeError: out of memory$"):
            list(job)
        eventually(lambda: batcher.load()["rows"] == 0)
        (result,) = batcher.submit([Request([50], SamplingConfig(max_tokens=4))]).results()
        assert result.tokens == alone(ENGINES["gpt"], Request([50], SamplingConfig(max_tokens=4))).tokens


def test_a_failure_between_reading_and_running_loses_nobody(monkeypatch):
    with Batcher(slow_engine()) as batcher:
        running = batcher.submit([Request([50], ENDLESS)])
        running.next()

        def no_memory(groups):
            raise RuntimeError("out of memory")

        monkeypatch.setattr("forgekit.infer.batcher._joined", no_memory)
        joining = batcher.submit([Request([51], ENDLESS)])
        for job in (joining, running):
            with pytest.raises(ModelFailure, match="out of memory"):
                list(job)
        eventually(lambda: batcher.load()["rows"] == 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_nobody_expects_ends_everything_and_nobody_waits_for_ever():
    engine = slow_engine()
    batcher = Batcher(engine)
    job = batcher.submit([Request([50], ENDLESS)])
    job.next()
    engine.model.error = TypeError("a mistake of ours")
    with pytest.raises(Closed):
        list(job)
    with pytest.raises(Closed):
        batcher.submit([Request([50])])
    batcher.close()


def test_weights_that_are_not_numbers_fail_the_request():
    model = made(CONFIGS["gpt"])
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with Batcher(Engine(model, TOKENIZER)) as batcher, pytest.raises(ModelFailure, match="NaN"):
        batcher.submit([Request([50], SAMPLED)]).results()


def test_closing_lets_what_runs_finish_within_the_grace_and_ends_the_rest():
    engine = slow_engine()
    engine.model.train()
    batcher = Batcher(engine, BatchConfig(max_rows=2))
    short = batcher.submit([Request([50], SamplingConfig(max_tokens=5))])
    long = batcher.submit([Request([51], ENDLESS)])
    waiting = batcher.submit([Request([52], ENDLESS)])
    batcher.close(grace=0.3)
    assert len(short.results()[0].tokens) == 5
    for job in (long, waiting):
        with pytest.raises(Closed):
            list(job)
    with pytest.raises(Closed, match="shutting down"):
        batcher.submit([Request([50])])
    assert batcher.closing and batcher.load() == {"rows": 0, "waiting": 0}
    assert engine.model.training, "eval mode was not undone"
