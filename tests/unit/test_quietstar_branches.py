"""Branches from the middle of rows: both ways equal each other and the plain model, in generation and as a whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCAB, gpt_config, made, trm_config

from agent_forge.phases.quietstar.branches import (
    NEVER,
    StateReading,
    Thoughts,
    diagonal_works,
    read_context,
    think,
    thought_scores,
    with_truth,
)
from agent_forge.phases.quietstar.injection import Points
from agent_forge.phases.quietstar.talk_config import Marks
from forgekit.errors import ConfigError
from forgekit.models.hf import HFCausalLM
from forgekit.models.hidden import hidden

quick = settings(max_examples=15, deadline=None, derandomize=True)
GPTS = {
    "full": gpt_config(),
    "window": gpt_config(window=4),
    "plain": gpt_config(window=3, qk_norm=False, emb_rank=4),
}
TRMS = {"trm": trm_config(), "flat": trm_config(t_max=0, memory_layers=(0, 1)), "decay": trm_config(memory="decay")}
CONFIGS = GPTS | TRMS
MARKS = Marks(start=1, stop=2, forbidden=(0, 3))


def ids(batch: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, VOCAB, (batch, T), generator=torch.Generator().manual_seed(seed))


def points_at(*places: tuple[int, int], limit: int = 4) -> Points:
    row, at = torch.tensor(sorted(places)).T
    return Points(row, at, torch.full_like(at, limit))


PLACES = points_at((0, 3), (0, 9), (1, 0), (3, 11), (3, 5))


def alone(model, context, points, point_R, new_RL):
    """Features of every branch, each scored as an ordinary row without any state."""
    found = []
    for point, new in zip(point_R.tolist(), new_RL):
        prefix = context[points.row_N[point], : int(points.at_N[point]) + 1]
        found.append(hidden(model, torch.cat([prefix, new])[None])[0][0, len(prefix) :])
    return torch.stack(found)


def check(model, context, points, branching, copies=2, length=5):
    """A reading's branches, whole and token by token, are what the rows are alone."""
    point_R = torch.arange(len(points)).repeat_interleave(copies)
    new_RL = ids(len(point_R), length, seed=1)
    with torch.no_grad():
        reading = read_context(model, context, points, branching)
        expected = alone(model, context, points, point_R, new_RL)
        whole, _ = reading.read(new_RL, reading.start(point_R))
        state, steps = reading.start(point_R), []
        for t in range(length):
            h, state = reading.read(new_RL[:, t : t + 1], state)
            steps.append(h)
            if t == 2:  # leave some behind, in another order
                keep = torch.arange(len(point_R)).flip(0)[: len(point_R) - 1]
                state, new_RL, expected, whole = state.rows(keep), new_RL[keep], expected[keep], whole[keep]
                steps = [s[keep] for s in steps]
        torch.testing.assert_close(reading.features_BTD, hidden(model, context)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_branches_are_what_their_rows_would_be_alone(name):
    model = made(CONFIGS[name], stir=0.2)
    for branching in ("state", "diagonal") if name in GPTS else ("state", "auto"):
        check(model, ids(4, 12), PLACES, branching)


@quick
@given(data=st.data(), name=st.sampled_from(list(CONFIGS)), rows=st.integers(1, 4), T=st.integers(1, 14))
def test_branches_of_any_points_are_what_their_rows_would_be_alone(data, name, rows, T):
    places = data.draw(
        st.sets(st.tuples(st.integers(0, rows - 1), st.integers(0, T - 1)), min_size=1, max_size=2 * rows)
    )
    model = made(CONFIGS[name], stir=0.2)
    for branching in ("state", "diagonal") if name in GPTS else ("state",):
        check(model, ids(rows, T, seed=T), points_at(*places), branching)


@pytest.mark.parametrize("name", GPTS)
def test_both_ways_give_the_same_gradients(name):
    model, context, point_R = made(GPTS[name], stir=0.2), ids(4, 12), torch.arange(5).repeat_interleave(2)
    found = []
    for branching in ("state", "diagonal"):
        model.zero_grad(set_to_none=True)
        reading = read_context(model, context, PLACES, branching)
        h, _ = reading.read(ids(10, 5, seed=1), reading.start(point_R))
        (h.square().sum() + (reading.features_BTD**3).sum()).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any(g.abs().max() > 0.1 for g in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loss_on_branches_reaches_the_context(name):
    model = made(CONFIGS[name], stir=0.2)
    table = model.embedding.table.weight
    reading = read_context(model, torch.full((1, 6), 7), points_at((0, 5)))
    h, _ = reading.read(torch.tensor([[8, 9]]), reading.start(torch.tensor([0])))
    h.square().sum().backward()
    assert table.grad[7].abs().max() > 0, "token 7 stands in the context only"


def test_the_mask_is_refused_where_there_is_more_than_attention():
    model = made(trm_config())
    assert not diagonal_works(model) and diagonal_works(made(gpt_config()))
    with pytest.raises(ConfigError, match="diagonal mask does not work for TRMTitans"):
        read_context(model, ids(1, 4), points_at((0, 1)), "diagonal")


# ---- Hugging Face models


def llama():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )


def mistral():
    """Every layer looks at a sliding window."""
    from transformers import MistralConfig

    return MistralConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=4,
        max_position_embeddings=64,
    )


def gpt2():
    """Learned absolute positions."""
    from transformers import GPT2Config

    return GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32)


def wrapped(config) -> HFCausalLM:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return HFCausalLM(AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize("config", [llama, mistral, gpt2])
def test_branches_of_hugging_face_models_are_what_their_rows_would_be_alone(config):
    check(wrapped(config()), ids(4, 12), PLACES, "auto")


def test_caches_that_cannot_be_joined_are_read_anew(monkeypatch):
    model = wrapped(llama())
    monkeypatch.setattr("agent_forge.phases.quietstar.branches._can_join", lambda *_: False)
    monkeypatch.setattr("agent_forge.phases.quietstar.branches.join_states", None)
    check(model, ids(4, 12), PLACES, "state")


# ---- writing thoughts


class Script:
    """A reading whose branches say what is written: the hidden state is the next token, one-hot."""

    def __init__(self, lines: list[list[int]]) -> None:
        self.lines, self.batch_sizes = lines, []

    def start(self, point_R):
        return StateOfScript(point_R, 0)

    def read(self, ids_RL, state):
        self.batch_sizes.append(len(ids_RL))
        said = torch.tensor([self.lines[p][state.step] for p in state.point_R.tolist()])
        return torch.nn.functional.one_hot(said, VOCAB)[:, None].float(), StateOfScript(state.point_R, state.step + 1)


class StateOfScript:
    def __init__(self, point_R, step):
        self.point_R, self.step = point_R, step

    def rows(self, index):
        return StateOfScript(self.point_R[index], self.step)


class Speaker(torch.nn.Module):
    """A head that takes the hidden state as the scores."""

    def read_out(self, h):
        return h * 50


def test_a_thought_ends_by_itself_or_at_its_budget():
    script = Script([[5, 6, 2, 9, 9], [7, 7, 7, 7, 7], [2, 9, 9, 9, 9], [8, 8, 2, 9, 9]])
    thoughts = think(Speaker(), script, torch.arange(4), torch.tensor([5, 4, 5, 2]), MARKS, 0.0)
    assert thoughts.length_R.tolist() == [2, 4, 0, 2]
    assert thoughts.stopped_R.tolist() == [True, False, True, False], "a budget that is used up is no end of its own"
    assert [row[:n] for row, n in zip(thoughts.ids_RL.tolist(), thoughts.length_R.tolist())] == [
        [5, 6],
        [7, 7, 7, 7],
        [],
        [8, 8],
    ]
    assert script.batch_sizes == [4, 3, 2, 1] and thoughts.read == 10, "finished thoughts leave the batch"


@pytest.mark.parametrize("said", [0, 1, 3])
def test_what_must_not_be_thought_is_not_thought(said):
    h = torch.nn.functional.one_hot(torch.tensor([[said]]), VOCAB).float()
    scores = thought_scores(Speaker(), h, MARKS)
    assert (scores[0, 0, [0, 1, 3]] == NEVER).all() and scores[0, 0].argmax() not in (0, 1, 3)
    assert scores[0, 0, 2] > NEVER, "the stop marker may be said"


def test_draws_follow_the_probabilities_and_torchs_seed():
    class Coin(Script):
        def read(self, ids_RL, state):
            scores = torch.full((len(ids_RL), 1, VOCAB), -40.0)
            scores[..., 5], scores[..., 6] = 0.02, 0.0  # times 50: one nat apart
            return scores, StateOfScript(state.point_R, state.step + 1)

    def drawn(temperature):
        torch.manual_seed(3)
        many = torch.zeros(4000, dtype=torch.long)
        return think(Speaker(), Coin([]), many, many + 1, MARKS, temperature).ids_RL[:, 0]

    assert torch.equal(drawn(1.0), drawn(1.0))
    assert set(drawn(1.0).tolist()) == {5, 6}
    assert abs((drawn(1.0) == 5).float().mean() - 0.731) < 0.03
    assert abs((drawn(3.0) == 5).float().mean() - 0.583) < 0.03
    assert (drawn(0.0) == 5).all()


def test_a_branch_reads_its_markers_its_thought_and_the_truth():
    context = torch.tensor([[10, 11, 12, 13, 14], [15, 16, 17, 18, 19]])
    points = points_at((0, 1), (1, 3))
    thoughts = Thoughts(
        torch.tensor([0, 0, 1]),
        torch.tensor([[5, 6, 7], [8, 2, 2], [9, 9, 2]]),
        torch.tensor([3, 1, 0]),
        torch.tensor([False, True, True]),
        0,
    )
    assert with_truth(thoughts, context, points, MARKS, ahead=3).tolist() == [
        [1, 5, 6, 7, 2, 12, 13],
        [1, 8, 2, 12, 13, 2, 2],
        [1, 2, 19, 2, 2, 2, 2],
    ]


def test_sampling_and_reading_again_agree():
    """The log-probability of a thought read as a whole is that of the distribution it was drawn from."""
    model, context = made(trm_config(t_max=0), stir=0.2), ids(2, 10)
    points = points_at((0, 3), (1, 7), limit=6)
    point_R = torch.tensor([0, 0, 1, 1])
    reading = StateReading(model, context, points)
    thoughts = think(model, reading, point_R, points.limit_N[point_R], MARKS, 0.0)
    read_RS = with_truth(thoughts, context, points, MARKS, ahead=2)
    h_RSD, _ = reading.read(read_RS, reading.start(point_R))
    best_RS = thought_scores(model, h_RSD, MARKS).argmax(-1)
    for row, n, stopped in zip(range(4), thoughts.length_R.tolist(), thoughts.stopped_R.tolist()):
        said = thoughts.ids_RL[row, :n].tolist() + [MARKS.stop] * stopped
        assert best_RS[row, : len(said)].tolist() == said
