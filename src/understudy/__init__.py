"""understudy: distil a large language model (teacher) into a small one (student).

The public names, imported when first used, so that the command line starts at once.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from .batch import Batch, Example, micro_batches
    from .budget import Budget
    from .data.examples import Examples, load_examples
    from .divergences import (
        AlphaBeta,
        Divergence,
        ForwardKL,
        JensenShannon,
        ReverseKL,
        SkewKL,
        SkewReverseKL,
        TotalVariation,
    )
    from .fused_linear.loss import fused_divergence
    from .method import Method
    from .methods.dpkd import DPKD
    from .methods.gkd import GKD
    from .methods.kd import KD
    from .methods.promptkd import PromptKD
    from .methods.seqkd import SeqKD
    from .methods.sft import SFT
    from .models.forward import score
    from .recipe import Recipe, load
    from .rollout import Rollout, Writer, Writers
    from .rollouts.generate import GenerateRollout
    from .run.distill import distill
    from .sampling import Sampling
    from .scores import Scores
    from .step import Step
    from .teacher import Capability, Teacher
    from .teachers.local import LocalTeacher
    from .training.trainer import StudentTrainer

__version__ = "0.1.0"

_HOMES = {
    "batch": ("Batch", "Example", "micro_batches"),
    "budget": ("Budget",),
    "data.examples": ("Examples", "load_examples"),
    "divergences": (
        "AlphaBeta",
        "Divergence",
        "ForwardKL",
        "JensenShannon",
        "ReverseKL",
        "SkewKL",
        "SkewReverseKL",
        "TotalVariation",
    ),
    "method": ("Method",),
    "methods.dpkd": ("DPKD",),
    "methods.gkd": ("GKD",),
    "methods.kd": ("KD",),
    "methods.promptkd": ("PromptKD",),
    "methods.seqkd": ("SeqKD",),
    "methods.sft": ("SFT",),
    "fused_linear.loss": ("fused_divergence",),
    "models.forward": ("score",),
    "recipe": ("Recipe", "load"),
    "rollout": ("Rollout", "Writer", "Writers"),
    "rollouts.generate": ("GenerateRollout",),
    "sampling": ("Sampling",),
    "run.distill": ("distill",),
    "scores": ("Scores",),
    "step": ("Step",),
    "teacher": ("Capability", "Teacher"),
    "teachers.local": ("LocalTeacher",),
    "training.trainer": ("StudentTrainer",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [*_HOME_OF]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> typing.Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
