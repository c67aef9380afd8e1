"""Shards as others read them: the stock ``webdataset`` package, and Hugging Face ``datasets``."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import pytest
import soundfile
import webdataset as wds

from data_specs.sample import sample_key
from pipeline.dataset.shards import commit
from tests.conftest import ROOT
from tests.pipeline.test_shards import HASH, row
from train.data.shards import list_shards
from train.data.stream import ShardSamples


class Seen(NamedTuple):
    """What a reader makes of a sample."""

    key: str
    pcm_sha256: str
    mos: float


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of three samples, by the pipeline's own writer."""
    made = tmp_path_factory.mktemp("shards")
    for shard in range(2):
        numbers = range(3 * shard, 3 * shard + 3)
        commit(made, shard, [row(i, mos=1.5 + i / 3) for i in numbers], HASH, 0.0)
    return made


@pytest.fixture(scope="module")
def ours(folder: Path) -> list[Seen]:
    samples = ShardSamples(list_shards(folder))
    found = []
    for number in range(len(samples)):
        pcm_T, mos = samples.read(number)
        record = samples.record(number)
        digest = sha256(pcm_T.tobytes()).hexdigest()
        assert record.pcm_sha256 == digest
        found.append(Seen(record.key, digest, mos))
    return found


def seen(key: str, flac: bytes, record: bytes) -> Seen:
    pcm_T, rate_hz = soundfile.read(io.BytesIO(flac), dtype="int16")
    assert rate_hz == 16_000
    return Seen(key, sha256(pcm_T.tobytes()).hexdigest(), json.loads(record)["mos"])


def test_webdataset(folder: Path, ours: list[Seen]) -> None:
    assert [sample.key for sample in ours] == [sample_key(index) for index in range(6)]
    assert len({sample.pcm_sha256 for sample in ours}) == 6
    urls = f"{folder}/shard-{{000000..000001}}.tar"
    read = wds.WebDataset(urls, shardshuffle=False)
    assert [seen(s["__key__"], s["flac"], s["json"]) for s in read] == ours
    decoded = wds.WebDataset(urls, shardshuffle=False).decode().to_tuple("__key__", "json")
    assert [(key, record["mos"]) for key, record in decoded] == [(s.key, s.mos) for s in ours]


STREAMED = """
import json, socket, sys

def refuse(*args):
    raise OSError("the network was asked for")

socket.socket.connect = socket.getaddrinfo = refuse
from datasets import Audio, load_dataset

read = load_dataset("webdataset", data_files=sys.argv[1:], split="train", streaming=True)
for sample in read.cast_column("flac", Audio(decode=False)):
    json.dump([sample["__key__"], sample["flac"]["bytes"].hex(), sample["json"]], sys.stdout)
    print()
"""


def test_hugging_face_datasets(folder: Path, ours: list[Seen], tmp_path: Path) -> None:
    if importlib.util.find_spec("datasets") is None:
        pytest.skip("datasets is not installed: pip install datasets")
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "HF_DATASETS_CACHE": str(tmp_path),
    }
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    done = subprocess.run(
        [sys.executable, "-c", STREAMED, *tars],
        cwd=ROOT,
        env=os.environ | offline,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    read = [json.loads(line) for line in done.stdout.splitlines()]
    found = [
        seen(key, bytes.fromhex(flac), json.dumps(label).encode()) for key, flac, label in read
    ]
    assert found == ours
