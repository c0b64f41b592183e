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

#include "infer_int_gemm.h"
#include "infer_rows.h"
#include "infer_trellis.h"

enum {
    FEW_TOKENS = 6,           /* that do not fill a panel; no more are taken one by one */
    TILE_ROWS_FEW = 16,       /* rows decoded at a time for them: half of a first-level cache */
    ROWS_ALONE = 64,          /* that a single token takes at a time; a multiple of every DOT_TOGETHER */
    TOKEN_BLOCK = 512,        /* tokens per pass over the matrix; a multiple of every WIDE */
    LARGEST_BYTE = 127,       /* of an activation, either sign */
    LARGEST_MULTIPLIER = 257, /* of a block of them */
    LARGEST = LARGEST_BYTE * LARGEST_MULTIPLIER,
};

/* One call's view of the matrix and the quantised tokens. */
typedef struct {
    const pllm_product *product;
    const pllm_matrix *w; /* its */
    trellis code; /* of a matrix in trellis codes, whose spans are its own; else these two: */
    row_table table;
    row_functions functions;
    int one_by_one; /* each token is multiplied by itself */
    panels tokens;
    int in_tiles;               /* several tokens: multiplied in tile registers, see infer_tiles.h */
    ptrdiff_t count;            /* indices of a row, those of the joined table */
    ptrdiff_t row_stride_bytes; /* of the payload */
    ptrdiff_t tail;             /* the first of the rows that end too near the payload's end */
    uint8_t *tail_rows;         /* those rows once more, with OCTET_BYTES behind them */
    ptrdiff_t span;             /* indices of a span, a multiple of 8 */
    ptrdiff_t width;            /* values of a span as laid out for the products; whole tiles in_tiles */
    ptrdiff_t spans;            /* of a row */
    int16_t *x;                 /* few tokens: (tokens, spans, width); else panels, each (spans, width / 2,
                                 * tokens, 2), see put_line; zeros where no column stands. In tiles: bytes, for
                                 * each span and TILE_TOKENS of the tokens as put_tile_token has them */
    float *x_scale;             /* few tokens: (tokens, spans); else panels, each (spans, tokens); in tiles:
                                 * (spans, tokens) */
    float *x_sum;               /* (tokens) */
} view;

static int is_few(const view *v) { return v->tokens.tokens <= FEW_TOKENS && !v->in_tiles; }

/* How the table of a codebook is read. */
static void view_table(view *v, int in_tiles)
{
    const pllm_matrix *const w = v->w;
    const pllm_codec *const c = w->codec;
    const ptrdiff_t count = (w->in_features + c->d - 1) / c->d;
    v->table = plan_rows(c, w->out_features * count, v->product->n, in_tiles);
    v->functions = functions_for(&v->table);
    v->one_by_one = v->table.one_by_one;
    v->count = ((count - 1) >> v->table.pairing) + 1;
    v->row_stride_bytes = pllm_row_stride_bytes(count, c->index_bits);
    v->tail = w->out_features - smaller(w->out_features, OCTET_BYTES / v->row_stride_bytes + 1);
    v->span = smaller(SPAN_VALUES / v->table.d / OCTET * OCTET, round_up(v->count, OCTET));
    v->width = span_width(&v->table, v->span);
    v->spans = (v->count + v->span - 1) / v->span;
}

static void view_trellis(view *v, int in_tiles)
{
    v->code = trellis_of(v->w);
    v->one_by_one = v->product->n <= (in_tiles ? smaller(2, ONE_BY_ONE) : ONE_BY_ONE);
    v->count = v->w->in_features;
    v->width = trellis_width(v->one_by_one);
    v->spans = v->code.spans;
}

static view view_of(const pllm_product *p, int in_tiles)
{
    const ptrdiff_t tokens = p->n;
    view v = {.product = p, .w = p->w};
    if (p->w->codec->trellis)
        view_trellis(&v, in_tiles);
    else
        view_table(&v, in_tiles);
    v.tokens = panels_for(tokens);
    v.in_tiles = in_tiles && !v.one_by_one;
    if (is_few(&v))
        v.tokens = (panels){tokens, 1, tokens};
    v.width = round_up(v.width, v.in_tiles ? 64 : 1);
    return v;
}

/* ---- activations ----------------------------------------------------------------------------- */

/* peaks = the largest magnitudes of the blocks of a span. Returns the largest of them, or NaN when x holds NaN or
 * Inf. */
static float measure(const float *x, float *peaks)
{
    vf zeros = vf_zero(), largest = vf_zero();
    for (int b = 0; b < BLOCKS; b++) {
        vf peak = vf_zero();
        for (int i = 0; i < BLOCK; i += VF_WIDTH) {
            const vf here = vf_load(x + b * BLOCK + i);
            peak = vf_max(peak, vf_abs(here));
            zeros = vf_fma(here, vf_zero(), zeros);
        }
        largest = vf_max(largest, peak);
        peaks[b] = -vf_lowest(vf_neg(peak));
    }
    return vm_any(vm_not(vf_eq(zeros, vf_zero()))) ? NAN : -vf_lowest(vf_neg(largest));
}

/* q = x (SPAN_VALUES) / scale, rounded, in bytes or not. Returns the scale: NaN when x holds NaN or Inf, and 0 when
 * nothing in it reaches 2^-100; q is zeros then. */
static float quantise(const float *x, int bytes, quantised_span *q)
{
    float multiplier[BLOCKS];
    const float largest = measure(x, multiplier);
    if (!(largest >= 0x1p-100f)) {
        memset(q, 0, sizeof *q);
        return largest < 0x1p-100f ? 0.0f : largest;
    }
    const float inverse = (float)LARGEST / largest;
    const vf one = vf_set1(1.0f), most = vf_set1((float)LARGEST_MULTIPLIER), half = vf_set1(0.5f);
    const vf per_peak = vf_set1(inverse / (float)LARGEST_BYTE);
    for (int b = 0; b < BLOCKS; b += VF_WIDTH) { /* the next whole number, so that no value is beyond a byte */
        const vf whole = vf_rint(vf_fma(vf_load(multiplier + b), per_peak, half));
        vf_store(multiplier + b, bytes ? vf_max(one, vf_min(whole, most)) : one);
    }
    for (int b = 0; b < BLOCKS; b++) {
        const vf factor = vf_set1(inverse / multiplier[b]);
        for (int i = b * BLOCK; i < (b + 1) * BLOCK; i += VF_WIDTH)
            vi_store_i16(q->value + i, vi_from_f(vf_mul(vf_load(x + i), factor)));
        q->multiplier[b] = (int16_t)multiplier[b];
    }
    return largest / (float)LARGEST;
}

/* Columns of span s, and where they start. */
static ptrdiff_t span_columns(const view *v, ptrdiff_t s, ptrdiff_t *first)
{
    if (v->code.code) {
        *first = v->code.span[s].first;
        return v->code.span[s].columns;
    }
    const ptrdiff_t values = v->span * v->table.d;
    *first = s * values;
    return smaller(values, v->w->in_features - *first);
}

/* target (width) = token t's span s, laid out. Returns its scale. */
static float quantise_span(const view *v, ptrdiff_t t, ptrdiff_t s, int16_t *target)
{
    ptrdiff_t first;
    const ptrdiff_t here = span_columns(v, s, &first);
    float padded[SPAN_VALUES];
    quantised_span q;
    const float *x = stored_input(v->product, t, first, here, padded);
    if (here < SPAN_VALUES) {
        if (x != padded)
            memcpy(padded, x, (size_t)here * sizeof *x);
        memset(padded + here, 0, (size_t)(SPAN_VALUES - here) * sizeof *x);
        x = padded;
    }
    const float scale = quantise(x, v->code.code || has_byte_activations(v->w->codec), &q);
    if (v->code.code)
        trellis_arrange(&v->code, v->one_by_one, &q, target);
    else
        arrange(&v->table, v->span, &q, target);
    return scale;
}

static void quantise_few(const view *v)
{
    for (ptrdiff_t t = 0; t < v->tokens.tokens; t++)
        for (ptrdiff_t s = 0; s < v->spans; s++) {
            const ptrdiff_t at = t * v->spans + s;
            v->x_scale[at] = quantise_span(v, t, s, v->x + at * v->width);
        }
}

/* Panel i: zeros where it has no token. */
static void quantise_panel(const view *v, ptrdiff_t i)
{
    const panels *p = &v->tokens;
    const ptrdiff_t width = panel_width(p, i), tokens = panel_tokens(p, i);
    for (ptrdiff_t s = 0; s < v->spans; s++) {
        const ptrdiff_t at = i * WIDE * v->spans + s * width;
        int16_t *const panel = v->x + at * v->width;
        if (tokens < width) {
            memset(panel, 0, (size_t)(width * v->width) * sizeof *panel);
            memset(v->x_scale + at, 0, (size_t)width * sizeof *v->x_scale);
        }
        for (ptrdiff_t t = 0; t < tokens; t++) {
            int16_t values[LAID_OUT];
            v->x_scale[at + t] = quantise_span(v, i * WIDE + t, s, values);
            put_line(values, v->width, t, width, panel);
        }
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

/* ---- tokens one by one ---------------------------------------------------------------------- */

/* dot = the products of the rows first..end-1 with token t. */
static void dot_with_token(const view *v, ptrdiff_t first, ptrdiff_t end, ptrdiff_t t, float *dot)
{
    const ptrdiff_t at = t * v->spans;
    token_spans token = {.x = v->x + at * v->width, .scale = v->x_scale + at, .width = v->width, .spans = v->spans};
#if defined(PLLM_ISA_AVX2) || defined(PLLM_ISA_AVX512)
    if (v->code.code) {
        trellis_dot(&v->code, first, end - first, &token, dot);
        return;
    }
#endif
    token.octets = octets_of(v, 0);
    token.last_octets = octets_of(v, v->spans - 1);
    v->functions.dot(&v->table, row_source(v, first), v->row_stride_bytes, end - first, &token, dot);
}

/* y of the rows first..end-1, if any, at most ROWS_ALONE: none or all of them from the tail on. */
static void multiply_rows(const view *v, ptrdiff_t first, ptrdiff_t end)
{
    const pllm_matrix *const w = v->w;
    const float *const bias = v->product->bias;
    float dot[ROWS_ALONE];
    for (ptrdiff_t t = 0; t < v->tokens.tokens && first < end; t++) {
        dot_with_token(v, first, end, t, dot);
        for (ptrdiff_t r = first; r < end; r++)
            dot[r - first] = finish_product(w, r, w->codec->table_scale, dot[r - first], v->x_sum[t],
                                            bias ? bias[r] : 0.0f);
        put_output(v->product, t, first, end - first, dot);
    }
}

/* y of strip i of rows. */
static void multiply_strip(const view *v, ptrdiff_t i)
{
    const ptrdiff_t begin = i * ROWS_ALONE, out = v->w->out_features;
    const ptrdiff_t step = v->tokens.tokens == 1 ? ROWS_ALONE : DOT_TOGETHER; /* rows stay in the cache for all */
    for (ptrdiff_t first = begin; first < smaller(begin + ROWS_ALONE, out); first += step) {
        const ptrdiff_t end = smaller(first + step, out);
        const ptrdiff_t tail = v->code.code ? end : first < v->tail ? smaller(end, v->tail) : first;
        multiply_rows(v, first, tail);
        multiply_rows(v, tail, end);
    }
}

static ptrdiff_t strips_of(const view *v) { return (v->w->out_features + ROWS_ALONE - 1) / ROWS_ALONE; }

/* y of strip i of several matrices, those of the first one first. */
static void multiply_strip_of(const view *v, ptrdiff_t i)
{
    for (; i >= strips_of(v); v++)
        i -= strips_of(v);
    multiply_strip(v, i);
}

/* Strips that lie one after another, of which a thread takes the next. */
typedef struct {
    _Alignas(64) ptrdiff_t next, end;
} strip_range;

/* The products of `count` matrices. Each thread reads a part of them from front to back; one that has no more helps
 * another. */
static int multiply_one_by_one(const view *v, int count, int threads)
{
    strip_range *const part = pllm_alloc((size_t)threads * sizeof *part);
    ptrdiff_t strips = 0;
    if (!part)
        return PLLM_ENOMEM;
    for (int i = 0; i < count; i++)
        strips += strips_of(v + i);
    for (int t = 0; t < threads; t++)
        part[t] = (strip_range){strips * t / threads, strips * (t + 1) / threads};
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int i = 0; i < threads; i++) {
        strip_range *const from = part + (omp_get_thread_num() + i) % threads;
        for (;;) {
            ptrdiff_t strip;
#pragma omp atomic capture
            strip = from->next++;
            if (strip >= from->end)
                break;
            multiply_strip_of(v, strip);
        }
    }
    free(part);
    return PLLM_OK;
}

/* ---- several tokens -------------------------------------------------------------------------- */

/* target (height, width) = span s of the rows from `first` on; behind the end the last row again, or what is there. */
static void decode_tile(const view *v, ptrdiff_t first, ptrdiff_t height, ptrdiff_t s, int16_t *target)
{
    const ptrdiff_t last = v->w->out_features - 1;
    if (v->code.code) {
        trellis_decode(&v->code, first, smaller(first + height, last + 1), s, target, v->width);
        return;
    }
    const ptrdiff_t bytes = v->span / OCTET * v->table.bits;
    for (ptrdiff_t r = 0; r < height; r++)
        v->functions.decode(&v->table, row_source(v, smaller(first + r, last)) + s * bytes, octets_of(v, s),
                            target + r * v->width);
}

/* y of `rows` rows from `first` on, few tokens.
 * tile: (rows rounded up to DOT_ROWS, width) int16, and TARGET_SLACK more.  dot: (tokens, that many) f32. */
static void multiply_tile_few(const view *v, ptrdiff_t first, ptrdiff_t rows, int16_t *tile, float *dot)
{
    const pllm_matrix *const w = v->w;
    const float *const bias = v->product->bias;
    const ptrdiff_t height = round_up(rows, DOT_ROWS), n = v->tokens.tokens;
    memset(dot, 0, (size_t)(n * height) * sizeof *dot);
    for (ptrdiff_t s = 0; s < v->spans; s++) {
        decode_tile(v, first, height, s, tile);
        multiply_few(tile, height, v->width, v->x + s * v->width, n, v->x_scale + s, v->spans, dot);
    }
    for (ptrdiff_t t = 0; t < n; t++, dot += height) {
        for (ptrdiff_t r = 0; r < rows; r++)
            dot[r] = finish_product(w, first + r, w->codec->table_scale, dot[r], v->x_sum[t],
                                    bias ? bias[first + r] : 0.0f);
        put_output(v->product, t, first, rows, dot);
    }
}

/* The same for the panels begin..end.
 * tile: (rows rounded up to MICRO_ROWS, width), and TARGET_SLACK more.  dot: (that many, tokens) of each panel. */
static void multiply_tile_many(const view *v, ptrdiff_t first, ptrdiff_t rows, ptrdiff_t begin, ptrdiff_t end,
                               int16_t *tile, float *dot)
{
    const panels *p = &v->tokens;
    const ptrdiff_t height = round_up(rows, MICRO_ROWS);
    memset(dot, 0, (size_t)(height * smaller((end - begin) * WIDE, p->width)) * sizeof *dot);
    for (ptrdiff_t s = 0; s < v->spans; s++) {
        decode_tile(v, first, height, s, tile);
        for (ptrdiff_t i = begin; i < end; i++) {
            const ptrdiff_t tokens = panel_width(p, i), at = i * WIDE * v->spans + s * tokens;
            multiply_panel(tile, height, v->x + at * v->width, tokens, v->width, v->x_scale + at,
                           dot + height * (i - begin) * WIDE);
        }
    }
    finish_panels(v->product, v->w->codec->table_scale, first, rows, p, begin, end, height, dot, v->x_sum);
}

static int multiply_several(const view *v, int threads)
{
    const panels *p = &v->tokens;
    const ptrdiff_t out = v->w->out_features, block = smaller(p->count, TOKEN_BLOCK / WIDE);
    const ptrdiff_t height = is_few(v) ? TILE_ROWS_FEW : p->count == 1 ? 2 * MICRO_ROWS : TILE_ROWS;
    const size_t tile_bytes = (size_t)round_up(height * v->width + TARGET_SLACK, 32) * sizeof(int16_t);
    const size_t dot_bytes = (size_t)round_up(height * block * WIDE * (ptrdiff_t)sizeof(float), 64);
    char *const memory = pllm_alloc((tile_bytes + dot_bytes) * (size_t)threads);
    if (!memory)
        return PLLM_ENOMEM;
    memset(memory, 0, (tile_bytes + dot_bytes) * (size_t)threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (ptrdiff_t first = 0; first < out; first += height) {
        char *const mine = memory + (tile_bytes + dot_bytes) * (size_t)omp_get_thread_num();
        int16_t *const tile = (int16_t *)(void *)mine;
        float *const dot = (float *)(void *)(mine + tile_bytes);
        const ptrdiff_t rows = smaller(height, out - first);
        if (is_few(v))
            multiply_tile_few(v, first, rows, tile, dot);
        else
            for (ptrdiff_t begin = 0; begin < p->count; begin += block)
                multiply_tile_many(v, first, rows, begin, smaller(begin + block, p->count), tile, dot);
    }
    free(memory);
    return PLLM_OK;
}

#if defined(PLLM_ISA_AVX512)
#include "infer_tiles.h"
#endif

/* ---- the whole ------------------------------------------------------------------------------- */

/* What is made of the codec: its table, and rows near the payload's end. Placed in memory, a multiple of 64 bytes, or
 * only counted when that is NULL. */
static size_t place_codec(view *v, char *memory)
{
    if (v->code.code) {
        if (memory)
            trellis_place(&v->code, memory);
        return trellis_bytes(&v->code);
    }
    const size_t table = (size_t)round_up((ptrdiff_t)row_table_bytes(&v->table, v->w->codec), 64);
    const size_t tail = (size_t)((v->w->out_features - v->tail) * v->row_stride_bytes);
    if (memory) {
        make_rows(&v->table, v->w->codec, memory);
        v->tail_rows = (uint8_t *)(memory + table);
        memcpy(v->tail_rows, v->w->packed + v->tail * v->row_stride_bytes, tail);
        memset(v->tail_rows + tail, 0, OCTET_BYTES);
    }
    return table + (size_t)round_up((ptrdiff_t)tail + OCTET_BYTES, 64);
}

/* Places the call's arrays in memory, or only counts its bytes when that is NULL. */
static size_t place(view *v, char *memory)
{
    const size_t codec = place_codec(v, memory);
    const size_t n = (size_t)v->tokens.width, spans = (size_t)v->spans;
    const size_t x = n * spans * (size_t)v->width * sizeof(int16_t);
    const size_t scales = n * spans * sizeof(float), sums = n * sizeof(float);
    if (memory) {
        v->x = (int16_t *)(void *)(memory + codec);
        v->x_scale = (float *)(void *)(memory + codec + x);
        v->x_sum = v->x_scale + n * spans;
    }
    return codec + x + scales + sums;
}

/* A view with all it needs, and the tokens quantised. Returns its memory, to be freed, or NULL. */
static char *open_view(view *v, const pllm_product *p, int in_tiles, int threads)
{
    *v = view_of(p, in_tiles);
    char *const memory = pllm_alloc(place(v, NULL));
    if (!memory)
        return NULL;
    place(v, memory);
    memset(v->x_sum, 0, (size_t)v->tokens.width * sizeof *v->x_sum);
    sum_tokens(p, v->x_sum, threads);
    if (is_few(v))
        quantise_few(v);
#if defined(PLLM_ISA_AVX512)
    else if (v->in_tiles)
        quantise_in_tiles(v, threads);
#endif
    else {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (ptrdiff_t i = 0; i < v->tokens.count; i++)
            quantise_panel(v, i);
    }
    return memory;
}

/* Threads that are worth their start. */
static int threads_for(const pllm_product *p, int count, int threads)
{
    ptrdiff_t work = 0;
    for (int i = 0; i < count; i++) {
        const int d = p[i].w->codec->d;
        work += p[i].w->out_features * ((p[i].w->in_features + d - 1) / d) * (1 + d * p[i].n / 32);
    }
    return (int)smaller(threads, 1 + work / WORK_PER_THREAD);
}

static int multiply_view(const view *v, int threads)
{
    if (v->one_by_one)
        return multiply_one_by_one(v, 1, threads);
#if defined(PLLM_ISA_AVX512)
    if (v->in_tiles)
        return multiply_in_tiles(v, threads);
#endif
    return multiply_several(v, threads);
}

int PLLM_SYM(infer_multiply_integer)(const pllm_product *p, int count, int in_tiles, int threads)
{
    view v[INFER_TOGETHER];
    char *memory[INFER_TOGETHER];
    const int used = threads_for(p, count, threads);
    int status = PLLM_OK, one_by_one = 1;
#pragma omp parallel for num_threads(used) schedule(static, 1) if (used > 1 && count > 1)
    for (int i = 0; i < count; i++)
        memory[i] = open_view(v + i, p + i, in_tiles, count > 1 ? 1 : used);
    for (int i = 0; i < count; i++) {
        status = memory[i] ? status : PLLM_ENOMEM;
        one_by_one = one_by_one && memory[i] && v[i].one_by_one;
    }
    if (one_by_one)
        status = multiply_one_by_one(v, count, used);
    else
        for (int i = 0; i < count && status == PLLM_OK; i++)
            status = multiply_view(v + i, used);
    for (int i = 0; i < count; i++)
        free(memory[i]);
    return status;
}
