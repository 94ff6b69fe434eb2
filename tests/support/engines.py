"""Makes networks, engines and logits from a CheckpointSpec, for tests of engines."""

from __future__ import annotations

import importlib
import logging
import math
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx.helper import tensor_dtype_to_np_dtype as dtype_of

from mpt_trt.calibration.calibrated_quantization import NOT_QUANTIZED, CalibratedQuantization
from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.tensors import HfCheckpoint
from mpt_trt.engines.build.build import build_engine
from mpt_trt.engines.build.rank_network import NetworkInputs, write_rank_network
from mpt_trt.engines.interface import StepModel
from mpt_trt.engines.manifest import read_network_manifest
from mpt_trt.engines.onnxruntime.cpu_engine import OnnxRuntimeEngine
from mpt_trt.engines.onnxruntime.cpu_settings import CpuSettings
from mpt_trt.engines.rank_descriptions import NETWORKS, network_name
from mpt_trt.engines.spec import BuilderChoice, BuildLimits
from mpt_trt.ft.checkpoint import FtCheckpoint, read_ft_checkpoint
from mpt_trt.ft.writer import ConversionSettings, write_ft_checkpoint
from mpt_trt.model.sharding import Rank, VocabularySharding
from mpt_trt.model.tensors import weights
from mpt_trt.system.replace import replace_directory
from references import plain_mpt
from support.checkpoints import CheckpointSpec, config_dict, tensors, write_checkpoint
from support.forks.servers import forked_python
from support.paths import tool_path

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]

LIMITS = BuildLimits(max_batch_size=4, max_input_len=16, max_output_len=16)
COMPUTE_CAPABILITIES = ("8.6",)
ONLY_RANK = Rank(0, 1)
# Elements that are not whole bytes.
BITS = {onnx.TensorProto.INT4: 4}
ONE_THREAD = CpuSettings(num_threads=1)

# One checkpoint for every feature that changes the network.
FEATURES = {
    "multi-head": CheckpointSpec(),
    "grouped-query": CheckpointSpec(num_heads=6, num_kv_heads=2),
    "multi-query": CheckpointSpec(num_kv_heads=1),
    "1 head": CheckpointSpec(num_heads=1),
    "3 heads": CheckpointSpec(num_heads=3),
    "6 heads": CheckpointSpec(num_heads=6),
    "24 heads": CheckpointSpec(num_heads=24),
    "24 heads, grouped-query": CheckpointSpec(hidden_size=96, num_heads=24, num_kv_heads=8),
    "1 layer": CheckpointSpec(num_layers=1),
    "alibi_bias_max": CheckpointSpec(alibi_bias_max=16),
    "clip_qkv": CheckpointSpec(clip_qkv=0.75),
    "qk_ln": CheckpointSpec(qk_ln=True),
    "qk_ln, multi-query, biases": CheckpointSpec(qk_ln=True, num_kv_heads=1, no_bias=False),
    "biases": CheckpointSpec(no_bias=False),
    "untied head": CheckpointSpec(tie_word_embeddings=False),
    "expansion 2": CheckpointSpec(expansion_ratio=2),
    "expansion 2.5": CheckpointSpec(expansion_ratio=2.5),
    "softmax_scale": CheckpointSpec(softmax_scale=0.6),
    "logit_scale": CheckpointSpec(logit_scale=0.4),
    "logit_scale inv_sqrt_d_model": CheckpointSpec(logit_scale="inv_sqrt_d_model"),
    "learned positions": CheckpointSpec(alibi=False),
    "rope": CheckpointSpec(rope={}),
    "rope of hf, scaled, grouped-query": CheckpointSpec(
        num_heads=6,
        num_kv_heads=2,
        rope={
            "rope_impl": "hf",
            "rope_theta": 500,
            "rope_hf_config": {"type": "linear", "factor": 2.5},
        },
    ),
    "rope, qk_ln, clip_qkv, biases": CheckpointSpec(
        rope={"rope_theta": 300}, qk_ln=True, clip_qkv=1.5, no_bias=False, num_kv_heads=1
    ),
    "rmsnorm": CheckpointSpec(norm_type="rmsnorm"),
    "rmsnorm, biases": CheckpointSpec(norm_type="low_precision_rmsnorm", no_bias=False),
    "epsilon": CheckpointSpec(layer_norm_epsilon=0.02),
    "epsilon of rmsnorm": CheckpointSpec(layer_norm_epsilon=0.02, norm_type="rmsnorm"),
    "vocabulary of 101": CheckpointSpec(vocab_size=101),
    "everything": CheckpointSpec(
        hidden_size=60,
        num_heads=6,
        num_kv_heads=3,
        num_layers=3,
        vocab_size=53,
        expansion_ratio=2.5,
        no_bias=False,
        tie_word_embeddings=False,
        alibi_bias_max=4,
        clip_qkv=1.5,
        qk_ln=True,
        softmax_scale=0.4,
        logit_scale=0.7,
        layer_norm_epsilon=1e-3,
    ),
}


# --- making --------------------------------------------------------------------------------------


def convert(hf_folder: Path, target: Path, storage_type: str = "float32") -> FtCheckpoint:
    """The one-rank FT checkpoint `target` of a Hugging Face folder."""
    config = read_hf_config(hf_folder)
    source = HfCheckpoint(hf_folder, weights(config))
    settings = ConversionSettings(storage_type, 1, 0, "test-model", {"folder": "somewhere"})
    write_ft_checkpoint(source, config, settings, target)
    return read_ft_checkpoint(target)


def make_ft_checkpoint(
    folder: Path, spec: CheckpointSpec, storage_type: str = "float32"
) -> FtCheckpoint:
    """`folder/hf`, the checkpoint of `spec`, and from it `folder/ft/1-gpu`, which is returned."""
    hf_folder = write_checkpoint(folder / "hf", spec)
    return convert(hf_folder, folder / "ft" / "1-gpu", storage_type)


def make_rank_network(inputs: NetworkInputs, rank: Rank, target: Path) -> None:
    """Makes the folder `target` with the network of only one rank, and its description."""
    with replace_directory(target, NETWORKS) as folder:
        write_rank_network(inputs, rank, folder)
    require_declared_sizes(target / network_name(rank.index))


def require_declared_sizes(network: Path) -> None:
    """Fails when a weight's file is not as large as the network declares it."""
    for tensor in onnx.load(network, load_external_data=False).graph.initializer:
        stored = {entry.key: entry.value for entry in tensor.external_data}
        # Parts of a file have an offset.
        if stored and "offset" not in stored:
            bits = BITS.get(tensor.data_type) or 8 * dtype_of(tensor.data_type).itemsize
            declared = math.ceil(math.prod(tensor.dims) * bits / 8)
            assert (network.parent / stored["location"]).stat().st_size == declared, tensor.name


def make_network(
    checkpoint: FtCheckpoint,
    target: Path,
    limits: BuildLimits = LIMITS,
    calibrated: CalibratedQuantization = NOT_QUANTIZED,
) -> Path:
    """The folder `target` with the network of the only rank."""
    inputs = NetworkInputs(checkpoint, limits, VocabularySharding(), calibrated)
    make_rank_network(inputs, ONLY_RANK, target)
    return target


def build(checkpoint: FtCheckpoint, target: Path, limits: BuildLimits = LIMITS) -> Path:
    """The engine directory `target`, built by TensorRT-RTX."""
    inputs = NetworkInputs(checkpoint, limits, VocabularySharding())
    build_engine(inputs, BuilderChoice("tensorrt_rtx", COMPUTE_CAPABILITIES), target)
    return target


def open_network(folder: Path, cpu: CpuSettings = ONE_THREAD) -> OnnxRuntimeEngine:
    """A network that has no plan, under ONNX Runtime on one thread."""
    return OnnxRuntimeEngine(folder, read_network_manifest(folder), cpu)


def open_spec(
    folder: Path,
    spec: CheckpointSpec,
    storage_type: str = "float32",
    limits: BuildLimits = LIMITS,
) -> OnnxRuntimeEngine:
    """The whole way: checkpoint, FT checkpoint, network, ONNX Runtime."""
    checkpoint = make_ft_checkpoint(folder, spec, storage_type)
    return open_network(make_network(checkpoint, folder / "network", limits))


# --- running -------------------------------------------------------------------------------------


def random_ids(spec: CheckpointSpec, rows: int, length: int, seed: int = 0) -> Ids:
    """Random tokens, `[rows, length]`."""
    return np.random.default_rng(seed).integers(0, spec.vocab_size, (rows, length))


def reference(spec: CheckpointSpec, ids: Ids, storage_type: str = "float32") -> Logits:
    """float32 logits `[rows, seq, vocab]` of the weights as `storage_type` rounds them."""
    dtype = getattr(torch, storage_type)
    weights = {name: tensor.to(dtype) for name, tensor in tensors(spec).items()}
    return plain_mpt.forward(config_dict(spec), weights, torch.from_numpy(ids)).numpy()


def every_position(rows: int, length: int) -> Ids:
    """(row, index) of every token of a step, `[rows * length, 2]`."""
    return np.stack([np.repeat(np.arange(rows), length), np.tile(np.arange(length), rows)], axis=1)


def step(engine: StepModel, ids: Ids, write_positions: Sequence[int]) -> Logits:
    """One step; the logits of all its tokens, `[rows, seq, vocab]`."""
    rows, length = ids.shape
    logits = engine.step(ids, np.array(write_positions, np.int64), every_position(rows, length))
    return logits.reshape(rows, length, -1)


def feed(engine: StepModel, ids: Ids, pieces: Sequence[int]) -> Logits:
    """Starts anew and feeds `ids` in pieces of these lengths; logits of all, `[rows, seq, vocab]`.

    The pieces must add up to the length of `ids`.
    """
    rows, length = ids.shape
    assert sum(pieces) == length
    engine.start(rows)
    starts = np.cumsum([0, *pieces[:-1]])
    found = [
        step(engine, ids[:, start : start + size], [start] * rows)
        for start, size in zip(starts, pieces, strict=True)
    ]
    return np.concatenate(found, axis=1)


def deviation(found: Logits, expected: Logits) -> float:
    """Largest difference, as a multiple of the standard deviation of the expected logits."""
    return float(np.abs(found - expected).max() / expected.std())


# --- command-line tools --------------------------------------------------------------------------


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(tool_path(script)), *map(str, arguments)]


def run_tool(script: str, *arguments: object, **options: object) -> subprocess.CompletedProcess:
    """Runs one of the command-line tools to its end."""
    _, *words = command(script, *arguments)
    return subprocess.run(
        [forked_python(), *words], capture_output=True, text=True, timeout=300, **options
    )


def call_tool(script: str, *arguments: object) -> None:
    """Runs a script's command in this process, which is faster; its errors come through."""
    handlers, level = logging.root.handlers[:], logging.root.level
    path = tool_path(script)
    options = runpy.run_path(str(path))["make_parser"]().parse_args(list(map(str, arguments)))
    try:
        importlib.import_module(f"mpt_trt.commands.{path.stem}").run(options)
    finally:
        logging.root.handlers = handlers
        logging.root.setLevel(level)


def start_tool(script: str, *arguments: object, **options: object) -> subprocess.Popen:
    """Starts one of the command-line tools; Ctrl-C stops it even where the tests ignore it."""
    return subprocess.Popen(
        command(script, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def one_line_error(result: subprocess.CompletedProcess) -> str:
    """The message of a tool that refused its input, which must be one line without traceback."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1, result.stderr
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]


def tree(folder: Path) -> list[str]:
    """Relative paths of all files and folders, hidden ones too."""
    return sorted(
        str(Path(root, name).relative_to(folder))
        for root, folders, names in os.walk(folder)
        for name in (*folders, *names)
    )
