"""llama.cpp's own matrix-vector product, timed in a process of its own. Needs numpy and the libraries of ggml.

``python ggml_peer.py FOLDER`` loads libggml*.so from the folder, says in a line which they are, and answers each line
of JSON on stdin,
``{"rows": R, "columns": C, "batch": B, "threads": T, "type": "TQ2_0", "calls": N}``, with one line: microseconds per
product, and the largest error of the result relative to its size. The products are nodes of one graph, so that no
cost of starting a graph is counted.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path

import numpy as np

TYPES = {"F32": 0, "Q8_0": 8, "TQ2_0": 35}
NODES = 32
"""Products in one graph."""


class InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class Ggml:
    """The few functions that are used, found in whichever library has them."""

    def __init__(self, folder: str) -> None:
        names = ["libggml-base.so", "libggml-cpu.so", "libggml.so"]
        self.libraries = [ctypes.CDLL(str(Path(folder) / n), ctypes.RTLD_GLOBAL) for n in names]

    def function(self, name: str, result, *arguments):
        """A C function with its types."""
        library = next(x for x in self.libraries if hasattr(x, name))
        found = getattr(library, name)
        found.restype, found.argtypes = result, arguments
        return found


def answer(ggml: Ggml, ask: dict) -> dict:
    """Build a graph of products, run it, and check the last."""
    p, i64 = ctypes.c_void_p, ctypes.c_int64
    rows, columns, batch, kind = ask["rows"], ask["columns"], ask["batch"], TYPES[ask["type"]]
    size = 4 * rows * columns + NODES * (4 * rows * batch + 4096) + 4 * batch * columns + (1 << 22)
    context = ggml.function("ggml_init", p, InitParams)(InitParams(size, None, False))
    tensor = ggml.function("ggml_new_tensor_2d", p, p, ctypes.c_int, i64, i64)
    data = ggml.function("ggml_get_data", p, p)
    w, x = tensor(context, kind, columns, rows), tensor(context, 0, columns, batch)
    rng = np.random.default_rng(0)
    values = rng.integers(-1, 2, (rows, columns)).astype(np.float32)
    tokens = rng.standard_normal((batch, columns)).astype(np.float32)
    quantise = ggml.function("ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int, p, p, i64, i64, i64, p)
    quantise(kind, values.ctypes.data, data(w), 0, rows, columns, None)
    ctypes.memmove(data(x), tokens.ctypes.data, tokens.nbytes)
    graph = ggml.function("ggml_new_graph", p, p)(context)
    product = ggml.function("ggml_mul_mat", p, p, p, p)
    outputs = [product(context, w, x) for _ in range(NODES)]
    for out in outputs:
        ggml.function("ggml_build_forward_expand", None, p, p)(graph, out)
    backend = ggml.function("ggml_backend_cpu_init", p)()
    ggml.function("ggml_backend_cpu_set_n_threads", None, p, ctypes.c_int)(backend, ask["threads"])
    compute = ggml.function("ggml_backend_graph_compute", ctypes.c_int, p, p)
    compute(backend, graph)
    graphs = max(1, ask["calls"] // NODES)
    clock = time.perf_counter()
    for _ in range(graphs):
        compute(backend, graph)
    seconds = (time.perf_counter() - clock) / graphs / NODES
    got = np.ctypeslib.as_array(ctypes.cast(data(outputs[-1]), ctypes.POINTER(ctypes.c_float)), (batch, rows)).copy()
    right = tokens @ values.T
    error = float(np.abs(got - right).max() / np.abs(right).max())
    ggml.function("ggml_backend_free", None, p)(backend)
    ggml.function("ggml_free", None, p)(context)
    return {"microseconds": 1e6 * seconds, "error": error}


def about(ggml: Ggml) -> str:
    """Version, commit, and the instructions it was built for."""
    version, commit = (ggml.function(f"ggml_{part}", ctypes.c_char_p)().decode() for part in ("version", "commit"))
    named = ("avx2", "avx512", "avx512_vnni", "avx_vnni", "neon")
    built = [name for name in named if ggml.function(f"ggml_cpu_has_{name}", ctypes.c_int)()]
    return f"ggml {version} ({commit}), built for {', '.join(built)}"


def main() -> None:
    """Answer until stdin ends."""
    ggml = Ggml(sys.argv[1])
    print(json.dumps({"about": about(ggml)}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(ggml, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
