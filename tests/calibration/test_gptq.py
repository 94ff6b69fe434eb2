"""int4_gptq on the demo model: its divergence, and its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mpt_trt.calibration.block_stream import Computation, stream_blocks
from mpt_trt.calibration.calibrate import calibrate
from mpt_trt.calibration.model_source import open_model
from mpt_trt.calibration.npz_keys import matrix_keys
from mpt_trt.calibration.plan import CalibrationPlan
from mpt_trt.calibration.samples import read_samples
from mpt_trt.checkpoint.tokenizer import read_tokenizer
from mpt_trt.evaluation.logits import mean_divergence
from mpt_trt.evaluation.reference import read_head, reference_hidden
from support.paths import REPOSITORY

DEMO = REPOSITORY / "resources" / "mpt-demo"
TEXT = REPOSITORY / "mpt_trt" / "calibration" / "calibration.txt"
# Windows of the held-out text, spread over it.
WINDOWS, LENGTH = 16, 256


@pytest.fixture(scope="module", params=[256, pytest.param(512, marks=pytest.mark.nightly)])
def samples(request: pytest.FixtureRequest) -> torch.Tensor:
    """Tokens to calibrate with. More of them bring the divergence further below the bounds."""
    return read_samples(TEXT, read_tokenizer(DEMO), 20, request.param)


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    tokens = read_tokenizer(DEMO).encode((DEMO / "heldout.txt").read_text())
    step = (len(tokens) - LENGTH) // (WINDOWS - 1)
    return torch.tensor([tokens[n * step :][:LENGTH] for n in range(WINDOWS)])


@pytest.fixture(scope="module")
def expected(held_out: torch.Tensor) -> torch.Tensor:
    """Logits of the float32 reference, `[rows, seq, vocab]`."""
    return read_head(DEMO).logits(reference_hidden(DEMO, held_out.numpy()))


@pytest.fixture(scope="module", params=[64, 32])
def result(request, samples, tmp_path_factory) -> tuple[int, Path]:
    path = tmp_path_factory.mktemp("gptq") / "mpt_tp1_rank0.npz"
    plan = CalibrationPlan("int4_gptq", request.param)
    calibrate(open_model(DEMO), samples, plan, Computation(), np.dtype(np.float16), path)
    return request.param, path


def test_divergence(result, held_out, expected) -> None:
    """The divergence meets the documented bound; llama.cpp's Q4_K_M has 0.041."""
    group_size, path = result
    logits = logits_with(path, held_out)
    divergences = [
        mean_divergence(reference.numpy(), row.numpy())
        for row, reference in zip(logits, expected, strict=True)
    ]
    assert np.mean(divergences) < {64: 0.040, 32: 0.033}[group_size]


def test_weights_are_integers_times_scales(result) -> None:
    """Readers of int4_awq find that weight / scale is an integer in -8..7."""
    group_size, path = result
    with np.load(path) as npz:
        stored = matrix(npz, 3, "mlp.dense_4h_to_h")
        scales = npz["_np:layers:3:mlp:proj:weights_scaling_factor"]
        assert (npz["_np:layers:3:mlp:proj:prequant_scaling_factor"] == 1).all()
    assert stored.size // scales.size == group_size
    quotients = stored / scales.repeat(group_size, 1)
    integers = np.rint(quotients)
    # The file's float16.
    np.testing.assert_allclose(quotients, integers, rtol=2**-10, atol=1e-3)
    assert integers.min() == -8 and integers.max() == 7
    assert (scales < 0).any()


def logits_with(path: Path, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits `[rows, seq, vocab]` of the model with the weights in a file."""
    source = open_model(DEMO)
    with np.load(path) as npz:

        def visit(layer, block, run) -> None:
            for name in ("attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj"):
                module = block.get_submodule(name)
                module.weight.copy_(torch.from_numpy(matrix(npz, layer, FT_NAMES[name])))
            run(block)
            hidden.append(torch.cat(run.outputs))

        hidden: list[torch.Tensor] = []
        stream_blocks(source, token_ids, Computation(), visit)
    norm = torch.nn.LayerNorm(source.config.hidden_size, bias=False)
    norm.weight.data = torch.from_numpy(_norm_weight(path))
    with torch.no_grad():
        return read_head(DEMO).logits(norm(hidden[-1]))


FT_NAMES = {
    "attn.Wqkv": "attention.query_key_value",
    "attn.out_proj": "attention.dense",
    "ffn.up_proj": "mlp.dense_h_to_4h",
    "ffn.down_proj": "mlp.dense_4h_to_h",
}


def _norm_weight(path: Path) -> NDArray[np.float32]:
    with np.load(path) as npz:
        return npz["_np:final_layernorm:weight"].astype(np.float32)


def matrix(npz, layer: int, name) -> NDArray[np.float32]:
    """A matrix of a result, as float32."""
    parts = [npz[f"{key}:weight"] for key in matrix_keys(layer, name)]
    return np.concatenate(parts).astype(np.float32)
