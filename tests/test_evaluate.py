"""A model is judged by its own answers: right or wrong, and how far from the teacher's distribution."""

import json
import sys

import pytest
import torch
from fakes import VOCABULARY, some_examples, tiny
from folders import characters, jsonl, llama, sums
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from understudy import cli
from understudy.batch import Batch, Example
from understudy.data import examples_from_rows
from understudy.evaluate import distance, evaluate
from understudy.rollout import Rollout
from understudy.rollouts.generate import GenerateRollout
from understudy.teachers.local import LocalTeacher

TOKENIZER = characters()


class Parrot(Rollout):
    """Answers what it was told to."""

    def __init__(self, *answers):
        self.answers = answers

    def follow(self, model, tokenizer, author="student"):
        return self

    def generate(self, prompts, step):
        texts = [(prompt, self.answers[prompt.row]) for prompt in prompts]
        return [Example(p.prompt, [*TOKENIZER.encode(a, add_special_tokens=False), 2], row=p.row) for p, a in texts]


def judged(rows, *answers):
    return evaluate(None, TOKENIZER, examples_from_rows(rows, TOKENIZER), Parrot(*answers))


def test_where_every_reference_has_a_final_answer_only_that_counts():
    rows = [{"prompt": f"{i}+1=", "completion": f"it is\n#### {i + 1}"} for i in range(4)]
    result = judged(rows, "#### 1", "so 2 #### 2", "#### 30", "it is 4")
    assert [answer["correct"] for answer in result.answers] == [True, True, False, False]
    assert result.metrics["accuracy"] == 0.5


def test_otherwise_an_answer_is_right_if_it_matches_any_reference():
    rows = [
        {"prompt": "a city", "completion": ["paris", "rome, italy"]},
        {"prompt": "a sum", "completion": "#### 2"},
        {"prompt": "another", "completion": "oslo"},
    ]
    result = judged(rows, "rome italy", "#### 2", "bergen")
    assert [answer["correct"] for answer in result.answers] == [True, True, False]
    assert result.answers[0]["references"] == ["paris", "rome, italy"]


def test_prompts_alone_have_answers_but_no_accuracy():
    result = judged([{"prompt": "a"}, {"prompt": "b"}], "one", "three")
    assert [answer["correct"] for answer in result.answers] == [None, None]
    assert "accuracy" not in result.metrics
    assert result.metrics["response_length"] == 5.0


def test_metrics_are_measured_over_the_rows_that_have_references():
    rows = [{"prompt": "a", "completion": ["one cat", "two cats"]}, {"prompt": "b"}, {"prompt": "c", "completion": "3"}]
    asked = ["rouge_l", "bleu", "exact_match"]
    result = evaluate(
        None, TOKENIZER, examples_from_rows(rows, TOKENIZER), Parrot("two cats", "two", "4"), metrics=asked
    )
    assert list(result.metrics)[-3:] == asked
    assert result.metrics["rouge_l"] == result.metrics["exact_match"] == 50
    assert set(result.signatures) == set(asked)


@pytest.mark.parametrize(
    ("metric", "sentence"),
    [("blue", 'no metric "blue"; did you mean "bleu"'), ("bleu", "no row of rows has one: name the column")],
)
def test_metrics_that_cannot_be_measured_are_refused_before_anything_is_written(metric, sentence):
    nobody = Parrot()  # would raise, because it has no answer
    with pytest.raises(ValueError, match=sentence):
        evaluate(None, TOKENIZER, examples_from_rows([{"prompt": "a"}], TOKENIZER), nobody, metrics=[metric])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("evaluate")
    llama(home / "student", seed=3)
    llama(home / "teacher")
    sums(home / "sums.jsonl")
    return home


def test_the_distance_to_a_teacher_is_what_the_definitions_say(home):
    student = AutoModelForCausalLM.from_pretrained(home / "student").eval()
    teacher = AutoModelForCausalLM.from_pretrained(home / "teacher").eval()
    examples = [Example([5, 6, 7], [8, 9, 2]), Example([10], [11, 12, 13, 14, 2]), Example([4, 5], [2])]
    found = distance(student, LocalTeacher(teacher), examples, len(TOKENIZER), batch_size=2)
    sums = {"forward_kl": 0.0, "reverse_kl": 0.0, "student_entropy": 0.0, "teacher_entropy": 0.0}
    for example in examples:
        ids = torch.tensor([[*example.prompt, *example.response]])
        with torch.no_grad():
            log_q, log_p = (
                m(ids).logits[0, len(example.prompt) - 1 : -1].double().log_softmax(-1) for m in (student, teacher)
            )
        sums["forward_kl"] += (log_p.exp() * (log_p - log_q)).sum().item()
        sums["reverse_kl"] += (log_q.exp() * (log_q - log_p)).sum().item()
        sums["student_entropy"] -= (log_q.exp() * log_q).sum().item()
        sums["teacher_entropy"] -= (log_p.exp() * log_p).sum().item()
    assert found == pytest.approx({name: total / 9 for name, total in sums.items()}, rel=1e-4)
    assert len(Batch.of(examples, 0).tokens) == 9


def test_a_model_is_at_no_distance_from_itself(home):
    model = AutoModelForCausalLM.from_pretrained(home / "teacher").eval()
    found = distance(model, LocalTeacher(str(home / "teacher")), [Example([5, 6], [7, 8, 2])], len(TOKENIZER))
    assert found["forward_kl"] == pytest.approx(0, abs=1e-6)
    assert found["student_entropy"] == pytest.approx(found["teacher_entropy"])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_seed_gives_the_same_answers_and_greedy_ones_need_none(home, temperature):
    model = AutoModelForCausalLM.from_pretrained(home / "teacher").eval()
    examples = examples_from_rows([{"prompt": f"{i}="} for i in range(6)], TOKENIZER)

    def answers(seed, count=6):
        rollout = GenerateRollout(max_new_tokens=6, temperature=temperature, batch_size=count)
        result = evaluate(model, TOKENIZER, examples, rollout, seed=seed, batch_size=count)
        return [answer["answer"] for answer in result.answers]

    assert answers(0) == answers(0) == answers(0, count=2)
    assert (answers(0) == answers(1)) == (temperature == 0)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["understudy", "evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0


def test_the_command_prints_the_metrics_and_writes_the_answers(home, tmp_path, monkeypatch, capsys):
    output = tmp_path / "deep" / "answers.jsonl"
    arguments = (home / "student", "--data", home / "sums.jsonl", "--teacher", home / "teacher", "--limit", 5)
    run(monkeypatch, *arguments, "--output", output, "--metric", "chrf", "--metric", "rouge_l")
    printed = capsys.readouterr().out
    assert "chrf: nrefs:1|case:mixed" in printed
    for name in ("accuracy", "chrf", "rouge_l", "response_length", "truncated", "forward_kl", "reverse_kl"):
        assert name in printed
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == [f"{i}+{i % 5}=" for i in range(5)]
    assert all({"prompt", "answer", "references", "correct"} <= set(answer) for answer in answers)


def test_the_command_takes_columns_and_a_template(home, tmp_path, monkeypatch, capsys):
    jsonl(tmp_path / "rows.jsonl", [{"a": 1, "b": 2, "c": "3"}])
    shape = ("--template", "{a}+{b}=", "--column", "completion=c", "--max-new-tokens", 4)
    run(monkeypatch, home / "teacher", "--data", tmp_path / "rows.jsonl", *shape, "--output", tmp_path / "a.jsonl")
    assert json.loads((tmp_path / "a.jsonl").read_text())["prompt"] == "1+2="
    assert "accuracy" in capsys.readouterr().out


class Halved(LlamaForCausalLM):
    """Does something to its logits that nobody was told of."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits / 2
        return out


def test_a_model_with_logits_of_its_own_is_measured_by_them():
    made = Halved(tiny("llama").config).eval()
    made.load_state_dict(tiny("llama").state_dict())
    answers = some_examples()
    batch = Batch.of(answers, 0)
    found = distance(made, LocalTeacher(tiny("llama", seed=1)), answers, VOCABULARY)
    logits = made(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[batch.predicts]
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert found["student_entropy"] == pytest.approx(float(entropy), rel=1e-5)
