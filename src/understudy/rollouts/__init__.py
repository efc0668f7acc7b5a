"""One way of writing responses, one file; the file's name is the rollout's name."""

from ..registry import Registry
from ..rollout import Rollout

ROLLOUTS: Registry[Rollout] = Registry("rollout", __name__, Rollout)
