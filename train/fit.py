"""The training loop: shards in, a trained student out. ``python -m train fit``.

Section IV-C: mean squared error on the teacher's MOS, AdamW, validation every N steps, the best
kept. ``--preset paper`` is the paper's setting; ``--preset fast`` (the default) reaches a small
student in minutes on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import numpy as np
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from data_specs.rated import RatedClip, read_rated
from data_specs.sample import CROP_SAMPLES
from data_specs.strict import digest
from train.files import load_checkpoint, require_same, save_checkpoint, write_atomically, write_text
from train.metrics import agreement
from train.models.calibration import Calibration
from train.models.memory import keep_freed_memory
from train.models.precision import resolve_precision
from train.models.student import Student, count, sha256_of, variant
from train.stream import (
    Batches,
    DatasetInfo,
    DecodedCache,
    Order,
    Shard,
    ShardSamples,
    cache_fits,
    list_shards,
    loader,
    read_dataset_info,
    to_waves,
)

DISTRIBUTION = "distill-mos-factory"
HOLD_OUT = 0.05
"""Share of the shards that validate where no ``--validation`` is given."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


class FitConfig(BaseModel):
    """Everything that decides what a run computes: a resumed run must have the same.

    Workers, threads, folders and the device are not in it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    student: str
    preset: str
    steps: Annotated[int, Field(ge=1)]
    batch: Annotated[int, Field(ge=2)]
    lr: Annotated[float, Field(gt=0)]
    schedule: Literal["constant", "cosine"]
    warmup: Annotated[int, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    clip_norm: Annotated[float, Field(ge=0)]
    ema: Annotated[float, Field(ge=0, lt=1)]
    precision: Literal["fp32", "bf16"]
    augment: bool
    seed: Annotated[int, Field(ge=0)]
    rated_share: Annotated[float, Field(ge=0, le=1)]
    buffer: Annotated[int, Field(ge=1)]
    validate_every: Annotated[int, Field(ge=1)]
    recipe_hash: str
    validation_hash: str
    rated_hash: str
    samples: int
    validation_samples: int
    rated_clips: int


PRESETS: dict[str, dict[str, Any]] = {
    # Section IV-C; PyTorch's default weight decay, because the paper gives none.
    "paper": {
        "steps": 250_000,
        "batch": 20,
        "lr": 2e-5,
        "schedule": "constant",
        "warmup": 0,
        "weight_decay": 0.01,
        "clip_norm": 0.0,
        "ema": 0.0,
        "precision": "fp32",
        "augment": False,
        "validate_every": 5000,
        "rated_share": 0.2,
    },
    # A hundred times the paper's rate with warm-up and cosine: 5000 steps instead of 250 000.
    "fast": {
        "steps": 5000,
        "batch": 20,
        "lr": 2e-3,
        "schedule": "cosine",
        "warmup": 200,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "ema": 0.999,
        "precision": "auto",
        "augment": True,
        "validate_every": 500,
        "rated_share": 0.2,
    },
}


@dataclass(frozen=True)
class Host:
    """How a run uses the machine; none of it changes what is computed on one machine type."""

    workers: int = 1
    device: str = "cpu"
    cache_gb: float = 4.0
    log_every: int = 50
    progress: bool = True


@dataclass(frozen=True)
class Sources:
    """What a run reads: the shards to train and validate on, and rated clips."""

    info: DatasetInfo
    shards: list[Shard]
    validation: list[Shard]
    rated: list[RatedClip]
    validation_hash: str


def open_sources(shards: Path, validation: Path | None, rated: Path | None) -> Sources:
    """Find shards and rated clips.

    Without a folder of validation shards the last 5 % of the shards (at least one) are held
    out. ``ValueError`` naming what is missing or damaged.
    """
    info, found = read_dataset_info(shards), list_shards(shards)
    clips = on_labels_scale(read_rated(rated) if rated else [], info.calibration)
    if validation is not None:
        held_info = read_dataset_info(validation)
        if held_info.teacher != info.teacher:
            raise ValueError(
                f"{validation}: labelled by {held_info.teacher!r}, but {shards} by "
                f"{info.teacher!r}: label both with one teacher"
            )
        return Sources(info, found, list_shards(validation), clips, held_info.recipe_hash)
    if len(found) < 2:
        raise ValueError(
            f"{shards}: holds one shard; holding one out for validation needs two: "
            "make more shards or give --validation"
        )
    held = max(1, round(len(found) * HOLD_OUT))
    return Sources(info, found[:-held], found[-held:], clips, info.recipe_hash)


def on_labels_scale(clips: Sequence[RatedClip], calibration: Calibration | None) -> list[RatedClip]:
    """Rated clips with their ratings on the scale of the teacher's labels (section IV-C).

    A rating goes through the inverse of the teacher's map to the clip's dataset. It stays what it
    is where the teacher has no such maps, or never saw that dataset (a warning names it).
    """
    if calibration is None:
        return list(clips)
    strange = sorted({clip.dataset for clip in clips} - calibration.datasets.keys())
    if strange:
        print(
            f"warning: the teacher was not trained on {', '.join(strange)}: ratings of these "
            "clips are taken as they are, though their scale may be another",
            file=sys.stderr,
        )
    return [_mapped(clip, calibration) for clip in clips]


def _mapped(clip: RatedClip, calibration: Calibration) -> RatedClip:
    if clip.dataset not in calibration.datasets:
        return clip
    return clip.model_copy(update={"mos": float(calibration.to_universal(clip.mos, clip.dataset))})


def make_config(
    student: str,
    sources: Sources,
    preset: str = "fast",
    device: str = "cpu",
    **changes: Any,
) -> FitConfig:
    """A preset with changes (those that are None are left out), for these sources.

    ``ValueError`` naming the field that is unknown or out of range.
    """
    variant(student)
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: known are {', '.join(PRESETS)}")
    values = PRESETS[preset] | {"seed": 0, "buffer": 4096}
    values |= {key: value for key, value in changes.items() if value is not None}
    dtype = resolve_precision(values["precision"], torch.device(device))
    values["precision"] = "bf16" if dtype == torch.bfloat16 else "fp32"
    if not sources.rated:
        if changes.get("rated_share"):
            raise ValueError("--rated-share needs rated clips: give --rated labels.csv")
        values["rated_share"] = 0.0
    return FitConfig(
        student=student,
        preset=preset,
        recipe_hash=sources.info.recipe_hash,
        validation_hash=sources.validation_hash,
        rated_hash=digest([[clip.dataset, clip.path.name, clip.mos] for clip in sources.rated]),
        samples=sum(shard.samples for shard in sources.shards),
        validation_samples=sum(shard.samples for shard in sources.validation),
        rated_clips=len(sources.rated),
        **values,
    )


def learning_rate(config: FitConfig, step: int) -> float:
    """Learning rate of update ``step`` (0-based): linear warm-up, then constant or half a cosine.

    The cosine ends at a hundredth of the peak.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def augment(waves_BT: Tensor, seed: int, step: int) -> Tensor:
    """Flip the polarity of half of the waves and rotate each by a random time.

    Neither changes what a listener, or the magnitude-compressed spectrum's statistics, would say.
    A pure function of (waves, seed, step).
    """
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 1_000, step])))
    signs = generator.integers(0, 2, len(waves_BT)) * 2 - 1
    shifts = generator.integers(0, waves_BT.shape[1], len(waves_BT))
    rotated = [wave.roll(int(shift)) for wave, shift in zip(waves_BT, shifts, strict=True)]
    signs_B1 = torch.as_tensor(signs, dtype=waves_BT.dtype, device=waves_BT.device)[:, None]
    return torch.stack(rotated) * signs_B1


class Trainer:
    """A student, its averaged copy and its optimiser: everything that a checkpoint holds."""

    def __init__(self, config: FitConfig, device: str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        torch.manual_seed(config.seed)
        student = Student(variant(config.student)).to(self.device)
        student.convolutions.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.student = student
        self.average = copy.deepcopy(student).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            student.parameters(),
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.step = 0
        self.best: dict[str, Any] | None = None

    def update(self, pcm_BT: Tensor, mos_B: Tensor) -> Tensor:
        """One optimiser step on a batch; returns the loss (a scalar tensor, MOS squared)."""
        waves_BT = to_waves(pcm_BT, self.device)
        if self.config.augment:
            waves_BT = augment(waves_BT, self.config.seed, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.student.train()
        # PyTorch's fused attention is slow backwards on a CPU at a student's size (41 of 250 ms).
        with self.autocast(), sdpa_kernel(SDPBackend.MATH):
            predicted_B = self.student(waves_BT)
        loss = functional.mse_loss(predicted_B, mos_B.to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        if self.config.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.step += 1
        self._follow()
        return loss.detach()

    def autocast(self) -> torch.autocast:
        """The run's precision as a context."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"
        )

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the averaged weights (and batch-norm statistics) towards the student's."""
        # A short memory at first, so that the random start is forgotten.
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        if not self.config.ema:
            decay = 0.0
        ours, theirs = self.average.state_dict(), self.student.state_dict()
        floating = [name for name, tensor in ours.items() if tensor.is_floating_point()]
        torch._foreach_lerp_(
            [ours[name] for name in floating],
            [theirs[name] for name in floating],
            1 - decay,
        )
        for name in ours.keys() - set(floating):
            ours[name].copy_(theirs[name])

    @torch.inference_mode()
    def validate(self, samples: ShardSamples) -> dict[str, float | None]:
        """Loss, PCC and RMSE of the averaged weights over all samples."""
        truth, predicted = [], []
        size = self.config.batch
        for start in range(0, len(samples), size):
            numbers = range(start, min(start + size, len(samples)))
            read = [samples.read(number) for number in numbers]
            pcm_BT = torch.from_numpy(np.stack([pcm for pcm, _ in read]))
            with self.autocast():
                predicted_B = self.average(to_waves(pcm_BT, self.device))
            predicted += predicted_B.tolist()
            truth += [mos for _, mos in read]
        result = agreement(truth, predicted)
        loss = None if result.rmse is None else result.rmse**2
        return {
            "loss": loss,
            "pcc": result.pcc,
            "spearman": result.spearman,
            "rmse": result.rmse,
        }

    def checkpoint(self, order: Order) -> dict[str, Any]:
        """All state, as tensors and plain values; ``epoch`` and ``taken`` are for the reader."""
        epoch, taken = order.position(self.step)
        return {
            "config": self.config.model_dump(),
            "step": self.step,
            "epoch": epoch,
            "taken": taken,
            "student": self.student.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "best": self.best,
        }

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint; ``ValueError`` naming the field that is not the same."""
        content = load_checkpoint(path)
        require_same(path.parent, content.get("config", {}), self.config.model_dump())
        self.student.load_state_dict(content["student"])
        self.average.load_state_dict(content["average"])
        self.optimizer.load_state_dict(content["optimizer"])
        torch.set_rng_state(content["rng"])
        self.step, self.best = content["step"], content["best"]

    def keep_if_best(self, metrics: dict[str, float | None], out: Path) -> bool:
        """Write ``best.pt`` if the validation loss is the lowest so far."""
        loss, lowest = metrics["loss"], self.best["loss"] if self.best else None
        if loss is None or not math.isfinite(loss) or (lowest is not None and loss >= lowest):
            return False
        self.best = {"step": self.step, **metrics}
        save_checkpoint(
            out / "best.pt",
            {
                "student": self.config.student,
                "student_config": self.student.config.model_dump(),
                "recipe_hash": self.config.recipe_hash,
                "weights": self.average.state_dict(),
                "metrics": self.best,
            },
        )
        return True


class RunLog:
    """``log.jsonl`` and TensorBoard, continued at a step: lines after it are dropped."""

    def __init__(self, out: Path, step: int) -> None:
        self.path = out / "log.jsonl"
        kept = [line for line in _lines(self.path) if json.loads(line)["step"] <= step]
        write_text(self.path, "".join(line + "\n" for line in kept))
        self._board = SummaryWriter(str(out / "tb"), purge_step=step + 1 if step else None)

    def write(self, step: int, values: dict[str, float | None]) -> None:
        """Log values at a step (updates done)."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush TensorBoard."""
        self._board.close()


def _lines(path: Path) -> list[str]:
    """The whole lines of a log: a last one that was cut by a crash is left out."""
    if not path.is_file():
        return []
    return [line for line in path.read_text("utf-8").split("\n")[:-1] if line.endswith("}")]


class Meter:
    """Mean loss, samples a second and the share of time spent waiting for data, since ``reset``."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new interval."""
        self.losses: list[Tensor] = []
        self.samples, self.waited, self.start = 0, 0.0, time.monotonic()

    def read(self) -> dict[str, float | None]:
        """The interval's figures."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        loss = float(torch.stack(self.losses).mean()) if self.losses else None
        return {
            "loss": loss,
            "samples_per_s": self.samples / seconds,
            "data_wait_share": self.waited / seconds,
        }


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets: the loop ends after the update it is in.

    A second Ctrl-C interrupts at once.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fit(config: FitConfig, sources: Sources, out: Path, host: Host | None = None) -> bool:
    """Train, or continue the run in ``out``; True when all steps are done.

    False after Ctrl-C or SIGTERM: ``last.pt`` is written, and the same call continues. Ends by
    writing ``model.safetensors`` and ``model.json``. ``ValueError`` if ``out`` holds a run with
    another configuration, or a shard is damaged.
    """
    host = host or Host()
    keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, host.device)
    if (out / "last.pt").is_file():
        trainer.restore(out / "last.pt")
    write_text(out / "config.json", json.dumps(config.model_dump(), indent=2) + "\n")
    train_samples, validation = _samples(sources, host)
    order = Order(
        tuple(shard.samples for shard in sources.shards),
        len(sources.rated),
        config.seed,
        config.batch,
        config.rated_share,
        config.buffer,
    )
    log = RunLog(out, trainer.step)
    try:
        with stop_signals() as stop:
            batches = Batches(train_samples, order, sources.rated)
            _run(trainer, batches, validation, out, host, log, stop)
    finally:
        log.close()
    if trainer.step < config.steps:
        return False
    export(out, config, sources.info)
    return True


def _samples(sources: Sources, host: Host) -> tuple[ShardSamples, ShardSamples]:
    """Training and validation samples; decoded ones stay in memory if all of them fit."""
    counts = [sum(shard.samples for shard in part) for part in (sources.shards, sources.validation)]
    fits = cache_fits(sum(counts), host.cache_gb)
    caches = [DecodedCache(number) if fits and number else None for number in counts]
    return ShardSamples(sources.shards, caches[0]), ShardSamples(sources.validation, caches[1])


def _run(
    trainer: Trainer,
    batches: Batches,
    validation: ShardSamples,
    out: Path,
    host: Host,
    log: RunLog,
    stop: threading.Event,
) -> None:
    config, meter = trainer.config, Meter()
    bar = tqdm(
        total=config.steps,
        initial=trainer.step,
        unit="step",
        desc=f"fit {config.student}",
        disable=not host.progress,
    )
    feed = iter(loader(batches, trainer.step, config.steps, host.workers))
    with bar:
        while trainer.step < config.steps and not stop.is_set():
            asked = time.monotonic()
            pcm_BT, mos_B = next(feed)
            meter.waited += time.monotonic() - asked
            meter.losses.append(trainer.update(pcm_BT, mos_B))
            meter.samples += len(mos_B)
            bar.update()
            last = trainer.step == config.steps
            if trainer.step % host.log_every == 0 or last:
                _log_interval(trainer, meter, log, bar)
            if trainer.step % config.validate_every == 0 or last:
                _validate(trainer, batches.order, validation, out, log, bar)
                meter.reset()
    if trainer.step < config.steps:
        save_checkpoint(out / "last.pt", trainer.checkpoint(batches.order))


def _log_interval(trainer: Trainer, meter: Meter, log: RunLog, bar: tqdm[Any]) -> None:
    values = meter.read()
    if values["loss"] is not None and not math.isfinite(values["loss"]):
        raise ValueError(f"the loss is {values['loss']} at step {trainer.step}: lower --lr")
    rate, wait = values["samples_per_s"] or 0.0, values["data_wait_share"] or 0.0
    bar.set_postfix_str(f"{rate:.0f} samples/s, data wait {wait:.0%}, loss {values['loss']:.3f}")
    log.write(trainer.step, {**values, "lr": learning_rate(trainer.config, trainer.step - 1)})
    meter.reset()


def _validate(
    trainer: Trainer,
    order: Order,
    validation: ShardSamples,
    out: Path,
    log: RunLog,
    bar: tqdm[Any],
) -> None:
    """Validate, keep the best, and write ``last.pt``."""
    metrics = trainer.validate(validation)
    best = trainer.keep_if_best(metrics, out)
    # The log first: a run that is continued from here drops what was logged after it, not before.
    log.write(trainer.step, {f"validation_{name}": value for name, value in metrics.items()})
    save_checkpoint(out / "last.pt", trainer.checkpoint(order))
    figures = ", ".join(f"{name} {value or math.nan:.3f}" for name, value in metrics.items())
    if not bar.disable:
        bar.write(
            f"step {trainer.step}: {figures}{' (best)' if best else ''}",
            file=sys.stderr,
        )


def export(out: Path, config: FitConfig, info: DatasetInfo) -> None:
    """Write ``model.safetensors`` and ``model.json`` from the run's best weights."""
    if not (out / "best.pt").is_file():
        raise ValueError(f"{out}: no validation gave a finite loss, so there is no best model")
    best = load_checkpoint(out / "best.pt")
    weights = {name: tensor.contiguous() for name, tensor in best["weights"].items()}
    path = out / "model.safetensors"
    parameters, macs = count(variant(config.student))
    write_model(path, weights)
    about = {
        "student": config.student,
        "config": best["student_config"],
        "parameters": parameters,
        "macs_per_clip": macs,
        "recipe_hash": config.recipe_hash,
        "teacher": info.teacher,
        "metrics": best["metrics"],
        "fit": config.model_dump(),
        "weights_sha256": sha256_of(path),
        "version": importlib.metadata.version(DISTRIBUTION) if _is_installed() else "source",
    }
    write_text(out / "model.json", json.dumps(about, indent=2) + "\n")


def write_model(path: Path, weights: dict[str, Tensor]) -> None:
    """Safetensors file, atomically."""
    write_atomically(path, lambda temporary: safetensors.torch.save_file(weights, temporary))


def _is_installed() -> bool:
    return any(d.metadata["Name"] == DISTRIBUTION for d in importlib.metadata.distributions())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m train fit``."""
    parser.add_argument(
        "--student", required=True, help="v1 to v10 (see: python -m train variants)"
    )
    parser.add_argument("--shards", type=Path, required=True, help="folder that the pipeline wrote")
    parser.add_argument("--validation", type=Path, help="shards to validate on (default: hold out)")
    parser.add_argument("--rated", type=Path, help="CSV of rated clips to mix in")
    parser.add_argument(
        "--out", type=Path, required=True, help="run folder; continued if it exists"
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="fast")
    for name, kind in (
        ("steps", int),
        ("batch", int),
        ("warmup", int),
        ("validate-every", int),
    ):
        parser.add_argument(f"--{name}", type=kind, help="default: the preset's")
    for name in ("lr", "weight-decay", "clip-norm", "ema", "rated-share"):
        parser.add_argument(f"--{name}", type=float, help="default: the preset's")
    parser.add_argument("--schedule", choices=("constant", "cosine"))
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--augment", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--buffer", type=int, help="places a sample may move in the shuffle")
    parser.add_argument("--workers", type=int, default=1, help="decoding processes (0: none)")
    parser.add_argument("--threads", type=int, help="of the training process (default: all cores)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--cache-gb", type=float, default=4.0, help="decoded samples kept in memory"
    )
    parser.add_argument("--log-every", type=int, default=50, help="steps")
    parser.add_argument("--resume", action="store_true", help="refuse to start a new run")


def run(args: argparse.Namespace) -> int:
    """``python -m train fit``; returns the exit code."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.resume and not (args.out / "last.pt").is_file():
        raise ValueError(f"{args.out}: no last.pt to resume from")
    sources = open_sources(args.shards, args.validation, args.rated)
    fields = set(FitConfig.model_fields) & set(vars(args)) - {"student", "preset"}
    changes = {name: getattr(args, name) for name in fields}
    config = make_config(args.student, sources, args.preset, args.device, **changes)
    parameters, macs = count(variant(config.student))
    print(
        f"{config.student}: {parameters:,} parameters, {macs / 1e6:.0f} M multiply-adds a clip; "
        f"{config.samples} samples, {config.validation_samples} for validation "
        f"({CROP_SAMPLES / 16_000:.2f} s each), {config.precision}",
        flush=True,
    )
    host = Host(args.workers, args.device, args.cache_gb, args.log_every)
    if not fit(config, sources, args.out, host):
        print(f"stopped; run the same command again to continue: {args.out}/last.pt")
        return INTERRUPTED
    print(f"done: {args.out / 'model.safetensors'}")
    return 0
