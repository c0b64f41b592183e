/* tree_cells.c - lists of the codewords near each cell of the search tree, and many queries searched
 * through them (tree.h, where the proof stands). Compiled once per instruction set.
 *
 * The queries of a cell lie in the lanes and its list is walked codeword by codeword, each broadcast to
 * all of them, as in the scan; the walk ends where the next bound is above the thresholds of all lanes.
 * Only the place of the four codewords that hold a query's lowest score is kept on the way; they are
 * scored again at the end for the codeword.
 */
#include "tree.h"

#include <assert.h>
#include <omp.h>

#if defined(PLLM_ISA_NEON)
enum { VECTORS = 4, CODEWORDS = 4 }; /* 16 accumulators of 32 registers */
#elif defined(PLLM_ISA_AVX2) || defined(PLLM_ISA_AVX512)
enum { VECTORS = 2, CODEWORDS = 4 }; /* 8 accumulators: what latency asks for */
#else
enum { VECTORS = 1, CODEWORDS = 4 };
#endif

enum {
    CHUNK = TREE_FAN,           /* codewords between two looks at the bounds */
    GROUP = VECTORS * VF_WIDTH, /* queries in the lanes */
    FOUND = 2048,               /* codewords that the lists of a leaf choose from, at most */
    BINS = 128,                 /* of the sort */
    TRIES = 8,                  /* searches for a reach that finds enough codewords, not too many */
    LEAVES = 32                 /* leaves that a thread takes at a time */
};

/* ---- the lists --------------------------------------------------------------------------------- */

/* What X can be in a leaf or a cell; its sides are where the cuts are. */
typedef struct {
    float lo[TREE_CELL_MAX], hi[TREE_CELL_MAX];
} region;

/* Memory of one thread while it makes lists. */
typedef struct {
    int32_t *box[2];  /* (leaf_count + 2 TREE_FAN) boxes of two levels */
    int32_t *place;   /* (FOUND + 2 TREE_FAN) codewords near the leaf */
    int32_t *bin;     /* (FOUND) */
    int32_t *kept;    /* (FOUND + 2 TREE_FAN) positions in `place` */
    int32_t *sorted;  /* (FOUND) positions in `place`, sorted */
    float *scaled;    /* (FOUND / TREE_FAN, d + 1, TREE_FAN) their beta and C */
    float *bound;     /* (FOUND) */
    float limit;      /* all codewords that are not there have larger bounds than this */
    int found;
} workspace;

static size_t workspace_floats(const pllm_tree *tree)
{
    return 2 * ((size_t)tree->leaf_count + 2 * TREE_FAN) + 2 * (FOUND + 2 * TREE_FAN) + 3 * FOUND +
           FOUND * ((size_t)tree->codebook.d + 1);
}

static workspace place_workspace(const pllm_tree *tree, float *floats)
{
    const size_t boxes = (size_t)tree->leaf_count + 2 * TREE_FAN;
    int32_t *ints = (int32_t *)(void *)(floats + FOUND * ((size_t)tree->codebook.d + 2));
    return (workspace){.scaled = floats,
                       .bound = floats + FOUND * ((size_t)tree->codebook.d + 1),
                       .box = {ints, ints + boxes},
                       .bin = ints + 2 * boxes,
                       .sorted = ints + 2 * boxes + FOUND,
                       .kept = ints + 2 * boxes + 2 * FOUND,
                       .place = ints + 2 * boxes + 3 * FOUND + 2 * TREE_FAN};
}

static region region_of(const pllm_tree *tree, int leaf)
{
    region r;
    for (int j = 0; j < TREE_CELL_MAX; j++) {
        r.lo[j] = -INFINITY;
        r.hi[j] = INFINITY;
    }
    for (int level = tree->depth, node = 1; level > 0; level--) {
        const int right = leaf >> (level - 1) & 1;
        const int axis = tree_axis(tree->cut[node]);
        *(right ? r.lo + axis : r.hi + axis) = tree->cut[node];
        node = 2 * node + right;
    }
    return r;
}

/* Bounds of a region and VF_WIDTH boxes (sides 2) or codewords (sides 1). */
PLLM_INLINE vf bounds(const region *r, const float *b, const int d, const int sides)
{
    vf low = vf_load(b);
    for (int j = 0; j < d; j++) {
        const vf lo = vf_load(b + (sides * j + 1) * TREE_FAN);
        const vf hi = vf_load(b + sides * (j + 1) * TREE_FAN);
        const vf right = vf_sub(lo, vf_set1(r->hi[j])), left = vf_sub(vf_set1(r->lo[j]), hi);
        const vf gap = vf_max(vf_max(left, right), vf_zero());
        low = vf_fma(gap, gap, low);
    }
    return low;
}

/* The boxes of a level that are within `limit` of a region, appended to `to`; the new count. */
static int near_boxes(const pllm_tree *tree, const region *r, int level, int group, float limit,
                      int32_t *to, int count)
{
    const int d = tree->codebook.d;
    const float *b = tree->boxes[level] + (size_t)group * (size_t)((2 * d + 1) * TREE_FAN);
    for (int v = 0; v < TREE_FAN; v += VF_WIDTH)
        count += vi_compress(to + count, vi_add(vi_set1(group * TREE_FAN + v), vi_iota()),
                             vf_le(bounds(r, b + v, d, 2), vf_set1(limit)));
    return count;
}

/* Finds the codewords within w->limit of a region. 0 when they are too many. */
static int near_codewords(const pllm_tree *tree, const float *scaled, const region *r, workspace *w)
{
    const int d = tree->codebook.d, top = tree->level_count - 1;
    const int groups = (tree->box_count[top] + TREE_FAN - 1) / TREE_FAN;
    int count = 0;
    for (int group = 0; group < groups; group++)
        count = near_boxes(tree, r, top, group, w->limit, w->box[top & 1], count);
    for (int level = top; level > 0; level--) {
        int below = 0;
        for (int i = 0; i < count; i++)
            below = near_boxes(tree, r, level - 1, w->box[level & 1][i], w->limit,
                               w->box[(level - 1) & 1], below);
        count = below;
    }
    w->found = 0;
    for (int i = 0; i < count && w->found <= FOUND; i++) {
        const int leaf = w->box[0][i];
        const float *c = scaled + (size_t)leaf * (size_t)((d + 1) * TREE_FAN);
        for (int v = 0; v < TREE_FAN; v += VF_WIDTH)
            w->found += vi_compress(w->place + w->found,
                                    vi_add(vi_set1(leaf * TREE_FAN + v), vi_iota()),
                                    vf_le(bounds(r, c + v, d, 1), vf_set1(w->limit)));
    }
    return w->found <= FOUND;
}

/* Finds codewords for the lists of a leaf whose box is `own`: more than one list takes, as others are
 * nearest to its other cells. *reach, how far above the leaf's own least bound they are looked for, is
 * taken as a first guess from the leaf before. */
static void choose_codewords(const pllm_tree *tree, const float *scaled, const float *own,
                             const region *r, float *reach, workspace *w)
{
    const int d = tree->codebook.d, want = 2 * tree->list_length;
    int few_enough = 0;
    for (int j = 0; j < d && *reach == 0.0f; j++) {
        const float side = own[(2 * j + 2) * TREE_FAN] - own[(2 * j + 1) * TREE_FAN];
        *reach = side * side;
    }
    for (int attempt = 0; attempt < TRIES; attempt++) {
        w->limit = *own + *reach;
        few_enough = near_codewords(tree, scaled, r, w);
        if (few_enough && (w->found >= tree->codebook.k || (w->found > want && w->found < 2 * want)))
            break;
        const double factor = few_enough ? 1.5 * want / (w->found + 1.0) : 0.1;
        *reach = *reach * (float)fmin(fmax(pow(factor, 2.0 / d), 0.05), 20.0) + 1e-30f;
    }
    if (!few_enough) { /* too many equals: nothing can be said about those that are left out */
        w->limit = -INFINITY;
        w->found = FOUND;
    } else if (w->found >= tree->codebook.k)
        w->limit = INFINITY;
    for (int i = 0; i < (w->found + TREE_FAN - 1) / TREE_FAN * TREE_FAN; i++) {
        const int at = w->place[i < w->found ? i : 0], block = (d + 1) * TREE_FAN;
        const float *from = scaled + (size_t)(at / TREE_FAN) * (size_t)block + at % TREE_FAN;
        float *to = w->scaled + i / TREE_FAN * block + i % TREE_FAN;
        for (int j = 0; j <= d; j++)
            to[j * TREE_FAN] = from[j * TREE_FAN];
    }
}

/* Counts w->bound into BINS bins between the least and w->limit, and brings the codewords of the first
 * bins, `length` or somewhat more, if there are, to w->sorted in order of their bins. Returns how many;
 * *rest = least bound of the others. */
static int sort_found(const workspace *w, int length, float *rest)
{
    int start[BINS + 1] = {0}, last = 0, kept = 0;
    vf low = vf_set1(INFINITY), high = vf_set1(-INFINITY), others = low;
    for (int i = 0; i < w->found; i += VF_WIDTH) {
        low = vf_min(vf_load(w->bound + i), low);
        high = vf_max(vf_load(w->bound + i), high);
    }
    const float least = vf_lowest(low), most = fminf(-vf_lowest(vf_neg(high)), w->limit);
    const float scale = most - least > 1e-30f ? (float)BINS / (most - least) : 0.0f;
    for (int i = 0; i < w->found; i += VF_WIDTH) {
        const vf bin = vf_mul(vf_sub(vf_load(w->bound + i), vf_set1(least)), vf_set1(scale));
        vi_store(w->bin + i, vi_from_f(vf_min(bin, vf_set1((float)(BINS - 1)))));
    }
    for (int i = w->found; i % TREE_FAN; i++) {
        w->bin[i] = BINS;
        w->bound[i] = INFINITY;
    }
    for (int i = 0; i < w->found; i++)
        start[w->bin[i] + 1]++;
    for (;; last++) {
        start[last + 1] += start[last];
        if (start[last + 1] >= length || last == BINS - 1)
            break;
    }
    for (int i = 0; i < w->found; i += VF_WIDTH) {
        const vm chosen = vi_lt(vi_load(w->bin + i), vi_set1(last + 1));
        others = vf_min(vf_select(chosen, others, vf_load(w->bound + i)), others);
        kept += vi_compress(w->kept + kept, vi_add(vi_set1(i), vi_iota()), chosen);
    }
    for (int i = 0; i < kept; i++)
        w->sorted[start[w->bin[w->kept[i]]]++] = w->kept[i];
    *rest = fminf(*rest, vf_lowest(others));
    return kept;
}

/* Fills the list of a cell from the codewords near its leaf. */
static void fill_list(pllm_tree *tree, int cell, const region *r, const workspace *w)
{
    const int d = tree->codebook.d, length = tree->list_length, chunks = length / CHUNK;
    uint16_t *list = tree->list + (size_t)cell * (size_t)length;
    float *bound = tree->bound + (size_t)cell * (size_t)(chunks + 1), rest = w->limit;
    for (int i = 0; i < w->found; i += VF_WIDTH)
        vf_store(w->bound + i, bounds(r, w->scaled + i / TREE_FAN * (d + 1) * TREE_FAN + i % TREE_FAN,
                                      d, 1));
    const int kept = sort_found(w, length, &rest);
    for (int i = length; i < kept; i++)
        rest = fminf(rest, w->bound[w->sorted[i]]);
    bound[chunks] = rest;
    for (int i = length - 1; i >= 0; i--) {
        const int from = w->sorted[i < kept ? i : 0]; /* the first fills up */
        const float here = i < kept ? w->bound[from] : rest;
        rest = here < rest ? here : rest;
        list[i] = (uint16_t)w->place[from];
        if (i % CHUNK == 0)
            bound[i / CHUNK] = rest;
    }
}

/* Cuts a region in two across its longest side, `levels` times, and fills the lists of the parts. A side
 * without end reaches as far as the leaf's codewords. own: the leaf's box. */
static void cut_cells(pllm_tree *tree, uint32_t node, const region *r, int levels, const float *own,
                      const workspace *w)
{
    if (levels == 0) {
        fill_list(tree, (int)node - (1 << (tree->depth + tree->cell_levels)), r, w);
        return;
    }
    int axis = 0;
    float at = 0.0f, longest = -1.0f;
    for (int j = 0; j < tree->codebook.d; j++) {
        const float lo = r->lo[j] > -INFINITY ? r->lo[j] : own[(2 * j + 1) * TREE_FAN];
        const float hi = r->hi[j] < INFINITY ? r->hi[j] : own[(2 * j + 2) * TREE_FAN];
        if (hi - lo > longest) {
            longest = hi - lo;
            at = lo + 0.5f * (hi - lo);
            axis = j;
        }
    }
    region left = *r, right = *r;
    tree->cut[node] = left.hi[axis] = right.lo[axis] = tree_cut(at, axis);
    cut_cells(tree, 2 * node, &left, levels - 1, own, w);
    cut_cells(tree, 2 * node + 1, &right, levels - 1, own, w);
}

int PLLM_SYM(pllm_cells_build)(pllm_tree *tree, const float *scaled, int threads)
{
    assert(tree->codebook.d <= TREE_CELL_MAX && tree->leaf_size == TREE_FAN);
    const size_t floats = (workspace_floats(tree) + 15) / 16 * 16;
    float *all = pllm_alloc_floats((size_t)threads * floats);
    if (!all)
        return PLLM_ENOMEM;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int first = 0; first < tree->leaf_count; first += LEAVES) {
        workspace w = place_workspace(tree, all + (size_t)omp_get_thread_num() * floats);
        float reach = 0.0f;
        for (int leaf = first; leaf < first + LEAVES && leaf < tree->leaf_count; leaf++) {
            const region r = region_of(tree, leaf);
            const float *own = tree_box(tree, 0, leaf);
            choose_codewords(tree, scaled, own, &r, &reach, &w);
            cut_cells(tree, (1u << tree->depth) + (uint32_t)leaf, &r, tree->cell_levels, own, &w);
        }
    }
    free(all);
    return PLLM_OK;
}

/* ---- the search -------------------------------------------------------------------------------- */

/* A cell's list. */
typedef struct {
    const pllm_tree *tree;
    const uint16_t *list;
    const float *bound;
} cell;

/* Queries in the lanes. */
typedef struct {
    float x[TREE_CELL_MAX][GROUP];
    float square[GROUP]; /* (1 + K) |X|^2 + tiny */
    float best[GROUP];
    int32_t at[GROUP];   /* where the list has it, unless tied */
    uint64_t tied;       /* bit i: later ones may hold it too */
    uint64_t open;       /* bit i: something better may be behind the list's end */
    int walked;          /* codewords */
} group;

/* Loads `size` queries; the last one fills up. */
PLLM_INLINE void load_group(group *g, const pllm_tree *tree, const float *z, const int32_t *at,
                            int size, const int vectors, const int d)
{
    for (int i = 0; i < vectors * VF_WIDTH; i++) {
        const float *from = z + (ptrdiff_t)at[i < size ? i : size - 1] * d;
        PLLM_UNROLL
        for (int j = 0; j < d; j++)
            g->x[j][i] = from[j];
    }
    PLLM_UNROLL
    for (int v = 0; v < vectors; v++) {
        vf square = vf_zero(), size_of = vf_set1(1.0f);
        PLLM_UNROLL
        for (int j = 0; j < d; j++) {
            const vf x = vf_load(g->x[j] + v * VF_WIDTH);
            const vf scaled = tree->weighted ? vf_mul(vf_set1(tree->root_weight[j]), x) : x;
            square = vf_fma(scaled, scaled, square);
            size_of = vf_add(size_of, vf_add(vf_abs(x), vf_abs(scaled)));
        }
        square = vf_mul(square, vf_set1((float)(1.0 + tree_slack(d))));
        vf_store(g->square + v * VF_WIDTH, vf_fma(vf_set1((float)TREE_TINY), size_of, square));
    }
}

/* Walks the list until no lane needs what is behind. */
PLLM_INLINE void walk(group *g, const cell *c, const int vectors, const int d)
{
    const int chunks = c->tree->list_length / CHUNK;
    const vf slack = vf_set1((float)tree_slack(d)), two = vf_set1(2.0f);
    vf best[VECTORS];
    vi at[VECTORS];
    vm tied[VECTORS], open[VECTORS];
    PLLM_UNROLL
    for (int v = 0; v < vectors; v++) {
        best[v] = vf_set1(INFINITY);
        at[v] = vi_set1(0);
        tied[v] = open[v] = vf_lt(best[v], best[v]);
    }
    int chunk = 0;
    for (int more = 1; more && chunk < chunks; chunk++) {
        for (int i = 0; i < CHUNK; i += CODEWORDS) {
            const float *row[CODEWORDS];
            vf score[CODEWORDS][VECTORS];
            PLLM_UNROLL
            for (int k = 0; k < CODEWORDS; k++) {
                row[k] = c->tree->rows + (size_t)c->list[chunk * CHUNK + i + k] * (size_t)(d + 1);
                PLLM_UNROLL
                for (int v = 0; v < vectors; v++)
                    score[k][v] = vf_set1(row[k][0]);
            }
            PLLM_UNROLL
            for (int j = 0; j < d; j++) {
                vf x[VECTORS];
                PLLM_UNROLL
                for (int v = 0; v < vectors; v++)
                    x[v] = vf_load(g->x[j] + v * VF_WIDTH);
                PLLM_UNROLL
                for (int k = 0; k < CODEWORDS; k++) {
                    const vf cj = vf_set1(row[k][j + 1]);
                    PLLM_UNROLL
                    for (int v = 0; v < vectors; v++)
                        score[k][v] = vf_fma(x[v], cj, score[k][v]);
                }
            }
            const vi here = vi_set1(chunk * CHUNK + i), one = vi_set1(1), two_on = vi_set1(2), three = vi_set1(3);
            PLLM_UNROLL
            for (int v = 0; v < vectors; v++) {
                const vf a = vf_min(score[0][v], score[1][v]), b = vf_min(score[2][v], score[3][v]);
                const vf low = vf_min(a, b);
                const vm less = vf_lt(low, best[v]), later = vf_lt(b, a);
                const vi in_a = vi_keep(vf_lt(score[1][v], score[0][v]), one);
                const vi in_b = vi_select(vf_lt(score[3][v], score[2][v]), three, two_on);
                const vm twice_a = vm_and(vf_eq(score[0][v], score[1][v]), vm_not(later));
                const vm twice_b = vm_and(vf_eq(score[2][v], score[3][v]), later);
                const vm twice = vm_or(vm_or(twice_a, twice_b), vf_eq(a, b));
                const vm again = vm_or(tied[v], vf_eq(low, best[v]));
                tied[v] = vm_or(vm_and(less, twice), vm_and(vm_not(less), again));
                at[v] = vi_select(less, vi_add(here, vi_select(later, in_b, in_a)), at[v]);
                best[v] = vf_min(low, best[v]);
            }
        }
        const vf bound = vf_set1(c->bound[chunk + 1]);
        vm any = open[0];
        PLLM_UNROLL
        for (int v = 0; v < vectors; v++) {
            const vf sum = vf_fma(two, best[v], vf_load(g->square + v * VF_WIDTH));
            open[v] = vf_le(bound, vf_fma(slack, vf_abs(sum), sum));
            any = v ? vm_or(any, open[v]) : open[0];
        }
        more = vm_any(any);
    }
    g->walked = chunk * CHUNK;
    g->tied = g->open = 0;
    PLLM_UNROLL
    for (int v = 0; v < vectors; v++) {
        vf_store(g->best + v * VF_WIDTH, best[v]);
        vi_store(g->at + v * VF_WIDTH, at[v]);
        g->tied |= (uint64_t)vm_bits(tied[v]) << (v * VF_WIDTH);
        g->open |= (uint64_t)vm_bits(open[v]) << (v * VF_WIDTH);
    }
}

/* The lowest of the first `count` codewords of the list whose score for x is `best`, the lowest of all. */
PLLM_INLINE int32_t find_codeword(const cell *c, const float *x, float best, int count, const int d)
{
    int32_t lowest = INT32_MAX;
    for (int at = 0; at < count; at += CODEWORDS) {
        uint32_t equal = 0;
        PLLM_UNROLL
        for (int i = 0; i < CODEWORDS; i++) {
            const float *row = c->tree->rows + (size_t)c->list[at + i] * (size_t)(d + 1);
            float score = row[0];
            PLLM_UNROLL
            for (int j = 0; j < d; j++)
                score = fmaf(x[j], row[j + 1], score);
            equal |= (uint32_t)(score <= best) << i;
        }
        for (; equal; equal &= equal - 1) {
            const int32_t k = c->tree->order[c->list[at + __builtin_ctz(equal)]];
            lowest = k < lowest ? k : lowest;
        }
    }
    return lowest;
}

/* One group of queries of a cell: at[0..size). Appends those that are open to `left`, which may be `at`
 * or lie before it; returns how many. */
PLLM_INLINE int search_group(const cell *c, const float *z, const int32_t *at, int size, int32_t *left,
                             int32_t *index, float *error, const int vectors, const int d)
{
    group g;
    int count = 0;
    load_group(&g, c->tree, z, at, size, vectors, d);
    walk(&g, c, vectors, d);
    for (int i = 0; i < size; i++) {
        const int32_t here = at[i];
        const float *x = z + (ptrdiff_t)here * d;
        index[here] = g.tied >> i & 1 ? find_codeword(c, x, g.best[i], g.walked, d)
                                      : c->tree->order[c->list[g.at[i]]];
        if (error)
            error[here] = pllm_weighted_error(&c->tree->codebook, x, index[here], d);
        left[count] = here;
        count += (int)(g.open >> i & 1);
    }
    return count;
}

/* The same with as few vectors as hold them. */
PLLM_INLINE int search_lanes(const cell *c, const float *z, const int32_t *at, int size, int32_t *left,
                             int32_t *index, float *error, const int d)
{
    if (VECTORS > 3 && size > 3 * VF_WIDTH)
        return search_group(c, z, at, size, left, index, error, VECTORS, d);
    if (VECTORS > 2 && size > 2 * VF_WIDTH)
        return search_group(c, z, at, size, left, index, error, VECTORS > 2 ? 3 : VECTORS, d);
    if (VECTORS > 1 && size > VF_WIDTH)
        return search_group(c, z, at, size, left, index, error, VECTORS > 1 ? 2 : VECTORS, d);
    return search_group(c, z, at, size, left, index, error, 1, d);
}

PLLM_INLINE int search_cells(const pllm_tree *tree, const float *z, int32_t *sorted,
                             const int32_t *end, int32_t *index, float *error, const int d)
{
    const int cells = tree->leaf_count << tree->cell_levels, length = tree->list_length;
    const int count = end[cells - 1];
    int left = 0, at = 0;
    for (int i = 0; i < cells; i++) {
        const cell c = {.tree = tree,
                        .list = tree->list + (size_t)i * (size_t)length,
                        .bound = tree->bound + (size_t)i * (size_t)(length / CHUNK + 1)};
        while (at < end[i]) {
            const int rest = end[i] - at, size = rest < GROUP ? rest : GROUP;
            for (int k = at + GROUP; k < at + 2 * GROUP && k < count; k++)
                PLLM_PREFETCH(z + (ptrdiff_t)sorted[k] * d);
            left += search_lanes(&c, z, sorted + at, size, sorted + left, index, error, d);
            at += size;
        }
    }
    return left;
}

/* One copy for each d, so that d is a constant in the inner loops. */
#define SEARCH(D) \
    static int search_##D(const pllm_tree *tree, const float *z, int32_t *sorted, const int32_t *end, \
                          int32_t *index, float *error) \
    { \
        return search_cells(tree, z, sorted, end, index, error, D); \
    }
SEARCH(1) SEARCH(2) SEARCH(3) SEARCH(4) SEARCH(5) SEARCH(6)

typedef int search_fn(const pllm_tree *, const float *, int32_t *, const int32_t *, int32_t *, float *);

static search_fn *const search_of[TREE_CELL_MAX + 1] = {NULL,     search_1, search_2, search_3,
                                                        search_4, search_5, search_6};

int PLLM_SYM(pllm_cells_search)(const pllm_tree *tree, const float *z, int32_t *sorted,
                                const int32_t *end, int32_t *index, float *error)
{
    return search_of[tree->codebook.d](tree, z, sorted, end, index, error);
}
