"""The two sides of baking: a context with the prompt before it, and the same context without.

The unprompted side must really be unprompted: chat templates of Hugging Face tokenizers may put a system prompt of
their own where none is given. That is found by rendering, told, and answered with an explicit empty system message.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any

from forgekit.data.tokenizer import ASSISTANT
from forgekit.errors import ArtifactError, ConfigError, DataError
from forgekit.infer.chat import conversation_ids

# Words that no template holds.
_ASKED, _TOLD = "zqaskedqz", "zqtoldqz"
_ROLES = {"system", "user", "assistant", "model", "human", "ai", "bot"}


@dataclass(frozen=True)
class Sides:
    """How a model is asked, with a prompt and without.

    Attributes:
        tokenizer: the model's.
        limit: most tokens that context, answer and prompt may have together; 0 is none.
        system: the prompt is a system message; else it stands at the beginning of the question.
        empty: without a prompt an empty system message is given, because the template would put in its own.
        notes: what a user should know, one line each.
    """

    tokenizer: Any
    limit: int
    system: bool = True
    empty: bool = False
    notes: tuple[str, ...] = ()

    def ids(self, context: str, prompt: str = "") -> list[int]:
        """Token ids of a context with the answer opened; an empty prompt is the unprompted side."""
        if prompt and not self.system:
            return conversation_ids(self.tokenizer, [_message("user", f"{prompt}\n\n{context}")])
        first = [_message("system", prompt)] if prompt or self.empty else []
        return conversation_ids(self.tokenizer, [*first, _message("user", context)])

    def check(self, prompt: str, contexts: list[str], max_tokens: int) -> None:
        """Make sure that prompt, every context and an answer fit together.

        Raises:
            ConfigError: the prompt is empty.
            DataError: they are longer than the model's context.
        """
        if not prompt.strip():
            raise ConfigError("is empty", where="prompt", remedy="give the text to bake")
        if not self.limit:
            return
        alone = len(self.ids("", prompt))
        for context in contexts:
            size = len(self.ids(context, prompt))
            if size + max_tokens > self.limit:
                what = f"{alone} tokens, with the context {context[:40]!r} {size}, and max_tokens {max_tokens}"
                remedy = "shorten the prompt or the contexts, or lower max_tokens"
                raise DataError(f"{what}: more than the model's {self.limit}", where="prompt", remedy=remedy)


def sides_of(model: Any, tokenizer: Any) -> Sides:
    """How this model is asked.

    Raises:
        ArtifactError: its chat template puts in a system prompt that cannot be left out.
    """
    limit = getattr(model, "context_limit", None) or getattr(model.config, "max_seq_len", 0)
    if not getattr(tokenizer, "chat_text", None):
        if tokenizer.token_to_id(ASSISTANT) is not None:
            return Sides(tokenizer, limit)
        return _plain(tokenizer, limit)
    bare = tokenizer.chat_text([_message("user", _ASKED)])
    if bare is None:
        return _plain(tokenizer, limit)
    told = _rendered(tokenizer, _TOLD)
    if told is None or _TOLD not in told:
        note = "the chat template takes no system message: the prompt stands at the beginning of the question"
        return Sides(tokenizer, limit, system=False, notes=(note,))
    injected = _surplus(tokenizer, bare, told)
    if not injected:
        return Sides(tokenizer, limit)
    empty = _rendered(tokenizer, "")
    if empty is None or _surplus(tokenizer, empty, told):
        what = f"its chat template always puts in the system prompt {injected[:120]!r}: no side would be unprompted"
        raise ArtifactError(what, where="chat_template", remedy="take that default out of chat_template")
    note = f"the chat template puts in a system prompt of its own, {injected[:200]!r}; baked against an empty one"
    return Sides(tokenizer, limit, empty=True, notes=(note,))


def _plain(tokenizer: Any, limit: int) -> Sides:
    note = "the model has no chat format: prompt and question are plain text, a blank line between them"
    return Sides(tokenizer, limit, notes=(note,))


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _rendered(tokenizer: Any, system: str) -> str | None:
    """The conversation with a system message; None where the template refuses one."""
    from jinja2 import TemplateError

    try:
        return tokenizer.chat_text([_message("system", system), _message("user", _ASKED)])
    except TemplateError:
        return None


def _surplus(tokenizer: Any, text: str, told: str) -> str:
    """Words in ``text`` that the conversation with an explicit system message has not: somebody else's prompt.

    Words on both sides (a date, a frame) are on both sides of baking too, and cancel out.
    """
    mine, theirs = _words(tokenizer, text), _words(tokenizer, told)
    match = difflib.SequenceMatcher(None, theirs, mine, autojunk=False)
    found = [mine[j] for op, _, _, start, end in match.get_opcodes() if op in ("insert", "replace")
             for j in range(start, end)]  # fmt: skip
    return " ".join(found)


def _words(tokenizer: Any, text: str) -> list[str]:
    """Words besides special tokens, role names and what was put in."""
    special = sorted((t.content for t in tokenizer.get_added_tokens_decoder().values()), key=len, reverse=True)
    special += list(tokenizer.fast.all_special_tokens)
    for token in filter(None, (*special, _ASKED, _TOLD)):
        text = text.replace(token, " ")
    words = re.findall(r"\S+", text)
    return [word for word in words if re.search(r"\w", word) and word.lower().strip(":<>[]|#") not in _ROLES]
