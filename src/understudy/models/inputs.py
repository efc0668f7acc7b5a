"""Model inputs of a batch: padded, packed into one row, after a soft prompt, with further inputs such as images.

Shapes: B sequences, T positions, m tokens of a soft prompt, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch, Example
from .adapters import without_adapters

# Families of models that keep packed sequences apart. In others recurrent states run on from one sequence to the next,
# or position ids reach neither mask nor kernel (flex_attention in OPT and GPT-OSS, FlashAttention in GPT-BigCode).
# fmt: off
PACKABLE = {
    "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2",
    "gpt_neox", "granite", "helium", "llama", "ministral", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "phi",
    "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
}
# fmt: on


def model_inputs(model: Any, batch: Batch, soft_prompt: Tensor | None = None) -> tuple[dict[str, Any], Tensor]:
    """The keyword arguments of the model's forward, and which of its positions predict a response token, (B, T) bool.

    Padding is on the right, so the model's own position ids are right: a soft prompt has the first ones. Where
    `can_pack`, padding is left out: all sequences are in one row (1, ΣT), separated by position ids that restart with
    each.

    Args:
        soft_prompt: (m, D) embeddings before every sequence.
    """
    name, tokens, mask, predicts = "input_ids", batch.input_ids, batch.attention_mask, batch.predicts
    if soft_prompt is not None:
        embeddings = model.get_input_embeddings()(batch.input_ids)
        rows, length = len(embeddings), len(soft_prompt)
        prompts = soft_prompt.to(embeddings.dtype).expand(rows, -1, -1)
        name, tokens = "inputs_embeds", torch.cat([prompts, embeddings], dim=1)
        mask = torch.cat([mask.new_ones(rows, length), mask], dim=1)
        predicts = torch.cat([predicts.new_zeros(rows, length), predicts], dim=1)
    further = further_inputs(batch.examples, batch.input_ids.device)
    if can_pack(model) and not further:
        real = mask.bool()
        position_ids = (mask.cumsum(-1) - 1)[real][None]
        return {name: tokens[real][None], "position_ids": position_ids, "use_cache": False}, predicts[real][None]
    return {name: tokens, "attention_mask": mask, "use_cache": False, **further}, predicts


def further_inputs(examples: Sequence[Example], device: torch.device | str) -> dict[str, Tensor]:
    """The examples' `inputs`, such as pixel_values, joined along their first dimension.

    Raises:
        ValueError: if some examples have an input that others do not have.
    """
    names = {name for example in examples for name in example.inputs}
    for name in sorted(names):
        missing = [example.row for example in examples if name not in example.inputs]
        if missing:
            raise ValueError(
                f'the example of row {missing[0]} has no input "{name}", which other examples of its batch have: give '
                "every example the same inputs"
            )
    return {name: torch.cat([torch.as_tensor(e.inputs[name]) for e in examples]).to(device) for name in sorted(names)}


def can_pack(model: Any) -> bool:
    """Can sequences be packed into one row? Only if the attention separates them, in the model families of PACKABLE."""
    inner = without_adapters(model)
    config: Any = getattr(inner, "config", None)
    if getattr(config, "model_type", None) not in PACKABLE:
        return False
    from_transformers = any(kind.__module__.startswith("transformers.models.") for kind in type(inner).__mro__)
    attention = config._attn_implementation or ""
    separates = attention == "flex_attention" or ("flash" in attention and not attention.startswith("paged|"))
    adapter = getattr(model, "active_peft_config", None)  # some adapters drop position ids, or look up tokens by row
    needs_rows = any(getattr(adapter, name, None) for name in ("is_prompt_learning", "alora_invocation_tokens"))
    return from_transformers and separates and not needs_rows
