"""What a GPU's loader does, part by part: decoding by nvJPEG and by the processor's threads, and the crops."""

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from bench.harness.gate import Candidate, Group
from bench.harness.measuring import Plan, raised, summarise
from bench.harness.records import Row
from bench.harness.registry import Settings
from bench.training.distill_step import LARGE_BATCH, QUICK_BATCH
from bench.training.step_peers import IMAGENET, Operands, Pair, ours
from ftfast.distillation.data.photographs import crops, streamed
from ftfast.distillation.data.photographs.decoding import Encoded, cut_batch, decode_or_none

GROUP = "parts of the GPU's loader"
REPEATS = 8


def gpu_parts(folder: Path, batch: int, size: int, settings: Settings) -> list[Row]:
    """Each on one batch over and over, the device waited for; one row with the reason where that cannot be."""
    try:
        return _gpu_parts(folder, batch, size, settings)
    except Exception as error:  # the step is still to be measured
        return [Row("loaders", GROUP, "all", "part", None, reason=raised(error), details={"images": batch})]


def _gpu_parts(folder: Path, batch: int, size: int, settings: Settings) -> list[Row]:
    from torchvision.io import ImageReadMode, decode_jpeg

    device, threads = settings.device, streamed.default_workers()
    files = random.Random(settings.plan.seed).sample(sorted(folder.rglob("*.jpeg")), batch)
    encoded = [Encoded.of(file.read_bytes(), file.name) for file in files]
    contents = [one.content for one in encoded]
    boxes = [crops.draw_box(one.height, one.width, number) for number, one in enumerate(encoded)]
    decoded = [pixels.to(device) for pixels in map(decode_or_none, encoded) if pixels is not None]

    def torchvisions() -> None:
        for pixels, box in zip(decoded, boxes, strict=True):
            crops.cut_box(pixels, box, size)

    with ThreadPoolExecutor(threads) as pool:
        parts: dict[str, Callable[[], object]] = {
            "nvJPEG": lambda: decode_jpeg(contents, ImageReadMode.RGB, device=device),
            f"{threads} threads of the processor": lambda: list(pool.map(decode_or_none, encoded)),
            "crop, resize, flip and normalise": lambda: cut_batch(decoded, boxes, size),
            "crop, resize and flip, torchvision": torchvisions,
        }
        return [_row(name, part, batch) for name, part in parts.items()]


def _row(name: str, part: Callable[[], object], batch: int) -> Row:
    elapsed = []
    try:
        for _ in range(REPEATS + 2):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            part()
            torch.cuda.synchronize()
            elapsed.append((time.perf_counter() - begin) * 1e3)
    except Exception as error:  # the others are still to be measured
        return Row("loaders", GROUP, name, "part", None, reason=raised(error), details={"images": batch})
    return Row("loaders", GROUP, name, "part", summarise([elapsed[2:]]), details={"images": batch})


STEP = "step"


def step_group(settings: Settings, pair: Pair) -> tuple[Plan, Group]:
    """How long to measure the step on synthetic images, and what."""
    batch = LARGE_BATCH[settings.device.type] if pair == IMAGENET else QUICK_BATCH
    on_gpu = settings.device.type == "cuda"
    plan = replace(settings.plan, blocks=2, warmups=5 if on_gpu else 1, calls=10 if on_gpu else 2, most_calls=20)
    details = {"teacher": pair.teacher, "student": pair.student, "dims": [batch, 3, pair.size, pair.size]}

    def build() -> list[Candidate]:
        step = ours(Operands(pair, batch, settings.device, settings.plan.seed), "ft")
        return [Candidate(f"{pair.title}, batch {batch}", STEP, step.run)]

    return plan, Group("loaders", f"the step of {pair.title}", details, build)
