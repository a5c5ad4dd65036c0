// hip_fp16.h: half precision for kernels on the CPU; see hip_runtime.h.
#pragma once
#include <hip/hip_runtime.h>

struct __half {
    _Float16 v;
};
inline float __half2float(__half h) { return h.v; }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
