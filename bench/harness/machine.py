"""What a run was measured on."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import ftfast
from bench.harness import power
from ftfast import extension
from ftfast.distillation.monitor import gpu_meter
from ftfast.distillation.monitor.processor_time import NOTABLE_SHARE, ProcessorTime, others_share, usable_cores

BUSY_SHARE = 0.25  # of the cores, as a load average before the start


@contextmanager
def pinned(threads: int) -> Iterator[list[int] | None]:
    """Keep the process on as many cores as it has threads, the first that it may use; yields them, or None.

    On a machine of many cores the scheduler then moves no thread to another cache or memory node. It may still swap
    threads between those cores: bound one by one, a thread would wait for whatever else runs on its core. Where the
    threads take all cores nothing changes, and the system may have no such call.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if not allowed:
        yield None
        return
    kept = allowed[: max(1, threads)]
    _keep_on(kept)
    try:
        yield kept
    finally:
        _keep_on(allowed)


def _keep_on(cores: list[int]) -> None:
    # Threads that are there already keep to where they are unless told one by one.
    for thread in [int(entry.name) for entry in Path("/proc/self/task").glob("*")] or [0]:
        with suppress(OSError):  # A thread that has ended meanwhile.
            os.sched_setaffinity(thread, cores)


def load_average() -> list[float] | None:
    """Over 1, 5 and 15 minutes, or None where the system keeps none."""
    try:
        return [round(load, 2) for load in os.getloadavg()]
    except (AttributeError, OSError):
        return None


def busy_note() -> str:
    """Why figures measured now are not to be trusted, or nothing."""
    load = load_average()
    if load is None or load[0] <= BUSY_SHARE * usable_cores():
        return ""
    return (
        f"the machine was busy before the start: load average {load[0]} over one minute on {usable_cores()} cores; "
        "measure again when it is quiet"
    )


class Others:
    """What other processes take of the usable cores from now on."""

    def __init__(self) -> None:
        self._begin = ProcessorTime.now()

    def cores(self) -> float | None:
        """How many cores they kept busy on average, or None where the system does not say."""
        share = others_share([ProcessorTime.now().since(self._begin)])
        return None if share is None else round(max(0.0, share * self._begin.cores), 3)

    def note(self) -> str:
        """Why the figures measured meanwhile are not to be trusted, or nothing."""
        cores = self.cores()
        if cores is None or cores <= NOTABLE_SHARE * self._begin.cores:
            return ""
        return f"other processes kept {cores:.2f} of {self._begin.cores} cores busy during the run; measure again"


CHECKOUT = Path(__file__).resolve().parents[2]
CPU_FLAGS: tuple[str, ...] = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl")
CPU_FLAGS += (
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "bf16",
    "sve",
    "sve2",
)
# What changes an allocation's or a thread's cost; page faults are a good part of a large factor's time.
ALLOCATOR_VARIABLES = ("GLIBC_TUNABLES", "LD_PRELOAD", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
ALLOCATOR_PREFIXES = ("MALLOC_", "OMP_", "GOMP_", "KMP_", "MKL_")


def hardware(device: torch.device) -> dict[str, Any]:
    """The processor, its caches and instruction sets, the load before the run, and the GPU where it is used."""
    name, model, flags = _cpu()
    found: dict[str, Any] = {
        "cpu": name,
        "cpu_model": model,
        "flags": flags,
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "caches": _caches(),
        "memory_gib": _memory_gib(),
        "huge_pages": _read(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "load_average_before": load_average(),
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_bytes": properties.L2_cache_size,
            **(power.describe(gpu) if (gpu := gpu_meter.gpu_of(device)) else {}),
        }
    return found


def software() -> dict[str, Any]:
    """Versions, the allocator's environment, and the revision of the checkout."""
    return {
        "ftfast": ftfast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "compiler": _first_line([os.environ.get("CXX", "c++"), "--version"]),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "extension": _extension(),
        "environment": _allocator_environment(),
        **_revision(),
    }


def _cpu() -> tuple[str, str, list[str]]:
    """Name, maker with family and model, instruction sets; a cloud's names of a processor say little."""
    fields: dict[str, str] = {}
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip().lower(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    model = " ".join(
        f"{what} {fields[key]}".strip()
        for key, what in (("vendor_id", ""), ("cpu family", "family"), ("model", "model"), ("stepping", "stepping"))
        if key in fields
    )
    present = set((fields.get("flags") or fields.get("features") or "").split())
    return name, model, [flag for flag in CPU_FLAGS if flag in present]


def _caches() -> dict[str, str]:
    caches = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = _read(folder / "type")
        if kind in ("Data", "Unified"):
            caches[f"L{_read(folder / 'level')}"] = _read(folder / "size")
    return caches


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _extension() -> dict[str, Any]:
    """What the compiled extension was built with, and the version of that compiler as it is now."""
    try:
        report = json.loads(extension.BUILD_REPORT.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    compiler = report.get("compiler")
    return {**report, "compiler_version": _first_line([compiler, "--version"]) if compiler else None}


def _allocator_environment() -> dict[str, str]:
    found = {
        name: value
        for name, value in sorted(os.environ.items())
        if name in ALLOCATOR_VARIABLES or name.startswith(ALLOCATOR_PREFIXES)
    }
    if "LD_PRELOAD" in found:
        found["LD_PRELOAD"] = " ".join(Path(library).name for library in found["LD_PRELOAD"].replace(":", " ").split())
    return found


def _revision() -> dict[str, Any]:
    # A copy of a checkout, whose maker says what it is a copy of; git may be at another revision there.
    if given := os.environ.get("FTFAST_BENCH_REVISION"):
        return {"revision": given, "dirty": None}
    revision = _first_line(["git", "-C", str(CHECKOUT), "rev-parse", "--verify", "--quiet", "HEAD"])
    if not revision:
        return {"revision": None, "dirty": None}
    # Records and the README are made from a run and cannot change it.
    changes = ["git", "-C", str(CHECKOUT), "status", "--porcelain", "--", ".", ":!bench/records", ":!README.md"]
    first_change = _first_line(changes)
    return {"revision": revision, "dirty": None if first_change is None else bool(first_change)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first_line(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    finished = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return finished.stdout.strip().partition("\n")[0] if finished.returncode == 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
