/* tree_search.c - exact nearest codeword through the search tree (tree.h, where the proof stands).
 * Compiled once per instruction set.
 *
 * A thread takes a batch of queries, orders them by the leaf they lie in, so that neighbours in time are
 * neighbours in space and find what they need in cache. Many queries go through the lists of their cells
 * first (tree_cells.c), long ones through bytes (tree_bytes.c). For the others it searches one after
 * another: its own leaf, then the leaves near it, for a tight first guess; then every leaf whose box is
 * closer than the guess. Boxes and codewords lie in the lanes. Where a query would have to look at too much
 * (long sub-vectors, few codewords), the plain scan takes the place of both; a probe of some queries decides.
 */
#include "tree.h"

#include <assert.h>
#include <omp.h>

enum {
    BATCH = 1 << 18, /* queries ordered together */
    TEAM = 32,       /* neighbours that go through the tree together: bits of a mask */
    ABREAST = 2,     /* members of a team in the inner loops */
    CELL_QUERIES = 4, /* queries a cell, on average, from which on lists are quicker: measured */
    PROBE = 64       /* queries of the probe */
};

/* Boxes of one level, and for which members of the team each may hold something better. */
typedef struct {
    int32_t *box, *members;
} box_list;

/* Memory of one thread. */
typedef struct {
    int32_t *key, *sorted; /* (BATCH) leaf or cell of each query; the queries in order of these */
    int32_t *start;        /* (cells + 2) */
    box_list list[2];      /* on two levels of the tree */
    box_list own;          /* (TEAM) boxes that have been searched, and for whom */
    int own_count;
    float *scan;           /* of the plain scan */
    float *apart;          /* (PLLM_SEARCH_QUERIES, d) queries copied together for the plain scan */
    int32_t *found;        /* (PLLM_SEARCH_QUERIES) its answers */
    void *bytes;           /* of the search through bytes */
} memory;

/* What searches for the queries that have no list, or need more. */
typedef enum { BY_SCAN, BY_TREE, BY_BYTES } way;

/* Queries under way. */
typedef struct {
    const pllm_tree *tree;
    int size;
    float x[TEAM][PLLM_MAX_SUBVECTOR], scaled[TEAM][PLLM_MAX_SUBVECTOR];
    double square[TEAM], tiny[TEAM]; /* (1 + K) |X|^2, and TREE_TINY (1 + |x|_1 + |X|_1) */
    float best[TEAM], threshold[TEAM];
    int32_t index[TEAM];
    long boxes, leaves; /* looked at */
} team;

static size_t cells_of(const pllm_tree *tree) { return (size_t)tree->leaf_count << tree->cell_levels; }

/* A list holds every box of a level, and vi_compress writes past its end. */
static size_t list_places(const pllm_tree *tree) { return (size_t)tree->leaf_count + 2 * TREE_FAN; }

static size_t bytes_floats(void)
{
    return (PLLM_SYM(pllm_bytes_memory)() + sizeof(float) - 1) / sizeof(float);
}

static size_t memory_floats(const pllm_tree *tree)
{
    return bytes_floats() + 2 * BATCH + 4 * list_places(tree) + 2 * TEAM + cells_of(tree) + 2 +
           pllm_search_scratch_floats(tree->codebook.d) +
           PLLM_SEARCH_QUERIES * ((size_t)tree->codebook.d + 1);
}

static memory place_memory(const pllm_tree *tree, float *floats)
{
    const size_t places = list_places(tree);
    int32_t *ints = (int32_t *)(void *)(floats + bytes_floats());
    memory m = {.bytes = floats, .key = ints, .sorted = ints + BATCH};
    ints += 2 * BATCH;
    m.list[0] = (box_list){ints, ints + places};
    m.list[1] = (box_list){ints + 2 * places, ints + 3 * places};
    m.own = (box_list){ints + 4 * places, ints + 4 * places + TEAM};
    m.start = ints + 4 * places + 2 * TEAM;
    m.found = m.start + cells_of(tree) + 2;
    m.apart = (float *)(void *)(m.found + PLLM_SEARCH_QUERIES);
    m.scan = m.apart + PLLM_SEARCH_QUERIES * tree->codebook.d;
    return m;
}

PLLM_INLINE void set_threshold(team *t, int i, const int d)
{
    const double v = 2.0 * (double)t->best[i] + t->square[i];
    t->threshold[i] = (float)(v + tree_slack(d) * fabs(v) + t->tiny[i]);
}

/* The lowest score of a leaf is new: the best is the lowest index of the lowest score. */
PLLM_INLINE void take_best(team *t, int i, int leaf, const vf *score, const int d, const int size)
{
    const int32_t *order = t->tree->order + (ptrdiff_t)leaf * size;
    vf low = score[0];
    uint32_t equal = 0;
    PLLM_UNROLL
    for (int v = 1; v < size / VF_WIDTH; v++)
        low = vf_min(low, score[v]);
    const float lowest = vf_lowest(low);
    PLLM_UNROLL
    for (int v = 0; v < size / VF_WIDTH; v++)
        equal |= vm_bits(vf_eq(score[v], vf_set1(lowest))) << (v * VF_WIDTH);
    int32_t index = order[__builtin_ctz(equal)];
    while (equal &= equal - 1) {
        const int32_t other = order[__builtin_ctz(equal)];
        index = other < index ? other : index;
    }
    t->index[i] = lowest < t->best[i] || index < t->index[i] ? index : t->index[i];
    t->best[i] = lowest;
    set_threshold(t, i, d);
}

/* The next ABREAST members of a mask that is not zero, which are taken away; where there are fewer, the
 * first fills up: what is done twice does no harm, and most masks need no second round. No branches:
 * they would be guessed wrong half the time. */
PLLM_INLINE void next_members(uint32_t *members, int *member)
{
    const uint32_t first = *members & -*members;
    PLLM_UNROLL
    for (int i = 0; i < ABREAST; i++) {
        member[i] = __builtin_ctz(*members | (first & -(uint32_t)(*members == 0)));
        *members &= *members - 1;
    }
}

/* Scores the codewords of a leaf for some members. */
PLLM_INLINE void scan_leaf(team *t, int leaf, uint32_t members, const int d, const int size)
{
    const float *c = t->tree->leaves + (size_t)leaf * (size_t)((d + 1) * size);
    while (members) {
        int member[ABREAST];
        next_members(&members, member);
        vf score[ABREAST][TREE_LEAF_MAX / VF_WIDTH];
        PLLM_UNROLL
        for (int v = 0; v < size / VF_WIDTH; v++) {
            const vf offset = vf_load(c + v * VF_WIDTH);
            PLLM_UNROLL
            for (int i = 0; i < ABREAST; i++)
                score[i][v] = offset;
        }
        PLLM_UNROLL
        for (int j = 0; j < d; j++) {
            vf x[ABREAST];
            PLLM_UNROLL
            for (int i = 0; i < ABREAST; i++)
                x[i] = vf_set1(t->x[member[i]][j]);
            PLLM_UNROLL
            for (int v = 0; v < size / VF_WIDTH; v++) {
                const vf cj = vf_load(c + (j + 1) * size + v * VF_WIDTH);
                PLLM_UNROLL
                for (int i = 0; i < ABREAST; i++)
                    score[i][v] = vf_fma(x[i], cj, score[i][v]);
            }
        }
        vm close[ABREAST], any;
        PLLM_UNROLL
        for (int i = 0; i < ABREAST; i++) {
            const vf best = vf_set1(t->best[member[i]]);
            close[i] = vf_le(score[i][0], best);
            PLLM_UNROLL
            for (int v = 1; v < size / VF_WIDTH; v++)
                close[i] = vm_or(close[i], vf_le(score[i][v], best));
            any = i ? vm_or(any, close[i]) : close[0];
        }
        if (vm_any(any)) {
            PLLM_UNROLL
            for (int i = 0; i < ABREAST; i++)
                if (vm_any(close[i]))
                    take_best(t, member[i], leaf, score[i], d, size);
        }
        t->leaves += ABREAST;
    }
}

/* Appends to `to` the boxes of a group that may hold something better for some of the members; returns
 * the new count. */
PLLM_INLINE int test_group(team *t, int level, int group, uint32_t members, const box_list *to,
                           int count, const int d)
{
    const float *b = t->tree->boxes[level] + (size_t)group * (size_t)((2 * d + 1) * TREE_FAN);
    vi close[TREE_FAN / VF_WIDTH];
    PLLM_UNROLL
    for (int v = 0; v < TREE_FAN / VF_WIDTH; v++)
        close[v] = vi_set1(0);
    while (members) {
        int member[ABREAST];
        next_members(&members, member);
        PLLM_UNROLL
        for (int v = 0; v < TREE_FAN / VF_WIDTH; v++) {
            vf low[ABREAST];
            PLLM_UNROLL
            for (int i = 0; i < ABREAST; i++)
                low[i] = vf_load(b + v * VF_WIDTH);
            PLLM_UNROLL
            for (int j = 0; j < d; j++) {
                const float *at = b + (2 * j + 1) * TREE_FAN + v * VF_WIDTH;
                const vf lo = vf_load(at), hi = vf_load(at + TREE_FAN);
                PLLM_UNROLL
                for (int i = 0; i < ABREAST; i++) {
                    const vf x = vf_set1(t->scaled[member[i]][j]);
                    const vf gap = vf_sub(x, vf_min(vf_max(x, lo), hi));
                    low[i] = vf_fma(gap, gap, low[i]);
                }
            }
            PLLM_UNROLL
            for (int i = 0; i < ABREAST; i++) {
                const vi bit = vi_set1((int32_t)(UINT32_C(1) << member[i]));
                const vm less = vf_le(low[i], vf_set1(t->threshold[member[i]]));
                close[v] = vi_or(close[v], vi_keep(less, bit));
            }
        }
        t->boxes += ABREAST;
    }
    PLLM_UNROLL
    for (int v = 0; v < TREE_FAN / VF_WIDTH; v++) {
        const vm some = vm_not(vi_eq(close[v], vi_set1(0)));
        vi_compress(to->members + count, close[v], some);
        count += vi_compress(to->box + count,
                             vi_add(vi_set1(group * TREE_FAN + v * VF_WIDTH), vi_iota()), some);
    }
    return count;
}

/* Takes away from the `count` boxes of m->list[level & 1] what m->own says has been searched. */
PLLM_INLINE void leave_out_own(int count, const memory *m, int level)
{
    const box_list *list = &m->list[level & 1], *own = &m->own;
    for (int k = 0; k < m->own_count; k++)
        for (int i = 0; i < count; i++)
            list->members[i] &= list->box[i] == own->box[k] ? ~own->members[k] : -1;
}

/* Searches the leaves below the `count` boxes of m->list[level & 1]. With `own`, those of the next level
 * in m->own have been searched. */
PLLM_INLINE void descend(team *t, int level, int count, int own, const memory *m, const int d,
                         const int size)
{
    for (; level > 0; level--) {
        const box_list *from = &m->list[level & 1], *to = &m->list[(level - 1) & 1];
        int found = 0;
        for (int i = 0; i < count; i++)
            found = test_group(t, level - 1, from->box[i], (uint32_t)from->members[i], to, found, d);
        count = found;
        if (own)
            leave_out_own(count, m, level - 1);
        own = 0;
    }
    for (int i = 0; i < count; i++)
        scan_leaf(t, m->list[0].box[i], (uint32_t)m->list[0].members[i], d, size);
}

/* Loads query i and scores its guess, a codeword or -1. */
PLLM_INLINE void load_query(team *t, int i, const float *z, int32_t guess, const int d)
{
    const pllm_tree *tree = t->tree;
    float square = 0.0f, size = 1.0f;
    for (int j = 0; j < d; j++) {
        const float scaled = tree->weighted ? tree->root_weight[j] * z[j] : z[j];
        t->x[i][j] = z[j];
        t->scaled[i][j] = scaled;
        square = fmaf(scaled, scaled, square);
        size += fabsf(z[j]) + fabsf(scaled);
    }
    t->square[i] = (double)square * (1.0 + tree_slack(d));
    t->tiny[i] = TREE_TINY * (double)size;
    t->best[i] = INFINITY;
    t->index[i] = INT32_MAX;
    if (guess >= 0) {
        t->best[i] = tree_score(tree, z, guess, d);
        t->index[i] = guess;
        set_threshold(t, i, d);
    }
}

/* The boxes of a level that the members' leaves lie in; returns their number. */
PLLM_INLINE int own_boxes(const team *t, const int32_t *leaf, int level, const box_list *list)
{
    int count = 0, fan = 1;
    for (int i = 0; i < level; i++)
        fan *= TREE_FAN;
    for (int i = 0; i < t->size; i++) {
        if (i == 0 || leaf[i] / fan != list->box[count - 1]) {
            list->box[count] = leaf[i] / fan;
            list->members[count++] = 0;
        }
        list->members[count - 1] |= (int32_t)(UINT32_C(1) << i);
    }
    return count;
}

/* The groups of the top level, each for all members; returns their number. */
PLLM_INLINE int top_groups(const team *t, const box_list *list)
{
    const int count = (t->tree->box_count[t->tree->level_count - 1] + TREE_FAN - 1) / TREE_FAN;
    for (int group = 0; group < count; group++) {
        list->box[group] = group;
        list->members[group] = (int32_t)(UINT32_MAX >> (TEAM - t->size));
    }
    return count;
}

/* Searches for a loaded team whose queries lie in the given leaves, in ascending order: first there,
 * then in ever larger boxes around them, then everywhere. What one step loads serves all members, and no
 * member waits for its own last step. */
PLLM_INLINE void search_team(team *t, const int32_t *leaf, memory *m, const int d, const int size)
{
    const int levels = t->tree->level_count;
    for (int level = 0; level <= levels; level++) {
        const box_list *list = &m->list[level & 1];
        const int count = level < levels ? own_boxes(t, leaf, level, list) : top_groups(t, list);
        descend(t, level, count, level > 0, m, d, size);
        m->own_count = own_boxes(t, leaf, level, &m->own);
    }
}

/* ROUTE queries are led to their leaves together, many at the same time to hide latency:
 * descend_cuts: node[i] = where the query x[i d], x[i d + 1], ..., arrives after `depth` cuts. */
#if defined(PLLM_ISA_AVX512)
#define LANES(d) ((d) <= 4 ? 4 : 2) /* vectors of queries */
enum { ROUTE = LANES(1) * VF_WIDTH };

/* x[axis], lane by lane. column: (d) x by axis. */
PLLM_INLINE vf along(const vf *column, vi axis, const int d)
{
    vf left[PLLM_MAX_SUBVECTOR];
    PLLM_UNROLL
    for (int j = 0; j < d; j++)
        left[j] = column[j];
    PLLM_UNROLL
    for (int bit = 1; bit < d; bit *= 2) {
        const vm odd = vm_not(vi_eq(vi_and(axis, vi_set1(bit)), vi_set1(0)));
        PLLM_UNROLL
        for (int j = 0; j + bit < d; j += 2 * bit)
            left[j] = vf_select(odd, left[j + bit], left[j]);
    }
    return left[0];
}

/* Five levels of cuts fit in two registers, and the next does. */
PLLM_INLINE void descend_cuts(const float *cuts, int depth, const float *x, uint32_t *node, const int d)
{
    const vi one = vi_set1(1), axes = vi_set1(PLLM_MAX_SUBVECTOR - 1);
    const int lanes = LANES(d);
    for (int first = 0; first < ROUTE; first += lanes * VF_WIDTH) {
        vf column[LANES(1)][PLLM_MAX_SUBVECTOR];
        vi at[LANES(1)];
        PLLM_UNROLL
        for (int v = 0; v < lanes; v++) {
            at[v] = one;
            PLLM_UNROLL
            for (int j = 0; j < d; j++)
                column[v][j] = vf_gather(x + (first + v * VF_WIDTH) * d + j, vi_mul(vi_iota(), vi_set1(d)));
        }
        for (int level = 0; level < depth; level++) {
            PLLM_UNROLL
            for (int v = 0; v < lanes; v++) {
                const vf cut = level < 5    ? vf_lookup2(cuts, at[v])
                               : level == 5 ? vf_lookup2(cuts + 2 * VF_WIDTH, at[v])
                                            : vf_gather(cuts, at[v]);
                const vm right = vf_le(cut, along(column[v], vi_and(vi_bits(cut), axes), d));
                at[v] = vi_add(vi_add(at[v], at[v]), vi_keep(right, one));
            }
        }
        PLLM_UNROLL
        for (int v = 0; v < lanes; v++)
            vi_store((int32_t *)node + first + v * VF_WIDTH, at[v]);
    }
}
#undef LANES
#else
enum { ROUTE = TREE_FAN, DESCENTS = 8 };

PLLM_INLINE void descend_cuts(const float *cuts, int depth, const float *x, uint32_t *node, const int d)
{
    for (int first = 0; first < ROUTE; first += DESCENTS) {
        size_t at[DESCENTS];
        PLLM_UNROLL
        for (int i = 0; i < DESCENTS; i++)
            at[i] = 1;
        for (int level = 0; level < depth; level++) {
            PLLM_UNROLL
            for (int i = 0; i < DESCENTS; i++) {
                const float cut = cuts[at[i]];
                at[i] = 2 * at[i] + (x[(first + i) * d + tree_axis(cut)] >= cut);
                PLLM_OPAQUE(at[i]); /* or the compiler packs them into vectors, only to unpack them again */
            }
        }
        PLLM_UNROLL
        for (int i = 0; i < DESCENTS; i++)
            node[first + i] = (uint32_t)at[i];
    }
}
#endif

/* x (ROUTE, d) = queries as the cuts see them: scaled, and 0 for those that the tree cannot take, since infinity would
 * go where there is no leaf. fits[i]: whether it can take query i. */
PLLM_INLINE void scale_queries(const pllm_tree *tree, const float *z, int count, float *x, int *fits, const int d)
{
    for (int i = 0; i < ROUTE; i++) {
        const float *from = z + (i < count ? i : 0) * d;
        fits[i] = 1;
        for (int j = 0; j < d; j++) {
            x[i * d + j] = tree->weighted ? tree->root_weight[j] * from[j] : from[j];
            fits[i] &= fabsf(from[j]) <= TREE_LARGE && fabsf(x[i * d + j]) <= TREE_LARGE;
        }
        for (int j = 0; j < d && !fits[i]; j++)
            x[i * d + j] = 0.0f;
    }
}

/* key[i] = the leaf that z[i] lies in, or its cell, `levels` cuts further down; their number, `keys`, when
 * it has to be scanned for. */
PLLM_INLINE void route(const pllm_tree *tree, const float *z, int n, int levels, int keys, int32_t *key,
                       const int d)
{
    const int depth = tree->depth + levels;
    for (int first = 0; first < n; first += ROUTE) {
        const int count = n - first < ROUTE ? n - first : ROUTE;
        const float *x = z + (ptrdiff_t)first * d;
        float scaled[ROUTE * PLLM_MAX_SUBVECTOR];
        int fits[ROUTE];
        uint32_t node[ROUTE];
        vm fit = vf_le(vf_zero(), vf_zero());
        for (int i = 0; i < ROUTE * d && count == ROUTE; i += VF_WIDTH)
            fit = vm_and(fit, vf_le(vf_abs(vf_load(x + i)), vf_set1(TREE_LARGE)));
        const int as_it_is = count == ROUTE && !tree->weighted && !vm_any(vm_not(fit));
        if (!as_it_is) {
            scale_queries(tree, x, count, scaled, fits, d);
            x = scaled;
        }
        descend_cuts(tree->cut, depth, x, node, d);
        for (int i = 0; i < count; i++)
            key[first + i] = as_it_is || fits[i] ? (int32_t)(node[i] - (1u << depth)) : keys;
    }
}

/* sorted = the n queries in order of their keys 0..keys; start[i] = where key i ends. */
static void sort_queries(int keys, int n, const memory *m)
{
    memset(m->start, 0, (size_t)(keys + 2) * sizeof *m->start);
    for (int i = 0; i < n; i++)
        m->start[m->key[i] + 1]++;
    for (int i = 0; i <= keys; i++)
        m->start[i + 1] += m->start[i];
    for (int i = 0; i < n; i++)
        m->sorted[m->start[m->key[i]]++] = i;
}

/* The plain scan for the queries sorted[0..count), which are copied together. */
PLLM_INLINE void scan_apart(const pllm_tree *tree, const float *z, int count, int32_t *index,
                            float *error, const memory *m, const int d)
{
    for (int first = 0; first < count; first += PLLM_SEARCH_QUERIES) {
        const int size = count - first < PLLM_SEARCH_QUERIES ? count - first : PLLM_SEARCH_QUERIES;
        for (int i = 0; i < size; i++)
            memcpy(m->apart + i * d, z + (ptrdiff_t)m->sorted[first + i] * d, (size_t)d * sizeof(float));
        PLLM_SYM(pllm_search_slice)(&tree->codebook, m->apart, size, m->found, NULL, m->scan);
        for (int i = 0; i < size; i++) {
            const int at = m->sorted[first + i];
            index[at] = m->found[i];
            if (error)
                error[at] = pllm_weighted_error(&tree->codebook, m->apart + i * d, m->found[i], d);
        }
    }
}

/* Do so many queries go through the lists? */
static int searched_by_cell(const pllm_tree *tree, ptrdiff_t n)
{
    return tree->list_length && (size_t)n >= CELL_QUERIES * cells_of(tree);
}

/* A batch of n <= BATCH queries; `by` for what the lists leave. Returns the work done, in units of one codeword scored
 * by the scan; the factors are measured. */
PLLM_INLINE double search_batch(const pllm_tree *tree, const float *z, int n, const int32_t *previous, way by,
                                int32_t *index, float *error, memory *m, const int d)
{
    team t = {.tree = tree};
    int32_t leaf[TEAM], at[TEAM];
    const int by_cell = searched_by_cell(tree, n);
    const int levels = by_cell ? tree->cell_levels : 0, keys = tree->leaf_count << levels;
    route(tree, z, n, levels, keys, m->key, d);
    sort_queries(keys, n, m);
    const int odd = m->start[keys - 1]; /* where those begin that the tree cannot take */
    int count = odd;
    if (by_cell) {
        count = PLLM_SYM(pllm_cells_search)(tree, z, m->sorted, m->start, index, error);
        previous = index;
    }
    double work = 3000.0 * n / d;
    if (by == BY_SCAN) {
        scan_apart(tree, z, count, index, error, m, d);
        count = 0;
    } else if (by == BY_BYTES && d >= TREE_BYTES_MIN) {
        count = PLLM_SYM(pllm_bytes_search)(tree, z, m->sorted, count, m->key, levels, previous, index, error, &work,
                                            m->bytes);
        previous = index;
    }
    for (int first = 0; first < count; first += TEAM) {
        t.size = count - first < TEAM ? count - first : TEAM;
        for (int i = first + TEAM; i < first + 2 * TEAM && i < count; i++)
            PLLM_PREFETCH(z + (ptrdiff_t)m->sorted[i] * d);
        for (int i = 0; i < t.size; i++) {
            at[i] = m->sorted[first + i];
            leaf[i] = m->key[at[i]] >> levels;
            load_query(&t, i, z + (ptrdiff_t)at[i] * d, previous ? previous[at[i]] : -1, d);
        }
        search_team(&t, leaf, m, d, tree_leaf_size(d));
        for (int i = 0; i < t.size; i++) {
            index[at[i]] = t.index[i];
            if (error)
                error[at[i]] = pllm_weighted_error(&tree->codebook, t.x[i], t.index[i], d);
        }
    }
    for (int i = odd; i < n; i++) {
        const int here = m->sorted[i];
        PLLM_SYM(pllm_search_slice)(&tree->codebook, z + (ptrdiff_t)here * d, 1, index + here,
                                    error ? error + here : NULL, m->scan);
    }
    return work + 70.0 * (double)t.boxes + 40.0 * (double)t.leaves;
}

/* One copy for each d, so that d is a constant in the inner loops. */
#define SEARCH(D) \
    static double search_##D(const pllm_tree *tree, const float *z, int n, const int32_t *previous, \
                             way by, int32_t *index, float *error, memory *m) \
    { \
        return search_batch(tree, z, n, previous, by, index, error, m, D); \
    }
SEARCH(1) SEARCH(2) SEARCH(3) SEARCH(4) SEARCH(5) SEARCH(6) SEARCH(7) SEARCH(8)
SEARCH(9) SEARCH(10) SEARCH(11) SEARCH(12) SEARCH(13) SEARCH(14) SEARCH(15) SEARCH(16)

typedef double search_fn(const pllm_tree *, const float *, int, const int32_t *, way, int32_t *,
                         float *, memory *);

static search_fn *const search_of[PLLM_MAX_SUBVECTOR + 1] = {
    NULL,     search_1, search_2,  search_3,  search_4,  search_5,  search_6,  search_7, search_8,
    search_9, search_10, search_11, search_12, search_13, search_14, search_15, search_16};

/* What is the least work? Asks PROBE queries spread over all. */
static way choose_way(const pllm_tree *tree, const float *z, ptrdiff_t n, memory *m)
{
    const int d = tree->codebook.d;
    float x[PROBE * PLLM_MAX_SUBVECTOR];
    int32_t index[PROBE];
    if (!tree->works)
        return BY_SCAN;
    if (n <= PROBE)
        return tree->bytes.works ? BY_BYTES : BY_TREE;
    for (int i = 0; i < PROBE; i++)
        memcpy(x + i * d, z + n / PROBE * i * d, (size_t)d * sizeof *x);
    double least = (double)tree->codebook.k * PROBE;
    way by = BY_SCAN;
    for (way other = BY_TREE; other <= (tree->bytes.works ? BY_BYTES : BY_TREE); other++) {
        const double work = search_of[d](tree, x, PROBE, NULL, other, index, NULL, m);
        by = work < least ? other : by;
        least = work < least ? work : least;
    }
    return by;
}

int PLLM_SYM(pllm_tree_search)(const pllm_tree *tree, const float *z, ptrdiff_t n,
                               const int32_t *previous, int32_t *index, float *error, int threads)
{
    const int d = tree->codebook.d;
    const size_t floats = (memory_floats(tree) + 15) / 16 * 16;
    float *all = pllm_alloc_floats((size_t)threads * floats);
    if (!all)
        return PLLM_ENOMEM;

    memory first = place_memory(tree, all);
    ptrdiff_t share = (n / threads / PROBE + 1) * PROBE;
    share = share < BATCH ? share : BATCH;
    const way by = choose_way(tree, z, n, &first);
    const int by_cell = tree->works && searched_by_cell(tree, share);
    if (by == BY_SCAN && !by_cell)
        share = share < PLLM_SEARCH_QUERIES ? share : PLLM_SEARCH_QUERIES;
    const ptrdiff_t batches = (n + share - 1) / share;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (batches > 1)
    for (ptrdiff_t i = 0; i < batches; i++) {
        const ptrdiff_t start = i * share, count = n - start < share ? n - start : share;
        memory m = place_memory(tree, all + (size_t)omp_get_thread_num() * floats);
        float *error_at = error ? error + start : NULL;
        if (by != BY_SCAN || by_cell)
            search_of[d](tree, z + start * d, (int)count, previous ? previous + start : NULL, by, index + start,
                         error_at, &m);
        else
            PLLM_SYM(pllm_search_slice)(&tree->codebook, z + start * d, count, index + start, error_at,
                                        m.scan);
    }
    free(all);
    return PLLM_OK;
}
