/* check.h - a few lines of test harness for the C API alone.
 *
 * One file a kernel family: define `void test_<family>(const pllm_kernels *k)`, which compares k with
 * the scalar kernels (`scalar_kernels()`) or with a plain loop, and name the family in test_kernels.c.
 * Allocate every array with new_floats and friends at its exact size, so that the sanitizers see the
 * first byte read or written behind it.
 */
#ifndef PLLM_CHECK_H
#define PLLM_CHECK_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../pllm.h"

/* Prints and counts a failure; goes on. CHECK(a == b, "n %d: %d is not %d", n, a, b) */
#define CHECK(condition, ...) \
    do { \
        check_count++; \
        if (!(condition) && check_failures++ < 20) { \
            printf("FAILED %s:%d [%s]: ", __FILE__, __LINE__, check_isa); \
            printf(__VA_ARGS__); \
            putchar('\n'); \
        } \
    } while (0)

extern long check_count, check_failures;
extern const char *check_isa; /* the instruction set under test */

/* Sizes at which vector code goes wrong. */
static const int awkward_sizes[] = {0, 1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 513, 1021};
enum { AWKWARD_SIZES = (int)(sizeof awkward_sizes / sizeof *awkward_sizes) };

const pllm_kernels *scalar_kernels(void);

/* Random numbers, the same on every machine. */
uint32_t random_bits(void);
float random_normal(void); /* about N(0, 1) */

/* Arrays of exactly `count` values; abort when there is no memory. Release with free(). */
void *new_bytes(size_t count);
float *new_floats(size_t count);
float *new_normals(size_t count);
int32_t *new_ints(size_t count);

/* Do two arrays hold the same bits? */
int same_bits(const void *a, const void *b, size_t bytes);

/* step (n) = how far activations of these magnitudes, in the order in which they are multiplied, move when they become
 * integers: half a step of their span's int16 and, as bytes, of their block's, whose multiplier is rounded up to a whole
 * one. */
void rounding_steps(const double *size, int n, int bytes, double *step);

#endif
