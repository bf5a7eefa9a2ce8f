"""Commands that hand models on: export, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from agent_forge.cli.shared import print_json, say, storage_of, table

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_NEXT = {
    "hf": "load it with transformers as its README.md says; the licence is for you to add",
    "gguf": "run it with llama.cpp, e.g. `llama-cli -m FILE`; the licence is for you to add",
}
_STYLE = {"improved": "green", "worse": "red", "no-signal": "dim"}


def attach(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (export, compare):
        app.command()(command)


def export(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model: name, id or folder, ours or Hugging Face's.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the result, for gguf a file NAME.gguf; must not exist.")
    ],
    target: Annotated[
        str, typer.Option("--format", "-f", help="What for: hf (Hugging Face transformers) or gguf (llama.cpp).")
    ] = "hf",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of the weights: float32, float16 or bfloat16; for gguf float32, float16, q8_0 or tq2_0; "
            "default: as they are."
        ),
    ] = None,
    max_shard: Annotated[str, typer.Option(help="Largest file of weights, as 500MB or 5GB; gguf has one.")] = "5GB",
    as_json: Json = False,
) -> None:
    """Write a model for other programs, with its card."""
    from typing import get_type_hints

    from agent_forge.cli.progress import Bars
    from agent_forge.export import EXPORTERS
    from agent_forge.pipeline.phase import Progress
    from forgekit.compute.disk import readable

    write = EXPORTERS.get(target)
    storage = storage_of(context)
    folder = storage.resolve(model)
    values = {"source": folder, "output": output, "dtype": dtype, "max_shard_bytes": size_of(max_shard)}
    kind = get_type_hints(write)["plan"]  # each format says what it can be told
    plan = kind.build({**values, "ancestors": tuple(_ancestors(storage, folder))}, "export")
    with Bars(enabled=not as_json) as bars:
        receipt = write(plan, lambda done, total: bars.show(Progress("tensors", done, total)))
    if as_json:
        print_json(receipt)
    else:
        say(
            f"wrote {output}: {readable(receipt['bytes'])} in {len(receipt['files'])} files, {receipt['dtype']}",
            "green",
        )
        for note in receipt.get("notes", ()):
            say(note)
        say(_NEXT.get(target, "the licence is for you to add"))


def size_of(text: str) -> int:
    """Bytes in a size such as ``500MB``, in powers of 1000.

    Raises:
        ConfigError: not a number with a unit, or below one byte.
    """
    import re

    from forgekit.errors import ConfigError

    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?)b?\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * 1000 ** ("kmg".index(found[2].lower()) + 1 if found[2] else 0)) if found else 0
    if size < 1:
        raise ConfigError(f"{text!r} is not a size", where="--max-shard", remedy="write it as 500MB or 5GB")
    return size


def _ancestors(storage: Any, folder: Path) -> list[str]:
    from forgekit.store.artifact import MANIFEST, Artifact

    if not (folder / MANIFEST).is_file():
        return []
    model_id = Artifact.open(folder, verify=False).manifest.model_id
    return storage.registry.ancestors(model_id) if storage.registry.get_model(model_id) else []


def compare(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(help="Models: names, ids or folders; the first is the yardstick.")],
    problems: Annotated[int, typer.Option(help="Problems per family and level.")] = 40,
    families: Annotated[str | None, typer.Option(help="Gym families, as copy,sort; default: all.")] = None,
    levels: Annotated[str, typer.Option(help="Levels, as 1-5 or 1,3.")] = "1-5",
    split: Annotated[str, typer.Option(help="Split of problems and text: report, select or train.")] = "report",
    data: Annotated[Path | None, typer.Option(help="A text file of your own, or a folder with data sets.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of text at most.")] = 128,
    window_bytes: Annotated[int, typer.Option(help="Bytes of a window.")] = 384,
    as_json: Json = False,
) -> None:
    """Measure models on the same problems and text, with paired statistics."""
    from agent_forge.cli.progress import Bars
    from agent_forge.compare import compare as run
    from agent_forge.compare_items import CompareConfig

    storage = storage_of(context)
    values = {"problems": problems, "levels": levels_of(levels), "split": split, "data": data}
    values |= {"windows": windows, "window_bytes": window_bytes}
    values["families"] = tuple(filter(None, (name.strip() for name in (families or "").split(","))))
    config = CompareConfig.build(values, "compare")

    def lineage(model_id: str) -> dict[str, Any] | None:
        row = storage.registry.get_model(model_id)
        return row and row["metadata"]

    with Bars(enabled=not as_json) as bars:
        result = run([storage.resolve(name) for name in models], config, bars.show, lineage)
    if as_json:
        print_json(result)
    else:
        show_comparison(result)


def levels_of(text: str) -> tuple[int, ...]:
    """Levels written as ``1-5`` or ``1,3``.

    Raises:
        ConfigError: anything else.
    """
    import re

    from forgekit.errors import ConfigError

    found: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,2})\s*(?:-\s*(\d{1,2})\s*)?", part)
        if ends is None:
            raise ConfigError(f"{text!r} are no levels", where="--levels", remedy="write them as 1-5 or 1,3")
        found += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return tuple(found)


def show_comparison(result: dict[str, Any]) -> None:
    """The tables for people."""
    from forgekit.compute.disk import readable

    names = [model["name"] for model in result["models"]]
    text = result["text"]
    rows = [
        [
            m["name"],
            f"{m['parameters']:,}",
            readable(m["weight_bytes"]),
            f"{m['flops_per_token'] / 1e6:.2f}",
            f"{m['flops_per_byte'] / 1e6:.2f}",
            _measured(text["bits_per_byte"][m["name"]]),
        ]
        for m in result["models"]
    ]
    columns = ["model!", "parameters>", "weights>", "MFLOPs a token>", "MFLOPs a byte>", "bits per byte>"]
    table(f"models; bits per byte over {text['windows']} windows of {result['split']} text", columns, rows)
    rows = [
        [row["family"], f"{row['n']:,}", f"{row['chance']:.3f}", *(_measured(row["accuracy"][n]) for n in names)]
        for row in result["families"]
    ]
    title = f"right answers on {result['split']} problems, with 95 % intervals"
    table(title, ["family!", "problems>", "chance>", *(f"{name}>" for name in names)], rows)
    rows = [[r["family"], *_difference(d)] for r in result["families"] for d in r["differences"]]
    rows += [["text", *_difference(d)] for d in text["differences"]]
    columns = ["on!", "model", "difference>", "95 % interval>", "McNemar p>", "Holm p>", "verdict!"]
    table(f"differences to {result['against']}; of text in bits per byte, where less is better", columns, rows)
    for note in result["notes"]:
        say(note, "dim")


def _measured(value: dict[str, Any]) -> str:
    return f"{value['mean']:.3f} [{value['ci95'][0]:.3f}, {value['ci95'][1]:.3f}]"


def _difference(test: dict[str, Any]) -> list[str]:
    style = _STYLE.get(test["verdict"])
    verdict = f"[{style}]{test['verdict']}[/]" if style else test["verdict"]
    interval = f"[{test['ci95'][0]:+.3f}, {test['ci95'][1]:+.3f}]"
    return [test["model"], f"{test['difference']:+.3f}", interval, _p(test, "mcnemar_p"), _p(test, "holm_p"), verdict]


def _p(test: dict[str, Any], name: str) -> str:
    value = test.get(name)
    return "" if value is None else f"{value:.3f}" if value >= 0.001 else "<0.001"
