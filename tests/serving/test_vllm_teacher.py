"""A real vLLM as teacher, and the fake server beside it: they answer the same requests in the same schema.

vLLM is not installed with the package; `make engines` installs it, and without it these tests are skipped.
"""

import json

import httpx2
import pytest
import torch
from engines import STORIES, TINYSTORIES, tinystories, tokens_of_stories, vllm_server
from folders import described, write
from rich.console import Console
from schema import missing, schema
from servers import FakeVLLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from understudy.batch import Batch, Example
from understudy.recipe import load
from understudy.run.distill import distill
from understudy.teacher import TeacherError
from understudy.teachers.local import LocalTeacher
from understudy.teachers.server import ServerTeacher

K = 8
MAX_LOGPROBS = 32
TOKENS = 48


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tinystories(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def tokenizer(model):
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    with vllm_server(model, log, max_logprobs=MAX_LOGPROBS, enforce_eager=True) as process:
        yield process


def stories(tokenizer, count=6):
    """Examples from the stories, of different lengths."""
    ids = tokens_of_stories(tokenizer, count * TOKENS)
    parts = [ids[start : start + TOKENS - start % 7] for start in range(0, len(ids), TOKENS)]
    return [Example(part[:9], part[9:], row=row) for row, part in enumerate(parts)]


def test_wider_heads_change_no_logit(model, tokenizer):
    """vLLM's CPU kernels have no heads of 16 dimensions, so what is served is a copy with 32."""
    ids = torch.tensor([tokens_of_stories(tokenizer, 200)])
    with torch.no_grad():
        own, wider = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits for path in (TINYSTORIES, model)
        )
    torch.testing.assert_close(wider, own, rtol=0, atol=1e-4)


def in_order(reply):
    if "choices" in reply:
        reply["choices"].sort(key=lambda choice: choice["index"])
    return reply


def test_the_fake_server_answers_in_vllm_s_schema_and_with_its_numbers(server, model, tokenizer):
    name, prompts = str(model), [[5, 6, 7, 300], [8, 9]]
    fake = FakeVLLM(LocalTeacher(name), tokenizer, len(tokenizer), MAX_LOGPROBS, models=(name,))
    scoring = {"model": name, "prompt": prompts, "max_tokens": 1, "temperature": 1.0}
    requests = [
        ("/v1/models", None),
        ("/tokenize", {"model": name, "prompt": "Once upon a time", "add_special_tokens": False}),
        ("/v1/completions", {**scoring, "prompt_logprobs": K}),
        ("/v1/completions", {**scoring, "prompt_logprobs": MAX_LOGPROBS + 1}),
    ]
    for path, content in requests:
        method, body = ("GET", {}) if content is None else ("POST", {"json": content})
        real = httpx2.request(method, server.url + path, timeout=60, **body)
        answer = fake(httpx2.Request(method, server.url + path, **body))
        assert answer.status_code == real.status_code, real.text
        real, answer = in_order(real.json()), in_order(json.loads(answer.content))
        assert missing(schema(answer), schema(real)) == []
        if path == "/tokenize":
            assert answer["tokens"] == real["tokens"]
        if "choices" in real:
            for ours, theirs in zip(answer["choices"], real["choices"], strict=True):
                for expected, entry in zip(theirs["prompt_logprobs"][1:], ours["prompt_logprobs"][1:], strict=True):
                    assert {token: value["rank"] for token, value in entry.items()} == {
                        token: value["rank"] for token, value in expected.items()
                    }
                    for token, value in entry.items():
                        assert value["logprob"] == pytest.approx(expected[token]["logprob"], abs=1e-3)


def test_scores_are_those_of_the_local_teacher_and_the_handshake_is_passed(server, model, tokenizer):
    teacher = ServerTeacher(server.url, protocol="vllm", top_k=K)
    teacher.setup(tokenizer)
    assert teacher.context_length == 511, "one less than the model's, for the token that is generated"
    batch = Batch.from_examples(stories(tokenizer), 0)
    scores, local = teacher.score(batch), LocalTeacher(str(model)).score(batch)
    torch.testing.assert_close(scores.chosen, local.chosen, rtol=0, atol=1e-3)
    values, support = local.log_probs.topk(K)
    torch.testing.assert_close(scores.distribution.values, values, rtol=0, atol=1e-3)
    assert (scores.distribution.support == support).float().mean() > 0.99, "ties aside"


def test_more_tokens_than_the_server_allows_are_refused_with_the_option_that_raises_it(server, tokenizer):
    with pytest.raises(TeacherError, match=f"--max-logprobs {MAX_LOGPROBS + 1}"):
        ServerTeacher(server.url, protocol="vllm", top_k=MAX_LOGPROBS + 1).setup(tokenizer)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_gkd_has_the_losses_of_a_local_teacher_of_which_k_tokens_are_known(divergence, server, model, tmp_path):
    (tmp_path / "stories.txt").write_text(STORIES.read_text(encoding="utf-8")[:6000])
    teachers = {
        "local": {"engines:TopKOfLocal": {"model": str(model), "k": K}},
        "vllm": {"server": {"url": server.url, "protocol": "vllm", "top_k": K}},
    }
    losses = {}
    for name, teacher in teachers.items():
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        content = described(
            tmp_path,
            student={"fresh": {**shape, "model_type": "llama", "num_key_value_heads": 4}, "tokenizer": str(model)},
            teacher=teacher,
            method={"gkd": {"on_policy": 0.5, "divergence": divergence}},
            rollout={"generate": {"max_new_tokens": 16}},
            data={"dataset": str(tmp_path / "stories.txt"), "max_length": 48, "text_prompt": 8},
        )
        content["training"] |= {"max_steps": 6, "learning_rate": 1e-2, "output_dir": str(tmp_path / name)}
        distill(load(write(tmp_path / f"{name}.yaml", content)), console=Console(quiet=True))
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["loss"] for line in lines if "loss" in line]
    assert len(losses["vllm"]) == 6
    assert losses["vllm"] == pytest.approx(losses["local"], abs=1e-3)
    assert len(set(losses["vllm"])) == 6, "the test must see something"
