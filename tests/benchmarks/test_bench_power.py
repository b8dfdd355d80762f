"""What a GPU does while it is measured, seen through a pynvml that is made up."""

import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from bench.harness import machine, power
from bench.harness.clocks import CpuClock
from bench.harness.gate import Candidate, Group
from bench.harness.measuring import QUICK_PLAN, Plan, measure_group
from bench.harness.power import Energy, Watch, measure_energy
from ftfast.distillation.monitor.gpu_meter import Gpu, gpu_of
from tests.monitor import fake_nvml
from tests.monitor.fake_clock import FakeClock
from tests.monitor.fake_nvml import FakeNvml

CUDA = torch.device("cuda", 0)
# The second device of the machine, and the only one that CUDA_VISIBLE_DEVICES leaves.
PROPERTIES = SimpleNamespace(
    name="a GPU", uuid="b", pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0, major=9, minor=0,
    multi_processor_count=132, total_memory=2**36, L2_cache_size=2**25,
)  # fmt: skip


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: PROPERTIES)
    return fake


def gpu_here() -> Gpu:
    gpu = gpu_of(CUDA)
    assert gpu is not None
    return gpu


@pytest.mark.parametrize("fails", ["", "nvmlDeviceGetHandleByUUID"])
def test_a_device_is_found_by_what_it_is_and_not_by_its_number(nvml: FakeNvml, fails: str) -> None:
    nvml.fails = {fails}
    # The fake's clocks refuse any other handle.
    assert power.sampled(gpu_here())["sm_clock_mhz"] == 1980


def test_hardware_names_driver_and_clocks(nvml: FakeNvml) -> None:
    found = machine.hardware(CUDA)["gpu"]
    assert found["name"] == "a GPU"
    assert (found["driver"], found["sm_clock_mhz"], found["power_limit_w"]) == ("580.1", 1980, 700)


@pytest.mark.parametrize(
    "fails", [{"nvmlInit"}, {"nvmlDeviceGetHandleByUUID", "nvmlDeviceGetHandleByPciBusId"}], ids=["start", "handles"]
)
def test_a_device_that_nvml_does_not_know_has_no_figures(nvml: FakeNvml, fails: set[str]) -> None:
    nvml.fails = fails
    assert gpu_of(CUDA) is None
    assert "driver" not in machine.hardware(CUDA)["gpu"]
    with Watch(None) as watch:
        pass
    assert watch.summary() == {}


def test_neither_a_cpu_nor_a_missing_package_has_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_of(torch.device("cpu")) is None
    assert gpu_of(CUDA) is None


def test_a_run_is_sampled_from_begin_to_end_and_throttling_said_in_words(nvml: FakeNvml) -> None:
    with Watch(gpu_here(), interval=0.005) as watch:
        time.sleep(0.05)
        nvml.sm_clock, nvml.reasons = 1500, 0x4 | 0x20 | 0x1
        time.sleep(0.05)
    found = watch.summary()
    assert found["sm_clock_mhz"]["start"] == found["sm_clock_mhz"]["highest"] == 1980
    assert found["sm_clock_mhz"]["end"] == found["sm_clock_mhz"]["lowest"] == 1500
    assert found["memory_clock_mhz"]["median"] == 2619
    assert found["temperature_c"]["median"] == 41
    assert found["watts"]["median"] == 200
    # An idle GPU's low clocks are no throttling.
    assert set(found["throttling"]) == {power.POWER_CAP, "software thermal slowdown"}
    assert 0 < found["throttling"][power.POWER_CAP] < 1
    assert power.FAULTS.intersection(found["throttling"]) == {"software thermal slowdown"}


def test_clocks_are_those_of_the_busy_gpu(nvml: FakeNvml) -> None:
    nvml.busy, nvml.sm_clock = 0, 345
    with Watch(gpu_here(), interval=0.002) as watch:
        time.sleep(0.06)
        nvml.sm_clock = 1980
        nvml.busy = 100
        time.sleep(0.02)
    found = watch.summary()
    assert found["sm_clock_mhz"]["lowest"] == found["sm_clock_mhz"]["median"] == 1980
    assert 0 < found["busy_samples"] < found["samples"]


@pytest.mark.parametrize("fails", ["nvmlDeviceGetPowerUsage", "nvmlDeviceGetCurrentClocksEventReasons"])
def test_what_one_sensor_lacks_is_left_out_alone(nvml: FakeNvml, fails: str) -> None:
    nvml.fails, nvml.reasons = {fails}, 0x8
    with Watch(gpu_here()) as watch:
        pass
    found = watch.summary()
    assert ("watts" in found) == (fails != "nvmlDeviceGetPowerUsage")
    # The older name of the same question answers for the newer.
    assert list(found["throttling"]) == ["hardware slowdown"]


def energy_of(step: Callable[[], object], seconds: float) -> Energy | None:
    return measure_energy(gpu_here(), step, lambda: None, call_seconds=1e-3, seconds=seconds)


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    for module in (power, fake_nvml):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_energy_is_counted_between_updates_of_the_counter(fake_time: FakeClock, nvml: FakeNvml) -> None:
    calls: list[int] = []

    def step() -> None:
        calls.append(1)
        fake_time.sleep(1e-3)

    found = energy_of(step, seconds=0.1)
    assert found is not None
    # Looked at every 4 ms, an update is seen up to so much late.
    assert found.watts == pytest.approx(200, rel=0.04)
    assert found.joules_per_call == pytest.approx(200 * 1e-3, rel=0.04)
    assert 100 <= found.calls < len(calls)


def test_no_energy_where_none_is_wanted_or_the_counter_is_missing_or_stands_still(
    fake_time: FakeClock, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    step: Callable[[], object] = lambda: fake_time.sleep(1e-3)  # noqa: E731
    assert energy_of(step, seconds=0) is None
    begin = fake_time.seconds
    with monkeypatch.context() as still:
        still.setattr(nvml, "nvmlDeviceGetTotalEnergyConsumption", lambda handle: 5)
        assert energy_of(step, seconds=0.01) is None
    assert fake_time.seconds - begin < 3
    nvml.fails = {"nvmlDeviceGetTotalEnergyConsumption"}
    assert energy_of(step, seconds=0.1) is None


class GpuLikeClock(CpuClock):
    """A CPU's clock that knows memory and energy, or fails to."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def energy(self, candidate: Candidate, call_seconds: float, seconds: float) -> Energy | None:
        if self.fails:
            raise RuntimeError("the device is lost\nmore")
        return Energy(0.5, 250.0, 10) if seconds else None

    def peak_bytes(self, candidate: Candidate) -> int | None:
        return 4096


def test_rows_keep_energy_and_memory_beside_their_times() -> None:
    group = Group("bench", "group", {}, lambda: [Candidate("whole", "work", lambda: None)])
    plan = Plan(blocks=1, warmups=1, calls=2, block_seconds=0.0)
    (row,) = measure_group(group, GpuLikeClock(), plan)
    assert row.details == {"peak_bytes": 4096, "joules_per_call": 0.5, "watts": 250.0}
    (row,) = measure_group(group, GpuLikeClock(), QUICK_PLAN)
    assert row.details == {"peak_bytes": 4096}
    (row,) = measure_group(group, GpuLikeClock(fails=True), plan)
    assert row.timing is not None
    assert row.details["not_taken"] == "it raises RuntimeError: the device is lost"
    (row,) = measure_group(group, CpuClock(), plan)
    assert row.details == {}
