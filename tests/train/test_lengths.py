"""Short crops: where they are taken, what they are filled with, and what is reported."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest

from data_specs.io.waves import FADE_SAMPLES, filled
from tests.train_helpers import CROP, tone_mos, tone_pcm, write_dataset
from train.data.shards import list_shards
from train.data.stream import ShardSamples
from train.evaluation import lengths
from train.files import csv_rows

RATE = 16_000


class Energy:
    """A scorer that says the energy of what it hears, and keeps it."""

    def __init__(self, name="energy"):
        self.name = name
        self.scored = []

    def window(self, wave_T, padding):
        return filled(wave_T, padding)

    def score_windows(self, waves):
        self.scored += list(waves)
        return [float(np.sum(np.square(wave, dtype=np.float64))) for wave in waves]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("lengths") / "judge", shards=2, samples=5)


def test_crops_and_fillings_are_what_they_say(folder):
    samples, numbers = ShardSamples(list_shards(folder)), list(range(10))
    for seconds in (1, 2, 4):
        length = seconds * RATE
        found = list(lengths.crops(samples, numbers, seconds, seed=0))
        zero, repeat = Energy(), Energy()
        for (label, wave_T), number in zip(found, numbers, strict=True):
            whole = tone_pcm(number).astype(np.float32) / 32768
            start = lengths.crop_start(whole, length, 0, number)
            assert np.array_equal(wave_T, whole[start : start + length])
            assert label == tone_mos(number)
            energy = float(np.sum(np.square(wave_T, dtype=np.float64)))
            padded = zero.window(wave_T, "zero")
            assert zero.score_windows([padded]) == [pytest.approx(energy)]
            assert not padded[length:].any() and np.array_equal(padded[:length], wave_T)
            again = repeat.window(wave_T, "repeat")
            said = repeat.score_windows([again])[0]
            assert said == pytest.approx(energy * CROP / length, rel=0.05)
            kept = length - FADE_SAMPLES  # then its end goes over into its beginning
            assert len(again) == CROP and np.array_equal(again[:kept], wave_T[:kept])
            begin = wave_T[FADE_SAMPLES:kept][: CROP - length]
            assert np.array_equal(again[length : length + len(begin)], begin)


def test_a_crops_place_follows_from_seed_and_number():
    def starts(numbers, seed):
        return [lengths.crop_start(tone_pcm(n), RATE, seed, n) for n in numbers]

    assert starts([3, 1, 2], 0) == [starts([n], 0)[0] for n in (3, 1, 2)]
    assert starts(range(10), 0) != starts(range(10), 1)
    assert len(set(starts(range(10), 0))) > 5
    assert all(0 <= start <= CROP - RATE for start in starts(range(10), 0))


def test_a_silent_place_is_drawn_again():
    wave_T = np.zeros(CROP, np.float32)
    half = CROP // 2
    wave_T[half:] = np.random.default_rng(0).standard_normal(half) * 0.1
    starts = [lengths.crop_start(wave_T, RATE, 0, number) for number in range(50)]
    assert all(start is not None and start + RATE > half for start in starts)
    wave_T[:half] = 1e-5  # 80 dB below the rest: silent too
    assert [lengths.crop_start(wave_T, RATE, 0, number) for number in range(50)] == starts
    wave_T[:half] = 1e-2  # 20 dB below: not silent
    assert min(lengths.crop_start(wave_T, RATE, 0, number) for number in range(50)) < half - RATE


def test_a_clip_that_is_silent_everywhere_is_left_out():
    assert lengths.crop_start(np.zeros(CROP, np.float32), RATE, 0, 0) is None
    click = np.zeros(CROP, np.float32)
    click[7] = 1
    found = [lengths.crop_start(click, 160, 0, number) for number in range(20)]
    assert found.count(None) > 15


def test_samples_are_spread_evenly():
    assert lengths.chosen_numbers(10, None) == list(range(10))
    assert lengths.chosen_numbers(10, 20) == list(range(10))
    assert lengths.chosen_numbers(100, 3) == [0, 50, 99]


def test_all_models_hear_the_same_crops(folder):
    one, two = Energy("one"), Energy("two")
    results = lengths.measure([one, two], folder, [2, 1], seed=0)
    assert len(one.scored) == 10 * (2 + 2 + 1)
    assert all(np.array_equal(a, b) for a, b in zip(one.scored, two.scored, strict=True))
    assert [(row.model, row.seconds, row.padding) for row in results] == [
        (name, seconds, padding)
        for name in ("one", "two")
        for seconds, padding in (
            *((1, "zero"), (1, "repeat"), (2, "zero"), (2, "repeat")),
            (lengths.FULL, "none"),
        )
    ]
    # The tones' energy falls as the label rises: the noise is what lowers it.
    assert all(row.pcc < -0.5 and row.pcc_low < row.pcc < row.pcc_high for row in results)
    assert all(row.clips == 10 for row in results)


def test_silent_clips_are_counted():
    rows = [
        lengths.LengthResult("m", seconds, "zero", clips, 0.9, 0.8, 0.95, 0.3)
        for seconds, clips in ((1.0, 8), (2.0, 9), (lengths.FULL, 10))
    ]
    assert lengths.left_out(rows) == (
        "Left out: 2 of 1 s, 1 of 2 s; in 10 places the crop was silent (60 dB below its clip)."
    )
    assert lengths.left_out(rows[2:]) == ""


def arguments(*more):
    parser = argparse.ArgumentParser()
    lengths.add_arguments(parser)
    return parser.parse_args([*more])


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lengths, "load", lambda model, device: Energy(model))
    args = arguments(
        *("--model", "before", "--model", "after", "--shards", str(folder), "--seconds", "1", "4"),
        *("--out", str(tmp_path / "out"), "--samples", "6", "--device", "cpu"),
    )
    assert lengths.run(args) == 0
    content = json.loads((tmp_path / "out" / "lengths.json").read_text())
    assert len(content["results"]) == 10 and content["results"][0]["clips"] == 6
    assert "--seconds 1.0 4.0" in content["about"]["command"]
    rows = csv_rows(tmp_path / "out" / "lengths.csv")
    assert {(row["model"], row["seconds"], row["padding"]) for row in rows} >= {
        *(("before", "1.0", "zero"), ("after", "4.0", "repeat"), ("after", "7.68", "none"))
    }
    table = (tmp_path / "out" / "lengths.md").read_text()
    assert table.count("| before |") == 5 and "| after | whole | – | 6 |" in table
    assert table.splitlines()[0] in capsys.readouterr().out


@pytest.mark.parametrize("seconds", ["0", "8", "nan", "-1"])
def test_a_length_that_is_none_is_refused(seconds):
    with pytest.raises(SystemExit):
        arguments("--model", "v7", "--shards", "s", "--out", "o", "--seconds", seconds)


def test_one_sample_is_refused(folder, tmp_path):
    args = arguments("--model", "v7", "--shards", str(folder), "--out", str(tmp_path))
    args.samples = 1
    with pytest.raises(ValueError, match="--samples 1"):
        lengths.run(args)
