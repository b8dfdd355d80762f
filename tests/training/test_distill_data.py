"""Data sets read from their files, damaged ones refused; augmentation against torchvision image by image."""

import gzip
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast.distillation.data import datasets, in_memory, published, source
from ftfast.distillation.data.augment import Augmentation, Draws
from ftfast.distillation.data.in_memory import Split
from ftfast.distillation.data.source import Source
from ftfast.distillation.runtime.processes import Part
from ftfast.distillation.settings.run_settings import Settings
from ftfast.errors import DataError, SettingsError
from tests.training.cifar_files import write_cifar

torchvision = pytest.importorskip("torchvision")
CPU = torch.device("cpu")


def pictures(count: int, shape: tuple[int, int, int] = (3, 12, 10), seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
    normalisation = in_memory.Normalisation.of(255, (0.4,) * shape[0], (0.2,) * shape[0])
    return Split(pixels, torch.arange(count), normalisation).to(CPU)


# --- augmentation


@pytest.mark.parametrize("augmentation", [Augmentation(4, True), Augmentation(0, True), Augmentation(3, False)])
def test_crops_and_flips_are_torchvisions_image_by_image(augmentation: Augmentation) -> None:
    from torchvision.transforms import functional

    split = pictures(40)
    height, width = split.pixels.shape[2:]
    draws = augmentation.draw(24, (height, width), torch.Generator().manual_seed(1), CPU)
    rows = torch.randperm(40)[:24]
    found = augmentation.crop(split.pixels, rows, draws)
    for row, image, (top, left), flip in zip(rows, found, draws.offsets.tolist(), draws.flips, strict=True):
        padded = functional.pad(split.pixels[row], [augmentation.crop_padding] * 4)
        expected = functional.crop(padded, top, left, height, width)
        assert torch.equal(image, functional.hflip(expected) if flip else expected)
    assert found.dtype == torch.uint8
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_every_image_has_a_draw_of_its_own_from_the_whole_range() -> None:
    """4,500 draws from 81 places: each within five standard deviations of its 55.6."""
    draws = Augmentation(4, True, 3).draw(4500, (12, 10), torch.Generator().manual_seed(0), CPU)
    places = torch.bincount(draws.offsets[:, 0] * 9 + draws.offsets[:, 1], minlength=81)
    assert len(places) == 81
    assert (places - 4500 / 81).abs().max() < 5 * (4500 / 81) ** 0.5
    assert abs(draws.flips.float().mean() - 0.5) < 5 * 0.5 / 4500**0.5
    assert [int(draws.centres[:, axis].unique().numel()) for axis in (0, 1)] == [12, 10]
    together = torch.stack((draws.offsets[:, 0], draws.offsets[:, 1], draws.flips, draws.centres[:, 0])).double()
    assert (torch.corrcoef(together) - torch.eye(4)).abs().max() < 5 / 4500**0.5


def test_a_cutout_blanks_one_square_around_its_centre() -> None:
    images = torch.rand(3, 2, 8, 9) + 1
    centres = torch.tensor([[4, 4], [0, 0], [7, 8]])
    draws = Draws(torch.zeros(3, 2).long(), torch.zeros(3).bool(), centres)
    found = Augmentation(cutout=4).blank(images, draws)
    for image, before, (y, x) in zip(found, images, centres.tolist(), strict=True):
        expected = before.clone()
        expected[:, max(0, y - 2) : y + 2, max(0, x - 2) : x + 2] = 0
        assert torch.equal(image, expected)


# --- drawing batches


def drawn(split: Split, **changes: Any) -> list[tuple[Tensor, Tensor]]:
    return list(split.draw(16, **{"seed": 3, "epoch": 1, **changes}))


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(2, True, 3)])
def test_seed_and_epoch_alone_decide_what_is_drawn(augmentation: Augmentation) -> None:
    split = replace(pictures(50), augmentation=augmentation)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = drawn(split)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    for (images, labels), (again, same) in zip(first, drawn(split), strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, same)
    for changes in ({"seed": 4}, {"epoch": 2}):
        assert not torch.equal(drawn(split, **changes)[0][1], first[0][1])
    assert torch.cat([labels for _, labels in first]).sort().values.equal(split.labels)


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(2, True, 3)])
def test_an_epoch_goes_on_from_any_step_bit_for_bit(augmentation: Augmentation) -> None:
    split = replace(pictures(50), augmentation=augmentation)
    whole = drawn(split)
    for step in range(len(whole) + 1):
        rest = drawn(split, first_step=step)
        assert len(rest) == len(whole) - step
        for (images, labels), (expected, same) in zip(rest, whole[step:], strict=True):
            assert torch.equal(images, expected)
            assert torch.equal(labels, same)


def test_two_epochs_augment_an_image_in_two_ways() -> None:
    split = replace(pictures(64), augmentation=Augmentation(4, True))
    epochs = []
    for epoch in (0, 1):
        batches = drawn(split, epoch=epoch)
        order = torch.cat([labels for _, labels in batches]).argsort()
        epochs.append(torch.cat([images for images, _ in batches])[order])
    unlike = (epochs[0] != epochs[1]).flatten(1).any(1)
    assert unlike.float().mean() > 0.9


def test_no_two_batches_of_an_epoch_share_their_draws() -> None:
    """Seen on one picture, again and again."""
    one = pictures(1)
    split = Split(one.pixels.expand(64, -1, -1, -1), torch.arange(64), one.normalisation, Augmentation(4, True)).to(CPU)
    first, second, *_ = (images for images, _ in drawn(split))
    assert (first != second).flatten(1).any(1).float().mean() > 0.9


def test_pixels_are_normalised_by_channel_and_channels_last() -> None:
    split = pictures(20)
    normalisation = in_memory.Normalisation.of(255, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    split = replace(split, normalisation=normalisation)
    mean, deviation = (
        torch.tensor(values, dtype=torch.float64)[:, None, None] for values in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    )
    expected = (split.pixels.double() / 255 - mean) / deviation
    torch.testing.assert_close(split.images.double(), expected, rtol=1e-5, atol=1e-9)
    in_order = torch.cat([images for images, _ in split.in_order(7)])
    assert torch.equal(in_order, split.images)
    assert drawn(split)[0][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(2, True, 3)])
@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_share_the_batches_of_one(augmentation: Augmentation, ranks: int) -> None:
    split = replace(pictures(50), augmentation=augmentation)
    shares = [drawn(split, part=Part(rank, ranks), first_step=1) for rank in range(ranks)]
    for place, (images, labels) in enumerate(drawn(split, first_step=1)):
        assert torch.equal(torch.cat([share[place][0] for share in shares]), images)
        assert torch.equal(torch.cat([share[place][1] for share in shares]), labels)
    tested = [list(split.in_order(7, Part(rank, ranks))) for rank in range(ranks)]
    assert torch.equal(torch.cat([labels for share in tested for _, labels in share]), split.labels)


def test_images_that_are_normalised_already_stay_as_they_are() -> None:
    images = torch.randn(5, 1, 4, 4)
    assert torch.equal(Split(images, torch.arange(5)).images, images)


def test_evaluation_images_are_never_augmented() -> None:
    split = pictures(30)
    augmented = replace(split, augmentation=Augmentation(4, True, 4))
    assert torch.equal(augmented.images, split.images)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(augmented.in_order(8), split.in_order(8), strict=True))


# --- files


def idx(values: np.ndarray) -> bytes:
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.tobytes()


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A folder as Debian's package has it, 60 and 20 images; ``spoil`` changes a packed file's bytes."""
    generator = np.random.default_rng(0)
    packed = tmp_path / "packed"
    packed.mkdir()
    for part, count in (("train", 60), ("t10k", 20)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (packed / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (packed / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    monkeypatch.setattr(published, "DEBIAN_FASHION_MNIST", packed)
    small = replace(datasets.DATASETS["fashion-mnist"], train_images=60, test_images=20)
    monkeypatch.setitem(datasets.DATASETS, "fashion-mnist", small)
    return packed


def test_debians_fashion_mnist_is_read_where_it_is(fashion: Path, tmp_path: Path) -> None:
    train, test = datasets.load("fashion-mnist", CPU, Source(tmp_path / "data"))
    content = gzip.decompress((fashion / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    assert torch.equal(train.pixels.flatten(), torch.frombuffer(bytearray(content), dtype=torch.uint8))
    assert train.pixels.shape == (60, 1, 28, 28)
    assert (train.labels == torch.arange(60) % 10).all()
    assert train.labels.dtype == torch.int64
    assert len(test) == 20
    assert not (tmp_path / "data").exists()


def unpacked(fashion: Path, folder: Path) -> Path:
    """As torchvision has it."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in fashion.iterdir():
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    return raw


def test_torchvisions_fashion_mnist_goes_before_the_package(fashion: Path, tmp_path: Path) -> None:
    of_package = datasets.load("fashion-mnist", CPU, Source(tmp_path))[0]
    unpacked(fashion, tmp_path)
    for path in fashion.iterdir():
        path.write_bytes(b"no longer looked at")
    train, _ = datasets.load("fashion-mnist", CPU, Source(tmp_path))
    assert torch.equal(train.pixels, of_package.pixels)
    assert torch.equal(train.labels, of_package.labels)


@pytest.mark.parametrize("kept", [0, 20, -100])
def test_a_damaged_package_is_refused(fashion: Path, tmp_path: Path, kept: int) -> None:
    path = fashion / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match="is damaged; install the package dataset-fashion-mnist again"):
        datasets.load("fashion-mnist", CPU, Source(tmp_path / "data"))


@pytest.mark.parametrize("kept", [0, 3, 20, 10_000])
def test_a_half_unpacked_fashion_mnist_is_refused_with_what_to_remove(fashion: Path, tmp_path: Path, kept: int) -> None:
    cut = unpacked(fashion, tmp_path) / "train-images-idx3-ubyte"
    cut.write_bytes(cut.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"fashion-mnist is incomplete or damaged; remove .*FashionMNIST/raw and run"):
        datasets.load("fashion-mnist", CPU, Source(tmp_path))


def test_other_numbers_of_images_are_refused(fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        datasets.DATASETS, "fashion-mnist", replace(datasets.DATASETS["fashion-mnist"], train_images=61)
    )
    with pytest.raises(DataError, match="has 60 training and 20 test images, not 61 and 20"):
        datasets.load("fashion-mnist", CPU, Source(tmp_path / "data"))


def test_without_files_no_network_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "DEBIAN_FASHION_MNIST", tmp_path / "none")
    for name, part in (("fashion-mnist", "FashionMNIST/raw"), ("cifar10", "cifar-10-batches-py")):
        for attempt in (lambda name, source: datasets.load(name, CPU, source), datasets.check_files):
            with pytest.raises(DataError, match=rf"{name} is not in .*; give --download .*or --data-dir .*{part}"):
                attempt(name, Source(tmp_path / "data"))
        datasets.check_files(name, Source(tmp_path / "data", download=True))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar100"])
def test_no_network_is_one_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.error import URLError

    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(published, "DEBIAN_FASHION_MNIST", tmp_path / "none")
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", unreachable)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
    with pytest.raises(DataError, match=rf"^{name} cannot be downloaded .*bring .* from another machine\.$"):
        datasets.load(name, CPU, Source(tmp_path / "data", download=True))


@pytest.mark.parametrize(("name", "kind", "files"), [("cifar10", "CIFAR10", 5), ("cifar100", "CIFAR100", 1)])
def test_cifar_is_read_from_its_files(
    name: str, kind: str, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = getattr(torchvision.datasets, kind)
    expected = write_cifar(tmp_path, made, monkeypatch, train=30, test=30)
    small = replace(datasets.DATASETS[name], train_images=30 * files, test_images=30)
    monkeypatch.setitem(datasets.DATASETS, name, small)
    train, test = datasets.load(name, CPU, Source(tmp_path, augmentation=Augmentation(4)))
    assert torch.equal(train.pixels, expected)
    assert train.pixels.dtype == torch.uint8
    assert train.labels.tolist() == list(range(30)) * files if files == 1 else train.labels.max() == 9
    assert (train.augmentation, test.augmentation) == (Augmentation(4), Augmentation())
    damaged = tmp_path / made.base_folder / made.train_list[0][0]
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(DataError, match=rf"{name} is incomplete or damaged; remove .*{made.base_folder} and run again"):
        datasets.load(name, CPU, Source(tmp_path))


def test_digits_are_scikit_learns_in_its_order() -> None:
    theirs = pytest.importorskip("sklearn.datasets").load_digits()
    images, labels = datasets.read_digits()
    assert images.dtype == torch.uint8
    assert torch.equal(images.squeeze(1).double(), torch.from_numpy(theirs.images))
    assert torch.equal(labels, torch.from_numpy(theirs.target))


def test_digits_come_with_the_package_and_are_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    """They took scikit-learn."""
    for name in ("sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    train, test = datasets.load("digits", CPU)
    assert train.pixels.dtype == torch.uint8
    assert (len(train), len(test)) == (1000, 797)
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert torch.cat((train.labels, test.labels)).bincount().tolist() == counts
    assert train.images.mean().abs() < 1e-6
    assert train.images.std() == pytest.approx(1, rel=1e-6)


def test_the_folder_is_the_environments_or_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTFAST_DATA", "/somewhere")
    assert source.default_folder() == Path("/somewhere")
    monkeypatch.delenv("FTFAST_DATA")
    assert source.default_folder() == Path.home() / ".cache" / "ftfast"


def test_fewer_images_than_a_batch_are_refused() -> None:
    with pytest.raises(SettingsError, match="student_images is 60, fewer than a batch of 64"):
        Settings(student_images=60, batch_size=64)


@pytest.mark.skipif(not published.DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not here")
def test_the_real_fashion_mnist_has_the_constants_that_normalise_it(tmp_path: Path) -> None:
    train, test = datasets.load("fashion-mnist", CPU, Source(tmp_path))
    assert (len(train), len(test)) == (60_000, 10_000)
    assert train.labels.bincount().tolist() == [6000] * 10
    assert F.relu(train.images.double().mean().abs() - 1e-3) == 0
    assert train.images.std() == pytest.approx(1, rel=1e-3)
