"""Rows of files in one tensor: what was written, and every failure by its row."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ftfast.extension import load_extension
from ftfast.ops import read_rows as op
from ftfast.ops.read_rows import RowError, read_rows

ROW = (3, 5)


@pytest.fixture(params=["extension", "python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the extension, where it is built, and without it."""
    if request.param == "python":
        monkeypatch.setattr(op, "load_extension", lambda: (None, "not asked for"))
    elif load_extension()[0] is None:
        pytest.skip("the extension is not built here")
    return str(request.param)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """Two open files of 40 rows, and what is in them."""
    contents = [np.random.default_rng(seed).integers(-128, 128, (40, *ROW), dtype=np.int8) for seed in range(2)]
    opened = []
    for number, content in enumerate(contents):
        path = tmp_path / str(number)
        path.write_bytes(b"head" + content.tobytes())
        opened.append(os.open(path, os.O_RDONLY))
    yield opened, contents
    for descriptor in opened:
        os.close(descriptor)


@pytest.mark.usefixtures("poisoned")
def test_rows_come_from_where_they_lie(way: str, files: tuple[list[int], list[np.ndarray]]) -> None:
    opened, contents = files
    random = np.random.default_rng(0)
    which, rows = random.integers(0, 2, 500), random.integers(0, 40, 500)
    out = torch.empty(500, *ROW, dtype=torch.int8)
    read_rows(np.array(opened)[which], 4 + rows * 15, out)
    assert np.array_equal(out.numpy(), np.stack([contents[file][row] for file, row in zip(which, rows, strict=True)]))


def test_dtypes_are_bytes(way: str, files: tuple[list[int], list[np.ndarray]]) -> None:
    opened, contents = files
    out = torch.empty(2, 3, dtype=torch.float16)
    read_rows(np.array(opened), np.array([4, 10]), out)
    assert out[1].view(torch.uint8).tolist() == contents[1].view(np.uint8).reshape(-1)[6:12].tolist()


def test_a_file_that_ends_too_early_is_named_by_its_row(way: str, files: tuple[list[int], list[np.ndarray]]) -> None:
    opened, _ = files
    offsets = np.array([4, 4 + 39 * 15, 4 + 39 * 15 + 1, 10**9])
    with pytest.raises(RowError) as found:
        read_rows(np.array([*opened, *opened]), offsets, torch.empty(4, *ROW, dtype=torch.int8))
    assert (found.value.row, found.value.errno) == (2, errno.ENODATA)


def test_a_file_that_is_not_open_is_named_by_its_row(way: str, files: tuple[list[int], list[np.ndarray]]) -> None:
    opened, _ = files
    with pytest.raises(RowError) as found:
        read_rows(np.array([opened[0], 10**6]), np.array([4, 4]), torch.empty(2, *ROW, dtype=torch.int8))
    assert (found.value.row, found.value.errno) == (1, errno.EBADF)


def test_bad_arguments_are_sentences(files: tuple[list[int], list[np.ndarray]]) -> None:
    opened, _ = files
    with pytest.raises(ValueError, match=r"^out has 3 rows, and descriptors and offsets are \(2,\) and \(2,\)"):
        read_rows(np.array(opened), np.array([4, 4]), torch.empty(3, *ROW, dtype=torch.int8))
    with pytest.raises(ValueError, match="takes contiguous memory of the CPU"):
        read_rows(np.array(opened), np.array([4, 4]), torch.empty(4, *ROW, dtype=torch.int8)[::2])


def test_no_rows_read_nothing(way: str) -> None:
    read_rows(np.array([], np.int64), np.array([], np.int64), torch.empty(0, *ROW))
