"""PromptKD: the prompt is a prefix like any other, and it alone is trained on the teacher's side."""

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import families
import pytest
import torch
from fakes import VOCABULARY, BigramTeacher, some_examples, tiny, words
from loop import difference, student, teacher, trainer, weights, whole_and_accumulated
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, GPT2Config, GPT2LMHeadModel

from understudy.batch import Batch
from understudy.divergences import JensenShannon, ReverseKL
from understudy.fused_linear.distributions import Dense
from understudy.method import MethodContext
from understudy.methods import promptkd
from understudy.methods.promptkd import PromptKD, _kl, _recompute_layers
from understudy.models.forward import score
from understudy.scores import Scores
from understudy.step import Step
from understudy.teachers.local import LocalTeacher
from understudy.training.state import STATE_FILE

HARD = [5, 6, 7]
BATCH = Batch.from_examples(some_examples(), 0)


def context(teacher, tokenizer):
    return MethodContext(teacher, tokenizer, VOCABULARY, learning_rate=1e-3)


def prompted(kind="llama", **options):
    """A method and its teacher, whose prompt by default is the embeddings of HARD."""
    method = PromptKD(**{"prompt_tokens": 3, "prompt": "w5 w6 w7", "prompt_lr": 1e-2, "prompt_warmup": 0, **options})
    teacher = method.setup(context(LocalTeacher(tiny(kind)), words()))
    with torch.no_grad():
        if method.prompt_tokens == 3 and method.initialize == "text":
            teacher.prompt.copy_(teacher.model.get_input_embeddings().weight[torch.tensor(HARD)])
    return method, teacher


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "opt", "phi", "gemma2", "cohere"])
def test_a_prompt_of_real_tokens_is_the_teacher_on_the_prefixed_text(kind):
    _, teacher = prompted(kind)
    longer = Batch.from_examples([replace(e, prompt=HARD + e.prompt) for e in some_examples()], 0)
    assert_close = torch.testing.assert_close
    assert_close(teacher.score(BATCH).log_probs, teacher.plain.score(longer).log_probs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text", "biogpt", "gpt2", "bert"])
def test_a_prompt_that_begins_as_a_text_is_this_text_in_front(family):
    """Also where the model scales its embeddings (Gemma, BioGPT), in float64."""
    method = PromptKD(prompt_tokens=3, prompt="w5 w6 w7")
    teacher = method.setup(context(LocalTeacher(families.model(family).double()), words()))
    longer = Batch.from_examples([replace(e, prompt=HARD + e.prompt) for e in some_examples()], 0)
    assert teacher.prompt.dtype == torch.float64
    soft, hard = teacher.score(BATCH).log_probs, teacher.plain.score(longer).log_probs
    torch.testing.assert_close(soft, hard, rtol=1e-5, atol=1e-5)


def test_a_random_prompt_is_as_large_as_the_embeddings_that_the_layers_receive():
    method = PromptKD(prompt_tokens=40, initialize="random")
    teacher = method.setup(context(LocalTeacher(families.model("gemma3_text")), words()))
    rows = teacher.model.get_input_embeddings()(torch.arange(families.VOCABULARY))
    assert float(teacher.prompt.std() / rows.std()) == pytest.approx(1, abs=0.1)


@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="the oldest transformers has no Gemma 4")
def test_a_teacher_that_reads_embeddings_otherwise_is_refused_unless_there_is_no_prompt():
    model = families.model("gemma4_text")
    with pytest.raises(
        ValueError, match=r"texts of Gemma4ForCausalLM, which does not read embeddings .* prompt_tokens: 0"
    ):
        PromptKD(prompt_tokens=3).setup(context(LocalTeacher(model), words()))
    teacher = PromptKD(prompt_tokens=0).setup(context(LocalTeacher(model), words()))
    assert torch.equal(teacher.score(BATCH).log_probs, teacher.plain.score(BATCH).log_probs)


def test_the_best_checkpoint_s_prompt_comes_back_with_its_weights(tmp_path):
    method = PromptKD(prompt_tokens=3, prompt_lr=1e-1, prompt_warmup=0)
    strategies = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    run = trainer(
        tmp_path,
        method,
        options={"eval_dataset": some_examples()},
        max_steps=3,
        learning_rate=1.0,  # so that the first step is the best one
        load_best_model_at_end=True,
        **strategies,
    )
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name != "checkpoint-3"
    saved = load_file(best / STATE_FILE)["method.prompt"]
    assert torch.equal(run.teacher.prompt.detach(), saved)
    assert not torch.equal(saved, load_file(tmp_path / "checkpoint-3" / STATE_FILE)["method.prompt"])
    assert run.spending.tokens > 0


def test_no_prompt_is_the_teacher_itself():
    method, teacher = prompted(prompt_tokens=0)
    plain, own = teacher.plain.score(BATCH), teacher.score(BATCH)
    torch.testing.assert_close(own.log_probs, plain.log_probs)
    method.before_step([BATCH], teacher, student(), Step(0))
    assert teacher.prompt.numel() == 0


def test_a_prompt_reaches_every_position_and_a_token_only_later_ones():
    _, teacher = prompted()
    before = teacher.score(BATCH).log_probs
    with torch.no_grad():
        teacher.prompt += 0.5
    assert ((teacher.score(BATCH).log_probs - before).abs().amax(-1) > 1e-6).all()
    example = some_examples()[0]
    other = replace(example, response=[*example.response[:2], example.response[2] + 1, *example.response[3:]])
    first, second = (teacher.score(Batch.from_examples([e], 0)).log_probs for e in (example, other))
    torch.testing.assert_close(first[:3], second[:3])
    assert not torch.allclose(first[3:], second[3:])


def test_the_prompt_step_trains_the_prompt_alone():
    method, teacher = prompted(teacher_dropout=True)
    learner = student().train()
    weights = {name: w.clone() for model in (teacher.model, learner) for name, w in model.state_dict().items()}
    before = teacher.prompt.detach().clone()
    method.before_step([BATCH], teacher, learner, Step(0, total=10))
    assert not torch.equal(before, teacher.prompt)
    assert all(p.grad is None for model in (teacher.model, learner) for p in model.parameters())
    assert all(torch.equal(weights[n], w) for n, w in learner.state_dict().items())
    assert learner.training
    assert not teacher.model.training


def test_the_teacher_stays_bit_identical_through_a_run(tmp_path):
    frozen = teacher()
    before = {name: w.clone() for name, w in frozen.model.state_dict().items()}
    run = trainer(tmp_path, PromptKD(prompt_tokens=2, prompt_lr=1e-2, prompt_warmup=0), with_teacher=frozen)
    start = run.teacher.prompt.detach().clone()
    run.train()
    assert not torch.equal(start, run.teacher.prompt)
    assert all(torch.equal(before[name], w) for name, w in frozen.model.state_dict().items())


def test_the_prompt_gradient_is_the_derivative_of_the_loss():
    """On GPT-2, which computes in float64 throughout; Llama's norms are float32."""
    method, teacher = prompted("gpt2")
    teacher.model.double()
    teacher.prompt.data = teacher.prompt.data.double()
    learner = student("gpt2").double()
    method._add_gradient(BATCH, learner, 0.7)
    gradient = teacher.prompt.grad.clone()
    index = (1, 2)
    value = []
    for sign in (1, -1):
        teacher.prompt.data[index] += sign * 1e-4
        value.append(float(method._add_gradient(BATCH, learner, 0.7)))
        teacher.prompt.data[index] -= sign * 1e-4
    assert float(gradient[index]) == pytest.approx((value[0] - value[1]) / 2e-4, rel=1e-6)


def test_three_symbols_give_the_values_worked_out_by_hand():
    """p = (.6, .3, .1), p_P = (.5, .35, .15), q = (.2, .5, .3), ten steps, counted by what is left of c."""
    p, p_p, q = (
        Scores(torch.tensor([0]), Dense(torch.tensor([x], dtype=torch.float64).log()))
        for x in ((0.6, 0.3, 0.1), (0.5, 0.35, 0.15), (0.2, 0.5, 0.3))
    )
    method = PromptKD()
    for k, expected in {0: 0.252949, 1: 0.250588, 5: 0.241143, 10: 0.229337}.items():
        value = _kl(q, p_p, "prompted_first") + method.coefficient(k, 10) * _kl(p, p_p, "prompted_first")
        assert float(value) == pytest.approx(expected, abs=1e-6)
    assert float(method.loss(p_p, q, BATCH)) == pytest.approx(0.203023, abs=1e-6)
    last = _kl(q, p_p, "prompted_last")
    assert float(last) == pytest.approx(0.203023, abs=1e-6)


def test_the_regularization_decays_linearly_to_zero():
    method = PromptKD(regularization=2.0)
    assert [method.coefficient(k, 4) for k in range(5)] == [2.0, 1.5, 1.0, 0.5, 0.0]


@pytest.mark.parametrize(("tokens", "expected"), [(2, [5, 6]), (3, [5, 6, 7]), (7, [5, 6, 7, 5, 6, 7, 5])])
def test_the_text_s_tokens_are_repeated_or_cut(tokens, expected):
    method = PromptKD(prompt_tokens=tokens, prompt="w5 w6 w7")
    teacher = method.setup(context(LocalTeacher(tiny("llama")), SimpleNamespace(encode=lambda *a, **k: HARD)))
    torch.testing.assert_close(
        teacher.prompt.detach(), teacher.model.get_input_embeddings().weight[torch.tensor(expected)]
    )
    assert teacher.prompt.dtype == torch.float32


def test_other_initializations_are_random_or_padding():
    random, again = (prompted(initialize="random")[1].prompt for _ in range(2))
    assert torch.equal(random, again)
    method = PromptKD(prompt_tokens=2, initialize="pad")
    teacher = method.setup(context(LocalTeacher(tiny("llama")), SimpleNamespace(pad_token_id=4, eos_token_id=2)))
    assert torch.equal(teacher.prompt[0], teacher.prompt[1])
    torch.testing.assert_close(teacher.prompt[0].detach(), teacher.model.get_input_embeddings().weight[4])


def test_a_strong_regularization_restores_the_plain_teacher():
    method, teacher = prompted(regularization=1e4, prompt_lr=5e-2)
    plain = teacher.plain.score(BATCH)

    def distance():
        return float(plain.divergence_to(teacher.score(BATCH), ReverseKL()).mean())

    before = distance()
    for number in range(60):
        method.before_step([BATCH], teacher, student(), Step(number))
    assert distance() < before / 3


def test_guidance_brings_the_teacher_nearer_to_the_student():
    method, teacher = prompted(regularization=0.0, prompt_lr=5e-2)
    learner = student()

    def distance():
        prompted_scores = teacher.score(BATCH)
        return float(score(learner, BATCH, lambda own: own.divergence_to(prompted_scores, ReverseKL()).mean()).detach())

    before = distance()
    for number in range(40):
        method.before_step([BATCH], teacher, learner, Step(number))
    assert distance() < before


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("dropout", [False, True])
def test_recomputing_activations_changes_nothing(kind, dropout):
    """Also in teachers that can drop out, in modules (GPT-2) or by functions (OPT), whether they are to or not."""
    grads = []
    for checkpointing in (False, True):
        method, teacher = prompted(kind, checkpointing=checkpointing, teacher_dropout=dropout)
        torch.manual_seed(0)
        method._add_gradient(BATCH, student(), 1.0)
        grads.append(teacher.prompt.grad)
        assert not teacher.model.training
    torch.testing.assert_close(*grads)


def test_a_teacher_whose_layers_cannot_be_checkpointed_is_refused():
    with pytest.raises(ValueError, match="set checkpointing to false"):
        _recompute_layers(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("divergence", [ReverseKL(), JensenShannon(0.5)])
def test_a_student_with_adapters_learns_from_the_prompted_teacher(divergence, tmp_path):
    run = trainer(tmp_path, PromptKD(prompt_tokens=3, divergence=divergence), student("llama+lora"))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    prompt = run.teacher.prompt.detach().clone()
    run.train()
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora" in name for name in moved)
    assert not torch.equal(run.teacher.prompt, prompt)


def test_a_prompt_that_does_not_fit_is_refused():
    _, teacher = prompted(prompt_tokens=60)
    with pytest.raises(ValueError, match=r"do not fit into the teacher's context window of 64: lower data.max_length"):
        teacher.score(BATCH)


def test_a_teacher_that_is_no_live_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="PromptKD requires a teacher that provides full and model"):
        trainer(tmp_path, PromptKD(), with_teacher=BigramTeacher())


def test_gpt2_xl_gets_eleven_thousand_parameters(caplog, monkeypatch):
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=1600, n_layer=48, n_head=25))
        model.tie_weights()  # which the oldest transformers does only where weights have values
    monkeypatch.setattr(promptkd, "check_soft_prompt", lambda model: None)  # tensors on "meta" have no values
    with caplog.at_level(logging.INFO, logger="understudy.methods.promptkd"):
        tokenizer = SimpleNamespace(encode=lambda *a, **k: [1] * 7)
        teacher = PromptKD().setup(context(SimpleNamespace(model=model), tokenizer))
    assert teacher.prompt.numel() == 11_200
    assert sum(p.numel() for p in model.parameters()) == 1_557_611_200
    assert "11200 parameters, 0.00072 % of the teacher's 1557611200" in caplog.text


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_learned_prompt_loads_in_peft(kind, tmp_path, caplog):
    from peft import PeftModel

    method, teacher = prompted(kind)
    with caplog.at_level(logging.INFO, logger="understudy.methods.promptkd"):
        method.export(tmp_path)
    assert "nearest to the learned prompt" in caplog.text
    loaded = PeftModel.from_pretrained(tiny(kind), tmp_path / "soft_prompt").eval()
    logits = loaded(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask).logits[:, 3:][BATCH.predicts]
    torch.testing.assert_close(logits.log_softmax(-1), teacher.score(BATCH).log_probs, rtol=1e-4, atol=1e-4)


def test_a_step_does_not_depend_on_how_it_is_accumulated(tmp_path):
    options = {"prompt_tokens": 3, "prompt_lr": 1e-2, "prompt_warmup": 2}
    one, other = whole_and_accumulated(tmp_path, PromptKD, **options)
    assert difference(weights(one.model), weights(other.model)) < 1e-6
    torch.testing.assert_close(one.teacher.prompt, other.teacher.prompt, rtol=0, atol=1e-6)


def test_state_is_all_that_a_resume_needs(tmp_path):
    def new_trainer(steps, **options):
        method = PromptKD(prompt_tokens=3, prompt_lr=1e-2, prompt_warmup=3)
        return trainer(tmp_path, method, max_steps=steps, **options)

    uninterrupted = new_trainer(6, save_strategy="steps", save_steps=3)
    uninterrupted.train()
    resumed = new_trainer(6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(uninterrupted.teacher.prompt, resumed.teacher.prompt)
    pairs = zip(uninterrupted.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
