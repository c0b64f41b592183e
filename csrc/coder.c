/* coder.c - encoder and decoder on one unit of sub-vectors. See coder.h for the layout. */
#include "coder.h"

static const float norm_eps = 1e-5f;

static ptrdiff_t ceil_div(ptrdiff_t a, ptrdiff_t b) { return (a + b - 1) / b; }

coder_plan PLLM_SYM(coder_plan_of)(int d, int h, int norm, ptrdiff_t count, ptrdiff_t row_count)
{
    coder_plan p = {.d = d, .h = h, .norm = norm, .count = count};
    p.mlp_floats = (ptrdiff_t)2 * h * d + h + d;
    p.unit = norm == PLLM_NORM_RLN ? (row_count ? count / row_count : 0) : CODER_UNIT;
    p.units = p.unit ? ceil_div(count, p.unit) : 0;
    p.blocks = ceil_div(p.unit, CODER_LANES);
    p.units_per_chunk = ceil_div(p.units, CODER_CHUNKS);
    p.chunks = p.units ? ceil_div(p.units, p.units_per_chunk) : 0;
    return p;
}

size_t PLLM_SYM(coder_tape_floats)(const coder_plan *p)
{
    size_t values = 4 * (size_t)p->d + 6 * (size_t)p->h + 3;
    return values * (size_t)p->blocks * CODER_LANES;
}

size_t PLLM_SYM(coder_scratch_floats)(const coder_plan *p)
{
    return 3 * (size_t)p->d * (size_t)p->blocks * CODER_LANES;
}

static float *take(float **memory, const coder_plan *p, int channels)
{
    float *start = *memory;
    *memory += p->blocks * channels * CODER_LANES;
    return start;
}

float *PLLM_SYM(coder_tape_place)(const coder_plan *p, int decoder, float *memory, coder_tape *tape)
{
    for (int i = 0; i < 3; i++) {
        tape->mlp[i].in = take(&memory, p, p->d);
        tape->mlp[i].active = take(&memory, p, p->h);
        tape->mlp[i].slope = take(&memory, p, p->h);
        tape->inverse[i] = take(&memory, p, 1);
    }
    float *output = take(&memory, p, p->d);
    tape->output = decoder ? tape->mlp[0].in : output;
    return memory;
}

float *PLLM_SYM(coder_scratch_place)(const coder_plan *p, float *memory, coder_scratch *scratch)
{
    scratch->state = take(&memory, p, p->d);
    scratch->grad = take(&memory, p, p->d);
    scratch->spare = take(&memory, p, p->d);
    return memory;
}

/* A block of d channels to and from rows of d values, each taken apart into halves: d = 4 and 8, for which compilers find
 * nothing as short. step: between channels. */
static void take_apart(const float *restrict pairs, int n, float *restrict even, float *restrict odd)
{
    for (int i = 0; i < n; i++) {
        even[i] = pairs[2 * i];
        odd[i] = pairs[2 * i + 1];
    }
}

static void put_together(const float *restrict even, const float *restrict odd, int n, float *restrict pairs)
{
    for (int i = 0; i < n; i++) {
        pairs[2 * i] = even[i];
        pairs[2 * i + 1] = odd[i];
    }
}

static void block_of_four(const float *rows, ptrdiff_t step, float *block)
{
    float even[2 * CODER_LANES], odd[2 * CODER_LANES];
    take_apart(rows, 2 * CODER_LANES, even, odd);
    take_apart(even, CODER_LANES, block, block + 2 * step);
    take_apart(odd, CODER_LANES, block + step, block + 3 * step);
}

static void rows_of_four(const float *block, ptrdiff_t step, float *rows)
{
    float even[2 * CODER_LANES], odd[2 * CODER_LANES];
    put_together(block, block + 2 * step, CODER_LANES, even);
    put_together(block + step, block + 3 * step, CODER_LANES, odd);
    put_together(even, odd, 2 * CODER_LANES, rows);
}

PLLM_INLINE void block_of(int d, const float *rows, float *block)
{
    float even[4 * CODER_LANES], odd[4 * CODER_LANES];
    if (d == 4)
        block_of_four(rows, CODER_LANES, block);
    else if (d == 8) {
        take_apart(rows, 4 * CODER_LANES, even, odd);
        block_of_four(even, 2 * CODER_LANES, block);
        block_of_four(odd, 2 * CODER_LANES, block + CODER_LANES);
    } else
        for (int c = 0; c < d; c++)
            for (int lane = 0; lane < CODER_LANES; lane++)
                block[c * CODER_LANES + lane] = rows[lane * d + c];
}

PLLM_INLINE void rows_of(int d, const float *block, float *rows)
{
    float even[4 * CODER_LANES], odd[4 * CODER_LANES];
    if (d == 4)
        rows_of_four(block, CODER_LANES, rows);
    else if (d == 8) {
        rows_of_four(block, 2 * CODER_LANES, even);
        rows_of_four(block + CODER_LANES, 2 * CODER_LANES, odd);
        put_together(even, odd, 4 * CODER_LANES, rows);
    } else
        for (int lane = 0; lane < CODER_LANES; lane++)
            for (int c = 0; c < d; c++)
                rows[lane * d + c] = block[c * CODER_LANES + lane];
}

PLLM_INLINE void rows_to_blocks(int d, const float *rows, ptrdiff_t count, float *blocks)
{
    ptrdiff_t whole = count / CODER_LANES * CODER_LANES;
    for (ptrdiff_t i = 0; i < whole; i += CODER_LANES, blocks += d * CODER_LANES, rows += d * CODER_LANES)
        block_of(d, rows, blocks);
    if (whole == count)
        return;
    memset(blocks, 0, (size_t)d * CODER_LANES * sizeof *blocks);
    for (ptrdiff_t lane = 0; lane < count - whole; lane++)
        for (int c = 0; c < d; c++)
            blocks[c * CODER_LANES + lane] = rows[lane * d + c];
}

PLLM_INLINE void blocks_to_rows(int d, const float *blocks, ptrdiff_t count, float *rows)
{
    for (; count >= CODER_LANES; count -= CODER_LANES, blocks += d * CODER_LANES, rows += d * CODER_LANES)
        rows_of(d, blocks, rows);
    for (ptrdiff_t lane = 0; lane < count; lane++)
        for (int c = 0; c < d; c++)
            rows[lane * d + c] = blocks[c * CODER_LANES + lane];
}

/* Where d is a constant, compilers turn the loops into permutations. */
void PLLM_SYM(coder_load)(const float *rows, ptrdiff_t count, int d, float *blocks)
{
    PLLM_CONSTANT_D(rows_to_blocks, d, rows, count, blocks);
}

void PLLM_SYM(coder_store)(const float *blocks, ptrdiff_t count, int d, float *rows)
{
    PLLM_CONSTANT_D(blocks_to_rows, d, blocks, count, rows);
}

/* ---- norms ----------------------------------------------------------------------------------- */

/* 1 for the lanes of the last block that hold a sub-vector, else 0. */
static void tail_mask(ptrdiff_t count, float mask[CODER_LANES])
{
    ptrdiff_t used = count - (ceil_div(count, CODER_LANES) - 1) * CODER_LANES;
    for (int lane = 0; lane < CODER_LANES; lane++)
        mask[lane] = lane < used ? 1.0f : 0.0f;
}

static vf16 sub16(vf16 a, vf16 b)
{
    for (int i = 0; i < VF16_PARTS; i++)
        a.part[i] = vf_sub(a.part[i], b.part[i]);
    return a;
}

static vf16 inverse_root16(vf16 variance)
{
    for (int i = 0; i < VF16_PARTS; i++) {
        vf root = vf_sqrt(vf_add(variance.part[i], vf_set1(norm_eps)));
        variance.part[i] = vf_div(vf_set1(1.0f), root);
    }
    return variance;
}

/* Sums that are made side by side, so that none waits for the one before it. */
enum { NORM_SUMS = 4 };

PLLM_INLINE vf16 sum_of(const vf16 *sum)
{
    return vf16_add(vf16_add(sum[0], sum[1]), vf16_add(sum[2], sum[3]));
}

static void row_norm(int d, ptrdiff_t count, const float *in, float *out, float *inverse)
{
    const ptrdiff_t blocks = ceil_div(count, CODER_LANES), whole = (blocks - 1) * d, all = blocks * d;
    float last[CODER_LANES], size = (float)(count * d);
    tail_mask(count, last);
    const vf16 mask = vf16_load(last);
    vf16 sum[NORM_SUMS], square[NORM_SUMS];
    for (int k = 0; k < NORM_SUMS; k++)
        sum[k] = square[k] = vf16_zero();
    ptrdiff_t i = 0;
    for (; i + NORM_SUMS <= whole; i += NORM_SUMS) {
        PLLM_UNROLL
        for (int k = 0; k < NORM_SUMS; k++)
            sum[k] = vf16_add(sum[k], vf16_load(in + (i + k) * CODER_LANES));
    }
    for (; i < all; i++)
        sum[0] = vf16_fma(vf16_load(in + i * CODER_LANES), i < whole ? vf16_set1(1.0f) : mask, sum[0]);
    const vf16 mean = vf16_set1(vf16_sum(sum_of(sum)) / size);
    for (i = 0; i + NORM_SUMS <= whole; i += NORM_SUMS) {
        PLLM_UNROLL
        for (int k = 0; k < NORM_SUMS; k++) {
            const vf16 centred = sub16(vf16_load(in + (i + k) * CODER_LANES), mean);
            square[k] = vf16_fma(centred, centred, square[k]);
        }
    }
    for (; i < all; i++) {
        const vf16 centred = sub16(vf16_load(in + i * CODER_LANES), mean);
        square[0] = vf16_fma(i < whole ? centred : vf16_mul(centred, mask), centred, square[0]);
    }
    const vf16 scale = inverse_root16(vf16_set1(vf16_sum(sum_of(square)) / size));
    for (i = 0; i < all; i++)
        vf16_store(out + i * CODER_LANES, vf16_mul(sub16(vf16_load(in + i * CODER_LANES), mean), scale));
    vf16_store(inverse, scale);
}

static void row_norm_backward(int d, ptrdiff_t count, const float *out, const float *inverse,
                              float *grad)
{
    const ptrdiff_t blocks = ceil_div(count, CODER_LANES), whole = (blocks - 1) * d, all = blocks * d;
    float last[CODER_LANES], size = (float)(count * d);
    tail_mask(count, last);
    const vf16 mask = vf16_load(last), scale = vf16_load(inverse);
    vf16 sum[NORM_SUMS], product[NORM_SUMS];
    for (int k = 0; k < NORM_SUMS; k++)
        sum[k] = product[k] = vf16_zero();
    ptrdiff_t i = 0;
    for (; i + NORM_SUMS <= whole; i += NORM_SUMS) {
        PLLM_UNROLL
        for (int k = 0; k < NORM_SUMS; k++) {
            const vf16 g = vf16_load(grad + (i + k) * CODER_LANES);
            sum[k] = vf16_add(sum[k], g);
            product[k] = vf16_fma(g, vf16_load(out + (i + k) * CODER_LANES), product[k]);
        }
    }
    for (; i < all; i++) {
        const vf16 value = vf16_load(grad + i * CODER_LANES), g = i < whole ? value : vf16_mul(value, mask);
        sum[0] = vf16_add(sum[0], g);
        product[0] = vf16_fma(g, vf16_load(out + i * CODER_LANES), product[0]);
    }
    const vf16 mean = vf16_set1(vf16_sum(sum_of(sum)) / size);
    const vf16 slope = vf16_set1(-vf16_sum(sum_of(product)) / size), last_scale = vf16_mul(mask, scale);
    for (i = 0; i < all; i++) {
        vf16 g = sub16(vf16_load(grad + i * CODER_LANES), mean);
        g = vf16_fma(slope, vf16_load(out + i * CODER_LANES), g);
        vf16_store(grad + i * CODER_LANES, vf16_mul(g, i < whole ? scale : last_scale));
    }
}

static void lane_norm(int d, ptrdiff_t blocks, const float *in, float *out, float *inverse)
{
    vf16 part = vf16_set1(1.0f / (float)d);
    for (ptrdiff_t b = 0; b < blocks; b++, in += d * CODER_LANES, out += d * CODER_LANES) {
        vf16 sum = vf16_zero(), square = vf16_zero();
        for (int c = 0; c < d; c++)
            sum = vf16_add(sum, vf16_load(in + c * CODER_LANES));
        vf16 mean = vf16_mul(sum, part);
        for (int c = 0; c < d; c++) {
            vf16 centred = sub16(vf16_load(in + c * CODER_LANES), mean);
            square = vf16_fma(centred, centred, square);
        }
        vf16 scale = inverse_root16(vf16_mul(square, part));
        for (int c = 0; c < d; c++)
            vf16_store(out + c * CODER_LANES,
                       vf16_mul(sub16(vf16_load(in + c * CODER_LANES), mean), scale));
        vf16_store(inverse + b * CODER_LANES, scale);
    }
}

static void lane_norm_backward(int d, ptrdiff_t blocks, const float *out, const float *inverse,
                               float *grad)
{
    vf16 part = vf16_set1(1.0f / (float)d), minus_part = vf16_set1(-1.0f / (float)d);
    for (ptrdiff_t b = 0; b < blocks; b++, out += d * CODER_LANES, grad += d * CODER_LANES) {
        vf16 sum = vf16_zero(), product = vf16_zero();
        for (int c = 0; c < d; c++) {
            vf16 g = vf16_load(grad + c * CODER_LANES);
            sum = vf16_add(sum, g);
            product = vf16_fma(g, vf16_load(out + c * CODER_LANES), product);
        }
        vf16 mean = vf16_mul(sum, part), slope = vf16_mul(product, minus_part);
        vf16 scale = vf16_load(inverse + b * CODER_LANES);
        for (int c = 0; c < d; c++) {
            vf16 g = sub16(vf16_load(grad + c * CODER_LANES), mean);
            g = vf16_fma(slope, vf16_load(out + c * CODER_LANES), g);
            vf16_store(grad + c * CODER_LANES, vf16_mul(g, scale));
        }
    }
}

void PLLM_SYM(coder_norm)(int norm, int d, ptrdiff_t count, const float *in, float *out,
                          float *inverse)
{
    ptrdiff_t blocks = ceil_div(count, CODER_LANES);
    if (norm == PLLM_NORM_RLN)
        row_norm(d, count, in, out, inverse);
    else if (norm == PLLM_NORM_LN)
        lane_norm(d, blocks, in, out, inverse);
    else
        memcpy(out, in, (size_t)(blocks * d) * CODER_LANES * sizeof *out);
}

void PLLM_SYM(coder_norm_backward)(int norm, int d, ptrdiff_t count, const float *out,
                                   const float *inverse, float *grad)
{
    if (norm == PLLM_NORM_RLN)
        row_norm_backward(d, count, out, inverse, grad);
    else if (norm == PLLM_NORM_LN)
        lane_norm_backward(d, ceil_div(count, CODER_LANES), out, inverse, grad);
}

/* ---- encoder and decoder --------------------------------------------------------------------- */

static void add_to(float *a, const float *b, ptrdiff_t count)
{
    for (ptrdiff_t i = 0; i < count; i += VF_WIDTH)
        vf_store(a + i, vf_add(vf_load(a + i), vf_load(b + i)));
}

/* state += mlp1(N(state)); state += mlp2(N(state)); tape->output = N(state). */
static void residual_pair(const coder_plan *p, ptrdiff_t count, const float *params,
                          const coder_tape *tape, int train, const coder_scratch *s)
{
    ptrdiff_t blocks = ceil_div(count, CODER_LANES);
    for (int i = 1; i < 3; i++) {
        PLLM_SYM(coder_norm)(p->norm, p->d, count, s->state, tape->mlp[i].in, tape->inverse[i]);
        PLLM_SYM(coder_mlp)(p->d, p->h, blocks, params + i * p->mlp_floats, &tape->mlp[i], train,
                            s->spare);
        add_to(s->state, s->spare, blocks * p->d * CODER_LANES);
    }
    PLLM_SYM(coder_norm)(p->norm, p->d, count, s->state, tape->output, tape->inverse[0]);
}

static void residual_pair_backward(const coder_plan *p, ptrdiff_t count, const float *params,
                                   const coder_tape *tape, const coder_scratch *s, float *lane_grad)
{
    ptrdiff_t blocks = ceil_div(count, CODER_LANES);
    PLLM_SYM(coder_norm_backward)(p->norm, p->d, count, tape->output, tape->inverse[0], s->grad);
    for (int i = 2; i > 0; i--) {
        PLLM_SYM(coder_mlp_backward)(p->d, p->h, blocks, params + i * p->mlp_floats, &tape->mlp[i],
                                     s->grad, lane_grad + i * p->mlp_floats * CODER_LANES, s->spare);
        PLLM_SYM(coder_norm_backward)(p->norm, p->d, count, tape->mlp[i].in, tape->inverse[i],
                                      s->spare);
        add_to(s->grad, s->spare, blocks * p->d * CODER_LANES);
    }
}

void PLLM_SYM(coder_encode)(const coder_plan *p, ptrdiff_t count, const float *params,
                            const coder_tape *tape, int train, const coder_scratch *s)
{
    PLLM_SYM(coder_mlp)(p->d, p->h, ceil_div(count, CODER_LANES), params, &tape->mlp[0], train,
                        s->state);
    residual_pair(p, count, params, tape, train, s);
}

void PLLM_SYM(coder_decode)(const coder_plan *p, ptrdiff_t count, const float *params,
                            const coder_tape *tape, int train, const coder_scratch *s, float *out)
{
    residual_pair(p, count, params, tape, train, s);
    PLLM_SYM(coder_mlp)(p->d, p->h, ceil_div(count, CODER_LANES), params, &tape->mlp[0], train, out);
}

void PLLM_SYM(coder_encode_backward)(const coder_plan *p, ptrdiff_t count, const float *params,
                                     const coder_tape *tape, const coder_scratch *s, int want_input,
                                     float *lane_grad)
{
    ptrdiff_t blocks = ceil_div(count, CODER_LANES);
    residual_pair_backward(p, count, params, tape, s, lane_grad);
    PLLM_SYM(coder_mlp_backward)(p->d, p->h, blocks, params, &tape->mlp[0], s->grad, lane_grad,
                                 want_input ? s->spare : NULL);
    if (want_input)
        memcpy(s->grad, s->spare, (size_t)(blocks * p->d) * CODER_LANES * sizeof *s->grad);
}

void PLLM_SYM(coder_decode_backward)(const coder_plan *p, ptrdiff_t count, const float *params,
                                     const coder_tape *tape, const coder_scratch *s, float *lane_grad)
{
    ptrdiff_t blocks = ceil_div(count, CODER_LANES);
    PLLM_SYM(coder_mlp_backward)(p->d, p->h, blocks, params, &tape->mlp[0], s->grad, lane_grad,
                                 s->spare);
    memcpy(s->grad, s->spare, (size_t)(blocks * p->d) * CODER_LANES * sizeof *s->grad);
    residual_pair_backward(p, count, params, tape, s, lane_grad);
}

/* In the order of vf16_sum, many parameters at a time so that each step is one of vectors. */
void PLLM_SYM(coder_sum_lanes)(const float *lane_grad, ptrdiff_t params, float *partial)
{
    enum { GROUP = 32 };
    float eight[GROUP * 8], four[GROUP * 4];
    for (ptrdiff_t first = 0; first < params; first += GROUP) {
        const int group = params - first < GROUP ? (int)(params - first) : GROUP;
        const float *lanes = lane_grad + first * CODER_LANES;
        for (int p = 0; p < group; p++)
            for (int i = 0; i < 8; i++)
                eight[p * 8 + i] = lanes[p * CODER_LANES + i] + lanes[p * CODER_LANES + i + 8];
        for (int p = 0; p < group; p++)
            for (int i = 0; i < 4; i++)
                four[p * 4 + i] = eight[p * 8 + i] + eight[p * 8 + i + 4];
        for (int p = 0; p < group; p++) {
            const float *f = four + 4 * p;
            partial[first + p] = (f[0] + f[2]) + (f[1] + f[3]);
        }
    }
}

void PLLM_SYM(coder_sum_chunks)(const float *partial, ptrdiff_t chunks, ptrdiff_t params, float *grad)
{
    enum { GROUP = 32 };
    for (ptrdiff_t first = 0; first < params; first += GROUP) {
        const int group = params - first < GROUP ? (int)(params - first) : GROUP;
        double sum[GROUP] = {0.0};
        for (ptrdiff_t c = 0; c < chunks; c++)
            for (int i = 0; i < group; i++)
                sum[i] += (double)partial[c * params + first + i];
        for (int i = 0; i < group; i++)
            grad[first + i] = (float)sum[i];
    }
}
