"""One token of a Titans memory (:class:`forgekit.models.memory.TitansMemory`) in LLVM's language.

Shapes: B batch, H heads, K head width (a multiple of :data:`~forgekit.infer.kernels.llvm_attention.LANES`).
"""

from __future__ import annotations

from types import SimpleNamespace

from forgekit.infer.kernels.llvm_attention import (
    DECLARES,
    KIND,
    LANES,
    convolution,
    exponential,
    length,
    squares,
)
from forgekit.infer.kernels.llvm_ternary import EPSILON
from forgekit.infer.kernels.llvm_text import (
    OpenMP,
    Writer,
    constant,
    multiply_add,
    read_fields,
    row_sums,
    share_out,
    workers,
)

HEIGHT = 4
"""Rows of the memory at a time."""
LIMITS = ("floor", "novelty", "most", "momentum", "surprise")
"""The numbers that bound the gates, in their order: alpha = min(floor + novelty sigmoid, most), eta = min(sigmoid,
momentum), theta = min(surprise sigmoid, 1)."""


def memory_module(openmp: OpenMP) -> str:
    """The text of ``void remember(qkv, taps, tail, next, gates, limits, gain, M, S, M_after, S_after, out, scratch, B,
    H, K, threads)``.

    ``qkv`` (B, 3 H K) before the convolution with ``taps`` (3 H K, 4), ``tail`` and ``next`` (B, 3, 3 H K); ``gates``
    (B, 3 H) logits; ``limits`` (5), see :data:`LIMITS`; ``gain`` (K) of the norm of what is read; ``M`` and ``S``
    (B, H, K, K); ``out`` (B, H K). ``scratch`` has room for :func:`memory_bytes`.
    """
    fields = ["qkv", "gates", "limits", "gain", "M", "S", "M_after", "S_after", "out", "R", "H", "K"]
    pointers = ["qkv", "taps", "tail", "next", *fields[1:9], "scratch"]
    heads = ", ".join([f"ptr %{p}" for p in pointers] + [f"i64 %{n}" for n in ("B", "H", "K", "threads")])
    w = Writer(f"void @remember({heads})")
    memory = w.let(f"alloca [{len(fields)} x i64]")
    a = SimpleNamespace(**{name: f"%{name}" for name in fields})
    a.R, a.qkv = w.times("%B", "%H"), "%scratch"
    width = w.times(w.times("%H", "%K"), 3)

    def mix(b: str, _: list[str]) -> None:
        once, thrice = w.times(w.times(b, width), 4), w.times(w.times(b, width), 12)
        places = [w.at("%qkv", once), w.at("%tail", thrice), w.at("%next", thrice), w.at("%scratch", once)]
        w.do(f"call void @mix({', '.join(f'ptr {p}' for p in places)}, ptr %taps, i64 {width})")

    w.loop("0", "%B", 1, [], mix)
    share_out(w, a, (fields, memory))
    silu = convolution(lambda w, x: w.let(f"fmul {KIND} {x}, {_sigmoid(w, x)}"))
    return "\n".join([DECLARES, silu, _heads(fields), workers(fields, openmp), w.end()])


def memory_bytes(batch: int, heads: int, width: int) -> int:
    """Bytes of scratch: convolved inputs."""
    return 12 * batch * heads * width


def _sigmoid(w: Writer, x: str) -> str:
    """1 / (1 + exp(-x)) by the exponential of what is not positive."""
    one, zero = constant(LANES, "float", "1.0"), "zeroinitializer"
    below = w.let(f"fcmp olt {KIND} {x}, {zero}")
    minus = w.let(f"select <{LANES} x i1> {below}, {KIND} {x}, {KIND} {w.let(f'fneg {KIND} {x}')}")
    power = exponential(w, minus)
    upper = w.let(f"select <{LANES} x i1> {below}, {KIND} {power}, {KIND} {one}")
    return w.let(f"fdiv {KIND} {upper}, {w.let(f'fadd {KIND} {power}, {one}')}")


def _heads(fields: list[str]) -> str:
    """Heads r0 to r1 of all rows of the batch: h is r % H."""
    w = Writer("internal void @rows(ptr %a, i64 %r0, i64 %r1)")
    a = read_fields(w, fields)
    a.row = w.times(a.K, 4)

    def head(r: str, _: list[str]) -> None:
        b, h = w.over(r, a.H), w.let(f"urem i64 {r}, {a.H}")
        first = w.plus(w.times(w.times(b, 3), a.H), h)
        q, k, v = (w.at(a.qkv, w.times(w.plus(first, w.times(a.H, part)), a.row)) for part in range(3))
        gates = _gates(w, a, w.at(a.gates, w.times(first, 4)))
        _divide(w, a, q)
        _divide(w, a, k)
        square = w.times(w.times(r, a.K), a.row)
        memories = [w.at(x, square) for x in (a.M, a.S, a.M_after, a.S_after)]
        out = w.at(a.out, w.times(r, a.row))
        w.loop("0", a.K, HEIGHT, [], lambda i, _: _rows(w, a, (q, k, v, out), (memories, gates, i)))
        _norm(w, a, out)

    w.loop("%r0", "%r1", 1, [], head)
    return w.end()


def _gates(w: Writer, a: SimpleNamespace, first: str) -> list[str]:
    """1 - alpha, eta and theta of a head, each in all lanes."""
    sigmoids = [w.load("float", w.at(first, w.times(w.times(a.H, n), 4))) for n in range(3)]
    alpha, eta, theta = (_sigmoid(w, w.splat(LANES, "float", x)) for x in sigmoids)
    floor, novelty, most, momentum, surprise = (
        w.splat(LANES, "float", w.load("float", w.at(a.limits, 4 * n))) for n in range(len(LIMITS))
    )
    alpha = _least(w, multiply_add(w, alpha, novelty, floor), most)
    theta = _least(w, w.let(f"fmul {KIND} {theta}, {surprise}"), constant(LANES, "float", "1.0"))
    keep = w.let(f"fsub {KIND} {constant(LANES, 'float', '1.0')}, {alpha}")
    return [keep, _least(w, eta, momentum), theta]


def _least(w: Writer, x: str, bound: str) -> str:
    """The smaller of two; NaN stays NaN."""
    above = w.let(f"fcmp ogt {KIND} {x}, {bound}")
    return w.let(f"select <{LANES} x i1> {above}, {KIND} {bound}, {KIND} {x}")


def _divide(w: Writer, a: SimpleNamespace, x: str) -> None:
    """A vector over its length, in place."""
    long = w.splat(LANES, "float", length(w, x, a.row))
    w.loop("0", a.row, 4 * LANES, [], lambda c, _: _scale(w, w.at(x, c), long))


def _scale(w: Writer, place: str, divisor: str) -> None:
    w.store(KIND, w.let(f"fdiv {KIND} {w.load(KIND, place)}, {divisor}"), place)


def _rows(w: Writer, a: SimpleNamespace, vectors: tuple, rest: tuple) -> None:
    """Rows i to i + 3 of the memory: the error, the new rows, what they recall."""
    (q, k, v, out), (memories, (keep, eta, theta), i) = vectors, rest
    at = [w.times(w.plus(i, n), a.row) for n in range(HEIGHT)]
    M, S, M_after, S_after = ([w.at(memory, to) for to in at] for memory in memories)
    none = [(KIND, "zeroinitializer")] * HEIGHT

    def recall(c: str, sums: list[str]) -> list[str]:
        key = w.load(KIND, w.at(k, c))
        return [multiply_add(w, w.load(KIND, w.at(row, c)), key, s) for row, s in zip(M, sums)]

    recalled = row_sums(w, "float", w.loop("0", a.row, 4 * LANES, none, recall), LANES)
    lanes, here = f"<{HEIGHT} x float>", w.times(i, 4)
    error = w.let(f"fsub {lanes} {w.load(lanes, w.at(v, here))}, {recalled}")
    errors = [w.pick(HEIGHT, "float", error, "poison", [n] * LANES) for n in range(HEIGHT)]
    steps = [w.let(f"fmul {KIND} {theta}, {e}") for e in errors]

    def write(c: str, sums: list[str]) -> list[str]:
        key, query, after = w.load(KIND, w.at(k, c)), w.load(KIND, w.at(q, c)), []
        for n, step in enumerate(steps):
            past = w.let(f"fmul {KIND} {eta}, {w.load(KIND, w.at(S[n], c))}")
            surprise = multiply_add(w, step, key, past)
            memory = multiply_add(w, keep, w.load(KIND, w.at(M[n], c)), surprise)
            w.store(KIND, surprise, w.at(S_after[n], c))
            w.store(KIND, memory, w.at(M_after[n], c))
            after.append(multiply_add(w, memory, query, sums[n]))
        return after

    sums = w.loop("0", a.row, 4 * LANES, none, write)
    w.store(lanes, row_sums(w, "float", sums, LANES), w.at(out, here))


def _norm(w: Writer, a: SimpleNamespace, x: str) -> None:
    """A vector over its root mean square, times the gain, in place."""
    mean = w.let(f"fdiv float {squares(w, x, a.row)}, {w.let(f'sitofp i64 {a.K} to float')}")
    root = w.let(f"call float @llvm.sqrt.f32(float {w.let(f'fadd float {mean}, {EPSILON}')})")
    factor = w.splat(LANES, "float", w.let(f"fdiv float 1.0, {root}"))

    def column(c: str, _: list[str]) -> None:
        value = w.let(f"fmul {KIND} {w.load(KIND, w.at(x, c))}, {factor}")
        w.store(KIND, w.let(f"fmul {KIND} {value}, {w.load(KIND, w.at(a.gain, c))}"), w.at(x, c))

    w.loop("0", a.row, 4 * LANES, [], column)
