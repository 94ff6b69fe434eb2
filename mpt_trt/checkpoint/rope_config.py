"""Reads the rotary position embedding of a `config.json`, in both of llm-foundry's styles.

`rope_impl: dail` is flash-attn's implementation, `hf` that of transformers' Llama. Both rotate
features i and i + head_dim / 2 by the same angles. Sources: llm-foundry's
`models/mpt/{configuration,modeling}_mpt.py` and `models/utils/config_defaults.py`; flash-attn's
`layers/rotary.py`; transformers' `modeling_rope_utils.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from mpt_trt.errors import MptTrtError
from mpt_trt.model.config import MOST
from mpt_trt.model.rope import Rope, RopeScaling

Refusal = Callable[[str, object, str], MptTrtError]
"""Makes the error of (field, value, reason)."""

HF_SCALINGS: dict[str, RopeScaling] = {
    "no_scaling": "none",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
}
LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


# Keys of rope_hf_config and rope_dail_config.
HF_KEYS = ("type", "factor", *LLAMA3_KEYS)
DAIL_KEYS = ("type", "pos_idx_in_fp32", "xpos_scale_base")


def read_rope(attention: Mapping[str, Any], refused: Refusal) -> Rope:
    """Reads the rope settings of an `attn_config` with `rope: true`; missing keys have defaults."""
    fields = _Fields("attn_config", attention, refused)
    theta = fields.number("rope_theta", Rope().theta)
    style = fields.choice("rope_impl", "dail", ("dail", "hf"))
    if style == "dail":
        _require_plain(fields.section("rope_dail_config"))
        return Rope(theta)
    return _read_scaling(theta, fields.section("rope_hf_config"))


def _require_plain(dail: _Fields) -> None:
    dail.choice("type", "original", ("original",))
    dail.require_known(DAIL_KEYS)
    if dail.value("pos_idx_in_fp32", True) is not True:
        raise dail.refused(
            "pos_idx_in_fp32", "positions that are rounded to the model's type are not supported"
        )


def _read_scaling(theta: float, hf: _Fields) -> Rope:
    name = hf.choice("type", "no_scaling", tuple(HF_SCALINGS))
    hf.require_known(HF_KEYS)
    scaling = HF_SCALINGS[name]
    if scaling == "none":
        return Rope(theta)
    factor = hf.number("factor", 1.0)
    if scaling != "llama3":
        return Rope(theta, scaling, factor)
    low, high, positions = (hf.number(key, None) for key in LLAMA3_KEYS)
    if positions != int(positions) or positions > MOST["max_seq_len"]:
        raise hf.refused(LLAMA3_KEYS[2], f"an integer up to {MOST['max_seq_len']} is required")
    if low >= high:
        raise hf.refused(LLAMA3_KEYS[0], f"it must be less than {LLAMA3_KEYS[1]} ({high:g})")
    return Rope(theta, scaling, factor, low, high, int(positions))


class _Fields:
    """The keys of one object of the file, under its name."""

    def __init__(self, owner: str, keys: Mapping[str, Any], refuse: Refusal):
        self._owner, self._keys, self._refuse = owner, keys, refuse

    def value(self, key: str, default: object) -> object:
        value = self._keys.get(key)
        return default if value is None else value

    def refused(self, key: str, why: str) -> MptTrtError:
        return self._refuse(f"{self._owner}.{key}", self._keys.get(key), why)

    def require_known(self, keys: tuple[str, ...]) -> None:
        """Raises MptTrtError when there is another key with a value."""
        for key, value in self._keys.items():
            if key not in keys and value is not None:
                raise self.refused(key, f"the keys here are {', '.join(keys)}")

    def section(self, key: str) -> _Fields:
        value = self.value(key, {})
        if not isinstance(value, dict):
            raise self.refused(key, "an object is expected")
        return _Fields(f"{self._owner}.{key}", value, self._refuse)

    def choice(self, key: str, default: str, choices: tuple[str, ...]) -> str:
        value = self.value(key, default)
        if not isinstance(value, str) or value not in choices:
            raise self.refused(key, f"supported are {', '.join(choices)}")
        return value

    def number(self, key: str, default: float | None) -> float:
        value = self.value(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:  # type: ignore[operator]
            raise self.refused(key, "a positive number is required")
        return float(value)  # type: ignore[arg-type]
