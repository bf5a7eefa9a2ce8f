"""Settings of Quiet-STaR (step 2 of phase 3). No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from forgekit.config import Config
from forgekit.data.tokenizer import RESERVED, THINKING
from forgekit.errors import ArtifactError

Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]
START, STOP = THINKING[:2]


class Marks(Config):
    """The token ids that a thought is made with."""

    start: Annotated[int, Field(ge=0)]
    """Opens a thought."""
    stop: Annotated[int, Field(ge=0)]
    """Closes it."""
    forbidden: tuple[int, ...] = ()
    """Never inside a thought: chat, tool, padding and end tokens. ``start`` never is, named or not."""

    @model_validator(mode="after")
    def _apart(self):
        if self.start == self.stop:
            raise ValueError(f"start and stop are both {self.start}; a thought needs two markers")
        if self.stop in self.forbidden:
            raise ValueError(f"stop {self.stop} is forbidden; no thought could end by itself")
        return self


def marks_of(tokenizer: Any) -> Marks:
    """The markers of a tokenizer, and what must not be thought.

    Args:
        tokenizer: the house's, or a Hugging Face one in the house's wrapping (``token_to_id``).

    Raises:
        ArtifactError: it has no thinking tokens.
    """
    start, stop = tokenizer.token_to_id(START), tokenizer.token_to_id(STOP)
    if start is None or stop is None:
        raise ArtifactError(
            f"has no {START} and {STOP}",
            where="tokenizer",
            remedy="use a model of this house, or add the thinking tokens",
        )
    names = [name for name in RESERVED if name not in THINKING]
    if hasattr(tokenizer, "fast"):
        names += [name for name in (tokenizer.fast.eos_token, tokenizer.fast.pad_token) if name]
    ids = {tokenizer.token_to_id(name) for name in names} - {None, start, stop}
    return Marks(start=start, stop=stop, forbidden=tuple(sorted(ids)))


class PointPlan(Config):
    """Where to think: the hardest positions of a row, not too close to each other."""

    most: Positive = 3
    """Thinking points per row, at most."""
    interval: Positive = 8
    """Tokens between two points, at least."""
    entropy: Weight = 1.0
    """Weight of the next token's entropy."""
    dispersion: Weight = 0.5
    """Weight of how widely attention is spread; left out where a model does not show its attention."""
    loss: Weight = 1.0
    """Weight of the loss; only in training, where the next token is known."""
    min_length: Positive = 8
    """Budget in tokens of a thought at the easiest position."""
    max_length: Positive = 64
    """Budget at the hardest position. A thought may stop by itself before."""

    @model_validator(mode="after")
    def _sensible(self):
        if self.min_length > self.max_length:
            raise ValueError(f"min_length {self.min_length} is above max_length {self.max_length}")
        if not self.entropy + self.dispersion + self.loss:
            raise ValueError("entropy, dispersion and loss all weigh nothing; give one of them a weight")
        if not self.entropy + self.dispersion:
            raise ValueError("entropy and dispersion weigh nothing; the loss alone is not known when generating")
        return self


class MixerConfig(Config):
    """How a prediction after a thought is mixed with the one without."""

    kind: str = "mlp"
    """``mlp`` (as published: one weight per token) or ``attention`` (V2 specification: fuse hidden states)."""
    hidden: Annotated[int, Field(ge=0)] = 0
    """Width of the mlp's two hidden layers; 0 takes the model's width."""
    heads: Positive = 4
    """Heads of the attention mixer; must divide the model's width."""
    initial_weight: OpenShare = 0.05
    """How much a thought is listened to before anything is learned."""
    space: Literal["log", "linear"] = "log"
    """mlp: average log-probabilities (as published, normalised again) or probabilities."""


class TalkConfig(Config):
    """Quiet-STaR (arXiv 2403.09629): think at several positions, predict with the thought, keep what helped."""

    thoughts: Annotated[int, Field(ge=2, le=64)] = 4
    """Thoughts sampled per point; their mean is the baseline of the reward."""
    ahead: Positive = 4
    """True tokens predicted after a thought."""
    points: PointPlan = PointPlan()
    """Where to think, and for how long."""
    mixer: MixerConfig = MixerConfig()
    """How thoughts are heard."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Temperature at which thoughts are sampled in training; they are greedy in evaluation."""
    policy_temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3.0
    """Temperature of the log-probabilities that REINFORCE raises."""
    base_weight: Weight = 1.0
    """Weight of the model's ordinary training loss."""
    talk_weight: Weight = 1.0
    """Weight of the mixture's cross-entropy on the true tokens after a thought."""
    policy_weight: Weight = 1.0
    """Weight of the REINFORCE loss."""
    branching: Literal["auto", "state", "diagonal"] = "auto"
    """How thoughts go on from their positions: from the model's state (any model), or by the published diagonal mask
    (attention only); auto takes the mask where it can."""

    def tokens_per_row(self, length: int) -> int:
        """Tokens that a row keeps in memory for the backward pass, at most: a row trained plainly keeps ``length``.

        What chooses micro batches by ``train.seq_len`` does not know of thoughts; plan with this many instead.
        """
        branch = self.points.max_length + 2 + self.ahead - 1
        return 2 * length + self.points.most * self.thoughts * branch
