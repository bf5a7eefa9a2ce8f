"""One token's attention in LLVM's language: convolution, norms, rotation, cache and softmax without a step between.

A generated token does little work in many steps; asking torch for each of them takes longer than the work.

Shapes: B batch, H heads, K head width (a multiple of twice :data:`LANES`), D = H K, L slots of the cache, J taps before
the token's own.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

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

LANES, TAPS = 16, 4
"""Floats of a vector, and taps of the convolution that this is written for."""
SHORTEST = "0x3D71979980000000"
"""float32(1e-12): what a length is divided by at least (torch.nn.functional.normalize)."""
SMALLEST = "-87.0"
"""The exponential of less than this counts as nothing."""
LOG2_E, LN2_HIGH, LN2_LOW = "0x3FF7154760000000", "0x3FE6300000000000", "0xBF2BD01060000000"
EXPONENTIAL = (
    "0x3F2A0D2CE0000000", "0x3F56E879C0000000", "0x3F81112100000000", "0x3FA5553820000000", "0x3FC5555540000000",
    "0x3FE0000000000000",
)  # fmt: skip
"""(exp(r) - 1 - r) / r^2 for |r| up to half of ln 2 (Cephes, expf)."""
KIND = f"<{LANES} x float>"
DECLARES = f"""declare {KIND} @llvm.fmuladd.v{LANES}f32({KIND}, {KIND}, {KIND})
declare {KIND} @llvm.rint.v{LANES}f32({KIND})
declare float @llvm.vector.reduce.fadd.v{LANES}f32(float, {KIND})
declare float @llvm.sqrt.f32(float)"""


def attention_module(openmp: OpenMP) -> str:
    """The text of ``void attend(qkv, taps, tail, next, gain, cos, sin, pos, k, v, out, scratch, B, H, K, L, start, end,
    threads)``.

    ``qkv`` (B, 3 D); ``taps`` (3 D, 4), ``tail`` and ``next`` (B, 3, 3 D) or null; ``gain`` (H) or null; ``cos`` and
    ``sin`` (B, K) as :func:`forgekit.models.layers.turns` has them; ``k`` and ``v`` (B, H, L, K), of which slot ``end``
    is written and those from ``start`` to ``end`` are seen, but of a row with ``pos`` (B) tokens before no more than
    those. ``scratch`` has room for :func:`attention_bytes`.
    """
    fields = ["qkv", "gain", "cos", "sin", "pos", "k", "v", "out", "scratch", "R", "H", "K", "L", "Q", "start", "end"]
    pointers = ["qkv", "taps", "tail", "next", "gain", "cos", "sin", "pos", "k", "v", "out", "scratch"]
    numbers = ["B", "H", "K", "L", "start", "end", "threads"]
    heads = ", ".join([f"ptr %{p}" for p in pointers] + [f"i64 %{n}" for n in numbers])
    w = Writer(f"void @attend({heads})")
    memory = w.let(f"alloca [{len(fields)} x i64]")
    a = SimpleNamespace(**{name: f"%{name}" for name in fields})
    a.R = w.times("%B", "%H")
    seen = w.plus(w.let("sub i64 %end, %start"), LANES)
    a.Q = w.plus(w.times(w.over(seen, LANES), LANES), "%K")  # scores filled up to whole vectors, and a query
    mixed = w.at("%scratch", w.times(w.times(a.R, a.Q), 4))
    width = w.times(w.times("%H", "%K"), 3)
    none = w.let("icmp eq ptr %taps, null")
    a.qkv = w.let(f"select i1 {none}, ptr %qkv, ptr {mixed}")
    rows = w.let(f"select i1 {none}, i64 0, i64 %B")

    def mix(b: str, _: list[str]) -> None:
        once, thrice = w.times(w.times(b, width), 4), w.times(w.times(b, width), 12)
        places = [w.at("%qkv", once), w.at("%tail", thrice), w.at("%next", thrice), w.at(mixed, once)]
        w.do(f"call void @mix({', '.join(f'ptr {p}' for p in places)}, ptr %taps, i64 {width})")

    w.loop("0", rows, 1, [], mix)
    share_out(w, a, (fields, memory))
    declares = [
        DECLARES,
        f"declare {KIND} @llvm.maxnum.v{LANES}f32({KIND}, {KIND})",
        f"declare float @llvm.vector.reduce.fmax.v{LANES}f32({KIND})",
    ]
    return "\n".join([*declares, convolution(), _heads(fields), workers(fields, openmp), w.end()])


def attention_bytes(shape: tuple[int, int, int], seen: int, conv: bool) -> int:
    """Bytes of scratch for B, H, K and so many slots that are seen: scores, queries, convolved inputs."""
    batch, heads, width = shape
    each = LANES * -(-seen // LANES) + width
    return 4 * batch * heads * (each + 3 * width * conv)


def convolution(then: Callable[[Writer, str], str] = lambda w, mixed: mixed) -> str:
    """A token's convolution, ``then`` what follows it, and the inputs that the next token needs: all but the oldest,
    and its own."""
    w = Writer("internal void @mix(ptr %x, ptr %tail, ptr %next, ptr %out, ptr %taps, i64 %C)")
    row = w.times("%C", 4)

    def channels(c: str, _: list[str]) -> None:
        to = w.times(c, 4)
        taps = w.load(f"<{TAPS * LANES} x float>", w.at("%taps", w.times(to, TAPS)))
        before = [w.load(KIND, w.at("%tail", w.times(row, j), to)) for j in range(TAPS - 1)]
        inputs, mixed = [*before, w.load(KIND, w.at("%x", to))], "zeroinitializer"
        for j, value in enumerate(inputs):
            tap = w.pick(TAPS * LANES, "float", taps, "poison", range(j, TAPS * LANES, TAPS))
            mixed = multiply_add(w, tap, value, mixed)
        w.store(KIND, then(w, mixed), w.at("%out", to))
        for j, value in enumerate(inputs[1:]):
            w.store(KIND, value, w.at("%next", w.times(row, j), to))

    w.loop("0", "%C", LANES, [], channels)
    return w.end()


def _heads(fields: list[str]) -> str:
    """Heads r0 to r1 of all rows of the batch: h is r % H."""
    w = Writer("internal void @rows(ptr %a, i64 %r0, i64 %r1)")
    a = read_fields(w, fields)
    a.row = w.times(a.K, 4)

    def head(r: str, _: list[str]) -> None:
        b, h = w.over(r, a.H), w.let(f"urem i64 {r}, {a.H}")
        scores = w.at(a.scratch, w.times(w.times(r, a.Q), 4))
        query = w.at(scores, w.times(w.let(f"sub i64 {a.Q}, {a.K}"), 4))
        first = w.plus(w.times(w.times(b, 3), a.H), h)
        q, k, v = (w.at(a.qkv, w.times(w.plus(first, w.times(a.H, part)), a.row)) for part in range(3))
        cache = w.times(w.times(r, a.L), a.row)
        keys, values = (w.at(x, cache) for x in (a.k, a.v))
        new = w.times(a.end, a.row)
        turn = [w.at(x, w.times(b, a.row)) for x in (a.cos, a.sin)]
        _place(w, a, (k, w.at(keys, new)), (turn, _factor(w, a, k, None)))
        _place(w, a, (q, query), (turn, _factor(w, a, q, h)))
        _copy(w, a, v, w.at(values, new))
        start = _first_slot(w, a, b)
        seen = w.times(start, a.row)
        count = w.plus(w.let(f"sub i64 {a.end}, {start}"), 1)
        _scores(w, a, (query, w.at(keys, seen), scores), count)
        whole = _exponentials(w, scores, count)
        _values(w, a, (scores, w.at(values, seen), w.at(a.out, w.times(r, a.row))), (count, whole))

    w.loop("%r0", "%r1", 1, [], head)
    return w.end()


def _first_slot(w: Writer, a: SimpleNamespace, b: str) -> str:
    """Where a row begins to see: its slots are filled up to the end, so it has as many as tokens before."""
    before = w.load("i64", w.at(a.pos, w.times(b, 8)))
    some = w.let(f"icmp sgt i64 {before}, 0")
    first = w.let(f"sub i64 {a.end}, {w.let(f'select i1 {some}, i64 {before}, i64 0')}")
    later = w.let(f"icmp sgt i64 {first}, {a.start}")
    return w.let(f"select i1 {later}, i64 {first}, i64 {a.start}")


def _vectors(w: Writer, a: SimpleNamespace, body: Callable, carried: list[tuple[str, str]] | None = None) -> list[str]:
    """Over the vectors of a head: ``body(bytes from its start, carried)``."""
    return w.loop("0", a.row, 4 * LANES, carried or [], body)


def squares(w: Writer, x: str, row: str) -> str:
    """The sum of squares of so many bytes."""

    def square(c: str, sums: list[str]) -> list[str]:
        value = w.load(KIND, w.at(x, c))
        return [multiply_add(w, value, value, sums[0])]

    [sums] = w.loop("0", row, 4 * LANES, [(KIND, "zeroinitializer")], square)
    return total(w, sums)


def total(w: Writer, vector: str) -> str:
    """The sum over the lanes."""
    return w.let(f"call reassoc float @llvm.vector.reduce.fadd.v{LANES}f32(float 0.0, {KIND} {vector})")


def length(w: Writer, x: str, row: str) -> str:
    """The length of a vector of so many bytes, as normalising divides by it."""
    root = w.let(f"call float @llvm.sqrt.f32(float {squares(w, x, row)})")
    short = w.let(f"fcmp olt float {root}, {SHORTEST}")
    return w.let(f"select i1 {short}, float {SHORTEST}, float {root}")


def _factor(w: Writer, a: SimpleNamespace, x: str, head: str | None) -> str:
    """What queries of a head (keys: None) are multiplied with: their length and gain, or 1 / sqrt(K)."""
    long = length(w, x, a.row)
    none = w.let(f"icmp eq ptr {a.gain}, null")
    if head is None:
        return w.let(f"select i1 {none}, float 1.0, float {w.let(f'fdiv float 1.0, {long}')}")
    root = w.let(f"call float @llvm.sqrt.f32(float {w.let(f'sitofp i64 {a.K} to float')})")
    # Without a gain there is no address to read: any float will do.
    gain = w.load("float", w.let(f"select i1 {none}, ptr {x}, ptr {w.at(a.gain, w.times(head, 4))}"))
    normed = w.let(f"fdiv float {gain}, {long}")
    return w.let(f"select i1 {none}, float {w.let(f'fdiv float 1.0, {root}')}, float {normed}")


def _place(w: Writer, a: SimpleNamespace, move: tuple[str, str], by: tuple[list[str], str]) -> None:
    """A head's vector, rotated and times a factor, to another place."""
    (source, target), ((cos, sin), factor) = move, by
    half, wide = w.over(a.row, 2), w.splat(LANES, "float", factor)

    def column(c: str, _: list[str]) -> None:
        low = w.let(f"icmp slt i64 {c}, {half}")
        other = w.let(f"select i1 {low}, i64 {w.plus(c, half)}, i64 {w.let(f'sub i64 {c}, {half}')}")
        straight = w.let(f"fmul {KIND} {w.load(KIND, w.at(source, c))}, {w.load(KIND, w.at(cos, c))}")
        crossed = w.let(f"fmul {KIND} {w.load(KIND, w.at(source, other))}, {w.load(KIND, w.at(sin, c))}")
        value = w.let(f"fadd {KIND} {straight}, {crossed}")
        w.store(KIND, w.let(f"fmul {KIND} {value}, {wide}"), w.at(target, c))

    _vectors(w, a, column)


def _copy(w: Writer, a: SimpleNamespace, source: str, target: str) -> None:
    _vectors(w, a, lambda c, _: w.store(KIND, w.load(KIND, w.at(source, c)), w.at(target, c)))


def _scores(w: Writer, a: SimpleNamespace, places: tuple[str, str, str], count: str) -> None:
    """Query times keys, and -infinity behind them to the end of a vector."""
    query, keys, scores = places
    padded = w.times(w.over(w.plus(count, LANES - 1), LANES), LANES)
    last = w.at(scores, w.times(w.plus(padded, -LANES), 4))
    w.store(KIND, constant(LANES, "float", "0xFFF0000000000000"), last)

    def products(number: int) -> Callable:
        def some(j: str, _: list[str]) -> None:
            rows = [w.at(keys, w.times(w.plus(j, n), a.row)) for n in range(number)]

            def column(c: str, sums: list[str]) -> list[str]:
                q = w.load(KIND, w.at(query, c))
                return [multiply_add(w, w.load(KIND, w.at(row, c)), q, s) for row, s in zip(rows, sums)]

            sums = _vectors(w, a, column, [(KIND, "zeroinitializer")] * number)
            w.store(f"<{number} x float>", row_sums(w, "float", sums, LANES), w.at(scores, w.times(j, 4)))

        return some

    fours = w.times(w.over(count, 4), 4)
    w.loop("0", fours, 4, [], products(4))
    w.loop(fours, count, 1, [], products(1))


def _exponentials(w: Writer, scores: str, count: str) -> str:
    """exp(score - largest) in the place of the scores; their sum."""
    stop = w.times(count, 4)

    def larger(c: str, top: list[str]) -> list[str]:
        value = w.load(KIND, w.at(scores, c))
        return [w.let(f"call {KIND} @llvm.maxnum.v{LANES}f32({KIND} {value}, {KIND} {top[0]})")]

    start = (KIND, constant(LANES, "float", "0xFFF0000000000000"))
    [top] = w.loop("0", stop, 4 * LANES, [start], larger)
    top = w.splat(LANES, "float", w.let(f"call float @llvm.vector.reduce.fmax.v{LANES}f32({KIND} {top})"))

    def one(c: str, sums: list[str]) -> list[str]:
        value = w.let(f"fsub {KIND} {w.load(KIND, w.at(scores, c))}, {top}")
        value = exponential(w, value)
        w.store(KIND, value, w.at(scores, c))
        return [w.let(f"fadd {KIND} {sums[0]}, {value}")]

    [sums] = w.loop("0", stop, 4 * LANES, [(KIND, "zeroinitializer")], one)
    return total(w, sums)


def exponential(w: Writer, x: str) -> str:
    """exp of a vector of numbers that are not positive. NaN stays NaN."""

    def wide(value: str) -> str:
        return constant(LANES, "float", value)

    tiny = w.let(f"fcmp olt {KIND} {x}, {wide(SMALLEST)}")
    x = w.let(f"select <{LANES} x i1> {tiny}, {KIND} {wide(SMALLEST)}, {KIND} {x}")
    power = w.let(f"call {KIND} @llvm.rint.v{LANES}f32({KIND} {w.let(f'fmul {KIND} {x}, {wide(LOG2_E)}')})")
    minus = w.let(f"fneg {KIND} {power}")
    rest = multiply_add(w, minus, wide(LN2_LOW), multiply_add(w, minus, wide(LN2_HIGH), x))
    value = wide(EXPONENTIAL[0])
    for coefficient in EXPONENTIAL[1:]:
        value = multiply_add(w, value, rest, wide(coefficient))
    square = w.let(f"fmul {KIND} {rest}, {rest}")
    value = multiply_add(w, value, square, w.let(f"fadd {KIND} {rest}, {wide('1.0')}"))
    bits = w.let(f"freeze <{LANES} x i32> {w.let(f'fptosi {KIND} {power} to <{LANES} x i32>')}")
    bits = w.let(f"add <{LANES} x i32> {bits}, {constant(LANES, 'i32', 127)}")
    bits = w.let(f"shl <{LANES} x i32> {bits}, {constant(LANES, 'i32', 23)}")
    value = w.let(f"fmul {KIND} {value}, {w.let(f'bitcast <{LANES} x i32> {bits} to {KIND}')}")
    return w.let(f"select <{LANES} x i1> {tiny}, {KIND} zeroinitializer, {KIND} {value}")


def _values(w: Writer, a: SimpleNamespace, places: tuple[str, str, str], sums: tuple[str, str]) -> None:
    """The values, weighed."""
    (weights, values, out), (count, whole) = places, sums
    fours = w.times(w.over(count, 4), 4)
    share = w.splat(LANES, "float", w.let(f"fdiv float 1.0, {whole}"))

    def column(c: str, _: list[str]) -> None:
        def some(j: str, parts: list[str]) -> list[str]:
            after = []
            for n, part in enumerate(parts):
                weight = w.splat(LANES, "float", w.load("float", w.at(weights, w.times(w.plus(j, n), 4))))
                after.append(multiply_add(w, w.load(KIND, w.at(values, w.times(w.plus(j, n), a.row), c)), weight, part))
            return after

        parts = w.loop("0", fours, 4, [(KIND, "zeroinitializer")] * 4, some)
        one, two = (w.let(f"fadd {KIND} {parts[n]}, {parts[n + 1]}") for n in (0, 2))
        both = w.let(f"fadd {KIND} {one}, {two}")
        [both] = w.loop(fours, count, 1, [(KIND, both)], some)
        w.store(KIND, w.let(f"fmul {KIND} {both}, {share}"), w.at(out, c))

    _vectors(w, a, column)
