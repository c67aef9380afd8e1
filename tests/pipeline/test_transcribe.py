"""Texts by a recogniser: kept where there are some, whole after a kill, and whose they are."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from data_specs.io.errors import UserError
from data_specs.io.text import csv_rows
from data_specs.labelled import read_labelled
from pipeline.__main__ import main
from pipeline.audio import Wave
from pipeline.corpora import transcribe
from tests.conftest import talk, write


def fake(waves: Sequence[Wave]) -> list[str]:
    """A recogniser that hears how long a clip is, and stumbles over a loud last sample."""
    return [f"Tenths: {len(wave) // 1600}{' uh' if abs(wave[-1]) > 0.4 else ''}" for wave in waves]


@pytest.fixture
def by_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcribe, "load_recogniser", lambda *_: ("fake 123", fake))


def command(source: Path, out: Path, *more: str) -> list[str]:
    return ["transcribe", str(source), "--model", "fake", "--out", str(out), "--batch", "2", *more]


def grid(folder: Path) -> Path:
    """Two clips, the first with a text of its own, clean and with a last sample of noise."""
    rows = []
    for i in range(2):
        clean, noisy = f"clean/{i}.wav", f"noise0/{i}.wav"
        write(folder / clean, talk(1 + i, i))
        write(folder / noisy, np.append(talk(1 + i, i), np.float32(0.5)))
        text, by = ("tenths 11", "exact") if i == 0 else ("", "")
        for path, condition in ((clean, "clean"), (noisy, "noise0")):
            rows.append({"path": path, "text": text, "text_by": by, "split": "test"})
            rows[-1] |= {"condition": condition, "clean": clean}
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "labels.csv"


@pytest.mark.usefixtures("by_fake")
def test_texts_are_filled_from_the_clean_twin_and_errors_counted(tmp_path: Path) -> None:
    assert main(command(grid(tmp_path / "in"), tmp_path / "out")) == 0
    rows = csv_rows(tmp_path / "out" / "labelled.csv")
    assert [(row["text"], row["text_by"]) for row in rows] == [
        *[("tenths 11", "exact")] * 2,
        *[("Tenths: 20", "fake 123")] * 2,
    ]
    heard = ["Tenths: 10", "Tenths: 10 uh", "Tenths: 20", "Tenths: 20 uh"]
    assert [row["heard"] for row in rows] == heard
    clips = read_labelled([tmp_path / "out" / "labelled.csv"])  # paths lead back to the clips
    assert [clip.clean.name for clip in clips if clip.clean] == ["0.wav", "0.wav", "1.wav", "1.wav"]
    errors = csv_rows(tmp_path / "out" / "word_errors.csv")
    assert [tuple(row.values()) for row in errors] == [
        ("clean", "2", "4", "1", "0.25"),  # 10 for 11
        ("noise0", "2", "4", "3", "0.75"),  # and twice "uh" too many
    ]


@pytest.mark.usefixtures("by_fake")
def test_killed_and_resumed_it_is_the_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(5):
        write(tmp_path / "in" / f"{i}.wav", talk(1 + i / 10, i))
    assert main(command(tmp_path / "in", tmp_path / "a")) == 0
    calls: list[int] = []

    def killed(waves: Sequence[Wave]) -> list[str]:
        calls.append(len(waves))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fake(waves)

    monkeypatch.setattr(transcribe, "load_recogniser", lambda *_: ("fake 123", killed))
    assert main(command(tmp_path / "in", tmp_path / "b")) == 130
    assert not (tmp_path / "b" / "labelled.csv").exists()
    assert main(command(tmp_path / "in", tmp_path / "b")) == 0
    assert calls == [2, 2, 2, 1]  # the first batch is not heard again
    assert (tmp_path / "a/labelled.csv").read_bytes() == (tmp_path / "b/labelled.csv").read_bytes()
    assert main(command(tmp_path / "in", tmp_path / "b", "--batch", "3")) == 2


@pytest.mark.usefixtures("by_fake")
def test_clips_that_cannot_be_heard_are_named_and_heard_once_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        write(tmp_path / "in" / f"{i}.wav", talk(1, i))
    write(tmp_path / "in" / "1.wav", np.full(16_000, np.nan, np.float32), subtype="FLOAT")
    write(tmp_path / "in" / "2.wav", np.zeros(31 * 16_000, np.float32))
    assert main(command(tmp_path / "in", tmp_path / "out")) == 1
    said = capsys.readouterr().err
    assert "1.wav: NaN or infinity" in said and "2.wav: longer than 30 s: cut it" in said
    assert [r["heard"] for r in csv_rows(tmp_path / "out/labelled.csv")] == ["Tenths: 10", "", ""]
    write(tmp_path / "in" / "1.wav", np.full(8_000, 0.1, np.float32), subtype="FLOAT")
    size = 16_000 * 4 - 8_000 * 4  # the folder is known by its files' sizes
    with (tmp_path / "in" / "1.wav").open("ab") as file:
        file.write(bytes(size))
    write(tmp_path / "in" / "2.wav", np.zeros(31 * 16_000, np.float32))
    assert main(command(tmp_path / "in", tmp_path / "out")) == 1
    assert [r["heard"] for r in csv_rows(tmp_path / "out/labelled.csv")][:2] == [
        "Tenths: 10",
        "Tenths: 5",
    ]


def test_words_are_compared_without_case_and_punctuation() -> None:
    assert transcribe.spelled("  It's, OK -- No. 9!") == ["it's", "ok", "no", "9"]


# --- real layouts ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ctc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CTC recogniser in the official layout, small, that says one letter whatever it hears."""
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
    )

    folder = tmp_path_factory.mktemp("ctc")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (20, 16), "conv_kernel": (20, 16)}
    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(
        Wav2Vec2Config(
            **shape,
            **convolutions,
            intermediate_size=8,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
            vocab_size=6,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(torch.tensor([0, 0, 0, 0, 0, 1.0]))
    model.save_pretrained(folder)
    return folder


def test_a_ctc_recogniser_of_a_folder(ctc: Path, tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / "in" / f"{i}.wav", talk(0.5 + i / 4, i))
    out = tmp_path / "out"
    assert main([*command(tmp_path / "in", out), "--model", str(ctc)]) == 0
    rows = csv_rows(out / "labelled.csv")
    assert [row["text"] for row in rows] == ["A"] * 3  # all frames are one letter, once
    name = {row["text_by"] for row in rows}.pop()
    assert name.startswith(f"{ctc.name} ") and len(name.split()[1]) == 12
    assert name == transcribe.load_recogniser(str(ctc))[0]


def test_no_pickle_no_code_and_no_half_a_model(ctc: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no recogniser of words can be loaded"):
        transcribe.load_recogniser(str(tmp_path / "nowhere"))
    from safetensors.torch import load_file, save_file

    files = {path.name: path.read_bytes() for path in ctc.iterdir()}
    weights = load_file(ctc / "model.safetensors")
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    save_file(
        {n: w for n, w in weights.items() if "lm_head" not in n},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UserError, match="its weights lack 'lm_head"):
        transcribe.load_recogniser(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="no recogniser of words can be loaded"):
        transcribe.load_recogniser(str(tmp_path))


def test_a_whisper_of_random_weights_gives_each_clip_a_text_the_same_again(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

    vocabulary = {f"w{i}": i for i in range(20)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="w0")).save(str(tmp_path / "tokenizer.json"))
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1, "decoder_start_token_id": 2}
    sizes = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))
    }
    config = WhisperConfig(
        vocab_size=20,
        d_model=16,
        max_target_positions=8,
        **sizes,
        **special,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )
    torch.manual_seed(1)
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(max_length=6, **special)
    model.save_pretrained(tmp_path)
    _, hear = transcribe.load_recogniser(str(tmp_path))
    waves = [talk(1, 0), talk(2, 1)]
    assert hear(waves) == hear(waves) and len(hear(waves)) == 2
