"""The gym: solvers agree with generators, splits never touch, chance is what guessing gets."""

from collections import Counter
from itertools import product

import pytest

from forgekit.data.gym import FAMILIES, generate, solve, split_of
from forgekit.data.gym.sequences import guess_shown
from forgekit.data.tokenizer import END, question, train_tokenizer
from forgekit.errors import ConfigError, DataError

ALL = list(FAMILIES)
LEVELS = range(1, 11)


@pytest.mark.parametrize("name", ALL)
def test_the_solver_arrives_at_the_answer_reading_only_the_prompt(name):
    for level in LEVELS:
        for problem in generate(name, level, 200, seed=level):
            trace = solve(problem.prompt, name)
            assert trace.answer == problem.answer and trace.steps and all(trace.steps)
            assert (problem.family, problem.level) == (name, level)


def test_a_problem_finds_its_own_solver_and_a_prompt_its_first_word():
    problem = generate("far_recall", 3, 1, seed=0)[0]
    assert solve(problem).answer == problem.answer
    assert solve("add 27 85").answer == "112" and solve("sort 312").steps[0] == "smallest is 1, left 32"
    assert solve("larger 44 44", "compare").answer == "44"


@pytest.mark.parametrize("name", ALL)
def test_same_seed_same_problems_and_other_seeds_others(name):
    one = generate(name, 4, 50, seed=1)
    assert one == generate(name, 4, 50, seed=1) and one != generate(name, 4, 50, seed=2)
    assert len(one) == 50


@pytest.mark.parametrize("name", ALL)
def test_splits_are_disjoint_and_none_is_empty(name):
    for level in LEVELS:
        pools = [
            {p.prompt for p in generate(name, level, 60, seed=seed, split=split)}
            for split, seed in (("train", 0), ("select", 1), ("report", 2))
        ]
        assert all(pools) and not (pools[0] & pools[1] or pools[0] & pools[2] or pools[1] & pools[2])
        assert [{split_of(x) for x in pool} for pool in pools] == [{"train"}, {"select"}, {"report"}]


def test_shares_of_the_splits():
    counts = Counter(split_of(f"prompt {i}") for i in range(5000))
    assert 400 < counts["select"] < 600 and 400 < counts["report"] < 600


@pytest.mark.parametrize("name", ALL)
def test_levels_get_harder_to_guess_or_longer(name):
    first, last = (generate(name, level, 200, seed=0) for level in (1, 10))
    size = [sum(len(p.prompt) + len(p.answer) for p in pool) for pool in (first, last)]
    assert size[1] > size[0]


@pytest.mark.parametrize("name", ALL)
def test_no_constant_answer_beats_the_larger_of_chance_and_majority_elsewhere(name):
    # Gates use max(declared chance, majority share of the pool): measured on one pool it must hold on another.
    kind = FAMILIES.get(name)
    for level in LEVELS:
        assert 0 <= kind.chance(level) <= 0.55
        one, other = ([p.answer for p in generate(name, level, 1000, seed=s)] for s in (0, 1))
        answer, count = Counter(one).most_common(1)[0]
        assert other.count(answer) / 1000 <= max(kind.chance(level), count / 1000) + 0.05


def key_blind(prompt: str) -> str:
    """The digit shown most often: the best answer of someone who does not look at the key."""
    return Counter(c for c in prompt if c.isdigit()).most_common(1)[0][0]


@pytest.mark.parametrize(
    "name, level, options",
    [("recall", 1, {}), ("recall", 3, {}), ("recall", 5, {}), ("recall", 10, {}), ("far_recall", 5, {})]
    + [("far_recall", 1, {"pairs": pairs}) for pairs in (2, 4)],
)
@pytest.mark.parametrize("split", ["train", "report"])
def test_ignoring_the_key_gets_the_declared_chance_of_recall_and_no_more(name, level, options, split):
    problems = generate(name, level, 4000, seed=0, split=split, **options)
    hits = sum(key_blind(p.prompt) == p.answer for p in problems) / 4000
    # Four standard errors of 4,000 draws; too high a chance would hide what a model has learned.
    assert hits == pytest.approx(FAMILIES.get(name).chance(level, **options), abs=0.032)


@pytest.mark.parametrize("pairs", [1, 2, 3, 4, 5])
def test_the_simulated_share_of_the_most_frequent_digit_is_the_counted_one(pairs):
    counted = sum(max(Counter(shown).values()) for shown in product(range(10), repeat=pairs)) / pairs / 10**pairs
    assert guess_shown(pairs) == pytest.approx(counted, abs=0.003)


def test_declared_chance_of_state_is_that_of_the_best_constant_answer():
    answers = [p.answer for p in generate("state", 5, 2000, seed=0)]
    share = Counter(answers).most_common(1)[0][1] / 2000
    assert share == pytest.approx(FAMILIES.get("state").chance(5), abs=0.03)


def test_far_recall_asks_beyond_the_distance_it_is_told():
    tokenizer = train_tokenizer(["recall the and of to in that is it " * 50 + "a1 b2"], 300)
    for gap in (16, 60):
        for problem in generate("far_recall", 1, 30, seed=0, gap=gap, pairs=3):
            pairs, _, key = problem.prompt.partition(" ? ")[0], None, problem.prompt[-1]
            told = question(problem.prompt)
            place = told.index(f" {key}{problem.answer}")
            distance = len(tokenizer.encode(told).ids) - len(tokenizer.encode(told[: place + 3]).ids)
            assert distance >= gap and len(pairs.split()) == 1 + 3 + gap


def test_options_change_what_is_asked():
    assert FAMILIES.get("far_recall").options == ("gap", "pairs")
    assert len(generate("far_recall", 1, 1, seed=0, pairs=7)[0].prompt.split()) == 1 + 7 + 16 + 2


@pytest.mark.parametrize(
    "name, level, more, message",
    [
        ("sorting", 1, {}, "did you mean sort"),
        ("sort", 0, {}, "level 0 is not in 1..10"),
        ("sort", 11, {}, "level 11"),
        ("sort", 1, {"split": "test"}, "unknown split 'test'; choose one of train, select, report"),
        ("sort", 1, {"gap": 3}, "unknown option 'gap'; its options: none"),
        ("far_recall", 1, {"gpa": 3}, "its options: gap, pairs"),
    ],
)
def test_what_does_not_exist_is_refused_with_the_remedy(name, level, more, message):
    with pytest.raises(ConfigError, match=message):
        generate(name, level, 1, seed=0, **more)


@pytest.mark.parametrize(
    "prompt, name",
    [
        ("sort", "sort"), ("copy 12", "sort"), ("add 1", "add"), ("recall a1 ? b", "recall"), ("tool: dance", "tool"),
        ("follow a>b ? a 2", "lookup"), ("Tom sings.", "words"), ("run x = y; print x", "program"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_read_are_refused(prompt, name):
    with pytest.raises(DataError) as caught:
        solve(prompt, name)
    assert "\n" not in str(caught.value) and caught.value.remedy


def test_a_split_without_a_prompt_says_so(monkeypatch):
    monkeypatch.setattr("forgekit.data.gym.core.split_of", lambda prompt: "train")
    with pytest.raises(DataError, match="no report prompts at level 1"):
        generate("sort", 1, 5, seed=0, split="report")


def test_answers_do_not_hold_reserved_tokens():
    assert not any(END in p.answer + p.prompt for name in ALL for p in generate(name, 7, 50, seed=0))
