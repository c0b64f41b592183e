/* layer.c - one token through a decoder layer whose matrices are compressed: everything between the
 * products, which are those of pllm_matmul. Compiled once per instruction set.
 *
 * A token's work outside the products is small, but as operators of a framework it is some seventy calls a
 * layer, which cost more than they compute. */
#include "kernel.h"

#include <omp.h>

enum {
    LANES = 16,
    DOT_ROWS = 4,           /* keys that a query meets together */
    BLOCK_TOKENS = 32,      /* keys or values that are in the first-level cache at a time */
    WORK_PER_THREAD = 32768 /* multiply-adds of the attention */
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

/* The keys and values of all tokens so far, (kv heads, length, head_width) each, of one type. */
typedef struct {
    const void *keys, *values;
    ptrdiff_t length;
    int is_bfloat16;
} past;

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
    const float *row[DOT_ROWS];
    vf16 sum[DOT_ROWS];
    for (int r = 0; r < DOT_ROWS; r++) {
        row[r] = rows + (r < count ? r : count - 1) * width;
        sum[r] = vf16_zero();
    }
    for (ptrdiff_t i = 0; i < whole; i += LANES) {
        const vf16 here = vf16_load(q + i);
        PLLM_UNROLL
        for (int r = 0; r < DOT_ROWS; r++)
            sum[r] = vf16_fma(here, vf16_load(row[r] + i), sum[r]);
    }
    for (int r = 0; r < DOT_ROWS; r++) {
        if (rest)
            sum[r] = vf16_fma(vf16_load_part(q + whole, rest), vf16_load_part(row[r] + whole, rest), sum[r]);
        dot[r] = vf16_sum(sum[r]);
    }
}

/* out (width) += sum over t of share[t] rows[t], in the order of t.  rows: (count, width). */
static void add_rows(const float *share, const float *rows, ptrdiff_t count, ptrdiff_t width, float *out)
{
    ptrdiff_t c = 0;
    for (; c + 2 * LANES <= width; c += 2 * LANES) {
        vf16 low = vf16_load(out + c), high = vf16_load(out + c + LANES);
        for (ptrdiff_t t = 0; t < count; t++) {
            const vf16 factor = vf16_set1(share[t]);
            low = vf16_fma(factor, vf16_load(rows + t * width + c), low);
            high = vf16_fma(factor, vf16_load(rows + t * width + c + LANES), high);
        }
        vf16_store(out + c, low);
        vf16_store(out + c + LANES, high);
    }
    for (; c < width; c++)
        for (ptrdiff_t t = 0; t < count; t++)
            out[c] = fmaf(share[t], rows[t * width + c], out[c]);
}

/* score = exp(scale (score - the largest)), zeros behind the last; returns 1 / their sum.
 * score: whole_lanes(length).  scale: positive. */
static float exponentials(float *score, ptrdiff_t length, float scale)
{
    const ptrdiff_t padded = whole_lanes(length);
    float largest = score[0];
    for (ptrdiff_t t = 1; t < length; t++)
        largest = score[t] > largest ? score[t] : largest;
    for (ptrdiff_t t = length; t < padded; t++)
        score[t] = largest;
    const vf top = vf_set1(largest), factor = vf_set1(scale), least = vf_set1(-85.0f);
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

/* The query heads that share one head of keys.  q, out: (group, width).
 * scratch: BLOCK_TOKENS * width + group * (whole_lanes(length) + 1) floats. */
static void attend_group(const float *q, ptrdiff_t group, ptrdiff_t width, float scale, const past *p,
                         ptrdiff_t kv_head, float *out, float *scratch)
{
    const ptrdiff_t padded = whole_lanes(p->length), start = kv_head * p->length * width;
    float *const block = scratch, *const score = scratch + BLOCK_TOKENS * width;
    float *const inverse = score + group * padded;
    for (ptrdiff_t first = 0; first < p->length; first += BLOCK_TOKENS) {
        const ptrdiff_t left = p->length - first, count = left < BLOCK_TOKENS ? left : BLOCK_TOKENS;
        const float *keys =
            as_floats(p->keys, p->is_bfloat16, start + first * width, count * width, block);
        for (ptrdiff_t h = 0; h < group; h++)
            for (ptrdiff_t t = 0; t < count; t += DOT_ROWS)
                dot_rows(q + h * width, keys + t * width, count - t, width,
                         score + h * padded + first + t);
    }
    memset(out, 0, (size_t)(group * width) * sizeof *out);
    for (ptrdiff_t h = 0; h < group; h++)
        inverse[h] = exponentials(score + h * padded, p->length, scale);
    for (ptrdiff_t first = 0; first < p->length; first += BLOCK_TOKENS) {
        const ptrdiff_t left = p->length - first, count = left < BLOCK_TOKENS ? left : BLOCK_TOKENS;
        const float *values =
            as_floats(p->values, p->is_bfloat16, start + first * width, count * width, block);
        for (ptrdiff_t h = 0; h < group; h++)
            add_rows(score + h * padded + first, values, count, width, out + h * width);
    }
    for (ptrdiff_t h = 0; h < group; h++)
        for (ptrdiff_t c = 0; c < width; c++)
            out[h * width + c] *= inverse[h];
}

static int attend(const pllm_layer *l, const float *q, const past *p, float *out, int threads)
{
    const ptrdiff_t width = l->head_width;
    const ptrdiff_t kv_heads = l->matrix[PLLM_LAYER_K].out_features / width;
    const ptrdiff_t group = l->matrix[PLLM_LAYER_Q].out_features / width / kv_heads;
    const ptrdiff_t floats = whole_lanes(BLOCK_TOKENS * width + group * (whole_lanes(p->length) + 1));
    const ptrdiff_t most = 1 + 2 * kv_heads * group * width * p->length / WORK_PER_THREAD;
    const int used = most < threads ? (int)most : threads;
    float *const scratch = pllm_alloc_floats((size_t)(floats * used));
    if (!scratch)
        return PLLM_ENOMEM;
#pragma omp parallel for num_threads(used) schedule(static) if (used > 1)
    for (ptrdiff_t g = 0; g < kv_heads; g++)
        attend_group(q + g * group * width, group, width, l->scale, p, g, out + g * group * width,
                     scratch + floats * omp_get_thread_num());
    free(scratch);
    return PLLM_OK;
}

/* ---- the layer ------------------------------------------------------------------------------- */

static int multiply(const pllm_layer *l, int which, const float *x, float *y,
                    enum pllm_activations activations, int threads)
{
    return PLLM_SYM(pllm_matmul)(&l->matrix[which], x, 1, l->bias[which], y, activations, threads);
}

int PLLM_SYM(pllm_layer_project)(const pllm_layer *l, const float *x, const float *cosine,
                                 const float *sine, float *q, float *k, float *v,
                                 enum pllm_activations activations, int threads)
{
    const ptrdiff_t width = l->matrix[PLLM_LAYER_Q].in_features, head = l->head_width;
    float *const normed = pllm_alloc_floats((size_t)width);
    if (!normed)
        return PLLM_ENOMEM;
    rms_norm(x, l->norm[0], width, l->epsilon, normed);
    float *const target[] = {q, k, v};
    int status = PLLM_OK;
    for (int which = PLLM_LAYER_Q; which <= PLLM_LAYER_V && status == PLLM_OK; which++) {
        status = multiply(l, which, normed, target[which], activations, threads);
        if (which == PLLM_LAYER_V || status != PLLM_OK)
            break;
        const ptrdiff_t heads = l->matrix[which].out_features / head;
        for (ptrdiff_t h = 0; l->head_norm[which] && h < heads; h++)
            rms_norm(target[which] + h * head, l->head_norm[which], head, l->epsilon,
                     target[which] + h * head);
        rotate(target[which], heads, head, cosine, sine);
    }
    free(normed);
    return status;
}

int PLLM_SYM(pllm_layer_finish)(const pllm_layer *l, const float *x, const float *q, const void *keys,
                                const void *values, ptrdiff_t length, int is_bfloat16, float *y,
                                enum pllm_activations activations, int threads)
{
    const pllm_matrix *const m = l->matrix;
    const ptrdiff_t width = m[PLLM_LAYER_O].out_features, inner = m[PLLM_LAYER_UP].out_features;
    const ptrdiff_t joined = whole_lanes(m[PLLM_LAYER_O].in_features), hidden = whole_lanes(inner);
    const past p = {keys, values, length, is_bfloat16};
    float *const memory = pllm_alloc_floats((size_t)(joined + whole_lanes(width) + 2 * hidden));
    if (!memory)
        return PLLM_ENOMEM;
    float *const mixed = memory, *const normed = mixed + joined;
    float *const gate = normed + whole_lanes(width), *const up = gate + hidden;
    memset(gate, 0, (size_t)(2 * hidden) * sizeof *gate);

    int status = attend(l, q, &p, mixed, threads);
    if (status == PLLM_OK)
        status = multiply(l, PLLM_LAYER_O, mixed, normed, activations, threads);
    if (status != PLLM_OK)
        goto done;
    for (ptrdiff_t i = 0; i < width; i++)
        y[i] = x[i] + normed[i];
    rms_norm(y, l->norm[1], width, l->epsilon, normed);
    status = multiply(l, PLLM_LAYER_GATE, normed, gate, activations, threads);
    if (status == PLLM_OK)
        status = multiply(l, PLLM_LAYER_UP, normed, up, activations, threads);
    if (status != PLLM_OK)
        goto done;
    gate_values(gate, up, hidden);
    status = multiply(l, PLLM_LAYER_DOWN, gate, normed, activations, threads);
    for (ptrdiff_t i = 0; i < width && status == PLLM_OK; i++)
        y[i] += normed[i];
done:
    free(memory);
    return status;
}
