"""Data sets in their makers' files, which torchvision reads out of the data folder.

Nothing is fetched over the network unless ``download`` asks for it.
"""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor

from ftfast.distillation.data.in_memory import Normalisation, Split
from ftfast.distillation.data.source import Source, default_folder
from ftfast.errors import DataError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Published:
    """The files of a data set.

    Attributes:
        name: of the data set.
        kind: torchvision's class for it.
        mean, deviation: of the training images, a number each channel, by which all are normalised.
        places: in the data folder, what is read there and what it is downloaded as.
    """

    name: str
    kind: str
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    places: tuple[str, ...]

    def check(self, source: Source) -> None:
        """Raises DataError where the files are not there and are not to be downloaded; reads nothing."""
        if source.download or source.noise_images or self._is_packed():
            return
        folder = source.folder or default_folder()
        if not self._there(folder):
            raise DataError(
                f"{self.name} is not in {folder}; give --download to fetch it, or --data-dir with the folder that "
                f"holds {self.places[0]}."
            )

    def load(self, source: Source) -> tuple[Split, Split]:
        """The images to train and to test on.

        Raises:
            DataError: files that are not there, damaged, or cannot be downloaded.
        """
        self.check(source)
        folder = source.folder or default_folder()
        if self._is_packed() and not (folder / self.places[0]).exists():
            parts = _read_debian()
        else:
            parts = [(part.data, part.targets) for part in self._read(folder, source.download)]
        normalisation = Normalisation.of(255, self.mean, self.deviation)
        train, test = (Split(_in_channels(pixels), torch.as_tensor(labels), normalisation) for pixels, labels in parts)
        return train, test

    def _is_packed(self) -> bool:
        return self.name == "fashion-mnist" and DEBIAN_FASHION_MNIST.is_dir()

    def _there(self, folder: Path) -> list[Path]:
        return [folder / place for place in self.places if (folder / place).exists()]

    def _read(self, folder: Path, download: bool) -> list[Any]:
        """torchvision's train and test parts."""
        from torchvision import datasets

        make = getattr(datasets, self.kind)
        try:
            if download:
                folder.mkdir(parents=True, exist_ok=True)
            parts = [make(folder, train=is_train, download=download) for is_train in (True, False)]
            if any(len(part.data) != len(part.targets) for part in parts):
                raise ValueError
            return parts
        except (URLError, TimeoutError, ConnectionError) as error:
            raise self._not_downloaded(folder, getattr(error, "reason", error)) from None
        except OSError as error:
            reason = error.strerror or error
            raise DataError(f"{self.name} cannot be read in {folder} ({reason}); see --data-dir.") from None
        except Exception as error:  # cut files make the readers fail in many ways
            if download and "rror downloading" in str(error):
                raise self._not_downloaded(folder, "no mirror answered") from None
            found = " and ".join(map(str, self._there(folder))) or folder
            raise DataError(
                f"{self.name} is incomplete or damaged; remove {found} and run again with --download."
            ) from None

    def _not_downloaded(self, folder: Path, reason: object) -> DataError:
        return DataError(
            f"{self.name} cannot be downloaded ({reason}); try again later, or bring {self.places[0]} into {folder} "
            "from another machine."
        )


def _in_channels(pixels: Any) -> Tensor:
    """``[N, H, W]`` or ``[N, H, W, C]`` to ``[N, C, H, W]``."""
    found = torch.as_tensor(pixels)
    return found.unsqueeze(1) if found.dim() == 3 else found.permute(0, 3, 1, 2).contiguous()


def _read_debian() -> list[tuple[Tensor, Tensor]]:
    """The package's files as they are, which torchvision reads unpacked alone."""
    parts = []
    try:
        for part in ("train", "t10k"):
            pixels, labels = (
                torch.frombuffer(
                    bytearray(gzip.decompress((DEBIAN_FASHION_MNIST / f"{part}-{file}-ubyte.gz").read_bytes())),
                    dtype=torch.uint8,
                    offset=header,
                )
                for file, header in (("images-idx3", 16), ("labels-idx1", 8))
            )
            parts.append((pixels.view(len(labels), 28, 28), labels.long()))
    except (OSError, EOFError, zlib.error, ValueError, RuntimeError):
        raise DataError(
            f"{DEBIAN_FASHION_MNIST} is damaged; install the package dataset-fashion-mnist again."
        ) from None
    return parts
