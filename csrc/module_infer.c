/* module_infer.c - Python wrappers of table decode and the fused matrix product. */
#include "module.h"

#include <stdlib.h>
#include <string.h>

/* The arguments that describe a compressed matrix: the C view and the arrays it points into. */
typedef struct {
    pllm_matrix matrix;
    pllm_codec codec;
    pllm_trellis trellis;
    PyArrayObject *packed, *table, *decoder, *scale, *shift;
    PyArrayObject *block_bits, *magnitude, *order, *factor; /* of a trellis */
} matrix_args;

static void release(matrix_args *m)
{
    Py_XDECREF(m->packed);
    Py_XDECREF(m->table);
    Py_XDECREF(m->decoder);
    Py_XDECREF(m->scale);
    Py_XDECREF(m->shift);
    Py_XDECREF(m->block_bits);
    Py_XDECREF(m->magnitude);
    Py_XDECREF(m->order);
    Py_XDECREF(m->factor);
}

/* codec: kernels.CodecView, (subvector, codewords, index_bits, table, table_scale, decoder | None,
 * hidden, norm). Returns 1, or 0 with an exception set. */
static int take_codec(matrix_args *m, PyObject *codec_obj)
{
    PyObject *table_obj, *decoder_obj;
    const char *norm;
    pllm_codec *c = &m->codec;
    if (!PyTuple_Check(codec_obj)) {
        PyErr_SetString(PyExc_TypeError, "codec: want a CodecView");
        return 0;
    }
    if (!PyArg_ParseTuple(codec_obj, "iiiOfOis;codec: want a CodecView", &c->d, &c->k, &c->index_bits,
                          &table_obj, &c->table_scale, &decoder_obj, &c->hidden, &norm))
        return 0;
    c->table_is_int8 =
        PyArray_Check(table_obj) && PyArray_TYPE((PyArrayObject *)table_obj) == NPY_INT8;
    const npy_intp shape[] = {c->k, c->d};
    if (!pllm_in_range("codec.subvector", c->d, 1, PLLM_MAX_SUBVECTOR) ||
        !pllm_in_range("codec.codewords", c->k, 1, PLLM_MAX_CODEWORDS) ||
        !pllm_in_range("codec.index_bits", c->index_bits, 1, 16) ||
        !pllm_take(&m->table, table_obj, "codec.table", c->table_is_int8 ? NPY_INT8 : NPY_FLOAT32, 2,
                   shape, ""))
        return 0;
    c->table = pllm_data(m->table);
    if (decoder_obj == Py_None)
        return 1;

    if (c->table_is_int8) {
        PyErr_SetString(PyExc_TypeError, "codec.table: a codec with a decoder wants a float32 codebook");
        return 0;
    }
    static const char *const norms[] = {"input", "ln", "rln"};
    for (c->norm = 0; c->norm < 3 && strcmp(norm, norms[c->norm]) != 0;)
        c->norm++;
    if (c->norm == 3) {
        PyErr_Format(PyExc_ValueError, "codec.norm: got '%s', want input, ln or rln", norm);
        return 0;
    }
    if (!pllm_in_range("codec.hidden", c->hidden, 1, PLLM_MAX_HIDDEN))
        return 0;
    const npy_intp parameters = 3 * (npy_intp)(2 * c->hidden * c->d + c->hidden + c->d);
    if (!pllm_take(&m->decoder, decoder_obj, "codec.decoder", NPY_FLOAT32, 1, &parameters, ""))
        return 0;
    c->decoder = pllm_data(m->decoder);
    return 1;
}

/* Are all bits in range, never rising? If not, ValueError is set. */
static int bits_are_good(const uint8_t *bits, npy_intp blocks, int extra)
{
    for (npy_intp b = 0; b < blocks; b++)
        if (!pllm_in_range("codec.block_bits: bits of a block", bits[b], 0,
                           b ? bits[b - 1] : PLLM_TRELLIS_BITS - (extra > 0)))
            return 0;
    return 1;
}

/* Does `order` name every column once? Columns that it left out would never be written. If not, an exception is set. */
static int is_permutation(const int32_t *order, npy_intp columns)
{
    uint8_t *const named = calloc((size_t)columns, sizeof *named);
    int good = pllm_succeeded(named ? PLLM_OK : PLLM_ENOMEM);
    for (npy_intp i = 0; good && i < columns; i++) {
        good = pllm_in_range("codec.order: a column", order[i], 0, columns - 1);
        if (good && named[order[i]]++) {
            PyErr_Format(PyExc_ValueError, "codec.order: got column %d twice, want every column once", (int)order[i]);
            good = 0;
        }
    }
    free(named);
    return good;
}

/* codec: kernels.TrellisView, (block_bits, extra, magnitude, order | None, factor | None). Returns 1, or 0 with an
 * exception set. */
static int take_trellis(matrix_args *m, PyObject *codec_obj, npy_intp in_features)
{
    PyObject *bits_obj, *magnitude_obj, *order_obj, *factor_obj;
    pllm_trellis *const t = &m->trellis;
    const npy_intp blocks = (in_features + PLLM_TRELLIS_BLOCK - 1) / PLLM_TRELLIS_BLOCK;
    const npy_intp magnitudes = PLLM_TRELLIS_TABLE;
    if (!PyArg_ParseTuple(codec_obj, "OiOOO;codec: want a TrellisView", &bits_obj, &t->extra, &magnitude_obj,
                          &order_obj, &factor_obj) ||
        !pllm_in_range("codec.extra", t->extra, 0, 3) ||
        !pllm_take(&m->block_bits, bits_obj, "codec.block_bits", NPY_UINT8, 1, &blocks, "") ||
        !bits_are_good(pllm_data(m->block_bits), blocks, t->extra) ||
        !pllm_take(&m->magnitude, magnitude_obj, "codec.magnitude", NPY_INT8, 1, &magnitudes, "") ||
        !pllm_take_optional(&m->order, order_obj, "codec.order", NPY_INT32, 1, &in_features, "") ||
        !pllm_take_optional(&m->factor, factor_obj, "codec.factor", NPY_FLOAT32, 1, &in_features, ""))
        return 0;
    t->block_bits = pllm_data(m->block_bits);
    t->magnitude = pllm_data(m->magnitude);
    t->order = pllm_data(m->order);
    t->factor = pllm_data(m->factor);
    for (int i = 0; i < PLLM_TRELLIS_TABLE; i++)
        if (!pllm_in_range("codec.magnitude: a magnitude", t->magnitude[i], 0,
                           i < PLLM_TRELLIS_SMALLS ? PLLM_TRELLIS_SMALL : INT8_MAX))
            return 0;
    if (t->order && !is_permutation(t->order, in_features))
        return 0;
    m->codec = (pllm_codec){.d = 1, .k = 1, .index_bits = 1, .table_scale = 1.0f, .trellis = t};
    return 1;
}

/* Bytes of `out_features` rows; -1 where that is more than memory may have. */
static npy_intp payload_bytes(const matrix_args *m, npy_intp out_features, npy_intp in_features)
{
    const npy_intp count = (in_features + m->codec.d - 1) / m->codec.d;
    const npy_intp stride = m->codec.trellis ? PLLM_TRELLIS_BITS * ((in_features + 7) / 8)
                                             : pllm_row_stride_bytes(count, m->codec.index_bits);
    if (!pllm_in_range("out_features", out_features, 0, PY_SSIZE_T_MAX / 64 / stride))
        return -1;
    return m->codec.trellis ? pllm_trellis_offset(&m->trellis, in_features, out_features) : out_features * stride;
}

/* Fills *m, which must be zero. Returns 1, or 0 with an exception set; release(m) in both cases. */
static int take_matrix(matrix_args *m, PyObject *packed_obj, npy_intp out_features,
                       npy_intp in_features, PyObject *codec_obj, PyObject *scale_obj,
                       PyObject *shift_obj)
{
    enum { TRELLIS_PARTS = 5 };
    const int is_trellis = PyTuple_Check(codec_obj) && PyTuple_Size(codec_obj) == TRELLIS_PARTS;
    if (!pllm_in_range("in_features", in_features, 1, INT32_MAX) ||
        !(is_trellis ? take_trellis(m, codec_obj, in_features) : take_codec(m, codec_obj)))
        return 0;
    const npy_intp bytes = payload_bytes(m, out_features, in_features);
    if (bytes < 0 || !pllm_take(&m->packed, packed_obj, "packed", NPY_UINT8, 1, &bytes, "") ||
        !pllm_take(&m->scale, scale_obj, "scale", NPY_FLOAT32, 1, &out_features, "") ||
        !pllm_take_optional(&m->shift, shift_obj, "shift", NPY_FLOAT32, 1, &out_features, ""))
        return 0;
    m->matrix = (pllm_matrix){
        .codec = &m->codec,
        .packed = pllm_data(m->packed),
        .out_features = out_features,
        .in_features = in_features,
        .scale = pllm_data(m->scale),
        .shift = pllm_data(m->shift),
    };
    return 1;
}

/* The caller's output array, or a new one when it gave None. */
static int take_or_new(PyArrayObject **out, PyObject *obj, const npy_intp *shape)
{
    if (obj == Py_None)
        return pllm_new(out, NPY_FLOAT32, 2, shape);
    return pllm_take_out(out, obj, "out", NPY_FLOAT32, 2, shape, "");
}

/* Length of a one-dimensional array, or 0 for anything else, which is refused later. */
static npy_intp length_of(PyObject *obj)
{
    return PyArray_Check(obj) && PyArray_NDIM((PyArrayObject *)obj) == 1
               ? PyArray_DIM((PyArrayObject *)obj, 0)
               : 0;
}

/* Returns 1, or 0 with IndexError set. */
static int rows_exist(const int64_t *row_index, npy_intp n, npy_intp out_features)
{
    for (npy_intp i = 0; i < n; i++) {
        if (row_index[i] < 0 || row_index[i] >= out_features) {
            PyErr_Format(PyExc_IndexError, "row_index: got %lld, want 0..%zd",
                         (long long)row_index[i], (Py_ssize_t)out_features - 1);
            return 0;
        }
    }
    return 1;
}

/* decode_rows(packed, in_features, first_row, row_count, codec, scale, shift | None, out | None,
 * threads) -> rows */
static PyObject *decode_rows(PyObject *self, PyObject *args)
{
    PyObject *packed, *codec, *scale, *shift, *out_obj;
    PyArrayObject *out = NULL;
    Py_ssize_t in_features, first_row, row_count;
    matrix_args m = {.codec = {.k = 0}};
    int threads, status = -1;
    (void)self;
    if (!PyArg_ParseTuple(args, "OnnnOOOOi:decode_rows", &packed, &in_features, &first_row, &row_count,
                          &codec, &scale, &shift, &out_obj, &threads))
        return NULL;
    const npy_intp out_features = length_of(scale);
    if (!take_matrix(&m, packed, out_features, in_features, codec, scale, shift) ||
        !pllm_in_range("first_row", first_row, 0, out_features) ||
        !pllm_in_range("row_count", row_count, 0, out_features - first_row) ||
        !pllm_in_range("threads", threads, 1, PLLM_MAX_THREADS) ||
        !take_or_new(&out, out_obj, (npy_intp[]){row_count, in_features}))
        goto done;

    Py_BEGIN_ALLOW_THREADS
    status = pllm_active()->decode_rows(&m.matrix, first_row, NULL, row_count, pllm_data(out), threads);
    Py_END_ALLOW_THREADS
    if (!pllm_succeeded(status))
        Py_CLEAR(out);
done:
    release(&m);
    return (PyObject *)out;
}

/* decode_row_list(packed, in_features, row_index, codec, scale, shift | None, threads) -> rows */
static PyObject *decode_row_list(PyObject *self, PyObject *args)
{
    PyObject *packed, *codec, *scale, *shift, *index_obj;
    PyArrayObject *out = NULL, *row_index = NULL;
    Py_ssize_t in_features;
    matrix_args m = {.codec = {.k = 0}};
    int threads, status = -1;
    (void)self;
    if (!PyArg_ParseTuple(args, "OnOOOOi:decode_row_list", &packed, &in_features, &index_obj, &codec,
                          &scale, &shift, &threads))
        return NULL;
    const npy_intp out_features = length_of(scale);
    if (!take_matrix(&m, packed, out_features, in_features, codec, scale, shift) ||
        !pllm_take(&row_index, index_obj, "row_index", NPY_INT64, 1, (npy_intp[]){-1}, "n") ||
        !pllm_in_range("threads", threads, 1, PLLM_MAX_THREADS))
        goto done;
    const npy_intp n = PyArray_DIM(row_index, 0);
    if (!rows_exist(pllm_data(row_index), n, out_features) ||
        !pllm_new(&out, NPY_FLOAT32, 2, (npy_intp[]){n, in_features}))
        goto done;

    Py_BEGIN_ALLOW_THREADS
    status = pllm_active()->decode_rows(&m.matrix, 0, pllm_data(row_index), n, pllm_data(out), threads);
    Py_END_ALLOW_THREADS
    if (!pllm_succeeded(status))
        Py_CLEAR(out);
done:
    Py_XDECREF(row_index);
    release(&m);
    return (PyObject *)out;
}

/* matmul(x, packed, out_features, codec, scale, shift | None, bias | None, out | None,
 * activations, threads) -> product */
static PyObject *matmul(PyObject *self, PyObject *args)
{
    PyObject *x_obj, *packed, *codec, *scale, *shift, *bias_obj, *out_obj;
    PyArrayObject *x = NULL, *bias = NULL, *out = NULL;
    Py_ssize_t out_features;
    matrix_args m = {.codec = {.k = 0}};
    int activations, threads, status = -1;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOnOOOOOii:matmul", &x_obj, &packed, &out_features, &codec, &scale,
                          &shift, &bias_obj, &out_obj, &activations, &threads))
        return NULL;
    if (!pllm_take(&x, x_obj, "x", NPY_FLOAT32, 2, (npy_intp[]){-1, -1}, "nc"))
        goto done;
    const npy_intp n = PyArray_DIM(x, 0);
    if (!take_matrix(&m, packed, out_features, PyArray_DIM(x, 1), codec, scale, shift) ||
        !pllm_take_optional(&bias, bias_obj, "bias", NPY_FLOAT32, 1, &m.matrix.out_features, "") ||
        !pllm_in_range("activations", activations, PLLM_ACTIVATIONS_FLOAT32, PLLM_ACTIVATIONS_INTEGER) ||
        !pllm_in_range("threads", threads, 1, PLLM_MAX_THREADS) ||
        !take_or_new(&out, out_obj, (npy_intp[]){n, out_features}))
        goto done;

    Py_BEGIN_ALLOW_THREADS
    status = pllm_active()->matmul(&m.matrix, pllm_data(x), n, pllm_data(bias), pllm_data(out), PLLM_FLOAT32,
                                   (enum pllm_activations)activations, threads);
    Py_END_ALLOW_THREADS
    if (!pllm_succeeded(status))
        Py_CLEAR(out);
done:
    Py_XDECREF(x);
    Py_XDECREF(bias);
    release(&m);
    return (PyObject *)out;
}

/* ---- by address ------------------------------------------------------------------------------ */

static const char matrix_name[] = "pocketllm.matrix";

static void release_held(PyObject *capsule)
{
    matrix_args *held = PyCapsule_GetPointer(capsule, matrix_name);
    if (held)
        release(held);
    free(held);
}

/* hold_matrix(packed, in_features, codec, scale, shift | None) -> capsule */
static PyObject *hold_matrix(PyObject *self, PyObject *args)
{
    PyObject *packed, *codec, *scale, *shift, *capsule = NULL;
    Py_ssize_t in_features;
    (void)self;
    if (!PyArg_ParseTuple(args, "OnOOO:hold_matrix", &packed, &in_features, &codec, &scale, &shift))
        return NULL;
    matrix_args *held = calloc(1, sizeof *held);
    if (!held)
        return PyErr_NoMemory();
    if (take_matrix(held, packed, length_of(scale), in_features, codec, scale, shift))
        capsule = PyCapsule_New(held, matrix_name, release_held);
    if (!capsule) {
        release(held);
        free(held);
    }
    return capsule;
}

const pllm_matrix *pllm_held_matrix(PyObject *capsule)
{
    const matrix_args *held = PyCapsule_GetPointer(capsule, matrix_name);
    return held ? &held->matrix : NULL;
}

/* y = x W' + bias as pllm_matmul, where the bias may be bfloat16, too. */
static int multiply(const pllm_matrix *w, const void *x, ptrdiff_t n, enum pllm_number number, const void *bias,
                    int bias_is_bfloat16, void *y, enum pllm_activations activations, int threads)
{
    float *const memory = bias_is_bfloat16 ? malloc((size_t)(w->out_features + 1) * sizeof *memory) : NULL;
    if (bias_is_bfloat16 && !memory)
        return PLLM_ENOMEM;
    const float *const floats = pllm_as_floats(bias, bias_is_bfloat16, w->out_features, memory);
    const int status = pllm_active()->matmul(w, x, n, floats, y, number, activations, threads);
    free(memory);
    return status;
}

/* matmul_at(capsule, x, n, x_is_bfloat16, bias, bias_is_bfloat16, y, activations, threads): x, bias and y
 * are addresses, which are trusted; bias may be 0. */
static PyObject *matmul_at(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    (void)self;
    if (count != 9) {
        PyErr_Format(PyExc_TypeError, "matmul_at: got %zd arguments, want 9", count);
        return NULL;
    }
    const pllm_matrix *held = pllm_held_matrix(args[0]);
    const void *x = PyLong_AsVoidPtr(args[1]), *bias = PyLong_AsVoidPtr(args[4]);
    void *y = PyLong_AsVoidPtr(args[6]);
    const Py_ssize_t n = PyLong_AsSsize_t(args[2]);
    const long x_kind = PyLong_AsLong(args[3]), bias_kind = PyLong_AsLong(args[5]);
    const long activations = PyLong_AsLong(args[7]), threads = PyLong_AsLong(args[8]);
    int status;
    if (!held || PyErr_Occurred() || !pllm_in_range("n", n, 0, PY_SSIZE_T_MAX / 64) ||
        !pllm_in_range("activations", activations, PLLM_ACTIVATIONS_FLOAT32, PLLM_ACTIVATIONS_INTEGER) ||
        !pllm_in_range("threads", threads, 1, PLLM_MAX_THREADS))
        return NULL;

    Py_BEGIN_ALLOW_THREADS
    status = multiply(held, x, n, x_kind ? PLLM_BFLOAT16 : PLLM_FLOAT32, bias, bias && bias_kind, y,
                      (enum pllm_activations)activations, (int)threads);
    Py_END_ALLOW_THREADS
    if (!pllm_succeeded(status))
        return NULL;
    Py_RETURN_NONE;
}

PyMethodDef pllm_infer_methods[] = {
    {"decode_rows", decode_rows, METH_VARARGS, "Consecutive rows of a compressed matrix."},
    {"decode_row_list", decode_row_list, METH_VARARGS, "Named rows of a compressed matrix."},
    {"matmul", matmul, METH_VARARGS, "Activations times a compressed matrix, transposed."},
    {"hold_matrix", hold_matrix, METH_VARARGS, "A compressed matrix for many products."},
    {"matmul_at", (PyCFunction)(void (*)(void))matmul_at, METH_FASTCALL, "matmul by address."},
    {NULL, NULL, 0, NULL},
};
