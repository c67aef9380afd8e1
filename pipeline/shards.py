"""Shards: the unit of work, commit and retry.

A shard is written under a temporary name, synced, renamed, and only then its record (``.json``) is
written the same way. Whole means: the record is there, it belongs to this dataset, and the tar has
the size that it states. All else is made again by running the same command again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
from pydantic import Field

from data_specs.sample import CROP_SAMPLES, parse_sample
from data_specs.strict import Strict

FORMAT = 1


@dataclass(frozen=True)
class Row:
    """One sample on its way into a shard: audio and record, or the reason why it was dropped."""

    key: str
    flac: bytes | None
    record: bytes | None
    reason: str = ""
    detail: str = ""


class ShardRecord(Strict):
    """What stands beside a shard once it is whole; ``licences`` counts samples by processor's."""

    format: int = FORMAT
    shard: int
    dataset_hash: str
    samples: int
    planned: int
    tar_bytes: int
    tar_sha256: str
    pcm_sha256: str
    dropped: tuple[dict[str, str], ...]
    versions: dict[str, str]
    licences: dict[str, int] = Field(default_factory=dict)


class ShardError(ValueError):
    """A shard or its folder is not what it should be; the message names it."""


class TooManyDropped(ShardError):
    """A shard lost more samples than the recipe allows and was not committed."""


def sample_key(index: int) -> str:
    """Nine digits: contiguous, sorted, without the dots that WebDataset splits at."""
    return f"{index:09d}"


def shard_name(shard: int) -> str:
    """File name of a shard without its ending."""
    return f"shard-{shard:06d}"


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Write ``path`` whole or not at all: temporary name, sync, rename, sync of the folder."""
    temporary = path.with_name(f".{path.name}.{_here()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""The machine's own: the kernel gives it this number (PROC_PID_INIT_INO)."""


def _here() -> str:
    """Where a process number means one process: this machine, or one container on it.

    Containers on a machine's own network share its name and count their processes each from one.
    """
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return socket.gethostname()
    number = "" if space == FIRST_PID_NAMESPACE else "+" + space[5:-1]
    return socket.gethostname() + number


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that killed processes of this machine left behind."""
    for path in folder.glob(f".*.{_here()}.*.tmp"):
        process = path.name.split(".")[-2]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    with whole_file(path) as file:
        file.write((json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def commit(
    folder: Path,
    shard: int,
    rows: Sequence[Row],
    dataset_hash: str,
    max_dropped_share: float,
    versions: dict[str, str] | None = None,
) -> ShardRecord:
    """Write a shard and its record; ``versions`` are those of the packages that made it.

    Raises ``TooManyDropped`` (and writes nothing) where more than ``max_dropped_share`` of the
    samples were dropped, ``OSError`` where the disk is full or cannot be written.
    """
    dropped = tuple(
        {"key": r.key, "reason": r.reason, "detail": r.detail} for r in rows if r.reason
    )
    if len(dropped) > max_dropped_share * len(rows):
        raise TooManyDropped(_too_many(shard, dropped, len(rows)))
    records = [json.loads(row.record) for row in rows if row.record is not None]
    path = folder / f"{shard_name(shard)}.tar"
    with whole_file(path) as file:
        counter = _HashingFile(file)
        _write_tar(counter, rows)
    record = ShardRecord(
        shard=shard,
        dataset_hash=dataset_hash,
        samples=len(rows) - len(dropped),
        planned=len(rows),
        tar_bytes=counter.size,
        tar_sha256=counter.digest.hexdigest(),
        pcm_sha256=_combined_pcm(records),
        dropped=dropped,
        versions=versions or {},
        licences=dict(sorted(Counter(x for r in records for x in r.get("licences", ())).items())),
    )
    write_json(folder / f"{shard_name(shard)}.json", record.model_dump(mode="json"))
    return record


class _HashingFile:
    """A file that counts and hashes what passes, so that the tar is not read again."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self.digest.update(data)
        return self.file.write(data)


def _write_tar(file: _HashingFile, rows: Iterable[Row]) -> None:
    """A WebDataset tar, as ``webdataset.TarWriter`` writes it.

    That one imports torch: 2 s and 300 MB in each of Ray's writing processes, which need it for
    nothing else.
    """
    with tarfile.open(fileobj=file, mode="w|") as tar:  # type: ignore[call-overload]
        for row in rows:
            if not row.reason:
                _add(tar, f"{row.key}.flac", row.flac or b"")
                _add(tar, f"{row.key}.json", row.record or b"")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # time, user and mode are fixed: the same samples, the same bytes
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _combined_pcm(records: Iterable[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(record["pcm_sha256"].encode())
    return digest.hexdigest()


def _too_many(shard: int, dropped: Sequence[dict[str, str]], planned: int) -> str:
    reasons = ", ".join(f"{n} {r}" for r, n in Counter(d["reason"] for d in dropped).most_common())
    return (
        f"{shard_name(shard)}: {len(dropped)} of {planned} samples dropped ({reasons}), more than "
        f"max_dropped_share allows; first: {dropped[0]['detail']}. Not committed: raise "
        "max_dropped_share in the recipe, or mend the corpus (which makes another dataset)"
    )


def read_record(folder: Path, shard: int) -> ShardRecord | None:
    """The record of a shard, or none where there is none. ``ShardError`` where it is not one."""
    path = folder / f"{shard_name(shard)}.json"
    try:
        return ShardRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ShardError(f"{path}: not a shard record: {error}") from error


def is_whole(folder: Path, shard: int, dataset_hash: str, planned: int) -> bool:
    """Whether a shard is done: its record is there, is ours, and the tar has the stated size.

    One that holds more than the ``planned`` samples (a longer run made it) is done too.
    """
    try:
        record = read_record(folder, shard)
    except ShardError:
        return False
    if record is None or record.dataset_hash != dataset_hash or record.planned < planned:
        return False
    tar = folder / f"{shard_name(shard)}.tar"
    return tar.is_file() and tar.stat().st_size == record.tar_bytes


def find_shards(folder: Path) -> list[int]:
    """Numbers of all shards that have a tar or a record, sorted."""
    names = {p.stem for p in folder.glob("shard-*") if p.suffix in (".tar", ".json")}
    return sorted(int(name.removeprefix("shard-")) for name in names)


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of a tar's members. ``ShardError`` where the tar is damaged."""
    try:
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isfile() else None
                if content is None:
                    raise ShardError(f"{path}: member {member.name!r} is not a plain file")
                yield member.name, content.read()
    except (tarfile.TarError, EOFError) as error:
        raise ShardError(f"{path}: damaged or truncated tar: {error}") from error


def samples(path: Path) -> Iterator[tuple[str, bytes, bytes]]:
    """Key, FLAC and JSON of each sample. ``ShardError`` where one lacks its other half."""
    found = members(path)
    for name, content in found:
        key, _, ending = name.partition(".")
        partner, record = next(found, ("", b""))
        if ending != "flac" or partner != f"{key}.json":
            raise ShardError(f"{path}: sample {key}: expected {key}.flac and then {key}.json")
        yield key, content, record


def verify_shard(
    folder: Path, shard: int, dataset_hash: str, rows: range, deep: bool = False
) -> list[str]:
    """Everything that is wrong with a shard, as lines; none where it is whole.

    ``rows`` are the plan's rows that belong in it: each is a sample or was dropped. ``deep``
    decodes the audio and holds it to its hash and its length.
    """
    path = folder / f"{shard_name(shard)}.tar"
    try:
        record = read_record(folder, shard)
        if record is None:
            return [f"{path}: no record beside it: never committed; run the same command again"]
        if not path.is_file():
            return [f"{path}: missing, though its record is there; run the same command again"]
        return list(_problems(path, record, dataset_hash, rows, deep))
    except ShardError as error:
        return [str(error)]


def _problems(
    path: Path, record: ShardRecord, dataset_hash: str, rows: range, deep: bool
) -> Iterator[str]:
    if record.dataset_hash != dataset_hash:
        yield f"{path}: its record belongs to another dataset ({record.dataset_hash[:12]})"
    size = path.stat().st_size
    if size != record.tar_bytes:
        yield f"{path}: {size} bytes, its record says {record.tar_bytes}; truncated or replaced"
        return
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != record.tar_sha256:
            yield f"{path}: content differs from its record's hash: corrupted"
    keys = [drop["key"] for drop in record.dropped]
    for key, flac, data in samples(path):
        keys.append(key)
        yield from _sample_problems(path, key, flac, data, deep)
    yield from _key_problems(path, keys, rows)


def _key_problems(path: Path, keys: list[str], rows: range) -> Iterator[str]:
    """Every row of the plan must be there or be recorded as dropped, once, and no other."""
    expected = {sample_key(index) for index in rows}
    twice = sorted(key for key, count in Counter(keys).items() if count > 1)
    for what, names in (
        ("missing, neither made nor dropped", sorted(expected - set(keys))),
        ("not part of this shard", sorted(set(keys) - expected)),
        ("there more than once", twice),
    ):
        if names:
            yield f"{path}: {len(names)} samples {what}, such as {names[0]}"


def _sample_problems(path: Path, key: str, flac: bytes, data: bytes, deep: bool) -> Iterator[str]:
    where = f"{path}: {key}"
    try:
        record = parse_sample(data, f"{where}.json")
    except ValueError as error:
        yield str(error)
        return
    if record.key != key:
        yield f"{where}.json: is the record of sample {record.key}"
    if deep:
        yield from _audio_problems(where, flac, record.pcm_sha256)


def _audio_problems(where: str, flac: bytes, expected_sha256: str) -> Iterator[str]:
    from pipeline.audio import decode_flac
    from pipeline.render import pcm_sha256

    try:
        pcm = decode_flac(flac)
    except ValueError as error:
        yield f"{where}.flac: {error}"
        return
    if len(pcm) != CROP_SAMPLES:
        yield f"{where}.flac: {len(pcm)} samples, must be {CROP_SAMPLES}"
    if pcm_sha256(pcm) != expected_sha256:
        yield f"{where}.flac: audio differs from the hash in its record"
