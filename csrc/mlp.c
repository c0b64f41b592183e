/* mlp.c - RLN, the MLP, encoder and decoder with their gradients, on whole arrays. */
#include "coder.h"

#include <omp.h>

/* ---- RLN: a row is a unit of one-channel sub-vectors ------------------------------------------ */

static int rln_rows(const float *x, const float *grad, ptrdiff_t row_count, ptrdiff_t length,
                    float *out, int threads)
{
    if (row_count == 0 || length == 0)
        return PLLM_OK;
    ptrdiff_t padded = (length + CODER_LANES - 1) / CODER_LANES * CODER_LANES;
    size_t floats = 2 * (size_t)padded + CODER_LANES;
    float *memory = pllm_alloc_floats((size_t)threads * floats);
    if (!memory)
        return PLLM_ENOMEM;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (ptrdiff_t r = 0; r < row_count; r++) {
        float *in = memory + (size_t)omp_get_thread_num() * floats;
        float *unit = in + padded, *inverse = unit + padded;
        PLLM_SYM(coder_load)(x + r * length, length, 1, in);
        PLLM_SYM(coder_norm)(PLLM_NORM_RLN, 1, length, in, unit, inverse);
        if (grad) {
            PLLM_SYM(coder_load)(grad + r * length, length, 1, in);
            PLLM_SYM(coder_norm_backward)(PLLM_NORM_RLN, 1, length, unit, inverse, in);
        }
        PLLM_SYM(coder_store)(grad ? in : unit, length, 1, out + r * length);
    }
    free(memory);
    return PLLM_OK;
}

int PLLM_SYM(pllm_rln)(const float *x, ptrdiff_t row_count, ptrdiff_t length, float *out, int threads)
{
    return rln_rows(x, NULL, row_count, length, out, threads);
}

int PLLM_SYM(pllm_rln_backward)(const float *x, const float *grad, ptrdiff_t row_count,
                                ptrdiff_t length, float *grad_x, int threads)
{
    return rln_rows(x, grad, row_count, length, grad_x, threads);
}

/* ---- one pass over all units ------------------------------------------------------------------ */

enum pass_kind { PASS_MLP, PASS_ENCODE, PASS_DECODE };

/* A forward pass (grad NULL: in -> out) or a backward one (out: gradient of in, grad_params). */
typedef struct {
    enum pass_kind kind;
    coder_plan plan;
    ptrdiff_t params_count;
    const float *in, *params, *grad;
    float *out, *grad_params;
} pass;

/* Memory of one thread. lane_grad: 16 floats a parameter. */
typedef struct {
    coder_tape tape;
    coder_scratch scratch;
    float *lane_grad;
} pass_memory;

static size_t pass_floats(const pass *p)
{
    size_t floats = PLLM_SYM(coder_tape_floats)(&p->plan) + PLLM_SYM(coder_scratch_floats)(&p->plan);
    return floats + (p->grad ? (size_t)p->params_count * CODER_LANES : 0);
}

static pass_memory pass_place(const pass *p, float *memory)
{
    pass_memory m;
    memory = PLLM_SYM(coder_tape_place)(&p->plan, p->kind == PASS_DECODE, memory, &m.tape);
    m.lane_grad = PLLM_SYM(coder_scratch_place)(&p->plan, memory, &m.scratch);
    return m;
}

/* Runs the unit forward and returns the blocks of its output. */
static const float *unit_forward(const pass *p, const pass_memory *m, ptrdiff_t first, ptrdiff_t count)
{
    const coder_plan *plan = &p->plan;
    const coder_scratch *s = &m->scratch;
    float *in = p->kind == PASS_DECODE ? s->state : m->tape.mlp[0].in;
    PLLM_SYM(coder_load)(p->in + first * plan->d, count, plan->d, in);
    if (p->kind == PASS_MLP) {
        PLLM_SYM(coder_mlp)(plan->d, plan->h, (count + CODER_LANES - 1) / CODER_LANES, p->params,
                            &m->tape.mlp[0], p->grad != NULL, s->state);
        return s->state;
    }
    if (p->kind == PASS_ENCODE) {
        PLLM_SYM(coder_encode)(plan, count, p->params, &m->tape, p->grad != NULL, s);
        return m->tape.output;
    }
    PLLM_SYM(coder_decode)(plan, count, p->params, &m->tape, p->grad != NULL, s, s->spare);
    return s->spare;
}

/* Runs the unit backward and returns the blocks of its input's gradient. */
static const float *unit_backward(const pass *p, const pass_memory *m, ptrdiff_t first, ptrdiff_t count)
{
    const coder_plan *plan = &p->plan;
    const coder_scratch *s = &m->scratch;
    PLLM_SYM(coder_load)(p->grad + first * plan->d, count, plan->d, s->grad);
    if (p->kind == PASS_MLP) {
        PLLM_SYM(coder_mlp_backward)(plan->d, plan->h, (count + CODER_LANES - 1) / CODER_LANES,
                                     p->params, &m->tape.mlp[0], s->grad, m->lane_grad,
                                     s->spare);
        return s->spare;
    }
    if (p->kind == PASS_ENCODE)
        PLLM_SYM(coder_encode_backward)(plan, count, p->params, &m->tape, s, 1, m->lane_grad);
    else
        PLLM_SYM(coder_decode_backward)(plan, count, p->params, &m->tape, s, m->lane_grad);
    return s->grad;
}

static void run_chunk(const pass *p, const pass_memory *m, ptrdiff_t chunk, float *partial)
{
    const coder_plan *plan = &p->plan;
    ptrdiff_t unit = chunk * plan->units_per_chunk, end = unit + plan->units_per_chunk;
    if (p->grad)
        memset(m->lane_grad, 0, (size_t)p->params_count * CODER_LANES * sizeof *m->lane_grad);
    for (; unit < end && unit < plan->units; unit++) {
        ptrdiff_t first = unit * plan->unit;
        ptrdiff_t count = plan->count - first < plan->unit ? plan->count - first : plan->unit;
        const float *result = unit_forward(p, m, first, count);
        if (p->grad)
            result = unit_backward(p, m, first, count);
        PLLM_SYM(coder_store)(result, count, plan->d, p->out + first * plan->d);
    }
    if (p->grad)
        PLLM_SYM(coder_sum_lanes)(m->lane_grad, p->params_count, partial + chunk * p->params_count);
}

static int run_pass(const pass *p, int threads)
{
    size_t floats = pass_floats(p), partials = 0;
    if (p->grad)
        partials = (size_t)(p->plan.chunks * p->params_count);
    float *memory = pllm_alloc_floats((size_t)threads * floats + partials);
    if (!memory)
        return PLLM_ENOMEM;
    float *partial = memory + (size_t)threads * floats;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (ptrdiff_t chunk = 0; chunk < p->plan.chunks; chunk++) {
        pass_memory m = pass_place(p, memory + (size_t)omp_get_thread_num() * floats);
        run_chunk(p, &m, chunk, partial);
    }
    if (p->grad)
        PLLM_SYM(coder_sum_chunks)(partial, p->plan.chunks, p->params_count, p->grad_params);
    free(memory);
    return PLLM_OK;
}

static pass coder_pass(enum pass_kind kind, const pllm_coder *coder, const float *rows,
                       ptrdiff_t row_count, ptrdiff_t length, const float *params, float *out)
{
    ptrdiff_t count = row_count * (length / coder->d);
    pass p = {.kind = kind, .in = rows, .params = params, .out = out};
    p.plan = PLLM_SYM(coder_plan_of)(coder->d, coder->h, coder->norm, count, row_count);
    p.params_count = (kind == PASS_MLP ? 1 : 3) * p.plan.mlp_floats;
    return p;
}

int PLLM_SYM(pllm_mlp)(const float *x, ptrdiff_t n, int d, int h, const float *params, float *out,
                       int threads)
{
    const pllm_coder coder = {d, h, PLLM_NORM_INPUT};
    pass p = coder_pass(PASS_MLP, &coder, x, n, d, params, out);
    return run_pass(&p, threads);
}

int PLLM_SYM(pllm_mlp_backward)(const float *x, ptrdiff_t n, int d, int h, const float *params,
                                const float *grad, float *grad_x, float *grad_params, int threads)
{
    const pllm_coder coder = {d, h, PLLM_NORM_INPUT};
    pass p = coder_pass(PASS_MLP, &coder, x, n, d, params, grad_x);
    p.grad = grad;
    p.grad_params = grad_params;
    return run_pass(&p, threads);
}

int PLLM_SYM(pllm_encode)(const pllm_coder *coder, const float *rows, ptrdiff_t row_count,
                          ptrdiff_t length, const float *params, float *out, int threads)
{
    pass p = coder_pass(PASS_ENCODE, coder, rows, row_count, length, params, out);
    return run_pass(&p, threads);
}

int PLLM_SYM(pllm_decode)(const pllm_coder *coder, const float *rows, ptrdiff_t row_count,
                          ptrdiff_t length, const float *params, float *out, int threads)
{
    pass p = coder_pass(PASS_DECODE, coder, rows, row_count, length, params, out);
    return run_pass(&p, threads);
}

int PLLM_SYM(pllm_encode_backward)(const pllm_coder *coder, const float *rows, ptrdiff_t row_count,
                                   ptrdiff_t length, const float *params, const float *grad,
                                   float *grad_rows, float *grad_params, int threads)
{
    pass p = coder_pass(PASS_ENCODE, coder, rows, row_count, length, params, grad_rows);
    p.grad = grad;
    p.grad_params = grad_params;
    return run_pass(&p, threads);
}

int PLLM_SYM(pllm_decode_backward)(const pllm_coder *coder, const float *rows, ptrdiff_t row_count,
                                   ptrdiff_t length, const float *params, const float *grad,
                                   float *grad_rows, float *grad_params, int threads)
{
    pass p = coder_pass(PASS_DECODE, coder, rows, row_count, length, params, grad_rows);
    p.grad = grad;
    p.grad_params = grad_params;
    return run_pass(&p, threads);
}
