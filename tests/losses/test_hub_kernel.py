"""The layout of release/hub_kernel.py: the package kernels loads it as the loss, with autograd and without ftfast."""

import re
import sys

import pytest
import torch

import ftfast
from ftfast.dispatch import supports
from release import hub_kernel

# Triton's kernels run on a CPU in its interpreter alone.
COMPUTING = [it for it in ("reference", "triton") if supports(it, torch.device("cpu"), *(torch.float32,) * 2).ok]


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "ftfast-loss"
    folder.mkdir()
    hub_kernel.write(folder)
    return folder


@pytest.fixture(scope="module")
def loss(layout):
    """The layout as the package loads it; the checkout's folder kernels is no package, hence the module inside."""
    pytest.importorskip("kernels.load", reason="the package kernels is not installed")
    from kernels import get_local_kernel  # noqa: TID251

    return get_local_kernel(layout)


def test_the_layout_imports_nothing_but_torch_triton_and_itself(layout):
    modules = list((layout / "build" / "torch-cuda").rglob("*.py"))
    assert {"loss.py", "ft_loss.py", "sample_layout.py"} <= {path.name for path in modules}
    for path in modules:
        text = path.read_text()
        imported = set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE))
        assert imported <= {"torch", "triton", *sys.stdlib_module_names}, path
        assert not re.search(r"""import_module\("ftfast|torch\.ops\.ftfast\.|"ftfast::""", text), path


def test_every_kernel_is_the_sources_own(layout):
    for path in (layout / "build" / "torch-cuda" / "kernels").glob("*.py"):
        assert path.read_bytes() == (hub_kernel.ROOT / "kernels" / path.name).read_bytes()


@pytest.mark.parametrize("computing", COMPUTING)
@pytest.mark.parametrize(("p", "reduction"), [(1, "mean"), (2, "none")])
def test_the_package_kernels_loads_the_loss_with_autograd(loss, computing, p, reduction):
    assert not loss.__name__.startswith("ftfast.")
    student = torch.randn(5, 6, 3, 3, requires_grad=True)
    teacher = torch.randn(5, 6, 3, 3, requires_grad=True)
    exact = [factor.detach().double().requires_grad_() for factor in (student, teacher)]
    found = loss.FTLoss(p=p, reduction=reduction, backend=computing)(student, teacher)
    expected = ftfast.ft_loss(*exact, p=p, reduction=reduction, backend="reference")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(found.sum(), (student, teacher))
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert (ours.double() - theirs).norm() <= 1e-5 * theirs.norm()


def test_its_operators_stand_beside_those_of_an_installed_ftfast(loss):
    """Under one name the second to be loaded would take the other's place."""
    student, teacher = torch.randn(2, 4, 8).unbind()
    expected = ftfast.ft_loss(student, teacher)
    for namespace in ("ftfast", loss.__name__):
        assert hasattr(getattr(torch.ops, namespace), "ft_loss_forward")
    compiled = torch.compile(loss.ft_loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(student, teacher), expected)
