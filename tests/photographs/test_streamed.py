"""Photographs are drawn alike by every loader, process and resumption; damaged files and lost readers end in words."""

import errno
import io
import multiprocessing.reduction
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ftfast.distillation.data.images import Images
from ftfast.distillation.data.photographs import crops, decoding, listing, readers, streamed
from ftfast.distillation.data.photographs.decoding import IMAGENET
from ftfast.distillation.data.photographs.streamed import Streamed
from ftfast.distillation.data.stored_views import viewed
from ftfast.distillation.runtime.processes import WHOLE, Part
from ftfast.distillation.settings.presets import settings_of
from ftfast.errors import DataError, SettingsError
from tests.photographs.photograph_folder import add, make_folder, make_shards
from tests.processes.launching import ROOT, python

CPU = torch.device("cpu")
CLASSES, TRAIN, TEST, SIDE = 5, 60, 20, 24


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same photographs as files and as shards."""
    home = tmp_path_factory.mktemp("photographs")
    make_folder(home / "folder", classes=CLASSES, train=TRAIN, val=TEST)
    make_shards(home / "folder", home / "webdataset", images_per_shard=25)
    return home


def load(folder: Path, loader: str = "folder", workers: int = 0, **changes: object) -> tuple[Images, Images]:
    counts = listing.describe(folder, loader)
    wanted = {"train_images": counts.train_images, "test_images": counts.test_images, "rand_augment": 0}
    chosen = {"image_size": SIDE, "workers": workers, "classes": counts.classes, **wanted, **changes}
    return streamed.load(folder, loader, CPU, **chosen)  # type: ignore[arg-type]


def streamed_of(folder: Path, loader: str = "folder", **changes: object) -> Streamed:
    train, _ = load(folder, loader, **changes)
    assert isinstance(train, Streamed)
    return train


def drawn(images: Images, *, epoch: int = 0, first_step: int = 0, part: Part = WHOLE) -> tuple[Tensor, Tensor]:
    batches = list(images.draw(8, seed=3, epoch=epoch, first_step=first_step, part=part))
    return torch.cat([batch[0] for batch in batches]), torch.cat([batch[1] for batch in batches])


@pytest.mark.parametrize("rand_augment", [0, 9])
def test_workers_and_epochs_before_change_no_pixel(home: Path, rand_augment: int) -> None:
    alone = streamed_of(home / "folder", rand_augment=rand_augment)
    helped = streamed_of(home / "folder", workers=2, rand_augment=rand_augment)
    try:
        for epoch in (0, 1):
            for ours, theirs in zip(drawn(alone, epoch=epoch), drawn(helped, epoch=epoch), strict=True):
                assert torch.equal(ours, theirs)
        assert not torch.equal(drawn(alone, epoch=0)[0], drawn(alone, epoch=1)[0])
    finally:
        helped.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_where_it_was_left(home: Path, workers: int) -> None:
    images = streamed_of(home / "folder", workers=workers)
    whole, labels = drawn(images)
    begun = images.draw(8, seed=3, epoch=0)
    next(begun)  # left in mid-epoch, with batches read ahead
    rest, rest_labels = drawn(images, first_step=5)
    images.close()
    assert torch.equal(whole[-len(rest) :], rest)
    assert torch.equal(labels[-len(rest) :], rest_labels)


@pytest.mark.parametrize("loader", ["folder", "webdataset"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_share_every_batch_between_them(home: Path, loader: str, ranks: int) -> None:
    images = streamed_of(home / loader, loader)
    wholes = list(images.draw(8, seed=3, epoch=2))
    parts = [list(images.draw(8, seed=3, epoch=2, part=Part(rank, ranks))) for rank in range(ranks)]
    for step, (pixels, labels) in enumerate(wholes):
        assert torch.equal(torch.cat([part[step][0] for part in parts]), pixels)
        assert torch.equal(torch.cat([part[step][1] for part in parts]), labels)


@pytest.mark.parametrize("loader", ["folder", "webdataset"])
def test_an_epoch_has_every_photograph_once_in_an_order_of_its_own(
    home: Path, monkeypatch: pytest.MonkeyPatch, loader: str
) -> None:
    read: list[str] = []
    of_reader = readers.Reader.__getitem__

    def noted(self: readers.Reader, key: readers.Key) -> object:
        assert not isinstance(key, int)
        read.append(self.files.name(key[2]))
        return of_reader(self, key)

    monkeypatch.setattr(readers.Reader, "__getitem__", noted)
    images = streamed_of(home / loader, loader)
    orders = []
    for epoch in (0, 1):
        read.clear()
        drawn(images, epoch=epoch)
        orders.append(list(read))
    assert sorted(orders[0]) == sorted(orders[1])
    assert len(set(orders[0])) == TRAIN
    assert orders[0] != orders[1]


def boxes_of(images: Streamed, monkeypatch: pytest.MonkeyPatch, epochs: int) -> np.ndarray:
    """``[N, 4]`` log of the cut's share of the area and of its ratio, the place of its middle's x, whether mirrored."""
    found: list[tuple[float, ...]] = []
    draw = crops.draw_box

    def noted(height: int, width: int, seed: int) -> crops.Box:
        box = draw(height, width, seed)
        share = box.height * box.width / (height * width)
        middle = (box.left + box.width / 2) / width
        found.append((np.log(share), np.log(box.width / box.height), middle, float(box.flip)))
        return box

    monkeypatch.setattr(crops, "draw_box", noted)
    for epoch in range(epochs):
        drawn(images, epoch=epoch)
    monkeypatch.undo()
    return np.array(found)


def on_device(images: Streamed) -> Streamed:
    """Decoded and cut in batches, as on a GPU."""
    return replace(images, reading=replace(images.reading, on_device=True), _loaders={})


def test_every_loader_draws_from_the_same_distributions(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes by two-sample Kolmogorov-Smirnov against torchvision's transform, pixels by channel means and variances."""
    from scipy.stats import ks_2samp

    loaders: dict[str, Streamed] = {
        "folder": streamed_of(home / "folder"),
        "webdataset": streamed_of(home / "webdataset", "webdataset"),
        "gpu": on_device(streamed_of(home / "folder")),
    }
    epochs = 8
    boxes = {name: boxes_of(images, monkeypatch, epochs) for name, images in loaders.items()}
    expected = torchvisions_boxes(home / "folder", epochs)
    for name, found in boxes.items():
        assert len(found) == epochs * TRAIN
        for column in range(3):
            assert ks_2samp(found[:, column], expected[:, column]).pvalue > 1e-3, (name, column)
        assert abs(found[:, 3].mean() - 0.5) < 4 * 0.5 / np.sqrt(len(found))
    pixels = {name: torch.cat([drawn(images, epoch=e)[0] for e in range(epochs)]) for name, images in loaders.items()}
    reference = pixels["folder"]
    spread = reference.mean((2, 3)).std(0) / np.sqrt(len(reference))  # of a channel's mean over the draws
    for name, found in pixels.items():
        assert (found.mean((0, 2, 3)) - reference.mean((0, 2, 3))).abs().lt(6 * spread).all(), name
        ratio = found.var((0, 2, 3)) / reference.var((0, 2, 3))
        assert (ratio - 1).abs().lt(0.1).all(), name


def torchvisions_boxes(folder: Path, epochs: int) -> np.ndarray:
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    found = []
    for path in epochs * sorted(folder.glob("train/*/*")):
        with Image.open(path) as picture:
            width, height = picture.size
            _, left, cut_height, cut_width = RandomResizedCrop.get_params(picture, [0.08, 1.0], [3 / 4, 4 / 3])
        share = cut_height * cut_width / (height * width)
        found.append((np.log(share), np.log(cut_width / cut_height), (left + cut_width / 2) / width))
    return np.array(found)


def test_a_batch_decoded_at_once_has_the_boxes_and_pixels_of_one_by_one(home: Path) -> None:
    alone = streamed_of(home / "folder")
    batched = on_device(alone)
    for ours, theirs in zip(drawn(alone), drawn(batched), strict=True):
        assert torch.equal(ours, theirs)


def test_photographs_are_tested_as_torchvision_does(home: Path) -> None:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    expected = ImageFolder(
        str(home / "folder" / "val"),
        v2.Compose(
            [
                v2.ToImage(),
                v2.Resize(round(SIDE / 0.875), antialias=True),
                v2.CenterCrop(SIDE),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(*IMAGENET),
            ]
        ),
    )
    _, test = load(home / "folder")
    pixels, labels = (torch.cat(found) for found in zip(*test.in_order(7), strict=True))
    assert labels.tolist() == expected.targets
    for ours, (theirs, _) in zip(pixels, expected, strict=True):
        assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())


def test_synthetic_photographs_have_the_counts_that_were_asked_for() -> None:
    train, test = streamed.load(
        None, "synthetic", CPU, image_size=8, workers=0, rand_augment=0, classes=7, train_images=50, test_images=9
    )
    pixels, labels = drawn(train)
    assert (len(pixels), len(test), pixels.shape[1:]) == (50, 9, (3, 8, 8))
    assert labels.bincount(minlength=7).min() > 0
    assert sum(len(batch) for batch, _ in test.in_order(4, Part(1, 2))) == 4


def other_files(home: Path, path: Path, kind: str, count: int) -> Path:
    """A copy in which the first ``count`` training files are damaged."""
    shutil.copytree(home / "folder", path)
    for file in sorted(path.glob("train/*/*"))[:count]:
        if kind == "cut":
            file.write_bytes(file.read_bytes()[:300])
        else:
            file.write_text("no picture")
    return path


@pytest.mark.parametrize("kind", ["cut", "text"])
@pytest.mark.parametrize("way", ["one by one", "at once"])
def test_damaged_photographs_are_counted_and_replaced(home: Path, tmp_path: Path, kind: str, way: str) -> None:
    said: list[str] = []
    images = streamed_of(other_files(home, tmp_path / "folder", kind, 7), report=said.append)
    images = images if way == "one by one" else on_device(images)
    pixels, labels = drawn(images)
    assert len(pixels) == len(labels) == TRAIN
    assert len(said) == streamed.SHOWN_DAMAGED
    assert all(line.endswith(".jpeg cannot be decoded; the next one is taken in its place") for line in said)
    assert images.damaged() == 7
    images.check_damage_limit(images.damaged())
    assert said[-1] == "warning: 7 of 60 photographs cannot be decoded; others stand in"


def test_each_damaged_photograph_is_counted_once_whatever_the_readers_and_processes(home: Path, tmp_path: Path) -> None:
    folder = other_files(home, tmp_path / "folder", "cut", 7)  # one after the other, so that some stand in for others
    for file in sorted(folder.glob("train/*/*"))[1:7:2]:
        file.write_text("no picture")
    for workers, ranks, at_once in ((2, 1, False), (0, 3, False), (2, 3, False), (1, 3, True)):
        images = streamed_of(folder, workers=workers)
        images = on_device(images) if at_once else images
        counts = []
        for rank in range(ranks):
            drawn(images, part=Part(rank, ranks))
            counts.append(images.damaged())
        images.close()
        assert sum(counts) == 7, (workers, ranks, at_once)


def test_a_process_bears_no_more_than_its_share(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "FEWEST_DAMAGED", 1)
    monkeypatch.setattr(streamed, "DAMAGED_SHARE", 0.2)
    images = streamed_of(other_files(home, tmp_path / "folder", "cut", 12))
    drawn(images)  # 12 of 60
    refused = []
    for rank in range(4):
        try:
            drawn(images, part=Part(rank, 4))
        except DataError as error:
            refused.append(str(error))
    assert refused
    assert all(re.match(r"4 of 15 photographs cannot be decoded, more than 20%; the last is", it) for it in refused)
    with pytest.raises(DataError, match=r"^13 of 60 photographs cannot be decoded, more than 20%: check the files"):
        images.check_damage_limit(13)


def test_too_many_damaged_photographs_end_the_run(home: Path, tmp_path: Path) -> None:
    images = streamed_of(other_files(home, tmp_path / "folder", "text", 11))
    with pytest.raises(DataError, match=r"11 of 60 photographs cannot be decoded, more than 1%.*\.jpeg: check"):
        drawn(images)


def test_one_damaged_photograph_after_the_other_is_a_sentence_from_a_reader_too(home: Path, tmp_path: Path) -> None:
    images = streamed_of(other_files(home, tmp_path / "folder", "text", TRAIN), workers=1)
    with pytest.raises(
        DataError, match=r"^\d+ photographs one after the other cannot be decoded, the first /\S+ \(.+\)\.$"
    ):
        drawn(images)
    begin = time.monotonic()
    images.close()
    assert time.monotonic() - begin < 9  # torch waits ten seconds for a reader that nobody told to end


def test_other_kinds_of_pictures_are_read_in_three_channels(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "folder"
    shutil.copytree(home / "folder", path)
    first, second, third = sorted(path.glob("train/*/*"))[:3]
    Image.new("L", (90, 80), 100).save(first)
    Image.new("CMYK", (90, 80), (10, 20, 30, 0)).save(second)
    content = io.BytesIO()
    Image.new("RGBA", (90, 80), (10, 20, 30, 255)).save(content, "PNG")
    third.write_bytes(content.getvalue())  # a PNG under a JPEG's name
    said: list[str] = []
    images = streamed_of(path, report=said.append)
    assert drawn(images)[0].shape == drawn(on_device(images))[0].shape == (TRAIN, 3, SIDE, SIDE)
    assert said == []


def test_a_reader_that_is_killed_is_a_sentence(home: Path) -> None:
    """In a process of its own: torch raises wherever the process then is."""
    code = f"""
import os, signal
from tests.photographs.test_streamed import DataError, Path, readers, streamed_of
try:
    with readers.translate_reader_errors():
        images = streamed_of(Path({str(home / "folder")!r}), workers=2)
        batches = images.draw(2, seed=0, epoch=0)
        next(batches)
        os.kill(images._loaders["draw"][0]._iterator._workers[0].pid, signal.SIGKILL)
        list(batches)
except DataError as error:
    print(error)
"""
    done = python("-c", code)
    assert done.stdout.startswith("a reading process is gone"), done.stderr
    assert done.stdout.endswith("go on with --resume and fewer --workers.\n")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("workers", "at_once"), [(0, False), (1, False), (1, True)])
@pytest.mark.parametrize("kind", [RuntimeError, OSError, KeyError])
def test_what_a_reader_raises_reaches_the_user_as_itself_with_the_file(
    home: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], workers: int, at_once: bool
) -> None:
    def fail(*_: object) -> crops.Box:
        raise kind("no such box")

    monkeypatch.setattr(crops, "draw_box", fail)
    images = streamed_of(home / "folder", workers=workers)
    with pytest.raises(kind) as raised:
        drawn(on_device(images) if at_once else images)
    images.close()
    said = "".join(traceback.format_exception(raised.value))
    assert "no such box" in said
    assert re.search(r"This was at /\S+\.jpeg\.", said)
    assert "a reading process is gone" not in said


def test_words_of_torch_on_lost_readers_are_told_from_readers_own() -> None:
    for words, expected in (
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible", "^the shared memory in which"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "^a reading process is gone, as where"),
        ("Caught RuntimeError in DataLoader worker process 0.\nOriginal", "^Caught RuntimeError"),
    ):
        with pytest.raises((DataError, RuntimeError), match=expected), readers.translate_reader_errors():
            raise RuntimeError(words)


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fails where a wait has no end."""

    def fail(*_: object) -> None:
        raise TimeoutError(f"still waiting after {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_full_shared_memory_is_a_sentence(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_7>: No space left on device (28)")

    new, share = torch.UntypedStorage._new_shared, "_share_fd_cpu_"
    monkeypatch.setattr(torch.UntypedStorage, share, fail)  # too late for a sentence
    monkeypatch.setattr(
        torch.UntypedStorage, "_new_shared", lambda size, **given: fail() if size > 9000 else new(size, **given)
    )
    images = streamed_of(home / "folder", workers=1)
    expected = r"^the shared memory in which .* is full.*, where a batch takes 0\.0 MB; enlarge it \(docker run"
    with within(30), pytest.raises(DataError, match=expected):
        drawn(images)
    images.close()


def test_a_batch_that_cannot_be_handed_over_is_not_waited_for(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(multiprocessing.reduction, "DupFd", fail)
    images = streamed_of(home / "folder", workers=1)
    with (
        within(60),
        pytest.raises(DataError, match=r"^a batch cannot be handed over .*Too many open files.*; allow more open"),
    ):
        drawn(images)
    images.close()


@pytest.mark.slow
def test_a_container_with_little_shared_memory_is_told_so(home: Path) -> None:
    """64 MB, Docker's default, for batches of 37 MB."""
    code = f"""
from tests.photographs.test_streamed import DataError, Path, streamed_of
try:
    list(streamed_of(Path({str(home / "folder")!r}), workers=2, image_size=640).draw(48, seed=0, epoch=0))
except DataError as error:
    print(error)
"""
    mounted = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "-"]
    if shutil.which("unshare") is None or subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("mounting a small /dev/shm takes root")
    done = subprocess.run([*mounted, sys.executable, "-c", code], cwd=ROOT, timeout=200, capture_output=True, text=True)
    assert done.stdout.startswith(
        "the shared memory in which reading processes hand over batches is full (/dev/shm has"
    )
    assert "where a batch takes 36.9 MB" in done.stdout


def test_names_that_are_not_utf_8_are_read_and_told(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(home / "folder", folder)
    for part in ("train", "val"):
        (folder / part / "class01").rename(folder / part / os.fsdecode(b"\xff\x1b[31m"))
    files = sorted(folder.glob("train/*/*"))
    for number, file in enumerate(files[::7]):
        file.rename(file.with_name(os.fsdecode(b"\xfe%d.jpeg" % number)))
    damaged = next(folder.glob(os.fsdecode(b"train/class02/\xfe*")))
    damaged.write_text("no picture")
    expected, _ = drawn(streamed_of(home / "folder"))
    for workers in (0, 1):
        said: list[str] = []
        images = streamed_of(folder, workers=workers, report=said.append)
        pixels, _ = drawn(images)
        images.close()
        assert pixels.shape == expected.shape
        assert len(said) == 1
        assert re.match(r"warning: /\S+caf\\udce9/train/class02/\\udcfe\d\.jpeg cannot be decoded", said[0])
        assert said[0].isprintable()
    damaged.unlink()
    assert set(viewed(streamed_of(folder), folder).hashes()) == {"transform", "decoder", "data"}
    shutil.rmtree(folder / "val" / os.fsdecode(b"\xff\x1b[31m"))
    with pytest.raises(DataError) as raised:
        listing.describe(tmp_path / os.fsdecode(b"caf\xe9") / ".", "gpu")
    assert str(raised.value).isprintable()


@pytest.mark.process
def test_readers_that_were_left_behind_do_not_keep_a_process_from_ending(home: Path) -> None:
    code = f"""
from tests.photographs.test_streamed import Path, streamed_of
batches = streamed_of(Path({str(home / "folder")!r}), workers=2).draw(2, seed=0, epoch=0)
next(batches)
raise SystemExit(7)
"""
    assert python("-c", code).returncode == 7


def test_folders_that_are_not_as_they_should_be_are_named(home: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train is not there; photographs are taken from --data-dir"):
        listing.describe(tmp_path, "folder")
    with pytest.raises(DataError, match=r"has no train-\*\.tar"):
        listing.describe(tmp_path, "webdataset")
    (tmp_path / "empty" / "train" / "class").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no photographs"):
        listing.describe(tmp_path / "empty", "folder")
    shutil.copytree(home / "folder", tmp_path / "fewer")
    shutil.rmtree(tmp_path / "fewer" / "val" / "class01")
    with pytest.raises(DataError, match="has 5 classes in train and 4 in val"):
        listing.describe(tmp_path / "fewer", "folder")
    with pytest.raises(DataError, match="has 60 photographs in train, fewer than the 61 asked for"):
        load(home / "folder", train_images=61)


def test_a_loader_that_needs_a_gpu_is_refused_without_one(home: Path) -> None:
    with pytest.raises(SettingsError, match="loader is 'gpu', and the device is no GPU; take --loader folder"):
        load(home / "folder", "gpu")


@pytest.mark.parametrize("loader", ["gpu", "synthetic"])
def test_augmentation_that_a_loader_does_not_have_is_refused(loader: str) -> None:
    with pytest.raises(SettingsError, match=f"rand_augment is 9, and --loader {loader} has no RandAugment"):
        streamed.load(
            None, loader, CPU, image_size=8, workers=0, rand_augment=9, classes=7, train_images=50, test_images=9
        )
    with pytest.raises(SettingsError, match=f"rand_augment is 9, and --loader {loader} has no RandAugment"):
        settings_of("images", loader=loader, rand_augment=9)


def test_the_only_photograph_of_a_class_is_in_the_larger_part(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "folder"
    shutil.copytree(home / "folder", path)
    for file in sorted((path / "train" / "class02").iterdir())[1:]:
        file.unlink()
    images = streamed_of(path)
    for count in (8, 40):
        chosen, rest = images.stratified(count)
        assert len(chosen) == count
        assert sorted([*chosen.rows, *rest.rows]) == images.rows.tolist()
        larger, smaller = (rest, chosen) if count == 8 else (chosen, rest)
        labels = [part.photographs.labels[part.rows].tolist() for part in (larger, smaller)]
        assert labels[0].count(2) == 1
        assert set(labels[1]) == {0, 1, 3, 4}
    with pytest.raises(SettingsError, match="3 of 49 images cannot hold every class on both sides of the cut"):
        load(path, train_images=3)


class Code:
    """Unpickling one runs code."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch code_ran",)


def one_shard(folder: Path, *members: tuple[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "train-0.tar", "w") as shard:
        for name, content in members:
            add(shard, name, content)
    return folder


def jpeg() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 10, 10)).save(content, "JPEG")
    return content.getvalue()


def test_other_members_of_a_shard_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = pickle.dumps(Code())
    folder = one_shard(
        tmp_path / "shards",
        *(("a.jpg", jpeg()), ("a.json", b'{"label": 1, "wnid": "n01"}'), ("a.pyd", code), ("a.pickle", code)),
        *(("b.PNG", jpeg()), ("b.cls", b" 0\n"), ("b.pth", code), ("b.jpg.txt", b"words")),
    )
    found = listing.list_photographs(folder, "webdataset", "train")
    assert found.labels.tolist() == [1, 0]
    assert found.files.read(0) == found.files.read(1) == jpeg()
    assert not (tmp_path / "code_ran").exists()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ((("a.jpg", b"x"),), "has a without a label"),
        ((("a.jpg", b"x"), ("a.cls", b"cat")), "label of a that is no whole number"),
        ((("a.jpg", b"x"), ("a.json", b'{"label": true}')), "label of a that is no whole number"),
        ((("a.jpg", b"x"), ("a.json", b'{"class": 1}')), "has a without a label"),
        ((("a.jpg", b"x"), ("a.cls", b"-1")), "label of a that is no whole number"),
        ((("a.cls", b"1"),), "has no photographs"),
        ((("a.jpg", b"x"), ("a.png", b"x"), ("a.cls", b"1")), "has two photographs of a; leave one"),
    ],
)
def test_shards_with_bad_labels_are_named(tmp_path: Path, members: tuple[tuple[str, bytes], ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        listing.list_photographs(one_shard(tmp_path / "shards", *members), "webdataset", "train")


@pytest.mark.parametrize("kept", [0, 100, 700, -11000])
def test_a_cut_shard_is_named(tmp_path: Path, kept: int) -> None:
    folder = one_shard(tmp_path / "shards", ("a.cls", b"1"), ("a.jpg", 40 * jpeg()))
    path = folder / "train-0.tar"
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    with pytest.raises(DataError, match=r"train-0\.tar is cut short|has no photographs"):
        listing.list_photographs(folder, "webdataset", "train")
    path.write_bytes(b"no tar file" * 200)
    listing.list_photographs.cache_clear()
    with pytest.raises(DataError, match="no tar file"):
        listing.list_photographs(folder, "webdataset", "train")


def test_encoded_photographs_know_their_size() -> None:
    encoded = decoding.Encoded.of(jpeg(), "a")
    assert (encoded.height, encoded.width, encoded.is_jpeg) == (30, 40, True)
    with pytest.raises(ValueError, match="identified"):
        decoding.Encoded.of(b"words", "b")
