"""What the parts of a training step cost on a CPU in the form we use, against the form torch offers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.common import alternate, publish, ratio, setup
from forgekit.models import layers
from forgekit.models.layers import SquaredReLU, attend_blocks, identity_taps, short_conv

ROUNDS, EACH = 7, 10


def attention(rows: int, heads: int, length: int, window: int):
    """Forward and backward of windowed attention: written out, and through the fused kernel."""
    q, k, v = (torch.randn(rows, heads, length, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    limit = layers.SMALL_WINDOW

    def side(small: int):
        def call(_: int) -> None:
            layers.SMALL_WINDOW = small
            attend_blocks(q, k, v, window).sum().backward()
            layers.SMALL_WINDOW = limit

        return call

    return {"ours": side(limit), "torch": side(0)}


def convolution(rows: int, length: int, channels: int):
    """Forward and backward of the short convolution: grouped, and as a sum of shifted products."""
    x = torch.randn(rows, length, channels, dtype=torch.bfloat16, requires_grad=True)
    taps = identity_taps(channels).requires_grad_()

    def ours(_: int) -> None:
        short_conv(x, None, taps, None)[0].sum().backward()

    def shifted(_: int) -> None:
        padded, w = F.pad(x, (0, 0, 3, 0)), taps.to(x.dtype)
        sum(padded[:, j : j + length] * w[:, j] for j in range(4)).sum().backward()

    return {"ours": ours, "torch": shifted}


def activation(rows: int, width: int):
    """Forward and backward of the squared ReLU: ours, and autograd's."""
    x = torch.randn(rows, width, dtype=torch.bfloat16, requires_grad=True)
    return {
        "ours": lambda _: SquaredReLU.apply(x).sum().backward(),
        "torch": lambda _: F.relu(x).square().sum().backward(),
    }


def main() -> None:
    """Measure and publish."""
    profile, shape, _ = setup()
    train = profile.phase("cognate").trunk
    torch.manual_seed(0)
    tokens = (train.rows, train.seq_len)
    parts = {
        f"attention, window {shape.window}": attention(train.rows, shape.n_heads, train.seq_len, shape.window),
        "short convolution": convolution(*tokens, 3 * shape.d_model),
        "squared ReLU": activation(train.rows * train.seq_len, shape.ffn_hidden),
    }
    rows = []
    for name, sides in parts.items():
        alternate(sides, 1, 3)
        times = alternate(sides, ROUNDS, EACH)
        middle, low, high = ratio(times, "ours", "torch")
        milliseconds = [f"{1e3 * sorted(times[side])[ROUNDS // 2]:.1f}" for side in ("ours", "torch")]
        rows.append([name, middle, f"{low:.2f} to {high:.2f}", *milliseconds])
    notes = [
        f"Forward and backward at nano's sizes ({train.rows} x {train.seq_len} tokens), bfloat16, {ROUNDS} rounds of "
        f"{EACH} calls taking turns; ratios of times are medians over rounds. The other side is torch's fused "
        "attention, a sum of shifted products, and autograd's relu and square."
    ]
    columns = ["what", "ours / other", "range", "ours, ms", "other, ms"]
    publish("cpu_kernels", "Parts of a training step on a CPU", columns, rows, notes)


if __name__ == "__main__":
    main()
