"""Real speech for the demo: prompts spoken in studios, out of Debian's ``asterisk-core-sounds``.

The packages hold raw G.722, 16 kHz at 64 kbit/s, a folder for each talker: ``en_US_f_Allison``.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np

from data_specs.io.errors import UserError
from pipeline.corpora.folder import Wave, claimed, make_files

SHORTEST_SECONDS = 3.0
BYTES_A_SECOND = 8_000

TALKER = re.compile(r"/(?P<language>[a-z]{2})_[A-Z]{2}_[fm]_(?P<name>\w+)/(?P<prompt>.+)\.g722$")


def make_studio(unpacked: Path, out: Path, workers: int = 2) -> list[Path]:
    """Write the prompts of 3 s and more below a folder as ``<language>/studio-<name>/*.flac``.

    Raises ``UserError`` where the folder has none, or what decodes them is not installed.
    """
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise UserError("PyAV, which decodes G.722, is not installed: run make setup") from error
    found = ((TALKER.search(path.as_posix()), path) for path in sorted(unpacked.rglob("*.g722")))
    jobs = [
        (out / talker["language"] / f"studio-{talker['name'].lower()}" / _name(talker), path)
        for talker, path in found
        if talker and path.stat().st_size >= SHORTEST_SECONDS * BYTES_A_SECOND
        if not talker["prompt"].startswith("silence/")
    ]
    if not jobs:
        raise UserError(f"{unpacked}: no prompts of asterisk-core-sounds-*-g722 below it")
    with claimed(out, "studio", 0):
        return make_files(
            [(to, partial(decode_g722, path)) for to, path in jobs], "studio", workers
        )


def _name(talker: re.Match[str]) -> str:
    return talker["prompt"].replace("/", "-") + ".flac"


def decode_g722(path: Path) -> Wave:
    """Speech (T,) at 16 kHz."""
    import av

    with av.open(str(path), format="g722") as file:
        frames = [frame.to_ndarray() for frame in file.decode(audio=0)]
    return np.concatenate(frames, axis=1)[0].astype(np.float64) / 2**15
