"""The fields of a distillation run's settings, each with its default for digits, what it takes and its help text."""

from dataclasses import dataclass, make_dataclass
from typing import Any

import torch

from ftfast.distillation.data.datasets import DATASETS
from ftfast.distillation.data.photographs.listing import LOADERS
from ftfast.distillation.models import registry
from ftfast.distillation.settings.fields import setting
from ftfast.distillation.training.methods import METHODS
from ftfast.distillation.training.schedule import CUSTOMARY
from ftfast.distillation.training.terms import TEMPERATURE, WEIGHTS

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DEVICES = ("auto", "cpu", "cuda")
ENGINES = ("fast", "plain")
DECAYED = ("all", "matrices")
OPTIMISERS = ("adam", "sgd")
RECONSTRUCTION_LOSSES = ("l1", "mse")
SCHEDULES = ("cosine", "steps")
PARAPHRASER_SCHEDULES = ("cosine", "constant")


def _own(explanation: str, name: str) -> str:
    return f"{explanation} (default with adamw: {getattr(CUSTOMARY['adamw'], name)})"


@dataclass(frozen=True)
class RecipeFields:
    """All fields but the methods' weights."""

    data: str = setting("digits", "data set", choices=tuple(DATASETS))
    data_dir: str | None = setting(
        None, "folder with the data sets' files (default: $FTFAST_DATA or ~/.cache/ftfast)", free=True
    )
    download: bool = setting(False, "fetch data that are not there over the network", free=True)
    crop_padding: int = setting(0, "pixels around a training image, out of which it is cut at random", least=0, most=64)
    flip: bool = setting(False, "mirror one training image in two")
    cutout: int = setting(0, "side of the square that is blanked in a training image", least=0, most=1024)
    loader: str = setting(
        "folder",
        f"how photographs (--data images) come: {'; '.join(f'{name}: {kind.title}' for name, kind in LOADERS.items())}",
        choices=tuple(LOADERS),
    )
    image_size: int = setting(224, "pixels of a photograph's side as the networks take it", least=8, most=4096)
    mean: tuple[float, ...] = setting(
        (),
        "of the three colours of photographs, from 0 to 1 (default: what the teacher's weights were trained with, else "
        "ImageNet's)",
        least=0,
        most=1,
    )
    deviation: tuple[float, ...] = setting(
        (), "of the three colours of photographs (default: as mean)", positive=True, most=1
    )
    rand_augment: int = setting(0, "magnitude of RandAugment on photographs, 0 for none", least=0, most=30)
    classes: int = setting(0, "classes of the photographs, 0 for those of the folder", least=0)
    train_images: int = setting(0, "photographs to train on, 0 for those of the folder", least=0)
    test_images: int = setting(0, "photographs to test on, 0 for those of the folder", least=0)
    workers: int = setting(
        -1, "processes that read photographs, for each GPU; -1 for a share of the processors", least=-1, free=True
    )
    store: str | None = setting(
        None,
        "folder of a factor store (ftfast store build) in the teacher's place: images, teacher and paraphraser are its",
    )
    noise_images: int = setting(
        0, "a try: train on so many images of noise in the shape of the data's, 0 for the data themselves", least=0
    )
    methods: tuple[str, ...] = setting(("none", "ft", "kd", "ft+kd"), "methods to compare", choices=tuple(METHODS))
    seeds: int = setting(6, "students of each method; a seed fixes a student's weights and its batches", least=1)

    teacher: str = setting(
        "resnet20", "the teacher's model, or hf://owner/name of one that ftfast export has put on the Hugging Face Hub"
    )
    teacher_channels: int = setting(16, "channels of the teacher's first stage, 0 for its paper's", least=0)
    teacher_layer: str | None = setting(None, "the teacher's layer whose output is compared (default: the last map's)")
    teacher_epochs: int = setting(20, "epochs of the teacher", least=1)
    teacher_checkpoint: str | None = setting(
        None,
        "a trained teacher: a checkpoint folder, a .safetensors file or a torch file of tensors, here or as "
        "hf://owner/name[/path/to/file][@revision]",
    )
    pretrained: bool = setting(False, "the teacher's weights are those that torchvision or timm has for it")
    student: str = setting("resnet8", "the students' model")
    student_channels: int = setting(4, "channels of the students' first stage, 0 for their paper's", least=0)
    student_layer: str | None = setting(None, "the students' layer whose output is compared (default: the last map's)")
    student_pretrained: bool = setting(False, "students start from torchvision's or timm's weights")
    student_epochs: int = setting(20, "epochs of a student", least=1)
    student_images: int = setting(300, "training images that the students see, 0 for all, as the teacher does", least=0)
    shortcut: str = setting("identity", "shortcuts of ResNets", choices=registry.SHORTCUTS)
    resize_features: bool = setting(False, "pool the larger of the teacher's and student's feature maps to the smaller")

    batch_size: int = setting(32, "images in a batch, of all processes together", least=1)
    optimiser: str = setting(
        "sgd",
        "of teacher and students; adamw has its own learning rate, weight decay and decayed",
        choices=(*CUSTOMARY,),
    )
    learning_rate: float = setting(0.05, _own("the first one", "learning_rate"), positive=True)
    learning_rate_schedule: str = setting(
        "cosine", "to 0 along a cosine, or in steps at the milestones", choices=SCHEDULES
    )
    milestones: tuple[int, ...] = setting((), "epochs after which the rate falls", least=1)
    gamma: float = setting(0.1, "what the rate is multiplied by at a milestone", positive=True, most=1)
    momentum: float = setting(0.9, "of SGD; the first beta of AdamW", positive=True, most=0.9999)
    nesterov: bool = setting(True, "Nesterov's momentum")
    weight_decay: float = setting(5e-4, _own("of the weights", "weight_decay"), least=0)
    decayed: str = setting("all", "parameters that decay: all, or those but biases and norms", choices=DECAYED)
    clip_gradient: float | None = setting(None, "largest norm of all gradients together", positive=True)
    sync_batch_norm: bool = setting(False, "batch norms see the whole batch, not each GPU's part of it")
    accumulate: int = setting(1, "parts in which a batch goes through the networks, to save memory", least=1)
    ema: float | None = setting(
        None, "decay of the average of the weights over steps, kept in place of the last ones", positive=True, most=1
    )
    warm_up: float = setting(0.0, "epochs over which the learning rate rises to its first value", least=0)
    label_smoothing: float = setting(0.0, "share of each label that all classes get alike", least=0, most=0.99)
    mixup: float = setting(0.0, "alpha of mixup, 0 for none; factors are those of the mixed image", least=0)
    cutmix: float = setting(0.0, "alpha of cutmix, 0 for none; with mixup, each batch draws one of the two", least=0)

    paraphraser_checkpoint: str | None = setting(
        None,
        "a paraphraser trained before: the folder that a run left, a .safetensors file or a torch file of tensors, "
        "here or as hf://owner/name[/path/to/file][@revision]",
    )
    rate: float = setting(0.5, "the paraphraser's k: factor channels over feature channels", positive=True, most=64)
    paraphraser_steps: int = setting(500, "steps of the paraphraser", least=1)
    paraphraser_epochs: int = setting(
        0, "epochs of the paraphraser over the training images as the students see them, in place of its steps", least=0
    )
    paraphraser_batch_size: int = setting(128, "feature maps in a step of the paraphraser", least=1)
    paraphraser_optimiser: str = setting("adam", "optimiser of the paraphraser", choices=OPTIMISERS)
    paraphraser_learning_rate: float = setting(3e-3, "its first rate", positive=True)
    paraphraser_learning_rate_schedule: str = setting(
        "cosine", "to 0 along a cosine, or constant", choices=PARAPHRASER_SCHEDULES
    )
    paraphraser_weight_decay: float = setting(0.0, "of its optimiser", least=0)
    paraphraser_loss: str = setting("l1", "reconstruction loss of the paraphraser", choices=RECONSTRUCTION_LOSSES)
    paraphraser_held_out: int = setting(100, "training images on which the paraphraser is judged", least=2)

    temperature: float = setting(TEMPERATURE, "of the soft labels", positive=True, most=1e4)
    validation_folds: int = setting(
        4, "parts of the students' images, each in turn kept apart to judge weights on", least=2, most=10
    )
    selection_seeds: int = setting(1, "students for each weight and fold", least=1)

    seed: int = setting(0, "of the teacher and the paraphraser", least=0)
    device: str = setting("auto", "where to compute", choices=DEVICES)
    dtype: str = setting(
        "auto", "of the models' arithmetic (default: bfloat16 where the hardware has it)", choices=("auto", *DTYPES)
    )
    engine: str = setting(
        "fast", "fast, or plain: float32 modules and the reference loss, to compare with", choices=ENGINES
    )
    compile: str = setting(
        "auto",
        "torch.compile of student and teacher (default: on a GPU, for trainings of 2000 steps or more)",
        choices=("auto", "on", "off"),
    )
    graph: str = setting(
        "auto",
        "replay a training's step on a GPU as one CUDA graph (default: on, where nothing forbids it)",
        choices=("auto", "on", "off"),
        free=True,
    )
    deterministic: str = setting(
        "auto",
        "algorithms on a GPU that give the same sums each time, rather than the fastest (default: off for photographs)",
        choices=("auto", "on", "off"),
    )
    threads: int = setting(
        1,
        "threads on the CPU, 0 for torch's choice; digits are too small for more than one",
        least=0,
        most=4096,
        free=True,
    )


def _weight_field(name: str) -> tuple[str, object, object]:
    weight = WEIGHTS[name]
    explanation = f"weight of {weight.meaning}; of several, one is chosen"
    return name, tuple[float, ...], setting((), explanation, least=0, most=weight.most)


MethodWeights: Any = make_dataclass("MethodWeights", map(_weight_field, WEIGHTS), frozen=True)


@dataclass(frozen=True)
class Recipe(MethodWeights, RecipeFields):
    """Fields alone; what they mean together is :class:`ftfast.distillation.settings.run_settings.Settings`'s."""
