"""The server over real sockets: answers equal the engine's, refusals have their code and shape, nothing leaks."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest
import torch
from jinja2 import TemplateError

from agent_forge.serve.app import ServeConfig, load_engines, running_server
from agent_forge.serve.protocol import CommonRequest, Reply
from forgekit.data.tokenizer import END, train_tokenizer
from forgekit.errors import ArtifactError, ConfigError, ResourceError
from forgekit.infer.chat import conversation_ids
from forgekit.infer.engine import Engine
from forgekit.infer.sampling import SamplingConfig
from forgekit.models.io import write_model
from tests.unit.test_infer_thinking import speaker
from tests.unit.tiny import gpt_config, made, trm_config

TOKENIZER = train_tokenizer(["hello world, this is some text with digits 123 and äöü 😀 €. "] * 5, 310)
V = TOKENIZER.get_vocab_size()
MODEL = made(trm_config(vocab_size=V, max_seq_len=128), stir=0.3).eval()
ENGINE = Engine(MODEL, TOKENIZER)
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
SEEDED = {"temperature": 1.0, "seed": 11, "max_tokens": 12}
PROMPT = {"model": "tiny", "prompt": "hello world", **SEEDED}
QUICK = ServeConfig(port=0, device="cpu", grace=0.0)


class Slow(torch.nn.Module):
    """A model that never ends a text and takes its time over every token."""

    seconds = 0.005

    def __init__(self):
        super().__init__()
        self.inner = made(gpt_config(vocab_size=V, max_seq_len=10**6), stir=0.3)
        self.config, self.initial_state = self.inner.config, self.inner.initial_state

    def forward(self, ids, state, lengths=None):
        time.sleep(self.seconds)
        out = self.inner(ids, state, lengths)
        out.logits[..., TOKENIZER.token_to_id(END)] = -1e4
        return out


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def server():
    with running_server({"tiny": ENGINE, "slow": Engine(Slow(), TOKENIZER)}, QUICK) as server:
        yield server


@contextmanager
def slow_server(**limits):
    with running_server({"slow": Engine(Slow(), TOKENIZER)}, QUICK.replace(**limits)) as server:
        yield server


def connect(server):
    return HTTPConnection(*server.server_address[:2], timeout=20)


def call(server, path, body=None, headers=None, method=None):
    """Status and JSON of one request; a body that is not bytes is sent as JSON."""
    connection = connect(server)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json", **(headers or {})} if data is not None else headers or {}
    connection.request(method or ("GET" if data is None else "POST"), path, data, sent)
    response = connection.getresponse()
    status, text = response.status, response.read()
    connection.close()
    return status, json.loads(text)


def stream(server, path, body, done=True):
    """The events of a streamed answer, every line checked, and what came last: [DONE], or an error."""
    connection = connect(server)
    connection.request("POST", path, json.dumps({**body, "stream": True}), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    assert response.headers.get_content_type() == "text/event-stream"
    blocks = response.read().decode().split("\n\n")
    connection.close()
    assert blocks.pop() == "" and all(block.startswith("data: ") and "\n" not in block for block in blocks)
    *events, last = [block.removeprefix("data: ") for block in blocks]
    events = [json.loads(event) for event in events]
    if not done:
        return events, json.loads(last)
    assert last == "[DONE]"
    return events


def open_stream(server, body, read=1):
    """A raw connection on which an answer has begun."""
    connection = socket.create_connection(server.server_address[:2], timeout=20)
    data = json.dumps(body).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    if read:
        assert connection.recv(read)
    return connection


def eventually(what, seconds=5.0):
    """Wait for something another thread does."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def rows(server, name="slow"):
    return call(server, "/health")[1]["models"][name]["rows"]


def wanted(prompt, **changes):
    """What the engine says."""
    values = {"max_tokens": 12, "temperature": 1.0, "seed": 11, **changes}
    (result,) = ENGINE.generate([prompt], SamplingConfig(**values))
    return result


def refusal(server, path, body, status, param, **rest):
    """The message of an error of the right status, shape and field."""
    got, answer = call(server, path, body, **rest)
    assert got == status, answer
    assert answer.keys() == {"error"} and answer["error"].keys() == {"message", "type", "param", "code"}
    assert answer["error"]["param"] == param and answer["error"]["code"]
    return answer["error"]["message"]


# ---- answers


def test_models_and_health(server):
    status, models = call(server, "/v1/models")
    assert status == 200 and models["object"] == "list"
    assert [m["id"] for m in models["data"]] == ["tiny", "slow"]
    assert {m["object"] for m in models["data"]} == {"model"}
    assert call(server, "/v1/models/tiny") == (200, models["data"][0])
    assert call(server, "/health") == (200, {"status": "ok", "models": {
        "tiny": {"rows": 0, "waiting": 0}, "slow": {"rows": 0, "waiting": 0}}})  # fmt: skip


def test_a_completion_is_the_engines(server):
    status, answer = call(server, TEXT, PROMPT)
    want = wanted("hello world")
    assert status == 200 and answer["object"] == "text_completion" and answer["model"] == "tiny"
    assert answer["id"].startswith("cmpl-") and isinstance(answer["created"], int)
    reason = {"stop": "stop", "length": "length"}[want.finish_reason]
    assert answer["choices"] == [{"index": 0, "text": want.text, "logprobs": None, "finish_reason": reason}]
    made = len(want.tokens)
    assert answer["usage"] == {
        "prompt_tokens": want.prompt_tokens,
        "completion_tokens": made,
        "total_tokens": want.prompt_tokens + made,
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_a_chat_answer_is_the_engines(server):
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": "hi", "refusal": None, "reasoning_content": "forgotten"},
        {"role": "user", "content": "world"},
    ]
    ids = conversation_ids(TOKENIZER, [
        {"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"}, {"role": "user", "content": "world"}])  # fmt: skip
    body = {"model": "tiny", "messages": messages, **SEEDED, "max_completion_tokens": 7, "user": "me", "top_p": None}
    status, answer = call(server, CHAT, body)
    want = wanted(ids, max_tokens=7)
    assert status == 200 and answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": want.text, "refusal": None}
    assert choice["finish_reason"] == "length" and answer["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize("extra", [{}, {"n": 3}, {"temperature": 0}, {"stop": ["th", "e"]}, {"top_k": 5, "min_p": 0.1}])
def test_a_stream_tells_what_the_whole_answer_says(server, extra):
    for path, body in (CHAT, {**HELLO, **SEEDED, **extra}), (TEXT, {**PROMPT, **extra}):
        whole = call(server, path, body)[1]
        events = stream(server, path, {**body, "stream_options": {"include_usage": True}})
        assert len({event["id"] for event in events}) == 1
        last = events.pop()
        assert last["choices"] == [] and last["usage"] == whole["usage"]
        assert all(event["usage"] is None for event in events)
        for choice in whole["choices"]:
            mine = [c for event in events for c in event["choices"] if c["index"] == choice["index"]]
            assert [c["finish_reason"] for c in mine[:-1]] == [None] * (len(mine) - 1)
            assert mine[-1]["finish_reason"] == choice["finish_reason"]
            if path == CHAT:
                assert mine[0]["delta"] == {"role": "assistant", "content": ""}
                assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
            else:
                assert "".join(c["text"] for c in mine) == choice["text"]
        assert len(whole["choices"]) == extra.get("n", 1)


def test_answers_of_one_prompt_differ_and_several_prompts_are_answered_in_order(server):
    answer = call(server, TEXT, {**PROMPT, "prompt": ["hello", [60, 61]], "n": 2})[1]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in answer["choices"]]
    want = [ENGINE.generate([prompt] * 2, SamplingConfig(**SEEDED)) for prompt in ("hello", [60, 61])]
    assert texts == [result.text for pair in want for result in pair] and len(set(texts)) == 4
    assert answer["usage"]["prompt_tokens"] == len(TOKENIZER.encode("hello").ids) + 2


def test_without_a_seed_every_answer_is_drawn_anew_and_without_a_temperature_it_is_one(server):
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 12}
    texts = {call(server, TEXT, body)[1]["choices"][0]["text"] for _ in range(4)}
    assert len(texts) > 1


def test_logprobs_in_both_shapes(server):
    want = wanted("hello world")
    whole = call(server, TEXT, {**PROMPT, "logprobs": 2})[1]["choices"][0]["logprobs"]
    tokens = [t for t in want.tokens if t != TOKENIZER.token_to_id(END)]
    assert len(whole["tokens"]) == len(whole["token_logprobs"]) == len(whole["text_offset"]) == len(tokens)
    assert all(len(top) == 2 for top in whole["top_logprobs"])
    best = [max(top.values()) for top in whole["top_logprobs"]]
    assert all(logprob <= most <= 0 for logprob, most in zip(whole["token_logprobs"], best))
    events = stream(server, TEXT, {**PROMPT, "logprobs": 2})
    parts = [event["choices"][0]["logprobs"] for event in events]
    for key in ("tokens", "text_offset"):
        assert [x for part in parts for x in part[key]] == whole[key]
    body = {**HELLO, **SEEDED, "logprobs": True, "top_logprobs": 3}
    content = call(server, CHAT, body)[1]["choices"][0]["logprobs"]["content"]
    assert content and all(len(entry["top_logprobs"]) == 3 for entry in content)
    for entry in content:
        assert entry.keys() == {"token", "logprob", "bytes", "top_logprobs"}
        assert entry["bytes"] is None or bytes(entry["bytes"]).decode() == entry["token"]
    assert call(server, CHAT, {**HELLO, **SEEDED})[1]["choices"][0]["logprobs"] is None


def test_thirty_two_streams_at_once_each_get_what_they_get_alone(server):
    prompts = ["hello", "world, this", "digits 123 " * 6, "äöü 😀"]

    def ask(i):
        events = stream(server, TEXT, {**PROMPT, "prompt": prompts[i % 4], "seed": i, "max_tokens": 20})
        return "".join(event["choices"][0]["text"] for event in events)

    with ThreadPoolExecutor(32) as pool:
        texts = list(pool.map(ask, range(32)))
    assert texts == [wanted(prompts[i % 4], seed=i, max_tokens=20).text for i in range(32)]
    eventually(lambda: rows(server, "tiny") == 0)


def test_a_connection_serves_one_request_after_another_also_after_an_error(server):
    connection = connect(server)
    for body, status in (PROMPT, 200), ({**PROMPT, "n": 9}, 400), ({**PROMPT, "model": "x"}, 404), (PROMPT, 200):
        connection.request("POST", TEXT, json.dumps(body), {"Content-Type": "application/json"})
        kept = connection.sock
        response = connection.getresponse()
        assert response.status == status and response.read()
        assert connection.sock is kept is not None
    connection.close()


def test_http_1_0_gets_an_unframed_stream(server):
    connection = socket.create_connection(server.server_address[:2], timeout=20)
    data = json.dumps({**PROMPT, "stream": True}).encode()
    head = f"POST {TEXT} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    assert "chunked" not in answer and answer.endswith("\n\ndata: [DONE]\n\n")


# ---- thoughts


@pytest.fixture(scope="module")
def thinker():
    """A server whose model wants to think, at great length where a user asks and briefly where a system told it to."""
    engine = speaker(["<think>", "<step>hm", "<step>so" * 9, "</think>", "yes"], ["<think>ah</think>", "no"])
    starts = [TOKENIZER.token_to_id(t) for t in ("<|user|>", "<|system|>")]
    engine.model.lines |= dict(zip(starts, engine.model.lines.values()))
    plain = Engine(MODEL, TOKENIZER)
    plain.markers = None
    with running_server({"thinker": engine, "plain": plain}, QUICK.replace(max_tokens=40, temperature=0)) as server:
        yield server


ASKED = {"model": "thinker", "messages": [{"role": "user", "content": "hello"}]}
THOUGHT = "<step>hm" + "<step>so" * 9


def thought_of(server, path=CHAT, **body):
    """The first choice of an answer, and how many of its tokens were thought."""
    status, answer = call(server, path, {**ASKED, **body} if path == CHAT else {"model": "thinker", **body})
    assert status == 200, answer
    return answer["choices"][0], answer["usage"]["completion_tokens_details"]["reasoning_tokens"]


def test_thoughts_are_told_apart_from_the_answer(thinker):
    choice, tokens = thought_of(thinker)
    assert choice["message"]["content"] == "yes" and choice["message"]["reasoning_content"] == THOUGHT
    assert tokens == len(TOKENIZER.encode(THOUGHT).ids) + 2
    told = thought_of(thinker, messages=[{"role": "system", "content": "x"}, *ASKED["messages"]])[0]["message"]
    assert (told["content"], told["reasoning_content"]) == ("no", "ah")
    scored = thought_of(thinker, logprobs=True)[0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in scored) == "yes"


def test_a_stream_tells_the_thought_before_the_answer(thinker):
    events = stream(thinker, CHAT, {**ASKED, "stream_options": {"include_usage": True}})
    assert events.pop()["usage"]["completion_tokens_details"]["reasoning_tokens"] > 2
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(d.get("reasoning_content", "") for d in deltas) == THOUGHT
    assert "".join(d.get("content", "") for d in deltas) == "yes"
    kinds = ["reasoning_content" in d for d in deltas if d.get("content") or "reasoning_content" in d]
    assert kinds == sorted(kinds, reverse=True) and sum(kinds) > 1, "the thought came in one piece or after the answer"


@pytest.mark.parametrize(
    "field",
    [{"thinking": "off"}, {"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}],
    ids=str,
)
def test_every_way_to_say_so_switches_thinking_off(thinker, field):
    choice, tokens = thought_of(thinker, **field)
    assert tokens == 0 and "reasoning_content" not in choice["message"]


@pytest.mark.parametrize(
    ("field", "most"),
    [
        ({"thinking": "on", "thinking_budget": 3}, 3),
        ({"thinking_budget": 4}, 4),
        ({"reasoning_effort": "minimal"}, 5),
        ({"reasoning_effort": "low"}, 10),
        ({"reasoning_effort": "medium"}, 20),
        ({"reasoning_effort": "high"}, 30),
        ({"reasoning_effort": "low", "thinking_budget": 6, "thinking": "on"}, 6),
        ({"chat_template_kwargs": {"enable_thinking": True}}, 30),
    ],
    ids=str,
)
def test_a_budget_ends_the_thought_and_the_answer_follows(thinker, field, most):
    whole = len(TOKENIZER.encode(THOUGHT).ids)
    choice, tokens = thought_of(thinker, **field)
    assert tokens == min(most, whole) + 2 and choice["message"]["content"]


def test_completions_think_only_where_they_are_asked_to(thinker):
    choice, tokens = thought_of(thinker, TEXT, prompt=[40])
    assert tokens == 0 and "reasoning_content" not in choice
    for mode in ("auto", "on"):
        choice, tokens = thought_of(thinker, TEXT, prompt=[40], thinking=mode)
        assert (choice["text"], choice["reasoning_content"]) == ("yes", THOUGHT) and tokens > 2


def test_what_a_server_thinks_by_default_is_a_setting():
    engine = speaker(["<think>", "a" * 50, "</think>", "yes"])
    engine.model.lines[TOKENIZER.token_to_id("<|user|>")] = engine.model.lines[40]
    quiet = QUICK.replace(temperature=0, thinking="off", thinking_budget=3)
    with running_server({"thinker": engine}, quiet) as server:
        assert thought_of(server)[1] == 0 and thought_of(server, thinking="auto")[1] == 5


def test_the_models_template_is_told_whether_to_think():
    class Fast:
        chat_template = "a template"

        def apply_chat_template(self, messages, **options):
            return {True: "hello", False: "world"}[options["enable_thinking"]]

    class Theirs:
        fast = Fast()

        def __getattr__(self, name):
            return getattr(TOKENIZER, name)

    with running_server({"tiny": Engine(MODEL, Theirs())}, QUICK) as server:
        for mode, text in ("on", "hello"), ("off", "world"):
            answer = call(server, CHAT, {**HELLO, **SEEDED, "thinking": mode})[1]["choices"][0]["message"]
            want = wanted(text, thinking=mode)
            assert (answer["content"], answer.get("reasoning_content", "")) == (want.text, want.thought)


def test_wrong_ways_to_ask_for_thoughts_are_refused(thinker):
    for field, value, param in [
        ("thinking", True, "thinking"),
        ("thinking_budget", -1, "thinking_budget"),
        ("reasoning_effort", "enormous", "reasoning_effort"),
        ("chat_template_kwargs", {"enable_thinking": "no"}, "chat_template_kwargs.enable_thinking"),
        ("chat_template_kwargs", {"tools": 1}, "chat_template_kwargs.tools"),
    ]:
        refusal(thinker, CHAT, {**ASKED, field: value}, 400, param)
    both = {**ASKED, "thinking": "on", "reasoning_effort": "none"}
    assert "contradicts reasoning_effort" in refusal(thinker, CHAT, both, 400, "thinking")
    for path, body in (CHAT, ASKED), (TEXT, {"prompt": "hello"}):
        refused = refusal(thinker, path, {**body, "model": "plain", "thinking": "on"}, 400, "thinking")
        assert "no <think>" in refused
        assert call(thinker, path, {**body, "model": "plain", "max_tokens": 3})[0] == 200


# ---- refusals

WRONG_FIELDS = [
    ("temperature", "hot"),
    ("temperature", 3),
    ("top_p", 0),
    ("n", 5),
    ("max_tokens", 0),
    ("max_tokens", 1.5),
    ("stop", ["a"] * 5),
    ("seed", "one"),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("top_logprobs", 2),
    ("temprature", 1),
    ("tools", [{"type": "function"}]),
    ("frequency_penalty", 0.5),
    ("response_format", {"type": "json_object"}),
    ("messages", []),
    ("messages", "hello"),
]


@pytest.mark.parametrize(("name", "value"), WRONG_FIELDS)
def test_a_wrong_field_is_named(server, name, value):
    message = refusal(server, CHAT, {**HELLO, name: value}, 400, name)
    assert name in message and "\n" not in message


def test_wrong_parts_of_a_field_are_named(server):
    for message, param in [
        ({"role": "robot", "content": "x"}, "messages[1].role"),
        ({"role": "user", "content": 3}, "messages[1].content"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[1].content"),
        ("hello", "messages[1]"),
    ]:
        refusal(server, CHAT, {**HELLO, "messages": [*HELLO["messages"], message]}, 400, param)
    refusal(server, CHAT, {**HELLO, "stop": ["a", ""]}, 400, "stop[1]")
    for prompt in (3, [], [True], ["a", 3], ["x"] * 17):
        refusal(server, TEXT, {"model": "tiny", "prompt": prompt}, 400, "prompt")
    refusal(server, TEXT, {"model": "tiny"}, 400, "prompt")
    refusal(server, TEXT, {"prompt": "x"}, 400, "model")
    assert f"token {V} is outside" in refusal(server, TEXT, {"model": "tiny", "prompt": [V]}, 400, "prompt")
    assert "no tokens" in refusal(server, TEXT, {"model": "tiny", "prompt": ""}, 400, "prompt")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"\xff\xfe", b'{"model": NaN}', b"[" * 99_999, b'{"prompt": "\\ud800"}'], ids=repr
)
def test_malformed_json_is_refused(server, body):
    assert "JSON" in refusal(server, TEXT, body, 400, None)


def test_neutral_values_of_fields_that_are_not_offered_are_fine(server):
    neutral = {"frequency_penalty": 0, "tools": [], "response_format": {"type": "text"}, "best_of": 1, "logit_bias": {}}
    assert call(server, TEXT, {**PROMPT, **neutral})[0] == 200


def test_unknown_models_and_paths(server):
    message = refusal(server, CHAT, {**HELLO, "model": "gpt-9"}, 404, "model")
    assert "gpt-9" in message and "tiny" in message
    refusal(server, "/v1/models/gpt-9", None, 404, "model")
    assert "/v1/chat/completions" in refusal(server, "/v2/anything", None, 404, None)
    refusal(server, "/v1/anything", HELLO, 404, None)
    for path, body, method in (CHAT, None, "GET"), ("/v1/models", HELLO, "POST"), (CHAT, HELLO, "DELETE"):
        refusal(server, path, body, 405, None, method=method)


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(server):
    long = [50] * 129
    message = refusal(server, TEXT, {**PROMPT, "prompt": long}, 400, "prompt")
    assert "129 tokens" in message and "128" in message
    talk = {**HELLO, "messages": [{"role": "user", "content": "123 " * 200}]}
    assert "the context is 128" in refusal(server, CHAT, talk, 400, "messages")
    answer = call(server, TEXT, {**PROMPT, "prompt": [50] * 125, "max_tokens": 50, "temperature": 0})[1]
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["total_tokens"] <= 128


def test_bodies_too_large_or_without_length_or_of_another_type(server):
    refusal(server, TEXT, b"x" * (2**20 + 1), 413, None)
    refusal(server, TEXT, b"{}", 413, None, headers={"Content-Length": "9" * 30})
    refusal(server, TEXT, b"{}", 400, "Content-Length", headers={"Content-Length": "-2"})
    refusal(server, TEXT, b"", 411, "Content-Length", headers={"Transfer-Encoding": "chunked"})
    refusal(server, TEXT, b"{}", 415, "Content-Type", headers={"Content-Type": "text/plain"})


def test_other_peoples_names_for_this_machine_are_refused(server):
    refusal(server, "/v1/models", None, 403, "Host", headers={"Host": "evil.example"})
    refusal(server, "/v1/models", None, 403, "Host", headers={"Host": "[::1"})
    assert call(server, "/v1/models", headers={"Host": "localhost:1"})[0] == 200


LONG_LINE = f"GET /{'x' * 70_000} HTTP/1.1"
NOT_HTTP = {
    "nonsense": 400,
    "GET / HTTP/9.9": 505,
    "GET / HTTP/x": 400,
    "GET http://[ HTTP/1.0": 400,
    LONG_LINE: 414,
    "PATCH / HTTP/1.1": 405,
}


@pytest.mark.parametrize("line", NOT_HTTP, ids=lambda line: line[:20])
def test_requests_that_are_not_http_are_refused_in_the_same_shape(server, line):
    connection = socket.create_connection(server.server_address[:2], timeout=20)
    connection.sendall(f"{line}\r\nHost: localhost\r\n\r\n".encode())
    answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    head, _, body = answer.partition("\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {NOT_HTTP[line]} ") and json.loads(body)["error"]["message"]


# ---- limits, and clients that go away


def test_a_full_queue_is_429_and_a_client_that_hangs_up_makes_room():
    with slow_server(max_rows=1, max_waiting=1, max_tokens=10**6) as server:
        for body in {"stream": True}, {"stream": False}:
            running = open_stream(server, {"model": "slow", "prompt": "hello", "stream": True})
            waiting = open_stream(server, {"model": "slow", "prompt": "hello", **body}, read=0)
            eventually(lambda: rows(server) == 2)
            assert "ask again" in refusal(server, TEXT, {"model": "slow", "prompt": "x"}, 429, None)
            waiting.close()
            eventually(lambda: rows(server) == 1)
            running.close()
            eventually(lambda: rows(server) == 0)


def test_the_time_limit_is_504_before_the_first_piece_and_an_event_after_it():
    engine = Engine(Slow(), TOKENIZER)
    with running_server({"slow": engine}, QUICK.replace(max_tokens=10**6, time_limit=0.3)) as server:
        body = {"model": "slow", "prompt": "hello"}
        refusal(server, TEXT, body, 504, None)
        events, error = stream(server, TEXT, body, done=False)
        assert events and "took longer" in error["error"]["message"]
        engine.model.seconds = 0.5  # the prompt is read in two turns: the first takes too long
        refusal(server, TEXT, {**body, "prompt": [50] * 300, "stream": True}, 504, None)
        eventually(lambda: rows(server) == 0)


def test_a_body_that_does_not_arrive_is_408_and_one_that_breaks_off_is_forgotten():
    with slow_server(idle_limit=0.2) as server:
        head = (
            f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
        )
        connection = socket.create_connection(server.server_address[:2], timeout=20)
        connection.sendall(head.encode() + b'{"model"')
        answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
        assert answer.startswith("HTTP/1.1 408") and '"request_timeout"' in answer
        connection = socket.create_connection(server.server_address[:2], timeout=20)
        connection.sendall(head.encode() + b'{"model"')
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""


def test_too_many_connections_are_refused():
    with slow_server(max_connections=2) as server:
        held = [socket.create_connection(server.server_address[:2], timeout=20) for _ in range(2)]
        third = socket.create_connection(server.server_address[:2], timeout=20)
        answer = b"".join(iter(lambda: third.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 503") and b'"connections"' in answer
        for connection in held:
            connection.close()
        eventually(lambda: server._places._value == 2)
        assert call(server, "/health")[0] == 200


def test_stopping_finishes_what_runs_and_refuses_what_comes():
    with slow_server(grace=5.0) as server:
        body = {"model": "slow", "prompt": "hello", "max_tokens": 60, "temperature": 0}
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(call, server, TEXT, body)
            eventually(lambda: rows(server) == 1)
            stopping = threading.Thread(target=server.batchers["slow"].close, args=(5.0,))
            stopping.start()
            eventually(lambda: server.closing)
            assert "shutting down" in refusal(server, TEXT, body, 503, None)
            assert call(server, "/health")[0] == 503
            status, answer = running.result()
            assert status == 200 and answer["usage"]["completion_tokens"] == 60
            stopping.join()


def test_a_failing_model_is_500_and_the_server_goes_on():
    engine = Engine(Slow(), TOKENIZER)
    with running_server({"slow": engine}, QUICK) as server:
        right, engine.model.inner.forward = engine.model.inner.forward, None
        engine.model.inner.forward = lambda *rest: (_ for _ in ()).throw(RuntimeError("out of memory"))
        assert "out of memory" in refusal(server, TEXT, {"model": "slow", "prompt": "x"}, 500, None)
        engine.model.inner.forward = right
        assert call(server, TEXT, {"model": "slow", "prompt": "x", "max_tokens": 2})[0] == 200


def test_a_mistake_of_the_server_is_500_and_goes_to_the_log(monkeypatch, capfd):
    with running_server({"tiny": ENGINE}, QUICK) as server:
        with monkeypatch.context() as broken:
            broken.setattr("agent_forge.serve.protocol.CompletionReply._choice", lambda self, piece: piece.nothing)
            assert "the server made a mistake" in refusal(server, TEXT, PROMPT, 500, None)
            broken.setattr("agent_forge.serve.protocol.CompletionReply._delta", lambda self, piece: piece.nothing)
            connection = open_stream(server, {**PROMPT, "stream": True})
            answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
            assert "HTTP/1.1" not in answer and "[DONE]" not in answer  # no second answer in the middle of the first
            connection.close()
        assert call(server, TEXT, PROMPT)[1]["choices"][0]["text"] == wanted("hello world").text
    assert capfd.readouterr().err.count("has no attribute 'nothing'") == 2


def test_the_parts_that_requests_and_replies_share_are_no_answers_of_their_own():
    for part in (CommonRequest, Reply):
        with pytest.raises(TypeError, match="abstract"):
            part(model="tiny") if part is CommonRequest else part(None, None)


def test_a_conversation_that_the_models_template_refuses_is_400():
    class Templated:
        def chat_text(self, messages):
            raise TemplateError("roles must alternate")

        def __getattr__(self, name):
            return getattr(TOKENIZER, name)

    with running_server({"tiny": Engine(MODEL, Templated())}, QUICK) as server:
        assert "roles must alternate" in refusal(server, CHAT, HELLO, 400, "messages")
        assert call(server, TEXT, PROMPT)[1]["choices"][0]["text"] == wanted("hello world").text


def test_what_cannot_be_served_is_refused_at_once(tmp_path, server):
    with pytest.raises(ConfigError, match="nothing to serve"):
        load_engines({}, "cpu")
    with pytest.raises(ArtifactError, match="no model here"):
        load_engines(tmp_path, "cpu")
    with (
        pytest.raises(ResourceError, match="choose another port"),
        running_server({"tiny": ENGINE}, QUICK.replace(port=server.server_address[1])),
    ):
        pass
    with pytest.raises(ConfigError, match="host"), running_server({"tiny": ENGINE}, QUICK.replace(host="no such host")):
        pass


def test_a_folder_is_served_until_the_signal_comes(tmp_path):
    folder = tmp_path / "my_model"
    folder.mkdir()
    write_model(MODEL, TOKENIZER, folder)
    code = (
        "import sys; from agent_forge.serve.app import ServeConfig, serve;"
        "serve(sys.argv[1], ServeConfig(port=0, device='cpu'), lambda s: print(s.server_address[1], flush=True))"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, env=environment, text=True)
    try:
        connection = HTTPConnection("127.0.0.1", int(process.stdout.readline()), timeout=20)
        connection.request(
            "POST", TEXT, json.dumps({**PROMPT, "model": "my_model"}), {"Content-Type": "application/json"}
        )
        answer = json.loads(connection.getresponse().read())
        assert answer["choices"][0]["text"] == wanted("hello world").text
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.stdout.close()
