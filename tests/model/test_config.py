"""The slopes of ALiBi, against transformers and the paper."""

from __future__ import annotations

import pytest
import torch
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from mpt_trt.model.config import alibi_slopes


class TestAlibiSlopes:
    @pytest.mark.parametrize("alibi_bias_max", [8, 16])
    @pytest.mark.parametrize("num_heads", [1, 3, 4, 6, 24, 40])
    def test_transformers(self, num_heads: int, alibi_bias_max: int) -> None:
        # Its bias of the key one position back is minus the slope.
        bias = build_mpt_alibi_tensor(num_heads, 2, alibi_bias_max)
        torch.testing.assert_close(
            torch.tensor(alibi_slopes(num_heads, alibi_bias_max)), -bias[:, 0, 0], rtol=1e-6, atol=0
        )

    def test_paper(self) -> None:
        # Section 3 of arXiv:2108.12409: for 8 heads 1/2, 1/4, ..., 1/256.
        assert alibi_slopes(8, 8) == [1 / 2**i for i in range(1, 9)]
