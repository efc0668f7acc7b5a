"""Rewards of responses by functions and models, and the advantages computed from them."""

import math
from dataclasses import replace

import pytest
import torch
from fakes import words
from transformers import LlamaConfig, LlamaForSequenceClassification

from understudy.batch import Batch, Example
from understudy.playground.rewards import brevity, correct
from understudy.reward import Reward, RewardModel, _warn_of_a_single_response, advantages, function

EXAMPLES = [
    Example([4, 5], [6, 7, 2], "student", row=0, columns={"completion": "w6 w7"}),
    Example([4, 5], [6, 2], "student", row=0, columns={"completion": "w6 w7"}),
    Example([8], [9, 9, 9], "student", row=1, columns={"completion": "w9"}),
]


def length(prompts, responses, rows):
    return [len(r.split()) for r in responses]


def exact(prompts, responses, rows):
    return [1.0 if r.strip() == row["completion"] else 0.0 for r, row in zip(responses, rows, strict=True)]


def test_a_reward_is_the_weighted_sum_of_its_functions_and_constant_over_a_response():
    examples = Reward({length: 0.5, exact: 2.0}).score(EXAMPLES, words(), groups=[0, 0, 1])
    assert [e.streams for e in examples] == [
        {"reward": [3.0] * 3, "reward_length": [2.0] * 3, "reward_exact": [1.0] * 3, "advantage": [2.5] * 3},
        {"reward": [0.5] * 2, "reward_length": [1.0] * 2, "reward_exact": [0.0] * 2, "advantage": [-2.5] * 2},
        {"reward": [1.5] * 3, "reward_length": [3.0] * 3, "reward_exact": [0.0] * 3, "advantage": [0.0] * 3},
    ]


def test_a_reward_of_one_function_has_no_parts_and_other_streams_stay():
    examples = [replace(e, streams={"sampled_logprob": [-1.0] * len(e.response)}) for e in EXAMPLES]
    scored = Reward([length]).score(examples, words())
    assert Reward([length]).names == ("reward",)
    assert Reward([length, exact]).names == ("reward", "reward_length", "reward_exact")
    assert [set(e.streams) for e in scored] == [{"sampled_logprob", "reward", "advantage"}] * 3
    assert scored[1].streams["sampled_logprob"] == [-1.0, -1.0]


def test_rewards_and_advantages_are_streams_of_a_batch():
    batch = Batch.from_examples(Reward([length]).score(EXAMPLES, words(), groups=[0, 0, 1]), pad=0)
    assert batch.stream("reward").tolist() == [2.0] * 3 + [1.0] * 2 + [3.0] * 3
    assert batch.stream("advantage").tolist() == [1.0] * 3 + [-1.0] * 2 + [0.0] * 3


def test_a_function_is_given_prompts_responses_and_the_datasets_columns():
    calls = []

    def zero(prompts, responses, rows):
        calls.append((prompts, responses, [dict(row) for row in rows]))
        return [0.0] * len(prompts)

    Reward([zero]).score(EXAMPLES[1:], words())
    assert calls == [(["w4 w5", "w8"], ["w6", "w9 w9 w9"], [{"completion": "w6 w7"}, {"completion": "w9"}])]


def test_an_advantage_is_the_reward_less_the_mean_of_the_other_responses_to_the_prompt():
    assert advantages([1.0, 2.0, 6.0, 5.0, 5.0], [0, 0, 0, 1, 1]) == pytest.approx([-3.0, -1.5, 4.5, 0.0, 0.0])


def test_without_groups_all_responses_are_compared_whatever_their_rows():
    scored = Reward([length]).score(EXAMPLES, words())
    assert [e.streams["advantage"][0] for e in scored] == pytest.approx([0.0, -1.5, 1.5])
    assert Reward([length]).score([], words()) == []


def test_where_no_prompt_has_several_responses_all_are_compared():
    assert advantages([1.0, 2.0, 6.0], [0, 1, 2]) == pytest.approx([-3.0, -1.5, 4.5])


def test_a_single_response_has_no_advantage_which_is_said_once(caplog):
    _warn_of_a_single_response.cache_clear()
    for _ in range(2):
        Reward([length]).score(EXAMPLES[:1], words())
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == [
        "a step has a single response, which can be compared with no other, so its reward teaches nothing"
    ]
    assert advantages([7.0], [0]) == [0.0]
    assert advantages([7.0, 1.0, 3.0], [0, 1, 1]) == pytest.approx([0.0, -2.0, 2.0])


def test_normalized_advantages_do_not_depend_on_the_rewards_scale():
    small, large = (advantages([k * r for r in (1.0, 2.0, 6.0)], [0, 0, 0], True) for k in (1, 100))
    assert small == pytest.approx(large)
    assert advantages([3.0, 3.0], [0, 0], True) == [0.0, 0.0]


def test_leaving_a_responses_reward_out_of_its_baseline_keeps_the_policy_gradient_unbiased():
    """By enumeration: two responses y, y' ~ q; E[(r(y) − r(y')) ∇log q(y)] = ∇E[r]. With the plain mean it is half."""
    q, r = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), (1.0, 0.0, -2.0)
    expected = torch.zeros(3, dtype=torch.float64)
    for y in range(3):
        for other in range(3):
            for index, advantage in enumerate(advantages([r[y], r[other]], [0, 0])):
                score = torch.eye(3, dtype=torch.float64)[(y, other)[index]] - q
                expected += q[y] * q[other] * advantage * score / 2
    value = sum(q[v] * r[v] for v in range(3))
    exact = torch.stack([q[v] * (r[v] - value) for v in range(3)])
    torch.testing.assert_close(expected, exact)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda p, r, rows: [1.0], "returned 1 numbers for 3 responses"),
        (lambda p, r, rows: [1.0, math.nan, 0.0], "returned nan for response 1; it must be finite"),
        (lambda p, r, rows: None, "should return a list of numbers, not None"),
        (lambda p, r, rows: ["good"] * 3, "should return a list of numbers, not"),
    ],
)
def test_values_that_are_not_rewards_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        Reward([function]).score(EXAMPLES, words())


def test_functions_are_named_by_module_and_may_lie_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "mine_only.py").write_text("def good(prompts, responses, rows):\n    return [1.0] * len(prompts)\n")
    monkeypatch.chdir(tmp_path)
    assert function("mine_only:good")(["a"], ["b"], [{}]) == [1.0]
    assert function("understudy.playground.rewards:correct") is correct
    for place, message in {
        "mine_only": "is written module:function",
        "mine_only:bad": 'has no function "bad"',
        "nowhere.at_all:good": "cannot be imported",
    }.items():
        with pytest.raises(ValueError, match=message):
            function(place)


def test_two_functions_of_the_same_name_are_refused():
    def named(value):
        def score(prompts, responses, rows):
            return [value] * len(prompts)

        return score

    with pytest.raises(ValueError, match="the same name"):
        Reward([named(0.0), named(1.0)])


def test_the_playgrounds_rewards_are_for_correct_and_for_short_responses():
    rows = [{"completion": "2 + 3 = 5\n#### 5"}] * 3
    responses = ["2 + 3 = 5\n#### 5", "#### 5", "2 + 3 = 6\n#### 6"]
    assert correct(["?"] * 3, responses, rows) == [1.0, 1.0, 0.0]
    assert brevity(["?"] * 3, responses, rows) == [0.5, 1 - 6 / 32, 0.5]


def classifier(folder, labels):
    tokenizer = words()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=labels,
        pad_token_id=0,
    )
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("reads", ["text", "pair"])
def test_a_reward_models_score_is_its_logit_on_prompt_and_response(reads, tmp_path):
    model = classifier(tmp_path, 1)
    texts = ["w4 w5", "w6"], [" w7", " w8 w9 w10"]
    scores = RewardModel(str(tmp_path), reads=reads, batch_size=1)(*texts, [{}, {}])
    expected = [model(torch.tensor([ids])).logits.item() for ids in ([4, 5, 7], [6, 8, 9, 10])]
    assert scores == pytest.approx(expected, abs=1e-6)
    assert RewardModel(str(tmp_path), reads=reads)(*texts, [{}, {}]) == pytest.approx(scores, abs=1e-6)


def test_a_classifiers_reward_is_the_probability_of_a_label(tmp_path):
    model = classifier(tmp_path, 3)
    [score] = RewardModel(str(tmp_path), label="LABEL_2")(["w4 w5"], [" w7"], [{}])
    assert score == pytest.approx(float(model(torch.tensor([[4, 5, 7]])).logits.softmax(-1)[0, 2].detach()), abs=1e-6)
    with pytest.raises(ValueError, match="several labels: name one of LABEL_0"):
        RewardModel(str(tmp_path))
    with pytest.raises(ValueError, match='no label "good"; it has LABEL_0'):
        RewardModel(str(tmp_path), label="good")
