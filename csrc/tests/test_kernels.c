/* test_kernels.c - runs every family's checks on every instruction set this machine has. */
#include "check.h"

void test_coded(const pllm_kernels *k);
void test_feedback(const pllm_kernels *k);
void test_infer(const pllm_kernels *k);
void test_layer(const pllm_kernels *k);
void test_pack(const pllm_kernels *k);
void test_rounded(const pllm_kernels *k);
void test_search(const pllm_kernels *k);
void test_simd(const pllm_kernels *k);
void test_training(const pllm_kernels *k);
void test_tree(const pllm_kernels *k);
void test_trellis(const pllm_kernels *k);

static const struct {
    const char *name;
    void (*run)(const pllm_kernels *k);
} families[] = {
    {"coded", test_coded},
    {"feedback", test_feedback},
    {"infer", test_infer},
    {"layer", test_layer},
    {"pack", test_pack},
    {"rounded", test_rounded},
    {"search", test_search},
    {"simd", test_simd},
    {"training", test_training},
    {"tree", test_tree},
    {"trellis", test_trellis},
};

long check_count, check_failures;
const char *check_isa = "";

static uint64_t random_state;

uint32_t random_bits(void)
{
    random_state = random_state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(random_state >> 32);
}

float random_normal(void)
{
    float sum = 0.0f;
    for (int i = 0; i < 12; i++)
        sum += (float)(random_bits() >> 8) * 0x1p-24f;
    return sum - 6.0f;
}

void *new_bytes(size_t count)
{
    void *p = malloc(count ? count : 1);
    if (!p) {
        puts("out of memory");
        exit(2);
    }
    return p;
}

float *new_floats(size_t count) { return new_bytes(count * sizeof(float)); }

int32_t *new_ints(size_t count) { return new_bytes(count * sizeof(int32_t)); }

float *new_normals(size_t count)
{
    float *p = new_floats(count);
    for (size_t i = 0; i < count; i++)
        p[i] = random_normal();
    return p;
}

int same_bits(const void *a, const void *b, size_t bytes)
{
    return bytes == 0 || memcmp(a, b, bytes) == 0;
}

/* The largest of n values less than `reach` away from a place. */
static double peak_around(const double *value, int n, int at, int reach)
{
    double peak = 0.0;
    for (int i = at < reach ? 0 : at - reach + 1; i < n && i < at + reach; i++)
        peak = value[i] > peak ? value[i] : peak;
    return peak;
}

void rounding_steps(const double *size, int n, int bytes, double *step)
{
    for (int i = 0; i < n; i++)
        step[i] = peak_around(size, n, i, 512) / 65000.0 + (bytes ? peak_around(size, n, i, 32) / 253.0 : 0.0);
}

const pllm_kernels *scalar_kernels(void) { return pllm_isa_at(0); }

/* AMX differs from AVX-512 in products alone. */
static int is_tested(const char *isa, const char *family)
{
    return strcmp(isa, "amx") != 0 || strcmp(family, "infer") == 0 || strcmp(family, "coded") == 0;
}

/* Usage: test_kernels [family] [seed] [instruction sets] */
int main(int argc, char **argv)
{
    const char *only = argc > 1 && *argv[1] ? argv[1] : NULL;
    const char *only_isas = argc > 3 && *argv[3] ? argv[3] : NULL;
    const uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    printf("seed %llu\n", (unsigned long long)seed);
    for (int i = 0; i < pllm_isa_count(); i++) {
        const pllm_kernels *k = pllm_isa_at(i);
        check_isa = pllm_isa_name_at(i);
        if (only_isas && !strstr(only_isas, check_isa))
            continue;
        if (!k) {
            printf("%-8s not on this machine\n", check_isa);
            continue;
        }
        for (size_t f = 0; f < sizeof families / sizeof *families; f++) {
            if ((only && strcmp(only, families[f].name) != 0) || !is_tested(check_isa, families[f].name))
                continue;
            long before = check_count, failed = check_failures;
            random_state = seed;
            families[f].run(k);
            printf("%-8s %-10s %ld checks, %ld failed\n", check_isa, families[f].name,
                   check_count - before, check_failures - failed);
            fflush(stdout);
        }
    }
    if (check_count == 0) {
        puts("FAILED: nothing was checked");
        return 1;
    }
    return check_failures != 0;
}
