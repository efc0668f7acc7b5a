"""Batch: which positions predict, streams, the teacher's prompts, reductions, and splitting into micro-batches."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from fakes import ragged_examples

from understudy.batch import Batch, Example, groups, micro_batches
from understudy.rollout import Rollout, Writer
from understudy.step import Step

EOS = 2


def ids(count: int) -> list[int]:
    return list(range(10, 10 + count))


def test_predicts_marks_the_last_prompt_token_up_to_the_last_but_one_token():
    batch = Batch.from_examples([Example([5, 6, 7], [8, 9, EOS]), Example([5], [EOS])], pad=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, EOS], [5, EOS, 0, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]
    assert batch.predicts.long().tolist() == [[0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]]
    assert batch.tokens.tolist() == [8, 9, EOS, EOS]
    assert batch.sequence_ids.tolist() == [0, 0, 0, 1]
    assert batch.lengths.tolist() == [3, 1]


def test_predicting_positions_are_in_the_order_of_the_tokens():
    examples = [Example(ids(3), [20, 21, 22]), Example(ids(1), [30, 31]), Example(ids(5), [40])]
    batch = Batch.from_examples(examples, pad=0)
    next_tokens = batch.input_ids.roll(-1, dims=1)
    assert next_tokens[batch.predicts].tolist() == batch.tokens.tolist() == [20, 21, 22, 30, 31, 40]
    assert batch.predicts.nonzero()[:, 0].tolist() == batch.sequence_ids.tolist()


def test_pad_equal_to_eos_keeps_the_first_eos_and_no_other():
    examples = [Example([5, EOS], [8, EOS]), Example([5, 6, 7], [8, 9, 10, EOS])]
    padded_with_eos, expected = Batch.from_examples(examples, pad=EOS), Batch.from_examples(examples, pad=0)
    assert padded_with_eos.tokens.tolist() == [8, EOS, 8, 9, 10, EOS]
    for field in ("attention_mask", "predicts", "tokens", "sequence_ids", "lengths"):
        assert torch.equal(getattr(padded_with_eos, field), getattr(expected, field))


@pytest.mark.parametrize(("prompt", "response", "part"), [([], [1], "prompt"), ([1], [], "response")])
def test_an_example_without_prompt_or_response_is_refused(prompt, response, part):
    with pytest.raises(ValueError, match=f"row 7 has an empty {part}"):
        Batch.from_examples([Example([1], [2]), Example(prompt, response, row=7)], pad=0)


def test_a_batch_without_examples_is_refused():
    with pytest.raises(ValueError, match="at least one example"):
        Batch.from_examples([], pad=0)


@pytest.mark.parametrize("size", [1, 12, 30, 1000])
def test_split_by_length_gives_batches_of_sequences_of_similar_length(size):
    examples = ragged_examples(9, seed=3)
    batch = Batch.from_examples(examples, pad=0)
    parts = batch.split_by_length(size)
    for part, indices in parts:
        expected = Batch.from_examples(part.examples, pad=0)
        for field in ("input_ids", "attention_mask", "predicts", "tokens", "sequence_ids", "lengths"):
            assert torch.equal(getattr(part, field), getattr(expected, field))
        assert torch.equal(batch.tokens[indices], part.tokens)
    assert sorted(torch.cat([indices for _, indices in parts]).tolist()) == list(range(len(batch.tokens)))
    lengths = [len(example) for part, _ in parts for example in part.examples]
    assert lengths == sorted(map(len, examples))
    assert all(part.input_ids.numel() >= size for part, _ in parts[:-1])
    assert all(len(part.examples[:-1]) * len(part.examples[-2]) < size for part, _ in parts if len(part.examples) > 1)


@pytest.mark.parametrize(("reduction", "expected"), [("sequence", 0.45), ("token", 0.525), ("sum", 2.1)])
def test_three_reductions_of_one_example(reduction, expected):
    batch = Batch.from_examples([Example([1], ids(2)), Example([1, 1], ids(6))], pad=0)
    values = torch.tensor([0.2, 0.4] + [0.6] * 6)
    total = (batch.weights(reduction) * values).sum() / batch.normalizer(reduction)
    assert total.item() == pytest.approx(expected, abs=1e-6)


def test_per_sequence_sums_the_tokens_of_each_sequence_and_is_differentiable():
    batch = Batch.from_examples([Example([1], ids(2)), Example([1], ids(1)), Example([1], ids(3))], pad=0)
    values = torch.arange(6.0, dtype=torch.float64).requires_grad_()
    sums = batch.per_sequence(values)
    assert sums.tolist() == [1.0, 2.0, 12.0]
    assert sums.dtype == torch.float64
    (grad,) = torch.autograd.grad(sums @ torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64), values)
    assert grad.tolist() == [1, 1, 10, 100, 100, 100]


def test_written_by_marks_the_tokens_of_an_author():
    batch = Batch.from_examples(
        [Example([1], ids(2), author="student"), Example([1], ids(1)), Example([1], ids(1), "student")], pad=0
    )
    assert batch.written_by("student").tolist() == [True, True, False, True]
    assert batch.written_by("dataset").tolist() == [False, False, True, False]
    assert not batch.written_by("teacher").any()


# Response tokens that are read and not trained on

MASKED = Example([5, 6], [20, 21, 22, 23, EOS], trained=[True, False, False, True, True], row=4)
UNMASKED = replace(MASKED, trained=None)


def test_rows_are_the_trained_tokens_in_their_order():
    examples = [Example([7], [30, EOS]), MASKED, Example([5], [40, 41], trained=[False, True])]
    batch = Batch.from_examples(examples, pad=0)
    assert batch.tokens.tolist() == [30, EOS, 20, 23, EOS, 41]
    assert batch.sequence_ids.tolist() == [0, 0, 1, 1, 1, 2]
    assert batch.lengths.tolist() == [2, 3, 1]
    assert batch.predicts.nonzero().tolist() == [[0, 0], [0, 1], [1, 1], [1, 4], [1, 5], [2, 1]]
    assert MASKED.trained_tokens == [0, 3, 4]


def test_tokens_that_are_not_trained_on_are_read():
    masked, unmasked = (Batch.from_examples([example], pad=0) for example in (MASKED, UNMASKED))
    assert torch.equal(masked.input_ids, unmasked.input_ids)
    assert torch.equal(masked.attention_mask, unmasked.attention_mask)


def test_reductions_count_trained_tokens():
    batch = Batch.from_examples([MASKED, Example([7], [30, EOS])], pad=0)
    assert batch.weights("sequence").tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2])
    assert batch.weights("token").tolist() == [1.0] * 5
    assert batch.normalizer("token") == 5
    assert batch.normalizer("sequence") == 2
    assert batch.per_sequence(torch.ones(5)).tolist() == [3.0, 2.0]


def test_a_mask_of_every_token_is_the_same_as_none():
    every, unmasked = (Batch.from_examples([e], pad=0) for e in (replace(MASKED, trained=[True] * 5), UNMASKED))
    for field in ("predicts", "tokens", "sequence_ids", "lengths"):
        assert torch.equal(getattr(every, field), getattr(unmasked, field))


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        ([True] * 4, "row 4 has 5 response tokens, but a `trained` mask of length 4: give one value per response"),
        ([], "row 4 has 5 response tokens, but a `trained` mask of length 0: give one value per response"),
        ([False] * 5, "row 4 has no response token to train on: leave the row out"),
    ],
)
def test_a_mask_of_another_length_or_without_a_trained_token_is_refused(trained, message):
    with pytest.raises(ValueError, match=message):
        Batch.from_examples([replace(MASKED, trained=trained)], pad=0)


# Prompts for the teacher


def test_the_teacher_reads_the_same_rows_behind_its_own_prompts():
    privileged = replace(MASKED, teacher_prompt=[9, 9, 9, 9])
    batch = Batch.from_examples([Example([7, 8], [30, EOS]), privileged, UNMASKED], pad=0)
    teacher_batch = batch.as_read_by_teacher()
    for field in ("tokens", "sequence_ids", "lengths"):
        assert torch.equal(getattr(teacher_batch, field), getattr(batch, field))
    assert teacher_batch.input_ids[1].tolist() == [9, 9, 9, 9, 20, 21, 22, 23, EOS]
    assert teacher_batch.input_ids[0, :4].tolist() == [7, 8, 30, EOS]
    assert teacher_batch.attention_mask.sum(-1).tolist() == [4, 9, 7]
    assert teacher_batch.predicts[1].nonzero()[:, 0].tolist() == [3, 6, 7]
    next_tokens = teacher_batch.input_ids.roll(-1, dims=1)
    assert torch.equal(next_tokens[teacher_batch.predicts], batch.tokens)


def test_the_students_batch_has_the_students_prompts():
    batch = Batch.from_examples([replace(UNMASKED, teacher_prompt=[9])], pad=0)
    assert batch.input_ids[0, :2].tolist() == UNMASKED.prompt


def test_a_batch_without_teacher_prompts_is_what_the_teacher_reads():
    batch = Batch.from_examples([MASKED, UNMASKED], pad=0)
    assert batch.as_read_by_teacher() is batch


# Streams


def test_a_stream_is_read_at_the_trained_tokens():
    examples = [
        Example([7], [30, EOS], streams={"advantage": [0.5, -0.5], "reward": [1, 2]}),
        replace(MASKED, streams={"advantage": [1.0, 2.0, 3.0, 4.0, 5.0], "reward": (1, 2, 3, 4, 5)}),
    ]
    batch = Batch.from_examples(examples, pad=0)
    assert batch.stream("advantage").tolist() == [0.5, -0.5, 1.0, 4.0, 5.0]
    assert batch.stream("reward").tolist() == [1.0, 2.0, 1.0, 4.0, 5.0]
    assert batch.stream("advantage").dtype == batch.stream("reward").dtype == torch.float32
    for part, indices in batch.split_by_length(1):
        assert torch.equal(part.stream("advantage"), batch.stream("advantage")[indices])


@pytest.mark.parametrize(
    ("streams", "problem"),
    [
        ({}, "none"),
        ({"reward": [1.0] * 5}, "none"),
        ({"advantage": [1.0] * 3}, "3 numbers for 5 tokens"),  # as many as trained tokens is not enough
        ({"advantage": []}, "0 numbers for 5 tokens"),
    ],
)
def test_a_stream_without_a_number_for_every_response_token_is_refused(streams, problem):
    examples = [Example([7], [30], streams={"advantage": [0.0]}), replace(MASKED, streams=streams)]
    batch = Batch.from_examples(examples, pad=0)
    with pytest.raises(ValueError, match=f'"advantage", a number per response token, .* of row 4 has {problem}'):
        batch.stream("advantage")


# Micro-batches


def random_examples(count: int, seed: int, pairs: int = 0) -> list[Example]:
    rng = random.Random(seed)
    examples = [Example(ids(rng.randint(1, 20)), ids(rng.randint(1, 60)), row=row) for row in range(count)]
    for pair in range(pairs):
        examples += [Example(ids(3), ids(rng.randint(1, 60)), row=count + pair, pair=pair) for _ in range(2)]
    rng.shuffle(examples)
    return examples


def padded_size(part: list[Example]) -> int:
    return max(map(len, part)) * len(part)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", range(5))
def test_there_are_exactly_as_many_micro_batches_and_no_example_is_lost(parts, seed):
    examples = random_examples(7 + 5 * seed, seed, pairs=seed)
    batches = micro_batches(examples, parts)
    assert len(batches) == parts
    assert all(batches)
    assert sorted(map(id, (e for part in batches for e in part))) == sorted(map(id, examples))


@pytest.mark.parametrize("parts", [2, 5, 8])
def test_the_examples_of_a_pair_share_a_micro_batch(parts):
    batches = micro_batches(random_examples(3, seed=1, pairs=6), parts)
    pairs = {}
    for part, examples in enumerate(batches):
        for example in examples:
            if example.pair >= 0:
                pairs.setdefault(example.pair, set()).add(part)
    assert all(len(parts) == 1 for parts in pairs.values())
    assert len(pairs) == 6


@pytest.mark.parametrize("seed", range(20))
def test_the_largest_padded_micro_batch_is_as_small_as_possible(seed):
    examples = random_examples(11, seed)
    lengths = sorted(map(len, examples))

    def smallest(start: int, parts: int) -> int:
        if parts == 1:
            return lengths[-1] * (len(lengths) - start)
        cuts = range(start + 1, len(lengths) - parts + 2)
        return min(max(lengths[cut - 1] * (cut - start), smallest(cut, parts - 1)) for cut in cuts)

    for parts in (1, 2, 4, 6):
        assert max(map(padded_size, micro_batches(examples, parts))) == smallest(0, parts)


def test_a_micro_batch_has_sequences_of_similar_length():
    batches = micro_batches(random_examples(24, seed=3), 6)
    for short, long in pairwise(batches):
        assert max(map(len, short)) <= min(map(len, long))


def test_no_micro_batch_is_empty_even_if_fewer_would_be_as_small():
    batches = micro_batches([Example([1], ids(5)) for _ in range(4)], 3)  # two parts of two have the same largest part
    assert sorted(len(part) for part in batches) == [1, 1, 2]


def test_examples_of_equal_length_are_split_evenly():
    batches = micro_batches([Example(ids(4), ids(4)) for _ in range(24)], 6)
    assert [len(part) for part in batches] == [4] * 6


def test_more_micro_batches_than_examples_are_refused_with_a_remedy():
    pair = [Example([1], [2], pair=0), Example([1], [3], pair=0)]
    with pytest.raises(
        ValueError, match=r"1 examples .* cannot fill 2 micro-batches; lower gradient_accumulation_steps"
    ):
        micro_batches(pair, 2)
    assert micro_batches(pair, 1) == [pair]


def test_groups_keep_the_order_and_join_only_pairs():
    a, b, c, d = (Example([1], ids(n + 1), pair=p) for n, p in enumerate([-1, 4, -1, 4]))
    assert groups([a, b, c, d]) == [[a], [b, d], [c]]
    assert groups([a, a]) == [[a], [a]]


@pytest.mark.parametrize("reduction", ["sequence", "token", "sum"])
@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_accumulating_over_micro_batches_equals_the_batch(reduction, parts):
    examples = random_examples(6, seed=4)
    value = {id(e): torch.rand(len(e.response), dtype=torch.float64) for e in examples}

    def summed(batch: Batch) -> torch.Tensor:
        return (batch.weights(reduction) * torch.cat([value[id(e)] for e in batch.examples])).sum()

    expected = Batch.from_examples(examples, pad=0)
    batches = [Batch.from_examples(part, pad=0) for part in micro_batches(examples, parts)]
    normalizer = sum(batch.normalizer(reduction) for batch in batches)
    accumulated = sum(summed(batch) / normalizer for batch in batches)
    assert normalizer == expected.normalizer(reduction)
    torch.testing.assert_close(accumulated, summed(expected) / expected.normalizer(reduction), rtol=1e-6, atol=0)


def test_the_last_turn_of_a_conversation_is_what_a_model_is_to_generate():
    streams = {"advantage": [0.0, 1.0, 2.0, 3.0, 4.0]}
    trained = [True, True, False, True, True]
    example = Example([1], [2, 3, 4, 5, 6], trained=trained, teacher_prompt=[9], streams=streams, row=7)
    turn = example.last_turn()
    assert (turn.prompt, turn.response, turn.row) == ([1, 2, 3, 4], [5, 6], 7)
    assert turn.teacher_prompt == [9, 2, 3, 4]
    assert turn.streams == {"advantage": [3.0, 4.0]}
    assert list(turn.trained or ()) == [True, True]
    assert turn.last_turn() is turn
    for whole in (Example([1], [2, 3]), Example([1], []), Example([1], [2, 3], trained=[False, True])):
        assert whole.last_turn().response in (whole.response, whole.response[1:])


def test_writers_generate_the_last_turn():
    prompts = []

    class Recording(Rollout):
        def bind(self, model, tokenizer, author="student"):
            return self

        def generate(self, examples, sampling, step):
            prompts.extend(example.prompt for example in examples)
            return []

    Writer(Recording())([Example([1], [2, 3, 4], trained=[True, False, True]), Example([5], [6])], Step(0, 0))
    assert prompts == [[1, 2, 3], [5]]
