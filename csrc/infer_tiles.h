/* infer_tiles.h - several tokens in the tile registers of AMX: rows decoded to int8 times activations of int16.
 * Included by infer_int.c only, behind what it calls.
 *
 * An activation is 256 h + l with l in 0..255. Products with high and with low bytes are summed apart and put together
 * at the end of a span, all modulo 2^32; the span's sum itself fits.
 *
 * A block of rows is decoded span by span, once for all tokens. It stays in the second-level cache while the tokens
 * pass by, with the sums of both. A tile's sums are ready long after its last product: they are added up beside the
 * products of the next tile. */
#ifndef PLLM_INFER_TILES_H
#define PLLM_INFER_TILES_H

#include "simd_tiles.h"

enum {
    STEP = TILE_ROW_BYTES,       /* values of a row in a tile */
    TILE_TOKENS = TILE_HEIGHT,   /* a vector of sums */
    PAIR_ROWS = 2 * TILE_HEIGHT, /* of the matrix, multiplied at a time */
    PAIR_STEP = 2 * TILE_SIZE,   /* bytes of such rows in a step; and of a tile of tokens, high and low */
    BLOCK_ROWS = 256,            /* the most rows that are decoded at a time */
    PASS_TOKENS = 512,           /* the most tokens for which they are */
    ROWS_AHEAD = 16,             /* rows between the one that is decoded and the one that is asked for */
    NEAR_BYTES = 1 << 20         /* of activations that a second-level cache may hold beside them */
};

/* ---- activations ----------------------------------------------------------------------------- */

/* The bytes of a tile's tokens in one span, high and low. */
typedef struct {
    uint8_t of[2][TILE_TOKENS][LAID_OUT];
} token_bytes;

/* Gives token `token` its values x (width). */
static void split_token(const int16_t *x, ptrdiff_t width, ptrdiff_t token, token_bytes *bytes)
{
    for (ptrdiff_t i = 0; i < width; i += STEP) {
        const __m512i a = _mm512_loadu_si512(x + i), b = _mm512_loadu_si512(x + i + STEP / 2);
        const __m512i high = narrowed(_mm512_srai_epi16(a, 8), _mm512_srai_epi16(b, 8));
        _mm512_storeu_si512(bytes->of[0][token] + i, high);
        _mm512_storeu_si512(bytes->of[1][token] + i, narrowed(a, b));
    }
}

/* tiles (width / STEP, {high, low}, STEP / 4, TILE_TOKENS, 4) = the bytes. */
static void put_tiles(const token_bytes *bytes, ptrdiff_t width, uint8_t *tiles)
{
    for (ptrdiff_t i = 0; i < width; i += STEP)
        for (int part = 0; part < 2; part++, tiles += TILE_SIZE) {
            vi fours[TILE_TOKENS];
            for (int t = 0; t < TILE_TOKENS; t++)
                fours[t] = _mm512_loadu_si512(bytes->of[part][t] + i);
            vi_transpose(fours);
            for (int t = 0; t < TILE_TOKENS; t++)
                _mm512_storeu_si512(tiles + t * TILE_ROW_BYTES, fours[t]);
        }
}

/* Asks for a token's values of a span, which lie too far from those of the token before it for the processor to do
 * so. */
PLLM_INLINE void ask_for_input(const view *v, ptrdiff_t token, ptrdiff_t s)
{
    const pllm_product *const p = v->product;
    const ptrdiff_t size = p->number == PLLM_FLOAT32 ? 4 : 2;
    ptrdiff_t first;
    const ptrdiff_t columns = span_columns(v, s, &first);
    if (!v->code.code || !v->code.code->order)
        ask_ahead(p->x, (token * v->w->in_features + first) * size, columns * size);
}

/* Zeros where there is no token. */
static void quantise_in_tiles(const view *v, int threads)
{
    const ptrdiff_t groups = v->tokens.width / TILE_TOKENS;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (ptrdiff_t at = 0; at < groups * v->spans; at++) {
        const ptrdiff_t first = at % groups * TILE_TOKENS;
        int16_t values[LAID_OUT] = {0};
        token_bytes bytes;
        for (ptrdiff_t t = 0; t < TILE_TOKENS; t++) {
            const int is_there = first + t < v->tokens.tokens;
            ask_for_input(v, first + t + 1, at / groups);
            float *const scale = v->x_scale + at * TILE_TOKENS + t;
            *scale = is_there ? quantise_span(v, first + t, at / groups, values) : 0.0f;
            if (!is_there)
                memset(values, 0, sizeof values);
            split_token(values, v->width, t, &bytes);
        }
        put_tiles(&bytes, v->width, (uint8_t *)(v->x + at * TILE_TOKENS * v->width));
    }
}

/* ---- rows ------------------------------------------------------------------------------------ */

/* The tokens begin..end, whole tiles, and the rows first..first+rows-1, whole pairs. */
typedef struct {
    ptrdiff_t begin, end, first, rows;
} tile_block;

/* Asks for the indices that are decoded ROWS_AHEAD rows after row r's in span s: the block's next, or those of its
 * next span, or the next block's. */
PLLM_INLINE void ask_for_indices(const view *v, const tile_block *b, ptrdiff_t r, ptrdiff_t s)
{
    r += ROWS_AHEAD;
    if (r >= b->first + b->rows) {
        r -= s + 1 < v->spans ? b->rows : 0;
        s = s + 1 < v->spans ? s + 1 : 0;
    }
    r = smaller(r, v->w->out_features - 1);
    if (v->code.code) {
        trellis_ask(&v->code, r, s);
        return;
    }
    const ptrdiff_t bytes = v->span / OCTET * v->table.bits;
    const uint8_t *const source = row_source(v, r) + s * bytes;
    ask_ahead(source, 0, bytes);
    ask_ahead(source, bytes - 1, 1); /* where it ends, in another line */
}

/* target (steps, 8, VB_WIDTH) = the values of a span as bytes, `apart` bytes from one vector to the next. */
PLLM_INLINE void trellis_bytes_of(const int8_t *tables, const uint8_t *const *rows, const ptrdiff_t *start,
                                  const trellis_span *span, const int bits, int8_t *target, ptrdiff_t apart)
{
    for (ptrdiff_t i = 0; i < trellis_steps(span); i++) {
        trellis_indices index;
        trellis_load(rows, start, span->first / 8 + i * VB_WIDTH, bits, &index);
        PLLM_UNROLL
        for (int j = 0; j < 8; j++, target += apart)
            vb_store(target, trellis_value(tables, &index, bits, j));
    }
}

#define TRELLIS_BYTES(B) \
    static void trellis_bytes_##B(const int8_t *tables, const uint8_t *const *rows, const ptrdiff_t *start, \
                                  const trellis_span *span, int8_t *target, ptrdiff_t apart) \
    { \
        trellis_bytes_of(tables, rows, start, span, B, target, apart); \
    }
EACH_TRELLIS_BITS(TRELLIS_BYTES)
#undef TRELLIS_BYTES

typedef void trellis_bytes_fn(const int8_t *tables, const uint8_t *const *rows, const ptrdiff_t *start,
                              const trellis_span *span, int8_t *target, ptrdiff_t apart);
#define TRELLIS_ENTRY(B) trellis_bytes_##B,
static trellis_bytes_fn *const trellis_bytes_functions[] = {EACH_TRELLIS_BITS(TRELLIS_ENTRY)};
#undef TRELLIS_ENTRY

/* The values of a span of a row as bytes, as trellis_bytes_of has them. */
static void trellis_decode_bytes(const trellis *t, ptrdiff_t row, const trellis_span *span, int8_t *target,
                                 ptrdiff_t apart)
{
    const int more = pllm_trellis_more(t->code, row);
    const uint8_t *rows[TRELLIS_GROUP_ROWS];
    trellis_history(t, row, 1, rows);
    trellis_bytes_functions[span->bits + more - 1](t->table, rows, t->start[more], span, target, apart);
}

/* w (width / STEP, PAIR_ROWS, STEP) = span s of row r, its place in the pair. row (width): zeros behind what is
 * decoded. */
static void decode_row(const view *v, ptrdiff_t r, ptrdiff_t s, int8_t *row, int8_t *w)
{
    if (v->code.code) {
        trellis_decode_bytes(&v->code, r, v->code.span + s, w, PAIR_ROWS * STEP);
        return;
    }
    const int at_once = is_in_chunks(&v->table); /* else through `row` */
    const ptrdiff_t bytes = v->span / OCTET * v->table.bits;
    bytes_decoder_for(&v->table)(&v->table, row_source(v, r) + s * bytes, octets_of(v, s), at_once ? w : row,
                                 PAIR_ROWS * STEP);
    for (ptrdiff_t i = 0; i < v->width && !at_once; i += STEP)
        memcpy(w + i * PAIR_ROWS, row + i, STEP);
}

/* The same of the block's rows from `first` on, where there are any. */
static void decode_pair(const view *v, const tile_block *b, ptrdiff_t first, ptrdiff_t s, int8_t *row, int8_t *w)
{
    const ptrdiff_t end = smaller(first + PAIR_ROWS, v->w->out_features);
    for (ptrdiff_t r = first; r < end; r++, w += STEP) {
        ask_for_indices(v, b, r, s);
        decode_row(v, r, s, row, w);
        if (r % 4 == 3)
            TILE_DOT_SIGNED(0, 4, 6); /* for nothing: tiles that rest for long wake up slowly */
    }
}

/* ---- products -------------------------------------------------------------------------------- */

/* Sums of PAIR_ROWS rows and a tile of tokens with high and with low bytes, and where they go:
 * dot (PAIR_ROWS, TILE_TOKENS) += scale (TILE_TOKENS) * the sums. */
typedef struct {
    _Alignas(64) int32_t high[PAIR_ROWS * TILE_TOKENS], low[PAIR_ROWS * TILE_TOKENS];
    vf scale;
    float *dot;
} tile_sums;

/* The next `rows` of those that are left. */
PLLM_INLINE void add_sums(const tile_sums *sums, ptrdiff_t rows, ptrdiff_t *done)
{
    for (ptrdiff_t end = smaller(*done + rows, PAIR_ROWS); *done < end; ++*done) {
        const ptrdiff_t at = *done * TILE_TOKENS;
        const vi sum = vi_add(vi_sll(vi_load(sums->high + at), 8), vi_load(sums->low + at));
        vf_store(sums->dot + at, vf_fma(sums->scale, vf_from_i(sum), vf_load(sums->dot + at)));
    }
}

/* What is multiplied with each other: `steps` of PAIR_STEP bytes. far: activations that are asked for, `lines` a
 * step. */
typedef struct {
    const int8_t *w;
    const uint8_t *x, *far;
    ptrdiff_t steps, lines;
} tile_operands;

/* sums = w x; beside it the sums before them are added up. */
static void multiply_tiles(const tile_operands *o, const tile_sums *before, tile_sums *sums)
{
    const ptrdiff_t rows = (PAIR_ROWS / 4 + o->steps - 1) / o->steps;
    const int8_t *w = o->w;
    const uint8_t *x = o->x, *far = o->far;
    ptrdiff_t done = 0;
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (ptrdiff_t i = 0; i < o->steps; i++, w += PAIR_STEP, x += PAIR_STEP, far += o->lines * CACHE_LINE) {
        TILE_LOAD(4, w, STEP);
        TILE_LOAD(6, x, STEP);
        TILE_DOT_SIGNED(0, 4, 6);
        add_sums(before, rows, &done);
        TILE_LOAD(7, x + TILE_SIZE, STEP);
        TILE_DOT_UNSIGNED(1, 4, 7);
        add_sums(before, rows, &done);
        TILE_LOAD(5, w + TILE_SIZE, STEP);
        TILE_DOT_SIGNED(2, 5, 6);
        add_sums(before, rows, &done);
        TILE_DOT_UNSIGNED(3, 5, 7);
        add_sums(before, rows, &done);
        for (ptrdiff_t line = 0; line < o->lines; line++)
            PLLM_PREFETCH_FAR(far + line * CACHE_LINE);
    }
    TILE_STORE(0, sums->high);
    TILE_STORE(1, sums->low);
    TILE_STORE(2, sums->high + TILE_HEIGHT * TILE_TOKENS);
    TILE_STORE(3, sums->low + TILE_HEIGHT * TILE_TOKENS);
}

/* One thread's memory. */
typedef struct {
    tile_sums sums[2];
    int8_t row[LAID_OUT + TARGET_SLACK];
    int8_t *w;  /* a span of a block of rows, by pairs of tiles (width / STEP, PAIR_ROWS, STEP) */
    float *dot; /* (tokens / TILE_TOKENS, rows / PAIR_ROWS, PAIR_ROWS, TILE_TOKENS) */
} tile_memory;

/* Whether the activations stay in a second-level cache. */
static int is_near(const view *v) { return 2 * v->tokens.width * v->spans * v->width <= NEAR_BYTES; }

/* m->dot = the products. */
static void multiply_block(const view *v, const tile_block *b, tile_memory *m)
{
    const ptrdiff_t steps = v->width / STEP, lines = 2 * TILE_TOKENS * v->width / CACHE_LINE;
    const ptrdiff_t per_step = is_near(v) ? 0 : (lines * PAIR_ROWS - 1) / (b->rows * steps) + 1;
    int turn = 0;
    ptrdiff_t done = 0;
    memset(m->dot, 0, (size_t)((b->end - b->begin) * b->rows) * sizeof *m->dot);
    memset(m->sums, 0, sizeof m->sums);
    m->sums[1].dot = m->dot; /* zeros are added first */
    for (ptrdiff_t s = 0; s < v->spans; s++) {
        for (ptrdiff_t r = 0; r < b->rows; r += PAIR_ROWS)
            decode_pair(v, b, b->first + r, s, m->row, m->w + r * v->width);
        for (ptrdiff_t t = b->begin; t < b->end; t += TILE_TOKENS) {
            const ptrdiff_t at = s * v->tokens.width + t;
            const uint8_t *const x = (const uint8_t *)(v->x + at * v->width);
            const uint8_t *far = x + lines * CACHE_LINE;
            for (ptrdiff_t r = 0; r < b->rows; r += PAIR_ROWS, far += per_step * steps * CACHE_LINE) {
                const tile_operands o = {m->w + r * v->width, x, far, steps, per_step};
                multiply_tiles(&o, m->sums + !turn, m->sums + turn);
                m->sums[turn].scale = vf_load(v->x_scale + at);
                m->sums[turn].dot = m->dot + (t - b->begin) * b->rows + r * TILE_TOKENS;
                turn = !turn;
            }
        }
    }
    add_sums(m->sums + !turn, PAIR_ROWS, &done);
}

/* of (TILE_TOKENS, BLOCK_ROWS) = the products of TILE_HEIGHT rows from `row` on, as finish_product gives them.
 * dot: theirs (TILE_HEIGHT, TILE_TOKENS), of the tokens from `token` on. */
static void finish_tile(const view *v, ptrdiff_t row, ptrdiff_t token, const float *dot, float *of)
{
    const pllm_matrix *const w = v->w;
    const float *const bias = v->product->bias;
    const int rows = (int)smaller(TILE_HEIGHT, w->out_features - row);
    const vf scale = vf_mul(vf16_load_part(w->scale + row, rows).part[0], vf_set1(w->codec->table_scale));
    const vf shift = w->shift ? vf16_load_part(w->shift + row, rows).part[0] : vf_zero();
    const vf added = bias ? vf16_load_part(bias + row, rows).part[0] : vf_zero();
    vi here[TILE_HEIGHT];
    for (int i = 0; i < TILE_HEIGHT; i++)
        here[i] = vi_bits(vf_load(dot + i * TILE_TOKENS));
    vi_transpose(here);
    for (int t = 0; t < TILE_TOKENS; t++) {
        vf sum = vf_mul(scale, vf_bits(here[t]));
        if (w->shift)
            sum = vf_add(sum, vf_mul(shift, vf_set1(v->x_sum[token + t])));
        vf_store(of + t * BLOCK_ROWS, vf_add(sum, added));
    }
}

static void finish_block(const view *v, const tile_block *b, const float *dot)
{
    const ptrdiff_t rows = smaller(b->rows, v->w->out_features - b->first);
    float of[TILE_TOKENS * BLOCK_ROWS];
    for (ptrdiff_t t = b->begin; t < b->end; t += TILE_TOKENS, dot += TILE_TOKENS * b->rows) {
        for (ptrdiff_t r = 0; r < rows; r += TILE_HEIGHT)
            finish_tile(v, b->first + r, t, dot + r * TILE_TOKENS, of + r);
        for (ptrdiff_t i = 0; i < smaller(TILE_TOKENS, v->tokens.tokens - t); i++)
            put_output(v->product, t + i, b->first, rows, of + i * BLOCK_ROWS);
    }
}

/* Rows of a block, as many as leave each thread some; or a pair, where activations stay in the cache anyway and no
 * table has to be fetched again after each pair's products. */
static ptrdiff_t block_rows(const view *v, int threads)
{
    const ptrdiff_t share = round_up(v->w->out_features / (4 * threads), PAIR_ROWS);
    return share == 0 || (is_near(v) && (v->code.code || has_planes(&v->table))) ? PAIR_ROWS : smaller(share, BLOCK_ROWS);
}

static int multiply_in_tiles(const view *v, int threads)
{
    const ptrdiff_t out = v->w->out_features, rows = block_rows(v, threads), n = v->tokens.width;
    const size_t own = (size_t)round_up(sizeof(tile_memory), 64), w_bytes = (size_t)(rows * v->width);
    const size_t bytes = own + w_bytes + (size_t)(rows * smaller(n, PASS_TOKENS)) * sizeof(float);
    char *const memory = pllm_alloc(bytes * (size_t)threads);
    if (!memory)
        return PLLM_ENOMEM;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        tile_memory *const m = (tile_memory *)(void *)(memory + bytes * (size_t)omp_get_thread_num());
        memset(m, 0, own + w_bytes);
        m->w = (int8_t *)m + own;
        m->dot = (float *)(void *)(m->w + w_bytes);
        tiles_begin();
#pragma omp for schedule(dynamic) nowait
        for (ptrdiff_t first = 0; first < out; first += rows)
            for (ptrdiff_t begin = 0; begin < n; begin += PASS_TOKENS) {
                const tile_block b = {begin, smaller(begin + PASS_TOKENS, n), first,
                                      smaller(rows, round_up(out - first, PAIR_ROWS))};
                multiply_block(v, &b, m);
                finish_block(v, &b, m->dot);
            }
        tiles_end();
    }
    free(memory);
    return PLLM_OK;
}

#endif
