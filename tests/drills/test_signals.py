"""A signal to a command, or to all of its processes, ends it in one sentence; it goes on later."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from data_specs.io.cli import STOPPED, STOPPED_WORDS
from data_specs.strict import HERE
from tests.conftest import ROOT
from tests.drills.drill_cluster import wait_for

SAMPLES = ["--samples", "64"]  # 16 shards


def begin(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=log.open("wb"),
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # tests run by nohup too
    )


def interrupt(
    arguments: list[str], number: signal.Signals, group: bool, log: Path, begun: Callable[[], bool]
) -> None:
    """Begin a command, signal it once it is at work, and hold it to how it ends."""
    process = begin(arguments, log)
    wait_for(begun, 200, "it is not at work", process)
    children = psutil.Process(process.pid).children(recursive=True)
    (os.killpg if group else os.kill)(process.pid, number)
    assert process.wait(60) == STOPPED[number], log.read_text()
    lines = [line for line in log.read_text().splitlines() if "%|" not in line and line.strip()]
    assert lines == [STOPPED_WORDS]
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []


def drill(out: Path, *options: str) -> list[str]:
    return ["tests/drills/drill_job.py", *SAMPLES, "--out", str(out), *options]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("signals") / "whole"
    assert begin(drill(out, "--engine", "local", "--workers", "1"), Path(os.devnull)).wait() == 0
    return tars(out)


def tars(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("shard-*"))}


@pytest.mark.parametrize(
    ("engine", "workers", "number", "group"),
    [
        ("local", 1, signal.SIGTERM, True),
        pytest.param("local", 2, signal.SIGINT, True, marks=pytest.mark.slow),
        pytest.param("local", 2, signal.SIGTERM, True, marks=pytest.mark.slow),
        pytest.param("local", 2, signal.SIGHUP, False, marks=pytest.mark.slow),
        pytest.param("ray", 2, signal.SIGINT, True, marks=pytest.mark.slow),
        pytest.param("ray", 2, signal.SIGTERM, True, marks=pytest.mark.slow),
        pytest.param("ray", 2, signal.SIGHUP, True, marks=pytest.mark.slow),
        pytest.param("ray", 2, signal.SIGTERM, False, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_shards_in_a_sentence_and_the_same_command_goes_on(
    engine: str,
    workers: int,
    number: signal.Signals,
    group: bool,
    whole: dict[str, bytes],
    tmp_path: Path,
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    options = ["--engine", engine, "--workers", str(workers)]
    command = drill(out, *options, "--pause", "0.3")
    interrupt(command, number, group, log, lambda: bool(list(out.glob("shard-*.json"))))
    assert 0 < len(list(out.glob("shard-*.json"))) < 16
    assert begin(drill(out, *options), log).wait() == 0, log.read_text()
    assert tars(out) == whole
    assert list(out.rglob("*.tmp")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_maker_of_corpora_in_a_sentence(
    number: signal.Signals, tmp_path: Path
) -> None:
    out, log = tmp_path / "rooms", tmp_path / "log"
    spec = min(path.stem for path in (HERE / "rooms").glob("*.yaml"))
    command = ["-m", "pipeline", "corpora", "rooms", "--spec", spec]
    command += ["--out", str(out), "--count", "5000"]
    interrupt(command, number, True, log, lambda: bool(list(out.glob("*.flac"))))
    assert (out / "rooms.jsonl").is_file()
    assert list(out.rglob("*.tmp")) == []
