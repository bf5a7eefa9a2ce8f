"""Models handed on: merged by the command line, and served to whoever speaks HTTP."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import urllib.error
import urllib.request

import pytest

from tests.conftest import CLI, environment, run_cli

SPECIALISTS = ("reasoning", "memory_integration", "adaptive_computation")


def test_three_specialists_merge_into_an_artifact_that_answers(copy):
    words = ("merge", *SPECIALISTS, "--base", "trunk", "--method", "ties", "--option", "density=0.5", "-o", "merged")
    planned = run_cli(*words, "--plan", cwd=copy.home)
    assert planned.code == 0 and "density = 0.5" in planned.out and "tensors" in planned.out, planned.err
    assert not (copy.home / "merged").exists()
    done = run_cli(*words, "--json", cwd=copy.home)
    receipt = json.loads(done.out)
    assert receipt["method"] == "ties" and len(receipt["inputs"]) >= 3, done.err
    answer = run_cli("chat", "merged", "copy 12", "--json", cwd=copy.home)
    assert answer.code == 0 and json.loads(answer.out), answer.err
    again = run_cli(*words, cwd=copy.home)
    assert again.code == 4 and "exists already" in again.error


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("reasoning", "nobody"), "no model 'nobody'"),
        (("reasoning", "memory_integration", "--method", "tiess"), "did you mean ties"),
        (("reasoning", "memory_integration"), "base"),
        (("reasoning", "memory_integration", "--method", "linear", "--option", "weights"), "is not an assignment"),
    ],
)
def test_merges_that_cannot_be_are_refused_in_one_line(copy, words, told):
    done = run_cli("merge", *words, "-o", "merged", cwd=copy.home)
    assert done.code in (2, 4) and told in done.error
    assert not (copy.home / "merged").exists()


def ask(url: str, body: dict | None = None) -> tuple[int, dict]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_a_served_model_answers_and_leaves_in_good_order(copy):
    command = [*CLI, "serve", "trunk", "reasoning", "--port", "0"]
    process = subprocess.Popen(command, cwd=copy.home, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        base = re.search(r"(http://\S+/v1) serves trunk, reasoning", line)[1]
        status, models = ask(f"{base}/models")
        assert status == 200 and [m["id"] for m in models["data"]] == ["trunk", "reasoning"]
        question = {"model": "trunk", "messages": [{"role": "user", "content": "copy 12"}], "max_tokens": 4}
        status, reply = ask(f"{base}/chat/completions", question)
        assert status == 200 and reply["choices"][0]["message"]["role"] == "assistant"
        status, reply = ask(f"{base}/chat/completions", {**question, "model": "nobody"})
        assert status == 404 and "nobody" in reply["error"]["message"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.stderr.close()


def test_two_models_of_one_name_cannot_be_served(copy):
    done = run_cli("serve", "trunk", "trunk", cwd=copy.home)
    assert done.code == 2 and "two models are called trunk" in done.error
