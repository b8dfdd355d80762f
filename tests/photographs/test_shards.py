"""Tar shards: however many there are, what is wrong with them is told apart, and the index that spares a walk."""

import errno
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ftfast.distillation.data.photographs import listing, readers, shard_index, streamed, tar_shards
from ftfast.distillation.data.photographs.image_files import KINDS
from ftfast.distillation.data.photographs.readers import Reader
from ftfast.distillation.data.photographs.tar_shards import ShardFiles
from ftfast.errors import DataError
from tests.photographs.photograph_folder import make_folder, make_shards
from tests.photographs.test_streamed import jpeg, on_device, one_shard
from tests.processes.launching import python

CPU = torch.device("cpu")
SHARDS, SIDE = 100, 16


@pytest.fixture(autouse=True)
def _listed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    listing.list_photographs.cache_clear()
    yield
    listing.list_photographs.cache_clear()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many shards as photographs to train on."""
    home = tmp_path_factory.mktemp("many")
    make_folder(home / "folder", classes=4, train=SHARDS, val=8)
    make_shards(home / "folder", home / "shards", images_per_shard=1)
    return home / "shards"


@pytest.mark.process
@pytest.mark.parametrize("workers", [0, 1])
def test_more_shards_than_files_that_may_be_open(many: Path, workers: int) -> None:
    code = f"""
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from tests.photographs.test_shards import CPU, Path, drawn_twice, tar_shards
print(drawn_twice(Path({str(many)!r}), {workers}), tar_shards._most_open(), len(os.listdir("/proc/self/fd")) < 40)
"""
    done = python("-c", code)
    assert done.stdout == f"{2 * SHARDS} 16 True\n", done.stderr


def drawn_twice(folder: Path, workers: int) -> int:
    """How many photographs two epochs give; anything that is said is an error."""

    def refuse(line: str) -> None:
        raise AssertionError(line)

    train, _ = streamed.load(
        folder, "webdataset", CPU, image_size=SIDE, workers=workers, rand_augment=0, classes=4, train_images=SHARDS,
        test_images=8, report=refuse,
    )  # fmt: skip
    count = sum(len(batch[1]) for epoch in (0, 1) for batch in train.draw(20, seed=0, epoch=epoch))
    train.close()
    return count


def test_what_is_open_is_bounded_and_closed(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_shards, "MOST_OPEN", 3)
    found, _ = tar_shards.list_shards(many, "train")
    before = len(os.listdir("/proc/self/fd"))
    contents = [found.read(index) for index in range(SHARDS)]
    assert all(content.startswith(b"\xff\xd8") for content in contents)
    assert len(os.listdir("/proc/self/fd")) == before + 3
    again = pickle.loads(pickle.dumps(found))  # as a process that is not forked gets them
    assert [again.read(index) for index in (5, 50)] == [contents[5], contents[50]]
    del found, again
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_fails_is_not_taken_for_damage(many: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(readers, "_SECONDS_TO_ANOTHER_TRY", 0)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(DataError, match=r"^/\S+\.tar at byte \d+ cannot be read \(Input/output error\); see to the di"):
        drawn_twice(many, workers)


def test_one_failure_to_read_is_tried_again(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, labels = tar_shards.list_shards(many, "train")
    read, failures = os.pread, [OSError(errno.ESTALE, "Stale file handle")]

    def fail_once(*given: int) -> bytes:
        if failures:
            raise failures.pop()
        return read(*given)

    monkeypatch.setattr(readers, "_SECONDS_TO_ANOTHER_TRY", 0)
    monkeypatch.setattr(os, "pread", fail_once)
    _, label, damaged = Reader(found, labels, SIDE)[3]
    assert (label, damaged, failures) == (labels[3], [], [])


def test_too_many_open_files_and_files_that_are_gone_are_named(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_SECONDS_TO_ANOTHER_TRY", 0)

    def fail(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as changed:
        changed.setattr(tar_shards, "FileIO", fail)
        found, labels = tar_shards.list_shards(many, "train")
        with pytest.raises(DataError, match=r"allow more open files \(ulimit -n\)"):
            Reader(found, labels, SIDE)[0]
    lost = listing.FolderFiles(Path("/nowhere"), ["a.jpeg", "b.jpeg"])
    with pytest.raises(DataError, match=r"^/nowhere/a\.jpeg cannot be read \(No such file or directory\)"):
        Reader(lost, labels, SIDE)[0]


def test_a_shard_that_shrinks_meanwhile_is_named(tmp_path: Path) -> None:
    folder = one_shard(tmp_path / "shards", ("a.cls", b"1"), ("a.jpg", jpeg()), ("b.cls", b"0"), ("b.jpg", jpeg()))
    found, labels = tar_shards.list_shards(folder, "train")
    os.truncate(folder / "train-0.tar", 3000)
    with pytest.raises(DataError, match="ends too early: the shard was changed"):
        Reader(found, labels, SIDE)[1]


@pytest.mark.parametrize(
    "described", [b'{"width": 30}', b'{"label": 1}', b'{"label": "cat"}', b"[1]", b"no JSON", b'{"label": null}']
)
def test_a_class_beside_a_description_is_the_label(tmp_path: Path, described: bytes) -> None:
    members = (("a.json", described), ("a.jpg", jpeg()), ("a.cls", b"1"))
    _, labels = tar_shards.list_shards(one_shard(tmp_path / "shards", *members), "train")
    assert labels.tolist() == [1]


def test_two_labels_of_one_photograph_are_refused(tmp_path: Path) -> None:
    members = (("one/a.jpg", jpeg()), ("one/a.cls", b"1"), ("one/a.json", b'{"label": 2}'))
    with pytest.raises(DataError, match=r"has two labels of one/a, 1 in its \.cls and 2 in its \.json; leave one"):
        tar_shards.list_shards(one_shard(tmp_path / "shards", *members), "train")


def walks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that are walked through from now on."""
    walked: list[str] = []
    walk = tar_shards._list_shard

    def noted(path: Path) -> np.ndarray:
        walked.append(path.name)
        return walk(path)

    monkeypatch.setattr(tar_shards, "_list_shard", noted)
    return walked


def two_shards(path: Path) -> Path:
    make_folder(path / "folder", classes=3, train=12, val=3)
    make_shards(path / "folder", path / "shards", images_per_shard=6)
    return path / "shards"


def assert_same(ours: tuple[ShardFiles, np.ndarray], theirs: tuple[tar_shards.ShardFiles, np.ndarray]) -> None:
    assert ours[1].tolist() == theirs[1].tolist()
    for index in range(len(ours[1])):
        assert ours[0].read(index) == theirs[0].read(index)
        assert ours[0].name(index) == theirs[0].name(index)


def test_an_index_spares_the_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, walked = two_shards(tmp_path), walks(monkeypatch)
    first = tar_shards.list_shards(folder, "train")
    assert walked == ["train-00000.tar", "train-00001.tar"]
    assert_same(tar_shards.list_shards(folder, "train"), first)
    assert len(walked) == 2
    tar_shards.list_shards(folder, "val")
    assert len(walked) == 3
    assert not list(folder.glob("*.tmp")) + list(folder.glob(".*.tmp"))


def test_a_shard_that_was_written_anew_is_walked_through_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, walked = two_shards(tmp_path), walks(monkeypatch)
    tar_shards.list_shards(folder, "train")
    first, second = sorted(folder.glob("train-*.tar"))
    second.write_bytes(first.read_bytes())
    os.utime(second, ns=(0, 5))
    walked.clear()
    found, labels = tar_shards.list_shards(folder, "train")
    assert walked == [second.name]
    assert found.read(0) == found.read(6)
    assert labels[:6].tolist() == labels[6:].tolist()
    first.unlink()
    assert tar_shards.list_shards(folder, "train")[1].tolist() == labels[6:].tolist()
    assert walked == [second.name]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "words", "version", "offsets", "pickle"])
def test_a_bad_index_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    folder, walked = two_shards(tmp_path), walks(monkeypatch)
    expected = tar_shards.list_shards(folder, "train")
    index = folder / ".ftfast-train.npz"
    content = index.read_bytes()
    with np.load(index) as arrays:
        kept = dict(arrays)
    if damage == "version":
        np.savez(index, **{**kept, "version": np.array(99)})
    elif damage == "offsets":
        np.savez(index, **{**kept, "rows": kept["rows"] + 10**9})
    elif damage == "pickle":
        np.savez(index, **{**kept, "names": kept["names"].astype(object)})
    else:
        middle = bytes(255 - value for value in content[400:420])
        index.write_bytes(
            {
                "cut": content[:300],
                "flipped": content[:400] + middle + content[420:],
                "empty": b"",
                "words": b"no index" * 99,
            }[damage]
        )
    walked.clear()
    assert_same(tar_shards.list_shards(folder, "train"), expected)
    assert len(walked) == 2
    assert_same(tar_shards.list_shards(folder, "train"), expected)
    assert len(walked) == 2


def refuse_to_write_into(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def refuse(path: Path, content: bytes) -> int:
        if path.parent == folder:
            raise PermissionError(errno.EACCES, "Permission denied")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", refuse)


def test_shards_that_cannot_be_written_beside_are_known_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, walked = two_shards(tmp_path), walks(monkeypatch)
    refuse_to_write_into(folder, monkeypatch)
    first = tar_shards.list_shards(folder, "train")
    assert not (folder / ".ftfast-train.npz").exists()
    assert len(list((tmp_path / "cache" / "ftfast" / "shards").glob("*-train.npz"))) == 1
    walked.clear()
    assert_same(tar_shards.list_shards(folder, "train"), first)
    assert walked == []


def test_names_that_are_not_utf_8_are_indexed_in_the_cache_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = two_shards(tmp_path).rename(tmp_path / os.fsdecode(b"caf\xe9"))
    next(folder.glob("train-00001.tar")).rename(folder / os.fsdecode(b"train-\xff.tar"))
    refuse_to_write_into(folder, monkeypatch)
    walked = walks(monkeypatch)
    first = tar_shards.list_shards(folder, "train")
    assert len(walked) == 2
    assert_same(tar_shards.list_shards(folder, "train"), first)
    assert len(walked) == 2
    os.truncate(folder / os.fsdecode(b"train-\xff.tar"), 700)
    with pytest.raises(DataError) as raised:
        Reader(*first, SIDE)[11]
    assert str(raised.value).isprintable()


def test_a_key_of_megabytes_is_told_in_a_line(tmp_path: Path) -> None:
    key = "caf\udce9\n\x1b[31m" + "k" * 5_000_000
    with pytest.raises(DataError, match="without a label") as raised:
        tar_shards.list_shards(one_shard(tmp_path / "shards", (f"{key}.jpg", jpeg())), "train")
    assert len(str(raised.value)) < 1000
    assert str(raised.value).isprintable()


def test_all_kinds_that_are_decoded_are_listed_in_shards_too(tmp_path: Path) -> None:
    members = [member for kind in KINDS for member in ((f"{kind}.{kind.upper()}", jpeg()), (f"{kind}.cls", b"1"))]
    found, _ = tar_shards.list_shards(one_shard(tmp_path / "shards", *members), "train")
    assert [found.read(index) for index in range(len(KINDS))] == [jpeg()] * len(KINDS)


def test_a_run_needs_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = two_shards(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert len(tar_shards.list_shards(folder, "train")[1]) == 12
    assert shard_index._read(folder / ".ftfast-train.npz") == {}


def test_the_gpus_loader_reads_shards_too(tmp_path: Path) -> None:
    folder = two_shards(tmp_path)
    found = listing.list_photographs(folder, "gpu", "train")
    expected = listing.list_photographs(folder, "webdataset", "train")
    assert found.labels.tolist() == expected.labels.tolist()
    of_files = listing.list_photographs(tmp_path / "folder", "gpu", "train")
    assert isinstance(of_files.files, listing.FolderFiles)
    train, _ = streamed.load(
        folder, "webdataset", CPU, image_size=SIDE, workers=0, rand_augment=0, classes=3, train_images=12, test_images=3
    )
    assert isinstance(train, streamed.Streamed)
    for ours, theirs in zip(on_device(train).draw(4, seed=0, epoch=0), train.draw(4, seed=0, epoch=0), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
