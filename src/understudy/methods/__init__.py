"""Distillation methods, one file per paper; the file's name is the method's name in a recipe."""

from ..method import Method
from ..registry import Registry

METHODS: Registry[Method] = Registry("method", __name__, Method)
