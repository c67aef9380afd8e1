"""What other machines make of the same samples: ``python -m tests.bench machines``.

The whole command is run again as an older processor would run it (the libraries are told to leave
newer instructions alone) and with two threads, and its audio and labels are held to those of a run
as the machine is. Another make of processor may differ in ways that this cannot show.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from data_specs.io.addresses import path_or_url
from data_specs.io.errors import UserError
from data_specs.recipe import load_recipe
from data_specs.sample import parse_sample
from pipeline.dataset.shards import find_shards, samples_of
from pipeline.options import parse_roots
from pipeline.render.render import Roots
from tests.bench import command, said_by
from tests.bench.stand_ins import default_corpora

AVX512 = "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR"
"""Of NumPy: names that it does not know are passed over with a warning."""

VARIANTS: dict[str, dict[str, str]] = {
    "again": {},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "DNNL_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        "NPY_DISABLE_CPU_FEATURES": AVX512,
    },
}

Made = dict[str, tuple[NDArray[np.int16], float]]
"""Audio (T,) and label of every sample, by key."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m tests.bench machines``."""
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--corpus", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--samples", type=int, default=100)


def run(options: argparse.Namespace) -> int:
    """Print how far each variant's audio and labels are from the machine's own."""
    recipe = load_recipe(options.recipe)
    print(f"{options.samples} samples of {options.recipe}, against a run with one thread")
    columns = ("same audio", "furthest, 16 bit", "same label", "99 %", "furthest, MOS")
    print(f"{'':12}" + "".join(f"{name:>18}" for name in columns))
    with tempfile.TemporaryDirectory() as folder:
        roots = parse_roots(options.corpus, recipe) or default_corpora(Path(folder))
        own = made(Path(folder) / "own", options, roots, {})
        for name, environment in VARIANTS.items():
            other = made(Path(folder) / name.replace(" ", "-"), options, roots, environment)
            print(f"{name:12}" + "".join(f"{cell:>18}" for cell in compared(own, other)))
    return 0


def made(
    out: Path, options: argparse.Namespace, roots: Roots, environment: Mapping[str, str]
) -> Made:
    """What the command makes in such an environment; ``RuntimeError`` with its last words."""
    how = ("--out", out, "--samples", options.samples, "--engine", "local")
    words = command("pipeline", "shards", options.recipe, *how, roots=roots)
    said_by(words, **{"OMP_NUM_THREADS": "1", **environment})
    return {
        key: (soundfile.read(io.BytesIO(flac), dtype="int16")[0], parse_sample(data, key).mos)
        for shard in find_shards(path_or_url(str(out)))
        for key, flac, data in samples_of(path_or_url(str(out)), shard)
    }


def compared(own: Made, other: Made) -> list[str]:
    """Cells of a variant's row: shares that are the same, and how far the others are.

    ``ValueError`` where not even the same samples were made.
    """
    if own.keys() != other.keys():
        raise UserError(f"other samples: {sorted(own.keys() ^ other.keys())[:5]}")
    away, labels = [], []
    for key, (audio_T, label) in own.items():
        other_T, other_label = other[key]
        away.append(int(np.abs(audio_T.astype(int) - other_T).max()))
        labels.append(abs(label - other_label))
    return [
        f"{np.mean(np.array(away) == 0):.0%}",
        f"{max(away)}",
        f"{np.mean(np.array(labels) == 0):.0%}",
        f"{np.quantile(labels, 0.99):.2g}",
        f"{max(labels):.2g}",
    ]
