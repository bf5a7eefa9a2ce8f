"""The ternary product in LLVM's language, for the vectors of every kind of machine.

Shapes: R rows (outputs), C columns (inputs), B batch, P packed bytes of a row, Q bytes of a token's rounded
activations, O outputs of all maps, W bytes of a vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

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
    read_fields,
    row_sums,
    share_out,
    tiles,
    tree,
    workers,
)
from forgekit.quant.pack import BLOCK

MAGIC, MAGIC_BITS = 12582912.0, 0x4B400000
"""1.5 * 2^23: adding it rounds a small float32 to the nearest integer, halves to even, into the low bits."""
NORM_DECLARES = """declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)
declare float @llvm.sqrt.f32(float)"""
INFINITY, NAN = "0x7FF0000000000000", "0x7FF8000000000000"
EPSILON = "0x3EB0C6F7A0000000"
"""What a norm adds to the mean square: float32(1e-6), as LLVM writes it."""


@dataclass(frozen=True)
class Flavour:
    """How a kind of machine adds products of bytes to 32-bit sums."""

    name: str
    width: int
    """Bytes of a vector."""
    lanes: int
    """32-bit sums in a vector."""
    needs: tuple[str, ...]
    """Features of the processor, as LLVM calls them."""
    add: Callable[[Writer, str, list[str], list[str]], str]
    """(writer, sums, four vectors u, four vectors q) -> sums + u q."""
    declares: str = ""
    apart: bool = False
    """There are registers for four sums a row: bit pairs stay in their places, and plane p adds up to 4^p too much."""
    whole: bool = False
    """Products of any unsigned with any signed byte are added: no intermediate sum is cut."""


def _vnni(width: int) -> Callable[[Writer, str, list[str], list[str]], str]:
    lanes, vector = width // 4, f"<{width // 4} x i32>"

    def add(w: Writer, sums: str, u: list[str], q: list[str]) -> str:
        for a, b in zip(u, q):
            a, b = (w.let(f"bitcast <{width} x i8> {v} to {vector}") for v in (a, b))
            name = f"@llvm.x86.avx512.vpdpbusd.{32 * lanes}"
            sums = w.let(f"call {vector} {name}({vector} {sums}, {vector} {a}, {vector} {b})")
        return sums

    return add


def _vnni_declares(width: int) -> str:
    vector = f"<{width // 4} x i32>"
    return f"declare {vector} @llvm.x86.avx512.vpdpbusd.{8 * width}({vector}, {vector}, {vector})"


def _avx2(w: Writer, sums: str, u: list[str], q: list[str]) -> str:
    call = "call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw"
    # A 16-bit lane gets eight products of at most 2 * 127: it cannot overflow.
    parts = [w.let(f"{call}(<32 x i8> {a}, <32 x i8> {b})") for a, b in zip(u, q)]
    total = tree(w, "add <16 x i16>", parts)
    ones = constant(16, "i16", 1)
    wide = w.let(f"call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> {total}, <16 x i16> {ones})")
    return w.let(f"add <8 x i32> {sums}, {wide}")


def _dotprod(w: Writer, sums: str, u: list[str], q: list[str]) -> str:
    for a, b in zip(u, q):
        name = "@llvm.aarch64.neon.sdot.v4i32.v16i8"
        sums = w.let(f"call <4 x i32> {name}(<4 x i32> {sums}, <16 x i8> {a}, <16 x i8> {b})")
    return sums


def _generic(w: Writer, sums: str, u: list[str], q: list[str]) -> str:
    parts = []
    for a, b in zip(u, q):
        a = w.let(f"zext <16 x i8> {a} to <16 x i16>")
        b = w.let(f"sext <16 x i8> {b} to <16 x i16>")
        parts.append(w.let(f"mul <16 x i16> {a}, {b}"))
    total = tree(w, "add <16 x i16>", parts)
    wide = w.let(f"sext <16 x i16> {total} to <16 x i32>")
    return w.let(f"add <16 x i32> {sums}, {wide}")


AVX2_DECLARES = """declare <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8>, <32 x i8>)
declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)"""
SDOT_DECLARES = "declare <4 x i32> @llvm.aarch64.neon.sdot.v4i32.v16i8(<4 x i32>, <16 x i8>, <16 x i8>)"

FLAVOURS = (
    Flavour("avx512-vnni", 64, 16, ("avx512vnni", "avx512bw"), _vnni(64), _vnni_declares(64), True, True),
    Flavour("avx-vnni", 32, 8, ("avxvnni", "avx2"), _vnni(32), _vnni_declares(32), whole=True),
    Flavour("avx2", 32, 8, ("avx2", "fma"), _avx2, AVX2_DECLARES),
    Flavour("neon-dotprod", 16, 4, ("neon", "dotprod"), _dotprod, SDOT_DECLARES),
    Flavour("any", 16, 16, (), _generic),
)
"""From the best to the one that every machine can do."""


def ternary_module(flavour: Flavour, openmp: OpenMP) -> str:
    """The text of ``void ternary(table, maps, x, gain, out, scratch, B, C, threads)``: maps of one input.

    ``table`` has the addresses of packed weights and scales and the number of rows of each map; a token's outputs stand
    side by side. With a ``gain`` the tokens are RMS-normalised first. ``scratch`` has room for
    B :func:`token_bytes`, and for 4 B C more with a gain.
    ``openmp`` holds the addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads; without it there is one
    thread.
    """
    fields = ["packed", "scale", "out", "q", "s", "sums", "B", "R", "P", "Q", "O", "full", "all"]
    names = "ptr %table, i64 %maps, ptr %x, ptr %gain, ptr %out, ptr %q, i64 %B, i64 %C, i64 %threads"
    w = Writer(f"void @ternary({names})")
    memory = w.let(f"alloca [{len(fields)} x i64]")  # at the very beginning, or the stack would grow at run time
    width = flavour.width
    blocks = w.over(w.plus("%C", 63), 64)
    a = SimpleNamespace(q="%q", B="%B", P=w.times(blocks, 16))
    a.full = w.over(a.P, width)
    a.all = w.over(w.plus(a.P, width - 1), width)
    a.Q = w.times(a.all, 4 * width)
    a.s = w.at("%q", w.times("%B", a.Q))
    a.sums = w.at(a.s, w.times("%B", 4))
    _round_tokens(w, a, w.times(a.all, width // 16))

    def entry_at(m: str, place: int) -> str:
        return w.at("%table", w.times(m, 24), place)

    [a.O] = w.loop("0", "%maps", 1, [("i64", "0")], lambda m, c: [w.plus(c[0], w.load("i64", entry_at(m, 16)))])

    def one_map(m: str, carried: list[str]) -> list[str]:
        a.packed, a.scale = (w.load("ptr", entry_at(m, place)) for place in (0, 8))
        a.R, a.out = w.load("i64", entry_at(m, 16)), w.at("%out", w.times(carried[0], 4))
        share_out(w, a, (fields, memory))
        return [w.plus(carried[0], a.R)]

    w.loop("0", "%maps", 1, [("i64", "0")], one_map)
    functions = [_normalise(), _quantise(width), _ternary_rows(flavour, fields), workers(fields, openmp), w.end()]
    return "\n".join([*_declares(flavour), *functions])


def _round_tokens(w: Writer, a: SimpleNamespace, padded: str) -> None:
    """All tokens to bytes, normalised before where there is a gain."""
    row = w.times("%C", 4)
    plain = w.let("icmp eq ptr %gain, null")
    normed = w.at(a.sums, w.times("%B", 4))
    source = w.let(f"select i1 {plain}, ptr %x, ptr {normed}")
    count = w.let(f"select i1 {plain}, i64 0, i64 %B")

    def normalise(t: str, _: list[str]) -> None:
        to = w.times(t, row)
        w.do(f"call void @normalise(ptr {w.at('%x', to)}, ptr %gain, ptr {w.at(normed, to)}, i64 %C)")

    def round_token(t: str, _: list[str]) -> None:
        four = w.times(t, 4)
        pointers = [w.at(source, w.times(t, row)), w.at("%q", w.times(t, a.Q)), w.at(a.s, four), w.at(a.sums, four)]
        places = ", ".join(f"ptr {p}" for p in pointers)
        w.do(f"call void @quantise({places}, i64 %C, i64 {padded})")

    w.loop("0", count, 1, [], normalise)
    w.loop("0", "%B", 1, [], round_token)


def _declares(flavour: Flavour) -> list[str]:
    declares = [
        flavour.declares,
        "declare i32 @llvm.vector.reduce.umax.v16i32(<16 x i32>)",
        "declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)",
        NORM_DECLARES,
    ]
    return [*declares, masked_load(flavour.lanes)] if flavour.width > 16 else declares


def token_bytes(flavour: Flavour, columns: int) -> int:
    """Bytes of scratch that a token takes: Q rounded activations, filled up with zeros to whole vectors, their scale,
    their sum. A norm takes 4 C more."""
    return 4 * flavour.width * -(-columns // (4 * flavour.width)) + 8


def norm_module() -> str:
    """The text of ``void norm(x, gain, out, B, C)``: the norm alone."""
    w = Writer("void @norm(ptr %x, ptr %gain, ptr %out, i64 %B, i64 %C)")

    def token(t: str, _: list[str]) -> None:
        to = w.times(w.times(t, "%C"), 4)
        w.do(f"call void @normalise(ptr {w.at('%x', to)}, ptr %gain, ptr {w.at('%out', to)}, i64 %C)")

    w.loop("0", "%B", 1, [], token)
    return "\n".join([NORM_DECLARES, _normalise(), w.end()])


def _normalise() -> str:
    """A token over its root mean square, times the gain."""
    w = Writer("internal void @normalise(ptr %x, ptr %gain, ptr %out, i64 %C)")
    kind = "<16 x float>"
    whole = w.times(w.over("%C", 16), 16)

    def square(c: str, sums: list[str]) -> list[str]:
        value = w.load(kind, w.at("%x", w.times(c, 4)))
        return [w.let(f"fadd {kind} {sums[0]}, {w.let(f'fmul {kind} {value}, {value}')}")]

    def one_square(c: str, sums: list[str]) -> list[str]:
        value = w.load("float", w.at("%x", w.times(c, 4)))
        return [w.let(f"fadd float {sums[0]}, {w.let(f'fmul float {value}, {value}')}")]

    [sums] = w.loop("0", whole, 16, [(kind, "zeroinitializer")], square)
    total = w.let(f"call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, {kind} {sums})")
    [total] = w.loop(whole, "%C", 1, [("float", total)], one_square)
    mean = w.let(f"fdiv float {total}, {w.let('sitofp i64 %C to float')}")
    root = w.let(f"call float @llvm.sqrt.f32(float {w.let(f'fadd float {mean}, {EPSILON}')})")
    factor = w.let(f"fdiv float 1.0, {root}")
    wide = w.splat(16, "float", factor)

    def scale(kind: str, by: str) -> Callable:
        def one(c: str, _: list[str]) -> None:
            at = w.times(c, 4)
            value = w.let(f"fmul {kind} {w.load(kind, w.at('%x', at))}, {by}")
            w.store(kind, w.let(f"fmul {kind} {value}, {w.load(kind, w.at('%gain', at))}"), w.at("%out", at))

        return one

    w.loop("0", whole, 16, [], scale(kind, wide))
    w.loop(whole, "%C", 1, [], scale("float", factor))
    return w.end()


def _quantise(width: int) -> str:
    """A token to bytes in the order of the planes, with its scale and the sum of its bytes.

    The grid is :func:`forgekit.quant.grid.quantise_activations`: scale = max|x| / 127, code = round(x / scale).
    """
    w = Writer("internal void @quantise(ptr %x, ptr %q, ptr %scale, ptr %sum, i64 %C, i64 %blocks)")
    whole = w.over("%C", BLOCK)
    rest = last_columns(w, w.times(whole, BLOCK))
    top = largest(w, rest, "zeroinitializer")
    vector = "<16 x i32>"
    [top] = w.loop("0", whole, 1, [(vector, top)], lambda i, c: [largest(w, w.at("%x", w.times(i, 4 * BLOCK)), c[0])])
    top = w.let(f"call i32 @llvm.vector.reduce.umax.v16i32({vector} {top})")
    scale = w.let(f"fdiv float {w.let(f'bitcast i32 {top} to float')}, 127.0")
    endless = w.let(f"fcmp oeq float {scale}, {INFINITY}")
    w.store("float", w.let(f"select i1 {endless}, float {NAN}, float {scale}"), "%scale")
    nothing = w.let(f"fcmp oeq float {scale}, 0.0")
    divisor = w.splat(16, "float", w.let(f"select i1 {nothing}, float 1.0, float {scale}"))

    def place(i: str) -> str:
        """Where block i goes."""
        inside = w.let(f"urem i64 {i}, {width // 16}")
        return w.at("%q", w.times(w.over(i, width // 16), 4 * width), w.times(inside, 16))

    def body(i: str, c: list[str]) -> list[str]:
        return [_rounded(w, w.at("%x", w.times(i, 4 * BLOCK)), place(i), (width, divisor, c[0]))]

    [total] = w.loop("0", whole, 1, [(vector, "zeroinitializer")], body)
    # What is left: the copied columns fill one block, if there is one; zeros fill the others.
    next_ = w.plus(whole, 1)
    last = w.let(f"select i1 {w.let(f'icmp slt i64 {whole}, %blocks')}, i64 {next_}, i64 {whole}")
    [total] = w.loop(
        whole, last, 1, [(vector, total)], lambda i, c: [_rounded(w, rest, place(i), (width, divisor, c[0]))]
    )

    def clear(i: str, _: list[str]) -> None:
        for p in range(4):
            w.store("<16 x i8>", "zeroinitializer", w.at(place(i), width * p))

    w.loop(next_, "%blocks", 1, [], clear)
    w.store("i32", w.let(f"call i32 @llvm.vector.reduce.add.v16i32({vector} {total})"), "%sum")
    return w.end()


def _rounded(w: Writer, source: str, target: str, rest: tuple[int, str, str]) -> str:
    """A block of 64 floats to bytes, sixteen in each plane; the running sum of the bytes."""
    width, divisor, total = rest
    for p in range(4):
        value = w.let(f"fdiv <16 x float> {w.load('<16 x float>', w.at(source, 64 * p))}, {divisor}")
        for compare, limit in (("olt", "-127.0"), ("ogt", "127.0")):
            bound = constant(16, "float", limit)
            beyond = w.let(f"fcmp {compare} <16 x float> {value}, {bound}")
            value = w.let(f"select <16 x i1> {beyond}, <16 x float> {bound}, <16 x float> {value}")
        value = w.let(f"fadd <16 x float> {value}, {constant(16, 'float', MAGIC)}")
        bits = w.let(f"bitcast <16 x float> {value} to <16 x i32>")
        w.store("<16 x i8>", w.let(f"trunc <16 x i32> {bits} to <16 x i8>"), w.at(target, width * p))
        number = w.let(f"sub <16 x i32> {bits}, {constant(16, 'i32', MAGIC_BITS)}")
        total = w.let(f"add <16 x i32> {total}, {number}")
    return total


def _ternary_rows(flavour: Flavour, fields: list[str]) -> str:
    """Rows r0 to r1 for all tokens."""
    w = Writer("internal void @rows(ptr %a, i64 %r0, i64 %r1)")
    a = read_fields(w, fields)
    a.width, a.mask = flavour.width, None
    if flavour.width > 16:
        a.mask = first_lanes(w, flavour.width // 4, w.over(w.let(f"urem i64 {a.P}, {a.width}"), 4))
    tiles(w, a.B, lambda tile: _ternary_tile(w, flavour, a, tile))
    return w.end()


def _ternary_tile(w: Writer, f: Flavour, a: SimpleNamespace, tile: Tile) -> None:
    """The products of a few rows with a few tokens."""
    r, t, rows, tokens = tile
    weights = [w.at(a.packed, w.times(w.plus(r, i), a.P)) for i in range(rows)]
    bytes_ = [w.at(a.q, w.times(w.plus(t, j), a.Q)) for j in range(tokens)]
    kind, body = f"<{f.lanes} x i32>", _one_token if tokens == 1 else _some_tokens

    def step(s: str, sums: list[str], mask: str | None) -> list[str]:
        near, far = w.times(s, f.width), w.times(s, 4 * f.width)

        def q(j: int) -> list[str]:
            return [w.load(f"<{f.width} x i8>", w.at(bytes_[j], far, f.width * p)) for p in range(4)]

        def packed(i: int) -> str:
            return load_bytes(w, f.width, w.at(weights[i], near), mask)

        return body(w, f, (packed, q), list(sums), (rows, tokens))

    count = rows * tokens * (4 if f.apart and tokens == 1 else 1)
    sums = w.loop("0", a.full, 1, [(kind, "zeroinitializer")] * count, lambda s, c: step(s, c, None))
    if f.width > 16:
        sums = w.loop(a.full, a.all, 1, [(kind, v) for v in sums], lambda s, c: step(s, c, a.mask))
    if count > rows * tokens:
        sums = [_together(w, kind, f.lanes, sums[4 * i : 4 * i + 4]) for i in range(rows)]
    for j in range(tokens):
        total = row_sums(w, "i32", sums[rows * j : rows * (j + 1)], f.lanes)
        _finish_ternary(w, a, total, (r, w.plus(t, j), rows))


def _one_token(w: Writer, f: Flavour, get: tuple, sums: list[str], shape: tuple[int, int]) -> list[str]:
    """A vector of each row with one token: its activations stay in registers."""
    packed, q = get[0], get[1](0)
    for i in range(shape[0]):
        u = _planes(w, f.width, packed(i), f.apart)
        if f.apart:
            sums[4 * i : 4 * i + 4] = [f.add(w, sums[4 * i + p], [u[p]], [q[p]]) for p in range(4)]
        else:
            sums[i] = f.add(w, sums[i], u, q)
    return sums


def _some_tokens(w: Writer, f: Flavour, get: tuple, sums: list[str], shape: tuple[int, int]) -> list[str]:
    """A vector of each row with some tokens: the weights, unpacked once, stay in registers."""
    rows, tokens = shape
    u = [_planes(w, f.width, get[0](i), False) for i in range(rows)]
    for j in range(tokens):
        q = get[1](j)
        for i in range(rows):
            sums[rows * j + i] = f.add(w, sums[rows * j + i], u[i], q)
    return sums


def _together(w: Writer, kind: str, lanes: int, sums: list[str]) -> str:
    """One sum of those of four planes, each a multiple of 4^p."""
    parts = [w.let(f"ashr {kind} {v}, {constant(lanes, 'i32', 2 * p)}") for p, v in enumerate(sums)]
    return tree(w, f"add {kind}", parts)


def _planes(w: Writer, width: int, packed: str, in_place: bool) -> list[str]:
    """The four bit pairs of every byte: where they are, or moved to the lowest bits."""
    if in_place:
        return [w.let(f"and <{width} x i8> {packed}, {constant(width, 'i8', (3, 12, 48, -64)[p])}") for p in range(4)]
    # Shifts of 16 bits: some processors have no shift of bytes. The mask removes what came from the neighbour.
    half = w.let(f"bitcast <{width} x i8> {packed} to <{width // 2} x i16>")
    planes = []
    for p in range(4):
        moved = w.let(f"lshr <{width // 2} x i16> {half}, {constant(width // 2, 'i16', 2 * p)}") if p else half
        moved = w.let(f"bitcast <{width // 2} x i16> {moved} to <{width} x i8>")
        planes.append(w.let(f"and <{width} x i8> {moved}, {constant(width, 'i8', 3)}"))
    return planes


def _finish_ternary(w: Writer, a: SimpleNamespace, total: str, place: tuple[str, str, int]) -> None:
    """(sums - sum of the activations) * scale of the row * scale of the token, in that order, to the output."""
    r, t, rows = place
    four = w.times(t, 4)
    less = w.let(f"sub <{rows} x i32> {total}, {w.splat(rows, 'i32', w.load('i32', w.at(a.sums, four)))}")
    value = w.let(f"sitofp <{rows} x i32> {less} to <{rows} x float>")
    scale = w.load(f"<{rows} x float>", w.at(a.scale, w.times(r, 4)))
    value = w.let(f"fmul <{rows} x float> {value}, {scale}")
    token = w.splat(rows, "float", w.load("float", w.at(a.s, four)))
    value = w.let(f"fmul <{rows} x float> {value}, {token}")
    w.store(f"<{rows} x float>", value, w.at(a.out, w.times(w.plus(w.times(t, a.O), r), 4)))
