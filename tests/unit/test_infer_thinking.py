"""Thoughts: they end, they come apart from the answer, they cost one pass a token, and who has none notices nothing."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from agent_forge.cli.commands_talk import MARKER, _Aside
from forgekit.data.tokenizer import END, train_tokenizer
from forgekit.errors import ForgeError
from forgekit.infer.batcher import Batch, BatchConfig, Batcher, Job, Request, Row
from forgekit.infer.chat import Chat, conversation_ids
from forgekit.infer.engine import Engine, Session, next_tokens
from forgekit.infer.sampling import SamplingConfig, row_generator, sample
from forgekit.infer.thinking import Markers, NoThoughts, Said, Speech, Thinking, begin
from forgekit.models.base import Output
from forgekit.models.io import read_model, write_model
from tests.unit.tiny import gpt_config, made, trm_config

TOKENIZER = train_tokenizer(["hello world, this is some text with digits 123 and äöü 😀 €. "] * 5, 310)
V = TOKENIZER.get_vocab_size()
END_ID, ASK, OPEN, CLOSE, STEP = (
    TOKENIZER.token_to_id(t) for t in (END, "<|assistant|>", "<think>", "</think>", "<step>")
)
MARKERS = Markers(OPEN, CLOSE, frozenset({END_ID}), frozenset({END_ID, ASK}))
modes = st.sampled_from(["auto", "on", "off"])

pytestmark = pytest.mark.usefixtures("one_thread")


def ids(text):
    return TOKENIZER.encode(text).ids


# ---- the rules


@settings(max_examples=200, deadline=None)
@given(
    mode=modes,
    budget=st.integers(0, 12),
    room=st.integers(1, 14),
    opened=st.booleans(),
    wishes=st.lists(st.sampled_from([OPEN, CLOSE, END_ID, STEP, 50]), min_size=14, max_size=14),
)
def test_whatever_a_model_wants_there_is_one_thought_at_most_and_it_ends(mode, budget, room, opened, wishes):
    config = SamplingConfig(thinking=mode, thinking_budget=budget)
    state, said = begin(MARKERS, config, [50, OPEN] if opened else [OPEN, 50, ASK], room), []
    while len(said) < room and said[-1:] != [END_ID]:
        forced = state.must(len(said))
        wish = forced if forced is not None else wishes[len(said)]
        said.append(60 if forced is None and wish in state.barred else wish)
        state = state.then(said[-1], len(said) - 1)
    line = [OPEN, *said] if opened else said
    if not opened:
        assert (line[0] == OPEN) == (mode == "on" or (mode == "auto" and wishes[0] == OPEN))
    if OPEN not in line:
        assert CLOSE not in line and state.stage == "after"
        return
    assert line.index(OPEN) == 0 and line.count(OPEN) == 1 and line.count(CLOSE) <= 1
    inner = line[1 : line.index(CLOSE) if CLOSE in line else None]
    assert END_ID not in inner and len(inner) <= (budget or room * 3 // 4)
    if mode == "off":
        assert inner == []
    shortest = 2 if opened else 3
    assert CLOSE in line or room < shortest, "a thought that never ends"
    if room >= shortest:
        assert line[-1] != CLOSE, "no room was left for the answer"


def test_a_thought_in_the_prompt_counts_in_its_last_turn_only():
    config = SamplingConfig()
    for prompt, stage in [
        ([50, OPEN], "inside"),
        ([50, OPEN, 51, STEP], "inside"),
        ([50, OPEN, CLOSE], "after"),
        ([50, ASK, OPEN, 51, CLOSE, 52], "after"),
        ([50, ASK, OPEN, 51, CLOSE, 52, END_ID, 50, ASK], "before"),
        ([50, OPEN, END_ID, 51], "before"),
        ([50, OPEN, ASK], "before"),  # a user who writes about <think>
        ([50], "before"),
    ]:
        assert begin(MARKERS, config, prompt, 9).stage == stage, prompt
    closed = begin(MARKERS, config, [50, OPEN, CLOSE], 9)
    assert closed.must(0) is None and closed.barred == {OPEN, CLOSE}
    assert begin(MARKERS, SamplingConfig(thinking="on"), [50, OPEN, CLOSE], 9).must(0) == OPEN


def test_without_markers_there_are_no_rules_and_thinking_on_is_refused():
    plain = SimpleNamespace(token_to_id=lambda token: {"<think>": 3}.get(token))
    assert Markers.of(plain, V) is None and Markers.of(TOKENIZER, CLOSE) is None
    assert Markers.of(TOKENIZER, V, frozenset({END_ID})) == MARKERS
    for mode in ("auto", "off"):
        assert begin(None, SamplingConfig(thinking=mode), [50], 9) == Thinking()
    with pytest.raises(NoThoughts, match="^thinking: the tokenizer has no <think> and </think>; .*thinking=auto$"):
        begin(None, SamplingConfig(thinking="on"), [50], 9)
    engine = speaker(["hello"])
    engine.markers = None
    for ask in (engine.generate, lambda prompts, config: engine.stream(prompts[0], config)):
        with pytest.raises(ForgeError, match="no <think>"):
            ask([[40]], SamplingConfig(thinking="on"))
    assert engine.generate([[40]], SamplingConfig(thinking="off"))[0].text == "hello"


def test_the_settings_refuse_what_they_do_not_know():
    for wrong in ({"thinking": "maybe"}, {"thinking_budget": -1}):
        with pytest.raises(ForgeError, match=next(iter(wrong))):
            SamplingConfig.build(wrong)


# ---- a model that says what it is told to


class Wishes(nn.Module):
    """Wants fixed tokens: at every place after the prompt a first choice, then another. The prompt's first token says
    which line; the last place of a line goes on for ever."""

    def __init__(self, lines, **attributes):
        super().__init__()
        self.lines, self.config, self.fed = lines, SimpleNamespace(vocab_size=V), []
        self.nothing = nn.Parameter(torch.zeros(()))
        for name, value in attributes.items():
            setattr(self, name, value)

    def initial_state(self, batch):
        return Seen(torch.zeros(batch, 2, dtype=torch.long))

    def forward(self, ids_BT, state, lengths=None):
        self.fed.append(tuple(ids_BT.shape))
        first_B, passes_B = state.seen.T
        seen = torch.stack([torch.where(passes_B == 0, ids_BT[:, 0], first_B), passes_B + 1], 1)
        last = torch.full((len(ids_BT),), ids_BT.shape[1]) - 1 if lengths is None else lengths - 1
        logits = torch.zeros(*ids_BT.shape, V)
        for b, (first, passes) in enumerate(seen.tolist()):
            line = self.lines[first]
            for rank, token in enumerate(line[min(passes, len(line)) - 1]):
                logits[b, last[b], token] = 100.0 - 10 * rank
        return Output(logits, Seen(seen))


class Seen:
    """The first token of every row, and how many passes it has had."""

    def __init__(self, seen):
        self.seen = seen

    def rows(self, index):
        return Seen(self.seen[index])


def speaker(*lines, **attributes):
    """An engine that wants to say line i to prompt [40 + i]; a line is texts, each token's second choice is "x"."""
    other = ids("x")[0]
    wanted = [[(token, other) for text in line for token in ids(text)] + [(END_ID, other)] for line in lines]
    return Engine(Wishes(dict(enumerate(wanted, start=40)), **attributes), TOKENIZER)


def test_thought_and_answer_come_apart_whole_and_in_pieces():
    engine = speaker(["<think>", "<step>hello äö<mece>", " world", "</think>", "this"])
    (result,) = engine.generate([[40]])
    assert result.thought == "<step>hello äö<mece> world" and result.text == "this"
    thought, answer = ids("<think><step>hello äö<mece> world</think>"), ids("this")
    assert result.tokens == [*thought, *answer, END_ID] and result.thinking_tokens == len(thought)
    assert ids(result.thought) == thought[1:-1]
    session = Session(engine)
    pieces = list(session.speak([40]))
    assert session.last == result
    assert "".join(p.text for p in pieces if p.thought) == result.thought
    assert [p.thought for p in pieces] == sorted((p.thought for p in pieces), reverse=True) and len(pieces) > 4
    assert "".join(engine.stream([40])) == "this"


def test_an_unfinished_character_of_a_thought_is_told_before_the_answer():
    engine = speaker(["<think>", "a", "</think>", "b"])
    cut = next(token for token in range(40, V) if TOKENIZER.decode([token]) == "\ufffd")
    engine.model.lines[40][1] = (cut, cut)
    assert list(Session(engine).speak([40])) == [Said("\ufffd", True), Said("b")]


def test_the_markers_after_the_answer_has_begun_are_the_next_choice():
    engine = speaker(["hello", "<think>", "</think>", "!"], ["<think>a</think>b", "<think>", "</think>", "c"])
    first, second = engine.generate([[40], [41]])
    assert (first.text, first.thought, first.thinking_tokens) == ("helloxx!", "", 0)
    assert (second.text, second.thought, second.thinking_tokens) == ("bxxc", "a", 3)


def test_on_thinks_and_off_does_not_whatever_the_model_wants():
    engine = speaker(["<think>", "a", "</think>", "b"], ["a", "b", "</think>", "c"])
    on = engine.generate([[40], [41]], SamplingConfig(thinking="on"))
    # The second model wanted "a" where the marker was forced: it goes on with its second token.
    assert [(r.thought, r.text) for r in on] == [("a", "b"), ("b", "c")]
    off = engine.generate([[40], [41]], SamplingConfig(thinking="off"))
    assert [(r.thought, r.text) for r in off] == [("", "xaxb"), ("", "abxc")]
    assert [r.thinking_tokens for r in off] == [0, 0]


@pytest.mark.parametrize(
    ("max_tokens", "budget", "inner"), [(16, 0, 12), (16, 5, 5), (16, 99, 13), (4, 9, 1), (3, 0, 0)]
)
def test_a_thought_that_never_ends_is_ended_and_answered(max_tokens, budget, inner):
    engine = speaker(["<think>", "a" * 60])
    config = SamplingConfig(max_tokens=max_tokens, thinking_budget=budget)
    (result,) = engine.generate([[40]], config)
    a, answer = ids("a")[0], max_tokens - inner - 2
    assert result.tokens == [OPEN, *[a] * inner, CLOSE, *[a] * answer] and answer > 0
    assert result.thought == "a" * inner and result.thinking_tokens == inner + 2
    assert result.text == "a" * answer and result.finish_reason == "length"
    (batched,) = in_batch(engine, [Request([40], config)])
    assert batched == result


def test_without_room_for_an_answer_there_is_none():
    engine = speaker(["<think>", "a" * 60])
    assert engine.generate([[40]], SamplingConfig(max_tokens=1))[0].tokens == [OPEN]
    assert engine.generate([[40]], SamplingConfig(max_tokens=2))[0].tokens == [OPEN, CLOSE]


def test_the_context_bounds_a_thought_too():
    engine = speaker(["<think>", "a" * 60], context_limit=13)
    (result,) = engine.generate([[40]])
    assert result.finish_reason == "context" and result.thought == "a" * 9 and result.text == "a"
    free = speaker(["<think>", "a" * 60])
    (batched,) = in_batch(free, [Request([40], SamplingConfig())], context=13)
    assert batched == result


def test_a_text_does_not_end_in_a_thought():
    engine = speaker(["<think>", "a", END, "b", "</think>", "c"])
    engine.model.end_ids = (V + 5,)  # some tokenizers name end tokens that the model does not score
    engine = Engine(engine.model, TOKENIZER)
    (result,) = engine.generate([[40]])
    assert (result.thought, result.text, result.finish_reason) == ("axb", "c", "stop")


def test_stop_strings_are_for_the_answer():
    engine = speaker(["<think>", "so stop here", "</think>", "now stop there"])
    config = SamplingConfig(stop=("stop",))
    (result,) = engine.generate([[40]], config)
    assert (result.thought, result.text, result.finish_reason) == ("so stop here", "now ", "stop")
    assert "".join(engine.stream([40], config)) == "now "
    assert in_batch(engine, [Request([40], config)]) == [result]


def test_a_prompt_that_opens_the_thought_begins_inside_it():
    engine = speaker(["a", "b", "</think>", "c"])
    (result,) = engine.generate([[40, OPEN]])
    assert (result.thought, result.text, result.thinking_tokens) == ("ab", "c", 3)
    (on,) = engine.generate([[40, OPEN]], SamplingConfig(thinking="on"))
    assert on == result
    (off,) = engine.generate([[40, OPEN]], SamplingConfig(thinking="off"))
    assert off.tokens[0] == CLOSE and (off.thought, off.text, off.thinking_tokens) == ("", "bxc", 1)


# ---- nothing is read twice


def in_batch(engine, requests, **config):
    """What a batch makes of the requests, all let in at once."""
    batch, rows = Batch(engine, BatchConfig(**config)), []
    for request in requests:
        prompt, generator = list(request.prompt), row_generator(request.config.seed, request.place)
        speech = engine.speech(prompt, request.config, batch.context)
        rows.append(Row(len(rows), Job(1), request, prompt, speech, generator))
        batch.add(rows[-1])
    while batch.rows:
        batch.turn()
    return [row.job.results()[0] for row in rows]


def test_a_thought_costs_one_pass_a_token_and_the_prompt_is_read_once():
    engine = speaker(["<think>", "hello world", "</think>", "this"])
    session, prompt = Session(engine), [40] * 7
    for make in (
        lambda: engine.generate([prompt])[0],
        lambda: in_batch(engine, [Request(prompt)])[0],
        lambda: list(session.speak(prompt)) and session.last,
    ):
        engine.model.fed.clear()
        result = make()
        assert result.thought == "hello world" and result.text == "this"
        # Everything but the last token, which nobody needs to read.
        assert engine.model.fed == [(1, 7)] + [(1, 1)] * (len(result.tokens) - 1)


# ---- company


class Tilted(nn.Module):
    """A model with some tokens made likelier."""

    def __init__(self, inner, tilt):
        super().__init__()
        self.inner, self.config, self.tilt = inner, inner.config, tilt
        self.initial_state = inner.initial_state

    def forward(self, ids_BT, state=None, lengths=None):
        out = self.inner(ids_BT, state, lengths)
        for token, more in self.tilt.items():
            out.logits[..., token] += more
        return out


def tilted(config, tilt):
    return Engine(Tilted(made(config, stir=0.3), tilt).eval(), TOKENIZER)


FAMILIES = {"gpt": gpt_config(vocab_size=V), "titans": trm_config(vocab_size=V)}
SCALE = {"gpt": 1.0, "titans": 3.0}
"""How far apart a family's scores are: tilts are in these units."""
TILT = {OPEN: 4.0, CLOSE: 2.4, END_ID: 2.0}
THINKERS = {
    name: tilted(config, {token: more * SCALE[name] for token, more in TILT.items()})
    for name, config in FAMILIES.items()
}


def mixed(count):
    """Requests with every way of thinking, drawn and greedy."""
    ways = [("auto", 0), ("on", 4), ("off", 0), ("on", 0), ("auto", 3)]
    return [
        Request(
            [40 + i] * (1 + i % 5),
            SamplingConfig(
                thinking=ways[i % 5][0],
                thinking_budget=ways[i % 5][1],
                temperature=float(i % 4 > 0),
                top_k=30 * (i % 3 == 1),
                repetition_penalty=1.2 if i % 3 == 2 else 1.0,
                max_tokens=12 + i,
                seed=i,
            ),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_seed_gives_the_same_thoughts_alone_and_in_company(name):
    engine, requests = THINKERS[name], mixed(20)
    alone = [engine.generate([r.prompt], r.config)[0] for r in requests]
    thoughts = [r.thinking_tokens > 0 for r in alone]
    assert all(thoughts[i] for i in range(20) if i % 5 in (1, 3)), "on, and no thought"
    assert not any(thoughts[i] for i in range(20) if i % 5 == 2)
    assert len({thoughts[i] for i in range(20) if i % 5 in (0, 4)}) == 2, "auto never thinks, or always: another tilt"
    together = in_batch(engine, requests)
    with Batcher(engine, BatchConfig(max_rows=6)) as batcher:
        jobs = [batcher.submit([r]) for r in requests]
        pieces = [list(job) for job in jobs]
    for want, got, said in zip(alone, together, pieces, strict=True):
        result = said[-1].result
        for other in (got, result):
            assert (other.tokens, other.text, other.thought) == (want.tokens, want.text, want.thought)
            assert (other.thinking_tokens, other.finish_reason) == (want.thinking_tokens, want.finish_reason)
        assert "".join(p.text for p in said) == want.text and "".join(p.thought for p in said) == want.thought
        begun = next((i for i, p in enumerate(said) if p.text), len(said))
        assert not any(p.thought for p in said[begun + 1 :]), "a piece of the thought after the answer began"
    config = SamplingConfig(temperature=1.0, max_tokens=14)
    prompts = [r.prompt for r in requests]
    batch = engine.generate(prompts, config, seeds=range(20))
    assert len({r.thinking_tokens > 0 for r in batch}) == 2
    for seed, want in enumerate(batch):
        assert engine.generate([prompts[seed]], config.replace(seed=seed))[0].tokens == want.tokens


def without_rules(engine, prompt, config, seed):
    """Tokens drawn as if there were no thoughts, everything scored anew for each."""
    said, generator = list(prompt), row_generator(seed, 0)
    while len(said) - len(prompt) < config.max_tokens and said[-1] != END_ID:
        with torch.inference_mode():
            logits = engine.model(torch.tensor([said])).logits[:, -1]
        said.append(int(sample(logits, config, [generator], [said])))
    return said[len(prompt) :]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_never_thinks_draws_what_it_drew_before(name, temperature):
    """Also where it is close to it: excluding the markers from the start would move all other draws."""
    engine = tilted(FAMILIES[name], dict.fromkeys((OPEN, CLOSE), 1.5 * SCALE[name]))
    config, prompts = SamplingConfig(temperature=temperature, max_tokens=8), [[40 + i] * 3 for i in range(24)]
    want = [without_rules(engine, prompt, config, seed) for seed, prompt in enumerate(prompts)]
    free = [i for i, tokens in enumerate(want) if not {OPEN, CLOSE} & set(tokens)]
    assert 3 < len(free), "all of them draw a marker: tilt less"
    got = engine.generate(prompts, config, seeds=range(24))
    assert [got[i].tokens for i in free] == [want[i] for i in free]
    assert not any(CLOSE in r.tokens for r in got if r.tokens[0] != OPEN)


def test_drawing_again_is_drawing_from_what_is_allowed():
    """The share of every token is that of a draw which could not have taken the barred one."""
    count = 4000
    logits_BV = torch.tensor([2.0, 1.0, 0.0, -1.0] + [-50.0] * (V - 4)).repeat(count, 1)
    barred = Thinking(MARKERS, "after", barred=frozenset({0}))
    rows = [
        SimpleNamespace(prompt=[], tokens=[], generator=row_generator(3, i), speech=Speech(TOKENIZER, (), barred))
        for i in range(count)
    ]
    drawn = torch.tensor(next_tokens(logits_BV, rows, SamplingConfig(temperature=1.0))).bincount(minlength=4)
    want = torch.tensor([1.0, 0.0, -1.0]).softmax(0)
    assert drawn[0] == 0
    deviation = (want * (1 - want) / count).sqrt()
    assert ((drawn[1:4] / count - want).abs() < 4 * deviation).all()


def test_scores_are_the_answers():
    engine = speaker(["<think>", "ab", "</think>", "cd"])
    with Batcher(engine) as batcher:
        pieces = list(batcher.submit([Request([40], logprobs=1)]))
    assert [s.token for piece in pieces for s in piece.scores] == ids("cd")


# ---- conversations


def test_chat_gives_thoughts_and_remembers_answers_only():
    engine = speaker(["<think><step>hm</think>yes"])
    engine.model.lines = {ids("<|user|>")[0]: engine.model.lines[40]}
    chat = Chat(engine)
    pieces = list(chat.speak("hello"))
    assert all(isinstance(piece, Said) for piece in pieces)
    assert "".join(p.text for p in pieces if p.thought) == "<step>hm"
    assert "".join(p.text for p in pieces if not p.thought) == "yes" == "".join(chat.say("hello"))
    assert chat.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}] * 2
    assert chat.session.last.thought == "<step>hm"
    assert chat.set_params("thinking=off thinking_budget=7").thinking == "off"
    assert "".join(chat.say("hello")) != "yes" and chat.session.last.thinking_tokens == 0


def test_the_system_message_comes_first_also_before_the_last_question_only():
    engine = tilted(FAMILIES["gpt"], {})
    chat = Chat(engine, SamplingConfig(max_tokens=4), system="falsify")
    for text in ("hello", "world"):
        answer = "".join(chat.say(text))
        messages = [{"role": "system", "content": "falsify"}, {"role": "user", "content": text}]
        prompt = conversation_ids(TOKENIZER, messages)
        assert TOKENIZER.decode(prompt, skip_special_tokens=False).startswith("<|system|>falsify<|end|><|user|>")
        assert answer == engine.generate([prompt], chat.config)[0].text
        assert chat.session.last.prompt_tokens == len(prompt)
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    chat.reset()
    assert chat.system == "falsify"


def test_templates_are_told_whether_to_think():
    told = []

    class Fast:
        chat_template = "a template"

        def apply_chat_template(self, messages, **options):
            told.append(options.get("enable_thinking"))
            return "hello"

    class Theirs:
        fast = Fast()

        def chat_text(self, messages):
            return self.fast.apply_chat_template(messages)

        def __getattr__(self, name):
            return getattr(TOKENIZER, name)

    messages = [{"role": "user", "content": "hello"}]
    for mode in ("auto", "on", "off"):
        assert conversation_ids(Theirs(), messages, mode) == ids("hello")
    assert told == [None, True, False]
    Theirs.fast.chat_template = None
    assert conversation_ids(Theirs(), messages, "off") == ids("hello") and told[-1] is None


# ---- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that says something whatever it is asked, and thinks where it must."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    write_model(made(FAMILIES["gpt"], stir=0.3), TOKENIZER, folder)
    return folder


def wanted(folder, text="hello", system="", **settings_):
    engine = Engine(*read_model(folder))
    chat = Chat(engine, SamplingConfig(**{"max_tokens": 12, "thinking": "on", **settings_}), system=system)
    list(chat.say(text))
    return chat.session.last


def test_the_command_prints_the_thought_beside_the_answer(forge, folder):
    want = wanted(folder, thinking_budget=5)
    assert want.thought and want.text
    words = ("chat", folder, "hello", "--max-tokens", 12, "--think", "on", "--think-budget", 5)
    done = forge(*words)
    assert (done.code, done.out) == (0, want.text + "\n")
    assert done.err == MARKER.sub(r"\n\g<0> ", want.thought).lstrip("\n") + "\n"
    hidden = forge(*words, "--hide-thoughts")
    assert (hidden.out, hidden.err) == (want.text + "\n", "")
    told = json.loads(forge(*words, "--json").out)
    assert (told["thought"], told["answer"]) == (want.thought, want.text)
    assert json.loads(forge(*words[:-4], "--think", "off", "--json").out)["thought"] == ""
    other = wanted(folder, system="falsify", thinking_budget=5)
    assert other != want and forge(*words, "--system", "falsify").out == other.text + "\n"
    refused = forge(*words[:-1], -1)
    assert refused.code and "thinking_budget" in refused.error


def test_every_marker_in_a_thought_begins_a_line_and_a_terminal_shows_it_dim(capsys, monkeypatch):
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        aside = _Aside(shown=True)
        for piece in ("<expert>cl", "erk<step>8+5=13", "<step>done"):
            aside.write(piece)
        aside.end()
        aside.end()
        printed = capsys.readouterr().err
        assert printed.count("\x1b[2m") == printed.count("\x1b[0m") == (4 if terminal else 0)
        plain = printed.replace("\x1b[2m", "").replace("\x1b[0m", "")
        assert plain == "<expert> clerk\n<step> 8+5=13\n<step> done\n"
