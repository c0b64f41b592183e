/* test_trellis.c - encoding in trellis codes against a plain loop that follows the contract's order of operations: the
 * symbols must be the same on every instruction set and thread count. */
#include "check.h"

enum { STATES = 256, MOST_ROWS = 2 * PLLM_TRELLIS_SEGMENT };

typedef struct {
    int rows, columns, extra, threads;
    int fed;    /* with feedback */
    int coarse; /* few different targets and levels: many paths of the same cost */
} trellis_case;

/* What the encoder reads. */
typedef struct {
    float *x, *weight, *feedback, *factor, *level;
    uint8_t *bits;
} trellis_input;

static uint8_t subset_of[2 * STATES]; /* the parities of a window */

static void set_subsets(void)
{
    static const int taps[PLLM_TRELLIS_CODED] = PLLM_TRELLIS_TAPS;
    memset(subset_of, 0, sizeof subset_of);
    for (int window = 0; window < 2 * STATES; window++)
        for (int i = 0; i < PLLM_TRELLIS_CODED; i++)
            for (int bit = 0; bit <= PLLM_TRELLIS_MEMORY; bit++)
                subset_of[window] ^= (window & taps[i]) >> bit << i & 1 << i;
}

static float level_of(const float *table, int k, int index)
{
    const float *magnitude = table + pllm_trellis_magnitudes(k);
    const int count = 2 << k, rest = index % count;
    return index < count ? magnitude[rest] : -magnitude[count - 1 - rest];
}

/* The further bits of the level of a subset that is nearest to q; *square: of the distance. */
static int nearest_level(const float *table, int k, int subset, float q, float *square)
{
    int best = 0;
    for (int u = 0; u < 1 << (k - 1); u++) {
        const float error = q - level_of(table, k, subset | u << PLLM_TRELLIS_CODED), this = error * error;
        if (u == 0 || this < *square)
            *square = this, best = u;
    }
    return best;
}

/* One row of n: cost (STATES) and the states that the paths came from. */
static void advance(float *cost, const float metric[8], uint8_t *from)
{
    float next[STATES];
    for (int state = 0; state < STATES; state++) {
        const int lower = state >> 1, upper = lower + STATES / 2, bit = state & 1;
        const float first = cost[lower] + metric[subset_of[lower << 1 | bit]];
        const float second = cost[upper] + metric[subset_of[upper << 1 | bit]];
        next[state] = second < first ? second : first;
        from[state] = (uint8_t)(second < first ? upper : lower);
    }
    memcpy(cost, next, sizeof next);
}

static int cheapest(const float *cost)
{
    int best = 0;
    for (int state = 1; state < STATES; state++)
        if (cost[state] < cost[best])
            best = state;
    return best;
}

/* Symbols of a segment of a column, `stride` apart. bits: (n) of each row; value: what they stand for. */
static void encode_segment(const float *q, const float *weight, const int *bits, int n, const float *table,
                           uint8_t *symbol, int stride, float *value)
{
    static float metric[MOST_ROWS][8], cost[STATES];
    static uint8_t from[MOST_ROWS][STATES];
    const int overlap = n / 2 < PLLM_TRELLIS_OVERLAP ? n / 2 : PLLM_TRELLIS_OVERLAP;
    int start = 0, end;
    for (int r = 0; r < n; r++)
        for (int subset = 0; subset < 8; subset++) {
            nearest_level(table, bits[r], subset, q[r], &metric[r][subset]);
            metric[r][subset] = weight[r] * metric[r][subset];
        }
    if (n >= PLLM_TRELLIS_SHORT) {
        memset(cost, 0, sizeof cost);
        for (int r = n - overlap; r < n; r++)
            advance(cost, metric[r], from[r]);
        for (int r = 0; r < overlap; r++)
            advance(cost, metric[r], from[r]);
        start = cheapest(cost);
        for (int r = overlap - 1; r >= 0; r--)
            start = from[r][start];
    }
    for (int state = 0; state < STATES; state++)
        cost[state] = state == start ? 0.0f : INFINITY;
    for (int r = 0; r < n; r++)
        advance(cost, metric[r], from[r]);
    end = n >= PLLM_TRELLIS_SHORT ? start : cheapest(cost);
    for (int r = n - 1; r >= 0; r--) {
        float square;
        const int before = from[r][end], subset = subset_of[before << 1 | (end & 1)];
        const int further = nearest_level(table, bits[r], subset, q[r], &square);
        symbol[r * stride] = (uint8_t)((end & 1) | further << 1);
        value[r] = level_of(table, bits[r], subset | further << PLLM_TRELLIS_CODED);
        end = before;
    }
}

/* Column c. error: (columns, rows) of those before it; gets its own. */
static void encode_column(const trellis_case *c, const trellis_input *in, int column, float *error, uint8_t *symbol)
{
    const pllm_trellis code = {.extra = c->extra};
    const int k = in->bits[column];
    float *q = new_floats((size_t)c->rows), *value = new_floats((size_t)c->rows);
    int *bits = new_ints((size_t)c->rows);
    for (int r = 0; r < c->rows; r++) {
        float sum = 0.0f;
        for (int m = 0; m < column && c->fed; m++)
            sum = fmaf(error[m * c->rows + r], in->feedback[m * c->columns + column], sum);
        q[r] = (in->x[r * c->columns + column] + sum) / in->factor[column];
        bits[r] = k + pllm_trellis_more(&code, r);
        value[r] = 0.0f;
        symbol[r * c->columns + column] = 0;
    }
    for (int s = 0; s < (int)pllm_trellis_segments(c->rows) && k > 0; s++) {
        const int first = s * PLLM_TRELLIS_SEGMENT, is_last = s + 1 == (int)pllm_trellis_segments(c->rows);
        encode_segment(q + first, in->weight + first, bits + first, is_last ? c->rows - first : PLLM_TRELLIS_SEGMENT,
                       in->level, symbol + first * c->columns + column, c->columns, value + first);
    }
    for (int r = 0; r < c->rows; r++) {
        const float decoded = in->factor[column] * value[r];
        error[column * c->rows + r] = in->x[r * c->columns + column] - decoded;
    }
    free(q);
    free(value);
    free(bits);
}

static trellis_input make_input(const trellis_case *c)
{
    const size_t columns = (size_t)c->columns, rows = (size_t)c->rows;
    trellis_input in = {.x = new_normals(rows * columns), .weight = new_normals(rows),
                        .feedback = new_normals(columns * columns), .factor = new_normals(columns),
                        .level = new_normals(PLLM_TRELLIS_TABLE), .bits = new_bytes(columns)};
    for (size_t i = 0; i < PLLM_TRELLIS_TABLE; i++)
        in.level[i] = c->coarse ? rintf(in.level[i]) * 0.5f : in.level[i];
    for (size_t i = 0; i < rows * columns && c->coarse; i++)
        in.x[i] = rintf(in.x[i] * 2.0f) * 0.25f;
    for (size_t r = 0; r < rows; r++)
        in.weight[r] = c->coarse ? (float)(r % 3) : r % 11 == 5 ? 0.0f : fabsf(in.weight[r]);
    for (size_t i = 0; i < columns * columns; i++)
        in.feedback[i] /= 1.0f + 2.0f * sqrtf((float)c->columns);
    for (size_t i = 0; i < columns; i++) {
        in.factor[i] = c->coarse ? 1.0f : expf(0.3f * in.factor[i]);
        in.bits[i] = (uint8_t)((i * 5 + 3) % (c->extra ? PLLM_TRELLIS_BITS : PLLM_TRELLIS_BITS + 1));
    }
    return in;
}

static void free_input(trellis_input *in)
{
    free(in->x);
    free(in->weight);
    free(in->feedback);
    free(in->factor);
    free(in->level);
    free(in->bits);
}

static int encode(const pllm_kernels *k, const trellis_case *c, const trellis_input *in, uint8_t *symbol)
{
    return k->encode_trellis(in->x, c->rows, c->columns, in->weight, c->fed ? in->feedback : NULL, in->bits, c->extra,
                             in->factor, in->level, symbol, c->threads);
}

static void check_trellis(const pllm_kernels *k, trellis_case c)
{
    const size_t count = (size_t)c.rows * (size_t)c.columns;
    trellis_input in = make_input(&c);
    float *error = new_floats(count);
    uint8_t *symbol = new_bytes(count), *want = new_bytes(count);
    for (int column = 0; column < c.columns; column++)
        encode_column(&c, &in, column, error, want);
    const int status = encode(k, &c, &in, symbol);
    CHECK(status == PLLM_OK, "encode_trellis returned %d", status);
    size_t first = 0;
    while (first < count && symbol[first] == want[first])
        first++;
    CHECK(first == count, "%d rows of %d, extra %d, fed %d, coarse %d: symbol %d is %d, not %d", c.rows, c.columns,
          c.extra, c.fed, c.coarse, (int)first, symbol[first], want[first]);
    free_input(&in);
    free(error);
    free(symbol);
    free(want);
}

/* A target that is no number, or too large to be squared, gives symbols of so many bits, the same everywhere. */
static void check_strange_numbers(const pllm_kernels *k, float strange)
{
    const trellis_case c = {.rows = 90, .columns = 9, .extra = 1, .threads = 2, .fed = 1};
    trellis_input in = make_input(&c);
    uint8_t symbol[90 * 9], want[90 * 9];
    in.x[40 * 9 + 3] = strange;
    in.weight[41] = 0.0f;
    in.x[41 * 9 + 4] = 1.85e19f; /* some squares overflow */
    CHECK(encode(k, &c, &in, symbol) == PLLM_OK && encode(scalar_kernels(), &c, &in, want) == PLLM_OK, "status");
    for (int i = 0; i < c.rows * c.columns; i++)
        CHECK(symbol[i] >> (in.bits[i % 9] + (in.bits[i % 9] > 0)) == 0, "symbol %d is %d", i, symbol[i]);
    CHECK(same_bits(symbol, want, sizeof want), "symbols near %g differ from those of scalar", (double)strange);
    free_input(&in);
}

void test_trellis(const pllm_kernels *k);

void test_trellis(const pllm_kernels *k)
{
    static const int rows[] = {0, 1, 7, 15, 16, 17, 255, 256, 257, 511, 512, 520};
    static const int columns[] = {1, 2, 7, 63, 129};
    enum { ROWS = sizeof rows / sizeof *rows, COLUMNS = sizeof columns / sizeof *columns };
    set_subsets();
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLUMNS; j++) {
            if (columns[j] > 7 && (i + j) % 3) /* a third of the large ones */
                continue;
            const int turn = i + j;
            check_trellis(k, (trellis_case){rows[i], columns[j], turn % 4, turn % 2 ? 3 : 1, turn / 2 % 2, 0});
            check_trellis(k, (trellis_case){rows[i], columns[j], (turn + 1) % 4, turn % 2 ? 1 : 3, (turn / 2 + 1) % 2,
                                            turn % 3 == 0});
        }
    check_trellis(k, (trellis_case){513, 130, 1, 3, 1, 0});
    check_trellis(k, (trellis_case){70, 530, 2, 3, 1, 0}); /* more columns than a block has */
    check_trellis(k, (trellis_case){20, 257, 0, 2, 1, 0});
    check_trellis(k, (trellis_case){200, 20, 0, 1, 1, 1});
    check_trellis(k, (trellis_case){3, 0, 0, 1, 1, 0});
    check_strange_numbers(k, NAN);
    check_strange_numbers(k, INFINITY);
    check_strange_numbers(k, -1e30f);
}
