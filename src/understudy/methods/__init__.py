"""One paper, one file; the file's name is the method's name."""

from ..method import Method
from ..registry import Registry

METHODS: Registry[Method] = Registry("method", __name__, Method)
