"""Our loop against a minimal plain-PyTorch loop on the same ``gpt``, and the optimizer step against torch's."""

from __future__ import annotations

import time

import torch

from agent_forge.phases.cognate.ablation import plain_shape
from benchmarks.common import alternate, batches, publish, ratio, setup
from forgekit.models.io import build_model
from forgekit.train.loop import Trainer
from forgekit.train.muon_grokfast import MuonGrokfast, is_hidden_matrix

ROUNDS, EACH = 9, 6
TARGET_LOOP, TARGET_STEP = 0.9, 1.1


class Prepared:
    """Batches drawn before the clock starts."""

    def __init__(self, ready: list) -> None:
        self.ready = ready

    def batch(self, step: int):
        return self.ready[step % len(self.ready)]


def torch_optimizers(model, lr: float) -> list[torch.optim.Optimizer]:
    """``torch.optim.Muon`` on hidden matrices, AdamW on the rest: the peer."""
    named = list(model.named_parameters())
    muon = [p for n, p in named if is_hidden_matrix(n, p)]
    rest = [p for n, p in named if not is_hidden_matrix(n, p)]
    return [torch.optim.Muon(muon, lr=lr), torch.optim.AdamW(rest, lr=lr / 5)]


def main() -> None:
    """Measure and publish."""
    profile, shape, data = setup()
    config = profile.phase("cognate")
    ready = batches(data, config, 12)
    train = config.trunk.replace(steps=10_000, checkpoint_every=0)
    torch.manual_seed(0)
    ours, plain = build_model(plain_shape(shape)), build_model(plain_shape(shape))
    trainer = Trainer(ours, Prepared(ready), train)
    ours.train(), plain.train()
    trainer._snapshot()
    optimizers = torch_optimizers(plain, train.optimizer.lr)
    began = time.perf_counter()

    def our_step(i: int) -> None:
        trainer._step(trainer.data.batch(i), began, 0)

    def plain_step(i: int) -> None:
        batch = ready[i % len(ready)]
        with torch.autocast("cpu", dtype=trainer.dtype or torch.float32, enabled=trainer.dtype is not None):
            loss = plain.training_loss(torch.from_numpy(batch.inputs), torch.from_numpy(batch.labels)).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    alternate({"ours": our_step, "plain": plain_step}, 1, 4)
    loop = alternate({"ours": our_step, "plain": plain_step}, ROUNDS, EACH)
    step = optimizer_steps(shape, train)
    publish_ratios(loop, step, train, ours.config.parameters())


def publish_ratios(loop: dict, step: dict, train, parameters: int) -> None:
    """The table."""
    rows = []
    middle, low, high = ratio(loop, "plain", "ours")
    speed = train.rows * train.seq_len / sorted(loop["ours"])[ROUNDS // 2]
    verdict = "met" if middle >= TARGET_LOOP else "missed"
    what = "training throughput, ours / plain loop"
    rows.append([what, middle, f"{low:.2f} to {high:.2f}", f">= {TARGET_LOOP}", verdict, f"{speed:,.0f} tokens/s"])
    for name in (n for n in step if n != "torch"):
        middle, low, high = ratio(step, name, "torch")
        verdict = "met" if middle <= TARGET_STEP else "missed"
        what, span = f"optimizer step, {name} / torch Muon + AdamW", f"{low:.2f} to {high:.2f}"
        milliseconds = f"{1e3 * sorted(step[name])[ROUNDS // 2]:.1f} ms"
        rows.append([what, middle, span, f"<= {TARGET_STEP}", verdict, milliseconds])
    notes = [
        f"`gpt` of {parameters:,} parameters, {train.rows} x {train.seq_len} tokens a step, {ROUNDS} rounds of {EACH} "
        "steps taking turns; ratios are medians over rounds. The plain loop uses torch.optim.Muon and AdamW. Both get "
        "batches drawn before the clock starts, and neither writes checkpoints; drawing is measured in cognate_targets."
    ]
    publish("training_throughput", "Training throughput", ["what", "ratio", "range", "target", "", "ours"], rows, notes)


def optimizer_steps(shape, train) -> dict[str, list[float]]:
    """Seconds per optimizer step of ours and torch's on the full ``trm_titans``, gradients already there."""
    sides = {}
    variants = {
        "MuonGrokfast, all parts": train.optimizer.replace(grokfast_lambda=0.3),
        "MuonGrokfast, nano's settings": train.optimizer,
        "MuonGrokfast, plain Muon settings": train.optimizer.replace(
            grokfast_lambda=0.0, normuon_beta=0.0, cautious_decay=False, qk_clip=0.0
        ),
    }
    for name, optim in {**variants, "torch": None}.items():
        torch.manual_seed(0)
        model = build_model(shape)
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 1e-3
        used = (
            [MuonGrokfast(model.named_parameters(), optim, model)]
            if optim
            else torch_optimizers(model, train.optimizer.lr)
        )
        sides[name] = lambda i, used=used, model=model: [o.step() for o in used]
    alternate(sides, 1, 5)
    return alternate(sides, ROUNDS, 10)


if __name__ == "__main__":
    main()
