"""``ftfast info``: versions, devices, and which backend runs here and why."""

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

import ftfast
from ftfast.dispatch import BACKENDS, explain, supports
from ftfast.extension import build_report, load_extension, why_no_tiles

_PACKAGES = ("torch", "triton", "torchvision", "numpy", "safetensors", "matplotlib", "rich")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    found = collect()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    print(f"ftfast {found['ftfast']}, Python {found['python']}, {found['machine']}")
    print("packages   " + ", ".join(f"{name} {version}" for name, version in found["packages"].items()))
    extension = found["extension"]
    print(f"extension  {extension['state']}")
    for key in ("compiler", "openmp", "instruction_sets", "matrix_tiles", "cuda", "without_cuda"):
        if extension.get(key, "") != "":
            print(f"           {key.replace('_', ' ')}: {extension[key]}")
    for device in found["devices"]:
        print(f"\n{device['device']}: {device['name']}")
        for backend, support in device["backends"].items():
            print(f"  {backend:<10} {'runs' if support['ok'] else 'does not run'}: {support['reason']}")
        print(f"  auto       {device['auto']}")
    return 0


def collect() -> dict[str, Any]:
    """What ``ftfast info`` shows, as plain data."""
    extension, state = load_extension()
    build = build_report()
    for told_elsewhere in ("reason", "without_amx"):
        build.pop(told_elsewhere, None)
    if extension is not None:
        build["matrix_tiles"] = f"not used: {reason}" if (reason := why_no_tiles()) else "used"
    return {
        "ftfast": ftfast.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "extension": {"state": state, "loaded": extension is not None, **(build if extension is not None else {})},
        "environment": {name: value for name, value in os.environ.items() if name.startswith(("FTFAST_", "TRITON_"))},
        "devices": [_describe(device) for device in _devices()],
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def _describe(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    factor = torch.empty(1, 1, device=device)
    backends = {backend: supports(backend, device, torch.float32, torch.float32)._asdict() for backend in BACKENDS}
    try:
        auto = explain(factor, factor).splitlines()[0]
    except ValueError as error:  # an unknown FTFAST_BACKEND
        auto = str(error)
    return {"device": str(device), "name": name, "backends": backends, "auto": auto}
