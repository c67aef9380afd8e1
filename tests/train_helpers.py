"""Tiny shards and rated sets for the tests of train."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray

from data_specs.io import files as io_files
from tests.bench.random_xlsr import config_of, write_checkpoint
from tests.conftest import ROOT, SHARED
from train import files
from train.models import pruned

CROP = 122_880

# The first backward pass of a process starts a thread for every device that is known by then, and
# torch.export makes one known: a child could not learn any more (``killed``).
torch.ones((), requires_grad=True).backward()

needs_shared = pytest.mark.skipif(
    not (SHARED / "data").is_dir(),
    reason=f"no shared recordings at {SHARED} (SPEECH_SHARED)",
)


def tone_pcm(number: int, samples: int = CROP) -> NDArray[np.int16]:
    """A tone in noise whose level in the noise depends on the number."""
    rng = np.random.default_rng(number)
    time_s = np.arange(samples) / 16_000
    tone = np.sin(2 * np.pi * (200 + 37 * (number % 11)) * time_s)
    noise = rng.standard_normal(samples) * (0.01 + 0.1 * (number % 5))
    return np.round(8000 * (tone + noise) / 2).astype(np.int16)


def tone(number: int, samples: int = CROP) -> NDArray[np.float32]:
    """``tone_pcm`` as floats."""
    return tone_pcm(number, samples).astype(np.float32) / 32768


def tones(clips: int, samples: int = CROP) -> torch.Tensor:
    """The first so many, (B, T)."""
    return torch.from_numpy(np.stack([tone(number, samples) for number in range(clips)]))


def tone_mos(number: int) -> float:
    """A label that the noise level gives away."""
    return 4.5 - 0.75 * (number % 5)


def flac_bytes(pcm_T: NDArray[np.int16], rate: int = 16_000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, pcm_T, rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def record(key: str, mos: Any, pcm_T: NDArray[np.int16]) -> dict[str, Any]:
    return {
        "key": key,
        "mos": mos,
        "logit": None,
        "teacher": "test",
        "teacher_sha256": "f" * 64,
        "pcm_sha256": hashlib.sha256(pcm_T.tobytes()).hexdigest(),
        "plan": {},
    }


def write_tar(path: Path, members: list[tuple[str, bytes]], samples: int | None = None) -> None:
    """A tar of the members, and its record beside it."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    content: dict[str, Any] = {"tar_bytes": path.stat().st_size}
    if samples is not None:
        content["samples"] = samples
    path.with_suffix(".json").write_text(json.dumps(content))


def state_sha256(tar: Path) -> None:
    """Have a tar's record state its hash, as the pipeline's do."""
    path = tar.with_suffix(".json")
    digest = {"tar_sha256": hashlib.sha256(tar.read_bytes()).hexdigest()}
    path.write_text(json.dumps(json.loads(path.read_text()) | digest))


def members_of(numbers: range) -> list[tuple[str, bytes]]:
    members = []
    for number in numbers:
        key, pcm_T = f"{number:08d}", tone_pcm(number)
        members.append((f"{key}.flac", flac_bytes(pcm_T)))
        members.append((f"{key}.json", json.dumps(record(key, tone_mos(number), pcm_T)).encode()))
    return members


def write_dataset(
    folder: Path, shards: int = 3, samples: int = 4, validation: int = 0, hash_: str = "abc"
) -> Path:
    """A folder of shards as the pipeline writes them, and the recipe's validation split beside."""
    if validation:
        write_dataset(folder.parent / "validation", 1, validation, hash_="held")
    folder.mkdir(parents=True, exist_ok=True)
    about = {"recipe_hash": hash_, "recipe": {"name": "tiny"}, "teacher": "test"}
    (folder / "dataset.json").write_text(json.dumps(about))
    for shard in range(shards):
        numbers = range(shard * samples, (shard + 1) * samples)
        write_tar(folder / f"shard-{shard:06d}.tar", members_of(numbers), samples)
    return folder


def write_rated(
    folder: Path, clips: int = 6, seconds: float = 2.0, conditions: int | None = None
) -> Path:
    """A rated CSV with its clips, of two datasets and so many conditions."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["dataset", "path", "mos", "condition" if conditions else "extra"])
        for number in range(clips):
            soundfile.write(
                folder / f"{number}.wav",
                tone_pcm(number, int(seconds * 16_000)),
                16_000,
            )
            extra = number % conditions if conditions else "x"
            writer.writerow([f"set{number % 2}", f"{number}.wav", tone_mos(number), extra])
    return folder / "labels.csv"


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(work: Callable[[], None]) -> None:
    """Run ``work`` in a child that must die of SIGKILL."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status


def dies_writing(name: str, count: int, half: bool, work: Callable[[], None]) -> None:
    """Die at the ``count``-th write of a file: before it, or with half of it written."""
    writes = itertools.count(1)
    whole, whole_file = files.write_atomically, io_files.whole_file

    def deadly(path: Path, write: Callable[[Path], Any]) -> None:
        if path.name == name and next(writes) == count:
            if half:
                write(torn := path.with_name(f".{path.name}.torn"))
                os.truncate(torn, torn.stat().st_size // 2)
            kill()
        whole(path, write)

    def deadly_text(path: Path) -> Any:
        if path.name == name and next(writes) == count:
            kill()
        return whole_file(path)

    files.write_atomically = pruned.write_atomically = deadly
    io_files.whole_file = deadly_text
    work()


def dies_at(
    task: type[Any], method: str, when: Callable[[Any], bool], work: Callable[[], None]
) -> None:
    """Die when a method of a run's task is called."""
    whole = getattr(task, method)

    def deadly(self: Any, *given: Any) -> Any:
        if when(self):
            kill()
        return whole(self, *given)

    setattr(task, method, deadly)
    work()


@contextmanager
def interrupted(task: type[Any], step: int) -> Iterator[None]:
    """Press Ctrl-C in the update after ``step`` steps; it must come out of the block."""
    update = task.update

    def presses(self: Any, batch: Any) -> torch.Tensor:
        if self.step == step:
            signal.raise_signal(signal.SIGINT)
        return update(self, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(task, "update", presses)
        yield


def python(*words: object) -> None:
    """Run a Python of its own, of one thread, in the repository."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, words)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def require_same_states(one: Path, other: Path, *parts: str) -> None:
    """The last checkpoints of two runs have the same parts and moments, bit for bit."""
    ours, theirs = (files.load_checkpoint(run / "last.pt") for run in (one, other))
    moments = (content["optimizer"]["state"] for content in (ours, theirs))
    for pair in (*((ours[part], theirs[part]) for part in ("step", *parts)), tuple(moments)):
        torch.testing.assert_close(*pair, rtol=0, atol=0)


def logged(run: Path, *without: str) -> list[dict[str, Any]]:
    """The log of a run without what the clock says, and some other values."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    hidden = ("samples_per_s", "data_wait_share", *without)
    return [{key: value for key, value in line.items() if key not in hidden} for line in lines]


def small_xlsr(layers: int, **changes: Any) -> Any:
    """The configuration of an XLS-R of that many layers, 32 wide."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    small |= {"conv_dim": [16] * 7, "num_conv_pos_embedding_groups": 4}
    return config_of("300m", layers, **(small | changes))


def write_xlsr(folder: Path, layers: int, **changes: Any) -> Path:
    """The checkpoint of one, with random weights."""
    return write_checkpoint(folder, small_xlsr(layers, **changes))
