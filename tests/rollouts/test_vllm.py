"""Rollout vllm with a fake server: its weights, its faults, and what is refused.

What a real vLLM does is in tests/rollouts/test_vllm_engine.py; both speak the same schema.
"""

import sys
import types
from dataclasses import dataclass, replace

import httpx2
import pytest
import torch
from fake_engine import FakeVLLMEngine
from fakes import VOCABULARY, ragged_examples, tiny, words
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from understudy.recipe import RecipeError, load
from understudy.rollouts.vllm import VLLMRollout
from understudy.run.prepare import prepare
from understudy.sampling import Sampling
from understudy.serving.student_weights import WeightFolder, model_weights
from understudy.step import Step
from understudy.teacher import TeacherError

PROMPTS = ragged_examples(6, seed=3, responses=False)
SAMPLING = Sampling(max_new_tokens=5, logprobs=True)


def rollout(server, **options):
    return VLLMRollout(url="http://vllm:8000", _transport=httpx2.MockTransport(server), **{"wait": 5.0, **options})


def own_log_probs(model, example):
    logits = model(torch.tensor([example.prompt + example.response])).logits[0, len(example.prompt) - 1 : -1]
    return logits[:, :VOCABULARY].log_softmax(-1).gather(-1, torch.tensor(example.response)[:, None])[:, 0].tolist()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "phi", "llama+lora"])
@pytest.mark.parametrize("tied", [False, True])
def test_log_probabilities_are_the_student_s_after_every_change_of_its_weights(kind, tied):
    model, server = tiny(kind, tied=tied), FakeVLLMEngine()
    engine = rollout(server).bind(model, words())
    if kind == "llama+lora":  # such a server is started with the base model, which is never sent again
        engine._engine._folder = WeightFolder()
        engine._engine._folder.write_model(model.get_base_model(), model_weights(model.get_base_model()))
    for step in (0, 1, 2):
        responses = engine.generate(PROMPTS, SAMPLING, Step(step))
        assert {example.columns["weight_version"] for example in responses} == {step}
        for example in responses:
            assert example.streams["sampled_logprob"] == pytest.approx(own_log_probs(model, example), abs=1e-3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        engine.sync(Step(step + 1))
    assert server.loads == 3
    assert not server.model or not server.adapters, "of a student with adapters nothing else is sent"


def test_a_padded_vocabulary_is_cut_in_what_is_written_for_a_server_of_our_own():
    model = tiny("phi", vocabulary=VOCABULARY + 11)
    folder = WeightFolder()
    loaded = AutoModelForCausalLM.from_pretrained(folder.write_model(model, model_weights(model), VOCABULARY))
    ids = torch.tensor([[5, 9, 13]])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits[..., :VOCABULARY])
    path = folder.path
    del folder
    assert not path.exists()


def test_a_server_of_others_with_a_padded_vocabulary_that_has_a_share_is_refused():
    engine = rollout(FakeVLLMEngine()).bind(tiny("phi", vocabulary=VOCABULARY + 11), words())
    with pytest.raises(TeacherError, match="does not generate with the student's weights"):
        engine.generate(PROMPTS, SAMPLING, Step(0))


def test_a_server_that_keeps_its_old_weights_is_refused_after_the_first_step():
    model = tiny("llama")
    engine = rollout(FakeVLLMEngine(stale=True)).bind(model, words())
    engine.generate(PROMPTS, SAMPLING, Step(0))
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    engine.sync(Step(1))
    with pytest.raises(TeacherError, match=r"a log-probability is off by .*tie_word_embeddings") as caught:
        engine.generate(PROMPTS, SAMPLING, Step(1))
    assert "\n" not in str(caught.value)


def test_requests_have_the_sampling_as_it_is_and_a_seed_of_their_own():
    server = FakeVLLMEngine()
    engine = rollout(server).bind(tiny("llama"), words())
    sampling = Sampling(4, temperature=0.7, top_k=9, top_p=0.8, n=3, stop_ids=(2, 6))
    for _ in range(2):
        server.asked.clear()
        engine.generate(PROMPTS, sampling, Step(4, 1))
    fields = ("max_tokens", "temperature", "top_k", "top_p", "stop_token_ids", "ignore_eos", "prompt")
    asked = sorted((request["seed"], *(request[name] for name in fields)) for request in server.asked)
    assert len({row[0] for row in asked}) == 18, "a seed for each response"
    assert {tuple(map(str, row[1:-1])) for row in asked} == {("4", "0.7", "9", "0.8", "[2, 6]", "True")}
    assert sorted(row[-1] for row in asked) == sorted(p.prompt for p in PROMPTS for _ in range(3))
    assert "logprobs" not in server.asked[0]


def test_a_server_that_was_started_again_gets_the_weights_again_and_gives_the_same_responses():
    model = tiny("llama")
    expected = rollout(FakeVLLMEngine()).bind(model, words()).generate(PROMPTS, SAMPLING, Step(3))
    server = FakeVLLMEngine(dies_after=5)  # after the check of two responses, in the middle of six
    responses = rollout(server).bind(model, words()).generate(PROMPTS, SAMPLING, Step(3))
    assert responses == expected
    assert server.loads == 2


WRONG = {
    "no tokens": (lambda choice: choice.update(token_ids=[]), "a response of 0 tokens"),
    "too many": (lambda choice: choice.update(token_ids=[5] * 9), "a response of 9 tokens"),
    "no ids": (lambda choice: choice.pop("token_ids"), "without token_ids"),
    "an early end": (lambda choice: choice.update(token_ids=[5, 6]), "does not end at its first stop token"),
    "after the end": (lambda choice: choice.update(token_ids=[2, 5]), "does not end at its first stop token"),
    "positive": (
        lambda choice: choice["logprobs"].update(token_logprobs=[0.5] * 5),
        "log-probabilities that do not fit",
    ),
    "too few": (lambda choice: choice["logprobs"].update(token_logprobs=[-0.5]), "log-probabilities that do not fit"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_ends_with_one_sentence(name):
    change, message = WRONG[name]

    class Wrong(FakeVLLMEngine):
        def complete(self, content):
            reply = super().complete(content)
            if content["max_tokens"] == 5:  # and not the check at the start
                change(reply["choices"][0])
            return reply

    engine = rollout(Wrong()).bind(tiny("llama"), words())
    with pytest.raises(TeacherError, match=message) as caught:
        engine.generate(PROMPTS, replace(SAMPLING, stop_ids=(2,)), Step(0))
    assert "\n" not in str(caught.value)


def test_a_server_without_its_development_routes_is_refused_with_the_variable_that_opens_them():
    engine = rollout(FakeVLLMEngine(missing=("/collective_rpc",))).bind(tiny("llama"), words())
    with pytest.raises(TeacherError, match="VLLM_SERVER_DEV_MODE=1"):
        engine.generate(PROMPTS, SAMPLING, Step(0))


def test_a_server_that_cannot_read_the_weights_is_told_from_one_that_is_away():
    class Elsewhere(FakeVLLMEngine):
        def reload(self, content):
            message = "Call to collective_rpc method failed: no such folder"
            return httpx2.Response(500, json={"error": {"message": message, "type": "InternalServerError"}})

    engine = rollout(Elsewhere(), wait=0.05).bind(tiny("llama"), words())
    with pytest.raises(TeacherError, match=r"no such folder\).*it has to read /.*: name a folder that both share"):
        engine.generate(PROMPTS, SAMPLING, Step(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of url"),
        ({"start": True, "colocate": True}, "one of url"),
        ({"url": "localhost"}, "is no server's URL"),
        ({"url": "http://vllm:1", "python": "python3"}, "leave them out"),
        ({"colocate": True, "env": {"CUDA_VISIBLE_DEVICES": 1}}, "leave them out"),
        ({"url": "http://vllm:1", "options": {"dtype": "float32"}}, "at url itself"),
        ({"start": True, "timeout": 0}, "are seconds"),
        ({"start": True, "batch_size": 0}, "batch_size >= 1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VLLMRollout(**options)


def with_lora(**options):
    return get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], **options))


def unfrozen():
    model = with_lora()
    model.get_base_model().lm_head.weight.requires_grad = True
    return model


def two_adapters():
    model = with_lora()
    model.add_adapter("second", LoraConfig(target_modules=["v_proj"]))
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: get_peft_model(tiny("llama"), IA3Config(target_modules=["q_proj"], feedforward_modules=[])), "IA3"),
        (lambda: with_lora(use_dora=True), "with use_dora"),
        (lambda: with_lora(modules_to_save=["lm_head"]), "with modules_to_save"),
        (unfrozen, "lm_head.weight is trained beside them"),
        (two_adapters, "one set of the student's adapters"),
    ],
)
def test_adapters_that_vllm_would_not_have_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        rollout(FakeVLLMEngine()).bind(model(), words())


def test_what_would_fail_at_the_first_response_is_refused_when_the_student_is_bound(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="student's responses only"):
        rollout(FakeVLLMEngine()).bind(tiny("llama"), words(), "teacher")
    monkeypatch.setitem(sys.modules, "vllm", None)
    for options in ({"colocate": True}, {"start": True}):
        with pytest.raises(ValueError, match="there is no vLLM in this environment"):
            VLLMRollout(**options).bind(tiny("llama"), words())
    with pytest.raises(ValueError, match="is not there: create it"):
        rollout(FakeVLLMEngine(), weights=str(tmp_path / "none")).bind(tiny("llama"), words())
    quantized = tiny("llama")
    quantized.hf_quantizer = object()
    with pytest.raises(ValueError, match="serve the quantized model yourself"):
        VLLMRollout(start=True, python="python").bind(quantized, words())


@pytest.mark.parametrize(("name", "key"), [("dpkd", "dpkd"), ("gkd", "evaluate.exposure_bias")])
def test_a_recipe_that_needs_the_teacher_s_responses_is_refused_before_models_are_loaded(name, key):
    overrides = ["evaluate.exposure_bias=8", "rollout={vllm: {url: 'http://vllm:8000', max_new_tokens: 64}}"]
    recipe = load(f"playground/{name}", overrides)
    with pytest.raises(
        RecipeError, match=rf"student's responses only, and {key} needs the teacher's too: use generate"
    ):
        prepare(recipe)


def test_a_temperature_that_vllm_would_replace_is_refused():
    engine = rollout(FakeVLLMEngine()).bind(tiny("llama"), words())
    with pytest.raises(ValueError, match=r"temperature 0 or at 0\.01"):
        engine.generate(PROMPTS, Sampling(4, temperature=0.001), Step(0))


def test_every_replica_is_compared_with_the_student():
    class Rounded(FakeVLLMEngine):
        """As one that was started with another dtype, or another model."""

        def respond(self, model, content):
            tokens, log_probs = super().respond(model, content)
            return tokens, [value - 0.01 for value in log_probs]

    replicas = {"one": FakeVLLMEngine(), "two": Rounded()}
    transport = httpx2.MockTransport(lambda request: replicas[request.url.host](request))
    options = {"url": ["http://one:1", "http://two:1"], "_transport": transport, "wait": 5.0}
    with pytest.raises(TeacherError, match=r"off by 0\.01: "):
        VLLMRollout(**options).bind(tiny("llama"), words()).generate(PROMPTS, SAMPLING, Step(0))
    tolerant = VLLMRollout(**options, tolerance=0.02).bind(tiny("llama"), words())
    assert len(tolerant.generate(PROMPTS, SAMPLING, Step(0))) == len(PROMPTS)


def test_log_probabilities_at_the_temperature_of_sampling_are_refused():
    class Processed(FakeVLLMEngine):
        """As one that was started with --logprobs-mode processed_logprobs."""

        def respond(self, model, content):
            tokens, log_probs = super().respond(model, content)
            return tokens, [value * (1 + (content["temperature"] == 0.5)) for value in log_probs]

    engine = rollout(Processed()).bind(tiny("llama"), words())
    with pytest.raises(TeacherError, match=r"raw log-probabilities \(--logprobs-mode\)"):
        engine.generate(PROMPTS, SAMPLING, Step(0))


def test_a_full_disk_ends_with_one_sentence(monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("understudy.serving.student_weights.save_file", full)
    engine = rollout(FakeVLLMEngine()).bind(tiny("llama", tied=True), words())
    with pytest.raises(TeacherError, match=r"No space left on device.*name a folder with room in"):
        engine.generate(PROMPTS, SAMPLING, Step(0))


def test_weights_that_a_killed_process_has_left_are_removed_and_those_of_a_running_one_stay(tmp_path):
    """The system releases a lock with the process that held it."""
    running = WeightFolder(str(tmp_path))
    left = tmp_path / f"{running.path.name}-left"
    left.mkdir()
    (left / "lock").touch()
    (left / "weights").write_text("many")
    own = WeightFolder(str(tmp_path))
    assert set(tmp_path.iterdir()) == {running.path, own.path}


def test_weights_are_not_kept_in_memory_that_has_no_room_for_them(monkeypatch, tmp_path):
    monkeypatch.setattr("understudy.serving.student_weights.shutil.disk_usage", lambda _: types.SimpleNamespace(free=9))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert WeightFolder(size=10).path.parent == tmp_path


def test_vllm_in_this_process_has_the_weights_and_sleeps_in_between(monkeypatch):
    """The module is a stand-in; what it is asked is what vllm.LLM has."""
    server, calls = FakeVLLMEngine(), []

    @dataclass
    class SamplingParams:
        max_tokens: int
        temperature: float
        top_k: int
        top_p: float
        seed: int
        stop_token_ids: list
        ignore_eos: bool
        detokenize: bool
        logprobs: int | None
        logit_bias: dict | None

    class LLM:
        def __init__(self, **options):
            calls.append(options)

        def collective_rpc(self, method, kwargs):
            server.reload({"method": method, "kwargs": kwargs})

        def reset_prefix_cache(self):
            calls.append("reset")

        def wake_up(self):
            calls.append("wake")

        def sleep(self, level):
            calls.append(f"sleep {level}")

        def generate(self, prompts, parameters, use_tqdm, lora_request):
            assert calls[-1] == "wake"
            outputs = []
            for prompt, given in zip(prompts, parameters, strict=True):
                content = {**vars(given), "prompt": prompt["prompt_token_ids"], "logit_bias": given.logit_bias or {}}
                tokens, log_probs = server.respond(server.model, content)
                entries = [{t: types.SimpleNamespace(logprob=p)} for t, p in zip(tokens, log_probs, strict=True)]
                asked = None if given.logprobs is None else entries
                outputs.append(types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tokens, logprobs=asked)]))
            return outputs

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=LLM, SamplingParams=SamplingParams, __spec__=1))
    monkeypatch.setattr("understudy.serving.vllm_in_process.torch.cuda.is_available", lambda: True)
    model = tiny("llama", vocabulary=VOCABULARY + 5)
    engine = VLLMRollout(colocate=True, options={"gpu_memory_utilization": 0.3}).bind(model, words())
    for step in (0, 1):
        for example in engine.generate(PROMPTS, SAMPLING, Step(step)):
            assert example.streams["sampled_logprob"] == pytest.approx(own_log_probs(model, example), abs=1e-3)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.2)
        engine.sync(Step(step + 1))
    assert calls[0]["gpu_memory_utilization"] == 0.3
    assert calls[0]["enable_sleep_mode"]
    assert server.loads == 2
    assert calls[-1] == "sleep 1"
