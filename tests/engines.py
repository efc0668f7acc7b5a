"""A real vLLM for tests, where `make engines` has installed it: a server, and models whose heads its CPU kernels have.

Tests that need it skip with the reason where it is absent.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from understudy.batch import Batch
from understudy.fused_linear.merged import TopK
from understudy.scores import Scores
from understudy.serving.vllm_process import VLLMProcess
from understudy.teacher import Capability, Teacher
from understudy.teachers.local import LocalTeacher

ROOT = Path(__file__).resolve().parents[1]
STORIES = ROOT / ".." / "shared" / "data" / "tinystories" / "tiny_stories_944k.txt"
TINYSTORIES = STORIES.parent / "TinyStories-656K"
# One thread, bound to no core, and a gigabyte of cache, the least that can be asked for: other tests run beside it.
SETTINGS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
HEAD_DIM = 32  # the smallest that vLLM's attention on a CPU has


def engine_python() -> str:
    """The interpreter with vLLM: of $UNDERSTUDY_ENGINES, or of .venv-engines; skips the test where there is none."""
    folder = Path(os.environ.get("UNDERSTUDY_ENGINES") or ROOT / ".venv-engines")
    python = folder / "bin" / "python"
    if not (folder / ".ready").is_file():
        _skip(f"there is no vLLM in {folder}: run `make engines`, or set UNDERSTUDY_ENGINES to its environment")
    return str(python)


def tinystories(folder: Path) -> Path:
    """TinyStories-656K with heads of 32 instead of 16 dimensions; skips the test where the model is absent."""
    if not TINYSTORIES.is_dir():
        _skip(f"there is no {TINYSTORIES.name} in the data beside the repository")
    return with_wider_heads(TINYSTORIES, folder)


def with_wider_heads(source: Path, folder: Path, head_dim: int = HEAD_DIM) -> Path:
    """Save a Llama with the same logits whose heads have `head_dim` dimensions.

    The further dimensions of queries, keys and values are 0. A rotary embedding turns dimensions i and i + d/2 by
    angles position · θ^(−2i/d): the same angles come from θ^(D/d) where the head has D dimensions. Attention divides by
    √D instead of √d, so queries are multiplied by √(D/d).
    """
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = model.config
    old = model.model.layers[0].self_attn.head_dim
    places = torch.cat([torch.arange(old // 2), head_dim // 2 + torch.arange(old // 2)])
    weights = dict(model.state_dict())
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            rows = torch.zeros(weight.shape[0] // old, head_dim, weight.shape[1])
            rows[:, places] = weight.view(-1, old, weight.shape[1]) * ((head_dim / old) ** 0.5 if "q_" in name else 1)
            weights[name] = rows.flatten(0, 1)
        elif name.endswith("o_proj.weight"):
            columns = torch.zeros(weight.shape[0], weight.shape[1] // old, head_dim)
            columns[:, :, places] = weight.view(weight.shape[0], -1, old)
            weights[name] = columns.flatten(1)
    theta = config.rope_parameters["rope_theta"] ** (head_dim / old)
    config.head_dim, config.rope_parameters = head_dim, {**config.rope_parameters, "rope_theta": theta}
    wider = type(model)(config)
    wider.load_state_dict(weights)
    wider.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def _skip(reason: str) -> None:
    import pytest  # not needed by the benchmarks, which use these servers too

    pytest.skip(reason)


@contextmanager
def vllm_server(model: Path, log: Path, **options: Any) -> Iterator[VLLMProcess]:
    """A vLLM server in float32 that is ready; `options` are vLLM's own."""
    with patch.dict(os.environ, SETTINGS):
        process = VLLMProcess(str(model), log, python=engine_python(), options={"dtype": "float32", **options})
        process.start()
    try:
        process.wait_until_ready()
        yield process
    finally:
        process.stop()


def tokens_of_stories(tokenizer: Any, count: int) -> list[int]:
    """The first `count` token ids of the stories beside the repository."""
    text = STORIES.read_text(encoding="utf-8")
    return tokenizer.encode(text[: 8 * count], add_special_tokens=False)[:count]


class TopKOfLocal(Teacher):
    """A local teacher that reports the K likeliest tokens and the chosen one, as a server of top K tokens does."""

    provides: ClassVar[frozenset[Capability]] = frozenset({Capability.CHOSEN, Capability.TOP_K})

    def __init__(self, model: str, k: int) -> None:
        self.k, self.model_name, self._local = k, model, LocalTeacher(model)

    def score(self, batch: Batch) -> Scores:
        scores = self._local.score(batch)
        return Scores(batch.tokens, TopK(*scores.log_probs.topk(self.k), scores.chosen))
