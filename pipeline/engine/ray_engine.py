"""The Ray engine: a remote task for each shard, and worker processes that keep their models from
one task to the next. Ray only schedules; no finished audio passes through it."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from data_specs.io.errors import UserError
from data_specs.io.retry import TRANSIENT_ERRNOS
from pipeline.dataset.job import Job, ShardWorker, WorkerFactory
from pipeline.dataset.shards import ShardError
from pipeline.engine import ray_cluster
from pipeline.engine.base import EngineOptions, Finished, Said, Task, make_shard
from pipeline.engine.teachers import SILENCE_S, TeachersPlace, on_gpu, shared_teacher
from pipeline.engine.watch import LABELS, METRICS, Progress, Sink, Watch, measures

RETRIES = 3
"""How often a shard is made again whose worker died, though its machine lives."""

LOOK_S = 10.0
"""How often the cluster is looked at where nothing happens."""


def run_ray(
    factory: WorkerFactory,
    jobs: Sequence[Job],
    todo: list[Task],
    how: EngineOptions,
    watches: Mapping[int, Watch],
) -> Finished:
    """Make shards on a Ray cluster, or on a Ray of this run's own (``base.Engine``)."""
    job, address = jobs[0], how.ray_address or os.environ.get("RAY_ADDRESS", "")
    ray = ray_cluster.import_ray(address)
    started = not ray.is_initialized()
    if started:
        if address not in ray_cluster.OWN_RAY:
            ray_cluster.require_answer(address)
        ray_cluster.start_ray(how.workers + (0 if on_gpu(job) else how.teacher_actors), address)
    try:
        with ExitStack() as stack:
            for watch in watches.values():
                stack.enter_context(watch.sending(metrics(job.recipe.name, watch.run)))
            teacher, place = stack.enter_context(shared_teacher(job, how))
            needs = _worker_needs(job, min(how.workers, len(todo)), how)
            pool = _Pool(how.workers, needs, place, (factory, jobs, teacher), watches)
            yield from pool.work(todo)
    except ray.exceptions.RayError as error:
        raise cause_of(error) from None
    finally:
        if started:
            ray_cluster.leave_ray()


_PROCESS: dict[str, Any] = {}
"""What a worker process keeps between tasks: its worker, its jobs, and what they came from."""


def make_task(task: Task, given: list[Any]) -> Said:
    """Remote task: make a shard. Begins before the models are loaded, which may take a while."""
    yield 0
    worker, jobs = _kept(given[0])
    yield from make_shard(worker, jobs[task.job], task.shard)


def _kept(given: Any) -> tuple[ShardWorker, Sequence[Job]]:
    """This process' worker and jobs, made from what the driver put into Ray's store.

    It is waited for by its future: ``ray.get`` would lend this task's core to another meanwhile.
    """
    if _PROCESS.get("given") != given:
        _PROCESS.clear()
        factory, jobs, teacher = given.future().result()
        _PROCESS.update(worker=factory(jobs[0], teacher), jobs=jobs, given=given)
    return _PROCESS["worker"], _PROCESS["jobs"]


@dataclass
class _Attempt:
    """A task of Ray's: what it said last, None before it runs."""

    task: Task
    said: int | str | None = None


class _Pool:
    """As many tasks in flight as there shall be workers, wherever Ray has a place for them.

    Tasks that have no place yet are what an autoscaler sees. Ray itself makes none again: it would
    not say so, and would blame a shard for the machine that was lost with it.
    """

    def __init__(
        self,
        size: int,
        needs: dict[str, Any],
        place: TeachersPlace | None,
        given: tuple[Any, ...],
        watches: Mapping[int, Watch],
    ) -> None:
        import ray

        keeps: dict[str, Any] = {"max_calls": 0, "max_retries": 0, "num_returns": "streaming"}
        self.kind = ray.remote(**keeps, **needs)(make_task)
        self.size, self.needs, self.place, self.watches = size, needs, place, watches
        self.given = [ray.put(given)]  # in a list, so that a process fetches it once
        self.running: dict[Any, _Attempt] = {}
        self.waiting: deque[Task] = deque()
        self.cancelled: set[Any] = set()
        self.deaths: Counter[Task] = Counter()
        self.heard = time.monotonic()

    def work(self, todo: Sequence[Task]) -> Finished:
        """Make shards. ``OSError`` where an output cannot be written."""
        import ray

        self.waiting.extend(todo)
        try:
            while self.waiting or self.running:
                self._fit()
                yield from self._news()
        finally:
            for reference in self.running:  # they must not write beside the next run
                with suppress(Exception):  # what ends the run may be that nobody answers
                    ray.cancel(reference, force=True)

    def _fit(self) -> None:
        """Start tasks, or end some for a teacher's sake.

        A teacher that was lost with its machine cannot come back while workers, who wait for it,
        hold all that it needs: the longer it has no place, the fewer they become.
        """
        import ray

        lacking_s = self.place.lacking_s() if self.place else 0.0
        size = max(0, self.size - int(lacking_s / SILENCE_S))
        for reference in [*self.running][size:]:
            if reference not in self.cancelled:
                self.cancelled.add(reference)
                ray.cancel(reference, force=True)
        while self.waiting and len(self.running) < size:
            task = self.waiting.popleft()
            self.running[self.kind.remote(task, self.given)] = _Attempt(task)

    def _news(self) -> Finished:
        """Wait until a task says something, ends or dies."""
        import ray

        if not self.running:
            time.sleep(LOOK_S)
            return
        done, _ = ray.wait([*self.running], timeout=LOOK_S, fetch_local=False)
        for reference in done:
            attempt = self.running[reference]
            ended: str | None
            watch = self.watches[attempt.task.job]
            try:
                attempt.said = ray.get(next(reference))
                if isinstance(attempt.said, int):
                    watch.report(attempt.task.shard, attempt.said)
                continue
            except StopIteration:
                ended = str(attempt.said)
            except ray.exceptions.RayError as error:
                ended = self._again(error, attempt, reference in self.cancelled)
            del self.running[reference]
            if ended is not None:
                yield attempt.task, ended
        self._warn_of_silence()

    def _again(self, error: Any, attempt: _Attempt, cancelled: bool) -> str | None:
        """Put a shard back whose task died; the reason why it failed where that was too often.

        Raises the error where it is the shard's or the output's own.
        """
        from ray.exceptions import NodeDiedError, RayError, RayTaskError

        cause, reason = getattr(error, "cause", None), ""
        if not isinstance(error, RayTaskError):
            reason = f"its worker died {RETRIES + 1} times (killed, or out of memory)"
        elif isinstance(cause, RayError):
            reason = f"its worker lost what it was given: {cause}"
        elif isinstance(cause, OSError) and cause.errno in TRANSIENT_ERRNOS:
            reason = cause.strerror or str(cause)
        else:
            raise error
        self.deaths[attempt.task] += not (cancelled or isinstance(error, NodeDiedError))
        if self.deaths[attempt.task] > RETRIES:
            return reason
        self.waiting.appendleft(attempt.task)
        self.watches[attempt.task.job].retry(attempt.task.shard)
        return None

    def _warn_of_silence(self) -> None:
        import ray

        if not self.running or any(one.said is not None for one in self.running.values()):
            self.heard = time.monotonic()
        elif time.monotonic() > self.heard + SILENCE_S:
            self.heard = time.monotonic()
            logging.getLogger(__name__).warning(
                "no worker runs: each needs %s, and the cluster has %s",
                {name: need for name, need in self.needs.items() if need},
                {name: ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU", "memory")},
            )


def _worker_needs(job: Job, workers: int, how: EngineOptions) -> dict[str, Any]:
    """What Ray reserves for a worker: where it computes on one, its share of the GPUs that shared
    teachers leave.

    Raises ``UserError`` where workers would find no GPU, one after the other.
    """
    import ray

    share = 0.0
    if "cuda" in (job.device, "" if how.teacher_actors else job.label_device):  # cuda:1: their own
        taken = how.teacher_actors * how.teacher(on_gpu(job))["num_gpus"]
        left = max(0.0, ray.cluster_resources().get("GPU", 0.0) - taken)
        share = min(1.0, int(1e4 * left / workers) / 1e4)  # Ray counts in ten-thousandths
        if not share and not how.worker.gpus:
            raise UserError(
                "--device cuda: this Ray has no GPU for a worker: start it with one (ray start "
                "--num-gpus N), say --worker-needs gpus=N where machines with some join later, or "
                "give --device cpu"
            )
    return how.worker.options(share)


def metrics(dataset: str, run: str) -> Sink:
    """The watch's numbers as gauges of Ray, which its nodes export to Prometheus."""
    from ray.util.metrics import Gauge

    gauges = {m.name: Gauge(m.name, m.about, tag_keys=(*LABELS, *m.labels)) for m in METRICS}
    whose = dict(zip(LABELS, (dataset, run), strict=True))

    def send(progress: Progress) -> None:
        for name, labels, value in measures(progress):
            gauges[name].set(value, tags={**whose, **labels})

    return send


def cause_of(error: Any) -> Exception:
    """What went wrong in a worker, without the pages that Ray wraps around it.

    A user's error or the system's as it is; one of ours as Ray shows it, with the worker's
    traceback; Ray's own in a sentence.
    """
    from ray.exceptions import RayError, RayTaskError

    inner, task = error, None
    while inner is not None:
        if isinstance(inner, UserError | OSError) and not isinstance(inner, RayError):
            return inner
        if isinstance(inner, RayTaskError):
            task = inner
        inner = getattr(inner, "cause", None) or inner.__cause__
    if task is not None and not isinstance(task.cause, RayError):
        return RuntimeError(f"an error in a worker:\n{task}")
    first = (str(error).splitlines() or [""])[0]
    return ShardError(f"Ray gave up: {first}; what was committed is whole: run the command again")
