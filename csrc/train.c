/* train.c - the straight-through training step, Adam, and the sums of Lloyd's iteration.
 *
 * Where the decoder takes no statistics of the row, what it gives for a sub-vector depends on the codeword alone.
 * Few codewords are then decoded once and not for each sub-vector: with D its values and J[a] = d D_a / d codeword,
 * the gradient of a latent is sum_a g_a J[a], g being that of the decoded sub-vector, and the decoder's own gradient
 * is that of the codewords under the sum of their sub-vectors' g.
 */
#include "coder.h"
#include "tree.h"

#include <omp.h>

enum { ADAM_PARALLEL = 1 << 16 }; /* values below which starting threads costs more than it gains */

/* Memory of one thread. code, factor, decoded: d a block.  lane_grad: 16 floats a parameter. */
typedef struct {
    coder_tape encoder, decoder;
    coder_scratch scratch;
    float *code, *factor, *decoded, *encoder_grad, *decoder_grad, *search;
} step_memory;

/* What all threads share. The partial sums are per chunk. */
typedef struct {
    const pllm_step *step;
    coder_plan plan;
    int by_tree; /* latents are searched for all at once, before anything else, and encoded twice */
    pllm_codebook codebook;
    int by_codeword; /* codewords are decoded, not sub-vectors */
    float *decoded;  /* by_codeword: (k, d) */
    float *jacobian; /* by_codeword: (d, k, d) */
    ptrdiff_t params_count, decoder_sums; /* decoder_sums: by_codeword k d, the decoder's output; else its parameters */
    float *partial_encoder, *partial_decoder;
    double *partial_loss; /* (chunks, 2) */
} step_state;

/* Decoding a codeword with its Jacobian costs d + 2 times what a sub-vector does. */
static int decodes_codewords(const pllm_step *s, ptrdiff_t count)
{
    return s->coder.norm != PLLM_NORM_RLN && 2 * (s->coder.d + 2) * (ptrdiff_t)s->k <= count;
}

static size_t block_floats(const coder_plan *plan)
{
    return (size_t)(plan->blocks * plan->d) * CODER_LANES;
}

static size_t thread_floats(const step_state *t)
{
    size_t floats = 2 * PLLM_SYM(coder_tape_floats)(&t->plan) + PLLM_SYM(coder_scratch_floats)(&t->plan);
    floats += 3 * block_floats(&t->plan) + 2 * (size_t)t->params_count * CODER_LANES;
    floats += pllm_search_scratch_floats(t->plan.d);
    return (floats + CODER_LANES - 1) / CODER_LANES * CODER_LANES;
}

static step_memory place(const step_state *t, float *memory)
{
    step_memory m;
    memory = PLLM_SYM(coder_tape_place)(&t->plan, 0, memory, &m.encoder);
    memory = PLLM_SYM(coder_tape_place)(&t->plan, 1, memory, &m.decoder);
    memory = PLLM_SYM(coder_scratch_place)(&t->plan, memory, &m.scratch);
    m.code = memory;
    m.factor = m.code + block_floats(&t->plan);
    m.decoded = m.factor + block_floats(&t->plan);
    m.encoder_grad = m.decoded + block_floats(&t->plan);
    m.decoder_grad = m.encoder_grad + t->params_count * CODER_LANES;
    m.search = m.decoder_grad + t->params_count * CODER_LANES;
    return m;
}

/* The rows of a table (k, d) that sub-vectors first.. chose, as blocks; lanes behind the last get zeros. */
PLLM_INLINE void gather_rows(const int d, const pllm_step *s, const float *table, ptrdiff_t first, ptrdiff_t count,
                             float *blocks)
{
    const ptrdiff_t used = (count + CODER_LANES - 1) / CODER_LANES;
    memset(blocks + (used - 1) * d * CODER_LANES, 0, (size_t)d * CODER_LANES * sizeof *blocks);
    for (ptrdiff_t i = 0; i < count; i++) {
        const float *row = table + (ptrdiff_t)s->index[first + i] * d;
        float *out = blocks + i / CODER_LANES * d * CODER_LANES + i % CODER_LANES;
        for (int c = 0; c < d; c++)
            out[c * CODER_LANES] = row[c];
    }
}

/* Weights of the squared errors as blocks; lanes behind the last get zeros. */
static void load_factor(const pllm_step *s, ptrdiff_t first, ptrdiff_t count, float *blocks)
{
    const int d = s->coder.d;
    const ptrdiff_t per_row = s->length / d, used = (count + CODER_LANES - 1) / CODER_LANES;
    ptrdiff_t row = first / per_row, column = first % per_row;
    for (ptrdiff_t i = 0; i < used * d * CODER_LANES; i += VF_WIDTH)
        vf_store(blocks + i, vf_set1(1.0f));
    for (ptrdiff_t i = 0; i < count && s->weight; i++) {
        const float *weight = s->weight + row * s->weight_row_stride + column * d;
        float *out = blocks + i / CODER_LANES * d * CODER_LANES + i % CODER_LANES;
        for (int c = 0; c < d; c++)
            out[c * CODER_LANES] = weight[c];
        if (++column == per_row) {
            column = 0;
            row++;
        }
    }
    for (ptrdiff_t i = count; i < used * CODER_LANES; i++)
        for (int c = 0; c < d; c++)
            blocks[((used - 1) * d + c) * CODER_LANES + i % CODER_LANES] = 0.0f;
}

/* Adds the unit's loss sums to loss[0] (reconstruction) and loss[1] (commitment), leaves the
 * gradient of the decoder's output in scratch.grad and the pull on the latents in m->decoded. */
static void unit_loss(const step_state *t, const step_memory *m, ptrdiff_t count, double loss[2])
{
    const pllm_step *s = t->step;
    int d = t->plan.d;
    ptrdiff_t blocks = (count + CODER_LANES - 1) / CODER_LANES;
    double size = (double)t->plan.count * d;
    vf16 error_scale = vf16_set1((float)(2.0 / size));
    vf16 pull_scale = vf16_set1((float)(2.0 * (double)s->codebook_loss / size));
    vf16 reconstruction = vf16_zero(), commitment = vf16_zero();
    const vf16 all = vf16_set1(1.0f);
    float last[CODER_LANES];
    for (int lane = 0; lane < CODER_LANES; lane++)
        last[lane] = (blocks - 1) * CODER_LANES + lane < count ? 1.0f : 0.0f;
    for (ptrdiff_t i = 0; i < blocks * d * CODER_LANES; i += CODER_LANES) {
        const vf16 x = vf16_load(m->encoder.mlp[0].in + i), z = vf16_load(m->encoder.output + i);
        const vf16 decoded = vf16_load(m->decoded + i), code = vf16_load(m->code + i);
        const vf16 factor = vf16_load(m->factor + i);
        const vf16 mask = i < (blocks - 1) * d * CODER_LANES ? all : vf16_load(last);
        for (int p = 0; p < VF16_PARTS; p++) {
            vf error = vf_sub(decoded.part[p], x.part[p]);
            vf weighted = vf_mul(factor.part[p], error);
            reconstruction.part[p] = vf_fma(weighted, error, reconstruction.part[p]);
            vf_store(m->scratch.grad + i + p * VF_WIDTH, vf_mul(weighted, error_scale.part[p]));
            vf gap = vf_mul(vf_sub(z.part[p], code.part[p]), mask.part[p]);
            commitment.part[p] = vf_fma(gap, gap, commitment.part[p]);
            vf_store(m->decoded + i + p * VF_WIDTH, vf_mul(gap, pull_scale.part[p]));
        }
    }
    loss[0] += (double)vf16_sum(reconstruction);
    loss[1] += (double)vf16_sum(commitment);
}

/* Adds the gradients of the decoded sub-vectors first.., blocks in `grad`, to those of their codewords, sums (k, d),
 * and turns them into the latents' gradients. */
PLLM_INLINE void pull_back(const int d, const step_state *t, ptrdiff_t first, ptrdiff_t count, float *grad, float *sums)
{
    const ptrdiff_t matrix = (ptrdiff_t)t->step->k * d;
    for (ptrdiff_t i = 0; i < count; i++) {
        const ptrdiff_t at = (ptrdiff_t)t->step->index[first + i] * d;
        float *const own = grad + i / CODER_LANES * d * CODER_LANES + i % CODER_LANES;
        float latent[PLLM_MAX_SUBVECTOR] = {0.0f};
        for (int a = 0; a < d; a++) {
            const float g = own[a * CODER_LANES], *const row = t->jacobian + a * matrix + at;
            sums[at + a] += g;
            for (int c = 0; c < d; c++)
                latent[c] = fmaf(g, row[c], latent[c]);
        }
        for (int c = 0; c < d; c++)
            own[c * CODER_LANES] = latent[c];
    }
}

/* decoder_sums: by_codeword those of the chunk, which are added to. */
static void run_unit(const step_state *t, const step_memory *m, ptrdiff_t first, ptrdiff_t count,
                     double loss[2], float *decoder_sums)
{
    const pllm_step *s = t->step;
    const coder_plan *plan = &t->plan;
    const int d = plan->d;
    const ptrdiff_t used = (count + CODER_LANES - 1) / CODER_LANES * d * CODER_LANES;
    PLLM_SYM(coder_load)(s->rows + first * d, count, d, m->encoder.mlp[0].in);
    PLLM_SYM(coder_encode)(plan, count, s->encoder, &m->encoder, 1, &m->scratch);
    if (!t->by_tree) {
        PLLM_SYM(coder_store)(m->encoder.output, count, d, s->latents + first * d);
        PLLM_SYM(pllm_search_slice)(&t->codebook, s->latents + first * d, count, s->index + first, NULL,
                                    m->search);
    }
    PLLM_CONSTANT_D(gather_rows, d, s, s->codebook, first, count, m->code);
    load_factor(s, first, count, m->factor);
    if (t->by_codeword) {
        PLLM_CONSTANT_D(gather_rows, d, s, t->decoded, first, count, m->decoded);
        unit_loss(t, m, count, loss);
        PLLM_CONSTANT_D(pull_back, d, t, first, count, m->scratch.grad, decoder_sums);
    } else {
        memcpy(m->scratch.state, m->code, (size_t)used * sizeof *m->code);
        PLLM_SYM(coder_decode)(plan, count, s->decoder, &m->decoder, 1, &m->scratch, m->decoded);
        unit_loss(t, m, count, loss);
        PLLM_SYM(coder_decode_backward)(plan, count, s->decoder, &m->decoder, &m->scratch,
                                        m->decoder_grad);
    }
    for (ptrdiff_t i = 0; i < used; i += VF_WIDTH)
        vf_store(m->scratch.grad + i,
                 vf_add(vf_load(m->scratch.grad + i), vf_load(m->decoded + i)));
    PLLM_SYM(coder_encode_backward)(plan, count, s->encoder, &m->encoder, &m->scratch, 0,
                                    m->encoder_grad);
}

static void run_chunk(const step_state *t, const step_memory *m, ptrdiff_t chunk)
{
    const coder_plan *plan = &t->plan;
    size_t lane_bytes = (size_t)t->params_count * CODER_LANES * sizeof(float);
    double *loss = t->partial_loss + 2 * chunk;
    loss[0] = loss[1] = 0.0;
    float *decoder_sums = t->partial_decoder + chunk * t->decoder_sums;
    memset(m->encoder_grad, 0, lane_bytes);
    if (t->by_codeword)
        memset(decoder_sums, 0, (size_t)t->decoder_sums * sizeof *decoder_sums);
    else
        memset(m->decoder_grad, 0, lane_bytes);
    ptrdiff_t unit = chunk * plan->units_per_chunk, end = unit + plan->units_per_chunk;
    for (; unit < end && unit < plan->units; unit++) {
        ptrdiff_t first = unit * plan->unit;
        ptrdiff_t count = plan->count - first < plan->unit ? plan->count - first : plan->unit;
        run_unit(t, m, first, count, loss, decoder_sums);
    }
    PLLM_SYM(coder_sum_lanes)(m->encoder_grad, t->params_count, t->partial_encoder + chunk * t->params_count);
    if (!t->by_codeword)
        PLLM_SYM(coder_sum_lanes)(m->decoder_grad, t->params_count, decoder_sums);
}

/* In order of the sub-vectors: the same for any number of threads. */
PLLM_INLINE void add_pulls(const int d, const pllm_step *s, ptrdiff_t count, float pull)
{
    for (ptrdiff_t i = 0; i < count; i++) {
        const float *codeword = s->codebook + (ptrdiff_t)s->index[i] * d, *z = s->latents + i * d;
        float *grad = s->grad_codebook + (ptrdiff_t)s->index[i] * d, sum[PLLM_MAX_SUBVECTOR];
        for (int c = 0; c < d; c++)
            sum[c] = grad[c] + pull * (codeword[c] - z[c]);
        memcpy(grad, sum, (size_t)d * sizeof *grad);
    }
}

static void codebook_gradient(const pllm_step *s, ptrdiff_t count)
{
    const int d = s->coder.d;
    const float pull = (float)(2.0 * (double)s->codebook_loss / ((double)count * d));
    memset(s->grad_codebook, 0, (size_t)s->k * (size_t)d * sizeof *s->grad_codebook);
    PLLM_CONSTANT_D(add_pulls, d, s, count, pull);
}

static void gather_results(step_state *t, pllm_step *s, float *decoder_grad)
{
    double loss[2] = {0.0, 0.0}, size = (double)t->plan.count * t->plan.d;
    for (ptrdiff_t chunk = 0; chunk < t->plan.chunks; chunk++)
        for (int i = 0; i < 2; i++)
            loss[i] += t->partial_loss[2 * chunk + i];
    s->reconstruction = loss[0] / size;
    s->commitment = loss[1] / size;
    PLLM_SYM(coder_sum_chunks)(t->partial_encoder, t->plan.chunks, t->params_count, s->grad_encoder);
    PLLM_SYM(coder_sum_chunks)(t->partial_decoder, t->plan.chunks, t->decoder_sums, decoder_grad);
    codebook_gradient(s, t->plan.count);
}

/* The latents and indices of all `count` sub-vectors. */
static int search_all(const pllm_step *s, ptrdiff_t count, int threads)
{
    const int status =
        PLLM_SYM(pllm_encode)(&s->coder, s->rows, s->row_count, s->length, s->encoder, s->latents, threads);
    if (status != PLLM_OK)
        return status;
    return PLLM_SYM(pllm_nearest)(s->latents, count, s->codebook, s->k, s->coder.d, NULL, NULL, s->index, NULL,
                                  threads);
}

/* by_codeword: t->decoded and t->jacobian. grad: (k, d) scratch.  unused: for the decoder's gradients. */
static int decode_codebook(const step_state *t, float *grad, float *unused, int threads)
{
    const pllm_step *s = t->step;
    const int d = s->coder.d;
    const ptrdiff_t length = (ptrdiff_t)s->k * d;
    int status = PLLM_SYM(pllm_decode)(&s->coder, s->codebook, 1, length, s->decoder, t->decoded, threads);
    for (int a = 0; a < d && status == PLLM_OK; a++) {
        memset(grad, 0, (size_t)length * sizeof *grad);
        for (ptrdiff_t i = a; i < length; i += d)
            grad[i] = 1.0f;
        status = PLLM_SYM(pllm_decode_backward)(&s->coder, s->codebook, 1, length, s->decoder, grad,
                                                t->jacobian + a * length, unused, threads);
    }
    return status;
}

int PLLM_SYM(pllm_train_step)(pllm_step *s, int threads)
{
    const pllm_coder *coder = &s->coder;
    step_state t = {.step = s};
    t.plan = PLLM_SYM(coder_plan_of)(coder->d, coder->h, coder->norm,
                                     s->row_count * (s->length / coder->d), s->row_count);
    t.params_count = 3 * t.plan.mlp_floats;
    t.by_tree = tree_pays(t.plan.count, s->k / 2, coder->d);
    t.by_codeword = decodes_codewords(s, t.plan.count);
    const ptrdiff_t book = (ptrdiff_t)s->k * coder->d;
    t.decoder_sums = t.by_codeword ? book : t.params_count;
    const size_t per_thread = thread_floats(&t);
    const size_t partials = (size_t)(t.plan.chunks * t.params_count);
    const size_t decoder_partials = (size_t)(t.plan.chunks * t.decoder_sums);
    const size_t codebook_floats = pllm_codebook_floats(s->k, coder->d);
    const size_t by_codeword_floats = t.by_codeword ? (size_t)(book * (coder->d + 2)) : 0;
    int status = PLLM_ENOMEM;
    t.partial_loss = pllm_alloc((size_t)t.plan.chunks * 2 * sizeof(double));
    float *memory = pllm_alloc_floats((size_t)threads * per_thread + codebook_floats + partials + decoder_partials +
                                      by_codeword_floats);
    if (!t.partial_loss || !memory)
        goto done;
    float *blocks = memory + (size_t)threads * per_thread;
    t.partial_encoder = blocks + codebook_floats;
    t.partial_decoder = t.partial_encoder + partials;
    float *const output_grad = t.partial_decoder + decoder_partials; /* by_codeword: (k, d) */
    if (t.by_codeword) {
        t.decoded = output_grad + book;
        t.jacobian = t.decoded + book;
        status = decode_codebook(&t, output_grad, s->grad_decoder, threads);
        if (status != PLLM_OK)
            goto done;
    }
    if (t.by_tree) {
        status = search_all(s, t.plan.count, threads);
        if (status != PLLM_OK)
            goto done;
    } else
        PLLM_SYM(pllm_codebook_prepare)(&t.codebook, s->codebook, s->k, coder->d, NULL, NULL, blocks);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (ptrdiff_t chunk = 0; chunk < t.plan.chunks; chunk++) {
        step_memory m = place(&t, memory + (size_t)omp_get_thread_num() * per_thread);
        run_chunk(&t, &m, chunk);
    }
    gather_results(&t, s, t.by_codeword ? output_grad : s->grad_decoder);
    status = PLLM_OK;
    if (t.by_codeword)
        status = PLLM_SYM(pllm_decode_backward)(coder, s->codebook, 1, book, s->decoder, output_grad, t.decoded,
                                                s->grad_decoder, threads);
done:
    free(memory);
    free(t.partial_loss);
    return status;
}

typedef struct {
    vf keep1, add1, keep2, add2, rate, inverse_root, small;
} adam_factors;

/* One vector of the update. */
PLLM_INLINE void adam_vector(const adam_factors *f, float *param, const float *grad, float *mean,
                             float *variance)
{
    vf g = vf_load(grad);
    vf m = vf_fma(f->keep1, vf_load(mean), vf_mul(f->add1, g));
    vf v = vf_fma(f->keep2, vf_load(variance), vf_mul(f->add2, vf_mul(g, g)));
    vf root = vf_fma(vf_sqrt(v), f->inverse_root, f->small);
    vf_store(mean, m);
    vf_store(variance, v);
    vf_store(param, vf_sub(vf_load(param), vf_div(vf_mul(f->rate, m), root)));
}

void PLLM_SYM(pllm_adam)(float *param, const float *grad, float *mean, float *variance, ptrdiff_t n,
                         int64_t step, double lr, double beta1, double beta2, double eps, int threads)
{
    const double rate = lr / (1.0 - pow(beta1, (double)step));
    const double inverse_root = 1.0 / sqrt(1.0 - pow(beta2, (double)step));
    const adam_factors f = {
        .keep1 = vf_set1((float)beta1), .add1 = vf_set1((float)(1.0 - beta1)),
        .keep2 = vf_set1((float)beta2), .add2 = vf_set1((float)(1.0 - beta2)),
        .rate = vf_set1((float)rate), .inverse_root = vf_set1((float)inverse_root),
        .small = vf_set1((float)eps)};
    const ptrdiff_t whole = n / VF_WIDTH * VF_WIDTH, left = n - whole;
#pragma omp parallel for num_threads(threads) schedule(static) if (n > ADAM_PARALLEL)
    for (ptrdiff_t i = 0; i < whole; i += VF_WIDTH)
        adam_vector(&f, param + i, grad + i, mean + i, variance + i);
    float tail[4][VF_WIDTH] = {{0.0f}};
    float *const from[4] = {param + whole, NULL, mean + whole, variance + whole};
    for (ptrdiff_t i = 0; i < left; i++) {
        tail[0][i] = from[0][i];
        tail[1][i] = grad[whole + i];
        tail[2][i] = from[2][i];
        tail[3][i] = from[3][i];
    }
    adam_vector(&f, tail[0], tail[1], tail[2], tail[3]);
    for (ptrdiff_t i = 0; i < left; i++) {
        from[0][i] = tail[0][i];
        from[2][i] = tail[2][i];
        from[3][i] = tail[3][i];
    }
}

/* total[index[i]] += w value of channel c, w as in pllm_cluster_sums; x NULL: of w alone. */
static void channel_sums(const float *x, ptrdiff_t n, int d, int c, const int32_t *index, int k,
                         const float *weight, int weight_channels, double *total)
{
    memset(total, 0, (size_t)k * sizeof *total);
    const ptrdiff_t stride = weight_channels, at = weight_channels > 1 ? c : 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        double w = weight_channels ? (double)weight[i * stride + at] : 1.0;
        total[index[i]] += x ? w * (double)x[i * d + c] : w;
    }
}

void PLLM_SYM(pllm_cluster_sums)(const float *x, ptrdiff_t n, int d, const int32_t *index, int k,
                                 const float *weight, int weight_channels, double *sum,
                                 double *mass, int threads)
{
    const int masses = weight_channels > 1 ? d : 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int job = 0; job < d + masses; job++) {
        if (job < d)
            channel_sums(x, n, d, job, index, k, weight, weight_channels, sum + (ptrdiff_t)job * k);
        else
            channel_sums(NULL, n, d, job - d, index, k, weight, weight_channels,
                         mass + (ptrdiff_t)(job - d) * k);
    }
}
