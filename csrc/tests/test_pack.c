/* test_pack.c - packing against a loop over single bits, at every width and awkward lengths. */
#include "check.h"

static void check_pack(const pllm_kernels *k, int rows, int count, int bits, int threads)
{
    const size_t values = (size_t)rows * (size_t)count;
    const ptrdiff_t stride = pllm_row_stride_bytes(count, bits);
    const size_t bytes = (size_t)rows * (size_t)stride;
    int32_t *index = new_ints(values), *back = new_ints(values), largest = -1;
    uint8_t *packed = new_bytes(bytes), *wanted = new_bytes(bytes);

    memset(wanted, 0, bytes);
    for (int r = 0; r < rows; r++) {
        for (int i = 0; i < count; i++) {
            int32_t value = (int32_t)(random_bits() >> (32 - bits));
            index[r * count + i] = value;
            largest = value > largest ? value : largest;
            for (int b = 0; b < bits; b++)
                wanted[r * stride + (i * bits + b) / 8] |=
                    (uint8_t)((value >> b & 1) << (i * bits + b) % 8);
        }
    }
    CHECK(k->pack(index, rows, count, bits, packed, threads) == PLLM_OK, "pack failed");
    CHECK(same_bits(packed, wanted, bytes), "pack, %d x %d, %d bits", rows, count, bits);
    for (int r = 0; r < rows && stride > 0; r++) /* what the unused bits hold must not matter */
        packed[r * stride + stride - 1] |= (uint8_t)(0xff << ((count * bits + 7) % 8 + 1));
    k->unpack(packed, rows, count, bits, back, threads);
    CHECK(same_bits(back, index, values * sizeof *index), "unpack, %d x %d, %d bits", rows, count,
          bits);
    int32_t found = k->index_max(packed, rows, count, bits, threads);
    CHECK(found == largest, "index_max, %d x %d, %d bits: %d is not %d", rows, count, bits, found,
          largest);
    if (values > 0) {
        index[random_bits() % values] = random_bits() & 1 ? -1 : 1 << bits;
        CHECK(k->pack(index, rows, count, bits, packed, threads) == PLLM_ERANGE, "range, %d bits",
              bits);
    }
    free(index);
    free(back);
    free(packed);
    free(wanted);
}

void test_pack(const pllm_kernels *k)
{
    for (int bits = 1; bits <= PLLM_MAX_BITS; bits++) {
        for (int s = 0; s < AWKWARD_SIZES; s++)
            check_pack(k, 3, awkward_sizes[s], bits, 1 + s % 2);
        check_pack(k, 0, 5, bits, 1);
        check_pack(k, 67, 509, bits, 2);
    }
}
