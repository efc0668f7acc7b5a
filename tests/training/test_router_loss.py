"""The router's load-balancing loss: added with the model's coefficient, as a mean over positions."""

from types import SimpleNamespace

import families
import pytest
import torch
from fakes import ragged_examples, words
from loop import arguments, logged

from understudy.batch import Batch, Example
from understudy.methods.kd import KD
from understudy.methods.sft import SFT
from understudy.models.forward import score
from understudy.rollouts.generate import GenerateRollout
from understudy.sampling import Sampling
from understudy.step import Step
from understudy.training.router_loss import RouterLoss
from understudy.training.trainer import StudentTrainer

COEFFICIENT = 0.5
EXAMPLES = ragged_examples(8, families.VOCABULARY)


def mixtral(asks=True, **changes):
    fields = {"output_router_logits": asks, "router_aux_loss_coef": COEFFICIENT}
    model = families.model("mixtral", **fields, **changes).double()
    model.config._experts_implementation = "eager"  # grouped products exist in float32 only
    return model


def trainer(folder, model, method=None, examples=EXAMPLES, teacher=None, **changed):
    data = {"processing_class": words(families.VOCABULARY), "train_dataset": examples, "eval_dataset": examples}
    return StudentTrainer(model, teacher, method or SFT(), args=arguments(folder, **changed), **data)


def own_losses(model, example):
    """Cross-entropy per token, and the router's loss, of one example, from the model's own forward."""
    ids = torch.tensor([[*example.prompt, *example.response]])
    output = model(ids, attention_mask=torch.ones_like(ids))
    log_probs = output.logits[0, len(example.prompt) - 1 : -1].log_softmax(-1)
    return -log_probs.gather(-1, torch.tensor(example.response)[:, None]).sum(), output.aux_loss


def expected_loss(model, examples, sizes):
    """The loss of a step whose micro-batches are the examples one by one: `sizes` are their positions."""
    losses, routers = map(torch.stack, zip(*(own_losses(model, example) for example in examples), strict=True))
    aux = (torch.tensor(sizes) * routers).sum() / sum(sizes)
    return losses.sum() / sum(len(example.response) for example in examples) + COEFFICIENT * aux, aux


def step_gradients(folder, model, examples, **changed):
    """The logged losses of one step and its gradients, before the weights change."""
    gradients = {}
    run = trainer(folder, model, examples=examples, max_steps=1, learning_rate=0.0, max_grad_norm=0.0, **changed)
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: gradients.__setitem__(name, p.grad.detach().clone())
        )
    run.train()
    return run, gradients


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_s_loss_and_gradient_hold_the_mean_over_positions_of_the_router_s_losses(fused, tmp_path, monkeypatch):
    """Micro-batches of one example each, of different lengths, in float64."""
    monkeypatch.setattr("understudy.training.trainer.can_fuse", lambda model: fused)
    run, gradients = step_gradients(
        tmp_path, mixtral(), EXAMPLES[:4], per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    model = mixtral()
    expected, aux = expected_loss(model, EXAMPLES[:4], [len(example) for example in EXAMPLES[:4]])
    expected.backward()
    assert logged(run) == [pytest.approx(float(expected.detach()), rel=1e-6)]
    assert logged(run, "aux_loss") == [pytest.approx(float(aux.detach()), rel=1e-6)]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-6)  # norms are float32
    assert float(model.model.layers[0].mlp.gate.weight.grad.abs().max()) > 1e-3


def test_equal_micro_batches_give_the_loss_of_one(tmp_path):
    examples = [Example([5, 6], [7, 8, 2], row=row) for row in range(4)]
    one, two = (
        step_gradients(
            tmp_path, mixtral(), examples, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size
        )[1]
        for size in (4, 1)
    )
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, two[name], rtol=1e-6, atol=1e-9)


def test_recomputed_activations_give_the_same_gradients(tmp_path):
    plain, recomputed = (
        step_gradients(tmp_path, mixtral(), EXAMPLES[:4], gradient_checkpointing=option)[1] for option in (False, True)
    )
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, recomputed[name], rtol=1e-6, atol=1e-9)


def test_without_the_setting_there_is_no_router_s_loss(tmp_path):
    options = {"per_device_train_batch_size": 4, "max_steps": 1}
    with_it, without = (trainer(tmp_path, mixtral(asks), **options) for asks in (True, False))
    for run in (with_it, without):
        run.train()
    assert logged(without, "aux_loss") == []
    difference = logged(with_it)[0] - logged(without)[0]
    assert difference == pytest.approx(COEFFICIENT * logged(with_it, "aux_loss")[0], rel=1e-5)


def test_held_out_losses_hold_it_too(tmp_path):
    run = trainer(tmp_path, mixtral(), per_device_eval_batch_size=1)
    metrics = run.evaluate()
    expected, aux = expected_loss(run.model, EXAMPLES, [len(example) for example in EXAMPLES])
    assert metrics["eval_aux_loss"] == pytest.approx(float(aux), rel=1e-6)
    assert metrics["eval_loss"] == pytest.approx(float(expected), rel=1e-6)


def test_processes_weigh_their_router_s_losses_by_their_positions():
    """DDP averages the gradients of two processes, and each multiplies its loss by their number."""
    batches = [Batch.from_examples(EXAMPLES[:1], 0), Batch.from_examples(EXAMPLES[1:4], 0)]
    positions = [sum(map(len, batch.examples)) for batch in batches]
    everything = SimpleNamespace(reduce=lambda count, reduction: torch.tensor(float(sum(positions))))
    normalizer, losses = torch.tensor(20.0), torch.tensor([1.5, 4.0])
    total = 0.0
    for batch, loss in zip(batches, losses, strict=True):
        router = RouterLoss(mixtral())
        router.begin_step([batch], normalizer, everything)
        term = router.term(batch, True, None)
        assert term is not None
        total += float(term(loss)) * 2 / 20 / 2
    mean = (positions[0] * 1.5 + positions[1] * 4.0) / sum(positions)
    assert total == pytest.approx(COEFFICIENT * mean)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe", "jetmoe", "gpt_oss", "olmoe"])
def test_every_family_s_router_has_its_coefficient_and_its_gradient(family):
    model = families.model(family, output_router_logits=True)
    assert RouterLoss(model).coefficient is not None
    batch = Batch.from_examples(EXAMPLES, 0)
    plain = score(model, batch, lambda scores: scores.chosen.sum() * 0)
    score(model, batch, lambda scores: scores.chosen.sum() * 0, router=lambda loss: loss - plain).backward()
    gates = [p for name, p in model.named_parameters() if "router" in name or "gate.weight" in name]
    assert any(p.grad is not None and float(p.grad.abs().max()) > 1e-6 for p in gates)


def test_generating_computes_no_router_s_loss():
    rollout = GenerateRollout().bind(mixtral(), words(families.VOCABULARY))
    plain = GenerateRollout().bind(mixtral(asks=False), words(families.VOCABULARY))
    sampling = Sampling(max_new_tokens=5, temperature=0)
    assert rollout.generate(EXAMPLES, sampling, Step(0)) == plain.generate(EXAMPLES, sampling, Step(0))


@pytest.mark.parametrize("coefficient", [{}, {"router_aux_loss_coef": 0.1}])
def test_a_model_that_cannot_compute_what_it_is_asked_for_is_refused_before_training(coefficient, tmp_path):
    model = families.model("llama")
    for name, value in {"output_router_logits": True, **coefficient}.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM does not compute it: set output_router_logits to false"):
        trainer(tmp_path, model)


def test_a_teacher_s_router_takes_no_part(tmp_path):
    losses = []
    for asks in (True, False):
        run = trainer(tmp_path, mixtral(asks=False), KD(), teacher=mixtral(asks, seed=1), max_steps=1)
        run.train()
        losses.append(logged(run)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
