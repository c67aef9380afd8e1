"""The weight files that processors need: where they lie here, and how they are fetched."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER_VARIABLE = "SPEECH_WEIGHTS"


def cache_folder() -> Path:
    """Where weights are kept: ``$SPEECH_WEIGHTS``, else ``~/.cache/distill-mos-factory``."""
    given = os.environ.get(FOLDER_VARIABLE)
    return Path(given) if given else Path.home() / ".cache" / "distill-mos-factory"


def find(name: str) -> Path:
    """The folder of the weights called ``name``, with all its files whole.

    Raises ``FileNotFoundError`` saying what to run; nothing is downloaded.
    """
    folder = cache_folder() / name
    if not folder.is_dir():
        raise FileNotFoundError(f"no weights {name!r} in {folder}: run make weights NAMES={name}")
    return folder
