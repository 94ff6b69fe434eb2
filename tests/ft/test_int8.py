"""FT directories with int8 weights and scales: NVIDIA's files, and what the model computes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import read_ft_checkpoint
from mpt_trt.ft.int8 import Int8Conversion
from mpt_trt.ft.layout import Int8Files, Int8Layers, total_bytes
from mpt_trt.model.sharding import Rank, all_ranks
from mpt_trt.network.decoder import build_network
from mpt_trt.quantization.activation_amax import ActivationAmax, LinearAmax
from support.checkpoints import CheckpointSpec, tensors, write_checkpoint, write_seeded_checkpoint
from support.ft import (
    FT_LAYERS,
    hashes_in,
    names_in,
    random_amax,
    rank_rows,
    seeded_amax,
    write_ft,
)
from support.paths import DATA

NVIDIA = json.loads((DATA / "nvidia_int8_sha256.json").read_text())
BASE = CheckpointSpec()
DTYPES = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype("i1"),
}
# Of a value that was rounded once.
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
NORMS = {
    "attention.query_key_value": ("norm_1", "input_layernorm"),
    "mlp.dense_h_to_4h": ("norm_2", "post_attention_layernorm"),
}


def write_int8(
    folder: Path,
    spec: CheckpointSpec,
    storage_type: str = "float32",
    tp_size: int = 1,
    alpha: float | None = 0.5,
    amax: ActivationAmax | None = None,
) -> Path:
    """Makes an FT directory of random amax; alpha None: int8 files only for the KV cache."""
    checkpoint = write_checkpoint(folder / "hf", spec)
    int8 = Int8Conversion(amax or random_amax(spec), alpha, {"text": "some.txt"})
    target = folder / f"{tp_size}-gpu"
    write_ft(checkpoint, target, storage_type, tp_size, int8)
    return target


def has_the_processor_of_the_hashes() -> bool:
    """Square roots of PyTorch in float32 differ by processor in the last place."""
    roots = torch.linspace(0.01, 0.5, 1000).pow(0.5).numpy()
    return hashlib.sha256(roots.tobytes()).hexdigest().startswith("58ab0e8bbcb72c0a")


class TestNvidia:
    @pytest.mark.parametrize("entry", NVIDIA)
    def test_every_file_is_theirs(self, tmp_path: Path, entry: str) -> None:
        name, storage_type, tp, kind = entry.split("_")
        if (storage_type, kind) == ("float32", "sq0.5") and not has_the_processor_of_the_hashes():
            pytest.skip("float32 square roots of this processor differ in the last place")
        folder, tp_size = tmp_path / "ft", int(tp.removeprefix("tp"))
        checkpoint = write_seeded_checkpoint(tmp_path / "hf", name)
        alpha = 0.5 if kind == "sq0.5" else None
        int8 = Int8Conversion(seeded_amax(name), alpha, {})
        write_ft(checkpoint, folder, storage_type, tp_size, int8, workers=2)
        # The model's name in config.ini, and whether K/V heads are grouped.
        ini = (folder / "config.ini").read_text()
        (folder / "config.ini").write_text(ini.replace("= name\n", f"= ckpts/{name}\n"))
        expected, found = NVIDIA[entry], hashes_in(folder)
        for file in theirs_that_are_wrong(expected, name):
            zeros = bytes((folder / file).stat().st_size)
            assert expected[file] == hashlib.sha256(zeros).hexdigest()
            assert found[file] != expected[file]
            expected = {**expected, file: found[file]}
        assert {file: found[file] for file in expected} == expected
        # The rest is what their NumPy's version decides.
        assert all(".scale_" in file for file in found.keys() - expected.keys())

    def test_all_are_recorded(self) -> None:
        expected = {
            f"{name}_{storage_type}_tp{tp}_{kind}"
            for name in ("a", "gqa")
            for storage_type in ("float32", "float16")
            for tp in (1, 2)
            for kind in ("kv", "sq0.5")
        }
        assert set(NVIDIA) == expected

    @pytest.mark.parametrize("alpha", [0.5, None])
    def test_a_directory_without_manifest_is_read(self, tmp_path: Path, alpha) -> None:
        folder = write_int8(tmp_path, BASE, "float16", 2, alpha)
        (folder / "manifest.json").unlink()
        found = read_ft_checkpoint(folder)
        assert (found.smoothing, found.manifest) == (alpha, {})
        assert found.int8_layers is (Int8Layers.QKV if alpha is None else Int8Layers.ALL)


def theirs_that_are_wrong(files: dict[str, str], name: str) -> list[str]:
    """Integers of grouped Q, K and V with a scale each, which are all zeros there."""
    is_wrong = ".query_key_value.weight.int8."
    return [f for f in files if name == "gqa" and is_wrong in f and ".col." not in f]


# --- against the model ---------------------------------------------------------------------------


class Directory:
    """The files of a directory, put together by hand to whole matrices `[in, out]`."""

    def __init__(self, folder: Path, spec: CheckpointSpec, storage_type: str, tp_size: int):
        self.folder, self.spec, self.tp_size = folder, spec, tp_size
        self.storage_type = storage_type

    def read(self, name: str, dtype: str = "float32") -> np.ndarray:
        stored = np.fromfile(self.folder / f"model.{name}.bin", DTYPES[dtype])
        return stored.astype(np.float64)

    def matrix(self, layer: str, suffix: str = "", dtype: str | None = None) -> np.ndarray:
        """The weight of a layer, from the files of all ranks."""
        rows = self.in_features(layer) // (self.tp_size if self.is_row_split(layer) else 1)
        parts = [
            self.read(f"{layer}.weight{suffix}.{rank}", dtype or self.storage_type)
            for rank in range(self.tp_size)
        ]
        if self.is_row_split(layer):
            return np.concatenate([part.reshape(rows, -1) for part in parts])
        return self.joined(layer, [part.reshape(rows, -1) for part in parts])

    def vector(self, layer: str, name: str) -> np.ndarray:
        """One value for each output feature, from the files of all ranks or from the only one."""
        if (self.folder / f"model.{layer}.{name}.bin").exists():
            return self.read(f"{layer}.{name}")
        parts = [self.read(f"{layer}.{name}.{rank}") for rank in range(self.tp_size)]
        return self.joined(layer, parts)

    def smoother(self, layer: str) -> np.ndarray:
        parts = [self.read(f"{layer}.smoother.{rank}") for rank in range(self.tp_size)]
        return np.concatenate(parts)

    def joined(self, layer: str, parts: list[np.ndarray]) -> np.ndarray:
        """Columns of all ranks in the order of the whole; columns on several ranks must agree."""
        if "query_key_value" not in layer:
            return np.concatenate(parts, axis=-1)
        whole = np.full(
            (*parts[0].shape[:-1], self.spec.hidden_size + 2 * self.spec.kv_size), np.nan
        )
        for rank, part in enumerate(parts):
            columns = rank_rows(self.spec, rank, self.tp_size)
            there = whole[..., columns]
            assert np.array_equal(there[~np.isnan(there)], part[~np.isnan(there)])
            whole[..., columns] = part
        assert not np.isnan(whole).any()
        return whole

    def in_features(self, layer: str) -> int:
        return self.spec.ffn_size if "4h_to_h" in layer else self.spec.hidden_size

    @staticmethod
    def is_row_split(layer: str) -> bool:
        return layer.endswith(("attention.dense", "dense_4h_to_h"))


def require_smoothed(found: Directory) -> None:
    """Norm and weight, or smoother and weight, still make the model's product."""
    hf = {
        n.removeprefix("transformer."): t.double().numpy() for n, t in tensors(found.spec).items()
    }
    rounding = 4 * ROUNDING[found.storage_type]
    for number in range(found.spec.num_layers):
        for hf_name, name in FT_LAYERS.items():
            layer = f"layers.{number}.{name}"
            weight, original = found.matrix(layer), hf[f"blocks.{number}.{hf_name}.weight"].T
            if name not in NORMS:
                product = weight / found.smoother(layer)[:, None]
                np.testing.assert_allclose(product, original, rtol=rounding, atol=1e-7)
                continue
            hf_norm, norm = NORMS[name]
            for kind in ("weight", "bias"):
                values = hf.get(f"blocks.{number}.{hf_norm}.{kind}", np.zeros(len(weight)))
                stored = found.read(f"layers.{number}.{norm}.{kind}", found.storage_type)
                assert kind == "bias" or not np.allclose(stored, values, rtol=0.1)
                np.testing.assert_allclose(
                    stored[:, None] * weight, values[:, None] * original, rtol=rounding, atol=1e-7
                )


def require_scales(
    found: Directory, amax: ActivationAmax, layers: list[str], of_amax: float = 1e-6
) -> None:
    """All scales by the format's formulas, and integers that stand for the stored weights.

    of_amax: relative tolerance of what depends on the amax.
    """
    spec, tolerance = found.spec, 1e-3 if found.storage_type == "float16" else 1e-6
    for number in range(spec.num_layers):
        for name in layers:
            layer, seen = f"layers.{number}.{name}", amax[number][name]
            weight, x, y = found.matrix(layer), seen.x.astype(np.float64), seen.y.max()
            if name in NORMS:
                x = x / smoothing_seen_in_norm(found, number, name)
            else:
                x = x / found.smoother(layer)
            if spec.clip_qkv is not None and "query_key_value" in name:
                y = min(y, spec.clip_qkv)
            x_scale, y_scale = x.max() / 127, y / 127
            rtol = 4 * ROUNDING[found.storage_type] + of_amax
            np.testing.assert_allclose(
                found.read(f"{layer}.scale_x_orig_quant"), [1 / x_scale], rtol=rtol
            )
            np.testing.assert_allclose(
                found.read(f"{layer}.scale_y_quant_orig"), [y_scale], rtol=of_amax
            )
            parts = [weight]
            if "query_key_value" in name:
                cuts = [spec.hidden_size, spec.hidden_size + spec.kv_size]
                parts = np.split(weight, cuts, axis=1)
            largest = [np.full(part.shape[1], np.abs(part).max()) for part in parts]
            for suffix, maxima in (
                ("", np.concatenate(largest)),
                (".col", np.abs(weight).max(axis=0)),
            ):
                scale = found.vector(layer, f"scale_w_quant_orig{suffix}")
                assert len(scale) == (1 if not suffix and len(parts) == 1 else len(maxima))
                np.testing.assert_allclose(
                    np.broadcast_to(scale, maxima.shape), maxima / 127, rtol=tolerance
                )
                accumulated = found.vector(layer, f"scale_y_accum_quant{suffix}")
                x_orig_quant = found.read(f"{layer}.scale_x_orig_quant")
                np.testing.assert_allclose(
                    np.broadcast_to(accumulated, maxima.shape),
                    maxima / 127 / x_orig_quant / y_scale,
                    rtol=tolerance + of_amax,
                )
                integers = found.matrix(layer, f".int8{suffix}", "int8")
                assert np.abs(integers).max() == 127
                error = np.abs(integers * scale - weight)
                assert (error <= scale * (0.5 + 150 * tolerance)).all()


def smoothing_seen_in_norm(found: Directory, number: int, name: str) -> np.ndarray:
    hf_norm, norm = NORMS[name]
    original = tensors(found.spec)[f"transformer.blocks.{number}.{hf_norm}.weight"].double().numpy()
    return original / found.read(f"layers.{number}.{norm}.weight", found.storage_type)


SPECS = {
    "plain": (BASE, (1, 2, 4)),
    "24 heads": (replace(BASE, num_heads=24), (1, 4)),
    "6 heads, grouped": (replace(BASE, num_heads=6, num_kv_heads=2), (1, 2, 6)),
    "24 heads, grouped": (replace(BASE, num_heads=24, num_kv_heads=6), (2,)),
    "grouped, fewer than ranks": (CheckpointSpec(64, 8, 2), (4,)),
    "multi-query": (replace(BASE, num_kv_heads=1), (1, 2, 4)),
    "biases": (replace(BASE, no_bias=False), (1, 2)),
    "biases, multi-query": (replace(BASE, no_bias=False, num_kv_heads=1), (2,)),
    "rmsnorm, biases": (replace(BASE, norm_type="rmsnorm", no_bias=False), (2,)),
    "clip_qkv": (replace(BASE, clip_qkv=1.5), (2,)),
    "qk_ln": (replace(BASE, qk_ln=True, no_bias=False), (2,)),
    "3 heads, odd sizes": (CheckpointSpec(33, 3, None, 1, 101, expansion_ratio=3), (1, 3)),
    "several slabs a matrix": (CheckpointSpec(528, 11, None, 1, 151, expansion_ratio=2), (1, 11)),
}
CASES = [
    pytest.param(spec, tp_size, id=f"{name}, tp {tp_size}")
    for name, (spec, tp_sizes) in SPECS.items()
    for tp_size in tp_sizes
]


class TestDirectory:
    @pytest.mark.parametrize("storage_type", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize(("spec", "tp_size"), CASES)
    def test_it_computes_the_model(self, tmp_path, spec, tp_size: int, storage_type: str) -> None:
        folder = write_int8(tmp_path, spec, storage_type, tp_size)
        found = Directory(folder, spec, storage_type, tp_size)
        require_smoothed(found)
        require_scales(found, random_amax(spec), list(FT_LAYERS.values()))

    @pytest.mark.parametrize("alpha", [0, 0.3, 1])
    def test_alpha(self, tmp_path: Path, alpha: float) -> None:
        found = Directory(write_int8(tmp_path, BASE, alpha=alpha), BASE, "float32", 1)
        require_smoothed(found)
        smoother = found.smoother("layers.1.attention.dense")
        seen = random_amax(BASE)[1]["attention.dense"].x.astype(np.float64)
        weight = tensors(BASE)["transformer.blocks.1.attn.out_proj.weight"].double().numpy()
        expected = seen**alpha / np.abs(weight).max(axis=0) ** (1 - alpha)
        np.testing.assert_allclose(smoother, expected, rtol=1e-6)

    @pytest.mark.parametrize("storage_type", ["float32", "float16"])
    @pytest.mark.parametrize("name", ["6 heads, grouped", "multi-query", "biases"])
    def test_every_number_of_ranks_has_the_same_numbers(self, tmp_path, name, storage_type) -> None:
        spec, tp_sizes = SPECS[name]
        directories = []
        for tp_size in tp_sizes:
            folder = write_int8(tmp_path / str(tp_size), spec, storage_type, tp_size)
            directories.append(Directory(folder, spec, storage_type, tp_size))
        for layer in (f"layers.0.{name}" for name in FT_LAYERS.values()):
            for suffix, dtype in (("", None), (".int8", "int8"), (".int8.col", "int8")):
                first, *others = (found.matrix(layer, suffix, dtype) for found in directories)
                assert all(np.array_equal(first, other) for other in others)
            for scale in ("scale_w_quant_orig", "scale_y_accum_quant"):
                for kind in (scale, f"{scale}.col"):
                    first, *others = (found.vector(layer, kind) for found in directories)
                    assert all(np.array_equal(first, other) for other in others)

    def test_dead_features(self, tmp_path: Path) -> None:
        """Inputs that were never seen, inputs without weights, outputs without weights."""
        checkpoint = write_checkpoint(tmp_path / "hf", BASE, layout="bin")
        content = tensors(BASE)
        for name in ("attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj"):
            weight = content[f"transformer.blocks.0.{name}.weight"]
            weight[:, 5] = 0
            weight[7] = 0
        content["transformer.blocks.0.norm_1.weight"][3] = 0
        content["transformer.blocks.0.norm_2.weight"][3] = 0
        torch.save(content, checkpoint / "pytorch_model.bin")
        amax = random_amax(BASE)
        for seen in amax[0].values():
            seen.x[3] = 0
        for storage_type in ("float32", "float16"):
            folder = tmp_path / storage_type
            write_ft(checkpoint, folder, storage_type, 2, Int8Conversion(amax, 0.5, {}))
            found = Directory(folder, BASE, storage_type, 2)
            for path in folder.glob("model.layers.0.*.bin"):
                if ".int8." not in path.name:
                    is_float32 = ".scale_" in path.name or ".smoother." in path.name
                    dtype = DTYPES["float32" if is_float32 else storage_type]
                    assert np.isfinite(np.fromfile(path, dtype)).all(), path.name
            for name in FT_LAYERS.values():
                integers = found.matrix(f"layers.0.{name}", ".int8.col", "int8")
                assert not integers[5].any()
                assert not integers[:, 7].any()
                assert np.abs(integers).max() == 127

    def test_kv_scales_beside_a_plain_checkpoint(self, tmp_path: Path) -> None:
        spec = replace(BASE, num_heads=6, num_kv_heads=2, no_bias=False)
        folder = write_int8(tmp_path, spec, "float32", 2, alpha=None)
        plain = tmp_path / "plain"
        write_ft(tmp_path / "hf", plain, "float32", 2)
        same = {name: h for name, h in hashes_in(folder).items() if name in names_in(plain)}
        assert same == hashes_in(plain)
        added = names_in(folder) - names_in(plain)
        prefixes = {f"model.layers.{i}.attention.query_key_value." for i in (0, 1)}
        assert {name[: len(next(iter(prefixes)))] for name in added} == prefixes
        found = read_ft_checkpoint(folder)
        found.require_plain()
        assert found.smoothing is None
        assert set(found.rank_int8_files(Rank(0, 2))) == {
            f"layers.{i}.attention.query_key_value" for i in (0, 1)
        }
        scale = Directory(folder, spec, "float32", 2).read(
            "layers.1.attention.query_key_value.scale_y_quant_orig"
        )
        seen = random_amax(spec)[1]["attention.query_key_value"].y.max()
        np.testing.assert_allclose(scale, [seen / 127], rtol=1e-6)

    def test_number_of_workers_changes_nothing(self, tmp_path: Path) -> None:
        checkpoint = write_checkpoint(tmp_path / "hf", BASE)
        int8 = Int8Conversion(random_amax(BASE), 0.5, {})
        folders = [tmp_path / str(workers) for workers in (0, 1, 3)]
        for folder in folders:
            write_ft(checkpoint, folder, "float16", 2, int8, workers=int(folder.name))
        here, one, three = map(hashes_in, folders)
        assert here == one == three

    def test_manifest(self, tmp_path: Path) -> None:
        folder = write_int8(tmp_path, BASE, "float16", 2)
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["calibration"] == {"text": "some.txt"}
        assert set(manifest["files"]) == {p.name for p in folder.glob("*.bin")}
        checkpoint = read_ft_checkpoint(folder)
        size = total_bytes(checkpoint.config, "float16", 2, Int8Layers.ALL)
        assert size == sum(path.stat().st_size for path in folder.glob("*.bin"))


class TestReading:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        spec = CheckpointSpec(64, 8, 2, num_layers=1, no_bias=False)
        return write_int8(tmp_path, spec, "bfloat16", 4)

    def test_what_a_rank_reads(self, folder: Path) -> None:
        checkpoint = read_ft_checkpoint(folder)
        assert (checkpoint.smoothing, checkpoint.storage_type) == (0.5, "bfloat16")
        rank = Rank(3, 4)
        found = checkpoint.rank_int8_files(rank)
        assert list(found) == [f"layers.0.{name}" for name in FT_LAYERS.values()]
        qkv, dense = found["layers.0.attention.query_key_value"], found["layers.0.attention.dense"]
        prefix = "model.layers.0.attention.query_key_value"
        width = 64 // 4 + 2 * 8
        assert described(qkv) == {
            f"{prefix}.weight.int8.3.bin": ("int8", (64, width)),
            f"{prefix}.weight.int8.col.3.bin": ("int8", (64, width)),
            f"{prefix}.scale_x_orig_quant.bin": ("float32", (1,)),
            f"{prefix}.scale_y_quant_orig.bin": ("float32", (1,)),
            f"{prefix}.scale_w_quant_orig.3.bin": ("float32", (width,)),
            f"{prefix}.scale_w_quant_orig.col.3.bin": ("float32", (width,)),
            f"{prefix}.scale_y_accum_quant.3.bin": ("float32", (width,)),
            f"{prefix}.scale_y_accum_quant.col.3.bin": ("float32", (width,)),
        }
        assert qkv.smoother is None
        prefix = "model.layers.0.attention.dense"
        assert described(dense) == {
            f"{prefix}.weight.int8.3.bin": ("int8", (16, 64)),
            f"{prefix}.weight.int8.col.3.bin": ("int8", (16, 64)),
            f"{prefix}.scale_x_orig_quant.bin": ("float32", (1,)),
            f"{prefix}.scale_y_quant_orig.bin": ("float32", (1,)),
            f"{prefix}.scale_w_quant_orig.bin": ("float32", (1,)),
            f"{prefix}.scale_w_quant_orig.col.bin": ("float32", (64,)),
            f"{prefix}.scale_y_accum_quant.bin": ("float32", (1,)),
            f"{prefix}.scale_y_accum_quant.col.bin": ("float32", (64,)),
            f"{prefix}.smoother.3.bin": ("float32", (16,)),
        }
        up = found["layers.0.mlp.dense_h_to_4h"]
        assert up.scale_w_quant_orig.name.endswith("dense_h_to_4h.scale_w_quant_orig.bin")
        assert up.scale_w_quant_orig_col.name.endswith("dense_h_to_4h.scale_w_quant_orig.col.3.bin")
        assert up.scale_w_quant_orig_col.shape == (64,)
        plain = checkpoint.rank_files(rank)
        assert {file.dtype for file in plain.values()} == {"bfloat16"}
        read = {f.name for files in found.values() for f in files}
        read |= {file.name for file in plain.values()}
        assert all((folder / name).is_file() for name in read)

    def test_ranks_together_read_every_file(self, folder: Path) -> None:
        checkpoint = read_ft_checkpoint(folder)
        read = set()
        for rank in all_ranks(4):
            read |= {file.name for file in checkpoint.rank_files(rank).values()}
            read |= {f.name for files in checkpoint.rank_int8_files(rank).values() for f in files}
        assert read == {path.name for path in folder.glob("*.bin")}

    def test_it_is_no_plain_checkpoint(self, folder: Path) -> None:
        expected = (
            f"{folder}/config.ini: smoothquant = 0.5: smoothed for int8, not a full-precision"
        )
        for refuse in (
            lambda checkpoint: checkpoint.require_plain(),
            lambda checkpoint: build_network(checkpoint, Rank(0, 4), 16),
        ):
            with pytest.raises(MptTrtError) as error:
                refuse(read_ft_checkpoint(folder))
            assert str(error.value).startswith(expected)

    @pytest.mark.parametrize(
        ("name", "size", "complaint"),
        [
            ("attention.dense.smoother.2", None, "tensor file is missing"),
            ("attention.query_key_value.weight.int8.1", None, "tensor file is missing"),
            ("mlp.dense_4h_to_h.scale_w_quant_orig.col", None, "tensor file is missing"),
            ("attention.dense.weight.int8.col.0", 7, "has 7 bytes, but [16, 64] of int8 are 1024"),
            ("attention.dense.scale_x_orig_quant", 2, "has 2 bytes, but [1] of float32 are 4"),
            ("attention.dense.weight.0", 9, "has 9 bytes, but [16, 64] of bfloat16 are 2048"),
        ],
    )
    def test_damage(self, folder: Path, name: str, size: int | None, complaint: str) -> None:
        path = folder / f"model.layers.0.{name}.bin"
        if size is None:
            path.unlink()
        else:
            path.write_bytes(bytes(size))
        with pytest.raises(MptTrtError) as error:
            read_ft_checkpoint(folder)
        assert str(error.value).startswith(f"{path}: {complaint}")


def described(files: Int8Files) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {file.name: (file.dtype, file.shape) for file in files}


class TestRefusals:
    def refusal(self, folder: Path, spec: CheckpointSpec = BASE, **options: object) -> str:
        with pytest.raises(MptTrtError) as error:
            write_int8(folder, spec, **options)
        assert not [name for name in names_in(folder) if "gpu" in name]
        return str(error.value)

    @pytest.mark.parametrize("alpha", [-0.5, 1.5])
    def test_alpha(self, tmp_path: Path, alpha: float) -> None:
        assert self.refusal(tmp_path, alpha=alpha).startswith(f"smoothquant = {alpha}: alpha must")

    def test_amax_of_another_model(self, tmp_path: Path) -> None:
        amax = random_amax(replace(BASE, num_layers=1))
        message = self.refusal(tmp_path, amax=amax)
        assert message.startswith("layers.1.attention.query_key_value has no activation amax")
        amax = random_amax(replace(BASE, hidden_size=64))
        message = self.refusal(tmp_path, amax=amax)
        assert "the input amax has shape [64], but the layer has 48 such features" in message

    def test_amax_that_is_not_finite(self, tmp_path: Path) -> None:
        amax = random_amax(BASE)
        seen = amax[1]["mlp.dense_4h_to_h"]
        amax[1]["mlp.dense_4h_to_h"] = LinearAmax(seen.x, seen.y * np.float32(np.inf))
        message = self.refusal(tmp_path, amax=amax)
        assert message.startswith("layers.1.mlp.dense_4h_to_h: the output amax holds inf")

    def test_smoothing_beyond_float16(self, tmp_path: Path) -> None:
        amax = random_amax(BASE)
        amax[0]["attention.query_key_value"].x[11] = 1e-12
        message = self.refusal(tmp_path, storage_type="float16", alpha=1, amax=amax)
        assert (
            ": tensor transformer.blocks.0.norm_1.weight: smoothing with alpha 1 takes it"
            in message
        )
        assert "beyond float16; choose another alpha" in message
        write_int8(tmp_path, BASE, "bfloat16", alpha=1, amax=amax)

    def test_kv_scales_of_normalized_keys(self, tmp_path: Path) -> None:
        message = self.refusal(tmp_path, replace(BASE, qk_ln=True), alpha=None)
        assert message.startswith("qk_ln = True: the cache holds normalized keys")


# --- the command line ----------------------------------------------------------------------------

SEEN = ["--calib_size", 4, "--calib_max_seq_length", 16]


class TestCommandLine:
    @pytest.fixture
    def checkpoint(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "text.txt").write_text("all of a sudden; the quick brown fox: " * 8)
        return write_checkpoint(tmp_path / "hf", BASE)

    @pytest.mark.parametrize("option", ["-sq", "--smoothquant"])
    def test_a_model_that_reads(self, checkpoint, tmp_path, convert, capsys, option) -> None:
        """Ranges are those of transformers' model on the same tokens."""
        arguments = ["--calib_text", "text.txt", *SEEN, "-t", "float32", "-tp", 2]
        convert("-i", "hf", "-o", "out", option, 0.5, *arguments)
        assert "Calibrating hf" in capsys.readouterr().err
        folder = tmp_path / "out" / "2-gpu"
        assert read_ft_checkpoint(folder).smoothing == 0.5
        ini = (folder / "config.ini").read_text()
        assert "smoothquant = 0.5\n" in ini
        assert "calibrate_kv_cache = False\n" in ini
        found = Directory(folder, BASE, "float32", 2)
        require_smoothed(found)
        amax = amax_by_transformers(checkpoint, tmp_path / "text.txt")
        require_scales(found, amax, list(FT_LAYERS.values()), of_amax=1e-5)
        provenance = json.loads((folder / "manifest.json").read_text())["calibration"]
        assert provenance["text"] == "text.txt"
        assert (provenance["num_samples"], provenance["sequence_length"]) == (4, 16)

    @pytest.mark.parametrize("option", ["-kv", "--calibrate_kv_cache", "--calibrate-kv-cache"])
    def test_kv_scales(self, checkpoint, tmp_path, convert, option: str) -> None:
        convert("-i", "hf", "-o", "out", option, "--calib_text", "text.txt", *SEEN)
        found = read_ft_checkpoint(tmp_path / "out" / "1-gpu")
        assert (found.smoothing, found.int8_layers) == (None, Int8Layers.QKV)
        assert "smoothquant = None\n" in (found.folder / "config.ini").read_text()

    def test_same_input_same_bytes(self, checkpoint, tmp_path, convert) -> None:
        for out, processes in (("out1", 1), ("out2", 3)):
            arguments = ["-sq", 0.5, "--calib_text", "text.txt", *SEEN, "-p", processes]
            convert("-i", "hf", "-o", out, *arguments)
        first, second = (
            {
                path.name: path.read_bytes()
                for path in (tmp_path / out / "1-gpu").rglob("*")
                if path.is_file()
            }
            for out in ("out1", "out2")
        )
        assert first == second

    def test_another_tokenizer(self, checkpoint, tmp_path, convert, capsys) -> None:
        tokenizer = tmp_path / "tokenizer"
        tokenizer.mkdir()
        for path in checkpoint.glob("tokenizer*"):
            path.rename(tokenizer / path.name)
        arguments = ["-i", "hf", "-o", "out", "-sq", 1, "--calib_text", "text.txt", *SEEN]
        with pytest.raises(SystemExit):
            convert(*arguments)
        assert "tokenizer.json: no such file" in capsys.readouterr().err
        convert(*arguments, "--tokenizer_dir", tokenizer)
        assert read_ft_checkpoint(tmp_path / "out" / "1-gpu").smoothing == 1

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            (["-sq", 1.5], "smoothquant = 1.5: alpha must be within 0"),
            (["-sq", "nan"], "smoothquant = nan: alpha must be within 0"),
            (["-sq", 0.5, "--calib_size", 0], "--calib_size = 0: at least 1 is required"),
            (["-kv", "--batch_size", -1], "--batch_size = -1: at least 1 is required"),
            (["-sq", 0.5, "--calib_text", "nothing"], "nothing: cannot be read as UTF-8 text"),
            (["-sq", 0.5, "--calib_size", 99], "99 samples of 16 tokens are 1584"),
            (["-sq", 0.5, "-tp", 3], "tensor-parallel size 3 does not divide"),
        ],
        ids=str,
    )
    def test_refusals(self, checkpoint, tmp_path, convert, capsys, options, complaint) -> None:
        with pytest.raises(SystemExit) as exit_:
            convert("-i", "hf", "-o", "out", "--calib_text", "text.txt", *SEEN, *options)
        assert exit_.value.code == 1
        errors = capsys.readouterr().err
        assert sum(line.startswith("error: ") for line in errors.splitlines()) == 1
        assert complaint in errors
        assert not (tmp_path / "out").exists()

    def test_kv_scales_of_normalized_keys(self, tmp_path, convert, capsys) -> None:
        checkpoint = write_checkpoint(tmp_path / "hf", replace(BASE, qk_ln=True))
        with pytest.raises(SystemExit):
            convert("-i", checkpoint, "-o", tmp_path / "out", "-kv")
        assert "error: qk_ln = True" in capsys.readouterr().err


def amax_by_transformers(checkpoint: Path, text: Path) -> ActivationAmax:
    """Records the linear layers' activations on four samples of the text, 16 tokens each."""
    from tokenizers import Tokenizer
    from transformers import MptForCausalLM

    tokens = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text.read_text()).ids
    starts = [piece * (len(tokens) - 16) // 3 for piece in range(4)]
    samples = torch.tensor([tokens[start : start + 16] for start in starts])
    model = MptForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    found: ActivationAmax = [{} for _ in model.transformer.blocks]

    def watch(layer: int, name: str):
        def see(_module, inputs, output) -> None:
            seen = (values.detach().abs().amax((0, 1)).numpy() for values in (inputs[0], output))
            found[layer][name] = LinearAmax(*seen)

        return see

    for layer, block in enumerate(model.transformer.blocks):
        for hf_name, name in FT_LAYERS.items():
            block.get_submodule(hf_name).register_forward_hook(watch(layer, name))
    with torch.no_grad():
        model(samples)
    return found
