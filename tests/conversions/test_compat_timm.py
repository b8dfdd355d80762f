"""ftfast.compat.timm in timm's own loop: its optimiser, schedule, moving average, checkpoints, compile and DDP."""

import copy
import inspect
import logging
import math
import runpy
from contextlib import nullcontext
from importlib import util
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task")

from timm.optim import create_optimizer_v2  # noqa: E402
from timm.scheduler import create_scheduler_v2  # noqa: E402
from timm.task import (  # noqa: E402
    DistillationTeacher,
    FeatureDistillationTask,
    TrainingTask,
    load_task_ema_checkpoint,
    resume_task_checkpoint,
)
from timm.utils import CheckpointSaver  # noqa: E402

from ftfast import Paraphraser  # noqa: E402
from ftfast.compat.timm import (  # noqa: E402
    FactorTransferTask,
    feature_map,
    library,
    load_paraphraser,
    train_paraphraser,
)

SIZE = (3, 32, 32)
CLASSES = 5


def model(name, **options):
    if "vit" in name:
        options = {"img_size": 32, **options}
    return timm.create_model(name, num_classes=CLASSES, **options)


def images(count=6, dtype=torch.float32):
    return torch.randn(count, *SIZE, dtype=dtype), torch.arange(count) % CLASSES


def task_of(student="test_vit", teacher="test_vit2", *, dtype=torch.float32, **options):
    """A task of two small models; its paraphraser is of random weights and is taken for trained."""
    pair = [model(name).to(dtype) if isinstance(name, str) else name for name in (student, teacher)]
    task = FactorTransferTask(*pair, input_size=SIZE, dtype=dtype, verbose=False, **options)
    task.paraphraser_is_trained = True
    return task


def names_of(task):
    return {id(parameter): name for name, parameter in task.named_parameters()}


def public_methods(cls):
    own = (base for base in cls.__mro__ if issubclass(base, TrainingTask))
    return sorted({name for base in own for name in vars(base) if not name.startswith("_")})


@pytest.mark.parametrize("name", public_methods(FeatureDistillationTask))
def test_every_public_method_of_timms_task_takes_the_same_arguments(name):
    theirs, ours = (inspect.signature(getattr(cls, name)) for cls in (FeatureDistillationTask, FactorTransferTask))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]


def test_the_constructor_takes_timms_arguments_in_timms_order():
    theirs, ours = (inspect.signature(cls).parameters for cls in (FeatureDistillationTask, FactorTransferTask))
    assert [name for name in ours if name in theirs] == list(theirs)
    assert all(ours[name].default == theirs[name].default for name in theirs)
    positional = [name for name, parameter in ours.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    if library.version() in library.TESTED_VERSIONS[-1:]:  # earlier ones lack the newest arguments
        assert positional == list(theirs)


def convolve(layers, x):
    for layer in layers:
        x = F.leaky_relu(F.conv2d(x, layer.weight, layer.bias, padding=1), 0.1)
    return x


def last_tokens(network, x):
    return network.forward_features(x)[:, network.num_prefix_tokens :].transpose(1, 2).unflatten(2, (2, 2))


def by_hand(task, x, target, read):
    """The step's losses, from the student and translator alone, in plain torch."""
    student, translator = task.trainable_module.student, task.trainable_module.translator
    with torch.no_grad():
        given = (x * task_statistics("std") + task_statistics("mean") - task.teacher.mean_kd) / task.teacher.std_kd
        target_factor = convolve(task.paraphraser.encoder, read(task.teacher.model, given))
    factor = convolve(translator.encoder, read(student, x))
    one, two = (F.normalize(f.flatten(1)) for f in (factor, target_factor))
    return F.cross_entropy(student(x), target), task.beta * (one - two).abs().mean()


def task_statistics(name):
    return torch.tensor({"mean": (0.5,) * 3, "std": (0.5,) * 3}[name], dtype=torch.float64).view(1, 3, 1, 1)


CASES = {
    "maps": ("test_resnet", "test_resnet", {}, lambda network, x: network.forward_features(x)),
    "tokens": ("test_vit", "test_vit2", {}, last_tokens),
    "layers": (
        "test_resnet",
        "test_resnet",
        {"student_layer": "layer3", "teacher_layer": "layer3"},
        lambda n, x: n.layer3(n.layer2(n.layer1(n.maxpool(n.act1(n.bn1(n.conv1(x))))))),
    ),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_losses_and_gradients_are_those_of_a_step_written_by_hand(case):
    student, teacher, options, read = CASES[case]
    task = task_of(student, teacher, dtype=torch.float64, task_loss_weight=0.3, distill_loss_weight=0.7, **options)
    task.teacher.mean_kd += 0.1  # a teacher normalised otherwise than the student
    unlike = FactorTransferTask(
        task.trainable_module.student,
        task.teacher,
        input_size=SIZE,
        dtype=torch.float64,
        paraphraser=task.paraphraser,
        task_loss_weight=0.3,
        distill_loss_weight=0.7,
        **options,
    ).eval()
    x, target = images(dtype=torch.float64)
    found = unlike(x, target)
    assert set(found) == {"loss", "output", "task_loss", "kd_loss"}
    task_loss, kd_loss = by_hand(unlike, x, target, read)
    parameters = list(unlike.trainable_module.parameters())
    gradients, expected = (
        torch.autograd.grad(loss, parameters) for loss in (found["loss"], 0.3 * task_loss + 0.7 * kd_loss)
    )
    torch.testing.assert_close((found["task_loss"], found["kd_loss"]), (task_loss, kd_loss), rtol=1e-12, atol=0)
    for one, two in zip(gradients, expected, strict=True):
        assert (one - two).norm() <= 1e-9 * two.norm()


def test_images_reach_the_teacher_normalised_as_timm_does_it():
    task = task_of("test_resnet", model("test_resnet", pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3)}))
    x, _ = images()
    mean, std = (torch.full((1, 3, 1, 1), 0.5) for _ in range(2))
    assert not torch.equal(task.teacher_maps.normalise(x), x)
    assert torch.equal(task.teacher_maps.normalise(x), task.teacher.normalize_input(x, mean, std))
    assert torch.equal(task_of().teacher_maps.normalise(x), x)


@pytest.mark.parametrize("layer", [None, "layer3"])
def test_teacher_and_paraphraser_are_frozen_and_no_optimiser_has_them(layer):
    task = task_of("test_resnet", "test_resnet", student_layer=layer, teacher_layer=layer)
    frozen = {
        name: value.clone() for part in (task.teacher, task.paraphraser) for name, value in part.state_dict().items()
    }
    optimiser = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1, weight_decay=0.1)
    names = names_of(task)
    held = {names[id(p)].split(".")[1] for group in optimiser.param_groups for p in group["params"]}
    assert held == {"student", "translator"}
    task.train()
    assert task.trainable_module.training
    assert not any(
        part.training for whole in (task.teacher, task.teacher_maps, task.paraphraser) for part in whole.modules()
    )
    task(*images())["loss"].backward()
    optimiser.step()
    after = {name: value for part in (task.teacher, task.paraphraser) for name, value in part.state_dict().items()}
    assert all(torch.equal(frozen[name], after[name]) for name in frozen)
    assert not any(p.requires_grad for part in (task.teacher, task.paraphraser) for p in part.parameters())


def test_layer_wise_rates_and_weight_decay_know_the_translator():
    task = task_of()
    optimiser = create_optimizer_v2(task.get_trainable_module(), lr=1.0, weight_decay=0.1, layer_decay=0.5)
    names = names_of(task)
    groups = {names[id(p)]: group for group in optimiser.param_groups for p in group["params"]}
    prefix = "trainable_module."
    assert groups[f"{prefix}translator.encoder.0.weight"]["lr_scale"] == 1
    assert groups[f"{prefix}student.blocks.0.attn.qkv.weight"]["lr_scale"] < 1
    assert groups[f"{prefix}student.pos_embed"]["weight_decay"] == 0
    assert groups[f"{prefix}translator.encoder.0.weight"]["weight_decay"] > 0


def run_steps(task, optimiser, schedule, first, last):
    losses = []
    for step in range(first, last):
        torch.manual_seed(step)
        loss = task(*images())["loss"]
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.get_clip_parameters(), 1.0)
        optimiser.step()
        task.update_ema(step=step + 1)
        schedule.step(step + 1)
        losses.append(loss.detach())
    return losses


def training_of(task):
    task.setup_ema(decay=0.5)
    optimiser = create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=1e-3, weight_decay=0.05)
    return optimiser, create_scheduler_v2(optimiser, "cosine", num_epochs=8)[0]


def tensors_of(task):
    found = {f"model.{name}": value for name, value in task.trainable_module.state_dict().items()}
    found |= {f"average.{name}": value for name, value in task.trainable_module_ema.state_dict().items()}
    return found | {f"paraphraser.{name}": value for name, value in task.paraphraser.state_dict().items()}


def test_a_run_saved_by_timms_saver_goes_on_bit_for_bit(tmp_path):
    teacher = model("test_resnet")
    whole = task_of("test_resnet", teacher)
    optimiser, schedule = training_of(whole)
    run_steps(whole, optimiser, schedule, 0, 2)
    options = {"model": whole.get_eval_model(), "task": whole, "checkpoint_dir": str(tmp_path)}
    CheckpointSaver(optimizer=optimiser, **options).save_checkpoint(1, metric=0.5)
    expected = run_steps(whole, optimiser, schedule, 2, 4)

    torch.manual_seed(99)
    resumed = FactorTransferTask(model("test_resnet"), teacher, input_size=SIZE)
    assert not resumed.paraphraser_is_trained
    optimiser, schedule = training_of(resumed)
    path = str(tmp_path / "last.pth.tar")
    assert resume_task_checkpoint(resumed, path, optimizer=optimiser) == 2
    load_task_ema_checkpoint(resumed, path)
    schedule.step(2)
    losses = run_steps(resumed, optimiser, schedule, 2, 4)
    assert all(torch.equal(one, two) for one, two in zip(losses, expected, strict=True))
    one, two = tensors_of(whole), tensors_of(resumed)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_checkpoint_has_the_bare_student_and_the_small_networks_apart(tmp_path):
    task = task_of("test_resnet", "test_resnet", student_layer="layer3", teacher_layer="layer3")
    optimiser, _ = training_of(task)
    CheckpointSaver(task.get_eval_model(), optimiser, task=task, checkpoint_dir=str(tmp_path)).save_checkpoint(0)
    saved = torch.load(tmp_path / "last.pth.tar", weights_only=True)
    for key in ("state_dict", "state_dict_ema"):
        model("test_resnet").load_state_dict(saved[key], strict=True)
    assert set(saved["task_state"]) == {"translator", "paraphraser"}
    assert set(saved["task_state_ema"]) == {"translator"}
    loaded = load_paraphraser(tmp_path / "last.pth.tar")
    x = torch.randn(2, task.paraphraser.in_channels, 4, 4)
    assert torch.equal(loaded.encode(x), task.paraphraser.encode(x))


def test_the_moving_average_is_of_student_and_translator_and_shares_the_paraphraser():
    task = task_of()
    average = task.setup_ema(decay=0.25)
    before = copy.deepcopy(average.module.state_dict())
    with torch.no_grad():
        for parameter in task.trainable_module.parameters():
            parameter += 1
    task.update_ema()
    now = task.trainable_module.state_dict()
    assert {name.split(".")[0] for name in now} == {"student", "translator"}
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(value, before[name].lerp(now[name], 0.75), rtol=1e-6, atol=0)
    assert average.module.head.paraphraser is task.paraphraser
    assert average.module.head.translator is average.module.translator is not task.trainable_module.translator
    assert task.get_eval_model(ema=True) is average.module.student


def test_an_average_of_a_student_with_a_named_layer_reads_its_own_layer():
    task = task_of("test_resnet", "test_resnet", student_layer="layer3", teacher_layer="layer3").eval()
    average = task.setup_ema().module
    with torch.no_grad():
        for parameter in task.trainable_module.student.parameters():
            parameter.zero_()
    x, _ = images()
    logits, _ = average(x, task.teacher_maps(x))
    assert logits.abs().sum() > 0
    assert torch.equal(logits, average.student(x))


@pytest.mark.parametrize(
    "options", [{}, {"student_layer": "layer3", "teacher_layer": "layer3"}], ids=["none", "layer3"]
)
def test_a_compiled_task_gives_the_eager_numbers_and_saves_the_same_keys(options):
    task = task_of("test_resnet", "test_resnet", **options)
    x, target = images()
    eager = {name: value.detach() for name, value in task(x, target).items()}
    keys = {name: list(part) for name, part in task.get_checkpoint_state().items()}
    student = task.get_eval_model()
    compiled = task.compile(backend="aot_eager", fullgraph=True)
    found = task(x, target)
    found["loss"].backward()
    assert all(torch.allclose(found[name], eager[name], rtol=1e-5, atol=0) for name in eager)
    assert all(parameter.grad is not None for parameter in task.get_clip_parameters())
    assert compiled is task.get_eval_model()
    assert compiled._orig_mod is student
    assert {name: list(part) for name, part in task.get_checkpoint_state().items()} == keys


def test_the_evaluation_model_is_the_bare_student():
    student = model("test_resnet")
    task = task_of(student, "test_resnet")
    assert task.get_eval_model() is student
    assert task.get_eval_model(task.trainable_module) is student
    assert task.get_eval_model(ema=True) is None
    task.setup_ema()
    compiled = task.compile_ema(backend="eager")
    x, _ = images()
    assert torch.equal(compiled(x), student.eval()(x))


def test_clipping_takes_what_is_trained():
    task = task_of()
    trained = {id(p) for p in task.trainable_module.parameters()}
    assert {id(p) for p in task.get_clip_parameters()} == trained
    without_head = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    head = list(task.trainable_module.student.parameters())[-2:]
    assert without_head == trained - {id(p) for p in head}


@pytest.mark.parametrize(
    ("given", "expected"),
    [((None, None), (1, 1)), ((0.3, None), (0.3, 0.7)), ((None, 5.0), (1, 5)), ((0.3, 5.0), (0.3, 5))],
    ids=["none", "task", "distill", "both"],
)
def test_weights_follow_timms_rule(given, expected):
    task = task_of("test_resnet", "test_resnet", task_loss_weight=given[0], distill_loss_weight=given[1])
    assert (task.task_loss_weight, task.distill_loss_weight) == pytest.approx(expected)
    found = task(*images())
    torch.testing.assert_close(
        found["loss"], expected[0] * found["task_loss"] + expected[1] * found["kd_loss"], rtol=1e-6, atol=0
    )


def test_beta_follows_the_factors_size_and_can_be_set():
    task = task_of()
    factor = task.paraphraser.encode(task.teacher_maps(images()[0]))
    assert task.beta == pytest.approx(500 * math.sqrt(factor[0].numel() / 2048))
    first = task(*images(2))["kd_loss"] / task.beta
    torch.manual_seed(0)
    task.beta = torch.tensor(2.0)
    torch.manual_seed(0)
    x, target = images(2)
    second = task(x, target)["kd_loss"]
    task.beta = 1.0
    torch.testing.assert_close(second, 2 * task(x, target)["kd_loss"], rtol=1e-6, atol=0)
    assert first > 0


def test_a_default_beta_is_that_of_the_first_batch():
    """Whatever size the models were made for, as with timm's --img-size."""
    task = task_of("test_resnet", "test_resnet")
    height, width = 4 * SIZE[1], 4 * SIZE[2]
    larger = torch.randn(2, 3, height, width), torch.arange(2)
    assert task(*larger)["kd_loss"].isfinite()
    factor = task.paraphraser.encode(task.teacher_maps(larger[0]))
    assert task.beta == pytest.approx(500 * math.sqrt(factor[0].numel() / 2048))
    task(*images())
    assert task.beta == pytest.approx(500 * math.sqrt(factor[0].numel() / 2048))
    for given in (task_of("test_resnet", "test_resnet", beta=7.0), task_of("test_resnet", "test_resnet")):
        given.beta = 7.0
        given(*larger)
        assert given.beta == 7.0


def check_distributed(task, whole_batch, half):
    """DDP's averaged gradients are those of the whole batch; only what is trained is wrapped."""
    task.eval()
    alone = copy.deepcopy(task)
    trained = [*alone.trainable_module.parameters()]
    expected = torch.autograd.grad(alone(*whole_batch)["loss"], trained)
    if dist.get_rank() > 0:
        with torch.no_grad():
            task.paraphraser.encoder[0].weight.add_(1)  # as if each process had trained its own
    assert task.prepare_distributed() is task
    assert isinstance(task.trainable_module, nn.parallel.DistributedDataParallel)
    assert not any(isinstance(part, nn.parallel.DistributedDataParallel) for part in task.teacher.modules())
    with task.no_sync():
        assert not task.trainable_module.require_backward_grad_sync
    task(*half)["loss"].backward()
    for parameter, gradient in zip(task.trainable_module.parameters(), expected, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-9 * gradient.norm()
    assert set(task.get_checkpoint_state()["state_dict"]) == set(model("test_vit").state_dict())
    with pytest.raises(RuntimeError, match="before"):
        task.compile()


def run_process(rank, count, address, data):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=count)
    try:
        task = task_of(dtype=torch.float64)
        x, target = data
        check_distributed(task, data, (x.chunk(count)[rank], target.chunk(count)[rank]))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_distributed_gradients_are_those_of_the_whole_batch(count, tmp_path):
    address = f"file://{tmp_path / 'rendezvous'}"
    data = images(4, torch.float64)
    if count == 1:
        run_process(0, 1, address, data)
    else:
        torch.multiprocessing.spawn(run_process, (count, address, data), nprocs=count)


class Steps:
    """A loader that can be gone through again."""

    def __init__(self, count=4, size=16):
        self.batches = [images(size) for _ in range(count)]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def distance(paraphraser, maps):
    with torch.no_grad():
        return F.mse_loss(paraphraser(maps), maps).item()


def test_the_task_trains_its_paraphraser_before_the_first_step():
    task = FactorTransferTask(model("test_resnet"), model("test_resnet"), input_size=SIZE, verbose=False)
    loader = Steps()
    with pytest.raises(RuntimeError, match="train_paraphraser"):
        task(*loader.batches[0])
    maps = task.teacher_maps(loader.batches[0][0])
    before = distance(task.paraphraser, maps)
    with pytest.warns(UserWarning, match="same factor"):  # of noise, to a teacher that learned nothing
        assert task.train_paraphraser(loader, epochs=8, strict=False) is task
    assert distance(task.paraphraser, maps) < 0.8 * before
    assert not any(p.requires_grad for p in task.paraphraser.parameters())
    assert not task.paraphraser.training
    assert torch.isfinite(task(*loader.batches[0])["loss"])


def test_a_paraphraser_trained_beforehand_is_taken(tmp_path):
    teacher = model("test_vit2")
    loader = Steps()
    with pytest.warns(UserWarning, match="explains"):
        paraphraser = train_paraphraser(teacher, loader, rate=0.25, epochs=2)
    assert paraphraser.factor_channels == round(teacher.num_features * 0.25)
    torch.save(paraphraser.state_dict(), tmp_path / "paraphraser.pt")
    tasks = [
        FactorTransferTask(model("test_vit"), teacher, input_size=SIZE, paraphraser=given)
        for given in (paraphraser, tmp_path / "paraphraser.pt", str(tmp_path / "paraphraser.pt"))
    ]
    factors = [task.paraphraser.encode(task.teacher_maps(loader.batches[0][0])) for task in tasks]
    assert all(torch.equal(factor, factors[0]) for factor in factors)


def test_a_teacher_may_be_a_name_or_timms_own_wrapper(tmp_path):
    teacher = model("test_resnet")
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    by_name = task_of("test_vit", DistillationTeacher(teacher), student_layer="patch_embed", teacher_layer="layer3")
    assert by_name.teacher.model is teacher
    student = model("test_resnet")
    named = FactorTransferTask(
        student, "test_resnet", teacher_pretrained_path=str(tmp_path / "teacher.pt"), input_size=SIZE
    )
    x, _ = images()
    assert torch.equal(named.teacher.model(x), teacher.eval()(x))


def test_converting_the_task_converts_every_part():
    task = task_of("test_resnet", "test_resnet", student_layer="layer3", teacher_layer="layer3")
    task.to(torch.float64)
    found = task(*images(dtype=torch.float64))
    assert found["loss"].dtype == torch.float64
    assert {p.dtype for p in task.parameters()} == {torch.float64}


def test_tokens_become_maps_without_a_copy():
    tokens = torch.randn(2, 1 + 6, 4)
    vit = timm.create_model("test_vit", img_size=(32, 48), num_classes=0)
    found = feature_map(tokens, vit, (32, 48))
    assert found.shape == (2, 4, 2, 3)
    assert torch.equal(found[:, :, 1, 2], tokens[:, 6])
    assert found.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()
    assert feature_map(tokens[:, :4]).shape == (2, 4, 2, 2)
    swin = nn.Module()
    swin.output_fmt = "NHWC"
    assert feature_map(torch.randn(2, 3, 5, 7), swin).shape == (2, 7, 3, 5)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.randn(2, 7, 4), "grid"),
        (torch.randn(2, 0, 4), "grid"),
        (torch.randn(2, 4), "pooling"),
        ([torch.randn(2, 4)], "list"),
    ],
    ids=["tokens", "none", "pooled", "list"],
)
def test_features_of_another_kind_are_refused(features, message):
    with pytest.raises((TypeError, ValueError), match=message):
        feature_map(features)


BAD_ARGUMENTS = {
    "layer": ({"student_layer": "layer9"}, ValueError, "layer4"),
    "size": ({"teacher_layer": "layer1"}, ValueError, "student_layer and teacher_layer"),
    "channels": ({"paraphraser": Paraphraser(7)}, ValueError, "7 channels"),
    "kind": ({"paraphraser": nn.Identity()}, TypeError, "Identity"),
    "path": ({"paraphraser": "nowhere.pt"}, FileNotFoundError, "nowhere.pt"),
    "criterion": ({"criterion": nn.MSELoss(), "criterion_kwargs": {"smoothing": 0.1}}, ValueError, "criterion"),
}


@pytest.mark.parametrize("case", sorted(BAD_ARGUMENTS))
def test_bad_arguments_are_refused_in_a_sentence(case):
    options, kind, message = BAD_ARGUMENTS[case]
    with pytest.raises(kind, match=message):
        FactorTransferTask(model("test_resnet"), model("test_resnet"), input_size=SIZE, **options)


def test_a_student_without_timms_two_halves_needs_a_layer():
    with pytest.raises(ValueError, match="student_layer"):
        FactorTransferTask(nn.Sequential(nn.Conv2d(3, 4, 3)), model("test_resnet"), input_size=SIZE)


def test_a_file_without_a_paraphraser_is_refused(tmp_path):
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save(model("test_resnet").state_dict(), tmp_path / "model.pt")
    for name in ("text.pt", "model.pt"):
        with pytest.raises(ValueError, match=name):
            load_paraphraser(tmp_path / name)


@pytest.mark.parametrize(("options", "message"), [({"epochs": 0}, "epochs"), ({"learning_rate": 0}, "learning_rate")])
def test_bad_training_of_a_paraphraser_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train_paraphraser(model("test_resnet"), Steps(1), **options)
    with pytest.raises(ValueError, match="no batch"):
        train_paraphraser(model("test_resnet"), [])


def test_task_state_of_other_networks_is_refused(caplog):
    task, other = task_of(), task_of(rate=0.25)
    with pytest.raises(RuntimeError, match="rate"):
        task.load_task_state(other.get_task_state())
    with pytest.raises(RuntimeError, match="another kind"):
        task.load_task_state({"projection": {}})
    with pytest.raises(RuntimeError, match="setup_ema"):
        task.load_task_state(task.get_task_state(), ema=True)
    with caplog.at_level(logging.WARNING):
        task.load_task_state(None)
    assert "translator" in caplog.text


def test_without_timm_or_with_another_release_it_says_so(monkeypatch):
    path = str(Path(library.__file__))
    with monkeypatch.context() as patch:
        patch.setattr(util, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"ftfast\[timm\]"):
            runpy.run_path(path)
    with monkeypatch.context() as patch:
        import timm.task

        patch.setattr(timm, "__version__", "0.9")  # a copy on the path, whatever is installed
        with pytest.warns(UserWarning, match=r"tested with timm .*1\.0\.31.*0\.9"):
            runpy.run_path(path)
        patch.delattr(timm.task, "TrainingTask")
        with pytest.raises(ImportError, match=r"timm 0\.9 lacks .*TrainingTask"), nullcontext():
            runpy.run_path(path)
