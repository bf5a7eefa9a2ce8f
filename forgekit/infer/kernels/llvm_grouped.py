"""The group-wise 8-bit product in LLVM's language: with float32 vectors on every machine, and with byte products.

Byte products take the activations of a token as 24-bit fixed-point numbers x = s (d0 + 2^8 d1 + 2^16 d2), digits
signed bytes, s = max|x| / TOP: the largest error, s / 2, is that of a float32 as large as max|x|. Instructions that
multiply unsigned by signed bytes get the weight as code + 128; the sums start at -128 times the sum of the digits.
Digits behind the last column are 0, and so is what they are multiplied with.

Shapes: R rows (outputs), C columns (inputs), B batch, G groups of a row, P columns filled up to whole blocks.
"""

from __future__ import annotations

from types import SimpleNamespace

from forgekit.infer.kernels.llvm_ternary import Flavour
from forgekit.infer.kernels.llvm_text import (
    OpenMP,
    Tile,
    Writer,
    constant,
    first_lanes,
    largest,
    last_columns,
    load_bytes,
    masked_load,
    multiply_add,
    read_fields,
    row_sums,
    share_out,
    tiles,
    workers,
)
from forgekit.quant.pack import BLOCK

UNROLLED = 8
"""Vectors of a group that are written out one after the other."""
DIGITS, TOP, GROUP, STEP, LEAST = 3, 8_300_000.0, 32, 4, 64
"""Bytes of an activation, the largest number they are used for (a little less than they hold), the only size of a group
that byte products are written for, what the number of columns must be a multiple of, and the fewest columns."""


def grouped_module(group: int, openmp: OpenMP) -> str:
    """The text of ``void grouped(codes, scale, x, out, B, R, C, G, threads)`` for groups of 16 n columns."""
    fields = ["codes", "scale", "x", "out", "B", "R", "C", "G", "full"]
    heads = ", ".join(["ptr %codes, ptr %scale, ptr %x, ptr %out", "i64 %B, i64 %R, i64 %C, i64 %G, i64 %threads"])
    w = Writer(f"void @grouped({heads})")
    memory = w.let(f"alloca [{len(fields)} x i64]")
    a = SimpleNamespace(**{name: f"%{name}" for name in fields[:-1]}, full=w.over("%C", group))
    share_out(w, a, (fields, memory))
    entry = w.end()
    w = Writer("internal void @rows(ptr %a, i64 %r0, i64 %r1)")
    a = read_fields(w, fields)
    tiles(w, a.B, lambda tile: _grouped_tile(w, a, group, tile))
    declares = "declare <16 x float> @llvm.fmuladd.v16f32(<16 x float>, <16 x float>, <16 x float>)"
    return "\n".join([declares, w.end(), workers(fields, openmp), entry])


def _grouped_tile(w: Writer, a: SimpleNamespace, group: int, tile: Tile) -> None:
    """The products of a few rows with a few tokens: per group in float32, then times the scale."""
    r, t, rows, tokens = tile
    codes = [w.at(a.codes, w.times(w.plus(r, i), a.C)) for i in range(rows)]
    scales = [w.at(a.scale, w.times(w.times(w.plus(r, i), a.G), 2)) for i in range(rows)]
    xs = [w.at(a.x, w.times(w.times(w.plus(t, j), a.C), 4)) for j in range(tokens)]
    kind, n = "<16 x float>", rows * tokens

    def vector(c: str, parts: list[str]) -> list[str]:
        """Sixteen columns of all rows and tokens."""
        values = [w.load(kind, w.at(x, w.times(c, 4))) for x in xs]
        parts = list(parts)
        for i, row in enumerate(codes):
            wide = w.let(f"sext <16 x i8> {w.load('<16 x i8>', w.at(row, c))} to <16 x i32>")
            wide = w.let(f"sitofp <16 x i32> {wide} to {kind}")
            for j, value in enumerate(values):
                parts[rows * j + i] = multiply_add(w, wide, value, parts[rows * j + i])
        return parts

    def one_group(g: str, sums: list[str]) -> list[str]:
        start, parts = w.times(g, group), ["zeroinitializer"] * n
        if group <= 16 * UNROLLED:
            for k in range(0, group, 16):
                parts = vector(w.plus(start, k), parts)
        else:
            stop = w.plus(start, group)
            parts = w.loop(start, stop, 16, [(kind, p) for p in parts], vector)
        halves = [w.load("half", w.at(s, w.times(g, 2))) for s in scales]
        wide = [w.splat(16, "float", w.let(f"fpext half {h} to float")) for h in halves]
        return [multiply_add(w, part, wide[i % rows], sums[i]) for i, part in enumerate(parts)]

    sums = w.loop("0", a.full, 1, [(kind, "zeroinitializer")] * n, one_group)
    for j in range(tokens):
        place = w.at(a.out, w.times(w.plus(w.times(w.plus(t, j), a.R), r), 4))
        total = row_sums(w, "float", sums[rows * j : rows * (j + 1)], 16)
        w.store(f"<{rows} x float>", total, place)
        for i in range(rows):
            _last_group(w, a, group, (codes[i], scales[i], xs[j], w.at(place, 4 * i)))


def _last_group(w: Writer, a: SimpleNamespace, group: int, places: tuple[str, str, str, str]) -> None:
    """Add the columns that do not fill a group to what stands in the output."""
    codes, scale, x, place = places
    start = w.times(a.full, group)

    def column(c: str, sums: list[str]) -> list[str]:
        value = w.let(f"sitofp i8 {w.load('i8', w.at(codes, c))} to float")
        product = w.let(f"fmul float {value}, {w.load('float', w.at(x, w.times(c, 4)))}")
        return [w.let(f"fadd float {sums[0]}, {product}")]

    def group_(g: str, _: list[str]) -> None:
        [total] = w.loop(start, a.C, 1, [("float", "0.0")], column)
        wide = w.let(f"fpext half {w.load('half', w.at(scale, w.times(g, 2)))} to float")
        product = w.let(f"fmul float {total}, {wide}")
        w.store("float", w.let(f"fadd float {w.load('float', place)}, {product}"), place)

    w.loop(a.full, a.G, 1, [], group_)


def digits_module(flavour: Flavour, openmp: OpenMP) -> str:
    """The text of ``void digits(codes, scale, x, out, scratch, B, R, C, threads)``.

    Groups of 32; C a multiple of 4 and 64 at least. ``scratch`` has room for B :func:`digits_bytes`.
    """
    fields = ["codes", "scale", "out", "q", "s", "B", "R", "C", "P", "G", "Q", "full", "all"]
    w = Writer("void @digits(ptr %codes, ptr %scale, ptr %x, ptr %out, ptr %q, i64 %B, i64 %R, i64 %C, i64 %threads)")
    memory = w.let(f"alloca [{len(fields)} x i64]")
    a = SimpleNamespace(**{name: f"%{name}" for name in fields}, width=flavour.width)
    a.P = w.times(w.over(w.plus("%C", BLOCK - 1), BLOCK), BLOCK)
    a.G = w.over(w.plus("%C", GROUP - 1), GROUP)
    a.Q = w.times(a.P, 2 * DIGITS)
    a.full, a.all = w.over("%C", flavour.width), w.over(w.plus("%C", flavour.width - 1), flavour.width)
    a.s = w.at("%q", w.times("%B", a.Q))
    row = w.times("%C", 4)

    def split(t: str, _: list[str]) -> None:
        places = [w.at("%x", w.times(t, row)), w.at("%q", w.times(t, a.Q)), w.at(a.s, w.times(t, 4))]
        w.do(f"call void @split({', '.join(f'ptr {p}' for p in places)}, i64 %C, i64 {a.P})")

    w.loop("0", "%B", 1, [], split)
    share_out(w, a, (fields, memory))
    entry = w.end()
    w = Writer("internal void @rows(ptr %a, i64 %r0, i64 %r1)")
    a = read_fields(w, fields)
    a.lacks = w.let(f"icmp slt i64 {a.G}, {w.times(a.all, flavour.width // GROUP)}")
    a.mask = first_lanes(w, flavour.lanes, w.over(w.let(f"urem i64 {a.C}, {flavour.width}"), 4))
    tiles(w, a.B, lambda tile: _digits_tile(w, flavour, a, tile))
    vectors = [f"<{n} x float>" for n in {16, flavour.lanes}]
    declares = [flavour.declares, "declare i32 @llvm.vector.reduce.umax.v16i32(<16 x i32>)"]
    declares += [f"declare {v} @llvm.fmuladd.v{v[1:].split()[0]}f32({v}, {v}, {v})" for v in vectors]
    declares += ["declare <16 x float> @llvm.rint.v16f32(<16 x float>)", masked_load(flavour.lanes)]
    return "\n".join([*declares, _split(flavour), w.end(), workers(fields, openmp), entry])


def digits_bytes(columns: int) -> int:
    """Bytes that a token takes: its digits, the sums to start from, and the value of the lowest digit."""
    return 2 * DIGITS * BLOCK * -(-columns // BLOCK) + 4


def _split(flavour: Flavour) -> str:
    """A token to digits, digit by digit, and behind them what sums start from: -128 sum(d), four columns a sum."""
    w = Writer("internal void @split(ptr %x, ptr %q, ptr %s, i64 %C, i64 %P)")
    kind = "<16 x i32>"
    blocks = w.over("%C", BLOCK)
    whole = w.times(blocks, BLOCK)
    rest = last_columns(w, whole)
    first = [(kind, largest(w, rest, "zeroinitializer"))]
    [top] = w.loop("0", blocks, 1, first, lambda i, c: [largest(w, w.at("%x", w.times(i, 4 * BLOCK)), c[0])])
    top = w.let(f"call i32 @llvm.vector.reduce.umax.v16i32({kind} {top})")
    unit = w.let(f"fdiv float {w.let(f'bitcast i32 {top} to float')}, {TOP}")
    w.store("float", unit, "%s")
    nothing = w.let(f"fcmp oeq float {unit}, 0.0")
    divisor = w.splat(16, "float", w.let(f"select i1 {nothing}, float 1.0, float {unit}"))

    def cut(c: str, source: str) -> None:
        value = w.let(f"fdiv <16 x float> {w.load('<16 x float>', source)}, {divisor}")
        value = w.let(f"call <16 x float> @llvm.rint.v16f32(<16 x float> {value})")
        # NaN has no integer: any will do, because the unit is NaN then.
        left = w.let(f"freeze {kind} {w.let(f'fptosi <16 x float> {value} to {kind}')}")
        for k in range(DIGITS):
            digit = w.let(f"trunc {kind} {left} to <16 x i8>")
            w.store("<16 x i8>", digit, w.at("%q", w.times("%P", k), c))
            left = w.let(f"sub {kind} {left}, {w.let(f'sext <16 x i8> {digit} to {kind}')}")
            left = w.let(f"ashr {kind} {left}, {constant(16, 'i32', 8)}")

    w.loop("0", whole, 16, [], lambda c, _: cut(c, w.at("%x", w.times(c, 4))))
    w.loop(whole, "%P", 16, [], lambda c, _: cut(c, w.at(rest, w.times(w.let(f"sub i64 {c}, {whole}"), 4))))
    width, sums = flavour.width, f"<{flavour.lanes} x i32>"

    def begin(c: str, _: list[str]) -> None:
        digits = w.load(f"<{width} x i8>", w.at("%q", c))
        total = flavour.add(w, "zeroinitializer", [constant(width, "i8", -128)], [digits])
        w.store(sums, w.let(f"sub {sums} zeroinitializer, {total}"), w.at("%q", w.times("%P", DIGITS), c))

    w.loop("0", w.times("%P", DIGITS), width, [], begin)
    return w.end()


def _digits_tile(w: Writer, f: Flavour, a: SimpleNamespace, tile: Tile) -> None:
    """The products of a few rows with a few tokens: per digit in integers, then times the scale."""
    r, t, rows, tokens = tile
    codes = [w.at(a.codes, w.times(w.plus(r, i), a.C)) for i in range(rows)]
    scales = [w.at(a.scale, w.times(w.times(w.plus(r, i), a.G), 2)) for i in range(rows)]
    tokens_at = [w.at(a.q, w.times(w.plus(t, j), a.Q)) for j in range(tokens)]
    kind, sums_kind, bytes_kind = f"<{f.lanes} x float>", f"<{f.lanes} x i32>", f"<{f.width} x i8>"
    groups = f.width // GROUP

    def halves(c: str, i: int, last: bool) -> str:
        """The scales of a vector. The last one may lack its second group, then both are the first."""
        kind = f"<{groups} x half>"
        if not last:
            return w.load(kind, w.at(scales[i], w.over(c, GROUP // 2)))
        found = w.load(kind, w.at(scales[i], w.times(w.plus(a.G, -groups), 2)))
        one = w.pick(groups, "half", found, "poison", [groups - 1] * groups)
        return w.let(f"select i1 {a.lacks}, {kind} {one}, {kind} {found}")

    def weights(c: str, i: int, mask: str | None) -> tuple[str, str]:
        """code + 128 of a row, and its scales in all lanes."""
        codes_here = load_bytes(w, f.width, w.at(codes[i], c), mask)
        moved = w.let(f"xor {bytes_kind} {codes_here}, {constant(f.width, 'i8', -128)}")
        wide = w.let(f"fpext <{groups} x half> {halves(c, i, mask is not None)} to <{groups} x float>")
        return moved, w.pick(groups, "float", wide, "poison", [n * 4 // GROUP for n in range(f.lanes)])

    def step(s: str, totals: list[str], mask: str | None) -> list[str]:
        c, totals = w.times(s, f.width), list(totals)
        row = [weights(c, i, mask) for i in range(rows)]
        for j, token in enumerate(tokens_at):
            places = [w.at(token, w.times(a.P, k), c) for k in range(2 * DIGITS)]
            digits = [w.load(bytes_kind, p) for p in places[:DIGITS]]
            first = [w.load(sums_kind, p) for p in places[DIGITS:]]
            for i, (u, scale) in enumerate(row):
                low, middle, high = (f.add(w, first[k], [u], [digits[k]]) for k in range(DIGITS))
                # The sums have 17 bits: two of them side by side are still exact in a float.
                middle = w.let(f"shl {sums_kind} {middle}, {constant(f.lanes, 'i32', 8)}")
                low = w.let(f"sitofp {sums_kind} {w.let(f'add {sums_kind} {low}, {middle}')} to {kind}")
                high = w.let(f"sitofp {sums_kind} {high} to {kind}")
                value = multiply_add(w, high, constant(f.lanes, "float", 65536.0), low, f.lanes)
                totals[rows * j + i] = multiply_add(w, value, scale, totals[rows * j + i], f.lanes)
        return totals

    none = [(kind, "zeroinitializer")] * (rows * tokens)
    totals = w.loop("0", a.full, 1, none, lambda s, c: step(s, c, None))
    totals = w.loop(a.full, a.all, 1, [(kind, v) for v in totals], lambda s, c: step(s, c, a.mask))
    for j in range(tokens):
        total = row_sums(w, "float", totals[rows * j : rows * (j + 1)], f.lanes)
        unit = w.splat(rows, "float", w.load("float", w.at(a.s, w.times(w.plus(t, j), 4))))
        value = w.let(f"fmul <{rows} x float> {total}, {unit}")
        w.store(f"<{rows} x float>", value, w.at(a.out, w.times(w.plus(w.times(w.plus(t, j), a.R), r), 4)))
