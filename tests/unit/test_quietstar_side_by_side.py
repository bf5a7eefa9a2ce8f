"""Phase 3's trainings side by side, and the wider window of the model that learns to think."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace

import pytest
import torch
from test_phase_quietstar import PIECE, Interrupted
from tiny import Echo, gpt_config, made, same, trm_config, weights

from agent_forge.phases.quietstar.phase import with_window
from agent_forge.phases.quietstar.training import Piece
from forgekit.errors import ConfigError

NAMES = ("with", "without")


@pytest.fixture(autouse=True)
def two_threads():
    """Two threads to share; one again afterwards."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def pieces() -> list[Piece]:
    """Two trainings that do not depend on each other."""
    return [Piece(name, made(gpt_config(), i, 0.1), Echo(length=12, seed=i), PIECE) for i, name in enumerate(NAMES)]


def work(place: Interrupted, wanted: bool = True):
    both = pieces()
    records = place.workshop().train_all(both, wanted)
    return {piece.name: weights(piece.model) for piece in both}, records


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Both, one after another on one thread each."""
    torch.set_num_threads(1)
    return work(Interrupted(tmp_path_factory.mktemp("alone")))


def equal(found, wanted) -> bool:
    return all(same(found[0][name], wanted[0][name]) for name in NAMES) and found[1] == wanted[1]


def test_side_by_side_gives_the_bits_and_records_of_one_after_another(tmp_path, alone):
    place = Interrupted(tmp_path)
    assert equal(work(place), alone)
    assert place.logger.of("trained_beside"), "the second was trained in a process of its own"
    assert [e["name"] for e in place.logger.of("trained")] == list(NAMES)
    steps = [e["step"] for e in place.logger.of("quietstar_step") if e["name"] == "without"]
    assert steps == [2, 4, 6, 7] and not place.logger.of("train_beside_ended")
    assert not list(tmp_path.glob("checkpoints/*")) and len(list(tmp_path.glob("pieces/*"))) == 2


def test_finished_ones_are_not_begun_again(tmp_path, alone):
    work(Interrupted(tmp_path))
    again = Interrupted(tmp_path)
    assert equal(work(again), alone) and again.logger.seen == []
    next(tmp_path.glob("pieces/without-*")).unlink()
    third = Interrupted(tmp_path)
    assert equal(work(third), alone) and [e["name"] for e in third.logger.of("trained")] == ["without"]


@pytest.mark.parametrize("stop_at", [2, 5, 7])
def test_interrupted_they_go_on_as_if_nothing_had_been(tmp_path, alone, stop_at):
    with pytest.raises(KeyboardInterrupt):
        work(Interrupted(tmp_path, stop_at))
    assert equal(work(Interrupted(tmp_path)), alone)


@dataclass(frozen=True)
class Deadly(Echo):
    """Data that kills the process it is drawn in from step 5 on, unless that is the one it was made in."""

    home: int = 0

    def batch(self, step: int):
        if step >= 5 and os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(step)


def test_a_process_that_ended_badly_is_told_and_made_up_for(tmp_path, alone):
    place, both = Interrupted(tmp_path), pieces()
    both[1] = replace(both[1], data=Deadly(length=12, seed=1, home=os.getpid()))
    records = place.workshop().train_all(both, True)
    assert equal(({piece.name: weights(piece.model) for piece in both}, records), alone)
    assert place.logger.of("train_beside_ended") == [{"name": "without", "exit_code": -9}]


def test_a_wider_window_changes_nothing_that_the_narrow_one_sees():
    parent = made(trm_config(window=4), stir=0.1)
    same_one, wider = with_window(parent, None), with_window(parent, 16)
    assert same_one is not parent and same(weights(parent), weights(same_one)) and same(weights(parent), weights(wider))
    assert (same_one.config.window, wider.config.window) == (4, 16) and not wider.training
    ids = torch.randint(0, 24, (2, 12))
    logits = [model.eval()(ids).logits for model in (parent, wider)]
    torch.testing.assert_close(logits[0][:, :4], logits[1][:, :4])
    assert not torch.allclose(logits[0][:, 8:], logits[1][:, 8:])


def test_windows_that_cannot_be_set_are_refused():
    with pytest.raises(ConfigError, match="phases.quietstar.window"):
        with_window(made(trm_config()), 0)
    model = made(gpt_config())
    model.hf = model
    with pytest.raises(ConfigError, match="phases.quietstar.window"):
        with_window(model, 8)
