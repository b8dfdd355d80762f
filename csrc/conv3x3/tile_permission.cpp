#include "tile_permission.h"

#include <cerrno>
#include <cstdio>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ftfast {

#if defined(__x86_64__) && defined(__linux__)
static bool processor_has_tiles() {
  unsigned a, b, c, d;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & amx_bf16) && (d & amx_tile);
}

const char* request_tiles() {
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, request_permission, tile_data) == 0) return "";
  static char reason[160];
  std::snprintf(reason, sizeof reason, "Linux does not give them to this process: %s", std::strerror(errno));
  return reason;
}

const char* why_no_tiles() {
  static const char* const reason = processor_has_tiles() ? request_tiles() : "the processor has none";
  return reason;
}
#else
const char* request_tiles() { return "they are asked for on x86 and Linux alone"; }
const char* why_no_tiles() { return request_tiles(); }
#endif

}  // namespace ftfast
