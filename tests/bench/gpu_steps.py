"""The measurements of ``python -m tests.bench gpu``: functions that ``tell`` what they find."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_specs.io.files import sha256_of
from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE
from tests.bench import command, gpu_data, matrix_rate, seconds_of, wait

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


def half_of(device: torch.device) -> torch.dtype:
    """The bf16 of what is measured; float32 on a CPU, which may have to emulate it."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


# --- the teacher ----------------------------------------------------------------------------------


def teacher(args: argparse.Namespace) -> None:
    """XLS-R 2B cut at layer 10, random weights, bf16, against the published way."""
    from tests.bench.prune import random_subject
    from tests.bench.random_xlsr import config_of
    from train.models.front_end import XlsrFrontEnd
    from train.models.head_teacher import HeadTeacher
    from train.models.xlsr import flops

    device = torch.device(args.device)
    size, layer, batch, samples = ("2b", 10, 32, CROP_SAMPLES)
    if args.small:
        size, layer, batch, samples = ("300m", 1, 2, SAMPLE_RATE)
    rate = matrix_rate(device, half_of(device), 512 if args.small else SIDE)
    tell("bf16 matrix product, this card", f"{rate / 1e12:.3g} TFLOP/s")
    a_clip = sum(flops(config_of(size, layer), layer, samples).values())
    waves_BT = 0.1 * torch.randn(batch, samples, device=device)
    theirs = _published_way(size, layer, device, waves_BT)
    tell("published way: fp32, a clip at a time", f"{theirs:.3g} clips/s")
    subject = random_subject(size, layer, args.device)
    head, encoder = subject.network.head.eval(), subject.network.encoder.eval().to(half_of(device))
    front_end = XlsrFrontEnd("bench", encoder, "random", args.device)
    labels = HeadTeacher("bench", front_end, head, "random")
    on_host_BT = torch.randn(4 * batch, CROP_SAMPLES).mul_(0.1).clamp_(-1, 1)
    host = on_host_BT[: 1 if args.small else None].numpy()
    ways = [(name, waves_BT, work) for name, work in _teacher_ways(encoder, head, waves_BT, args)]
    ways.insert(2, ("as labels are made, from the host and back", host, lambda: labels.score(host)))
    best = 0.0
    for name, clips, work in ways:
        found = len(clips) / seconds_of(work, device, 1 if args.small else 8)
        tell(f"{name}, bf16, batches of {batch}", _speed(found, a_clip, rate, theirs))
        best = max(best, found)
    met = best * a_clip >= 0.6 * rate and best >= 10 * theirs
    tell("the fastest", _speed(best, a_clip, rate, theirs), "60 %, 10 times", _goal(args, met))


def _speed(clips_per_s: float, a_clip: float, rate: float, theirs: float) -> str:
    share, times = clips_per_s * a_clip / rate, clips_per_s / theirs
    return f"{clips_per_s:.3g} clips/s, {share:.0%} of the matrix rate, {times:.1f} x the published"


def _goal(args: argparse.Namespace, met: bool) -> bool | None:
    """Whether a goal is met; a rehearsal's speed says nothing."""
    return None if args.small else met


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
    encoder: Any, head: nn.Module, waves_BT: Tensor, args: argparse.Namespace
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Attention written out, PyTorch's fused attention, compiled, compiled as CUDA graphs."""
    from train.models.front_end import centre_crop

    def way(model: Callable[[Tensor], Any], attention: str = "sdpa") -> Callable[[], object]:
        @torch.inference_mode()
        def work() -> object:
            for layer in encoder.encoder.layers:
                layer.attention.config._attn_implementation = attention
            return head(centre_crop(model(waves_BT)[0].float()))

        return work

    yield "attention eager", way(encoder, "eager")
    yield "attention sdpa", way(encoder)
    if args.small:  # what a rehearsal can show: that it is traced
        yield "compiled", way(torch.compile(encoder, backend="eager"))
        return
    yield "compiled", way(torch.compile(encoder))
    yield "compiled, CUDA graphs", way(torch.compile(encoder, mode="reduce-overhead"))


# --- shards, training, scoring --------------------------------------------------------------------


def shards(args: argparse.Namespace) -> None:
    """The same samples of the paper's recipe by two commands at once."""
    from tests.bench.stand_ins import stand_in_weights

    samples = 4 if args.small else 64
    made = [args.out / name for name in ("once", "again")]
    with stand_in_weights(args.out.parent):
        recipe, said = gpu_data.paper_recipe(args, samples)
        for line in said:
            tell("the paper's recipe", line)
        path = gpu_data.write_recipe(recipe, args.out / "paper.yaml")
        began = time.perf_counter()
        run_all(*(gpu_data.shards_command(args, path, out, samples) for out in made))
    tell(f"{samples} samples, twice at once", f"{time.perf_counter() - began:.0f} s")
    sums = [[sha256_of(tar) for tar in sorted(out.glob("*.tar"))] for out in made]
    same = bool(sums[0]) and sums[0] == sums[1]
    tell("made twice", "same bytes" if same else "DIFFERENT", "same bytes", same)


def run_all(*commands: list[str]) -> None:
    """Run commands at once. ``CalledProcessError`` where one fails."""
    running = [subprocess.Popen(words) for words in commands]
    for words, process in zip(commands, running, strict=True):
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, words)


def resume(args: argparse.Namespace) -> None:
    """A run that is stopped half way and resumed, against one that is not."""
    steps = 20 if args.small else 100
    found, outs = gpu_data.dataset(args), [args.out / name for name in ("straight", "stopped")]
    for out in outs:
        shutil.rmtree(out, ignore_errors=True)  # of a step that is done again
    straight, stopped = (_fit(args, found, out, steps) for out in outs)
    beside = subprocess.Popen(straight)
    _stopped_half_way(stopped, outs[1] / "log.jsonl", steps)
    run_all(stopped)
    if beside.wait():
        raise subprocess.CalledProcessError(beside.returncode, straight)
    weights = [_weights(out / "model.safetensors") for out in outs]
    apart = float((weights[0] - weights[1]).norm() / weights[0].norm())
    # On a GPU sums over a batch come in another order each time.
    met = apart == 0 if args.device == "cpu" else apart < 0.01
    tell(f"{steps} steps, stopped and resumed", f"weights {apart:.1g} apart", "0; GPU .01", met)


def _weights(path: Path) -> Tensor:
    from safetensors.torch import load_file

    return torch.cat([tensor.flatten().double() for tensor in load_file(path).values()])


def _fit(args: argparse.Namespace, found: Path, out: Path, steps: int) -> list[str]:
    words = ["train", "fit", "--student", "v1", "--preset", "fast", "--out", out, "--steps", steps]
    words += ["--shards", found, "--validation", found, "--batch", 4, "--device", args.device]
    words += ["--validate-every", steps // 2, "--warmup", 2, "--log-every", 1, "--no-compile"]
    return command(*words)


def _stopped_half_way(words: list[str], log: Path, steps: int) -> None:
    process = subprocess.Popen(words)
    half = f'"step": {steps // 2}'
    while process.poll() is None and not (log.is_file() and half in log.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    tell("stopped half way by SIGTERM", f"exit status {code}", "143", code == 143)


def training(args: argparse.Namespace) -> None:
    """Steps from shards against the same steps over one batch in memory."""
    from train.data.loading import loader
    from train.data.order import Order
    from train.data.shards import list_shards
    from train.data.stream import Batches, ShardSamples

    found = list_shards(gpu_data.dataset(args))
    batch, steps = (4, 3) if args.small else (64, 60)
    workers = min(gpu_data.workers(args), 12)
    for student, compiled in (("v2", False), ("v7", False), ("v7", True))[: 1 if args.small else 3]:
        task = trainer(student, batch, args.device, compiled)
        order = Order(tuple(shard.samples for shard in found), 0, seed=0, batch=batch)
        batches = Batches(ShardSamples(found), order)
        pin = task.device.type == "cuda"
        memory = next(loader(batches, 0, 1, workers=0, pin=pin))
        rates = []
        for stream in (
            (memory for _ in range(steps)),
            loader(batches, 0, steps, workers=workers, pin=pin),
        ):
            rates.append(_clips_per_s(task, iter(stream), batch))
        share = rates[1] / rates[0]
        name = f"{student}, batches of {batch}" + (", compiled" if compiled else "")
        tell(
            f"training {name}",
            f"{rates[1]:.0f} clips/s from shards ({workers} processes), {share:.2f} of "
            f"{rates[0]:.0f} from memory",
            ".95",
            _goal(args, share >= 0.95),
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
            wait(task.device)
            began, done = time.perf_counter(), 0
        else:
            done += number > 1
    wait(task.device)
    return done * batch / (time.perf_counter() - began)


def scoring(args: argparse.Namespace) -> None:
    """Windows a second by precision and batch; long recordings in both modes."""
    from train.models.student import Student, variant
    from train.scoring.score import load
    from train.scoring.scorer import StudentScorer

    rng = np.random.default_rng(0)
    wave_T = 0.1 * rng.standard_normal((30 if args.small else 10_800) * SAMPLE_RATE, np.float32)
    for precision in ("fp32",) if args.device == "cpu" else ("fp32", "bf16"):
        how = (args.device, precision)
        small = StudentScorer(Student(variant("v2")).eval(), "v2", "random", *how)
        for name, model in {"v7": load("v7", *how), "v2": small}.items():
            for batch in (2,) if args.small else (8, 64, 256):
                waves_BT = wave_T[: batch * CROP_SAMPLES].reshape(batch, -1)
                work = partial(model.score_windows, list(waves_BT))
                taken = seconds_of(work, args.device, 1 if args.small else 3)
                hours = batch * CLIP_SECONDS / 3600 / taken
                tell(f"{name}, {precision}, batches of {batch}", f"{hours:.3g} h of audio a second")
            for samples in {30 * SAMPLE_RATE, len(wave_T)}:
                for mode in ("exact", "fast"):
                    began = time.perf_counter()
                    model.score(wave_T[:samples], SAMPLE_RATE, mode=mode)  # type: ignore[arg-type]
                    taken, length = time.perf_counter() - began, samples / SAMPLE_RATE
                    tell(f"{name}, {precision}, {mode}, {length:.0f} s", f"{taken:.2f} s")


# --- the recipe, pruning --------------------------------------------------------------------------


def processors(args: argparse.Namespace) -> None:
    """Each processor of the paper's recipe in one process, by groups, and the mixture of all."""
    from pipeline.render.processors import run
    from pipeline.render.processors.runtime import Runtime, use
    from tests.bench.processors import spread
    from tests.bench.stand_ins import stand_in_weights

    clips, repeat = (1, 1) if args.small else (48, 3)
    generator = torch.Generator().manual_seed(0)
    waves_BT = torch.randn(clips, CROP_SAMPLES, generator=generator).mul(0.1).numpy()
    with stand_in_weights(args.out.parent):
        recipe, said = gpu_data.paper_recipe(args, clips)
        for line in said:
            tell("the paper's recipe", line)
        use(Runtime(args.device, recipe.precision))
        for option in (option for stage in recipe.stages for option in stage.choices):
            work = partial(run, option.use.kind, waves_BT, spread(option.use, clips))
            taken = seconds_of(work, args.device, repeat)
            times = clips * CLIP_SECONDS / taken
            tell(f"{option.use.kind}, groups of {clips}, a process", f"{times:.3g} x real time")


def recipe(args: argparse.Namespace) -> None:
    """The paper's whole recipe: what ``estimate`` measures with a process a core."""
    from data_specs.strict import load
    from pipeline.cluster.rates import Rates
    from tests.bench.stand_ins import stand_in_weights

    workers, group = gpu_data.workers(args), 2 if args.small else 24
    rates = args.out / "rates.yaml"
    with stand_in_weights(args.out.parent):
        path = gpu_data.write_recipe(gpu_data.paper_recipe(args, group)[0], args.out / "paper.yaml")
        words = ["pipeline", "estimate", path, *gpu_data.corpora(args), "--save", rates]
        words += ["--workers", workers, "--measure", 2 * group]
        words += ["--device", args.device, "--teacher-device", args.device]
        words += [] if args.device == "cpu" else ["--gpus", 1]
        subprocess.run(command(*words), check=True)
    found = load(Rates, rates)
    stages = found.core_s | {f"{name} (GPU)": s for name, s in found.gpu_s.items()}
    whole = sum(stages.values())
    times = workers / whole * CLIP_SECONDS
    met = _goal(args, times >= 1000)
    tell(f"the whole recipe, {workers} processes", f"{times:.4g} x real time", "1000", met)
    for name, seconds in sorted(stages.items(), key=lambda one: -one[1])[:4]:
        tell(f"of a sample's {whole:.3g} s", f"{name} {seconds / whole:.0%}")


def gates(args: argparse.Namespace) -> None:
    """A joint update of the weights, the gates and the budget of XLS-R's encoders."""
    device = torch.device(args.device)
    for size, layer in (("300m", 1),) if args.small else (("300m", 5), ("1b", 10)):
        clips, samples = (1, SAMPLE_RATE) if args.small else (16, CROP_SAMPLES)
        update = _gated_update(size, layer, 0.1 * torch.randn(clips, samples, device=device))
        seconds = seconds_of(update, device, 1 if args.small else 5)
        peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
        said = f"{seconds:.3g} s, {clips / seconds:.3g} clips/s, peak {peak:.1f} GB"
        tell(f"a joint gated update, {size} cut at {layer}, {clips} clips", said)


def _gated_update(size: str, layer: int, waves_BT: Tensor) -> Callable[[], object]:
    """Against the whole model's last layer, in bf16 on a GPU, to half of the multiply-adds."""
    from torch.func import functional_call

    from tests.bench.prune import random_subject
    from train.pruning.gates import Budget, gated
    from train.pruning.units import layout_of

    kind = waves_BT.device.type
    encoder = random_subject(size, layer, str(waves_BT.device)).network.encoder
    dense = copy.deepcopy(encoder).requires_grad_(False)
    layout = layout_of(encoder)
    budget = Budget(layout, layout.macs(layout.counts), 0.5, 100).to(waves_BT.device)
    groups: list[dict[str, Any]] = [{"params": list(encoder.parameters()), "lr": 1e-5}]
    groups += budget.groups(0.05)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)

    def update() -> None:
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            with torch.no_grad():
                (theirs_BFC,) = dense(waves_BT)
            tensors = gated(encoder, layout, budget.drawn())
            (ours_BFC,) = functional_call(encoder, tensors, (waves_BT,))
        loss = (ours_BFC.float() - theirs_BFC.float()).square().mean() + budget.loss(1)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()

    return update


STEPS = {
    f.__name__: f for f in (teacher, shards, resume, training, scoring, processors, recipe, gates)
}


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
