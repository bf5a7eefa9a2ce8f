import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from forgekit.config import Config
from forgekit.errors import ConfigError, DataError, ResourceError
from forgekit.tracking import catalogue as catalogue_module
from forgekit.tracking.catalogue import CATALOGUES, catalogue, expand
from forgekit.tracking.events import EventLog, follow, read_events
from forgekit.tracking.loggers import PhaseLogger, PipelineLogger
from forgekit.tracking.sinks import SINKS


@pytest.fixture
def log(tmp_path):
    with EventLog(tmp_path / "deep" / "events.jsonl") as log:
        yield log


# --- events ----------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(log):
    log.write("start", {"n": 1}, session="s", phase="cognate")
    log.write("end", {})
    first, second = read_events(log.path)
    assert (first["session"], first["phase"], first["kind"], first["data"]) == ("s", "cognate", "start", {"n": 1})
    assert first["time"].endswith("Z") and first["time"] <= second["time"]
    assert 0 <= second["monotonic"] - first["monotonic"] < 5
    log.close()
    log.close()


def test_reading_selects_by_kind_phase_and_tail(log):
    for i in range(10):
        log.write("metrics" if i % 2 else "other", {"i": i}, phase="a" if i < 6 else "b")
    numbers = lambda **how: [e["data"]["i"] for e in read_events(log.path, **how)]  # noqa: E731
    assert numbers(kind="metrics") == [1, 3, 5, 7, 9]
    assert numbers(kind="metrics", phase="a") == [1, 3, 5]
    assert numbers(tail=2) == [8, 9] and numbers(kind="metrics", tail=2) == [7, 9] and numbers(tail=0) == []


def test_values_of_every_kind_become_plain_json(log):
    class Settings(Config):
        size: int = 3

    data = {
        "a": np.float32(1.5),
        "b": np.arange(3),
        "c": torch.tensor([1.0, 2.0]),
        "d": Path("x"),
        "e": Settings(),
        "f": (True, None),
    }
    log.write("k", data)
    (event,) = read_events(log.path)
    plain = {"a": 1.5, "b": [0, 1, 2], "c": [1.0, 2.0], "d": "x", "e": {"size": 3}, "f": [True, None]}
    assert event["data"] == plain and "nonfinite" not in event


def test_nan_and_infinity_are_null_and_flagged(log):
    log.write("k", {"loss": float("nan"), "x": {"y": [1.0, np.float64("-inf")]}, "ok": 1.0})
    (event,) = read_events(log.path)
    assert event["data"] == {"loss": None, "x": {"y": [1.0, None]}, "ok": 1.0}
    assert event["nonfinite"] == {"loss": "nan", "x.y.1": "-inf"}
    json.loads(log.path.read_text(), parse_constant=pytest.fail)


def test_a_torn_last_line_is_tolerated_and_spoils_nothing(log):
    log.write("one", {})
    with log.path.open("ab") as file:
        file.write(b'{"time": "2026')
    reading = read_events(log.path)
    assert len(reading) == 1 and reading.torn and reading.corrupt == []
    assert reading.end == log.path.read_bytes().index(b"\n") + 1
    with EventLog(log.path) as again:
        again.write("two", {})
    reading = read_events(log.path)
    assert [e["kind"] for e in reading] == ["one", "two"] and not reading.torn and reading.corrupt == [2]


def test_corrupt_lines_are_reported_by_number(log):
    log.write("one", {})
    with log.path.open("ab") as file:
        file.write(b"garbage\n\n[1]\n\xff\xfe\n")
    log.write("two", {})
    reading = read_events(log.path)
    assert [e["kind"] for e in reading] == ["one", "two"] and reading.corrupt == [2, 4, 5]


def test_no_log_is_not_an_empty_log(log, tmp_path):
    assert len(read_events(log.path)) == 0
    with pytest.raises(DataError, match="no such event log"):
        read_events(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_events(tmp_path)


def test_a_log_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError) as caught:
        EventLog(tmp_path / "file" / "events.jsonl")
    assert "\n" not in str(caught.value) and caught.value.remedy


FULL_DISK = """
import resource, sys
from forgekit.errors import ResourceError
from forgekit.tracking.events import EventLog
log = EventLog(sys.argv[1])
log.write("one", {})
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 20, resource.RLIM_INFINITY))
for expected in ("bytes written", "cannot be written"):
    try:
        log.write("lost", {"text": "x" * 100})
    except ResourceError as error:
        assert expected in str(error), error
    else:
        sys.exit("no error")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.write("two", {})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX limits")
def test_a_full_disk_is_an_error_and_spoils_no_other_line(tmp_path):
    path = tmp_path / "events.jsonl"
    subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], check=True)
    reading = read_events(path)
    assert [e["kind"] for e in reading] == ["one", "two"] and reading.corrupt == [2]


WRITE_MANY = """
import sys
from forgekit.tracking.events import EventLog
with EventLog(sys.argv[1]) as log:
    for i in range(1000):
        log.write("k", {"writer": int(sys.argv[2]), "i": i, "text": "x" * (i % 500)})
"""


def test_lines_of_several_processes_stay_whole(tmp_path):
    path = tmp_path / "events.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITE_MANY, str(path), str(w)]) for w in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    reading = read_events(path)
    assert not reading.corrupt and not reading.torn
    for writer in range(3):
        assert [e["data"]["i"] for e in reading if e["data"]["writer"] == writer] == list(range(1000))


def test_a_killed_writer_leaves_a_readable_log(tmp_path):
    path = tmp_path / "events.jsonl"
    code = f"from forgekit.tracking.events import EventLog\nlog = EventLog({str(path)!r})\n"
    code += "i = 0\nwhile True:\n    log.write('k', {'i': i}); i += 1"
    process = subprocess.Popen([sys.executable, "-c", code])
    for _ in range(1000):
        if path.exists() and path.stat().st_size > 100_000:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    reading = read_events(path)
    assert len(reading) > 100 and reading.corrupt == []
    assert [e["data"]["i"] for e in reading] == list(range(len(reading)))


def test_follow_yields_old_and_new_events_and_half_lines_only_when_whole(log):
    log.write("old", {})
    events = follow(log.path, poll=0.01)
    assert next(events)["kind"] == "old"
    line = b'{"session": "", "phase": "", "kind": "new", "data": {}}\n'

    def later():
        with log.path.open("ab", buffering=0) as file:
            file.write(line[:20])
            time.sleep(0.05)
            file.write(line[20:])
            file.write(b"\ngarbage\n")

    thread = threading.Thread(target=later)
    thread.start()
    assert next(events)["kind"] == "new"
    assert next(events) == {
        "session": "",
        "phase": "",
        "kind": "corrupt_line",
        "data": {"offset": log.path.stat().st_size - len(b"garbage\n")},
    }
    thread.join()


def test_follow_goes_on_where_reading_ended_and_stops_when_told(log):
    log.write("old", {})
    end = read_events(log.path).end
    log.write("new", {})
    assert [e["kind"] for e in follow(log.path, start=end, poll=0, stop=lambda: True)] == ["new"]
    with pytest.raises(DataError):
        next(follow(log.path.parent / "absent"))


# --- catalogue -------------------------------------------------------------------------------------------------


def test_phase_one_has_every_metric_of_the_sources():
    metrics = catalogue("cognate")
    per_model = ["train/loss", "train/loss_avg_100", "train/learning_rate", "epoch/loss", "size_mb", "parameters"]
    ours = ["train/tokens_per_second", "train/grad_norm", "act/mean_steps", "gate/entropy"]
    expected = {f"model_{n}/{name}" for n in (1, 2, 3) for name in per_model + ours}
    expected |= {f"config/{name}" for name in ("num_models", "hidden_size", "num_layers", "parameters_target")}
    summary = "num_models_created total_parameters avg_final_loss min_final_loss max_final_loss total_size_mb"
    expected |= {f"phase/{name}" for name in [*summary.split(), "duration_seconds", "success"]}
    assert set(metrics) == expected and len(metrics) == 42
    for name, metric in metrics.items():
        assert metric.name == name and metric.phase == "cognate" and metric.unit and metric.meaning


def test_names_expand_to_every_choice():
    assert expand("a/b") == ["a/b"]
    assert expand("m_{1,2}/{x,y}") == ["m_1/x", "m_1/y", "m_2/x", "m_2/y"]


@pytest.mark.parametrize(
    "rows, message",
    [
        ((("a", "1", "once", "x"), ("{a,b}", "1", "once", "y")), "listed twice"),
        ((("a", "1", "weekly", "x"),), "unknown cadence"),
    ],
)
def test_a_bad_table_is_refused(monkeypatch, rows, message):
    monkeypatch.setattr(catalogue_module, "COGNATE", rows)
    monkeypatch.setitem(CATALOGUES._items, "cognate", rows)
    with pytest.raises(ConfigError, match=message):
        catalogue("cognate")


# --- loggers ---------------------------------------------------------------------------------------------------


def test_metrics_are_checked_written_and_counted(log):
    logger = PhaseLogger(log, "s1", "cognate")
    logger.metrics({"model_1/train/loss": 2.5, "model_1/train/learning_rate": 1e-3}, step=7)
    logger.epoch(1, {"model_1/epoch/loss": 2.0})
    logger.event("note", text="hello")
    step, epoch, note = read_events(log.path, phase="cognate")
    assert step["data"] == {"step": 7, "values": {"model_1/train/loss": 2.5, "model_1/train/learning_rate": 0.001}}
    assert epoch["data"] == {"epoch": 1, "values": {"model_1/epoch/loss": 2.0}}
    assert note["kind"] == "note" and note["session"] == "s1"
    missing = logger.missing()
    assert len(missing) == 39 and "model_1/epoch/loss" not in missing and missing[0] == "config/num_models"
    logger.metrics(dict.fromkeys(missing, 1))
    assert logger.missing() == []


def test_an_unknown_metric_is_refused_with_the_nearest_and_nothing_is_written(log):
    logger = PhaseLogger(log, "s", "cognate")
    with pytest.raises(ConfigError, match="did you mean model_1/train/loss"):
        logger.metrics({"config/num_layers": 2, "model_1/train/los": 1.0}, step=1)
    assert len(read_events(log.path)) == 0 and "config/num_layers" in logger.missing()
    with pytest.raises(ConfigError, match="cognate"):
        PhaseLogger(log, "s", "cogmate")


def test_a_resumed_session_remembers_what_it_emitted(log):
    PhaseLogger(log, "s", "cognate").metrics({"config/num_models": 3})
    PhaseLogger(log, "other", "cognate").metrics({"config/num_layers": 3})
    missing = PhaseLogger(log, "s", "cognate").missing()
    assert "config/num_models" not in missing and "config/num_layers" in missing


def test_a_pipeline_writes_one_log(tmp_path):
    with PipelineLogger(tmp_path / "s1", "s1") as pipeline:
        pipeline.event("pipeline_start", phases=["cognate"])
        pipeline.phase("cognate").metrics({"phase/success": True})
    first, second = read_events(tmp_path / "s1" / "events.jsonl")
    assert (first["phase"], first["data"]) == ("", {"phases": ["cognate"]})
    assert (second["phase"], second["data"]["values"]) == ("cognate", {"phase/success": True})


# --- sinks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_told_with_the_pip_line(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        PipelineLogger(tmp_path, "s", sinks=["jsonl", name])


def test_a_broken_package_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("import no_such_dependency_of_wandb")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        PipelineLogger(tmp_path, "s", sinks=["wandb"])


def test_an_unknown_sink_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="did you mean wandb"):
        PipelineLogger(tmp_path, "s", sinks=["wandbb"])
    assert SINKS.names() == ["jsonl", "wandb", "mlflow"]


class ServiceError(Exception):
    pass


@pytest.fixture
def wandb(monkeypatch):
    """W&B's interface, recording calls; ``module.fail`` names the call that fails."""
    module = types.ModuleType("wandb")
    module.Error, module.calls, module.fail = ServiceError, [], None

    def call(name):
        def record(*args, **kwargs):
            if module.fail == name:
                raise ServiceError(f"{name} failed")
            module.calls.append((name, args, kwargs))
            return module

        return record

    for name in ("init", "define_metric", "log", "finish"):
        setattr(module, name, call(name))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_each_phase_on_its_own_axis(tmp_path, wandb):
    with PipelineLogger(tmp_path, "s1", sinks=["wandb"]) as pipeline:
        logger = pipeline.phase("cognate")
        logger.event("note")
        for step in (1, 2):
            logger.metrics({"model_1/train/loss": 2.0 / step}, step=step)
        logger.epoch(1, {"model_1/epoch/loss": 1.0})
        logger.metrics({"phase/success": True})
    assert wandb.calls[0][2] == {"project": "agent-forge", "id": "s1", "resume": "allow", "dir": str(tmp_path)}
    assert [call[1] + tuple(call[2].items()) for call in wandb.calls if call[0] == "define_metric"] == [
        ("cognate/model_1/train/loss", ("step_metric", "cognate/step")),
        ("cognate/model_1/epoch/loss", ("step_metric", "cognate/epoch")),
    ]
    assert [call[1][0] for call in wandb.calls if call[0] == "log"] == [
        {"cognate/model_1/train/loss": 2.0, "cognate/step": 1},
        {"cognate/model_1/train/loss": 1.0, "cognate/step": 2},
        {"cognate/model_1/epoch/loss": 1.0, "cognate/epoch": 1},
        {"cognate/phase/success": True},
    ]
    assert wandb.calls[-1][0] == "finish"


def test_a_sink_that_fails_is_dropped_and_the_run_goes_on(tmp_path, wandb):
    with PipelineLogger(tmp_path, "s1", sinks=["wandb"]) as pipeline:
        logger = pipeline.phase("cognate")
        wandb.fail = "log"
        logger.metrics({"config/num_models": 3})
        wandb.fail = None
        logger.metrics({"config/num_layers": 3})
    kinds = [e["kind"] for e in read_events(tmp_path / "events.jsonl")]
    assert kinds == ["metrics", "sink_failed", "metrics"]
    assert [call[0] for call in wandb.calls] == ["init"]


def test_a_sink_that_fails_to_close_is_told_in_the_log(tmp_path, wandb):
    with PipelineLogger(tmp_path, "s1", sinks=["wandb"]):
        wandb.fail = "finish"
    (event,) = read_events(tmp_path / "events.jsonl", kind="sink_failed")
    assert "finish failed" in event["data"]["error"] and event["data"]["sink"] == "WandbSink"


def test_a_sink_that_cannot_open_is_an_error_in_one_line(tmp_path, wandb):
    wandb.fail = "init"
    with pytest.raises(ResourceError, match="init failed"):
        PipelineLogger(tmp_path, "s1", sinks=["wandb"])


class Mlflow(types.ModuleType):
    """MLflow's interface with its runs in memory; ``fail`` names the call that fails."""

    MlflowException = ServiceError
    entities = types.SimpleNamespace(Metric=lambda *fields: fields)

    def __init__(self):
        super().__init__("mlflow")
        self.experiments, self.runs, self.logged, self.ended, self.fail, self.uri = {}, {}, [], [], None, None
        self.remote = False

    def is_tracking_uri_set(self):
        return self.remote

    def MlflowClient(self, uri):
        self.uri = uri
        return self

    def get_experiment_by_name(self, name):
        return self.experiments.get(name)

    def create_experiment(self, name, files):
        if self.fail == "create_experiment":
            raise ServiceError("no server")
        self.experiments[name] = types.SimpleNamespace(experiment_id="e1", files=files)
        return "e1"

    def search_runs(self, experiments, query):
        return [self.runs[query]] if query in self.runs else []

    def create_run(self, experiment, run_name, tags):
        run = types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"r{len(self.runs)}"))
        self.runs[f"tags.session = '{tags['session']}'"] = run
        return run

    def log_batch(self, run, metrics):
        if self.fail == "log_batch":
            raise ServiceError("connection lost")
        self.logged += [(run, key, value, step) for key, value, _, step in metrics]

    def set_terminated(self, run):
        if self.fail == "set_terminated":
            raise ServiceError("connection lost")
        self.ended.append(run)


@pytest.fixture
def mlflow(monkeypatch):
    module = Mlflow()
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module


def test_mlflow_gets_one_run_per_session(tmp_path, mlflow):
    for step in (1, 2):
        with PipelineLogger(tmp_path, "s1", sinks=["mlflow"]) as pipeline:
            pipeline.event("note")
            pipeline.phase("cognate").metrics({"model_1/train/loss": 2.5}, step=step)
            pipeline.phase("cognate").epoch(4, {"model_1/epoch/loss": 2})
    assert mlflow.logged[:2] == [
        ("r0", "cognate/model_1/train/loss", 2.5, 1),
        ("r0", "cognate/model_1/epoch/loss", 2.0, 4),
    ]
    assert mlflow.logged[2][0] == "r0" and mlflow.ended == ["r0", "r0"]
    assert mlflow.uri == f"sqlite:///{tmp_path}/mlflow.db"


def test_mlflow_uses_the_users_server(tmp_path, mlflow):
    mlflow.remote = True
    PipelineLogger(tmp_path, "s1", sinks=["mlflow"]).close()
    assert mlflow.uri is None and mlflow.experiments["agent-forge"].files is None


@pytest.mark.parametrize("call", ["log_batch", "set_terminated"])
def test_a_lost_mlflow_server_does_not_end_the_run(tmp_path, mlflow, call):
    mlflow.fail = call
    with PipelineLogger(tmp_path, "s1", sinks=["mlflow"]) as pipeline:
        pipeline.phase("cognate").metrics({"config/num_models": 3})
    assert len(read_events(tmp_path / "events.jsonl", kind="sink_failed")) == 1
    mlflow.fail, mlflow.experiments = "create_experiment", {}
    with pytest.raises(ResourceError, match="no server"):
        PipelineLogger(tmp_path, "s1", sinks=["mlflow"])
