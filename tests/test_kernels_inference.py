"""Decoded rows and products from packed indices, against the NumPy twins and at the boundary."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from packed_matrix import PackedMatrix

from pocketllm import kernels, reference
from pocketllm.kernels import CodecView

# Products are summed in float32: each of the n roundings is below 2^-24 of the sum of magnitudes,
# and they add up like a random walk. 1e-6 of that sum leaves room for rows of a few thousand.
TOLERANCE = 1e-6

# (d, K, bits, int8 table, norm of the decoder or None)
CODECS = [
    (1, 2, 1, False, None),
    (2, 64, 6, True, None),
    (3, 500, 9, True, None),
    (4, 256, 8, True, None),
    (4, 4096, 12, False, None),
    (5, 300, 10, False, None),
    (7, 1000, 11, True, None),
    (8, 40000, 16, True, None),
    (13, 5000, 13, True, None),
    (16, 30, 5, False, None),
    (4, 50, 6, False, "rln"),
    (8, 50, 7, False, "ln"),
    (3, 50, 6, False, "input"),
]
SHAPES = [(1, 1), (5, 17), (50, 257), (97, 600)]


class Matrix(PackedMatrix):
    """A random compressed matrix."""

    codec: CodecView

    def __init__(
        self,
        shape: tuple[int, int],
        codec: tuple[int, int, int, bool, str | None],
        shift: bool = False,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.out_features, self.in_features = shape
        d, k, bits, is_int8, norm = codec
        count = -(-self.in_features // d)
        index = rng.integers(0, k, (self.out_features, count)).astype(np.int32)
        self.packed = reference.pack(index, bits).reshape(-1)
        table: Any = rng.standard_normal((k, d)).astype(np.float32)
        if is_int8:
            table = rng.integers(-127, 128, (k, d)).astype(np.int8)
        h = 8
        parameters = rng.standard_normal(3 * (2 * h * d + h + d)).astype(np.float32) * np.float32(
            0.3
        )
        self.codec = CodecView(
            d, k, bits, table, 0.013 if is_int8 else 1.0, None if norm is None else parameters,
            0 if norm is None else h, norm or "input",
        )  # fmt: skip
        self.scale = rng.random(self.out_features, dtype=np.float32) + np.float32(0.5)
        self.shift = rng.standard_normal(self.out_features).astype(np.float32) if shift else None
        self.bias = rng.standard_normal(self.out_features).astype(np.float32)

    def tokens(self, n: int) -> Any:
        """Random activations (n, in_features)."""
        return np.random.default_rng(n).standard_normal((n, self.in_features)).astype(np.float32)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_decode_rows_agrees_with_twin(isa: str, codec: Any) -> None:
    for shape in SHAPES:
        matrix = Matrix(shape, codec, shift=shape[0] % 2 == 1)
        want = matrix.twin()
        np.testing.assert_allclose(matrix.rows(0, shape[0]), want, rtol=2e-6, atol=5e-6)
        half = shape[0] // 2
        np.testing.assert_allclose(
            matrix.rows(half, shape[0] - half), want[half:], rtol=2e-6, atol=5e-6
        )
        assert matrix.rows(shape[0], 0).shape == (0, shape[1])


@pytest.mark.parametrize("shift", [False, True])
def test_table_decode_is_exactly_the_formula_in_float32(isa: str, shift: bool) -> None:
    matrix = Matrix((23, 150), (4, 200, 8, True, None), shift)
    index = reference.unpack(matrix.packed.reshape(23, -1), 38, 8)
    table = matrix.codec.table.astype(np.float32) * np.float32(matrix.codec.table_scale)
    want = table[index].reshape(23, -1)[:, :150] * matrix.scale[:, None]
    if matrix.shift is not None:
        want = want + matrix.shift[:, None]
    np.testing.assert_array_equal(matrix.rows(0, 23), want)


def test_decode_row_list(isa: str) -> None:
    matrix = Matrix((40, 70), (8, 100, 7, True, None), shift=True)
    rows = matrix.rows(0, 40)
    for index in ([], [39], [0, 39, 39, 7], list(range(40))[::-1]):
        chosen = np.array(index, np.int64)
        got = kernels.decode_row_list(
            matrix.packed, 70, chosen, matrix.codec, matrix.scale, matrix.shift
        )
        np.testing.assert_array_equal(got, rows[chosen])
        twin = reference.decode_row_list(
            matrix.packed, 70, chosen, matrix.codec, matrix.scale, matrix.shift
        )
        np.testing.assert_allclose(got, twin, rtol=2e-6, atol=5e-6)


def test_activations_are_chosen_by_name() -> None:
    matrix = Matrix((30, 50), (4, 100, 7, True, None))
    x = matrix.tokens(2)
    exact, fast = (matrix.product(x, form) for form in ("float32", "integer"))
    assert not np.array_equal(exact, fast)
    arguments = (x, matrix.packed, 30, matrix.codec, matrix.scale, None, matrix.bias)
    before = kernels.activations()
    try:
        for form, want in (("float32", exact), ("integer", fast)):
            kernels.set_activations(form)
            assert kernels.activations() == form
            assert f"activations: {form};" in kernels.show_config()
            np.testing.assert_array_equal(kernels.matmul(*arguments), want)
        with pytest.raises(ValueError, match="activations: got 'int8', want float32 or integer"):
            kernels.set_activations("int8")
    finally:
        kernels.set_activations(before)


def rounded(x: Any, d: int, bits: int) -> Any:
    """Activations (n, columns) as the kernels round them, in float64."""
    result = np.zeros(x.shape)
    span = 512 // d // 8 * 8 * d
    is_byte = d in (1, 2, 4) and bits <= 8
    for t, first in itertools.product(range(len(x)), range(0, x.shape[1], span)):
        columns = x[t, first : first + span]
        largest = np.abs(columns).max()
        inverse = np.float32(127 * 257) / largest
        for at in range(0, len(columns), 32):
            block = columns[at : at + 32]
            multiplier = np.float32(1)
            if is_byte:
                multiplier = np.ceil(np.abs(block).max() * inverse / np.float32(127))
                multiplier = np.clip(multiplier, np.float32(1), np.float32(257))
            integer = np.rint(block * (inverse / multiplier)).astype(np.float64) * multiplier
            assert np.abs(integer).max() <= 127 * 257
            result[t, first + at :][: len(block)] = integer * (largest / np.float32(127 * 257))
    return result


@pytest.mark.parametrize("codec", [c for c in CODECS if c[3]], ids=str)
def test_products_in_integers_are_those_of_rounded_activations(isa: str, codec: Any) -> None:
    for shape in [*SHAPES, (40, 2000)]:
        matrix = Matrix(shape, codec, shift=shape[0] % 2 == 1)
        weight = matrix.twin()
        shift: Any = np.zeros(shape[0]) if matrix.shift is None else matrix.shift
        for n in (1, 2, 3, 16, 33, 300):
            x = matrix.tokens(n) * np.logspace(0, 3, shape[1], dtype=np.float32)
            integers = rounded(x, *codec[:3:2])
            want = integers @ (weight - shift[:, None]).T + x.sum(1, keepdims=True) * shift
            size = np.abs(weight) + 2 * np.abs(shift)[:, None]
            bound = np.abs(x) @ size.T + np.abs(matrix.bias)
            error = np.abs(matrix.product(x, "integer") - want - matrix.bias)
            assert np.all(error <= TOLERANCE * bound), (shape, n)


def test_rounding_moves_an_activation_by_a_254th_of_its_block() -> None:
    x = Matrix((1, 2000), CODECS[3]).tokens(5) * np.logspace(0, 3, 2000, dtype=np.float32)
    blocks = np.abs(np.pad(x, ((0, 0), (0, 16)))).reshape(5, -1, 32).max(2).repeat(32, 1)[:, :2000]
    spans = np.abs(np.pad(x, ((0, 0), (0, 48)))).reshape(5, 4, 512).max(2).repeat(512, 1)[:, :2000]
    assert np.all(np.abs(rounded(x, 4, 8) - x) <= blocks / 253 + spans / 65000)
    assert np.all(np.abs(rounded(x, 4, 9) - x) <= spans / 65000)


@pytest.mark.parametrize(("d", "bits"), [(1, 5), (1, 8), (2, 6), (2, 7), (2, 8), (4, 7), (4, 8)])
def test_tables_of_signs_times_magnitudes(isa: str, d: int, bits: int) -> None:
    matrix = Matrix((33, 1100), (d, 2**bits, bits, True, None))
    row = np.arange(2**bits)
    signs = 1 - 2 * (row[:, None] >> np.arange(bits - d, bits) & 1)
    table = np.abs(matrix.codec.table)[row % 2 ** (bits - d)] * signs
    for flawed in (False, True):
        table[-1, -1] ^= int(flawed)  # one value of the magnitudes alone: no longer symmetric
        matrix.codec = matrix.codec._replace(table=table.astype(np.int8))
        x = matrix.tokens(1)
        want = rounded(x, d, bits) @ matrix.twin().T + matrix.bias
        bound = np.abs(x) @ np.abs(matrix.twin()).T + np.abs(matrix.bias)
        assert np.all(np.abs(matrix.product(x, "integer") - want) <= TOLERANCE * bound)


def test_spans_of_columns_are_rounded_on_their_own() -> None:
    matrix = Matrix((20, 2048), (4, 256, 8, True, None))
    x = matrix.tokens(1)
    x[:, 1024:] *= 1e6
    matrix.bias[:] = 0
    index = reference.unpack(matrix.packed.reshape(20, -1), 512, 8)
    matrix.codec.table[0] = 0  # the columns behind 1024 now count nothing
    matrix.packed = reference.pack(
        np.where(np.arange(512) < 256, np.maximum(index, 1), 0).astype(np.int32), 8
    ).reshape(-1)
    weight = matrix.twin()
    want = x.astype(np.float64) @ weight.T
    np.testing.assert_allclose(matrix.product(x, "integer"), want, rtol=0, atol=0.02 * want.std())


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_matmul_agrees_with_twin(isa: str, codec: Any) -> None:
    for shape in SHAPES:
        matrix = Matrix(shape, codec, shift=shape[0] % 2 == 1)
        weight = matrix.twin()
        shift = 0.0 if matrix.shift is None else np.abs(matrix.shift)[:, None]
        for n in (0, 1, 2, 3, 4, 5, 9, 16, 17, 33):
            x = matrix.tokens(n)
            want = x @ weight.T + matrix.bias
            bound = np.abs(x) @ (np.abs(weight) + 2 * shift).T + np.abs(matrix.bias)
            got = matrix.product(x)
            assert got.shape == (n, shape[0])
            assert np.all(np.abs(got - want) <= TOLERANCE * bound), (shape, n)


def test_twin_of_matmul_is_the_plain_product() -> None:
    matrix = Matrix((50, 257), (4, 50, 6, False, "rln"), shift=True)
    x = matrix.tokens(3)
    got = reference.matmul(
        x, matrix.packed, 50, matrix.codec, matrix.scale, matrix.shift, matrix.bias
    )
    np.testing.assert_allclose(got, x @ matrix.twin().T + matrix.bias, rtol=1e-12)


def test_matmul_over_more_tokens_than_one_pass(isa: str) -> None:
    matrix = Matrix((60, 64), (4, 16, 4, True, None))
    x = matrix.tokens(900)
    np.testing.assert_allclose(
        matrix.product(x), x @ matrix.twin().T + matrix.bias, rtol=1e-5, atol=1e-3
    )


def test_same_bits_for_every_thread_count_and_instruction_set() -> None:
    torch = pytest.importorskip("torch")
    before, threads = kernels.isa(), torch.get_num_threads()
    for codec in CODECS[1::3]:
        matrix = Matrix((301, 260), codec)
        for n, form in itertools.product((1, 3, 40), ("float32", "integer")):
            results = set()
            for name in kernels.available_isas():
                kernels.set_isa(name)
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    results.add(matrix.product(matrix.tokens(n), form).tobytes())
            kernels.set_isa(before)
            torch.set_num_threads(threads)
            assert len(results) == 1, (codec, n, form)


def test_same_result_for_strided_and_read_only_input() -> None:
    matrix = Matrix((30, 50), (4, 100, 7, True, None), shift=True)
    x = matrix.tokens(6)
    want = matrix.product(x)
    strided = np.empty((6, 100), np.float32)[:, ::2]
    strided[:] = x
    np.testing.assert_array_equal(matrix.product(strided), want)
    for array in (x, matrix.packed, matrix.scale, matrix.codec.table):
        array.setflags(write=False)
    np.testing.assert_array_equal(matrix.product(x), want)


def test_out_is_written_and_returned() -> None:
    matrix = Matrix((30, 50), (4, 100, 7, True, None))
    x, out = matrix.tokens(6), np.zeros((6, 30), np.float32)
    got = kernels.matmul(x, matrix.packed, 30, matrix.codec, matrix.scale, None, matrix.bias, out)
    assert got is out
    np.testing.assert_array_equal(out, matrix.product(x, kernels.activations()))
    rows = np.zeros((4, 50), np.float32)
    assert (
        kernels.decode_rows(matrix.packed, 50, 3, 4, matrix.codec, matrix.scale, None, rows) is rows
    )
    np.testing.assert_array_equal(rows, matrix.rows(3, 4))


def test_indices_behind_the_table_read_as_its_last_row(isa: str) -> None:
    matrix = Matrix((4, 40), (4, 5, 8, False, None))
    matrix.packed[:] = 255
    want = np.tile(matrix.codec.table[4], (4, 10)) * matrix.scale[:, None]
    np.testing.assert_array_equal(matrix.rows(0, 4), want)


@pytest.mark.parametrize("activations", ["float32", "integer"])
def test_nan_in_one_token_stays_there(isa: str, activations: str) -> None:
    matrix = Matrix((30, 50), (4, 100, 7, True, None))
    for n in (2, 7):
        x = matrix.tokens(n)
        x[1, 3] = np.nan
        got = matrix.product(x, activations)
        assert np.isnan(got[1]).all()
        assert np.isfinite(np.delete(got, 1, axis=0)).all()


@pytest.mark.parametrize("n", [0, 1, 7])
def test_matmul_at_addresses_is_matmul(isa: str, n: int) -> None:
    matrix = Matrix((30, 50), (4, 100, 7, True, None), shift=True)
    held = kernels.hold_matrix(
        matrix.packed.copy(), 50, matrix.codec, matrix.scale.copy(), matrix.shift
    )
    x, bias = (a.astype(np.float32) for a in (matrix.tokens(n), matrix.bias))
    got = np.full((n, 30), 7, np.float32)
    kernels.matmul_at(held, x.ctypes.data, n, False, bias.ctypes.data, False, got.ctypes.data)
    np.testing.assert_array_equal(got, matrix.product(x, kernels.activations()))

    # The upper half of a float32 is a bfloat16.
    x_half, bias_half = ((a.view(np.uint32) >> 16).astype(np.uint16) for a in (x, bias))
    x, bias = ((a.astype(np.uint32) << 16).view(np.float32) for a in (x_half, bias_half))
    matrix.bias = bias
    got = np.full((n, 30), 7, np.uint16)
    address = bias_half.ctypes.data
    kernels.matmul_at(held, x_half.ctypes.data, n, True, address, True, got.ctypes.data)
    want = matrix.product(x, kernels.activations()).astype(np.float64)
    got = (got.astype(np.uint32) << 16).view(np.float32)
    assert np.all(np.abs(got - want) <= np.abs(want) * 2.0**-8)

    matrix.bias = np.zeros(30, np.float32)
    got = np.full((n, 30), 7, np.float32)
    kernels.matmul_at(held, x.ctypes.data, n, False, 0, False, got.ctypes.data)
    np.testing.assert_array_equal(got, matrix.product(x, kernels.activations()))


def test_held_matrices_are_checked() -> None:
    matrix = Matrix((30, 50), (4, 100, 7, True, None))
    with pytest.raises(ValueError, match=r"packed: got uint8 \(359,\)"):
        kernels.hold_matrix(matrix.packed[:-1], 50, matrix.codec, matrix.scale)
    with pytest.raises(ValueError, match="PyCapsule"):
        kernels.matmul_at(None, 0, 0, False, 0, False, 0)
    held = kernels.hold_matrix(matrix.packed, 50, matrix.codec, matrix.scale)
    with pytest.raises(ValueError, match="n: got -1"):
        kernels.matmul_at(held, 0, -1, False, 0, False, 0)


BAD = [
    ("x", lambda a: a.update(x=a["x"].astype(np.float64)), TypeError, "x: got float64 (2, 50)"),
    ("x", lambda a: a.update(x=a["x"][0]), ValueError, "x: got float32 (50,), want float32 (n, c)"),
    ("packed", lambda a: a.update(packed=a["packed"][:-1]), ValueError, "packed: got uint8 (359,)"),
    ("scale", lambda a: a.update(scale=a["scale"][1:]), ValueError, "want float32 (30,)"),
    ("scale", lambda a: a.update(scale=None), TypeError, "scale: got NoneType"),
    ("bias", lambda a: a.update(bias=a["scale"][1:]), ValueError, "bias: got float32 (29,)"),
    ("out", lambda a: a.update(out=np.zeros((2, 31), np.float32)), ValueError, "out: got float32"),
    ("codec", lambda a: a.update(codec=None), TypeError, "codec: want a CodecView"),
    (
        "bits",
        lambda a: a.update(codec=a["codec"]._replace(index_bits=17)),
        ValueError,
        "want 1..16",
    ),
    ("d", lambda a: a.update(codec=a["codec"]._replace(subvector=5)), ValueError, "codec.table"),
    (
        "table",
        lambda a: a.update(codec=a["codec"]._replace(table=a["codec"].table.astype(np.float16))),
        TypeError,
        "codec.table: got float16 (100, 4), want float32 (100, 4)",
    ),
    (
        "decoder",
        lambda a: a.update(codec=a["codec"]._replace(decoder=np.zeros(7, np.float32), hidden=2)),
        TypeError,
        "wants a float32 codebook",
    ),
]


@pytest.mark.parametrize(("name", "spoil", "error", "message"), BAD)
def test_bad_arguments_are_named(
    name: str, spoil: Any, error: type[Exception], message: str
) -> None:
    matrix = Matrix((30, 50), (4, 100, 7, True, None))
    arguments = {
        "x": matrix.tokens(2), "packed": matrix.packed, "out_features": 30, "codec": matrix.codec,
        "scale": matrix.scale,
    }  # fmt: skip
    kernels.matmul(**arguments)
    spoil(arguments)
    with pytest.raises(error) as caught:
        kernels.matmul(**arguments)
    assert message in str(caught.value)


def test_rows_outside_the_matrix_are_refused() -> None:
    matrix = Matrix((30, 50), (4, 100, 7, True, None))
    for first, count in ((-1, 2), (31, 0), (29, 2)):
        with pytest.raises(ValueError, match="first_row|row_count"):
            matrix.rows(first, count)
    for row in (-1, 30):
        with pytest.raises(IndexError, match=f"row_index: got {row}, want 0..29"):
            kernels.decode_row_list(
                matrix.packed, 50, np.array([0, row], np.int64), matrix.codec, matrix.scale
            )


def test_decoder_codec_needs_its_parameters() -> None:
    matrix = Matrix((30, 50), (4, 50, 6, False, "rln"))
    decoder = matrix.codec.decoder
    assert decoder is not None
    matrix.codec = matrix.codec._replace(decoder=decoder[1:])
    with pytest.raises(ValueError, match="codec.decoder: got float32"):
        matrix.product(matrix.tokens(1))
    matrix.codec = matrix.codec._replace(decoder=decoder, norm="batch")
    with pytest.raises(ValueError, match="codec.norm: got 'batch'"):
        matrix.product(matrix.tokens(1))


@pytest.mark.parametrize("threads", [1, 2])
def test_takes_turns_with_torch_in_bfloat16(isa: str, threads: int) -> None:
    """Both use tile registers where there are some, in the same threads."""
    torch = pytest.importorskip("torch")
    matrix, before = Matrix((300, 260), CODECS[0]), torch.get_num_threads()
    x, weight = torch.randn(40, 260).bfloat16(), torch.randn(300, 260).bfloat16()
    want = x.double() @ weight.double().T
    torch.set_num_threads(threads)
    products = set()
    for _ in range(3):
        dense = torch.nn.functional.linear(x, weight)
        torch.testing.assert_close(dense.double(), want, rtol=2e-2, atol=0.5)
        products.add(matrix.product(matrix.tokens(40), "integer").tobytes())
    torch.set_num_threads(before)
    assert len(products) == 1
