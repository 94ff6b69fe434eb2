"""The float32 reference: every architecture, by transformers' blocks and by our plain one."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import MptForCausalLM

from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation import reference
from mpt_trt.evaluation.reference import is_in_transformers, reference_logits, reference_name
from mpt_trt.model.config import MptConfig
from mpt_trt.model.torch_block import PlainBlock, causal_bias, with_weights
from mpt_trt.model.torch_tensors import ModelTensors
from references import plain_mpt
from support.checkpoints import CheckpointSpec, config_dict, tensors, write_checkpoint
from support.engines import FEATURES

TOLERANCE = 1e-5
STORYWRITER = {"clip_qkv": 0.75, "alibi_bias_max": 16}
MORE = {
    "qk_ln, grouped-query": CheckpointSpec(num_heads=6, num_kv_heads=2, qk_ln=True),
    "qk_ln, rmsnorm, biases": CheckpointSpec(qk_ln=True, norm_type="rmsnorm", no_bias=False),
    "learned positions, multi-query": CheckpointSpec(alibi=False, num_kv_heads=1),
    "storywriter": CheckpointSpec(**STORYWRITER),
    "storywriter, 6 heads, grouped-query": CheckpointSpec(
        num_heads=6, num_kv_heads=3, **STORYWRITER
    ),
}
SPECS = FEATURES | MORE
IN_TRANSFORMERS = {name: spec for name, spec in SPECS.items() if spec.runs_in_transformers}
# transformers' blocks compute this if they get the slopes, although its model ignores it.
BY_TRANSFORMERS_BLOCKS = {*IN_TRANSFORMERS, "alibi_bias_max", "storywriter"}


def token_ids(spec: CheckpointSpec, length: int = 23) -> list[int]:
    generator = torch.Generator().manual_seed(spec.seed)
    return torch.randint(spec.vocab_size, (length,), generator=generator).tolist()


def plain_logits(spec: CheckpointSpec, ids: list[int]) -> Tensor:
    return plain_mpt.forward(config_dict(spec), tensors(spec), torch.tensor([ids]))[0]


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", SPECS)
def test_every_architecture_has_a_reference(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    folder = write_checkpoint(tmp_path, spec)
    ids = token_ids(spec)
    found = reference_logits(folder, ids)
    assert found.dtype == torch.float32 and found.shape == (23, spec.vocab_size)
    assert_near(found, plain_logits(spec, ids))


@pytest.mark.parametrize("name", SPECS)
def test_name_says_which_blocks_were_used(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, SPECS[name])
    if name in BY_TRANSFORMERS_BLOCKS:
        assert reference_name(folder) == f"transformers {transformers.__version__}, float32"
    else:
        assert (
            reference_name(folder)
            == f"plain PyTorch {torch.__version__.partition('+')[0]}, float32"
        )


@pytest.mark.parametrize("name", SPECS)
def test_only_what_is_named_computes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other block is out of reach, and the name still tells which one computed."""
    folder = write_checkpoint(tmp_path, SPECS[name])
    is_plain = reference_name(folder).startswith("plain")
    monkeypatch.setattr(reference, "_transformers_block" if is_plain else "_plain_block", None)
    assert reference_logits(folder, [1, 2]).isfinite().all()


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
@pytest.mark.parametrize("length", [1, 23, 64])
def test_plain_blocks_make_the_model_of_transformers(
    name: str, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain block, forced where it is not needed, against the whole of transformers' model."""
    spec = IN_TRANSFORMERS[name]
    folder = write_checkpoint(tmp_path, spec)
    monkeypatch.setattr(reference, "is_in_transformers", lambda config: False)
    ids = token_ids(spec, length)
    model = MptForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    assert_near(reference_logits(folder, ids), expected)


def block_tensors(spec: CheckpointSpec) -> dict[str, Tensor]:
    prefix = "transformer.blocks.0."
    return {k.removeprefix(prefix): t for k, t in tensors(spec).items() if k.startswith(prefix)}


def config_of(spec: CheckpointSpec, folder: Path) -> MptConfig:
    return read_hf_config(write_checkpoint(folder, spec))


def run_plain_block(config: MptConfig, weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """Runs the block in the type of `hidden`, `[seq, hidden]`."""
    bias = causal_bias(config, len(hidden)).to(hidden.dtype)
    return with_weights(partial(PlainBlock, config), weights)(hidden[None], bias)[0]


@pytest.mark.parametrize("name", sorted(BY_TRANSFORMERS_BLOCKS))
def test_plain_block_is_the_block_of_transformers(name: str, tmp_path: Path) -> None:
    spec = replace(SPECS[name], num_layers=1)
    config = config_of(spec, tmp_path)
    assert is_in_transformers(config)
    hidden = torch.randn(31, spec.hidden_size, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = reference._transformers_block(config, 31)(block_tensors(spec), hidden)
        found = run_plain_block(config, block_tensors(spec), hidden)
    assert_near(found, expected)
    assert (found - hidden).std() > 0.1  # the block does something


def test_a_long_sequence_keeps_its_precision(tmp_path: Path) -> None:
    """Biases of some thousand would leave float32 few digits for the scores."""
    spec = CheckpointSpec(num_kv_heads=2, alibi_bias_max=2, max_seq_len=4096, num_layers=1)
    config = config_of(spec, tmp_path)
    hidden = torch.randn(2000, spec.hidden_size, generator=torch.Generator().manual_seed(4))
    weights = block_tensors(spec)
    exact_weights = {name: tensor.double() for name, tensor in weights.items()}
    with torch.inference_mode():
        found = run_plain_block(config, weights, hidden)
        exact = run_plain_block(config, exact_weights, hidden.double())
    assert_near(found, exact.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["sharded_safetensors", "bin"])
def test_stored_weights_are_computed_with_in_float32(
    dtype: torch.dtype, layout: str, tmp_path: Path
) -> None:
    spec = SPECS["everything"]
    folder = write_checkpoint(tmp_path, spec, dtype=dtype, layout=layout)
    rounded = {name: tensor.to(dtype).float() for name, tensor in tensors(spec).items()}
    ids = token_ids(spec)
    expected = plain_mpt.forward(config_dict(spec), rounded, torch.tensor([ids]))[0]
    assert_near(reference_logits(folder, ids), expected)


def test_sequence_beyond_the_learned_positions_is_refused(tmp_path: Path) -> None:
    spec = CheckpointSpec(alibi=False, max_seq_len=8)
    folder = write_checkpoint(tmp_path, spec)
    assert_near(
        reference_logits(folder, token_ids(spec, 8)), plain_logits(spec, token_ids(spec, 8))
    )
    with pytest.raises(MptTrtError, match="9 tokens, but the model has learned positions for 8"):
        reference_logits(folder, token_ids(spec, 9))


def test_alibi_models_go_beyond_their_training_length(tmp_path: Path) -> None:
    spec = CheckpointSpec(num_kv_heads=2, max_seq_len=8)
    longer = replace(spec, max_seq_len=64)
    ids = token_ids(spec, 30)
    assert_near(reference_logits(write_checkpoint(tmp_path, spec), ids), plain_logits(longer, ids))


def test_plain_blocks_are_held_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 copies that are alive at once of a float16 checkpoint: a block, or the embedding."""
    spec = CheckpointSpec(num_kv_heads=2, num_layers=6)
    folder = write_checkpoint(tmp_path, spec, dtype=torch.float16)
    alive: dict[int, int] = {}
    most = 0
    read = ModelTensors.tensor

    def tracked(model: ModelTensors, name: str) -> Tensor:
        nonlocal most
        tensor = read(model, name)
        alive[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, alive.pop, id(tensor))
        most = max(most, sum(alive.values()))
        return tensor

    monkeypatch.setattr(ModelTensors, "tensor", tracked)
    reference_logits(folder, token_ids(spec))
    block = sum(tensor.nbytes for tensor in block_tensors(spec).values())
    embedding = tensors(spec)["transformer.wte.weight"].nbytes
    assert most == max(block, embedding)
