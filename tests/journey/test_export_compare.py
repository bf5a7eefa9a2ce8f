"""Models of a real run exported and compared by the command line."""

from __future__ import annotations

import json

import pytest

from tests.conftest import run_cli

QUICK = (
    "--problems",
    "6",
    "--families",
    "copy,far_recall",
    "--levels",
    "1-2",
    "--windows",
    "4",
    "--window-bytes",
    "64",
)


def test_an_exported_specialist_answers_as_the_original(copy):
    done = run_cli("export", "reasoning", "-o", "out", "--json", cwd=copy.home)
    assert done.code == 0, done.err
    receipt = json.loads(done.out)
    assert receipt["files"]["model.safetensors"] == (copy.folder("reasoning") / "model.safetensors").stat().st_size
    card = (copy.home / "out" / "README.md").read_text(encoding="utf-8")
    manifest = json.loads((copy.folder("reasoning") / "manifest.json").read_text(encoding="utf-8"))
    assert receipt["model_id"] == manifest["model_id"] and f"| parameters | {manifest['parameters']:,} |" in card
    assert manifest["parents"][0] in card and "trunk learned copy" in card and "documents kept" in card
    answers = [run_cli("chat", name, "copy 12", "--json", cwd=copy.home) for name in ("out", "reasoning")]
    assert len({json.loads(done.out)["answer"] for done in answers}) == 1
    again = run_cli("export", "reasoning", "-o", "out", cwd=copy.home)
    assert again.code == 4 and "exists already" in again.error


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("reasoning", "--format", "onnx"), 2, "unknown export_format 'onnx'; choose one of hf"),
        (("reasoning", "--dtype", "int3"), 2, "dtype"),
        (("reasoning", "--max-shard", "much"), 2, "'much' is not a size"),
        (("nobody",), 4, "no model 'nobody'"),
    ],
)
def test_exports_that_cannot_be_are_refused_in_one_line(copy, words, code, told):
    done = run_cli("export", *words, "-o", "out", cwd=copy.home)
    assert done.code == code and told in done.error
    assert not (copy.home / "out").exists()


def test_a_damaged_model_is_neither_exported_nor_compared(copy):
    with open(copy.folder("reasoning") / "model.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    for words in (("export", "reasoning", "-o", "out"), ("compare", "trunk", "reasoning", *QUICK)):
        done = run_cli(*words, cwd=copy.home)
        assert done.code == 4 and "truncated or changed" in done.error


def test_models_are_compared_and_an_export_is_equal_to_its_original(copy):
    assert run_cli("export", "trunk", "-o", "same", cwd=copy.home).code == 0
    done = run_cli("compare", "trunk", "memory_integration", "same", *QUICK, "--json", cwd=copy.home)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert [m["name"] for m in result["models"]] == ["trunk", "memory_integration", "same"]
    assert [row["family"] for row in result["families"]] == ["copy", "far_recall", "all"]
    for row in (*result["families"], result["text"]):
        equal = row["differences"][1]
        assert equal["model"] == "same" and equal["difference"] == 0 and equal.get("mcnemar_p", 1.0) == 1.0
    assert all(value["mean"] > 0 for value in result["text"]["bits_per_byte"].values())
    shown = run_cli("compare", "trunk", "memory_integration", *QUICK, cwd=copy.home)
    assert shown.code == 0 and "differences to trunk" in shown.out and "far_recall" in shown.out, shown.err


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("trunk",), 2, "one model cannot be compared"),
        (("trunk", "trunk"), 4, "the same model twice"),
        (("trunk", "nobody"), 4, "no model 'nobody'"),
        (("trunk", "reasoning", "--families", "srot"), 2, "did you mean sort"),
        (("trunk", "reasoning", "--levels", "0-3"), 2, "level 0 is not in 1..10"),
        (("trunk", "reasoning", "--split", "reports"), 2, "did you mean report"),
        (("trunk", "reasoning", "--data", "nowhere"), 3, "no folder nowhere"),
    ],
)
def test_comparisons_that_cannot_be_are_refused_in_one_line(copy, words, code, told):
    done = run_cli("compare", *words, cwd=copy.home)
    assert done.code == code and told in done.error
