"""Faster R-CNN students with and without Factor Transfer, paired by seed.

Trains a teacher, its paraphraser, and for each seed two students that begin alike and see the same batches. What is
done is kept in the output folder and not done again: a run that was stopped goes on with the same command.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torchvision.models.detection import FasterRCNN

from examples.detection import models
from examples.detection.data import Data, read
from examples.detection.results import METHODS, Results, table
from examples.detection.training import Resized, frozen, loader, precision_of, train
from ftfast import FactorTransfer, FrozenTeacher, Paraphraser, Translator, diagnose_paraphraser, train_paraphraser

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9, weight_decay=1e-4),
    "adamw": partial(torch.optim.AdamW, weight_decay=1e-4),
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "scenes": {
        "teacher": "small-teacher",
        "student": "small-student",
        "teacher_steps": 400,
        "steps": 400,
        "batch_size": 8,
        "optimizer": "adamw",
        "learning_rate": 2e-3,
        "beta": 30.0,
    },
    "voc": {
        "teacher": "resnet101",
        "student": "vgg16",
        "teacher_steps": 35_000,
        "steps": 35_000,
        "batch_size": 2,
        "optimizer": "sgd",
        "learning_rate": 2e-3,
        "beta": 1000.0,
    },
    "coco": {
        "teacher": "resnet50-fpn",
        "student": "resnet18-fpn",
        "teacher_steps": 90_000,
        "steps": 90_000,
        "batch_size": 16,
        "optimizer": "sgd",
        "learning_rate": 2e-2,
        "beta": 1000.0,
    },
}
# What a run may be gone on with otherwise.
FREE = ("data_dir", "device", "output", "seeds", "workers")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m examples.detection", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--data", choices=DEFAULTS, default="scenes", help="VOC 2007, COCO 2017 or generated scenes (scenes)")
    add("--data-dir", type=Path, help="the folder with VOCdevkit, or with train2017, val2017 and annotations")
    add("--images", type=_positive, help="train with so many images and test with half as many (all; 400 scenes)")
    add("--teacher", choices=models.NAMES, metavar="MODEL", help=f"one of {', '.join(models.NAMES)}")
    add("--teacher-checkpoint", type=Path, metavar="FILE", help="its state_dict; without one it is trained")
    add("--student", choices=models.NAMES, metavar="MODEL", help="one whose last map has the size of the teacher's")
    add("--seeds", type=_positive, default=5, help="pairs of students (5)")
    add("--teacher-steps", type=_positive)
    add("--steps", type=_positive, help="of a student")
    add("--paraphraser-steps", type=_positive, default=300, help="(300)")
    add("--batch-size", type=_positive)
    add("--optimizer", choices=OPTIMIZERS)
    add("--learning-rate", type=_above_zero, help="which falls to 0 as a cosine")
    add(
        "--rate",
        type=_above_zero,
        default=0.5,
        help="k, how many channels a factor has for each of the teacher's (0.5)",
    )
    add("--beta", type=_above_zero, help="what Factor Transfer is multiplied by beside the detector's own losses")
    add("--from-scratch", action="store_true", help="take no weights for ImageNet")
    add("--workers", type=int, default=0, help="processes that read images (0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, default=Path("runs/detection"), help="(runs/detection)")
    parser.epilog = "Defaults by data: " + "; ".join(
        f"{data}: {', '.join(f'{name} {value}' for name, value in found.items())}" for data, found in DEFAULTS.items()
    )
    return parser


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no positive whole number")
    return int(word)


def _above_zero(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{word!r} is no positive number")
    return value


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(
        *columns, console=console, transient=True, speed_estimate_period=600, disable=not console.is_terminal
    )


class Comparison:
    """The run of a command: each part is read back where it is done, else made and kept."""

    def __init__(self, asked: argparse.Namespace, data: Data, results: Results, bars: Progress) -> None:
        self.asked, self.data, self.results, self.bars = asked, data, results, bars
        self.device = torch.device(asked.device)
        self.test = loader(data.test, asked.batch_size, asked.workers)
        students = [
            name for seed in range(asked.seeds) for method in METHODS if (name := _student(seed, method)) not in results
        ]
        steps = asked.teacher_steps * ("teacher" not in results) + asked.steps * len(students)
        self.all = bars.add_task("the run", total=steps)

    def _trained(self, title: str, model: FasterRCNN, seed: int, steps: int, *transfer: Any) -> dict[str, float]:
        asked = self.asked
        batches = loader(self.data.train, asked.batch_size, asked.workers, seed)
        optimizer = partial(OPTIMIZERS[asked.optimizer], lr=asked.learning_rate)
        bar = self.bars.add_task(title, total=steps)

        def advance(count: int) -> None:
            for task in (bar, self.all):
                self.bars.advance(task, count)

        torch.manual_seed(seed)  # of the boxes that are drawn
        losses = train(model, batches, steps, optimizer, self.device, advance, *transfer)
        self.bars.remove_task(bar)
        precision = precision_of(model, self.test, self.device)
        told = ", ".join(f"{name} {value:.4g}" for name, value in (precision | losses).items())
        self.bars.console.print(f"{title}: {told}", highlight=False)
        return precision | losses

    def _detector(self, name: str, seed: int) -> FasterRCNN:
        torch.manual_seed(seed)
        return models.detector(name, self.data.classes, pretrained=not self.asked.from_scratch).to(self.device)

    def teacher(self) -> FasterRCNN:
        """The teacher, which is trained, or was, or has a checkpoint."""
        asked, path = self.asked, self.asked.output / "teacher.pt"
        model = self._detector(asked.teacher, 0)
        if "teacher" in self.results or asked.teacher_checkpoint:
            model.load_state_dict(torch.load(asked.teacher_checkpoint or path, self.device, weights_only=True))
        if "teacher" not in self.results:
            if asked.teacher_checkpoint:
                found = precision_of(model, self.test, self.device)
            else:
                found = self._trained("teacher", model, 0, asked.teacher_steps)
                torch.save(model.state_dict(), path)
            self.results.keep("teacher", found)
        return model.eval()

    def paraphraser(self, teacher: FasterRCNN, source: FrozenTeacher) -> Paraphraser:
        """The paraphraser of the teacher's maps of images as its own transform makes them."""
        asked, path = self.asked, self.asked.output / "paraphraser.pt"
        if "paraphraser" in self.results:
            in_channels, factor_channels = self.results["paraphraser"]["channels"]
            made = Paraphraser(in_channels, factor_channels=factor_channels)
            made.load_state_dict(torch.load(path, self.device, weights_only=True))
            return made.to(self.device)
        torch.manual_seed(0)
        images = Resized(loader(self.data.train, asked.batch_size, asked.workers, 0), teacher.transform, self.device)
        made = train_paraphraser(
            source, images, rate=asked.rate, steps=asked.paraphraser_steps, progress=False, strict=False
        )
        unseen = next(iter(Resized(self.test, teacher.transform, self.device)))
        explained = diagnose_paraphraser(made, source(unseen).features).explained_variance
        torch.save(made.state_dict(), path)
        channels = [made.in_channels, made.factor_channels]
        self.results.keep("paraphraser", {"channels": channels, "explained_variance": explained})
        return made

    def student(self, seed: int, method: str, source: FrozenTeacher, paraphraser: Paraphraser) -> None:
        """One student, if it is not there yet."""
        name = _student(seed, method)
        if name in self.results:
            return
        model = self._detector(self.asked.student, seed)
        transfer: tuple[Any, ...] = ()
        if method == "ft":
            translator = Translator(models.last_shape(model)[0], paraphraser.factor_channels)
            transfer = (source, FactorTransfer(paraphraser, translator, weight=self.asked.beta).to(self.device))
        self.results.keep(name, self._trained(name, model, seed, self.asked.steps, *transfer))


def _check_models(asked: argparse.Namespace, classes: int) -> None:
    """Raises ValueError before anything is trained in vain."""
    teacher, student = (models.detector(name, classes, pretrained=False) for name in (asked.teacher, asked.student))
    if asked.teacher_checkpoint:
        try:
            teacher.load_state_dict(torch.load(asked.teacher_checkpoint, "cpu", weights_only=True))
        except Exception as error:  # what is in a file may be anything
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"--teacher-checkpoint {asked.teacher_checkpoint} is none of {asked.teacher}: {reason}"
            ) from None
    of_teacher, of_student = (tuple(models.last_shape(model)[1:]) for model in (teacher, student))
    if of_teacher != of_student:
        raise ValueError(
            f"--teacher {asked.teacher} makes a map of {of_teacher} of an image of which --student {asked.student} "
            f"makes {of_student}; take two that agree."
        )


def _student(seed: int, method: str) -> str:
    return f"student {seed} {method}"


def main(words: list[str] | None = None) -> None:
    """Runs what the command's words ask for."""
    parser = _parser()
    asked = parser.parse_args(words)
    for name, value in DEFAULTS[asked.data].items():
        if getattr(asked, name) is None:
            setattr(asked, name, value)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(asked).items()}
    try:
        data = read(asked.data, asked.data_dir, asked.images)
        torch.empty(0, device=asked.device)
        _check_models(asked, data.classes)
        results = Results(asked.output, {name: value for name, value in settings.items() if name not in FREE})
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    console = Console(stderr=True, soft_wrap=True)
    with _bars(console) as bars:
        run = Comparison(asked, data, results, bars)
        teacher = run.teacher()
        source = frozen(teacher)
        paraphraser = run.paraphraser(teacher, source)
        for seed in range(asked.seeds):
            for method in METHODS:
                run.student(seed, method, source, paraphraser)
    found = table(results, asked.seeds)
    (asked.output / "table.md").write_text(found + "\n")
    print(found)


if __name__ == "__main__":
    main()
