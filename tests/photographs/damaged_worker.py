"""What one of several processes does with damaged photographs, for test_damaged.py: trains, and says what for."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftfast.distillation.data.photographs import listing, streamed
from ftfast.distillation.runtime.processes import Processes, joined
from ftfast.distillation.training.evaluate import evaluate
from ftfast.distillation.training.loop import Training
from ftfast.distillation.training.methods import Terms
from ftfast.distillation.training.schedule import Schedule
from ftfast.distillation.training.step.step import Precision
from ftfast.errors import DistillError

FLOAT32 = Precision(torch.device("cpu"), torch.float32)
SIDE = 16


def train(folder: Path, workers: int, processes: Processes) -> dict[str, Any]:
    """The damaged photographs of each epoch, and what was said."""
    said: list[str] = []
    counts = listing.describe(folder, "folder")
    images, tested = streamed.load(
        *(folder, "folder", FLOAT32.device),
        **counts._asdict(),
        image_size=SIDE,
        workers=workers,
        rand_augment=0,
        report=said.append,
    )
    model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(48, counts.classes))
    trainable = nn.ModuleDict({"model": model})

    def terms(batch: Tensor, labels: Tensor) -> Terms:
        return {"labels": nn.functional.cross_entropy(model(batch), labels)}

    training = Training(
        trainable,
        terms,
        images,
        Schedule(2, 10, 0.05, 0.9, 0.0),
        FLOAT32,
        seed=5,
        processes=processes,
        evaluation=lambda stop: evaluate(model, tested, FLOAT32, processes, stop),
    )
    try:
        history = training.run()
    except DistillError as error:
        return {"refused": str(error)}
    finally:
        images.close()
    return {"damaged": [epoch.damaged for epoch in history], "said": said}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, output, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    with joined("cpu") as processes:
        (output / f"rank{processes.part.rank}.json").write_text(json.dumps(train(folder, workers, processes)))
