/* test_tree.c - the search tree against the plain scan: the same bits on any data. The scan, which
 * test_search.c compares with a loop, is what nearest does with few queries. */
#include "check.h"

enum { PIECE = 64 }; /* so few queries go through the tree without asking whether that is quicker */

/* Fills x with one of several kinds of data that are hard in one way each. */
enum { KINDS = 11 };
static void fill(float *x, int rows, int d, int kind)
{
    for (int i = 0; i < rows * d; i++) {
        const float a = random_normal(), b = random_normal();
        switch (kind) {
        case 1: x[i] = floorf(a * 2.0f); break;                        /* ties everywhere */
        case 2: x[i] = a / (fabsf(b) + 0.05f); break;                  /* heavy tails */
        case 3: x[i] = random_bits() % 50 ? a : a * 1e6f; break;       /* huge outliers */
        case 4: x[i] = a * 1e-40f; break;                              /* denormal numbers */
        case 5: x[i] = 1e4f + a * 1e-3f; break;                        /* rounding as large as distances */
        case 6: x[i] = 0.25f; break;                                   /* all equal */
        case 7: x[i] = (float)(i / d % 7) + a * 1e-2f; break;          /* clusters */
        case 8: x[i] = a * 1e14f; break;
        case 9: x[i] = a * 1e19f; break;                               /* squares overflow */
        case 10: x[i] = i % d == 0 ? a : a * 1e-22f; break;            /* products underflow */
        default: x[i] = a;
        }
    }
}

typedef struct {
    int n, k, d, kind, weighted, biased, guessed, threads;
    int repeats; /* how often the n queries are asked, in other orders; 0 as 1 */
} tree_case;

/* Makes the arrays of queries `repeats` times as long, each time in another order. */
static void repeat(float **z, int32_t **index, float **error, int n, int d, int repeats)
{
    float *more_z = new_floats((size_t)(n * repeats * d)), *more_error = new_floats((size_t)(n * repeats));
    int32_t *more_index = new_ints((size_t)(n * repeats));
    for (int i = 0; i < n * repeats; i++) {
        const int from = (i % n + i / n * 31) % n;
        memcpy(more_z + i * d, *z + from * d, (size_t)d * sizeof(float));
        more_index[i] = (*index)[from];
        more_error[i] = (*error)[from];
    }
    free(*z);
    free(*index);
    free(*error);
    *z = more_z;
    *index = more_index;
    *error = more_error;
}

static void check_tree(const pllm_kernels *kernels, tree_case c)
{
    float *z = new_floats((size_t)(c.n * c.d)), *codebook = new_floats((size_t)(c.k * c.d));
    float *weight = c.weighted ? new_floats((size_t)c.d) : NULL;
    float *bias = c.biased ? new_floats((size_t)c.k) : NULL;
    float *want_error = new_floats((size_t)c.n);
    int32_t *want = new_ints((size_t)c.n);
    pllm_tree *tree = NULL;
    fill(codebook, c.k, c.d, c.kind);
    fill(z, c.n, c.d, c.kind);
    for (int i = 0; i < c.k / 5; i++) /* duplicates: the lowest index must win */
        memcpy(codebook + (c.k - 1 - i) * c.d, codebook + i * c.d, (size_t)c.d * sizeof(float));
    for (int i = 0; i < c.n / 3 && c.k > 1; i++) /* queries on codewords */
        memcpy(z + i * 3 * c.d, codebook + i * 7 % c.k * c.d, (size_t)c.d * sizeof(float));
    for (int j = 0; weight && j < c.d; j++)
        weight[j] = j % 3 == 2 ? 0.0f : fabsf(random_normal());
    for (int i = 0; bias && i < c.k; i++)
        bias[i] = c.biased == 2 ? 1e6f + random_normal() : random_normal();

    kernels->nearest(z, c.n, codebook, c.k, c.d, weight, bias, want, want_error, 1);
    if (c.repeats) {
        repeat(&z, &want, &want_error, c.n, c.d, c.repeats);
        c.n *= c.repeats;
    }
    float *error = new_floats((size_t)c.n);
    int32_t *index = new_ints((size_t)c.n), *guess = c.guessed ? new_ints((size_t)c.n) : NULL;
    for (int i = 0; guess && i < c.n; i++)
        guess[i] = (int32_t)(random_bits() % (uint32_t)c.k);
    int status = kernels->tree_build(&tree, codebook, c.k, c.d, weight, bias, PTRDIFF_MAX, c.threads);
    CHECK(status == PLLM_OK && tree, "tree_build returned %d", status);
    for (int whole = c.repeats > 0; whole < 2 && tree; whole++) {
        memset(index, 0x55, (size_t)c.n * sizeof *index);
        for (int at = 0, step = whole ? c.n : PIECE; at < c.n || (whole && at == 0); at += step + !step) {
            const int count = c.n - at < step ? c.n - at : step;
            status = kernels->tree_search(tree, z + at * c.d, count, guess ? guess + at : NULL,
                                          index + at, error + at, c.threads);
            CHECK(status == PLLM_OK, "tree_search returned %d", status);
        }
        for (int i = 0; i < c.n; i++)
            CHECK(index[i] == want[i] && same_bits(&error[i], &want_error[i], sizeof *error),
                  "n %d k %d d %d kind %d weighted %d biased %d guessed %d: [%d] is %d, want %d", c.n,
                  c.k, c.d, c.kind, c.weighted, c.biased, c.guessed, i, index[i], want[i]);
    }
    free(tree);
    free(z);
    free(codebook);
    free(weight);
    free(bias);
    free(error);
    free(want_error);
    free(index);
    free(want);
    free(guess);
}

/* Queries with NaN, Inf or huge numbers get what the scan gives; their neighbours are not touched. */
static void check_odd_queries(const pllm_kernels *kernels, int k, int d)
{
    const float odd[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e20f};
    float *z = new_normals((size_t)(PIECE * d)), *codebook = new_normals((size_t)(k * d));
    int32_t want[PIECE], index[PIECE];
    pllm_tree *tree = NULL;
    void *used = memset(new_bytes(1 << 16), 0x7f, 1 << 16);
    free(used); /* the tree is likely to lie there: what it leaves unwritten must not matter */
    kernels->tree_build(&tree, codebook, k, d, NULL, NULL, PTRDIFF_MAX, 1);
    for (int i = 0; i < PIECE; i += 3)
        z[i * d + i % d] = odd[i / 3 % 6];
    for (int i = 0; i < PIECE; i++) /* the scan's own result may depend on the queries beside it */
        kernels->nearest(z + i * d, 1, codebook, k, d, NULL, NULL, want + i, NULL, 1);
    kernels->tree_search(tree, z, PIECE, NULL, index, NULL, 1);
    CHECK(same_bits(index, want, sizeof want), "k %d d %d: odd queries", k, d);
    free(tree);
    for (int i = 0; i < k; i += 3) /* and a codebook that holds such numbers */
        codebook[i * d + i % d] = odd[i / 3 % 6];
    kernels->tree_build(&tree, codebook, k, d, NULL, NULL, PTRDIFF_MAX, 1);
    kernels->tree_search(tree, z, PIECE, NULL, index, NULL, 1);
    for (int i = 0; i < PIECE; i++)
        CHECK(index[i] >= 0 && index[i] < k, "index %d of %d", index[i], k);
    free(tree);
    free(z);
    free(codebook);
}

void test_tree(const pllm_kernels *kernels)
{
    static const int codewords[] = {1, 2, 7, 8, 9, 17, 65, 257, 1000};
    for (int d = 1; d <= PLLM_MAX_SUBVECTOR; d++) {
        for (int i = 0; i < 9; i++) {
            const int n = awkward_sizes[(d * 3 + i) % (AWKWARD_SIZES - 2)];
            check_tree(kernels, (tree_case){n, codewords[i], d, 0, i & 1, (i >> 1) % 3, d & 1, 1 + (i & 1), 0});
            check_odd_queries(kernels, codewords[i], d);
        }
        for (int kind = 0; kind < KINDS; kind++)
            check_tree(kernels, (tree_case){150, 600 + 37 * d, d, kind, (kind ^ d) & 1, (kind + d) % 3,
                                            d & 1, 2, 0});
    }
    for (int d = 2; d <= 6; d++) /* so many queries go through lists */
        for (int kind = d & 1; kind < KINDS; kind += 2) {
            const int threads = kind ? 1 : 2, repeats = (d == 3 || d == 4 ? 13 : 7) * threads;
            check_tree(kernels, (tree_case){173 + kind, 1024 + kind, d, kind, (kind >> 1 ^ d) & 1,
                                            (kind + d) % 3, kind % 3 == 1, threads, repeats});
        }
    for (int kind = 0; kind < KINDS; kind++) { /* three levels of boxes */
        check_tree(kernels, (tree_case){200, 5003, 4, kind, 0, 0, kind & 1, 2, 0});
        check_tree(kernels, (tree_case){200, 9000, 8, kind, 0, kind % 3, 0, 1, 0});
    }
    for (int d = 6; d <= PLLM_MAX_SUBVECTOR; d++) { /* bytes: three levels, padded; more leaves than are listed at once */
        check_tree(kernels, (tree_case){70, 4200, d, d % KINDS, d & 1, d % 3, 0, 1, 0});
        check_tree(kernels, (tree_case){d < 15 ? 3 : 40, 20000, d, d % 4, 0, 0, 0, 2, 0});
    }
}
