"""What a training run reads: shards, rated clips, and what it validates on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from data_specs.io.errors import UserError
from data_specs.rated import RatedClip, read_rated, require_heard
from data_specs.strict import digest, unknown
from train.hold_out import held_apart
from train.models.calibration import Calibration
from train.shards import DatasetInfo, Shard, list_shards, read_dataset_info
from train.stream import DecodedCache, ShardSamples, cache_fits, rated_pcm
from train.tars import Pcm

HOLD_OUT = 0.05
"""Share of the shards that validate where no ``--validation`` is given."""

LABELLED_ONLY = DatasetInfo("", None, "people")
"""What a run without shards is trained on: the ratings alone."""


class Samples(Protocol):
    """Audio with its score, by number."""

    def __len__(self) -> int: ...

    def read(self, number: int) -> tuple[Pcm, float]:
        """(int16 (122880,), mean opinion score)."""
        ...


class RatedSamples:
    """Rated clips as samples: the middle 7.68 s of each, decoded once and kept."""

    def __init__(self, clips: Sequence[RatedClip]) -> None:
        self.clips = list(clips)
        self._pcm: dict[int, Pcm] = {}

    def __len__(self) -> int:
        return len(self.clips)

    def read(self, number: int) -> tuple[Pcm, float]:
        """(audio int16 (122880,), rating)."""
        if number not in self._pcm:
            self._pcm[number] = rated_pcm(self.clips[number], 0.5)[0]
        return self._pcm[number], self.clips[number].mos


@dataclass(frozen=True)
class Sources:
    """The shards and rated clips to train on, and those to validate on.

    A run with shards validates on shards; one on rated clips alone on rated clips.
    """

    info: DatasetInfo
    shards: list[Shard]
    validation: list[Shard]
    rated: list[RatedClip]
    validation_hash: str
    rated_validation: list[RatedClip] = field(default_factory=list)

    @property
    def labelled_only(self) -> bool:
        """Whether there are no shards: the paper's baseline."""
        return not self.shards

    def samples(self, cache_gb: float) -> tuple[ShardSamples, Samples]:
        """Samples to train and to validate on; decoded ones stay in memory if all of them fit."""
        parts = (self.shards, self.validation)
        counts = [sum(shard.samples for shard in part) for part in parts]
        fits = cache_fits(sum(counts), cache_gb)
        caches = [DecodedCache(number) if fits and number else None for number in counts]
        train = ShardSamples(self.shards, caches[0])
        if self.labelled_only:
            return train, RatedSamples(self.rated_validation)
        return train, ShardSamples(self.validation, caches[1])


def open_sources(
    shards: Path | str | None,
    validation: Path | str | None = None,
    rated: Path | None = None,
    rated_validation: Path | None = None,
) -> Sources:
    """Find shards and rated clips.

    Without a folder of validation shards the last 5 % of the shards (at least one) are held
    out. Without shards the run is on rated clips alone (the paper's labelled-only baseline) and
    validates on ``rated_validation``, or on conditions of ``rated`` that are held out.
    ``ValueError`` naming what is missing or damaged.
    """
    if shards is None:
        return _labelled_only(rated, rated_validation, validation)
    if rated_validation is not None:
        raise UserError("a run with shards validates on shards: --rated-validation has no use")
    info, found = read_dataset_info(shards), list_shards(shards)
    clips = on_labels_scale(read_rated(rated) if rated else [], info.calibration)
    require_heard(clips)
    if validation is not None:
        held_info = read_dataset_info(validation)
        if held_info.teacher != info.teacher:
            raise UserError(
                f"{validation}: labelled by {held_info.teacher!r}, but {shards} by "
                f"{info.teacher!r}: label both with one teacher"
            )
        return Sources(info, found, list_shards(validation), clips, held_info.recipe_hash)
    if len(found) < 2:
        raise UserError(
            f"{shards}: holds one shard; holding one out for validation needs two: "
            "make more shards or give --validation"
        )
    held = max(1, round(len(found) * HOLD_OUT))
    return Sources(info, found[:-held], found[-held:], clips, info.recipe_hash)


def _labelled_only(
    rated: Path | None, rated_validation: Path | None, validation: Path | str | None
) -> Sources:
    if rated is None:
        raise UserError("nothing to train on: give --shards DIR, --rated labels.csv, or both")
    if validation is not None:
        raise UserError("--validation is a folder of shards: without --shards it has no use")
    clips = read_rated(rated)
    if rated_validation is not None:
        held = read_rated(rated_validation)
    else:
        clips, held = held_apart(clips, seed=0)
    require_heard([*clips, *held])
    return Sources(LABELLED_ONLY, [], [], clips, digest_of(held), held)


def digest_of(clips: Sequence[RatedClip]) -> str:
    """A hash of rated clips: names and ratings, not where they lie."""
    return digest([[clip.dataset, clip.path.name, clip.mos] for clip in clips])


def on_labels_scale(clips: Sequence[RatedClip], calibration: Calibration | None) -> list[RatedClip]:
    """Rated clips with their ratings on the scale of the teacher's labels (section IV-C).

    A rating goes through the inverse of the teacher's map to the clip's dataset. It stays what it
    is where the teacher has no such maps, or never saw that dataset (a warning names it).
    """
    if calibration is None:
        return list(clips)
    strange = sorted({clip.dataset for clip in clips} - calibration.datasets.keys())
    if strange:
        print(
            f"warning: the teacher was not trained on {', '.join(strange)}: ratings of these "
            "clips are taken as they are, though their scale may be another",
            file=sys.stderr,
        )
    return [_mapped(clip, calibration) for clip in clips]


def _mapped(clip: RatedClip, calibration: Calibration) -> RatedClip:
    if clip.dataset not in calibration.datasets:
        return clip
    return clip.model_copy(update={"mos": float(calibration.to_universal(clip.mos, clip.dataset))})


def chosen(table: Path, names: Sequence[str] | None) -> list[RatedClip]:
    """Rated clips of a CSV, of these datasets only; ``ValueError`` for one that it has not."""
    clips = read_rated(table)
    known = {clip.dataset for clip in clips}
    for name in names or ():
        if name not in known:
            raise UserError(f"{table}: {unknown('dataset', name, known)}")
    return [clip for clip in clips if not names or clip.dataset in names]
