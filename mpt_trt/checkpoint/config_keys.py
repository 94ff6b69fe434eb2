"""Keys of `config.json` by their effect: used, without effect on inference, or limited.

Sources: those of `config_families`; transformers' `configuration_utils.py`.
"""

from __future__ import annotations


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Names of sizes in transformers' attribute_map; files contain them when people add them.
ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
}
# Attributes of transformers' PretrainedConfig, in files of every family; releases before 4.35
# repeat them in attn_config. None of them affects logits.
GENERIC_KEYS = _keys(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _from_model_config
    _name_or_path add_cross_attention architectures attn_implementation bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label is_decoder
    is_encoder_decoder label2id length_penalty max_length min_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p use_bfloat16 use_cache
    """
)
# Keys that matter only in training, or select an implementation of the same mathematics.
NO_EFFECT = _keys(
    """
    attn_impl attn_pdrop attn_uses_sequence_id auto_map custom_pipelines emb_init_std
    emb_init_uniform_lim emb_pdrop embedding_fraction fan_mode init_config init_device
    init_div_is_residual init_gain init_nonlinearity init_std initializer_range loss_fn
    name param_init_fn resid_pdrop tokenizer_name use_pad_tok_in_ffn verbose
    """
)
NO_EFFECT_IN_ATTENTION = _keys(
    """
    attn_impl attn_pdrop attn_uses_sequence_id seq_parallel_world_size
    """
)
# Keys with their supported values, and the feature that other values request.
LIMITED: dict[str, tuple[tuple[object, ...], str]] = {
    "attn_config.attn_logit_softcapping": ((None,), "soft-capped attention"),
    "attn_config.flex_attn_mod_list": ((None, []), "modified attention"),
    "attn_config.fused_qkv": ((True,), "separate matrices for Q, K and V"),
    "attn_config.kv_dim": ((None,), "cross attention"),
    "attn_config.prefix_lm": ((None, False), "a prefix with attention in both directions"),
    "attn_config.qk_gn": ((None, False), "group norms of Q and K"),
    "attn_config.reuse_kv_layer_idx": ((None,), "a KV cache shared by layers"),
    "attn_config.sliding_window_size": ((None, -1, 0), "a sliding window"),
    "block_overrides": ((None, {}), "per-block overrides"),
    "fc_type": (
        (None, "torch", "te", {}, {"name": "torch"}, {"name": "te"}),
        "other linear layers",
    ),
    "ffn_config.ffn_type": (("mptmlp",), "another feed-forward layer than 'mptmlp'"),
    "ffn_config.fc_type": ((None, "torch", {"name": "torch"}), "other linear layers"),
    "final_logit_softcapping": ((None,), "soft-capped logits"),
    "moe_num_experts": ((None, False, 0), "mixture of experts"),
    "residual_modification": ((None,), "a modified residual"),
}
USED = _keys(
    """
    attn_config d_model expansion_ratio ffn_config layer_norm_epsilon learned_pos_emb logit_scale
    max_seq_len n_heads n_layers no_bias norm_eps norm_type quantization_config
    residual_coeff vocab_size
    """
)
USED_IN_ATTENTION = _keys(
    """
    alibi alibi_bias_max attn_type clip_qkv kv_n_heads norm_eps norm_type qk_ln rope
    rope_dail_config rope_hf_config rope_impl rope_theta softmax_scale
    """
)
USED_IN_FEED_FORWARD = frozenset({"ffn_act_fn", "ffn_hidden_size"})
TOP_LEVEL_KEYS = USED | NO_EFFECT | GENERIC_KEYS | ALIASES.keys()
ATTENTION_KEYS = USED_IN_ATTENTION | NO_EFFECT_IN_ATTENTION | GENERIC_KEYS
# Values that show that an unknown key is not used.
ABSENT: tuple[object, ...] = (None, False, 0, -1, "", [], {})
