"""Every operation whose kernels read memory takes tensors whose memory is not their value, in each of its places."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ftfast
from ftfast.backends.triton import interpreting
from ftfast.ops import batch_norm
from ftfast.ops.attention.difference import attention_difference
from ftfast.ops.batch_norm import Layer, convolution_norm
from ftfast.ops.conv3x3.function import conv3x3_leaky_relu
from ftfast.ops.crop_resize import Window, can_crop, crop_resize
from ftfast.ops.read_rows import read_rows

Operation = Callable[[dict[str, Tensor]], Tensor]
SHAPE = (3, 16, 6, 6)


def negated(tensor: Tensor) -> Tensor:
    return torch._neg_view(-tensor)


def zeros(tensor: Tensor) -> Tensor:
    return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def attention(given: dict[str, Tensor]) -> Tensor:
    return attention_difference(given["features"], given["teacher"])


def head(given: dict[str, Tensor]) -> Tensor:
    paraphraser, translator = ftfast.Paraphraser(16, 1.0), ftfast.Translator(16, 16)
    parameters = {"weight": given["weight"], "bias": given["bias"]}
    for module in (*paraphraser.modules(), *translator.modules()):
        for name in ("weight", "bias"):
            if isinstance(module, nn.Conv2d):
                setattr(module, name, nn.Parameter(parameters[name], requires_grad=False))
    return ftfast.FactorTransfer(paraphraser, translator)(given["features"], given["teacher"])


def layer(given: dict[str, Tensor]) -> Tensor:
    return conv3x3_leaky_relu(given["features"], given["weight"], given["bias"], 0.1, transposed=False)


def norm(given: dict[str, Tensor]) -> Tensor:
    convolution, after = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
    convolution.weight, convolution.bias = nn.Parameter(given["weight"]), nn.Parameter(given["bias"])
    built = Layer(convolution, after, relu=True)
    assert batch_norm.fits(convolution, after)
    assert batch_norm.can_run(built, given["features"], given["teacher"])
    return convolution_norm(built, given["features"], given["teacher"])[0]


OPERATIONS: dict[str, tuple[Operation, tuple[str, ...]]] = {
    "attention": (attention, ("features", "teacher")),
    "head": (head, ("features", "teacher", "weight", "bias")),
    "layer": (layer, ("features", "weight", "bias")),
    "batch norm": (norm, ("features", "teacher", "weight", "bias")),
}
CASES = [(name, place) for name, (_, places) in OPERATIONS.items() for place in (*places, "upstream")]


@pytest.mark.skipif(interpreting(), reason="the batch norm and the attention are the native backend's")
@pytest.mark.parametrize("elsewhere", [negated, zeros], ids=lambda it: it.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("operation", "place"), CASES, ids=str)
def test_a_tensor_whose_memory_is_not_its_value(operation, place, dtype, elsewhere):
    parameter_dtype = torch.float32 if operation == "batch norm" else dtype
    given = {name: torch.randn(SHAPE).to(dtype) for name in ("features", "teacher")}
    given |= {"weight": torch.randn(16, 16, 3, 3).to(parameter_dtype) / 12, "bias": torch.randn(16).to(parameter_dtype)}
    run, _ = OPERATIONS[operation]
    upstream: Tensor | None = None
    results = []
    for odd in (False, True):
        tensors = dict(given)
        if odd and place != "upstream":
            tensors[place] = elsewhere(tensors[place])
        elif place != "upstream":
            tensors[place] = elsewhere(tensors[place]).clone()
        leaf = tensors["features"] = tensors["features"].detach()
        if place != "features" or elsewhere is not zeros:  # torch adds up no gradients for such a leaf
            leaf.requires_grad_()
        result = run(tensors)
        if upstream is None:
            upstream = torch.randn_like(result)
        taken = elsewhere(upstream) if place == "upstream" else upstream
        gradients = torch.autograd.grad(result, leaf, taken if odd else taken.clone()) if leaf.requires_grad else ()
        results.append((result.detach(), *gradients))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.clone(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("statistic", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize(
    "odd", [negated, torch.Tensor.double, lambda it: it.repeat(2)[::2]], ids=["neg", "float64", "gaps"]
)
def test_a_norm_whose_tensors_cannot_be_written_where_they_lie_is_torchs(statistic, odd):
    """Its running statistics were read and written as dense float32, whatever they were."""
    convolution, after = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
    given = odd(getattr(after, statistic).detach().clone())
    if statistic in ("weight", "bias"):
        given = nn.Parameter(given)
    setattr(after, statistic, given)
    assert not batch_norm.can_run(Layer(convolution, after, relu=True), torch.randn(SHAPE))


def test_rows_are_not_read_into_memory_that_is_not_the_value(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(bytes(16))
    with path.open("rb") as file, pytest.raises(ValueError, match="lazily negated"):
        read_rows(np.array([file.fileno()]), np.array([0]), negated(torch.ones(1, 4)))


@pytest.mark.skipif(not can_crop(torch.device("cpu")), reason="Triton's alone")
def test_a_negated_photograph():
    photograph = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    window = Window(0, 0, 8, 8, 4, 4, 0, 0, False)
    expected = crop_resize([photograph], [window], 4)
    assert torch.equal(crop_resize([negated(photograph)], [window], 4), expected)


def test_a_float64_teacher_factor_of_a_float32_head():
    """The head's kernels took its loss for float32 and wrote eight bytes into four."""
    paraphraser, translator = ftfast.Paraphraser(16, 1.0), ftfast.Translator(16, 16)
    built, student, factor = ftfast.FactorTransfer(paraphraser, translator), torch.randn(SHAPE), torch.randn(SHAPE)
    loss = built(student, teacher_factor=factor.double())
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss.float(), built(student, teacher_factor=factor))


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.channels_last if tensor.dim() == 4 else torch.preserve_format)


def with_gaps(tensor: Tensor) -> Tensor:
    return torch.stack((tensor.detach(), tensor.detach()), -1)[..., 0]


def loss_of_both(given: dict[str, Tensor]) -> Tensor:
    return ftfast.ft_loss(given["features"], given["teacher"].requires_grad_())


SAVING = {name: run for name, (run, _) in OPERATIONS.items() if not interpreting() or name == "head"}


@pytest.mark.parametrize("hands_back", [contiguous, channels_last, with_gaps, negated], ids=lambda it: it.__name__)
@pytest.mark.parametrize("operation", [*SAVING, "loss"])
def test_saved_tensors_that_hooks_hand_back_in_another_order_of_memory(operation, hands_back, monkeypatch):
    """As save_on_cpu does with what is channels_last: the gradients were those of shuffled maps, without a word."""
    if interpreting():
        monkeypatch.setenv("FTFAST_BACKEND", "triton")
    given = {name: torch.randn(SHAPE) for name in ("features", "teacher")}
    given |= {"weight": torch.randn(16, 16, 3, 3) / 12, "bias": torch.randn(16)}
    given["features"].requires_grad_()
    run = SAVING.get(operation, loss_of_both)
    result = run(dict(given))
    upstream = torch.randn_like(result)
    (expected,) = torch.autograd.grad(result, given["features"], upstream)
    with torch.autograd.graph.saved_tensors_hooks(lambda it: hands_back(it.detach()), lambda it: it):
        result = run(dict(given))
    (got,) = torch.autograd.grad(result, given["features"], upstream)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_a_factor_that_is_freed_before_backward_is_named():
    """It was a segmentation fault, as in torch's own operators; forward said so already."""
    student, teacher = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(3, 4)
    loss = ftfast.ft_loss(student, teacher)
    teacher.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"\(3, 4\) has no memory behind it"):
        (7.25 * loss).backward()  # which forward did not write the gradient for
