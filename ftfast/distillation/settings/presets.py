"""Recipes by name: the paper's pairs of networks on CIFAR, and one for each other data set.

A preset's values are defaults of :class:`ftfast.distillation.settings.run_settings.Settings`; what is given beside it
overrides them.
"""

import dataclasses
from typing import Any

from ftfast.distillation.settings.run_settings import Settings
from ftfast.distillation.training.schedule import CUSTOMARY
from ftfast.errors import SettingsError

# train_teacher.py, train_Paraphraser.py, train_student.py and Models/ of the authors' code, which is for CIFAR-10 and
# ResNet-56 to ResNet-20; the paper's other pairs are taken to have been trained alike. The code has no other methods:
# attention 1000 and alpha 0.9 at temperature 4 are customary weights for them.
_OFFICIAL: dict[str, Any] = {
    "methods": ("none", "at", "kd", "ft", "at+kd", "ft+kd"),
    "seeds": 5,
    "teacher_channels": 0,
    "student_channels": 0,
    "teacher_epochs": 164,
    "student_epochs": 164,
    "student_images": 0,
    "shortcut": "projection",
    "batch_size": 128,
    "learning_rate": 0.1,
    "learning_rate_schedule": "steps",
    "milestones": (82, 123),
    "gamma": 0.1,
    "nesterov": False,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "crop_padding": 4,
    "flip": True,
    "rate": 0.5,
    "paraphraser_optimiser": "sgd",
    "paraphraser_learning_rate": 0.1,
    "paraphraser_learning_rate_schedule": "constant",
    "paraphraser_weight_decay": 5e-4,
    "paraphraser_loss": "l1",
    "paraphraser_batch_size": 128,
    "paraphraser_steps": 6 * 391,  # six epochs of 50,000 images
    "paraphraser_held_out": 1000,
    "beta": (500.0,),
    "attention": (1000.0,),
    "hint": (100.0,),
    "alpha": (0.9,),
    "temperature": 4.0,
    "threads": 0,
}

# What two cores do in about an hour: students that see a sixth of the teacher's images until they learn nothing more.
# Of each weight four values are tried, a factor of four or five apart (alpha: 0.3 to 0.9), on two halves of the images.
_FASHION_MNIST: dict[str, Any] = {
    "methods": ("none", "kd", "at", "fitnet", "ft", "ft+kd"),
    "seeds": 5,
    "teacher_epochs": 10,
    "student_channels": 8,
    "student_epochs": 20,
    "student_images": 10000,
    "batch_size": 128,
    "learning_rate": 0.1,
    "crop_padding": 2,
    "flip": True,
    "paraphraser_steps": 2000,
    "paraphraser_held_out": 1000,
    "beta": (30.0, 110.0, 440.0, 1750.0),
    "attention": (5.0, 25.0, 125.0, 625.0),
    "hint": (0.1, 0.5, 2.0, 10.0),
    "alpha": (0.3, 0.5, 0.7, 0.9),
    "validation_folds": 2,
    "threads": 0,
}


# The recipe that torchdistill publishes for ILSVRC 2012 (configs/official/ilsvrc2012, ft-resnet18_from_resnet34).
_IMAGENET: dict[str, Any] = {
    "data": "images",
    "image_size": 224,
    "methods": ("ft",),
    "seeds": 1,
    "teacher_channels": 0,
    "student_channels": 0,
    "pretrained": True,
    "student": "torchvision/resnet18",
    "teacher_epochs": 1,
    "student_epochs": 90,
    "student_images": 0,
    "batch_size": 256,
    "learning_rate": 0.1,
    "learning_rate_schedule": "steps",
    "milestones": (30, 60),
    "gamma": 0.1,
    "nesterov": False,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "rate": 0.5,
    "paraphraser_optimiser": "sgd",
    "paraphraser_learning_rate": 0.01,
    "paraphraser_learning_rate_schedule": "constant",
    "paraphraser_weight_decay": 1e-4,
    "paraphraser_loss": "mse",
    "paraphraser_batch_size": 256,
    "paraphraser_epochs": 1,
    "paraphraser_held_out": 1000,
    "beta": (1000.0,),
    "alpha": (0.5,),
    "attention": (1000.0,),
    "hint": (100.0,),
    "temperature": 1.0,
    "threads": 0,
}


def _pair(data: str, teacher: str, student: str, **rest: Any) -> dict[str, Any]:
    return {**_OFFICIAL, "data": data, "teacher": teacher, "student": student, **rest}


PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"data": "digits"},
    "fashion-mnist": {**_FASHION_MNIST, "data": "fashion-mnist"},
    "cifar10-resnet56-resnet20": _pair("cifar10", "resnet56", "resnet20"),
    "cifar10-wrn40-1-resnet20": _pair("cifar10", "wrn-40-1", "resnet20"),
    # The teacher's last map is 8x8 and the student's 2x2.
    "cifar10-wrn46-4-vgg13": _pair("cifar10", "wrn-46-4", "vgg13", resize_features=True),
    "cifar10-wrn16-2-wrn16-1": _pair("cifar10", "wrn-16-2", "wrn-16-1"),
    "cifar100-resnet110-resnet56": _pair("cifar100", "resnet110", "resnet56"),
    "cifar100-resnet110-resnet20": _pair("cifar100", "resnet110", "resnet20"),
    # ImageNet's recipe for photographs of any classes, whose teacher is trained first or given.
    "images": {**_IMAGENET, "teacher": "torchvision/resnet34", "pretrained": False, "teacher_epochs": 90},
    "imagenet-resnet34-resnet18": {**_IMAGENET, "teacher": "torchvision/resnet34"},
    "imagenet-resnet50-resnet18": {**_IMAGENET, "teacher": "torchvision/resnet50"},
}


def for_a_try(settings: Settings, steps: int) -> Settings:
    """The same networks, methods and losses for ``steps`` steps of each training on noise: whether all runs here.

    Learning rates are low, since noise makes those of a recipe diverge.

    Raises:
        SettingsError: more images than a setting takes.
    """
    images = steps * settings.batch_size
    dataset = settings.dataset()
    weights: dict[str, Any] = {name: (value,) for name, value in settings.weight_grid()[0].items()}
    noise: dict[str, Any] = {"noise_images": images}
    if dataset.is_streamed:
        count = {"train_images": images, "test_images": settings.batch_size}
        noise = {"loader": "synthetic", "data_dir": None, "classes": settings.classes or 1000, **count}
    return dataclasses.replace(
        settings,
        **noise,
        **weights,
        seeds=1,
        teacher_epochs=1,
        student_epochs=1,
        student_images=0,
        pretrained=False,
        learning_rate=1e-3,
        learning_rate_schedule="cosine",
        milestones=(),
        paraphraser_learning_rate=1e-3,
        paraphraser_steps=steps,
        paraphraser_epochs=min(1, settings.paraphraser_epochs),
        paraphraser_batch_size=settings.batch_size,
        paraphraser_held_out=2,
    )


def preset_for(data: str) -> str | None:
    """The first preset for a data set; None where there is none."""
    return next((name for name, values in PRESETS.items() if values["data"] == data), None)


def settings_of(preset: str | None = None, **given: Any) -> Settings:
    """The settings of a preset, overridden by those given.

    Args:
        preset: one of :data:`PRESETS`; that of the given ``data`` by default, ``digits`` where that is not given.

    Raises:
        SettingsError: an unknown preset, one for other data than those given, or a value that its field does not take.
    """
    if preset is None:
        preset = preset_for(given.get("data", "digits"))
    elif preset not in PRESETS:
        raise SettingsError(f"preset is {preset!r}; it takes {', '.join(PRESETS)}.")
    elif given.get("data", PRESETS[preset]["data"]) != PRESETS[preset]["data"]:
        raise SettingsError(
            f"preset {preset} is for {PRESETS[preset]['data']}, and data is {given['data']!r}; give one of the two."
        )
    return Settings(**{**PRESETS.get(preset or "", {}), **_of_optimiser(given.get("optimiser")), **given})


def _of_optimiser(name: str | None) -> dict[str, Any]:
    """What an optimiser that is given has in place of the preset's values, which are SGD's."""
    if name not in CUSTOMARY or name == Settings.optimiser:
        return {}
    learning_rate, weight_decay, decays_vectors = CUSTOMARY[name]
    decayed = "all" if decays_vectors else "matrices"
    return {"learning_rate": learning_rate, "weight_decay": weight_decay, "decayed": decayed}
