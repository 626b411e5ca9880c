"""Recipes, which a user writes, checked against their schema. Nothing here needs torch."""
