"""The FT checkpoint directory: against NVIDIA's converter, and against slices taken by hand."""

from __future__ import annotations

import configparser
import contextlib
import json
import math
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import mpt_trt
from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.tensors import HfCheckpoint
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import FtCheckpoint, read_ft_checkpoint
from mpt_trt.ft.writer import ConversionSettings, write_ft_checkpoint
from mpt_trt.model.sharding import Rank
from mpt_trt.model.tensors import weights
from support.checkpoints import (
    CheckpointSpec,
    tensors,
    write_checkpoint,
    write_seeded_checkpoint,
    write_zeros,
)
from support.ft import CLI, hashes_in, names_in, rank_rows, write_ft
from support.paths import DATA
from support.processes import require_ended

NVIDIA = json.loads((DATA / "nvidia_ft_sha256.json").read_text())
BASE = CheckpointSpec()
DTYPES = ("float32", "float16", "bfloat16")


class TestNvidia:
    @pytest.mark.parametrize("entry", NVIDIA)
    def test_every_file_is_theirs(self, tmp_path, monkeypatch, convert, entry: str) -> None:
        name, dtype, tp = entry.split("_")
        write_seeded_checkpoint(tmp_path / "ckpts" / name, name)
        monkeypatch.chdir(tmp_path)
        tp_size = tp.removeprefix("tp")
        convert("-i", f"ckpts/{name}", "-o", "out", "-t", dtype, "-tp", tp_size)
        assert hashes_in(tmp_path / "out" / f"{tp_size}-gpu") == NVIDIA[entry]

    def test_all_types_and_sizes_are_recorded(self) -> None:
        expected = {f"a_{dtype}_tp{tp}" for dtype in DTYPES for tp in (1, 2, 4)}
        expected |= {f"gqa_{dtype}_tp{tp}" for dtype in DTYPES[:2] for tp in (1, 2, 4)}
        assert set(NVIDIA) == expected

    @pytest.mark.parametrize("name", ["a", "gqa"])
    def test_a_directory_without_manifest_is_read(self, tmp_path: Path, name: str) -> None:
        """NVIDIA's converter writes the same files, but no manifest."""
        checkpoint = write_seeded_checkpoint(tmp_path / name, name)
        config = write_ft(checkpoint, tmp_path / "2-gpu", "float16", tp_size=2)
        (tmp_path / "2-gpu" / "manifest.json").unlink()
        found = read_ft_checkpoint(tmp_path / "2-gpu")
        assert found.config == config
        assert (found.storage_type, found.tp_size, found.manifest) == ("float16", 2, {})
        file = "model.layers.1.mlp.dense_4h_to_h.weight.1.bin"
        content = (tmp_path / "2-gpu" / file).read_bytes()
        assert found.hashes([file]) == {file: f"xxh3:{xxhash.xxh3_128_hexdigest(content)}"}


# --- slices taken by hand ------------------------------------------------------------------------


def stored(array: np.ndarray, dtype: str) -> bytes:
    """float32 values as little-endian bytes, rounded to nearest, ties to even."""
    if dtype == "float32":
        return array.astype("<f4").tobytes()
    if dtype == "float16":
        return array.astype("<f2").tobytes()
    bits = np.ascontiguousarray(array, "<f4").view("<u4")
    # Half of the dropped part, less one if the kept part is even; a carry goes into the exponent.
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()


def expected_files(spec: CheckpointSpec, tp_size: int) -> dict[str, np.ndarray]:
    """Every tensor file of the directory by the format's table, float32."""
    hf = {n.removeprefix("transformer."): t.numpy() for n, t in tensors(spec).items()}
    files = {"wte": hf["wte.weight"]}
    if not spec.alibi:
        files["wpe"] = hf["wpe.weight"]
    if not spec.tie_word_embeddings:
        files["lm_head.weight"] = hf["lm_head.weight"]

    def norm(name: str, hf_name: str) -> None:
        files[f"{name}.weight"] = hf[f"{hf_name}.weight"]
        zeros = np.zeros_like(files[f"{name}.weight"])
        files[f"{name}.bias"] = hf.get(f"{hf_name}.bias", zeros)

    norm("final_layernorm", "norm_f")
    for layer in range(spec.num_layers):
        ft, block = f"layers.{layer}", f"blocks.{layer}"
        norm(f"{ft}.input_layernorm", f"{block}.norm_1")
        norm(f"{ft}.post_attention_layernorm", f"{block}.norm_2")
        if spec.qk_ln:
            norm(f"{ft}.attention.q_layernorm", f"{block}.attn.q_ln")
            norm(f"{ft}.attention.k_layernorm", f"{block}.attn.k_ln")
        qkv = hf[f"{block}.attn.Wqkv.weight"]
        dense = np.split(hf[f"{block}.attn.out_proj.weight"].T, tp_size, axis=0)
        up = np.split(hf[f"{block}.ffn.up_proj.weight"].T, tp_size, axis=-1)
        down = np.split(hf[f"{block}.ffn.down_proj.weight"].T, tp_size, axis=0)
        for rank in range(tp_size):
            rows = rank_rows(spec, rank, tp_size)
            files[f"{ft}.attention.query_key_value.weight.{rank}"] = qkv[rows].T
            files[f"{ft}.attention.dense.weight.{rank}"] = dense[rank]
            files[f"{ft}.mlp.dense_h_to_4h.weight.{rank}"] = up[rank]
            files[f"{ft}.mlp.dense_4h_to_h.weight.{rank}"] = down[rank]
        if spec.no_bias:
            continue
        files[f"{ft}.attention.dense.bias"] = hf[f"{block}.attn.out_proj.bias"]
        files[f"{ft}.mlp.dense_4h_to_h.bias"] = hf[f"{block}.ffn.down_proj.bias"]
        up_bias = np.split(hf[f"{block}.ffn.up_proj.bias"], tp_size)
        for rank in range(tp_size):
            rows = rank_rows(spec, rank, tp_size)
            qkv_bias = hf[f"{block}.attn.Wqkv.bias"][rows]
            files[f"{ft}.attention.query_key_value.bias.{rank}"] = qkv_bias
            files[f"{ft}.mlp.dense_h_to_4h.bias.{rank}"] = up_bias[rank]
    return {f"model.{name}.bin": array for name, array in files.items()}


def require_files(folder: Path, spec: CheckpointSpec, dtype: str, tp_size: int) -> None:
    expected = expected_files(spec, tp_size)
    assert names_in(folder) == {*expected, "config.ini", "manifest.json"}
    for name, array in expected.items():
        assert (folder / name).read_bytes() == stored(array, dtype), name


SPECS = {
    "plain": (BASE, (1, 2, 4)),
    "grouped": (replace(BASE, num_heads=6, num_kv_heads=2), (1, 2, 6)),
    "grouped, as many as heads": (replace(BASE, num_kv_heads=4), (1, 2)),
    "grouped, fewer than ranks": (CheckpointSpec(64, 8, 2), (2, 4, 8)),
    "multi-query": (replace(BASE, num_kv_heads=1), (1, 2, 4)),
    "biases": (replace(BASE, no_bias=False), (1, 4)),
    "biases, grouped": (replace(BASE, no_bias=False, num_heads=6, num_kv_heads=2), (2, 6)),
    "biases, multi-query": (replace(BASE, no_bias=False, num_kv_heads=1), (2,)),
    "untied": (replace(BASE, tie_word_embeddings=False), (1, 2)),
    "learned positions": (replace(BASE, alibi=False), (1, 2)),
    "qk_ln": (replace(BASE, qk_ln=True, num_heads=6, num_kv_heads=2), (1, 2)),
    "qk_ln, biases": (replace(BASE, qk_ln=True, no_bias=False), (1, 4)),
    "qk_ln, biases, rmsnorm": (
        replace(BASE, qk_ln=True, no_bias=False, norm_type="rmsnorm"),
        (2,),
    ),
    "rmsnorm": (replace(BASE, norm_type="rmsnorm"), (1,)),
    "rmsnorm, biases": (replace(BASE, norm_type="rmsnorm", no_bias=False), (2,)),
    "1 head": (replace(BASE, num_heads=1), (1,)),
    "3 heads, odd sizes": (
        CheckpointSpec(33, 3, None, 1, 101, max_seq_len=7, expansion_ratio=3, alibi=False),
        (1, 3),
    ),
    "float expansion_ratio": (replace(BASE, expansion_ratio=2.5), (1, 2)),
    "several slabs a matrix": (
        CheckpointSpec(1100, 11, None, 1, 1501, expansion_ratio=2, no_bias=False),
        (1, 11),
    ),
}
CASES = [
    pytest.param(spec, tp_size, id=f"{name}, tp {tp_size}")
    for name, (spec, tp_sizes) in SPECS.items()
    for tp_size in tp_sizes
]


class TestSlices:
    @pytest.mark.parametrize(("spec", "tp_size"), CASES)
    def test_every_file(self, tmp_path: Path, spec: CheckpointSpec, tp_size: int) -> None:
        write_ft(write_checkpoint(tmp_path / "hf", spec), tmp_path / "ft", tp_size=tp_size)
        require_files(tmp_path / "ft", spec, "float32", tp_size)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layout", ["sharded_safetensors", "bin", "sharded_bin"])
    def test_every_type_from_every_layout(self, tmp_path: Path, layout, dtype: str) -> None:
        spec = replace(BASE, num_kv_heads=2, no_bias=False, tie_word_embeddings=False)
        checkpoint = write_checkpoint(tmp_path / "hf", spec, layout=layout, prefix=False)
        write_ft(checkpoint, tmp_path / "ft", dtype, tp_size=2)
        require_files(tmp_path / "ft", spec, dtype, 2)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_checkpoints_of_other_types(self, tmp_path: Path, source, dtype: str) -> None:
        checkpoint = write_checkpoint(tmp_path / "hf", BASE, dtype=source)
        write_ft(checkpoint, tmp_path / "ft", dtype)
        name = "transformer.blocks.1.ffn.up_proj.weight"
        rounded_once = tensors(BASE)[name].to(source).float().numpy()
        found = (tmp_path / "ft" / "model.layers.1.mlp.dense_h_to_4h.weight.0.bin").read_bytes()
        assert found == stored(rounded_once.T, dtype)

    @pytest.mark.parametrize("no_bias", [True, False])
    @pytest.mark.parametrize("norm_type", ["low_precision_layernorm", "rmsnorm"])
    def test_norms_always_have_a_bias(self, tmp_path: Path, no_bias: bool, norm_type: str) -> None:
        spec = replace(BASE, no_bias=no_bias, norm_type=norm_type)
        write_ft(write_checkpoint(tmp_path / "hf", spec), tmp_path / "ft", "float16")
        for layer in range(spec.num_layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                content = (tmp_path / f"ft/model.layers.{layer}.{norm}.bias.bin").read_bytes()
                assert len(content) == 2 * spec.hidden_size
                assert any(content) == (not no_bias and norm_type != "rmsnorm")


class TestRounding:
    def convert_values(self, tmp_path: Path, values: np.ndarray, dtype: str) -> np.ndarray:
        """The bits that `values`, put into the embedding, are stored as."""
        spec = replace(BASE, hidden_size=64, vocab_size=len(values) // 64)
        checkpoint = write_checkpoint(tmp_path / "hf", spec)
        content = tensors(spec)
        content["transformer.wte.weight"] = torch.from_numpy(values.reshape(-1, 64))
        save_file(content, checkpoint / "model.safetensors")
        write_ft(checkpoint, tmp_path / "ft", dtype)
        return np.fromfile(tmp_path / "ft" / "model.wte.bin", "<u2")

    def finite_floats(self, largest: float) -> np.ndarray:
        """float32 with all kinds of bits: random ones, ties, denormals and both zeros."""
        generator = np.random.default_rng(5)
        random = generator.integers(0, 2**32, 1 << 15, dtype=np.uint32)
        kept = generator.integers(0, 2**16, 1 << 14, dtype=np.uint32) << 16
        ties = np.concatenate([kept | 0x8000, kept | 0x7FFF, kept | 0x8001])
        bits = np.concatenate([random, ties, np.arange(512, dtype=np.uint32), [0x80000000]])
        values = bits.astype("<u4").view("<f4")
        values = np.where(np.isfinite(values) & (np.abs(values) < largest), values, np.float32(1.5))
        return np.resize(values, (len(values) + 63) // 64 * 64).astype("<f4")

    def test_bfloat16(self, tmp_path: Path) -> None:
        values = self.finite_floats(3.38e38)
        found = self.convert_values(tmp_path, values, "bfloat16")
        assert found.tobytes() == stored(values, "bfloat16")

    def test_bfloat16_examples(self, tmp_path: Path) -> None:
        # 8 significant bits: between 1 and 1 + 2^-7 the tie 1 + 2^-8 goes down, the next one up.
        step = 2.0**-8
        values = [1 + step, 1 + 3 * step, 1 + step * 1.01, -1 - step, 255.5, 0.1]
        expected = [0x3F80, 0x3F82, 0x3F81, 0xBF80, 0x4380, 0x3DCD]
        padded = np.zeros(64, "<f4")
        padded[: len(values)] = values
        found = self.convert_values(tmp_path, padded, "bfloat16")
        assert list(found[: len(values)]) == expected

    @pytest.mark.parametrize(
        ("value", "dtype", "remedy"),
        [
            (1e5, "float16", "choose another --storage_type: float32 or bfloat16"),
            (3.4e38, "bfloat16", "choose another --storage_type: float32"),
            (1e300, "float32", "no storage type can, so the checkpoint is damaged; download it"),
        ],
    )
    def test_values_that_do_not_fit(
        self, tmp_path: Path, value: float, dtype: str, remedy: str
    ) -> None:
        with pytest.raises(MptTrtError) as raised:
            self.convert_values(tmp_path, np.full(64, value), dtype)
        message = str(raised.value)
        assert f"wte.weight holds {value:g}, which {dtype} cannot hold; {remedy}" in message

    def test_float16(self, tmp_path: Path) -> None:
        values = self.finite_floats(65504)
        found = self.convert_values(tmp_path, values, "float16")
        assert found.tobytes() == values.astype("<f2").tobytes()


# --- reading -------------------------------------------------------------------------------------

ROUND_TRIPS = {
    **{name: spec for name, (spec, _) in SPECS.items() if spec.hidden_size < 100},
    "epsilon": replace(BASE, layer_norm_epsilon=3e-7),
    "clip_qkv": replace(BASE, clip_qkv=6.5),
    "alibi_bias_max": replace(BASE, alibi_bias_max=16),
    "softmax_scale": replace(BASE, softmax_scale=1 / 3),
    "logit_scale": replace(BASE, logit_scale="inv_sqrt_d_model"),
    "everything": replace(
        BASE,
        num_kv_heads=2,
        no_bias=False,
        tie_word_embeddings=False,
        alibi=False,
        clip_qkv=0.1,
        qk_ln=True,
        softmax_scale=0.07,
        logit_scale=0.3,
        norm_type="rmsnorm",
        layer_norm_epsilon=1e-6,
        expansion_ratio=1.5,
    ),
}


@st.composite
def specs(draw: st.DrawFn) -> CheckpointSpec:
    num_heads = draw(st.integers(1, 6))
    kv_choices = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
    positive = st.floats(1e-6, 100)
    return CheckpointSpec(
        hidden_size=num_heads * draw(st.integers(1, 9)),
        num_heads=num_heads,
        num_kv_heads=draw(st.sampled_from([None, *kv_choices])),
        num_layers=draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(1, 50)),
        max_seq_len=draw(st.integers(1, 40)),
        expansion_ratio=draw(st.integers(1, 5)),
        no_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        alibi=draw(st.booleans()),
        alibi_bias_max=draw(st.integers(1, 20)),
        clip_qkv=draw(st.none() | positive),
        qk_ln=draw(st.booleans()),
        softmax_scale=draw(st.none() | positive),
        logit_scale=draw(st.none() | st.just("inv_sqrt_d_model") | positive),
        norm_type=draw(st.sampled_from(["layernorm", "rmsnorm"])),
        layer_norm_epsilon=draw(positive),
    )


class TestReading:
    @pytest.mark.parametrize("spec", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
    def test_round_trip(self, tmp_path: Path, spec: CheckpointSpec) -> None:
        config = write_ft(write_checkpoint(tmp_path / "hf", spec), tmp_path / "ft", "bfloat16")
        found = read_ft_checkpoint(tmp_path / "ft")
        assert found.config == config
        assert (found.storage_type, found.tp_size, found.model_name) == ("bfloat16", 1, "name")

    @settings(max_examples=40, deadline=None)
    @given(specs())
    def test_any_model_makes_the_round_trip(self, spec: CheckpointSpec) -> None:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = write_checkpoint(Path(folder, "hf"), spec)
            config = write_ft(checkpoint, Path(folder, "ft"))
            assert read_ft_checkpoint(Path(folder, "ft")).config == config

    @pytest.mark.parametrize(
        ("ids", "expected"),
        [((7, 9), (7, 9)), ((0, None), (0, None)), ((None, None), (None, None))],
    )
    def test_token_ids(self, tmp_path: Path, ids: tuple, expected: tuple) -> None:
        checkpoint = write_checkpoint(tmp_path / "hf", BASE)
        edit_config(checkpoint, bos_token_id=ids[0], eos_token_id=ids[1])
        write_ft(checkpoint, tmp_path / "ft")
        found = read_ft_checkpoint(tmp_path / "ft").config
        assert (found.bos_token_id, found.eos_token_id) == expected

    def test_token_ids_of_the_tokenizer(self, tmp_path: Path, convert) -> None:
        checkpoint = write_checkpoint(tmp_path / "hf", BASE)
        edit_config(checkpoint, bos_token_id=None, eos_token_id=None)
        edit_json(checkpoint / "tokenizer_config.json", bos_token="a", eos_token="<unk>")
        convert("-i", checkpoint, "-o", tmp_path)
        ini = configparser.ConfigParser()
        ini.read(tmp_path / "1-gpu" / "config.ini")
        # The tokenizer's entries are <|endoftext|>, <unk>, a, b, ...
        assert (ini["gpt"]["bos_token_id"], ini["gpt"]["eos_token_id"]) == ("2", "1")

    def test_what_a_rank_reads(self, tmp_path: Path) -> None:
        spec = CheckpointSpec(64, 8, 2, num_layers=1, no_bias=False)
        write_ft(write_checkpoint(tmp_path / "hf", spec), tmp_path / "ft", tp_size=4)
        found = read_ft_checkpoint(tmp_path / "ft").rank_files(Rank(3, 4))
        expected = {
            name: array.shape
            for name, array in expected_files(spec, 4).items()
            if not name.endswith(("0.bin", "1.bin", "2.bin"))
        }
        assert {file.name: file.shape for file in found.values()} == expected
        qkv = found["layers.0.attention.query_key_value.weight"]
        assert qkv.shape == (64, 64 // 4 + 2 * 8)
        assert qkv.byte_size == 4 * 64 * 32

    def test_keys_with_a_fallback(self, tmp_path: Path) -> None:
        checkpoint = write_checkpoint(tmp_path / "hf", BASE)
        config = write_ft(checkpoint, tmp_path / "ft")
        fallbacks = ("n_inner", "storage_dtype", "tensor_parallelism", "smoothquant", "model_name")
        fallbacks += ("layer_norm_epsilon", "position_embedding_type", "calibrate_kv_cache")
        edit_ini(tmp_path / "ft", **dict.fromkeys(fallbacks), bos_token_id=None)
        found = read_ft_checkpoint(tmp_path / "ft")
        assert found.config == replace(config, bos_token_id=None)
        assert (found.storage_type, found.tp_size) == ("float32", 1)

    def test_n_inner_of_a_float_ratio(self, tmp_path: Path) -> None:
        write_ft(write_checkpoint(tmp_path / "hf", BASE), tmp_path / "ft")
        edit_ini(tmp_path / "ft", n_inner="192.0")
        assert read_ft_checkpoint(tmp_path / "ft").config.intermediate_size == 192


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_config(checkpoint: Path, **changes: object) -> None:
    edit_json(checkpoint / "config.json", **changes)


def edit_ini(folder: Path, **changes: str | None) -> None:
    """Changes keys of config.ini; None removes."""
    ini = configparser.ConfigParser()
    ini.read(folder / "config.ini")
    ini["gpt"].update({key: value for key, value in changes.items() if value is not None})
    for key in (key for key, value in changes.items() if value is None):
        ini.remove_option("gpt", key)
    with (folder / "config.ini").open("w") as stream:
        ini.write(stream)


class TestDamagedDirectory:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write_ft(write_checkpoint(tmp_path / "hf", BASE), tmp_path / "2-gpu", tp_size=2)
        return tmp_path / "2-gpu"

    def refusal(self, folder: Path) -> str:
        with pytest.raises(MptTrtError) as error:
            read_ft_checkpoint(folder)
        return str(error.value)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("activation_function", "relu"),
            ("position_embedding_type", "rope"),
            ("position_embedding_type", "learned_absolute"),
            ("norm_type", "groupnorm"),
            ("layer_norm_epsilon", "0"),
            ("layer_norm_epsilon", "-1e-5"),
            ("softmax_scale", "-1"),
            ("logit_scale", "0"),
            ("clip_qkv", "-8"),
            ("n_layer", "10000000"),
            ("n_layer", "1" * 5000),
            ("n_embd", "1e30"),
            ("vocab_size", "1e18"),
            ("n_positions", "1e300"),
            ("tensor_parallelism", "1e18"),
            ("alibi_bias_max", "1e9"),
            ("eos_token_id", str(BASE.vocab_size)),
            ("eos_token_id", "-1"),
            ("bos_token_id", "0.5"),
        ],
    )
    def test_values_that_config_json_may_not_have_either(
        self, folder: Path, key: str, value: str
    ) -> None:
        edit_ini(folder, **{key: value})
        message = self.refusal(folder)
        assert message.startswith(f"{folder}/config.ini: {key} = {value[:70]}")
        assert len(message) < len(str(folder)) + 250

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"n_head = 4",
            b"[gpt]\nn_head = 4\nn_head = 8",
            b"[gpt]\n[gpt]\n",
            b"\xff\xfe[\0g\0p\0t\0]\0",
            b"\0" * 100,
            b"[gpt" * 100_000,
            b"[gpt]\n" + b"# comment\n" * 200_000,
        ],
    )
    def test_other_content(self, folder: Path, content: bytes) -> None:
        (folder / "config.ini").write_bytes(content)
        message = self.refusal(folder)
        assert message.startswith(f"{folder}/config.ini: not an FT config.ini")
        assert len(message) < len(str(folder)) + 250

    @pytest.mark.parametrize(
        "name", ["wte", "layers.1.mlp.dense_4h_to_h.weight.1", "final_layernorm.bias"]
    )
    def test_missing_file(self, folder: Path, name: str) -> None:
        (folder / f"model.{name}.bin").unlink()
        message = self.refusal(folder)
        assert message.startswith(f"{folder}/model.{name}.bin: tensor file is missing")

    @pytest.mark.parametrize("size", [0, 48 * 96 * 4 - 1, 48 * 96 * 4 + 4])
    def test_wrong_size(self, folder: Path, size: int) -> None:
        path = folder / "model.layers.0.mlp.dense_h_to_4h.weight.0.bin"
        os.truncate(path, size)
        expected = f"{path}: has {size} bytes, but [48, 96] of float32 are 18432"
        assert self.refusal(folder).startswith(expected)

    @pytest.mark.parametrize(
        ("key", "value", "complaint"),
        [
            ("n_embd", "wide", "a number is required"),
            ("n_embd", "-48", "a positive integer is required"),
            ("n_embd", "nan", "a number is required"),
            ("n_head", "0", "a positive integer is required"),
            ("n_head", "4.5", "a positive integer is required"),
            ("n_head", "5", "it must divide 48"),
            ("n_kv_head", "3", "it must divide 4"),
            ("n_layer", "inf", "a number is required"),
            ("tensor_parallelism", "two", "a number is required"),
            ("layer_norm_epsilon", "small", "a number is required"),
            ("clip_qkv", "yes", "a number is required"),
            ("bos_token_id", "<s>", "a number is required"),
            ("bias", "maybe", "True or False is required"),
            ("storage_dtype", "int4", "known types are float32, float16, bfloat16"),
            ("smoothquant", "1.5", "alpha is a number from 0 to 1"),
            ("smoothquant", "yes", "a number is required"),
        ],
    )
    def test_bad_value(self, folder: Path, key: str, value: str, complaint: str) -> None:
        edit_ini(folder, **{key: value})
        assert self.refusal(folder).startswith(f"{folder}/config.ini: {key} = {value}: {complaint}")

    @pytest.mark.parametrize("key", ["n_embd", "n_head", "n_layer", "n_positions", "vocab_size"])
    def test_missing_key(self, folder: Path, key: str) -> None:
        edit_ini(folder, **{key: None})
        assert self.refusal(folder).startswith(f"{folder}/config.ini: {key} is missing")

    def test_ranks_that_cut_heads(self, folder: Path) -> None:
        # NVIDIA's converter does not check that.
        edit_ini(folder, tensor_parallelism="3")
        assert "tensor-parallel size 3 does not divide" in self.refusal(folder)

    @pytest.mark.parametrize(
        "content", ["", "n_head = 4\n", "[gpt\n", "[other]\nn_head = 4\n", "\0"]
    )
    def test_no_ini(self, folder: Path, content: str) -> None:
        (folder / "config.ini").write_text(content)
        message = self.refusal(folder)
        assert message.startswith(f"{folder}/config.ini: not an FT config.ini (")
        assert message.endswith("); convert the checkpoint again")
        assert "\n" not in message

    def test_no_directory(self, tmp_path: Path) -> None:
        message = self.refusal(tmp_path / "1-gpu")
        assert message.startswith(f"{tmp_path}/1-gpu/config.ini: no such file")


# --- the command line ----------------------------------------------------------------------------


class TestManifest:
    def test_content(self, tmp_path: Path, monkeypatch, convert) -> None:
        write_checkpoint(tmp_path / "hf", BASE)
        monkeypatch.chdir(tmp_path)
        convert("-i", "hf", "-o", ".", "-tp", 2)
        folder = tmp_path / "2-gpu"
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["provenance"] == {"kind": "folder", "source": str(tmp_path / "hf")}
        assert manifest["end_ids"] == [0]
        assert manifest["mpt_trt_version"] == mpt_trt.__version__
        expected = {
            str(path.relative_to(folder)): {
                "bytes": len(path.read_bytes()),
                "hash": f"xxh3:{xxhash.xxh3_128_hexdigest(path.read_bytes())}",
            }
            for path in [*folder.glob("*.bin"), *folder.glob("tokenizer/*")]
        }
        assert "tokenizer/tokenizer.json" in expected and len(expected) > 20
        assert manifest["files"] == expected
        found = read_ft_checkpoint(folder)
        assert found.hashes(list(expected)) == {n: e["hash"] for n, e in expected.items()}


class TestCommandLine:
    @pytest.fixture
    def checkpoint(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.chdir(tmp_path)
        return write_seeded_checkpoint(tmp_path / "ckpts" / "a", "a")

    @pytest.mark.parametrize(
        "arguments",
        [
            "-i ckpts/a -o out -t bfloat16 -tp 2 -p 3",
            "--in_file ckpts/a --out_dir out --storage_type bfloat16 --tensor_parallelism 2 "
            "--processes 3",
            "--in-file=ckpts/a --out-dir=out --storage-type=bfloat16 --tensor-parallelism=2 -p 1",
        ],
    )
    def test_spellings(self, checkpoint: Path, tmp_path: Path, convert, arguments: str) -> None:
        convert(*arguments.split())
        assert hashes_in(tmp_path / "out" / "2-gpu") == NVIDIA["a_bfloat16_tp2"]

    def test_defaults(self, checkpoint: Path, tmp_path: Path, convert, capsys) -> None:
        convert("-i", "ckpts/a", "-o", "out")
        assert names_in(tmp_path / "out") == {"1-gpu"}
        assert hashes_in(tmp_path / "out" / "1-gpu") == NVIDIA["a_float16_tp1"]
        output, progress = capsys.readouterr()
        assert output.startswith("out/1-gpu: ")
        size = sum(path.stat().st_size for path in (tmp_path / "out" / "1-gpu").glob("*.bin"))
        all_of_it = f"{size / 1024:.1f} KiB"
        assert f"Converting ckpts/a: {all_of_it} of {all_of_it} in " in progress

    def test_a_terminal_shows_a_bar(self, checkpoint: Path, tmp_path: Path) -> None:
        screen, terminal = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
        words = command(checkpoint, tmp_path / "out")
        subprocess.run(words, stderr=terminal, check=True, env=environment)
        os.close(terminal)
        shown = os.read(screen, 1 << 16).decode()
        os.close(screen)
        assert "Converting" in shown
        assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in shown
        assert "KiB" in shown

    def test_number_of_processes_changes_nothing(self, checkpoint, tmp_path, convert) -> None:
        for processes in (1, 4):
            convert("-i", "ckpts/a", "-o", f"out{processes}", "-p", processes, "-tp", 4)
        folders = [tmp_path / f"out{processes}" / "4-gpu" for processes in (1, 4)]
        one, four = (
            {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()} for folder in folders
        )
        assert one == four

    def test_the_directory_is_replaced_as_a_whole(self, checkpoint, tmp_path, convert) -> None:
        folder = tmp_path / "out" / "1-gpu"
        other = write_checkpoint(tmp_path / "other", replace(BASE, num_layers=3, no_bias=False))
        convert("-i", other, "-o", "out")
        assert (folder / "model.layers.2.attention.dense.bias.bin").is_file()
        convert("-i", "ckpts/a", "-o", "out")
        assert hashes_in(folder) == NVIDIA["a_float16_tp1"]
        assert names_in(tmp_path / "out") == {"1-gpu"}

    @pytest.mark.parametrize("stray", ["notes.txt", "model.layers.9.mine.bin", "mine/notes.txt"])
    def test_other_files_in_the_directory_are_kept(
        self, checkpoint, convert, capsys, stray: str
    ) -> None:
        convert("-i", "ckpts/a", "-o", "out")
        file = Path("out/1-gpu") / stray
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
        with pytest.raises(SystemExit):
            convert("-i", "ckpts/a", "-o", "out")
        assert f"1-gpu: not replaced, because {stray} in it is not" in capsys.readouterr().err
        assert file.read_text() == "mine"
        convert("-i", "ckpts/a", "-o", "out", "--force")
        assert not file.exists()

    def test_the_input_is_never_replaced(self, checkpoint, convert, capsys) -> None:
        """The folder that is written is {out_dir}/1-gpu, which may be the checkpoint itself."""
        shutil.copytree("ckpts/a", "x/1-gpu")
        before = names_in(Path("x/1-gpu"))
        for options in ([], ["--force"]):
            with pytest.raises(SystemExit):
                convert("-i", "x/1-gpu", "-o", "x", *options)
            message = "x/1-gpu: not replaced, because the input x/1-gpu is in it"
            assert message in capsys.readouterr().err
        assert names_in(Path("x/1-gpu")) == before
        assert names_in(Path("x")) == {"1-gpu"}

    def test_tp_sizes_lie_beside_each_other(self, checkpoint, tmp_path, convert) -> None:
        for tp_size in (1, 4):
            convert("-i", "ckpts/a", "-o", "out", "-tp", tp_size)
        assert names_in(tmp_path / "out") == {"1-gpu", "4-gpu"}
        assert hashes_in(tmp_path / "out" / "1-gpu") == NVIDIA["a_float16_tp1"]

    def test_another_checkpoint_is_replaced_by_name(self, checkpoint, convert, capsys) -> None:
        def said(*options: str) -> list[str]:
            convert("-i", "ckpts/a", "-o", "out", *options)
            return capsys.readouterr().out.splitlines()

        assert len(said("-t", "float32")) == len(said("-t", "float32")) == 1
        replaced, _ = said("-t", "float16")
        assert replaced == "out/1-gpu: replaced an FT checkpoint of ckpts/a in float32"

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            (["-tp", 3], "tensor-parallel size 3 does not divide a model with 4 heads"),
            (["-tp", 0], "tensor-parallel size 0 does not divide"),
            (["-tp", -1], "tensor-parallel size -1 does not divide"),
            (["-p", 0], "--processes = 0: at least 1 is required"),
            (["-i", "nothing"], "no such folder: nothing"),
            (["-i", "ckpts/a/config.json"], "not a folder: ckpts/a/config.json"),
            (["-o", "ckpts/a/config.json"], "a part of this path is a file"),
        ],
        ids=str,
    )
    def test_refusals(self, checkpoint, tmp_path, convert, capsys, options, complaint) -> None:
        with pytest.raises(SystemExit) as exit_:
            convert("-i", "ckpts/a", "-o", "out", *options)
        assert exit_.value.code == 1
        errors = capsys.readouterr().err
        assert sum(line.startswith("error: ") for line in errors.splitlines()) == 1
        assert complaint in errors
        assert names_in(tmp_path) == {"ckpts"}

    def test_illegal_tp_is_refused_before_any_work(self, checkpoint, convert, capsys) -> None:
        (checkpoint / "model.safetensors").unlink()
        with pytest.raises(SystemExit):
            convert("-i", "ckpts/a", "-o", "out", "-tp", 8)
        assert capsys.readouterr().err.rstrip().endswith("valid sizes are 1, 2, 4")

    @pytest.mark.parametrize("options", [["-t", "int8"], ["-tp", "two"], ["--unknown"]], ids=str)
    def test_usage(self, checkpoint, tmp_path, convert, options: list[str]) -> None:
        with pytest.raises(SystemExit) as exit_:
            convert("-i", "ckpts/a", "-o", "out", *options)
        assert exit_.value.code == 2
        assert not (tmp_path / "out").exists()


class TestBadValues:
    """Values in the checkpoint that a sound model does not have."""

    def refusal(
        self, folder: Path, content: dict[str, torch.Tensor], dtype: str, workers: int = 0
    ) -> str:
        """The complaint about a checkpoint of BASE's shapes; nothing may be left of the output."""
        checkpoint = write_checkpoint(folder / "hf", BASE, layout="bin")
        torch.save(content, checkpoint / "pytorch_model.bin")
        with pytest.raises(MptTrtError) as error:
            write_ft(checkpoint, folder / "out" / "2-gpu", dtype, tp_size=2, workers=workers)
        assert names_in(folder / "out") == set()
        assert str(error.value).startswith(f"{checkpoint}/pytorch_model.bin: tensor ")
        return str(error.value).partition(": tensor ")[2]

    @pytest.mark.parametrize(
        ("name", "position"),
        [
            ("wte.weight", (96, 47)),
            ("blocks.0.attn.Wqkv.weight", (0, 0)),
            ("blocks.0.attn.Wqkv.weight", (143, 47)),
            ("blocks.1.attn.out_proj.weight", (20, 30)),
            ("blocks.1.ffn.down_proj.weight", (47, 191)),
            ("norm_f.weight", (5,)),
        ],
    )
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_not_finite(self, tmp_path, name: str, position: tuple, value: float, dtype) -> None:
        content = {n: tensor.to(dtype) for n, tensor in tensors(BASE).items()}
        content[f"transformer.{name}"][position] = value
        kind = "NaN" if math.isnan(value) else "Inf"
        expected = f"transformer.{name} holds {kind} at {list(position)};"
        assert self.refusal(tmp_path, content, "float16").startswith(expected)

    @pytest.mark.parametrize(
        ("name", "value", "source", "dtype"),
        [
            ("wte.weight", 65520.0, torch.float32, "float16"),
            ("blocks.0.attn.Wqkv.weight", -1e5, torch.float32, "float16"),
            ("blocks.1.ffn.down_proj.weight", 70000.0, torch.float32, "float16"),
            ("norm_f.weight", 1e30, torch.bfloat16, "float16"),
            ("wte.weight", 3.4e38, torch.float32, "bfloat16"),
            ("wte.weight", 1e300, torch.float64, "float32"),
        ],
    )
    def test_too_large_for_the_storage_type(self, tmp_path, name, value, source, dtype) -> None:
        content = {n: tensor.to(source) for n, tensor in tensors(BASE).items()}
        content[f"transformer.{name}"].view(-1)[7] = value
        message = self.refusal(tmp_path, content, dtype, workers=2)
        held = torch.tensor(abs(value), dtype=source).item()
        assert message.startswith(f"transformer.{name} holds {held:g}, which {dtype} cannot")

    @pytest.mark.parametrize("value", [65504.0, 65519.0, -65504.0])
    def test_largest_float16(self, tmp_path: Path, value: float) -> None:
        content = tensors(BASE)
        content["transformer.wte.weight"][0, 0] = value
        checkpoint = write_checkpoint(tmp_path / "hf", BASE)
        save_file(content, checkpoint / "model.safetensors")
        write_ft(checkpoint, tmp_path / "ft", "float16")
        found = np.fromfile(tmp_path / "ft" / "model.wte.bin", "<f2")
        assert found[0] == math.copysign(65504, value)

    def test_integers(self, tmp_path: Path) -> None:
        content = tensors(BASE)
        content["transformer.blocks.0.ffn.up_proj.weight"] = torch.ones(192, 48, dtype=torch.int8)
        message = self.refusal(tmp_path, content, "float16")
        assert message.startswith("transformer.blocks.0.ffn.up_proj.weight is int8;")


# --- interrupted conversions ---------------------------------------------------------------------

BIG_SPEC = CheckpointSpec(2048, 16, num_layers=7, vocab_size=4096)
MEMORY_LIMIT_KIB = 512 << 10


def command(checkpoint: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, str(CLI), "-i", str(checkpoint), "-o", str(out), *options]


def one_error(stderr: str) -> str:
    """The only line that complains."""
    assert "Traceback" not in stderr
    found = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(found) == 1, stderr
    return found[0]


def anonymous_kib(pid: int) -> int:
    """Memory of a process and its workers that the system cannot reclaim; 0 when it is over."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) + sum(map(anonymous_kib, workers_of(pid)))
    return 0


def workers_of(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


class TestFullDisk:
    def test_file_size_limit(self, tmp_path: Path) -> None:
        checkpoint = write_seeded_checkpoint(tmp_path / "a", "a")
        out = tmp_path / "out"
        limit = 20_000  # less than the largest file, more than most
        result = subprocess.run(
            command(checkpoint, out),
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
            capture_output=True,
            text=True,
        )
        assert result.returncode == 1
        expected = f"error: cannot write {out}/1-gpu: the file-size limit is reached; raise it"
        assert one_error(result.stderr).startswith(expected)
        assert names_in(out) == set()

    @pytest.fixture
    def small_disk(self, tmp_path: Path) -> Iterator[Path]:
        """A file system of 64 KiB."""
        folder = tmp_path / "disk"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
            pytest.skip("needs the right to mount")
        yield folder
        subprocess.run(["umount", str(folder)], check=True)

    def test_small_file_system(self, tmp_path: Path, small_disk: Path) -> None:
        checkpoint = write_seeded_checkpoint(tmp_path / "a", "a")
        out = small_disk / "out"
        result = subprocess.run(command(checkpoint, out), capture_output=True, text=True)
        assert result.returncode == 1
        assert f"cannot write {out}/1-gpu: the disk is full" in one_error(result.stderr)
        assert names_in(out) == set()
        subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
        subprocess.run(command(checkpoint, out), check=True, capture_output=True)
        assert names_in(out) == {"1-gpu"}
        read_ft_checkpoint(out / "1-gpu")


class TestInterruptions:
    def test_the_first_failure_ends_the_conversion(self, tmp_path: Path) -> None:
        checkpoint = write_checkpoint(tmp_path / "hf", replace(BASE, num_layers=10))
        config = read_hf_config(checkpoint)
        found = weights(config)
        written = []

        def fail(count: int) -> None:
            written.append(count)
            time.sleep(0.02)
            raise RuntimeError("no more")

        with pytest.raises(RuntimeError, match="no more"):
            write_ft_checkpoint(
                HfCheckpoint(checkpoint, found),
                config,
                ConversionSettings("float16", 1, 2, "name", {}),
                tmp_path / "out" / "1-gpu",
                fail,
            )
        assert len(written) < len(found) / 2
        assert names_in(tmp_path / "out") == set()

    @pytest.fixture(scope="class")
    def big(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
        """A checkpoint of 1.4 GB of zeros, which take no place on disk."""
        folder = tmp_path_factory.mktemp("big")
        write_checkpoint(folder, replace(BIG_SPEC, hidden_size=16, vocab_size=2, num_layers=1))
        sizes = {"d_model": 2048, "n_layers": BIG_SPEC.num_layers, "vocab_size": 4096}
        edit_config(folder, **sizes)
        end = write_zeros(folder)
        assert end > 1_400_000_000
        yield folder
        shutil.rmtree(folder)

    @pytest.fixture
    def out(self, tmp_path: Path) -> Iterator[Path]:
        yield tmp_path / "out"
        shutil.rmtree(tmp_path / "out", ignore_errors=True)

    def start(self, big: Path, out: Path) -> subprocess.Popen:
        return subprocess.Popen(
            command(big, out, "-p", "2"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def workers_in_the_middle(self, process: subprocess.Popen, out: Path) -> list[int]:
        """Waits until both workers run and a tensor is written; one may write before two run."""
        workers: list[int] = []
        while len(workers) < 2 or not list(out.glob(".1-gpu.partial*/new/model.*.bin")):
            assert process.poll() is None, "it has ended"
            time.sleep(0.002)
            workers = workers_of(process.pid)
        return workers

    def stop_in_the_middle(self, process: subprocess.Popen, out: Path, number: int) -> str:
        """Sends the signal as soon as a tensor is written; returns what went to stderr."""
        workers = self.workers_in_the_middle(process, out)
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
        require_ended(workers, within_s=10)
        return errors

    def require_whole(self, folder: Path) -> None:
        found: FtCheckpoint = read_ft_checkpoint(folder)  # checks the size of every file
        assert found.config.num_layers == BIG_SPEC.num_layers
        assert sum(path.stat().st_size for path in folder.glob("*.bin")) > 700_000_000

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
    def test_interrupted(self, big: Path, out: Path, number: int) -> None:
        process = self.start(big, out)
        errors = self.stop_in_the_middle(process, out, number)
        assert process.returncode == 130
        assert errors.rstrip().endswith("interrupted; unfinished outputs were removed")
        assert "Traceback" not in errors
        assert names_in(out) == set()

    def test_a_killed_worker(self, big: Path, out: Path) -> None:
        process = self.start(big, out)
        os.kill(self.workers_in_the_middle(process, out)[0], signal.SIGKILL)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 1
        assert "was ended by SIGKILL" in one_error(errors)
        assert names_in(out) == set()

    def test_killed_and_then_run_again(self, big: Path, out: Path) -> None:
        """The next run removes leftovers; its memory stays small for any model size."""
        process = self.start(big, out)
        self.stop_in_the_middle(process, out, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        (leftover,) = out.iterdir()
        assert leftover.name.startswith(".1-gpu.partial-")
        again = self.start(big, out)
        most = 0
        while again.poll() is None:
            most = max(most, anonymous_kib(again.pid))
            time.sleep(0.01)
        assert again.returncode == 0, again.stderr.read()
        assert names_in(out) == {"1-gpu"}
        self.require_whole(out / "1-gpu")
        assert 10 << 10 < most < MEMORY_LIMIT_KIB

    def test_interrupted_and_then_run_again(self, big: Path, out: Path) -> None:
        """The old content stays until the new directory is complete."""
        write_ft(write_checkpoint(out.parent / "hf", BASE), out / "1-gpu")
        before = hashes_in(out / "1-gpu")
        process = self.start(big, out)
        self.stop_in_the_middle(process, out, signal.SIGINT)
        assert process.returncode == 130
        assert names_in(out) == {"1-gpu"}
        assert hashes_in(out / "1-gpu") == before
        assert self.start(big, out).wait() == 0
        self.require_whole(out / "1-gpu")
