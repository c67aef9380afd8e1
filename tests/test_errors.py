"""A user's error is one sentence and exit status 2; a mistake of ours is a traceback and 1."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch

from data_specs.io.cli import STOPPED_WORDS, run_command
from pipeline.__main__ import VERBS as PIPELINE
from pipeline.__main__ import main as pipeline
from pipeline.corpora import synthetic
from tests.conftest import ROOT
from train.__main__ import VERBS as TRAIN
from train.__main__ import main as train

CLIS = {"pipeline": "pipeline.dataset.verify", "train": "train.student.variants"}
"""A verb of each that is quick to import."""


def ended(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A Python program that has ended."""
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


def broken(cli: str, error: str) -> subprocess.CompletedProcess[str]:
    """A command whose verb raises an error."""
    module = CLIS[cli]
    verb = {"pipeline": ["verify", "."], "train": ["variants"]}[cli]
    return ended(f"""
import sys, {module}
from data_specs.io.errors import UserError
from {cli}.__main__ import main
def broken(*_):
    raise {error}
{module}.run = broken
sys.exit(main({verb!r}))
""")


def test_help_imports_no_verb() -> None:
    code = "import sys; from {0}.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: "
    code += "print('torch' in sys.modules, 'pandas' in sys.modules, 'pyarrow' in sys.modules)"
    for cli in CLIS:
        assert ended(code.format(cli)).stdout.splitlines()[-1] == "False False False"


@pytest.mark.parametrize(
    ("main", "verb"), [(pipeline, v) for v in PIPELINE] + [(train, v) for v in TRAIN]
)
def test_every_verb_has_help(
    main: Callable[[list[str]], int], verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0 and f" {verb} " in capsys.readouterr().out


@pytest.mark.parametrize("cli", CLIS)
@pytest.mark.parametrize("error", ["RuntimeError('shapes')", "ValueError('shapes')"])
def test_a_mistake_of_ours_shows_its_traceback(cli: str, error: str) -> None:
    done = broken(cli, error)
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert error.partition("(")[0] in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("cli", CLIS)
@pytest.mark.parametrize("error", ["UserError('a.wav: mend it')", "OSError(28, 'full', 'a.wav')"])
def test_an_error_of_the_users_is_a_sentence(cli: str, error: str) -> None:
    done = broken(cli, error)
    assert done.returncode == 2 and done.stderr.startswith("error: a.wav: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("cli", CLIS)
def test_ctrl_c_ends_both_programs_alike(cli: str) -> None:
    done = broken(cli, "KeyboardInterrupt")
    assert (done.returncode, "Traceback" in done.stderr) == (130, False)
    assert done.stderr.startswith("interrupted")


def test_a_signal_that_comes_while_a_library_calls_back_is_not_lost() -> None:
    """cffi, between soundfile and a file of ours, cannot pass the exception on."""
    code = """
import io, os, signal, time
import soundfile
from data_specs.io.cli import end, run_command
class Closing(io.BytesIO):
    told = False
    def tell(self):
        if not self.told:
            self.told = True
            os.kill(os.getpid(), signal.SIGTERM)
        return super().tell()
def work():
    wav = io.BytesIO()
    soundfile.write(wav, [0.0] * 100, 16_000, format="WAV")
    soundfile.read(Closing(wav.getvalue()))
    time.sleep(60)
    return 0
end(run_command(work))
"""
    found = ended(code)
    assert (found.returncode, found.stderr.strip()) == (143, STOPPED_WORDS)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("x"), ValueError("x"), KeyError("x"), TypeError("x"), OSError(9, "bad file")],
)
def test_what_no_user_can_mend_is_not_caught(error: Exception) -> None:
    def work() -> int:
        raise error

    with pytest.raises(type(error)):
        run_command(work)


def test_a_pipe_of_our_own_that_breaks_is_not_the_readers_end() -> None:
    """``| head`` ends a command without a word; a worker that died is another thing."""
    code = "from data_specs.io.cli import run_command; import sys, os\n"
    own = code + "def work():\n  r, w = os.pipe(); os.close(r); os.write(w, b'x')\n"
    assert "Traceback" in ended(own + "sys.exit(run_command(work))").stderr
    reader, writer = os.pipe()
    os.close(reader)
    out = code + "def work():\n  print('x', flush=True)\nsys.exit(run_command(work))"
    done = subprocess.run(
        [sys.executable, "-c", out], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (143, b"")


@pytest.mark.parametrize("run", [pipeline, train])
def test_help_says_the_exit_statuses(run: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["--help"])  # type: ignore[operator]
    said = " ".join(capsys.readouterr().out.split())
    assert "exit status: 0 done; 1 not whole" in said
    assert "130 Ctrl-C, 143 SIGTERM or SIGHUP" in said


# --- users' errors of each sort, through the commands ---------------------------------------------


def checkpoint(folder: Path, content: object) -> Path:
    """A .pt file with this content."""
    torch.save(content, folder / "best.pt")
    return folder / "best.pt"


DEEP = b'{"a":' * 100_000


def score(folder: Path, model: Path | str) -> int:
    """Score a clip of half a second."""
    soundfile.write(folder / "x.wav", [0.1] * 8000, 16000)
    words = [str(folder / "x.wav"), "--out", str(folder / "t.csv"), "--model", str(model)]
    return train(["score", *words])


BAD_MODELS = {
    "a list, not an object": (b"[1]", b""),
    "not JSON": (b"{", b""),
    "not UTF-8": (b"\xff\xfe{", b""),
    "nested too deeply": (DEEP, b""),
    "no config": (b"{}", b"\x02\0\0\0\0\0\0\0{}"),
    "no safetensors": (b'{"config": {}}', b"nothing"),
}


@pytest.mark.parametrize("sort", BAD_MODELS)
def test_a_damaged_model_is_told_by_its_file(
    sort: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, content in zip(("model.json", "model.safetensors"), BAD_MODELS[sort], strict=True):
        (tmp_path / name).write_bytes(content)
    assert score(tmp_path, tmp_path) == 2
    assert capfd.readouterr().err.startswith(f"error: {tmp_path}")


@pytest.mark.parametrize(
    "content",
    ["x", 3, {"weights": 3}, {"weights": {"a": 1}}, [1], {"weights": {}, "student_config": 7}],
)
def test_a_foreign_checkpoint_is_told_by_its_file(
    content: object, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(tmp_path, content)
    assert score(tmp_path, path) == 2
    assert capfd.readouterr().err.startswith(f"error: {path}")


HASHES = b'"manifests_sha256": {}, "teacher_calibration_sha256": ""'
BAD_DATASETS = (
    b"[]",
    b"{",
    b"\xff\xfe",
    DEEP,
    b'{"identity": {}, "recipe_hash": "x"}',
    b'{"identity": {}, "recipe_hash": "x", "recipe": {"name": 3}, "samples": 1, %s}' % HASHES,
)


@pytest.mark.parametrize("verb", ["verify", "card", "status", "preview"])
@pytest.mark.parametrize("number", range(len(BAD_DATASETS)))
def test_a_damaged_description_is_told_by_its_file(
    verb: str, number: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dataset.json").write_bytes(BAD_DATASETS[number])
    (tmp_path / "shard-000000.tar").write_bytes(b"")
    (tmp_path / "shard-000000.json").write_bytes(b"{}")
    assert pipeline([verb, str(tmp_path)]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"error: {tmp_path}") and "Traceback" not in said


def test_a_description_without_its_recipe_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    about = b'{"identity": {}, "recipe_hash": "x", "recipe": {"name": "a"}, "samples": 1, %s}'
    (tmp_path / "dataset.json").write_bytes(about % HASHES)
    assert pipeline(["verify", str(tmp_path)]) == 2
    assert "dataset.json: recipe.sources: " in capfd.readouterr().err


def test_a_missing_synthesizer_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(synthetic.shutil, "which", lambda program: None)
    assert pipeline(["corpora", "speech", "--out", str(tmp_path), "--count", "1"]) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ") and "is not installed: run" in said


def test_a_mistake_in_scoring_is_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was once written into the table as what is wrong with the clip."""
    from train.scoring.scorer import StudentScorer

    def broken(*_: object) -> None:
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr(StudentScorer, "parts", broken)
    with pytest.raises(ValueError, match="broadcast"):
        score(tmp_path, "v7")


def test_a_checkpoint_damaged_anywhere_is_told_by_its_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """torch's reader of pickles raises whatever the bytes lead it to."""
    path = checkpoint(tmp_path, {"weights": {"a": torch.zeros(2)}, "student_config": {"x": 1}})
    whole = path.read_bytes()
    first = whole.index(b"\x80\x02")
    for place in range(first, first + 60):
        path.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
        assert score(tmp_path, path) == 2, place
        assert capfd.readouterr().err.startswith(f"error: {path}"), place
