"""What the compiler makes of the grouped head's Triton kernels, read from the machine code; no GPU is needed."""

import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("with TRITON_INTERPRET=1 kernels are interpreted, not compiled", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")
tiles = pytest.importorskip("ftfast.kernels.ft_head_tiles")
tables = pytest.importorskip("ftfast.kernels.conv3x3_tiles")

from bench.machine_code.compiling import ARCHITECTURES, Launch, cache_key, compile_launch  # noqa: E402
from bench.machine_code.shipped import ShippedLaunch  # noqa: E402
from bench.machine_code.shipped.ft_head_grouped import launches_of, shipped_launches  # noqa: E402
from bench.shapes import HEADS, HeadShape  # noqa: E402

QUICK = [
    ("grouped forward 512->512 of 256x512->256x7x7 bfloat16", 90),
    ("grouped backward 512->256 of 256x512->256x7x7 bfloat16", 90),
    ("grouped backward 64->32 of 128x64->32x8x8 bfloat16", 80),
    ("grouped backward 64->32 of 128x64->32x8x8 float32", 100),
    ("head loss of 128x64->32x8x8 bfloat16", 90),
    ("scaled direction of 128x128->64x8x8 bfloat16", 90),
    ("sum gradients of 32x16+64->32x2x2 bfloat16", 90),
]


def _slow_unless(quick: bool) -> list[pytest.MarkDecorator]:
    return [] if quick else [pytest.mark.slow]


def _shipped() -> list[object]:
    return [
        pytest.param(
            launch,
            id=f"{launch.name}, sm_{launch.architectures[0]}",
            marks=_slow_unless((launch.name, launch.architectures[0]) in QUICK),
        )
        for launch in shipped_launches()
    ]


def _assert_ships(launch: Launch, architecture: int, *, tensor_cores: bool) -> None:
    machine = compile_launch(launch, architecture)
    assert not machine.problems(tensor_cores=tensor_cores)
    if tensor_cores and architecture == 90:
        assert machine.count("HGMMA") > 0


@pytest.mark.parametrize("shipped", _shipped())
def test_shipped_launches(shipped: ShippedLaunch) -> None:
    _assert_ships(shipped.launch, shipped.architectures[0], tensor_cores=shipped.tensor_cores)


def test_the_quick_launches_have_every_kernel() -> None:
    kernels = {(shipped.name, shipped.architectures[0]): shipped.launch.kernel for shipped in shipped_launches()}
    assert {kernels[quick] for quick in QUICK} == set(kernels.values())


class Choice(NamedTuple):
    """A tile of a table, with the weight gradient's piece where it is one for backward."""

    architecture: int
    table: int
    dtype: torch.dtype
    convolution: tables.ConvolutionTile
    piece: tiles.WeightPiece | None

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.convolution))
        piece = "" if self.piece is None else " + " + "x".join(map(str, self.piece))
        return f"sm_{self.architecture} table {self.table} {str(self.dtype).removeprefix('torch.')} {sizes}{piece}"


def choices() -> Iterator[Choice]:
    """Every tile, and every pair of tiles of backward that some channels can have."""
    for architecture in ARCHITECTURES:
        for table in (architecture, tables.ODD):
            for dtype in (torch.bfloat16, torch.float32):
                for convolution in tiles.FORWARD_TILES[table, dtype.itemsize]:
                    yield Choice(architecture, table, dtype, convolution, None)
                for convolution in tiles.BACKWARD_TILES[table, dtype.itemsize]:
                    for piece in tiles.WEIGHT_PIECES[table, dtype.itemsize, convolution.warps]:
                        if piece.rows <= convolution.columns:
                            yield Choice(architecture, table, dtype, convolution, piece)


def launches_with(choice: Choice, monkeypatch: pytest.MonkeyPatch, input_precision: str = "tf32") -> list[Launch]:
    """Forward's or backward's launches when there is no other tile."""
    _, table, dtype, convolution, piece = choice
    forward = piece is None
    found = tiles.FORWARD_TILES if forward else tiles.BACKWARD_TILES
    monkeypatch.setitem(found, (table, dtype.itemsize), [convolution])
    if piece is not None:
        monkeypatch.setitem(tiles.WEIGHT_PIECES, (table, dtype.itemsize, convolution.warps), [piece])
    tiles.forward_tile.cache_clear()
    tiles.backward_tile.cache_clear()
    # Odd channel counts take the table for them.
    channels = convolution.columns - (1 if table == tables.ODD else 0)
    head = HeadShape("tile", 64, channels, channels, channels, 7, 7)
    launches = launches_of(head, dtype, choice.architecture, input_precision=input_precision)
    monkeypatch.undo()
    tiles.forward_tile.cache_clear()
    tiles.backward_tile.cache_clear()
    name = "_grouped_forward_kernel" if forward else "_grouped_backward_kernel"
    return [launch for launch in launches if launch.kernel.__name__ == name]


@pytest.mark.slow
@pytest.mark.parametrize("choice", list(choices()), ids=str)
def test_every_tile(choice: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for launch in launches_with(choice, monkeypatch):
        key = cache_key(launch, choice.architecture)
        if key not in seen:
            seen.add(key)
            _assert_ships(launch, choice.architecture, tensor_cores=True)


def test_every_named_head_has_tiles() -> None:
    for head in HEADS.values():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for architecture in ARCHITECTURES:
                names = [launch.kernel.__name__ for launch in launches_of(head, dtype, architecture)]
                assert names.count("_grouped_forward_kernel") == 3
                assert names.count("_grouped_backward_kernel") == 3
                assert len(names) == 9


def test_new_batches_and_maps_keep_their_kernels() -> None:
    keys = set()
    for samples, height, width in [(256, 7, 7), (255, 7, 7), (240, 8, 7), (256, 6, 8), (192, 9, 8)]:
        head = HeadShape("other", samples, 512, 512, 256, height, width)
        for launch in launches_of(head, torch.bfloat16, 90):
            if launch.kernel.__name__ != "_head_loss_kernel":
                keys.add(cache_key(launch))
    # Three layers forward and three backward, the start of backward and its end.
    assert len(keys) == 8
