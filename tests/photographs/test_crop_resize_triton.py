"""The kernel that cuts and resizes photographs, against torch's filter in float64 and torchvision's transforms."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast.ops.crop_resize import Window, crop_resize

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("Triton's kernels run on a GPU, or with TRITON_INTERPRET=1", allow_module_level=True)

pytest.importorskip("triton", reason="the package triton is not installed")
kernels = pytest.importorskip("ftfast.kernels.crop_resize")
crops = pytest.importorskip("ftfast.distillation.data.photographs.crops")

DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Half a unit in the last place of the result, in levels; the interpreter rounds bfloat16 towards zero.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 3.0 if INTERPRETED else 1.5}


def photograph(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8).to(DEVICE)
    if seed % 3 == 1:  # as libjpeg decodes
        return pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return torch.cat([pixels, pixels], 2)[:, :, :width] if seed % 3 == 2 else pixels


def expected(pixels: Tensor, window: Window, size: int) -> Tensor:
    """``[3, size, size]`` in float64, from 0 to 255."""
    box = pixels[:, window.top : window.top + window.height, window.left : window.left + window.width]
    wide = box.double()[None].cpu()
    resized = F.interpolate(wide, (window.grid_height, window.grid_width), mode="bilinear", antialias=True)[0]
    rows = slice(window.first_row, window.first_row + size)
    square = resized[:, rows, window.first_column : window.first_column + size]
    return square.flip(-1) if window.flip else square


def levels(found: Tensor) -> Tensor:
    """Back from normalised numbers to 0 to 255, in float64 on the CPU."""
    mean, deviation = (torch.tensor(values).double().reshape(-1, 1, 1) for values in (MEAN, DEVIATION))
    return (found.double().cpu() * deviation + mean) * 255


# Height, width, window: smaller, as large, larger along one side, much larger, one pixel, whole and mirrored.
CASES = {
    "down": ((30, 45), Window(3, 5, 20, 35, 8, 8, 0, 0, False)),
    "down, mirrored": ((30, 45), Window(3, 5, 20, 35, 8, 8, 0, 0, True)),
    "up": ((30, 20), Window(3, 2, 9, 11, 8, 8, 0, 0, True)),
    "same": ((8, 8), Window(0, 0, 8, 8, 8, 8, 0, 0, False)),
    "up and down": ((50, 12), Window(1, 0, 49, 5, 8, 8, 0, 0, False)),
    "far down": ((61, 40), Window(0, 0, 61, 40, 8, 8, 0, 0, False)),
    "one pixel": ((5, 7), Window(4, 6, 1, 1, 8, 8, 0, 0, True)),
    "middle": ((24, 30), Window(0, 0, 24, 30, 9, 11, 1, 3, False)),
    "middle, mirrored": ((24, 30), Window(0, 0, 24, 30, 9, 11, 1, 3, True)),
}


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.usefixtures("poisoned")
def test_photographs_of_unlike_size_in_one_launch(dtype: torch.dtype) -> None:
    # The interpreter takes a second for each, and 16 bits differ in the last rounding alone.
    cases = dict(list(CASES.items())[:3]) if INTERPRETED and dtype != torch.float32 else CASES
    photographs = [photograph(*shape, seed) for seed, (shape, _) in enumerate(cases.values())]
    windows = [window for _, window in cases.values()]
    found = crop_resize(photographs, windows, 8, mean=MEAN, deviation=DEVIATION, dtype=dtype)
    assert found.dtype == dtype
    assert found.shape == (len(cases), 3, 8, 8)
    assert found.is_contiguous(memory_format=torch.channels_last)
    for name, pixels, window, square in zip(cases, photographs, windows, levels(found), strict=True):
        error = (square - expected(pixels, window, 8)).abs().max()
        assert error < 2e-3 + ROUNDING[dtype], (name, float(error))


@pytest.mark.parametrize("size", [1, 3, 21])
def test_sizes_that_are_no_power_of_two_and_longer_than_a_block(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LONGEST_BLOCK", 16)
    pixels = photograph(21, 34)
    window = Window(2, 3, 18, 29, size, size, 0, 0, True)
    found = levels(crop_resize([pixels], [window], size, mean=MEAN, deviation=DEVIATION))[0]
    assert (found - expected(pixels, window, size)).abs().max() < 2e-3


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_and_middles_are_torchvisions_to_a_level(flip: bool) -> None:
    """torchvision rounds to whole levels at the end, and on the CPU between the two passes too."""
    pixels, size = photograph(33, 40), 14
    box = crops.Box(5, 8, 23, 29, flip)
    windows = [crops.window_of(box, size), crops.middle_of(33, 40, size)]
    found = levels(crop_resize([pixels, pixels], windows, size, mean=MEAN, deviation=DEVIATION))
    for square, theirs in zip(found, (crops.cut_box(pixels, box, size), crops.cut_middle(pixels, size)), strict=True):
        difference = (square - theirs.double().cpu()).abs()
        assert difference.max() < 1.51
        assert difference.mean() < 0.5


def test_without_a_mean_pixels_go_from_nought_to_one() -> None:
    white = torch.full((3, 9, 9), 255, dtype=torch.uint8, device=DEVICE)
    found = crop_resize([white], [Window(0, 0, 9, 9, 4, 4, 0, 0, False)], 4)
    assert float((found - 1).abs().max()) < 1e-6
    assert math.prod(crop_resize([], [], 4).shape) == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"photographs": [torch.zeros(3, 8, 8)]}, TypeError, r"photographs\[0\] is torch.float32; it takes uint8"),
        ({"photographs": [torch.zeros(1, 1, 1, dtype=torch.uint8).expand(3, 8, 8)[:1]]}, ValueError, "three channels"),
        ({"photographs": [torch.zeros(1, 8, 8, dtype=torch.uint8)]}, ValueError, r"\[1, 8, 8\]; it takes \[3, H, W\]"),
        ({"windows": []}, ValueError, "windows has 0 for 1 photographs"),
        ({"windows": [Window(0, 1, 8, 8, 4, 4, 0, 0, False)]}, ValueError, "reaches beyond its photograph of 8x8"),
        ({"windows": [Window(0, 0, 8, 8, 4, 4, 1, 0, False)]}, ValueError, "or its grid"),
        ({"dtype": torch.float64}, TypeError, "dtype is torch.float64"),
    ],
)
def test_bad_input_is_one_sentence(change: dict[str, object], error: type[Exception], message: str) -> None:
    given = {
        "photographs": [torch.zeros(3, 8, 8, dtype=torch.uint8, device=DEVICE)],
        "windows": [Window(0, 0, 8, 8, 4, 4, 0, 0, False)],
        "size": 4,
        **change,
    }
    with pytest.raises(error, match=message):
        crop_resize(**given)  # type: ignore[arg-type]
