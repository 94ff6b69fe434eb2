"""LoRA adapters: every setting that a merge depends on, and rejected ones.

The expected weights are computed here in float64 from PEFT's published formula. They were compared
with PEFT 0.21's own merge_and_unload(), which differs by float32 rounding only.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.tensors import HfCheckpoint
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.reference import reference_logits
from mpt_trt.ft.checkpoint import read_ft_checkpoint
from mpt_trt.model.tensors import weights
from mpt_trt.system.files import content_hash
from support.checkpoints import CheckpointSpec, tensors, write_checkpoint
from support.engines import call_tool, one_line_error, run_tool

BASE = CheckpointSpec()
SIZES = {
    "attn.Wqkv": (144, 48),
    "attn.out_proj": (48, 48),
    "ffn.up_proj": (192, 48),
    "ffn.down_proj": (48, 192),
}
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "mosaicml/mpt-7b",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": 16,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "r": 4,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": ["Wqkv", "down_proj"],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}
LAYERS = ("attn.Wqkv", "ffn.down_proj")


def adapter_tensors(ranks: dict[str, int] | None = None, part: str = "weight") -> dict[str, Tensor]:
    """A and B of LAYERS in both blocks. ranks: by module, where they are not 4."""
    generator = torch.Generator().manual_seed(5)
    content = {}
    for layer in range(BASE.num_layers):
        for name in LAYERS:
            module = f"transformer.blocks.{layer}.{name}"
            rank = (ranks or {}).get(module, 4)
            out_features, in_features = SIZES[name]
            prefix = f"base_model.model.{module}"
            content[f"{prefix}.lora_A.{part}"] = torch.randn(rank, in_features, generator=generator)
            content[f"{prefix}.lora_B.{part}"] = torch.randn(
                out_features, rank, generator=generator
            )
    return content


def write_adapter(
    folder: Path,
    content: dict[str, Tensor] | None = None,
    suffix: str = "safetensors",
    **settings: Any,
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | settings))
    content = adapter_tensors() if content is None else content
    path = folder / f"adapter_model.{suffix}"
    save_file(content, path) if suffix == "safetensors" else torch.save(content, path)
    return folder


def merged(folder: Path, adapter: Path) -> dict[str, np.ndarray]:
    model = [w for w in weights(read_hf_config(folder)) if w.hf_name is not None]
    checkpoint = HfCheckpoint(folder, weights(read_hf_config(folder)), adapter)
    return {str(weight.hf_name): checkpoint.tensor(weight) for weight in model}


def expected(content: dict[str, Tensor], scaling: dict[str, float]) -> dict[str, np.ndarray]:
    """All weights, float64. scaling: by module within the base model."""
    result = {n.removeprefix("transformer."): t.double() for n, t in tensors(BASE).items()}
    for module, factor in scaling.items():
        prefix = f"base_model.model.{module}"
        up = next(t for n, t in content.items() if n.startswith(f"{prefix}.lora_B."))
        down = next(t for n, t in content.items() if n.startswith(f"{prefix}.lora_A."))
        name = f"{module.removeprefix('transformer.')}.weight"
        result[name] = result[name] + factor * up.double() @ down.double()
    return {name: tensor.numpy() for name, tensor in result.items()}


def modules() -> list[str]:
    return [f"transformer.blocks.{n}.{name}" for n in range(BASE.num_layers) for name in LAYERS]


def require_merged(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert np.abs(found[name] - weight).max() < 1e-6 * np.abs(weight).max(), name


class TestMerge:
    @pytest.mark.parametrize("suffix", ["safetensors", "bin"])
    @pytest.mark.parametrize("part", ["weight", "default.weight", "my_adapter.weight"])
    def test_alpha_over_r(self, tmp_path: Path, suffix: str, part: str) -> None:
        folder = write_checkpoint(tmp_path / "hf", BASE)
        content = adapter_tensors(part=part)
        adapter = write_adapter(tmp_path / "adapter", content, suffix)
        found = merged(folder, adapter)
        require_merged(found, expected(content, dict.fromkeys(modules(), 4.0)))
        assert found["blocks.0.attn.Wqkv.weight"].dtype == np.float32

    def test_rank_stabilised(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "hf", BASE)
        adapter = write_adapter(tmp_path / "adapter", use_rslora=True)
        scaling = dict.fromkeys(modules(), 16 / math.sqrt(4))
        require_merged(merged(folder, adapter), expected(adapter_tensors(), scaling))

    def test_per_module_settings(self, tmp_path: Path) -> None:
        """The first pattern that matches the end of a module's name decides, as in PEFT."""
        folder = write_checkpoint(tmp_path / "hf", BASE)
        ranks = {
            "transformer.blocks.0.attn.Wqkv": 2,
            "transformer.blocks.0.ffn.down_proj": 3,
            "transformer.blocks.1.ffn.down_proj": 3,
        }
        adapter = write_adapter(
            tmp_path / "adapter",
            adapter_tensors(ranks),
            rank_pattern={"blocks.0.attn.Wqkv": 2, "down_proj": 3},
            alpha_pattern={r"blocks\.1\..*": 32, "own_proj": 99},
        )
        scaling = {
            "transformer.blocks.0.attn.Wqkv": 16 / 2,
            "transformer.blocks.0.ffn.down_proj": 16 / 3,
            "transformer.blocks.1.attn.Wqkv": 32 / 4,
            "transformer.blocks.1.ffn.down_proj": 32 / 3,
        }
        require_merged(merged(folder, adapter), expected(adapter_tensors(ranks), scaling))

    def test_embedding(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "hf", BASE)
        up, down = torch.randn(48, 4), torch.randn(4, 97)
        prefix = "base_model.model.transformer.wte.lora_embedding_"
        adapter = write_adapter(tmp_path / "adapter", {f"{prefix}A": down, f"{prefix}B": up})
        wanted = expected({}, {})
        wanted["wte.weight"] = wanted["wte.weight"] + 4 * (up.double() @ down.double()).T.numpy()
        require_merged(merged(folder, adapter), wanted)

    def test_embedding_beside_a_stored_tied_head(self, tmp_path: Path) -> None:
        """The head is the embedding, so the update counts for both."""
        folder = write_checkpoint(tmp_path / "hf", BASE)
        content = tensors(BASE)
        content["lm_head.weight"] = content["transformer.wte.weight"].clone()
        save_file(content, folder / "model.safetensors")
        prefix = "base_model.model.transformer.wte.lora_embedding_"
        update = {f"{prefix}A": torch.randn(4, 97), f"{prefix}B": torch.randn(48, 4)}
        found = merged(folder, write_adapter(tmp_path / "adapter", update))
        added = 4 * (update[f"{prefix}B"] @ update[f"{prefix}A"]).T
        wanted = content["transformer.wte.weight"] + added
        assert np.abs(found["wte.weight"] - wanted.numpy()).max() < 1e-5

    def test_fan_in_fan_out_has_no_effect_on_linear_layers(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "hf", BASE)
        adapter = write_adapter(tmp_path / "adapter", fan_in_fan_out=True)
        wanted = expected(adapter_tensors(), dict.fromkeys(modules(), 4.0))
        require_merged(merged(folder, adapter), wanted)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_types(self, tmp_path: Path, dtype: torch.dtype) -> None:
        """Updates of a 16-bit checkpoint are added in float32, for any type of the adapter."""
        folder = write_checkpoint(tmp_path / "hf", BASE, dtype=dtype)
        content = {name: tensor.to(dtype) for name, tensor in adapter_tensors().items()}
        found = merged(folder, write_adapter(tmp_path / "adapter", content))
        name = "blocks.0.attn.Wqkv.weight"
        base = tensors(BASE)[f"transformer.{name}"].to(dtype).double().numpy()
        module = "transformer.blocks.0.attn.Wqkv"
        update = expected(content, {module: 4.0})[name] - expected({}, {})[name]
        assert np.abs(found[name] - (base + update)).max() < 1e-6 * np.abs(base + update).max()


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "field"),
        [
            ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
            ({"peft_type": None}, "peft_type = None"),
            ({"use_dora": True}, "use_dora = True"),
            ({"bias": "all"}, "bias = 'all'"),
            ({"lora_bias": True}, "lora_bias = True"),
            ({"modules_to_save": ["wte"]}, "modules_to_save = ['wte']"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
            ({"layer_replication": [[0, 2]]}, "layer_replication = [[0, 2]]"),
            ({"something_new": {"a": 1}}, "something_new = {'a': 1}"),
            ({"r": 0}, "r = 0"),
            ({"r": "4"}, "r = '4'"),
            ({"lora_alpha": "16"}, "lora_alpha = '16'"),
            ({"lora_alpha": math.nan}, "lora_alpha = nan"),
            ({"use_rslora": "yes"}, "use_rslora = 'yes'"),
            ({"rank_pattern": {"Wqkv": "4"}}, "rank_pattern.Wqkv = '4'"),
            ({"alpha_pattern": {"(": 4}}, "alpha_pattern = '('"),
            ({"rank_pattern": [4]}, "rank_pattern = [4]"),
        ],
        ids=str,
    )
    def test_settings(self, tmp_path: Path, settings: dict, field: str) -> None:
        folder = write_checkpoint(tmp_path / "hf", BASE)
        adapter = write_adapter(tmp_path / "adapter", **settings)
        message = self.refusal(folder, adapter)
        assert message.startswith(f"{adapter / 'adapter_config.json'}: {field}: ")

    MODULE = "base_model.model.transformer.blocks.0.attn.Wqkv"

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({f"{MODULE}.lora_magnitude_vector": torch.ones(144)}, "DoRA's tensor"),
            (
                {f"{MODULE}.bias": torch.ones(144)},
                f"tensor {MODULE}.bias does not belong to a plain",
            ),
            ({f"{MODULE}.lora_A.other.weight": torch.ones(4, 48)}, "holds several adapters"),
            ({f"{MODULE}.lora_B.weight": None}, f"{MODULE} has only A of LoRA"),
            ({f"{MODULE}.lora_A.weight": torch.ones(8, 48)}, "gives it rank 4"),
            ({f"{MODULE}.lora_A.weight": torch.ones(4, 47)}, "has shape [144, 47], but the model"),
            (
                {
                    f"{MODULE[:-4]}q_proj.lora_A.weight": torch.ones(4, 48),
                    f"{MODULE[:-4]}q_proj.lora_B.weight": torch.ones(48, 4),
                },
                "updates blocks.0.attn.q_proj.weight, which the model does not have",
            ),
        ],
    )
    def test_tensors(self, tmp_path: Path, changes: dict, complaint: str) -> None:
        folder = write_checkpoint(tmp_path / "hf", BASE)
        content = {n: t for n, t in (adapter_tensors() | changes).items() if t is not None}
        adapter = write_adapter(tmp_path / "adapter", content)
        message = self.refusal(folder, adapter)
        assert message.startswith(f"{adapter / 'adapter_model.safetensors'}: ")
        assert complaint in message

    def test_files(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "hf", BASE)
        assert self.refusal(folder, tmp_path / "none").startswith(
            f"{tmp_path / 'none'}: no adapter"
        )
        adapter = write_adapter(tmp_path / "adapter", {})
        assert "no LoRA tensors; the adapter is empty" in self.refusal(folder, adapter)
        (adapter / "adapter_model.safetensors").unlink()
        assert "no tensors of an adapter; adapter_model.safetensors" in self.refusal(
            folder, adapter
        )

    def refusal(self, folder: Path, adapter: Path) -> str:
        with pytest.raises(MptTrtError) as error:
            merged(folder, adapter)
        assert "\n" not in str(error.value)
        return str(error.value)


class TestCommands:
    def test_conversion_and_reference(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "hf", BASE)
        adapter = write_adapter(tmp_path / "adapter")
        call_tool(
            "convert_hf_mpt_to_ft.py",
            *("-i", folder, "-o", tmp_path / "ft", "-t", "float32", "--adapter", adapter),
        )
        provenance = read_ft_checkpoint(tmp_path / "ft" / "1-gpu").provenance
        assert provenance["adapter"] == str(adapter)
        assert provenance["adapter_hash"] == content_hash(adapter / "adapter_model.safetensors")
        # The same as a checkpoint that was merged before.
        state = {
            f"transformer.{n}": torch.from_numpy(w) for n, w in merged(folder, adapter).items()
        }
        whole = write_checkpoint(tmp_path / "merged", BASE)
        save_file(state, whole / "model.safetensors")
        call_tool("convert_hf_mpt_to_ft.py", "-i", whole, "-o", tmp_path / "ft2", "-t", "float32")
        for path in (tmp_path / "ft2" / "1-gpu").glob("*.bin"):
            assert (tmp_path / "ft" / "1-gpu" / path.name).read_bytes() == path.read_bytes()
        ids = [3, 1, 4, 1, 5]
        logits = reference_logits(folder, ids, adapter)
        assert torch.equal(logits, reference_logits(whole, ids))
        assert not torch.allclose(logits, reference_logits(folder, ids))

    def test_quantization_of_an_ft_checkpoint(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "hf", BASE)
        call_tool("convert_hf_mpt_to_ft.py", "-i", folder, "-o", tmp_path / "ft", "-t", "float32")
        result = run_tool(
            "quantize.py",
            *("--model_dir", tmp_path / "ft" / "1-gpu", "--qformat", "kv_cache"),
            *("--export_path", tmp_path / "npz", "--adapter", tmp_path),
        )
        assert f"--adapter {tmp_path}: " in one_line_error(result)
