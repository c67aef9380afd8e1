"""Options made from a model: its defaults, kinds and choices, and nothing that it does not say."""

import argparse
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from data_specs.io.options import add_options, options_of


class Settings(BaseModel):
    steps: Annotated[int, Field(ge=1, description="updates")]
    lr: Annotated[float, Field(description="learning rate, 5 % less")] = 2e-5
    schedule: Literal["constant", "cosine"] = Field("cosine", description="of the rate")
    sizes: tuple[Annotated[float, Field(gt=0)], ...] = Field((90.0, 15.0), description="percent")
    augment: bool = Field(False, description="change clips in training")
    start: str | None = Field(None, description="weights to start with")
    recipe_hash: str = ""


def parse(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser, Settings)
    return parser.parse_args(given)


def test_what_is_not_given_is_the_models_default():
    assert options_of(parse(), Settings) == {
        "lr": 2e-5, "schedule": "cosine", "sizes": (90.0, 15.0), "augment": False,
    }  # fmt: skip


def test_what_is_given_has_the_fields_kind():
    args = parse("--steps", "3", "--lr", "1", "--sizes", "5", "7", "--augment", "--start", "v7")
    assert options_of(args, Settings) == {
        "steps": 3, "lr": 1.0, "schedule": "cosine", "sizes": [5.0, 7.0], "augment": True,
        "start": "v7",
    }  # fmt: skip


@pytest.mark.parametrize("given", [("--steps", "x"), ("--schedule", "none"), ("--recipe-hash", "")])
def test_what_the_model_does_not_have_is_refused(given):
    with pytest.raises(SystemExit):
        parse(*given)


def test_the_help_has_descriptions_and_defaults():
    parser = argparse.ArgumentParser()
    add_options(parser, Settings, leave_out=["schedule"])
    text = " ".join(parser.format_help().split())
    assert "learning rate, 5 % less (default: 2e-05)" in text
    assert "percent (default: 90 15)" in text and "schedule" not in text
