"""The distillation trainer: `transformers.Trainer` with a teacher, a method and a rollout.

`transformers.Trainer` brings distribution (DDP, FSDP2, DeepSpeed through Accelerate), resuming, schedules, loggers,
PEFT and the hub. The algorithm is in two of its public hooks:

    get_batch_samples   once per optimizer step, before its forwards: examples are drawn from the dataset, the method
                        collects what to train on, this is split into micro-batches, and its normalizer is computed
    compute_loss        once per micro-batch: the teacher scores it just in time, and the student's forward returns the
                        loss in place of logits

The loss of an optimizer step is Σ weight · value over all its tokens on all processes ÷ their normalizer, so that it
does not depend on how the step is split into micro-batches and processes.
"""

from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..batch import Batch, Example, micro_batches
from ..budget import Budget
from ..fused_linear.tiles import tiling
from ..method import Method, MethodContext
from ..models.forward import score
from ..models.parity import can_fuse
from ..rollout import Rollout, Writer, Writers
from ..sampling import Sampling
from ..scores import Scores, divergence_metrics
from ..step import Step
from ..teacher import Capability, Teacher
from ..teachers import check_provides
from .callbacks import AfterStep, CheckGradients, LimitCheckpoints, ShowProgress, StopAtBudget, SyncRollout
from .checkpoint import last_checkpoint
from .preparation import adapt, check_same_tokenizer, check_trainable, compiles
from .spending import Spending, follow_budget
from .state import load_state, save_state
from .step_metrics import StepMetrics


class StudentTrainer(Trainer):
    """Distils a teacher into a student by a method.

    Args:
        student: a causal language model of transformers, with or without PEFT adapters.
        teacher: scores the responses; None for methods that need no scores.
        method: what to train on and what to minimise.
        rollout: generates the student's responses (and, if the teacher is a live model, the teacher's).
        sampling: its sampling parameters.
        processing_class: the tokenizer that student and teacher share; required.
        teacher_rollout: generates the teacher's responses instead of the rollout; bound to the teacher's model.
        response_metrics: from the student to further metrics, which `evaluate` returns as well.
        budget: the tokens or seconds that the run may spend; it ends when this or its steps are used up, and its
            schedules end with it.
        corpus: plain texts for methods with a language-modelling loss, their first token as the prompt.
        kwargs: everything else of `transformers.Trainer`: train_dataset and eval_dataset (of `Example`s), callbacks …
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the normalizer of the whole optimizer step itself

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        method: Method,
        rollout: Rollout | None = None,
        sampling: Sampling | None = None,
        *,
        processing_class: Any,
        args: TrainingArguments | None = None,
        teacher_rollout: Rollout | None = None,
        response_metrics: Callable[[nn.Module], dict[str, float]] | None = None,
        budget: Budget | None = None,
        corpus: Sequence[Example] = (),
        callbacks: Sequence[Any] = (),
        **kwargs: Any,
    ) -> None:
        args = args or TrainingArguments("runs/distillation")
        if args.n_gpu > 1:
            raise ValueError("several GPUs need one process each: start with torchrun or accelerate launch")
        check_provides(teacher, method.requires, type(method).__name__)
        check_trainable(student, teacher)
        check_same_tokenizer(processing_class, teacher)
        limit = adapt(args)
        self.spending = Spending(budget)
        if budget is not None:
            callbacks = [StopAtBudget(self.spending, self._first_process_s), *callbacks]
        super().__init__(
            model=student,
            args=args,
            data_collator=cast(Any, list),  # examples stay ragged until Batch.from_examples
            processing_class=processing_class,
            callbacks=[CheckGradients(), AfterStep(method, self.spending), *callbacks],
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True  # for versions of transformers without loss_is_scaled_for_ga
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        if limit:
            self.add_callback(LimitCheckpoints(limit))
        if not args.disable_tqdm:
            self.add_callback(ShowProgress(spending=self.spending))
        self.vocabulary = len(processing_class)
        if teacher is not None:
            teacher.to(self.accelerator.device)
        context = MethodContext(teacher, processing_class, self.vocabulary, args.learning_rate, corpus)
        self.method, self.response_metrics = method, response_metrics
        self.teacher = method.setup(context) or teacher
        self.pad = processing_class.pad_token_id
        if self.pad is None:
            self.pad = processing_class.eos_token_id or 0  # masks come from lengths, so any id will do
        self.step_metrics = StepMetrics()
        self._fused = can_fuse(student)
        self.writers = self._writers(rollout, sampling or Sampling(), teacher_rollout)

    @property
    def tokens_seen(self) -> int:
        """Response tokens trained on, by all processes, over the whole run."""
        return self.spending.tokens

    def _first_process_s(self, seconds: float) -> float:
        """The first process's seconds, so that all processes end at the same step."""
        tensor = torch.tensor(seconds, dtype=torch.float64, device=self.args.device)
        return float(cast(Tensor, broadcast(tensor)))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        existing = self.lr_scheduler
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.spending.budget is None or scheduler is existing:
            return scheduler
        warmup = int(self.args.warmup_steps)  # below 1 it is a share of the run, and needs no steps of its own
        return follow_budget(scheduler, self.spending, num_training_steps, warmup)

    def _writers(self, rollout: Rollout | None, sampling: Sampling, teacher_rollout: Rollout | None) -> Writers:
        if rollout is None:
            return Writers()
        teacher = self.teacher if "teacher" in self.method.authors else None
        if teacher_rollout is None and teacher is not None and teacher.can(Capability.MODEL):
            teacher_rollout = rollout.bind(teacher.model, self.processing_class, "teacher")
        student = rollout.bind(self.model, self.processing_class)
        self.add_callback(SyncRollout(student))
        return Writers(
            Writer(student, sampling), None if teacher_rollout is None else Writer(teacher_rollout, sampling)
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        number, max_steps = self.state.global_step, self.state.max_steps
        if self.spending.progress(number, max_steps) >= 1:  # a run that was resumed after its last step
            self.control.should_training_stop = True
            return [], None
        self.spending.begin_step()
        loaded = list(islice(epoch_iterator, num_batches))
        if not loaded:
            return [], None
        step = Step(number, self.args.seed, self.spending.expected_steps(number, max_steps))
        with self.step_metrics.timer("generate"):
            examples = self.method.collect(list(chain(*loaded)), self.writers, step)
        batches = [Batch.from_examples(part, self.pad, device) for part in micro_batches(examples, len(loaded))]
        for batch in batches:
            self.step_metrics.count(batch)
        if self.teacher is not None and self.method.requires:
            self.teacher.prefetch(batches)
        with self.step_metrics.timer("learn"):
            self.method.before_step(batches, self.teacher, self.model, step)
        counts = [sum(b.normalizer(self.method.reduction) for b in batches), sum(len(b.tokens) for b in batches)]
        counts = torch.tensor(counts, dtype=torch.float64, device=device)
        normalizer, tokens = self.accelerator.reduce(counts, reduction="sum")
        self.spending.tokens += int(tokens)
        return [{"input_ids": batch.input_ids, "batch": batch} for batch in batches], normalizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.step_metrics.timer("learn"):
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        loss = self._weighted_loss(model, inputs["batch"], diagnose=self._is_logged())
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss became {loss.item()} at step {self.state.global_step}; nothing was updated with it. "
                f"Resume from the last checkpoint in {self.args.output_dir} with a lower learning_rate"
                + (", or a bounded divergence such as jensen_shannon" if loss.isposinf() else "")
            )
        return loss * (self.accelerator.num_processes / float(num_items_in_batch))

    def _weighted_loss(self, model: nn.Module, batch: Batch, diagnose: bool) -> Tensor:
        """Σ weight · value over the batch's tokens; the caller divides by the normalizer."""
        method, teacher = self.method, cast(Any, None)
        if self.teacher is not None and method.requires:
            with self.step_metrics.timer("score"):
                teacher = self.teacher.score(batch).cut(self.vocabulary)
        weights = batch.weights(method.reduction)

        def loss(student: Scores) -> Tensor:
            values = method.loss(teacher, student, batch)
            if diagnose:
                if self.teacher is not None and teacher is not None and self.teacher.can(Capability.TOP_K):
                    self.step_metrics.record(divergence_metrics(teacher, student))
                with torch.no_grad():
                    self.step_metrics.record(method.metrics(cast(Any, teacher), student, batch))
            per_token = values.shape == weights.shape and method.reduction != "pair"
            return (weights * values).sum() if per_token else values.sum()

        return score(
            model,
            batch,
            loss,
            unwrapped=self.accelerator.unwrap_model(model, keep_torch_compile=False),
            vocabulary=self.vocabulary,
            weights=None if method.late_weights else weights,
            fused=self._fused,
        )

    def _is_logged(self) -> bool:
        """Will this step's metrics be logged? Only then are the two models compared for logging."""
        every = max(int(self.state.logging_steps or 1), 1)
        step = self.state.global_step
        return (step + 1) % every == 0 or (self.args.logging_first_step and step == 0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.step_metrics.log_line(self.accelerator)
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate the method's own loss on a fixed dataset, as in training but with the same random numbers each time.

        Returns `{prefix}_loss`; where the teacher scores, the means over tokens that training logs; and the
        `response_metrics`, each of which may be `metric_for_best_model`. All processes get the same values.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("there is nothing to evaluate on: give the trainer an eval_dataset")
        examples: list[Example] = list(cast(Any, dataset))[self.args.process_index :: self.args.world_size]
        training, self.step_metrics = self.step_metrics, StepMetrics()  # evaluation has its own counts
        saved_state = {name: tensor.clone() for name, tensor in self.method.state_dict().items()}
        total, normalizer = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        model = cast(nn.Module, self.model)
        model.eval()
        for start in range(0, len(examples), self.args.per_device_eval_batch_size):
            part = examples[start : start + self.args.per_device_eval_batch_size]
            part = self.method.collect(part, self.writers, Step(0, self.args.seed, self.state.max_steps))
            batch = Batch.from_examples(part, self.pad, self.args.device)
            self.step_metrics.count(batch)
            with self.compute_loss_context_manager():
                total += self._weighted_loss(model, batch, diagnose=True)
            normalizer += batch.normalizer(self.method.reduction)
        line = self.step_metrics.log_line(self.accelerator)
        self.step_metrics = training
        if saved_state or self.method.state_dict():
            self.method.load_state_dict(saved_state)  # undo what `collect` changed in this evaluation
        total, normalizer = self.accelerator.reduce(torch.stack([total, normalizer]), reduction="sum")
        line = {"loss": float(total / normalizer)} | {
            name: v for name, v in line.items() if not name.startswith("seconds")
        }
        line |= {} if self.response_metrics is None else self.response_metrics(model)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in line.items()}
        super().log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Also saves, into a checkpoint and before it is complete, the method's state and the spent budget."""
        if _internal_call and self.args.should_save:
            save_state(Path(output_dir or str(self.args.output_dir)), self.method, self.spending)
        super().save_model(output_dir, _internal_call)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As in transformers; `True` resumes from the last complete checkpoint, if there is one."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
        self.spending.restart()
        if resume_from_checkpoint:
            load_state(Path(resume_from_checkpoint), self.method, self.spending)
        self.step_metrics = StepMetrics()
        try:
            compiled = compiles(self.args, cast(Any, self.train_dataset), self.vocabulary, self.spending.budget)
            with tiling(compiled=compiled):
                return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ShowProgress):
                    callback.progress.stop()  # restores the terminal's cursor, also after an error
