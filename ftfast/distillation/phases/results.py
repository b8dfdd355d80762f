"""results.json: accuracies by method and seed, gains paired by seed, and what they were measured on."""

import os
import platform
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

import ftfast
from ftfast.distillation.monitor.epochs import Epoch, images_per_second, others_share
from ftfast.distillation.monitor.processor_time import NOTABLE_SHARE
from ftfast.distillation.phases.selection import Trial
from ftfast.distillation.runtime.checkpoint import Checkpoint
from ftfast.distillation.settings.run_settings import Settings
from ftfast.distillation.training.methods import METHODS
from ftfast.distillation.training.resumable import history_of
from ftfast.distillation.training.terms import Weights

FORMAT = "ftfast-results"
VERSION = 1
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def student_result(seed: int, history: list[Epoch]) -> dict[str, Any]:
    """One student as results.json has it; its accuracy is that of the last epoch, not of the best one."""
    return {
        "seed": seed,
        "accuracy": history[-1].accuracy,
        "top5_accuracy": history[-1].top5_accuracy,
        "images_per_second": images_per_second(history),
        "others_share": others_share(history),
        "history": [asdict(record) for record in history],
    }


def paired_gain(accuracies: list[float], baseline: list[float]) -> dict[str, Any]:
    """The mean difference of accuracies with like seeds, its standard error (None for one seed), and how many rose."""
    gains = [accuracy - base for accuracy, base in zip(accuracies, baseline, strict=True)]
    return {
        "mean": fmean(gains),
        "standard_error": stdev(gains) / sqrt(len(gains)) if len(gains) > 1 else None,
        "seeds_up": sum(gain > 0 for gain in gains),
        "seeds": len(gains),
    }


def method_line(students: list[dict[str, Any]]) -> str:
    """Accuracy over seeds in words."""
    mean, deviation = _mean_and_deviation([student["accuracy"] for student in students])
    spread = "" if deviation is None else f" ± {deviation:.2f}"
    return f"{mean:.2f}{spread} % of the test images over {len(students)} seed{'s' * (len(students) > 1)}"


def collect(
    settings: Settings,
    teacher: Checkpoint,
    diagnosis: dict[str, Any] | None,
    trials: dict[str, list[Trial]],
    methods: dict[str, tuple[Weights, list[dict[str, Any]]]],
    seconds: float,
) -> dict[str, Any]:
    """The content of results.json.

    Args:
        settings: resolved.
        seconds: of this call; a resumed run does not know those of the calls before.
    """
    baseline = [student["accuracy"] for student in methods["none"][1]] if "none" in methods else None
    history = history_of(teacher)
    trained = (student["history"] for _, students in methods.values() for student in students)
    epochs = chain(map(asdict, history), *trained)
    dataset = settings.dataset()
    return {
        "format": FORMAT,
        "version": VERSION,
        "software": _software(),
        "hardware": _hardware(settings),
        "memory": _memory(settings),
        "settings": settings.to_json(),
        "data": {
            "title": dataset.title,
            "teacher_images": dataset.train_images,
            "student_images": settings.student_images,
            "test_images": dataset.test_images,
            "damaged_images": max((epoch["damaged"] for epoch in epochs), default=0),
        },
        "teacher": {
            "accuracy": teacher.description["accuracy"],
            "parameters": sum(
                tensor.numel() for name, tensor in teacher.tensors.items() if not name.endswith(_BUFFERS)
            ),
            "images_per_second": images_per_second(history),
            "others_share": others_share(history),
            "history": [asdict(record) for record in history],
        },
        "factor_channels": settings.factor_channels(),
        "paraphraser": diagnosis,
        "methods": {
            name: _method_result(name, weights, students, trials[name], baseline)
            for name, (weights, students) in methods.items()
        },
        "seconds": seconds,
    }


def _method_result(
    name: str, weights: Weights, students: list[dict[str, Any]], trials: list[Trial], baseline: list[float] | None
) -> dict[str, Any]:
    accuracies = [student["accuracy"] for student in students]
    mean, deviation = _mean_and_deviation(accuracies)
    # Beside other processes a student is trained more slowly than it would be.
    undisturbed = [student for student in students if (student["others_share"] or 0.0) <= NOTABLE_SHARE]
    rates = [student["images_per_second"] for student in undisturbed if student["images_per_second"] is not None]
    return {
        "title": METHODS[name].title,
        "source": METHODS[name].source,
        "weights": {key: weights[key] for key in METHODS[name].weights},
        "trials": [asdict(trial) for trial in trials],
        "mean": mean,
        "standard_deviation": deviation,
        "gain": None if baseline is None or name == "none" else paired_gain(accuracies, baseline),
        "images_per_second": fmean(rates) if rates else None,
        "students": students,
    }


def _mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    return fmean(values), stdev(values) if len(values) > 1 else None


def _software() -> dict[str, str]:
    found = {"ftfast": ftfast.__version__, "python": platform.python_version()}
    for package in ("torch", "triton", "torchvision", "numpy", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _hardware(settings: Settings) -> dict[str, Any]:
    hardware: dict[str, Any] = {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "threads": settings.threads,
        "device": settings.device,
    }
    if settings.device == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name()
    return hardware


def _memory(settings: Settings) -> dict[str, int]:
    """The most that the process has held so far, in MiB."""
    import resource  # which Windows has not

    used = {
        "host_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "linux" else 2**20)
    }
    if settings.device == "cuda":
        used["gpu_mib"] = torch.cuda.max_memory_allocated() // 2**20
    return used


def _cpu_name() -> str:
    described = Path("/proc/cpuinfo")
    if described.exists():
        for line in described.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
