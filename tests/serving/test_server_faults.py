"""Faults of a teacher's server: each is waited out, or ends the run with one sentence; no wrong score is ever used.

The transport of the client is replaced: what it is told to answer at one request, or from one request on, is the fault.
"""

import asyncio
import json
from functools import cache

import httpx2
import pytest
import torch
from fakes import VOCABULARY, ragged_examples, tiny, words
from loop import logged, same, student, trainer, weights
from safetensors.torch import load, save
from servers import FakeVLLM, understudy_app

from understudy.batch import Batch
from understudy.methods.gkd import GKD
from understudy.methods.kd import KD
from understudy.serving import client
from understudy.serving.wire import FINGERPRINT
from understudy.teacher import TeacherError
from understudy.teachers.local import LocalTeacher
from understudy.teachers.server import ServerTeacher
from understudy.training.checkpoint import last_checkpoint

SCORES = ("/score", "/v1/completions")


@cache
def local():
    return LocalTeacher(tiny("llama", width=24, seed=2))


def transport_of(protocol, seed=2):
    """A new one for every client, since a web application belongs to one event loop."""
    teacher = local() if seed == 2 else LocalTeacher(tiny("llama", width=24, seed=seed))
    if protocol == "vllm":
        return httpx2.MockTransport(FakeVLLM(teacher, words(), VOCABULARY))
    return httpx2.ASGITransport(understudy_app(teacher, words()))


class Faulty(httpx2.AsyncBaseTransport):
    """Passes requests on, and from number `first` of those for scores on, `count` of them to `fault`."""

    def __init__(self, inner, fault, first=0, count=10**9):
        self.inner, self.fault, self.faulty = inner, fault, range(first, first + count)
        self.scored, self.hosts = 0, []

    async def handle_async_request(self, request):
        self.hosts.append(request.url.host)
        if request.url.path not in SCORES:
            return await self.inner.handle_async_request(request)
        number, self.scored = self.scored, self.scored + 1
        return await (self.fault if number in self.faulty else passed_on)(self.inner, request)


async def passed_on(inner, request):
    return await inner.handle_async_request(request)


def raises(kind):
    async def fault(inner, request):
        raise kind("it failed", request=request)

    return fault


def answers(status, content=b"", headers=()):
    async def fault(inner, request):
        return httpx2.Response(status, content=content, headers=dict(headers))

    return fault


async def slow(inner, request):
    await asyncio.sleep(60)


def changed(change):
    """A fault that changes the body, the safetensors or the JSON of the true reply."""

    async def fault(inner, request):
        reply = await inner.handle_async_request(request)
        content = await reply.aread()
        headers = {name: value for name, value in reply.headers.items() if name != "content-length"}
        return httpx2.Response(200, content=change(content), headers=headers)

    return fault


def tensors(change):
    def of_bytes(content):
        values = load(content)
        change(values)
        return save({name: value.contiguous() for name, value in values.items()})

    return changed(of_bytes)


def choices(change):
    def of_bytes(content):
        values = json.loads(content)
        change(values["choices"])
        return json.dumps(values).encode()

    return changed(of_bytes)


def replace(name, make):
    return tensors(lambda values: values.__setitem__(name, make(values[name])))


def set_to(row, value):
    def of_tensor(tensor):
        tensor[row] = value
        return tensor

    return of_tensor


def without_fingerprint(value):
    async def fault(inner, request):
        reply = await inner.handle_async_request(request)
        content = await reply.aread()
        return httpx2.Response(200, content=content, headers={} if value is None else {FINGERPRINT: value})

    return fault


def another_model(protocol):
    async def fault(inner, request):
        return await transport_of(protocol, seed=5).handle_async_request(request)

    return fault


def entry(of_sequences, place=3):
    """The entry of one token in the first sequence."""
    return next(choice for choice in of_sequences if choice["index"] == 0)["prompt_logprobs"][place]


def shift(entries):
    entries.insert(1, entries.pop())


PASSING = {
    "refused": raises(httpx2.ConnectError),
    "reset": raises(httpx2.ReadError),
    "reset while sending": raises(httpx2.WriteError),
    "closed without a reply": raises(httpx2.RemoteProtocolError),
    "connecting takes too long": raises(httpx2.ConnectTimeout),
    "slow": slow,
    "truncated body": changed(lambda content: content[: len(content) // 2]),
    "empty body": changed(lambda content: b""),
    "a page of a proxy": answers(200, b"<html>welcome</html>"),
    "408": answers(408),
    "429": answers(429, b'{"error": "busy"}'),
    "429 with a time": answers(429, headers=[("retry-after", "0.01")]),
    "500": answers(500, b"Internal Server Error"),
    "502": answers(502),
    "503 with a date": answers(503, headers=[("retry-after", "Sat, 28 Nov 2026 00:00:00 GMT")]),
    "504": answers(504),
}
REFUSED = {"400": "status 400: no", "401": "token", "403": "token", "404": "status 404", "413": "status 413"}
WRONG = {
    **{(name, None): (answers(int(name), b'{"error": "no"}'), message) for name, message in REFUSED.items()},
    ("another model", None): (another_model("understudy"), "has other weights"),
    ("no fingerprint", None): (without_fingerprint(None), "has other weights"),
    ("another fingerprint", None): (without_fingerprint("0" * 16), "has other weights"),
    ("fewer rows", None): (replace("hidden", lambda x: x[1:]), "were asked for"),
    ("more rows", None): (replace("hidden", lambda x: torch.cat([x, x[:1]])), "were asked for"),
    ("narrower rows", None): (replace("hidden", lambda x: x[:, 1:]), "were asked for"),
    ("NaN", None): (replace("hidden", set_to(2, torch.nan)), "not finite"),
    ("infinite", None): (replace("hidden", set_to(2, torch.inf)), "not finite"),
    ("no rows", None): (tensors(lambda values: values.__setitem__("other", values.pop("hidden"))), "no hidden"),
    ("K too small", 5): (tensors(lambda v: v.update(values=v["values"][:, 1:], support=v["support"][:, 1:])), "asked"),
    ("chosen of fewer rows", 5): (replace("chosen", lambda x: x[1:]), "were asked for"),
    ("NaN", 5): (replace("values", set_to((2, 1), torch.nan)), "not finite"),
    ("chosen NaN", 5): (replace("chosen", set_to(1, torch.nan)), "not finite"),
    ("probabilities, no logarithms", 5): (replace("values", lambda x: x.exp()), "no log-probabilities"),
    ("logits", 5): (replace("values", lambda x: x + 1), "sum to"),
    ("a token twice", 5): (replace("support", lambda x: x[:, :1].expand(-1, 5)), "one token twice"),
    ("an unknown token", 5): (replace("support", set_to((0, 0), VOCABULARY)), "none of the tokenizer's 53"),
    ("a negative token", 5): (replace("support", set_to((0, 0), -1)), "none of the tokenizer's 53"),
    ("chosen likelier than all", 5): (replace("chosen", lambda x: x * 0), "above that of the likeliest"),
    ("another model", "vllm"): (another_model("vllm"), "other probabilities than when the run began"),
    ("too few sequences", "vllm"): (choices(lambda c: c.pop()), "sequences where"),
    ("a sequence twice", "vllm"): (choices(lambda c: c[0].update(index=0)), "sequences where"),
    ("no prompt_logprobs", "vllm"): (choices(lambda c: c[-1].pop("prompt_logprobs")), "vLLM's form"),
    ("null", "vllm"): (choices(lambda c: c[-1].update(prompt_logprobs=None)), "vLLM's form"),
    ("too few tokens", "vllm"): (choices(lambda c: c[-1]["prompt_logprobs"].pop()), "tokens where"),
    ("shifted", "vllm"): (
        choices(lambda c: [e["prompt_logprobs"].insert(1, e["prompt_logprobs"].pop()) for e in c]),
        "",
    ),
    ("K too small", "vllm"): (choices(lambda c: [entry(c).popitem() for _ in range(2)]), "tokens of a position"),
    ("tokens as text", "vllm"): (choices(lambda c: entry(c).update(word=entry(c).popitem()[1])), "vLLM's form"),
    ("NaN", "vllm"): (choices(lambda c: next(iter(entry(c).values())).update(logprob=float("nan"))), "not finite"),
    ("null as a number", "vllm"): (choices(lambda c: next(iter(entry(c).values())).update(logprob=None)), "form"),
    ("logits", "vllm"): (choices(lambda c: [v.update(logprob=9.0) for v in entry(c).values()]), "sum to"),
}


@pytest.fixture(autouse=True)
def no_delays(monkeypatch):
    monkeypatch.setattr(client, "_FIRST_DELAY", 0.001)


def connected(transport, kind=None, urls="http://teacher", timeout=5.0, wait=0.02):
    """A teacher by kind: None for hidden rows, K, or "vllm"."""
    options = {"protocol": "vllm", "top_k": 5} if kind == "vllm" else {"top_k": kind}
    teacher = ServerTeacher(urls, timeout=timeout, wait=wait, _transport=transport, **options)
    teacher.setup(words())
    return teacher


def examples():
    """A batch whose first sequence has its token 3 in the response."""
    return Batch.from_examples([e for e in ragged_examples(16) if len(e.prompt) <= 3 and len(e.response) >= 3][:3], 0)


@pytest.mark.parametrize("kind", [None, "vllm"], ids=["understudy", "vllm"])
@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_passes_is_waited_out_and_one_that_lasts_is_one_sentence(name, kind):
    batch, transport = examples(), Faulty(transport_of(kind or "understudy"), PASSING[name])
    transport.faulty = range(0)
    teacher = connected(transport, kind, timeout=0.1 if name == "slow" else 5.0, wait=5.0)
    undisturbed = teacher.score(batch)
    transport.faulty = range(transport.scored, transport.scored + 1)
    teacher.prefetch([batch])
    scores = teacher.score(batch)
    assert torch.equal(scores.log_probs, undisturbed.log_probs)
    assert torch.equal(scores.chosen, undisturbed.chosen)
    transport.faulty, teacher._client.wait = range(10**9), 0.01
    with pytest.raises(
        TeacherError, match=r"the server at http://teacher does not answer for 0.01 s \(.+\): start"
    ) as e:
        teacher.score(batch)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("name", "kind"), WRONG, ids=str)
def test_a_wrong_answer_is_refused_at_once_in_one_sentence(name, kind):
    fault, message = WRONG[name, kind]
    transport = Faulty(transport_of("vllm" if kind == "vllm" else "understudy"), fault)
    transport.faulty = range(0)
    teacher = connected(transport, kind)
    transport.faulty, before = range(10**9), transport.scored
    with pytest.raises(TeacherError, match=message) as caught:
        teacher.score(examples())
    assert str(caught.value).startswith("the server at http://teacher ")
    assert "\n" not in str(caught.value)
    assert transport.scored == before + 1, "it is not asked again"


def test_another_replica_takes_over_and_the_rows_stay_in_their_order():
    async def dead(inner, request):
        if request.url.host == "first":
            raise httpx2.ConnectError("refused", request=request)
        return await passed_on(inner, request)

    transport = Faulty(transport_of("understudy"), dead)
    transport.faulty = range(0)
    teacher = connected(transport, urls=["http://first", "http://second", "http://third"], wait=1.0)
    transport.faulty = range(10**9)
    batch = Batch.from_examples(ragged_examples(7), 0)
    for _ in range(3):
        scores = teacher.score(batch)
        torch.testing.assert_close(scores.log_probs, local().score(batch).log_probs, rtol=0, atol=1e-5)
    assert {"second", "third"} <= set(transport.hosts[-6:])


def test_all_micro_batches_of_a_step_are_asked_for_at_once():
    waiting, most = 0, 0

    async def counted(inner, request):
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        await asyncio.sleep(0.05)
        waiting -= 1
        return await passed_on(inner, request)

    teacher = connected(Faulty(transport_of("understudy"), counted))
    batches = [Batch.from_examples(ragged_examples(2, seed=seed), 0) for seed in range(5)]
    teacher.prefetch(batches)
    for batch in reversed(batches):
        torch.testing.assert_close(teacher.score(batch).log_probs, local().score(batch).log_probs, rtol=0, atol=1e-5)
    assert most == 5


def run(folder, transport, method=None, resume=False, wait=0.05):
    """Four steps of two micro-batches, of which each asks for scores once; the student has dropout."""
    teacher = connected(transport, wait=wait)
    made = trainer(
        folder,
        method or GKD(on_policy=0.5),
        model=student("gpt2"),
        with_teacher=teacher,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )
    made.train(resume_from_checkpoint=resume)
    return made


def test_a_server_that_returns_in_time_changes_nothing_and_one_that_does_not_ends_the_run_with_a_checkpoint(tmp_path):
    whole = run(tmp_path / "whole", Faulty(transport_of("understudy"), passed_on))
    connecting = 4  # requests for scores of the handshake
    at = connecting + 2 * 2 + 1  # the second micro-batch of the third step
    away = Faulty(transport_of("understudy"), PASSING["refused"], first=at, count=3)
    waited = run(tmp_path / "waited", away, wait=5.0)
    assert same(weights(waited.model), weights(whole.model))

    for name, fault, message in (
        ("gone", PASSING["refused"], "does not answer for 0.05 s"),
        ("swapped", another_model("understudy"), "has other weights"),
    ):
        folder = tmp_path / name
        with pytest.raises(TeacherError, match=f"{message}.*; stopped after step 2, and the same command resumes") as e:
            run(folder, Faulty(transport_of("understudy"), fault, first=at))
        assert "\n" not in str(e.value)
        assert last_checkpoint(folder) == str(folder / "checkpoint-2")
        resumed = run(folder, Faulty(transport_of("understudy"), passed_on), resume=True)
        assert logged(resumed) == logged(whole)
        assert resumed.tokens_seen == whole.tokens_seen
        assert same(weights(resumed.model), weights(whole.model))

    with pytest.raises(TeacherError, match="does not answer") as caught:
        run(tmp_path / "never", Faulty(transport_of("understudy"), PASSING["refused"], first=connecting), KD())
    assert "stopped after" not in str(caught.value), "nothing was trained yet"
