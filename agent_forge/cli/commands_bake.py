"""The command that moves a prompt into a model's weights: bake."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from agent_forge.cli.shared import print_json, say, storage_of, table

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def attach(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(bake)


def bake(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model: name, id or folder, ours or Hugging Face's.")],
    prompt_file: Annotated[
        list[Path],
        typer.Option("--prompt-file", "-p", help="A text file with the prompt; repeated: one after another."),
    ],
    output: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the result; must not exist; default: MODEL-baked.")
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(help="full, half, sequential or pursuit; default: full, or sequential for several prompts."),
    ] = None,
    strength: Annotated[float | None, typer.Option(help="Share of the prompt's effect to bake, in (0, 1].")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the baking, as num_epochs=4; repeatable.")
    ] = None,
    contexts: Annotated[
        Path | None, typer.Option(help="Questions unrelated to the prompt, one a line; default: gym and prose.")
    ] = None,
    task: Annotated[
        Path | None,
        typer.Option(help="What the prompt is for: lines `question TAB right answer`; bare, prompted, baked are told."),
    ] = None,
    problems: Annotated[int, typer.Option(help="Problems of every gym family that tell what is kept; 0: none.")] = 20,
    as_json: Json = False,
) -> None:
    """Bake a prompt into a model: afterwards it answers without the prompt as it did with it."""
    from agent_forge.cli.progress import Bars
    from agent_forge.profile import assigned
    from agent_forge.prompt_baking.config import PromptBakingConfig

    given: dict[str, Any] = {"mode": mode or ("sequential" if len(prompt_file) > 1 else "full")}
    if strength is not None:
        given["strength"] = strength
    for key, value in (assigned(text, "--set") for text in setting or []):
        inside = given
        *outer, last = key.split(".")
        for part in outer:
            inside = inside.setdefault(part, {})
        inside[last] = value
    config = PromptBakingConfig.build(given, "bake")
    prompts = tuple(read_text(path, "--prompt-file") for path in prompt_file)
    asked = tuple(read_text(contexts, "--contexts").splitlines()) if contexts else None
    folder = storage_of(context).resolve(model)
    from agent_forge.prompt_baking.folders import BakePlan, bake_folder

    values = {"source": folder, "output": output or Path(f"{folder.name}-baked"), "problems": problems}
    values["task"] = tuple(map(pair_of, read_text(task, "--task").splitlines())) if task else ()
    plan = BakePlan.build({**values, "prompts": prompts, "contexts": asked, "bake": config}, "bake")
    with Bars(enabled=not as_json) as bars:
        receipt = bake_folder(plan, bars.show)
    if as_json:
        print_json(receipt)
    else:
        show_receipt(receipt)


def read_text(path: Path, option: str) -> str:
    """A text file of the user, blank space around it taken away.

    Raises:
        DataError: it is missing, not readable, not UTF-8 or empty.
    """
    from forgekit.errors import DataError

    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise DataError(f"cannot be read ({reason})", where=f"{option} {path}", remedy="give a text file") from None
    if not text:
        raise DataError("is empty", where=f"{option} {path}", remedy="write the text into it")
    return text


def pair_of(line: str) -> tuple[str, str]:
    """Question and answer of a line.

    Raises:
        DataError: there is no tab in it.
    """
    from forgekit.errors import DataError

    question, tab, answer = line.partition("\t")
    if not (tab and question.strip() and answer.strip()):
        raise DataError(f"{line[:40]!r} is not `question TAB answer`", where="--task", remedy="put a tab between them")
    return question.strip(), answer.strip()


def show_receipt(receipt: dict[str, Any]) -> None:
    """The tables for people."""
    rows = [
        [one["text"] if len(one["text"]) <= 48 else f"{one['text'][:45]}...", *map(_span, _both(one))]
        for one in receipt["prompts"]
    ]
    columns = ["prompt", "before>", "after>"]
    table("nats per token to the prompted model on answers held out, with 95 % intervals", columns, rows)
    r2 = receipt["likelihood_r2"]
    say(f"likelihoods of those answers agree with the prompted model's: r2 {r2['bare']:.3f} to {r2['baked']:.3f}")
    if receipt["task"]:
        rows = [[name, f"{100 * value:.1f}"] for name, value in receipt["task"].items()]
        table("right answers on the prompt's own task, exactly, in per cent", ["model", "right>"], rows)
    if receipt["kept"]:
        rows = [[name, f"{m['bare']:.3f}", f"{m['baked']:.3f}"] for name, m in receipt["kept"].items()]
        table("kept: right answers of gym problems, asked without the prompt", ["family!", "before>", "after>"], rows)
    for note in receipt["notes"]:
        say(note, "yellow")
    output = receipt["output"]
    say(f"wrote {output} in {receipt['seconds']:.0f} s; talk to it: agent-forge chat {output}", "green")


def _both(one: dict[str, Any]) -> tuple[Any, Any]:
    return one["divergence_before"], one["divergence_after"]


def _span(value: Any) -> str:
    return f"{value[0]:.4f} [{value[1]:.4f}, {value[2]:.4f}]"
