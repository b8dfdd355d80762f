"""The paraphrase rate: the same students over several rates k, with one teacher, paired by seed."""

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from ftfast.distillation.monitor.markdown import markdown_table
from ftfast.distillation.monitor.plots import drawn, new_figure
from ftfast.distillation.monitor.terminal import print_fitting
from ftfast.distillation.phases.report import terminal_table, with_error, write_report
from ftfast.distillation.phases.results import paired_gain
from ftfast.distillation.run import run
from ftfast.distillation.runtime import files
from ftfast.distillation.settings.run_settings import Settings
from ftfast.distillation.training.methods import METHODS
from ftfast.errors import SettingsError

FORMAT = "ftfast-rates"
VERSION = 1
_HEADINGS = ("rate", "channels", "explained", "method", "accuracy, %", "gain", "to first rate")


def settings_of_rates(settings: Settings, rates: Sequence[float], output: Path) -> dict[Path, Settings]:
    """The run of each rate by its folder: the first with every method, the others with those that have a paraphraser.

    Raises:
        SettingsError: fewer than two rates, one twice, or settings in which the rate changes nothing.
    """
    if len(set(rates)) < 2 or len(set(rates)) != len(rates):
        raise SettingsError(f"rates is {', '.join(f'{rate:g}' for rate in rates)}; give at least two, each once.")
    paraphrasing = tuple(method for method in settings.methods if METHODS[method].has_rate)
    if not paraphrasing:
        raise SettingsError(f"methods is {', '.join(settings.methods)}, and none has a paraphrase rate; add ft.")
    for name in ("store", "paraphraser_checkpoint"):
        if getattr(settings, name) is not None:
            raise SettingsError(f"{name} and rates are given, and it has one rate; leave one of them out.")
    folders = [output / f"rate-{rate:g}" for rate in rates]
    first = dataclasses.replace(settings, rate=rates[0])
    teacher = settings.teacher_checkpoint or (None if settings.pretrained else str(folders[0] / "teacher"))
    others = dataclasses.replace(settings, methods=paraphrasing, teacher_checkpoint=teacher)
    rest = {folder: dataclasses.replace(others, rate=rate) for folder, rate in zip(folders[1:], rates[1:], strict=True)}
    return {folders[0]: first, **rest}


def run_rates(settings: Settings, rates: Sequence[float], output: Path, **options: Any) -> dict[str, Any]:
    """A run for each rate in a folder below ``output``; returns the content of its rates.json.

    Args:
        options: of :func:`ftfast.distillation.run.run`.

    Raises:
        DistillError: in one sentence.
    """
    runs = settings_of_rates(settings, rates, output)
    return collect({folder: run(each, folder, **options) for folder, each in runs.items()})


def collect(runs: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """rates.json of each rate's results.json: accuracies, and gains by seed to ``none`` and to the first rate."""
    first = next(iter(runs.values()))
    baseline = _accuracies(first["methods"]["none"]) if "none" in first["methods"] else None
    rows = []
    for folder, results in runs.items():
        methods = {}
        for name in next(reversed(runs.values()))["methods"]:
            own, of_first = _accuracies(results["methods"][name]), _accuracies(first["methods"][name])
            methods[name] = {
                **{key: results["methods"][name][key] for key in ("weights", "mean", "standard_deviation")},
                "accuracies": own,
                "gain": None if baseline is None else paired_gain(own, baseline),
                "gain_to_first_rate": None if results is first else paired_gain(own, of_first),
            }
        diagnosis = results["paraphraser"]
        rows.append(
            {
                "rate": results["settings"]["rate"],
                "folder": folder.name,
                "factor_channels": results["factor_channels"],
                "explained_variance": diagnosis and diagnosis["explained_variance"],
                "spread": diagnosis and diagnosis["spread"],
                "seconds": results["seconds"],
                "memory": results["memory"],
                "methods": methods,
            }
        )
    none = None if baseline is None else {"mean": fmean(baseline), "accuracies": baseline}
    names = {name: first["settings"][name] for name in ("data", "teacher", "student", "seeds")}
    return {"format": FORMAT, "version": VERSION, **names, "none": none, "rates": rows}


def _accuracies(method: dict[str, Any]) -> list[float]:
    return [student["accuracy"] for student in method["students"]]


def write_rates(output: Path, rates: dict[str, Any]) -> None:
    """Writes rates.json, .csv, .md, .png and .svg, and each run's own report, below ``output``."""
    for row in rates["rates"]:
        write_report(output / row["folder"], json.loads((output / row["folder"] / "results.json").read_text()))
    files.write_json(output / "rates.json", rates)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_HEADINGS, *rate_rows(rates)])
    files.write_text(output / "rates.csv", text.getvalue())
    for kind in ("png", "svg"):
        files.write_bytes(output / f"rates.{kind}", _draw(rates, kind))
    lines = [
        f"# The paraphrase rate on {rates['data']}",
        "",
        f"{rates['student']} taught by one {rates['teacher']}, {rates['seeds']} seeds. Channels: of a factor. "
        "Explained: how much of the variance of held-out features the paraphraser explains. Gain: to `none` with the "
        "same seed, mean and standard error; to the first rate: the same to the student of the first rate.",
        "",
        *markdown_table(_HEADINGS, rate_rows(rates)),
        "",
        "![Accuracy and explained variance over the rate](rates.png)",
        "",
        "The run of each rate:",
        "",
        *(
            f"- [{row['rate']:g}]({row['folder']}/report.md): {row['seconds']:.0f} s, {row['memory']['host_mib']:,} MiB"
            for row in rates["rates"]
        ),
    ]
    files.write_text(output / "rates.md", "\n".join(lines) + "\n")


def rate_rows(rates: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table's cells, a row for each rate and method."""
    rows: list[tuple[str, ...]] = []
    for row in rates["rates"]:
        for name, method in row["methods"].items():
            explained = row["explained_variance"]
            rows.append(
                (
                    f"{row['rate']:g}",
                    str(row["factor_channels"]),
                    "" if explained is None else f"{explained:.3f}",
                    name,
                    with_error(method["mean"], method["standard_deviation"]),
                    *(
                        "" if gain is None else with_error(gain["mean"], gain["standard_error"], signed=True)
                        for gain in (method["gain"], method["gain_to_first_rate"])
                    ),
                )
            )
    return rows


def print_rates(rates: dict[str, Any], console: Console) -> None:
    """The table on a terminal."""
    title = f"{rates['student']} taught by {rates['teacher']} on {rates['data']}, {rates['seeds']} seeds"
    print_fitting(terminal_table(title, _HEADINGS, rate_rows(rates), left=(3,)), console)


def _draw(rates: dict[str, Any], kind: str) -> bytes:
    figure = new_figure(9, 4)
    accuracy, explained = figure.subplots(1, 2)
    places = [row["rate"] for row in rates["rates"]]
    for name in rates["rates"][0]["methods"]:
        methods = [row["methods"][name] for row in rates["rates"]]
        accuracy.errorbar(
            places,
            [method["mean"] for method in methods],
            [method["standard_deviation"] or 0 for method in methods],
            color=METHODS[name].colour,
            linestyle=METHODS[name].line,
            label=name,
            marker="o",
            capsize=3,
        )
    if rates["none"] is not None:
        accuracy.axhline(rates["none"]["mean"], color=METHODS["none"].colour, label="none")
    accuracy.set(ylabel="test accuracy, %", title="mean and standard deviation over seeds")
    accuracy.legend()
    explained.plot(places, [row["explained_variance"] for row in rates["rates"]], "o-", color="#0072B2")
    explained.set(ylabel="explained variance", title="the paraphraser's, of held-out features")
    for axes in (accuracy, explained):
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
        axes.set(xlabel="paraphrase rate k")
        axes.grid(alpha=0.3)
    return drawn(figure, kind)
