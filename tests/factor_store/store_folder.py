"""A small run whose teacher and paraphraser stores are built from, and what tests ask of a store's folder."""

import hashlib
from pathlib import Path

from ftfast.distillation.run import run
from ftfast.distillation.settings.run_settings import Settings
from ftfast.distillation.store.build import Request, build_store

SMALL = Settings(
    methods=("ft",),
    seeds=1,
    crop_padding=1,
    flip=True,
    teacher="resnet8",
    teacher_channels=4,
    teacher_epochs=5,
    student_channels=2,
    student_epochs=1,
    student_images=60,
    paraphraser_steps=200,
    beta=(60.0,),
    alpha=(0.5,),
    device="cpu",
    dtype="bfloat16",
    threads=1,
)
REQUEST = Request(views=3, logits=True, batch_size=50, shard_images=100)


def make_run(folder: Path) -> Path:
    """1000 digits, a ResNet-8 and its paraphraser."""
    run(SMALL, folder)
    return folder


def make_store(run_folder: Path, path: Path, request: Request = REQUEST, **options: object) -> Path:
    """Ten shards of a hundred images in three views."""
    build_store(run_folder, path, request, device="cpu", **options)  # type: ignore[arg-type]
    return path


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file, by name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
