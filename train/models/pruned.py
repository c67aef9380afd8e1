"""Pruned models on disk: only the weights that are left, and where they belong.

A folder with ``model.json`` (what it is) and ``model.sparse.safetensors``. Of each pruned tensor
that file has the living values in the order of their indices, and their positions: a bit a weight,
or the gaps between living ones, a byte each, whichever is smaller (gaps below about an eighth
alive). Other tensors are whole. Plain tensors and JSON: nothing in it is executed.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of, write_atomically
from data_specs.strict import Strict
from train.files import version
from train.models import tensors

SPARSE_FILE, DENSE_FILE, ABOUT_FILE = "model.sparse.safetensors", "model.safetensors", "model.json"

HEADER = "pruned"
"""The one key of the file's metadata: several would be written in a random order."""

VALUES, PLACES = "#values", "#places"
"""Endings of the names of the two tensors that a pruned one is stored as."""

SKIP = 255
"""A byte of gap coding that is no gap: 255 dead weights, and no living one behind them."""

Coding = Literal["whole", "bits", "gaps"]
Bytes = NDArray[np.uint8]


class _Stored(Strict):
    """How one tensor is stored; the checksum is that of its own bytes in the file."""

    coding: Coding
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    crc32: int


# --- positions ------------------------------------------------------------------------------------


def encode_gaps(places: NDArray[np.int64]) -> Bytes:
    """Ascending positions as gaps: how many dead weights are before each living one, a byte each.

    A gap of 255 or more is that many times ``SKIP``, then the rest.
    """
    gaps = np.diff(places, prepend=-1) - 1
    skips, rest = np.divmod(gaps, SKIP)
    ends = np.cumsum(skips + 1) - 1
    coded = np.full(int(ends[-1]) + 1 if len(ends) else 0, SKIP, np.uint8)
    coded[ends] = rest
    return coded


def decode_gaps(coded: Bytes) -> NDArray[np.int64]:
    """The positions that ``encode_gaps`` coded."""
    living = coded < SKIP
    places: NDArray[np.int64] = np.cumsum(coded.astype(np.int64) + living)[living] - 1
    return places


def _coded(mask: Tensor) -> tuple[Coding, Bytes]:
    """The positions of the living weights in the smaller of the two forms."""
    alive = mask.flatten().numpy()
    bits, gaps = np.packbits(alive), encode_gaps(np.flatnonzero(alive))
    return ("gaps", gaps) if len(gaps) < len(bits) else ("bits", bits)


def _decoded(stored: _Stored, coded: Bytes) -> Tensor:
    """The mask, flat; ``ValueError`` for positions that the tensor does not have."""
    count = math.prod(stored.shape)
    if stored.coding == "bits":
        if len(coded) != -(-count // 8) or np.unpackbits(coded)[count:].any():
            raise UserError(f"positions of {8 * len(coded)} weights, the tensor has {count}")
        return torch.from_numpy(np.unpackbits(coded, count=count).astype(bool))
    places = decode_gaps(coded)
    if len(places) and places[-1] >= count:
        raise UserError(f"a weight at {places[-1]}, the tensor has {count}")
    mask = np.zeros(count, bool)
    mask[places] = True
    return torch.from_numpy(mask)


# --- writing --------------------------------------------------------------------------------------


def save_pruned(
    folder: Path,
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    about: Mapping[str, Any],
) -> None:
    """Write a pruned model into ``folder``, each file atomically, the description last.

    ``weights`` are a state dict; ``masks`` (bool, by name) are True where some of its tensors are
    alive; dead weights must be zero (of either sign; they come back as +0). ``about`` goes into
    ``model.json`` with the file's SHA-256 and this package's version; to be loaded as a scorer a
    student needs ``config`` there (its ``StudentConfig``), a teacher what
    ``train.models.head_teacher.describe`` gives. ``ValueError`` naming the tensor that a mask does
    not fit.
    """
    content: dict[str, Tensor] = {}
    header: dict[str, Any] = {}
    for name, tensor in weights.items():
        parts, stored = _stored(name, tensor.detach().cpu().contiguous(), masks.get(name))
        content |= parts
        header[name] = stored.model_dump()
    if strange := sorted(masks.keys() - weights.keys()):
        raise ValueError(f"a mask for {strange[0]!r}, but no such weights")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SPARSE_FILE
    metadata = {HEADER: json.dumps(header, sort_keys=True)}
    write_atomically(path, lambda part: safetensors.torch.save_file(content, part, metadata))
    described = {**about, "weights_sha256": sha256_of(path), "version": version()}
    tensors.write_about(folder / ABOUT_FILE, described)


def _stored(name: str, tensor: Tensor, mask: Tensor | None) -> tuple[dict[str, Tensor], _Stored]:
    """One tensor as what goes into the file, and how."""
    coding: Coding = "whole"
    parts = {name: tensor}
    if mask is not None and not bool(mask.all()):
        mask = _checked(name, tensor, mask.cpu())
        coding, places = _coded(mask)
        parts = {name + VALUES: tensor[mask], name + PLACES: torch.from_numpy(places)}
    stored = _Stored(coding=coding, shape=tuple(tensor.shape), crc32=_checksum(*parts.values()))
    return parts, stored


def _checked(name: str, tensor: Tensor, mask: Tensor) -> Tensor:
    if mask.shape != tensor.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask of {name!r}: {mask.dtype} {tuple(mask.shape)}, not bool {tuple(tensor.shape)}"
        )
    if bool(tensor[~mask].any()):
        raise ValueError(f"tensor {name!r}: a dead weight is not zero: apply the masks first")
    return mask


def _checksum(*tensors: Tensor) -> int:
    total = 0
    for tensor in tensors:
        total = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, total)
    return total


# --- reading --------------------------------------------------------------------------------------


def is_pruned(folder: Path) -> bool:
    """Whether a folder holds what ``save_pruned`` writes."""
    return (folder / SPARSE_FILE).is_file()


def read_about(folder: Path) -> dict[str, Any]:
    """``model.json`` of a model's folder; ``ValueError`` naming it if it is missing or damaged."""
    return tensors.read_about(folder / ABOUT_FILE)


def load_pruned(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict, dead weights as zeros, and ``model.json`` of a folder of ``save_pruned``.

    Living weights come back bit for bit. ``ValueError`` naming the file, and the tensor where it is
    one that is damaged.
    """
    weights = {name: tensor for name, tensor, _ in read_sparse(folder / SPARSE_FILE)}
    return weights, pruned_sha256(folder)[1]


def pruned_sha256(folder: Path) -> tuple[str, dict[str, Any]]:
    """The hash of such a folder's weights, and ``model.json``; no tensor is read.

    ``ValueError`` naming the file where it is not the one that ``model.json`` is about.
    """
    path, about = folder / SPARSE_FILE, read_about(folder)
    if not path.is_file():
        raise UserError(f"{path} is missing")
    sha256 = sha256_of(path)
    if about.get("weights_sha256") != sha256:
        raise UserError(f"{path}: not the file that {ABOUT_FILE} beside it is about")
    return sha256, about


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a whole model: pruned, or as ``train fit`` writes it."""
    return (folder / ABOUT_FILE).is_file() and (
        is_pruned(folder) or (folder / DENSE_FILE).is_file()
    )


def parameters_left(folder: Path, network: nn.Module) -> int:
    """Parameters of a pruned model that are alive: as ``model.json`` says, else counted."""
    stated = read_about(folder).get("parameters")
    if isinstance(stated, int) and stated > 0:
        return stated
    dead, path = 0, folder / SPARSE_FILE
    with safetensors.safe_open(path, "pt") as file:
        for name, stored in _header(path, file.metadata() or {}).items():
            if stored.coding != "whole":
                dead += math.prod(stored.shape) - file.get_slice(name + VALUES).get_shape()[0]
    return sum(parameter.numel() for parameter in network.parameters()) - dead


def read_sparse(path: Path) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Name, tensor and mask (None where it is whole) of every tensor of a sparse file."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        with safetensors.safe_open(path, "pt") as file:
            for name, stored in _header(path, file.metadata() or {}).items():
                with _named_errors(path, name):
                    tensor, mask = _restored(file, name, stored)
                yield name, tensor, mask
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: damaged: {error}") from error


def _header(path: Path, metadata: Mapping[str, str]) -> dict[str, _Stored]:
    try:
        header = json.loads(metadata[HEADER])
        entries = {name: _Stored.model_validate(entry) for name, entry in header.items()}
    except (KeyError, AttributeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a pruned model: {error!r}") from error
    weights = sum(math.prod(stored.shape) for stored in entries.values())
    tensors.require_memory(path, 4 * weights)
    return entries


@contextmanager
def _named_errors(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: tensor {name!r} is damaged: {error}") from error


def _restored(file: Any, name: str, stored: _Stored) -> tuple[Tensor, Tensor | None]:
    """One tensor as it was, and its mask."""
    names = [name] if stored.coding == "whole" else [name + VALUES, name + PLACES]
    parts = [file.get_tensor(part) for part in names]
    if _checksum(*parts) != stored.crc32:
        raise UserError("its checksum is another")
    if stored.coding == "whole":
        return parts[0].reshape(stored.shape), None
    values, places = parts
    mask = _decoded(stored, places.numpy())
    if int(mask.sum()) != len(values):
        raise UserError(f"{len(values)} values for {int(mask.sum())} positions")
    tensor = torch.zeros(len(mask), dtype=values.dtype)
    tensor[mask] = values
    return tensor.reshape(stored.shape), mask.reshape(stored.shape)
