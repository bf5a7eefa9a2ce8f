"""Two processes train as one: replicated and sharded runs, checkpoints across process counts, uneven work."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import Echo, made, train_config, trainer, trm_config

from forgekit.errors import ArtifactError
from forgekit.models.base import whole
from forgekit.train import distributed
from forgekit.train.checkpoints import CheckpointManager

HERE = Path(__file__).parent
# AdamW with a large epsilon shows equal gradients as equal weights; Muon's bfloat16 magnifies rounding, so it runs
# for fewer steps and is compared more loosely.
CALM = {"use_muon": False, "eps": 1e-2, "grokfast_lambda": 0.5}
MUON = {"normuon_beta": 0.9, "weight_decay": 0.05, "grokfast_lambda": 0.3, "lr": 1e-3, "fallback_lr": 1e-3}
STE = {**MUON, "ste": True}
BASE = {"optimizer": CALM, "ema": 0.9, "clip": 0.5, "micro_batch": 2, "checkpoint_every": 0}
CASES = {
    "calm": BASE,
    "muon": {**BASE, "optimizer": MUON, "steps": 4},
    "ternary": {**BASE, "optimizer": STE, "steps": 4},
    "recomputed": {**BASE, "recompute": True, "steps": 3},
    "clip": {**BASE, "optimizer": {**CALM, "qk_clip": 0.3}, "model": {"qk_norm": False}},
    "sparse": {**BASE, "hidden": 0.9, "steps": 6},
    "poisoned": {**BASE, "checkpoint_every": 3, "poison": 8, "folder": "poisoned"},
    "write": {**BASE, "steps": 6, "checkpoint_every": 6, "folder": "write"},
    "read": {**BASE, "folder": "one"},
    "write parts": {**BASE, "steps": 6, "checkpoint_every": 6, "folder": "parts", "checkpoints": "sharded"},
    "read parts": {**BASE, "folder": "parts", "checkpoints": "sharded"},
}


def prepared(case: dict, folder: Path | None):
    case = dict(case)
    hidden, poison = case.pop("hidden", 0.0), case.pop("poison", None)
    recompute, name = case.pop("recompute", False), case.pop("folder", None)
    config = train_config(schedule="constant", **{k: v for k, v in case.items() if k != "model"})
    model = made(trm_config(**case.get("model", {})), stir=0.1)
    run = trainer(config, Echo(hidden=hidden), model, folder=folder / name if name else None)
    if recompute:
        run.plan = run.plan.replace(checkpoint_activations=True)
    if poison:
        run.observer = lambda info: break_once(run, info.step == poison)
    return run


def break_once(run, now: bool) -> None:
    if now and not getattr(run, "broken", False):
        run.broken = True
        with torch.no_grad():
            run.model.norm.weight.mul_(torch.nan)


def outcome(run) -> dict:
    """Losses, final weights and the first parts of a run, gathered where sharded."""
    parts = {}
    observe = run.observer

    def note(info):
        if info.step <= 3:  # later, rounding has grown through the steps of the halting target
            parts.update({f"{name} {info.step}": x for name, x in {**info.parts, "norm": info.grad_norm}.items()})
        if observe:
            observe(info)

    run.observer = note
    report = run.run()
    total = {n: float(whole(p.detach()).double().sum()) for n, p in run.model.named_parameters()}
    size = {n: float(whole(p.detach()).double().norm()) for n, p in run.model.named_parameters()}
    return {"losses": report.losses, "sums": total, "norms": size, "parts": parts, "recoveries": report.recoveries}


def child(folder: Path, names: list[str], parallel: str) -> None:
    """What each of the two processes does (this file is also their program)."""
    results = {}
    with distributed.process_group() as (rank, size):
        assert size == 2
        for name in names:
            run = prepared({**CASES[name], "parallel": parallel}, folder)
            results[name] = outcome(run)
            assert (parallel == "fsdp") == hasattr(run.model.norm.weight, "device_mesh")
        results["helpers"] = helpers(rank)
        if rank == 0:
            (folder / "results.json").write_text(json.dumps(results))


def helpers(rank: int) -> list:
    """The small collectives, and a parameter that only one process has a gradient for."""
    a, b, c = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad = torch.full((2,), 1.0 + rank)
    if rank:
        b.grad = torch.ones(2)
    distributed.sum_gradients([a, b, c])
    largest = [torch.tensor([1.0, 5.0]) if rank else torch.tensor([3.0, 2.0])]
    distributed.largest_over_processes(largest)
    return [
        a.grad.tolist(), b.grad.tolist(), c.grad is None, largest[0].tolist(),
        distributed.least_over_processes(7 - rank), distributed.sum_over_processes(rank + 0.5),
        distributed.from_all(rank), distributed.agreed(lambda: f"said by {rank}"), refused(rank),
    ]  # fmt: skip


def refused(rank: int) -> str:
    """What every process hears of an error in the first one."""

    def fail() -> None:
        raise ArtifactError(f"broke in {rank}", where="here", remedy="mend it")

    try:
        distributed.agreed(fail)
    except ArtifactError as error:
        return distributed.from_all(str(error))[1]
    return "nothing"


def launch(folder: Path, names: list[str], parallel: str) -> dict:
    """Run the named cases in two processes of one gloo group, as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([os.getcwd(), str(HERE)])
    command = [sys.executable, "-W", "ignore", __file__, str(folder), parallel, *names]
    children = [
        subprocess.Popen(
            command, env={**os.environ, **group, "PYTHONPATH": path, "RANK": str(r), "LOCAL_RANK": str(r)},
            stderr=subprocess.PIPE, text=True,
        )
        for r in range(2)
    ]  # fmt: skip
    try:
        errors = [c.communicate(timeout=120)[1] for c in children]
    finally:
        for c in children:
            c.kill()
    assert [c.returncode for c in children] == [0, 0], "\n".join(errors)[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of every case."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        name: outcome(prepared(case, folder)) for name, case in CASES.items() if not name.startswith(("read", "write"))
    }


@pytest.fixture(scope="module", params=["replicate", "fsdp"])
def together(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    prepared({**CASES["write"], "folder": "one"}, folder).run()
    return launch(folder, list(CASES), request.param), folder


def close(a: dict, b: dict, loose: float = 1.0) -> None:
    assert a["losses"][:6] == pytest.approx(b["losses"][:6], abs=1e-5 * loose)
    assert a["losses"] == pytest.approx(b["losses"], abs=1e-3 * loose)
    for key in ("sums", "norms"):
        for name, value in b[key].items():
            assert a[key][name] == pytest.approx(value, abs=1e-3 * loose, rel=1e-3 * loose), name


@pytest.mark.parametrize("name", ["calm", "recomputed", "clip", "sparse", "poisoned"])
def test_two_processes_take_the_course_of_one(alone, together, name):
    results, _ = together
    close(results[name], alone[name])
    assert results[name]["recoveries"] == alone[name]["recoveries"] == (name == "poisoned")


@pytest.mark.parametrize("name", ["muon", "ternary"])
def test_orthogonalised_steps_agree_as_far_as_bfloat16_lets_them(alone, together, name):
    results, _ = together
    close(results[name], alone[name], loose=100)
    assert results[name]["losses"][:2] == pytest.approx(alone[name]["losses"][:2], abs=1e-4)


def test_reported_parts_and_norms_are_those_of_the_whole_batch(alone, together):
    results, _ = together
    assert results["calm"]["parts"] == pytest.approx(alone["calm"]["parts"], abs=1e-4, rel=1e-4)
    assert results["sparse"]["parts"].keys() == alone["sparse"]["parts"].keys()


def test_a_checkpoint_of_one_process_is_continued_by_two(alone, together):
    results, _ = together
    close(results["read"], alone["calm"])


def test_a_checkpoint_of_two_processes_is_continued_by_one(alone, together):
    _, folder = together
    assert [p.name for p in CheckpointManager(folder / "write").checkpoints()] == ["step-00000006"]
    run = prepared({**CASES["calm"], "folder": "write"}, folder)
    result = outcome(run)
    close(result, alone["calm"])


def test_parts_written_by_two_processes_are_continued_by_two_and_by_one(alone, together):
    results, folder = together
    close(results["read parts"], alone["calm"])
    (path,) = CheckpointManager(folder / "parts").checkpoints()
    sizes = [p.stat().st_size for p in sorted(path.glob("state-*.safetensors"))]
    assert len(sizes) == 2
    if folder.name.startswith("fsdp"):
        assert min(sizes) > 0.3 * sum(sizes), "both processes hold a part"
    close(outcome(prepared({**CASES["calm"], "folder": "parts"}, folder)), alone["calm"])


def test_a_damaged_part_is_refused(together, tmp_path):
    _, folder = together
    (source,) = CheckpointManager(folder / "parts").checkpoints()
    for damage in ("cut", "gone"):
        path = tmp_path / damage / source.name
        shutil.copytree(source, path)
        part = sorted(path.glob("state-*"))[0]
        part.write_bytes(part.read_bytes()[:-8]) if damage == "cut" else part.unlink()
        with pytest.raises(ArtifactError, match="no readable checkpoint"):
            outcome(prepared({**CASES["calm"], "folder": damage}, tmp_path))


def test_collectives_do_what_they_say(together):
    results, _ = together
    assert results["helpers"] == [
        [3.0, 3.0],
        [1.0, 1.0],
        True,
        [3.0, 5.0],
        6,
        2.0,
        [0, 1],
        "said by 0",
        "here: broke in 0; mend it",
    ]


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed.process_group() as place:
        assert place == distributed.world() == (0, 1)
    p = torch.nn.Parameter(torch.zeros(1))
    distributed.sum_gradients([p])
    distributed.largest_over_processes([p.detach()])
    assert p.grad is None and distributed.sum_over_processes(2.5) == 2.5 and distributed.least_over_processes(3) == 3
    assert distributed.from_all("x") == ["x"] and distributed.agreed(lambda: 4) == 4


if __name__ == "__main__":
    child(Path(sys.argv[1]), sys.argv[3:], sys.argv[2])
    # Gloo's threads sometimes abort the interpreter's own shutdown; everything is on disk by now.
    sys.stdout.flush()
    os._exit(0)
