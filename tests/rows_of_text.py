"""Tokenizers of a few hundred tokens with and without chat templates, and rows to tokenize."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
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

MIXED = [*SENTENCES, "Naïve café 🎉🎉 in 東京, 東京 and 京都.", "the parts of the stars, the part, two parts"]


def sentencepiece(sentences=MIXED, size=120) -> PreTrainedTokenizerFast:
    """A BPE as Llama 2's: a space is ▁, one is put before a text, and bytes stand in for unknown characters."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(sentences, trainers.BpeTrainer(vocab_size=size, min_frequency=2, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    common = [token for token in model["vocab"] if token not in "🎉都"]  # these are written as bytes
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *common]
    merges = [tuple(pair) for pair in model["merges"] if set("".join(pair)).isdisjoint("🎉都")]
    vocabulary = {name: i for i, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


def wordpiece(sentences=MIXED, lowercase=False) -> PreTrainedTokenizerFast:
    """A WordPiece as BERT's: ## marks the tokens that continue a word, and white space is not written."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[SEP]"]
    backend.train_from_iterator(
        sentences, trainers.WordPieceTrainer(vocab_size=160, special_tokens=special, show_progress=False)
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
