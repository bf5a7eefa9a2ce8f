"""Steps to a tuned AdamW's final loss, and what each part of MuonGrokfast is worth.

AdamW's rate is tuned on a grid with the full schedule (the best must not lie at the grid's edge); our rates are nano's.
Losses are on the select split. Every candidate length is a complete run with its
own schedule: a loss in the middle of a longer run would not be comparable.
"""

from __future__ import annotations

import torch

from agent_forge.phases.cognate.data import trunk_mixture
from benchmarks.common import eval_loss, held_out_batches, publish, setup, tell
from forgekit.models.io import build_model
from forgekit.train.config import TrainConfig
from forgekit.train.loop import Trainer
from forgekit.train.muon_grokfast import is_hidden_matrix

STEPS = 120
ADAM_RATES = (1e-3, 2e-3, 4e-3)
LENGTHS = (48, 60, 72, 84, 96)
TARGET = 0.7


def main() -> None:
    """Measure and publish."""
    profile, shape, data = setup()
    config = profile.phase("cognate")
    mixture, held_out = trunk_mixture(data, config), held_out_batches(data, config)
    base = config.trunk.replace(steps=STEPS, checkpoint_every=0, schedule="wsd")

    def final(train: TrainConfig, peer=None) -> float:
        torch.manual_seed(config.trunk.seed)
        model = build_model(shape)
        trainer = Trainer(model, mixture, train)
        if peer is not None:
            trainer.optimizer = trainer.state.optimizer = peer(model)
        trainer.run()
        return eval_loss(model, held_out)

    rows, adam = [], {}
    for rate in ADAM_RATES:
        settings = base.optimizer.replace(use_muon=False, fallback_lr=rate, lr=rate, grokfast_lambda=0.0, qk_clip=0.0)
        adam[rate] = final(base.replace(optimizer=settings))
        rows.append([f"AdamW, rate {rate:g}", STEPS, adam[rate], ""])
        tell(str(rows[-1]))
    goal, best_rate = min((loss, rate) for rate, loss in adam.items())
    peers = {f"torch.optim.Muon + AdamW, {f:g} x our rates": f for f in (0.5, 1.0)}
    for name, factor in peers.items():
        rates = (factor * base.optimizer.lr, factor * base.optimizer.fallback_lr)
        rows.append([name, STEPS, final(base, lambda model, rates=rates: TorchMuon(model, *rates)), ""])
        tell(str(rows[-1]))
    for name, change in VARIANTS.items():
        loss = final(base.replace(optimizer=base.optimizer.replace(**change)))
        rows.append([f"MuonGrokfast, {name}", STEPS, loss, ""])
        tell(str(rows[-1]))
    reached = None
    for steps in LENGTHS:
        loss = final(base.replace(steps=steps))
        rows.append(["MuonGrokfast, nano's settings", steps, loss, f"{steps / STEPS:.2f}" if loss <= goal else ""])
        tell(str(rows[-1]))
        if loss <= goal:
            reached = steps
            break
    publish_table(rows, goal, best_rate, reached, base, shape)


def publish_table(rows: list, goal: float, best_rate: float, reached: int | None, base: TrainConfig, shape) -> None:
    """The table, and whether the target was met."""
    verdict = f"{reached / STEPS:.2f}" if reached else f"more than {LENGTHS[-1] / STEPS:.2f}"
    met = reached is not None and reached / STEPS <= TARGET
    edge = " (at the grid's edge)" if best_rate in (ADAM_RATES[0], ADAM_RATES[-1]) else ""
    notes = [
        f"Steps to the tuned AdamW's final loss ({goal:.4f} at rate {best_rate:g}{edge}): **{verdict}** of its steps; "
        f"target at most {TARGET}: {'met' if met else 'missed'}.",
        f"Loss: nats per supervised token on held-out text and problems in the trunk's mixture, select split. "
        f"{shape.family} of {shape.parameters():,} parameters, {base.rows} x {base.seq_len} tokens a step, one seed.",
    ]
    columns = ["optimizer", "steps", "held-out loss", "share of AdamW's steps"]
    publish("optimizer_quality", "MuonGrokfast against AdamW and Muon", columns, rows, notes)


VARIANTS = {
    "nano's settings": {},
    "with Grokfast (0.98, 0.3)": {"grokfast_lambda": 0.3},
    "without NorMuon": {"normuon_beta": 0.0},
    "plain weight decay": {"cautious_decay": False},
    "the source's phase-1 preset": {
        "lr": 1e-3,
        "fallback_lr": 1e-3,
        "grokfast_lambda": 0.3,
        "ns_steps": 3,
        "momentum": 0.9,
    },
}


class TorchMuon:
    """``torch.optim.Muon`` and ``AdamW`` behind the two calls the loop makes, with the loop's schedule."""

    def __init__(self, model, lr: float, fallback_lr: float) -> None:
        named = list(model.named_parameters())
        muon = [p for n, p in named if is_hidden_matrix(n, p)]
        rest = [p for n, p in named if not is_hidden_matrix(n, p)]
        self.parts = [
            torch.optim.Muon(muon, lr=lr, weight_decay=0.05),
            torch.optim.AdamW(rest, lr=fallback_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.rates = (lr, fallback_lr)
        self.state: dict = {}

    def set_lr_factor(self, factor: float) -> None:
        """Scale both rates."""
        for part, rate in zip(self.parts, self.rates):
            part.param_groups[0]["lr"] = rate * factor

    def step(self) -> None:
        """Step both."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients of both."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict:
        """Not resumed in this benchmark."""
        return {}


if __name__ == "__main__":
    main()
