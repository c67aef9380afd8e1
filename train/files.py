"""Files that are whole or not there: written to a temporary name, synced, renamed."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from data_specs.io.errors import UserError
from data_specs.io.files import only_writer, remove_leftovers, write_atomically

DISTRIBUTION = "distill-mos-factory"


@contextmanager
def run_folder(out: Path) -> Iterator[None]:
    """Hold a training's folder for as long as it is written to; what kills left there goes."""
    with only_writer(out):
        remove_leftovers(out)
        yield


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same keys as CSV; None is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


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
    """Read what ``save_checkpoint`` wrote; ``ValueError`` naming the file if it is damaged."""
    if not zipfile.is_zipfile(path):  # what torch.save writes; a truncated one is none
        raise UserError(f"{path}: not a checkpoint, or truncated; delete it to start again")
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, UnpicklingError) as error:
        raise UserError(f"{path}: not a readable checkpoint: {error}") from error
    return content


def write_weights(
    path: Path, weights: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file, atomically."""
    whole = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    write_atomically(
        path, lambda temporary: safetensors.torch.save_file(whole, temporary, metadata)
    )


def version() -> str:
    """The version of this package; "source" where it is not installed."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "source"
