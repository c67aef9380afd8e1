"""Make a dataset of labelled WebDataset shards: ``python -m pipeline shards RECIPE --out DIR ...``.

Done shards are kept: the same command goes on where it was.
"""

from __future__ import annotations

import argparse

from data_specs.recipe import load_recipe
from pipeline.dataset import attempts, prepare
from pipeline.engine.run import make
from pipeline.options import (
    corpus_places,
    engine_options,
    parse_beside,
    parse_roots,
    parse_splits,
    shards_options,
)
from pipeline.render import label

add_arguments = shards_options


def run(options: argparse.Namespace) -> int:
    """Make what is missing of the dataset, and of further splits of it."""
    recipe = load_recipe(options.recipe)
    roles = list(recipe.sources.present())
    roots, further = parse_roots(options.corpus, recipe), parse_beside(options.beside)
    outs = [("--out", options.out), *(("--and", out) for _, _, out in further)]
    device = options.teacher_device or options.device
    how = engine_options(options, device, [*outs, *corpus_places(roots)])
    job = prepare.prepare(
        recipe,
        roots,
        options.out,
        options.samples,
        parse_splits(options.split, roles),
        options.device,
        time_limit_s=options.time_limit,
        teacher_device=options.teacher_device,
    )
    for manifest in job.manifests.values():
        print(manifest.summary())
    if warning := label.slow_precision(recipe.teacher, job.label_device):
        print(warning)
    wanted = [job]
    for split, samples, out in further:
        wanted.append(prepare.beside(job, out, samples, dict.fromkeys(roles, split)))
    if options.retry_failed:
        wanted = [attempts.again(one) for one in wanted]
    return make(wanted, how)
