"""``agent-forge report`` on a real session: the page, Markdown, JSON, and sessions that were damaged."""

from __future__ import annotations

import json
from html import escape

from tests.conftest import run_cli


def page_of(journey) -> str:
    return (journey.home / "storage" / "sessions" / journey.session / "report.html").read_text(encoding="utf-8")


def test_the_page_of_a_real_session_tells_every_claim_model_and_curve(copy):
    done = run_cli("report", cwd=copy.home)
    assert done.code == 0 and "trunk learned copy" in done.out, done.err
    assert f"report: {copy.home / 'storage' / 'sessions' / copy.session / 'report.html'}" in done.err
    page = page_of(copy)
    for item in copy.evidence:
        assert escape(item["claim"].replace("_", " ")) in page
    assert page.count('<svg class="forest-row"') >= len(copy.result["evidence"]) - 2
    assert "Trunk: training loss" in page and "Branched models: training loss" in page
    for name in ("trunk", "reasoning", "memory integration", "adaptive computation"):
        assert f"<th scope=row>{name}</th>" in page
    assert "http://" not in page and "https://" not in page


def test_files_are_written_where_they_are_wanted(copy):
    done = run_cli("report", copy.session[:8], "-o", "mine.html", "--markdown", "mine.md", cwd=copy.home)
    assert done.code == 0 and "report: mine.html" in done.err and "Markdown: mine.md" in done.err
    assert (copy.home / "mine.html").read_text().startswith("<!doctype html>")
    assert (copy.home / "mine.md").read_text().startswith("# 8 models of ")
    assert not (copy.home / "storage" / "sessions" / copy.session / "report.html").exists()
    printed = run_cli("report", "--markdown", "-", cwd=copy.home)
    assert printed.out == (copy.home / "mine.md").read_text() and printed.err == ""


def test_json_is_the_evidence_and_writes_no_page(copy):
    done = run_cli("report", "--json", cwd=copy.home)
    assert json.loads(done.out) == copy.evidence
    assert not (copy.home / "storage" / "sessions" / copy.session / "report.html").exists()


def test_a_damaged_result_is_an_error_and_stands_on_the_page(copy):
    path = copy.folder("trunk").parent / "result.json"
    path.write_bytes(path.read_bytes()[:100])
    done = run_cli("report", cwd=copy.home)
    assert done.code == 4 and "result.json: is not JSON" in done.error
    page = page_of(copy)
    assert "phase1_cognate/result.json is not JSON" in page and "Trunk: training loss" in page


def test_damaged_event_lines_are_told_on_the_page(copy):
    log = copy.home / "storage" / "sessions" / copy.session / "events.jsonl"
    log.write_bytes(b"{half\n" + log.read_bytes())
    done = run_cli("report", cwd=copy.home)
    assert done.code == 0 and "1 unreadable line of events.jsonl left out (line 1)" in page_of(copy), done.err


def test_a_folder_is_no_place_for_the_page(copy):
    done = run_cli("report", "-o", "storage", cwd=copy.home)
    assert done.code == 5 and done.error == "storage: is a folder; give a file name"
