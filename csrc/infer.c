/* infer.c - compressed matrices at work: decoded rows, and the product with activations, for which
 * a dense matrix never exists: each thread holds a tile of rows. Compiled once per instruction set.
 *
 * A product is scale[r] * factor * (T . x) + shift[r] * sum(x) + bias[r], where T is the row of table
 * values, which are exact in float32, and T . x is accumulated in float32. Few tokens take dot
 * products along the row (infer_gemm.h, first half), many take register tiles (second half). */
#include <omp.h>

#include "coder.h"
#include "infer.h"
#include "infer_fused.h"
#include "infer_gemm.h"
#include "infer_span.h"
#include "kernel.h"
#include "trellis_floats.h"

enum {
    FEW_SPAN = 512,     /* about so many columns of a row are decoded at a time, few tokens */
    MANY_SPAN = 256,    /* and many tokens: 16 tokens times this is half an L1 cache */
    TOKEN_BLOCK = 384,  /* tokens per pass over the matrix; a multiple of every WIDE */
    DECODER_ROWS = 24,  /* rows of a tile when whole rows must be decoded; as TILE_ROWS */
    WIDENED_FLOATS = 2048 /* int8 tables up to this size are widened once per call */
};

/* One call's view of the matrix. */
typedef struct {
    const pllm_matrix *w;
    span_plan plan;
    ptrdiff_t count;            /* sub-vectors of a row */
    ptrdiff_t length;           /* count * d */
    ptrdiff_t row_stride_bytes; /* of the packed payload */
    ptrdiff_t span;             /* sub-vectors decoded at a time: a multiple of 16, or all of them */
    ptrdiff_t stride;           /* floats between decoded rows: span * d, rounded up to 16 */
    coder_plan decoder;         /* used when the codec has one */
    trellis code;               /* of a matrix in trellis codes, and its memory */
    char *memory;
} view;

/* Whether a row is decoded as a whole. */
static int has_whole_rows(const pllm_codec *c) { return c->decoder || c->trellis; }

/* Floats for an int8 table widened once per call; 0 when it is read as it is. */
static size_t widened_floats(const pllm_codec *c)
{
    return !c->trellis && c->table_is_int8 && c->k * c->d <= WIDENED_FLOATS ? (size_t)(c->k * c->d) : 0;
}

/* span_values: about how many columns to decode at a time. Returns PLLM_OK, or PLLM_ENOMEM; release v->memory. */
static int open_view(view *v, const pllm_matrix *w, ptrdiff_t span_values)
{
    const pllm_codec *c = w->codec;
    *v = (view){.w = w, .plan = {.factor = 1.0f}, .code = trellis_of(w)};
    v->count = (w->in_features + c->d - 1) / c->d;
    v->length = v->count * c->d;
    v->span = has_whole_rows(c) ? v->count : smaller(v->count, round_up(span_values / c->d - 15, 16));
    v->stride = round_up(v->span * c->d, 16);
    if (c->trellis) {
        v->memory = pllm_alloc(trellis_bytes(&v->code));
        if (!v->memory)
            return PLLM_ENOMEM;
        trellis_place(&v->code, v->memory);
        return PLLM_OK;
    }
    v->row_stride_bytes = pllm_row_stride_bytes(v->count, c->index_bits);
    v->plan = (span_plan){
        .table = c->table,
        .d = c->d,
        .is_int8 = c->table_is_int8,
        .factor = c->table_is_int8 ? c->table_scale : 1.0f,
        .bits = c->index_bits,
        .last = c->k - 1,
        .end = w->packed + w->out_features * v->row_stride_bytes,
    };
    v->plan.row_bytes = c->d * (c->table_is_int8 ? 1 : (int32_t)sizeof(float));
    plan_groups(&v->plan);
    if (c->decoder)
        v->decoder = PLLM_SYM(coder_plan_of)(c->d, c->hidden, c->norm, v->count, 1);
    return PLLM_OK;
}

/* Lets v read a table of floats made in memory (widened_floats), if it is to be widened. */
static void widen_table(view *v, float *memory)
{
    const ptrdiff_t n = (ptrdiff_t)widened_floats(v->w->codec);
    if (n == 0)
        return;
    const int8_t *table = v->w->codec->table;
    for (ptrdiff_t i = 0; i < n; i++)
        memory[i] = (float)table[i];
    v->plan.table = (const char *)memory;
    v->plan.is_int8 = 0;
    v->plan.row_bytes = v->w->codec->d * (int32_t)sizeof(float);
}

/* Floats one thread needs to run the decoder. */
static size_t decoder_floats(const view *v)
{
    if (!v->w->codec->decoder)
        return 0;
    return PLLM_SYM(coder_tape_floats)(&v->decoder) + PLLM_SYM(coder_scratch_floats)(&v->decoder) +
           (size_t)(v->decoder.blocks * CODER_LANES * v->w->codec->d);
}

/* row (count, d): codewords in, decoded sub-vectors out.  memory: decoder_floats. */
static void run_decoder(const view *v, float *row, float *memory)
{
    const coder_plan *p = &v->decoder;
    coder_tape tape;
    coder_scratch scratch;
    memory = PLLM_SYM(coder_tape_place)(p, 1, memory, &tape);
    memory = PLLM_SYM(coder_scratch_place)(p, memory, &scratch);
    for (ptrdiff_t i = 0; i < p->count; i += p->unit) {
        const ptrdiff_t part = smaller(p->unit, p->count - i);
        PLLM_SYM(coder_load)(row + i * p->d, part, p->d, scratch.state);
        PLLM_SYM(coder_decode)(p, part, v->w->codec->decoder, &tape, 0, &scratch, memory);
        PLLM_SYM(coder_store)(memory, part, p->d, row + i * p->d);
    }
}

/* target[0 .. part * d - 1] = the row's values from sub-vector first on (a multiple of 8), without
 * factors, scale and shift and in stored order; then zeros up to a multiple of 16. With a decoder or a trellis the span
 * is the row. */
static void decode_part(const view *v, ptrdiff_t row, ptrdiff_t first, ptrdiff_t part, float *target,
                        float *decoder_memory)
{
    const ptrdiff_t values = part * v->w->codec->d;
    if (v->code.code)
        trellis_decode_floats(&v->code, row, target);
    else
        decode_span(&v->plan, v->w->packed + row * v->row_stride_bytes + first / GROUP * v->plan.bits, part, target);
    if (v->w->codec->decoder)
        run_decoder(v, target, decoder_memory);
    for (ptrdiff_t i = values; i < round_up(values, 16); i++)
        target[i] = 0.0f;
}

/* How many threads this much work deserves: a fork costs microseconds. */
static int threads_for(const view *v, ptrdiff_t rows, ptrdiff_t tokens, int threads)
{
    const ptrdiff_t decode = v->count * (v->w->codec->decoder ? 64 : 1);
    const ptrdiff_t work = rows * (decode + v->length * tokens / 16);
    return (int)smaller(threads, 1 + work / WORK_PER_THREAD);
}

/* ---- decoded rows ---------------------------------------------------------------------------- */

/* out[i] = scale * (factor * table value) + shift, each step rounded. */
static void finish_row(const view *v, ptrdiff_t row, const float *values, ptrdiff_t n, float *out)
{
    const vf factor = vf_set1(v->plan.factor), scale = vf_set1(v->w->scale[row]);
    const float shift_value = v->w->shift ? v->w->shift[row] : 0.0f;
    const vf shift = vf_set1(shift_value);
    ptrdiff_t i = 0;
    for (; i + VF_WIDTH <= n; i += VF_WIDTH) {
        const vf t = vf_mul(vf_mul(vf_load(values + i), factor), scale);
        vf_store(out + i, v->w->shift ? vf_add(t, shift) : t);
    }
    for (; i < n; i++) {
        const float t = values[i] * v->plan.factor * v->w->scale[row];
        out[i] = v->w->shift ? t + shift_value : t;
    }
}

/* row (in) = its values, which are as decode_part has them, in the order of the columns and times their factors. */
static const float *in_order(const view *v, const float *values, float *row)
{
    const pllm_trellis *const code = v->code.code;
    if (!code || !(code->order || code->factor))
        return values;
    for (ptrdiff_t i = 0; i < v->code.in; i++)
        row[code->order ? code->order[i] : i] = code->factor ? values[i] * code->factor[i] : values[i];
    return row;
}

int PLLM_SYM(pllm_decode_rows)(const pllm_matrix *w, ptrdiff_t first_row, const int64_t *row_index,
                               ptrdiff_t n, float *rows, int threads)
{
    view v;
    int status = open_view(&v, w, FEW_SPAN);
    const size_t per_thread = (size_t)v.stride + decoder_floats(&v);
    const int used = threads_for(&v, n, 0, threads);
    float *scratch = pllm_alloc_floats(per_thread * (size_t)used);
    if (status != PLLM_OK || !scratch) {
        free(v.memory);
        free(scratch);
        return PLLM_ENOMEM;
    }
#pragma omp parallel for num_threads(used) schedule(static) if (used > 1)
    for (ptrdiff_t i = 0; i < n; i++) {
        float *values = scratch + per_thread * (size_t)omp_get_thread_num();
        const ptrdiff_t row = row_index ? (ptrdiff_t)row_index[i] : first_row + i;
        for (ptrdiff_t first = 0; first < v.count; first += v.span) {
            const ptrdiff_t column = first * w->codec->d;
            decode_part(&v, row, first, smaller(v.span, v.count - first), values, values + v.stride);
            float *const out = rows + i * w->in_features + column;
            finish_row(&v, row, in_order(&v, values, out), smaller(v.stride, w->in_features - column), out);
        }
    }
    free(v.memory);
    free(scratch);
    return PLLM_OK;
}

/* ---- product, few tokens --------------------------------------------------------------------- */

/* dot (DOT_ROWS, n) of the rows from `first` on (the last row again behind the end).
 * x: (n, x_stride), zeros behind the columns.  memory: few_floats. */
static void dot_row_group(const view *v, ptrdiff_t first, const float *x, ptrdiff_t x_stride, int n,
                          float *dot, float *memory)
{
    float sum[DOT_ROWS * DOT_TOKENS * 16] = {0};
    for (ptrdiff_t at = 0; at < v->count; at += v->span) {
        const ptrdiff_t part = smaller(v->span, v->count - at);
        for (int r = 0; r < DOT_ROWS; r++)
            decode_part(v, smaller(first + r, v->w->out_features - 1), at, part,
                        memory + r * v->stride, memory + DOT_ROWS * v->stride);
        dot_rows(memory, v->stride, x + at * v->w->codec->d, x_stride, round_up(part * v->w->codec->d, 16), sum,
                 n);
    }
    for (int i = 0; i < DOT_ROWS * n; i++)
        dot[i] = vf16_sum(vf16_load(sum + i * 16));
}

static int multiply_few(const pllm_product *p, int threads)
{
    const pllm_matrix *const w = p->w;
    const int n = (int)p->n;
    view v;
    const int status = open_view(&v, w, FEW_SPAN);
    const ptrdiff_t x_stride = round_up(v.length, 16);
    const size_t shared = round_up((ptrdiff_t)widened_floats(w->codec), 16) + (size_t)(n * x_stride);
    const size_t per_thread = (size_t)(DOT_ROWS * v.stride) + decoder_floats(&v);
    const int used = threads_for(&v, w->out_features, n, threads);
    const int fused = n == 1 && !w->codec->decoder && is_fusable(w->codec->d);
    const ptrdiff_t group = fused ? FUSED_TILE : DOT_ROWS;
    float x_sum[DOT_TOKENS];
    float *memory = pllm_alloc_floats(shared + per_thread * (size_t)used);
    if (status != PLLM_OK || !memory) {
        free(v.memory);
        free(memory);
        return PLLM_ENOMEM;
    }
    widen_table(&v, memory + n * x_stride);
    for (int t = 0; t < n; t++) {
        float *const target = memory + t * x_stride;
        const float *const x = stored_input(p, t, 0, w->in_features, target);
        if (x != target)
            memcpy(target, x, (size_t)w->in_features * sizeof(float));
        memset(target + w->in_features, 0, (size_t)(x_stride - w->in_features) * sizeof(float));
    }
    sum_tokens(p, x_sum, used);
#pragma omp parallel for num_threads(used) schedule(static) if (used > 1)
    for (ptrdiff_t first = 0; first < w->out_features; first += group) {
        float dot[FUSED_TILE]; /* DOT_ROWS * DOT_TOKENS fit */
        const ptrdiff_t rows = smaller(group, w->out_features - first);
        if (fused)
            fused_tile(&v.plan, w->packed + first * v.row_stride_bytes, v.row_stride_bytes, (int)rows,
                       v.count, memory, dot);
        else
            dot_row_group(&v, first, memory, x_stride, n, dot,
                          memory + shared + per_thread * (size_t)omp_get_thread_num());
        for (int t = 0; t < n; t++) {
            float of_token[FUSED_TILE];
            for (ptrdiff_t r = 0; r < rows; r++)
                of_token[r] = finish_product(w, first + r, v.plan.factor, dot[r * n + t], x_sum[t],
                                             p->bias ? p->bias[first + r] : 0.0f);
            put_output(p, t, first, rows, of_token);
        }
    }
    free(v.memory);
    free(memory);
    return PLLM_OK;
}

/* ---- product, many tokens -------------------------------------------------------------------- */

/* Rows of a tile: fewer when whole rows have to be held. */
static ptrdiff_t tile_rows(const view *v) { return has_whole_rows(v->w->codec) ? DECODER_ROWS : TILE_ROWS; }

/* c = T x of tile_rows rows from `first` on, for the panels begin..end, as multiply_panel lays it.
 * w: (tile_rows, stride), overwritten. */
static void multiply_tile(const view *v, ptrdiff_t first, ptrdiff_t rows, const panels *p,
                          const float *packed_x, ptrdiff_t begin, ptrdiff_t end, float *w, float *c)
{
    const ptrdiff_t height = round_up(rows, 2 * MICRO_ROWS);
    memset(w + rows * v->stride, 0, (size_t)((height - rows) * v->stride) * sizeof(float));
    memset(c, 0, (size_t)(tile_rows(v) * smaller((end - begin) * WIDE, p->width)) * sizeof(float));
    for (ptrdiff_t at = 0; at < v->count; at += v->span) {
        const ptrdiff_t part = smaller(v->span, v->count - at), values = part * v->w->codec->d;
        for (ptrdiff_t r = 0; r < rows; r++)
            decode_part(v, first + r, at, part, w + r * v->stride, c + tile_rows(v) * TOKEN_BLOCK);
        for (ptrdiff_t k = 0; k < values; k += MANY_SPAN)
            for (ptrdiff_t i = begin; i < end; i++) {
                const ptrdiff_t width = panel_width(p, i);
                const float *x = packed_x + i * WIDE * v->length + (at * v->w->codec->d + k) * width;
                multiply_panel(w + k, v->stride, height, x, width, smaller(MANY_SPAN, values - k),
                               c + tile_rows(v) * (i - begin) * WIDE);
            }
    }
}

static int multiply_many(const pllm_product *o, int threads)
{
    const pllm_matrix *const w = o->w;
    view v;
    const int status = open_view(&v, w, MANY_SPAN);
    const panels p = panels_for(o->n);
    const int used = threads_for(&v, w->out_features, o->n, threads);
    const ptrdiff_t block = TOKEN_BLOCK / WIDE, height = tile_rows(&v);
    const size_t packed = (size_t)(p.width * v.length), sums = (size_t)round_up(p.width, 16);
    const size_t shared = packed + sums + (size_t)round_up((ptrdiff_t)widened_floats(w->codec), 16);
    const size_t per_thread =
        (size_t)(height * (v.stride + TOKEN_BLOCK)) + (size_t)round_up((ptrdiff_t)decoder_floats(&v), 16);
    float *memory = pllm_alloc_floats(shared + per_thread * (size_t)used);
    if (status != PLLM_OK || !memory) {
        free(v.memory);
        free(memory);
        return PLLM_ENOMEM;
    }
    float *const x_sum = memory + packed, *const scratch = memory + shared;
    widen_table(&v, x_sum + sums);
    memset(x_sum, 0, sums * sizeof *x_sum);
    sum_tokens(o, x_sum, used);
#pragma omp parallel num_threads(used) if (used > 1)
    {
        float *const tile = scratch + per_thread * (size_t)omp_get_thread_num();
        float *const c = tile + height * v.stride;
#pragma omp for schedule(static)
        for (ptrdiff_t i = 0; i < p.count; i++)
            pack_panel(o, &p, i, v.length, memory + i * WIDE * v.length);
#pragma omp for schedule(dynamic)
        for (ptrdiff_t first = 0; first < w->out_features; first += height) {
            const ptrdiff_t rows = smaller(height, w->out_features - first);
            for (ptrdiff_t begin = 0; begin < p.count; begin += block) {
                const ptrdiff_t end = smaller(begin + block, p.count);
                multiply_tile(&v, first, rows, &p, memory, begin, end, tile, c);
                finish_panels(o, v.plan.factor, first, rows, &p, begin, end, height, c, x_sum);
            }
        }
    }
    free(v.memory);
    free(memory);
    return PLLM_OK;
}

static int is_integer(const pllm_product *p, enum pllm_activations activations)
{
    const pllm_codec *const c = p->w->codec;
    return activations == PLLM_ACTIVATIONS_INTEGER && (c->trellis || (c->table_is_int8 && !c->decoder));
}

static int multiply(const pllm_product *p, enum pllm_activations activations, int in_tiles, int threads)
{
    if (p->n == 0 || p->w->out_features == 0)
        return PLLM_OK;
    if (is_integer(p, activations))
        return PLLM_SYM(infer_multiply_integer)(p, 1, in_tiles, threads);
    return p->n <= DOT_TOKENS ? multiply_few(p, threads) : multiply_many(p, threads);
}

int PLLM_SYM(infer_multiply)(const pllm_product *p, int count, enum pllm_activations activations, int threads)
{
    int status = PLLM_OK, together = count <= INFER_TOGETHER;
    for (int i = 0; i < count; i++)
        together = together && p[i].n > 0 && p[i].w->out_features > 0 && is_integer(p + i, activations);
    if (together)
        return PLLM_SYM(infer_multiply_integer)(p, count, 0, threads);
    for (int i = 0; i < count && status == PLLM_OK; i++)
        status = multiply(p + i, activations, 0, threads);
    return status;
}

int PLLM_SYM(pllm_matmul)(const pllm_matrix *w, const void *x, ptrdiff_t n, const float *bias, void *y,
                          enum pllm_number number, enum pllm_activations activations, int threads)
{
    return multiply(&(pllm_product){w, x, n, bias, y, number}, activations, 0, threads);
}

#if defined(PLLM_ISA_AVX512)
int pllm_matmul_amx(const pllm_matrix *w, const void *x, ptrdiff_t n, const float *bias, void *y,
                    enum pllm_number number, enum pllm_activations activations, int threads)
{
    return multiply(&(pllm_product){w, x, n, bias, y, number}, activations, 1, threads);
}
#endif
