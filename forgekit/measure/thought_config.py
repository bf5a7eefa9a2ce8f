"""Settings of what is measured about thoughts. No torch here: plans hold these."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from forgekit.config import Config

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class CoherenceConfig(Config):
    """How coherent a thought is: four scores in [0, 1] and their weights, which sum to 1."""

    semantic_weight: Share = 0.30
    """Of the similarity between thought and question."""
    logical_weight: Share = 0.30
    """Of the share of statements that hold; where none can be checked, of how much the order of the steps matters."""
    relevance_weight: Share = 0.25
    """Of how much likelier the thought is after its own question than after similar ones."""
    fluency_weight: Share = 0.15
    """Of how likely the model finds the thought, token by token."""
    threshold: Share = 0.70
    """Coherence that a valid thought needs."""
    others: Positive = 3
    """Similar questions that a thought is tried on."""
    orders: Positive = 2
    """Other orders of its steps that a thought without checkable statements is tried in."""
    embedder: Literal["own", "sentence-transformers"] = "own"
    """What compares thought and question: the model's own states, or a sentence encoder (an optional extra)."""
    sentence_model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """The sentence encoder: a name on the Hugging Face hub or a folder."""
    sentence_revision: str | None = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"
    """Its pinned revision; scores of two encoders cannot be compared. None for a folder."""

    @property
    def weights(self) -> tuple[float, float, float, float]:
        """Of semantic, logical, relevance, fluency."""
        return self.semantic_weight, self.logical_weight, self.relevance_weight, self.fluency_weight

    @model_validator(mode="after")
    def _weights_are_shares(self):
        if not math.isclose(sum(self.weights), 1, abs_tol=1e-6):
            raise ValueError(f"the four weights sum to {sum(self.weights):.6g}; make them sum to 1")
        return self


class TheaterConfig(Config):
    """What is asked of thoughts before they count as more than decoration."""

    thinking_budget: Positive = 64
    """Tokens of a thought at most; longer ones are closed there."""
    filler: str = "<reason>"
    """The token that a filler thought repeats: any single token of the tokenizer but the two that end a thought."""
    min_improvement: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """The 95 % interval of the accuracy that thoughts add must lie above this."""
    min_lost: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of that gain which shuffled thoughts, and filler, must lose: the interval must not reach below this."""
    min_power: Share = 0.5
    """The interval of the predictive power must lie above this."""
    min_correlation: Annotated[float, Field(ge=-1, le=1)] = 0.3
    """The correlation between coherence and right answers: its interval must not lie wholly below this."""
    rows: Positive = 256
    """Questions thought about at once."""
    seed: int = 0
    """Decides who gets whose thought, and the resamples of the intervals."""
