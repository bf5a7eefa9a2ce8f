"""The trainings of phase 4: a student on the grid, one of the same bytes without it, and where they are kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from agent_forge.phases.bitnet.ahead import Ahead
from agent_forge.phases.bitnet.config import LossPlan
from agent_forge.pipeline.phase import PhaseContext, Progress
from forgekit.models.base import Loss, mean_nats, score_at, supervised_positions
from forgekit.quant.model import is_fake, set_strength
from forgekit.store import fsio
from forgekit.train.beside import SideBySide, Training
from forgekit.train.config import TrainConfig
from forgekit.train.distributed import agreed
from forgekit.train.loop import BatchSource, StepInfo
from forgekit.train.setup import training_device


class Student(nn.Module):
    """A model that learns from the right next tokens and, where the plan says so, its parent's whole distribution.

    Follows the protocol of the training loop. The parent is out of the loop's sight: neither trained nor saved, and
    where the loss does not ask for it not even kept. Which step it is stands in a buffer, so that a resumed training
    has the same strength of the grid.

    Args:
        model: plain, or training for the grids (:func:`forgekit.quant.model.fake_quantised`); trained in place.
        parent: frozen.
        plan: the loss.
        steps: of the whole training, for the ramp.

    Shapes: B rows, T tokens, N supervised positions, V vocabulary.
    """

    def __init__(self, model: nn.Module, parent: nn.Module, plan: LossPlan, steps: int) -> None:
        super().__init__()
        self.model, self.plan = model, plan
        self.ramp = round(plan.ramp * steps) if is_fake(model) else 0
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.__dict__["parent"] = parent.eval().requires_grad_(False) if plan.divergence else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if self.parent is not None:
            self.parent._apply(fn)
        return super()._apply(fn, recurse)

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def checkpoint_activations(self) -> bool:
        """Whether the model recomputes activations to save memory; the training loop sets it."""
        return getattr(self.model, "checkpoint_activations", False)

    @checkpoint_activations.setter
    def checkpoint_activations(self, on: bool) -> None:
        if hasattr(self.model, "checkpoint_activations"):
            self.model.checkpoint_activations = on

    @property
    def strength(self) -> float:
        """How far the weights are on the grid in the coming step, 0 to 1."""
        return min(1.0, (int(self.step) + 1) / self.ramp) if self.ramp else 1.0

    def attentions(self) -> list:
        """The model's attention layers, for QK-Clip."""
        return self.model.attentions()

    def flops_per_token(self, context: int) -> float:
        """The model's own forward FLOPs."""
        return self.model.flops_per_token(context)

    def after_step(self) -> None:
        """The model's own bookkeeping after an optimizer step, and ours."""
        if hasattr(self.model, "after_step"):
            self.model.after_step()
        self.step += 1

    def training_loss(self, input_ids_BT: Tensor, labels_BT: Tensor) -> Loss:
        """Cross-entropy and divergence, means over supervised positions (``labels`` are already shifted)."""
        plan, strength = self.plan, self.strength
        if is_fake(self.model):
            set_strength(self.model, strength)
        at_N = supervised_positions(labels_BT)
        target_N = labels_BT.reshape(-1)[at_N]
        parts = {"strength": torch.tensor(strength)}
        if getattr(self.model.config, "t_max", 0):  # a recursion learns when to halt, too: its own loss knows how
            own = self.model.training_loss(input_ids_BT, labels_BT)
            ordinary, nats = own.total, own.nats
            parts |= own.parts
            logits_NV = score_at(self.model, input_ids_BT, at_N).logits if plan.divergence else None
        else:
            logits_NV = score_at(self.model, input_ids_BT, at_N).logits
            ordinary = mean_nats(logits_NV, target_N)
            nats = ordinary.detach()
        total = plan.cross_entropy * ordinary
        if plan.divergence:
            apart = self._divergence(logits_NV, input_ids_BT, at_N)
            total, parts["divergence"] = total + plan.divergence * apart, apart.detach()
        return Loss(total, nats, at_N.numel(), parts)

    def _divergence(self, logits_NV: Tensor, ids_BT: Tensor, at_N: Tensor) -> Tensor:
        """KL(parent || model) in nats per supervised position."""
        with torch.no_grad():
            wanted_NV = score_at(self.parent, ids_BT, at_N).logits.float().log_softmax(-1)
        given_NV = logits_NV.float().log_softmax(-1)
        return F.kl_div(given_NV, wanted_NV, reduction="sum", log_target=True) / max(1, at_N.numel())


@dataclass(frozen=True)
class Piece:
    """One training.

    Attributes:
        name: for people.
        model: trained in place.
        data: where batches come from.
        train: how.
        told: what of a step is a metric, and its name in the catalogue.
    """

    name: str
    model: nn.Module
    data: BatchSource
    train: TrainConfig
    told: Mapping[str, str] = field(default_factory=dict)


class Workshop:
    """Trains the phase's models, or takes over what an earlier start finished.

    Args:
        context: folder, events, progress.
        key: fingerprint of everything that decides the results.
    """

    def __init__(self, context: PhaseContext, key: str) -> None:
        self.context, self.key = context, key[:12]
        self.places = (context.folder / "pieces", context.folder / "checkpoints")

    def train_all(
        self, pieces: Sequence[Piece], side_by_side: bool, ahead: Ahead | None = None
    ) -> dict[str, dict[str, Any]]:
        """Train models that do not depend on each other.

        Args:
            pieces: at least one.
            side_by_side: at the same time, the first one here.
            ahead: what is measured meanwhile.

        Returns:
            ``losses`` and ``tokens`` by name.
        """
        with SideBySide([piece.train.device for piece in pieces], side_by_side) as crew:
            made = {piece.name: agreed(lambda p=piece: _record(self._path(p.name))) for piece in pieces}
            ready = {piece.name: crew.ready(self._training(piece)) for piece in pieces}
            if ahead is not None:
                ahead.begin()
            for piece in pieces[1:]:
                if made[piece.name] is None:
                    crew.start(piece.name, ready[piece.name], self.context.logger, self._observer(piece))
            for piece in pieces:
                if made[piece.name] is None:
                    made[piece.name] = self._train(piece, ready[piece.name], crew)
                else:
                    self._take_over(piece)
            if ahead is not None:
                ahead.wait()
        return made

    def _training(self, piece: Piece) -> Training:
        torch.manual_seed(piece.train.seed)
        return Training(piece.model, piece.data, piece.train, self.places[1] / self._label(piece.name))

    def _train(self, piece: Piece, training: Training, crew: SideBySide) -> dict[str, Any]:
        if code := crew.wait(piece.name):
            self.context.logger.event("train_beside_ended", name=piece.name, exit_code=code)
        report = training.trainer(self.context.logger, self._observer(piece, crew)).run()
        record = {"losses": report.losses, "tokens": report.tokens, "seconds": report.seconds}
        self.context.logger.event("trained", name=piece.name, **record)
        # Clones: an embedding that is the head's too is there twice, and safetensors refuses shared memory.
        whole = {name: tensor.detach().cpu().clone() for name, tensor in piece.model.state_dict().items()}
        data = save(whole, {"record": json.dumps(record)})
        agreed(lambda: fsio.write_atomic(self._path(piece.name), data))
        agreed(lambda: training.folder.is_dir() and fsio.remove_tree(training.folder))
        return record

    def _take_over(self, piece: Piece) -> None:
        with safe_open(str(self._path(piece.name)), "pt") as file:
            piece.model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
        piece.model.to(training_device(piece.train.device)).eval()
        self.context.show(Progress(piece.name, piece.train.steps, piece.train.steps, "already made"))

    def _observer(self, piece: Piece, crew: SideBySide | None = None) -> Callable[[StepInfo], None]:
        def observe(info: StepInfo) -> None:
            note = f"loss {info.loss_avg_100:.3f}  {info.tokens_per_second:,.0f} tokens/s"
            self.context.show(Progress(piece.name, info.step, info.steps, f"{note}  {info.seconds_left:.0f} s left"))
            if crew is not None:
                crew.listen()
            if info.step % piece.train.log_every == 0 or info.step == info.steps:
                values = {"loss": info.loss, "grad_norm": info.grad_norm, "rate": info.learning_rate, **info.parts}
                self.context.logger.event("bitnet_step", name=piece.name, step=info.step, **values)
                if told := {name: values[part] for part, name in piece.told.items() if part in values}:
                    self.context.logger.metrics(told, step=info.step)

        return observe

    def _label(self, name: str) -> str:
        return f"{name.replace(' ', '-')}-{self.key}"

    def _path(self, name: str) -> Path:
        return self.places[0] / f"{self._label(name)}.safetensors"

    def clear(self) -> None:
        """Delete pieces and checkpoints: their results are in the artifacts and the evidence."""
        for folder in self.places:
            if folder.is_dir():
                fsio.remove_tree(folder)


def _record(path: Path) -> dict[str, Any] | None:
    """What a finished piece says of its training; a damaged one is deleted and made again."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), "pt") as file:
            return json.loads(file.metadata()["record"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        path.unlink()
        return None
