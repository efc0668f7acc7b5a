"""Recipes: runs described in YAML, read with line numbers, checked key by key."""

from .schema import Data, Evaluate, Recipe, Reward, Student, load, parse
from .shipped import locate
from .yaml_text import Places, RecipeError

__all__ = ["Data", "Evaluate", "Places", "Recipe", "RecipeError", "Reward", "Student", "load", "locate", "parse"]
