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
from train.pages import template

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
    about: Mapping[str, Any],
    hashes: Mapping[str, str],
    parity: Mapping[str, Parity],
    evaluation: Path | None,
) -> str:
    """The card of a bundle whose ``model.json`` is ``about``; ``hashes`` by file name."""
    parameters, macs = count(StudentConfig.model_validate(about["config"]))
    # By the weights: a run's folder may be called v7, too.
    published = about["made_from"]["weights_sha256"] == sha256_of(v7_weights_path())
    return template("model_card.md.j2").render(
        front=_front(published).to_yaml(),
        about=about,
        published=published,
        licence=V7_LICENCE if published else NO_LICENCE,
        parameters=parameters,
        macs=macs,
        hashes=hashes,
        parity=as_markdown(parity) if parity else None,
        results=read_results(evaluation) if evaluation else [],
        columns=RESULT_COLUMNS,
    )


def _front(published: bool) -> ModelCardData:
    """What the hub reads of a card; a licence that nobody has chosen is left to be filled in."""
    return ModelCardData(
        license="mit" if published else "other",
        license_name=None if published else "to-be-filled-in",
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
        return [{name: _shown(row.get(name)) for name in RESULT_COLUMNS} for row in sets]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the results of `python -m train evaluate`") from error


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else markdown(value)
