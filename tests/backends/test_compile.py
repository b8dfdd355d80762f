"""torch.compile: whole graphs, the eager numbers, no recompilation from step to step."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import ftfast

pytestmark = pytest.mark.skipif(
    torch.compiler.is_compiling() or __import__("ftfast.backends.triton", fromlist=["x"]).interpreting(),
    reason="the interpreter's launches cannot be traced",
)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def pair(samples=4, dtype=torch.float32, device="cpu"):
    student = torch.randn(samples, 8, 5, 5).to(device, dtype).requires_grad_()
    return student, torch.randn(samples, 8, 5, 5).to(device, dtype)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fullgraph_gives_the_eager_loss_and_gradient(backend, device, dtype, reduction):
    student, teacher = pair(dtype=dtype, device=device)

    def step(s, t):
        return 3 * ftfast.ft_loss(s * 2, t, reduction=reduction, weight=7.0, backend=backend).sum()

    compiled = torch.compile(step, fullgraph=True)
    (got,) = torch.autograd.grad(compiled(student, teacher), student)
    (expected,) = torch.autograd.grad(step(student, teacher), student)
    torch.testing.assert_close(got, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
    torch.testing.assert_close(compiled(student, teacher), step(student, teacher), rtol=1e-6, atol=0)


def test_teacher_gradient_under_compile(backend, device):
    student, teacher = pair(device=device)
    teacher.requires_grad_()
    loss = torch.compile(ftfast.FTLoss(backend=backend), fullgraph=True)(student, teacher)
    got = torch.autograd.grad(loss, (student, teacher))
    expected = torch.autograd.grad(ftfast.ft_loss(student, teacher, backend=backend), (student, teacher))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)


def test_a_weight_that_changes_every_step_does_not_recompile(backend, device):
    student, teacher = pair(device=device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda s, t, w: ftfast.ft_loss(s, t, weight=w, backend=backend), backend=counter)
    for weight in range(1, 8):
        compiled(student, teacher, torch.tensor(float(weight), device=device))
    assert counter.frame_count == 1
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = ftfast.FTLoss(backend=backend)
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    losses = []
    for weight in range(1, 8):
        module.weight = float(weight)
        losses.append(compiled(student, teacher).item() / weight)
    assert counter.frame_count <= 2  # torch makes a float dynamic when it first sees it change
    assert max(losses) - min(losses) <= 1e-6 * losses[0]


def test_new_batch_sizes_recompile_once(backend, device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ftfast.FTLoss(backend=backend), backend=counter, fullgraph=True)
    for samples in (4, 7, 3, 9, 5, 6):
        compiled(*pair(samples, device=device)).backward()
    assert counter.frame_count <= 2


def test_opcheck(backend, device):
    student, teacher = pair(device=device)
    for reduction in ("mean", "none"):
        arguments = (student, teacher, 1, reduction, 1e-12, backend)
        torch.library.opcheck(torch.ops.ftfast.ft_loss_forward.default, arguments)
        with torch.no_grad():
            loss, statistics = torch.ops.ftfast.ft_loss_forward(*arguments)
        for needed in ((True, False), (False, True), (True, True)):
            torch.library.opcheck(
                torch.ops.ftfast.ft_loss_backward.default,
                (student.detach(), teacher, statistics, torch.ones_like(loss), 1, reduction, backend, *needed),
            )


def test_the_whole_head_compiles_in_one_graph():
    head = ftfast.FactorTransfer(ftfast.Paraphraser(8), ftfast.Translator(6, 4), weight=500.0)
    student, teacher = torch.randn(2, 6, 5, 5, requires_grad=True), torch.randn(2, 8, 5, 5)
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(student, teacher), head(student, teacher), rtol=1e-5, atol=0)


@pytest.mark.cuda
def test_cuda_graph_replays_on_new_numbers(backend, device):
    if device != "cuda":
        pytest.skip("graphs are captured on a GPU")
    student, teacher = pair(device="cuda")
    fresh = [torch.randn_like(student) for _ in range(3)]

    def step():
        loss = ftfast.ft_loss(student, teacher, backend=backend)
        return loss, torch.autograd.grad(loss, student)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = step()
    for values in fresh:
        with torch.no_grad():
            student.copy_(values)
        graph.replay()
        expected = step()
        assert torch.equal(loss, expected[0])
        assert torch.equal(gradient, expected[1])
