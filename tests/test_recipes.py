"""Tests the recipes: their page is what the configs say, and each config is valid and builds."""

import json

import pytest

from disco_jax.config.validation import check_division, problems_of
from disco_jax.errors import UserError
from disco_jax.models.build import model_config
from scripts import recipes

EACH = [(recipe, argument) for recipe in recipes.RECIPES for argument in recipe.arguments]


def test_the_page_is_written_from_the_configs():
    assert recipes.page(json.loads(recipes.RESULTS.read_text())) == recipes.PAGE.read_text()


@pytest.mark.parametrize(("recipe", "argument"), EACH, ids=lambda x: getattr(x, "config", x))
def test_each_recipe_is_valid_and_builds(recipe, argument):
    config = recipes.config_of(recipe, argument)
    assert problems_of(config) == []
    devices = int(recipe.topology.partition(":")[2])
    check_division(config, devices)
    for flag in recipe.flags:
        if flag.startswith("model.name="):
            config.model.name = flag.partition("=")[2]
    model = model_config(config)
    assert model.vision.image_size == (config.model.image_size or model.vision.image_size)


@pytest.mark.parametrize("recipe", [r for r in recipes.RECIPES if r.arguments != ("",)])
def test_an_unknown_argument_is_told(recipe):
    with pytest.raises((ValueError, UserError), match="no_such_one"):
        recipes.config_of(recipe, "no_such_one")
