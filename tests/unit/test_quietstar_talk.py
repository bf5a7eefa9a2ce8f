"""Quiet-STaR's loss: reward, baseline, REINFORCE, KL, what is left out, and THE training loop around it."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_quietstar_branches import llama, wrapped
from tiny import VOCAB, Echo, Events, gpt_config, made, same, train_config, trm_config, weights

from agent_forge.phases.quietstar import talk as talk_module
from agent_forge.phases.quietstar.branches import NEVER, Thoughts, read_context
from agent_forge.phases.quietstar.injection import Points
from agent_forge.phases.quietstar.talk import (
    MIXER_CONFIG,
    MIXER_WEIGHTS,
    QuietTalker,
    mixer_files,
    ordinary_flops,
    quiet_nats,
    read_mixer,
    rewards,
)
from agent_forge.phases.quietstar.talk_config import Marks, PointPlan, TalkConfig, marks_of
from forgekit.data.batches import Batch
from forgekit.data.tokenizer import RESERVED, SMALLEST_VOCABULARY, THINKING, train_tokenizer
from forgekit.errors import ArtifactError, ConfigError, TrainingError
from forgekit.models.base import Loss
from forgekit.models.constants import IGNORE
from forgekit.models.hidden import hidden
from forgekit.train.loop import Trainer

MARKS = Marks(start=1, stop=2, forbidden=(0,))
PLAN = PointPlan(most=2, interval=3, min_length=2, max_length=6)
BASE = TalkConfig(thoughts=3, ahead=3, points=PLAN)
CONFIGS = {
    "gpt": (gpt_config(window=4), BASE),
    "gpt-state": (gpt_config(), BASE.replace(branching="state")),
    "trm": (trm_config(), BASE),
    "attention": (trm_config(t_max=0), BASE.replace(mixer={"kind": "attention", "heads": 2})),
    "linear": (gpt_config(), BASE.replace(mixer={"space": "linear"})),
}
EVERY = pytest.mark.parametrize("name", CONFIGS)


def rows(B: int = 4, T: int = 14, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    line = torch.randint(3, VOCAB, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    return line[:, :-1].contiguous(), line[:, 1:].contiguous()


def talker(name: str = "gpt", seed: int = 0, parent: bool = True, **changes) -> QuietTalker:
    config, talk = CONFIGS[name]
    model = made(config, seed=seed, stir=0.2)
    other = made(config, seed=9, stir=0.2) if parent else None
    torch.manual_seed(7)
    return QuietTalker(
        model, MARKS, talk.replace(**changes) if changes else talk, other, 0.1 if parent else 0.0
    ).train()


def seeded_loss(t: QuietTalker, x, y, seed: int = 5):
    torch.manual_seed(seed)
    return t.training_loss(x, y)


# ---- the loss


@EVERY
def test_everything_is_learned_and_everything_is_reported(name):
    t, (x, y) = talker(name), rows()
    loss = seeded_loss(t, x, y)
    loss.total.backward()
    idle = [n for n, p in t.named_parameters() if (p.grad is None) and (t.config.family == "gpt" or t.config.t_max)]
    assert idle == [] and all(p.grad.isfinite().all() for p in t.parameters() if p.grad is not None)
    assert all(p.grad is None for p in t._parent[0].parameters())
    wanted = {"reward_mean", "reward_positive_share", "mixing_weight_alpha", "reasoning_entropy", "thought_length"}
    wanted |= {"injection_points", "policy_loss", "kl", "nats_with_thoughts", "nats_without_thoughts"}
    wanted |= {"thoughts_left_out", "thought_stopped_share", "flops_per_label"}
    assert wanted <= loss.parts.keys()
    assert all(math.isfinite(v) and not torch.as_tensor(v).requires_grad for v in loss.parts.values())
    assert loss.tokens == y.numel() and loss.parts["injection_points"] == 2
    assert 0 < loss.parts["thought_length"] <= 6 and loss.parts["kl"] > 0.01


def test_the_loss_is_the_sum_of_its_parts():
    x, y = rows()
    one = {"base_weight": 0.0, "talk_weight": 0.0, "policy_weight": 0.0}
    whole = seeded_loss(talker(base_weight=2.0, talk_weight=3.0, policy_weight=5.0), x, y)
    base = seeded_loss(talker(parent=False, **{**one, "base_weight": 2.0}), x, y).total
    mixture = seeded_loss(talker(parent=False, **{**one, "talk_weight": 3.0}), x, y).total
    policy = seeded_loss(talker(parent=False, **{**one, "policy_weight": 5.0}), x, y).total
    kl = seeded_loss(talker(**one), x, y).total
    torch.testing.assert_close(whole.total, base + mixture + policy + kl)
    torch.testing.assert_close(mixture, 3 * whole.parts["nats_with_thoughts"])
    torch.testing.assert_close(policy, 5 * whole.parts["policy_loss"])
    torch.testing.assert_close(kl, 0.1 * whole.parts["kl"])
    assert min(base, mixture, policy, kl) > 0


def test_nats_are_those_of_the_model_alone():
    t, (x, y) = talker(), rows()
    torch.testing.assert_close(seeded_loss(t, x, y).nats, t.model.training_loss(x, y).nats)


def written(points: Points, *lines: list[int]) -> Thoughts:
    """Given thoughts, equally many for each point; those of fewer than four tokens ended by themselves."""
    width = max(map(len, lines))
    length = torch.tensor([len(line) for line in lines])
    ids = torch.tensor([line + [MARKS.stop] * (width - len(line)) for line in lines])
    point = torch.arange(len(points)).repeat_interleave(len(lines) // len(points))
    return Thoughts(point, ids, length, length < 4, 0)


LINES = [[5, 6], [7, 8, 9, 10], [11], [12, 13, 14], [], [15, 16, 17, 18]]


def spoken(t: QuietTalker, x, y):
    points = Points(torch.tensor([0, 2]), torch.tensor([4, 12]), torch.tensor([4, 4]))
    thoughts = written(points, *LINES)
    return points, thoughts, t.speak(thoughts, read_context(t.model, x, points), points, x, y)


@EVERY
def test_predictions_are_those_of_the_plain_model_on_the_written_out_row(name):
    t, (x, y) = talker(name), rows()
    points, thoughts, talk = spoken(t, x, y)
    assert talk.known_NA.tolist() == [[True] * 3, [True, True, False]], "the second point is two tokens from the end"
    n, check = 3, 0
    for r, line in enumerate(LINES):
        row, at = int(points.row_N[r // n]), int(points.at_N[r // n])
        for a in range(int(talk.known_NA[r // n].sum())):
            context = x[row, : at + 1 + a]
            thinking = torch.tensor([*x[row, : at + 1], MARKS.start, *line, MARKS.stop, *x[row, at + 1 : at + 1 + a]])
            base, thought = (hidden(t.model, ids[None])[0][0, -1] for ids in (context, thinking))
            mixed = t.mixer(base[None], thought[None, None], t.head)
            expected = mixed.log_p[0, 0, y[row, at + a]]
            torch.testing.assert_close(talk.mixed_NnA[r // n, r % n, a], expected, rtol=1e-4, atol=1e-4)
            alone = t.head(base[None]).log_softmax(-1)[0, y[row, at + a]]
            torch.testing.assert_close(talk.base_NA[r // n, a], alone, rtol=1e-4, atol=1e-4)
            check += 1
    assert check == 15


def test_the_policy_loss_is_reinforce_at_its_temperature():
    t, (x, y) = talker(), rows()
    points, thoughts, talk = spoken(t, x, y)
    _, found = t._learn(talk)
    likelihood = (talk.mixed_NnA * talk.known_NA[:, None]).sum(-1)
    reward = (likelihood - likelihood.mean(1, keepdim=True)).clamp(min=0).flatten()
    assert 0 < (reward > 0).sum() < 6 and found["reward_mean"] == pytest.approx(reward.mean().item())
    expected = 0.0
    for r, line in enumerate(LINES):
        row, at = int(points.row_N[r // 3]), int(points.at_N[r // 3])
        said = line + [MARKS.stop] * (len(line) < 4)  # a stop marker that was forced is no action
        ids = torch.tensor([*x[row, : at + 1], MARKS.start, *line])
        scores = t.model(ids[None]).logits[0, at + 1 :].clone()
        scores[:, [MARKS.start, *MARKS.forbidden]] = NEVER
        log_p = (scores / 3.0).log_softmax(-1)[range(len(said)), said]
        expected += -(reward[r] * log_p.mean()) / 6
    torch.testing.assert_close(found["policy_loss"], expected.detach(), rtol=1e-4, atol=1e-5)


def test_the_policy_gradient_raises_good_thoughts_only():
    t, (x, y) = talker(parent=False, talk_weight=0.0), rows()
    points, thoughts, talk = spoken(t, x, y)
    added, _ = t._learn(talk)
    added.backward()
    reward = rewards(talk.mixed_NnA.detach().sum(-1), talk.heard_Nn).flatten()
    with torch.no_grad():
        for p in t.model.parameters():
            if p.grad is not None:
                p.sub_(0.01 * p.grad)

    def chance(model, r):
        row, at = int(points.row_N[r // 3]), int(points.at_N[r // 3])
        ids = torch.tensor([*x[row, : at + 1], MARKS.start, *LINES[r]])
        scores = model(ids[None]).logits[0, at + 1 :].clone()
        scores[:, [MARKS.start, *MARKS.forbidden]] = NEVER
        said = LINES[r] + [MARKS.stop] * (len(LINES[r]) < 4)
        return scores.log_softmax(-1)[range(len(said)), said].mean()

    old = talker(parent=False, talk_weight=0.0).model
    best = int(reward.argmax())
    assert reward[best] > 0 and chance(t.model, best) > chance(old, best)
    assert not any(p.grad.any() for p in t.mixer.parameters()), "the reward is no path for gradients"


def test_rewards_are_relative_to_the_other_thoughts_of_the_point():
    log_p = torch.tensor([[-1.0, -2.0, -3.0], [-5.0, math.nan, -7.0]])
    found = rewards(log_p, log_p.isfinite())
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0, -1.0], [1.0, 0.0, -1.0]]))


@pytest.mark.parametrize("chunk", [1024, 5])
def test_kl_is_that_of_parent_and_model_over_the_whole_vocabulary(chunk, monkeypatch):
    monkeypatch.setattr(talk_module, "KL_CHUNK", chunk)
    t, (x, y) = talker(base_weight=0.0, talk_weight=0.0, policy_weight=0.0), rows()
    y[0, 3:9] = IGNORE
    loss = seeded_loss(t, x, y)
    ours, theirs = (m(x).logits.log_softmax(-1)[y != IGNORE] for m in (t.model, t._parent[0]))
    expected = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    torch.testing.assert_close(loss.parts["kl"], expected.detach())
    loss.total.backward()
    gradient = t.model.embedding.table.weight.grad
    t.zero_grad()
    (0.1 * expected).backward()
    torch.testing.assert_close(gradient, t.model.embedding.table.weight.grad, rtol=1e-3, atol=1e-6)


def test_a_model_like_its_parent_is_not_pulled():
    t, (x, y) = talker(), rows()
    t._parent[0].load_state_dict(t.model.state_dict())
    assert seeded_loss(t, x, y).parts["kl"].abs() < 1e-6


def test_markers_are_never_predicted_and_written_thoughts_not_thought_about():
    t, (x, y) = talker(), rows()
    x[:, 5], x[:, 9] = MARKS.start, MARKS.stop
    y[:, 4], y[:, 8] = MARKS.start, MARKS.stop
    points = t.points(x, y)
    assert len(points) and not ((points.at_N >= 4) & (points.at_N <= 8)).any()
    near = Points(torch.tensor([0]), torch.tensor([3]), torch.tensor([4]))
    assert t._truth(near, y)[1].tolist() == [[True, False, False]], "nothing is predicted across a marker"
    assert (t.head(torch.randn(2, 16))[:, [MARKS.start, MARKS.stop]] == NEVER).all()


def test_nothing_supervised_is_nothing_to_think_about():
    t, (x, y) = talker(), rows()
    loss = seeded_loss(t, x, torch.full_like(y, IGNORE))
    loss.total.backward()
    assert loss.tokens == 0 and loss.parts["injection_points"] == 0 and loss.total == 0
    assert all(p.grad is None or not p.grad.any() for p in t.parameters())


# ---- what is no number


@dataclass
class SickState:
    inner: object
    sick_B: torch.Tensor

    def rows(self, index):
        return SickState(self.inner.rows(index), self.sick_B[index])


class Sick(torch.nn.Module):
    """A model that gives no numbers from one token on."""

    def __init__(self, model, token):
        super().__init__()
        self.inner, self.token, self.config = model, token, model.config

    def training_loss(self, x, y):
        return self.inner.training_loss(x, y)

    def initial_state(self, batch):
        return SickState(self.inner.initial_state(batch), torch.zeros(batch, dtype=torch.bool))

    def flops_per_token(self, context):
        return self.inner.flops_per_token(context)

    def features(self, ids, state=None, lengths=None):
        h, after = hidden(self.inner, ids, state and state.inner, lengths)
        sick_BT = (ids == self.token).cumsum(1) > 0
        if state:
            sick_BT = sick_BT | state.sick_B[:, None]
        return h.masked_fill(sick_BT[..., None], math.nan), state and SickState(after, sick_BT[:, -1])

    def read_out(self, h):
        return self.inner.read_out(h)


def test_a_thought_without_a_finite_reward_is_left_out_and_spoils_no_gradient():
    x, y = rows()
    x, y = x.clamp(min=4), y.clamp(min=4)
    t = talker("trm", parent=False)
    t.model = Sick(t.model, 3)  # a token that only thoughts use
    found = [seeded_loss(t, x, y, seed) for seed in range(12)]
    left_out = [float(loss.parts["thoughts_left_out"]) for loss in found]
    assert max(left_out) > 0, "token 3 was never thought"
    loss = found[int(np.argmax(left_out))]
    loss.total.backward()
    assert loss.total.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in t.parameters())
    t.after_step()
    assert t.spent_3[2] == sum(left_out) and t.spent_3[1] == 12 * 4 * 2 * 3


def test_no_finite_reward_at_all_is_an_error_with_a_remedy():
    t, (x, y) = talker("trm", parent=False), rows()
    t.model = Sick(t.model, MARKS.stop)  # every thought ends
    with pytest.raises(TrainingError, match="no thought has a finite reward; lower train.optimizer.lr"):
        seeded_loss(t, x, y)


def test_a_model_that_is_no_number_is_left_to_the_training_loop():
    t, (x, y) = talker(), rows()
    t.model.norm.weight.data.fill_(math.nan)
    loss = t.training_loss(x, y)
    assert not loss.nats.isfinite() and not loss.total.isfinite()


# ---- evaluation


@EVERY
def test_evaluation_scores_the_same_tokens_with_and_without(name):
    t, (x, y) = talker(name), rows()
    y[1, 6:] = IGNORE
    found = quiet_nats(t, x, y)
    assert t.training, "put back"
    log_p = t.model.eval()(x).logits.index_fill(-1, torch.tensor([1, 2]), NEVER).log_softmax(-1)
    nats = -log_p.gather(-1, y.clamp(min=0)[..., None])[..., 0].masked_fill(y == IGNORE, 0)
    torch.testing.assert_close(found.row_without_B, nats.sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.labels_B, (y != IGNORE).sum(1))
    change = found.with_B - found.without_B
    torch.testing.assert_close(found.row_with_B - found.row_without_B, change, rtol=1e-3, atol=1e-4)
    assert (change != 0).all() and (found.covered_B > 0).all() and (found.covered_B <= 6).all()
    again = quiet_nats(t, x, y)
    assert torch.equal(found.with_B, again.with_B), "greedy: nothing is drawn"
    assert found.flops[0] > 2 * found.flops[1] > 0 and found.thought_tokens > 0


def test_evaluation_does_not_look_at_the_loss_nor_at_other_rows():
    t, (x, y) = talker(), rows()
    found, other = quiet_nats(t, x, y), y.clone()
    other[:, :] = 3
    torch.testing.assert_close(quiet_nats(t, x, other).covered_B, found.covered_B)
    one = quiet_nats(t, x[2:3], y[2:3])
    torch.testing.assert_close(one.with_B, found.with_B[2:3], rtol=1e-4, atol=1e-4)


def test_a_token_belongs_to_the_nearer_of_two_thoughts():
    t, (x, y) = talker(points=PLAN.replace(interval=1, most=2).model_dump(), ahead=4), rows(B=1)
    points = Points(torch.tensor([0, 0]), torch.tensor([4, 6]), torch.tensor([3, 3]))
    t.points = lambda *_, **__: points
    found = quiet_nats(t.eval(), x, y)
    assert found.covered_B.tolist() == [6]
    single = []
    for at, count in ((4, 2), (6, 4)):
        t.points = lambda *_, at=at, **__: Points(torch.tensor([0]), torch.tensor([at]), torch.tensor([3]))
        t.talk = t.talk.replace(ahead=count)
        single.append(quiet_nats(t, x, y).with_B)
    torch.testing.assert_close(found.with_B, single[0] + single[1], rtol=1e-4, atol=1e-4)


def test_a_batch_without_labels_is_evaluated_to_nothing():
    t, (x, y) = talker(), rows()
    found = quiet_nats(t, x, torch.full_like(y, IGNORE))
    assert not found.row_with_B.any() and not found.labels_B.any() and found.thought_tokens == 0


# ---- THE training loop


def quick_config(**changes):
    optimizer = {"kl_coefficient": 0.1, "qk_clip": 25.0}
    return train_config(**{"steps": 4, "checkpoint_every": 2, "rows": 4, "seq_len": 12, **changes}, optimizer=optimizer)


def run_of(t: QuietTalker, folder=None, **changes) -> tuple[Trainer, Events]:
    events = Events()
    torch.manual_seed(11)
    return Trainer(t, Echo(rows=4, length=12), quick_config(**changes), folder=folder, events=events), events


class Stops(Echo):
    """Interrupted once when a batch is drawn."""

    def batch(self, step: int) -> Batch:
        if step == 3:
            raise KeyboardInterrupt
        return super().batch(step)


@pytest.mark.parametrize("name", ["gpt", "trm"])
def test_an_interrupted_run_goes_on_to_the_same_bits(name, tmp_path):
    whole, _ = run_of(talker(name))
    report = whole.run()
    broken, _ = run_of(talker(name), tmp_path)
    broken.data = Stops(rows=4, length=12)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    resumed, events = run_of(talker(name, seed=3), tmp_path)
    torch.manual_seed(99)
    again = resumed.run()
    assert again.resumed_from == 3 and events.of("train_resumed")
    assert same(weights(whole.model), weights(resumed.model)) and again.losses == report.losses
    assert whole.model.spent_3[1] == 4 * 4 * 2 * 3 and whole.model.spent_flops > 0


def test_training_moves_the_model_and_the_mixer_but_not_the_parent():
    t = talker("trm")
    before, parent = weights(t), weights(t._parent[0])
    run_of(t)[0].run()
    moved = {n for n, p in t.named_parameters() if not torch.equal(p, before[n])}
    assert any(n.startswith("mixer.") for n in moved) and any(n.startswith("model.") for n in moved)
    assert same(parent, weights(t._parent[0])) and not any("parent" in n for n in t.state_dict())
    assert not any(p.requires_grad for p in t._parent[0].parameters())
    teacher = "model.recursion.teacher_bias"
    assert not torch.equal(weights(t)[teacher], before[teacher]), "the model's own bookkeeping was forgotten"
    assert t.thoughts_written == (4 * 4 * 2 * 3, 0)


def test_it_learns_under_bfloat16_autocast():
    t = talker("trm")
    report = run_of(t, steps=6, precision="bf16")[0].run()
    assert all(math.isfinite(loss) for loss in report.losses)
    assert all(p.isfinite().all() for p in t.parameters())


def test_attention_logits_are_clipped_through_the_talker():
    t = talker("gpt")
    for layer in t.model.attentions():
        layer.gain_H.data.fill_(400.0)
    run_of(t, steps=1)[0].run()
    assert all(layer.gain_H.max() < 110 for layer in t.model.attentions())


def test_divergence_goes_back_and_on():
    class Bad(Echo):
        asked = 0

        def batch(self, step):
            Bad.asked += 1
            if Bad.asked == 3:
                t.model.norm.weight.data.fill_(math.nan)
            return super().batch(step)

    t = talker()
    run, events = run_of(t)
    run.data = Bad(rows=4, length=12)
    report = run.run()
    assert report.recoveries == 1 and len(events.of("train_diverged")) == 1
    assert all(p.isfinite().all() for p in t.parameters())


def test_recomputing_activations_changes_nothing():
    x, y = rows()
    found = []
    for on in (False, True):
        t = talker("trm")
        t.checkpoint_activations = on
        assert t.model.checkpoint_activations is on and t.checkpoint_activations is on
        loss = seeded_loss(t, x, y)
        loss.total.backward()
        found.append({n: p.grad.clone() for n, p in t.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-5)


def test_a_hugging_face_model_thinks_too():
    config = llama()
    t = QuietTalker(wrapped(config), MARKS, BASE, wrapped(config), 0.1).train()
    x, y = rows()
    loss = seeded_loss(t, x, y)
    loss.total.backward()
    assert loss.parts["injection_points"] == 2 and t.attentions() == []
    assert all(p.grad is not None and p.grad.isfinite().all() for p in t.parameters())
    assert (quiet_nats(t, x, y).covered_B > 0).all()


def test_a_model_with_a_context_limit_leaves_room_for_the_thought():
    t, (x, y) = talker(), rows()
    t.model.context_limit = 18
    # Tokens up to the last point, two markers, the longest thought, and the true tokens read after it.
    assert len(t.points(x, y)) and t.points(x, y).at_N.max() + 1 + 2 + 6 + 2 == 18


# ---- what it costs


def test_compute_is_counted_with_the_thoughts():
    t, (x, y) = talker(parent=False), rows()
    loss = seeded_loss(t, x, y)
    ordinary = ordinary_flops(t.model, x.shape[1], 1.0) * x.numel()
    assert t.spent_flops == 0, "not before the step is done"
    counted = float(loss.parts["flops_per_label"]) * loss.tokens
    thought_tokens = 4 * 2 * 3 * float(loss.parts["thought_length"])
    body = t.model.flops_per_token(14) - t.config.head_flops()
    assert counted > ordinary + 4 * body * thought_tokens, "written once, read again, and differentiated"
    t.after_step()
    assert t.spent_flops == pytest.approx(counted, abs=2e6) and t._pending == [0.0, 0, 0]
    assert ordinary_flops(wrapped(llama()), 14, 1.0) > 0


def test_memory_is_planned_with_the_thoughts():
    assert BASE.tokens_per_row(14) == 2 * 14 + 2 * 3 * (1 + 6 + 1 + 2)
    t, (x, y) = talker(), rows()
    points, _, talk = spoken(t, x, y)
    assert talk.read <= len(points) * 3 * (1 + 6 + 1 + 2)


# ---- saving


@EVERY
def test_a_mixer_is_saved_and_read_again(name, tmp_path):
    t = talker(name)
    with torch.no_grad():
        for p in t.mixer.parameters():
            p.add_(torch.randn_like(p))
    for file, data in mixer_files(t).items():
        (tmp_path / file).write_bytes(data)
    mixer = read_mixer(tmp_path, t.model)
    assert type(mixer) is type(t.mixer) and mixer.config == t.mixer.config and not mixer.training
    assert same(weights(mixer), weights(t.mixer))


def test_broken_mixers_are_refused_in_one_line(tmp_path):
    t = talker()
    files = mixer_files(t)

    def refused(pattern, model=t.model, **changes):
        for file, data in (files | changes).items():
            (tmp_path / file).write_bytes(data)
        with pytest.raises(ArtifactError, match=pattern) as caught:
            read_mixer(tmp_path, model)
        assert "\n" not in str(caught.value)

    with pytest.raises(ArtifactError, match="no mixer here"):
        read_mixer(tmp_path, t.model)
    refused("unreadable mixer", **{MIXER_WEIGHTS: files[MIXER_WEIGHTS][:-9]})
    refused("unreadable mixer", **{MIXER_CONFIG: b"[1]"})
    refused("unreadable mixer", **{MIXER_CONFIG: b"{"})
    refused("made for width 16, the model has 32", made(gpt_config(d_model=32)))
    other = mixer_files(talker("attention"))
    refused("weights do not fit", **{MIXER_WEIGHTS: other[MIXER_WEIGHTS]})


# ---- bad input


def test_a_distance_needs_a_parent():
    with pytest.raises(ConfigError, match="kl_coefficient: 0.1 weighs the distance from a parent that is not there"):
        QuietTalker(made(gpt_config()), MARKS, BASE, None, 0.1)


def test_markers_must_be_in_the_vocabulary():
    with pytest.raises(ConfigError, match="no rows for the markers in its vocabulary of 24"):
        QuietTalker(made(gpt_config()), Marks(start=1, stop=24), BASE)


def test_markers_of_the_houses_tokenizer():
    tokenizer = train_tokenizer(["some text"], SMALLEST_VOCABULARY)
    marks = marks_of(tokenizer)
    names = [tokenizer.id_to_token(i) for i in (marks.start, marks.stop, *marks.forbidden)]
    assert names[:2] == list(THINKING[:2]) and set(names[2:]) == set(RESERVED) - set(THINKING)

    class Foreign:
        def token_to_id(self, name):
            return None

    with pytest.raises(ArtifactError, match="tokenizer: has no <think> and </think>"):
        marks_of(Foreign())


@pytest.mark.parametrize("values", [{"start": 1, "stop": 1}, {"start": 1, "stop": 2, "forbidden": (2,)}])
def test_senseless_markers_are_refused(values):
    with pytest.raises(ValueError, match="thought"):
        Marks(**values)


def test_the_configuration_is_frozen_and_checked():
    with pytest.raises(ValueError):
        TalkConfig(thoughts=1)
    with pytest.raises(ConfigError, match="thouhgts"):
        TalkConfig.build({"thouhgts": 4})


# ---- what it is for


@dataclass
class Last:
    token_B: torch.Tensor

    def rows(self, index):
        return Last(self.token_B[index])


class Parrot(torch.nn.Module):
    """Thinks one of eight tokens after 3, then says what it thought; all of it is one table."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=VOCAB, d_model=2 * VOCAB)
        table = torch.full((VOCAB, 2 * VOCAB), -8.0)
        ideas = torch.arange(10, 18)
        table[ideas, MARKS.start], table[ideas, 3] = 0.0, 0.0
        table[MARKS.stop, ideas], table[ideas, VOCAB + ideas] = 0.0, 0.0
        self.table = torch.nn.Parameter(table)

    def initial_state(self, batch):
        return Last(torch.zeros(batch, dtype=torch.long))

    def features(self, ids, state=None, lengths=None):
        before = torch.cat([(state or self.initial_state(len(ids))).token_B[:, None], ids], dim=1)
        index = torch.where(ids == MARKS.stop, VOCAB + before[:, :-1], ids)
        last = torch.full((len(ids),), ids.shape[1]) if lengths is None else lengths
        return F.one_hot(index, 2 * VOCAB).float(), state and Last(before.gather(1, last[:, None])[:, 0])

    def read_out(self, h):
        return h @ self.table.T

    def training_loss(self, x, y):
        nats = F.cross_entropy(self.read_out(self.features(x)[0]).flatten(0, 1), y.flatten(), ignore_index=IGNORE)
        return Loss(nats, nats.detach(), int((y != IGNORE).sum()))

    def flops_per_token(self, context):
        return 1e4


@pytest.mark.parametrize(("truth", "weight"), [(17, 1.0), (12, 1.0), (17, 0.0)])
def test_reinforce_alone_finds_the_thought_that_helps(truth, weight):
    only = {"base_weight": 0.0, "talk_weight": 0.0, "policy_weight": weight, "mixer": {"initial_weight": 0.5}}
    torch.manual_seed(0)
    t = QuietTalker(Parrot(), MARKS, TalkConfig(thoughts=4, ahead=1).replace(**only)).train()
    x = torch.tensor([[4, 5, 3]] * 16)
    y = torch.full_like(x, IGNORE)
    y[:, 2] = truth
    gains, optimizer = [], torch.optim.SGD(t.parameters(), 2.0)
    for _ in range(40):
        loss = t.training_loss(x, y)
        gains.append(float(loss.parts["nats_without_thoughts"] - loss.parts["nats_with_thoughts"]))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    chance = t.model.table[:, MARKS.start].detach().softmax(0)
    if weight:
        assert chance.argmax() == truth and chance[truth] > 0.6 and np.mean(gains[-5:]) > np.mean(gains[:5]) + 0.5
    else:
        assert chance[truth] == pytest.approx(1 / 8, abs=0.01)
