"""What a run leaves to read: curves and their table, report.md, and the table on the terminal."""

import csv
import io
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ftfast.distillation.monitor.markdown import markdown_table
from ftfast.distillation.monitor.plots import curve_rows, draw_curves
from ftfast.distillation.monitor.processor_time import NOTABLE_SHARE
from ftfast.distillation.monitor.terminal import print_fitting
from ftfast.distillation.runtime import files
from ftfast.distillation.training.methods import METHODS

HEADINGS = ("method", "weights", "accuracy, %", "gain", "seeds up", "images/s")


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """Writes curves.csv, curves.png, curves.svg and report.md into a run folder."""
    rows = curve_rows(results)
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(folder / "curves.csv", table.getvalue())
    styles = {name: (METHODS[name].colour, METHODS[name].line) for name in results["methods"]}
    for kind, content in draw_curves(results, rows, styles).items():
        files.write_bytes(folder / f"curves.{kind}", content)
    files.write_text(folder / "report.md", to_markdown(results))


def method_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """The final table's cells, one row a method, in the order of the headings."""
    rows: list[tuple[str, ...]] = []
    for name, method in results["methods"].items():
        weights = ", ".join(f"{key} {value:g}" for key, value in method["weights"].items())
        gain, rate = method["gain"], method["images_per_second"]
        accuracy = with_error(method["mean"], method["standard_deviation"])
        shown_gain, seeds_up = "", ""
        if gain is not None:
            shown_gain = with_error(gain["mean"], gain["standard_error"], signed=True)
            seeds_up = f"{gain['seeds_up']} of {gain['seeds']}"
        rows.append((name, weights, accuracy, shown_gain, seeds_up, "" if rate is None else f"{rate:,.0f}"))
    return rows


def with_error(value: float, error: float | None, *, signed: bool = False) -> str:
    """A figure and, where there is one, its deviation or error."""
    return (f"{value:+.2f}" if signed else f"{value:.2f}") + ("" if error is None else f" ± {error:.2f}")


def print_table(results: dict[str, Any], console: Console) -> None:
    """The final table on a terminal or into a file."""
    settings = results["settings"]
    title = (
        f"{settings['student']} taught by {settings['teacher']} ({results['teacher']['accuracy']:.2f} %) on "
        f"{settings['data']}, {settings['seeds']} seed{'s' * (settings['seeds'] > 1)}"
    )
    print_fitting(terminal_table(title, HEADINGS, method_rows(results), left=(0, 1)), console)
    if note := left_out_rates(results):
        console.print(note, highlight=False)


def left_out_rates(results: dict[str, Any]) -> str:
    """Why images a second are left out of the table, or nothing."""
    students = [student for method in results["methods"].values() for student in method["students"]]
    disturbed = [share for student in students if (share := student.get("others_share") or 0.0) > NOTABLE_SHARE]
    if not disturbed:
        return ""
    return (
        f"Images/s: without {len(disturbed)} of {len(students)} students, since other processes took up to "
        f"{max(disturbed):.0%} of the processors' time meanwhile."
    )


def terminal_table(
    title: str, headings: tuple[str, ...], rows: list[tuple[str, ...]], left: tuple[int, ...] = ()
) -> Table:
    """A table for a terminal; columns in ``left`` hold words, the others figures."""
    table = Table(title=title, box=SIMPLE, pad_edge=False, collapse_padding=True, title_justify="left")
    for position, heading in enumerate(headings):
        table.add_column(heading, justify="left" if position in left else "right", no_wrap=position not in left)
    for row in rows:
        table.add_row(*row)
    return table


def to_markdown(results: dict[str, Any]) -> str:
    """report.md; its pictures lie beside it."""
    settings, data, teacher = results["settings"], results["data"], results["teacher"]
    damaged = ""
    if count := data.get("damaged_images", 0):
        damaged = f" In an epoch up to {count} of them could not be decoded, and others stood in."
    methods = [
        f"- `{name}`: {method['title']}" + f" ({method['source']})" * bool(method["source"])
        for name, method in results["methods"].items()
    ]
    lines = [
        f"# Distillation on {settings['data']}",
        "",
        f"Data: {data['title']}. The teacher ({settings['teacher']}, {settings['teacher_channels']} channels in its "
        f"first stage, {teacher['parameters']:,} parameters) learns from {data['teacher_images']} images and reaches "
        f"**{teacher['accuracy']:.2f} %** of the {data['test_images']} test images. The students "
        f"({settings['student']}, {settings['student_channels']} channels) learn from {data['student_images']} of "
        f"its images.{damaged}",
        "",
        *([f"The frozen teacher: {how}.", ""] if (how := teacher.get("frozen")) else []),
        *markdown_table(HEADINGS, method_rows(results), words=2),
        "",
        "Accuracy: of the test images, mean and standard deviation over seeds, at the last epoch. Gain: mean "
        "difference to `none` with the same seed, which gives the same first weights and the same batches, and its "
        "standard error.",
        "",
        "![Test accuracy over epochs and at the end](curves.png)",
        "",
        "The same numbers: [curves.csv](curves.csv); as vectors: [curves.svg](curves.svg).",
        "",
        *methods,
        "",
        *_paraphraser_section(results["paraphraser"]),
        *_controls_section(results.get("controls", {})),
        *_weights_section(results),
        "## What it ran on",
        "",
        *markdown_table(
            ("", ""),
            [
                (key, str(value))
                for group in ("hardware", "memory", "software")
                for key, value in results.get(group, {}).items()
            ],
        ),
        "",
        f"Arithmetic in {settings['dtype']}; {results['seconds']:.0f} s for the call that finished the run. "
        "Images/s: in training, first epochs left out and evaluation excluded.",
        *(["", note] if (note := left_out_rates(results)) else []),
        "",
        "All settings: [settings.json](settings.json). All numbers: [results.json](results.json).",
    ]
    return "\n".join(lines) + "\n"


def _paraphraser_section(diagnosis: dict[str, Any] | None) -> list[str]:
    if diagnosis is None:
        return []
    text = (
        f"On {diagnosis['held_out_images']} training images kept from it, it explains "
        f"{diagnosis['explained_variance']:.3f} of the variance of the teacher's features (1 is all), and its factors "
        f"spread {diagnosis['spread']:.2f} times as far as random ones."
    )
    warning = ["", f"**Warning:** {diagnosis['warning']}"] if diagnosis["warning"] else []
    return ["## Paraphraser", "", text, *warning, ""]


def _controls_section(controls: dict[str, Any]) -> list[str]:
    if not controls:
        return []
    rows: list[tuple[str, ...]] = [
        (name, f"{diagnosis['explained_variance']:.3f}", f"{diagnosis['spread']:.2f}")
        for name, diagnosis in controls.items()
    ]
    return [
        "## Controls",
        "",
        "What stands in the paraphraser's place, judged on the same images.",
        "",
        *markdown_table(("control", "explained variance", "spread"), rows),
        "",
    ]


def _weights_section(results: dict[str, Any]) -> list[str]:
    rows: list[tuple[str, ...]] = []
    for name, method in results["methods"].items():
        for trial in method["trials"]:
            chosen = trial["weights"] == method["weights"]
            values = ", ".join(f"{key} {value:g}" for key, value in trial["weights"].items())
            accuracy = "diverged" if trial["accuracy"] is None else f"{trial['accuracy']:.2f}"
            loss = "" if trial["loss"] is None else f"{trial['loss']:.4f}"
            rows.append((name, values, accuracy, loss, "chosen" if chosen else ""))
    if not rows:
        return []
    headings = ("method", "weights", "validation accuracy, %", "validation cross-entropy", "")
    text = (
        f"Each of {results['settings']['validation_folds']} parts of the students' training images is kept apart in "
        "turn to judge weights on; test images have no say."
    )
    return ["## Weights", "", text, "", *markdown_table(headings, rows), ""]
