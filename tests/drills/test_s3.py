"""Datasets on an object store over HTTP that fails as networks do: the bytes of a local disk."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from data_specs.io import storage
from data_specs.io.storage import RemoteFolder
from pipeline.dataset.card import write_card
from pipeline.dataset.merge import merge
from pipeline.dataset.shards import commit, read_ledger, verify_shard
from pipeline.engine import run
from pipeline.engine.base import Outcome
from tests.conftest import ROOT, small_recipe
from tests.drills.s3_helpers import (
    ACCESS_KEY,
    BUCKET,
    SECRET_KEY,
    SILENCE_S,
    Proxy,
    cut_read,
    cut_upload,
    fail,
    make_bucket,
    moto_server,
    once_each,
    point_at,
    proxied,
    slow_read,
    stall,
)
from tests.sketches import make_all, sketch_job, tars

FOLDERS = itertools.count()


@pytest.fixture(scope="module")
def moto() -> Iterator[int]:
    with moto_server() as port:
        make_bucket(port)
        yield port


@pytest.fixture
def s3(moto: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    monkeypatch.setattr("data_specs.io.retry.WAITS_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(storage, "WRITE_WAITS_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(storage, "SILENCE_S", SILENCE_S)
    monkeypatch.setenv("SPEECH_CACHE", str(tmp_path / "cache"))
    with proxied(moto) as proxy:
        point_at(proxy.port, monkeypatch)
        yield proxy


@pytest.fixture
def address() -> str:
    return f"s3://{BUCKET}/set{next(FOLDERS)}"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference")
    assert make_all(sketch_job(out)) == [0, 1, 2]
    return out


def refusing(name: str) -> Callable[[Any, bytes], bool]:
    """Fail whenever a file of this name is written."""
    return lambda handler, body: (
        handler.command == "PUT" and name in handler.path and fail(handler, body)
    )


def stored(address: str) -> dict[str, bytes]:
    folder = RemoteFolder(address)
    names = sorted(name for name in folder.sizes() if name.endswith(".tar"))
    return dict(zip(names, folder.read(names, 1 << 30), strict=True))


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize(
    "misdeed",
    [
        lambda handler, body: False,
        once_each(fail, "PUT"),
        pytest.param(once_each(stall, "PUT", ".tar"), marks=pytest.mark.slow),
        once_each(fail, "GET"),
        once_each(cut_read, "GET"),
        once_each(fail, "HEAD"),
        cut_upload,
    ],
    ids=["nothing", "500-put", "timeout", "500-get", "cut-read", "500-head", "cut-upload"],
)
def test_the_bytes_of_a_local_dataset_whatever_goes_wrong_once(
    misdeed: Callable[..., bool], s3: Proxy, address: str, reference: Path
) -> None:
    s3.misdeed = misdeed
    job = sketch_job(address)
    assert make_all(job) == [0, 1, 2]
    assert stored(address) == tars(reference)
    for shard in range(3):
        rows = job.shard_range(shard)
        assert verify_shard(address, shard, job.dataset_hash, rows, deep=True) == []
    assert sketch_job(address).todo() == []


def test_an_upload_that_fails_leaves_no_record_and_is_named(
    s3: Proxy, address: str, reference: Path
) -> None:
    job = sketch_job(address)
    s3.misdeed = refusing("shard-000001.tar")
    with pytest.raises(OSError, match=rf"{address}/shard-000001\.tar.*written, tried 4 times"):
        make_all(job)
    assert s3.count("PUT", "shard-000001.tar") == 4  # one layer of retries, not three
    assert read_ledger(address).numbers == [0]
    s3.misdeed = lambda handler, body: False
    again = sketch_job(address)
    assert again.todo() == [1, 2]
    make_all(again)
    assert stored(address) == tars(reference)


def test_a_tar_whose_record_was_not_written_is_listed_and_made_again(
    s3: Proxy, address: str, reference: Path
) -> None:
    job = sketch_job(address)
    s3.misdeed = refusing("shard-000000.json")
    with pytest.raises(OSError, match="shard-000000"):
        make_all(job)
    s3.misdeed = lambda handler, body: False
    assert read_ledger(address).uncommitted == [0]
    make_all(sketch_job(address))
    assert read_ledger(address).uncommitted == [] and stored(address) == tars(reference)


def test_parts_of_a_large_upload(
    s3: Proxy, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PART_BYTES", 5 << 20)
    data = bytes(range(256)) * (12 << 12)  # 12 MiB: three parts
    folder = RemoteFolder(address)
    s3.misdeed = cut_upload
    with folder.writing("big") as file:
        file.write(data)
    assert s3.misdeed is not cut_upload  # a part was cut
    with folder.open("big") as copy:
        assert hashlib.sha256(copy.read()).digest() == hashlib.sha256(data).digest()
    assert s3.count("GET", "/big") == 1  # by its tag it was known to be whole: not read back
    system = storage._filesystem("s3")
    assert system.list_multipart_uploads(BUCKET) == []


def test_a_killed_upload_in_parts_is_ended_on_resume(
    s3: Proxy, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = storage._filesystem("s3")
    key = f"{address.removeprefix(f's3://{BUCKET}/')}/shard-000000.tar"
    for name in (key, "elsewhere/x"):
        system.call_s3("create_multipart_upload", Bucket=BUCKET, Key=name)
    folder = RemoteFolder(address)
    monkeypatch.setattr(storage, "LEFTOVER_S", 1e12)  # this server dates every upload to 2010
    assert folder.remove_leftovers() == 0  # young: somebody may be at it
    monkeypatch.setattr(storage, "LEFTOVER_S", 3600.0)
    assert folder.remove_leftovers() == 1
    left = system.list_multipart_uploads(BUCKET)
    assert [upload["Key"] for upload in left] == ["elsewhere/x"]  # another's is left in peace
    system.clear_multipart_uploads(BUCKET)


def test_a_listing_is_one_request(s3: Proxy, address: str) -> None:
    job = sketch_job(address, 400)
    rows = [commit(address, shard, [], job.dataset_hash, 1.0) for shard in range(3)]
    assert len(rows) == 3
    s3.asked.clear()
    job.todo()
    listings = [path for (method, path) in s3.asked if method == "GET" and ".json" not in path]
    assert len(listings) == 1 and s3.asked["GET", listings[0]] == 1
    assert s3.count("GET", ".json") == 3 and s3.count("HEAD", "") == 0


def test_shards_are_copied_by_the_store(s3: Proxy, address: str, reference: Path) -> None:
    job = sketch_job(address)
    make_all(job)
    s3.asked.clear()
    merge([address], f"{address}-merged")
    assert s3.copies == 6 and s3.count("GET", ".tar") == 0
    assert stored(f"{address}-merged") == tars(reference)


def test_from_a_store_to_a_disk_and_back(
    s3: Proxy, address: str, reference: Path, tmp_path: Path
) -> None:
    merge([reference], address)
    assert stored(address) == tars(reference)
    merge([address], tmp_path / "back")
    assert tars(tmp_path / "back") == tars(reference)


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    "do",
    [fail, cut_read, slow_read, pytest.param(stall, marks=pytest.mark.slow)],
    ids=["500", "cut", "slow", "timeout"],
)
def test_training_reads_from_the_store(
    do: Callable[..., bool], s3: Proxy, address: str, reference: Path
) -> None:
    torch = pytest.importorskip("torch")
    from train.data.loading import loader
    from train.data.order import Order
    from train.data.shards import list_shards
    from train.data.stream import Batches, ShardSamples

    merge([reference], address)
    s3.asked.clear()
    s3.misdeed = once_each(do, "GET", ".tar")

    def batches(place: Path | str) -> Any:
        shards = list_shards(place)
        order = Order(tuple(shard.samples for shard in shards), 0, seed=1, batch=3)
        return loader(Batches(ShardSamples(shards), order), 0, 4, 0)

    for ours, theirs in zip(batches(address), batches(reference), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    tries = 1 if do is slow_read else 2
    assert s3.count("GET", ".tar") == 3 * tries


# ---------------------------------------------------------------- whole commands


def once_each_path(handler: Any, body: bytes) -> bool:
    """The first time that a path is written or read, go wrong as its name says."""
    wrong = FIRST_TIME[zlib.crc32(handler.path.encode()) % len(FIRST_TIME)]
    handler.proxy.wronged[f"{handler.command} {wrong.__name__}"] += 1
    return wrong(handler, body)


def hang_up(handler: Any, body: bytes) -> bool:
    """The answer never comes: whether the server did it, the client cannot know."""
    if handler.command != "GET":
        handler.ask(body)
    handler.hang_up()
    return True


FIRST_TIME = (fail, cut_read, slow_read, hang_up)


def both(one: Callable[..., bool], other: Callable[..., bool]) -> Callable[..., bool]:
    return lambda handler, body: one(handler, body) or other(handler, body)


def command(module: str, *arguments: object) -> str:
    words = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def uploaded(corpora: dict[str, list[Path]]) -> list[str]:
    """The corpora as a user has them in a bucket, as options."""
    system = fsspec.filesystem("s3")
    for name, folders in corpora.items():
        system.put(str(folders[0]), f"{BUCKET}/corpora/{name}", recursive=True)
    return [f"--corpus={name}=s3://{BUCKET}/corpora/{name}" for name in corpora]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_corpora_shards_and_training_by_the_commands(
    s3: Proxy, address: str, corpora: dict[str, list[Path]], tmp_path: Path
) -> None:
    """Every path fails the first time that it is read, and the first time that it is written."""
    recipe = tmp_path / "small.yaml"
    kept = small_recipe().model_dump(mode="json", exclude_none=True)
    recipe.write_text(yaml.safe_dump(kept))
    make = ["shards", recipe, "--samples", 28, "--engine", "local", "--workers", 2]
    here = [f"--corpus={name}={folders[0]}" for name, folders in corpora.items()]
    there = uploaded(corpora)
    s3.misdeed = both(once_each(once_each_path, "GET"), once_each(once_each_path, "PUT"))
    told = command("pipeline", *make, *there, "--out", address)
    command("pipeline", *make, *here, "--out", tmp_path / "local")
    assert stored(address) == tars(tmp_path / "local")
    told += command("pipeline", "verify", address, "--deep")
    fit = ["fit", "--student", "v1", "--steps", 6, "--batch", 4, "--workers", 1, "--threads", 1]
    fit += ["--validate-every", 3, "--precision", "fp32", "--device", "cpu", "--logger", "none"]
    fit += ["--validation", tmp_path / "local"]
    told += command("train", *fit, "--shards", address, "--out", tmp_path / "there")
    command("train", *fit, "--shards", tmp_path / "local", "--out", tmp_path / "here")
    ours, theirs = (tmp_path / run / "model.safetensors" for run in ("there", "here"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert ACCESS_KEY not in told and SECRET_KEY not in told
    print(dict(s3.wronged))
    assert len(s3.wronged) == 2 * len(FIRST_TIME)  # each of them, in reading and in writing


# ---------------------------------------------------------------- what is told


def test_no_credential_reaches_an_output(
    s3: Proxy, address: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    job = sketch_job(address)
    make_all(job)
    write_card(job)
    run.print_summary(job, Outcome([0, 1, 2], seconds=1.0))
    s3.misdeed = fail
    with pytest.raises(OSError) as caught:
        job.todo()
    s3.misdeed = lambda handler, body: False
    out = capsys.readouterr()
    folder = RemoteFolder(address)
    told = [out.out, out.err, caplog.text, str(caught.value), repr(job), repr(folder)]
    for path in folder.tree():
        with folder.open(path) as file:
            told.append(file.read().decode("latin1"))
    assert len(told) > 10  # tars, records, description, manifests, card
    for secret in (ACCESS_KEY, SECRET_KEY):
        assert not [text for text in told if secret in text]


def test_a_backend_that_quotes_a_secret_is_blotted_out(
    s3: Proxy, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quote(system: Any) -> None:
        raise OSError(f"signed with {SECRET_KEY} of {ACCESS_KEY}")

    with pytest.raises(OSError, match=r"signed with \*\*\* of \*\*\*"):
        RemoteFolder(address)._tried("x", quote)


def test_missing_credentials_are_told_at_once(
    s3: Proxy, address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(OSError, match=r"tried 1 times: NoCredentialsError.*environment"):
        RemoteFolder(address).sizes()


def test_a_bucket_that_is_not_there(s3: Proxy) -> None:
    with pytest.raises(ValueError, match=r"s3://no-such-bucket/x.*no such bucket"):
        sketch_job("s3://no-such-bucket/x")
