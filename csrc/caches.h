// What the processor's caches hold, for all kernels.
#pragma once

#include <cstdint>

namespace ftfast {

// From here on a result is written past the caches: measured faster from 6.4 MB, with a reader after it too, and slower
// up to 4.8 MB (2 cores with 1 MB of L2 each). float32 alone: 16 bits gain nothing, and lose where pages are new.
constexpr int64_t past_caches_bytes = int64_t(6) << 20;

// What stays in the first cache while it is walked over again: of 32 KB the smallest have, with room to spare.
constexpr int64_t first_cache_bytes = 32 << 10;

}  // namespace ftfast
