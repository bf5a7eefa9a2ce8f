"""Commands that talk: chat."""

from __future__ import annotations

import re
import sys
from typing import Annotated, Literal

import typer

from agent_forge.cli.shared import print_json, say, storage_of, to_talk_to
from forgekit.data.tokenizer import THINKING

HELP = "/reset forgets the conversation, /params shows or sets sampling (/params temperature=0.8), /quit leaves; \
a line ending in \\ goes on"
MARKER = re.compile("|".join(THINKING[2:]))
"""What divides a thought into steps."""


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
    think: Annotated[
        Literal["auto", "on", "off"], typer.Option(help="Think before answering; auto leaves it to the model.")
    ] = "auto",
    think_budget: Annotated[
        int, typer.Option(help="Longest thought in tokens; 0 is three quarters of --max-tokens.")
    ] = 0,
    hide_thoughts: Annotated[bool, typer.Option("--hide-thoughts", help="Print answers only.")] = False,
    system: Annotated[str, typer.Option(help="A system message before every question.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print thought and answer as JSON (one-shot only).")] = False,
) -> None:
    """Talk to a model; with a text, answer it and leave."""
    from forgekit.infer.chat import Chat
    from forgekit.infer.engine import Engine
    from forgekit.infer.sampling import SamplingConfig
    from forgekit.models.io import read_model

    values = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    config = SamplingConfig.build({**values, "thinking": think, "thinking_budget": think_budget}, "chat")
    folder, text = _model_and_text(storage_of(context), [words] if isinstance(words, str) else list(words or []))
    talk = Chat(Engine(*read_model(folder)), config, system=system)
    if text is not None:
        _answer(talk, text, "nothing" if as_json else "answers" if hide_thoughts else "all")
        if as_json:
            said = {"thought": talk.session.last.thought, "answer": talk.session.last.text}
            print_json({"model": str(folder), "question": text, **said})
        return
    shown = "answers" if hide_thoughts else "all"
    if not sys.stdin.isatty():
        for line in _lines(prompt=""):
            _answer(talk, line, shown)
        return
    say(f"[bold]{folder.name}[/]  {HELP}")
    for line in _lines(prompt="you> "):
        if not _command(talk, line):
            _answer(talk, line, shown)


def _model_and_text(storage, words: list[str]):
    """Sort out `[MODEL] [TEXT]`: one word is a model if it names one, else a text for the newest model."""
    from forgekit.errors import ArtifactError

    if len(words) >= 2:
        return to_talk_to(storage, words[0]), " ".join(words[1:])
    if not words:
        return to_talk_to(storage), None
    from pathlib import Path

    if (Path(words[0]) / "config.json").is_file():
        return Path(words[0]), None
    try:
        return to_talk_to(storage, words[0]), None
    except ArtifactError:
        return to_talk_to(storage), words[0]


def _answer(talk, text: str, shown: Literal["all", "answers", "nothing"]) -> None:
    """Ask, and print what is said as it comes: the answer on stdout, the thought before it on stderr."""
    aside = _Aside(shown == "all")
    for piece in talk.speak(text):
        if piece.thought:
            aside.write(piece.text)
        elif shown != "nothing":
            aside.end()
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    aside.end()
    if shown != "nothing":
        sys.stdout.write("\n")


class _Aside:
    """Prints a thought on stderr: dim on a terminal, every marker in it on a line of its own."""

    def __init__(self, shown: bool) -> None:
        self.shown, self.begun = shown, False
        self.dim, self.plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")

    def write(self, text: str) -> None:
        """Add a piece."""
        lines = MARKER.sub(r"\n\g<0> ", text)
        self._print(lines if self.begun else lines.lstrip("\n"))

    def end(self) -> None:
        """End the last line, if there is one."""
        if self.begun:
            self._print("\n")
            self.begun = False

    def _print(self, text: str) -> None:
        if self.shown:
            self.begun = True
            sys.stderr.write(f"{self.dim}{text}{self.plain}")
            sys.stderr.flush()


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
