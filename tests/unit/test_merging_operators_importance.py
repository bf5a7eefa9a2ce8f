"""Importances: measured on training problems, given as files, and both from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from agent_forge.merging.genome import merge_states
from agent_forge.merging.operators_importance import (
    MeasureConfig,
    empirical_fisher,
    measure,
    measured,
    problem_rows,
    write_measured,
)
from forgekit.data.gym import split_of
from forgekit.data.tokenizer import END, train_tokenizer
from forgekit.errors import ArtifactError, ConfigError, DataError
from forgekit.models.constants import IGNORE
from forgekit.models.io import write_model
from forgekit.store.artifact import Manifest, write_artifact
from tests.unit.tiny import gpt_config, made, same, trm_config

TOKENIZER = train_tokenizer(["copy 12 34 reverse a=1, b=2; a? recall some text. "] * 5, 300)
SHAPE = trm_config(vocab_size=TOKENIZER.get_vocab_size(), max_seq_len=128)


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> dict[str, Path]:
    """A trunk and two siblings branched from it, as a session has them."""
    root = tmp_path_factory.mktemp("sessions") / "run-1" / "phase1_cognate"
    paths = {name: root / name for name in ("trunk", "a", "b")}
    for seed, (name, path) in enumerate(paths.items()):
        model = made(SHAPE, seed=seed, stir=0.05)
        manifest = Manifest(
            model_id=f"cognate_{name}_20260102_030405", session_id="run-1", phase_name="cognate", model_name=name,
            parameters=1, parents=[] if name == "trunk" else ["cognate_trunk_20260102_030405"],
        )  # fmt: skip
        write_artifact(path, lambda work, model=model: write_model(model, TOKENIZER, work), manifest)
    return paths


def states(*paths: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(path / "model.safetensors") for path in paths]


# Measuring


def test_empirical_fisher_is_the_mean_squared_gradient_of_rows():
    model = made(trm_config(), stir=0.1)
    ids = torch.randint(0, 24, (3, 8), generator=torch.Generator().manual_seed(1))
    found = empirical_fisher(model, [(ids[:2], ids[:2]), (ids[2:], ids[2:])])
    want = torch.zeros_like(model.norm.weight)
    for row in ids.split(1):
        (grad,) = torch.autograd.grad(model.training_loss(row, row).total, [model.norm.weight])
        want += grad.square() / 3
    torch.testing.assert_close(found["norm.weight"], want)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(DataError, match="no rows"):
        empirical_fisher(made(gpt_config()), [])


def test_a_problem_is_a_row_and_only_its_answer_is_supervised():
    config = MeasureConfig(problems=7)
    rows = list(problem_rows(TOKENIZER, ("copy", "recall"), config))
    assert len(rows) == 7
    for ids, labels in rows:
        assert ids.shape == labels.shape == (1, ids.shape[1]) and ids.dtype == labels.dtype == torch.int64
        answer = labels[labels != IGNORE].tolist()
        assert labels[0, -len(answer) :].tolist() == answer and answer[-1] == TOKENIZER.token_to_id(END)
        assert ids[0, 1:].tolist()[-len(answer) + 1 :] == answer[:-1]  # already shifted
        prompt, told = (TOKENIZER.decode(x, skip_special_tokens=True) for x in (ids[0].tolist(), answer))
        assert split_of(prompt.removesuffix(told).strip()) == "train"
    assert all(torch.equal(a, b) for x, y in zip(rows, problem_rows(TOKENIZER, ("copy", "recall"), config))
               for a, b in zip(x, y))  # fmt: skip
    other = list(problem_rows(TOKENIZER, ("copy", "recall"), config.replace(seed=1)))
    assert not all(a.shape == b.shape and torch.equal(a, b) for (a, _), (b, _) in zip(rows, other))
    longest = sorted(ids.shape[1] for ids, _ in rows)[2]
    assert {ids.shape[1] <= longest for ids, _ in problem_rows(TOKENIZER, ("copy",), config, longest)} == {True}
    with pytest.raises(DataError, match="no problem fits 2 tokens"):
        next(problem_rows(TOKENIZER, ("copy",), config, 2))


def test_auto_measures_and_anything_else_is_a_path(tmp_path):
    assert measured("here.safetensors") is None and measured("other:copy") is None
    assert measured("auto:recall+copy") == ("recall", "copy") and "sort" in measured("auto")
    with pytest.raises(ConfigError, match="did you mean copy"):
        measured("auto:cpoy")
    model = made(SHAPE, stir=0.1)
    write_model(model, TOKENIZER, tmp_path)
    config, file = MeasureConfig(problems=4), tmp_path / "mine.safetensors"
    paths, notes = write_measured([tmp_path] * 2, ["auto:copy", str(file)], config, tmp_path)
    assert paths[1] == file and len(notes) == 1 and "4 train problems, seed 0, levels 1 to 3 of copy" in notes[0]
    found = load_file(paths[0])
    want = empirical_fisher(model, problem_rows(TOKENIZER, ("copy",), config, 128))
    assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)
    assert sum(float(t.sum()) for t in want.values()) > 0
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ArtifactError, match="'llama' is not one of ours"):
        measure(tmp_path, ("copy",), config)


# The command


def test_importances_from_the_command_line(family, tmp_path, forge):
    words = ("merge", family["a"], family["b"], "--method", "fisher", "-o", "merged")
    asked = ("--importance", "auto:copy+recall", "--problems", 4)
    planned = forge(*words, *asked, "--plan")
    assert planned.code == 0 and "importances of b: squared gradients on 4 train problems" in planned.out, planned.err
    assert not (tmp_path / "merged").exists()
    done = forge(*words, *asked, "--json")
    receipt = json.loads(done.out)
    assert done.code == 0 and [one["role"] for one in receipt["inputs"]][2:] == ["importances"] * 2
    told = [note for note in receipt["notes"] if "train problems" in note]
    assert told == [
        f"importances of {name}: squared gradients on 4 train problems, seed 0, levels 1 to 3 of copy, recall"
        for name in "ab"
    ]
    config = MeasureConfig(problems=4)
    matters = [measure(family[name], ("copy", "recall"), config) for name in "ab"]
    want = merge_states("fisher", states(family["a"], family["b"]), importances=matters)
    assert same(states(tmp_path / "merged")[0], want)
    for name, tensors in zip("ab", matters):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    files = [word for name in "ab" for word in ("--importance", tmp_path / f"{name}.safetensors")]
    assert forge(*words[:-1], "again", *files, "--no-verify").code == 0
    assert same(states(tmp_path / "again")[0], want)
    assert "not hashed" in (tmp_path / "again" / "README.md").read_text()


def test_importances_that_cannot_be_are_refused_before_anything_is_measured(family, tmp_path, forge):
    words = ("merge", family["a"], family["b"], "-o", "merged", "--method")
    for rest, code, message in (
        (("fisher", "--importance", "auto:cpoy"), 2, "did you mean copy"),
        (("fisher", "--importance", "auto", "--problems", 0), 2, "problems"),
        (("fisher", "--importance", "nowhere"), 4, "no such folder"),
        (("fisher", *("--importance", "auto") * 3), 2, "3 sets of importances for 2 models"),
        (("linear", "--importance", "auto"), 2, "uses no importances"),
    ):
        done = forge(*words, *rest)
        assert done.code == code and message in done.error
    assert not (tmp_path / "merged").exists()
