"""``python -m tests.bench prune``: what a round of pruning takes at the teacher's full size.

XLS-R of the real shape, cut at its layer, with random weights (speed and memory do not depend on
what was learnt) and made-up clips: scores are gathered, the lowest selected and masked, then it is
updated, by the code that ``python -m train prune`` runs. The estimate for a whole run counts the
operations of the network, three times forward a step, at the rate that ``--gpu-tflops`` says.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from data_specs.io.hardware import keep_freed_memory, use_threads
from data_specs.sample import CROP_SAMPLES
from tests.bench import device_name, wait
from tests.bench.random_xlsr import LAYERS, config_of
from tests.memory import peak_bytes, peak_reset
from train.data.stream import Batch, batch_of
from train.models.calibration import Affine
from train.models.head import HeadConfig, build_head
from train.models.precision import resolve_precision
from train.models.xlsr import Encoder, flops
from train.pruning.config import SIZES, PruneConfig
from train.pruning.prune import Pruner
from train.pruning.select import schedule, weights_at
from train.pruning.subject import Subject, TeacherNetwork

GPU_TFLOPS = 400.0
"""Two fifths of what an H100 (SXM) does in bf16 by its data sheet, without sparsity."""

BACKWARD = 3
"""A step costs so many times the forward pass: backward computes two gradients a product."""

STATE_BYTES = 4 + 4 + 4 + 8 + 1
"""A weight, its gradient, its score's average, AdamW's two moments, its mask."""


@dataclass
class Clock:
    """Seconds and peak memory of named phases."""

    device: torch.device
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    def time(self, name: str, work: Callable[[], object]) -> None:
        """Do it, and keep what it took."""
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            wait(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            peak_reset()
        began = time.perf_counter()
        work()
        wait(self.device)
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)
        peak = torch.cuda.max_memory_allocated(self.device) if on_cuda else peak_bytes()
        self.peaks[name] = max(peak, self.peaks.get(name, 0))

    def mean(self, name: str) -> float:
        """Seconds a time."""
        return sum(self.seconds[name]) / len(self.seconds[name])

    def tell(self) -> None:
        """Print a line a phase."""
        for name, seconds in self.seconds.items():
            print(
                f"  {name:22} {self.mean(name):8.2f} s (mean of {len(seconds)}), peak "
                f"{self.peaks[name] / 1e9:.2f} GB"
            )


def random_subject(size: str, layer: int, device: str) -> Subject:
    """A teacher of that shape with random weights that keep the variance."""
    config = config_of(size, layer)
    with torch.device("meta"):
        encoder = Encoder(config, [layer])
    encoder = encoder.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1 / math.sqrt(math.prod(parameter.shape[1:])))
            else:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
    head = build_head(HeadConfig(features=config.hidden_size)).to(device)
    return Subject(TeacherNetwork(encoder, head, Affine()), f"xlsr-{size}-l{layer}", "random")


def random_batch(clips: int) -> Batch:
    """Noise with made-up ratings."""
    generator = torch.Generator().manual_seed(1)
    noise_BT = 3000 * torch.randn(clips, CROP_SAMPLES, generator=generator)
    mos_B = (1 + 4 * torch.rand(clips, generator=generator)).tolist()
    return batch_of(noise_BT.to(torch.int16), mos_B, [CROP_SAMPLES] * clips)


def _update(pruner: Pruner, batch: Batch, clock: Clock) -> None:
    """What ``Pruner.update`` does, timed apart."""
    clock.time("forward and backward", lambda: pruner.gradients(batch))
    if pruner.scores:
        scores = pruner.scores
        clock.time("scoring", lambda: scores.gather(pruner.network))
    clock.time("optimiser's step", pruner.optimizer.step)
    pruner.step += 1


def _require_held(pruner: Pruner) -> None:
    parameters = dict(pruner.network.named_parameters())
    for name, mask in pruner.masks.items():
        if bool(parameters[name].detach()[~mask].any()):
            raise RuntimeError(f"{name}: a dead weight is not zero")


def _estimate(args: argparse.Namespace, pruner: Pruner, clock: Clock) -> None:
    """A whole run down to the smallest default size: operations, hours, memory."""
    paper = PruneConfig(what="encoder")
    left = schedule(pruner.total, paper.rate, paper.rate_of, weights_at(SIZES[-1], pruner.total))
    rounds, clips = len(left), len(left) * paper.steps * paper.batch
    forward = sum(flops(config_of(args.size), LAYERS[args.size], CROP_SAMPLES).values())
    operations = BACKWARD * forward * clips
    print(
        f"a run to {SIZES[-1]:g} %: {rounds - 1} rounds, {rounds * paper.steps} steps of "
        f"{paper.batch} clips of {CROP_SAMPLES / 16_000:.2f} s, {operations / 1e18:.2f} EFLOP"
    )
    print(
        f"  a GPU at {args.gpu_tflops:g} TFLOP/s: {operations / args.gpu_tflops / 3.6e15:.1f} h, "
        f"{STATE_BYTES * pruner.total / 1e9:.1f} GB of state and the activations of a micro-batch"
    )
    a_clip = clock.mean("forward and backward") / args.batch
    a_round = clock.mean("selection") + clock.mean("masking")
    a_step = clock.mean("optimiser's step") + clock.mean("scoring")
    hours = (clips * a_clip + rounds * (a_round + paper.steps * a_step)) / 3600
    rate = BACKWARD * forward / a_clip
    print(
        f"  on this device as measured ({rate / 1e9:.0f} GFLOP/s): {hours:.0f} h, of which "
        f"selection and masking {rounds * a_round / 3600:.1f} h"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m tests.bench prune``."""
    parser.add_argument("--size", choices=sorted(LAYERS), default="2b")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--micro-batch", type=int, default=1, help="clips at a time")
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--gpu-tflops", type=float, default=GPU_TFLOPS, help="for the estimate")


def run(args: argparse.Namespace) -> int:
    """One round on the whole network: scores, selection, masks, steps; returns the exit code."""
    keep_freed_memory()
    use_threads(args.threads)
    device = torch.device(args.device)
    layer, clock = LAYERS[args.size], Clock(device)
    dtype = resolve_precision(args.precision, device)
    config = PruneConfig(
        what="encoder",
        batch=args.batch,
        micro_batch=min(args.micro_batch, args.batch),
        precision="bf16" if dtype == torch.bfloat16 else "fp32",
    )
    made: list[Pruner] = []
    clock.time(
        "making it",
        lambda: made.append(Pruner(random_subject(args.size, layer, args.device), config)),
    )
    pruner, batch = made[0], random_batch(args.batch)
    _update(pruner, batch, clock)  # makes the optimiser's state, and the scores
    clock.time("selection", lambda: pruner.select(pruner.left[1]))
    clock.time("masking", pruner.hold)
    for _ in range(args.updates):
        _update(pruner, batch, clock)
    _require_held(pruner)
    print(
        f"XLS-R {args.size} cut at layer {layer}, random weights, {device_name(device)}, "
        f"{config.precision}: {pruner.total:,} of "
        f"{pruner.parameters:,} parameters can be pruned; {pruner.total - pruner.alive:,} removed; "
        f"{1 + args.updates} updates of {args.batch} clips, {config.micro_batch} at a time"
    )
    clock.tell()
    print(f"  peak of all: {max(clock.peaks.values()) / 1e9:.2f} GB")
    _estimate(args, pruner, clock)
    return 0
