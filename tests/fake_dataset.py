"""A small dataset folder in the shards' format, made without corpora, Ray or a teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_specs.recipe import load_recipe
from data_specs.strict import digest
from tests.train_helpers import flac_bytes, record, tone_pcm, write_tar


def fake_plan(index: int) -> dict[str, Any]:
    """A plan that is drawn as the demo recipe asks, near enough for a picture."""
    rng = np.random.default_rng(index)
    steps: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        gains = {f"gain_{f}_hz_db": rng.uniform(-8, 8) for f in (100, 300, 1000, 3000, 7000)}
        steps.append({"stage": "colour", "kind": "equalise", "params": gains})
    before = len(steps)
    gate = {"reduction": rng.uniform(0.7, 1), "stationary": float(rng.integers(2))}
    kind, params = ("spectral_gating", gate) if rng.random() < 0.35 else ("none", {})
    steps.append({"stage": "enhance", "kind": kind, "params": params})
    if rng.random() < 0.5:
        opus = {
            "bitrate_bps": float(np.exp(rng.uniform(np.log(6e3), np.log(64e3)))),
            "frame_ms": float(rng.choice([10, 20, 40, 60])),
            "complexity": float(rng.choice([0, 2, 5, 8, 10])),
        }
        steps.append({"stage": "codec", "kind": "opus", "params": opus})
    noisy, roomy = rng.random() < 0.67, rng.random() < 0.33
    noise = {"path": "hum-001.flac", "start_sample": 7, "snr_db": rng.normal(12, 9)}
    return {
        "version": 1,
        "index": index,
        "speech": {
            "corpus": "speech",
            "path": "en/slt/3.flac",
            "start_sample": 12_345,
            "speaker": "slt <b>",
            "language": "en",
        },
        "speed": rng.uniform(0.9, 1.1),
        "level_dbfs": rng.uniform(-35, -15),
        "room": {"corpus": "rooms", "path": "room-003.flac"} if roomy else None,
        "noise": {"corpus": "noise", **noise} if noisy else None,
        "speech_steps": before,
        "steps": steps,
    }


def write_dataset(folder: Path, shards: int = 2, samples: int = 5) -> Path:
    """Write ``shards`` shards of ``samples`` samples each, with their records and description."""
    folder.mkdir(parents=True, exist_ok=True)
    flac = flac_bytes(tone_pcm(0))
    for shard in range(shards):
        members: list[tuple[str, bytes]] = []
        for index in range(shard * samples, (shard + 1) * samples):
            members += [(f"{index:09d}.flac", flac), (f"{index:09d}.json", fake_record(index))]
        write_tar(folder / f"shard-{shard:06d}.tar", members, samples)
    about = {
        "format": 1,
        "recipe": load_recipe("demo").model_dump(mode="json"),
        "recipe_hash": "0123abcd" * 8,
        "teacher": "distillmos",
        "splits": {"speech": "train"},
        "identity": {},
        "manifests_sha256": {},
        "teacher_calibration_sha256": digest(None),
        "samples": shards * samples,
        "corpora": {"speech": "speech: 260 files, 0.74 h, 47 speakers"},
    }
    (folder / "dataset.json").write_text(json.dumps(about))
    return folder


def fake_record(index: int) -> bytes:
    rng = np.random.default_rng(index + 10**6)
    made = record(f"{index:09d}", float(np.clip(rng.normal(2.6, 0.7), 1, 5)), np.zeros(0, np.int16))
    return json.dumps(made | {"teacher": "distillmos", "plan": fake_plan(index)}).encode()
