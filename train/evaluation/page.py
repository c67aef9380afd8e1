"""``evaluation.html``: the comparison as one file with a small script and no outside address.

It opens from disk. Tables sort, dots say whose clip they are and play it: the clips' audio is in
the page, up to a limit.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from data_specs.io.audio import BadAudio, open_audio
from data_specs.io.listen import data_uri
from data_specs.rated import RatedClip
from train import charts
from train.evaluation import figures
from train.evaluation.external_scorers import EXTERNAL
from train.evaluation.figures import Point
from train.evaluation.published import MARK, published_for, table1
from train.evaluation.records import METRICS, CommonClips, Comparison, Pair, SetResult
from train.evaluation.significance import LEVEL
from train.evaluation.tables import TITLES, means, p_text
from train.pages import template

LONGEST_SECONDS = 12.0
"""Longer clips are cut in the page."""

MOST_ROWS = 400
"""More clips of a set than this are not listed: they are in ``scores.csv``."""

VORBIS = 0.4
"""libsndfile's compression level of Ogg Vorbis, 0 best: about 60 kbit/s at 16 kHz."""


@dataclass(frozen=True)
class Audio:
    """Clips in the page: ``data:`` addresses by the clip's number, and what is said of them."""

    clips: dict[int, str]
    said: str


def embedded(paths: Mapping[int, Path], truths: Mapping[int, float], most_mb: float) -> Audio:
    """The clips' audio as Ogg Vorbis, up to ``most_mb`` (of base64) in all.

    Where not all fit, those are taken that are spread evenly over the ratings.
    """
    if not paths or most_mb <= 0:
        return Audio({}, "The page holds no audio.")
    ranked = sorted(paths, key=lambda clip: (truths[clip], clip))
    found: dict[int, str] = {}
    left, cut = most_mb * 1e6, 0
    # By reversed bits: however many are taken, they are spread over the ranks.
    for place in sorted(range(len(ranked)), key=lambda place: f"{place:032b}"[::-1]):
        made = _ogg(paths[ranked[place]])
        if made is None:
            continue
        address = data_uri("audio/ogg", made[0])
        if len(address) > left:
            break
        left -= len(address)
        cut += made[1]
        found[ranked[place]] = address
    said = f"{len(found)} of {len(paths)} rated clips can be heard here, as Ogg Vorbis copies"
    said += f", {cut} of them cut after {LONGEST_SECONDS:.0f} s" if cut else ""
    if len(found) < len(paths):
        said += f"; the others are left out, for the page's audio ends at {most_mb:g} MB"
    return Audio(found, said + ".")


def _ogg(path: Path) -> tuple[bytes, bool] | None:
    """A clip as Ogg Vorbis and whether it was cut; None where it cannot be read."""
    try:
        with open_audio(path) as file:
            rate = file.header.sample_rate_hz
            most = int(LONGEST_SECONDS * rate)
            wave_T, cut = file.read(0, most)[:, 0], file.header.frames > most
        made = io.BytesIO()
        soundfile.write(
            made, wave_T, rate, format="OGG", subtype="VORBIS", compression_level=VORBIS
        )
    except (BadAudio, soundfile.SoundFileError, OSError):
        return None
    return made.getvalue(), cut


# --- what the template shows ----------------------------------------------------------------------


def _result_rows(results: Sequence[SetResult], level: str) -> list[dict[str, Any]]:
    """Rows of one level's table by set, the highest PCC first; then what Table I says of it."""
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(result.set for result in results if result.level == level):
        found = [r for r in results if r.set == name and r.level == level]
        found.sort(key=lambda r: -1.0 if r.pcc is None else r.pcc, reverse=True)
        rows += [{"result": result} for result in found]
        if level == "clip" and found[0].kind == "rated":
            rows += [
                {"result": None, "published": row, "set": name, "pcc": pcc}
                for row, pcc in published_for(name)
            ]
    return rows


def _panels(results: Sequence[SetResult]) -> list[dict[str, Any]]:
    """Figure 3: a chart a rated set, and one of Table I's weighted means."""
    found = []
    for name in dict.fromkeys(r.set for r in results if r.level == "clip" and r.kind == "rated"):
        mine = [r for r in results if r.level == "clip" and r.set == name and r.pcc is not None]
        # Of a model's paddings of short clips the first: the others would cover it.
        firsts = {r.model: r for r in reversed(mine)}.values()
        points = [
            Point(_short_name(r.model), r.parameters, r.pcc, r.pcc_low, r.pcc_high)
            for r in firsts
            if r.parameters and r.pcc is not None
        ]
        points += [
            Point(row.model, row.parameters, pcc, published=True)
            for row, pcc in published_for(name)
        ]
        unknown = [r.model for r in firsts if not r.parameters]
        svg = figures.over_size(f"PCC over parameters, {name}", points)
        found.append({"title": name, "svg": svg, "unknown": unknown, "published": False})
    points = [Point(row.model, row.parameters, row.weighted, published=True) for row in table1()[0]]
    svg = figures.over_size("PCC over parameters, the paper's Table I", points)
    title = "Table I: mean over 16 sets, by clips"
    return [*found, {"title": title, "svg": svg, "unknown": [], "published": True}]


def _short_name(model: str) -> str:
    """The last two parts of a path: ``real/model`` of a run's folder."""
    return "/".join(model.split("/")[-2:]) if "/" in model else model


def matrix(clips: CommonClips, pairs: Sequence[Pair]) -> list[list[dict[str, Any] | None]]:
    """Every entry (row) against every other (column): PCC of the row's less the column's."""
    labels = [entry.label for entry in clips.entries]
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for pair in (pair for pair in pairs if pair.set == clips.name):
        table[pair.one, pair.other] = _cell(pair, 1)
        table[pair.other, pair.one] = _cell(pair, -1)
    return [[table.get((row, column)) for column in labels] for row in labels]


def _cell(pair: Pair, sign: int) -> dict[str, Any]:
    if pair.difference is None:
        return {"text": "–", "side": "", "title": pair.reason}
    said = f"p {p_text(pair.p)}, Holm {p_text(pair.p_holm)}, Williams {p_text(pair.williams_p)}"
    if pair.difference_low is not None and pair.difference_high is not None:
        low, high = sorted((sign * pair.difference_low, sign * pair.difference_high))
        said = f"95 %: {low:+.3f} to {high:+.3f}; {said}"
    above = sign * pair.difference
    clear = pair.p_holm is not None and pair.p_holm < LEVEL
    return {
        "text": f"{above:+.3f}" if abs(above) >= 0.0005 else "0.000",
        "side": ("above" if above > 0 else "below") if clear else "",
        "title": pair.reason if pair.p is None and pair.reason else said,
    }


def _set_view(clips: CommonClips, first: int, pairs: Sequence[Pair]) -> dict[str, Any]:
    truth = "people's rating" if clips.kind == "rated" else "teacher's label"
    drawn = []
    for entry in clips.entries:
        strips, hidden = figures.residuals(clips, entry, first) or (None, 0)
        dots = figures.scatter(clips, entry, first, truth)
        drawn.append({"entry": entry, "scatter": dots, "residuals": strips, "hidden": hidden})
    return {
        "clips": clips,
        "first": first,
        "charts": drawn,
        "matrix": matrix(clips, pairs),
        "groups": len(set(clips.groups)),
        "thinned": len(clips.keys) > charts.MOST_DOTS,
        "listed": len(clips.keys) <= MOST_ROWS,
    }


def _clip_data(sets: Sequence[CommonClips]) -> list[dict[str, Any]]:
    """What the script knows of every clip: name, set, condition, rating, scores by label."""
    return [
        {
            "name": Path(key).name,
            "set": clips.name,
            "group": clips.groups[n] if clips.unit != "clip" else "",
            "truth": round(float(clips.truth[n]), 3),
            "scores": {label: round(float(s[n]), 3) for label, s in clips.scores.items()},
        }
        for clips in sets
        for n, key in enumerate(clips.keys)
    ]


def page(
    found: Comparison, rated: Sequence[RatedClip], about: Mapping[str, Any], audio_mb: float
) -> str:
    """The page as HTML; ``rated`` are the clips whose audio it may hold."""
    here = {(clip.dataset, str(clip.path)): clip.path for clip in rated}
    starts = np.cumsum([0, *(len(clips.keys) for clips in found.sets)]).tolist()
    data = _clip_data(found.sets)
    numbered = [(clips.name, key) for clips in found.sets for key in clips.keys]
    paths = {number: here[clip] for number, clip in enumerate(numbered) if clip in here}
    rows, clips_of = table1()
    levels = dict.fromkeys(result.level for result in found.results)
    return template("evaluation.html.j2").render(
        about=about,
        levels=[(level, _result_rows(found.results, level)) for level in levels],
        means=means(found.results),
        metrics=METRICS,
        titles=TITLES,
        best=_best(found.per_clip),
        sets=[
            _set_view(clips, start, found.pairs)
            for clips, start in zip(found.sets, starts, strict=False)
        ],
        panels=_panels(found.results),
        found=found,
        table1=rows,
        table1_clips=clips_of,
        mark=MARK,
        level=LEVEL,
        external=EXTERNAL,
        data=data,
        audio=embedded(paths, {n: data[n]["truth"] for n in paths}, audio_mb),
        short_name=_short_name,
    )


def _best(results: Sequence[SetResult]) -> list[SetResult]:
    """The highest PCC of every set."""
    defined = [result for result in results if result.pcc is not None]
    return [
        max((r for r in defined if r.set == name), key=lambda r: r.pcc or 0.0)
        for name in dict.fromkeys(result.set for result in defined)
    ]
