"""Specs: errors name the file, the YAML path and the nearest valid key."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_specs.distributions import Normal
from data_specs.rated import Scale, read_rated
from data_specs.recipe import Recipe, load_recipe
from data_specs.strict import HERE, SpecError, load
from tests.conftest import small_recipe, talk, write

RECIPES = sorted(path.stem for path in (HERE / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads_and_says_its_own_name(name: str) -> None:
    assert load_recipe(name).name == name


def write_recipe(folder: Path, old: str, new: str) -> Path:
    text = (HERE / "recipes" / "demo.yaml").read_text()
    assert old in text
    path = folder / "mine.yaml"
    path.write_text(text.replace(old, new, 1))
    return path


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seed: 7", "sead: 7", ["unknown key 'sead'", "did you mean 'seed'"]),
        ("snr_db:", "snr:", ["noise: unknown key 'snr'", "'snr_db'"]),
        ("mean: 12, std: 9", "mean: 12", ["noise.snr_db", "variance or std"]),
        ("kind: clip", "kind: clipp", ["stages[0].choices[0].use", "'clip'"]),
        ("values: [0, 2, 5]", "values: [0, 2, 50]", ["stages[2].choices[0].use.complexity"]),
        ("shard_samples: 250", "shard_samples: 255", ["multiple of group_samples"]),
        ("probability: 0.5", "probability: 1.5", ["speech_stages[0].probability"]),
        ("name: demo", "name: [", ["not readable as YAML"]),
    ],
)
def test_a_wrong_recipe_is_told_by_path_and_nearest_key(
    tmp_path: Path, old: str, new: str, said: list[str]
) -> None:
    path = write_recipe(tmp_path, old, new)
    with pytest.raises(SpecError) as error:
        load(Recipe, path)
    assert str(path) in str(error.value)
    for words in said:
        assert words in str(error.value)


def test_a_recipe_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("!!python/object/apply:os.system ['touch /tmp/owned']")
    with pytest.raises(SpecError, match="not readable as YAML"):
        load(Recipe, path)


def test_the_papers_recipe_has_the_papers_numbers() -> None:
    recipe = load_recipe("paper")
    assert recipe.voices is not None and recipe.voices.share == 0.15
    assert recipe.room is not None and recipe.room.probability == 0.33
    assert recipe.noise is not None and recipe.noise.probability == 0.67
    assert isinstance(recipe.noise.snr_db, Normal)
    assert (recipe.noise.snr_db.mean, recipe.noise.snr_db.sigma**2) == (10, pytest.approx(10))
    assert [(s.stage, s.probability, len(s.choices)) for s in recipe.stages] == [
        ("enhance", 1.0, 5),
        ("vocoder", 0.33, 2),
        ("codec", 0.5, 3),
    ]


def test_noise_source_and_noise_step_go_together() -> None:
    with pytest.raises(ValueError, match=r"sources\.noise"):
        small_recipe(noise=None)


def rated(folder: Path, rows: str) -> Path:
    write(folder / "a.wav", talk(1, 0))
    path = folder / "rated.csv"
    path.write_text(rows)
    return path


def test_rated_clips_keep_what_the_table_says(tmp_path: Path) -> None:
    path = rated(tmp_path, "path,mos,votes,condition,dataset\na.wav,3.5,8,c1,set1\n")
    (clip,) = read_rated(path)
    assert (clip.mos, clip.votes, clip.condition, clip.dataset) == (3.5, 8, "c1", "set1")
    assert clip.path.is_absolute()


def test_mushra_is_mapped_to_mos(tmp_path: Path) -> None:
    path = rated(tmp_path, "path,mos\na.wav,75\n")
    assert read_rated(path, Scale(low=0, high=100))[0].mos == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("path,score\na.wav,3\n", "no column 'mos'"),
        ("path,mos\nb.wav,3\n", "line 2: no such audio file"),
        ("path,mos\na.wav,3\na.wav,seven\n", "line 3: mos 'seven' is not a number"),
        ("path,mos\na.wav,7\n", "line 2: mos 7.0 is not on the scale 1-5"),
        ("path,mos\na.wav,nan\n", "not on the scale"),
        ("path,mos\n", "no rows"),
    ],
)
def test_a_wrong_table_is_told_by_row(tmp_path: Path, rows: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        read_rated(rated(tmp_path, rows))
