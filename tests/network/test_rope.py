"""Rope in the network: distant positions, rows of different lengths, and its limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mpt_trt.engines.spec import BuildLimits
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.reference import reference_logits
from mpt_trt.ft.checkpoint import read_ft_checkpoint
from mpt_trt.model.config import MptConfig
from mpt_trt.model.rope import Rope
from references import plain_mpt
from support.checkpoints import CheckpointSpec, config_dict, tensors, write_checkpoint
from support.engines import (
    Ids,
    Logits,
    deviation,
    feed,
    make_ft_checkpoint,
    make_network,
    open_network,
    random_ids,
)

LONG = BuildLimits(max_batch_size=1, max_input_len=500, max_output_len=500)
BASE = CheckpointSpec(
    hidden_size=32, num_heads=2, num_layers=1, vocab_size=31, max_seq_len=1000, seed=3
)


def hf_rope(**scaling: object) -> dict[str, object]:
    return {"rope_impl": "hf", "rope_theta": 500, "rope_hf_config": scaling}


ROPES = {
    "dail": {"rope_theta": 500},
    "hf": hf_rope(type="no_scaling"),
    "linear": hf_rope(type="linear", factor=3),
    "dynamic": hf_rope(type="dynamic", factor=2),
    "llama3": hf_rope(
        type="llama3",
        factor=8,
        low_freq_factor=1,
        high_freq_factor=4,
        original_max_position_embeddings=256,
    ),
}


def exact_logits(spec: CheckpointSpec, ids: Ids, storage_type: str = "float32") -> Logits:
    """float64 logits `[rows, seq, vocab]` of the weights as `storage_type` rounds them."""
    dtype = getattr(torch, storage_type)
    weights = {name: tensor.to(dtype) for name, tensor in tensors(spec).items()}
    return plain_mpt.forward(
        config_dict(spec), weights, torch.from_numpy(ids), torch.double
    ).numpy()


@pytest.mark.parametrize("name", ROPES)
def test_every_kind_at_far_positions(name: str, tmp_path: Path) -> None:
    """Follows config.json through the FT checkpoint to the network in both types."""
    spec = replace(BASE, rope=ROPES[name])
    ids = random_ids(spec, rows=1, length=LONG.cache_len)
    pieces = [400, 400, 195, *[1] * 5]
    for storage_type, bound in (("float32", 2e-5), ("float16", 1.5e-2)):
        checkpoint = make_ft_checkpoint(tmp_path / storage_type, spec, storage_type)
        network = make_network(checkpoint, tmp_path / storage_type / "network", LONG)
        found = feed(open_network(network), ids, pieces)
        expected = exact_logits(spec, ids, storage_type)
        assert deviation(found[:, -300:], expected[:, -300:]) < bound
    own = reference_logits(tmp_path / "float32" / "hf", ids[0].tolist()).numpy()
    assert deviation(own, exact_logits(spec, ids)[0]) < 2e-5


def test_kinds_differ() -> None:
    """A scaling that was ignored would fail above."""
    ids = random_ids(BASE, rows=1, length=LONG.cache_len)
    plain = exact_logits(replace(BASE, rope=ROPES["dail"]), ids)
    for name in ("linear", "llama3"):
        assert deviation(exact_logits(replace(BASE, rope=ROPES[name]), ids), plain) > 0.1


def test_dynamic_scaling_ends_at_the_trained_length(tmp_path: Path) -> None:
    spec = replace(BASE, rope=ROPES["dynamic"], max_seq_len=20)
    checkpoint = make_ft_checkpoint(tmp_path, spec)
    make_network(checkpoint, tmp_path / "network", BuildLimits(1, 10, 10))
    with pytest.raises(MptTrtError, match=r"= 21, but the model has positions for 20 tokens"):
        make_network(checkpoint, tmp_path / "longer", BuildLimits(1, 10, 11))
    with pytest.raises(MptTrtError, match=r"21 tokens, but the model has positions for 20"):
        reference_logits(tmp_path / "hf", [1] * 21)


def test_other_kinds_go_on_beyond_it(tmp_path: Path) -> None:
    spec = replace(BASE, rope=ROPES["linear"], max_seq_len=8)
    engine = open_network(make_network(make_ft_checkpoint(tmp_path, spec), tmp_path / "network"))
    ids = random_ids(spec, rows=1, length=20)
    expected = exact_logits(replace(spec, max_seq_len=64), ids)
    assert deviation(feed(engine, ids, [10, 10]), expected) < 2e-5


@pytest.mark.parametrize("name", ROPES)
def test_settings_survive_the_ft_checkpoint(name: str, tmp_path: Path) -> None:
    config = make_ft_checkpoint(tmp_path, replace(BASE, rope=ROPES[name])).config
    factors = {"linear": 3.0, "dynamic": 2.0, "llama3": 8.0}
    scaling = name if name in factors else "none"
    expected = Rope(500.0, scaling, factors.get(name, 1.0))
    if name == "llama3":
        expected = replace(expected, original_max_position_embeddings=256)
    assert (config.position_embedding, config.rope) == ("rope", expected)
    ini = (tmp_path / "ft" / "1-gpu" / "config.ini").read_text()
    assert "position_embedding_type = rope\nrope_theta = 500.0" in ini


SIZES = {
    "hidden_size": 32,
    "num_heads": 2,
    "num_kv_heads": 2,
    "num_layers": 1,
    "intermediate_size": 128,
    "vocab_size": 31,
    "max_seq_len": 64,
    "softmax_scale": 0.25,
}


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"position_embedding": "rope"}, "position_embedding = rope: .* missing"),
        ({"rope": Rope()}, "position_embedding = alibi: .* given"),
        ({"position_embedding": "rope", "rope": Rope(), "num_heads": 32}, "a head has 1"),
    ],
)
def test_contradictions_are_refused(changes: dict, pattern: str) -> None:
    with pytest.raises(MptTrtError, match=pattern):
        MptConfig(**SIZES | {"num_kv_heads": changes.get("num_heads", 2)} | changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [("theta", 1.0), ("theta", np.inf), ("factor", 0.0), ("low_freq_factor", 4.0)],
)
def test_impossible_numbers_are_refused(name: str, value: float) -> None:
    with pytest.raises(MptTrtError, match=rf"rope\.{name} = {value}"):
        Rope(**{name: value})


@pytest.mark.parametrize("line", ["rope_theta = -1", "rope_scaling = yarn", "rope_theta"])
def test_damaged_ini_is_refused(line: str, tmp_path: Path) -> None:
    make_ft_checkpoint(tmp_path, replace(BASE, rope=ROPES["linear"]))
    ini = tmp_path / "ft" / "1-gpu" / "config.ini"
    key, _, value = line.partition(" = ")
    lines = [each for each in ini.read_text().splitlines() if not each.startswith(key)]
    ini.write_text("\n".join(lines + [line] * bool(value)))
    with pytest.raises(MptTrtError, match=f"config.ini: .*{key}"):
        read_ft_checkpoint(ini.parent)


def test_stored_frequencies_are_not_weights(tmp_path: Path) -> None:
    """Some releases store the buffer of the rotation, which config.json also determines."""
    spec = replace(BASE, rope=ROPES["hf"])
    folder = write_checkpoint(tmp_path, spec)
    buffer = {"transformer.rotary_embedding.inv_freq": torch.ones(8)}
    save_file(tensors(spec) | buffer, folder / "model.safetensors")
    ids = random_ids(spec, rows=1, length=9)
    found = reference_logits(folder, ids[0].tolist()).numpy()
    assert deviation(found, exact_logits(spec, ids)[0]) < 2e-5
