"""The official ``openai`` client against the server: what it reads is what the engine says, errors are its classes."""

from __future__ import annotations

import pytest

from agent_forge.serve.app import ServeConfig, running_server
from forgekit.data.tokenizer import train_tokenizer
from forgekit.infer.engine import Engine
from forgekit.infer.sampling import SamplingConfig
from tests.unit.test_infer_thinking import speaker
from tests.unit.tiny import made, trm_config

openai = pytest.importorskip("openai")

TOKENIZER = train_tokenizer(["hello world, this is some text with digits 123 and äöü 😀 €. "] * 5, 310)
ENGINE = Engine(made(trm_config(vocab_size=TOKENIZER.get_vocab_size(), max_seq_len=128), stir=0.3).eval(), TOKENIZER)
PROMPT = {"model": "tiny", "prompt": "hello world"}
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
SEEDED = {"temperature": 1.0, "seed": 11, "max_tokens": 12}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def server():
    config = ServeConfig(port=0, device="cpu", grace=0.0, max_rows=8, max_waiting=0)
    with running_server({"tiny": ENGINE, "other": ENGINE}, config) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def wanted(prompt, **changes) -> str:
    """What the engine says."""
    (result,) = ENGINE.generate([prompt], SamplingConfig(**{**SEEDED, **changes}))
    return result.text


def test_models_are_listed_and_found(client):
    assert [model.id for model in client.models.list()] == ["tiny", "other"]
    assert client.models.retrieve("tiny").owned_by == "agent-forge"


def test_a_chat_answer_whole_and_streamed(client):
    whole = client.chat.completions.create(**HELLO, **SEEDED)
    assert whole.object == "chat.completion" and whole.choices[0].message.role == "assistant"
    with client.chat.completions.create(
        **HELLO, **SEEDED, stream=True, stream_options={"include_usage": True}
    ) as stream:
        pieces = list(stream)
    told = [piece.choices[0] for piece in pieces if piece.choices]
    assert told[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in told) == whole.choices[0].message.content
    assert told[-1].finish_reason == whole.choices[0].finish_reason
    assert pieces[-1].usage == whole.usage and whole.usage.completion_tokens <= SEEDED["max_tokens"]


def test_the_clients_own_stream_helper_understands_the_events(client):
    free = client.chat.completions.create(**HELLO, **SEEDED).choices[0].message.content
    stop = free[len(free) // 2]  # the helper takes an answer that was cut off for a failure
    with client.chat.completions.stream(**HELLO, **SEEDED, stop=[stop]) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert final.choices[0].message.content == text == free[: free.index(stop)] != ""


def test_a_completion_whole_and_streamed(client):
    whole = client.completions.create(**PROMPT, **SEEDED)
    assert whole.choices[0].text == wanted("hello world")
    pieces = list(client.completions.create(**PROMPT, **SEEDED, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text


@pytest.fixture(scope="module")
def thinking_client():
    """A client of a server whose model thinks before it answers."""
    engine = speaker(["<think>", "<step>hm", "<step>so" * 9, "</think>", "yes"])
    engine.model.lines[TOKENIZER.token_to_id("<|user|>")] = engine.model.lines[40]
    config = ServeConfig(port=0, device="cpu", grace=0.0, temperature=0, max_tokens=40)
    with (
        running_server({"tiny": engine}, config) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as client,
    ):
        yield client


def test_thoughts_come_apart_whole_and_streamed(thinking_client):
    whole = thinking_client.chat.completions.create(**HELLO)
    message, usage = whole.choices[0].message, whole.usage
    assert message.content == "yes" and message.reasoning_content == "<step>hm" + "<step>so" * 9
    assert 2 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    deltas = [c.choices[0].delta for c in thinking_client.chat.completions.create(**HELLO, stream=True)]
    assert "".join(d.content or "" for d in deltas) == "yes"
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == message.reasoning_content
    with thinking_client.chat.completions.stream(**HELLO) as stream:
        final = stream.get_final_completion().choices[0].message
    assert (final.content, final.reasoning_content) == (message.content, message.reasoning_content)


def test_the_clients_own_effort_is_the_switch_and_the_budget(thinking_client):
    def ask(**fields):
        answer = thinking_client.chat.completions.create(**HELLO, **fields)
        return answer.choices[0].message, answer.usage.completion_tokens_details.reasoning_tokens

    assert [ask(reasoning_effort=effort)[1] for effort in ("none", "minimal", "low", "medium")] == [0, 7, 12, 22]
    for body in {"thinking": "off"}, {"chat_template_kwargs": {"enable_thinking": False}}:
        message, tokens = ask(extra_body=body)
        assert tokens == 0 and not hasattr(message, "reasoning_content")
    assert ask(extra_body={"thinking_budget": 3})[1] == 5
    with pytest.raises(openai.BadRequestError, match="contradicts") as both:
        ask(reasoning_effort="high", extra_body={"thinking": "off"})
    assert both.value.param == "thinking"
    # What was answered can be sent back as it came, thought and all.
    message, _ = ask()
    again = [*HELLO["messages"], message.model_dump(), *HELLO["messages"]]
    assert thinking_client.chat.completions.create(model="tiny", messages=again).choices[0].message.content == "yes"


def test_log_probabilities_in_both_shapes(client):
    scored = client.completions.create(**PROMPT, **SEEDED, logprobs=2).choices[0].logprobs
    assert len(scored.tokens) == len(scored.token_logprobs) == len(scored.text_offset) > 0
    for logprob, top in zip(scored.token_logprobs, scored.top_logprobs):
        assert len(top) == 2 and logprob <= max(top.values()) <= 0
    content = client.chat.completions.create(**HELLO, **SEEDED, logprobs=True, top_logprobs=3).choices[0].logprobs
    assert content.content and all(len(entry.top_logprobs) == 3 for entry in content.content)
    assert all(bytes(e.bytes).decode() == e.token for e in content.content if e.bytes is not None)
    pieces = list(client.chat.completions.create(**HELLO, **SEEDED, logprobs=True, stream=True))
    streamed = [e.token for p in pieces if (p.choices[0].logprobs is not None) for e in p.choices[0].logprobs.content]
    assert streamed == [entry.token for entry in content.content]


def test_a_stop_text_ends_the_answer_before_it(client):
    free = client.completions.create(**PROMPT, **SEEDED).choices[0].text
    stop = free[len(free) // 2]
    choice = client.completions.create(**PROMPT, **SEEDED, stop=[stop]).choices[0]
    assert choice.text == free[: free.index(stop)] and choice.finish_reason == "stop"


def test_the_seed_decides(client):
    def ask(seed):
        return client.completions.create(**PROMPT, **{**SEEDED, "seed": seed}).choices[0].text

    assert ask(1) == ask(1) == wanted("hello world", seed=1)
    assert len({ask(seed) for seed in range(4)}) > 1
    several = client.completions.create(**PROMPT, **SEEDED, n=3).choices
    assert [choice.index for choice in several] == [0, 1, 2] and len({choice.text for choice in several}) > 1


def test_errors_are_the_clients_own_classes(client, server):
    with pytest.raises(openai.NotFoundError, match="no model 'x'") as unknown:
        client.chat.completions.create(**{**HELLO, "model": "x"})
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("x")
    with pytest.raises(openai.BadRequestError, match="the context is 128") as long:
        client.completions.create(model="tiny", prompt=[60] * 129)
    assert long.value.code == "context_length_exceeded" and long.value.param == "prompt"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello " * 200}])
    assert long.value.code == "context_length_exceeded" and long.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match="temperature") as wrong:
        client.completions.create(**PROMPT, temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(**HELLO, tools=[{"type": "function", "function": {"name": "f"}}])
    assert tools.value.code == "unsupported_parameter"
    with pytest.raises(openai.RateLimitError, match="places are taken"):
        client.completions.create(model="tiny", prompt=["hello"] * 3, n=4)
    assert client.completions.create(**PROMPT, **SEEDED).choices[0].text == wanted("hello world")
    with pytest.raises(openai.APIStatusError) as body:
        client.completions.create(model="tiny", prompt="x" * 2**21)
    assert body.value.status_code == 413


def test_several_clients_at_once_each_get_their_own(server):
    import asyncio

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            asked = (client.completions.create(**PROMPT, **{**SEEDED, "seed": seed}) for seed in range(6))
            return [answer.choices[0].text for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask_all()) == [wanted("hello world", seed=seed) for seed in range(6)]
