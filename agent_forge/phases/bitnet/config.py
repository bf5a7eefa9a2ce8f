"""Settings of phase 4. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from forgekit.config import Config
from forgekit.data.plans import Mix, Positive, Share, TextPlan
from forgekit.data.thoughts.strategies import STRATEGIES
from forgekit.quant.config import GroupPlan, MapPlan, TernaryPlan
from forgekit.registry import unknown
from forgekit.train.config import TrainConfig
from forgekit.train.optim_config import MuGrokConfig

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Method = Literal["bitnet", "int8", "int4"]
BITS: dict[str, int] = {"int8": 8, "int4": 4}
"""Bits of a weight of the methods that round group-wise."""
LEAST_RATIO: dict[str, float] = {"bitnet": 8.0, "int8": 3.5, "int4": 5.0}
"""What is asked for unless said otherwise. With a scale of 16 bits for 32 weights, int8 and int4 take 8.5 and 4.5 bits
a weight: 3.8 and 7.1 times less than 32. Of the latter an embedding of two fifths of the parameters, in 8.5 bits,
leaves 5.2."""


class CalibrationPlan(Config):
    """What is looked at before anything is rounded: rows of the training data, as the parent sees them."""

    samples: Positive = 128
    """Rows that the parent reads while the inputs of its maps are measured."""
    thresholds: tuple[Annotated[float, Field(gt=0, lt=2)], ...] = ()
    """Candidates for ``ternary.threshold``: the one that changes the maps' outputs least is taken. Unset keeps it."""


class OwnText(Config):
    """Text of the user: every part of it either calibrates and trains, or decides, or reports."""

    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    """Files (txt, jsonl, csv, parquet and others that data sets have), and folders of such."""
    bytes: Positive = 5_000_000
    """Bytes taken at most, from all places of the text alike."""


class PracticePlan(Config):
    """What the weights are trained on."""

    text: Share = 0.2
    """Share of the rows that are real text. Where nobody knows what the parent can do, all are."""
    text_labels: Share = 1.0
    """Share of that text's tokens that are supervised."""
    skills: Share = 0.3
    """Share of the rows with questions that the parent answers at once; the rest are those it thinks about. A parent
    that thinks about none has the rest here as well."""
    direct: Share = 0.05
    """Share of the rows with questions it thinks about, answered at once, so that thinking can be switched off."""
    pool: Positive = 600
    """Questions per family and level that are answered at once."""
    traces: Positive = 600
    """Questions per family and level that are thought about."""
    told: Share = 0.3
    """Share of the thoughts whose system message names their strategy."""
    strategies: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}
    """How often each strategy is used; unset takes all seven alike."""
    seed: int = 41
    """Seed of questions, strategies and slips."""

    @model_validator(mode="after")
    def _sound(self):
        for name in self.strategies:
            if name not in STRATEGIES:
                raise ValueError(str(unknown("thinking strategy", name, STRATEGIES.names())))
        if (rest := self.text + self.skills + self.direct) >= 1:
            raise ValueError(f"text, skills and direct take {rest:g} of the rows; leave some for the thoughts")
        return self


class LossPlan(Config):
    """What the weights learn from, at supervised positions."""

    cross_entropy: Weight = 1.0
    """Weight of the right next token."""
    divergence: Weight = 1.0
    """Weight of KL(parent || child), over the whole vocabulary; with 0 the parent reads nothing."""
    ramp: Share = 0.0
    """Share of the steps over which the grid is faded in, linearly; 0 is on it from the first step."""

    @model_validator(mode="after")
    def _something(self):
        if not self.cross_entropy and not self.divergence:
            raise ValueError("cross_entropy and divergence are both 0; there is nothing to learn")
        return self


class BaselinePlan(Config):
    """What the result is compared with, beside its parent and itself without training. The method itself is none."""

    int8: GroupPlan | None = GroupPlan(bits=8)
    """Every linear map rounded to nearest, not trained."""
    int4: GroupPlan | None = GroupPlan(bits=4)
    """The same with fewer bits."""
    ternary: bool = True
    """For int8 and int4: the ternary grid of ``ternary``, not trained."""
    same_bytes: bool = True
    """A narrow model whose float16 weights take as many bytes, trained from nothing on the same batches; none where
    rounding was enough and nothing is trained."""
    taught: bool = True
    """That model learns from the parent's distribution too, as far as ``loss`` says; false leaves it the right next
    tokens, for which the parent need not read the batch."""


class SpeedPlan(Config):
    """How decoding is timed."""

    tokens: Positive = 32
    """Tokens of a block."""
    rounds: Positive = 9
    """Blocks of each model, taken in turns; the median counts."""


class ReportPlan(Config):
    """How much is measured."""

    problems: Positive = 40
    """Questions per family and level of the report split."""
    select: Positive = 12
    """The same of the select split, which decides whether to train, and what is handed on."""
    windows: Positive = 64
    """Windows of held-out text."""
    length: Annotated[int, Field(ge=8)] = 96
    """Tokens per window."""
    thinking_budget: Positive = 64
    """Tokens of a thought at most."""


class BitNetConfig(Config):
    """Phase 4: weights in three values (or eight or four bits), trained until the skills are back."""

    method: Method = "bitnet"
    """Grid of the linear maps: ternary, or rounded to nearest in eight or four bits."""
    ternary: TernaryPlan = TernaryPlan()
    """The ternary grid."""
    map_group: Positive = 32
    """Columns of a linear map that share a scale, for int8 and int4."""
    groups: GroupPlan | None = GroupPlan()
    """Rounding of embedding and head; null keeps them in float16."""
    dense: Literal["float16", "float32"] = "float16"
    """How the dequantised copy that later phases train is stored: float16 where that is exact, as of ternary weights,
    else float32; or all in float32. It is read as float32. Hugging Face models are always stored as float32."""
    calibration: CalibrationPlan = CalibrationPlan()
    """What is measured before rounding."""
    finetune_above: Share = 0.1
    """Train when rounding alone costs more than this share of the right answers, or adds more perplexity than
    ``most_perplexity`` (select split); 1 never trains."""
    practice: PracticePlan = PracticePlan()
    """Training data."""
    loss: LossPlan = LossPlan()
    """What is learned from them."""
    train: TrainConfig = TrainConfig(
        steps=400,
        rows=16,
        seq_len=128,
        seed=41,
        warmup=0.05,
        cooldown=0.95,
        optimizer=MuGrokConfig.from_phase(4).replace(ste=False),
    )
    """How to train. The parent is trained already, so this is the cool-down, where quantisation belongs (arXiv
    2509.22935): the rate falls from the end of the warm-up on, or over ``train.cooldown`` of the steps."""
    baselines: BaselinePlan = BaselinePlan()
    """Comparisons."""
    skills: Mix | None = None
    """What the parent can do and must keep; unset takes what its manifest says it practised. Where neither says
    anything, only its text is measured."""
    text: TextPlan | None = None
    """Real text; unset takes phase 1's."""
    own_text: OwnText | None = None
    """Text of one's own in place of it."""
    evaluation: ReportPlan = ReportPlan()
    """Measurements."""
    speed: SpeedPlan = SpeedPlan()
    """Timing."""
    strong: Share = 0.95
    """A level counts as one that the parent has mastered from this accuracy on (select split)."""
    least_retention: Share = 0.9
    """Share of the parent's right answers that must be kept (V2 specification, 2.4.5)."""
    grace: Share = 0.02
    """Accuracy that may be lost where the parent has mastered a level."""
    least_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """Bytes in float32 over bytes of the packed file, at least; unset asks for 8 of bitnet, 3.5 of int8, 5 of int4."""
    most_perplexity: Weight = 0.1
    """Perplexity that may be added, as a share."""
    least_recovery: Share = 0.6
    """Share of the accuracy lost by rounding that training must bring back; of the perplexity added, where rounding
    cost no answers."""

    @model_validator(mode="after")
    def _one_grid(self):
        if self.train.optimizer.ste:
            raise ValueError("train.optimizer.ste is a grid of its own; switch it off, the method's is what counts")
        if self.ternary.sub_norm:
            raise ValueError("ternary.sub_norm has no place in the dequantised model that later phases train")
        if self.baselines.same_bytes and not (self.loss.cross_entropy or self.baselines.taught):
            raise ValueError("loss.cross_entropy is 0 and baselines.taught is off: the control has nothing to learn")
        return self

    @property
    def grid(self) -> MapPlan:
        """The grid of the linear maps."""
        if self.method == "bitnet":
            return self.ternary
        return GroupPlan(bits=BITS[self.method], group=self.map_group)

    @property
    def made(self) -> str:
        """What the result is called."""
        return "ternary" if self.method == "bitnet" else self.method

    @property
    def ratio_asked(self) -> float:
        """The least ratio that counts."""
        return LEAST_RATIO[self.method] if self.least_ratio is None else self.least_ratio

    def forecast(self) -> list[dict[str, Any]]:
        """What the trainings cost, for the plan of a run, as tokens read once: a token that is learned from counts
        three times, half a time more for rounding, and once more when the parent reads it too."""
        if self.finetune_above >= 1:
            return []
        train, reads = self.train, 1.0 if self.loss.divergence else 0.0
        tokens = train.steps * train.rows * train.seq_len
        rows = [{"stage": self.made, "steps": train.steps, "tokens": round((3.5 + reads) * tokens), "models": 1}]
        if self.baselines.same_bytes:
            cost = 3 * 2 / self.ratio_asked + reads * self.baselines.taught  # float16: two bytes a parameter
            rows.append({"stage": "control of the same bytes", "steps": train.steps, "tokens": round(cost * tokens)})
        return rows
