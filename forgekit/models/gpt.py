"""The plain baseline: what every other family has to beat at equal tokens and parameters.

Shapes: B batch, T new tokens, D model width, V vocabulary, N supervised positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from forgekit.models.base import Loss, Output, mean_nats, supervised_positions
from forgekit.models.config import GPTConfig
from forgekit.models.layers import (
    Attention,
    AttentionShape,
    AttentionState,
    Embedding,
    FeedForward,
    RMSNorm,
    generating,
    select_rows,
)


@dataclass
class GPTState:
    """Where each row stands and what its layers remember."""

    position_B: Tensor
    layers: list[AttentionState]

    def rows(self, index: Tensor) -> GPTState:
        """The same state for a subset (or repetition) of rows."""
        return GPTState(self.position_B[index], [select_rows(layer, index) for layer in self.layers])


class Block(nn.Module):
    """Attention, then feed-forward, each on a normalised residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        conv = getattr(config, "conv", False)
        shape = AttentionShape(config.d_model, config.n_heads, config.window, config.rope_base, config.qk_norm, conv)
        self.norm1, self.norm2 = RMSNorm(config.d_model), RMSNorm(config.d_model)
        self.attn, self.ffn = Attention(shape), FeedForward(config.d_model, config.ffn_hidden)

    def forward(self, x_BTD, pos_BT, state, lengths_B, turn=None):
        out, state = self.attn(x_BTD, pos_BT, state, lengths_B, turn, self.norm1)
        x_BTD = x_BTD + out
        return x_BTD + self.ffn(x_BTD, self.norm2), state


class GPT(nn.Module):
    """A causal transformer with tied embeddings."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.d_model, config.emb_rank)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model)
        self.checkpoint_activations = False

    def initial_state(self, batch: int) -> GPTState:
        """State before the first token of ``batch`` rows."""
        device = next(self.parameters()).device
        position = torch.zeros(batch, dtype=torch.long, device=device)
        return GPTState(position, [block.attn.initial_state(batch, device) for block in self.blocks])

    def features(self, ids_BT: Tensor, state: GPTState | None, lengths_B: Tensor | None):
        """Normalised hidden states (B, T, D) and the state after each row's last real token."""
        pos_BT, lengths = positions(ids_BT, state, lengths_B)
        x_BTD = self.embedding.embed(ids_BT)
        turn = self.blocks[0].attn.turns(pos_BT)
        layers = []
        for i, block in enumerate(self.blocks):
            args = (x_BTD, pos_BT, state.layers[i] if state else None, lengths_B, turn)
            if self.checkpoint_activations and self.training:
                x_BTD, layer = checkpoint(block, *args, use_reentrant=False)
            else:
                x_BTD, layer = block(*args)
            layers.append(layer)
        after = GPTState(state.position_B + lengths, layers) if state else None
        return (self.norm.one_token(x_BTD) if generating(x_BTD, state, lengths_B) else self.norm(x_BTD)), after

    def forward(self, input_ids_BT: Tensor, state: GPTState | None = None, lengths_B: Tensor | None = None) -> Output:
        """Score every next token. Give ``initial_state(B)`` to get a state back.

        Args:
            input_ids_BT: token ids, right-padded where rows differ in length.
            state: state after the tokens already seen.
            lengths_B: real tokens per row; needed when rows are padded and a state is kept.
        """
        h_BTD, state = self.features(input_ids_BT, state, lengths_B)
        return Output(self.embedding.unembed(h_BTD).float(), state)

    def read_out(self, h: Tensor) -> Tensor:
        """Next-token scores (..., V) of the features (..., D) of :meth:`features`."""
        return self.embedding.unembed(h).float()

    def score_at(self, input_ids_BT: Tensor, at_N: Tensor) -> Output:
        """As ``forward`` without a state, but only the flat positions ``at_N`` pay for the head; logits are (N, V)."""
        h_BTD, _ = self.features(input_ids_BT, None, None)
        return Output(self.embedding.unembed(h_BTD.flatten(0, 1)[at_N]).float())

    def training_loss(self, input_ids_BT: Tensor, labels_BT: Tensor) -> Loss:
        """Mean next-token cross-entropy over supervised positions (``labels`` are already shifted)."""
        h_BTD, _ = self.features(input_ids_BT, None, None)
        pick = supervised_positions(labels_BT)
        logits_NV = self.embedding.unembed(h_BTD.flatten(0, 1)[pick])
        nats = mean_nats(logits_NV, labels_BT.reshape(-1)[pick])
        return Loss(nats, nats.detach(), pick.numel())

    def flops_per_token(self, context: int) -> float:
        """Forward FLOPs per token at a context length."""
        return self.config.flops_per_token(context)

    def attentions(self) -> list[Attention]:
        """Every attention layer, for QK-Clip."""
        return [block.attn for block in self.blocks]


def positions(ids_BT: Tensor, state, lengths_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """Absolute positions (B, T) of the new tokens, and how many of them are real per row (B,)."""
    B, T = ids_BT.shape
    step = torch.arange(T, device=ids_BT.device).expand(B, T)
    lengths = torch.full((B,), T, device=ids_BT.device) if lengths_B is None else lengths_B
    return (step if state is None else state.position_B[:, None] + step), lengths
