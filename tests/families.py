"""Tiny random models of the families of transformers, from one table: for tests that every family must pass.

A family is a `model_type` with what its configuration needs beyond `SHAPE`. Where a family has settings for each layer
or each few layers, they are such that the layers differ.
"""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCABULARY = 64
LAYERS = 3

SHAPE: dict[str, Any] = {  # a configuration gets those that it has
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 4,
    "tie_word_embeddings": False,
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # encoder-decoder families, and others with names of their own
    "decoder_layers": LAYERS,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "ffn_dim": 32,
    "n_inner": 32,
    "word_embed_proj_dim": 16,
    "rotary_dim": 4,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    # latent attention
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    # recurrent layers
    "mamba_d_state": 4,
    "mamba_d_head": 8,
    "mamba_n_heads": 4,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "state_size": 4,
    "num_heads": 4,
    "n_groups": 1,
    "expand": 2,
    "time_step_rank": 2,
}

_LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 1, **_SLIDING},
    "apertus": {},
    "arcee": {},
    "aria_text": {},
    "bamba": {"attn_layer_indices": [1]},
    "bart": {},
    "bert": {},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"num_attention_heads": 4},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {**_SLIDING, "logit_scale": 0.5},
    "cohere2_moe": {"logit_scale": 0.5},
    "cwm": _SLIDING,
    "deepseek_v2": {"first_k_dense_replace": 1},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "diffllama": {},
    "doge": {},
    "dots1": {"first_k_dense_replace": 1, "n_shared_experts": 1},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": _SLIDING,
    "exaone_moe": {},
    "falcon": {},
    "falcon_h1": {"mamba_d_ssm": 32},
    "falcon_mamba": {},
    "flex_olmo": {},
    "gemma": {},
    "gemma2": _SLIDING,
    "gemma3_text": _SLIDING,
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 4,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "intermediate_size": [32, 32, 32, 32],
    },
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 4,
        "global_head_dim": 8,
        "num_kv_shared_layers": 0,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": {"first_k_dense_replace": 1},
    "glm4_moe_lite": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local", "local"], 1]], "window_size": 4},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gpt_oss": _SLIDING,
    "gptj": {},
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": {"shared_intermediate_size": 32, "layer_types": ["mamba", "attention", "mamba"]},
    "granitemoeshared": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hyperclovax": {},
    "jais2": {},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "jetmoe": {},
    "laguna": {},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "llama": {},
    "llama4_text": {"intermediate_size_mlp": 32, "no_rope_layers": [1, 0, 1], "moe_layers": [1]},
    "mamba": {},
    "mamba2": {},
    "minicpm3": {},
    "minimax": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "minimax_m2": {},
    "ministral": _SLIDING,
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "modernbert-decoder": _SLIDING,
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": _SLIDING,
    "olmo_hybrid": _LINEAR,
    "olmoe": {},
    "openai-gpt": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {**_SLIDING, "use_sliding_window": True},
    "qwen2_moe": {"decoder_sparse_step": 2},
    "qwen3": {},
    "qwen3_5_text": _LINEAR,
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_next": {**_LINEAR, "mlp_only_layers": [0]},
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"]},
    "rwkv": {},
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": _SLIDING,
    "xglm": {},
    "youtu": {},
    "zamba": {},
}


def configuration(family: str, **changes: Any) -> Any:
    """The configuration of a tiny model of a family, with further fields changed."""
    kind: Any = CONFIG_MAPPING[family]
    default = kind()
    known = {*default.to_dict(), *default.attribute_map}
    return kind(**{**{name: value for name, value in SHAPE.items() if name in known}, **FAMILIES[family], **changes})


def model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of a family in evaluation mode, float32; the same for the same arguments.

    Its matrices are much larger than a new model's, so that its distributions differ from uniform.
    """
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(configuration(family, **changes), dtype="float32").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1 and not any(word in name for word in ("norm", "ln_", "A_log", "conv")):
                parameter.normal_(0, 0.3, generator=generator)
    return made


def probe(rows: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Token ids (rows, length) without special tokens."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
