"""How long a dataset takes: a model of rates, pure arithmetic.

What it assumes, and no more:

- A worker is one core and makes its shards one after the other: what a sample costs there is a sum
  (plan, read and mix, each processor by its share of the samples, encode, teacher, and a shard's
  commit), slower by ``together`` where all cores of a machine are at work.
- A shard is made by one worker. With fewer shards than workers some have nothing to do; at the end
  of a job most wait for the last (the tail).
- Cores, GPUs, the network, the object store and the driver work at the same time: a job takes what
  the slowest of them takes, and the start.
- Reading asks the store once for a recording, a noise, a room; writing is one upload a shard and
  one a record. What a store serves is the caller's to say (``Store``).

Rates are measured (``pipeline.cluster.rates``) or given; nothing here has one of its own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import Field

from data_specs.io.errors import UserError
from data_specs.recipe import Recipe, Stage
from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE
from data_specs.strict import Strict, digest

CLIP_S = CROP_SAMPLES / SAMPLE_RATE
TEACHER = "teacher"
COSTS_NOTHING = {"name", "about", "seed", "allow_noncommercial", "max_dropped_share"}
"""Of a recipe, what does not change how long a sample takes."""

TAIL = 1.25
"""A job that takes so much longer than its cores' work has too few shards for its workers."""


class Rates(Strict):
    """What the stages cost on one core of one machine, in seconds a sample where no other unit is
    in the name.

    ``processors`` is for a sample that goes through one; ``gpu`` holds GPU-seconds of the stages
    (``teacher``, or a processor) that were timed on one; a teacher that was timed there alone has
    no ``teacher_s``. ``together`` is how much longer all takes
    with ``cores`` workers at once. ``missing`` names processors that could not be run. ``recipe``
    and ``recipe_sha256`` say on whose samples all was measured.
    """

    about: str = ""
    recipe: str = ""
    recipe_sha256: str = ""
    driver_s: float = Field(ge=0)
    import_s: float = Field(default=0.0, ge=0)
    worker_s: float = Field(ge=0)
    mix_s: float = Field(ge=0)
    processors: dict[str, float]
    encode_s: float = Field(ge=0)
    teacher_s: float | None = Field(default=None, ge=0)
    commit_s_per_shard: float = Field(ge=0)
    bytes_written: float = Field(ge=0)
    bytes_read: float = Field(ge=0)
    gpu: dict[str, float] = Field(default_factory=dict)
    together: float = Field(default=1.0, ge=0.5)
    cores: int = Field(default=1, ge=1)
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Store:
    """What carries the bytes; a rate of 0 is no limit. ``node_bytes_s`` and ``bytes_s`` are of a
    machine's network and of the store as a whole, requests are a second."""

    node_bytes_s: float = 0.0
    bytes_s: float = 0.0
    gets_s: float = 0.0
    puts_s: float = 0.0
    listing_s: float = 0.1  # of one request, which lists a thousand names
    remote_corpora: bool = False


@dataclass(frozen=True)
class Cluster:
    """Machines. ``cores`` and ``gpus`` are of one node, of GPUs on average; ``driver_shard_s`` is
    what the driver does for a shard, one after the other; ``separate`` says that workers are
    processes of their own."""

    nodes: int = 1
    cores: int = 1
    gpus: float = 0
    store: Store = field(default_factory=Store)
    driver_shard_s: float = 0.005
    separate: bool = True

    @property
    def workers(self) -> int:
        """One to a core."""
        return self.nodes * self.cores


@dataclass(frozen=True)
class Prediction:
    """What a job takes. ``seconds`` is all of it; ``parts`` is what each resource would take alone
    (the largest is the ``bottleneck``), ``sample_s`` core-seconds by stage, ``gpu_s`` GPU-seconds
    of one sample."""

    seconds: float
    bottleneck: str
    parts: Mapping[str, float]
    sample_s: Mapping[str, float]
    gpu_s: float
    start_s: float
    tail_s: float
    shards: int
    workers: int
    samples: int
    bytes_written: float

    @property
    def core_s(self) -> float:
        """Core-seconds of one sample."""
        return sum(self.sample_s.values())

    @property
    def samples_per_s(self) -> float:
        """Over the whole job, the start counted in."""
        return self.samples / self.seconds


def cost_sha256(recipe: Recipe) -> str:
    """Two recipes with the same one have the same rates."""
    return digest(recipe.model_dump(mode="json", exclude=COSTS_NOTHING))


def uses(recipe: Recipe) -> dict[str, float]:
    """How often a sample goes through each processor, on average."""
    degraded = 1.0
    if recipe.voices and not recipe.voices.degrade:
        degraded -= recipe.voices.share
    found: dict[str, float] = defaultdict(float)
    for stage in recipe.all_stages():
        for kind, share in _shares(stage).items():
            found[kind] += degraded * share
    return dict(found)


def _shares(stage: Stage) -> dict[str, float]:
    total = sum(option.weight for option in stage.choices)
    return {option.use.kind: stage.probability * option.weight / total for option in stage.choices}


def predict(recipe: Recipe, rates: Rates, samples: int, cluster: Cluster) -> Prediction:
    """What making ``samples`` takes. ``ValueError`` naming a processor without a rate."""
    on_gpu = set(rates.gpu) if cluster.gpus else set()
    stages = _stages(recipe, rates, on_gpu, slowdown(rates, cluster.cores))
    gpu_s = sum(
        share * rates.gpu[name] for name, share in _counted(recipe).items() if name in on_gpu
    )
    shards = math.ceil(samples / recipe.shard_samples)
    bytes_written = samples * rates.bytes_written
    transfer_s = _upload_s(rates.bytes_written, cluster)
    sample_s = sum(stages.values()) + gpu_s + transfer_s
    busy_s = samples * sample_s / cluster.workers
    makespan_s = _makespan(samples, recipe.shard_samples, cluster.workers) * sample_s
    parts = {
        "cores": busy_s,
        "shards' size": makespan_s if makespan_s > TAIL * busy_s else 0.0,
        **_shared(recipe, rates, samples, shards, cluster),
    }
    if gpu_s:
        parts["GPUs"] = samples * gpu_s / (cluster.nodes * cluster.gpus)
    start_s = rates.driver_s + rates.worker_s + (rates.import_s if cluster.separate else 0.0)
    return Prediction(
        seconds=start_s + max(makespan_s, *parts.values()),
        bottleneck=max(parts, key=lambda name: parts[name]),
        parts=parts,
        sample_s=stages,
        gpu_s=gpu_s,
        start_s=start_s,
        tail_s=max(makespan_s - busy_s, 0.0),
        shards=shards,
        workers=cluster.workers,
        samples=samples,
        bytes_written=bytes_written,
    )


def slowdown(rates: Rates, workers: int) -> float:
    """How much longer a worker takes beside the others of its machine: from 1 for one alone to
    ``together`` for as many as were measured, and no more for more (which is assumed)."""
    if rates.cores <= 1:
        return rates.together
    share = min((workers - 1) / (rates.cores - 1), 1.0)
    return 1 + (rates.together - 1) * share


def _counted(recipe: Recipe) -> dict[str, float]:
    return {**uses(recipe), TEACHER: 1.0}


def _stages(recipe: Recipe, rates: Rates, on_gpu: set[str], slow: float) -> dict[str, float]:
    """Core-seconds of a sample, by stage."""
    found = {"read and mix": rates.mix_s}
    for kind, share in sorted(uses(recipe).items()):
        if kind == "none" or kind in on_gpu:
            continue
        if kind not in rates.processors:
            raise UserError(
                f"no rate for processor {kind!r}: measure where it runs, or give "
                f"--rate {kind}=X, its speed in times real time on one core"
            )
        found[kind] = share * rates.processors[kind]
    if TEACHER not in on_gpu:
        if rates.teacher_s is None:
            raise UserError(
                "the teacher was timed on a GPU and has no rate on a core: give --gpus, or measure "
                "without --teacher-device, or give --rate teacher=X"
            )
        found[TEACHER] = rates.teacher_s
    found["encode"] = rates.encode_s
    found["commit"] = rates.commit_s_per_shard / recipe.shard_samples
    return {name: seconds * slow for name, seconds in found.items()}


def _upload_s(bytes_written: float, cluster: Cluster) -> float:
    """Seconds of a worker that a sample's upload takes, where a node's workers share its network
    evenly; they wait for it, for a shard is committed before the next begins."""
    if not cluster.store.node_bytes_s:
        return 0.0
    return bytes_written * cluster.cores / cluster.store.node_bytes_s


def _makespan(samples: int, shard: int, workers: int) -> float:
    """Samples that the busiest worker makes, one after the other, when idle ones take the next
    shard; the last shard may be short."""
    whole, rest = divmod(samples, shard)
    rounds, over = divmod(whole, workers)
    if over:
        return (rounds + 1) * shard
    return rounds * shard + rest


def _shared(
    recipe: Recipe, rates: Rates, samples: int, shards: int, cluster: Cluster
) -> dict[str, float]:
    """Seconds of what all workers share, each for itself."""
    store = cluster.store
    read = samples * rates.bytes_read if store.remote_corpora else 0.0
    moved = read + samples * rates.bytes_written
    noise = recipe.noise.probability if recipe.noise else 0.0
    room = recipe.room.probability if recipe.room else 0.0
    gets = samples * (1 + noise + room) if store.remote_corpora else 0.0
    return {
        "the nodes' network": _at(moved, cluster.nodes * store.node_bytes_s),
        "the store's bandwidth": _at(moved, store.bytes_s),
        "the store's requests": max(_at(gets, store.gets_s), _at(2 * shards, store.puts_s)),
        "listing and commit": shards * cluster.driver_shard_s
        + math.ceil(2 * shards / 1000) * store.listing_s,
    }


def _at(amount: float, rate: float) -> float:
    return amount / rate if rate else 0.0
