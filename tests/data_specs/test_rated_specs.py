"""The rated sets of section III: every file loads, and the counts are the paper's."""

from __future__ import annotations

import pytest

from data_specs.rated import rated_sets

TABLE_1_TEST_CLIPS = {
    "PSTN": 1040,
    "Tencent": 2898,
    "TUB": 434,
    "NISQA_For": 240,
    "NISQA_Livetalk": 232,
    "NISQA_P501": 240,
    "TCD_VoIP": 384,
    "Genspeech": 160,
    "VoiceMOS_EN": 1065,
    "VoiceMOS_CN": 539,
    "Blizzard23_TTS": 840,
    "Blizzard23_SA": 578,
    "DNS3": 16_800,
    "DNS3_FB": 4_500,
    "PLC2024": 11_000,
    "SIG2024": 5_100,
}


def total(split: str) -> int:
    """Clips of a split over the paper's sets."""
    sets = [rated for name, rated in rated_sets().items() if not name.startswith("p835ref")]
    assert len(sets) == 21
    return sum(getattr(rated.clips, split) or 0 for rated in sets)


def test_every_column_of_table_1_is_a_set() -> None:
    columns = [rated.table1 for rated in rated_sets().values() if rated.table1]
    assert sorted(columns) == sorted(TABLE_1_TEST_CLIPS)


def test_test_clips_are_table_1s_or_the_notes_say_why_not() -> None:
    for rated in rated_sets().values():
        if rated.table1 and rated.clips.test != TABLE_1_TEST_CLIPS[rated.table1]:
            assert f"table 1 says {TABLE_1_TEST_CLIPS[rated.table1]}" in rated.notes.replace(
                "11 000", "11000"
            )


def test_the_papers_test_total_follows_table_1() -> None:
    assert sum(TABLE_1_TEST_CLIPS.values()) == 46_050
    # TCD-VoIP 240 for 384, DNS 3 FB 4200 for 4500, PLC 2024 11 010 for 11 000.
    assert total("test") == 46_050 - 144 - 300 + 10


@pytest.mark.parametrize(
    ("split", "ours", "stated"), [("train", 108_519, 108_229), ("validation", 8_525, 8_534)]
)
def test_a_total_that_does_not_add_up_is_stated(split: str, ours: int, stated: int) -> None:
    assert total(split) == ours != stated
    notes = rated_sets()["pstn"].notes.replace(" ", "")
    assert str(ours) in notes and str(stated) in notes


def test_only_genspeech_is_mushra() -> None:
    sets = rated_sets()
    assert {name for name, rated in sets.items() if rated.scale.high != 5} == {"genspeech"}


def test_internal_sets_are_not_called_public() -> None:
    for name in ("dns2", "plc2022", "sig2023"):
        assert not rated_sets()[name].public
