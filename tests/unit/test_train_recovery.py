"""Trouble in training, really provoked: interruption, kill -9, divergence, lack of memory, a full disk."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_checkpoints import truncate
from tiny import Echo, Events, made, same, train_config, trainer, trm_config, weights

from forgekit.compute.ladder import is_out_of_memory
from forgekit.errors import ArtifactError, ResourceError, TrainingError

STEADY = {"ema": 0.9, "optimizer": {"normuon_beta": 0.9, "ste": True}}


@pytest.fixture(scope="module")
def uninterrupted():
    """Final weights and losses of the run that nothing disturbs."""
    run = trainer(train_config(**STEADY))
    report = run.run()
    return weights(run.model), report.losses


class Stop:
    """Raises KeyboardInterrupt the n-th time a place in the loop is passed."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, *_):
        self.n -= 1
        if self.n == 0:
            raise KeyboardInterrupt


def before(function, stop: Stop):
    def wrapped(*args, **kwargs):
        stop()
        return function(*args, **kwargs)

    return wrapped


def after(function, stop: Stop):
    def wrapped(*args, **kwargs):
        result = function(*args, **kwargs)
        stop()
        return result

    return wrapped


PLACES = {
    "drawing data": lambda run, stop: setattr(run, "data", Interrupting(stop)),
    "after the gradients": lambda run, stop: setattr(run, "_accumulate", after(run._accumulate, stop)),
    "half an update": lambda run, stop: setattr(run.optimizer, "_adamw", before(run.optimizer._adamw, stop)),
    "before the averages": lambda run, stop: setattr(run, "_average", before(run._average, stop)),
    "observing": lambda run, stop: setattr(run, "observer", stop),
    "while saving": lambda run, stop: setattr(
        run.checkpoints, "_finish", before(run.checkpoints._finish, Stop(1 + stop.n // 4))
    ),
}


class Interrupting(Echo):
    def __init__(self, stop: Stop) -> None:
        super().__init__()
        object.__setattr__(self, "stop", stop)

    def batch(self, step):
        self.stop()
        return super().batch(step)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("n", [1, 5, 11])
def test_resuming_after_an_interruption_anywhere_gives_the_same_bits(tmp_path, uninterrupted, place, n):
    run = trainer(train_config(**STEADY), folder=tmp_path)
    PLACES[place](run, Stop(n))
    with pytest.raises(KeyboardInterrupt):
        run.run()
    torch.rand(5)
    events = Events()
    again = trainer(train_config(**STEADY), folder=tmp_path, events=events, model=made(trm_config(), seed=7))
    if place in ("half an update", "before the averages") and n == 1:
        # Nothing whole to save yet: the run starts anew, from the same seed.
        assert list(tmp_path.iterdir()) == []
        again = trainer(train_config(**STEADY), folder=tmp_path)
    report = again.run()
    assert same(weights(again.model), uninterrupted[0]) and report.losses == uninterrupted[1]
    lost = n - report.resumed_from
    assert lost <= 3 and (not events.seen or events.of("train_resumed")[0]["step"] == report.resumed_from)


def test_the_same_trainer_can_go_on_after_an_interruption(tmp_path, uninterrupted):
    run = trainer(train_config(**STEADY), folder=tmp_path)
    run._accumulate = after(run._accumulate, Stop(5))
    with pytest.raises(KeyboardInterrupt):
        run.run()
    run.run()
    assert same(weights(run.model), uninterrupted[0])


def test_random_numbers_drawn_inside_the_model_are_the_same_after_resuming(tmp_path):
    def noisy(folder):
        run = trainer(train_config(), folder=folder)
        run.model.embedding.register_forward_pre_hook(lambda *_: None)
        loss = run.model.training_loss

        def with_noise(x, y):
            result = loss(x, y)
            result.total = result.total * (1 + torch.rand(()))
            return result

        run.model.training_loss = with_noise
        torch.manual_seed(5)
        return run

    whole = noisy(None)
    whole.run()
    part = noisy(tmp_path)
    part._accumulate = after(part._accumulate, Stop(5))
    with pytest.raises(KeyboardInterrupt):
        part.run()
    again = noisy(tmp_path)
    again.run()
    assert same(weights(whole.model), weights(again.model))


def test_a_new_start_does_not_meet_the_old_course(tmp_path):
    trainer(train_config(steps=12), folder=tmp_path).run()
    fresh = trainer(train_config(steps=6), Echo(seed=1), folder=tmp_path)
    assert fresh.run(resume=False).resumed_from == 0
    assert [p.name for p in fresh.checkpoints.checkpoints()] == ["step-00000003", "step-00000006"]
    events = Events()
    diverging = poison(trainer(train_config(steps=6), folder=tmp_path, events=events), 2)
    diverging.run(resume=False)
    assert events.of("train_diverged")[0]["back_to"] == 0


def test_a_finished_run_only_hands_its_result_out_again(tmp_path):
    first = trainer(train_config(**STEADY), folder=tmp_path)
    losses = first.run().losses
    again = trainer(train_config(**STEADY), folder=tmp_path)
    report = again.run()
    assert report.resumed_from == 12 and report.losses == losses
    assert same(weights(first.model), weights(again.model))


CHILD = """
import sys, time
sys.path.insert(0, {here!r})
from tiny import train_config, trainer
trainer(train_config(steps=40, **{steady!r}), folder={folder!r}, observer=lambda info: time.sleep(0.01)).run()
"""


def test_kill_minus_nine_at_any_moment_costs_nothing_but_time(tmp_path):
    whole = trainer(train_config(steps=40, **STEADY))
    whole.run()
    code = CHILD.format(here=str(Path(__file__).parent), steady=STEADY, folder=str(tmp_path))
    moment = random.Random(time.time_ns()).uniform(0.0, 0.4)
    child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.getcwd()})
    while child.poll() is None and not list(tmp_path.glob("step-*/state.json")):
        time.sleep(0.005)
    time.sleep(moment)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "it should not have finished yet"
    again = trainer(train_config(steps=40, **STEADY), folder=tmp_path)
    report = again.run()
    assert 0 < report.resumed_from < 40, moment
    assert same(weights(again.model), weights(whole.model)), moment


def test_a_corrupt_newest_checkpoint_is_reported_and_the_one_before_resumed(tmp_path, uninterrupted):
    run = trainer(train_config(**STEADY), folder=tmp_path)
    run.observer = Stop(8)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    truncate(run.checkpoints.checkpoints()[-1])
    events = Events()
    again = trainer(train_config(**STEADY), folder=tmp_path, events=events)
    assert again.run().resumed_from == 6
    assert "truncated or altered" in events.of("train_checkpoint_unreadable")[0]["problem"]
    assert same(weights(again.model), uninterrupted[0])


def test_only_corrupt_checkpoints_are_an_error(tmp_path):
    run = trainer(train_config(), folder=tmp_path)
    run.run()
    for path in run.checkpoints.checkpoints():
        truncate(path)
    with pytest.raises(ArtifactError, match="no readable checkpoint"):
        trainer(train_config(), folder=tmp_path).run()


# --- divergence ---


def poison(run, *steps: int):
    """Break a weight after these steps, once each."""
    left = list(steps)

    def observe(info):
        if info.step in left:
            left.remove(info.step)
            with torch.no_grad():
                run.model.norm.weight[0] = torch.nan

    run.observer = observe
    return run


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_nan_goes_back_to_the_last_good_state_and_on_at_a_lower_rate(tmp_path, on_disk):
    events = Events()
    folder = tmp_path if on_disk else None
    run = poison(trainer(train_config(ema=0.5), folder=folder, events=events), 8)
    report = run.run()
    event = events.of("train_diverged")[0]
    assert (event["step"], event["back_to"], event["rate_scale"]) == (8, 6, 0.5) and event["loss"] != event["loss"]
    assert report.recoveries == 1 and len(report.losses) == 12 and all(x == x for x in report.losses)
    assert all(p.isfinite().all() for p in run.model.parameters())
    assert run.state.position["scale"] == 0.5


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_state_whose_next_loss_is_bad_is_never_kept(tmp_path, on_disk):
    # Broken by the very update after which a checkpoint is due: it must go back further.
    events = Events()
    run = poison(trainer(train_config(), folder=tmp_path if on_disk else None, events=events), 6)
    assert len(run.run().losses) == 12
    assert [e["back_to"] for e in events.of("train_diverged")] == [3]


def test_before_the_first_checkpoint_it_goes_back_to_the_start(tmp_path):
    for folder in (tmp_path, None):
        events = Events()
        run = poison(trainer(train_config(checkpoint_every=10), folder=folder, events=events), 2)
        assert len(run.run().losses) == 12 and events.of("train_diverged")[0]["back_to"] == 0


def test_diverging_too_often_ends_in_one_line():
    run = trainer(train_config(recoveries=2, backoff=0.5))
    poison(run, 4, 5, 7, 8)
    with pytest.raises(TrainingError, match=r"train.optimizer.lr: diverged at step \d+ .*after 2 recoveries; lower"):
        run.run()


@pytest.mark.parametrize("lr", [0.5, 1.0])
def test_a_rate_that_is_really_too_high_is_lowered_until_it_works(lr):
    events = Events()
    optimizer = {"lr": lr, "fallback_lr": lr, "qk_clip": 0.0, "grokfast_lambda": 0.0}
    config = train_config(steps=60, schedule="constant", warmup=0.0, checkpoint_every=10, backoff=0.3)
    report = trainer(config.replace(optimizer={**config.optimizer.model_dump(), **optimizer}), events=events).run()
    assert report.recoveries >= 1 and events.of("train_diverged")[0]["loss"] > 9
    assert report.losses[-1] < 1 and len(report.losses) == 60


def test_a_slow_climb_far_above_the_recent_level_is_a_divergence_too():
    run = trainer(train_config())
    run.state.position["losses"] = [3.0] + [0.5] * 30
    run._recent.extend([0.5] * 30)
    assert run._exploded(5.0) and not run._exploded(4.0) and not run._exploded(1.4)
    run._recent.clear()
    assert not run._exploded(5.0) and not run._exploded(8.9) and run._exploded(9.1)
    run.state.position["losses"] = []
    assert not run._exploded(50.0)


def test_what_diverged_weights_reached_does_not_clip_the_good_ones():
    run = trainer(train_config(optimizer={"qk_clip": 30.0}), model=made(trm_config(qk_norm=False)))
    query = run.model.blocks[0].attn.wq.weight
    poison(run, 8)
    spoil = run.observer

    def observe(info):
        spoil(info)
        if info.step == 8 and not run.state.position["recoveries"]:
            with torch.no_grad():
                query.mul_(1e9)

    run.observer = observe
    run.run()
    assert run.state.position["recoveries"] == 1 and 1 < float(query.detach().norm()) < 100


# --- memory ---


def hungry(run, rows: int):
    """Let the model really ask for more memory than there is whenever it sees more than ``rows`` rows."""
    loss = run.model.training_loss

    def training_loss(x, y):
        if len(x) > rows:
            torch.empty(1 << 50, dtype=torch.uint8)
        return loss(x, y)

    run.model.training_loss = training_loss
    return run


def test_out_of_memory_halves_micro_batches_and_gives_the_same_result():
    events = Events()
    run = hungry(trainer(train_config(rows=4), events=events), 1)
    report = run.run()
    downs = events.of("train_out_of_memory")
    assert [d["now"]["micro_batch"] for d in downs] == [2, 1] and "allocate" in downs[0]["error"]
    assert (report.plan.micro_batch, report.plan.accumulate) == (1, 4)
    planned = trainer(train_config(rows=4, micro_batch=1))
    planned.run()
    assert same(weights(run.model), weights(planned.model))


def test_the_ladder_recomputes_activations_and_then_ends_in_one_line():
    events = Events()
    run = hungry(trainer(train_config(rows=2), events=events), 0)
    with pytest.raises(ResourceError, match=r"train.seq_len: memory is too small for 1 x 8 tokens; lower") as caught:
        run.run()
    assert "\n" not in str(caught.value)
    steps = [d["now"] for d in events.of("train_out_of_memory")]
    assert [s and (s["micro_batch"], s["checkpoint_activations"]) for s in steps] == [(1, False), (1, True), None]
    assert run.model.checkpoint_activations


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    run = trainer(train_config())
    run.model.training_loss = lambda x, y: torch.ones(2) @ torch.ones(3)
    with pytest.raises(RuntimeError, match="size"):
        run.run()


def test_no_room_for_the_optimizers_state_is_told_in_one_line():
    run = trainer(train_config())
    run.optimizer._adamw = lambda group: torch.empty(1 << 50, dtype=torch.uint8)
    with pytest.raises(ResourceError, match="memory is too small for the optimizer's state; choose a smaller profile"):
        run.run()


def test_the_systems_own_limit_is_recognised():
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), hard))
    try:
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            torch.empty(256 << 20, dtype=torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert is_out_of_memory(caught.value)


def test_a_resumed_run_cuts_its_batches_as_before(tmp_path, uninterrupted):
    run = trainer(train_config(**STEADY), folder=tmp_path)
    run.plan = run.plan.replace(micro_batch=1, accumulate=4)
    run._accumulate = after(run._accumulate, Stop(5))
    with pytest.raises(KeyboardInterrupt):
        run.run()
    again = trainer(train_config(**STEADY), folder=tmp_path)
    again.run()
    assert again.plan == run.plan
    events = Events()
    other = trainer(train_config(**STEADY), folder=tmp_path, events=events)
    other.plan = other.plan.replace(device="cuda")
    other._resume(True)
    assert other.plan.device == "cuda" and events.of("train_plan_changed")


def test_a_divergence_goes_back_behind_what_an_interruption_left(tmp_path):
    run = trainer(train_config(**STEADY), folder=tmp_path)

    def spoil(info):
        if info.step == 5:
            with torch.no_grad():
                run.model.norm.weight.mul_(torch.nan)
            raise KeyboardInterrupt

    run.observer = spoil
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert [p.name for p in run.checkpoints.checkpoints()][-1] == "step-00000005"
    events = Events()
    again = trainer(train_config(**STEADY), folder=tmp_path, events=events)
    report = again.run()
    (diverged,) = events.of("train_diverged")
    assert diverged["step"] == 5 and diverged["back_to"] == 3 and report.recoveries == 1
