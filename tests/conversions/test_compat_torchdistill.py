"""torchdistill's own boxes, loss and networks against ours: one YAML file, with and without one line."""

import inspect
import logging
import math
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ftfast
from ftfast.compat import torchdistill as ours
from ftfast.compat.torchdistill import registration
from tests.processes.launching import python

pytest.importorskip("torchdistill")
pytest.importorskip("torchvision")
logging.getLogger("torchdistill").setLevel(logging.ERROR)

# What the released package is called in its own code, which logs while it is imported.
from torchdistill.core.interfaces import post_epoch_proc  # noqa: E402, F401
from torchdistill.losses import high_level, mid_level  # noqa: E402, F401
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT, get_mid_level_loss  # noqa: E402
from torchdistill.models import wrapper as theirs  # noqa: E402
from torchdistill.models.registry import get_adaptation_module, get_auxiliary_model_wrapper  # noqa: E402

from tests.conversions.torchdistill_runs import REPLACING, built_by, run_config  # noqa: E402

logging.getLogger("torchdistill").setLevel(logging.ERROR)

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
FACTORS = (4, 6, 5, 3)

# The structure of torchdistill's ImageNet configuration of Factor Transfer (configs/official/ilsvrc2012/
# yoshitomo-matsubara/rrpr2020/ft-resnet18_from_resnet34.yaml), on smaller images and models, in the form that
# 1.1.5 reads.
CONFIG = """
{dependencies}
datasets:
  &train_id pictures/train: !import_call
    key: 'torchvision.datasets.ImageFolder'
    init:
      kwargs:
        root: '{root}'
        transform: !import_call
          key: 'torchvision.transforms.Compose'
          init:
            kwargs:
              transforms:
                - !import_call
                  key: 'torchvision.transforms.RandomHorizontalFlip'
                  init:
                    kwargs: {{p: 0.5}}
                - !import_call
                  key: 'torchvision.transforms.ToTensor'
                  init:
models:
  teacher_model:
    key: 'resnet18'
    kwargs: {{num_classes: 3, weights: null}}
  student_model:
    key: 'resnet18'
    kwargs: {{num_classes: 3, weights: null}}
train:
  stage1:
    num_epochs: 1
    train_data_loader: &loader
      dataset_id: *train_id
      sampler:
        class_or_func: !import_get
          key: 'torch.utils.data.RandomSampler'
        kwargs:
      kwargs: {{batch_size: 4, num_workers: 0}}
    teacher:
      forward_proc: 'forward_batch_only'
      sequential: []
      auxiliary_model_wrapper:
        key: &teacher_key '{prefix}Teacher4FactorTransfer'
        kwargs:
          minimal:
            sequential: ['conv1', 'bn1', 'relu', 'maxpool', 'layer1', 'layer2', 'layer3']
          input_module_path: &teacher_in 'teacher_model.layer3'
          paraphraser_kwargs: &paraphraser_kwargs
            k: 0.125
            num_input_channels: 256
            kernel_size: 3
            stride: 1
            padding: 1
            uses_bn: {uses_bn}
          paraphraser_ckpt: &paraphraser_ckpt '{checkpoint}'
          uses_decoder: True
      forward_hook:
        input: []
        output: [*teacher_in, 'paraphraser']
      requires_grad: True
      frozen_modules: ['teacher_model']
    student:
      forward_proc: 'forward_batch_only'
      auxiliary_model_wrapper:
        key: 'EmptyModule'
      sequential: []
      forward_hook:
        input: []
        output: []
      requires_grad: False
    optimizer:
      key: 'SGD'
      kwargs: {{lr: 0.01, momentum: 0.9, weight_decay: 0.0001}}
    criterion:
      key: 'WeightedSumLoss'
      kwargs:
        sub_terms:
          reconst:
            criterion:
              key: 'MSELoss'
              kwargs: {{reduction: 'mean'}}
            criterion_wrapper:
              key: 'SimpleLossWrapper'
              kwargs:
                input: {{is_from_teacher: True, module_path: 'paraphraser', io: 'output'}}
                target: {{is_from_teacher: True, module_path: *teacher_in, io: 'output'}}
            weight: 1.0
  stage2:
    num_epochs: 1
    train_data_loader: *loader
    teacher:
      forward_proc: 'forward_batch_only'
      sequential: []
      auxiliary_model_wrapper:
        key: *teacher_key
        kwargs:
          minimal:
          input_module_path: *teacher_in
          paraphraser_kwargs: *paraphraser_kwargs
          paraphraser_ckpt: *paraphraser_ckpt
          uses_decoder: False
      forward_hook:
        input: []
        output: [*teacher_in, 'paraphraser']
      requires_grad: False
    student:
      forward_proc: 'forward_batch_only'
      sequential: []
      auxiliary_model_wrapper:
        key: '{prefix}Student4FactorTransfer'
        kwargs:
          input_module_path: 'student_model.layer3'
          translator_kwargs:
            num_input_channels: 256
            num_output_channels: 32
            kernel_size: 3
            stride: 1
            padding: 1
            uses_bn: {uses_bn}
      forward_hook:
        input: []
        output: ['student_model.layer3', 'translator']
      requires_grad: True
      frozen_modules: []
    optimizer:
      key: 'SGD'
      kwargs: {{lr: 0.001, momentum: 0.9, weight_decay: 0.0001}}
    scheduler:
      key: 'MultiStepLR'
      kwargs: {{milestones: [30, 60, 90], gamma: 0.1}}
    criterion:
      key: 'WeightedSumLoss'
      kwargs:
        sub_terms:
          ce:
            criterion:
              key: 'CrossEntropyLoss'
              kwargs: {{reduction: 'mean'}}
            criterion_wrapper:
              key: 'SimpleLossWrapper'
              kwargs:
                input: {{is_from_teacher: False, module_path: '.', io: 'output'}}
                target: {{uses_label: True}}
            weight: 1.0
          factor_transfer:
            criterion:
              key: '{prefix}FTLoss'
              kwargs: {{p: 1, reduction: 'mean', paraphraser_path: 'paraphraser', translator_path: 'translator'}}
            weight: 1000.0
"""


@pytest.fixture(autouse=True)
def _their_own_keys() -> Iterator[None]:
    """A test may replace torchdistill's keys; the next finds them as they were."""
    ours.restore_keys()
    yield
    ours.restore_keys()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three folders of four random pictures of 48 x 48."""
    from torchvision.utils import save_image

    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(5)
    for label in range(3):
        (root / f"class{label}").mkdir()
        for number in range(4):
            picture = torch.rand(3, 48, 48, generator=generator) * (label + 1) / 3
            save_image(picture, root / f"class{label}" / f"{number}.png")
    return root


NAMING = "dependencies:\n  - name: 'ftfast.compat.torchdistill'"


def configured(folder: Path, pictures: Path, dependencies: str = "", prefix: str = "", uses_bn: bool = False) -> str:
    folder.mkdir(exist_ok=True)
    return CONFIG.format(
        dependencies=dependencies,
        prefix=prefix,
        root=pictures.as_posix(),
        checkpoint=(folder / "paraphraser.pt").as_posix(),
        uses_bn=uses_bn,
    )


@pytest.mark.parametrize("uses_bn", [False, True], ids=["plain", "batch norm"])
@pytest.mark.parametrize(("line", "prefix"), [(REPLACING, ""), (NAMING, "ftfast.")], ids=["replacing", "by our keys"])
def test_a_yaml_logs_the_same_losses_with_one_line_more(tmp_path, pictures, line, prefix, uses_bn):
    expected, their_box = run_config(configured(tmp_path / "a", pictures, uses_bn=uses_bn), tmp_path)
    assert built_by(their_box) == {"torchdistill"}
    text = configured(tmp_path / "b", pictures, line, prefix, uses_bn)
    sys.modules.pop("ftfast.compat.torchdistill.replace", None)  # as in a process of its own
    found, our_box = run_config(text, tmp_path)
    assert built_by(our_box) == {"ftfast"}
    assert len(found) == len(expected) == 6
    assert {name for step in found for name in step} == {"loss", "reconst", "ce", "factor_transfer"}
    for number, (step, other) in enumerate(zip(found, expected, strict=True)):
        assert step.keys() == other.keys()
        # After two steps of the student a sign near 0 that rounding turned may show, by the processor's rounding.
        tolerance = 1e-3 if number == 5 else 1e-5
        for name in step:
            assert step[name] == pytest.approx(other[name], rel=tolerance), f"step {number}, {name}"
    states = [torch.load(tmp_path / side / "paraphraser.pt", weights_only=True) for side in "ab"]
    assert list(states[0]) == list(states[1])
    for key in states[0]:
        torch.testing.assert_close(states[1][key], states[0][key], rtol=1e-4, atol=1e-9)


def test_the_two_runs_would_differ_if_a_loss_did(tmp_path, pictures, monkeypatch):
    """What the comparison above sees: a hundred-thousandth of the loss."""
    expected, _ = run_config(configured(tmp_path / "a", pictures), tmp_path)
    forward = mid_level.FTLoss.forward
    monkeypatch.setattr(mid_level.FTLoss, "forward", lambda self, *a, **k: forward(self, *a, **k) * (1 + 3e-5))
    found, _ = run_config(configured(tmp_path / "b", pictures), tmp_path)
    assert found[3]["factor_transfer"] != pytest.approx(expected[3]["factor_transfer"], rel=1e-5)


# --- The loss ------------------------------------------------------------------------------------------------------


def io_dicts(student: Tensor, teacher: Tensor) -> tuple[dict, dict]:
    return {"translator": {"output": student}}, {"paraphraser": {"output": teacher}}


def maps(dtype: torch.dtype = torch.float64, layout: str = "nchw") -> tuple[Tensor, Tensor]:
    student, teacher = (
        F.leaky_relu(torch.randn(FACTORS), 0.1).to(dtype).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2)
    )
    return student.requires_grad_(), teacher


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


OPTIONS = [(p, reduction) for p in (1, 2, 1.0, 1.5, 3, math.inf) for reduction in ("mean", "sum", "none")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("p", "reduction"), OPTIONS, ids=[f"{p}-{reduction}" for p, reduction in OPTIONS])
def test_the_loss_is_theirs_in_double(p, reduction, layout):
    student, teacher = maps(layout=layout)
    results = []
    for module in (ours.FTLoss(p, reduction), mid_level.FTLoss(p, reduction)):
        value = module(*io_dicts(student, teacher), torch.zeros(4), any_keyword=None)
        results.append((value, torch.autograd.grad(value.sin().sum(), student)[0]))
    (value, gradient), (expected, expected_gradient) = results
    assert value.dtype == torch.float64
    assert relative_error(value, expected) < 1e-12
    assert relative_error(gradient, expected_gradient) < 1e-10


def test_none_is_elementwise_for_p_of_1_and_a_sum_for_others():
    student, teacher = maps()
    assert ours.FTLoss(reduction="none")(*io_dicts(student, teacher)).shape == (4, 90)
    assert ours.FTLoss(2, "none")(*io_dicts(student, teacher)).shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("p", "reduction"), OPTIONS, ids=[f"{p}-{reduction}" for p, reduction in OPTIONS])
def test_the_loss_is_right_in_every_dtype(p, reduction, dtype):
    student, teacher = maps(dtype, "channels_last")
    value = ours.FTLoss(p, reduction)(*io_dicts(student, teacher))
    assert value.dtype == torch.float32
    exact = mid_level.FTLoss(p, reduction)(*io_dicts(student.double(), teacher.double()))
    assert relative_error(value, exact) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("p", "reduction"), [(1, "mean"), (1, "none"), (2, "sum"), (3, "mean")])
def test_a_zero_sample_is_finite_where_theirs_is_nan(p, reduction, dtype):
    student, teacher = maps(dtype)
    with torch.no_grad():
        student[1] = teacher[2] = 0
    assert mid_level.FTLoss(p, reduction)(*io_dicts(student, teacher)).isnan().any()
    value = ours.FTLoss(p, reduction)(*io_dicts(student, teacher))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.isfinite().all()
    assert gradient[[0, 2, 3]].isfinite().all()


def test_large_float16_factors_are_right_where_theirs_is_zero():
    student, teacher = (maps(torch.float16)[1] * 20000 for _ in range(2))
    assert mid_level.FTLoss()(*io_dicts(student, teacher)) == 0
    exact = mid_level.FTLoss()(*io_dicts(student.double(), teacher.double()))
    assert relative_error(ours.FTLoss()(*io_dicts(student, teacher)), exact) < 1e-5


def test_the_loss_finds_other_paths_and_may_be_changed():
    student, teacher = maps()
    loss = ours.FTLoss(paraphraser_path="a.b", translator_path="c")
    found = loss({"c": {"output": student}}, {"a.b": {"output": teacher}})
    assert relative_error(found, mid_level.FTLoss()(*io_dicts(student, teacher))) < 1e-12
    loss.norm_p, loss.reduction, loss.translator_path, loss.paraphraser_path = 2, "sum", "translator", "paraphraser"
    expected = mid_level.FTLoss(2, "sum")(*io_dicts(student, teacher))
    assert relative_error(loss(*io_dicts(student, teacher)), expected) < 1e-12


# --- The networks --------------------------------------------------------------------------------------------------

NETWORKS = {
    "Paraphraser4FactorTransfer": {"k": 0.8, "num_input_channels": 6},
    "Translator4FactorTransfer": {"num_input_channels": 6, "num_output_channels": 4},
}
VARIANTS: list[dict[str, Any]] = [
    {"uses_bn": False},
    {},
    {"uses_bn": False, "kernel_size": 1, "padding": 0},
    {"uses_bn": False, "kernel_size": 5, "padding": 2},
    {"uses_bn": False, "stride": 2},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_their_keys_initial_weights_and_numbers(name, variant):
    built = []
    for source in (ours, theirs):
        torch.manual_seed(3)
        built.append(getattr(source, name)(**NETWORKS[name], **variant))
    mine, other = built
    assert list(mine.state_dict()) == list(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), other.state_dict().values(), strict=True))
    mine.load_state_dict(other.state_dict(), strict=True)
    x = torch.randn(3, 6, 7, 5)
    exact = other.double()(x.double())
    assert relative_error(mine(x), exact) < 1e-5
    mine.load_state_dict(other.state_dict())
    assert relative_error(mine.double()(x.double()), exact) < 1e-12


@pytest.mark.parametrize("name", ["FTLoss", *NETWORKS])
def test_arguments_and_defaults_are_theirs(name):
    source = mid_level if name == "FTLoss" else theirs

    def plain(cls: type) -> list[inspect.Parameter]:
        parameters = inspect.signature(cls).parameters.values()
        return [each.replace(annotation=inspect.Parameter.empty) for each in parameters]

    assert plain(getattr(ours, name)) == plain(getattr(source, name))


def test_a_paraphraser_without_its_decoder_gives_factors():
    network = ours.Paraphraser4FactorTransfer(0.5, 6, uses_bn=False)
    x = torch.randn(2, 6, 5, 5)
    assert network(x).shape == x.shape
    network.uses_decoder = False
    assert network(x).shape == (2, 3, 5, 5)
    assert torch.equal(network(x), network.encoder(x))


def test_the_translator_is_a_sequence():
    translator = ours.Translator4FactorTransfer(6, 4, uses_bn=False)
    assert isinstance(translator, nn.Sequential)
    assert [type(layer) for layer in translator] == [nn.Conv2d, nn.LeakyReLU] * 3


# --- Registration --------------------------------------------------------------------------------------------------


def test_keys_of_ours_are_known_to_torchdistill():
    assert type(get_mid_level_loss({"key": "ftfast.FTLoss", "kwargs": {}})) is ours.FTLoss
    translator = get_adaptation_module("ftfast.Translator4FactorTransfer", num_input_channels=6, num_output_channels=4)
    assert type(translator) is ours.Translator4FactorTransfer
    paraphraser = get_adaptation_module("ftfast.Paraphraser4FactorTransfer", k=0.5, num_input_channels=6)
    assert type(paraphraser) is ours.Paraphraser4FactorTransfer


def test_its_own_keys_stay_until_they_are_replaced():
    def kinds() -> set[str]:
        student = get_auxiliary_model_wrapper("Student4FactorTransfer", **student_arguments())
        loss = get_mid_level_loss({"key": "FTLoss", "kwargs": {}})
        by_name = theirs.Paraphraser4FactorTransfer
        return {each.__module__.partition(".")[0] for each in (type(student.translator), type(loss), by_name)}

    assert kinds() == {"torchdistill"}
    ours.replace_keys()
    ours.replace_keys()
    assert kinds() == {"ftfast"}
    ours.restore_keys()
    ours.restore_keys()
    assert kinds() == {"torchdistill"}


def student_arguments() -> dict[str, Any]:
    return {
        "student_model": nn.Identity(),
        "input_module_path": "student_model",
        "translator_kwargs": NETWORKS["Translator4FactorTransfer"],
        "device": torch.device("cpu"),
        "device_ids": None,
        "distributed": False,
    }


def test_a_wrapper_of_another_that_builds_its_networks_by_name_gets_ours_once_replaced():
    class Another(theirs.Student4FactorTransfer):
        pass

    ours.replace_keys()
    assert type(Another(**student_arguments()).translator) is ours.Translator4FactorTransfer


def test_our_wrapper_leaves_torchdistills_names_as_they_were():
    wrapper = get_auxiliary_model_wrapper("ftfast.Student4FactorTransfer", **student_arguments())
    assert type(wrapper.translator) is ours.Translator4FactorTransfer
    assert isinstance(wrapper, theirs.AuxiliaryModelWrapper)
    assert theirs.Translator4FactorTransfer.__module__.startswith("torchdistill")


def in_a_process_of_its_own(program: str) -> str:
    finished = python("-c", program)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


@pytest.mark.process
def test_without_torchdistill_the_classes_import_and_registering_names_the_extra():
    program = """
import sys
sys.modules["torchdistill"] = None
import torch
from ftfast.compat.torchdistill import FTLoss, Translator4FactorTransfer, register
print(Translator4FactorTransfer(2, 2)(torch.ones(2, 2, 3, 3)).shape[1], FTLoss().norm_p)
for attempt in (register, lambda: __import__("ftfast.compat.torchdistill.replace")):
    try:
        attempt()
    except ImportError as error:
        print(error)
"""
    lines = in_a_process_of_its_own(program).splitlines()
    sentence = "torchdistill is not installed, and these classes register with it; pip install 'ftfast[peers]'."
    assert lines == ["2 1", sentence, sentence]


@pytest.mark.process
def test_one_line_registers_in_a_fresh_process():
    program = """
import logging
from torchdistill.common.main_util import import_dependencies
import_dependencies(["ftfast.compat.torchdistill.replace"])
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT as losses
import torchdistill.losses.mid_level
print(losses["FTLoss"].__module__, losses["ftfast.FTLoss"].__module__)
"""
    assert in_a_process_of_its_own(program).splitlines()[-1] == " ".join(["ftfast.compat.torchdistill.loss"] * 2)


@pytest.fixture
def _looked_for_anew() -> Iterator[None]:
    registration._torchdistill.cache_clear()
    yield
    registration._torchdistill.cache_clear()


@pytest.mark.usefixtures("_looked_for_anew")
def test_an_unknown_version_is_warned_about_once_and_used(monkeypatch):
    monkeypatch.setattr(registration, "_version", lambda: "9.0.0")
    with pytest.warns(UserWarning, match="tested with torchdistill 1.1.5, and this is 9.0.0"):
        ours.register()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.register()
    assert MIDDLE_LEVEL_LOSS_DICT["ftfast.FTLoss"] is ours.FTLoss


@pytest.mark.usefixtures("_looked_for_anew")
def test_a_torchdistill_without_the_known_names_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(registration, "_version", lambda: "9.0.0")
    monkeypatch.setattr(registration, "import_module", lambda name: types.ModuleType(name))
    with pytest.raises(ImportError, match=r"torchdistill 9.0.0 cannot be registered with .* tested with 1.1.5\.$"):
        ours.register()
    with pytest.warns(UserWarning, match="ftfast's classes are not registered: torchdistill 9.0.0"):
        registration.try_to_register()


# --- What they do not take -----------------------------------------------------------------------------------------


def test_paths_that_no_hook_keeps_are_said_with_both_sides():
    student, teacher = maps()
    dicts = ({"translator": {"output": student}, ".": {}}, {"paraphraser": {"output": teacher}, "layer4": {}})
    with pytest.raises(LookupError) as raised:
        ours.FTLoss(paraphraser_path="layer4")(*dicts)
    assert str(raised.value) == (
        "paraphraser_path is 'layer4', and the teacher's hooks have kept no output of it; outputs are kept of "
        "'paraphraser' (teacher) and 'translator' (student), so name one of the teacher's, or add 'layer4' to its "
        "forward_hook."
    )
    with pytest.raises(LookupError, match="translator_path is 'trans', and the student's hooks"):
        ours.FTLoss(translator_path="trans")(*dicts)


def test_a_yaml_whose_wrapper_reads_an_unhooked_module_is_said_with_the_hooked_ones(tmp_path, pictures):
    text = configured(tmp_path, pictures, NAMING, "ftfast.").replace(
        "output: [*teacher_in, 'paraphraser']", "output: ['teacher_model.layer2', 'paraphraser']"
    )
    message = (
        "input_module_path is 'teacher_model.layer3', and the teacher's hooks .* but of .*'teacher_model.layer2'.*"
        "forward_hook.$"
    )
    with pytest.raises(LookupError, match=message):
        run_config(text, tmp_path)


def test_a_paraphraser_checkpoint_of_another_layout_is_said_with_both_keys(tmp_path, pictures):
    torch.save(ftfast.Paraphraser(256, 0.125).state_dict(), tmp_path / "paraphraser.pt")
    message = r"has encoder.1.weight, .*\.Paraphraser4FactorTransfer does not take, and lacks encoder.4.weight, "
    with pytest.raises(RuntimeError, match=message) as raised:
        run_config(configured(tmp_path, pictures, NAMING, "ftfast."), tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"reduction": "batchmean"}, ValueError, "reduction is 'batchmean'; it takes"),
        ({"p": 2, "reduction": "batchmean"}, ValueError, "reduction is 'batchmean'; it takes"),
        ({"p": "2"}, TypeError, "p is '2'; it takes a number"),
        ({"p": float("nan")}, TypeError, "p is nan; it takes a number"),
        ({"translator_path": None}, TypeError, "translator_path is None; it takes a module's path"),
    ],
)
def test_options_are_refused_in_one_sentence(arguments, error, message):
    with pytest.raises(error, match=message):
        ours.FTLoss(**arguments)


def test_unknown_options_are_named_in_a_warning():
    with pytest.warns(UserWarning, match="FTLoss ignores norm_p; it takes p, reduction"):
        assert ours.FTLoss(norm_p=2).norm_p == 1


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"p": 3}], ids=str)
def test_factors_of_unlike_size_are_refused_in_one_sentence(options):
    with pytest.raises(ValueError, match=r"student_factor has shape \(4, 6\) and teacher_factor \(4, 7\)"):
        ours.FTLoss(**options)(*io_dicts(torch.ones(4, 6), torch.ones(4, 7)))
    with pytest.raises(TypeError, match="factor is a str"):
        ours.FTLoss(**options)(*io_dicts(torch.ones(4, 6), "factor"))
