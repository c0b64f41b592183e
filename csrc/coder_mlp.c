/* coder_mlp.c - one MLP of an encoder or decoder on one unit: W2 gelu(W1 x + b1) + b2, forwards and
 * backwards. See coder.h for the layout. */
#include "coder.h"

/* gelu(x) = x Phi(x), Phi(x) = (1 + erf(x / sqrt 2)) / 2, and its slope Phi(x) + x phi(x).
 *
 * With a = |x| and m = Phi(-a) / phi(a), the Mills ratio, both need one density phi(a):
 *     gelu = max(x, 0) - a m phi(a),   slope = 1/2 + (1/2 + (a - m) phi(a)), the latter with the sign of x.
 * m is a quotient of polynomials (error of m phi 1e-8), independent of phi until the last step, so that
 * the division and the exponential run side by side. phi(a) = 2^n p(r) with n + r = -a^2 log2(e) / 2,
 * n whole and |r| <= 1/2, p a minimax polynomial (relative error 8e-8): adding `rounding` leaves n in
 * the low bits of a float, from where a shift brings it into the exponent. NaN gives NaN. */
PLLM_INLINE vf gelu(vf x, vf *slope)
{
    const vf far = vf_set1(12.5f); /* beyond it phi is below 5e-35 */
    const vf rounding = vf_set1(12582912.0f), rate = vf_set1(-0.72134752f);
    const vf a = vf_min(far, vf_abs(x)), square = vf_mul(a, a);
    const vf t = vf_fma(square, rate, rounding);
    const vf r = vf_fma(square, rate, vf_sub(rounding, t));

    vf over = vf_add(a, vf_set1(6.129040319720639f));
    over = vf_fma(over, a, vf_set1(14.290408917583774f));
    over = vf_fma(over, a, vf_set1(12.247221785446879f));
    vf m = vf_fma(a, vf_set1(1.094055436221772f), vf_set1(5.727769414801335f));
    m = vf_fma(m, a, vf_set1(15.405017849280608f));
    m = vf_sub(vf_div(m, over), vf_set1(0.004523585348798761f));

    vf p = vf_fma(r, vf_set1(0.0005296545628717614f), vf_set1(0.003859982521027749f));
    p = vf_fma(p, r, vf_set1(0.022144142123704722f));
    p = vf_fma(p, r, vf_set1(0.0958343922278122f));
    p = vf_fma(p, r, vf_set1(0.27652563169342553f));
    p = vf_fma(p, r, vf_set1(0.39894230898749233f));
    const vf phi = vf_bits(vi_add(vi_bits(p), vi_sll(vi_bits(t), 23)));

    if (slope) {
        const vf half = vf_set1(0.5f);
        *slope = vf_fma(vf_fma(vf_sub(a, m), phi, half), vf_sign(x), half);
    }
    return vf_fnma(vf_mul(a, m), phi, vf_max(vf_zero(), x));
}

/* active = gelu(active), and its slope unless that is NULL. */
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

/* ---- products -------------------------------------------------------------------------------- */

/* Sums that are made side by side, enough to hide the latency of a multiply-add: of as many outputs, or of few outputs
 * and several blocks. */
enum { AFFINE_SUMS = VF16_PARTS == 1 ? 8 : 4, MOST_TOGETHER = AFFINE_SUMS / 2 };

/* Blocks that are worked on together where d is the number of outputs. */
PLLM_INLINE int blocks_together(int d) { return d >= AFFINE_SUMS ? 1 : d >= AFFINE_SUMS / 2 ? 2 : MOST_TOGETHER; }

/* A matrix with its steps from one output to the next and from one input to the next. bias: one value an
 * output, or NULL. */
typedef struct {
    const float *w, *bias;
    int out_stride, in_stride;
} matrix;

/* `outs` outputs from o on of `together` blocks. */
PLLM_INLINE void affine_tile(int outs, int together, const matrix *m, int o, int all_outs, const float *in, int ins,
                             const float *factor, float *out)
{
    const float *w = m->w + o * m->out_stride;
    vf16 sum[AFFINE_SUMS];
    PLLM_UNROLL
    for (int j = 0; j < outs * together; j++)
        sum[j] = vf16_set1(m->bias ? m->bias[o + j / together] : 0.0f);
    for (int i = 0; i < ins; i++) {
        vf16 x[MOST_TOGETHER];
        PLLM_UNROLL
        for (int b = 0; b < together; b++)
            x[b] = vf16_load(in + (b * ins + i) * CODER_LANES);
        PLLM_UNROLL
        for (int j = 0; j < outs; j++) {
            const vf16 weight = vf16_set1(w[j * m->out_stride + i * m->in_stride]);
            PLLM_UNROLL
            for (int b = 0; b < together; b++)
                sum[j * together + b] = vf16_fma(weight, x[b], sum[j * together + b]);
        }
    }
    PLLM_UNROLL
    for (int j = 0; j < outs * together; j++) {
        const int at = (j % together * all_outs + o + j / together) * CODER_LANES;
        vf16_store(out + at, factor ? vf16_mul(sum[j], vf16_load(factor + at)) : sum[j]);
    }
}

/* out = M in + bias for `together` blocks, each value times the one in factor unless that is NULL. */
PLLM_INLINE void affine(int together, const matrix *m, const float *in, int ins, int outs, const float *factor,
                        float *out)
{
    const int tile = AFFINE_SUMS / together;
    int o = 0;
    for (; o + tile <= outs; o += tile)
        affine_tile(tile, together, m, o, outs, in, ins, factor, out);
    for (; tile > 2 && o + 2 <= outs; o += 2)
        affine_tile(2, together, m, o, outs, in, ins, factor, out);
    if (o < outs)
        affine_tile(1, together, m, o, outs, in, ins, factor, out);
}

enum { FEW = 4 };

/* The inputs of one block, at most FEW, in registers. */
typedef struct {
    vf16 value[FEW];
} few_inputs;

PLLM_INLINE few_inputs load_few(const float *in, int ins)
{
    few_inputs x;
    PLLM_UNROLL
    for (int i = 0; i < ins; i++)
        x.value[i] = vf16_load(in + i * CODER_LANES);
    return x;
}

/* affine without a factor: each weight is read once for all lanes, each input once for all outputs. */
PLLM_INLINE void affine_few(const matrix *m, const float *in, int ins, int outs, float *out)
{
    const few_inputs x = load_few(in, ins);
    for (int o = 0; o < outs; o++) {
        const float *w = m->w + o * m->out_stride;
        vf16 sum = vf16_set1(m->bias[o]);
        PLLM_UNROLL
        for (int i = 0; i < ins; i++)
            sum = vf16_fma(vf16_set1(w[i * m->in_stride]), x.value[i], sum);
        vf16_store(out + o * CODER_LANES, sum);
    }
}

/* Each value of out times what affine without a bias gives. */
PLLM_INLINE void linear_few(const matrix *m, const float *in, int ins, int outs, float *out)
{
    const few_inputs x = load_few(in, ins);
    for (int o = 0; o < outs; o++) {
        const float *w = m->w + o * m->out_stride;
        vf16 sum = vf16_mul(vf16_set1(w[0]), x.value[0]);
        PLLM_UNROLL
        for (int i = 1; i < ins; i++)
            sum = vf16_fma(vf16_set1(w[i * m->in_stride]), x.value[i], sum);
        vf16_store(out + o * CODER_LANES, vf16_mul(sum, vf16_load(out + o * CODER_LANES)));
    }
}

/* ---- gradients of the weights ---------------------------------------------------------------- */

/* Channels of a unit: channel c of block b is at [(b * channels + c) * 16]. */
typedef struct {
    const float *values;
    int channels;
} channel_blocks;

/* lane_grad[i * i_step + j * j_step] += sum over blocks of left[i] right[j] for a tile of `is` by `js`
 * pairs; the lanes of one vector. Steps are in floats. */
PLLM_INLINE void outer_tile(int is, int js, ptrdiff_t blocks, channel_blocks left,
                            channel_blocks right, float *lane_grad, ptrdiff_t i_step,
                            ptrdiff_t j_step)
{
    vf sum[4][4];
    PLLM_UNROLL
    for (int i = 0; i < is; i++) {
        PLLM_UNROLL
        for (int j = 0; j < js; j++)
            sum[i][j] = vf_load(lane_grad + i * i_step + j * j_step);
    }
    const float *l = left.values, *r = right.values;
    for (ptrdiff_t b = 0; b < blocks; b++) {
        vf x[4];
        PLLM_UNROLL
        for (int i = 0; i < is; i++)
            x[i] = vf_load(l + i * CODER_LANES);
        PLLM_UNROLL
        for (int j = 0; j < js; j++) {
            const vf y = vf_load(r + j * CODER_LANES);
            PLLM_UNROLL
            for (int i = 0; i < is; i++)
                sum[i][j] = vf_fma(x[i], y, sum[i][j]);
        }
        l += left.channels * CODER_LANES;
        r += right.channels * CODER_LANES;
    }
    PLLM_UNROLL
    for (int i = 0; i < is; i++) {
        PLLM_UNROLL
        for (int j = 0; j < js; j++)
            vf_store(lane_grad + i * i_step + j * j_step, sum[i][j]);
    }
}

/* The same for `is` channels of left and all of right, and all lanes. */
PLLM_INLINE void outer_strip(int is, ptrdiff_t blocks, channel_blocks left, channel_blocks right,
                             float *lane_grad, ptrdiff_t i_step, ptrdiff_t j_step)
{
    for (int part = 0; part < CODER_LANES; part += VF_WIDTH) {
        const channel_blocks l = {left.values + part, left.channels};
        for (int j = 0; j < right.channels;) {
            const int rest = right.channels - j, js = rest >= 4 ? 4 : rest >= 2 ? 2 : 1;
            const channel_blocks r = {right.values + j * CODER_LANES + part, right.channels};
            float *grad = lane_grad + j * j_step + part;
            if (js == 4)
                outer_tile(is, 4, blocks, l, r, grad, i_step, j_step);
            else if (js == 2)
                outer_tile(is, 2, blocks, l, r, grad, i_step, j_step);
            else
                outer_tile(is, 1, blocks, l, r, grad, i_step, j_step);
            j += js;
        }
    }
}

/* The same for all channels. Three at a time keep twelve sums in sixteen registers, enough to hide the
 * latency of a multiply-add; the last four go as twice two. Thirty-two registers have room for four at a time. */
PLLM_INLINE void outer(ptrdiff_t blocks, channel_blocks left, channel_blocks right,
                       float *lane_grad, ptrdiff_t i_step, ptrdiff_t j_step)
{
    for (int i = 0; i < left.channels;) {
        const int rest = left.channels - i;
        const int is = VF16_PARTS == 1 && rest >= 4 ? 4 : rest == 4 || rest == 2 ? 2 : rest == 1 ? 1 : 3;
        const channel_blocks l = {left.values + i * CODER_LANES, left.channels};
        float *grad = lane_grad + i * i_step;
        if (is == 4)
            outer_strip(4, blocks, l, right, grad, i_step, j_step);
        else if (is == 3)
            outer_strip(3, blocks, l, right, grad, i_step, j_step);
        else if (is == 2)
            outer_strip(2, blocks, l, right, grad, i_step, j_step);
        else
            outer_strip(1, blocks, l, right, grad, i_step, j_step);
        i += is;
    }
}

/* lane_grad[c] += sum over blocks of channel c, for `count` channels from one on. */
PLLM_INLINE void sum_channels(int count, ptrdiff_t blocks, channel_blocks from, float *lane_grad)
{
    vf16 sum[4];
    PLLM_UNROLL
    for (int c = 0; c < count; c++)
        sum[c] = vf16_load(lane_grad + c * CODER_LANES);
    for (ptrdiff_t b = 0; b < blocks; b++) {
        const float *block = from.values + b * from.channels * CODER_LANES;
        PLLM_UNROLL
        for (int c = 0; c < count; c++)
            sum[c] = vf16_add(sum[c], vf16_load(block + c * CODER_LANES));
    }
    PLLM_UNROLL
    for (int c = 0; c < count; c++)
        vf16_store(lane_grad + c * CODER_LANES, sum[c]);
}

/* The same for all channels; four at a time hide the latency of an addition. */
PLLM_INLINE void sum_blocks(ptrdiff_t blocks, channel_blocks from, float *lane_grad)
{
    for (int c = 0; c < from.channels;) {
        const channel_blocks rest = {from.values + c * CODER_LANES, from.channels};
        const int four = c + 4 <= from.channels;
        if (four)
            sum_channels(4, blocks, rest, lane_grad + c * CODER_LANES);
        else
            sum_channels(1, blocks, rest, lane_grad + c * CODER_LANES);
        c += four ? 4 : 1;
    }
}

/* ---- the MLP --------------------------------------------------------------------------------- */

/* The parameters of an MLP and its sizes. few: 1 where d is a constant of at most FEW. */
typedef struct {
    int d, few, h;
    matrix first, second;
} mlp;

/* `together` blocks. slope: NULL unless training. */
PLLM_INLINE void forward_blocks(int together, const mlp *m, const float *in, float *active, float *slope, float *out)
{
    const int d = m->d, h = m->h;
    for (int b = 0; b < together; b++)
        if (m->few)
            affine_few(&m->first, in + b * d * CODER_LANES, d, h, active + b * h * CODER_LANES);
        else
            affine(1, &m->first, in + b * d * CODER_LANES, d, h, NULL, active + b * h * CODER_LANES);
    gelu_block(together * h, active, slope);
    affine(together, &m->second, active, h, d, NULL, out);
}

/* few: as in mlp.  together: a constant, see blocks_together. */
PLLM_INLINE void forward(int d, int few, int together, int h, ptrdiff_t blocks, const float *params,
                         const mlp_tape *tape, int train, float *out)
{
    const float *w1 = params, *b1 = w1 + h * d, *w2 = b1 + h, *b2 = w2 + d * h;
    const mlp m = {d, few, h, {w1, b1, d, 1}, {w2, b2, h, 1}};
    for (ptrdiff_t b = 0; b < blocks;) {
        const ptrdiff_t at_d = b * d * CODER_LANES, at_h = b * h * CODER_LANES;
        float *const slope = train ? tape->slope + at_h : NULL;
        if (b + together <= blocks) {
            forward_blocks(together, &m, tape->in + at_d, tape->active + at_h, slope, out + at_d);
            b += together;
        } else {
            forward_blocks(1, &m, tape->in + at_d, tape->active + at_h, slope, out + at_d);
            b++;
        }
    }
}

/* The gradients of `together` blocks' hidden layers, in place of gelu's slopes, and of their inputs unless grad_in is
 * NULL. */
PLLM_INLINE void backward_blocks(int together, const mlp *m, const float *grad, float *slope, float *grad_in)
{
    const int d = m->d, h = m->h;
    for (int b = 0; b < together; b++) {
        const ptrdiff_t at_d = b * d * CODER_LANES, at_h = b * h * CODER_LANES;
        if (m->few)
            linear_few(&m->second, grad + at_d, d, h, slope + at_h);
        else
            affine(1, &m->second, grad + at_d, d, h, slope + at_h, slope + at_h);
    }
    if (grad_in)
        affine(together, &m->first, slope, h, d, NULL, grad_in);
}

/* few, together: as in forward. */
PLLM_INLINE void backward(int d, int few, int together, int h, ptrdiff_t blocks, const float *params,
                          const mlp_tape *tape, const float *grad_out, float *lane_grad,
                          float *grad_in)
{
    const float *w1 = params, *w2 = w1 + h * d + h;
    const mlp m = {d, few, h, {w1, NULL, 1, d}, {w2, NULL, 1, h}};
    for (ptrdiff_t b = 0; b < blocks;) {
        const ptrdiff_t at_d = b * d * CODER_LANES, at_h = b * h * CODER_LANES;
        float *const grad_here = grad_in ? grad_in + at_d : NULL;
        if (b + together <= blocks) {
            backward_blocks(together, &m, grad_out + at_d, tape->slope + at_h, grad_here);
            b += together;
        } else {
            backward_blocks(1, &m, grad_out + at_d, tape->slope + at_h, grad_here);
            b++;
        }
    }
    float *g1 = lane_grad, *gb1 = g1 + h * d * CODER_LANES, *g2 = gb1 + h * CODER_LANES;
    const channel_blocks outs = {grad_out, d}, ins = {tape->in, d}, inner = {tape->slope, h};
    outer(blocks, inner, ins, g1, d * CODER_LANES, CODER_LANES);
    sum_blocks(blocks, inner, gb1);
    outer(blocks, (channel_blocks){tape->active, h}, outs, g2, CODER_LANES, h * CODER_LANES);
    sum_blocks(blocks, outs, g2 + d * h * CODER_LANES);
}

/* The common sizes of a sub-vector are constants to the compiler. */
void PLLM_SYM(coder_mlp)(int d, int h, ptrdiff_t blocks, const float *params, const mlp_tape *tape,
                         int train, float *out)
{
    if (d == 2)
        forward(2, 1, blocks_together(2), h, blocks, params, tape, train, out);
    else if (d == 4)
        forward(4, 1, blocks_together(4), h, blocks, params, tape, train, out);
    else if (d == 8)
        forward(8, 0, blocks_together(8), h, blocks, params, tape, train, out);
    else
        forward(d, 0, 1, h, blocks, params, tape, train, out);
}

void PLLM_SYM(coder_mlp_backward)(int d, int h, ptrdiff_t blocks, const float *params,
                                  const mlp_tape *tape, const float *grad_out, float *lane_grad,
                                  float *grad_in)
{
    if (d == 2)
        backward(2, 1, blocks_together(2), h, blocks, params, tape, grad_out, lane_grad, grad_in);
    else if (d == 4)
        backward(4, 1, blocks_together(4), h, blocks, params, tape, grad_out, lane_grad, grad_in);
    else if (d == 8)
        backward(8, 0, blocks_together(8), h, blocks, params, tape, grad_out, lane_grad, grad_in);
    else
        backward(d, 0, 1, h, blocks, params, tape, grad_out, lane_grad, grad_in);
}
