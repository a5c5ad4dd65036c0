// hip_fp16.h: half precision for kernels on the CPU; see hip_runtime.h.
#pragma once
#include <hip/hip_runtime.h>

#include <cstring>

struct __half {
    _Float16 v;
};
inline float __half2float(__half h) { return h.v; }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline unsigned short __half_as_ushort(__half h) {
    unsigned short bits;
    std::memcpy(&bits, &h, sizeof bits);
    return bits;
}
