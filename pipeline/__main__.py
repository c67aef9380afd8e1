"""``python -m pipeline VERB``: manifest, plan, shards, verify, finish, replay, status, estimate,
card, extend, merge, relabel, preview, corpora, speak, weights, submit."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from data_specs.io.addresses import path_here, place
from data_specs.io.cli import EXIT_STATUSES, end, run_command
from data_specs.io.output import visible_output
from pipeline import options, verbs


def parser() -> argparse.ArgumentParser:
    """Every verb and its options."""
    top = argparse.ArgumentParser(
        prog="python -m pipeline", description=verbs.__doc__, epilog=EXIT_STATUSES
    )
    sub = top.add_subparsers(dest="verb", required=True)
    _recipe_verbs(sub)
    _dataset_verbs(sub)
    for name, about in (
        ("status", "how far a dataset is: shards, samples, rate, failures; 0 where it is whole"),
        ("estimate", "how long, how large and how dear a dataset is, before it is made"),
        ("card", "write a dataset's card again"),
        ("extend", "more samples of a dataset, or a new version of it with more recordings"),
        ("merge", "several outputs of one recipe as one dataset"),
        ("relabel", "label a dataset's samples again by another teacher, as another dataset"),
        ("preview", "a static page to listen to samples of a dataset"),
        ("corpora", "write corpora: synthetic speech, noise, simulated rooms"),
        ("speak", "write synthetic speech by text-to-speech models, as a corpus"),
        ("submit", "hand a job to Ray, Slurm or Kubernetes, or show what would be handed"),
        ("weights", "fetch the processors' weights into one cache; list and check them"),
    ):
        sub.add_parser(name, help=about, add_help=False)
    return top


def _recipe_verbs(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    manifest = sub.add_parser("manifest", help="scan a recipe's corpora and show what was found")
    plan = sub.add_parser("plan", help="plan samples without making audio, as parquet")
    make = sub.add_parser("shards", help="make a dataset of labelled shards; resumes by itself")
    for verb in (manifest, plan):
        options.recipe_option(verb)
        verb.add_argument("--out", type=path_here, required=True)
    options.sample_options(plan)
    options.shards_options(make)


def _dataset_verbs(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verify = sub.add_parser("verify", help="hold a dataset to its records")
    verify.add_argument("dataset", type=place, help="a folder, or its address")
    how = verify.add_mutually_exclusive_group()
    how.add_argument("--deep", action="store_true", help="decode all audio and compare hashes")
    how.add_argument(
        "--quick", action="store_true", help="only the listing and the records: no tar is read"
    )
    verify.add_argument(
        "--workers", type=int, default=1, metavar="N", help="shards at a time (default 1)"
    )
    verify.add_argument(
        "--apart-from",
        type=place,
        metavar="DATASET",
        help="also check that the two share no speaker, recording, noise or room",
    )
    finish = sub.add_parser("finish", help="write the card of a dataset made in parts, once whole")
    finish.add_argument("dataset", type=place, help="a folder, or its address")
    finish.add_argument("--parts", type=int, default=0, metavar="N", help="name missing parts of N")
    replay = sub.add_parser("replay", help="make samples again from their own records")
    replay.add_argument("keys", nargs="+", metavar="KEY")
    replay.add_argument("--dataset", type=place, required=True)
    replay.add_argument(
        "--out", type=path_here, help="folder for the audio (default: compare only)"
    )
    options.outside_option(replay)
    options.corpus_option(replay)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb. Exit status 0: done; 1: not whole; 2: bad input; 130, 143: ended by a signal."""
    with visible_output():
        given, rest = parser().parse_known_args(argv)
        if rest and given.verb not in verbs.OWN_OPTIONS:
            parser().error(f"unrecognized arguments: {' '.join(rest)}")
        return run_command(lambda: _run(given, rest))


def _run(given: argparse.Namespace, rest: list[str]) -> int:
    if given.verb in verbs.OWN_OPTIONS:
        return verbs.delegate(given.verb, rest)
    return verbs.VERBS[given.verb](given)


if __name__ == "__main__":
    end(main())
