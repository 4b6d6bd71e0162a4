"""Recipes and models, resolved into plans: pure data, without weights. Imports `numerics` and below."""
