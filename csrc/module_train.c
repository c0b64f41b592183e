/* module_train.c - Python wrappers of the codec's forward, backward and training step. */
#include "module.h"

static void release(PyArrayObject **arrays, int count)
{
    for (int i = 0; i < count; i++)
        Py_CLEAR(arrays[i]);
}

/* Checks d, h, norm and the length of rows. Returns 1, or 0 with ValueError set. */
static int check_coder(const pllm_coder *c, npy_intp length)
{
    if (!pllm_in_range("subvector", c->d, 1, PLLM_MAX_SUBVECTOR) ||
        !pllm_in_range("hidden", c->h, 1, PLLM_MAX_HIDDEN) ||
        !pllm_in_range("norm", c->norm, PLLM_NORM_INPUT, PLLM_NORM_RLN))
        return 0;
    if (length % c->d == 0)
        return 1;
    PyErr_Format(PyExc_ValueError, "rows: got length %zd, want a multiple of subvector %d",
                 (Py_ssize_t)length, c->d);
    return 0;
}

static npy_intp mlp_floats(int d, int h) { return (npy_intp)2 * h * d + h + d; }

/* rln(x, threads) -> out;  rln_backward(x, grad, threads) -> grad_x */
static PyObject *rln_or_backward(PyObject *args, int backward)
{
    PyObject *x_obj, *grad_obj = NULL, *result = NULL;
    PyArrayObject *own[3] = {NULL, NULL, NULL};
    int threads, status;
    if (backward ? !PyArg_ParseTuple(args, "OOi:rln_backward", &x_obj, &grad_obj, &threads)
                 : !PyArg_ParseTuple(args, "Oi:rln", &x_obj, &threads))
        return NULL;
    if (!pllm_take(&own[0], x_obj, "x", NPY_FLOAT32, 2, (npy_intp[]){-1, -1}, "rl"))
        goto done;
    npy_intp *shape = PyArray_DIMS(own[0]);
    if ((backward && !pllm_take(&own[1], grad_obj, "grad", NPY_FLOAT32, 2, shape, "")) ||
        !pllm_in_range("threads", threads, 1, PLLM_MAX_THREADS) ||
        !pllm_new(&own[2], NPY_FLOAT32, 2, shape))
        goto done;
    Py_BEGIN_ALLOW_THREADS
    if (backward)
        status = pllm_active()->rln_backward(pllm_data(own[0]), pllm_data(own[1]), shape[0],
                                             shape[1], pllm_data(own[2]), threads);
    else
        status = pllm_active()->rln(pllm_data(own[0]), shape[0], shape[1], pllm_data(own[2]), threads);
    Py_END_ALLOW_THREADS
    if (pllm_succeeded(status))
        result = Py_NewRef((PyObject *)own[2]);
done:
    release(own, 3);
    return result;
}

static PyObject *rln(PyObject *self, PyObject *args)
{
    (void)self;
    return rln_or_backward(args, 0);
}

static PyObject *rln_backward(PyObject *self, PyObject *args)
{
    (void)self;
    return rln_or_backward(args, 1);
}

/* mlp(x, params, hidden, threads) -> out */
static PyObject *mlp(PyObject *self, PyObject *args)
{
    PyObject *x_obj, *params_obj, *result = NULL;
    PyArrayObject *own[3] = {NULL, NULL, NULL};
    int h, threads, status;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOii:mlp", &x_obj, &params_obj, &h, &threads) ||
        !pllm_take(&own[0], x_obj, "x", NPY_FLOAT32, 2, (npy_intp[]){-1, -1}, "nd"))
        goto done;
    npy_intp *shape = PyArray_DIMS(own[0]);
    const pllm_coder coder = {(int)shape[1], h, PLLM_NORM_INPUT};
    if (!pllm_in_range("x: length of a row", shape[1], 1, PLLM_MAX_SUBVECTOR) ||
        !check_coder(&coder, shape[1]) ||
        !pllm_take(&own[1], params_obj, "params", NPY_FLOAT32, 1,
                   (npy_intp[]){mlp_floats(coder.d, h)}, "") ||
        !pllm_in_range("threads", threads, 1, PLLM_MAX_THREADS) ||
        !pllm_new(&own[2], NPY_FLOAT32, 2, shape))
        goto done;
    Py_BEGIN_ALLOW_THREADS
    status = pllm_active()->mlp(pllm_data(own[0]), shape[0], coder.d, h, pllm_data(own[1]),
                                pllm_data(own[2]), threads);
    Py_END_ALLOW_THREADS
    if (pllm_succeeded(status))
        result = Py_NewRef((PyObject *)own[2]);
done:
    release(own, 3);
    return result;
}

/* mlp_backward(x, params, grad, hidden, threads) -> (grad_x, grad_params) */
static PyObject *mlp_backward(PyObject *self, PyObject *args)
{
    PyObject *x_obj, *params_obj, *grad_obj, *result = NULL;
    PyArrayObject *own[5] = {NULL, NULL, NULL, NULL, NULL};
    int h, threads, status;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOii:mlp_backward", &x_obj, &params_obj, &grad_obj, &h, &threads) ||
        !pllm_take(&own[0], x_obj, "x", NPY_FLOAT32, 2, (npy_intp[]){-1, -1}, "nd"))
        goto done;
    npy_intp *shape = PyArray_DIMS(own[0]);
    const pllm_coder coder = {(int)shape[1], h, PLLM_NORM_INPUT};
    npy_intp size = mlp_floats(coder.d, h);
    if (!pllm_in_range("x: length of a row", shape[1], 1, PLLM_MAX_SUBVECTOR) ||
        !check_coder(&coder, shape[1]) ||
        !pllm_take(&own[1], params_obj, "params", NPY_FLOAT32, 1, &size, "") ||
        !pllm_take(&own[2], grad_obj, "grad", NPY_FLOAT32, 2, shape, "") ||
        !pllm_in_range("threads", threads, 1, PLLM_MAX_THREADS) ||
        !pllm_new(&own[3], NPY_FLOAT32, 2, shape) || !pllm_new(&own[4], NPY_FLOAT32, 1, &size))
        goto done;
    Py_BEGIN_ALLOW_THREADS
    status = pllm_active()->mlp_backward(pllm_data(own[0]), shape[0], coder.d, h, pllm_data(own[1]),
                                         pllm_data(own[2]), pllm_data(own[3]), pllm_data(own[4]),
                                         threads);
    Py_END_ALLOW_THREADS
    if (pllm_succeeded(status))
        result = Py_BuildValue("(OO)", own[3], own[4]);
done:
    release(own, 5);
    return result;
}

/* (rows, params, subvector, hidden, norm, threads) -> out */
static PyObject *coder_forward(PyObject *args, int decoder)
{
    PyObject *rows_obj, *params_obj, *result = NULL;
    PyArrayObject *own[3] = {NULL, NULL, NULL};
    pllm_coder c;
    int threads, status;
    if (!PyArg_ParseTuple(args, "OOiiii", &rows_obj, &params_obj, &c.d, &c.h, &c.norm, &threads) ||
        !pllm_take(&own[0], rows_obj, "rows", NPY_FLOAT32, 2, (npy_intp[]){-1, -1}, "rl"))
        goto done;
    npy_intp *shape = PyArray_DIMS(own[0]);
    if (!check_coder(&c, shape[1]) ||
        !pllm_take(&own[1], params_obj, "params", NPY_FLOAT32, 1,
                   (npy_intp[]){3 * mlp_floats(c.d, c.h)}, "") ||
        !pllm_in_range("threads", threads, 1, PLLM_MAX_THREADS) ||
        !pllm_new(&own[2], NPY_FLOAT32, 2, shape))
        goto done;
    Py_BEGIN_ALLOW_THREADS
    pllm_encode_fn *run = decoder ? pllm_active()->decode : pllm_active()->encode;
    status = run(&c, pllm_data(own[0]), shape[0], shape[1], pllm_data(own[1]), pllm_data(own[2]),
                 threads);
    Py_END_ALLOW_THREADS
    if (pllm_succeeded(status))
        result = Py_NewRef((PyObject *)own[2]);
done:
    release(own, 3);
    return result;
}

static PyObject *encode(PyObject *self, PyObject *args)
{
    (void)self;
    return coder_forward(args, 0);
}

static PyObject *decode(PyObject *self, PyObject *args)
{
    (void)self;
    return coder_forward(args, 1);
}

/* (rows, params, grad, subvector, hidden, norm, threads) -> (grad_rows, grad_params) */
static PyObject *coder_backward(PyObject *args, int decoder)
{
    PyObject *rows_obj, *params_obj, *grad_obj, *result = NULL;
    PyArrayObject *own[5] = {NULL, NULL, NULL, NULL, NULL};
    pllm_coder c;
    int threads, status;
    if (!PyArg_ParseTuple(args, "OOOiiii", &rows_obj, &params_obj, &grad_obj, &c.d, &c.h, &c.norm,
                          &threads) ||
        !pllm_take(&own[0], rows_obj, "rows", NPY_FLOAT32, 2, (npy_intp[]){-1, -1}, "rl"))
        goto done;
    npy_intp *shape = PyArray_DIMS(own[0]);
    if (!check_coder(&c, shape[1]))
        goto done;
    npy_intp size = 3 * mlp_floats(c.d, c.h);
    if (!pllm_take(&own[1], params_obj, "params", NPY_FLOAT32, 1, &size, "") ||
        !pllm_take(&own[2], grad_obj, "grad", NPY_FLOAT32, 2, shape, "") ||
        !pllm_in_range("threads", threads, 1, PLLM_MAX_THREADS) ||
        !pllm_new(&own[3], NPY_FLOAT32, 2, shape) || !pllm_new(&own[4], NPY_FLOAT32, 1, &size))
        goto done;
    Py_BEGIN_ALLOW_THREADS
    pllm_encode_backward_fn *run =
        decoder ? pllm_active()->decode_backward : pllm_active()->encode_backward;
    status = run(&c, pllm_data(own[0]), shape[0], shape[1], pllm_data(own[1]), pllm_data(own[2]),
                 pllm_data(own[3]), pllm_data(own[4]), threads);
    Py_END_ALLOW_THREADS
    if (pllm_succeeded(status))
        result = Py_BuildValue("(OO)", own[3], own[4]);
done:
    release(own, 5);
    return result;
}

static PyObject *encode_backward(PyObject *self, PyObject *args)
{
    (void)self;
    return coder_backward(args, 0);
}

static PyObject *decode_backward(PyObject *self, PyObject *args)
{
    (void)self;
    return coder_backward(args, 1);
}

/* Takes weight: None, (length) or (rows, length). */
static int take_weight(PyArrayObject **weight, PyObject *obj, const npy_intp *shape)
{
    int one_row = PyArray_Check(obj) && PyArray_NDIM((PyArrayObject *)obj) == 1;
    return pllm_take_optional(weight, obj, "weight", NPY_FLOAT32, one_row ? 1 : 2,
                              one_row ? shape + 1 : shape, "");
}

/* train_step(rows, encoder, codebook, decoder, weight | None, hidden, norm, codebook_loss, threads)
 * -> (reconstruction, commitment, index, grad_encoder, grad_codebook, grad_decoder) */
static PyObject *train_step(PyObject *self, PyObject *args)
{
    enum { ROWS, ENCODER, CODEBOOK, DECODER, WEIGHT, INDEX, LATENTS, G_ENCODER, G_CODEBOOK, G_DECODER,
           ARRAYS };
    PyObject *obj[WEIGHT + 1], *result = NULL;
    PyArrayObject *own[ARRAYS] = {NULL};
    pllm_step s = {.k = 0};
    int threads, status;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOOOiifi:train_step", &obj[ROWS], &obj[ENCODER], &obj[CODEBOOK],
                          &obj[DECODER], &obj[WEIGHT], &s.coder.h, &s.coder.norm, &s.codebook_loss,
                          &threads) ||
        !pllm_take(&own[CODEBOOK], obj[CODEBOOK], "codebook", NPY_FLOAT32, 2, (npy_intp[]){-1, -1},
                   "Kd") ||
        !pllm_take(&own[ROWS], obj[ROWS], "rows", NPY_FLOAT32, 2, (npy_intp[]){-1, -1}, "rl"))
        goto done;
    npy_intp *book = PyArray_DIMS(own[CODEBOOK]), *shape = PyArray_DIMS(own[ROWS]);
    if (!pllm_in_range("codebook: number of codewords", book[0], 1, PLLM_MAX_CODEWORDS) ||
        !pllm_in_range("codebook: length of a codeword", book[1], 1, PLLM_MAX_SUBVECTOR))
        goto done;
    s.coder.d = (int)book[1];
    s.k = (int)book[0];
    npy_intp size = 3 * mlp_floats(s.coder.d, s.coder.h);
    if (!check_coder(&s.coder, shape[1]) ||
        !pllm_in_range("rows: number of values", shape[0] * shape[1], 1, PY_SSIZE_T_MAX) ||
        !pllm_take(&own[ENCODER], obj[ENCODER], "encoder", NPY_FLOAT32, 1, &size, "") ||
        !pllm_take(&own[DECODER], obj[DECODER], "decoder", NPY_FLOAT32, 1, &size, "") ||
        !take_weight(&own[WEIGHT], obj[WEIGHT], shape) ||
        !pllm_in_range("threads", threads, 1, PLLM_MAX_THREADS))
        goto done;
    npy_intp n[2] = {shape[0] * (shape[1] / s.coder.d), s.coder.d};
    if (!pllm_new(&own[INDEX], NPY_INT32, 1, n) || !pllm_new(&own[LATENTS], NPY_FLOAT32, 2, n) ||
        !pllm_new(&own[G_ENCODER], NPY_FLOAT32, 1, &size) ||
        !pllm_new(&own[G_CODEBOOK], NPY_FLOAT32, 2, book) ||
        !pllm_new(&own[G_DECODER], NPY_FLOAT32, 1, &size))
        goto done;
    s.rows = pllm_data(own[ROWS]);
    s.row_count = shape[0];
    s.length = shape[1];
    s.weight = pllm_data(own[WEIGHT]);
    s.weight_row_stride = own[WEIGHT] && PyArray_NDIM(own[WEIGHT]) == 2 ? shape[1] : 0;
    s.encoder = pllm_data(own[ENCODER]);
    s.codebook = pllm_data(own[CODEBOOK]);
    s.decoder = pllm_data(own[DECODER]);
    s.index = pllm_data(own[INDEX]);
    s.latents = pllm_data(own[LATENTS]);
    s.grad_encoder = pllm_data(own[G_ENCODER]);
    s.grad_codebook = pllm_data(own[G_CODEBOOK]);
    s.grad_decoder = pllm_data(own[G_DECODER]);
    Py_BEGIN_ALLOW_THREADS
    status = pllm_active()->train_step(&s, threads);
    Py_END_ALLOW_THREADS
    if (pllm_succeeded(status))
        result = Py_BuildValue("(ddOOOO)", s.reconstruction, s.commitment, own[INDEX],
                               own[G_ENCODER], own[G_CODEBOOK], own[G_DECODER]);
done:
    release(own, ARRAYS);
    return result;
}

/* adam(param, grad, mean, variance, step, lr, beta1, beta2, eps, threads): in place */
static PyObject *adam(PyObject *self, PyObject *args)
{
    static const char *const names[] = {"param", "grad", "mean", "variance"};
    PyObject *obj[4], *result = NULL;
    PyArrayObject *own[4] = {NULL, NULL, NULL, NULL};
    double lr, beta1, beta2, eps;
    long long step;
    int threads;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOOLddddi:adam", &obj[0], &obj[1], &obj[2], &obj[3], &step, &lr,
                          &beta1, &beta2, &eps, &threads))
        return NULL;
    if (!pllm_take_out(&own[0], obj[0], names[0], NPY_FLOAT32, 1, (npy_intp[]){-1}, "n"))
        goto done;
    npy_intp n = PyArray_DIM(own[0], 0);
    if (!pllm_take(&own[1], obj[1], names[1], NPY_FLOAT32, 1, &n, "") ||
        !pllm_take_out(&own[2], obj[2], names[2], NPY_FLOAT32, 1, &n, "") ||
        !pllm_take_out(&own[3], obj[3], names[3], NPY_FLOAT32, 1, &n, "") ||
        !pllm_in_range("step", (Py_ssize_t)step, 1, PY_SSIZE_T_MAX) ||
        !pllm_in_range("threads", threads, 1, PLLM_MAX_THREADS))
        goto done;
    Py_BEGIN_ALLOW_THREADS
    pllm_active()->adam(pllm_data(own[0]), pllm_data(own[1]), pllm_data(own[2]), pllm_data(own[3]), n,
                        step, lr, beta1, beta2, eps, threads);
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
done:
    release(own, 4);
    return result;
}

/* Are all indices within 0..k-1? If not, ValueError is set. */
static int check_index(const int32_t *index, npy_intp n, npy_intp k)
{
    int32_t low = 0, high = 0;
    for (npy_intp i = 0; i < n; i++) {
        low = index[i] < low ? index[i] : low;
        high = index[i] > high ? index[i] : high;
    }
    return n == 0 || pllm_in_range("index", low < 0 ? low : high, 0, k - 1);
}

/* cluster_sums(x, index, k, weight | None, threads) -> (sum (d, k), mass (k) or (d, k)) */
static PyObject *cluster_sums(PyObject *self, PyObject *args)
{
    enum { X, INDEX, WEIGHT, SUM, MASS, ARRAYS };
    PyObject *obj[WEIGHT + 1], *result = NULL;
    PyArrayObject *own[ARRAYS] = {NULL};
    int k, threads;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOiOi:cluster_sums", &obj[X], &obj[INDEX], &k, &obj[WEIGHT],
                          &threads) ||
        !pllm_take(&own[X], obj[X], "x", NPY_FLOAT32, 2, (npy_intp[]){-1, -1}, "nd"))
        goto done;
    npy_intp *shape = PyArray_DIMS(own[X]), sums[2] = {shape[1], k};
    int one = PyArray_Check(obj[WEIGHT]) && PyArray_NDIM((PyArrayObject *)obj[WEIGHT]) == 1;
    if (!pllm_in_range("x: length of a row", shape[1], 1, PLLM_MAX_SUBVECTOR) ||
        !pllm_in_range("k", k, 1, PLLM_MAX_CODEWORDS) ||
        !pllm_take(&own[INDEX], obj[INDEX], "index", NPY_INT32, 1, shape, "") ||
        !pllm_take_optional(&own[WEIGHT], obj[WEIGHT], "weight", NPY_FLOAT32, one ? 1 : 2, shape, "") ||
        !pllm_in_range("threads", threads, 1, PLLM_MAX_THREADS) ||
        !check_index(pllm_data(own[INDEX]), shape[0], k))
        goto done;
    int channels = !own[WEIGHT] ? 0 : one ? 1 : (int)shape[1];
    int by_channel = own[WEIGHT] && !one;
    if (!pllm_new(&own[SUM], NPY_FLOAT64, 2, sums) ||
        !pllm_new(&own[MASS], NPY_FLOAT64, by_channel ? 2 : 1, by_channel ? sums : sums + 1))
        goto done;
    Py_BEGIN_ALLOW_THREADS
    pllm_active()->cluster_sums(pllm_data(own[X]), shape[0], (int)shape[1], pllm_data(own[INDEX]), k,
                                pllm_data(own[WEIGHT]), channels, pllm_data(own[SUM]),
                                pllm_data(own[MASS]), threads);
    Py_END_ALLOW_THREADS
    result = Py_BuildValue("(OO)", own[SUM], own[MASS]);
done:
    release(own, ARRAYS);
    return result;
}

PyMethodDef pllm_train_methods[] = {
    {"rln", rln, METH_VARARGS, "Row layer norm."},
    {"rln_backward", rln_backward, METH_VARARGS, "Gradient of rln."},
    {"mlp", mlp, METH_VARARGS, "W2 gelu(W1 x + b1) + b2."},
    {"mlp_backward", mlp_backward, METH_VARARGS, "Gradients of mlp."},
    {"encode", encode, METH_VARARGS, "Encoder on rows."},
    {"encode_backward", encode_backward, METH_VARARGS, "Gradients of encode."},
    {"decode", decode, METH_VARARGS, "Decoder on rows of codewords."},
    {"decode_backward", decode_backward, METH_VARARGS, "Gradients of decode."},
    {"train_step", train_step, METH_VARARGS, "Losses and gradients of one training step."},
    {"adam", adam, METH_VARARGS, "One Adam update in place."},
    {"cluster_sums", cluster_sums, METH_VARARGS, "Sums per codeword."},
    {NULL, NULL, 0, NULL},
};
