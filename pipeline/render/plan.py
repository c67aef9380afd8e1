"""The plan: pure, and the only caller of ``rng``. It reads no audio.

``plan_block`` draws every decision for a whole range of samples as columns; ``plan_range`` gives
them one sample at a time. What a sample is follows from (recipe, manifests, split, index) alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from data_specs.io.rng import Uniform, uniforms
from data_specs.recipe import Recipe, Source, Stage
from data_specs.sample import CROP_SAMPLES, MOST_SAMPLES, SAMPLE_RATE, sample_key
from data_specs.strict import Strict
from pipeline.corpora.manifest import CorpusError, Manifest, split_of
from pipeline.draw import index, pick, sample
from pipeline.render.processors import PROCESSORS

PLAN_VERSION = 2
"""Raised whenever the same recipe would give another plan."""

BLOCK = 65_536
"""Samples drawn at once: large enough for numpy, small enough for any memory."""


Whole = Annotated[int, Field(ge=0, lt=2**48)]
"""A count or a place; a record from elsewhere may say anything."""


class FilePlan(Strict):
    """Which file of which folder of a corpus."""

    corpus: str
    root: Whole
    path: str


class SpeechPlan(FilePlan):
    """Which part of which recording speaks; ``start_sample`` at 16 kHz."""

    start_sample: Whole
    speaker: str
    language: str


class RoomPlan(FilePlan):
    """Which impulse response."""


class NoisePlan(FilePlan):
    """Which noise, from where (played in a loop), how loud."""

    start_sample: Whole
    snr_db: float


class Step(Strict):
    """One processor with all its drawn values."""

    stage: str
    kind: str
    params: Annotated[dict[str, float], Field(max_length=1000)]


class SamplePlan(Strict):
    """Everything that was drawn to make one sample; stored beside its audio."""

    version: int = PLAN_VERSION
    index: Annotated[int, Field(ge=0, le=MOST_SAMPLES)]
    speech: SpeechPlan
    speed: Annotated[float, Field(ge=0.5, le=2)]
    level_dbfs: float
    room: RoomPlan | None
    noise: NoisePlan | None
    speech_steps: Whole
    steps: Annotated[tuple[Step, ...], Field(max_length=100)]

    @property
    def key(self) -> str:
        return sample_key(self.index)


@dataclass(frozen=True)
class Table:
    """The usable files of one role and split, as arrays that the plan can index."""

    corpus: str
    root: NDArray[np.int32]
    path: NDArray[np.object_]
    speaker: NDArray[np.object_]
    language: NDArray[np.object_]
    samples: NDArray[np.int64]  # length at 16 kHz

    def __len__(self) -> int:
        return len(self.path)


def make_table(
    manifest: Manifest,
    source: Source,
    role: str,
    split: str,
    assigned: Mapping[str, str] | None = None,
) -> Table:
    """The files of ``split`` ("all" for every one). Raises ``CorpusError`` where there are none.

    ``assigned`` are the groups' splits (default: those of a corpus that is new).
    """
    table = manifest.usable
    groups = table["speaker"].to_pylist()  # of noise and rooms: what was recorded together
    if split != "all":
        assigned = assigned or split_of(manifest.groups(), source.holdout)
        keep = [assigned[group] == split for group in groups]
        table = table.filter(pa.array(keep, pa.bool_()))
    if not len(table):
        change = "lower" if split == "train" else "raise"
        raise CorpusError(
            f"no {role} file of corpus {manifest.name!r} is in split {split!r}: {change} "
            f"sources.{role}.holdout, add files, or take another split with --split {role}=all"
        )
    frames, rate_hz = table["frames"].to_numpy(), table["sample_rate_hz"].to_numpy()
    return Table(
        corpus=manifest.name,
        root=table["root"].to_numpy(),
        path=np.asarray(table["path"].to_pylist(), dtype=object),
        speaker=np.asarray(table["speaker"].to_pylist(), dtype=object),
        language=np.asarray(table["language"].to_pylist(), dtype=object),
        samples=(frames * SAMPLE_RATE // rate_hz).astype(np.int64),
    )


Tables = dict[str, Table]
Block = dict[str, NDArray[Any]]


def plan_block(recipe: Recipe, tables: Tables, start: int, count: int) -> Block:
    """Draw samples ``start`` to ``start + count`` as columns.

    An index of -1 (file or choice) means that the step does not happen.
    """
    uniform = uniforms(recipe.seed, start, count)
    block: Block = {"index": np.arange(start, start + count, dtype=np.int64)}
    block["voice"] = _happens(uniform, "voices", recipe.voices.share if recipe.voices else 0.0)
    block["speed"] = sample(recipe.speed, uniform("speed"))
    block["level_dbfs"] = sample(recipe.level_dbfs, uniform("level_dbfs"))
    _draw_speech(block, tables, uniform)
    plain = block["voice"] if recipe.voices and not recipe.voices.degrade else np.zeros(count, bool)
    _draw_room_and_noise(block, recipe, tables, uniform, plain)
    for stage in recipe.all_stages():
        _draw_stage(block, stage, uniform, plain)
    return block


def _happens(uniform: Uniform, name: str, probability: float) -> NDArray[np.bool_]:
    return uniform(f"{name}.happens") < probability


def _draw_speech(block: Block, tables: Tables, uniform: Uniform) -> None:
    """A recording with probability proportional to its length, and a place in it."""
    file, place = uniform("speech.file"), uniform("speech.start")
    needed = np.ceil(CROP_SAMPLES * block["speed"]).astype(np.int64)
    block["speech.file"] = np.zeros(len(file), dtype=np.int64)
    block["speech.start_sample"] = np.zeros(len(file), dtype=np.int64)
    for role, rows in (("speech", ~block["voice"]), ("voices", block["voice"])):
        if rows.any():
            ends = np.cumsum(tables[role].samples)
            chosen = np.searchsorted(ends, np.floor(file[rows] * ends[-1]), side="right")
            room = np.maximum(tables[role].samples[chosen] - needed[rows], 0) + 1
            block["speech.file"][rows] = chosen
            block["speech.start_sample"][rows] = np.floor(place[rows] * room)


def _draw_room_and_noise(
    block: Block, recipe: Recipe, tables: Tables, uniform: Uniform, plain: NDArray[np.bool_]
) -> None:
    for name, role, step in (("room", "rooms", recipe.room), ("noise", "noise", recipe.noise)):
        happens = _happens(uniform, name, step.probability if step else 0.0) & ~plain
        files = len(tables[role]) if step else 0
        file = np.floor(uniform(f"{name}.file") * files).astype(np.int64)
        block[f"{name}.file"] = np.where(happens, file, -1)
    if recipe.noise:  # whose file was drawn last
        start = np.floor(uniform("noise.start") * tables["noise"].samples[file])
        block["noise.start_sample"] = start.astype(np.int64)
        block["noise.snr_db"] = sample(recipe.noise.snr_db, uniform("noise.snr_db"))


def _draw_stage(block: Block, stage: Stage, uniform: Uniform, plain: NDArray[np.bool_]) -> None:
    name = f"stage.{stage.stage}"
    happens = _happens(uniform, name, stage.probability) & ~plain
    chosen = pick(tuple(option.weight for option in stage.choices), uniform(f"{name}.kind"))
    block[name] = np.where(happens, chosen, -1)
    for option in stage.choices:
        prefix = f"{name}.{option.use.kind}"
        for field, column in PROCESSORS[option.use.kind].draw(option.use, uniform, prefix).items():
            block[f"{prefix}.{field}"] = column


def _row(recipe: Recipe, tables: Tables, at: dict[str, Any]) -> SamplePlan:
    """The plan of one sample, out of its values ``at`` each column."""
    spoken = tables["voices" if at["voice"] else "speech"]
    file, room, noise = at["speech.file"], at["room.file"], at["noise.file"]
    steps = [_step(stage, at) for stage in recipe.all_stages()]
    before = len(recipe.speech_stages)
    return SamplePlan.model_construct(
        version=PLAN_VERSION,
        index=at["index"],
        speech=SpeechPlan.model_construct(
            **_file(spoken, file),
            start_sample=at["speech.start_sample"],
            speaker=spoken.speaker[file],
            language=spoken.language[file],
        ),
        speed=at["speed"],
        level_dbfs=at["level_dbfs"],
        room=None if room < 0 else room_at(tables["rooms"], room),
        noise=None
        if noise < 0
        else _noise_at(tables["noise"], noise, at["noise.start_sample"], at["noise.snr_db"]),
        speech_steps=sum(step is not None for step in steps[:before]),
        steps=tuple(step for step in steps if step is not None),
    )


def _file(table: Table, file: int) -> dict[str, Any]:
    return {"corpus": table.corpus, "root": int(table.root[file]), "path": table.path[file]}


def draw_room(table: Table, seed: int, name: str, clip: int) -> RoomPlan:
    """A room for one clip that no recipe plans; ``name`` is the decision's."""
    return room_at(table, index(seed, f"{name}/room", clip, len(table)))


def room_at(table: Table, file: int) -> RoomPlan:
    """A table's room."""
    return RoomPlan.model_construct(**_file(table, file))


def draw_noise(table: Table, seed: int, name: str, clip: int, snr_db: float) -> NoisePlan:
    """A noise, and where it begins, for one clip that no recipe plans."""
    file = index(seed, f"{name}/noise", clip, len(table))
    start = index(seed, f"{name}/start", clip, int(table.samples[file]))
    return _noise_at(table, file, start, snr_db)


def _noise_at(table: Table, file: int, start: int, snr_db: float) -> NoisePlan:
    return NoisePlan.model_construct(**_file(table, file), start_sample=start, snr_db=snr_db)


def _step(stage: Stage, at: dict[str, Any]) -> Step | None:
    chosen = at[f"stage.{stage.stage}"]
    if chosen < 0:
        return None
    kind = stage.choices[chosen].use.kind
    prefix = f"stage.{stage.stage}.{kind}."
    params = {n.removeprefix(prefix): value for n, value in at.items() if n.startswith(prefix)}
    return Step.model_construct(stage=stage.stage, kind=kind, params=params)


def plan_range(recipe: Recipe, tables: Tables, start: int, stop: int) -> Iterator[SamplePlan]:
    """Samples ``start`` to ``stop``, drawn block by block."""
    for first in range(start, stop, BLOCK):
        block = plan_block(recipe, tables, first, min(BLOCK, stop - first))
        for values in zip(*(column.tolist() for column in block.values()), strict=True):
            yield _row(recipe, tables, dict(zip(block, values, strict=True)))
