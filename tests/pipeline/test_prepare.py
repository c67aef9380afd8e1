"""Before a job starts: processors are checked in a child as the job has them, teachers by file."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from data_specs.io.errors import UserError
from data_specs.recipe import Recipe
from pipeline.dataset.prepare import check_processors, prepare
from pipeline.render import label
from pipeline.render.guard import Guard
from pipeline.render.processors import SelfCheckError, runtime
from pipeline.render.processors.interface import Params, Waves
from tests.conftest import small_recipe


@pytest.fixture(autouse=True)
def checked_here() -> None:
    """The check as it is: see ``conftest``."""


def of(*kinds: str, **changes: object) -> Recipe:
    choices = [{"use": {"kind": kind}} for kind in kinds]
    stages = [{"stage": "line", "choices": choices}] if kinds else []
    return small_recipe(speech_stages=(), stages=stages, **changes)


def troubled(kind: str, waves_BT: Waves, params: Sequence[Params]) -> Waves:
    """Runs in the child: one kind crashes, one hangs once it is loaded, one says where it runs."""
    if kind == "clip":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "dropout" and waves_BT.shape[1] == 16_000:  # the check's second, not the probe
        ctypes.CDLL(None).sleep(1_000)
    if kind == "mnru":
        raise OSError(f"runs on {runtime.current()}")
    return waves_BT


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> list[Guard]:
    made: list[Guard] = []

    class Recorded(Guard):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, target="tests.pipeline.test_prepare:troubled")  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr("pipeline.dataset.prepare.Guard", Recorded)
    return made


def test_a_processor_that_crashes_or_hangs_is_named_before_the_job(guards: list[Guard]) -> None:
    with pytest.raises(SelfCheckError) as error:
        check_processors(of("clip", "dropout", "equalise"), "cpu", 0.5)
    said = str(error.value).splitlines()
    assert said[1:3] == [
        "  clip (stage 'line'): processor_crashed: clip: its process ended with SIGSEGV",
        "  dropout (stage 'line'): processor_timeout: dropout: no answer within 0.5 s",
    ]
    assert not any("equalise (stage" in line for line in said)
    assert [guard._process.poll() is not None for guard in guards] == [True]  # closed


@pytest.mark.parametrize(("gpu", "device"), [(True, "cuda"), (False, "cpu")])
def test_the_check_runs_as_the_job_will(
    gpu: bool, device: str, guards: list[Guard], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the job's device where this machine has it: one that drives a cluster may not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with pytest.raises(SelfCheckError, match=f"device='{device}', precision='bf16'"):
        check_processors(of("mnru", precision="bf16"), "cuda")
    assert guards[0].at == runtime.Runtime(device, "bf16")


def test_prepare_checks_the_processors_so(
    corpora: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pipeline.dataset.prepare.Guard",
        partial(Guard, target="tests.pipeline.test_prepare:troubled"),
    )
    with pytest.raises(SelfCheckError, match="clip: its process ended with SIGSEGV"):
        prepare(of("clip"), corpora, tmp_path / "out", 8)
    assert not (tmp_path / "out").exists()


# --- who the teacher is ---------------------------------------------------------------------------


def test_a_teacher_in_fp16_can_be_prepared_where_no_gpu_is(
    corpora: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = label.load(of(teacher={"name": "distillmos"}).teacher)
    teacher = {"name": "distillmos", "precision": "fp16"}
    monkeypatch.setattr("train.models.teacher.load_v7", lambda: pytest.fail("it is built"))
    job = prepare(of(teacher=teacher), corpora, tmp_path, 8, teacher_device="cuda")
    assert job.identity["teacher_sha256"] == exact.weights_sha256
    with pytest.raises(UserError, match="fp16 is for CUDA; on a CPU take bf16 or fp32"):
        prepare(of(teacher=teacher), corpora, tmp_path / "cpu", 8)
