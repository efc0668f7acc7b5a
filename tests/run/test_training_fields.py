"""Every field of TrainingArguments works, or is refused with a sentence that says why."""

from dataclasses import fields

import pytest
import torch
from fakes import ragged_examples, words
from loop import arguments, logged, student, teacher, trainer, weights
from transformers import TrainingArguments

from understudy.methods.kd import KD
from understudy.recipe import RecipeError, parse
from understudy.run.arguments import training_arguments
from understudy.training.fields import DEFAULTS, IDLE, OLD, WRONG
from understudy.training.trainer import StudentTrainer

CONTENT = {"student": {"model": "a"}, "method": "sft", "data": {"dataset": "b"}}
EVALUATION = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}

# A value of each field that works, with the other fields that it needs.
WORKS = {
    "output_dir": "runs/x",
    "per_device_train_batch_size": 2,
    "num_train_epochs": 1.5,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": ({"min_lr": 1e-5}, {"lr_scheduler_type": "cosine_with_min_lr"}),
    "warmup_steps": 0.1,
    "optim": "adafactor",
    "optim_args": ("momentum=0.5", {"optim": "sgd"}),
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "optim_target_modules": ["q_proj"],
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.5,
    "bf16": "auto",
    "fp16": False,
    "tf32": None,
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": ({"use_reentrant": False}, {"activation_checkpointing": True}),
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": ({"use_reentrant": False}, {"gradient_checkpointing": True}),
    "torch_compile": True,
    "torch_compile_backend": "eager",
    "torch_compile_mode": "default",
    "neftune_noise_alpha": 5.0,
    "torch_empty_cache_steps": 1,
    "logging_strategy": "epoch",
    "logging_steps": 0.5,
    "logging_first_step": True,
    "log_on_each_node": False,
    "log_level": "error",
    "log_level_replica": "error",
    "include_num_input_tokens_seen": "all",
    "disable_tqdm": True,
    "report_to": "none",
    "run_name": "x",
    "project": "x",
    "trackio_space_id": "x",
    "trackio_bucket_id": "x",
    "trackio_static_space_id": "x",
    "eval_strategy": "epoch",
    "eval_steps": (2, EVALUATION),
    "eval_delay": (1, EVALUATION),
    "eval_on_start": True,
    "per_device_eval_batch_size": 2,
    "save_strategy": "epoch",
    "save_steps": 2,
    "save_on_each_node": True,
    "save_total_limit": 1,
    "load_best_model_at_end": (True, EVALUATION),
    "metric_for_best_model": ("eval_loss", EVALUATION),
    "greater_is_better": (False, EVALUATION | {"metric_for_best_model": "loss"}),
    "full_determinism": False,
    "seed": 3,
    "data_seed": 3,
    "use_cpu": True,
    "accelerator_config": {"even_batches": False},
    "dataloader_drop_last": True,
    "dataloader_num_workers": 1,
    "dataloader_persistent_workers": (True, {"dataloader_num_workers": 1}),
    "dataloader_prefetch_factor": (2, {"dataloader_num_workers": 1}),
    "dataloader_multiprocessing_context": ("fork", {"dataloader_num_workers": 1}),
    "train_sampling_strategy": "sequential",
    "ddp_find_unused_parameters": True,
    "ddp_bucket_cap_mb": 10,
    "ddp_broadcast_buffers": True,
    "ddp_static_graph": True,
    "ddp_backend": "gloo",
    "ddp_timeout": 60,
    "fsdp": "full_shard",
    "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    "deepspeed": None,
    "debug": "underflow_overflow",
    "skip_memory_metrics": False,
}
FIELDS = {f.name: f for f in fields(TrainingArguments) if f.init}
REFUSED = WRONG.keys() | IDLE.keys() | DEFAULTS.keys()


def other_than_default(name):
    """A value of the type of a field's default, and different."""
    default = FIELDS[name].default
    if name in DEFAULTS:
        return DEFAULTS[name][0]
    return (not default) if isinstance(default, bool) else 0.1 if isinstance(default, float) else "x"


def of(training, **evaluate):
    return parse({**CONTENT, "training": training, "evaluate": {"dataset": "b", **evaluate}})


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_works_or_is_refused_with_a_reason(name):
    if name in REFUSED:
        with pytest.raises(RecipeError, match=rf"training\.{name} has no effect here, so leave it out: [a-zA-Z]"):
            training_arguments(of({name: other_than_default(name)}))
        return
    assert name in WORKS, f"is {name} a field that works? See understudy.training.fields"
    value, others = WORKS[name] if isinstance(WORKS[name], tuple) else (WORKS[name], {})
    result = training_arguments(of({**others, name: value}))
    if not isinstance(value, str | dict):
        assert getattr(result, name) == value


@pytest.mark.parametrize("name", sorted((WRONG.keys() | IDLE.keys()) & FIELDS.keys()))
def test_a_refused_field_may_say_its_default(name):
    default = FIELDS[name].default
    training_arguments(of({name: default if isinstance(default, str | int | float | bool) else None}))


@pytest.mark.parametrize("name", sorted(OLD.keys() - FIELDS.keys()))
def test_a_field_of_another_version_is_refused_with_what_to_use(name):
    with pytest.raises(RecipeError, match=rf'no field "{name}": use '):
        training_arguments(of({name: True}))


WRONG_VALUES = {
    "max_steps": [0, -2, 10**400],
    "num_train_epochs": [0, -1, float("nan"), float("inf")],
    "learning_rate": [-1e-3, float("nan"), "fast"],
    "weight_decay": [-0.1],
    "adam_beta1": [1.5, -0.1],
    "warmup_steps": [-1],
    "max_grad_norm": [-1],
    "logging_steps": [0, -5, 2.5],
    "save_steps": [0, -1, 1.5],
    "save_total_limit": [0, -1],
    "seed": [-1, 2**33, "x"],
    "data_seed": [-1],
    "per_device_eval_batch_size": [0],
    "dataloader_num_workers": [-1],
    "optim": ["adamx", "adamw_bnb_8bit", "lomo", ["a"]],
    "optim_args": ["nonsense", "nosuch=1"],
    "lr_scheduler_type": ["nosuch", "warmup_stable_decay", 5],
    "lr_scheduler_kwargs": [{"nosuch": 1}, 3],
    "report_to": ["nosuch", "wandb"],
    "deepspeed": ["nosuch.json"],
    "fp16": [True],
    "train_sampling_strategy": ["group_by_length", "batch_rebalance", "nosuch"],
    "accelerator_config": [{"split_batches": True}, {"dispatch_batches": True}, {"nosuch": 1}, "nosuch.json"],
    "ddp_timeout": [0],
    "eval_steps": [2],
    "eval_delay": [1],
    "greater_is_better": [True],
    "metric_for_best_model": ["loss"],
    "load_best_model_at_end": [True],
    "dataloader_persistent_workers": [True],
    "dataloader_prefetch_factor": [2],
    "neftune_noise_alpha": [-1.0],
    "debug": ["nosuch"],
    "save_strategy": ["sometimes"],
    "log_level": ["loud"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_VALUES.items() for value in values]
)
def test_a_value_that_would_be_ignored_or_fail_later_is_refused_at_once(name, value):
    with pytest.raises(RecipeError, match=r"training\."):
        training_arguments(of({name: value}))


@pytest.mark.parametrize("value", ["auto", True])
def test_bf16_works_on_a_machine_without_a_gpu(value, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert training_arguments(of({"bf16": value})).use_cpu


@pytest.mark.parametrize("name", sorted(WRONG.keys() & FIELDS.keys()))
def test_python_s_arguments_are_refused_too_where_they_would_mislead(name, tmp_path):
    args = arguments(tmp_path)
    setattr(args, name, other_than_default(name))
    with pytest.raises(ValueError, match=rf"TrainingArguments\.{name} has no effect here"):
        StudentTrainer(student(), teacher(), KD(), processing_class=words(), args=args)


EFFECTIVE = {
    "neftune_noise_alpha": {"neftune_noise_alpha": 20.0},
    "data_seed": {"data_seed": 7},
    "sequential": {"train_sampling_strategy": "sequential"},
    "optim_args": {"optim": "sgd", "optim_args": "momentum=0.9"},
}
HARMLESS = {
    "full_determinism": {"full_determinism": True},
    "workers": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    "torch_empty_cache_steps": {"torch_empty_cache_steps": 1},
    "include_num_input_tokens_seen": {"include_num_input_tokens_seen": "all"},
    "skip_memory_metrics": {"skip_memory_metrics": False},
    "debug": {"debug": "underflow_overflow"},
    "epochs": {"logging_strategy": "epoch", "save_strategy": "epoch"},
    "eval_on_start": {"eval_on_start": True, "eval_strategy": "epoch"},
    "best": {"save_strategy": "best", "metric_for_best_model": "loss", **EVALUATION, "load_best_model_at_end": False},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("plain"))


def trained(folder, **options):
    run = trainer(folder, KD(), options={"eval_dataset": ragged_examples(2)}, **options)
    run.train()
    return run


@pytest.mark.parametrize("name", EFFECTIVE)
def test_a_field_that_changes_the_student_does(name, plain, tmp_path):
    run = trained(tmp_path, **EFFECTIVE[name])
    assert run.state.global_step == 4
    assert any(not torch.equal(weights(run.model)[key], value) for key, value in weights(plain.model).items())


@pytest.mark.parametrize("name", HARMLESS)
def test_a_field_that_does_not_change_the_student_trains_as_without_it(name, plain, tmp_path):
    run = trained(
        tmp_path, **{key: value for key, value in HARMLESS[name].items() if value is not False or "skip" in key}
    )
    torch.testing.assert_close(weights(run.model), weights(plain.model))
    if name == "include_num_input_tokens_seen":
        assert logged(run, "num_input_tokens_seen")[-1] > 0
