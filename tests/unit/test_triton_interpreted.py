"""The Triton kernels without a GPU: Triton's interpreter runs them on tensors of the CPU. Skipped without Triton, which
is too large to be installed for this alone; on a GPU tests/gpu runs the compiled ones."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

PRODUCTS = """
import torch
from forgekit.infer.kernels import gpu, plain
from forgekit.quant.config import GroupPlan
from forgekit.quant.groupwise import round_groups
from forgekit.quant.pack import pack2

generator = torch.Generator().manual_seed(0)
for rows, columns in ((1, 1), (7, 64), (5, 65), (33, 300), (16, 2048), (130, 1030)):
    codes_RC = torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
    packed_RP, scale_R = pack2(codes_RC), torch.rand(rows, generator=generator)
    for batch in (0, 1, 3, 64 if rows < 10 else 5):
        x_BC = torch.randn(batch, columns, generator=generator)
        got_BR = gpu.ternary_matmul(packed_RP, scale_R, x_BC)
        assert torch.equal(got_BR, plain.ternary_matmul(packed_RP, scale_R, x_BC)), ("ternary", rows, columns, batch)
        for group in (1, 32, 48):
            found = round_groups(torch.randn(rows, columns, generator=generator), GroupPlan(group=group))
            got_BR = gpu.grouped_matmul(found.codes_RC, found.scale_RG, x_BC, group)
            want_BR = plain.grouped_matmul(found.codes_RC, found.scale_RG, x_BC, group)
            torch.testing.assert_close(got_BR, want_BR, rtol=1e-4, atol=1e-4)
print("alike")
"""


def test_interpreted_products_are_those_of_plain_torch():
    command = [sys.executable, "-c", PRODUCTS]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.stdout == "alike\n", done.stderr
