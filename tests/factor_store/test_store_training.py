"""Training from a store is training with its teacher on the same views, in one process and many, stopped or not."""

import dataclasses
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ftfast.cli import main
from ftfast.distillation.data.in_memory import Split
from ftfast.distillation.data.stored_views import viewed
from ftfast.distillation.phases.setup import load_images, precision_of
from ftfast.distillation.phases.trainable import TeacherSide, student_training
from ftfast.distillation.run import run
from ftfast.distillation.runtime.processes import WHOLE, Part
from ftfast.distillation.runtime.signals import Stopped
from ftfast.distillation.settings.presets import settings_of
from ftfast.distillation.settings.run_settings import Settings
from ftfast.distillation.store import header as headers
from ftfast.distillation.store.build import Request
from ftfast.distillation.store.read import PARAPHRASER, Store
from ftfast.distillation.store.shard_files import DTYPES, as_factors, quantise
from ftfast.distillation.store.stored_images import StoredImages
from ftfast.distillation.store.teacher_side import (
    NoTeacher,
    check,
    factors_of,
    filled_paraphraser,
    frozen_teacher_side,
    read_run,
    stored_images,
)
from ftfast.distillation.training.loop import Training
from ftfast.distillation.training.terms import Weights
from ftfast.errors import SettingsError, StoreError
from tests.factor_store.store_folder import REQUEST, SMALL, contents, make_run, make_store
from tests.processes.launching import finished, results_of, torchrun

CPU = torch.device("cpu")
STUDENTS: dict[str, Any] = {
    "seeds": 1,
    "student_channels": 2,
    "student_epochs": 4,
    "student_images": 90,
    "beta": (60.0,),
    "alpha": (0.5,),
    "device": "cpu",
    "dtype": "bfloat16",
    "threads": 1,
}
WORDS = [
    *("--seeds", "1", "--student-channels", "2", "--student-epochs", "2", "--student-images", "60"),
    *("--beta", "60", "--alpha", "0.5", "--device", "cpu", "--dtype", "float32"),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def stores(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each dtype."""
    home = tmp_path_factory.mktemp("stores")
    return {dtype: make_store(run_folder, home / dtype, dataclasses.replace(REQUEST, dtype=dtype)) for dtype in DTYPES}


def settings_for(store: Path, **given: Any) -> Settings:
    return settings_of(**headers.with_store({"store": str(store), **STUDENTS, **given})).resolved()


def images_of(settings: Settings) -> StoredImages:
    train, _ = load_images(settings)
    return stored_images(settings, train).stratified(settings.student_images)[0]


def teacher_side_of(settings: Settings) -> TeacherSide:
    assert settings.store is not None
    return TeacherSide(
        NoTeacher(), filled_paraphraser(settings, Store(Path(settings.store)).checkpoint_of(PARAPHRASER))
    )


def training_of(settings: Settings, images: Any, teacher_side: TeacherSide, method: str = "ft") -> Training:
    weights = {"ft": Weights(beta=60.0), "ft+kd": Weights(beta=60.0, alpha=0.5), "kd": Weights(alpha=0.5)}[method]
    return student_training(
        settings, precision_of(settings), teacher_side, images, method=method, weights=weights, seed=5
    )


def learned(training: Training) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in training.trainable.state_dict().items()}


def drawn(images: Any, **options: Any) -> list[tuple[Tensor, ...]]:
    return list(images.draw(32, seed=3, **{"epoch": 1, **options}))


def same(ours: list[tuple[Tensor, ...]], theirs: list[tuple[Tensor, ...]]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a.float(), b.float())
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip(one, other, strict=True)
    )


class Computed:
    """The images of a store with factors and logits that a teacher computes in the step, as the store rounds them."""

    def __init__(self, images: StoredImages, teacher_side: TeacherSide, settings: Settings) -> None:
        self._images, self._teacher_side, self._precision = images, teacher_side, precision_of(settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._images, name)

    def draw(self, *args: Any, **options: Any) -> Iterator[tuple[Tensor, ...]]:
        for batch in self._images.draw(*args, **options):
            factors, logits = factors_of(self._teacher_side, self._precision, batch[0])
            dtype = DTYPES[self._images.store.header.dtype]
            yield *batch[:2], as_factors(quantise(factors, dtype)), logits.to(torch.float16)

    def damaged(self) -> int:
        return self._images.damaged()

    def check_damage_limit(self, count: int) -> None:
        self._images.check_damage_limit(count)


class Live(Computed):
    """The images of a store alone, for a teacher in the step."""

    def draw(self, *args: Any, **options: Any) -> Iterator[tuple[Tensor, ...]]:
        for batch in self._images.draw(*args, **options):
            yield batch[:2]


def live_teacher_side(run_folder: Path, settings: Settings) -> TeacherSide:
    train, _ = load_images(settings)
    header = headers.read(Path(str(settings.store)))
    return frozen_teacher_side(settings, header, train, *read_run(run_folder))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_step_gets_what_the_teacher_would_give(run_folder: Path, stores: dict[str, Path], dtype: str) -> None:
    settings = settings_for(stores[dtype], methods=("ft+kd",))
    images = images_of(settings)
    from_store = training_of(settings, images, teacher_side_of(settings), "ft+kd")
    from_store.run()
    computed = Computed(images, live_teacher_side(run_folder, settings), settings)
    with_teacher = training_of(settings, computed, teacher_side_of(settings), "ft+kd")
    with_teacher.run()
    ours, theirs = learned(from_store), learned(with_teacher)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 2e-3), ("int8", 1e-2), ("float8_e4m3fn", 3e-2)])
def test_losses_are_those_of_a_live_teacher(
    run_folder: Path, stores: dict[str, Path], dtype: str, error: float
) -> None:
    settings = settings_for(stores[dtype], student_epochs=1)
    images, live = images_of(settings), live_teacher_side(run_folder, settings)
    losses = [
        training_of(settings, batches, teacher_side).run()[0].losses
        for batches, teacher_side in ((images, teacher_side_of(settings)), (Live(images, live, settings), live))
    ]
    assert losses[0]["factors"] == pytest.approx(losses[1]["factors"], rel=error)
    assert losses[0]["factors"] != losses[1]["factors"] or dtype == "bfloat16"


def test_order_and_images_are_those_without_a_store(stores: dict[str, Path]) -> None:
    """Where there is one view alone and nothing is augmented."""
    settings = settings_for(stores["int8"])
    train, _ = load_images(settings)
    assert isinstance(train, Split)
    stored = images_of(settings)
    plain = train.stratified(settings.student_images)[0]
    for ours, theirs in zip(drawn(stored), drawn(plain), strict=True):
        assert torch.equal(ours[1], theirs[1])
    for ours, theirs in zip(stored.in_order(40), plain.in_order(40), strict=True):
        assert torch.equal(ours[0], theirs[0])


def test_as_many_epochs_as_views_see_each_view_once(stores: dict[str, Path]) -> None:
    images = images_of(settings_for(stores["int8"]))
    rows = np.arange(200)
    epochs = np.stack([images._views(rows, 7, epoch) for epoch in range(3)])
    assert (np.sort(epochs, 0) == np.arange(3)[:, None]).all()
    assert all(np.bincount(views, minlength=3).min() > 40 for views in epochs)  # not all begin alike
    assert not (images._views(rows, 8, 0) == epochs[0]).all()


def test_processes_share_every_batch_and_an_epoch_goes_on(stores: dict[str, Path]) -> None:
    images = images_of(settings_for(stores["int8"]))
    whole = drawn(images)
    assert same(drawn(images, first_step=2), whole[2:])
    parts = [drawn(images, part=Part(rank, 3)) for rank in range(3)]
    joined = [tuple(torch.cat(pieces) for pieces in zip(*step, strict=True)) for step in zip(*parts, strict=True)]
    assert same(joined, whole)
    assert not same(drawn(images, epoch=2), whole)
    assert drawn(images, part=WHOLE)[0][2].dtype == torch.int8


def test_a_training_that_is_stopped_in_mid_epoch_ends_in_the_same_bits(stores: dict[str, Path]) -> None:
    settings = settings_for(stores["int8"], methods=("ft+kd",))
    images, teacher_side = images_of(settings), teacher_side_of(settings)
    whole = training_of(settings, images, teacher_side, "ft+kd")
    whole.run()
    begun = training_of(settings, images, teacher_side, "ft+kd")
    with pytest.raises(Stopped):
        begun.run(stop=lambda: begun.total_steps_done() == 5)  # of the second epoch's three, two
    assert begun.steps_done() == 2
    assert not [thread for thread in threading.enumerate() if thread.name == "factor reader"]
    resumed = training_of(settings, images_of(settings), teacher_side, "ft+kd")
    resumed.load_state(begun.state())
    resumed.run()
    ours, theirs = learned(whole), learned(resumed)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [epoch.losses for epoch in resumed.history] == [epoch.losses for epoch in whole.history]


def test_a_shard_that_goes_away_in_training_ends_it_in_words(stores: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(stores["int8"], tmp_path / "store")
    settings = settings_for(tmp_path / "store")
    images = images_of(settings)
    training = training_of(settings, images, teacher_side_of(settings))
    for path in (tmp_path / "store").glob("shard-*"):
        path.write_bytes(b"")
    with pytest.raises(StoreError, match="was cut short while it was read"):
        training.run()
    assert not [thread for thread in threading.enumerate() if thread.name == "factor reader"]


def test_a_run_from_a_store_has_what_a_run_has(stores: dict[str, Path], tmp_path: Path) -> None:
    """The teacher's phases aside: weights are chosen on parts of the training images, and the folder serves others."""
    settings = settings_for(stores["int8"], methods=("none", "ft", "kd"), beta=(30.0, 60.0), validation_folds=2)
    results = run(settings, tmp_path / "run")
    assert len(results["methods"]["ft"]["trials"]) == 2
    assert len(results["methods"]["kd"]["trials"]) == 0
    assert results["teacher"]["accuracy"] == Store(stores["int8"]).checkpoint_of("teacher").description["accuracy"]
    assert results["paraphraser"]["explained_variance"] > 0
    assert main(["evaluate", str(tmp_path / "run" / "students" / "ft" / "seed0")]) == 0
    assert main(["evaluate", str(tmp_path / "run" / "teacher")]) == 0
    again = make_store(tmp_path / "run", tmp_path / "again")  # from the copies of teacher and paraphraser
    assert contents(again) == contents(stores["int8"])


def test_a_run_is_resumed_with_its_store(stores: dict[str, Path], tmp_path: Path) -> None:
    words = ["distill", "--store", str(stores["int8"]), *WORDS, "--output", str(tmp_path / "run")]
    assert main([*words, "--methods", "ft"]) == 0
    before = results_of(tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    assert main([*words, "--methods", "ft", "--resume"]) == 0
    after = results_of(tmp_path / "run")
    assert after["methods"]["ft"]["students"][0]["accuracy"] == before["methods"]["ft"]["students"][0]["accuracy"]


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_both_engines_train_from_a_store(stores: dict[str, Path], tmp_path: Path, engine: str) -> None:
    words = ["distill", "--store", str(stores["float8_e4m3fn"]), *WORDS, "--methods", "ft+kd", "--engine", engine]
    assert main([*words, "--output", str(tmp_path / "run"), "--label-smoothing", "0.1", "--accumulate", "2"]) == 0


@pytest.mark.slow
def test_two_processes_train_from_a_store(stores: dict[str, Path], tmp_path: Path) -> None:
    words = ["-m", "ftfast", "distill", "--store", str(stores["int8"]), *WORDS, "--methods", "ft"]
    status, _, errors = finished(torchrun(2, *words, "--output", str(tmp_path / "two")))
    assert status == 0, errors
    assert main([*words[2:], "--output", str(tmp_path / "one")]) == 0
    one, two = (results_of(tmp_path / name)["methods"]["ft"]["students"][0]["history"][0] for name in ("one", "two"))
    # Batch norms are of a process's own part, so the losses are near and not the same.
    assert one["losses"]["factors"] == pytest.approx(two["losses"]["factors"], rel=0.05)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mixup", "0.2"], "mixup is 0.2, and store is given"),
        (["--cutmix", "1"], "cutmix is 1.0, and store is given"),
        (["--cutout", "3"], "cutout is 3, and store is given"),
        (["--methods", "at"], "methods has at, which compares the teacher's feature maps"),
        (["--methods", "ft,fitnet"], "methods has fitnet, which compares the teacher's feature maps"),
        (["--crop-padding", "2"], "crop_padding is 2, and the store"),
        (["--no-flip"], "flip is False, and the store"),
        (["--teacher", "resnet20"], "teacher is 'resnet20', and the store"),
        (["--teacher-channels", "8"], "teacher_channels is 8, and the store"),
        (["--teacher-layer", "stage2", "--student-layer", "stage2"], "teacher_layer is 'stage2', and the store"),
        (["--rate", "0.25"], "rate is 0.25, and the store"),
        (["--shortcut", "projection"], "shortcut is 'projection', and the store"),
        (["--student", "resnet20", "--student-layer", "stage2", "--resize-features"], "resize_features is True, and"),
    ],
)
def test_what_does_not_go_with_a_store_is_refused(
    stores: dict[str, Path], tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["distill", "--store", str(stores["int8"]), *WORDS, "--methods", "ft", *words]
    assert main([*given, "--output", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_soft_labels_take_a_store_with_logits(run_folder: Path, tmp_path: Path) -> None:
    store = make_store(run_folder, tmp_path / "store", Request(views=2))
    with pytest.raises(StoreError, match=r"has no logits; leave kd out, or build it with --logits"):
        check(settings_for(store, methods=("ft+kd",)))
    check(settings_for(store, methods=("ft",)))


@pytest.mark.parametrize("name", headers.HASHES)
def test_a_store_of_something_else_is_refused_and_named(stores: dict[str, Path], tmp_path: Path, name: str) -> None:
    shutil.copytree(stores["int8"], tmp_path / "store")
    header = json.loads((tmp_path / "store" / headers.FILE).read_text())
    header["hashes"][name] = "0" * 64
    (tmp_path / "store" / headers.FILE).write_text(json.dumps(header))
    with pytest.raises(StoreError, match=f"^{name} differs from what the store"):
        check(settings_for(tmp_path / "store"))


def test_other_images_are_refused(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from ftfast.distillation.data import datasets

    settings, read = settings_for(stores["int8"]), datasets.read_digits

    def other() -> tuple[Tensor, Tensor]:
        pixels, labels = read()
        pixels[:, 0, 3, 3] += 1
        return pixels, labels

    monkeypatch.setattr(datasets, "read_digits", other)
    with pytest.raises(StoreError, match=r"^(data|transform) differs"):
        check(settings)


def test_another_teacher_checkpoint_is_refused(stores: dict[str, Path], run_folder: Path, tmp_path: Path) -> None:
    check(settings_for(stores["int8"], teacher_checkpoint=str(run_folder / "teacher")))
    run(dataclasses.replace(SMALL, seed=1, methods=("none",)), tmp_path / "other")
    with pytest.raises(StoreError, match=r"^teacher differs"):
        check(settings_for(stores["int8"], teacher_checkpoint=str(tmp_path / "other" / "teacher")))


def test_settings_take_what_is_open_from_the_store(stores: dict[str, Path]) -> None:
    found = settings_for(stores["int8"])
    assert (found.teacher, found.teacher_channels, found.crop_padding, found.flip) == ("resnet8", 4, 1, True)
    with pytest.raises(SettingsError, match="mixup"):
        settings_for(stores["int8"], mixup=0.1)
    with pytest.raises(StoreError, match="is no factor store"):
        headers.with_store({"store": "/nowhere"})


def test_views_of_images_that_are_not_augmented(run_folder: Path) -> None:
    train, _ = load_images(dataclasses.replace(SMALL, crop_padding=0, flip=False).resolved())
    images = viewed(train, None)
    pixels, _, boxes = next(images.draw([np.arange(5)], 1, 0))
    assert torch.equal(pixels, next(train.in_order(5))[0])
    assert boxes[:, 0].tolist() == [[0, 0, 8, 8, 0]] * 5
    with pytest.raises(StoreError, match="an image has 1; give --views 1"):
        next(images.draw([np.arange(5)], 2, 0))
