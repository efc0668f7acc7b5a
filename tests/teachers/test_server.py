"""The teacher behind HTTP: the losses of the local teacher, a handshake that proves the server, a run from a recipe."""

import math
import re

import httpx2
import pytest
import torch
from fakes import VOCABULARY, ragged_examples, tiny, words
from folders import described, llama, sums, write
from rich.console import Console
from safetensors.torch import load_file
from servers import FakeVLLM, understudy_app, understudy_server
from transformers import AutoTokenizer

from understudy.batch import Batch
from understudy.divergences import ForwardKL, JensenShannon, ReverseKL
from understudy.models.forward import score
from understudy.recipe import RecipeError, load
from understudy.run.distill import distill
from understudy.teacher import Capability, TeacherError
from understudy.teachers.local import LocalTeacher
from understudy.teachers.server import ServerTeacher

URL = "http://teacher:8765"


def behind_understudy(local, url=URL, tokenizer=None, **options):
    """A teacher whose server is `understudy serve`, in this process."""
    return ServerTeacher(url, _transport=httpx2.ASGITransport(understudy_app(local, tokenizer or words())), **options)


def behind_vllm(local, url=URL, server=None, **options):
    """A teacher whose server is a fake vLLM; `server` holds its fields."""
    transport = httpx2.MockTransport(FakeVLLM(local, words(), VOCABULARY, **(server or {})))
    return ServerTeacher(url, protocol="vllm", _transport=transport, **{"top_k": 5, **options})


def loss_and_gradients(teacher, divergence):
    """The summed divergence to a student on the same batch, and its gradients."""
    student = tiny("gpt2", seed=1)
    batch = Batch.from_examples(ragged_examples(6), 0)
    scores = teacher.score(batch).cut(VOCABULARY)
    loss = score(student, batch, lambda q: scores.divergence_to(q, divergence).sum())
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in student.parameters()])


@pytest.mark.parametrize("kind", ["llama", "phi", "gemma2", "granite", "cohere"])
def test_hidden_rows_give_the_loss_and_gradients_of_the_local_teacher(kind):
    local = LocalTeacher(tiny(kind, vocabulary=64))
    remote = behind_understudy(local, [URL, "http://replica"])
    remote.setup(words())
    assert remote.can(Capability.FULL)
    for divergence in (ForwardKL(), ReverseKL(), JensenShannon(0.5), ForwardKL(temperature=2.0)):
        expected, gradients = loss_and_gradients(local, divergence)
        loss, remote_gradients = loss_and_gradients(remote, divergence)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(remote_gradients, gradients, rtol=0, atol=1e-5 * float(gradients.abs().max()))


@pytest.mark.parametrize("behind", [behind_understudy, behind_vllm])
def test_top_k_divergences_rise_with_k_to_the_full_one(behind):
    local = LocalTeacher(tiny("llama"))
    full = loss_and_gradients(local, ForwardKL())[0]
    values = []
    for k in (1, 4, 16, VOCABULARY - 1):
        teacher = behind(local, top_k=k, **({"server": {"max_logprobs": 64}} if behind is behind_vllm else {}))
        assert teacher.provides == {Capability.CHOSEN, Capability.TOP_K}
        teacher.setup(words())
        values.append(loss_and_gradients(teacher, ForwardKL())[0])
    assert all(low < high for low, high in zip(values, [*values[1:], full * (1 + 1e-6)], strict=True)), (values, full)
    torch.testing.assert_close(values[-1], full, rtol=1e-5, atol=0)


def test_tokens_that_only_the_padding_of_a_vocabulary_has_are_left_out_of_the_top_k():
    padded = LocalTeacher(tiny("llama", vocabulary=64))
    teacher = behind_vllm(padded, top_k=40, server={"max_logprobs": 64})
    teacher._client._transport.handler.vocabulary = 64  # vLLM does not cut them
    teacher.setup(words())
    top = teacher.score(Batch.from_examples(ragged_examples(6), 0)).distribution
    assert int(top.support.max()) < VOCABULARY
    assert 20 < top.values.shape[1] < 40


class Reversed:
    """Another tokenizer: it gives the same tokens in another order."""

    def encode(self, text, add_special_tokens):
        return [*words().encode(text, add_special_tokens=add_special_tokens)[1:], 5]


class Unknown(LocalTeacher):
    """A teacher whose head cannot be taken out."""

    fused = False


STRANGERS = words(VOCABULARY + 1)
HANDSHAKES = {
    "another tokenizer": (lambda t: behind_understudy(t, tokenizer=STRANGERS), "is not the student's (53)"),
    "replicas disagree": (
        lambda t: ServerTeacher([URL, "http://other"], _transport=by_host(t, LocalTeacher(tiny("llama", seed=9)))),
        "the server at http://other has other weights",
    ),
    "no head": (lambda t: behind_understudy(Unknown(t.model)), "set top_k, such as top_k: 64"),
    "k is the vocabulary": (lambda t: behind_understudy(t, top_k=53), "is not below the 53 tokens"),
    "no such server": (
        lambda t: ServerTeacher(URL, _transport=httpx2.MockTransport(lambda request: httpx2.Response(404))),
        "refuses /info (status 404",
    ),
    "vllm: another tokenizer": (
        lambda t: ServerTeacher(
            URL, protocol="vllm", _transport=httpx2.MockTransport(FakeVLLM(t, Reversed(), VOCABULARY))
        ),
        "splits text into other tokens",
    ),
    "vllm: no /tokenize": (lambda t: behind_vllm(t, server={"tokenizes": False}), "name the teacher's tokenizer"),
    "vllm: K above its limit": (lambda t: behind_vllm(t, top_k=21), "--max-logprobs 21"),
    "vllm: one position late": (lambda t: behind_vllm(t, server={"shift": 1}), "where it belongs"),
    "vllm: one position early": (lambda t: behind_vllm(t, server={"shift": -1}), "where it belongs"),
    "vllm: random": (lambda t: behind_vllm(t, server={"noise": 1.0}), "gives other probabilities when it is asked"),
    "vllm: several models": (lambda t: behind_vllm(t, server={"models": ("a", "b")}), "has the models a, b"),
    "vllm: no such model": (lambda t: behind_vllm(t, model="large"), 'has no model "large": it has tiny'),
    "vllm: replicas disagree": (
        lambda t: ServerTeacher(
            [URL, "http://other"],
            protocol="vllm",
            top_k=5,
            _transport=httpx2.MockTransport(
                lambda request: FakeVLLM(
                    t if request.url.host == "teacher" else LocalTeacher(tiny("llama", seed=9)), words(), VOCABULARY
                )(request)
            ),
        ),
        "disagree",
    ),
}


def by_host(first, second):
    """A transport to two servers of different models."""
    transports = [httpx2.ASGITransport(understudy_app(teacher, words())) for teacher in (first, second)]

    class ByHost(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request):
            return await transports[request.url.host == "other"].handle_async_request(request)

    return ByHost()


@pytest.mark.parametrize("name", HANDSHAKES)
def test_the_handshake_refuses_a_server_that_does_not_fit(name):
    make, message = HANDSHAKES[name]
    torch.manual_seed(0)
    with pytest.raises(TeacherError, match=re.escape(message)) as caught:
        make(LocalTeacher(tiny("llama"))).setup(words())
    assert "\n" not in str(caught.value)


def test_a_vllm_server_s_temperature_that_changes_only_one_of_two_numbers_is_refused():
    class Softened(FakeVLLM):
        def entries(self, ids, k):
            entries = super().entries(ids, k)
            for token, entry in zip(ids[1:], entries[1:], strict=True):
                entry[str(token)]["logprob"] *= 0.2
            return entries

    server = Softened(LocalTeacher(tiny("llama")), words(), VOCABULARY)
    teacher = ServerTeacher(URL, protocol="vllm", top_k=5, _transport=httpx2.MockTransport(server))
    with pytest.raises(TeacherError, match=r"where it belongs|at temperature 1"):
        teacher.setup(words())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "is no server's URL"),
        ({"url": "http://me:secret@host"}, "holds a password"),
        ({"url": []}, "names no server"),
        ({"top_k": 0}, "at least 1"),
        ({"timeout": 0}, "are seconds"),
        ({"wait": math.nan}, "are seconds"),
        ({"model": "x"}, "is for the protocol vllm"),
        ({"token_env": "UNDERSTUDY_NO_SUCH"}, "is not set"),
    ],
)
def test_a_constructor_refuses_what_cannot_be_meant_and_contacts_nobody(options, message):
    with pytest.raises(ValueError, match=message):
        ServerTeacher(**{"url": URL, **options})


def test_a_server_beyond_the_loopback_answers_only_with_its_token(monkeypatch):
    app = understudy_app(LocalTeacher(tiny("llama")), words(), token="secret")
    for token, accepted in (("secret", True), ("wrong", False)):
        monkeypatch.setenv("TEACHER_TOKEN", token)
        teacher = ServerTeacher(URL, token_env="TEACHER_TOKEN", _transport=httpx2.ASGITransport(app))
        if accepted:
            teacher.setup(words())
            continue
        with pytest.raises(TeacherError, match="refuses the token") as caught:
            teacher.setup(words())
        assert "wrong" not in str(caught.value)


METHODS = [{"kd": {}}, {"gkd": {"on_policy": 0.5, "divergence": "jensen_shannon"}}, {"seqkd": {"soft_weight": 0.5}}]


@pytest.mark.parametrize("method", METHODS, ids=["kd", "gkd", "seqkd"])
def test_a_run_with_understudy_serve_trains_the_student_of_the_local_teacher(method, tmp_path):
    llama(tmp_path / "teacher")
    sums(tmp_path / "sums.jsonl")
    llama(tmp_path / "small", seed=5, num_hidden_layers=1, hidden_size=8)
    student, tokenizer = {"model": str(tmp_path / "small")}, AutoTokenizer.from_pretrained(tmp_path / "teacher")
    with understudy_server(LocalTeacher(str(tmp_path / "teacher")), tokenizer) as url:
        for name, teacher in (("local", {"model": str(tmp_path / "teacher")}), ("server", {"url": url})):
            content = described(tmp_path, student=student, teacher={name: teacher}, method=method)
            content["training"] |= {
                "max_steps": 3,
                "gradient_accumulation_steps": 2,
                "output_dir": str(tmp_path / name),
            }
            distill(load(write(tmp_path / f"{name}.yaml", content)), console=Console(quiet=True))
        inputs = (tmp_path / "server" / "inputs.json").read_text()
        assert "the weights of the teacher" in inputs
    local, served = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("local", "server"))
    for key, weight in local.items():
        torch.testing.assert_close(served[key], weight, rtol=0, atol=1e-5)
    with pytest.raises(RecipeError, match=r"line \d+: .* does not answer \("):
        distill(load(tmp_path / "server.yaml", ["teacher.server.wait=0", "training.output_dir=" + str(tmp_path / "x")]))
