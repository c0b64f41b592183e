/* infer_tiles.h - several tokens in the tile registers of AMX: rows decoded to int8 times activations of int16.
 * Included by infer_int.c only, behind what it calls.
 *
 * An activation is 256 h + l with l in 0..255. Products with high and with low bytes are summed apart and put together
 * at the end of a span, all modulo 2^32; the span's sum itself fits. */
#ifndef PLLM_INFER_TILES_H
#define PLLM_INFER_TILES_H

#include "simd_tiles.h"

enum {
    STEP = TILE_ROW_BYTES,       /* values of a row in a tile */
    TILE_TOKENS = TILE_HEIGHT,   /* a vector of sums */
    PAIR_ROWS = 2 * TILE_HEIGHT, /* of the matrix, multiplied at a time */
    LEAST_BLOCK = 32,            /* tokens that are held while rows pass by */
    BLOCK_BYTES = 5 << 18,       /* or as many as these hold, of a second-level cache of 2 MB */
    SMALL_BLOCK_BYTES = 1 << 19, /* beside rows that are held for all tokens */
    ROWS_BYTES = 1 << 20         /* as many of those as these hold */
};

/* ---- activations ----------------------------------------------------------------------------- */

/* Gives token `token` of tiles (steps, {high, low}, STEP / 4, TILE_TOKENS, 4) its values x (steps, STEP). */
static void put_tile_token(const int16_t *x, ptrdiff_t steps, ptrdiff_t token, uint8_t *tiles)
{
    enum { HALF = STEP / 2 };
    tiles += 4 * token;
    for (ptrdiff_t i = 0; i < 2 * steps; i++, x += HALF) {
        uint8_t bytes[2][HALF];
        const __m512i both = _mm512_loadu_si512(x);
        _mm256_storeu_si256((__m256i *)(void *)bytes[0], _mm512_cvtepi16_epi8(_mm512_srai_epi16(both, 8)));
        _mm256_storeu_si256((__m256i *)(void *)bytes[1], _mm512_cvtepi16_epi8(both));
        for (int part = 0; part < 2; part++)
            for (int at = 0; at < HALF; at += 4)
                memcpy(tiles + part * TILE_SIZE + at / 4 * TILE_ROW_BYTES, bytes[part] + at, 4);
        tiles += i % 2 == 0 ? TILE_SIZE / 2 : 2 * TILE_SIZE - TILE_SIZE / 2;
    }
}

/* Zeros where there is no token. */
static void quantise_in_tiles(const view *v, const float *x, int threads)
{
    const ptrdiff_t groups = v->tokens.width / TILE_TOKENS;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (ptrdiff_t at = 0; at < groups * v->spans; at++) {
        const ptrdiff_t first = at % groups * TILE_TOKENS;
        const ptrdiff_t tokens = smaller(TILE_TOKENS, v->tokens.tokens - first);
        int16_t values[LAID_OUT] = {0}, *const tiles = v->x + at * TILE_TOKENS * v->width;
        if (tokens < TILE_TOKENS) {
            memset(tiles, 0, (size_t)(TILE_TOKENS * v->width) * sizeof *tiles);
            memset(v->x_scale + at * TILE_TOKENS, 0, TILE_TOKENS * sizeof *v->x_scale);
        }
        for (ptrdiff_t t = 0; t < tokens; t++) {
            v->x_scale[at * TILE_TOKENS + t] = quantise_span(v, x, first + t, at / groups, values);
            put_tile_token(values, v->width / STEP, t, (uint8_t *)tiles);
        }
    }
}

/* ---- products -------------------------------------------------------------------------------- */

/* Sums of the products with high and with low bytes. */
typedef struct {
    _Alignas(64) int32_t high[PAIR_ROWS * TILE_TOKENS], low[PAIR_ROWS * TILE_TOKENS];
} tile_sums;

/* sums = w (PAIR_ROWS, width) x tiles (as put_tile_token's). */
static void multiply_tiles(const int8_t *w, ptrdiff_t width, const uint8_t *tiles, tile_sums *sums)
{
    const int8_t *const second = w + TILE_HEIGHT * width;
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (ptrdiff_t i = 0; i < width; i += STEP, tiles += 2 * TILE_SIZE) {
        TILE_LOAD(4, w + i, width);
        TILE_LOAD(6, tiles, STEP);
        TILE_DOT_SIGNED(0, 4, 6);
        TILE_LOAD(7, tiles + TILE_SIZE, STEP);
        TILE_DOT_UNSIGNED(1, 4, 7);
        TILE_LOAD(5, second + i, width);
        TILE_DOT_SIGNED(2, 5, 6);
        TILE_DOT_UNSIGNED(3, 5, 7);
    }
    TILE_STORE(0, sums->high);
    TILE_STORE(1, sums->low);
    TILE_STORE(2, sums->high + TILE_HEIGHT * TILE_TOKENS);
    TILE_STORE(3, sums->low + TILE_HEIGHT * TILE_TOKENS);
}

/* dot (PAIR_ROWS, TILE_TOKENS) += scale (TILE_TOKENS) * the sums. */
static void add_sums(const tile_sums *sums, const float *scale, float *dot)
{
    const vf factor = vf_load(scale);
    for (ptrdiff_t i = 0; i < PAIR_ROWS * TILE_TOKENS; i += TILE_TOKENS) {
        const vi sum = vi_add(vi_sll(vi_load(sums->high + i), 8), vi_load(sums->low + i));
        vf_store(dot + i, vf_fma(factor, vf_from_i(sum), vf_load(dot + i)));
    }
}

/* target (PAIR_ROWS, width) = span s of the rows from `first` on, where there are any. Asks for what comes next. */
static void decode_pair(const view *v, ptrdiff_t first, ptrdiff_t s, int8_t *target)
{
    decode_bytes_fn *const decode = bytes_decoder_for(&v->table);
    const ptrdiff_t bytes = v->span / OCTET * v->table.bits, end = smaller(first + PAIR_ROWS, v->w->out_features);
    const ptrdiff_t next = s + 1 < v->spans ? bytes : PAIR_ROWS * v->row_stride_bytes - s * bytes;
    for (ptrdiff_t r = first; r < end; r++, target += v->width) {
        const uint8_t *const source = row_source(v, r) + s * bytes;
        ask_ahead(source, next, bytes);
        ask_ahead(source, next + bytes - 1, 1); /* where it ends, in another line */
        decode(&v->table, source, octets_of(v, s), target);
        if (r % 4 == 3)
            TILE_DOT_SIGNED(0, 4, 6); /* for nothing: tiles that rest for long wake up slowly */
    }
}

/* y of the rows from `first` and the tokens from `token` on, as finish_product gives it.
 * dot: (PAIR_ROWS, TILE_TOKENS), overwritten. */
static void finish_tile(const view *v, ptrdiff_t first, ptrdiff_t token, float *dot, const float *bias, float *y)
{
    const ptrdiff_t out = v->w->out_features, rows = smaller(PAIR_ROWS, out - first);
    const ptrdiff_t tokens = smaller(TILE_TOKENS, v->tokens.tokens - token);
    for (ptrdiff_t r = 0; r < rows; r++)
        finish_tokens(v->w, v->w->codec->table_scale, first + r, TILE_TOKENS, v->x_sum + token, bias,
                      dot + r * TILE_TOKENS);
    for (ptrdiff_t t = 0; t < tokens; t++) {
        float *const target = y + (token + t) * out + first;
        ptrdiff_t r = 0;
        for (; r + VF_WIDTH <= rows; r += VF_WIDTH)
            vf_store(target + r, vf_gather(dot + r * TILE_TOKENS + t, vi_mul(vi_iota(), vi_set1(TILE_TOKENS))));
        for (; r < rows; r++)
            target[r] = dot[r * TILE_TOKENS + t];
    }
}

/* How a matrix is worked off. Rows that are looked up are decoded span by span, once more for every block of tokens;
 * those that are gathered, which takes longer, once, whole, and many before the next block of tokens comes. */
typedef struct {
    int held;               /* whether decoded rows are kept for all tokens */
    ptrdiff_t rows, tokens; /* of a block: whole pairs, whole tiles */
    ptrdiff_t pass;         /* tokens for which the matrix is decoded */
    ptrdiff_t pair_bytes;   /* of PAIR_ROWS decoded rows, or a span of them */
} tile_blocks;

static tile_blocks blocks_of(const view *v, int threads)
{
    const ptrdiff_t n = v->tokens.width, row_bytes = v->spans * v->width, token_bytes = 2 * row_bytes;
    tile_blocks b = {!has_planes(&v->table), PAIR_ROWS, n, n, PAIR_ROWS * v->width};
    const int several = n * token_bytes > BLOCK_BYTES;
    const ptrdiff_t fit = (b.held ? SMALL_BLOCK_BYTES : BLOCK_BYTES) / token_bytes;
    const ptrdiff_t most = fit < LEAST_BLOCK ? LEAST_BLOCK : fit / TILE_TOKENS * TILE_TOKENS;
    if (several) /* about as many tokens in each */
        b.tokens = round_up(n / ((n + most - 1) / most), TILE_TOKENS);
    if (b.held) {
        const ptrdiff_t rows = several ? smaller(ROWS_BYTES / row_bytes, v->w->out_features / (4 * threads)) : 0;
        b.rows = rows < PAIR_ROWS ? PAIR_ROWS : rows / PAIR_ROWS * PAIR_ROWS;
        b.pair_bytes *= v->spans;
    } else
        b.pass = b.tokens;
    return b;
}

/* y of PAIR_ROWS rows from `first` on and the tokens begin..end, multiples of TILE_TOKENS.
 * w: the rows decoded, (spans, PAIR_ROWS, width), when `held`; else one span of them, overwritten.
 * dot: (tokens / TILE_TOKENS, PAIR_ROWS, TILE_TOKENS), overwritten. */
static void multiply_pair(const view *v, ptrdiff_t first, int held, int8_t *w, ptrdiff_t begin, ptrdiff_t end,
                          const float *bias, float *dot, float *y)
{
    tile_sums sums;
    memset(dot, 0, (size_t)((end - begin) * PAIR_ROWS) * sizeof *dot);
    for (ptrdiff_t s = 0; s < v->spans; s++) {
        if (!held)
            decode_pair(v, first, s, w);
        for (ptrdiff_t t = begin; t < end; t += TILE_TOKENS) {
            const ptrdiff_t at = s * v->tokens.width + t;
            multiply_tiles(w, v->width, (const uint8_t *)(v->x + at * v->width), &sums);
            add_sums(&sums, v->x_scale + at, dot + (t - begin) * PAIR_ROWS);
        }
        w += held ? PAIR_ROWS * v->width : 0;
    }
    for (ptrdiff_t t = begin; t < end; t += TILE_TOKENS)
        finish_tile(v, first, t, dot + (t - begin) * PAIR_ROWS, bias, y);
}

/* y of a block of rows from `first` on, and of a pass of tokens from `begin` on. w: the rows decoded when they are
 * held, or a span of a pair of them, and a vector behind. */
static void multiply_block(const view *v, const tile_blocks *b, ptrdiff_t first, ptrdiff_t begin, const float *bias,
                           int8_t *w, float *dot, float *y)
{
    const ptrdiff_t end = smaller(first + b->rows, v->w->out_features);
    const ptrdiff_t last = smaller(begin + b->pass, v->tokens.width);
    for (ptrdiff_t r = first; b->held && r < end; r += PAIR_ROWS)
        for (ptrdiff_t s = 0; s < v->spans; s++)
            decode_pair(v, r, s, w + (r - first) / PAIR_ROWS * b->pair_bytes + s * PAIR_ROWS * v->width);
    for (ptrdiff_t t = begin; t < last; t += b->tokens)
        for (ptrdiff_t r = first; r < end; r += PAIR_ROWS)
            multiply_pair(v, r, b->held, w + (r - first) / PAIR_ROWS * b->pair_bytes, t,
                          smaller(t + b->tokens, last), bias, dot, y);
}

static int multiply_in_tiles(const view *v, const float *bias, float *y, int threads)
{
    const ptrdiff_t out = v->w->out_features;
    const tile_blocks b = blocks_of(v, threads);
    const size_t w_bytes = (size_t)round_up(b.rows / PAIR_ROWS * b.pair_bytes + CHUNK, 64);
    const size_t bytes = w_bytes + (size_t)(PAIR_ROWS * b.tokens) * sizeof(float);
    char *const memory = pllm_alloc(bytes * (size_t)threads);
    if (!memory)
        return PLLM_ENOMEM;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char *const mine = memory + bytes * (size_t)omp_get_thread_num();
        tiles_begin();
        memset(mine, 0, w_bytes);
        for (ptrdiff_t begin = 0; begin < v->tokens.width; begin += b.pass)
#pragma omp for schedule(dynamic) nowait
            for (ptrdiff_t first = 0; first < out; first += b.rows)
                multiply_block(v, &b, first, begin, bias, (int8_t *)mine, (float *)(void *)(mine + w_bytes), y);
        tiles_end();
    }
    free(memory);
    return PLLM_OK;
}

#endif
