"""CPU, memory and GPU use, sampled in the background."""

from __future__ import annotations

import threading
import time
from collections import deque
from types import ModuleType
from typing import Any, Protocol

import psutil

from forgekit.errors import ForgeError

HISTORY = 1000


class EventSink(Protocol):
    """Anything that takes events, such as a phase's or a pipeline's logger."""

    def event(self, kind: str, **data: Any) -> None: ...


class ResourceMonitor:
    """Samples this machine every ``interval`` seconds on a daemon thread; a context manager.

    A sample that fails is an event ``resources_error`` and counted; sampling goes on. A sink that fails is kept
    in ``last_error`` and counted too.

    Args:
        sink: receives an event ``resources_start`` and one event ``resources`` per sample.
        interval: seconds between samples.
    """

    def __init__(self, sink: EventSink | None = None, interval: float = 5.0) -> None:
        self.interval = interval
        self.errors = 0
        self.last_error = ""
        self._sink = sink
        self._history: deque[dict[str, float]] = deque(maxlen=HISTORY)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._process = psutil.Process()
        self._nvml, self._gpus, self.gpu_status = _open_nvml()

    def start_monitoring(self) -> None:
        """Begin sampling; does nothing when it already runs."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._stop.clear()
        self._emit("resources_start", interval=self.interval, gpu=self.gpu_status)
        self._thread = threading.Thread(target=self._loop, name="resource-monitor", daemon=True)
        self._thread.start()

    def stop_monitoring(self) -> None:
        """End sampling and wait for the last sample."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> ResourceMonitor:
        self.start_monitoring()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop_monitoring()

    def get_current_metrics(self) -> dict[str, float]:
        """The latest sample, or a fresh one (0.1 s) when there is none yet."""
        with self._lock:
            if self._history:
                return dict(self._history[-1])
        psutil.cpu_percent()
        time.sleep(0.1)
        return self._collect()

    def get_metrics_summary(self) -> dict[str, Any]:
        """Averages and maxima over the kept samples; None where nothing could be read."""
        with self._lock:
            samples = list(self._history)
        summary: dict[str, Any] = {"samples": len(samples), "errors": self.errors, "last_error": self.last_error}
        for name, key, reduce in _SUMMARY:
            values = [sample[key] for sample in samples if key in sample]
            summary[name] = reduce(values) if values else None
        return summary | {"gpu_status": self.gpu_status}

    def _loop(self) -> None:
        # The first reading of cpu_percent only opens the window that the next one closes.
        psutil.cpu_percent()
        self._stop.wait(min(self.interval, 0.1))
        while not self._stop.is_set():
            self._sample()
            self._stop.wait(self.interval)

    def _sample(self) -> None:
        try:
            metrics = self._collect()
        except (psutil.Error, OSError) as error:
            self._fail(error)
            self._emit("resources_error", error=self.last_error)
            return
        with self._lock:
            self._history.append(metrics)
        self._emit("resources", **metrics)

    def _emit(self, kind: str, **data: Any) -> None:
        if self._sink is None:
            return
        try:
            self._sink.event(kind, **data)
        except (ForgeError, OSError) as error:  # a full disk must not end the run that is being watched
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self.errors += 1
        self.last_error = f"{type(error).__name__}: {error}"

    def _collect(self) -> dict[str, float]:
        memory = psutil.virtual_memory()
        return {
            "timestamp": time.time(),
            "cpu_percent": psutil.cpu_percent(),
            "ram_used_gb": memory.used / 1e9,
            "ram_percent": memory.percent,
            "process_rss_gb": self._process.memory_info().rss / 1e9,
            **self._collect_gpus(),
        }

    def _collect_gpus(self) -> dict[str, float]:
        if self._nvml is None:
            return {}
        try:
            return _read_gpus(self._nvml, self._gpus)
        except self._nvml.NVMLError as error:
            # A reading that a GPU does not support never comes back: say so once and go on without GPUs.
            self._nvml, self.gpu_status = None, f"no GPU readings: {error}"
            self._fail(error)
            self._emit("resources_error", error=self.last_error)
            return {}


_SUMMARY = (
    ("cpu_avg", "cpu_percent", lambda values: sum(values) / len(values)),
    ("cpu_max", "cpu_percent", max),
    ("ram_avg_gb", "ram_used_gb", lambda values: sum(values) / len(values)),
    ("ram_max_gb", "ram_used_gb", max),
    ("process_rss_max_gb", "process_rss_gb", max),
    ("gpu_util_avg", "gpu_utilization", lambda values: sum(values) / len(values)),
    ("vram_avg_gb", "vram_used_gb", lambda values: sum(values) / len(values)),
)


def _open_nvml() -> tuple[ModuleType | None, list[Any], str]:
    """(library, device handles, a sentence about both); no library means no GPU readings, and the sentence why."""
    try:
        import pynvml
    except ImportError:
        return None, [], "no GPU readings: pynvml is not installed (pip install nvidia-ml-py)"
    try:
        pynvml.nvmlInit()
        gpus = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        return None, [], f"no GPU readings: {error}"
    if not gpus:
        return None, [], "no GPU readings: the driver lists no GPU"
    return pynvml, gpus, f"NVML reads {len(gpus)} GPU{'s' * (len(gpus) > 1)}"


def _read_gpus(nvml: ModuleType, gpus: list[Any]) -> dict[str, float]:
    """Mean utilisation, summed memory and the highest temperature (°C) of all GPUs."""
    memory = [nvml.nvmlDeviceGetMemoryInfo(gpu) for gpu in gpus]
    used, total = sum(m.used for m in memory), sum(m.total for m in memory)
    return {
        "gpu_utilization": sum(nvml.nvmlDeviceGetUtilizationRates(gpu).gpu for gpu in gpus) / len(gpus),
        "vram_used_gb": used / 1e9,
        "vram_percent": 100 * used / total,
        "gpu_temperature": max(nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU) for gpu in gpus),
    }
