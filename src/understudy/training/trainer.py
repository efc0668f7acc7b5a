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

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..batch import Batch, Example, micro_batches
from ..budget import Budget
from ..fused_linear.tiles import tiling
from ..method import Method, MethodContext
from ..models.forward import score
from ..models.parity import can_fuse
from ..models.vocabulary import vocabulary_size
from ..rollout import Rollout
from ..sampling import Sampling, Schedule
from ..scores import Scores, divergence_metrics, metrics_by_teacher
from ..step import Step
from ..teacher import Capability, Teacher
from ..teachers import check_teacher
from .best_checkpoint import LoadBestState
from .callbacks import AfterStep, CheckGradients, StopAtBudget, SyncRollout
from .checkpoint import last_checkpoint, step_of
from .collecting import Collector, FinishAhead, check_rollout
from .display import ShowProgress
from .held_out import held_out_line
from .hyperparameters import given_hyperparameters, remedy
from .inputs import RowReader, as_student, as_teacher, as_tokenizer, padding
from .loggers import describe_to_loggers
from .method_output import checked_loss, checked_metrics
from .preparation import adapted, check_models, compiles
from .resumable import ResumableTrainer
from .router_loss import RouterLoss
from .saving import SaveCheckpoints
from .spending import Spending, first_process_s, follow_budget
from .state import load_state, save_state
from .step_metrics import StepMetrics
from .teacher_failure import NoteLastStep, can_fail, checkpoint_on_failure
from .writers import bind_writers


class StudentTrainer(ResumableTrainer):
    """Distils a teacher into a student by a method.

    Args:
        student: a causal language model of transformers, with or without PEFT adapters, or its name or folder.
        teacher: scores the responses; None for methods that need no scores. A model, its name or its folder stands for
            a `LocalTeacher`.
        method: what to train on and what to minimise.
        rollout: generates the student's responses (and, if the teacher is a live model, the teacher's).
        sampling: its sampling parameters.
        processing_class: the tokenizer that student and teacher share; by default the student's, by its name.
        teacher_rollout: generates the teacher's responses instead of the rollout.
        response_metrics: from the student to further metrics, which `evaluate` returns as well.
        budget: the tokens or seconds that the run may spend; it ends when this or its steps are used up, and its
            schedules end with it.
        schedule: whether responses are generated a step ahead, and how many of their tokens are trained on.
        corpus: plain texts for methods with a language-modelling loss, their first token as the prompt.
        peft_config: adds adapters to the student.
        train_dataset, eval_dataset: of `Example`s, or of rows as `datasets.Dataset` or a list of dictionaries.
        data_options: of `examples_from_rows`, for datasets of rows.
        console: where progress is shown.
        kwargs: everything else of `transformers.Trainer`: callbacks, optimizers …
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the normalizer of the whole optimizer step itself

    def __init__(
        self,
        student: nn.Module | str | Path,
        teacher: Teacher | nn.Module | str | Path | None,
        method: Method,
        rollout: Rollout | None = None,
        sampling: Sampling | None = None,
        *,
        processing_class: Any = None,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_options: Mapping[str, Any] | None = None,
        peft_config: Any = None,
        teacher_rollout: Rollout | None = None,
        response_metrics: Callable[[nn.Module], dict[str, float]] | None = None,
        budget: Budget | None = None,
        schedule: Schedule | None = None,
        corpus: Sequence[Example] = (),
        callbacks: Sequence[Any] = (),
        console: Console | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or TrainingArguments("runs/distillation")
        limit, args = args.save_total_limit, adapted(args)
        sampling, schedule, teacher = sampling or Sampling(), schedule or Schedule(), as_teacher(teacher)
        check_rollout(method, rollout, sampling, schedule)
        check_teacher(teacher, method.requires, method.authors, type(method).__name__)
        processing_class, student = as_tokenizer(processing_class, student), as_student(student, peft_config, args.seed)
        check_models(student, teacher, processing_class, args)
        rows = RowReader(processing_class, method, sampling, student, teacher, data_options or {})
        self.spending = Spending(budget)
        self.parts = parts = {"method": method} if teacher is None else {"method": method, "teacher": teacher}
        if budget is not None:
            callbacks = [StopAtBudget(self.spending, lambda s: first_process_s(s, args.device)), *callbacks]
        super().__init__(
            model=student,
            args=args,
            data_collator=cast(Any, list),  # examples stay ragged until Batch.from_examples
            train_dataset=rows.read(train_dataset, "train_dataset"),
            eval_dataset=rows.read(eval_dataset, "eval_dataset"),
            processing_class=processing_class,
            callbacks=[CheckGradients(), AfterStep(parts, self.spending), LoadBestState(parts), *callbacks],
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True  # for versions of transformers without loss_is_scaled_for_ga
        self.vocabulary, self.pad = vocabulary_size(processing_class), padding(processing_class)
        self.method, self.response_metrics, self.step_metrics = method, response_metrics, StepMetrics()
        self._fused, self.router = can_fuse(student), RouterLoss(student)
        if teacher is not None:
            teacher.set_student(student)
            teacher.to(self.accelerator.device)
        context = MethodContext(teacher, processing_class, self.vocabulary, args.learning_rate, corpus)
        self.teacher = method.setup(context) or teacher
        models = (student, self.teacher, method, processing_class, rollout, sampling, teacher_rollout)
        self.writers = bind_writers(*models, Path(str(args.output_dir)))
        self.collector = Collector(method, self.writers, schedule, self.accelerator)
        self._arrange_callbacks(limit, console, rollout)
        described = {**parts, "teacher": teacher, "rollout": rollout, "sampling": sampling, "budget": budget}
        describe_to_loggers(self.callback_handler.callbacks, described, str(args.output_dir))

    def _arrange_callbacks(self, limit: int | None, console: Console | None, rollout: Rollout | None) -> None:
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(FinishAhead(self))
        self.add_callback(SaveCheckpoints(limit))
        if can_fail(self.teacher, rollout):
            self.add_callback(NoteLastStep(self.method, self.spending))
        self._progress = ShowProgress(console, self.spending, bar=not self.args.disable_tqdm)
        self.add_callback(self._progress)
        if rollout is not None:
            self.add_callback(SyncRollout(self.writers.student.rollout))

    @property
    def tokens_seen(self) -> int:
        """Response tokens trained on, by all processes, over the whole run."""
        return self.spending.tokens

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        existing = self.lr_scheduler
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.spending.budget is None or scheduler is existing:
            return scheduler
        warmup = int(self.args.warmup_steps)  # below 1 it is a share of the run, and needs no steps of its own
        return follow_budget(scheduler, self.spending, num_training_steps, warmup)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with given_hyperparameters(self.optimizer, self.lr_scheduler):
            super()._load_optimizer_and_scheduler(checkpoint)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        number, max_steps = self.state.global_step, self.state.max_steps
        if self.spending.progress(number, max_steps) >= 1:  # a run that was resumed after its last step
            self.control.should_training_stop = True
            return [], None
        self.spending.begin_step()
        step = Step(number, self.args.seed, self.spending.expected_steps(number, max_steps))
        examples, parts = self.collector.collect(epoch_iterator, num_batches, step, self.step_metrics)
        if not parts:
            return [], None
        batches = [Batch.from_examples(part, self.pad, device) for part in micro_batches(examples, parts)]
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
        self.router.begin_step(batches, normalizer, self.accelerator)
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
        loss = self.weighted_loss(model, inputs["batch"], self.method, diagnose=self._is_logged())
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss became {loss.item()} at step {self.state.global_step}; nothing was updated with it. "
                + remedy(str(self.args.output_dir), unbounded=bool(loss.isposinf()))
            )
        return loss * (self.accelerator.num_processes / float(num_items_in_batch))

    def weighted_loss(self, model: nn.Module, batch: Batch, method: Method, diagnose: bool) -> Tensor:
        """Σ weight · value over the batch's tokens; the caller divides by the normalizer."""
        teacher = cast(Any, None)
        if self.teacher is not None and method.requires:
            with self.step_metrics.timer("score"):
                teacher = self.teacher.score(batch).cut(self.vocabulary)
        weights = batch.weights(method.reduction)

        def loss(student: Scores) -> Tensor:
            values = checked_loss(method.loss(teacher, student, batch), method)
            if diagnose:
                if self.teacher is not None and teacher is not None:
                    compared = divergence_metrics(teacher, student) if self.teacher.can(Capability.TOP_K) else {}
                    self.step_metrics.record(compared | metrics_by_teacher(teacher, compared))
                with torch.no_grad():
                    metrics = method.metrics(cast(Any, teacher), student, batch)
                    self.step_metrics.record(checked_metrics(metrics, method))
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
            router=self.router.term(batch, model.training, self.step_metrics if diagnose else None),
        )

    def _is_logged(self) -> bool:
        """Will this step's metrics be logged? Only then are the two models compared for logging."""
        step, every = self.state.global_step, max(int(self.state.logging_steps or 1), 1)
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

        Returns `{prefix}_loss`; where the teacher scores, the means over tokens that training logs; the same for each
        of the method's `evaluated_parts`, with the part's name; and the `response_metrics`. Each of these may be
        `metric_for_best_model`. All processes get the same values.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("there is nothing to evaluate on: give the trainer an eval_dataset")
        if isinstance(dataset, dict):
            parts = [self.evaluate(d, ignore_keys, f"{metric_key_prefix}_{name}") for name, d in dataset.items()]
            return {name: value for part in parts for name, value in part.items()}
        line = held_out_line(self, list(cast(Any, dataset)))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in line.items()}
        super().log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Also saves, into a checkpoint and before it is complete, the method's state and the spent budget."""
        if _internal_call and step_of(output_dir or "") >= 0:
            save_state(Path(str(output_dir)), self.parts, self.spending, self.collector, self.args.should_save)
        super().save_model(output_dir, _internal_call)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As in transformers; `True` resumes from the last complete checkpoint, if there is one."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
        self.spending.restart()
        if resume_from_checkpoint:
            load_state(Path(resume_from_checkpoint), self.parts, self.spending)
        self.collector.restart(resume_from_checkpoint or None)
        self.step_metrics = StepMetrics()
        compiled = compiles(self.args, cast(Any, self.train_dataset), self.vocabulary, self.spending.budget)
        with closing(self._progress), checkpoint_on_failure(self), closing(self.collector), tiling(compiled=compiled):
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
