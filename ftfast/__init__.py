"""ftfast: Factor Transfer (Kim, Park, Kwak, NeurIPS 2018) with fused kernels.

``import ftfast`` compiles nothing and needs neither a GPU nor Triton; the names below load what they need when used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ftfast import reference
    from ftfast.arguments import Backend, Reduction
    from ftfast.conversion.state_dicts import convert_state_dict
    from ftfast.diagnosis.doctor import doctor
    from ftfast.dispatch import explain
    from ftfast.distillation.models.frozen_teacher import FrozenTeacher
    from ftfast.distillation.own_models.distill import Distilled, distill
    from ftfast.distillation.store.own_images import FactorStore, write_factors
    from ftfast.distillation.training.paraphrasing.diagnosis import diagnose_paraphraser
    from ftfast.distillation.training.paraphrasing.paraphraser import train_paraphraser
    from ftfast.distillation.training.step.captured_step import capture_step
    from ftfast.features.tap import FeatureTap
    from ftfast.features.taps import FactorTransfers, FeatureTaps
    from ftfast.head import FactorTransfer
    from ftfast.loss import FTLoss, ft_loss
    from ftfast.modules import Paraphraser, Translator

_HOMES = {
    "FTLoss": "loss",
    "ft_loss": "loss",
    "FactorTransfer": "head",
    "FactorTransfers": "features.taps",
    "Paraphraser": "modules",
    "Translator": "modules",
    "train_paraphraser": "distillation.training.paraphrasing.paraphraser",
    "diagnose_paraphraser": "distillation.training.paraphrasing.diagnosis",
    "capture_step": "distillation.training.step.captured_step",
    "distill": "distillation.own_models.distill",
    "Distilled": "distillation.own_models.distill",
    "FrozenTeacher": "distillation.models.frozen_teacher",
    "FactorStore": "distillation.store.own_images",
    "write_factors": "distillation.store.own_images",
    "FeatureTap": "features.tap",
    "FeatureTaps": "features.taps",
    "convert_state_dict": "conversion.state_dicts",
    "doctor": "diagnosis.doctor",
    "explain": "dispatch",
    "Backend": "arguments",
    "Reduction": "arguments",
    "reference": "",
}

__all__ = [
    "Backend",
    "Distilled",
    "FTLoss",
    "FactorStore",
    "FactorTransfer",
    "FactorTransfers",
    "FeatureTap",
    "FeatureTaps",
    "FrozenTeacher",
    "Paraphraser",
    "Reduction",
    "Translator",
    "__version__",
    "capture_step",
    "convert_state_dict",
    "diagnose_paraphraser",
    "distill",
    "doctor",
    "explain",
    "ft_loss",
    "reference",
    "train_paraphraser",
    "write_factors",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ftfast' has no attribute {name!r}")
    try:
        value = getattr(import_module(f"ftfast.{home}"), name) if home else import_module(f"ftfast.{name}")
    except ModuleNotFoundError as error:
        if str(error.name).startswith("ftfast"):
            raise
        message = f"ftfast.{name} needs the package {error.name}; pip install 'ftfast[distill]'."
        raise ModuleNotFoundError(message, name=error.name) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
