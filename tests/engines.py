"""One job made by an engine."""

from __future__ import annotations

from typing import Any

from pipeline.dataset.job import Job, Worker, WorkerFactory
from pipeline.engine.base import EngineOptions, Outcome
from pipeline.engine.run import run_all


def run(
    job: Job, engine: str, workers: int, factory: WorkerFactory = Worker, **how: Any
) -> Outcome:
    """``run_all`` of one job, by these fields of ``EngineOptions``."""
    return run_all([job], EngineOptions(engine=engine, workers=workers, **how), factory)[0]
