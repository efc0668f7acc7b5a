"""Tokenizers of three families, trained on a few sentences."""

from string import printable

import pytest
from rows_of_text import CHATML, LLAMA2, SENTENCES, byte_level
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def gpt2():
    return byte_level()


@pytest.fixture(scope="session")
def llama():
    """As Llama 2's: a BOS by the post-processor, and a space before every text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=list(printable), show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = LLAMA2
    return tokenizer


@pytest.fixture(scope="session")
def chatml():
    """A base model's: its chat template ends answers with <|im_end|>, its end-of-sequence token is another."""
    return byte_level(chat=CHATML)
