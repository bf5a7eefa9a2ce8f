"""The import rules of the house, read from the syntax tree (imports inside functions included) and seen at run time."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("forgekit", "agent_forge", "bagley")
PHASES = "agent_forge.phases"
# What starting up must not cost. Pydantic and NumPy are allowed in the kernel, but no command line needs them to
# print its help.
HEAVY = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic", "sqlite3", "psutil")


def modules() -> dict[str, Path]:
    """Every module of the three packages by dotted name."""
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def imports(module: str, source: str, package: bool = False) -> Iterator[str]:
    """Dotted names that a module imports, wherever it does; ``from a import b`` gives both ``a`` and ``a.b``.

    Args:
        module: its dotted name, for relative imports.
        source: its text.
        package: whether it is an ``__init__``.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: len(module.split(".")) - node.level + package] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                yield node.args[0].value


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def phase_of(module: str) -> str:
    return ".".join(module.split(".")[:3])


def broken(module: str, imported: str) -> str | None:
    """The rule that an import breaks, or None."""
    for product, other in (("agent_forge", "bagley"), ("bagley", "agent_forge")):
        if inside(module, product) and inside(imported, other):
            return "the products never import each other"
        if inside(module, "forgekit") and inside(imported, product):
            return "the kernel never imports a product"
    if inside(imported, PHASES):
        if not inside(module, PHASES):
            return "phases are reached through the registry only"
        if phase_of(imported) != phase_of(module):
            return "phases never import phases"
    return None


def violations(module: str, source: str, package: bool = False) -> list[str]:
    found = {(name, rule) for name in imports(module, source, package) if (rule := broken(module, name))}
    return [f"{module} imports {name}: {rule}" for name, rule in sorted(found)]


def test_no_module_breaks_the_import_rules():
    known = modules()
    assert {"forgekit.config", "agent_forge.pipeline.orchestrator", "agent_forge.phases.cognate.phase"} <= known.keys()
    told = [
        line
        for module, path in known.items()
        for line in violations(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    ]
    assert told == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("agent_forge.x", "import bagley"),
        ("agent_forge.x", "def f():\n    from bagley.core import turn"),
        ("bagley.core.x", "from agent_forge import profile"),
        ("forgekit.store.x", "import agent_forge.profile as p"),
        ("forgekit.store.x", "from importlib import import_module\nimport_module('bagley')"),
        ("agent_forge.pipeline.orchestrator", "from agent_forge.phases.cognate import phase"),
        ("agent_forge.pipeline.orchestrator", "from ..phases import cognate"),
        ("agent_forge.phases.bitnet.phase", "from agent_forge.phases.cognate.data import draw"),
        ("agent_forge.phases.bitnet.phase", "from ..cognate.data import draw"),
    ],
)
def test_the_rules_see_every_way_to_break_them(module, source):
    assert violations(module, source)


def test_what_is_allowed_is_not_reported():
    source = (
        "from forgekit.config import Config\nfrom agent_forge.pipeline.phase import Progress\nfrom .data import draw"
    )
    assert violations("agent_forge.phases.cognate.phase", source) == []
    assert violations("bagley.core.turn", "from forgekit.hub import read_hf_model") == []


def loaded_after(code: str) -> list[str]:
    """Which heavy packages are loaded after running ``code`` in a fresh interpreter."""
    report = f"import json, sys; sys.stderr.write(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1])


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_loads_nothing_heavy(package):
    assert loaded_after(f"import {package}") == []


@pytest.mark.parametrize("words", ["['--help']", "['run', '--help']", "['data', 'list', '--help']", "['--version']"])
def test_help_loads_nothing_heavy(words):
    code = f"""
import sys
from agent_forge.cli.main import main
sys.argv = ["agent-forge", *{words}]
try:
    main()
except SystemExit as stopped:
    assert not stopped.code
"""
    # Typer itself brings pydantic along where a command has typed options.
    assert set(loaded_after(code)) <= ({"pydantic"} if "run" in words or "list" in words else set())


def test_configurations_and_plans_need_no_torch():
    """``config``, ``phases`` and profile checks answer at once."""
    code = "from agent_forge.profile import load_profile\nload_profile('nano').model_config_solved().parameters()"
    assert not {"torch", "transformers"} & set(loaded_after(code))


def test_public_names_are_there():
    """The names that users of the sources expect; an unknown one is an ordinary AttributeError."""
    import agent_forge
    import forgekit

    for package in (forgekit, agent_forge):
        for name in package.__all__:
            assert getattr(package, name) is not None, name
        with pytest.raises(AttributeError, match="NoSuchName"):
            package.NoSuchName  # noqa: B018
