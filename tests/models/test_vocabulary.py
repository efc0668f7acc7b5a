"""The vocabulary of tokenizers with gaps between their ids."""

from typing import Any

import pytest
import torch
from fakes import VOCABULARY, ragged_examples, tiny
from loop import arguments, student, teacher
from transformers import LlamaConfig, PreTrainedTokenizerFast

from understudy.batch import Batch, Example
from understudy.generation.stop_tokens import stop_ids
from understudy.methods.sft import SFT
from understudy.models.load import check_vocabulary
from understudy.models.vocabulary import vocabulary_size
from understudy.recipe import RecipeError
from understudy.rollouts.generate import GenerateRollout
from understudy.sampling import Sampling
from understudy.step import Step
from understudy.training.trainer import StudentTrainer


def with_gaps():
    """A tokenizer of six tokens whose ids reach to VOCABULARY − 1: its end of sequence is the last id, as in Kimi."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {"<pad>": 0, "<bos>": 1, "<unk>": 3, "w4": 4, "w5": 5, "<eos>": VOCABULARY - 1}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def test_a_vocabulary_reaches_to_the_largest_id():
    assert len(with_gaps()) == 6
    assert vocabulary_size(with_gaps()) == VOCABULARY


def test_a_model_with_fewer_embeddings_than_the_largest_id_is_refused():
    check_vocabulary(with_gaps(), LlamaConfig(vocab_size=VOCABULARY), "the student has")
    with pytest.raises(RecipeError, match=f"the student has embeddings for {VOCABULARY - 1} only"):
        check_vocabulary(with_gaps(), LlamaConfig(vocab_size=VOCABULARY - 1), "the student has")


def test_tokens_beyond_the_number_of_tokens_are_trained_generated_and_end_a_response(tmp_path):
    data = {"processing_class": with_gaps(), "train_dataset": ragged_examples()}
    run = StudentTrainer(student(), teacher(), SFT(), args=arguments(tmp_path), **data)
    batch = Batch.from_examples([Example([4, VOCABULARY - 2], [5, VOCABULARY - 1])], 0)
    model: Any = run.model
    own = model(batch.input_ids).logits[batch.predicts].log_softmax(-1)
    loss = run.weighted_loss(model, batch, run.method, diagnose=False)
    assert float(loss) == pytest.approx(-float(own.gather(-1, batch.tokens[:, None]).detach().sum()), rel=1e-5)
    model = tiny("phi")
    with torch.no_grad():
        model.lm_head.bias[VOCABULARY - 1] = 100.0
    assert stop_ids(with_gaps(), model) == [2, VOCABULARY - 1]
    rollout = GenerateRollout().bind(model, with_gaps())
    [example] = rollout.generate([Example([4], [])], Sampling(max_new_tokens=3), Step(0))
    assert example.response == [VOCABULARY - 1]
    assert not example.truncated
