/* tree_bytes.c - the search tree's codewords and boxes once more, rounded to bytes, and many queries searched through
 * them (tree.h, where the proof stands). Compiled once per instruction set.
 *
 * A few instructions compare sixteen boxes with a query, fewer the sixteen codewords of a leaf, and only codewords that
 * may be nearer than the best so far are scored. What is read for that fits in the second-level cache where the
 * codewords do not. A team of neighbouring queries takes each step together, so that a step has long lists to work
 * through and none waits for the end of its own. Comparing and listing are loops of their own: where a list ends is
 * known only when all before is compared, and what is stored there would keep the processor from reading ahead.
 */
#include "tree_bytes.h"

#include <assert.h>
#include <omp.h>

enum {
    FAN = TREE_BYTES_FAN,
    FAN_BITS = 4,
    TEAM = 16,     /* queries that go through the tree together */
    MIDDLE = 63,   /* of the bytes: -2 (c - MIDDLE) is a signed byte */
    GROUPS = TEAM * PLLM_MAX_CODEWORDS / (FAN * FAN), /* of leaves, if all members list all */
    LEAVES = 4096, /* listed before they are looked at, or a group more */
    FAR = 32766,   /* the largest limit; queries that need a larger one are left */
    SAMPLE = 1024, /* codewords that the scale is made for */
    ROUNDS = 8     /* of leaving out those that are far from all others */
};

/* How many standard deviations the bytes reach to both sides, which is measured, and where outliers begin. */
#define REACH 3.0
#define OUTLIER 4.0

/* What things cost, in codewords scored by the scan: measured. */
#define BOX_WORK 25.0
#define LEAF_WORK 10.0
#define SCORE_WORK 40.0

/* Queries under way. Lists hold numbers of boxes or leaves, those of member i up to its end. */
typedef struct {
    const pllm_tree *tree;
    int size;
    float z[PLLM_MAX_SUBVECTOR][TEAM];
    float reach[TEAM];            /* (1 + K) |X|^2 + tiny */
    float error[TEAM];            /* how much farther apart bytes may be than what they stand for, in steps */
    uint16_t bytes[TEAM][BYTES_PAIRS];
    int16_t square[TEAM], limit[TEAM];
    uint32_t open;                /* bit i: the limit of member i was not high enough */
    int64_t best[TEAM];           /* score and codeword, as a key */
    int32_t leaf[TEAM];           /* its own */
    uint16_t boxes[2][GROUPS + FAN], leaves[LEAVES + FAN];
    uint32_t below[GROUPS], near[LEAVES + 2 * FAN]; /* which boxes below a listed one, and codewords of a leaf, are near */
    int32_t hit[LEAVES + 2 * FAN]; /* places in the list of leaves that have such codewords */
    double work;
} team;

/* ---- the best so far ------------------------------------------------------------------------------- */

/* A score and its codeword as a number: the lowest index of the lowest score is the least. */
PLLM_INLINE int64_t key_of(float score, int32_t index)
{
    int32_t bits;
    score += 0.0f; /* -0 becomes 0, which it is equal to */
    memcpy(&bits, &score, sizeof bits);
    return (int64_t)((uint64_t)(uint32_t)(bits ^ (bits >> 31 & INT32_MAX)) << 32 | (uint32_t)index);
}

PLLM_INLINE void renew_limits(team *t, const int d)
{
    const pllm_tree *tree = t->tree;
    const vf slack = vf_set1((float)tree_slack(d)), two = vf_set1(2.0f), base = vf_set1(tree->bytes.base);
    const vf unit = vf_set1(tree->bytes.scale * tree->bytes.scale), more = vf_set1(1.0001f);
    int32_t ordered[TEAM];
    for (int i = 0; i < TEAM; i++)
        ordered[i] = (int32_t)(t->best[i] >> 32);
    PLLM_UNROLL
    for (int i = 0; i < TEAM; i += VF_WIDTH) {
        const vi bits = vi_load(ordered + i);
        const vf best = vf_bits(vi_xor(bits, vi_and(vi_sra(bits, 31), vi_set1(INT32_MAX))));
        const vf sum = vf_fma(two, best, vf_load(t->reach + i));
        const vf over = vf_sub(vf_fma(slack, vf_abs(sum), sum), base);
        const vf steps = vf_add(vf_sqrt(vf_mul(vf_max(over, vf_zero()), unit)), vf_load(t->error + i));
        const vf limit = vf_fma(vf_mul(steps, steps), more, vf_set1(1.0f - 32768.0f));
        vi_store_i16(t->limit + i, vi_from_f(vf_min(limit, vf_set1((float)FAR))));
        t->open |= vm_bits(vm_not(vf_lt(limit, vf_set1((float)FAR)))) << i;
    }
}

/* The better of `best` and the codewords of a leaf. */
PLLM_INLINE int64_t score_leaf(const pllm_tree *tree, const float *z, int leaf, int64_t best, const int d)
{
    const int size = tree_leaf_size(d), first = leaf * FAN, places = tree->leaf_count * size;
    vf score[FAN / VF_WIDTH], low = vf_set1(INFINITY);
    PLLM_UNROLL
    for (int v = 0; v < FAN / VF_WIDTH; v++) {
        const int place = first + v * VF_WIDTH;
        score[v] = vf_set1(INFINITY);
        if (place < places) {
            const float *c = tree->leaves + (size_t)(place / size) * (size_t)((d + 1) * size) + place % size;
            score[v] = vf_load(c);
            PLLM_UNROLL
            for (int j = 0; j < d; j++)
                score[v] = vf_fma(vf_set1(z[j]), vf_load(c + (j + 1) * size), score[v]);
        }
        low = vf_min(score[v], low);
    }
    const float lowest = vf_lowest(low);
    uint32_t equal = 0;
    PLLM_UNROLL
    for (int v = 0; v < FAN / VF_WIDTH; v++)
        equal |= vm_bits(vf_eq(score[v], vf_set1(lowest))) << (v * VF_WIDTH);
    for (; equal; equal &= equal - 1) {
        const int64_t key = key_of(lowest, tree->order[first + __builtin_ctz(equal)]);
        best = key < best ? key : best;
    }
    return best;
}

/* Scores the codewords that may be better, in the `hits` leaves of the list that have some. */
PLLM_INLINE void score_hits(team *t, int member, const int *end, int hits, const int d)
{
    const pllm_tree *tree = t->tree;
    const size_t row = (size_t)(d + 1);
    for (int i = 0; i < hits; i++) {
        const int place = t->leaves[t->hit[i]] * FAN + __builtin_ctz(t->near[t->hit[i]]) / BYTES_STEP;
        PLLM_PREFETCH(tree->rows + (size_t)place * row);
    }
    for (int i = 0; i < hits; i++) {
        const int first = t->leaves[t->hit[i]] * FAN;
        while (t->hit[i] >= end[member])
            member++;
        for (uint32_t near = t->near[t->hit[i]] & BYTES_FIRST; near; near &= near - 1) {
            const int place = first + __builtin_ctz(near) / BYTES_STEP;
            const float *c = tree->rows + (size_t)place * row;
            float score = c[0];
            PLLM_UNROLL
            for (int j = 0; j < d; j++)
                score = fmaf(t->z[j][member], c[j + 1], score);
            const int64_t key = key_of(score, tree->order[place]);
            t->best[member] = key < t->best[member] ? key : t->best[member];
            t->work += SCORE_WORK;
        }
    }
    renew_limits(t, d);
}

/* ---- the way through the tree ---------------------------------------------------------------------- */

PLLM_INLINE bytes_query load_member(const team *t, int i, const int d)
{
    return bytes_load(t->bytes[i], t->limit[i], t->square[i], (d + 1) / 2);
}

/* Appends the boxes of a group that `near` names; returns the new count. Writes up to FAN numbers more. */
PLLM_INLINE int append(const pllm_tree *tree, uint16_t *list, int count, uint32_t group, uint32_t near)
{
    for (int half = 0; half < FAN; half += 8) {
        const uint32_t bits = near >> half & 255;
        uint8_t places[8];
        memcpy(places, tree->bytes.pack + 8 * bits, sizeof places);
        for (int i = 0; i < 8; i++)
            list[count + i] = (uint16_t)(group * FAN + (uint32_t)half + places[i]);
        count += __builtin_popcount(bits);
    }
    return count;
}

/* Looks at the listed leaves of members first..last-1. */
PLLM_INLINE void search_leaves(team *t, int first, int last, const int *end, const int d)
{
    const uint8_t *leaves = t->tree->bytes.leaves;
    int count = 0, hits = 0;
    for (int i = first; i < last; i++) {
        const bytes_query q = load_member(t, i, d);
        for (; count < end[i]; count++)
            t->near[count] = bytes_near_codewords(&q, leaves + t->leaves[count] * tree_bytes_leaf(d), (d + 1) / 2);
    }
    memset(t->near + count, 0, VF_WIDTH * sizeof *t->near);
    for (int i = 0; i < count; i += VF_WIDTH) {
        const vm none = vi_eq(vi_load((const int32_t *)t->near + i), vi_set1(0));
        hits += vi_compress(t->hit + hits, vi_add(vi_set1(i), vi_iota()), vm_not(none));
    }
    t->work += LEAF_WORK * count;
    score_hits(t, first, end, hits, d);
}

/* Searches the leaves below the listed boxes of a level. end: of each member's boxes. */
PLLM_INLINE void search_boxes(team *t, int level, int *end, const int d)
{
    const pllm_tree *tree = t->tree;
    for (; level > 0; level--) {
        const uint16_t *from = t->boxes[level & 1];
        uint16_t *to = level > 1 ? t->boxes[~level & 1] : t->leaves;
        int count = 0, at = 0, first = 0;
        for (int i = 0; i < t->size; i++) {
            const bytes_query q = load_member(t, i, d);
            const int begin = at, stop = end[i];
            for (int k = begin; k < stop; k++)
                t->below[k] = bytes_near_boxes(&q, tree->bytes.boxes[level - 1] + from[k] * tree_bytes_group(d),
                                               (d + 1) / 2);
            for (; at < stop; at++) {
                count = append(tree, to, count, from[at], t->below[at]);
                if (level == 1 && count >= LEAVES) {
                    end[i] = count;
                    search_leaves(t, first, i + 1, end, d);
                    first = i;
                    count = 0;
                }
            }
            end[i] = count;
        }
        t->work += BOX_WORK * at;
        if (level == 1)
            search_leaves(t, first, t->size, end, d);
    }
}

/* Searches the neighbours of the members' own boxes of a level, all in the group of their parent; the own have been
 * searched. */
PLLM_INLINE void search_around(team *t, int level, const int d)
{
    const pllm_tree *tree = t->tree;
    uint16_t *list = level > 0 ? t->boxes[level & 1] : t->leaves;
    int end[TEAM], count = 0;
    for (int i = 0; i < t->size; i++) {
        const bytes_query q = load_member(t, i, d);
        const uint32_t own = (uint32_t)t->leaf[i] >> (FAN_BITS * level), group = own / FAN;
        const uint32_t near =
            bytes_near_boxes(&q, tree->bytes.boxes[level] + group * tree_bytes_group(d), (d + 1) / 2);
        end[i] = count = append(tree, list, count, group, near & ~(UINT32_C(1) << own % FAN));
    }
    t->work += BOX_WORK * t->size;
    if (level > 0)
        search_boxes(t, level, end, d);
    else
        search_leaves(t, 0, t->size, end, d);
}

/* ---- queries --------------------------------------------------------------------------------------- */

/* Loads the queries z[sorted[i]]; the last one fills up. */
PLLM_INLINE void load_queries(team *t, const float *z, const int32_t *sorted, const int d)
{
    const pllm_tree *tree = t->tree;
    const vf scale = vf_set1(tree->bytes.scale), last = vf_set1((float)TREE_BYTES_LAST);
    int32_t byte[PLLM_MAX_SUBVECTOR + 1][TEAM];
    memset(byte[d], 0, sizeof byte[d]);
    for (int i = 0; i < TEAM; i++) {
        const float *from = z + (ptrdiff_t)sorted[i < t->size ? i : t->size - 1] * d;
        PLLM_UNROLL
        for (int j = 0; j < d; j++)
            t->z[j][i] = from[j];
    }
    PLLM_UNROLL
    for (int i = 0; i < TEAM; i += VF_WIDTH) {
        vf square = vf_zero(), size = vf_set1(1.0f), error = vf_zero(), bytes = vf_zero();
        PLLM_UNROLL
        for (int j = 0; j < d; j++) {
            const vf x = vf_load(t->z[j] + i);
            const vf scaled = tree->weighted ? vf_mul(vf_set1(tree->root_weight[j]), x) : x;
            const vf steps = vf_mul(vf_sub(scaled, vf_set1(tree->bytes.origin[j])), scale);
            const vf within = vf_min(vf_max(steps, vf_zero()), last), whole = vf_rint(within);
            const vf off = vf_sub(within, whole);
            square = vf_fma(scaled, scaled, square);
            size = vf_add(size, vf_add(vf_abs(x), vf_abs(scaled)));
            error = vf_fma(off, off, error);
            bytes = vf_fma(whole, vf_sub(whole, vf_set1(2.0f * (float)MIDDLE)), bytes);
            vi_store(byte[j] + i, vi_from_f(whole));
        }
        square = vf_mul(square, vf_set1((float)(1.0 + tree_slack(d))));
        vf_store(t->reach + i, vf_fma(vf_set1((float)TREE_TINY), size, square));
        vf_store(t->error + i, vf_add(vf_sqrt(error), vf_set1(tree->bytes.error)));
        vi_store_i16(t->square + i, vi_sra(vi_sll(vi_from_f(bytes), 16), 16)); /* modulo 2^16 */
    }
    for (int i = 0; i < TEAM; i++)
        for (int p = 0; p < (d + 1) / 2; p++)
            t->bytes[i][p] = (uint16_t)(byte[2 * p][i] | byte[2 * p + 1][i] << 8);
}

PLLM_INLINE int search_bytes(team *t, const float *z, int32_t *sorted, int count, const int32_t *key, int levels,
                             const int32_t *previous, int32_t *index, float *error, const int d)
{
    const pllm_tree *tree = t->tree;
    int left = 0;
    for (int first = 0; first < count; first += TEAM) {
        t->size = count - first < TEAM ? count - first : TEAM;
        for (int i = first + TEAM; i < first + 2 * TEAM && i < count; i++)
            PLLM_PREFETCH(z + (ptrdiff_t)sorted[i] * d);
        load_queries(t, z, sorted + first, d);
        for (int i = 0; i < TEAM; i++) {
            const int32_t at = sorted[first + (i < t->size ? i : t->size - 1)];
            const float *x = z + (ptrdiff_t)at * d;
            t->leaf[i] = (key[at] >> levels) * tree->leaf_size / FAN;
            t->best[i] = previous ? key_of(tree_score(tree, x, previous[at], d), previous[at])
                                  : key_of(INFINITY, INT32_MAX);
            t->best[i] = score_leaf(tree, x, t->leaf[i], t->best[i], d);
        }
        t->open = 0;
        renew_limits(t, d);
        for (int level = 0; level < tree->bytes.level_count; level++)
            search_around(t, level, d);
        for (int i = 0; i < t->size; i++) {
            const int32_t at = sorted[first + i];
            index[at] = (int32_t)(uint32_t)t->best[i];
            if (error)
                error[at] = pllm_weighted_error(&tree->codebook, z + (ptrdiff_t)at * d, index[at], d);
            sorted[left] = at;
            left += (int)(t->open >> i & 1);
        }
    }
    return left;
}

/* One copy for each d, so that d is a constant in the inner loops. */
#define SEARCH(D) \
    static int search_##D(team *t, const float *z, int32_t *sorted, int count, const int32_t *key, int levels, \
                          const int32_t *previous, int32_t *index, float *error) \
    { \
        return search_bytes(t, z, sorted, count, key, levels, previous, index, error, D); \
    }
SEARCH(6) SEARCH(7) SEARCH(8) SEARCH(9) SEARCH(10) SEARCH(11)
SEARCH(12) SEARCH(13) SEARCH(14) SEARCH(15) SEARCH(16)

typedef int search_fn(team *, const float *, int32_t *, int, const int32_t *, int, const int32_t *, int32_t *,
                      float *);

static search_fn *const search_of[PLLM_MAX_SUBVECTOR + 1] = {
    [6] = search_6,   [7] = search_7,   [8] = search_8,   [9] = search_9,   [10] = search_10, [11] = search_11,
    [12] = search_12, [13] = search_13, [14] = search_14, [15] = search_15, [16] = search_16};

size_t PLLM_SYM(pllm_bytes_memory)(void) { return sizeof(team); }

int PLLM_SYM(pllm_bytes_search)(const pllm_tree *tree, const float *z, int32_t *sorted, int count,
                                const int32_t *key, int levels, const int32_t *previous, int32_t *index,
                                float *error, double *work, void *memory)
{
    const int d = tree->codebook.d;
    team *t = memory;
    t->tree = tree;
    t->work = *work;
    const int left = search_of[d](t, z, sorted, count, key, levels, previous, index, error);
    *work = t->work;
    return left;
}

/* ---- the build ------------------------------------------------------------------------------------- */

/* Mean and variance of a coordinate among some codewords, but for those farther than OUTLIER standard deviations from
 * the mean. */
static double spread(const float *x, int k, int d, double *mean)
{
    const int step = (k + SAMPLE - 1) / SAMPLE;
    double variance = INFINITY, before = 0.0;
    *mean = 0.0;
    for (int round = 0; round < ROUNDS && variance != before; round++) {
        double count = 0.0, sum = 0.0, squares = 0.0;
        for (int i = 0; i < k; i += step) {
            const double off = (double)x[(size_t)i * (size_t)d] - *mean;
            if (off * off <= OUTLIER * OUTLIER * variance) {
                count += 1.0;
                sum += off;
                squares += off * off;
            }
        }
        if (count == 0.0)
            break;
        before = variance;
        variance = fmax(squares / count - (sum / count) * (sum / count), 0.0);
        *mean += sum / count;
    }
    return variance;
}

/* Where the bytes of each coordinate begin, and how many steps are a unit: so that they reach REACH standard deviations
 * of the widest on both sides. Returns whether floats can say that. */
static int choose_scale(pllm_tree *tree, const float *scaled)
{
    const int d = tree->codebook.d;
    double mean[PLLM_MAX_SUBVECTOR], widest = 0.0;
    for (int j = 0; j < d; j++)
        widest = fmax(widest, spread(scaled + j, tree->codebook.k, d, mean + j));
    const double half = REACH * sqrt(widest), scale = 0.5 * TREE_BYTES_LAST / half;
    for (int j = 0; j < d; j++)
        tree->bytes.origin[j] = (float)(mean[j] - half);
    tree->bytes.scale = (float)scale;
    return scale > 1e-12 && scale < 1e12;
}

static uint8_t *group_at(const pllm_tree *tree, int level, int box)
{
    return tree->bytes.boxes[level] + (size_t)(box / FAN) * tree_bytes_group(tree->codebook.d) + 2 * (box % FAN);
}

/* Where the lower side of a box has coordinate j, its bound standing at `box`. The upper is BYTES_ROW further. */
static uint8_t *side(uint8_t *box, int j) { return box + (1 + j / 2 * 2) * BYTES_ROW + j % 2; }

/* A bound as it is stored: 32768 less, modulo 2^16. */
static void put_bound(uint8_t *to, int bound)
{
    const uint16_t bits = (uint16_t)(bound - 32768);
    memcpy(to, &bits, sizeof bits);
}

/* Fills a leaf and its box; returns the square of the largest error of its bytes. */
static double fill_leaf(const pllm_tree *tree, const float *scaled, const float *beta, int leaf)
{
    const int d = tree->codebook.d, k = tree->codebook.k;
    const double unit = (double)tree->bytes.scale * (double)tree->bytes.scale;
    uint8_t *to = tree->bytes.leaves + (size_t)leaf * tree_bytes_leaf(d), *box = group_at(tree, 0, leaf);
    int least = UINT16_MAX;
    double largest = 0.0;
    memset(to, 0, tree_bytes_leaf(d));
    for (int i = 0; i < FAN && leaf * FAN + i < k; i++) {
        const size_t place = (size_t)leaf * FAN + (size_t)i;
        const double above = floor(((double)beta[place] - (double)tree->bytes.base) * unit);
        const int bound = above < UINT16_MAX ? (int)above : UINT16_MAX;
        double error = 0.0;
        int square = 0;
        for (int j = 0; j < d; j++) {
            const float steps = (scaled[place * (size_t)d + (size_t)j] - tree->bytes.origin[j]) * tree->bytes.scale;
            const float within = fminf(fmaxf(steps, 0.0f), (float)TREE_BYTES_LAST), whole = rintf(within);
            const uint8_t byte = (uint8_t)whole;
            uint8_t *lo = side(box, j), *hi = lo + BYTES_ROW;
            *lo = i == 0 || byte < *lo ? byte : *lo;
            *hi = i == 0 || byte > *hi ? byte : *hi;
            to[(1 + j / 2) * BYTES_ROW + 2 * i + j % 2] = (uint8_t)(-2 * (byte - MIDDLE));
            error += (double)(within - whole) * (double)(within - whole);
            square += byte * byte;
        }
        put_bound(to + 2 * i, bound + square);
        least = bound < least ? bound : least;
        largest = fmax(largest, error);
    }
    put_bound(box, least);
    return largest;
}

/* Box `box` of a level above: around its children. */
static void fill_box(const pllm_tree *tree, int level, int box)
{
    const int below = tree->bytes.box_count[level - 1];
    uint8_t *to = group_at(tree, level, box);
    for (int child = box * FAN; child < (box + 1) * FAN && child < below; child++) {
        uint8_t *from = group_at(tree, level - 1, child);
        int16_t bound, other;
        memcpy(&bound, from, sizeof bound);
        memcpy(&other, to, sizeof other);
        bound = child % FAN == 0 || bound < other ? bound : other;
        memcpy(to, &bound, sizeof bound);
        for (int j = 0; j < tree->codebook.d; j++) {
            const uint8_t lo = *side(from, j), hi = side(from, j)[BYTES_ROW];
            uint8_t *low = side(to, j), *high = low + BYTES_ROW;
            *low = child % FAN == 0 || lo < *low ? lo : *low;
            *high = child % FAN == 0 || hi > *high ? hi : *high;
        }
    }
}

int PLLM_SYM(pllm_bytes_build)(pllm_tree *tree, const float *scaled, const float *beta, int threads)
{
    const int d = tree->codebook.d, k = tree->codebook.k;
    double largest = 0.0;
    assert(d >= TREE_BYTES_MIN && TREE_BYTES_FAN == 1 << FAN_BITS);
    if (!choose_scale(tree, scaled))
        return 0;
    for (int bits = 0; bits < 256; bits++)
        for (int i = 0, count = 0; i < 8; i++) {
            tree->bytes.pack[8 * bits + count] = (uint8_t)i;
            count += bits >> i & 1;
        }
    tree->bytes.base = beta[0];
    for (int i = 1; i < k; i++)
        tree->bytes.base = fminf(tree->bytes.base, beta[i]);
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : largest)
    for (int leaf = 0; leaf < tree->bytes.box_count[0]; leaf++)
        largest = fmax(largest, fill_leaf(tree, scaled, beta, leaf));
    tree->bytes.error = (float)(sqrt(largest) + 1e-3);
    for (int level = 0; level < tree->bytes.level_count; level++) {
        const int count = tree->bytes.box_count[level];
        for (int box = 0; level > 0 && box < count; box++)
            fill_box(tree, level, box);
        for (int box = count; box % FAN; box++) { /* contain everything, with a bound above every limit */
            uint8_t *to = group_at(tree, level, box);
            put_bound(to, UINT16_MAX);
            for (int j = 0; j < d; j++) {
                *side(to, j) = 0;
                side(to, j)[BYTES_ROW] = TREE_BYTES_LAST;
            }
        }
        for (int box = 0; d % 2 && box < round_up(count, FAN); box++)
            *side(group_at(tree, level, box), d) = side(group_at(tree, level, box), d)[BYTES_ROW] = 0;
    }
    return 1;
}
