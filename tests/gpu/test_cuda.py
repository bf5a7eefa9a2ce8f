"""The same answers on a GPU. Skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from forgekit.data.batches import Batch
from forgekit.models.config import GPTConfig, TRMTitansConfig
from forgekit.models.io import build_model
from forgekit.train.config import TrainConfig
from forgekit.train.loop import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

SHAPE = {"vocab_size": 96, "d_model": 32, "n_layers": 2, "n_heads": 2, "ffn_hidden": 64, "window": 8}
TITANS = TRMTitansConfig(**SHAPE, d_mem=16, memory_layers=(1,), memory_chunk=8, trm_hidden=16, gate_hidden=8, t_max=2)


class Noise:
    """Random tokens as a pure function of the step."""

    def batch(self, step: int) -> Batch:
        ids = np.random.default_rng(step).integers(0, 96, (4, 33))
        return Batch(ids[:, :-1].copy(), ids[:, 1:].copy())


@pytest.mark.parametrize("config", [GPTConfig(**SHAPE), TITANS], ids=lambda c: c.family)
def test_a_gpu_scores_like_the_cpu(config):
    torch.manual_seed(0)
    model = build_model(config).eval()
    ids = torch.randint(0, 96, (3, 24))
    with torch.inference_mode():
        here = model(ids).logits
        there = model.cuda()(ids.cuda()).logits.cpu()
    torch.testing.assert_close(there, here, atol=1e-3, rtol=1e-3)


def test_training_on_a_gpu_follows_the_cpu():
    losses = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        train = TrainConfig(steps=5, rows=4, seq_len=32, device=device, precision="fp32", checkpoint_every=0)
        losses[device] = Trainer(build_model(TITANS), Noise(), train).run().losses
    np.testing.assert_allclose(losses["cuda"], losses["cpu"], rtol=1e-2)


def test_generation_with_a_state_on_a_gpu_equals_full_scoring():
    torch.manual_seed(0)
    model = build_model(TITANS).cuda().eval()
    ids = torch.randint(0, 96, (2, 20), device="cuda")
    with torch.inference_mode():
        full = model(ids).logits
        state, pieces = model.initial_state(2), []
        for start in range(0, 20, 5):
            out = model(ids[:, start : start + 5], state)
            state = out.state
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), full, atol=1e-3, rtol=1e-3)
