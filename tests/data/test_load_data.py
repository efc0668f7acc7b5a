"""Loading the examples of a data block, cut to the models' context length."""

import pytest
from folders import characters, sums

from understudy.data.load import load_data
from understudy.recipe import Data, RecipeError


def test_a_default_max_length_shrinks_to_the_context_length_and_a_given_one_is_refused(tmp_path):
    dataset = str(sums(tmp_path / "sums.jsonl"))
    examples = load_data(Data(dataset=dataset), characters(), 10, 4)
    assert max(len(example.prompt) + len(example.response) for example in examples.examples) <= 10
    with pytest.raises(RecipeError, match=r"data.max_length 512 is more than the models' context length 10: lower it"):
        load_data(Data(dataset=dataset, max_length=512), characters(), 10, 4)


def test_problems_of_the_playground_are_data_too():
    data = Data(dataset="playground:arithmetic", split="test", limit=5, seed=3)
    rows = load_data(data, characters(), None, 4).rows
    assert len(rows) == 5
    assert [row.prompt for row in rows] == [row.prompt for row in load_data(data, characters(), None, 4).rows]
