// The tile instructions, and the one way in which all kernels here set tiles up.
#pragma once

#include <cstdint>

#if defined(FTFAST_EMULATED_TILES)
#include "emulated_tiles.h"
#else
#include <immintrin.h>
// Macros, since the compiler takes a tile's number as it stands in the text.
#define tile_configure(configuration) _tile_loadconfig(configuration)
#define tile_release() _tile_release()
#define tile_zero(tile) _tile_zero(tile)
#define tile_load(tile, from, stride) _tile_loadd(tile, from, stride)
#define tile_store(tile, to, stride) _tile_stored(tile, to, stride)
#define tile_add_products(sums, left, right) _tile_dpbf16ps(sums, left, right)
#endif

namespace ftfast {
namespace FTFAST_INSTRUCTION_SET {
namespace {

// What the instruction LDTILECFG reads: all eight tiles have 16 rows of 64 bytes. A constant, as compilers do not know
// that the whole of it is read.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfiguration) == 64);
constexpr TileConfiguration configuration;

void begin_tiles() { tile_configure(&configuration); }

// A thread without tiles in use has less to save when the kernel takes it off its core.
void end_tiles() { tile_release(); }

}  // namespace
}  // namespace FTFAST_INSTRUCTION_SET
}  // namespace ftfast
