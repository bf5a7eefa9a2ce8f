"""What a run would do, before it does it: phases, sizes, time and disk."""

from __future__ import annotations

import time
from typing import Any

from agent_forge.pipeline.orchestrator import phase_name
from agent_forge.profile import Profile
from forgekit.compute.disk import forecast
from forgekit.store.names import PHASES as ORDER

OPTIMIZER_SLOTS = 3


def forecast_run(profile: Profile, until: str | None = None) -> dict[str, Any]:
    """The plan as JSON-able values.

    Times are forecast from a few real training steps of the profile's model on this machine, measured now.

    Raises:
        ConfigError: unknown phase, or one the profile has no settings for.
    """
    budget = profile.model.solve()
    names = [n for n in ORDER if n in profile.phases]
    if until:
        last = phase_name(until)
        profile.phase(last)
        names = names[: names.index(last) + 1]
    stages, models = [], 0
    for name in names:
        config = profile.phase(name)
        if name == "cognate":
            trains = [("trunk", config.trunk), *((s.name, config.training_of(s)) for s in config.specialists)]
            models += len(trains)
            for stage, train in trains:
                seconds = train.steps * _step_seconds(profile, train)
                tokens = train.steps * train.rows * train.seq_len
                stages.append(
                    {
                        "phase": name,
                        "stage": stage,
                        "steps": train.steps,
                        "tokens": tokens,
                        "seconds": round(seconds, 1),
                    }
                )
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
        "seconds": round(sum(s["seconds"] for s in stages), 1),
        "disk_bytes": forecast(budget.parameters, models, 2, OPTIMIZER_SLOTS),
    }


_MEASURED: dict[tuple, float] = {}


def _step_seconds(profile: Profile, train) -> float:
    """Seconds of one training step of this shape on this machine, the best of two after a warm-up."""
    import numpy as np
    import torch

    from forgekit.data.batches import Batch
    from forgekit.models.io import build_model
    from forgekit.train.loop import Trainer

    shape = profile.model_config_solved()
    key = (shape.fingerprint(), train.rows, train.seq_len)
    if key not in _MEASURED:
        torch.set_num_threads(profile.threads or torch.get_num_threads())
        clocks = []

        class Noise:
            def batch(self, step: int) -> Batch:
                clocks.append(time.perf_counter())
                rng = np.random.default_rng(step)
                return Batch(*(rng.integers(0, shape.vocab_size, (train.rows, train.seq_len)) for _ in range(2)))

        with torch.random.fork_rng():
            Trainer(build_model(shape), Noise(), train.replace(steps=4, checkpoint_every=0)).run()
        _MEASURED[key] = min(b - a for a, b in zip(clocks[1:], clocks[2:]))
    return _MEASURED[key]
