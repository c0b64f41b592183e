/* simd_layer.c - every function of simd.h against plain C, lane by lane. Compiled once per instruction
 * set, like a kernel body; test_simd.c calls it. */
#include "check.h"

#include "../kernel.h"

void PLLM_SYM(check_simd)(void);

enum { W = VF_WIDTH };

static const float specials[] = {0.0f,  -0.0f, 1.0f,     -1.0f,    0.5f,     1.5f,       2.5f,    -2.5f,
                                 1e-40f, 3e38f, INFINITY, -INFINITY, NAN,     16777217.0f, -7.75f, 1e-3f};

static void fill_floats(float *p, int round)
{
    for (int i = 0; i < W; i++)
        p[i] = round & 1 ? specials[random_bits() % 16] : random_normal() * 100.0f;
}

static void fill_ints(int32_t *p, int round)
{
    for (int i = 0; i < W; i++)
        p[i] = round & 1 ? (int32_t)random_bits() : (int32_t)(random_bits() % 9) - 4;
}

static int same_float(float a, float b)
{
    return (isnan(a) && isnan(b)) || memcmp(&a, &b, sizeof a) == 0;
}

#define EACH_LANE for (int i = 0; i < W; i++)
#define FLOATS(vector, wanted) \
    do { \
        float r[W]; \
        vf_store(r, vector); \
        EACH_LANE CHECK(same_float(r[i], wanted), #vector ", lane %d: %g is not %g", i, (double)r[i], \
                        (double)(wanted)); \
    } while (0)
#define INTS(vector, wanted) \
    do { \
        int32_t r[W]; \
        vi_store(r, vector); \
        EACH_LANE CHECK(r[i] == (wanted), #vector ", lane %d: %d is not %d", i, r[i], (wanted)); \
    } while (0)
#define MASK(mask, wanted) \
    do { \
        unsigned bits = vm_bits(mask), any = 0; \
        EACH_LANE CHECK((bits >> i & 1) == (unsigned)(wanted), #mask ", lane %d", i); \
        EACH_LANE any |= (unsigned)(wanted); \
        CHECK(bits >> (W - 1) >> 1 == 0 && vm_any(mask) == (int)any, #mask ", as a whole"); \
    } while (0)
#define WRAP(op) (int32_t)((uint32_t)m[i] op (uint32_t)n[i])

static void check_floats(int round)
{
    float x[W], y[W], z[W];
    fill_floats(x, round), fill_floats(y, round >> 1), fill_floats(z, round >> 2);
    const vf a = vf_load(x), b = vf_load(y), c = vf_load(z);
    FLOATS(a, x[i]);
    FLOATS(vf_zero(), 0.0f);
    FLOATS(vf_set1(y[0]), y[0]);
    FLOATS(vf_add(a, b), x[i] + y[i]);
    FLOATS(vf_sub(a, b), x[i] - y[i]);
    FLOATS(vf_mul(a, b), x[i] * y[i]);
    FLOATS(vf_div(a, b), x[i] / y[i]);
    FLOATS(vf_sqrt(a), sqrtf(x[i]));
    FLOATS(vf_neg(a), -x[i]);
    FLOATS(vf_abs(a), fabsf(x[i]));
    FLOATS(vf_sign(a), copysignf(1.0f, x[i]));
    FLOATS(vf_rint(a), rintf(x[i]));
    FLOATS(vf_fma(a, b, c), fmaf(x[i], y[i], z[i]));
    FLOATS(vf_fnma(a, b, c), fmaf(-x[i], y[i], z[i]));
    FLOATS(vf_min(a, b), x[i] < y[i] ? x[i] : y[i]);
    FLOATS(vf_max(a, b), x[i] > y[i] ? x[i] : y[i]);
    MASK(vf_lt(a, b), x[i] < y[i]);
    MASK(vf_le(a, b), x[i] <= y[i]);
    MASK(vf_eq(a, b), x[i] == y[i]);
    MASK(vm_and(vf_lt(a, b), vf_le(b, c)), x[i] < y[i] && y[i] <= z[i]);
    MASK(vm_or(vf_lt(a, b), vf_le(b, c)), x[i] < y[i] || y[i] <= z[i]);
    MASK(vm_not(vf_lt(a, b)), !(x[i] < y[i]));
    FLOATS(vf_select(vf_lt(a, b), b, c), x[i] < y[i] ? y[i] : z[i]);
    FLOATS(vf_bits(vi_bits(a)), x[i]);
    if (!(round & 1))
        INTS(vi_from_f(a), (int32_t)lrintf(x[i]));
}

static void check_ints(int round)
{
    int32_t m[W], n[W], shifts[W];
    fill_ints(m, round), fill_ints(n, round >> 1);
    EACH_LANE shifts[i] = (int32_t)(random_bits() % 32);
    const vi a = vi_load(m), b = vi_load(n);
    const int s = shifts[0];
    INTS(a, m[i]);
    INTS(vi_iota(), i);
    INTS(vi_set1(n[0]), n[0]);
    INTS(vi_add(a, b), WRAP(+));
    INTS(vi_sub(a, b), WRAP(-));
    INTS(vi_mul(a, b), WRAP(*));
    INTS(vi_min(a, b), m[i] < n[i] ? m[i] : n[i]);
    INTS(vi_max(a, b), m[i] > n[i] ? m[i] : n[i]);
    INTS(vi_and(a, b), m[i] & n[i]);
    INTS(vi_or(a, b), m[i] | n[i]);
    INTS(vi_xor(a, b), m[i] ^ n[i]);
    INTS(vi_sll(a, s), (int32_t)((uint32_t)m[i] << s));
    INTS(vi_srl(a, s), (int32_t)((uint32_t)m[i] >> s));
    INTS(vi_sra(a, s), m[i] >> s);
    INTS(vi_srlv(a, vi_load(shifts)), (int32_t)((uint32_t)m[i] >> shifts[i]));
    MASK(vi_lt(a, b), m[i] < n[i]);
    MASK(vi_eq(a, b), m[i] == n[i]);
    INTS(vi_select(vi_lt(a, b), a, vi_xor(a, b)), m[i] < n[i] ? m[i] : m[i] ^ n[i]);
    INTS(vi_keep(vi_lt(a, b), a), m[i] < n[i] ? m[i] : 0);
    FLOATS(vf_from_i(a), (float)m[i]);
}

static void check_across(int round)
{
    float x[W], low;
    int32_t m[W], n[W], packed[W], wanted[W];
    int count = 0;
    for (int i = 0; i < W; i++)
        x[i] = random_normal();
    low = x[0];
    EACH_LANE low = x[i] < low ? x[i] : low;
    CHECK(vf_lowest(vf_load(x)) == low, "vf_lowest");
    fill_ints(m, round), fill_ints(n, round);
    EACH_LANE if (m[i] < n[i]) wanted[count++] = m[i];
    CHECK(vi_compress(packed, vi_load(m), vi_lt(vi_load(m), vi_load(n))) == count &&
              memcmp(packed, wanted, (size_t)count * sizeof *wanted) == 0,
          "vi_compress of %d lanes", count);
}

/* Loads of small types from arrays of exactly the size that may be read. */
static void check_loads(void)
{
    int8_t *i8 = new_bytes(W);
    uint8_t *u8 = new_bytes(W);
    uint16_t *u16 = new_bytes(2 * W);
    float *table = new_normals(50);
    int32_t at[W];
    for (int i = 0; i < W; i++) {
        i8[i] = (int8_t)random_bits(), u8[i] = (uint8_t)random_bits();
        u16[i] = (uint16_t)random_bits(), at[i] = (int32_t)(random_bits() % 50);
    }
    INTS(vi_load_i8(i8), i8[i]);
    INTS(vi_load_u8(u8), u8[i]);
    INTS(vi_load_u16(u16), u16[i]);
    FLOATS(vf_load_i8(i8), (float)i8[i]);
    FLOATS(vf_gather(table, vi_load(at)), table[at[i]]);
    EACH_LANE at[i] %= 8;
    FLOATS(vf_look_up8(table + 42, vi_load(at)), table[42 + at[i]]);
    float *own = new_normals(W);
#define WITH_AND_WITHOUT(bit) \
    FLOATS(vf_load_with(own, bit), own[i | (bit)]); \
    FLOATS(vf_load_without(own, bit), own[i & ~(bit)])
    WITH_AND_WITHOUT(1);
    WITH_AND_WITHOUT(2);
#if VF_WIDTH >= 8
    WITH_AND_WITHOUT(4);
#endif
#if VF_WIDTH >= 16
    WITH_AND_WITHOUT(8);
#endif
    free(own);
    free(i8);
    free(u8);
    free(u16);
    free(table);
}

/* Dot products of int16, wrapping, of whole vectors and in each lane; sums over lanes; stores as int16. */
static void check_shorts(void)
{
    int16_t *x = new_bytes(4 * W), *y = new_bytes(4 * W), *narrow = new_bytes(2 * W);
    int32_t start[W], small[W], sums[4];
    uint32_t wanted = 0, plain = 0;
    for (int i = 0; i < 2 * W; i++) {
        x[i] = (int16_t)random_bits(), y[i] = (int16_t)random_bits();
        wanted += (uint32_t)(x[i] * y[i]);
    }
    EACH_LANE {
        start[i] = (int32_t)random_bits(), small[i] = x[i];
        plain += (uint32_t)start[i];
    }
    const vi a = vi_load(start);
    vi_sum4(sums, a, vi_dot(a, vs_load(x), vs_load(y)), vi_set1(0), vi_set1(-1));
    CHECK((uint32_t)sums[0] == plain && (uint32_t)sums[1] == plain + wanted && sums[2] == 0 &&
              sums[3] == -W, "vi_dot, vi_sum4: %d %d %d %d", sums[0], sums[1], sums[2], sums[3]);
    INTS(vi_dot_pair(a, vs_load(x), vs_load_pair(y + 1)),
         (int32_t)((uint32_t)start[i] + (uint32_t)(x[VS_PLACE(i, 0)] * y[1]) +
                   (uint32_t)(x[VS_PLACE(i, 1)] * y[2])));
    vi_store_i16(narrow, vi_load(small));
    EACH_LANE CHECK(narrow[i] == x[i], "vi_store_i16, lane %d", i);
    free(x);
    free(y);
    free(narrow);
}

/* Sixteen lanes, summed as simd.h says: 8 apart, then 4, 2, 1. */
static void check_vf16(void)
{
    float *x = new_normals(16), *y = new_normals(16), z[16], part[16];
    vf16 a = vf16_load(x), b = vf16_load(y);
    vf16_store(z, vf16_fma(a, b, vf16_add(a, vf16_set1(0.1f))));
    for (int i = 0; i < 16; i++)
        CHECK(same_float(z[i], fmaf(x[i], y[i], x[i] + 0.1f)), "vf16, lane %d", i);
    float pairs[4];
    for (int i = 0; i < 4; i++)
        pairs[i] = (x[i] + x[i + 8]) + (x[i + 4] + x[i + 12]);
    CHECK(same_float(vf16_sum(a), (pairs[0] + pairs[2]) + (pairs[1] + pairs[3])), "vf16_sum");
    for (int count = 0; count <= 16; count++) {
        float *few = new_normals((size_t)count);
        vf16_store(part, vf16_load_part(few, count));
        for (int i = 0; i < 16; i++)
            CHECK(same_float(part[i], i < count ? few[i] : 0.0f), "vf16_load_part(%d)", count);
        free(few);
    }
    CHECK(vf16_sum(vf16_zero()) == 0.0f, "vf16_zero");
    vf16 eight[8];
    float sums[8];
    for (int i = 0; i < 8; i++)
        eight[i] = vf16_fma(a, vf16_set1((float)i - 2.3f), b);
    vf16_sum8(sums, eight);
    for (int i = 0; i < 8; i++)
        CHECK(same_float(sums[i], vf16_sum(eight[i])), "vf16_sum8, %d", i);
    free(x);
    free(y);
}

void PLLM_SYM(check_simd)(void)
{
    for (int round = 0; round < 200; round++) {
        check_floats(round);
        check_ints(round);
        check_across(round);
        check_loads();
        check_shorts();
        check_vf16();
    }
}
