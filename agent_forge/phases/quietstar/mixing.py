"""How a prediction after a thought is mixed with the prediction without it.

A mixer takes the hidden states of both at the same true token, and gives normalised log-probabilities of the next one.
It starts by hardly listening: a thought of a model that has not learned to think is noise.

Shapes: M predictions, n thoughts heard together, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent_forge.phases.quietstar.talk_config import MixerConfig
from forgekit.errors import ConfigError
from forgekit.models.layers import RMSNorm, linear
from forgekit.registry import Registry

Head = Callable[[Tensor], Tensor]
"""From hidden states (..., D) to scores (..., V), what must not be said already ruled out."""

MIXERS = Registry("quietstar_mixer")


@dataclass(frozen=True)
class Mixed:
    """Predictions that have heard thoughts.

    Attributes:
        log_p: normalised log-probabilities of the next token, (M, n, V) or (M, V).
        weight: how much the thoughts counted, in [0, 1], (M, n) or (M,).
    """

    log_p: Tensor
    weight: Tensor


class Mixer(nn.Module):
    """What every mixer can do. Register others in :data:`MIXERS`; they are made with (config, width)."""

    config: MixerConfig
    width: int
    joint = False
    """Whether thoughts heard together are more than thoughts heard one by one."""

    def forward(self, base_MD: Tensor, thought_MnD: Tensor, head: Head) -> Mixed:
        """Hear each thought alone: (M, n, V) and (M, n).

        Args:
            base_MD: hidden states without a thought.
            thought_MnD: hidden states at the same token after each of n thoughts.
            head: the model's output head.
        """
        raise NotImplementedError

    def together(self, base_MD: Tensor, thought_MnD: Tensor, head: Head) -> Mixed:
        """Hear all n thoughts at once: (M, V) and (M,). By default the mean of what each one leads to."""
        each = self(base_MD, thought_MnD, head)
        return Mixed(each.log_p.logsumexp(1) - math.log(each.log_p.shape[1]), each.weight.mean(1))


@MIXERS.register("mlp")
class MLPMixer(Mixer):
    """One weight per token from a three-layer ReLU network on both hidden states (arXiv 2403.09629, section 4.3).

    ``log p = (1 - w) log p_base + w log p_thought``, normalised again: without that the mixture of two different
    distributions sums to less than one and its cross-entropy is no cross-entropy. ``space: linear`` averages the
    probabilities instead. The authors' code leaves w unbounded; here it is a sigmoid, so that it is a weight.
    """

    def __init__(self, config: MixerConfig, width: int) -> None:
        super().__init__()
        self.config, self.width = config, width
        hidden = config.hidden or width
        self.layers = nn.Sequential(
            nn.Linear(2 * width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.constant_(self.layers[-1].bias, _logit(config.initial_weight))

    def forward(self, base_MD: Tensor, thought_MnD: Tensor, head: Head) -> Mixed:
        """See :meth:`Mixer.forward`."""
        thought_MnD = thought_MnD.to(base_MD.dtype)
        logit_Mn1 = self.layers(torch.cat([base_MD[:, None].expand_as(thought_MnD), thought_MnD], dim=-1)).float()
        base_M1V = head(base_MD).log_softmax(-1)[:, None]
        thought_MnV = head(thought_MnD).log_softmax(-1)
        if self.config.space == "linear":
            log_p = torch.logaddexp(base_M1V + F.logsigmoid(-logit_Mn1), thought_MnV + F.logsigmoid(logit_Mn1))
        else:
            log_p = torch.lerp(base_M1V.expand_as(thought_MnV), thought_MnV, logit_Mn1.sigmoid()).log_softmax(-1)
        return Mixed(log_p, logit_Mn1.sigmoid()[..., 0])


@MIXERS.register("attention")
class AttentionMixer(Mixer):
    """Attention over the hidden states after all thoughts, a gate, a norm (V2 specification, 2.3.4).

    ``fused = (1 - g) base + g norm(attended)``. The specification puts the norm after the sum; then even a closed
    gate would change what the output head of a trained model sees, so the norm is on what was attended.
    """

    joint = True

    def __init__(self, config: MixerConfig, width: int) -> None:
        super().__init__()
        if width % config.heads:
            raise ConfigError(
                f"{config.heads} does not divide the model's width {width}",
                where="mixer.heads",
                remedy="use a divisor of it",
            )
        self.config, self.width = config, width
        self.wq, self.wk, self.wv, self.wo = (linear(width, width) for _ in range(4))
        with torch.no_grad():  # begin by passing a thought's state through
            for layer in (self.wv, self.wo):
                layer.weight.copy_(torch.eye(width))
        self.norm = RMSNorm(width)
        self.gate = nn.Linear(2 * width, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, _logit(config.initial_weight))

    def forward(self, base_MD: Tensor, thought_MnD: Tensor, head: Head) -> Mixed:
        """See :meth:`Mixer.forward`: attention over one thought passes it through."""
        M, n, D = thought_MnD.shape
        base = base_MD[:, None].expand(M, n, D).reshape(M * n, D)
        heard = self.together(base, thought_MnD.reshape(M * n, 1, D), head)
        return Mixed(heard.log_p.view(M, n, -1), heard.weight.view(M, n))

    def together(self, base_MD: Tensor, thought_MnD: Tensor, head: Head) -> Mixed:
        """See :meth:`Mixer.together`: each head looks for the thoughts that matter for this token."""
        (M, D), thought_MnD = base_MD.shape, thought_MnD.to(base_MD.dtype)
        pairs = ((self.wq, base_MD), (self.wk, thought_MnD), (self.wv, thought_MnD))
        q, k, v = (w(x).view(M, -1, self.config.heads, D // self.config.heads).transpose(1, 2) for w, x in pairs)
        attended_MD = self.wo(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(M, D))
        weight_M1 = self.gate(torch.cat([base_MD, attended_MD.to(base_MD.dtype)], dim=-1)).float().sigmoid()
        fused_MD = torch.lerp(base_MD.float(), self.norm(attended_MD).float(), weight_M1)
        return Mixed(head(fused_MD.to(base_MD.dtype)).log_softmax(-1), weight_M1[:, 0])


def make_mixer(config: MixerConfig, width: int) -> nn.Module:
    """A fresh mixer for a model of this width.

    Raises:
        ConfigError: unknown kind, or heads that do not divide the width.
    """
    return MIXERS.get(config.kind)(config, width)


def _logit(share: float) -> float:
    return math.log(share / (1 - share))
