"""Smallest models, data and runs that still have every part, shared by the tests of models and training."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from forgekit.data.batches import Batch
from forgekit.models.config import GPTConfig, TRMTitansConfig
from forgekit.models.constants import IGNORE
from forgekit.models.io import build_model
from forgekit.train.config import TrainConfig
from forgekit.train.loop import Trainer
from forgekit.train.optim_config import MuGrokConfig

VOCAB = 24
torch.set_num_threads(1)  # tiny tensors: threads cost more than they give, and bits depend on their number


def in_threads(count: int, work: Callable[[int], Any]) -> None:
    """Call ``work`` with 0, 1, and so on, in as many threads; what goes wrong in one is raised here."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))


def trm_config(**changes: Any) -> TRMTitansConfig:
    """A ``trm_titans`` of about five thousand parameters."""
    values = {
        "vocab_size": VOCAB,
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 2,
        "ffn_hidden": 32,
        "window": 4,
        "max_seq_len": 64,
    }
    values |= {"d_mem": 8, "memory_heads": 2, "memory_chunk": 4, "gate_hidden": 8, "trm_hidden": 16, "t_max": 2}
    return TRMTitansConfig(**{**values, **changes})


def gpt_config(**changes: Any) -> GPTConfig:
    """A plain transformer of the same size."""
    values = {"vocab_size": VOCAB, "d_model": 16, "n_layers": 2, "n_heads": 2, "ffn_hidden": 32, "max_seq_len": 64}
    return GPTConfig(**{**values, **changes})


def made(config: GPTConfig, seed: int = 0, stir: float = 0.0) -> torch.nn.Module:
    """A model with seeded weights; ``stir`` adds noise, so that what starts silent (zero) speaks too."""
    torch.manual_seed(seed)
    model = build_model(config)
    if stir:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * stir)
            if getattr(model, "recursion", None) is not None:
                model.recursion.teacher_weight.copy_(model.recursion.halt.weight)
                model.recursion.teacher_bias.copy_(model.recursion.halt.bias)
    return model


@dataclass(frozen=True)
class Echo:
    """Batches to learn from: every token is the one before it plus one; unsupervised where ``hidden`` says so."""

    rows: int = 4
    length: int = 8
    seed: int = 0
    hidden: float = 0.0

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, step])
        line = (rng.integers(0, VOCAB, size=(self.rows, 1)) + np.arange(self.length + 1)) % VOCAB
        labels = np.where(rng.random((self.rows, self.length)) < self.hidden, IGNORE, line[:, 1:])
        return Batch(line[:, :-1], labels)


@dataclass
class Events:
    """Remembers what a run reported."""

    seen: list[tuple[str, dict]] = field(default_factory=list)

    def event(self, kind: str, **data: Any) -> None:
        self.seen.append((kind, data))

    def of(self, kind: str) -> list[dict]:
        return [data for name, data in self.seen if name == kind]


def train_config(**changes: Any) -> TrainConfig:
    """Twelve steps in full precision with one sequence length, all data in one micro batch."""
    optimizer = {"lr": 0.01, "fallback_lr": 0.01, **changes.pop("optimizer", {})}
    values = {
        "steps": 12,
        "rows": 4,
        "seq_len": 8,
        "precision": "fp32",
        "device": "cpu",
        "micro_batch": 4,
        "checkpoint_every": 3,
    }
    return TrainConfig(**{**values, **changes}, optimizer=MuGrokConfig(**optimizer))


def trainer(config: TrainConfig, data: Any = None, model: torch.nn.Module | None = None, **rest: Any) -> Trainer:
    """A trainer of a freshly seeded tiny model."""
    return Trainer(model or made(trm_config()), data or Echo(), config, **rest)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything in the model's state."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two copies are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def gradients(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradient of a loss for every parameter that it reaches."""
    model.zero_grad(set_to_none=True)
    loss().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
