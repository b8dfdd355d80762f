"""Epoch time past the machines at hand, predicted from measured parts: the step, the gradient's bytes, the loaders.

    reduce(p) = 2 (g - 1) / g B / v + 2 (m - 1) / m B / (g w) + 2 (g - 1) a + 2 (m - 1) b

for p GPUs, g of them in each of m nodes: a ring within the node at v bytes a second, one of every GPU's share between
the nodes at w, and a latency for each of their hops. The gradient is on its way while backward runs, so that of
``reduce`` only what is longer than backward adds to the step.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ftfast
from bench.harness.records import RECORDS, Record, Row, newest_alone
from bench.results import tables
from bench.training import distill_step, loaders, preset_run, store
from bench.training.step_peers import IMAGENET, Pair
from ftfast.distillation.data.photographs.listing import IMAGENET as COUNTS
from ftfast.distillation.models import registry

GPUS = (1, 8, 64, 512)
IN_NODE = 8
# Assumed: of NVLink's 450 GB/s in one direction and a 400 Gbit/s adapter for each GPU, what rings reach.
NVLINK, NETWORK = 300e9, 40e9
HOP_IN_NODE, HOP_BETWEEN = 3e-6, 10e-6
BACKWARD_SHARE = 0.4  # of the step, where its split was not measured
BYTES = 4  # of a gradient's number
PREDICTED, MEASURED = "predicted", "measured"


class Parts(NamedTuple):
    """What a prediction is made of.

    Attributes:
        step, backward: seconds on one GPU, its batch in ``batch`` images.
        is_split: whether backward was measured, not assumed.
        gradient: bytes.
    """

    step: float
    backward: float
    is_split: bool
    batch: int
    gradient: int


class Line(NamedTuple):
    """Seconds of a step and of an epoch, and images a second over those of as many GPUs that need no reduction."""

    gpus: int
    step: float
    epoch: float
    efficiency: float


def gradient_bytes(pair: Pair) -> int:
    """Of the student and its translator, which is all that learns."""
    student = registry.build_model(pair.student, pair.channels, in_channels=3, classes=pair.classes, seed=0)
    factor_channels = max(1, round(pair.features(pair.teacher).channels * 0.5))
    translator = ftfast.Translator(pair.features(pair.student).channels, factor_channels)
    return BYTES * sum(parameter.numel() for network in (student, translator) for parameter in network.parameters())


def reduce_seconds(gpus: int, gradient: int) -> float:
    """The module's formula."""
    in_node, nodes = min(gpus, IN_NODE), -(-gpus // IN_NODE)
    rings = 2 * (in_node - 1) / in_node * gradient / NVLINK + 2 * (nodes - 1) / nodes * gradient / in_node / NETWORK
    return rings + 2 * (in_node - 1) * HOP_IN_NODE + 2 * (nodes - 1) * HOP_BETWEEN


def predict(gpus: int, parts: Parts, *, overlapped: bool) -> Line:
    """A step, and an epoch of ImageNet, with a batch of its own for every GPU."""
    waiting = reduce_seconds(gpus, parts.gradient) if gpus > 1 else 0.0
    step = parts.step + max(0.0, waiting - (parts.backward if overlapped else 0.0))
    return Line(gpus, step, COUNTS.train_images / (gpus * parts.batch) * step, parts.step / step)


def parts_of(step: Row, split: Row | None) -> Parts:
    """From a measured step's row and a row of ``preset_run``, whose split gives backward its share."""
    assert step.timing is not None
    seconds = step.timing.median * 1e-3
    split_ms = split.details.get("milliseconds", {}) if split is not None else {}
    computing = sum(value for name, value in split_ms.items() if name != "data")
    share = split_ms["backward"] / computing if split_ms.get("backward") else BACKWARD_SHARE
    return Parts(
        seconds, share * seconds, bool(split_ms.get("backward")), step.details["dims"][0], gradient_bytes(IMAGENET)
    )


def markdown(newest: dict[str, dict[str, Record]]) -> str:
    """The README's block, from the newest record of each bench on each device type, ``[bench][device]``."""
    steps = list(_steps(newest))
    if not steps:
        return f"Past these machines: {tables.NOT_MEASURED}; it takes the step's time from a GPU's record."
    found, step = steps[0]
    preset = newest.get(preset_run.STEM, {}).get("cuda")
    runs = [row for row in preset.of(preset_run.STEM) if row.timing] if preset is not None else []
    parts = parts_of(step, next(iter(runs), None))
    lines = [_measured(row) for row in runs if row.details.get("images_per_second")]
    for gpus in GPUS:
        for overlapped in (True, False) if gpus > 1 else (True,):
            how = (
                " from its step"
                if gpus == 1
                else ", reduced beside backward"
                if overlapped
                else ", reduced after backward"
            )
            lines.append(_predicted(predict(gpus, parts, overlapped=overlapped), how))
    head = ("GPUs", "", "step", "epoch", "efficiency")
    source = f"Parts measured on {tables.provenance(found)}."
    return "\n\n".join(
        [source, tables.markdown_table(head, lines, numbers_from=2), _assumptions(parts), *_feeding(newest, parts)]
    )


def _steps(newest: dict[str, dict[str, Record]]) -> Iterator[tuple[Record, Row]]:
    """Measured steps of ours with a teacher, and their records; two benches time the same one."""
    for bench, candidate in ((distill_step.STEM, distill_step.OURS), (store.STEM, store.LIVE)):
        if (record := newest.get(bench, {}).get("cuda")) is None:
            continue
        for row in record.of(bench):
            if row.candidate == candidate and row.timing and row.details.get("teacher") == IMAGENET.teacher:
                yield record, row


def _measured(row: Row) -> tuple[str, ...]:
    rate = row.details["images_per_second"]
    step = tables.number(1e3 * row.details["images"] / rate, " ms")
    return "1", f"{MEASURED}, {row.candidate} images", step, _minutes(COUNTS.train_images / rate), ""


def _predicted(line: Line, how: str) -> tuple[str, ...]:
    step, share = tables.number(1e3 * line.step, " ms"), f"{100 * line.efficiency:.0f} %"
    return f"{line.gpus}", f"{PREDICTED}{how}", step, _minutes(line.epoch), share


def _minutes(seconds: float) -> str:
    return tables.number(seconds, " s") if seconds < 120 else tables.number(seconds / 60, " min")


def _assumptions(parts: Parts) -> str:
    backward = "as its share was measured" if parts.is_split else f"assumed to be {BACKWARD_SHARE:.0%} of the step"
    return (
        f"Assumed: {parts.batch} images for every GPU, so that a batch grows with their number, to "
        f"{GPUS[-1] * parts.batch:,}, for which the recipe is not made; {COUNTS.train_images:,} images an epoch, "
        f"without its evaluation; {IN_NODE} GPUs in a node; a float32 gradient of {parts.gradient / 1e6:.1f} MB, "
        f"reduced by rings at {NVLINK / 1e9:.0f} GB/s within a node and {NETWORK / 1e9:.0f} GB/s for each GPU between "
        f"nodes, {HOP_IN_NODE * 1e6:.0f} and {HOP_BETWEEN * 1e6:.0f} µs a hop; backward {backward}; loaders that "
        "keep up; no GPU slower than another. What was not measured: more than one GPU."
    )


def _feeding(newest: dict[str, dict[str, Record]], parts: Parts) -> list[str]:
    """What a node of eight needs of its processors, by loader; of a machine without a GPU where none was measured."""
    found = newest.get(loaders.STEM, {})
    record = found.get("cuda") or found.get("cpu")
    if record is None:
        return [f"Loaders: {tables.NOT_MEASURED}."]
    needed = parts.batch / parts.step
    said = []
    for name, rates in loaders.rates(record.of(loaders.STEM)).items():
        if rates.of_core is not None:
            enough = "" if name != "gpu" else f", of which its own GPU decodes up to {rates.loader:,.0f} a second"
            said.append(f"{name} {tables.number(IN_NODE * needed / rates.of_core)} cores{enough}")
    cores = f"To feed {IN_NODE} GPUs with {IN_NODE * needed:,.0f} images/s ({PREDICTED}): {'; '.join(said)}"
    if "cuda" in found:
        return [f"{cores}."]
    return [f"{cores}, of {tables.provenance(record)}. Loaders beside a GPU: {tables.NOT_MEASURED}."]


def main(arguments: list[str]) -> int:
    """``python -m bench prediction``: prints the README's block."""
    parser = argparse.ArgumentParser(
        prog="python -m bench prediction", description="Predict epoch times of many GPUs from measured parts."
    )
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of records, default: bench/records")
    print(markdown(newest_alone(parser.parse_args(arguments).records)))
    return 0
