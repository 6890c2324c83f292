"""Build small models of every causal type of transformers, of two to four layers with random weights.

Most configurations share the names of their sizes, which are set by `SMALL`. Types that need more settings are in
`SPECIAL`. Settings that multiply, cap or scale get values that change the logits, so that code which ignores them
computes wrong logits, and windows are shorter than the measured rows.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 320
WINDOW = 8
LAYERS = 4

SIZES = (
    (VOCABULARY, "vocab_size encoder_vocab_size"),
    (
        64,
        (
            "hidden_size d_model n_embd emb_dim dim embedding_size word_embed_proj_dim attention_hidden_size lru_width "
            "cross_attention_hidden_size"
        ),
    ),
    (
        128,
        (
            "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim ffn_hidden_size dff dim_ff "
            "intermediate_size_mlp shared_intermediate_size dense_intermediate_size prefix_dense_intermediate_size"
        ),
    ),
    (
        64,
        (
            "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
            "shared_experts_intermediate_size moe_shared_expert_intermediate_size"
        ),
    ),
    (
        LAYERS,
        (
            "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
            "num_encoder_layers"
        ),
    ),
    (
        4,
        (
            "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
            "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads linear_num_heads"
        ),
    ),
    (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads"),
    (
        16,
        (
            "head_dim swa_head_dim dim_head kv_channels attention_head_dim qk_nope_head_dim v_head_dim "
            "linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim"
        ),
    ),
    (8, "qk_rope_head_dim rotary_dim"),
    (16, "kv_lora_rank q_lora_rank o_lora_rank"),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (2, "num_experts_per_tok moe_topk moe_k num_experts_per_token top_k_experts"),
    (
        1,
        (
            "n_group topk_group num_expert_group n_shared_experts num_shared_experts first_k_dense_replace "
            "num_dense_layers num_nextn_predict_layers"
        ),
    ),
    (
        256,
        (
            "max_position_embeddings n_positions n_ctx model_max_length max_seq_len max_sequence_length "
            "max_target_positions"
        ),
    ),
    (4, "linear_num_key_heads linear_num_value_heads index_n_heads mamba_num_heads"),
    (
        WINDOW,
        "sliding_window sliding_window_size window_size attention_window_size attention_chunk_size local_attention",
    ),
)
"""Size, and the settings that have it."""
SMALL: dict[str, Any] = {
    **{name: size for size, names in SIZES for name in names.split()},
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "state_size": 16,
    "chunk_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_random_blocks": 1,
    "block_size": 4,
    "use_cache": True,
}
SCALES = {
    "logits_scaling": 1.7,
    "embedding_multiplier": 1.3,
    "residual_multiplier": 0.8,
    "logit_scale": 0.6,
    "final_logit_softcapping": 3.0,
    "logits_soft_cap": 3.0,
    "lm_head_multiplier": 0.7,
    "key_multiplier": 0.9,
    "attention_in_multiplier": 0.9,
    "attention_out_multiplier": 0.8,
    "ssm_in_multiplier": 0.9,
    "ssm_out_multiplier": 0.8,
    "attention_multiplier": 0.2,
    "output_logit_soft_cap": 3.0,
    "logits_mup_width_multiplier": 1.5,
    "routed_scaling_factor": 1.4,
}
"""Values other than the neutral ones."""
DROPOUT = re.compile("dropout|_pdrop|layerdrop|jitter")
MAMBA_HYBRID = ["linear_attention", "hybrid"] * 2
HYBRID = ["linear_attention", "full_attention"] * 2
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": HYBRID, "layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "longcat_flash": {"zero_expert_num": 4},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "nemotron_h": {"n_groups": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [128] * 4,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "gemma4_text": {
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "num_kv_shared_layers": 0,
        "global_head_dim": 16,
    },
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCABULARY},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 16]},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32, "layers_block_type": MAMBA_HYBRID},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "layers_block_type": MAMBA_HYBRID},
    "zaya": {"num_experts_per_tok": 1},
}


def choose_small_values(defaults: dict[str, Any]) -> dict[str, Any]:
    """Return small values for the settings that a configuration has. A list of layers' kinds keeps one of each kind.

    Args:
        defaults: all settings of the configuration.
    """
    scalars = {
        name: value
        for name, value in {**SMALL, **SCALES}.items()
        if name in defaults and not isinstance(defaults[name], list | dict)
    }
    values = {name: value for name, value in scalars.items() if name not in SCALES or defaults[name] is not None}
    values |= {name: 0.0 for name, value in defaults.items() if isinstance(value, float) and DROPOUT.search(name)}
    for name, value in defaults.items():
        if isinstance(value, list) and len(value) > LAYERS and all(isinstance(kind, str) for kind in value):
            values[name] = (list(dict.fromkeys(value)) * LAYERS)[:LAYERS]
    if "qk_rope_head_dim" in defaults:  # latent attention has as many heads of keys as of queries
        values["num_attention_heads"] = 4
        values["num_key_value_heads"] = 4
        values["head_dim"] = values["qk_rope_head_dim"]
    return values


def build_small_config(model_type: str, **changes: Any) -> Any:
    """Return a small configuration of a type.

    Args:
        changes: settings that replace others. In a type of several models they are the text model's.
    """
    config_class = CONFIG_MAPPING[model_type]
    special = dict(SPECIAL.get(model_type, {}))
    defaults = config_class(**special.pop("_needs", {})).to_dict()
    text_defaults = defaults.get("text_config")
    if isinstance(text_defaults, dict):
        text_type = text_defaults.get("model_type")
        text_values = choose_small_values(text_defaults) | SPECIAL.get(text_type, {}) | special | changes
        return config_class(text_config={**text_values, "model_type": text_type})
    return config_class(**(choose_small_values(defaults) | special | changes))


@torch.no_grad()
def save_small_model(config: Any, folder: Path, seed: int = 0) -> None:
    """Save a model with random weights in which no two tokens are alike and no bias is zero."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(4)
        parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)


ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
    {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64},
)
LONG_CONTEXT_TYPES = (
    "llama",
    "mistral",
    "ministral3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "olmo2",
    "granite",
    "smollm3",
    "phi3",
    "seed_oss",
)
"""Types whose checkpoints often have a longer context than that of their pretraining."""
FLAGS: dict[str, tuple[dict[str, Any], ...]] = {
    "llama": ({"attention_bias": True}, {"mlp_bias": True, "attention_bias": True}),
    "mistral": ({"sliding_window": None},),
    "mixtral": ({"sliding_window": None},),
    "qwen2": ({"use_sliding_window": True, "max_window_layers": 2},),
    "qwen3": ({"use_sliding_window": True, "max_window_layers": 2}, {"attention_bias": True}),
    "phi3": ({"sliding_window": None},),
    "gemma2": ({"final_logit_softcapping": None}, {"attn_logit_softcapping": None}),
    "olmo": ({"clip_qkv": 8.0},),
    "starcoder2": ({"sliding_window": 8},),
    "gpt_neox": ({"use_parallel_residual": False}, {"attention_bias": False}),
    "stablelm": ({"use_qkv_bias": True}, {"use_qkv_bias": True, "use_parallel_residual": True}),
    "falcon": ({"new_decoder_architecture": True}, {"multi_query": False, "bias": True}, {"alibi": True}),
    "cohere": ({"use_qk_norm": True},),
}
"""Further settings in which checkpoints of a type differ. They are combined with each scaling of positions, and with
tied and untied embeddings."""


def build_variants(model_type: str, path: str) -> list[dict[str, Any]]:
    """Return further settings of a type that are worth proving, each as changes of `build_small_config`.

    Args:
        path: of the type. Only the fast path has variants: a checkpoint on the plain path loses little.
    """
    if path != "fast":
        return []
    config = build_small_config(model_type)
    rope = getattr(config, "rope_parameters", None)
    rope_changes: list[dict[str, Any]] = [{}]
    if (
        model_type in LONG_CONTEXT_TYPES
        and isinstance(rope, dict)
        and rope.get("rope_type") == "default"
        and "partial_rotary_factor" not in rope
    ):
        rope_changes += [{"rope_parameters": dict(scaling)} for scaling in ROPES]
    is_tied = bool(getattr(config, "tie_word_embeddings", True))
    tie_changes: list[dict[str, Any]] = [{}, {"tie_word_embeddings": not is_tied}]
    flag_changes: list[dict[str, Any]] = [{}, *FLAGS.get(model_type, ())]
    variants = [
        tie_change | flag_change | rope_change
        for tie_change in tie_changes
        for flag_change in flag_changes
        for rope_change in rope_changes
    ]
    return [changes for changes in variants if changes]
