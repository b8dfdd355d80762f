#include "read_rows.h"

#include <cerrno>
#include <fcntl.h>
#include <unistd.h>

namespace ftfast {

ReadFailure read_rows(const int32_t* descriptors, const int64_t* offsets, int64_t rows, int64_t row_bytes, char* out) {
#ifdef POSIX_FADV_WILLNEED
  // Advice alone: where it is not taken, the rows are read one after the other.
  for (int64_t i = 0; i < rows; ++i) posix_fadvise(descriptors[i], offsets[i], row_bytes, POSIX_FADV_WILLNEED);
#endif
  for (int64_t i = 0; i < rows; ++i) {
    int64_t done = 0;
    while (done < row_bytes) {
      const ssize_t count = pread(descriptors[i], out + i * row_bytes + done, row_bytes - done, offsets[i] + done);
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) return {i, count < 0 ? errno : 0};
      done += count;
    }
  }
  return {};
}

}  // namespace ftfast
