"""AMMO's npz as TensorRT-LLM's MPT example loads it, written from the facts about that loader.

Keys must have the names that the loader expects; anything else is an error. Integers and scales of
one rank, which kernels would get packed, are returned unpacked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MATRICES = ("attention:qkv", "attention:dense", "mlp:fc", "mlp:proj")
QKV_PARTS = ("q", "k", "v")


@dataclass(frozen=True)
class RankMatrix:
    """integers `[in, out]` in -8..7; scales `[in / g, out]`; smoothing `[in]`."""

    integers: NDArray
    scales: NDArray
    smoothing: NDArray

    def dequantized(self) -> NDArray:
        """`[out, in]`, to be multiplied with the smoothed activations."""
        group = len(self.integers) // len(self.scales)
        return (self.integers * self.scales.repeat(group, axis=0)).T


@dataclass(frozen=True)
class RankWeights:
    embedding: NDArray
    final_norm: NDArray
    norms: list[tuple[NDArray, NDArray]]
    matrices: list[dict[str, RankMatrix]]


def load_fp8(path: Path, num_layers: int) -> list[dict[str, tuple[float, float]]]:
    """Loads activation scale and weight scale of each layer and matrix."""
    with np.load(path) as npz:
        return [
            {
                matrix: (
                    _largest_scalar(npz, layer, matrix, "activation_scaling_factor"),
                    _largest_scalar(npz, layer, matrix, "weights_scaling_factor"),
                )
                for matrix in MATRICES
            }
            for layer in range(num_layers)
        ]


def _largest_scalar(npz, layer: int, matrix: str, name: str) -> float:
    parts = [f"{matrix}:{part}" for part in QKV_PARTS] if matrix == MATRICES[0] else [matrix]
    return max(npz[f"_np:layers:{layer}:{part}:{name}"].item() for part in parts)


def load_awq(path: Path, num_layers: int, tp_size: int, rank: int) -> RankWeights:
    with np.load(path) as npz:
        return RankWeights(
            _padded(npz["_np:vocab_embedding:weight"]),
            npz["_np:final_layernorm:weight"],
            [
                (
                    npz[f"_np:layers:{layer}:input_layernorm:weight"],
                    npz[f"_np:layers:{layer}:post_layernorm:weight"],
                )
                for layer in range(num_layers)
            ],
            [_layer(npz, layer, tp_size, rank) for layer in range(num_layers)],
        )


def _padded(embedding: NDArray) -> NDArray:
    return np.pad(embedding, ((0, -len(embedding) % 64), (0, 0)))


def _layer(npz, layer: int, tp_size: int, rank: int) -> dict[str, RankMatrix]:
    def part(values: NDArray, axis: int) -> NDArray:
        return np.split(values, tp_size, axis)[rank]

    base = f"_np:layers:{layer}"
    first = f"{base}:attention:dense"
    group = npz[f"{first}:weight"].size // npz[f"{first}:weights_scaling_factor"].size
    qkv = [f"{base}:attention:qkv:{name}" for name in QKV_PARTS]
    weight = np.concatenate([part(npz[f"{key}:weight"], 0) for key in qkv])
    smoothing = np.mean([npz[f"{key}:prequant_scaling_factor"] for key in qkv], axis=0)
    found = {"attention:qkv": _quantized(weight, _largest(weight, group), smoothing)}
    for matrix in MATRICES[1:]:
        key = f"{base}:{matrix}"
        weight = npz[f"{key}:weight"]
        scales = npz[f"{key}:weights_scaling_factor"].reshape(len(weight), -1)
        smoothing = npz[f"{key}:prequant_scaling_factor"]
        is_row = matrix != "mlp:fc"
        found[matrix] = _quantized(
            part(weight, 1 if is_row else 0),
            part(scales, 1 if is_row else 0) * 7,
            part(smoothing, 0) if is_row else smoothing,
        )
    return found


def _largest(weight: NDArray, group: int) -> NDArray:
    return np.abs(weight.astype(np.float32)).reshape(len(weight), -1, group).max(-1)


def _quantized(weight: NDArray, largest: NDArray, smoothing: NDArray) -> RankMatrix:
    scales = (largest.astype(np.float32) / 8).T
    group = weight.shape[1] // len(scales)
    quotient = weight.T.astype(np.float32) / scales.repeat(group, axis=0)
    integers = np.clip(np.rint(quotient), -8, 7).astype(np.int8)
    return RankMatrix(integers, scales, smoothing)
