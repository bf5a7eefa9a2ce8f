"""The HTTP server: models behind ``/v1/models``, ``/v1/completions`` and ``/v1/chat/completions``, OpenAI's way.

Standard library only: a thread per connection (bounded) that reads, checks and writes, and per model one
:class:`forgekit.infer.batcher.Batcher` that does the work. It listens on the loopback address unless told otherwise,
knows no users and no encryption: put a proxy before it to let others in.

Limits: size of a body, open connections, rows at work and waiting, seconds per request, seconds of silence.
"""

from __future__ import annotations

import json
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from socketserver import TCPServer
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from jinja2 import TemplateError
from pydantic import Field

from agent_forge.serve.protocol import (
    ApiError,
    ChatReply,
    ChatRequest,
    CommonRequest,
    CompletionReply,
    CompletionRequest,
    Reply,
    parse,
)
from forgekit.compute.device import detect_device
from forgekit.config import Config
from forgekit.errors import ConfigError, ForgeError, ResourceError
from forgekit.infer import kernels
from forgekit.infer.batcher import (
    BatchConfig,
    Batcher,
    Closed,
    ContextExceeded,
    Expired,
    Job,
    ModelFailure,
    Piece,
    QueueFull,
    Request,
)
from forgekit.infer.chat import conversation_ids
from forgekit.infer.engine import Engine
from forgekit.infer.sampling import SamplingConfig
from forgekit.infer.thinking import NoThoughts
from forgekit.models.io import read_model
from forgekit.quant.model import is_packed

GLANCE = 0.25
"""Seconds between two looks at whether a waiting client is still there."""
LINGER_BYTES, LINGER_SECONDS = 2**24, 2.0
"""How much of a refused body is read and forgotten, so that the client reads the refusal and not a reset."""
STATUS: dict[type[ForgeError], int] = {QueueFull: 429, Expired: 504, Closed: 503, ModelFailure: 500}
"""What the batcher's errors are in HTTP; its others are about the prompt."""
ENDPOINTS: dict[str, tuple[type[CommonRequest], type[Reply]]] = {
    "/v1/completions": (CompletionRequest, CompletionReply),
    "/v1/chat/completions": (ChatRequest, ChatReply),
}

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ServeConfig(Config):
    """Where the server listens and what it grants."""

    host: str = "127.0.0.1"
    """Address to listen on; the default is reached from this machine only."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port; 0 takes a free one."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where models from folders compute."""
    context: Annotated[int, Field(ge=0)] = 0
    """Most tokens of prompt and answer; 0 is what the model was made for."""
    max_tokens: Positive = 512
    """Longest answer where a request names none."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    """Temperature where a request names none; OpenAI's is 1."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Whether to think before a chat's answer where a request does not say; auto leaves it to the model."""
    thinking_budget: Annotated[int, Field(ge=0)] = 0
    """Tokens of a thought at most where a request does not say; 0 is three quarters of its max_tokens."""
    seed: int = 0
    """Where the seeds of requests that name none come from, in order of arrival."""
    max_rows: Positive = 32
    """Answers generated at the same time, per model."""
    max_waiting: Annotated[int, Field(ge=0)] = 64
    """Answers that may wait for a place, per model; more are refused with 429."""
    max_connections: Positive = 256
    """Open connections; more are refused with 503."""
    max_body: Positive = 2**20
    """Largest request body in bytes."""
    time_limit: Seconds = 120.0
    """Longest time for a request, waiting included."""
    idle_limit: Seconds = 30.0
    """Longest time for a body to arrive, and of silence on a connection."""
    grace: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0
    """Seconds that running requests get to finish when the server stops."""
    log: bool = False
    """Write a line per request to stderr."""


Models = str | Path | Mapping[str, "Engine | str | Path"]
"""What to serve: one model's folder, or folders and engines by the name clients use."""


def load_engines(models: Models, device: str) -> dict[str, Engine]:
    """The engines behind names; a single folder is called as the folder.

    Raises:
        ArtifactError: a folder holds no readable model.
        ConfigError: no model at all, the device cannot be used, or AGENT_FORGE_KERNELS names what is not there.
    """
    if isinstance(models, str | Path):
        models = {Path(models).absolute().name: models}
    if not models:
        raise ConfigError("nothing to serve", where="models", remedy="give a model's folder")
    place = detect_device(device)
    engines = {}
    for name, source in models.items():
        if not isinstance(source, Engine):
            model, tokenizer = read_model(Path(source))
            if is_packed(model):
                kernels.backend(place)  # a forced one that is not there is told now, not to the first client
            source = Engine(model.to(place), tokenizer)
        engines[name] = source
    return engines


class Server(ThreadingHTTPServer):
    """Listens, and owns the batchers. Use :func:`serve` or :func:`running_server`.

    Args:
        models: what to serve.
        config: where, and what it grants.

    Raises:
        ArtifactError, ConfigError: as :func:`load_engines`; an unusable address.
        ResourceError: the port is taken.
    """

    request_queue_size = 128

    def __init__(self, models: Models, config: ServeConfig) -> None:
        self.config = config
        self.address_family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        engines = load_engines(models, config.device)
        try:
            super().__init__((config.host, config.port), Handler)
        except (socket.gaierror, UnicodeError):
            raise ConfigError(f"no address {config.host!r}", where="host", remedy="try 127.0.0.1") from None
        except OSError as error:
            where = f"{config.host}:{config.port}"
            raise ResourceError(str(error.strerror), where=where, remedy="choose another port or host") from None
        self.started = int(time.time())
        self._places = threading.BoundedSemaphore(config.max_connections)
        self._seeds, self._seeds_lock = random.Random(config.seed), threading.Lock()
        self.batchers = {name: Batcher(engine, self._batch_config(engine)) for name, engine in engines.items()}

    def _batch_config(self, engine: Engine) -> BatchConfig:
        config = self.config
        context = config.context or engine.context_limit or getattr(engine.model.config, "max_seq_len", None)
        return BatchConfig(max_rows=config.max_rows, max_waiting=config.max_waiting, context=context or None)

    @property
    def url(self) -> str:
        """Base address, without ``/v1``."""
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"http://{host}:{self.server_address[1]}"

    @property
    def loopback(self) -> bool:
        """Whether it can be reached from this machine only."""
        return ip_address(self.server_address[0]).is_loopback

    @property
    def closing(self) -> bool:
        """Whether a model takes nothing new."""
        return any(batcher.closing for batcher in self.batchers.values())

    def usual(self) -> SamplingConfig:
        """What stands in for what a request leaves open, with a seed of its own."""
        with self._seeds_lock:
            seed = self._seeds.getrandbits(48)
        c = self.config
        thinking = {"thinking": c.thinking, "thinking_budget": c.thinking_budget}
        return SamplingConfig(max_tokens=c.max_tokens, temperature=c.temperature, seed=seed, **thinking)

    def server_bind(self) -> None:
        """As in the base class, without looking the host's name up: that may take seconds and is used nowhere."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, if there is a place for it."""
        if not self._places.acquire(blocking=False):
            _refuse(request, ApiError(503, "too many connections", remedy="try again later", code="connections"))
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection and give its place back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that vanish are no news; anything else is shown."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        """Take nothing new, let running requests finish within the grace, stop listening."""
        threads = [threading.Thread(target=b.close, args=(self.config.grace,)) for b in self.batchers.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.shutdown()
        self.server_close()


@contextmanager
def running_server(models: Models, config: ServeConfig | None = None) -> Iterator[Server]:
    """A server that runs in the background inside the ``with``; by default on a free port."""
    server = Server(models, config or ServeConfig(port=0))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="http", daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


def serve(
    models: Models, config: ServeConfig | None = None, ready: Callable[[Server], None] = lambda server: None
) -> None:
    """Serve until Ctrl-C or SIGTERM, then finish what runs.

    Args:
        models: one model's folder, or folders and engines by name.
        config: where, and what is granted.
        ready: called once it listens.

    Raises:
        ForgeError: as :class:`Server`.
    """
    over = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: over.set()) if main else None
    try:
        with running_server(models, config or ServeConfig()) as server:
            ready(server)
            try:
                over.wait()
            except KeyboardInterrupt:
                pass  # the first one stops in good order; a second one, during the grace, at once
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _refuse(connection: socket.socket, error: ApiError) -> None:
    """Answer before anything was read."""
    body = json.dumps(error.body()).encode()
    phrase = HTTPStatus(error.status).phrase
    head = f"HTTP/1.1 {error.status} {phrase}\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    try:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    except OSError:
        pass  # gone already


class Handler(BaseHTTPRequestHandler):
    """One connection: reads requests, writes answers."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "agent-forge", ""
    disable_nagle_algorithm = True
    server: Server
    _answered = False
    _unread = False
    """Whether a body may still be on its way: then the connection cannot go on after the answer."""

    def setup(self) -> None:
        """Silence ends the connection."""
        self.timeout = self.server.config.idle_limit
        super().setup()

    def do_GET(self) -> None:
        """Health and models."""
        self._guarded(self._get)

    def do_POST(self) -> None:
        """Completions."""
        self._guarded(self._post)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses by itself (bad request lines, unknown methods), in OpenAI's shape."""
        self._unread, self.request_version = True, "HTTP/1.1"
        status = 405 if code == HTTPStatus.NOT_IMPLEMENTED else int(code)
        self._fail(ApiError(status, message or HTTPStatus(status).phrase))

    def log_message(self, format: str, *args: Any) -> None:
        """A line per request, where wanted."""
        if self.server.config.log:
            super().log_message(format, *args)

    def _guarded(self, answer: Callable[[], None]) -> None:
        """Errors become answers; a client that went away ends the connection."""
        self._answered = False
        self._unread = self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers
        settled = False
        try:
            self._check_host()
            answer()
            settled = True
        except ApiError as error:
            settled = True
            self._fail(error)
        except (ConnectionError, TimeoutError):
            settled = self.close_connection = True
        finally:  # whatever else went wrong goes on its way to the log, but the client is not left without an answer
            if not (settled or self._answered):
                self._fail(ApiError(500, "the server made a mistake", remedy="see its log"))

    # ---- reading

    def _check_host(self) -> None:
        """A web page must not reach a local server under a name of its own (DNS rebinding)."""
        try:
            name = urlsplit(f"//{self.headers.get('Host', 'localhost')}").hostname
        except ValueError:
            name = None
        if self.server.loopback and name not in ("localhost", "127.0.0.1", "::1", self.server.config.host):
            raise ApiError(403, "this server answers local requests only", where="Host", remedy="use localhost")

    def _path(self) -> str:
        try:
            return unquote(urlsplit(self.path).path)
        except ValueError:
            raise ApiError(400, "not a path", remedy="send one like /v1/models") from None

    def _get(self) -> None:
        path, batchers = self._path(), self.server.batchers
        if path == "/health":
            status = "closing" if self.server.closing else "ok"
            loads = {name: batcher.load() for name, batcher in batchers.items()}
            return self._json(503 if self.server.closing else 200, {"status": status, "models": loads})
        if path == "/v1/models":
            return self._json(200, {"object": "list", "data": [self._model(name) for name in batchers]})
        if path.startswith("/v1/models/"):
            name = path.removeprefix("/v1/models/")
            self._batcher(name)
            return self._json(200, self._model(name))
        raise self._nothing_here(path)

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.server.started, "owned_by": "agent-forge"}

    def _nothing_here(self, path: str) -> ApiError:
        if path in ENDPOINTS or path in ("/v1/models", "/health"):
            right = "POST" if path in ENDPOINTS else "GET"
            return ApiError(405, f"{self.command} {path} is not possible", remedy=f"use {right}")
        offered = ", ".join(("/v1/models", *ENDPOINTS, "/health"))
        return ApiError(404, f"nothing at {path[:200]}", remedy=f"there are {offered}")

    def _batcher(self, name: str) -> Batcher:
        batcher = self.server.batchers.get(name)
        if batcher is None:
            known = ", ".join(self.server.batchers)
            what = f"no model {name[:200]!r}"
            raise ApiError(404, what, where="model", remedy=f"there are {known}", code="model_not_found")
        return batcher

    def _body(self) -> bytes:
        """The whole body, within its limits of size and time."""
        length, most = self.headers.get("Content-Length"), self.server.config.max_body
        if self.headers.get("Transfer-Encoding") is not None or length is None:
            raise ApiError(411, "the body has no length", where="Content-Length", remedy="send one, not in chunks")
        if not (length.isascii() and length.isdigit()):
            raise ApiError(400, f"{length[:40]!r} is no length", where="Content-Length", remedy="give bytes")
        if len(length) > 15 or int(length) > most:
            raise ApiError(413, f"the body is larger than {most} bytes", remedy="shorten it")
        if self.headers.get_content_type() != "application/json":
            # Also what keeps web pages out: browsers ask before they send this type elsewhere, and get a no.
            raise ApiError(415, "not JSON", where="Content-Type", remedy="send application/json")
        body = self._read(int(length))
        self._unread = False
        return body

    def _read(self, left: int) -> bytes:
        parts, until = [], time.monotonic() + self.server.config.idle_limit
        while left:
            try:
                part = self.rfile.read1(left)
            except TimeoutError:
                part = None
            if part is None or time.monotonic() > until:
                raise ApiError(408, "the body did not arrive in time", remedy="send it at once")
            if not part:
                raise ConnectionAbortedError
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    # ---- answering

    def _post(self) -> None:
        body = self._body()
        path = self._path()
        if path not in ENDPOINTS:
            raise self._nothing_here(path)
        kind, write = ENDPOINTS[path]
        request = parse(body, kind)
        batcher = self._batcher(request.model)
        reply = write(request, batcher.engine.tokenizer)
        try:
            job = self._submit(batcher, request)
            try:
                (self._stream if request.stream else self._whole)(job, reply)
            finally:
                job.cancel()
        except ApiError:
            raise
        except ForgeError as error:
            raise self._translated(error, request) from None

    def _submit(self, batcher: Batcher, request: CommonRequest) -> Job:
        sampling = request.sampling(self.server.usual())
        if isinstance(request, ChatRequest):
            prompts = [self._conversation(batcher.engine.tokenizer, request, sampling.thinking)]
        else:
            prompts = request.prompt
        rows = [Request(prompt, sampling, i, request.top) for prompt in prompts for i in range(request.n)]
        return batcher.submit(rows, self.server.config.time_limit, request.stream)

    @staticmethod
    def _conversation(tokenizer: Any, request: ChatRequest, thinking: str) -> list[int]:
        try:
            return conversation_ids(tokenizer, [message.plain() for message in request.messages], thinking)
        except TemplateError as error:  # templates refuse roles and orders that their model does not know
            what = f"the model's chat template refuses them ({str(error)[:200]})"
            raise ApiError(400, what, where="messages", remedy="change roles or order") from None

    @staticmethod
    def _translated(error: ForgeError, request: CommonRequest) -> ApiError:
        field = "messages" if isinstance(request, ChatRequest) else "prompt"
        for kind, status in STATUS.items():
            if isinstance(error, kind):
                return ApiError(status, error.what, remedy=error.remedy)
        if isinstance(error, NoThoughts):
            return ApiError(400, error.what, where=error.where, remedy=error.remedy, code="unsupported_parameter")
        code = "context_length_exceeded" if isinstance(error, ContextExceeded) else ""
        return ApiError(400, error.what, where=field, remedy=error.remedy, code=code)

    def _news(self, job: Job) -> list[Piece]:
        """What is new; raises if the client has gone."""
        while not (pieces := job.next(GLANCE)):
            if self._gone():
                raise ConnectionAbortedError
        return pieces

    def _gone(self) -> bool:
        """Whether the client has hung up."""
        self.connection.setblocking(False)
        try:
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.connection.settimeout(self.timeout)

    def _whole(self, job: Job, reply: Reply) -> None:
        pieces: list[Piece] = []
        while not job.done:
            pieces += self._news(job)
        self._json(200, reply.whole(pieces))

    def _stream(self, job: Job, reply: Reply) -> None:
        """Server-sent events. Before the first piece errors still have a status; after it they are an event."""
        pieces = self._news(job)
        self._start_events()
        events = reply.opening()
        try:
            while True:
                self._events([*events, *map(reply.event, pieces)])
                if job.done:
                    break
                events, pieces = [], self._news(job)
        except ForgeError as error:
            self._events([self._translated(error, reply.request).body()])
        else:
            self._events([*reply.closing(), "[DONE]"])
        self._chunk(b"")

    def _start_events(self) -> None:
        self._answered = True
        self._chunked = self.request_version != "HTTP/1.0"
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        if self._chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Connection", "close")
        self.end_headers()

    def _events(self, events: list[dict[str, Any] | str]) -> None:
        texts = (event if isinstance(event, str) else json.dumps(event, ensure_ascii=False) for event in events)
        self._chunk("".join(f"data: {text}\n\n" for text in texts).encode())

    def _chunk(self, data: bytes) -> None:
        """Write; an empty chunk ends the answer."""
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if self._chunked else data)

    def _json(self, status: int, value: dict[str, Any]) -> None:
        self._answered = True
        body = json.dumps(value, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        if status in (429, 503):
            self.send_header("Retry-After", "1")
        if status == 504:
            self.send_header("x-should-retry", "false")  # OpenAI's clients would ask again, and wait as long again
        if self._unread:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")
        if self._unread:
            self._linger()

    def _fail(self, error: ApiError) -> None:
        try:
            self._json(error.status, error.body())
        except OSError:
            self.close_connection = True

    def _linger(self) -> None:
        """Closing on unread data resets the connection before the client has read the answer: read on for a while."""
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(0.5)
        left, until = LINGER_BYTES, time.monotonic() + LINGER_SECONDS
        while left > 0 and time.monotonic() < until and (data := self.connection.recv(65536)):
            left -= len(data)
