"""ftfast, in which the images of the process of rank $REFUSED cannot be read."""

import os
import sys
from typing import Any

from ftfast.cli import main
from ftfast.distillation import run
from ftfast.errors import DataError

read = run.load_images


def load_images(*args: Any, **options: Any) -> Any:
    if os.environ["RANK"] == os.environ["REFUSED"]:
        raise DataError("the images of this machine cannot be read.")
    return read(*args, **options)


run.load_images = load_images
sys.exit(main())
