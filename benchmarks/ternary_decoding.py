"""Decoding one token after another from packed ternary weights, against torch: speed and memory at 25M parameters.

    python -m benchmarks.ternary_decoding [--only speed memory] [--threads 1 2] [--results FOLDER]

Models of the profile ``small``: its own family and the plain one, solved for the same size. Their weights are random:
neither speed nor bytes depend on what was learnt. All sides run the same code but for the weights. Memory is measured
in processes of their own. Exits 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from agent_forge.profile import load_profile
from benchmarks import common
from benchmarks.common import publish, ratio, tell
from forgekit.infer import kernels
from forgekit.infer.kernels import cpu, steps
from forgekit.models.budget import solve_budget
from forgekit.models.config import GPTConfig
from forgekit.models.io import build_model, read_model, write_model
from forgekit.quant.config import GroupPlan, TernaryPlan
from forgekit.quant.files import write_packed
from forgekit.quant.model import packed

ROUNDS, TOKENS, BEFORE, LONG = 7, 24, 32, 1000
HELD_TOKENS = 32
FASTER, SMALLER = 3.8, 4.0
JUDGED = ("peak", "kept")
"""What the target for memory is for."""
SIDES = ("fp32", "bf16", "int8", "packed")
COLUMNS = ["what", "fp32", "bf16", "int8, dynamic", "packed", "packed against fp32", "range", "target"]


def configs() -> dict[str, GPTConfig]:
    """The profile's own shape, and the plain family at its size and width."""
    profile = load_profile("small")
    own = profile.model_config_solved()
    shape = {name: getattr(own, name) for name in ("vocab_size", "n_layers", "n_heads", "window", "max_seq_len")}
    width, share = profile.model.d_model, profile.model.embedding_share
    plain = solve_budget(GPTConfig(**shape), profile.model.target_parameters, width=width, embedding_share=share).config
    return {own.family: own, plain.family: plain}


def made(config: GPTConfig) -> nn.Module:
    """A model whose every weight is random; what starts at zero would be a ternary matrix without a code."""
    torch.manual_seed(0)
    model = build_model(config).eval().requires_grad_(False)
    for p in model.parameters():
        if not p.any():
            p.normal_(std=0.02)
    return model


def made_sides(config: GPTConfig) -> dict[str, nn.Module]:
    """The same model in every form that this torch can run."""
    model = made(config)
    sides = {"fp32": model, "bf16": made(config).bfloat16(), "packed": packed(model, TernaryPlan(), GroupPlan())}
    dynamic = getattr(getattr(torch.ao, "quantization", None), "quantize_dynamic", None)
    if dynamic is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sides["int8"] = dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return sides


def token_seconds(model: nn.Module, before: int, tokens: int) -> float:
    """Seconds for each of the tokens that follow a prompt, greedily."""
    return decoded(model, before, tokens)[0]


def decoded(model: nn.Module, before: int, tokens: int) -> tuple[float, Any]:
    """The same, and the last token's output with the state after it."""
    prompt_BT = torch.randint(1, model.config.vocab_size, (1, before), generator=torch.Generator().manual_seed(1))
    out = model(prompt_BT, model.initial_state(1))
    clock = time.perf_counter()
    for _ in range(tokens):
        out = model(out.logits[:, -1:].argmax(-1), out.state)
    return (time.perf_counter() - clock) / tokens, out


def speed(sides: dict[str, nn.Module], before: int) -> dict[str, list[float]]:
    """Seconds per token of every side, all taking turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for model in sides.values():
        token_seconds(model, before, 3)
    for _ in range(ROUNDS):
        for name, model in sides.items():
            times[name].append(token_seconds(model, before, TOKENS))
    return times


def speed_rows(family: str, config: GPTConfig, threads: list[int]) -> tuple[list[list], list[float]]:
    """Table rows, and the ratios that the target is for: those after a short prompt."""
    rows, reached = [], []
    sides = made_sides(config)
    for count in threads:
        torch.set_num_threads(count)
        for before in (BEFORE, LONG):
            tell(f"{family}, {count} threads, {before} tokens before")
            times = speed(sides, before)
            middle, low, high = ratio(times, "fp32", "packed")
            rates = [f"{1 / statistics.median(times[name]):.0f}" if name in times else "-" for name in SIDES]
            what = f"{family}, tokens/s after {before} tokens, {count} thread{'s' * (count > 1)}"
            aimed = before == BEFORE
            target = f">= {FASTER}: {'met' if middle >= FASTER else 'missed'}" if aimed else ""
            rows.append([what, *rates, f"{middle:.1f} x as fast", f"{low:.1f} to {high:.1f}", target])
            reached += [middle] if aimed else []
    torch.set_num_threads(1)
    return rows, reached


def status(field: str) -> int:
    """Bytes that the system counts for this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def held(folder: Path, tiny: Path) -> dict[str, int]:
    """What opening a folder and decoding takes, in this process: a tiny model of the same kind was opened and decoded
    before, so that all is imported, compiled and made ready.

    Freed memory is given back to the system first, so that whatever is used again counts.
    """
    torch.set_num_threads(1)
    if kernels.backend() == "llvm":
        cpu.ternary(), cpu.digits(), steps.attention(), steps.memory(), steps.norm()
    with torch.inference_mode():
        token_seconds(read_model(tiny)[0], BEFORE, 2)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before = status("VmRSS")
    with torch.inference_mode():
        model, _ = read_model(folder)
        read = status("VmHWM")
        _, out = decoded(model, BEFORE, HELD_TOKENS)
    peak = status("VmHWM")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    kept, _ = status("VmRSS"), out  # the state is still there
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    found = {"peak": peak, "reading": read, "kept": kept}
    return {name: value - before for name, value in found.items()} | {"tensors": sum(tensors.values())}


def in_a_process(folder: Path, tiny: Path) -> dict[str, int]:
    """:func:`held`, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.ternary_decoding", "--held", str(folder), str(tiny)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return json.loads(done.stdout)


def memory_rows(family: str, config: GPTConfig) -> tuple[list[list], float]:
    """Table rows, and the least of the ratios that the target is for."""
    rows, found = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("fp32", "packed"):
            folder, tiny = Path(scratch) / name, Path(scratch) / f"tiny-{name}"
            for place, one in ((folder, config), (tiny, type(config)(vocab_size=512))):
                place.mkdir()
                if name == "fp32":
                    write_model(made(one), common_tokenizer(), place)
                else:
                    write_packed(made(one), common_tokenizer(), place, TernaryPlan(), GroupPlan())
            found[name] = {"file": (folder / "model.safetensors").stat().st_size}
            measured = [in_a_process(folder, tiny) for _ in range(3)]
            found[name] |= {key: statistics.median(one[key] for one in measured) for key in measured[0]}
    least = min(found["fp32"][key] / found["packed"][key] for key in JUDGED)
    titles = {
        "peak": "peak memory of opening and decoding",
        "reading": "of that, opening",
        "kept": "held between tokens, state included",
        "tensors": "tensors of the model in memory",
        "file": "weights on disk",
    }
    for key, title in titles.items():
        fp32, small = (found[name][key] for name in ("fp32", "packed"))
        target = f">= {SMALLER:.0f}: {'met' if fp32 >= SMALLER * small else 'missed'}" if key in JUDGED else ""
        sizes = [f"{fp32 / 1e6:.1f}", "-", "-", f"{small / 1e6:.1f}"]
        rows.append([f"{family}, {title}, MB", *sizes, f"{fp32 / small:.1f} x smaller", "", target])
    return rows, least


def common_tokenizer():
    """A tokenizer, because artifacts have one: trained on a few words, it takes next to no memory."""
    from forgekit.data.tokenizer import train_tokenizer

    return train_tokenizer(["a few words and some more of them"] * 5, 300)


def notes() -> list[str]:
    """What the numbers mean."""
    shapes = ", ".join(f"{name} {one.parameters():,} parameters" for name, one in configs().items())
    return [
        f"Models of the profile small ({shapes}) with random weights: neither speed nor bytes depend on what was "
        "learnt. "
        f"Batch 1, greedy, state cached; {TOKENS} tokens in each of {ROUNDS} rounds in which all sides take turns; "
        "medians over rounds. All sides run the same code but for the weights; attention and memory of a token are "
        "compiled for the float32 sides (fp32, int8, packed).",
        "packed: ternary maps in 2 bits with 8-bit activations, embedding and head in 8 bits with a scale per 32 "
        "columns. int8, dynamic: torch.ao's quantize_dynamic of all nn.Linear; the tied head stays fp32.",
        "Memory: what the resident set grows by, at its peak, while a fresh process that has opened and decoded a tiny "
        "model of the same kind (so that all is imported, compiled and made ready) opens the artifact from disk and "
        f"decodes {HELD_TOKENS} tokens after {BEFORE}; medians of 3. At its peak the fp32 side holds the file's pages "
        "and the model at once. What is held between tokens is measured once freed memory went back to the system.",
        f"Targets: {FASTER} times as fast as fp32, {SMALLER:.0f} times less memory.",
    ]


def main() -> int:
    """Measure and publish; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description="Decode from packed ternary weights.")
    parser.add_argument("--only", nargs="+", choices=("speed", "memory"), default=["speed", "memory"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="folder of the table")
    parser.add_argument("--held", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.held:
        print(json.dumps(held(*options.held)))
        return 0
    common.RESULTS = options.results
    rows, met = [], []
    for family, config in configs().items():
        if "speed" in options.only:
            with torch.inference_mode():
                more, reached = speed_rows(family, config, options.threads)
            rows, met = rows + more, met + [x >= FASTER for x in reached]
        if "memory" in options.only:
            tell(f"{family}, memory")
            more, least = memory_rows(family, config)
            rows, met = rows + more, [*met, least >= SMALLER]
    publish("ternary_decoding", "Decoding from packed ternary weights", COLUMNS, rows, notes())
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
