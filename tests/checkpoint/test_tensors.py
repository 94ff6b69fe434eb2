"""Lazy reading of Hugging Face checkpoints in every layout, and errors about broken ones."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpt_trt.arrays.cast import is_finite
from mpt_trt.checkpoint.files import checkpoint_files, weight_files
from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.tensors import HfCheckpoint, not_finite
from mpt_trt.errors import MptTrtError
from mpt_trt.model.tensors import weights
from support.checkpoints import (
    CheckpointSpec,
    as_numpy,
    as_torch,
    tensors,
    write_checkpoint,
    write_zeros,
)
from support.paths import REPOSITORY

BASE = CheckpointSpec()
LAYOUTS = ("safetensors", "sharded_safetensors", "bin", "sharded_bin")
SPECS = {
    "plain": BASE,
    "grouped": replace(BASE, num_heads=6, num_kv_heads=2),
    "multi-query": replace(BASE, num_kv_heads=1),
    "biases": replace(BASE, no_bias=False),
    "learned positions": replace(BASE, alibi=False),
    "untied": replace(BASE, tie_word_embeddings=False),
    "qk_ln": replace(BASE, qk_ln=True, num_heads=6, num_kv_heads=2),
    "qk_ln, biases": replace(BASE, qk_ln=True, no_bias=False),
    "qk_ln, biases, rmsnorm": replace(BASE, qk_ln=True, no_bias=False, norm_type="rmsnorm"),
    "rmsnorm, biases": replace(BASE, norm_type="rmsnorm", no_bias=False),
    "odd sizes": CheckpointSpec(
        hidden_size=55, num_heads=5, num_layers=3, vocab_size=101, expansion_ratio=3
    ),
    "float expansion_ratio": replace(BASE, expansion_ratio=2.5),
}


def open_checkpoint(folder: Path) -> HfCheckpoint:
    return HfCheckpoint(folder, weights(read_hf_config(folder)))


def content_of(checkpoint: HfCheckpoint, folder: Path) -> dict[str, Tensor]:
    """All tensors, by Hugging Face name without prefix."""
    stored = [w for w in weights(read_hf_config(folder)) if w.hf_name is not None]
    return {weight.hf_name: as_torch(checkpoint.tensor(weight)) for weight in stored}


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def without_prefix(content: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("transformer."): tensor for name, tensor in content.items()}


def refusal(folder: Path) -> str:
    with pytest.raises(MptTrtError) as error:
        open_checkpoint(folder)
    message = str(error.value)
    assert "\n" not in message
    return message


class TestContent:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "no prefix"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, tmp_path: Path, layout, prefix: bool, dtype: torch.dtype) -> None:
        write_checkpoint(tmp_path, BASE, layout=layout, prefix=prefix, dtype=dtype)
        expected = {name: tensor.to(dtype) for name, tensor in tensors(BASE).items()}
        require_equal(content_of(open_checkpoint(tmp_path), tmp_path), without_prefix(expected))

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
    def test_architectures(self, tmp_path: Path, spec: CheckpointSpec, layout) -> None:
        write_checkpoint(tmp_path, spec, layout=layout)
        expected = without_prefix(tensors(spec))
        require_equal(content_of(open_checkpoint(tmp_path), tmp_path), expected)

    def test_float64(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, BASE, dtype=torch.float64)
        found = content_of(open_checkpoint(tmp_path), tmp_path)
        require_equal(found, {n: t.double() for n, t in without_prefix(tensors(BASE)).items()})

    def test_parameters_and_views(self, tmp_path: Path) -> None:
        """`torch.save` has stored a module's parameters and transposed matrices."""
        write_checkpoint(tmp_path, BASE, layout="bin")
        content = tensors(BASE)
        name = "transformer.blocks.0.attn.Wqkv.weight"
        stored = {n: torch.nn.Parameter(tensor) for n, tensor in content.items()}
        stored[name] = torch.nn.Parameter(content[name].t().contiguous().t())
        torch.save(stored, tmp_path / "pytorch_model.bin")
        found = content_of(open_checkpoint(tmp_path), tmp_path)
        require_equal(found, without_prefix(content))
        assert not any(tensor.requires_grad for tensor in found.values())

    def test_order_of_preference(self, tmp_path: Path) -> None:
        for layout in LAYOUTS:
            write_checkpoint(tmp_path, BASE, layout=layout)
        shards = [f"-0000{n}-of-00003" for n in (1, 2, 3)]
        for whole, names in (
            ("model.safetensors", ["model.safetensors"]),
            ("model.safetensors.index.json", [f"model{shard}.safetensors" for shard in shards]),
            ("pytorch_model.bin", ["pytorch_model.bin"]),
            ("pytorch_model.bin.index.json", [f"pytorch_model{shard}.bin" for shard in shards]),
        ):
            assert weight_files(tmp_path) == [tmp_path / name for name in names]
            (tmp_path / whole).unlink()

    def test_shards_may_be_links(self, tmp_path: Path) -> None:
        """The hub's cache has such links."""
        blobs = write_checkpoint(tmp_path / "blobs", BASE, layout="sharded_safetensors")
        folder = tmp_path / "snapshot"
        folder.mkdir()
        for path in blobs.iterdir():
            (folder / path.name).symlink_to(path)
        found = content_of(open_checkpoint(folder), folder)
        require_equal(found, without_prefix(tensors(BASE)))

    def test_files_that_count(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, BASE, layout="sharded_bin")
        (tmp_path / "README.md").touch()
        assert {path.name for path in checkpoint_files(tmp_path)} == {
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "pytorch_model.bin.index.json",
            *(f"pytorch_model-0000{n}-of-00003.bin" for n in (1, 2, 3)),
        }


MEASURE = """
import sys
from pathlib import Path

import torch  # what .bin files need; its own memory is not in question
from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.tensors import HfCheckpoint
from mpt_trt.model.tensors import weights

def kib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))

folder = Path(sys.argv[1])
found = weights(read_hf_config(folder))
before = kib()
checkpoint = HfCheckpoint(folder, found)
opened = kib()
wte = checkpoint.tensor(found[0])
assert wte.nbytes > 100 << 20
total = wte.sum().item()
print(total, opened - before, kib() - before)
"""


class TestMemory:
    SPEC = CheckpointSpec(hidden_size=1024, num_heads=8, num_layers=2, vocab_size=50_000)

    def write_sparse(self, folder: Path) -> None:
        """A safetensors file of zeros, 300 MB of which none are on disk."""
        write_checkpoint(folder, replace(self.SPEC, num_layers=1, vocab_size=2))
        config = json.loads((folder / "config.json").read_text())
        config |= {"n_layers": 2, "vocab_size": 50_000}
        (folder / "config.json").write_text(json.dumps(config))
        write_zeros(folder)

    def write_bin(self, folder: Path) -> None:
        write_checkpoint(folder, CheckpointSpec())
        (folder / "model.safetensors").unlink()
        config = json.loads((folder / "config.json").read_text())
        config |= {"d_model": 1024, "n_heads": 8, "n_layers": 1, "vocab_size": 27_000}
        (folder / "config.json").write_text(json.dumps(config))
        stored = [w for w in weights(read_hf_config(folder)) if w.hf_name is not None]
        content = {f"transformer.{w.hf_name}": torch.zeros(w.shape) for w in stored}
        torch.save(content, folder / "pytorch_model.bin")

    @pytest.mark.parametrize("layout", ["safetensors", "bin"])
    def test_only_what_is_computed_with_takes_memory(self, tmp_path: Path, layout: str) -> None:
        if layout == "bin":
            self.write_bin(tmp_path)
        else:
            self.write_sparse(tmp_path)
        output = subprocess.check_output(
            [sys.executable, "-c", MEASURE, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            text=True,
        )
        total, opening, touching = map(float, output.split())
        assert total == 0
        assert opening < 8 << 10  # KiB
        assert touching < 24 << 10
        if layout == "bin":
            (tmp_path / "pytorch_model.bin").unlink()


class TestNames:
    def edit(self, folder: Path, changes: dict[str, Tensor | None]) -> Path:
        path = folder / "model.safetensors"
        content = load_file(path) | changes
        save_file({name: t for name, t in content.items() if t is not None}, path)
        return path

    def test_missing_tensor(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, BASE)
        name = "blocks.1.ffn.up_proj.weight"
        path = self.edit(tmp_path, {f"transformer.{name}": None})
        assert refusal(tmp_path).startswith(f"{path}: tensor {name} is missing;")

    def test_missing_tensors_of_shards(self, tmp_path: Path) -> None:
        """Shards without the layers that config.json promises."""
        write_checkpoint(tmp_path, BASE, layout="sharded_safetensors")
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"n_layers": 3}))
        message = refusal(tmp_path)
        assert message.startswith(f"{tmp_path}: tensor blocks.2.attn.Wqkv.weight is missing (and 5")

    def test_bias_in_a_model_without(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, BASE)
        name = "transformer.blocks.0.attn.out_proj.bias"
        path = self.edit(tmp_path, {name: torch.zeros(48)})
        assert refusal(tmp_path).startswith(f"{path}: unexpected tensor {name};")

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_biases_that_config_denies(self, tmp_path: Path, layout) -> None:
        write_checkpoint(tmp_path, replace(BASE, no_bias=False), layout=layout)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"no_bias": True}))
        assert "unexpected tensor transformer.blocks.0.attn.Wqkv.bias (and 12 " in refusal(tmp_path)

    def test_biases_that_config_promises(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, BASE)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"no_bias": False}))
        assert "tensor blocks.0.attn.Wqkv.bias is missing (and 12 more)" in refusal(tmp_path)

    @pytest.mark.parametrize(
        ("name", "shape", "expected"),
        [
            ("transformer.wte.weight", [96, 48], [97, 48]),
            ("transformer.blocks.1.attn.Wqkv.weight", [96, 48], [144, 48]),
            ("transformer.blocks.0.ffn.down_proj.weight", [192, 48], [48, 192]),
            ("transformer.norm_f.weight", [48, 1], [48]),
        ],
    )
    @pytest.mark.parametrize("suffix", ["safetensors", "bin"])
    def test_wrong_shape(self, tmp_path, name: str, shape: list, expected: list, suffix) -> None:
        write_checkpoint(tmp_path, BASE, layout=suffix)
        content = tensors(BASE) | {name: torch.zeros(shape)}
        path = tmp_path / {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[suffix]
        torch.save(content, path) if suffix == "bin" else save_file(content, path)
        assert refusal(tmp_path) == (
            f"{path}: tensor {name} has shape {shape}, but config.json requires {expected}"
        )

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
    def test_quantized(self, tmp_path: Path, dtype: torch.dtype) -> None:
        name_of = {torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}
        write_checkpoint(tmp_path, BASE)
        name = "transformer.blocks.0.ffn.up_proj.weight"
        path = self.edit(tmp_path, {name: torch.zeros(192, 48).to(dtype)})
        checkpoint = open_checkpoint(tmp_path)
        by_name = {w.hf_name: w for w in weights(read_hf_config(tmp_path))}
        with pytest.raises(MptTrtError) as error:
            checkpoint.tensor(by_name["blocks.0.ffn.up_proj.weight"])
        assert str(error.value).startswith(f"{path}: tensor {name} is {name_of[dtype]};")

    def test_description(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, BASE, layout="sharded_bin")
        wte = weights(read_hf_config(tmp_path))[0]
        assert open_checkpoint(tmp_path).describe(wte) == (
            f"{tmp_path}/pytorch_model-00003-of-00003.bin: tensor transformer.wte.weight"
        )


class TestTiedHead:
    @pytest.mark.parametrize("name", ["lm_head.weight", "transformer.lm_head.weight"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_equal(self, tmp_path: Path, name: str, layout) -> None:
        content = tensors(BASE)
        content[name] = content["transformer.wte.weight"].clone()
        self.write(tmp_path, content, layout)
        found = content_of(open_checkpoint(tmp_path), tmp_path)
        require_equal(found, without_prefix(tensors(BASE)))

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("difference", ["one value", "shape"])
    def test_different(self, tmp_path: Path, layout, difference: str) -> None:
        content = tensors(BASE)
        head = content["transformer.wte.weight"].clone()
        head[-1, -1] += 1e-3
        content["lm_head.weight"] = head if difference == "one value" else head[:-1].clone()
        self.write(tmp_path, content, layout)
        message = refusal(tmp_path)
        assert re.search(r"(model|00001-of-00003)\.\w+: tensor lm_head.weight differs", message)
        assert "tie_word_embeddings" in message

    def write(self, folder: Path, content: dict[str, Tensor], layout) -> None:
        """Writes `content` next to a config.json with a tied head."""
        write_checkpoint(folder, BASE, layout=layout)
        suffix = "bin" if "bin" in layout else "safetensors"
        stem = "pytorch_model" if suffix == "bin" else "model"
        shards = {f"{stem}.{suffix}": sorted(content)}
        if "sharded" in layout:
            names = [f"{stem}-0000{n}-of-00003.{suffix}" for n in (1, 2, 3)]
            shards = {name: sorted(content)[n::3] for n, name in enumerate(names)}
            index = {name: file for file, names in shards.items() for name in names}
            index_path = folder / f"{stem}.{suffix}.index.json"
            index_path.write_text(json.dumps({"weight_map": index}))
        for file, names in shards.items():
            part = {name: content[name] for name in names}
            save = torch.save if suffix == "bin" else save_file
            save(part, folder / file)


class TestIndex:
    def rewrite(self, folder: Path, change: dict) -> tuple[Path, str]:
        """The index with one tensor elsewhere; returns the index and the tensor's name."""
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        name = "transformer.wte.weight"
        index["weight_map"] |= {name: change}
        path.write_text(json.dumps(index))
        return path, name

    @pytest.mark.parametrize("layout", ["sharded_safetensors", "sharded_bin"])
    def test_missing_shard(self, tmp_path: Path, layout) -> None:
        write_checkpoint(tmp_path, BASE, layout=layout)
        shard = next(tmp_path.glob("*-00002-of-00003.*"))
        held = [name for name, f in self.weight_map(tmp_path).items() if f == shard.name]
        shard.unlink()
        message = refusal(tmp_path)
        assert message.startswith(f"{shard}: shard is missing (it holds ")
        assert re.search(r"it holds (\S+)\)", message)[1] in held

    def weight_map(self, folder: Path) -> dict[str, str]:
        return json.loads(next(folder.glob("*.index.json")).read_text())["weight_map"]

    @pytest.mark.parametrize(
        "place", ["../other/x.safetensors", "sub/../x.safetensors", "sub/x.safetensors"]
    )
    @pytest.mark.parametrize("exists", [True, False])
    def test_outside_its_folder(self, tmp_path: Path, place: str, exists: bool) -> None:
        folder = write_checkpoint(tmp_path / "here", BASE, layout="sharded_safetensors")
        if exists:
            (folder / "sub").mkdir()
            (folder / place).parent.mkdir(exist_ok=True)
            save_file(tensors(BASE), folder / place)
        index, name = self.rewrite(folder, place)
        message = refusal(folder)
        assert message.startswith(f"{index}: weight_map puts {name} into {place!r}, outside")

    def test_absolute_path(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "here", BASE, layout="sharded_safetensors")
        save_file(tensors(BASE), tmp_path / "x.safetensors")
        index, _ = self.rewrite(folder, str(tmp_path / "x.safetensors"))
        assert refusal(folder).startswith(f"{index}: weight_map puts ")

    @pytest.mark.parametrize("place", ["", "..", 5, None, ["a"]])
    def test_no_file_name(self, tmp_path: Path, place) -> None:
        write_checkpoint(tmp_path, BASE, layout="sharded_safetensors")
        _, name = self.rewrite(tmp_path, place)
        assert name in refusal(tmp_path)

    @pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
    def test_no_weight_map(self, tmp_path: Path, content: str) -> None:
        write_checkpoint(tmp_path, BASE, layout="sharded_safetensors")
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(content)
        assert refusal(tmp_path).startswith(f"{path}: field weight_map is missing")

    def test_invalid_json(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, BASE, layout="sharded_safetensors")
        path = tmp_path / "model.safetensors.index.json"
        path.write_text("{")
        assert refusal(tmp_path).startswith(f"{path}: not valid JSON")

    def test_no_weights(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, BASE)
        (tmp_path / "model.safetensors").unlink()
        assert refusal(tmp_path).startswith(f"{tmp_path}: no weights found; one of model.safetenso")

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(MptTrtError, match=f"^no such folder: {tmp_path}/nothing"):
            checkpoint_files(tmp_path / "nothing")


class TestDamage:
    @pytest.mark.parametrize("layout", ["bin", "sharded_bin"])
    def test_flipped_bit_in_a_bin(self, tmp_path: Path, layout) -> None:
        write_checkpoint(tmp_path / "hf", BASE, layout=layout)
        (path, *_) = sorted((tmp_path / "hf").glob("*.bin"))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert refusal(tmp_path / "hf").startswith(f"{path}: truncated or damaged")

    @pytest.mark.parametrize("layout", ["sharded_safetensors", "sharded_bin"])
    @pytest.mark.parametrize("is_indexed", [True, False])
    def test_a_tensor_in_two_shards(self, tmp_path: Path, layout, is_indexed: bool) -> None:
        folder = write_checkpoint(tmp_path / "hf", BASE, layout=layout)
        index = next(folder.glob("*.index.json"))
        content = json.loads(index.read_text())
        first, second, *_ = sorted(set(content["weight_map"].values()))
        (folder / second).write_bytes((folder / first).read_bytes())
        if not is_indexed:
            content["weight_map"] = {"a": first, "b": second}
            index.write_text(json.dumps(content))
        message = refusal(folder)
        assert message.startswith(f"{folder / second}: ")
        assert ("which the index puts into" if is_indexed else "are both") in message

    @pytest.mark.parametrize("layout", ["safetensors", "sharded_safetensors"])
    def test_truncated_safetensors_name_the_first_tensor_cut_off(self, tmp_path, layout) -> None:
        write_checkpoint(tmp_path, BASE, layout=layout)
        path = sorted(tmp_path.glob("*.safetensors"))[0]
        whole = path.read_bytes()
        data = 8 + struct.unpack("<Q", whole[:8])[0]
        header = json.loads(whole[8:data])
        header.pop("__metadata__")
        assert len(header) > 3
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            for position in (start, end - 1):
                path.write_bytes(whole[: data + position])
                message = refusal(tmp_path)
                assert message.startswith(f"{path}: truncated or damaged, {name} cannot be read (")

    @pytest.mark.parametrize("size", [0, 5, 8, 100])
    def test_safetensors_cut_off_in_the_header(self, tmp_path: Path, size: int) -> None:
        write_checkpoint(tmp_path, BASE)
        path = tmp_path / "model.safetensors"
        os.truncate(path, size)
        message = refusal(tmp_path)
        assert message.startswith(f"{path}: truncated or damaged, every tensor cannot be read (")

    @pytest.mark.parametrize("layout", ["bin", "sharded_bin"])
    @pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
    def test_truncated_bin(self, tmp_path: Path, layout, share: float) -> None:
        write_checkpoint(tmp_path, BASE, layout=layout)
        path = sorted(tmp_path.glob("*.bin"))[-1]
        os.truncate(path, int(path.stat().st_size * share))
        message = refusal(tmp_path)
        assert message.startswith(f"{path}: truncated or damaged, every tensor cannot be read (")

    def test_a_bin_that_is_no_state_dict(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, BASE, layout="bin")
        path = tmp_path / "pytorch_model.bin"
        torch.save([torch.zeros(3)], path)
        assert refusal(tmp_path) == f"{path}: a state dict is expected, found list"

    def test_old_format(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, BASE, layout="bin")
        path = tmp_path / "pytorch_model.bin"
        torch.save(tensors(BASE), path, _use_new_zipfile_serialization=False)
        message = refusal(tmp_path)
        assert message.startswith(f"{path}: in PyTorch's format from before version 1.6")
        assert message.endswith("save it again as safetensors")


class Command:
    """Unpickled carelessly, this runs a shell command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class TestCodeInPickles:
    @pytest.mark.parametrize("layout", ["zip", "old", "bare pickle"])
    def test_nothing_is_executed(self, tmp_path: Path, layout: str) -> None:
        folder = write_checkpoint(tmp_path / "checkpoint", BASE, layout="bin")
        path, witness = folder / "pytorch_model.bin", tmp_path / "witness"
        content = tensors(BASE) | {"extra": Command(f"touch {witness}")}
        if layout == "bare pickle":
            path.write_bytes(pickle.dumps({"extra": content["extra"]}))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
        message = refusal(folder)
        assert message.startswith(f"{path}: ")
        assert not witness.exists()
        if layout == "zip":
            assert "rejected, because it holds more than tensors (posix.system)" in message
        # The payload is live: PyTorch itself runs it when told to trust the file.
        trusting = pickle.load if layout == "bare pickle" else torch.load
        options = {} if layout == "bare pickle" else {"weights_only": False}
        with path.open("rb") as stream:
            trusting(stream, **options)
        assert witness.exists()


class TestFinite:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("position", [(0, 0), (3, 5), (6, 10)])
    def test_one_value(self, dtype: torch.dtype, value: float, position: tuple) -> None:
        tensor = torch.ones(7, 11, dtype=dtype)
        assert is_finite(as_numpy(tensor))
        tensor[position] = value
        assert not is_finite(as_numpy(tensor))
        kind = "NaN" if math.isnan(value) else "Inf"
        message = str(not_finite(as_numpy(tensor), "x.bin: tensor w"))
        assert message.startswith(f"x.bin: tensor w holds {kind} at {list(position)};")

    def test_vector(self) -> None:
        tensor = torch.zeros(5)
        tensor[3] = math.inf
        assert "holds Inf at [3];" in str(not_finite(as_numpy(tensor), "w"))

    def test_infinities_that_cancel(self) -> None:
        assert not is_finite(np.array([math.inf, -math.inf, 1.0]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_a_sum_that_overflows_is_no_reason(self, dtype: torch.dtype) -> None:
        largest = torch.full((100,), torch.finfo(dtype).max, dtype=dtype)
        assert not torch.isfinite(largest.sum())
        assert is_finite(as_numpy(largest))
