"""The compiled extension ``ftfast._C``: loaded where it was built, and the reason in words where it was not."""

import importlib
import json
import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

INSTRUCTION_SETS = ("avx512", "avx2", "baseline")
BUILD_REPORT = Path(__file__).with_name("_build_report.json")


def build_report() -> dict[str, Any]:
    """What the installation kept of the extension's build; empty where it kept nothing that can be read."""
    try:
        report = json.loads(BUILD_REPORT.read_text())
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


@cache
def load_extension() -> tuple[ModuleType | None, str]:
    """The compiled extension and how it came to be here, or None and why it is not."""
    wanted = os.environ.get("FTFAST_INSTRUCTION_SET", "")
    if wanted not in ("", *INSTRUCTION_SETS):
        return None, f"FTFAST_INSTRUCTION_SET is {wanted!r}, and it takes {', '.join(INSTRUCTION_SETS)}"
    try:
        return importlib.import_module("ftfast._C"), "compiled extension ftfast._C"
    except ImportError as error:
        if reason := build_report().get("reason"):
            return None, str(reason)
        if "_C" not in str(error) or isinstance(error, ModuleNotFoundError):
            return None, "the extension ftfast._C has not been built; run 'pip install -e .' in the checkout"
        return None, f"the extension ftfast._C does not load: {error}"


@cache
def extension() -> ModuleType:
    """The compiled extension, where it is known to be here."""
    found, _ = load_extension()
    assert found is not None
    return found


def why_no_tiles() -> str:
    """Why no kernel runs on Intel's matrix tiles (AMX) here, in words for users; empty where kernels do."""
    found, reason = load_extension()
    if found is None or hasattr(found, "conv3x3_tiles"):
        return "" if found else reason
    if reason := found.why_no_tiles():
        return str(reason)
    if wanted := os.environ.get("FTFAST_INSTRUCTION_SET", ""):
        return f"FTFAST_INSTRUCTION_SET is {wanted!r}"
    return str(build_report().get("without_amx") or "the extension was compiled without them")
