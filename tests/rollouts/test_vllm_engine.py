"""Rollout vllm with a real vLLM, and the fake server beside it: they answer the same requests in the same schema.

vLLM is not installed with the package; `make engines` installs it, and without it these tests are skipped.
"""

import json
import os
import signal
import subprocess
import sysconfig
from pathlib import Path

import colocated
import httpx2
import psutil
import pytest
import torch
from engines import SETTINGS, engine_python, tinystories, tokens_of_stories
from fake_engine import FakeVLLMEngine
from loop import logged
from peft import LoraConfig
from schema import missing, schema
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

import understudy
from understudy.batch import Example
from understudy.divergences import ReverseKL
from understudy.evaluation.evaluate import distance
from understudy.methods.gkd import GKD
from understudy.rollouts.generate import GenerateRollout
from understudy.rollouts.vllm import VLLMRollout
from understudy.sampling import Sampling
from understudy.step import Step
from understudy.teachers.local import LocalTeacher
from understudy.training.trainer import StudentTrainer

PROMPT, SAMPLING, STEPS = 8, Sampling(max_new_tokens=24, logprobs=True), 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tinystories(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def prompts(tokenizer, count):
    ids = tokens_of_stories(tokenizer, count * 64)
    return [Example(ids[i * 64 : i * 64 + PROMPT - i % 3], [], row=i) for i in range(count)]


def student(folder, noise=0.5):
    """The model of the stories with noise in its weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=noise * float(weight.std()))
    return model


def vllm():
    return VLLMRollout(start=True, python=engine_python(), env=SETTINGS, options={"enforce_eager": True})


class KillServer(TrainerCallback):
    """SIGKILL to vLLM's processes after the second step."""

    def __init__(self, run):
        self.run = run

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            guard = psutil.Process(self.run.writers.student.rollout._engine._process.pid)
            for process in guard.children(recursive=True):
                os.kill(process.pid, signal.SIGKILL)


def train(output, folder, tokenizer, rollout, kills=False, learning_rate=1e-3, **options):
    arguments = {"max_steps": STEPS, "per_device_train_batch_size": 16, "logging_steps": 1, "save_strategy": "no"}
    arguments |= {"lr_scheduler_type": "constant", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    made = StudentTrainer(
        student(folder),
        folder,
        GKD(on_policy=1.0, divergence=ReverseKL()),
        rollout,
        Sampling(max_new_tokens=24),
        processing_class=tokenizer,
        args=TrainingArguments(str(output), learning_rate=learning_rate, **arguments),
        train_dataset=prompts(tokenizer, 160),
        **options,
    )
    if kills:
        made.add_callback(KillServer(made))
    made.train()
    return made


def reverse_kl(model, folder, tokenizer):
    """Of a student's own responses, drawn by `generate`, in nats per token."""
    held_out = prompts(tokenizer, 192)[160:]
    responses = GenerateRollout().bind(model, tokenizer).generate(held_out, Sampling(24, n=8), Step(0))
    return distance(model, LocalTeacher(str(folder)), responses, len(tokenizer))["reverse_kl"]


@pytest.fixture(scope="module")
def model(folder):
    return student(folder)


@pytest.fixture(scope="module")
def rollout(model, tokenizer, tmp_path_factory):
    """Bound to `model`, under variables of torchrun, with which a process of PyTorch would wait for a store."""
    rollout = vllm()
    rollout.setup(tmp_path_factory.mktemp("run"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"TORCHELASTIC_USE_AGENT_STORE": "True", "RANK": "0", "WORLD_SIZE": "2"}.items():
            patch.setenv(name, value)
        bound = rollout.bind(model, tokenizer)
        bound.generate(prompts(tokenizer, 1), SAMPLING, Step(0))
    return bound


def own_log_probs(model, example):
    logits = model(torch.tensor([example.prompt + example.response])).logits[0, len(example.prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(example.response)[:, None])[:, 0].tolist()


def test_log_probabilities_are_the_student_s_after_every_change_of_its_weights(rollout, model, tokenizer):
    """And responses follow the seeds: the same again for the same step, others for another one, n different ones."""
    for number in range(3):
        responses = rollout.generate(prompts(tokenizer, 8), SAMPLING, Step(number))
        assert {example.columns["weight_version"] for example in responses} == {number}
        for example in responses:
            assert example.streams["sampled_logprob"] == pytest.approx(own_log_probs(model, example), abs=1e-3)
        again = rollout.generate(prompts(tokenizer, 8)[::-1], SAMPLING, Step(number))
        assert [e.response for e in again[::-1]] == [e.response for e in responses]
        other = rollout.generate(prompts(tokenizer, 8), SAMPLING, Step(number, seed=1))
        assert [e.response for e in other] != [e.response for e in responses]
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.1 * float(weight.std()))
        rollout.sync(Step(number + 1))


def test_sampling_is_as_given(rollout, model, tokenizer):
    """Greedy responses are those of `generate`; stop tokens end a response and are its part; top-k holds."""
    few = prompts(tokenizer, 8)
    own = GenerateRollout().bind(model, tokenizer)
    greedy = Sampling(16, temperature=0.0, stop_ids=(2, 16, 199, 262))
    ours, theirs = own.generate(few, greedy, Step(0)), rollout.generate(few, greedy, Step(0))
    assert sum(a.response == b.response for a, b in zip(ours, theirs, strict=True)) >= 7, "but for ties in rounding"
    several = rollout.generate(few, Sampling(1, temperature=0.8, top_k=3, n=16, stop_ids=(2,)), Step(0))
    for index, prompt in enumerate(few):
        allowed = model(torch.tensor([prompt.prompt])).logits[0, -1].topk(3).indices.tolist()
        drawn = {example.response[0] for example in several[16 * index : 16 * (index + 1)]}
        assert drawn <= set(allowed)
    stops = tuple(range(0, len(tokenizer), 7))
    for example in rollout.generate(few, Sampling(16, stop_ids=stops), Step(0)):
        assert not set(example.response[:-1]) & set(stops)
        assert example.truncated == (example.response[-1] not in stops)


def test_the_fake_server_answers_in_vllm_s_schema(rollout, model):
    engine = rollout._engine
    url, fake = engine._process.url, FakeVLLMEngine()
    load = {"method": "reload_weights", "kwargs": {"weights_path": str(engine._folder.model)}}
    name = httpx2.get(f"{url}/v1/models").json()["data"][0]["id"]
    sampling = {"max_tokens": 4, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 2**53 - 1, "logprobs": 0}
    ids = {"stop_token_ids": [2], "ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True}
    asked = {"model": name, "prompt": [5, 9, 13], **sampling, **ids}
    requests = [
        ("/health", None),
        ("/v1/models", None),
        ("/weight_info", None),
        ("/collective_rpc", load),
        ("/reset_prefix_cache", {}),
        ("/update_weight_version", {"new_version": "seven"}),
        ("/weight_info", None),
        ("/v1/completions", asked),
        ("/v1/completions", {**asked, "model": "none"}),
    ]
    for path, content in requests:
        method, body = ("GET", {}) if content is None else ("POST", {"json": content})
        real = httpx2.request(method, url + path, timeout=60, **body)
        if content and content.get("model") == name:
            body = {"json": {**content, "model": "student"}}
        answer = fake(httpx2.Request(method, url + path, **body))
        assert answer.status_code == real.status_code, (path, real.text)
        if path != "/health":
            assert missing(schema(answer.json()), schema(real.json())) == [], path
    rollout.sync(Step(9))


def compare(folder, tokenizer, tmp_path, **options):
    """The run with vLLM ends within 5 % of the reverse KL of the run with `generate`; it is returned."""
    kills, rollout = options.pop("kills", False), vllm()  # which skips the test where there is no vLLM
    own = train(tmp_path / "own", folder, tokenizer, GenerateRollout(), **options)
    served = train(tmp_path / "served", folder, tokenizer, rollout, kills, **options)
    assert logged(served, "weight_version") == list(range(STEPS))
    expected = reverse_kl(own.model, folder, tokenizer)
    assert expected < 0.7 * reverse_kl(student(folder), folder, tokenizer), "the test must see something"
    assert reverse_kl(served.model, folder, tokenizer) == pytest.approx(expected, rel=0.05)
    return served


@pytest.mark.timeout(900)
def test_gkd_ends_where_it_does_with_generate_though_the_server_is_killed(folder, tokenizer, tmp_path):
    served = compare(folder, tokenizer, tmp_path, kills=True)
    assert (tmp_path / "served" / "vllm.log").read_text().count("Application startup complete") == 2
    assert served.writers.student.rollout._engine._process.is_running


@pytest.mark.timeout(900)
def test_adapters_alone_do_the_same(folder, tokenizer, tmp_path):
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    served = compare(folder, tokenizer, tmp_path, peft_config=config, learning_rate=1e-2)
    assert served.writers.student.rollout._engine.checked == {0, 1}


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_vllm_in_this_process_has_the_student_s_weights(kind, folder):
    """In a process with vLLM's interpreter; there is no sleep without a GPU."""
    paths = [str(Path(understudy.__file__).parents[1]), sysconfig.get_paths()["purelib"]]
    done = subprocess.run(
        [engine_python(), colocated.__file__, str(folder), kind, ":".join(paths)],
        env={**os.environ, **SETTINGS},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["version"] for line in lines] == [0, 1, 2]
    assert all(line["error"] < 1e-3 and line["same"] for line in lines)
