"""``python -m tests.bench teacher``: the teacher's speed and the memory that loading it takes.

The named baseline is the way of the published ``xls-r-sqa`` package: one clip at a time, float32,
one layer more than is read, every hidden state kept.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError
from data_specs.io.hardware import use_threads
from data_specs.io.progress import progress_bar
from data_specs.sample import CROP_SAMPLES, SAMPLE_RATE
from tests.bench import device_name, matrix_rate, run_parts, seconds_of
from tests.bench.random_xlsr import LAYERS, config_of, write_checkpoint
from tests.memory import peak_bytes, peak_reset
from train.data.shards import list_shards
from train.data.stream import ShardSamples, to_waves
from train.models.features import Floats
from train.models.front_end import centre_crop, load_xlsr
from train.models.head_teacher import HeadTeacher, published_head
from train.models.precision import resolve_precision
from train.models.teacher import Teacher, load_teacher
from train.models.xlsr import Encoder, flops, load_encoder, read_config

CLIP_SECONDS = CROP_SAMPLES / SAMPLE_RATE
HEADS = {
    ("300m", 5): "xls-r-300m/model_300m_lay5_subset.pt",
    ("1b", 10): "xls-r-1b/model_1b_lay10_subset.pt",
    ("2b", 10): "xls-r-2b/model_2b_lay10_subset.pt",
}
MATRIX = 4096
"""Side of the square matrices whose product is the device's measured matrix rate."""

Score = Callable[[Tensor], object]


def reference_scorer(folder: Path, layer: int, head: torch.nn.Module, device: str) -> Score:
    """Clips to logits the way of the published package (``xls_r_sqa.e2e_model``)."""
    from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Model

    normalise = Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=SAMPLE_RATE, padding_value=0.0, do_normalize=True,
        return_attention_mask=True,
    )  # fmt: skip
    model: Any = Wav2Vec2Model.from_pretrained(folder)
    model.to(device).eval()
    head = head.to(device)

    @torch.inference_mode()
    def score(waves_BT: Tensor) -> Tensor:
        logits = []
        for wave_T in waves_BT:
            given = normalise(wave_T.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt")
            out = model(given["input_values"].to(device), output_hidden_states=True)
            logits.append(head(centre_crop(out.hidden_states[layer])).cpu())
        return torch.cat(logits)

    return score


def our_teacher(folder: Path, layer: int, file: str, device: str, precision: str) -> HeadTeacher:
    """The same weights as a labelling teacher."""
    front_end = load_xlsr("bench", folder, [layer], device, precision)
    head, sha256 = published_head(file, front_end.channels)
    return HeadTeacher("bench", front_end, head, sha256)


def speed(options: argparse.Namespace) -> None:
    """Clips a second of both ways, and how near ours comes to the device's matrix rate."""
    layer = LAYERS[options.size]
    file = HEADS[options.size, layer]
    with _checkpoint(options.size, layer + 1) as folder:
        teacher = our_teacher(folder, layer, file, options.device, options.precision)
        head, _ = published_head(file, teacher.front_end.channels)
        reference = reference_scorer(folder, layer, head, options.device)
        waves_BT = _waves(options.clips)
        few_BT = waves_BT[: options.reference_clips]
        theirs = len(few_BT) / seconds_of(lambda: reference(few_BT), options.device, options.repeat)
        ours = len(waves_BT) / seconds_of(
            lambda: teacher.score(waves_BT), options.device, options.repeat
        )
        _tell_speed(options, folder, layer, theirs, ours)
        mos_B = 1 + 4 * torch.sigmoid(torch.as_tensor(reference(few_BT)))
        worst = float(np.abs(mos_B.numpy() - teacher.score(few_BT)[0]).max())
        print(f"largest difference between the two ways: {worst:.4f} MOS ({len(few_BT)} clips)")


def _tell_speed(
    options: argparse.Namespace, folder: Path, layer: int, theirs: float, ours: float
) -> None:
    parts = flops(read_config(folder), layer, CROP_SAMPLES)
    dtype = resolve_precision(options.precision, torch.device(options.device))
    rate, fp32_rate = (matrix_rate(options.device, t, MATRIX) for t in (dtype, torch.float32))
    where, named = device_name(options.device), str(dtype).removeprefix("torch.")
    print(f"XLS-R {options.size}, layer {layer}, random weights, {where}, {named}")
    print(f"  one clip at a time, fp32, {layer + 1} layers: {_rate(theirs)}")
    print(f"  ours: {_rate(ours)}, {ours / theirs:.2f} times")
    a_second = ", ".join(f"{name} {n / CLIP_SECONDS / 1e9:.1f}" for name, n in parts.items())
    total = sum(parts.values())
    print(f"  GFLOP a second of audio: {total / CLIP_SECONDS / 1e9:.1f} ({a_second})")
    print(
        f"  {ours * total / 1e9:.0f} GFLOP/s, {ours * total / rate:.0%} of this device's "
        f"{rate / 1e9:.0f} (a product of {MATRIX} x {MATRIX} matrices; in fp32 "
        f"{fp32_rate / 1e9:.0f}: no way gains more than {rate / fp32_rate:.1f} times by precision)"
    )


def _rate(clips_per_s: float) -> str:
    return f"{clips_per_s:.3f} clips/s ({clips_per_s * CLIP_SECONDS:.1f} x real time)"


def memory(options: argparse.Namespace) -> None:
    """Peak memory of loading the cut from a sharded checkpoint of ``--full-layers`` layers."""
    layer = LAYERS[options.size]
    with _checkpoint(options.size, options.full_layers) as folder:
        on_disk = sum(path.stat().st_size for path in folder.iterdir())
        code = "from tests.bench.teacher import tell_memory; import sys; tell_memory(*sys.argv[1:])"
        print(
            f"XLS-R {options.size}, a checkpoint of {options.full_layers} layers, "
            f"{on_disk / 1e9:.2f} GB in {len(list(folder.glob('*.safetensors')))} shards",
            flush=True,
        )
        for precision in ("fp32", "bf16"):
            argv = [sys.executable, "-c", code, str(folder), str(layer), precision]
            subprocess.run(argv, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def tell_memory(folder: str, layer: str, precision: str) -> None:
    """In a process of its own: what loading adds to the memory that it holds at most."""
    dtype = resolve_precision(precision, torch.device("cpu"))
    Encoder(config_of("300m", 1), [1])  # imports transformers, which is no part of it
    before = peak_reset()
    encoder, _ = load_encoder(Path(folder), [int(layer)], dtype)
    size = sum(parameter.nbytes for parameter in encoder.parameters())
    peak = peak_bytes() - before
    count = sum(parameter.numel() for parameter in encoder.parameters())
    print(
        f"  cut at layer {layer} in {precision}: {count / 1e6:.1f} M parameters, {size / 1e9:.2f} "
        f"GB; peak while loading {peak / 1e9:.2f} GB, {peak / size:.2f} times"
    )


def precision(options: argparse.Namespace) -> None:
    """What bf16 does to labels: ``--teacher`` by name, or random XLS-R weights under a real head.

    With random weights a MOS says little: the difference is also told in units of the logits'
    spread over the clips.
    """
    if options.shards is None:
        raise UserError("precision needs clips: give --shards DIR")
    waves_BT = _clips(options.shards, options.clips)
    if options.teacher:
        pair = [load_teacher(options.teacher, options.device, p) for p in ("fp32", "bf16")]
        _tell_precision(options.teacher, waves_BT, *pair)
        return
    layer = LAYERS[options.size]
    file = HEADS[options.size, layer]
    with _checkpoint(options.size, layer + 1) as folder:
        both = [our_teacher(folder, layer, file, options.device, p) for p in ("fp32", "bf16")]
        _tell_precision(f"XLS-R {options.size}, random weights", waves_BT, *both)


def _tell_precision(name: str, waves_BT: Tensor, exact: Teacher, rounded: Teacher) -> None:
    score = [_scored(teacher, waves_BT) for teacher in (exact, rounded)]
    mos_B = np.abs(score[0][0] - score[1][0])
    low, high = score[0][0].min(), score[0][0].max()
    print(f"{name}: {len(mos_B)} clips, MOS in fp32 {low:.2f} to {high:.2f}")
    print(f"  |bf16 - fp32|, MOS: {_quantiles(mos_B)}")
    exact_B, rounded_B = score[0][1], score[1][1]
    if exact_B is not None and rounded_B is not None:
        spread = float(exact_B.std())
        print(
            f"  |bf16 - fp32|, logit, in standard deviations ({spread:.4f}) over the clips: "
            f"{_quantiles(np.abs(exact_B - rounded_B) / spread)}"
        )


def _scored(teacher: Teacher, waves_BT: Tensor) -> tuple[Floats, Floats | None]:
    mos, logits = [], []
    for part_BT in progress_bar(torch.split(waves_BT, 10), desc=teacher.name, unit="batch"):
        mos_B, logit_B = teacher.score(part_BT)
        mos.append(mos_B)
        logits += [] if logit_B is None else [logit_B]
    return np.concatenate(mos), np.concatenate(logits) if logits else None


def _quantiles(values: Floats) -> str:
    median, most = np.quantile(values, (0.5, 0.99))
    return f"median {median:.5f}, 99th percentile {most:.5f}, largest {values.max():.5f}"


def _clips(folder: Path, count: int) -> Tensor:
    samples = ShardSamples(list_shards(folder))
    if len(samples) < count:
        raise UserError(f"{folder}: holds {len(samples)} samples, --clips asks for {count}")
    pcm_BT = np.stack([samples.read(number)[0] for number in range(count)])
    return to_waves(torch.from_numpy(pcm_BT), torch.device("cpu"))


def _waves(clips: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 0.1 * torch.randn(clips, CROP_SAMPLES, generator=generator)


@contextmanager
def _checkpoint(size: str, layers: int) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="xls-r-") as folder:
        yield write_checkpoint(Path(folder), config_of(size, layers))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m tests.bench teacher``."""
    parser.add_argument("what", nargs="*", default=["speed"], help="speed, memory, precision")
    parser.add_argument("--size", choices=sorted(LAYERS), default="2b")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--reference-clips", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--shards", type=path_here, help="clips for precision")
    parser.add_argument("--teacher", help="for precision (default: random XLS-R weights)")
    parser.add_argument("--full-layers", type=int, default=48, help="of the checkpoint, for memory")


def run(args: argparse.Namespace) -> int:
    """``python -m tests.bench teacher``; returns the exit code."""
    use_threads(args.threads)
    parts = {"speed": speed, "memory": memory, "precision": precision}
    return run_parts(args.what, {name: partial(part, args) for name, part in parts.items()})
