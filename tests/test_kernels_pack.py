"""Packing against loops over single bits, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest

from pocketllm import kernels, reference

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("isa")]

SIZES = [0, 1, 7, 8, 9, 63, 64, 65, 127, 1021]


def indices(rows, count, bits):
    return np.random.default_rng(bits).integers(0, 1 << bits, (rows, count), dtype=np.int32)


def packed_by_hand(row, bits):
    """One row, by the definition: a big integer whose bits i*bits.. are index i."""
    number = sum(int(value) << (i * bits) for i, value in enumerate(row))
    return number.to_bytes((len(row) * bits + 7) // 8, "little")


@pytest.mark.parametrize("bits", range(1, 17))
def test_round_trip_at_every_width(bits):
    for count in SIZES:
        index = indices(3, count, bits)
        packed = kernels.pack(index, bits)
        assert packed.dtype == np.uint8 and packed.shape == (3, -(-count * bits // 8))
        assert [bytes(row) for row in packed] == [packed_by_hand(row, bits) for row in index]
        assert np.array_equal(packed, reference.pack(index, bits))
        back = kernels.unpack(packed, count, bits)
        assert back.dtype == np.int32 and np.array_equal(back, index)
        assert np.array_equal(reference.unpack(packed, count, bits), index)
        assert kernels.index_max(packed, count, bits) == index.max(initial=-1)
        assert reference.index_max(packed, count, bits) == index.max(initial=-1)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_matter(monkeypatch, threads):
    index = indices(129, 1021, 11)
    expected = reference.pack(index, 11)
    monkeypatch.setattr(kernels, "_threads", lambda: threads)
    packed = kernels.pack(index, 11)
    assert np.array_equal(packed, expected)
    assert np.array_equal(kernels.unpack(packed, 1021, 11), index)
    assert kernels.index_max(packed, 1021, 11) == index.max()


def test_bits_behind_the_last_index_are_zero_and_ignored():
    index = indices(4, 5, 3)  # 15 of 16 bits
    packed = kernels.pack(index, 3)
    assert not (packed[:, 1] & 0x80).any()
    packed[:, 1] |= 0x80
    assert np.array_equal(kernels.unpack(packed, 5, 3), index)
    assert kernels.index_max(packed, 5, 3) == index.max()


def test_no_rows_and_one_index():
    assert kernels.pack(np.empty((0, 7), np.int32), 5).shape == (0, 5)
    assert kernels.unpack(np.empty((0, 5), np.uint8), 7, 5).shape == (0, 7)
    assert kernels.index_max(np.empty((0, 5), np.uint8), 7, 5) == -1
    assert kernels.index_max(np.array([[0xFF, 0xFF]], np.uint8), 1, 16) == 65535


@pytest.mark.parametrize("bits", [1, 5, 8, 15, 16])
@pytest.mark.parametrize("bad", ["low", "high"])
def test_an_index_that_does_not_fit_is_refused(bits, bad):
    for count in (1, 9, 64):
        index = indices(2, count, bits)
        index[1, count - 1] = -1 if bad == "low" else 1 << bits
        for pack in (kernels.pack, reference.pack):
            with pytest.raises(ValueError, match=rf"^index: .* want indices of {bits} bits$"):
                pack(index, bits)


def test_strided_and_read_only_input():
    wide = indices(6, 90, 9)
    assert np.array_equal(kernels.pack(wide[::2, ::3], 9), reference.pack(wide[::2, ::3], 9))
    packed = kernels.pack(wide, 9)
    padded = np.zeros((6, packed.shape[1] + 3), np.uint8)
    padded[:, 2:-1] = packed
    padded.flags.writeable = False
    assert np.array_equal(kernels.unpack(padded[:, 2:-1], 90, 9), wide)
    assert kernels.index_max(padded[:, 2:-1], 90, 9) == wide.max()
