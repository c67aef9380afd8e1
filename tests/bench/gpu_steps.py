"""The measurements of ``python -m tests.bench gpu``: functions that ``tell`` what they find."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_specs.io.files import sha256_of
from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE

DEVICE_VARIABLE = "SPEECH_TEST_DEVICE"
"""Names the device that tests marked ``gpu`` compare with the CPU."""

RESULT = "RESULT "
CLIP_SECONDS = CROP_SAMPLES / SAMPLE_RATE
SIDE = 8192
"""Of the square matrices whose product is the card's measured rate."""


def tell(what: str, value: str, goal: str = "", met: bool | None = None) -> None:
    """A result, for the table."""
    found = {"what": what, "value": value, "goal": goal, "met": met}
    print(RESULT + json.dumps(found), flush=True)


def seconds_of(work: Callable[[], object], device: torch.device, repeat: int) -> float:
    """The median of some runs, after one that warms up."""
    times = []
    for _ in range(repeat + 1):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - began)
    return median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device, side: int) -> float:
    """Operations a second of a product of square bf16 matrices of random values."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / seconds_of(lambda: a @ b, device, 10)


# --- the teacher ----------------------------------------------------------------------------------


def teacher(args: argparse.Namespace) -> None:
    """XLS-R 2B cut at layer 10, random weights, bf16, against the published way."""
    from tests.bench.prune import random_subject
    from tests.bench.random_xlsr import config_of
    from train.models.xlsr import flops

    device = torch.device(args.device)
    size, layer, batch = ("300m", 1, 2) if args.small else ("2b", 10, 32)
    rate = matrix_rate(device, 512 if args.small else SIDE)
    tell("bf16 matrix product, this card", f"{rate / 1e12:.1f} TFLOP/s")
    a_clip = sum(flops(config_of(size, layer), layer, CROP_SAMPLES).values())
    waves_BT = 0.1 * torch.randn(batch, CROP_SAMPLES, device=device)
    theirs = _published_way(size, layer, device, waves_BT)
    tell("published way: fp32, a clip at a time", f"{theirs:.1f} clips/s")
    subject = random_subject(size, layer, args.device)
    network = subject.network.to(torch.bfloat16).eval()
    for name, work in _teacher_ways(network, waves_BT, args.small):
        try:
            found = batch / seconds_of(work, device, 2 if args.small else 8)
        except Exception as error:  # a way that does not run here is a result, too
            tell(f"{name}, bf16, batches of {batch}", f"not run: {str(error).splitlines()[0][:90]}")
            continue
        share, times = found * a_clip / rate, found / theirs
        tell(
            f"{name}, bf16, batches of {batch}",
            f"{found:.1f} clips/s, {share:.0%} of the matrix rate, {times:.1f} times the published",
            "60 %, 10 times",
            None if args.small else share >= 0.6 and times >= 10,
        )


def _published_way(size: str, layer: int, device: torch.device, waves_BT: Tensor) -> float:
    """Clips a second of ``transformers``' model, one layer more, every hidden state kept."""
    from transformers import Wav2Vec2Model

    from tests.bench.random_xlsr import config_of

    with device:
        model: Any = Wav2Vec2Model(config_of(size, layer + 1)).eval()

    @torch.inference_mode()
    def work() -> None:
        for wave_T in waves_BT[:4]:
            model(wave_T[None], output_hidden_states=True)

    return len(waves_BT[:4]) / seconds_of(work, device, 3)


def _teacher_ways(
    network: nn.Module, waves_BT: Tensor, small: bool
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Attention written out, PyTorch's fused attention, compiled, compiled as CUDA graphs."""

    def way(model: Callable[[Tensor], object]) -> Callable[[], object]:
        def work() -> None:
            with torch.inference_mode():
                model(waves_BT)

        return work

    config = network.encoder.config
    for kind in ("eager", "sdpa"):
        for layer in network.encoder.encoder.layers:
            layer.attention.config._attn_implementation = kind
        yield f"attention {kind}", way(network)
    config._attn_implementation = "sdpa"
    if not small:
        yield "compiled", way(torch.compile(network))
        yield "compiled, CUDA graphs", way(torch.compile(network, mode="reduce-overhead"))


# --- shards, training, scoring --------------------------------------------------------------------


def _command(*words: object) -> list[str]:
    return [sys.executable, "-m", *map(str, words)]


def make_shards(args: argparse.Namespace, out: Path, samples: int) -> float:
    """Make shards of the demo recipe by the local engine; seconds."""
    data = args.data / "data"
    corpora = {"speech": data / "speech", "noise": data / "noise", "rooms": data / "rir"}
    roots = [f"--corpus={name}={folder}" for name, folder in corpora.items()]
    words = ["pipeline", "shards", "demo", *roots, "--out", out, "--samples", samples]
    words += ["--engine", "local", "--device", args.device]
    began = time.perf_counter()
    subprocess.run(_command(*words), check=True)
    return time.perf_counter() - began


def shards(args: argparse.Namespace) -> None:
    """The same samples twice."""
    samples = 8 if args.small else 64
    made = [args.out / name for name in ("once", "again")]
    seconds = [make_shards(args, out, samples) for out in made]
    sums = [[sha256_of(tar) for tar in sorted(out.glob("*.tar"))] for out in made]
    tell(f"{samples} samples, whole command", f"{min(seconds):.0f} s")
    tell("made twice", "same bytes" if sums[0] == sums[1] else "DIFFERENT", "", sums[0] == sums[1])


def resume(args: argparse.Namespace) -> None:
    """A run that is stopped half way and resumed, against one that is not."""
    steps = 10 if args.small else 100
    make_shards(args, args.out / "shards", 24)
    straight, stopped = args.out / "straight", args.out / "stopped"
    subprocess.run(_fit(args, straight, steps), check=True)
    _stopped_half_way(args, stopped, steps)
    subprocess.run(_fit(args, stopped, steps), check=True)
    sums = [sha256_of(folder / "model.safetensors") for folder in (straight, stopped)]
    tell(f"{steps} steps, stopped and resumed", "same weights" if sums[0] == sums[1] else "other")


def _fit(args: argparse.Namespace, out: Path, steps: int) -> list[str]:
    words = ["train", "fit", "--student", "v1", "--preset", "fast", "--out", out, "--steps", steps]
    words += ["--shards", args.out / "shards", "--validation", args.out / "shards", "--batch", 4]
    words += ["--validate-every", steps // 2, "--warmup", 2, "--device", args.device]
    return _command(*words, "--log-every", 1)


def _stopped_half_way(args: argparse.Namespace, out: Path, steps: int) -> None:
    process = subprocess.Popen(_fit(args, out, steps))
    log = out / "log.jsonl"
    while process.poll() is None and not (
        log.is_file() and f'"step": {steps // 2}' in log.read_text()
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    tell("stopped half way by SIGTERM", f"exit status {code}", "143", code in (0, 143))


def training(args: argparse.Namespace) -> None:
    """Steps from shards against the same steps over one batch in memory."""
    from train.data.loading import loader
    from train.data.order import Order
    from train.data.shards import list_shards
    from train.data.stream import Batches, ShardSamples

    make_shards(args, args.out / "shards", 24 if args.small else 1000)
    found = list_shards(args.out / "shards")
    batch, steps = (4, 3) if args.small else (64, 60)
    workers = min(len(os.sched_getaffinity(0)), 12)
    for student, compiled in (("v2", False), ("v2", True), ("v7", False), ("v7", True)):
        if args.small and (compiled or student == "v7"):
            continue
        task = trainer(student, batch, args.device, compiled)
        order = Order(tuple(shard.samples for shard in found), 0, seed=0, batch=batch)
        batches = Batches(ShardSamples(found), order)
        memory = batches[0]
        rates = []
        for stream in (
            (memory for _ in range(steps)),
            loader(batches, 0, steps, workers=workers, pin=task.device.type == "cuda"),
        ):
            rates.append(_clips_per_s(task, iter(stream), batch))
        share = rates[1] / rates[0]
        name = f"{student}, batches of {batch}" + (", compiled" if compiled else "")
        tell(
            f"training {name}",
            f"{rates[1]:.0f} clips/s from shards ({workers} processes), {share:.2f} of "
            f"{rates[0]:.0f} from memory",
            ".95",
            None if args.small else share >= 0.95,
        )


def trainer(student: str, batch: int, device: str, compiled: bool, precision: str = "auto") -> Any:
    """A new student and its optimiser, by the fast preset."""
    from train.loop.parallel import make_fabric
    from train.student.fit import Trainer
    from train.student.presets import FAST, FitConfig, computed_in_bf16

    facts = dict.fromkeys(("recipe_hash", "validation_hash", "rated_hash"), "bench")
    counts = {"samples": 1, "validation_samples": 1, "rated_clips": 0, "rated_share": 0.0}
    changes = {"batch": batch, "compile": compiled, "precision": precision}
    config = FitConfig(student=student, preset="fast", **FAST | changes | facts | counts)
    return Trainer(config, make_fabric(device, bf16=computed_in_bf16(config, device)))


def _clips_per_s(task: Any, stream: Iterator[Any], batch: int) -> float:
    """Of the batches after the first tenth, which warm up (and compile)."""
    done, began = 0, 0.0
    for number, found in enumerate(stream):
        task.update(found)
        if number == 1:
            _wait(task.device)
            began, done = time.perf_counter(), 0
        else:
            done += number > 1
    _wait(task.device)
    return done * batch / (time.perf_counter() - began)


def scoring(args: argparse.Namespace) -> None:
    """Windows a second by precision and batch; long recordings in both modes."""
    from train.scoring.score import load

    on_cuda = args.device.startswith("cuda")
    for precision in ("fp32", "bf16", "fp16") if on_cuda else ("fp32",):
        model = load("v7", device=args.device, precision=precision)
        for batch in (2,) if args.small else (8, 64, 256):
            rng = np.random.default_rng(0)
            waves = list(rng.standard_normal((batch, CROP_SAMPLES), np.float32) * 0.1)
            work = partial(model.score_windows, waves)
            taken = seconds_of(work, torch.device(args.device), 3)
            hours = batch * CLIP_SECONDS / 3600 / taken
            tell(f"v7, {precision}, batches of {batch}", f"{hours:.3f} hours of audio a second")
        for seconds, name in ((30, "30 s"), (60 if args.small else 10_800, "3 h")):
            wave_T = np.random.default_rng(1).standard_normal(seconds * SAMPLE_RATE, np.float32)
            for mode in ("exact", "fast"):
                began = time.perf_counter()
                model.score(wave_T * 0.1, SAMPLE_RATE, mode=mode)  # type: ignore[arg-type]
                taken = time.perf_counter() - began
                tell(f"v7, {precision}, {mode}, a file of {name}", f"{taken:.2f} s")


STEPS = {f.__name__: f for f in (teacher, shards, resume, training, scoring)}


def main() -> int:
    """Run one measurement."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu_steps", description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--device", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    STEPS[args.step](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
