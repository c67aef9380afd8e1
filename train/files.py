"""What trainings write and read back: tables, checkpoints, weights; a run's folder."""

from __future__ import annotations

import importlib.metadata
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from data_specs.io.errors import UserError
from data_specs.io.files import only_writer, remove_leftovers, sha256_of, write_atomically
from data_specs.io.text import csv_rows as csv_rows  # tables, as the pipeline writes them
from data_specs.io.text import csv_text as csv_text
from train.models import tensors

DISTRIBUTION = "distill-mos-factory"


@contextmanager
def run_folder(out: Path) -> Iterator[None]:
    """Hold a training's folder for as long as it is written to; what kills left there goes."""
    with only_writer(out):
        remove_leftovers(out)
        yield


def require_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """``ValueError`` naming the first field in which a run's configuration is not the one there."""
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise UserError(
                f"{folder}: holds a run with {name}={before.get(name)!r}, not "
                f"{now.get(name)!r}: give the same, or another --out"
            )


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """``torch.save`` atomically; tensors and plain values only (read with ``weights_only``)."""
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what ``save_checkpoint`` wrote; ``UserError`` naming the file if it is damaged.

    Every member is held to the checksum that ``torch.save`` gave it (``torch.load`` does not look),
    and none is packed: what is read is no larger than the file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    tensors.require_memory(path, path.stat().st_size)
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist())
            damaged = None if packed else archive.testzip()
        if packed or damaged:
            raise zipfile.BadZipFile("packed" if packed else f"checksum of {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{path}: not a checkpoint, or truncated or damaged ({error}); delete it to start again"
        ) from error
    except MemoryError as error:
        raise UserError(f"{path}: does not fit into memory") from error
    except Exception as error:  # a damaged pickle ends in errors of any kind
        raise UserError(f"{path}: not a readable checkpoint: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint: it holds a {type(content).__name__}")
    return content


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """A safetensors file, atomically."""
    whole = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    write_atomically(path, lambda temporary: safetensors.torch.save_file(whole, temporary))


def write_model(path: Path, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """``NAME.safetensors``, then ``NAME.json``: what they are, their hash, this package's version.

    Each atomically.
    """
    write_weights(path, weights)
    facts = {"weights_sha256": sha256_of(path), "version": version()}
    tensors.write_about(path.with_suffix(".json"), {**about, **facts})


@cache
def version() -> str:
    """The version of this package; "source" where it is not installed."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "source"
