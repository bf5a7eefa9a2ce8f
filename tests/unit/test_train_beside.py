"""Trainings beside this one: the same bits as alone, wherever they are done and whatever happens to their process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny import Echo, Events, made, same, train_config, trainer, trm_config, weights

from forgekit.compute.budget import BatchPlan
from forgekit.errors import DataError
from forgekit.train.beside import PATIENCE, SideBySide, Training
from forgekit.train.loop import StepInfo

QUICK = train_config(steps=7, checkpoint_every=3)  # the last step is none of the scheduled ones
TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def two_threads():
    """This process has two threads to give away; afterwards it computes on one again."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Troubled:
    """Data that waits or fails from a step on, outside the process that made it."""

    home: int
    trouble: str
    step: int = 4

    def batch(self, step: int):
        if step >= self.step and os.getpid() != self.home:
            if self.trouble == "wait":
                time.sleep(60)
            if self.trouble == "die":
                os.kill(os.getpid(), signal.SIGKILL)
        if step >= self.step and self.trouble == "fail":
            raise DataError("is broken", where="data", remedy="mend it")
        return Echo().batch(step)


class Heard(list):
    """Steps that were observed."""

    def __call__(self, info: StepInfo) -> None:
        self.append(info.step)


def training(folder: Path, data=None, seed: int = 0, config=QUICK) -> Training:
    return Training(made(trm_config(), seed), data or Echo(), config, folder)


def alone(seed: int = 0) -> dict[str, torch.Tensor]:
    """What a training on one thread gives, uninterrupted and in this process."""
    with SideBySide(["cpu"] * 2, True):
        run = trainer(QUICK, model=made(trm_config(), seed))
        run.run()
    return weights(run.model)


def finished(crew: SideBySide, name: str, one: Training, events, heard) -> dict[str, torch.Tensor]:
    """Wait for a training, then do here what is left of it."""
    crew.wait(name)
    one.trainer(events, heard).run()
    return weights(one.model)


def test_beside_each_other_they_give_the_bits_that_they_give_alone(tmp_path):
    here, there = training(tmp_path / "here"), training(tmp_path / "there", seed=1)
    before, events, heard = weights(there.model), Events(), Heard()
    with SideBySide(["cpu"] * 2, True) as crew:
        assert torch.get_num_threads() == 1
        crew.start("there", there, events, heard)
        mine = Heard()
        here.trainer(Events(), mine).run()
        assert same(weights(there.model), before), "its model here stays as it is while it trains"
        other = finished(crew, "there", there, Events(), late := Heard())
    assert torch.get_num_threads() == 2
    assert same(weights(here.model), alone()) and same(other, alone(1))
    assert mine == heard == list(range(1, 8)) and late == [], "nothing was left to do here"
    assert events.of("trained_beside")[0]["seconds"] > 0
    assert {data["training"] for _, data in events.seen} == {"there"}, "every event says whose it is"
    assert [e["step"] for e in events.of("train_checkpoint")] == [3, 6, 7]


def test_one_after_another_on_as_many_threads_gives_the_same(tmp_path):
    """Switched off for want of threads: the same course, no process."""
    torch.set_num_threads(1)
    with SideBySide(["cpu"] * 2, True) as crew:
        crew.start("there", one := training(tmp_path, seed=1), Events(), Heard())
        assert crew.wait("there") == 0 and not list(tmp_path.iterdir())
        assert same(finished(crew, "there", one, Events(), heard := Heard()), alone(1)) and len(heard) == 7


@pytest.mark.parametrize(("trainings", "wanted", "threads"), [(1, True, 2), (2, False, 2), (2, True, 1), (3, True, 1)])
def test_who_shares_the_threads(trainings, wanted, threads):
    with SideBySide(["cpu"] * trainings, wanted):
        assert torch.get_num_threads() == threads


def test_a_random_draw_is_the_same_wherever_it_is_made(tmp_path):
    torch.manual_seed(3)
    first = training(tmp_path)
    torch.manual_seed(4)
    first.trainer(Events(), Heard())
    mine = torch.rand(1)
    torch.manual_seed(3)
    made(trm_config(), 0)
    training(tmp_path).trainer(Events(), Heard())
    assert torch.equal(torch.rand(1), mine)


@pytest.mark.parametrize(("trouble", "code"), [("die", -signal.SIGKILL), ("fail", 1)])
def test_what_a_process_leaves_is_finished_here(tmp_path, trouble, code):
    one, events = training(tmp_path, Troubled(os.getpid(), trouble), seed=1), Events()
    with SideBySide(["cpu"] * 2, True) as crew:
        crew.start("there", one, events, Heard())
        assert crew.wait("there") == code
        told = [data["error"] for data in events.of("train_beside_failed")]
        assert told == (["data: is broken; mend it"] if trouble == "fail" else [])
        if trouble == "fail":  # and fails here, with its own words
            with pytest.raises(DataError, match="is broken"):
                one.trainer(events, Heard()).run()
            return
        one.trainer(events, heard := Heard()).run()
    assert same(weights(one.model), alone(1)) and heard == [4, 5, 6, 7], "from the checkpoint of step 3"


def test_one_that_dies_before_it_has_begun_keeps_nobody_waiting(tmp_path):
    """What it was to be given is larger than a pipe holds."""
    one = Training(made(trm_config(vocab_size=30_000), 1), Echo(), train_config(steps=1), tmp_path)
    with SideBySide(["cpu"] * 2, True) as crew:
        crew.start("there", one, events := Events(), Heard())
        crew._others["there"]._process.kill()
        assert crew.wait("there") == -signal.SIGKILL and events.seen == []
        one.trainer(events, heard := Heard()).run()
    assert heard == [1]


class Stuck(Echo):
    """Data that cannot leave its process."""

    def __reduce__(self):
        raise TypeError("cannot pickle it")


def test_what_cannot_leave_this_process_is_trained_here(tmp_path):
    one = training(tmp_path, Stuck(), seed=1)
    with SideBySide(["cpu"] * 2, True) as crew:
        crew.start("there", one, events := Events(), Heard())
        assert events.of("train_beside_failed") == [{"training": "there", "error": "cannot pickle it"}]
        assert same(finished(crew, "there", one, events, Heard()), alone(1))


def test_an_observer_that_cannot_go_on_leaves_no_process_behind(tmp_path):
    def full(info):
        raise OSError("no space left")

    two = [training(tmp_path / str(i), Troubled(os.getpid(), "wait"), seed=i) for i in range(2)]
    crew = SideBySide(["cpu"] * 3, True)
    with pytest.raises(OSError, match="no space"), crew:
        crew.start("a", two[0], Events(), full)
        crew.start("b", two[1], Events(), Heard())
        crew.wait("a")
    assert torch.get_num_threads() == 2
    assert not any(other._process.is_alive() for other in crew._others.values())


def test_memory_is_shared_by_those_that_train_at_once(tmp_path, monkeypatch):
    asked = []

    def plan(model, config, device, share=1, memory=1.0):
        asked.append(memory)
        return BatchPlan(micro_batch=2)

    monkeypatch.setattr("forgekit.train.beside.choose_plan", plan)
    free, fixed = (training(tmp_path, config=train_config(micro_batch=micro)) for micro in (0, 3))
    with SideBySide(["cpu"] * 4, True) as crew:
        assert crew.ready(free).config.micro_batch == 2 and crew.ready(fixed) is fixed
    with SideBySide(["cpu"] * 4, False) as crew:
        assert crew.ready(free) is free
    assert asked == [0.25]


def test_an_interruption_here_ends_it_with_a_checkpoint_of_the_step_it_is_at(tmp_path):
    one, events = training(tmp_path, Troubled(os.getpid(), "wait"), seed=1), Events()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), SideBySide(["cpu"] * 2, True) as crew:
        crew.start("there", one, events, heard := Heard())
        while len(heard) < 4:
            crew.listen()
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert time.monotonic() - began < PATIENCE, "it listens to the request"
    assert events.of("train_checkpoint")[-1] == {"training": "there", "step": 4, "reason": "interrupted"}
    assert not list(tmp_path.glob("*.unfinished"))
    with SideBySide(["cpu"] * 2, True):
        one.trainer(events, Heard()).run()
    assert same(weights(one.model), alone(1))


ORPHAN = """
import os, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
from test_train_beside import Troubled, training
from tiny import Events
from forgekit.train.beside import SideBySide

if __name__ == "__main__":
    torch.set_num_threads(2)
    with SideBySide(["cpu"] * 2, True) as crew:
        crew.start("there", training(Path({folder!r}), Troubled(os.getpid(), "wait")), Events(), lambda info: None)
        print(crew._others["there"]._process.pid, flush=True)
        time.sleep(60)
"""


def test_it_does_not_outlive_the_process_that_started_it(tmp_path):
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN.format(tests=str(TESTS), folder=str(tmp_path / "checkpoints")), encoding="utf-8")
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, cwd=TESTS.parent.parent)
    pid = int(parent.stdout.readline())
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("checkpoints/step-*/state.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(pid)
    parent.kill()
    parent.wait()
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
