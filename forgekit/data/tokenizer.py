"""The tokenizer that phase 1 trains and no later phase resizes.

Byte-level BPE (every text can be written and read back exactly) with single-token digits and a block of
reserved tokens: chat, thinking, tools, and spare slots. The ids of the reserved tokens are the same in every
tokenizer the Forge makes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from forgekit.errors import ArtifactError, ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, END = "<|pad|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
TOOL_CALL, TOOL_RESULT = "<|tool_call|>", "<|tool_result|>"
THINKING = ("<think>", "</think>", "<step>", "<reason>", "<mece>", "<falsify>", "<expert>", "<doubt>")
SPARE = tuple(f"<|spare_{i}|>" for i in range(17))
RESERVED = (PAD, END, SYSTEM, USER, ASSISTANT, TOOL_CALL, TOOL_RESULT, *THINKING, *SPARE)
SMALLEST_VOCABULARY = 256 + len(RESERVED)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on ``texts``.

    Args:
        texts: training texts.
        vocab_size: rows of the vocabulary, bytes and reserved tokens included.

    Raises:
        ConfigError: the vocabulary cannot hold all bytes and reserved tokens.
        DataError: the texts are too few to fill the vocabulary.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(f"{vocab_size} is too small", where="vocab_size", remedy=f"use {SMALLEST_VOCABULARY} or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in RESERVED],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise DataError(
            f"the text fills only {tokenizer.get_vocab_size()} of {vocab_size} tokens",
            where="tokenizer",
            remedy="give more text or lower vocab_size",
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and what ``AutoTokenizer.from_pretrained`` needs beside it."""
    # Not the library's own save: it tells a full disk by a bare Exception.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read ``tokenizer.json`` from an artifact folder.

    Raises:
        ArtifactError: missing or corrupt.
    """
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ArtifactError("no tokenizer here", where=str(path), remedy="use a complete artifact folder")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  the library raises bare Exception for any malformed file
        raise ArtifactError(f"corrupt ({str(error)[:80]})", where=str(path), remedy="restore the artifact") from None


def chat_text(messages: Iterable[dict[str, str]], generate: bool = False) -> str:
    """Write messages (role, content) in the house's chat format; ``generate`` opens the answer."""
    text = "".join(f"<|{m['role']}|>{m['content']}{END}" for m in messages)
    return text + ASSISTANT if generate else text


def question(prompt: str) -> str:
    """A single user turn with the answer opened."""
    return chat_text([{"role": "user", "content": prompt}], generate=True)


def in_pieces(text: str, size: int = 100_000) -> Iterator[str]:
    """Cut a long text so that encoding stays parallel and its memory small."""
    for start in range(0, len(text), size):
        yield text[start : start + size]
