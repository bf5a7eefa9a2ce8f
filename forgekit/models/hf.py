"""Both directions of the Hugging Face bridge: our models as transformers models, and theirs as ours.

``forge_model_class(family)`` wraps a family of the house for ``AutoModelForCausalLM``; :class:`HFCausalLM` wraps
a transformers causal model into :class:`forgekit.models.base.CausalLM`.

Shapes: B batch, T new tokens, P tokens so far (padding included), V vocabulary, N supervised positions.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from forgekit.config import Config
from forgekit.errors import ArtifactError
from forgekit.hub import first_line, forge_config_class
from forgekit.models.base import Loss, Output, mean_nats, supervised_positions
from forgekit.models.config import MODEL_CONFIGS
from forgekit.models.constants import IGNORE
from forgekit.models.io import build_model


class StateCache(Cache):
    """Our model state in the place where ``generate`` keeps its key-value cache."""

    def __init__(self, state: Any, length: int) -> None:
        super().__init__(layers=[])
        self.state, self.length = state, length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included."""
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.state = self.state.rows(indices)

    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        rows = torch.arange(self.state.position_B.shape[0], device=self.state.position_B.device)
        self.state = self.state.rows(rows.repeat_interleave(repeats))

    @property
    def is_compileable(self) -> bool:
        """The state changes shape as it grows."""
        return False

    @property
    def is_croppable(self) -> bool:
        """A recurrent memory cannot be taken back."""
        return False


class ForgeForCausalLM(PreTrainedModel, GenerationMixin):
    """A family of the house as a transformers model. Its tensors keep their names, so the folder is the same."""

    _is_stateful = True
    _supports_sdpa = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if getattr(config, "forge_quantization", None) is not None:
            what = "its weights are packed: transformers cannot run it"
            remedy = "open it with forgekit.models.io.read_model, or `agent-forge export` it --format hf"
            raise ArtifactError(what, where=str(config.name_or_path or "config.json"), remedy=remedy)
        core = build_model(MODEL_CONFIGS.get(config.model_type).build(config.forge, source="config.json"))
        # The children become ours under their own names; the core itself stays out of the tree, or every
        # tensor would be there twice.
        self.__dict__["core"] = core
        for name, child in core.named_children():
            self.add_module(name, child)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The core has initialised its parameters; buffers that are not stored start at zero in all our layers."""
        for name in module._non_persistent_buffers_set:
            getattr(module, name).zero_()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but exact (transformers itself refuses misshapen tensors).

        Raises:
            ArtifactError: a tensor is missing or surplus.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for kind in ("missing_keys", "unexpected_keys"):
            if info[kind]:
                raise ArtifactError(
                    f"{kind.replace('_', ' ')}: {', '.join(map(str, sorted(info[kind])[:3]))}",
                    where=str(model.name_or_path),
                    remedy="use the weights written with this config.json",
                )
        return (model, info) if output_loading_info else model

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward makes a StateCache

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding, which is also the output head."""
        return self.embedding.table

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Score every next token.

        Args:
            input_ids: (B, T) new tokens, padded on either side.
            attention_mask: (B, P + T), 0 at padding; positions count real tokens only.
            past_key_values: the cache of an earlier forward.
            labels: (B, T), *not* shifted, -100 where unsupervised. In training mode the loss is the family's own
                training objective, in eval mode the plain cross-entropy.
            use_cache: return a cache to go on from.
        """
        T = input_ids.shape[1]
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -T:].to(input_ids.device)
        # Our models take right-padded rows: bring the real tokens to the front, keeping their order.
        order = (real == 0).long().argsort(dim=1, stable=True)
        ids, lengths = input_ids.gather(1, order), real.sum(1)
        state = past_key_values.state if past_key_values is not None else None
        if state is None and use_cache:
            state = self.core.initial_state(input_ids.shape[0])
        out = self.core(ids, state, None if state is None or bool((lengths == T).all()) else lengths)
        loss = None if labels is None else self._loss(ids, labels.gather(1, order), lengths, out.logits)
        if out.state is not None:
            past = past_key_values.length if past_key_values is not None else 0
            past_key_values = StateCache(out.state, past + T)
        back = order.argsort(dim=1)
        logits = out.logits.gather(1, back[..., None].expand_as(out.logits))
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _loss(self, ids: Tensor, labels: Tensor, lengths: Tensor, logits: Tensor) -> Tensor:
        inside = torch.arange(labels.shape[1], device=labels.device) < lengths[:, None]
        shifted = F.pad(labels.masked_fill(~inside, IGNORE)[:, 1:], (0, 1), value=IGNORE)
        if self.training:
            return self.core.training_loss(ids, shifted).total
        return F.cross_entropy(logits.flatten(0, 1), shifted.flatten())


@cache
def forge_model_class(family: str) -> type[ForgeForCausalLM]:
    """The transformers model class of one of our families."""
    namespace = {
        "config_class": forge_config_class(family),
        "__module__": __name__,
        "__doc__": ForgeForCausalLM.__doc__,
    }
    return type("ForgeForCausalLM", (ForgeForCausalLM,), namespace)


class HFConfig(Config):
    """What the house needs to know about a transformers model."""

    family: Literal["hf"] = "hf"
    architecture: str
    """Its ``model_type`` in transformers."""
    vocab_size: int
    """Rows of the embedding table."""
    max_seq_len: int
    """Positions it was made for; 0 means that it names no limit."""
    d_model: int
    """Model width."""
    n_layers: int
    """Blocks."""


@dataclass
class HFState:
    """What a transformers model has seen: its cache, and the tokens behind it.

    Rows are left-padded, because that is what sliding-window caches of transformers understand.
    """

    cache: Cache
    ids_BP: Tensor
    real_BP: Tensor

    def rows(self, index: Tensor) -> HFState:
        """The same state for a subset (or repetition) of rows."""
        cache = fork(self.cache)
        cache.batch_select_indices(index)
        return HFState(cache, self.ids_BP[index], self.real_BP[index])


def fork(cache: Cache) -> Cache:
    """A cache to write to while the given one stays as it is. Keys and values grow by copying and are shared."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) if type(layer) in plain else copy.deepcopy(layer) for layer in cache.layers]
    return new


class HFCausalLM(nn.Module):
    """A transformers causal language model that follows the protocol of the house.

    Args:
        hf: any ``AutoModelForCausalLM``.
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf
        values = hf.config.get_text_config()
        self.config = HFConfig(
            architecture=hf.config.model_type,
            vocab_size=hf.get_input_embeddings().weight.shape[0],
            max_seq_len=getattr(values, "max_position_embeddings", None) or 0,
            d_model=values.hidden_size,
            n_layers=values.num_hidden_layers,
        )
        ends = hf.generation_config.eos_token_id
        self.end_ids = frozenset(ends if isinstance(ends, list) else [ends]) - {None}
        self._takes_positions = "position_ids" in inspect.signature(hf.forward).parameters

    @property
    def context_limit(self) -> int | None:
        """Most tokens a sequence may have; ``None`` without a limit."""
        return self.config.max_seq_len or None

    def initial_state(self, batch: int) -> HFState:
        """State before the first token of ``batch`` rows."""
        empty = torch.zeros(batch, 0, dtype=torch.long, device=self.hf.device)
        return HFState(DynamicCache(config=self.hf.config), empty, empty.bool())

    def forward(self, input_ids_BT: Tensor, state: HFState | None = None, lengths_B: Tensor | None = None) -> Output:
        """Score every next token. Arguments as :meth:`forgekit.models.gpt.GPT.forward`.

        Rows of different lengths are aligned anew and read from their beginning, so continue them token by token.
        """
        if state is None:
            return Output(self.hf(input_ids=input_ids_BT, use_cache=False).logits.float())
        B, T = input_ids_BT.shape
        ids_BP = torch.cat([state.ids_BP, input_ids_BT], dim=1)
        if lengths_B is None:
            real_BP = torch.cat([state.real_BP, torch.ones_like(input_ids_BT, dtype=torch.bool)], dim=1)
            return self._advance(HFState(fork(state.cache), ids_BP, real_BP), T)
        column = torch.arange(T, device=input_ids_BT.device)
        real_BP = torch.cat([state.real_BP, column < lengths_B[:, None]], dim=1)
        order = real_BP.long().argsort(dim=1, stable=True)[:, -int(real_BP.sum(1).max()) :]
        aligned = HFState(self.initial_state(B).cache, ids_BP.gather(1, order), real_BP.gather(1, order))
        out = self._advance(aligned, order.shape[1])
        # Back to right padding: row b's new tokens are the last lengths_b columns.
        pick = (order.shape[1] - lengths_B[:, None] + column).clamp(max=order.shape[1] - 1)
        out.logits = out.logits.gather(1, pick[..., None].expand(-1, -1, out.logits.shape[2]))
        return out

    def _advance(self, state: HFState, new: int) -> Output:
        """Run the last ``new`` columns, which the state's cache has not seen."""
        out = self.hf(**self._inputs(state, new), past_key_values=state.cache, use_cache=True)
        return Output(out.logits.float(), state)

    def _inputs(self, state: HFState, new: int) -> dict[str, Tensor]:
        """The last ``new`` columns as transformers takes them."""
        inputs = {"input_ids": state.ids_BP[:, -new:], "attention_mask": state.real_BP.long()}
        if self._takes_positions:
            inputs["position_ids"] = (state.real_BP.long().cumsum(1) - 1).clamp(min=0)[:, -new:]
        return inputs

    def features(
        self, input_ids_BT: Tensor, state: HFState | None = None, lengths_B: Tensor | None = None
    ) -> tuple[Tensor, HFState | None]:
        """Hidden states (B, T, D) before the output head, and the state after them.

        Raises:
            ValueError: rows of different lengths after a state; feed those row by row.
        """
        body = self.hf.base_model
        if state is None:
            return body(input_ids=input_ids_BT, use_cache=False).last_hidden_state, None
        if lengths_B is not None and bool((lengths_B != input_ids_BT.shape[1]).any()):
            raise ValueError("features of ragged rows cannot continue a state")
        ids_BP = torch.cat([state.ids_BP, input_ids_BT], dim=1)
        real_BP = torch.cat([state.real_BP, torch.ones_like(input_ids_BT, dtype=torch.bool)], dim=1)
        after = HFState(fork(state.cache), ids_BP, real_BP)
        inputs = self._inputs(after, input_ids_BT.shape[1])
        out = body(**inputs, past_key_values=after.cache, use_cache=True)
        return out.last_hidden_state, after

    def read_out(self, h: Tensor) -> Tensor:
        """Next-token scores (..., V) of the features (..., D) of :meth:`features`."""
        return self.hf.get_output_embeddings()(h).float()

    def training_loss(self, input_ids_BT: Tensor, labels_BT: Tensor) -> Loss:
        """Mean next-token cross-entropy over supervised positions (``labels`` are already shifted)."""
        pick = supervised_positions(labels_BT)
        logits_NV = self.hf(input_ids=input_ids_BT, use_cache=False).logits.flatten(0, 1)[pick]
        nats = mean_nats(logits_NV, labels_BT.reshape(-1)[pick])
        return Loss(nats, nats.detach(), pick.numel())

    def flops_per_token(self, context: int) -> float:
        """Forward FLOPs per token: two per weight met, plus the attention products over the whole context.

        An approximation: every expert of a sparse model counts, and a sliding window does not. A packed model costs
        what its plain one does.
        """
        from forgekit.quant.layers import TiedHead
        from forgekit.quant.model import logical_parameters

        weights = logical_parameters(self.hf)
        table, head = self.hf.get_input_embeddings(), self.hf.get_output_embeddings()
        tied = head is None or isinstance(head, TiedHead) or head.weight is table.weight
        if not tied:
            weights -= logical_parameters(table)  # a lookup costs nothing; tied, the table is the head and does
        return 2 * weights + 4 * self.config.n_layers * self.config.d_model * context

    def attentions(self) -> list:
        """No layers for QK-Clip: their weights are not laid out as ours."""
        return []

    def write_to(self, folder: Path) -> None:
        """Write ``config.json`` and safetensors weights in transformers' own layout."""
        self.hf.save_pretrained(str(folder))


def load_causal_lm(folder: Path) -> PreTrainedModel:
    """The transformers model in a folder, every tensor accounted for.

    Raises:
        ArtifactError: unknown architecture, missing or corrupt files, or weights that do not fit.
    """
    from transformers import AutoModelForCausalLM

    refused = (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError, SafetensorError)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (*refused, StrictDataclassError) as error:
        raise ArtifactError(
            f"not a loadable causal language model ({first_line(error)})",
            where=str(folder),
            remedy="give a complete Hugging Face folder with safetensors weights",
        ) from None
    if wrong := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise ArtifactError(
            f"{len(wrong)} tensors missing or misshapen, first {wrong[0]}",
            where=str(folder),
            remedy="use the weights written with this config.json",
        )
    return model
