"""What the fields of a recipe may be together, as far as the fields alone tell."""

from ftfast.distillation.data.datasets import DATASETS
from ftfast.distillation.data.photographs.listing import LOADERS
from ftfast.distillation.models import registry
from ftfast.distillation.settings.recipe import Recipe
from ftfast.distillation.training.controls import CONTROLS
from ftfast.distillation.training.methods import METHODS, any_needs
from ftfast.distillation.training.terms import WEIGHTS
from ftfast.errors import SettingsError

PHOTOGRAPH_FIELDS = (
    *("loader", "image_size", "mean", "deviation", "rand_augment", "classes", "train_images", "test_images", "workers"),
)


def check_recipe(recipe: Recipe) -> None:
    """Raises SettingsError where fields do not go together."""
    for name in ("methods", "milestones", *WEIGHTS):
        values = getattr(recipe, name)
        if len(set(values)) != len(values):
            raise SettingsError(f"{name} names {', '.join(map(str, values))}; give each value once.")
    if not recipe.methods:
        raise SettingsError(f"methods is empty; it takes some of {', '.join(METHODS)}, separated by commas.")
    for name in (recipe.teacher, recipe.student):
        registry.check_name(name)
    if recipe.learning_rate_schedule == "steps" and not recipe.milestones:
        raise SettingsError("learning_rate_schedule is 'steps', and milestones is empty; give --milestones 82,123.")
    _check_photographs(recipe)
    _check_store(recipe)
    if recipe.noise_images and (DATASETS[recipe.data].is_streamed or recipe.store is not None):
        raise SettingsError(
            f"noise_images is {recipe.noise_images}, which stands in for data in memory; leave it out with --store, "
            "and with --data images take --loader synthetic."
        )
    if DATASETS[recipe.data].is_streamed and any(len(getattr(recipe, name)) > 1 for name in WEIGHTS):
        raise SettingsError(
            "several values of a weight are given, and with --data images none is chosen; give one of each."
        )


def _check_photographs(recipe: Recipe) -> None:
    if not DATASETS[recipe.data].is_streamed:
        for name in PHOTOGRAPH_FIELDS:
            if getattr(recipe, name) != getattr(Recipe, name):
                raise SettingsError(
                    f"{name} is {getattr(recipe, name)!r}, and data is {recipe.data!r}; it is for --data images."
                )
        return
    if recipe.rand_augment and not LOADERS[recipe.loader].has_rand_augment:
        raise SettingsError(
            f"rand_augment is {recipe.rand_augment}, and --loader {recipe.loader} has no RandAugment; take --loader "
            "folder or webdataset."
        )
    if (len(recipe.mean), len(recipe.deviation)) not in ((0, 0), (3, 3)):
        raise SettingsError(
            f"mean has {len(recipe.mean)} values and deviation {len(recipe.deviation)}; give three of each, or none."
        )
    if recipe.crop_padding or recipe.flip or recipe.cutout:
        raise SettingsError(
            "crop_padding, flip or cutout is given, and photographs are cropped and flipped by their loader; leave "
            "them out."
        )
    for method in recipe.methods:
        if (control := METHODS[method].control) is not None and CONTROLS[control].learns:
            raise SettingsError(
                f"methods has {method}, whose {control} learns from features that are kept in memory; leave it out "
                "with --data images."
            )
    if (
        not recipe.paraphraser_epochs
        and recipe.paraphraser_checkpoint is None
        and recipe.store is None
        and any_needs(recipe.methods, "factors")
    ):
        raise SettingsError(
            "paraphraser_epochs is 0, which keeps the features of all images in memory; give at least 1 with "
            "--data images."
        )


def _check_store(recipe: Recipe) -> None:
    """A store knows the factors of its own views alone."""
    if recipe.store is None:
        return
    if recipe.paraphraser_checkpoint is not None:
        raise SettingsError(
            "paraphraser_checkpoint and store are given, and a store has its own paraphraser; give one of them."
        )
    for name in ("mixup", "cutmix", "cutout", "rand_augment"):
        if getattr(recipe, name):
            raise SettingsError(
                f"{name} is {getattr(recipe, name)}, and store is given, which has factors of crops and flips alone; "
                f"leave --{name.replace('_', '-')} out, or train without --store."
            )
    for method in recipe.methods:
        if "maps" in METHODS[method].needs:
            raise SettingsError(
                f"methods has {method}, which compares the teacher's feature maps, and a store has factors and "
                "logits; take none, ft, kd or ft+kd, or train without --store."
            )
