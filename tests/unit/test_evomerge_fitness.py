"""What candidates are worth, who scores them, and which settings and models phase 2 refuses."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from agent_forge.phases.evomerge.config import EvoMergeConfig, FitnessPlan
from agent_forge.phases.evomerge.evaluate import Candidate, Inline, RayWorkers, Task, Workers, evaluator, with_traits
from agent_forge.phases.evomerge.fitness import Exam, Marks, Reference, composite_change, parts, sit
from agent_forge.phases.evomerge.inputs import differing_traits, find_base, open_parents
from forgekit.data.plans import GymMix
from forgekit.data.problems import held_out
from forgekit.data.tokenizer import train_tokenizer
from forgekit.errors import ArtifactError, ConfigError, ResourceError
from forgekit.measure.scores import score_problems, score_text
from forgekit.models.io import read_model
from forgekit.store.storage import ModelStorage
from tests.unit.tiny import made, trm_config

PLAN = FitnessPlan(problems=8, windows=4, length=16)
MIX = {"copying": (GymMix(family="copy", levels=(1,)),), "sorting": (GymMix(family="sort", levels=(1, 2)),)}
TEXTS = [f"the {i} quick brown foxes jump over {i * 7} lazy dogs. " * 6 for i in range(8)]
NAMES = ("reasoning", "memory_integration", "adaptive_computation")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*TEXTS, *(p.prompt for mix in MIX.values() for p in held_out(mix, 20, "train"))], 300)


@pytest.fixture(scope="module")
def shape(tokenizer):
    return trm_config(vocab_size=tokenizer.get_vocab_size(), t_max=0, max_seq_len=128)


@pytest.fixture(scope="module")
def storage(tmp_path_factory, tokenizer, shape):
    """A trunk and three siblings, one of which recurses, as artifacts."""
    store = ModelStorage(tmp_path_factory.mktemp("storage"))
    session = store.registry.create_session({})
    trunk = made(shape, seed=1, stir=0.05)
    facts = {"speciality": [part.model_dump(mode="json") for part in MIX["copying"]]}
    first = store.save_model(trunk, session, "cognate", "trunk", facts, tokenizer=tokenizer)
    for seed, name in enumerate(NAMES, 2):
        model = made(shape.replace(t_max=2 * (seed == 4), act_threshold=0.5 + 0.1 * seed), seed=seed, stir=0.05)
        state = {k: v + 0.3 * (model.state_dict()[k] - v) for k, v in trunk.state_dict().items()}
        model.load_state_dict(state)
        mix = [part.model_dump(mode="json") for part in MIX["sorting" if seed == 3 else "copying"]]
        store.save_model(model, session, "cognate", name, {"parents": [first], "speciality": mix}, tokenizer=tokenizer)
    return store


def ids(storage) -> dict[str, str]:
    return {row["model_name"]: row["model_id"] for row in storage.registry.search_models(phase="cognate")}


@pytest.fixture(scope="module")
def exam(tokenizer):
    return Exam.make(tokenizer, {name: held_out(mix, 8, "select") for name, mix in MIX.items()}, TEXTS, PLAN)


@pytest.fixture(scope="module")
def task(storage, exam):
    folder = storage.resolve(ids(storage)["trunk"])
    return Task(folder, {"adaptive_computation": {"t_max": 2}}, {"select": exam}, PLAN, Reference(1e6, 10_000))


def candidates(storage, count: int = 4) -> list[Candidate]:
    folder = storage.resolve(ids(storage)["trunk"])
    state = load_file(folder / "model.safetensors")
    made_ = [{k: v * (1 + 0.01 * i) if v.is_floating_point() else v for k, v in state.items()} for i in range(count)]
    return [Candidate(save(s), "adaptive_computation" if i % 2 else "") for i, s in enumerate(made_)]


def marks(right: dict, bits=(8.0, 8.0), size=(4.0, 4.0), flops: float = 100.0) -> Marks:
    return Marks({k: np.array(v) for k, v in right.items()}, np.array(bits), np.array(size), flops, 1000, 0.0, 1.0)


# Fitness


def test_the_composite_is_the_weighted_sum_of_what_it_says():
    one = marks({"a": [1.0, 0.0], "b": [1.0, 1.0, 1.0, 1.0]}, flops=200.0)
    found = parts(one, FitnessPlan(), Reference(100.0, 2000))
    assert found["accuracy"] == 0.75, "the mean over specialities, not over problems"
    assert found["bits_per_byte"] == 2.0 and found["perplexity"] == 4.0 and found["perplexity_score"] == 0.25
    assert found["speed_score"] == 0.5 and found["memory_score"] == 2.0
    assert found["composite"] == pytest.approx(0.4 * 0.25 + 0.3 * 0.75 + 0.2 * 0.5 + 0.1 * 2.0)


def test_a_model_that_scores_no_numbers_is_worth_no_text(storage, exam):
    model, _ = read_model(storage.resolve(ids(storage)["reasoning"]))
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    broken = sit(model, exam)
    found = parts(broken, FitnessPlan(), Reference(broken.flops, broken.size))
    assert broken.bits_per_byte == 64.0 and found["perplexity_score"] < 1e-18
    assert found["composite"] == pytest.approx(0.3 + 0.3 * found["accuracy"])
    assert all(map(math.isfinite, composite_change([broken], [broken], FitnessPlan(), Reference(1.0, 1))))


def test_marks_are_those_of_the_measures(storage, tokenizer, exam):
    model, _ = read_model(storage.resolve(ids(storage)["adaptive_computation"]))
    found = sit(model, exam)
    for name, mix in MIX.items():
        scores = score_problems(model, tokenizer, held_out(mix, 8, "select"))
        assert np.array_equal(found.right[name], scores.right)
    assert found.bits_per_byte == pytest.approx(score_text(model, tokenizer, TEXTS, 16, 4).bits_per_byte)
    assert found.size == sum(t.numel() * 4 for t in model.state_dict().values())
    assert 0 < found.steps <= 2 and found.flops > sit(with_traits(model, {"t_max": 0}), exam).flops, "steps cost"


def test_speed_is_counted_so_that_equal_children_are_equal(storage, exam):
    model, _ = read_model(storage.resolve(ids(storage)["reasoning"]))
    one, other = (parts(sit(model, exam), PLAN, Reference(1e6, 1)) for _ in range(2))
    assert one == other


def test_the_interval_of_a_change_knows_pairs():
    rng = np.random.default_rng(0)
    right = rng.integers(0, 2, 400).astype(float)
    same = marks({"a": right})
    reference = Reference(100.0, 1000)
    assert composite_change([same], [same], FitnessPlan(), reference) == (0.0, 0.0, 0.0)
    better = marks({"a": np.maximum(right, (np.arange(400) % 4 == 0).astype(float))})
    change, low, high = composite_change([same], [better], FitnessPlan(), reference)
    assert change == pytest.approx(0.3 * (better.accuracy - same.accuracy)) and 0 < low < change < high
    cheaper = marks({"a": right}, flops=50.0)
    assert composite_change([same], [cheaper], FitnessPlan(), reference) == pytest.approx((0.2, 0.2, 0.2))
    text = marks({"a": right}, bits=(4.0, 12.0))
    _, low, high = composite_change([same], [text], FitnessPlan(), reference)
    assert low < 0 < high, "windows are resampled too"


# Who scores


def test_workers_give_the_bits_of_this_process_for_any_number(storage, task):
    asked = candidates(storage, 5)
    alone = [found | {"seconds": 0} for found in Inline(task).worth(asked)]
    assert len({found["composite"] for found in alone}) > 1
    for count in (1, 2):
        with evaluator(task, count, "processes") as workers:
            assert isinstance(workers, Workers)
            assert [found | {"seconds": 0} for found in workers.worth(asked)] == alone
    assert isinstance(evaluator(task, 0, "processes"), Inline)


def kill_children(moments: int, stop: threading.Event) -> None:
    """Kill this process's youngest worker, ``moments`` times, as soon as one is there."""
    done: set[int] = set()
    while len(done) < moments and not stop.is_set():
        for child in psutil.Process().children(recursive=True):
            if child.pid not in done and "spawn_main" in " ".join(child.cmdline()) and len(done) < moments:
                os.kill(child.pid, signal.SIGKILL)
                done.add(child.pid)
                time.sleep(0.3)
                break
        time.sleep(0.01)


@pytest.mark.parametrize("deaths", [1, 40])
def test_a_worker_that_dies_is_replaced_once(storage, task, deaths):
    asked = candidates(storage, 3)
    stop = threading.Event()
    killer = threading.Thread(target=kill_children, args=(deaths, stop))
    with Workers(task, 1) as workers:
        killer.start()
        try:
            if deaths == 1:
                found = [one | {"seconds": 0} for one in workers.worth(asked)]
                assert found == [one | {"seconds": 0} for one in Inline(task).worth(asked)]
            else:
                with pytest.raises(ResourceError, match=r"a worker died twice, \d of 3 candidates were scored; free"):
                    workers.worth(asked)
        finally:
            stop.set()
            killer.join()


def test_ray_is_asked_for_in_one_line_where_it_is_missing_and_agrees_where_it_is_there(storage, task):
    try:
        import ray  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="ray is not installed; pip install ray, or set"):
            evaluator(task, 2, "ray")
        return
    asked = candidates(storage, 3)
    with RayWorkers(task, 2) as workers:
        found = [one | {"seconds": 0} for one in workers.worth(asked)]
    assert found == [one | {"seconds": 0} for one in Inline(task).worth(asked)]


# Settings and models


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"search": {"population": 1}}, "a population of one cannot evolve"),
        ({"strategy": "elit"}, "did you mean elite"),
        ({"compare": {"strategies": ["elite", "cmaes"]}}, "did you mean cma_es"),
        ({"fitness": {"perplexity": 0.9}}, "sum to 1.5; make them sum to 1"),
        ({"generations": 0}, "generations"),
        ({"patience": 0}, "patience"),
        ({"skills": {"x": [{"family": "juggle"}]}}, "juggle"),
        ({"populaton": 3}, "populaton"),
        ({"search": {"population": 9}}, "too large for elite, which keeps a generation on the disk"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        EvoMergeConfig.build(changes, path="phases.evomerge")


def test_the_plan_knows_what_a_search_may_cost():
    config = EvoMergeConfig.build({"generations": 4, "compare": {"evaluations": 10, "seeds": 2}})
    assert config.forecast() == {"generations": 4, "evaluations": 4 * 8 + 10 * 2 * 4}


def test_the_base_is_the_nearest_ancestor_of_all(storage):
    known = ids(storage)
    assert find_base([known[name] for name in NAMES], storage, "") == known["trunk"]
    assert find_base([], storage, "elsewhere") == "elsewhere"
    parents, base = open_parents([known[name] for name in NAMES], known["trunk"], storage, {})
    assert [parent.name for parent in parents] == list(NAMES) and base.name == "trunk"
    assert parents[1].speciality == MIX["sorting"] and len({parent.print for parent in parents}) == 3


def test_traits_are_the_settings_in_which_a_model_differs(storage):
    models = {name: read_model(storage.resolve(one))[0].config for name, one in ids(storage).items()}
    found = differing_traits(models, "trunk")
    assert "trunk" not in found and found["adaptive_computation"]["t_max"] == 2
    assert found["reasoning"] == {"act_threshold": 0.7}


def damaged(storage, tmp_path: Path, name: str, change) -> str:
    """A copy of a model whose weights were changed; no artifact any more, so nothing but the weights is looked at."""
    folder = tmp_path / name
    shutil.copytree(storage.resolve(ids(storage)[name]), folder)
    for file in ("manifest.json", "evidence.json"):
        (folder / file).unlink(missing_ok=True)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    return str(folder)


def test_models_that_do_not_fit_are_named(storage, tmp_path):
    known = ids(storage)
    trunk, first, second = known["trunk"], known["reasoning"], known["memory_integration"]
    with pytest.raises(ConfigError, match="1 model given, merging takes two or more; run phase 1 first"):
        open_parents([first], trunk, storage, {})
    with pytest.raises(ArtifactError, match="reasoning: is given twice"):
        open_parents([first, first], trunk, storage, {})
    with pytest.raises(ArtifactError, match="base: .* is no ancestor of .*reasoning"):
        open_parents([first, known["adaptive_computation"]], second, storage, {})
    narrow = damaged(storage, tmp_path, "reasoning", lambda s: s.update({"norm.weight": torch.ones(3)}))
    with pytest.raises(ArtifactError, match=r"norm.weight has shape .*3"):
        open_parents([second, narrow], trunk, storage, {})
    stranger = damaged(storage, tmp_path, "memory_integration", lambda s: None)
    with pytest.raises(
        ArtifactError, match="no common ancestor is known; merge siblings .* --set phases.evomerge.base"
    ):
        find_base([first, stranger], storage, "")
    parents, _ = open_parents([first, stranger], trunk, storage, {})
    assert parents[1].model_id == stranger and parents[1].speciality == () and len(parents[1].print) == 64
    mute = json.loads((Path(storage.resolve(first)) / "config.json").read_text())
    assert mute["model_type"] == "trm_titans"


def test_without_anything_practised_the_skills_have_to_be_named(storage, tmp_path):
    both = [damaged(storage, tmp_path, name, lambda s: None) for name in ("reasoning", "memory_integration")]
    base = damaged(storage, tmp_path, "trunk", lambda s: None)
    with pytest.raises(ConfigError, match="nobody knows what the models practised; name it: --set phases.evomerge"):
        open_parents(both, base, storage, {})
    parents, _ = open_parents(both, base, storage, {"reasoning": MIX["sorting"]})
    assert parents[0].speciality == MIX["sorting"]
