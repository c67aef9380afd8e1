"""Front ends against each other: a teacher's head by folds of whole conditions.

``python -m tests.bench folds --rated labels.csv --front-end mfcc v7-conv --out DIR``. Every clip is
scored once, by a head that heard none of its condition; PCC and RMSE to people over all of them,
each dataset on the scale that the head learned for it.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from data_specs.io.addresses import path_here
from data_specs.rated import RatedClip, read_rated
from train.data.order import generator
from train.files import csv_rows
from train.metrics import agreement
from train.teacher.fit import add_arguments as teacher_arguments
from train.teacher.fit import run as train_teacher


def fold_of(clips: Sequence[RatedClip], folds: int, seed: int) -> list[int]:
    """Each clip's fold: the conditions of a dataset are dealt out in a drawn order."""
    places: dict[tuple[str, str], int] = {}
    for dataset in sorted({clip.dataset for clip in clips}):
        names = sorted(
            {clip.condition or clip.path.name for clip in clips if clip.dataset == dataset}
        )
        order = generator(seed, 0).permutation(len(names))
        places |= {(dataset, names[n]): place % folds for place, n in enumerate(order)}
    return [places[clip.dataset, clip.condition or clip.path.name] for clip in clips]


def write_rated(path: Path, clips: Sequence[RatedClip]) -> Path:
    """A table of these clips."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["dataset", "path", "mos", "condition"])
        writer.writerows([c.dataset, c.path, c.mos, c.condition or ""] for c in clips)
    return path


def scored(front_end: str, clips: Sequence[RatedClip], args: argparse.Namespace) -> list[list[str]]:
    """Dataset, rating and score of every clip."""
    folds, found = fold_of(clips, args.folds, args.seed), []
    parser = argparse.ArgumentParser()
    teacher_arguments(parser)
    for fold in range(args.folds):
        out = args.out / f"{front_end}-{args.seed}-{fold}"
        out.mkdir(parents=True, exist_ok=True)
        parts = [
            [c for c, f in zip(clips, folds, strict=True) if (f == fold) == held]
            for held in (False, True)
        ]
        rated, held = (write_rated(out / f"part{n}.csv", part) for n, part in enumerate(parts))
        options = {"rated": rated, "validation": held, "out": out, "front-end": front_end}
        options |= {
            "cache": args.out / f"features-{front_end}",
            "steps": args.steps,
            "seed": args.seed,
        }
        options |= {"validate-every": args.steps, "layers": 2, "lr": args.lr, "logger": "none"}
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        train_teacher(parser.parse_args([*words, "--device", "cpu", "--threads", "1"]))
        found += [
            [row["dataset"], row["mos"], row["own"]] for row in csv_rows(out / "validation.csv")
        ]
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m tests.bench folds``."""
    parser.add_argument("--rated", type=path_here, required=True)
    parser.add_argument("--front-end", nargs="+", required=True)
    parser.add_argument("--out", type=path_here, required=True)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Print a table; a run that is there goes on."""
    clips = read_rated(args.rated)
    lines = []
    for front_end in args.front_end:
        rows = scored(front_end, clips, args)
        for dataset in sorted({row[0] for row in rows}):
            pairs = [(float(mos), float(own)) for name, mos, own in rows if name == dataset]
            found = agreement(*zip(*pairs, strict=True))
            figures = f"{found.pcc:.3f} / {found.rmse:.3f}"
            lines.append(f"| `{front_end}` | `{dataset}` | {found.clips} | {figures} |")
    print(
        "\n".join(["| front end | rated set | clips | PCC / RMSE |", "|---|---|---|---|", *lines])
    )
    return 0
