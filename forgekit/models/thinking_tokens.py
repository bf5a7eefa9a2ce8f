"""The eight thinking tokens for any model: checked, added where they are missing, and given rows to start from.

Tokenizers of the house hold them as reserved tokens from the start, but no earlier phase shows them to the model: their
rows have learned nothing except that they never come next. Hugging Face tokenizers mostly lack them. Either way a row
starts from the rows of words that say what the token means, as in Quiet-STaR, which starts its markers from a word's
embedding (Zelikman et al., 2403.09629, section 4.3), and noise keeps any two apart.

Shapes: V vocabulary, D width of the table (its rank where it is factorised), E the eight tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from forgekit.data.batches import asked
from forgekit.data.tokenizer import SPARE, THINKING
from forgekit.errors import ArtifactError

MEANINGS: Mapping[str, str] = dict(
    zip(THINKING, ("think", "answer", "then", "because", "all", "not", "as", "but"), strict=True)
)
"""The word that each token starts from."""
NOISE = 0.1
"""Standard deviation of the noise on a new row, as a part of the table's."""
APART = 1.5
"""A row that lies more than this many times as far from the spare rows' middle as any of them has been trained.

On the artifacts of two nano runs (trunk, three specialists, champion) the thinking tokens lie within 1.0 times that
distance; started from words they lie beyond 7, and left as they were and trained on traces, beyond 1.4 after 20 steps.
"""
SAMPLE = 8192
"""Rows of a large table that its standard deviation is taken from."""


@dataclass(frozen=True)
class ThinkingTokens:
    """What :func:`prepare_thinking` found and did.

    Attributes:
        added: tokens that the tokenizer did not have.
        ids: id of every thinking token.
        initialised: tokens whose rows were set.
        notes: sentences for people.
    """

    added: tuple[str, ...]
    ids: dict[str, int]
    initialised: tuple[str, ...]
    notes: tuple[str, ...]


def prepare_thinking(model: nn.Module, tokenizer: Any, seed: int, fresh: bool | None = None) -> ThinkingTokens:
    """Give a model and its tokenizer the thinking tokens, in place. Call it before an optimizer is made.

    Nothing is changed if it raises.

    Args:
        model: of the house, or a wrapped Hugging Face model; its table (and a head of its own) may be replaced by a
            larger one, and ``config.vocab_size`` follows.
        tokenizer: the model's; missing tokens are added to a Hugging Face one.
        seed: decides the noise.
        fresh: whether the tokens that are already there have rows to be set too. Unless given, it is measured for
            tokenizers of the house (:func:`untrained`), and rows of other models are taken as learned.

    Raises:
        ArtifactError: a thinking token has another meaning here, or the model has no row for it and cannot get one.
    """
    theirs = hasattr(tokenizer, "fast")
    missing = tuple(token for token in THINKING if not _present(model, tokenizer, token))
    if missing and not theirs:
        remedy = "use a tokenizer that the Forge trained, or a Hugging Face one"
        raise ArtifactError(f"has no {missing[0]}", where="tokenizer", remedy=remedy)
    notes, rows = [], len(_table(model).weight)
    if missing:
        _add(tokenizer, missing)
        notes.append(f"added {' '.join(missing)} to the tokenizer")
    ids = {token: tokenizer.token_to_id(token) for token in THINKING}
    notes += _resize(model, max(ids.values()) + 1, seed)
    blank = THINKING if fresh else untrained(model, tokenizer) if fresh is None else ()
    chosen = tuple(t for t in THINKING if t in missing or ids[t] >= rows or t in blank)
    _initialise(model, tokenizer, chosen, seed)
    if chosen:
        notes.append(f"{len(chosen)} rows start from words: {', '.join(f'{t} {MEANINGS[t]}' for t in chosen)}")
    if kept := [token for token in THINKING if token not in chosen]:
        notes.append(f"left as they were: {' '.join(kept)}")
    return ThinkingTokens(missing, ids, chosen, (*notes, *_remarks(tokenizer)))


def has_chat_format(tokenizer: Any) -> bool:
    """Whether questions can be put to the model as a chat: always in the house, with a template elsewhere."""
    return bool(tokenizer.fast.chat_template) if hasattr(tokenizer, "fast") else True


def untrained(model: nn.Module, tokenizer: Any) -> frozenset[str]:
    """Thinking tokens of a house tokenizer whose rows were never trained; empty for any other tokenizer."""
    silent = _silent(model, tokenizer)
    return frozenset(token for token in THINKING if tokenizer.token_to_id(token) in silent)


@torch.no_grad()
def _silent(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Ids of the rows that were never trained; empty where that cannot be measured.

    The house's spare tokens occur nowhere: their rows have only been pushed away from what comes next, all in one
    direction. A row that has seen no more than they have lies among them, and any other far off.
    """
    spare = [tokenizer.token_to_id(token) for token in SPARE]
    if hasattr(tokenizer, "fast") or None in spare:
        return frozenset()
    rows_VD = _table(model).weight.float()
    far_V = (rows_VD - rows_VD[spare].mean(0)).norm(dim=1)
    return frozenset((far_V <= APART * far_V[spare].max()).nonzero().flatten().tolist())


def _present(model: nn.Module, tokenizer: Any, token: str) -> bool:
    """Whether the tokenizer has a thinking token, as one.

    Raises:
        ArtifactError: it has it as something else.
    """
    index = tokenizer.token_to_id(token)
    if index is None:
        return False
    remedy = "rename it in the tokenizer, or use another model"
    names = getattr(getattr(tokenizer, "fast", None), "special_tokens_map", {})
    for name, value in names.items():
        if name != "extra_special_tokens" and value == token:
            raise ArtifactError(f"{token} is the model's {name}", where="tokenizer", remedy=remedy)
    if index in getattr(model, "end_ids", ()):
        raise ArtifactError(f"{token} ends the model's texts", where="generation_config", remedy=remedy)
    if index not in tokenizer.get_added_tokens_decoder():
        what = f"{token} is an ordinary entry of the vocabulary (id {index})"
        raise ArtifactError(what, where="tokenizer", remedy=remedy)
    if index not in tokenizer.encode(f"1{token}1", add_special_tokens=False).ids:
        remedy = "make it an added token that is matched anywhere, as it is written"
        raise ArtifactError(f"{token} is not read as one token inside a text", where="tokenizer", remedy=remedy)
    return True


def _add(tokenizer: Any, tokens: tuple[str, ...]) -> None:
    """Add tokens that are matched exactly, take no blanks from their neighbours, and are hidden with the special."""
    from tokenizers import AddedToken

    new = [AddedToken(token, special=True, normalized=False, lstrip=False, rstrip=False) for token in tokens]
    tokenizer.fast.add_special_tokens({"extra_special_tokens": new}, replace_extra_special_tokens=False)


def _table(model: nn.Module) -> nn.Module:
    return model.hf.get_input_embeddings() if hasattr(model, "hf") else model.embedding.table


def _resize(model: nn.Module, needed: int, seed: int) -> list[str]:
    """Make the table (and a head of its own) large enough; what was done, in words."""
    rows = _table(model).weight.shape[0]
    if needed <= rows:
        return []
    if not hasattr(model, "hf"):
        what = f"{rows} rows are too few for token {needed - 1} of its tokenizer"
        raise ArtifactError(what, where="embedding", remedy="use the tokenizer that was written with the model")
    # Rows between the old end and ours can only belong to tokens the model never had; the library draws them.
    device = _table(model).weight.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        model.hf.resize_token_embeddings(needed, mean_resizing=False)
    model.config = model.config.replace(vocab_size=needed)
    return [f"the vocabulary grew from {rows} to {needed} rows"]


@torch.no_grad()
def _initialise(model: nn.Module, tokenizer: Any, tokens: tuple[str, ...], seed: int) -> None:
    """Set the tokens' rows in the table and, where it has its own, in the head."""
    blank = _silent(model, tokenizer) | {tokenizer.token_to_id(token) for token in tokens}
    generator = torch.Generator().manual_seed(seed)
    for rows_VD in _matrices(model):
        deviation = rows_VD[:: max(1, len(rows_VD) // SAMPLE)].float().std().cpu()
        # All eight are drawn whatever is used, so that a token's noise does not depend on the others.
        noise_ED = torch.randn(len(THINKING), rows_VD.shape[1], generator=generator) * NOISE * deviation
        for token in tokens:
            middle_D = rows_VD[_pieces(tokenizer, MEANINGS[token], blank)].float().mean(0)
            new_D = middle_D + noise_ED[THINKING.index(token)].to(middle_D.device)
            rows_VD[tokenizer.token_to_id(token)] = new_D.to(rows_VD.dtype)


def _matrices(model: nn.Module) -> list[Tensor]:
    """Everything with a row per token, views into the parameters: (V, D), a head's bias as (V, 1)."""
    table = _table(model).weight
    head = model.hf.get_output_embeddings() if hasattr(model, "hf") else None
    own = [table]
    if head is not None and head.weight is not table:
        own.append(head.weight)
    if head is not None and getattr(head, "bias", None) is not None:
        own.append(head.bias[:, None])
    return own


def _pieces(tokenizer: Any, word: str, without: frozenset[int]) -> list[int]:
    """Ids of a word, written with or without a blank before it, whichever takes fewer tokens."""
    ways = [tokenizer.encode(text, add_special_tokens=False).ids for text in (f" {word}", word)]
    shortest = min(ways, key=len)
    return [i for i in shortest if i not in without] or shortest


def _remarks(tokenizer: Any) -> list[str]:
    """What people should know about this tokenizer."""
    notes = []
    if not has_chat_format(tokenizer):
        notes.append("it has no chat template: questions are put as plain text, a line break after them")
    elif THINKING[0] in (put := asked(tokenizer, "hello")):
        notes.append(f"its chat template opens a thought itself ({put[-30:]!r})")
    added = tokenizer.get_added_tokens_decoder()
    if shown := [token for token in THINKING if not added[tokenizer.token_to_id(token)].special]:
        notes.append(f"not special, so not hidden where special tokens are left out: {' '.join(shown)}")
    trial = f"{THINKING[0]}{THINKING[2]}8+5=13{THINKING[1]}63"
    back = tokenizer.decode(tokenizer.encode(trial, add_special_tokens=False).ids, skip_special_tokens=False)
    if back != trial:
        notes.append(f"its tokenizer does not give texts back exactly: {trial!r} becomes {back!r}")
    return notes
