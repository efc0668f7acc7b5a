"""Which fields of transformers' TrainingArguments do nothing here, or would break: refused, each with the reason.

Everything that is not listed works. The losses, evaluation and checkpoints are this package's own, so what Trainer does
to labels, predictions or its checkpoints has no effect, and accepting such fields would hide a mistake.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from transformers import TrainingArguments

_PREDICTIONS = "evaluation gathers no predictions: name metrics of responses in evaluate.metrics"
_FULL_EVAL = "evaluation uses the model that is trained: set bf16 or student.dtype"
_HUB = "nothing is uploaded while training: upload the folder student/ afterwards, such as by `hf upload`"
_ALWAYS = "a run always trains, and evaluates where eval_strategy or evaluate.dataset ask for it"
_LENGTHS = "a step's examples are sorted by length anyway"
_LIGER = "the loss is computed without logits in memory already"

# Refused with any value but the default one; in Python as well.
WRONG = {
    "label_smoothing_factor": "the methods have losses of their own: choose another divergence or temperature",
    "save_only_model": "a run could not be resumed from such checkpoints; the folder student/ has the model alone",
    "auto_find_batch_size": "another batch size makes another student: lower per_device_train_batch_size and raise "
    "gradient_accumulation_steps, which gives the same one",
    "use_liger_kernel": _LIGER,
    "ignore_data_skip": "a resumed run would train on the first rows again",
    "parallelism_config": "models are not split within a layer or a sequence: use fsdp or deepspeed",
    "bf16_full_eval": _FULL_EVAL,
    "fp16_full_eval": _FULL_EVAL,
    "batch_eval_metrics": _PREDICTIONS,
    "include_for_metrics": _PREDICTIONS,
    "label_names": _PREDICTIONS,
    "enable_jit_checkpoint": "SIGTERM ends a run with a checkpoint anyway",
    "push_to_hub": _HUB,
}

# Refused in a recipe with any value but the default one.
IDLE = {
    "prediction_loss_only": _PREDICTIONS,
    "eval_do_concat_batches": _PREDICTIONS,
    "eval_use_gather_object": _PREDICTIONS,
    "eval_accumulation_steps": _PREDICTIONS,
    "liger_kernel_config": _LIGER,
    "length_column_name": _LENGTHS,
    "do_train": _ALWAYS,
    "do_eval": _ALWAYS,
    "do_predict": _ALWAYS,
    "resume_from_checkpoint": "the same command resumes from the last complete checkpoint by itself",
    "restore_callback_states_from_checkpoint": "a resumed run always goes on with its count of evaluations",
    "use_cache": "training reads no cache, and generation always has one",
    "average_tokens_across_devices": "the loss is always a mean over all processes",
    "dataloader_in_order": "the order of examples would not be the same after an interruption",
    "local_rank": "torchrun and accelerate launch set this",
    **dict.fromkeys(("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"), _HUB),
    "hub_revision": _HUB,
}

# Refused in a recipe with this value, though it is transformers' default.
DEFAULTS = {
    "remove_unused_columns": (True, "examples have no columns"),
    "dataloader_pin_memory": (True, "examples are not tensors"),
    "logging_nan_inf_filter": (True, "a loss that is not finite ends the run"),
}

# Fields of other versions of transformers, by what to use instead.
OLD = {
    "evaluation_strategy": "eval_strategy",
    "group_by_length": f"nothing: {_LENGTHS}",
    "jit_mode_eval": "nothing",
    "logging_dir": "the environment variable of your logger, such as TENSORBOARD_LOGGING_DIR",
    "no_cuda": "use_cpu",
    "overwrite_output_dir": "the option --restart, which deletes the earlier run",
    "past_index": "nothing",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "push_to_hub_model_id": f"nothing: {_HUB}",
    "save_safetensors": "nothing: weights are always saved so",
    "torchdynamo": "torch_compile_backend",
    "warmup_ratio": "warmup_steps, which below 1 is a share of the run",
}

# What a field needs to have any effect: another field, and the values of that one which do not do.
NEEDS = {
    "eval_steps": ("eval_strategy", ("no", "epoch")),
    "eval_delay": ("eval_strategy", ("no",)),
    "greater_is_better": ("metric_for_best_model", (None,)),
    "metric_for_best_model": ("eval_strategy", ("no",)),
    "activation_checkpointing_kwargs": ("activation_checkpointing", (None, False)),
    "gradient_checkpointing_kwargs": ("gradient_checkpointing", (None, False)),
    "dataloader_multiprocessing_context": ("dataloader_num_workers", (0,)),
    "dataloader_persistent_workers": ("dataloader_num_workers", (0,)),
    "dataloader_prefetch_factor": ("dataloader_num_workers", (0,)),
}

# The smallest value of a number; below it transformers would ignore the field, or fail in the middle of a run.
AT_LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("save_total_limit", "torch_empty_cache_steps", "dataloader_prefetch_factor", "ddp_timeout"), 1),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "eval_delay"), 0),
    **dict.fromkeys(("dataloader_num_workers", "seed", "data_seed", "adam_epsilon", "adam_beta1", "adam_beta2"), 0),
}
ABOVE = {"num_train_epochs": 0, "logging_steps": 0, "save_steps": 0, "eval_steps": 0, "neftune_noise_alpha": 0}
AT_MOST = {"seed": 2**32 - 1, "data_seed": 2**32 - 1, "max_steps": 2**31 - 1, "adam_beta1": 1, "adam_beta2": 1}


def refusal(name: str, value: Any) -> str | None:
    """Why a recipe may not set this field to this value, or None."""
    if name in DEFAULTS:
        refused, reason = DEFAULTS[name]
        return reason if value == refused else None
    reason = (WRONG | IDLE).get(name)
    if reason is not None and not _is_default(name, value):
        return reason
    if name == "train_sampling_strategy" and value not in ("random", "sequential"):
        return _LENGTHS
    if name == "accelerator_config" and isinstance(value, Mapping):
        for key in ("split_batches", "dispatch_batches"):
            if value.get(key):
                return f"{key} is for tensors, and examples are none"
    return None


def is_idle(name: str) -> bool:
    """Does this field have no effect here, whatever its value is?"""
    return name in WRONG or name in IDLE or name in DEFAULTS


def out_of_range(name: str, value: Any) -> str | None:
    """What a number must be, or None if it is."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if value != value or value in (float("inf"), float("-inf")):
        return "a finite number"
    if name in AT_LEAST and value < AT_LEAST[name]:
        return f"at least {AT_LEAST[name]}"
    if name in ABOVE and value <= ABOVE[name]:
        return f"more than {ABOVE[name]}"
    if name in AT_MOST and value > AT_MOST[name]:
        return f"at most {AT_MOST[name]}"
    if name == "max_steps" and value < 1 and value != -1:
        return "at least 1, or -1 for num_train_epochs"
    return None


def check_arguments(args: TrainingArguments) -> None:
    """Refuse TrainingArguments whose effect would be another than their names say.

    Raises:
        ValueError: naming the field, with the reason.
    """
    for name, reason in WRONG.items():
        if not _is_default(name, getattr(args, name, None)):
            raise ValueError(f"TrainingArguments.{name} has no effect here: {reason}")


def _is_default(name: str, value: Any) -> bool:
    defaults = {f.name: f.default if f.default is not MISSING else None for f in fields(TrainingArguments)}
    default = defaults.get(name)
    return value == default or (not default and not value)
