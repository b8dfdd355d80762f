"""A convolution with batch norm, residual and ReLU in one call is what the modules give, in value and gradient."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftfast.distillation.models import registry, training_graph
from ftfast.distillation.models.training_graph import training_forward
from ftfast.distillation.runtime.seeds import seeded
from ftfast.extension import load_extension
from ftfast.ops.batch_norm import Layer, can_run, convolution_norm, fits

pytestmark = pytest.mark.skipif(load_extension()[0] is None, reason="the extension is not built")

# How far a result may be from float64's: a few roundings of its dtype, as a share of its norm.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}
SHAPES = [  # samples, channels, size, results, kernel, stride
    pytest.param((8, 16, 8, 16, 3, 1), id="16-channels"),
    pytest.param((4, 64, 4, 64, 3, 1), id="64-channels"),
    pytest.param((5, 3, 7, 12, 3, 1), id="few-odd-channels"),
    pytest.param((3, 24, 5, 100, 3, 2), id="strided"),
    pytest.param((6, 16, 6, 32, 1, 2), id="1x1"),
    pytest.param((2, 5, 9, 1, 5, 3), id="one-result"),
]


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def layer_of(shape: tuple[int, ...], relu: bool = True) -> Layer:
    _, channels, _, results, kernel, stride = shape
    with seeded(3):
        convolution = nn.Conv2d(channels, results, kernel, stride=stride, padding=kernel // 2, bias=False)
        norm = nn.BatchNorm2d(results)
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return Layer(convolution, norm, relu)


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An input and a residual, which both dtypes hold exactly."""
    samples, channels, size, results, kernel, stride = shape
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, channels, size, size, generator=generator).bfloat16().to(dtype)
    after = (size + 2 * (kernel // 2) - kernel) // stride + 1
    residual = torch.randn(samples, results, after, after, generator=generator).bfloat16().to(dtype)
    return (
        x.contiguous(memory_format=torch.channels_last).requires_grad_(),
        residual.contiguous(memory_format=torch.channels_last).requires_grad_(),
    )


def by_modules(layer: Layer, x: Tensor, residual: Tensor | None) -> Tensor:
    y = layer.norm(layer.convolution(x))
    y = y if residual is None else y + residual
    return F.relu(y) if layer.relu else y


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))


def results(layer: Layer, y: Tensor, gradient: Tensor, *inputs: Tensor | None) -> dict[str, Tensor]:
    y.backward(gradient.to(y.dtype))
    found = {"y": y, "weight": layer.convolution.weight.grad, "scale": layer.norm.weight.grad}
    found |= {"bias": layer.norm.bias.grad, "mean": layer.norm.running_mean, "variance": layer.norm.running_var}
    return found | {f"input {i}": tensor.grad for i, tensor in enumerate(inputs) if tensor is not None}


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("has_residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_gradients_and_statistics_are_float64s(
    shape: tuple[int, ...], dtype: torch.dtype, has_residual: bool, relu: bool
) -> None:
    def layer() -> Layer:
        made = layer_of(shape, relu)
        made.convolution.weight.data = made.convolution.weight.data.bfloat16().float()  # exact in every dtype
        return made

    def forward(layer: Layer) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            assert fits(layer.convolution, layer.norm)
            assert can_run(layer, x, residual)
            return convolution_norm(layer, x, residual)[0]

    x, residual = operands(shape, dtype)
    residual = residual if has_residual else None
    exact_inputs = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in (x, residual)]
    exact, native = layer(), layer()
    exact.convolution.double(), exact.norm.double()
    expected_y = by_modules(exact, *exact_inputs)
    gradient = torch.randn(expected_y.shape, generator=torch.Generator().manual_seed(6)).bfloat16()
    if relu:  # a number at the ReLU's edge may pass in one and not in the other
        gradient = gradient * ((forward(layer()) > 0) == (expected_y > 0))
    y = forward(native)
    assert y.dtype == dtype
    found = results(native, y, gradient, x, residual)
    expected = results(exact, expected_y, gradient, *exact_inputs)
    errors = {name: relative(found[name], expected[name]) for name in expected}
    assert max(errors.values()) <= LIMITS[dtype], errors
    assert native.norm.num_batches_tracked == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_bit_is_the_same_again_and_on_one_thread(dtype: torch.dtype) -> None:
    shape = (16, 16, 9, 32, 3, 1)
    runs = []
    for threads in (2, 2, 1):
        torch.set_num_threads(threads)
        layer = layer_of(shape)
        x, residual = operands(shape, dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y, _ = convolution_norm(layer, x, residual)
        runs.append(results(layer, y, torch.ones_like(y), x, residual))
    for name, tensor in runs[0].items():
        if name not in ("weight", "input 0") or dtype == torch.bfloat16:  # oneDNN's own sums in float32 are its matter
            assert torch.equal(tensor, runs[1][name])
        if name in ("scale", "bias", "mean", "variance"):
            assert relative(tensor, runs[2][name]) < 1e-5


def test_a_mean_far_from_zero_leaves_the_variance_exact() -> None:
    layer = Layer(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), False)
    nn.init.eye_(layer.convolution.weight.data.view(4, 4))
    x = 1000 + torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    y, _ = convolution_norm(layer, x)
    expected = nn.BatchNorm2d(4).double()(x.double())
    assert relative(y, expected) < 2e-4  # what float32's rounding of x leaves


def test_a_nan_is_not_hidden_by_the_relu() -> None:
    layer = layer_of((2, 3, 4, 4, 3, 1))
    x, _ = operands((2, 3, 4, 4, 3, 1), torch.float32)
    with torch.no_grad():
        x[0, 0, 0, 0] = float("nan")
    assert convolution_norm(layer, x)[0].isnan().all()


def test_one_number_a_channel_is_refused() -> None:
    layer = layer_of((1, 3, 1, 4, 3, 1))
    with pytest.raises(ValueError, match="single number for each channel"):
        convolution_norm(layer, torch.randn(1, 3, 1, 1))


@pytest.mark.parametrize("wanted", ["x", "residual", "weight"])
def test_only_the_gradients_that_are_wanted_are_given(wanted: str) -> None:
    shape = (4, 16, 5, 16, 3, 1)
    layer = layer_of(shape)
    x, residual = operands(shape, torch.float32)
    tensors = {"x": x, "residual": residual, "weight": layer.convolution.weight}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    layer.norm.requires_grad_(False)
    y, _ = convolution_norm(layer, x, residual)
    y.sum().backward()
    assert [name for name, tensor in tensors.items() if tensor.grad is not None] == [wanted]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_other_readers_of_the_input_are_added(stride: int, dtype: torch.dtype) -> None:
    shape = (4, 16, 6, 16, 3, stride)
    layer = layer_of(shape)
    gradients = []
    for passes in (True, False):
        x, _ = operands(shape, dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y, passed = convolution_norm(layer, x)
        other = (passed if passes else x).double().square().sum()
        (y.double().sum() + other).backward()
        gradients.append(x.grad)
    assert relative(*gradients) < LIMITS[dtype]


STUDENTS = {  # model, width, shortcut, layer
    "resnet": ("resnet8", 16, "identity", "stage3"),
    "projections": ("resnet8", 8, "projection", "stage3"),
    "wide-resnet": ("wrn-10-1", 16, "identity", "stage3"),
    "vgg": ("vgg13", 8, "identity", "stage5"),
    "torchvision": ("torchvision/resnet18", 0, "identity", "layer4"),
}


def student_of(name: str) -> tuple[nn.Module, str]:
    model, width, shortcut, layer = STUDENTS[name]
    return registry.build_model(model, width, in_channels=3, classes=5, seed=1, shortcut=shortcut), layer


@pytest.mark.parametrize("name", list(STUDENTS))
def test_a_students_graph_trains_as_its_modules_do(name: str) -> None:
    student, layer = student_of(name)
    student = student.to(memory_format=torch.channels_last).train()
    twin = copy.deepcopy(student)
    graph = training_graph.fused_graph(student, layer)
    count = sum(isinstance(module, training_graph.ConvolutionNorm) for module in graph.modules())
    assert count >= 3
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for net, fused in ((student, True), (twin, False)):
        outputs = training_forward(net, layer, compiled=False, fused=fused)(images)
        (outputs.logits.square().sum() + outputs.features.square().sum()).backward()
    for (key, parameter), expected in zip(student.named_parameters(), twin.parameters(), strict=True):
        if float(expected.grad.norm()) > 1e-4:  # a bias before a batch norm has none
            assert relative(parameter.grad, expected.grad) < 2e-3, key
        else:
            assert float(parameter.grad.norm()) <= 1e-4, key
    for (key, buffer), expected in zip(student.named_buffers(), twin.buffers(), strict=True):
        assert relative(buffer, expected) < 1e-5, key


def test_a_student_in_eval_runs_as_its_modules_do() -> None:
    student = student_of("resnet")[0].eval()
    images = torch.randn(2, 3, 16, 16)
    forward = training_forward(student, registry.LAST_STAGE, compiled=False, fused=True)
    assert torch.equal(forward(images).logits, student(images))


def test_modules_with_hooks_are_left_alone() -> None:
    student = student_of("resnet")[0].train()
    seen = []
    student.norm.register_forward_hook(lambda *_: seen.append(1))
    training_forward(student, registry.LAST_STAGE, compiled=False, fused=True)(torch.randn(2, 3, 16, 16))
    assert seen == [1]
