"""Tiny configurations of the decoder-only families of transformers, and the ones that are refused.

Every family that a test builds is here, once. ``python -m tests.test_families`` has the page of what works made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from lm_eval_adainfer.errors import AdaInferError

_LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_GPT2_LIKE = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 128}
_HEADS = {**_LLAMA_LIKE, "head_dim": 8}
_SLIDING = {**_HEADS, "sliding_window": 4}
_MOE = {**_HEADS, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {**_HEADS, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
           "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
_LATENT = {**_LLAMA_LIKE, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
           "qk_rope_head_dim": 8, "v_head_dim": 8}
_LATENT_MOE = {**_ROUTED, **_LATENT, "head_dim": 8}
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
          "layer_types": ["linear_attention", "full_attention"] * 2 + ["linear_attention"]}
_MAMBA2 = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
_CONV = {"layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"]}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
           "image_size": 8, "patch_size": 4}
_BERT_LIKE = {k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"}
_BART_LIKE = {"d_model": 32, "decoder_layers": 5, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
              "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}

# name -> (model_type, config); alibi, parallel blocks, fused QKV, sliding windows, soft-caps, experts, projections
SUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    # attention and a feed-forward part, in one form or another
    "llama": ("llama", _LLAMA_LIKE),
    "llama-odd-heads": ("llama", {**_LLAMA_LIKE, "hidden_size": 36, "num_attention_heads": 5, "num_key_value_heads": 1,
                                  "head_dim": 6}),
    "llama-tied": ("llama", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_LLAMA_LIKE, "sliding_window": 4}),
    "ministral": ("ministral", _SLIDING),
    "ministral3": ("ministral3", _HEADS),
    "qwen2": ("qwen2", {**_LLAMA_LIKE, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    "qwen3": ("qwen3", _HEADS),
    "gemma": ("gemma", _HEADS),
    "gemma2": ("gemma2", _SLIDING),
    "gemma3": ("gemma3_text", _SLIDING),
    "gemma4": ("gemma4_text", {**_SLIDING, "global_head_dim": 16, "hidden_size_per_layer_input": 8,
                               "vocab_size_per_layer_input": 257, "num_kv_shared_layers": 0}),
    "gemma4-shared-kv": ("gemma4_text", {**_SLIDING, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2,
                                         "vocab_size_per_layer_input": 257, "layer_types": [
                                             "sliding_attention", "full_attention", "sliding_attention",
                                             "sliding_attention", "full_attention"]}),
    "vaultgemma": ("vaultgemma", _SLIDING),
    "phi": ("phi", _LLAMA_LIKE),
    "phi3": ("phi3", {**_LLAMA_LIKE, "pad_token_id": 0}),
    "opt": ("opt", {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
                    "word_embed_proj_dim": 32, "max_position_embeddings": 128}),
    "opt-post-norm-projected": ("opt", {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 5,
                                        "num_attention_heads": 4, "word_embed_proj_dim": 16,
                                        "do_layer_norm_before": False, "max_position_embeddings": 128}),
    "gpt2": ("gpt2", _GPT2_LIKE),
    "gptj": ("gptj", {**_GPT2_LIKE, "rotary_dim": 4}),
    "gpt_neo": ("gpt_neo", {"hidden_size": 32, "num_layers": 5, "num_heads": 4, "max_position_embeddings": 128,
                            "window_size": 4, "attention_types": [[["global", "local"], 2], [["global"], 1]]}),
    "gpt_neox": ("gpt_neox", _LLAMA_LIKE),
    "gpt_neox_japanese": ("gpt_neox_japanese", {**_BERT_LIKE, "intermediate_multiple_size": 2}),
    "codegen": ("codegen", {**_GPT2_LIKE, "rotary_dim": 4}),
    "gpt_bigcode": ("gpt_bigcode", _GPT2_LIKE),
    "falcon": ("falcon", {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4}),
    "falcon-alibi": ("falcon", {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4, "alibi": True,
                                "multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon-new-decoder": ("falcon", {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4,
                                      "new_decoder_architecture": True, "num_kv_heads": 2}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 5, "n_head": 4}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 5, "n_heads": 4, "max_seq_len": 128}),
    "stablelm": ("stablelm", {**_LLAMA_LIKE, "use_parallel_residual": True, "qk_layernorm": True}),
    "olmo": ("olmo", _LLAMA_LIKE),
    "olmo2": ("olmo2", _LLAMA_LIKE),
    "olmo3": ("olmo3", _SLIDING),
    "cohere": ("cohere", {**_LLAMA_LIKE, "logit_scale": 0.25}),
    "cohere2": ("cohere2", {**_SLIDING, "logit_scale": 0.25}),
    "granite": ("granite", {**_LLAMA_LIKE, "logits_scaling": 8.0, "embedding_multiplier": 3.0,
                            "residual_multiplier": 0.5, "attention_multiplier": 0.2}),
    "smollm3": ("smollm3", {**_LLAMA_LIKE, "no_rope_layer_interval": 2, "pad_token_id": 0}),
    "starcoder2": ("starcoder2", {**_LLAMA_LIKE, "sliding_window": 4}),
    "glm": ("glm", {**_HEADS, "pad_token_id": 0}),
    "glm4": ("glm4", {**_HEADS, "pad_token_id": 0}),
    "nemotron": ("nemotron", _HEADS),
    "persimmon": ("persimmon", {k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"}),
    "arcee": ("arcee", _HEADS),
    "apertus": ("apertus", _LLAMA_LIKE),
    "ernie4_5": ("ernie4_5", _HEADS),
    "exaone4": ("exaone4", {**_SLIDING, "sliding_window_pattern": "LLG"}),
    "helium": ("helium", _HEADS),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", _HEADS),
    "seed_oss": ("seed_oss", _HEADS),
    "xglm": ("xglm", {"d_model": 32, "num_layers": 5, "attention_heads": 4, "ffn_dim": 48,
                      "max_position_embeddings": 128}),
    "biogpt": ("biogpt", {k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"}),
    "cwm": ("cwm", _SLIDING),
    "diffllama": ("diffllama", _HEADS),
    "minicpm3": ("minicpm3", _LATENT),
    "nanochat": ("nanochat", _HEADS),
    "bitnet": ("bitnet", _LLAMA_LIKE),
    "modernbert-decoder": ("modernbert-decoder", {**_BERT_LIKE, "local_attention": 8}),
    "ctrl": ("ctrl", {"n_embd": 32, "dff": 48, "n_layer": 5, "n_head": 4, "n_positions": 128}),
    "bert-decoder": ("bert", {**_BERT_LIKE, "is_decoder": True}),
    # experts
    "mixtral": ("mixtral", {**_LLAMA_LIKE, "num_local_experts": 4}),
    "qwen2_moe": ("qwen2_moe", {**_MOE, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("qwen3_moe", _MOE),
    "phimoe": ("phimoe", {**_LLAMA_LIKE, "num_local_experts": 4, "sliding_window": 4}),
    "olmoe": ("olmoe", {**_LLAMA_LIKE, "num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": ("granitemoe", {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoeshared": ("granitemoeshared", {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2,
                                              "shared_intermediate_size": 16}),
    "deepseek_v2": ("deepseek_v2", _LATENT_MOE),
    "deepseek_v3": ("deepseek_v3", _LATENT_MOE),
    "dots1": ("dots1", _ROUTED),
    "glm4_moe": ("glm4_moe", _ROUTED),
    "gpt_oss": ("gpt_oss", {**_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "ernie4_5_moe": ("ernie4_5_moe", {**_HEADS, "moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2,
                                      "moe_layer_start_index": 1}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {**_HEADS, "num_experts": 4, "moe_topk": 2}),
    "minimax_m2": ("minimax_m2", {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "jetmoe": ("jetmoe", {"hidden_size": 32, "num_hidden_layers": 5, "num_key_value_heads": 2, "kv_channels": 8,
                          "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "dbrx": ("dbrx", {"d_model": 32, "n_heads": 4, "n_layers": 5, "max_seq_len": 128,
                      "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
                      "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}}),
    "llama4": ("llama4_text", {**_HEADS, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1,
                               "attention_chunk_size": 8, "interleave_moe_layer_step": 2, "pad_token_id": 0}),
    "flex_olmo": ("flex_olmo", {**_LLAMA_LIKE, "num_experts": 4, "num_experts_per_tok": 2}),
    "longcat_flash": ("longcat_flash", {**{k: v for k, v in _LATENT.items() if k != "num_hidden_layers"},
                                        "num_layers": 5, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16,
                                        "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "head_dim": 8}),
    # sparse attention: what a token may see is chosen by scores
    "deepseek_v32": ("deepseek_v32", {**_LATENT_MOE, "index_n_heads": 16, "index_head_dim": 16, "index_topk": 6}),
    "glm_moe_dsa": ("glm_moe_dsa", {**_LATENT_MOE, "index_n_heads": 16, "index_head_dim": 16, "index_topk": 6}),
    # the text part of models that see or hear
    "mllama": ("mllama_text_model", {**_LLAMA_LIKE, "num_hidden_layers": 6, "cross_attention_layers": [1]}),
    "emu3": ("emu3_text_model", {**_LLAMA_LIKE, "pad_token_id": 0}),
    "gemma3-images": ("gemma3", {"text_config": _SLIDING, "vision_config": _VISION, "mm_tokens_per_image": 4}),
    "mistral3-images": ("mistral3", {"text_config": {**_HEADS, "model_type": "mistral"},
                                     "vision_config": {**_VISION, "head_dim": 8, "model_type": "pixtral"}}),
    "llava-images": ("llava", {"text_config": {**_LLAMA_LIKE, "model_type": "llama"},
                               "vision_config": {**_VISION, "model_type": "clip_vision_model"}}),
    "qwen2_vl-images": ("qwen2_vl", {
        "text_config": {**_LLAMA_LIKE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                           "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}}),
    "qwen2_5_vl-images": ("qwen2_5_vl", {
        "text_config": {**_LLAMA_LIKE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                           "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": 1, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2,
                          "intermediate_size": 16}}),
    "smolvlm-images": ("smolvlm", {"text_config": {**_LLAMA_LIKE, "model_type": "llama"}, "vision_config": _VISION}),
    # recurrent states, alone or between attention
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 5}),
    "mamba2": ("mamba2", {"hidden_size": 32, "num_hidden_layers": 5, "num_heads": 4, "head_dim": 16, "state_size": 8,
                          "n_groups": 1}),
    "falcon_mamba": ("falcon_mamba", {"hidden_size": 32, "num_hidden_layers": 5, "state_size": 8}),
    "rwkv": ("rwkv", {"hidden_size": 32, "num_hidden_layers": 5, "attention_hidden_size": 32,
                      "context_length": 128}),
    "recurrent_gemma": ("recurrent_gemma", {**_LLAMA_LIKE, "lru_width": 32, "attention_window_size": 16,
                                            "num_key_value_heads": 1}),
    "bamba": ("bamba", {**_LLAMA_LIKE, **_MAMBA2, "attn_layer_indices": [1, 3]}),
    "jamba": ("jamba", {**_LLAMA_LIKE, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4,
                        "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False, "pad_token_id": 0}),
    "zamba2": ("zamba2", {**_LLAMA_LIKE, "num_key_value_heads": 4, "attention_head_dim": 16, "mamba_d_state": 8,
                          "mamba_headdim": 16, "n_mamba_heads": 4, "mamba_ngroups": 1, "adapter_rank": 4,
                          "layer_types": ["mamba", "hybrid", "mamba", "hybrid", "mamba"], "use_mem_eff_path": False}),
    "falcon_h1": ("falcon_h1", {**_HEADS, **_MAMBA2, "mamba_d_ssm": 64}),
    "granitemoehybrid": ("granitemoehybrid", {**_LLAMA_LIKE, **_MAMBA2, "num_local_experts": 4,
                                              "num_experts_per_tok": 2, "shared_intermediate_size": 16,
                                              "layer_types": ["mamba", "attention"] * 2 + ["mamba"]}),
    "nemotron_h": ("nemotron_h", {**_HEADS, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1,
                                  "ssm_state_size": 8, "n_routed_experts": 4, "moe_intermediate_size": 16,
                                  "moe_shared_expert_intermediate_size": 16, "num_experts_per_tok": 2,
                                  "layers_block_type": ["mamba", "attention", "moe", "mamba", "attention"]}),
    "qwen3_next": ("qwen3_next", {**_MOE, **_DELTA, "shared_expert_intermediate_size": 16}),
    "qwen3_5": ("qwen3_5_text", {**_HEADS, **_DELTA}),
    "olmo_hybrid": ("olmo_hybrid", {**_LLAMA_LIKE, **_DELTA, "pad_token_id": 0}),
    "lfm2": ("lfm2", {**_LLAMA_LIKE, **_CONV}),
    "minimax": ("minimax", {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 4,
                            "layer_types": ["linear_attention", "full_attention"] * 2 + ["linear_attention"]}),
    # attention without a cache that fits
    "openai-gpt": ("openai-gpt", _GPT2_LIKE),
    "trocr": ("trocr", {**_BART_LIKE, "is_decoder": True}),
}  # fmt: skip


class Refusal(NamedTuple):
    """A family that is refused: the config, and what the one sentence says."""

    kind: str
    values: dict[str, Any]
    sentence: str
    error: type[AdaInferError]
