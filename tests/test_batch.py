"""Batch: which positions predict, how values are reduced, how examples are dealt."""

import random
from itertools import pairwise

import pytest
import torch
from fakes import ragged_examples

from understudy.batch import Batch, Example, groups, micro_batches

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


def test_rows_that_predict_come_in_the_order_of_the_tokens():
    examples = [Example(ids(3), [20, 21, 22]), Example(ids(1), [30, 31]), Example(ids(5), [40])]
    batch = Batch.from_examples(examples, pad=0)
    following = batch.input_ids.roll(-1, dims=1)
    assert following[batch.predicts].tolist() == batch.tokens.tolist() == [20, 21, 22, 30, 31, 40]
    assert batch.predicts.nonzero()[:, 0].tolist() == batch.sequence_ids.tolist()


def test_pad_equal_to_eos_keeps_the_first_eos_and_no_other():
    examples = [Example([5, EOS], [8, EOS]), Example([5, 6, 7], [8, 9, 10, EOS])]
    same, other = Batch.from_examples(examples, pad=EOS), Batch.from_examples(examples, pad=0)
    assert same.tokens.tolist() == [8, EOS, 8, 9, 10, EOS]
    for field in ("attention_mask", "predicts", "tokens", "owner", "lengths"):
        assert torch.equal(getattr(same, field), getattr(other, field))


@pytest.mark.parametrize(("prompt", "response", "part"), [([], [1], "prompt"), ([1], [], "response")])
def test_an_example_without_prompt_or_response_is_refused(prompt, response, part):
    with pytest.raises(ValueError, match=f"row 7 has an empty {part}"):
        Batch.from_examples([Example([1], [2]), Example(prompt, response, row=7)], pad=0)


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one example"):
        Batch.from_examples([], pad=0)


@pytest.mark.parametrize("size", [1, 12, 30, 1000])
def test_pieces_are_the_batches_of_sequences_of_like_length(size):
    examples = ragged_examples(9, seed=3)
    batch = Batch.from_examples(examples, pad=0)
    pieces = batch.split_by_length(size)
    for piece, places in pieces:
        alone = Batch.from_examples(piece.examples, pad=0)
        for field in ("input_ids", "attention_mask", "predicts", "tokens", "owner", "lengths"):
            assert torch.equal(getattr(piece, field), getattr(alone, field))
        assert torch.equal(batch.tokens[places], piece.tokens)
    assert sorted(torch.cat([places for _, places in pieces]).tolist()) == list(range(len(batch.tokens)))
    lengths = [len(example) for piece, _ in pieces for example in piece.examples]
    assert lengths == sorted(map(len, examples))
    assert all(piece.input_ids.numel() >= size for piece, _ in pieces[:-1])
    assert all(
        len(piece.examples[:-1]) * len(piece.examples[-2]) < size for piece, _ in pieces if len(piece.examples) > 1
    )


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


# Dealing


def random_examples(count: int, seed: int, pairs: int = 0) -> list[Example]:
    rng = random.Random(seed)
    made = [Example(ids(rng.randint(1, 20)), ids(rng.randint(1, 60)), row=row) for row in range(count)]
    for pair in range(pairs):
        made += [Example(ids(3), ids(rng.randint(1, 60)), row=count + pair, pair=pair) for _ in range(2)]
    rng.shuffle(made)
    return made


def padded(part: list[Example]) -> int:
    return max(map(len, part)) * len(part)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", range(5))
def test_dealing_gives_exactly_as_many_parts_and_loses_nothing(parts, seed):
    examples = random_examples(7 + 5 * seed, seed, pairs=seed)
    dealt = micro_batches(examples, parts)
    assert len(dealt) == parts
    assert all(dealt)
    assert sorted(map(id, (e for part in dealt for e in part))) == sorted(map(id, examples))


@pytest.mark.parametrize("parts", [2, 5, 8])
def test_dealing_keeps_pairs_together(parts):
    dealt = micro_batches(random_examples(3, seed=1, pairs=6), parts)
    pairs = {}
    for part, examples in enumerate(dealt):
        for example in examples:
            if example.pair >= 0:
                pairs.setdefault(example.pair, set()).add(part)
    assert all(len(parts) == 1 for parts in pairs.values())
    assert len(pairs) == 6


@pytest.mark.parametrize("seed", range(20))
def test_dealing_makes_the_largest_padded_part_as_small_as_any_cut_can(seed):
    examples = random_examples(11, seed)
    lengths = sorted(map(len, examples))

    def smallest(start: int, parts: int) -> int:
        if parts == 1:
            return lengths[-1] * (len(lengths) - start)
        cuts = range(start + 1, len(lengths) - parts + 2)
        return min(max(lengths[cut - 1] * (cut - start), smallest(cut, parts - 1)) for cut in cuts)

    for parts in (1, 2, 4, 6):
        assert max(map(padded, micro_batches(examples, parts))) == smallest(0, parts)


def test_dealing_puts_sequences_of_like_length_together():
    dealt = micro_batches(random_examples(24, seed=3), 6)
    for short, long in pairwise(dealt):
        assert max(map(len, short)) <= min(map(len, long))


def test_no_part_is_empty_even_if_fewer_would_be_as_good():
    dealt = micro_batches([Example([1], ids(5)) for _ in range(4)], 3)  # two parts of two have the same largest part
    assert sorted(len(part) for part in dealt) == [1, 1, 2]


def test_examples_of_equal_length_are_dealt_evenly():
    dealt = micro_batches([Example(ids(4), ids(4)) for _ in range(24)], 6)
    assert [len(part) for part in dealt] == [4] * 6


def test_dealing_more_parts_than_examples_is_refused_with_a_remedy():
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
def test_accumulating_over_any_deal_equals_the_whole_batch(reduction, parts):
    examples = random_examples(6, seed=4)
    value = {id(e): torch.rand(len(e.response), dtype=torch.float64) for e in examples}

    def summed(batch: Batch) -> torch.Tensor:
        return (batch.weights(reduction) * torch.cat([value[id(e)] for e in batch.examples])).sum()

    whole = Batch.from_examples(examples, pad=0)
    batches = [Batch.from_examples(part, pad=0) for part in micro_batches(examples, parts)]
    units = sum(batch.normalizer(reduction) for batch in batches)
    accumulated = sum(summed(batch) / units for batch in batches)
    assert units == whole.normalizer(reduction)
    torch.testing.assert_close(accumulated, summed(whole) / whole.normalizer(reduction), rtol=1e-6, atol=0)
