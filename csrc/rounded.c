/* rounded.c - products of float32 matrices with both factors rounded to integers. Compiled once per instruction set.
 *
 * A line of a factor is cut into spans of SPAN values; those of a span become integers with one scale, the largest
 * magnitude LARGEST, so that the dot product of two spans is exact in int32 (SPAN * LARGEST^2 < 2^31), in whatever
 * order it is summed. Spans are added up in float32, in their order: no result depends on instruction set, thread count
 * or tiling. Two products of int16 start where one of float32 does.
 *
 * The left factor is rounded at once. A task has a block of lines of the right factor and a chunk of those of the left:
 * span by span it rounds the block, which then stays in the first-level cache, and adds to sums that stay in the second,
 * beside the span of the chunk.
 */
#include <omp.h>

#include "micro_int16.h"

enum {
    SPAN = 256,
    LARGEST = 2895,
    PANELS = 3,               /* of a block of the right factor */
    BLOCK = PANELS * WIDE,    /* its lines */
    CHUNK = 576,              /* lines of the left factor; a multiple of every MICRO_ROWS */
    TILE = MICRO_ROWS * WIDE, /* sums of a register tile */
    LINES_AHEAD = 3           /* between the line that is read or written and the one that is asked for */
};
_Static_assert(CHUNK % MICRO_ROWS == 0, "a chunk is whole tiles");

/* Lines of float32. */
typedef struct {
    const float *values; /* (lines, length) */
    ptrdiff_t lines, length;
} factor;

/* The left factor, rounded; zeros where a line or a span has ended. */
typedef struct {
    ptrdiff_t lines; /* filled up to whole tiles */
    int16_t *values; /* (spans, lines / MICRO_ROWS, SPAN / 2, MICRO_ROWS, 2) */
    float *scale;    /* (spans, lines) */
} rounded_factor;

/* A block of the right factor, one span of it. */
typedef struct {
    _Alignas(64) int16_t values[PANELS][SPAN * WIDE]; /* each as put_line has it */
    float scale[BLOCK];
} right_block;

/* One thread's memory. */
typedef struct {
    right_block right;
    _Alignas(64) float dot[CHUNK / MICRO_ROWS][PANELS][TILE]; /* each (MICRO_ROWS, WIDE) */
} task_memory;

static ptrdiff_t spans_of(ptrdiff_t length) { return (length + SPAN - 1) / SPAN; }

/* Values of span s as they are multiplied: a multiple of 4. */
static ptrdiff_t span_width(ptrdiff_t length, ptrdiff_t s) { return round_up(smaller(SPAN, length - s * SPAN), 4); }

/* Values of span s of a line; none behind the last line. */
static ptrdiff_t span_count(const factor *f, ptrdiff_t line, ptrdiff_t s)
{
    return line < f->lines ? smaller(SPAN, f->length - s * SPAN) : 0;
}

static const float *span_values(const factor *f, ptrdiff_t line, ptrdiff_t s)
{
    return f->values + line * f->length + s * SPAN;
}

/* SPAN values: span s of a line and zeros behind it, in place where it is whole, else in `copy`. */
static const float *span_of(const factor *f, ptrdiff_t line, ptrdiff_t s, float *copy)
{
    const ptrdiff_t count = span_count(f, line, s);
    if (count == SPAN)
        return span_values(f, line, s);
    memset(copy, 0, SPAN * sizeof *copy);
    if (count > 0)
        memcpy(copy, span_values(f, line, s), (size_t)count * sizeof *copy);
    return copy;
}

/* value (SPAN) = span s of a line in integers; zeros for lines behind the last. Returns the scale: NaN where the span
 * holds NaN or Inf, and 0 when nothing in it reaches 2^-114; values are zeros then. */
static float round_span(const factor *f, ptrdiff_t line, ptrdiff_t s, int16_t *value)
{
    float copy[SPAN];
    const float *const x = span_of(f, line, s, copy);
    vf zeros = vf_zero(), peaks = vf_zero();
    for (int i = 0; i < SPAN; i += VF_WIDTH) {
        const vf here = vf_load(x + i);
        peaks = vf_max(peaks, vf_abs(here));
        zeros = vf_fma(here, vf_zero(), zeros);
    }
    const float peak = vm_any(vm_not(vf_eq(zeros, vf_zero()))) ? NAN : -vf_lowest(vf_neg(peaks));
    if (!(peak >= 0x1p-114f)) {
        memset(value, 0, SPAN * sizeof *value);
        return peak < 0x1p-114f ? 0.0f : peak;
    }
    const vf inverse = vf_set1((float)LARGEST / peak);
    for (int i = 0; i < SPAN; i += VF_WIDTH)
        vi_store_i16(value + i, vi_from_f(vf_mul(vf_load(x + i), inverse)));
    return peak / (float)LARGEST;
}

/* Where the left factor has the values of MICRO_ROWS lines from `line` on. */
static int16_t *left_values(const rounded_factor *left, ptrdiff_t s, ptrdiff_t line)
{
    return left->values + (s * left->lines + line) * SPAN;
}

static void round_left(const factor *f, const rounded_factor *left, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (ptrdiff_t line = 0; line < left->lines; line++)
        for (ptrdiff_t s = 0; s < spans_of(f->length); s++) {
            int16_t value[SPAN];
            left->scale[s * left->lines + line] = round_span(f, line, s, value);
            int16_t *target = left_values(left, s, line / MICRO_ROWS * MICRO_ROWS) + line % MICRO_ROWS * 2;
            for (int i = 0; i < SPAN; i += 2, target += 2 * MICRO_ROWS)
                memcpy(target, value + i, 2 * sizeof *target);
        }
}

/* Asks for a whole span, which lies too far from that of the line before it for the processor to do so. */
static void ask_for_span(const factor *f, ptrdiff_t line, ptrdiff_t s)
{
    for (int i = 0; i < SPAN && span_count(f, line, s) == SPAN; i += 16)
        PLLM_PREFETCH(span_values(f, line, s) + i);
}

static void round_right(const factor *f, ptrdiff_t first, ptrdiff_t s, right_block *right)
{
    const ptrdiff_t width = span_width(f->length, s);
    for (ptrdiff_t l = 0; l < BLOCK; l++) {
        int16_t value[SPAN];
        ask_for_span(f, first + l + LINES_AHEAD, s);
        right->scale[l] = round_span(f, first + l, s, value);
        put_line(value, width, l % WIDE, WIDE, right->values[l / WIDE]);
    }
}

/* dot (MICRO_ROWS, WIDE) += w x' of `width` values, times their scales. w: (width / 2, MICRO_ROWS, 2). */
static void multiply_tile(const int16_t *w, const float *w_scale, const int16_t *x, const float *x_scale,
                          ptrdiff_t width, float *dot)
{
    vi s[MICRO_ROWS][MICRO_VECTORS];
    micro_sums(MICRO_ROWS, MICRO_VECTORS, w, 2, 2 * MICRO_ROWS, x, width, s);
    PLLM_UNROLL
    for (int r = 0; r < MICRO_ROWS; r++)
        for (int v = 0; v < MICRO_VECTORS; v++) {
            float *const target = dot + r * WIDE + v * VF_WIDTH;
            const vf scale = vf_mul(vf_set1(w_scale[r]), vf_load(x_scale + v * VF_WIDTH));
            vf_store(target, vf_fma(scale, vf_from_i(s[r][v]), vf_load(target)));
        }
}

/* out (lines of x, lines of w) = x w'; or, with x the lines from `first` on of w, out += x w' on and below the
 * diagonal of w w'. */
typedef struct {
    factor x, w;
    rounded_factor left; /* x */
    float *out;
    int is_gram;
    ptrdiff_t first;
} product;

/* m->dot = the sums of `lines` lines of the left from `begin` on and a block of the right from `column` on. */
static void multiply_chunk(const product *p, ptrdiff_t begin, ptrdiff_t lines, ptrdiff_t column, task_memory *m)
{
    const ptrdiff_t length = p->x.length, groups = (lines + MICRO_ROWS - 1) / MICRO_ROWS;
    memset(m->dot, 0, (size_t)groups * sizeof *m->dot);
    for (ptrdiff_t s = 0; s < spans_of(length); s++) {
        const ptrdiff_t width = span_width(length, s);
        round_right(&p->w, column, s, &m->right);
        for (ptrdiff_t g = 0; g < groups; g++) {
            const ptrdiff_t line = begin + g * MICRO_ROWS;
            const int16_t *const next = left_values(&p->left, s, line + MICRO_ROWS);
            for (int i = 0; i < PANELS; i++) {
                for (ptrdiff_t part = i * 32; part < width * MICRO_ROWS; part += PANELS * 32)
                    PLLM_PREFETCH(next + part);
                multiply_tile(left_values(&p->left, s, line), p->left.scale + s * p->left.lines + line,
                              m->right.values[i], m->right.scale + i * WIDE, width, m->dot[g][i]);
            }
        }
    }
}

/* Writes the sums to where they belong, or adds them. */
static void finish_chunk(const product *p, ptrdiff_t begin, ptrdiff_t lines, ptrdiff_t first, const task_memory *m)
{
    for (ptrdiff_t line = begin; line < begin + lines; line++) {
        if (line + LINES_AHEAD < begin + lines)
            for (int i = 0; i < BLOCK; i += 16)
                PLLM_PREFETCH(p->out + (line + LINES_AHEAD) * p->w.lines + first + i);
        for (int i = 0; i < PANELS; i++) {
            const ptrdiff_t column = first + i * WIDE, r = line - begin;
            const ptrdiff_t end = p->is_gram ? p->first + line + 1 : p->w.lines;
            const float *const dot = m->dot[r / MICRO_ROWS][i] + r % MICRO_ROWS * WIDE;
            float *const out = p->out + line * p->w.lines + column;
            for (ptrdiff_t c = 0; c < smaller(WIDE, end - column); c++)
                out[c] = p->is_gram ? out[c] + dot[c] : dot[c];
        }
    }
}

/* All of x with a block of w from `column` on. */
static void run_task(const product *p, ptrdiff_t column, task_memory *m)
{
    const ptrdiff_t above = p->is_gram && column > p->first ? column - p->first : 0; /* of the diagonal */
    for (ptrdiff_t begin = above / MICRO_ROWS * MICRO_ROWS; begin < p->x.lines; begin += CHUNK) {
        const ptrdiff_t lines = smaller(CHUNK, p->x.lines - begin);
        multiply_chunk(p, begin, lines, column, m);
        finish_chunk(p, begin, lines, column, m);
    }
}

static int multiply(product *p, int threads)
{
    const ptrdiff_t spans = spans_of(p->x.length), columns = p->is_gram ? p->first + p->x.lines : p->w.lines;
    p->left.lines = round_up(p->x.lines, MICRO_ROWS);
    p->left.values = pllm_alloc((size_t)(spans * p->left.lines * SPAN) * sizeof *p->left.values);
    p->left.scale = pllm_alloc_floats((size_t)(spans * p->left.lines));
    task_memory *const memory = pllm_alloc(sizeof *memory * (size_t)threads);
    const int status = p->left.values && p->left.scale && memory ? PLLM_OK : PLLM_ENOMEM;
    if (status == PLLM_OK) {
        round_left(&p->x, &p->left, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
        for (ptrdiff_t column = 0; column < columns; column += BLOCK)
            run_task(p, column, memory + omp_get_thread_num());
    }
    free(p->left.values);
    free(p->left.scale);
    free(memory);
    return status;
}

int PLLM_SYM(pllm_rounded_linear)(const float *x, ptrdiff_t n, const float *w, ptrdiff_t m, ptrdiff_t k, float *out,
                                  int threads)
{
    product p = {.x = {x, n, k}, .w = {w, m, k}, .out = out};
    return multiply(&p, threads);
}

int PLLM_SYM(pllm_rounded_gram)(const float *x, ptrdiff_t n, ptrdiff_t k, ptrdiff_t first, ptrdiff_t end, float *out,
                                int threads)
{
    product p = {.x = {x + first * k, end - first, k}, .w = {x, n, k}, .out = out + first * n};
    p.is_gram = 1;
    p.first = first;
    return multiply(&p, threads);
}
