"""How long, how large and how dear a dataset is: ``python -m pipeline estimate RECIPE ...``.

A short calibration runs the recipe's own samples on this machine, stage by stage, alone and then on
all cores at once; or ``--rates FILE`` gives what another machine measured (``--save`` wrote it). A
model of stated assumptions (``pipeline.cluster.throughput``) does the rest. ``--stand-ins``
measures a recipe whose corpora and weights are not here: any speech, noise and rooms, and random
weights of the same networks, which take the same time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.io.hardware import cpus
from data_specs.recipe import Recipe, Source, Sources, load_recipe
from pipeline.cluster import rates as measured
from pipeline.cluster.stand_ins import default_corpora, stand_in_weights, without
from pipeline.cluster.throughput import (
    Cluster,
    Prediction,
    Rates,
    Store,
    cost_sha256,
    predict,
    uses,
)
from pipeline.dataset import prepare
from pipeline.dataset.job import CLIP_HOURS, Job
from pipeline.engine.watch import CLIP_S
from pipeline.options import parse_roots
from pipeline.render.processors import PROCESSORS

PAPER_SAMPLES = 4_000_000
"""The paper's unlabelled data: about 8533 h."""

HOUR_S = 3600.0
GIGABIT = 1e9 / 8


@dataclass(frozen=True)
class Prices:
    """Of a core and a GPU by the hour, of a GB by the month; None where it was not said."""

    core_hour: float | None = None
    gpu_hour: float | None = None
    gb_month: float | None = None

    def cost(self, cluster: Cluster, found: Prediction) -> float | None:
        """What a job costs, its first month of storage counted in; none without prices."""
        if self.core_hour is None or (cluster.gpus and self.gpu_hour is None):
            return None
        node = cluster.cores * self.core_hour + cluster.gpus * (self.gpu_hour or 0.0)
        compute = cluster.nodes * node * found.seconds / HOUR_S
        return compute + found.bytes_written / 1e9 * (self.gb_month or 0.0)


def main(argv: Sequence[str]) -> int:
    """Measure or read rates, then print the estimate."""
    options = _parser().parse_args(argv)
    prepare.require_samples(options.samples)
    recipe = load_recipe(options.recipe)
    of_cores = measured.given(options.rate, "--rate")
    of_gpus = measured.given(options.gpu_rate, "--gpu-rate")
    rates = _rates(recipe, options, {*of_cores, *of_gpus})
    measured.require_known(rates, (*of_cores, *of_gpus), recipe)
    rates = measured.with_given(rates, of_cores, of_gpus)
    if options.save:
        measured.save(rates, options.save)
    clusters = [_cluster(options, nodes) for nodes in options.nodes]
    _require_gpu_rates(options, rates)
    found = [predict(recipe, rates, options.samples, cluster) for cluster in clusters]
    prices = Prices(options.price_core_hour, options.price_gpu_hour, options.price_gb_month)
    if options.json:
        print(json.dumps(_as_json(rates, clusters, found, prices), indent=1))
    else:
        print("\n".join(lines(recipe, rates, clusters, found, prices)))
    return 0


def _rates(recipe: Recipe, options: argparse.Namespace, given: set[str]) -> Rates:
    if options.rates:
        return measured.read(options.rates)
    return measured_on(recipe, calibrate(recipe, options, given))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline estimate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="YAML file, or the name of one in data_specs/recipes")
    parser.add_argument("--samples", type=int, default=PAPER_SAMPLES, metavar="N")
    parser.add_argument("--json", action="store_true", help="everything, for machines")
    _rate_options(parser)
    _cluster_options(parser)
    for name, what in (
        ("core-hour", "of a core for an hour"),
        ("gpu-hour", "of a GPU for an hour"),
        ("gb-month", "of a GB stored for a month"),
    ):
        parser.add_argument(f"--price-{name}", type=_amount, metavar="PRICE", help=what)
    return parser


def _rate_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rates")
    group.add_argument("--corpus", action="append", default=[], metavar="NAME=DIR")
    group.add_argument("--seconds", type=float, default=30.0, help="of each of the two turns")
    group.add_argument("--workers", type=int, default=cpus(), help="at once, then")
    group.add_argument("--device", default="cpu", help="of the networks")
    group.add_argument("--teacher-device", default="", help="of the teacher (default: --device)")
    group.add_argument(
        "--rates", type=path_here, metavar="FILE", help="measure nothing: take these"
    )
    group.add_argument("--save", type=path_here, metavar="FILE", help="keep what was measured")
    group.add_argument("--stand-ins", action="store_true", help="any corpora, random weights")
    group.add_argument(
        "--rate",
        action="append",
        default=[],
        metavar="NAME=X",
        help="a processor's speed (or the teacher's) in times real time on one core",
    )
    group.add_argument(
        "--gpu-rate", action="append", default=[], metavar="NAME=X", help="the same on one GPU"
    )


def _cluster_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machines")
    group.add_argument("--nodes", type=_count, nargs="+", default=[1, 10, 100], metavar="N")
    group.add_argument("--cores", type=_count, default=cpus(), help="of a node")
    group.add_argument("--gpus", type=int, default=0, help="of a node, for what has a GPU rate")
    group.add_argument("--node-gbit", type=_amount, default=0.0, help="network of a node, Gbit/s")
    group.add_argument("--store-gbit", type=_amount, default=0.0, help="of the whole store, Gbit/s")
    group.add_argument("--store-gets", type=_amount, default=0.0, help="requests a second")
    group.add_argument("--store-puts", type=_amount, default=0.0, help="requests a second")
    group.add_argument("--remote-corpora", action="store_true", help="read from the store too")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def _amount(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be 0 or more")
    return value


def _cluster(options: argparse.Namespace, nodes: int) -> Cluster:
    store = Store(
        node_bytes_s=options.node_gbit * GIGABIT,
        bytes_s=options.store_gbit * GIGABIT,
        gets_s=options.store_gets,
        puts_s=options.store_puts,
        remote_corpora=options.remote_corpora,
    )
    return Cluster(nodes, options.cores, options.gpus, store)


def _require_gpu_rates(options: argparse.Namespace, rates: Rates) -> None:
    if options.gpus < 0:
        raise UserError(f"--gpus must be 0 or more, not {options.gpus}")
    if options.gpus and not rates.gpu:
        raise UserError(
            "--gpus: nothing has a rate on a GPU: measure on a machine that has one with "
            "--teacher-device cuda --save FILE, or give --gpu-rate teacher=X"
        )


# --- calibration ----------------------------------------------------------------------------------


def calibrate(recipe: Recipe, options: argparse.Namespace, given: set[str]) -> Rates:
    """Measure the recipe's stages on this machine, or those that are not ``given``."""
    if options.device != "cpu":
        raise UserError(
            "--device: only the teacher is measured on a GPU (--teacher-device); for processors "
            "there, give --gpu-rate NAME=X from `python -m tests.bench processors --device cuda`"
        )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        roots = parse_roots(options.corpus, recipe)
        missing: set[str] = set()
        if options.stand_ins:
            stack.enter_context(stand_in_weights(folder))
            recipe, missing = _runnable(_any_corpora(recipe))
            _require_rates(missing - given)
            roots = parse_roots(options.corpus, recipe) or default_corpora(folder)
        job = prepare.prepare(
            recipe,
            roots,
            folder / "out",
            recipe.shard_samples,
            progress=False,
            teacher_device=options.teacher_device,
        )
        return turns(job, options.seconds, options.workers, missing)


def measured_on(recipe: Recipe, rates: Rates) -> Rates:
    """``rates`` that say which recipe's they are: the user's, not what stood in for it."""
    whose = {"recipe": recipe.name, "recipe_sha256": cost_sha256(recipe)}
    return rates.model_copy(update=whose)


def turns(job: Job, seconds: float, workers: int, missing: set[str] | None = None) -> Rates:
    """Rates of a prepared job: alone, then ``workers`` at once."""
    driver_s = measured.since_start()
    alone = measured.measure(job, seconds).model_copy(update={"driver_s": driver_s})
    both = measured.together(job, alone, workers, seconds)
    left_out = missing or set()
    kept = {kind: s for kind, s in both.processors.items() if kind not in left_out}
    return both.model_copy(update={"processors": kept, "missing": tuple(sorted(left_out))})


def _any_corpora(recipe: Recipe) -> Recipe:
    """The recipe over any speech, noise and rooms; synthetic voices take no processor's time."""
    roles = [role for role in recipe.sources.present() if role != "voices"]
    sources = Sources(**{role: Source(corpus=role) for role in roles})
    return recipe.model_copy(update={"sources": sources, "voices": None})


def _runnable(recipe: Recipe) -> tuple[Recipe, set[str]]:
    """The recipe with nothing in the place of what cannot run here, and the names of that."""
    missing = set()
    for kind in recipe.kinds():
        try:
            PROCESSORS[kind].weights()
        except (UserError, ImportError, OSError):
            missing.add(kind)
    return recipe.model_copy(update={"stages": tuple(without(recipe, missing))}), missing


def _require_rates(missing: set[str]) -> None:
    """Say before the minutes of a calibration what it cannot measure."""
    if missing:
        rates = " ".join(f"--rate {kind}=X" for kind in sorted(missing))
        raise UserError(
            f"no stand-in, and no weights here, for {', '.join(sorted(missing))}: fetch them "
            f"(python -m pipeline weights), or give {rates} in times real time on one core"
        )


# --- shown ----------------------------------------------------------------------------------------


def lines(
    recipe: Recipe,
    rates: Rates,
    clusters: Sequence[Cluster],
    found: Sequence[Prediction],
    prices: Prices,
) -> Iterator[str]:
    """The estimate in words and tables."""
    first = found[0]
    yield (
        f"{recipe.name}: {first.samples} samples ({first.samples * CLIP_HOURS:.0f} h) in "
        f"{first.shards} shards of {recipe.shard_samples}, {first.bytes_written / 1e9:.1f} GB"
    )
    yield f"rates: {rates.about or 'as given'}"
    yield from ("", *_stage_table(recipe, rates, clusters[0], first))
    yield from ("", *_cluster_table(clusters, found, prices))
    yield ""
    for cluster, each in zip(clusters, found, strict=True):
        ranked = sorted(each.parts.items(), key=lambda part: -part[1])
        told = ", ".join(f"{name} {_hours(s)}" for name, s in ranked if s > 0)
        rest = f"start {each.start_s:.0f} s, tail {_hours(each.tail_s)}"
        yield f"{cluster.nodes} nodes: {told}; {rest}"
    yield from ("", *_assumptions(rates, clusters[0], prices))


def _stage_table(
    recipe: Recipe, rates: Rates, cluster: Cluster, found: Prediction
) -> Iterator[str]:
    heads = (("where", 8), ("of samples", 12), ("x real time", 13), ("core-s/sample", 15))
    yield f"{'stage':18}" + "".join(f"{head:>{width}}" for head, width in heads) + f"{'share':>8}"
    shares = uses(recipe)
    for name, seconds in found.sample_s.items():
        share = shares.get(name, 1.0)
        speed = share * CLIP_S / seconds if seconds else float("inf")
        yield (
            f"{name:18}{'core':>8}{share:>12.1%}{speed:>13.1f}{seconds:>15.4f}"
            f"{seconds / found.core_s:>8.1%}"
        )
    for name, seconds in rates.gpu.items() if cluster.gpus else ():
        share = shares.get(name, 1.0)
        yield f"{name:18}{'GPU':>8}{share:>12.1%}{CLIP_S / seconds:>13.1f}{'':>15}{'':>8}"
    total = f"{found.core_s:.4f}"
    yield f"{'a worker':18}{'':>8}{'':>12}{CLIP_S / found.core_s:>13.1f}{total:>15}{'':>8}"


def _cluster_table(
    clusters: Sequence[Cluster], found: Sequence[Prediction], prices: Prices
) -> Iterator[str]:
    yield (
        f"{'nodes':>6}{'cores':>8}{'GPUs':>6}{'samples/s':>12}{'x real time':>13}{'hours':>10}"
        f"{'core-hours':>12}{'GPU-hours':>11}{'cost':>11}  bottleneck"
    )
    for cluster, each in zip(clusters, found, strict=True):
        hours = each.seconds / HOUR_S
        cost = prices.cost(cluster, each)
        gpus = cluster.nodes * cluster.gpus
        yield (
            f"{cluster.nodes:>6}{cluster.workers:>8}{gpus:>6}{each.samples_per_s:>12.1f}"
            f"{each.samples_per_s * CLIP_S:>13.0f}{hours:>10.2f}{cluster.workers * hours:>12.0f}"
            f"{gpus * hours:>11.0f}{'?' if cost is None else f'{cost:.0f}':>11}  {each.bottleneck}"
        )


def _hours(seconds: float) -> str:
    return f"{seconds / HOUR_S:.2f} h" if seconds >= HOUR_S / 10 else f"{seconds:.0f} s"


def _assumptions(rates: Rates, cluster: Cluster, prices: Prices) -> Iterator[str]:
    yield "assumed: one worker a core; every core is as fast as this one, and"
    yield f"{rates.together:.2f} times as slow where {rates.cores} or more of a node are at work;"
    yield "the resources above work at the same time, and the slowest decides;"
    store = cluster.store
    if not (store.node_bytes_s or store.bytes_s):
        yield "network and store are no limit (--node-gbit, --store-gbit, --store-gets say more);"
    if not store.remote_corpora:
        yield "the corpora are read from each node's own disk (else: --remote-corpora);"
    yield f"the driver takes {cluster.driver_shard_s * 1e3:.0f} ms a shard; nothing fails."
    if prices.core_hour is None:
        yield "cost needs prices: --price-core-hour, --price-gpu-hour, --price-gb-month"


def _as_json(
    rates: Rates, clusters: Sequence[Cluster], found: Sequence[Prediction], prices: Prices
) -> dict[str, object]:
    return {
        "rates": rates.model_dump(mode="json"),
        "clusters": [
            {"cluster": asdict(c), "prediction": asdict(f), "cost": prices.cost(c, f)}
            for c, f in zip(clusters, found, strict=True)
        ],
    }
