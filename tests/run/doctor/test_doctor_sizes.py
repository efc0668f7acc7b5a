"""The sizes that doctor expects are those of real models, optimizers, caches and folders."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from folders import described, llama, sums, write
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from understudy.batch import Batch, Example
from understudy.divergences import ForwardKL
from understudy.generation.decoder import Decoder
from understudy.models.forward import score, score_no_grad
from understudy.models.skeleton import skeleton, weight_bytes, without_memory
from understudy.recipe import Recipe, load
from understudy.run.arguments import training_arguments
from understudy.run.build import build
from understudy.run.distill import distill
from understudy.run.doctor.data import step_lengths
from understudy.run.doctor.disk import student_bytes
from understudy.run.doctor.memory import Estimate, estimate
from understudy.run.doctor.one_step import Lengths, kv_cache, micro_batch
from understudy.run.doctor.peak import PeakMemory
from understudy.run.prepare import prepare
from understudy.run.refusals import Refusals

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Teachers, a model with adapters, and data."""
    home = tmp_path_factory.mktemp("sizes")
    llama(home / "teacher")
    llama(home / "wide", hidden_size=32, dtype=torch.bfloat16)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(home / "teacher"), LoraConfig(task_type="CAUSAL_LM", **LORA)
    )
    adapted.save_pretrained(home / "adapters")
    sums(home / "sums.jsonl")
    return home


def recipe_of(home, folder, training=None, **changes) -> Recipe:
    content = described(home, **changes)
    content["training"] |= {"output_dir": str(folder / "run"), **(training or {})}
    return load(write(folder / "mine.yaml", content))


def expected(recipe: Recipe, processes: int = 1) -> Estimate:
    prepared, arguments = prepare(recipe), training_arguments(recipe)
    return estimate(recipe, arguments, prepared, step_lengths(prepared, arguments), processes, Refusals())


def sizes(result: Estimate) -> dict[str, int]:
    return {part.name: part.bytes for part in result.parts}


class Gradients(TrainerCallback):
    """Measures the gradients right before the optimizer reads them."""

    bytes = 0

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.bytes = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


STUDENTS = {
    "whole": {"model": "{home}/teacher"},
    "bfloat16": {"model": "{home}/wide", "dtype": "auto"},
    "fresh": {"fresh": {"hidden_size": 8, "tie_word_embeddings": True}},
    "layers": {"layers": [0, 2]},
    "new adapters": {"model": "{home}/teacher", "peft": LORA, "dtype": "bfloat16"},
    "saved adapters": {"model": "{home}/adapters"},
}


@pytest.mark.parametrize(
    ("student", "optim"),
    [
        *((student, "adamw_torch") for student in STUDENTS),
        ("whole", "sgd"),
        ("whole", "adafactor"),
        ("new adapters", "adagrad"),
    ],
)
def test_weights_gradients_optimizer_and_checkpoint_are_those_of_a_run(student, optim, home, tmp_path):
    block = {key: v.format(home=home) if isinstance(v, str) else v for key, v in STUDENTS[student].items()}
    recipe = recipe_of(home, tmp_path, {"optim": optim, "save_steps": 2}, student=block)
    result = expected(recipe)
    run: Any = build(recipe, training_arguments(recipe))
    gradients = Gradients()
    run.trainer.add_callback(gradients)
    run.trainer.train()
    model, state = run.trainer.model, run.trainer.optimizer.state.values()
    real = {
        "student": sum(p.nbytes for p in model.parameters()),
        "gradients": gradients.bytes,
        "optimizer": sum(x.nbytes for each in state for x in each.values() if torch.is_tensor(x)),
        "teacher": sum(p.nbytes for p in run.teacher.local_model.parameters()),
    }
    assert {name: sizes(result)[name] for name in real} == real
    assert all(part.is_exact for part in result.parts if part.name in real)
    assert result.optimizer_bytes == real["optimizer"]
    files = ("model.safetensors", "adapter_model.safetensors", "optimizer.pt")
    checkpoint = sum(path.stat().st_size for name in files for path in (tmp_path / "run").glob(f"checkpoint-2/{name}"))
    trained = [p for p in model.parameters() if p.requires_grad or not hasattr(model, "peft_config")]
    assert 0 <= checkpoint - sum(p.nbytes for p in trained) - real["optimizer"] < 32 * 2**10  # names and headers


@pytest.mark.parametrize(
    "student",
    [
        {"model": "{home}/wide"},  # bfloat16 on disk, float32 in training
        {"model": "{home}/teacher", "peft": LORA},
        {"model": "{home}/wide", "peft": LORA, "merge": True},
        {"model": "{home}/teacher", "save_dtype": "float16"},
    ],
)
def test_the_saved_student_is_as_large_as_expected(student, home, tmp_path):
    block = {key: v.format(home=home) if isinstance(v, str) else v for key, v in student.items()}
    recipe = recipe_of(home, tmp_path, {"save_strategy": "no", "max_steps": 1}, student=block)
    prepared = prepare(recipe)
    size = student_bytes(recipe, prepared, expected(recipe).student)
    distill(recipe)
    saved = sum(path.stat().st_size for path in (tmp_path / "run" / "student").glob("*.safetensors"))
    assert 0 <= saved - size < 8 * 2**10  # the header


def test_several_processes_have_buckets_and_teachers_that_take_turns_have_one_place(home, tmp_path):
    two = {name: {"local": {"model": str(home / name)}} for name in ("teacher", "wide")}
    teacher = {"routed": {"teachers": two, "weights": {"teacher": 1, "wide": 1}, "offload": True}}
    result = expected(recipe_of(home, tmp_path, student={"model": str(home / "teacher")}, teacher=teacher), processes=2)
    found = sizes(result)
    assert found["buckets of DDP"] == found["gradients"]
    assert found["teachers"] == max(found["teacher teacher"], found["teacher wide"])


def test_a_quantised_teacher_has_linear_layers_of_few_bits(home):
    model = skeleton(AutoModelForCausalLM.from_pretrained(home / "wide").config, "bfloat16")
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.lm_head]
    whole, numbers = weight_bytes(model), sum(m.weight.numel() for m in linear)
    assert weight_bytes(model, {"load_in_8bit": True}) == whole - numbers
    assert weight_bytes(model, {"load_in_4bit": True}) == whole - 2 * numbers + numbers * 0.5625
    assert weight_bytes(model, {"bits": 4, "quant_method": "gptq"}) == whole - 2 * numbers + 0.53125 * numbers
    assert weight_bytes(model, {"quant_method": "none of these"}) == whole  # an upper bound


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_and_loss_are_those_of_a_real_step(checkpointing, home, tmp_path):
    """Counted for a real forward and backward pass on the same lengths, by the same counter."""
    recipe = recipe_of(home, tmp_path, {"gradient_checkpointing": checkpointing})
    arguments, prompt, response, sequences = training_arguments(recipe), 20, 12, 4
    student = AutoModelForCausalLM.from_pretrained(home / "teacher").train()
    teacher = AutoModelForCausalLM.from_pretrained(home / "teacher").eval().requires_grad_(False)
    if checkpointing:
        student.gradient_checkpointing_enable()
    batch = Batch.from_examples([Example([4] * prompt, [5] * response)] * sequences, 0)
    rows = batch.weights("token")
    with PeakMemory() as real:
        scores = score_no_grad(teacher, batch)
        score(student, batch, lambda own: scores.divergence_to(own, ForwardKL()).sum(), weights=rows).backward()
    gradients = sum(p.grad.nbytes for p in student.parameters() if p.grad is not None)
    models = [skeleton(model.config, "float32") for model in (student, teacher)]
    with without_memory(*models):
        lengths = Lengths(prompt, response, sequences)
        activations, loss = micro_batch(models[0], models[1:], lengths, arguments, student.config.vocab_size)
    assert 0.9 * real.peak < activations + loss + gradients < 1.4 * real.peak


@pytest.mark.parametrize("bf16", [False, True])
def test_the_kv_cache_is_the_decoders(bf16, home):
    config = AutoModelForCausalLM.from_pretrained(home / "teacher").config
    arguments: Any = SimpleNamespace(bf16=bf16, fp16=False)
    model = skeleton(config, "float32")
    with without_memory(model):
        expected_bytes = kv_cache(model, Lengths(10, 22, 1, generated=3), arguments)
    model = AutoModelForCausalLM.from_pretrained(home / "teacher")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        decoder = Decoder(model, [[4] * 10] * 3, 22)
        decoder.prompts()
        for _ in range(21):
            decoder.tokens(torch.full((3,), 5))
    memory = [x for layer in decoder._cache.layers for x in layer._memory]
    real = sum(x.nbytes for x in memory)
    assert real <= expected_bytes <= 1.6 * real  # memory grows by half at a time
