"""``trm_titans``: sliding-window attention + Titans memory behind a gate + TRM recursion with learned halting.

Sources: Titans, memory as gate (arXiv 2501.00663, sections 4.2 and 4.4); Tiny Recursive Models (arXiv 2510.04871);
adaptive computation time (Graves, 2016) in the form of a per-position estimate of being right.

The recursion works on each position by itself, on the features the backbone computed once: it never moves
information between positions, so a position may stop early without disturbing the others and cached
generation equals full scoring.

Shapes: B batch, T new tokens, D model width, V vocabulary, N supervised or active positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from forgekit.models.base import Loss, Output, mean_nats, supervised_positions, whole
from forgekit.models.config import TRMTitansConfig
from forgekit.models.gpt import Block, positions
from forgekit.models.layers import AttentionState, Embedding, RMSNorm, generating, linear, select_rows, squared_relu
from forgekit.models.memory import DecayMemory, MemoryShape, MemoryState, TitansMemory

HALT_BIAS = -3.0
"""The halting head starts far from halting: a zero bias makes most runs collapse to one step (2604.21999)."""
HALT_SPEED = 30.0
"""Factor on the halting head's logit, and so on how fast it learns: a specialist has a hundred steps to move a chance
from 0.05 to beyond 0.9, and its target moves with the model (docs/LOG.md)."""


@dataclass
class TRMTitansState:
    """Where each row stands, what attention sees and what the memories hold."""

    position_B: Tensor
    layers: list[AttentionState]
    memories: list[MemoryState | None]

    def rows(self, index: Tensor) -> TRMTitansState:
        """The same state for a subset (or repetition) of rows."""
        memories = [m.rows(index) if m is not None else None for m in self.memories]
        return TRMTitansState(self.position_B[index], [select_rows(a, index) for a in self.layers], memories)


class GatedMemory(nn.Module):
    """Memory as gate: what the memory recalls, gated per channel, added to what attention sees.

    A convex blend of the two, as the V2 specification has it, halves attention where the memory has nothing to say
    and models text worse (docs/LOG.md).
    """

    def __init__(self, config: TRMTitansConfig) -> None:
        super().__init__()
        shape = MemoryShape(
            width=config.d_model,
            inner=config.d_mem,
            heads=config.memory_heads,
            chunk=config.memory_chunk,
            capacity=config.memory_capacity,
            surprise_weight=config.surprise_weight,
            novelty_weight=config.novelty_weight,
        )
        self.memory = TitansMemory(shape) if config.memory == "titans" else DecayMemory(shape)
        self.norm, self.out_norm = RMSNorm(config.d_model), RMSNorm(config.d_model)
        self.gate_in = linear(config.d_model, config.gate_hidden)
        self.gate_out = nn.Linear(config.gate_hidden, config.d_model)
        nn.init.zeros_(self.gate_out.weight)
        nn.init.zeros_(self.gate_out.bias)  # half open: a memory that is hardly heard is learned late (docs/LOG.md)

    def forward(self, x_BTD: Tensor, attended_BTD: Tensor, state: MemoryState | None, lengths_B: Tensor | None):
        """attended + g * recalled, the memory after, and the gate's entropy (B, T) in [0, 1].

        Nobody asks for the entropy where tokens are generated one by one: there it is None.
        """
        one = generating(x_BTD, state, lengths_B)
        inputs = self.norm.one_token(x_BTD) if one else self.norm(x_BTD)
        recalled, state = self.memory(inputs, state, lengths_B)
        logit = self.gate_out(F.silu(self.gate_in(inputs)))
        gate = logit.sigmoid()
        if one:
            return attended_BTD + gate * self.out_norm.one_token(recalled), state, None
        blended_BTD = attended_BTD + gate * self.out_norm(recalled)
        entropy_BT = (F.softplus(logit.float()) - gate.float() * logit.float()).mean(-1) / math.log(2)
        return blended_BTD, state, entropy_BT


class MemoryBlock(Block):
    """A transformer block whose attention is joined by a long-term memory."""

    def __init__(self, config: TRMTitansConfig) -> None:
        super().__init__(config)
        self.gated = GatedMemory(config)

    def forward(self, x_BTD, pos_BT, state, lengths_B, turn=None, memory=None):
        attended, state = self.attn(x_BTD, pos_BT, state, lengths_B, turn, self.norm1)
        blended, memory, entropy_BT = self.gated(x_BTD, attended, memory, lengths_B)
        x_BTD = x_BTD + blended
        return x_BTD + self.ffn(x_BTD, self.norm2), state, memory, entropy_BT


class Refine(nn.Module):
    """A two-layer network on a normalised sum; starts as the identity's zero increment."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.up, self.down = linear(width, hidden), linear(hidden, width, std=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(squared_relu(self.up(self.norm(x))))


class Recursion(nn.Module):
    """TRM: refine a latent z against features x and answer y, then update the answer from the latent."""

    def __init__(self, config: TRMTitansConfig) -> None:
        super().__init__()
        self.config = config
        self.g, self.h = (Refine(config.d_model, config.trm_hidden) for _ in range(2))
        self.z0 = nn.Parameter(torch.zeros(config.d_model))
        self.halt = nn.Linear(config.d_model, 1)
        nn.init.zeros_(self.halt.weight)
        nn.init.constant_(self.halt.bias, HALT_BIAS / HALT_SPEED)
        # The teacher is an average of the halting head; it decides, the student only learns.
        self.register_buffer("teacher_weight", self.halt.weight.detach().clone())
        self.register_buffer("teacher_bias", self.halt.bias.detach().clone())

    def step(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """One recursion step on (..., D) features, answer and latent."""
        for _ in range(self.config.micro_steps):
            z = z + self.g(x + y + z)
        return y + self.h(y + z), z

    def halting(self, z: Tensor, teacher: bool) -> Tensor:
        """Logit of the chance that the current answer is right, (...,) for (..., D) latents."""
        z = F.rms_norm(z.float(), (z.shape[-1],))
        head = (self.teacher_weight, self.teacher_bias) if teacher else (self.halt.weight, self.halt.bias)
        return HALT_SPEED * F.linear(z, *(x.float() for x in head)).squeeze(-1)

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Move the teacher towards the student; call once per optimizer step."""
        keep = self.config.act_ema
        self.teacher_weight.lerp_(whole(self.halt.weight), 1 - keep)
        self.teacher_bias.lerp_(whole(self.halt.bias), 1 - keep)

    def infer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Refine flat features (N, D) until the teacher halts each position; returns answers and steps (N,)."""
        y, z = x.clone(), self.z0.to(x.dtype).expand_as(x).clone()
        steps = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        active = torch.arange(x.shape[0], device=x.device)
        chance = self.config.act_threshold
        limit = math.log(chance / (1 - chance)) if chance < 1 else math.inf
        for _ in range(self.config.t_max):
            y_a, z_a = self.step(x[active], y[active], z[active])
            y[active], z[active] = y_a, z_a
            steps[active] += 1
            active = active[self.halting(z_a, teacher=True) < limit]
            if not active.numel():
                break
        return y, steps


class TRMTitans(nn.Module):
    """The Forge's own family. See the module docstring."""

    def __init__(self, config: TRMTitansConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.d_model, config.emb_rank)
        self.blocks = nn.ModuleList(
            MemoryBlock(config) if i in config.memories else Block(config) for i in range(config.n_layers)
        )
        self.norm = RMSNorm(config.d_model)
        self.recursion = Recursion(config) if config.trm_hidden else None
        self.checkpoint_activations = False

    def initial_state(self, batch: int) -> TRMTitansState:
        """State before the first token of ``batch`` rows."""
        device = next(self.parameters()).device
        position = torch.zeros(batch, dtype=torch.long, device=device)
        layers = [block.attn.initial_state(batch, device) for block in self.blocks]
        memories = [b.gated.memory.initial_state(batch, device) if hasattr(b, "gated") else None for b in self.blocks]
        return TRMTitansState(position, layers, memories)

    def features(self, ids_BT: Tensor, state: TRMTitansState | None, lengths_B: Tensor | None):
        """Normalised hidden states (B, T, D), the state after, and the gates' entropy (B, T) (or None)."""
        pos_BT, lengths = positions(ids_BT, state, lengths_B)
        x_BTD = self.embedding.embed(ids_BT)
        turn = self.blocks[0].attn.turns(pos_BT)
        layers, memories, entropies = [], [], []
        for i, block in enumerate(self.blocks):
            args = [x_BTD, pos_BT, state.layers[i] if state else None, lengths_B, turn]
            if isinstance(block, MemoryBlock):
                args.append(state.memories[i] if state else None)
            if self.checkpoint_activations and self.training:
                result = checkpoint(block, *args, use_reentrant=False)
            else:
                result = block(*args)
            x_BTD, layer = result[:2]
            layers.append(layer)
            memories.append(result[2] if len(result) > 2 else None)
            entropies += [e for e in result[3:] if e is not None]
        after = TRMTitansState(state.position_B + lengths, layers, memories) if state else None
        h_BTD = self.norm.one_token(x_BTD) if generating(x_BTD, state, lengths_B) else self.norm(x_BTD)
        return h_BTD, after, torch.stack(entropies).mean(0) if entropies else None

    def forward(
        self, input_ids_BT: Tensor, state: TRMTitansState | None = None, lengths_B: Tensor | None = None
    ) -> Output:
        """Score every next token with adaptive halting. Arguments as :meth:`forgekit.models.gpt.GPT.forward`."""
        h_BTD, state, entropy_BT = self.features(input_ids_BT, state, lengths_B)
        aux = {} if entropy_BT is None else {"gate/entropy": entropy_BT.mean()}
        out = self._answer(h_BTD.flatten(0, 1))
        steps = None if out.steps is None else out.steps.view(input_ids_BT.shape)
        return Output(out.logits.view(*input_ids_BT.shape, -1), state, steps, aux)

    def read_out(self, h: Tensor) -> Tensor:
        """Next-token scores (..., V) of the features (..., D) of :meth:`features`, recursion included."""
        return self._answer(h.reshape(-1, h.shape[-1])).logits.view(*h.shape[:-1], -1)

    def score_at(self, input_ids_BT: Tensor, at_N: Tensor) -> Output:
        """As :meth:`forgekit.models.gpt.GPT.score_at`; recursion, too, runs on those positions only."""
        h_BTD, _, _ = self.features(input_ids_BT, None, None)
        return self._answer(h_BTD.flatten(0, 1)[at_N])

    def _answer(self, h_ND: Tensor) -> Output:
        """Recursion (if any) and head on flat features (N, D)."""
        if not self.config.t_max:
            return Output(self.embedding.unembed(h_ND).float())
        refined, steps = self.recursion.infer(h_ND)
        return Output(self.embedding.unembed(refined).float(), None, steps)

    def training_loss(self, input_ids_BT: Tensor, labels_BT: Tensor) -> Loss:
        """Deeply supervised cross-entropy, halting loss and gate entropy (``labels`` are already shifted).

        Recursion and head run on supervised positions only: they do not look at their neighbours.
        """
        h_BTD, _, entropy_BT = self.features(input_ids_BT, None, None)
        pick = supervised_positions(labels_BT)
        # Over supervised positions, like the loss: then micro batches weighted by tokens add up to the batch.
        entropy = None if entropy_BT is None else entropy_BT.flatten()[pick].sum() / max(1, pick.numel())
        x_ND, target_N = h_BTD.flatten(0, 1)[pick], labels_BT.reshape(-1)[pick]
        parts = {} if entropy is None else {"gate/entropy": entropy.detach()}
        if not self.config.t_max:
            nats = mean_nats(self.embedding.unembed(x_ND), target_N)
            total = nats
        else:
            total, nats, halting = self._recursive_loss(x_ND, target_N)
            parts |= halting
        if entropy is not None:
            total = total - self.config.gate_entropy * entropy
        return Loss(total, nats.detach(), pick.numel(), parts)

    def _recursive_loss(self, x_ND: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        config, recursion = self.config, self.recursion
        y, z = x_ND, recursion.z0.to(x_ND.dtype).expand_as(x_ND)
        weights = [config.step_decay ** (config.t_max - t) for t in range(1, config.t_max + 1)]
        total, halted_at = 0.0, torch.full_like(target_N, config.t_max)
        for t, weight in enumerate(weights, start=1):
            if t > 1 and config.detach_steps:
                y, z = y.detach(), z.detach()
            y, z = recursion.step(x_ND, y, z)
            logits_NV = self.embedding.unembed(y).float()
            nats = mean_nats(logits_NV, target_N)
            right_N = (logits_NV.detach().argmax(-1) == target_N).float()
            # The halting head reads z but must not shape it: its target is a by-product.
            halt_N = recursion.halting(z.detach(), teacher=False)
            total = total + weight / sum(weights) * nats
            missed = F.binary_cross_entropy_with_logits(halt_N, right_N, reduction="sum") / max(1, target_N.numel())
            # Only the head hears this, and AdamW does not mind its size; but clipping looks at all gradients together.
            total = total + config.act_weight * missed / (config.t_max * HALT_SPEED)
            stop = (halt_N.detach().sigmoid() >= config.act_threshold) & (halted_at == config.t_max)
            halted_at = torch.where(stop, t, halted_at)
        return total, nats, {"act/mean_steps": halted_at.float().mean(), "token_accuracy": right_N.mean()}

    def after_step(self) -> None:
        """Bookkeeping after an optimizer step: move the halting teacher."""
        if self.config.t_max:
            self.recursion.update_teacher()

    def flops_per_token(self, context: int, steps: float | None = None) -> float:
        """Forward FLOPs per token at a context length, with a mean number of recursion steps."""
        return self.config.flops_per_token(context, steps)

    def attentions(self) -> list:
        """Every attention layer, for QK-Clip."""
        return [block.attn for block in self.blocks]
