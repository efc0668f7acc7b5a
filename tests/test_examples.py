"""The examples run as their pages say: methods, teachers and rollouts of one's own, named in a recipe or in a loop."""

import json

import pytest
import torch
from fakes import VOCABULARY, ragged_examples, tiny, words
from folders import EXAMPLES, characters, llama, load_example, sums, write
from loop import logged, student, teacher, trainer
from servers import response_server, top_k_server
from transformers import AutoModelForCausalLM

from understudy import (
    GKD,
    KD,
    Batch,
    LocalTeacher,
    Sampling,
    Step,
    distill,
    load,
)

TRAINING = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2}
SEVERAL = Sampling(max_new_tokens=6, n=16)
TRAINING |= {"use_cpu": True, "disable_tqdm": True}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Trains a tiny student as a recipe says, with the examples' folder as the working directory; returns the log."""
    monkeypatch.chdir(EXAMPLES)
    models = {name: llama(tmp_path / name, seed) for seed, name in enumerate(("student", "teacher"))}

    def run(folder="run", **blocks):
        content = {
            "student": {"model": str(models["student"])},
            "teacher": {"local": {"model": str(models["teacher"])}},
            "method": "gkd",
            "rollout": {"generate": {"max_new_tokens": 6}},
            "data": {"dataset": str(sums(tmp_path / "sums.jsonl")), "max_length": 24},
            "training": {**TRAINING, "output_dir": str(tmp_path / folder)},
            "evaluate": {"show": 0},
        }
        distill(load(write(tmp_path / f"{folder}.yaml", {**content, **blocks})))
        lines = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if "loss" in line]

    run.models = models
    return run


def test_the_plain_loop_learns():
    losses = load_example("plain_loop").main(steps=50)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_taid_runs_from_a_recipe(recipe):
    assert len(recipe(method={"taid:TAID": {"start": 0.2}})) == 3


def test_taid_moves_its_target_once_per_step_and_learns(tmp_path):
    method = load_example("taid").TAID(start=0.2)
    student_trainer = trainer(
        tmp_path, method, max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    student_trainer.train()
    assert float(method.share) == 1.0
    assert logged(student_trainer, "forward_kl")[-1] < logged(student_trainer, "forward_kl")[0]


def test_taid_s_limits_are_no_loss_and_forward_kl():
    method, batch = load_example("taid").TAID(start=0.0), Batch.from_examples(ragged_examples(4), 0)
    q, p = LocalTeacher(student()).score(batch), teacher().score(batch)
    torch.testing.assert_close(method.loss(p, q, batch), torch.zeros(len(batch.tokens)), atol=1e-5, rtol=0)
    method.after_step(Step(5, total=5))
    torch.testing.assert_close(method.loss(p, q, batch), KD().loss(p, q, batch), atol=1e-5, rtol=1e-4)


def test_taid_resumes_from_its_own_state():
    method = load_example("taid").TAID()
    method.after_step(Step(3, total=7))
    other = load_example("taid").TAID()
    other.load_state_dict(method.state_dict())
    assert other.share == method.share != torch.tensor(0.4)


def test_the_ensemble_averages_probabilities_and_teaches(tmp_path):
    models = [tiny("llama", seed=seed) for seed in (3, 4)]
    ensemble, batch = load_example("ensemble_teacher").Ensemble(models), Batch.from_examples(ragged_examples(4), 0)
    mean = sum(LocalTeacher(model).score(batch).log_probs.exp() for model in models) / 2
    torch.testing.assert_close(ensemble.score(batch).log_probs.exp(), mean, atol=1e-6, rtol=0)
    student_trainer = trainer(tmp_path, KD(), with_teacher=ensemble, max_steps=10)
    student_trainer.train()
    assert logged(student_trainer)[-1] < logged(student_trainer)[0]


def test_the_ensemble_runs_from_a_recipe(recipe):
    models = [str(path) for path in recipe.models.values()]
    assert len(recipe(method="kd", teacher={"ensemble_teacher:Ensemble": {"models": models}})) == 3


def test_the_http_teacher_runs_from_a_recipe_with_the_losses_of_the_local_teacher(recipe, tmp_path):
    """With all tokens as the top K the K+1 events are the whole distribution."""
    vocabulary = len(characters())
    local = recipe("local")
    with top_k_server(LocalTeacher(str(recipe.models["teacher"]))) as url:
        fields = {"url": url, "k": vocabulary, "tokenizer": str(recipe.models["teacher"])}
        served = recipe(teacher={"http_teacher:HTTPTeacher": fields})
    assert [line["loss"] for line in served] == pytest.approx([line["loss"] for line in local], rel=1e-4)


def test_the_http_teacher_s_top_k_gives_a_lower_bound_and_the_chosen_token(tmp_path):
    local, batch = teacher(), Batch.from_examples(ragged_examples(5), 0)
    learner = LocalTeacher(student()).score(batch)
    full, values = local.score(batch), []
    with top_k_server(local) as url:
        for k in (1, 5, 20, VOCABULARY):
            scores = load_example("http_teacher").HTTPTeacher(url, k).score(batch)
            torch.testing.assert_close(scores.chosen, full.chosen)
            values.append(scores.divergence_to(learner, GKD().divergence).mean())
    assert values == sorted(values)
    torch.testing.assert_close(values[-1], full.divergence_to(learner, GKD().divergence).mean(), rtol=1e-4, atol=0)


def test_the_http_teacher_asks_for_all_micro_batches_of_a_step_at_once():
    batches = [Batch.from_examples(ragged_examples(3, seed=seed), 0) for seed in range(3)]
    with top_k_server(teacher()) as url:
        remote = load_example("http_teacher").HTTPTeacher(url, 4)
        remote.prefetch(batches)
        pending = list(remote._pending.values())
        scores = [remote.score(batch) for batch in batches]
        assert len(pending) == 3
        assert not remote._pending
        for batch, prefetched in zip(batches, scores, strict=True):
            assert torch.equal(
                prefetched.log_probs, load_example("http_teacher").HTTPTeacher(url, 4).score(batch).log_probs
            )


def test_the_socket_rollout_runs_from_a_recipe_and_generates_with_the_weights_of_each_step(recipe, tmp_path):
    """The responses depend on the weights, so that equal losses mean equal weights on the server at every step."""
    local = recipe("local")
    server_model = AutoModelForCausalLM.from_pretrained(recipe.models["teacher"])
    with response_server(server_model, characters()) as (port, loaded):
        fields = {"port": port, "weights": str(tmp_path / "weights.safetensors"), "max_new_tokens": 6}
        served = recipe(rollout={"socket_rollout:SocketRollout": fields})
    assert [line["loss"] for line in served] == [line["loss"] for line in local]
    assert [line["response_length"] for line in served] == [line["response_length"] for line in local]
    assert len(loaded) >= 3


def test_the_socket_rollout_generates_n_responses_to_each_prompt(tmp_path):
    model, prompts = tiny("llama"), ragged_examples(4, responses=False)
    with response_server(tiny("llama", seed=5), words()) as (port, _):
        rollout = load_example("socket_rollout").SocketRollout(port, str(tmp_path / "w.safetensors"))
        responses = rollout.bind(model, words()).generate(prompts, Sampling(max_new_tokens=5, n=3), Step(2))
    assert [e.row for e in responses] == [row for row in range(4) for _ in range(3)]


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_every_example_says_what_it_shows(name):
    assert len(load_example(name).__doc__) > 60
