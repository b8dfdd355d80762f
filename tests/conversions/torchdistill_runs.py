"""A YAML file of torchdistill's, run as its example scripts do."""

from pathlib import Path
from typing import Any

import torch
from torchdistill.common import yaml_util
from torchdistill.common.main_util import import_dependencies, set_seed
from torchdistill.core.distillation import get_distillation_box
from torchdistill.models.official import get_vision_model

SIDES = ("teacher", "student")
REPLACING = "dependencies: ['ftfast.compat.torchdistill.replace']"


def run_config(text: str, folder: Path) -> tuple[list[dict[str, float]], Any]:
    """Every step's loss and its terms, as torchdistill's example script trains; and the box at the end."""
    path = folder / "config.yaml"
    path.write_text(text)
    set_seed(11)
    config = yaml_util.load_yaml_file(str(path))
    import_dependencies(config.get("dependencies", None))
    teacher, student = (get_vision_model(config["models"][f"{side}_model"]) for side in SIDES)
    device = torch.device("cpu")
    box = get_distillation_box(teacher, student, config["datasets"], config["train"], device, None, False, 1)
    steps = []
    for epoch in range(box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        for images, labels, further in box.train_data_loader:
            terms: dict[str, float] = {}
            hooks = [
                term.register_forward_hook(lambda m, i, value, name=name, kept=terms: kept.update({name: value.item()}))
                for name, (term, _) in box.criterion.term_dict.items()
            ]
            loss = box.forward_process(images, labels, further)
            box.post_forward_process(loss=loss)
            for hook in hooks:
                hook.remove()
            steps.append({"loss": loss.item(), **terms})
        box.post_epoch_process()
    return steps, box


def built_by(box: Any) -> set[str]:
    """The modules that define the box's networks and its loss."""
    of_stage2 = (
        box.teacher_model.paraphraser,
        box.student_model.translator,
        box.criterion.term_dict["factor_transfer"][0],
    )
    return {type(each).__module__.partition(".")[0] for each in of_stage2}
