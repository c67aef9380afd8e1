"""Shards: the unit of work, commit and retry.

A shard is written whole (``data_specs.io.storage``: on a disk by a temporary name, sync, rename;
at an address by one upload that is then compared), and only then its record (``.json``) the same
way. Whole means: the record is there, it belongs to this dataset, and the tar has the size that it
states. All else is made again by running the same command again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import Field

from data_specs.io.addresses import PathOrUrl
from data_specs.io.errors import UserError
from data_specs.io.storage import LocalFolder, NotFound, RemoteFolder, open_folder
from data_specs.io.tars import audio_of, index_of, record_of
from data_specs.sample import (
    CROP_SAMPLES,
    MOST_SHARD_SAMPLES,
    MOST_SHARDS,
    parse_sample,
    sample_key,
    shard_name,
)
from data_specs.strict import Strict
from pipeline.render.label import Row

FORMAT = 1

MOST_INFO_BYTES = 64 << 20
"""Of a dataset's description and of a shard's record, which lists every dropped sample."""

LOOKS = 4
"""At a folder in which records vanish between its listing and their reading."""


MOS_BINS = 40
"""Scores are counted in steps of 0.1 from 1 to 5."""

UNKNOWN = "unknown"
"""The language of a recording for which the corpus names none."""


Count = Annotated[int, Field(ge=0, le=MOST_SHARD_SAMPLES)]


class Summary(Strict):
    """Samples by what they were made of, and their scores.

    ``corpora`` counts a sample once for each corpus that it draws from (speech, noise, room),
    ``processors`` once for each processor that it went through.
    """

    corpora: dict[str, int] = Field(default_factory=dict)
    languages: dict[str, int] = Field(default_factory=dict)
    processors: dict[str, int] = Field(default_factory=dict)
    mos: Annotated[tuple[int, ...], Field(min_length=MOS_BINS, max_length=MOS_BINS)] = (
        0,
    ) * MOS_BINS
    mos_sum: float = 0.0


class ShardRecord(Strict):
    """What stands beside a shard once it is whole; ``licences`` counts samples by processor's."""

    format: int = FORMAT
    shard: Annotated[int, Field(ge=0, le=MOST_SHARDS)]
    dataset_hash: str
    samples: Count
    planned: Count
    tar_bytes: Annotated[int, Field(ge=0)]
    tar_sha256: str
    pcm_sha256: str
    dropped: tuple[dict[str, str], ...]
    versions: dict[str, str]
    licences: dict[str, int] = Field(default_factory=dict)
    summary: Summary = Summary()


class ShardError(UserError):
    """A shard or its folder is not what it should be; the message names it."""


class TooManyDropped(ShardError):
    """A shard lost more samples than the recipe allows and was not committed."""


def write_json(folder: PathOrUrl, name: str, value: Any) -> None:
    """Write JSON whole or not at all."""
    with open_folder(folder).writing(name) as file:
        file.write((json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def commit(
    folder: PathOrUrl,
    shard: int,
    rows: Sequence[Row],
    dataset_hash: str,
    max_dropped_share: float,
    versions: dict[str, str] | None = None,
) -> ShardRecord:
    """Write a shard and its record; ``versions`` are those of the packages that made it.

    Raises ``TooManyDropped`` (and writes nothing) where more than ``max_dropped_share`` of the
    samples were dropped, ``OSError`` where the disk is full, or the folder cannot be written.
    """
    dropped = tuple(
        {"key": r.key, "reason": r.reason, "detail": r.detail} for r in rows if r.reason
    )
    if len(dropped) > max_dropped_share * len(rows):
        raise TooManyDropped(_too_many(shard, dropped, len(rows)))
    records = [json.loads(row.record) for row in rows if row.record is not None]
    place = open_folder(folder)
    place.remove(f"{shard_name(shard)}.json")  # of an older attempt: it never speaks for this tar
    with place.writing(f"{shard_name(shard)}.tar") as file:
        counter = HashingFile(file)
        _write_tar(counter, rows)
    record = ShardRecord(
        shard=shard,
        dataset_hash=dataset_hash,
        samples=len(rows) - len(dropped),
        planned=len(rows),
        tar_bytes=counter.size,
        tar_sha256=counter.digest.hexdigest(),
        pcm_sha256=hashlib.sha256("".join(r["pcm_sha256"] for r in records).encode()).hexdigest(),
        dropped=dropped,
        versions=versions or {},
        licences=dict(sorted(Counter(x for r in records for x in r.get("licences", ())).items())),
        summary=summarise(records),
    )
    write_json(folder, f"{shard_name(shard)}.json", record.model_dump(mode="json"))
    return record


class HashingFile:
    """Counts and hashes what is written to a file, so that the tar is not read again."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self.digest.update(data)
        return self.file.write(data)


def _write_tar(file: HashingFile, rows: Iterable[Row]) -> None:
    """Write a WebDataset tar. Time, owner and mode are fixed: the same samples, the same bytes."""
    from webdataset import TarWriter  # here, for it imports torch

    with TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
        for row in rows:
            if not row.reason:
                tar.write({"__key__": row.key, "flac": row.flac, "json": row.record})


def _too_many(shard: int, dropped: Sequence[dict[str, str]], planned: int) -> str:
    reasons = ", ".join(f"{n} {r}" for r, n in Counter(d["reason"] for d in dropped).most_common())
    return (
        f"{shard_name(shard)}: {len(dropped)} of {planned} samples dropped ({reasons}), more than "
        f"max_dropped_share allows; first: {dropped[0]['detail']}. Not committed: raise "
        "max_dropped_share in the recipe, or mend the corpus (which makes another dataset)"
    )


def summarise(records: Iterable[Mapping[str, Any]]) -> Summary:
    """Count the samples of a shard by their records (JSON, as ``SampleRecord``)."""
    corpora: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    processors: Counter[str] = Counter()
    bins = [0] * MOS_BINS
    total = 0.0
    for record in records:
        plan = record["plan"]
        parts = [plan.get(part) or {} for part in ("speech", "noise", "room")]
        corpora.update({part["corpus"] for part in parts if part.get("corpus")})
        languages[parts[0].get("language") or UNKNOWN] += 1
        processors.update({step["kind"] for step in plan.get("steps") or ()})
        bins[mos_bin(record["mos"])] += 1
        total += record["mos"]
    return Summary(
        corpora=dict(sorted(corpora.items())),
        languages=dict(sorted(languages.items())),
        processors=dict(sorted(processors.items())),
        mos=tuple(bins),
        mos_sum=round(total, 6),
    )


def mos_bin(mos: float) -> int:
    """Which step of 0.1 a score is in; 5 itself is in the last."""
    return min(max(int((mos - 1) * 10 + 1e-9), 0), MOS_BINS - 1)


@dataclass(frozen=True)
class Ledger:
    """The shards of a folder as one listing and their records show them.

    ``tars`` are bytes (none where a listing does not say), ``wrong`` says what is no record.
    """

    tars: dict[int, int | None]
    records: dict[int, ShardRecord]
    wrong: dict[int, str] = field(default_factory=dict)

    @property
    def numbers(self) -> list[int]:
        """Every shard that has a tar or a record, sorted."""
        return sorted({*self.tars, *self.records, *self.wrong})

    @property
    def uncommitted(self) -> list[int]:
        """Tars without a record: what an interrupted run left, or another is writing."""
        return sorted(self.tars.keys() - self.records.keys() - self.wrong.keys())

    def problem(self, shard: int, dataset_hash: str, planned: int) -> str:
        """What listing and record show to be wrong with a shard; nothing where it is whole.

        One that holds more than the ``planned`` samples (a longer run made it) is whole too.
        """
        if shard in self.wrong:
            return self.wrong[shard]
        record = self.records.get(shard)
        if record is None:
            return "no record beside it: never committed; run the same command again"
        if shard not in self.tars:
            return "missing, though its record is there; run the same command again"
        if record.dataset_hash != dataset_hash:
            return f"its record belongs to another dataset ({record.dataset_hash[:12]})"
        size = self.tars[shard]
        if size not in (record.tar_bytes, None):
            return f"{size} bytes, its record says {record.tar_bytes}; truncated or replaced"
        if record.planned < planned:
            return f"holds {record.planned} of {planned} planned samples: a shorter run made it"
        return ""


def read_ledger(folder: PathOrUrl, only: Iterable[int] | None = None) -> Ledger:
    """The shards of a folder, or some of them: one listing, and the records together.

    A record that is listed and then gone is of a shard that somebody makes again: looked at anew.
    """
    for _ in range(LOOKS):
        with suppress(NotFound):
            return _read_ledger(folder, only)
    return _read_ledger(folder, only)


def _read_ledger(folder: PathOrUrl, only: Iterable[int] | None) -> Ledger:
    place = open_folder(folder)
    sizes = _listing(place)
    tars, named = _numbers(sizes, "tar"), _numbers(sizes, "json")
    wanted = named.keys() if only is None else named.keys() & set(only)
    numbers = sorted(wanted)
    found = place.read([named[number] for number in numbers], MOST_INFO_BYTES)
    records, wrong = {}, {}
    for number, data in zip(numbers, found, strict=True):
        try:
            records[number] = parse_record(data, place.shown(named[number]))
        except ShardError as error:
            wrong[number] = str(error)
    return Ledger({n: sizes[name] for n, name in tars.items()}, records, wrong)


def _listing(place: LocalFolder | RemoteFolder) -> dict[str, int | None]:
    """What is in a folder; nothing where it is not there yet."""
    try:
        return place.sizes()
    except NotFound:
        return {}


def _numbers(names: Iterable[str], ending: str) -> dict[int, str]:
    """Shard numbers and their file names of one kind."""
    matches = (re.fullmatch(rf"shard-(\d{{6}})\.{ending}", name) for name in names)
    return {int(match[1]): match[0] for match in matches if match}


def parse_record(data: bytes, where: str) -> ShardRecord:
    """A shard's record. ``ShardError`` naming ``where`` it was read where it is not one."""
    try:
        return ShardRecord.model_validate_json(data)
    except ValueError as error:
        raise ShardError(f"{where}: not a shard record: {error}") from error


def read_record(folder: PathOrUrl, shard: int) -> ShardRecord | None:
    """The record of a shard, or none where there is none. ``ShardError`` where it is not one."""
    place, name = open_folder(folder), f"{shard_name(shard)}.json"
    try:
        (data,) = place.read([name], MOST_INFO_BYTES)
    except NotFound:
        return None
    return parse_record(data, place.shown(name))


def one_shard(folder: PathOrUrl, shard: int) -> Ledger:
    """The ledger of one shard, without a listing; for many, read the folder's once."""
    found = Ledger({}, {})
    try:
        if record := read_record(folder, shard):
            found.records[shard] = record
            found.tars[shard] = open_folder(folder).size(f"{shard_name(shard)}.tar")
    except NotFound:
        pass
    except ShardError as error:
        found.wrong[shard] = str(error)
    return found


def find_shards(folder: PathOrUrl) -> list[int]:
    """Numbers of all shards that have a tar or a record, sorted: one listing."""
    sizes = _listing(open_folder(folder))
    return sorted(_numbers(sizes, "tar").keys() | _numbers(sizes, "json").keys())


def shown_tar(folder: PathOrUrl, shard: int) -> str:
    """A shard's tar, for messages."""
    return open_folder(folder).shown(f"{shard_name(shard)}.tar")


def samples(tar: Path | IO[bytes], where: str = "") -> Iterator[tuple[str, bytes, bytes]]:
    """Key, FLAC and JSON of each sample. An open file needs ``where`` it is from, for messages.

    Raises ``ShardError`` where the tar is damaged, or holds anything but whole samples.
    """
    where = where or str(tar)
    try:
        with tar.open("rb") if isinstance(tar, Path) else nullcontext(tar) as opened:
            file = opened.fileno()
            for span in index_of(file, where):
                yield span.key, audio_of(file, where, span), record_of(file, where, span)
    except UserError as error:
        raise ShardError(str(error)) from error


def samples_of(folder: PathOrUrl, shard: int) -> Iterator[tuple[str, bytes, bytes]]:
    """The samples of a shard wherever it is; ``NotFound`` without its tar."""
    place, name = open_folder(folder), f"{shard_name(shard)}.tar"
    with place.open(name) as file:
        yield from samples(file, place.shown(name))


def verify_shard(
    folder: PathOrUrl, shard: int, dataset_hash: str, rows: range, deep: bool = False
) -> list[str]:
    """Everything that is wrong with a shard, as lines; none where it is whole.

    ``rows`` are the plan's rows that belong in it: each is a sample or was dropped. Every byte is
    read; ``deep`` also decodes the audio and holds it to its hash and its length.
    """
    place, name = open_folder(folder), f"{shard_name(shard)}.tar"
    where = place.shown(name)
    ledger = one_shard(folder, shard)
    if problem := ledger.problem(shard, dataset_hash, planned=0):
        return [f"{where}: {problem}"]
    try:
        with place.open(name) as file:
            return list(_problems(file, where, ledger.records[shard], rows, deep))
    except (NotFound, ShardError) as error:
        return [str(error)]


def _problems(
    file: IO[bytes], where: str, record: ShardRecord, rows: range, deep: bool
) -> Iterator[str]:
    digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]  # IO has readinto
    if digest.hexdigest() != record.tar_sha256:
        yield f"{where}: content differs from its record's hash: corrupted"
    file.seek(0)
    keys = [drop["key"] for drop in record.dropped]
    for key, flac, data in samples(file, where):
        keys.append(key)
        yield from _sample_problems(where, key, flac, data, deep)
    yield from _key_problems(where, keys, rows)


def ledger_problems(
    folder: PathOrUrl, ledger: Ledger, shard: int, dataset_hash: str, planned: int
) -> list[str]:
    """What a listing and the records alone show to be wrong with a shard."""
    problem = ledger.problem(shard, dataset_hash, planned)
    if not problem:
        record = ledger.records[shard]
        if (record.samples + len(record.dropped), record.planned) != (planned, planned):
            problem = f"{record.samples} samples and {len(record.dropped)} drops, not {planned}"
    return [f"{shown_tar(folder, shard)}: {problem}"] if problem else []


def _key_problems(path: str, keys: list[str], rows: range) -> Iterator[str]:
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


def _sample_problems(path: str, key: str, flac: bytes, data: bytes, deep: bool) -> Iterator[str]:
    where = f"{path}: {key}"
    try:
        record = parse_sample(data, f"{where}.json")
    except UserError as error:
        yield str(error)
        return
    if record.key != key:
        yield f"{where}.json: is the record of sample {record.key}"
    if deep:
        yield from _audio_problems(where, flac, record.pcm_sha256)


def _audio_problems(where: str, flac: bytes, expected_sha256: str) -> Iterator[str]:
    from pipeline.audio import decode_flac, pcm_sha256

    try:
        pcm = decode_flac(flac)
    except UserError as error:
        yield f"{where}.flac: {error}"
        return
    if len(pcm) != CROP_SAMPLES:
        yield f"{where}.flac: {len(pcm)} samples, must be {CROP_SAMPLES}"
    if pcm_sha256(pcm) != expected_sha256:
        yield f"{where}.flac: audio differs from the hash in its record"
