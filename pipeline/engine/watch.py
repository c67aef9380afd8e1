"""Watching a job from its driver: a bar on a terminal, a line every 30 s in a log, the file that
``status`` reads, and the same numbers as metrics.

Workers report which shard they begin and how many samples are done; all else is known here.
Watching must never harm the job: what cannot be shown or written is left out.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TextIO

from tqdm import tqdm

from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE
from pipeline.dataset import attempts, shards
from pipeline.dataset.job import Job

TICK_S = 2.0
LINE_S = 30.0
"""How often a log without a terminal gets a line."""

WINDOW_S = 300.0
"""Rates are those of the last minutes: what a night's average hides is what one looks for."""

CLIP_S = CROP_SAMPLES / SAMPLE_RATE


@dataclass(frozen=True)
class Progress:
    """How far a run is at one moment. ``oldest_s`` is the age of the oldest shard in flight, 0
    where there is none; ``left_s`` is None where nothing is known yet."""

    shards: int
    done: int
    failed: int
    running: int
    samples: int
    rate: float
    left_s: float | None
    oldest_s: float
    retries: int
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def realtime(self) -> float:
        """Seconds of audio made in a second."""
        return self.rate * CLIP_S


Sink = Callable[[Progress], None]


class Watch:
    """The driver's view of a run; a context. Every method may be called from any thread.

    ``whole`` shards were there before (default: all that are not in ``todo``). ``stream`` (default:
    stderr) gets the bar, where it is a terminal, or the lines; nothing before the first shard
    begins where it ``waits`` for another job of the same run.
    """

    def __init__(
        self,
        job: Job,
        todo: list[int],
        engine: str,
        workers: int,
        whole: int | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.time,
        waits: bool = False,
    ) -> None:
        self.job, self.clock, self.waits = job, clock, waits
        self.stream = stream or sys.stderr
        self._sinks: list[Sink] = []
        self._total = sum(len(job.shard_range(shard)) for shard in todo)
        self._whole = job.shard_count - len(todo) if whole is None else whole
        self._shards = self._whole + len(todo)
        self._lock, self._sending = threading.RLock(), threading.Lock()
        now = clock()
        started: dict[str, Any] = {"run": attempts.new_run(now), "began": now, "updated": now}
        self._mine = attempts.Attempts(engine=engine, workers=workers, shards=len(todo), **started)
        self._samples = self._retries = 0
        self._running: dict[int, float] = {}
        self._ended: set[int] = set()
        self._failed: dict[int, str] = {}
        self._dropped: Counter[str] = Counter()
        self._points: deque[tuple[float, int]] = deque([(now, 0)])
        self._spoke = self._wrote = now
        self._lines = not self.stream.isatty()
        self._bar = tqdm(
            total=self._total, desc="samples", unit="sample", disable=self._lines, file=self.stream
        )
        self._stop = threading.Event()
        # Two, for a store that fails may hold the file for minutes, and lines are wanted just then.
        self._threads = [
            threading.Thread(target=self._watch, args=(what,), daemon=True)
            for what in (self._show, self._beat)
        ]

    @property
    def run(self) -> str:
        return self._mine.run

    # --- what workers report -------------------------------------------------------------------

    def report(self, shard: int, samples: int) -> None:
        """So many samples more of a shard are done; its first report says that it begins."""
        with self._lock:
            if shard not in self._ended:
                self._running.setdefault(shard, self.clock())
            self._samples += samples
            self._bar.update(samples)

    def retry(self, shard: int) -> None:
        """A shard is to be made again, whose worker died."""
        with self._lock:
            self._running.pop(shard, None)
            self._retries += 1

    def ended(self, shard: int, error: str) -> None:
        """A shard was committed or, for an ``error``, failed."""
        dropped: Counter[str] = Counter()
        if not error:
            with suppress(shards.ShardError, OSError):
                record = shards.read_record(self.job.out, shard)
                dropped.update(drop["reason"] for drop in (record.dropped if record else ()))
        with self._lock:
            self._running.pop(shard, None)
            self._ended.add(shard)
            self._dropped += dropped
            if error:
                self._failed[shard] = error

    # --- shown ---------------------------------------------------------------------------------

    def progress(self) -> Progress:
        with self._lock:
            now, rate = self.clock(), self._rate()
            left = max(self._total - self._samples, 0)
            return Progress(
                shards=self._shards,
                done=self._whole + len(self._ended) - len(self._failed),
                failed=len(self._failed),
                running=len(self._running),
                samples=self._samples,
                rate=rate,
                left_s=left / rate if rate > 0 else None,
                oldest_s=max((now - began for began in self._running.values()), default=0.0),
                retries=self._retries,
                dropped=dict(self._dropped.most_common()),
            )

    def _show(self) -> None:
        now = self.clock()
        with self._lock:
            self._note(now)
            progress = self.progress()
            self._bar.set_postfix_str(_postfix(progress), refresh=False)
        self._send(progress)
        if self._lines and self._is_busy() and now - self._spoke >= LINE_S:
            self._spoke = now
            with suppress(OSError, ValueError):  # a log that was closed
                print(line(progress, now), file=self.stream, flush=True)

    def _is_busy(self) -> bool:
        """Not while it waits for another job of the same run, nor when all is done."""
        begun = self._running or self._ended or not self.waits
        return bool(begun) and len(self._ended) < self._mine.shards

    def _beat(self) -> None:
        if self.clock() - self._wrote >= attempts.HEARTBEAT_S:
            self._write("")

    @contextmanager
    def sending(self, sink: Sink) -> Iterator[None]:
        """Send the numbers to ``sink`` too, for the last time when the block ends."""
        with self._sending:
            self._sinks.append(sink)
        try:
            yield
        finally:
            self._send(self.progress())
            with self._sending:
                self._sinks.remove(sink)

    def _send(self, progress: Progress) -> None:
        with self._sending:
            for sink in self._sinks:
                with suppress(Exception):  # another's code: that nobody sees it harms no job
                    sink(progress)

    def _note(self, now: float) -> None:
        """Keep a point for the rate; what lies before the first sample is start-up."""
        if self._samples == 0:
            self._points.clear()
        self._points.append((now, self._samples))
        while len(self._points) > 2 and now - self._points[0][0] > WINDOW_S:
            self._points.popleft()

    def _rate(self) -> float:
        began, samples = self._points[0]
        return (self._samples - samples) / max(self.clock() - began, 1e-3)

    def _write(self, ended: str) -> None:
        with self._lock:
            self._wrote = self.clock()
            changed = {
                "updated": self._wrote,
                "ended": ended,
                "made": len(self._ended) - len(self._failed),
                "samples": self._samples,
                "rate": round(self._rate(), 3),
                "retries": self._retries,
                "running": dict(self._running),
                "failed": dict(list(self._failed.items())[: attempts.MOST_FAILURES]),
            }
        with suppress(OSError, ValueError):  # a full disk, a lost bucket: the job itself says it
            attempts.write_attempts(self.job.out, self._mine.model_copy(update=changed))

    def _watch(self, what: Callable[[], None]) -> None:
        while not self._stop.wait(TICK_S):
            what()

    def __enter__(self) -> Watch:
        self._write("")
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        self._stop.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        self._write(_ending(error, len(self._failed)))
        self._bar.close()


def _ending(error: BaseException | None, failed: int) -> str:
    if error is None:
        return f"{failed} shards failed" if failed else "done"
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}".rstrip(": ")


def line(progress: Progress, now: float) -> str:
    """One line of a log."""
    clock = time.strftime("%H:%M:%S", time.localtime(now))
    parts = [
        f"{clock} shards {progress.done}/{progress.shards}"
        f" ({progress.running} in flight, {progress.failed} failed)",
        f"{progress.rate:.2f} samples/s",
        f"{progress.realtime:.1f} x real time",
        f"left {duration(progress.left_s)}",
        f"oldest {duration(progress.oldest_s)}",
        f"dropped {reasons(progress.dropped)}",
        f"retries {progress.retries}",
    ]
    return "; ".join(parts)


def _postfix(progress: Progress) -> str:
    return (
        f"shards {progress.done}/{progress.shards}, {progress.realtime:.0f} x real time, "
        f"oldest {duration(progress.oldest_s)}, dropped {sum(progress.dropped.values())}, "
        f"retries {progress.retries}"
    )


def duration(seconds: float | None) -> str:
    """Seconds as ``2 d 03:04:05``; a question mark for none."""
    if seconds is None:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour:02d}:{minute:02d}:{second:02d}"


def reasons(dropped: Mapping[str, int]) -> str:
    """Drops by reason in words, the most frequent first."""
    ranked = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ranked) or "none"


# --- metrics --------------------------------------------------------------------------------------

LABELS = ("dataset", "run")


@dataclass(frozen=True)
class Metric:
    """A gauge. ``labels`` are those beside ``LABELS``."""

    name: str
    about: str
    labels: tuple[str, ...] = ()


METRICS = (
    Metric("pipeline_shards", "Shards of the dataset, by state", ("state",)),
    Metric("pipeline_samples", "Samples that this run has finished"),
    Metric("pipeline_samples_per_second", "Samples a second over the last minutes"),
    Metric("pipeline_realtime_factor", "Seconds of audio made in a second"),
    Metric("pipeline_seconds_left", "Seconds that are left at this rate"),
    Metric("pipeline_oldest_shard_seconds", "Age of the oldest shard in flight"),
    Metric("pipeline_dropped_samples", "Samples dropped by this run, by reason", ("reason",)),
    Metric("pipeline_retries", "Attempts that this run began again after a worker's death"),
)


def measures(progress: Progress) -> Iterator[tuple[str, dict[str, str], float]]:
    """Name, labels and value of every metric; one that is not known yet is left out."""
    waiting = progress.shards - progress.done - progress.running - progress.failed
    for state, count in (
        ("done", progress.done),
        ("in_flight", progress.running),
        ("failed", progress.failed),
        ("waiting", max(waiting, 0)),
    ):
        yield "pipeline_shards", {"state": state}, count
    yield "pipeline_samples", {}, progress.samples
    yield "pipeline_samples_per_second", {}, progress.rate
    yield "pipeline_realtime_factor", {}, progress.realtime
    if progress.left_s is not None:
        yield "pipeline_seconds_left", {}, progress.left_s
    yield "pipeline_oldest_shard_seconds", {}, progress.oldest_s
    for reason, count in progress.dropped.items():
        yield "pipeline_dropped_samples", {"reason": reason}, count
    yield "pipeline_retries", {}, progress.retries
