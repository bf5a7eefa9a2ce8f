"""The server: 32 streams at once against one after another, and what a thousand requests leave in memory.

    python -m benchmarks.serving [--model FOLDER] [--streams 32] [--requests 1000] [--threads 2]

The server is a process of its own, the clients are threads of this one. Without a model it serves freshly
initialised weights in nano's shape: how fast a model answers does not depend on what it has learnt. Exits 1 if a
target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import psutil
import torch

from benchmarks.common import publish, setup, tell
from forgekit.models.io import build_model, write_model

ROUNDS, PER_STREAM, ALONE, MAX_TOKENS = 3, 3, 12, 64
WARM_UP = 200
TARGET_RATIO, TARGET_GROWTH = 4.0, 0.03
PROMPTS = ("The first thing to know", "import os\n\n\ndef main(", "In the beginning there was", "Once upon a time")
SERVER = """
import sys, torch
from agent_forge.serve.app import ServeConfig, serve
torch.set_num_threads(int(sys.argv[2]))
serve({"model": sys.argv[1]}, ServeConfig(port=0, device="cpu"), lambda s: print(s.server_address[1], flush=True))
"""


@dataclass
class Tally:
    """What a number of requests came to."""

    tokens: int = 0
    errors: int = 0
    seconds: float = 0.0

    @property
    def speed(self) -> float:
        """Tokens per second, all streams together."""
        return self.tokens / self.seconds


@contextmanager
def server(folder: Path, threads: int) -> Iterator[tuple[int, psutil.Process]]:
    """The port and process of a server in a process of its own."""
    command = [sys.executable, "-c", SERVER, str(folder), str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield int(process.stdout.readline()), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def ask(connection: HTTPConnection, number: int) -> int:
    """One streamed completion; how many tokens it had.

    Raises:
        ValueError: the answer is not a complete stream.
    """
    body = {
        "model": "model",
        "prompt": PROMPTS[number % len(PROMPTS)],
        "max_tokens": MAX_TOKENS,
        "temperature": 1.0,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    *_, usage, done, rest = response.read().decode().split("\n\n")
    if response.status != 200 or done != "data: [DONE]" or rest:
        raise ValueError(f"status {response.status}, ended with {done!r}")
    return json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"]


def client(port: int, numbers: Sequence[int]) -> Tally:
    """Ask one after another over one connection."""
    tally, connection = Tally(), HTTPConnection("127.0.0.1", port, timeout=120)
    for number in numbers:
        try:
            tally.tokens += ask(connection, number)
        except (OSError, HTTPException, ValueError) as error:
            tell(f"request {number}: {error}")
            tally.errors += 1
            connection.close()
    connection.close()
    return tally


def together(port: int, numbers: Sequence[int], streams: int) -> Tally:
    """Ask with several clients at once; each has its share of the requests."""
    began = time.perf_counter()
    with ThreadPoolExecutor(streams) as pool:
        tallies = list(pool.map(lambda i: client(port, numbers[i::streams]), range(streams)))
    seconds = time.perf_counter() - began
    return Tally(sum(t.tokens for t in tallies), sum(t.errors for t in tallies), seconds)


def speeds(port: int, streams: int) -> tuple[list[Tally], list[Tally]]:
    """Alone and together in turns, the same requests for both."""
    alone, crowd = [], []
    for round_ in range(ROUNDS):
        first = round_ * streams * PER_STREAM
        numbers = range(first, first + streams * PER_STREAM)
        alone.append(together(port, numbers[:ALONE], 1))
        crowd.append(together(port, numbers, streams))
        tell(f"{alone[-1].speed:,.0f} tokens/s alone, {crowd[-1].speed:,.0f} together")
    return alone, crowd


def memory(port: int, process: psutil.Process, requests: int, streams: int) -> tuple[int, int, Tally]:
    """Resident bytes after a warm-up and after that many requests more."""
    together(port, range(WARM_UP), streams)
    before = process.memory_info().rss
    tally = together(port, range(requests), streams)
    return before, process.memory_info().rss, tally


def nano(folder: Path) -> Path:
    """Freshly initialised weights in nano's shape."""
    _, shape, data = setup()
    torch.manual_seed(0)
    write_model(build_model(shape), data.tokenizer, folder)
    return folder


def main() -> int:
    """Measure and publish; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description="Measure the server.")
    parser.add_argument("--model", type=Path, help="a model's folder")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    options, _ = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or nano(Path(scratch))
        with server(folder, options.threads) as (port, process):
            client(port, range(4))
            alone, crowd = speeds(port, options.streams)
            before, after, tally = memory(port, process, options.requests, options.streams)
    return report(options, (alone, crowd), (before, after, tally))


def report(options: argparse.Namespace, sides: tuple[list[Tally], list[Tally]], memory: tuple[int, int, Tally]) -> int:
    """The table; 1 if a target is missed."""
    (alone, crowd), (before, after, tally) = sides, memory
    ratios = [b.speed / a.speed for a, b in zip(alone, crowd)]
    errors = sum(t.errors for t in (*alone, *crowd, tally))
    ratio, growth = statistics.median(ratios), after / before - 1
    verdicts = [ratio >= TARGET_RATIO, errors == 0, growth <= TARGET_GROWTH]
    told = ["met" if verdict else "missed" for verdict in verdicts]
    slow, fast = (f"{statistics.median(t.speed for t in side):,.0f} tokens/s" for side in (alone, crowd))
    asked = (ALONE + options.streams * PER_STREAM) * ROUNDS + options.requests
    grown = f"{after / 1e6:.0f} MB ({growth:+.1%})"
    rows = [
        ["one stream", slow, "", ""],
        [f"{options.streams} streams together", fast, "", ""],
        ["ratio", f"{ratio:.1f} ({min(ratios):.1f} to {max(ratios):.1f})", f">= {TARGET_RATIO:.0f}", told[0]],
        ["errors", f"{errors} of {asked:,}", "0", told[1]],
        ["resident memory, warm", f"{before / 1e6:.0f} MB", "", ""],
        [f"after {options.requests:,} requests more", grown, f"<= {TARGET_GROWTH:+.0%}", told[2]],
    ]
    model = "The given model" if options.model else "Fresh weights in nano's shape"
    notes = [
        f"{model}, {options.threads} threads, streamed completions of at most {MAX_TOKENS} tokens at temperature 1, a "
        f"seed each; server and clients share the machine. {ROUNDS} rounds in turns; ratios are medians over rounds. "
        f"Memory is the server process's, warm after {WARM_UP} requests; the {options.requests:,} requests took "
        f"{tally.seconds:.0f} s."
    ]
    publish("serving", "The server under load", ["what", "value", "target", ""], rows, notes)
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
