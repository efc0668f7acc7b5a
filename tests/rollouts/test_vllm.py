"""Rollout vllm with a fake server: its weights, its faults, and runs that survive them or end with a checkpoint.

What a real vLLM does is in tests/rollouts/test_vllm_engine.py; both speak the same schema.
"""

import subprocess
import sys
import types
from contextlib import suppress
from dataclasses import dataclass, replace

import httpx2
import psutil
import pytest
import torch
from fake_engine import FakeVLLMEngine
from fakes import VOCABULARY, ragged_examples, tiny, words
from loop import logged, same, student, teacher, trainer, weights
from transformers import AutoModelForCausalLM

from understudy.batch import Example
from understudy.methods.gkd import GKD
from understudy.rollouts.vllm import VLLMRollout
from understudy.sampling import Sampling
from understudy.serving.student_weights import WeightFolder, has_adapters
from understudy.serving.vllm_process import VLLMProcess
from understudy.step import Step
from understudy.teacher import TeacherError
from understudy.training.checkpoint import last_checkpoint

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
        engine._engine._folder.write_model(model)
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
    loaded = AutoModelForCausalLM.from_pretrained(folder.write_model(model, VOCABULARY))
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
    server = FakeVLLMEngine(dies_after=4)  # after the check of one response, in the middle of six
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of url"),
        ({"start": True, "colocate": True}, "one of url"),
        ({"url": "localhost"}, "is no server's URL"),
        ({"url": "http://vllm:1", "python": "python3"}, "leave it out"),
        ({"url": "http://vllm:1", "options": {"dtype": "float32"}}, "at url itself"),
        ({"start": True, "timeout": 0}, "are seconds"),
        ({"start": True, "batch_size": 0}, "batch_size >= 1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VLLMRollout(**options)


def test_a_teacher_and_other_adapters_than_lora_are_refused():
    with pytest.raises(ValueError, match="student's responses only"):
        VLLMRollout(start=True).bind(tiny("llama"), words(), "teacher")
    model = types.SimpleNamespace(peft_config={"default": types.SimpleNamespace(peft_type="IA3")})
    with pytest.raises(ValueError, match="LoRA adapters, and none of the kind IA3"):
        has_adapters(model)


def run(folder, server, resume=False):
    made = trainer(
        folder, GKD(on_policy=1.0), model=student(), with_teacher=teacher(), rollout=rollout(server, wait=0.05)
    )
    made.train(resume_from_checkpoint=resume)
    return made


def test_weights_move_every_step_and_a_server_that_stays_away_ends_the_run_with_a_checkpoint(tmp_path):
    whole = run(tmp_path / "whole", FakeVLLMEngine())
    assert logged(whole, "weight_version") == [0, 1, 2, 3]

    class Gone(FakeVLLMEngine):
        def complete(self, content):
            if len(self.asked) > 11:  # a check and 4 responses a step, one more check after the first step
                return httpx2.Response(503)
            return super().complete(content)

    with pytest.raises(TeacherError, match=r"does not answer.*; stopped after step 2, and the same command resumes"):
        run(tmp_path / "gone", Gone())
    assert last_checkpoint(tmp_path / "gone") == str(tmp_path / "gone" / "checkpoint-2")
    resumed = run(tmp_path / "gone", FakeVLLMEngine(), resume=True)
    assert logged(resumed) == logged(whole)
    assert same(weights(resumed.model), weights(whole.model))


def script(tmp_path, text):
    """An interpreter that runs `text` in place of vLLM."""
    (tmp_path / "program.py").write_text(text)
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "program.py"} "$@"\n')
    path.chmod(0o755)
    return str(path)


SERVER = """
import sys, http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
print(sys.argv[1:], flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def test_a_server_is_started_with_its_options_and_ends_with_this_process_or_when_it_is_told(tmp_path):
    process = VLLMProcess(
        "model", tmp_path / "run" / "vllm.log", python=script(tmp_path, SERVER), options={"a_b": True}
    )
    process.start()
    process.wait_until_ready()
    assert "'--generation-config', 'vllm', '--a-b'" in (tmp_path / "run" / "vllm.log").read_text()
    assert httpx2.get(process.url).status_code == 200
    process.stop()
    assert not process.is_running
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(process.url)


@pytest.mark.parametrize(
    "end", ["pass", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "raise SystemExit(3)"]
)
def test_no_server_is_left_behind_however_its_parent_ends(end, tmp_path):
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from pathlib import Path
from understudy.serving.vllm_process import VLLMProcess
process = VLLMProcess("model", Path({str(tmp_path / "log")!r}), python={script(tmp_path, SERVER)!r})
process.start()
process.wait_until_ready()
print(process._process.pid, flush=True)
{end}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(done.stdout)).wait(20)
    port = (tmp_path / "log").read_text().split("'--port', '")[1].split("'")[0]
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"http://127.0.0.1:{port}")


def test_a_server_that_cannot_start_is_an_error_with_what_its_log_says(tmp_path):
    python = script(tmp_path, "raise RuntimeError('no memory for the cache')")
    process = VLLMProcess("model", tmp_path / "log", python=python)
    process.start()
    with pytest.raises(TeacherError, match=r"ended before it was ready \(RuntimeError: no memory for the cache\): see"):
        process.wait_until_ready()


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

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=LLM, SamplingParams=SamplingParams))
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


def test_without_vllm_in_this_environment_colocate_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    engine = VLLMRollout(colocate=True).bind(tiny("llama"), words())
    with pytest.raises(ValueError, match="needs vLLM in this environment"):
        engine.generate([Example([5, 6], [])], SAMPLING, Step(0))
