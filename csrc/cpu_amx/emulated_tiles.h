// The tile instructions in plain C++, for tests of the kernels on processors without them. As Intel's manual has it:
// sums of even and of odd numbers apart, each product added with one rounding to the nearest, subnormal numbers taken
// and given as zeros.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace ftfast {
namespace FTFAST_INSTRUCTION_SET {
namespace {

constexpr int emulated_rows = 16, emulated_columns = 16;

struct EmulatedTile {
  uint32_t words[emulated_rows][emulated_columns];
};

struct EmulatedTiles {
  EmulatedTile tiles[8];
  bool configured = false;
};
thread_local EmulatedTiles emulated;

// The instructions are illegal before a thread has set its tiles up.
EmulatedTile& emulated_tile(int tile) {
  if (!emulated.configured) std::abort();
  return emulated.tiles[tile];
}

void tile_configure(const void* configuration) {
  unsigned char bytes[64];
  std::memcpy(bytes, configuration, sizeof bytes);
  if (bytes[0] != 1) std::abort();
  for (int tile = 0; tile < 8; ++tile)
    if (bytes[16 + 2 * tile] != 4 * emulated_columns || bytes[17 + 2 * tile] || bytes[48 + tile] != emulated_rows) std::abort();
  emulated = {};
  emulated.configured = true;
}

void tile_release() { emulated = {}; }

void tile_zero(int tile) { emulated_tile(tile) = {}; }

void tile_load(int tile, const void* from, int64_t stride) {
  EmulatedTile& to = emulated_tile(tile);
  for (int row = 0; row < emulated_rows; ++row)
    std::memcpy(to.words[row], static_cast<const char*>(from) + row * stride, sizeof to.words[row]);
}

void tile_store(int tile, void* to, int64_t stride) {
  const EmulatedTile& from = emulated_tile(tile);
  for (int row = 0; row < emulated_rows; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, from.words[row], sizeof from.words[row]);
}

inline float without_subnormal(uint32_t bits) {
  if (!(bits & 0x7f800000)) bits &= 0x80000000;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float without_subnormal(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return without_subnormal(bits);
}

void tile_add_products(int sums, int left, int right) {
  EmulatedTile& to = emulated_tile(sums);
  const EmulatedTile &a = emulated_tile(left), &b = emulated_tile(right);
  for (int row = 0; row < emulated_rows; ++row) {
    float even[emulated_columns] = {}, odd[emulated_columns] = {};
    for (int pair = 0; pair < emulated_columns; ++pair) {
      const float first = without_subnormal(a.words[row][pair] << 16);
      const float second = without_subnormal(a.words[row][pair] & 0xffff0000);
      // A product of two numbers of bfloat16 is exact in float32, so that only the sum rounds.
      for (int column = 0; column < emulated_columns; ++column) {
        const uint32_t word = b.words[pair][column];
        even[column] = without_subnormal(even[column] + first * without_subnormal(word << 16));
        odd[column] = without_subnormal(odd[column] + second * without_subnormal(word & 0xffff0000));
      }
    }
    for (int column = 0; column < emulated_columns; ++column) {
      const float added = without_subnormal(even[column] + odd[column]);
      const float sum = without_subnormal(without_subnormal(to.words[row][column]) + added);
      std::memcpy(&to.words[row][column], &sum, sizeof sum);
    }
  }
}

}  // namespace
}  // namespace FTFAST_INSTRUCTION_SET
}  // namespace ftfast
