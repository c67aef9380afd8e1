"""What a training run reads: shards, rated clips, and what it validates on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from data_specs.io.addresses import shown
from data_specs.io.errors import UserError
from data_specs.io.hardware import available_memory
from data_specs.io.waves import Resampler
from data_specs.rated import RatedClip, read_rated
from data_specs.sample import CROP_SAMPLES
from data_specs.strict import digest, unknown
from train.data.hold_out import held_apart
from train.data.order import Order
from train.data.shards import DatasetInfo, Shard, list_shards, read_dataset_info
from train.data.stream import DecodedCache, ShardSamples, rated_pcm
from train.data.tars import Pcm
from train.models.calibration import Calibration

SIBLING = "validation"
"""The folder beside the training shards in which the recipe's validation split is looked for."""

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

    def __init__(self, clips: Sequence[RatedClip], resampler: Resampler = "soft") -> None:
        self.clips = list(clips)
        self._crop = cache(lambda number: rated_pcm(self.clips[number], resampler))

    def __len__(self) -> int:
        return len(self.clips)

    def read(self, number: int) -> tuple[Pcm, float]:
        return self._crop(number)[0], self.clips[number].mos

    def length(self, number: int) -> int:
        """Samples of the audio that are the clip's own; silence follows a shorter one."""
        return self._crop(number)[1]


@dataclass(frozen=True)
class Sources:
    """The shards and rated clips to train on, and those to validate on.

    A run validates on rated clips where there are any to validate on, else on shards.
    """

    info: DatasetInfo
    shards: list[Shard]
    validation: list[Shard]
    rated: list[RatedClip]
    validation_hash: str
    rated_validation: list[RatedClip] = field(default_factory=list)
    resampler: Resampler = "soft"
    """Of rated clips; shards are at 16 kHz."""

    def resampled_by(self, resampler: Resampler) -> Sources:
        """The same for a model that was trained on what this one makes."""
        return replace(self, resampler=resampler)

    @property
    def labelled_only(self) -> bool:
        """Whether there are no shards: the paper's baseline."""
        return not self.shards

    def facts(self) -> dict[str, Any]:
        """What a run's configuration says of its data."""
        return {
            "recipe_hash": self.info.recipe_hash,
            "validation_hash": self.validation_hash,
            "rated_hash": digest_of(self.rated),
            "samples": sum(shard.samples for shard in self.shards),
            "validation_samples": len(self.rated_validation)
            or sum(shard.samples for shard in self.validation),
            "rated_clips": len(self.rated),
        }

    def samples(self, cache_gb: float) -> tuple[ShardSamples, Samples]:
        """Samples to train and to validate on.

        Decoded ones stay in memory if all fit the budget and half of what is free now.
        """
        parts = (self.shards, self.validation)
        counts = [sum(shard.samples for shard in part) for part in parts]
        needed = sum(counts) * CROP_SAMPLES * 2
        fits = needed <= min(cache_gb * 1e9, available_memory() / 2)
        caches = [DecodedCache(number) if fits and number else None for number in counts]
        train = ShardSamples(self.shards, caches[0])
        if self.rated_validation:
            return train, RatedSamples(self.rated_validation, self.resampler)
        return train, ShardSamples(self.validation, caches[1])

    def order(self, config: Any) -> Order:
        counts = tuple(shard.samples for shard in self.shards)
        rated, share = len(self.rated), config.rated_share
        return Order(counts, rated, config.seed, config.batch, share, config.buffer)


def open_sources(
    shards: Path | str | None,
    validation: Path | str | None = None,
    rated: Path | None = None,
    rated_validation: Path | None = None,
) -> Sources:
    """Find shards and rated clips.

    A run with shards validates on those of ``validation`` or on ``rated_validation`` (as in the
    paper), else on the recipe's validation split, where it lies beside the training split as
    ``validation``: never on a part of the training shards, whose speakers it trains on. Without
    shards the run is on rated clips alone (the paper's labelled-only baseline) and validates on
    ``rated_validation``, or on conditions of ``rated`` that are held out. ``ValueError`` naming
    what is missing or damaged, or a clip that both trains and validates.
    """
    if shards is None:
        return _labelled_only(rated, rated_validation, validation)
    if validation is not None and rated_validation is not None:
        raise UserError("give one of --validation and --rated-validation")
    info, found = read_dataset_info(shards), list_shards(shards)
    clips = on_labels_scale(read_rated(rated) if rated else [], info.calibration)
    require_once(clips)
    if rated_validation is not None:
        held = on_labels_scale(read_rated(rated_validation), info.calibration)
        require_apart(clips, held)
        return Sources(info, found, [], clips, digest_of(held), held)
    place, held_info = _validation_shards(shards, info, validation)
    if held_info.teacher != info.teacher:
        raise UserError(
            f"{shown(place)}: labelled by {held_info.teacher!r}, but {shown(shards)} by "
            f"{info.teacher!r}: label both with one teacher"
        )
    return Sources(info, found, list_shards(place), clips, held_info.recipe_hash)


def _validation_shards(
    shards: Path | str, info: DatasetInfo, validation: Path | str | None
) -> tuple[Path | str, DatasetInfo]:
    """The shards to validate on: those given, else the recipe's split beside the training one."""
    if validation is not None:
        return validation, read_dataset_info(validation)
    beside = _beside(shards)
    try:
        held = read_dataset_info(beside)
    except (UserError, OSError):
        why = "no dataset is there, or none that can be read"
    else:
        if held.recipe == info.recipe and held.recipe_hash != info.recipe_hash:
            return beside, held
        why = "of another recipe" if held.recipe != info.recipe else "the training split again"
    raise UserError(
        f"{shown(shards)}: nothing to validate on ({shown(beside)}: {why}): make the recipe's "
        f"validation split (python -m pipeline shards RECIPE --split speech=validation --out "
        f"{shown(beside)}), or give --validation SHARDS or --rated-validation CSV"
    )


def _beside(shards: Path | str) -> Path | str:
    """Where the validation split of training shards is, by path or address."""
    if isinstance(shards, Path) or "://" not in shards:
        return Path(shards).absolute().parent / SIBLING
    place, question, query = shards.partition("?")
    return f"{place.rstrip('/').rpartition('/')[0]}/{SIBLING}{question}{query}"


def require_apart(clips: Sequence[RatedClip], held: Sequence[RatedClip]) -> None:
    """``UserError`` for a clip that both trains and validates."""
    training = {clip.path: clip for clip in clips}
    if both := [clip for clip in held if clip.path in training]:
        raise UserError(
            f"{both[0].where}: {both[0].path} both trains and validates "
            f"({training[both[0].path].where}), as {len(both)} clips do: name other sets or "
            "another CSV"
        )


def require_once(clips: Sequence[RatedClip]) -> None:
    """``UserError`` for a clip that is there twice: it would count twice."""
    first: dict[Path, RatedClip] = {}
    for clip in clips:
        if clip.path in first:
            raise UserError(
                f"{clip.where}: {clip.path} is there twice ({first[clip.path].where}): take one out"
            )
        first[clip.path] = clip


def _labelled_only(
    rated: Path | None, rated_validation: Path | None, validation: Path | str | None
) -> Sources:
    if rated is None:
        raise UserError("nothing to train on: give --shards DIR, --rated labels.csv, or both")
    if validation is not None:
        raise UserError("--validation is a folder of shards: without --shards it has no use")
    clips = read_rated(rated)
    require_once(clips)
    if rated_validation is not None:
        held = read_rated(rated_validation)
        require_apart(clips, held)
    else:
        clips, held = held_apart(clips, seed=0)
    return Sources(LABELLED_ONLY, [], [], clips, digest_of(held), held)


def digest_of(clips: Sequence[RatedClip]) -> str:
    """A hash of rated clips: names and ratings, not where they lie."""
    return digest([[clip.dataset, clip.path.name, clip.mos] for clip in clips])


def on_labels_scale(clips: Sequence[RatedClip], calibration: Calibration | None) -> list[RatedClip]:
    """Rated clips with their ratings on the scale of the teacher's labels (section IV-B).

    A rating goes through the inverse of the teacher's map to the clip's dataset. It stays what it
    is where the teacher has no such maps, or never saw that dataset (a warning names it).
    """
    if calibration is None:
        return list(clips)
    unseen = sorted({clip.dataset for clip in clips} - calibration.datasets.keys())
    if unseen:
        print(
            f"warning: the teacher was not trained on {', '.join(unseen)}: ratings of these "
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
