/* trellis.c - the best bits of a matrix in trellis codes, by Viterbi's algorithm. Compiled once per instruction set.
 *
 * The register's 256 states are those of the trellis. Of a row, each of the eight subsets of the levels, named by the
 * parities of the window, has a metric: the least weighted squared error of its levels. A step adds to the costs of
 * the paths so far the metrics of one row, and of the two paths that meet in each state the cheaper one survives; a bit
 * a state says which. Then the path is traced back from its end.
 *
 * The two paths that meet in the states 2 i and 2 i + 1 come from i and i + 128. A step is done in place, the new
 * states where the old ones were: after t steps, state s stands at place s turned right by t bits, and the two old
 * states of a step are 128 >> t mod 8 places apart. So most steps work on whole vectors without moving a lane; in the
 * last few of eight, vectors have both old states in them.
 *
 * Parities are linear: the subset of place v + lane is that of place v xor that of the lane. So eight permutations of
 * the eight metrics of a row serve all vectors of a step.
 *
 * Costs are sums of squares, never negative and never NaN, so that their bits as integers compare as they do. */
#include "feedback_product.h"

#include <assert.h>
#include <omp.h>

enum {
    STATES = 1 << PLLM_TRELLIS_MEMORY,
    VECTORS = STATES / VF_WIDTH, /* of costs */
    UNROLLED = 8,                /* vectors that a step goes through without a loop; divides VECTORS / 2 */
    SUBSETS = 1 << PLLM_TRELLIS_CODED,
    LANES = VF_WIDTH > SUBSETS ? VF_WIDTH : SUBSETS, /* that hold a value of each subset, again and again */
    MOST_ROWS = 2 * PLLM_TRELLIS_SEGMENT,            /* of a segment, filled up to whole vectors */
    CHUNKS = MOST_ROWS / PRODUCT_ROWS,               /* of a segment at most */
    BLOCK_COLUMNS = 256,                             /* of a block with feedback */
    STRIP_COLUMNS = 16,                              /* of a strip of it; divides BLOCK_COLUMNS */
    FEW_COLUMNS = 16,                                /* without: less memory, more tasks */
    TOGETHER = 8,                                    /* rows read side by side */
    SYMBOL_STRIDE = MOST_ROWS + 64                   /* so that the columns of a row do not meet in the cache */
};

/* Bits of the lanes of a vector. */
#if VF_WIDTH > 8
typedef uint16_t lane_bits;
#else
typedef uint8_t lane_bits;
#endif

typedef struct {
    ptrdiff_t rows, columns, chunks;
    int width; /* columns of a block */
    const float *x, *weight, *feedback, *factor;
    const uint8_t *bits;
    pllm_trellis code; /* its `extra` */
    uint8_t *symbol;
    int32_t pattern[PLLM_TRELLIS_MEMORY][SUBSETS][VF_WIDTH]; /* subsets of a vector by the step and its first */
    float level[((1 << PLLM_TRELLIS_BITS) - 1) * LANES];     /* of 1, 2, ... bits (further bits, LANES) */
    /* With feedback, else NULL: the sums of the errors so far, the values of a block, and the feedback of the errors of
     * a block to the columns behind it, of each strip to the block's columns behind it, both in panels, and to each
     * column of a strip from those before it. */
    float *sum;     /* (chunks, columns, PRODUCT_ROWS) */
    float *value;   /* (chunks, BLOCK_COLUMNS, PRODUCT_ROWS) */
    float *outside; /* (columns, BLOCK_COLUMNS) */
    float *inside;  /* (strips, BLOCK_COLUMNS, STRIP_COLUMNS) */
    float *strip;   /* (BLOCK_COLUMNS, STRIP_COLUMNS) */
} job;

/* Scratch of one thread, for one column of a segment; rows are counted from the segment's first. */
typedef struct {
    _Alignas(64) float cost[STATES];
    float metric[MOST_ROWS * LANES];
    lane_bits survivor[MOST_ROWS * VECTORS]; /* set where the path from the upper state survives */
    float target[MOST_ROWS];
    uint8_t is_richer[MOST_ROWS]; /* a row with a bit more */
    uint8_t path[PLLM_TRELLIS_MEMORY + MOST_ROWS]; /* first bits, all ones where set; before them the register's */
    uint8_t subset[MOST_ROWS];
    int32_t further[MOST_ROWS];
    uint8_t symbol[BLOCK_COLUMNS * SYMBOL_STRIDE]; /* (width, SYMBOL_STRIDE) of the block */
    float value[FEW_COLUMNS * MOST_ROWS]; /* of the block, without feedback */
} scratch;

/* Columns first..first + count - 1 of the rows start..start + n - 1, a segment. */
typedef struct {
    ptrdiff_t first, start;
    int count, n;
    float *value; /* (CHUNKS, width, PRODUCT_ROWS) x, then errors */
} part;

/* ---- the trellis --------------------------------------------------------------------------------- */

PLLM_INLINE int turn_left(int place, int bits)
{
    bits %= PLLM_TRELLIS_MEMORY;
    return (place << bits | place >> (PLLM_TRELLIS_MEMORY - bits)) & (STATES - 1);
}

static int turn_right(int state, int bits)
{
    return turn_left(state, PLLM_TRELLIS_MEMORY - bits % PLLM_TRELLIS_MEMORY);
}

PLLM_INLINE int subset_of(int window)
{
    static const int taps[PLLM_TRELLIS_CODED] = PLLM_TRELLIS_TAPS;
    return __builtin_parity((unsigned)(window & taps[0])) | __builtin_parity((unsigned)(window & taps[1])) << 1 |
           __builtin_parity((unsigned)(window & taps[2])) << 2;
}

/* Where the levels of k bits are. */
static const float *levels_of(const job *j, int k) { return j->level + ((1 << (k - 1)) - 1) * LANES; }

/* magnitude: of k bits.  level: (2^(k - 1), LANES). */
static void set_levels(const float *magnitude, int k, float *level)
{
    const int count = 2 << k; /* magnitudes, half of the levels */
    for (int i = 0; i < 2 * count; i++) {
        const int rest = i % count;
        const float value = i < count ? magnitude[rest] : -magnitude[count - 1 - rest];
        for (int lane = i % SUBSETS; lane < LANES; lane += SUBSETS)
            level[i / SUBSETS * LANES + lane] = value;
    }
}

static void set_tables(job *j, const float *level)
{
    for (int k = 1; k <= PLLM_TRELLIS_BITS; k++)
        set_levels(level + pllm_trellis_magnitudes(k), k, j->level + ((1 << (k - 1)) - 1) * LANES);
    for (int t = 0; t < PLLM_TRELLIS_MEMORY; t++)
        for (int first = 0; first < SUBSETS; first++)
            for (int lane = 0; lane < VF_WIDTH; lane++)
                j->pattern[t][first][lane] = first ^ subset_of(turn_left(lane, t + 1));
}

/* ---- the cheapest path --------------------------------------------------------------------------- */

/* metric (LANES) = the least weight (target - level)^2 of each subset; infinite where that is no number.
 * level: (count, LANES). */
PLLM_INLINE void set_metric(const int count, const float *level, float target, float weight, float *metric)
{
    for (int lane = 0; lane < LANES; lane += VF_WIDTH) {
        vf error = vf_sub(vf_set1(target), vf_load(level + lane)), least = vf_mul(error, error);
        for (int u = 1; u < count; u++) {
            error = vf_sub(vf_set1(target), vf_load(level + u * LANES + lane));
            least = vf_min(vf_mul(error, error), least);
        }
        vf_store(metric + lane, vf_min(vf_mul(vf_set1(weight), least), vf_set1(INFINITY)));
    }
}

/* s->metric of n rows of k bits. */
static void set_metrics(const job *j, const part *p, int k, scratch *s)
{
    for (int r = 0; r < p->n; r++) {
        const int bits = k + s->is_richer[r];
        PLLM_CONSTANT_D(set_metric, 1 << (bits - 1), levels_of(j, bits), s->target[r], j->weight[p->start + r],
                        s->metric + r * LANES);
    }
}

/* The costs of a vector of new states from those of the lower and the upper state before each. subset: of the first
 * lane on the way from the lower one; *survivor: which survive, where they are `kept`. */
PLLM_INLINE vf survive(vf lower, vf upper, const vf *metric, const int subset, const int kept, lane_bits *survivor)
{
    const int other = subset ^ subset_of(STATES);
    const vi first = vi_bits(vf_add(lower, metric[subset])), second = vi_bits(vf_add(upper, metric[other]));
    if (kept)
        *survivor = (lane_bits)vm_bits(vi_lt(second, first));
    return vf_bits(vi_min(second, first));
}

/* The first of the places that hold new states of a vector, v, has this subset on the way from the lower old state. */
PLLM_INLINE int subset_at(const int phase, const int v) { return subset_of(turn_left(v * VF_WIDTH, phase + 1)); }

/* A step whose old states stand in two vectors, `apart` vectors from each other, as do then the even and the odd new
 * ones. */
PLLM_INLINE void step_vectors(const int phase, const int apart, float *cost, const vf *metric, const int kept,
                              lane_bits *survivor)
{
    PLLM_UNROLL
    for (int from = 0; from < VECTORS / 2; from += UNROLLED) {
        PLLM_UNROLL
        for (int i = from; i < from + UNROLLED; i++) {
            const int even = i + i / apart * apart, odd = even + apart;
            float *const first = cost + even * VF_WIDTH, *const second = cost + odd * VF_WIDTH;
            vf lower = vf_load(first), upper = vf_load(second);
            PLLM_HOLD(lower);
            PLLM_HOLD(upper);
            vf_store(first, survive(lower, upper, metric, subset_at(phase, even), kept, survivor + even));
            vf_store(second, survive(lower, upper, metric, subset_at(phase, odd), kept, survivor + odd));
        }
    }
}

/* A step whose old states stand in one vector, `apart` lanes from each other. */
PLLM_INLINE void step_lanes(const int phase, const int apart, float *cost, const vf *metric, const int kept,
                            lane_bits *survivor)
{
    PLLM_UNROLL
    for (int from = 0; from < VECTORS; from += UNROLLED) {
        PLLM_UNROLL
        for (int v = from; v < from + UNROLLED; v++) {
            float *const here = cost + v * VF_WIDTH;
            vf_store(here, survive(vf_load_without(here, apart), vf_load_with(here, apart), metric,
                                   subset_at(phase, v), kept, survivor + v));
        }
    }
}

/* One row. cost: in their places after `phase` steps.  row: (LANES) its metrics.  survivor: (VECTORS) by the places of
 * the new states, where they are `kept`. */
PLLM_INLINE void step(const int phase, const int kept, const job *j, float *cost, const float *row,
                      lane_bits *survivor)
{
    const int apart = STATES / 2 >> phase;
    vf metric[SUBSETS];
    PLLM_UNROLL
    for (int i = 0; i < SUBSETS; i++)
        metric[i] = vf_look_up8(row, vi_load(j->pattern[phase][i]));
    if (apart >= VF_WIDTH)
        step_vectors(phase, apart / VF_WIDTH, cost, metric, kept, survivor);
    else
        step_lanes(phase, apart, cost, metric, kept, survivor);
}

typedef void step_fn(const job *j, float *cost, const float *row, lane_bits *survivor);

/* Copies for each of eight steps. */
#define STEP_OF(PHASE) \
    static void step_##PHASE(const job *j, float *cost, const float *row, lane_bits *survivor) \
    { \
        step(PHASE, 0, j, cost, row, survivor); \
    } \
    static void kept_##PHASE(const job *j, float *cost, const float *row, lane_bits *survivor) \
    { \
        step(PHASE, 1, j, cost, row, survivor); \
    }
STEP_OF(0) STEP_OF(1) STEP_OF(2) STEP_OF(3) STEP_OF(4) STEP_OF(5) STEP_OF(6) STEP_OF(7)
#undef STEP_OF

/* The rows from..to - 1, of which the first is step t; kept: survivors are. */
static void run(const job *j, scratch *s, int from, int to, int t, int kept)
{
    static step_fn *const step_of[2][PLLM_TRELLIS_MEMORY] = {
        {step_0, step_1, step_2, step_3, step_4, step_5, step_6, step_7},
        {kept_0, kept_1, kept_2, kept_3, kept_4, kept_5, kept_6, kept_7},
    };
    for (int r = from; r < to; r++, t++)
        step_of[kept][t % PLLM_TRELLIS_MEMORY](j, s->cost, s->metric + r * LANES, s->survivor + r * VECTORS);
}

/* The state of least cost after t steps, the lowest on ties. */
static int cheapest(const float *cost, int t)
{
    int best = STATES;
    vf low = vf_load(cost);
    for (int i = VF_WIDTH; i < STATES; i += VF_WIDTH)
        low = vf_min(vf_load(cost + i), low);
    low = vf_set1(vf_lowest(low));
    for (int i = 0; i < STATES; i += VF_WIDTH)
        for (unsigned hits = vm_bits(vf_eq(vf_load(cost + i), low)); hits; hits &= hits - 1)
            best = (int)smaller(best, turn_left(i + __builtin_ctz(hits), t));
    return best;
}

/* All ones where the path from the upper state survives in the state of a place. survivor: (VECTORS) of its row. */
PLLM_INLINE unsigned is_upper(const lane_bits *survivor, unsigned place)
{
    return 0u - (survivor[place / VF_WIDTH] >> place % VF_WIDTH & 1u);
}

/* The state before the first of n rows, of which the last was step t - 1 and led to `end`. path: (n) first bits.
 * A step back sets one bit of the place. Not to wait for it, the step before looks up what survives in either case. */
static int trace_back(const lane_bits *survivor, int n, int t, int end, uint8_t *path)
{
    unsigned place = (unsigned)turn_right(end, t); /* but for its newest bit, which is set if `upper` is */
    unsigned newest = 0, upper = 0;
    for (int r = n - 1; r >= 0; r--) {
        const unsigned set = STATES / 2 >> --t % PLLM_TRELLIS_MEMORY;
        const unsigned without = is_upper(survivor + r * VECTORS, place);
        const unsigned differs = without ^ is_upper(survivor + r * VECTORS, place | newest);
        path[r] = (uint8_t)-((place & set) != 0);
        place = (place | (newest & upper)) & ~set;
        upper = without ^ (differs & upper);
        newest = set;
    }
    return turn_left((int)(place | (newest & upper)), t);
}

/* Costs of paths that all start in one state. */
static void start_in(scratch *s, int state)
{
    for (int i = 0; i < STATES; i++)
        s->cost[i] = i == state ? 0.0f : INFINITY;
}

/* path = the first bits of the best path through n rows, and the register before it. */
static void find_path(const job *j, scratch *s, int n)
{
    uint8_t *const path = s->path + PLLM_TRELLIS_MEMORY;
    int start = 0, end;
    if (n >= PLLM_TRELLIS_SHORT) {
        const int length = (int)smaller(PLLM_TRELLIS_OVERLAP, n / 2);
        memset(s->cost, 0, sizeof s->cost);
        run(j, s, n - length, n, 0, 0);
        run(j, s, 0, length, length, 1);
        start = trace_back(s->survivor, length, 2 * length, cheapest(s->cost, 2 * length), path);
    }
    start_in(s, start);
    run(j, s, 0, n, 0, 1);
    end = n >= PLLM_TRELLIS_SHORT ? start : cheapest(s->cost, n);
    trace_back(s->survivor, n, n, end, path);
    for (int i = 0; i < PLLM_TRELLIS_MEMORY; i++)
        path[-1 - i] = (uint8_t)-(start >> i & 1);
}

/* subset = those of n rows of the path; zeros up to a whole vector. */
static void set_subsets(scratch *s, int n)
{
    const uint8_t *const path = s->path + PLLM_TRELLIS_MEMORY;
    memset(s->subset, 0, sizeof s->subset);
    for (int i = 0; i <= PLLM_TRELLIS_MEMORY; i++) {
        const uint8_t subset = (uint8_t)subset_of(1 << i);
        for (int r = 0; r < n; r++)
            s->subset[r] ^= path[r - i] & subset;
    }
}

/* Of k bits, the further ones of the level nearest to each target in its subset, and that level. */
PLLM_INLINE vi nearest_level(const job *j, int k, vf target, vi subset, vf *level)
{
    const float *const levels = levels_of(j, k);
    *level = vf_look_up8(levels, subset);
    vf error = vf_sub(target, *level), least = vf_mul(error, error);
    vi further = vi_set1(0);
    for (int u = 1; u < 1 << (k - 1); u++) {
        const vf next = vf_look_up8(levels + u * LANES, subset);
        error = vf_sub(target, next);
        error = vf_mul(error, error);
        const vm better = vf_lt(error, least);
        least = vf_select(better, error, least);
        *level = vf_select(better, next, *level);
        further = vi_select(better, vi_set1(u), further);
    }
    return further;
}

/* symbol = the first bits of n rows and the further ones. */
static void join(const uint8_t *restrict path, const int32_t *restrict further, int n, uint8_t *restrict symbol)
{
    for (int r = 0; r < n; r++)
        symbol[r] = (uint8_t)((path[r] & 1) | further[r] << 1);
}

/* Symbols of a column along the path, and its values in the place of x: x - factor level. */
static void set_symbols(const job *j, const part *p, int i, scratch *s)
{
    const int k = j->bits[p->first + i];
    const vf factor = vf_set1(j->factor[p->first + i]);
    set_subsets(s, p->n);
    for (int r = 0; r < p->n; r += VF_WIDTH) {
        float *const value = p->value + (r / PRODUCT_ROWS * j->width + i) * PRODUCT_ROWS + r % PRODUCT_ROWS;
        const vf target = vf_load(s->target + r);
        const vi subset = vi_load_u8(s->subset + r);
        vf level;
        vi further = nearest_level(j, k, target, subset, &level);
        if (j->code.extra) {
            const vm is_richer = vi_lt(vi_set1(0), vi_load_u8(s->is_richer + r));
            vf other;
            further = vi_select(is_richer, nearest_level(j, k + 1, target, subset, &other), further);
            level = vf_select(is_richer, other, level);
        }
        vi_store(s->further + r, further);
        vf_store(value, vf_sub(vf_load(value), vf_mul(factor, level)));
    }
    join(s->path + PLLM_TRELLIS_MEMORY, s->further, p->n, s->symbol + i * SYMBOL_STRIDE);
}

/* ---- columns of a segment ------------------------------------------------------------------------ */

/* value = x of n rows of a chunk; zeros behind them.  value: (width, PRODUCT_ROWS). */
static void load_chunk(const job *j, const part *p, ptrdiff_t start, int n, float *value)
{
    if (n < PRODUCT_ROWS)
        memset(value, 0, (size_t)p->count * PRODUCT_ROWS * sizeof *value);
    const float *row = j->x + start * j->columns + p->first;
    int r = 0;
    for (; r + TOGETHER <= n; r += TOGETHER, row += TOGETHER * j->columns)
        for (int c = 0; c < p->count; c++)
            for (int k = 0; k < TOGETHER; k++)
                value[c * PRODUCT_ROWS + r + k] = row[k * j->columns + c];
    for (; r < n; r++, row += j->columns)
        for (int c = 0; c < p->count; c++)
            value[c * PRODUCT_ROWS + r] = row[c];
}

/* Adds to the sums of the block's columns from i on the errors of the strip before them. */
static void feed_strip(const job *j, const part *p, int i)
{
    for (int r = 0; r < p->n; r += PRODUCT_ROWS)
        product_add(j->sum + (p->start + r) * j->columns + (p->first + i) * PRODUCT_ROWS, p->count - i,
                    p->value + r * j->width + (i - STRIP_COLUMNS) * PRODUCT_ROWS, STRIP_COLUMNS,
                    j->inside + (i - STRIP_COLUMNS) * BLOCK_COLUMNS);
}

/* target = (x + sum) / factor of a column, of which the sums get the errors of the strip's columns before it. */
static void set_targets(const job *j, const part *p, int i, scratch *s)
{
    const ptrdiff_t c = p->first + i;
    const int own = i % STRIP_COLUMNS;
    const vf factor = vf_set1(j->factor[c]);
    for (int r = 0; r < p->n; r += PRODUCT_ROWS) {
        const float *const x = p->value + r * j->width + i * PRODUCT_ROWS;
        float *sum = NULL;
        if (j->sum) {
            sum = j->sum + (p->start + r) * j->columns + c * PRODUCT_ROWS;
            product_add(sum, 1, x - own * PRODUCT_ROWS, own, j->strip + i * STRIP_COLUMNS);
        }
        for (int l = 0; l < PRODUCT_ROWS; l += VF_WIDTH) {
            const vf value = sum ? vf_add(vf_load(x + l), vf_load(sum + l)) : vf_load(x + l);
            vf_store(s->target + r + l, vf_div(value, factor));
        }
    }
}

/* to (n, count), with `stride` to a row = from (count, SYMBOL_STRIDE). */
static void store_symbols(const uint8_t *restrict from, int count, int n, uint8_t *restrict to, ptrdiff_t stride)
{
    for (int r = 0; r < n; r++, to += stride)
        for (int i = 0; i < count; i++)
            to[i] = from[i * SYMBOL_STRIDE + r];
}

static void encode_part(const job *j, const part *p, scratch *s)
{
    for (int r = 0; r < p->n; r += PRODUCT_ROWS)
        load_chunk(j, p, p->start + r, (int)smaller(p->n - r, PRODUCT_ROWS), p->value + r * j->width);
    for (int r = 0; r < p->n; r++)
        s->is_richer[r] = (uint8_t)pllm_trellis_more(&j->code, p->start + r);
    for (int i = 0; i < p->count; i++) {
        const int k = j->bits[p->first + i];
        if (j->sum && i > 0 && i % STRIP_COLUMNS == 0)
            feed_strip(j, p, i);
        if (k == 0) {
            memset(s->symbol + i * SYMBOL_STRIDE, 0, (size_t)p->n);
            continue;
        }
        set_targets(j, p, i, s);
        set_metrics(j, p, k, s);
        find_path(j, s, p->n);
        set_symbols(j, p, i, s);
    }
    store_symbols(s->symbol, p->count, p->n, j->symbol + p->start * j->columns + p->first, j->columns);
}

/* The part of a segment that has the columns from `first`. */
static part part_of(const job *j, ptrdiff_t segment, ptrdiff_t first)
{
    const ptrdiff_t start = segment * PLLM_TRELLIS_SEGMENT;
    const int is_last = segment == pllm_trellis_segments(j->rows) - 1;
    return (part){.first = first, .start = start, .count = (int)smaller(j->columns - first, j->width),
                  .n = is_last ? (int)(j->rows - start) : PLLM_TRELLIS_SEGMENT};
}

/* ---- all of it ----------------------------------------------------------------------------------- */

static void encode_alone(const job *j, scratch *all, int threads)
{
    const ptrdiff_t segments = pllm_trellis_segments(j->rows), blocks = round_up(j->columns, j->width) / j->width;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (ptrdiff_t i = 0; i < segments * blocks; i++) {
        scratch *const s = all + omp_get_thread_num();
        part p = part_of(j, i / blocks, i % blocks * j->width);
        p.value = s->value;
        encode_part(j, &p, s);
    }
}

/* panels = what the errors of the columns first..from - 1 mean for those from..to - 1. */
static void pack(const job *j, ptrdiff_t first, ptrdiff_t from, ptrdiff_t to, float *panels)
{
    for (ptrdiff_t c = from; c < to; c += PRODUCT_COLUMNS)
        panels = product_pack(panels, j->feedback + first * j->columns + c, from - first, j->columns,
                              smaller(to - c, PRODUCT_COLUMNS));
}

/* What the errors of a block's columns mean for each other and for those from `behind`, by the threads that call. */
static void pack_block(const job *j, ptrdiff_t first, ptrdiff_t behind)
{
#pragma omp for schedule(static) nowait
    for (ptrdiff_t c = first; c < behind; c += STRIP_COLUMNS) {
        const ptrdiff_t end = smaller(c + STRIP_COLUMNS, behind);
        for (ptrdiff_t own = c; own < end; own++)
            product_pack(j->strip + (own - first) * STRIP_COLUMNS, j->feedback + c * j->columns + own, own - c,
                         j->columns, 1);
        pack(j, c, end, behind, j->inside + (c - first) * BLOCK_COLUMNS);
    }
#pragma omp for schedule(static)
    for (ptrdiff_t c = behind; c < j->columns; c += PRODUCT_COLUMNS)
        product_pack(j->outside + (c - behind) * (behind - first), j->feedback + first * j->columns + c,
                     behind - first, j->columns, smaller(j->columns - c, PRODUCT_COLUMNS));
}

static void encode_fed(const job *j, scratch *all, int threads)
{
    const ptrdiff_t segments = pllm_trellis_segments(j->rows), chunk = PRODUCT_ROWS * j->columns;
#pragma omp parallel num_threads(threads)
    {
        scratch *const s = all + omp_get_thread_num();
#pragma omp for schedule(static)
        for (ptrdiff_t i = 0; i < j->chunks; i++)
            memset(j->sum + i * chunk, 0, (size_t)chunk * sizeof *j->sum);
        for (ptrdiff_t first = 0; first < j->columns; first += j->width) {
            const ptrdiff_t behind = smaller(first + j->width, j->columns);
            pack_block(j, first, behind);
#pragma omp for schedule(dynamic)
            for (ptrdiff_t i = 0; i < segments; i++) {
                part p = part_of(j, i, first);
                p.value = j->value + p.start * j->width;
                encode_part(j, &p, s);
            }
#pragma omp for schedule(static)
            for (ptrdiff_t i = 0; i < j->chunks; i++)
                product_add(j->sum + i * chunk + behind * PRODUCT_ROWS, j->columns - behind,
                            j->value + i * PRODUCT_ROWS * j->width, (int)(behind - first), j->outside);
        }
    }
}

/* The arrays of a job with feedback. What has been allocated is the caller's either way. */
static int make_room(job *j)
{
    const size_t rows = (size_t)j->chunks * PRODUCT_ROWS, columns = (size_t)j->columns;
    j->sum = pllm_alloc_floats(rows * columns);
    j->value = pllm_alloc_floats(rows * BLOCK_COLUMNS);
    j->strip = pllm_alloc_floats(BLOCK_COLUMNS * STRIP_COLUMNS);
    j->inside = pllm_alloc_floats(BLOCK_COLUMNS * BLOCK_COLUMNS);
    j->outside = pllm_alloc_floats(columns * BLOCK_COLUMNS);
    return j->sum && j->value && j->strip && j->inside && j->outside ? PLLM_OK : PLLM_ENOMEM;
}

int PLLM_SYM(pllm_encode_trellis)(const float *x, ptrdiff_t rows, ptrdiff_t columns, const float *weight,
                                  const float *feedback, const uint8_t *bits, int extra, const float *factor,
                                  const float *level, uint8_t *symbol, int threads)
{
    job j = {.rows = rows, .columns = columns, .chunks = round_up(rows, PRODUCT_ROWS) / PRODUCT_ROWS,
             .width = feedback ? BLOCK_COLUMNS : FEW_COLUMNS, .x = x, .weight = weight, .feedback = feedback,
             .factor = factor, .bits = bits, .code = {.extra = extra}, .symbol = symbol};
    assert(extra >= 0 && extra <= 3);
    for (ptrdiff_t c = 0; c < columns; c++)
        assert(bits[c] + (bits[c] && extra) <= PLLM_TRELLIS_BITS);
    if (rows == 0 || columns == 0)
        return PLLM_OK;
    set_tables(&j, level);
    scratch *const all = pllm_alloc((size_t)threads * sizeof *all);
    int status = feedback ? make_room(&j) : PLLM_OK;
    if (!all)
        status = PLLM_ENOMEM;
    if (status == PLLM_OK && feedback)
        encode_fed(&j, all, threads);
    else if (status == PLLM_OK)
        encode_alone(&j, all, threads);
    free(all);
    free(j.sum);
    free(j.value);
    free(j.strip);
    free(j.inside);
    free(j.outside);
    return status;
}
