/* tree.h - the search tree, shared by tree_build.c and tree_search.c.
 *
 * Codewords are ordered by a k-d tree that splits the dimension of the largest variance in two, cut into
 * leaves of leaf_size codewords, and every leaf gets its bounding box. TREE_FAN consecutive boxes are
 * the children of one box of the next level, up to a level of at most TREE_TOP boxes, all of which every
 * query is compared with. The split planes lead a query to the leaf it lies in, which is searched first.
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
 * from beta, exceed what underflow can do. Inputs above TREE_LARGE, where squares might overflow, and
 * NaN are searched by the scan over all codewords.
 */
#ifndef PLLM_TREE_H
#define PLLM_TREE_H

#include "kernel.h"

enum {
    TREE_FAN = VF_WIDTH < 8 ? 8 : VF_WIDTH, /* boxes tested at once */
    TREE_TOP = 64,                          /* boxes every query is compared with, at most */
    TREE_LEVELS = 6,
    TREE_LEAF_MAX = 16
};

#define TREE_LARGE 1e15f
#define TREE_TINY 1e-36

static inline double tree_slack(int d) { return 8.0 * (d + 8) * 0x1p-24; }

/* Codewords of a leaf. */
static inline int tree_leaf_size(int d) { return d <= 8 ? TREE_FAN : TREE_LEAF_MAX; }

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
    int32_t *order; /* (leaf_count * leaf_size) the codeword at each place; INT32_MAX behind the last */
    float *cut;     /* (2^depth) at x[axis] >= cut a query goes right; node 1 is the root, 2 i + side */
    int32_t *axis;  /* (2^depth) */
};

#endif
