"""The dataset card: what a folder of shards is, from what, and under which licences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from data_specs.sample import CROP_SAMPLES, DATASET_FILE, SAMPLE_RATE
from pipeline.degrade import PROCESSORS
from pipeline.degrade.interface import noncommercial
from pipeline.job import CLIP_HOURS, Job
from pipeline.shards import ShardRecord, read_ledger

CARD = "README.md"
"""Where model and dataset hubs look for it."""


def write_card(job: Job) -> None:
    """Write the card of a dataset folder from the records of its whole shards."""
    records = [record for _, record in sorted(read_ledger(job.out).records.items())]
    with job.folder.writing(CARD) as file:
        file.write(("\n".join(_lines(job, records)) + "\n").encode())


def _lines(job: Job, records: list[ShardRecord]) -> Iterator[str]:
    samples = sum(record.samples for record in records)
    dropped = Counter(drop["reason"] for record in records for drop in record.dropped)
    yield from (f"# {job.recipe.name}: degraded speech with a teacher's scores", "")
    yield job.recipe.about or "(the recipe says nothing about itself)"
    yield from ("", f"- {samples} samples, {samples * CLIP_HOURS:.2f} h, in {len(records)} shards")
    yield f"- mono FLAC, {SAMPLE_RATE} Hz, 16 bit, {CROP_SAMPLES / SAMPLE_RATE:g} s each"
    yield f"- scores (`mos`, 1 to 5): teacher `{job.recipe.teacher.name}`, no human's"
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
    yield f"- dropped: {reasons or 'none'}"
    yield f"- everything that was drawn: `{DATASET_FILE}` and each sample's `json`"
    yield from ("", "## Licences", "")
    yield "A sample is derived from its recordings and from every processor that it went through;"
    yield "`licences` in its `json` names the processors'. This list is no legal advice."
    yield from ("", "| recordings | files | licence |", "|---|---|---|")
    yield from _corpora(job)
    yield from ("", "| processors' licence | samples | processors |", "|---|---|---|")
    yield from _processors(job, records)
    if any(noncommercial(licence) for record in records for licence in record.licences):
        yield from ("", "**Some samples are for non-commercial use only**: filter by `licences`.")


def _corpora(job: Job) -> Iterator[str]:
    for name, manifest in sorted(job.manifests.items()):
        licences = Counter(manifest.usable["licence"].to_pylist())
        for licence, count in licences.most_common():
            yield f"| {name} | {count} | {licence} |"


def _processors(job: Job, records: list[ShardRecord]) -> Iterator[str]:
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record.licences)
    for licence, count in counts.most_common():
        kinds = [kind for kind in job.recipe.kinds() if PROCESSORS[kind].licence == licence]
        yield f"| {licence} | {count} | {', '.join(kinds)} |"
