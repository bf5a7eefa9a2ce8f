"""``agent-forge``: the command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from agent_forge.cli import (
    commands_bake,
    commands_data,
    commands_handon,
    commands_house,
    commands_models,
    commands_quantize,
    commands_report,
    commands_run,
    commands_serve,
    commands_talk,
)

app = typer.Typer(
    name="agent-forge",
    help="A foundry for small agents on ordinary computers. Start with: agent-forge run --until bitnet",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# Typer carries its own copy of click in some versions and uses the installed one in others.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

for module in (
    commands_run,
    commands_report,
    commands_models,
    commands_talk,
    commands_serve,
    commands_handon,
    commands_bake,
    commands_quantize,
    commands_data,
    commands_house,
):
    module.attach(app)


def _version(wanted: bool) -> None:
    if wanted:
        from forgekit.version import __version__

        print(f"agent-forge {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    storage: Annotated[
        str, typer.Option(envvar="AGENT_FORGE_STORAGE", help="Folder of sessions, models and the registry.")
    ] = "./storage",
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Common to all commands."""
    context.obj = {"storage": storage, "debug": debug}


def main() -> None:
    """Run the command line; errors of the house become one line and their own exit code."""
    debug = "--debug" in sys.argv
    try:
        code = app(standalone_mode=False, prog_name="agent-forge")
    except typer.Abort:
        code = 130
    except UsageError as error:
        code = _usage(error)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # The reader went away (`| head`): not an error, and stdout cannot be flushed any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if debug:
            raise
        code = _explain(error)
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: Any) -> int:
    """A mistake on the command line: one line on stderr; the help where nothing was asked for."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return 2
    command = error.ctx.command_path if error.ctx else "agent-forge"
    print(f"error: {error.format_message().rstrip('.')}; see `{command} --help`", file=sys.stderr)
    return 2


def _explain(error: Exception) -> int:
    """One line on stderr, and the exit code."""
    from forgekit.errors import ForgeError

    if isinstance(error, ForgeError):
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    kind = type(error).__name__
    print(
        f"error: {kind}: {' '.join(str(error).split())[:300]}; run again with --debug for the traceback",
        file=sys.stderr,
    )
    return 70


if __name__ == "__main__":
    main()
