"""One kind of teacher, one file; the file's name is the teacher's name."""

from ..registry import Registry
from ..teacher import Teacher

TEACHERS: Registry[Teacher] = Registry("teacher", __name__, Teacher)
