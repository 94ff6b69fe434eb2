"""The products that a quantization asks for."""

from __future__ import annotations

from mpt_trt.calibration.recipe import Recipe
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.model.sharding import Shard
from mpt_trt.network.linear.awq import AwqProducts
from mpt_trt.network.linear.base import Products
from mpt_trt.network.linear.fp8 import Fp8Products
from mpt_trt.network.linear.plain import PlainProducts
from mpt_trt.network.linear.smoothquant import SmoothQuantProducts
from mpt_trt.network.linear.weight_only import WeightOnlyProducts
from mpt_trt.quantization.schemes import Awq, Fp8, SmoothQuant, WeightOnly


def choose_products(checkpoint: FtCheckpoint, shard: Shard, recipe: Recipe) -> Products:
    """Raises MptTrtError when the checkpoint or the calibration does not fit the scheme."""
    quantization, calibration = recipe.quantization, recipe.calibration
    if not isinstance(quantization.scheme, SmoothQuant):
        checkpoint.require_plain()
    match quantization.scheme:
        case None:
            return PlainProducts(checkpoint, shard)
        case WeightOnly() as scheme:
            return WeightOnlyProducts(checkpoint, shard, scheme)
        case Awq():
            return AwqProducts(checkpoint, shard, calibration, quantization.kv_cache)
        case Fp8():
            return Fp8Products(checkpoint, shard, calibration)
        case SmoothQuant() as scheme:
            return SmoothQuantProducts(checkpoint, shard, scheme)
