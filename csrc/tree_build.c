/* tree_build.c - builds the search tree of a codebook (tree.h). Compiled once per instruction set. */
#include "tree_bytes.h"

#include <assert.h>
#include <omp.h>

enum {
    SAMPLE = 256,    /* codewords whose variance chooses the dimension to split */
    TASK_LEAVES = 32 /* leaves below which a part of the tree is not worth a task of its own */
};

/* Memory of the build. Every range of codewords uses the same range of all arrays. */
typedef struct {
    pllm_tree *tree;
    int d, k;
    float *rows, *spare; /* (k, d) scaled codewords in the order so far */
    int32_t *spare_order;
    uint64_t *keys; /* (k) */
    float *beta;    /* (tree_places) */
    float *scaled;  /* (leaf_count, d + 1, leaf_size) for the lists (tree.h), or NULL */
} build;

/* A float as an integer of the same order. */
static uint32_t ordered_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & UINT32_C(0x80000000) ? ~bits : bits | UINT32_C(0x80000000);
}

/* Brings the `rank` smallest keys, which are all different, to the front. */
static void select_smallest(uint64_t *keys, int count, int rank)
{
    uint32_t random = 12345;
    int low = 0, high = count - 1;
    while (low < high) {
        random = random * 1664525 + 1013904223;
        const uint64_t pivot = keys[low + (int)((random >> 8) % (uint32_t)(high - low + 1))];
        int i = low, j = high;
        while (i <= j) {
            while (keys[i] < pivot)
                i++;
            while (keys[j] > pivot)
                j--;
            if (i <= j) {
                uint64_t swap = keys[i];
                keys[i++] = keys[j];
                keys[j--] = swap;
            }
        }
        if (rank <= j)
            high = j;
        else if (rank >= i)
            low = i;
        else
            return;
    }
}

/* The dimension of the largest variance among the codewords first..last-1. */
static int widest_axis(const build *b, int first, int last)
{
    const int step = (last - first + SAMPLE - 1) / SAMPLE;
    int widest = 0;
    float largest = -1.0f;
    for (int j = 0; j < b->d; j++) {
        const float *x = b->rows + j, origin = x[(size_t)first * (size_t)b->d];
        float sum = 0.0f, squares = 0.0f, count = 0.0f;
        for (int i = first; i < last; i += step) {
            float v = x[(size_t)i * (size_t)b->d] - origin;
            sum += v;
            squares = fmaf(v, v, squares);
            count += 1.0f;
        }
        float variance = squares - sum * sum / count;
        if (variance > largest) {
            largest = variance;
            widest = j;
        }
    }
    return widest;
}

/* Sorts out which codewords of first..last-1 come before place `middle`; the cut between them. */
static float partition(build *b, int first, int middle, int last, int axis)
{
    const size_t d = (size_t)b->d;
    int32_t *order = b->tree->order;
    uint64_t *keys = b->keys + first;
    for (int i = first; i < last; i++)
        keys[i - first] = (uint64_t)ordered_bits(b->rows[(size_t)i * d + (size_t)axis]) << 32 |
                          (uint32_t)i;
    select_smallest(keys, last - first, middle - first);
    for (int i = first; i < last; i++) {
        const size_t from = (uint32_t)keys[i - first];
        memcpy(b->spare + (size_t)i * d, b->rows + from * d, d * sizeof(float));
        b->spare_order[i] = order[from];
    }
    memcpy(b->rows + (size_t)first * d, b->spare + (size_t)first * d,
           (size_t)(last - first) * d * sizeof(float));
    memcpy(order + first, b->spare_order + first, (size_t)(last - first) * sizeof *order);
    return b->rows[(size_t)middle * d + (size_t)axis];
}

/* Orders the leaves first_leaf .. first_leaf + span - 1, span a power of two, those that exist. */
static void split(build *b, int node, int first_leaf, int span)
{
    pllm_tree *tree = b->tree;
    const int half = span / 2, size = tree->leaf_size;
    const int first = first_leaf * size, middle = (first_leaf + half) * size;
    const int last = (first_leaf + span) * size < b->k ? (first_leaf + span) * size : b->k;
    if (span == 1)
        return;
    tree->cut[node] = INFINITY;
    if (middle < last) {
        const int axis = widest_axis(b, first, last);
        tree->cut[node] = tree_cut(partition(b, first, middle, last, axis), axis);
#pragma omp task if (span > TASK_LEAVES)
        split(b, 2 * node + 1, first_leaf + half, half);
    }
#pragma omp task if (span > TASK_LEAVES)
    split(b, 2 * node, first_leaf, half);
}

/* A float at most x. */
static float at_most(double x)
{
    float y = (float)x;
    return (double)y <= x ? y : nextafterf(y, -INFINITY);
}

/* beta of one codeword (tree.h). */
static double codeword_beta(const float *row, int d, float offset)
{
    double square = 0.0, size = 0.0;
    for (int j = 0; j < d; j++) {
        square += (double)row[j] * (double)row[j];
        size += fabs((double)row[j]);
    }
    const double bias = 2.0 * (double)offset - square;
    return bias - tree_slack(d) * (fabs(bias) + 2.0 * square) - TREE_TINY * (1.0 + size);
}

/* Fills leaf `leaf` and its box. */
static void fill_leaf(const build *b, int leaf)
{
    const pllm_tree *tree = b->tree;
    const int d = b->d, size = tree->leaf_size, block = PLLM_CODEBOOK_BLOCK;
    float *to = tree->leaves + (size_t)leaf * (size_t)((d + 1) * size);
    float *scaled = b->scaled ? b->scaled + (to - tree->leaves) : NULL;
    float *box = tree_box(tree, 0, leaf);
    *box = INFINITY;
    for (int i = 0; i < size; i++) {
        const int place = leaf * size + i, from = place < b->k ? tree->order[place] : 0;
        const float *c = tree->codebook.blocks + (size_t)(from / block * (d + 1)) * (size_t)block +
                         from % block;
        const float *row = b->rows + (size_t)place * (size_t)d;
        const float beta = place < b->k ? at_most(codeword_beta(row, d, c[0])) : INFINITY;
        for (int j = 0; j <= d; j++)
            to[j * size + i] = place < b->k ? c[j * block] : j ? 0.0f : INFINITY;
        b->beta[place] = beta;
        for (int j = 0; scaled && j <= d; j++)
            scaled[j * size + i] = j == 0 ? beta : place < b->k ? row[j - 1] : 0.0f;
        for (int j = 0; tree->rows && j <= d; j++)
            tree->rows[(size_t)place * (size_t)(d + 1) + (size_t)j] = to[j * size + i];
        *box = fminf(*box, beta);
        if (place >= b->k) {
            tree->order[place] = INT32_MAX;
            continue;
        }
        for (int j = 0; j < d; j++) {
            float *lo = box + (2 * j + 1) * TREE_FAN, *hi = lo + TREE_FAN;
            *lo = i == 0 || row[j] < *lo ? row[j] : *lo;
            *hi = i == 0 || row[j] > *hi ? row[j] : *hi;
        }
    }
}

/* Box `box` of a level above the leaves: around its children. */
static void fill_box(const pllm_tree *tree, int level, int box)
{
    float *to = tree_box(tree, level, box);
    const int first = box * TREE_FAN, below = tree->box_count[level - 1];
    for (int child = first; child < first + TREE_FAN && child < below; child++) {
        const float *from = tree_box(tree, level - 1, child);
        *to = child == first || *from < *to ? *from : *to;
        for (int j = 0; j < tree->codebook.d; j++) {
            const int lo = (2 * j + 1) * TREE_FAN, hi = lo + TREE_FAN;
            to[lo] = child == first || from[lo] < to[lo] ? from[lo] : to[lo];
            to[hi] = child == first || from[hi] > to[hi] ? from[hi] : to[hi];
        }
    }
}

static void fill_boxes(const build *b, int threads)
{
    const pllm_tree *tree = b->tree;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int leaf = 0; leaf < tree->leaf_count; leaf++)
        fill_leaf(b, leaf);
    for (size_t place = (size_t)tree->leaf_count * (size_t)tree->leaf_size; place < tree_places(b->k); place++) {
        tree->order[place] = INT32_MAX;
        for (int j = 0; tree->rows && j <= b->d; j++)
            tree->rows[place * (size_t)(b->d + 1) + (size_t)j] = j ? 0.0f : INFINITY;
    }
    for (int level = 0; level < tree->level_count; level++) {
        const int count = tree->box_count[level];
        for (int box = 0; level > 0 && box < count; box++)
            fill_box(tree, level, box);
        for (int box = count; box % TREE_FAN; box++) { /* never at or below any threshold */
            float *to = tree_box(tree, level, box);
            *to = INFINITY;
            for (int j = 1; j <= 2 * tree->codebook.d; j++)
                to[j * TREE_FAN] = 0.0f;
        }
    }
}

/* Scales the codewords into b->rows. 0 when the tree's bounds do not hold for such numbers. */
static int scale_rows(const build *b)
{
    pllm_tree *tree = b->tree;
    const pllm_codebook *cb = &tree->codebook;
    const int d = b->d, block = PLLM_CODEBOOK_BLOCK;
    int fits = 1;
    for (int j = 0; j < d; j++) {
        const float w = cb->weight ? cb->weight[j] : 1.0f;
        fits &= w >= 0.0f && w <= TREE_LARGE;
        tree->root_weight[j] = sqrtf(w);
    }
    for (int i = 0; i < b->k && fits; i++) {
        const float *c = cb->blocks + (size_t)(i / block * (d + 1)) * (size_t)block + i % block;
        float *row = b->rows + (size_t)i * (size_t)d;
        fits = fabsf(c[0]) <= TREE_LARGE * TREE_LARGE;
        for (int j = 0; j < d; j++) {
            row[j] = tree->root_weight[j] * cb->codebook[(size_t)i * (size_t)d + (size_t)j];
            fits &= fabsf(row[j]) <= TREE_LARGE && fabsf(c[(j + 1) * block]) <= TREE_LARGE;
        }
        tree->order[i] = i;
    }
    return fits;
}

/* Sizes of the tree of k codewords of length d; the pointers are left NULL. */
static pllm_tree shape_of(int k, int d, ptrdiff_t queries)
{
    pllm_tree tree = {.leaf_size = tree_leaf_size(d)};
    if (tree_lists_pay(queries, k, d)) {
        tree.list_length = tree_lists[d].length;
        tree.cell_levels = tree_lists[d].levels;
    }
    tree.leaf_count = (k + tree.leaf_size - 1) / tree.leaf_size;
    while ((1 << tree.depth) < tree.leaf_count)
        tree.depth++;
    for (int count = k, more = d >= TREE_BYTES_MIN; more; more = count > TREE_BYTES_FAN) {
        count = (count + TREE_BYTES_FAN - 1) / TREE_BYTES_FAN;
        tree.bytes.box_count[tree.bytes.level_count++] = count;
    }
    for (int count = tree.leaf_count;; count = (count + TREE_FAN - 1) / TREE_FAN) {
        tree.box_count[tree.level_count++] = count;
        if (count <= TREE_TOP)
            return tree;
    }
}

/* Lays the tree's arrays out in one block, `memory`, or only counts its bytes when that is NULL. */
static size_t lay_out(pllm_tree *tree, char *memory, int k, int d, int weighted, int biased)
{
    size_t used = (sizeof *tree + 63) / 64 * 64;
    const size_t places = tree_places(k);
    pllm_codebook *cb = &tree->codebook;
    *cb = (pllm_codebook){.d = d, .k = k};
    cb->codebook = tree_place(memory, &used, (size_t)k * (size_t)d, sizeof(float));
    cb->blocks = tree_place(memory, &used, pllm_codebook_floats(k, d), sizeof(float));
    if (weighted)
        cb->weight = tree_place(memory, &used, (size_t)d, sizeof(float));
    if (biased)
        cb->bias = tree_place(memory, &used, (size_t)k, sizeof(float));
    for (int level = 0; level < tree->level_count; level++) {
        const int groups = (tree->box_count[level] + TREE_FAN - 1) / TREE_FAN;
        tree->boxes[level] =
            tree_place(memory, &used, (size_t)(groups * TREE_FAN) * (size_t)(2 * d + 1), sizeof(float));
    }
    tree->leaves = tree_place(memory, &used, places * (size_t)(d + 1), sizeof(float));
    tree->order = tree_place(memory, &used, places, sizeof(int32_t));
    const size_t cuts = (size_t)1 << (tree->depth + tree->cell_levels);
    tree->cut = tree_place(memory, &used, cuts > TREE_CUTS ? cuts : TREE_CUTS, sizeof(float));
    if (tree->list_length) {
        const size_t cells = (size_t)tree->leaf_count << tree->cell_levels;
        const size_t length = (size_t)tree->list_length;
        tree->list = tree_place(memory, &used, cells * length, sizeof(uint16_t));
        tree->bound = tree_place(memory, &used, cells * (length / TREE_FAN + 1), sizeof(float));
    }
    if (tree->list_length || tree->bytes.level_count)
        tree->rows = tree_place(memory, &used, places * (size_t)(d + 1), sizeof(float));
    for (int level = 0; level < tree->bytes.level_count; level++) {
        const size_t groups = (size_t)(tree->bytes.box_count[level] + TREE_BYTES_FAN - 1) / TREE_BYTES_FAN;
        tree->bytes.boxes[level] = tree_place(memory, &used, groups * tree_bytes_group(d), 1);
    }
    if (tree->bytes.level_count) {
        const size_t leaves = (size_t)tree->bytes.box_count[0];
        tree->bytes.leaves = tree_place(memory, &used, leaves * tree_bytes_leaf(d), 1);
        tree->bytes.pack = tree_place(memory, &used, 256, 8);
    }
    return used;
}

/* A copy of the arguments in the tree's own memory, prepared for the scan. */
static void take_codebook(pllm_tree *tree, const float *codebook, const float *weight,
                          const float *bias)
{
    pllm_codebook *cb = &tree->codebook;
    const int k = cb->k, d = cb->d;
    memcpy((float *)(uintptr_t)cb->codebook, codebook, (size_t)k * (size_t)d * sizeof(float));
    if (weight)
        memcpy((float *)(uintptr_t)cb->weight, weight, (size_t)d * sizeof(float));
    if (bias)
        memcpy((float *)(uintptr_t)cb->bias, bias, (size_t)k * sizeof(float));
    PLLM_SYM(pllm_codebook_prepare)(cb, cb->codebook, k, d, cb->weight, cb->bias, cb->blocks);
}

int PLLM_SYM(pllm_tree_build)(pllm_tree **result, const float *codebook, int k, int d,
                              const float *weight, const float *bias, ptrdiff_t queries,
                              int threads)
{
    assert(d >= 1 && d <= PLLM_MAX_SUBVECTOR && k >= 1);
    int status = PLLM_ENOMEM;
    const size_t floats = (size_t)k * (size_t)d;
    pllm_tree shape = shape_of(k, d, queries);
    pllm_tree *tree = pllm_alloc(lay_out(&shape, NULL, k, d, weight != NULL, bias != NULL));
    build b = {.tree = tree, .d = d, .k = k, .rows = pllm_alloc_floats(floats),
               .spare = pllm_alloc_floats(floats),
               .spare_order = pllm_alloc((size_t)k * sizeof(int32_t)),
               .keys = pllm_alloc((size_t)k * sizeof(uint64_t)),
               .beta = pllm_alloc_floats(tree_places(k))};
    *result = NULL;
    if (shape.list_length)
        b.scaled = pllm_alloc_floats((size_t)(shape.leaf_count * shape.leaf_size) * (size_t)(d + 1));
    if (!tree || !b.rows || !b.spare || !b.spare_order || !b.keys || !b.beta || (shape.list_length && !b.scaled))
        goto done;
    *tree = shape;
    lay_out(tree, (char *)tree, k, d, weight != NULL, bias != NULL);
    tree->weighted = weight != NULL;
    take_codebook(tree, codebook, weight, bias);
    tree->works = scale_rows(&b);
    if (tree->works) {
#pragma omp parallel num_threads(threads)
#pragma omp single
        split(&b, 1, 0, 1 << tree->depth);
        fill_boxes(&b, threads);
        tree->bytes.works =
            tree->bytes.level_count && PLLM_SYM(pllm_bytes_build)(tree, b.rows, b.beta, threads);
    }
    status = PLLM_OK;
    if (tree->works && tree->list_length)
        status = PLLM_SYM(pllm_cells_build)(tree, b.scaled, threads);
    if (status == PLLM_OK) {
        *result = tree;
        tree = NULL;
    }
done:
    free(b.scaled);
    free(b.beta);
    free(b.keys);
    free(b.spare_order);
    free(b.spare);
    free(b.rows);
    free(tree);
    return status;
}
