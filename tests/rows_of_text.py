"""Tokenizers of a few hundred tokens with and without chat templates, and rows to tokenize."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The understudy learns the part of the star.",
    "Question: What is two plus two?\nAnswer: four",
    "Translate into German: I like cake. Ich mag Kuchen.",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% elif m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


def byte_level(*, bos: bool = False, eos: bool = False, chat: str | None = None, **specials) -> PreTrainedTokenizerFast:
    """A byte-level BPE as GPT-2's, with one token that is both end and padding; perhaps a post-processor."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", "<s>", "<|im_start|>", "<|im_end|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=names, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    if bos or eos:
        single = f"{'<s> ' if bos else ''}$A{' <|endoftext|>' if eos else ''}"
        tokens = [(name, backend.token_to_id(name)) for name in ("<s>", "<|endoftext|>")]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    specials = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", **specials}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", **specials)
    tokenizer.chat_template = chat
    return tokenizer


def write(path: Path, *rows) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def texts(tokenizer, example) -> tuple[str, str]:
    return tokenizer.decode(example.prompt), tokenizer.decode(example.response)


PAIR = {"prompt": "Two plus two?", "completion": " four"}
LONG = {"prompt": "The understudy learns the part. What is two plus two?", "completion": " It is four, as all know."}
STORY = "".join(f"The star learns part {number}.\nAnd so on.\n\n" for number in range(40))
