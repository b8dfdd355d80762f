"""Which of several kernels does a piece of work: looked up in tables of measurements, never measured inside a step.

A table is a JSON file for one device, shipped in ``ftfast/tuned/`` or written by ``ftfast tune`` to the user's cache
folder, whose entries win. Work that no table has measured goes to the library's kernel, or to what its caller names.
"""

import json
import math
import os
import platform
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ftfast.errors import shown
from ftfast.user_folder import user_folder

SHIPPED = Path(__file__).with_name("tuned")
VERSION = 1
# An entry speaks for batches up to this many times larger or smaller than the one it was measured on.
BATCH_RANGE = 2.0


class Work(NamedTuple):
    """What is to be computed; channels are those of one convolution, or of a head's student and factor."""

    operation: str
    dtype: str
    samples: int
    height: int
    width: int
    channels_in: int
    channels_out: int


class Choice(NamedTuple):
    """The kernel's name, and why it was taken, in words for users."""

    kernel: str
    reason: str


def table_folder() -> Path | None:
    """Where ``ftfast tune`` keeps its tables: FTFAST_CACHE, else the user's folder; None where there is neither."""
    return Path(folder) if (folder := os.environ.get("FTFAST_CACHE")) else user_folder()


@cache
def device_name(device: torch.device) -> str:
    """The processor's own name, which a table is for; a CPU's with the instruction set that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        try:
            found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        except OSError:
            found = None
        model = found.group(1).strip() if found else platform.processor() or platform.machine()
        return f"{model} {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def file_name(device: torch.device) -> str:
    """The table's file: the device's name in lower case, with hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") + ".json"


def read_table(path: Path) -> list[dict[str, Any]]:
    """The entries of a table; none where there is no such file, or none that may be read.

    Raises:
        ValueError: a file that is not a table of this version.
    """
    try:
        table = json.loads(path.read_text())
    except OSError:
        return []
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a readable table of ftfast tune ({shown(str(error))}); delete it or tune again."
        ) from None
    if not isinstance(table, dict) or table.get("version") != VERSION or not isinstance(table.get("entries"), list):
        raise ValueError(f"{path} is not a table of version {VERSION}; delete it or run ftfast tune again.")
    return table["entries"]


@cache
def _entries(device: torch.device) -> list[dict[str, Any]]:
    # The user's own measurements come last and win.
    folders = [SHIPPED, table_folder()]
    return [entry for folder in folders if folder for entry in read_table(folder / file_name(device))]


@lru_cache(maxsize=4096)
def choose_kernel(work: Work, device: torch.device, candidates: tuple[str, ...], default: str) -> Choice:
    """The kernel of ``candidates`` that was measured fastest for this work, or ``default``."""
    best: Choice | None = None
    closest = math.log(BATCH_RANGE) + 1e-9
    for entry in _entries(device):
        if entry.get("kernel") not in candidates:
            continue
        fixed = ("operation", "dtype", "height", "width", "channels_in", "channels_out")
        if any(entry.get(field) != getattr(work, field) for field in fixed):
            continue
        distance = abs(math.log(max(work.samples, 1) / max(entry["samples"], 1)))
        if distance <= closest:
            closest = distance
            best = Choice(entry["kernel"], f"measured fastest on this device (torch {entry['torch']})")
    return best or Choice(default, "not measured on this device; ftfast tune measures it")


def forget_tables() -> None:
    """Reads the tables anew at the next choice."""
    _entries.cache_clear()
    choose_kernel.cache_clear()
