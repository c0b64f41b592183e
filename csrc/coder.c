/* coder.c - encoder and decoder on one unit of sub-vectors. See coder.h for the layout. */
#include "coder.h"

static const float norm_eps = 1e-5f;
static const float ones[CODER_LANES] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

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
    return (3 * (size_t)p->d + (size_t)p->h) * (size_t)p->blocks * CODER_LANES;
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
    scratch->hidden = take(&memory, p, p->h);
    return memory;
}

void PLLM_SYM(coder_load)(const float *rows, ptrdiff_t count, int d, float *blocks)
{
    ptrdiff_t whole = count / CODER_LANES * CODER_LANES;
    for (ptrdiff_t i = 0; i < whole; i += CODER_LANES, blocks += d * CODER_LANES, rows += d * CODER_LANES)
        for (int c = 0; c < d; c++)
            for (int lane = 0; lane < CODER_LANES; lane++)
                blocks[c * CODER_LANES + lane] = rows[lane * d + c];
    if (whole == count)
        return;
    memset(blocks, 0, (size_t)d * CODER_LANES * sizeof *blocks);
    for (ptrdiff_t lane = 0; lane < count - whole; lane++)
        for (int c = 0; c < d; c++)
            blocks[c * CODER_LANES + lane] = rows[lane * d + c];
}

void PLLM_SYM(coder_store)(const float *blocks, ptrdiff_t count, int d, float *rows)
{
    for (; count > 0; count -= CODER_LANES, blocks += d * CODER_LANES, rows += d * CODER_LANES) {
        int lanes = count < CODER_LANES ? (int)count : CODER_LANES;
        for (int lane = 0; lane < lanes; lane++)
            for (int c = 0; c < d; c++)
                rows[lane * d + c] = blocks[c * CODER_LANES + lane];
    }
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

static vf16 mul16(vf16 a, vf16 b)
{
    for (int i = 0; i < VF16_PARTS; i++)
        a.part[i] = vf_mul(a.part[i], b.part[i]);
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

static void row_norm(int d, ptrdiff_t count, const float *in, float *out, float *inverse)
{
    ptrdiff_t blocks = ceil_div(count, CODER_LANES);
    float last[CODER_LANES], size = (float)(count * d);
    tail_mask(count, last);
    vf16 sum = vf16_zero(), square = vf16_zero();
    for (ptrdiff_t b = 0; b < blocks; b++) {
        vf16 mask = vf16_load(b + 1 < blocks ? ones : last);
        for (int c = 0; c < d; c++)
            sum = vf16_fma(vf16_load(in + (b * d + c) * CODER_LANES), mask, sum);
    }
    vf16 mean = vf16_set1(vf16_sum(sum) / size);
    for (ptrdiff_t b = 0; b < blocks; b++) {
        vf16 mask = vf16_load(b + 1 < blocks ? ones : last);
        for (int c = 0; c < d; c++) {
            vf16 centred = sub16(vf16_load(in + (b * d + c) * CODER_LANES), mean);
            square = vf16_fma(mul16(centred, mask), centred, square);
        }
    }
    vf16 scale = inverse_root16(vf16_set1(vf16_sum(square) / size));
    for (ptrdiff_t i = 0; i < blocks * d; i++)
        vf16_store(out + i * CODER_LANES,
                   mul16(sub16(vf16_load(in + i * CODER_LANES), mean), scale));
    vf16_store(inverse, scale);
}

static void row_norm_backward(int d, ptrdiff_t count, const float *out, const float *inverse,
                              float *grad)
{
    ptrdiff_t blocks = ceil_div(count, CODER_LANES);
    float last[CODER_LANES], size = (float)(count * d);
    tail_mask(count, last);
    vf16 sum = vf16_zero(), product = vf16_zero(), scale = vf16_load(inverse);
    for (ptrdiff_t b = 0; b < blocks; b++) {
        vf16 mask = vf16_load(b + 1 < blocks ? ones : last);
        for (ptrdiff_t i = b * d; i < (b + 1) * d; i++) {
            vf16 g = mul16(vf16_load(grad + i * CODER_LANES), mask);
            sum = vf16_add(sum, g);
            product = vf16_fma(g, vf16_load(out + i * CODER_LANES), product);
        }
    }
    vf16 mean = vf16_set1(vf16_sum(sum) / size);
    vf16 slope = vf16_set1(-vf16_sum(product) / size);
    for (ptrdiff_t b = 0; b < blocks; b++) {
        vf16 mask = mul16(vf16_load(b + 1 < blocks ? ones : last), scale);
        for (ptrdiff_t i = b * d; i < (b + 1) * d; i++) {
            vf16 g = sub16(vf16_load(grad + i * CODER_LANES), mean);
            g = vf16_fma(slope, vf16_load(out + i * CODER_LANES), g);
            vf16_store(grad + i * CODER_LANES, mul16(g, mask));
        }
    }
}

static void lane_norm(int d, ptrdiff_t blocks, const float *in, float *out, float *inverse)
{
    vf16 part = vf16_set1(1.0f / (float)d);
    for (ptrdiff_t b = 0; b < blocks; b++, in += d * CODER_LANES, out += d * CODER_LANES) {
        vf16 sum = vf16_zero(), square = vf16_zero();
        for (int c = 0; c < d; c++)
            sum = vf16_add(sum, vf16_load(in + c * CODER_LANES));
        vf16 mean = mul16(sum, part);
        for (int c = 0; c < d; c++) {
            vf16 centred = sub16(vf16_load(in + c * CODER_LANES), mean);
            square = vf16_fma(centred, centred, square);
        }
        vf16 scale = inverse_root16(mul16(square, part));
        for (int c = 0; c < d; c++)
            vf16_store(out + c * CODER_LANES,
                       mul16(sub16(vf16_load(in + c * CODER_LANES), mean), scale));
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
        vf16 mean = mul16(sum, part), slope = mul16(product, minus_part);
        vf16 scale = vf16_load(inverse + b * CODER_LANES);
        for (int c = 0; c < d; c++) {
            vf16 g = sub16(vf16_load(grad + c * CODER_LANES), mean);
            g = vf16_fma(slope, vf16_load(out + c * CODER_LANES), g);
            vf16_store(grad + c * CODER_LANES, mul16(g, scale));
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

/* ---- the MLP --------------------------------------------------------------------------------- */

/* exp(x) for -85 <= x <= 0, relative error below 2e-7: 2^n times a polynomial on [-ln2/2, ln2/2]. */
PLLM_INLINE vf exp_negative(vf x)
{
    vf n = vf_rint(vf_mul(x, vf_set1(1.44269504f)));
    vf r = vf_fnma(n, vf_set1(0.693359375f), x);
    r = vf_fma(n, vf_set1(2.12194440e-4f), r);
    vf p = vf_set1(0.0013814539415761828f);
    p = vf_fma(p, r, vf_set1(0.00836874544620514f));
    p = vf_fma(p, r, vf_set1(0.04166838899254799f));
    p = vf_fma(p, r, vf_set1(0.1666652113199234f));
    p = vf_fma(p, r, vf_set1(0.4999999403953552f));
    p = vf_fma(p, r, vf_set1(1.0f));
    p = vf_fma(p, r, vf_set1(1.0f));
    return vf_bits(vi_add(vi_bits(p), vi_sll(vi_from_f(n), 23)));
}

/* gelu(x) = x Phi(x), Phi(x) = (1 + erf(x / sqrt 2)) / 2, and its slope Phi(x) + x phi(x).
 * For a = |x|: Phi(-a) = exp(-a^2/2) Q(t), t = 1 / (1 + 0.28 a), Q a minimax polynomial of degree 6
 * (error of Phi 2.2e-8 before rounding). */
PLLM_INLINE vf gelu(vf x, vf *slope)
{
    const vf far = vf_set1(12.5f); /* beyond it the tail is 0 in float32 */
    vf a = vf_min(vf_abs(x), far);
    vf e = exp_negative(vf_mul(vf_mul(a, a), vf_set1(-0.5f)));
    vf t = vf_div(vf_set1(1.0f), vf_fma(a, vf_set1(0.28f), vf_set1(1.0f)));
    vf q = vf_set1(-0.1044924184679985f);
    q = vf_fma(q, t, vf_set1(0.384618878364563f));
    q = vf_fma(q, t, vf_set1(-0.22867617011070251f));
    q = vf_fma(q, t, vf_set1(0.26239416003227234f));
    q = vf_fma(q, t, vf_set1(0.07002148777246475f));
    q = vf_fma(q, t, vf_set1(0.11613409966230392f));
    vf tail = vf_mul(vf_mul(q, t), e);
    vf phi = vf_select(vf_lt(x, vf_zero()), tail, vf_sub(vf_set1(1.0f), tail));
    x = vf_max(vf_neg(far), x);
    if (slope)
        *slope = vf_fma(vf_min(far, x), vf_mul(e, vf_set1(0.3989422804f)), phi);
    return vf_mul(x, phi);
}

static void gelu_block(int h, float *active, float *slope)
{
    if (!slope) {
        for (int i = 0; i < h * CODER_LANES; i += VF_WIDTH)
            vf_store(active + i, gelu(vf_load(active + i), NULL));
        return;
    }
    for (int i = 0; i < h * CODER_LANES; i += VF_WIDTH) {
        vf s;
        vf_store(active + i, gelu(vf_load(active + i), &s));
        vf_store(slope + i, s);
    }
}

/* out[o] = bias[o] + sum_i w[o * out_stride + i * in_stride] in[i] for `outs` outputs, 16 lanes. */
PLLM_INLINE void affine_tile(int outs, const float *w, int out_stride, int in_stride,
                             const float *bias, const float *in, int ins, float *out)
{
    vf16 sum[8];
    PLLM_UNROLL
    for (int o = 0; o < outs; o++)
        sum[o] = vf16_set1(bias ? bias[o] : 0.0f);
    for (int i = 0; i < ins; i++) {
        vf16 x = vf16_load(in + i * CODER_LANES);
        PLLM_UNROLL
        for (int o = 0; o < outs; o++)
            sum[o] = vf16_fma(vf16_set1(w[o * out_stride + i * in_stride]), x, sum[o]);
    }
    PLLM_UNROLL
    for (int o = 0; o < outs; o++)
        vf16_store(out + o * CODER_LANES, sum[o]);
}

enum { AFFINE_TILE = VF16_PARTS == 1 ? 8 : 4 };

static void affine(const float *w, int out_stride, int in_stride, const float *bias,
                   const float *in, int ins, int outs, float *out)
{
    int o = 0;
    for (; o + AFFINE_TILE <= outs; o += AFFINE_TILE)
        affine_tile(AFFINE_TILE, w + o * out_stride, out_stride, in_stride, bias ? bias + o : NULL,
                    in, ins, out + o * CODER_LANES);
    for (; o < outs; o++)
        affine_tile(1, w + o * out_stride, out_stride, in_stride, bias ? bias + o : NULL, in, ins,
                    out + o * CODER_LANES);
}

/* lane_grad[o][i] += sum over blocks of left[o] right[i], for a tile of `outs` by `ins` pairs and
 * the lanes of one vector. */
PLLM_INLINE void outer_tile(int outs, int ins, ptrdiff_t blocks, const float *left, int left_channels,
                            const float *right, int right_channels, float *lane_grad)
{
    vf sum[4][2];
    PLLM_UNROLL
    for (int o = 0; o < outs; o++)
        PLLM_UNROLL
        for (int i = 0; i < ins; i++)
            sum[o][i] = vf_load(lane_grad + (o * right_channels + i) * CODER_LANES);
    for (ptrdiff_t b = 0; b < blocks; b++) {
        const float *l = left + b * left_channels * CODER_LANES;
        const float *r = right + b * right_channels * CODER_LANES;
        vf x[2];
        PLLM_UNROLL
        for (int i = 0; i < ins; i++)
            x[i] = vf_load(r + i * CODER_LANES);
        PLLM_UNROLL
        for (int o = 0; o < outs; o++) {
            vf y = vf_load(l + o * CODER_LANES);
            PLLM_UNROLL
            for (int i = 0; i < ins; i++)
                sum[o][i] = vf_fma(y, x[i], sum[o][i]);
        }
    }
    PLLM_UNROLL
    for (int o = 0; o < outs; o++)
        PLLM_UNROLL
        for (int i = 0; i < ins; i++)
            vf_store(lane_grad + (o * right_channels + i) * CODER_LANES, sum[o][i]);
}

/* lane_grad (outs, ins, 16) += sum over blocks of left (outs) times right (ins), lane by lane. */
static void outer(ptrdiff_t blocks, const float *left, int outs, const float *right, int ins,
                  float *lane_grad)
{
    for (int part = 0; part < CODER_LANES; part += VF_WIDTH) {
        for (int o = 0; o < outs;) {
            int four = o + 4 <= outs;
            const float *l = left + o * CODER_LANES + part;
            float *g = lane_grad + o * ins * CODER_LANES + part;
            int i = 0;
            for (; i + 2 <= ins && four; i += 2)
                outer_tile(4, 2, blocks, l, outs, right + i * CODER_LANES + part, ins,
                           g + i * CODER_LANES);
            for (; i < ins && four; i++)
                outer_tile(4, 1, blocks, l, outs, right + i * CODER_LANES + part, ins,
                           g + i * CODER_LANES);
            for (; i + 2 <= ins; i += 2)
                outer_tile(1, 2, blocks, l, outs, right + i * CODER_LANES + part, ins,
                           g + i * CODER_LANES);
            for (; i < ins; i++)
                outer_tile(1, 1, blocks, l, outs, right + i * CODER_LANES + part, ins,
                           g + i * CODER_LANES);
            o += four ? 4 : 1;
        }
    }
}

static void sum_blocks(ptrdiff_t blocks, const float *grad, int channels, float *lane_grad)
{
    for (int c = 0; c < channels; c++) {
        vf16 sum = vf16_load(lane_grad + c * CODER_LANES);
        for (ptrdiff_t b = 0; b < blocks; b++)
            sum = vf16_add(sum, vf16_load(grad + (b * channels + c) * CODER_LANES));
        vf16_store(lane_grad + c * CODER_LANES, sum);
    }
}

void PLLM_SYM(coder_mlp)(int d, int h, ptrdiff_t blocks, const float *params, const mlp_tape *tape,
                         int train, float *out)
{
    const float *w1 = params, *b1 = w1 + h * d, *w2 = b1 + h, *b2 = w2 + d * h;
    for (ptrdiff_t b = 0; b < blocks; b++) {
        float *active = tape->active + b * h * CODER_LANES;
        affine(w1, d, 1, b1, tape->in + b * d * CODER_LANES, d, h, active);
        gelu_block(h, active, train ? tape->slope + b * h * CODER_LANES : NULL);
        affine(w2, h, 1, b2, active, h, d, out + b * d * CODER_LANES);
    }
}

void PLLM_SYM(coder_mlp_backward)(int d, int h, ptrdiff_t blocks, const float *params,
                                  const mlp_tape *tape, const float *grad_out, float *hidden,
                                  float *lane_grad, float *grad_in)
{
    const float *w1 = params, *w2 = w1 + h * d + h;
    for (ptrdiff_t b = 0; b < blocks; b++) {
        float *g = hidden + b * h * CODER_LANES;
        const float *slope = tape->slope + b * h * CODER_LANES;
        affine(w2, 1, h, NULL, grad_out + b * d * CODER_LANES, d, h, g);
        for (int i = 0; i < h * CODER_LANES; i += VF_WIDTH)
            vf_store(g + i, vf_mul(vf_load(g + i), vf_load(slope + i)));
        if (grad_in)
            affine(w1, 1, d, NULL, g, h, d, grad_in + b * d * CODER_LANES);
    }
    float *g1 = lane_grad, *gb1 = g1 + h * d * CODER_LANES, *g2 = gb1 + h * CODER_LANES;
    outer(blocks, hidden, h, tape->in, d, g1);
    sum_blocks(blocks, hidden, h, gb1);
    outer(blocks, grad_out, d, tape->active, h, g2);
    sum_blocks(blocks, grad_out, d, g2 + d * h * CODER_LANES);
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
                                     s->grad, s->hidden,
                                     lane_grad + i * p->mlp_floats * CODER_LANES, s->spare);
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
    PLLM_SYM(coder_mlp_backward)(p->d, p->h, blocks, params, &tape->mlp[0], s->grad, s->hidden,
                                 lane_grad, want_input ? s->spare : NULL);
    if (want_input)
        memcpy(s->grad, s->spare, (size_t)(blocks * p->d) * CODER_LANES * sizeof *s->grad);
}

void PLLM_SYM(coder_decode_backward)(const coder_plan *p, ptrdiff_t count, const float *params,
                                     const coder_tape *tape, const coder_scratch *s, float *lane_grad)
{
    ptrdiff_t blocks = ceil_div(count, CODER_LANES);
    PLLM_SYM(coder_mlp_backward)(p->d, p->h, blocks, params, &tape->mlp[0], s->grad, s->hidden,
                                 lane_grad, s->spare);
    memcpy(s->grad, s->spare, (size_t)(blocks * p->d) * CODER_LANES * sizeof *s->grad);
    residual_pair_backward(p, count, params, tape, s, lane_grad);
}

void PLLM_SYM(coder_sum_lanes)(const float *lane_grad, ptrdiff_t params, float *partial)
{
    for (ptrdiff_t i = 0; i < params; i++)
        partial[i] = vf16_sum(vf16_load(lane_grad + i * CODER_LANES));
}

void PLLM_SYM(coder_sum_chunks)(const float *partial, ptrdiff_t chunks, ptrdiff_t params, float *grad)
{
    for (ptrdiff_t i = 0; i < params; i++) {
        double sum = 0.0;
        for (ptrdiff_t c = 0; c < chunks; c++)
            sum += (double)partial[c * params + i];
        grad[i] = (float)sum;
    }
}
