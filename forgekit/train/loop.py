"""The training loop: the only one in the house.

A step is: draw batch ``step`` -> gradients over micro batches (weighted by supervised tokens, so that they equal
the whole batch) -> sum over processes -> clip -> MuonGrokfast -> averages. Trouble is met where it happens: out of
memory climbs down the ladder of :mod:`forgekit.compute.ladder`, divergence goes back to the last good checkpoint
at a lower rate, an interruption leaves a checkpoint behind.
"""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from forgekit.compute.budget import BatchPlan
from forgekit.compute.ladder import is_out_of_memory, next_plan
from forgekit.data.batches import Batch
from forgekit.errors import ArtifactError, DataError, ResourceError, TrainingError
from forgekit.train.checkpoints import CheckpointManager, TrainState, random_states, set_random_states
from forgekit.train.config import TrainConfig, lr_factor
from forgekit.train.distributed import (
    largest_over_processes,
    least_over_processes,
    shard,
    sum_gradients,
    sums_over_processes,
    world,
)
from forgekit.train.muon_grokfast import MuonGrokfast
from forgekit.train.setup import autocast_dtype, check_rows, choose_plan, training_device


class BatchSource(Protocol):
    """Batches as a pure function of their number."""

    def batch(self, step: int) -> Batch: ...


class Events(Protocol):
    """Where the loop reports what happened."""

    def event(self, kind: str, **data: Any) -> None: ...


@dataclass
class StepInfo:
    """One finished step, for progress bars and metrics."""

    step: int
    steps: int
    loss: float
    loss_avg_100: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    seconds_left: float
    parts: dict[str, float]


@dataclass
class TrainReport:
    """What a run did.

    Attributes:
        losses: cross-entropy in nats per supervised token, one per step.
        tokens: input tokens seen, over all processes and sessions.
        seconds, data_seconds: wall time of the steps of this process, and the part spent drawing batches.
        recoveries: descents after a divergence; plan: how batches were computed in the end.
    """

    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    recoveries: int = 0
    resumed_from: int = 0
    plan: BatchPlan | None = None


class Trainer:
    """Trains one model.

    Args:
        model: satisfies :class:`forgekit.models.base.CausalLM`; trained in place.
        data: where batches come from.
        config: how to train.
        folder: where checkpoints go; ``None`` keeps none on disk.
        events: receives ``train_*`` events.
        observer: called with a :class:`StepInfo` after every step.
    """

    def __init__(
        self,
        model: nn.Module,
        data: BatchSource,
        config: TrainConfig,
        folder: Path | None = None,
        events: Events | None = None,
        observer: Callable[[StepInfo], None] | None = None,
    ) -> None:
        self.config, self.data, self.events, self.observer = config, data, events, observer
        self.device = training_device(config.device)
        self.model = model.to(self.device)
        self._sharded = config.parallel == "fsdp" and world()[1] > 1
        if self._sharded:
            shard(self.model)
        self.dtype = autocast_dtype(config.precision, self.device)
        self.plan = choose_plan(self.model, config, self.device, share=world()[1])
        if self._sharded:  # its processes gather weights together, so all must cut their rows alike
            self.plan = self.plan.replace(micro_batch=least_over_processes(self.plan.micro_batch))
        self.optimizer = MuonGrokfast(self.model.named_parameters(), config.optimizer, self.model)
        average = {n: self.optimizer.trained(p).detach().clone() for n, p in self.model.named_parameters()}
        position = {"step": 0, "tokens": 0, "scale": 1.0, "losses": [], "recoveries": 0, "plan": None}
        self.state = TrainState(self.model, self.optimizer, average if config.ema else None, position)
        sharded = config.checkpoints == "sharded"
        self.checkpoints = CheckpointManager(folder, config.keep_checkpoints, sharded) if folder else None
        self._good: tuple[dict, dict, dict | None, dict] | None = None
        self._whole = True  # False while an update is half done and must not be saved
        self._random: dict[str, Any] = {}
        self._kept = 0  # step of the last checkpoint written or read
        self._recent: deque[float] = deque(maxlen=100)
        self._last_error = ""

    def run(self, resume: bool = True, keep_last: bool = False) -> TrainReport:
        """Train to the last step and return the report; with ``ema`` the model holds the averaged weights.

        Args:
            resume: go on from the newest checkpoint in the folder, if there is one; else those in it are deleted.
            keep_last: leave a checkpoint of the last step, from which another process takes the result.

        Raises:
            TrainingError: diverged more often than ``recoveries`` allows.
            ResourceError: out of memory at the end of the ladder, or disk full.
            KeyboardInterrupt: passed on after a checkpoint was written (by a single process; several would wait
                for each other, so their last scheduled one stands).
        """
        report = TrainReport(resumed_from=self._resume(resume))
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        self._snapshot()
        started, begun = time.perf_counter(), self.state.position["step"]
        try:
            while self.state.position["step"] < self.config.steps:
                self._random, clock = random_states(), time.perf_counter()
                batch = self.data.batch(self.state.position["step"])
                report.data_seconds += time.perf_counter() - clock
                self._step(batch, started, begun)
            self._keep(last=keep_last)
        except KeyboardInterrupt:
            if self._whole and world()[1] == 1:
                self._save("interrupted")
            raise
        if self.state.average is not None:
            self.optimizer.assign({p: self.state.average[name] for name, p in self.model.named_parameters()})
        self.model.eval()
        position = self.state.position
        report.losses, report.tokens = list(position["losses"]), position["tokens"]
        report.seconds, report.recoveries, report.plan = (
            time.perf_counter() - started,
            position["recoveries"],
            self.plan,
        )
        return report

    def _resume(self, wanted: bool) -> int:
        if self.checkpoints is None:
            return 0
        if not wanted:
            if world()[0] == 0:
                self.checkpoints.clear()
            return 0
        path, problems = self.checkpoints.load_latest(self.state)
        for problem in problems:
            self._event("train_checkpoint_unreadable", problem=problem)
        if path is not None:
            self._recent.extend(self.state.position["losses"][-100:])
            self._kept = self.state.position["step"]
            self._event("train_resumed", step=self.state.position["step"], checkpoint=path.name)
            self._resume_plan()
        return self.state.position["step"]

    def _resume_plan(self) -> None:
        """Cut batches as before the interruption: another cut sums in another order and gives other bits."""
        kept, here = self.state.position.get("plan"), self.plan.device
        if kept and kept["world"] == world()[1] and kept["plan"]["device"] == here:
            self.plan = BatchPlan(**kept["plan"])
        elif kept:
            self._event("train_plan_changed", was=kept, now=self.plan.model_dump(), world=world()[1])

    def _step(self, batch: Batch, started: float, begun: int) -> None:
        """One optimizer step, or one descent after a divergence."""
        config, position = self.config, self.state.position
        loss, parts = self._gradients(batch)
        if not self._sharded:
            sum_gradients([p for p in self.model.parameters() if p.requires_grad])
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, config.clip or math.inf)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not (math.isfinite(loss) and math.isfinite(norm)) or self._exploded(loss):
            self._recover(loss)
            return
        self._keep()  # only now: a state whose next loss is bad is nothing to go back to
        factor = lr_factor(config, position["step"]) * position["scale"]
        self._whole = False
        self._update(factor)
        position["step"] += 1
        position["tokens"] += batch.inputs.size
        position["losses"].append(loss)
        self._random, self._whole = random_states(), True
        self._recent.append(loss)
        self._observe(norm, factor * config.optimizer.lr, parts, (started, begun, batch.inputs.size))

    def _update(self, factor: float) -> None:
        """Move the weights, and all that follows them."""
        self.optimizer.set_lr_factor(factor)
        largest_over_processes(self._logit_records())
        try:
            self.optimizer.step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ResourceError(
                "memory is too small for the optimizer's state", where="train", remedy="choose a smaller profile"
            ) from error
        self.optimizer.zero_grad(set_to_none=True)
        if hasattr(self.model, "after_step"):
            self.model.after_step()
        self._average()

    def _logit_records(self) -> list[torch.Tensor]:
        return [a.longest_2H for a in self.model.attentions()] if hasattr(self.model, "attentions") else []

    def _gradients(self, batch: Batch) -> tuple[float, dict[str, float]]:
        """Gradients of the whole batch under the current plan, climbing down the ladder when memory runs out."""
        while True:
            try:
                return self._accumulate(batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._last_error = str(error).splitlines()[0][:120]
            # Outside the handler: the traceback would keep the failed step's tensors alive.
            self.optimizer.zero_grad(set_to_none=True)
            self._climb_down()

    def _climb_down(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        plan = next_plan(self.plan)
        if self._sharded or (plan and plan.device != self.plan.device and world()[1] > 1):
            plan = None  # processes that work in step cannot change course alone
        self._event(
            "train_out_of_memory", was=self.plan.model_dump(), now=plan and plan.model_dump(), error=self._last_error
        )
        if plan is None:
            raise ResourceError(
                f"memory is too small for {self.plan.micro_batch} x {self.config.seq_len} tokens",
                where="train.seq_len",
                remedy="lower train.seq_len or train.micro_batch, or choose a smaller profile",
            )
        if plan.device != self.plan.device:
            self.device = torch.device(plan.device)
            self.model.to(self.device)
            self.dtype = autocast_dtype(self.config.precision, self.device)
            for state in self.optimizer.state.values():
                state.update({k: v.to(self.device) for k, v in state.items() if k != "step"})
        self.plan = plan

    def _accumulate(self, batch: Batch) -> tuple[float, dict[str, float]]:
        rank, size = world()
        self._check(batch, size)
        inputs, labels = torch.from_numpy(batch.inputs[rank::size]), torch.from_numpy(batch.labels[rank::size])
        total = batch.supervised
        if hasattr(self.model, "checkpoint_activations"):
            self.model.checkpoint_activations = self.plan.checkpoint_activations
        # FSDP averages gradients over processes where a sum is meant.
        boost = size if self._sharded else 1
        nats, parts = 0.0, {}
        sizes = self.plan.sizes(len(inputs))
        for x, y in zip(inputs.split(sizes), labels.split(sizes)):
            with torch.autocast(self.device.type, dtype=self.dtype) if self.dtype else nullcontext():
                loss = self.model.training_loss(x.to(self.device), y.to(self.device))
            weight = loss.tokens / total
            if loss.tokens or self._sharded:  # shards are gathered and summed by all, whoever has something to learn
                (loss.total * (weight * boost)).backward()
            nats += float(loss.nats) * weight if loss.tokens else 0.0
            for name, value in loss.parts.items():
                parts[name] = parts.get(name, 0.0) + (float(value) * weight if loss.tokens else 0.0)
        nats, *values = sums_over_processes([nats, *parts.values()])
        return nats, dict(zip(parts, values))

    def _check(self, batch: Batch, size: int) -> None:
        if not batch.supervised:
            raise DataError("a batch has no supervised token", where="data", remedy="check the labels of the source")
        check_rows(len(batch.inputs), self._sharded, size)

    def _average(self) -> None:
        """Move the averages. The decay warms up, else short runs would end near their random start."""
        if self.state.average is None:
            return
        step = self.state.position["step"]
        keep = min(self.config.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                average = self.state.average[name]
                average.lerp_(self.optimizer.trained(p).detach().to(average.device), 1 - keep)

    def _exploded(self, loss: float) -> bool:
        """A finite loss counts as divergence when it is far above both the recent level and the first loss.

        So far above the first that no recent level excuses it, it counts at once.
        """
        first = max(self.state.position["losses"][:1], default=loss)
        if loss > 3 * max(first, 3.0):
            return True
        level = sum(self._recent) / max(1, len(self._recent))
        return len(self._recent) >= 20 and loss > 3 * level and loss > 1.5 * max(first, 1.0)

    def _recover(self, loss: float) -> None:
        """Go back to the last good state at a lower rate."""
        position = self.state.position
        step, recoveries, scale = position["step"], position["recoveries"] + 1, position["scale"] * self.config.backoff
        if recoveries > self.config.recoveries:
            raise TrainingError(
                f"diverged at step {step} (loss {loss:.3g}) after {recoveries - 1} recoveries",
                where="train.optimizer.lr",
                remedy=f"lower it below {self.config.optimizer.lr * position['scale']:.2g}",
            )
        self.optimizer.zero_grad(set_to_none=True)
        self._whole = False
        self._restore_good()
        for record in self._logit_records():
            record.zero_()  # what the diverged weights reached says nothing about the good ones
        position = self.state.position
        position["recoveries"], position["scale"] = recoveries, scale
        self._recent.clear()
        self._recent.extend(position["losses"][-100:])
        self._random, self._whole, self._kept = random_states(), True, position["step"]
        self._event("train_diverged", step=step, loss=loss, back_to=position["step"], rate_scale=scale)

    def _restore_good(self) -> None:
        """The newest checkpoint on disk, else the snapshot in memory (the start, before the first checkpoint).

        One that an interruption left is passed over: its next loss was not known yet, and a run that was not
        interrupted would not have it.
        """
        if self.checkpoints is not None and self.checkpoints.load_latest(self.state, proven=True)[0] is not None:
            return
        if self._good is None:
            raise ArtifactError("its checkpoints are gone", where=str(self.checkpoints.folder), remedy="train anew")
        model, optimizer, average, position = copy.deepcopy(self._good)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.state.average, self.state.position = average, position

    def _keep(self, last: bool = False) -> None:
        """Keep the current state if one is due: on disk when there is a folder, else in memory for recoveries."""
        step, every = self.state.position["step"], self.config.checkpoint_every
        if step == self._kept or not (last or (every and step % every == 0)):
            return
        if self.checkpoints is None:
            self._snapshot()
        else:
            self._save("scheduled")
        self._kept = step

    def _save(self, reason: str) -> None:
        """Write a checkpoint with the random states of before the running step, which a resumed run repeats."""
        if self.checkpoints is None:
            return
        now = random_states()
        set_random_states(self._random)
        self.state.position["plan"] = {"plan": self.plan.model_dump(), "world": world()[1]}
        self.checkpoints.save_checkpoint(self.state, {"reason": reason})
        set_random_states(now)
        self._good = None  # the disk has it now: give its memory back
        self._event("train_checkpoint", step=self.state.position["step"], reason=reason)

    def _snapshot(self) -> None:
        state = self.state
        now = (self.model.state_dict(), self.optimizer.state_dict(), state.average, state.position)
        self._good = copy.deepcopy(now)

    def _observe(self, norm: float, rate: float, parts: dict[str, float], clock: tuple[float, int, int]) -> None:
        started, begun, tokens = clock
        position = self.state.position
        if self.observer is None:
            return
        elapsed, done = time.perf_counter() - started, position["step"] - begun
        info = StepInfo(
            step=position["step"],
            steps=self.config.steps,
            loss=position["losses"][-1],
            loss_avg_100=sum(self._recent) / len(self._recent),
            learning_rate=rate,
            grad_norm=norm,
            tokens_per_second=max(done, 1) * tokens / elapsed,
            seconds_left=elapsed / max(done, 1) * (self.config.steps - position["step"]),
            parts=parts,
        )
        self.observer(info)

    def _event(self, kind: str, **data: Any) -> None:
        if self.events is not None:
            self.events.event(kind, **data)
