"""The reference forward pass and the checkpoint maker, each against something not written here.

transformers has plain multi-head MPT only. For the rest its model is rebuilt from stock PyTorch
modules (`extended_transformers`): grouped K/V are repeated, and q and k normed, inside what
stands in for `Wqkv`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, MptConfig, MptForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from references import plain_mpt
from support.checkpoints import (
    SEEDED_SPECS,
    CheckpointSpec,
    config_dict,
    tensors,
    write_checkpoint,
    write_seeded_checkpoint,
)

TOLERANCE = 1e-5
MHA = CheckpointSpec()
GQA = CheckpointSpec(num_heads=6, num_kv_heads=2)

# Every one of these is computed by transformers as it is.
NATIVE = {
    "1 head": replace(MHA, num_heads=1),
    "3 heads": replace(MHA, num_heads=3),
    "4 heads": MHA,
    "6 heads": replace(MHA, num_heads=6),
    "clip_qkv": replace(MHA, clip_qkv=0.7),
    "softmax_scale": replace(MHA, softmax_scale=0.5),
    "large epsilon": replace(MHA, layer_norm_epsilon=0.1),
    "untied": replace(MHA, tie_word_embeddings=False),
    "layernorm": replace(MHA, norm_type="layernorm"),
    "1 layer, vocab 33": replace(MHA, num_layers=1, vocab_size=33),
}

EXTENDED = {
    "gqa": GQA,
    "mqa": replace(GQA, num_kv_heads=1),
    "biases": replace(MHA, no_bias=False),
    "gqa biases clip_qkv": replace(GQA, no_bias=False, clip_qkv=0.7),
    "qk_ln": replace(MHA, qk_ln=True),
    "qk_ln biases clip_qkv": replace(MHA, qk_ln=True, no_bias=False, clip_qkv=0.7),
    "gqa qk_ln, model epsilon not theirs": replace(GQA, qk_ln=True, layer_norm_epsilon=0.1),
    "alibi_bias_max": replace(MHA, num_heads=6, alibi_bias_max=16),
    "expansion_ratio 2": replace(MHA, expansion_ratio=2),
    "expansion_ratio 2.5": replace(MHA, expansion_ratio=2.5, no_bias=False),
    "logit_scale": replace(MHA, logit_scale=0.25),
    "logit_scale inv_sqrt_d_model": replace(MHA, logit_scale="inv_sqrt_d_model"),
    "learned positions": replace(MHA, alibi=False),
    "rmsnorm": replace(MHA, norm_type="rmsnorm", layer_norm_epsilon=0.1),
    "rmsnorm biases qk_ln": replace(
        MHA, norm_type="low_precision_rmsnorm", no_bias=False, qk_ln=True
    ),
    "everything": CheckpointSpec(
        hidden_size=60,
        num_heads=6,
        num_kv_heads=3,
        num_layers=3,
        vocab_size=101,
        expansion_ratio=1.5,
        no_bias=False,
        tie_word_embeddings=False,
        alibi_bias_max=5,
        clip_qkv=1.5,
        qk_ln=True,
        softmax_scale=0.4,
        logit_scale=2,
        layer_norm_epsilon=1e-3,
        seed=5,
    ),
}


def parametrize(specs: dict[str, CheckpointSpec]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("spec", specs.values(), ids=specs.keys())


def token_ids(spec: CheckpointSpec, seq_len: int = 23, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(spec.seed)
    return torch.randint(spec.vocab_size, (batch, seq_len), generator=generator)


def plain_logits(spec: CheckpointSpec, ids: Tensor) -> Tensor:
    return plain_mpt.forward(config_dict(spec), tensors(spec), ids)


def transformers_model(spec: CheckpointSpec) -> MptForCausalLM:
    model = MptForCausalLM(MptConfig(**config_dict(spec, "native"))).eval()
    loaded = model.load_state_dict(tensors(spec), strict=False)
    assert not loaded.unexpected_keys
    assert set(loaded.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model


@torch.no_grad()
def transformers_logits(spec: CheckpointSpec, ids: Tensor) -> Tensor:
    return transformers_model(spec)(ids).logits


class ExtendedQkv(nn.Module):
    """Wqkv, clip, q_ln and k_ln, with K/V heads repeated: gives the Q | K | V of plain MHA."""

    def __init__(self, spec: CheckpointSpec) -> None:
        super().__init__()
        self.spec = spec
        out_size = spec.hidden_size + 2 * spec.kv_size
        self.linear = nn.Linear(spec.hidden_size, out_size, bias=not spec.no_bias)
        if spec.qk_ln:
            self.q_ln = nn.LayerNorm(spec.hidden_size, eps=1e-5, bias=not spec.no_bias)
            self.k_ln = nn.LayerNorm(spec.kv_size, eps=1e-5, bias=not spec.no_bias)

    def forward(self, x: Tensor) -> Tensor:
        spec = self.spec
        qkv = self.linear(x)
        if spec.clip_qkv is not None:
            qkv = torch.clip(qkv, min=-spec.clip_qkv, max=spec.clip_qkv)
        q = qkv[..., : spec.hidden_size]
        k, v = qkv[..., spec.hidden_size :].chunk(2, dim=-1)
        if spec.qk_ln:
            q, k = self.q_ln(q), self.k_ln(k)
        return torch.cat([q, self.repeat_heads(k), self.repeat_heads(v)], dim=-1)

    def repeat_heads(self, x: Tensor) -> Tensor:
        heads = x.split(self.spec.head_dim, dim=-1)
        group = self.spec.num_heads // len(heads)
        return torch.cat([head for head in heads for _ in range(group)], dim=-1)


def block_norm(spec: CheckpointSpec) -> nn.Module:
    if "rms" in spec.norm_type:
        return nn.RMSNorm(spec.hidden_size, eps=spec.layer_norm_epsilon)
    return nn.LayerNorm(spec.hidden_size, eps=spec.layer_norm_epsilon, bias=not spec.no_bias)


def extended_transformers(spec: CheckpointSpec) -> MptForCausalLM:
    """The model of transformers with the modules replaced that it has no option for.

    `logit_scale` and learned positions are the caller's.
    """
    base = replace(
        CheckpointSpec(seed=spec.seed),
        hidden_size=spec.hidden_size,
        num_heads=spec.num_heads,
        num_layers=spec.num_layers,
        vocab_size=spec.vocab_size,
        max_seq_len=spec.max_seq_len,
        softmax_scale=spec.softmax_scale,
        tie_word_embeddings=spec.tie_word_embeddings,
    )
    model = MptForCausalLM(MptConfig(**config_dict(base, "native"))).eval()
    model.transformer.build_mpt_alibi_tensor = lambda heads, seq_len, device: (
        build_mpt_alibi_tensor(heads, seq_len, spec.alibi_bias_max, device) * spec.alibi
    )
    model.transformer.norm_f = block_norm(spec)
    hidden, bias = spec.hidden_size, not spec.no_bias
    for block in model.transformer.blocks:
        block.norm_1, block.norm_2 = block_norm(spec), block_norm(spec)
        block.attn.Wqkv = ExtendedQkv(spec)
        block.attn.out_proj = nn.Linear(hidden, hidden, bias=bias)
        block.ffn.up_proj = nn.Linear(hidden, spec.ffn_size, bias=bias)
        block.ffn.down_proj = nn.Linear(spec.ffn_size, hidden, bias=bias)
    return model


def extended_state_dict(spec: CheckpointSpec) -> dict[str, Tensor]:
    state = {}
    for name, tensor in tensors(spec).items():
        name = name.replace("Wqkv.", "Wqkv.linear.")
        state[name.replace("q_ln", "Wqkv.q_ln").replace("k_ln", "Wqkv.k_ln")] = tensor
    if spec.tie_word_embeddings:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


@torch.no_grad()
def extended_logits(spec: CheckpointSpec, ids: Tensor) -> Tensor:
    model = extended_transformers(spec)
    state = extended_state_dict(spec)
    positions = state.pop("transformer.wpe.weight", torch.zeros(spec.max_seq_len, 1))
    model.load_state_dict(state, strict=True)
    embeddings = model.transformer.wte(ids) + positions[: ids.shape[1]]
    logits = model(inputs_embeds=embeddings).logits
    if spec.logit_scale == "inv_sqrt_d_model":
        return logits / spec.hidden_size**0.5
    return logits * (spec.logit_scale or 1)


@parametrize(NATIVE)
@pytest.mark.parametrize("seq_len", [1, 23, 64])
def test_logits_match_transformers(spec: CheckpointSpec, seq_len: int) -> None:
    ids = token_ids(spec, seq_len)
    expected = transformers_logits(spec, ids)
    torch.testing.assert_close(plain_logits(spec, ids), expected, atol=TOLERANCE, rtol=0)


@parametrize(EXTENDED)
def test_logits_match_extended_transformers(spec: CheckpointSpec) -> None:
    ids = token_ids(spec)
    torch.testing.assert_close(
        plain_logits(spec, ids), extended_logits(spec, ids), atol=TOLERANCE, rtol=0
    )


@parametrize({**NATIVE, **EXTENDED})
def test_native_and_hub_configurations_mean_the_same(spec: CheckpointSpec) -> None:
    ids = token_ids(spec)
    if spec.num_kv_heads not in (None, 1) or isinstance(spec.expansion_ratio, float):
        with pytest.raises(ValueError, match="MptConfig"):
            config_dict(spec, "native")
        return
    native = plain_mpt.forward(config_dict(spec, "native"), tensors(spec), ids)
    torch.testing.assert_close(native, plain_logits(spec, ids), atol=0, rtol=0)


@pytest.mark.parametrize("num_heads", [4, 8, 16])
def test_slopes_are_the_papers_geometric_sequence(num_heads: int) -> None:
    # Press et al., 2021, section 3: starts at 2^(-8/n) and has that same ratio.
    ratio = 2 ** (-8 / num_heads)
    expected = torch.tensor([ratio * ratio**i for i in range(num_heads)])
    torch.testing.assert_close(plain_mpt.alibi_slopes(num_heads), expected)


@pytest.mark.parametrize("bias_max", [8, 16])
@pytest.mark.parametrize("num_heads", [1, 3, 6, 24, 32, 40])
def test_slopes_match_transformers(num_heads: int, bias_max: int) -> None:
    # Over two positions its bias is [-slope, 0].
    expected = -build_mpt_alibi_tensor(num_heads, 2, bias_max)[:, 0, 0]
    torch.testing.assert_close(plain_mpt.alibi_slopes(num_heads, bias_max), expected)


def test_alibi_falls_with_distance_and_the_future_is_masked() -> None:
    bias = plain_mpt.attention_bias(config_dict(MHA), 3)
    inf = float("inf")
    expected = torch.tensor([[0, -inf, -inf], [-0.25, 0, -inf], [-0.5, -0.25, 0]])
    torch.testing.assert_close(bias[0], expected)


def test_gqa_with_as_many_kv_heads_as_heads_is_mha() -> None:
    gqa = replace(MHA, num_kv_heads=MHA.num_heads)
    assert config_dict(gqa)["attn_config"]["attn_type"] == "grouped_query_attention"
    ids = token_ids(MHA)
    torch.testing.assert_close(plain_logits(gqa, ids), plain_logits(MHA, ids), atol=0, rtol=0)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3])
def test_fewer_kv_heads_are_mha_with_repeated_rows(num_kv_heads: int) -> None:
    spec = replace(GQA, num_kv_heads=num_kv_heads)
    mha = replace(spec, num_kv_heads=None)
    repeated = tensors(spec)
    hidden, head_dim = spec.hidden_size, spec.head_dim
    for name in [name for name in repeated if "Wqkv" in name]:
        weight = repeated[name]
        rows = [weight[:hidden]]
        for start in (hidden, hidden + num_kv_heads * head_dim):
            for head in range(spec.num_heads):
                source = start + head * num_kv_heads // spec.num_heads * head_dim
                rows.append(weight[source : source + head_dim])
        repeated[name] = torch.cat(rows)
    ids = token_ids(spec)
    expected = plain_mpt.forward(config_dict(mha), repeated, ids)
    torch.testing.assert_close(plain_logits(spec, ids), expected, atol=TOLERANCE, rtol=0)


def test_multiquery_is_grouped_query_with_one_kv_head() -> None:
    spec = replace(GQA, num_kv_heads=1)
    config = config_dict(spec)
    assert "kv_n_heads" not in config["attn_config"]
    grouped = {"attn_type": "grouped_query_attention", "kv_n_heads": 1}
    config["attn_config"] = config["attn_config"] | grouped
    ids = token_ids(spec)
    actual = plain_mpt.forward(config, tensors(spec), ids)
    torch.testing.assert_close(actual, plain_logits(spec, ids), atol=0, rtol=0)


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "no_scaling"},
        {"type": "linear", "factor": 3.0},
        {"type": "dynamic", "factor": 2.0},
        {
            "type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("max_seq_len", [100, 30])
def test_rope_is_that_of_llama(scaling: dict, max_seq_len: int) -> None:
    """llm-foundry's `rope_impl: hf` calls these; "dynamic" grows beyond max_seq_len."""
    length, head_dim = 41, 16
    names = {"rope_type" if key == "type" else key: value for key, value in scaling.items()}
    if scaling["type"] == "no_scaling":
        names = {"rope_type": "default"}
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=4 * head_dim,
            num_attention_heads=4,
            max_position_embeddings=max_seq_len,
            rope_parameters={"rope_theta": 700.0, **names},
        )
    )
    query, key = torch.randn(2, 1, 4, length, head_dim, generator=torch.Generator().manual_seed(2))
    cosine, sine = theirs(query, torch.arange(length)[None])
    expected = apply_rotary_pos_emb(query, key, cosine, sine)

    attn = {"rope": True, "rope_impl": "hf", "rope_theta": 700.0, "rope_hf_config": scaling}
    config = {"attn_config": attn, "max_seq_len": max_seq_len}
    angles = plain_mpt.rope_angles(config, length, head_dim)
    for found, wanted in zip((query, key), expected, strict=True):
        torch.testing.assert_close(plain_mpt.rotated(found, angles), wanted, atol=1e-5, rtol=0)


def test_rms_norm_matches_torch() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 7, 48, generator=generator)
    weight = torch.randn(48, generator=generator)
    expected = nn.functional.rms_norm(x, (48,), weight, eps=0.3)
    torch.testing.assert_close(plain_mpt.rms_norm(x, weight, 0.3), expected)


def test_norm_eps_of_llm_foundry_is_read() -> None:
    spec = replace(MHA, layer_norm_epsilon=0.1)
    config = config_dict(spec)
    config["norm_eps"] = config.pop("layer_norm_epsilon")
    ids = token_ids(spec)
    actual = plain_mpt.forward(config, tensors(spec), ids)
    torch.testing.assert_close(actual, plain_logits(spec, ids), atol=0, rtol=0)


def test_no_positions_at_all_is_wpe_of_zeros() -> None:
    spec = replace(MHA, alibi=False)
    weights = tensors(spec)
    wpe = weights.pop("transformer.wpe.weight")
    ids = token_ids(spec)
    config = config_dict(spec) | {"learned_pos_emb": False}
    actual = plain_mpt.forward(config, weights, ids)
    weights["transformer.wpe.weight"] = torch.zeros_like(wpe)
    expected = plain_mpt.forward(config_dict(spec), weights, ids)
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)


def test_a_missing_weight_is_an_error() -> None:
    weights = tensors(MHA)
    del weights["transformer.blocks.1.ffn.up_proj.weight"]
    with pytest.raises(KeyError, match=r"blocks\.1\.ffn\.up_proj"):
        plain_mpt.forward(config_dict(MHA), weights, token_ids(MHA))


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ("attn_config", "prefix_lm", True),
        ("attn_config", "qk_gn", True),
        ("attn_config", "attn_logit_softcapping", 50.0),
        ("attn_config", "fused_qkv", False),
        ("attn_config", "sliding_window_size", 16),
        ("attn_config", "attn_type", "linear_attention"),
        ("attn_config", "kv_n_heads", 2),
        ("ffn_config", "ffn_type", "mptglu"),
        (None, "norm_type", "groupnorm"),
        (None, "logit_scale", "sqrt"),
        (None, "final_logit_softcapping", 30.0),
        (None, "max_seq_len", 3),
    ],
)
def test_what_is_not_covered_is_refused(where: str | None, key: str, value: object) -> None:
    config = config_dict(MHA)
    if where is None:
        config[key] = value
    else:
        config[where] = config.get(where, {}) | {key: value}
    with pytest.raises(ValueError):
        plain_mpt.forward(config, tensors(MHA), token_ids(MHA))


@parametrize({**NATIVE, **EXTENDED})
def test_logits_have_a_visible_spread(spec: CheckpointSpec) -> None:
    std = plain_logits(replace(spec, logit_scale=None), token_ids(spec)).std()
    assert 1 < std < 2


@pytest.mark.parametrize(
    "changed",
    [
        {"alibi_bias_max": 9},
        {"softmax_scale": 0.3},
        {"clip_qkv": 2.0},
        {"layer_norm_epsilon": 0.01},
        {"norm_type": "rmsnorm"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_wrong_setting_shows_in_the_logits(changed: dict[str, object]) -> None:
    ids = token_ids(MHA)
    difference = plain_logits(replace(MHA, **changed), ids) - plain_logits(MHA, ids)
    assert difference.abs().max() > 0.02


@pytest.mark.parametrize(
    "changed",
    [{"num_heads": 5}, {"num_kv_heads": 3}, {"expansion_ratio": 1.3}],
    ids=lambda changed: next(iter(changed)),
)
def test_an_impossible_spec_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        replace(MHA, **changed)


@pytest.mark.parametrize("style", ["hub", "native"])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("layout", ["safetensors", "sharded_safetensors", "bin", "sharded_bin"])
def test_transformers_loads_every_layout(
    tmp_path: Path, layout: str, prefix: bool, style: str
) -> None:
    write_checkpoint(tmp_path, MHA, layout=layout, prefix=prefix, style=style)
    model, info = MptForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    loaded = model.state_dict()
    assert torch.equal(loaded.pop("lm_head.weight"), loaded["transformer.wte.weight"])
    assert_same_tensors(loaded, tensors(MHA))
    ids = token_ids(MHA)
    with torch.no_grad():
        logits = model(ids).logits
    torch.testing.assert_close(logits, plain_logits(MHA, ids), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["safetensors", "sharded_bin"])
def test_written_dtype(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    spec = replace(MHA, tie_word_embeddings=False)
    write_checkpoint(tmp_path, spec, layout=layout, dtype=dtype)
    model = MptForCausalLM.from_pretrained(tmp_path, dtype="auto")
    rounded = {name: tensor.to(dtype) for name, tensor in tensors(spec).items()}
    assert_same_tensors(model.state_dict(), rounded)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_follow_the_index(tmp_path: Path, suffix: str) -> None:
    layout = f"sharded_{suffix}"
    write_checkpoint(tmp_path, EXTENDED["everything"], layout=layout, dtype=torch.float16)
    (index_file,) = tmp_path.glob("*.index.json")
    index = json.loads(index_file.read_text())
    stored = {}
    for shard in sorted(set(index["weight_map"].values())):
        load = load_file if suffix == "safetensors" else partial(torch.load, weights_only=True)
        stored |= {name: (shard, tensor) for name, tensor in load(tmp_path / shard).items()}
    assert len(set(index["weight_map"].values())) == 3
    assert {name: shard for name, (shard, _) in stored.items()} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for _, t in stored.values())
    expected = {name: t.half() for name, t in tensors(EXTENDED["everything"]).items()}
    assert_same_tensors({name: tensor for name, (_, tensor) in stored.items()}, expected)


def test_tokenizer_loads(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, MHA)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("ab z").input_ids == [2, 3, 35, 27]
    assert tokenizer("a<|endoftext|>Q").input_ids == [2, 0, 1]
    assert tokenizer.eos_token_id == config_dict(MHA)["eos_token_id"]


def test_tokenizer_fits_a_tiny_vocabulary(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, replace(MHA, vocab_size=7))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 7
    assert tokenizer("az").input_ids == [2, 1]


# Hashes of files that the checkpoints' original maker wrote (only NumPy and safetensors).
SEEDED_FILES = {
    "a": {
        "config.json": "7903e97990c99b63f86c2a601c45fb634ba651e60413c2e134e56c21c28b19f8",
        "model.safetensors": "3edec44f9104fcdf7fd62e9446dec50c9dd4ccc204863cda0aa852c7ff75fd47",
        "tokenizer.json": "32fa0c40e8d0cfaba7097cd412c488f7ad2de79905f00c0e04ee46756f849ee8",
    },
    "gqa": {
        "config.json": "77dbf72ea57cd39998f830b96de263d66db546a2f4affb8c0f96343f767c4078",
        "model.safetensors": "8627ac7a88913abb4047dd759fb632522586c6ef3b4224a589f4ae887fd001a7",
        "tokenizer.json": "32fa0c40e8d0cfaba7097cd412c488f7ad2de79905f00c0e04ee46756f849ee8",
    },
}
SEEDED_TENSORS = {
    "a": {
        "wte": "e65fe8599f0ad6b8278e9fe0225ce46a71a61c8dbb255ab8071f72ecff036513",
        "blocks.1.attn.Wqkv": "4a52445df4d4edd4cb4e9644d79e7d81b70af07501d9cd772a255573995d8515",
        "norm_f": "417585ad9d4a94c2cfecb013f17a374e0b005bf399c7454fc4a519f098788df4",
    },
    "gqa": {
        "wte": "e8f91553f6c990cd9488061c13b62b2cab92536db4d2b9968bb8c17d8e9432c7",
        "blocks.1.attn.Wqkv": "74a9b71862501f4357fa0f5157bcd55eba1c34454cec8d5bf0855cb8791c86eb",
        "norm_f": "52b9ee95511d62c033907d2954e0c8a44b93edbdbcbfe488a17164460aa46e81",
    },
}


@pytest.mark.parametrize("name", sorted(SEEDED_SPECS))
def test_seeded_checkpoints_are_the_original_ones(tmp_path: Path, name: str) -> None:
    write_seeded_checkpoint(tmp_path, name)
    for file_name, digest in SEEDED_FILES[name].items():
        assert hashlib.sha256((tmp_path / file_name).read_bytes()).hexdigest() == digest, file_name
    weights = load_file(tmp_path / "model.safetensors")
    for module, digest in SEEDED_TENSORS[name].items():
        data = weights[f"transformer.{module}.weight"].numpy().tobytes()
        assert hashlib.sha256(data).hexdigest() == digest, module


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name
