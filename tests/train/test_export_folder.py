"""``train export --out DIR``: a bundle is made beside it and swapped in whole."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from tests.export_helpers import tiny, write_run
from train.__main__ import main
from train.export import export
from train.scoring import bundle
from train.scoring.score import load

CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "ctypes.dlsym"}
"""What an audit hook is told before a folder changes; ``renameat2`` is looked up each time."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network as one small file: what is written where is looked at here, not what."""

    def networks(source: object, out: Path, sha256: str, args: object) -> list[Path]:
        (out / bundle.ONNX).write_text(sha256)
        return [out / bundle.ONNX]

    monkeypatch.setattr(export, "write_networks", networks)


def shifted(folder: Path, shift: float) -> Path:
    """A run of a student whose scores are others by its shift."""
    student = tiny()
    student.head.pool.output.bias.data += shift
    return write_run(folder, student)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def exported(run: Path, out: Path) -> int:
    return main(["export", "--model", str(run), "--out", str(out)])


def foreign_folders(top: Path) -> Iterator[tuple[str, Path]]:
    """Folders that are something else: a project, a trained run, a bundle that was changed."""
    project = top / "project"
    project.mkdir()
    (project / "README.md").write_text("my project")
    yield "README.md", project
    yield "model.json", shifted(top / "other", 0.5)
    for name, change in (("README.md", "my own card"), ("LICENSE", "mine")):
        changed = top / f"changed-{name}"
        assert exported(top / "run", changed) == 0
        (changed / name).write_text(change)
        yield name, changed
    broken = top / "broken"
    broken.mkdir()
    (broken / "checksums.json").write_text("{}")
    (broken / "model.safetensors").write_text("?")
    yield "checksums.json", broken


def test_what_is_no_bundle_is_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shifted(tmp_path / "run", 0)
    for name, folder in foreign_folders(tmp_path):
        before = contents(folder)
        assert exported(tmp_path / "run", folder) == 2
        assert contents(folder) == before
        said = capsys.readouterr().err
        assert str(folder) in said and name in said


def test_a_bundle_is_replaced_whole_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    for shift in (0.0, 1.0):
        run = shifted(tmp_path / f"run{shift:g}", shift)
        assert exported(run, out) == 0
        bundle.verify(out)
        assert load(out).weights_sha256 == load(run).weights_sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "run0", "run1"]


def test_files_have_the_umasks_permissions(tmp_path: Path) -> None:
    run = shifted(tmp_path / "run", 0)
    before = os.umask(0o027)
    try:
        assert exported(run, tmp_path / "bundle") == 0
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "bundle").iterdir()}
    assert modes == {0o640}
    assert stat.S_IMODE((tmp_path / "bundle").stat().st_mode) == 0o750


def killed_at(moment: int, run: Path, out: Path) -> bool:
    """Export in a child that is killed before its nth change; whether it came to that."""
    child = os.fork()
    if not child:
        left = [moment]

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            if (event in CHANGES and str(out.parent) in str(arguments)) or event == "ctypes.dlsym":
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        os._exit(exported(run, out))
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [True, False])
def test_whenever_it_is_killed_one_bundle_is_there_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """Without an exchange of names (``exchange=False``) the next export brings the old one back."""
    old, new = shifted(tmp_path / "old", 0), shifted(tmp_path / "new", 1)
    out = tmp_path / "out" / "bundle"
    assert exported(old, out) == 0
    if not exchange:
        monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    hashes = {load(folder).weights_sha256 for folder in (old, new)}
    moment, away = 0, 0
    while killed_at(moment, new, out):
        moment += 1
        if not out.exists() and not exchange:
            away += 1
            continue
        bundle.verify(out)
        assert load(out).weights_sha256 in hashes
    assert moment > 20 and away <= 2
    assert exported(new, out) == 0
    assert os.listdir(out.parent) == ["bundle"]


def test_two_exports_into_one_folder(tmp_path: Path) -> None:
    """One of them is refused, whichever; the bundle is the other's."""
    run, out = shifted(tmp_path / "run", 0), tmp_path / "bundle"
    script = (
        "import sys; from data_specs.io.files import only_writer; from pathlib import Path\n"
        f"with only_writer(Path({str(tmp_path / '.bundle.export')!r})):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        other.stdout.readline()
        assert exported(run, out) == 2
        assert not out.exists()
        other.stdin.close()
        other.wait()
    assert exported(run, out) == 0
