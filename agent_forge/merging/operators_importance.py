"""How much every parameter matters to a model: the diagonal empirical Fisher information.

Source: Matena and Raffel, Merging Models with Fisher-Weighted Averaging (arXiv 2111.09832), equation 2 with the
observed labels: F = mean over rows of (d loss(row) / d parameter) squared.

A caller says for every model where its importances come from: a safetensors file or folder, or :data:`MEASURE`, which
measures them on problems of the gym's *train* split, so that what the merge is judged by is not touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from forgekit.config import Config
from forgekit.errors import ArtifactError, DataError
from forgekit.models.base import CausalLM
from forgekit.models.constants import IGNORE

MEASURE = "auto"
"""Says that importances are to be measured: ``auto``, or ``auto:FAMILY+FAMILY`` for problems of these families."""
LEVELS = (1, 2, 3)
"""Levels of the problems: those that a trunk practises."""


class MeasureConfig(Config):
    """What importances are measured on."""

    problems: Annotated[int, Field(gt=0)] = 64
    """Problems per model, spread evenly over families and levels."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the problems."""


def empirical_fisher(model: CausalLM, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Importance of every parameter, float32, under the names the weights have on disk.

    The loss is the model's own training objective, so that parts which only halting or gating hears count too.

    Args:
        model: any model of the house; its mode, its gradients and its weights stay as they are.
        batches: (ids, labels), each (B, T), labels already shifted; every row counts as one observation.

    Raises:
        DataError: there are no rows.
    """
    inner = getattr(model, "hf", model)  # a wrapped transformers model is stored without the wrapper's prefix
    named = [(name, p) for name, p in inner.named_parameters() if p.requires_grad]
    totals = [torch.zeros_like(p, dtype=torch.float32) for _, p in named]
    rows = 0
    for ids_BT, labels_BT in batches:
        for ids, labels in zip(ids_BT.split(1), labels_BT.split(1)):
            loss = model.training_loss(ids, labels).total
            grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
            for total, grad in zip(totals, grads):
                if grad is not None:
                    total.add_(grad.float().square())
            rows += 1
    if not rows:
        raise DataError("no rows to measure importance on", where="importances", remedy="give at least one batch")
    return {name: total.div_(rows) for (name, _), total in zip(named, totals)}


def measured(text: str) -> tuple[str, ...] | None:
    """The families of ``auto`` or ``auto:FAMILY+FAMILY``; None for anything else, which is a path.

    Raises:
        ConfigError: no such family; the nearest names are given.
    """
    from forgekit.data.gym import FAMILIES

    word, colon, names = text.partition(":")
    if word != MEASURE or Path(text).exists():
        return None
    families = names.split("+") if colon else FAMILIES.names()
    return tuple(FAMILIES.get(name).name for name in families)


def problem_rows(
    tokenizer: Any, families: Sequence[str], config: MeasureConfig, longest: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """One problem of the train split after the other as (ids, labels), each (1, T); only answers are supervised.

    Args:
        tokenizer: of the model.
        families: of the gym.
        config: how many, and the seed.
        longest: most tokens of a row; longer problems are passed over.

    Raises:
        DataError: no problem is short enough.
    """
    from forgekit.data.batches import ProblemSource
    from forgekit.data.gym import generate

    kinds = [(family, level) for family in families for level in LEVELS]
    each = -(-config.problems // len(kinds))
    drawn = [generate(family, level, each, seed=config.seed) for family, level in kinds]
    rounds = [problem for group in zip(*drawn) for problem in group]  # every family and level before the next of any
    source = ProblemSource(tokenizer, rounds)
    fits = [i for i in range(len(rounds)) if longest is None or source.size[i] <= longest + 1][: config.problems]
    if not fits:
        what = f"no problem fits {longest} tokens"
        raise DataError(what, where="importances", remedy="name families with shorter problems")
    for i in fits:
        start, size = int(source.start[i]), int(source.size[i])
        line = torch.from_numpy(source.tokens[start : start + size].astype("int64"))
        labels = line[1:].clone()
        labels[: int(source.prompt_size[i]) - 1] = IGNORE
        yield line[None, :-1], labels[None]


def measure(folder: Path, families: Sequence[str], config: MeasureConfig) -> dict[str, Tensor]:
    """Importances of one of our models, measured on problems; see :func:`empirical_fisher`.

    Raises:
        ArtifactError: not a model of one of our families: only their tokenizers know the problems' tokens; or its
            weights are packed and have no gradients.
        DataError: no problem fits the model's context.
    """
    from forgekit.models.config import MODEL_CONFIGS
    from forgekit.models.io import read_config, read_model
    from forgekit.store.packed import refuse_packed

    refuse_packed(folder, "differentiated")
    kind = read_config(folder).get("model_type", "unknown")
    if kind not in MODEL_CONFIGS:
        what = f"model_type {kind!r} is not one of ours: {MEASURE} measures importances on those only"
        raise ArtifactError(what, where=folder.name, remedy="give a safetensors file with its importances")
    model, tokenizer = read_model(folder)
    return empirical_fisher(model, problem_rows(tokenizer, families, config, model.config.max_seq_len))


def write_measured(
    models: Sequence[Path], told: Sequence[str], config: MeasureConfig, folder: Path
) -> tuple[list[Path], list[str]]:
    """The importances of every model as files, measured where that is asked for.

    Args:
        models: folders.
        told: for every model a path, or :data:`MEASURE`.
        config: what is measured on.
        folder: where measured importances are written.

    Returns:
        One path per model, and a note on every measurement.

    Raises:
        ArtifactError, ConfigError, DataError: as :func:`measure` and :func:`measured`.
    """
    from safetensors.torch import save_file

    paths, notes = [], []
    for number, (model, text) in enumerate(zip(models, told, strict=True)):
        families = measured(text)
        if families is None:
            paths.append(Path(text))
            continue
        path = folder / f"importances-{number}.safetensors"
        save_file(measure(model, families, config), path)
        paths.append(path)
        notes.append(f"importances of {model.name}: {about(families, config)}")
    return paths, notes


def about(families: Sequence[str], config: MeasureConfig) -> str:
    """One line on a measurement."""
    levels = f"levels {LEVELS[0]} to {LEVELS[-1]}"
    what = f"squared gradients on {config.problems} train problems, seed {config.seed}, {levels}"
    return f"{what} of {', '.join(families)}"
