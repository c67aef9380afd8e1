"""The engines. Ray only schedules: what happens to a group and a shard is plain functions, and the
local engine runs the same ones without it. The only file that imports ``ray``."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline.job import Job, Worker
from pipeline.shards import Row, ShardError

Count = Callable[[int], None]
"""Told how many samples were just finished."""

STORE_BYTES = 1 << 28
"""Ray's object store, through which only shard numbers pass."""


@dataclass
class Outcome:
    """What a run did. ``failed`` are shards whose attempt failed, with the reason."""

    made: list[int] = field(default_factory=list)
    skipped: int = 0
    failed: dict[int, str] = field(default_factory=dict)


def run(job: Job, engine: str, workers: int, progress: bool = True) -> Outcome:
    """Make every shard that is not whole yet.

    A shard's trouble (too many drops, a source that cannot be opened, an error that is no sample's
    own) is kept in ``failed`` and the others go on; a full or unwritable output stops the run
    (``OSError``).
    """
    todo = job.todo()
    outcome = Outcome(skipped=job.shard_count - len(todo))
    if not todo:
        return outcome
    total = sum(len(job.shard_range(shard)) for shard in todo)
    engines = {"local": _run_local, "ray": _run_ray}
    with tqdm(total=total, desc="samples", unit="sample", disable=not progress) as bar:

        def count(samples: int) -> None:
            bar.update(samples)

        for shard, error in engines[engine](job, todo, workers, count):
            if error:
                outcome.failed[shard] = error
            else:
                outcome.made.append(shard)
    return outcome


Finished = Iterator[tuple[int, str]]
"""Shards as they end, with an empty string or the reason why they failed."""


def _make_shard(worker: Worker, shard: int, count: Count) -> str:
    """Make and commit one shard. Returns why it failed, or an empty string."""
    rows: list[Row] = []
    try:
        for group in worker.job.groups(shard):
            rows += worker.make(group)
            count(len(group))
    except Exception as error:  # the shard boundary: whatever it is, the other shards go on
        return failure(error)
    try:
        worker.job.commit(shard, rows)
    except ShardError as error:
        return failure(error)
    return ""


def failure(error: Exception) -> str:
    """An error in one line, with the place where it was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"


# --- local engine ---------------------------------------------------------------------------------


def _run_local(job: Job, todo: list[int], workers: int, count: Count) -> Finished:
    if workers > 1:
        yield from _run_pool(job, todo, min(workers, len(todo)), count)
        return
    with _torch_threads_kept():
        worker = Worker(job)
        for shard in todo:
            yield shard, _make_shard(worker, shard, count)


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_pool(job: Job, todo: list[int], workers: int, count: Count) -> Finished:
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    finished = context.Value("q", 0)
    with (
        ProcessPoolExecutor(workers, context, _start_process, (job, finished)) as pool,
        _polling(lambda: finished.value, count),
    ):
        futures = {pool.submit(_in_process, shard): shard for shard in todo}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise ShardError(
                "a worker process died (killed, or out of memory); what was committed is whole: "
                "run the same command again, with fewer --workers if memory was short"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_PROCESS: dict[str, Any] = {}
"""What a pool process keeps between shards: its worker and the shared count."""


def _start_process(job: Job, finished: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _PROCESS.update(worker=Worker(job), finished=finished)


def _end_with_parent() -> None:
    """A killed driver must not leave workers behind that go on writing beside the next run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_process(shard: int) -> str:
    def count(samples: int) -> None:
        with _PROCESS["finished"].get_lock():
            _PROCESS["finished"].value += samples

    return _make_shard(_PROCESS["worker"], shard, count)


@contextmanager
def _polling(read: Callable[[], int], count: Count, seconds: float = 0.5) -> Iterator[None]:
    """Move the bar from a thread while the main one waits."""
    stop = threading.Event()
    seen = 0

    def update() -> None:
        nonlocal seen
        now = read()
        count(max(0, now - seen))
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
        thread.join()


# --- Ray engine -----------------------------------------------------------------------------------


def _run_ray(job: Job, todo: list[int], workers: int, count: Count) -> Finished:
    """Hand shards to a pool of actors, each of which makes and commits one at a time.

    No audio passes through Ray: its object store would have to hold some 75 MB a shard, another
    process would have to write them, and what Ray Data reserves for them leaves workers idle.
    """
    import ray

    started = not ray.is_initialized()
    if started:
        _start_ray(workers)
    try:
        counter = ray.remote(num_cpus=0)(_Counter).remote()
        with _polling(lambda: _read_count(counter), count):
            yield from _stream(job, todo, workers, counter)
    except ray.exceptions.RayError as error:
        raise _cause(error) from None
    finally:
        if started:
            ray.shutdown()


def _cause(error: Any) -> Exception:
    """What went wrong in a worker, without the pages that Ray wraps around it."""
    inner, deepest = error, error
    while inner is not None:
        deepest = inner
        inner = getattr(inner, "cause", None) or inner.__cause__
    if isinstance(deepest, OSError | ValueError):
        return deepest
    return ShardError(f"Ray gave up: {error}; what was committed is whole: run the command again")


def _read_count(counter: Any) -> int:
    """Samples so far; 0 where the counter died, for progress is no reason to fail."""
    import ray

    try:
        return int(ray.get(counter.read.remote()))
    except ray.exceptions.RayError:
        return 0


def _start_ray(workers: int) -> None:
    import ray

    address = os.environ.get("RAY_ADDRESS")
    local = {} if address else {"num_cpus": workers, "object_store_memory": STORE_BYTES}
    ray.init(
        address=address,
        include_dashboard=False if not address else None,
        log_to_driver=False,
        logging_level="warning",
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
        **local,
    )


class _Counter:
    """Counts finished samples of all actors."""

    def __init__(self) -> None:
        self.samples = 0

    def add(self, samples: int) -> None:
        self.samples += samples

    def read(self) -> int:
        return self.samples


class _Make:
    """Actor: makes shards, one after the other, as the local engine does."""

    def __init__(self, job: Job, counter: Any) -> None:
        self.worker, self.counter = Worker(job), counter

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        rows = [self._make(shard) for shard in batch["shard"].tolist()]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _make(self, shard: int) -> dict[str, Any]:
        """``error`` is why the shard failed, ``errno`` not 0 where that ends the run."""
        try:
            error = _make_shard(self.worker, shard, self.counter.add.remote)
        except OSError as full:  # as a value: Ray would wrap it in pages of its own
            return {"shard": shard, "error": str(full.strerror or full), "errno": full.errno or -1}
        return {"shard": shard, "error": error, "errno": 0}


def _stream(job: Job, todo: list[int], workers: int, counter: Any) -> Finished:
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its plans are no news to a user
    DataContext.get_current().enable_progress_bars = False
    blocks = ray.data.from_items([{"shard": s} for s in todo], override_num_blocks=len(todo))
    size = min(workers, len(todo))
    made = blocks.map_batches(
        _Make,
        fn_constructor_args=(job, counter),
        batch_size=1,
        # One at a time: a shard that waits behind another worker's own is made last, and alone.
        compute=ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
        num_cpus=1,
    )
    for row in made.iter_rows():
        if row["errno"]:
            raise OSError(int(row["errno"]), str(row["error"]), str(job.out))
        yield int(row["shard"]), str(row["error"])
