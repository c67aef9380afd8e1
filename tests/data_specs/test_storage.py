"""Folders at addresses, without a network: written whole or not at all, listed at once, no secret
told; and corpora and weights that are read from there."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_specs.corpus import find_corpus
from data_specs.io import storage
from data_specs.io.addresses import path_or_url
from data_specs.io.cache import FileCache, remote_clip
from data_specs.io.checksums import require_stored, sums_of
from data_specs.io.storage import LocalFolder, NotFound, RemoteFolder
from pipeline.__main__ import main
from pipeline.audio import RemoteSource, read_part, read_remote_header
from pipeline.corpora.manifest import CorpusError, scan
from pipeline.dataset.shards import FORMAT, ShardRecord, read_ledger
from pipeline.options import parse_roots
from tests.conftest import small_recipe, talk, write
from tests.servers import Guarded, secrets_in, serving
from tests.sketches import make_all, sketch_job, tars

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed: pip install 'fsspec[http]'")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr("data_specs.io.retry.WAITS_S", (0.01,))
    monkeypatch.setattr(storage, "WRITE_WAITS_S", (0.01,))
    monkeypatch.setenv("SPEECH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    remote_clip.cache_clear()
    yield
    system = fsspec.filesystem("memory")
    system.store.clear()  # rm looks through all of them for each
    system.pseudo_dirs[:] = [""]


# ---------------------------------------------------------------- written whole or not at all


@pytest.mark.parametrize("where", ["memory://set", "local"])
def test_a_file_is_there_whole_or_not_at_all(where: str, tmp_path: Path) -> None:
    folder = storage.open_folder(where if where != "local" else tmp_path)
    folder.make()
    with pytest.raises(ZeroDivisionError), folder.writing("a") as file:
        file.write(b"half")
        raise ZeroDivisionError
    with pytest.raises(NotFound, match="a"):
        folder.read(["a"], 10)
    with folder.writing("a") as file:
        file.write(b"all of it")
    assert folder.read(["a"], 10) == [b"all of it"] and folder.sizes() == {"a": 9}
    with folder.open("a") as copy:
        assert copy.read() == b"all of it"
    folder.remove("a")
    folder.remove("a")  # is no error
    with pytest.raises(NotFound), folder.open("a"):
        pass


def test_http_is_only_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only read"):
        sketch_job("http://127.0.0.1:9/shards")


@pytest.mark.parametrize(
    ("stored", "said"),
    [(b"other bytes", "not what was sent"), (b"short", "5 of 11 bytes arrived")],
)
def test_a_store_that_keeps_something_else_is_found_out(
    stored: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = storage._filesystem("memory")
    monkeypatch.setattr(system, "put_file", lambda path, at: system.pipe_file(at, stored))
    with (
        pytest.raises(OSError, match=rf"memory://set/a.*written, tried 2 times.*{said}"),
        RemoteFolder("memory://set").writing("a") as file,
    ):
        file.write(b"right bytes")


def test_a_second_try_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    system = storage._filesystem("memory")
    put, tries = system.put_file, iter([b"half"])

    def put_file(path: str, at: str) -> None:
        data = next(tries, None)
        put(path, at) if data is None else system.pipe_file(at, data)

    monkeypatch.setattr(system, "put_file", put_file)
    with RemoteFolder("memory://set").writing("a") as file:
        file.write(b"right bytes")
    assert RemoteFolder("memory://set").read(["a"], 100) == [b"right bytes"]


class AnswerError(Exception):
    """As the hub's client raises it: the status is its response's."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.response = SimpleNamespace(status_code=status)


def test_a_hub_says_404_of_what_is_to_be_removed_and_412_of_two_commits_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(storage, "WRITE_WAITS_S", (1.0,) * 8)
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    monkeypatch.setattr(storage, "_filesystem", lambda protocol: None)
    folder, answers = RemoteFolder("hf://datasets/me/set"), iter([412, 412, 412, 404])

    def answer(system: Any) -> None:
        raise AnswerError(next(answers))

    with pytest.raises(NotFound):
        folder._tried("a", answer, "removed")
    assert len(waits) == 3  # more than the one that its own client leaves to us elsewhere


@pytest.mark.parametrize(
    "entry",
    [
        {"ETag": '"{md5}"'},
        {"ETag": '"{parts}"'},
        {"md5Hash": "{base64}"},
        {"lfs": {"sha256": "{sha256}"}},
    ],
    ids=["s3", "s3-parts", "gs", "hf"],
)
def test_a_stated_checksum_spares_reading_back(entry: dict[str, Any], tmp_path: Path) -> None:
    data = bytes(2_500_000)
    (tmp_path / "x").write_bytes(data)
    md5 = hashlib.md5(data)
    parts = [hashlib.md5(data[i : i + (1 << 20)]).digest() for i in range(0, len(data), 1 << 20)]
    values = {
        "md5": md5.hexdigest(),
        "parts": f"{hashlib.md5(b''.join(parts)).hexdigest()}-3",
        "base64": base64.b64encode(md5.digest()).decode(),
        "sha256": hashlib.sha256(data).hexdigest(),
    }

    def check(values: dict[str, str]) -> None:
        told = json.dumps(entry)
        for name, value in values.items():
            told = told.replace("{" + name + "}", value)
        system = Mock()
        system.info.return_value = {"size": len(data), **json.loads(told)}
        system.get_file.side_effect = AssertionError("was read back")
        require_stored(system, "x", *sums_of(tmp_path / "x", 1 << 20))

    check(values)
    if "{md5}" in str(entry):
        with pytest.raises(AssertionError, match="read back"):
            check(values | {"md5": "0" * 32})  # as of an encrypted object


# ---------------------------------------------------------------- listings


def test_ten_thousand_shards_are_one_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFile

    count = 10_000
    job = sketch_job("memory://many", 4 * count)
    system, size = storage._filesystem("memory"), 7
    record = ShardRecord(
        **{"format": FORMAT, "shard": 0, "dataset_hash": job.dataset_hash, "samples": 4},
        **{"planned": 4, "tar_bytes": size, "tar_sha256": "0" * 64, "pcm_sha256": "0" * 64},
        **{"dropped": (), "versions": {}},
    ).model_dump_json()
    for shard in range(count):  # its own way of writing looks at all files for each
        for ending, data in ((".json", record.encode()), (".tar", bytes(size))):
            path = f"/many/shard-{shard:06d}{ending}"
            system.store[path] = MemoryFile(system, path, data)
    del system.store["/many/shard-000777.tar"]
    spies = {name: Mock(wraps=getattr(system, name)) for name in ("ls", "info", "find", "exists")}
    for name, spy in spies.items():
        monkeypatch.setattr(system, name, spy)
    assert job.todo() == [777]
    assert {name: spy.call_count for name, spy in spies.items() if spy.called} == {"ls": 1}


# ---------------------------------------------------------------- datasets at an address


def test_a_dataset_at_an_address_has_the_bytes_of_a_local_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_all(sketch_job(tmp_path / "here"))
    make_all(sketch_job("memory://there"))
    folder = RemoteFolder("memory://there")
    for name, data in tars(tmp_path / "here").items():
        assert folder.read([name], 1 << 30) == [data]
    assert main(["verify", "memory://there", "--deep"]) == 0
    assert main(["verify", "memory://there", "--quick"]) == 0
    assert capsys.readouterr().out.count("memory://there: 3 of 3 shards are whole") == 2
    system = storage._filesystem("memory")
    data = bytearray(system.cat_file("/there/shard-000001.tar"))
    data[70_000] ^= 1
    system.pipe_file("/there/shard-000001.tar", bytes(data))
    assert main(["verify", "memory://there", "--quick"]) == 0  # says nothing of contents
    assert main(["verify", "memory://there", "--deep"]) == 1
    assert "memory://there/shard-000001.tar: content differs" in capsys.readouterr().out
    system.rm_file("/there/shard-000001.tar")
    assert main(["verify", "memory://there", "--quick"]) == 1
    assert read_ledger("memory://there").numbers == [0, 1, 2]


def test_a_deep_check_of_several_shards_at_a_time_tells_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = sketch_job(tmp_path)
    make_all(job)
    tar = tmp_path / "shard-000002.tar"
    data = bytearray(tar.read_bytes())
    data[70_000] ^= 1
    tar.write_bytes(data)
    said = []
    for workers in ("1", "2"):
        assert main(["verify", str(tmp_path), "--deep", "--workers", workers]) == 1
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "shard-000002.tar: content differs" in said[0]


# ---------------------------------------------------------------- corpora


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("speech")
    for i, name in enumerate(("a.wav", "b c.flac", "d.ogg")):
        subtype = "VORBIS" if name.endswith("ogg") else "PCM_16"
        write(base / "en" / f"talker{i}" / name, talk(3 + i, i), subtype=subtype)
    (base / "en" / "notes.txt").write_text("no audio")
    (base / "en" / "broken.wav").write_bytes(b"RIFFnothing")
    return base


@pytest.fixture
def at_address(speech: Path) -> str:
    system = fsspec.filesystem("memory")
    for path in speech.rglob("*"):
        if path.is_file():
            system.pipe_file(f"/corpus/{path.relative_to(speech)}", path.read_bytes())
    return "memory://corpus"


def test_a_corpus_at_an_address_is_the_same_corpus(at_address: str, speech: Path) -> None:
    corpus = find_corpus("speech", "test")
    here, there = (scan("speech", corpus, [root]) for root in (speech, at_address))
    assert there.table.drop_columns("stamp").equals(here.table.drop_columns("stamp"))
    assert there.sha256 == here.sha256
    assert len(here.usable) == 3 and here.rejections()
    for row in here.usable.to_pylist():
        clip = remote_clip(at_address, row["path"])
        ours, theirs = (read_part(file, 8000, 20_000) for file in (clip, speech / row["path"]))
        assert np.array_equal(ours, theirs)


def test_no_corpus_at_an_address(at_address: str) -> None:
    with pytest.raises(CorpusError, match="memory://elsewhere: no such folder"):
        scan("speech", find_corpus("speech", "test"), ["memory://elsewhere"])


def test_a_store_that_fails_is_no_fault_of_the_file(
    at_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> bytes:
        raise TimeoutError("no answer")

    remote_clip(at_address, "en/talker0/a.wav")
    monkeypatch.setattr(storage._filesystem("memory"), "cat_file", broken)
    with pytest.raises(OSError, match=r"memory://corpus/en/talker0/a\.wav: cannot be read"):
        read_remote_header(at_address, "en/talker0/a.wav")


def test_a_clip_stays_readable_when_room_is_made(at_address: str, tmp_path: Path) -> None:
    clip = remote_clip(at_address, "en/talker0/a.wav")
    opened = clip.open()
    clip.local.unlink()
    assert opened.removed and Path(f"/proc/self/fd/{opened.number}").read_bytes()[:4] == b"RIFF"


def test_a_changed_clip_is_fetched_anew(at_address: str, speech: Path) -> None:
    before = remote_clip(at_address, "en/talker0/a.wav")
    first = read_part(before, 0, 1000)
    other = (speech / "en" / "talker1" / "b c.flac").read_bytes()
    fsspec.filesystem("memory").pipe_file("/corpus/en/talker0/a.wav", other)
    remote_clip.cache_clear()  # as in another process
    assert not np.array_equal(first, read_part(remote_clip(at_address, before.name), 0, 1000))


def test_a_cache_of_small_files_is_bounded(tmp_path: Path) -> None:
    from data_specs.io.cache import RemoteFile

    system = fsspec.filesystem("memory")
    cache = FileCache(tmp_path / "clips", 100_000, small=True)
    for i in range(300):
        system.pipe_file(f"/clips/{i}.wav", bytes([i % 256]) * 1000)
        file = RemoteFile(RemoteFolder("memory://clips"), f"{i}.wav", 1000, None, cache, "tag")
        opened = file.open()
        assert file.local.read_bytes()[0] == i % 256
        del opened
        assert sum(p.stat().st_size for p in cache.folder.iterdir()) <= 100_000
    assert len(list(cache.folder.glob("*.lock"))) <= 257


@settings(max_examples=50, deadline=None)
@given(
    data=st.binary(max_size=400),
    places=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 200)), max_size=8),
    block=st.integers(1, 64),
)
def test_a_remote_file_is_read_in_blocks(
    data: bytes, places: list[tuple[int, int]], block: int
) -> None:
    folder = SimpleNamespace(part=lambda name, start, end: data[start:end])
    clip: Any = SimpleNamespace(folder=folder, name="x", size=len(data))
    source = RemoteSource(clip, block)
    for start, count in places:
        assert source.at(start, count) == data[start : start + count]


def test_a_corpus_behind_a_password_and_none_of_it_told(
    speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install 'fsspec[http]'")
    handler = functools.partial(Guarded, directory=str(speech))
    corpus = find_corpus("speech", "test")
    with serving(handler) as host:
        found = scan("speech", corpus, [f"http://me1:PASSWORD1@{host}"])
        with pytest.raises((OSError, ValueError)) as caught:
            scan("speech", corpus, [f"http://me1:WRONGPASS@{host}"])
        clip = remote_clip(f"http://me1:PASSWORD1@{host}", "en/talker1/b c.flac")
        read_part(clip, 0, 100)
    here = scan("speech", corpus, [speech])
    assert found.sha256 == here.sha256
    found.save(tmp_path / "speech.parquet")
    told = [str(caught.value), found.summary(), str(clip), repr(clip), *capsys.readouterr()]
    assert not [text for text in told if "PASS" in text or "me1" in text]
    assert not secrets_in(tmp_path, ("PASS", "me1:", "me1@"))


def test_folders_and_addresses_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe()
    value = "/data/a:s3://bucket/b:http://host:8080/c:/d"
    monkeypatch.setenv("CORPUS_SPEECH", value)
    found = parse_roots(["noise=gs://bucket/noise", "noise=here"], recipe)
    assert found["speech"] == [Path("/data/a"), "s3://bucket/b", "http://host:8080/c", Path("/d")]
    assert found["noise"] == ["gs://bucket/noise", Path("here")]
    assert path_or_url("file:///data/a%20b") == Path("/data/a b")
    with pytest.raises(ValueError, match="not read"):
        path_or_url("ftp://host/x")


# ---------------------------------------------------------------- weights


def test_a_weights_cache_at_an_address_is_copied_on_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from train.models import weights

    weights._copy_here.cache_clear()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SPEECH_WEIGHTS", "memory://weights")
    system = fsspec.filesystem("memory")
    system.pipe_file("/weights/net/model.bin", b"one")
    system.pipe_file("/weights/net/sub/config.json", b"{}")
    folder = weights.cached("net")
    assert tmp_path in folder.parents
    assert (folder / "model.bin").read_bytes() == b"one" and (folder / "sub/config.json").exists()
    assert not list(folder.rglob("*.copy"))
    assert not (weights.cached("other")).exists()  # what is not there is missing, not an error
    monkeypatch.setenv("SPEECH_WEIGHTS", str(tmp_path / "w"))
    assert weights.cached("net") == tmp_path / "w" / "net"


def test_links_and_copies(tmp_path: Path) -> None:
    a, b = LocalFolder(tmp_path / "a"), LocalFolder(tmp_path / "b")
    a.make(), b.make()
    with a.writing("x") as file:
        file.write(b"1")
    for _ in range(2):  # again, where it is there already
        storage.copy("x", a, b)
    with a.writing("x") as file:
        file.write(b"2")
    assert b.read(["x"], 9) == [b"1"]
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["x"]
    with pytest.raises(NotFound):
        storage.copy("y", a, b)
