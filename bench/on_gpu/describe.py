"""The machine: device, driver, versions; as JSON."""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "numpy", "pytest", "hypothesis", "rich", "matplotlib", "nvidia-ml-py", "setuptools")
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


def version(package: str) -> str | None:
    """A package's version, or None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def said(command: list[str]) -> str | None:
    """What a command prints, or None where there is none or it fails."""
    if shutil.which(command[0]) is None:
        return None
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return finished.stdout.strip() if finished.returncode == 0 else None


def gpu() -> dict[str, Any] | None:
    """The first CUDA device, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_smi": said(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"]),
    }


def main() -> None:
    """Write the file that ``--out`` names."""
    parser = argparse.ArgumentParser(prog="python -m bench.on_gpu.describe")
    parser.add_argument("--out", type=Path, required=True)
    found = {
        "gpu": gpu(),
        "revision": os.environ.get("FTFAST_BENCH_REVISION"),
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "compiler": (said([os.environ.get("CXX", "c++"), "--version"]) or "none").partition("\n")[0],
        "packages": {package: version(package) for package in PACKAGES},
    }
    parser.parse_args().out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
