"""Merging against mergekit: three siblings of 100 million parameters and their base, by four methods.

    python -m benchmarks.merging [--mergekit PATH] [--methods linear slerp ties dare] [--types float32 bfloat16]

``mergekit`` (LGPL) runs in processes of its own and is not imported here; without ``--mergekit`` its command is looked
for beside this Python and on the PATH. Both sides merge the same files with their default settings, in turns. Exits 1
if a target is missed, 2 without mergekit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import publish, tell

ROUNDS = 3
TARGET = 1.5
ENOUGH = 60.0
"""Seconds after which calls are not repeated any more."""
SPREAD = 0.002
"""Standard deviation of the task vectors; the base's weights have 0.02."""
THIRD = 1 / 3
SMALL = 1e-6
"""Values closer than this are called equal in float32."""
TRIO, PAIR = ("a", "b", "c"), ("a", "b")


@dataclass(frozen=True)
class Method:
    """One merge as both sides are told it: the models, whether a base takes part, our options, theirs."""

    models: tuple[str, ...]
    base: str | None
    ours: dict
    theirs: str
    each: dict = field(default_factory=dict)
    shared: dict = field(default_factory=dict)


METHODS = {
    "linear": Method(TRIO, None, {}, "linear", {"weight": 1.0}),
    "slerp": Method(PAIR, None, {"t": 0.3}, "slerp", {}, {"t": 0.3}),
    "ties": Method(TRIO, "base", {"density": 0.2}, "ties", {"weight": 1.0, "density": 0.2}),
    "dare": Method(
        TRIO, "base", {"drop_rate": 0.9, "lam": 1.0, "weights": [THIRD] * 3}, "dare_linear",
        {"weight": THIRD, "density": 0.1},
    ),
    "dare, p = 0": Method(
        TRIO, "base", {"drop_rate": 0.0, "lam": 1.0, "weights": [THIRD] * 3}, "dare_linear",
        {"weight": THIRD, "density": 1.0},
    ),
}  # fmt: skip

OURS = """
import json, sys, time
import torch
from agent_forge.merging.folders import MergePlan, merge_folders
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    plan = MergePlan.build(job, "merge")
    began = time.perf_counter()
    merge_folders(plan)
    print("took", time.perf_counter() - began, flush=True)
"""
THEIRS = """
import json, sys, time
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    began = time.perf_counter()
    run_merge(MergeConfiguration.model_validate(job["config"]), job["output"], MergeOptions(quiet=True))
    print("took", time.perf_counter() - began, flush=True)
"""


# ---- what is merged


def write_models(folder: Path, dtype: str) -> Path:
    """A base and three siblings branched from it: Llamas with random weights, one file each."""
    shape = LlamaConfig(
        vocab_size=20_480, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=2048, tie_word_embeddings=True, dtype=dtype,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(shape)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    for number, name in enumerate(("base", *TRIO)):
        draws = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for key, p in model.named_parameters():
                p.copy_(base[key])
                if number:
                    p.add_(torch.randn(p.shape, generator=draws), alpha=SPREAD)
        model.to(getattr(torch, dtype)).save_pretrained(folder / name)
        model.float()
    return folder


def our_plan(method: Method, models: Path, name: str, output: Path) -> dict:
    """Our side as plain values."""
    return {
        "method": name.partition(",")[0],
        "models": [str(models / m) for m in method.models],
        "base": str(models / method.base) if method.base else None,
        "output": str(output),
        "options": method.ours,
    }


def their_config(method: Method, models: Path, dtype: str) -> dict:
    """mergekit's configuration. SLERP is between its base and the other model."""
    parts = [{"model": str(models / m), **({"parameters": method.each} if method.each else {})} for m in method.models]
    config = {"merge_method": method.theirs, "models": parts, "dtype": dtype}
    if method.shared:
        config["parameters"] = method.shared
    if method.base or method.theirs == "slerp":
        config["base_model"] = str(models / (method.base or method.models[0]))
    return config


# ---- one merge


@dataclass(frozen=True)
class Run:
    """A finished command."""

    seconds: float
    peak: int
    """Most resident bytes of the process."""


LAUNCH = """
import json, os, sys, time
began = time.perf_counter()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, usage = os.wait4(child, 0)
print(json.dumps([time.perf_counter() - began, status, usage.ru_maxrss]))
"""
"""Starts a command from a process of a few megabytes: what a process held before its command began counts in its peak,
and a child begins as a copy of its parent."""


def command(words: list[str], output: Path) -> Run:
    """Run a command that writes a folder.

    Raises:
        RuntimeError: it failed.
    """
    shutil.rmtree(output, ignore_errors=True)
    started = [sys.executable, "-S", "-c", LAUNCH, *words]
    done = subprocess.run(started, capture_output=True, text=True, env=offline())
    seconds, status, peak = json.loads(done.stdout)
    if status:
        raise RuntimeError(f"{words[0]} failed: {done.stderr[-2000:]}")
    return Run(seconds, peak * (1 if sys.platform == "darwin" else 1024))


def offline() -> dict[str, str]:
    """The environment of both sides."""
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


class Worker:
    """A process that has imported everything and merges when it is told to."""

    def __init__(self, python: Path | str, code: str) -> None:
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [str(python), "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env=offline(),
        )  # fmt: skip
        self._line("ready")

    def merge(self, job: dict) -> float:
        """Seconds for one merge."""
        shutil.rmtree(job["output"], ignore_errors=True)
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return float(self._line("took").split()[1])

    def _line(self, word: str) -> str:
        for line in self._process.stdout:
            if line.startswith(word):
                return line
        self._errors.seek(0)
        raise RuntimeError(f"a worker ended: {self._errors.read()[-2000:]}")

    def close(self) -> None:
        """End it."""
        self._process.communicate()
        self._errors.close()


def difference(ours: Path, theirs: Path) -> tuple[float, int]:
    """Largest absolute difference between two checkpoints, and how many values differ by more than SMALL.

    Raises:
        RuntimeError: they do not hold the same tensors.
    """
    most, many = 0.0, 0
    sides = []
    for folder in (ours, theirs):
        found = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        sides.append(found)
    if set(sides[0]) != set(sides[1]):
        raise RuntimeError(f"other tensors: {sorted(set(sides[0]) ^ set(sides[1]))[:5]}")
    for name in sides[0]:
        a, b = (safe_open(side[name], "pt").get_tensor(name).float() for side in sides)
        gap = (a - b).abs_()
        most, many = max(most, gap.max().item()), many + int((gap > SMALL).sum())
    return most, many


# ---- measuring


@dataclass
class Case:
    """What was measured of one method and type."""

    name: str
    dtype: str
    ours: list[Run] = field(default_factory=list)
    theirs: list[Run] = field(default_factory=list)
    calls: dict[str, list[float]] = field(default_factory=dict)
    gap: tuple[float, int] | None = None

    @property
    def ratios(self) -> list[float]:
        """Times as fast as mergekit, round by round, the whole command."""
        return [b.seconds / a.seconds for a, b in zip(self.ours, self.theirs)]

    @property
    def memory(self) -> tuple[int, int]:
        """The highest peak of each side."""
        return max(r.peak for r in self.ours), max(r.peak for r in self.theirs)

    @property
    def met(self) -> bool:
        """Whether both targets are."""
        return statistics.median(self.ratios) >= TARGET and self.memory[0] <= self.memory[1]


class Bench:
    """The scratch folder, the peer and the models of one type."""

    def __init__(self, scratch: Path, mergekit: Path, dtype: str) -> None:
        self.scratch, self.mergekit, self.dtype = scratch, mergekit, dtype
        self.models = write_models(scratch / dtype, dtype)
        self.outputs = scratch / "ours", scratch / "theirs"

    def commands(self, name: str) -> tuple[Run, Run]:
        """Ours, then theirs, as a user types them."""
        method, (ours, theirs) = METHODS[name], self.outputs
        plan = our_plan(method, self.models, name, ours)
        words = [sys.executable, "-m", "agent_forge.cli.main", "--storage", str(self.scratch / "storage"), "merge"]
        words += [*plan["models"], "--method", plan["method"], "--output", str(ours)]
        words += ["--base", plan["base"]] if plan["base"] else []
        for key, value in method.ours.items():
            words += ["--option", f"{key}={json.dumps(value)}"]
        config = self.scratch / "config.yml"
        config.write_text(json.dumps(their_config(method, self.models, self.dtype)))  # JSON is YAML
        return command(words, ours), command([str(self.mergekit), str(config), str(theirs), "--quiet"], theirs)

    def calls(self, name: str, rounds: int) -> dict[str, list[float]]:
        """Seconds of the merge itself, imports done: first in its process, then again, in turns, until it is ENOUGH."""
        method = METHODS[name]
        ours = our_plan(method, self.models, name, self.outputs[0])
        theirs = {"config": their_config(method, self.models, self.dtype), "output": str(self.outputs[1])}
        jobs = {"ours": ours, "ours, not hashing": {**ours, "verify": False}, "theirs": theirs}
        pythons = {"theirs": (self.mergekit.parent / "python", THEIRS)}
        workers = {side: Worker(*pythons.get(side, (sys.executable, OURS))) for side in jobs}
        seconds: dict[str, list[float]] = {side: [] for side in jobs}
        try:
            for number in range(rounds + 1):
                if number > 1 and sum(map(sum, seconds.values())) > ENOUGH:
                    break
                for side, job in jobs.items():
                    seconds[side].append(workers[side].merge(job))
            return seconds
        finally:
            for worker in workers.values():
                worker.close()

    def case(self, name: str, rounds: int) -> Case:
        """Everything about one method."""
        case = Case(name, self.dtype)
        for _ in range(rounds):
            ours, theirs = self.commands(name)
            case.ours.append(ours)
            case.theirs.append(theirs)
            tell(f"{self.dtype} {name}: ours {ours.seconds:.2f} s, mergekit {theirs.seconds:.2f} s")
        if not METHODS[name].theirs.startswith("dare"):
            case.gap = difference(*self.outputs)
        case.calls = self.calls(name, rounds)
        if name == "dare":
            self.commands("dare, p = 0")
            case.gap = difference(*self.outputs)
        return case


def report(cases: list[Case], version: str, rounds: int) -> int:
    """The table; 1 if a target is missed."""
    rows = []
    for case in cases:
        ours, theirs = (statistics.median(r.seconds for r in side) for side in (case.ours, case.theirs))
        spread = f"{min(case.ratios):.2f} to {max(case.ratios):.2f}"
        again = {side: statistics.median(values[1:]) for side, values in case.calls.items()}
        first = {side: values[0] for side, values in case.calls.items()}
        rows.append([
            case.name, case.dtype, f"{ours:.2f} s", f"{theirs:.2f} s",
            f"**{statistics.median(case.ratios):.2f}** ({spread})", "met" if case.met else "missed",
            *(f"{peak / 1e6:.0f} MB" for peak in case.memory),
            *(f"{first[s]:.2f} / {again[s]:.2f}" for s in ("ours", "ours, not hashing", "theirs")),
            f"{case.gap[0]:.1e}, {case.gap[1]:,}",
        ])  # fmt: skip
    columns = [
        "method", "type", "command, ours", "mergekit", "times as fast", f"target >= {TARGET}, no more memory",
        "peak, ours", "mergekit", "call in s, first / again: ours", "not hashing", "mergekit", "largest gap, unequal",
    ]  # fmt: skip
    publish("merging", "Merging against mergekit", columns, rows, _notes(version, rounds))
    return 0 if all(case.met for case in cases) else 1


def _notes(version: str, rounds: int) -> list[str]:
    return [
        f"mergekit {version}. Three Llamas (SLERP: two) of 100,682,496 random parameters around a common base, one "
        f"file each; weights of standard deviation 0.02, task vectors of {SPREAD}. {rounds} rounds in turns; times are "
        "medians, ratios medians over rounds with the smallest and largest.",
        "Command: `agent-forge merge` and `mergekit-yaml` from start to end, default settings; peak: most resident "
        "memory of the process, mapped files included, the highest of all rounds.",
        "Call: the merge alone in a process that has imported torch and the merging code. First is what a command "
        "does; again is the same merge in the same process, when whatever is imported late is there. Ours hashes every "
        "input for the receipt and forces the result to the disk, mergekit does neither; `not hashing` is ours with "
        "`--no-verify`.",
        f"Largest absolute difference between the results and how many of the values differ by more than {SMALL:g}; "
        "DARE with nothing dropped, since its draws differ. TIES differs by definition in two places: of magnitudes "
        "that tie at the threshold ours keeps all, mergekit those that its sort puts first; where masses cancel "
        "exactly ours elects no sign (the paper's), mergekit the positive one. In bfloat16 both are common, and "
        "mergekit computes task vectors in bfloat16, ours in float32; linear and SLERP differ by the last rounding.",
    ]


def find_mergekit(given: Path | None) -> Path | None:
    """The command ``mergekit-yaml``."""
    beside = Path(sys.executable).parent / "mergekit-yaml"
    found = given or (beside if beside.is_file() else shutil.which("mergekit-yaml"))
    return Path(found) if found and Path(found).is_file() else None


def main() -> int:
    """Measure and publish; 1 if a target is missed, 2 without mergekit."""
    parser = argparse.ArgumentParser(description="Merge against mergekit.")
    parser.add_argument("--mergekit", type=Path, help="the command mergekit-yaml of its environment")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["linear", "slerp", "ties", "dare"])
    parser.add_argument("--types", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options, _ = parser.parse_known_args()
    mergekit = find_mergekit(options.mergekit)
    if mergekit is None:
        print(f"no mergekit-yaml {options.mergekit or 'beside this Python or on the PATH'}; "
              "pip install mergekit==0.1.5 into any environment and give --mergekit", file=sys.stderr)  # fmt: skip
        return 2
    asked = [
        str(mergekit.parent / "python"),
        "-c",
        "from importlib.metadata import version; print(version('mergekit'))",
    ]
    version = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    cases = []
    for dtype in options.types:
        with tempfile.TemporaryDirectory() as scratch:
            bench = Bench(Path(scratch), mergekit, dtype)
            cases += [bench.case(name, options.rounds) for name in options.methods]
    return report(cases, version, options.rounds)


if __name__ == "__main__":
    sys.exit(main())
