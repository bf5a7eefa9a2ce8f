"""The script behind the Makefile: it must speak to Pythons too old for everything else."""

from __future__ import annotations

import ast
import importlib.util
import shutil
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bootstrap.py"


@pytest.fixture
def bootstrap():
    spec = importlib.util.spec_from_file_location("bootstrap", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_valid_for_the_oldest_python_3():
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 0))
    for node in ast.walk(tree):
        assert not isinstance(node, ast.JoinedStr | ast.AnnAssign | ast.NamedExpr | ast.AsyncFunctionDef), ast.dump(
            node
        )
        if isinstance(node, ast.FunctionDef):
            arguments = (*node.args.args, *node.args.kwonlyargs)
            assert node.returns is None and all(a.annotation is None for a in arguments)
            assert not node.args.posonlyargs
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert imported <= {"hashlib", "os", "shutil", "subprocess", "sys"}, "nothing that has to be installed first"


@pytest.mark.parametrize("version", [(3, 6, 1), (3, 10, 9)])
def test_an_old_python_is_refused_in_one_line(bootstrap, monkeypatch, capsys, tmp_path, version):
    monkeypatch.setattr(bootstrap.sys, "version_info", version)
    with pytest.raises(SystemExit) as stopped:
        bootstrap.main(str(tmp_path / "venv"), "-")
    assert stopped.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith("error: Python {}.{} is too old: Agent Forge needs 3.11 or newer;".format(*version))
    assert told.count("\n") == 1 and not (tmp_path / "venv").exists()


def test_a_disk_too_small_is_refused_in_one_line(bootstrap, monkeypatch, capsys, tmp_path):
    usage = shutil._ntuple_diskusage(10**10, 9 * 10**9, 10**9)
    monkeypatch.setattr(bootstrap.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit) as stopped:
        bootstrap.main(str(tmp_path / "venv"), "-")
    assert stopped.value.code == 1
    told = capsys.readouterr().err
    assert "error: the disk is too small: the packages need 4 GB, 1.0 GB are free in" in told
    assert told.count("\n") == 1 and not (tmp_path / "venv").exists()


def test_an_environment_that_is_up_to_date_is_left_alone(bootstrap, monkeypatch, tmp_path):
    root = str(SCRIPT.parent.parent)
    (tmp_path / "agent-forge.stamp").write_text(bootstrap.fingerprint(root, "test"))
    monkeypatch.setattr(bootstrap.subprocess, "call", lambda command: pytest.fail(f"ran {command}"))
    bootstrap.main(str(tmp_path), "test")
    assert bootstrap.fingerprint(root, "test") != bootstrap.fingerprint(root, "test,lint")


@pytest.mark.parametrize(("answers", "told"), [([1], "no virtual environment"), ([0, 1], "could not be installed")])
def test_a_failed_step_is_told_and_not_stamped(bootstrap, monkeypatch, capsys, tmp_path, answers, told):
    commands = []

    def call(command):
        commands.append(command)
        return answers[len(commands) - 1]

    monkeypatch.setattr(bootstrap.subprocess, "call", call)
    monkeypatch.setattr(bootstrap, "NEEDED_DISK", 0)
    with pytest.raises(SystemExit):
        bootstrap.main(str(tmp_path / "venv"), "test")
    assert told in capsys.readouterr().err and len(commands) == len(answers)
    assert not (tmp_path / "venv" / "agent-forge.stamp").exists()
    assert answers == [1] or commands[1][-1].endswith("[test]")
