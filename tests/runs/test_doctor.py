"""ftfast.doctor: every fault is found in a step that has it, and nothing in one that has none."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ftfast
from ftfast.diagnosis.doctor import Finding


class Network(nn.Module):
    """Two convolutions, whose last map is the features, and a classifier."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.features = nn.Conv2d(channels, channels, 3, padding=1)
        self.classifier = nn.Linear(channels, 5)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.features(F.relu(self.norm(self.first(images))))
        return self.classifier(maps.mean((2, 3))), maps


class Features(nn.Module):
    """A network up to its features."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        network = self.network
        return network.features(F.relu(network.norm(network.first(images))))


class Step(NamedTuple):
    student: Network
    teacher: nn.Module
    head: ftfast.FactorTransfer
    optimizer: torch.optim.Optimizer
    batch: tuple[Tensor, Tensor]

    def findings(self, loss: Callable[..., Tensor]) -> list[Finding]:
        return ftfast.doctor(self.student, self.teacher, loss, self.batch, self.optimizer)


def well(weight: float = 250.0, reduction: str = "mean") -> Step:
    """Everything as it should be, with a teacher that stops at its features."""
    torch.manual_seed(0)
    student, teacher = Network(8), Features(Network(16)).eval().requires_grad_(False)
    head = ftfast.FactorTransfer(
        ftfast.Paraphraser(16), ftfast.Translator(8, 8), weight=weight, reduction=reduction, backend="reference"
    )
    for model in (student, teacher, head):
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD([*student.parameters(), *head.translator.parameters()], lr=0.1)
    images = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    return Step(student, teacher, head, optimizer, (images, torch.arange(4)))


def loss_of(step: Step, *, autocast: bool = True, graph: bool = False, detach: bool = False) -> Callable[..., Tensor]:
    def loss(student: nn.Module, teacher: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with torch.set_grad_enabled(graph):
                taught = teacher(images)
            maps = taught[1] if isinstance(taught, tuple) else taught
            logits, features = student(images)
            transfer = step.head(features, maps.detach() if detach else maps)
            return F.cross_entropy(logits.float(), labels) + transfer

    return loss


def problems(findings: list[Finding]) -> list[str]:
    return [finding.problem for finding in findings]


def test_a_step_as_it_should_be_has_no_findings() -> None:
    step = well()
    assert step.findings(loss_of(step)) == []


def test_a_teacher_in_train_mode_is_wrong() -> None:
    step = well()
    step.teacher.train()
    (finding,) = step.findings(loss_of(step))
    assert finding.wrong
    assert "train mode" in finding.problem
    assert "network.norm" in finding.problem


def test_a_teacher_under_autograd_is_slow() -> None:
    step = well()
    step.teacher.requires_grad_(True)
    found = step.findings(loss_of(step, graph=True, detach=True))
    assert len(found) == 1
    assert "autograd" in found[0].problem
    assert not found[0].wrong


def test_gradients_that_reach_the_teacher_are_counted_as_time() -> None:
    step = well()
    step.teacher.requires_grad_(True)
    step = step._replace(head=step.head.requires_grad_(True))
    # A paraphraser of one's own, under autograd as in the official code.
    paraphraser = copy.deepcopy(step.head.paraphraser).requires_grad_(True)

    def loss(student: nn.Module, teacher: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        logits, features = student(images)
        factor = step.head.translator(features)
        return F.cross_entropy(logits, labels) + 250 * ftfast.ft_loss(factor, paraphraser.encode(teacher(images)))

    found = problems(step.findings(loss))
    assert any("autograd" in problem for problem in found)
    thrown_away = sum(parameter.numel() for name, parameter in paraphraser.named_parameters() if "encoder" in name)
    assert any(f"{thrown_away:,} numbers" in problem for problem in found)


def test_a_teacher_inside_the_optimizer_is_wrong() -> None:
    step = well()
    step.optimizer.add_param_group({"params": list(step.teacher.parameters())})
    (finding,) = step.findings(loss_of(step))
    assert finding.wrong
    assert "optimizer holds" in finding.problem


def test_a_student_outside_the_optimizer_is_wrong() -> None:
    step = well()
    optimizer = torch.optim.SGD(step.head.translator.parameters(), lr=0.1)
    (finding,) = step._replace(optimizer=optimizer).findings(loss_of(step))
    assert finding.wrong
    assert "the student's among them" in finding.problem


def test_a_classifier_that_runs_for_nothing_is_named() -> None:
    step = well()
    assert isinstance(step.teacher, Features)
    step = step._replace(teacher=step.teacher.network)
    (finding,) = step.findings(loss_of(step))
    assert "classifier" in finding.problem
    assert "for nothing" in finding.problem


def test_a_classifier_whose_logits_are_used_is_not() -> None:
    step = well()
    assert isinstance(step.teacher, Features)
    network = step.teacher.network

    def loss(student: nn.Module, teacher: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                soft, maps = teacher(batch[0])
            logits, features = student(batch[0])
            return F.kl_div(logits.log_softmax(1), soft.softmax(1), reduction="batchmean") + step.head(features, maps)

    assert step._replace(teacher=network).findings(loss) == []


def test_features_taken_by_a_hook_on_the_last_needed_layer_are_seen() -> None:
    step = well()
    assert isinstance(step.teacher, Features)
    network = step.teacher.network
    taken: list[Tensor] = []
    network.features.register_forward_hook(lambda module, inputs, output: taken.append(output))

    def loss(student: nn.Module, teacher: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                teacher(batch[0])
            logits, features = student(batch[0])
            return F.cross_entropy(logits.float(), batch[1]) + step.head(features, taken.pop())

    (finding,) = step._replace(teacher=network).findings(loss)
    assert "classifier run" in finding.problem


def test_nchw_is_slow() -> None:
    step = well()
    for model in (step.student, step.teacher, step.head):
        model.to(memory_format=torch.contiguous_format)
    step = step._replace(batch=(step.batch[0].contiguous(), step.batch[1]))
    assert any("channels_last" in problem for problem in problems(step.findings(loss_of(step))))


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_float32_is_slow_where_the_processor_has_bfloat16(has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftfast.diagnosis.doctor.has_bfloat16", lambda device: has_bfloat16)
    step = well()
    found = problems(step.findings(loss_of(step, autocast=False)))
    assert any("float32" in problem for problem in found) == has_bfloat16


@pytest.mark.parametrize(
    ("weight", "reduction", "wrong"),
    [
        (250.0, "mean", False),
        (1.0, "mean", True),
        (250.0, "batchmean", True),
        (0.5, "batchmean", False),
        (0.1, "sum", False),
    ],
)
def test_a_weight_in_another_reductions_units_is_wrong(weight: float, reduction: str, wrong: bool) -> None:
    step = well(weight, reduction)
    found = step.findings(loss_of(step))
    assert [finding.wrong for finding in found] == [True] * wrong
    if wrong:
        assert repr(reduction) in found[0].problem


def test_nothing_is_changed_by_the_look() -> None:
    step = well()
    step.student.train()
    before = copy.deepcopy((step.student.state_dict(), step.teacher.state_dict(), step.head.state_dict()))
    state = torch.random.get_rng_state()
    step.findings(loss_of(step))
    after = step.student.state_dict(), step.teacher.state_dict(), step.head.state_dict()
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert all(parameter.grad is None for parameter in step.student.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not step.student.first._forward_hooks
    assert not step.teacher._forward_hooks


def test_bad_input_is_refused_in_words() -> None:
    step = well()
    with pytest.raises(TypeError, match="teacher is a int"):
        ftfast.doctor(step.student, 3, loss_of(step), step.batch)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one number"):
        ftfast.doctor(step.student, step.teacher, lambda student, teacher, batch: student(batch[0])[0], step.batch)
    with pytest.raises(ValueError, match="undetached"):
        ftfast.doctor(step.student, step.teacher, lambda *_: torch.tensor(1.0), step.batch)
