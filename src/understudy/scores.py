"""What a model says about every response token of a batch.

The one idea: the loss is computed where the logits would have been. For the duration of one forward the model's
output-embedding module stands in for the loss: handed the hidden states, it keeps the rows that predict a response
token and returns what the caller makes of them in place of logits. Prompts and padding never reach the vocabulary, and
whatever wraps the model (DDP, FSDP2, DeepSpeed, PEFT) sees an ordinary forward.

Shapes: B sequences, T positions, N response tokens, V vocabulary, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from inspect import signature
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .batch import Batch, Example
from .divergences import Divergence, ForwardKL, ReverseKL
from .fused_linear.distributions import Dense, Head, Projected, Source, TopK
from .fused_linear.loss import chosen_rule, divergence_rule, project
from .fused_linear.tiles import Transform, chunk_rows


class Knowledge(IntEnum):
    """How much can be known of a model, from least to most: a teacher gives it, a method needs it."""

    NOTHING = 0
    CHOSEN = 1  # the log-probability of the tokens that are there
    DISTRIBUTION = 2  # every token's, or the top ones'
    MODEL = 3  # a live model that can write, and be differentiated


@dataclass(frozen=True)
class Scores:
    """One model's opinion of N response tokens, computed when asked for.

    `weights` are what the rows' losses will be weighted with; see `projection.project`.
    """

    tokens: Tensor  # (N,)
    source: Source
    weights: Tensor | None = None  # (N,)

    @cached_property
    def chosen(self) -> Tensor:
        """(N,) log-probability of the tokens that are there."""
        if isinstance(self.source, Projected):
            return project(self.source, chosen_rule(self.tokens), self.weights)
        if isinstance(self.source, TopK):
            raise ValueError("a teacher known by its top tokens only does not tell the log-probability of every token")
        return self.source.log_probs().gather(-1, self.tokens.to(self.source.values.device)[:, None])[:, 0]

    @property
    def log_probs(self) -> Tensor:
        """(N, V), or (N, K+1) of a top-K teacher. Holds the whole vocabulary: for small models and for tests."""
        return self.source.log_probs()

    def divergence_from(self, teacher: "Scores", divergence: Divergence) -> Tensor:
        """(N,) of this student from `teacher`, over the tokens that both vocabularies have."""
        student, target = _shared(self.source, teacher.source)
        if isinstance(student, Projected):
            return project(student, divergence_rule(divergence, target), self.weights, divergence.temperature)
        log_q = student.log_probs()
        log_q = target.merge(log_q) if isinstance(target, TopK) else log_q
        log_p = (
            target.log_probs() if not isinstance(target, TopK) else target.log_probs(temperature=divergence.temperature)
        )
        return divergence(log_p.to(log_q.device, log_q.dtype), log_q)


COMPARED = ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy")


@torch.no_grad()
def compare(teacher: Scores, student: Scores) -> dict[str, Tensor]:
    """Forward KL, reverse KL and both entropies at every response token, each (N,), in nats; for people to watch."""
    q, p = _shared(student.source, teacher.source)
    rows: dict[str, list[Tensor]] = {name: [] for name in COMPARED}
    size = max(1, chunk_rows(q.vocabulary) // 4)  # nothing here is done in place
    for start in range(0, len(student.tokens), size):
        chunk = slice(start, start + size)
        log_q = q.log_probs(chunk)
        log_q = p.merge(log_q, chunk) if isinstance(p, TopK) else log_q
        log_p = p.log_probs(chunk).to(log_q.device, log_q.dtype)
        rows["forward_kl"].append(ForwardKL()(log_p, log_q))
        rows["reverse_kl"].append(ReverseKL()(log_p, log_q))
        rows["student_entropy"].append(torch.special.entr(log_q.exp()).sum(-1))
        rows["teacher_entropy"].append(torch.special.entr(log_p.exp()).sum(-1))
    return {name: torch.cat(chunks) for name, chunks in rows.items()}


def score(
    model: Any,
    batch: Batch,
    then: Callable[[Scores], Tensor],
    *,
    head_of: Any = None,
    vocabulary: int | None = None,
    weights: Tensor | None = None,
    project: bool = True,
    prefix: Tensor | None = None,
) -> Tensor:
    """Run `model` on the batch, hand its Scores to `then` inside the forward, and return what `then` returns.

    Args:
        model: a causal language model of transformers, wrapped or not.
        then: from Scores to the tensor that stands where the logits would have been, a loss for instance. It runs
            inside the model's forward, so other models (the teacher) are best scored before.
        head_of: the model without its wrappers, which knows its output embeddings (default: `model`).
        vocabulary: how many tokens are real; what a padded vocabulary has beyond them takes no part.
        weights: (N,) passed on to the Scores.
        project: whether the head may be taken apart. If not, or if it is no plain linear layer, the model makes its
            own logits and the loss is computed from them: the plain path, which holds (B, T, V).
        prefix: (m, D) embeddings put before every sequence, a soft prompt. Scores are of the same N tokens as without.

    Raises:
        RuntimeError: inside the `then` of a model with the same configuration object, while that is altered.
    """
    bare = model if head_of is None else head_of
    inputs, predicts = _inputs(bare, batch, prefix)
    layer = bare.get_output_embeddings() if project else None
    if not is_projectable(layer):
        _refuse_inside_another(bare)
        logits = model(**inputs).logits
        logits = logits[predicts.to(logits.device)][:, :vocabulary]
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return then(Scores(batch.tokens, Dense(logits.to(wide).log_softmax(-1)), weights))

    with _bare_logits(bare) as transform:

        def stand_in(hidden: Tensor) -> Tensor:
            head = Head(layer.weight, layer.bias, transform)
            head = head if vocabulary is None else head.cut(vocabulary)
            return then(Scores(batch.tokens, Projected(hidden[predicts.to(hidden.device)], head), weights))

        with _standing_in(layer, stand_in):
            return model(**inputs).logits


@torch.no_grad()
def opinion(model: Any, batch: Batch, **options: Any) -> Scores:
    """A model's Scores as constants, whatever goes on around: no gradients, nobody else's autocast.

    Takes the `options` of `score`. Dropout is the caller's business.
    """
    said: list[Scores] = []

    def keep(scores: Scores) -> Tensor:
        said.append(scores)
        return batch.input_ids

    with torch.autocast(batch.input_ids.device.type, enabled=False):
        score(model, batch, keep, **options)
    return said[0]


def _inputs(model: Any, batch: Batch, prefix: Tensor | None) -> tuple[dict[str, Any], Tensor]:
    """What the model is called with, and which of its positions predict a response token.

    Position ids follow the attention mask, so that a prefix takes the first ones and padding none. Where `can_pack`,
    padding is left out: all sequences in one row (1, ΣT), told apart by position ids that begin anew with each.
    """
    name, read, mask, predicts = "input_ids", batch.input_ids, batch.attention_mask, batch.predicts
    if prefix is not None:
        words = model.get_input_embeddings()(batch.input_ids)
        rows, length = len(words), len(prefix)
        name, read = "inputs_embeds", torch.cat([prefix.to(words.dtype).expand(rows, -1, -1), words], dim=1)
        mask = torch.cat([mask.new_ones(rows, length), mask], dim=1)
        predicts = torch.cat([predicts.new_zeros(rows, length), predicts], dim=1)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    if can_pack(model):
        real = mask.bool()
        packed = {name: read[real][None], "position_ids": places[real][None], "use_cache": False}
        return packed, predicts[real][None]
    inputs = {name: read, "attention_mask": mask, "use_cache": False}
    if prefix is not None and "position_ids" in signature(model.forward).parameters:
        inputs["position_ids"] = places
    return inputs, predicts


# Not every model of transformers keeps the sequences of one row apart: states run on from one to the next, and position
# ids may reach neither mask nor kernel (flex_attention in OPT and GPT-OSS, FlashAttention in GPT-BigCode). These do.
# fmt: off
PACKABLE = {
    "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2",
    "gpt_neox", "granite", "helium", "llama", "ministral", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "phi",
    "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
}
# fmt: on


def can_pack(model: Any) -> bool:
    """May all sequences share one row? If the attention skips what lies between them, and the model's code is known."""
    inner = without_adapters(model)
    config: Any = getattr(inner, "config", None)
    if getattr(config, "model_type", None) not in PACKABLE:
        return False
    known = any(kind.__module__.startswith("transformers.models.") for kind in type(inner).__mro__)  # not a hub's own
    attention = config._attn_implementation or ""
    skips = attention == "flex_attention" or ("flash" in attention and not attention.startswith("paged|"))
    adapter = getattr(model, "active_peft_config", None)  # some of PEFT's drop position ids, or look for a row's tokens
    by_row = any(getattr(adapter, name, None) for name in ("is_prompt_learning", "alora_invocation_tokens"))
    return known and skips and not by_row


def without_adapters(model: Any) -> Any:
    """The model inside PEFT's wrapper, if it has one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_projectable(layer: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Is this output embedding a plain linear layer whose weight can be used directly?"""
    return isinstance(layer, nn.Linear) and layer.weight.is_floating_point() and not hasattr(layer, "_hf_hook")


def can_project(model: Any) -> bool:
    """May the head be taken apart? In bfloat16 the logits differ by rounding, with an unknown transform by far more."""
    return parity(model) < 1e-2


@torch.no_grad()
def parity(model: Any, token: int = 0) -> float:
    """The largest difference between the model's own logits and those its head gives, relative to their size.

    A model that does something to its logits that is not known here shows a difference, and must take the plain path.
    A soft-cap hardly touches the small logits of a new model, so numbers of a loss's size are sent the same way and
    must come back as they are.
    """
    if not is_projectable(model.get_output_embeddings()):
        return float("inf")
    device = model.get_input_embeddings().weight.device
    batch = Batch.of([Example([token], [token + 1, token + 2, token])], pad=0, device=device)
    was_training = model.training
    model.eval()
    try:
        own = (
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            .logits[0, :-1]
            .float()
        )
        made = score(model, batch, lambda scores: _own_logits(scores.source)).float()
        sent = torch.tensor([-100.0, 0.01, 1.0, 10.0, 1000.0], device=made.device)
        back = score(model, batch, lambda scores: sent).float()
    finally:
        model.train(was_training)
    if own.shape != made.shape or sent.shape != back.shape:
        return float("inf")
    logits = float((own - made.to(own.device)).abs().max() / own.abs().max().clamp(min=1e-6))
    return max(logits, float(((back.to(sent.device) - sent) / sent).abs().max()))


def _own_logits(source: Source) -> Tensor:
    assert isinstance(source, Projected)
    return source.head(source.hidden)


@contextmanager
def _standing_in(layer: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the layer's forward, not the layer: hooks around it (a sharded weight's gathering) still run."""
    before = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before


_altered: set[int] = set()  # the ids of configurations that are switched off by `_bare_logits` right now


@contextmanager
def _bare_logits(model: Any) -> Iterator[Transform]:
    """Keep the model from touching what its head returns, and say what it would have done.

    Models write this down in different places: Gemma caps (`final_logit_softcapping`), Granite divides and HyperCLOVA
    X multiplies (`logits_scaling`), Cohere multiplies (`logit_scale`, read when the model is built).
    """
    _refuse_inside_another(model)
    config = model.config.get_text_config()
    known: list[tuple[Any, str, Any]] = [
        (config, "final_logit_softcapping", None),
        (config, "logits_scaling", 1.0),
        (without_adapters(model), "logit_scale", 1.0),
    ]
    found = {
        name: (owner, getattr(owner, name), off) for owner, name, off in known if getattr(owner, name, None) is not None
    }
    scale = float(found["logit_scale"][1]) if "logit_scale" in found else 1.0
    if "logits_scaling" in found:
        factor = float(found["logits_scaling"][1])
        scale = scale * factor if config.model_type.startswith("hyperclovax") else scale / factor
    softcap = float(found["final_logit_softcapping"][1]) if "final_logit_softcapping" in found else None
    try:
        if found:
            _altered.add(id(config))
        for name, (owner, _, off) in found.items():
            setattr(owner, name, off)
        yield Transform(scale, softcap)
    finally:
        for name, (owner, value, _) in found.items():
            setattr(owner, name, value)
        _altered.discard(id(config))


def _refuse_inside_another(model: Any) -> None:
    """Within `_bare_logits`, a second model (or the same) that shares the configuration would give wrong logits."""
    config = getattr(model, "config", None)
    if config is not None and id(config.get_text_config()) in _altered:
        raise RuntimeError(
            "a model was run inside another's forward while sharing its configuration, whose logit scaling is switched "
            "off there; score the teacher before the student, or give it a configuration of its own (copy.deepcopy)"
        )


def _shared(student: Source, teacher: Source) -> tuple[Any, Any]:
    """Both sources over the vocabulary that they share; a top-K teacher names its tokens itself."""
    if isinstance(teacher, TopK) or isinstance(student, TopK) or student.vocabulary == teacher.vocabulary:
        return student, teacher
    vocabulary = min(student.vocabulary, teacher.vocabulary)
    return student.cut(vocabulary), teacher.cut(vocabulary)
