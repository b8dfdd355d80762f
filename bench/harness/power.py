"""What a GPU does while it is measured: clocks, temperature, throttling, power and energy, through nvidia-ml-py.

Without a GPU, without nvidia-ml-py or after an error of NVML there are no figures, and no failure.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from ftfast.distillation.monitor.gpu_meter import Gpu

# NVML_CLOCKS_EVENT_REASON_*: what keeps the clocks below the highest.
POWER_CAP = "power cap"
REASONS = {
    0x004: POWER_CAP,
    0x008: "hardware slowdown",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "power brake",
    0x200: "board limit",
    0x400: "reliability limit",
}
BUSY = "busy_percent"

# How often a run is looked at; a look takes well under a millisecond, and none of it of the GPU's time.
INTERVAL_SECONDS = 0.2
# Large matmuls run into the power cap on a sound GPU; what that costs shows in its clocks. The others are faults.
FAULTS = frozenset(REASONS.values()) - {POWER_CAP}

BUSY_AT_LEAST = 50  # per cent; a GPU that waits for the host clocks down


class Energy(NamedTuple):
    """Of steps run back to back.

    Attributes:
        joules_per_call: of the whole GPU, what it takes when idle included.
        watts: on average meanwhile.
        calls: how many there were.
    """

    joules_per_call: float
    watts: float
    calls: int


def sampled(gpu: Gpu) -> dict[str, float | None]:
    """What is looked at again and again."""
    return {
        BUSY: gpu.busy_percent(),
        "sm_clock_mhz": gpu.ask("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
        "memory_clock_mhz": gpu.ask("nvmlDeviceGetClockInfo", "NVML_CLOCK_MEM"),
        "temperature_c": gpu.ask("nvmlDeviceGetTemperature", "NVML_TEMPERATURE_GPU"),
        "watts": gpu.watts(),
    }


def throttling(gpu: Gpu) -> list[str]:
    """Why the clocks are below the highest now, in words; an idle GPU's are, for no reason that counts."""
    bits = gpu.ask("nvmlDeviceGetCurrentClocksEventReasons")
    if bits is None:
        bits = gpu.ask("nvmlDeviceGetCurrentClocksThrottleReasons")
    return [reason for bit, reason in REASONS.items() if bits and bits & bit]


def describe(gpu: Gpu) -> dict[str, Any]:
    """Driver, clocks and power limit, without what is unknown."""
    try:
        driver = gpu.nvml.nvmlSystemGetDriverVersion()
    except gpu.nvml.NVMLError:
        driver = None
    limit = gpu.ask("nvmlDeviceGetEnforcedPowerLimit")
    found = {
        "driver": driver.decode() if isinstance(driver, bytes) else driver,
        "sm_clock_mhz": gpu.ask("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
        "highest_sm_clock_mhz": gpu.ask("nvmlDeviceGetMaxClockInfo", "NVML_CLOCK_SM"),
        "power_limit_w": None if limit is None else limit / 1000,
    }
    return {name: value for name, value in found.items() if value is not None}


class Watch:
    """Samples a GPU in a thread, from entering to leaving; does nothing where there is None to sample."""

    def __init__(self, gpu: Gpu | None, interval: float = INTERVAL_SECONDS) -> None:
        self._gpu = gpu
        self._interval = interval
        self._samples: list[dict[str, float | None]] = []
        self._throttling: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watch":
        if self._gpu is not None:
            self._thread = threading.Thread(target=self._sample, args=(self._gpu,), daemon=True, name="GPU watch")
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _sample(self, gpu: Gpu) -> None:
        while True:
            last = self._stop.is_set()
            self._samples.append(sampled(gpu))
            for reason in throttling(gpu):
                self._throttling[reason] = self._throttling.get(reason, 0) + 1
            if last:
                return
            self._stop.wait(self._interval)

    def summary(self) -> dict[str, Any]:
        """``start``, ``end``, ``lowest``, ``median`` and ``highest`` of what was sampled, and the share of throttling.

        Of the samples of a busy GPU, where there are any. Empty where nothing was sampled.
        """
        found: dict[str, Any] = {}
        busy = [sample for sample in self._samples if (sample[BUSY] or 0) >= BUSY_AT_LEAST] or self._samples
        for name in busy[0] if busy else ():
            values = [value for sample in busy if (value := sample[name]) is not None]
            if values:
                ordered = sorted(values)
                found[name] = {
                    "start": values[0],
                    "end": values[-1],
                    "lowest": ordered[0],
                    "median": ordered[len(ordered) // 2],
                    "highest": ordered[-1],
                }
        if found:
            found["samples"], found["busy_samples"] = len(self._samples), len(busy)
            found["throttling"] = {
                reason: round(count / len(self._samples), 4) for reason, count in self._throttling.items()
            }
        return found


def measure_energy(
    gpu: Gpu | None,
    step: Callable[[], object],
    synchronise: Callable[[], object],
    *,
    call_seconds: float,
    seconds: float,
) -> Energy | None:
    """The energy of steps run back to back between two updates of the counter at least ``seconds`` apart.

    The counter is renewed every 20 to 100 ms, so that a block of calls is only charged rightly from one update to
    another; None where it stands still, or where there is none.

    Args:
        synchronise: waits for the steps.
        call_seconds: about how long a step takes; the counter is read about every 4 ms.
        seconds: 0 measures nothing.
    """
    if gpu is None or seconds <= 0:
        return None
    calls_between_readings = max(1, int(4e-3 / max(call_seconds, 1e-7)))
    give_up = time.monotonic() + 4 * seconds + 1
    begin: tuple[float, float] | None = None
    before, calls = gpu.joules(), 0
    while before is not None and time.monotonic() < give_up:
        for _ in range(calls_between_readings):
            step()
        synchronise()
        calls += calls_between_readings
        joules, now = gpu.joules(), time.monotonic()
        if joules is None:
            return None
        if joules == before:
            continue
        before = joules
        if begin is None:
            begin, calls = (joules, now), 0
        elif now - begin[1] >= seconds:
            spent, elapsed = joules - begin[0], now - begin[1]
            return Energy(spent / calls, spent / elapsed, calls)
    return None
