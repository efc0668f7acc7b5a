"""Rollouts, one per file; the file's name is the rollout's name in recipes."""

from ..registry import Registry
from ..rollout import Rollout

ROLLOUTS: Registry[Rollout] = Registry("rollout", __name__, Rollout)
