"""The corpus files load, and their patterns find speakers and languages in real paths."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path, PurePosixPath

import pytest

from data_specs.corpus import Part, all_corpora
from data_specs.recipe import load_recipe
from pipeline.corpora.manifest import scan

SLR26 = "datasets_fullband/impulse_responses/SLR26/simulated_rirs_48k"
SLR28 = "datasets/impulse_responses/SLR28/RIRS_NOISES/real_rirs_isotropic_noises"
CLEAN = "datasets_fullband/clean_fullband"
AILABS = "M-AILABS_Speech_Dataset"
WIKIPEDIA = "german_speech/CC_BY_SA_4.0_249hrs_339spk_German_Wikipedia_16k"


def speaker_of(part: Part, path: str) -> tuple[str | None, str | None]:
    """Speaker and language of a path, as ``Part`` says that its patterns are read."""
    for pattern in part.patterns:
        if found := re.search(pattern, path):
            groups = found.groupdict()
            return groups.get("speaker"), groups.get("language") or part.language
    return None, part.language


def part_of(corpus: str, path: str) -> Part:
    """The one part that includes ``path``."""
    parts = [
        part
        for part in all_corpora()[corpus].parts
        if any(_matches(path, glob) for glob in part.include)
    ]
    assert len(parts) == 1, f"{path} is in {len(parts)} parts of {corpus}"
    return parts[0]


def _matches(path: str, glob: str) -> bool:
    escaped = re.escape(glob).replace(r"\[0\-9\]", "[0-9]").split(r"\*\*/")
    pieces = [piece.replace(r"\*", "[^/]*") for piece in escaped]
    return re.fullmatch("(?:.*/)?".join(pieces), PurePosixPath(path).as_posix()) is not None


@pytest.mark.parametrize(
    ("corpus", "path", "speaker", "language"),
    [
        ("speech", "en/slt-100-100-100/3.flac", "slt-100-100-100", "en"),
        ("speech", "pt-BR/ana/take 1.wav", "ana", "pt"),
        ("speech", "anna/3.mp3", "anna", None),
        ("speech", "103/1240/103-1240-0000.flac", "103", None),
        ("speech", "103-1240-0000.flac", "103", None),
        ("speech", "interview.ogg", None, None),
        ("noise", "kitchen/fan.wav", None, None),
        ("rooms", "room00003.flac", None, None),
        ("coqui_voices", "de/thorsten-vits/thorsten/0.flac", "thorsten-vits/thorsten", "de"),
        ("coqui_voices", "en/vctk-vits/p225/0.flac", "vctk-vits/p225", "en"),
        ("coqui_voices", "fr/css10-vits/0.wav", "css10-vits", "fr"),
        ("open_speech", "speech/train-clean-100/103-1240-0000.flac", "103", "en"),
        ("open_speech", "more/speech-vctk/p225_003.flac", "p225", "en"),
        ("open_speech", "more/speech-multilingual/leopard_test_de.flac", "de", "de"),
        (
            "open_speech",
            "more/speech-multilingual/rhino_test_within_context.flac",
            "speech-multilingual",
            "en",
        ),
        ("open_voices", "pt/kokoro-82m/pf_dora/000000.flac", "kokoro-82m/pf_dora", "pt"),
        (
            "open_voices",
            "en/en_US-joe-medium/single/000030.flac",
            "en_US-joe-medium/single",
            "en",
        ),
        (
            "open_noise",
            "noise/audiomentations_a_chunk83_aug2.flac",
            "noise/audiomentations_a",
            None,
        ),
        ("open_noise", "coloured-003.flac", None, None),
        ("open_rooms", "rir/StPatricksPosition2.flac", "rir/StPatricks", None),
        ("open_rooms", "room00003.flac", None, None),
        (
            "dns4_speech",
            f"{CLEAN}/read_speech/book_00000_chp_0009_reader_06709_3_seg_2.wav",
            "reader_06709",
            "en",
        ),
        ("dns4_speech", f"{CLEAN}/emotional_speech/crema_d/1001_DFA_ANG_XX.wav", "1001", "en"),
        ("dns4_speech", f"{CLEAN}/vctk_wav48_silence_trimmed/p225/p225_001_mic1.wav", "p225", "en"),
        (
            "dns4_speech",
            f"{CLEAN}/french_speech/{AILABS}/fr_FR_190hrs_16k/male/bernard/book/wavs/x_1.wav",
            "bernard",
            "fr",
        ),
        (
            "dns4_speech",
            f"datasets_fullband/german_speech/{AILABS}/de_DE_16k/female/eva_k/book/wavs/x_1.wav",
            "eva_k",
            "de",
        ),
        (
            "dns4_speech",
            f"{CLEAN}/{WIKIPEDIA}/data/German_Wikipedia_Asphalt_audio2_48kHz.wav",
            None,
            "de",
        ),
        (
            "dns4_speech",
            f"{CLEAN}/spanish_speech/SLR61_es/clf_01234_00012345678.wav",
            "clf_01234",
            "es",
        ),
        ("dns4_noise", "datasets_fullband/noise_fullband/abc.wav", None, None),
        ("dns4_rooms", f"{SLR26}/smallroom/Room149/Room149-00003.wav", "smallroom/Room149", None),
        ("dns4_rooms", f"{SLR28}/RVB2014_type1_rir_largeroom1_far_angla.wav", None, None),
    ],
)
def test_speaker_and_language(
    corpus: str, path: str, speaker: str | None, language: str | None
) -> None:
    assert speaker_of(part_of(corpus, path), path) == (speaker, language)


def test_rooms_leave_out_the_isotropic_noise() -> None:
    path = "impulse_responses/SLR28/RIRS_NOISES/real_rirs_isotropic_noises/x_type1_noise_room_1.wav"
    globs = [glob for part in all_corpora()["dns4_rooms"].parts for glob in part.include]
    assert not any(_matches(path, glob) for glob in globs)


def test_vctk_is_taken_once() -> None:
    path = f"{CLEAN}/vctk_wav48_silence_trimmed/p225/p225_001_mic2.wav"
    globs = [glob for part in all_corpora()["dns4_speech"].parts for glob in part.include]
    assert not any(_matches(path, glob) for glob in globs)


OPEN = ("open_speech", "open_noise", "open_rooms", "open_voices")
JUDGES = ("speech/test-other", "mos", "pairs", "tasks", "faults")
"""Folders of the shared recordings on which students are judged, or that are for tests alone."""


@pytest.mark.parametrize("corpus", OPEN)
def test_what_judges_is_in_no_part_of_the_open_corpora(corpus: str) -> None:
    names = ("1688-142285-0000.flac", "p835ref_nb/sp0102_c1_sn0.flac", "noisy_snr0.wav", "a/b.ogg")
    paths = [f"{folder}/{name}" for folder in JUDGES for name in names]
    paths.append("noise/deepfilternet_noise.flac")  # which pairs/noisy_snr0.wav is made with
    globs = [glob for part in all_corpora()[corpus].parts for glob in part.include]
    assert not [path for path in paths for glob in globs if _matches(path, glob)]


@pytest.mark.shared
def test_no_speaker_and_no_recording_of_the_judges_is_in_the_open_corpora(shared: Path) -> None:
    root = shared / "data"
    judges = [path for folder in JUDGES for path in (root / folder).rglob("*.*")]
    heard = {sha256(path.read_bytes()).digest() for path in judges}
    others = {path.name.split("-")[0] for path in (root / "speech/test-other").iterdir()}
    found = {
        name: scan(name, all_corpora()[name], [root], progress=False).usable.to_pylist()
        for name in OPEN[:3]
    }
    for rows in found.values():
        assert len(rows) >= 20
        for row in rows:
            assert not row["path"].startswith(JUDGES), row["path"]
            assert sha256((root / row["path"]).read_bytes()).digest() not in heard, row["path"]
    speakers = {row["speaker"] for row in found["open_speech"]}
    assert len(others) == 10 and not speakers & others
    assert len(speakers) == 251 + 4 + 9  # of the device recordings a language is one


@pytest.mark.parametrize("recipe", ["demo", "open", "paper", "release"])
def test_every_source_of_a_recipe_is_a_corpus_of_its_kind(recipe: str) -> None:
    for role, source in load_recipe(recipe).sources.present().items():
        assert all_corpora()[source.corpus].kind == role


def test_no_dead_addresses_and_every_part_has_a_licence() -> None:
    for corpus in all_corpora().values():
        for part in corpus.parts:
            assert part.licence
            assert not any("dns4public" in url for url in part.urls)
