"""Every recipe that ships with published sizes passes a dry run and fits its devices."""

import pytest
from helpers.dry_runs import RECIPES, check_recipe


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_pass_and_fit(name, monkeypatch):
    check_recipe(name, monkeypatch)
