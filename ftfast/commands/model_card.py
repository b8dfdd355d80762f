"""A student or teacher on the Hub: its files by ``ftfast export``, and the card that says what it is."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from ftfast.commands.trained import Trained
from ftfast.distillation.data.photographs.decoding import of_photographs
from ftfast.distillation.monitor.markdown import markdown_table
from ftfast.distillation.phases import results as records
from ftfast.distillation.phases.report import HEADINGS, method_rows
from ftfast.distillation.training.methods import METHODS

_LEVELS = 3  # a student lies in RUN/students/METHOD/seedN


def model_card(trained: Trained, folder: Path, repository: str, files: list[str]) -> str:
    """README.md with metadata: what the model is, the table of the run it comes from, how it is loaded.

    Args:
        folder: its checkpoint's, in which run folder is found out.
        files: the names of those beside the card.
    """
    described, run = trained.description, _run_of(folder)
    dataset, method = trained.dataset, described.get("method")
    accuracy = described.get("accuracy")
    lines = [*_metadata(trained, repository, accuracy), "", f"# {trained.title[0].upper()}{trained.title[1:]}", ""]
    taught = f", trained by `{method}` ({METHODS[method].title})" if method in METHODS else ""
    reached = "" if accuracy is None else f" It reaches **{accuracy:.2f} %** of the {dataset.test_images} test images."
    lines += [f"A classifier of {dataset.classes} classes{taught} on {dataset.title}.{reached}", ""]
    if run is not None:
        lines += _table(run)
    lines += ["## How to load it", "", *_loading(trained, repository, files), ""]
    return "\n".join(lines)


def _metadata(trained: Trained, repository: str, accuracy: float | None) -> list[str]:
    """Its YAML, in which JSON is YAML too."""
    content: dict[str, Any] = {
        "library_name": "ftfast",
        "pipeline_tag": "image-classification",
        "tags": ["pytorch", "knowledge-distillation", "factor-transfer", trained.description["model"]["name"]],
    }
    if accuracy is not None:
        dataset = {"name": trained.dataset.title, "type": trained.description["data"]}
        metric = {"type": "accuracy", "name": "test accuracy, %", "value": round(accuracy, 2)}
        result = {"task": {"type": "image-classification"}, "dataset": dataset, "metrics": [metric]}
        content |= {"metrics": ["accuracy"]}
        content |= {"model-index": [{"name": repository.partition("/")[2], "results": [result]}]}
    return ["---", *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in content.items()), "---"]


def _table(run: dict[str, Any]) -> list[str]:
    settings, teacher = run["settings"], run["teacher"]
    return [
        "## The run that it comes from",
        "",
        f"{settings['student']} taught by {settings['teacher']} ({teacher['accuracy']:.2f} %), "
        f"{settings['seeds']} seed{'s' * (settings['seeds'] > 1)} of each method, all with the same budget:",
        "",
        *markdown_table(HEADINGS, method_rows(run)),
        "",
        "Accuracy: of the test images at the last epoch, mean and standard deviation over seeds. Gain: mean difference "
        "to `none`, the student without a teacher, with the same seed, and its standard error. Images/s: in training.",
        "",
    ]


def _loading(trained: Trained, repository: str, files: list[str]) -> list[str]:
    channels, height, width = trained.dataset.image_shape
    data = trained.description["data"]
    normalised = f"normalised as `ftfast distill --data {data}` has them"
    if "photographs" in trained.description:
        mean, deviation = of_photographs(trained.description["photographs"])
        normalised = f"RGB from 0 to 1 less the mean {list(mean)}, over the deviation {list(deviation)}"
    lines = [f"Images are `[N, {channels}, {height}, {width}]` in float32, {normalised}.", ""]
    if "model.pt2" in files:
        lines += [
            "```python",
            "import torch",
            "from huggingface_hub import hf_hub_download",
            "",
            f'model = torch.export.load(hf_hub_download("{repository}", "model.pt2")).module()',
            f"logits = model(torch.zeros(1, {channels}, {height}, {width}))",
            "```",
            "",
        ]
    if "model.onnx" in files:
        lines += ["`model.onnx` is the same for other runtimes, from `images` to `logits`.", ""]
    return [
        *lines,
        "As a teacher of the next one:",
        "",
        "```sh",
        f"ftfast distill --data {data} --teacher hf://{repository}",
        "```",
    ]


def _run_of(folder: Path) -> dict[str, Any] | None:
    """results.json of the run that a checkpoint folder lies in; None where it lies in none that is finished."""
    for above in folder.absolute().parents[:_LEVELS]:
        with suppress(OSError, ValueError):
            found = json.loads((above / "results.json").read_text())
            if isinstance(found, dict) and (found.get("format"), found.get("version")) == (
                records.FORMAT,
                records.VERSION,
            ):
                return found
    return None
