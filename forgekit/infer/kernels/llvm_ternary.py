"""The ternary product in LLVM's language, for the vectors of every kind of machine.

Shapes: R rows (outputs), C columns (inputs), B batch, P packed bytes of a row, Q bytes of a token's rounded
activations, W bytes of a vector.
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
    largest,
    read_fields,
    row_sums,
    share_out,
    tiles,
    tree,
    worker,
)
from forgekit.quant.pack import BLOCK

MAGIC, MAGIC_BITS = 12582912.0, 0x4B400000
"""1.5 * 2^23: adding it rounds a small float32 to the nearest integer, halves to even, into the low bits."""


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
    """The text of ``void ternary(packed, scale, x, out, scratch, B, R, C, threads)``.

    ``scratch`` has room for B (Q + 8) bytes, see :func:`token_bytes`. ``openmp`` holds the addresses of GOMP_parallel,
    omp_get_thread_num and omp_get_num_threads; without it there is one thread.
    """
    fields = ["packed", "scale", "out", "q", "s", "sums", "B", "R", "P", "Q", "full", "all"]
    w = Writer("void @ternary(ptr %packed, ptr %scale, ptr %x, ptr %out, ptr %q, i64 %B, i64 %R, i64 %C, i64 %threads)")
    memory = w.let(f"alloca [{len(fields)} x i64]")  # at the very beginning, or the stack would grow at run time
    width = flavour.width
    blocks = w.over(w.plus("%C", 63), 64)
    a = SimpleNamespace(packed="%packed", scale="%scale", out="%out", q="%q", B="%B", R="%R", P=w.times(blocks, 16))
    a.full = w.over(a.P, width)
    a.all = w.over(w.plus(a.P, width - 1), width)
    a.Q = w.times(a.all, 4 * width)
    a.s = w.at("%q", w.times("%B", a.Q))
    a.sums = w.at(a.s, w.times("%B", 4))
    padded, row = w.times(a.all, width // 16), w.times("%C", 4)

    def round_token(t: str, _: list[str]) -> None:
        four = w.times(t, 4)
        pointers = [w.at("%x", w.times(t, row)), w.at("%q", w.times(t, a.Q)), w.at(a.s, four), w.at(a.sums, four)]
        places = ", ".join(f"ptr {p}" for p in pointers)
        w.do(f"call void @quantise({places}, i64 %C, i64 {padded})")

    w.loop("0", "%B", 1, [], round_token)
    entry = share_out(w, a, (fields, memory), openmp)
    declares = [
        flavour.declares,
        "declare i32 @llvm.vector.reduce.umax.v16i32(<16 x i32>)",
        "declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)",
    ]
    if width > 16:
        lanes = f"<{width // 4} x i32>"
        declares.append(
            f"declare {lanes} @llvm.masked.load.v{width // 4}i32.p0(ptr, i32, <{width // 4} x i1>, {lanes})"
        )
    return "\n".join([*declares, _quantise(width), _ternary_rows(flavour, fields), worker(fields, openmp), entry])


def token_bytes(flavour: Flavour, columns: int) -> int:
    """Q: bytes of a token's rounded activations, filled up with zeros to whole vectors."""
    return 4 * flavour.width * -(-columns // (4 * flavour.width))


def _quantise(width: int) -> str:
    """A token to bytes in the order of the planes, with its scale and the sum of its bytes.

    The grid is :func:`forgekit.quant.grid.quantise_activations`: scale = max|x| / 127, code = round(x / scale).
    """
    w = Writer("internal void @quantise(ptr %x, ptr %q, ptr %scale, ptr %sum, i64 %C, i64 %blocks)")
    whole = w.over("%C", BLOCK)
    rest = _last_columns(w, w.times(whole, BLOCK))
    top = largest(w, rest, "zeroinitializer")
    vector = "<16 x i32>"
    [top] = w.loop("0", whole, 1, [(vector, top)], lambda i, c: [largest(w, w.at("%x", w.times(i, 4 * BLOCK)), c[0])])
    top = w.let(f"call i32 @llvm.vector.reduce.umax.v16i32({vector} {top})")
    scale = w.let(f"fdiv float {w.let(f'bitcast i32 {top} to float')}, 127.0")
    w.store("float", scale, "%scale")
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


def _last_columns(w: Writer, first: str) -> str:
    """A copy of the columns of x from the first on, filled up to a block: nothing is read past the end of x."""
    rest = w.let(f"alloca [{BLOCK} x float]")
    w.store(f"[{BLOCK} x float]", "zeroinitializer", rest)

    def copy(c: str, _: list[str]) -> None:
        to = w.at(rest, w.times(w.let(f"sub i64 {c}, {first}"), 4))
        w.store("float", w.load("float", w.at("%x", w.times(c, 4))), to)

    w.loop(first, "%C", 1, [], copy)
    return rest


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
        lanes = flavour.width // 4
        left = w.splat(lanes, "i32", w.let(f"trunc i64 {w.let(f'urem i64 {a.P}, {a.width}')} to i32"))
        starts = "<" + ", ".join(f"i32 {4 * i}" for i in range(lanes)) + ">"
        a.mask = w.let(f"icmp ult <{lanes} x i32> {starts}, {left}")
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
            return _packed(w, f.width, w.at(weights[i], near), mask)

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


def _packed(w: Writer, width: int, address: str, mask: str | None) -> str:
    """A vector of packed weights; with a mask only what belongs to the row, zeros behind it."""
    if mask is None:
        return w.load(f"<{width} x i8>", address)
    lanes, vector = width // 4, f"<{width // 4} x i32>"
    call = f"call {vector} @llvm.masked.load.v{lanes}i32.p0"
    value = w.let(f"{call}(ptr {address}, i32 1, <{lanes} x i1> {mask}, {vector} zeroinitializer)")
    return w.let(f"bitcast {vector} {value} to <{width} x i8>")


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
    w.store(f"<{rows} x float>", value, w.at(a.out, w.times(w.plus(w.times(t, a.R), r), 4)))
