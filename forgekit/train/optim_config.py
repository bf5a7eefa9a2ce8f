"""Settings of MuonGrokfast and the per-phase presets of the sources. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from forgekit.config import Config
from forgekit.errors import ConfigError

Rate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]


class MuGrokConfig(Config):
    """Everything MuonGrokfast does, each part with its own switch (a zero or false turns it off)."""

    lr: Rate = 1e-3
    """Step size of the Muon path."""
    fallback_lr: Rate = 1e-3
    """Step size of AdamW for embeddings, gains, biases and heads."""
    weight_decay: NonNegative = 0.05
    """Decoupled weight decay of the Muon path."""
    fallback_weight_decay: NonNegative = 0.0
    """Decoupled weight decay of the AdamW path."""
    use_muon: bool = True
    """Orthogonalise 2-D hidden matrices; off, everything goes to AdamW."""
    ns_steps: Annotated[int, Field(ge=1, le=12)] = 5
    """Newton-Schulz iterations k."""
    ns_coefficients: Literal["quintic", "polar_express"] = "quintic"
    """Keller Jordan's constant quintic, or the Polar Express schedule (arXiv 2505.16932)."""
    momentum: Decay = 0.95
    """Muon's momentum (Nesterov)."""
    scale: Literal["original", "match_rms_adamw"] = "original"
    """Step scale by shape: sqrt(max(1, rows/cols)), or 0.2 sqrt(max(rows, cols))."""
    normuon_beta: Decay = 0.95
    """Decay of NorMuon's per-row second moment (arXiv 2510.05491); 0 is plain Muon."""
    cautious_decay: bool = True
    """Decay a weight only where the step moves it the same way."""
    grokfast_alpha: Decay = 0.98
    """Decay of the slow-gradient average."""
    grokfast_lambda: NonNegative = 0.3
    """How much of the slow gradient is added; 0 is off."""
    qk_clip: NonNegative = 30.0
    """Attention logit threshold tau; 0 is off."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's moment decays."""
    eps: Rate = 1e-8
    """AdamW's epsilon."""
    ste: bool = False
    """Keep Muon-path weights on the ternary grid and train hidden full-precision copies (straight-through)."""
    kl_coefficient: NonNegative = 0.0
    """Weight of the KL divergence to a reference model, for phases that hold one and add it to their loss."""

    @classmethod
    def from_phase(cls, phase: int, supervised: bool = False) -> MuGrokConfig:
        """The sources' preset for phase 1 to 8.

        Args:
            phase: its number.
            supervised: the supervised first step of phase 3, which the sources give a preset of its own.

        Raises:
            ConfigError: no such phase, or it has no separate first step.
        """
        if phase not in _PRESETS:
            raise ConfigError(f"no preset for phase {phase}", where="phase", remedy="choose 1 to 8")
        if supervised and phase != 3:
            raise ConfigError("has one step", where=f"phase {phase}", remedy="leave supervised out")
        return cls(**(_SUPERVISED if supervised else _PRESETS[phase]))


# Sources: V2 specification 2.1.5 (phase 1), 2.3 and 2.3.5 (phase 3: supervised, then REINFORCE), the V2
# architecture page (phase 5: lambda 2.0, STE), 2.5.5 and 2.6.5 (rates). Phases the sources leave open take
# the nearest stated neighbour: 2 and 7 train little (phase 3 supervised), 4 is phase 5 with its own STE.
_SUPERVISED = {"lr": 1e-4, "fallback_lr": 1e-4, "grokfast_lambda": 0.2, "qk_clip": 30.0}
_PRESETS = {
    1: {"lr": 1e-3, "fallback_lr": 1e-3, "grokfast_lambda": 0.3, "ns_steps": 3, "momentum": 0.9, "qk_clip": 30.0},
    2: _SUPERVISED,
    3: {"lr": 5e-4, "fallback_lr": 1e-4, "grokfast_lambda": 0.1, "qk_clip": 25.0, "kl_coefficient": 0.1},
    4: {"lr": 1e-3, "fallback_lr": 1e-3, "grokfast_lambda": 2.0, "weight_decay": 0.01, "ste": True},
    5: {"lr": 1e-3, "fallback_lr": 2e-4, "grokfast_lambda": 2.0, "weight_decay": 0.01, "ste": True},
    6: {"lr": 1e-4, "fallback_lr": 2.5e-5, "grokfast_lambda": 0.2, "qk_clip": 25.0},
    7: _SUPERVISED,
    8: {**_SUPERVISED, "ste": True},
}
