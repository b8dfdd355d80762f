"""An nvidia-ml-py that is made up, for tests of what asks a GPU for its figures."""

import time
from types import ModuleType, SimpleNamespace
from typing import Any


class NVMLError(Exception):
    """As pynvml raises it."""


class FakeNvml(ModuleType):
    """Two devices, the second in use; the energy counter is renewed every 10 ms and runs at its watts."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, watts: int = 200) -> None:
        super().__init__("pynvml")
        self.watts = watts
        self.memory = 2**30
        self.reasons = 0
        self.sm_clock = 1980
        self.busy = 100
        self.fails: set[str] = set()
        self.begin = time.monotonic()

    def _answer(self, function: str, answer: Any) -> Any:
        if function in self.fails:
            raise NVMLError(function)
        return answer

    def nvmlInit(self) -> None:
        self._answer("nvmlInit", None)

    def nvmlSystemGetDriverVersion(self) -> str:
        return self._answer("nvmlSystemGetDriverVersion", "580.1")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return self._answer("nvmlDeviceGetHandleByUUID", {"GPU-a": "first", "GPU-b": "second"}[uuid])

    def nvmlDeviceGetHandleByPciBusId(self, place: str) -> str:
        return self._answer("nvmlDeviceGetHandleByPciBusId", {"00000000:3b:00.0": "second"}[place])

    def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:
        assert handle == "second"
        return self._answer("nvmlDeviceGetClockInfo", {1: self.sm_clock, 2: 2619}[clock])

    def nvmlDeviceGetMaxClockInfo(self, handle: str, clock: int) -> int:
        return self._answer("nvmlDeviceGetMaxClockInfo", {1: 1980, 2: 2619}[clock])

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return self._answer("nvmlDeviceGetTemperature", 41)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return self._answer("nvmlDeviceGetPowerUsage", 1000 * self.watts)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return self._answer("nvmlDeviceGetEnforcedPowerLimit", 700_000)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return self._answer("nvmlDeviceGetMemoryInfo", SimpleNamespace(used=self.memory))

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        return self._answer("nvmlDeviceGetUtilizationRates", SimpleNamespace(gpu=self.busy))

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return self._answer("nvmlDeviceGetCurrentClocksEventReasons", self.reasons)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self._answer("nvmlDeviceGetCurrentClocksThrottleReasons", self.reasons)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        return self._answer(
            "nvmlDeviceGetTotalEnergyConsumption", self.watts * 10 * int((time.monotonic() - self.begin) / 0.01)
        )
