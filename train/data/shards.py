"""A folder of shards, here or at an address: its whole shards, and what it says of itself."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_specs.io.cache import Descriptor, RemoteFile, default_cache
from data_specs.io.errors import UserError
from data_specs.io.parse import json_field, json_object
from data_specs.io.storage import LocalFolder, NotFound, RemoteFolder, open_folder
from data_specs.io.tars import BLOCK, index_of
from data_specs.sample import DATASET_FILE
from data_specs.strict import checked, digest
from train.models.calibration import Calibration

MOST_INFO_BYTES = 16 << 20
"""Of ``dataset.json`` and of a shard's record, which lists every dropped sample."""


@dataclass(frozen=True)
class Shard:
    """One whole shard: its tar, and how many samples it holds.

    Of a ``remote`` one ``tar`` is where it is kept on this machine once it was fetched, and held to
    the record's hash then; ``sha256`` is what a local one is still to be held to.
    """

    tar: Path
    samples: int
    remote: RemoteFile | None = None
    sha256: str | None = None

    @property
    def where(self) -> str:
        """Its path or address, for messages."""
        return self.remote.where if self.remote else str(self.tar)

    def open(self) -> Descriptor:
        """The tar, fetched if it is not here. ``UserError`` if it cannot be read."""
        if self.remote:
            return self.remote.open()
        try:
            return Descriptor(self.tar)
        except OSError as error:
            raise UserError(f"{self.tar}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class DatasetInfo:
    """What ``dataset.json`` beside the shards says.

    ``calibration`` is its teacher's: between the labels' scale and those of rated sets.
    """

    recipe_hash: str
    recipe: Any
    teacher: str
    calibration: Calibration | None = None


def read_dataset_info(folder: Path | str) -> DatasetInfo:
    """``dataset.json`` of a folder of shards, by path or address.

    ``ValueError`` if it is missing or lacks a key.
    """
    place = open_folder(folder)
    path = place.shown(DATASET_FILE)
    try:
        (data,) = place.read([DATASET_FILE], MOST_INFO_BYTES)
    except NotFound as error:
        raise UserError(
            f"{error}: is {place.shown()} the output of `python -m pipeline shards`?"
        ) from None
    content = json_object(data, path)
    for key in ("recipe_hash", "recipe", "teacher"):
        if key not in content:
            raise UserError(f"{path}: no key {key!r}; make the dataset again")
    teacher = content["teacher"]
    name = teacher.get("name", teacher) if isinstance(teacher, dict) else teacher
    maps = content.get("teacher_calibration")
    if content.get("teacher_calibration_sha256", digest(maps)) != digest(maps):
        raise UserError(f"{path}: teacher_calibration: was changed; make the dataset again")
    where = f"{path}: teacher_calibration"
    calibration = None if maps is None else checked(Calibration, maps, where)
    return DatasetInfo(str(content["recipe_hash"]), content["recipe"], str(name), calibration)


def list_shards(folder: Path | str) -> list[Shard]:
    """The whole shards of a folder (path, or address as ``open_folder`` takes it), by name.

    A shard is whole when its record (``shard-NNNNNN.json``) stands beside its tar: the record is
    written last. Remote ones are kept in ``default_cache`` when they are first read.
    ``ValueError`` for a folder without one, and for a tar whose size is not the recorded one.
    """
    place = open_folder(folder)
    sizes = place.sizes()
    tars = sorted(name for name in sizes if re.fullmatch(r"shard-[\w-]+\.tar", name))
    where = place.shown()
    if not tars:
        raise UserError(f"{where}: no shards (shard-NNNNNN.tar); make some: python -m pipeline")
    whole = [tar for tar in tars if _record_name(tar) in sizes]
    if not whole:
        raise UserError(
            f"{where}: none of its {len(tars)} shards is whole (no shard-NNNNNN.json record "
            "beside the tar): let the pipeline finish, or run it again"
        )
    records = place.read([_record_name(tar) for tar in whole], MOST_INFO_BYTES)
    shards = [
        _shard(place, tar, sizes[tar], json_object(record, place.shown(_record_name(tar))))
        for tar, record in zip(whole, records, strict=True)
    ]
    if not any(shard.samples for shard in shards):
        raise UserError(f"{where}: none of its {len(whole)} whole shards holds a sample")
    return [shard for shard in shards if shard.samples]


def _record_name(tar: str) -> str:
    return f"{Path(tar).stem}.json"


def _shard(
    place: LocalFolder | RemoteFolder,
    tar: str,
    size: int | None,
    record: dict[str, Any],
) -> Shard:
    where = place.shown(_record_name(tar))
    expected = json_field(record, "tar_bytes", int, where)
    if size is not None and size != expected:  # where a listing has none, the download has
        raise UserError(
            f"{place.shown(tar)}: {size} bytes, but its record says {expected}: it is truncated or "
            f"changed; delete {tar} and {_record_name(tar)} and run the pipeline again"
        )
    sha256 = _sha256(record, where)
    if isinstance(place, LocalFolder):
        shard = Shard(place.path / tar, 0, sha256=sha256)
    else:
        remote = RemoteFile(place, tar, expected, sha256, default_cache())
        shard = Shard(remote.local, 0, remote)
    return replace(shard, samples=_samples(shard, record, expected, where))


def _samples(shard: Shard, record: dict[str, Any], tar_bytes: int, where: str) -> int:
    """How many samples a shard holds. Its record is held to what its size can be: arrays follow."""
    if record.get("samples") is None:
        opened = shard.open()  # it closes the file when it goes
        return len(index_of(opened.number, shard.where))
    samples: int = json_field(record, "samples", int, where)
    if not 0 <= samples * 4 * BLOCK <= tar_bytes:
        raise UserError(f"{where}: {samples} samples in a tar of {tar_bytes} bytes: not possible")
    return samples


def _sha256(record: dict[str, Any], where: str) -> str | None:
    """The tar's hash: it becomes part of a file name."""
    value = record.get("tar_sha256")
    if value is not None and not re.fullmatch("[0-9a-f]{64}", str(value)):
        raise UserError(f"{where}: 'tar_sha256' is no SHA-256; make the shard again")
    return value
