"""The whole head against float64: the loss, the student's gradient and that of every translator parameter."""

import copy
import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ftfast
from ftfast import reference
from ftfast.backends.triton import interpreting
from ftfast.diagnosis.check_loss import relative_error
from ftfast.ops import remembered
from ftfast.ops.ft_head import stack
from ftfast.ops.ft_head.plan import known_plans

pytestmark = pytest.mark.usefixtures("ieee_float32", "overflow_unchecked")

# samples, student's channels, teacher's, factor's, height, width
SHAPES = [(1, 16, 16, 8, 4, 4), (3, 12, 20, 10, 7, 7), (5, 24, 12, 16, 3, 5), (2, 3, 5, 2, 1, 1)]
SHAPE = SHAPES[1]
if interpreting():  # which takes a second for an image
    SHAPE = (2, *SHAPE[1:])


@pytest.fixture(autouse=True)
def _few_shares_of_the_images(monkeypatch):
    """Of a weight's gradient; all five are in test_ft_head_small_triton.py."""
    if interpreting():
        monkeypatch.setattr("ftfast.kernels.ft_head.ft_head_small_weights.SHARES", 2)


@pytest.fixture(autouse=True)
def _a_backend_with_a_head(request):
    if {"backend", "device"} <= set(request.fixturenames):
        pair = request.getfixturevalue("backend"), request.getfixturevalue("device")
        if pair == ("native", "cuda"):
            pytest.skip("CUDA C++ has the loss alone")


def make_head(shape=SHAPE, norm=None, slope=0.1, backend="auto", **options):
    _, student, teacher, factor, _, _ = shape
    paraphraser = ftfast.Paraphraser(teacher, factor_channels=factor, norm=norm, negative_slope=slope)
    if norm:
        for layer in paraphraser.norm:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            layer.weight.data.uniform_(0.5, 2)
            layer.bias.data.normal_()
    translator = ftfast.Translator(student, factor, negative_slope=slope)
    return ftfast.FactorTransfer(paraphraser, translator, backend=backend, **options)


def make_features(shape=SHAPE, dtype=torch.float32, device="cpu"):
    samples, student, teacher, _, height, width = shape
    of_student, of_teacher = (torch.randn(samples, count, height, width) for count in (student, teacher))
    return of_student.to(device, dtype).requires_grad_(), of_teacher.to(device, dtype)


def results(head, student, teacher, upstream=None, teacher_factor=None, autocast=None):
    """The loss and every gradient, in float64."""
    kind = student.device.type
    with torch.autocast(kind, autocast, enabled=autocast is not None):
        loss = head(student, teacher) if teacher_factor is None else head(student, teacher_factor=teacher_factor)
    inputs = [student, *head.translator.parameters()]
    return [loss, *torch.autograd.grad(loss, inputs, torch.ones_like(loss) if upstream is None else upstream)]


def exact(head, student, teacher, upstream=None, teacher_factor=None):
    head = copy.deepcopy(head).double()
    options = {"p": head.loss.p, "reduction": head.loss.reduction, "eps": head.loss.eps, "weight": head.loss.weight}
    student = student.detach().double().requires_grad_()
    if teacher_factor is None:
        loss = reference.factor_transfer(student, teacher.double(), head.paraphraser, head.translator, **options)
    else:
        loss = reference.ft_loss(head.translator(student), teacher_factor.double(), **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.double()
    return [loss, *torch.autograd.grad(loss, [student, *head.translator.parameters()], upstream)]


def eager(head, student, teacher, upstream=None, autocast=None):
    """The official way: torch's modules and formula."""

    def stack(x, network):
        for layer in network.encoder:
            x = F.leaky_relu(layer(x), network.negative_slope)
        return x

    with torch.autocast(student.device.type, autocast, enabled=autocast is not None):
        factors = stack(student, head.translator), stack(teacher, head.paraphraser).detach()
        a, b = (F.normalize(factor.flatten(1)) for factor in factors)
        loss = F.l1_loss(a, b)
    inputs = [student, *head.translator.parameters()]
    return [loss, *torch.autograd.grad(loss, inputs, torch.ones_like(loss) if upstream is None else upstream)]


def errors(found, wanted):
    return [relative_error(got, truth) for got, truth in zip(found, wanted, strict=True)]


def assert_fused(head, student, teacher, autocast=None):
    with torch.autocast(student.device.type, autocast, enabled=autocast is not None):
        assert head.explain(student, teacher).startswith("the head runs fused"), head.explain(student, teacher)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.usefixtures("poisoned")
def test_float32_agrees_with_float64(backend, device, shape, p):
    head = make_head(shape, backend=backend, p=p, weight=50.0).to(device)
    student, teacher = make_features(shape, device=device)
    assert_fused(head, student, teacher)
    assert max(errors(results(head, student, teacher), exact(head, student, teacher))) < 3e-5


def test_maps_of_another_size_each_step_agree_and_have_the_frozen_weights_prepared_once(backend, device, monkeypatch):
    """As a detector's, whose images come in any size; the table of what is remembered is smaller than their number."""
    prepared = []
    monkeypatch.setattr(stack, "_prepared", prepared_once := {})
    monkeypatch.setattr(remembered, "MOST", 3)
    head = make_head(SHAPE, backend=backend, weight=50.0).to(device).hold_weights()
    for height, width in [(3, 5), (4, 4), (5, 3), (7, 2), (1, 6), (3, 5)]:
        student, teacher = make_features((*SHAPE[:4], height, width), device=device)
        assert max(errors(results(head, student, teacher), exact(head, student, teacher))) < 3e-5
        prepared.append([id(kept.result) for kept in prepared_once.values()])
        assert len(known_plans) <= 3
        for other in (teacher[:, :, 1:], teacher[..., 1:], teacher.mT):
            if other.shape[2:] != student.shape[2:]:
                with pytest.raises(ValueError, match=r"tap layers of the same map size|without pixels"):
                    head(student, other)
    assert all(len(results) == 1 and results == prepared[0] for results in prepared)


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_reductions_and_upstream_gradients(backend, device, reduction, memory_format):
    head = make_head(backend=backend, reduction=reduction).to(device, memory_format=memory_format)
    student, teacher = make_features(device=device)
    student = student.detach().contiguous(memory_format=memory_format).requires_grad_()
    upstream = torch.tensor([0.3, -2.0, 7.0][: SHAPE[0]] if reduction == "none" else -3.0, device=device)
    found = results(head, student, teacher, upstream)
    assert max(errors(found, exact(head, student, teacher, upstream))) < 3e-5
    for gradient, parameter in zip(found[2:], head.translator.parameters(), strict=True):
        assert gradient.dtype == parameter.dtype
        assert gradient.stride() == parameter.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_no_worse_than_the_eager_formula(backend, device, dtype):
    if backend == "native" and dtype == torch.float16:
        pytest.skip("oneDNN has no float16 convolutions to train with here")
    if (backend, device, dtype) == ("triton", "cpu", torch.bfloat16):
        pytest.skip("Triton's interpreter rounds bfloat16 towards zero")
    shape = (6, 16, 24, 16, 5, 5)
    head = make_head(shape, backend=backend).to(device)
    student, teacher = make_features(shape, dtype, device)
    # Under a mean-form upstream gradient of 1, float16 would not show what underflow does.
    upstream = torch.tensor(float(student.numel()), device=device)
    if device == "cpu" and dtype == torch.float16:
        rounded = [1e-3] + [3e-2] * 7  # torch's CPU has no eager float16 to compare with
    else:
        wanted = exact(head, student, teacher, upstream)
        rounded = errors(eager(head, student, teacher, upstream, autocast=dtype), wanted)
    assert_fused(head, student, teacher, dtype)
    found = results(head, student, teacher, upstream, autocast=dtype)
    for got, bound in zip(errors(found, exact(head, student, teacher, upstream)), rounded, strict=True):
        # The one number of the loss may be rounded luckily.
        assert got <= 1.25 * bound + 0.05 * torch.finfo(dtype).eps


def test_the_loss_is_float32_and_gradients_keep_their_inputs_dtypes(backend, device):
    head = make_head(backend=backend).to(device)
    student, teacher = make_features(dtype=torch.bfloat16, device=device)
    loss, for_student, *for_parameters = results(head, student, teacher, autocast=torch.bfloat16)
    assert loss.dtype == torch.float32
    assert for_student.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in for_parameters} == {torch.float32}


def test_a_head_in_bfloat16_needs_no_autocast(backend, device):
    head = make_head(backend=backend).to(device, torch.bfloat16)
    student, teacher = make_features(dtype=torch.bfloat16, device=device)
    assert_fused(head, student, teacher)
    loss, *gradients = results(head, student, teacher)
    assert {gradient.dtype for gradient in gradients} == {torch.bfloat16}
    assert relative_error(loss, exact(head, student, teacher)[0]) < 2e-2


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("slope", [0.1, 0.3])
def test_the_paraphrasers_batch_norm_and_slope_are_folded_in(backend, device, norm, slope):
    head = make_head(norm=norm, slope=slope, backend=backend).to(device)
    student, teacher = make_features(device=device)
    assert_fused(head, student, teacher)
    assert max(errors(results(head, student, teacher), exact(head, student, teacher))) < 3e-5


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.int8])
def test_a_known_teacher_factor(backend, device, stored):
    head = make_head(backend=backend).to(device)
    student, teacher = make_features(device=device)
    factor = head.paraphraser.encode(teacher).detach()
    factor = (factor / factor.abs().max() * 120).to(stored)
    assert head.explain(student, teacher_factor=factor).startswith("the head runs fused")
    found = results(head, student, None, teacher_factor=factor)
    assert max(errors(found, exact(head, student, None, teacher_factor=factor))) < 3e-5


def test_a_teacher_factor_that_requires_a_gradient_gets_it(backend, device):
    head = make_head(backend=backend).to(device)
    student, teacher = make_features(device=device)
    factor = head.paraphraser.encode(teacher).detach().requires_grad_()
    head(student, teacher_factor=factor).backward()
    wanted = factor.detach().double().requires_grad_()
    double = copy.deepcopy(head).double()
    reference.ft_loss(double.translator(student.detach().double()), wanted).backward()
    assert relative_error(factor.grad, wanted.grad) < 3e-5


def changed_by_an_optimizer(head):
    with torch.no_grad():
        for parameter in head.paraphraser.parameters():
            parameter.add_(0.1)


def changed_by_load_state_dict(head):
    head.paraphraser.load_state_dict(make_head(norm="batch").paraphraser.state_dict())


def changed_statistics(head):
    head.paraphraser.norm[1].running_mean.add_(1.0)


def changed_eps(head):
    for norm in head.paraphraser.norm:
        norm.eps = 1.0


def changed_through_data(head):
    head.paraphraser.encoder[2].weight.data.mul_(-1)


def changed_bias_through_data(head):
    head.paraphraser.encoder[1].bias.data.copy_(torch.randn_like(head.paraphraser.encoder[1].bias))


def changed_through_numpy(head):
    numpy = pytest.importorskip("numpy")
    numpy.copyto(head.paraphraser.encoder[0].weight.cpu().numpy()[0, 0], 3.0)


def changed_statistics_through_data(head):
    head.paraphraser.norm[2].running_var.data[-1] *= 9


def changed_parameter_object(head):
    head.paraphraser.encoder[0].weight = torch.nn.Parameter(head.paraphraser.encoder[0].weight * 2, requires_grad=False)


@pytest.mark.parametrize(
    "change",
    [
        changed_by_an_optimizer,
        changed_by_load_state_dict,
        changed_statistics,
        changed_parameter_object,
        changed_eps,
        changed_through_data,
        changed_bias_through_data,
        changed_through_numpy,
        changed_statistics_through_data,
    ],
)
def test_a_changed_paraphraser_is_packed_again(backend, device, change):
    if change is changed_through_numpy and device != "cpu":
        pytest.skip("numpy does not write to a GPU's memory")
    head = make_head(norm="batch", backend=backend).to(device)
    student, teacher = make_features(device=device)
    before = head(student, teacher).item()
    change(head)
    head.to(device)
    after = head(student, teacher)
    assert after.item() != before
    assert relative_error(after, exact(head, student, teacher)[0]) < 3e-5


@pytest.mark.parametrize("change", [changed_by_an_optimizer, changed_parameter_object, changed_eps])
def test_held_weights_still_follow_what_torch_sees(backend, device, change):
    head = make_head(norm="batch", backend=backend).to(device).hold_weights()
    student, teacher = make_features(device=device)
    before = head(student, teacher).item()
    change(head)
    after = head.to(device)(student, teacher)
    assert after.item() != before
    assert relative_error(after, exact(head, student, teacher)[0]) < 3e-5


def test_held_weights_follow_a_write_past_torch_when_they_are_told(backend, device):
    head = copy.deepcopy(make_head(backend=backend).to(device).hold_weights())
    student, teacher = make_features(device=device)
    head(student, teacher)
    changed_through_data(head)
    head.weights_changed()
    after = head(student, teacher)
    assert relative_error(after, exact(head, student, teacher)[0]) < 3e-5


def test_a_convolution_that_is_no_longer_3x3_is_torchs(backend, device):
    head = make_head(backend=backend).to(device)
    student, teacher = make_features(device=device)
    for network in (head.paraphraser, head.translator):
        network.encoder[1].padding = network.encoder[1].dilation = (2, 2)
        found = results(head, student, teacher)
        assert max(errors(found, exact(head, student, teacher))) < 3e-5


def test_parameters_of_another_size_are_not_read_past_their_ends(backend, device):
    student, teacher = make_features(device=device)
    for side in ("translator", "paraphraser"):
        for name, shape in (("weight", (1, 1)), ("weight", (5, 5)), ("bias", ())):
            head = make_head(backend=backend).to(device)
            head(student, teacher)
            parameter = getattr(getattr(head, side).encoder[1], name)
            size = (*parameter.shape[:2], *shape) if name == "weight" else (parameter.shape[0] + 1,)
            parameter.data = torch.randn(size, device=device)
            with pytest.raises((RuntimeError, ValueError), match=r"shape|bias"):
                head(student, teacher)


def test_a_paraphraser_sharded_alone_is_refused_in_a_sentence_or_unshards(backend, device):
    if device != "cpu":
        pytest.skip("a group of one process is on the CPU")
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    head = make_head(backend=backend)
    student, teacher = make_features()
    expected = head(student, teacher)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fsdp.fully_shard(head.paraphraser, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match=r"are DTensors .*register_fsdp_forward_method\(paraphraser, 'encode'\)"):
            head(student, teacher)
        fsdp.register_fsdp_forward_method(head.paraphraser, "encode")
        torch.testing.assert_close(head(student, teacher), expected)
        fsdp.fully_shard(head.translator, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        torch.testing.assert_close(head(student, teacher), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_the_head_follows_to(backend, device):
    head = make_head(backend=backend).to(device)
    student, teacher = make_features(device=device)
    results(head, student, teacher)
    head.to(torch.bfloat16)
    with pytest.raises(TypeError, match="autocast"):
        head(student, teacher)
    head.to(torch.float32)
    found = results(head, student, teacher)
    assert max(errors(found, exact(head, student, teacher))) < 3e-5


def test_a_paraphraser_that_went_to_16_bits_and_back_is_packed_again(backend, device):
    head = make_head(backend=backend).to(device)
    student, teacher = make_features(device=device)
    for _ in range(3):  # the new weights may lie where the old ones lay
        before = head(student, teacher)
        with torch.no_grad():
            for parameter in head.paraphraser.parameters():
                parameter.data = (parameter.data * 1.1).to(torch.bfloat16)
                parameter.data = parameter.data.float()
        after = head(student, teacher)
        assert not torch.equal(before, after)
        assert relative_error(after, exact(head, student, teacher)[0]) < 3e-5


def test_a_copied_and_a_pickled_head_compute_the_same(backend, device):
    head = make_head(backend=backend).to(device)
    student, teacher = make_features(device=device)
    loss = head(student, teacher)
    buffer = io.BytesIO()
    torch.save(head, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(head), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(student, teacher), loss)


def test_two_runs_are_bit_equal(backend, device):
    head = make_head(backend=backend).to(device)
    student, teacher = make_features(device=device)
    first, second = results(head, student, teacher), results(head, student, teacher)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_the_graph_may_be_run_twice(backend, device):
    head = make_head(backend=backend).to(device)
    student, teacher = make_features(device=device)
    loss = head(student, teacher)
    inputs = [student, *head.translator.parameters()]
    first = torch.autograd.grad(loss, inputs, torch.tensor(3.0, device=device), retain_graph=True)
    first = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, inputs, torch.tensor(3.0, device=device))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_two_uses_in_one_step_add_up(backend, device):
    head = make_head(backend=backend).to(device)
    student, teacher = make_features(device=device)
    _, *single = results(head, student, teacher)
    loss = head(student, teacher) + 2 * head(student, teacher)
    double = torch.autograd.grad(loss, [student, *head.translator.parameters()])
    assert max(errors(double, [3 * gradient.double() for gradient in single])) < 1e-5


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(backend, device, use_reentrant):
    head = make_head(backend=backend).to(device)
    student, teacher = make_features(device=device)
    wanted = results(head, student, teacher)
    loss = checkpoint(head, student, teacher, use_reentrant=use_reentrant)
    loss.backward()
    found = [loss, student.grad, *(parameter.grad for parameter in head.translator.parameters())]
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


def test_only_what_is_asked_for_gets_a_gradient(backend, device):
    head = make_head(backend=backend).to(device)
    student, teacher = make_features(device=device)
    _, *wanted = exact(head, student, teacher)
    for trained in itertools.chain(range(6), [None]):
        for index, parameter in enumerate(head.translator.parameters()):
            parameter.requires_grad_(index == trained)
            parameter.grad = None
        features = student.detach().requires_grad_(trained is None)
        head(features, teacher).backward()
        found = [features.grad, *(parameter.grad for parameter in head.translator.parameters())]
        place = 0 if trained is None else 1 + trained
        assert [gradient is not None for gradient in found] == [index == place for index in range(7)]
        assert relative_error(found[place], wanted[place]) < 3e-5


def test_the_paraphraser_and_the_teacher_get_no_gradient(backend, device):
    head = make_head(backend=backend).to(device)
    student, teacher = make_features(device=device)
    teacher.requires_grad_()
    head(student, teacher).backward()
    assert teacher.grad is None
    assert all(parameter.grad is None for parameter in head.paraphraser.parameters())


def test_without_a_graph_nothing_is_kept(backend, device):
    head = make_head(backend=backend).to(device)
    student, teacher = make_features(device=device)
    with torch.no_grad():
        loss = head(student, teacher)
    assert not loss.requires_grad
    assert torch.equal(loss, head(student, teacher).detach())
    with torch.inference_mode():
        torch.testing.assert_close(head(student, teacher), loss)


def saved_bytes(step, without):
    """Bytes of the distinct storages that autograd saves, but for those of ``without``."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in without}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step()
    del loss
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("shape", [(128, 64, 64, 32, 8, 8), (32, 512, 512, 256, 7, 7)], ids=str)
def test_at_most_60_percent_of_eagers_bytes_are_saved(backend, device, shape):
    if interpreting():
        pytest.skip("too slow at these sizes in the interpreter")
    head = make_head(shape, backend=backend).to(device)
    student, teacher = make_features(shape, torch.bfloat16, device)
    owned = [student, teacher, *head.parameters()]

    def ours():
        with torch.autocast(device, torch.bfloat16):
            return head(student, teacher)

    def official():
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                factor = head.paraphraser.encode(teacher)
            x = student
            for layer in head.translator.encoder:
                x = F.leaky_relu(layer(x), 0.1)
            return F.l1_loss(F.normalize(x.flatten(1)), F.normalize(factor.flatten(1)))

    assert saved_bytes(ours, owned) <= 0.6 * saved_bytes(official, owned)


def test_training_follows_the_reference(backend, device):
    samples, steps = (2, 8) if interpreting() else (4, 100)
    shape = (samples, 8, 12, 8, 4, 4)
    ours = make_head(shape, backend=backend, weight=100.0).to(device)
    truth = make_head(shape, backend="reference", weight=100.0).to(device)
    truth.load_state_dict(ours.state_dict())
    batches = [make_features(shape, device=device) for _ in range(5)]
    curves = []
    for head in (ours, truth):
        student_layer = torch.nn.Conv2d(8, 8, 1).to(device)
        student_layer.load_state_dict({"weight": torch.eye(8).view(8, 8, 1, 1), "bias": torch.zeros(8)})
        optimizer = torch.optim.SGD([*head.translator.parameters(), *student_layer.parameters()], 0.05, momentum=0.9)
        curve = []
        for step in range(steps):
            student, teacher = batches[step % 5]
            optimizer.zero_grad()
            loss = head(student_layer(student.detach()), teacher)
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    assert steps < 100 or curves[1][-1] < 0.9 * curves[1][0]
    differences = [abs(one - two) / two for one, two in zip(*curves, strict=True)]
    assert max(differences[:30]) < 1e-3
    assert max(differences) < 3e-2  # a sign near 0 that rounding turns sends the two on ways of their own


def test_a_scaler_finds_and_skips_infinite_gradients(backend, device):
    head = make_head(backend=backend).to(device)
    student, teacher = make_features(device=device)
    optimizer = torch.optim.SGD(head.translator.parameters(), 0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    before = [parameter.detach().clone() for parameter in head.translator.parameters()]
    scaler.scale(head(student * float("inf"), teacher)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**10
    assert all(torch.equal(one, two) for one, two in zip(before, head.translator.parameters(), strict=True))
    _, *wanted = results(head, student, teacher)
    optimizer.zero_grad()
    scaler.scale(head(student, teacher)).backward()
    scaler.unscale_(optimizer)
    found = [parameter.grad for parameter in head.translator.parameters()]
    assert max(errors(found, [gradient.double() for gradient in wanted[1:]])) < 1e-5


def test_a_nan_comes_through(backend, device):
    head = make_head(backend=backend).to(device)
    student, teacher = make_features(device=device)
    with torch.no_grad():
        student[0, 0, 0, 0] = float("nan")
    loss, for_student, *_ = results(head, student, teacher)
    assert loss.isnan()
    assert for_student[0].isnan().any()


def test_zero_features_and_weights_give_finite_gradients(backend, device):
    head = make_head(backend=backend).to(device)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    student, teacher = make_features(device=device)
    found = results(head, student, teacher)
    assert all(result.isfinite().all() for result in found)
    assert found[0] == 0


def test_a_weight_tensor_may_change_and_be_trained(backend, device):
    head = make_head(backend=backend).to(device)
    student, teacher = make_features(device=device)
    head.loss.weight = torch.tensor(2.0, device=device)
    assert max(errors(results(head, student, teacher), exact(head, student, teacher))) < 3e-5
    head.loss.weight = torch.tensor(3.0, device=device, requires_grad=True)
    loss = head(student, teacher)
    (for_weight,) = torch.autograd.grad(loss, [head.loss.weight])
    assert relative_error(for_weight, loss.detach().double() / 3) < 1e-6


def test_a_weight_changed_after_the_call_is_told_of_or_does_not_reach_the_gradient(backend, device):
    head = make_head(backend=backend).to(device)
    student, teacher = make_features(device=device)
    (expected,) = torch.autograd.grad(head(student, teacher), student)
    head.loss.weight = torch.tensor(1.0, device=device)
    loss = head(student, teacher)
    head.loss.weight.fill_(100.0)
    try:
        (got,) = torch.autograd.grad(loss, student)
    except RuntimeError as error:
        assert "inplace operation" in str(error)  # noqa: PT017
    else:
        assert relative_error(got, expected.double()) < 1e-5


def test_a_second_derivative_is_refused_in_a_sentence(backend, device):
    head = make_head(backend=backend).to(device)
    student, teacher = make_features(device=device)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.autograd.grad(head(student, teacher), student, create_graph=True)


class Counted(torch.nn.Module):
    calls = 0

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x)


def hooked_translator(head, seen):
    head.translator.register_forward_hook(lambda *_: seen.append(1))


def hooked_layer(head, seen):
    head.paraphraser.encoder[1].register_forward_hook(lambda *_: seen.append(1))


def replaced_layer(head, seen):
    head.translator.encoder[1] = Counted(head.translator.encoder[1])
    head.translator.encoder[1].register_forward_pre_hook(lambda *_: seen.append(1))


def of_ones_own(method, seen):
    return lambda x: seen.append(1) or method(x)


def patched_translator(head, seen):
    head.translator.forward = of_ones_own(head.translator.forward, seen)


def patched_encode(head, seen):
    head.paraphraser.encode = of_ones_own(head.paraphraser.encode, seen)


def patched_layer(head, seen):
    layer = head.translator.encoder[1]
    layer.forward = of_ones_own(layer.forward, seen)


WATCHES = [hooked_translator, hooked_layer, replaced_layer, patched_translator, patched_encode, patched_layer]


@pytest.mark.parametrize("watch", WATCHES)
def test_hooks_and_replaced_layers_are_called(backend, device, watch):
    head = make_head(backend=backend).to(device)
    student, teacher = make_features(device=device)
    wanted = head(student, teacher)
    seen = []
    watch(head, seen)
    assert "separate" not in head.explain(student, teacher)
    assert any(word in head.explain(student, teacher) for word in ("replaced", "hooks", "of its own"))
    found = head(student, teacher)
    assert seen == [1]
    torch.testing.assert_close(found, wanted)


def test_backward_hooks_of_all_modules_are_called(backend, device):
    head = make_head(backend=backend).to(device)
    student, teacher = make_features(device=device)
    head(student, teacher)
    seen = []
    hook = torch.nn.modules.module.register_module_full_backward_hook(lambda module, *_: seen.append(module))
    try:
        head(student, teacher).backward()
    finally:
        hook.remove()
    assert {*head.translator.encoder, head.translator} <= {*seen}


def test_a_translator_with_batch_norm_says_so(backend, device):
    shape = SHAPE
    head = ftfast.FactorTransfer(
        ftfast.Paraphraser(shape[2], factor_channels=shape[3]), ftfast.Translator(shape[1], shape[3], norm="batch")
    ).to(device)
    student, teacher = make_features(device=device)
    assert 'norm="batch"' in head.explain(student, teacher)
    head(student, teacher).backward()
    assert head.translator.norm[0].running_mean.abs().sum() > 0


def test_no_samples(backend, device):
    head = make_head(backend=backend).to(device)
    student, teacher = make_features(device=device)
    assert head(student[:0], teacher[:0]).isnan()


def test_torch_compile_without_a_graph_break(backend, device):
    head = make_head(backend=backend).to(device)
    student, teacher = make_features(device=device)
    wanted = results(head, student, teacher)
    compiled = torch.compile(lambda x, y: head(x, y), fullgraph=True, backend="aot_eager")
    loss = compiled(student, teacher)
    found = [loss, *torch.autograd.grad(loss, [student, *head.translator.parameters()])]
    assert max(errors(found, [result.double() for result in wanted])) < 3e-5


class Student(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.layer = torch.nn.Conv2d(12, 12, 3, padding=1)
        self.head = head

    def forward(self, x: Tensor, teacher: Tensor) -> Tensor:
        return self.head(self.layer(x), teacher)


def test_gradients_arrive_in_the_hooks_of_distributed_data_parallel(backend, device, tmp_path):
    module = Student(make_head(backend=backend)).to(device)
    student, teacher = make_features(device=device)
    module(student.detach(), teacher).backward()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    wanted = [parameter.grad.clone() for parameter in trained]
    module.zero_grad()
    kind = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(kind, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(module)
        reduced = []

        def halve(_: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
            reduced.extend(bucket.parameters())
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            future.set_result(bucket.buffer() / 2)
            return future

        parallel.register_comm_hook(None, halve)
        parallel(student.detach(), teacher).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert {id(parameter) for parameter in reduced} == {id(parameter) for parameter in trained}
    assert max(errors([parameter.grad for parameter in trained], [2**-1 * grad.double() for grad in wanted])) < 1e-6
