"""``ftfast distill`` itself with ImageNet's preset, a few hundred steps long: rate, split, energy, pauses, by loader.

Teacher and paraphraser are cut short: the teacher is one of random weights whose batch norms have seen images, and the
paraphraser has half as many steps as the student.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from rich.table import Table

from bench.harness.machine import CHECKOUT
from bench.harness.measuring import raised, summarise
from bench.harness.records import Record, Row
from bench.harness.registry import Bench, Settings
from bench.results import tables
from bench.training import photographs
from bench.training.step_peers import IMAGENET, Operands, Pair
from ftfast.distillation.data.images import steps_of
from ftfast.distillation.monitor.step_clock import PARTS
from ftfast.distillation.monitor.telemetry import FILE

STEM = "preset_run"
WORK = "run"
PRESET = "imagenet-resnet34-resnet18"
EPOCHS = 2  # of the student; the first one, in which torch.compile works, is left out
STEPS = {"cpu": 12, "cuda": 300}
BATCH = {"cpu": 16, "cuda": 256}
LOADERS = {"cpu": ("synthetic", "folder"), "cuda": ("synthetic", "gpu")}
CHECKPOINT_SECONDS, TELEMETRY_SECONDS = 3.0, 1.0
USUAL_SECONDS = 300.0  # between two checkpoints, for which the pauses are told
MOST_PAUSE = 0.02
LIMIT_SECONDS = 400


class Size(NamedTuple):
    """What is run: image size and classes in the pair, images in a batch, of an epoch, and held out."""

    pair: Pair
    batch: int
    images: int
    held_out: int
    distinct: int

    @property
    def steps(self) -> int:
        return EPOCHS * steps_of(self.images, self.batch)


def size_of(settings: Settings) -> Size:
    """A quick look has small images of few classes."""
    if settings.quick:
        pair, batch, steps, distinct = replace(IMAGENET, size=64, classes=photographs.CLASSES), 8, 6, 16
    else:
        pair, batch, steps, distinct = IMAGENET, BATCH[settings.device.type], STEPS[settings.device.type], 256
    if settings.device.type == "cpu" and not settings.quick:
        pair = replace(pair, classes=photographs.CLASSES)  # of 1,000 classes an epoch would have to have 2,000 images
    images = (settings.steps or steps) * batch // EPOCHS
    return Size(pair, batch, max(images, 4 * pair.classes, batch), pair.classes, distinct)


def loaders(settings: Settings) -> tuple[str, ...]:
    return settings.loaders or LOADERS[settings.device.type]


def group_name(size: Size) -> str:
    shape = f"{size.batch}x3x{size.pair.size}x{size.pair.size}"
    return f"{PRESET}, {size.steps} steps of {shape}, {size.pair.classes} classes"


def run(settings: Settings, advance: Callable[[str], None]) -> list[Row]:
    """One run for each loader, one after the other."""
    size = size_of(settings)
    rows = []
    with tempfile.TemporaryDirectory(prefix="ftfast-preset-run-") as folder:
        home = Path(folder)
        advance("teacher and files")
        torch.save(
            Operands(size.pair, 1, torch.device("cpu"), settings.plan.seed).teacher().state_dict(), home / "teacher.pth"
        )
        file_bytes = None
        if set(loaders(settings)) - {"synthetic"}:
            counts = {"train": size.images, "val": size.pair.classes}
            file_bytes = photographs.make_folder(
                home / "folder", **counts, distinct=size.distinct, classes=size.pair.classes
            )
        for loader in loaders(settings):
            advance(loader)
            details: dict[str, Any] = {"images": size.batch, "steps": size.steps}
            if loader != "synthetic":
                details["file_bytes"] = file_bytes
            try:
                found = _found(*_run(loader, settings, size, home), size)
            except Exception as error:  # the other loader is still to be measured
                rows.append(Row(STEM, group_name(size), loader, WORK, None, reason=raised(error), details=details))
                continue
            elapsed = found.pop("step_milliseconds")
            rows.append(Row(STEM, group_name(size), loader, WORK, summarise([elapsed]), details={**details, **found}))
    return rows


def _run(loader: str, settings: Settings, size: Size, home: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The lines of the student's telemetry, and the run's results."""
    output = home / f"run-{loader}"
    chosen = {
        "teacher_checkpoint": str(home / "teacher.pth"),
        "loader": loader,
        "data_dir": str(home / "folder"),
        "image_size": size.pair.size,
        "classes": size.pair.classes,
        "train_images": size.images,
        "test_images": size.pair.classes,
        "paraphraser_held_out": size.held_out,
        "paraphraser_batch_size": size.batch,
        "batch_size": size.batch,
        "student_epochs": EPOCHS,
        "device": settings.device.type,
        "compile": "on" if settings.device.type == "cuda" else "off",  # as the whole preset's many steps are
    }
    given = {
        "preset": PRESET,
        "settings": chosen,
        "output": str(output),
        "checkpoint_seconds": 0.3 if settings.quick else CHECKPOINT_SECONDS,
        "telemetry_seconds": 0.0 if settings.device.type == "cpu" else TELEMETRY_SECONDS,
    }
    # Where a GPU waits for what torch.compile makes, all cores may make it; no step runs meanwhile.
    compiling = {"TORCHINDUCTOR_COMPILE_THREADS": "8"} if settings.device.type == "cuda" else {}
    finished = subprocess.run(
        [sys.executable, "-m", "bench.training.preset_run_worker", json.dumps(given)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_SECONDS,
        env={**os.environ, **compiling},
    )
    if finished.returncode != 0:
        said = [line.strip() for line in finished.stderr.splitlines() if line.strip()]
        raise RuntimeError(f"it ends with status {finished.returncode}: {said[-1] if said else 'nothing said'}")
    lines = [json.loads(line) for line in (output / FILE).read_text().splitlines()]
    of_student = [line for line in lines if line["training"].startswith("students/")]
    return of_student, json.loads((output / "results.json").read_text())


def _found(lines: list[dict[str, Any]], results: dict[str, Any], size: Size) -> dict[str, Any]:
    """Rates and split of the last epoch; pauses of all."""
    last = [line for line in lines if line["epoch"] == EPOCHS]
    if not last:
        raise RuntimeError("telemetry has no line of the last epoch: give it more --steps")
    found: dict[str, Any] = {
        "step_milliseconds": [1e3 * size.batch / line["images_per_second"] for line in last],
        "images_per_second": results["methods"]["ft"]["students"][0]["images_per_second"],
        "milliseconds": _means(_of(last, "milliseconds") or _of(lines, "milliseconds"), PARTS),
        "gpu": _means(_of(last, "gpu")),
    }
    if len(found["step_milliseconds"]) == 1:
        found["step_milliseconds"] *= 2
    if count := sum(line["checkpoints"] for line in lines):
        seconds = sum(line["checkpoint_pause"] * line["seconds"] for line in lines)
        found |= {"checkpoints": count, "seconds_per_checkpoint": seconds / count}
    return found


def _of(lines: list[dict[str, Any]], name: str) -> list[dict[str, float]]:
    return [line[name] for line in lines if name in line]


def _means(of_lines: list[dict[str, float]], names: tuple[str, ...] = ()) -> dict[str, float]:
    every = names or tuple(dict.fromkeys(name for line in of_lines for name in line))
    values = {name: [line[name] for line in of_lines if name in line] for name in every}
    return {name: fmean(found) for name, found in values.items() if found}


def pause_share(row: Row) -> float | None:
    """Of a run with a checkpoint every five minutes, from the mean pause of one; None where there was none."""
    seconds = row.details.get("seconds_per_checkpoint")
    return None if seconds is None else seconds / USUAL_SECONDS


def _cells(row: Row) -> dict[str, str]:
    """What tables show of a row, by heading."""
    details, gpu = row.details, row.details.get("gpu", {})
    rate, share = details.get("images_per_second"), pause_share(row)
    memory = gpu.get("memory_bytes")
    return {
        "images/s": "" if rate is None else f"{rate:,.0f}",
        **{f"{name}, ms": tables.number(details.get("milliseconds", {}).get(name)) for name in PARTS},
        "GPU busy, %": tables.number(gpu.get("busy_percent")),
        "watts": tables.number(gpu.get("watts")),
        "J/image": tables.number(gpu.get("joules_per_image")),
        "GiB": tables.number(None if memory is None else memory / 2**30),
        "s a checkpoint": tables.number(details.get("seconds_per_checkpoint")),
        "of 5 min, %": tables.number(None if share is None else 100 * share),
    }


def show(rows: list[Row]) -> Iterator[Table]:
    """One table for each group, the loaders side by side; why a row has no figure stands below."""
    for name in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == name]
        measured = [row for row in members if row.timing is not None]
        table = Table("", title=name, title_justify="left", title_style="bold")
        for row in measured:
            table.add_column(row.candidate, justify="right")
        for heading in _cells(members[0]):
            table.add_row(heading, *(_cells(row)[heading] for row in measured))
        table.caption = "\n".join(f"{row.candidate}: {row.reason}" for row in members if row.timing is None)
        yield table


def markdown(newest: dict[str, tuple[str, Record]], brief: bool = False) -> str:
    """The block of the README and of docs/benchmarks.md."""

    def found_in(_: str, record: Record) -> tuple[str, list[str]]:
        rows = record.of(STEM)
        measured = [row for row in rows if row.timing is not None]
        headings = [name for name in _cells(rows[0]) if any(_cells(row)[name] for row in measured)]
        lines = [[heading, *(_cells(row)[heading] for row in measured)] for heading in headings]
        table = tables.markdown_table(("loader", *(row.candidate for row in measured)), lines, numbers_from=1)
        return f". {rows[0].group}", [table, *(f"{row.candidate}: {row.reason}." for row in rows if row.timing is None)]

    return tables.by_device(newest, found_in, brief)


BENCH = Bench(
    summary="ftfast distill with ImageNet's preset, some hundred steps of it: rate, split, energy, checkpoints' pauses",
    size=lambda settings: 1 + len(loaders(settings)),
    run=run,
    tables=show,
    markdown=markdown,
)
