"""What requests and answers look like: OpenAI's shapes for ``/v1/completions`` and ``/v1/chat/completions``.

Requests are checked like every configuration of the house: a wrong field is named, with the remedy. Fields that
cannot change the answer are ignored. Fields that would change it and are not offered are refused unless they ask for
nothing, because an answer that quietly passes over them would be wrong.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

from forgekit.config import Config
from forgekit.errors import ConfigError, ForgeError
from forgekit.infer.batcher import Piece, Score
from forgekit.infer.engine import Generation
from forgekit.infer.sampling import SamplingConfig
from forgekit.infer.text import UNFINISHED

MOST_PROMPTS = 16
"""Prompts in one request at most."""
IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)
"""Fields that do not change the answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
"""Fields that are not offered, and the values that ask for nothing."""
COLDEST = 1e-4
"""Below this temperature the likeliest token is always taken: nothing else has a chance that a float can tell."""
FINISH = {"stop": "stop", "length": "length", "context": "length"}
"""OpenAI has no word of its own for a full context."""
EFFORT = {"minimal": (1, 8), "low": (1, 4), "medium": (1, 2), "high": (3, 4)}
"""The part of max_tokens that each reasoning_effort lets a thought have; "none" is no thought."""
CODES = {
    400: ("invalid_request_error", "invalid_value"),
    403: ("invalid_request_error", "forbidden"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    411: ("invalid_request_error", "length_required"),
    413: ("invalid_request_error", "body_too_large"),
    414: ("invalid_request_error", "path_too_long"),
    415: ("invalid_request_error", "unsupported_media_type"),
    429: ("rate_limit_error", "queue_full"),
    431: ("invalid_request_error", "headers_too_large"),
    503: ("server_error", "unavailable"),
    504: ("server_error", "time_limit"),
}
"""Type and code of an error by its HTTP status; every other status is an error of the server's own."""


class ApiError(ForgeError):
    """A refusal with its HTTP status, in OpenAI's shape.

    Args:
        status: HTTP status.
        what: the problem.
        where: the request field it concerns (``param``).
        remedy: what to do about it.
        code: a word for programs; the default goes by the status.
    """

    def __init__(self, status: int, what: str, *, where: str = "", remedy: str = "", code: str = "") -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.status = status
        self.kind, usual = CODES.get(status, ("server_error", "internal_error"))
        self.code = code or usual

    def body(self) -> dict[str, Any]:
        """The JSON document."""
        param = self.where or None
        return {"error": {"message": str(self), "type": self.kind, "param": param, "code": self.code}}


# ---- requests


class StreamOptions(Config):
    """What a stream tells besides the text."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False
    """End with an event that holds the token counts."""
    include_obfuscation: bool = False
    """Accepted, without effect."""


class TemplateOptions(Config):
    """What a chat template may be told (an addition, as other servers have it)."""

    model_config = ConfigDict(strict=True)

    enable_thinking: bool | None = None
    """Think before answering, or do not."""


class Message(Config):
    """One turn of a conversation. Further keys are ignored, so that answers can be sent back as they came."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    """Who speaks."""
    content: str = ""
    """What is said."""

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        """Text, or a list of text parts."""
        if value is None:
            return ""
        if not isinstance(value, list):
            return value
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in value):
            raise ValueError('only parts like {"type": "text", "text": "..."} are understood')
        return "".join(part["text"] for part in value)

    def plain(self) -> dict[str, str]:
        """As the tokenizers' chat formats know it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class CommonRequest(Config, ABC):
    """What both kinds of requests have in common."""

    model_config = ConfigDict(strict=True)

    model: Annotated[str, Field(min_length=1)]
    """The model's name, one of /v1/models."""
    max_tokens: Annotated[int, Field(gt=0)] | None = None
    """Tokens generated at most."""
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    """0 always takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw among the likeliest tokens of this mass."""
    n: Annotated[int, Field(ge=1, le=4)] = 1
    """Answers per prompt."""
    seed: int | None = None
    """Same seed, same answer."""
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)] = []
    """Up to four strings that end the text."""
    stream: bool = False
    """Send the answer in server-sent events as it is made."""
    stream_options: StreamOptions | None = None
    """Only with stream."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw among this many likeliest tokens; 0 is off (an addition to OpenAI's fields)."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Drop tokens below this share of the likeliest; 0 is off (an addition)."""
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] = 1.0
    """Weakens what was already said; 1 is off (an addition)."""
    thinking: Literal["auto", "on", "off"] | None = None
    """Think before answering: always, never, or as the model decides (an addition)."""
    thinking_budget: Annotated[int, Field(ge=0)] = 0
    """Tokens of a thought at most; 0 is three quarters of max_tokens (an addition)."""

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def usage_wanted(self) -> bool:
        """Whether the stream ends with the token counts."""
        return self.stream and self.stream_options is not None and self.stream_options.include_usage

    @property
    def longest(self) -> int | None:
        """Tokens generated at most, where the request says so."""
        return self.max_tokens

    @property
    @abstractmethod
    def top(self) -> int | None:
        """How many alternatives to report per token; ``None`` reports nothing."""

    @property
    @abstractmethod
    def mode(self) -> Literal["auto", "on", "off"] | None:
        """Whether to think before answering; ``None`` leaves it open."""

    def budget(self, longest: int) -> int:
        """Tokens of a thought at most, of ``longest`` that are generated at most; 0 leaves it open."""
        return self.thinking_budget

    def sampling(self, usual: SamplingConfig) -> SamplingConfig:
        """The house's settings; ``usual`` stands in for what the request leaves open."""
        heat = usual.temperature if self.temperature is None else self.temperature
        longest = self.longest or usual.max_tokens
        return SamplingConfig(
            max_tokens=longest,
            temperature=heat if heat >= COLDEST else 0.0,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            stop=tuple(self.stop),
            seed=usual.seed if self.seed is None else self.seed,
            thinking=self.mode or usual.thinking,
            thinking_budget=self.budget(longest) or usual.thinking_budget,
        )


class ChatRequest(CommonRequest):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    """The conversation so far."""
    max_completion_tokens: Annotated[int, Field(gt=0)] | None = None
    """The newer name of max_tokens; it wins."""
    logprobs: bool = False
    """Report every token's log-probability."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    """Report this many alternatives, too; needs logprobs."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    """No thought, or one of at most an eighth, a quarter, half or three quarters of max_tokens."""
    chat_template_kwargs: TemplateOptions = TemplateOptions()
    """Only enable_thinking (an addition)."""

    @property
    def wishes(self) -> dict[str, bool]:
        """Whether to think, by every field that says so."""
        said = {
            "thinking": {"on": True, "off": False}.get(self.thinking),
            "reasoning_effort": None if self.reasoning_effort is None else self.reasoning_effort != "none",
            "chat_template_kwargs": self.chat_template_kwargs.enable_thinking,
        }
        return {name: wish for name, wish in said.items() if wish is not None}

    @property
    def mode(self) -> Literal["auto", "on", "off"] | None:
        """Whether to think before answering; ``None`` leaves it open."""
        if self.thinking is not None or not self.wishes:
            return self.thinking
        return "on" if all(self.wishes.values()) else "off"

    def budget(self, longest: int) -> int:
        """Tokens of a thought at most: as named, else by the effort; 0 leaves it open."""
        part, whole = EFFORT.get(self.reasoning_effort or "", (0, 1))
        return self.thinking_budget or (max(1, longest * part // whole) if part else 0)

    @property
    def longest(self) -> int | None:
        """Tokens generated at most, where the request says so."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        """How many alternatives to report per token; ``None`` reports nothing."""
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(CommonRequest):
    """``POST /v1/completions``."""

    prompt: list[str | list[int]]
    """A text, a list of token ids, or a list of either."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    """Report every token's log-probability and this many alternatives."""

    @property
    def mode(self) -> Literal["auto", "on", "off"] | None:
        """Whether to think before going on: only where it is asked for."""
        return self.thinking or "off"

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> Any:
        prompts = value if isinstance(value, list) and not _is_ids(value) else [value]
        if not all(isinstance(p, str) or _is_ids(p) for p in prompts):
            raise ValueError("give a text, a list of token ids, or a list of either")
        if not 1 <= len(prompts) <= MOST_PROMPTS:
            raise ValueError(f"{len(prompts)} prompts, between 1 and {MOST_PROMPTS} are possible")
        return prompts

    @property
    def top(self) -> int | None:
        """How many alternatives to report per token; ``None`` reports nothing."""
        return self.logprobs


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def parse(body: bytes, kind: type[CommonRequest]) -> CommonRequest:
    """The request in a body.

    Raises:
        ApiError: 400; not JSON, or a field that is unknown, missing, wrong or not offered.
    """
    values = {key: value for key, value in _document(body).items() if value is not None and key not in IGNORED}
    for name in NEUTRAL.keys() & values.keys():
        if values.pop(name) not in NEUTRAL[name]:
            raise ApiError(400, "not supported", where=name, remedy="leave it out", code="unsupported_parameter")
    try:
        request = kind.build(values)
    except ConfigError as error:
        where = re.sub(r"\.(\d+)", r"[\1]", error.where)
        raise ApiError(400, error.what, where=where, remedy=error.remedy) from None
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "given without stream", where="stream_options", remedy='set "stream": true')
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise ApiError(400, "given without logprobs", where="top_logprobs", remedy='set "logprobs": true')
    if isinstance(request, ChatRequest) and len(set(request.wishes.values())) > 1:
        one, *others = request.wishes
        raise ApiError(400, f"contradicts {' and '.join(others)}", where=one, remedy="say it once")
    return request


def _document(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
        json.dumps(values, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is JSON, but no text
    except (ValueError, RecursionError) as error:
        reason = str(error)[:120]
        raise ApiError(400, f"the body is not valid JSON ({reason})", remedy="mend it", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body is no JSON object", remedy='send {"model": ...}', code="invalid_json")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


# ---- answers


class Reply(ABC):
    """Writes one request's answer, whole or in events.

    Args:
        request: what was asked.
        tokenizer: names the tokens where log-probabilities are reported.
    """

    kind = event_kind = prefix = ""

    def __init__(self, request: CommonRequest, tokenizer: Any) -> None:
        self.request, self.tokenizer = request, tokenizer
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.results: dict[int, Generation] = {}

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """The answer to a request that is not streamed, from every row's only piece."""
        self._note(pieces)
        choices = [self._choice(piece) for piece in sorted(pieces, key=lambda piece: piece.row)]
        return {**self._head(self.kind), "choices": choices, "usage": self._usage()}

    def opening(self) -> list[dict[str, Any]]:
        """Events before the first piece."""
        return []

    def event(self, piece: Piece) -> dict[str, Any]:
        """A piece as an event."""
        self._note([piece])
        return self._event(self._delta(piece))

    def closing(self) -> list[dict[str, Any]]:
        """Events after the last piece."""
        if not self.request.usage_wanted:
            return []
        return [{**self._head(self.event_kind), "choices": [], "usage": self._usage()}]

    @abstractmethod
    def _choice(self, piece: Piece) -> dict[str, Any]:
        """A row's whole answer."""

    @abstractmethod
    def _delta(self, piece: Piece) -> dict[str, Any]:
        """What a piece adds to a row's answer."""

    def _note(self, pieces: list[Piece]) -> None:
        self.results |= {piece.row: piece.result for piece in pieces if piece.result is not None}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.request.model}

    def _event(self, choice: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": None} if self.request.usage_wanted else {}
        return {**self._head(self.event_kind), "choices": [choice], **usage}

    def _usage(self) -> dict[str, Any]:
        """Token counts: a prompt counts once, however many answers it gets. Thoughts are among the completion's."""
        prompt = sum(r.prompt_tokens for row, r in self.results.items() if row % self.request.n == 0)
        made = sum(len(r.tokens) for r in self.results.values())
        thought = sum(r.thinking_tokens for r in self.results.values())
        counts = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
        return {**counts, "completion_tokens_details": {"reasoning_tokens": thought}}

    def _token(self, token: int) -> tuple[str, list[int] | None]:
        """A token as text and as bytes; one that is no whole character goes by its name in the vocabulary."""
        text = self.tokenizer.decode([token], skip_special_tokens=False)
        if text and UNFINISHED not in text:
            return text, list(text.encode("utf-8"))
        return self.tokenizer.id_to_token(token) or f"token_{token}", None


def _finish(piece: Piece) -> str | None:
    return None if piece.result is None else FINISH[piece.result.finish_reason]


def _thought(piece: Piece) -> dict[str, str]:
    """What a piece adds to the thought; OpenAI's answers have no place for it, so that there is none without one."""
    return {"reasoning_content": piece.thought} if piece.thought else {}


class ChatReply(Reply):
    """Answers of ``/v1/chat/completions``."""

    kind, event_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self) -> list[dict[str, Any]]:
        """Every answer begins by saying who speaks."""
        delta = {"role": "assistant", "content": ""}
        rest = {"delta": delta, "logprobs": None, "finish_reason": None}
        return [self._event({"index": i, **rest}) for i in range(self.request.n)]

    def _choice(self, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None, **_thought(piece)}
        return {"index": piece.row, "message": message, **self._rest(piece)}

    def _delta(self, piece: Piece) -> dict[str, Any]:
        delta = {**_thought(piece), **({"content": piece.text} if piece.text else {})}
        return {"index": piece.row, "delta": delta, **self._rest(piece)}

    def _rest(self, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self.request.top is not None:
            logprobs = {"content": [self._scored(score) for score in piece.scores], "refusal": None}
        return {"logprobs": logprobs, "finish_reason": _finish(piece)}

    def _scored(self, score: Score) -> dict[str, Any]:
        top = [self._named(token, logprob) for token, logprob in score.top]
        return {**self._named(score.token, score.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text, data = self._token(token)
        return {"token": text, "logprob": logprob, "bytes": data}


class CompletionReply(Reply):
    """Answers of ``/v1/completions``."""

    kind, event_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, request: CommonRequest, tokenizer: Any) -> None:
        super().__init__(request, tokenizer)
        self._offsets: dict[int, int] = {}

    def _choice(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.row,
            "text": piece.text,
            **_thought(piece),
            "logprobs": self._logprobs(piece) if self.request.top is not None else None,
            "finish_reason": _finish(piece),
        }

    def _delta(self, piece: Piece) -> dict[str, Any]:
        return self._choice(piece)

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        tokens = [self._token(score.token)[0] for score in piece.scores]
        offsets, at = [], self._offsets.get(piece.row, 0)
        for token in tokens:
            offsets.append(at)
            at += len(token)
        self._offsets[piece.row] = at
        return {
            "tokens": tokens,
            "token_logprobs": [score.logprob for score in piece.scores],
            "top_logprobs": [{self._token(t)[0]: p for t, p in score.top} for score in piece.scores],
            "text_offset": offsets,
        }
