"""Commands that talk: chat."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from agent_forge.cli.shared import print_json, say, storage_of

HELP = "/reset forgets the conversation, /params shows or sets sampling (/params temperature=0.8), /quit leaves; \
a line ending in \\ goes on"


def attach(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(chat)


def chat(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(help="[MODEL] [TEXT]: a model (name, id, folder; default: the newest) and a question."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw among the k likeliest tokens; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens of this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON (one-shot only).")] = False,
) -> None:
    """Talk to a model; with a text, answer it and leave."""
    from forgekit.infer.chat import Chat
    from forgekit.infer.engine import Engine
    from forgekit.infer.sampling import SamplingConfig
    from forgekit.models.io import read_model

    values = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    config = SamplingConfig.build(values, "chat")
    folder, text = _model_and_text(storage_of(context), [words] if isinstance(words, str) else list(words or []))
    talk = Chat(Engine(*read_model(folder)), config)
    if text is not None:
        pieces = list(_stream(talk, text, quiet=as_json))
        if as_json:
            print_json({"model": str(folder), "question": text, "answer": "".join(pieces)})
        return
    if not sys.stdin.isatty():
        for line in _lines(prompt=""):
            list(_stream(talk, line))
        return
    say(f"[bold]{folder.name}[/]  {HELP}")
    for line in _lines(prompt="you> "):
        if not _command(talk, line):
            list(_stream(talk, line))


def _model_and_text(storage, words: list[str]):
    """Sort out `[MODEL] [TEXT]`: one word is a model if it names one, else a text for the newest model."""
    from forgekit.errors import ArtifactError

    if len(words) >= 2:
        return storage.resolve(words[0]), " ".join(words[1:])
    if not words:
        return storage.resolve("latest"), None
    from pathlib import Path

    if (Path(words[0]) / "config.json").is_file():
        return Path(words[0]), None
    try:
        return storage.resolve(words[0]), None
    except ArtifactError:
        return storage.resolve("latest"), words[0]


def _stream(talk, text: str, quiet: bool = False):
    """Yield the answer's pieces, printing them as they come."""
    for piece in talk.say(text):
        if not quiet:
            sys.stdout.write(piece)
            sys.stdout.flush()
        yield piece
    if not quiet:
        sys.stdout.write("\n")


def _lines(prompt: str):
    """Messages from stdin; a trailing backslash joins lines; ends with end-of-file or /quit."""
    held = ""
    while True:
        try:
            line = input("...> " if held and prompt else prompt)
        except EOFError:
            return
        if line.endswith("\\"):
            held += line[:-1] + "\n"
            continue
        message, held = held + line, ""
        if message.strip() in ("/quit", "/exit"):
            return
        if message.strip():
            yield message


def _command(talk, line: str) -> bool:
    """Obey a slash command; False if the line is no command."""
    from rich.markup import escape

    from forgekit.errors import ForgeError

    word, _, rest = line.strip().partition(" ")
    if word == "/reset":
        talk.reset()
        say("forgotten", "dim")
    elif word == "/params":
        try:
            say(escape(str(talk.set_params(rest) if rest else talk.config)), "dim")
        except ForgeError as error:
            say(escape(f"error: {error}"), "red")
    elif word == "/help" or word.startswith("/"):
        say(HELP, "dim")
    else:
        return False
    return True
