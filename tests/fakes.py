"""Stand-ins for tests: tiny random models, examples, a tokenizer, teachers without a model, a scripted rollout.

There is a model for every way in which logits are computed: plain, with a bias, soft-capped, divided, multiplied, with
adapters, with the head tied to the embeddings or not. Weights are much larger than a new model's, so that distributions
differ from uniform and caps and scales matter.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput

from understudy.batch import Author, Batch, Example
from understudy.fused_linear.distributions import Dense
from understudy.fused_linear.merged import TopK
from understudy.rollout import Rollout, Writer, with_response
from understudy.sampling import Sampling
from understudy.scores import Scores
from understudy.step import Step
from understudy.teacher import Capability, Teacher

VOCABULARY = 53


def tiny(kind: str, vocabulary: int = VOCABULARY, width: int = 16, tied: bool = False, seed: int = 0) -> Any:
    """A random model of one kind in `KINDS`, in evaluation mode, float32; the same for the same arguments."""
    torch.manual_seed(seed)
    model = KINDS[kind](vocabulary, width, tied)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "ln_" not in name:
                parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def _shape(vocabulary: int, width: int, tied: bool) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": width // 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _gpt2(vocabulary: int, width: int, tied: bool) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=width,
        n_layer=1,
        n_head=2,
        n_positions=64,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        attn_pdrop=0.1,
    )
    return GPT2LMHeadModel(config)


def _opt(vocabulary: int, width: int, tied: bool) -> PreTrainedModel:
    shape = _shape(vocabulary, width, tied)
    return OPTForCausalLM(OPTConfig(**shape, ffn_dim=2 * width, word_embed_proj_dim=width))


def _lora(base: str, vocabulary: int, width: int, tied: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(KINDS[base](vocabulary, width, tied), config)


KINDS: dict[str, Callable[[int, int, bool], Any]] = {
    "llama": lambda *a: LlamaForCausalLM(LlamaConfig(**_shape(*a))),
    "gpt2": _gpt2,
    "qwen3": lambda *a: Qwen3ForCausalLM(Qwen3Config(**_shape(*a))),
    "opt": _opt,
    "phi": lambda *a: PhiForCausalLM(PhiConfig(**_shape(*a))),  # a bias in the head
    "gemma2": lambda *a: Gemma2ForCausalLM(Gemma2Config(**_shape(*a), final_logit_softcapping=3.0)),
    "granite": lambda *a: GraniteForCausalLM(GraniteConfig(**_shape(*a), logits_scaling=2.5)),
    "cohere": lambda *a: CohereForCausalLM(CohereConfig(**_shape(*a), logit_scale=0.4)),
    "cohere2": lambda *a: Cohere2ForCausalLM(Cohere2Config(**_shape(*a), logit_scale=0.4)),
    "llama+lora": lambda *a: _lora("llama", *a),
    "cohere+lora": lambda *a: _lora("cohere", *a),
}


class Forgetful(nn.Module):
    """A model that keeps no cache."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny("llama")
        self.config = self.inner.config

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.inner(input_ids, attention_mask=attention_mask).logits)


class Tabular(nn.Module):
    """A model whose next-token logits are a table of the whole prefix: anything can be enumerated with it.

    `table` maps the tokens so far to the row of `logits` that predicts the next one.
    """

    def __init__(self, table: dict[tuple[int, ...], Tensor]) -> None:
        super().__init__()
        self.rows = {prefix: row for row, prefix in enumerate(table)}
        self.logits = nn.Parameter(torch.stack(list(table.values())))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> CausalLMOutput:
        prefixes = [[tuple(ids[: end + 1]) for end in range(len(ids))] for ids in input_ids.tolist()]
        index = torch.tensor([[self.rows.get(prefix, 0) for prefix in row] for row in prefixes])
        return CausalLMOutput(logits=self.logits[index])


def some_examples(vocabulary: int = VOCABULARY, seed: int = 0) -> list[Example]:
    """Three examples of different lengths, one of them with a response of a single token."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=generator).tolist()

    return [
        Example(ids(3), [*ids(4), 2], row=0),
        Example(ids(6), [2], author="student", row=1),
        Example(ids(2), [*ids(7), 2], author="teacher", row=2),
    ]


def words(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocabulary` words, cut at spaces: <pad> is 0, <bos> 1, <eos> 2, as in `tiny`, <unk> 3, w4 4."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(4, vocabulary))]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def ragged_examples(
    count: int = 16, vocabulary: int = VOCABULARY, seed: int = 0, responses: bool = True
) -> list[Example]:
    """Examples with prompts of 1 to 6 and responses of 1 to 9 tokens, rows numbered; or prompts only."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(4, vocabulary, (length,), generator=generator).tolist()

    examples = [Example(ids(1, 7), [*ids(0, 9), 2], row=row) for row in range(count)]
    return examples if responses else [replace(example, response=[]) for example in examples]


class BigramTeacher(Teacher):
    """A teacher without a model: the next token depends on the previous one, by a random table."""

    provides: ClassVar[frozenset[Capability]] = frozenset({Capability.CHOSEN, Capability.TOP_K, Capability.FULL})

    def __init__(self, vocabulary: int = VOCABULARY, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(vocabulary, vocabulary, generator=generator).log_softmax(-1)

    def score(self, batch: Batch) -> Scores:
        read = batch.as_read_by_teacher()
        return Scores(batch.tokens, Dense(self.table[read.input_ids[read.predicts]]))


class TopKTeacher(Teacher):
    """A teacher that reports the K likeliest tokens of `BigramTeacher` and the log-probability of the chosen one."""

    provides: ClassVar[frozenset[Capability]] = frozenset({Capability.CHOSEN, Capability.TOP_K})

    def __init__(self, k: int = 5) -> None:
        self.k, self.teacher = k, BigramTeacher()

    def score(self, batch: Batch) -> Scores:
        scores = self.teacher.score(batch)
        return replace(scores, distribution=TopK(*scores.log_probs.topk(self.k), scores.chosen))


class TopKOnlyTeacher(Teacher):
    """A teacher that reports the K likeliest tokens of `BigramTeacher`, whichever was chosen."""

    provides: ClassVar[frozenset[Capability]] = frozenset({Capability.TOP_K})

    def __init__(self, k: int = 5) -> None:
        self.k, self.teacher = k, BigramTeacher()

    def score(self, batch: Batch) -> Scores:
        scores = self.teacher.score(batch)
        return replace(scores, distribution=TopK(*scores.log_probs.topk(self.k)))


class ChosenTeacher(Teacher):
    """A teacher that reports the log-probability of the chosen token only: the top K of no tokens."""

    provides: ClassVar[frozenset[Capability]] = frozenset({Capability.CHOSEN})

    def __init__(self) -> None:
        self.teacher = BigramTeacher()

    def score(self, batch: Batch) -> Scores:
        scores = self.teacher.score(batch)
        return replace(scores, distribution=TopK(*scores.log_probs.topk(0), scores.chosen))


@dataclass
class ScriptedRollout(Rollout):
    """A rollout without a model: tokens are drawn evenly from eight, by the stream that belongs to the response."""

    stop: int = 2
    author: Author = "student"
    calls: list[int] = field(default_factory=list)  # the number of prompts of each call, of all bound ones together

    def bind(self, model: Any, tokenizer: Any, author: Author = "student") -> "ScriptedRollout":
        return replace(self, author=author)

    def generate(self, prompts: Sequence[Example], sampling: Sampling, step: Step) -> list[Example]:
        self.calls.append(len(prompts))
        turns: dict[int, int] = {}
        responses = []
        for prompt in (prompt for prompt in prompts for _ in range(sampling.n)):
            turn = turns[prompt.row] = turns.get(prompt.row, -1) + 1
            draws = step.stream(sampling.max_new_tokens, self.author, prompt.row, turn)
            tokens = [self.stop + int(draw * 8) for draw in draws]
            end = tokens.index(self.stop) + 1 if self.stop in tokens else len(tokens)
            streams = {"sampled_logprob": [-math.log(8)] * end} if sampling.logprobs else {}
            responses.append(with_response(prompt, tokens[:end], self.author, self.stop not in tokens, streams))
        return responses


def writer(engine: type[Rollout], model: Any, author: Author = "student", **options: Any) -> Writer:
    """A rollout of this class bound to `model` and the tokenizer `words`; `options` are the engine's and Sampling's."""
    names = {field.name for field in fields(Sampling)}
    engine_options = {name: value for name, value in options.items() if name not in names}
    sampling = Sampling(**{name: value for name, value in options.items() if name in names})
    return Writer(engine(**engine_options).bind(model, words(), author), sampling)
