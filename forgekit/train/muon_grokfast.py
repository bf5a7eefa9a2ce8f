"""MuonGrokfast: slow-gradient filter, orthogonalised steps, and a rail for attention logits.

Order of one step: Grokfast EMA filter (arXiv 2405.20233) -> routing -> Muon (Jordan, 2024; NorMuon
arXiv 2510.05491) for 2-D hidden matrices, AdamW for the rest -> QK-Clip per head (arXiv 2507.20534).
Each part can be switched off in :class:`MuGrokConfig`.

Matrices of one shape are orthogonalised together as one batch: on small models the launches cost more than
the arithmetic. Of parameters that FSDP2 shards, the state is sharded alike; only the matrices of one shape at a
time are gathered, because orthogonalisation needs them whole.

Shapes: G matrices of a shape, R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from forgekit.models.base import local, placed_like, whole
from forgekit.train.optim_config import MuGrokConfig

QUINTIC = (3.4445, -4.7750, 2.0315)
POLAR_EXPRESS = (
    (8.1566, -22.4833, 15.8788),
    (4.0429, -2.8089, 0.5000),
    (3.8917, -2.7725, 0.5061),
    (3.2858, -2.3681, 0.4645),
    (2.3465, -1.7098, 0.4232),
)
NOT_HIDDEN = ("embed", "lm_head", "halt", "conv", "wte", "wpe", "gates")
"""Parts of names whose 2-D tensors are no hidden linear maps."""


def newton_schulz(G_GRC: Tensor, steps: int, coefficients: str = "quintic") -> Tensor:
    """Replace each matrix by an approximately orthogonal one with the same row and column spaces.

    Args:
        G_GRC: a batch of matrices.
        steps: iterations of X <- aX + (bA + cA^2)X with A = XX^T.
        coefficients: ``quintic`` (constant) or ``polar_express`` (a schedule; its last triple repeats).
    """
    # bfloat16 halves the cost where the hardware multiplies it natively; the iteration is self-correcting.
    X = G_GRC.bfloat16()
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X
    # The Polar Express schedule is derived with this margin above the largest singular value.
    margin = 1.01 if coefficients == "polar_express" else 1.0
    X = X / (X.float().norm(dim=(-2, -1), keepdim=True) * margin + 1e-7).to(X.dtype)
    for i in range(steps):
        a, b, c = QUINTIC if coefficients == "quintic" else POLAR_EXPRESS[min(i, len(POLAR_EXPRESS) - 1)]
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if tall else X).to(G_GRC.dtype)


def is_hidden_matrix(name: str, tensor: Tensor) -> bool:
    """Whether Muon handles the tensor: two dimensions, both larger than one, and no embedding or head."""
    return tensor.ndim == 2 and min(tensor.shape) > 1 and not any(part in name for part in NOT_HIDDEN)


def ternary(W: Tensor) -> Tensor:
    """Round to {-1, 0, 1} times the mean magnitude (BitNet b1.58's absmean, arXiv 2402.17764)."""
    scale = W.abs().mean().clamp_min(1e-8)
    return (W / scale).round().clamp(-1, 1) * scale


class MuonGrokfast(torch.optim.Optimizer):
    """The Forge's optimizer.

    Args:
        params: ``model.named_parameters()`` (routed by name and shape) or plain tensors (by shape alone).
        config: what to do; :meth:`MuGrokConfig.from_phase` has the sources' presets.
        model: a module whose ``attentions()`` QK-Clip may shrink; without it there is no clipping.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]] | Iterable[Tensor],
        config: MuGrokConfig,
        model: nn.Module | None = None,
    ) -> None:
        named = [p if isinstance(p, tuple) else ("", p) for p in params]
        named = [(name, p) for name, p in named if p.requires_grad]
        muon = [p for name, p in named if config.use_muon and is_hidden_matrix(name, p)]
        chosen = {id(p) for p in muon}
        rest = [p for _, p in named if id(p) not in chosen]
        groups = [{"params": muon, "kind": "muon", "lr": config.lr, "base_lr": config.lr}]
        groups += [{"params": rest, "kind": "adamw", "lr": config.fallback_lr, "base_lr": config.fallback_lr}]
        super().__init__([g for g in groups if g["params"]], {})
        self.config = config
        self._attentions = list(model.attentions()) if model is not None and hasattr(model, "attentions") else []
        self._by_shape: dict[torch.Size, list[Tensor]] = {}
        for p in muon:
            self._by_shape.setdefault(p.shape, []).append(p)
        self._ternary = muon if config.ste else []
        self._quantise()

    def set_lr_factor(self, factor: float) -> None:
        """Scale every group's base rate; schedules go through here."""
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * factor

    @torch.no_grad()
    def step(self, closure=None):
        """One update. Parameters without a gradient are left alone. Returns the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for p in self._ternary:  # what is trained is the hidden copy; the grid is only what the model computes with
            p.copy_(self.state[p].get("latent", p))
        for group in self.param_groups:
            if self.config.grokfast_lambda:
                self._filter(group["params"])
            if group["kind"] == "muon":
                self._muon(group)
            else:
                self._adamw(group)
        if self.config.qk_clip:
            for attention in self._attentions:
                attention.clip_logits(self.config.qk_clip)
        self._quantise()
        return loss

    def trained(self, p: Tensor) -> Tensor:
        """What training moves for a parameter: its hidden full-precision copy where there is one, else itself."""
        return self.state.get(p, {}).get("latent", p)

    @torch.no_grad()
    def assign(self, values: dict[Tensor, Tensor]) -> None:
        """Give all parameters new values; those kept on the ternary grid are put back on it."""
        for p, value in values.items():
            p.copy_(value)
        self._quantise()

    @torch.no_grad()
    def _quantise(self) -> None:
        """Keep the weights as they are as hidden copies and put what the model sees on the ternary grid."""
        for p in self._ternary:
            self.state[p].setdefault("latent", torch.empty_like(p)).copy_(p)
            p.copy_(placed_like(ternary(whole(p.detach())), p))

    def _filter(self, params: list[Tensor]) -> None:
        """Grokfast-EMA: add the amplified slow part of the gradient to the gradient, in place."""
        live = [p for p in params if p.grad is not None]
        if not live:
            return
        for p in live:
            if "slow" not in self.state[p]:
                self.state[p]["slow"] = torch.zeros_like(p)
        slow, grads = [local(self.state[p]["slow"]) for p in live], [local(p.grad) for p in live]
        torch._foreach_lerp_(slow, grads, 1 - self.config.grokfast_alpha)
        torch._foreach_add_(grads, slow, alpha=self.config.grokfast_lambda)

    def _muon(self, group: dict) -> None:
        for params in self._by_shape.values():
            live = [p for p in params if p.grad is not None]
            if live:
                self._muon_shape(live, group["lr"])

    def _muon_shape(self, params: list[Tensor], lr: float) -> None:
        """Update all matrices of one shape together."""
        config = self.config
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momentum, grads = [local(self.state[p]["momentum"]) for p in params], [local(p.grad) for p in params]
        torch._foreach_lerp_(momentum, grads, 1 - config.momentum)
        nesterov = torch._foreach_lerp(grads, momentum, config.momentum)
        full = [_gathered(part, p) for part, p in zip(nesterov, params)]
        update_GRC = newton_schulz(torch.stack(full), config.ns_steps, config.ns_coefficients)
        if config.normuon_beta:
            update_GRC = self._equalise_rows(params, update_GRC)
        rows, cols = params[0].shape
        size = math.sqrt(max(1, rows / cols)) if config.scale == "original" else 0.2 * math.sqrt(max(rows, cols))
        weights = [local(p.detach()) for p in params]
        updates = [local(placed_like(update, p)) for update, p in zip(update_GRC.unbind(), params)]
        if config.weight_decay:
            self._decay(weights, updates, lr * config.weight_decay)
        torch._foreach_add_(weights, updates, alpha=-lr * size)

    def _equalise_rows(self, params: list[Tensor], update_GRC: Tensor) -> Tensor:
        """NorMuon: divide rows by their running size, then restore the matrix's Frobenius norm.

        One number per row: small enough that every process keeps them all.
        """
        beta = self.config.normuon_beta
        for p in params:
            if "row_square" not in self.state[p]:
                self.state[p]["row_square"] = torch.zeros(p.shape[0], 1, dtype=p.dtype, device=p.device)
        squares = [self.state[p]["row_square"] for p in params]
        torch._foreach_lerp_(squares, list(update_GRC.square().mean(-1, keepdim=True).unbind()), 1 - beta)
        before = update_GRC.norm(dim=(-2, -1), keepdim=True)
        update_GRC = update_GRC / (torch.stack(squares).sqrt() + 1e-8)
        return update_GRC * (before / (update_GRC.norm(dim=(-2, -1), keepdim=True) + 1e-8))

    def _decay(self, weights: list[Tensor], updates: list[Tensor], amount: float) -> None:
        if not self.config.cautious_decay:
            torch._foreach_mul_(weights, 1 - amount)
            return
        W_GRC = torch.stack(weights)
        pull = W_GRC * (W_GRC * torch.stack(updates) >= 0)
        torch._foreach_add_(weights, list(pull.unbind()), alpha=-amount)

    def _adamw(self, group: dict) -> None:
        """AdamW (Loshchilov and Hutter, 2019), vectorised over tensors."""
        live = [p for p in group["params"] if p.grad is not None]
        if not live:
            return
        (b1, b2), config = self.config.betas, self.config
        for p in live:
            state = self.state[p]
            if "mean" not in state:
                # The name "step" keeps torch from moving the counter to the parameter's device on loading.
                state.update(mean=torch.zeros_like(p), square=torch.zeros_like(p), step=torch.zeros(()))
            state["step"] += 1
        states, grads = [self.state[p] for p in live], [local(p.grad) for p in live]
        weights = [local(p.detach()) for p in live]
        means, squares = [local(s["mean"]) for s in states], [local(s["square"]) for s in states]
        torch._foreach_lerp_(means, grads, 1 - b1)
        torch._foreach_mul_(squares, b2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - b2)
        counts = [float(s["step"]) for s in states]
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, [math.sqrt(1 - b2**n) for n in counts])
        torch._foreach_add_(roots, config.eps)
        if config.fallback_weight_decay:
            torch._foreach_mul_(weights, 1 - group["lr"] * config.fallback_weight_decay)
        steps = torch._foreach_div(means, roots)
        torch._foreach_mul_(steps, [-group["lr"] / (1 - b1**n) for n in counts])
        torch._foreach_add_(weights, steps)


def _gathered(part: Tensor, like: Tensor) -> Tensor:
    """The full tensor whose shards, placed as ``like``'s, the processes hold."""
    if not hasattr(like, "device_mesh"):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(part, mesh, placements, shape=like.shape, stride=like.stride()).full_tensor()
