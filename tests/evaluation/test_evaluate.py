"""Evaluating a model: accuracy and text metrics of its responses, and the distance to the teacher."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from fakes import VOCABULARY, some_examples, tiny
from folders import characters, jsonl, llama, sums, write
from servers import understudy_server
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from understudy import cli
from understudy.batch import Batch, Example
from understudy.cli import options
from understudy.data.examples import examples_from_rows
from understudy.evaluation.distance import distances
from understudy.evaluation.evaluate import distance, evaluate
from understudy.evaluation.evaluate_model import evaluate_model
from understudy.evaluation.response_metrics import buckets, response_metrics
from understudy.evaluation.responses import Response, Responses
from understudy.evaluation.settings import EvalSettings
from understudy.recipe import Data
from understudy.rollout import Rollout
from understudy.rollouts.generate import GenerateRollout
from understudy.sampling import Sampling
from understudy.teachers.local import LocalTeacher

TOKENIZER = characters()


class FixedRollout(Rollout):
    """Generates given responses, by row."""

    def __init__(self, *responses):
        self.responses_by_row = responses

    def bind(self, model, tokenizer, author="student"):
        return self

    def generate(self, prompts, sampling, step):
        texts = [(prompt, self.responses_by_row[prompt.row]) for prompt in prompts]
        return [Example(p.prompt, [*TOKENIZER.encode(a, add_special_tokens=False), 2], row=p.row) for p, a in texts]


def evaluated(rows, *responses):
    return evaluate(None, TOKENIZER, examples_from_rows(rows, TOKENIZER), FixedRollout(*responses), Sampling())


def test_where_a_reference_has_a_final_answer_only_that_counts():
    rows = [{"prompt": f"{i}+1=", "completion": f"it is\n#### {i + 1}"} for i in range(4)]
    result = evaluated(rows, "#### 1", "so 2 #### 2", "#### 30", "it is 4")
    assert [line["correct"] for line in result.responses] == [True, True, False, False]
    assert result.metrics["accuracy"] == 0.5


def test_without_a_final_answer_a_response_is_correct_if_it_equals_any_reference_of_its_own_row():
    rows = [
        {"prompt": "a city", "completion": ["paris", "rome, italy"]},
        {"prompt": "a sum", "completion": "#### 2"},
        {"prompt": "another", "completion": "oslo"},
    ]
    result = evaluated(rows, "rome italy", "#### 2", "bergen")
    assert [line["correct"] for line in result.responses] == [True, True, False]
    assert result.responses[0]["references"] == ["paris", "rome, italy"]


def test_prompts_alone_have_responses_but_no_accuracy():
    result = evaluated([{"prompt": "a"}, {"prompt": "b"}], "one", "three")
    assert [line["correct"] for line in result.responses] == [None, None]
    assert "accuracy" not in result.metrics
    assert result.metrics["response_length"] == 5.0


def test_metrics_are_measured_over_the_rows_that_have_references():
    rows = [{"prompt": "a", "completion": ["one cat", "two cats"]}, {"prompt": "b"}, {"prompt": "c", "completion": "3"}]
    metrics = ["rouge_l", "bleu", "exact_match"]
    result = evaluate(
        None,
        TOKENIZER,
        examples_from_rows(rows, TOKENIZER),
        FixedRollout("two cats", "two", "4"),
        Sampling(),
        metrics=metrics,
    )
    assert list(result.metrics)[-3:] == metrics
    assert result.metrics["rouge_l"] == result.metrics["exact_match"] == 50
    assert set(result.signatures) == set(metrics)


@pytest.mark.parametrize(
    ("metric", "sentence"),
    [
        ("blue", 'no metric "blue"; did you mean "bleu"'),
        ("bleu", "no row of rows has a reference for bleu: name the column"),
    ],
)
def test_metrics_that_cannot_be_computed_are_refused_before_anything_is_generated(metric, sentence):
    nobody = FixedRollout()  # would raise, because it has no response
    with pytest.raises(ValueError, match=sentence):
        evaluate(
            None, TOKENIZER, examples_from_rows([{"prompt": "a"}], TOKENIZER), nobody, Sampling(), metrics=[metric]
        )


class FixedBySeed(FixedRollout):
    """Generates given responses for each seed."""

    def __init__(self, **by_seed):
        self.by_seed = by_seed

    def generate(self, prompts, sampling, step):
        self.responses_by_row = self.by_seed[f"seed{step.seed}"]
        return super().generate(prompts, sampling, step)


def test_several_seeds_give_the_mean_and_the_standard_deviation():
    rows = [{"prompt": "a", "completion": "one"}, {"prompt": "b", "completion": "two"}]
    by_seed = {"seed1": ("one", "two"), "seed2": ("one", "no"), "seed3": ("no", "no")}
    examples = examples_from_rows(rows, TOKENIZER)
    result = evaluate(
        None,
        TOKENIZER,
        examples,
        FixedBySeed(**by_seed),
        Sampling(),
        seed=[1, 2, 3],
        metrics=["exact_match", "self_bleu"],
    )
    assert [line["response"] for line in result.responses] == ["one", "two", "one", "no", "no", "no"]
    assert [line["seed"] for line in result.responses] == [1, 1, 2, 2, 3, 3]
    assert (result.metrics["accuracy"], result.metrics["accuracy_std"]) == (0.5, 0.5)
    assert (result.metrics["exact_match"], result.metrics["exact_match_std"]) == (50, 50)
    assert result.metrics["response_length"] == pytest.approx((4 + 3.5 + 3) / 3)
    # One word against those of the two other seeds: "one" twice and "no" twice are among them, "no" and "two" are not.
    assert result.metrics["self_bleu"] == pytest.approx(100 * 4 / 6)
    assert result.metrics["examples"] == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"metrics": ["self_bleu"]},
            "self_bleu compares the responses to a prompt with each other: give several",
        ),
        ({"seed": [1, 1]}, "two of the seeds are the same"),
        ({"seed": [1, 2]}, "greedy responses do not depend on the seed"),
        ({"exposure_bias": True}, "needs a teacher that can generate"),
        ({"exposure_bias": True, "teacher": "live"}, "sample at temperature 1"),
    ],
)
def test_meaningless_settings_are_refused_before_anything_is_generated(options, sentence):
    if options.get("teacher") == "live":
        options = {**options, "teacher": LocalTeacher(tiny("llama"))}
    examples = examples_from_rows([{"prompt": "a", "completion": "b"}], TOKENIZER)
    unbound, greedy = GenerateRollout(), Sampling(temperature=0)  # would fail, having no model
    with pytest.raises(ValueError, match=sentence):
        evaluate(None, TOKENIZER, examples, unbound, greedy, **options)


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
    means = distance(student, LocalTeacher(teacher), examples, len(TOKENIZER), batch_size=2)
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
    assert means == pytest.approx({name: total / 9 for name, total in sums.items()}, rel=1e-4)
    assert len(Batch.from_examples(examples, 0).tokens) == 9


def test_the_differences_at_every_position_are_what_their_definitions_say(home):
    student = AutoModelForCausalLM.from_pretrained(home / "student").eval()
    teacher = AutoModelForCausalLM.from_pretrained(home / "teacher").eval()
    examples = [Example([5, 6, 7], [8, 9, 2]), Example([10], [11, 12, 13, 14, 2]), Example([4, 5], [2])]
    result = distances(student, LocalTeacher(teacher), examples, len(TOKENIZER), batch_size=2)
    expected = {
        name: [[] for _ in range(5)] for name in ("agreement", "top_10_overlap", "teacher_surprise", "forward_kl")
    }
    for example in examples:
        ids = torch.tensor([[*example.prompt, *example.response]])
        with torch.no_grad():
            log_q, log_p = (
                m(ids).logits[0, len(example.prompt) - 1 : -1].double().log_softmax(-1) for m in (student, teacher)
            )
        for position, token in enumerate(example.response):
            p, q = log_p[position], log_q[position]
            student_top, teacher_top = (set(sorted(range(len(x)), key=lambda v, x=x: -x[v])[:10]) for x in (q, p))
            expected["agreement"][position].append(float(p.argmax() == q.argmax()))
            expected["top_10_overlap"][position].append(len(student_top & teacher_top) / 10)
            expected["teacher_surprise"][position].append(-float(p[token]))
            expected["forward_kl"][position].append(float((p.exp() * (p - q)).sum()))
    curves, means = result.by_position(), result.means()
    assert curves["alive"] == [3, 2, 2, 1, 1]
    for name, values in expected.items():
        assert curves[name] == pytest.approx([sum(v) / len(v) for v in values], rel=1e-4), name
        assert means[name] == pytest.approx(sum(map(sum, values)) / 9, rel=1e-4), name
    halves = [distances(student, LocalTeacher(teacher), part, len(TOKENIZER)) for part in (examples[:1], examples[1:])]
    assert (halves[0] + halves[1]).means() == pytest.approx(means, rel=1e-5)


def test_the_distance_of_a_model_from_itself_is_zero(home):
    model = AutoModelForCausalLM.from_pretrained(home / "teacher").eval()
    means = distance(model, LocalTeacher(str(home / "teacher")), [Example([5, 6], [7, 8, 2])], len(TOKENIZER))
    assert means["forward_kl"] == pytest.approx(0, abs=1e-6)
    assert means["student_entropy"] == pytest.approx(means["teacher_entropy"])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_seed_gives_the_same_responses_and_greedy_ones_need_none(home, temperature):
    model = AutoModelForCausalLM.from_pretrained(home / "teacher").eval()
    examples = examples_from_rows([{"prompt": f"{i}="} for i in range(6)], TOKENIZER)

    def responses(seed, count=6):
        sampling = Sampling(max_new_tokens=6, temperature=temperature)
        result = evaluate(model, TOKENIZER, examples, GenerateRollout(count), sampling, seed=seed, batch_size=count)
        return [line["response"] for line in result.responses]

    assert responses(0) == responses(0) == responses(0, count=2)
    assert (responses(0) == responses(1)) == (temperature == 0)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["understudy", "evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0


def test_the_command_prints_the_metrics_and_writes_the_responses(home, tmp_path, monkeypatch, capsys):
    output = tmp_path / "deep" / "responses.jsonl"
    arguments = (home / "student", "--data", home / "sums.jsonl", "--teacher", home / "teacher", "--limit", 5)
    run(monkeypatch, *arguments, "--output", output, "--metric", "chrf", "--metric", "rouge_l")
    printed = capsys.readouterr().out
    assert "chrf: nrefs:1|case:mixed" in printed
    for name in ("accuracy", "chrf", "rouge_l", "response_length", "truncated", "forward_kl", "reverse_kl"):
        assert name in printed
    responses = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["prompt"] for line in responses] == [f"{i}+{i % 5}=" for i in range(5)]
    assert all({"prompt", "response", "references", "correct"} <= set(line) for line in responses)


def test_the_distance_to_any_teacher_of_a_recipe_is_measured(home):
    """The same model with the same tokens has the same distance in every way; a block is a recipe's."""
    settings = EvalSettings(Data(dataset=str(home / "sums.jsonl"), split="train", limit=4), max_new_tokens=8)
    local = str(home / "teacher")

    def measured(teacher):
        return evaluate_model(str(home / "student"), replace(settings, teacher=teacher)).metrics

    expected = measured(local)
    with understudy_server(LocalTeacher(local), TOKENIZER) as url:
        blocks = [{"server": {"url": url}}, {"cross_tokenizer": {"model": local}}]
        for metrics in map(measured, blocks):
            for name in ("forward_kl", "reverse_kl", "teacher_entropy"):
                assert metrics[name] == pytest.approx(expected[name], abs=1e-4)
    assert metrics["shared_boundaries"] == 1
    for block, message in (
        ({"local": {"modle": local}}, 'teacher.local has no field "modle"'),
        ({"server": {"url": url, "wait": 0}}, "does not answer"),
        ({"a": {}, "b": {}}, "write one name, or one name with its fields"),
    ):
        with pytest.raises(ValueError, match=message):
            measured(block)
    with pytest.raises(ValueError, match="exposure bias needs a teacher that can generate"):
        evaluate_model(str(home / "student"), replace(settings, teacher=blocks[1], exposure_bias=True))
    assert options.teacher('{server: {url: "http://a:1"}}') == {"server": {"url": "http://a:1"}}
    assert options.teacher("name/of-a-model") == "name/of-a-model"


def test_the_command_samples_by_a_protocol_and_resumes_from_its_responses(home, tmp_path, monkeypatch, capsys):
    output = tmp_path / "responses.jsonl"
    arguments = ["--data", home / "sums.jsonl", "--teacher", home / "teacher", "--limit", 4, "--output", output]
    arguments += ["--protocol", "minillm", "--max-new-tokens", 8, "--max-prompt-length", 32, "--exposure-bias"]
    run(monkeypatch, home / "student", *arguments, "--metric", "self_bleu")
    first = output.read_bytes(), (tmp_path / "responses.teacher.jsonl").read_bytes()
    lines = [json.loads(line) for line in first[0].splitlines()]
    assert sorted((line["seed"], line["row"]) for line in lines) == [
        (s, r) for s in (10, 20, 30, 40, 50) for r in range(4)
    ]
    printed = capsys.readouterr().out
    for name in ("± over seeds", "self_bleu", "exposure_bias", "agreement", "top_10_overlap", "teacher_perplexity"):
        assert name in printed
    content = json.loads((tmp_path / "responses.metrics.json").read_text())
    assert len(content["curves"]["exposure_bias"]["percent"]) == len(content["curves"]["exposure_bias"]["alive"]) <= 8
    assert content["curves"]["exposure_bias"]["percent"][0] == pytest.approx(0, abs=1e-3)
    assert content["curves"]["distance"]["alive"][0] == 20
    assert {"accuracy", "accuracy_std", "forward_kl", "forward_kl_std"} <= set(content["metrics"])
    output.write_bytes(first[0][:-30])
    run(monkeypatch, home / "student", *arguments)
    assert (output.read_bytes(), (tmp_path / "responses.teacher.jsonl").read_bytes()) == first


def refused(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["understudy", "evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mine.jsonl", '{"a": 1}\n{"a": 2}'),
        ("mine.jsonl", "the only copy"),
        ("mine.metrics.json", '{"accuracy": 1}'),
        ("mine.metrics.json", "the only copy"),
        ("mine.metrics.json.partial", "the only copy"),
    ],
)
def test_the_command_leaves_files_that_it_did_not_write(name, content, home, tmp_path, monkeypatch, capsys):
    (tmp_path / name).write_text(content)
    arguments = (home / "student", "--data", home / "sums.jsonl", "--limit", 2, "--output", tmp_path / "mine.jsonl")
    error = refused(monkeypatch, capsys, *arguments)
    assert f"{tmp_path}/{name}" in error
    assert ": give another " in error
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, content)]


def test_an_unknown_protocol_is_refused_with_the_nearest(home, monkeypatch, capsys):
    error = refused(monkeypatch, capsys, home / "student", "--data", home / "sums.jsonl", "--protocol", "minilm")
    assert 'no protocol "minilm"; did you mean "minillm"?' in error


def test_where_lm_eval_is_not_installed_a_sentence_says_so(home, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    error = refused(monkeypatch, capsys, home / "student", "--lm-eval", "mmlu,bbh")
    assert "pip install 'understudy[lm-eval]'" in error


def test_lm_eval_runs_its_tasks(home, tmp_path, monkeypatch, capsys):
    """A task of choices between two answers, the first of which is always the correct one."""
    pytest.importorskip("lm_eval")
    jsonl(tmp_path / "rows.jsonl", [{"q": f"{i}+1=", "choices": [str(i + 1), "z"], "answer": 0} for i in range(6)])
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    write(tmp_path / "sums.yaml", task)
    model = AutoModelForCausalLM.from_pretrained(home / "teacher").eval()
    right = 0
    for i in range(6):
        ids = torch.tensor([TOKENIZER.encode(f"{i}+1=", add_special_tokens=False)])
        log = model(ids).logits[0, -1].log_softmax(-1)
        answer, other = (TOKENIZER.encode(text, add_special_tokens=False)[0] for text in (str(i + 1), "z"))
        right += bool(log[answer] > log[other])
    run(monkeypatch, home / "teacher", "--lm-eval", tmp_path / "sums.yaml", "--output", tmp_path / "a.jsonl")
    assert json.loads((tmp_path / "a.metrics.json").read_text())["metrics"]["sums/acc"] == pytest.approx(right / 6)
    error = refused(monkeypatch, capsys, home / "teacher", "--lm-eval", "mmul")
    assert 'no task "mmul", nor is it a YAML file; did you mean "mmlu"?' in error


def test_the_command_takes_columns_and_a_template(home, tmp_path, monkeypatch, capsys):
    jsonl(tmp_path / "rows.jsonl", [{"a": 1, "b": 2, "c": "3"}])
    shape = ("--template", "{a}+{b}=", "--column", "completion=c", "--max-new-tokens", 4)
    run(monkeypatch, home / "teacher", "--data", tmp_path / "rows.jsonl", *shape, "--output", tmp_path / "a.jsonl")
    assert json.loads((tmp_path / "a.jsonl").read_text())["prompt"] == "1+2="
    assert "accuracy" in capsys.readouterr().out


class Halved(LlamaForCausalLM):
    """A model that transforms its logits in an unknown way."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits / 2
        return out


def test_the_distance_uses_the_logits_of_a_model_that_transforms_them():
    model = Halved(tiny("llama").config).eval()
    model.load_state_dict(tiny("llama").state_dict())
    examples = some_examples()
    batch = Batch.from_examples(examples, 0)
    means = distance(model, LocalTeacher(tiny("llama", seed=1)), examples, VOCABULARY)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[batch.predicts]
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert means["student_entropy"] == pytest.approx(float(entropy), rel=1e-5)


def test_a_file_that_no_teacher_wrote_is_refused_before_the_student_s_responses_are_generated(tmp_path):
    class Counting(GenerateRollout):
        calls = 0

        def generate(self, prompts, sampling, step):
            Counting.calls += 1
            return super().generate(prompts, sampling, step)

    examples = examples_from_rows([{"prompt": "1+1="}], TOKENIZER)
    model = AutoModelForCausalLM.from_pretrained(llama(tmp_path / "model"))
    (tmp_path / "responses.teacher.jsonl").write_text("mine\n")
    options = {"exposure_bias": True, "output": tmp_path / "responses.jsonl"}
    with pytest.raises(ValueError, match=r"responses\.teacher\.jsonl:1 is not a response that understudy generated"):
        evaluate(model, TOKENIZER, examples, Counting(), Sampling(4), LocalTeacher(model), **options)
    assert Counting.calls == 0
    assert sorted(path.name for path in tmp_path.glob("*.jsonl*")) == ["responses.teacher.jsonl"]


def test_metrics_are_also_computed_by_the_length_of_the_reference():
    pairs = [("1", "1"), ("22", "23"), ("4567", "4567"), ("111", "890")]
    lines = [{"response": text, "references": [reference], "correct": text == reference} for text, reference in pairs]
    responses = [Response(Example([0], [1, 2], "student", i), line) for i, line in enumerate(lines)]
    measured = response_metrics(Responses(responses, 8, 1.0), 4, ["exact_match", "bleu"], (1, 3), characters())
    expected = {"exact_match": 50, "exact_match_1_to_1": 100, "exact_match_2_to_3": 0, "exact_match_from_4": 100}
    assert {name: measured.numbers[name] for name in expected} == expected
    assert measured.scores["exact_match"] == [100, 0, 100, 0]
    assert measured.scores["exact_match_2_to_3"] == [0, 0]
    assert measured.scores["accuracy"] == [1, 0, 1, 0]
    assert "bleu" not in measured.scores
    with pytest.raises(ValueError, match="do not divide responses"):
        buckets((8, 8))
