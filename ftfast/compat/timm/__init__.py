"""timm: Factor Transfer as a training task, in the place of ``timm.task.FeatureDistillationTask``.

:class:`FactorTransferTask` has every public method of timm's own feature distillation and goes into its training loop,
optimiser factory and checkpoints as it is. Its paraphraser must be trained first: by the task's own
``train_paraphraser(loader)``, by :func:`train_paraphraser` beforehand, or long ago, from a checkpoint's path.

Raises:
    ImportError: from the import, where timm is not installed or is of a release without training tasks.
"""

from ftfast.compat.timm.library import TESTED_VERSIONS
from ftfast.compat.timm.maps import feature_map
from ftfast.compat.timm.paraphrasing import load_paraphraser, train_paraphraser
from ftfast.compat.timm.task import FactorTransferTask
from ftfast.compat.timm.trainable import FactorTransferTrainableModule

__all__ = [
    "TESTED_VERSIONS",
    "FactorTransferTask",
    "FactorTransferTrainableModule",
    "feature_map",
    "load_paraphraser",
    "train_paraphraser",
]
