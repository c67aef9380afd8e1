"""A folder of made audio: one writer, FLAC files whole or not there, records beside them.

A folder is resumable: a file is renamed into place when it is whole, so what is there is kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_specs.io.cli import cancelled_early
from data_specs.io.errors import UserError
from data_specs.io.files import only_writer, remove_leftovers, whole_file, write_text
from data_specs.io.parse import json_object
from data_specs.io.progress import progress_bar
from data_specs.io.rng import stream
from data_specs.io.text import csv_text
from data_specs.io.walk import LeftOut, print_left_out
from data_specs.strict import digest
from pipeline.audio import DropSample, encode_flac, to_pcm

Wave = NDArray[np.float64]
Record = dict[str, Any]
Job = tuple[Path, Callable[[], NDArray[np.floating[Any]]]]
"""A file, and what makes its samples (T,) at 16 kHz."""

LabelledJob = tuple[Record, Callable[[], NDArray[np.floating[Any]]]]
"""The same by its row of a labelled CSV, whose path is below the folder."""

MADE_BY = "made-by.json"
"""Beside the audio: what made it and the seed, so that two seeds never mix in one folder."""

LABELLED, RECIPE = "labelled.csv", "recipe.json"
"""In a folder of labelled clips: one row a clip, and what they were made from."""

PEAK = 0.9


def rng_of(seed: int, name: str) -> np.random.Generator:
    """A generator for one file: it depends on the seed and the file's name and on nothing else."""
    return np.random.Generator(np.random.Philox(key=stream(seed, f"makers/{name}", 0, 1)[0, :2]))


def write_flac(path: Path, wave: NDArray[np.floating[Any]]) -> None:
    """Write 16-bit FLAC at 16 kHz, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(encode_flac(to_pcm(wave.astype(np.float32))))


@contextmanager
def claimed(out: Path, made_of: str, seed: int) -> Iterator[None]:
    """Hold ``out`` as its only writer; leftovers of runs that were killed are removed.

    Raises ``UserError`` where another run writes to it, or something else or another seed made it.
    """
    mark, path = {"maker": made_of, "seed": seed}, out / MADE_BY
    with only_writer(out):
        if not path.is_file():
            write_text(path, json.dumps(mark) + "\n")
        elif (found := json_object(path.read_bytes(), path, "give another --out")) != mark:
            raise UserError(f"{path}: made with {found}, not {mark}; give another --out or seed")
        remove_leftovers(out)
        yield


def make_files(
    jobs: Iterable[Job], what: str, workers: int, dropped: dict[Path, str] | None = None
) -> list[Path]:
    """Run the jobs whose file is not there yet, with a progress bar; return all paths.

    A file that cannot be made comes into ``dropped`` with its reason, where that is given.
    """
    jobs = list(jobs)
    todo = [job for job in jobs if not job[0].is_file()]
    with (
        progress_bar(total=len(jobs), initial=len(jobs) - len(todo), desc=what, unit="file") as bar,
        cancelled_early(ThreadPoolExecutor(max_workers=max(1, workers))) as pool,
    ):
        for _ in pool.map(partial(_make, dropped=dropped), todo):
            bar.update()
    return [path for path, _ in jobs]


def _make(job: Job, dropped: dict[Path, str] | None) -> None:
    path, make = job
    try:
        write_flac(path, make())
    except DropSample as drop:
        if dropped is None:
            raise
        dropped[path] = str(drop)


def make_labelled(
    out: Path, what: str, recipe: Record, seed: int, jobs: Sequence[LabelledJob], workers: int
) -> int:
    """Make a folder of clips with its labelled CSV and its recipe; returns the exit status.

    A clip that cannot be made has no row and is named, nor has one whose clean twin cannot be.
    Raises ``UserError`` where another recipe or seed made the folder.
    """
    dropped: dict[Path, str] = {}
    with claimed(out, f"{what}: recipe {digest(recipe)[:16]}", seed):
        write_text(out / RECIPE, json.dumps(recipe, indent=1, sort_keys=True) + "\n")
        make_files([(out / row["path"], make) for row, make in jobs], what, workers, dropped)
        whole = [row for row, _ in jobs if not dropped.keys() & _files(out, row)]
        write_text(out / LABELLED, csv_text(whole))
    print(f"{out / LABELLED}: {len(whole)} clips, recipe {digest(recipe)[:16]}")
    once = {why: str(path.relative_to(out)) for path, why in sorted(dropped.items(), reverse=True)}
    print_left_out(str(out), sorted(LeftOut(path, why) for why, path in once.items()))
    return 1 if dropped else 0


def _files(out: Path, row: Record) -> set[Path]:
    return {out / row[name] for name in ("path", "clean") if row.get(name)}


def write_record(path: Path, record: Record) -> None:
    """Write the record of the audio file ``path`` beside it; a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path.with_suffix(".json"), _line(record))


def write_manifest(path: Path) -> None:
    """Write the records of all audio files beside and below ``path``, one a line, by path.

    Raises ``UserError`` for a file without a record.
    """
    records = []
    for audio in sorted(path.parent.rglob("*.flac")):
        try:
            records.append(json.loads(audio.with_suffix(".json").read_text(encoding="utf-8")))
        except (FileNotFoundError, json.JSONDecodeError) as error:
            raise UserError(f"{audio}: no record beside it; remove it and run again") from error
    write_text(path, "".join(map(_line, records)))


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n"


@contextmanager
def manifest_written(path: Path) -> Iterator[None]:
    """Write the manifest ``path`` at the end; after an error too, which is then the one raised."""
    try:
        yield
    except BaseException:
        try:
            write_manifest(path)
        except (OSError, UserError) as second:
            print(f"warning: {path} is not up to date: {second}", file=sys.stderr)
        raise
    write_manifest(path)
