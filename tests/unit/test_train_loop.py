"""The training loop: accumulation, clipping, averages, reports, observers; it learns, and it repeats itself."""

import math

import numpy as np
import pytest
import torch
from tiny import Echo, Events, gpt_config, gradients, made, same, train_config, trainer, trm_config, weights

from forgekit.compute.budget import BatchPlan
from forgekit.data.batches import Batch
from forgekit.errors import ConfigError, DataError
from forgekit.models.constants import IGNORE
from forgekit.train.config import lr_factor
from forgekit.train.muon_grokfast import ternary


def test_it_learns_and_leaves_the_model_ready_to_answer():
    run = trainer(train_config(steps=60, checkpoint_every=0, optimizer={"grokfast_lambda": 0.0}))
    report = run.run()
    assert report.losses[0] > 3 and report.losses[-1] < 1 and len(report.losses) == 60
    assert report.tokens == 60 * 4 * 8 and not run.model.training
    assert report.recoveries == 0 and report.resumed_from == 0 and report.plan == BatchPlan(micro_batch=4)


@pytest.mark.parametrize("config", [gpt_config(), trm_config()], ids=["gpt", "trm"])
@pytest.mark.parametrize("micro", [1, 2, 3, 5])
def test_accumulated_gradients_equal_those_of_the_whole_batch(config, micro):
    data = Echo(rows=8, hidden=0.6)
    batch = data.batch(3)
    # One micro batch without any label: it must neither count nor poison the rest.
    batch.labels[1] = IGNORE
    run = trainer(train_config(rows=8, micro_batch=micro), data, made(config, stir=0.1))
    run.model.train()
    x, y = torch.from_numpy(batch.inputs), torch.from_numpy(batch.labels)
    whole = gradients(run.model, lambda: run.model.training_loss(x, y).total)
    nats, parts = float(run.model.training_loss(x, y).nats), run.model.training_loss(x, y).parts
    run.model.zero_grad()
    got_nats, got_parts = run._accumulate(batch)
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-4, atol=1e-6)
    assert got_nats == pytest.approx(nats, abs=1e-5)
    assert got_parts == pytest.approx({name: float(value) for name, value in parts.items()}, abs=1e-5)


def test_micro_batches_do_not_change_the_course():
    # A large epsilon keeps AdamW from magnifying rounding; the clip binds in every step and must see all rows.
    optimizer = {"qk_clip": 0.3, "use_muon": False, "eps": 1e-2}
    runs = [
        trainer(train_config(micro_batch=m, optimizer=optimizer), model=made(trm_config(qk_norm=False))) for m in (4, 1)
    ]
    assert runs[0].run().losses == pytest.approx(runs[1].run().losses, abs=1e-4)
    for a, b in zip(*(run.model.parameters() for run in runs)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_same_seeds_give_the_same_bits_and_others_do_not():
    runs = [trainer(train_config(), Echo(seed=seed)) for seed in (0, 0, 1)]
    losses = [run.run().losses for run in runs]
    assert losses[0] == losses[1] != losses[2]
    assert same(weights(runs[0].model), weights(runs[1].model))


def test_clipping_caps_the_global_norm():
    infos = []
    run = trainer(train_config(steps=1, clip=0.01), observer=infos.append)
    norms = []
    update = run._update
    run._update = lambda factor: (norms.append(total_norm(run.model)), update(factor))
    run.run()
    assert norms[0] == pytest.approx(0.01, rel=1e-3) and infos[0].grad_norm > 0.1
    free = trainer(train_config(steps=1, clip=0.0))
    update_free = free._update
    free._update = lambda factor: (norms.append(total_norm(free.model)), update_free(factor))
    free.run()
    assert norms[1] == pytest.approx(infos[0].grad_norm, rel=1e-4)


def total_norm(model) -> float:
    return math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))


def test_averaged_weights_are_the_stated_average_and_become_the_result():
    seen = []
    run = trainer(train_config(ema=0.5, steps=6), observer=lambda info: seen.append(weights(run.model)))
    start = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.run()
    for name, p in run.model.named_parameters():
        expected = start[name]
        for step, at in enumerate(seen):
            keep = min(0.5, (1 + step) / (10 + step))
            expected = keep * expected + (1 - keep) * at[name]
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(p.detach(), seen[-1][name])


def test_a_long_average_of_a_short_run_forgets_its_random_start():
    short = trainer(train_config(ema=0.999, steps=40, optimizer={"grokfast_lambda": 0.0}))
    report = short.run()
    batch = Echo().batch(99)
    loss = short.model.training_loss(torch.from_numpy(batch.inputs), torch.from_numpy(batch.labels))
    assert float(loss.nats) < 0.7 * report.losses[0]


def test_averaged_ternary_weights_are_ternary():
    run = trainer(train_config(ema=0.5, optimizer={"ste": True}))
    run.run()
    weight = run.model.blocks[0].ffn.up.weight.detach()
    assert torch.equal(weight, ternary(run.optimizer.trained(run.model.blocks[0].ffn.up.weight)))
    assert len(weight.unique()) == 3


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_the_observer_sees_every_step_with_its_rate(schedule):
    infos = []
    config = train_config(schedule=schedule)
    report = trainer(config, observer=infos.append).run()
    assert [i.step for i in infos] == list(range(1, 13)) and {i.steps for i in infos} == {12}
    assert [i.learning_rate for i in infos] == pytest.approx([0.01 * lr_factor(config, s) for s in range(12)])
    assert [i.loss for i in infos] == report.losses
    assert infos[-1].loss_avg_100 == pytest.approx(sum(report.losses) / 12)
    assert infos[-1].seconds_left == 0 and infos[0].seconds_left > 0 and infos[0].tokens_per_second > 0
    assert {"gate/entropy", "act/mean_steps", "token_accuracy"} <= infos[0].parts.keys()


def test_the_rates_reach_both_groups():
    rates = []
    run = trainer(
        train_config(optimizer={"lr": 0.02, "fallback_lr": 0.004}, schedule="constant"),
        observer=lambda info: rates.append([g["lr"] for g in run.optimizer.param_groups]),
    )
    run.run()
    assert rates[-1] == [0.02, 0.004]


def test_drawing_data_is_timed():
    class Slow(Echo):
        def batch(self, step):
            torch.zeros(1)
            sum(range(200_000))
            return super().batch(step)

    slow = trainer(train_config(checkpoint_every=0), Slow()).run()
    fast = trainer(train_config(checkpoint_every=0)).run()
    assert 0 < fast.data_seconds < fast.seconds and slow.data_seconds > 2 * fast.data_seconds


def test_a_batch_that_teaches_nothing_is_refused():
    class Silent(Echo):
        def batch(self, step):
            batch = super().batch(step)
            return Batch(batch.inputs, np.full_like(batch.labels, IGNORE))

    with pytest.raises(DataError, match="no supervised token"):
        trainer(train_config(), Silent()).run()


def test_qk_clip_holds_during_training():
    run = trainer(train_config(optimizer={"qk_clip": 3.0}))
    run.run()
    assert max(float(a.gain_H.detach().max()) for a in run.model.attentions()) <= 3.05
    free = trainer(train_config(optimizer={"qk_clip": 0.0}))
    free.run()
    assert max(float(a.gain_H.detach().max()) for a in free.model.attentions()) > 7


def test_the_halting_teacher_moves_once_per_step():
    moves = []
    run = trainer(train_config(micro_batch=1))
    after = run.model.after_step
    run.model.after_step = lambda: (moves.append(1), after())
    run.run()
    assert len(moves) == 12


def test_bfloat16_autocast_trains_full_precision_weights():
    run = trainer(train_config(precision="bf16", steps=4))
    report = run.run()
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    exact = trainer(train_config(precision="fp32", steps=4)).run()
    assert report.losses != exact.losses and report.losses == pytest.approx(exact.losses, abs=0.1)


def test_rows_that_cannot_be_shared_are_refused():
    run, batch = trainer(train_config()), Echo(rows=3).batch(0)
    run._check(batch, size=3)
    with pytest.raises(ConfigError, match=r"train.rows: 3 rows cannot be shared by 4 processes; use at least 4"):
        run._check(batch, size=4)
    run._sharded = True
    with pytest.raises(ConfigError, match="a multiple of 2"):
        run._check(batch, size=2)


def test_scheduled_checkpoints_are_reported(tmp_path):
    events = Events()
    trainer(train_config(), folder=tmp_path / "run", events=events).run()
    assert [e["step"] for e in events.of("train_checkpoint")] == [3, 6, 9, 12]
    assert {e["reason"] for e in events.of("train_checkpoint")} == {"scheduled"}
    none = Events()
    trainer(train_config(checkpoint_every=0), folder=tmp_path / "none", events=none).run()
    assert none.seen == [] and not (tmp_path / "none").exists()
