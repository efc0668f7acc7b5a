"""The loop: collect what to train on, then learn from it.

`transformers.Trainer` brings distribution (DDP, FSDP2, DeepSpeed through Accelerate), resuming, schedules, loggers,
PEFT and the hub. Two of its public hooks are the whole algorithm:

    get_batch_samples   once per optimizer step, before its forwards: the window's examples are drawn, the method says
                        what to train on instead, this is dealt into micro-batches, and its units are counted
    compute_loss        once per micro-batch: the teacher scores it just in time, and the student's forward returns the
                        loss in place of logits

The loss of an optimizer step is Σ weight · value over all its tokens on all processes ÷ their units, so that it does
not depend on how the step is cut into micro-batches and processes.
"""

import copy
from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..batch import Batch, Example, deal
from ..budget import Budget, Spending, paced
from ..fused_linear.tiles import pays_to_compile, tiling
from ..method import Method
from ..rollout import Rollout, Writers
from ..scores import COMPARED, Knowledge, Scores, can_project, compare, score
from ..step import Step
from ..teacher import Teacher
from .callbacks import AdvanceMethod, KeepToBudget, RefuseBrokenGradients, ShowProgress
from .checkpoint import last_checkpoint
from .step_metrics import Window

STATE_FILE = "distillation.safetensors"


class DistillationTrainer(Trainer):
    """Distils a teacher into a student by a method.

    Args:
        student: a causal language model of transformers, with or without PEFT adapters.
        teacher: who scores; None for methods that need no scores.
        method: what to train on and what to minimise.
        rollout: writes the student's responses (and, if the teacher is a live model, the teacher's).
        processing_class: the tokenizer that student and teacher share; required.
        teacher_writer: writes the teacher's responses instead of the rollout.
        judge: from the student to further metrics, which `evaluate` returns, too.
        budget: what the run may spend; it ends where this or its steps do, and its schedules end with it.
        kwargs: everything else of `transformers.Trainer`: train_dataset and eval_dataset (of `Example`s), callbacks …
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the units of the whole optimizer step itself

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        method: Method,
        rollout: Rollout | None = None,
        *,
        processing_class: Any,
        args: TrainingArguments | None = None,
        teacher_writer: Rollout | None = None,
        judge: Callable[[nn.Module], dict[str, float]] | None = None,
        budget: Budget | None = None,
        callbacks: Sequence[Any] = (),
        **kwargs: Any,
    ) -> None:
        args = args or TrainingArguments("runs/distillation")
        if args.n_gpu > 1:
            raise ValueError("several GPUs need one process each: start with torchrun or accelerate launch")
        _check(method, teacher)
        if not any(parameter.requires_grad for parameter in student.parameters()):
            same = getattr(teacher, "model", None) is student
            why = "the teacher is the student itself, and is frozen" if same else "all its parameters are frozen"
            raise ValueError(f"there is nothing to train in the student: {why}")
        args.remove_unused_columns = False  # rows are Examples, not columns
        args.dataloader_pin_memory = False  # nor tensors
        args.logging_nan_inf_filter = False  # a loss that is not a number is an error here
        accelerator_config: Any = args.accelerator_config
        accelerator_config.dispatch_batches = False  # nor could they be sent to other processes as such
        self.spending = Spending(budget)
        if budget is not None:
            callbacks = [KeepToBudget(self.spending, self._first_process_s), *callbacks]
        super().__init__(
            model=student,
            args=args,
            data_collator=cast(Any, list),  # examples stay ragged until Batch.of
            processing_class=processing_class,
            callbacks=[RefuseBrokenGradients(), AdvanceMethod(method, self.spending), *callbacks],
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True  # for versions of transformers without loss_is_scaled_for_ga
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        if not args.disable_tqdm:
            self.add_callback(ShowProgress(spending=self.spending))
        if teacher is not None:
            teacher.beside(self.accelerator.device)
            teacher = method.prepare(teacher, processing_class, args.learning_rate)
        self.method, self.teacher, self.judge = method, teacher, judge
        self.vocabulary = len(processing_class)
        self.pad = processing_class.pad_token_id
        if self.pad is None:
            self.pad = processing_class.eos_token_id or 0  # masks come from lengths, so any id will do
        self.window = self._new_window()
        self._project = can_project(student)
        self.writers = self._writers(rollout, teacher_writer)

    @property
    def tokens_seen(self) -> int:
        """Response tokens trained on, by all processes, over the whole run."""
        return self.spending.tokens

    def _first_process_s(self, seconds: float) -> float:
        """What the first process says, so that all end at the same step."""
        said = torch.tensor(seconds, dtype=torch.float64, device=self.args.device)
        return float(cast(Tensor, broadcast(said)))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        given = self.lr_scheduler
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.spending.budget is None or scheduler is given:
            return scheduler
        warmup = int(self.args.warmup_steps)  # below 1 it is a share of the run, and needs no steps of its own
        return paced(scheduler, self.spending, num_training_steps, warmup)

    def _writers(self, rollout: Rollout | None, teacher_writer: Rollout | None) -> Writers:
        if rollout is None:
            return Writers()
        model = getattr(self.teacher, "model", None)
        if teacher_writer is None and model is not None and "teacher" in self.method.authors:
            teacher_writer = copy.copy(rollout).follow(model, self.processing_class, "teacher")
        return Writers(rollout.follow(self.model, self.processing_class), teacher_writer)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        at, most = self.state.global_step, self.state.max_steps
        if self.spending.progress(at, most) >= 1:  # resumed at its end
            self.control.should_training_stop = True
            return [], None
        self.spending.begin_step()
        drawn = list(islice(epoch_iterator, num_batches))
        if not drawn:
            return [], None
        step = Step(at, self.args.seed, self.spending.foreseen(at, most))
        with self.window.spent("generate"):
            examples = self.method.collect(list(chain(*drawn)), self.writers, step)
        batches = [Batch.of(part, self.pad, device) for part in deal(examples, len(drawn))]
        for batch in batches:
            self.window.saw(batch)
        with self.window.spent("learn"):
            self.method.before_step(batches, self.model, self.teacher, step)
        counts = [sum(self.method.units(b) for b in batches), sum(len(b.tokens) for b in batches)]
        counts = torch.tensor(counts, dtype=torch.float64, device=device)
        units, tokens = self.accelerator.reduce(counts, reduction="sum")
        self.spending.tokens += int(tokens)
        return [{"input_ids": batch.input_ids, "batch": batch} for batch in batches], units

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.window.spent("learn"):
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
        """Σ weight · value over the batch's tokens; the divisor is the caller's."""
        teacher: Any = None
        if self.teacher is not None and self.method.needs > Knowledge.NOTHING:
            with self.window.spent("score"):
                teacher = self.teacher.score(batch)
        weights = self.method.weights(batch)

        def loss(student: Scores) -> Tensor:
            values = self.method.loss(student, teacher, batch)
            if diagnose and teacher is not None:
                if self.teacher is not None and self.teacher.gives >= Knowledge.DISTRIBUTION:
                    self.window.observed(compare(teacher, student))
                with torch.no_grad():
                    self.window.observed(self.method.observe(student, teacher, batch))
            return (weights * values).sum() if values.shape == weights.shape else values.sum()

        bare = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return score(
            model, batch, loss, head_of=bare, vocabulary=self.vocabulary, weights=weights, project=self._project
        )

    def _new_window(self) -> Window:
        return Window([*COMPARED, *self.method.watched])

    def _is_logged(self) -> bool:
        """Will this step's numbers be logged? Only then are the two models compared for people to watch."""
        every = max(int(self.state.logging_steps or 1), 1)
        step = self.state.global_step
        return (step + 1) % every == 0 or (self.args.logging_first_step and step == 0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.window.close(self.accelerator)
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The method's own objective on a fixed set, as in training but with the same draws every time.

        Returns `{prefix}_loss`; where the teacher scores, the means over tokens that training logs; and the judge's
        metrics, each of which may be `metric_for_best_model`. All processes judge alike.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("there is nothing to evaluate on: give the trainer an eval_dataset")
        examples: list[Example] = list(cast(Any, dataset))[self.args.process_index :: self.args.world_size]
        training, self.window = self.window, self._new_window()  # evaluation has its own counts
        remembered = {name: tensor.clone() for name, tensor in self.method.state_dict().items()}
        total, units = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        model = cast(nn.Module, self.model)
        model.eval()
        for start in range(0, len(examples), self.args.per_device_eval_batch_size):
            part = examples[start : start + self.args.per_device_eval_batch_size]
            part = self.method.collect(part, self.writers, Step(0, self.args.seed, self.state.max_steps))
            batch = Batch.of(part, self.pad, self.args.device)
            self.window.saw(batch)
            with self.compute_loss_context_manager():
                total += self._weighted_loss(model, batch, diagnose=True)
            units += self.method.units(batch)
        line = self.window.close(self.accelerator)
        self.window = training
        if remembered:
            self.method.load_state_dict(remembered)  # what it collected here was not for training
        total, units = self.accelerator.reduce(torch.stack([total, units]), reduction="sum")
        line = {"loss": float(total / units)} | {name: v for name, v in line.items() if not name.startswith("seconds")}
        line |= {} if self.judge is None else self.judge(model)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in line.items()}
        super().log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _pays_to_compile(self) -> bool:
        """Decided from what the whole run is set to do, so that one that was interrupted goes on with the same numbers.

        How long responses will be is not known; 64 tokens are taken.
        """
        args = self.args
        examples = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps
        if args.max_steps <= 0:
            examples = len(cast(Any, self.train_dataset)) * args.num_train_epochs
        tokens = 64 * examples
        if self.spending.budget is not None and self.spending.budget.tokens is not None:
            tokens = min(tokens, self.spending.budget.tokens)
        return args.torch_compile or pays_to_compile(tokens, self.vocabulary, args.device.type)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Also saves, into a checkpoint and before it is complete, what the method owns and how far the run is."""
        if _internal_call and self.args.should_save:
            state = {f"method.{name}": tensor.contiguous() for name, tensor in self.method.state_dict().items()}
            state["spent"] = torch.tensor(self.spending.state(), dtype=torch.float64)
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / STATE_FILE)
        super().save_model(output_dir, _internal_call)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As in transformers; `True` resumes from the last checkpoint that was written to its end, if there is one."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
        self.spending.restart()
        if resume_from_checkpoint:
            state = load_file(Path(resume_from_checkpoint) / STATE_FILE)
            self.spending.resume(state.pop("spent").tolist())
            self.method.load_state_dict({name.removeprefix("method."): tensor for name, tensor in state.items()})
        self.window = self._new_window()
        try:
            with tiling(compiled=self._pays_to_compile()):
                return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ShowProgress):
                    callback.progress.stop()  # gives the terminal its cursor back, also after an error


def _check(method: Method, teacher: Teacher | None) -> None:
    if method.needs > Knowledge.NOTHING and (teacher is None or teacher.gives < method.needs):
        gives = "there is no teacher" if teacher is None else f"this teacher gives {teacher.gives.name.lower()}"
        raise ValueError(
            f"{type(method).__name__} needs a teacher that gives {method.needs.name.lower()}, and {gives}; "
            "choose another method, or a local teacher, which gives everything"
        )
