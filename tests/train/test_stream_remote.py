"""Shards behind an address: the same batches, errors by name, a bounded cache, no secrets told."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch

from data_specs.io.addresses import redacted
from data_specs.io.cache import FileCache, ReadAhead, default_cache
from data_specs.io.storage import open_folder
from tests.servers import Misdeed, Served, send, serving_folder
from tests.train_helpers import state_sha256, write_dataset
from train.data import stream
from train.data.loading import loader
from train.data.order import Order
from train.data.shards import Shard, list_shards, read_dataset_info
from train.data.stream import Batches, DecodedCache, ShardSamples

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed: pip install 'fsspec[http]'")
pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install 'fsspec[http]'")

GB = 10**9


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("data_specs.io.retry.WAITS_S", (0.01, 0.01))
    monkeypatch.setenv("SPEECH_CACHE", str(tmp_path / "cache"))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards whose records state their hash, as the pipeline's do."""
    made = write_dataset(tmp_path_factory.mktemp("remote") / "shards", shards=3, samples=4)
    for tar in made.glob("*.tar"):
        state_sha256(tar)
    return made


@pytest.fixture
def served(folder: Path) -> Iterator[Served]:
    with serving_folder(folder) as site:
        yield site


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    system = fsspec.filesystem("memory")
    for path in folder.iterdir():
        system.pipe_file(f"/data/{path.name}", path.read_bytes())
    yield "memory://data"
    system.rm("/data", recursive=True)


def batches_of(address: Path | str, **changes: Any) -> Batches:
    shards = list_shards(address)
    values: dict[str, Any] = {"seed": 1, "batch": 5} | changes
    order = Order(tuple(shard.samples for shard in shards), 0, **values)
    return Batches(ShardSamples(shards), order)


def same(address: Path | str, folder: Path, workers: int = 0) -> bool:
    pairs = zip(
        loader(batches_of(address), 0, 5, workers), loader(batches_of(folder), 0, 5, 0), strict=True
    )
    return all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))


# ---------------------------------------------------------------- the same as local


@pytest.mark.parametrize("workers", [0, 2])
def test_http_gives_the_same_batches(served: Served, folder: Path, workers: int) -> None:
    assert same(served.address, folder, workers)
    tars = [count for name, count in served.asked.items() if name.endswith(".tar")]
    assert tars == [1, 1, 1]  # by one of the processes


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_gives_the_same_batches(memory: str, folder: Path, workers: int) -> None:
    assert same(memory, folder, workers)


def test_a_local_folder_has_three_spellings(folder: Path) -> None:
    for spelling in (str(folder), f"file://{folder}", f"file://localhost{folder}"):
        assert list_shards(spelling) == list_shards(folder)
    with pytest.raises(ValueError, match="names another machine"):
        open_folder("file://elsewhere/shards")


def test_the_same_description(served: Served, memory: str, folder: Path) -> None:
    assert read_dataset_info(served.address) == read_dataset_info(folder)
    assert read_dataset_info(memory) == read_dataset_info(folder)


def test_a_second_run_fetches_nothing(served: Served, folder: Path) -> None:
    assert same(served.address, folder)
    served.asked.clear()
    assert same(f"{served.address}?signature=another", folder)
    assert not [path for path in served.asked if path.endswith(".tar")]


def content_of(shard: Shard) -> bytes:
    """Of the file that is kept here; fetched if it is remote."""
    shard.open()
    return shard.tar.read_bytes()


def test_one_place_for_all_that_read_a_tar(served: Served, folder: Path) -> None:
    shard, local = list_shards(served.address)[0], list_shards(folder)[0]
    assert not shard.tar.exists()
    assert content_of(shard) == local.tar.read_bytes()
    assert ShardSamples([shard]).record(2) == ShardSamples([local]).record(2)


# ---------------------------------------------------------------- what goes wrong


def once_each(do: Callable[[SimpleHTTPRequestHandler], None]) -> Misdeed:
    """Do wrong the first time that a path is asked for."""
    done: set[str] = set()

    def misdeed(handler: SimpleHTTPRequestHandler) -> bool:
        if handler.path in done:
            return False
        done.add(handler.path)
        do(handler)
        return True

    return misdeed


def cut(handler: SimpleHTTPRequestHandler) -> None:
    """Promise a file and close the connection after a few bytes."""
    send(handler, b"x" * 50, "", length=100_000)
    handler.close_connection = True


def fail(handler: SimpleHTTPRequestHandler) -> None:
    handler.send_error(500)


def only_tars(do: Callable[[SimpleHTTPRequestHandler], None]) -> Misdeed:
    def misdeed(handler: SimpleHTTPRequestHandler) -> bool:
        wanted = ".tar" in handler.path
        if wanted:
            do(handler)
        return wanted

    return misdeed


@pytest.mark.parametrize("do", [fail, cut])
def test_what_fails_once_is_tried_again(
    served: Served, folder: Path, do: Callable[[SimpleHTTPRequestHandler], None]
) -> None:
    served.misdeed = once_each(do)
    assert same(served.address, folder)
    assert min(served.asked.values()) >= 2


@pytest.mark.parametrize("do", [fail, cut])
@pytest.mark.parametrize("workers", [0, 1])
def test_what_always_fails_is_named(
    served: Served, do: Callable[[SimpleHTTPRequestHandler], None], workers: int, tmp_path: Path
) -> None:
    batches = batches_of(served.address)
    served.misdeed = only_tars(do)
    with pytest.raises(OSError, match=r"http://127.*/shards/shard-00000\d\.tar.*tried 3 times"):
        next(loader(batches, 0, 1, workers))
    assert not list((tmp_path / "cache").glob("*.tar"))


def test_what_is_refused_is_not_tried_again(served: Served) -> None:
    batches = batches_of(served.address)
    served.misdeed = only_tars(lambda handler: handler.send_error(403))
    with pytest.raises(OSError, match=r"tried 1 times.*403"):
        batches[0]


def test_no_server_and_no_folder(served: Served) -> None:
    with pytest.raises(ValueError, match=r"/nowhere.*no such folder"):
        list_shards(served.address.replace("/shards", "/nowhere"))
    with pytest.raises(ValueError, match="no such folder"):
        list_shards("memory://nowhere")
    with pytest.raises(ValueError, match=r"dataset\.json.*not found.*pipeline shards"):
        read_dataset_info(served.address.replace("/shards", "/nowhere"))
    with pytest.raises(OSError, match=r"http://127\.0\.0\.1:9/shards.*cannot be read"):
        list_shards("http://127.0.0.1:9/shards")


def test_content_is_held_to_its_record(folder: Path, served: Served, tmp_path: Path) -> None:
    shard = list_shards(served.address)[0]
    data = bytearray(content_of(shard))
    shard.tar.unlink()
    data[5000] ^= 1

    for content, message in (
        (bytes(data), "content differs from its record's hash"),
        (bytes(data[:-512]), "bytes came, its record says"),
        (bytes(data) + bytes(10**7), "sends more than"),
    ):
        served.misdeed = only_tars(functools.partial(send, data=content))
        with pytest.raises(OSError, match=rf"shard-000000\.tar.*{message}"):
            shard.open()
        assert not list((tmp_path / "cache").iterdir())


def test_a_listing_with_sizes_shows_a_truncated_shard_at_once(memory: str) -> None:
    fsspec.filesystem("memory").pipe_file("/data/shard-000001.tar", b"x" * 1000)
    with pytest.raises(ValueError, match=r"memory://data/shard-000001\.tar: 1000 bytes.*truncated"):
        list_shards(memory)


@pytest.mark.parametrize(
    ("counts", "places", "shards"),
    [([500] * 40, 4096, 9), ([5, *[500] * 40], 4096, 10), ([500] * 3, 4096, 3), ([8], 8, 1)],
)
def test_how_many_shards_a_shuffle_reads_at_once(
    counts: list[int], places: int, shards: int
) -> None:
    assert stream._shards_for(places, counts) == shards


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("/data/shards", "/data/shards"),
        ("s3://bucket/shards", "s3://bucket/shards"),
        ("hf://datasets/me/set@v1/shards", "hf://datasets/me/set@v1/shards"),
        ("memory:///data", "memory:///data"),
        ("https://host:8443/a/b?X-Sig=SECRET#SECRET", "https://host:8443/a/b"),
        ("https://me:SECRET@host/a", "https://host/a"),
        ("https://SECRET@host:80/a?b=SECRET", "https://host:80/a"),
        ("https://me:p@SECRET@host/a", "https://host/a"),
        ("https://me:12?SECRET@host/a", "https://host/a"),
        ("https://me:SEC/RET@host/a", "https://***"),
        ("https://host?SECRET", "https://host"),
        ("https://host/a::s3://me:SECRET@bucket", "https://host/a"),
        ("me:SECRET@host://a", "***"),
        ("http://[::1]:8000/a?SECRET", "http://[::1]:8000/a"),
    ],
)
def test_redacted(address: str, shown: str) -> None:
    assert redacted(address) == shown


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("pipe://cat /etc/passwd", "not read"),
        ("ssh://host/shards", "not read"),
        ("local:///etc", "not read"),
        ("simplecache::http://host/shards", "chained"),
        ("http://host/shards::file:///etc", "chained"),
        ("zip://x::s3://me:SECRET@bucket/a.zip", "chained"),
        ("s3://me:SECRET@bucket/shards", "credentials"),
    ],
)
def test_refused_addresses(address: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        list_shards(address)
    assert "SECRET" not in str(caught.value)


def test_a_pipe_is_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        list_shards(f"pipe:touch {tmp_path}/x")
    assert not list(tmp_path.iterdir())


def test_an_address_that_became_a_path() -> None:
    with pytest.raises(ValueError, match="taken for a path"):
        list_shards(Path("s3://bucket/shards"))
    assert open_folder(Path("memory")).shown() == "memory"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(protocol: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ValueError, match=r"s3://bucket/a: .*pip install s3fs"):
        list_shards("s3://bucket/a")


def test_secrets_are_never_told(served: Served) -> None:
    host = served.address.removeprefix("http://")
    address = f"http://me:PASSWORD@{host}?signature=SIGNATURE&user=me"
    shard = list_shards(address)[0]  # credentials are sent, only not shown
    shard.open()
    shard.tar.unlink()
    for misdeed in (only_tars(fail), only_tars(cut)):
        served.misdeed = misdeed
        with pytest.raises(OSError, match="cannot be read") as caught:
            shard.open()
        told = "".join(traceback.format_exception(caught.value))
        assert "shard-000000.tar" in told
        assert not [word for word in ("PASSWORD", "SIGNATURE", "me:") if word in told]
        assert "PASSWORD" not in repr(shard) and "SIGNATURE" not in repr(shard)


# ---------------------------------------------------------------- the cache


@pytest.fixture
def limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], FileCache]:
    """Shards are kept in a cache of so many bytes."""

    def limit(size: int) -> FileCache:
        cache = FileCache(tmp_path / "small", size)
        monkeypatch.setattr("train.data.shards.default_cache", lambda: cache)
        return cache

    return limit


def kept(cache: FileCache) -> list[str]:
    return sorted(path.name[:12] for path in cache.folder.glob("*.tar"))


def test_the_cache_is_bounded(
    served: Served, folder: Path, limited: Callable[[int], FileCache]
) -> None:
    shards = list_shards(served.address)
    limit = max(file.size for file in ShardSamples(shards).remote) * 2
    cache = limited(limit)
    samples = ShardSamples(list_shards(served.address))
    expected = ShardSamples(list_shards(folder))
    for number in [*range(12), *range(12)]:
        assert (samples.read(number)[0] == expected.read(number)[0]).all()
        assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= limit
        assert sum(not file.removed for file in samples._files.values()) <= 2
    assert kept(cache) == ["shard-000001", "shard-000002"]


def test_the_shard_opened_longest_ago_goes_first(
    served: Served, limited: Callable[[int], FileCache]
) -> None:
    sizes = [file.size for file in ShardSamples(list_shards(served.address)).remote]
    cache = limited(sum(sizes) - 1)
    shards = list_shards(served.address)
    for number in (0, 1, 0):
        shards[number].open()
        time.sleep(0.02)
    shards[2].open()
    assert kept(cache) == ["shard-000000", "shard-000002"]


def test_a_cache_that_is_too_small_is_told(
    served: Served, folder: Path, limited: Callable[[int], FileCache]
) -> None:
    limited(2 * (folder / "shard-000000.tar").stat().st_size)
    with pytest.raises(ValueError, match=r"small: may hold .*3 shards at a time.*SPEECH_CACHE_GB"):
        batches_of(served.address)
    limited(1000)
    with pytest.raises(ValueError, match=r"shard-000000\.tar.*do not fit.*SPEECH_CACHE"):
        list_shards(served.address)[0].open()


def test_a_killed_download_is_made_again(served: Served, folder: Path, tmp_path: Path) -> None:
    waiting, go_on = threading.Event(), threading.Event()

    def stall(handler: SimpleHTTPRequestHandler) -> None:
        data = (folder / "shard-000000.tar").read_bytes()
        send(handler, data[:200_000], length=len(data))
        waiting.set()
        go_on.wait(30)

    cache = FileCache(tmp_path / "cache", GB)
    shard = list_shards(served.address)[0]
    served.misdeed = only_tars(stall)
    process = multiprocessing.get_context("fork").Process(target=shard.open)
    process.start()
    assert waiting.wait(30) and process.pid
    deadline = time.monotonic() + 30
    while not [p for p in cache.folder.glob(".*.tmp") if p.stat().st_size]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    go_on.set()
    assert kept(cache) == [] and len(list(cache.folder.glob(".*.tmp"))) == 1
    served.misdeed = lambda handler: False
    assert content_of(shard) == (folder / "shard-000000.tar").read_bytes()
    assert not list(cache.folder.glob(".*.tmp"))


def test_leftovers_of_killed_downloads_go(served: Served, tmp_path: Path) -> None:
    shards = list_shards(served.address)
    cache = FileCache(tmp_path / "cache", GB)
    shards[0].open()
    old, young = cache.folder / ".shard-000007-x.tmp", cache.folder / ".shard-000008-x.tmp"
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (1e9, 1e9))
    shards[1].open()
    assert young.exists() and not old.exists()


def test_a_damaged_file_in_the_cache_is_fetched_again(served: Served, folder: Path) -> None:
    shard = list_shards(served.address)[0]
    shard.open()
    os.truncate(shard.tar, 1000)
    assert content_of(shard) == (folder / "shard-000000.tar").read_bytes()


def test_a_shard_made_anew_is_fetched_anew(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "shards", 1, 2)
    with serving_folder(folder) as served:
        tar = folder / "shard-000000.tar"
        state_sha256(tar)
        list_shards(served.address)[0].open()
        tar.write_bytes(bytes(1) + tar.read_bytes()[1:])
        state_sha256(tar)
        assert content_of(list_shards(served.address)[0]) == tar.read_bytes()


def test_shards_are_fetched_ahead(served: Served) -> None:
    shards, ahead = list_shards(served.address), ReadAhead()
    for shard in [*shards, *shards]:
        assert shard.remote
        ahead.ask(shard.remote)
    deadline = time.monotonic() + 30
    while not all(shard.tar.exists() for shard in shards):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert max(count for path, count in served.asked.items() if path.endswith(".tar")) == 1


def test_what_is_decoded_is_not_fetched_again(served: Served) -> None:
    shards = list_shards(served.address)
    samples = ShardSamples(shards, DecodedCache(12))
    batches = Batches(samples, Order((4, 4, 4), 0, seed=1, batch=4))
    first = [batches[step] for step in range(3)]
    samples._files.clear()
    for shard in shards:
        shard.tar.unlink()
    served.asked.clear()
    again = sorted(tuple(batches[step].mos_B.tolist()) for step in range(3, 6))
    assert len(first) == len(again) and not served.asked


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPEECH_CACHE_GB", "1.5")
    assert default_cache() == FileCache(Path(os.environ["SPEECH_CACHE"]), 1_500_000_000)
    monkeypatch.delenv("SPEECH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert default_cache().folder == Path("/there/distill-mos-factory/shards")
    for text in ("much", "nan", "inf"):
        monkeypatch.setenv("SPEECH_CACHE_GB", text)
        with pytest.raises(ValueError, match="SPEECH_CACHE_GB"):
            default_cache()
