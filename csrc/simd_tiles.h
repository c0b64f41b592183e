/* simd_tiles.h - the tile registers of AMX: eight of them, each 16 rows of 64 bytes. Included by infer_tiles.h
 * only.
 *
 * By assembler: compilers' own functions need flags under which they might use tiles elsewhere, and gcc's hide from it
 * which memory is read. The numbers of registers are constants. With PLLM_SIMDE they are emulated. */
#ifndef PLLM_SIMD_TILES_H
#define PLLM_SIMD_TILES_H

#include "kernel.h"

enum { TILE_HEIGHT = 16, TILE_ROW_BYTES = 64, TILE_SIZE = TILE_HEIGHT * TILE_ROW_BYTES };

#ifdef PLLM_SIMDE
typedef union {
    uint8_t u8[16][64];
    int8_t i8[16][64];
    uint32_t u32[16][16];
} tile_register;
static _Thread_local tile_register tile_registers[8];

static inline void tiles_begin(void) {}
static inline void tiles_end(void) {}
static inline void tile_zero(int t) { memset(tile_registers + t, 0, sizeof *tile_registers); }
static inline void tile_load(int t, const void *p, ptrdiff_t stride)
{
    for (int r = 0; r < 16; r++)
        memcpy(tile_registers[t].u8[r], (const char *)p + r * stride, 64);
}
static inline void tile_store(int t, int32_t *p) { memcpy(p, tile_registers + t, sizeof *tile_registers); }
static inline void tile_dot(int sum, int a, int b, int is_signed)
{
    const tile_register *const w = tile_registers + a, *const x = tile_registers + b;
    for (int r = 0; r < 16; r++)
        for (int i = 0; i < 64; i++)
            for (int c = 0; c < 16; c++)
                tile_registers[sum].u32[r][c] +=
                    (uint32_t)(w->i8[r][i] * (is_signed ? x->i8[i / 4][c * 4 + i % 4] : x->u8[i / 4][c * 4 + i % 4]));
}
#define TILE_ZERO(t) tile_zero(t)
#define TILE_LOAD(t, p, stride) tile_load(t, p, stride)
#define TILE_STORE(t, p) tile_store(t, p)
#define TILE_DOT_SIGNED(sum, a, b) tile_dot(sum, a, b, 1)
#define TILE_DOT_UNSIGNED(sum, a, b) tile_dot(sum, a, b, 0)
#else
/* All tiles whole, for the calling thread; until tiles_end. */
static inline void tiles_begin(void)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        shape.row_bytes[t] = 64;
        shape.rows[t] = 16;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(shape));
}
static inline void tiles_end(void) { __asm__ volatile("tilerelease"); }

#define TILE_ZERO(t) __asm__ volatile("tilezero %%tmm" #t : :)
/* Tile t = 16 rows, `stride` bytes apart. */
#define TILE_LOAD(t, p, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t : : "r"(p), "r"((ptrdiff_t)(stride)) : "memory")
/* p (16, 16) int32 = tile t. */
#define TILE_STORE(t, p) \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" : : "r"(p), "r"((ptrdiff_t)64) : "memory")
/* sum (16, 16) += a (16, 64) b (64, 16), four values of each of b's columns side by side. Modulo 2^32. a is signed. */
#define TILE_DOT_SIGNED(sum, a, b) __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #sum : :)
#define TILE_DOT_UNSIGNED(sum, a, b) __asm__ volatile("tdpbsud %%tmm" #b ", %%tmm" #a ", %%tmm" #sum : :)
#endif

#endif
