"""What a recipe's fields mean: its data, the layers that are compared, and the weights that are tried."""

from dataclasses import dataclass
from pathlib import Path

from ftfast.distillation.data.augment import Augmentation
from ftfast.distillation.data.datasets import DATASETS, Dataset, described_dataset
from ftfast.distillation.data.photographs.listing import LOADERS
from ftfast.distillation.data.source import Source
from ftfast.distillation.models import registry
from ftfast.distillation.settings.recipe import Recipe
from ftfast.distillation.training.methods import METHODS
from ftfast.distillation.training.terms import WEIGHTS, customary
from ftfast.errors import SettingsError

GRID_STEPS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Meaning(Recipe):
    """Follows from the fields alone, whatever the machine."""

    def dataset(self) -> Dataset:
        """The data set; of photographs, what is known of them."""
        counts = {"classes": self.classes, "train": self.train_images, "test": self.test_images}
        dataset = described_dataset(self.data, {"size": self.image_size, **counts})
        return dataset.of_noise(self.noise_images) if self.noise_images else dataset

    def image_source(self) -> Source:
        """Where the images come from, and how those that are trained on are augmented."""
        folder = None if self.data_dir is None else Path(self.data_dir)
        augmentation = Augmentation(self.crop_padding, self.flip, self.cutout)
        return Source(folder, self.download, augmentation, self.noise_images)

    @property
    def is_noise(self) -> bool:
        """Whether the images show nothing."""
        return self.noise_images > 0 or LOADERS[self.loader].is_noise

    def teacher_source(self) -> str | None:
        """Where a teacher comes from that is not trained here: a checkpoint's path, or its library."""
        return self.teacher_checkpoint or (f"{self.teacher} (pretrained)" if self.pretrained else None)

    @property
    def is_fused(self) -> bool:
        """Whether convolutions train together with the batch norms behind them."""
        return self.engine == "fast" and self.device == "cpu"

    def teacher_features(self) -> registry.FeatureMap:
        """The teacher's layer that is compared, and its shape."""
        return self._features(self.teacher, self.teacher_channels, self.teacher_layer, "teacher_layer")

    def student_features(self) -> registry.FeatureMap:
        """The students' layer that is compared, and its shape."""
        return self._features(self.student, self.student_channels, self.student_layer, "student_layer")

    def _features(self, model: str, channels: int, layer: str | None, option: str) -> registry.FeatureMap:
        shape = self.dataset().image_shape
        return registry.feature_map(model, channels, self.shortcut, shape, layer=layer, option=option)

    def map_size(self) -> tuple[int, int]:
        """Height and width on which the feature maps are compared: the smaller of teacher's and student's."""
        teacher, student = self.teacher_features(), self.student_features()
        return min(teacher.height, student.height), min(teacher.width, student.width)

    def images_of_students(self) -> int:
        """How many images the students learn from."""
        return self.student_images or self.dataset().train_images

    def factor_size(self) -> int:
        """D, the numbers in one factor."""
        height, width = self.map_size()
        return self.factor_channels() * height * width

    def factor_channels(self) -> int:
        """The channels of a factor."""
        return max(1, round(self.teacher_features().channels * self.rate))

    def weight_grid(self) -> list[dict[str, float]]:
        """The weights that the methods try, by name; each method tries those that it has.

        Raises:
            SettingsError: two weights with unlike numbers of values, neither of them 1.
        """
        used = [name for name in WEIGHTS if any(name in METHODS[method].weights for method in self.methods)]
        grids = {name: self.values_of_weight(name) for name in used}
        counts = {name: len(grid) for name, grid in grids.items() if len(grid) > 1}
        if len(set(counts.values())) > 1:
            raise SettingsError(
                f"{' and '.join(f'{name} has {count} values' for name, count in counts.items())}; give one value or "
                "equally many, so that every method chooses from a grid of the same size."
            )
        count = max(counts.values(), default=1)
        return [{name: grid[place % len(grid)] for name, grid in grids.items()} for place in range(count)]

    def values_of_weight(self, name: str) -> tuple[float, ...]:
        """What a method tries of a weight of :data:`WEIGHTS`: the settings' own, or the customary ones."""
        if given := getattr(self, name):
            return given
        grid = WEIGHTS[name].grid
        centre = customary(name, self.factor_size() if grid is None else 0)
        if DATASETS[self.data].is_streamed:
            return (round(centre, 4),)
        return grid or tuple(round(centre * step, 4) for step in GRID_STEPS)
