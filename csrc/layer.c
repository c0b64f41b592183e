/* layer.c - one token through a decoder layer whose matrices are compressed: everything between the
 * products, which are those of pllm_matmul; matrices that meet the same values multiply them together. Compiled once per instruction set.
 *
 * A token's work outside the products is small, but as operators of a framework it is some seventy calls a
 * layer, which cost more than they compute. */
#include <omp.h>

#include "infer.h"

enum {
    LANES = 16,
    DOT_ROWS = 8,           /* keys whose scores are added up over their lanes together, */
    ABREAST = 4,            /* of which a query meets so many at the same time */
    ADD_LANES = 64,         /* values of a row that are added at the same time */
    BLOCK_TOKENS = 32       /* keys or values that are in the first-level cache at a time */
};

static ptrdiff_t whole_lanes(ptrdiff_t n) { return (n + LANES - 1) / LANES * LANES; }

/* Root mean square norm (arXiv 1910.07467, equation 4). out may be x. */
static void rms_norm(const float *x, const float *weight, ptrdiff_t n, float epsilon, float *out)
{
    const ptrdiff_t whole = n / LANES * LANES;
    vf16 squares = vf16_zero();
    for (ptrdiff_t i = 0; i < whole; i += LANES)
        squares = vf16_fma(vf16_load(x + i), vf16_load(x + i), squares);
    const vf16 rest = vf16_load_part(x + whole, (int)(n - whole));
    const float mean = vf16_sum(vf16_fma(rest, rest, squares)) / (float)n;
    const float inverse = 1.0f / sqrtf(mean + epsilon);
    for (ptrdiff_t i = 0; i < n; i++)
        out[i] = weight[i] * (x[i] * inverse);
}

/* Rotary position embedding in place: value i of a head is turned with value i + width / 2 (arXiv
 * 2104.09864, in the order in which checkpoints of Llama have them).  x: (heads, width). */
static void rotate(float *x, ptrdiff_t heads, ptrdiff_t width, const float *cosine, const float *sine)
{
    const ptrdiff_t half = width / 2;
    for (float *const end = x + heads * width; x < end; x += width) {
        for (ptrdiff_t i = 0; i < half; i++) {
            const float a = x[i], b = x[half + i];
            x[i] = a * cosine[i] - b * sine[i];
            x[half + i] = b * cosine[half + i] + a * sine[half + i];
        }
    }
}

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

/* gate = gate sigmoid(gate) up.  n: a multiple of LANES. */
static void gate_values(float *gate, const float *up, ptrdiff_t n)
{
    const vf one = vf_set1(1.0f), least = vf_set1(-85.0f);
    for (ptrdiff_t i = 0; i < n; i += VF_WIDTH) {
        const vf x = vf_load(gate + i);
        const vf e = exp_negative(vf_max(least, vf_neg(vf_abs(x))));
        const vf share = vf_select(vf_lt(x, vf_zero()), e, one);
        const vf active = vf_div(vf_mul(x, share), vf_add(one, e));
        vf_store(gate + i, vf_mul(active, vf_load(up + i)));
    }
}

/* ---- attention ------------------------------------------------------------------------------- */

/* n values from `start` on as float32: in place, or widened into buffer. */
static const float *as_floats(const void *values, int is_bfloat16, ptrdiff_t start, ptrdiff_t n,
                              float *buffer)
{
    if (!is_bfloat16)
        return (const float *)values + start;
    PLLM_SYM(pllm_widen)((const uint16_t *)values + start, n, buffer);
    return buffer;
}

/* dot (DOT_ROWS) = the products of q with as many rows (count, width); behind the last row, the last's. */
static void dot_rows(const float *q, const float *rows, ptrdiff_t count, ptrdiff_t width, float *dot)
{
    const ptrdiff_t whole = width / LANES * LANES;
    const int rest = (int)(width - whole);
    vf16 sum[DOT_ROWS];
    for (int first = 0; first < DOT_ROWS; first += ABREAST) {
        const float *row[ABREAST];
        vf16 here[ABREAST];
        PLLM_UNROLL
        for (int r = 0; r < ABREAST; r++) {
            row[r] = rows + (first + r < count ? first + r : count - 1) * width;
            here[r] = vf16_zero();
        }
        for (ptrdiff_t i = 0; i < whole; i += LANES) {
            const vf16 part = vf16_load(q + i);
            PLLM_UNROLL
            for (int r = 0; r < ABREAST; r++)
                here[r] = vf16_fma(part, vf16_load(row[r] + i), here[r]);
        }
        for (int r = 0; r < ABREAST; r++) {
            if (rest)
                here[r] = vf16_fma(vf16_load_part(q + whole, rest), vf16_load_part(row[r] + whole, rest), here[r]);
            sum[first + r] = here[r];
        }
    }
    vf16_sum8(dot, sum);
}

/* out (lanes) += sum over t of share[t] rows[t], in the order of t.  lanes: a multiple of LANES, a constant. */
PLLM_INLINE void add_columns(const float *share, const float *rows, ptrdiff_t count, ptrdiff_t width, int lanes,
                             float *out)
{
    vf16 sum[ADD_LANES / LANES];
    PLLM_UNROLL
    for (int i = 0; i < lanes / LANES; i++)
        sum[i] = vf16_load(out + i * LANES);
    for (ptrdiff_t t = 0; t < count; t++, rows += width) {
        const vf16 factor = vf16_set1(share[t]);
        PLLM_UNROLL
        for (int i = 0; i < lanes / LANES; i++)
            sum[i] = vf16_fma(factor, vf16_load(rows + i * LANES), sum[i]);
    }
    PLLM_UNROLL
    for (int i = 0; i < lanes / LANES; i++)
        vf16_store(out + i * LANES, sum[i]);
}

/* The same for rows of any width. */
static void add_rows(const float *share, const float *rows, ptrdiff_t count, ptrdiff_t width, float *out)
{
    ptrdiff_t c = 0;
    for (; c + ADD_LANES <= width; c += ADD_LANES)
        add_columns(share, rows + c, count, width, ADD_LANES, out + c);
    for (; c + LANES <= width; c += LANES)
        add_columns(share, rows + c, count, width, LANES, out + c);
    for (; c < width; c++)
        for (ptrdiff_t t = 0; t < count; t++)
            out[c] = fmaf(share[t], rows[t * width + c], out[c]);
}

/* score = exp(scale (score - the largest)), zeros behind the last; returns 1 / their sum.
 * score: whole_lanes(length).  scale: positive. */
static float exponentials(float *score, ptrdiff_t length, float scale)
{
    const ptrdiff_t padded = whole_lanes(length);
    for (ptrdiff_t t = length; t < padded; t++)
        score[t] = score[0];
    vf lowest = vf_set1(INFINITY);
    for (ptrdiff_t t = 0; t < padded; t += VF_WIDTH)
        lowest = vf_min(vf_neg(vf_load(score + t)), lowest); /* a NaN score leaves it as it is */
    const vf top = vf_set1(-vf_lowest(lowest)), factor = vf_set1(scale), least = vf_set1(-85.0f);
    for (ptrdiff_t t = 0; t < padded; t += VF_WIDTH) {
        const vf below = vf_mul(factor, vf_sub(vf_load(score + t), top));
        vf_store(score + t, exp_negative(vf_max(least, below)));
    }
    vf16 sum = vf16_zero();
    for (ptrdiff_t t = length; t < padded; t++)
        score[t] = 0.0f;
    for (ptrdiff_t t = 0; t < padded; t += LANES)
        sum = vf16_add(sum, vf16_load(score + t));
    return 1.0f / vf16_sum(sum);
}

/* The query heads that share one head of keys.  q, out: (group, width).  length: with the token itself.
 * scratch: BLOCK_TOKENS * width + group * (whole_lanes(length) + 1) floats. */
static void attend_group(const float *q, ptrdiff_t group, ptrdiff_t width, float scale, const pllm_past *p,
                         ptrdiff_t length, ptrdiff_t kv_head, float *out, float *scratch)
{
    const ptrdiff_t padded = whole_lanes(length), start = kv_head * p->room * width;
    float *const block = scratch, *const score = scratch + BLOCK_TOKENS * width;
    float *const inverse = score + group * padded;
    for (ptrdiff_t first = 0; first < length; first += BLOCK_TOKENS) {
        const ptrdiff_t left = length - first, count = left < BLOCK_TOKENS ? left : BLOCK_TOKENS;
        const float *keys =
            as_floats(p->keys, p->is_bfloat16, start + first * width, count * width, block);
        for (ptrdiff_t h = 0; h < group; h++)
            for (ptrdiff_t t = 0; t < count; t += DOT_ROWS)
                dot_rows(q + h * width, keys + t * width, count - t, width,
                         score + h * padded + first + t);
    }
    memset(out, 0, (size_t)(group * width) * sizeof *out);
    for (ptrdiff_t h = 0; h < group; h++)
        inverse[h] = exponentials(score + h * padded, length, scale);
    for (ptrdiff_t first = 0; first < length; first += BLOCK_TOKENS) {
        const ptrdiff_t left = length - first, count = left < BLOCK_TOKENS ? left : BLOCK_TOKENS;
        const float *values =
            as_floats(p->values, p->is_bfloat16, start + first * width, count * width, block);
        for (ptrdiff_t h = 0; h < group; h++)
            add_rows(score + h * padded + first, values, count, width, out + h * width);
    }
    for (ptrdiff_t h = 0; h < group; h++)
        for (ptrdiff_t c = 0; c < width; c++)
            out[h * width + c] *= inverse[h];
}

/* out = the heads' attention to the past and the token itself. */
static int attend(const pllm_layer *l, const float *q, const pllm_past *p, float *out, int threads)
{
    const ptrdiff_t width = l->head_width, length = p->length + 1;
    const ptrdiff_t kv_heads = l->matrix[PLLM_LAYER_K].out_features / width;
    const ptrdiff_t group = l->matrix[PLLM_LAYER_Q].out_features / width / kv_heads;
    const ptrdiff_t floats = whole_lanes(BLOCK_TOKENS * width + group * (whole_lanes(length) + 1));
    const ptrdiff_t most = 1 + 2 * kv_heads * group * width * length / WORK_PER_THREAD;
    const int used = most < threads ? (int)most : threads;
    float *const scratch = pllm_alloc_floats((size_t)(floats * used));
    if (!scratch)
        return PLLM_ENOMEM;
#pragma omp parallel for num_threads(used) schedule(static) if (used > 1)
    for (ptrdiff_t g = 0; g < kv_heads; g++)
        attend_group(q + g * group * width, group, width, l->scale, p, length, g, out + g * group * width,
                     scratch + floats * omp_get_thread_num());
    free(scratch);
    return PLLM_OK;
}

/* ---- the layer ------------------------------------------------------------------------------- */

/* y[i] = the product of x with matrix first + i, for `count` matrices. */
static int multiply(const pllm_layer *l, int first, int count, const float *x, float *const *y,
                    enum pllm_activations activations, int threads)
{
    pllm_product p[INFER_TOGETHER];
    for (int i = 0; i < count; i++)
        p[i] = (pllm_product){&l->matrix[first + i], x, 1, l->bias[first + i], y[i], PLLM_FLOAT32};
    return PLLM_SYM(infer_multiply)(p, count, activations, threads);
}

/* Norms of heads and positions, of queries or keys.  x: (heads, head_width). */
static void turn(const pllm_layer *l, int which, const float *cosine, const float *sine, float *x)
{
    const ptrdiff_t width = l->head_width, heads = l->matrix[which].out_features / width;
    for (ptrdiff_t h = 0; l->head_norm[which] && h < heads; h++)
        rms_norm(x + h * width, l->head_norm[which], width, l->epsilon, x + h * width);
    rotate(x, heads, width, cosine, sine);
}

/* The token's keys or values (kv heads, head_width) behind those of the past. */
static void keep(const pllm_layer *l, const pllm_past *p, const float *made, void *all)
{
    const ptrdiff_t width = l->head_width, heads = l->matrix[PLLM_LAYER_K].out_features / width;
    for (ptrdiff_t h = 0; h < heads; h++, made += width) {
        const ptrdiff_t at = (h * p->room + p->length) * width;
        if (p->is_bfloat16)
            PLLM_SYM(pllm_narrow)(made, width, (uint16_t *)all + at);
        else
            memcpy((float *)all + at, made, (size_t)width * sizeof *made);
    }
}

/* y = x + O attention(Q n0(x), K n0(x), V n0(x)). */
static int add_attention(const pllm_layer *l, const float *x, const float *cosine, const float *sine,
                         const pllm_past *past, float *y, enum pllm_activations activations, int threads)
{
    const pllm_matrix *const m = l->matrix;
    const ptrdiff_t width = m[PLLM_LAYER_Q].in_features, joined = m[PLLM_LAYER_Q].out_features;
    const ptrdiff_t made = m[PLLM_LAYER_K].out_features;
    float *const normed = pllm_alloc_floats((size_t)(width + 2 * joined + 2 * made));
    if (!normed)
        return PLLM_ENOMEM;
    float *const q = normed + width, *const mixed = q + joined, *const k = mixed + joined, *const v = k + made;
    rms_norm(x, l->norm[0], width, l->epsilon, normed);
    int status = multiply(l, PLLM_LAYER_Q, 3, normed, (float *const[]){q, k, v}, activations, threads);
    if (status != PLLM_OK)
        goto done;
    turn(l, PLLM_LAYER_Q, cosine, sine, q);
    turn(l, PLLM_LAYER_K, cosine, sine, k);
    keep(l, past, k, past->keys);
    keep(l, past, v, past->values);
    status = attend(l, q, past, mixed, threads);
    if (status == PLLM_OK)
        status = multiply(l, PLLM_LAYER_O, 1, mixed, (float *const[]){normed}, activations, threads);
    for (ptrdiff_t i = 0; i < width && status == PLLM_OK; i++)
        y[i] = x[i] + normed[i];
done:
    free(normed);
    return status;
}

/* y += Down (silu(Gate n1(y)) * Up n1(y)). */
static int add_mlp(const pllm_layer *l, float *y, enum pllm_activations activations, int threads)
{
    const ptrdiff_t width = l->matrix[PLLM_LAYER_UP].in_features;
    const ptrdiff_t inner = whole_lanes(l->matrix[PLLM_LAYER_UP].out_features);
    float *const gate = pllm_alloc_floats((size_t)(2 * inner + width));
    if (!gate)
        return PLLM_ENOMEM;
    float *const up = gate + inner, *const normed = up + inner;
    memset(gate, 0, (size_t)(2 * inner) * sizeof *gate);
    rms_norm(y, l->norm[1], width, l->epsilon, normed);
    int status = multiply(l, PLLM_LAYER_GATE, 2, normed, (float *const[]){gate, up}, activations, threads);
    if (status == PLLM_OK) {
        gate_values(gate, up, inner);
        status = multiply(l, PLLM_LAYER_DOWN, 1, gate, (float *const[]){normed}, activations, threads);
    }
    for (ptrdiff_t i = 0; i < width && status == PLLM_OK; i++)
        y[i] += normed[i];
    free(gate);
    return status;
}

int PLLM_SYM(pllm_layer_token)(const pllm_layer *l, const float *x, const float *cosine, const float *sine,
                               const pllm_past *past, float *y, enum pllm_activations activations,
                               int threads)
{
    const int status = add_attention(l, x, cosine, sine, past, y, activations, threads);
    return status == PLLM_OK ? add_mlp(l, y, activations, threads) : status;
}
