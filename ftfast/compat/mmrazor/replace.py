"""Importing this module gives mmrazor's own names of Factor Transfer to ftfast's classes.

For a configuration: ``custom_imports = dict(imports=["ftfast.compat.mmrazor.replace"])``.
"""

from importlib import import_module
from typing import Any

from ftfast.compat.mmrazor import FTLoss, Paraphraser, Translator


def replace_names() -> None:
    """Registers the three classes in the place of mmrazor's, which are registered before, so that no name is taken.

    Raises:
        ImportError: mmrazor is missing or does not import.
    """
    try:
        import_module("mmrazor.models")
        models: Any = import_module("mmrazor.registry").MODELS
    except ImportError as error:
        raise ImportError(
            f"mmrazor does not import ({error}), and these classes take the place of its own; install it, or import "
            "them from ftfast.compat.mmrazor.",
            name=error.name,
        ) from error
    for cls in (FTLoss, Paraphraser, Translator):
        models.register_module(module=cls, force=True)


replace_names()
