"""Generation: cached equals uncached, a batch equals its rows, pieces equal the whole, turns equal a fresh start."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from forgekit.data.tokenizer import END, question, train_tokenizer
from forgekit.errors import ConfigError, ForgeError
from forgekit.infer.chat import Chat, conversation_ids
from forgekit.infer.engine import Engine, Session, _Decoding
from forgekit.infer.sampling import SamplingConfig
from forgekit.infer.text import TextStream
from forgekit.models.base import CausalLM, Output
from forgekit.models.config import GPTConfig, TRMTitansConfig
from forgekit.models.io import build_model

TOKENIZER = train_tokenizer(["hello world, this is some text with digits 123 and äöü 😀 €. "] * 5, 310)
V = TOKENIZER.get_vocab_size()
TINY = {"vocab_size": V, "d_model": 16, "n_heads": 2, "n_layers": 2, "ffn_hidden": 16, "max_seq_len": 16}
MEMORY = {"d_mem": 8, "memory_heads": 2, "memory_chunk": 3, "gate_hidden": 4, "trm_hidden": 8}
CONFIGS = [
    GPTConfig(**TINY),
    GPTConfig(**TINY, window=4, emb_rank=4),
    TRMTitansConfig(**TINY, **MEMORY, window=4, memory="titans", t_max=2),
    TRMTitansConfig(**TINY, **MEMORY, window=3, memory="decay", t_max=0),
    TRMTitansConfig(**TINY, **MEMORY, window=5, memory="none", t_max=2),
]
NAMES = ["gpt", "gpt-window", "titans", "decay", "no-memory"]


pytestmark = pytest.mark.usefixtures("one_thread")


def make(config, seed=0):
    """A model in which nothing is silent: zero-initialised weights hide mistakes."""
    torch.manual_seed(seed)
    model = build_model(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def uncached(model, prompt, count):
    """Greedy tokens by scoring the whole text anew each time, up to the first near tie; no thoughts."""
    ids = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([ids])).logits[0, -1]
        logits[[TOKENIZER.token_to_id(marker) for marker in ("<think>", "</think>")]] = -torch.inf
        top = logits.topk(2)
        if top.values[0] - top.values[1] < 1e-3:
            break
        ids.append(top.indices[0].item())
        if ids[-1] == TOKENIZER.token_to_id(END):
            break
    return ids[len(prompt) :]


family = st.sampled_from(["gpt", "titans", "decay", "none"])


@settings(max_examples=40, deadline=None)
@given(
    family=family,
    window=st.integers(0, 6),
    t_max=st.sampled_from([0, 2]),
    chunk=st.integers(1, 5),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_cached_logits_equal_uncached(family, window, t_max, chunk, lengths, seed):
    if family == "gpt":
        config = GPTConfig(**TINY, window=window, qk_norm=bool(seed % 2))
    else:
        sizes = {**MEMORY, "memory_chunk": chunk}
        config = TRMTitansConfig(**TINY, **sizes, window=window or 1, memory=family, t_max=t_max)
    model = make(config, seed)
    rows = [torch.randint(2, V, (n + 5,)).tolist() for n in lengths]
    with torch.inference_mode():
        want = [model(torch.tensor([row])).logits[0] for row in rows]  # of size 40: a thousandth is rounding
        width = max(lengths)
        padded = torch.tensor([(row[:n] + [0] * width)[:width] for row, n in zip(rows, lengths)])
        out = model(padded, model.initial_state(len(rows)), torch.tensor(lengths))
        for b, n in enumerate(lengths):
            torch.testing.assert_close(out.logits[b, :n], want[b][:n], rtol=1e-3, atol=1e-3)
        for step in range(5):
            token = torch.tensor([[row[n + step]] for row, n in zip(rows, lengths)])
            out = model(token, out.state)
            got = torch.stack([want[b][n + step] for b, n in enumerate(lengths)])
            torch.testing.assert_close(out.logits[:, 0], got, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_greedy_batch_equals_single_runs_and_uncached(config):
    model = make(config)
    engine, settings_ = Engine(model, TOKENIZER), SamplingConfig(max_tokens=30, thinking="off")
    prompts = [[40], list(range(50, 61)), "hello", [40, 41, 42, 43]]
    together = engine.generate(prompts, settings_)
    assert isinstance(model, CausalLM)
    for prompt, result in zip(prompts, together):
        (alone,) = engine.generate([prompt], settings_)
        assert alone == result
        ids = TOKENIZER.encode(prompt).ids if isinstance(prompt, str) else prompt
        want = uncached(model, ids, 30)
        assert result.tokens[: len(want)] == want
        assert len(want) > 3, "ties everywhere: choose another seed"
        assert result.prompt_tokens == len(ids)
        assert (result.mean_steps is None) == (getattr(config, "t_max", 0) == 0)
        # Beyond max_seq_len nothing ends: neither family has a hard limit.
        assert result.finish_reason == "length" and len(result.tokens) == 30


def test_mean_steps_counts_the_steps_that_made_the_tokens():
    model = make(CONFIGS[2])
    with torch.no_grad():
        model.recursion.teacher_bias.fill_(100.0)
    assert Engine(model, TOKENIZER).generate([[40]], SamplingConfig(max_tokens=4))[0].mean_steps == 1.0


@pytest.mark.parametrize("config", CONFIGS[:3], ids=NAMES[:3])
def test_sampled_rows_do_not_depend_on_their_neighbours(config):
    engine = Engine(make(config), TOKENIZER)
    sampling = SamplingConfig(max_tokens=12, temperature=1.0, top_k=50, repetition_penalty=1.1)
    prompts = [[40], [50, 51, 52], [60, 61]]
    together = engine.generate(prompts, sampling, seeds=[5, 6, 7])
    for prompt, seed, want in zip(prompts, [5, 6, 7], together):
        assert engine.generate([prompt], sampling.replace(seed=seed)) == [want]
        assert "".join(engine.stream(prompt, sampling.replace(seed=seed))) == want.text
    same = engine.generate([[40], [40]], sampling)
    assert same[0].tokens != same[1].tokens, "two rows share their randomness"


class Script(nn.Module):
    """Says a fixed list of tokens to each first prompt token, and counts what it is fed."""

    def __init__(self, lines, **attributes):
        super().__init__()
        self.lines, self.config, self.fed = lines, SimpleNamespace(vocab_size=V), []
        self.nothing = nn.Parameter(torch.zeros(()))
        for name, value in attributes.items():
            setattr(self, name, value)

    def initial_state(self, batch):
        return ScriptState([[] for _ in range(batch)])

    def forward(self, ids, state, lengths=None):
        assert not self.training and torch.is_inference_mode_enabled()
        lengths = [ids.shape[1]] * len(ids) if lengths is None else lengths.tolist()
        self.fed.append(list(lengths))
        seen = [old + row[:n] for old, row, n in zip(state.seen, ids.tolist(), lengths)]
        logits = torch.zeros(*ids.shape, V)
        for b, (row, n) in enumerate(zip(seen, lengths)):
            line = self.lines[row[0]]
            logits[b, n - 1, line[(len(row) - 1) % len(line)]] = 1
        return Output(logits, ScriptState(seen))


class ScriptState:
    def __init__(self, seen):
        self.seen = seen

    def rows(self, index):
        return ScriptState([self.seen[i] for i in index.tolist()])


def speaker(*texts, **attributes):
    """An engine that answers prompt [40 + i] with text i."""
    ids = [TOKENIZER.encode(text).ids for text in texts]
    model = Script({40 + i: line for i, line in enumerate(ids)}, **attributes)
    return Engine(model, TOKENIZER), ids


def test_finished_rows_leave_the_batch():
    engine, ids = speaker(f"hello{END}", f"hello world, this is some text 123{END}", f"{END}")
    engine.model.train()
    results = engine.generate([[40], [41], [42]], SamplingConfig(max_tokens=100))
    assert [r.text for r in results] == ["hello", "hello world, this is some text 123", ""]
    assert [r.tokens for r in results] == ids
    assert {r.finish_reason for r in results} == {"stop"}
    sizes = [len(step) for step in engine.model.fed]
    assert sizes == [sum(len(line) > i for line in ids) for i in range(max(map(len, ids)))]
    assert engine.model.training, "eval mode was not undone"


def test_more_prompts_than_memory_allows_are_answered_in_several_batches(monkeypatch):
    engine = Engine(make(CONFIGS[2]), TOKENIZER)
    prompts, sampling = [[40 + i] * (1 + i % 3) for i in range(7)], SamplingConfig(max_tokens=6, temperature=1.0)
    want = engine.generate(prompts, sampling)
    monkeypatch.setattr("forgekit.infer.engine.MOST_SCORES", 3 * 3 * V)
    sizes, prefill = [], _Decoding.prefill

    def noted(decoding, mark=None):
        sizes.append(len(decoding.active))
        prefill(decoding, mark)

    monkeypatch.setattr(_Decoding, "prefill", noted)
    assert engine.generate(prompts, sampling) == want and sizes == [3, 3, 1]


def test_every_modules_mode_is_restored_also_after_an_error():
    engine, _ = speaker("x")
    engine.model.extra = nn.Dropout().eval()
    engine.model.train()
    engine.model.extra.eval()
    engine.model.lines = {}
    with pytest.raises(KeyError):
        engine.generate([[40]])
    assert engine.model.training and not engine.model.extra.training


def test_reserved_tokens_are_not_rendered():
    engine, ids = speaker(f"<step>hello<mece> world<|spare_3|>{END}")
    (result,) = engine.generate([[40]])
    assert result.text == "hello world" and result.tokens == ids[0]


def test_stop_strings_end_the_text_even_across_tokens_and_never_leak():
    engine, ids = speaker(f"hello world, this is{END}")
    for stop, want in [("wor", "hello "), ("d, t", "hello worl"), ("s i", "hello world, thi"), ("zz", None)]:
        sampling = SamplingConfig(stop=("qq", stop))
        (result,) = engine.generate([[40]], sampling)
        pieces = list(engine.stream([40], sampling))
        assert "".join(pieces) == result.text == (want or "hello world, this is")
        assert result.finish_reason == "stop"
        assert want is None or len(result.tokens) < len(ids[0])


def test_limits_length_and_context():
    engine, _ = speaker("hello world, this is some text")
    assert engine.generate([[40]], SamplingConfig(max_tokens=3))[0].finish_reason == "length"
    limited, _ = speaker("hello world, this is some text", context_limit=4)
    (result,) = limited.generate([[40]])
    assert result.finish_reason == "context" and len(result.tokens) == 3
    with pytest.raises(ForgeError, match="5 tokens, the model's context is 4"):
        limited.generate([[40] * 5])


def test_an_unfinished_stop_or_character_is_released_at_the_end():
    engine, ids = speaker("ab")
    assert engine.generate([[40]], SamplingConfig(max_tokens=len(ids[0]), stop=("abc",)))[0].text == "ab"
    stream = TextStream(BYTES)
    stream.push(BYTES.encode("é").ids[0])
    assert stream.take() == ""
    assert not stream.close()
    assert stream.take() == "\ufffd"


def test_a_stop_string_seen_only_when_the_last_bytes_are_released_still_stops():
    halves = SimpleNamespace(decode=lambda ids, skip_special_tokens: "a stop \ufffd" if ids else "")
    stream = TextStream(halves, ("stop",))
    assert not stream.push(1)
    assert stream.close() and stream.text == "a "


def test_of_several_stop_strings_the_one_complete_first_counts_however_the_text_is_cut():
    whole = SimpleNamespace(decode=lambda ids, skip_special_tokens: "xabc"[: 4 * len(ids)])
    stream = TextStream(whole, ("abc", "b"))
    assert stream.push(1) and stream.text == "xa"
    stream = TextStream(BYTES, ("abc", "b"))
    assert [stream.push(token) for token in BYTES.encode("xab").ids] == [False, False, True]
    assert stream.text == "xa"


BYTES = train_tokenizer([chr(i) for i in range(32, 127)] * 3, 288)
"""One token per byte: every character beyond ASCII is cut."""


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=12), st.lists(st.text("ab€", min_size=1, max_size=3), max_size=2))
def test_pieces_are_whole_characters_and_join_to_the_text(text, stops):
    for tokenizer in (BYTES, TOKENIZER):
        ids = tokenizer.encode(text).ids
        stream, pieces = TextStream(tokenizer, stops), []
        stopped = False
        for token in ids:
            stopped = stream.push(token)
            pieces.append(stream.take())
            if stopped:
                break
        stopped = stream.close() or stopped
        pieces.append(stream.take())
        assert "\ufffd" not in "".join(pieces) or "\ufffd" in text
        assert "".join(pieces) == stream.text
        ends = [text.find(s) + len(s) for s in stops if s in text]
        assert stopped == bool(ends)
        if not ends:
            assert stream.text == text
        else:
            assert text.startswith(stream.text) and not any(s in stream.text for s in stops)
            assert any(text[len(stream.text) :].startswith(s) for s in stops)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 287), max_size=12))
def test_any_tokens_stream_to_what_decoding_them_gives(ids):
    stream = TextStream(BYTES)
    for token in ids:
        stream.push(token)
    stream.close()
    assert stream.text == BYTES.decode(ids, skip_special_tokens=True)


def test_bad_prompts_are_refused_at_once():
    engine, _ = speaker("x")
    assert engine.generate([]) == []
    with pytest.raises(ForgeError, match="prompt 1: has no tokens"):
        engine.generate([[40], ""])
    with pytest.raises(ForgeError, match=f"token {V} is outside"):
        engine.stream([40, V])
    assert engine.model.fed == []


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_session_equals_reading_the_whole_conversation_anew(config, temperature):
    engine = Engine(make(config), TOKENIZER)
    sampling = SamplingConfig(max_tokens=8, temperature=temperature, seed=3)
    session, conversation = Session(engine), [40, 41, 42]
    for turn in range(3):
        text = "".join(session.stream(conversation, sampling))
        (want,) = engine.generate([conversation], sampling)
        assert session.last == want and text == want.text
        # The drawn last token was never fed, so it is read together with the new ones.
        assert session.prefilled == (3 if turn == 0 else 1 + 2)
        conversation = conversation + want.tokens + [60 + turn, 61]
    again = [*conversation[:3], 99, 98]
    "".join(session.stream(again, sampling))
    assert session.last == engine.generate([again], sampling)[0]


def test_a_session_keeps_what_is_common_and_survives_being_cut_off():
    engine, _ = speaker("hello world, this is some text")
    session = Session(engine)
    pieces = session.stream([40, 41, 42])
    next(pieces)
    pieces.close()
    assert session.last is None
    list(session.stream([40, 41, 42, 50], SamplingConfig(max_tokens=2)))
    assert session.prefilled == 1, "the question was read twice"
    list(session.stream([40, 41, 42, 50], SamplingConfig(max_tokens=2)))
    assert session.prefilled == 0 and len(session.last.tokens) == 2


def test_chat_shows_the_forges_models_the_last_question_only():
    engine = Engine(make(CONFIGS[0]), TOKENIZER)
    chat = Chat(engine, SamplingConfig(max_tokens=5))
    first = "".join(chat.say("hello"))
    second = "".join(chat.say("hello"))
    assert first == second == engine.generate([question("hello")], SamplingConfig(max_tokens=5))[0].text
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    chat.reset()
    assert chat.messages == []


def test_chat_remembers_on_request():
    engine = Engine(make(CONFIGS[2]), TOKENIZER)
    chat = Chat(engine, SamplingConfig(max_tokens=5, temperature=1.0), remember=True)
    "".join(chat.say("hello"))
    history = [*chat.messages, {"role": "user", "content": "world"}]
    answer = "".join(chat.say("world"))
    prompt = conversation_ids(TOKENIZER, history)
    (want,) = engine.generate([prompt], chat.config.replace(seed=1))
    assert answer == want.text
    assert chat.session.prefilled < len(prompt)


def test_chat_that_no_longer_fits_keeps_its_history():
    engine, _ = speaker("x", context_limit=6)
    chat = Chat(engine)
    with pytest.raises(ForgeError, match="context is 6"):
        chat.say("a question that is too long")
    assert chat.messages == []


def test_conversations_without_a_chat_format_are_plain_text():
    plain = SimpleNamespace(chat_text=lambda m: None, token_to_id=lambda t: None, encode=BYTES.encode)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert BYTES.decode(conversation_ids(plain, messages)) == "a\n\nb\n\n"


def test_chat_settings():
    chat = Chat(speaker("x")[0], SamplingConfig(max_tokens=9))
    config = chat.set_params("temperature=0.7 top_k=20 stop='a b'")
    assert (config.temperature, config.top_k, config.stop, config.max_tokens) == (0.7, 20, ("a b",), 9)
    assert chat.set_params("stop=").stop == () and chat.config.temperature == 0.7
    for text, message in [
        ("temprature=1", "did you mean temperature"),
        ("top_k=many", "top_k"),
        ("top_k", "name=value"),
        ("stop='a", "quotation"),
    ]:
        with pytest.raises(ConfigError, match=message):
            chat.set_params(text)
    assert chat.config.temperature == 0.7
