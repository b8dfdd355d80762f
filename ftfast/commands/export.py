"""``ftfast export``: a student by itself, as a file that needs no ftfast to be read."""

import argparse
import json
import os
import warnings
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.export import ExportedProgram

from ftfast.commands.model_card import model_card
from ftfast.commands.trained import Trained, read_trained
from ftfast.distillation.data import class_names
from ftfast.distillation.data.photographs.decoding import of_photographs
from ftfast.distillation.runtime import files, hub
from ftfast.errors import DistillError

SUFFIXES = {
    ".safetensors": "the state_dict",
    ".pt2": "the program that torch.export makes, for any batch size",
    ".onnx": "the same for other runtimes, by the packages of ftfast[onnx]",
}
_PUSHED = (".safetensors", ".pt2")
PROGRAM_DESCRIPTION = "ftfast.json"
EXAMPLES = 4
# Between the model and what is read back from the file, on the same images.
LARGEST_ERROR = 1e-5


class ExportError(DistillError):
    """A student that could not be written, or not read back as it was."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    kinds = "; ".join(f"{suffix}: {what}" for suffix, what in SUFFIXES.items())
    parser.add_argument("checkpoint", metavar="CHECKPOINT_FOLDER", help="a folder with model.safetensors")
    parser.add_argument("output", metavar="FILE", nargs="?", help=f"what to write ({kinds})")
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help=f"put {', '.join(map(_on_hub, _PUSHED))} and a card with the run's table into this model's repository on "
        "the Hugging Face Hub, and FILE where it is of another kind",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE where it is there")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Writes the file, reads it back and says how far its logits are from the checkpoint's."""
    if args.output is None and args.push is None:
        raise ExportError("neither FILE nor --push is given; give one of them.")
    if args.push is not None:
        hub.check_writable(args.push)
    found: dict[str, Any] = {}
    if args.output is not None:
        found = export_checkpoint(Path(args.checkpoint), Path(args.output), overwrite=args.overwrite)
    if args.push is not None:
        also = () if args.output is None else (Path(args.output).suffix,)
        found["pushed"] = push_checkpoint(Path(args.checkpoint), args.push, dict.fromkeys((*_PUSHED, *also)))
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    if args.output is not None:
        print(
            f"{found['output']}: {found['title']}, {found['parameters']:,} parameters, {found['bytes']:,} bytes; read "
            f"back, its logits are off by {found['error']:.1e}"
        )
    if args.push is not None:
        print(f"{args.push}: {found['pushed']}")
    return 0


def push_checkpoint(folder: Path, repository: str, suffixes: Iterable[str] = _PUSHED) -> str:
    """Puts the model of a checkpoint folder with its card into a repository on the Hub; returns the commit's address.

    Args:
        suffixes: of the files, which are named ``model`` there.

    Raises:
        DistillError: as :func:`export_checkpoint`, or a repository that cannot be written.
    """
    with TemporaryDirectory() as made:
        files_there = [_on_hub(suffix) for suffix in suffixes]
        for name in files_there:
            export_checkpoint(folder, Path(made, name))
        trained = read_trained(folder, torch.device("cpu"))
        files.write_text(Path(made, "README.md"), model_card(trained, folder, repository, files_there))
        return hub.publish(Path(made), repository, f"{trained.title}, by ftfast export")


def _on_hub(suffix: str) -> str:
    return f"model{suffix}"


def export_checkpoint(folder: Path, output: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Writes the model of a checkpoint folder, float32 and in eval mode, without translator or teacher.

    Args:
        output: ``.safetensors`` for the state_dict, with the model's description as metadata; ``.pt2`` for the program
            of torch.export, which takes images ``[N, C, H, W]`` of any N, normalised as the data set's are; the
            description is its extra file :data:`PROGRAM_DESCRIPTION`. ``.onnx`` for the same in one ONNX file, from
            ``images`` to ``logits``, with the description among its metadata as ``ftfast``.
        overwrite: replace ``output`` where it is there.

    Raises:
        CheckpointError: not a whole checkpoint of a teacher or student.
        ExportError: another suffix, a file that is there, one that does not give the model's logits, or packages that
            are missing.
    """
    if output.suffix not in SUFFIXES:
        raise ExportError(f"output is {output}; it takes a name that ends in {', '.join(SUFFIXES)}.")
    if output.exists() and not overwrite:
        raise ExportError(f"output {output} is there already; give --overwrite or another name.")
    trained = read_trained(folder, torch.device("cpu"))
    model = trained.model.to(memory_format=torch.contiguous_format)
    generator = torch.Generator().manual_seed(0)
    shape = trained.dataset.image_shape
    images = torch.randn(EXAMPLES, *shape, generator=generator)
    aside = output.with_name(f".{output.stem}.{os.getpid()}{output.suffix}")
    try:
        logits = _WRITERS[output.suffix](trained, model, images, aside)
        with torch.no_grad():
            expected = model(images[:2])
        error = float((logits.detach() - expected).norm() / expected.norm())
        if not error <= LARGEST_ERROR:
            raise ExportError(f"the exported model's logits are off by {error:.1e} (limit {LARGEST_ERROR:.0e}).")
        os.replace(aside, output)
    finally:
        aside.unlink(missing_ok=True)
    return {
        "output": str(output),
        "title": trained.title,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": output.stat().st_size,
        "error": error,
    }


def _write_tensors(trained: Trained, model: nn.Module, images: Tensor, path: Path) -> Tensor:
    metadata = {"format": "pt", "ftfast": _described(trained)}
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    files.write_bytes(path, save(tensors, metadata=metadata))
    with torch.no_grad():
        return torch.func.functional_call(model, load_file(path), (images[:2],))


def _described(trained: Trained) -> str:
    """The model and its images in JSON, those of photographs with what they are normalised by."""
    described = {
        key: trained.description[key]
        for key in ("model", "data", "photographs", class_names.KEY)
        if key in trained.description
    }
    if "photographs" in described:
        described["photographs"] = {**described["photographs"], **of_photographs(described["photographs"])._asdict()}
    return json.dumps(described)


def _program(trained: Trained, model: nn.Module, images: Tensor) -> ExportedProgram:
    samples = torch.export.Dim("samples", min=1)
    try:
        return torch.export.export(model, (images,), dynamic_shapes=({0: samples},))
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(f"torch.export does not take this {trained.title}: {reason}") from None


def _write_program(trained: Trained, model: nn.Module, images: Tensor, path: Path) -> Tensor:
    program = _program(trained, model, images)
    content = BytesIO()  # torch would end with a traceback where the file cannot be written
    torch.export.save(program, content, extra_files={PROGRAM_DESCRIPTION: _described(trained)})
    files.write_bytes(path, content.getvalue())
    return torch.export.load(path).module()(images[:2])


def _write_onnx(trained: Trained, model: nn.Module, images: Tensor, path: Path) -> Tensor:
    try:
        import onnx
        import onnxscript  # noqa: F401  torch's exporter needs it
        from onnx.reference import ReferenceEvaluator
    except ModuleNotFoundError as error:
        raise ExportError(f"an .onnx file needs the package {error.name}; pip install 'ftfast[onnx]'.") from None
    program = _program(trained, model, images)
    with warnings.catch_warnings(action="ignore"):  # torch's remarks on its own registrations
        made = torch.onnx.export(
            program, (images,), input_names=["images"], output_names=["logits"], dynamo=True, verbose=False
        )
    assert made is not None
    content = made.model_proto
    onnx.helper.set_model_props(content, {"ftfast": _described(trained)})
    onnx.checker.check_model(content)
    files.write_bytes(path, content.SerializeToString())
    (logits,) = ReferenceEvaluator(onnx.load(path)).run(None, {"images": images[:2].numpy()})
    return torch.from_numpy(logits)


_WRITERS = {".safetensors": _write_tensors, ".pt2": _write_program, ".onnx": _write_onnx}
