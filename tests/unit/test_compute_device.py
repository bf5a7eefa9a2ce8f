import builtins
import json
import subprocess
import sys
import time
import types

import psutil
import pytest
import torch

from forgekit.compute import manager as manager_module
from forgekit.compute.device import detect_device, environment
from forgekit.compute.disk import forecast, readable, require_free
from forgekit.compute.manager import ComputeManager, cgroup_memory, ram_bytes
from forgekit.compute.monitor import HISTORY, ResourceMonitor
from forgekit.errors import ConfigError, ResourceError
from forgekit.tracking.events import EventLog, read_events


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_auto_falls_back_to_the_cpu(no_accelerator):
    assert detect_device() == torch.device("cpu")
    assert detect_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_an_absent_device_is_refused_not_replaced(no_accelerator, name):
    with pytest.raises(ConfigError) as caught:
        detect_device(name)
    assert caught.value.where == "device" and "auto" in caught.value.remedy and "\n" not in str(caught.value)


def test_unknown_device_names_the_nearest():
    with pytest.raises(ConfigError, match="cuda"):
        detect_device("cudda")


def test_an_old_gpu_is_skipped_with_a_warning_and_refused_by_name(monkeypatch, no_accelerator):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (5, 2))
    with pytest.warns(UserWarning, match=r"5\.2 is below 6\.0"):
        assert detect_device().type == "cpu"
    with pytest.raises(ConfigError, match=r"5\.2"):
        detect_device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 0))
    assert detect_device().type == detect_device("cuda").type == "cuda"


def test_environment_changes_with_the_thread_count_and_is_json():
    before = environment()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        after = environment()
    finally:
        torch.set_num_threads(threads)
    assert environment() == before and json.loads(json.dumps(before)) == before
    assert {key for key in before if before[key] != after[key]} == {"threads"}
    assert before["torch"] == torch.__version__ and before["cpu_capability"] and before["device"] == "cpu"


def test_importing_compute_loads_no_torch():
    modules = ["device", "manager", "budget", "ladder", "monitor", "disk"]
    code = "import sys; " + "; ".join(f"import forgekit.compute.{m}" for m in modules)
    code += "; import forgekit.tracking.loggers, forgekit.measure.evidence; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- manager ---------------------------------------------------------------------------------------------------


def test_memory_is_measured_at_each_call(monkeypatch):
    manager = ComputeManager("cpu")
    first = manager.available_memory()
    assert 0 < first["ram_free_gb"] <= first["ram_total_gb"] and "vram_free_gb" not in first
    fake = types.SimpleNamespace(total=int(8e9), available=int(3e9))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: fake)
    monkeypatch.setattr(manager_module, "cgroup_memory", list)
    assert manager.available_memory() == {"ram_total_gb": 8.0, "ram_free_gb": 3.0}
    assert manager.can_fit_model(1400) and not manager.can_fit_model(1500)
    monkeypatch.setattr(manager_module, "cgroup_memory", lambda: [(int(2e9), int(5e8)), (int(4e9), int(3.5e9))])
    assert ram_bytes() == (int(2e9), int(5e8))
    assert not manager.can_fit_model(250)


def test_cuda_memory_counts_the_pool_torch_holds_unused(monkeypatch):
    manager = ComputeManager("cpu")
    manager.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(2e9), int(6e9)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(3e9))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: int(1e9))
    memory = manager.available_memory()
    assert memory["vram_total_gb"] == 6.0 and memory["vram_free_gb"] == 4.0
    assert manager.can_fit_model(1500) and not manager.can_fit_model(1550)


def test_models_are_allocated_once_and_freed(monkeypatch):
    manager = ComputeManager("cpu")
    model = torch.nn.Linear(100, 100, bias=False)
    assert manager.allocate_model(model, "m") is model
    assert manager.current_allocation["m"].allocated_gb == pytest.approx(4e-5)
    with pytest.raises(ConfigError, match="already"):
        manager.allocate_model(model, "m")
    assert manager.free_model("m") is True and manager.free_model("m") is False
    emptied = []
    manager.allocate_model(model, "m")
    manager.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    assert manager.free_model("m") and emptied


@pytest.mark.parametrize("error, expected", [(MemoryError(), ResourceError), (RuntimeError("shape"), RuntimeError)])
def test_only_lack_of_memory_becomes_a_resource_error(error, expected):
    class Stubborn(torch.nn.Module):
        def to(self, device):
            raise error

    manager = ComputeManager("cpu")
    with pytest.raises(expected):
        manager.allocate_model(Stubborn(), "m")
    assert manager.current_allocation == {}


def _group(folder, limit, used, cache, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, (limit, used, f"anon 1\n{names[3]} {cache}")):
        (folder / name).write_text(f"{text}\n")


def test_cgroup_v2_limits_of_the_group_and_its_parents(tmp_path):
    names = ("memory.max", "memory.current", "memory.stat", "inactive_file")
    _group(tmp_path / "a" / "b", "max", 50, 0, names)
    _group(tmp_path / "a", 1000, 300, 100, names)
    (tmp_path / "self").write_text("0::/a/b\n")
    assert cgroup_memory(str(tmp_path), str(tmp_path / "self")) == [(1000, 200)]


def test_cgroup_v1_in_a_container_falls_back_to_the_mount(tmp_path):
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file")
    _group(tmp_path / "memory", 2000, 500, 600, names)
    (tmp_path / "self").write_text("4:cpuset:/x\n3:memory:/docker/abc\n0::/\n")
    assert cgroup_memory(str(tmp_path), str(tmp_path / "self")) == [(2000, 0)]


def test_without_cgroups_there_are_no_limits(tmp_path):
    assert cgroup_memory(str(tmp_path), str(tmp_path / "absent")) == []


# --- disk ------------------------------------------------------------------------------------------------------


def test_disk_is_asked_for_before_it_is_needed(tmp_path):
    require_free(tmp_path / "not" / "yet", 1, "a checkpoint")
    assert not (tmp_path / "not").exists()
    with pytest.raises(ResourceError) as caught:
        require_free(tmp_path / "x", 10**18, "the model")
    assert "the model needs 1000000.0 TB" in caught.value.what and caught.value.where == str(tmp_path / "x")


def test_forecast_counts_the_temporary_copy():
    assert forecast(10, artifacts=1, checkpoints=0, optimizer_slots=2) == 40 + 40
    assert forecast(10, artifacts=1, checkpoints=2, optimizer_slots=2) == 40 + 3 * 120


def test_readable_sizes():
    assert [readable(n) for n in (12, 1500, 2.5e6, 3e9)] == ["12 bytes", "1.5 kB", "2.5 MB", "3.0 GB"]


# --- monitor ---------------------------------------------------------------------------------------------------


class Log:
    """An event sink on a real event log."""

    def __init__(self, path):
        self.log = EventLog(path)

    def event(self, kind, **data):
        self.log.write(kind, data)


@pytest.fixture
def no_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)


def _wait_for(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited 5 s in vain")


def test_monitor_samples_into_history_and_log(tmp_path, no_nvml):
    with ResourceMonitor(Log(tmp_path / "e.jsonl"), interval=0.02) as monitor:
        monitor.start_monitoring()  # a second start changes nothing
        _wait_for(lambda: monitor.get_metrics_summary()["samples"] >= 3)
    events = read_events(tmp_path / "e.jsonl")
    assert [e["kind"] for e in events][:2] == ["resources_start", "resources"]
    assert "pynvml is not installed" in events.events[0]["data"]["gpu"]
    summary = monitor.get_metrics_summary()
    assert summary["samples"] == len(events) - 1 and summary["errors"] == 0
    # The mean of equal readings may exceed them by a rounding.
    assert summary["ram_max_gb"] * (1 + 1e-9) >= summary["ram_avg_gb"] > 0 and summary["process_rss_max_gb"] > 0
    assert summary["gpu_util_avg"] is None and summary["vram_avg_gb"] is None
    assert monitor.get_current_metrics()["cpu_percent"] >= 0
    monitor.stop_monitoring()  # harmless when stopped
    assert monitor._history.maxlen == HISTORY == 1000


def test_monitor_gives_a_fresh_sample_and_an_empty_summary_before_it_runs(no_nvml):
    monitor = ResourceMonitor()
    assert monitor.get_current_metrics()["process_rss_gb"] > 0
    summary = monitor.get_metrics_summary()
    assert summary["samples"] == 0 and summary["cpu_avg"] is None


def test_a_failing_sample_is_recorded_and_sampling_goes_on(tmp_path, monkeypatch, no_nvml):
    real, calls = psutil.virtual_memory, []

    def flaky():
        calls.append(1)
        if len(calls) == 1:
            raise psutil.AccessDenied(1)
        return real()

    monkeypatch.setattr(psutil, "virtual_memory", flaky)
    with ResourceMonitor(Log(tmp_path / "e.jsonl"), interval=0.01) as monitor:
        _wait_for(lambda: monitor.get_metrics_summary()["samples"] >= 1)
    (failure,) = read_events(tmp_path / "e.jsonl", kind="resources_error")
    assert "AccessDenied" in failure["data"]["error"]
    assert monitor.get_metrics_summary()["errors"] == 1


def test_a_failing_sink_is_counted_and_does_not_end_the_run(no_nvml):
    class Full:
        def event(self, kind, **data):
            raise ResourceError("disk full")

    with ResourceMonitor(Full(), interval=0.01) as monitor:
        _wait_for(lambda: monitor.get_metrics_summary()["samples"] >= 2)
    assert monitor.errors >= 3 and "disk full" in monitor.last_error


def test_monitor_never_keeps_the_interpreter_alive():
    code = "from forgekit.compute.monitor import ResourceMonitor; ResourceMonitor(interval=60).start_monitoring()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)


class NVMLError(Exception):
    pass


def _nvml(monkeypatch, gpus=2, init=lambda: None):
    """A driver with GPUs at 30 % and 50 %, 1 of 4 GB used each."""
    module = types.ModuleType("pynvml")
    module.NVMLError, module.NVML_TEMPERATURE_GPU = NVMLError, 0
    module.nvmlInit, module.nvmlDeviceGetCount = init, lambda: gpus
    module.nvmlDeviceGetHandleByIndex = lambda i: i
    module.nvmlDeviceGetMemoryInfo = lambda gpu: types.SimpleNamespace(used=1e9, total=4e9)
    module.nvmlDeviceGetUtilizationRates = lambda gpu: types.SimpleNamespace(gpu=30 + 20 * gpu)
    module.nvmlDeviceGetTemperature = lambda gpu, sensor: 60 + gpu
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_gpus_are_read_together(monkeypatch):
    _nvml(monkeypatch)
    metrics = ResourceMonitor().get_current_metrics()
    assert metrics["gpu_utilization"] == 40 and metrics["vram_used_gb"] == 2
    assert metrics["vram_percent"] == 25 and metrics["gpu_temperature"] == 61


def _no_driver():
    raise NVMLError("Driver Not Loaded")


@pytest.mark.parametrize("options, said", [({"init": _no_driver}, "Driver Not Loaded"), ({"gpus": 0}, "no GPU")])
def test_absent_gpus_are_said(monkeypatch, options, said):
    _nvml(monkeypatch, **options)
    monitor = ResourceMonitor()
    assert said in monitor.gpu_status and "gpu_utilization" not in monitor.get_current_metrics()


def test_an_unsupported_gpu_reading_is_said_once_and_the_rest_goes_on(tmp_path, monkeypatch):
    def unsupported(gpu):
        raise NVMLError("Not Supported")

    _nvml(monkeypatch).nvmlDeviceGetUtilizationRates = unsupported
    with ResourceMonitor(Log(tmp_path / "e.jsonl"), interval=0.01) as monitor:
        _wait_for(lambda: monitor.get_metrics_summary()["samples"] >= 2)
    assert len(read_events(tmp_path / "e.jsonl", kind="resources_error")) == 1
    assert monitor.errors == 1 and "Not Supported" in monitor.gpu_status


def test_nothing_else_than_a_missing_pynvml_is_excused(monkeypatch):
    real = builtins.__import__

    def broken(name, *args, **kwargs):
        if name == "pynvml":
            raise SyntaxError("broken installation")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(SyntaxError):
        ResourceMonitor()
