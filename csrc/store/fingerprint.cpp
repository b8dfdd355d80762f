#include "fingerprint.h"

#include <cstring>

#include "share.h"

namespace ftfast {
namespace {

constexpr int64_t block_bytes = 32768;
constexpr int lanes = 8;  // as many as hide a multiplication's latency
constexpr uint64_t odd = 0x9E3779B97F4A7C15;

// For each word a permutation of all states, and for each state one of all words. Without the rotation the top bits
// of two words, which are signs of numbers, would cancel.
uint64_t step(uint64_t state, uint64_t word) {
  const uint64_t mixed = (state ^ word) * odd;
  return mixed << 29 | mixed >> 35;
}

uint64_t of_block(const char* data, int64_t bytes, uint64_t seed) {
  uint64_t states[lanes];
  for (int lane = 0; lane < lanes; ++lane) states[lane] = step(seed, uint64_t(lane));
  int64_t done = 0;
  for (; done + lanes * 8 <= bytes; done += lanes * 8) {
    uint64_t words[lanes];
    std::memcpy(words, data + done, sizeof words);
    for (int lane = 0; lane < lanes; ++lane) states[lane] = step(states[lane], words[lane]);
  }
  for (int lane = 0; done < bytes; ++lane, done += 8) {
    uint64_t word = 0;
    std::memcpy(&word, data + done, std::min<int64_t>(8, bytes - done));
    states[lane] = step(states[lane], word);
  }
  uint64_t state = uint64_t(bytes);
  for (const uint64_t of_lane : states) state = step(state, of_lane);
  return state;
}

}  // namespace

uint64_t fingerprint(const std::vector<Span>& spans, int threads) {
  std::vector<Span> blocks;
  int64_t bytes = 0;
  for (const Span& span : spans) {
    bytes += span.bytes;
    for (int64_t at = 0; at < span.bytes; at += block_bytes)
      blocks.push_back({span.data + at, std::min(block_bytes, span.bytes - at)});
  }
  std::vector<uint64_t> found(blocks.size());
  share(int64_t(blocks.size()), bytes, threads,
        [&](int64_t i) { found[i] = of_block(blocks[i].data, blocks[i].bytes, uint64_t(i)); });
  uint64_t state = uint64_t(spans.size());
  for (const uint64_t of_block : found) state = step(state, of_block);
  return state;
}

}  // namespace ftfast
