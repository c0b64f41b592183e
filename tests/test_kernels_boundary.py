"""What the extension does with arguments it should refuse, and whether it leaks."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from pocketllm import kernels

pytestmark = pytest.mark.kernels


def floats(*shape):
    return np.ones(shape, np.float32)


MISMATCHES = [
    (lambda: kernels.nearest(np.ones((3, 7)), floats(5, 8)),
     TypeError, "z: got float64 (3, 7), want float32 (n, 8)"),
    (lambda: kernels.nearest(floats(3, 7), floats(5, 8)),
     ValueError, "z: got float32 (3, 7), want float32 (n, 8)"),
    (lambda: kernels.nearest(floats(7), floats(5, 7)),
     ValueError, "z: got float32 (7,), want float32 (n, 7)"),
    (lambda: kernels.nearest(floats(), floats(5, 7)),
     ValueError, "z: got float32 (), want float32 (n, 7)"),
    (lambda: kernels.nearest([[1.0]], floats(5, 1)),
     TypeError, "z: got list, want a NumPy array, float32 (n, 1)"),
    (lambda: kernels.nearest(None, floats(5, 1)),
     TypeError, "z: got NoneType, want a NumPy array, float32 (n, 1)"),
    (lambda: kernels.nearest(floats(3, 8).astype(">f4"), floats(5, 8)),
     TypeError, "z: got >f4 (3, 8), want float32 (n, 8)"),
    (lambda: kernels.nearest(floats(3, 8), floats(5, 8).astype(np.float16)),
     TypeError, "codebook: got float16 (5, 8), want float32 (K, d)"),
    (lambda: kernels.nearest(floats(3, 8), floats(0, 8)),
     ValueError, "codebook: number of codewords: got 0, want 1..65536"),
    (lambda: kernels.nearest(floats(3, 8), floats(65537, 8)),
     ValueError, "codebook: number of codewords: got 65537, want 1..65536"),
    (lambda: kernels.nearest(floats(3, 17), floats(5, 17)),
     ValueError, "codebook: length of a codeword: got 17, want 1..16"),
    (lambda: kernels.nearest(floats(3, 0), floats(5, 0)),
     ValueError, "codebook: length of a codeword: got 0, want 1..16"),
    (lambda: kernels.nearest(floats(3, 8), floats(5, 8), weight=floats(7)),
     ValueError, "weight: got float32 (7,), want float32 (8,)"),
    (lambda: kernels.nearest(floats(3, 8), floats(5, 8), bias=floats(5, 1)),
     ValueError, "bias: got float32 (5, 1), want float32 (5,)"),
    (lambda: kernels.pack(np.zeros((2, 3), np.int64), 4),
     TypeError, "index: got int64 (2, 3), want int32 (n, L)"),
    (lambda: kernels.pack(np.zeros((2, 3), np.int32), 0),
     ValueError, "bits: got 0, want 1..16"),
    (lambda: kernels.pack(np.zeros((2, 3), np.int32), 17),
     ValueError, "bits: got 17, want 1..16"),
    (lambda: kernels.unpack(np.zeros((2, 3), np.uint8), 3, 4),
     ValueError, "packed: got uint8 (2, 3), want uint8 (n, 2)"),
    (lambda: kernels.unpack(np.zeros((2, 2), np.int8), 3, 4),
     TypeError, "packed: got int8 (2, 2), want uint8 (n, 2)"),
    (lambda: kernels.index_max(np.zeros(2, np.uint8), 3, 4),
     ValueError, "packed: got uint8 (2,), want uint8 (n, 2)"),
    (lambda: kernels.set_isa("mmx"),
     ValueError, f"isa: got 'mmx', want one that this machine runs: {kernels.available_isas()}"),
]  # fmt: skip


@pytest.mark.parametrize("call, exception, message", MISMATCHES, ids=[m[2] for m in MISMATCHES])
def test_refused_with_one_clear_sentence(call, exception, message):
    with pytest.raises(exception, match="^" + re.escape(message) + "$"):
        call()


def test_negative_or_absurd_lengths():
    packed = np.zeros((2, 2), np.uint8)
    for count in (-1, 2**62):
        with pytest.raises(ValueError, match="^count: got"):
            kernels.unpack(packed, count, 4)


def test_shapes_with_many_dimensions_are_printed_whole_enough():
    with pytest.raises(ValueError, match=r"^z: got float32 \(1, 1, 1"):
        kernels.nearest(floats(*[1] * 32), floats(5, 8))


CODEC = kernels.CodecView(4, 16, 4, np.ones((16, 4), np.int8), 1.0)
CALLS = {
    "nearest": (
        kernels.nearest, (floats(70, 4), floats(9, 4)),
        {"weight": floats(4), "bias": floats(9), "return_error": True},
    ),
    "nearest, strided": (kernels.nearest, (floats(70, 8)[::2, ::2], floats(9, 8)[:, ::2]), {}),
    "nearest, refused": (kernels.nearest, (floats(70, 5), floats(9, 4)), {"bias": floats(9)}),
    "nearest, refused late": (kernels.nearest, (floats(7, 4), floats(9, 4)), {"bias": floats(8)}),
    "pack": (kernels.pack, (np.ones((5, 33), np.int32), 5), {}),
    "pack, refused": (kernels.pack, (np.full((5, 33), 99, np.int32), 5), {}),
    "unpack": (kernels.unpack, (np.ones((5, 33), np.uint8), 33, 8), {}),
    "unpack, refused": (kernels.unpack, (np.ones((5, 32), np.uint8), 33, 8), {}),
    "hold_matrix": (
        kernels.hold_matrix, (np.ones(20, np.uint8), 32, CODEC, floats(5)), {"shift": floats(5)},
    ),
    "hold_matrix, refused": (
        kernels.hold_matrix, (np.ones(20, np.uint8), 32, CODEC, floats(4)), {},
    ),
    "rounded_linear": (kernels.rounded_linear, (floats(70, 8)[::2, ::2], floats(9, 4)), {}),
    "rounded_linear, refused": (kernels.rounded_linear, (floats(70, 8), floats(9, 7)), {}),
    "rounded_gram": (kernels.rounded_gram, (floats(9, 70)[:, ::2], floats(9, 9)), {"end": 7}),
    "rounded_gram, refused": (kernels.rounded_gram, (floats(9, 70), floats(9, 9)), {"end": 10}),
    "index_max": (kernels.index_max, (np.ones((5, 66), np.uint8)[:, ::2], 33, 8), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_references_are_given_back(name):
    function, args, options = CALLS[name]
    held = [*args, *options.values()]

    def call():
        try:
            results = function(*args, **options)
        except ValueError:
            return []
        return list(results) if isinstance(results, tuple) else [results]

    before = [sys.getrefcount(value) for value in held]
    for result in call():
        if isinstance(result, np.ndarray):
            assert sys.getrefcount(result) <= 4  # result, the list, the loop, the argument
    result = None  # a held matrix keeps what it was made of
    for _ in range(20):
        call()
    assert [sys.getrefcount(value) for value in held] == before


@pytest.mark.parametrize("name", CALLS)
def test_no_memory_is_left_behind(name):
    function, args, options = CALLS[name]

    def call(times):
        for _ in range(times):
            with contextlib.suppress(ValueError):
                function(*args, **options)

    call(50)
    tracemalloc.start()
    call(50)
    gc.collect()
    growths = []
    for _ in range(5):  # other threads allocate now and then; what leaks grows every time
        before = tracemalloc.get_traced_memory()[0]
        call(200)
        gc.collect()
        growths.append(tracemalloc.get_traced_memory()[0] - before)
    tracemalloc.stop()
    assert min(growths) < 200 * 16, f"{growths} bytes more after 200 calls each"


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("name", kernels.available_isas())
def test_environment_forces_the_instruction_set(name):
    done = run_python(
        "import pocketllm; print(pocketllm.kernels.isa()); print(pocketllm.show_config())",
        POCKETLLM_ISA=name,
    )
    assert done.stdout.splitlines()[0] == name, done.stderr
    assert done.stdout.splitlines()[1].startswith(f"kernels: {name} (")


def test_unknown_instruction_set_is_an_import_error():
    done = run_python("import pocketllm.kernels", POCKETLLM_ISA="sse9")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: POCKETLLM_ISA: got 'sse9', want one that this machine runs: "
        f"{kernels.available_isas()}"
    )


def test_environment_chooses_the_activations():
    code = "from pocketllm import kernels; print(kernels.activations())"
    for name in ("float32", "integer"):
        assert run_python(code, POCKETLLM_ACTIVATIONS=name).stdout.strip() == name
    done = run_python(code, POCKETLLM_ACTIVATIONS="int4")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: POCKETLLM_ACTIVATIONS: got 'int4', want float32 or integer"
    )


def test_best_instruction_set_is_the_default():
    done = run_python("from pocketllm import kernels; print(kernels.isa())", POCKETLLM_ISA="")
    assert done.stdout.strip() == kernels.available_isas()[-1]


def test_threads_follow_torch_when_it_is_there(monkeypatch):
    class Torch:
        @staticmethod
        def get_num_threads():
            return 3

    monkeypatch.setitem(sys.modules, "torch", Torch())
    assert kernels._threads() == 3
    monkeypatch.delitem(sys.modules, "torch")
    assert kernels._threads() >= 1


def test_kernels_do_not_import_torch():
    done = run_python("import sys, pocketllm.kernels; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr
