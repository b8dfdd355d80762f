// Intel's matrix tiles (AMX): a processor may have them, and Linux gives them to those processes that ask.
#pragma once

namespace ftfast {

// Empty where this process may use them, for bfloat16; else why it may not, in words for users. Asked once.
const char* why_no_tiles();

// Asks Linux, whatever the processor: empty, or why not.
const char* request_tiles();

}  // namespace ftfast
