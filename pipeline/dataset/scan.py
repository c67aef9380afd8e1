"""Scan the corpora of a recipe and write their manifests: ``python -m pipeline manifest``."""

from __future__ import annotations

import argparse

from data_specs.io.addresses import path_here
from data_specs.io.files import only_writer
from data_specs.io.names import visible
from data_specs.io.walk import first_of_each_kind
from data_specs.recipe import load_recipe
from pipeline.dataset import prepare
from pipeline.options import parse_roots, recipe_option


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    recipe_option(parser)
    parser.add_argument("--out", type=path_here, required=True)


def run(options: argparse.Namespace) -> int:
    """Scan, write, and say what was left out."""
    recipe = load_recipe(options.recipe)
    found = prepare.scan_all(recipe, parse_roots(options.corpus, recipe))
    with only_writer(options.out):
        for name, corpus in found.items():
            corpus.save(options.out / f"{name}.parquet")
            print(corpus.summary())
            for line in first_of_each_kind(corpus.left_out()):
                print(visible(line))
    print(f"written to {options.out}")
    return 0
