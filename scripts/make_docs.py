"""Write the generated pages: docs/cli.md, docs/profiles.md, docs/metrics.md and the file map of README.md.

Usage: python scripts/make_docs.py [--check]   (--check writes nothing and exits 1 when a page would change)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from agent_forge.cli.main import app
from agent_forge.profile import load_profile, profile_names
from forgekit.store.fsio import write_atomic
from forgekit.tracking.catalogue import CATALOGUES, expand

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 80
GENERATED = "<!-- written by `make docs`; edit the sources instead -->\n"
MAP_OPEN, MAP_CLOSE = "<!-- file map -->", "<!-- /file map -->"
FOLDERS = {
    "forgekit": "the kernel: what both products mean by a config, an artifact, a model, a number",
    "forgekit/store": "artifact folders, the SQLite registry, sessions, cleanup",
    "forgekit/compute": "device, memory budget, adaptive batch, resource monitor",
    "forgekit/data": "data sets by name, formats, tokenizer, packing, the gym of verifiable tasks",
    "forgekit/models": "one file per model family, and their arithmetic",
    "forgekit/train": "the training loop, MuonGrokfast, schedules, checkpoints",
    "forgekit/quant": "ternary and group-wise numbers, their packing, layers and files",
    "forgekit/infer": "the generation engine, sampling, chat, low-bit kernels",
    "forgekit/measure": "scores, intervals, evidence and gates",
    "forgekit/tracking": "the metric catalogue and where metrics go",
    "agent_forge": "the Forge: profiles and everything that makes models",
    "agent_forge/pipeline": "phases, sessions, the orchestrator",
    "agent_forge/phases": "one folder per phase",
    "agent_forge/prompt_baking": "a prompt's effect moved into the weights",
    "agent_forge/merging": "merge methods as typed functions, whole folders, the search over merges",
    "agent_forge/export": "models for other programs: the Hugging Face layout and its card",
    "agent_forge/dashboard": "the report page, from what the sessions left on disk",
    "agent_forge/serve": "models behind OpenAI's HTTP interface",
    "agent_forge/cli": "the command line `agent-forge`",
    "bagley": "the assistant that lives on what the Forge made",
    "profiles": "one file per size: the whole pipeline's settings at that size",
    "benchmarks": "speed and quality against peers, as ratios in one run",
    "scripts": "what the Makefile calls",
    "tests": "`unit/` in seconds, `integration/`, `journey/` with whole runs, `gpu/`",
    "docs": "the user guide; `LOG.md` tells what was tried, also what failed",
}


def command_page() -> str:
    """The help of every command as plain text, in the order of ``agent-forge --help``."""
    root = typer.main.get_command(app)
    blocks = [f"## {title}\n\n```text\n{text}\n```\n" for title, text in _helps(root, "agent-forge", None)]
    return "\n".join(["# Commands\n", GENERATED, *blocks])


def _helps(command: Any, name: str, parent: Any) -> list[tuple[str, str]]:
    """(title, help) of a command and, depth first, of those below it."""
    command.rich_markup_mode = None  # plain text, whatever the terminal can do
    context = command.context_class(
        command, info_name=name, parent=parent, terminal_width=WIDTH, max_content_width=WIDTH
    )
    text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    found = [(context.command_path, text)]
    for inner in getattr(command, "commands", {}):
        found += _helps(command.commands[inner], inner, context)
    return found


def profile_page() -> str:
    """Sizes, shapes and phases of the shipped profiles, as the budget solver finds them."""
    profiles = [load_profile(name) for name in profile_names()]
    solved = [(p, p.model.solve()) for p in profiles]
    sizes = [
        [f"`{p.name}`", p.about, f"{b.parameters:,}", f"{p.context:,}", ", ".join(p.phases) or "-"] for p, b in solved
    ]
    parts = list(dict.fromkeys(part for _, b in solved for part in b.split))
    splits = [
        [f"`{p.name}`", *(f"{b.split.get(part, 0):,} ({b.split.get(part, 0) / b.parameters:.0%})" for part in parts)]
        for p, b in solved
    ]
    fields = ("d_model", "n_layers", "n_heads", "ffn_hidden", "vocab_size", "emb_rank", "window", "memory", "t_max")
    shapes = [[f"`{p.name}`", *(str(getattr(b.config, field, "-")) for field in fields)] for p, b in solved]
    tables = (
        _table(["profile", "machine", "parameters", "context", "phases"], sizes),
        "## Parameters by part\n",
        _table(["profile", *parts], splits),
        "## Shapes\n",
        _table(["profile", *(f"`{field}`" for field in fields)], shapes),
    )
    return "\n".join(["# Profiles\n", GENERATED, *tables])


def metric_page() -> str:
    """The metric catalogue, a table per phase; braces stand for one metric each."""
    sections = []
    for phase in CATALOGUES:
        rows = CATALOGUES.get(phase)
        count = sum(len(expand(name)) for name, *_ in rows)
        table = _table(["metric", "unit", "cadence", "meaning"], [[f"`{name}`", *rest] for name, *rest in rows])
        sections.append(f"## {phase}: {count} metrics\n\n{table}")
    return "\n".join(["# Metrics\n", GENERATED, *sections])


def file_map() -> str:
    """The folders, one line each; one that nobody described is an error, so that the map stays whole."""
    unknown = [name for name in _folders() if name not in FOLDERS]
    gone = [name for name in FOLDERS if not (ROOT / name).is_dir()]
    if unknown or gone:
        raise SystemExit(f"error: FOLDERS of scripts/make_docs.py: describe {unknown or '-'}, remove {gone or '-'}")
    return "\n".join(f"{'  ' * name.count('/')}- `{name}/`: {line}" for name, line in FOLDERS.items())


def _folders() -> list[str]:
    """Top folders that hold something of ours, and the packages inside the two large ones."""
    tops = [p for p in ROOT.iterdir() if p.is_dir() and (any(p.glob("*.py")) or any(p.glob("*.toml")))]
    packages = [p.parent for name in ("forgekit", "agent_forge") for p in (ROOT / name).glob("*/__init__.py")]
    return [p.relative_to(ROOT).as_posix() for p in (*tops, *packages) if not p.name.startswith((".", "build"))]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


def pages() -> dict[Path, str]:
    """Every generated file with the text it should have."""
    readme = ROOT / "README.md"
    head, opening, rest = readme.read_text(encoding="utf-8").partition(MAP_OPEN)
    _, closing, tail = rest.partition(MAP_CLOSE)
    if not opening or not closing:
        raise SystemExit(f"error: README.md: no {MAP_OPEN} ... {MAP_CLOSE}; put the two lines where the map belongs")
    return {
        ROOT / "docs" / "cli.md": command_page(),
        ROOT / "docs" / "profiles.md": profile_page(),
        ROOT / "docs" / "metrics.md": metric_page(),
        readme: f"{head}{MAP_OPEN}\n{file_map()}\n{MAP_CLOSE}{tail}",
    }


def main(check: bool) -> int:
    """Write what changed, or tell; returns the exit code."""
    changed = [
        (path, text) for path, text in pages().items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    for path, text in changed:
        name = path.relative_to(ROOT)
        if check:
            print(f"error: {name} is out of date; run `make docs`", file=sys.stderr)
        else:
            write_atomic(path, text.encode())
            print(f"wrote {name}")
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
