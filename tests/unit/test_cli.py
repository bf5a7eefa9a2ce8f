"""The command line without training: configurations, usage mistakes, tables, the error boundary."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from agent_forge.cli.progress import Bars
from agent_forge.cli.shared import table
from agent_forge.pipeline.phase import Progress
from tests.conftest import ROOT, small_profile

PICO = (ROOT / "profiles" / "pico.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "steps = 20",
            "steps = -5",
            "phases.cognate.specialist.steps: value -5 refused: input should be greater than 0; give another value. "
            "Optimizer steps. Default: 300.",
        ),
        ("context = 160", 'context = "long"', "context: value 'long' refused: input should be a valid integer"),
        ("problems = 40", "problem = 40", "phases.cognate.evaluation.problem: unknown key; did you mean problems?"),
        ("vocab_size = 448", "vocab_size = 0", "model.settings.vocab_size: value 0 refused: input should be greater"),
        ("target_parameters = 100_000", "target_parameters = 1_000", "model.target_parameters: no shape of 2 layers"),
        (
            'family = "copy"',
            'family = "copi"',
            "phases.cognate.trunk_mix.0: gym family: unknown gym family 'copi'; did",
        ),
        ("[phases.cognate]", "[phases.cognatt]", "phases.cognatt: unknown phase 'cognatt'; did you mean cognate?"),
        ("context = 160", "context =", "not valid toml: Invalid value (at line 4, column 10); mend the syntax"),
    ],
)
def test_config_validate_names_field_value_rule_and_remedy(forge, tmp_path, old, new, told):
    # The wrong table header must be wrong everywhere, or the tables below it would still name the right one.
    text = PICO.replace("phases.cognate", "phases.cognatt") if "cognatt" in new else PICO.replace(old, new, 1)
    assert text != PICO
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    done = forge("config", "--validate", "mine.toml")
    assert done.code == 2 and done.out == ""
    assert done.error.startswith(f"mine.toml: {told}") and len(done.error) < 400


def test_config_validate_accepts_toml_and_json(forge, tmp_path):
    (tmp_path / "mine.toml").write_text(PICO, encoding="utf-8")
    shown = forge("config", "--profile", "pico", "--json")
    (tmp_path / "mine.json").write_text(shown.out, encoding="utf-8")
    for name in ("mine.toml", "mine.json", "mine"):
        done = forge("config", "--validate", name)
        assert done.code == 0 and "is valid: pico" in done.err, done.err
    (tmp_path / "mine.json").write_text(shown.out.replace('"steps": 60', '"steps": 0'), encoding="utf-8")
    done = forge("config", "--validate", "mine.json")
    assert done.code == 2 and "mine.json: phases.cognate.trunk.steps: value 0 refused" in done.error


def test_config_json_holds_every_default_written_out(forge):
    shown = json.loads(forge("config", "--profile", "pico", "--json").out)
    assert shown["phases"]["cognate"]["trunk"]["clip"] == 1.0
    assert shown["cleanup"]["max_sessions_total"] == 100


def test_config_shows_the_file_that_was_named(forge, tmp_path):
    assert forge("config", "--profile", "pico").out == PICO
    mine = PICO + "# my own\n"
    (tmp_path / "mine.toml").write_text(mine, encoding="utf-8")
    assert forge("config", "--profile", "mine.toml").out == mine, "its name inside is pico, but it is another file"
    done = forge("config", "--profile", "picco")
    assert done.code == 2 and "unknown profile 'picco'; did you mean pico" in done.error


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("phases.cognate.trunk.steps", "Optimizer steps."),
        ("phases.cognate.specialists.0.seed", "Seed of its data."),
        ("model.settings.window", "Attention window in tokens"),
        ("model", "fields: family, target_parameters"),
        ("phases.cognate", "fields trunk_mix, text"),
        ("cleanup.max_sessions_total", "default 100"),
    ],
)
def test_config_describe_explains(forge, field, told):
    done = forge("config", "--describe", field)
    assert done.code == 0 and done.out.startswith(field) and told in done.out


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("phases.cognate.trunk.stepz", "unknown field 'stepz'; did you mean steps"),
        ("phases.cognatt", "did you mean cognate?"),
        ("context.more", "context holds no fields; describe context"),
    ],
)
def test_config_describe_refuses_what_is_not_there(forge, field, told):
    done = forge("config", "--describe", field)
    assert done.code == 2 and told in done.error


def editor(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_config_edit_copies_the_profile_and_checks_the_result(forge, tmp_path, monkeypatch):
    monkeypatch.setenv("EDITOR", "true")
    done = forge("config", "--profile", "pico", "--edit", "mine.toml")
    assert done.code == 0 and "mine.toml is valid: pico" in done.err
    assert (tmp_path / "mine.toml").read_text(encoding="utf-8") == PICO
    monkeypatch.setenv("EDITOR", editor(tmp_path / "ed", 'sed -i "s/pico\\"/own\\"/" "$1"'))
    assert "mine.toml is valid: own" in forge("config", "--edit", "mine.toml").err


def test_config_edit_says_what_the_editor_broke_and_keeps_the_file(forge, tmp_path, monkeypatch):
    monkeypatch.setenv("EDITOR", editor(tmp_path / "ed", 'sed -i "s/^context = .*/context = 0/" "$1"'))
    done = forge("config", "--profile", "pico", "--edit", "mine.toml")
    assert done.code == 2 and "mine.toml: context: value 0 refused" in done.error
    assert "context = 0" in (tmp_path / "mine.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("command", "target", "told"),
    [
        ("", "mine.toml", "$EDITOR: no editor is set; set it, or edit mine.toml and use --validate"),
        ("/no/such/editor", "mine.toml", "$EDITOR: '/no/such/editor' cannot be run"),
        ("vi 'x", "mine.toml", "cannot be run (No closing quotation); set another editor"),
        ("true", "mine.txt", "--edit: 'mine.txt' is not a .toml file; name the copy, e.g. mine.toml"),
    ],
)
def test_config_edit_refuses(forge, monkeypatch, command, target, told):
    monkeypatch.setenv("EDITOR", command)
    done = forge("config", "--edit", target)
    assert done.code == 2 and told in done.error


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("run", "--profil", "pico"), "No such option: --profil"),
        (("nosuch",), "No such command 'nosuch'; see `agent-forge --help`"),
        (("model",), "Missing argument"),
        (("models", "--limit", "many"), "Invalid value for '--limit'"),
        (("clean", "--age", "-1"), "--age: max_session_age_days: value -1 refused"),
        (("data", "show", "nosuch"), "unknown dataset 'nosuch'"),
        (("data", "show", "gym:sort", "--level", "11"), "level 11 is not in 1..10"),
        (("data", "show", "gym:sorting"), "unknown gym family 'sorting'; did you mean sort"),
        (("plan", "--profile", "pico", "--until", "experts"), "profile 'pico' has no settings for phase 'experts'"),
        (("chat", "--temperature", "-1"), "chat: temperature: value -1.0 refused"),
        (("chat", "--top-p", "2", "hi"), "chat: top_p: value 2.0 refused"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line_and_exit_2(forge, words, told):
    done = forge(*words)
    assert done.code == 2 and told in done.error and done.out == ""


def test_nothing_asked_for_shows_the_help(forge):
    done = forge()
    assert done.code == 2 and "Usage" in done.out + done.err and "error:" not in done.err
    assert forge("--help").code == 0


def test_version(forge):
    from forgekit.version import __version__

    assert forge("--version").out == f"agent-forge {__version__}\n"


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("chat", "hello"), 4, "no models yet; make one: `agent-forge run`"),
        (("model", "latest"), 4, "no models yet"),
        (("model", "nothing"), 4, "no model 'nothing'"),
        (("report",), 4, "no session 'latest'; see `agent-forge status`"),
        (("run", "--resume", "latest"), 4, "no session 'latest'"),
        (("data", "check"), 3, "--data: no data folder; give the folder that holds bench/"),
        (("data", "list", "--data", "nowhere"), 3, "no folder nowhere"),
    ],
)
def test_asking_for_what_is_not_there(forge, words, code, told):
    done = forge(*words)
    assert done.code == code and told in done.error


def test_an_empty_storage_tells_how_to_begin(forge):
    assert "start one with: agent-forge run" in forge("status").err
    assert "make some with: agent-forge run" in forge("models").err
    assert json.loads(forge("models", "--json").out) == []
    assert "removed 0 sessions" in forge("clean", "--all").err
    assert "registry:" in forge("vacuum").err


def test_doctor_prints_a_table_of_checks(forge):
    done = forge("doctor")
    assert done.code in (0, 5) and "matrix product" in done.out


def test_unforeseen_errors_are_one_line_and_a_traceback_with_debug(forge, monkeypatch):
    import agent_forge.profile

    def broken(name):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(agent_forge.profile, "load_profile", broken)
    done = forge("config")
    assert done.code == 70
    assert done.error == "RuntimeError: two lines; run again with --debug for the traceback"
    import sys

    from agent_forge.cli.main import main

    monkeypatch.setattr(sys, "argv", ["agent-forge", "--debug", "config"])
    with pytest.raises(RuntimeError, match="two"):
        main()


def test_storage_can_be_set_by_the_environment(forge, monkeypatch, tmp_path):
    monkeypatch.setenv("AGENT_FORGE_STORAGE", str(tmp_path / "elsewhere"))
    assert forge("models").code == 0
    assert (tmp_path / "elsewhere" / "registry").is_dir() and not (tmp_path / "storage").exists()


def test_tables_show_brackets_as_they_are(capsys):
    """Code and models' answers are full of brackets; a closing one without an opening one once ended a run."""
    table("t", ["a", "b>"], [["x[/b] = y[0]", "[green]good[/]"], ["[bold]", 3]])
    out = capsys.readouterr().out
    assert "x[/b] = y[0]" in out and "[bold]" in out and "good" in out and "[green]" not in out


def test_what_a_model_is_is_told_in_few_words():
    from agent_forge.cli.commands_models import _told

    gym = [{"family": "add", "levels": [1, 2], "weight": 1.0, "options": {}}, {"family": "sort", "levels": (4,)}]
    told = [_told(one) for one in (gym, {"bits": 8, "spared": ["wo", "wv"], "none": {}}, 9.135557, True, None, [], "x")]
    assert told == ["add 1 2; sort 4", "bits 8, spared wo, wv", "9.13556", "yes", "-", "-", "x"]


def test_data_show_prints_code_with_brackets(forge):
    done = forge("data", "show", "python_code", "--rows", "3")
    assert done.code == 0 and "sha256" in done.err


def test_progress_without_a_terminal_is_a_line_per_fifth(capfd):
    with Bars() as bars:
        for step in range(101):
            bars.show(Progress("trunk", step, 100, "loss 1"))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 6 and "trunk 100/100  loss 1" in lines[-1]
    with Bars(enabled=False) as bars:
        bars.show(Progress("trunk", 1, 1))
    assert capfd.readouterr() == ("", "")


def test_progress_on_a_terminal_is_a_bar_per_stage(monkeypatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Bars() as bars:
        bars.show(Progress("trunk", 1, 2, "loss 1"))
        bars.show(Progress("trunk", 2, 2, "loss 0"))
        bars.show(Progress("far_recall", 1, 1))
    err = capfd.readouterr().err
    assert "2/2" in err and "far recall" in err


def test_the_environment_of_the_tests_is_not_the_developers(forge, tmp_path):
    assert Path.cwd() == tmp_path and "AGENT_FORGE_DATA" not in os.environ
    assert small_profile(tmp_path / "s.toml").is_file()
