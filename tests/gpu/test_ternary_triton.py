"""The Triton product gives the bits of plain torch on the same GPU. Skipped where there is none."""

from __future__ import annotations

import copy

import pytest
import torch

from forgekit.infer import kernels
from forgekit.infer.kernels import plain
from forgekit.quant.config import GroupPlan, TernaryPlan
from forgekit.quant.model import packed
from forgekit.quant.pack import pack2
from tests.unit.tiny import gpt_config, made

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("shape", [(1, 1), (7, 64), (5, 65), (33, 300), (16, 2048), (130, 4100)], ids=str)
def test_triton_gives_the_bits_of_plain_torch(shape):
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    codes_RC = torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)
    packed_RP, scale_R = pack2(codes_RC).cuda(), torch.rand(rows, generator=generator).cuda()
    assert kernels.backend("cuda") == "triton"
    for batch in (0, 1, 2, 5, 64):
        x_BC = torch.randn(batch, columns, generator=generator).cuda()
        got = kernels.ternary_matmul(packed_RP, scale_R, x_BC, columns)
        assert torch.equal(got, plain.ternary_matmul(packed_RP, scale_R, x_BC))
        here = plain.ternary_matmul(packed_RP.cpu(), scale_R.cpu(), x_BC.cpu())
        torch.testing.assert_close(got.cpu(), here, rtol=1e-3, atol=1e-2)


def test_what_is_not_finite_is_not_hidden():
    packed_RP = pack2(torch.ones(6, 70, dtype=torch.int8)).cuda()
    x_BC = torch.ones(3, 70, device="cuda")
    x_BC[1, 5] = float("nan")
    got = kernels.ternary_matmul(packed_RP, torch.ones(6, device="cuda"), x_BC, 70)
    assert got[[0, 2]].isfinite().all() and got[1].isnan().all()


def test_group_wise_products_on_a_gpu():
    codes_RC = torch.randint(-127, 128, (40, 100), dtype=torch.int8, device="cuda")
    scale_RG = torch.rand(40, 4, device="cuda").half()
    x_BC = torch.randn(3, 100, device="cuda")
    got = kernels.grouped_matmul(codes_RC, scale_RG, x_BC, 32)
    here = plain.grouped_matmul(codes_RC.cpu(), scale_RG.cpu(), x_BC.cpu(), 32)
    torch.testing.assert_close(got.cpu(), here, rtol=1e-4, atol=1e-2)


def test_a_packed_model_says_the_same_on_a_gpu():
    here = packed(made(gpt_config(vocab_size=320)), TernaryPlan(), GroupPlan())
    there, ids_BT = copy.deepcopy(here).cuda(), torch.randint(1, 320, (2, 12))
    with torch.inference_mode():
        got = there(ids_BT.cuda()).logits.cpu()
        # An activation between two steps of its grid may be rounded either way.
        torch.testing.assert_close(got, here(ids_BT).logits, rtol=1e-2, atol=5e-2)
