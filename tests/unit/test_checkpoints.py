"""Checkpoints: what goes in comes out, bit for bit; what cannot be read is told apart and never half loaded."""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import made, same, train_config, trainer, trm_config, weights

from forgekit.errors import ArtifactError, ResourceError
from forgekit.train.checkpoints import CheckpointManager


def fresh(folder: Path | None = None, **changes):
    return trainer(train_config(**changes), folder=folder)


def saved(folder: Path, steps=(3, 6), keep: int = 5, **changes):
    """A trained run whose manager has checkpoints at these steps (all with the weights of the end)."""
    run = fresh(**{"ema": 0.5, "optimizer": {"normuon_beta": 0.9}, "checkpoint_every": 0, **changes})
    run.run()
    manager = CheckpointManager(folder, keep)
    for step in steps:
        run.state.position["step"] = step
        manager.save_checkpoint(run.state, {"note": f"at {step}"})
    return run, manager


def optimizer_state(run) -> dict[str, torch.Tensor]:
    names = {p: name for name, p in run.model.named_parameters()}
    return {f"{names[p]}.{k}": torch.as_tensor(v) for p, s in run.optimizer.state.items() for k, v in s.items()}


def test_everything_comes_back_bit_for_bit(tmp_path):
    run, manager = saved(tmp_path, optimizer={"ste": True, "grokfast_lambda": 0.5})
    draws = [random.random(), float(np.random.standard_normal()), float(torch.rand(()))]
    other = fresh(ema=0.5, optimizer={"ste": True, "grokfast_lambda": 0.5})
    metadata = manager.load_checkpoint(manager.checkpoints()[-1], other.state)
    assert metadata == {"note": "at 6"} and other.state.position == run.state.position
    assert same(weights(run.model), weights(other.model))
    assert same(optimizer_state(run), optimizer_state(other)) and len(optimizer_state(run)) > 40
    assert same(run.state.average, other.state.average)
    assert draws == [random.random(), float(np.random.standard_normal()), float(torch.rand(()))]


def test_training_on_does_not_touch_the_file_it_came_from(tmp_path):
    run, manager = saved(tmp_path, steps=(3,))
    other = fresh(ema=0.5)
    manager.load_latest(other.state)
    for p in other.model.parameters():
        p.grad = torch.ones_like(p)
    other.optimizer.step()
    manager.load_checkpoint(manager.checkpoints()[0], fresh(ema=0.5).state)


def test_the_newest_are_kept(tmp_path):
    _, manager = saved(tmp_path, steps=(1, 2, 3, 4), keep=3)
    assert [p.name[-1] for p in manager.checkpoints()] == ["2", "3", "4"]
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in manager.checkpoints()}
    manager.clear()
    assert list(tmp_path.iterdir()) == [] and manager.load_latest(fresh().state) == (None, [])


def test_a_folder_that_is_not_there_holds_no_checkpoint(tmp_path):
    assert CheckpointManager(tmp_path / "nowhere").load_latest(fresh().state) == (None, [])


def test_an_unfinished_folder_is_no_checkpoint(tmp_path):
    _, manager = saved(tmp_path)
    (tmp_path / "step-00000009").mkdir()
    shutil.copy(manager.checkpoints()[-1] / "state.safetensors", tmp_path / "step-00000009")
    assert manager.load_latest(fresh().state)[0].name == "step-00000006"


def truncate(path: Path) -> None:
    file = path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def flip(path: Path) -> None:
    file = path / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))


def change(path: Path, **values) -> None:
    record = json.loads((path / "state.json").read_text()) | values
    (path / "state.json").write_text(json.dumps({k: v for k, v in record.items() if v is not None}))


DAMAGE = {
    "truncated tensors": truncate,
    "one bit": flip,
    "no tensors": lambda path: (path / "state.safetensors").unlink(),
    "half a record": lambda path: (path / "state.json").write_text('{"schema": 1, "sha'),
    "not a record": lambda path: (path / "state.json").write_text("[1]"),
    "no position": lambda path: change(path, position=None),
    "no random state": lambda path: change(path, python_random=None),
    "newer schema": lambda path: change(path, schema=99),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    run, manager = saved(tmp_path)
    damage(manager.checkpoints()[-1])
    other = fresh(ema=0.5)
    path, problems = manager.load_latest(other.state)
    assert path.name == "step-00000003" and other.state.position["step"] == 3
    assert len(problems) == 1 and "step-00000006" in problems[0] and "\n" not in problems[0]
    assert same(weights(run.model), weights(other.model))


def test_a_newer_schema_says_so(tmp_path):
    _, manager = saved(tmp_path)
    change(manager.checkpoints()[-1], schema=99)
    with pytest.raises(ArtifactError, match="written by a newer version; upgrade agent-forge"):
        manager.load_checkpoint(manager.checkpoints()[-1], fresh().state)


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    _, manager = saved(tmp_path)
    for path in manager.checkpoints():
        truncate(path)
    state = fresh().state
    before = weights(state.model)
    with pytest.raises(ArtifactError, match="no readable checkpoint"):
        manager.load_latest(state)
    assert same(before, weights(state.model))


@pytest.mark.parametrize(
    "config", [trm_config(n_layers=3), trm_config(ffn_hidden=8), trm_config(t_max=0, trm_hidden=0)]
)
def test_another_models_checkpoint_is_refused_before_anything_is_touched(tmp_path, config):
    _, manager = saved(tmp_path)
    run = trainer(train_config(), model=made(config))
    before = weights(run.model)
    with pytest.raises(ArtifactError, match="belongs to another model .*blocks|recursion"):
        manager.load_checkpoint(manager.checkpoints()[0], run.state)
    assert same(before, weights(run.model))


def test_averaging_switched_on_later_starts_from_the_weights(tmp_path):
    run, manager = saved(tmp_path, ema=0.0)
    other = fresh(ema=0.5)
    manager.load_latest(other.state)
    assert same(other.state.average, {name: p.detach() for name, p in run.model.named_parameters()})


def test_what_a_given_up_course_left_neither_pushes_out_nor_is_resumed(tmp_path):
    run, manager = saved(tmp_path, steps=(3, 6, 9), keep=1)
    truncate(manager.checkpoints()[-1])
    run.state.position["step"] = 4
    manager.save_checkpoint(run.state)
    assert [p.name for p in manager.checkpoints()] == ["step-00000004"]
    assert manager.load_latest(fresh().state)[0].name == "step-00000004"


def test_saving_the_same_step_again_replaces_it(tmp_path):
    run, manager = saved(tmp_path, steps=(3, 3))
    assert manager.load_checkpoint(manager.checkpoints()[0], fresh().state) == {"note": "at 3"}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_a_failed_save_leaves_nothing_behind(tmp_path):
    run, manager = saved(tmp_path)
    run.state.position["losses"] = [object()]
    run.state.position["step"] = 7
    with pytest.raises(TypeError):
        manager.save_checkpoint(run.state)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000006"]


def test_leftovers_of_a_dead_process_are_swept(tmp_path):
    run, manager = saved(tmp_path, steps=(3,))
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = tmp_path / f".step-00000006.{dead.pid}-1-0123abcd.unfinished"
    left.mkdir()
    (left / "state.safetensors").write_bytes(b"half")
    run.state.position["step"] = 6
    manager.save_checkpoint(run.state)
    assert not left.exists() and len(manager.checkpoints()) == 2


def test_a_folder_that_is_a_file_is_told_in_one_line(tmp_path):
    run, _ = saved(tmp_path / "ok")
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be used"):
        CheckpointManager(tmp_path / "file").save_checkpoint(run.state)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    busy = subprocess.run(["umount", str(folder)], capture_output=True).returncode
    if busy:  # leave nothing mounted, but say that something still holds a file there
        subprocess.run(["umount", "-l", str(folder)], check=True)
    assert not busy, "a loaded checkpoint keeps its file open, so deleting it would free nothing"


def test_on_a_full_disk_old_checkpoints_go_first_and_the_last_one_survives(small_disk):
    run, manager = saved(small_disk, steps=(3,))
    size = sum(f.stat().st_size for f in manager.checkpoints()[0].iterdir())
    room = 1000 * 1024
    assert size < 0.2 * room  # else the test needs a larger disk
    for step in range(4, 12):  # far more than fit: the oldest make room
        run.state.position["step"] = step
        manager.save_checkpoint(run.state)
    assert 1 <= len(manager.checkpoints()) < 9 and manager.checkpoints()[-1].name == "step-00000011"
    manager.keep = 1
    run.state.position["step"] = 12
    manager.save_checkpoint(run.state)
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - size // 2))
    run.state.position["step"] = 13
    with pytest.raises(ResourceError, match="the disk is full") as caught:
        manager.save_checkpoint(run.state)
    assert "\n" not in str(caught.value)
    other = fresh(ema=0.5)
    path, problems = manager.load_latest(other.state)
    assert path.name == "step-00000012" and problems == [] and same(weights(run.model), weights(other.model))
    assert not [p for p in small_disk.iterdir() if p.name.startswith(".")]
