"""Prompt baking at nano: a model that thinks in the strategy its system message names, and the message baked in.

    python -m benchmarks.baking MODEL [--strategy falsify] [--second expert] [--keep FOLDER] [--only NAME ...]

MODEL is an artifact folder of a model that thinks before it answers, as phase 3 makes. ``--keep`` stores the measured
rows, so that a run may be cut in pieces with ``--only``. Exits 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agent_forge.profile import load_profile
from agent_forge.prompt_baking import BakingTask, PromptBakingConfig, bake_prompt
from agent_forge.prompt_baking.adapters import Adapters
from agent_forge.prompt_baking.bake import Baked, Student
from agent_forge.prompt_baking.contexts import Contexts
from agent_forge.prompt_baking.evidence import agreement, answer_likelihoods, answers_of, gym_tasks, teacher_likelihoods
from agent_forge.prompt_baking.sides import sides_of
from benchmarks.common import publish, tell
from forgekit.data.gym import generate
from forgekit.infer.engine import Engine
from forgekit.measure.stats import Interval, paired_difference
from forgekit.models.io import build_model, read_model

PROBLEMS, LEVELS, LONGEST = 45, (1, 2, 3), 96
WITHIN, FORGOTTEN = 0.014, 0.034
MODES = ("full", "half", "sequential", "pursuit")
MEMORY_ROWS, MEMORY_TOKENS = 16, 256
SIX_GB = 6e9


def main() -> int:
    """Measure what is asked for; publish when all is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--strategy", default="falsify")
    parser.add_argument("--second", default="expert", help="what mode sequential bakes after it")
    parser.add_argument("--keep", type=Path, help="folder of measured rows")
    parser.add_argument("--only", nargs="+", choices=("base", *MODES, "memory"))
    parser.add_argument("--peak", choices=("chunked", "whole"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)  # then CPU seconds are those of an idle machine, whatever else runs here
    if asked.peak:
        print(json.dumps(one_step(asked.peak)))
        return 0
    found: dict[str, Any] = {}
    bench = Bench(asked.model, asked.strategy, asked.second)
    for name in asked.only or ("base", *MODES, "memory"):
        tell(name)
        found[name] = memory() if name == "memory" else bench.base() if name == "base" else bench.mode(name)
        if asked.keep:
            asked.keep.mkdir(parents=True, exist_ok=True)
            (asked.keep / f"{name}.json").write_text(json.dumps(found[name]), encoding="utf-8")
    if asked.keep:
        found |= {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in asked.keep.glob("*.json")}
    missing = {"base", *MODES, "memory"} - found.keys()
    if missing:
        tell(f"not measured yet: {', '.join(sorted(missing))}")
        return 0
    return tabulate(found, asked)


class Bench:
    """One model, one strategy, and the questions that tell."""

    def __init__(self, folder: Path, strategy: str, second: str) -> None:
        self.model, self.tokenizer = read_model(folder)
        self.strategy, self.second = strategy, second
        self.sides = sides_of(self.model, self.tokenizer)
        blank = Baked(self.model, self.sides, PromptBakingConfig(), Contexts((), (), ()))
        self.frame, tasks = blank, gym_tasks(PROBLEMS, LEVELS, LONGEST)
        thinks = {task.name for task in tasks if self._thinks(task.name)}
        tell(f"thinks in {', '.join(sorted(thinks))}")
        self.thinking = [task for task in tasks if task.name in thinks]
        self.others = [task for task in tasks if task.name not in thinks]

    def _thinks(self, family: str) -> bool:
        """Whether the bare model opens a thought in most of its answers; seen on the select split."""
        problems = [p for level in LEVELS for p in generate(family, level, 8, seed=1, split="select")]
        probe = BakingTask(family, tuple(p.prompt for p in problems), lambda i, text: 0.0, None, 4)
        texts = answers_of(Engine(self.model, self.tokenizer), self.frame, probe)
        return 2 * sum(text.startswith("<think>") for text in texts) > len(texts)

    def asked(self, model: Any, tasks: list[BakingTask], prompt: str = "") -> dict[str, list[float]]:
        """Right answers, and thoughts in the strategy (and the second one), of every question."""
        engine, rows = Engine(model, self.tokenizer), {"right": [], self.strategy: [], self.second: []}
        for task in tasks:
            for i, text in enumerate(answers_of(engine, self.frame, task, prompt)):
                thought = text.partition("</think>")[0]
                rows["right"].append(task.score(i, text))
                rows[self.strategy].append(float(f"<{self.strategy}>" in thought))
                rows[self.second].append(float(f"<{self.second}>" in thought))
        return rows

    def base(self) -> dict[str, Any]:
        """The model without a prompt and with one."""
        return {
            "bare": self.asked(self.model, self.thinking),
            "prompted": self.asked(self.model, self.thinking, self.strategy),
            "second": self.asked(self.model, self.thinking, self.second),
            "others": self.asked(self.model, self.others),
            "others prompted": self.asked(self.model, self.others, self.strategy),
            "others second": self.asked(self.model, self.others, self.second),
            "families": [[task.name for task in tasks] for tasks in (self.thinking, self.others)],
        }

    def mode(self, name: str) -> dict[str, Any]:
        """Bake in one mode and measure."""
        config = PromptBakingConfig(mode=name, max_tokens=LONGEST)
        prompt = [self.strategy, self.second] if name == "sequential" else self.strategy
        clock = time.process_time()
        baked = bake_prompt(self.model, prompt, config, tokenizer=self.tokenizer)
        spent = time.process_time() - clock
        tell(f"{name}: {baked.divergence_before:.4f} to {baked.divergence_after:.4f} nats, {spent:.0f} s")
        held = baked.held[-1]  # of several prompts the last: it is what the model was made to do
        wanted = teacher_likelihoods(held)
        return {
            "divergence": [float(baked.before[-1].mean()), float(baked.after[-1].mean())],
            "strength": [stage.strength for stage in baked.stages],
            "r2": [float(agreement(wanted, answer_likelihoods(one, held))) for one in (self.model, baked.model)],
            "seconds": spent,
            "baked": self.asked(baked.model, self.thinking),
            "prompted": self.asked(baked.model, self.thinking, self.strategy),
            "others": self.asked(baked.model, self.others),
            "notes": baked.notes,
        }


def one_step(how: str) -> dict[str, float]:
    """Peak memory and seconds of one training step at the shape of the ``small`` profile, in this process."""
    torch.manual_seed(0)
    model = build_model(load_profile("small").model_config_solved()).eval()
    started = peak()
    config = PromptBakingConfig()
    adapters = Adapters(model, config)
    rows, tokens, vocabulary = MEMORY_ROWS, MEMORY_TOKENS, model.config.vocab_size
    ids = torch.randint(0, vocabulary, (rows, tokens))
    chunk = 2**24 // vocabulary if how == "chunked" else rows * tokens
    teacher = torch.randn(rows * tokens, model.config.d_model)
    student = Student(model, adapters, (teacher, model), chunk)
    clock = time.process_time()
    student.training_loss(ids, torch.arange(rows * tokens).view(rows, tokens)).total.backward()
    return {"start": started, "peak": peak(), "seconds": time.process_time() - clock, "vocabulary": vocabulary}


def peak() -> float:
    """Largest resident memory of this process so far, in bytes."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory() -> dict[str, Any]:
    """A training step with chunks and without, each in a process of its own."""
    found = {}
    for how in ("chunked", "whole"):
        command = [sys.executable, "-m", "benchmarks.baking", ".", "--peak", how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[how] = json.loads(done.stdout.splitlines()[-1])
        tell(f"{how}: {found[how]['peak'] / 1e9:.2f} GB")
    return found


def percent(values: list[float]) -> str:
    """A mean in per cent."""
    return f"{100 * np.mean(values):.1f}"


def points(change: Interval) -> str:
    """A change in points, with its interval."""
    return f"{100 * change[0]:+.1f} [{100 * change[1]:+.1f}, {100 * change[2]:+.1f}]"


def tabulate(found: dict[str, Any], asked: argparse.Namespace) -> int:
    """The table, and whether the targets were met."""
    base, first = found["base"], asked.strategy
    columns = ["", f"thinks in {first}, %", "right with thoughts, %", "against prompted, points", "nats to prompted"]
    columns += ["r2", "prompted again: right, %", "other families, points", "CPU seconds"]
    bare, prompted = base["bare"], base["prompted"]
    full = found["full"]
    gap = paired_difference(prompted["right"], bare["right"])
    rows = [
        ["bare", percent(bare[first]), percent(bare["right"]), points(gap), f"{full['divergence'][0]:.4f}",
         f"{full['r2'][0]:.3f}", percent(prompted["right"]), "", ""],
        ["prompted", percent(prompted[first]), percent(prompted["right"]), "", "0", "1", "", "", ""],
    ]  # fmt: skip
    changes, lost = {}, {}
    for name in MODES:
        one = found[name]
        against = base["second"] if name == "sequential" else prompted
        changes[name] = paired_difference(against["right"], one["baked"]["right"])
        lost[name] = paired_difference(base["others"]["right"], one["others"]["right"])
        rows.append(
            [name, percent(one["baked"][first]), percent(one["baked"]["right"]), points(changes[name]),
             f"{one['divergence'][1]:.4f}", f"{one['r2'][1]:.3f}", percent(one["prompted"]["right"]),
             points(lost[name]), f"{one['seconds']:.0f}"]
        )  # fmt: skip
    met = {
        f"full: right within {100 * WITHIN:g} points of prompted": abs(changes["full"][0]) <= WITHIN,
        f"full: other families lose at most {100 * FORGOTTEN:g} points": lost["full"][0] >= -FORGOTTEN,
        "a chunked step at small fits 6 GB": found["memory"]["chunked"]["peak"] <= SIX_GB,
    }
    publish("baking", "Prompt baking at nano", columns, rows, notes(found, asked, met), "MODEL")
    return 0 if all(met.values()) else 1


def notes(found: dict[str, Any], asked: argparse.Namespace, met: dict[str, bool]) -> list[str]:
    """What the table needs to be understood."""
    base, second = found["base"], asked.second
    thinking, others = base["families"]
    sequence, again, steps = found["sequential"], found["full"]["prompted"]["right"], found["memory"]
    shape = f"{MEMORY_ROWS} answers of {MEMORY_TOKENS} tokens and a vocabulary of {steps['whole']['vocabulary']:,}"
    regained = paired_difference(base["prompted"]["right"], again)
    chunks, whole, plain = steps["chunked"], steps["whole"], base["others"]["right"]
    return [
        f"The prompt is the system message `{asked.strategy}`; the model thinks in {', '.join(thinking)}, judged on "
        f"the select split, and answers {', '.join(others)} at once. {len(base['bare']['right'])} report problems with "
        f"thoughts, {len(base['others']['right'])} without, levels 1 to 3, greedy. Brackets are 95 % intervals of "
        "paired differences.",
        f"Sequential bakes `{asked.strategy}`, then `{second}`: it then thinks in {second} in "
        f"{percent(sequence['baked'][second])} % (prompted with it the parent does in "
        f"{percent(base['second'][second])} %), and its answers are compared to those of the parent prompted with the "
        "second. Its divergence and r2 are those of the second, too.",
        f"Those other families are asked without a prompt. What a prompt itself does to them, on the parent: "
        f"`{asked.strategy}` {points(paired_difference(plain, base['others prompted']['right']))} points, `{second}` "
        f"{points(paired_difference(plain, base['others second']['right']))}.",
        f"Half ended at a strength of {found['half']['strength'][0]:.3f} on the answers that decide.",
        f"Prompting the fully baked model again: {points(regained)} points against the prompted parent.",
        f"One training step at the shape of profile small, {shape}: {chunks['peak'] / 1e9:.2f} GB at the peak and "
        f"{chunks['seconds']:.1f} CPU s in chunks, {whole['peak'] / 1e9:.2f} GB and {whole['seconds']:.1f} CPU s "
        f"without; {whole['start'] / 1e9:.2f} GB before the step. Largest resident memory of a process of its own.",
        *(f"{'met' if good else 'missed'}: {target}" for target, good in met.items()),
    ]


if __name__ == "__main__":
    sys.exit(main())
