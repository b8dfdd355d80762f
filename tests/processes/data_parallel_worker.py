"""What one of several processes of a training does, for test_processes.py: trains, and leaves what it learned."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from ftfast import FactorTransfer, Paraphraser, Translator
from ftfast.distillation.data.in_memory import Split
from ftfast.distillation.models.registry import Outputs
from ftfast.distillation.runtime.processes import ALONE, Processes, joined
from ftfast.distillation.runtime.seeds import seeded
from ftfast.distillation.training.evaluate import evaluate
from ftfast.distillation.training.loop import Training
from ftfast.distillation.training.methods import Terms
from ftfast.distillation.training.schedule import Schedule
from ftfast.distillation.training.step.step import Precision

FLOAT32 = Precision(torch.device("cpu"), torch.float32)


class Student(nn.Module):
    """Without batch norms, whose statistics are of a process's own part."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.classifier = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Outputs:
        features = self.features(images)
        return Outputs(self.classifier(features.mean((2, 3))), features)


class Classifier(nn.Module):
    """The student's logits alone."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        return self.student(images).logits


def images(count: int) -> Split:
    generator = torch.Generator().manual_seed(3)
    return Split(torch.randn(count, 3, 6, 5, generator=generator), torch.arange(count) % 4).to(FLOAT32.device)


def train(
    accumulate: int, count: int, batch_size: int, processes: Processes = ALONE, *, replayed: bool = False
) -> dict[str, Tensor]:
    """Parameters, loss means and accuracy after two epochs of Factor Transfer, as tensors by name."""
    with seeded(4):
        student = Student()
        teacher = nn.Conv2d(3, 8, 3, padding=1).requires_grad_(False)
        head = FactorTransfer(Paraphraser(8, 0.5), Translator(6, 4), weight=20.0)
    trainable = nn.ModuleDict({"model": student, "translator": head.translator})

    def terms(batch: Tensor, labels: Tensor) -> Terms:
        found = student(batch)
        return {
            "labels": nn.functional.cross_entropy(found.logits, labels),
            "factors": head(found.features, teacher(batch)),
        }

    schedule = Schedule(2, batch_size, 0.05, 0.9, 1e-3, accumulate=accumulate, clip_gradient=1.0)
    split = images(count)
    training = Training(
        trainable,
        terms,
        split,
        schedule,
        FLOAT32,
        seed=5,
        processes=processes,
        evaluation=lambda stop: evaluate(Classifier(student), split, FLOAT32, processes, stop),
        replayed=replayed,
    )
    history = training.run()
    found = {name: tensor.detach().clone() for name, tensor in trainable.state_dict().items()}
    found["losses"] = torch.tensor([list(epoch.losses.values()) for epoch in history], dtype=torch.float64)
    found["accuracy"] = torch.tensor([epoch.accuracy or 0.0 for epoch in history], dtype=torch.float64)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, accumulate, count, batch_size = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    with joined("cpu") as processes:
        found = train(accumulate, count, batch_size, processes, replayed="replayed" in sys.argv)
        torch.save(found, folder / f"rank{processes.part.rank}.pt")
    # Threads of torch's that are still there when Python ends abort the process now and then.
    names = [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in names), names
