"""The engines. Ray only schedules: what happens to a group and a shard is plain functions, and the
local engine runs the same ones without it. The only file that imports ``ray``."""

from __future__ import annotations

import errno as errors
import logging
import math
import multiprocessing
import os
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_specs.cluster.needs import EVERY, ONE_CORE, Part, Stage
from data_specs.io.cli import signals_for_us_alone
from data_specs.io.errors import UserError
from data_specs.io.retry import PASSING, patiently
from pipeline.audio import from_pcm, to_pcm
from pipeline.dataset.job import Hire, Job, Maker, Worker, use_one_thread
from pipeline.dataset.shards import Row, ShardError
from pipeline.engine import ray_place
from pipeline.engine.watch import LABELS, METRICS, Board, Progress, Sink, Tell, Watch, measures
from pipeline.render.label import Teacher, TeacherError

STORE_BYTES = 1 << 28
"""Ray's object store, through which only shard numbers pass, and PCM on its way to teachers."""

RETRIES = 3
"""How often a shard is made again whose worker died, though its machine lives."""

RESTARTS = 3
"""How often a dead teacher is started again; one that dies once more does not die by chance."""

CLUSTER_RESTARTS = 20
"""The same where machines come and go: by chance, then, but not for ever."""

FALSE_STARTS = 20
"""Workers that may die one after the other before they could be given anything; and each of a
crew's once more, for a machine takes all that it was starting with it."""

LOOK_S = 10.0
"""How often the cluster is looked at where nothing happens."""

SILENCE_S = 60.0
"""How long no worker has been had before that is told."""

ROOM_S = 120.0
"""How long a cluster that was only just started may take to have its machines together."""

HEAD_S = 180.0
"""How long a head that answers may have no machine yet, not even its own."""

WHOLE_ALREADY = "whole already"
"""What an engine says of a shard that another made meanwhile."""


@dataclass
class Outcome:
    """What a run did. ``failed`` are shards whose attempt failed, with the reason."""

    made: list[int] = field(default_factory=list)
    skipped: int = 0
    failed: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TeacherActors:
    """Teachers that all of Ray's workers share: how many, and how many of them to one GPU.

    On a CPU each takes a core. Where ``count`` is 0 every worker has a teacher of its own.
    """

    count: int = 0
    per_gpu: int = 1
    needs: Stage = ONE_CORE

    def options(self, on_gpu: bool) -> dict[str, Any]:
        """What Ray reserves for one of them; on a GPU it takes no core unless that was said."""
        said = self.needs.model_fields_set
        options = self.needs.options(1 / self.per_gpu if on_gpu else 0.0)
        return options | ({"num_cpus": 0} if on_gpu and "cores" not in said else {})

    def check(self, engine: str, device: str) -> None:
        """Raise ``ValueError`` for what cannot be had, before any work is done."""
        if self.count < 0 or self.per_gpu < 1:
            raise UserError("--teacher-actors must be at least 0, --teachers-per-gpu at least 1")
        if self.count and engine != "ray":
            raise UserError(
                f"--teacher-actors needs --engine ray, not {engine}; without it, every "
                "worker has a teacher of its own"
            )
        if self.count and ":" in device:
            raise UserError(
                f"teacher on {device!r}: with --teacher-actors Ray chooses the GPU; write "
                f"{device.partition(':')[0]}"
            )


OWN_TEACHERS = TeacherActors()


@dataclass(frozen=True)
class Machines:
    """Where Ray's workers are: a cluster's ``address`` (empty: one is started here), and what each
    of them needs there."""

    address: str = ""
    worker: Stage = ONE_CORE


HERE = Machines()


def run(
    job: Job,
    engine: str,
    workers: int,
    progress: bool = True,
    hire: Hire = Worker,
    actors: TeacherActors = OWN_TEACHERS,
    part: Part = EVERY,
    machines: Machines = HERE,
) -> Outcome:
    """Make every shard of a part that is not whole yet, by the makers that ``hire`` gives.

    A shard's trouble (too many drops, a source that cannot be opened, an error that is no sample's
    own) is kept in ``failed`` and the others go on; a full or unwritable output stops the run
    (``OSError``).
    """
    actors.check(engine, job.label_device)
    todo = part.own(job.todo())
    outcome = Outcome(skipped=_left_whole(job, part, todo))
    if not todo:
        return outcome
    ray_engine = partial(_run_ray, actors=actors, machines=machines)
    engines: dict[str, Engine] = {"local": _run_local, "ray": ray_engine}
    with (
        Watch(job, todo, engine, workers, outcome.skipped, show=progress) as watch,
        closing(engines[engine](hire, job, todo, workers, watch)) as finished,
    ):
        for shard, error in finished:
            watch.ended(shard, "" if error == WHOLE_ALREADY else error)
            if error == WHOLE_ALREADY:
                outcome.skipped += 1
            elif error:
                outcome.failed[shard] = error
            else:
                outcome.made.append(shard)
    return outcome


def _left_whole(job: Job, part: Part, todo: Sequence[int]) -> int:
    """How many shards are whole and stay so. Where only some are asked for, the others may lack."""
    lacking = [] if job.only is None else part.own(job.missing())
    return len(part.own(range(job.shard_count))) - len({*todo, *lacking})


Finished = Generator[tuple[int, str], None, None]
"""Shards as they end, with an empty string or the reason why they failed."""

Engine = Callable[[Hire, Job, list[int], int, Watch], Finished]


def _make_shard(maker: Maker, shard: int, tell: Tell) -> str:
    """Make and commit one shard. Returns why it failed, or an empty string."""
    tell.began(shard)
    try:
        return _attempt(maker, shard, tell.count)
    finally:
        tell.over(shard)


def _attempt(maker: Maker, shard: int, count: Callable[[int], None]) -> str:
    """A shard may be whole by now: another part or another job may have made it, or a worker that
    died before it could say so. One that is wanted again is made nonetheless."""
    rows: list[Row] = []
    try:
        if shard not in maker.job.again and maker.job.is_whole(shard):
            count(len(maker.job.shard_range(shard)))
            return WHOLE_ALREADY
        for group in maker.groups(shard):
            rows += patiently(partial(maker.make, group))
            count(len(group))
    except Exception as error:  # the shard boundary: whatever it is, the other shards go on
        return failure(error)
    try:
        patiently(lambda: maker.job.commit(shard, rows))
    except ShardError as error:
        return failure(error)
    return ""


def failure(error: Exception) -> str:
    """An error in one line; one that is no user's with the place where it was raised."""
    if isinstance(error, UserError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"


# --- local engine ---------------------------------------------------------------------------------


def _run_local(hire: Hire, job: Job, todo: list[int], workers: int, watch: Watch) -> Finished:
    if workers > 1:
        yield from _run_pool(hire, job, todo, min(workers, len(todo)), watch)
        return
    with _torch_threads_kept():
        maker = hire(job, None)
        for shard in todo:
            yield shard, _make_shard(maker, shard, watch)


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_pool(hire: Hire, job: Job, todo: list[int], workers: int, watch: Watch) -> Finished:
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    slots = context.RawArray("d", SLOT * workers)
    taken = context.Value("i", 0)
    others = set(multiprocessing.active_children())
    with (
        ProcessPoolExecutor(workers, context, _start_process, (hire, job, slots, taken)) as pool,
        _polling(lambda: _read_slots(slots), watch),
    ):
        try:
            with signals_for_us_alone():
                futures = {pool.submit(_in_process, shard): shard for shard in todo}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise ShardError(
                "a worker process died (killed, or out of memory); what was committed is whole: "
                "run the same command again, with fewer --workers if memory was short"
            ) from None
        except (KeyboardInterrupt, GeneratorExit):  # a shard in the making can be made again
            for child in set(multiprocessing.active_children()) - others:
                child.kill()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


SLOT = 3
"""What a pool process shows of itself: samples, its shard + 1 (0: none), when that began. Each
writes its own numbers only, and no lock is held: a process that is killed leaves none behind."""


class _Slot:
    """A pool process' side (``watch.Tell``)."""

    def __init__(self, slots: Any, number: int) -> None:
        self.slots, self.first = slots, SLOT * number

    def began(self, shard: int) -> None:
        self.slots[self.first + 2] = time.time()
        self.slots[self.first + 1] = shard + 1

    def count(self, samples: int) -> None:
        self.slots[self.first] += samples

    def over(self, shard: int) -> None:
        self.slots[self.first + 1] = 0


def _read_slots(slots: Any) -> Board:
    values = list(slots)
    running = {
        int(values[i + 1]) - 1: values[i + 2] for i in range(0, len(values), SLOT) if values[i + 1]
    }
    return Board(int(sum(values[::SLOT])), running)


_PROCESS: dict[str, Any] = {}
"""What a pool process keeps between shards: its maker, and where it tells how far it is."""


def _start_process(hire: Hire, job: Job, slots: Any, taken: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with taken.get_lock():
        number, taken.value = taken.value, taken.value + 1
    _PROCESS.update(hire=partial(hire, job, None), slot=_Slot(slots, number))


def _end_with_parent() -> None:
    """A killed driver must not leave workers behind that go on writing beside the next run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_process(shard: int) -> str:
    if "maker" not in _PROCESS:  # not as the process starts: an error there is lost
        _PROCESS["maker"] = _PROCESS["hire"]()
    return _make_shard(_PROCESS["maker"], shard, _PROCESS["slot"])


@contextmanager
def _polling(
    read: Callable[[], Board | None], watch: Watch, seconds: float = 0.5
) -> Iterator[None]:
    """Tell the watch what the workers say, from a thread, while the main one waits."""
    stop = threading.Event()
    seen = Board()

    def update() -> None:
        nonlocal seen
        now = read()
        if now is not None:
            watch.show(now, seen)
            seen = now

    def poll() -> None:
        while not stop.wait(seconds):
            update()

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
        update()
    finally:
        stop.set()
        thread.join(2 * ANSWER_S)  # one that Ray does not answer is left behind


# --- Ray engine -----------------------------------------------------------------------------------


def _run_ray(
    hire: Hire,
    job: Job,
    todo: list[int],
    workers: int,
    watch: Watch,
    actors: TeacherActors,
    machines: Machines,
) -> Finished:
    """Hand shards to a pool of actors, each of which makes and commits one at a time.

    No finished audio passes through Ray: its object store would have to hold some 75 MB a shard,
    and another process would have to write them. Ray Data, which would do that, was tried: what it
    reserves for them left workers idle, and its own actors lengthened a run's start.
    """
    address = machines.address or os.environ.get("RAY_ADDRESS", "")
    ray = _import_ray(address)
    started = not ray.is_initialized()
    if started:
        if address not in OWN_RAY:
            ray_place.require_answer(address)
        _start_ray(workers + (0 if _on_gpu(job) else actors.count), address)
    try:
        kind = ray.remote(_Counter).options(num_cpus=0, max_restarts=-1, **_beside_the_driver())
        counter = kind.remote()
        with (
            watch.sending(_metrics(job.recipe.name, watch.run)),
            _teachers_place(job, actors, machines) as place,
            _shared_teacher(job, actors, place) as teacher,
            _polling(lambda: _read_count(counter), watch),
        ):
            size = min(workers, len(todo))
            share = _fair_share(job, size, actors)
            if not share and "cuda" in (job.device, "" if actors.count else job.label_device):
                _require_gpus(machines)
            needs = machines.worker.options(share)
            crew = _Crew(size, needs, place, (hire, job, counter, teacher))
            yield from crew.work(todo, job.folder.shown())
    except ray.exceptions.RayError as error:
        raise _cause(error) from None
    finally:
        if started:
            ray.shutdown()


def _cause(error: Any) -> Exception:
    """What went wrong in a worker, without the pages that Ray wraps around it.

    A user's error or the system's as it is; one of ours as Ray shows it, with the worker's
    traceback; Ray's own in a sentence.
    """
    import ray

    inner, task = error, None
    while inner is not None:
        if isinstance(inner, UserError | OSError) and not isinstance(
            inner, ray.exceptions.RayError
        ):
            return inner
        if isinstance(inner, ray.exceptions.RayTaskError):
            task = inner
        inner = getattr(inner, "cause", None) or inner.__cause__
    if task is not None and not isinstance(task.cause, ray.exceptions.RayError):
        return RuntimeError(f"an error in a worker:\n{task}")
    first = (str(error).splitlines() or [""])[0]
    return ShardError(f"Ray gave up: {first}; what was committed is whole: run the command again")


ANSWER_S = 5.0
"""How long the counter may take to say how far it is, before the next look."""


def _read_count(counter: Any) -> Board | None:
    """What workers said; none while the counter is dead or Ray hangs: that is no reason to wait."""
    import ray

    try:
        return Board(*ray.get(counter.read.remote(), timeout=ANSWER_S))
    except ray.exceptions.RayError:
        return None


def _metrics(dataset: str, run: str) -> Sink:
    """The watch's numbers as gauges of Ray, which its nodes export to Prometheus."""
    from ray.util.metrics import Gauge

    gauges = {m.name: Gauge(m.name, m.about, tag_keys=(*LABELS, *m.labels)) for m in METRICS}
    whose = dict(zip(LABELS, (dataset, run), strict=True))

    def send(progress: Progress) -> None:
        for name, labels, value in measures(progress):
            gauges[name].set(value, tags={**whose, **labels})

    return send


def _beside_the_driver() -> dict[str, Any]:
    """Options that keep an actor from being lost with a machine on which it has no business."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)}


def _fair_share(job: Job, workers: int, actors: TeacherActors) -> float:
    """Of the GPUs that shared teachers leave, what each worker gets that computes on one."""
    import ray

    own_teacher = "" if actors.count else job.label_device
    if "cuda" not in (job.device, own_teacher):  # cuda:1 is a user's own choice
        return 0.0
    taken = actors.count * actors.options(_on_gpu(job))["num_gpus"]
    left = max(0.0, ray.cluster_resources().get("GPU", 0.0) - taken)
    return min(1.0, int(1e4 * left / workers) / 1e4)  # Ray counts in ten-thousandths


def _require_gpus(machines: Machines) -> None:
    """Raise ``UserError`` where workers would find no GPU, one after the other."""
    if not machines.worker.gpus:
        raise UserError(
            "--device cuda: this Ray has no GPU for a worker: start it with one (ray start "
            "--num-gpus N), say --worker-needs gpus=N where machines with some join later, or give "
            "--device cpu"
        )


OWN_RAY = ("", "local")
"""Addresses that stand for a Ray of this run's own."""


def _import_ray(address: str) -> Any:
    """Ray, which reads ``LOOPBACK`` as it is imported, and then takes over signals."""
    if address in OWN_RAY:
        os.environ |= ray_place.LOOPBACK
    with signals_for_us_alone():
        import ray
    return ray


def _start_ray(workers: int, address: str = "") -> None:
    ray = _import_ray(address)
    # That a cluster of its own has a token is no news to a user.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    own = _own_ray(workers) if address in OWN_RAY else {}
    until = time.monotonic() + HEAD_S
    while not ray.is_initialized():
        try:
            with signals_for_us_alone():
                ray.init(
                    address=address or None,
                    log_to_driver=False,
                    logging_level="warning",
                    runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
                    **own,
                )
        except ConnectionError as error:
            if not _is_starting(error) or time.monotonic() > until:
                raise UserError(
                    f"--ray-address {address}: no Ray cluster answers: {error}"
                ) from error
        except Exception as error:  # of no class of its own
            if "timed out during startup" not in str(error):
                raise
            raise UserError(
                "Ray does not start here within its own limit of half a minute: is this machine "
                "busy? Run the same command again, or with --engine local"
            ) from error


def _own_ray(workers: int) -> dict[str, Any]:
    """Options of a Ray that is this run's alone: no other machine, and no other user, has to do
    with it."""
    ray_place.require_private_token()
    return {
        "num_cpus": workers,
        "object_store_memory": STORE_BYTES,
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": str(ray_place.ray_folder()),
    }


def _is_starting(error: ConnectionError) -> bool:
    """Whether a head answers that has no machine yet, not even its own: Ray waits a minute for it,
    which a head on a busy machine can take longer than."""
    return "No node info found" in str(error.__cause__)


class _Counter:
    """Hears all actors: samples that are done, shards in flight. One that begins while it is in
    flight is a retry: the worker that had it died."""

    def __init__(self) -> None:
        self.samples, self.retries = 0, 0
        self.running: dict[int, float] = {}

    def began(self, shard: int) -> None:
        self.retries += shard in self.running
        self.running[shard] = time.time()

    def count(self, samples: int) -> None:
        self.samples += samples

    def over(self, shard: int) -> None:
        self.running.pop(shard, None)

    def read(self) -> tuple[int, dict[int, float], int]:
        return self.samples, self.running, self.retries


class _Told:
    """An actor's side (``watch.Tell``): says it to the counter and waits for no answer."""

    def __init__(self, counter: Any) -> None:
        self.counter = counter

    def began(self, shard: int) -> None:
        self.counter.began.remote(shard)

    def count(self, samples: int) -> None:
        self.counter.count.remote(samples)

    def over(self, shard: int) -> None:
        self.counter.over.remote(shard)


class _Make:
    """Actor: makes shards, one after the other, as the local engine does.

    What it is built from comes with each call, by reference, and is fetched once: given to the
    constructor, Ray could not restart the actor after a crash.
    """

    def __init__(self) -> None:
        self.maker: Maker | None = None

    def ready(self) -> str:
        """On which machine it is, now that it is anywhere."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def make(self, shard: int, given: list[Any]) -> tuple[str, str, int]:
        """Why the shard failed, if it did; the file and an error number that is not 0 where that
        ends the run: as values, for Ray would wrap an exception in pages of its own."""
        import ray

        if self.maker is None:
            hire, job, counter, teacher = ray.get(given[0])
            self.maker, self.tell = hire(job, teacher), _Told(counter)
        try:
            return _make_shard(self.maker, shard, self.tell), "", 0
        except OSError as full:
            return str(full.strerror or full), os.fspath(full.filename or ""), full.errno or -1


class _Crew:
    """Actors that make shards: as many as asked for, or as there is room for.

    An actor has one shard at a time: one that waited behind another would be made last, and alone.
    One that dies is replaced, and its shard goes to whoever is free. Ray's own restarts would bind
    it to an actor that may wait for another machine for ever, while others are idle. For the same
    reason an actor is given nothing before it says that it runs: a machine that joins is used at
    once, and one that never comes is not missed.
    """

    def __init__(
        self, size: int, needs: dict[str, Any], place: _Place | None, given: tuple[Any, ...]
    ) -> None:
        import ray

        self.kind = ray.remote(_Make).options(max_restarts=0, max_task_retries=0, **needs)
        self.size, self.needs, self.place, self.handed = size, needs, place, [ray.put(given)]
        self.starting: dict[Any, Any] = {}
        self.idle: list[tuple[Any, str]] = []
        self.busy: dict[Any, tuple[int, Any, str]] = {}
        self.sent_home: set[Any] = set()
        self.deaths: Counter[int] = Counter()
        self.false_starts, self.asked_for, self.heard = 0, 0, time.monotonic()

    def work(self, todo: Sequence[int], out: str) -> Finished:
        """Make shards. ``OSError`` where ``out`` cannot be written, ``ShardError`` where no worker
        can be started."""
        waiting = deque(todo)
        try:
            while waiting or self.busy:
                left = len(waiting) + len(self.busy)
                self._ask_for(min(self.size, left))
                self._fit(self._room(), left)
                while self.idle and waiting:
                    shard, (actor, node) = waiting.popleft(), self.idle.pop()
                    self.busy[actor.make.remote(shard, self.handed)] = shard, actor, node
                yield from self._news(waiting, out)
        finally:
            with suppress(Exception):  # what ends the run may be that nobody is there to be told
                self._ask_for(0)

    def _room(self) -> int:
        """How many workers there may be: no more than leave the teachers their place.

        An actor that waits for a machine may be bound to one that stays full, so none is started
        before there is room (``_ask_for`` tells an autoscaler). While a teacher that was lost with
        its machine has no place, there are fewer the longer that takes: it could not come back
        while workers, who wait for it, hold all that it needs.
        """
        import ray

        there, needs = ray.cluster_resources(), _resources(self.needs)
        held = self.place.total if self.place else {}
        room = [(there.get(kind, 0.0) - held.get(kind, 0.0)) / need for kind, need in needs.items()]
        found = max(1, int(min([self.size, *room]) + 1e-6))
        lacking_s = self.place.lacking_s() if self.place else 0.0
        return max(0, found - int(lacking_s / SILENCE_S))

    def _ask_for(self, workers: int) -> None:
        """Tell the cluster's autoscaler, if it has one, what all that are wanted take."""
        from ray.autoscaler.sdk import request_resources

        needs = _resources(self.needs)
        if workers == self.asked_for or not needs:
            return
        self.asked_for = workers
        teachers = [self.place.each] * self.place.count if self.place else []
        request_resources(bundles=[needs] * workers + teachers if workers else [])

    def _fit(self, room: int, shards: int) -> None:
        """Start actors where shards wait for one, and send home those for whom there is no room."""
        import ray

        wanted = min(room, shards)
        for _ in range(wanted - len(self.starting) - len(self.idle) - len(self.busy)):
            actor = self.kind.remote()
            self.starting[actor.ready.remote()] = actor
        working = [reference for reference in self.busy if reference not in self.sent_home]
        for _ in range(len(self.starting) + len(self.idle) + len(working) - room):
            if self.starting:
                ray.kill(self.starting.popitem()[1])
            elif self.idle:
                ray.kill(self.idle.pop()[0])
            else:
                reference = working.pop()
                self.sent_home.add(reference)
                ray.kill(self.busy[reference][1])

    def _news(self, waiting: deque[int], out: str) -> Finished:
        """Wait until an actor runs, ends a shard or dies."""
        import ray

        if not (self.starting or self.busy):  # all were sent home for a teacher's sake
            time.sleep(LOOK_S)
            return
        done, _ = ray.wait([*self.starting, *self.busy], num_returns=1, timeout=LOOK_S)
        if done or self.busy:
            self.heard = time.monotonic()
        elif time.monotonic() > self.heard + SILENCE_S:
            self.heard = time.monotonic()
            logging.getLogger(__name__).warning(
                "no worker runs: each needs %s, and the cluster has %s",
                {name: need for name, need in self.needs.items() if need},
                {name: ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU", "memory")},
            )
        for reference in done:
            if reference in self.starting:
                self._started(reference)
            else:
                yield from self._ended(reference, waiting, out)

    def _started(self, reference: Any) -> None:
        import ray

        actor = self.starting.pop(reference)
        try:
            self.idle.append((actor, ray.get(reference)))
            self.false_starts = 0
        except ray.exceptions.RayError as error:
            self.false_starts += 1
            if self.false_starts >= FALSE_STARTS + self.size:
                raise ShardError(
                    f"{self.false_starts} workers died one after the other as they started: {error}"
                ) from None

    def _ended(self, reference: Any, waiting: deque[int], out: str) -> Finished:
        import ray

        shard, actor, node = self.busy.pop(reference)
        file = ""
        try:
            error, file, number = ray.get(reference)
        except ray.exceptions.RayTaskError as raised:
            if not isinstance(raised.cause, ray.exceptions.RayError):
                raise
            ray.kill(actor)
            self.deaths[shard] += 1
            error, number = f"its worker lost what it was given: {raised.cause}", errors.EIO
        except ray.exceptions.RayActorError:
            ray.kill(actor)  # one that is only out of reach must not go on beside its successor
            self.deaths[shard] += _lives(node) and reference not in self.sent_home
            error = f"its worker died {RETRIES + 1} times (killed, or out of memory)"
            number = errors.EIO
        else:
            self.idle.append((actor, node))
            self.deaths[shard] += number in PASSING
        if number and number not in PASSING:
            raise OSError(number, error, file or out) if number > 0 else OSError(error)
        if number and self.deaths[shard] <= RETRIES:
            waiting.appendleft(shard)
        else:
            yield shard, error


def _lives(node: str) -> bool:
    """Whether a machine is still there; who died with it is not to blame."""
    import ray

    return any(found["NodeID"] == node and found["Alive"] for found in ray.nodes())


# --- teachers that Ray's workers share ------------------------------------------------------------


def _resources(options: dict[str, Any]) -> dict[str, float]:
    """What an actor's options take, by Ray's names of resources."""
    names = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    return {name: options[option] for name, option in names.items() if options.get(option)}


class _Place:
    """What the shared teachers take of the cluster, each on one machine: kept for them while one
    that died is started again, and sought anew where a machine is lost."""

    def __init__(self, each: dict[str, float], count: int) -> None:
        from ray.util import placement_group

        self.each, self.count = each, count
        self.total = {kind: need * count for kind, need in each.items()}
        self.group = placement_group([dict(each) for _ in range(count)])
        self.lacking_since = self.told = 0.0

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
            self.lacking_since = self.told = 0.0
            return 0.0
        self.lacking_since = self.lacking_since or now
        self.told = self.told or now
        if now > self.told + SILENCE_S:
            self.told = now
            logging.getLogger(__name__).warning(
                "no place for a teacher that was lost: each needs %s on one machine", self.each
            )
        return max(now - self.lacking_since, 1e-3)


@contextmanager
def _teachers_place(job: Job, actors: TeacherActors, machines: Machines) -> Iterator[_Place | None]:
    """A place for all shared teachers; none where there are none, or where they take nothing.

    ``ValueError`` where the cluster has none: Ray would wait, and not say for what.
    """
    from ray.util import remove_placement_group

    if actors.count:
        _require_room(job, actors, machines)
    each = _resources(actors.options(_on_gpu(job)))
    if not actors.count or not each:
        yield None
        return
    place = _Place(each, actors.count)
    try:
        if not place.group.wait(ROOM_S):
            raise UserError(
                f"--teacher-actors {actors.count}: each needs {each} on one machine, and the "
                "machines of this Ray have no place for all of them: ask for fewer, or for less "
                "(--teacher-needs)"
            )
        yield place
    finally:
        remove_placement_group(place.group)


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
    """What an actor says, or the teacher's own error without the pages that Ray wraps around it."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayActorError:
        raise TeacherError(
            f"teacher {name!r}: its actor died (killed, or out of memory) and was started again "
            f"{RESTARTS} times in vain; run the same command again, with fewer --teachers-per-gpu "
            "or --teacher-actors if memory was short"
        ) from None


class _TeacherActor:
    """Actor: a teacher that workers share; they send PCM and get scores.

    Two calls may be inside at once, so that one's samples arrive while the other's are scored. On a
    GPU both go on into the teacher: its stream keeps their computation in order, and a transfer
    hides behind it. On a CPU the second waits, for the actor has one core.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.loading = job, threading.Lock()
        self.teacher: Teacher | None = None
        self.turn: AbstractContextManager[Any] = threading.Lock()
        if _on_gpu(job):
            self.turn = nullcontext()

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


@contextmanager
def _shared_teacher(
    job: Job, actors: TeacherActors, place: _Place | None = None
) -> Iterator[RemoteTeacher | None]:
    """Start the teacher actors; None where every worker has a teacher of its own."""
    import ray

    if not actors.count:
        yield None
        return
    options = {
        "max_concurrency": 2,
        "max_restarts": CLUSTER_RESTARTS if _several_machines() else RESTARTS,
        "max_task_retries": -1,
        **actors.options(_on_gpu(job)),
    }
    places = [place.option(index) if place else {} for index in range(actors.count)]
    kinds = [ray.remote(_TeacherActor).options(**options, **option) for option in places]
    pool = [kind.remote(replace(job, manifests={})) for kind in kinds]
    try:
        name = job.recipe.teacher.name
        loaded = [_answer(asked, name) for asked in [actor.about.remote() for actor in pool]]
        yield RemoteTeacher(pool, *loaded[0])
    finally:
        for actor in pool:
            ray.kill(actor)


def _on_gpu(job: Job) -> bool:
    return job.label_device.startswith("cuda")


def _several_machines() -> bool:
    import ray

    return len(ray.nodes()) > 1


def _require_room(job: Job, actors: TeacherActors, machines: Machines) -> None:
    """Raise ``ValueError`` where a cluster has too little: Ray would wait, and not say for what."""
    import ray

    teacher, kind = actors.options(_on_gpu(job)), "GPU" if _on_gpu(job) else "CPU"
    needed = actors.count * teacher["num_gpus" if kind == "GPU" else "num_cpus"]
    if kind == "CPU":
        needed += machines.worker.cores  # and for a worker
    until = time.monotonic() + (ROOM_S if machines.address else 0)
    while (there := ray.cluster_resources().get(kind, 0)) < needed - 1e-6:
        if time.monotonic() < until:
            time.sleep(1)
            continue
        raise UserError(
            f"--teacher-actors {actors.count} on {job.label_device!r} needs {math.ceil(needed)} "
            f"{kind}s and this Ray has {int(there)}: ask for fewer"
            + (", or for more --teachers-per-gpu" if kind == "GPU" else "")
        )
