"""The models, words and prompts of the benchmarks: random weights, because speed does not depend on them.

A response ends at random, as fast as the share of the vocabulary that is called a stop token.
"""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from understudy import Example


def llama(vocabulary: int, width: int, layers: int, seed: int = 0) -> Any:
    """A Llama in evaluation mode, float32, head tied to the embeddings; <pad> is 0, <bos> 1, <eos> 2."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def words(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of that many words, with a chat template that is nothing but the contents."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(4, vocabulary))]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return tokenizer


def prompts(count: int, length: int, vocabulary: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, vocabulary, (count, length), generator=generator).tolist()
    return [Example(prompt, [], row=row) for row, prompt in enumerate(ids)]


def stop_tokens(mean_length: int | None, vocabulary: int) -> list[int]:
    """As many stop tokens as end a random model's response after `mean_length` tokens on average; None: none."""
    return list(range(2, 2 + round(vocabulary / mean_length))) if mean_length else []
