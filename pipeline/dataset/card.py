"""The dataset card: what a folder of shards is, from what, and under which licences.

In the form that the Hugging Face hub reads: YAML front matter, then Markdown (``card.md.j2``). Made
from the records, the manifests and the dataset's description: no tar is opened. It names no folder
of a machine, and drops by their reason alone, for details quote paths.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jinja2
import numpy as np
import pyarrow.compute as pc
import yaml
from huggingface_hub import DatasetCardData

from data_specs.io.addresses import path_or_url, shown
from data_specs.io.names import code, markdown
from data_specs.io.storage import NotFound
from pipeline.dataset import attempts
from pipeline.dataset.attempts import Tally
from pipeline.dataset.description import reopen
from pipeline.dataset.job import CLIP_HOURS, Job
from pipeline.dataset.shards import UNKNOWN
from pipeline.render.processors import PROCESSORS
from pipeline.render.processors.interface import noncommercial

CARD = "README.md"
"""Where model and dataset hubs look for it."""

MARK = b"\n<!-- Written by python -m pipeline; a changed card is not written again. SHA-256: "

MOST_CARD_BYTES = 16 << 20

DEMANDS = {
    "to be read": "says its terms in its own words: read them before data is passed on",
    "no derivatives": "derived samples may not be passed on",
    "non-commercial": "for non-commercial use only",
    "share alike": "derived samples are passed on under the same licence",
    "attribution": "authors are named",
}
"""What a licence may ask of who uses the data, the strictest first."""

ASKED = {"by": "attribution", "nc": "non-commercial", "nd": "no derivatives", "sa": "share alike"}
CREATIVE_COMMONS = ("by", "by-sa", "by-nc", "by-nd", "by-nc-sa", "by-nc-nd")
FREE = ("mit", "apache-2.0", "bsd-3-clause", "cc0-1.0", "mpl-2.0")
TERMS: dict[str, list[str]] = {
    **{f"cc-{of}-3.0": [ASKED[part] for part in of.split("-")] for of in CREATIVE_COMMONS},
    **{f"cc-{of}-4.0": [ASKED[part] for part in of.split("-")] for of in CREATIVE_COMMONS},
    **{name: [] for name in FREE},
    "odc-by": ["attribution"],
}
"""What the licences that the hub knows ask, by their name there (SPDX, in small letters)."""

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
"""The hub's size categories; above the last: 1M<n<10M."""


def write_card(job: Job) -> bool:
    """Write the card of a dataset folder from the records of its whole shards.

    False, with a warning, where the folder has a README.md that is not such a card.
    """
    planned = (len(job.shard_range(shard)) for shard in range(job.shard_count))
    held = attempts.load(job.out, job.dataset_hash, planned)
    if not _is_own(job):
        print(
            f"warning: {job.folder.shown(CARD)}: is no card as it was written here, and stays as "
            "it is; for a card move it away and run python -m pipeline card "
            f"{shown(job.out)}",
            file=sys.stderr,
        )
        return False
    with job.folder.writing(CARD) as file:
        file.write(_signed((card(job, held) + "\n").encode()))
    return True


def _is_own(job: Job) -> bool:
    """Whether the folder's README.md is a card that nobody has changed, or there is none."""
    try:
        (found,) = job.folder.read([CARD], MOST_CARD_BYTES)
    except (NotFound, FileNotFoundError):
        return True
    text, mark, _ = found.rpartition(MARK)
    return bool(mark) and _signed(text) == found


def _signed(text: bytes) -> bytes:
    """Add a card's hash in a comment: whatever is different was written by somebody else."""
    return text + MARK + hashlib.sha256(text).hexdigest().encode() + b" -->\n"


def card(job: Job, held: Tally) -> str:
    """Render the card as text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "markdown": markdown,
        "code": code,
        "hours": lambda n: f"{n * CLIP_HOURS:.2f}",
    }
    recordings = corpus_licences(job)
    languages = {"(not known)" if x == UNKNOWN else x: n for x, n in held.languages.items()}
    return environment.get_template("card.md.j2").render(
        job=job,
        held=held,
        recipe=job.recipe,
        identity={"derived_from": None} | job.identity,
        front=_front(job, held, recordings).to_yaml(),
        split=_split(job),
        recordings=recordings,
        demands=consequences({*recordings, *held.licences}),
        meaning=DEMANDS,
        noncommercial=any(noncommercial(licence) for licence in held.licences),
        kinds_of=lambda licence: [
            kind for kind in job.recipe.kinds() if PROCESSORS[kind].licence == licence
        ],
        contents={
            "corpus (a sample may draw from several)": held.corpora,
            "language": languages,
            "processor (a sample may go through several)": held.processors,
        },
        median=_median(held.mos),
        recipe_yaml=_recipe(job),
        command=_command(job),
    )


def _front(job: Job, held: Tally, recordings: Iterable[str]) -> DatasetCardData:
    languages = sorted(x for x in held.languages if re.fullmatch("[a-z]{2,3}", x))
    files = {"split": _split(job), "path": "shard-*.tar"}
    return DatasetCardData(
        pretty_name=f"{job.recipe.name}: degraded speech with a teacher's scores",
        language=languages or None,
        task_categories=["audio-classification"],
        annotations_creators=["machine-generated"],
        size_categories=[next((n for most, n in SIZES if held.samples < most), "1M<n<10M")],
        tags=["speech-quality", "mos", "pseudo-labels", "audio", "webdataset"],
        configs=[{"config_name": "default", "data_files": [files]}],
        **hub_licence({*held.licences, *recordings}),
    )


def _split(job: Job) -> str:
    split = job.identity.get("splits", {}).get("speech", "train")
    return str(split) if split in ("train", "validation", "test") else "train"


def hub_licence(licences: Iterable[str]) -> dict[str, str]:
    """The hub's licence fields: one licence where all is under it, else what they ask."""
    names = sorted(licences)
    if len(names) == 1 and (known := _plain(names[0])) in TERMS:
        return {"license": known}
    name = "-".join(["several", *(demand.replace(" ", "-") for demand in consequences(names))])
    return {"license": "other", "license_name": name, "license_link": "#licences"}


def consequences(licences: Iterable[str]) -> dict[str, list[str]]:
    """What licences ask of who uses the data, the strictest first, and which of them ask it.

    A licence is an SPDX expression or a corpus' own words. A choice (OR) is not made use of, and
    what is no name of the table is to be read, not guessed at.
    """
    found: dict[str, list[str]] = {demand: [] for demand in DEMANDS}
    for licence in sorted(set(licences)):
        parts = re.split(" AND | OR ", licence)
        for demand in {x for part in parts for x in TERMS.get(_plain(part), ["to be read"])}:
            found[demand].append(licence)
    return {demand: names for demand, names in found.items() if names}


def _plain(licence: str) -> str:
    """A licence's name as the hub spells it: CC BY 4.0 is cc-by-4.0."""
    return licence.lower().replace(" ", "-")


def corpus_licences(job: Job) -> dict[str, Counter[str]]:
    """Files of each licence, and of which corpus: licence to corpus to files."""
    found: dict[str, Counter[str]] = {}
    for name, manifest in sorted(job.manifests.items()):
        for entry in pc.value_counts(manifest.usable["licence"]).to_pylist():
            found.setdefault(entry["values"], Counter())[name] += entry["counts"]
    return found


def _median(bins: Sequence[int]) -> float:
    """The score below which half of the samples lie: the middle of its bin."""
    return 1 + (int(np.searchsorted(np.cumsum(bins), sum(bins) / 2)) + 0.5) / 10


def _recipe(job: Job) -> str:
    recipe: dict[str, Any] = job.recipe.model_dump(mode="json", exclude_none=True)
    if re.search("[<`]", recipe["about"]):  # all else has an alphabet; what it says stands above
        del recipe["about"]
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip()


def _command(job: Job) -> str:
    """What makes the dataset: of a version of another, what makes it out of that one."""
    names = sorted({source.corpus for source in job.recipe.sources.present().values()})
    given = [f"--corpus {name}=DIR" for name in names] + [f"--samples {job.samples}"]
    if job.identity.get("derived_from"):
        return " ".join(["python -m pipeline extend OLD", *given, "--out DIR"])
    splits = job.identity["splits"]
    given += [
        f"--split {role}={splits[role]}"
        for role in sorted(job.recipe.sources.present())
        if splits.get(role) in ("validation", "test", "all")
    ]
    return " ".join(["python -m pipeline shards recipe.yaml", *given, "--out DIR"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("dataset", type=path_or_url, help="a folder, or its address")


def run(options: argparse.Namespace) -> int:
    """Write a dataset's card again."""
    job = reopen(options.dataset, {})
    if not write_card(job):
        return 1
    print(job.folder.shown(CARD))
    return 0
