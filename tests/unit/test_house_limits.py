"""The limits of the house: short functions, short files, few parameters, no broad except, no pickle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINES, FILE_LINES, PARAMETERS = 60, 600, 6
SHIPPED = ("forgekit", "agent_forge", "bagley", "scripts", "benchmarks")

MANY_PARAMETERS = {
    "forgekit/infer/kernels/gpu.py: _ternary": "a GPU kernel takes its pointers and sizes one by one",
    "forgekit/infer/kernels/gpu.py: _grouped": "a GPU kernel takes its pointers and sizes one by one",
    "forgekit/store/storage.py: save_model": "the signature of the sources: the model, its place, what goes with it",
    "agent_forge/cli/commands_run.py: run": "the parameters of a command are its options",
    "agent_forge/cli/commands_handon.py: compare": "the parameters of a command are its options",
    "agent_forge/cli/commands_handon.py: export": "the parameters of a command are its options",
    "agent_forge/cli/commands_serve.py: merge": "the parameters of a command are its options",
    "agent_forge/cli/commands_serve.py: serve": "the parameters of a command are its options",
    "agent_forge/cli/commands_quantize.py: quantize": "the parameters of a command are its options",
    "agent_forge/cli/commands_bake.py: bake": "the parameters of a command are its options",
    "agent_forge/cli/commands_talk.py: chat": "the parameters of a command are its options",
}
BROAD_EXCEPT = {
    "agent_forge/cli/main.py: main": "the boundary: whatever happens becomes one line and an exit code",
    "forgekit/data/tokenizer.py: load_tokenizer": "the library raises bare Exception for any malformed file",
}
PICKLES = {
    "forgekit/train/beside.py: pickle": "between two processes of one run, as multiprocessing does it; no file",
}
# Names of functions that pickle or unpickle, however they are reached.
PICKLING = {"torch.save", "torch.load", "np.save", "numpy.save", "joblib.dump", "joblib.load", "pd.read_pickle"}
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def files(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def too_long(tree: ast.AST) -> list[str]:
    """Functions of more than sixty lines; decorators do not count."""
    return [f"{f.name} has {n} lines" for f in functions(tree) if (n := f.end_lineno - f.lineno + 1) > LINES]


def too_many_parameters(tree: ast.AST) -> list[str]:
    """Names of functions with more than six parameters; ``self`` and ``cls`` do not count."""
    found = []
    for f in functions(tree):
        names = [a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)]
        if len([n for n in names if n not in ("self", "cls")]) > PARAMETERS:
            found.append(f.name)
    return found


def broad_handlers(tree: ast.AST) -> list[str]:
    """Functions that catch everything; handlers that clean up and pass the error on are none of them."""
    return [
        f.name
        for f in functions(tree)
        for node in ast.walk(f)
        if isinstance(node, ast.ExceptHandler) and _catches_all(node.type) and not _passes_on(node)
    ]


def _catches_all(kind: ast.expr | None) -> bool:
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(k is None or getattr(k, "id", "") in ("Exception", "BaseException") for k in kinds)


def _passes_on(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def pickles(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in PICKLERS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLERS:
            found.append(node.module)
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [f"torch.{a.name}" for a in node.names if a.name in ("save", "load")]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in PICKLING:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found += ["allow_pickle"] * (not isinstance(node.value, ast.Constant) or node.value.value is not False)
    return found


def named(check, *folders: str) -> set[str]:
    """Findings as ``path: finding``."""
    return {
        f"{path.relative_to(ROOT).as_posix()}: {finding}"
        for path in files(*folders)
        for finding in check(ast.parse(path.read_text(encoding="utf-8")))
    }


def test_functions_are_short():
    assert named(too_long, *SHIPPED, "tests") == set()


def test_files_are_short():
    sizes = {p.relative_to(ROOT).as_posix(): len(p.read_text(encoding="utf-8").splitlines()) for p in files(*SHIPPED)}
    assert len(sizes) > 60
    assert {path: n for path, n in sizes.items() if n > FILE_LINES} == {}


def test_parameters_are_few():
    assert named(too_many_parameters, *SHIPPED) == set(MANY_PARAMETERS), "list an exception only with a reason"


def test_nothing_catches_everything():
    assert named(broad_handlers, *SHIPPED) == set(BROAD_EXCEPT), "list an exception only with a reason"


def test_nothing_is_pickled():
    assert named(pickles, *SHIPPED) == set(PICKLES)


def test_every_module_says_what_it_is():
    empty = [p for p in files(*SHIPPED) if p.read_text(encoding="utf-8").strip()]
    assert [p.as_posix() for p in empty if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))] == []


@pytest.mark.parametrize(
    ("check", "source"),
    [
        (too_long, "def f():\n" + "    pass\n" * 60),
        (too_many_parameters, "def f(a, b, c, /, d, e, *, g, h): ..."),
        (broad_handlers, "def f():\n    try:\n        g()\n    except:\n        pass"),
        (broad_handlers, "def f():\n    try:\n        g()\n    except (ValueError, Exception):\n        pass"),
        (broad_handlers, "def f():\n    try:\n        g()\n    except Exception as e:\n        raise E from e"),
        (pickles, "import pickle"),
        (pickles, "def f():\n    from torch import save"),
        (pickles, "torch.load(path, weights_only=True)"),
        (pickles, "np.load(path, allow_pickle=True)"),
    ],
)
def test_every_limit_can_be_broken(check, source):
    assert check(ast.parse(source))


def test_what_is_within_the_limits_is_not_reported():
    handler = "    try:\n        h()\n    except BaseException:\n        clean()\n        raise"
    source = f"def f(self, a, b, c, d, e, g):\n{handler}"
    for check in (too_long, too_many_parameters, broad_handlers, pickles):
        assert check(ast.parse(source)) == []
