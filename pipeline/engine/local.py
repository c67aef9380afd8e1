"""The local engine: shards made in this process, or by a pool of processes on this machine."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from data_specs.io.cli import signals_for_us_alone
from pipeline.dataset.job import Job, WorkerFactory
from pipeline.dataset.shards import ShardError
from pipeline.engine.base import EngineOptions, Finished, Task, make_shard, reported
from pipeline.engine.watch import Watch

LAST_REPORT_S = 10.0
"""How long the reports that processes sent at last may take to be read; the run is over then."""


def run_local(
    factory: WorkerFactory,
    jobs: Sequence[Job],
    todo: list[Task],
    how: EngineOptions,
    watches: Mapping[int, Watch],
) -> Finished:
    """Make shards here (``base.Engine``). ``ShardError`` where a process of the pool dies."""
    if how.workers > 1:
        yield from _run_pool(factory, jobs, todo, min(how.workers, len(todo)), watches)
        return
    with torch_threads_kept():
        worker = factory(jobs[0], None)
        for task in todo:
            report = partial(watches[task.job].report, task.shard)
            yield task, reported(make_shard(worker, jobs[task.job], task.shard), report)


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Give torch its threads back: workers pin it to one."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_pool(
    factory: WorkerFactory,
    jobs: Sequence[Job],
    todo: list[Task],
    workers: int,
    watches: Mapping[int, Watch],
) -> Finished:
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    others = set(multiprocessing.active_children())
    with (
        _reports(watches) as sender,
        ProcessPoolExecutor(workers, context, _start_process, (factory, jobs, sender)) as pool,
    ):
        try:
            with signals_for_us_alone():
                futures = {pool.submit(_in_process, task): task for task in todo}
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


@contextmanager
def _reports(watches: Mapping[int, Watch]) -> Iterator[Connection]:
    """Where processes send a task and its samples; a thread hands them on to the watches.

    A message is so short that it is written whole or not at all, and without a lock: a process that
    is killed leaves nothing behind that others would wait for.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def hand_on() -> None:
        while (message := receiver.recv()) is not None:
            task, samples = message
            watches[task.job].report(task.shard, samples)

    thread = threading.Thread(target=hand_on, daemon=True)
    thread.start()
    try:
        yield sender
    finally:
        sender.send(None)
        thread.join(LAST_REPORT_S)


_PROCESS: dict[str, Any] = {}
"""What a pool process keeps between shards: its worker, its jobs, and where it reports to."""


def _start_process(factory: WorkerFactory, jobs: Sequence[Job], sender: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _PROCESS.update(factory=factory, jobs=jobs, sender=sender)


def _end_with_parent() -> None:
    """A killed driver must not leave workers behind that go on writing beside the next run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_process(task: Task) -> str:
    jobs = _PROCESS["jobs"]
    if "worker" not in _PROCESS:  # not as the process starts: an error there is lost
        _PROCESS["worker"] = _PROCESS["factory"](jobs[0], None)
    said = make_shard(_PROCESS["worker"], jobs[task.job], task.shard)
    return reported(said, lambda samples: _PROCESS["sender"].send((task, samples)))
