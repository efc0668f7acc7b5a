"""`understudy cache` and a run with the teacher `cached`: from a recipe to scores, and from scores to a student."""

import json
import shutil

import pytest
from fakes import words
from folders import characters, described, jsonl, link_all, llama, sums, write
from rich.console import Console
from servers import understudy_server
from transformers import AutoTokenizer

from understudy.data.errors import DataError
from understudy.data.examples import load_examples
from understudy.models.fingerprint import fingerprint
from understudy.recipe import RecipeError, load
from understudy.run.cache import CacheSettings, cache
from understudy.run.distill import distill
from understudy.run.prepare import prepare
from understudy.teachers.cached import CachedTeacher, example_key
from understudy.teachers.local import LocalTeacher


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    things = tmp_path_factory.mktemp("things")
    llama(things / "teacher")
    llama(things / "other", seed=3)
    llama(things / "small", seed=5, num_hidden_layers=1)
    sums(things / "sums.jsonl")
    cache(recipe_of(things), things / "cache", CacheSettings(top_k=5, batch_size=4))
    return things


@pytest.fixture
def home(tmp_path, things):
    link_all(things, tmp_path)
    (tmp_path / "cache").unlink()
    shutil.copytree(things / "cache", tmp_path / "cache")  # which tests add to
    return tmp_path


def recipe_of(home, **changes):
    content = described(home, **{"method": "kd", "student": {"model": str(home / "small")}, **changes})
    return load(write(home / "mine.yaml", content))


def cached(home, folder="cache", **changes):
    return recipe_of(home, teacher={"cached": {"folder": str(home / folder)}}, **changes)


def test_a_student_is_trained_from_the_cache_without_the_teacher(home):
    (home / "teacher").unlink()
    held_out = {"dataset": str(home / "sums.jsonl"), "limit": 4}
    summary = distill(cached(home, evaluate=held_out), console=Console(quiet=True))
    assert summary["steps"] == 2
    assert summary["teacher_parameters"] is None
    assert {"eval_loss", "eval_reverse_kl"} <= summary["metrics"].keys()
    inputs = json.loads((home / "run" / "inputs.json").read_text())["inputs"]
    assert inputs["the weights of the teacher"] == CachedTeacher(str(home / "cache")).fingerprint


def test_scores_that_are_there_are_kept_and_others_are_added(home):
    rows = [{"prompt": f"{i}*2=", "completion": str(2 * i)} for i in range(5)]
    more = recipe_of(home, evaluate={"dataset": str(jsonl(home / "more.jsonl", rows))})
    summary = cache(more, home / "cache", CacheSettings(top_k=5, batch_size=4))
    assert (summary.examples, summary.added) == (17, 5)
    assert cache(more, home / "cache", CacheSettings(top_k=5)).added == 0
    assert prepare(cached(home, evaluate={"dataset": str(home / "more.jsonl")})).held_out is not None


REFUSED = {
    "a row": ({"data.dataset": "OTHER"}, r"1 of 12 rows of .* first of them .*other.jsonl:12: it has another resp"),
    "a template": ({"data.template": "{prompt}?"}, r"its prompt is not there .*template is '{prompt}\?', and was None"),
    "a length": ({"data.max_length": 7}, "max_length is 7, and was 32"),
    "a temperature": ({"method.kd.divergence.forward_kl.temperature": 2}, "requires a teacher that provides full"),
    "new responses": ({"method": "gkd"}, "gkd trains on responses of the student .* --responses student"),
    "the teacher's responses": ({"method": "seqkd"}, "trains on responses of the teacher .* --responses teacher"),
    "preferences": ({"method": "dpkd"}, "dpkd trains on responses of the student and teacher"),
    "a soft prompt": ({"method": "promptkd"}, "promptkd trains on responses of the student"),
    "another tokenizer": ({"student.model": "UPPER"}, "the tokenizers of student and teacher differ"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_the_cache_is_refused_by_name_before_training(what, home):
    changes, message = REFUSED[what]
    rows = [json.loads(line) for line in (home / "sums.jsonl").read_text().splitlines()]
    paths = {
        "OTHER": jsonl(home / "other.jsonl", [*rows[:11], {**rows[11], "completion": "#### 0"}]),
        "UPPER": llama(home / "upper", tokenizer=characters("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-*/=#\n .,?")),
    }
    overrides = [f"{key}={json.dumps(str(paths.get(value, value)))}" for key, value in changes.items()]
    cached(home)
    with pytest.raises(RecipeError, match=message):
        prepare(load(home / "mine.yaml", overrides))


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"teacher": "other"}, CacheSettings(top_k=5), r"the teacher's weights \(\w+ there, now \w+\); give another"),
        ({}, CacheSettings("hidden"), r"kind \(top_k there, now hidden\), dtype \(float16 there, now bfloat16\)"),
        ({}, CacheSettings(top_k=6), r"top k \(5 there, now 6\)"),
        ({}, CacheSettings(top_k=5, dtype="float32"), r"dtype \(float16 there, now float32\)"),
    ],
    ids=["weights", "kind", "k", "dtype"],
)
def test_another_teacher_or_other_settings_are_refused_by_name(changes, settings, message, home):
    changes = {"teacher": {"local": {"model": str(home / changes["teacher"])}}} if changes else {}
    with pytest.raises(ValueError, match=message):
        cache(recipe_of(home, **changes), home / "cache", settings)
    assert CachedTeacher(str(home / "cache")).manifest.top_k == 5


def test_a_folder_with_something_else_and_a_cache_as_the_teacher_are_refused(home):
    with pytest.raises(ValueError, match="is not a cache of a teacher's scores"):
        cache(recipe_of(home), home / "teacher", CacheSettings())
    with pytest.raises(RecipeError, match="this teacher is a cache itself"):
        cache(cached(home), home / "second", CacheSettings())
    with pytest.raises(ValueError, match="top_k is saved in float16 or float32, not in bfloat16"):
        CacheSettings(dtype="bfloat16")
    with pytest.raises(ValueError, match="responses are of dataset, teacher, student, and not of students"):
        CacheSettings(responses="students")


def test_the_fingerprint_of_a_server_is_in_the_cache_and_another_server_is_refused(home):
    def served(model, folder="served"):
        with understudy_server(LocalTeacher(str(home / model)), AutoTokenizer.from_pretrained(home / model)) as url:
            cache(recipe_of(home, teacher={"server": {"url": url}}), home / folder, CacheSettings(top_k=5))
        return CachedTeacher(str(home / folder)).manifest.weights

    weights = served("teacher")
    assert weights == fingerprint(LocalTeacher(str(home / "teacher")).model)
    assert served("teacher") == weights, "at another port"
    with pytest.raises(ValueError, match=rf"the teacher's weights \({weights} there, now \w+\)"):
        served("other")


def test_of_several_teachers_all_weights_and_their_block_are_in_the_cache(home):
    local = {name: {"local": {"model": str(home / name)}} for name in ("teacher", "other")}

    def averaged(**weights):
        teacher = {"mixture": {"teachers": local, "weights": {"teacher": 1, "other": 1, **weights}}}
        return cache(recipe_of(home, teacher=teacher), home / "averaged", CacheSettings(top_k=5))

    assert averaged().added == 12
    assert averaged().added == 0
    with pytest.raises(ValueError, match="the teacher's weights"):
        averaged(other=2)


def test_events_of_a_teacher_with_another_tokenizer_are_no_tokens_to_save(home):
    llama(home / "words", tokenizer=words(), vocab_size=len(words()))
    other = recipe_of(home, teacher={"cross_tokenizer": {"model": str(home / "words")}})
    with pytest.raises(RecipeError, match="a teacher with another tokenizer gives no log-probabilities of the student"):
        cache(other, home / "events", CacheSettings(top_k=5))


@pytest.mark.parametrize("author", ["teacher", "student"])
def test_responses_of_a_model_are_scored_and_read_back_with_the_same_tokens(author, home):
    held_out = {"dataset": str(home / "sums.jsonl"), "limit": 4}
    prompts = jsonl(home / "prompts.jsonl", [{"prompt": f"{i}+3="} for i in range(5)])
    data = {"dataset": str(prompts), "max_length": 32}
    rollout = {"generate": {"max_new_tokens": 8, "n": 2}}
    settings = CacheSettings("hidden", responses=author)
    summary = cache(recipe_of(home, data=data, rollout=rollout, evaluate=held_out), home / "new", settings)
    assert summary.added == 14  # 5 prompts twice, and 4 rows of the held-out data
    responses = home / "new" / "responses.jsonl"
    before = responses.read_bytes()
    assert cache(recipe_of(home, data=data, rollout=rollout, evaluate=held_out), home / "new", settings).added == 0
    assert responses.read_bytes() == before
    data = {"dataset": str(responses), "max_length": 32, "template": "{question}"}  # of no meaning to ids
    train = prepare(cached(home, "new", data=data)).train
    lines = [json.loads(line) for line in before.decode().splitlines()]
    assert [e.response for e in train.examples] == [line["tokens"] for line in lines]
    assert [e.truncated for e in train.examples] == [line["truncated"] for line in lines]
    assert {example_key(e) for e in train.examples} < CachedTeacher(str(home / "new")).shards.places.keys()
    with pytest.raises(RecipeError, match=r"1 of 5 rows of .*sums.jsonl are not in the cache"):
        prepare(cached(home, "new", data={"dataset": str(home / "sums.jsonl"), "max_length": 32, "limit": 5}))


def test_ids_of_another_tokenizer_are_refused(tmp_path):
    row = {"prompt": "1+1=", "response": "2", "prompt_tokens": [5, 20, 5, 24], "tokens": [6, 2]}
    [example] = load_examples(jsonl(tmp_path / "mine.jsonl", [row]), characters()).examples
    assert (example.prompt, example.response) == (row["prompt_tokens"], row["tokens"])
    for changes, message in (
        ({"tokens": [7, 2]}, "are not those of its text"),
        ({"tokens": [999]}, "the id 999 is none"),
    ):
        with pytest.raises(DataError, match=rf"mine.jsonl:1: .*{message}.*use the tokenizer"):
            load_examples(jsonl(tmp_path / "mine.jsonl", [{**row, **changes}]), characters())
    counts = {"prompt": "1+1=", "completion": "2", "prompt_tokens": 4, "tokens": 6}  # no ids
    [example] = load_examples(jsonl(tmp_path / "mine.jsonl", [counts]), characters()).examples
    assert example.response[-1] == characters().eos_token_id
