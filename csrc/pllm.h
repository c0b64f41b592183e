/* pllm.h - the whole C API of pocketllm's kernels. No Python in here.
 *
 * How it fits together: every kernel body (search.c, pack.c, ...) is compiled once per instruction
 * set; isa_table.c collects the functions of one instruction set in a pllm_kernels table; cpu.c
 * finds out what the processor and the operating system can run and picks a table, once, visibly.
 *
 * To add a kernel: declare its type `pllm_<name>_fn` with its contract in the section of its
 * family below, name it in the family's list, and define `PLLM_SYM(pllm_<name>)` in the body.
 *
 * Conventions: matrices are row-major and dense; sizes are ptrdiff_t or int and never negative;
 * pointers of empty arrays may be NULL; nothing aliases unless a contract says so; `threads` >= 1 is
 * the number of OpenMP threads to use, and no result depends on it, nor on the instruction set.
 * Arguments are checked by the caller (module_*.c): kernels only assert.
 */
#ifndef PLLM_H
#define PLLM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What kernels that can fail return. */
enum pllm_status {
    PLLM_OK = 0,
    PLLM_ENOMEM = 1, /* scratch memory could not be allocated; outputs are undefined */
    PLLM_ERANGE = 2  /* an input value is outside what the contract allows; outputs are undefined */
};

enum { PLLM_MAX_THREADS = 1024 };

/* ---- search (search.c) ----------------------------------------------------------------------- */

enum {
    PLLM_MAX_SUBVECTOR = 16,    /* d is 1..16 */
    PLLM_MAX_CODEWORDS = 65536, /* K is 1..65536 */
    PLLM_CODEBOOK_BLOCK = 32,   /* codewords per block of a prepared codebook */
    PLLM_SEARCH_QUERIES = 512   /* queries per pass over a prepared codebook */
};

/* A codebook laid out for the search. Fill it with codebook_prepare or codebook_prepare_score; it
 * borrows every pointer, so nothing has to be released.
 * blocks: (ceil(k / 32), d + 1, 32) f32. Of one codeword: its offset, then its negated, weighted
 * coordinates. The score of codeword i for a query x is the fused chain
 *     s = offset[i];  s = fma(x[0], -w[0] c[i][0], s);  ...;  s = fma(x[d-1], -w[d-1] c[i][d-1], s)
 * in this order on every instruction set, so that equal inputs give equal bits. */
typedef struct {
    int d;
    int k;
    const float *codebook; /* (k, d) */
    const float *weight;   /* (d) or NULL = all ones */
    const float *bias;     /* (k) or NULL = all zeros */
    float *blocks;
} pllm_codebook;

/* Number of floats `blocks` must hold for k codewords of length d. */
static inline size_t pllm_codebook_floats(int k, int d)
{
    size_t blocks = ((size_t)k + PLLM_CODEBOOK_BLOCK - 1) / PLLM_CODEBOOK_BLOCK;
    return blocks * PLLM_CODEBOOK_BLOCK * ((size_t)d + 1);
}

/* Number of floats of scratch that one call of search_slice needs (each thread its own). */
static inline size_t pllm_search_scratch_floats(int d)
{
    return PLLM_SEARCH_QUERIES * ((size_t)d + 2);
}

/* Prepares cb so that the smallest score is the smallest sum_j w[j] (z[j] - c[j])^2 + bias.
 * codebook: (k, d).  weight: (d) or NULL.  bias: (k) or NULL.  blocks: pllm_codebook_floats(k, d). */
typedef void pllm_codebook_prepare_fn(pllm_codebook *cb, const float *codebook, int k, int d,
                                      const float *weight, const float *bias, float *blocks);

/* Prepares cb so that the smallest score is the smallest offset[i] - sum_j x[j] codebook[i][j]:
 * for metrics that are not diagonal (x = H z, offset[i] = c_i' H c_i / 2). search_slice must then be
 * called without `error`.  codebook: (k, d).  offset: (k). */
typedef void pllm_codebook_prepare_score_fn(pllm_codebook *cb, const float *codebook, int k, int d,
                                            const float *offset, float *blocks);

/* index[i] = codeword of the smallest score for z[i]; lowest index on ties. One thread, allocates
 * nothing: made to be called from inside a parallel loop on a slice of the queries.
 * A query for which no score is a number below +inf (NaN or Inf in it) gets some index in 0..k-1.
 * z: (n, d).  index: (n).  error: (n) or NULL, gets sum_j w (z - c)^2 + bias computed from the
 * difference, j ascending.  scratch: pllm_search_scratch_floats(d). */
typedef void pllm_search_slice_fn(const pllm_codebook *cb, const float *z, ptrdiff_t n,
                                  int32_t *index, float *error, float *scratch);

/* index[i] = nearest codeword to z[i] by weighted L2 plus bias; lowest index on ties; NaN and Inf as
 * in search_slice. Scores are float32, so two codewords whose distances differ by less than the
 * rounding of |z| |c| count as tied or may swap.
 * z: (n, d).  codebook: (k, d).  weight: (d) or NULL.  bias: (k) or NULL.  index: (n).
 * error: (n) or NULL, as in search_slice.  Returns PLLM_OK or PLLM_ENOMEM. */
typedef int pllm_nearest_fn(const float *z, ptrdiff_t n, const float *codebook, int k, int d,
                            const float *weight, const float *bias, int32_t *index, float *error,
                            int threads);

/* A codebook made ready for many searches: a tree that finds the same index as the scan over all
 * codewords while looking at few of them (tree.h). Depends on the instruction set: a tree is searched by
 * the kernels that built it. */
typedef struct pllm_tree pllm_tree;

/* *tree = a new tree of this codebook, which it copies; release it with free(). NULL on failure.
 * codebook: (k, d).  weight: (d) or NULL.  bias: (k) or NULL.  queries: about how many will be searched
 * for, in all: the more, the longer the tree takes to build and the faster it is.
 * Returns PLLM_OK or PLLM_ENOMEM. */
typedef int pllm_tree_build_fn(pllm_tree **tree, const float *codebook, int k, int d,
                               const float *weight, const float *bias, ptrdiff_t queries, int threads);

/* What nearest gives for the tree's codebook, bit for bit.
 * previous: (n) or NULL, a guess of each index, each 0..k-1: the closer, the faster; may be `index`.
 * z: (n, d).  index: (n).  error: (n) or NULL.  Returns PLLM_OK or PLLM_ENOMEM. */
typedef int pllm_tree_search_fn(const pllm_tree *tree, const float *z, ptrdiff_t n,
                                const int32_t *previous, int32_t *index, float *error, int threads);

#define PLLM_SEARCH_KERNELS(X) \
    X(codebook_prepare) X(codebook_prepare_score) X(search_slice) X(nearest) X(tree_build) \
    X(tree_search)

/* ---- pack (pack.c) --------------------------------------------------------------------------- */

enum { PLLM_MAX_BITS = 16 };

/* Bytes of one packed row of `count` indices of `bits` bits: rows are padded to whole bytes. */
static inline ptrdiff_t pllm_row_stride_bytes(ptrdiff_t count, int bits)
{
    return (count * bits + 7) / 8;
}

/* Packs each row of indices as a bit stream: index i of a row takes the bits i*bits .. (i+1)*bits - 1,
 * bit n of a row is bit n % 8 of its byte n / 8; the bits behind the last index are zero.
 * index: (rows, count), each 0 .. 2^bits - 1.  bits: 1..16.
 * packed: (rows, pllm_row_stride_bytes(count, bits)).
 * Returns PLLM_OK, or PLLM_ERANGE when an index does not fit. */
typedef int pllm_pack_fn(const int32_t *index, ptrdiff_t rows, ptrdiff_t count, int bits,
                         uint8_t *packed, int threads);

/* The inverse of pack, for any bytes; the bits behind the last index of a row are ignored. */
typedef void pllm_unpack_fn(const uint8_t *packed, ptrdiff_t rows, ptrdiff_t count, int bits,
                            int32_t *index, int threads);

/* The largest index in a packed payload, without unpacking it; -1 when it holds none. */
typedef int32_t pllm_index_max_fn(const uint8_t *packed, ptrdiff_t rows, ptrdiff_t count, int bits,
                                  int threads);

#define PLLM_PACK_KERNELS(X) X(pack) X(unpack) X(index_max)

/* ---- trellis codes (trellis.h, trellis.c; arXiv 2406.11235, Marcellin and Fischer 1990) -------- */

/* A weight has k bits, the first of which, b, enters a shift register that runs down the column. Its window holds the
 * b of the weight's own row (bit 0) and of the PLLM_TRELLIS_MEMORY rows before it (bit 1, 2, ...). Three bits of the
 * level's index are parities of the window under pllm_trellis_taps, the others are the weight's further bits:
 *     index = parity(taps[0] & window) + 2 parity(taps[1] & window) + 4 parity(taps[2] & window) + 8 (further bits).
 * Its top bit t is a sign. Of the 2^(k+1) magnitudes of k bits, which start at pllm_trellis_magnitudes(k), the rest
 * of the index, r, means magnitude[r], and with t set -magnitude[2^(k+1) - 1 - r].
 * Columns stand in blocks of PLLM_TRELLIS_BLOCK with the same k, which never rises from one block to the next; the
 * last block may be shorter. Blocks with k = 0 have no bits and are zero. */
enum {
    PLLM_TRELLIS_BITS = 6,   /* the most of a weight */
    PLLM_TRELLIS_MEMORY = 8, /* rows whose first bits count beside a row's own */
    PLLM_TRELLIS_CODED = 3,  /* bits of an index that are parities */
    PLLM_TRELLIS_BLOCK = 128,
    PLLM_TRELLIS_SEGMENT = 256, /* rows of a segment; the last has those left over, too */
    PLLM_TRELLIS_SHORT = 16,    /* segments of fewer rows start with zeros in the register, others with their end */
    PLLM_TRELLIS_TABLE = 252,   /* magnitudes of 1 to PLLM_TRELLIS_BITS bits together */
    PLLM_TRELLIS_SMALLS = 12,   /* of which the first, those of 1 and 2 bits, are at most */
    PLLM_TRELLIS_SMALL = 63     /* so that a product of two of them, raised, and bytes fits int16 */
};
#define PLLM_TRELLIS_TAPS {0x98, 0x56, 0x1b1}

/* Where the magnitudes of k bits, 1 or more, start in a table of all. */
static inline int pllm_trellis_magnitudes(int k) { return (4 << (k - 1)) - 4; }

/* How a matrix is coded; all pointers are borrowed. */
typedef struct {
    const uint8_t *block_bits; /* (ceil(in / PLLM_TRELLIS_BLOCK)) k of each block, 0..6, never rising */
    int extra;                 /* row r has a bit more where (r + 1) extra / 4 is above r extra / 4, rounded down: 0..3 */
    const int8_t *magnitude;   /* (PLLM_TRELLIS_TABLE), none negative; the first no larger than PLLM_TRELLIS_SMALL */
    const int32_t *order;      /* (in) the column of W that stands i-th, or NULL: they stand in order */
    const float *factor;       /* (in) what values of the i-th are multiplied by, or NULL: 1 */
} pllm_trellis;

/* Rows before row r that have a bit more. */
static inline ptrdiff_t pllm_trellis_richer(const pllm_trellis *t, ptrdiff_t r) { return r * t->extra / 4; }

/* Whether row r has a bit more. */
static inline int pllm_trellis_more(const pllm_trellis *t, ptrdiff_t r)
{
    return (int)(pllm_trellis_richer(t, r + 1) - pllm_trellis_richer(t, r));
}

/* The bytes of plane p of a row: the p-th bits of its first columns, those that have one; more: the row has a bit
 * more. A plane has bit c of a row at bit c mod 8 of byte c / 8 and fills whole bytes. */
static inline ptrdiff_t pllm_trellis_plane_bytes(const pllm_trellis *t, ptrdiff_t in_features, int more, int p)
{
    ptrdiff_t columns = 0;
    for (ptrdiff_t b = 0; columns < in_features && t->block_bits[b] + (t->block_bits[b] ? more : 0) > p; b++)
        columns += PLLM_TRELLIS_BLOCK;
    return ((columns < in_features ? columns : in_features) + 7) / 8;
}

/* Of a row: its planes, one after the other. */
static inline ptrdiff_t pllm_trellis_row_bytes(const pllm_trellis *t, ptrdiff_t in_features, int more)
{
    ptrdiff_t bytes = 0;
    for (int p = 0; p < PLLM_TRELLIS_BITS; p++)
        bytes += pllm_trellis_plane_bytes(t, in_features, more, p);
    return bytes;
}

/* Of the rows before row r, one after the other. */
static inline ptrdiff_t pllm_trellis_offset(const pllm_trellis *t, ptrdiff_t in_features, ptrdiff_t r)
{
    const ptrdiff_t few = pllm_trellis_row_bytes(t, in_features, 0), more = pllm_trellis_row_bytes(t, in_features, 1);
    return r * few + pllm_trellis_richer(t, r) * (more - few);
}

/* Segments that `rows` rows are cut into; segment s starts with row s PLLM_TRELLIS_SEGMENT. */
static inline ptrdiff_t pllm_trellis_segments(ptrdiff_t rows)
{
    return rows < PLLM_TRELLIS_SEGMENT ? rows > 0 : rows / PLLM_TRELLIS_SEGMENT;
}

/* Chooses the bits of every weight, column by column, every error made fed into the columns behind it:
 *     q[r, c] = (x[r, c] + sum over m < c of (x[r, m] - v[r, m]) feedback[m, c]) / factor[c],
 * the sum a chain of fused multiply-adds that starts at zero, m ascending; v[r, c] = factor[c] level is what the bits
 * stand for. The bits of a segment of a column are those of the least sum over its rows of
 *     weight[r] (q[r, c] - level)^2
 * among all that start and end with one register: that which the best way through the segment's last and then its
 * first PLLM_TRELLIS_OVERLAP rows, or half the segment, whichever is less, has between the two. Segments of fewer than
 * PLLM_TRELLIS_SHORT rows start with zeros in the register and end with any.
 * Every step is rounded to float32, and the sum runs down the column; a term that is no number counts as infinite. Of
 * two paths of the same cost that meet, the one from the lower register wins, of ends of the same cost the lowest
 * register, and of levels with the same parities and square the one with the lowest further bits.
 * x: (rows, columns); where it is not finite, some bits are chosen.  weight: (rows), none negative.
 * feedback: (columns, columns), read above its diagonal, or NULL: none is fed.
 * bits: (columns) k of each, in any order: 0..6, with extra 0..5; 0: v and the symbols are 0.
 * extra: as in pllm_trellis.
 * factor: (columns), positive.  level: (PLLM_TRELLIS_TABLE) magnitudes as floats.  Both, and weight, are finite.
 * symbol: (rows, columns): b and the further bits of each weight, b lowest.  Returns PLLM_OK or PLLM_ENOMEM. */
typedef int pllm_encode_trellis_fn(const float *x, ptrdiff_t rows, ptrdiff_t columns, const float *weight,
                                   const float *feedback, const uint8_t *bits, int extra, const float *factor,
                                   const float *level, uint8_t *symbol, int threads);
enum { PLLM_TRELLIS_OVERLAP = 48 };

#define PLLM_TRELLIS_KERNELS(X) X(encode_trellis)

/* ---- inference (infer.c, bfloat16.c) ---------------------------------------------------------- */

/* What turns an index into d values: table[index], or the decoder applied to a row of codewords. */
typedef struct {
    int d, k;
    int index_bits;    /* 1..16; an index of k or more (damaged payload) is read as k - 1 */
    int table_is_int8; /* then a value is table[i] * table_scale, else table[i] */
    float table_scale;
    const void *table;    /* (k, d) f32 or int8; the codebook when there is a decoder */
    const float *decoder; /* flat decoder parameters, NULL when the table is already decoded */
    int hidden, norm;     /* of the decoder */
    const pllm_trellis *trellis; /* or NULL; with it d is 1, table_scale 1, and the rest is not used */
} pllm_codec;

/* A compressed matrix: W[r, l d + j] = scale[r] * value(index[r, l])[j] + shift[r].
 * packed: per row ceil(in_features / d) indices of index_bits bits, lowest bit first, each row filled
 * up to whole bytes.  scale: (out_features).  shift: (out_features) or NULL. */
typedef struct {
    const pllm_codec *codec;
    const uint8_t *packed;
    ptrdiff_t out_features, in_features;
    const float *scale, *shift;
} pllm_matrix;

/* rows (n, in_features) = W's rows row_index[0..n-1], or first_row.. when row_index is NULL.
 * Computed as (value * table_scale) * scale + shift, each step rounded to float32.
 * row_index: (n), each within out_features.  Returns PLLM_OK or PLLM_ENOMEM. */
typedef int pllm_decode_rows_fn(const pllm_matrix *w, ptrdiff_t first_row, const int64_t *row_index,
                                ptrdiff_t n, float *rows, int threads);

/* In what form activations meet the table. */
enum pllm_activations {
    PLLM_ACTIVATIONS_FLOAT32 = 0,
    PLLM_ACTIVATIONS_INTEGER = 1 /* with int8 tables; with others and with decoders float32 is used */
};

/* What activations and products are stored as. */
enum pllm_number { PLLM_FLOAT32 = 0, PLLM_BFLOAT16 = 1 };

/* y (n, out_features) = x (n, in_features) W' + bias, without ever holding W. x and y: float32 or bfloat16, which
 * is rounded from float32 to nearest, ties to even.
 * Float32: products are accumulated in float32; the error is below in_features * 2^-24 * (|x| |W|')
 * and usually near its square root.
 * Int16: each token is cut into spans of at most 512 columns; a span is rounded to multiples of an
 * 8191st of its largest magnitude and its products are summed exactly. An activation thereby moves by
 * at most 2^-13.9 of that magnitude, and one below 2^-100 may count as 0. A token with NaN or Inf in
 * it gives NaN.
 * bias: (out_features) or NULL.  Returns PLLM_OK or PLLM_ENOMEM. */
typedef int pllm_matmul_fn(const pllm_matrix *w, const void *x, ptrdiff_t n, const float *bias, void *y,
                           enum pllm_number number, enum pllm_activations activations, int threads);

/* out[i] = the float32 that the bfloat16 x[i] is. */
typedef void pllm_widen_fn(const uint16_t *x, ptrdiff_t n, float *out);

/* out[i] = x[i] rounded to bfloat16, ties to even; any NaN becomes 0x7fc0. */
typedef void pllm_narrow_fn(const float *x, ptrdiff_t n, uint16_t *out);

#define PLLM_INFER_KERNELS(X) X(decode_rows) X(matmul) X(widen) X(narrow)

/* ---- one token through a decoder layer (layer.c) ---------------------------------------------- */

enum pllm_layer_part {
    PLLM_LAYER_Q,
    PLLM_LAYER_K,
    PLLM_LAYER_V,
    PLLM_LAYER_O,
    PLLM_LAYER_GATE,
    PLLM_LAYER_UP,
    PLLM_LAYER_DOWN,
    PLLM_LAYER_PARTS
};

/* A layer as in Llama:  x += O attention(Q n0(x), K n0(x), V n0(x));
 *                       x += Down (silu(Gate n1(x)) * Up n1(x)),
 * with n0, n1 root mean square norms, grouped queries and rotary positions.
 * matrix: the seven of enum pllm_layer_part.  bias: of each, or NULL.  norm: (width) each.
 * head_norm: NULL, or the norms (head_width) of every head of queries and of keys before they are turned.
 * head_width: even; divides what Q, K and V give.  scale: of the scores, positive. */
typedef struct {
    pllm_matrix matrix[PLLM_LAYER_PARTS];
    const float *bias[PLLM_LAYER_PARTS];
    const float *norm[2], *head_norm[2];
    ptrdiff_t head_width;
    float epsilon, scale;
} pllm_layer;

/* Keys and values of the tokens so far.
 * keys, values: (kv heads, room, head_width), float32 or bfloat16; the first `length` of `room` are there. */
typedef struct {
    void *keys, *values;
    ptrdiff_t length, room;
    int is_bfloat16;
} pllm_past;

/* The layer's output for the next token, whose keys and values are written behind those of the past.
 * x, y: (width).  cosine, sine: (head_width).  past: length < room.  Returns PLLM_OK or PLLM_ENOMEM. */
typedef int pllm_layer_token_fn(const pllm_layer *layer, const float *x, const float *cosine,
                                const float *sine, const pllm_past *past, float *y,
                                enum pllm_activations activations, int threads);

#define PLLM_LAYER_KERNELS(X) X(layer_token)

/* ---- training (coder.c, mlp.c, train.c) ------------------------------------------------------ */

/* Where N of the codec takes its statistics: the whole row, the sub-vector, or nowhere (identity;
 * the row was normalised before). */
enum pllm_norm { PLLM_NORM_INPUT = 0, PLLM_NORM_LN = 1, PLLM_NORM_RLN = 2 };

enum { PLLM_MAX_HIDDEN = 64 }; /* h is 1..64 */

/* Encoder or decoder: d, h, norm.  An MLP is W2 gelu(W1 x + b1) + b2 with its parameters flat as
 * W1 (h, d), b1 (h), W2 (d, h), b2 (d); a coder has three, mlp0 | mlp1 | mlp2.
 * Below, rows are (row_count, length) f32 with length a multiple of d, and params are the
 * 3 (2 h d + h + d) floats of one coder. */
typedef struct {
    int d, h, norm;
} pllm_coder;

/* out = each row of x (row_count, length) shifted and scaled to mean 0 and variance 1 (biased,
 * eps 1e-5).  Returns PLLM_OK or PLLM_ENOMEM, as all kernels of this section that can fail. */
typedef int pllm_rln_fn(const float *x, ptrdiff_t row_count, ptrdiff_t length, float *out,
                        int threads);
/* grad_x = gradient with respect to x, given grad, that of rln's output. All (row_count, length). */
typedef int pllm_rln_backward_fn(const float *x, const float *grad, ptrdiff_t row_count,
                                 ptrdiff_t length, float *grad_x, int threads);

/* out = MLP of every row of x (n, d).  params: 2 h d + h + d. */
typedef int pllm_mlp_fn(const float *x, ptrdiff_t n, int d, int h, const float *params, float *out,
                        int threads);
/* grad: (n, d), of the output.  grad_x: (n, d).  grad_params: as params. */
typedef int pllm_mlp_backward_fn(const float *x, ptrdiff_t n, int d, int h, const float *params,
                                 const float *grad, float *grad_x, float *grad_params, int threads);

/* Encoder: z = mlp0(x); z += mlp1(N(z)); z += mlp2(N(z)); out = N(z).
 * Decoder: y = x;       y += mlp1(N(y)); y += mlp2(N(y)); out = mlp0(N(y)).   rows, out: alike. */
typedef int pllm_encode_fn(const pllm_coder *coder, const float *rows, ptrdiff_t row_count,
                           ptrdiff_t length, const float *params, float *out, int threads);
typedef pllm_encode_fn pllm_decode_fn;
/* grad: of the output, like rows.  grad_rows: like rows.  grad_params: like params. */
typedef int pllm_encode_backward_fn(const pllm_coder *coder, const float *rows, ptrdiff_t row_count,
                                    ptrdiff_t length, const float *params, const float *grad,
                                    float *grad_rows, float *grad_params, int threads);
typedef pllm_encode_backward_fn pllm_decode_backward_fn;

/* What a training step reads and writes. n = row_count * length / d sub-vectors, k codewords.
 * weight: NULL, or weights of the squared errors: weight_row_stride 0 means one (length) for all
 * rows, otherwise it is length.  index: (n) the codewords chosen.  latents: (n, d).
 * reconstruction = mean of weight (rows - decoded)^2, commitment = mean (latents - codeword)^2; the
 * loss is reconstruction + codebook_loss * commitment. The gradient at the decoder's input passes
 * straight through to the latents; the commitment pulls latents and codewords alike. */
typedef struct {
    pllm_coder coder;
    int k;
    const float *rows, *weight;
    ptrdiff_t row_count, length, weight_row_stride;
    const float *encoder, *codebook, *decoder;
    float codebook_loss;
    int32_t *index;
    float *latents, *grad_encoder, *grad_codebook, *grad_decoder;
    double reconstruction, commitment;
} pllm_step;

typedef int pllm_train_step_fn(pllm_step *step, int threads);

/* One Adam update in place; step counts from 1.  param, grad, mean, variance: (n). */
typedef void pllm_adam_fn(float *param, const float *grad, float *mean, float *variance,
                          ptrdiff_t n, int64_t step, double lr, double beta1, double beta2,
                          double eps, int threads);

/* The sums Lloyd's iteration needs, in order of i, in double and channel by channel:
 * sum[c * k + index[i]] += w x[i * d + c], mass[...] += w, where w is 1 (weight_channels 0),
 * weight[i] (1), or weight[i * d + c] (d); mass is (k) for 0 and 1, (d, k) for d.
 * x: (n, d).  index: (n), each 0..k-1.  sum: (d, k).  Cannot fail. */
typedef void pllm_cluster_sums_fn(const float *x, ptrdiff_t n, int d, const int32_t *index, int k,
                                  const float *weight, int weight_channels, double *sum,
                                  double *mass, int threads);

#define PLLM_TRAIN_KERNELS(X) \
    X(rln) X(rln_backward) X(mlp) X(mlp_backward) X(encode) X(encode_backward) X(decode) \
    X(decode_backward) X(train_step) X(adam) X(cluster_sums)

/* ---- feedback (feedback.c) ------------------------------------------------------------------- */

/* Chooses the sub-vectors of each row one after another, every error made fed into later targets:
 *     q[l] = x[l] + sum over m < l of (x[m] - table[index[m]]) feedback[m, l]
 *     index[l] = the t of the smallest (q[l] - t)' metric[l] (q[l] - t), lowest index on ties,
 * where x[l] are d columns of x and feedback[m, l] is a (d, d) block of it.
 * With `previous`, an earlier choice, all are chosen `sweeps` times, each given the newest choice of all others
 * (q[l] has the sum over m > l as well): from the first to the last, then from the last to the first, and so on.
 * A sum over one side is a chain of fused multiply-adds that starts at zero, with sub-vectors from the end of the row
 * inwards and the columns of each in order; q is x plus the sum over the side still ahead, plus the other.
 * x: (rows, count d).  table: (k, d).  metric: (count, d, d), each symmetric, positive definite.
 * feedback: (count d, count d); diagonal blocks are not read, those below only with previous.
 * previous: (rows, count), each 0..k-1, or NULL.  sweeps: at least 1; 1 without previous.
 * index: (rows, count), may be previous.
 * NaN and Inf as in search_slice.  Returns PLLM_OK or PLLM_ENOMEM. */
typedef int pllm_encode_feedback_fn(const float *x, ptrdiff_t rows, ptrdiff_t count, int d,
                                    const float *table, int k, const float *metric,
                                    const float *feedback, const int32_t *previous, int sweeps,
                                    int32_t *index, int threads);

#define PLLM_FEEDBACK_KERNELS(X) X(encode_feedback)

/* ---- products with rounded factors (rounded.c) ----------------------------------------------- */

/* out (n, m) = x (n, k) w (m, k)'. Both factors are rounded to integers of up to 2895, either sign, with one scale for
 * each 256 values of a row: a value moves by at most a 5790th of the largest of them, and where none of them reaches
 * 2^-114 all are zeros. These products are exact, and their sums over 256 values too; those are added up in float32, in
 * their order.
 * Rows with NaN or Inf in them give NaN, and so may products beyond float32; those below 2^-118 may become zero.
 * Returns PLLM_OK or PLLM_ENOMEM. */
typedef int pllm_rounded_linear_fn(const float *x, ptrdiff_t n, const float *w, ptrdiff_t m, ptrdiff_t k,
                                   float *out, int threads);

/* The rows first..end-1 of out (n, n) += those of x (n, k) x', in the same way, up to the diagonal. */
typedef int pllm_rounded_gram_fn(const float *x, ptrdiff_t n, ptrdiff_t k, ptrdiff_t first, ptrdiff_t end,
                                 float *out, int threads);

#define PLLM_ROUNDED_KERNELS(X) X(rounded_linear) X(rounded_gram)

/* ---- choice of the instruction set (isa_table.c, cpu.c) -------------------------------------- */

#define PLLM_ALL_KERNELS(X) \
    PLLM_SEARCH_KERNELS(X) \
    PLLM_PACK_KERNELS(X) \
    PLLM_TRELLIS_KERNELS(X) \
    PLLM_INFER_KERNELS(X) \
    PLLM_LAYER_KERNELS(X) \
    PLLM_TRAIN_KERNELS(X) \
    PLLM_FEEDBACK_KERNELS(X) \
    PLLM_ROUNDED_KERNELS(X)

/* All kernels of one instruction set. */
typedef struct {
    const char *isa; /* "scalar", "avx2", "avx512", "amx" or "neon" */
    int lanes;       /* floats per vector */
#define PLLM_MEMBER(name) pllm_##name##_fn *name;
    PLLM_ALL_KERNELS(PLLM_MEMBER)
#undef PLLM_MEMBER
} pllm_kernels;

/* Number of instruction sets compiled in, and the i-th of them, best last; NULL when this machine
 * cannot run it. */
int pllm_isa_count(void);
const pllm_kernels *pllm_isa_at(int i);
/* Name of the i-th instruction set, runnable or not. */
const char *pllm_isa_name_at(int i);

/* The table in use. Before pllm_select has been called: the best that this machine runs. */
const pllm_kernels *pllm_active(void);

/* Makes the named instruction set the one in use. Returns 0, or -1 (and changes nothing) when it is
 * unknown or this machine cannot run it. */
int pllm_select(const char *isa);

#ifdef __cplusplus
}
#endif
#endif
