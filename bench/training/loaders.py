"""How fast photographs come, from each loader and from torchvision's, and whether they or the step are the limit."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from bench.harness.clocks import clock_for
from bench.harness.measuring import measure_group, raised, summarise
from bench.harness.records import Record, Row
from bench.harness.registry import Bench, Settings
from bench.results import tables
from bench.training import photographs
from bench.training.distill_step import LARGE_BATCH
from bench.training.loaders_parts import STEP, gpu_parts, step_group
from bench.training.step_peers import CIFAR, IMAGENET, Pair
from ftfast.distillation.data.photographs import streamed
from ftfast.distillation.data.photographs.decoding import IMAGENET as COLOURS

STEM = "loaders"
WORK = "batch"
TORCHVISION = "torchvision"
SYNTHETIC = "synthetic"
LOADERS = {"cpu": ("folder", "webdataset", SYNTHETIC), "cuda": ("folder", "webdataset", "gpu", SYNTHETIC)}
TARGETS = {"gpu": 5000.0}  # images a second for each GPU
BLOCK_SECONDS = {"cpu": 2.0, "cuda": 1.0}
BLOCKS = 3


class Size(NamedTuple):
    """How much there is to load: the step's pair, images in a batch, files and how many of them differ."""

    pair: Pair
    batch: int
    files: int
    distinct: int


def size_of(settings: Settings) -> Size:
    """A quick look has small images and few files."""
    if settings.quick:
        return Size(CIFAR, 16, 96, 16)
    files = 8192 if settings.device.type == "cuda" else 4096
    return Size(IMAGENET, LARGE_BATCH[settings.device.type] if settings.device.type == "cuda" else 64, files, 256)


def workers() -> int:
    """As ``ftfast distill --workers -1`` has."""
    return streamed.default_workers()


def group_name(size: Size) -> str:
    pixels = f"{photographs.WIDTH}x{photographs.HEIGHT}"
    return f"JPEG files of {pixels} to {size.batch}x3x{size.pair.size}x{size.pair.size}"


def size(settings: Settings) -> int:
    """How often :func:`run` reports progress."""
    return len(settings.loaders or LOADERS[settings.device.type]) + 3


def run(settings: Settings, advance: Callable[[str], None]) -> list[Row]:
    """Make the files, draw from every loader, then time the step."""
    wanted = size_of(settings)
    rows = []
    with tempfile.TemporaryDirectory(prefix="ftfast-photographs-") as folder:
        advance("files")
        home = Path(folder)
        file_bytes = photographs.make_folder(
            home / "folder", train=wanted.files, val=photographs.CLASSES, distinct=wanted.distinct
        )
        photographs.make_shards(home / "folder", home / "webdataset")
        for loader in settings.loaders or LOADERS[settings.device.type]:
            advance(loader)
            rows.append(_row(loader, wanted, file_bytes, settings, partial(_batches, home, loader, settings, wanted)))
            settings.plan.known(rows[-1])
        advance(TORCHVISION)
        rows.append(_row(TORCHVISION, wanted, file_bytes, settings, partial(_torchvisions, home, settings, wanted)))
        if settings.device.type == "cuda":
            rows += gpu_parts(home / "folder", wanted.batch, wanted.pair.size, settings)
    advance(STEP)
    plan, group = step_group(settings, wanted.pair)
    rows += measure_group(group, clock_for(settings.device), plan)
    return rows


def _row(loader: str, wanted: Size, file_bytes: float, settings: Settings, batches: Callable[[], Iterator[Any]]) -> Row:
    details: dict[str, Any] = {"images": wanted.batch, "image_size": wanted.pair.size, "workers": workers()}
    if loader != SYNTHETIC:
        details |= {"file_bytes": file_bytes, "pixels": [photographs.HEIGHT, photographs.WIDTH]}
    try:
        blocks, core_seconds = _measure(batches(), settings)
    except Exception as error:  # the others are still to be measured
        return Row(STEM, group_name(wanted), loader, WORK, None, reason=raised(error), details=details)
    if core_seconds is not None and loader != SYNTHETIC:
        details["core_seconds_per_image"] = core_seconds / wanted.batch
    return Row(STEM, group_name(wanted), loader, WORK, summarise([[ms] for ms in blocks]), details=details)


def _measure(batches: Iterator[Any], settings: Settings) -> tuple[list[float], float | None]:
    """Milliseconds of a batch, each the mean of a block, and the processors' seconds of one.

    What was read ahead while nobody asked is taken off first; batches come in clumps, so that single ones say nothing.
    """
    seconds = 0.2 if settings.quick else BLOCK_SECONDS[settings.device.type]
    synchronise = torch.cuda.synchronize if settings.device.type == "cuda" else lambda: None
    for _ in range(2 if settings.quick else 4 * streamed.default_workers()):
        next(batches)
    blocks, count, before = [], 0, _core_seconds()
    for _ in range(BLOCKS):
        in_block = 0
        synchronise()
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds or not in_block:
            next(batches)
            synchronise()
            in_block += 1
        blocks.append((time.perf_counter() - begin) / in_block * 1e3)
        count += in_block
    after = _core_seconds()
    batches.close()  # type: ignore[attr-defined]
    return blocks, None if before is None or after is None else (after - before) / count


def _core_seconds() -> float | None:
    """Processor time of this process and of its reading processes, None where the system does not tell."""
    own = time.process_time()
    try:
        for child in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
            for process in child.read_text().split():
                fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
                own += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return None
    return own


def _batches(home: Path, loader: str, settings: Settings, wanted: Size) -> Iterator[Any]:
    """Of one epoch after the other, as a training draws them."""
    train, _ = streamed.load(
        home / ("webdataset" if loader == "webdataset" else "folder"),
        loader,
        settings.device,
        image_size=wanted.pair.size,
        workers=workers(),
        rand_augment=0,
        classes=photographs.CLASSES,
        train_images=wanted.files,
        test_images=photographs.CLASSES,
    )
    with closing(train):
        for epoch in range(1_000_000):
            yield from train.draw(wanted.batch, seed=settings.plan.seed, epoch=epoch)


def _torchvisions(home: Path, settings: Settings, wanted: Size) -> Iterator[tuple[Tensor, Tensor]]:
    """As torchvision's references train: ImageFolder, Pillow's decoder, processes of a DataLoader."""
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [
        transforms.RandomResizedCrop(wanted.pair.size),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(*COLOURS),
    ]
    images = ImageFolder(str(home / "folder" / "train"), transforms.Compose(steps))
    on_gpu = settings.device.type == "cuda"
    loader = DataLoader(
        images,
        batch_size=wanted.batch,
        shuffle=True,
        num_workers=workers(),
        pin_memory=on_gpu,
        persistent_workers=True,
    )
    while True:
        for pixels, labels in loader:
            yield pixels.to(settings.device, non_blocking=True), labels.to(settings.device, non_blocking=True)


class Rates(NamedTuple):
    """Images a second of a loader and of the step, and the loader's with one core; None where unknown."""

    loader: float
    of_core: float | None
    step: float | None


def rates(rows: list[Row]) -> dict[str, Rates]:
    """Of every loader that has a figure."""
    steps = [row for row in rows if row.work == STEP and row.timing is not None]
    step = steps[0].details["dims"][0] / steps[0].timing.median * 1e3 if steps and steps[0].timing else None
    found = {}
    for row in rows:
        if row.work == WORK and row.timing is not None:
            core_seconds = row.details.get("core_seconds_per_image")
            rate = row.details["images"] / row.timing.median * 1e3
            found[row.candidate] = Rates(rate, 1 / core_seconds if core_seconds else None, step)
    return found


def verdict(name: str, found: Rates) -> str:
    """Whether loader or step is the limit, and how many cores would feed the step, in a sentence."""
    if found.step is None:
        return f"{name} gives {found.loader:,.0f} images/s; the step has no figure to compare with."
    limit = name if found.loader < found.step else "the step"
    sentence = f"{name} gives {found.loader:,.0f} images/s and the step takes {found.step:,.0f}: {limit} is the limit"
    if found.of_core is None:
        return f"{sentence}."
    return f"{sentence}; {tables.number(found.step / found.of_core)} cores would feed it."


def show(rows: list[Row]) -> Iterator[Table]:
    """The loaders, with a sentence for each below; then the parts of a GPU's loader."""
    loaders = [row for row in rows if row.work in (WORK, STEP)]
    found = rates(loaders)
    table = Table(title=loaders[0].group if loaders else STEM, title_justify="left", title_style="bold")
    table.add_column("loader")
    for heading in ("images/s", "images/s a core", "workers", "aimed at"):
        table.add_column(heading, justify="right")
    below = [f"{row.candidate}: {row.reason}" for row in loaders if row.timing is None]
    for row in loaders:
        if row.candidate in found:
            one = found[row.candidate]
            target = TARGETS.get(row.candidate)
            of_core = "" if one.of_core is None else f"{one.of_core:,.0f}"
            aim = "" if target is None else f"{target:,.0f}"
            table.add_row(row.candidate, f"{one.loader:,.0f}", of_core, str(row.details["workers"]), aim)
            below.append(verdict(row.candidate, one))
    table.caption, table.caption_justify = "\n".join(below), "left"
    yield table
    if parts := [row for row in rows if row.work not in (WORK, STEP)]:
        table = Table("part", "median ms", "images/s", title=parts[0].group, title_justify="left", title_style="bold")
        for row in parts:
            rate = "" if row.timing is None else f"{row.details['images'] / row.timing.median * 1e3:,.0f}"
            table.add_row(row.candidate, tables.number(row.timing.median) if row.timing else row.reason, rate)
        yield table


def markdown(newest: dict[str, tuple[str, Record]], brief: bool = False) -> str:
    """The block of the README and of docs/benchmarks.md."""

    def found_in(_: str, record: Record) -> tuple[str, list[str]]:
        rows = [row for row in record.of(STEM) if row.work in (WORK, STEP)]
        found = rates(rows)
        sizes = [row.details["file_bytes"] for row in rows if "file_bytes" in row.details]
        mean = f", {sizes[0] / 1024:.0f} KiB each" if sizes else ""
        lines = []
        for row in rows:
            if row.candidate in found:
                one = found[row.candidate]
                of_core = "" if one.of_core is None else f"{one.of_core:,.0f}"
                lines.append((row.candidate, str(row.details["workers"]), f"{one.loader:,.0f}", of_core))
            elif row.work == WORK:
                lines.append((row.candidate, str(row.details["workers"]), row.reason, ""))
        table = tables.markdown_table(("loader", "workers", "images/s", "images/s a core"), lines, numbers_from=1)
        verdicts = "\n".join(f"- {verdict(name, one)}" for name, one in found.items())
        return f". {rows[0].group}{mean}", [table, verdicts]

    return tables.by_device(newest, found_in, brief)


BENCH = Bench(
    summary="images a second and a core of every loader and of torchvision's, and whether loader or step is the limit",
    size=size,
    run=run,
    tables=show,
    markdown=markdown,
)
