"""The corpus files load, and their patterns find speakers and languages in real paths."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import pytest

from data_specs.corpus import Part, all_corpora
from data_specs.recipe import load_recipe

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
    pieces = [re.escape(piece).replace(r"\*", "[^/]*") for piece in glob.split("**/")]
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
        ("rooms", "room-003.flac", None, None),
        (
            "coqui_voices",
            "de/thorsten-vits/thorsten/0.flac",
            "thorsten-vits/thorsten",
            "de",
        ),
        ("coqui_voices", "en/vctk-vits/p225/0.flac", "vctk-vits/p225", "en"),
        ("coqui_voices", "fr/css10-vits/0.wav", "css10-vits", "fr"),
        (
            "dns4_speech",
            f"{CLEAN}/read_speech/book_00000_chp_0009_reader_06709_3_seg_2.wav",
            "reader_06709",
            "en",
        ),
        (
            "dns4_speech",
            f"{CLEAN}/emotional_speech/crema_d/1001_DFA_ANG_XX.wav",
            "1001",
            "en",
        ),
        (
            "dns4_speech",
            f"{CLEAN}/vctk_wav48_silence_trimmed/p225/p225_001_mic1.wav",
            "p225",
            "en",
        ),
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
        (
            "dns4_rooms",
            f"{SLR26}/smallroom/Room149/Room149-00003.wav",
            "smallroom/Room149",
            None,
        ),
        (
            "dns4_rooms",
            f"{SLR28}/RVB2014_type1_rir_largeroom1_far_angla.wav",
            None,
            None,
        ),
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


@pytest.mark.parametrize("recipe", ["demo", "open", "paper"])
def test_every_source_of_a_recipe_is_a_corpus_of_its_kind(recipe: str) -> None:
    for role, source in load_recipe(recipe).sources.present().items():
        assert all_corpora()[source.corpus].kind == role


def test_no_dead_addresses_and_every_part_has_a_licence() -> None:
    for corpus in all_corpora().values():
        for part in corpus.parts:
            assert part.licence
            assert not any("dns4public" in url for url in part.urls)
