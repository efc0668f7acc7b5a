"""understudy: distil a large language model (teacher) into a small one (student).

The public names, imported lazily, so that the command line starts at once.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from .batch import Author, Batch, Example, Reduction, micro_batches
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
    from .fused_linear.distributions import Dense, Projected
    from .fused_linear.loss import fused_divergence
    from .fused_linear.merged import TopK
    from .generation.stop_tokens import stop_ids
    from .method import Method, MethodContext
    from .methods.dpkd import DPKD
    from .methods.gkd import GKD
    from .methods.kd import KD
    from .methods.opd import OPD
    from .methods.promptkd import PromptKD
    from .methods.seqkd import SeqKD
    from .methods.sft import SFT
    from .metric import Metric, Score
    from .models.forward import score, score_no_grad
    from .recipe import Recipe, load
    from .reward import Reward, RewardModel
    from .rollout import Rollout, Writer, Writers, with_response
    from .rollouts.continuous import ContinuousRollout
    from .rollouts.generate import GenerateRollout
    from .run.distill import distill
    from .sampling import Sampling
    from .scores import Scores
    from .step import Step
    from .teacher import Capability, Teacher, TeacherError
    from .teachers.local import LocalTeacher
    from .teachers.mixture import MixtureTeacher
    from .teachers.routed import RoutedTeacher
    from .teachers.server import ServerTeacher
    from .training.trainer import StudentTrainer

__version__ = "0.1.0"

_NAMES_BY_MODULE = {
    "batch": ("Author", "Batch", "Example", "Reduction", "micro_batches"),
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
    "fused_linear.distributions": ("Dense", "Projected"),
    "fused_linear.merged": ("TopK",),
    "fused_linear.loss": ("fused_divergence",),
    "generation.stop_tokens": ("stop_ids",),
    "method": ("Method", "MethodContext"),
    "methods.dpkd": ("DPKD",),
    "methods.gkd": ("GKD",),
    "methods.kd": ("KD",),
    "methods.opd": ("OPD",),
    "methods.promptkd": ("PromptKD",),
    "methods.seqkd": ("SeqKD",),
    "methods.sft": ("SFT",),
    "metric": ("Metric", "Score"),
    "models.forward": ("score", "score_no_grad"),
    "recipe": ("Recipe", "load"),
    "reward": ("Reward", "RewardModel"),
    "rollout": ("Rollout", "Writer", "Writers", "with_response"),
    "rollouts.continuous": ("ContinuousRollout",),
    "rollouts.generate": ("GenerateRollout",),
    "run.distill": ("distill",),
    "sampling": ("Sampling",),
    "scores": ("Scores",),
    "step": ("Step",),
    "teacher": ("Capability", "Teacher", "TeacherError"),
    "teachers.local": ("LocalTeacher",),
    "teachers.server": ("ServerTeacher",),
    "teachers.mixture": ("MixtureTeacher",),
    "teachers.routed": ("RoutedTeacher",),
    "training.trainer": ("StudentTrainer",),
}
_MODULE_OF = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}

__all__ = [*_MODULE_OF]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> typing.Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
