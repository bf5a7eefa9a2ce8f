"""Do thoughts carry the answers, or do they only look like it?

The same questions are answered under several conditions, all greedily:

- *with*: after the thought that the model writes;
- *without*: with thinking switched off (neither marker of a thought can be drawn);
- *shuffled*: after the thought that it wrote about another question of the same family and level;
- *filler*: after as many tokens as its thought had, all of them the same neutral one;
- *no_thought*: what a model trained without thoughts at equal compute gets right, if its results are given;
- *parent*: what the model before this training gets right, if given.

Once a thought is given, whether the greedy answer is exactly right takes one forward pass and no generation
(:mod:`forgekit.measure.scores`), so all conditions are judged by the same rule, the end of the answer included.

``theater_detected`` is true where the thoughts were *not shown* to carry the answers: too few questions show nothing.
All intervals are at 95 %, over the questions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from forgekit.data.batches import asked, end_token, told
from forgekit.data.gym import Problem
from forgekit.data.tokenizer import THINKING
from forgekit.errors import ConfigError, DataError
from forgekit.infer.engine import Engine
from forgekit.infer.sampling import SamplingConfig
from forgekit.measure.evidence import MINIMUM_ITEMS, Evidence
from forgekit.measure.prepared import score_rows
from forgekit.measure.stats import RESAMPLES, Interval, mean_interval, paired_difference, proportion
from forgekit.measure.thought_config import TheaterConfig
from forgekit.models.base import CausalLM

__all__ = ["Finding", "TheaterConfig", "TheaterReport", "Thought", "anti_theater", "correlation", "evidence"]
__all__ += ["share_lost", "strangers", "think"]

OPEN, CLOSE = THINKING[:2]
CONTROLS = ("shuffled", "filler")
BASELINES = ("no_thought", "parent")
"""Results from models measured elsewhere: trained without thoughts at equal compute; before this training."""
TIE = 1e-5
"""Nats per token: two likelihoods closer than this are the same but for rounding."""
FEWEST_OF_A_KIND = 5
"""Right answers, and wrong ones, that a correlation needs."""


class Scored(Protocol):
    """What is needed of a thought's coherence."""

    coherence: float
    valid: bool


class Scorer(Protocol):
    """Tells how coherent thoughts are: :class:`forgekit.measure.coherence.CoherenceScorer`, calibrated."""

    def score(self, items: Sequence[tuple[str, str]]) -> Sequence[Scored]: ...


@dataclass(frozen=True)
class Thought:
    """What a model thought about a question.

    Attributes:
        tokens: the thought's, without the markers around it.
        text: the same as text, markers inside it by name.
        answered: whether the answer that it then wrote is right as text.
        answer: what it then wrote.
    """

    tokens: list[int]
    text: str
    answered: bool
    answer: str = ""


@dataclass(frozen=True)
class Finding:
    """One requirement: ``passed`` is ``None`` where it could not be computed and was not used."""

    name: str
    passed: bool | None
    reason: str


@dataclass(frozen=True)
class TheaterReport:
    """What the controls found.

    Attributes:
        problems: the questions, in the order of all arrays.
        thoughts: one per question.
        rights: condition to 1.0 where the answer is right.
        nats: condition to the mean cross-entropy per token of the *right* answer.
        scored: coherence of each thought; ``None`` without a scorer.
        accuracy: condition to its share of right answers.
        generated: share of right answers as generated and compared as text; differs from ``with`` only where an
            answer can be cut into tokens in several ways.
        differences: condition to how much accuracy ``with`` has more, paired.
        lost: control to the share of the gain (with - without) that it loses; ``None`` where there is no gain.
        power: chance that the right answer is likelier after its own thought than after another question's.
        correlation: of coherence and right answers (point-biserial); ``None`` where it cannot be computed.
        levels: ``family/level`` to its number, its accuracy under each condition and its gain.
        findings: every requirement.
        config: what was required.
    """

    problems: tuple[Problem, ...]
    thoughts: tuple[Thought, ...]
    rights: dict[str, np.ndarray]
    nats: dict[str, np.ndarray]
    scored: tuple[Scored, ...] | None
    accuracy: dict[str, Interval]
    generated: Interval
    differences: dict[str, Interval]
    lost: dict[str, Interval | None]
    power: Interval
    correlation: Interval | None
    levels: dict[str, dict[str, Any]]
    findings: tuple[Finding, ...]
    config: TheaterConfig

    @property
    def theater_detected(self) -> bool:
        """Whether any requirement that could be computed is not met."""
        return any(finding.passed is False for finding in self.findings)

    @property
    def reasons(self) -> tuple[str, ...]:
        """One line per requirement: met, not met, or not used."""
        words = {True: "yes", False: "no", None: "not used"}
        return tuple(f"{words[f.passed]}: {f.reason}" for f in self.findings)

    def summary(self) -> dict[str, Any]:
        """Everything but the items, ready for JSON; intervals are [estimate, low, high]."""
        return {
            "n": len(self.problems),
            "theater_detected": self.theater_detected,
            "reasons": list(self.reasons),
            "accuracy": self.accuracy,
            "generated": self.generated,
            "improvement_over": self.differences,
            "gain_lost": self.lost,
            "predictive_power": self.power,
            "coherence_correlation": self.correlation,
            "coherence": None if self.scored is None else mean_interval([s.coherence for s in self.scored]),
            "valid_thoughts": None if self.scored is None else proportion([float(s.valid) for s in self.scored]),
            "thinking_tokens": float(np.mean([len(t.tokens) for t in self.thoughts])),
            "levels": self.levels,
        }


def anti_theater(
    model: CausalLM,
    tokenizer: Any,
    problems: Sequence[Problem],
    config: TheaterConfig = TheaterConfig(),  # noqa: B008  frozen
    *,
    baselines: Mapping[str, ArrayLike] | None = None,
    scorer: Scorer | None = None,
) -> TheaterReport:
    """Answer the same problems with thoughts, without, and with thoughts that cannot help; judge the thoughts by it.

    Args:
        model: thinks and answers; its tokenizer must have both markers of a thought.
        tokenizer: what came with it.
        problems: of a split that was not looked at; two different questions of every family and level, or more.
        config: budget and requirements.
        baselines: right (1) or wrong (0) for each problem from models measured elsewhere, by the names of
            :data:`BASELINES`. The gain over ``no_thought`` becomes a requirement, the one over ``parent`` is reported.
        scorer: tells how coherent a thought is; without one the correlation is not used.

    Raises:
        ConfigError: the filler is no token of the tokenizer, or a baseline's name is unknown.
        DataError: a question that no other of its family and level can lend a thought to, or a baseline of another
            length.
        ForgeError: the tokenizer has no thinking tokens, or a prompt is too long.
    """
    given = _checked(baselines or {}, len(problems))
    filler = _filler(tokenizer, config.filler)
    lender = strangers(problems, config.seed)
    thoughts = think(model, tokenizer, problems, config)
    words = [thought.tokens for thought in thoughts]
    shown = {"with": words, "without": None}
    shown |= {"shuffled": [words[i] for i in lender], "filler": [[filler] * len(ids) for ids in words]}
    scores = {name: _answers(model, tokenizer, problems, said) for name, said in shown.items()}
    rights = {name: found.right for name, found in scores.items()} | given
    scored = None if scorer is None else scorer.score([(p.prompt, t.text) for p, t in zip(problems, thoughts)])
    return _report(problems, thoughts, rights, {name: found.nats for name, found in scores.items()}, scored, config)


def think(
    model: CausalLM, tokenizer: Any, problems: Sequence[Problem], config: TheaterConfig, system: str = ""
) -> list[Thought]:
    """A greedy thought about every problem, in the order given; ``system`` is said before each."""
    engine = Engine(model, tokenizer)
    prompts = _encoded(tokenizer, [told(tokenizer, p.prompt, system) for p in problems])
    answers = _encoded(tokenizer, [p.answer for p in problems])
    # Two markers, and the end of the answer; a longer answer is wrong anyway.
    room = config.thinking_budget + 3 + max(map(len, answers), default=0)
    sampling = SamplingConfig(max_tokens=room, thinking="on", thinking_budget=config.thinking_budget)
    markers = {tokenizer.token_to_id(OPEN), tokenizer.token_to_id(CLOSE)}
    found: dict[int, Thought] = {}
    order = sorted(range(len(problems)), key=lambda i: len(prompts[i]))
    for at in range(0, len(order), config.rows):
        chosen = order[at : at + config.rows]
        for i, said in zip(chosen, engine.generate([prompts[i] for i in chosen], sampling), strict=True):
            tokens = [token for token in said.tokens[: said.thinking_tokens] if token not in markers]
            right = said.finish_reason == "stop" and said.text == problems[i].answer
            found[i] = Thought(tokens, said.thought, right, said.text)
    return [found[i] for i in range(len(problems))]


def strangers(problems: Sequence[Problem], seed: int) -> list[int]:
    """For every problem the place of another one of its family and level with another prompt: whose thought it gets.

    A permutation without fixed points inside every family and level, decided by the seed.

    Raises:
        DataError: a family and level without enough other questions.
    """
    groups: dict[tuple[str, int], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, problem in enumerate(problems):
        groups[problem.family, problem.level][problem.prompt].append(i)
    lender, rng = [0] * len(problems), np.random.default_rng([seed, 17])
    for (family, level), places in groups.items():
        # Repeats of a prompt lie side by side: turned by the longest run, nobody meets the own prompt.
        runs = [places[prompt] for prompt in rng.permutation(sorted(places)).tolist()]
        line, longest = [i for run in runs for i in run], max(map(len, runs))
        if len(line) < 2 * longest:
            what = f"{longest} of {len(line)} problems ask the same"
            raise DataError(what, where=f"{family}/{level}", remedy="give at least one other question for each")
        for own, other in zip(line, np.roll(line, longest).tolist()):
            lender[own] = other
    return lender


def _answers(model, tokenizer, problems: Sequence[Problem], thoughts: Sequence[list[int]] | None):
    """Scores of the right answers after the given thoughts, or after none."""
    end, _ = end_token(tokenizer)
    markers = [tokenizer.token_to_id(OPEN), tokenizer.token_to_id(CLOSE)]
    prompts = _encoded(tokenizer, [asked(tokenizer, p.prompt) for p in problems])
    answers = _encoded(tokenizer, [p.answer + end for p in problems])
    if thoughts is not None:
        prompts = [[*prompt, markers[0], *ids, markers[1]] for prompt, ids in zip(prompts, thoughts, strict=True)]
    # Neither marker can be drawn before an answer without thought, nor after a thought.
    return score_rows(model, tokenizer, prompts, answers, muted=markers)


def _encoded(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]


def _level(problem: Problem) -> str:
    return f"{problem.family}/{problem.level}"


def _filler(tokenizer: Any, filler: str) -> int:
    index = tokenizer.token_to_id(filler)
    if index is None or filler in (OPEN, CLOSE):
        what = f"{filler!r} is no single token that a thought can repeat"
        raise ConfigError(what, where="filler", remedy="give another token, such as <reason>")
    return index


def _checked(baselines: Mapping[str, ArrayLike], n: int) -> dict[str, np.ndarray]:
    found = {}
    for name, values in baselines.items():
        if name not in BASELINES:
            raise ConfigError(f"unknown name {name!r}", where="baselines", remedy=f"use {' or '.join(BASELINES)}")
        found[name] = np.asarray(values, dtype=np.float64)
        if found[name].shape != (n,) or not np.isin(found[name], (0.0, 1.0)).all():
            what = f"shape {found[name].shape} does not say right (1) or wrong (0) for each of {n} problems"
            raise DataError(what, where=f"baselines: {name}", remedy="score the same problems in the same order")
    return found


def _report(problems, thoughts, rights, nats, scored, config: TheaterConfig) -> TheaterReport:
    seed, own = config.seed, rights["with"]
    differences = {name: paired_difference(right, own, seed) for name, right in rights.items() if name != "with"}
    lost = {name: share_lost(own, rights["without"], rights[name], seed) for name in CONTROLS}
    margin = nats["shuffled"] - nats["with"]
    power = mean_interval(np.where(np.abs(margin) < TIE, 0.5, (margin > 0).astype(float)), seed)
    related = None if scored is None else correlation([item.coherence for item in scored], own, seed)
    measured = _Measured(own, differences, lost, power, related, scored is not None)
    return TheaterReport(
        problems=tuple(problems),
        thoughts=tuple(thoughts),
        rights=rights,
        nats=nats,
        scored=None if scored is None else tuple(scored),
        accuracy={name: proportion(right) for name, right in rights.items()},
        generated=proportion([float(thought.answered) for thought in thoughts]),
        differences=differences,
        lost=lost,
        power=power,
        correlation=related,
        levels=_levels(problems, rights, seed),
        findings=tuple(_findings(measured, config)),
        config=config,
    )


def _levels(problems: Sequence[Problem], rights: dict[str, np.ndarray], seed: int) -> dict[str, dict[str, Any]]:
    places = defaultdict(list)
    for i, problem in enumerate(problems):
        places[_level(problem)].append(i)
    return {
        name: {
            "n": len(at),
            **{condition: float(right[at].mean()) for condition, right in rights.items()},
            "gain": paired_difference(rights["without"][at], rights["with"][at], seed),
        }
        for name, at in places.items()
    }


@dataclass(frozen=True)
class _Measured:
    """What the requirements are judged by."""

    right: np.ndarray
    differences: dict[str, Interval]
    lost: dict[str, Interval | None]
    power: Interval
    correlation: Interval | None
    scored: bool


def _findings(measured: _Measured, config: TheaterConfig) -> Iterator[Finding]:
    n = len(measured.right)
    if n < MINIMUM_ITEMS:
        yield Finding("items", False, f"{n} questions are fewer than {MINIMUM_ITEMS} and show nothing")
    for name, words in (("without", "thinking off"), ("no_thought", "a model of equal compute without thoughts")):
        if name in measured.differences:
            gain = measured.differences[name]
            text = f"thoughts add {_points(gain)} points to {words}; needs more than {100 * config.min_improvement:g}"
            yield Finding(f"improvement over {name}", gain[1] > config.min_improvement, text)
    for name in CONTROLS:
        share, need = measured.lost[name], f"needs at least {100 * config.min_lost:g} %"
        if share is None:
            yield Finding(f"lost by {name}", None, f"{name} thoughts: there is no gain that they could lose")
        else:
            text = f"{name} thoughts lose {_percent(share)} of the gain; {need}"
            yield Finding(f"lost by {name}", share[1] >= config.min_lost, text)
    text = f"the right answer is likelier after its own thought in {_percent(measured.power)} of the questions"
    passed = measured.power[1] > config.min_power
    yield Finding("predictive power", passed, f"{text}; needs more than {100 * config.min_power:g} %")
    yield _correlated(measured, config)


def _correlated(measured: _Measured, config: TheaterConfig) -> Finding:
    found, name = measured.correlation, "coherence correlation"
    if found is None:
        right, wrong = int(measured.right.sum()), int((1 - measured.right).sum())
        why = f"{right} right and {wrong} wrong answers, {FEWEST_OF_A_KIND} of each are needed"
        if not measured.scored:
            why = "coherence was not scored"
        elif min(right, wrong) >= FEWEST_OF_A_KIND:
            why = "all thoughts are equally coherent"
        return Finding(name, None, f"coherence and right answers: {why}")
    text = f"coherence and right answers correlate by {found[0]:.2f} [{found[1]:.2f}, {found[2]:.2f}]"
    passed = found[2] >= config.min_correlation
    where = "" if found[0] >= config.min_correlation else ", its estimate is below it" if passed else ""
    return Finding(name, passed, f"{text}; must not lie below {config.min_correlation:g}{where}")


def _points(interval: Interval) -> str:
    return f"{100 * interval[0]:+.1f} [{100 * interval[1]:+.1f}, {100 * interval[2]:+.1f}]"


def _percent(interval: Interval) -> str:
    return f"{100 * interval[0]:.0f} % [{100 * interval[1]:.0f}, {100 * interval[2]:.0f}]"


def share_lost(own: ArrayLike, without: ArrayLike, control: ArrayLike, seed: int = 0) -> Interval | None:
    """Share of the gain ``own - without`` that a control loses: 1 where it is back at ``without``, above 1 below it.

    The interval is the percentile bootstrap's over the items. Where the control agrees with a side on all items, every
    resample gives the same share and would claim certainty: then the limits of that (score) difference, over those of
    the gain, are its ends.

    Args:
        own, without, control: right (1) or wrong (0) of the same items.
        seed: of the resamples.

    Returns:
        ``None`` where the gain's interval reaches 0: a share of nothing cannot be told.
    """
    first, second, third = (np.asarray(values, dtype=np.float64) for values in (own, without, control))
    gain, loss = paired_difference(second, first, seed), paired_difference(third, first, seed)
    if gain[1] <= 0:
        return None
    share = loss[0] / gain[0]
    limits = [(i, j) for i in (1, 2) for j in (1, 2)]
    if np.ptp(second - third) == 0:
        kept = paired_difference(second, third, seed)
        ends = [1 - kept[i] / gain[j] for i, j in limits]
        return share, min(ends), max(ends)
    if np.ptp(first - third) == 0:
        ends = [loss[i] / gain[j] for i, j in limits]
        return share, min(ends), max(ends)
    means_R2 = _resampled(np.stack([first - second, first - third], 1), seed)
    shares = means_R2[means_R2[:, 0] > 0]
    low, high = np.percentile(shares[:, 1] / shares[:, 0], (2.5, 97.5))
    return share, float(low), float(high)


def correlation(values: ArrayLike, right: ArrayLike, seed: int = 0) -> Interval | None:
    """Correlation of a number with right/wrong (point-biserial, that is Pearson's) with its bootstrap interval.

    Returns:
        ``None`` where fewer than five are right, fewer than five wrong, or all values are the same.
    """
    x, y = np.asarray(values, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if min(y.sum(), (1 - y).sum()) < FEWEST_OF_A_KIND or np.ptp(x) < 1e-12:
        return None
    x = (x - x.mean()) / x.std()  # the correlation does not change, the sums of squares stay exact
    columns = np.stack([x, y, x * x, y * y, x * y], 1)
    drawn = _pearson(_resampled(columns, seed))
    low, high = np.percentile(drawn[np.isfinite(drawn)], (2.5, 97.5))
    return float(_pearson(columns.mean(0)[None])[0]), float(low), float(high)


def _pearson(means_R5: np.ndarray) -> np.ndarray:
    x, y, xx, yy, xy = means_R5.T
    spread = np.sqrt(np.maximum(xx - x * x, 0) * np.maximum(yy - y * y, 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        # A resample of one kind only has no correlation.
        return np.where(spread > 1e-12, (xy - x * y) / spread, np.nan)


def _resampled(columns_NK: np.ndarray, seed: int) -> np.ndarray:
    """Means (R, K) of the columns over ``RESAMPLES`` resamples of the rows."""
    rng, n = np.random.default_rng(seed), len(columns_NK)
    rows = max(1, 2_000_000 // n)  # indices drawn at once: bounds the memory
    parts = []
    for done in range(0, RESAMPLES, rows):
        picks = rng.integers(0, n, (min(rows, RESAMPLES - done), n))
        parts.append(np.stack([column[picks].mean(1) for column in columns_NK.T], 1))
    return np.concatenate(parts)


def evidence(
    report: TheaterReport, *, split: str, chance: float, seeds: Sequence[int], compute: dict[str, float]
) -> list[Evidence]:
    """What the report says, as evidence.

    Claims: ``thoughts help`` (against thinking off), ``thoughts beat equal compute`` and ``thoughts beat the parent``
    (where those were given), ``shuffled thoughts lose the gain``, ``filler thoughts lose the gain``, ``answers follow
    from their thoughts`` and ``coherence tells right from wrong``. In the last four ``before`` is what is required.

    Args:
        report: what was measured.
        split: where the problems come from.
        chance: accuracy of guessing on them.
        seeds: behind the model and the evaluation.
        compute: what it cost.
    """
    asked_for = {"split": split, "seeds": tuple(seeds), "compute": compute}
    own, n, limits = report.rights["with"], len(report.problems), report.config
    no_thought = report.accuracy.get("no_thought")
    claims = {
        "without": "thoughts help",
        "no_thought": "thoughts beat equal compute",
        "parent": "thoughts beat the parent",
    }
    found = [
        Evidence.compare(
            claim=claim,
            metric=f"accuracy with thoughts, against {name}",
            before=report.rights[name],
            after=own,
            chance=chance,
            baseline=None if no_thought is None else no_thought[0],
            # Thinking may teach what could not be done at all.
            parent_must_beat_chance=False,
            **asked_for,
        )
        for name, claim in claims.items()
        if name in report.rights
    ]
    measured = [
        (f"{name} thoughts lose the gain", f"share of the gain lost by {name}", limits.min_lost, report.lost[name])
        for name in CONTROLS
    ]
    measured += [
        ("answers follow from their thoughts", "predictive power", limits.min_power, report.power),
        ("coherence tells right from wrong", "point-biserial correlation", limits.min_correlation, report.correlation),
    ]
    return found + [_statistic(*entry, n, asked_for) for entry in measured]


def _statistic(claim: str, metric: str, need: float, value: Interval | None, n: int, asked_for: dict) -> Evidence:
    question = {"claim": claim, "metric": metric, "chance": None, **asked_for}
    if value is None:
        return Evidence.compare(before=None, after=None, **question)
    estimate, low, high = value
    change = (estimate - need, low - need, high - need)
    return Evidence.of_statistic(before=need, after=estimate, change=change, n=n, **question)
