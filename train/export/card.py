"""The model card: ``README.md`` as the Hugging Face hub reads it, from what is known.

What is not known is left for the user to fill, in words, not guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from data_specs.io.errors import UserError
from data_specs.io.files import sha256_of
from data_specs.io.names import markdown
from data_specs.io.parse import json_object
from train.export.parity import Parity, as_markdown
from train.models.student import StudentConfig, count, v7_weights_path
from train.pages import ranged, template

V7_LICENCE = (
    "MIT: the weights are the published ones, out of the `distillmos` package (Microsoft; Benjamin "
    "Stahl, Hannes Gamper), whose licence covers them."
)
NO_LICENCE = (
    "Not chosen yet. The code is MIT; weights that were trained on recordings or ratings may be "
    "bound by the terms of those. Whoever publishes this model fills in `license` above and this "
    "paragraph."
)
RESULT_COLUMNS = ("model", "set", "kind", "padding", "clips", "pcc", "spearman", "rmse")


def card_text(
    about: Mapping[str, Any], hashes: Mapping[str, str], parity: Mapping[str, Parity]
) -> str:
    """The card of a bundle whose ``model.json`` is ``about``; ``hashes`` by file name.

    ``about`` may have what only whoever publishes a model can say of it: ``licence`` of the weights
    as the hub spells it, ``notes`` in Markdown, and ``results`` of an evaluation.
    """
    parameters, macs = count(StudentConfig.model_validate(about["config"]))
    # By the weights: a run's folder may be called v7, too.
    published = about["made_from"]["weights_sha256"] == sha256_of(v7_weights_path())
    licence = "mit" if published else str(about.get("licence") or "")
    return template("model_card.md.j2").render(
        front=_front(licence).to_yaml(),
        about=about,
        published=published,
        licence=V7_LICENCE if published else markdown(licence) or NO_LICENCE,
        parameters=parameters,
        macs=macs,
        hashes=hashes,
        parity=as_markdown(parity) if parity else None,
        results=_kept_results(about),
        columns=RESULT_COLUMNS,
    )


def _front(licence: str) -> ModelCardData:
    """What the hub reads of a card; a licence that nobody has chosen is left to be filled in."""
    return ModelCardData(
        license=licence or "other",
        license_name=None if licence else "to-be-filled-in",
        library_name="distill-mos-factory",
        pipeline_tag="audio-classification",
        tags=["speech-quality", "mean-opinion-score", "onnx"],
    )


def read_results(folder: Path) -> list[dict[str, str]]:
    """Rows of an evaluation's ``results.json`` as text; ``ValueError`` naming it if it is none."""
    path = folder / "results.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: make it: python -m train evaluate --out {folder}")
    try:
        sets = json_object(path.read_bytes(), path)["sets"]
        rows = [{**row, "model": Path(row["model"]).name} for row in sets]
        return [{name: _shown(row, name) for name in RESULT_COLUMNS} for row in rows]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the results of `python -m train evaluate`") from error


def _kept_results(about: Mapping[str, Any]) -> list[dict[str, str]]:
    """What ``read_results`` found when a bundle was made."""
    try:
        return [
            {name: str(row[name]) for name in RESULT_COLUMNS} for row in about.get("results", ())
        ]
    except (KeyError, TypeError) as error:
        raise UserError("model.json: results: not those of `train export`") from error


def _shown(row: Mapping[str, Any], name: str) -> str:
    value, *ends = (row.get(f"{name}{end}") for end in ("", "_low", "_high"))
    if isinstance(value, float):
        low, high = (end if isinstance(end, float) else None for end in ends)
        return ranged(value, low, high)
    return "-" if value is None else markdown(value)
