"""torchdistill's own step of Factor Transfer: its wrappers, loss and training box, set up after its ImageNet example.

That example is ``configs/official/ilsvrc2012/yoshitomo-matsubara/rrpr2020/ft-resnet18_from_resnet34.yaml``.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from bench.training.step_peers import BETA, SGD, Operands, Step


def torchdistill(with_: Operands) -> Step:
    """float32 and NCHW, which its example trains in.

    Raises:
        ImportError: the package is not installed.
    """
    logging.getLogger("torchdistill").setLevel(logging.ERROR)
    import torchdistill.core.interfaces
    import torchdistill.losses.high_level
    import torchdistill.losses.mid_level
    import torchdistill.models.wrapper  # noqa: F401
    from torchdistill.core.distillation import DistillationBox

    logging.getLogger("torchdistill").setLevel(logging.ERROR)
    common = {"kernel_size": 3, "stride": 1, "padding": 1, "uses_bn": False}
    taught, found = with_.taught, with_.found
    config: dict[str, Any] = {
        "num_epochs": 1,
        "teacher": {
            "forward_proc": "forward_batch_only",
            "auxiliary_model_wrapper": {
                "key": "Teacher4FactorTransfer",
                "kwargs": {
                    "input_module_path": f"teacher_model.{taught.layer}",
                    "paraphraser_kwargs": {"k": 0.5, "num_input_channels": taught.channels, **common},
                    "paraphraser_ckpt": "",
                    "uses_decoder": False,
                    "minimal": None,
                },
            },
            "sequential": [],
            "forward_hook": {"input": [], "output": [f"teacher_model.{taught.layer}", "paraphraser"]},
            "requires_grad": False,
        },
        "student": {
            "forward_proc": "forward_batch_only",
            "auxiliary_model_wrapper": {
                "key": "Student4FactorTransfer",
                "kwargs": {
                    "input_module_path": f"student_model.{found.layer}",
                    "translator_kwargs": {
                        "num_input_channels": found.channels,
                        "num_output_channels": with_.translator().factor_channels,
                        **common,
                    },
                },
            },
            "sequential": [],
            "forward_hook": {"input": [], "output": [f"student_model.{found.layer}", "translator"]},
            "requires_grad": True,
        },
        "optimizer": {"key": "SGD", "kwargs": {**SGD, "nesterov": True}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {
                    "ce": {
                        "criterion": {"key": "CrossEntropyLoss", "kwargs": {"reduction": "mean"}},
                        "criterion_wrapper": {
                            "key": "SimpleLossWrapper",
                            "kwargs": {
                                "input": {"is_from_teacher": False, "module_path": ".", "io": "output"},
                                "target": {"uses_label": True},
                            },
                        },
                        "weight": 1.0,
                    },
                    "ft": {
                        "criterion": {
                            "key": "FTLoss",
                            "kwargs": {
                                "p": 1,
                                "reduction": "mean",
                                "paraphraser_path": "paraphraser",
                                "translator_path": "translator",
                            },
                        },
                        "weight": BETA,
                    },
                }
            },
        },
    }
    student = with_.student()
    box = DistillationBox(with_.teacher(), student, {}, config, with_.device, None, False, 1)
    _fill(box.teacher_model.paraphraser.encoder, with_.paraphraser())
    _fill(box.student_model.translator, with_.translator())
    box.teacher_model.eval()
    box.student_model.train()

    def run() -> Tensor:
        loss = box.forward_process(with_.images, with_.labels, None)
        box.post_forward_process(loss)
        return loss.detach()

    return Step(run, student, box.optimizer)


def _fill(layers: Any, network: Any) -> None:
    """Convolutions 0, 2 and 4 of a sequence, from one of ours."""
    with torch.no_grad():
        for place, layer in enumerate(network.encoder):
            layers[2 * place].weight.copy_(layer.weight)
            layers[2 * place].bias.copy_(layer.bias)
