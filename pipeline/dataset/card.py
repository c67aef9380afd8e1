"""The dataset card: what a folder of shards is, from what, and under which licences. In the form
that the Hugging Face hub reads: YAML front matter, then Markdown.

Made from the records, the manifests and the dataset's description: no tar is opened. It names no
folder of a machine, and drops by their reason alone, for details quote paths.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow.compute as pc
import yaml

from data_specs.io.addresses import place, shown
from data_specs.io.names import code, markdown
from data_specs.io.storage import NotFound
from data_specs.sample import CROP_SAMPLES, DATASET_FILE, SAMPLE_RATE
from pipeline.dataset import ledger
from pipeline.dataset.job import CLIP_HOURS, Job, reopen
from pipeline.dataset.ledger import Tally
from pipeline.dataset.summary import MOS_BINS, UNKNOWN
from pipeline.render.processors import PROCESSORS
from pipeline.render.processors.interface import noncommercial

CARD = "README.md"
"""Where model and dataset hubs look for it."""

MARK = b"\n<!-- Written by python -m pipeline; a changed card is not written again. SHA-256: "

MOST_CARD_BYTES = 16 << 20

HUB_LICENCES = {
    name.upper(): name.lower()
    for name in (
        *("Apache-2.0", "MIT", "BSD-3-Clause", "CC0-1.0", "ODC-BY", "CC-BY-4.0", "CC-BY-SA-4.0"),
        *("CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "CC-BY-ND-4.0", "CC-BY-NC-ND-4.0"),
    )
}
"""Licences that the hub knows under a name of its own."""

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
"""The hub's size categories; above the last: 1M<n<10M."""

FREE = r"\b(MIT|APACHE|BSD|CC0|PUBLIC DOMAIN|UNLICENSE|ISC|MPL)\b"


def write_card(job: Job) -> bool:
    """Write the card of a dataset folder from the records of its whole shards.

    False, with a warning, where the folder has a README.md that is not such a card.
    """
    planned = (len(job.shard_range(shard)) for shard in range(job.shard_count))
    held = ledger.load(job.out, job.dataset_hash, planned)
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
    """A card and its hash in a comment: whatever is different was written by somebody else."""
    return text + MARK + hashlib.sha256(text).hexdigest().encode() + b" -->\n"


def card(job: Job, held: Tally) -> str:
    """The card as text."""
    front = yaml.safe_dump(_front(job, held), sort_keys=False, allow_unicode=True)
    return "\n".join(["---", front.rstrip(), "---", "", *_lines(job, held)])


# --- front matter ---------------------------------------------------------------------------------


def _front(job: Job, held: Tally) -> dict[str, Any]:
    licences = {*held.licences, *corpus_licences(job)}
    languages = sorted(x for x in held.languages if re.fullmatch("[a-z]{2,3}", x))
    return {
        "pretty_name": f"{job.recipe.name}: degraded speech with a teacher's scores",
        **_hub_licence(licences),
        **({"language": languages} if languages else {}),
        "task_categories": ["audio-classification"],
        "tags": ["speech-quality", "mos", "pseudo-labels", "audio", "webdataset"],
        "annotations_creators": ["machine-generated"],
        "size_categories": [_size(held.samples)],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": _split(job), "path": "shard-*.tar"}],
            }
        ],
    }


def _split(job: Job) -> str:
    split = job.identity.get("splits", {}).get("speech", "train")
    return str(split) if split in ("train", "validation", "test") else "train"


def _size(samples: int) -> str:
    return next((name for limit, name in SIZES if samples < limit), "1M<n<10M")


def _hub_licence(licences: Iterable[str]) -> dict[str, str]:
    """The hub's licence fields: one licence where all is under it, else their strictest demand."""
    names = sorted(licences)
    if len(names) == 1 and names[0].upper() in HUB_LICENCES:
        return {"license": HUB_LICENCES[names[0].upper()]}
    demands = [demand.replace(" ", "-") for demand, _ in consequences(names)]
    name = "-".join(["several", *demands])
    return {"license": "other", "license_name": name, "license_link": "#licences"}


def consequences(licences: Iterable[str]) -> list[tuple[str, list[str]]]:
    """What licences ask of who uses the data, the strictest first, and which of them ask it."""
    found: dict[str, list[str]] = {}
    for licence in sorted(set(licences)):
        for demand in _demands(licence):
            found.setdefault(demand, []).append(licence)
    return [(demand, found[demand]) for demand in DEMANDS if demand in found]


DEMANDS = {
    "to be asked": "says no terms that a program can read: ask its owner before passing data on",
    "no derivatives": "derived samples may not be passed on",
    "non-commercial": "for non-commercial use only",
    "share alike": "derived samples are passed on under the same licence",
    "attribution": "authors are named",
}


def _demands(licence: str) -> set[str]:
    """Demands of an SPDX expression or of a corpus' words. A choice (OR) is not made use of."""
    text = re.sub(r"[\s_]+", "-", licence.upper())
    found = set()
    if re.search(r"-ND\b", text):
        found.add("no derivatives")
    if re.search(r"-NC\b|NON-?COMMERCIAL", text):
        found.add("non-commercial")
    if re.search(r"-SA\b|\bA?L?GPL|\bODBL|OPEN-DATABASE", text):
        found.add("share alike")
    if re.search(r"\b(CC-BY|ODC-BY)", text):
        found.add("attribution")
    own_words = re.search(r"\bOWN(ER)?\b|NOT-STATED", text)
    if own_words or (not found and not re.search(FREE, licence.upper())):
        found.add("to be asked")
    return found


def corpus_licences(job: Job) -> dict[str, Counter[str]]:
    """Files of each licence, and of which corpus: licence to corpus to files."""
    found: dict[str, Counter[str]] = {}
    for name, manifest in sorted(job.manifests.items()):
        for entry in pc.value_counts(manifest.usable["licence"]).to_pylist():
            found.setdefault(entry["values"], Counter())[name] += entry["counts"]
    return found


# --- body -----------------------------------------------------------------------------------------


def _lines(job: Job, held: Tally) -> Iterator[str]:
    yield from (f"# {job.recipe.name}: degraded speech with a teacher's scores", "")
    yield markdown(job.recipe.about) or "(the recipe says nothing about itself)"
    hours = held.samples * CLIP_HOURS
    yield from (
        "",
        f"- {held.samples} samples, {hours:.2f} h, {held.tar_bytes / 1e9:.3f} GB in "
        f"{len(held.whole)} of {job.shard_count} shards",
    )
    yield f"- mono FLAC, {SAMPLE_RATE} Hz, 16 bit, {CROP_SAMPLES / SAMPLE_RATE:g} s each"
    yield f"- scores (`mos`, 1 to 5): teacher {code(job.recipe.teacher.name)}, no human's"
    yield f"- teacher's weights: SHA-256 {code(job.identity['teacher_sha256'])}"
    yield f"- recipe hash: `{job.dataset_hash}`"
    splits = ", ".join(f"{role} {split}" for role, split in sorted(job.identity["splits"].items()))
    yield f"- splits drawn from: {markdown(splits)}"
    reasons = ", ".join(f"{count} {reason}" for reason, count in held.dropped.most_common())
    yield f"- dropped: {markdown(reasons) or 'none'}"
    yield f"- everything that was drawn: `{DATASET_FILE}` and each sample's `json`"
    yield from _licences(job, held)
    yield from _contents(held)
    yield from _scores(held)
    yield from _loading(job)
    yield from _again(job)


def _licences(job: Job, held: Tally) -> Iterator[str]:
    yield from ("", "## Licences", "")
    yield "A sample is derived from its recordings and from every processor that it went through;"
    yield "`licences` in its `json` names the processors'. This list is no legal advice."
    recordings = corpus_licences(job)
    yield from ("", "| recordings | files | licence |", "|---|---|---|")
    for licence, corpora in recordings.items():
        for name, count in corpora.items():
            yield f"| {name} | {count} | {markdown(licence)} |"
    yield from ("", "| processors' licence | samples | processors |", "|---|---|---|")
    for licence, count in held.licences.most_common():
        kinds = [kind for kind in job.recipe.kinds() if PROCESSORS[kind].licence == licence]
        yield f"| {markdown(licence)} | {count} | {', '.join(kinds)} |"
    asked = consequences({*recordings, *held.licences})
    yield from ("", "What this asks of who uses the whole, the strictest first:", "")
    for demand, names in asked:
        yield f"- **{demand}**: {DEMANDS[demand]} ({markdown('; '.join(names))})"
    if not asked:
        yield "- nothing but the licences' own notices"
    if any(noncommercial(licence) for licence in held.licences):
        yield from ("", "**Some samples are for non-commercial use only**: filter by `licences`.")


def _contents(held: Tally) -> Iterator[str]:
    yield from ("", "## Contents", "")
    if held.summarised < held.samples:
        missing = held.samples - held.summarised
        yield f"{missing} samples are in shards of an older version that does not count these."
        yield ""
    for what, about, counts in (
        ("corpus", "a sample may draw from several", held.corpora),
        ("language", "", held.languages),
        ("processor", "a sample may go through several", held.processors),
    ):
        yield f"| {what}{f' ({about})' if about else ''} | samples | hours |"
        yield "|---|---|---|"
        for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            shown = "(not known)" if what == "language" and name == UNKNOWN else markdown(name)
            yield f"| {shown} | {count} | {count * CLIP_HOURS:.2f} |"
        yield ""


def _scores(held: Tally) -> Iterator[str]:
    yield from ("## Scores", "")
    total = sum(held.mos)
    if not total:
        yield from ("no scores are counted", "")
        return
    yield f"Mean {held.mos_sum / total:.3f}, median {_quantile(held.mos, 0.5):.1f} (to 0.1)."
    yield from ("", "| mos | samples | share |", "|---|---|---|")
    step = MOS_BINS // 8
    for first in range(0, MOS_BINS, step):
        count = sum(held.mos[first : first + step])
        low, high = 1 + first / 10, 1 + (first + step) / 10
        yield f"| {low:.1f} to {high:.1f} | {count} | {count / total:.1%} |"
    yield ""


def _quantile(bins: Sequence[int], share: float) -> float:
    """The score below which a share of the samples lies: the middle of its bin."""
    wanted, seen = share * sum(bins), 0
    for i, count in enumerate(bins):
        seen += count
        if seen >= wanted:
            return 1 + (i + 0.5) / 10
    return 5.0


def _loading(job: Job) -> Iterator[str]:
    last, split = max(job.shard_count - 1, 0), _split(job)
    yield from ("## How to load", "", "```python")
    yield "import io, soundfile, webdataset as wds"
    yield f'for sample in wds.WebDataset("DIR/shard-{{000000..{last:06d}}}.tar").decode():'
    yield '    wave, rate_hz = soundfile.read(io.BytesIO(sample["flac"]))'
    yield '    mos = sample["json"]["mos"]  # also teacher, licences, plan, ...'
    yield ""
    yield "from datasets import load_dataset"
    yield "samples = load_dataset("
    yield f'    "webdataset", data_files={{"{split}": "DIR/shard-*.tar"}}, split="{split}"'
    yield from (")", "```", "", "```sh")
    yield "python -m train fit --student v2 --shards DIR --out RUN  # DIR or an address"
    yield from ("python -m pipeline verify DIR --deep", "```", "")


def _again(job: Job) -> Iterator[str]:
    """What to type to make the dataset again, and the recipe itself."""
    recipe = job.recipe.model_dump(mode="json", exclude_none=True)
    if re.search("[<`]", recipe["about"]):  # all else has an alphabet; what it says stands above
        del recipe["about"]
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip()
    yield from ("## How to make it again", "", "The recipe, as `recipe.yaml`:", "")
    yield from ("```yaml", text, "```", "", "```sh")
    yield from (_command(job), "```", "")
    if origin := job.identity.get("derived_from"):
        yield f"OLD is the dataset {code(origin['dataset_hash'])}, of which this is a new version:"
        yield f"the first {int(origin['samples'])} samples are its own, from its corpora."
    yield "With the same recordings, weights and packages the bytes are the same; the hashes of the"
    packages = markdown(_versions(job.identity["versions"]))
    yield f"former are in `{DATASET_FILE}`. Packages: {packages}."


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


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("dataset", type=place, metavar="DATASET", help="folder, or its address")


def run(options: argparse.Namespace) -> int:
    """Write a dataset's card again."""
    job = reopen(options.dataset, {})
    if not write_card(job):
        return 1
    print(job.folder.shown(CARD))
    return 0
