/* tree.h - the search tree, shared by tree_build.c, tree_bytes.c, tree_cells.c and tree_search.c.
 *
 * Codewords are ordered by a k-d tree that splits the dimension of the largest variance in two, cut into
 * leaves of leaf_size codewords, and every leaf gets its bounding box. TREE_FAN consecutive boxes are
 * the children of one box of the next level, up to a level of at most TREE_TOP boxes, all of which every
 * query is compared with. The split planes lead a query to the leaf it lies in, which is searched first.
 * For many queries the leaves are cut further into cells, each with a list of the codewords nearest to it:
 * the queries of a cell walk through its list together, and only those whose lists end too early are
 * searched for in the tree.
 * From d = TREE_BYTES_MIN on, boxes and codewords are there once more as bytes, and most queries are searched for there.
 *
 * Why no codeword is missed although floats are rounded. Write u for 2^-24, y = w c for the weighted
 * codeword and o for its offset, both as the scan holds them, C = sqrt(w) c and X = sqrt(w) x for what
 * the boxes are made of, and B = 2 o - |C|^2. The float score s of the contract differs from o - x.y by
 * at most g (|o| + sum |x y|) with g <= 1.01 d u, and sum x y from X.C by at most 8 u sum |X C|. With
 * 2 |o| <= |B| + |C|^2 and 2 sum |X C| <= |X|^2 + |C|^2,
 *     2 s + |X|^2 >= |X - C|^2 + B - (d + 10) u (|B| + 2 |C|^2) - (d + 10) u |X|^2.        (1)
 * A box stores beta, at most the smallest B - K (|B| + 2 |C|^2) of its codewords with
 * K = tree_slack(d) = 8 (d + 8) u, and its bound is the fused sum beta + sum_j gap_j^2, which exceeds
 * its exact value by at most (d + 4) u (|beta| + sum gap^2). With the score `best` in hand the bound is
 * compared with
 *     T = v + K |v| + tiny,  v = 2 best + (1 + K) |X|^2,
 * |X|^2 summed in float (off by at most d u |X|^2), the rest in double and then rounded.
 * K is several times the sum of the factors above, so a bound above T means, by (1), s > best: strictly,
 * so that ties are never cut off. `tiny`, TREE_TINY (1 + |x|_1 + |X|_1), and TREE_TINY (1 + |C|_1) taken
 * from beta, exceed what underflow can do.
 *
 * For a query of a cell, X lies in the cell's region: lo_j <= X_j <= hi_j for the cuts on its way, which
 * were compared with the same floats; a side without a cut is infinite. With
 * gap_j = max(lo_j - C_j, C_j - hi_j, 0) <= |X_j - C_j| and beta its own, the bound of a codeword to the
 * region is computed as that of a box to a query, and all of the above holds for it. So does it for boxes:
 * what the search for a list's codewords leaves out lies in boxes whose bound to the region, or has a
 * bound itself, above a limit. The lists are sorted but roughly; what is compared with T is the least of
 * the bounds from some place of the list on, of those cut off at its end, and that limit. In the lanes T
 * is computed in float, as v + K |v| with v = 2 best + q, q = (1 + K) |X|^2 + tiny: off by at most
 * 3 u |v| + (d + 4) u |X|^2, the loss of tiny beside a large |X|^2 included. With what (1) and the bound
 * ask for, 2 (d + 4) u + (d + 10) u, that is (4 d + 22) u |X|^2 of the K |X|^2 in q.
 *
 * Bytes are whole numbers of steps, `scale` of which are a unit: x' is X_j less an origin, in steps, brought between 0
 * and TREE_BYTES_LAST and rounded to the nearest. The first brings no two points farther apart, and the second moves
 * them by e(X), the length of what it changes, so that scale |X - C| >= |x' - c'| - e with e = e(X) + the largest e(C),
 * and 1e-3 for steps that are rounded floats (less than 16 u TREE_BYTES_LAST). With b = scale^2 (beta - base), base the
 * least beta, and t = scale^2 (T - base), a codeword that may not be cut off has b + scale^2 |X - C|^2 <= t, and hence
 *     b + |x' - c'|^2 <= b + (sqrt(t - b) + e)^2 <= (sqrt(t) + e)^2.
 * Whatever has more is left out; so are boxes around bytes, with the least b in them. b is rounded down, and 1e-4 of the
 * right side and a unit are more than its rounding. Sums are taken modulo 2^16, which leaves out less: a sum that is not
 * above a limit below 2^16 is its own remainder. A query that needs a larger limit is searched for in the tree.
 *
 * Inputs above TREE_LARGE, where squares might overflow, and NaN are searched by the scan over all
 * codewords.
 */
#ifndef PLLM_TREE_H
#define PLLM_TREE_H

#include "kernel.h"

enum {
    TREE_FAN = VF_WIDTH < 8 ? 8 : VF_WIDTH, /* boxes tested at once */
    TREE_TOP = 64,                          /* boxes every query is compared with, at most */
    TREE_LEVELS = 6,
    TREE_LEAF_MAX = 16,
    TREE_CUTS = 4 * VF_WIDTH,               /* cuts that may be loaded together */
    TREE_CELL_MAX = 6,   /* the longest codewords that lists are made of */
    TREE_BYTES_MIN = 6,  /* the shortest that bytes are made of */
    TREE_BYTES_FAN = 16, /* boxes of bytes in a box of the next level, and codewords of a leaf of them */
    TREE_BYTES_LEVELS = 3,
    TREE_BYTES_LAST = 127
};

#define TREE_LARGE 1e15f
#define TREE_TINY 1e-36

static inline double tree_slack(int d) { return 8.0 * (d + 8) * 0x1p-24; }

/* Codewords of a leaf. */
static inline int tree_leaf_size(int d) { return d <= 8 ? TREE_FAN : TREE_LEAF_MAX; }

/* A cut: at x[axis] >= cut a query goes right. Its low bits are the axis, so that one load gets both; where exactly it
 * lies does not matter. */
static inline float tree_cut(float at, int axis)
{
    uint32_t bits;
    memcpy(&bits, &at, sizeof bits);
    bits = (bits & ~(uint32_t)(PLLM_MAX_SUBVECTOR - 1)) | (uint32_t)axis;
    memcpy(&at, &bits, sizeof at);
    return at;
}

static inline int tree_axis(float cut)
{
    uint32_t bits;
    memcpy(&bits, &cut, sizeof bits);
    return (int)(bits & (PLLM_MAX_SUBVECTOR - 1));
}

/* Lists of codewords, by d: how many are in one; into how many cells a leaf is cut, 2^levels; and how many
 * queries for each codeword it takes for lists to pay, which is measured. */
static const struct {
    int length, levels, queries;
} tree_lists[TREE_CELL_MAX + 1] = {{0, 0, 0},    {0, 0, 0},    {32, 1, 4},  {64, 2, 12},
                                   {128, 2, 16}, {256, 1, 32}, {384, 1, 48}};

static inline int tree_lists_pay(ptrdiff_t queries, int k, int d)
{
    return d >= 2 && d <= TREE_CELL_MAX && k >= 1024 && queries / tree_lists[d].queries >= k;
}

/* Places for codewords: leaf_count * leaf_size, and as many more as leaves of bytes need. */
static inline size_t tree_places(int k) { return (size_t)round_up(k, TREE_BYTES_FAN); }

/* Is it worth building a tree for n queries? Measured: with fewer codewords the scan is as quick, and
 * with fewer queries building takes longer than what is gained. */
static inline int tree_pays(ptrdiff_t n, int k, int d)
{
    const int enough = d <= 4 ? 2048 : d < TREE_BYTES_MIN ? 4096 : d <= 10 ? 2048 : 4096;
    return n >= (d <= 8 ? 40000 / d : 5000) && (k >= enough || tree_lists_pay(n, k, d));
}

struct pllm_tree {
    pllm_codebook codebook; /* the plain scan's: takes the queries that the tree cannot */
    int works;              /* 0: numbers too large or not finite, everything goes to the scan */
    int weighted;
    int leaf_size, leaf_count, depth;
    int level_count;
    int box_count[TREE_LEVELS];
    float root_weight[PLLM_MAX_SUBVECTOR]; /* sqrt(w) */
    float *boxes[TREE_LEVELS]; /* (ceil(box_count / TREE_FAN), 2 d + 1, TREE_FAN): beta, lo and hi by j */
    float *leaves;  /* (leaf_count, d + 1, leaf_size): as a codebook's blocks, in the tree's order */
    int32_t *order; /* (places) the codeword at each place; INT32_MAX behind the last */
    float *cut;     /* (2^(depth + cell_levels), TREE_CUTS at least) node 1 is the root, then 2 i + side */
    int list_length; /* codewords of a cell's list, a multiple of TREE_FAN; 0 without lists */
    int cell_levels; /* a leaf is cut into 2^cell_levels cells */
    uint16_t *list; /* (leaf_count << cell_levels, list_length) places of those nearest to the cell */
    float *bound;   /* (leaf_count << cell_levels, list_length / TREE_FAN + 1) the least bound from the
                       TREE_FAN codewords on; at the end that of all codewords not in the list */
    float *rows;    /* (places, d + 1) as `leaves`, codeword by codeword, for lists and bytes */
    struct {        /* as tree_bytes.h says */
        int works;  /* 0: none, or no scale fits */
        int level_count, box_count[TREE_BYTES_LEVELS];
        float origin[PLLM_MAX_SUBVECTOR], scale;
        float base, error;                 /* the least beta; the largest of a codeword's bytes, in steps */
        uint8_t *boxes[TREE_BYTES_LEVELS]; /* groups of TREE_BYTES_FAN */
        uint8_t *leaves;
        uint8_t *pack;                     /* (256, 8) which bits are set */
    } bytes;
};

/* The next `count` elements of `bytes` bytes of a block of memory, of which *used are taken; NULL, counted all the
 * same, without one. */
static inline void *tree_place(char *memory, size_t *used, size_t count, size_t bytes)
{
    void *here = memory ? memory + *used : NULL;
    *used += (count * bytes + 63) / 64 * 64;
    return here;
}

/* beta of a box; its sides follow in steps of TREE_FAN. */
static inline float *tree_box(const pllm_tree *tree, int level, int box)
{
    return tree->boxes[level] + (size_t)(box / TREE_FAN * (2 * tree->codebook.d + 1)) * TREE_FAN +
           box % TREE_FAN;
}

/* The scan's score of a codeword for z. */
PLLM_INLINE float tree_score(const pllm_tree *tree, const float *z, int32_t codeword, const int d)
{
    const int block = PLLM_CODEBOOK_BLOCK;
    const float *c = tree->codebook.blocks + (size_t)(codeword / block * (d + 1)) * (size_t)block + codeword % block;
    float score = c[0];
    for (int j = 0; j < d; j++)
        score = fmaf(z[j], c[(j + 1) * block], score);
    return score;
}

/* Cuts the leaves into cells and fills their lists. scaled: (leaf_count, d + 1, leaf_size), beta and C of
 * each place. Returns PLLM_OK or PLLM_ENOMEM. */
int PLLM_SYM(pllm_cells_build)(pllm_tree *tree, const float *scaled, int threads);

/* Searches for the queries z[sorted[i]], ordered by cell; end: where each cell's end. For
 * those that need more than a list, index gets the best of it, and their numbers come to the front of
 * `sorted`, in the same order; the rest of `sorted` is undefined. Returns how many they are. */
int PLLM_SYM(pllm_cells_search)(const pllm_tree *tree, const float *z, int32_t *sorted,
                                const int32_t *end, int32_t *index, float *error);

/* Fills tree->bytes, whose memory is there. scaled: (k, d), C in the order of places. beta: (k). Returns whether they
 * work. */
int PLLM_SYM(pllm_bytes_build)(pllm_tree *tree, const float *scaled, const float *beta, int threads);

/* Bytes of memory that one call of the search needs. */
size_t PLLM_SYM(pllm_bytes_memory)(void);

/* Searches for the queries z[sorted[i]] in the order of their leaves, key[sorted[i]] >> levels. For those that need the
 * tree, index gets a guess, and they come to the front of `sorted`, in the same order; the rest of it is undefined.
 * Returns how many they are. *work grows by the work done, in the units of tree_search.c. */
int PLLM_SYM(pllm_bytes_search)(const pllm_tree *tree, const float *z, int32_t *sorted, int count,
                                const int32_t *key, int levels, const int32_t *previous, int32_t *index,
                                float *error, double *work, void *memory);

#endif
