"""Ways to store a model's block matrices and KV cache, and the calibration that each needs.

Each scheme is a dataclass with its own options. The embedding and the head may be stored in 8 bits.
Norms and biases stay in the network's own type.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from mpt_trt.errors import MptTrtError
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import is_legal
from mpt_trt.model.tensors import BlockMatrix

QuantizationFormat = Literal["int4_awq", "int4_gptq", "mixed", "fp8", "int8_sq", "kv_cache"]
"""Format of a calibration result; int4_awq, fp8 and int8_sq are AMMO's names. `kv_cache`: only the
amax of keys and values."""

GROUPED: tuple[QuantizationFormat, ...] = ("int4_awq", "int4_gptq")
"""Formats whose input features share scales in groups."""

ROUNDED: tuple[QuantizationFormat, ...] = ("int4_gptq", "mixed")
"""Formats whose results hold integers times scales, and scales may be negative."""

KvCacheType = Literal["auto", "int8", "fp8"]
"""Storage of keys and values; `auto`: in the network's own type."""

HeadType = Literal["auto", "int8"]
"""Storage of the head and the embedding; `auto`: in the network's own type."""

ScaleChoice = Literal["amax", "error"]
"""How calibration chooses a group's scale: from the group's amax, or by the least squared error."""

MIXED_STRIDE = 8
"""Calibration of mixed measures divergence on one of so many samples of each batch."""

SMOOTHQUANT_ALPHA = 0.5
"""Migration strength of int8_sq calibration results, as in AMMO. ModelOpt's own default, 1, moves
all of the activations' range into the weights."""

DEFAULT_GROUP_SIZE = 128
GROUP_SIZES = (128, 64, 32, 16)
"""Input features that may share a scale; both runtimes have kernels for powers of two from 16."""


@dataclass(frozen=True)
class WeightOnly:
    """Integer weights, rounded to nearest, and activations in the network's own type.

    bits: 4 or 8. group_size: input features that share a scale; None: one scale per output feature.
    """

    bits: int
    group_size: int | None = None


@dataclass(frozen=True)
class Awq:
    """4-bit weights in groups, after activation-aware scaling (Lin et al., arXiv:2306.00978).

    group_size: input features that share a scale; None: see `default_group_size`. scales: amax, as
    in AMMO's files, or error.
    """

    group_size: int | None = None
    scales: ScaleChoice = "amax"


@dataclass(frozen=True)
class Gptq:
    """4-bit weights in groups, rounded by GPTQ (Frantar et al., arXiv:2210.17323).

    Weights are rounded one input feature after the other; later ones correct the error of earlier
    ones. group_size: input features that share a scale; None: see `default_group_size`.
    """

    group_size: int | None = None


@dataclass(frozen=True)
class IntegerFormat:
    """Integer format of a matrix. group_size: input features that share a scale; None: a row."""

    bits: int
    group_size: int | None = None

    @property
    def name(self) -> str:
        """Name in files, such as `int8` or `int4-g64`."""
        return f"int{self.bits}" + ("" if self.group_size is None else f"-g{self.group_size}")

    def bits_per_weight(self, in_features: int) -> float:
        """Returns the bits per weight, including its share of a 16-bit scale."""
        return self.bits + 16 / (self.group_size or in_features)

    @classmethod
    def of(cls, name: str) -> IntegerFormat:
        """Parses `name`; raises ValueError when it names no format."""
        known = [cls(8), *(cls(4, size) for size in GROUP_SIZES)]
        for each in known:
            if each.name == name:
                return each
        raise ValueError(f"{name}: one of {', '.join(each.name for each in known)} is expected")


@dataclass(frozen=True)
class Mixed:
    """Integers of 4 bits in groups or of 8 bits, chosen for each matrix by measured divergence.

    bits: average bits per weight, scales included. formats: the choice that calibration made, by
    layer and then in the order of `BlockMatrix`; empty until it is known.
    """

    bits: float
    formats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        smallest = IntegerFormat(4, GROUP_SIZES[0]).bits_per_weight(DEFAULT_GROUP_SIZE)
        if not smallest <= self.bits <= 16:
            raise MptTrtError(
                f"bits = {self.bits:g}: {smallest:g} (int4 in groups of {GROUP_SIZES[0]}, with "
                "their scales) to 16 bits per weight are possible"
            )
        for name in self.formats:
            IntegerFormat.of(name)

    @property
    def coarsest_format(self) -> IntegerFormat:
        """The format with the fewest bits that any matrix has."""
        chosen = [IntegerFormat.of(name) for name in self.formats or ("int4-g128",)]
        return min(chosen, key=lambda each: each.bits_per_weight(DEFAULT_GROUP_SIZE))

    def format_of(self, layer: int, matrix: BlockMatrix) -> IntegerFormat:
        """Returns the format of a matrix; the choice must be known."""
        order = list(BlockMatrix)
        return IntegerFormat.of(self.formats[layer * len(order) + order.index(matrix)])


@dataclass(frozen=True)
class SmoothQuant:
    """8-bit weights and activations (Xiao et al., arXiv:2211.10438).

    alpha: migration strength, 0 to 1: the share of the activations' range that moves to the
    weights. per_channel: one weight scale per output feature instead of one per matrix. per_token:
    activation scales are computed for every token instead of calibrated.
    """

    alpha: float = 0.5
    per_channel: bool = True
    per_token: bool = True


@dataclass(frozen=True)
class Fp8:
    """E4M3 weights and activations, with one calibrated scale per matrix and one per input."""


WeightQuantization = WeightOnly | Awq | Gptq | Mixed | SmoothQuant | Fp8

# Constructor and options of the scheme of each method in config.yaml.
METHODS: dict[str, tuple[Callable[..., WeightQuantization], frozenset[str]]] = {
    "int8_weight_only": (functools.partial(WeightOnly, 8), frozenset()),
    "int4_weight_only": (functools.partial(WeightOnly, 4), frozenset({"group_size"})),
    "int4_awq": (Awq, frozenset({"group_size", "scales"})),
    "int4_gptq": (Gptq, frozenset({"group_size"})),
    "mixed": (Mixed, frozenset({"bits", "formats"})),
    "smoothquant": (SmoothQuant, frozenset({"alpha", "per_channel", "per_token"})),
    "fp8": (Fp8, frozenset()),
}


@dataclass(frozen=True)
class Quantization:
    """Quantization of an engine: of the blocks' matrices (scheme), the KV cache, and the head."""

    scheme: WeightQuantization | None = None
    kv_cache: KvCacheType = "auto"
    head: HeadType = "auto"

    @property
    def uses_fp8(self) -> bool:
        """Returns whether the engine computes with E4M3 numbers."""
        return isinstance(self.scheme, Fp8) or self.kv_cache == "fp8"


UNQUANTIZED = Quantization()


def make_weight_quantization(method: str, **options: Any) -> WeightQuantization | None:
    """Makes the scheme of a `quantization` mapping; options of other methods are ignored."""
    if method == "none":
        return None
    make, known = METHODS[method]
    return make(**{name: value for name, value in options.items() if name in known})


def method_of(scheme: WeightQuantization | None) -> str:
    """Name of a scheme's method in config.yaml."""
    if scheme is None:
        return "none"
    if isinstance(scheme, WeightOnly):
        return f"int{scheme.bits}_weight_only"
    names = {
        Awq: "int4_awq",
        Gptq: "int4_gptq",
        Mixed: "mixed",
        SmoothQuant: "smoothquant",
        Fp8: "fp8",
    }
    return names[type(scheme)]


def as_mapping(scheme: WeightQuantization | None) -> dict[str, Any]:
    """Returns the mapping from which `make_weight_quantization` makes this scheme."""
    method = method_of(scheme)
    known = METHODS[method][1] if scheme else ()
    return {"method": method, **{name: getattr(scheme, name) for name in sorted(known)}}


def calibration_format(
    scheme: WeightQuantization | None, kv_cache: KvCacheType
) -> QuantizationFormat | None:
    """The calibration that an engine's network needs; None if it needs none.

    Every calibration result contains the amax of keys and values.
    """
    if isinstance(scheme, Awq):
        return "int4_awq"
    if isinstance(scheme, Gptq):
        return "int4_gptq"
    if isinstance(scheme, Mixed):
        return "mixed"
    if isinstance(scheme, Fp8):
        return "fp8"
    return None if kv_cache == "auto" else "kv_cache"


def scale_block(scheme: WeightOnly, in_features: int) -> int | None:
    """Number of a rank's input features that share a stored scale; None: all of them.

    A 4-bit scale of a whole column is stored once per block, as the runtimes' 4-bit kernels expect.
    """
    if scheme.bits == 8 or scheme.group_size is not None:
        return scheme.group_size
    return next((size for size in GROUP_SIZES if in_features % size == 0), None)


def folds_into_values(config: MptConfig, kv_cache: KvCacheType) -> bool:
    """Returns whether V's columns can absorb the pre-quant scale of the layer after attention.

    Each column must have only one use, and nothing may depend on its amax: neither clipping nor the
    scale of a quantized cache.
    """
    has_one_use = config.num_kv_heads == config.num_heads
    return has_one_use and config.clip_qkv is None and kv_cache == "auto"


def default_group_size(config: MptConfig) -> int:
    """Chooses 128, or fewer if a group of 128 would cross a border between ranks.

    It depends only on the model: all tensor-parallel sizes up to 8 share the same groups.
    """
    narrowest = [
        size // tp_size
        for tp_size in range(1, 9)
        if is_legal(config, tp_size)
        for size in (config.hidden_size, config.intermediate_size)
    ]
    fitting = (g for g in GROUP_SIZES if all(size % g == 0 for size in narrowest))
    return next(fitting, GROUP_SIZES[-1])


def group_size_of(scheme: Awq | Gptq, config: MptConfig) -> int:
    """Returns the input features that share a scale."""
    return scheme.group_size or default_group_size(config)


def mixed_candidates(config: MptConfig) -> list[IntegerFormat]:
    """Lists the formats of mixed: int4 in all groups that ranks do not share, and int8.

    Without a group size that divides all of the model's matrices, int8 is the only one.
    """
    largest = default_group_size(config)
    sizes = [size for size in _fitting_groups(config, 1) if size <= largest]
    return [*(IntegerFormat(4, size) for size in sizes), IntegerFormat(8)]


def require_fitting_groups(config: MptConfig, tp_size: int, group_size: int) -> None:
    """Raises MptTrtError, listing the valid sizes, when a group would be on two ranks."""
    inputs = _input_features(config, tp_size)
    if all(size % group_size == 0 for size in inputs):
        return
    legal = _fitting_groups(config, tp_size)
    raise MptTrtError(
        f"group_size = {group_size}: layers with {', '.join(map(str, sorted(inputs)))} input "
        f"features on each of {tp_size} rank(s) are not multiples of it; valid sizes are "
        f"{', '.join(map(str, legal)) or 'none'}"
    )


def _fitting_groups(config: MptConfig, tp_size: int) -> list[int]:
    """Group sizes that divide the input features of every matrix on each rank."""
    inputs = _input_features(config, tp_size)
    return [each for each in GROUP_SIZES if all(size % each == 0 for size in inputs)]


def _input_features(config: MptConfig, tp_size: int) -> set[int]:
    """Input features of a block's matrices on each rank."""
    hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
    return {hidden_size, hidden_size // tp_size, intermediate_size // tp_size}
