// Rows of files into one block of memory, all asked for before the first is waited for.
#pragma once

#include <cstdint>

namespace ftfast {

// The row that could not be read, -1 where all were, and why: errno, or 0 where the file ended before the row did.
struct ReadFailure {
  int64_t row = -1;
  int error = 0;
};

// Row i is the row_bytes from offsets[i] of descriptors[i]; rows lie in out one after the other.
ReadFailure read_rows(const int32_t* descriptors, const int64_t* offsets, int64_t rows, int64_t row_bytes, char* out);

}  // namespace ftfast
