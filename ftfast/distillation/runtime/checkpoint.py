"""Checkpoint folders: ``model.safetensors``, ``state.pt`` (tensors and plain values) and ``settings.json``.

A folder is written aside and renamed, so it is whole or not there; settings.json holds the other files' hashes. Files
from others are read as tensors alone, and code in a pickle is never run.
"""

import hashlib
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from ftfast.conversion.stand_ins import load_torch
from ftfast.distillation.runtime import files
from ftfast.errors import CheckpointError, shown

FORMAT = "ftfast-checkpoint"
VERSION = 1
MODEL_FILE, STATE_FILE, SETTINGS_FILE = "model.safetensors", "state.pt", "settings.json"
_LOAD_PLAIN = partial(torch.load, map_location="cpu", weights_only=True)
_WRAPPERS = ("state_dict", "model", "net")
_MAY_HOLD_CODE = (
    "{} is no file of plain tensors, may hold code, and was not opened; save the model's state_dict() alone."
)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds.

    Attributes:
        tensors: the model's state_dict.
        state: what else the training needs to go on: plain values and tensors.
        description: what the model is (``"kind"``, ``"model"``, ``"data"``, ...), as JSON keeps it.
    """

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    description: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint folder, whole or not at all.

    Raises:
        FileExistsError: the folder is there already.
    """
    # Copies, since safetensors refuses tensors that share memory, as tied weights do.
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in checkpoint.tensors.items()}
    model = save_safetensors(tensors, metadata={"format": "pt"})
    buffer = BytesIO()
    torch.save(checkpoint.state, buffer)
    content = {MODEL_FILE: model, STATE_FILE: buffer.getvalue()}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    description = {"format": FORMAT, "version": VERSION, **checkpoint.description, "sha256": hashes}
    hashes[SETTINGS_FILE] = _hash_description(description)
    with files.new_folder(folder) as aside:
        for name, data in content.items():
            (aside / name).write_bytes(data)
        (aside / SETTINGS_FILE).write_text(json.dumps(description, indent=2, allow_nan=False) + "\n")


def load(folder: Path) -> Checkpoint:
    """Reads a checkpoint folder, tensors on the CPU.

    Raises:
        CheckpointError: no checkpoint, a newer format, or a file that is missing or not as it was written.
    """
    description = read_description(folder)
    content = {}
    for name in (MODEL_FILE, STATE_FILE):
        content[name] = _read_bytes(folder / name)
        if hashlib.sha256(content[name]).hexdigest() != description["sha256"].get(name):
            raise CheckpointError(
                f"{folder / name} is cut short or changed: its hash is not the one in {SETTINGS_FILE}."
            )
    tensors = _parse_safetensors(content[MODEL_FILE], folder / MODEL_FILE)
    state = _parse_torch(content[STATE_FILE], folder / STATE_FILE)
    return Checkpoint(tensors, state, {name: value for name, value in description.items() if name != "sha256"})


def read_description(folder: Path) -> dict[str, Any]:
    """The settings.json of a checkpoint folder.

    Raises:
        CheckpointError: no checkpoint, a newer format, or not as it was written.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint folder: it has no {SETTINGS_FILE}.")
    try:
        description = json.loads(_read_bytes(path))
    except ValueError:
        raise CheckpointError(f"{path} is cut short or not JSON.") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise CheckpointError(f'{folder} is no checkpoint folder: "format" in {SETTINGS_FILE} is not "{FORMAT}".')
    if description.get("version") != VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format version {shown(repr(description.get('version')))}; "
            f"this ftfast reads version {VERSION}."
        )
    hashes = description.get("sha256")
    if not isinstance(hashes, dict) or hashes.get(SETTINGS_FILE) != _hash_description(description):
        raise CheckpointError(f"{path} is cut short or changed: its hash is not the one that it holds.")
    return description


def _hash_description(description: dict[str, Any]) -> str:
    rest = {name: value for name, value in description.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A model's tensors from a checkpoint folder, a ``.safetensors`` file or a torch file, and their description.

    A torch file holds the tensors by name, or has them under "state_dict", "model" or "net", beside which there may be
    objects, such as a program's arguments, that are not read. The description is empty
    for files, which do not say what they are of.

    Raises:
        CheckpointError: nothing there, cut short, not tensors, or a pickle with code in it.
    """
    if path.is_dir():
        checkpoint = load(path)
        return checkpoint.tensors, checkpoint.description
    if path.suffix == ".safetensors":
        return _parse_safetensors(_read_bytes(path), path), {}
    content, objects = _parse_torch(_read_bytes(path), path, load_torch)
    for name in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    named = isinstance(content, dict) and all(isinstance(name, str) for name in content)
    if not named or not content or not all(isinstance(value, Tensor) for value in content.values()):
        no_model = f"{path} holds no model: it takes a dictionary of tensors by name."
        raise CheckpointError(_MAY_HOLD_CODE.format(path) if objects else no_model)
    for name, value in content.items():
        if value.is_nested or value.layout is not torch.strided or value.device.type != "cpu":
            raise CheckpointError(
                f"{path} holds '{shown(name)}' as a sparse, nested or empty tensor; it takes dense ones."
            )
    return content, {}


def read_metadata(path: Path) -> dict[str, str]:
    """What a ``.safetensors`` file says of itself.

    Raises:
        CheckpointError: not there, or no such file.
    """
    try:
        with safe_open(path, "pt") as content:
            return dict(content.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({shown(str(error))}).") from None


def describe_weights(path: Path) -> dict[str, Any] | None:
    """What a folder or an exported file of ours says of itself; None where it is not ours, or cannot be read."""
    with suppress(CheckpointError, OSError, ValueError):
        if path.is_dir():
            return read_description(path)
        if path.suffix == ".safetensors":
            metadata = read_metadata(path)
            return json.loads(metadata["ftfast"]) if "ftfast" in metadata else None
    return None


def fill(model: nn.Module, tensors: dict[str, Tensor], path: Path, model_title: str) -> None:
    """Copies tensors into a model that has exactly these.

    Raises:
        CheckpointError: another model's tensors, with the first that does not fit, or weights that are not finite.
    """
    own = model.state_dict()
    missing, unknown = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    shapes = [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    problem = ""
    if missing:
        problem = f"it lacks {missing[0]!r}" + (f" and has '{shown(unknown[0])}'" if unknown else "")
    elif unknown:
        problem = f"it has '{shown(unknown[0])}', which the model does not have"
    elif shapes:
        name = shapes[0]
        problem = f"{name!r} is {list(tensors[name].shape)} there and {list(own[name].shape)} in the model"
    if problem:
        raise CheckpointError(f"{path} is a checkpoint of another model than {model_title}: {problem}.")
    for name, tensor in tensors.items():  # whose names are the model's own now
        if own[name].is_floating_point() != tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized:
            kind = "floating-point numbers" if own[name].is_floating_point() else "integers"
            raise CheckpointError(f"{path} holds {name!r} in {tensor.dtype}; it takes {kind}.")
        if not torch.isfinite(tensor.to(own[name].dtype)).all():
            raise CheckpointError(f"{path} holds {name!r} with values that are not finite; it takes a trained model.")
    model.load_state_dict(tensors)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None


def _parse_safetensors(content: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return load_safetensors(content)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # the latter for dtypes that torch lacks
        raise CheckpointError(f"{path} is cut short or no safetensors file ({shown(str(error))}).") from None


def _parse_torch(content: bytes, path: Path, load: Callable[[BytesIO], Any] = _LOAD_PLAIN) -> Any:
    cut = f"{path} is cut short or no torch file."
    try:
        if content.startswith(b"PK") and not zipfile.is_zipfile(BytesIO(content)):
            raise CheckpointError(cut)
        with warnings.catch_warnings(action="ignore"):  # torch's remark on a pickle's protocol
            return load(BytesIO(content))
    except pickle.UnpicklingError:
        raise CheckpointError(_MAY_HOLD_CODE.format(path)) from None
    except Exception:  # what the zip and pickle readers raise for broken bytes has no common class
        raise CheckpointError(cut) from None
