"""What the ternary grid costs a model, and what each choice of phase 4 brings: against int8, int4, rounding alone and a
full-precision model of the same bytes.

    python -m benchmarks.ternary_quality STORAGE [--model thinker] [--keep FILE] [--only NAME ...]

Makes the model of a finished phase 3 ternary with nano's settings, three seeds, and with one choice changed at a time;
all are asked the same questions of the report split, which chose none of the settings. `--keep` holds finished rows, so
that a run goes on where it stopped. Exits 1 if nano's own settings miss a target on average.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agent_forge.phases.bitnet.config import BitNetConfig
from agent_forge.phases.bitnet.data import BitNetData, practice, prepare, thought_about
from agent_forge.phases.bitnet.evidence import mastered
from agent_forge.phases.bitnet.measuring import Asked, Reading, bytes_float32, narrow, packed_bytes, size_of
from agent_forge.phases.bitnet.parent import Parent, open_parent
from agent_forge.phases.bitnet.training import Student
from agent_forge.profile import load_profile
from benchmarks.common import publish, tell
from forgekit.data.plans import TextPlan
from forgekit.measure.problems import by_level
from forgekit.quant.config import GroupPlan
from forgekit.quant.model import fake_quantised, packed
from forgekit.store.fsio import write_atomic
from forgekit.store.storage import ModelStorage
from forgekit.train.loop import Trainer

SEEDS = (41, 42, 43)
OWN = "nano's settings"
UNTRAINED, SAME, LONGER = "rounded, not trained", "float16, same bytes", "float16, same bytes, four times the steps"
CONTINUED = "float32, trained on like the ternary ones"
PLAIN: dict[str, Any] = {"ternary": {"spared": ()}}
VARIANTS: dict[str, dict[str, Any]] = {
    "every map ternary": PLAIN,
    "every map ternary, twice the steps": {**PLAIN, "train": {"steps": 2}},
    "only `wo` and `wv` spared": {"ternary": {"spared": ("wo", "wv")}},
    "spared ones in 6 bits": {"ternary": {"spared_groups": {"bits": 6}}},
    "one scale per matrix": {"ternary": {"per": "tensor"}},
    "median for the mean": {"ternary": {"scale": "median"}},
    "threshold 0.3": {"ternary": {"threshold": 0.3}},
    "threshold 0.7": {"ternary": {"threshold": 0.7}},
    "the mean as scale, not refitted": {"ternary": {"refit": False}},
    "activations in float": {"ternary": {"activation_bits": 0}},
    "embedding in 4 bits": {"groups": {"bits": 4}},
    "with divergence to the parent": {"loss": {"divergence": 1.0}},
    "grid faded in over 30 %": {"loss": {"ramp": 0.3}},
    "cool-down over half of the steps": {"train": {"cooldown": 0.5}},
    "cool-down over a fifth": {"train": {"cooldown": 0.2}},
    "half the steps": {"train": {"steps": 0.5}},
    "twice the steps": {"train": {"steps": 2}},
}
"""What is changed; steps are times nano's."""
RATIO, LOST, ADDED, RECOVERY = 8.0, 2.0, 10.0, 60.0
"""Targets: times smaller, points of mastered skills, per cent of perplexity, per cent of what rounding lost."""


@dataclass
class Bench:
    """What all rows share.

    Attributes:
        config: nano's settings.
        parent: the model that is made small.
        data: questions, text.
        before: the parent on the select split and on the report split.
        strong: families and levels it has mastered, by the select split.
        asked: what is asked of every row.
    """

    config: BitNetConfig
    parent: Parent
    data: BitNetData
    before: dict[str, Reading]
    strong: frozenset[str]
    asked: Asked

    @property
    def print(self) -> str:
        """Changes with the parent and with the settings."""
        return f"{self.parent.print} {self.config.fingerprint()}"

    def row(self, model: torch.nn.Module, taken: int, steps: int) -> dict[str, Any]:
        """What a model shows."""
        found, problems = self.asked.of(model, self.parent.tokenizer), self.data.report
        levels, own = (by_level(problems, one.right) for one in (found, self.before["report"]))
        mastered_ = statistics.fmean(levels[cell] for cell in self.strong)
        return {
            "bytes": taken,
            "ratio": bytes_float32(self.parent.model) / taken,
            "right": found.accuracy,
            "mastered": mastered_,
            "lost": 100 * (statistics.fmean(own[cell] for cell in self.strong) - mastered_),
            "perplexity": found.perplexity,
            "added": 100 * (found.perplexity / self.before["report"].perplexity - 1),
            "steps": steps,
        }


def opened(folder: str, model: str) -> Bench:
    """Parent, data, and what the parent can do."""
    profile = load_profile("nano")
    torch.set_num_threads(1)  # as in the demo, where the second thread measures meanwhile
    config = changed(profile.phase("bitnet"), {"evaluation": {"problems": 24, "select": 12}}, SEEDS[0])
    parent = open_parent(ModelStorage(folder), [model], config)
    first = TextPlan.build(profile.phases["cognate"]["text"], "phases.cognate.text")
    data = prepare(config, parent.tokenizer, parent.speciality, first, None)
    before, budget = {}, config.evaluation.thinking_budget
    for split, problems in (("select", data.select), ("report", data.report)):
        asked = Asked(problems, data.windows[split], parent.thinks, budget)
        before[split] = asked.of(parent.model, parent.tokenizer)
    strong = mastered(data.select, before["select"].right, config.strong)
    return Bench(config, parent, data, before, strong, asked)


def changed(config: BitNetConfig, changes: dict[str, Any], seed: int) -> BitNetConfig:
    """nano's settings with some values changed, checked as a profile's are."""
    train = {"seed": seed, **changes.get("train", {})}
    train["steps"] = round(config.train.steps * train.get("steps", 1))
    values = _merged(config.model_dump(), {**changes, "train": train})
    return BitNetConfig.build(values, "variant")


def _merged(values: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    deeper = {k: _merged(values[k], v) if isinstance(v, dict) else v for k, v in fields.items()}
    return {**values, **deeper}


def trained(bench: Bench, model: torch.nn.Module, config: BitNetConfig) -> None:
    """Train on the phase's batches, in place."""
    thinks = thought_about(bench.data.select, bench.before["select"].thought)
    mixture = practice(config, bench.data, thinks)
    student = Student(model, copy.deepcopy(bench.parent.model), config.loss, config.train.steps)
    torch.manual_seed(config.train.seed)
    Trainer(student, mixture, config.train.replace(checkpoint_every=0), None).run()
    model.eval()


def ternary(bench: Bench, changes: dict[str, Any], seed: int) -> dict[str, Any]:
    """Rounded and trained with a choice changed."""
    config = changed(bench.config, changes, seed)
    model = fake_quantised(copy.deepcopy(bench.parent.model).requires_grad_(True), config.ternary, config.groups)
    trained(bench, model, config)
    small = packed(model, config.ternary, config.groups)
    return bench.row(small, packed_bytes(small), config.train.steps)


def rounded(bench: Bench, plan: Any) -> dict[str, Any]:
    """Only rounded."""
    small = packed(bench.parent.model, plan, bench.config.groups)
    return bench.row(small, packed_bytes(small), 0)


def continued(bench: Bench) -> dict[str, Any]:
    """The parent itself, trained on with the same batches and rates and without a grid."""
    model = copy.deepcopy(bench.parent.model).requires_grad_(True)
    config = changed(bench.config, {}, SEEDS[0])
    trained(bench, model, config)
    return bench.row(model, bytes_float32(model), config.train.steps)


def control(bench: Bench, times: float) -> dict[str, Any]:
    """A narrow model in float16, from nothing, on the same mixture."""
    size = packed_bytes(packed(bench.parent.model, bench.config.ternary, bench.config.groups))
    config = changed(bench.config, {"train": {"steps": times}}, bench.config.train.seed)
    model = narrow(bench.parent.model.config, size, config.train.seed)
    trained(bench, model, config)
    return bench.row(model, size_of(model), config.train.steps)


def measured(bench: Bench, name: str) -> dict[str, Any]:
    """One row by its name."""
    plain = {"int8": GroupPlan(bits=8), "int4": GroupPlan(bits=4), UNTRAINED: bench.config.ternary}
    if name in plain:
        return rounded(bench, plain[name])
    if name == CONTINUED:
        return continued(bench)
    if name in (SAME, LONGER):
        return control(bench, 4 if name == LONGER else 1)
    if name.startswith(OWN):
        return ternary(bench, {}, int(name.rsplit(" ", 1)[1]))
    return ternary(bench, VARIANTS[name], SEEDS[0])


def kept(path: Path | None, bench: Bench) -> dict[str, dict[str, Any]]:
    """Rows of an earlier run, of the same parent and settings; none of another's."""
    if path is None or not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["of"] != bench.print:
        sys.exit(f"error: {path}: rows of another model or of other settings; give another file")
    return found["rows"]


def table(found: dict[str, dict[str, Any]], bench: Bench) -> list[list[str]]:
    """Rows for the page."""
    before = bench.before["report"]
    size = bytes_float32(bench.parent.model)
    known = statistics.fmean(by_level(bench.data.report, before.right)[cell] for cell in bench.strong)
    rows = [["parent, float32", f"{size:,}", "1.0", f"{100 * before.accuracy:.1f}", f"{100 * known:.1f}",
             f"{before.perplexity:.1f}", "-"]]  # fmt: skip
    for name, row in found.items():
        shown = [
            f"{row['bytes']:,}",
            f"{row['ratio']:.1f}",
            f"{100 * row['right']:.1f}",
            f"{100 * row['mastered']:.1f}",
        ]
        rows.append([name, *shown, f"{row['perplexity']:.1f}", str(row["steps"] or "-")])
    return rows


def told(bench: Bench, found: dict[str, dict[str, Any]]) -> tuple[list[str], bool]:
    """Sentences under the table, and whether nano's own settings miss a target."""
    train = bench.config.train
    notes = [
        f"{len(bench.data.report)} questions of the report split; mastered are the {len(bench.strong)} families and "
        "levels at which the parent was right in at least 95 % of the select split's questions.",
        f"The first rows differ only in the seed: what differs by less than they do is noise. One row of variants is "
        f"one training; a step reads {train.rows} x {train.seq_len} tokens. The float16 models start from nothing, on "
        "the same mixture of batches as the ternary ones; the parent had three phases before.",
    ]
    own = [row for name, row in found.items() if name.startswith(OWN)]
    if not own or UNTRAINED not in found:
        return notes, False
    before, lowest = bench.before["report"].accuracy, found[UNTRAINED]["right"]
    means = {key: statistics.fmean(row[key] for row in own) for key in ("ratio", "lost", "added", "right")}
    recovery = 100 * (means["right"] - lowest) / (before - lowest)
    notes.append(
        f"On average over the seeds: {means['ratio']:.2f} times smaller, {means['lost']:+.1f} points lost of the "
        f"mastered skills, perplexity {means['added']:+.1f} %, {recovery:.0f} % of what rounding lost brought back."
    )
    met = means["ratio"] >= RATIO and means["lost"] <= LOST and means["added"] <= ADDED and recovery >= RECOVERY
    return notes, not met


def main() -> None:
    """Measure, publish, judge."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ternary_quality")
    parser.add_argument("storage")
    parser.add_argument("--model", default="thinker")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    given = parser.parse_args()
    names = [*(f"{OWN}, seed {seed}" for seed in SEEDS), UNTRAINED, "int8", "int4", CONTINUED, SAME, LONGER, *VARIANTS]
    names = [name for name in names if not given.only or any(part in name for part in given.only)]
    bench = opened(given.storage, given.model)
    found = kept(given.keep, bench)
    for name in names:
        if name not in found:
            tell(name)
            found[name] = measured(bench, name)
            tell(json.dumps(found[name]))
            if given.keep:
                write_atomic(given.keep, json.dumps({"of": bench.print, "rows": found}).encode())
    found = {name: found[name] for name in names}
    notes, missed = told(bench, found)
    columns = ["", "bytes", "times smaller", "right, %", "mastered, %", "perplexity", "steps"]
    arguments = " ".join(["STORAGE", *(["--only", *map(repr, given.only)] if given.only else [])])
    title = "What ternary weights cost at nano"
    publish("ternary_quality", title, columns, table(found, bench), notes, arguments)
    sys.exit(missed)


if __name__ == "__main__":
    main()
