"""The photographs' kernel, at the size of ImageNet's squares and at a small one."""

from collections.abc import Iterator

import torch

from bench.machine_code.compiling import recorded
from bench.machine_code.shipped import ShippedLaunch
from ftfast.kernels import crop_resize

DTYPES = (torch.float32, torch.bfloat16)
SIZES = (224, 32)


def shipped_launches() -> Iterator[ShippedLaunch]:
    """Batches of two."""
    for dtype in DTYPES:
        for size in SIZES:
            table = torch.zeros(2, crop_resize.COLUMNS, dtype=torch.int64)
            with recorded(crop_resize) as launches:
                crop_resize.crop_resize(table, size, (1.5, 2.5, 3.5), (-2.1, -2.2, -1.8), dtype)
            yield ShippedLaunch(f"2x3x{size}x{size} {str(dtype).removeprefix('torch.')}", launches[0])
