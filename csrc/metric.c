/* metric.c - exact nearest codeword under a metric that some hundred queries share (metric.h, where the proof stands).
 * Compiled once per instruction set.
 *
 * Queries lie in the lanes while they are prepared, buckets while their boxes are compared with a query, codewords
 * while a bucket is searched. VF_WIDTH buckets are a row, with a box around it, which is compared first. What is near
 * which query goes into lists for all queries, so that no branch depends on a single one.
 */
#include "metric.h"
#include "tree.h"

enum { BUCKET = METRIC_BUCKET, QUERIES = METRIC_QUERIES };

/* ---- buckets ------------------------------------------------------------------------------------ */

/* Lays out b, which comes first, and its arrays; returns their bytes. */
static size_t lay_out(pllm_buckets *b, char *memory)
{
    const size_t places = (size_t)b->count * BUCKET, floats = places * (size_t)b->d;
    size_t used = 0;
    tree_place(memory, &used, 1, sizeof *b);
    b->negated = tree_place(memory, &used, floats, sizeof(float));
    b->across = tree_place(memory, &used, floats, sizeof(float));
    b->number = tree_place(memory, &used, places, sizeof(int32_t));
    b->where = tree_place(memory, &used, (size_t)b->k, sizeof(int32_t));
    return used;
}

/* order: (k) the codewords, near ones together, or NULL. */
static void fill(pllm_buckets *b, const float *table, const int32_t *order)
{
    const int d = b->d;
    for (int i = 0; i < b->count * BUCKET; i++) {
        const int bucket = i / BUCKET, member = i % BUCKET;
        const int at = i < b->k ? i : (int)smaller(bucket * BUCKET, b->k - 1);
        const int32_t codeword = order ? order[at] : at;
        const float *const t = table + (ptrdiff_t)codeword * d;
        b->number[i] = i < b->k ? codeword : INT32_MAX;
        b->where[codeword] = at;
        for (int a = 0; a < d; a++) {
            b->negated[(bucket * d + a) * BUCKET + member] = i < b->k ? -t[a] : 0.0f;
            b->across[(member * d + a) * b->count + bucket] = t[a];
            b->largest[a] = fmaxf(b->largest[a], fabsf(t[a]));
        }
    }
}

int PLLM_SYM(pllm_buckets_build)(pllm_buckets **result, const float *table, int k, int d, int threads)
{
    pllm_tree *tree;
    *result = NULL;
    if (PLLM_SYM(pllm_tree_build)(&tree, table, k, d, NULL, NULL, 0, threads) != PLLM_OK)
        return PLLM_ENOMEM;
    pllm_buckets b = {.d = d, .k = k, .count = metric_buckets(k)};
    char *memory = pllm_alloc(lay_out(&b, NULL));
    if (memory) {
        lay_out(&b, memory);
        fill(&b, table, tree->works ? tree->order : NULL);
        *result = memcpy(memory, &b, sizeof b);
    }
    free(tree);
    return memory ? PLLM_OK : PLLM_ENOMEM;
}

/* ---- a metric ----------------------------------------------------------------------------------- */

/* root = R, upper triangular, with metric = R'R; 0 where there is none by a wide margin. */
static int factor(const float *metric, int d, float *root)
{
    double r[PLLM_MAX_SUBVECTOR][PLLM_MAX_SUBVECTOR] = {{0}};
    for (int a = 0; a < d; a++) {
        const double own = metric[a * d + a];
        double pivot = own;
        for (int i = 0; i < a; i++)
            pivot -= r[i][a] * r[i][a];
        for (int b = 0; b < d; b++) {
            const double right = metric[a * d + b], below = metric[b * d + a];
            if (own == 0.0 ? right != 0.0 || below != 0.0
                           : !(fabs(right - below) <= 0x1p-22 * sqrt(own * (double)metric[b * d + b])))
                return 0;
        }
        if (own != 0.0 && !(pivot > 1e-6 * own))
            return 0;
        for (int b = a; b < d && own != 0.0; b++) {
            double rest = metric[a * d + b];
            for (int i = 0; i < a; i++)
                rest -= r[i][a] * r[i][b];
            r[a][b] = rest / sqrt(pivot);
        }
        for (int b = 0; b < d; b++)
            root[a * d + b] = (float)r[a][b];
    }
    return 1;
}

PLLM_INLINE void set_offsets(const int d, const pllm_buckets *b, pllm_metric *m)
{
    for (int i = 0; i < b->count * BUCKET; i += VF_WIDTH) {
        const float *const t = b->negated + (ptrdiff_t)(i / BUCKET) * d * BUCKET + i % BUCKET;
        const vm inside = vi_lt(vi_add(vi_set1(i), vi_iota()), vi_set1(b->k));
        vf_store(m->offset + i, vf_select(inside, metric_offsets(d, m->metric, t, BUCKET), vf_set1(INFINITY)));
    }
}

/* y = root x, root upper triangular; each a chain in ascending order. */
PLLM_INLINE void apply_root(const int d, const float *root, const vf *x, vf *y)
{
    for (int a = 0; a < d; a++) {
        y[a] = vf_mul(vf_set1(root[a * d + a]), x[a]);
        for (int b = a + 1; b < d; b++)
            y[a] = vf_fma(vf_set1(root[a * d + b]), x[b], y[a]);
    }
}

/* Stores VF_WIDTH boxes, low and high (d). */
PLLM_INLINE void store_boxes(const int d, const vf *low, const vf *high, float *box)
{
    for (int a = 0; a < d; a++, box += 2 * VF_WIDTH) {
        vf_store(box, low[a]);
        vf_store(box + VF_WIDTH, high[a]);
    }
}

PLLM_INLINE void set_boxes(const int d, const pllm_buckets *b, pllm_metric *m)
{
    vf low[PLLM_MAX_SUBVECTOR], high[PLLM_MAX_SUBVECTOR];
    for (int a = 0; a < d; a++) { /* rows that do not exist are infinitely far */
        low[a] = vf_set1(INFINITY);
        high[a] = vf_set1(-INFINITY);
    }
    if (b->count / VF_WIDTH % VF_WIDTH)
        store_boxes(d, low, high, m->row + (ptrdiff_t)(b->count / VF_WIDTH / VF_WIDTH) * 2 * d * VF_WIDTH);
    for (int row = 0; row < b->count / VF_WIDTH; row++) {
        for (int a = 0; a < d; a++) {
            low[a] = vf_set1(INFINITY);
            high[a] = vf_set1(-INFINITY);
        }
        for (int i = 0; i < BUCKET; i++) {
            vf t[PLLM_MAX_SUBVECTOR], y[PLLM_MAX_SUBVECTOR];
            for (int a = 0; a < d; a++)
                t[a] = vf_load(b->across + (ptrdiff_t)(i * d + a) * b->count + row * VF_WIDTH);
            apply_root(d, m->root, t, y);
            for (int a = 0; a < d; a++) {
                low[a] = vf_min(y[a], low[a]);
                high[a] = vf_max(y[a], high[a]);
            }
        }
        store_boxes(d, low, high, m->box + (ptrdiff_t)row * 2 * d * VF_WIDTH);
        float *const around = m->row + (ptrdiff_t)(row / VF_WIDTH) * 2 * d * VF_WIDTH + row % VF_WIDTH;
        for (int a = 0; a < d; a++) {
            around[2 * a * VF_WIDTH] = vf_lowest(low[a]);
            around[(2 * a + 1) * VF_WIDTH] = -vf_lowest(vf_neg(high[a]));
        }
    }
}

void PLLM_SYM(pllm_metric_set)(pllm_metric *m, const pllm_buckets *b, const float *metric)
{
    const int d = b->d;
    float sum = 0.0f;
    memcpy(m->metric, metric, (size_t)(d * d) * sizeof *metric);
    m->reach = 0.0f;
    for (int a = 0; a < d; a++) {
        m->size[a] = sqrtf(metric[a * d + a]);
        m->reach += m->size[a] * b->largest[a];
        sum += b->largest[a];
    }
    m->slack = METRIC_SLACK(d);
    PLLM_CONSTANT_D(set_offsets, d, b, m);
    if (factor(metric, d, m->root) && sum <= METRIC_LARGE) {
        PLLM_CONSTANT_D(set_boxes, d, b, m);
    } else { /* nothing is skipped */
        m->slack = INFINITY;
        memset(m->root, 0, sizeof m->root);
        memset(m->box, 0, metric_box_floats(b->k, d) * sizeof *m->box);
    }
}

/* ---- search ------------------------------------------------------------------------------------- */

/* Scratch of one call. */
typedef struct {
    float *linear, *rooted; /* (d, QUERIES) Mq, Rq */
    float *reach, *limit;   /* (QUERIES) a bound is compared with reach + twice the score of some codeword */
    float *score;           /* (QUERIES, BUCKET) the lowest so far of each place in a bucket, */
    int32_t *number;        /* (QUERIES, BUCKET) and its lowest index */
    int32_t *rows, *near;   /* (QUERIES rows or buckets + VF_WIDTH) TASK(query, row or bucket), query by query */
} memory;

#define TASK(query, which) ((query) << 16 | (which))
#define TASK_QUERY(task) ((task) >> 16)
#define TASK_WHICH(task) ((task) & 0xffff)

static memory memory_of(const pllm_buckets *b, float *scratch)
{
    const ptrdiff_t queries = (ptrdiff_t)b->d * QUERIES, lanes = QUERIES * BUCKET;
    float *const next = scratch + 2 * queries;
    int32_t *const ints = (int32_t *)(void *)(next + 2 * QUERIES + lanes);
    return (memory){.linear = scratch, .rooted = scratch + queries, .reach = next, .limit = next + QUERIES,
                    .score = next + 2 * QUERIES, .number = ints, .rows = ints + lanes,
                    .near = ints + lanes + QUERIES * metric_rows(b->k) + VF_WIDTH};
}

PLLM_INLINE void load_queries(const int d, const pllm_metric *m, const float *q, const memory *s)
{
    for (int r = 0; r < QUERIES; r += VF_WIDTH) {
        vf x[PLLM_MAX_SUBVECTOR], y[PLLM_MAX_SUBVECTOR];
        vf square = vf_zero(), size = vf_set1(m->reach);
        for (int a = 0; a < d; a++) {
            x[a] = vf_load(q + a * QUERIES + r);
            size = vf_fma(vf_set1(m->size[a]), vf_abs(x[a]), size);
        }
        metric_apply(d, m->metric, x, y);
        for (int a = 0; a < d; a++)
            vf_store(s->linear + a * QUERIES + r, y[a]);
        apply_root(d, m->root, x, y);
        for (int a = 0; a < d; a++) {
            vf_store(s->rooted + a * QUERIES + r, y[a]);
            square = vf_fma(y[a], y[a], square);
        }
        const vf slack = vf_fma(vf_mul(vf_set1(m->slack), size), size, vf_set1(METRIC_TINY));
        vf_store(s->reach + r, vf_add(square, slack));
    }
    for (int i = 0; i < QUERIES * BUCKET; i += VF_WIDTH) {
        vf_store(s->score + i, vf_set1(INFINITY));
        vi_store(s->number + i, vi_set1(INT32_MAX));
    }
}

/* A query in all lanes, from (d, QUERIES). */
PLLM_INLINE void load_query(const int d, const float *from, int r, vf *x)
{
    for (int a = 0; a < d; a++)
        x[a] = vf_set1(from[a * QUERIES + r]);
}

/* How far x is from VF_WIDTH boxes, squared. */
PLLM_INLINE vf bounds(const int d, const vf *x, const float *box)
{
    vf bound = vf_zero();
    for (int a = 0; a < d; a++, box += 2 * VF_WIDTH) {
        const vf gap = vf_sub(x[a], vf_min(vf_max(x[a], vf_load(box)), vf_load(box + VF_WIDTH)));
        bound = vf_fma(gap, gap, bound);
    }
    return bound;
}

PLLM_INLINE const float *boxes_of(const int d, const float *box, int first)
{
    return box + (ptrdiff_t)first * 2 * d;
}

/* One of the first `count` boxes, or of what fills up their last vector, that is nearest to x. */
PLLM_INLINE int nearest_box(const int d, const vf *x, const float *box, int count)
{
    vf low = vf_set1(INFINITY);
    vi first = vi_set1(0);
    for (int i = 0; i < count; i += VF_WIDTH) {
        const vf bound = bounds(d, x, boxes_of(d, box, i));
        first = vi_select(vf_lt(bound, low), vi_set1(i), first);
        low = vf_min(bound, low); /* NaN leaves it as it is */
    }
    int32_t at[VF_WIDTH];
    vi_store(at, vi_add(first, vi_iota()));
    return at[__builtin_ctz(vm_bits(vf_eq(low, vf_set1(vf_lowest(low)))))];
}

/* The scores of VF_WIDTH codewords of a bucket from `at` on. */
PLLM_INLINE vf scores(const int d, const pllm_metric *m, const pllm_buckets *b, int bucket, int at, const vf *y)
{
    const float *const t = b->negated + (ptrdiff_t)bucket * d * BUCKET + at;
    vf score = vf_load(m->offset + bucket * BUCKET + at);
    for (int a = 0; a < d; a++)
        score = vf_fma(y[a], vf_load(t + a * BUCKET), score);
    return score;
}

/* Limits by the best of a bucket near each query. */
PLLM_INLINE void set_limits(const int d, const pllm_metric *m, const pllm_buckets *b, const memory *s)
{
    const int rows = b->count / VF_WIDTH;
    for (int r = 0; r < QUERIES; r++) {
        vf x[PLLM_MAX_SUBVECTOR], y[PLLM_MAX_SUBVECTOR], low = vf_set1(INFINITY);
        load_query(d, s->rooted, r, x);
        load_query(d, s->linear, r, y);
        const int row = (int)smaller(nearest_box(d, x, m->row, rows), rows - 1), first = row * VF_WIDTH;
        const int bucket = first + nearest_box(d, x, boxes_of(d, m->box, first), VF_WIDTH);
        for (int i = 0; i < BUCKET; i += VF_WIDTH)
            low = vf_min(scores(d, m, b, bucket, i, y), low);
        s->limit[r] = fmaf(2.0f, vf_lowest(low), s->reach[r]);
    }
}

/* Limits by codewords that may be near. */
PLLM_INLINE void set_limits_of(const int d, const pllm_metric *m, const pllm_buckets *b, const int32_t *guess,
                               const memory *s)
{
    for (int r = 0; r < QUERIES; r += VF_WIDTH) {
        int32_t place[VF_WIDTH];
        for (int i = 0; i < VF_WIDTH; i++)
            place[i] = b->where[guess[r + i]];
        const vi at = vi_load(place), member = vi_and(at, vi_set1(BUCKET - 1));
        const vi first = vi_add(vi_mul(vi_sub(at, member), vi_set1(d)), member);
        vf score = vf_gather(m->offset, at);
        for (int a = 0; a < d; a++)
            score = vf_fma(vf_load(s->linear + a * QUERIES + r), vf_gather(b->negated + a * BUCKET, first), score);
        vf_store(s->limit + r, vf_fma(vf_set1(2.0f), score, vf_load(s->reach + r)));
    }
}

/* tasks = for query r, those of VF_WIDTH boxes from `first` on that are not above its limit; returns how many. */
PLLM_INLINE int add_tasks(const int d, const float *box, int first, int r, const memory *s, int32_t *tasks)
{
    vf x[PLLM_MAX_SUBVECTOR];
    load_query(d, s->rooted, r, x);
    const vm above = vf_lt(vf_set1(s->limit[r]), bounds(d, x, boxes_of(d, box, first)));
    return vi_compress(tasks, vi_add(vi_set1(TASK(r, first)), vi_iota()), vm_not(above));
}

/* s->near: every query's buckets that may hold something better; returns how many. */
PLLM_INLINE int find_near(const int d, const pllm_metric *m, const pllm_buckets *b, const memory *s)
{
    const int rows = b->count / VF_WIDTH;
    int near_rows = 0, near = 0;
    for (int r = 0; r < QUERIES; r++)
        for (int i = 0; i < rows; i += VF_WIDTH)
            near_rows += add_tasks(d, m->row, i, r, s, s->rows + near_rows);
    for (int i = 0; i < near_rows; i++) {
        const int row = TASK_WHICH(s->rows[i]);
        if (row < rows)
            near += add_tasks(d, m->box, row * VF_WIDTH, TASK_QUERY(s->rows[i]), s, s->near + near);
    }
    return near;
}

/* Searches a bucket for a query. */
PLLM_INLINE void search_bucket(const int d, const pllm_metric *m, const pllm_buckets *b, int32_t task, const memory *s)
{
    const int r = TASK_QUERY(task), bucket = TASK_WHICH(task);
    vf y[PLLM_MAX_SUBVECTOR];
    load_query(d, s->linear, r, y);
    PLLM_UNROLL
    for (int i = 0; i < BUCKET; i += VF_WIDTH) {
        const vf score = scores(d, m, b, bucket, i, y), best = vf_load(s->score + r * BUCKET + i);
        const vi number = vi_load(b->number + bucket * BUCKET + i), old = vi_load(s->number + r * BUCKET + i);
        const vm lower = vm_and(vf_eq(score, best), vi_lt(number, old));
        vi_store(s->number + r * BUCKET + i, vi_select(vm_or(vf_lt(score, best), lower), number, old));
        vf_store(s->score + r * BUCKET + i, vf_min(score, best)); /* a NaN score leaves it as it is */
    }
}

/* The lowest index of the lowest score of query r. */
static int32_t lowest_index(int r, const memory *s)
{
    const float *const score = s->score + r * BUCKET;
    const int32_t *const number = s->number + r * BUCKET;
    vf low = vf_load(score);
    PLLM_UNROLL
    for (int i = VF_WIDTH; i < BUCKET; i += VF_WIDTH)
        low = vf_min(low, vf_load(score + i));
    const vf lowest = vf_set1(vf_lowest(low));
    int32_t index = INT32_MAX;
    PLLM_UNROLL
    for (int i = 0; i < BUCKET; i += VF_WIDTH)
        for (unsigned equal = vm_bits(vf_eq(vf_load(score + i), lowest)); equal; equal &= equal - 1)
            index = (int32_t)smaller(index, number[i + __builtin_ctz(equal)]);
    return index;
}

PLLM_INLINE void search(const int d, const pllm_metric *m, const pllm_buckets *b, const float *q, const int32_t *guess,
                        int32_t *index, const memory *s)
{
    load_queries(d, m, q, s);
    if (guess)
        set_limits_of(d, m, b, guess, s);
    else
        set_limits(d, m, b, s);
    const int near = find_near(d, m, b, s);
    for (int i = 0; i < near; i++)
        search_bucket(d, m, b, s->near[i], s);
    for (int r = 0; r < QUERIES; r++) {
        const int32_t found = lowest_index(r, s);
        index[r] = found < b->k ? found : 0;
    }
}

void PLLM_SYM(pllm_metric_search)(const pllm_metric *m, const pllm_buckets *b, const float *q, const int32_t *guess,
                                  int32_t *index, float *scratch)
{
    const memory s = memory_of(b, scratch);
    PLLM_CONSTANT_D(search, b->d, m, b, q, guess, index, &s);
}
