/* pack.c - indices of 1 to 16 bits to bytes and back. Compiled once per instruction set.
 *
 * Eight indices of b bits are exactly b bytes, so a row is worked off in groups of eight: b is a
 * constant in each copy of the inner functions, which lets the compiler vectorise the shifts.
 */
#include "kernel.h"

#include <assert.h>

enum { GROUP = 8, GROUP_MAX_BYTES = 16 };

PLLM_INLINE void store_word(uint8_t *p, uint64_t word)
{
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    memcpy(p, &word, sizeof word);
}

/* Eight indices to GROUP_MAX_BYTES bytes, of which the first b count. */
PLLM_INLINE void pack_group(const int32_t *index, uint8_t *bytes, const int b)
{
    uint64_t low = 0, high = 0;
    for (int i = 0; i < 4; i++) {
        low |= (uint64_t)(uint32_t)index[i] << (i * b);
        high |= (uint64_t)(uint32_t)index[i + 4] << (i * b);
    }
    store_word(bytes, b < 16 ? low | high << (4 * b % 64) : low);
    store_word(bytes + 8, b < 16 ? high >> (64 - 4 * b) : high);
}

/* Eight indices from the first b of GROUP_MAX_BYTES bytes. */
PLLM_INLINE void unpack_group(const uint8_t *bytes, int32_t *index, const int b)
{
    const uint64_t mask = (UINT64_C(1) << b) - 1;
    uint64_t low = pllm_load_word(bytes), high = pllm_load_word(bytes + 8);
    if (b < 16)
        high = low >> (4 * b % 64) | high << (64 - 4 * b);
    for (int i = 0; i < 4; i++) {
        index[i] = (int32_t)(low >> (i * b) & mask);
        index[i + 4] = (int32_t)(high >> (i * b) & mask);
    }
}

/* Packs one row; returns the bitwise or of its indices. */
PLLM_INLINE uint32_t pack_row(const int32_t *index, ptrdiff_t count, uint8_t *packed, const int b)
{
    uint32_t seen = 0;
    for (ptrdiff_t i = 0; i < count; i += GROUP, packed += b) {
        ptrdiff_t here = count - i < GROUP ? count - i : GROUP;
        int32_t group[GROUP] = {0};
        uint8_t bytes[GROUP_MAX_BYTES];
        memcpy(group, index + i, (size_t)here * sizeof *group);
        for (int j = 0; j < GROUP; j++)
            seen |= (uint32_t)group[j];
        pack_group(group, bytes, b);
        memcpy(packed, bytes, here == GROUP ? (size_t)b : (size_t)pllm_row_stride_bytes(here, b));
    }
    return seen;
}

/* Unpacks one row; `end` is the end of the whole payload, which nothing is read behind. */
PLLM_INLINE void unpack_row(const uint8_t *packed, const uint8_t *end, ptrdiff_t count,
                            int32_t *index, const int b)
{
    for (ptrdiff_t i = 0; i < count; i += GROUP, packed += b) {
        if (count - i >= GROUP && end - packed >= GROUP_MAX_BYTES) {
            unpack_group(packed, index + i, b);
        } else {
            ptrdiff_t here = count - i < GROUP ? count - i : GROUP;
            uint8_t bytes[GROUP_MAX_BYTES] = {0};
            int32_t group[GROUP];
            memcpy(bytes, packed, (size_t)pllm_row_stride_bytes(here, b));
            unpack_group(bytes, group, b);
            memcpy(index + i, group, (size_t)here * sizeof *group);
        }
    }
}

/* The largest index of one row, which is not empty. */
PLLM_INLINE int32_t max_of_row(const uint8_t *packed, const uint8_t *end, ptrdiff_t count,
                               const int b)
{
    enum { PIECE = 256 }; /* indices unpacked at a time, a multiple of GROUP */
    int32_t piece[PIECE], largest = 0;
    for (ptrdiff_t i = 0; i < count; i += PIECE, packed += PIECE / GROUP * b) {
        ptrdiff_t here = count - i < PIECE ? count - i : PIECE;
        unpack_row(packed, end, here, piece, b);
        for (ptrdiff_t j = 0; j < here; j++)
            largest = piece[j] > largest ? piece[j] : largest;
    }
    return largest;
}

typedef struct {
    uint32_t (*pack)(const int32_t *index, ptrdiff_t count, uint8_t *packed);
    void (*unpack)(const uint8_t *packed, const uint8_t *end, ptrdiff_t count, int32_t *index);
    int32_t (*max)(const uint8_t *packed, const uint8_t *end, ptrdiff_t count);
} row_functions;

#define ROW_FUNCTIONS(B) \
    static uint32_t pack_row_##B(const int32_t *index, ptrdiff_t count, uint8_t *packed) \
    { \
        return pack_row(index, count, packed, B); \
    } \
    static void unpack_row_##B(const uint8_t *packed, const uint8_t *end, ptrdiff_t count, \
                               int32_t *index) \
    { \
        unpack_row(packed, end, count, index, B); \
    } \
    static int32_t max_of_row_##B(const uint8_t *packed, const uint8_t *end, ptrdiff_t count) \
    { \
        return max_of_row(packed, end, count, B); \
    }
ROW_FUNCTIONS(1) ROW_FUNCTIONS(2) ROW_FUNCTIONS(3) ROW_FUNCTIONS(4)
ROW_FUNCTIONS(5) ROW_FUNCTIONS(6) ROW_FUNCTIONS(7) ROW_FUNCTIONS(8)
ROW_FUNCTIONS(9) ROW_FUNCTIONS(10) ROW_FUNCTIONS(11) ROW_FUNCTIONS(12)
ROW_FUNCTIONS(13) ROW_FUNCTIONS(14) ROW_FUNCTIONS(15) ROW_FUNCTIONS(16)

#define ROW_ENTRY(B) {pack_row_##B, unpack_row_##B, max_of_row_##B}
static const row_functions row_of[PLLM_MAX_BITS + 1] = {
    {NULL, NULL, NULL}, ROW_ENTRY(1),  ROW_ENTRY(2),  ROW_ENTRY(3),  ROW_ENTRY(4),  ROW_ENTRY(5),
    ROW_ENTRY(6),       ROW_ENTRY(7),  ROW_ENTRY(8),  ROW_ENTRY(9),  ROW_ENTRY(10), ROW_ENTRY(11),
    ROW_ENTRY(12),      ROW_ENTRY(13), ROW_ENTRY(14), ROW_ENTRY(15), ROW_ENTRY(16)};

enum { PARALLEL_FROM = 1 << 15 }; /* indices; below this a second thread costs more than it brings */

int PLLM_SYM(pllm_pack)(const int32_t *index, ptrdiff_t rows, ptrdiff_t count, int bits,
                        uint8_t *packed, int threads)
{
    assert(bits >= 1 && bits <= PLLM_MAX_BITS);
    const ptrdiff_t stride = pllm_row_stride_bytes(count, bits);
    const int parallel = rows > 1 && rows * count >= PARALLEL_FROM;
    uint32_t seen = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : seen) if (parallel)
    for (ptrdiff_t r = 0; r < rows; r++)
        seen |= row_of[bits].pack(index + r * count, count, packed + r * stride);
    return seen >> bits ? PLLM_ERANGE : PLLM_OK;
}

void PLLM_SYM(pllm_unpack)(const uint8_t *packed, ptrdiff_t rows, ptrdiff_t count, int bits,
                           int32_t *index, int threads)
{
    assert(bits >= 1 && bits <= PLLM_MAX_BITS);
    const ptrdiff_t stride = pllm_row_stride_bytes(count, bits);
    const int parallel = rows > 1 && rows * count >= PARALLEL_FROM;
#pragma omp parallel for num_threads(threads) schedule(static) if (parallel)
    for (ptrdiff_t r = 0; r < rows; r++)
        row_of[bits].unpack(packed + r * stride, packed + rows * stride, count, index + r * count);
}

int32_t PLLM_SYM(pllm_index_max)(const uint8_t *packed, ptrdiff_t rows, ptrdiff_t count, int bits,
                                 int threads)
{
    assert(bits >= 1 && bits <= PLLM_MAX_BITS);
    const ptrdiff_t stride = pllm_row_stride_bytes(count, bits);
    const int parallel = rows > 1 && rows * count >= PARALLEL_FROM;
    int32_t largest = -1;
    if (count == 0)
        return largest;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : largest) if (parallel)
    for (ptrdiff_t r = 0; r < rows; r++) {
        int32_t row = row_of[bits].max(packed + r * stride, packed + rows * stride, count);
        largest = row > largest ? row : largest;
    }
    return largest;
}
