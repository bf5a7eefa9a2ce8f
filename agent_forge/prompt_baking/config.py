"""Settings of prompt baking. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, Field, model_validator

from forgekit.config import Config
from forgekit.train.config import TrainConfig
from forgekit.train.optim_config import MuGrokConfig

Positive = Annotated[int, Field(gt=0)]
Mode = Literal["full", "half", "sequential", "pursuit"]


class PromptBakingConfig(Config):
    """How a prompt is baked into weights."""

    mode: Mode = "full"
    """``full``; ``half``: stop half way; ``sequential``: several prompts, one after another; ``pursuit``: rounds in
    which the student so far, prompted, is the teacher."""
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the divergence to the prompted model that is to go, measured on held-out trajectories, in (0, 1]. 1
    trains to the end. Unset: 0.5 for ``half``, else 1."""
    rounds: Positive = 3
    """Rounds of ``pursuit``, each with trajectories of its own."""
    num_epochs: Annotated[int, Field(ge=0)] = 4
    """Passes over the trajectories; 0 changes nothing."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Step size at its peak. Small models want a large one; 1e-4 to 3e-4 is usual at billions of parameters."""
    rank: Annotated[Positive, Field(validation_alias=AliasChoices("rank", "lora_r"))] = 16
    """Rank of the LoRA adapters."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """LoRA's alpha: what adapters add is scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Ends of the names of linear maps that get an adapter, as ``attn.wq``; none: all but embedding and head."""
    trajectories: Positive = 256
    """Answers of the prompted model to train on."""
    held_out: Positive = 48
    """Answers to decide on (when to stop, how far to scale), and as many others to report on."""
    max_tokens: Positive = 64
    """Longest answer in tokens."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Of sampling the answers; distributions are always compared at 1. At 1 their mean estimates the divergence
    itself, above it they reach further from what the prompted model would say."""
    rows: Positive = 16
    """Answers per optimizer step."""
    micro_batch: Annotated[int, Field(ge=0)] = 0
    """Answers in memory at once; 0 chooses from the free memory."""
    chunk: Annotated[int, Field(ge=0)] = 0
    """Positions whose distributions are in memory at once; 0 takes 64 MB of them."""
    check_every: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between looks at the held-out answers; 0 takes a tenth of the training."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides contexts, answers, adapters and the order of training."""
    precision: Literal["auto", "bf16", "fp32"] = "fp32"
    """Autocast type of the training steps; teacher and measurements are always in the model's own."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train."""
    optimizer: MuGrokConfig = MuGrokConfig(use_muon=False, grokfast_lambda=0.0, weight_decay=0.0, qk_clip=0.0)
    """The optimizer; ``learning_rate`` takes the place of its rates."""

    @model_validator(mode="after")
    def _consistent(self) -> PromptBakingConfig:
        if self.mode == "half" and self.strength == 1:
            raise ValueError("strength 1 is not half; use mode full, or a strength below 1")
        return self

    @property
    def share(self) -> float:
        """The strength, also where none was given."""
        return self.strength if self.strength is not None else 0.5 if self.mode == "half" else 1.0

    def steps(self, count: int) -> int:
        """Optimizer steps for ``count`` trajectories."""
        return self.num_epochs * -(-count // self.rows)

    def every(self, steps: int) -> int:
        """Steps between two looks at the held-out trajectories."""
        return self.check_every or max(1, steps // 10)

    def training(self, count: int, length: int) -> TrainConfig:
        """The training loop's settings for ``count`` trajectories of at most ``length`` tokens, context included."""
        optimizer = self.optimizer.replace(lr=self.learning_rate, fallback_lr=self.learning_rate, qk_clip=0.0)
        return TrainConfig(
            steps=self.steps(count),
            rows=min(self.rows, count),
            seq_len=length,
            seed=self.seed,
            optimizer=optimizer,
            precision=self.precision,
            device=self.device,
            micro_batch=self.micro_batch,
        )
