/* coder.h - encoder and decoder on one unit of sub-vectors; shared by mlp.c and train.c.
 *
 * A unit is what one thread works on at a time: a whole row for PLLM_NORM_RLN (its statistics run
 * over the row), CODER_UNIT sub-vectors otherwise. Inside a unit the sub-vectors lie in blocks of
 * 16, channel by channel: value c of sub-vector 16 b + lane is at [(b * channels + c) * 16 + lane].
 * Lanes behind the last sub-vector of a unit start as zeros and get gradient zero.
 *
 * Sums over sub-vectors (gradients, row statistics) are kept per lane and added up in the order of
 * vf16_sum, so they are the same on every instruction set.
 */
#ifndef PLLM_CODER_H
#define PLLM_CODER_H

#include "kernel.h"

enum {
    CODER_LANES = 16,
    CODER_UNIT = 256, /* sub-vectors of a unit when no statistics span them; a multiple of 16 */
    CODER_CHUNKS = 32 /* at most this many partial sums of a gradient */
};

/* What the backward pass needs of one MLP: its input (d), gelu of the hidden layer (h) and the
 * slope of gelu (h), each for every block. */
typedef struct {
    float *in, *active, *slope;
} mlp_tape;

/* What the backward pass needs of an encoder or decoder. mlp[1] and mlp[2] are the residual ones.
 * output: N of the last residual state (the latents of an encoder, mlp[0].in of a decoder).
 * inverse: 1 / standard deviation of the three norms, 16 floats a block. */
typedef struct {
    mlp_tape mlp[3];
    float *output;
    float *inverse[3];
} coder_tape;

/* Sizes of a pass: d, h, norm, and how n sub-vectors are cut into units and chunks of units. */
typedef struct {
    int d, h, norm;
    ptrdiff_t count;           /* sub-vectors in all */
    ptrdiff_t unit;            /* sub-vectors of a unit; the last may be shorter */
    ptrdiff_t units, blocks;   /* blocks: of the longest unit */
    ptrdiff_t chunks, units_per_chunk;
    ptrdiff_t mlp_floats;      /* parameters of one MLP */
} coder_plan;

/* What a unit is computed in: d a block each. */
typedef struct {
    float *state, *grad, *spare;
} coder_scratch;

coder_plan PLLM_SYM(coder_plan_of)(int d, int h, int norm, ptrdiff_t count, ptrdiff_t row_count);

/* Floats of a tape and of a scratch; the *_place functions hand out the memory and return its end. */
size_t PLLM_SYM(coder_tape_floats)(const coder_plan *plan);
size_t PLLM_SYM(coder_scratch_floats)(const coder_plan *plan);
float *PLLM_SYM(coder_tape_place)(const coder_plan *plan, int decoder, float *memory,
                                  coder_tape *tape);
float *PLLM_SYM(coder_scratch_place)(const coder_plan *plan, float *memory, coder_scratch *scratch);

/* (count, d) row-major to blocks, zeros behind, and back. */
void PLLM_SYM(coder_load)(const float *rows, ptrdiff_t count, int d, float *blocks);
void PLLM_SYM(coder_store)(const float *blocks, ptrdiff_t count, int d, float *rows);

/* N over a unit of `count` sub-vectors: out may not alias in. */
void PLLM_SYM(coder_norm)(int norm, int d, ptrdiff_t count, const float *in, float *out,
                          float *inverse);
/* Turns the gradient of N's output into the gradient of its input, in place. out: N's output. */
void PLLM_SYM(coder_norm_backward)(int norm, int d, ptrdiff_t count, const float *out,
                                   const float *inverse, float *grad);

/* out = mlp(tape->in); fills tape->active and, when `train`, tape->slope. */
void PLLM_SYM(coder_mlp)(int d, int h, ptrdiff_t blocks, const float *params, const mlp_tape *tape,
                         int train, float *out);
/* Adds the parameters' gradients to lane_grad (16 floats a parameter); grad_in gets the gradient of
 * the input. tape->slope becomes the gradient of the hidden layer before gelu. */
void PLLM_SYM(coder_mlp_backward)(int d, int h, ptrdiff_t blocks, const float *params,
                                  const mlp_tape *tape, const float *grad_out, float *lane_grad,
                                  float *grad_in);

/* Encoder: tape->mlp[0].in -> tape->output.  Decoder: scratch->state -> out. */
void PLLM_SYM(coder_encode)(const coder_plan *plan, ptrdiff_t count, const float *params,
                            const coder_tape *tape, int train, const coder_scratch *scratch);
void PLLM_SYM(coder_decode)(const coder_plan *plan, ptrdiff_t count, const float *params,
                            const coder_tape *tape, int train, const coder_scratch *scratch,
                            float *out);
/* scratch->grad: gradient of the output on entry, of the input on return. The encoder's is only
 * computed when want_input.  lane_grad: 3 MLPs, 16 floats a parameter, added to. */
void PLLM_SYM(coder_encode_backward)(const coder_plan *plan, ptrdiff_t count, const float *params,
                                     const coder_tape *tape, const coder_scratch *scratch,
                                     int want_input, float *lane_grad);
void PLLM_SYM(coder_decode_backward)(const coder_plan *plan, ptrdiff_t count, const float *params,
                                     const coder_tape *tape, const coder_scratch *scratch,
                                     float *lane_grad);

/* partial[i] = sum of the 16 lanes of parameter i. */
void PLLM_SYM(coder_sum_lanes)(const float *lane_grad, ptrdiff_t params, float *partial);
/* grad[i] = sum over chunks of partial[chunk * params + i], in order, in double. */
void PLLM_SYM(coder_sum_chunks)(const float *partial, ptrdiff_t chunks, ptrdiff_t params,
                                float *grad);

#endif
