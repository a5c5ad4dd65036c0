// check.h: what fuzz targets share: reading so that it is not optimized away, and promises whose breach ends the
// process.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../../bnb.h"

namespace fuzz {

inline volatile uint64_t sink;

inline void touch(const void *p, uint64_t n) {
    for (uint64_t i = 0; i < n; i++) sink = sink + static_cast<const uint8_t *>(p)[i];
}

inline void require(bool ok, const char *what) {
    if (ok) return;
    std::fprintf(stderr, "fuzz: %s\n", what);
    std::abort();
}

inline void require_sentence(const bnb_error &err) {
    require(err.code < 0 && err.msg[0] && !std::strchr(err.msg, '\n'),
            "what is refused is not refused with a sentence");
}

} // namespace fuzz
