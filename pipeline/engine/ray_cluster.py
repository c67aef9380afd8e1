"""Starts Ray, or joins a cluster: its folder, its token, loopback, and a cluster's answer."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from data_specs.io.cli import signals_for_us_alone
from data_specs.io.errors import UserError
from data_specs.io.files import temporary_name

MOST_LETTERS = 40
"""Of a Ray folder's path. A socket's has 107 at most, and Ray adds 64 (session and name)."""

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Said before Ray is imported: a Ray of one machine, whose servers listen on 127.0.0.1 alone."""

ANSWER_S = 15.0
"""How long a cluster may take to answer: a head that is only just started is there by then."""

STORE_BYTES = 1 << 28
"""Ray's object store, through which only shard numbers pass, and PCM on its way to teachers."""

HEAD_S = 180.0
"""How long a head that answers may have no machine yet, not even its own."""

LEAVE_S = 20.0
"""How long Ray may take to end something: where its GCS hangs it waits for that."""

OWN_RAY = ("", "local")
"""Addresses that stand for a Ray of this run's own."""


def import_ray(address: str) -> Any:
    """Ray, which reads ``LOOPBACK`` as it is imported, and then takes over signals."""
    if address in OWN_RAY:
        os.environ |= LOOPBACK
    with signals_for_us_alone():
        import ray
    return ray


def start_ray(workers: int, address: str = "") -> None:
    """Join the cluster at an address, or start a Ray of this run's own with a core a worker.

    Raises ``UserError`` where that is no cluster, or Ray does not start.
    """
    ray = import_ray(address)
    # Silence Ray's warning that a cluster of its own has a token.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    own = _own_ray(workers) if address in OWN_RAY else {}
    until = time.monotonic() + HEAD_S
    while not ray.is_initialized():
        try:
            with signals_for_us_alone():
                ray.init(
                    address=address or None,
                    log_to_driver=False,
                    logging_level="warning",
                    runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
                    **own,
                )
        except ConnectionError as error:
            # A head that answers and has no machine yet, not even its own: Ray waits a minute for
            # it, which a head on a busy machine can take longer than.
            starting = "No node info found" in str(error.__cause__)
            if not starting or time.monotonic() > until:
                raise UserError(
                    f"--ray-address {address}: no Ray cluster answers: {error}"
                ) from error
        except Exception as error:  # of no class of its own
            if "timed out during startup" not in str(error):
                raise
            raise UserError(
                "Ray does not start here within its own limit of half a minute: is this machine "
                "busy? Run the same command again, or with --engine local"
            ) from error


def _own_ray(workers: int) -> dict[str, Any]:
    """Options of a Ray that is this run's alone: no other machine, and no other user, has to do
    with it."""
    require_private_token()
    return {
        "num_cpus": workers,
        "object_store_memory": STORE_BYTES,
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": str(ray_folder()),
    }


def ends(work: Callable[[], object]) -> bool:
    """Whether a call to Ray ends within ``LEAVE_S``, well or not; else it is left to itself."""

    def call() -> None:
        with suppress(Exception):  # of a job that is done by then
            work()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(LEAVE_S)
    return not thread.is_alive()


def leave_ray() -> None:
    """End this run's own Ray, or leave a cluster: a GCS that hangs does not hold a job's end."""
    import ray

    if ends(ray.shutdown):
        return
    for process in psutil.Process().children():  # of a Ray of one's own: no call waits any more
        if process.name() in ("gcs_server", "raylet"):
            process.kill()
    if not ends(ray.shutdown):
        atexit.unregister(ray.shutdown)  # it would wait, too


def ray_folder() -> Path:
    """This user's own folder for Ray's sessions: sockets and logs, for nobody else to read.

    ``UserError`` where there is none to be had.
    """
    given = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")
    name = f"ray-{os.getuid()}"
    base = given if len(str(given / name)) <= MOST_LETTERS else Path("/tmp")
    folder = base.absolute() / name
    way_out = f"{folder}: {{}}: set RAY_TMPDIR to a folder of your own, of a short path"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise UserError(way_out.format("is not a folder of this user, and Ray needs one"))
        folder.chmod(0o700)
    except OSError as error:
        raise UserError(way_out.format(error.strerror)) from error
    return folder


def require_private_token() -> None:
    """Make the token that Ray's processes know each other by, readable by this user alone."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    path = Path.home() / ".ray" / "auth_token"
    with suppress(OSError):  # without a home Ray says itself what it lacks
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not path.exists():
            _write_token(path)
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)


def _write_token(path: Path) -> None:
    """Whole or not at all; of two that begin at once the first one's stays."""
    temporary = temporary_name(path)
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def require_answer(address: str, seconds: float = ANSWER_S) -> None:
    """``UserError`` where no cluster answers at an address: Ray itself would try for minutes."""
    where = _last_started() if address == "auto" else address
    if where is None or os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return  # Ray finds or misses it at once, or needs certificates to ask
    import grpc  # type: ignore[import-untyped]

    channel = grpc.insecure_channel(where)
    try:
        grpc.channel_ready_future(channel).result(timeout=seconds)
    except grpc.FutureTimeoutError:
        source = "RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") else "--ray-address"
        raise UserError(
            f"{source} {address}: no Ray cluster answers at {where} within {seconds:g} s: start "
            "one there (ray start --head), give another address, or none for a Ray of its own "
            "(unset RAY_ADDRESS)"
        ) from None
    finally:
        channel.close()


def _last_started() -> str | None:
    """What ``auto`` means where no head runs here: the address noted by the last ``ray start``."""
    if any(process.name() == "gcs_server" for process in psutil.process_iter(["name"])):
        return None
    base = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")
    try:
        return (base / "ray" / "ray_current_cluster").read_text().strip() or None
    except OSError:
        return None
