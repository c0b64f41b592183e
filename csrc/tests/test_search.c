/* test_search.c - the search against a loop over all codewords with the same fused chain: the indices
 * and the errors must have the same bits on every instruction set and thread count. */
#include "check.h"

typedef struct {
    int n, k, d, weighted, biased, threads;
} search_case;

/* The score of the contract in pllm.h. */
static float score_of(const search_case *c, const float *x, const float *codeword,
                      const float *weight, float bias)
{
    float twice = bias;
    for (int j = 0; j < c->d; j++)
        twice = fmaf(weight ? weight[j] * codeword[j] : codeword[j], codeword[j], twice);
    float score = 0.5f * twice;
    for (int j = 0; j < c->d; j++)
        score = fmaf(x[j], -(weight ? weight[j] * codeword[j] : codeword[j]), score);
    return score;
}

static float error_of(const search_case *c, const float *x, const float *codeword,
                      const float *weight, const float *bias)
{
    float sum = 0.0f;
    for (int j = 0; j < c->d; j++) {
        float e = x[j] - codeword[j];
        sum = fmaf(weight ? weight[j] * e : e, e, sum);
    }
    return bias ? sum + *bias : sum;
}

static void check_search(const pllm_kernels *k, search_case c)
{
    float *z = new_normals((size_t)c.n * (size_t)c.d);
    float *codebook = new_normals((size_t)c.k * (size_t)c.d);
    float *weight = c.weighted ? new_normals((size_t)c.d) : NULL;
    float *bias = c.biased ? new_normals((size_t)c.k) : NULL;
    float *error = new_floats((size_t)c.n);
    int32_t *index = new_ints((size_t)c.n);
    for (int j = 0; weight && j < c.d; j++)
        weight[j] = fabsf(weight[j]);
    for (int i = 0; i < c.k / 3; i++) /* duplicates: the lowest index must win */
        memcpy(codebook + (c.k - 1 - i) * c.d, codebook + i * c.d, (size_t)c.d * sizeof(float));

    int status = k->nearest(z, c.n, codebook, c.k, c.d, weight, bias, index, error, c.threads);
    CHECK(status == PLLM_OK, "nearest returned %d", status);
    for (int i = 0; i < c.n; i++) {
        const float *x = z + i * c.d;
        int best = 0;
        float low = INFINITY;
        for (int m = 0; m < c.k; m++) {
            float score = score_of(&c, x, codebook + m * c.d, weight, bias ? bias[m] : 0.0f);
            if (score < low)
                low = score, best = m;
        }
        CHECK(index[i] == best, "n %d k %d d %d: index[%d] is %d, want %d", c.n, c.k, c.d, i,
              index[i], best);
        float want = error_of(&c, x, codebook + best * c.d, weight, bias ? bias + best : NULL);
        CHECK(same_bits(&error[i], &want, sizeof want), "n %d k %d d %d: error[%d] is %g, want %g",
              c.n, c.k, c.d, i, (double)error[i], (double)want);
    }
    free(z);
    free(codebook);
    free(weight);
    free(bias);
    free(error);
    free(index);
}

/* Not-a-number and infinity anywhere: no crash, and indices in range. */
static void check_not_finite(const pllm_kernels *k, int codewords, int d)
{
    enum { QUERIES = 40 };
    const float odd[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f};
    float *z = new_normals((size_t)(QUERIES * d)), *codebook = new_normals((size_t)(codewords * d));
    int32_t index[QUERIES];
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < QUERIES; i += 2)
            z[i * d + i % d] = odd[i % 5];
        k->nearest(z, QUERIES, codebook, codewords, d, NULL, NULL, index, NULL, 1);
        for (int i = 0; i < QUERIES; i++)
            CHECK(index[i] >= 0 && index[i] < codewords, "index %d of %d", index[i], codewords);
        for (int i = 0; i < codewords * d; i++)
            codebook[i] = odd[i % 5];
    }
    free(z);
    free(codebook);
}

/* A prepared codebook with free offsets, searched slice by slice. */
static void check_slices(const pllm_kernels *k, int codewords, int d)
{
    enum { QUERIES = 100 };
    float *z = new_normals((size_t)(QUERIES * d)), *codebook = new_normals((size_t)(codewords * d));
    float *offset = new_normals((size_t)codewords);
    float *blocks = new_floats(pllm_codebook_floats(codewords, d));
    float *scratch = new_floats(pllm_search_scratch_floats(d));
    int32_t index[QUERIES];
    pllm_codebook cb;
    k->codebook_prepare_score(&cb, codebook, codewords, d, offset, blocks);
    for (int from = 0, count = 0; from < QUERIES; from += count, count = count * 2 + 1) {
        if (from + count > QUERIES)
            count = QUERIES - from;
        k->search_slice(&cb, z + from * d, count, index + from, NULL, scratch);
    }
    for (int i = 0; i < QUERIES; i++) {
        int best = 0;
        float low = INFINITY;
        for (int m = 0; m < codewords; m++) {
            float score = offset[m];
            for (int j = 0; j < d; j++)
                score = fmaf(z[i * d + j], -codebook[m * d + j], score);
            if (score < low)
                low = score, best = m;
        }
        CHECK(index[i] == best, "slice, k %d d %d: %d is not %d", codewords, d, index[i], best);
    }
    free(z);
    free(codebook);
    free(offset);
    free(blocks);
    free(scratch);
}

void test_search(const pllm_kernels *k)
{
    static const int codewords[] = {1, 2, 3, 31, 32, 33, 64, 97, 257};
    for (int d = 1; d <= PLLM_MAX_SUBVECTOR; d++) {
        for (int i = 0; i < 9; i++) {
            int n = awkward_sizes[(d * 5 + i) % (AWKWARD_SIZES - 2)];
            check_search(k, (search_case){n, codewords[i], d, i & 1, i >> 1 & 1, 1 + (d & 1)});
            check_not_finite(k, codewords[i], d);
            check_slices(k, codewords[i], d);
        }
    }
    for (int s = 0; s < AWKWARD_SIZES; s++)
        check_search(k, (search_case){awkward_sizes[s], 130, 4, 0, 0, 2});
    check_search(k, (search_case){33, 4111, 8, 1, 1, 2}); /* more than one tile of codewords */
}
