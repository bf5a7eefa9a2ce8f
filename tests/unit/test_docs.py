"""The generated pages are what the sources say now, and the check sees it when they are not."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "make_docs.py"


@pytest.fixture(scope="module")
def make_docs():
    spec = importlib.util.spec_from_file_location("make_docs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_generated_page_has_drifted():
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_check_names_what_would_change_and_writes_nothing(make_docs, monkeypatch, tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    texts = {tmp_path / "docs" / "cli.md": "new", tmp_path / "README.md": "same"}
    (tmp_path / "docs" / "cli.md").write_text("old")
    (tmp_path / "README.md").write_text("same")
    monkeypatch.setattr(make_docs, "ROOT", tmp_path)
    monkeypatch.setattr(make_docs, "pages", lambda: texts)
    assert make_docs.main(check=True) == 1
    assert capsys.readouterr().err == "error: docs/cli.md is out of date; run `make docs`\n"
    assert (tmp_path / "docs" / "cli.md").read_text() == "old"
    assert make_docs.main(check=False) == 0 and (tmp_path / "docs" / "cli.md").read_text() == "new"
    assert make_docs.main(check=True) == 0


def test_the_command_page_is_plain_text_of_fixed_width(make_docs, monkeypatch):
    page = make_docs.command_page()
    assert "\x1b" not in page and all(len(line) <= make_docs.WIDTH for line in page.splitlines())
    for title in ("agent-forge", "agent-forge run", "agent-forge data check", "agent-forge doctor"):
        assert f"\n## {title}\n" in page
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert make_docs.command_page() == page, "whatever the terminal"


def test_the_metric_page_counts_every_metric(make_docs):
    from forgekit.tracking.catalogue import catalogue

    count = int(re.search(r"## cognate: (\d+) metrics", make_docs.metric_page())[1])
    assert count == len(catalogue("cognate"))


def test_a_folder_that_nobody_described_is_an_error(make_docs, monkeypatch):
    monkeypatch.setattr(make_docs, "_folders", lambda: ["forgekit", "forgekit/surprise"])
    with pytest.raises(SystemExit, match="describe .'forgekit/surprise'."):
        make_docs.file_map()


def test_a_readme_without_the_markers_is_an_error(make_docs, monkeypatch, tmp_path):
    (tmp_path / "README.md").write_text("no markers")
    monkeypatch.setattr(make_docs, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="put the two lines where the map belongs"):
        make_docs.pages()
