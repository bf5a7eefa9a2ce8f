"""Products with low-bit weights against torch, and against llama.cpp's on the same shapes where it is there.

llama.cpp's libraries are looked for in the folder AGENT_FORGE_GGML, then in an installed ``llama_cpp``. They are run in
a process of their own; calls of both sides take turns.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.common import alternate, publish, ratio, tell
from forgekit.infer import kernels
from forgekit.infer.kernels import cpu
from forgekit.infer.kernels.llvm_ternary import token_bytes
from forgekit.quant.config import GroupPlan, TernaryPlan
from forgekit.quant.grid import Ternary
from forgekit.quant.groupwise import round_groups
from forgekit.quant.layers import PackedLinear

SHAPES = ((256, 256), (1024, 256), (512, 512), (1536, 512), (1024, 1024), (1024, 4096), (4096, 1024), (4096, 4096))
HEADS = ((1024, 512), (32768, 128))
BATCHES = (4, 16, 64)
ROUNDS, SECONDS = 9, 0.04
COLUMNS = [
    "rows x columns", "batch", "threads", "ours, us", "compiled part, us", "ours / fp32", "ours / bf16",
    "ours / llama.cpp", "compiled part / llama.cpp", "range", "target",
]  # fmt: skip


class Peer:
    """llama.cpp in a process of its own."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("ggml_peer.py")), str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = json.loads(self.process.stdout.readline())["about"]

    def seconds(self, **ask: int | str) -> float:
        """Of one product; a result that is not the product is an error."""
        self.process.stdin.write(json.dumps(ask) + "\n")
        self.process.stdin.flush()
        told = json.loads(self.process.stdout.readline())
        if told["error"] > 0.02:  # it rounds activations to 8 bits per 256 columns
            raise RuntimeError(f"llama.cpp is wrong by {told['error']} for {ask}")
        return told["microseconds"] * 1e-6


def find_peer() -> Peer | None:
    """llama.cpp, if it is on this machine."""
    named, package = os.environ.get("AGENT_FORGE_GGML"), importlib.util.find_spec("llama_cpp")
    folder = Path(named) if named else Path(package.origin).parent / "lib" if package else None
    return Peer(folder) if folder is not None and (folder / "libggml-base.so").exists() else None


def measure(sides: dict, peer: Peer | None, ask: dict) -> list:
    """What follows the first three columns, all sides taking turns; threads are left as they are."""
    for call in sides.values():
        call(0)
    clock = time.perf_counter()
    sides["ours"](0)
    each = max(3, int(SECONDS / (time.perf_counter() - clock) / 4))
    times: dict[str, list[float]] = {name: [] for name in [*sides, "peer"]}
    for _ in range(ROUNDS):
        for _ in range(max(3, each // 4)):  # the peer begins with calls that do not count, too
            sides["ours"](0)
        for name, [seconds] in alternate(sides, 1, each).items():
            times[name].append(seconds)
        if peer is not None:
            times["peer"].append(peer.seconds(**ask, calls=each))
    row: list = [f"{1e6 * statistics.median(times[side]):.1f}" for side in ("ours", "alone")]
    row += [ratio(times, "ours", side)[0] for side in ("fp32", "bf16")]
    if peer is None:
        return [*row, "-", "-", "-"]
    middle, low, high = ratio(times, "alone", "peer")
    return [*row, ratio(times, "ours", "peer")[0], middle, f"{low:.2f} to {high:.2f}"]


def judged(row: list) -> str:
    """Whether the product, rounding the token included, takes no longer than llama.cpp's: of compiled code both."""
    if row[-2] == "-":
        return ""
    return f"<= 1: {'met' if row[-2] <= 1 else 'missed'}"


def ternary_sides(rows: int, columns: int, batch: int) -> dict:
    """A map of ternary weights as models call it, its compiled part alone, and the same weights in torch's types."""
    codes_RC = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
    scale_R, x_BC = torch.rand(rows), torch.randn(batch, columns)
    layer = PackedLinear.from_ternary(Ternary(codes_RC, scale_R[:, None]), None, TernaryPlan())
    flavour, code = cpu.ternary()
    table = torch.tensor([layer.codes.data_ptr(), layer.scale.data_ptr(), rows])
    scratch = torch.empty(batch * token_bytes(flavour, columns), dtype=torch.uint8)
    threads = torch.get_num_threads() if batch * rows * columns >= cpu.SHARED_TERNARY else 1
    keep = (layer, table, x_BC, torch.empty(batch, rows), scratch)
    places = (table.data_ptr(), 1, x_BC.data_ptr(), 0, keep[3].data_ptr(), scratch.data_ptr())
    return {
        "ours": lambda _: layer(x_BC),
        "alone": lambda _, keep=keep: code.call(*places, batch, columns, threads),
        **dense_sides(codes_RC * scale_R[:, None], x_BC),
    }


def dense_sides(W_RC: torch.Tensor, x_BC: torch.Tensor) -> dict:
    """torch's own products."""
    narrow_RC, narrow_BC = W_RC.bfloat16(), x_BC.bfloat16()
    return {"fp32": lambda _: F.linear(x_BC, W_RC), "bf16": lambda _: F.linear(narrow_BC, narrow_RC)}


def head_sides(rows: int, columns: int, batch: int) -> dict:
    """A product of 8-bit weights in groups of 32."""
    head, x_BC = round_groups(torch.randn(rows, columns), GroupPlan()), torch.randn(batch, columns)
    return {
        "ours": lambda _: kernels.grouped_matmul(head.codes_RC, head.scale_RG, x_BC, 32),
        "alone": lambda _: cpu.grouped_matmul(head.codes_RC, head.scale_RG, x_BC, 32),
        **dense_sides(head.dense(), x_BC),
    }


def table(peer: Peer | None) -> list[list]:
    """All shapes with one and two threads."""
    rows = []
    works = [(ternary_sides, "TQ2_0", shape, 1) for shape in SHAPES]
    works += [(ternary_sides, "TQ2_0", (1024, 1024), batch) for batch in BATCHES]
    works += [(head_sides, "Q8_0", shape, 1) for shape in HEADS]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for sides, kind, (r, c), batch in works:
            tell(f"{r} x {c}, batch {batch}, {threads} threads")
            known = peer if c % (256 if kind == "TQ2_0" else 32) == 0 else None
            ask = {"rows": r, "columns": c, "batch": batch, "threads": threads, "type": kind}
            name = f"{r} x {c}" + (", 8 bits" if kind == "Q8_0" else "")
            row = measure(sides(r, c, batch), known, ask)
            rows.append([name, batch, threads, *row, judged(row) if kind == "TQ2_0" and batch == 1 else ""])
    torch.set_num_threads(1)
    return rows


def lesser_machines(peer: Peer | None) -> list[list]:
    """1024 x 4096 on one thread with the instructions of processors that have less."""
    rows, shape = [], (1024, 4096)
    found = cpu.machine()
    for i in range(1, len(found.flavours)):
        tell(f"as if it were {found.flavours[i].name}")
        cpu.machine = lambda i=i: replace(found, flavours=found.flavours[i:])
        cpu.ternary.cache_clear()
        ask = {"rows": shape[0], "columns": shape[1], "batch": 1, "threads": 1, "type": "TQ2_0"}
        name = f"1024 x 4096, {found.flavours[i].name}"
        rows.append([name, 1, 1, *measure(ternary_sides(*shape, 1), peer, ask), ""])
    cpu.machine = lambda: found
    cpu.ternary.cache_clear()
    return rows


def costs() -> list[str]:
    """What a call costs beside the product, what the first one costs, and the way without LLVM."""
    clock = time.perf_counter()
    cpu.ternary.__wrapped__(cpu.ternary()[0])
    compiled = time.perf_counter() - clock
    tiny = ternary_sides(16, 64, 1)["ours"]
    sides = ternary_sides(1024, 1024, 1)
    name, kept = kernels.VARIABLE, os.environ.get(kernels.VARIABLE)

    packed_RP, scale_R, x_BC = torch.zeros(1024, 256, dtype=torch.uint8), torch.rand(1024), torch.randn(1, 1024)

    def plainly(_: int) -> None:
        os.environ[name] = "torch"
        kernels.ternary_matmul(packed_RP, scale_R, x_BC, 1024)
        os.environ.pop(name)

    getpid = ctypes.CDLL(None).getpid
    getpid.argtypes = [ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3]
    nothing = {"nothing": lambda _: getpid(1, 2, 3, 4, 5, 6, 7, 8, 9)}
    times = alternate({"tiny": tiny, "ours": sides["ours"], "plain": plainly, **nothing}, ROUNDS, 200)
    if kept is not None:
        os.environ[name] = kept
    middle = {side: 1e6 * statistics.median(values) for side, values in times.items()}
    return [
        f"Instructions used: {cpu.ternary()[0].name}. Compiling takes {1e3 * compiled:.0f} ms once per process; a call "
        f"of 16 x 64 takes {middle['tiny']:.1f} us in all: the product is next to nothing of it. Of what is called the "
        f"compiled part {middle['nothing']:.1f} us are the way there: so long takes a call of getpid through ctypes "
        "with as many arguments. llama.cpp's node has no such way.",
        f"Without LLVM, 1024 x 1024 in plain torch takes {middle['plain']:.0f} us instead of {middle['ours']:.1f}.",
    ]


def main() -> int:
    """Measure and publish; 1 if a target is missed."""
    torch.manual_seed(0)
    os.environ.pop(kernels.VARIABLE, None)
    if kernels.backend() != "llvm":
        raise SystemExit("llvmlite is not installed: there is nothing to compare")
    peer = find_peer()
    with torch.inference_mode():
        rows = table(peer) + lesser_machines(peer)
        notes = costs()
    notes += [
        f"Times of whole calls from Python, medians of {ROUNDS} rounds that take turns; ratios of times below 1 mean "
        "that ours is faster. fp32 and bf16 are torch's F.linear with the same weights.",
        f"llama.cpp ({peer.about}) computes TQ2_0 weights (8 bits: Q8_0), many products in one graph, which leaves out "
        "what starting a graph costs. The compiled part is the same of ours: rounding the activations and the product "
        "(8 bits: with the allocation of the result). It is what the target is for."
        if peer
        else "llama.cpp was not there.",
    ]
    publish("ternary_kernels", "Products with ternary and 8-bit weights", COLUMNS, rows, notes)
    return int(any("missed" in row[-1] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
