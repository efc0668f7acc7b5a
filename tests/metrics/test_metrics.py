"""Metrics of responses: their values by hand, by other implementations, and at their limits."""

import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import sacrebleu

from understudy import metrics
from understudy.metrics.exact_match import exact_match, normalize
from understudy.registry import UnknownName

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"


def test_an_exact_match_disregards_case_punctuation_and_white_space():
    assert exact_match("  Paris,\nFrance. ", ["Rome", "paris france"])
    assert not exact_match("Paris", ["Paris France"])
    assert not exact_match("anything", [])


def test_normalizing_twice_is_normalizing_once():
    text = "It's  A\ttest – really!"
    assert normalize(normalize(text)) == normalize(text)


def value_of(name, responses, references):
    """One metric's value."""
    return metrics.score([name], responses, references)[name].value


def test_a_metric_is_found_by_its_numbers_name():
    assert {"bleu", "chrf", "rouge_1", "rouge_2", "rouge_l", "exact_match", "final_answer"} <= set(metrics.names())
    scores = metrics.score(["chrf", "rouge_l", "bleu"], ["a cat"], [["a cat"]])
    assert list(scores) == ["chrf", "rouge_l", "bleu"], "in the order of the names given"


def test_an_unknown_metric_is_refused_with_the_nearest_one():
    with pytest.raises(UnknownName, match='there is no metric "rouge"; did you mean "rouge_'):
        metrics.score(["rouge"], ["a"], [["a"]])


OWN_METRICS = """
from understudy.metric import Metric, Score

class Lengths(Metric):
    names = ("characters", "words")
    def score(self, responses, references):
        text = responses[0]
        return {"characters": Score(len(text), "a"), "words": Score(len(text.split()), "b"), "bleu": Score(0, "c")}

class Bleu(Lengths):
    names = ("bleu",)

class Missing(Lengths):
    names = ("lines",)

class Nameless(Lengths):
    names = "characters"

class Diversity(Lengths):
    compares_responses = True
"""


@pytest.fixture
def own_metrics(tmp_path, monkeypatch):
    """The working directory, with the module `own_metrics` in it."""
    (tmp_path / "own_metrics.py").write_text(OWN_METRICS)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("own_metrics", None)


def test_a_metric_of_ones_own_gives_all_its_numbers_and_no_others(own_metrics):
    requested = ["exact_match", "own_metrics:Lengths", "bleu"]
    assert list(metrics.numbers(requested)) == ["exact_match", "characters", "words", "bleu"]
    scores = metrics.score(requested, ["a cat ran home"], [["a cat ran home"]])
    assert {name: score.value for name, score in scores.items()} == pytest.approx(
        {"exact_match": 100, "characters": 14, "words": 4, "bleu": 100}
    )
    assert not metrics.compares_responses("own_metrics:Lengths")
    assert metrics.compares_responses("own_metrics:Diversity")
    assert metrics.compares_responses("self_bleu")


@pytest.mark.parametrize(
    ("requested", "error"),
    [
        (["bleu", "own_metrics:Bleu"], 'own_metrics:Bleu has a number "bleu", and so has another one: rename one'),
        (["own_metrics:Nameless"], "own_metrics:Nameless has no names: add a class variable such as names = "),
        (["own_metrics:Lenghts"], 'the module own_metrics has no class "Lenghts"; did you mean "Lengths"'),
    ],
)
def test_a_metric_of_ones_own_that_cannot_be_used_is_refused(requested, error, own_metrics):
    with pytest.raises(UnknownName, match=error):
        metrics.check(requested)


def test_a_metric_of_ones_own_that_returns_too_little_is_an_error(own_metrics):
    with pytest.raises(ValueError, match='the metric Missing returned no score "lines", which is one of its names'):
        metrics.score(["own_metrics:Missing"], ["a"], [["a"]])


def test_the_numbers_of_an_installed_package_s_metric_are_found_by_name(own_metrics, monkeypatch):
    installed = EntryPoints([EntryPoint("lengths", "own_metrics:Lengths", "understudy.metrics")])
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **query: installed.select(**query))
    assert "words" in metrics.names()
    assert metrics.score(["words"], ["a cat"], [["a"]])["words"].value == 2


@pytest.mark.parametrize("name", metrics.names())
def test_every_metric_is_0_for_nothing_and_100_for_the_reference_itself(name):
    responses = ["the cat sat on the mat\n#### 4", "a dog ran over the red road\n#### 5"]
    references = [["something else\n#### 7", responses[0]], [responses[1]]]
    assert value_of(name, responses, references) == pytest.approx(100)
    assert value_of(name, ["", ""], references) == pytest.approx(0)


def test_shares_are_out_of_100():
    references = [["Paris"], ["Rome", "Roma"], ["7 #### 7"], ["#### 8"]]
    assert value_of("exact_match", ["paris!", "roma", "7", "8"], references) == 75
    assert value_of("final_answer", ["paris", "rome", "it is\n#### 7", "#### 9"], references) == 25


# sacrebleu's documentation: a system of three sentences with two references, one of which says nothing of the second.
SYSTEM = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
FIRST = ["The dog bit the man.", "It was not unexpected.", "The man bit him first."]
SECOND = ["The dog had bit the man.", None, "The man had bitten the dog."]


def test_bleu_and_chrf_take_as_many_references_as_each_answer_has():
    references = [[r for r in pair if r is not None] for pair in zip(FIRST, SECOND, strict=True)]
    assert [len(r) for r in references] == [2, 1, 2]
    scores = metrics.score(["bleu", "chrf"], SYSTEM, references)
    assert scores["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(SYSTEM, [FIRST, SECOND]).score)
    assert scores["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(SYSTEM, [FIRST, SECOND]).score)
    assert scores["bleu"].signature.startswith("nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert scores["chrf"].signature.startswith("nrefs:var|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


def test_bleu_of_a_sentence_is_what_its_definition_gives_by_hand():
    """Of four words three are right; n-gram precisions 3/4, 2/3, 1/2, and ½ · ½ for the missing 4-gram (exp)."""
    answer, reference = ["the cat sat down"], [["the cat sat there"]]
    assert value_of("bleu", answer, reference) == pytest.approx(100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)
    assert value_of("chrf", ["cat"], [["dog"]]) == 0


def test_the_number_of_references_does_not_depend_on_their_order():
    responses, references = SYSTEM, [[r] for r in FIRST]
    more = [*references[:2], [FIRST[2], "The man had just bitten him."]]
    for name in ("bleu", "chrf", "rouge_l"):
        assert value_of(name, responses, more) > value_of(name, responses, references)
        assert value_of(name, responses, [r[::-1] for r in more]) == pytest.approx(value_of(name, responses, more))


def test_rouge_takes_the_best_reference_for_each_number():
    references = [["police killed the gunman", "the gunman shot, the police watched"]]
    # Lin (2004): "police kill the gunman" against the first: words 3 of 4 (stemmed 4 of 4).
    assert value_of("rouge_1", ["police kill the gunman"], references) == pytest.approx(100)
    assert value_of("rouge_2", ["the gunman kill police"], references[0:1]) == pytest.approx(100 / 3)
    assert value_of("rouge_l", ["the gunman kill police"], [references[0][:1]]) == pytest.approx(50)


def shared(path):
    """A file of the data beside the repository."""
    file = SHARED / path
    if not file.exists():
        pytest.skip(f"there is no {path} beside the repository")
    return file


def test_rouge_agrees_with_the_figures_of_rouge_1_5_5():
    """The F1 that the Perl script gave for these thousand pairs with stemming, from the tests of rouge-score.

    The script's middle of a bootstrap and the plain mean differ in the fourth digit.
    """
    references = [[line] for line in shared("data/rouge-testdata/target_large.txt").read_text().splitlines()]
    responses = shared("data/rouge-testdata/prediction_large.txt").read_text().splitlines()
    scores = metrics.score(["rouge_1", "rouge_l"], responses, references)
    assert scores["rouge_1"].value == pytest.approx(40.524, abs=0.02)
    assert scores["rouge_l"].value == pytest.approx(40.275, abs=0.02)


def test_self_bleu_is_100_for_copies_and_low_for_answers_that_share_nothing():
    copies, different = ["a b c d e", "a b c d e"], ["a b c d e", "v w x y z"]
    assert value_of("self_bleu", copies, [copies[1:], copies[:1]]) == pytest.approx(100)
    assert value_of("self_bleu", different, [different[1:], different[:1]]) == pytest.approx(0)
