"""What a training refuses before it begins, and what it leaves alone: data, devices, launchers."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_specs.io.errors import UserError
from data_specs.io.files import here, only_writer
from tests.export_helpers import write_run
from tests.train_helpers import interrupted, write_dataset, write_rated
from train.__main__ import ONE_WRITER, main
from train.data.sources import open_sources
from train.files import load_checkpoint
from train.loop.launch import require_launch
from train.loop.loop import Host
from train.student.fit import Trainer, fit
from train.student.presets import computed_in_bf16, make_config

QUIET = Host(device="cpu", workers=0, progress=False, logger="none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    top = tmp_path_factory.mktemp("runs")
    return write_dataset(top / "train", shards=2, samples=3, validation=2)


def begin(folder: Path, out: Path, *more: object) -> int:
    words = ["fit", "--student", "v1", "--shards", folder, "--preset", "fast", "--steps", 1]
    words += ["--batch", 2, "--validate-every", 1, "--logger", "none", "--workers", 0]
    words += ["--device", "cpu", "--out", out, *more]
    return main([str(word) for word in words])


# --- devices and launchers ------------------------------------------------------------------------


def words_of(
    verb: str, shards: object = "no", rated: object = "no.csv", student: object = "no"
) -> list[str]:
    """A command line that parses; without more nothing of it is there."""
    words = {
        "fit": ["--student", "v1", "--shards", shards, "--steps", 1],
        "teacher": ["--front-end", "mfcc", "--rated", rated, "--steps", 1],
        "experiment": ["--shards", shards, "--rated", rated, "--test-rated", rated],
        "lengths": ["--model", student, "--shards", shards],
        "prune": ["--model", student, "--shards", shards],
        "prune-structured": ["--model", student],
        "robustness": ["--model", student, "--data", rated, "--sparsity", 0],
        "evaluate": ["--model", student, "--rated", rated],
        "finetune": ["--encoder", "log-mel", "--tasks", "quality", "--clips", rated],
    }
    return [verb, *map(str, words[verb])]


@pytest.mark.parametrize("verb", ONE_WRITER)
@pytest.mark.parametrize(
    ("device", "said"),
    [("cuda", "sees 0 cuda devices"), ("cuda:3", "sees 0 cuda"), ("gpu", "no device of PyTorch")],
)
def test_a_device_that_is_not_there_is_told_first(
    tmp_path, monkeypatch, capsys, verb, device, said
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main([*words_of(verb), "--out", "no", "--device", device]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --device {device}: ") and said in error
    assert error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ONE_WRITER)
def test_no_threads_are_refused_first(tmp_path, monkeypatch, capsys, verb):
    monkeypatch.chdir(tmp_path)
    assert main([*words_of(verb), "--out", "no", "--threads", "0"]) == 2
    assert capsys.readouterr().err == "error: --threads 0: must be at least 1\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ONE_WRITER)
def test_several_processes_that_nothing_joins_are_refused(tmp_path, monkeypatch, capsys, verb):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*words_of(verb), "--out", "no"]) == 2
    error = capsys.readouterr().err
    assert "RANK=1 and WORLD_SIZE=2" in error
    assert "for one process: unset RANK WORLD_SIZE" in error
    assert not list(tmp_path.iterdir())


ELASTIC = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
BATCH = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "fit"}
SRUN = BATCH | {"SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("devices", "environment", "said"),
    [
        (1, {}, None),
        (2, {}, None),
        (1, {"RANK": "0", "WORLD_SIZE": "1"}, None),
        (1, ELASTIC, None),
        (2, {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "0"}, None),  # Lightning's child
        (1, {"RANK": "0", "WORLD_SIZE": "2"}, "torchrun"),
        (1, {"RANK": "3"}, "RANK=3"),
        (1, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "torchrun"),
        (2, {"RANK": "1", "WORLD_SIZE": "2"}, "torchrun"),
        (1, {"WORLD_SIZE": "two"}, "WORLD_SIZE=two: not a number"),
        (None, ELASTIC, "runs in one process"),
        (1, BATCH, "for one process: unset SLURM_NTASKS"),
        (2, BATCH, "with srun"),
        (1, SRUN, "srun started 2 and this command is for 1"),
        (2, SRUN, None),
        (1, SRUN | {"SLURM_NTASKS": "1"}, None),
        (1, BATCH | {"SLURM_NTASKS": "1"}, None),
        (1, BATCH | {"SLURM_JOB_NAME": "interactive"}, None),
        (None, BATCH, None),  # tasks asked for as cores: one process runs
        (None, SRUN, "runs in one process"),
        (1, SRUN | ELASTIC, None),
    ],
)
def test_launchers(devices, environment, said):
    if said is None:
        require_launch(devices, 1, environment)
        return
    with pytest.raises(UserError, match=said):
        require_launch(devices, 1, environment)


# --- what "auto" means is the host's --------------------------------------------------------------


def test_a_run_goes_on_where_auto_means_something_else(folder, tmp_path, monkeypatch):
    """As a run of a GPU does on a CPU."""
    sources = open_sources(folder)
    config = make_config("v1", sources, "fast", steps=2, batch=2, validate_every=1)
    assert (config.precision, config.compile) == ("auto", "auto")
    monkeypatch.setattr("train.models.precision.has_fast_bf16", lambda device: True)
    assert computed_in_bf16(config, "cpu")
    with interrupted(Trainer, 0):
        fit(config, sources, tmp_path, QUIET)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 1
    monkeypatch.setattr("train.models.precision.has_fast_bf16", lambda device: False)
    assert not computed_in_bf16(config, "cpu")
    fit(config, sources, tmp_path, QUIET)
    assert json.loads((tmp_path / "model.json").read_text())["fit"]["precision"] == "auto"


# --- data -----------------------------------------------------------------------------------------


def damage(shards: Path, validation: int = 2) -> Path:
    """A dataset with a byte changed in the middle of each FLAC of its first shard."""
    write_dataset(shards, shards=1, samples=3, validation=validation)
    tar = shards / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    start = data.find(b"fLaC")
    while start >= 0:
        data[start + 20_000 : start + 60_000] = bytes(40_000)
        start = data.find(b"fLaC", start + 4)
    tar.write_bytes(data)
    return shards


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_is_one_sentence(tmp_path, capsys, workers):
    shards = damage(tmp_path / "train")
    assert begin(shards, tmp_path / "run", "--workers", workers) == 2
    (line,) = [s for s in capsys.readouterr().err.splitlines() if "error" in s.lower()]
    assert line.startswith(f"error: {shards}/shard-000000.tar: ")
    assert "Traceback" not in line


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_disk_in_a_worker_names_the_file(
    folder, tmp_path, capsys, monkeypatch, workers
):
    def failing(file, where, span):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("data_specs.io.tars.audio_of", failing)
    monkeypatch.setattr("train.student.fit.Trainer.validate", lambda self, held: {"loss": 1.0})
    assert begin(folder, tmp_path / "run", "--workers", workers) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert f"error: {folder}/shard-0000" in error and ".tar: Input/output error" in error


def test_a_worker_that_is_killed_is_told(folder, tmp_path, capsys, monkeypatch):
    def killed(self, step, pcm_BT):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("train.data.stream.Batches.read_into", killed)
    assert begin(folder, tmp_path / "run", "--workers", 1) == 2
    error = capsys.readouterr().err
    assert "DataLoader worker" in error and "lower --workers" in error.lower()


def test_rated_clips_that_cannot_be_read_are_told_first(folder, tmp_path, capsys):
    table = write_rated(tmp_path / "rated", clips=4)
    (tmp_path / "rated/1.wav").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "rated/3.wav").write_bytes(b"")
    assert begin(folder, tmp_path / "run", "--rated", table) == 2
    error = capsys.readouterr().err
    assert f"{table}: line 3: " in error and "1.wav" in error
    assert f"{table}: line 5: " in error and "3.wav" in error
    assert not (tmp_path / "run/log.jsonl").exists()


def test_a_clip_twice_is_told_first(folder, tmp_path, capsys):
    table = write_rated(tmp_path / "rated", clips=3)
    with table.open("a") as file:
        file.write("set1,0.wav,3.0,x\n")
    assert begin(folder, tmp_path / "run", "--rated", table) == 2
    error = capsys.readouterr().err
    assert f"{table}: line 5: " in error and f"{table}: line 2" in error and "twice" in error


# --- one writer, and what kills leave -------------------------------------------------------------


@pytest.mark.parametrize("verb", ONE_WRITER)
def test_a_folder_that_another_command_writes_to_is_refused(
    folder, tmp_path, capsys, monkeypatch, verb
):
    out, rated = tmp_path / "out", write_rated(tmp_path / "rated", clips=12)
    student = tmp_path / "student"
    if verb in ("lengths", "prune", "prune-structured", "robustness"):
        write_run(student)
    if verb == "finetune":
        rows, splits = (
            rated.read_text().splitlines(),
            ["split", *("train", "validation", "test") * 4],
        )
        rated.write_text("".join(f"{r},{s}\n" for r, s in zip(rows, splits, strict=True)))
    command = [*words_of(verb, folder, rated, student), "--out", str(out), "--device", "cpu"]
    with only_writer(out):
        before = sorted(path.name for path in out.iterdir())
        assert main(command) == 2
        assert sorted(path.name for path in out.iterdir()) == before
    error = capsys.readouterr().err
    assert f"error: {out}: another command writes to it (process {os.getpid()} on {here()}" in error


def test_a_worker_that_outlives_a_killed_command_does_not_hold_its_folder(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path;"
        "from data_specs.io.files import only_writer\n"
        "with only_writer(Path(sys.argv[1])):\n"
        "    if os.fork() == 0: print('held', flush=True)\n"  # it has let go of the lock by now
        "    signal.pause()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another command"), only_writer(tmp_path):
            pass
        process.kill()
        process.wait()
        with only_writer(tmp_path):  # its child is still there
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_files_have_ordinary_permissions_and_leftovers_go(folder, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    out = tmp_path / "run"
    (out / "deeper").mkdir(parents=True)
    left = [
        out / f".last.pt.{here()}.{ended.pid}.0a1b2c3d.tmp",
        out / f"deeper/.x.{here()}.{ended.pid}.0a1b2c3e.tmp",
    ]
    kept = out / f".last.pt.{here()}.{os.getpid()}.0a1b2c3d.tmp"
    for path in (*left, kept):
        path.touch()
    before = os.umask(0o027)
    try:
        assert begin(folder, out, "--precision", "fp32") == 0
    finally:
        os.umask(before)
    assert not any(path.exists() for path in left) and kept.exists()
    kept.unlink()
    for path in (p for p in out.rglob("*") if p.is_file() and p.name != ".lock"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path
