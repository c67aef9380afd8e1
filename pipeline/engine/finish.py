"""Finish a dataset that was made in parts, once it is whole: ``python -m pipeline finish``."""

from __future__ import annotations

import argparse

from data_specs.io.addresses import path_or_url, shown
from data_specs.sample import shard_name
from pipeline.dataset import description
from pipeline.dataset.card import CARD, write_card


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("dataset", type=path_or_url, help="a folder, or its address")
    parser.add_argument("--parts", type=int, default=0, metavar="N", help="name missing parts of N")


def run(options: argparse.Namespace) -> int:
    """Write the card; exit status 1 where a shard is still missing."""
    job = description.reopen(options.dataset, {})
    rest = job.todo()
    if not rest:
        write_card(job)
        card = job.folder.shown(CARD)
        print(f"{shown(options.dataset)}: all {job.shard_count} shards are whole: {card}")
        return 0
    names = ", ".join(shard_name(shard) for shard in rest[:5])
    print(
        f"{shown(options.dataset)}: {len(rest)} of {job.shard_count} shards are not whole: {names}"
    )
    if options.parts:
        behind = sorted({shard % options.parts + 1 for shard in rest})
        print(f"run these parts of {options.parts} again: {','.join(map(str, behind))}")
    return 1
