"""Files on disks that are full, without locks or without sync, and on networks that fail."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import soundfile

from data_specs.corpus import find_corpus
from data_specs.io import audio, files
from data_specs.io.cache import FileCache, RemoteFile
from data_specs.io.errors import UserError
from data_specs.io.files import only_writer, remove_leftovers, whole_file, write_text
from data_specs.io.hardware import require_device
from data_specs.io.retry import is_transient, patiently
from data_specs.io.storage import LocalFolder, RemoteFolder
from pipeline.__main__ import main
from pipeline.corpora import folder as corpora
from pipeline.corpora.manifest import scan
from pipeline.dataset.description import DESCRIPTION_LOCK, WrongDataset, require_ours
from pipeline.engine import ray_cluster, ray_engine, run, teachers
from tests.conftest import ROOT, talk, write
from tests.drills.drill_cluster import begin, held, wait_for
from tests.drills.drill_job import stub_job


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_specs.io.retry.WAITS_S", (0.0, 0.0, 0.0))
    files._warn_once.cache_clear()


def failing(number: int, left: list[int] | None = None) -> Any:
    """A call that fails with an error number, for ever or while ``left`` has something."""

    def call(*_: object, **__: object) -> None:
        if left is None or (left and left.pop() is not None):
            raise OSError(number, os.strerror(number))

    return call


# --- locks and sync -------------------------------------------------------------------------------


NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EACCES, errno.EIO)
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)


@pytest.mark.parametrize(
    ("module", "call", "number", "said"),
    [
        *((fcntl, "flock", number, "its file system has no locks") for number in NO_LOCKS),
        *((os, "fsync", number, "its file system cannot sync") for number in NO_SYNC),
    ],
)
def test_without_locks_or_sync_files_are_written_with_one_warning(
    module: Any, call: str, number: int, said: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(module, call, failing(number))
    for name in ("a", "b"):
        with only_writer(tmp_path):
            write_text(tmp_path / name, "whole")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    told = capsys.readouterr().err
    assert told.count("warning") == 1 and f"{tmp_path}: {said}" in told


def test_a_lock_that_is_held_means_another_run(tmp_path: Path) -> None:
    with (
        only_writer(tmp_path),
        pytest.raises(UserError, match=rf"{tmp_path}: another command .*process {os.getpid()} on"),
        only_writer(tmp_path),
    ):
        pass


def test_without_locks_the_record_of_a_living_process_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        record = {"host": files.here(), "pid": other.pid, "start": files._start_of(other.pid)}
        (tmp_path / files.LOCK_FILE).write_text(json.dumps(record))
        monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
        with pytest.raises(UserError, match=f"process {other.pid}"), only_writer(tmp_path):
            pass
        other.communicate(b"\n")
    with only_writer(tmp_path):  # it ended
        pass


@pytest.mark.parametrize(
    "whole", [partial(write_text, text="whole"), partial(corpora.write_flac, wave=talk(1, 0))]
)
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_what_a_sync_says_is_lost_is_told_with_the_path(
    number: int, whole: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(OSError, match=str(tmp_path / "a")) as told:
        whole(tmp_path / "a")
    assert told.value.errno == number and os.listdir(tmp_path) == []


def test_a_cache_without_locks_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    with RemoteFolder("memory://unlocked").writing("a") as file:
        file.write(b"content")
    cache = FileCache(tmp_path, 1 << 20)
    remote = RemoteFile(RemoteFolder("memory://unlocked"), "a", 7, None, cache)
    assert os.pread(remote.open().number, 7, 0) == b"content"
    assert capsys.readouterr().err.count("no locks") == 1
    assert not list(tmp_path.glob("*.tmp"))


# --- one writer -----------------------------------------------------------------------------------


def test_leftovers_go_from_every_subfolder_and_nothing_else(tmp_path: Path) -> None:
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    ).stdout.strip()
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    ours = folder / f".x.json.{files.here()}.{dead}.0a1b2c3d.tmp"
    old = [folder / ".x.json.another-host.17.0a1b2c3d.tmp"]
    others = [folder / name for name in ("mine.part", "my.copy", ".new.part", ".y.tmp")]
    living = folder / f".x.json.{files.here()}.{os.getpid()}.0a1b2c3d.tmp"
    kept = [*others, living, folder / f".x.json.another-host.{dead}.0a1b2c3d.tmp"]
    for path in (ours, *old, *kept):
        path.write_bytes(b"half")
    for path in (*old, others[0], others[1], others[3]):
        os.utime(path, (time.time() - 2 * files.ABANDONED_S,) * 2)
    remove_leftovers(tmp_path)
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == sorted(kept)


def test_two_writers_of_one_name_never_meet(tmp_path: Path) -> None:
    path = tmp_path / "room.flac"
    with whole_file(path) as one, whole_file(path) as other:
        one.write(b"one")
        other.write(b"other")
    assert path.read_bytes() == b"one" and os.listdir(tmp_path) == ["room.flac"]
    record = tmp_path / "speech.flac"
    with whole_file(record.with_suffix(".json")) as begun:
        corpora.write_record(record, {"path": "speech.flac"})
        begun.write(b"{}")


def test_a_corpus_has_one_maker_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["corpora", "noise", "--out", str(tmp_path / "noise"), "--count", "1"]
    with only_writer(tmp_path / "noise"):
        assert main(command) == 2
    assert "another command writes to it" in capsys.readouterr().err
    assert main(command) == 0


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ECONNRESET])
def test_a_passing_error_of_a_read_is_tried_again(number: int) -> None:
    left = [1, 2]
    patiently(lambda: failing(number, left)())
    assert left == []


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.EMFILE])
def test_and_what_stays_is_told_at_once(number: int) -> None:
    left = [1, 2]
    with pytest.raises(OSError):
        patiently(lambda: failing(number, left)())
    assert left == [1]


def test_a_network_that_fails_twice_costs_no_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, real = [1, 2], audio._Local.sound
    write(tmp_path / "a.wav", talk(1, 0))

    def sound(self: audio._Local) -> Any:
        if left and left.pop():
            raise soundfile.LibsndfileError(audio.SF_ERR_SYSTEM)
        return real(self)

    monkeypatch.setattr(audio._Local, "sound", sound)
    found = scan("speech", find_corpus("speech", "a test"), [tmp_path])
    assert found.table["frames"].to_pylist() == [16_000] and left == []


def test_what_the_system_refuses_is_told_with_path_and_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, real = write(tmp_path / "a.wav", talk(1, 0)), audio._Local.at
    said = soundfile.LibsndfileError(audio.SF_ERR_SYSTEM)
    assert "System error" in str(said)

    def at(self: audio._Local, start: int, count: int) -> bytes:
        if count > 1024:  # not the look at the format
            raise OSError(errno.EMFILE, "Too many open files")
        return real(self, start, count)

    monkeypatch.setattr(audio._Local, "at", at)
    monkeypatch.setattr(audio._Local, "sound", failing_with(said))
    with pytest.raises(OSError) as told:
        audio.header_of(clip)
    assert (told.value.errno, told.value.filename) == (errno.EMFILE, str(clip))


def failing_with(error: Exception) -> Any:
    def fail(*_: object) -> None:
        raise error

    return fail


class ServerError(Exception):
    def __init__(self, status: int) -> None:
        self.status = status


def of_package(package: str, name: str) -> Exception:
    """As a package behind fsspec raises it, which is not imported here."""
    kind = type(name, (Exception,), {"__module__": f"{package}.errors"})
    return type("Derived", (kind,), {"__module__": "elsewhere"})()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (AttributeError("ours"), False),
        (KeyError("ours"), False),
        (RuntimeError("ours"), False),
        (AssertionError(), False),
        (ZeroDivisionError(), False),
        (Exception("of nobody knows whom"), False),
        (UserError("wrong"), False),
        (FileNotFoundError("gone"), False),
        (PermissionError(errno.EACCES, "no"), False),
        (OSError(errno.ENOSPC, "full"), False),
        (OSError(errno.EMFILE, "too many"), False),
        (of_package("botocore", "NoCredentialsError"), False),
        (of_package("aiohttp", "ClientConnectorCertificateError"), False),
        (ServerError(403), False),
        (ServerError(429), True),
        (ServerError(503), True),
        (TimeoutError(), True),
        (ConnectionResetError(), True),
        (OSError("3 of 7 bytes came"), True),
        (OSError(errno.ESTALE, "stale"), True),
        (OSError(errno.EIO, "of s3fs"), True),
        (of_package("aiohttp", "ClientPayloadError"), True),
        (of_package("botocore", "HTTPClientError"), True),
        (of_package("httpx", "TransportError"), True),
        (of_package("urllib3", "ProtocolError"), True),
    ],
)
def test_what_passes_is_listed_by_kind(error: Exception, passes: bool) -> None:
    assert is_transient(error) is passes


def test_a_removed_folder_is_not_made_again_by_a_file(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path / "gone")
    for name in ("shard-000000.tar", "attempts/a.json"):
        with pytest.raises(FileNotFoundError), folder.writing(name) as file:
            file.write(b"x")
    assert not folder.path.exists()


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cuda:x"])
def test_a_device_that_is_not_there_is_told_before_anything_starts(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=f"--device {device}"):
        require_device(device)
    out = str(tmp_path / "out")
    for command in (
        ["shards", "demo", "--samples", "4", "--out", out, "--device", device],
        ["relabel", str(tmp_path), "--teacher", "distillmos", "--out", out, "--device", device],
    ):
        assert main(command) == 2
        assert f"--device {device}" in capsys.readouterr().err
    assert not Path(out).exists()


# --- two at once, and what is removed under a run -------------------------------------------------

SIZE = ("--samples", "24")


def test_a_folder_removed_under_a_run_is_told_and_the_run_has_failed(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    with held(log):
        process = begin(out, *SIZE, "--log", str(log))
        wait_for(log.exists, 200, "no shard is begun", process)  # held in its first shard
        shutil.rmtree(out)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1, said
    assert f"{out / 'dataset.json'} was removed under this run: run the same command again" in said
    assert "Traceback" not in said and not out.exists()


@pytest.mark.slow
def test_the_same_recipe_twice_into_one_folder_is_refused_and_parts_are_not(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    with held(log):
        one = begin(out, *SIZE, "--log", str(log), "--part", "1/2")
        wait_for(log.exists, 200, "no shard is begun", one)
        same, other = begin(out, *SIZE, "--part", "1/2"), begin(out, *SIZE, "--part", "2/2")
        said, _ = same.communicate(timeout=120)
        assert same.returncode == 2 and "another command writes to it" in said
        assert other.wait(timeout=120) == 0
    assert one.wait(timeout=120) == 0
    assert len(list(out.glob("shard-*.json"))) == 6 and (out / "README.md").is_file()


def test_of_two_recipes_begun_together_one_is_refused(tmp_path: Path) -> None:
    job = stub_job(tmp_path, 8)
    with (tmp_path / DESCRIPTION_LOCK).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        second = begin(tmp_path, *SIZE)  # of the same recipe: it has to wait, too
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(timeout=0.5)
        assert json.loads((tmp_path / "dataset.json").read_text())["samples"] == 8
    assert second.wait(timeout=120) == 0
    changed = json.loads((tmp_path / "dataset.json").read_text())
    changed["identity"]["teacher_sha256"] = "1" * 64
    (tmp_path / "dataset.json").write_text(json.dumps(changed))
    with pytest.raises(WrongDataset, match=r"another run wrote another dataset.*teacher_sha256"):
        require_ours(job)


# --- Ray's place ----------------------------------------------------------------------------------


def test_a_ray_folder_is_this_users_alone_and_short_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("long" * 20)))
    folder = ray_cluster.ray_folder()
    assert len(str(folder)) <= ray_cluster.MOST_LETTERS
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_ray_folder_of_another_user_is_told_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as base:
        monkeypatch.setenv("RAY_TMPDIR", base)
        monkeypatch.setattr(os, "getuid", lambda: 12_345)
        (Path(base) / "ray-12345").mkdir()
        os.chown(Path(base) / "ray-12345", os.geteuid(), -1)
        with pytest.raises(UserError, match=r"ray-12345: is not a folder of this user.*RAY_TMPDIR"):
            ray_cluster.ray_folder()
        (Path(base) / "ray-12345").rmdir()
        monkeypatch.setattr(Path, "mkdir", failing(errno.EACCES))
        with pytest.raises(UserError, match="Permission denied: set RAY_TMPDIR"):
            ray_cluster.ray_folder()


def test_a_token_is_for_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    token = tmp_path / ".ray" / "auth_token"
    ray_cluster.require_private_token()
    first = token.read_text()
    assert len(first) == 64 and token.stat().st_mode & 0o777 == 0o600
    token.chmod(0o644)  # as Ray itself writes it
    ray_cluster.require_private_token()
    assert token.read_text() == first and token.stat().st_mode & 0o777 == 0o600
    assert os.listdir(token.parent) == ["auth_token"]


@pytest.mark.parametrize("listens", [True, False])
def test_an_address_where_no_ray_answers_is_told_in_seconds(
    listens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "x")
    with socket.socket() as server:  # one that hangs takes connections, and says nothing
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(
            UserError, match=f"RAY_ADDRESS {address}: no Ray cluster answers.*unset"
        ):
            ray_cluster.require_answer(address, 1.0)
        assert time.monotonic() - began < 30


def test_a_ray_that_does_not_end_is_killed_or_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    program, left = tmp_path / "gcs_server", list[object]()
    program.symlink_to(Path(sys.executable).resolve())
    monkeypatch.setattr(ray_cluster, "LEAVE_S", 0.2)
    monkeypatch.setattr(ray_cluster.atexit, "unregister", left.append)
    with subprocess.Popen([program, "-c", "input()"], stdin=subprocess.PIPE) as gcs:
        monkeypatch.setattr(ray, "shutdown", gcs.wait)  # of a GCS of one's own
        ray_cluster.leave_ray()
        assert gcs.returncode == -9 and left == []
    ever = threading.Event()
    monkeypatch.setattr(ray, "shutdown", ever.wait)  # of a cluster's
    ray_cluster.leave_ray()
    assert left == [ray.shutdown]
    place = SimpleNamespace(group=SimpleNamespace(wait=lambda seconds: True))
    monkeypatch.setattr(teachers, "TeachersPlace", lambda *_: place)
    monkeypatch.setattr("ray.util.remove_placement_group", lambda _: ever.wait())
    with teachers._reserved({"CPU": 1.0}, 1):
        pass
    ever.set()


@pytest.mark.slow
def test_a_gcs_that_hangs_does_not_hold_the_end_of_a_finished_job(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    with held(log):
        process = begin(out, *SIZE, "--engine", "ray", "--log", str(log))
        wait_for(log.exists, 200, "no shard is begun", process)
        children = psutil.Process(process.pid).children()
        (gcs,) = (one for one in children if one.name() == "gcs_server")
        gcs.suspend()
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert (out / "README.md").is_file()


def test_a_users_error_in_a_worker_is_found_under_rays_pages() -> None:
    from ray import exceptions as kinds

    def wrapped(error: Exception) -> Exception:
        return kinds.RayTaskError("make", "Traceback: pages", error).as_instanceof_cause()

    inner = UserError("shard-000001.tar: damaged: make it again")
    inner.__cause__ = ValueError("what the parser said")
    assert ray_engine.cause_of(wrapped(inner)) is inner
    lost = OSError(errno.ENOSPC, "full", "a.tar")
    assert ray_engine.cause_of(wrapped(lost)) is lost
    bug = ray_engine.cause_of(wrapped(TypeError("ours")))
    assert type(bug) is RuntimeError and "pages" in str(bug)  # ours: with its traceback
    gone = ray_engine.cause_of(kinds.RayActorError())
    assert isinstance(gone, UserError) and "\n" not in str(gone)


def broken_factory(*_: object) -> Any:
    raise UserError("the teacher cannot be had: do something")


@pytest.mark.slow
def test_a_worker_that_cannot_begin_says_why_itself(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"^the teacher cannot be had: do something$"):
        run.run(stub_job(tmp_path, 16), "local", 2, progress=False, factory=broken_factory)
    assert "Traceback" not in capfd.readouterr().err


def test_a_lock_file_goes_with_its_holder_and_who_opened_it_before_takes_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, takes = tmp_path / files.LOCK_FILE, list[int]()
    lock = files.lock

    def removed_meanwhile(file: Any, *rest: Any) -> bool:
        takes.append(file.fileno())
        if len(takes) == 1:  # as its holder does, just before it lets go of it
            path.unlink()
        return lock(file, *rest)

    monkeypatch.setattr(files, "lock", removed_meanwhile)
    with only_writer(tmp_path):
        assert len(takes) == 2 and json.loads(path.read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


OWN_RAY = """
import psutil
from pipeline.engine import ray_cluster
ray_cluster.start_ray(1)
import ray
ray.get(ray.remote(lambda: 1).remote())
for process in psutil.Process().children(recursive=True):
    for one in process.net_connections("inet"):
        if one.status == psutil.CONN_LISTEN:
            print(one.laddr.ip)
ray.shutdown()
"""


@pytest.mark.slow
def test_a_ray_of_ones_own_listens_on_loopback_alone(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", OWN_RAY], cwd=ROOT, env=env, capture_output=True, text=True
    )
    listening = ran.stdout.split()
    assert listening, ran.stderr
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
