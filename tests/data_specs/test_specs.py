"""Specs: errors name the file, the YAML path and the nearest valid key."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_specs.distributions import Normal
from data_specs.rated import read_rated
from data_specs.recipe import Recipe, load_recipe
from data_specs.strict import HERE, SpecError, load, read_yaml
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


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 10)}]}}\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "name: x\nseed: !!timestamp soon\n",
            "line 2: not readable as YAML: 'soon' is no timestamp",
        ),
        ("seed: 2024-13-45\n", "line 1: not readable as YAML: '2024-13-45' is no timestamp"),
        ("name: x\n\nseed: !!int many\n", "line 3: not readable as YAML: 'many' is no int"),
        ("seed: !!int ''\n", "line 1: not readable as YAML: '' is no int"),
        ("seed: !!float 1..2\n", "line 1: not readable as YAML: '1..2' is no float"),
        ("seed: !!bool perhaps\n", "line 1: not readable as YAML: 'perhaps' is no bool"),
        ("seed: !!binary é\n", "line 1: not readable as YAML"),
        ("seed: !!binary x\n", "line 1: not readable as YAML"),
        ("seed: " + "9" * 5000, "line 1: not readable as YAML: '9999"),
        ("seed: !!int [1]\n", "line 1: not readable as YAML: expected a scalar node"),
        ("seed: !mine 3\n", "line 1: not readable as YAML: could not determine a constructor"),
        ("!!python/object/apply:os.system ['touch /tmp/owned']", "could not determine a construct"),
        ("seed: *nobody\n", "line 1: not readable as YAML: found undefined alias"),
        ("? [a, b]\n: 3\n", "line 1: not readable as YAML: found unhashable key"),
        ("seed: 3\nname: x\nseed: 4\n", "line 3: not readable as YAML: key 'seed' stands twice"),
        ("noise: {a: 1,\n a: 2}\n", "line 2: not readable as YAML: key 'a' stands twice"),
        ("seed: &a [*a]\n", "line 1: not readable as YAML: alias 'a' stands within what it names"),
        ("name: x\nseed: &a {b: {c: *a}}\n", "line 2: not readable as YAML: alias 'a'"),
        (LAUGHS, "line 5: not readable as YAML: more than 100000 values, aliases written out"),
        (MERGES, "line 6: not readable as YAML: more than 100000 values, aliases written out"),
        ("[" * 100_000, "line 1: not readable as YAML: nested more than 50 deep"),
        ("a:\n" + "".join(f"{' ' * i}- \n" for i in range(1, 99)), "nested more than 50 deep"),
        ("name: x\nseed: \x00\n", "line 2: not readable as YAML: character #x00 is not allowed"),
        ("name: 'x\n", "not readable as YAML: found unexpected end of stream"),
        ("--- 1\n--- 2\n", "line 2: not readable as YAML: but found another document"),
        ("x" * 2_000_000, "longer than 1048576 bytes"),
        ("- 1\n", "(top level)"),
        ("", "(top level)"),
        ("1: 2\n", "unknown key '1'"),
    ],
)
def test_text_that_is_no_recipe_is_one_sentence_with_its_line(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as error:
        load(Recipe, path)
    assert str(error.value).startswith(f"{path}: ") and said in str(error.value)
    assert len(str(error.value)) < 500


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=f"{tmp_path}: cannot be read: Is a directory"):
        load(Recipe, tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: x\nabout: caf\xe9\n")
    with pytest.raises(SpecError, match=r"latin\.yaml: line 2: not UTF-8"):
        load(Recipe, tmp_path / "latin.yaml")


def test_what_yaml_allows_is_read(tmp_path: Path) -> None:
    """Byte order mark, Windows' line ends, aliases, merged keys that are set anew."""
    text = "a: &a {x: 1, y: 2}\r\nb: &b\r\n  <<: *a\r\n  x: 3\r\nc: {<<: *b}\r\nd: [*a, *a]\r\n"
    (tmp_path / "plain.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_yaml(tmp_path / "plain.yaml") == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 3, "y": 2},
        "c": {"x": 3, "y": 2},
        "d": [{"x": 1, "y": 2}] * 2,
    }


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
