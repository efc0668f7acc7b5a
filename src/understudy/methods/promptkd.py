"""PromptKD (Kim et al., EMNLP Findings 2024, https://arxiv.org/abs/2402.12842): a teacher that adapts to its student.

A few soft prompt tokens P in front of the frozen teacher's input are trained. With y ~ sg[q](·|x) a step

    updates P on   KL(p_P ‖ sg q) + c_k KL(p_P ‖ sg p),    c_k = c_0 (1 − k/K)             (p_P is the prompted teacher)
    updates q on   KL(q ‖ sg p_P)                           with the prompt just updated.

The first term adapts the teacher to the student, on the student's own responses. The second keeps the prompted teacher
near the plain one at first, and decays to 0. Both losses are means over tokens. At test time there is no prompt. From
teacher to student the prompt's terms are forward KLs (the paper's code calls them "reverse": trained ‖ target).
"""

import logging
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..batch import Author, Batch, Example, Reduction
from ..divergences import Divergence, ForwardKL, ReverseKL
from ..fused_linear.head import softmax_dtype
from ..method import Method, MethodContext, is_distributed
from ..models.context_window import context_window
from ..models.forward import score, score_no_grad
from ..models.parity import can_fuse_after_forward
from ..models.soft_prompt import check_soft_prompt, token_embeddings
from ..rollout import Writers
from ..scores import Scores
from ..step import Step
from ..teacher import Capability, Teacher

logger = logging.getLogger(__name__)
Direction = Literal["prompted_first", "prompted_last"]


@dataclass
class PromptKD(Method):
    """On-policy distillation from a teacher whose soft prompt is tuned with the student's guidance."""

    paper: ClassVar[str] = "Kim et al., EMNLP Findings 2024, https://arxiv.org/abs/2402.12842"
    collects_ahead: ClassVar[bool] = True

    prompt_tokens: int = 7  # m
    prompt: str = "Suppose you are a student."  # its tokens' embeddings, repeated or cut to m, initialise P
    initialize: Literal["text", "random", "pad"] = "text"
    regularization: float = 1.0  # c_0
    guidance: Direction = "prompted_first"  # KL(p_P‖q), or KL(q‖p_P) with prompted_last
    anchor: Direction = "prompted_first"  # KL(p_P‖p), or KL(p‖p_P)
    divergence: Divergence = field(default_factory=ReverseKL)  # the student's, from the prompted teacher
    prompt_lr: float | None = None  # default: the student's learning rate
    prompt_warmup: int = 100  # steps
    prompt_clip: float = 1.0  # largest norm of the prompt's gradient
    prompt_weight_decay: float = 0.0  # 0.01 in the released script
    teacher_dropout: bool = False  # while the prompt is trained; on in the released script
    checkpointing: bool = False  # recompute the teacher's activations in the prompt's backward pass, to save memory
    reduction: Reduction = "token"

    def __post_init__(self) -> None:
        if self.prompt_tokens < 0:
            raise ValueError(f"promptkd needs prompt_tokens of at least 0, not {self.prompt_tokens}")
        self._teacher: Any = None  # the PromptedTeacher, after `setup`
        self._student_fused: bool | None = None

    @property
    def requires(self) -> frozenset[Capability]:
        return frozenset({Capability.MODEL, Capability.FULL})

    @property
    def authors(self) -> frozenset[Author]:
        return frozenset({"student"})

    @property
    def teacher_prefix_tokens(self) -> int:
        return self.prompt_tokens

    def setup(self, context: MethodContext) -> "PromptedTeacher":
        teacher: Any = context.teacher
        if self.prompt_tokens:
            check_soft_prompt(teacher.model)
        prompt = nn.Parameter(self._initial_prompt(teacher.model, context.tokenizer))
        self._teacher = PromptedTeacher(teacher, prompt, self.checkpointing)
        self._optimizer = torch.optim.AdamW(
            [self._teacher.prompt],
            lr=self.prompt_lr or context.learning_rate,
            weight_decay=self.prompt_weight_decay,
        )
        self._rate = self._optimizer.param_groups[0]["lr"]
        self._tokenizer, self._vocabulary = context.tokenizer, context.vocabulary
        count, size = self._teacher.prompt.numel(), sum(p.numel() for p in teacher.model.parameters())
        logger.info("the soft prompt adds %s parameters, %.2g %% of the teacher's %s", count, 100 * count / size, size)
        return self._teacher

    def _initial_prompt(self, model: Any, tokenizer: Any) -> Tensor:
        """The prompt before training, (m, D) in float32 or float64."""
        if self.initialize == "random":
            generator = torch.Generator().manual_seed(0)
            vocabulary = len(model.get_input_embeddings().weight)
            embeddings = token_embeddings(model, range(0, vocabulary, -(-vocabulary // 1000))).float()
            random = torch.randn(self.prompt_tokens, embeddings.shape[1], generator=generator)
            return random.to(embeddings.device) * embeddings.std()
        ids = tokenizer.encode(self.prompt, add_special_tokens=False) if self.initialize == "text" else []
        ids = ids or [tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id]
        ids = list(islice(cycle(ids), self.prompt_tokens))
        embeddings = token_embeddings(model, ids)
        return embeddings.to(softmax_dtype(embeddings.dtype), copy=True)

    def collect(self, examples: list[Example], writers: Writers, step: Step) -> list[Example]:
        return writers.student(examples, step)

    def coefficient(self, k: int, total: int) -> float:
        """c_k of optimizer step k, counted from 1: linear from c_0 to 0 at the run's last step."""
        return self.regularization * max(0.0, 1 - k / total) if total else self.regularization

    def before_step(self, batches: list[Batch], teacher: Any, student: Any, step: Step) -> None:
        """Update the prompt, with the student frozen, on the micro-batches that the student is about to see."""
        if not self.prompt_tokens:
            return
        prompt = self._teacher.prompt
        coefficient = self.coefficient(step.number + 1, step.total)
        prompt.grad = torch.zeros_like(prompt)
        normalizer = 0
        for batch in batches:
            self._add_gradient(batch, student, coefficient)
            normalizer += batch.normalizer(self.reduction)
        if is_distributed():
            count = torch.tensor(float(normalizer), device=prompt.device)
            torch.distributed.all_reduce(prompt.grad)
            torch.distributed.all_reduce(count)
            normalizer = float(count)
        prompt.grad /= normalizer
        nn.utils.clip_grad_norm_([prompt], self.prompt_clip)
        warmup = min(1.0, (step.number + 1) / self.prompt_warmup) if self.prompt_warmup else 1.0
        self._optimizer.param_groups[0]["lr"] = self._rate * warmup
        self._optimizer.step()

    def _add_gradient(self, batch: Batch, student: Any, coefficient: float) -> Tensor:
        """Add the gradient of Σ weight · [KL(p_P‖q) + c KL(p_P‖p)] to the prompt's; returns the value."""
        student_scores = self._student_scores(student, batch)
        plain = self._teacher.plain.score(batch).cut(self._vocabulary) if coefficient else None
        weights = batch.weights(self.reduction)

        def loss(prompted: Scores) -> Tensor:
            value = _kl(student_scores, prompted, self.guidance)
            if plain is not None:
                value = value + coefficient * _kl(plain, prompted, self.anchor)
            return (weights.to(value.device) * value).sum()

        return self._teacher.backward(batch, loss, weights, self._vocabulary, self.teacher_dropout)

    def _student_scores(self, student: Any, batch: Batch) -> Scores:
        """The student's Scores as constants, without dropout."""
        if self._student_fused is None:
            self._student_fused = can_fuse_after_forward(student)
        was_training = student.training
        student.eval()
        scores = score_no_grad(student, batch, vocabulary=self._vocabulary, fused=self._student_fused)
        student.train(was_training)
        return scores

    def loss(self, teacher: Scores, student: Scores, batch: Batch) -> Tensor:
        return teacher.divergence_to(student, self.divergence)

    def state_dict(self) -> dict[str, Tensor]:
        if self._teacher is None:
            return {}
        moments = self._optimizer.state.get(self._teacher.prompt, {})
        return {"prompt": self._teacher.prompt.detach(), **{f"adamw.{name}": x for name, x in moments.items()}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if not state:
            return
        prompt = self._teacher.prompt
        with torch.no_grad():
            prompt.copy_(state["prompt"])
        moments = {name.removeprefix("adamw."): x for name, x in state.items() if name.startswith("adamw.")}
        if moments:
            self._optimizer.state[prompt] = {
                name: x if name == "step" else x.to(prompt.device) for name, x in moments.items()
            }

    def export(self, folder: Path) -> None:
        """The prompt in PEFT's prompt-tuning format: `PeftModel.from_pretrained(teacher, folder / "soft_prompt")`."""
        from peft import PromptTuningConfig

        model, prompt = self._teacher.model, self._teacher.prompt
        if not len(prompt):
            return
        config: Any = model.config.get_text_config()
        target = folder / "soft_prompt"
        target.mkdir(parents=True, exist_ok=True)
        prompt_config = PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.prompt_tokens,
            token_dim=prompt.shape[1],
            num_transformer_submodules=1,
            num_attention_heads=getattr(config, "num_attention_heads", None),
            num_layers=config.num_hidden_layers,
            base_model_name_or_path=model.config.name_or_path,
            inference_mode=True,
        )
        prompt_config.save_pretrained(str(target))
        save_file({"prompt_embeddings": prompt.detach().cpu().contiguous()}, target / "adapter_model.safetensors")
        logger.info("the tokens nearest to the learned prompt are %s", self.nearest_tokens())

    def nearest_tokens(self) -> list[str]:
        """For each vector of the prompt, the token with the most similar embedding by cosine similarity."""
        words = nn.functional.normalize(self._teacher.model.get_input_embeddings().weight.detach().float(), dim=-1)
        nearest = (nn.functional.normalize(self._teacher.prompt.detach(), dim=-1) @ words.T).argmax(-1)
        return [self._tokenizer.decode([i]) for i in nearest.tolist()]


class PromptedTeacher(Teacher):
    """A frozen local teacher with a soft prompt before every sequence."""

    provides: ClassVar[frozenset[Capability]] = frozenset(Capability)

    def __init__(self, plain: Any, prompt: nn.Parameter, checkpointing: bool) -> None:
        self.plain, self.prompt, self.model = plain, prompt, plain.model
        if checkpointing:
            _recompute_layers(self.model)

    def score(self, batch: Batch) -> Scores:
        if not len(self.prompt):
            return self.plain.score(batch)
        batch = self._checked(batch)
        return score_no_grad(self.model, batch, soft_prompt=self.prompt.detach(), fused=self.plain.fused)

    def backward(self, batch: Batch, then: Any, weights: Tensor, vocabulary: int, dropout: bool) -> Tensor:
        """Compute `then` of the prompted teacher's Scores and add its gradient to the prompt's; returns the value."""
        batch = self._checked(batch)
        weights = weights.to(batch.input_ids.device)
        self.model.train(dropout)  # until the backward pass is over, which may run layers again
        try:
            options = {"vocabulary": vocabulary, "weights": weights, "fused": self.plain.fused}
            loss = score(self.model, batch, then, soft_prompt=self.prompt, **options)
            loss.backward()
            return loss.detach()
        finally:
            self.model.eval()

    def _checked(self, batch: Batch) -> Batch:
        """The batch as read by the teacher, on its device; refused if it does not fit after the prompt."""
        batch = batch.as_read_by_teacher()
        limit = context_window(self.model.config)
        width = batch.input_ids.shape[1] + len(self.prompt)
        if limit is not None and width > limit:
            raise ValueError(
                f"{batch.input_ids.shape[1]} tokens after a soft prompt of {len(self.prompt)} do not fit into the "
                f"teacher's context window of {limit}: lower data.max_length or rollout.generate.max_new_tokens"
            )
        return batch.to(self.model.device)


def _recompute_layers(model: Any) -> None:
    """Activation checkpointing of every layer, in training and in evaluation mode.

    transformers' own gradient_checkpointing_enable works in training mode only, in which a teacher would use dropout.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers that can be checkpointed: set checkpointing to false")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def _kl(target: Scores, prompted: Scores, direction: Direction) -> Tensor:
    """(N,) KL(prompted‖target), or KL(target‖prompted); the prompted teacher is the one that is trained."""
    return target.divergence_to(prompted, ReverseKL() if direction == "prompted_first" else ForwardKL())
