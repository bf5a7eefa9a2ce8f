"""What a run would do, before it does it: phases, sizes, time and disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

from agent_forge.pipeline.orchestrator import phases_to_run
from agent_forge.profile import Profile
from forgekit.compute.disk import forecast
from forgekit.config import Config

OPTIMIZER_SLOTS = 3


def forecast_run(profile: Profile, until: str | None = None) -> dict[str, Any]:
    """The plan as JSON-able values.

    A phase other than the first says itself what it will do: its configuration's ``forecast()`` gives either rows like
    those of a training (``stage``, ``steps``, ``tokens`` and, when it knows them, ``seconds``; ``models`` is how many
    lie on the disk at once), or counts by name, such as ``generations``.

    Times are forecast from a few real training steps of the profile's model on this machine, measured now; data,
    evidence and ablations are not in them.

    Raises:
        ConfigError: unknown phase, or one the profile has no settings for.
    """
    budget = profile.model.solve()
    names = phases_to_run(profile, last=until)
    stages, counts, models, kept = [], {}, 0, 0
    speed = cache(lambda: training_speed(profile, profile.context))
    for name in names:
        config = profile.phase(name)
        if name == "cognate":
            trains = [("trunk", config.trunk), *((s.name, config.training_of(s)) for s in config.specialists)]
            stages += [{"phase": name, **stage} for stage in _stages(profile, trains)]
            at_once = len(config.specialists) if profile.side_by_side else 1
            kept = max(kept, (max(train.keep_checkpoints for _, train in trains) + 1) * at_once - 1)
            models += len(trains)
        else:
            rows, counts[name] = _told(config)
            stages += [{"phase": name, **_timed(profile, row, speed)} for row in rows]
            models += max((row.get("models", 0) for row in rows), default=0)
    return {
        "profile": profile.name,
        "about": profile.about,
        "phases": names,
        "model": {
            "parameters": budget.parameters,
            "target": budget.target,
            "split": budget.split,
            "config": profile.model_config_solved().model_dump(mode="json"),
            "mflops_per_token": profile.model_config_solved().flops_per_token(profile.context) / 1e6,
        },
        "stages": stages,
        "counts": {name: told for name, told in counts.items() if told},
        "seconds": round(sum(s["seconds"] for s in stages), 1),
        "disk_bytes": forecast(budget.parameters, models, kept, OPTIMIZER_SLOTS),
    }


def _stages(profile: Profile, trains: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    """Steps, tokens and seconds of every training; every token counts as supervised, which is the safe side."""
    shape, speeds, stages = profile.model_config_solved(), {}, []
    for stage, train in trains:
        if train.seq_len not in speeds:
            speeds[train.seq_len] = training_speed(profile, train.seq_len)
        tokens = train.steps * train.rows * train.seq_len
        seconds = tokens * shape.train_flops_per_token(train.seq_len, 1.0) / speeds[train.seq_len]
        stages.append({"stage": stage, "steps": train.steps, "tokens": tokens, "seconds": round(seconds, 1)})
    return stages


def _told(config: Config) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and counts that a phase's configuration forecasts; neither where it says nothing."""
    told = config.forecast() if hasattr(config, "forecast") else {}
    return ([], told) if isinstance(told, dict) else (list(told), {})


def _timed(profile: Profile, row: dict[str, Any], speed: Callable[[], float]) -> dict[str, Any]:
    """A stage's row; seconds it does not know are those of reading its tokens once, as fast as training computes."""
    steps, tokens, seconds = row.get("steps", 0), row.get("tokens", 0), row.get("seconds")
    if seconds is None:
        shape = profile.model_config_solved()
        flops = tokens * shape.flops_per_token(profile.context)
        seconds = flops / speed() if flops else 0.0
    return {"stage": row["stage"], "steps": steps, "tokens": tokens, "seconds": round(seconds, 1)}


SAMPLE_TOKENS, SAMPLE_LAYERS, LARGE = 2048, 2, 50_000_000


def training_speed(profile: Profile, seq_len: int) -> float:
    """Training FLOP/s of this machine on the profile's model, from a few small real steps.

    A batch of about 2,048 tokens is enough to see the speed and small enough to fit; of a large model two layers
    stand for all.
    """
    import numpy as np
    import torch

    from forgekit.data.batches import Batch
    from forgekit.models.io import build_model
    from forgekit.train.config import TrainConfig
    from forgekit.train.loop import Trainer

    shape, length = profile.model_config_solved(), min(seq_len, 256)
    if shape.parameters() > LARGE:
        fewer = {"n_layers": SAMPLE_LAYERS, "memory_layers": (1,)}
        shape = shape.replace(**{name: value for name, value in fewer.items() if name in type(shape).model_fields})
    rows = max(1, SAMPLE_TOKENS // length)
    torch.set_num_threads(profile.threads or torch.get_num_threads())
    clocks: list[float] = []

    class Noise:
        def batch(self, step: int) -> Batch:
            clocks.append(time.perf_counter())
            rng = np.random.default_rng(step)
            return Batch(*(rng.integers(0, shape.vocab_size, (rows, length)) for _ in range(2)))

    train = TrainConfig(steps=4, rows=rows, seq_len=length, checkpoint_every=0)
    with torch.random.fork_rng():
        Trainer(build_model(shape), Noise(), train).run()
    best = min(b - a for a, b in zip(clocks[1:], clocks[2:]))
    return rows * length * shape.train_flops_per_token(length, 1.0) / best
