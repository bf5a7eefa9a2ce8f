"""Configurations of our model families and the arithmetic of their cost. No torch here: plans need it fast."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from forgekit.config import Config
from forgekit.registry import Registry

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]

CONV_TAPS = 4


class GPTConfig(Config):
    """The plain baseline: a pre-norm transformer with the attention of ``trm_titans`` and nothing else."""

    family: Literal["gpt"] = "gpt"
    vocab_size: Positive = 1024
    """Rows of the embedding table."""
    d_model: Positive = 128
    """Model width."""
    n_layers: Positive = 3
    """Transformer blocks."""
    n_heads: Positive = 4
    """Attention heads; must divide d_model into even widths."""
    ffn_hidden: Positive = 512
    """Feed-forward width."""
    window: Annotated[int, Field(ge=0)] = 0
    """Attention window in tokens, the token itself included; 0 sees everything."""
    emb_rank: Annotated[int, Field(ge=0)] = 0
    """Rank of the factorised embedding; 0 is not factorised."""
    max_seq_len: Positive = 256
    """Longest training sequence in tokens."""
    rope_base: Annotated[float, Field(gt=1)] = 10000.0
    """Base of the rotary frequencies."""
    qk_norm: bool = True
    """Normalise queries and keys (learned temperature per head)."""

    @model_validator(mode="after")
    def _heads_fit(self):
        if self.d_model % (2 * self.n_heads):
            raise ValueError(f"d_model {self.d_model} must be a multiple of 2 * n_heads = {2 * self.n_heads}")
        if self.emb_rank >= self.d_model:
            raise ValueError(f"emb_rank {self.emb_rank} must be below d_model {self.d_model} (0 switches it off)")
        return self

    @property
    def reach(self) -> int:
        """Tokens back that attention alone can see through all layers; 0 means everything."""
        return self.n_layers * (self.window - 1) if self.window else 0

    def split(self) -> dict[str, int]:
        """Parameters by part."""
        d, r = self.d_model, self.emb_rank
        block = 4 * d * d + (self.n_heads if self.qk_norm else 0) + 2 * d * self.ffn_hidden + 2 * d
        embedding = self.vocab_size * (r or d) + (2 * d * r if r else 0)
        return {"embedding": embedding, "blocks": self.n_layers * block + d}

    def parameters(self) -> int:
        """Trainable parameters, by formula (a test holds it to the real model)."""
        return sum(self.split().values())

    def flops_per_token(self, context: int) -> float:
        """Forward FLOPs per token at a context length: two per weight met, plus the attention products."""
        seen = min(context, self.window or context)
        head = 2 * (self.vocab_size * (self.emb_rank or self.d_model) + 2 * self.d_model * self.emb_rank)
        body = self.n_layers * (4 * self.d_model**2 + 2 * self.d_model * self.ffn_hidden)
        return 2 * body + head + self.n_layers * 4 * self.d_model * seen

    def head_flops(self) -> float:
        """Forward FLOPs of the output head per token."""
        return 2 * (self.vocab_size * (self.emb_rank or self.d_model) + self.d_model * self.emb_rank)

    def train_flops_per_token(self, context: int, supervised: float) -> float:
        """FLOPs of a training step per input token: forward and twice that backward.

        Args:
            context: tokens per row.
            supervised: share of the tokens that carry a label; only those pass the head.
        """
        return 3 * (self.flops_per_token(context) - (1 - supervised) * self.head_flops())


class TRMTitansConfig(GPTConfig):
    """Sliding-window attention with a neural long-term memory (Titans, gated) and a recursive refinement (TRM)."""

    family: Literal["trm_titans"] = "trm_titans"
    window: Positive = 32
    """Attention window in tokens, the token itself included."""
    memory: Literal["titans", "decay", "none"] = "titans"
    """Long-term memory: gradient-trained fast weights, a constant decay, or nothing."""
    memory_layers: tuple[int, ...] = (1,)
    """Blocks that own a memory."""
    conv: bool = True
    """Mix each query, key and value with its three predecessors (a short convolution)."""
    d_mem: Positive = 64
    """Memory width over all memory heads (the specification: d_model / 2)."""
    memory_heads: Positive = 2
    """Memory heads; must divide d_mem."""
    memory_chunk: Positive = 32
    """Tokens per parallel chunk; speed only, never the result."""
    memory_capacity: Positive = 4096
    """Horizon in tokens: forgetting never falls below 1/capacity per token."""
    surprise_weight: Share = 0.5
    """How strongly an error is written; 0.5 is neutral."""
    novelty_weight: Share = 0.5
    """How readily old content makes room; 0.5 is neutral."""
    gate_hidden: Positive = 32
    """Hidden width of the gate through which the memory is heard."""
    gate_entropy: Annotated[float, Field(ge=0)] = 0.001
    """Weight of the entropy bonus that keeps the gate from saturating."""
    t_max: Annotated[int, Field(ge=0)] = 0
    """Recursion steps at most; 0 does without (and without halting). No shape depends on it: a child may recurse
    where its parent did not."""
    micro_steps: Positive = 1
    """Latent refinements per recursion step."""
    trm_hidden: Annotated[int, Field(ge=0)] = 32
    """Hidden width of the two recursion networks; 0 leaves them out."""
    step_decay: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Deep supervision: step t of T weighs step_decay ** (T - t), normalised."""
    detach_steps: bool = True
    """Cut gradients between recursion steps."""
    act_threshold: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Halt when the estimated chance of being right reaches this."""
    act_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the halting loss."""
    act_ema: Annotated[float, Field(ge=0, lt=1)] = 0.98
    """Decay of the averaged halting head (the teacher) that decides when generating."""

    @model_validator(mode="after")
    def _memory_fits(self):
        if self.d_mem % self.memory_heads:
            raise ValueError(f"d_mem {self.d_mem} must be a multiple of memory_heads {self.memory_heads}")
        if self.t_max and not self.trm_hidden:
            raise ValueError(f"t_max {self.t_max} needs recursion networks: set trm_hidden above 0, or t_max to 0")
        if self.memory != "none" and any(not 0 <= i < self.n_layers for i in self.memory_layers):
            raise ValueError(f"memory_layers {self.memory_layers} must lie in 0..{self.n_layers - 1}")
        return self

    @property
    def reach(self) -> int:
        """Tokens back that attention and the short convolutions can see through all layers."""
        return self.n_layers * (self.window - 1 + (CONV_TAPS - 1) * self.conv)

    @property
    def memories(self) -> tuple[int, ...]:
        """Blocks that really own a memory."""
        return () if self.memory == "none" else self.memory_layers

    def _memory_parameters(self) -> int:
        d, m = self.d_model, self.d_mem
        if self.memory == "decay":
            core = 2 * d * m + m
        else:
            core = 3 * d * m + 3 * m * CONV_TAPS + 3 * self.memory_heads * (d + 1) + m // self.memory_heads + m * d
        gate = d * self.gate_hidden + self.gate_hidden * d + d + 2 * d
        return core + gate

    def split(self) -> dict[str, int]:
        """Parameters by part."""
        d = self.d_model
        parts = super().split()
        parts["blocks"] += self.n_layers * 3 * d * CONV_TAPS * self.conv
        recursion = 4 * d * self.trm_hidden + 2 * d + d + (d + 1)
        memory = len(self.memories) * self._memory_parameters()
        return {**parts, "memory": memory, "recursion": recursion if self.trm_hidden else 0}

    def flops_per_token(self, context: int, steps: float | None = None) -> float:
        """Forward FLOPs per token with ``steps`` recursion steps (all of them unless given)."""
        steps = self.t_max if steps is None else steps
        k, c = self.d_mem // self.memory_heads, self.memory_chunk
        # Per token and head: three K x K products, one outer product, and the chunk's couplings.
        core = self.memory_heads * (8 * k * k + 8 * c * k + 2 * c * c) if self.memory == "titans" else 0
        memory = len(self.memories) * (2 * self._memory_parameters() + core)
        conv = 2 * self.n_layers * 3 * self.d_model * CONV_TAPS * self.conv
        return super().flops_per_token(context) + conv + memory + steps * self.step_flops()

    def step_flops(self) -> float:
        """Forward FLOPs of one recursion step per token, without the head."""
        return 4 * self.d_model * self.trm_hidden * (self.micro_steps + 1) + 2 * self.d_model

    def train_flops_per_token(self, context: int, supervised: float) -> float:
        """As for the plain family; deep supervision runs recursion and head ``t_max`` times where there is a label."""
        body = self.flops_per_token(context, steps=0) - self.head_flops()
        each = self.step_flops() + self.head_flops() if self.t_max else 0.0
        return 3 * (body + supervised * (self.t_max * each if self.t_max else self.head_flops()))


MODEL_CONFIGS = Registry("model_config")
MODEL_CONFIGS.register("gpt")(GPTConfig)
MODEL_CONFIGS.register("trm_titans")(TRMTitansConfig)

FAMILIES = Registry("model_family")
FAMILIES.lazy("gpt", "forgekit.models.gpt:GPT")
FAMILIES.lazy("trm_titans", "forgekit.models.trm_titans:TRMTitans")
