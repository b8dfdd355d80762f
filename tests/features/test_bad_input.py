"""Every mistake that a caller of the loss or the head can make ends in one sentence that says what to do."""

import numpy as np
import pytest
import torch

import ftfast

GOOD = torch.zeros(2, 3, 4, 4)


def sentence(error):
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"p": 3}, ["p is 3", "1", "2"]),
        ({"p": True}, ["p is True"]),
        ({"eps": -1e-3}, ["eps is -0.001", "at least 0"]),
        ({"eps": float("nan")}, ["eps is nan"]),
        ({"eps": 10**400}, ["eps is beyond the range of a float", "at least 0"]),
        ({"weight": 10**400}, ["weight is beyond the range of a float", "0-d"]),
        ({"reduction": "avg"}, ["reduction is 'avg'", "N*D for p=1", "N for p=2", "batchmean"]),
        ({"backend": "cuda"}, ["backend is 'cuda'", "auto", "native"]),
        ({"p": 1.0}, ["p is 1.0"]),
        ({"p": torch.tensor([1, 2])}, ["p is tensor"]),
        ({"reduction": ["mean"]}, ["reduction is ['mean']"]),
        ({"weight": torch.ones(2)}, ["shape (2,)", "0-d"]),
        ({"weight": torch.tensor(1j)}, ["complex64", "0-d"]),
    ],
)
def test_unknown_options(options, words):
    for call in (lambda: ftfast.ft_loss(GOOD, GOOD, **options), lambda: ftfast.FTLoss(**options)):
        with pytest.raises(ValueError, match=r"\.$") as error:
            call()
        assert all(word in sentence(error) for word in words)


def test_a_student_factor_of_inference_mode_beside_a_trained_teacher():
    with torch.inference_mode():
        student = torch.randn(2, 5) * 1
    with pytest.raises(RuntimeError, match=r"student_factor was made under torch\.inference_mode") as raised:
        ftfast.ft_loss(student, torch.randn(2, 5).requires_grad_())
    assert "student_factor.clone()" in sentence(raised)


def test_numpys_numbers_are_taken_like_floats():
    student, teacher = torch.randn(2, 5), torch.randn(2, 5)
    for backend in ("native", "reference"):
        for eps, weight in ((np.float32(4.0), np.float32(0.5)), (np.int64(4), 0.5), (4, np.float64(0.5))):
            found = ftfast.ft_loss(student, teacher, eps=eps, weight=weight, backend=backend)
            assert torch.equal(found, ftfast.ft_loss(student, teacher, eps=4.0, weight=0.5, backend=backend))
            assert torch.equal(found, ftfast.FTLoss(eps=eps, weight=weight, backend=backend)(student, teacher))


@pytest.mark.parametrize(
    ("student", "teacher", "kind", "words"),
    [
        (GOOD, torch.zeros(2, 3, 4, 5), ValueError, ["(2, 3, 4, 4)", "(2, 3, 4, 5)"]),
        (GOOD, torch.zeros(2, 3, 4, 4, device="meta"), ValueError, ["cpu", "meta"]),
        (GOOD.int(), GOOD, TypeError, ["student_factor", "int32"]),
        (GOOD.to(torch.int8), GOOD, TypeError, ["student_factor", "int8"]),
        (GOOD, GOOD.long(), TypeError, ["teacher_factor", "int64", "int8"]),
        (GOOD.to(torch.complex64), GOOD, TypeError, ["complex64"]),
        (torch.zeros(4), torch.zeros(4), ValueError, ["(4,)", "[N, ...]"]),
        (torch.zeros([1] * 10), torch.zeros([1] * 10), ValueError, ["2 to 9"]),
        ([1.0], GOOD, TypeError, ["student_factor is a list"]),
        (GOOD.to_sparse(), GOOD, TypeError, ["to_dense"]),
    ],
)
def test_factors_that_cannot_be_compared(student, teacher, kind, words):
    with pytest.raises(kind) as error:
        ftfast.ft_loss(student, teacher)
    assert all(word in sentence(error) for word in words)


@pytest.mark.parametrize("options", [{"p": 3}, {"reduction": "bogus"}, {"eps": -1}])
def test_the_reference_refuses_the_same(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ftfast.reference.ft_loss(GOOD, GOOD, **options)
    with pytest.raises(ValueError, match="shape"):
        ftfast.reference.ft_loss(GOOD, GOOD[:1])


def test_factors_without_memory_go_through_torch():
    """Fake and meta tensors have shapes and no numbers; a kernel that took their addresses would crash."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert ftfast.ft_loss(torch.zeros(2, 3), torch.zeros(2, 3)).shape == ()
    assert ftfast.ft_loss(GOOD.to("meta"), GOOD.to("meta")).device.type == "meta"


def test_tracers_see_the_loss():
    from torch.fx.experimental.proxy_tensor import make_fx

    student, teacher = torch.randn(3, 8), torch.randn(3, 8)
    traced = make_fx(lambda s, t: ftfast.ft_loss(s, t))(student, teacher)
    other = torch.randn(3, 8)
    torch.testing.assert_close(traced(other, teacher), ftfast.ft_loss(other, teacher))


def test_forward_mode_keeps_its_tangent():
    import torch.autograd.forward_ad as forward_ad

    student, teacher, tangent = torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 8)
    with forward_ad.dual_level():
        dual = ftfast.ft_loss(forward_ad.make_dual(student, tangent), teacher)
        got = forward_ad.unpack_dual(dual).tangent
    (gradient,) = torch.autograd.grad(ftfast.ft_loss(student.requires_grad_(), teacher), student)
    torch.testing.assert_close(got, (gradient * tangent).sum())


def test_a_lazily_negated_factor_is_read_as_what_it_is():
    student, teacher = torch.randn(3, 8, dtype=torch.complex64).conj().imag, torch.randn(3, 8)
    torch.testing.assert_close(ftfast.ft_loss(student, teacher), ftfast.ft_loss(student.clone(), teacher))


def test_a_dtensor_is_refused_by_name(monkeypatch):
    class DTensor(torch.Tensor):
        pass

    with pytest.raises(TypeError, match="to_local"):
        ftfast.ft_loss(GOOD.as_subclass(DTensor), GOOD)


@pytest.mark.parametrize("autocast", [False, True])
def test_student_features_of_eight_bits_are_refused_under_autocast_too(autocast):
    """It was an AssertionError about a list of backends."""
    head = ftfast.FactorTransfer(ftfast.Paraphraser(8), ftfast.Translator(4, 4))
    student = torch.randn(2, 4, 3, 3).to(torch.float8_e4m3fn)
    named = pytest.raises(TypeError, match=r"student_features has dtype torch\.float8_e4m3fn")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), named:
        head(student, torch.randn(2, 8, 3, 3))


def test_an_explicit_backend_that_cannot_run_raises_its_reason(monkeypatch):
    with pytest.raises(RuntimeError, match=r'backend "native" cannot run: .*meta'):
        ftfast.ft_loss(GOOD.to("meta"), GOOD.to("meta"), backend="native")


def test_an_explicit_backend_inside_a_transform_raises(backend, device):
    student = torch.randn(2, 8, device=device)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda s: ftfast.ft_loss(s, student, backend=backend))(torch.randn(2, 8, device=device))


def test_auto_inside_a_transform_takes_the_reference():
    student, teacher = torch.randn(2, 8), torch.randn(2, 8)
    got = torch.func.grad(lambda s: ftfast.ft_loss(s, teacher))(student)
    expected = torch.func.grad(lambda s: ftfast.reference.ft_loss(s, teacher))(student)
    assert torch.equal(got, expected)


def test_modules_name_the_argument():
    for rate in (0, float("inf"), "0.5"):
        with pytest.raises(ValueError, match=f"rate is {rate!r}"):
            ftfast.Paraphraser(8, rate)
    with pytest.raises(TypeError, match="no encode"):
        ftfast.FactorTransfer(ftfast.Translator(4, 4), ftfast.Paraphraser(8))
    with pytest.raises(ValueError, match="in_channels is 0"):
        ftfast.Translator(0, 4)
    with pytest.raises(ValueError, match=r"norm is 'layer'; it takes None"):
        ftfast.Translator(4, 4, norm="layer")
    with pytest.raises(ValueError, match="factors of 5 channels and the paraphraser of 4"):
        ftfast.FactorTransfer(ftfast.Paraphraser(8), ftfast.Translator(4, 5))
    head = ftfast.FactorTransfer(ftfast.Paraphraser(8), ftfast.Translator(4, 4))
    with pytest.raises(ValueError, match=r"exactly one .* neither"):
        head(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match=r"exactly one .* both"):
        head(torch.zeros(1, 4, 2, 2), torch.zeros(1, 8, 2, 2), teacher_factor=torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match=r"layer is 'layer9'.*fc"):
        ftfast.FeatureTap(torch.nn.ModuleDict({"fc": torch.nn.Linear(1, 1)}), "layer9")


def head_and_features():
    head = ftfast.FactorTransfer(ftfast.Paraphraser(8), ftfast.Translator(6, 4))
    return head, torch.randn(2, 6, 5, 5), torch.randn(2, 8, 5, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s, t: (s[:, :5], t), ValueError, "translator takes 6; build it as Translator\\(5"),
        (lambda s, t: (s, t[:, :7]), ValueError, "paraphraser takes 8; build it as Paraphraser\\(7"),
        (lambda s, t: (s, t[:, :, :4]), ValueError, "maps of 4x5 and student_features of 5x5"),
        (lambda s, t: (s, t[:1]), ValueError, "1 samples and student_features 2"),
        (lambda s, t: (s[:, :, :0], t[:, :, :0]), ValueError, "a map without pixels"),
        (lambda s, t: (s.int(), t), TypeError, "student_features has dtype torch.int32"),
        (lambda s, t: (s, t.int()), TypeError, "teacher_features has dtype torch.int32"),
        (lambda s, t: (s.double(), t), TypeError, "convert one of them"),
        (lambda s, t: (s.flatten(2), t), ValueError, "takes a map \\[N, 6, H, W\\]"),
        (lambda s, t: (s, t.to("meta")), ValueError, "teacher_features is on meta"),
        (lambda s, t: (s.numpy(), t), TypeError, "student_features is a ndarray"),
    ],
)
def test_features_that_a_head_cannot_compare(change, error, message):
    head, student, teacher = head_and_features()
    with pytest.raises(error, match=message) as raised:
        head(*change(student, teacher))
    assert "\n" not in str(raised.value)


def test_a_factor_of_other_channels():
    head, student, _ = head_and_features()
    with pytest.raises(ValueError, match="teacher_factor has 5 channels and the head compares 4"):
        head(student, teacher_factor=torch.randn(2, 5, 5, 5))


def test_both_or_neither_of_features_and_factor():
    head, student, teacher = head_and_features()
    with pytest.raises(ValueError, match="both"):
        head(student, teacher, teacher_factor=torch.randn(2, 4, 5, 5))
    with pytest.raises(ValueError, match="neither"):
        head(student)


@pytest.mark.parametrize("module", ["translator", "paraphraser"])
@pytest.mark.parametrize("autocast", [False, True])
def test_parameters_of_eight_bits_are_refused(module, autocast):
    head, student, teacher = head_and_features()
    getattr(head, module).to(torch.float8_e4m3fn)
    refused = pytest.raises(TypeError, match=f"the {module}'s parameters are torch.float8_e4m3fn")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), refused as raised:
        head(student, teacher)
    assert ".to(torch.float32)" in sentence(raised)
