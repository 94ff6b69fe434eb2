"""Containers, prefixes, and other things that users have instead of a plain checkpoint."""

from __future__ import annotations

import datetime
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpt_trt.checkpoint.files import checkpoint_files, weight_files
from mpt_trt.checkpoint.foreign import require_content
from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.tensors import HfCheckpoint
from mpt_trt.checkpoint.weight_names import plain_name
from mpt_trt.errors import MptTrtError
from mpt_trt.model.tensors import weights
from support.checkpoints import CheckpointSpec, as_torch, tensors, write_checkpoint

BASE = CheckpointSpec(alibi=True)
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 9949316133\n"


def content_of(folder: Path) -> dict[str, Tensor]:
    stored = [w for w in weights(read_hf_config(folder)) if w.hf_name is not None]
    checkpoint = HfCheckpoint(folder, weights(read_hf_config(folder)))
    return {weight.hf_name: as_torch(checkpoint.tensor(weight)) for weight in stored}


def require_base(folder: Path) -> None:
    content, expected = content_of(folder), tensors(BASE)
    assert content.keys() == {name.removeprefix("transformer.") for name in expected}
    for name, tensor in content.items():
        assert torch.equal(tensor, expected[f"transformer.{name}"]), name


def refusal(folder: Path) -> str:
    with pytest.raises(MptTrtError) as error:
        content_of(folder)
    message = str(error.value)
    assert "\n" not in message
    return message


def write_pickle(folder: Path, content: Any, name: str = "pytorch_model.bin") -> Path:
    write_checkpoint(folder, BASE)
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / name)
    return folder / name


def write_tensors(folder: Path, content: dict[str, Tensor], **config: Any) -> Path:
    write_checkpoint(folder, BASE)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    save_file(content, folder / "model.safetensors")
    return folder / "model.safetensors"


def renamed(change: Callable[[str], str]) -> dict[str, Tensor]:
    return {change(name): tensor for name, tensor in tensors(BASE).items()}


def as_composer(state: dict[str, Tensor]) -> dict[str, Any]:
    """Makes Composer's file, with the random states and clocks of a real run."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    clock = {"batch": 100, "total_wct": datetime.timedelta(seconds=5), "loss": np.float64(1.5)}
    model = {f"model.{name}": tensor for name, tensor in state.items()}
    optimizers = {"AdamW": {"state": {0: {"exp_avg": torch.zeros(3)}}}}
    return {
        "state": {"model": model, "optimizers": optimizers, "timestamp": clock},
        "rng": [states],
    }


class TestContainers:
    @pytest.mark.parametrize("keys", ["state_dict", "model", "model_state_dict", "module"])
    def test_of_trainers(self, tmp_path: Path, keys: str, caplog) -> None:
        write_pickle(tmp_path, {keys: tensors(BASE), "step": 5})
        require_base(tmp_path)
        assert f"the weights are taken from its {keys}" in caplog.text

    @pytest.mark.parametrize(
        "name", ["pytorch_model.bin", "ep1-ba100-rank0.pt", "latest.pth", "last.ckpt"]
    )
    def test_of_composer(self, tmp_path: Path, name: str, caplog) -> None:
        write_pickle(tmp_path, as_composer(tensors(BASE)), name)
        require_base(tmp_path)
        assert weight_files(tmp_path) == [tmp_path / name]
        assert tmp_path / name in checkpoint_files(tmp_path)
        assert "the weights are taken from its state/model" in caplog.text
        assert "names of tensors begin with 'model.transformer.'" in caplog.text

    def test_latest_is_a_link(self, tmp_path: Path) -> None:
        path = write_pickle(tmp_path, as_composer(tensors(BASE)), "ep1-ba100-rank0.pt")
        (tmp_path / "latest-rank0.pt").symlink_to(path.name)
        torch.save({}, tmp_path / "optimizer.pt")
        torch.save({}, tmp_path / "rng_state_0.pth")
        require_base(tmp_path)

    def test_several(self, tmp_path: Path) -> None:
        write_pickle(tmp_path, as_composer(tensors(BASE)), "ep1-ba100-rank0.pt")
        torch.save({}, tmp_path / "ep2-ba200-rank0.pt")
        names = "(ep1-ba100-rank0.pt, ep2-ba200-rank0.pt)"
        assert refusal(tmp_path).startswith(f"{tmp_path}: several checkpoints of a trainer {names}")

    @pytest.mark.parametrize("content", [{}, {"step": 5}, {"state": {"optimizers": {}}}])
    def test_without_tensors(self, tmp_path: Path, content: dict) -> None:
        path = write_pickle(tmp_path, content)
        message = refusal(tmp_path)
        assert message.startswith(f"{path}: holds no tensors")
        assert f"(its keys: {', '.join(content) or 'none'})" in message


class TestPrefixes:
    @pytest.mark.parametrize(
        "prefix",
        [
            "module.",
            "_orig_mod.",
            "model.",
            "base_model.model.",
            "module._orig_mod.",
            "_orig_mod.module.",
            "model.module.",
            "base_model.model.model.",
        ],
    )
    @pytest.mark.parametrize("inner", ["transformer.", ""])
    def test_before_names(self, tmp_path: Path, prefix: str, inner: str, caplog) -> None:
        write_tensors(tmp_path, renamed(lambda n: prefix + inner + n.removeprefix("transformer.")))
        require_base(tmp_path)
        assert f"names of tensors begin with {prefix + inner!r}" in caplog.text

    @pytest.mark.parametrize("inner", ["transformer.", ""])
    def test_usual_ones_are_not_reported(self, tmp_path: Path, inner: str, caplog) -> None:
        write_tensors(tmp_path, renamed(lambda n: inner + n.removeprefix("transformer.")))
        require_base(tmp_path)
        assert caplog.records == []

    @pytest.mark.parametrize(
        "wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
    )
    def test_within_names(self, tmp_path: Path, wrapper: str) -> None:
        write_tensors(tmp_path, renamed(lambda n: n.replace("blocks.1.", f"blocks.1.{wrapper}.")))
        require_base(tmp_path)

    @pytest.mark.parametrize(
        ("stored", "plain"),
        [
            ("transformer.blocks.3.ln_1.weight", "blocks.3.norm_1.weight"),
            ("transformer.blocks.3.ln_2.bias", "blocks.3.norm_2.bias"),
            ("transformer.blocks.3.mlp.mlp_up.weight", "blocks.3.ffn.up_proj.weight"),
            ("transformer.blocks.3.mlp.mlp_down.weight", "blocks.3.ffn.down_proj.weight"),
            ("model.transformer.ln_f.weight", "norm_f.weight"),
            ("lm_head.weight", "lm_head.weight"),
            ("model", "model"),
        ],
    )
    def test_plain_names(self, stored: str, plain: str) -> None:
        assert plain_name(stored) == plain

    def test_two_names_of_one_tensor(self, tmp_path: Path) -> None:
        names = ("transformer.wte.weight", "model.transformer.wte.weight")
        content = tensors(BASE)
        path = write_tensors(tmp_path, content | {names[1]: content[names[0]].clone()})
        message = refusal(tmp_path)
        assert message.startswith(f"{path}: tensors ")
        assert all(name in message for name in names)

    def test_state_of_transformer_engine(self, tmp_path: Path) -> None:
        name = "transformer.blocks.0.attn.Wqkv._extra_state"
        write_tensors(tmp_path, tensors(BASE) | {name: torch.zeros(4, dtype=torch.uint8)})
        require_base(tmp_path)


class TestValues:
    NAME = "transformer.blocks.0.ffn.up_proj.weight"

    @pytest.mark.parametrize(
        ("change", "what"),
        [
            (lambda t: t.to("meta"), "is on the meta device"),
            (lambda t: t.to_sparse(), "is sparse (sparse_coo)"),
            (lambda t: t.to_sparse_csr(), "is sparse (sparse_csr)"),
            (lambda t: torch.nested.nested_tensor([t, t[:1]]), "is nested"),
            (lambda t: torch.nested.nested_tensor([t], layout=torch.jagged), "is nested"),
        ],
    )
    def test_none_or_not_all(self, tmp_path: Path, change, what: str) -> None:
        content = tensors(BASE)
        path = write_pickle(tmp_path, content | {self.NAME: change(content[self.NAME])})
        assert refusal(tmp_path).startswith(f"{path}: tensor {self.NAME} {what}")


class TestMissing:
    def test_what_is_there_instead(self, tmp_path: Path) -> None:
        content = renamed(lambda n: n.replace("ffn.up_proj", "ffn.gate"))
        path = write_tensors(tmp_path, content)
        assert refusal(tmp_path).startswith(
            f"{path}: tensor blocks.0.ffn.up_proj.weight is missing (and 1 more); found instead: "
            "transformer.blocks.0.ffn.gate.weight, transformer.blocks.1.ffn.gate.weight; config"
        )

    def test_nothing_else_is_there(self, tmp_path: Path) -> None:
        content = tensors(BASE)
        content.pop("transformer.norm_f.weight")
        path = write_tensors(tmp_path, content)
        assert refusal(tmp_path).startswith(
            f"{path}: tensor norm_f.weight is missing; all {len(content)} present tensors "
        )


QUANTIZED = {
    "GPTQ": ["qweight", "qzeros", "scales", "g_idx"],
    "GPTQ or AWQ": ["qweight", "qzeros", "scales"],
    "bitsandbytes": ["weight", "SCB", "weight_format"],
    "compressed-tensors or FP8": ["weight", "weight_scale"],
}


class TestQuantized:
    @pytest.mark.parametrize(("kind", "parts"), QUANTIZED.items(), ids=QUANTIZED)
    def test_by_names(self, tmp_path: Path, kind: str, parts: list[str]) -> None:
        layer = "transformer.blocks.0.attn.Wqkv"
        content = tensors(BASE) | {f"{layer}.{part}": torch.zeros(4, 4).int() for part in parts}
        path = write_tensors(tmp_path, content)
        message = refusal(tmp_path)
        assert message.startswith(f"{path}: weights are quantized with {kind.split(' or ')[0]}")
        assert "give the unquantized checkpoint" in message

    @pytest.mark.parametrize(
        ("settings", "kind"),
        [
            ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
            ({"quant_method": "awq"}, "AWQ"),
            ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
            ({"load_in_4bit": True}, "bitsandbytes"),
            ({"quant_method": "fp8"}, "fp8"),
        ],
    )
    def test_by_configuration(self, tmp_path: Path, settings: dict, kind: str) -> None:
        write_tensors(tmp_path, tensors(BASE), quantization_config=settings, n_heads="broken")
        path = tmp_path / "config.json"
        assert refusal(tmp_path).startswith(f"{path}: quantization_config is that of {kind}; give")

    @pytest.mark.parametrize("settings", [None, {}])
    def test_no_quantization(self, tmp_path: Path, settings: dict | None) -> None:
        write_tensors(tmp_path, tensors(BASE), quantization_config=settings)
        require_base(tmp_path)

    @pytest.mark.parametrize(
        ("name", "kind"), [("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ")]
    )
    def test_by_a_file(self, tmp_path: Path, name: str, kind: str) -> None:
        write_checkpoint(tmp_path, BASE)
        (tmp_path / name).write_text("{}")
        assert refusal(tmp_path).startswith(
            f"{tmp_path / name}: the model is quantized with {kind}"
        )


class TestAdapters:
    def test_alone(self, tmp_path: Path) -> None:
        adapter = {"peft_type": "LORA", "base_model_name_or_path": "mosaicml/mpt-7b", "r": 8}
        (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
        save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
        message = refusal(tmp_path)
        assert message.startswith(f"{tmp_path}: an adapter (LORA) of mosaicml/mpt-7b, without the")
        assert message.endswith("--adapter")

    def test_unmerged(self, tmp_path: Path) -> None:
        layer = "transformer.blocks.0.attn.Wqkv"
        content = tensors(BASE)
        content[f"{layer}.base_layer.weight"] = content.pop(f"{layer}.weight")
        content[f"{layer}.lora_A.default.weight"] = torch.zeros(8, 48)
        path = write_tensors(tmp_path, content)
        message = refusal(tmp_path)
        assert message.startswith(f"{path}: a model with an unmerged LoRA adapter (tensor ")
        assert "merge_and_unload()" in message


class TestFiles:
    @pytest.mark.parametrize(
        "name",
        [
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "model.safetensors",
            "pytorch_model.bin",
            "model.safetensors.index.json",
        ],
    )
    def test_lfs_pointer(self, tmp_path: Path, name: str) -> None:
        write_checkpoint(tmp_path, BASE)
        if name.startswith(("pytorch", "model.safetensors.index")):
            (tmp_path / "model.safetensors").unlink()
        (tmp_path / name).write_text(POINTER)
        message = refusal(tmp_path)
        assert message.startswith(
            f"{tmp_path / name}: a git-LFS pointer instead of the file itself"
        )
        assert "git lfs pull" in message

    @pytest.mark.parametrize("protocol", [4, 5])
    def test_another_pickle_protocol(self, tmp_path: Path, protocol: int) -> None:
        path = write_pickle(tmp_path, tensors(BASE))
        torch.save(tensors(BASE), path, pickle_protocol=protocol)
        assert refusal(tmp_path).startswith(f"{path}: saved with another pickle_protocol than")

    def test_negated_views(self, tmp_path: Path) -> None:
        state = {name: torch._neg_view(-tensor) for name, tensor in tensors(BASE).items()}
        write_pickle(tmp_path, state)
        require_base(tmp_path)

    def test_lfs_pointer_of_a_shard(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, BASE, layout="sharded_safetensors")
        path = tmp_path / "model-00002-of-00003.safetensors"
        path.write_text(POINTER)
        assert refusal(tmp_path).startswith(f"{path}: a git-LFS pointer")

    @pytest.mark.parametrize(
        "name", ["model.safetensors", "config.json", "model-00002-of-00003.safetensors"]
    )
    def test_dangling_link(self, tmp_path: Path, name: str) -> None:
        sharded = "sharded_safetensors" if "-of-" in name else "safetensors"
        write_checkpoint(tmp_path, BASE, layout=sharded)
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to("../../blobs/gone")
        message = refusal(tmp_path)
        assert message.startswith(
            f"{tmp_path / name}: links to ../../blobs/gone, which does not exist"
        )

    def test_dangling_link_beside_good_weights(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, BASE, layout="bin")
        (tmp_path / "model.safetensors").symlink_to("../../blobs/gone")
        require_base(tmp_path)

    @pytest.mark.parametrize("layout", ["safetensors", "bin"])
    def test_empty(self, tmp_path: Path, layout) -> None:
        write_checkpoint(tmp_path, BASE, layout=layout)
        path = weight_files(tmp_path)[0]
        path.write_bytes(b"")
        assert refusal(tmp_path) == (
            f"{path}: truncated or damaged, every tensor cannot be read (the file is empty); "
            "download the file again"
        )

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                "weights.safetensors",
                "if weights.safetensors has the model's weights, rename it to mo",
            ),
            (
                "model.fp16.BIN",
                "if model.fp16.BIN has the model's weights, rename it to pytorch_mod",
            ),
            ("adapter_model.safetensors", "is an adapter; give its base model"),
            ("model.safetensors.incomplete", "is an unfinished download; download it again"),
            ("model.gguf", "is in GGUF format; give the model as safetensors"),
            ("flax_model.msgpack", "is in Flax format"),
            ("zero_to_fp32.py", "a checkpoint of DeepSpeed"),
            ("model.safetensors/x", "model.safetensors is a folder"),
            ("last/model.safetensors", "last/model.safetensors has some; give"),
            ("training_args.bin", "one of model.safetensors"),
        ],
    )
    def test_weights_that_are_not_read_are_named(
        self, tmp_path: Path, name: str, message: str
    ) -> None:
        write_checkpoint(tmp_path, BASE)
        (tmp_path / "model.safetensors").unlink()
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
        found = refusal(tmp_path)
        assert found.startswith(f"{tmp_path}: no weights found; ")
        assert message in found

    @pytest.mark.parametrize("target", ["/dev/null", None])
    def test_weights_that_are_no_regular_file(self, tmp_path: Path, target: str | None) -> None:
        path = write_checkpoint(tmp_path, BASE) / "model.safetensors"
        path.unlink()
        if target is None:
            os.mkfifo(path)
        else:
            path.symlink_to(target)
        assert refusal(tmp_path) == (
            f"{tmp_path}: no weights found; model.safetensors is a pipe or device; put a regular "
            "file of that name there"
        )

    @pytest.mark.parametrize(
        ("layout", "name", "message"),
        [
            ("bin", "model.safetensors", "a file of PyTorch; rename it to pytorch_model.bin"),
            ("safetensors", "pytorch_model.bin", "a safetensors file; rename it to model.safeten"),
        ],
    )
    def test_a_name_of_the_other_format(
        self, tmp_path: Path, layout, name: str, message: str
    ) -> None:
        write_checkpoint(tmp_path, BASE, layout=layout)
        weight_files(tmp_path)[0].rename(tmp_path / name)
        assert refusal(tmp_path).startswith(f"{tmp_path / name}: {message}")

    @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
    def test_a_web_page_instead_of_weights(self, tmp_path: Path, name: str) -> None:
        write_checkpoint(tmp_path, BASE)
        (tmp_path / "model.safetensors").unlink()
        (tmp_path / name).write_text("<!DOCTYPE html><html>Access denied</html>")
        assert refusal(tmp_path).startswith(f"{tmp_path / name}: a web page or message, not")

    def test_unreadable(self, tmp_path: Path, monkeypatch) -> None:
        path = write_checkpoint(tmp_path, BASE) / "model.safetensors"

        def deny(*_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", deny)
        with pytest.raises(MptTrtError, match=f"^{path}: cannot be read .Permission denied.; ask"):
            require_content(path)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_folder_without_permission(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "folder", BASE)
        folder.chmod(0)
        try:
            assert refusal(folder).startswith(f"{folder}: cannot be read (Permission denied)")
        finally:
            folder.chmod(0o700)

    @pytest.mark.parametrize("layout", ["sharded_safetensors", "sharded_bin"])
    def test_shards_without_index(self, tmp_path: Path, layout) -> None:
        write_checkpoint(tmp_path, BASE, layout=layout)
        index = next(tmp_path.glob("*.index.json"))
        index.unlink()
        message = refusal(tmp_path)
        assert message.startswith(f"{tmp_path}: shards (")
        assert f"download {index.name} from" in message

    def test_one_shard_without_index(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path, BASE) / "model.safetensors"
        path.rename(tmp_path / "model-00001-of-00001.safetensors")
        assert "download model.safetensors.index.json" in refusal(tmp_path)

    def test_distributed(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path, BASE) / "model.safetensors"
        path.rename(tmp_path / "__0_0.distcp")
        assert refusal(tmp_path).startswith(f"{tmp_path}: a distributed checkpoint (.distcp)")


def test_relatives_names(tmp_path: Path) -> None:
    """mosaic_gpt's names of layers are read as those of MPT."""
    names = {"norm_1": "ln_1", "norm_2": "ln_2", "norm_f": "ln_f", "ffn.up_proj": "mlp.mlp_up"}
    names["ffn.down_proj"] = "mlp.mlp_down"

    def rename(name: str) -> str:
        for plain, theirs in names.items():
            name = name.replace(plain, theirs)
        return name

    path = write_tensors(tmp_path, renamed(rename))
    assert "transformer.blocks.0.mlp.mlp_up.weight" in load_file(path)
    require_base(tmp_path)
