/* infer_int.c - activations times a compressed matrix with an int8 table, in integers. Compiled once per
 * instruction set.
 *
 * A row is worked off in spans of at most 512 columns. The activations of a span become integers with one
 * scale: the largest magnitude is LARGEST. For tables of up to 256 codewords of 1, 2 or 4 values they are bytes,
 * and each 32 of them have a multiplier, so that large activations do not coarsen those far from them; for
 * other tables they are int16. Table values have eight bits, so that the dot product of a span is exact in
 * int32 (512 * 128 * LARGEST < 2^31), in whatever order it is summed; the spans are added up in float32, in
 * their order. So no result depends on instruction set, thread count or tiling, and a prompt's
 * tokens give what they would give one by one. */
#include <omp.h>

#include "infer.h"
#include "infer_rows.h"

enum {
    TILE_ROWS = 64,      /* rows decoded at a time: 64 KiB, half of a small second-level cache */
    TILE_ROWS_FEW = 16,  /* when there are few tokens: half of a first-level cache */
    FEW_TOKENS = 16,
    TOKEN_GROUP = 16,    /* tokens that meet all rows of a tile while their span stays in cache */
    TOKEN_BLOCK = 256,   /* tokens per pass over the matrix */
    LARGEST_BYTE = 127,       /* of an activation, either sign */
    LARGEST_MULTIPLIER = 257, /* of a block of them */
    LARGEST = LARGEST_BYTE * LARGEST_MULTIPLIER,
    DOT_ROWS = 4,        /* sums in registers: rows */
#if defined(PLLM_ISA_AVX512)
    DOT_TOKENS = 4, /* times tokens; of 32 registers, and each sum waits five cycles for the one before */
#else
    DOT_TOKENS = 2, /* times tokens */
#endif
    VS_WIDTH = 2 * VF_WIDTH
};

/* One call's view of the matrix and the quantised tokens. */
typedef struct {
    const pllm_matrix *w;
    row_table table;
    row_functions functions;
    ptrdiff_t count;            /* indices of a row, those of the joined table */
    ptrdiff_t row_stride_bytes; /* of the payload */
    ptrdiff_t tail;             /* the first of the rows that end too near the payload's end */
    uint8_t *tail_rows;         /* those rows once more, with OCTET_BYTES behind them */
    ptrdiff_t span;             /* indices of a span, a multiple of 8 */
    ptrdiff_t width;            /* values of a span as laid out for the products */
    ptrdiff_t spans;            /* of a row */
    int16_t *x;                 /* (tokens, spans, width), zeros where no column stands */
    float *x_scale;             /* (tokens, spans) */
    float *x_sum;               /* (tokens) */
} view;

static view view_of(const pllm_matrix *w, ptrdiff_t tokens)
{
    const pllm_codec *c = w->codec;
    const ptrdiff_t count = (w->in_features + c->d - 1) / c->d;
    view v = {.w = w, .table = plan_rows(c, w->out_features * count, tokens)};
    v.functions = functions_for(&v.table);
    v.count = ((count - 1) >> v.table.pairing) + 1;
    v.row_stride_bytes = pllm_row_stride_bytes(count, c->index_bits);
    v.tail = w->out_features - smaller(w->out_features, OCTET_BYTES / v.row_stride_bytes + 1);
    v.span = smaller(SPAN_VALUES / v.table.d / OCTET * OCTET, round_up(v.count, OCTET));
    v.width = span_width(&v.table, v.span);
    v.spans = (v.count + v.span - 1) / v.span;
    return v;
}

/* ---- activations ----------------------------------------------------------------------------- */

/* The largest magnitude among n values, a multiple of VF_WIDTH; NaN where one is NaN or infinite. */
static float largest_of(const float *x, ptrdiff_t n)
{
    float lane[VF_WIDTH], largest = 0.0f, invalid = 0.0f;
    vf peak = vf_zero(), zeros = vf_zero();
    for (ptrdiff_t i = 0; i < n; i += VF_WIDTH) {
        const vf here = vf_load(x + i);
        peak = vf_max(peak, vf_abs(here));
        zeros = vf_fma(here, vf_zero(), zeros);
    }
    vf_store(lane, zeros);
    for (int i = 0; i < VF_WIDTH; i++)
        invalid += lane[i];
    vf_store(lane, peak);
    for (int i = 0; i < VF_WIDTH; i++)
        largest = lane[i] > largest ? lane[i] : largest;
    return invalid == 0.0f ? largest : invalid;
}

/* q = x (n) / scale, rounded, in bytes or not. Returns the scale: NaN when x holds NaN or Inf, and 0 when nothing
 * in it reaches 2^-100; q is then left as it is. */
static float quantise(const float *x, ptrdiff_t n, int bytes, quantised_span *q)
{
    float padded[SPAN_VALUES] = {0};
    memcpy(padded, x, (size_t)n * sizeof *x);
    const float largest = largest_of(padded, SPAN_VALUES);
    if (!(largest >= 0x1p-100f))
        return largest < 0x1p-100f ? 0.0f : largest;
    const float inverse = (float)LARGEST / largest;
    for (int b = 0; b < BLOCKS; b++) {
        const float *const block = padded + b * BLOCK;
        float multiplier = 1.0f;
        if (bytes) {
            multiplier = ceilf(largest_of(block, BLOCK) * inverse / (float)LARGEST_BYTE);
            multiplier = fmaxf(1.0f, fminf(multiplier, (float)LARGEST_MULTIPLIER));
        }
        const vf factor = vf_set1(inverse / multiplier);
        for (int i = 0; i < BLOCK; i += VF_WIDTH)
            vi_store_i16(q->value + b * BLOCK + i, vi_from_f(vf_mul(vf_load(block + i), factor)));
        q->multiplier[b] = (int16_t)multiplier;
    }
    return largest / (float)LARGEST;
}

/* Those that are looked up in registers somewhere (is_looked_up), and the same wherever they run. */
static int has_byte_activations(const pllm_codec *c)
{
    return c->index_bits <= 8 && (c->d <= 2 || c->d == 4);
}

static void quantise_token(const view *v, const float *x, ptrdiff_t token)
{
    const int bytes = has_byte_activations(v->w->codec);
    const ptrdiff_t values = v->span * v->table.d, columns = v->w->in_features;
    for (ptrdiff_t s = 0; s < v->spans; s++) {
        const ptrdiff_t at = token * v->spans + s, here = smaller(values, columns - s * values);
        quantised_span q = {{0}, {0}};
        v->x_scale[at] = quantise(x + token * columns + s * values, here, bytes, &q);
        arrange(&v->table, v->span, &q, v->x + at * v->width);
    }
}

/* The indices of a row. */
static const uint8_t *row_source(const view *v, ptrdiff_t row)
{
    return row < v->tail ? v->w->packed + row * v->row_stride_bytes
                         : v->tail_rows + (row - v->tail) * v->row_stride_bytes;
}

/* Octets of span s. */
static ptrdiff_t octets_of(const view *v, ptrdiff_t s)
{
    return (smaller(v->span, v->count - s * v->span) + OCTET - 1) / OCTET;
}

/* ---- one token ------------------------------------------------------------------------------- */

static void multiply_one(const view *v, const float *bias, float *y, int threads)
{
    const pllm_matrix *w = v->w;
    const token_spans token = {v->x, v->x_scale, v->width, v->spans, octets_of(v, 0),
                               octets_of(v, v->spans - 1)};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (ptrdiff_t first = 0; first < w->out_features; first += DOT_TOGETHER) {
        const uint8_t *rows[DOT_TOGETHER];
        float dot[DOT_TOGETHER];
        for (int i = 0; i < DOT_TOGETHER; i++)
            rows[i] = row_source(v, smaller(first + i, w->out_features - 1));
        v->functions.dot(&v->table, rows, &token, dot);
        for (ptrdiff_t r = first; r < smaller(first + DOT_TOGETHER, w->out_features); r++)
            y[r] = finish_product(w, r, w->codec->table_scale, dot[r - first], v->x_sum[0],
                                  bias ? bias[r] : 0.0f);
    }
}

/* ---- several tokens -------------------------------------------------------------------------- */

/* sums (tokens, DOT_ROWS) = w (DOT_ROWS, width) x (tokens, width)'. tokens: 1 to DOT_TOKENS, a constant. */
PLLM_INLINE void dot_tile(const int16_t *w, ptrdiff_t width, const int16_t *x, ptrdiff_t x_stride,
                          int tokens, int32_t *sums)
{
    vi s[DOT_TOKENS][DOT_ROWS];
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < DOT_ROWS; r++)
            s[t][r] = vi_set1(0);
    for (ptrdiff_t i = 0; i < width; i += VS_WIDTH) {
        vs xs[DOT_TOKENS];
        for (int t = 0; t < tokens; t++)
            xs[t] = vs_load(x + t * x_stride + i);
        PLLM_UNROLL
        for (int r = 0; r < DOT_ROWS; r++) {
            const vs ws = vs_load(w + r * width + i);
            for (int t = 0; t < tokens; t++)
                s[t][r] = vi_dot(s[t][r], ws, xs[t]);
        }
    }
    for (int t = 0; t < tokens; t++)
        vi_sum4(sums + t * DOT_ROWS, s[t][0], s[t][1], s[t][2], s[t][3]);
}

/* dot_tile for any number of tokens up to DOT_TOKENS. */
static void dot_tokens(const int16_t *w, ptrdiff_t width, const int16_t *x, ptrdiff_t x_stride, int tokens,
                       int32_t *sums)
{
    if (tokens == 1)
        dot_tile(w, width, x, x_stride, 1, sums);
    else if (tokens == 2)
        dot_tile(w, width, x, x_stride, 2, sums);
#if defined(PLLM_ISA_AVX512)
    else if (tokens == 3)
        dot_tile(w, width, x, x_stride, 3, sums);
    else
        dot_tile(w, width, x, x_stride, 4, sums);
#endif
}

/* dot (tokens, rows) += scale of each token's span * (w (rows, width) . its span).
 * rows: a multiple of DOT_ROWS.  dot_stride: of a token's row of dot. */
static void multiply_span(const view *v, const int16_t *w, ptrdiff_t rows, ptrdiff_t s,
                          ptrdiff_t token, ptrdiff_t tokens, float *dot, ptrdiff_t dot_stride)
{
    const ptrdiff_t x_stride = v->spans * v->width;
    for (ptrdiff_t r = 0; r < rows; r += DOT_ROWS)
        for (ptrdiff_t t = 0; t < tokens; t += DOT_TOKENS) {
            const int16_t *x = v->x + ((token + t) * v->spans + s) * v->width;
            int32_t sums[DOT_TOKENS * DOT_ROWS];
            const int here = (int)smaller(tokens - t, DOT_TOKENS);
            dot_tokens(w + r * v->width, v->width, x, x_stride, here, sums);
            for (int i = 0; i < here; i++) {
                const float scale = v->x_scale[(token + t + i) * v->spans + s];
                float *const target = dot + (t + i) * dot_stride + r;
                for (int j = 0; j < DOT_ROWS; j++)
                    target[j] = fmaf(scale, (float)sums[i * DOT_ROWS + j], target[j]);
            }
        }
}

/* y of `rows` rows from `first` on and tokens from `token` on.
 * tile: (rows rounded up to DOT_ROWS, width) int16, and TARGET_SLACK more.  dot: (tokens, that many) f32. */
static void multiply_tile(const view *v, ptrdiff_t first, ptrdiff_t rows, ptrdiff_t token,
                          ptrdiff_t tokens, const float *bias, int16_t *tile, float *dot, float *y)
{
    const pllm_matrix *w = v->w;
    const ptrdiff_t height = round_up(rows, DOT_ROWS), bytes = v->span / OCTET * v->table.bits;
    memset(dot, 0, (size_t)(tokens * height) * sizeof *dot);
    for (ptrdiff_t s = 0; s < v->spans; s++) {
        for (ptrdiff_t r = 0; r < height; r++)
            v->functions.decode(&v->table,
                                row_source(v, smaller(first + r, w->out_features - 1)) + s * bytes,
                                octets_of(v, s), tile + r * v->width);
        for (ptrdiff_t t = 0; t < tokens; t += TOKEN_GROUP)
            multiply_span(v, tile, height, s, token + t, smaller(TOKEN_GROUP, tokens - t),
                          dot + t * height, height);
    }
    for (ptrdiff_t t = 0; t < tokens; t++)
        for (ptrdiff_t r = 0; r < rows; r++)
            y[(token + t) * w->out_features + first + r] =
                finish_product(w, first + r, w->codec->table_scale, dot[t * height + r],
                               v->x_sum[token + t], bias ? bias[first + r] : 0.0f);
}

static int multiply_several(const view *v, ptrdiff_t n, const float *bias, float *y, int threads)
{
    const ptrdiff_t out = v->w->out_features, block = smaller(n, TOKEN_BLOCK);
    const ptrdiff_t height = n < FEW_TOKENS ? TILE_ROWS_FEW : TILE_ROWS;
    const size_t tile_bytes = (size_t)round_up(height * v->width + TARGET_SLACK, 32) * sizeof(int16_t);
    const size_t dot_bytes = (size_t)round_up(height * block * (ptrdiff_t)sizeof(float), 64);
    char *const memory = pllm_alloc((tile_bytes + dot_bytes) * (size_t)threads);
    if (!memory)
        return PLLM_ENOMEM;
    memset(memory, 0, (tile_bytes + dot_bytes) * (size_t)threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (ptrdiff_t first = 0; first < out; first += height) {
        char *const mine = memory + (tile_bytes + dot_bytes) * (size_t)omp_get_thread_num();
        for (ptrdiff_t token = 0; token < n; token += block)
            multiply_tile(v, first, smaller(height, out - first), token, smaller(block, n - token), bias,
                          (int16_t *)(void *)mine, (float *)(void *)(mine + tile_bytes), y);
    }
    free(memory);
    return PLLM_OK;
}

/* ---- the whole ------------------------------------------------------------------------------- */

/* Places the call's arrays in memory, or only counts its bytes when that is NULL. */
static size_t place(view *v, ptrdiff_t n, char *memory)
{
    const size_t table = (size_t)round_up((ptrdiff_t)row_table_bytes(&v->table, v->w->codec), 64);
    const size_t x = (size_t)(n * v->spans * v->width) * sizeof(int16_t);
    const size_t scales = (size_t)(n * v->spans) * sizeof(float), sums = (size_t)n * sizeof(float);
    const size_t tail = (size_t)((v->w->out_features - v->tail) * v->row_stride_bytes);
    if (memory) {
        make_rows(&v->table, v->w->codec, memory);
        v->x = (int16_t *)(void *)(memory + table);
        v->x_scale = (float *)(void *)(memory + table + x);
        v->x_sum = v->x_scale + n * v->spans;
        v->tail_rows = (uint8_t *)(v->x_sum + n);
        memcpy(v->tail_rows, v->w->packed + v->tail * v->row_stride_bytes, tail);
        memset(v->tail_rows + tail, 0, OCTET_BYTES);
    }
    return table + x + scales + sums + tail + OCTET_BYTES;
}

int PLLM_SYM(infer_multiply_integer)(const pllm_matrix *w, const float *x, ptrdiff_t n,
                                     const float *bias, float *y, int threads)
{
    view v = view_of(w, n);
    const ptrdiff_t work = w->out_features * v.count * (1 + v.table.d * n / 32);
    const int used = (int)smaller(threads, 1 + work / WORK_PER_THREAD);
    char *const memory = pllm_alloc(place(&v, n, NULL));
    int status = PLLM_OK;
    if (!memory)
        return PLLM_ENOMEM;
    place(&v, n, memory);
    sum_tokens(w, x, n, v.x_sum);
#pragma omp parallel for num_threads(used) schedule(static) if (used > 1 && n > 1)
    for (ptrdiff_t t = 0; t < n; t++)
        quantise_token(&v, x, t);
    if (n == 1 && v.functions.dot)
        multiply_one(&v, bias, y, used);
    else
        status = multiply_several(&v, n, bias, y, used);
    free(memory);
    return status;
}
