"""A conversation with a model: history, format and settings. What is printed is the caller's business."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from forgekit.data.tokenizer import ASSISTANT, chat_text
from forgekit.errors import ConfigError
from forgekit.infer.engine import Engine, Session
from forgekit.infer.sampling import GREEDY, SamplingConfig
from forgekit.infer.thinking import Said, answers

Message = dict[str, str]


def conversation_ids(tokenizer: Any, messages: list[Message], thinking: str = "auto") -> list[int]:
    """Token ids of a conversation with the answer opened.

    A tokenizer with a chat template of its own uses it, the house's tokenizers the house format; without either
    the messages are plain text, a blank line between them.

    Args:
        tokenizer: the model's.
        messages: what was said, in order.
        thinking: as in :class:`SamplingConfig`; "on" and "off" are told to templates, of which some read
            ``enable_thinking``.
    """
    text = _own_format(tokenizer, messages, thinking)
    if text is None and tokenizer.token_to_id(ASSISTANT) is not None:
        text = chat_text(messages, generate=True)
    if text is None:
        return tokenizer.encode("\n\n".join(m["content"] for m in messages) + "\n\n").ids
    return tokenizer.encode(text, add_special_tokens=False).ids


def _own_format(tokenizer: Any, messages: list[Message], thinking: str) -> str | None:
    """The conversation by the tokenizer's own template, if it has one."""
    if thinking != "auto" and getattr(getattr(tokenizer, "fast", None), "chat_template", None):
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking == "on"}
        return tokenizer.fast.apply_chat_template(messages, **options)
    render = getattr(tokenizer, "chat_text", None)
    return render(messages) if render else None


class Chat:
    """Talk to a model, turn by turn.

    Args:
        engine: what answers.
        config: sampling and stopping; turn n draws with ``seed + n``.
        remember: show the model the earlier turns. By default models of the Forge, which were trained on
            single user turns, see only the last question, and others see everything.
        system: a system message that stands before what is seen; empty is none.
    """

    def __init__(
        self, engine: Engine, config: SamplingConfig = GREEDY, remember: bool | None = None, system: str = ""
    ) -> None:
        self.engine, self.config, self.system = engine, config, system
        self.remember = hasattr(engine.tokenizer, "chat_text") if remember is None else remember
        self.reset()

    def reset(self) -> None:
        """Forget the conversation; the system message stays."""
        self.messages: list[Message] = []
        self.session = Session(self.engine)

    def say(self, text: str) -> Iterator[str]:
        """Ask, and get the answer in pieces; both enter the history when the answer ends (or is cut off).

        Raises:
            ForgeError: the conversation no longer fits the model's context; the history stays as it was.
        """
        return answers(self.speak(text))

    def speak(self, text: str) -> Iterator[Said]:
        """As :meth:`say`, with the pieces of the thought before the answer; thoughts do not enter the history."""
        message = {"role": "user", "content": text}
        first = [{"role": "system", "content": self.system}] if self.system else []
        seen = [*first, *(self.messages if self.remember else ()), message]
        config = self.config.replace(seed=self.config.seed + len(self.messages) // 2)
        ids = conversation_ids(self.engine.tokenizer, seen, config.thinking)
        return self._answer(message, self.session.speak(ids, config))

    def _answer(self, message: Message, pieces: Iterator[Said]) -> Iterator[Said]:
        answer = ""
        try:
            for piece in pieces:
                answer += "" if piece.thought else piece.text
                yield piece
        finally:
            self.messages += [message, {"role": "assistant", "content": answer}]

    def set_params(self, text: str) -> SamplingConfig:
        """Change settings, written as ``temperature=0.7 top_k=20``; ``stop`` takes one string, or nothing.

        Raises:
            ConfigError: not name=value, an unknown name (the nearest is given) or a refused value.
        """
        changes: dict[str, Any] = {}
        try:
            parts = shlex.split(text)
        except ValueError as error:
            raise ConfigError(f"{text!r}: {error}", where="chat", remedy="close the quotation") from None
        for part in parts:
            name, equals, value = part.partition("=")
            if not equals:
                raise ConfigError(f"{part!r} is not name=value", where="chat", remedy="write temperature=0.7 top_k=20")
            changes[name] = ((value,) if value else ()) if name == "stop" else value
        self.config = SamplingConfig.build({**self.config.model_dump(), **changes}, source="chat")
        return self.config
