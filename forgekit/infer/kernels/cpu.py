"""Low-bit products on CPUs, compiled at first use by LLVM: nobody needs a compiler, and no wheel is built per CPU.

``llvmlite`` (a wheel on its own, and a part of numba) holds LLVM. :mod:`forgekit.infer.kernels.llvm_ternary` writes the
loops in its language for the vector instructions that the machine has; they are compiled here and called through
ctypes. The work is shared among the OpenMP threads that torch owns already.

Arithmetic of the ternary product (BitNet b1.58, arXiv 2402.17764, section 2): with weights stored as u = code + 1 in
{0, 1, 2} and activations rounded to q in [-127, 127], the dot product is sum(u q) - sum(q): instructions that multiply
unsigned by signed bytes need no sign of the weight. Sums are 32-bit integers, so they do not depend on the order.

A vector of W bytes holds 4 W weights, as four planes of bit pairs: byte 16 b + j of plane p belongs to column
64 b + 16 p + j of its 4 W columns. The rounded activations are written in that order.

Shapes: R rows (outputs), C columns (inputs), B batch, P packed bytes of a row, G groups.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import operator
import re
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgekit.infer.kernels import plain
from forgekit.infer.kernels.llvm_grouped import GROUP, LEAST, STEP, digits_bytes, digits_module, grouped_module
from forgekit.infer.kernels.llvm_ternary import FLAVOURS, Flavour, ternary_module, token_bytes
from forgekit.infer.kernels.llvm_text import OpenMP

SHARED_TERNARY, SHARED_GROUPED = 1 << 18, 1 << 19
"""Products from which on threads are worth waking."""
MISSING = "llvmlite is not installed"
KEPT_SCRATCH = 1 << 22
"""Bytes of scratch memory that a thread keeps between calls, at most."""
_memory, _compiling = threading.local(), threading.RLock()


def once(function: Callable) -> Callable:
    """``functools.cache`` for what compiles: threads that ask at the same time wait for the first."""
    cached = functools.cache(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with _compiling:
            return cached(*args)

    call.cache_clear = cached.cache_clear
    return call


@dataclass(frozen=True)
class Compiled:
    """A compiled function and what must live as long as it does."""

    call: Callable[..., None]
    engine: Any


@dataclass(frozen=True)
class Machine:
    """What the processor can do, and where torch's threads are."""

    flavours: tuple[Flavour, ...]
    halves: bool
    openmp: OpenMP


def available() -> bool:
    """Whether LLVM can be used here."""
    return not obstacle()


@once
def obstacle() -> str:
    """Why LLVM cannot be used: it is not there, cannot be loaded, or makes nothing right of any flavour; or nothing."""
    if importlib.util.find_spec("llvmlite") is None:
        return MISSING
    try:
        ternary()
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return ""


@once
def machine() -> Machine:
    """The flavours this processor can run, best first."""
    import llvmlite.binding as llvm

    has = llvm.get_host_cpu_features()
    flavours = tuple(f for f in FLAVOURS if all(has.get(need) for need in f.needs))
    return Machine(flavours, bool(has.get("f16c") or has.get("neon")), _openmp())


@once
def ternary(flavour: Flavour | None = None) -> tuple[Flavour, Compiled]:
    """The ternary product for a flavour; without one for the best that passes its first test.

    Raises:
        RuntimeError: there is none.
    """
    if flavour is not None:
        text = ternary_module(flavour, machine().openmp)
        return flavour, compile_text(text, "ternary", "pnppppnnn")
    found = next((pair for f in machine().flavours if (pair := _working(f)) is not None), None)
    if found is None:
        raise RuntimeError("none of the processor's vector instructions can be used")
    return found


@once
def grouped(group: int) -> Compiled | None:
    """The group-wise product for one size of group; None where it cannot be compiled."""
    return attempted(lambda: compile_text(grouped_module(group, machine().openmp), "grouped", "ppppnnnnn"))


@once
def digits(flavour: Flavour | None = None) -> Compiled | None:
    """The group-wise product with byte products; None where the machine has no fitting instruction."""
    chosen = flavour or ternary()[0]
    if not chosen.whole:
        return None
    return attempted(lambda: compile_text(digits_module(chosen, machine().openmp), "digits", "pppppnnnn"))


def attempted(compile_: Callable[[], Any]) -> Any:
    """What ``compile_`` returns; None where this LLVM cannot."""
    try:
        return compile_()
    except (RuntimeError, OSError):
        return None


class TernaryMaps:
    """Packed ternary maps of the same input, ready for use: what a token needs is one call.

    Args:
        maps: packed weights and scales of each; contiguous and on the CPU, scales float32: the caller has seen to it.
        columns: C.
        flavour: as :func:`ternary`.
    """

    def __init__(self, maps: Sequence[tuple[Tensor, Tensor]], columns: int, flavour: Flavour | None = None) -> None:
        chosen, self._code = ternary(flavour)
        self.columns, self.rows = columns, sum(scale_R.numel() for _, scale_R in maps)
        self.tensors = [tensor for pair in maps for tensor in pair]
        self._addresses = [tensor.data_ptr() for tensor in self.tensors]
        numbers = [n for codes, scale in maps for n in (codes.data_ptr(), scale.data_ptr(), scale.numel())]
        self._table = (ctypes.c_int64 * len(numbers))(*numbers)
        self._fixed = (ctypes.addressof(self._table), len(maps))
        self._token = token_bytes(chosen, columns)

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether they are made for these tensors, and these are still where they were."""
        return all(map(operator.is_, tensors, self.tensors)) and [x.data_ptr() for x in tensors] == self._addresses

    def __call__(self, x: Tensor, gain_C: Tensor | None = None) -> Tensor:
        """The outputs of the maps, side by side.

        Args:
            x: (..., C) float32, contiguous, on the CPU.
            gain_C: RMS-normalises x first; float32, contiguous.
        """
        batch = x.numel() // self.columns
        out = x.new_empty((*x.shape[:-1], self.rows))
        threads = torch.get_num_threads() if batch * self.rows * self.columns >= SHARED_TERNARY else 1
        gain, size = (0, self._token) if gain_C is None else (gain_C.data_ptr(), self._token + 4 * self.columns)
        with_scratch(
            batch * size, self._code, (*self._fixed, x.data_ptr(), gain, out.data_ptr()), (batch, self.columns, threads)
        )
        return out

    def __reduce__(self) -> tuple:
        """A copy would point to the memory of others: whoever is copied makes his own."""
        return _nothing, ()


def _nothing() -> None:
    return None


def ternary_matmul(packed_RP: Tensor, scale_R: Tensor, x_BC: Tensor, flavour: Flavour | None = None) -> Tensor:
    """(B, R) float32. All tensors contiguous and on the CPU, x and scale float32: the caller has seen to it."""
    return TernaryMaps([(packed_RP, scale_R)], x_BC.shape[1], flavour)(x_BC)


def grouped_matmul(codes_RC: Tensor, scale_RG: Tensor, x_BC: Tensor, group: int) -> Tensor:
    """(B, R) float32. All tensors contiguous and on the CPU, scale float16, x float32: the caller has seen to it."""
    (batch, columns), rows = x_BC.shape, codes_RC.shape[0]
    if group % 16 or not machine().halves:
        return plain.grouped_matmul(codes_RC, scale_RG, x_BC, group)
    out_BR = torch.empty(batch, rows, dtype=torch.float32, device="cpu")
    threads = torch.get_num_threads() if batch * rows * columns >= SHARED_GROUPED else 1
    places = (codes_RC.data_ptr(), scale_RG.data_ptr(), x_BC.data_ptr(), out_BR.data_ptr())
    if group == GROUP and columns >= LEAST and columns % STEP == 0 and (code := digits()) is not None:
        with_scratch(batch * digits_bytes(columns), code, places, (batch, rows, columns, threads))
    elif (code := grouped(group)) is not None:
        code.call(*places, batch, rows, columns, scale_RG.shape[1], threads)
    else:
        return plain.grouped_matmul(codes_RC, scale_RG, x_BC, group)
    return out_BR


def _working(flavour: Flavour) -> tuple[Flavour, Compiled] | None:
    """The product for a flavour that can be compiled here (an LLVM may not know all instructions) and is right."""
    pair = attempted(lambda: ternary(flavour))
    return pair if pair is not None and _right(pair) else None


def _right(pair: tuple[Flavour, Compiled]) -> bool:
    """A small product as plain torch has it: processors that nobody tried must not give wrong numbers."""
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        a, b, c, d = torch.randint(0, 3, (4, 7, 112), generator=generator, dtype=torch.uint8)
        packed_RP, scale_R = a | b << 2 | c << 4 | d << 6, torch.rand(7, generator=generator)
        x_BC = torch.randn(5, 430, generator=generator)
        x_BC[1, 3], x_BC[2, 429] = torch.inf, torch.nan
        want_BR = plain.ternary_matmul(packed_RP, scale_R, x_BC)
        got_BR = ternary_matmul(packed_RP, scale_R, x_BC, pair[0])
    return torch.equal(got_BR.nan_to_num(7e7), want_BR.nan_to_num(7e7))


def with_scratch(size: int, code: Compiled, before: Sequence[int], after: Sequence[int]) -> None:
    """Call compiled code with the address of some memory among its arguments; a thread keeps what is small."""
    if size > KEPT_SCRATCH:
        room = torch.empty(size, dtype=torch.uint8, device="cpu")
        code.call(*before, room.data_ptr(), *after)
        return
    if getattr(_memory, "size", -1) < size:
        _memory.size, _memory.tensor = size, torch.empty(size, dtype=torch.uint8, device="cpu")
        _memory.address = _memory.tensor.data_ptr()
    code.call(*before, _memory.address, *after)


def compile_text(text: str, name: str, kinds: str) -> Compiled:
    """Machine code for this processor; ``kinds`` has a p for every argument that is an address, an n for a number."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    host = target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=2, jit=True)
    module = llvm.parse_assembly(text)
    module.triple, module.data_layout = llvm.get_process_triple(), str(host.target_data)
    module.verify()
    engine = llvm.create_mcjit_compiler(module, host)
    engine.finalize_object()
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p if k == "p" else ctypes.c_int64 for k in kinds])
    call = kind(engine.get_function_address(name))
    call.engine = engine  # whoever holds the function keeps its code
    return Compiled(call, engine)


def _openmp() -> OpenMP:
    """The addresses of three functions of the OpenMP library that torch has loaded; None where it has no such.

    Sharing its threads costs a microsecond when they are awake; a second pool would fight the first for the cores.
    """
    for path in _openmp_libraries():
        try:
            library = ctypes.CDLL(path)
            names = (library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_num_threads)
        except (OSError, AttributeError):
            continue
        return tuple(ctypes.cast(name, ctypes.c_void_p).value for name in names)
    return None


def _openmp_libraries() -> list[str]:
    """Files of OpenMP libraries: those this process has mapped where the system tells, then those beside torch."""
    pattern = re.compile(r"/\S*lib(?:gomp|omp|iomp5)\b[^/\s]*$")
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if sys.platform == "linux" and maps.is_file() else []
    mapped = [found.group() for line in lines if (found := pattern.search(line))]
    beside = Path(torch.__file__).parent / "lib"
    return list(dict.fromkeys([*mapped, *map(str, sorted(beside.glob("lib*omp*")))]))
