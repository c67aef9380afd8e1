"""Words and self-supervision as tasks of ``train finetune``: killed, continued, compared."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.nn.utils.rnn import pad_sequence

from tests.train_helpers import dies_at, killed, logged, require_same_states
from train.__main__ import main
from train.finetune.finetune import Finetuning
from train.finetune.saved import load_model
from train.models.encoders.conformer import Conformer
from train.models.encoders.loading import load_encoder

SIZES = "{width: 16, layers: 1, heads: 2, hidden: 16, channels: 4, mels: 20, dropout: 0.1}\n"
PITCH = {"a": 300, "b": 1000, "c": 3000}


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Letters are pitches of 120 ms: 12 utterances to train, 4 to validate, 4 to test."""
    folder = tmp_path_factory.mktemp("spoken")
    (folder / "tiny.yaml").write_text(SIZES)
    wide = SIZES.replace("width: 16", "width: 32").replace("hidden: 16", "hidden: 128")
    (folder / "wide.yaml").write_text(wide)
    draw = np.random.default_rng(0)
    time_T = np.arange(1920) / 16_000
    rows = []
    for number, split in enumerate(["train"] * 12 + ["validation"] * 4 + ["test"] * 4):
        letters = draw.permutation(list(PITCH))[: 2 + number % 2]
        tones = [np.sin(2 * np.pi * PITCH[letter] * time_T) for letter in letters]
        soundfile.write(folder / f"{number}.wav", 0.3 * np.concatenate(tones), 16_000)
        rows.append([f"{number}.wav", split, " ".join(letters).upper(), f"s{number // 2}"])
    with (folder / "letters.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "split", "text", "speaker"], *rows])
    return folder


def finetune(spoken: Path, out: Path, *more: object) -> int:
    words = ["finetune", "--encoder", spoken / "tiny.yaml", "--clips", spoken / "letters.csv"]
    words += ["--out", out, "--batch", 4, "--warmup", 0, "--device", "cpu", "--logger", "none"]
    return main([*map(str, [*words, *more])])


@pytest.mark.parametrize("tasks", [("words", "self"), ("words-ctc",)])
def test_killed_and_continued_equals_unbroken(
    spoken: Path, tmp_path: Path, tasks: tuple[str, ...]
) -> None:
    options = ("--tasks", *tasks, "--steps", 6, "--validate-every", 3, "--checkpoint-every", 1)

    def run(out: Path) -> None:
        assert finetune(spoken, out, *options, "--chunk-ms", 80) == 0

    run(tmp_path / "whole")
    killed(
        lambda: dies_at(Finetuning, "update", lambda t: t.step == 4, lambda: run(tmp_path / "c"))
    )
    run(tmp_path / "c")
    require_same_states(tmp_path / "whole", tmp_path / "c", "encoder", "tasks")
    assert logged(tmp_path / "whole") == logged(tmp_path / "c")
    for file in ("encoder.safetensors", "tasks.safetensors", "results.csv", f"{tasks[0]}.csv"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "c" / file).read_bytes()
    encoder, heads, about = load_model(tmp_path / "whole")
    assert isinstance(encoder, Conformer) and encoder.config.chunk == 2 and set(heads) == set(tasks)
    figures = [row["figure"] for row in about["results"]["rows"]]
    assert figures[:4] == ["wer", "substitutions", "deletions", "insertions"]
    assert figures[4:] == (["loss", "accuracy"] if "self" in tasks else [])


@pytest.mark.parametrize("by", ["l0", "low-rank"])
def test_a_recogniser_shrinks_while_it_learns(spoken: Path, tmp_path: Path, by: str) -> None:
    options = ("--tasks", "words", "--steps", 8, "--validate-every", 8, "--chunk-ms", 320)
    joint = ("--keep", 0.8, "--by", by, "--distil-from", "self", "--encoder", spoken / "wide.yaml")
    assert finetune(spoken, tmp_path / "run", *options, *joint) == 0
    encoder, heads, about = load_model(tmp_path / "run")
    whole = load_encoder(spoken / "wide.yaml").streaming(320)
    left = encoder.sizes()["macs_per_second"] / whole.sizes()["macs_per_second"]
    assert 0.79 <= left <= 0.8
    assert about["results"]["macs_per_second"] == encoder.sizes()["macs_per_second"]
    # What was judged is what is loaded: the same words are heard.
    rows = list(csv.DictReader((tmp_path / "run/words.csv").open(newline="")))
    waves = [torch.from_numpy(soundfile.read(spoken / row["clip"])[0]).float() for row in rows]
    lengths_B = torch.tensor([len(wave_T) for wave_T in waves])
    with torch.inference_mode():
        states = encoder(pad_sequence(waves, batch_first=True), lengths_B)
        assert heads["words"].predict(states) == [row["heard"] for row in rows]


@pytest.mark.slow
def test_letters_are_learned_and_systems_compared(
    spoken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = ("--tasks", "words", "--steps", 2, "--validate-every", 2)
    assert finetune(spoken, tmp_path / "untrained", *slow) == 0
    options = ("--tasks", "words", "--steps", 150, "--validate-every", 50, "--lr", 0.005)
    assert finetune(spoken, tmp_path / "trained", *options, "--head-lr", 0.005) == 0
    rows = json.loads((tmp_path / "trained/results.json").read_text())["rows"]
    assert {row["figure"]: row["value"] for row in rows}[
        "wer"
    ] < 0.6  # a start: 12 clips to learn from
    capsys.readouterr()
    tables = [tmp_path / name / "words.csv" for name in ("untrained", "trained")]
    assert main(["word-errors", *map(str, tables)]) == 0
    first, second, above = capsys.readouterr().out.splitlines()
    assert "1.000" in first and "of 10 words" in second and "above the first: -" in above


def test_tables_of_other_utterances_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("a.csv", "one two"), ("b.csv", "one")):
        (tmp_path / name).write_text(f"group,text,heard\ns1,{text},one\n")
    assert main(["word-errors", str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]) == 2
    assert "not the utterances of" in capsys.readouterr().err


def test_what_does_not_fit_is_named(
    spoken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ("--chunk-ms", 100, "--tasks", "words")
    assert finetune(spoken, tmp_path / "a", *bad) == 2
    assert "no whole number of states of 40 ms" in capsys.readouterr().err
    assert finetune(spoken, tmp_path / "b", "--tasks", "self", "--encoder", "log-mel") == 2
    assert "self: trains a conformer" in capsys.readouterr().err
    (spoken / "bad.yaml").write_text("{widht: 3}")
    assert (
        finetune(spoken, tmp_path / "c", "--tasks", "self", "--encoder", spoken / "bad.yaml") == 2
    )
    assert "width" in capsys.readouterr().err
    (spoken / "none.csv").write_text(
        "path,split,text\n0.wav,train,?!\n1.wav,validation,a\n2.wav,test,a\n"
    )
    assert finetune(spoken, tmp_path / "d", "--tasks", "words", "--clips", spoken / "none.csv") == 2
    assert "none.csv: line 2: text '?!' has no letter" in capsys.readouterr().err


def test_a_conformer_is_the_same_each_time_it_is_named(spoken: Path) -> None:
    one, other = (load_encoder(spoken / "tiny.yaml").state_dict() for _ in range(2))
    assert all(one[name].equal(other[name]) for name in one)


def test_a_clip_longer_than_is_heard_is_refused_for_its_text_is_of_all_of_it(
    spoken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(spoken, tmp_path, "--tasks", "words-ctc", "--seconds", 0.3) == 2
    assert "letters.csv: line 3: 0.4 s, but 0.3 are heard" in capsys.readouterr().err
    assert not (tmp_path / "last.pt").exists()
