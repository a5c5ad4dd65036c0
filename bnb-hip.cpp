// bnb-hip.cpp: the device backend for AMD GPUs: bnb-cuda.cu with HIP's names.
//
// Build: make HIP=1, or: hipcc -std=c++17 -O3 --offload-arch=gfx90a --offload-arch=gfx1030 -c bnb-hip.cpp, and bnb.c
//        with -DBNB_HIP; link with -lamdhip64. HIP 5.2 (Debian 12's hipcc) and later; one --offload-arch for each GPU.
// Tests: make hip-on-cpu runs these kernels on the CPU, in waves of 32 and of 64 lanes, by tests/hip-on-cpu.
// Not:   no matrix cores and no tuning: the plain kernels only. It has never run on an AMD GPU.
#include <hip/hip_fp16.h>
#include <hip/hip_runtime.h>

#define GPU(name) hip##name
#define GPU_NAME "hip"
#define GPU_TABLE bnb_hip_api
#define GPU_OUT_OF_MEMORY hipErrorOutOfMemory
#define GPU_PROPERTIES hipDeviceProp_t

#include "bnb-cuda.cu"
