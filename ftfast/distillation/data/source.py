"""Where images come from."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from ftfast.distillation.data.augment import Augmentation
from ftfast.errors import DataError
from ftfast.user_folder import user_folder


def default_folder() -> Path:
    """Where data sets lie: ``$FTFAST_DATA``, else the user's folder.

    Raises:
        DataError: there is neither.
    """
    folder = Path(given) if (given := os.environ.get("FTFAST_DATA")) else user_folder()
    if folder is None:
        raise DataError("there is no home folder with data; give --data-dir, or set FTFAST_DATA to a folder.")
    return folder


@dataclass(frozen=True)
class Source:
    """Where images come from, and what is done to those that are trained on.

    Attributes:
        folder: the data folder; None for ``$FTFAST_DATA`` or ``~/.cache/ftfast``.
        download: whether the network may be asked for what is not there.
        augmentation: of the training images.
        noise_images: so many of noise to train on, and as many to test on, in place of the data; 0 for the data.
    """

    folder: Path | None = None
    download: bool = False
    augmentation: Augmentation = field(default_factory=Augmentation)
    noise_images: int = 0
