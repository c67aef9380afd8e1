"""Teachers that Ray's workers share: a pool of actors in a placement group."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_specs.io.errors import UserError
from pipeline.audio import from_pcm, to_pcm
from pipeline.dataset.job import Job, use_one_thread
from pipeline.engine.base import EngineOptions
from pipeline.engine.ray_cluster import ends
from pipeline.render.label import Teacher, TeacherError

RESTARTS = 3
"""How often a dead teacher is started again; one that dies once more does not die by chance."""

CLUSTER_RESTARTS = 20
"""The same where machines come and go: by chance, then, but not for ever."""

SILENCE_S = 60.0
"""How long no worker, or no teacher, has had a place before that is said."""

ROOM_S = 120.0
"""How long a cluster that was only just started may take to have its machines together."""


def on_gpu(job: Job) -> bool:
    """Whether a job's teacher computes on a GPU."""
    return job.label_device.startswith("cuda")


@contextmanager
def shared_teacher(
    job: Job, how: EngineOptions
) -> Iterator[tuple[RemoteTeacher | None, TeachersPlace | None]]:
    """Start the teacher actors: how a worker sees them, and what they take.

    None where every worker has a teacher of its own. Raises ``UserError`` where the cluster has no
    place for them: Ray would wait, and not say for what.
    """
    import ray

    if not how.teacher_actors:
        yield None, None
        return
    require_resources(job, how)
    needs = how.teacher(on_gpu(job))
    restarts = CLUSTER_RESTARTS if len(ray.nodes()) > 1 else RESTARTS
    options = {"max_concurrency": 2, "max_restarts": restarts, "max_task_retries": -1, **needs}
    with _reserved(resources(needs), how.teacher_actors) as place:
        where = [place.option(index) if place else {} for index in range(how.teacher_actors)]
        kinds = [ray.remote(TeacherActor).options(**options, **option) for option in where]
        pool = [kind.remote(replace(job, manifests={})) for kind in kinds]
        try:
            name = job.recipe.teacher.name
            loaded = [_answer(asked, name) for asked in [actor.about.remote() for actor in pool]]
            yield RemoteTeacher(pool, *loaded[0]), place
        finally:
            ends(lambda: [ray.kill(actor) for actor in pool])


class RemoteTeacher:
    """Teacher actors as a worker sees them: one teacher. Asks them by turns."""

    def __init__(self, actors: Sequence[Any], name: str, weights_sha256: str) -> None:
        self.actors, self.name, self.weights_sha256 = tuple(actors), name, weights_sha256
        self._asked = 0

    def score(self, waves_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """As ``label.Teacher.score``, of waves that are PCM / 32768: they travel as 16 bits."""
        actor = self.actors[self._asked % len(self.actors)]
        self._asked += 1
        scores: tuple[np.ndarray, np.ndarray | None] = _answer(
            actor.score.remote(to_pcm(waves_BT)), self.name
        )
        return scores


def _answer(reference: Any, name: str) -> Any:
    """What an actor says, or the teacher's own error without the pages that Ray wraps around it.

    It is waited for by its future: ``ray.get`` would lend the task's core to another meanwhile.
    """
    from ray.exceptions import RayActorError, RayTaskError

    try:
        return reference.future().result()
    except RayTaskError as error:
        raise error.cause from None
    except RayActorError:
        raise TeacherError(
            f"teacher {name!r}: its actor died (killed, or out of memory) and was started again in "
            "vain; run the same command again, with fewer --teachers-per-gpu or --teacher-actors "
            "if memory was short"
        ) from None


class TeacherActor:
    """Actor: a teacher that workers share; they send PCM and get scores.

    Two calls may be inside at once, so that one's samples arrive while the other's are scored. On a
    GPU both go on into the teacher: its stream keeps their computation in order, and a transfer
    hides behind it. On a CPU the second waits, for the actor has one core.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.loading = job, threading.Lock()
        self.teacher: Teacher | None = None
        self.turn: AbstractContextManager[Any] = nullcontext() if on_gpu(job) else threading.Lock()

    def about(self) -> tuple[str, str]:
        """Name and weights' hash."""
        teacher = self._loaded()
        return teacher.name, teacher.weights_sha256

    def score(self, pcm_BT: NDArray[np.int16]) -> tuple[np.ndarray, np.ndarray | None]:
        """Scores and logits (B,) of clips."""
        waves_BT, teacher = from_pcm(pcm_BT), self._loaded()
        with self.turn:
            use_one_thread()  # again: OpenMP keeps the number for each thread that says it
            return teacher.score(waves_BT)

    def _loaded(self) -> Teacher:
        """Not loaded in ``__init__``: of an error there Ray passes on no more than a text."""
        with self.loading:
            self.teacher = self.teacher or self.job.load_teacher()
            return self.teacher


class TeachersPlace:
    """What the shared teachers take of the cluster, each on one machine: kept for them while one
    that died is started again, and sought anew where a machine is lost."""

    def __init__(self, each: dict[str, float], count: int) -> None:
        from ray.util import placement_group

        self.each, self.group = each, placement_group([dict(each) for _ in range(count)])
        self.lacking_since = self.warned = 0.0

    def option(self, index: int) -> dict[str, Any]:
        """A teacher's option that puts it there."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=index)
        return {"scheduling_strategy": strategy}

    def lacking_s(self) -> float:
        """Seconds since a teacher was first seen to have no place; 0 where each has one."""
        from ray.util import placement_group_table

        now = time.monotonic()
        if placement_group_table(self.group)["state"] == "CREATED":
            self.lacking_since = self.warned = 0.0
            return 0.0
        self.lacking_since = self.lacking_since or now
        self.warned = self.warned or now
        if now > self.warned + SILENCE_S:
            self.warned = now
            logging.getLogger(__name__).warning(
                "no place for a teacher that was lost: each needs %s on one machine", self.each
            )
        return now - self.lacking_since


@contextmanager
def _reserved(each: dict[str, float], count: int) -> Iterator[TeachersPlace | None]:
    """A place for all shared teachers; None where they take nothing."""
    from ray.util import remove_placement_group

    if not each:
        yield None
        return
    place = TeachersPlace(each, count)
    try:
        if not place.group.wait(ROOM_S):
            raise UserError(
                f"--teacher-actors {count}: each needs {each} on one machine, and the "
                "machines of this Ray have no place for all of them: ask for fewer, or for less "
                "(--teacher-needs)"
            )
        yield place
    finally:
        ends(lambda: remove_placement_group(place.group))


def resources(options: dict[str, Any]) -> dict[str, float]:
    """What an actor's options take, by Ray's names of resources."""
    names = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    return {name: options[option] for name, option in names.items() if options.get(option)}


def require_resources(job: Job, how: EngineOptions) -> None:
    """Raise ``UserError`` where a cluster has too little for the teachers and a worker."""
    import ray

    teacher, kind = how.teacher(on_gpu(job)), "GPU" if on_gpu(job) else "CPU"
    needed = how.teacher_actors * teacher["num_gpus" if kind == "GPU" else "num_cpus"]
    if kind == "CPU":
        needed += how.worker.cores
    until = time.monotonic() + (ROOM_S if how.ray_address else 0)
    while (there := ray.cluster_resources().get(kind, 0)) < needed - 1e-6:
        if time.monotonic() < until:
            time.sleep(1)
            continue
        raise UserError(
            f"--teacher-actors {how.teacher_actors} on {job.label_device!r} needs "
            f"{math.ceil(needed)} {kind}s and this Ray has {int(there)}: ask for fewer"
            + (", or for more --teachers-per-gpu" if kind == "GPU" else "")
        )
