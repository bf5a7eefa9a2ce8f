"""Functions in LLVM's language, and what the inner loops of :mod:`forgekit.infer.kernels.cpu` have in common.

Values are strings: the names that LLVM's text gives them. What is a Python loop here is unrolled there; a loop of the
machine is :meth:`Writer.loop`.

Shapes: R rows (outputs), B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

from forgekit.quant.pack import BLOCK

HEIGHT = 4
"""Rows that a thread's share is a multiple of."""
INTEGERS = {"B", "R", "C", "P", "Q", "G", "O", "H", "K", "L", "full", "all", "start", "end"}
"""Fields that are numbers; the others are addresses."""
OpenMP = tuple[int, int, int] | None
"""The addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads; without them there is one thread."""


class Tile(NamedTuple):
    """Rows from r and tokens from t, computed together."""

    r: str
    t: str
    rows: int
    tokens: int


class Writer:
    """One function in single-assignment form."""

    def __init__(self, head: str) -> None:
        self.lines, self.block, self.count = [f"define {head} {{", "entry:"], "entry", 0

    def let(self, text: str) -> str:
        """Name the value of an instruction."""
        self.count += 1
        self.do(f"%v{self.count} = {text}")
        return f"%v{self.count}"

    def do(self, text: str) -> None:
        """An instruction without a value."""
        self.lines.append(f"  {text}")

    def label(self, name: str) -> None:
        """Begin a block."""
        self.lines.append(f"{name}:")
        self.block = name

    def loop(self, start: str, stop: str, step: int, carried: Sequence[tuple[str, str]], body: Callable) -> list[str]:
        """``for i in range(start, stop, step): values = body(i, values)``; ``carried`` holds types and first values."""
        self.count += 1
        k, before = self.count, self.block
        index, names = f"%i{k}", [f"%c{k}.{n}" for n in range(len(carried))]
        self.do(f"br label %head{k}")
        self.label(f"head{k}")
        spot = len(self.lines)
        more = self.let(f"icmp slt i64 {index}, {stop}")
        self.do(f"br i1 {more}, label %body{k}, label %done{k}")
        self.label(f"body{k}")
        after = body(index, names) or []
        following = self.let(f"add i64 {index}, {step}")
        self.do(f"br label %head{k}")
        phis = [f"  {index} = phi i64 [{start}, %{before}], [{following}, %{self.block}]"]
        for name, (kind, first), last in zip(names, carried, after, strict=True):
            phis.append(f"  {name} = phi {kind} [{first}, %{before}], [{last}, %{self.block}]")
        self.lines[spot:spot] = phis
        self.label(f"done{k}")
        return names

    def at(self, base: str, *offsets: str | int) -> str:
        """The address that many bytes further."""
        for offset in offsets:
            base = self.let(f"getelementptr i8, ptr {base}, i64 {offset}")
        return base

    def times(self, a: str, b: str | int) -> str:
        """Product of two 64-bit integers."""
        return self.let(f"mul i64 {a}, {b}")

    def plus(self, a: str, b: str | int) -> str:
        """Sum of two 64-bit integers."""
        return self.let(f"add i64 {a}, {b}")

    def over(self, a: str, b: str | int) -> str:
        """Quotient of two 64-bit integers, rounded down."""
        return self.let(f"udiv i64 {a}, {b}")

    def load(self, kind: str, address: str) -> str:
        """A value from memory, wherever it lies."""
        return self.let(f"load {kind}, ptr {address}, align 1")

    def store(self, kind: str, value: str, address: str) -> None:
        """A value to memory, wherever it lies."""
        self.do(f"store {kind} {value}, ptr {address}, align 1")

    def splat(self, lanes: int, kind: str, value: str) -> str:
        """A vector of equal values."""
        one = self.let(f"insertelement <{lanes} x {kind}> poison, {kind} {value}, i64 0")
        return self.pick(lanes, kind, one, "poison", [0] * lanes)

    def pick(self, lanes: int, kind: str, a: str, b: str, order: Sequence[int]) -> str:
        """Lanes of two vectors in another order."""
        mask = ", ".join(f"i32 {i}" for i in order)
        vector = f"<{lanes} x {kind}>"
        return self.let(f"shufflevector {vector} {a}, {vector} {b}, <{len(order)} x i32> <{mask}>")

    def end(self) -> str:
        """The text of the function."""
        self.do("ret void")
        return "\n".join([*self.lines, "}", ""])


def constant(lanes: int, kind: str, value: object) -> str:
    """A constant vector of equal values."""
    return "<" + ", ".join([f"{kind} {value}"] * lanes) + ">"


def share_out(w: Writer, a: SimpleNamespace, put: tuple[list[str], str]) -> None:
    """Put the fields in memory, then do the rows alone or with others: see :func:`workers`."""
    fields, memory = put
    for i, name in enumerate(fields):
        w.store("i64" if name in INTEGERS else "ptr", getattr(a, name), w.at(memory, 8 * i))
    w.do(f"call void @start(ptr {memory}, i64 {a.R}, i64 %threads)")


def workers(fields: list[str], openmp: OpenMP) -> str:
    """The function that does the rows of the fields in memory, with so many threads."""
    w = Writer("internal void @start(ptr %a, i64 %R, i64 %threads)")
    if openmp is not None:
        alone = w.let("icmp slt i64 %threads, 2")
        w.do(f"br i1 {alone}, label %alone, label %shared")
        w.label("shared")
        count = w.let("trunc i64 %threads to i32")
        w.do(f"call void {_address(openmp[0])}(ptr @work, ptr %a, i32 {count}, i32 0)")
        w.do("ret void")
        w.label("alone")
    w.do("call void @rows(ptr %a, i64 0, i64 %R)")
    return w.end() + _worker(fields, openmp)


def _address(number: int) -> str:
    return f"inttoptr (i64 {number} to ptr)"


def read_fields(w: Writer, fields: list[str]) -> SimpleNamespace:
    """Read what :func:`share_out` put in memory."""
    kinds = {name: "i64" if name in INTEGERS else "ptr" for name in fields}
    return SimpleNamespace(**{name: w.load(kinds[name], w.at("%a", 8 * i)) for i, name in enumerate(fields)})


def _worker(fields: list[str], openmp: OpenMP) -> str:
    """A thread's share: whole tiles of rows."""
    if openmp is None:
        return ""
    w = Writer("internal void @work(ptr %a)")
    rows = read_fields(w, fields).R
    me, all_ = (w.let(f"zext i32 {w.let(f'call i32 {_address(f)}()')} to i64") for f in openmp[1:])
    parts = w.over(w.plus(rows, HEIGHT - 1), HEIGHT)
    start, stop = (w.times(w.over(w.times(parts, t), all_), HEIGHT) for t in (me, w.plus(me, 1)))
    stop = w.let(f"select i1 {w.let(f'icmp slt i64 {stop}, {rows}')}, i64 {stop}, i64 {rows}")
    w.do(f"call void @rows(ptr %a, i64 {start}, i64 {stop})")
    return w.end()


def tiles(w: Writer, tokens: str, tile: Callable[[Tile], None]) -> None:
    """Cover rows r0 to r1 and all tokens: tokens four at a time, the others one at a time."""
    fours = w.times(w.over(tokens, 4), 4)
    for rows, count, start, stop in ((2, 4, "0", fours), (HEIGHT, 1, fours, tokens)):
        whole = w.plus("%r0", w.times(w.over(w.let("sub i64 %r1, %r0"), rows), rows))
        for height, r0, r1 in ((rows, "%r0", whole), (1, whole, "%r1")):

            def across(r: str, _: list[str], shape=(height, count), span=(start, stop)) -> None:
                w.loop(span[0], span[1], shape[1], [], lambda t, _: tile(Tile(r, t, *shape)))

            w.loop(r0, r1, height, [], across)


def largest(w: Writer, source: str, top: str) -> str:
    """The larger magnitudes of a block and ``top``, as integers: those are in order too, with NaN above all."""
    for p in range(4):
        bits = w.load("<16 x i32>", w.at(source, 64 * p))
        bits = w.let(f"and <16 x i32> {bits}, {constant(16, 'i32', 2**31 - 1)}")
        above = w.let(f"icmp ugt <16 x i32> {bits}, {top}")
        top = w.let(f"select <16 x i1> {above}, <16 x i32> {bits}, <16 x i32> {top}")
    return top


def last_columns(w: Writer, first: str) -> str:
    """A copy of the columns of x from the first on, filled up to a block: nothing is read past the end of x."""
    rest = w.let(f"alloca [{BLOCK} x float]")
    w.store(f"[{BLOCK} x float]", "zeroinitializer", rest)

    def copy(c: str, _: list[str]) -> None:
        to = w.at(rest, w.times(w.let(f"sub i64 {c}, {first}"), 4))
        w.store("float", w.load("float", w.at("%x", w.times(c, 4))), to)

    w.loop(first, "%C", 1, [], copy)
    return rest


def first_lanes(w: Writer, lanes: int, count: str) -> str:
    """A mask of as many lanes as there are 32-bit words left in a row."""
    left = w.splat(lanes, "i32", w.let(f"trunc i64 {count} to i32"))
    places = "<" + ", ".join(f"i32 {i}" for i in range(lanes)) + ">"
    return w.let(f"icmp ult <{lanes} x i32> {places}, {left}")


def masked_load(lanes: int) -> str:
    """The declaration that :func:`load_bytes` needs for a mask of so many lanes."""
    vector = f"<{lanes} x i32>"
    return f"declare {vector} @llvm.masked.load.v{lanes}i32.p0(ptr, i32, <{lanes} x i1>, {vector})"


def load_bytes(w: Writer, width: int, address: str, mask: str | None) -> str:
    """A vector of bytes; with a mask only what belongs to the row, zeros behind it."""
    if mask is None:
        return w.load(f"<{width} x i8>", address)
    lanes, vector = width // 4, f"<{width // 4} x i32>"
    call = f"call {vector} @llvm.masked.load.v{lanes}i32.p0"
    value = w.let(f"{call}(ptr {address}, i32 1, <{lanes} x i1> {mask}, {vector} zeroinitializer)")
    return w.let(f"bitcast {vector} {value} to <{width} x i8>")


def row_sums(w: Writer, kind: str, vectors: list[str], lanes: int) -> str:
    """The sums over the lanes of one, two or four vectors, side by side."""
    add = "add" if kind == "i32" else "fadd"
    narrow = []
    for vector in vectors:
        for size in (16, 8):
            if lanes >= size:
                low, high = (w.pick(size, kind, vector, "poison", range(n, n + size // 2)) for n in (0, size // 2))
                vector = w.let(f"{add} <{size // 2} x {kind}> {low}, {high}")
        narrow.append(vector)
    four = [narrow[i % len(narrow)] for i in range(4)]
    pairs = [_neighbours(w, kind, add, *four[:2]), _neighbours(w, kind, add, *four[2:])]
    return w.pick(4, kind, _neighbours(w, kind, add, *pairs), "poison", range(len(vectors)))


def _neighbours(w: Writer, kind: str, add: str, a: str, b: str) -> str:
    """Sums of neighbouring lanes: those of a, then those of b."""
    even, odd = (w.pick(4, kind, a, b, range(n, 8, 2)) for n in (0, 1))
    return w.let(f"{add} <4 x {kind}> {even}, {odd}")


def multiply_add(w: Writer, a: str, b: str, c: str, lanes: int = 16) -> str:
    """a b + c, rounded once where the machine can."""
    kind = f"<{lanes} x float>"
    return w.let(f"call {kind} @llvm.fmuladd.v{lanes}f32({kind} {a}, {kind} {b}, {kind} {c})")


def tree(w: Writer, operation: str, parts: list[str]) -> str:
    """All parts combined, neighbours first; their number is a power of two."""
    while len(parts) > 1:
        parts = [w.let(f"{operation} {a}, {b}") for a, b in zip(parts[::2], parts[1::2])]
    return parts[0]
