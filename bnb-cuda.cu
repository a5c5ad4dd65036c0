// bnb-cuda.cu: every GPU kernel and the device backend, written once in vendor-neutral names.
//
// Build: make CUDA=1, or: nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -c bnb-cuda.cu, and bnb.c with
//        -DBNB_CUDA. Needs the CUDA toolkit alone. bnb-hip.cpp defines the names of [CONF] for AMD and includes this file.
// Parts: [CONF]  names and what the vendors do differently     [PLAN]    fusion, the choice of kernels
//        [DEV]   memory, copies, errors                        [RUN]     captured graphs
//        [DEVICE] what kernels share                           [WEIGHTS] layouts, upload, download
//        [PLAIN] kernels for every GPU, the reference          [API]     the table that bnb.c asks for
//        [PTX] [TILE4] [TILE8] [DENSE] NVIDIA only: instructions, tensor-core kernels for 4-bit and f16 weights, for
//        int8 and attention, cuBLASLt
// Not:   no host round trip within a run: what changes per token is input data, checked by the kernels that follow it.
//        No managed memory, one stream, no device code that depends on the wave size. Tensor-core kernels need sm_80; those
//        in Hopper's own instructions sm_90a. Other GPUs run the plain ones.
#ifndef GPU
#include <cublasLt.h>
#include <cuda.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#define GPU(name) cuda##name
#define GPU_NAME "cuda"
#define GPU_TABLE bnb_cuda_api
#define GPU_OUT_OF_MEMORY cudaErrorMemoryAllocation
#define GPU_PROPERTIES cudaDeviceProp
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "bnb.h"

namespace {

using error_t = GPU(Error_t);
using stream_t = GPU(Stream_t);

/* ==== [CONF] ====================================================================================================
 * Where the vendors differ. Shuffles name their width, so that groups of 32 lanes work on waves of 64 as well. */

#ifdef __CUDACC__
template <class T> __device__ T lane_xor(T v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask, 32); }
error_t host_alloc(void **p, size_t bytes) { return cudaHostAlloc(p, bytes, cudaHostAllocDefault); }
error_t host_free(void *p) { return cudaFreeHost(p); }
error_t graph_instantiate(cudaGraphExec_t *e, cudaGraph_t g) { return cudaGraphInstantiate(e, g, 0); }
bool has_code(int) { return true; } // what is newer than the newest code has it translated by the driver
error_t load_tables() { return cudaSuccess; }

__device__ float mul_add(float a, float b, float c) { return __fadd_rn(__fmul_rn(a, b), c); } // two roundings
__device__ float reciprocal(float x) { // as in bitsandbytes' kernels
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// Programmatic dependent launch: a kernel's blocks may start while the one before still runs, fetch what does not depend
// on it, and wait here for its end. Every kernel of this file waits, so that "the one before" covers all before.
__device__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
#endif
}

// One stream and the first thing that went wrong on it.
struct Queue {
    stream_t stream = nullptr;
    bool overlap = false; // programmatic dependent launch
    error_t status = cudaSuccess;
    void note(error_t e) {
        if (status == cudaSuccess) status = e;
    }
    template <class... P, class... A> void launch(void (*kernel)(P...), dim3 grid, dim3 block, A... args) {
        cudaLaunchConfig_t c = {};
        cudaLaunchAttribute early;
        early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early.val.programmaticStreamSerializationAllowed = 1;
        c.gridDim = grid;
        c.blockDim = block;
        c.stream = stream;
        c.attrs = &early;
        c.numAttrs = overlap;
        if (status == cudaSuccess) note(cudaLaunchKernelEx(&c, kernel, P(args)...));
    }
};
#else
template <class T> __device__ T lane_xor(T v, int mask) { return __shfl_xor(v, mask, 32); }
error_t host_alloc(void **p, size_t bytes) { return hipHostMalloc(p, bytes, hipHostMallocDefault); }
error_t host_free(void *p) { return hipHostFree(p); }
error_t graph_instantiate(hipGraphExec_t *e, hipGraph_t g) { return hipGraphInstantiate(e, g, nullptr, nullptr, 0); }

// HIP lists devices for which the program has no code, such as a processor's own graphics.
__global__ void probe_kernel() {}
bool has_code(int index) {
    int before = 0;
    error_t e = hipGetDevice(&before);
    if (e == hipSuccess) e = hipSetDevice(index);
    if (e == hipSuccess) {
        hipLaunchKernelGGL(probe_kernel, dim3(1), dim3(1), 0, nullptr);
        e = hipGetLastError();
    }
    if (e == hipSuccess) e = hipStreamSynchronize(nullptr);
    (void)hipGetLastError();
    (void)hipSetDevice(before);
    return e == hipSuccess;
}

__constant__ uint64_t rcp_fix[32];
error_t load_tables() {
    return hipMemcpyToSymbol(HIP_SYMBOL(rcp_fix), bnb_rcp_fix, sizeof rcp_fix, 0, hipMemcpyHostToDevice);
}

__device__ float mul_add(float a, float b, float c) { // two roundings: HIP's __fmul_rn and __fadd_rn may become one fma
#ifdef __clang__
#pragma clang fp contract(off)
#endif
    return a * b + c;
}
__device__ float reciprocal(float x) { // NVIDIA's for x of f16's precision: the quotient or, by a table, its neighbour
    unsigned m = __float_as_uint(x) & 0x7fffff, i = m >> 13, k = m & 0x1fff ? 0 : rcp_fix[i / 32] >> (2 * (i % 32)) & 3;
    return __uint_as_float(__float_as_uint(1.0f / x) + (k == 1 ? 1u : k == 2 ? ~0u : 0u));
}
__device__ void wait_for_previous() {}

struct Queue {
    stream_t stream = nullptr;
    bool overlap = false;
    error_t status = hipSuccess;
    void note(error_t e) {
        if (status == hipSuccess) status = e;
    }
    template <class... P, class... A> void launch(void (*kernel)(P...), dim3 grid, dim3 block, A... args) {
        if (status != hipSuccess) return;
        hipLaunchKernelGGL(kernel, grid, block, 0, stream, P(args)...);
        note(hipGetLastError());
    }
};
#endif

/* ==== [DEV] ===================================================================================================== */

constexpr uint64_t STAGING_BYTES = 8 << 20, COPY_CHUNK = 1 << 20, ALIGN = 256;

uint64_t align_up(uint64_t n) { return (n + ALIGN - 1) / ALIGN * ALIGN; }

// bnb_tensor.layout of weights here
enum {
    LAYOUT_NUMBERS = 1, // vectors: plane 0 f32, plane 1 f16
    LAYOUT_PLANES,      // canonical, each plane aligned
    LAYOUT_TILE4        // plane 0: tile4 units with the absmax in them; double-quantized: planes 1 to 3 as well, for the way back
};

struct Device {
    bnb_env *env;
    int index;   // "cuda:index"
    int ordinal; // the runtime's number of it
    Queue queue;
    char *staging[2] = {};               // pinned, [STAGING_BYTES]: what crosses the bus goes through one or the other
    GPU(Event_t) staged[2] = {};         // the copy out of staging[i] is done
    char *fetched = nullptr;             // pinned, [BNB_FETCH_SLOTS][BNB_FETCH_BYTES]
    GPU(Event_t) fetch_done[BNB_FETCH_SLOTS] = {};
    const float *maps = nullptr;         // on the device: code -> value of nf4 [16], fp4 [16]
    int *fault = nullptr;                // pinned: 1 + the node that met an index outside its table; 0: none
    char *unpacked = nullptr;            // weights in their canonical layout, on the way to the kernels' own
    uint64_t unpacked_bytes = 0;
    uint64_t bytes = 0, bytes_peak = 0;  // allocated on the device
    struct DenseLibrary *dense = nullptr;
    int n_sm = 0, major = 0, minor = 0;
    int max_shared = 0; // bytes of shared memory that a block may have
    bool tiles = false; // Hopper's code runs here: the kernels of [TILE4] and those after it
    bool mma = false;   // mma.sync, ldmatrix, cp.async: sm_80 and later, with code for it
    char description[128] = "";
};

// Work of this thread goes to the device while this lives; the caller's own choice comes back afterwards.
struct Use {
    int before = 0;
    explicit Use(const Device &d) {
        (void)GPU(GetDevice)(&before);
        if (before != d.ordinal) (void)GPU(SetDevice)(d.ordinal);
    }
    ~Use() { (void)GPU(SetDevice)(before); }
};

bnb_status device_failed(const Device &d, bnb_error *err, error_t e, const char *doing) {
    (void)GPU(GetLastError)(); // the next call starts clean
    return bnb_fail(err, e == GPU_OUT_OF_MEMORY ? BNB_E_NOMEM : BNB_E_DEVICE, "%s:%d: %s failed: %s", GPU_NAME, d.index, doing,
                    GPU(GetErrorString)(e));
}

// Reports and forgets what went wrong on the queue.
bnb_status queue_status(Device &d, bnb_error *err, const char *doing) {
    error_t e = d.queue.status;
    d.queue.status = GPU(Success);
    return e == GPU(Success) ? BNB_OK : device_failed(d, err, e, doing);
}

// After waiting for a run: what failed, or the index that a kernel refused to follow.
bnb_status run_status(Device &d, bnb_error *err) {
    if (bnb_status s = queue_status(d, err, "running a plan")) return s;
    int fault = *d.fault;
    *d.fault = 0;
    return fault ? bnb_fail(err, BNB_E_ARG, "node %d of the plan met an index outside its table (ids, rows or spans)", fault - 1) : BNB_OK;
}

void forget_unpacked(Device &d);

bnb_status device_sync(void *dev, bnb_error *err) {
    Device &d = *static_cast<Device *>(dev);
    Use use(d);
    d.queue.note(GPU(StreamSynchronize)(d.queue.stream));
    forget_unpacked(d); // nothing is on its way any more
    return run_status(d, err);
}

void *device_alloc(void *dev, uint64_t bytes, bnb_error *err) {
    Device &d = *static_cast<Device *>(dev);
    Use use(d);
    void *p = nullptr;
    error_t e = GPU(Malloc)(&p, bytes ? bytes : 1);
    if (e != GPU(Success)) {
        size_t free = 0, total = 0;
        (void)GPU(GetLastError)();
        (void)GPU(MemGetInfo)(&free, &total);
        bnb_fail(err, e == GPU_OUT_OF_MEMORY ? BNB_E_NOMEM : BNB_E_DEVICE,
                 "%s:%d: %llu bytes could not be allocated (%s); %llu of its %llu are free", GPU_NAME, d.index,
                 static_cast<unsigned long long>(bytes), GPU(GetErrorString)(e), static_cast<unsigned long long>(free),
                 static_cast<unsigned long long>(total));
        return nullptr;
    }
    d.bytes += bytes;
    d.bytes_peak = d.bytes > d.bytes_peak ? d.bytes : d.bytes_peak;
    // Zeros: tiles of a cache may be multiplied by 0 where no span covers them, and must not hold NaN.
    d.queue.note(GPU(MemsetAsync)(p, 0, bytes, d.queue.stream));
    return p;
}

void device_free(void *dev, void *p, uint64_t bytes) {
    Device &d = *static_cast<Device *>(dev);
    Use use(d);
    if (p) d.bytes -= bytes;
    (void)GPU(Free)(p);
}

void forget_unpacked(Device &d) {
    device_free(&d, d.unpacked, d.unpacked_bytes);
    d.unpacked = nullptr;
    d.unpacked_bytes = 0;
}

struct CopyJob {
    char *dst;
    const char *src;
    uint64_t n;
};
void copy_part(void *arg, int64_t i) {
    const CopyJob &job = *static_cast<const CopyJob *>(arg);
    uint64_t at = static_cast<uint64_t>(i) * COPY_CHUNK, n = job.n - at < COPY_CHUNK ? job.n - at : COPY_CHUNK;
    std::memcpy(job.dst + at, job.src + at, n);
}

// Host to device in the order of the queue. All threads fill one pinned buffer while the other is on its way; the source
// may be a mapped file, which the driver would copy page by page. Returns when src may be changed.
bnb_status device_write(void *dev, void *dst, const void *src, uint64_t bytes, bnb_error *err) {
    Device &d = *static_cast<Device *>(dev);
    Use use(d);
    Queue &q = d.queue;
    for (uint64_t at = 0; at < bytes && q.status == GPU(Success); at += STAGING_BYTES) {
        uint64_t n = bytes - at < STAGING_BYTES ? bytes - at : STAGING_BYTES;
        int i = at / STAGING_BYTES % 2;
        q.note(GPU(EventSynchronize)(d.staged[i]));
        CopyJob job = {d.staging[i], static_cast<const char *>(src) + at, n};
        if (n > COPY_CHUNK) bnb_parallel(d.env, static_cast<int64_t>((n + COPY_CHUNK - 1) / COPY_CHUNK), copy_part, &job);
        else std::memcpy(job.dst, job.src, n);
        q.note(GPU(MemcpyAsync)(static_cast<char *>(dst) + at, d.staging[i], n, GPU(MemcpyHostToDevice), q.stream));
        q.note(GPU(EventRecord)(d.staged[i], q.stream));
    }
    return queue_status(d, err, "writing to the device");
}

// Device to host: waits for everything before it, and is where the faults of a run are reported.
bnb_status device_read(void *dev, void *dst, const void *src, uint64_t bytes, bnb_error *err) {
    Device &d = *static_cast<Device *>(dev);
    Use use(d);
    Queue &q = d.queue;
    for (uint64_t at = 0; at < bytes && q.status == GPU(Success); at += STAGING_BYTES) {
        uint64_t n = bytes - at < STAGING_BYTES ? bytes - at : STAGING_BYTES;
        q.note(GPU(MemcpyAsync)(d.staging[0], static_cast<const char *>(src) + at, n, GPU(MemcpyDeviceToHost), q.stream));
        q.note(GPU(StreamSynchronize)(q.stream));
        if (q.status == GPU(Success)) std::memcpy(static_cast<char *>(dst) + at, d.staging[0], n);
    }
    return run_status(d, err);
}

bnb_status device_fetch_begin(void *dev, int32_t slot, const void *src, uint64_t bytes, bnb_error *err) {
    Device &d = *static_cast<Device *>(dev);
    Use use(d);
    d.queue.note(GPU(MemcpyAsync)(d.fetched + slot * BNB_FETCH_BYTES, src, bytes, GPU(MemcpyDeviceToHost), d.queue.stream));
    d.queue.note(GPU(EventRecord)(d.fetch_done[slot], d.queue.stream));
    return queue_status(d, err, "fetching a result");
}

bnb_status device_fetch_end(void *dev, int32_t slot, void *dst, uint64_t bytes, bnb_error *err) {
    Device &d = *static_cast<Device *>(dev);
    Use use(d);
    d.queue.note(GPU(EventSynchronize)(d.fetch_done[slot]));
    std::memcpy(dst, d.fetched + slot * BNB_FETCH_BYTES, bytes);
    return run_status(d, err);
}

/* ==== [DEVICE] ================================================================================================== */

// Rows of q for which attention kernels are those of decoding, which can write new rows of the caches themselves.
constexpr int DECODE_MOST = 16;

// Activations [T, C]: the graph says f32; between kernels that take it they lie as f16.
struct Rows {
    char *data;
    long ld; // elements from one row to the next
    int f16;
};

__device__ float get(const Rows &x, long t, long c) {
    return x.f16 ? __half2float(reinterpret_cast<const __half *>(x.data)[t * x.ld + c])
                   : reinterpret_cast<const float *>(x.data)[t * x.ld + c];
}
__device__ void put(const Rows &y, long t, long c, float v) {
    if (y.f16) reinterpret_cast<__half *>(y.data)[t * y.ld + c] = __float2half_rn(v);
    else reinterpret_cast<float *>(y.data)[t * y.ld + c] = v;
}

__device__ unsigned half_bits(float v) { return __half_as_ushort(__float2half_rn(v)); }
__device__ unsigned two_halves(float low, float high) { return half_bits(low) | half_bits(high) << 16; }

// Numbers of a plain type: f32, f16, bf16.
struct Numbers {
    const void *data;
    int type;
};
__device__ float get(const Numbers &v, long i) {
    if (v.type == BNB_F32) return static_cast<const float *>(v.data)[i];
    if (v.type == BNB_F16) return __half2float(static_cast<const __half *>(v.data)[i]);
    return __uint_as_float(static_cast<unsigned>(static_cast<const unsigned short *>(v.data)[i]) << 16);
}

// Keys or values [R, C]: numbers, or codes of int8_kv.
struct Cache {
    Rows rows;     // of codes only data and ld are looked at
    float *absmax; // int8_kv: [blocks of a row, R]; else NULL
};
__device__ float get(const Cache &x, long r, long c) { // a code is not yet multiplied by its scale
    if (!x.absmax) return get(x.rows, r, c);
    return static_cast<float>(reinterpret_cast<const signed char *>(x.rows.data)[r * x.rows.ld + c]);
}

// int8_kv, see bnb_set_rows: absmax of a block whose largest |x| has these bits, and the code of one of its numbers.
__device__ float kv_absmax(unsigned top) {
    return __uint_as_float(top >= 0x7f800000u ? 0x7fc00000u : top < 0x03800000u ? 0 : top);
}
__device__ int kv_code(float x, float absmax) {
    float v = absmax > 0 ? x * (127 / absmax) : 0.0f;
    return static_cast<int>(rintf(v));
}
constexpr float kv_unit = 7.874015718698502e-3f; // 1/127: code * absmax * kv_unit is the value

// A weight [N, K] in its canonical layout, or rows of an activation.
struct Weight {
    const void *plane[BNB_MAX_PLANES];
    long N, K, pitch; // pitch: elements from one row to the next
    bnb_quant quant;
    int type;
    float map[16]; // 4-bit types: code -> value
};

__device__ float block_scale(const Weight &w, long block) {
    if (!w.quant.double_quant) return static_cast<const float *>(w.plane[1])[block];
    float nested = static_cast<const float *>(w.plane[2])[block / w.quant.nested_blocksize];
    float code = static_cast<const float *>(w.plane[3])[static_cast<const unsigned char *>(w.plane[1])[block]];
    return mul_add(code, nested, w.quant.nested_offset); // two roundings, as bitsandbytes has them
}

// Element e, counted in pitches; map: w.map where lanes can look it up fast.
__device__ float weight_at(const Weight &w, const float *map, long e) {
    if (w.type != BNB_NF4 && w.type != BNB_FP4) return get(Numbers{w.plane[0], w.type}, e);
    unsigned char b = static_cast<const unsigned char *>(w.plane[0])[e / 2];
    return map[e % 2 ? b & 15 : b >> 4] * block_scale(w, e / w.quant.blocksize);
}

__device__ float lane_sum(float v) {
    for (int d = 16; d; d >>= 1) v += lane_xor(v, d);
    return v;
}

// Over all threads of a one-dimensional block, in a fixed order.
template <class F> __device__ float block_reduce(float v, F f) {
    __shared__ float part[32]; // one for each group of 32 lanes
    for (int d = 16; d; d >>= 1) v = f(v, lane_xor(v, d));
    __syncthreads(); // an earlier call may still be reading
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    v = part[0];
    for (unsigned i = 1; i < blockDim.x / 32; i++) v = f(v, part[i]);
    return v;
}
__device__ float block_sum(float v) {
    return block_reduce(v, [](float a, float b) { return a + b; });
}
__device__ float block_max(float v) {
    return block_reduce(v, [](float a, float b) { return fmaxf(a, b); });
}

__device__ float activate(int op, float x, float factor) {
    switch (op) {
    case BNB_OP_SCALE: return x * factor;
    case BNB_OP_GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case BNB_OP_GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case BNB_OP_SILU: return x / (1.0f + expf(-x));
    case BNB_OP_RELU: return x > 0 || x != x ? x : 0;
    default: return x;
    }
}

// What follows a product before it is written: y = act(sum + bias) + residual.
struct Epilogue {
    Numbers bias;  // [N]; data NULL: none
    int act;       // BNB_OP_*, or BNB_OP_NONE
    Rows residual; // [M, N]; data NULL: none
};
__device__ void finish(const Epilogue &e, const Rows &y, long m, long n, float sum) {
    if (e.bias.data) sum += get(e.bias, n);
    sum = activate(e.act, sum, 0);
    if (e.residual.data) sum += get(e.residual, m, n);
    put(y, m, n, sum);
}

/* ==== [PLAIN] ===================================================================================================
 * One kernel for each op, for any GPU and any shape. They are the reference that the fast ones are checked against. */

enum { LANES = 32, GROUPS = 8, THREADS = LANES * GROUPS };

// y[t] = table[ids[t]] (+ table2[ids2[t]])
__global__ void embed_kernel(Numbers table, long pitch, long V, const int *ids, Numbers table2, long pitch2, long V2,
                             const int *ids2, Rows y, int C, int *fault, int node) {
    wait_for_previous();
    long t = blockIdx.y, c = static_cast<long>(blockIdx.x) * THREADS + threadIdx.x;
    long id = ids[t], id2 = ids2 ? ids2[t] : 0;
    bool bad = id < 0 || id >= V || (ids2 && (id2 < 0 || id2 >= V2));
    if (bad) *fault = node + 1;
    if (c >= C) return;
    float v = bad ? 0 : get(table, id * pitch + c);
    if (ids2 && !bad) v += get(table2, id2 * pitch2 + c);
    put(y, t, c, v);
}

__global__ void norm_kernel(Rows x, Numbers w, Numbers b, float eps, int layer, Rows y, int C) {
    wait_for_previous();
    long t = blockIdx.x;
    float sum = 0, square = 0, mean = 0;
    if (layer) {
        for (int c = threadIdx.x; c < C; c += blockDim.x) sum += get(x, t, c);
        mean = block_sum(sum) / C;
    }
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        float v = get(x, t, c) - mean;
        square += v * v;
    }
    float scale = 1 / sqrtf(block_sum(square) / C + eps);
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        float v = (get(x, t, c) - mean) * scale;
        if (w.data) v *= get(w, c);
        if (b.data) v += get(b, c);
        put(y, t, c, v);
    }
}

// The same for x in f32 and y in f16 with aligned rows of at most 4 THREADS PIECES columns, which are read once. EARLY: the
// weights while the kernel before still runs, as few rows would wait for them as long as for x; many have no registers for it.
template <int PIECES, bool EARLY>
__global__ void __launch_bounds__(THREADS) norm_rows_kernel(const float4 *x, long pitch, const float4 *w, const float4 *b, float eps, int layer, uint2 *y,
                                                            long y_pitch, int C) {
    const auto factors = [&](int c) { return w && c < C / 4 ? w[c] : make_float4(1, 1, 1, 1); };
    const auto offsets = [&](int c) { return b && c < C / 4 ? b[c] : make_float4(0, 0, 0, 0); };
    float4 v[PIECES], g[EARLY ? PIECES : 1], o[EARLY ? PIECES : 1];
    for (int i = 0; EARLY && i < PIECES; i++) g[i] = factors(i * THREADS + threadIdx.x), o[i] = offsets(i * THREADS + threadIdx.x);
    wait_for_previous();
    const long t = blockIdx.x;
    float sum = 0, square = 0;
    for (int i = 0; i < PIECES; i++) {
        const int c = i * THREADS + threadIdx.x;
        v[i] = c < C / 4 ? x[t * pitch + c] : make_float4(0, 0, 0, 0);
        sum += v[i].x + v[i].y + v[i].z + v[i].w;
    }
    const float mean = layer ? block_sum(sum) / C : 0;
    for (int i = 0; i < PIECES; i++) {
        if (i * THREADS + static_cast<int>(threadIdx.x) >= C / 4) continue;
        v[i] = make_float4(v[i].x - mean, v[i].y - mean, v[i].z - mean, v[i].w - mean);
        square += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
    }
    const float scale = 1 / sqrtf(block_sum(square) / C + eps);
    for (int i = 0; i < PIECES; i++) {
        const int c = i * THREADS + threadIdx.x;
        if (c >= C / 4) continue;
        const float4 f = EARLY ? g[i] : factors(c), a = EARLY ? o[i] : offsets(c);
        // 8 bytes as one store: nvcc 13.0 makes wrong code of memcpy from __half [4], the low byte of each is lost
        y[t * y_pitch + c] = make_uint2(two_halves(v[i].x * scale * f.x + a.x, v[i].y * scale * f.y + a.y),
                                        two_halves(v[i].z * scale * f.z + a.z, v[i].w * scale * f.w + a.w));
    }
}

// y = op(a, b) or op(a); b: like a, or one row for all
__global__ void pointwise_kernel(int op, Rows a, Rows b, Numbers row, float factor, Rows y, int C) {
    wait_for_previous();
    long t = blockIdx.y, c = static_cast<long>(blockIdx.x) * THREADS + threadIdx.x;
    if (c >= C) return;
    float v = get(a, t, c);
    if (op == BNB_OP_ADD || op == BNB_OP_MUL) {
        float w = row.data ? get(row, c) : get(b, t, c);
        v = op == BNB_OP_ADD ? v + w : v * w;
    } else {
        v = activate(op, v, factor);
    }
    put(y, t, c, v);
}

__global__ void softmax_kernel(Rows x, Rows y, int C) {
    wait_for_previous();
    long t = blockIdx.x;
    float top = -INFINITY, sum = 0;
    for (int c = threadIdx.x; c < C; c += blockDim.x) top = fmaxf(top, get(x, t, c));
    top = block_max(top);
    for (int c = threadIdx.x; c < C; c += blockDim.x) sum += expf(get(x, t, c) - top);
    sum = block_sum(sum);
    for (int c = threadIdx.x; c < C; c += blockDim.x) put(y, t, c, expf(get(x, t, c) - top) / sum);
}

// cache[rows[t]] = x[t], for one or two caches (keys and values) of R rows
__global__ void set_rows_kernel(Rows x, Rows cache, Rows x2, Rows cache2, const int *rows, int R, int C, int *fault, int node) {
    wait_for_previous();
    long t = blockIdx.y, c = static_cast<long>(blockIdx.x) * THREADS + threadIdx.x;
    int r = rows[t];
    if (r < 0 || r >= R) {
        *fault = node + 1;
        return;
    }
    if (c >= C) return;
    put(cache, r, c, get(x, t, c));
    if (x2.data) put(cache2, r, c, get(x2, t, c));
}

// The same for f16 to f16 with aligned rows: n pieces of 16 bytes each.
__global__ void copy_rows_kernel(Rows x, Rows cache, Rows x2, Rows cache2, const int *rows, int R, int n, int *fault, int node) {
    wait_for_previous();
    const long t = blockIdx.y;
    const int i = blockIdx.x * THREADS + threadIdx.x, r = rows[t];
    if (r < 0 || r >= R) {
        *fault = node + 1;
        return;
    }
    if (i >= n) return;
    reinterpret_cast<uint4 *>(cache.data)[r * (cache.ld / 8) + i] = reinterpret_cast<const uint4 *>(x.data)[t * (x.ld / 8) + i];
    if (x2.data) reinterpret_cast<uint4 *>(cache2.data)[r * (cache2.ld / 8) + i] = reinterpret_cast<const uint4 *>(x2.data)[t * (x2.ld / 8) + i];
}

// The same from any rows to int8_kv: a group of 32 lanes for a block of B columns.
__global__ void __launch_bounds__(THREADS) set_rows_int8_kernel(Rows x, Cache cache, Rows x2, Cache cache2,
                                                                const int *rows, int R, int C, int B, int *fault,
                                                                int node) {
    wait_for_previous();
    const long t = blockIdx.y, b = static_cast<long>(blockIdx.x) * GROUPS + threadIdx.y;
    const int r = rows[t], lane = threadIdx.x;
    if (r < 0 || r >= R) {
        *fault = node + 1;
        return;
    }
    if (b * B >= C) return;
    for (int which = 0; which < (x2.data ? 2 : 1); which++) {
        const Rows from = which ? x2 : x;
        const Cache to = which ? cache2 : cache;
        unsigned top = 0;
        for (long c = b * B + lane; c < (b + 1) * B; c += LANES) {
            unsigned u = __float_as_uint(get(from, t, c)) & 0x7fffffffu;
            top = u > top ? u : top;
        }
        for (int d = 16; d; d >>= 1) {
            unsigned other = lane_xor(top, d);
            top = other > top ? other : top;
        }
        const float absmax = kv_absmax(top);
        for (long c = b * B + lane; c < (b + 1) * B; c += LANES)
            to.rows.data[r * to.rows.ld + c] = static_cast<char>(kv_code(get(from, t, c), absmax));
        if (lane == 0) to.absmax[b * R + r] = absmax;
    }
}

// A group of 32 lanes makes y[m0 .. m0 + 8, n] for one n.
enum { PLAIN_ROWS = 8 };
__global__ void __launch_bounds__(THREADS) linear_kernel(Rows x, Weight w, Epilogue e, Rows y, int M) {
    __shared__ float map[16];
    int thread = threadIdx.y * LANES + threadIdx.x;
    if (thread < 16) map[thread] = w.map[thread];
    __syncthreads();
    wait_for_previous();
    long n = static_cast<long>(blockIdx.x) * GROUPS + threadIdx.y, m0 = static_cast<long>(blockIdx.y) * PLAIN_ROWS;
    float sum[PLAIN_ROWS] = {};
    for (long k = threadIdx.x; k < w.K && n < w.N; k += LANES) {
        float v = weight_at(w, map, n * w.pitch + k);
        for (int i = 0; i < PLAIN_ROWS; i++)
            if (m0 + i < M) sum[i] += get(x, m0 + i, k) * v;
    }
    for (int i = 0; i < PLAIN_ROWS; i++) {
        float s = lane_sum(sum[i]);
        if (static_cast<int>(threadIdx.x) == i && n < w.N && m0 + i < M) finish(e, y, m0 + i, n, s);
    }
}

// The absmax of every block, restored.
__global__ void absmax_kernel(Weight w, float *absmax, long n) {
    wait_for_previous();
    long b = blockIdx.x * static_cast<long>(THREADS) + threadIdx.x;
    if (b < n) absmax[b] = block_scale(w, b);
}

__device__ float to_f16(float x) { return __half2float(__float2half_rn(x)); }
__device__ bool is_outlier(float x, float threshold) { return threshold > 0 && fabsf(x) >= threshold; }

/* ---- quantizing: bnb_quantize of BNB_COMPAT_CUDA, bit for bit; the rules stand in bnb.c, section [QUANT] ---- */

// 4 bits: a group of 32 lanes makes one block of B of the n numbers.
__global__ void quantize4_kernel(Numbers a, long n, bnb_rule4 rule, int B, unsigned char *codes, float *absmax) {
    __shared__ bnb_rule4 r; // indexed at run time
    if (threadIdx.x == 0 && threadIdx.y == 0) r = rule;
    __syncthreads();
    wait_for_previous();
    long block = static_cast<long>(blockIdx.x) * GROUPS + threadIdx.y, first = block * B, end = first + B < n ? first + B : n;
    float top = 0;
    for (long i = first + threadIdx.x; i < end; i += LANES) {
        float v = fabsf(get(a, i));
        top = v > top && v >= r.smallest ? v : top; // a NaN is never larger
    }
    for (int d = 16; d; d >>= 1) top = fmaxf(top, lane_xor(top, d));
    if (first >= n) return;
    if (threadIdx.x == 0) absmax[block] = top;
    float scale = reciprocal(top);
    for (long i = first + 2 * threadIdx.x; i < end; i += 2 * LANES) {
        unsigned byte = 0;
        for (int half = 0; half < 2; half++) {
            float v = i + half < n ? get(a, i + half) : 0; // an odd count is padded with a 0
            if (fabsf(v) < r.smallest) v = 0;
            v *= scale;
            if (v != v) v = r.nan;
            int rank = 0;
            for (int k = 0; k < 15; k++) rank += v > r.bound[k];
            byte = byte << 4 | r.code[rank];
        }
        codes[i / 2] = static_cast<unsigned char>(byte);
    }
}

// int8: a block for each row of K numbers, which count as f16.
__global__ void quantize8_kernel(Numbers a, int K, signed char *codes, float *scb) {
    wait_for_previous();
    long first = static_cast<long>(blockIdx.x) * K;
    float top = 0;
    for (int k = threadIdx.x; k < K; k += blockDim.x) {
        float v = fabsf(to_f16(get(a, first + k)));
        top = v > top ? v : top;
    }
    top = block_max(top);
    float scale = 127.0f * reciprocal(top);
    for (int k = threadIdx.x; k < K; k += blockDim.x) {
        float v = to_f16(get(a, first + k)) * scale;
        codes[first + k] = static_cast<signed char>(v == v ? rintf(v) : 0.0f);
    }
    if (threadIdx.x == 0) scb[blockIdx.x] = top;
}

// LLM.int8(), in three kernels. Scratch: row scales f32 [M] | codes i8 [M, K] | outlier columns u8 [K].
struct Int8Rows {
    float *scale;
    signed char *codes;
    unsigned char *column;
};

// x[m] -> codes and scale, where outliers count as 0. Scale: the largest magnitude of the others.
__global__ void int8_rows_kernel(Rows x, float threshold, Int8Rows q, int K) {
    wait_for_previous();
    long m = blockIdx.x;
    float top = 0;
    for (int k = threadIdx.x; k < K; k += blockDim.x) {
        float v = to_f16(get(x, m, k));
        if (!is_outlier(v, threshold)) top = fmaxf(top, fabsf(v));
    }
    top = block_max(top);
    float s = 127.0f * reciprocal(top);
    for (int k = threadIdx.x; k < K; k += blockDim.x) {
        float v = to_f16(get(x, m, k)), c = rintf(v * s);
        bool zero = top == 0 || is_outlier(v, threshold) || !(fabsf(c) <= 127);
        q.codes[m * K + k] = static_cast<signed char>(zero ? 0 : c);
    }
    if (threadIdx.x == 0) q.scale[m] = top;
}

// One outlier makes its column one; by_column: for all rows.
__global__ void int8_columns_kernel(Rows x, float threshold, int by_column, Int8Rows q, int M, int K) {
    wait_for_previous();
    long k = static_cast<long>(blockIdx.x) * THREADS + threadIdx.x;
    if (k >= K) return;
    bool found = false;
    for (int m = 0; m < M && !found; m++) found = is_outlier(to_f16(get(x, m, k)), threshold);
    q.column[k] = found;
    for (int m = 0; m < M && found && by_column; m++) q.codes[static_cast<long>(m) * K + k] = 0;
}

__global__ void __launch_bounds__(THREADS) linear_int8_kernel(Rows x, Weight w, Int8Rows q, int by_column, Epilogue e,
                                                              Rows y, int M) {
    wait_for_previous();
    long n = static_cast<long>(blockIdx.x) * GROUPS + threadIdx.y, m0 = static_cast<long>(blockIdx.y) * PLAIN_ROWS;
    int sum[PLAIN_ROWS] = {};
    float extra[PLAIN_ROWS] = {}, scb = n < w.N ? static_cast<const float *>(w.plane[1])[n] : 0;
    for (long k = threadIdx.x; k < w.K && n < w.N; k += LANES) {
        int c = static_cast<const signed char *>(w.plane[0])[n * w.K + k];
        bool column = q.column[k];
        for (int i = 0; i < PLAIN_ROWS && m0 + i < M; i++) {
            sum[i] += q.codes[(m0 + i) * w.K + k] * c;
            if (!column) continue;
            float v = get(x, m0 + i, k);
            if (by_column || is_outlier(to_f16(v), w.quant.threshold)) extra[i] += v * (c * scb * 7.874015718698502e-3f);
        }
    }
    for (int i = 0; i < PLAIN_ROWS; i++) {
        int s = sum[i];
        for (int d = 16; d; d >>= 1) s += lane_xor(s, d);
        float more = lane_sum(extra[i]);
        // 6.200012e-05 is 1/127^2 as bitsandbytes has it
        if (static_cast<int>(threadIdx.x) == i && n < w.N && m0 + i < M)
            finish(e, y, m0 + i, n, s * q.scale[m0 + i] * scb * 6.200012e-05f + more);
    }
}

// One block for a head of a row: scores of THREADS cache rows at a time, a running maximum and sum, D columns of v.
enum { PLAIN_HEAD = 256 };
__global__ void __launch_bounds__(THREADS) attention_kernel(Rows q, Cache k, Cache v, const int *span, int R, int D,
                                                            int group, float scale, Rows y, int *fault, int node) {
    __shared__ float query[PLAIN_HEAD], p[THREADS];
    wait_for_previous();
    long t = blockIdx.y, h = blockIdx.x, kv = h / group * D;
    int thread = threadIdx.x, lane = thread % LANES, first = span[2 * t], end = span[2 * t + 1];
    if (first < 0 || end < first || end > R) {
        *fault = node + 1;
        first = end = 0;
    }
    const float *k_absmax = k.absmax ? k.absmax + h / group * R : nullptr;
    const float *v_absmax = v.absmax ? v.absmax + h / group * R : nullptr;
    if (thread < D) query[thread] = get(q, t, h * D + thread) * scale;
    float top = -INFINITY, sum = 0, out = 0;
    for (int r0 = first; r0 < end; r0 += THREADS) {
        __syncthreads();
        int n = end - r0 < THREADS ? end - r0 : THREADS;
        for (int r = thread / LANES; r < THREADS; r += GROUPS) {
            float dot = 0;
            for (int d = lane; d < D && r < n; d += LANES) dot += query[d] * get(k, r0 + r, kv + d);
            dot = lane_sum(dot);
            if (k_absmax && r < n) dot *= k_absmax[r0 + r] * kv_unit;
            if (lane == 0) p[r] = r < n ? dot : -INFINITY;
        }
        __syncthreads();
        float here = p[thread], larger = fmaxf(top, block_max(here)), shrink = expf(top - larger);
        here = expf(here - larger);
        p[thread] = v_absmax && thread < n ? here * (v_absmax[r0 + thread] * kv_unit) : here;
        sum = sum * shrink + block_sum(here); // its barriers publish p
        out *= shrink;
        top = larger;
        for (int r = 0; r < n && thread < D; r++) out += p[r] * get(v, r0 + r, kv + thread);
    }
    if (thread < D) put(y, t, h * D + thread, sum > 0 ? out / sum : 0);
}

// Orders as (number, lower index first), a NaN above all.
__device__ unsigned long long order_key(float v, int c) {
    unsigned bits = __float_as_uint(v == 0 ? 0.0f : v); // -0 ties with 0
    bits = v != v ? 0xffffffffu : bits >> 31 ? ~bits : bits | 0x80000000u;
    return static_cast<unsigned long long>(bits) << 32 | (0xffffffffu - static_cast<unsigned>(c));
}

// y[t] = the first index of the largest x[t]; -1 if there is a NaN
__global__ void argmax_kernel(Rows x, int *y, int C) {
    wait_for_previous();
    __shared__ unsigned long long best[32];
    long t = blockIdx.x;
    unsigned long long top = 0;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        unsigned long long key = order_key(get(x, t, c), c);
        top = key > top ? key : top;
    }
    for (int d = 16; d; d >>= 1) {
        unsigned long long other = lane_xor(top, d);
        top = other > top ? other : top;
    }
    if (threadIdx.x % 32 == 0) best[threadIdx.x / 32] = top;
    __syncthreads();
    if (threadIdx.x) return;
    for (unsigned i = 1; i < blockDim.x / 32; i++) top = best[i] > top ? best[i] : top;
    y[t] = top >> 32 == 0xffffffffu ? -1 : static_cast<int>(0xffffffffu - static_cast<unsigned>(top));
}

// y[t] = an index drawn from x[t], as bnb_draw_row does it: the k largest by radix selection (k <= DRAW_MOST), their order
// by counting, and the draw itself in double by one thread. Keys order as (number, lower index first) and are all different.
enum { DRAW_MOST = 256, DRAW_THREADS = 1024 };
__device__ double uniform(unsigned long long seed, unsigned long long step) { // bnb__uniform of bnb.c
    unsigned long long z = seed + 0x9E3779B97F4A7C15ull * (step + 1);
    for (int round = 0; round < 2; round++) {
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ z >> 27) * 0x94D049BB133111EBull;
        z ^= z >> 31;
    }
    return static_cast<double>(z >> 11) * 0x1p-53;
}
__global__ void draw_kernel(Rows x, const int *steps, bnb_draw_rule rule, int k, int *y, int C) {
    __shared__ unsigned histogram[256], count;
    __shared__ unsigned long long low, found[DRAW_MOST], sorted[DRAW_MOST]; // low: the k-th largest key, digit by digit
    __shared__ double odds[DRAW_MOST], heat[DRAW_MOST];
    __shared__ int left, is_nan;
    wait_for_previous();
    const int thread = threadIdx.x;
    const long t = blockIdx.x;
    if (thread == 0) low = 0, left = k, count = 0, is_nan = 0;
    for (int shift = 56; shift >= 0; shift -= 8) {
        __syncthreads();
        if (thread < 256) histogram[thread] = 0;
        __syncthreads();
        unsigned long long above = shift == 56 ? 0 : ~0ull << (shift + 8), prefix = low;
        for (int c = thread; c < C; c += DRAW_THREADS) {
            unsigned long long key = order_key(get(x, t, c), c);
            if (key >> 32 == 0xffffffffu) is_nan = 1;
            if ((key & above) == prefix) atomicAdd(&histogram[key >> shift & 255], 1u);
        }
        __syncthreads();
        if (thread == 0) {
            int digit = 255, n = left;
            while (static_cast<int>(histogram[digit]) < n) n -= static_cast<int>(histogram[digit--]);
            low |= static_cast<unsigned long long>(digit) << shift;
            left = n;
        }
    }
    __syncthreads();
    for (int c = thread; c < C; c += DRAW_THREADS) {
        unsigned long long key = order_key(get(x, t, c), c);
        if (key >= low && !is_nan) found[atomicAdd(&count, 1u)] = key;
    }
    __syncthreads();
    if (thread < k && !is_nan) {
        int rank = 0;
        for (int i = 0; i < k; i++) rank += found[i] > found[thread];
        sorted[rank] = found[thread];
    }
    __syncthreads();
    auto index = [&](int i) { return static_cast<int>(0xffffffffu - static_cast<unsigned>(sorted[i])); };
    float best = is_nan ? NAN : get(x, t, index(0));
    if (!(fabsf(best) < INFINITY)) {
        if (thread == 0) y[t] = -1;
        return;
    }
    if (thread < k) {
        double over = static_cast<double>(get(x, t, index(thread))) - best;
        odds[thread] = exp(over);
        heat[thread] = rule.temp > 0 ? exp(over / rule.temp) : 0;
    }
    __syncthreads();
    if (thread) return;
    if (rule.temp > 0 && rule.top_p < 1) {
        double total = 0, sum = 0;
        int m = 0;
        for (int i = 0; i < k; i++) total += odds[i];
        while (m < k && (m == 0 || sum < rule.top_p * total)) sum += odds[m++];
        k = m;
    }
    if (rule.temp > 0 && rule.min_p > 0) {
        double least = best + log(static_cast<double>(rule.min_p));
        int m = 1;
        while (m < k && get(x, t, index(m)) >= least) m++;
        k = m;
    }
    double total = 0;
    for (int i = 0; i < k; i++) total += heat[i];
    double at = uniform(rule.seed, static_cast<unsigned long long>(static_cast<long long>(steps[t]))) * total;
    int chosen = rule.temp > 0 ? k - 1 : 0;
    for (int i = 0; i < k && rule.temp > 0; i++)
        if ((at -= heat[i]) < 0) {
            chosen = i;
            break;
        }
    y[t] = index(chosen);
}

// Reads n x 16 bytes, for the device's limit; the sum is written so that nothing is dead code.
__global__ void read_kernel(const uint4 *p, long n, unsigned *sum) {
    unsigned s = 0;
    for (long i = blockIdx.x * static_cast<long>(blockDim.x) + threadIdx.x; i < n; i += gridDim.x * static_cast<long>(blockDim.x)) {
        uint4 v = p[i];
        s += v.x ^ v.y ^ v.z ^ v.w;
    }
    if (s == 0x9e3779b9u) *sum = s;
}

// What a plan feeds back to its inputs, in order; one block.
struct Feeds {
    int n;
    struct {
        const int *from;
        int *to;
        int count, add[2];
    } item[BNB_MAX_FEEDS];
};
__global__ void feed_kernel(Feeds f) {
    wait_for_previous();
    for (int i = 0; i < f.n; i++) {
        for (int k = threadIdx.x; k < f.item[i].count; k += blockDim.x) f.item[i].to[k] = f.item[i].from[k] + f.item[i].add[k % 2];
        __syncthreads();
    }
}

#ifdef __CUDACC__
/* ==== [PTX] =====================================================================================================
 * Instructions of NVIDIA's that C++ has no word for, thinly wrapped, and what launches the kernels that use them. Code
 * for GPUs that lack them has those kernels empty, and is never asked for them (code_of). */

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define BNB__HOPPER
#endif
#if __CUDA_ARCH__ >= 800 // mma.sync, ldmatrix, cp.async
#define BNB__MMA
#endif
#if defined(__CUDA_ARCH__) && !defined(BNB__HOPPER)
#pragma nv_diag_suppress 177 // "never referenced": what empty kernels would call
#endif

namespace ptx {

__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// The next kernel of the stream may start. It waits before it touches what this one reads or writes.
// Code for older GPUs is not launched early.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_prior_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// This thread copies 16 bytes to shared memory, or zeros.
__device__ __forceinline__ void copy16(void *to, const void *from, bool valid = true) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

// Ends a group of this thread's copies, which may be empty.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kPending groups of this thread's copies are under way. What other threads copied is there after a
// barrier that follows.
template <int kPending> __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Barriers in shared memory, by address or by pointer.
__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_init(uint64_t *bar, int arrivals) { barrier_init(shared_address(bar), arrivals); }

// Ordinary writes to shared memory, of barriers too, are seen by copies and warpgroup products that come after.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// After the barriers are initialized: makes them visible to the copy engine, and to the cluster.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    fence_async();
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t *bar, int bytes) { barrier_expect(shared_address(bar), bytes); }

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t *bar) { barrier_arrive(shared_address(bar)); }

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile("{.reg .pred done;\n"
                 "AGAIN_%=: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
                 "@done bra DONE_%=;\n"
                 "bra AGAIN_%=;\n"
                 "DONE_%=:}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}
// The same as a loop of C++, which keeps the compiler from unrolling a loop around it.
__device__ __forceinline__ void barrier_wait(uint64_t *bar, int parity) {
    uint32_t done = 0;
    while (!done) {
        asm volatile("{\n.reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(shared_address(bar)), "r"(parity)
                     : "memory");
    }
}

// Copies bytes (a multiple of 16) to shared memory; the barrier counts them.
__device__ __forceinline__ void bulk_copy(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// The same to the same place in all blocks of the cluster that `blocks` has a bit for, and to their barriers.
__device__ __forceinline__ void bulk_multicast(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier,
                                               uint32_t blocks) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, "
                 "[%3], %4;" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier), "h"((uint16_t)blocks)
                 : "memory");
}

// Its first use waits for it otherwise.
__device__ __forceinline__ void prefetch_map(const CUtensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void tensor_copy(uint32_t to, const CUtensorMap *map, int k, int m, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
                 "[%4];" ::"r"(to),
                 "l"(map), "r"(k), "r"(m), "r"(barrier)
                 : "memory");
}

// From shared memory; what lies outside the tensor is left out. add: f32 sums, by the second-level cache.
__device__ __forceinline__ void tensor_store(const CUtensorMap *map, int n, int m, uint32_t from, bool add) {
    if (add)
        asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%1, %2}], [%3];" ::
                         "l"(map), "r"(n), "r"(m), "r"(from)
                     : "memory");
    else
        asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::
                         "l"(map), "r"(n), "r"(m), "r"(from)
                     : "memory");
}
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All of a thread's groups of stores but the last kPending have read what they store.
template <int kPending> __device__ __forceinline__ void wait_stores() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// What threads wrote to shared memory is there for copies of tensors.
__device__ __forceinline__ void fence_for_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t r;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}

__device__ __forceinline__ uint32_t cluster_size() {
    uint32_t n;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
    return n;
}

// The barrier of all threads of the cluster that have not returned, in two steps. It does not order memory, for which
// it would wait until everything that a thread has ever written has arrived; cluster_send() does without. Who has arrived
// has to wait: a thread that leaves before the others arrive is counted twice.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait;" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() { cluster_arrive(), cluster_wait(); }

// Stores to another block's shared memory, where a barrier of that block counts the bytes: who waits for it needs no
// other. What is remote is computed here, in the order of the stores, as registers are few where there are many.
#define BNB__CLUSTER_SEND(type, values, ...)                                                                           \
    asm volatile("{.reg .b32 to, counts;\n"                                                                            \
                 "mapa.shared::cluster.u32 to, %0, %2;\nmapa.shared::cluster.u32 counts, %1, %2;\n"                    \
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes." type " [to], " values                        \
                 ", [counts];}" ::"r"(address),                                                                        \
                 "r"(bar), "r"(rank), __VA_ARGS__                                                                      \
                 : "memory")
__device__ __forceinline__ void cluster_send(uint32_t address, uint32_t bar, uint32_t rank, float x) {
    BNB__CLUSTER_SEND("f32", "%3", "f"(x));
}
__device__ __forceinline__ void cluster_send(uint32_t address, uint32_t bar, uint32_t rank, float x, float y) {
    BNB__CLUSTER_SEND("v2.f32", "{%3, %4}", "f"(x), "f"(y));
}
__device__ __forceinline__ void cluster_send(uint32_t address, uint32_t bar, uint32_t rank, float x, float y, float z,
                                             float w) {
    BNB__CLUSTER_SEND("v4.f32", "{%3, %4, %5, %6}", "f"(x), "f"(y), "f"(z), "f"(w));
}
__device__ __forceinline__ void cluster_send(uint32_t address, uint32_t bar, uint32_t rank, int x, int y, int z,
                                             int w) {
    BNB__CLUSTER_SEND("v4.s32", "{%3, %4, %5, %6}", "r"(x), "r"(y), "r"(z), "r"(w));
}
#undef BNB__CLUSTER_SEND

__device__ __forceinline__ float2 load_shared2(uint32_t address) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
    return v;
}
__device__ __forceinline__ uint4 load_shared4(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t v) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
__device__ __forceinline__ void store_shared2(uint32_t address, const float2 &v) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(v.x), "f"(v.y) : "memory");
}

__device__ __forceinline__ void store_shared4(uint32_t address, const float4 &v) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
}

// Brings bytes (a multiple of 16, from an address that is one) to the second-level cache.
__device__ __forceinline__ void prefetch_bulk(const void *from, uint32_t bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// Four 8 x 8 matrices of f16: lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t *r, uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// d[16, 8] += a[16, 16] b[16, 8]
__device__ __forceinline__ void mma(float *d, const uint32_t *a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Among `threads` threads, whole warps.
__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// How y leaves: in boxes or not; with a residual that lies beside; or added to y, which is the residual.
enum HowBoxes { kBoxesNone, kBoxesPlain, kBoxesBeside, kBoxesAdd };

// How a warpgroup writes kRows rows of y at a time, 64 columns of each: as boxes that it puts together in shared memory,
// f16 [kRows][64] or twice f32 [kRows][32], and that the tensor copy engine takes away while it goes on. y's map has these
// boxes. Of every 8 rows a lane has 2 t and 2 t + 1, with columns 2 g and 2 g + 1 of its warp's 16.
template <int kRows, int kBytes> struct Boxes {
    static constexpr int kSlots16 = kBytes / (kRows * 128), kSlots32 = kBytes / (kRows * 256);
    static_assert(kSlots32 > 0 && kSlots16 > 0);
    int y_f32, barrier;
    uint32_t base, to[2], &count;

    // memory: kBytes of the warpgroup's own, 1024-byte aligned; barrier: a named one of its own; count: of its boxes so far
    __device__ __forceinline__ Boxes(uint32_t memory, int y_f32, int barrier, uint32_t &count)
        : y_f32(y_f32), barrier(barrier), base(memory), count(count) {
        const int warp = threadIdx.x / 32 % 4, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int r = 2 * t + i, half = y_f32 ? warp / 2 * (kRows * 128) : 0;
            const int piece = y_f32 ? warp % 2 * 4 + g / 2 : warp * 2 + g / 4, rest = y_f32 ? g % 2 * 8 : g % 4 * 4;
            to[i] = base + half + r * 128 + ((piece ^ r) << 4) + rest;
        }
    }
    static __device__ __forceinline__ bool elected() { return threadIdx.x % 128 == 0; }
    static __device__ __forceinline__ void drain() { // everything was taken away
        if (elected()) wait_stores<0>();
    }
    // v: rows 8 (p / 2) + 2 t + p % 2, from row m and column n on; those that y has not are left out. exists: n is y's.
    __device__ __forceinline__ void write(const CUtensorMap *map, int n, int m, bool exists, bool add,
                                          const float2 (&v)[kRows / 4]) {
        if (elected()) {
            if (y_f32) wait_stores<kSlots32 - 1>();
            else wait_stores<kSlots16 - 1>();
        }
        named_barrier(barrier, 128);
        const uint32_t slot = count++ % (y_f32 ? kSlots32 : kSlots16) * (kRows * (y_f32 ? 256 : 128));
        if (y_f32) {
#pragma unroll
            for (int p = 0; p < kRows / 4; ++p) store_shared2(to[p % 2] + slot + p / 2 * 1024, v[p]);
        } else {
#pragma unroll
            for (int p = 0; p < kRows / 4; ++p) {
                const __half2 h = __floats2half2_rn(v[p].x, v[p].y);
                store_shared(to[p % 2] + slot + p / 2 * 1024, *(const uint32_t *)&h);
            }
        }
        fence_for_copies();
        named_barrier(barrier, 128);
        if (elected() && exists) {
            tensor_store(map, n, m, base + slot, add);
            if (y_f32) tensor_store(map, n + 32, m, base + slot + kRows * 128, add);
        }
        if (elected()) commit_stores();
    }
};

// The registers of a warpgroup's sums, 0 .. R - 1: their numbers, and the operands that they are.
#define BNB__REGS_0_8     "%0, %1, %2, %3, %4, %5, %6, %7"
#define BNB__REGS_8_16    "%8, %9, %10, %11, %12, %13, %14, %15"
#define BNB__REGS_16_32   "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define BNB__REGS_32_40   "%32, %33, %34, %35, %36, %37, %38, %39"
#define BNB__REGS_40_48   "%40, %41, %42, %43, %44, %45, %46, %47"
#define BNB__REGS_48_52   "%48, %49, %50, %51"
#define BNB__REGS_48_64   "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define BNB__REGS_64_72   "%64, %65, %66, %67, %68, %69, %70, %71"
#define BNB__REGS_64_80   "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define BNB__REGS_80_88   "%80, %81, %82, %83, %84, %85, %86, %87"
#define BNB__REGS_88_96   "%88, %89, %90, %91, %92, %93, %94, %95"
#define BNB__REGS_96_104  "%96, %97, %98, %99, %100, %101, %102, %103"
#define BNB__REGS_104_112 "%104, %105, %106, %107, %108, %109, %110, %111"
#define BNB__REGS_112_128 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define BNB__REGS_8   BNB__REGS_0_8
#define BNB__REGS_16  BNB__REGS_8 ", " BNB__REGS_8_16
#define BNB__REGS_32  BNB__REGS_16 ", " BNB__REGS_16_32
#define BNB__REGS_40  BNB__REGS_32 ", " BNB__REGS_32_40
#define BNB__REGS_48  BNB__REGS_40 ", " BNB__REGS_40_48
#define BNB__REGS_52  BNB__REGS_48 ", " BNB__REGS_48_52
#define BNB__REGS_64  BNB__REGS_48 ", " BNB__REGS_48_64
#define BNB__REGS_72  BNB__REGS_64 ", " BNB__REGS_64_72
#define BNB__REGS_80  BNB__REGS_64 ", " BNB__REGS_64_80
#define BNB__REGS_88  BNB__REGS_80 ", " BNB__REGS_80_88
#define BNB__REGS_96  BNB__REGS_88 ", " BNB__REGS_88_96
#define BNB__REGS_104 BNB__REGS_96 ", " BNB__REGS_96_104
#define BNB__REGS_112 BNB__REGS_104 ", " BNB__REGS_104_112
#define BNB__REGS_128 BNB__REGS_112 ", " BNB__REGS_112_128
#define BNB__OUT_4(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define BNB__OUT_8(c, d, i) BNB__OUT_4(c, d, i), BNB__OUT_4(c, d, i + 4)
#define BNB__OUT_16(c, d, i) BNB__OUT_8(c, d, i), BNB__OUT_8(c, d, i + 8)
#define BNB__OUT_32(c, d, i) BNB__OUT_16(c, d, i), BNB__OUT_16(c, d, i + 16)
#define BNB__OUT_40(c, d, i) BNB__OUT_32(c, d, i), BNB__OUT_8(c, d, i + 32)
#define BNB__OUT_48(c, d, i) BNB__OUT_32(c, d, i), BNB__OUT_16(c, d, i + 32)
#define BNB__OUT_52(c, d, i) BNB__OUT_48(c, d, i), BNB__OUT_4(c, d, i + 48)
#define BNB__OUT_64(c, d, i) BNB__OUT_32(c, d, i), BNB__OUT_32(c, d, i + 32)
#define BNB__OUT_72(c, d, i) BNB__OUT_64(c, d, i), BNB__OUT_8(c, d, i + 64)
#define BNB__OUT_80(c, d, i) BNB__OUT_64(c, d, i), BNB__OUT_16(c, d, i + 64)
#define BNB__OUT_88(c, d, i) BNB__OUT_80(c, d, i), BNB__OUT_8(c, d, i + 80)
#define BNB__OUT_96(c, d, i) BNB__OUT_64(c, d, i), BNB__OUT_32(c, d, i + 64)
#define BNB__OUT_104(c, d, i) BNB__OUT_96(c, d, i), BNB__OUT_8(c, d, i + 96)
#define BNB__OUT_112(c, d, i) BNB__OUT_96(c, d, i), BNB__OUT_16(c, d, i + 96)
#define BNB__OUT_128(c, d, i) BNB__OUT_64(c, d, i), BNB__OUT_64(c, d, i + 64)

// NAME(d, a, b, more): d [64, N] f32 += a [64, 16] f16 in registers * b [N, 16]^T, or where T is 1 b [16, N], f16 in shared
// memory; more = 0 starts from zero.
#define BNB__WGMMA_RS(NAME, T, N, R, A0, A1, A2, A3, B, P)                                                             \
    __device__ __forceinline__ void NAME(float (&d)[R], const uint32_t *a, uint64_t b, int more) {                     \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\n"                                                  \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" BNB__REGS_##R                          \
                     "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, " #T ";\n}"                       \
                     : BNB__OUT_##R("+f", d, 0)                                                                        \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more));                                 \
    }
BNB__WGMMA_RS(wgmma, 0, 16, 8, 8, 9, 10, 11, 12, 13)
BNB__WGMMA_RS(wgmma, 0, 32, 16, 16, 17, 18, 19, 20, 21)
BNB__WGMMA_RS(wgmma, 0, 64, 32, 32, 33, 34, 35, 36, 37)
BNB__WGMMA_RS(wgmma, 0, 128, 64, 64, 65, 66, 67, 68, 69)
BNB__WGMMA_RS(wgmma, 0, 96, 48, 48, 49, 50, 51, 52, 53)
BNB__WGMMA_RS(wgmma, 0, 104, 52, 52, 53, 54, 55, 56, 57)
BNB__WGMMA_RS(wgmma, 0, 144, 72, 72, 73, 74, 75, 76, 77)
BNB__WGMMA_RS(wgmma, 0, 176, 88, 88, 89, 90, 91, 92, 93)
BNB__WGMMA_RS(wgmma, 0, 208, 104, 104, 105, 106, 107, 108, 109)
BNB__WGMMA_RS(wgmma, 0, 256, 128, 128, 129, 130, 131, 132, 133)

// On the host:

template <class... Args>
cudaError_t launch(cudaStream_t stream, void (*kernel)(Args...), dim3 grid, dim3 threads, int shared, int cluster,
                   bool pdl, Args... args) {
    cudaLaunchAttribute attribute[2] = {};
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = threads;
    config.dynamicSmemBytes = shared, config.stream = stream, config.attrs = attribute;
    if (cluster > 1) {
        attribute[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attribute[config.numAttrs].val.clusterDim.x = cluster;
        attribute[config.numAttrs].val.clusterDim.y = attribute[config.numAttrs].val.clusterDim.z = 1;
        ++config.numAttrs;
    }
    if (pdl) {
        attribute[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
        ++config.numAttrs;
    }
    return cudaLaunchKernelEx(&config, kernel, args...);
}

// A tensor of D dimensions, size[0] the innermost, the others pitch[] bytes apart, read in boxes of 128 bytes by box[1]
// by ..., that land with the 128-byte swizzle: 16-byte unit c of row r lies at r * 128 + ((c ^ r) & 7) * 16. Outside the
// tensor: zeros.
template <int D>
cudaError_t tensor_map(CUtensorMap *map, int element_bytes, const void *base, const int64_t (&size)[D],
                       const int64_t (&pitch)[D - 1], const int (&box)[D]) {
    static const auto encode = [] { // the runtime library has no such call; the driver's never changes
        void *entry = nullptr;
        cudaDriverEntryPointQueryResult found;
        if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found) !=
            cudaSuccess)
            entry = nullptr;
        return (decltype(&cuTensorMapEncodeTiled))entry;
    }();
    if (!encode) return cudaErrorNotSupported;
    cuuint64_t sizes[D], pitches[D - 1];
    cuuint32_t boxes[D], steps[D];
    for (int i = 0; i < D; i++) sizes[i] = (cuuint64_t)size[i], boxes[i] = (cuuint32_t)box[i], steps[i] = 1;
    for (int i = 0; i < D - 1; i++) pitches[i] = (cuuint64_t)pitch[i];
    const CUresult r = encode(
        map,
        element_bytes == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
        : element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        D, (void *)base, sizes, pitches, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return r == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}
// A row-major matrix [rows, cols], rows pitch bytes apart.
cudaError_t tensor_map(CUtensorMap *map, int element_bytes, const void *base, int64_t cols, int64_t rows, int64_t pitch,
                       int box_rows) {
    return tensor_map<2>(map, element_bytes, base, {cols, rows}, {pitch}, {128 / element_bytes, box_rows});
}

// How y may leave, by where it and its residual lie; a: a call of linear.
template <class Call> HowBoxes how_boxes(const Call &a) {
    const int size = a.y_f32 ? 4 : 2;
    for (int i = 0; i < a.n_parts; ++i)
        if (((uintptr_t)a.part[i].y & 15) || a.part[i].ldy * size % 16) return kBoxesNone;
    if (!a.residual) return kBoxesPlain;
    if (a.y_f32 && a.residual == a.part[0].y && a.ldr == a.part[0].ldy) return kBoxesAdd;
    const bool pairs = ((uintptr_t)a.residual & 7) == 0 && a.ldr % 2 == 0 && a.part[0].N % 2 == 0;
    return pairs ? kBoxesBeside : kBoxesNone;
}

// The maps of y's parts for boxes of box_rows rows, where there are boxes.
template <class Call> cudaError_t box_maps(const Call &a, int box_rows, CUtensorMap (&y)[3], HowBoxes *how) {
    const int size = a.y_f32 ? 4 : 2;
    cudaError_t err = cudaSuccess;
    *how = how_boxes(a);
    for (int i = 0; i < a.n_parts && err == cudaSuccess && *how != kBoxesNone; ++i)
        err = tensor_map(&y[i], size, a.part[i].y, a.part[i].N, a.M, a.part[i].ldy * size, box_rows);
    return err;
}

// Whether to ask for the residual ahead of its use. Where it is y itself, the second-level cache adds, and asking costs
// more than it brings, unless y is too large to lie there still, beside x.
template <class Call> bool fetches_residual(const Call &a, HowBoxes how) {
    int device = 0, cache_bytes = 0;
    if (!a.residual || how != kBoxesAdd) return a.residual;
    if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&cache_bytes, cudaDevAttrL2CacheSize, device)) return true;
    return (double)a.M * (a.ldr * 4 + a.K * 2) > cache_bytes * 0.625;
}

} // namespace ptx

/* ==== [TILE4] ====================================================================================================
 * linear with 4-bit and with f16 weights, once in Hopper's own instructions and once in those that every GPU has from
 * sm_80 on. */

namespace tile4 {

using namespace ptx;

// y = x W^T on NVIDIA GPUs from sm_80 on, W in 4 bits (NF4, FP4) or f16, x in f16, sums in f32.
//
// Weights in 4 bits are kept in an invertible permutation of codes and absmax, made once at load (tile4_pack). A block
// of 64 rows is a sequence of tiles along K; a tile is 64 rows by 64 columns, four units of 16 rows, 576 bytes each:
//     [0, 512)    for lane 4 g + t of a warp 16 bytes: from row 2 g, then from row 2 g + 1, the bytes 8 s + t and
//                 8 s + t + 4, s = 0..3, of the 32 bytes that hold the row's 64 codes. These are the A fragments of
//                 four m16k16 tensor core steps with k in natural order; a byte's high nibble is the even column. What
//                 the tensor cores take for rows g and g + 8 are neighbours, and so are a lane's two rows of y.
//     [512, 576)  f32 absmax [16]
// After the tiles: f32 row_scale [blocks * 64], for each row a power of two no less than its largest absmax.
// Rows past N have codes and absmax 0.
//
// All kernels turn a byte of two codes into a half2 with one load from a table in shared memory that holds the 256
// pairs once per bank, so that no two lanes ever conflict. Sums are always taken in the same order.
//     linear4_row    M = 1: the warps of a block split K; copies fill a private ring of units per warp; mma.sync, and
//                    each group of 64 columns is multiplied by its exact f32 absmax. The norm in front is its own.
//     linear4_small  M <= 8: the same with x in shared memory; on Hopper two blocks fetch x for each other.
//                    Hopper and sm_80 share both: they differ in how bytes reach the ring, and in how much shared
//                    memory there is for it.
//     linear4_wgmma  Hopper, any M: two producers feed x (TMA) and tiles (bulk copies) to warpgroups, which decode into
//                    the A registers of wgmma while the step before, or another warpgroup's, runs. absmax / row_scale
//                    is multiplied into the f16 weights, so that the accumulators sum over all of K. K may be split
//                    over the warpgroups of a block and over a cluster. Tiles of many rows leave as boxes (TMA) while
//                    the next one begins.
//     linear4_mma    sm_80, any M: the same with cp.async and mma.sync; every thread copies, and only the warps of a
//                    block split K.
// Dense f16 weights, M <= 8: linear16_small on Hopper, linear16_mma from sm_80 on. These two share only how x is staged:
// TMA swizzles rows into shared memory, while lanes can load their fragments straight into registers.

enum Activation { kActNone, kActRelu, kActGelu, kActGeluTanh, kActSilu }; // after relu: smooth ones
enum Norm { kNormNone, kNormLayer, kNormRms };

// What all linear calls share: y[m][n] = act(sum_k x[m][k] w[n][k] + bias[n]) + residual[m][n].
struct LinearCall {
    int M, K;
    const void *x; // f16 or f32 [M, K], rows ldx elements apart; 16-byte aligned, ldx % 8 == 0
    long ldx;
    int x_f32;             // only where M <= 8;  x is rounded to f16 on the way into the tensor cores
    int norm_kind;         // only where linear4_takes_norm or M == 1: the weights multiply the norm of x, which is f32
    const float *norm_w;   // f32 [K]
    const float *norm_b;   // f32 [K], layer norm only, may be null
    float norm_eps;
    int act;
    const float *residual; // f32 [M, N], rows ldr elements apart, or null; may be y itself
    long ldr;
    int y_f32;             // y is f32, else f16
    int n_sm;              // multiprocessors of the device
    int max_shared;        // bytes of shared memory that a block may have there
    bool hopper;           // whether it runs Hopper's own instructions
};

struct Linear4Part {
    const void *units; // tile4_pack's output for a weight [N, K]
    int N;
    const float *bias; // f32 [N] or null
    void *y;           // [M, N], rows ldy elements apart, 16-byte aligned
    long ldy;
};

struct Linear4 : LinearCall {
    int n_parts; // 1..3 weights that read the same x; with more than 1 there is no residual
    Linear4Part part[3];
    float map[16]; // the value of each code
};

struct Linear16 : LinearCall {
    const void *w; // f16 [N, K]
    int N;
    const float *bias; // f32 [N] or null
    void *y;           // [M, N], rows ldy elements apart
    long ldy;
};

constexpr int kGroup = 64;      // columns of a unit: each row's share one absmax
constexpr int kUnitRows = 16;
constexpr int kCodeBytes = 512; // codes of a unit
constexpr int kUnitBytes = 576;
constexpr int kBlockRows = 64, kBlockUnits = 4, kTileBytes = kBlockUnits * kUnitBytes;
constexpr int kTableBytes = 256 * 32 * 4;
constexpr int kMaxShared = 227 * 1024;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int max_of(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int min_of(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int blocks_of(int N) { return ceil_div(N, kBlockRows); }
__host__ __device__ constexpr size_t block_bytes(int K) { return (size_t)(K / kGroup) * kTileBytes; }

bool linear4_fits(int N, int K, int blocksize) {
    return N > 0 && K > 0 && blocksize > 0 && K % kGroup == 0 && blocksize % kGroup == 0;
}

size_t tile4_bytes(int N, int K) { return blocks_of(N) * (block_bytes(K) + kBlockRows * sizeof(float)); }

// ---- the tile layout ------------------------------------------------------------------------------------------------

// The byte of a row's 32 that lane t holds at position e = 0..7.
__device__ __forceinline__ int unit_byte(int t, int e) { return 8 * (e >> 1) + t + 4 * (e & 1); }

// One thread per row of a lane: 8 bytes of codes; the threads of lanes t == 0 also move the row's absmax.
template <bool kPack>
__global__ void tile4_kernel(uint8_t *codes, float *absmax, int blocksize, int N, int K, char *units) {
    const int groups = K / kGroup;
    const size_t total = (size_t)blocks_of(N) * groups * kBlockUnits * 64;
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < total; i += (size_t)gridDim.x * blockDim.x) {
        const int half = i & 1, t = i >> 1 & 3, g = i >> 3 & 7, quarter = i >> 6 & 3;
        const int group = (i >> 8) % groups, block = (i >> 8) / groups;
        const int row = block * kBlockRows + quarter * kUnitRows + 2 * g + half;
        char *unit = units + (i >> 6) * kUnitBytes;
        uint8_t *packed = (uint8_t *)unit + (4 * g + t) * 16 + half * 8;
        float *scale = (float *)(unit + kCodeBytes) + 2 * g + half;
        const size_t column = (size_t)row * K + (size_t)group * kGroup;
        if (kPack) {
            for (int e = 0; e < 8; ++e) packed[e] = row < N ? codes[column / 2 + unit_byte(t, e)] : 0;
            if (t == 0) *scale = row < N ? absmax[column / blocksize] : 0.0f;
        } else if (row < N) {
            for (int e = 0; e < 8; ++e) codes[column / 2 + unit_byte(t, e)] = packed[e];
            if (t == 0 && column % blocksize == 0) absmax[column / blocksize] = *scale;
        }
    }
}

// One warp per row.
__global__ void tile4_row_scale(const float *absmax, int blocksize, int N, int K, float *row_scale) {
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (row >= blocks_of(N) * kBlockRows) return;
    float largest = 0;
    if (row < N)
        for (int k = lane * kGroup; k < K; k += 32 * kGroup)
            largest = fmaxf(largest, fabsf(absmax[((size_t)row * K + k) / blocksize]));
    for (int o = 16; o; o >>= 1) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, o));
    int exponent = 0;
    frexpf(largest, &exponent); // largest <= 2^exponent
    if (lane == 0) row_scale[row] = ldexpf(1.0f, min(max(exponent, -120), 120));
}

cudaError_t tile4_pack(cudaStream_t stream, const uint8_t *codes, const float *absmax, int blocksize, int N, int K,
                       void *units) {
    if (!linear4_fits(N, K, blocksize)) return cudaErrorInvalidValue;
    tile4_kernel<true><<<1024, 256, 0, stream>>>((uint8_t *)codes, (float *)absmax, blocksize, N, K, (char *)units);
    float *row_scale = (float *)((char *)units + blocks_of(N) * block_bytes(K));
    tile4_row_scale<<<blocks_of(N) * (kBlockRows / 8), 256, 0, stream>>>(absmax, blocksize, N, K, row_scale);
    return cudaGetLastError();
}

// The exact inverse of tile4_pack.
cudaError_t tile4_unpack(cudaStream_t stream, const void *units, int blocksize, int N, int K, uint8_t *codes,
                         float *absmax) {
    if (!linear4_fits(N, K, blocksize)) return cudaErrorInvalidValue;
    tile4_kernel<false><<<1024, 256, 0, stream>>>(codes, absmax, blocksize, N, K, (char *)units);
    return cudaGetLastError();
}

// ---- what the kernels share -----------------------------------------------------------------------------------------

// Silu, and gelu in its tanh form, 0.5 v (1 + tanh(z / 2)), are v / (1 + exp(-z)): a few instructions, to 2e-6.
__device__ __forceinline__ float gated(float v, int act) {
    float e = -1.44269504f * v, inverse; // exp2(e) = exp(-z)
    if (act != kActSilu) e *= 1.5957691f * (1.0f + 0.044715f * v * v);
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(e));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + e));
    return v * inverse;
}
// Of two values with one reciprocal: what takes the time is the unit that makes it.
__device__ __forceinline__ float2 gated(float2 v, int act) {
    float2 e = make_float2(-1.44269504f * v.x, -1.44269504f * v.y);
    if (act != kActSilu) {
        e.x *= 1.5957691f * (1.0f + 0.044715f * v.x * v.x), e.y *= 1.5957691f * (1.0f + 0.044715f * v.y * v.y);
    }
    e.x = fminf(e.x, 60.0f), e.y = fminf(e.y, 60.0f); // the product of both is finite
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(e.x));
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(e.y));
    e.x += 1.0f, e.y += 1.0f;
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(e.x * e.y));
    return make_float2(v.x * (inverse * e.y), v.y * (inverse * e.x));
}
__device__ __forceinline__ float smooth(float v, int act) {
    return act == kActGelu ? 0.5f * v * (1.0f + erff(v * 0.70710678f)) : gated(v, act);
}
// Out of line: a kernel of a few microseconds fetches its instructions cold, and long ones cost more than they do.
__device__ __noinline__ float activate_smooth(float v, int act) { return smooth(v, act); }

__device__ __forceinline__ float activate(float v, int act) {
    if (act == kActNone) return v;
    return act == kActRelu ? fmaxf(v, 0.0f) : activate_smooth(v, act);
}

// Many at once: what they have in common is decided once.
template <int N> __device__ __forceinline__ void activate(float2 (&v)[N], int act) {
    if (act == kActRelu) {
#pragma unroll
        for (float2 &q : v) q = make_float2(fmaxf(q.x, 0.0f), fmaxf(q.y, 0.0f));
    } else if (act == kActGelu) {
#pragma unroll
        for (float2 &q : v) q = make_float2(activate_smooth(q.x, act), activate_smooth(q.y, act));
    } else if (act != kActNone) {
#pragma unroll
        for (float2 &q : v) q = gated(q, act);
    }
}

__device__ __forceinline__ uint32_t half2_bits(float low, float high) {
    const __half2 h = __floats2half2_rn(low, high);
    return *(const uint32_t *)&h;
}

__device__ __forceinline__ void store_y(void *y, size_t i, float v, int y_f32) {
    if (y_f32) ((float *)y)[i] = v;
    else ((__half *)y)[i] = __float2half_rn(v);
}

// 64 rows of the call's weights; blocks are counted through its parts.
struct Block {
    const char *tiles;      // [K / 64] tiles
    const float *row_scale; // [64]
    int part, row;          // row: the first of the block's rows in its part
};

__device__ __forceinline__ Block block_at(const Linear4 &a, int block) {
    int part = 0;
    for (; part + 1 < a.n_parts && block >= blocks_of(a.part[part].N); ++part) block -= blocks_of(a.part[part].N);
    const char *tiles = (const char *)a.part[part].units;
    const char *scales = tiles + blocks_of(a.part[part].N) * block_bytes(a.K);
    return {tiles + block * block_bytes(a.K), (const float *)scales + block * kBlockRows, part, block * kBlockRows};
}

inline int total_blocks(const Linear4 &a) {
    int n = 0;
    for (int i = 0; i < a.n_parts; ++i) n += blocks_of(a.part[i].N);
    return n;
}

// a / b, for 0 <= a < 2^21 and inverse = 1 / b: the half keeps rounding away from the whole numbers.
__device__ __forceinline__ int quotient(int a, float inverse) { return (int)((a + 0.5f) * inverse); }

// table: half2 [256 bytes of codes][32 banks], an entry each kStride bytes; the low half is the high nibble, the even
// column. 512 threads.
template <int kStride> __device__ __forceinline__ void fill_table(char *table, const float *map, int thread) {
    const int byte = thread / 2; // its 16-byte pieces with the parity of thread, each in turn free of bank conflicts
    const uint32_t pair = half2_bits(map[byte >> 4], map[byte & 15]);
#pragma unroll
    for (int i = 0; i < 4; ++i)
        *(uint4 *)(table + byte * kStride + ((thread + 2 * i) & 7) * 16) = make_uint4(pair, pair, pair, pair);
}

// A lane's 16 bytes of a unit's codes to the A fragments of four k16 steps: value(word, j) is the half2 of its byte j.
template <class F> __device__ __forceinline__ void decode_with(const uint4 &codes, uint32_t (&a)[16], F value) {
    const uint32_t word[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) // in this order the compiler asks the table early: tiles of 176 rows take 7 % less time
#pragma unroll
        for (int i = 0; i < 4; ++i) a[(i & 1) * 8 + (i >> 1) + 2 * j] = value(word[i], j);
}

// table: the shared address of a table with a stride of 128, and 4 * lane. Shared addresses save an addition for each.
__device__ __forceinline__ void decode(const uint4 &codes, uint32_t table, uint32_t (&a)[16]) {
    decode_with(codes, a, [&](uint32_t word, int j) {
        uint32_t pair;
        asm("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(__byte_perm(word, 0, 0x4440 | j) * 128 + table));
        return pair;
    });
}

// table: with a stride of 256, where one byte permutation puts the byte of codes above the bank, 4 * lane.
__device__ __forceinline__ void decode(const uint4 &codes, const char *table, uint32_t bank, uint32_t (&a)[16]) {
    decode_with(codes, a, [&](uint32_t word, int j) {
        return *(const uint32_t *)(table + __byte_perm(word, bank, 0x5504 | j << 4));
    });
}

// Among the first kThreads threads: all but the producer, where there is one.
template <int kThreads> __device__ __forceinline__ void consumer_sync() {
    asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// The sum over the consumers; partial [kThreads / 32], 16-byte aligned, must not be in use.
template <int kThreads> __device__ __forceinline__ float consumer_sum(float v, float *partial) {
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    consumer_sync<kThreads>();
    v = 0;
#pragma unroll
    for (int i = 0; i < kThreads / 128; ++i) {
        const float4 p = ((const float4 *)partial)[i];
        v += (p.x + p.y) + (p.z + p.w);
    }
    return v;
}

constexpr int kNormMax = 16384; // columns; as many as fit the gaps of a table's 256 entries

__device__ __forceinline__ float4 load4(const float *p, int i) { return *(const float4 *)(p + i); }

// The norm's weights for 8 columns; without a norm 1 and 0.
struct NormWeights {
    float4 w[2], b[2];
};

template <class Call> __device__ __forceinline__ NormWeights norm_weights(const Call &a, int k) {
    const float4 zero = make_float4(0, 0, 0, 0), one = make_float4(1, 1, 1, 1);
    NormWeights n = {{one, one}, {zero, zero}};
    if (a.norm_kind == kNormNone || k >= a.K) return n;
    n.w[0] = load4(a.norm_w, k), n.w[1] = load4(a.norm_w, k + 4);
    if (a.norm_b) n.b[0] = load4(a.norm_b, k), n.b[1] = load4(a.norm_b, k + 4);
    return n;
}

// The norm of a row, as f16 in x, by threads that keep 8 of its columns in each of n places. column(i): where place i
// begins, from K on it is none of the row's; early: norm_weights of the first places, loaded before; meet(v, turn): the sum
// of v over the row's threads, at most once for each turn.
template <int n, int kEarly, class Call, class Column, class Meet>
__device__ __forceinline__ void norm_row(const Call &a, const float (&v)[n][8], const NormWeights (&early)[kEarly],
                                         Column column, Meet meet, uint4 (&x)[n]) {
    const auto sum = [&](auto f) {
        float all = 0;
#pragma unroll
        for (int i = 0; i < n; ++i)
            if (column(i) < a.K)
                all += ((f(v[i][0]) + f(v[i][1])) + (f(v[i][2]) + f(v[i][3]))) +
                       ((f(v[i][4]) + f(v[i][5])) + (f(v[i][6]) + f(v[i][7])));
        return all;
    };
    const float inverse_K = __frcp_rn((float)a.K);
    float mean = 0;
    if (a.norm_kind == kNormLayer) mean = meet(sum([](float u) { return u; }), 0) * inverse_K;
    const float square = meet(sum([&](float u) { return (u - mean) * (u - mean); }), 1);
    const float scale = rsqrtf(square * inverse_K + a.norm_eps);
#pragma unroll
    for (int i = 0; i < n; ++i) {
        const NormWeights &own = i < kEarly ? early[i < kEarly ? i : 0] : norm_weights(a, column(i));
        uint32_t h[4];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float *const u = v[i] + 4 * j;
            const float4 w = own.w[j], b = own.b[j];
            h[2 * j] = half2_bits((u[0] - mean) * scale * w.x + b.x, (u[1] - mean) * scale * w.y + b.y);
            h[2 * j + 1] = half2_bits((u[2] - mean) * scale * w.z + b.z, (u[3] - mean) * scale * w.w + b.w);
        }
        x[i] = column(i) < a.K ? make_uint4(h[0], h[1], h[2], h[3]) : make_uint4(0, 0, 0, 0);
    }
}

// The one row of x, or its norm, as f16, given to put(column, 8 columns). Of f32 a thread's first 8 columns stay in
// registers between the passes; more, past 8 * kThreads, are read again. early: norm_weights for the first 8, loaded
// while the kernel before still ran. asked() is called once x is asked for; scratch: f32 [64].
template <int kThreads, class Put, class Asked>
__device__ __forceinline__ void stage_row(const LinearCall &a, const NormWeights &early, float *scratch, Put put,
                                          Asked asked) {
    const float *x = (const float *)a.x;
    const int first = threadIdx.x * 8;
    float4 p = make_float4(0, 0, 0, 0), q = p;
    constexpr int kMore = ceil_div(kNormMax, 8 * kThreads);
    float4 half8[kMore]; // of f16: 8 columns each, all of a thread's
    if (a.x_f32) {
        if (first < a.K) p = load4(x, first), q = load4(x, first + 4);
    } else {
#pragma unroll
        for (int i = 0; i < kMore; ++i)
            if (first + i * 8 * kThreads < a.K) half8[i] = load4(x, (first + i * 8 * kThreads) / 2);
    }
    asked();
    if (!a.x_f32) {
#pragma unroll
        for (int i = 0; i < kMore; ++i)
            if (first + i * 8 * kThreads < a.K)
                put(first + i * 8 * kThreads, make_uint4(__float_as_uint(half8[i].x), __float_as_uint(half8[i].y),
                                                         __float_as_uint(half8[i].z), __float_as_uint(half8[i].w)));
        return;
    }
    float mean = 0, scale = 1;
    if (a.norm_kind != kNormNone) {
        const float inverse_K = __frcp_rn((float)a.K);
        if (a.norm_kind == kNormLayer) {
            float sum = ((p.x + p.y) + (p.z + p.w)) + ((q.x + q.y) + (q.z + q.w));
#pragma unroll 1
            for (int k = first + 8 * kThreads; k < a.K; k += 8 * kThreads) {
                const float4 v = load4(x, k), w = load4(x, k + 4);
                sum += ((v.x + v.y) + (v.z + v.w)) + ((w.x + w.y) + (w.z + w.w));
            }
            mean = consumer_sum<kThreads>(sum, scratch) * inverse_K;
        }
        float sum = 0;
#pragma unroll 1
        for (int k = first; k < a.K; k += 8 * kThreads) {
            const float4 v = k > first ? load4(x, k) : p, w = k > first ? load4(x, k + 4) : q;
            const float d[8] = {v.x - mean, v.y - mean, v.z - mean, v.w - mean,
                                w.x - mean, w.y - mean, w.z - mean, w.w - mean};
            sum += ((d[0] * d[0] + d[1] * d[1]) + (d[2] * d[2] + d[3] * d[3])) +
                   ((d[4] * d[4] + d[5] * d[5]) + (d[6] * d[6] + d[7] * d[7]));
        }
        scale = rsqrtf(consumer_sum<kThreads>(sum, scratch + 32) * inverse_K + a.norm_eps);
    }
    const auto normed = [&](const float4 &v, const float4 &w, const float4 &b) {
        return make_uint2(half2_bits((v.x - mean) * scale * w.x + b.x, (v.y - mean) * scale * w.y + b.y),
                          half2_bits((v.z - mean) * scale * w.z + b.z, (v.w - mean) * scale * w.w + b.w));
    };
    NormWeights n = early;
#pragma unroll 1
    for (int k = first; k < a.K; k += 8 * kThreads) {
        if (k > first) p = load4(x, k), q = load4(x, k + 4), n = norm_weights(a, k);
        const uint2 low = normed(p, n.w[0], n.b[0]), high = normed(q, n.w[1], n.b[1]);
        put(k, make_uint4(low.x, low.y, high.x, high.y));
    }
}

// Gives x, 8 columns at a time, as f16 to put(row, column, 8 columns).
template <int kThreads, class Put> __device__ __forceinline__ void stage_rows(const LinearCall &a, Put put) {
    const int pieces = a.K / 8;
#pragma unroll 4
    for (int i = threadIdx.x; i < a.M * pieces; i += kThreads) {
        const int m = i / pieces, k = (i - m * pieces) * 8;
        if (a.x_f32) {
            const float *from = (const float *)a.x + m * a.ldx + k;
            const float4 p = load4(from, 0), q = load4(from, 4);
            put(m, k, make_uint4(half2_bits(p.x, p.y), half2_bits(p.z, p.w), half2_bits(q.x, q.y),
                                 half2_bits(q.z, q.w)));
        } else {
            put(m, k, *(const uint4 *)((const __half *)a.x + m * a.ldx + k));
        }
    }
}

// x as f16 into x [M][pitch].
template <int kThreads>
__device__ __forceinline__ void stage_x(const LinearCall &a, const NormWeights &early, float *scratch, __half *x,
                                        int pitch) {
    const auto put = [&](int m, int k, uint4 v) { *(uint4 *)(x + m * pitch + k) = v; };
    if (a.M > 1) stage_rows<kThreads>(a, put);
    else stage_row<kThreads>(a, early, scratch, [&](int k, uint4 v) { put(0, k, v); }, [] {});
}

// y[m][n], y[m][n + 1] for one n, of which n_valid exist, and for rows m that are `step` apart. Both at once where they
// lie so, as nearly always; what is rare is kept out of the way.
struct PairOut {
    const Linear4 &a;
    const Linear4Part &out;
    const int n, n_valid;
    const float2 scale;
    float2 bias = {};
    bool wide;

    __device__ __forceinline__ static float2 bias_of(const Linear4Part &out, int n, int n_valid) {
        float2 b = {};
        if (out.bias && n_valid > 0) b.x = out.bias[n];
        if (out.bias && n_valid > 1) b.y = out.bias[n + 1];
        return b;
    }
    struct Early { // what does not depend on the kernel before, found ahead
        const Linear4Part *out;
        int n, n_valid;
        float2 bias;
    };
    // early: bias_of, or null
    __device__ __forceinline__ PairOut(const Linear4 &a, const Linear4Part &out, int n, int n_valid,
                                       const float2 &scale, const float2 *early)
        : a(a), out(out), n(n), n_valid(n_valid), scale(scale) {
        wide = n_valid > 1 && out.ldy % 2 == 0 && (!a.residual || (a.ldr % 2 == 0 && ((uintptr_t)a.residual & 7) == 0));
        bias = early ? *early : bias_of(out, n, n_valid);
    }
    __device__ __noinline__ static void write_narrow(const Linear4 &a, const Linear4Part &out, int m, int n, float v) {
        if (a.residual) v += a.residual[m * a.ldr + n];
        store_y(out.y, (size_t)m * out.ldy + n, v, a.y_f32);
    }
    // Row i of `count`, with sum(i). kBatch rows at a time take each step together, so that little waits for little;
    // the residuals of the first are under way before ready().
    template <int kBatch, class Sum, class Ready>
    __device__ __forceinline__ void write(int m, int step, int count, Ready ready, Sum sum) const {
        const int size = a.y_f32 ? 4 : 2, act = a.act;
        const bool adds = wide && a.residual;
        const long add_step = step * a.ldr * 4, y_step = step * out.ldy * size;
        const char *from = (const char *)(a.residual + m * a.ldr + n);
        char *to = (char *)out.y + (m * out.ldy + n) * size;
        count = min(count, (a.M - m + step - 1) / step);
        float2 add[kBatch], v[kBatch];
        auto load = [&](int left) {
#pragma unroll
            for (int j = 0; j < kBatch; ++j, from += add_step) {
                add[j] = make_float2(0, 0);
                if (adds && j < left) add[j] = *(const float2 *)from;
            }
        };
        load(count);
        ready();
#pragma unroll 1
        for (int i = 0; i < count;) {
            const int left = count - i;
#pragma unroll
            for (int j = 0; j < kBatch; ++j) v[j] = sum(i + min(j, left - 1));
#pragma unroll
            for (int j = 0; j < kBatch; ++j) v[j] = make_float2(v[j].x * scale.x + bias.x, v[j].y * scale.y + bias.y);
            activate(v, act);
#pragma unroll
            for (int j = 0; j < kBatch; ++j) v[j] = make_float2(v[j].x + add[j].x, v[j].y + add[j].y);
            if (!wide) {
#pragma unroll
                for (int j = 0; j < kBatch; ++j) {
                    if (j < left && n_valid > 0) write_narrow(a, out, m + (i + j) * step, n, v[j].x);
                    if (j < left && n_valid > 1) write_narrow(a, out, m + (i + j) * step, n + 1, v[j].y);
                }
            } else if (size == 4) {
#pragma unroll
                for (int j = 0; j < kBatch; ++j, to += y_step)
                    if (j < left) *(float2 *)to = v[j];
            } else {
#pragma unroll
                for (int j = 0; j < kBatch; ++j, to += y_step)
                    if (j < left) *(uint32_t *)to = half2_bits(v[j].x, v[j].y);
            }
            i += kBatch;
            if (i < count) load(count - i);
        }
    }
};

// y[m][n .. n + 4] = act(v * scale + bias) + residual, of which the first n_valid exist.
__device__ __forceinline__ void write4(const Linear4 &a, const Linear4Part &out, int m, int n, int n_valid,
                                       float (&v)[4], const float4 &scale, const float (&bias)[4]) {
    v[0] *= scale.x, v[1] *= scale.y, v[2] *= scale.z, v[3] *= scale.w;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        v[j] = activate(v[j] + bias[j], a.act);
        if (a.residual && j < n_valid) v[j] += a.residual[m * a.ldr + n + j];
    }
    const size_t to = (size_t)m * out.ldy + n;
    if (n_valid == 4 && out.ldy % 4 == 0) {
        if (a.y_f32) *(float4 *)((float *)out.y + to) = make_float4(v[0], v[1], v[2], v[3]);
        else *(uint2 *)((__half *)out.y + to) = make_uint2(half2_bits(v[0], v[1]), half2_bits(v[2], v[3]));
    } else {
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (j < n_valid) store_y(out.y, to + j, v[j], a.y_f32);
    }
}

// ---- what linear4_row and linear4_small share -----------------------------------------------------------------------

// A warp's ring of two stages for chunks of its weights: kUnits neighbouring strips of 16 rows by kGroups groups of 64
// columns. On Hopper lane 0 orders bulk copies that a barrier of the stage counts. Else every lane copies a part: a
// stage is a group of its copies, which may be empty.
template <int kUnits, int kGroups> struct Ring {
    static constexpr int kStages = 2, kStageBytes = kGroups * kUnits * kUnitBytes; // units [kGroups][kUnits]
    static constexpr int kBytes = kStages * kStageBytes, kBarrierBytes = kStages * 8;
#ifdef BNB__HOPPER
    static constexpr bool kCountsEmpty = false;
#else
    static constexpr bool kCountsEmpty = true; // asking for nothing is a group of copies, too
#endif
    char *stages;
    uint32_t full; // u64 [kStages], Hopper's
    int stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ Ring(char *rings, char *barriers, int warp, int lane)
        : stages(rings + warp * kBytes), full(shared_address(barriers) + warp * kBarrierBytes) {
#ifdef BNB__HOPPER
        if (lane == 0) {
            for (int i = 0; i < kStages; ++i) barrier_init(full + i * 8, 1);
            fence_async();
        }
        __syncwarp();
#endif
    }

    // Asks for a chunk, for stage `to`: its groups, of which `left` exist.
    __device__ __forceinline__ void ask(int to, const char *from, int left, int lane) {
        char *at = stages + to * kStageBytes;
#ifdef BNB__HOPPER
        if (lane != 0) return;
        const int n = kGroups == 1 ? 1 : min(kGroups, left);
        barrier_expect(full + to * 8, n * kUnits * kUnitBytes);
#pragma unroll
        for (int i = 0; i < kGroups; ++i)
            if (i < n)
                bulk_copy(shared_address(at + i * kUnits * kUnitBytes), from + i * kTileBytes, kUnits * kUnitBytes,
                          full + to * 8);
#else
#pragma unroll
        for (int i = 0; i < kGroups; ++i)
#pragma unroll
            for (int j = lane * 16; j < kUnits * kUnitBytes; j += 512)
                if (i < left) copy16(at + i * kUnits * kUnitBytes + j, from + i * kTileBytes + j);
        commit_copies();
#endif
    }

    // The current stage into registers: a lane's codes, and absmax of rows 2 g and 2 g + 1. It is free after a
    // __syncwarp.
    __device__ __forceinline__ void take(uint4 (&codes)[kGroups][kUnits], float2 (&absmax)[kGroups][kUnits], int lane) {
#ifdef BNB__HOPPER
        barrier_wait(full + stage * 8, parity);
#else
        wait_copies<kStages - 1>();
        __syncwarp();
#endif
#pragma unroll
        for (int i = 0; i < kGroups; ++i)
#pragma unroll
            for (int u = 0; u < kUnits; ++u) {
                const char *unit = stages + stage * kStageBytes + (i * kUnits + u) * kUnitBytes;
                codes[i][u] = *(const uint4 *)(unit + lane * 16);
                absmax[i][u] = *(const float2 *)(unit + kCodeBytes + lane / 4 * 8);
            }
    }

    __device__ __forceinline__ void next() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

// The rows of W that a block computes, in bands of kUnits strips: `share` bands, one more where the block is one of the
// first `more`.
template <int kUnits> struct Bands {
    static constexpr int kPerBlock = kBlockUnits / kUnits; // of a block of 64 rows
    int first, n;
    __device__ __forceinline__ Bands(int share, int more)
        : first(blockIdx.x * share + min((int)blockIdx.x, more)), n(share + ((int)blockIdx.x < more)) {}

    // Where the weights of a band begin; past the end: the last.
    __device__ __forceinline__ const char *tiles(const Linear4 &a, int band) const {
        const int at = first + min(band, n - 1);
        return block_at(a, at / kPerBlock).tiles + at % kPerBlock * (kUnits * kUnitBytes);
    }
};

// One of a block's outputs, and what it needs beside the product.
struct Output {
    const Linear4Part *part;
    int n;
    float bias, residual;

    template <int kUnits>
    __device__ __forceinline__ void find(const Linear4 &a, const Bands<kUnits> &bands, int band, int row) {
        const int at = bands.first + min(band, bands.n - 1);
        const Block rows = block_at(a, at / Bands<kUnits>::kPerBlock);
        part = &a.part[rows.part], n = rows.row + at % Bands<kUnits>::kPerBlock * (kUnits * kUnitRows) + row;
        bias = part->bias && n < part->N ? part->bias[n] : 0.0f;
    }
    __device__ __forceinline__ void find_residual(const Linear4 &a, int m) {
        residual = a.residual && n < part->N ? a.residual[m * a.ldr + n] : 0.0f;
    }
    __device__ __forceinline__ void write(const Linear4 &a, int m, float sum) const {
        if (n < part->N) store_y(part->y, m * part->ldy + n, activate(sum + bias, a.act) + residual, a.y_f32);
    }
};

// ---- linear4_row ----------------------------------------------------------------------------------------------------

template <int kUnits, int kGroups> struct Row {
    using Stages = Ring<kUnits, kGroups>;
    static constexpr int kWarps = 16, kThreads = kWarps * 32, kRows = kUnits * kUnitRows;
    static constexpr int kBarriers = 256 * 256; // of the table; x lies in the gaps between its entries
    static constexpr int kScratch = kBarriers + kWarps * Stages::kBarrierBytes; // f32 [64]
    static constexpr int kRing = kScratch + 256;
    static constexpr int kPartial = kRing + kWarps * Stages::kBytes; // f32 [bands][kWarps][kRows]
    static int shared_bytes(int bands) { return kPartial + bands * kWarps * kRows * 4; }
};

// The 64 columns of a group are 32 pairs, of which lane t of the first four needs the pairs 4 e + t, e = 0..7, as its
// column of B for four k16 steps. They lie together in the gap after entry `group` of the table, rotated by the group
// so that staging them has no bank conflicts.
__device__ __forceinline__ int column_place(int group, int t) { return group * 256 + 128 + ((t + group) & 3) * 32; }

// Only the first four lanes load: the other columns of the product are not used, whatever they hold.
__device__ __forceinline__ void load_column(uint32_t (&b)[8], uint32_t address, int lane) {
    asm volatile("{.reg .pred p; setp.lt.s32 p, %9, 4;\n"
                 "@p ld.shared.v4.u32 {%0, %1, %2, %3}, [%8];\n"
                 "@p ld.shared.v4.u32 {%4, %5, %6, %7}, [%8 + 16];}"
                 : "+r"(b[0]), "+r"(b[1]), "+r"(b[2]), "+r"(b[3]), "+r"(b[4]), "+r"(b[5]), "+r"(b[6]), "+r"(b[7])
                 : "r"(address), "r"(lane)
                 : "memory");
}

// Chunks go to the warps in turn, band after band, so that all have the same work whatever the shape. A kernel lasts a
// few microseconds and waits for the one before: what is on the way from that to the first product counts most.
template <int kUnits, int kGroups>
__global__ void __launch_bounds__(512, 1) linear4_row(const __grid_constant__ Linear4 a, int share, int more) {
#ifdef BNB__MMA
    using S = Row<kUnits, kGroups>;
    constexpr int kWarps = S::kWarps;
    extern __shared__ __align__(1024) char shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const Bands<kUnits> bands(share, more);
    const int groups = a.K / kGroup, chunks = ceil_div(groups, kGroups);

    typename S::Stages ring(shared + S::kRing, shared + S::kBarriers, warp, lane);
    int ahead_band = 0, ahead = warp; // the chunk that the ring takes next, at `from`
    const char *from = nullptr;
    auto ask_next = [&](int stage) {
        if (ahead >= chunks || !from) {
            while (ahead >= chunks) ahead -= chunks, ++ahead_band;
            from = bands.tiles(a, ahead_band) + (size_t)ahead * (kGroups * kTileBytes);
        }
        const bool more = ahead_band < bands.n;
        if (!S::Stages::kCountsEmpty && !more) return;
        ring.ask(stage, from, more ? groups - ahead * kGroups : 0, lane);
        from += kWarps * kGroups * kTileBytes, ahead += kWarps;
    };
    ask_next(0); // weights do not depend on the kernel before
    launch_dependents();
    fill_table<256>(shared, a.map, threadIdx.x);

    // Outputs are counted [bands][kRows]. All that is known about a thread's first is fetched before it waits.
    int i = threadIdx.x;
    Output out;
    out.find(a, bands, i / S::kRows, i % S::kRows);
    const NormWeights norm = norm_weights(a, threadIdx.x * 8);
    wait_for_prior_kernel(); // from here on x and residual may be read and y written
    out.find_residual(a, 0);
    stage_row<S::kThreads>(
        a, norm, (float *)(shared + S::kScratch),
        [&](int k, uint4 v) {
            char *to = shared + k % kGroup / 8 * 4;
            *(uint32_t *)(to + column_place(k / kGroup, 0)) = v.x;
            *(uint32_t *)(to + column_place(k / kGroup, 1)) = v.y;
            *(uint32_t *)(to + column_place(k / kGroup, 2)) = v.z;
            *(uint32_t *)(to + column_place(k / kGroup, 3)) = v.w;
        },
        [&] { ask_next(1); }); // more weights only now: x would arrive behind them
    consumer_sync<S::kThreads>();

    float *const partial = (float *)(shared + S::kPartial);
    int chunk = warp;
    uint32_t b[8] = {};
    for (int band = 0; band < bands.n; ++band, chunk -= chunks) {
        float sum[kUnits][2] = {}; // rows 2 g and 2 g + 1, of lanes t == 0
        for (; chunk < chunks; chunk += kWarps) {
            uint4 codes[kGroups][kUnits];
            float2 absmax[kGroups][kUnits];
            ring.take(codes, absmax, lane);
            __syncwarp();
            ask_next(ring.stage);
            ring.next();
#pragma unroll
            for (int j = 0; j < kGroups; ++j) {
                const int group = chunk * kGroups + j;
                if (kGroups > 1 && group >= groups) break;
                load_column(b, shared_address(shared) + column_place(group, t), lane);
#pragma unroll
                for (int u = 0; u < kUnits; ++u) {
                    uint32_t w[16];
                    decode(codes[j][u], shared, lane * 4, w);
                    float d[2][4] = {}; // two short chains
#pragma unroll
                    for (int s = 0; s < 4; ++s) mma(d[s & 1], w + 4 * s, b[2 * s], b[2 * s + 1]);
                    sum[u][0] += (d[0][0] + d[1][0]) * absmax[j][u].x;
                    sum[u][1] += (d[0][2] + d[1][2]) * absmax[j][u].y;
                }
            }
        }
        if (t == 0)
#pragma unroll
            for (int u = 0; u < kUnits; ++u)
#pragma unroll
                for (int j = 0; j < 2; ++j)
                    partial[(band * kWarps + warp) * S::kRows + u * kUnitRows + 2 * g + j] = sum[u][j];
    }
    consumer_sync<S::kThreads>();
#pragma unroll 1
    while (i < bands.n * S::kRows) {
        const float *from_warps = partial + i / S::kRows * (kWarps * S::kRows) + i % S::kRows;
        float v = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) v += from_warps[w * S::kRows];
        out.write(a, 0, v);
        i += S::kThreads; // more than one of a very large N
        if (i < bands.n * S::kRows) out.find(a, bands, i / S::kRows, i % S::kRows), out.find_residual(a, 0);
    }
#endif
}

// ---- linear4_small --------------------------------------------------------------------------------------------------

// Where it computes the norm in front, each row has equally many threads, which keep it in registers, 8 columns in each of
// kSmallNorm places. The norm's weights for the first are asked for ahead.
constexpr int kSmallNorm = 2, kSmallNormEarly = 2;
__host__ __device__ constexpr int small_row_shift(int M) { return M > 4 ? 6 : M > 2 ? 7 : M > 1 ? 8 : 9; } // of 512

template <int kUnits, int kGroups> struct Small {
    using Stages = Ring<kUnits, kGroups>;
#ifdef BNB__HOPPER
    static constexpr bool kBulkX = true; // f16 x arrives by copies of whole rows
#else
    static constexpr bool kBulkX = false;
#endif
    static constexpr int kWarps = 16, kThreads = kWarps * 32, kRows = kUnits * kUnitRows;
    static constexpr int kBarriers = kTableBytes;                                    // the last: u64 of x, Hopper's
    static constexpr int kNorm = kBarriers + kWarps * Stages::kBarrierBytes + 128;   // f32 [2][kWarps]; 128: alignment
    static constexpr int kRing = kNorm + 128;
    static constexpr int kMiddle = kRing + kWarps * Stages::kBytes;                // f32 [bands - 1][M][kRows]
    // f32 [kWarps][M][kRows], over x f16 [M][x_pitch], which is done with by then
    __host__ __device__ static int last_offset(int M, int bands) {
        return kMiddle + max_of(bands - 1, 0) * M * kRows * 4;
    }
    __host__ __device__ static int x_pitch(int K) { return K + 8; } // rows 16 bytes apart in the banks for ldmatrix
    static int shared_bytes(int M, int K, int bands) {
        return last_offset(M, bands) + max_of(kWarps * M * kRows * 4, M * x_pitch(K) * 2);
    }
};

// The chunks of all bands, band after band, are dealt to the warps in equal stretches, so that all have the same work
// whatever the shape. Where a band ends within a stretch the warp puts its sums aside; what it has in the end is its
// last. The blocks of a cluster fetch x for each other.
template <int kUnits, int kGroups>
__global__ void __launch_bounds__(512, 1)
    linear4_small(const __grid_constant__ Linear4 a, int share, int more) {
#ifdef BNB__MMA
    using S = Small<kUnits, kGroups>;
    extern __shared__ __align__(1024) char shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const Bands<kUnits> bands(share, more);
    const int groups = a.K / kGroup, chunks = ceil_div(groups, kGroups), M = a.M;
    const int stretch = ceil_div(bands.n * chunks, S::kWarps);
    const int begin = min(warp * stretch, bands.n * chunks), end = min(begin + stretch, bands.n * chunks);

    typename S::Stages ring(shared + S::kRing, shared + S::kBarriers, warp, lane);
    int band = quotient(begin, 1.0f / chunks), chunk = begin - band * chunks; // of the first, later of the current
    int ahead = begin, ahead_band = band, ahead_chunk = chunk; // what the ring takes next, at `from`
    const char *from = bands.tiles(a, band) + (size_t)chunk * (kGroups * kTileBytes);
    auto ask_next = [&](int stage) {
        if (!S::Stages::kCountsEmpty && ahead >= end) return;
        ring.ask(stage, from, ahead < end ? groups - ahead_chunk * kGroups : 0, lane);
        from += kGroups * kTileBytes, ++ahead;
        if (++ahead_chunk == chunks) ahead_chunk = 0, from = bands.tiles(a, ++ahead_band);
    };
    ask_next(0); // weights do not depend on the kernel before
    launch_dependents();
    fill_table<128>(shared, a.map, threadIdx.x);
    // Of a norm in front. Each row has as many threads.
    const int row_shift = small_row_shift(M), m_own = threadIdx.x >> row_shift, own = threadIdx.x & ((1 << row_shift) - 1);
    const auto column = [&](int i) { return ((i << row_shift) + own) * 8; };
    NormWeights norm[kSmallNormEarly];
    if (a.norm_kind)
#pragma unroll
        for (int i = 0; i < kSmallNormEarly; ++i) norm[i] = norm_weights(a, column(i));
    const int pitch = S::x_pitch(a.K);
    // f16 [M][pitch], at the same place in all blocks
    __half *x = (__half *)(shared + S::last_offset(M, share + (more > 0)));
    const auto put_x = [&](int m, int k, uint4 v) { *(uint4 *)(x + m * pitch + k) = v; };
    const auto stage_norm = [&](auto asked) {
        const float *const from = (const float *)a.x + min(m_own, M - 1) * a.ldx;
        float *const partial = (float *)(shared + S::kNorm);
        const int warps = 1 << row_shift >> 5, first_warp = warp & -warps;
        float v[kSmallNorm][8];
#pragma unroll
        for (int i = 0; i < kSmallNorm; ++i) {
            const int k = min(column(i), a.K - 8);
            *(float4 *)v[i] = load4(from, k), *(float4 *)(v[i] + 4) = load4(from, k + 4);
        }
        asked();
        uint4 normed[kSmallNorm];
        norm_row(
            a, v, norm, column,
            [&](float u, int turn) {
                for (int o = 16; o; o >>= 1) u += __shfl_xor_sync(~0u, u, o);
                if (lane == 0) partial[turn * S::kWarps + warp] = u;
                consumer_sync<S::kThreads>();
                u = 0;
                for (int i = 0; i < warps; ++i) u += partial[turn * S::kWarps + first_warp + i];
                return u;
            },
            normed);
#pragma unroll
        for (int i = 0; i < kSmallNorm; ++i)
            if (m_own < M && column(i) < a.K) put_x(m_own, column(i), normed[i]);
    };
#ifdef BNB__HOPPER
    const uint32_t x_full = shared_address(shared + S::kBarriers) + S::kWarps * S::Stages::kBarrierBytes;
    const int rank = cluster_rank(), ranks = cluster_size();
    if (threadIdx.x == 0) barrier_init(x_full, 1), barrier_init_fence();
    if (ranks > 1) cluster_sync(); // all can be written to
    else consumer_sync<S::kThreads>();
#endif
    wait_for_prior_kernel(); // from here on x and residual may be read and y written
#ifdef BNB__HOPPER
    if (!a.x_f32 && warp == 0) { // each block fetches its share of the rows for all
        if (lane == 0) barrier_expect(x_full, M * a.K * 2);
        __syncwarp();
        for (int m = rank + lane * ranks; m < M; m += 32 * ranks)
            bulk_multicast(shared_address(x + m * pitch), (const __half *)a.x + m * a.ldx, a.K * 2, x_full,
                           (1 << ranks) - 1);
    }
#endif
    if (a.norm_kind) stage_norm([&] { ask_next(1); }); // more weights only now: x would arrive behind them
    else ask_next(1);
    if (!a.norm_kind && (a.x_f32 || !S::kBulkX)) stage_rows<S::kThreads>(a, put_x);
    consumer_sync<S::kThreads>();
#ifdef BNB__HOPPER
    if (!a.x_f32) barrier_wait(x_full, 0);
#endif

    // where this lane's row of ldmatrix begins
    const uint32_t x_lane = shared_address(x + min(lane % 8, M - 1) * pitch + lane / 8 * 8);
    const uint32_t table = shared_address(shared) + lane * 4;
    float *middle = (float *)(shared + S::kMiddle), *last = (float *)x;
    float sum[kUnits][4] = {};
    auto put_sums = [&](float *to) { // [M][kRows]
#pragma unroll
        for (int u = 0; u < kUnits; ++u)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int m = 2 * t + (j & 1);
                if (m < M) to[m * S::kRows + u * kUnitRows + 2 * g + (j >> 1)] = sum[u][j];
                sum[u][j] = 0;
            }
    };
    for (int at = begin; at < end; ++at) {
        uint4 codes[kGroups][kUnits];
        float2 absmax[kGroups][kUnits];
        ring.take(codes, absmax, lane);
        __syncwarp();
        ask_next(ring.stage);
        ring.next();
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const int group = chunk * kGroups + i;
            if (kGroups > 1 && group >= groups) break;
            uint32_t b[8];
            load_matrices(b, x_lane + group * (kGroup * 2));
            load_matrices(b + 4, x_lane + group * (kGroup * 2) + 64);
#pragma unroll
            for (int u = 0; u < kUnits; ++u) {
                uint32_t w[16];
                decode(codes[i][u], table, w);
                float d[2][4] = {}; // two short chains
#pragma unroll
                for (int s = 0; s < 4; ++s) mma(d[s & 1], w + 4 * s, b[2 * s], b[2 * s + 1]);
                sum[u][0] += (d[0][0] + d[1][0]) * absmax[i][u].x;
                sum[u][1] += (d[0][1] + d[1][1]) * absmax[i][u].x;
                sum[u][2] += (d[0][2] + d[1][2]) * absmax[i][u].y;
                sum[u][3] += (d[0][3] + d[1][3]) * absmax[i][u].y;
            }
        }
        if (++chunk == chunks) {
            if (at + 1 < end) put_sums(middle + band * M * S::kRows);
            chunk = 0, ++band;
        }
    }

    // Outputs are counted [bands][M][kRows]; the first of a thread are prepared while the warps meet.
    const float inverse_M = 1.0f / M, inverse_stretch = 1.0f / stretch;
    int i = threadIdx.x;
    struct Place : Output {
        int band, m;
    } out, next; // the second of a thread is prepared, too
    auto find_output = [&](Place &o, int i) {
        if (i >= bands.n * M * S::kRows) return;
        o.band = quotient(i / S::kRows, inverse_M), o.m = i / S::kRows - o.band * M;
        o.find(a, bands, o.band, i % S::kRows), o.find_residual(a, o.m);
    };
    find_output(out, i), find_output(next, i + S::kThreads);
    consumer_sync<S::kThreads>(); // x is done with
    if (begin < end) put_sums(last + warp * M * S::kRows);
    consumer_sync<S::kThreads>();
#pragma unroll 1
    while (i < bands.n * M * S::kRows) {
        // the warps whose stretches touch the band, in order
        const int band_end = (out.band + 1) * chunks, at = out.m * S::kRows + i % S::kRows;
        const int w0 = quotient(out.band * chunks, inverse_stretch), w1 = quotient(band_end - 1, inverse_stretch);
        const bool ends_within = (w1 + 1) * stretch > band_end && out.band + 1 < bands.n;
        float v = 0;
        for (int w = w0; w < w1; ++w) v += last[w * M * S::kRows + at];
        v += ends_within ? middle[out.band * M * S::kRows + at] : last[w1 * M * S::kRows + at];
        out.write(a, out.m, v);
        i += S::kThreads, out = next;
        find_output(next, i + S::kThreads);
    }
#endif
}

// ---- linear4_wgmma --------------------------------------------------------------------------------------------------

// The largest divisor of n up to `most`.
constexpr int divisor_to(int n, int most) {
    return n <= most || n % most == 0 ? min_of(n, most) : divisor_to(n, most - 1);
}

struct WgmmaMaps {
    CUtensorMap x, y[3]; // y of each part
    HowBoxes boxes;
    bool fetch; // the residual, ahead
    int share;  // of a tile's groups of 8 rows of y: what a warpgroup finishes, if there are some left for it
    int first, end; // tiles of this launch
    bool follows;   // another launch with tiles of the same product, which has waited for the kernel before
};

// kN rows of x by 64 kRows rows of W per block; kSplit warpgroups share each 64 rows of W and split K, which may be
// split over the blocks of a cluster before. A step is kDeep groups of 64 columns for each of the kSplit. kBuffers 2:
// the next step is decoded while one is multiplied.
template <int kN, int kRows, int kSplit, int kDeep, int kBuffers> struct Wgmma {
    static constexpr int kWarps = kRows * kSplit * 4;
    // y leaves as boxes, but where few rows are divided among many warpgroups.
    static constexpr bool kBoxed = kN > 64 || (kN == 64 && kSplit == 2);
    static constexpr bool kEarly = kN < 128; // what y needs is asked for before the loop
    // Registers of a consumer where the launch gives all threads too few of them; producers, which keep 24, are a whole
    // warpgroup then. Together they are no more than the launch has.
    static constexpr int kRegisters = kRows == 3 ? 160 : kN > 128 ? 232 : kN == 96 && kSplit == 2 ? 112 : 0;
    static constexpr int kThreads = kWarps * 32 + (kRegisters ? 128 : 64), kRowThreads = kRows * 128;
    static_assert(kRegisters * kWarps * 32 + 24 * 128 <= 65536 / kThreads / 8 * 8 * kThreads, "or they wait forever");
    static constexpr int kStepGroups = kSplit * kDeep;
    static constexpr int kStageX = kStepGroups * kN * kGroup * 2;   // f16 [kStepGroups][kN][64], 128-byte swizzle
    static constexpr int kStageW = kRows * kStepGroups * kTileBytes; // tiles [kRows][kStepGroups]
    // Boxes have kChunk times 8 rows. Each of the warpgroups that split K finishes its share of the rows, and gets the
    // other's sums of them through the memory of the boxes.
    static constexpr int kMine = max_of(kN / 8 / kSplit, 1), kChunk = divisor_to(kMine, kRows == 3 ? 9 : 13);
    static constexpr int kBoxBytes = kChunk * 8 * 256; // of a warpgroup: one box in f32, two in f16
    // Rows of x that one instruction takes. ptxas wants its registers to be no more than the launch gives a thread.
    static constexpr int kWide = kRows == 3 && kN > 144 ? 104 : kN;
    static_assert(!kBoxed || kSplit <= 2);
    // What warps and blocks have summed of y, for those that finish it: [kTogether][kSplit][kRowThreads] pairs.
    static constexpr int kPairs = kN / 4, kPairBytes = kSplit * kRowThreads * 8;
    static constexpr int kTogether = min_of(kPairs, (kBoxed ? kWarps / 4 * kBoxBytes : kTableBytes) / kPairBytes);
    // Where the ring stays deep enough the table has gaps, for one instruction less; without boxes sums lie in them.
    static constexpr bool kRoomy = kN <= (kSplit == 2 ? 64 : 128);
    static constexpr int kSpread = kRoomy ? 2 : 1, kSumSpread = kBoxed ? 1 : 2;
    static_assert(kBoxed || kTogether * kPairBytes <= kTableBytes, "sums fit the gaps");
    static constexpr int kSumsAt = kBoxed ? kSpread * kTableBytes : 128; // from the table; where there are boxes, they
    static constexpr int kFixed = kBoxed ? kSumsAt + kWarps / 4 * kBoxBytes : 2 * kTableBytes, kBarrierBytes = 256;
    static constexpr int kStages = min_of(8, (kMaxShared - kFixed - kBarrierBytes) / (kStageX + kStageW));
    static_assert(kStages >= 3 && (3 * kStages + 2) * 8 <= kBarrierBytes);
    static constexpr int kTable = kStages * kStageX, kSums = kTable + kSumsAt;
    static constexpr int kUnits = kTable + kFixed, kBarriers = kUnits + kStages * kStageW;
    // Of a tile's groups of 8 rows, how many a warpgroup of blocks that split K finishes, which are whole boxes (where boxes
    // may have fewer rows, all of them are slower to write); some may get none. Sums of other blocks arrive where the ring
    // was, boxes are written while these are read; without boxes each takes pairs. 0: they would not fit.
    static constexpr int share(int blocks) {
        int n = ceil_div(kMine, blocks);
        while (kMine * kSplit % n || (n > kChunk && n % kChunk)) ++n;
        const int all = blocks * kSplit;
        const bool fits = !kBoxed || all * n * kSplit * kRows * 2048 <= kSums;
        return fits && ceil_div(kPairs, all) * all * kPairBytes <= kBarriers ? n : 0;
    }
    static constexpr int kShared = kBarriers + kBarrierBytes;
};

template <int kN, int kRows, int kSplit, int kDeep, int kBuffers>
__global__ void __launch_bounds__(Wgmma<kN, kRows, kSplit, kDeep, kBuffers>::kThreads, 1)
    linear4_wgmma(const __grid_constant__ Linear4 a, const __grid_constant__ WgmmaMaps maps, int n_blocks) {
#ifdef BNB__HOPPER
    using S = Wgmma<kN, kRows, kSplit, kDeep, kBuffers>;
    extern __shared__ __align__(1024) char shared[];
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32; // warp: in uniform registers
    const int rank = cluster_rank(), ranks = cluster_size();

    // Tiles of y with the same rows of W follow each other, so that W is read from memory once.
    const int groups = a.K / kGroup, all_steps = ceil_div(groups, S::kStepGroups);
    const int step0 = all_steps * rank / ranks, step1 = all_steps * (rank + 1) / ranks;
    const int m_tiles = ceil_div(a.M, kN), n_tiles = maps.end;
    const int tile0 = maps.first + blockIdx.x / ranks, tile_stride = gridDim.x / ranks;
    auto first_block = [&](int tile) { return tile / m_tiles * kRows; };

    const uint32_t w_full = shared_address(shared + S::kBarriers); // barriers are u64, of these three [kStages] each
    const uint32_t x_full = w_full + S::kStages * 8, empty = x_full + S::kStages * 8;
    const uint32_t x_first = empty + S::kStages * 8, sums_full = x_first + 8;
    const uint32_t x_stages = shared_address(shared), w_stages = shared_address(shared + S::kUnits);
    if (threadIdx.x == 0) {
        prefetch_map(&maps.x);
        for (int i = 0; S::kEarly && S::kBoxed && i < a.n_parts && maps.boxes != kBoxesNone; ++i) prefetch_map(&maps.y[i]);
        for (int i = 0; i < S::kStages; ++i) {
            barrier_init(w_full + i * 8, 1);
            barrier_init(x_full + i * 8, 1);
            barrier_init(empty + i * 8, S::kWarps * 32);
        }
        barrier_init(x_first, 1);
        barrier_init(sums_full, 1);
        barrier_init_fence();
        if (ranks > 1) { // what other blocks that split K send to this one: what its warpgroups finish of their sums
            const int dealt = ranks * kSplit, most = 2 * kSplit * maps.share;
            const int pairs = S::kBoxed && maps.boxes != kBoxesNone
                                  ? min(max(S::kPairs - rank * most, 0), most)
                                  : S::kPairs / dealt * kSplit + min(max(S::kPairs % dealt - rank * kSplit, 0), kSplit);
            barrier_expect(sums_full, pairs * (ranks - 1) * S::kPairBytes);
        }
    }
    __syncthreads();
    launch_dependents();

    int stage = 0;
    uint32_t parity = 0;
    auto advance = [&] {
        if (++stage == S::kStages) stage = 0, parity ^= 1;
    };
    if (warp >= S::kWarps) { // producers: one thread of these asks for weights, one for x
        if (S::kRegisters) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (warp < S::kWarps + 2 && lane == 0) {
            const bool weights = warp == S::kWarps;
            const char *rows[kRows]; // the tiles of each block of 64 rows
            auto copy_tiles = [&](int to, int step) {
                const uint32_t bytes = min(S::kStepGroups, groups - step * S::kStepGroups) * kTileBytes;
                barrier_expect(w_full + to * 8, kRows * bytes);
#pragma unroll
                for (int r = 0; r < kRows; ++r)
                    bulk_copy(w_stages + to * S::kStageW + r * S::kStepGroups * kTileBytes,
                              rows[r] + step * (S::kStepGroups * kTileBytes), bytes, w_full + to * 8);
            };
            auto copy_x = [&](int to, int step, int m0) { // columns past K and rows past M arrive as zeros
                barrier_expect(x_full + to * 8, S::kStageX);
#pragma unroll
                for (int i = 0; i < S::kStepGroups; ++i) {
                    const uint32_t at = x_stages + to * S::kStageX + i * (kN * kGroup * 2);
                    tensor_copy(at, &maps.x, (step * S::kStepGroups + i) * kGroup, m0, x_full + to * 8);
                }
            };
            // Of the residual that the tile will need, what belongs to one step's share of its rows goes to the second
            // level cache. Only one weight has a residual.
            const int ahead = ceil_div(kN, step1 - step0);
            const bool fetches = maps.fetch && ((uintptr_t)a.residual & 15) == 0 && a.ldr % 4 == 0;
            if (!weights && !maps.follows) wait_for_prior_kernel(); // which weights do not depend on
            int copies = 0;
            for (int tile = tile0; tile < n_tiles; tile += tile_stride) {
                const int m0 = tile % m_tiles * kN, n0 = first_block(tile) * kBlockRows;
                const uint32_t line = fetches ? max(min(kRows * kBlockRows, a.part[0].N - n0), 0) / 4 * 16 : 0; // bytes
#pragma unroll
                for (int r = 0; r < kRows; ++r) rows[r] = block_at(a, min(first_block(tile) + r, n_blocks - 1)).tiles;
                int m = m0;
#pragma unroll 1
                for (int step = step0; step < step1; ++step, ++copies, advance()) {
                    if (copies >= S::kStages) barrier_wait(empty + stage * 8, parity ^ 1);
                    if (weights) {
                        copy_tiles(stage, step);
                        if (copies == 1) barrier_wait(x_first, 0); // more weights would be in the way
                        continue;
                    }
                    copy_x(stage, step, m0);
                    if (copies == 1) barrier_arrive(x_first);
                    if (line > 0)
                        for (const int end = min(m + ahead, min(m0 + kN, a.M)); m < end; ++m)
                            prefetch_bulk(a.residual + m * a.ldr + n0, line);
                }
            }
        }
        return;
    }

    const int g = lane / 4, t = lane % 4, row_warp = warp % (kRows * 4), split = warp / (kRows * 4);
    constexpr int kThreads = S::kWarps * 32;
    if (S::kRegisters) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(S::kRegisters ? S::kRegisters : 24));
    for (int i = threadIdx.x; i < 512; i += kThreads) fill_table<128 * S::kSpread>(shared + S::kTable, a.map, i);
    consumer_sync<kThreads>();

    // Addresses are kept, not computed in each step anew.
    uint32_t bank = lane * 4, table = shared_address(shared + S::kTable) + bank;
    uint32_t codes0 = w_stages + (row_warp / 4 * S::kStepGroups + split * kDeep) * kTileBytes +
                      row_warp % 4 * kUnitBytes + lane * 16;
    uint32_t absmax0 = codes0 - lane * 16 + kCodeBytes + g * 8;
    asm volatile("" : "+r"(bank), "+r"(table), "+r"(codes0), "+r"(absmax0));
    float acc[kN / 2]; // rows 2 g (+ 1) of the warp's unit, rows 8 i + 2 t (+ 1) of x
    using YBoxes = Boxes<S::kChunk * 8, S::kBoxBytes>;
    uint32_t box_count = 0;
    for (int tile = tile0; tile < n_tiles; tile += tile_stride) {
        const int block = first_block(tile) + row_warp / 4;
        const bool in_range = block < n_blocks;
        const Block rows = block_at(a, in_range ? block : n_blocks - 1);
        const int row = row_warp % 4 * kUnitRows + 2 * g;
        const float2 scale = *(const float2 *)(rows.row_scale + row);
        const float inverse0 = 1.0f / scale.x, inverse1 = 1.0f / scale.y;
        // Asked for now: in the end nothing else would be left to do until it is there. Large tiles have other code in their
        // loop then, and are slower.
        const PairOut::Early early = [&]() -> PairOut::Early {
            if constexpr (!S::kEarly) return {};
            const Linear4Part &out = a.part[rows.part];
            const int n = rows.row + row, n_valid = in_range ? out.N - n : 0;
            return {&out, n, n_valid, PairOut::bias_of(out, n, n_valid)};
        }();

        uint4 codes[kDeep];
        float2 absmax[kDeep];
        int use = stage; // the stage whose x is multiplied next; take() is ahead of it
        uint32_t use_parity = parity;
        auto take = [&](int step) { // the weights of a step once they are there
            barrier_wait(w_full + stage * 8, parity);
#pragma unroll
            for (int d = 0; d < kDeep; ++d) {
                codes[d] = load_shared4(codes0 + stage * S::kStageW + d * kTileBytes);
                absmax[d] = load_shared2(absmax0 + stage * S::kStageW + d * kTileBytes);
                if (S::kStepGroups > 1 && step * S::kStepGroups + split * kDeep + d >= groups)
                    absmax[d] = make_float2(0, 0); // past K: x is zero
            }
            advance();
        };
        // f: A fragments of a step. First its pairs are looked up, then they get their scales. Tiles of up to 128 rows
        // take as long as this chain: there the next codes are taken while the table answers. Larger ones lose by it.
        __half2 scales[kDeep]; // of rows 2 g and 2 g + 1
        auto look_up = [&](uint32_t(&f)[kDeep][16]) {
#pragma unroll
            for (int d = 0; d < kDeep; ++d) {
                if constexpr (S::kSpread == 2) decode(codes[d], shared + S::kTable, bank, f[d]);
                else decode(codes[d], table, f[d]);
                scales[d] = __floats2half2_rn(absmax[d].x * inverse0, absmax[d].y * inverse1);
            }
        };
        auto ask_now = [&](uint32_t(&f)[kDeep][16]) { // not where they are used
#pragma unroll
            for (int i = 0; i < kDeep * 16; ++i) asm volatile("" : "+r"(f[i / 16][i % 16]));
        };
        auto scale_up = [&](uint32_t(&f)[kDeep][16]) {
#pragma unroll
            for (int i = 0; i < kDeep * 16; ++i) {
                const __half2 both = scales[i / 16], v = *(const __half2 *)&f[i / 16][i % 16];
                const __half2 w = __hmul2(v, i & 1 ? __high2half2(both) : __low2half2(both));
                f[i / 16][i % 16] = *(const uint32_t *)&w;
            }
        };
        auto multiply = [&](uint32_t(&f)[kDeep][16], int step) {
            // 128-byte swizzle, 8 rows of x are 1024 bytes; a k16 step is 32 bytes on
            const uint32_t x = x_stages + use * S::kStageX + split * (kDeep * kN * kGroup * 2);
            const uint64_t b = 1ull << 62 | 64ull << 32 | 1ull << 16 | (x & 0x3ffff) >> 4;
            barrier_wait(x_full + use * 8, use_parity);
            wgmma_fence();
#pragma unroll
            for (int s = 0; s < 4 * kDeep; ++s) {
                const uint32_t *const w = f[s / 4] + s % 4 * 4;
                const uint64_t at = b + s / 4 * (kN * kGroup * 2 / 16) + s % 4 * 2;
                const bool more = s > 0 || step > step0;
                if constexpr (S::kWide == kN) {
                    wgmma(acc, w, at, more);
                } else {
                    wgmma(*(float(*)[S::kWide / 2])acc, w, at, more);
                    wgmma(*(float(*)[(kN - S::kWide) / 2])(acc + S::kWide / 2), w, at + S::kWide * kGroup * 2 / 16,
                          more);
                }
            }
            wgmma_commit();
        };
        // With two buffers the next step is decoded while the tensor cores run; with one, other warpgroups keep them
        // busy. Where it is faster, they have that step to go on with before they are waited for.
        constexpr bool kFollows = kBuffers == 2 && (kN == 96 || kN == 176);
        auto release = [&](int which) { // a stage: every lane for what it has read; one for all is no faster
            barrier_arrive(empty + which * 8);
        };
        int before = 0; // the stage of the step before
        uint32_t f[kBuffers][kDeep][16];
        take(step0);
        if (kBuffers == 2) {
            look_up(f[0]), scale_up(f[0]);
            if (step0 + 1 < step1) take(step0 + 1);
        }
        for (int step = step0; step < step1; step += kBuffers) {
#pragma unroll
            for (int i = 0; i < kBuffers; ++i) {
                const int now = step + i;
                if (now >= step1) break;
                if (kBuffers == 1) look_up(f[0]), scale_up(f[0]);
                const int running = use;
                multiply(f[i], now);
                if (kFollows && now > step0) wgmma_wait<1>(), release(before);
                before = running;
                if (++use == S::kStages) use = 0, use_parity ^= 1;
                if (kBuffers == 2 && now + 1 < step1) {
                    look_up(f[i ^ 1]);
                    if (S::kRoomy) ask_now(f[i ^ 1]);
                    else scale_up(f[i ^ 1]);
                }
                if (now + kBuffers < step1) take(now + kBuffers);
                if (kBuffers == 2 && S::kRoomy && now + 1 < step1) scale_up(f[i ^ 1]);
                if (!kFollows) wgmma_wait<0>(), release(running);
            }
        }
        if (kFollows) wgmma_wait<0>(), release(before);
        wait_for_prior_kernel(); // which may use y and the residual; weights do not depend on it, and x was waited for

        // y, in pairs: two rows of W that are neighbours in y, for one row of x. Pair p has row p / 2 * 8 + 2 t + p % 2
        // of the tile. The 8 lanes of a row of x write 64 bytes that follow each other.
        const int m0 = tile % m_tiles * kN + 2 * t;
        const PairOut pair = [&] {
            if constexpr (S::kEarly) return PairOut(a, *early.out, early.n, early.n_valid, scale, &early.bias);
            const Linear4Part &out = a.part[rows.part];
            const int n = rows.row + row;
            return PairOut(a, out, n, in_range ? out.N - n : 0, scale, nullptr);
        }();
        if constexpr (S::kBoxed)
            if (maps.boxes != kBoxesNone) {
                // Chunks of rows, by a loop through which the sums move: registers have no index.
                YBoxes boxes(shared_address(shared + S::kSums) + warp / 4 * S::kBoxBytes, a.y_f32, 2 + kRows + warp / 4,
                             box_count);
                const int share = maps.share, first_group = (rank * kSplit + split) * share;
                const int mine = first_group < kN / 8 ? share : 0;
                const int first_row = tile % m_tiles * kN + first_group * 8;
                // f32 [ranks * kSplit that have summed][kRows][kSplit][share][128 threads][4]
                const uint32_t sums = x_stages + row_warp / 4 * (kSplit * share * 2048) + threadIdx.x % 128 * 16;
                constexpr int kHalf = kN / 4; // of the sums
                auto add_half = [&](uint32_t from) {
#pragma unroll
                    for (int i = 0; i < kHalf; i += 4) {
                        const uint4 got = load_shared4(from + i * 512);
                        acc[i] += __uint_as_float(got.x), acc[i + 1] += __uint_as_float(got.y);
                        acc[i + 2] += __uint_as_float(got.z), acc[i + 3] += __uint_as_float(got.w);
                    }
                };
                const bool swaps = ranks == 2 && kSplit == 1 && S::kMine % 2 == 0;
                if (swaps) { // each keeps its half of the sums where they are, and sends the other
#pragma unroll
                    for (int i = 0; i < kHalf; ++i) {
                        const float low = acc[i], high = acc[i + kHalf];
                        acc[i] = rank ? high : low, acc[i + kHalf] = rank ? low : high;
                    }
                    cluster_sync(); // all rings are free
#pragma unroll
                    for (int i = 0; i < kHalf; i += 4)
                        cluster_send(sums + i * 512, sums_full, rank ^ 1, acc[kHalf + i], acc[kHalf + i + 1],
                                     acc[kHalf + i + 2], acc[kHalf + i + 3]);
                    barrier_wait(sums_full, 0);
                    add_half(sums);
                } else if (ranks > 1) {
                    cluster_sync(); // all rings are free
                    const uint32_t to = sums + (rank * kSplit + split) * (kRows * kSplit * share * 2048);
                    int owner = 0, slot = 0;
#pragma unroll
                    for (int i = 0; i < kN / 8; ++i) {
                        const uint32_t at = to + slot * 2048;
                        if (owner == rank)
                            store_shared4(at, {acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]});
                        else
                            cluster_send(at, sums_full, owner, acc[4 * i], acc[4 * i + 1], acc[4 * i + 2],
                                         acc[4 * i + 3]);
                        if (++slot == kSplit * share) slot = 0, ++owner;
                        asm volatile("" : "+r"(slot), "+r"(owner)); // not all of them ahead
                    }
                    if (kSplit > 1) consumer_sync<kThreads>(); // else a lane reads what it wrote
                    barrier_wait(sums_full, 0);
                } else if constexpr (kSplit > 1) { // each gives away the other's half of the rows
                    const uint32_t mine = boxes.base + threadIdx.x % 128 * 16;
                    const uint32_t theirs = mine + (split ? -kRows : kRows) * S::kBoxBytes;
                    boxes.drain();
                    named_barrier(boxes.barrier, 128);
#pragma unroll
                    for (int i = 0; i < kHalf; i += 4) {
                        float give[4];
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            give[j] = split ? acc[i + j] : acc[i + j + kHalf];
                            acc[i + j] = split ? acc[i + j + kHalf] : acc[i + j];
                        }
                        store_shared4(mine + i * 512, {give[0], give[1], give[2], give[3]});
                    }
                    named_barrier(2 + row_warp / 4, kSplit * 128);
                    add_half(theirs);
                    named_barrier(2 + row_warp / 4, kSplit * 128);
                }
#pragma unroll 1
                for (int c = 0; c * S::kChunk < mine && first_row + c * (S::kChunk * 8) < a.M; ++c) {
                    if (ranks > 1 && !swaps) {
#pragma unroll
                        for (int i = 0; i < S::kChunk * 4; ++i) acc[i] = 0;
#pragma unroll 1
                        for (int k = 0; k < ranks * kSplit; ++k)
#pragma unroll
                            for (int i = 0; i < S::kChunk; ++i) {
                                if (c * S::kChunk + i >= share) break;
                                const uint4 q = load_shared4(
                                    sums + ((k * kRows * kSplit + split) * share + c * S::kChunk + i) * 2048);
                                acc[4 * i] += __uint_as_float(q.x), acc[4 * i + 1] += __uint_as_float(q.y);
                                acc[4 * i + 2] += __uint_as_float(q.z), acc[4 * i + 3] += __uint_as_float(q.w);
                            }
                    }
                    float2 v[2 * S::kChunk];
                    const int row0 = first_row + c * (S::kChunk * 8);
#pragma unroll
                    for (int p = 0; p < 2 * S::kChunk; ++p)
                        v[p] = make_float2(acc[p / 2 * 4 + p % 2] * scale.x + pair.bias.x,
                                           acc[p / 2 * 4 + 2 + p % 2] * scale.y + pair.bias.y);
                    activate(v, a.act);
                    if (maps.boxes == kBoxesBeside && pair.n_valid > 0) {
                        constexpr int kBatch = 8; // loads that are under way together
#pragma unroll
                        for (int p0 = 0; p0 < 2 * S::kChunk; p0 += kBatch) {
                            float2 add[kBatch];
#pragma unroll
                            for (int p = p0; p < min_of(p0 + kBatch, 2 * S::kChunk); ++p) {
                                const int m = row0 + p / 2 * 8 + 2 * t + p % 2;
                                add[p - p0] = m < a.M ? *(const float2 *)(a.residual + m * a.ldr + pair.n) : make_float2(0, 0);
                            }
                            asm volatile("" ::: "memory"); // nor more of them: registers are few
#pragma unroll
                            for (int p = p0; p < min_of(p0 + kBatch, 2 * S::kChunk); ++p)
                                v[p].x += add[p - p0].x, v[p].y += add[p - p0].y;
                        }
                    }
                    boxes.write(&maps.y[rows.part], rows.row, row0, in_range, maps.boxes == kBoxesAdd, v);
#pragma unroll
                    for (int i = 0; i + S::kChunk * 4 < S::kMine * 4; ++i) acc[i] = acc[i + S::kChunk * 4];
                }
                continue;
            }
        // They go through shared memory, which has an index at run time, and where the parts of a sum meet: the pairs
        // are dealt to the warpgroups with these rows, in all blocks.
        constexpr int kBatch = min_of(S::kWarps >= 12 && kN > 64 ? 2 : 8, S::kTogether / max_of(kSplit, 2));
        if (ranks > 1) {
            // [dealt that have summed][slots][kSplit][kRowThreads], of pairs that are dealt to a block
            const int dealt = ranks * kSplit, own = rank * kSplit + split, slots = ceil_div(S::kPairs, dealt);
            const uint32_t sums = x_stages + (row_warp * 32 + lane) * 8;
            constexpr int kSlotBytes = S::kPairBytes, kShareBytes = S::kRowThreads * 8;
            cluster_sync(); // all rings are free
            int owner = 0, slot = 0;
#pragma unroll
            for (int p = 0; p < S::kPairs; ++p) {
                const uint32_t to = sums + (own * slots + slot) * kSlotBytes + owner % kSplit * kShareBytes;
                const float2 v = make_float2(acc[p / 2 * 4 + p % 2], acc[p / 2 * 4 + 2 + p % 2]);
                if (owner / kSplit == rank) store_shared2(to, v);
                else cluster_send(to, sums_full, owner / kSplit, v.x, v.y);
                if (++owner == dealt) owner = 0, ++slot;
                asm volatile("" : "+r"(slot), "+r"(owner)); // not all of them ahead
            }
            auto sum = [&](int i) {
                float2 v = make_float2(0, 0);
#pragma unroll 1
                for (int k = 0; k < dealt; ++k) {
                    const float2 q = load_shared2(sums + (k * slots + i) * kSlotBytes + split * kShareBytes);
                    v.x += q.x, v.y += q.y;
                }
                return v;
            };
            auto all_are_here = [&] {
                consumer_sync<kThreads>();
                barrier_wait(sums_full, 0);
            };
            if (own < S::kPairs)
                pair.write<kBatch>(m0 + own / 2 * 8 + own % 2, dealt * 4, ceil_div(S::kPairs - own, dealt),
                                   all_are_here, sum);
            else all_are_here();
            continue;
        }
        // Within a block, by rounds; without others a lane reads what it wrote. A warp's 32 pairs are 256 bytes, or with
        // gaps twice 128.
        constexpr int kPairAt = S::kPairBytes * S::kSumSpread, kSplitAt = S::kRowThreads * 8 * S::kSumSpread;
        constexpr int kStep = max_of(kSplit, 2); // pairs; every second lies 8 rows on
        const uint32_t meet = shared_address(shared + S::kSums) + row_warp * (256 * S::kSumSpread) +
                              lane / 16 * (128 * S::kSumSpread) + lane % 16 * 8;
        auto sync = [&] {
            if (kSplit > 1) consumer_sync<kThreads>();
        };
#pragma unroll 1
        for (int p0 = 0; p0 < S::kPairs; p0 += S::kTogether) {
            if (tile % m_tiles * kN + p0 * 4 >= a.M) break;
#pragma unroll
            for (int p = 0; p < S::kPairs; ++p) // registers have none
                if (p / S::kTogether * S::kTogether == p0)
                    store_shared2(meet + p % S::kTogether * kPairAt + split * kSplitAt,
                                  make_float2(acc[p / 2 * 4 + p % 2], acc[p / 2 * 4 + 2 + p % 2]));
#pragma unroll 1
            for (int first = split; first < (kSplit == 1 ? 2 : min(split + 1, S::kTogether)); ++first) {
                auto sum = [&](int i) {
                    float2 v = make_float2(0, 0);
#pragma unroll
                    for (int k = 0; k < kSplit; ++k) {
                        const float2 q = load_shared2(meet + (first + i * kStep) * kPairAt + k * kSplitAt);
                        v.x += q.x, v.y += q.y;
                    }
                    return v;
                };
                pair.write<kBatch>(m0 + p0 * 4 + first / 2 * 8 + first % 2, kStep * 4,
                                   (min(S::kTogether, S::kPairs - p0) - first + kStep - 1) / kStep, sync, sum);
            }
            if (split >= S::kTogether) sync(); // there is nothing for these
            sync();
        }
    }
    if (S::kBoxed) YBoxes::drain();
#endif
}

// ---- linear4_mma ----------------------------------------------------------------------------------------------------

// kN rows of x by kRowWarps * kUnits units of 16 rows of W per block. A warp computes kUnits of them; the kSplit warps
// that share units split K.
template <int kN, int kUnits, int kRowWarps, int kStages> struct Mma {
    static constexpr int kWarps = 8, kThreads = kWarps * 32, kSplit = kWarps / kRowWarps;
    static_assert(kStages >= 3, "a step is multiplied, one is decoded, one is copied");
    static constexpr int kAllUnits = kRowWarps * kUnits, kRows = kAllUnits * kUnitRows;
    static constexpr int kStrip = kAllUnits < kBlockUnits ? kAllUnits : kBlockUnits; // units of a tile
    static constexpr int kStripBytes = kStrip * kUnitBytes, kStripPieces = kStripBytes / 16;
    static constexpr int kBlocks = kAllUnits / kStrip;             // blocks of 64 rows that the units are of
    static constexpr int kStageX = kSplit * kN * kGroup * 2;       // f16 [kSplit][kN][64], 128-byte swizzle
    static constexpr int kStageW = kSplit * kBlocks * kStripBytes; // units [kBlocks][kSplit][kStrip]
    // A thread's copies of 16 bytes for a step: of x, and of W for each of the blocks.
    static constexpr int kCopiesX = kStageX / (16 * kThreads), kCopiesW = ceil_div(kSplit * kStripPieces, kThreads);
    static constexpr int kChunk = kN < 32 ? kN : 32; // columns of y that are written together
    static constexpr int kPitch = kRows + 4;         // conflict-free for the accumulator fragments
    static constexpr int kPartialBytes = kSplit * kChunk * kPitch * 4; // f32 [kSplit][kChunk][kPitch], over the ring
    static constexpr int kX = kTableBytes, kW = kX + kStages * kStageX, kEnd = kW + kStages * kStageW;
    static constexpr int kShared = kEnd > kX + kPartialBytes ? kEnd : kX + kPartialBytes;
    // Two blocks per multiprocessor where they fit an A100's 164 KiB: one decodes while the other multiplies.
    static constexpr int kPerSm = kShared <= 81 * 1024 ? 2 : 1;
};

template <int kN, int kUnits, int kRowWarps, int kStages>
__global__ void __launch_bounds__(256, Mma<kN, kUnits, kRowWarps, kStages>::kPerSm)
    linear4_mma(const __grid_constant__ Linear4 a, int n_blocks) {
#ifdef BNB__MMA
    using S = Mma<kN, kUnits, kRowWarps, kStages>;
    extern __shared__ __align__(1024) char shared[];
    constexpr int kSplit = S::kSplit;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int row_warp = warp % kRowWarps, split = warp / kRowWarps;

    // A step is kSplit groups of 64 columns. Blocks with the same rows of W follow each other, so that W is read from
    // memory once.
    const int groups = a.K / kGroup, steps = ceil_div(groups, kSplit), m_tiles = ceil_div(a.M, kN);
    const int m0 = blockIdx.x % m_tiles * kN, unit0 = blockIdx.x / m_tiles * S::kAllUnits;
    auto block_of = [&](int unit) { return min((unit0 + unit) / kBlockUnits, n_blocks - 1); };

    launch_dependents();
    wait_for_prior_kernel();

    // What a thread copies for each step: of x the same 16 bytes of rows that are 32 apart, or with kN == 16 of a row in
    // every other group; of W what lies kThreads pieces apart in the ring.
    const int line = thread / 8, row = line % kN, piece = thread % 8; // line: of the first 32 of [kSplit][kN]
    const __half *x_from = (const __half *)a.x + (m0 + row) * a.ldx + line / kN * kGroup + piece * 8;
    const int x_to = S::kX + line * 128 + ((piece ^ row) & 7) * 16;
    const char *w_from[S::kBlocks]; // the first group's units
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b)
        w_from[b] = block_at(a, block_of(b * kBlockUnits)).tiles + unit0 % kBlockUnits * kUnitBytes;
    int w_at[S::kCopiesW];
#pragma unroll
    for (int i = 0; i < S::kCopiesW; ++i) {
        const int p = thread + i * S::kThreads;
        w_at[i] = p / S::kStripPieces * kTileBytes + p % S::kStripPieces * 16;
    }
    int left = groups, free_stage = 0; // what the next copies begin with, and where they go
    auto copy_step = [&] {
        if (left > 0) {
#pragma unroll
            for (int i = 0; i < S::kCopiesX; ++i) { // columns past K and rows past M: zeros
                const int rows = i * 32 % kN, group = i * 32 / kN;
                const bool valid = m0 + row + rows < a.M && line / kN + group < left;
                const __half *from = x_from + rows * a.ldx + group * kGroup;
                copy16(shared + x_to + free_stage * S::kStageX + i * 32 * 128, valid ? from : a.x, valid);
            }
#pragma unroll
            for (int b = 0; b < S::kBlocks; ++b)
#pragma unroll
                for (int i = 0; i < S::kCopiesW; ++i) {
                    const int p = thread + i * S::kThreads;
                    if (p < kSplit * S::kStripPieces && w_at[i] < left * kTileBytes)
                        copy16(shared + S::kW + free_stage * S::kStageW + (b * kSplit * S::kStripPieces + p) * 16,
                               w_from[b] + w_at[i]);
                }
        }
        commit_copies(); // if of nothing: a step is a group
        x_from += kSplit * kGroup, left -= kSplit;
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b) w_from[b] += kSplit * kTileBytes;
        if (++free_stage == kStages) free_stage = 0;
    };
    for (int i = 0; i < kStages - 1; ++i) copy_step();
    for (int i = thread; i < 512; i += S::kThreads) fill_table<128>(shared, a.map, i);

    float inverse[kUnits][2]; // of the scales of rows 2 g and 2 g + 1
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
        const int unit = row_warp * kUnits + u;
        const float *scale = block_at(a, block_of(unit)).row_scale + (unit0 + unit) % kBlockUnits * kUnitRows + 2 * g;
        inverse[u][0] = 1.0f / scale[0], inverse[u][1] = 1.0f / scale[1];
    }
    const uint32_t table = shared_address(shared) + lane * 4;
    int fetched = split, w_stage = 0; // the group and the stage that fetch comes to
    auto fetch = [&](uint32_t(&f)[kUnits][16]) { // decodes the weights of a step
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            const int unit = row_warp * kUnits + u;
            const char *from = shared + S::kW + w_stage * S::kStageW +
                               (unit / S::kStrip * kSplit + split) * S::kStripBytes + unit % S::kStrip * kUnitBytes;
            decode(*(const uint4 *)(from + lane * 16), table, f[u]);
            float2 absmax = *(const float2 *)(from + kCodeBytes + g * 8);
            if (kSplit > 1 && fetched >= groups) absmax = make_float2(0, 0); // past K: x is zero
            const __half2 scale0 = __float2half2_rn(absmax.x * inverse[u][0]);
            const __half2 scale8 = __float2half2_rn(absmax.y * inverse[u][1]);
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                const __half2 v = __hmul2(*(const __half2 *)&f[u][i], i & 1 ? scale8 : scale0);
                f[u][i] = *(const uint32_t *)&v;
            }
        }
        fetched += kSplit;
        if (++w_stage == kStages) w_stage = 0;
    };
    float acc[kUnits][kN / 8][4] = {}; // rows 2 g (+ 1) of the units, rows 8 n + 2 t (+ 1) of x
    int x_stage = 0;
    auto multiply = [&](const uint32_t(&f)[kUnits][16]) {
        constexpr int kBatch = kN / 8 < 4 ? kN / 8 : 4; // tiles of 8 rows of x whose fragments are loaded together
        const uint32_t x = shared_address(shared + S::kX) + x_stage * S::kStageX + split * (kN * kGroup * 2) +
                           lane % 8 * 128;
#pragma unroll
        for (int half = 0; half < 2; ++half) // of the 64 columns
#pragma unroll
            for (int n = 0; n < kN / 8; n += kBatch) {
                uint32_t b[kBatch][4];
#pragma unroll
                for (int i = 0; i < kBatch; ++i)
                    load_matrices(b[i], x + (n + i) * 1024 + ((half * 4 + lane / 8) ^ lane % 8) * 16);
#pragma unroll
                for (int s = 0; s < 2; ++s)
#pragma unroll
                    for (int i = 0; i < kBatch; ++i)
#pragma unroll
                        for (int u = 0; u < kUnits; ++u)
                            mma(acc[u][n + i], f[u] + 4 * (2 * half + s), b[i][2 * s], b[i][2 * s + 1]);
            }
        if (++x_stage == kStages) x_stage = 0;
    };
    // The next step is decoded while the tensor cores run.
    uint32_t f[2][kUnits][16];
    wait_copies<kStages - 2>(); // of the kStages - 1 steps under way the first is there
    __syncthreads();
    fetch(f[0]);
    for (int step = 0; step < steps; step += 2) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (step + i >= steps) break;
            wait_copies<kStages - 3>(); // step + i + 1 is there,
            __syncthreads();            // and nobody reads step + i - 1, whose stage is free now
            copy_step();
            if (step + i + 1 < steps) fetch(f[i ^ 1]);
            multiply(f[i]);
        }
    }

    // y: the fragments go through shared memory, kChunk rows of x at a time, so that rows of y are written whole.
    constexpr int kQuads = S::kRows / 4; // a thread keeps the same four rows of W
    float *partial = (float *)(shared + S::kX);
    const int quad = thread % kQuads, unit = unit0 + quad / 4;
    const Block out_block = block_at(a, block_of(quad / 4));
    const Linear4Part &out = a.part[out_block.part];
    const int n = out_block.row + unit % kBlockUnits * kUnitRows + quad % 4 * 4;
    const int n_valid = unit / kBlockUnits < n_blocks ? min(4, out.N - n) : 0;
    const float4 scale = *(const float4 *)(out_block.row_scale + unit % kBlockUnits * kUnitRows + quad % 4 * 4);
    float bias[4] = {};
    for (int j = 0; j < n_valid; ++j) bias[j] = out.bias ? out.bias[n + j] : 0.0f;
#pragma unroll
    for (int c = 0; c < kN; c += S::kChunk) {
        if (m0 + c >= a.M) break;
        __syncthreads(); // what lies there was read
#pragma unroll
        for (int u = 0; u < kUnits; ++u)
#pragma unroll
            for (int i = 0; i < S::kChunk / 2; ++i)
                partial[(split * S::kChunk + i / 4 * 8 + 2 * t + i % 2) * S::kPitch +
                        (row_warp * kUnits + u) * kUnitRows + 2 * g + i / 2 % 2] = acc[u][c / 8 + i / 4][i % 4];
        __syncthreads();
        for (int i = thread / kQuads; i < S::kChunk && m0 + c + i < a.M; i += S::kThreads / kQuads) {
            float v[4] = {};
#pragma unroll
            for (int k = 0; k < kSplit; ++k) {
                const float4 q = *(const float4 *)(partial + (k * S::kChunk + i) * S::kPitch + quad * 4);
                v[0] += q.x, v[1] += q.y, v[2] += q.z, v[3] += q.w;
            }
            write4(a, out, m0 + c + i, n, n_valid, v, scale, bias);
        }
    }
#endif
}

// ---- linear16 -------------------------------------------------------------------------------------------------------

// Each of 8 warps computes 16 rows of W over all of K; a producer warp fetches tiles of 128 rows by 64 columns.
struct Small16 {
    static constexpr int kWarps = 8, kThreads = kWarps * 32, kRows = kWarps * 16;
    static constexpr int kStageBytes = kRows * kGroup * 2; // f16 [128][64], 128-byte swizzle
    static constexpr int kMaxStages = 8;
    static constexpr int kTail = kMaxStages * 16 + 256; // u64 full [kMaxStages], empty [kMaxStages], f32 [64] scratch
    __host__ __device__ static int x_pitch(int K) { return ceil_div(K, kGroup) * kGroup + 8; }
    __host__ __device__ static int x_bytes(int M, int K) { return M * x_pitch(K) * 2; }
    static int stages(int M, int K) { return std::min(kMaxStages, (kMaxShared - kTail - x_bytes(M, K)) / kStageBytes); }
};

__global__ void __launch_bounds__(288, 1)
    linear16_small(const __grid_constant__ Linear16 a, const __grid_constant__ CUtensorMap w_map, int stages) {
#ifdef BNB__HOPPER
    using S = Small16;
    extern __shared__ __align__(1024) char shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int steps = ceil_div(a.K, kGroup), tiles = ceil_div(a.N, S::kRows), pitch = S::x_pitch(a.K);
    char *tail = shared + stages * S::kStageBytes;
    const uint32_t ring = shared_address(shared), full = shared_address(tail), empty = full + S::kMaxStages * 8;
    if (threadIdx.x == S::kThreads) {
        for (int i = 0; i < stages; ++i) {
            barrier_init(full + i * 8, 1);
            barrier_init(empty + i * 8, S::kWarps);
        }
        barrier_init_fence();
    }
    __syncthreads();
    launch_dependents();

    int stage = 0;
    uint32_t parity = 0;
    if (warp == S::kWarps) { // the producer: weights do not depend on the kernel before
        if (lane != 0) return;
        int copies = 0;
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x)
            for (int step = 0; step < steps; ++step, ++copies) {
                if (copies >= stages) barrier_wait(empty + stage * 8, parity ^ 1);
                barrier_expect(full + stage * 8, S::kStageBytes);
                tensor_copy(ring + stage * S::kStageBytes, &w_map, step * kGroup, tile * S::kRows, full + stage * 8);
                if (++stage == stages) stage = 0, parity ^= 1;
            }
        return;
    }

    const NormWeights early = norm_weights(a, threadIdx.x * 8);
    wait_for_prior_kernel();
    __half *x = (__half *)(tail + S::kTail); // [M][pitch], zeros past K
    for (int i = threadIdx.x; i < a.M * (pitch - a.K); i += S::kThreads)
        x[i / (pitch - a.K) * pitch + a.K + i % (pitch - a.K)] = __half(0.0f);
    stage_x<S::kThreads>(a, early, (float *)(tail + S::kMaxStages * 16), x, pitch);
    consumer_sync<S::kThreads>();

    const int w_row = warp * 16 + lane % 16; // of ldmatrix, as w_chunk of 16 bytes in its swizzled place
    const uint32_t x_lane = shared_address(x + min(lane % 8, a.M - 1) * pitch + lane / 8 * 8);
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float d[2][4] = {};
        for (int step = 0; step < steps; ++step) {
            uint32_t w[4][4], b[8];
            load_matrices(b, x_lane + step * (kGroup * 2));
            load_matrices(b + 4, x_lane + step * (kGroup * 2) + 64);
            barrier_wait(full + stage * 8, parity);
#pragma unroll
            for (int s = 0; s < 4; ++s) {
                const int w_chunk = (2 * s + lane / 16) ^ (w_row & 7);
                load_matrices(w[s], ring + stage * S::kStageBytes + w_row * 128 + w_chunk * 16);
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + stage * 8);
            if (++stage == stages) stage = 0, parity ^= 1;
#pragma unroll
            for (int s = 0; s < 4; ++s) mma(d[s & 1], w[s], b[2 * s], b[2 * s + 1]);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int m = 2 * t + (j & 1), n = tile * S::kRows + warp * 16 + g + (j >> 1) * 8;
            if (m >= a.M || n >= a.N) continue;
            const float v = activate(d[0][j] + d[1][j] + (a.bias ? a.bias[n] : 0.0f), a.act);
            store_y(a.y, m * a.ldy + n, v + (a.residual ? a.residual[m * a.ldr + n] : 0.0f), a.y_f32);
        }
    }
#endif
}

// From sm_80 on: the 16 warps of a block split K, in chunks of 128 columns, for 16 rows of W at a time. k is taken in
// an order in which a lane's fragments of two k16 steps are 16 bytes that follow each other, in W and in x.
struct Mma16 {
    static constexpr int kWarps = 16, kThreads = kWarps * 32, kChunk = 128;
    static constexpr int kSumBytes = kWarps * 8 * 16 * 4;  // f32 [kWarps][8 rows of x][16 rows of W]
    static constexpr int kScratch = 2 * kSumBytes, kX = kScratch + 256; // f32 [64]; f16 x [M][pitch], zeros past K
    // Neighbours are 16 banks apart, so that loads of 16 bytes from rows of x do not conflict.
    __host__ __device__ static int x_pitch(int K) { return ceil_div(K, kChunk) * kChunk + 32; }
    __host__ __device__ static int shared_bytes(int M, int K) { return kX + M * x_pitch(K) * 2; }
};

__global__ void __launch_bounds__(512, 1) linear16_mma(const __grid_constant__ Linear16 a) {
#ifdef BNB__MMA
    using S = Mma16;
    extern __shared__ __align__(1024) char shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int chunks = ceil_div(a.K, S::kChunk), bands = ceil_div(a.N, kUnitRows), pitch = S::x_pitch(a.K);

    uint4 next[2][4]; // of row g and of row g + 8, 8 columns of each 32 of a chunk
    auto load = [&](int band, int chunk) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int row = min(band * kUnitRows + g + i / 4 * 8, a.N - 1), k = chunk * S::kChunk + i % 4 * 32 + t * 8;
            const uint4 *from = (const uint4 *)((const __half *)a.w + (size_t)row * a.K + k);
            next[i / 4][i % 4] = k < a.K ? __ldcs(from) : make_uint4(0, 0, 0, 0);
        }
    };
    if (warp < chunks) load(blockIdx.x, warp); // weights do not depend on the kernel before
    launch_dependents();
    const NormWeights early = norm_weights(a, threadIdx.x * 8);
    wait_for_prior_kernel();
    __half *x = (__half *)(shared + S::kX);
    for (int i = threadIdx.x; i < a.M * (pitch - a.K); i += S::kThreads)
        x[i / (pitch - a.K) * pitch + a.K + i % (pitch - a.K)] = __half(0.0f);
    stage_x<S::kThreads>(a, early, (float *)(shared + S::kScratch), x, pitch);
    __syncthreads();

    const __half *x_lane = x + min(g, a.M - 1) * pitch + t * 8;
    float *sums = (float *)shared;
    for (int band = blockIdx.x; band < bands; band += gridDim.x) {
        float d[2][4] = {};
        for (int chunk = warp; chunk < chunks; chunk += S::kWarps) {
            uint4 w[2][4];
#pragma unroll
            for (int i = 0; i < 8; ++i) w[i / 4][i % 4] = next[i / 4][i % 4];
            if (chunk + S::kWarps < chunks) load(band, chunk + S::kWarps);
            else if (band + (int)gridDim.x < bands) load(band + gridDim.x, warp);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint4 b = *(const uint4 *)(x_lane + chunk * S::kChunk + i * 32);
                const uint32_t a0[4] = {w[0][i].x, w[1][i].x, w[0][i].y, w[1][i].y};
                const uint32_t a1[4] = {w[0][i].z, w[1][i].z, w[0][i].w, w[1][i].w};
                mma(d[0], a0, b.x, b.y);
                mma(d[1], a1, b.z, b.w);
            }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j)
            sums[(warp * 8 + 2 * t + (j & 1)) * kUnitRows + g + (j >> 1) * 8] = d[0][j] + d[1][j];
        __syncthreads();
        const int m = threadIdx.x / kUnitRows, n = band * kUnitRows + threadIdx.x % kUnitRows;
        if (m < a.M && n < a.N) {
            float v = a.bias ? a.bias[n] : 0.0f;
#pragma unroll
            for (int i = 0; i < S::kWarps; ++i) v += sums[i * 8 * kUnitRows + threadIdx.x];
            store_y(a.y, m * a.ldy + n, activate(v, a.act) + (a.residual ? a.residual[m * a.ldr + n] : 0.0f), a.y_f32);
        }
        sums = (float *)(shared + ((char *)sums == shared ? S::kSumBytes : 0)); // these are read until the next barrier
    }
#endif
}

// ---- launches -------------------------------------------------------------------------------------------------------

struct RowKernel {
    int units, groups;
    bool little; // for blocks that have less shared memory than Hopper's
    void (*kernel)(Linear4, int, int);
    int (*shared_bytes)(int bands);
};
template <int kUnits, int kGroups> constexpr RowKernel row_kernel(bool little = false) {
    return {kUnits, kGroups, little, linear4_row<kUnits, kGroups>, Row<kUnits, kGroups>::shared_bytes};
}

struct SmallKernel {
    int units, groups;
    bool little;
    void (*kernel)(Linear4, int, int);
    int (*shared_bytes)(int M, int K, int bands);
};
template <int kUnits, int kGroups> constexpr SmallKernel small_kernel(bool little = false) {
    return {kUnits, kGroups, little, linear4_small<kUnits, kGroups>, Small<kUnits, kGroups>::shared_bytes};
}

struct WgmmaKernel {
    int n, rows, groups, split; // groups: of a step
    int step_ns, tile_ns, f32_ns; // of a step, of a tile beside its steps, and if y is f32: fitted so that the choice
                                  // is the best by an H200's times
    int threads, shared, box_rows; // box_rows: of y, 0 where it does not leave as boxes
    int (*share)(int blocks);
    void (*kernel)(Linear4, WgmmaMaps, int);
};
template <int kN, int kRows, int kSplit, int kDeep, int kBuffers>
constexpr WgmmaKernel wgmma_kernel(int step_ns, int tile_ns, int f32_ns) {
    using S = Wgmma<kN, kRows, kSplit, kDeep, kBuffers>;
    static_assert(S::share(1) == S::kMine);
    static_assert(kSplit > 1 || S::kMine % 2 || S::share(2) * 2 == S::kMine, "what two blocks swap is half");
    return {kN,      kRows,  S::kStepGroups, kSplit,
            step_ns, tile_ns, f32_ns,        S::kThreads, S::kShared, S::kBoxed ? S::kChunk * 8 : 0,
            S::share, linear4_wgmma<kN, kRows, kSplit, kDeep, kBuffers>};
}

struct MmaKernel {
    int n, units, split, all_units;
    int threads, shared, per_sm;
    void (*kernel)(Linear4, int);
};
template <int kN, int kUnits, int kRowWarps, int kStages> constexpr MmaKernel mma_kernel() {
    using S = Mma<kN, kUnits, kRowWarps, kStages>;
    return {kN,          kUnits,     S::kSplit, S::kAllUnits,
            S::kThreads, S::kShared, S::kPerSm, linear4_mma<kN, kUnits, kRowWarps, kStages>};
}

const RowKernel kRowKernels[] = {row_kernel<4, 1>(), row_kernel<2, 2>(), row_kernel<1, 4>(), row_kernel<1, 1>(true)};

const SmallKernel kSmallKernels[] = {
    small_kernel<4, 1>(), small_kernel<2, 1>(), small_kernel<1, 2>(), small_kernel<1, 1>(true),
};

const WgmmaKernel kWgmmaKernels[] = {
    wgmma_kernel<16, 1, 4, 2, 1>(624, 1270, 0),    wgmma_kernel<16, 2, 2, 2, 1>(631, 1630, 0),
    wgmma_kernel<32, 1, 4, 2, 1>(672, 1300, 220),  wgmma_kernel<32, 2, 2, 2, 1>(664, 1530, 0),
    wgmma_kernel<64, 1, 4, 1, 1>(531, 1930, 440),  wgmma_kernel<64, 2, 2, 1, 1>(513, 1990, 0),
    wgmma_kernel<96, 2, 2, 1, 1>(634, 2240, 260),  wgmma_kernel<96, 2, 1, 1, 2>(389, 1020, 190),
    wgmma_kernel<96, 3, 1, 1, 1>(428, 1490, 370),  wgmma_kernel<128, 2, 1, 1, 2>(420, 920, 550),
    wgmma_kernel<144, 3, 1, 1, 1>(608, 950, 1370), wgmma_kernel<176, 2, 1, 1, 2>(529, 910, 890),
    wgmma_kernel<200, 3, 1, 1, 1>(855, 420, 0),    wgmma_kernel<208, 2, 1, 1, 2>(584, 480, 1270),
    wgmma_kernel<256, 2, 1, 1, 2>(712, 1240, 940),
};

const MmaKernel kMmaKernels[] = {
    mma_kernel<16, 1, 2, 3>(), mma_kernel<16, 1, 4, 5>(), mma_kernel<32, 1, 2, 3>(), mma_kernel<32, 1, 4, 3>(),
    mma_kernel<64, 1, 4, 3>(), mma_kernel<64, 2, 4, 3>(), mma_kernel<128, 1, 8, 3>(),
};

template <class F> cudaError_t allow_shared(F *kernel, int bytes) {
    const cudaError_t err =
        cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (err != cudaSuccess) return err;
    // The same split of L1 for all kernels: a multiprocessor would have to drain to change it.
    return cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                cudaSharedmemCarveoutMaxShared);
}

// Once per device, which becomes the current one.
cudaError_t linear4_init(int device, int max_shared, bool hopper) {
    cudaError_t err = cudaSetDevice(device);
    auto allow = [&](auto *kernel) {
        if (err == cudaSuccess) err = allow_shared(kernel, max_shared);
    };
    for (const RowKernel &k : kRowKernels) allow(k.kernel);
    for (const SmallKernel &k : kSmallKernels) allow(k.kernel);
    if (hopper) {
        for (const WgmmaKernel &k : kWgmmaKernels) allow(k.kernel);
        allow(linear16_small);
    } else {
        for (const MmaKernel &k : kMmaKernels) allow(k.kernel);
        allow(linear16_mma);
    }
    return err;
}

struct BandGrid {
    int bands, blocks, shared;
};

// One block per multiprocessor, more where a block would have more than 1024 rows of W or sums than fit.
// shared_bytes(bands of a block)
template <class F> BandGrid grid_on(const Linear4 &a, int units, F shared_bytes) {
    const int bands = total_blocks(a) * (kBlockUnits / units), rest = shared_bytes(0), band = shared_bytes(1) - rest;
    const int fit = band ? (a.max_shared - rest) / band : bands, most = std::min(1024 / (units * kUnitRows), fit);
    const int blocks = std::max(std::min(a.n_sm, bands), ceil_div(bands, std::max(most, 1)));
    return {bands, blocks, shared_bytes(ceil_div(bands, blocks))};
}
BandGrid grid_on(const Linear4 &a, const RowKernel &k) { return grid_on(a, k.units, k.shared_bytes); }
BandGrid grid_on(const Linear4 &a, const SmallKernel &k) {
    return grid_on(a, k.units, [&](int bands) { return k.shared_bytes(a.M, a.K, bands); });
}

cudaError_t run_row(cudaStream_t stream, const Linear4 &a, const RowKernel &k, bool pdl) {
    const BandGrid g = grid_on(a, k);
    return launch(stream, k.kernel, g.blocks, 512, g.shared, 1, pdl, a, g.bands / g.blocks, g.bands % g.blocks);
}

cudaError_t run_small(cudaStream_t stream, const Linear4 &a, const SmallKernel &k, bool pdl) {
    const BandGrid g = grid_on(a, k);
    const int cluster = a.hopper && !a.x_f32 && a.M >= 4 && g.blocks % 2 == 0 ? 2 : 1; // less of x is not worth it
    return launch(stream, k.kernel, g.blocks, 512, g.shared, cluster, pdl, a, g.bands / g.blocks, g.bands % g.blocks);
}

struct WgmmaPlan {
    const WgmmaKernel *kernel;
    int cluster; // blocks that split K
    int tail;    // ... of the tiles that are left when all multiprocessors have had the same number; 0: as the others
};

// Tiles first..end - 1, or as long as there are some.
cudaError_t run_wgmma(cudaStream_t stream, const Linear4 &a, const WgmmaKernel &k, int cluster, int first, int end,
                      bool pdl) {
    WgmmaMaps maps = {};
    cudaError_t err = tensor_map(&maps.x, 2, a.x, a.K, a.M, a.ldx * 2, k.n);
    maps.share = k.share(cluster);
    if (k.box_rows && err == cudaSuccess) err = box_maps(a, std::min(k.box_rows, maps.share * 8), maps.y, &maps.boxes);
    if (err != cudaSuccess) return err;
    maps.fetch = fetches_residual(a, maps.boxes);
    maps.first = first, maps.end = end, maps.follows = first > 0;
    // Blocks that split K take one tile; others stay and take one after the other.
    const int clusters = cluster > 1 ? end - first : std::min(end - first, a.n_sm);
    return launch(stream, k.kernel, clusters * cluster, k.threads, k.shared, cluster, pdl, a, maps, total_blocks(a));
}

// What is left for less than a round of blocks may be a launch of its own, whose blocks split K. They start where the
// others end, as two have no room together; so x is there, which those have waited for. Before they write they wait for the
// end of all others, as what comes after waits for these alone.
cudaError_t run_wgmma(cudaStream_t stream, const Linear4 &a, const WgmmaPlan &p, bool pdl) {
    const WgmmaKernel &k = *p.kernel;
    const int tiles = ceil_div(total_blocks(a), k.rows) * ceil_div(a.M, k.n);
    const int even = p.tail ? tiles / a.n_sm * a.n_sm : tiles;
    const cudaError_t err = run_wgmma(stream, a, k, p.cluster, 0, even, pdl);
    return err == cudaSuccess && even < tiles ? run_wgmma(stream, a, k, p.tail, even, tiles, pdl) : err;
}

cudaError_t run_mma(cudaStream_t stream, const Linear4 &a, const MmaKernel &k, bool pdl) {
    const int n_blocks = total_blocks(a), tiles = ceil_div(n_blocks * kBlockUnits, k.all_units) * ceil_div(a.M, k.n);
    return launch(stream, k.kernel, tiles, k.threads, k.shared, 1, pdl, a, n_blocks);
}

// The choice of a kernel: the least estimated time of the busiest multiprocessor, in cycles. Only the proportions of
// the constants matter; they were fitted to measurements of an H200.
const RowKernel *plan_row(const Linear4 &a) {
    const RowKernel *best = nullptr;
    int best_cycles = 0;
    for (const RowKernel &k : kRowKernels) {
        const BandGrid g = grid_on(a, k);
        if (g.shared > a.max_shared || (k.little && a.max_shared >= kMaxShared)) continue;
        const int bands = ceil_div(g.bands, g.blocks), chunks = ceil_div(a.K / kGroup, k.groups);
        const int cycles = ceil_div(bands * chunks, 16) * (800 + 400 * k.groups);
        if (!best || cycles < best_cycles) best = &k, best_cycles = cycles;
    }
    return best;
}

const SmallKernel *plan_small(const Linear4 &a) {
    const SmallKernel *best = nullptr;
    int best_cycles = 0;
    for (const SmallKernel &k : kSmallKernels) {
        const BandGrid g = grid_on(a, k);
        if (g.shared > a.max_shared || (k.little && a.max_shared >= kMaxShared)) continue;
        const int bands = ceil_div(g.bands, g.blocks), chunks = ceil_div(a.K / kGroup, k.groups);
        const int cycles = ceil_div(bands * chunks, 16) * (300 + 480 * k.units * k.groups) + 40 * k.units * a.M;
        if (!best || cycles < best_cycles) best = &k, best_cycles = cycles;
    }
    return best;
}

WgmmaPlan plan_wgmma(const Linear4 &a) {
    // Of blocks that split K: what their meeting takes, for y as boxes in tiles of 128 rows (half of it whatever the rows),
    // and on how much of a device such clusters find room. 6 would be the best, by 5 %, of one product of about 200.
    struct Division {
        int blocks, meeting_ns, boxed_ns, room; // percent
    };
    constexpr Division kDivisions[] = {
        {2, 900, 2000, 100}, {3, 1100, 3700, 89}, {4, 1350, 2900, 91}, {5, 1250, 3250, 84}, {8, 1800, 4250, 91},
    };
    constexpr int kTailNs = 2550; // of a launch more
    constexpr int kLateNs = 500;  // where blocks of the next product find no multiprocessor on which to start early
    WgmmaPlan best = {};
    long best_ns = 0;
    const bool boxes = how_boxes(a) != kBoxesNone;
    for (const WgmmaKernel &k : kWgmmaKernels) {
        if (k.n > 64 && a.M <= 64) continue; // the best of one weight of 15, by 4 %
        const int steps = ceil_div(a.K / kGroup, k.groups);
        const int m_tiles = ceil_div(a.M, k.n), tiles = ceil_div(total_blocks(a), k.rows) * m_tiles, left = tiles % a.n_sm;
        // Rows of x that do not exist are zeros, which the copy engine writes at 3.9 ns a row, others at 1.5; where few of the
        // tiles have any, that costs less.
        const int zeros = (m_tiles * k.n - a.M) * 2 / std::max(2, m_tiles);
        const int x_ns = zeros ? k.groups * (39 * zeros + 15 * (k.n - zeros)) / 10 : 0;
        auto tile_ns = [&](int split) {
            return (long)ceil_div(steps, split) * std::max(k.step_ns, x_ns) + k.tile_ns + (a.y_f32 ? k.f32_ns : 0);
        };
        auto consider = [&](long ns, int split, int tail) {
            if (2 * tiles * split > a.n_sm) ns += kLateNs;
            if (!best.kernel || ns < best_ns) best = {&k, split, tail}, best_ns = ns;
        };
        consider(ceil_div(tiles, a.n_sm) * tile_ns(1), 1, 0);
        for (const Division &d : kDivisions) { // blocks that split K take one tile each
            const int split = d.blocks, room = a.n_sm * d.room / 100;
            const int meeting = k.box_rows ? d.boxed_ns * (128 + k.n) / 256 : d.meeting_ns;
            if (split > steps || !k.share(split)) continue;
            // Without boxes, pairs are dealt to an even number of warpgroups: those of each are at equal distances in y then.
            if (!boxes && split * k.split % 2) continue;
            if (tiles * split <= room) consider(tile_ns(split) + meeting, split, 0);
            if (tiles > a.n_sm && left > 0 && left * split <= room && 2 * k.shared > a.max_shared)
                consider(tiles / a.n_sm * tile_ns(1) + kTailNs + tile_ns(split) + meeting, 1, split);
        }
    }
    return best;
}

// All but one fit every device. The constants follow from what an A100's multiprocessor does in a cycle; they were not
// fitted to measurements.
const MmaKernel *plan_mma(const Linear4 &a) {
    const MmaKernel *best = nullptr;
    long best_cycles = 0;
    for (const MmaKernel &k : kMmaKernels) {
        if (k.shared > a.max_shared) continue;
        const int steps = ceil_div(a.K / kGroup, k.split);
        const int tiles = ceil_div(total_blocks(a) * kBlockUnits, k.all_units) * ceil_div(a.M, k.n);
        const int per_sm = 2 * (k.shared + 1024) <= a.max_shared + 1024 ? k.per_sm : 1; // each takes 1 KiB more
        const long step = 200 + 100 * k.units + 8 * k.n * k.units; // barriers, decoding, the tensor cores
        const long cycles =
            ceil_div(tiles, a.n_sm) * steps * step + ceil_div(tiles, a.n_sm * per_sm) * (30 * k.n + 3000);
        if (!best || cycles < best_cycles) best = &k, best_cycles = cycles;
    }
    return best;
}

// Whether linear4 computes the norm of x [M, K] in front.
bool linear4_takes_norm(int M, int K) {
    return M == 1 ? K <= kNormMax : M <= 8 && K <= kSmallNorm * 8 << small_row_shift(M);
}

// Whether linear4 takes x as f32.
bool linear4_takes_f32(const Linear4 &a) { return a.M == 1 ? plan_row(a) != nullptr : a.M <= 8 && plan_small(a); }

cudaError_t linear4(cudaStream_t stream, const Linear4 &a, bool pdl) {
    if (a.M < 1 || a.K % kGroup || a.n_parts < 1 || a.n_parts > 3 || (a.n_parts > 1 && a.residual))
        return cudaErrorInvalidValue;
    if (a.norm_kind && !(a.x_f32 && linear4_takes_norm(a.M, a.K))) return cudaErrorInvalidValue;
    const RowKernel *row = a.M == 1 && a.K <= kNormMax ? plan_row(a) : nullptr;
    if (row) return run_row(stream, a, *row, pdl);
    const SmallKernel *small = a.M <= 8 && !(a.M == 1 && a.norm_kind) ? plan_small(a) : nullptr;
    if (small) return run_small(stream, a, *small, pdl);
    if (a.x_f32) return cudaErrorInvalidValue;
    if (!a.hopper) return run_mma(stream, a, *plan_mma(a), pdl);
    return run_wgmma(stream, a, plan_wgmma(a), pdl);
}

// K % 8 == 0, and x fits; on Hopper beside a ring of at least four stages.
bool linear16_fits(int M, int K, int max_shared, bool hopper) {
    if (M < 1 || M > 8 || K % 8) return false;
    return hopper ? Small16::stages(M, K) >= 4 : Mma16::shared_bytes(M, K) <= max_shared;
}

cudaError_t linear16(cudaStream_t stream, const Linear16 &a, bool pdl) {
    if (!linear16_fits(a.M, a.K, a.max_shared, a.hopper) || (a.norm_kind && (a.M != 1 || !a.x_f32 || a.K > kNormMax)))
        return cudaErrorInvalidValue;
    if (!a.hopper)
        return launch(stream, linear16_mma, std::min(a.n_sm, ceil_div(a.N, kUnitRows)), Mma16::kThreads,
                      Mma16::shared_bytes(a.M, a.K), 1, pdl, a);
    CUtensorMap w_map;
    const cudaError_t err = tensor_map(&w_map, 2, a.w, a.K, a.N, a.K * 2L, Small16::kRows);
    if (err != cudaSuccess) return err;
    const int stages = Small16::stages(a.M, a.K);
    const int shared = stages * Small16::kStageBytes + Small16::kTail + Small16::x_bytes(a.M, a.K);
    return launch(stream, linear16_small, std::min(a.n_sm, ceil_div(a.N, Small16::kRows)), Small16::kThreads + 32,
                  shared, 1, pdl, a, w_map, stages);
}

} // namespace tile4

/* ==== [TILE8] ====================================================================================================
 * LLM.int8() and attention: for Hopper, and in plainer forms for every GPU since sm_80 (names with _mma and _split). */

namespace tile8 {

using namespace ptx;

__device__ inline void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

int device_attribute(cudaDeviceAttr which) { /* of the current device */
    int device = 0, n = 0;
    if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&n, which, device)) return 1;
    return n;
}
int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

template <class P>
cudaError_t launch(void (*kernel)(P), const P &params, dim3 grid, dim3 threads, size_t shared, int cluster, bool pdl,
                   cudaStream_t stream) {
    return ptx::launch(stream, kernel, grid, threads, (int)shared, cluster, pdl, params);
}

/* The box at column x, row y of the map's matrix -> shared memory. */
__device__ inline void tensor_load(void *dst, const CUtensorMap *map, int x, int y, uint64_t *bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(dst)),
        "l"(map), "r"(x), "r"(y), "r"(shared_address(bar))
        : "memory");
}

/* 8 numbers as f16 at each of N offsets from f32 or f16 numbers. One branch for all N: the loads are in flight
 * together. */
template <int N>
__device__ inline void load_half8(const void *base, int is_f32, bool aligned, const int (&at)[N], uint4 (&x)[N]) {
    const float *const wide = (const float *)base;
    const __half *const narrow = (const __half *)base;
    __half2 h[4];
    if (!aligned) { /* to 16 bytes */
#pragma unroll
        for (int i = 0; i < N; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++)
                h[j] = is_f32 ? __floats2half2_rn(wide[at[i] + 2 * j], wide[at[i] + 2 * j + 1])
                              : __halves2half2(narrow[at[i] + 2 * j], narrow[at[i] + 2 * j + 1]);
            x[i] = *(const uint4 *)h;
        }
    } else if (is_f32) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float4 a = *(const float4 *)(wide + at[i]), b = *(const float4 *)(wide + at[i] + 4);
            h[0] = __floats2half2_rn(a.x, a.y), h[1] = __floats2half2_rn(a.z, a.w);
            h[2] = __floats2half2_rn(b.x, b.y), h[3] = __floats2half2_rn(b.z, b.w);
            x[i] = *(const uint4 *)h;
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = *(const uint4 *)(narrow + at[i]);
    }
}

/* d [16, 8] += a [16, 32] s8 * b [8, 32]^T s8, one warp; fragments as the instruction defines them. */
__device__ inline void mma_s8(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                              uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
/* d [16, 8] += a [16, 16] s8 * b [8, 16]^T s8, one warp. */
__device__ inline void mma_s8(int *d, uint32_t a0, uint32_t a1, uint32_t b0) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a0), "r"(a1), "r"(b0));
}
/* d [16, 8] += a [16, 8] tf32 * b [8, 8]^T tf32, one warp. */
__device__ inline void mma_tf32(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* 16 bytes to shared memory, in the background; bytes = 0: zeros, and nothing is read. A thread waits until at most N
 * of its newest groups of copies are under way; others see them behind a barrier. */
__device__ inline void copy_async(void *to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}

/* Four matrices of 8 rows of 16 bytes: lane l gives the address of row l % 8 of matrix l / 8, and gets from each the
 * l % 4-th 4 bytes of row l / 4. For f16 also transposed: lane l gets column l / 4 of rows 2 (l % 4) and the next. */
__device__ inline void load_matrices(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ inline void load_matrices_trans(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
/* d [16, 8] += a [16, 16] f16 * b [8, 16]^T f16, one warp. */
__device__ inline void mma_f16(float (&d)[4], const uint32_t *a, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Warpgroup products. An operand in shared memory is named by a descriptor: here always 128-byte swizzled atoms of 8
 * rows of 128 bytes, 1024 bytes apart; `atoms` is the distance of neighbours along the contiguous dimension, which
 * matters where that is not K. */
__device__ inline uint64_t descriptor(const void *p, int atoms) {
    return (uint64_t)((shared_address(p) & 0x3ffff) >> 4) | (uint64_t)(atoms >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 |
           (uint64_t)1 << 62;
}
/* d [64, N] i32 += a [64, 32] s8 * b [N, 32]^T s8; more = 0 starts from zero. */
#define BNB__WGMMA_S8(N, R, A, B, P)                                                                                   \
    __device__ inline void wgmma_s8(int(&d)[R], uint64_t a, uint64_t b, int more) {                                    \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\n"                                                  \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8 {" BNB__REGS_##R "}, %" #A ", %" #B ", p;\n}" \
                     : BNB__OUT_##R("+r", d, 0)                                                                        \
                     : "l"(a), "l"(b), "r"(more));                                                                     \
    }
BNB__WGMMA_S8(16, 8, 8, 9, 10)
BNB__WGMMA_S8(32, 16, 16, 17, 18)
BNB__WGMMA_S8(64, 32, 32, 33, 34)
BNB__WGMMA_S8(128, 64, 64, 65, 66)
BNB__WGMMA_S8(160, 80, 80, 81, 82)
BNB__WGMMA_S8(192, 96, 96, 97, 98)
BNB__WGMMA_S8(224, 112, 112, 113, 114)
BNB__WGMMA_S8(256, 128, 128, 129, 130)

/* d [64, N] f32 += a [64, 16] f16 * b [N, 16]^T f16; more = 0 starts from zero. */
#define BNB__WGMMA_SS(N, R, A, B, P)                                                                                   \
    __device__ inline void wgmma_ss(float(&d)[R], uint64_t a, uint64_t b, int more) {                                  \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\n"                                                  \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" BNB__REGS_##R "}, %" #A ", %" #B             \
                                                                                             ", p, 1, 1, 0, 0;\n}"     \
                     : BNB__OUT_##R("+f", d, 0)                                                                        \
                     : "l"(a), "l"(b), "r"(more));                                                                     \
    }
BNB__WGMMA_SS(64, 32, 32, 33, 34)
BNB__WGMMA_SS(128, 64, 64, 65, 66)

/* d [64, N] f32 += a [64, 16] f16 in registers * b [16, N] f16: N is contiguous. more = 0 starts from zero. */
BNB__WGMMA_RS(wgmma_rs, 1, 64, 32, 32, 33, 34, 35, 36, 37)
BNB__WGMMA_RS(wgmma_rs, 1, 80, 40, 40, 41, 42, 43, 44, 45)
BNB__WGMMA_RS(wgmma_rs, 1, 96, 48, 48, 49, 50, 51, 52, 53)
BNB__WGMMA_RS(wgmma_rs, 1, 128, 64, 64, 65, 66, 67, 68, 69)
BNB__WGMMA_RS(wgmma_rs, 1, 256, 128, 128, 129, 130, 131, 132, 133)

/* LLM.int8(): y = act(x * W^T + bias) + residual, W int8 [N, K] row-major with SCB [N].
 *
 *   M <= 8    linear8_skinny: weights stream through rings of 16 x 128 tiles, mma m16n8k32 with the weights as the
 *             16 rows. x is quantized by each block itself where that is soon done, and on Hopper the norm in front is
 *             its own; where K is larger linear8_quantize goes before.
 *             linear8_skinny_mma: the same, to M = 16, with rings filled by cp.async in place of Hopper's copy engine.
 *   larger    linear8_quantize, then on Hopper linear8_gemm: wgmma m64nNk32, elsewhere linear8_gemm_mma: mma m16n8k32.
 *             In both the weights are the product's first operand: N rounds M up, and W is read once for many rows.
 *             With a threshold linear8_columns goes between, on Hopper only if K is more than 32768 (linear8_few).
 *
 * Outliers never reach the host. The integer product leaves them out; their part is added in f32 by the block that
 * holds the weights in shared memory anyway (skinny), or by a product of the gathered columns in the epilogue (gemm).
 * Integer sums are exact in any order and f32 sums have a fixed order: the same bits in every run. */

struct Linear8Part {
    const void *w;    /* int8 [N, K], 16-byte aligned */
    const float *scb; /* [N]                          */
    int N;
    const float *bias; /* [N], or null                 */
    void *y;           /* [M, N], rows ldy elements apart */
    long ldy;
};

struct Linear8 {
    int M, K, n_parts; /* 1..3 weights that read the same x */
    Linear8Part part[3];
    int act;               /* 0 none, 1 relu, 2 gelu, 3 gelu_tanh, 4 silu             */
    const float *residual; /* [M, N] of the only part, rows ldr elements apart, or null */
    long ldr;
    const void *x; /* [M, K], rows ldx elements apart; 16-byte aligned, ldx % 8 == 0 */
    long ldx;
    int x_f32, y_f32; /* else f16 */
    int norm_kind;    /* tile4::Norm, only where linear8_takes_norm: the weights multiply the norm of x, which is f32 */
    const float *norm_w, *norm_b; /* f32 [K]; norm_b: layer norm only, may be null */
    float norm_eps;
    float threshold;  /* 0: no outliers */
    int outlier_rule; /* 0: an outlier takes its column out of every row; 1: of its own row */
    void *scratch;    /* linear8_scratch() bytes, 256-byte aligned; no state between launches */
};

enum { linear8_chunk = 128, few8 = 16 }; /* columns in one tile: the swizzle's width; a list's places */
enum { few8_none = 0xffff, few8_many = 0xfffe }; /* in place of a column */
enum { gemm8_near = 16 };                        /* outlier columns taken at once */

bool linear8_fits(int N, int K) { return N > 0 && K > 0 && K % 16 == 0 && K <= 1 << 18; } /* see linear8_columns */

/* What lies in scratch; Kp: K rounded up to whole chunks. */
struct Scratch8 {
    int8_t *codes; /* [M, Kp] x in int8: 0 for outliers and beyond K */
    float *sca;    /* [M]     largest magnitude of a row's ordinary elements */
    uint8_t *mask; /* [M, Kp / 8] bit k: x[m, k] is an outlier; only for M <= 16 and where `few` has no room */
    uint16_t *few; /* [lists, 16] a few rows' outlier columns, ascending, then few8_none; or few8_many: see mask */
    int *list;     /* [Kp]    columns with an outlier in some row, ascending */
    int *count;    /* [1]     how many */
    int Kp;
    int row_threads, rows, lists; /* threads for a row; rows for a list and a block of linear8_quantize; M / rows */
    size_t bytes;
};

enum { quantize8_ahead = 2, quantize8_most = 1024 }; /* 16 numbers for a thread keep a row's way short; threads */
enum { few_lists8 = 128, lists8 = 3 * few_lists8 };  /* that one warp, three warps of linear8_gemm merge in registers */

Scratch8 scratch8(const Linear8 &l) {
    Scratch8 s;
    const size_t Kp = ((size_t)l.K + linear8_chunk - 1) / linear8_chunk * linear8_chunk, M = l.M;
    char *p = (char *)l.scratch, *const start = p;
    const auto take = [&](size_t bytes) {
        return p += (bytes + 255) & ~(size_t)255, p - ((bytes + 255) & ~(size_t)255);
    };
    s.Kp = (int)Kp;
    s.row_threads = std::max(64, std::min((l.K / (8 * quantize8_ahead) + 31) / 32 * 32, (int)quantize8_most));
    /* Several rows cost a little, and save time where K is soon done but lists are not. */
    s.rows = l.K > 2048 ? 1 : std::min((l.M + few_lists8 - 1) / few_lists8, quantize8_most / s.row_threads);
    s.lists = (l.M + s.rows - 1) / s.rows;
    s.codes = (int8_t *)take(M * Kp);
    s.sca = (float *)take(M * 4);
    s.mask = (uint8_t *)take(M * Kp / 8);
    s.few = (uint16_t *)take((size_t)s.lists * few8 * 2);
    s.list = (int *)take(Kp * 4);
    s.count = (int *)take(4);
    s.bytes = (size_t)(p - start);
    return s;
}

size_t linear8_scratch(const Linear8 &l) { return scratch8(l).bytes; }

/* ---- quantization of x --------------------------------------------------------------------------------------------*/

/* x in an outlier column, as it counts beside the integer product: where the rule is of rows, only if it is an outlier. */
__device__ inline float worth8(const Linear8 &l, float x) {
    return l.outlier_rule == 0 || fabsf(__half2float(__float2half_rn(x))) >= l.threshold ? x : 0.0f;
}
__device__ inline float worth8(const Linear8 &l, __half x) { return worth8(l, __half2float(x)); }

/* v[i] = what x[m[i], k[i]] adds through outlier column k[i]. All loads come before all decisions, so that they are in
 * flight together. */
template <int N>
__device__ inline void x_outliers8(const Linear8 &l, const int (&m)[N], const int (&k)[N], float (&v)[N]) {
    if (l.x_f32) {
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = ((const float *)l.x)[m[i] * l.ldx + k[i]];
    } else {
        __half h[N];
#pragma unroll
        for (int i = 0; i < N; i++) h[i] = ((const __half *)l.x)[m[i] * l.ldx + k[i]];
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = __half2float(h[i]);
    }
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = worth8(l, v[i]);
}

/* x[m, at[i]..at[i] + 7] in f16 */
template <int N> __device__ inline void x_load8(const Linear8 &l, int m, const int (&at)[N], uint4 (&x)[N]) {
    load_half8((const char *)l.x + m * l.ldx * (l.x_f32 ? 4 : 2), l.x_f32, true, at, x);
}

/* Numbers that take part in the integer product: below the threshold, not NaN, not infinite. An f16 number is >= the
 * threshold exactly if it is >= the threshold rounded up to f16. */
__device__ inline __half2 limit8(float threshold) {
    return __half2half2(threshold > 0 ? __float2half_ru(threshold) : __ushort_as_half(0x7c00));
}

/* Four codes of a row, in columns k, of which the first `left` count (else 0): as they are, negative; x there. */
__device__ inline uint32_t four8(const int8_t *row, const int (&k)[4]) {
    const uint32_t a = (uint8_t)row[k[0]], b = (uint8_t)row[k[1]], c = (uint8_t)row[k[2]], d = (uint8_t)row[k[3]];
    return a | b << 8 | c << 16 | d << 24;
}
__device__ inline uint32_t minus8(uint32_t codes, int left) {
    return left <= 0 ? 0 : __vneg4(codes) & (left < 4 ? (1u << 8 * left) - 1 : ~0u);
}
__device__ inline float4 x_four8(const Linear8 &l, int m, const int (&k)[4], int left) {
    const int rows[4] = {m, m, m, m};
    float v[4];
    x_outliers8(l, rows, k, v);
    return make_float4(left > 0 ? v[0] : 0, left > 1 ? v[1] : 0, left > 2 ? v[2] : 0, left > 3 ? v[3] : 0);
}

/* Takes the other numbers out of x. *top: the largest magnitude of those that stay. -> mask of outliers */
__device__ inline uint32_t ordinary8(uint4 &x, float threshold, __half2 limit, float *top) {
    uint32_t *const w = (uint32_t *)&x, outliers = 0, out[4], any = 0;
    __half2 m = __half2half2(__ushort_as_half(0));
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const __half2 a = __habs2(*(__half2 *)(w + i));
        const uint32_t stays = __hlt2_mask(a, limit); /* not NaN */
        out[i] = w[i] & ~stays, any |= ~stays;
        w[i] &= stays;
        m = __hmax2(m, __habs2(*(__half2 *)(w + i)));
    }
    *top = __half2float(__hmax(__low2half(m), __high2half(m)));
    if (any) { /* rare */
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t ge = __hge2_mask(__habs2(*(__half2 *)(out + i)), limit);
            if (threshold > 0) outliers |= (ge & 1) << 2 * i | (ge >> 31) << (2 * i + 1);
            else if (ge) *top = INFINITY; /* without a threshold an infinity is the row's maximum */
        }
    }
    return outliers;
}

/* 127 / absmax as bitsandbytes' kernels compute it: with the hardware's reciprocal. A row of zeros has codes 0. */
__device__ inline float quant_scale8(float absmax) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(absmax));
    return absmax > 0 ? __fmul_rn(127.0f, r) : 0;
}

/* rint(x * scale) of an ordinary number. 1.5 * 2^23 leaves no bits below 1: the low byte is the rounded number. */
__device__ inline uint32_t code8(float x, float scale) {
    return __float_as_uint(__fadd_rn(__fmul_rn(x, scale), 12582912.0f));
}
/* ... of 8. */
__device__ inline uint64_t quantize8(const uint4 &x, float scale) {
    const __half2 *h = (const __half2 *)&x;
    uint32_t r[8];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 f = __half22float2(h[i]);
        r[2 * i] = code8(f.x, scale), r[2 * i + 1] = code8(f.y, scale);
    }
    const uint32_t low = __byte_perm(__byte_perm(r[0], r[1], 0x0040), __byte_perm(r[2], r[3], 0x0040), 0x5410);
    const uint32_t high = __byte_perm(__byte_perm(r[4], r[5], 0x0040), __byte_perm(r[6], r[7], 0x0040), 0x5410);
    return (uint64_t)high << 32 | low;
}

/* f over v of the `warps` warps that share a row, of which this is number `own`; the block meets. partial [warps] in
 * shared memory: the row's */
template <class F> __device__ inline float row_over8(float v, float *partial, int own, int warps, F f) {
    for (int i = 16; i; i /= 2) v = f(v, __shfl_xor_sync(~0u, v, i));
    if (threadIdx.x % 32 == 0) partial[own] = v;
    __syncthreads();
    v = partial[0];
    for (int i = 1; i < warps; i++) v = f(v, partial[i]);
    return v;
}
__device__ inline float row_max8(float v, float *partial, int own, int warps) {
    return row_over8(v, partial, own, warps, [](float a, float b) { return fmaxf(a, b); });
}

struct Quantize8 {
    Linear8 l;
    Scratch8 s;
};

#ifdef BNB__MMA
enum { quantize8_blocks = 2 }; /* for each multiprocessor */
#else
enum { quantize8_blocks = 1 }; /* sm_75 has no threads for more; the kernel is empty there */
#endif

/* A block for each list of outlier columns, thus for s.rows rows of x, which are several or not. */
template <bool Several>
__global__ void __launch_bounds__(quantize8_most, quantize8_blocks) linear8_quantize(const __grid_constant__ Quantize8 p) {
#ifdef BNB__MMA
    constexpr int ahead = quantize8_ahead;
    extern __shared__ __align__(1024) uint8_t shared[];
    uint32_t *const found = (uint32_t *)shared; /* [Kp / 32] outlier columns of several rows */
    __shared__ float maxima[quantize8_most / 32];
    __shared__ __align__(16) uint16_t few[few8];
    __shared__ int n_outliers;
    const int own = threadIdx.x, row = Several ? threadIdx.y : 0, tid = row * blockDim.x + own, step = blockDim.x * 8;
    const int m = Several ? blockIdx.x * p.s.rows + row : blockIdx.x;
    const bool exists = !Several || m < p.l.M;
    const int K = exists ? p.l.K : 0, Kp = exists ? p.s.Kp : 0;
    const __half2 limit = limit8(p.l.threshold);
    uint4 x[ahead];
    uint32_t outliers[ahead];
    float absmax = 0;
    /* K - 8 more than once does no harm */
    const auto load = [&](int k) {
        int at[ahead];
#pragma unroll
        for (int i = 0; i < ahead; i++) at[i] = min(k + i * step, K - 8);
        x_load8(p.l, m, at, x);
#pragma unroll
        for (int i = 0; i < ahead; i++) {
            float top;
            outliers[i] = ordinary8(x[i], p.l.threshold, limit, &top);
            absmax = fmaxf(absmax, top);
        }
    };
    launch_dependents();
    if (tid < few8) few[tid] = few8_none;
    if (tid == 0) n_outliers = 0;
    if (Several)
        for (int i = tid; i < p.s.Kp / 32; i += blockDim.x * blockDim.y) found[i] = 0;
    wait_for_prior_kernel();
    for (int k = own * 8; k < K; k += ahead * step) load(k);
    absmax = row_max8(absmax, maxima + row * (blockDim.x / 32), own / 32, blockDim.x / 32);
    const float scale = quant_scale8(absmax);
    for (int k = own * 8; k < Kp; k += ahead * step) {
        if (K > ahead * step) load(k); /* else it is still there */
#pragma unroll
        for (int i = 0; i < ahead; i++) {
            const int at = k + i * step;
            if (at >= Kp) continue;
            *(uint64_t *)(p.s.codes + (size_t)m * Kp + at) = at < K ? quantize8(x[i], scale) : 0;
            uint32_t u = at < K ? outliers[i] : 0;
            if (Several && u) u &= ~(atomicOr(found + at / 32, u << at % 32) >> at % 32); /* no other row had it */
            for (; u; u &= u - 1) { /* rare; a column beyond 16 bits counts as too many */
                const int column = at + __ffs(u) - 1;
                const int place = atomicAdd(&n_outliers, column < few8_many ? 1 : few8 + 1);
                if (place < few8) few[place] = (uint16_t)column;
            }
        }
    }
    if (own == 0 && exists) p.s.sca[m] = absmax;
    __syncthreads();
    if (tid < few8) { /* in ascending order */
        int place = 0;
#pragma unroll
        for (int i = 0; i < few8; i++) place += few[i] < few[tid] || (few[i] == few[tid] && i < tid);
        p.s.few[blockIdx.x * few8 + place] = n_outliers > few8 ? few8_many : few[tid];
    }
    if (n_outliers <= few8 && p.l.M > 16) return; /* nothing reads the mask */
    for (int k = own * 8; k < Kp; k += ahead * step) {
        if (K > ahead * step) load(k);
#pragma unroll
        for (int i = 0; i < ahead; i++)
            if (const int at = k + i * step; at < Kp)
                p.s.mask[(size_t)m * (Kp / 8) + at / 8] = (uint8_t)(at < K ? outliers[i] : 0);
    }
#endif
}

cudaError_t linear8_quantize_launch(cudaStream_t stream, const Linear8 &l, bool pdl) {
    const Quantize8 p = {l, scratch8(l)};
    const bool several = p.s.rows > 1;
    return launch(several ? linear8_quantize<true> : linear8_quantize<false>, p, dim3(p.s.lists),
                  dim3(p.s.row_threads, p.s.rows), several ? p.s.Kp / 8 : 0, 1, pdl, stream);
}

/* One warp: columns `from`.. of the mask, at most `most` of them, in ascending order. -> how many the mask has
 * It runs once: what is unrolled here costs more to fetch than it saves. */
__device__ inline int mask_columns8(const uint32_t *mask, int n_words, int from, int most, int *columns) {
    const int lane = threadIdx.x % 32, words = (n_words + 31) / 32, first = lane * words;
    const int end = min(first + words, n_words);
    int own = 0;
#pragma unroll 1
    for (int i = first; i < end; i++) own += __popc(mask[i]);
    int sum = own; /* of this lane and those before */
#pragma unroll 1
    for (int d = 1; d < 32; d *= 2)
        if (const int other = __shfl_up_sync(~0u, sum, d); lane >= d) sum += other;
    int at = sum - own - from;
    if (own > 0)
#pragma unroll 1
        for (int i = first; i < end; i++)
            for (uint32_t u = mask[i]; u; u &= u - 1, at++)
                if (at >= 0 && at < most) columns[at] = i * 32 + __ffs(u) - 1;
    __syncwarp();
    return __shfl_sync(~0u, sum, 31);
}

/* Half a list: its first column, and without it. */
__device__ inline uint32_t front8(const uint4 &f) { return f.x & 0xffff; }
__device__ inline void next8(uint4 &f) {
    f.x = __funnelshift_r(f.x, f.y, 16), f.y = __funnelshift_r(f.y, f.z, 16);
    f.z = __funnelshift_r(f.z, f.w, 16), f.w = __funnelshift_r(f.w, ~0u, 16);
}

#ifdef BNB__MMA
/* One warp: the least column that begins one of its lists, which is taken out of them; few8_none: all are empty. */
template <int lists> /* of a lane */
__device__ __forceinline__ uint32_t least8(uint4 (&f)[lists]) {
    uint32_t least = few8_none;
#pragma unroll
    for (int i = 0; i < lists; i++) least = min(least, front8(f[i]));
    least = __reduce_min_sync(~0u, least);
#pragma unroll
    for (int i = 0; i < lists; i++)
        if (front8(f[i]) == least) next8(f[i]);
    return least;
}

/* mask [Kp / 32] in shared memory, zeros before, gets the outlier columns of all rows. For `threads`, whole warps, this
 * one is thread i of them. A warp's lists advance together, as most rows have the same columns and atomics to one word
 * queue; after 16 columns each goes on for itself. */
__device__ __forceinline__ void merge_few8(const Linear8 &l, const Scratch8 &s, uint32_t *mask, int i, int threads) {
    constexpr int lists = 4; /* of a lane, half of each at a time */
    const int lane = i % 32;
    const auto note = [&](uint32_t k) { atomicOr(mask + k / 32, 1u << k % 32); };
#pragma unroll 1
    for (int first = i / 32 * 32 * lists; first < s.lists; first += threads * lists) {
        bool more = true;
#pragma unroll 1
        for (int half = 0; half < 2 && __any_sync(~0u, more); half++) {
            uint4 f[lists];
            more = false;
#pragma unroll
            for (int j = 0; j < lists; j++) {
                const int at = first + lane + 32 * j;
                f[j] = make_uint4(~0u, ~0u, ~0u, ~0u);
                if (at < s.lists) f[j] = __ldcg((const uint4 *)s.few + at * 2 + half);
            }
#pragma unroll
            for (int j = 0; j < lists; j++) {
                more |= f[j].w >> 16 != few8_none;
                if (front8(f[j]) != few8_many) continue;
                const int words = s.Kp / 32, m = (first + lane + 32 * j) * s.rows;
                const uint32_t *const row = (const uint32_t *)s.mask + (size_t)m * words;
#pragma unroll 1
                for (int w = half; w < min(s.rows, l.M - m) * words; w += 2)
                    if (const uint32_t u = row[w]) atomicOr(mask + w % words, u);
                f[j] = make_uint4(~0u, ~0u, ~0u, ~0u);
            }
            __syncwarp();
#pragma unroll 1
            for (int n = 0; n < few8; n++) {
                const uint32_t least = least8(f);
                if (least == few8_none) break;
                if (lane == 0) note(least);
            }
#pragma unroll
            for (int j = 0; j < lists; j++)
#pragma unroll 1
                for (; front8(f[j]) != few8_none; next8(f[j])) note(front8(f[j]));
        }
    }
}
#endif

#ifdef BNB__HOPPER
/* One warp: what its lists have, at most 16 columns, in ascending order. -> how many, or -1: there are more. The lists
 * advance together, from one column to the next. */
template <int lists> /* of a lane */
__device__ __forceinline__ int columns8(uint4 (&f)[lists], int *columns) {
    const int lane = threadIdx.x % 32;
    uint32_t own = few8_none;
    for (int n = 0;; n++) {
        const uint32_t least = least8(f);
        if (least == few8_none) {
            if (lane < gemm8_near) columns[lane] = (int)own;
            return __syncwarp(), n;
        }
        if (n == gemm8_near) return -1;
        if (lane == n) own = least;
    }
}
/* ... of the lists [first, end), at most few_lists8. -1: also if one has more than 8. */
__device__ __forceinline__ int few_columns8(const Scratch8 &s, int first, int end, int *columns) {
    constexpr int lists = few_lists8 / 32;
    uint4 f[lists]; /* the first half: all that most have */
    bool more = false;
    first += threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < lists; i++) {
        f[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
        if (first + 32 * i < end) f[i] = __ldcg((const uint4 *)s.few + (first + 32 * i) * 2);
    }
#pragma unroll
    for (int i = 0; i < lists; i++) more |= f[i].w >> 16 != few8_none;
    return __any_sync(~0u, more) ? -1 : columns8(f, columns);
}
#endif

/* One block: list and count of the outlier columns. clear, with rule 0: their codes become 0. */
struct Columns8 {
    Linear8 l;
    Scratch8 s;
    int clear;
};
__global__ void __launch_bounds__(1024) linear8_columns(const __grid_constant__ Columns8 p) {
#ifdef BNB__MMA
    extern __shared__ __align__(1024) uint8_t shared[];
    uint32_t *const mask = (uint32_t *)shared; /* [n_words] */
    __shared__ int count;
    const int tid = threadIdx.x, n_words = p.s.Kp / 32;
    launch_dependents();
    for (int i = tid; i < n_words; i += 1024) mask[i] = 0;
    __syncthreads();
    wait_for_prior_kernel();
    merge_few8(p.l, p.s, mask, tid, 1024);
    __syncthreads();
    if (tid < 32) {
        const int n = mask_columns8(mask, n_words, 0, p.s.Kp, p.s.list);
        if (tid == 0) *p.s.count = count = n;
    }
    if (!p.clear || p.l.outlier_rule != 0) return;
    __syncthreads();
    for (int j = 0; j < count; j++) {
        const int k = p.s.list[j]; /* written by this block, before a barrier */
        for (int m = tid; m < p.l.M; m += 1024) p.s.codes[(size_t)m * p.s.Kp + k] = 0;
    }
#endif
}

/* ---- what follows the product -------------------------------------------------------------------------------------*/

constexpr float dequant8 = 6.200012e-05f;        /* 1 / 127^2 as bitsandbytes rounds it */
constexpr float weight8 = 7.874015718698502e-3f; /* 1 / 127 */

__device__ inline float scaled8(int sum, float sca, float scb, float bias) {
    return fmaf(__fmul_rn(__fmul_rn((float)sum, sca), scb), dequant8, bias);
}

template <int N> __device__ __forceinline__ void activate8(int act, float (&v)[N]) { /* numbered as tile4's */
    float2 pairs[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; i++) pairs[i] = make_float2(v[2 * i], v[2 * i + 1]);
    tile4::activate(pairs, act);
#pragma unroll
    for (int i = 0; i < N / 2; i++) v[2 * i] = pairs[i].x, v[2 * i + 1] = pairs[i].y;
}

/* A warp has 16 rows of W and, 8 at a time, rows of x; v[i] of a lane is y of W's row n[i / 2] and x's row 2 t + i % 2,
 * with g = lane / 4, t = lane % 4. Rows g and g + 8 of the product are neighbours in W where N allows it: then the 8
 * lanes of one row of x read and write 16 neighbours, two each. */


__host__ __device__ inline bool paired8(int N) { return N % 16 == 0; }
__device__ inline int row_of8(int r, bool paired) { return paired ? (r & ~15) + (r & 7) * 2 + (r >> 3 & 1) : r; }

struct Lane8 {
    int n[2];
    bool in[2], vec; /* n < N; y and residual are read and written in pairs */
    float scb[2], bias[2];
};

__device__ __forceinline__ Lane8 lane8(const Linear8 &l, int part, int n0) { /* n0: of the warp's 16 rows */
    Lane8 o;
    const int g = threadIdx.x % 32 / 4, N = l.part[part].N;
    const bool paired = paired8(N);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        o.n[i] = n0 + row_of8(g + 8 * i, paired), o.in[i] = o.n[i] < N;
        o.scb[i] = o.in[i] ? l.part[part].scb[o.n[i]] : 0;
        o.bias[i] = o.in[i] && l.part[part].bias ? l.part[part].bias[o.n[i]] : 0;
    }
    o.vec = paired && ((uintptr_t)l.part[part].y & (l.y_f32 ? 7 : 3)) == 0 && l.part[part].ldy % 2 == 0 &&
            ((uintptr_t)l.residual & 7) == 0 && (!l.residual || l.ldr % 2 == 0);
    return o;
}

/* What four weights of rows g and g + 8 in the outlier columns 4 t..4 t + 3 are as operands: f16 a[0..3], or, where x
 * is f32, tf32 a[0..7]. Both represent them exactly. Lane t has these columns on both sides, in place of the
 * instruction's own order. */
template <bool F32> __device__ __forceinline__ void near_weights8(uint32_t (&a)[8], uint32_t low, uint32_t high) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t w = i % 2 ? high : low;
        const float c = (float)(int8_t)(w >> (16 * (i / 2))), d = (float)(int8_t)(w >> (16 * (i / 2) + 8));
        if constexpr (F32) {
            a[4 * (i / 2) + i % 2] = __float_as_uint(c), a[4 * (i / 2) + 2 + i % 2] = __float_as_uint(d);
        } else {
            const __half2 h = __floats2half2_rn(c, d);
            a[i] = *(const uint32_t *)&h;
        }
    }
}

/* Adds what x [8 rows][16 outlier columns] is worth: x of this lane, row g, columns 4 t..4 t + 3. f32 goes in two
 * parts. unit: scb / 127 of the two rows. */
template <bool F32>
__device__ __forceinline__ void outliers8(const uint32_t (&a)[8], const float4 &x, const float (&unit)[2], float *v) {
    float more[4] = {};
    if constexpr (F32) {
        const float full[4] = {x.x, x.y, x.z, x.w};
        uint32_t high[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            high[i] = __float_as_uint(full[i]) & 0xffffe000;
            low[i] = __float_as_uint(full[i] - __uint_as_float(high[i]));
        }
        mma_tf32(more, a[0], a[1], a[2], a[3], high[0], high[1]);
        mma_tf32(more, a[4], a[5], a[6], a[7], high[2], high[3]);
        mma_tf32(more, a[0], a[1], a[2], a[3], low[0], low[1]);
        mma_tf32(more, a[4], a[5], a[6], a[7], low[2], low[3]);
    } else {
        const __half2 b[2] = {__floats2half2_rn(x.x, x.y), __floats2half2_rn(x.z, x.w)};
        mma_f16(more, a, *(const uint32_t *)b, *(const uint32_t *)(b + 1));
    }
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = fmaf(more[i], unit[i / 2], v[i]);
}
/* The same for G times 8 rows of x: x(i) is of the i-th eight. */
template <int G, class X>
__device__ __forceinline__ void outliers8(const Linear8 &l, const uint32_t (&w)[2], const X &x, const float (&unit)[2],
                                          float *v) {
    uint32_t a[8];
    if (l.x_f32) {
        near_weights8<true>(a, w[0], w[1]);
#pragma unroll
        for (int i = 0; i < G; i++) outliers8<true>(a, x(i), unit, v + 4 * i);
    } else {
        near_weights8<false>(a, w[0], w[1]);
#pragma unroll
        for (int i = 0; i < G; i++) outliers8<false>(a, x(i), unit, v + 4 * i);
    }
}

/* The residual for G groups of 8 rows of x, m the lane's first, of the rows that lie in [from, to); else 0. */
template <int G>
__device__ __forceinline__ void residual8(const Linear8 &l, const Lane8 &o, int m, int from, int to,
                                          float (&e)[4 * G]) {
    const float *at = l.residual + m * l.ldr + o.n[0];
#pragma unroll
    for (int j = 0; j < 2 * G; j++, at += j % 2 ? l.ldr : 7 * l.ldr) { /* rows m, m + 1, m + 8, m + 9, .. */
        const int r = m + j / 2 * 8 + j % 2;
        const bool in = l.residual && r >= from && r < to;
        float2 f = {};
        if (o.vec) {
            if (in && o.in[0]) f = *(const float2 *)at;
        } else {
            if (in && o.in[0]) f.x = at[0];
            if (in && o.in[1]) f.y = at[o.n[1] - o.n[0]];
        }
        e[j / 2 * 4 + j % 2] = f.x, e[j / 2 * 4 + j % 2 + 2] = f.y;
    }
}
/* Writes the same rows' y. */
template <int G>
__device__ __forceinline__ void store8(const Linear8 &l, int part, const Lane8 &o, int m, int from, int to,
                                       const float (&v)[4 * G]) {
    const long ldy = l.part[part].ldy;
    long at = m * ldy + o.n[0];
#pragma unroll
    for (int j = 0; j < 2 * G; j++, at += j % 2 ? ldy : 7 * ldy) {
        const int r = m + j / 2 * 8 + j % 2;
        if (r < from || r >= to) continue;
        float *const wide = (float *)l.part[part].y + at;
        __half *const narrow = (__half *)l.part[part].y + at;
        const float a = v[j / 2 * 4 + j % 2], b = v[j / 2 * 4 + j % 2 + 2];
        if (o.vec) {
            if (!o.in[0]) continue;
            if (l.y_f32) *(float2 *)wide = make_float2(a, b);
            else *(__half2 *)narrow = __floats2half2_rn(a, b);
        } else {
            if (o.in[0] && l.y_f32) wide[0] = a;
            else if (o.in[0]) narrow[0] = __float2half_rn(a);
            if (o.in[1] && l.y_f32) wide[o.n[1] - o.n[0]] = b;
            else if (o.in[1]) narrow[o.n[1] - o.n[0]] = __float2half_rn(b);
        }
    }
}

/* ---- few rows ------------------------------------------------------------------------------------------------------
 * A panel is 16 rows of W. The warps of a block take the panel's chunks in turn, each through a ring of its own, and
 * add their sums in shared memory. */

enum {
    skinny8_warps = 8,
    skinny8_threads = skinny8_warps * 32,
    skinny8_rows = 16,
    skinny8_tile = skinny8_rows * linear8_chunk,
    skinny8_own = 8,   /* times 8 numbers of a row: the most that a thread quantizes where blocks do that themselves, */
    skinny8_norm = 2,  /* and where they compute its norm, whose weights wait in registers */
    skinny8_pitch = 20 /* of sums: lanes that store 8 rows of 4 columns hit 32 banks */
};

struct Skinny8 {
    CUtensorMap w[3];
    Linear8 l;
    Scratch8 s;
    int first[4]; /* panel at which part i begins; [n_parts..3]: the number of panels */
    int chunks, stages;
    int quantize;   /* 1: each block quantizes x for itself, */
    int row_shift;  /* by 1 << row_shift threads for each row */
    int at_codes, at_mask, at_sum, at_out, at_small, at_x, at_bars; /* offsets in shared memory */
    int shared;
};

/* The oldest of `stages` groups of copies has arrived. */
__device__ inline void skinny8_wait(int stages) {
    if (stages == 4) wait_copies<3>();
    else if (stages == 3) wait_copies<2>();
    else wait_copies<1>();
    __syncwarp();
}

/* Up to 8 rows of x, or their norm, to codes [M, pitch], the mask's outlier columns and absmax [M], by the whole block. A
 * row's threads keep it in registers. norm: the norm's weights; normed f16 [M, K], null without a norm: its result.
 * asked() is called once x is asked for. -> whether this thread saw outliers */
template <class Asked>
__device__ __forceinline__ bool skinny8_quantize(const Skinny8 &p, int8_t *codes, int pitch, uint32_t *mask,
                                                 float *absmax, float *partial,
                                                 const tile4::NormWeights (&norm)[skinny8_norm], __half *normed,
                                                 Asked asked) {
    const Linear8 &l = p.l;
    const int tid = threadIdx.x, shift = p.row_shift, own = tid & ((1 << shift) - 1), row = tid >> shift;
    const int warps = 1 << shift >> 5, first_warp = tid / 32 & -warps;
    const __half2 limit = limit8(l.threshold);
    const auto column = [&](int i) { return ((i << shift) + own) * 8; }; /* of place i */
    const auto used = [&](int i) { return i << (shift + 3) < l.K; }; /* by some thread of the row */
    const auto meet = [&](float v, int turn, auto f) {
        return row_over8(v, partial + turn * skinny8_warps + first_warp, own / 32, warps, f);
    };
    uint4 x[skinny8_own];
    int at[skinny8_own]; /* K - 8 more than once does no harm, but to a norm */
#pragma unroll
    for (int i = 0; i < skinny8_own; i++) at[i] = min(column(i), l.K - 8);
    if (normed) {
        constexpr int n = skinny8_norm;
        const float *const from = (const float *)l.x + min(row, l.M - 1) * l.ldx;
        float v[n][8];
#pragma unroll
        for (int i = 0; i < n; i++)
            *(float4 *)v[i] = *(const float4 *)(from + at[i]), *(float4 *)(v[i] + 4) = *(const float4 *)(from + at[i] + 4);
        asked();
        uint4 result[n];
        tile4::norm_row(
            l, v, norm, column, [&](float u, int turn) { return meet(u, 1 + turn, [](float a, float b) { return a + b; }); },
            result);
#pragma unroll
        for (int i = 0; i < n; i++) {
            x[i] = result[i];
            if (column(i) < l.K && row < l.M) *(uint4 *)(normed + row * l.K + at[i]) = x[i];
        }
    } else {
        x_load8(l, min(row, l.M - 1), at, x);
        asked();
    }
    bool any = false;
    float top = 0;
#pragma unroll
    for (int i = 0; i < skinny8_own; i++) {
        if (!used(i)) continue;
        float top_i;
        const uint32_t outliers = ordinary8(x[i], l.threshold, limit, &top_i);
        top = fmaxf(top, top_i);
        if (outliers) atomicOr(mask + at[i] / 32, outliers << at[i] % 32), any = true;
    }
    top = meet(top, 0, [](float a, float b) { return fmaxf(a, b); });
    if (row >= l.M) return any;
    if (own == 0) absmax[row] = top;
    const float scale = quant_scale8(top);
#pragma unroll
    for (int i = 0; i < skinny8_own; i++) {
        const int k = column(i);
        if (k < p.s.Kp) *(uint64_t *)(codes + row * pitch + k) = k < l.K ? quantize8(x[i], scale) : 0;
    }
    return any;
}

template <int NT, bool ENGINE> /* 8 NT >= M; ENGINE: Hopper's, or each lane copies */
__device__ __forceinline__ void skinny8(const Skinny8 &p) {
    extern __shared__ __align__(1024) uint8_t shared[];
    constexpr int buffers = NT == 1 ? 2 : 1; /* of sums: with two, one barrier for each panel is enough */
    const Linear8 &l = p.l;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4, M = l.M;
    const int n_panels = p.first[3], n_words = p.chunks * 4;
    const int pitch = p.chunks * linear8_chunk + 64; /* +64: rows of neighbouring lanes lie in different banks */
    uint8_t *const ring = shared + warp * p.stages * skinny8_tile;
    int8_t *const codes = (int8_t *)shared + p.at_codes;     /* [M, pitch] */
    uint32_t *const mask = (uint32_t *)(shared + p.at_mask); /* [chunks, 4] bit k: an outlier column */
    float *const absmax = (float *)(shared + p.at_small), *const partial = absmax + 16; /* [16], [3, 8] */
    __half *const normed = (__half *)(shared + p.at_x);     /* [M, K] */
    const bool norms = ENGINE && l.norm_kind;
    uint64_t *const bars = (uint64_t *)(shared + p.at_bars) + warp * p.stages;

    int load_panel = warp < p.chunks ? blockIdx.x : n_panels, load_chunk = warp;
    const auto load = [&](int stage) {
        if constexpr (ENGINE) {
            if (load_panel >= n_panels) return;
            if (lane == 0) {
                const int part = (load_panel >= p.first[1]) + (load_panel >= p.first[2]);
                barrier_expect(bars + stage, skinny8_tile);
                tensor_load(ring + stage * skinny8_tile, p.w + part, load_chunk * linear8_chunk,
                            (load_panel - p.first[part]) * skinny8_rows, bars + stage);
            }
        } else {
            if (load_panel >= n_panels) return commit_copies(); /* groups are counted, also empty ones */
            const int part = (load_panel >= p.first[1]) + (load_panel >= p.first[2]);
            const int c = lane % 8, k = load_chunk * linear8_chunk + c * 16;
            const int8_t *const w = (const int8_t *)l.part[part].w;
#pragma unroll
            for (int r = lane / 8; r < skinny8_rows; r += 4) { /* swizzled as the engine does */
                const int n = (load_panel - p.first[part]) * skinny8_rows + r;
                const bool inside = n < l.part[part].N && k < l.K;
                copy_async(ring + stage * skinny8_tile + r * linear8_chunk + ((c ^ r) & 7) * 16,
                           inside ? w + (size_t)n * l.K + k : w, inside ? 16 : 0);
            }
            commit_copies();
        }
        load_chunk += skinny8_warps;
        if (load_chunk >= p.chunks) load_chunk = warp, load_panel += gridDim.x;
    };
    if constexpr (ENGINE) {
        if (lane == 0) {
            for (int i = 0; i < p.stages; i++) barrier_init(bars + i, 1);
            barrier_init_fence();
        }
        __syncwarp();
    }
    tile4::NormWeights norm[skinny8_norm];
#pragma unroll
    for (int i = 0; norms && i < skinny8_norm; i++)
        norm[i] = tile4::norm_weights(l, ((i << p.row_shift) + (tid & ((1 << p.row_shift) - 1))) * 8);
    load(0); /* weights do not depend on the launch before */
    const auto load_rest = [&] {
        for (int i = 1; i < p.stages; i++) load(i);
    };
    if (!p.quantize) load_rest(); /* else later, as they would be in the way of x */
    for (int i = tid; i < n_words; i += skinny8_threads) mask[i] = 0;
    __syncthreads();
    launch_dependents();
    wait_for_prior_kernel();

    bool any = false;
    if (p.quantize) {
        any = skinny8_quantize(p, codes, pitch, mask, absmax, partial, norm, norms ? normed : nullptr,
                               load_rest);
    } else {
        const uint32_t *const rows = (const uint32_t *)p.s.mask; /* [M, n_words] */
#pragma unroll 4
        for (int i = tid; i < M * n_words; i += skinny8_threads) {
            const uint32_t u = rows[i];
            if (u) atomicOr(mask + i % n_words, u), any = true;
        }
#pragma unroll 4
        for (int i = tid; i < M * n_words * 2; i += skinny8_threads)
            *(uint4 *)(codes + i / (n_words * 2) * pitch + i % (n_words * 2) * 16) = ((const uint4 *)p.s.codes)[i];
        if (tid < M) absmax[tid] = p.s.sca[tid];
    }
    any = __syncthreads_or(any);
    if (any && M > 1 && l.outlier_rule == 0) { /* codes of these columns go from every row */
        for (int i = tid; i < n_words; i += skinny8_threads)
            for (uint32_t u = mask[i]; u; u &= u - 1)
                for (int m = 0; m < M; m++) codes[m * pitch + i * 32 + __ffs(u) - 1] = 0;
        __syncthreads();
    }

    /* Row g of a tile, as the product numbers it, is row `row` of the panel: neighbours differ by 4, so that 8 lanes
     * that read together hit 8 different swizzled units. Column order within a chunk is a matter of agreement, so each
     * lane takes 16 bytes in a row: the first 8 are its part of one product, the last 8 of the next. */
    const int row = g / 2 + g % 2 * 4, half = lane / 16;
    int stage = 0, parity = 0, turn = 0;
    for (int panel = blockIdx.x; panel < n_panels; panel += gridDim.x, turn++) {
        const int part = (panel >= p.first[1]) + (panel >= p.first[2]);
        const int e_out = (tid + 32 * turn) % skinny8_threads, m_out = e_out / 16; /* warps take turns in finishing */
        const int n_out = (panel - p.first[part]) * skinny8_rows + e_out % 16;
        const bool writes = m_out < M && n_out < l.part[part].N;
        int *const sum =
            (int *)(shared + p.at_sum) + turn % buffers * (skinny8_warps * M * skinny8_pitch); /* [warps, M, pitch] */
        float *const out =
            (float *)(shared + p.at_out) + turn % buffers * (skinny8_warps * M * 16); /* [warps, M, 16] outliers */
        float scb = 0, bias = 0, residual = 0; /* loaded early: they arrive during the product */
        if (writes) {
            scb = l.part[part].scb[n_out];
            if (l.part[part].bias) bias = l.part[part].bias[n_out];
            if (l.residual) residual = l.residual[m_out * l.ldr + n_out];
        }
        int acc[NT][4] = {};
        float extra[4 * NT] = {}; /* row lane % 16 of the panel; x row half + 2 e */
        for (int c = warp; c < p.chunks; c += skinny8_warps) {
            const uint4 bits = *(const uint4 *)(mask + 4 * c);
            if constexpr (ENGINE) barrier_wait(bars + stage, parity);
            else skinny8_wait(p.stages);
            const uint8_t *w = ring + stage * skinny8_tile;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const uint8_t *at = w + row * 128 + (((h * 4 + t) ^ row) & 7) * 16;
                const uint4 a = *(const uint4 *)at, b = *(const uint4 *)(at + 8 * 128);
#pragma unroll
                for (int j = 0; j < NT; j++) {
                    const uint4 v =
                        *(const uint4 *)(codes + min(8 * j + g, M - 1) * pitch + c * linear8_chunk + h * 64 + t * 16);
                    mma_s8(acc[j], a.x, b.x, a.y, b.y, v.x, v.y);
                    mma_s8(acc[j], a.z, b.z, a.w, b.w, v.z, v.w);
                }
            }
            if (bits.x | bits.y | bits.z | bits.w) {
#pragma unroll 1
                for (int i = 0; i < 4; i++)
#pragma unroll 1
                    for (uint32_t u = i == 0 ? bits.x : i == 1 ? bits.y : i == 2 ? bits.z : bits.w; u; u &= u - 1) {
                        const int k = i * 32 + __ffs(u) - 1, r = lane % 16;
                        int rows[4 * NT], columns[4 * NT];
                        float x[4 * NT];
#pragma unroll
                        for (int e = 0; e < 4 * NT; e++)
                            rows[e] = min(half + 2 * e, M - 1), columns[e] = c * linear8_chunk + k;
                        if (norms) {
#pragma unroll
                            for (int e = 0; e < 4 * NT; e++) x[e] = worth8(l, normed[rows[e] * l.K + columns[e]]);
                        } else {
                            /* near: the first panel brings it into the first-level cache */
                            x_outliers8(l, rows, columns, x);
                        }
                        const float q = (float)(int8_t)w[r * 128 + (((k / 16) ^ r) & 7) * 16 + k % 16];
#pragma unroll
                        for (int e = 0; e < 4 * NT; e++) extra[e] = fmaf(x[e], q, extra[e]);
                    }
            }
            __syncwarp();
            load(stage);
            if (++stage == p.stages) stage = 0, parity ^= 1;
        }

        if (buffers == 1) __syncthreads(); /* the sums of the panel before have been read */
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int m = 8 * j + 2 * t + i;
                if (m >= M) continue;
                int *at = sum + (warp * M + m) * skinny8_pitch + row;
                at[0] = acc[j][i], at[8] = acc[j][2 + i];
            }
        if (any) {
#pragma unroll
            for (int e = 0; e < 4 * NT; e++)
                if (half + 2 * e < M) out[(warp * M + half + 2 * e) * 16 + lane % 16] = extra[e];
        }
        __syncthreads();
        if (!writes) continue;
        int total = 0;
        float more = 0;
#pragma unroll
        for (int i = 0; i < skinny8_warps; i++) total += sum[(i * M + m_out) * skinny8_pitch + e_out % 16];
        if (any) {
#pragma unroll
            for (int i = 0; i < skinny8_warps; i++) more += out[(i * M + m_out) * 16 + e_out % 16];
        }
        const float product = scaled8(total, absmax[m_out], scb, bias) + more * (scb * weight8);
        const float v = tile4::activate(product, l.act) + residual;
        const long at = m_out * l.part[part].ldy + n_out;
        if (l.y_f32) ((float *)l.part[part].y)[at] = v;
        else ((__half *)l.part[part].y)[at] = __float2half_rn(v);
    }
}

__global__ void __launch_bounds__(skinny8_threads, 2) linear8_skinny(const __grid_constant__ Skinny8 p) {
#ifdef BNB__HOPPER
    skinny8<1, true>(p);
#endif
}
template <int NT>
__global__ void __launch_bounds__(skinny8_threads, 2) linear8_skinny_mma(const __grid_constant__ Skinny8 p) {
#ifdef BNB__MMA
    skinny8<NT, false>(p);
#endif
}

enum { shared_total = 228 * 1024, shared_limit = 227 * 1024 }; /* Hopper's: of a multiprocessor; of one block */

/* False: beside rings of `stages` there is no room for x in `room` bytes of shared memory. */
bool skinny8_layout(Skinny8 *p, const Linear8 &l, int stages, int room) {
    const int buffers = l.M > 8 ? 1 : 2;
    p->l = l, p->s = scratch8(l), p->chunks = p->s.Kp / linear8_chunk, p->stages = stages;
    p->row_shift = l.M > 4 ? 5 : l.M > 2 ? 6 : l.M > 1 ? 7 : 8;
    p->quantize = l.M <= 8 && l.K <= skinny8_own * 8 << p->row_shift;
    if (l.norm_kind && (!p->quantize || l.K > skinny8_norm * 8 << p->row_shift)) return false;
    int64_t at = skinny8_warps * stages * skinny8_tile;
    const auto take = [&](int64_t bytes) { return (int)((at += (bytes + 15) & ~15) - ((bytes + 15) & ~15)); };
    p->at_codes = take((int64_t)l.M * (p->s.Kp + 64));
    p->at_mask = take(p->chunks * 16);
    p->at_sum = take(buffers * skinny8_warps * l.M * skinny8_pitch * 4);
    p->at_out = take(buffers * skinny8_warps * l.M * 16 * 4);
    p->at_small = take((16 + 3 * skinny8_warps) * 4);
    p->at_x = take(l.norm_kind ? (int64_t)l.M * l.K * 2 : 0);
    p->at_bars = take(skinny8_warps * stages * 8);
    p->shared = (int)at;
    return at <= room;
}

/* `blocks` of them shall fit a multiprocessor with `total` bytes. False: x is too large; the tiles of linear8_gemm read
 * it in pieces. */
bool skinny8_plan(Skinny8 *p, const Linear8 &l, int blocks, int total) {
    const int room = total / blocks - 1024; /* 1024: the system's part */
    p->first[0] = 0;
    for (int i = 0; i < 3; i++)
        p->first[i + 1] = p->first[i] + (i < l.n_parts ? (l.part[i].N + skinny8_rows - 1) / skinny8_rows : 0);
    return skinny8_layout(p, l, 4, room) || skinny8_layout(p, l, 3, room) || skinny8_layout(p, l, 2, room);
}

cudaError_t linear8_skinny_launch(cudaStream_t stream, Skinny8 *p, bool pdl) {
    const Linear8 &l = p->l;
    /* Never so little that three blocks fit: with programmatic launches the next grid would fill the room unevenly. */
    if (p->shared < shared_total / 3) p->shared = shared_total / 3;
    for (int i = 0; i < l.n_parts; i++) {
        const cudaError_t e = tensor_map(p->w + i, 1, l.part[i].w, l.K, l.part[i].N, l.K, skinny8_rows);
        if (e) return e;
    }
    const int slots = 2 * multiprocessors(), n = p->first[3] < slots ? p->first[3] : slots;
    return launch(linear8_skinny, *p, dim3(n), skinny8_threads, p->shared, 1, pdl, stream);
}

/* ---- many rows, Hopper ----------------------------------------------------------------------------------------------
 * A tile of y is 128 rows of W times BX rows of x. One warp keeps a ring of chunks of both full; three warps fetch what
 * follows the product needs (absmax of x, x and W in 16 outlier columns, the residual into the second-level cache); two
 * warpgroups multiply, 64 rows of W each. Where there are too few tiles for the chip, a cluster divides K and every
 * block finishes a part of x's rows. Up to BX = 32 two blocks fit a multiprocessor: the next product's weights arrive
 * while this one ends. */

enum {
    gemm8_rows = 128,
    gemm8_threads = 384,
    gemm8_side = 96,     /* threads */
    gemm8_mask = 1024,   /* words: outlier columns that blocks find for themselves */
};

template <int BX> struct Gemm8Shape {
    static constexpr int blocks = BX <= 32 ? 2 : 1; /* for each multiprocessor */
    /* Groups of 8 rows of x that are finished together: a turn takes its time, however many they are. */
    static constexpr int G = BX < 64 ? 2 : BX == 64 ? 4 : BX == 160 ? 10 : BX == 192 ? 6 : BX == 224 ? 7 : 8;
    static constexpr int box_rows = BX < 128 ? 0 : 8 * G;                             /* a turn of a warpgroup */
    static constexpr int box_bytes = BX < 128 ? 0 : std::max(16 * 1024, 8 * G * 256); /* of a warpgroup */
    static constexpr bool divides = BX < 256;                                         /* K, among the blocks of a cluster */
    static constexpr int w_bytes = gemm8_rows * linear8_chunk, stage_bytes = w_bytes + BX * linear8_chunk;
    static constexpr int side_bytes =
        2 * box_bytes + BX * gemm8_near * 5 + gemm8_rows * gemm8_near + BX * 4 + gemm8_mask * 4 + 11 * gemm8_near * 4;
    static constexpr int barrier_bytes = 256; /* and the number of outlier columns */
    static constexpr int room = (blocks == 1 ? shared_limit : shared_total / 2 - 1024) - barrier_bytes;
    static constexpr int stages = (room - side_bytes) / stage_bytes;
    static constexpr int shared = stages * stage_bytes + side_bytes + barrier_bytes;
    static_assert((2 * stages + 3) * 8 + 4 <= barrier_bytes, "room for the barriers");
    static constexpr int side_regs = BX == 256 ? 56 : 64, regs = BX == 256 ? 224 : blocks == 1 ? 216 : 88;
    static constexpr int sums_bytes = 256 * 16; /* of a group of rows, on their way within a cluster */
    /* Groups that each block of a cluster finishes: whole turns, if all get some. */
    __host__ __device__ static constexpr int mine(int cluster) {
        const int some = (BX / 8 + cluster - 1) / cluster, turns = (some + G - 1) / G * G;
        return turns * (cluster - 1) < BX / 8 ? turns : some;
    }
};

struct Gemm8 {
    CUtensorMap x, y[3], w[3]; /* w: [N / 16, 2, 8, K], row 2 i + h of 16 at [h, i]; or [1, 1, N, K]; see row_of8 */
    Linear8 l;
    Scratch8 s;
    int first[4]; /* column tile at which part i begins; [n_parts..3]: their number */
    int m_tiles, chunks, cluster;
    int mine;   /* of a tile's groups of 8 rows of x each block of a cluster finishes so many */
    HowBoxes boxes;
    bool fetch; /* the residual, ahead */
    int listed; /* outlier columns: 0 there are none, 1 in s.list, 2 in s.few */
};

/* True: linear8_gemm takes the outlier columns from the rows' own lists, and linear8_columns is not needed. */
bool linear8_few(const Linear8 &l) { return l.K <= gemm8_mask * 32; }

__device__ inline void tensor_load_4d(void *dst, const CUtensorMap *map, int x, int y, int z, int u, uint64_t *bar) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
                 "[%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(dst)),
                 "l"(map), "r"(x), "r"(y), "r"(z), "r"(u), "r"(shared_address(bar))
                 : "memory");
}
__device__ inline void prefetch_l2(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

template <int BX>
__global__ void __launch_bounds__(gemm8_threads, Gemm8Shape<BX>::blocks) linear8_gemm(const __grid_constant__ Gemm8 p) {
#ifdef BNB__HOPPER
    using S = Gemm8Shape<BX>;
    extern __shared__ __align__(1024) uint8_t shared[];
    constexpr int groups = BX / 8;
    uint8_t *const box = shared + S::stages * S::stage_bytes;             /* [2, box_bytes] */
    float *const near_x = (float *)(box + 2 * S::box_bytes);              /* [BX, near] x in outlier columns */
    uint8_t *const near_c = (uint8_t *)(near_x + BX * gemm8_near);        /* [BX, near] codes there, negative */
    uint8_t *const near_w = near_c + BX * gemm8_near;                     /* [128, near] W there */
    float *const sca = (float *)(near_w + gemm8_rows * gemm8_near);       /* [BX] */
    uint32_t *const mask = (uint32_t *)(sca + BX);                        /* [mask] bit k: an outlier column */
    int *const columns = (int *)(mask + gemm8_mask);                      /* [11 warps, near] */
    uint64_t *const full = (uint64_t *)(columns + 11 * gemm8_near);       /* [stages] */
    uint64_t *const empty = full + S::stages;                             /* [stages] */
    uint64_t *const side_full = empty + S::stages, *const side_empty = side_full + 1, *const sums_full = side_empty + 1;
    int *const side_count = (int *)(sums_full + 1); /* outlier columns */
    const Linear8 &l = p.l;
    const int tid = threadIdx.x, lane = tid % 32;
    const int cluster = S::divides ? p.cluster : 1; /* fewer branches */
    const int rank = cluster > 1 ? cluster_rank() : 0;
    const int c0 = rank * p.chunks / cluster, nc = (rank + 1) * p.chunks / cluster - c0; /* part of K */
    const int j0 = S::divides ? min(rank * p.mine, groups) : 0; /* groups that this block finishes */
    const int j1 = S::divides ? min(j0 + p.mine, groups) : groups;
    const int n_tiles = p.m_tiles * p.first[3], tile0 = blockIdx.x / cluster, tile_step = gridDim.x / cluster;
    const auto part_of = [&](int tile) { return (tile / p.m_tiles >= p.first[1]) + (tile / p.m_tiles >= p.first[2]); };
    const auto column_of = [&](int tile, int part) { return (tile / p.m_tiles - p.first[part]) * gemm8_rows; };
    /* Codes of ordinary numbers in outlier columns are in the sums: they are taken out. */
    const bool correct = p.listed && l.outlier_rule == 0;

    if (tid == 0) {
        for (int i = 0; i < S::stages; i++) barrier_init(full + i, 1), barrier_init(empty + i, 8);
        barrier_init(side_full, gemm8_side), barrier_init(side_empty, 256), barrier_init(sums_full, 1);
        barrier_init_fence();
        barrier_expect(sums_full, (cluster - 1) * max(j1 - j0, 0) * S::sums_bytes);
    }
    __syncthreads();
    launch_dependents();

    if (tid < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(S::side_regs));
        if (tid == 0) {
            const auto load_w = [&](int tile, int c, int stage) {
                const int part = part_of(tile), n0 = column_of(tile, part);
                const bool paired = paired8(l.part[part].N);
                tensor_load_4d(shared + stage * S::stage_bytes, p.w + part, (c0 + c) * linear8_chunk, paired ? 0 : n0,
                               0, paired ? n0 / 16 : 0, full + stage);
            };
            /* Weights do not depend on the launch before: the first ring of them is asked for at once. */
            const int early = min(S::stages, nc);
            for (int c = 0; c < early; c++) barrier_expect(full + c, S::stage_bytes), load_w(tile0, c, c);
            wait_for_prior_kernel();
            int stage = 0, parity = 0, left = early;
            for (int tile = tile0; tile < n_tiles; tile += tile_step)
                for (int c = 0; c < nc; c++) {
                    if (left > 0) {
                        left--;
                    } else {
                        barrier_wait(empty + stage, parity ^ 1);
                        barrier_expect(full + stage, S::stage_bytes);
                        load_w(tile, c, stage);
                    }
                    tensor_load(shared + stage * S::stage_bytes + S::w_bytes, &p.x, (c0 + c) * linear8_chunk,
                                tile % p.m_tiles * BX, full + stage);
                    if (++stage == S::stages) stage = 0, parity ^= 1;
                }
        } else if (tid >= 32) {
            if (cluster > 1) cluster_arrive(); /* no other block has to wait for these */
            const int i0 = tid - 32, n_words = p.s.Kp / 32, rows = 8 * max(j1 - j0, 0); /* that this block finishes */
            int *const own = columns + i0 / 32 * gemm8_near;
#pragma unroll 1
            for (int i = i0; i < rows * gemm8_near; i += gemm8_side) /* as it stays beyond the last outlier column */
                near_x[8 * j0 * gemm8_near + i] = 0, near_c[8 * j0 * gemm8_near + i] = 0;
            if (p.listed == 2)
#pragma unroll 1
                for (int i = i0; i < n_words; i += gemm8_side) mask[i] = 0;
            const auto prefetch = [&](int tile) {
                const int part = part_of(tile), n0 = column_of(tile, part), m0 = tile % p.m_tiles * BX;
                if (!p.fetch) return;
#pragma unroll 1
                for (int i = i0; i < rows * 4; i += gemm8_side) {
                    const int m = m0 + 8 * j0 + i / 4, n = n0 + i % 4 * 32;
                    if (m < l.M && n < l.part[part].N) prefetch_l2(l.residual + m * l.ldr + n);
                }
            };
            prefetch(tile0); /* the cache is coherent: it may come before what writes it */
            named_barrier(1, gemm8_side);
            wait_for_prior_kernel();
            int count = p.listed == 1 ? p.s.count[0] : 0;
            if (p.listed == 2) count = -1;
            if (p.listed == 2 && p.s.lists <= lists8) {
                /* Of few lists every warp takes all; else each a third, and then what the three have found. */
                const bool all = p.s.lists <= few_lists8;
                const int most = all ? p.s.lists : (p.s.lists + 2) / 3, first = all ? 0 : i0 / 32 * most;
                int *const thirds = columns + 3 * gemm8_near, *const third = thirds + i0 / 32 * gemm8_near;
                count = few_columns8(p.s, first, min(first + most, p.s.lists), all ? own : third);
                if (!all) {
                    if (count < 0 && i0 % 32 == 0) *third = few8_many;
                    named_barrier(1, gemm8_side);
                    uint4 f[2];
                    for (int i = 0; i < 2; i++) {
                        const int at = i0 % 32 + 32 * i, k = at < 3 * gemm8_near ? thirds[at] : (int)few8_none;
                        f[i] = make_uint4(0xffff0000u | k, ~0u, ~0u, ~0u);
                    }
                    const bool many = front8(f[0]) == few8_many || front8(f[1]) == few8_many;
                    count = __any_sync(~0u, many) ? -1 : columns8(f, own);
                }
            }
            if (count < 0) { /* the same for all warps */
                merge_few8(l, p.s, mask, i0, gemm8_side);
                named_barrier(1, gemm8_side);
                count = mask_columns8(mask, n_words, 0, gemm8_near, own);
            }
            if (i0 == 0) *side_count = count;
            const int near = min(count, (int)gemm8_near), lane = i0 % 32, x_bits = 32 - __clz((rows - 1) / 32);
            if (p.listed == 1 && lane < near) own[lane] = p.s.list[lane];
            __syncwarp();
            int parity = 0;
            for (int tile = tile0; tile < n_tiles; tile += tile_step, parity ^= 1) {
                const int part = part_of(tile), n0 = column_of(tile, part), N = l.part[part].N,
                          m0 = tile % p.m_tiles * BX;
                const bool paired = paired8(N);
                const int8_t *const w = (const int8_t *)l.part[part].w;
                if (tile != tile0) prefetch(tile);
                barrier_wait(side_empty, parity ^ 1);
                constexpr int n_sca = (BX + gemm8_side - 1) / gemm8_side;
                float absmax[n_sca];
#pragma unroll
                for (int i = 0; i < n_sca; i++) {
                    const int m = m0 + i0 + i * gemm8_side;
                    absmax[i] = m < l.M ? p.s.sca[m] : 0;
                }
                /* 4 groups of 32 rows of W in each column that is near, then as many of x as this block finishes, are
                 * dealt to the warps. Many are on their way before the first is waited for. */
                constexpr int some_w = 8, some_x = 8, warps = gemm8_side / 32;
                const int n = n0 + row_of8(lane, paired), m = m0 + 8 * j0 + lane;
#pragma unroll 1
                for (int j = i0 / 32; j < near * 4; j += some_w * warps) {
                    int8_t codes[some_w];
#pragma unroll
                    for (int i = 0; i < some_w; i++) {
                        const int at = min(j + i * warps, near * 4 - 1), r = at % 4 * 32;
                        codes[i] = w[(size_t)min(n + r, N - 1) * l.K + own[at / 4]];
                    }
                    __syncwarp(); /* else the compiler has the first stored before the others are asked for */
#pragma unroll
                    for (int i = 0; i < some_w; i++) {
                        const int at = j + i * warps;
                        if (at < near * 4) near_w[(at % 4 * 32 + lane) * gemm8_near + at / 4] = codes[i];
                    }
                }
                /* Of x: one loop for each type, as branches would wait. */
                const auto gather = [&](auto number) {
                    const auto *const x = (const decltype(number) *)l.x;
#pragma unroll 1
                    for (int j = i0 / 32; j < near << x_bits; j += some_x * warps) {
                        decltype(number) v[some_x];
                        float top[some_x];
#pragma unroll
                        for (int i = 0; i < some_x; i++) {
                            const int at = min(j + i * warps, (near << x_bits) - 1), k = own[at >> x_bits];
                            const int mi = min(m + (at & ((1 << x_bits) - 1)) * 32, l.M - 1);
                            v[i] = x[mi * l.ldx + k], top[i] = p.s.sca[mi];
                        }
                        __syncwarp();
#pragma unroll
                        for (int i = 0; i < some_x; i++) {
                            const int at = j + i * warps, r = (at & ((1 << x_bits) - 1)) * 32 + lane;
                            const int to = (8 * j0 + r) * gemm8_near + (at >> x_bits);
                            if (at >= near << x_bits || r >= rows) continue;
                            /* Its code, too, is made of it: fetched, it would be as much traffic again. */
                            const float half = __half2float(__half(v[i]));
                            const bool counted = correct && fabsf(half) < l.threshold;
                            near_x[to] = worth8(l, v[i]);
                            near_c[to] = (uint8_t)(counted ? -code8(half, quant_scale8(top[i])) : 0);
                        }
                    }
                };
                if (l.x_f32) gather(float());
                else gather(__half());
#pragma unroll
                for (int i = 0; i < n_sca; i++)
                    if (const int r = i0 + i * gemm8_side; r < BX) sca[r] = absmax[i];
                barrier_arrive(side_full);
            }
            if (cluster > 1) cluster_wait();
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(S::regs));
    const int wg = tid / 128 - 1, warp = tid / 32 - 4, g = lane / 4, t = lane % 4;
    int stage = 0, parity = 0, side_parity = 0;
    /* Outlier columns beyond those that are near (rare): four of this lane, and its rows' weights there. */
    const auto far_columns = [&](int first, int count, int(&k)[4]) {
        int *const found = columns + (3 + warp) * gemm8_near;
        if (p.listed == 2) __syncwarp(), mask_columns8(mask, p.s.Kp / 32, first, gemm8_near, found);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at = min(min(4 * t + i, gemm8_near - 1), count - 1 - first);
            k[i] = p.listed == 2 ? found[at] : p.s.list[first + at];
        }
    };
    const auto far_weights = [&](const Lane8 &own, int part, const int(&k)[4], uint32_t(&w)[2]) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            w[i] = four8((const int8_t *)l.part[part].w + (size_t)min(own.n[i], l.part[part].N - 1) * l.K, k);
    };
    using YBoxes = Boxes<8 * S::G, S::box_rows ? S::box_bytes : 8 * S::G * 256>;
    uint32_t box_count = 0;
    wait_for_prior_kernel();
    for (int tile = tile0; tile < n_tiles; tile += tile_step, side_parity ^= 1) {
        const int part = part_of(tile), m0 = tile % p.m_tiles * BX, from = m0 + 8 * j0, to = min(m0 + 8 * j1, l.M);
        const Lane8 own = lane8(l, part, column_of(tile, part) + 16 * warp);
        constexpr int G = S::G;
        /* On the way while others are multiplied. Large tiles have no registers for it, and most no need: boxes add. */
        constexpr bool ahead = S::box_rows == 0;
        float residual[ahead ? 4 * G : 1] = {}; /* of the next groups */
        if constexpr (ahead) residual8<G>(l, own, m0 + 8 * j0 + 2 * t, from, to, residual);

        int acc[BX / 2], before = 0;
        for (int c = 0; c < nc; c++) {
            const uint8_t *at = shared + stage * S::stage_bytes;
            barrier_wait(full + stage, parity);
            const uint64_t dw = descriptor(at + wg * 64 * linear8_chunk, 0), dx = descriptor(at + S::w_bytes, 0);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < 4; i++) wgmma_s8(acc, dw + 2 * i, dx + 2 * i, c > 0 || i > 0);
            wgmma_commit();
            wgmma_wait<1>(); /* the chunk before */
            if (c > 0 && lane == 0) barrier_arrive(empty + before);
            before = stage;
            if (++stage == S::stages) stage = 0, parity ^= 1;
        }
        wgmma_wait<0>();
        if (lane == 0) barrier_arrive(empty + before);
        __syncwarp();

        int4 *const sums = (int4 *)shared + tid - 128; /* [rank][mine][256 threads], of which each reads its own */
        if (cluster > 1) {
            /* A cluster has one tile. Where all rings are done, each block sends each group's sums to the one that
             * finishes it. */
            cluster_sync();
            int owner = 0, slot = 0;
#pragma unroll
            for (int j = 0; j < groups; j++) {
                int4 *const at = sums + (rank * p.mine + slot) * 256;
                if (owner == rank) *at = make_int4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
                else
                    cluster_send(shared_address(at), shared_address(sums_full), owner, acc[4 * j], acc[4 * j + 1],
                                 acc[4 * j + 2], acc[4 * j + 3]);
                if (++slot == p.mine) slot = 0, owner++;
            }
            if (j0 < j1) barrier_wait(sums_full, 0);
            constexpr int most = S::mine(2);
#pragma unroll
            for (int i = 0; i < 4 * most; i++) acc[i] = 0;
#pragma unroll 1
            for (int r = 0; r < cluster; r++)
#pragma unroll
                for (int i = 0; i < most; i++) {
                    if (j0 + i >= j1) continue;
                    const int4 more = sums[(r * p.mine + i) * 256];
                    acc[4 * i] += more.x, acc[4 * i + 1] += more.y, acc[4 * i + 2] += more.z, acc[4 * i + 3] += more.w;
                }
        }

        barrier_wait(side_full, side_parity);
        const int count = *side_count;
        const float unit[2] = {own.scb[0] * weight8, own.scb[1] * weight8};
        const uint32_t near[2] = {((const uint32_t *)near_w)[(16 * warp + g) * 4 + t],
                                  ((const uint32_t *)near_w)[(16 * warp + g + 8) * 4 + t]};
        YBoxes boxes(shared_address(box) + wg * S::box_bytes, l.y_f32, 2 + wg, box_count);
        /* A loop of few iterations, and only one: unrolled, code would be larger than the instruction cache. */
#pragma unroll 1
        for (int j = j0; j < j1; j += G) {
            int sum[4 * G];
#pragma unroll
            for (int i = 0; i < 4 * G; i++) sum[i] = acc[i];
#pragma unroll
            for (int i = 0; i < BX / 2 - 4 * G; i++) acc[i] = acc[i + 4 * G]; /* registers have no index at run time */
            const int m = m0 + 8 * j;
            if (correct && count > 0)
#pragma unroll
                for (int i = 0; i < G; i++)
                    mma_s8(sum + 4 * i, near[0], near[1], ((const uint32_t *)near_c)[(8 * (j + i) + g) * 4 + t]);
            if (correct)
#pragma unroll 1
                for (int at = gemm8_near; at < count; at += gemm8_near) {
                    int k[4];
                    uint32_t w[2];
                    far_columns(at, count, k), far_weights(own, part, k, w);
#pragma unroll
                    for (int i = 0; i < G; i++) {
                        const int8_t *const codes = p.s.codes + (size_t)min(m + 8 * i + g, l.M - 1) * p.s.Kp;
                        mma_s8(sum + 4 * i, w[0], w[1], minus8(four8(codes, k), count - at - 4 * t));
                    }
                }
            float v[4 * G];
#pragma unroll
            for (int i = 0; i < 4 * G; i++) {
                const float s = sca[8 * (j + i / 4) + 2 * t + i % 2];
                v[i] = scaled8(sum[i], s, own.scb[i / 2 % 2], own.bias[i / 2 % 2]);
            }
            if (count > 0) {
                const auto x = [&](int i) {
                    return *(const float4 *)(near_x + (8 * (j + i) + g) * gemm8_near + 4 * t);
                };
                outliers8<G>(l, near, x, unit, v);
            }
#pragma unroll 1
            for (int at = gemm8_near; at < count; at += gemm8_near) {
                int k[4];
                uint32_t w[2];
                far_columns(at, count, k), far_weights(own, part, k, w);
                const auto x = [&](int i) { return x_four8(l, min(m + 8 * i + g, l.M - 1), k, count - at - 4 * t); };
                outliers8<G>(l, w, x, unit, v);
            }
            activate8(l.act, v);
            if constexpr (ahead) {
#pragma unroll
                for (int i = 0; i < 4 * G; i++) v[i] += residual[i];
                if (j + G < j1) residual8<G>(l, own, m + 8 * G + 2 * t, from, to, residual);
            }
            if (S::box_rows && p.boxes != kBoxesNone) {
                float2 pairs[2 * G];
#pragma unroll
                for (int i = 0; i < 2 * G; i++) pairs[i] = make_float2(v[i / 2 * 4 + i % 2], v[i / 2 * 4 + i % 2 + 2]);
                const int n = column_of(tile, part) + 64 * wg;
                boxes.write(p.y + part, n, m, n < l.part[part].N, p.boxes == kBoxesAdd, pairs);
            } else {
                constexpr int some = ahead ? G : 1; /* groups at a time */
#pragma unroll
                for (int i = 0; i < G; i += some) {
                    float e[4 * some] = {};
                    if (!ahead && l.residual) residual8<some>(l, own, m + 8 * i + 2 * t, from, to, e);
#pragma unroll
                    for (int k = 0; k < 4 * some; k++) e[k] += v[4 * i + k];
                    store8<some>(l, part, own, m + 8 * i + 2 * t, from, to, e);
                }
            }
        }
        barrier_arrive(side_empty); /* every lane for what it has read */
    }
    if (S::box_rows) YBoxes::drain();
#endif
}

/* The map of W for linear8_gemm; see Gemm8. */
cudaError_t weight_map8(CUtensorMap *map, const void *w, int N, int K) {
    const bool paired = paired8(N);
    const int64_t size[4] = {K, paired ? 8 : N, paired ? 2 : 1, paired ? N / 16 : 1};
    const int64_t pitch[3] = {paired ? 2 * (int64_t)K : K, K, 16 * (int64_t)K};
    const int box[4] = {linear8_chunk, paired ? 8 : gemm8_rows, paired ? 2 : 1, paired ? gemm8_rows / 16 : 1};
    return tensor_map<4>(map, 1, w, size, pitch, box);
}

template <int BX> cudaError_t linear8_gemm_launch(cudaStream_t stream, const Linear8 &l, int cluster, bool pdl) {
    using S = Gemm8Shape<BX>;
    constexpr int most = S::divides ? std::max({2 * S::mine(2), 4 * S::mine(4), 8 * S::mine(8)}) : 0;
    static_assert(most * S::sums_bytes <= S::stages * S::stage_bytes, "room for the sums of a cluster");
    Gemm8 p;
    p.l = l, p.s = scratch8(l), p.chunks = p.s.Kp / linear8_chunk, p.cluster = cluster;
    p.mine = S::mine(cluster);
    p.m_tiles = (l.M + BX - 1) / BX;
    p.listed = !(l.threshold > 0) ? 0 : linear8_few(l) ? 2 : 1;
    cudaError_t e = tensor_map(&p.x, 1, p.s.codes, p.s.Kp, l.M, p.s.Kp, BX);
    for (int i = 0; !e && i < l.n_parts; i++) e = weight_map8(p.w + i, l.part[i].w, l.part[i].N, l.K);
    bool boxes = S::box_rows && (cluster == 1 || p.mine % S::G == 0);
    for (int i = 0; i < l.n_parts; i++) boxes = boxes && paired8(l.part[i].N);
    p.boxes = kBoxesNone;
    if (!e && boxes) e = box_maps(l, S::box_rows, p.y, &p.boxes);
    if (e) return e;
    if (p.boxes == kBoxesBeside) p.boxes = kBoxesNone; /* no registers for it */
    p.fetch = fetches_residual(l, p.boxes);
    p.first[0] = 0;
    for (int i = 0; i < 3; i++)
        p.first[i + 1] = p.first[i] + (i < l.n_parts ? (l.part[i].N + gemm8_rows - 1) / gemm8_rows : 0);
    const int tiles = p.m_tiles * p.first[3], slots = S::blocks * multiprocessors();
    return launch(linear8_gemm<BX>, p,
                  dim3(cluster > 1     ? tiles * cluster
                       : tiles < slots ? tiles
                                       : slots),
                  gemm8_threads, S::shared, cluster, pdl, stream);
}

/* ---- many rows, mma.sync --------------------------------------------------------------------------------------------
 * A block has one tile of y, BM rows of x by BN of W, and 8 warps, each with 32 rows of W and 64, 32 or 16 of x. Chunks
 * of x and W go through a ring of stages, swizzled as the copy engine would. Where the tiles are too few for the chip,
 * they are smaller: K is never divided. */

enum { gemm8_mma_threads = 256, gemm8_mma_stages = 3 };

template <int BM, int BN> struct Gemm8MmaShape {
    static constexpr int stage_bytes = (BM + BN) * linear8_chunk, ring_bytes = gemm8_mma_stages * stage_bytes;
    static constexpr int warps_n = BN / 32, warps_m = 8 / warps_n, warp_rows = BM / warps_m;
    static constexpr int shared = ring_bytes;
    /* behind the product the ring's place holds x and W in outlier columns */
    static_assert(BM * gemm8_near * 4 + BN * gemm8_near <= ring_bytes, "no room");
};

struct Gemm8Mma {
    Linear8 l;
    Scratch8 s;
    int first[4]; /* column tile at which part i begins; [n_parts..3]: their number */
    int m_tiles, chunks;
    int outliers; /* 1: list and count are valid */
};

template <int BM, int BN>
__global__ void __launch_bounds__(gemm8_mma_threads) linear8_gemm_mma(const __grid_constant__ Gemm8Mma p) {
#ifdef BNB__MMA
    using S = Gemm8MmaShape<BM, BN>;
    extern __shared__ __align__(1024) uint8_t shared[];
    constexpr int groups = S::warp_rows / 8; /* of rows of x */
    const Linear8 &l = p.l;
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
    const int column = blockIdx.x / p.m_tiles, part = (column >= p.first[1]) + (column >= p.first[2]);
    const int m0 = blockIdx.x % p.m_tiles * BM, n0 = (column - p.first[part]) * BN, N = l.part[part].N;
    const int warp_m = warp / S::warps_n * S::warp_rows, warp_n = warp % S::warps_n * 32;
    const int8_t *const w = (const int8_t *)l.part[part].w;
    const bool paired = paired8(N);

    const auto load = [&](int c) { /* chunk c to its stage; groups are counted, also empty ones */
        if (c < p.chunks) {
            uint8_t *const to = shared + c % gemm8_mma_stages * S::stage_bytes; /* x [BM, 128], W [BN, 128] */
            const int k = c * linear8_chunk + tid % 8 * 16;
#pragma unroll
            for (int i = 0; i < (BM + BN) / 32; i++) {
                const int r = tid / 8 + 32 * i, m = m0 + r, n = n0 + row_of8(r - BM, paired);
                const bool of_x = i < BM / 32, inside = of_x ? m < l.M : n < N && k < l.K;
                const int8_t *const from = of_x ? p.s.codes + (size_t)m * p.s.Kp + k : w + (size_t)n * l.K + k;
                copy_async(to + r * linear8_chunk + ((tid ^ r) & 7) * 16, inside ? from : w, inside ? 16 : 0);
            }
        }
        commit_copies();
    };
    launch_dependents();
    wait_for_prior_kernel();
    int acc[2][groups][4] = {}; /* [16 rows of W][8 rows of x][as Lane8 says] */
    load(0);
    load(1);
    for (int c = 0; c < p.chunks; c++) {
        wait_copies<1>();
        __syncthreads(); /* chunk c has arrived, for all, and chunk c - 1 is done with */
        load(c + 2);
        const uint8_t *const stage = shared + c % gemm8_mma_stages * S::stage_bytes;
        const uint8_t *const w_at = stage + (BM + warp_n + lane % 16) * linear8_chunk;
        const uint8_t *const x_at = stage + (warp_m + lane / 16 * 8 + lane % 8) * linear8_chunk;
#pragma unroll
        for (int s = 0; s < linear8_chunk / 32; s++) {
            uint32_t a[2][4], b[groups / 2][4];
#pragma unroll
            for (int h = 0; h < 2; h++)
                load_matrices(a[h], w_at + h * 16 * linear8_chunk + (((2 * s + lane / 16) ^ lane) & 7) * 16);
#pragma unroll
            for (int j = 0; j < groups / 2; j++)
                load_matrices(b[j], x_at + j * 16 * linear8_chunk + (((2 * s + lane / 8 % 2) ^ lane) & 7) * 16);
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int j = 0; j < groups; j++)
                    mma_s8(acc[h][j], a[h][0], a[h][1], a[h][2], a[h][3], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    }
    wait_copies<0>();

    Lane8 own[2];
    float v[2][groups * 4];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        own[h] = lane8(l, part, n0 + warp_n + 16 * h);
#pragma unroll
        for (int j = 0; j < groups; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int m = m0 + warp_m + 8 * j + 2 * t + i % 2;
                v[h][4 * j + i] =
                    scaled8(acc[h][j][i], m < l.M ? p.s.sca[m] : 0, own[h].scb[i / 2], own[h].bias[i / 2]);
            }
    }
    float *const near_x = (float *)shared;                         /* [BM, near] x in outlier columns */
    uint8_t *const near_w = (uint8_t *)(near_x + BM * gemm8_near); /* [BN, near] W in outlier columns */
    const int count = p.outliers ? p.s.count[0] : 0;
#pragma unroll 1
    for (int j0 = 0; j0 < count; j0 += gemm8_near) {
        __syncthreads(); /* what lies in this place has been read */
        const int k[1] = {p.s.list[min(j0 + tid % gemm8_near, count - 1)]};
#pragma unroll 4
        for (int r = tid / gemm8_near; r < BM; r += gemm8_mma_threads / gemm8_near) {
            const int m[1] = {min(m0 + r, l.M - 1)};
            float x[1];
            x_outliers8(l, m, k, x);
            near_x[r * gemm8_near + tid % gemm8_near] = j0 + tid % gemm8_near < count ? x[0] : 0;
        }
#pragma unroll 4
        for (int r = tid / gemm8_near; r < BN; r += gemm8_mma_threads / gemm8_near)
            near_w[r * gemm8_near + tid % gemm8_near] =
                (uint8_t)w[(size_t)min(n0 + row_of8(r, paired), N - 1) * l.K + k[0]];
        __syncthreads();
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint32_t *const w_at = (const uint32_t *)near_w + (warp_n + 16 * h + g) * 4 + t;
            const uint32_t near[2] = {w_at[0], w_at[8 * 4]};
            const float unit[2] = {own[h].scb[0] * weight8, own[h].scb[1] * weight8};
            const auto x = [&](int j) { return *(const float4 *)(near_x + (warp_m + 8 * j + g) * gemm8_near + 4 * t); };
            outliers8<groups>(l, near, x, unit, v[h]);
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        activate8(l.act, v[h]);
#pragma unroll
        for (int j = 0; j < groups; j += 2) {
            const int m = m0 + warp_m + 8 * j + 2 * t;
            float e[8];
            residual8<2>(l, own[h], m, 0, l.M, e);
#pragma unroll
            for (int i = 0; i < 8; i++) e[i] += v[h][4 * j + i];
            store8<2>(l, part, own[h], m, 0, l.M, e);
        }
    }
#endif
}

template <int BM, int BN> cudaError_t linear8_gemm_mma_launch(cudaStream_t stream, const Linear8 &l, bool pdl) {
    Gemm8Mma p;
    p.l = l, p.s = scratch8(l), p.chunks = p.s.Kp / linear8_chunk;
    p.m_tiles = (l.M + BM - 1) / BM;
    p.outliers = l.threshold > 0;
    p.first[0] = 0;
    for (int i = 0; i < 3; i++) p.first[i + 1] = p.first[i] + (i < l.n_parts ? (l.part[i].N + BN - 1) / BN : 0);
    return launch(linear8_gemm_mma<BM, BN>, p, dim3(p.m_tiles * p.first[3]), gemm8_mma_threads,
                  Gemm8MmaShape<BM, BN>::shared, 1, pdl, stream);
}

int tiles8(const Linear8 &l, int bm, int bn) {
    int n = 0;
    for (int i = 0; i < l.n_parts; i++) n += (l.part[i].N + bn - 1) / bn;
    return n * ((l.M + bm - 1) / bm);
}

/* What the large products ask for: x in int8 and its outlier columns. */
cudaError_t linear8_codes(cudaStream_t stream, const Linear8 &l, bool list, bool clear, bool pdl) {
    const cudaError_t e = linear8_quantize_launch(stream, l, pdl);
    if (e || !list || !(l.threshold > 0)) return e;
    const Columns8 p = {l, scratch8(l), clear};
    return launch(linear8_columns, p, dim3(1), 1024, p.s.Kp / 8, 1, pdl, stream);
}

/* What a kernel of linear8_large takes, in ns: of a chunk, more of it where every multiprocessor has a block, of a tile
 * beside its chunks, and if y is f32. Fitted to times of an H200 so that the choice is the best. */
struct Gemm8Kernel {
    void (*kernel)(Gemm8);
    int shared, bx, blocks; /* blocks: for each multiprocessor */
    bool divides;
    int chunk_ns, busy_ns, tile_ns, f32_ns;
    cudaError_t (*launch)(cudaStream_t, const Linear8 &, int cluster, bool pdl);
};
template <int BX> constexpr Gemm8Kernel gemm8_kernel(int chunk_ns, int busy_ns, int tile_ns, int f32_ns) {
    using S = Gemm8Shape<BX>;
    return {linear8_gemm<BX>, S::shared, BX,      S::blocks, S::divides,
            chunk_ns,         busy_ns,   tile_ns, f32_ns,    linear8_gemm_launch<BX>};
}
const Gemm8Kernel gemm8_kernels[] = {
    gemm8_kernel<16>(169, 187, 1121, 0),     gemm8_kernel<32>(246, 305, 698, 38),
    gemm8_kernel<64>(200, 192, 877, 154),    gemm8_kernel<128>(286, 222, 1692, 658),
    gemm8_kernel<160>(369, 237, 2680, 980),  gemm8_kernel<192>(404, 278, 3630, 1050),
    gemm8_kernel<224>(487, 247, 3996, 1851), gemm8_kernel<256>(583, 284, 4441, 2409),
};

cudaError_t linear8_init(int device) { /* the current one */
    int major = 0;
    cudaError_t e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (!e && major != 9) e = cudaErrorNoKernelImageForDevice; /* sm_90a code runs on nothing else */
    const auto allow = [&](auto kernel, int bytes) {
        if (!e) e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    };
    allow(linear8_skinny, shared_limit);
    for (const Gemm8Kernel &k : gemm8_kernels) allow(k.kernel, k.shared);
    return e;
}

/* The kernel, and the number of blocks that divide K, by the least estimated time. */
cudaError_t linear8_large(cudaStream_t stream, const Linear8 &l, bool pdl) {
    if (const cudaError_t e = linear8_codes(stream, l, !linear8_few(l), false, pdl)) return e;
    const int sm = multiprocessors(), chunks = scratch8(l).Kp / linear8_chunk;
    const Gemm8Kernel *best = nullptr;
    int best_cluster = 1;
    long best_ns = 0;
    for (const Gemm8Kernel &k : gemm8_kernels)
        for (int cluster = 1; cluster <= (k.divides ? 8 : 1); cluster *= 2) {
            if (k.bx >= 4 * l.M && best) continue; /* mostly zeros */
            const int blocks = tiles8(l, k.bx, gemm8_rows) * cluster, slots = k.blocks * sm;
            /* Clusters of 4 and 8 find room on ten of eleven multiprocessors. */
            const int room = cluster > 2 ? slots * 10 / 11 : slots;
            if (cluster > 1 && (cluster > chunks / 2 || blocks > room)) continue;
            const long waves = (blocks + slots - 1) / slots;
            const long chunk_ns = k.chunk_ns + (long)k.busy_ns * std::min(blocks, slots) / sm;
            const int meeting = cluster == 1 ? 0 : cluster == 2 ? 200 : cluster == 4 ? 510 : 1010;
            const long ns = waves * (chunks * chunk_ns / cluster + k.tile_ns + (l.y_f32 ? k.f32_ns : 0)) + meeting;
            if (!best || ns < best_ns) best = &k, best_ns = ns, best_cluster = cluster;
        }
    return best->launch(stream, l, best_cluster, pdl);
}

/* Whether linear8 computes the norm of x [M, K] in front. */
bool linear8_takes_norm(int M, int K) {
    Linear8 l = {};
    l.M = M, l.K = K, l.norm_kind = tile4::kNormLayer;
    Skinny8 p;
    return skinny8_plan(&p, l, 2, shared_total);
}

cudaError_t linear8(cudaStream_t stream, const Linear8 &l, bool pdl) {
    Skinny8 p;
    const bool skinny = l.M <= 8 && skinny8_plan(&p, l, 2, shared_total);
    if (l.norm_kind && !(skinny && l.x_f32)) return cudaErrorInvalidValue;
    if (!skinny) return linear8_large(stream, l, pdl);
    if (!p.quantize)
        if (const cudaError_t e = linear8_quantize_launch(stream, l, pdl)) return e;
    return linear8_skinny_launch(stream, &p, pdl);
}

/* The same for every GPU since sm_80. */
cudaError_t linear8_mma_init() { /* for the current device */
    const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    cudaError_t e = cudaSuccess;
    const auto allow = [&](auto kernel, int bytes) {
        if (!e) e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    };
    allow(linear8_skinny_mma<1>, limit), allow(linear8_skinny_mma<2>, limit);
    allow(linear8_gemm_mma<128, 128>, Gemm8MmaShape<128, 128>::shared);
    allow(linear8_gemm_mma<64, 128>, Gemm8MmaShape<64, 128>::shared);
    allow(linear8_gemm_mma<64, 64>, Gemm8MmaShape<64, 64>::shared);
    return e;
}

cudaError_t linear8_mma(cudaStream_t stream, const Linear8 &l, bool pdl) {
    const int slots = multiprocessors(), total = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    Skinny8 p;
    for (int blocks = 2; l.M <= 16 && blocks > 0; blocks--) {
        if (!skinny8_plan(&p, l, blocks, total)) continue;
        if (!p.quantize) {
            const cudaError_t e = linear8_quantize_launch(stream, l, pdl);
            if (e) return e;
        }
        return launch(l.M > 8 ? linear8_skinny_mma<2> : linear8_skinny_mma<1>, p,
                      dim3(std::min(p.first[3], blocks * slots)), skinny8_threads, p.shared, 1, pdl, stream);
    }
    if (const cudaError_t e = linear8_codes(stream, l, true, true, pdl)) return e;
    /* The largest tiles of which there are enough. */
    if (l.M > 64 && tiles8(l, 128, 128) >= slots) return linear8_gemm_mma_launch<128, 128>(stream, l, pdl);
    if (tiles8(l, 64, 128) >= slots) return linear8_gemm_mma_launch<64, 128>(stream, l, pdl);
    return linear8_gemm_mma_launch<64, 64>(stream, l, pdl);
}

/* Attention over an f16 or int8 cache: y[t, h] = softmax(scale q[t, h] . k[r, h']) v[r, h'] over the cache rows r of
 * row t's span. Spans are data: no launch depends on them, and blocks that have nothing to do leave.
 *
 *   T <= 16   attention_decode: a cluster of blocks for each row and head divides the row's span; no block waits for
 *             another launch or for memory that an earlier one left behind.
 *             attention_decode_split, attention_join: without clusters a second launch joins the blocks' results.
 *             Blocks that count who is last would save it, but need a counter that outlives the launch.
 *   T > 16    attention_prompt: 128 rows of one head; products by wgmma, K and V by the tensor copy engine. It reads
 *             whole tiles of 128 cache rows: those between the first and the last row that its 128 rows see must
 *             hold finite numbers, also where no span covers them.
 *             attention_prompt_mma: the same by mma.sync and cp.async.
 *             Both multiply f16: attention_widen makes it of the rows of an int8 cache that are seen.
 *
 * Sums have a fixed order: the same bits in every run. */

struct Attention {
    int T, n_head, n_head_kv, D; /* D: head size */
    const void *q;               /* [T, n_head * D], rows ldq elements apart */
    long ldq;
    int q_f32;         /* else f16 */
    void *k, *v;       /* f16, or int8 codes, [R, n_head_kv * D], rows ldkv elements apart, 16-byte aligned */
    long ldkv;
    int kv_int8;                /* codes */
    float *k_absmax, *v_absmax; /* of codes: [n_head_kv, R], value = code * absmax / 127 */
    void *k_wide, *v_wide;      /* of codes, T > decode_most: scratch, f16 [R, n_head_kv * D], 16-byte aligned */
    int kv_f32; /* 1 does not fit */
    int R;
    const int *span; /* [T, 2] on the device, 8-byte aligned: 0 <= first <= end <= R; equal: zeros */
    const void *k_new, *v_new; /* T <= decode_most: f16 [T, n_head_kv * D], rows ld_new elements apart, 16-byte aligned, of */
    long ld_new;               /* which row t goes to row[t] of the caches, before any is read; or null */
    const int *row;            /* [T], none twice */
    int *fault, node;          /* *fault = node + 1 if a span or a row does not lie in the caches */
    float scale;
    void *y; /* [T, n_head * D], rows ldy elements apart */
    long ldy;
    int y_f32;      /* else f16 */
    float *scratch; /* attention_mma: attention_scratch() bytes; no state between launches */
};

bool attention_fits(const Attention &a) {
    return !a.kv_f32 && a.D % 8 == 0 && a.D > 0 && a.D <= 256 && a.ldkv % 8 == 0 && a.n_head % a.n_head_kv == 0 &&
           (((uintptr_t)a.k | (uintptr_t)a.v) & 15) == 0;
}

/* Row t's span. One that does not lie in the cache counts as empty. */
__device__ inline int2 attention_span(const Attention &a, int t) {
    const int2 s = *(const int2 *)(a.span + 2 * t);
    if (s.x >= 0 && s.x <= s.y && s.y <= a.R) return s;
    *a.fault = a.node + 1;
    return make_int2(0, 0);
}

/* 8 numbers of a cache row as they are loaded: f16, or codes (without their scale). */
__device__ inline void numbers8(const uint4 &packed, float (&v)[8]) {
    const __half2 *h = (const __half2 *)&packed;
#pragma unroll
    for (int i = 0; i < 4; i++) *(float2 *)(v + 2 * i) = __half22float2(h[i]);
}
__device__ inline void numbers8(const uint2 &codes, float (&v)[8]) {
    const uint32_t word[2] = {codes.x ^ 0x80808080u, codes.y ^ 0x80808080u}; /* code + 128: low bytes of 2^23 + it */
#pragma unroll
    for (int i = 0; i < 8; i++)
        v[i] = __uint_as_float(__byte_perm(word[i / 4], 0x4b000000u, 0x7440 + i % 4)) - 8388736.0f;
}

/* q[t, column..column + 7] */
__device__ inline void attention_q8(const Attention &a, int t, int column, float (&v)[8]) {
    const char *const p = (const char *)a.q + (t * a.ldq + column) * (a.q_f32 ? 4 : 2);
    if ((uintptr_t)p & 15) {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = a.q_f32 ? ((const float *)p)[i] : __half2float(((const __half *)p)[i]);
    } else if (a.q_f32) {
        *(float4 *)v = *(const float4 *)p, *(float4 *)(v + 4) = *(const float4 *)(p + 16);
    } else {
        numbers8(*(const uint4 *)p, v);
    }
}

/* 8 numbers of a new row -> codes. LANES lanes (mask) hold a head, whose absmax all of them get. */
template <int LANES> __device__ inline uint2 codes8(const uint4 &halves, uint32_t mask, float *absmax) {
    float v[8];
    uint32_t top = 0, word[2] = {};
    numbers8(halves, v);
#pragma unroll
    for (int i = 0; i < 8; i++) top = max(top, __float_as_uint(v[i]) & 0x7fffffffu);
#pragma unroll
    for (int i = LANES / 2; i; i /= 2) top = max(top, __shfl_xor_sync(mask, top, i));
    *absmax = kv_absmax(top);
#pragma unroll
    for (int i = 0; i < 8; i++) word[i / 4] |= (uint32_t)(kv_code(v[i], *absmax) & 255) << 8 * (i % 4);
    return make_uint2(word[0], word[1]);
}

__device__ inline float exp2_fast(float x) { /* 0 for results below the normal numbers */
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

__device__ inline void attention_store(const Attention &a, int t, int column, float v) {
    if (a.y_f32) ((float *)a.y)[t * a.ldy + column] = v;
    else ((__half *)a.y)[t * a.ldy + column] = __float2half_rn(v);
}
__device__ inline void attention_store2(const Attention &a, int t, int column, float v, float w) { /* an even column */
    const long to = t * a.ldy + column;
    if (a.ldy % 2 || (uintptr_t)a.y % 8) attention_store(a, t, column, v), attention_store(a, t, column + 1, w);
    else if (a.y_f32) *(float2 *)((float *)a.y + to) = make_float2(v, w);
    else *(__half2 *)((__half *)a.y + to) = __floats2half2_rn(v, w);
}

/* q of one head, rows [t0, t0 + ROWS), in f16, by `threads` threads of which this is the i-th. unit(r, c): where
 * columns 8 c..8 c + 7 of row t0 + r go. */
template <int DP, int ROWS, class F>
__device__ __forceinline__ void attention_query(const Attention &a, int head, int t0, int i, int threads, F unit) {
    constexpr int ahead = 4, units = ROWS * (DP / 8);
    const int size = a.q_f32 ? 4 : 2;
    const bool aligned = (((uintptr_t)a.q | (uintptr_t)(a.ldq * size) | (uintptr_t)(a.D * size)) & 15) == 0;
    const char *const from = (const char *)a.q + (t0 * a.ldq + head * a.D) * size;
    for (int u0 = i; u0 < units; u0 += ahead * threads) {
        uint4 x[ahead];
        int at[ahead];
#pragma unroll
        for (int j = 0; j < ahead; j++) { /* rows beyond T repeat the last: their results are not stored */
            const int u = min(u0 + j * threads, units - 1);
            at[j] = min(u / (DP / 8), a.T - 1 - t0) * (int)a.ldq + min(u % (DP / 8) * 8, a.D - 8);
        }
        load_half8(from, a.q_f32, aligned, at, x);
#pragma unroll
        for (int j = 0; j < ahead; j++) {
            const int u = u0 + j * threads, r = u / (DP / 8), c = u % (DP / 8);
            if (u < units) *unit(r, c) = c * 8 < a.D ? x[j] : make_uint4(0, 0, 0, 0);
        }
    }
}

/* ---- decode ---------------------------------------------------------------------------------------------------------
 * LANES lanes hold a cache row, 8 numbers each (8 LANES >= D), f16 in a uint4 or codes in a uint2; G heads share it.
 * Each group of lanes takes cache rows of its own and keeps its own maximum, sum and weighted values; they are joined
 * in the end: lanes of a warp, warps of a block, blocks of a cluster or of a row (attention_join). */

enum { decode_most = DECODE_MOST, decode_warps = 8, decode_cluster = 8 }; /* most: rows of q */
/* What a group of lanes loads at a time: of codes as many bytes as of f16, where there are registers for it. */
__host__ __device__ constexpr int decode_rows(int G, bool coded) { return coded && G < 4 ? 8 : 4; }

constexpr float no_score = -1e30f; /* less than any score; its differences are finite */

/* What block `rank` of n has in scratch: [T][n_head][n][D] weighted values, then [T][n_head][n] maximum and sum. */
__device__ inline float *split_values(const Attention &a, int t, int head, int rank, int n) {
    return a.scratch + (size_t)((t * a.n_head + head) * n + rank) * a.D;
}
__device__ inline float2 *split_sum(const Attention &a, int t, int head, int rank, int n) {
    return (float2 *)(a.scratch + (size_t)a.T * a.n_head * n * a.D) + (t * a.n_head + head) * n + rank;
}

/* MANY: q may have more than one row. CLUSTER: a row's blocks are one; else attention_join has the last word. */
template <int LANES, int G, class Packed, bool MANY, bool CLUSTER>
__device__ __forceinline__ void decode(const Attention &a) {
    constexpr bool coded = sizeof(Packed) == sizeof(uint2);
    constexpr int rows = decode_rows(G, coded), bytes = sizeof(Packed) / 8; /* of a number */
    constexpr int groups = 32 / LANES, width = LANES * 8, step = groups * rows;
    __shared__ float warp_acc[decode_warps][G][width], warp_top[decode_warps][G], warp_sum[decode_warps][G];
    constexpr int peers = CLUSTER ? decode_cluster : 1;
    __shared__ float block_acc[peers][G][width], block_top[peers][G], block_sum[peers][G]; /* rank 0's */
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, group = lane / LANES, d = lane % LANES * 8;
    const int rank = blockIdx.x, n_ranks = gridDim.x, head = blockIdx.y * G, t = blockIdx.z;
    __shared__ uint64_t joined; /* rank 0's: counts what the blocks send */
    if constexpr (CLUSTER)
        if (n_ranks > 1) { /* once all have arrived, rank 0 runs and can be written to */
            if (tid == 0) barrier_init(&joined, 1), barrier_init_fence();
            cluster_arrive();
        }
    wait_for_prior_kernel();
    const int2 span = attention_span(a, t);
    const int first = span.x, end = span.y;
    /* New rows are read from k_new and v_new, not from the caches, which get them here: this block's own, and those of
     * other rows of q that are in its span, too (in a short prompt, not where each row is a sequence's). */
    const int listed = MANY && a.k_new && lane < a.T ? a.row[lane] : -1;
    const bool others = MANY && __any_sync(~0u, lane != t && listed >= first && listed < end);
    int row = MANY ? __shfl_sync(~0u, listed, t) : a.k_new ? *a.row : -1;
    if (a.k_new && (row < 0 || row >= a.R)) *a.fault = a.node + 1, row = -1;
    const int kv_head = head / (a.n_head / a.n_head_kv);
    const long kv_column = (long)kv_head * a.D, column = kv_column + d;
    const bool active = d < a.D;
    const long own_new = MANY ? t * a.ld_new : 0;
    const __half *const k_new = (const __half *)a.k_new + column, *const key_new = k_new + own_new;
    const __half *const v_new = (const __half *)a.v_new + column, *const value_new = v_new + own_new;
    float *const k_absmax = a.k_absmax + (long)kv_head * a.R, *const v_absmax = a.v_absmax + (long)kv_head * a.R;
    uint4 k_half = {}, v_half = {}; /* the new row, which becomes codes twice: for the cache, and where it is read */
    if (coded && row >= 0 && active)
        k_half = __ldg((const uint4 *)key_new), v_half = __ldg((const uint4 *)value_new);
    if (!coded && row >= 0 && rank == 0 && tid < a.D / 8) {
        const long c = kv_column + 8 * tid, to = row * a.ldkv + c;
        *(uint4 *)((__half *)a.k + to) = *(const uint4 *)((const __half *)a.k_new + own_new + c);
        *(uint4 *)((__half *)a.v + to) = *(const uint4 *)((const __half *)a.v_new + own_new + c);
    }
    if (coded && row >= 0 && rank == 0 && warp == 0) {
        float k_top, v_top;
        const uint2 k_codes = codes8<LANES>(k_half, ~0u, &k_top), v_codes = codes8<LANES>(v_half, ~0u, &v_top);
        const long to = row * a.ldkv + column;
        if (group == 0 && active) *(uint2 *)((int8_t *)a.k + to) = k_codes, *(uint2 *)((int8_t *)a.v + to) = v_codes;
        if (lane == 0) k_absmax[row] = k_top, v_absmax[row] = v_top;
    }
    /* Short spans are the first blocks' alone. */
    const int used = min(n_ranks, (end - first + decode_warps * step - 1) / (decode_warps * step));
    if (rank >= max(used, 1) || used == 0) {
        if constexpr (CLUSTER)
            if (n_ranks > 1) cluster_wait(); /* who leaves between arrival and completion might be counted twice */
        if (rank > 0) return;
        for (int i = tid; i < G * a.D; i += decode_warps * 32) attention_store(a, t, head * a.D + i, 0);
        return;
    }

    const char *const keys = (const char *)a.k + column * bytes, *const values = (const char *)a.v + column * bytes;
    const float scale = a.scale * 1.44269504f; /* for exp2 */
    float q[G][8], acc[G][8] = {}, top[G], sum[G] = {};
#pragma unroll
    for (int h = 0; h < G; h++) {
        top[h] = no_score;
#pragma unroll
        for (int i = 0; i < 8; i++) q[h][i] = 0;
        if (active) attention_q8(a, t, (head + h) * a.D + d, q[h]);
    }
    const int stride = used * decode_warps * step;
    struct Load {
        Packed k[rows], v[rows];
        float k_scale[rows], v_scale[rows]; /* of codes */
    } now, next_load;
    const auto load = [&](int r0, Load &to) {
#pragma unroll
        for (int u = 0; u < rows; u++) {
            const int r = r0 + u * groups + group;
            const bool ok = active && r < end, is_new = !coded && r == row; /* codes of new rows: below */
            const long at = r * a.ldkv * bytes;
            const char *k = is_new ? (const char *)key_new : keys + at, *v = is_new ? (const char *)value_new : values + at;
            if (!coded && others)
#pragma unroll 1
                for (int i = 0; i < a.T; i++)
                    if (__shfl_sync(~0u, listed, i) == r)
                        k = (const char *)(k_new + i * a.ld_new), v = (const char *)(v_new + i * a.ld_new);
            to.k[u] = ok ? __ldg((const Packed *)k) : Packed();
            to.v[u] = ok ? __ldg((const Packed *)v) : Packed();
            if (!coded) continue;
            to.k_scale[u] = r < end ? __ldg(k_absmax + r) : 0;
            to.v_scale[u] = r < end ? __ldg(v_absmax + r) : 0;
        }
    };
    int r0 = first + (rank * decode_warps + warp) * step;
    load(r0, now);
    for (; r0 < end; r0 += stride) {
        load(r0 + stride, next_load); /* in flight while these rows are worked on */
#pragma unroll 1
        for (int i = others ? 0 : t; coded && i < (others ? a.T : t + 1); i++) {
            const int fresh = MANY ? __shfl_sync(~0u, listed, i) : row;
            if (fresh < r0 || fresh >= min(r0 + step, end) || (fresh - r0) % groups != group) continue; /* not this group's */
            const uint32_t mask = ~0u >> (32 - LANES) << (group * LANES);
            uint4 k = k_half, v = v_half;
            if (MANY && i != t && active)
                k = __ldg((const uint4 *)(k_new + i * a.ld_new)), v = __ldg((const uint4 *)(v_new + i * a.ld_new));
            float k_top, v_top;
            const uint2 k_codes = codes8<LANES>(k, mask, &k_top), v_codes = codes8<LANES>(v, mask, &v_top);
#pragma unroll
            for (int u = 0; u < rows; u++)
                if (r0 + u * groups + group == fresh) {
                    *(uint2 *)&now.k[u] = k_codes, *(uint2 *)&now.v[u] = v_codes;
                    now.k_scale[u] = k_top, now.v_scale[u] = v_top;
                }
        }
#pragma unroll
        for (int h = 0; h < G; h++) {
            float s[rows], next = top[h];
#pragma unroll
            for (int u = 0; u < rows; u++) {
                float x[8];
                numbers8(now.k[u], x);
                s[u] = 0;
#pragma unroll
                for (int i = 0; i < 8; i++) s[u] = fmaf(q[h][i], x[i], s[u]);
            }
#pragma unroll
            for (int i = LANES / 2; i; i /= 2)
#pragma unroll
                for (int u = 0; u < rows; u++) s[u] += __shfl_xor_sync(~0u, s[u], i);
#pragma unroll
            for (int u = 0; u < rows; u++) {
                if (coded) s[u] *= now.k_scale[u] * kv_unit;
                s[u] = r0 + u * groups + group < end ? s[u] * scale : -INFINITY;
                next = fmaxf(next, s[u]);
            }
            const float keep = exp2_fast(top[h] - next);
            top[h] = next, sum[h] *= keep;
#pragma unroll
            for (int i = 0; i < 8; i++) acc[h][i] *= keep;
#pragma unroll
            for (int u = 0; u < rows; u++) {
                float p = exp2_fast(s[u] - next), x[8];
                numbers8(now.v[u], x);
                sum[h] += p;
                if (coded) p *= now.v_scale[u] * kv_unit;
#pragma unroll
                for (int i = 0; i < 8; i++) acc[h][i] = fmaf(p, x[i], acc[h][i]);
            }
        }
        now = next_load;
    }
    launch_dependents(); /* not earlier: blocks of the next launch would take turns with these */
#pragma unroll
    for (int h = 0; h < G; h++) {
#pragma unroll
        for (int m = LANES; m < 32; m *= 2) {
            const float other = __shfl_xor_sync(~0u, top[h], m), next = fmaxf(top[h], other),
                        keep = exp2_fast(top[h] - next);
            top[h] = next;
            sum[h] *= keep, sum[h] += __shfl_xor_sync(~0u, sum[h], m);
#pragma unroll
            for (int i = 0; i < 8; i++) acc[h][i] *= keep, acc[h][i] += __shfl_xor_sync(~0u, acc[h][i], m);
        }
        if (group == 0)
#pragma unroll
            for (int i = 0; i < 8; i++) warp_acc[warp][h][d + i] = acc[h][i];
        if (lane == 0) warp_top[warp][h] = top[h], warp_sum[warp][h] = sum[h];
    }
    __syncthreads();
    if constexpr (CLUSTER)
        if (n_ranks > 1) cluster_wait();
    for (int e = tid; e < G * width; e += decode_warps * 32) {
        const int h = e / width, i = e % width;
        float next = no_score, total = 0, out = 0;
#pragma unroll
        for (int w = 0; w < decode_warps; w++) next = fmaxf(next, warp_top[w][h]);
#pragma unroll
        for (int w = 0; w < decode_warps; w++) {
            const float keep = exp2_fast(warp_top[w][h] - next);
            total += keep * warp_sum[w][h], out += keep * warp_acc[w][h][i];
        }
        if (used == 1) {
            if (i < a.D) attention_store(a, t, (head + h) * a.D + i, out / total);
        } else if constexpr (!CLUSTER) {
            if (i < a.D) split_values(a, t, head + h, rank, n_ranks)[i] = out;
            if (i == 0) *split_sum(a, t, head + h, rank, n_ranks) = make_float2(next, total);
        } else {
            const auto send = [&](const float &to, float v) {
                cluster_send(shared_address(&to), shared_address(&joined), 0, v);
            };
            send(block_acc[rank][h][i], out);
            if (i == 0) send(block_top[rank][h], next), send(block_sum[rank][h], total);
        }
    }
    if constexpr (CLUSTER) {
        if (used == 1 || rank > 0) return;
        if (tid == 0) barrier_expect(&joined, used * G * (width + 2) * (int)sizeof(float));
        barrier_wait(&joined, 0);
        for (int e = tid; e < G * width; e += decode_warps * 32) {
            const int h = e / width, i = e % width;
            float next = no_score, total = 0, out = 0;
            for (int r = 0; r < used; r++) next = fmaxf(next, block_top[r][h]);
            for (int r = 0; r < used; r++) {
                const float keep = exp2_fast(block_top[r][h] - next);
                total += keep * block_sum[r][h], out += keep * block_acc[r][h][i];
            }
            if (i < a.D) attention_store(a, t, (head + h) * a.D + i, out / total);
        }
    }
}

template <int LANES, int G, class Packed, bool MANY>
__global__ void __launch_bounds__(decode_warps * 32) attention_decode(const __grid_constant__ Attention a) {
#ifdef BNB__HOPPER
    decode<LANES, G, Packed, MANY, true>(a);
#endif
}
template <int LANES, int G, class Packed, bool MANY>
__global__ void __launch_bounds__(decode_warps * 32) attention_decode_split(const __grid_constant__ Attention a) {
#ifdef BNB__MMA
    decode<LANES, G, Packed, MANY, false>(a);
#endif
}

/* How a launch of attention_decode_split divides its work. */
struct Split {
    Attention a;
    int lanes, G;
    int rows; /* of the cache that a block takes at a time */
    int n;    /* blocks for each row of q and G heads, at most */
};

enum { split_threads = 256, split_most = 32 };

Split attention_split(const Attention &a, int n_sm) {
    const int lanes = a.D <= 64 ? 8 : a.D <= 128 ? 16 : 32, shared_by = a.n_head / a.n_head_kv;
    const int G = shared_by % 4 == 0 && lanes < 32 ? 4 : shared_by % 2 == 0 ? 2 : 1;
    const int rows = decode_warps * decode_rows(G, a.kv_int8) * (32 / lanes);
    const int n = std::min({n_sm / (a.T * (a.n_head / G)), (a.R + rows - 1) / rows, (int)split_most});
    return {a, lanes, G, rows, std::max(n, 1)};
}

/* Where more than one block has worked: y of one head and row. 256 threads, at least D. */
__global__ void __launch_bounds__(split_threads) attention_join(const __grid_constant__ Split s) {
#ifdef BNB__MMA
    const Attention &a = s.a;
    const int head = blockIdx.x, t = blockIdx.y, i = threadIdx.x;
    launch_dependents();
    wait_for_prior_kernel();
    const int2 span = attention_span(a, t);
    const int used = min(s.n, (span.y - span.x + s.rows - 1) / s.rows);
    if (used < 2 || i >= a.D) return;
    float next = no_score, total = 0, out = 0;
    for (int r = 0; r < used; r++) next = fmaxf(next, split_sum(a, t, head, r, s.n)->x);
    for (int r = 0; r < used; r++) {
        const float2 part = *split_sum(a, t, head, r, s.n);
        const float keep = exp2_fast(part.x - next);
        total += keep * part.y, out += keep * split_values(a, t, head, r, s.n)[i];
    }
    attention_store(a, t, head * a.D + i, out / total);
#endif
}

template <int LANES, class Packed>
cudaError_t attention_split_launch(cudaStream_t stream, const Split &s, bool pdl) {
    const Attention &a = s.a;
    const auto kernel = [&](auto many) -> void (*)(Attention) {
        return s.G == 4   ? attention_decode_split < LANES, LANES < 32 ? 4 : 2, Packed, many() >
               : s.G == 2 ? attention_decode_split<LANES, 2, Packed, many()>
                          : attention_decode_split<LANES, 1, Packed, many()>;
    };
    const cudaError_t e = launch(a.T > 1 ? kernel(std::true_type()) : kernel(std::false_type()), a, dim3(s.n, a.n_head / s.G, a.T), decode_warps * 32, 0, 1, pdl, stream);
    if (e || s.n == 1) return e;
    return launch(attention_join, s, dim3(a.n_head, a.T), split_threads, 0, 1, pdl, stream);
}

template <int LANES, class Packed>
cudaError_t attention_decode_launch(cudaStream_t stream, const Attention &a, bool pdl) {
    const int shared_by = a.n_head / a.n_head_kv, G = shared_by % 4 == 0 && LANES < 32 ? 4 : shared_by % 2 == 0 ? 2 : 1;
    const int chunks = a.n_head / G, rows = decode_warps * decode_rows(G, a.kv_int8) * (32 / LANES);
    int cluster = 1; /* a block for each multiprocessor, at most one for each `rows` rows of cache */
    while (cluster < decode_cluster && a.T * chunks * cluster * 2 <= multiprocessors() && cluster * rows < a.R)
        cluster *= 2;
    const auto kernel = [&](auto many) -> void (*)(Attention) {
        return G == 4   ? attention_decode < LANES, LANES < 32 ? 4 : 2, Packed, many() >
               : G == 2 ? attention_decode<LANES, 2, Packed, many()>
                        : attention_decode<LANES, 1, Packed, many()>;
    };
    return launch(a.T > 1 ? kernel(std::true_type()) : kernel(std::false_type()), a, dim3(cluster, chunks, a.T), decode_warps * 32, 0, cluster, pdl, stream);
}

/* ---- prompt, Hopper -------------------------------------------------------------------------------------------------
 * One block on each multiprocessor works through tiles of 128 rows of one head. Two warpgroups take 64 rows each; while
 * one turns the scores of a tile of the cache into weights, the tensor cores multiply: the scores of the next tile are
 * asked for before the values of this one. One warp keeps K and V coming, three bring the next q in f16. */

template <int DP> struct PromptShape {           /* DP: D rounded up to what is compiled */
    static constexpr int atoms = (DP + 63) / 64; /* 64 columns of f16: the swizzle's width */
    static constexpr int tile = DP > 128 ? 64 : 128, stages = 2, queries = DP > 128 ? 1 : 2;
    static constexpr int q_bytes = 128 * 128 * atoms, kv_bytes = tile * 128 * atoms, span_bytes = 128 * 8;
    static constexpr int shared = queries * (q_bytes + span_bytes) + 2 * stages * kv_bytes + 256;
};

struct Prompt {
    CUtensorMap k, v;
    Attention a;
    int work; /* tiles of all heads */
};

/* The i-th tile of a block. Later rows usually see more: tiles are taken from the end, and every other round the other
 * way, so that all blocks have about the same sum. */
__device__ inline bool prompt_work(const Prompt &p, int i, int *head, int *t0) {
    const int n = gridDim.x, w = i * n + (i % 2 ? n - 1 - (int)blockIdx.x : (int)blockIdx.x),
              tiles = p.work / p.a.n_head;
    *head = w % p.a.n_head, *t0 = (tiles - 1 - w / p.a.n_head) * 128;
    return w < p.work;
}

#ifdef BNB__HOPPER /* sm_75 has no reductions */
/* What any of a tile's 128 rows sees, by a whole warp. */
__device__ inline void prompt_span(const int2 *spans, int *first, int *end) {
    int lo = INT_MAX, hi = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int2 s = spans[threadIdx.x % 32 + 32 * i];
        if (s.x < s.y) lo = min(lo, s.x), hi = max(hi, s.y);
    }
    *first = __reduce_min_sync(~0u, lo), *end = __reduce_max_sync(~0u, hi);
}
#endif

template <int DP> __global__ void __launch_bounds__(384, 1) attention_prompt(const __grid_constant__ Prompt p) {
#ifdef BNB__HOPPER
    using S = PromptShape<DP>;
    constexpr int tile = S::tile, stages = S::stages, queries = S::queries;
    extern __shared__ __align__(1024) uint8_t shared[];
    uint8_t *const kv = shared + queries * S::q_bytes; /* K [stages], V [stages], each [atoms][tile, 64] f16 */
    int2 *const spans = (int2 *)(kv + 2 * stages * S::kv_bytes);                                  /* [queries][128] */
    uint64_t *const full = (uint64_t *)(spans + queries * 128), *const empty = full + 2 * stages; /* [K, V][stages] */
    uint64_t *const q_full = empty + 2 * stages, *const q_empty = q_full + queries;               /* [queries] */
    const Attention &a = p.a;
    const int tid = threadIdx.x, lane = tid % 32;
    if (tid == 0) {
        for (int i = 0; i < 2 * stages; i++) barrier_init(full + i, 1), barrier_init(empty + i, 8);
        for (int i = 0; i < queries; i++) barrier_init(q_full + i, 96), barrier_init(q_empty + i, 9);
        barrier_init_fence();
    }
    launch_dependents();
    wait_for_prior_kernel();
    int head, t0, first, end;
    /* Spans and q of the tile at t0, by `threads` threads of which this is the i-th. */
    const auto load_query = [&](int buffer, int i, int threads) {
        uint8_t *const to = shared + buffer * S::q_bytes; /* [2][atoms][64, 64] f16 */
        for (int r = i; r < 128; r += threads)
            spans[buffer * 128 + r] = t0 + r < a.T ? attention_span(a, t0 + r) : make_int2(0, 0);
        attention_query<DP, 128>(a, head, t0, i, threads, [&](int r, int c) {
            return (uint4 *)(to + r / 64 * (S::q_bytes / 2) + c / 8 * (64 * 128) + r % 64 * 128 + ((c ^ r) & 7) * 16);
        });
        fence_async();
    };
    prompt_work(p, 0, &head, &t0);
    load_query(0, tid, 384); /* the first by everybody: all wait for it */
    __syncthreads();

    if (tid < 32) { /* K and V */
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        for (int i = 0, at = 0; prompt_work(p, i, &head, &t0); i++) {
            const int buffer = i % queries, column = head / (a.n_head / a.n_head_kv) * a.D;
            barrier_wait(q_full + buffer, i / queries & 1);
            prompt_span(spans + buffer * 128, &first, &end);
            if (lane == 0) {
                barrier_arrive(q_empty + buffer);
                for (int r = first; r < end; r += tile, at++)
                    for (int which = 0; which < 2; which++) {
                        const int slot = which * stages + at % stages;
                        if (at >= stages) barrier_wait(empty + slot, (at / stages & 1) ^ 1);
                        barrier_expect(full + slot, S::kv_bytes);
                        for (int atom = 0; atom < S::atoms; atom++)
                            tensor_load(kv + slot * S::kv_bytes + atom * tile * 128, which ? &p.v : &p.k,
                                        column + atom * 64, r, full + slot);
                    }
            }
            at = __shfl_sync(~0u, at, 0);
        }
        return;
    }
    if (tid < 128) { /* spans and q of the tiles that follow */
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        for (int i = 0; prompt_work(p, i, &head, &t0); i++) {
            const int buffer = i % queries;
            if (i >= queries) barrier_wait(q_empty + buffer, (i / queries & 1) ^ 1);
            if (i > 0) load_query(buffer, tid - 32, 96);
            barrier_arrive(q_full + buffer);
        }
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    const int wg = tid / 128 - 1, warp = tid / 32 % 4, g = lane / 4, t = lane % 4;
    const float scale = a.scale * 1.44269504f;            /* for exp2 */
    int at = 0;                                           /* tiles of the cache before this tile of rows */
    if (wg == 1) named_barrier_arrive(3, 256); /* the first warpgroup begins */
    for (int w = 0; prompt_work(p, w, &head, &t0); w++) {
        const int buffer = w % queries;
        const uint8_t *const query = shared + buffer * S::q_bytes + wg * (S::q_bytes / 2); /* [atoms][64, 64] f16 */
        barrier_wait(q_full + buffer, w / queries & 1);
        prompt_span(spans + buffer * 128, &first, &end);
        const int n = first < end ? (end - first + tile - 1) / tile : 0;
        int from[2], to[2]; /* spans of this lane's rows, g and g + 8 of its warp's 16 */
        for (int h = 0; h < 2; h++) {
            const int r = wg * 64 + warp * 16 + g + 8 * h;
            const int2 s = spans[buffer * 128 + r];
            from[h] = t0 + r < a.T ? s.x : 0, to[h] = t0 + r < a.T ? s.y : INT_MAX;
        }
        const int latest = __reduce_max_sync(~0u, max(from[0], from[1])),
                  earliest = __reduce_min_sync(~0u, min(to[0], to[1]));

        float score[tile / 2], out[DP / 2] = {}, top[2] = {no_score, no_score}, sum[2] = {}, keep[2];
        uint32_t weight[tile / 4]; /* f16 pairs: the left operand of the second product */

        /* starts score = q k^T for tile i */
        const auto scores = [&](int i) {
            const int slot = (at + i) % stages;
            barrier_wait(full + slot, (at + i) / stages & 1);
            const uint64_t dq = descriptor(query, 0), dk = descriptor(kv + slot * S::kv_bytes, 0);
            wgmma_fence();
#pragma unroll
            for (int s = 0; s < DP / 16; s++)
                wgmma_ss(score, dq + (s / 4 * (64 * 128) + s % 4 * 32) / 16,
                         dk + (s / 4 * (tile * 128) + s % 4 * 32) / 16, s > 0);
            wgmma_commit();
        };
        /* starts out += weight v for tile i */
        const auto values = [&](int i) {
            const int slot = stages + (at + i) % stages;
            uint8_t *const v = kv + slot * S::kv_bytes;
            barrier_wait(full + slot, (at + i) / stages & 1);
            const int valid = end - first - i * tile;
            /* Rows that nobody sees may hold NaN, and 0 * NaN is NaN. Both warpgroups write zeros. */
            if (valid < tile) {
                for (int j = tid % 128; j < (tile - valid) * 8 * S::atoms; j += 128)
                    *(uint4 *)(v + j / 8 % S::atoms * (tile * 128) + (valid + j / 8 / S::atoms) * 128 + j % 8 * 16) =
                        make_uint4(0, 0, 0, 0);
                fence_async();
                named_barrier(1 + wg, 128);
            }
            const uint64_t dv = descriptor(v, tile * 128);
            wgmma_fence();
#pragma unroll
            for (int s = 0; s < tile / 16; s++) wgmma_rs(out, weight + 4 * s, dv + s * (16 * 128) / 16, 1);
            wgmma_commit();
        };
        /* score -> weights in f32; keep: what older sums are worth now */
        const auto softmax = [&](int i) {
            const int r0 = first + i * tile;
            if (r0 < latest || r0 + tile > earliest) {
#pragma unroll
                for (int j = 0; j < tile / 2; j++) {
                    const int r = r0 + j / 4 * 8 + 2 * t + j % 2, h = j / 2 % 2;
                    if (r < from[h] || r >= to[h]) score[j] = -INFINITY;
                }
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float next = no_score;
#pragma unroll
                for (int j = 0; j < tile / 8; j++)
                    next = fmaxf(next, fmaxf(score[4 * j + 2 * h], score[4 * j + 2 * h + 1]));
                next = fmaxf(next, __shfl_xor_sync(~0u, next, 1));
                next = fmaxf(next, __shfl_xor_sync(~0u, next, 2));
                next = fmaxf(next * scale, top[h]);
                keep[h] = exp2_fast(top[h] - next);
                top[h] = next;
                float s = 0;
#pragma unroll
                for (int j = 0; j < tile / 8; j++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float &x = score[4 * j + 2 * h + e];
                        x = exp2_fast(fmaf(x, scale, -next));
                        s += x;
                    }
                sum[h] = sum[h] * keep[h] + s; /* of this lane's columns */
            }
        };
        const auto pack = [&] {
#pragma unroll
            for (int j = 0; j < tile / 4; j++) {
                const __half2 h = __floats2half2_rn(score[2 * j], score[2 * j + 1]);
                weight[j] = *(const uint32_t *)&h;
            }
        };
        /* The warpgroups take turns in asking for products: one has the tensor cores while the other takes
         * exponentials. */
        const auto turn_begin = [&] {
            named_barrier(3 + wg, 256);
        };
        const auto turn_end = [&] {
            named_barrier_arrive(4 - wg, 256);
        };
        const auto release = [&](uint64_t *bar) {
            if (lane == 0) barrier_arrive(bar);
        };

        if (n > 0) {
            turn_begin();
            scores(0);
            turn_end();
            wgmma_wait<0>();
            release(empty + at % stages);
            softmax(0);
            pack();
            for (int i = 1; i < n; i++) {
                turn_begin();
                scores(i);
                values(i - 1);
                turn_end();
                wgmma_wait<1>();
                release(empty + (at + i) % stages);
                softmax(i);
                wgmma_wait<0>();
                release(empty + stages + (at + i - 1) % stages);
#pragma unroll
                for (int j = 0; j < DP / 2; j++) out[j] *= keep[j / 2 % 2];
                pack();
            }
            release(q_empty + buffer);
            values(n - 1);
            wgmma_wait<0>();
            release(empty + stages + (at + n - 1) % stages);
            at += n;
        } else {
            release(q_empty + buffer);
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
            sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
            const int row = t0 + wg * 64 + warp * 16 + g + 8 * h;
            const float inverse = sum[h] > 0 ? 1 / sum[h] : 0;
            if (row >= a.T) continue;
#pragma unroll
            for (int j = 0; j < DP / 8; j++) {
                const int c = 8 * j + 2 * t;
                if (c >= a.D) continue;
                const float *const x = out + 4 * j + 2 * h;
                attention_store2(a, row, head * a.D + c, x[0] * inverse, x[1] * inverse);
            }
        }
    }
#endif
}

template <int DP> cudaError_t attention_prompt_launch(cudaStream_t stream, const Attention &a, bool pdl) {
    Prompt p;
    p.a = a, p.work = a.n_head * ((a.T + 127) / 128);
    const int slots = multiprocessors();
    const int64_t columns = (int64_t)a.n_head_kv * a.D;
    cudaError_t e = tensor_map(&p.k, 2, a.k, columns, a.R, a.ldkv * 2, PromptShape<DP>::tile);
    if (!e) e = tensor_map(&p.v, 2, a.v, columns, a.R, a.ldkv * 2, PromptShape<DP>::tile);
    if (e) return e;
    return launch(attention_prompt<DP>, p, dim3(p.work < slots ? p.work : slots), 384, PromptShape<DP>::shared, 1, pdl,
                  stream);
}

/* ---- prompt, mma.sync -----------------------------------------------------------------------------------------------
 * The 4 warps of a block have 16 MT rows of one head each. Tiles of K and of V take turns in a ring of three: while one
 * is multiplied the next is on its way, and the one after is asked for. Two blocks fit an A100's multiprocessor: one
 * multiplies while the other takes exponentials. */

template <int DP> struct PromptMmaShape { /* DP: D rounded up to what is compiled */
    static constexpr int threads = 128, stages = 3;
    static constexpr int MT = DP > 128 ? 1 : 2, rows = 4 * 16 * MT, tile = DP > 128 ? 32 : 64;
    /* 8 rows that ldmatrix reads together lie in different banks: swizzled, or an odd number of units apart. */
    static constexpr int pitch = DP % 64 ? DP * 2 + 16 : DP * 2, tile_bytes = tile * pitch;
    static constexpr int shared = rows * pitch + stages * tile_bytes;
    __device__ static int unit(int r, int c) { return r * pitch + (DP % 64 ? c : c ^ (r & 7)) * 16; }
};

template <int DP>
__global__ void __launch_bounds__(PromptMmaShape<DP>::threads)
    attention_prompt_mma(const __grid_constant__ Attention a) {
#ifdef BNB__MMA
    using S = PromptMmaShape<DP>;
    constexpr int MT = S::MT, tile = S::tile;
    extern __shared__ __align__(1024) uint8_t shared[]; /* q [rows, DP] */
    uint8_t *const ring = shared + S::rows * S::pitch;  /* [stages][tile, DP]: K, V, K, V, .. */
    __shared__ int firsts[4], ends[4];                  /* of the warps' rows */
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
    const int tiles = gridDim.x / a.n_head, head = blockIdx.x % a.n_head;
    const int t0 = (tiles - 1 - (int)blockIdx.x / a.n_head) * S::rows; /* later rows usually see more: they begin */
    launch_dependents();
    wait_for_prior_kernel();
    attention_query<DP, S::rows>(a, head, t0, tid, S::threads,
                                 [&](int r, int c) { return (uint4 *)(shared + S::unit(r, c)); });
    /* What any and what every row of this warp sees; the lane's own rows are g + 8 i. */
    const auto span_of = [&](int i) {
        const int row = t0 + warp * 16 * MT + g + 8 * i;
        return row < a.T ? attention_span(a, row) : make_int2(0, 0);
    };
    int warp_first = INT_MAX, warp_end = 0, latest = 0, earliest = INT_MAX;
#pragma unroll
    for (int i = 0; i < 2 * MT; i++) {
        const int2 s = span_of(i);
        if (s.x < s.y) warp_first = min(warp_first, s.x), warp_end = max(warp_end, s.y);
        latest = max(latest, s.x), earliest = min(earliest, s.y);
    }
    warp_first = __reduce_min_sync(~0u, warp_first), warp_end = __reduce_max_sync(~0u, warp_end);
    latest = __reduce_max_sync(~0u, latest), earliest = __reduce_min_sync(~0u, earliest);
    if (lane == 0) firsts[warp] = warp_first, ends[warp] = warp_end;
    __syncthreads();
    const int first = min(min(firsts[0], firsts[1]), min(firsts[2], firsts[3]));
    const int end = max(max(ends[0], ends[1]), max(ends[2], ends[3]));
    const int n = first < end ? (end - first + tile - 1) / tile : 0;

    const long column = (long)(head / (a.n_head / a.n_head_kv)) * a.D;
    /* Tile j / 2 of K, or of V if j is odd. Rows beyond the end may hold NaN, and 0 * NaN is NaN: they become zeros,
     * and so do columns beyond D. Groups are counted, also empty ones. */
    const auto load = [&](int j) {
        if (j < 2 * n) {
            const __half *const cache = (const __half *)(j % 2 ? a.v : a.k) + column;
            uint8_t *const stage = ring + j % S::stages * S::tile_bytes;
            const int r0 = first + j / 2 * tile;
#pragma unroll
            for (int i = 0; i < tile * (DP / 8) / S::threads; i++) {
                const int u = tid + i * S::threads, r = u / (DP / 8), c = u % (DP / 8);
                const bool inside = r0 + r < end && c * 8 < a.D;
                copy_async(stage + S::unit(r, c), inside ? cache + (r0 + r) * a.ldkv + c * 8 : cache, inside ? 16 : 0);
            }
        }
        commit_copies();
    };
    static_assert(tile * (DP / 8) % S::threads == 0, "a tile is copied in whole rounds");

    const float scale = a.scale * 1.44269504f; /* for exp2 */
    const uint8_t *const query = shared + warp * 16 * MT * S::pitch;
    float out[MT][DP / 8][4] = {}, top[2 * MT], sum[2 * MT] = {};
#pragma unroll
    for (int i = 0; i < 2 * MT; i++) top[i] = no_score;
    load(0);
    load(1);
#pragma unroll 1
    for (int i = 0; i < n; i++) {
        const int r0 = first + i * tile;
        const bool seen = r0 < warp_end && r0 + tile > warp_first; /* by a row of this warp */
        uint32_t weight[MT][tile / 4]; /* f16 pairs: the left operand of the second product */
        wait_copies<1>();
        __syncthreads(); /* this K has arrived, for all, and the V before is done with */
        load(2 * i + 2);
        if (seen) {
            const uint8_t *const k = ring + 2 * i % S::stages * S::tile_bytes;
            float score[MT][tile / 8][4] = {};
#pragma unroll
            for (int s = 0; s < DP / 16; s++) {
                uint32_t x[MT][4], b[4];
#pragma unroll
                for (int m = 0; m < MT; m++)
                    load_matrices(x[m], query + S::unit(16 * m + lane % 16, 2 * s + lane / 16));
#pragma unroll
                for (int j = 0; j < tile / 16; j++) {
                    load_matrices(b, k + S::unit(16 * j + lane / 16 * 8 + lane % 8, 2 * s + lane / 8 % 2));
#pragma unroll
                    for (int m = 0; m < MT; m++)
                        mma_f16(score[m][2 * j], x[m], b[0], b[1]), mma_f16(score[m][2 * j + 1], x[m], b[2], b[3]);
                }
            }
            if (r0 < latest || r0 + tile > earliest) {
#pragma unroll
                for (int h = 0; h < 2 * MT; h++) {
                    const int2 s = span_of(h);
#pragma unroll
                    for (int j = 0; j < tile / 8; j++)
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            const int r = r0 + 8 * j + 2 * t + e;
                            if (r < s.x || r >= s.y) score[h / 2][j][h % 2 * 2 + e] = -INFINITY;
                        }
                }
            }
#pragma unroll
            for (int h = 0; h < 2 * MT; h++) {
                float(&x)[tile / 8][4] = score[h / 2];
                const int e = h % 2 * 2;
                float next = no_score, s = 0;
#pragma unroll
                for (int j = 0; j < tile / 8; j++) next = fmaxf(next, fmaxf(x[j][e], x[j][e + 1]));
                next = fmaxf(next, __shfl_xor_sync(~0u, next, 1));
                next = fmaxf(next, __shfl_xor_sync(~0u, next, 2));
                next = fmaxf(next * scale, top[h]);
                const float keep = exp2_fast(top[h] - next); /* what older sums are worth now */
                top[h] = next;
#pragma unroll
                for (int j = 0; j < tile / 8; j++) {
                    const float v = exp2_fast(fmaf(x[j][e], scale, -next));
                    const float w = exp2_fast(fmaf(x[j][e + 1], scale, -next));
                    const __half2 pair = __floats2half2_rn(v, w);
                    weight[h / 2][2 * j + h % 2] = *(const uint32_t *)&pair;
                    s += v + w;
                }
                sum[h] = sum[h] * keep + s; /* of this lane's columns */
#pragma unroll
                for (int j = 0; j < DP / 8; j++) out[h / 2][j][e] *= keep, out[h / 2][j][e + 1] *= keep;
            }
        }
        wait_copies<1>();
        __syncthreads(); /* this V has arrived, and this K is done with */
        load(2 * i + 3);
        if (seen) {
            const uint8_t *const v = ring + (2 * i + 1) % S::stages * S::tile_bytes;
#pragma unroll
            for (int s = 0; s < tile / 16; s++)
#pragma unroll
                for (int j = 0; j < DP / 16; j++) {
                    uint32_t b[4];
                    load_matrices_trans(b, v + S::unit(16 * s + lane % 16, 2 * j + lane / 16));
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        mma_f16(out[m][2 * j], weight[m] + 4 * s, b[0], b[1]);
                        mma_f16(out[m][2 * j + 1], weight[m] + 4 * s, b[2], b[3]);
                    }
                }
        }
    }
    wait_copies<0>();
#pragma unroll
    for (int h = 0; h < 2 * MT; h++) {
        sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
        sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
        const int row = t0 + warp * 16 * MT + g + 8 * h;
        const float inverse = sum[h] > 0 ? 1 / sum[h] : 0;
        if (row >= a.T) continue;
#pragma unroll
        for (int j = 0; j < DP / 8; j++) {
            const float *const x = out[h / 2][j] + h % 2 * 2;
            if (8 * j < a.D) attention_store2(a, row, head * a.D + 8 * j + 2 * t, x[0] * inverse, x[1] * inverse);
        }
    }
#endif
}

template <int DP> cudaError_t attention_prompt_mma_launch(cudaStream_t stream, const Attention &a, bool pdl) {
    using S = PromptMmaShape<DP>;
    return launch(attention_prompt_mma<DP>, a, dim3(a.n_head * ((a.T + S::rows - 1) / S::rows)), S::threads, S::shared,
                  1, pdl, stream);
}

/* ---- prompt, int8 caches --------------------------------------------------------------------------------------------
 * As f16, in k_wide and v_wide: all rows between the first and the last that any row of q sees. */

enum { widen_rows = 16 }; /* of a block */
__global__ void __launch_bounds__(256) attention_widen(const __grid_constant__ Attention a) {
#ifdef BNB__MMA
    __shared__ int2 seen[8];
    const int tid = threadIdx.x, units = a.n_head_kv * a.D / 8;
    wait_for_prior_kernel();
    int first = INT_MAX, end = 0;
    for (int t = tid; t < a.T; t += 256) {
        const int2 s = attention_span(a, t);
        if (s.x < s.y) first = min(first, s.x), end = max(end, s.y);
    }
    first = __reduce_min_sync(~0u, first), end = __reduce_max_sync(~0u, end);
    if (tid % 32 == 0) seen[tid / 32] = make_int2(first, end);
    __syncthreads();
    for (int i = 0; i < 8; i++) first = min(first, seen[i].x), end = max(end, seen[i].y);
    const char *const codes = (const char *)(blockIdx.y ? a.v : a.k);
    const float *const absmax = blockIdx.y ? a.v_absmax : a.k_absmax;
    __half *const wide = (__half *)(blockIdx.y ? a.v_wide : a.k_wide);
    for (int i = tid; i < widen_rows * units; i += 256) {
        const int r = blockIdx.x * widen_rows + i / units, c = i % units * 8;
        if (r < first || r >= end) continue;
        float x[8];
        numbers8(__ldg((const uint2 *)(codes + r * a.ldkv + c)), x);
        const float scale = __ldg(absmax + (long)(c / a.D) * a.R + r) * kv_unit;
        __half2 h[4];
#pragma unroll
        for (int j = 0; j < 4; j++) h[j] = __floats2half2_rn(x[2 * j] * scale, x[2 * j + 1] * scale);
        *(uint4 *)(wide + 8l * units * r + c) = *(const uint4 *)h;
    }
    launch_dependents();
#endif
}

/* Asks for that, and makes *a a call with an f16 cache. */
cudaError_t attention_widen_launch(cudaStream_t stream, Attention *a, bool pdl) {
    const dim3 grid((a->R + widen_rows - 1) / widen_rows, 2);
    const cudaError_t e = launch(attention_widen, *a, grid, 256, 0, 1, pdl, stream);
    a->k = a->k_wide, a->v = a->v_wide, a->ldkv = (long)a->n_head_kv * a->D, a->kv_int8 = 0;
    return e;
}

/* What prompt kernels are compiled for: calls f(a constant, the first of these that is at least D). */
constexpr int prompt_heads[] = {64, 80, 96, 128, 256};
template <int I = 0, class F> cudaError_t for_head(int D, F f) {
    if constexpr (I + 1 < (int)(sizeof prompt_heads / sizeof *prompt_heads))
        if (D > prompt_heads[I]) return for_head<I + 1>(D, f);
    return f(std::integral_constant<int, prompt_heads[I]>{});
}

/* decode(uint4 or uint2, by which the cache is read); prompt(a over an f16 cache, head size) */
template <class Decode, class Prompt>
cudaError_t attention_by(cudaStream_t stream, Attention a, bool pdl, Decode decode, Prompt prompt) {
    if (!attention_fits(a)) return cudaErrorInvalidValue;
    if (a.T <= decode_most) return a.kv_int8 ? decode(uint2{}) : decode(uint4{});
    if (a.kv_int8)
        if (const cudaError_t e = attention_widen_launch(stream, &a, pdl)) return e;
    return for_head(a.D, [&](auto dp) { return prompt(a, dp); });
}

cudaError_t attention_init(int device) { /* the current one */
    int major = 0;
    cudaError_t e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (!e && major != 9) e = cudaErrorNoKernelImageForDevice; /* sm_90a code runs on nothing else */
    for (int D : prompt_heads)
        if (!e) e = for_head(D, [](auto dp) {
            return cudaFuncSetAttribute(attention_prompt<dp()>, cudaFuncAttributeMaxDynamicSharedMemorySize, PromptShape<dp()>::shared);
        });
    return e;
}

cudaError_t attention(cudaStream_t stream, const Attention &a, bool pdl) {
    return attention_by(
        stream, a, pdl,
        [&](auto packed) {
            using Packed = decltype(packed);
            return a.D <= 64    ? attention_decode_launch<8, Packed>(stream, a, pdl)
                   : a.D <= 128 ? attention_decode_launch<16, Packed>(stream, a, pdl)
                                : attention_decode_launch<32, Packed>(stream, a, pdl);
        },
        [&](const Attention &f16, auto dp) { return attention_prompt_launch<dp()>(stream, f16, pdl); });
}

/* The same for every GPU since sm_80. */
cudaError_t attention_mma_init() { /* for the current device */
    cudaError_t e = cudaSuccess;
    for (int D : prompt_heads)
        if (!e) e = for_head(D, [](auto dp) {
            return cudaFuncSetAttribute(attention_prompt_mma<dp()>, cudaFuncAttributeMaxDynamicSharedMemorySize, PromptMmaShape<dp()>::shared);
        });
    return e;
}

size_t attention_scratch(const Attention &a, int n_sm) {
    const int n = a.T <= decode_most ? attention_split(a, n_sm).n : 1;
    return n > 1 ? (size_t)a.T * a.n_head * n * (a.D + 2) * sizeof(float) : 0;
}

cudaError_t attention_mma(cudaStream_t stream, const Attention &a, bool pdl) {
    return attention_by(
        stream, a, pdl,
        [&](auto packed) {
            using Packed = decltype(packed);
            const Split s = attention_split(a, multiprocessors());
            return s.lanes == 8    ? attention_split_launch<8, Packed>(stream, s, pdl)
                   : s.lanes == 16 ? attention_split_launch<16, Packed>(stream, s, pdl)
                                   : attention_split_launch<32, Packed>(stream, s, pdl);
        },
        [&](const Attention &f16, auto dp) { return attention_prompt_mma_launch<dp()>(stream, f16, pdl); });
}

} // namespace tile8

/* ==== [DENSE] ===================================================================================================
 * Products of many rows with dense f16 weights are cuBLASLt's, if the library is found when the program runs. Nothing is
 * linked: a program without it has the plain kernel. */

struct DenseLibrary {
    void *file = nullptr;
    cublasLtHandle_t handle = nullptr;
    decltype(&cublasLtCreate) create = nullptr;
    decltype(&cublasLtDestroy) destroy = nullptr;
    decltype(&cublasLtMatmul) matmul = nullptr;
    decltype(&cublasLtMatmulAlgoGetHeuristic) choose = nullptr;
    decltype(&cublasLtMatmulDescCreate) desc_create = nullptr;
    decltype(&cublasLtMatmulDescDestroy) desc_destroy = nullptr;
    decltype(&cublasLtMatmulDescSetAttribute) desc_set = nullptr;
    decltype(&cublasLtMatrixLayoutCreate) layout_create = nullptr;
    decltype(&cublasLtMatrixLayoutDestroy) layout_destroy = nullptr;
    decltype(&cublasLtMatmulPreferenceCreate) wish_create = nullptr;
    decltype(&cublasLtMatmulPreferenceDestroy) wish_destroy = nullptr;
    decltype(&cublasLtMatmulPreferenceSetAttribute) wish_set = nullptr;
};
constexpr uint64_t DENSE_WORKSPACE = 32 << 20;

void dense_close(DenseLibrary &l) {
    if (l.handle) (void)l.destroy(l.handle);
    if (l.file) dlclose(l.file);
    l = {};
}

// Not found is not an error: the struct stays empty.
void dense_open(DenseLibrary &l) {
    char name[32];
    std::snprintf(name, sizeof name, "libcublasLt.so.%d", CUBLAS_VER_MAJOR);
    l.file = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!l.file) return;
    bool all = true;
    auto find = [&](auto &function, const char *symbol) {
        function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(l.file, symbol));
        all = all && function;
    };
    find(l.create, "cublasLtCreate");
    find(l.destroy, "cublasLtDestroy");
    find(l.matmul, "cublasLtMatmul");
    find(l.choose, "cublasLtMatmulAlgoGetHeuristic");
    find(l.desc_create, "cublasLtMatmulDescCreate");
    find(l.desc_destroy, "cublasLtMatmulDescDestroy");
    find(l.desc_set, "cublasLtMatmulDescSetAttribute");
    find(l.layout_create, "cublasLtMatrixLayoutCreate");
    find(l.layout_destroy, "cublasLtMatrixLayoutDestroy");
    find(l.wish_create, "cublasLtMatmulPreferenceCreate");
    find(l.wish_destroy, "cublasLtMatmulPreferenceDestroy");
    find(l.wish_set, "cublasLtMatmulPreferenceSetAttribute");
    if (!all || l.create(&l.handle) != CUBLAS_STATUS_SUCCESS) dense_close(l);
}

// y = act(y + bias), after a product that another library made
__global__ void finish_kernel(Epilogue e, Rows y, int C) {
    wait_for_previous();
    long t = blockIdx.y, c = static_cast<long>(blockIdx.x) * THREADS + threadIdx.x;
    if (c < C) finish(e, y, t, c, get(y, t, c));
}

// y [M, N] f16 or f32 = act(x [M, K] f16 * w [N, K]^T f16 + bias [N] of y's type, or NULL) + residual (like y, may lie where
// y does; data NULL: none; not with act), sums in f32. act: what dense_does says. To the library, which counts columns first,
// that is y^T = w x^T.
bool dense_does(int act) { return act == BNB_OP_NONE || act == BNB_OP_RELU || act == BNB_OP_GELU_TANH; }
cublasLtEpilogue_t dense_epilogue(int act, bool bias) {
    if (act == BNB_OP_RELU) return bias ? CUBLASLT_EPILOGUE_RELU_BIAS : CUBLASLT_EPILOGUE_RELU;
    if (act == BNB_OP_GELU_TANH) return bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
    return bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
}
bool dense_product(const DenseLibrary &l, cudaStream_t stream, const Rows &x, const void *w, const void *bias, int act, const Rows &residual, const Rows &y, int M,
                   int N, int K, void *workspace) {
    cublasLtMatmulDesc_t desc = nullptr;
    cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr, d = nullptr;
    cublasLtMatmulPreference_t wish = nullptr;
    cublasLtMatmulHeuristicResult_t found = {};
    const cublasOperation_t transposed = CUBLAS_OP_T;
    const cublasLtEpilogue_t epilogue = dense_epilogue(act, bias != nullptr);
    const uint64_t bytes = DENSE_WORKSPACE;
    const Rows &from = residual.data ? residual : y;
    const float one = 1, keep = residual.data ? 1 : 0;
    int n_found = 0;
    bool ok = l.desc_create(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS &&
              l.desc_set(desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed) == CUBLAS_STATUS_SUCCESS &&
              l.desc_set(desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue) == CUBLAS_STATUS_SUCCESS &&
              (!bias || l.desc_set(desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias) == CUBLAS_STATUS_SUCCESS) &&
              l.layout_create(&a, CUDA_R_16F, static_cast<uint64_t>(K), static_cast<uint64_t>(N), K) == CUBLAS_STATUS_SUCCESS &&
              l.layout_create(&b, CUDA_R_16F, static_cast<uint64_t>(K), static_cast<uint64_t>(M), x.ld) == CUBLAS_STATUS_SUCCESS &&
              l.layout_create(&c, from.f16 ? CUDA_R_16F : CUDA_R_32F, static_cast<uint64_t>(N), static_cast<uint64_t>(M), from.ld) == CUBLAS_STATUS_SUCCESS &&
              l.layout_create(&d, y.f16 ? CUDA_R_16F : CUDA_R_32F, static_cast<uint64_t>(N), static_cast<uint64_t>(M), y.ld) == CUBLAS_STATUS_SUCCESS &&
              l.wish_create(&wish) == CUBLAS_STATUS_SUCCESS &&
              l.wish_set(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes) == CUBLAS_STATUS_SUCCESS &&
              l.choose(l.handle, desc, a, b, c, d, wish, 1, &found, &n_found) == CUBLAS_STATUS_SUCCESS && n_found == 1 &&
              l.matmul(l.handle, desc, &one, w, a, x.data, b, &keep, from.data, c, y.data, d, &found.algo, workspace, bytes, stream) == CUBLAS_STATUS_SUCCESS;
    if (wish) (void)l.wish_destroy(wish);
    for (cublasLtMatrixLayout_t layout : {a, b, c, d})
        if (layout) (void)l.layout_destroy(layout);
    if (desc) (void)l.desc_destroy(desc);
    return ok;
}
#else
struct DenseLibrary {};
void dense_open(DenseLibrary &) {}
void dense_close(DenseLibrary &) {}
#endif

/* ==== [PLAN] ====================================================================================================
 * A step is one kernel, or a few, for one node or for a chain of nodes: a product with the activation and the sum behind
 * it, q, k and v together, the norm in front. Results that no kernel needs are never written. */

struct Step {
    const struct Kernel *kernel = nullptr;
    int op = BNB_OP_NONE;
    int at = 0;                             // the node with which it runs
    std::vector<const bnb_tensor *> nodes;  // of this op: several with the same input, or two caches
    const bnb_tensor *y = nullptr;          // the result: nodes[0], or the end of the chain behind it
    int act = BNB_OP_NONE;                  // linear
    const bnb_tensor *residual = nullptr;   // linear
    const bnb_tensor *norm = nullptr;       // linear: its input is this node's
    std::vector<const bnb_tensor *> writes; // attention: set_rows of keys and of values that it carries out itself
};

struct Compiled {
    Device *device;
    const bnb_graph *graph;
    const bnb_plan_params *params;
    bool f16;                                           // products take f16
    std::vector<Step> steps;                            // in the order of running
    std::vector<const char *> names;                    // [n_nodes]
    std::unordered_map<const bnb_tensor *, bool> halves; // results that lie as f16
    std::vector<const void *> addresses;                // of every tensor when the graph was captured, and scratch
    GPU(GraphExec_t) exec = nullptr;
};

// What a step needs while it is launched.
struct Launch {
    const Compiled &plan;
    Queue &q;
    char *scratch;

    Rows rows(const bnb_tensor *t) const {
        if (!t) return {};
        if (t->type == BNB_F16) return {static_cast<char *>(t->plane[0]), t->stride[0] / 2, 1}; // a cache
        uint64_t offset = 0;
        const bnb_tensor *root = t;
        for (; root->op == BNB_OP_COLUMNS; root = root->view) offset += root->view_offset;
        auto it = plan.halves.find(root);
        int f16 = it != plan.halves.end() && it->second;
        return {static_cast<char *>(root->plane[0]) + (f16 ? offset / 2 : offset), t->stride[0] / 4, f16};
    }
    Cache cache(const bnb_tensor *t) const {
        if (t->type != BNB_INT8_KV) return {rows(t), nullptr};
        return {{static_cast<char *>(t->plane[0]), static_cast<long>(t->stride[0]), 0}, static_cast<float *>(t->plane[1])};
    }
    Numbers numbers(const bnb_tensor *t) const {
        if (!t) return {};
        return {t->plane[0], t->layout == LAYOUT_NUMBERS ? BNB_F32 : t->type};
    }
    Weight weight(const bnb_tensor *t) const {
        Weight w = {};
        for (int i = 0; i < BNB_MAX_PLANES; i++) w.plane[i] = t->plane[i];
        w.N = t->shape[0];
        w.K = t->shape[1];
        w.pitch = bnb_type_is_quantized(t->type) ? w.K : static_cast<long>(t->stride[0] / t->stride[1]);
        w.quant = t->quant;
        w.type = t->type;
        if (bnb_type_bits(t->type) == 4) std::memcpy(w.map, t->type == BNB_NF4 ? bnb_nf4_map : bnb_fp4_map, sizeof w.map);
        return w;
    }
    Epilogue epilogue(const Step &s, const bnb_tensor *node) const {
        return {numbers(node->src[2]), s.act, rows(s.residual)};
    }
    int node() const { return current; }
    int current = 0; // index of the node whose fault is reported
};

unsigned blocks(int64_t n, int64_t each) { return static_cast<unsigned>((n + each - 1) / each); }

void run_embed(Launch &l, const Step &s) {
    const bnb_tensor *a = s.nodes[0], *b = s.nodes.size() > 1 ? s.nodes[1] : nullptr;
    auto table = [](const bnb_tensor *t, const Rows &r) { return Numbers{r.data ? r.data : t->plane[0], r.f16 ? BNB_F16 : t->type}; };
    auto pitch = [](const bnb_tensor *t) { return static_cast<long>(t->stride[0] / t->stride[1]); };
    Rows ra = a->src[0]->op == BNB_OP_NONE ? Rows{} : l.rows(a->src[0]); // rows of an activation, or a table
    l.q.launch(embed_kernel, dim3(blocks(s.y->shape[1], THREADS), static_cast<unsigned>(s.y->shape[0])), dim3(THREADS), table(a->src[0], ra),
               pitch(a->src[0]), static_cast<long>(a->src[0]->shape[0]), static_cast<const int *>(a->src[1]->plane[0]),
               b ? table(b->src[0], {}) : Numbers{}, b ? pitch(b->src[0]) : 0L, b ? static_cast<long>(b->src[0]->shape[0]) : 0L,
               b ? static_cast<const int *>(b->src[1]->plane[0]) : nullptr, l.rows(s.y), static_cast<int>(s.y->shape[1]),
               l.plan.device->fault, l.node());
}

bool aligned16(std::initializer_list<const void *> list) {
    uintptr_t all = 0;
    for (const void *p : list) all |= reinterpret_cast<uintptr_t>(p);
    return all % 16 == 0;
}

void run_norm(Launch &l, const Step &s) {
    const bnb_tensor *y = s.y;
    const Rows x = l.rows(y->src[0]), out = l.rows(y);
    const Numbers w = l.numbers(y->src[1]), b = l.numbers(y->src[2]);
    const int C = static_cast<int>(y->shape[1]), layer = y->op == BNB_OP_LAYER_NORM, pieces = (C + 4 * THREADS - 1) / (4 * THREADS);
    const dim3 grid(static_cast<unsigned>(y->shape[0]));
    const bool fast = !x.f16 && out.f16 && C % 4 == 0 && x.ld % 4 == 0 && out.ld % 4 == 0 && pieces <= 16 && (!w.data || w.type == BNB_F32) &&
                      (!b.data || b.type == BNB_F32) && aligned16({x.data, out.data, w.data, b.data});
    if (!fast) {
        const unsigned threads = y->shape[0] < 32 ? 1024 : THREADS; // few rows: every thread counts
        l.q.launch(norm_kernel, grid, dim3(threads), x, w, b, y->params.norm.eps, layer, out, C);
        return;
    }
    const bool few = y->shape[0] <= 64;
    auto kernel = pieces <= 1 ? (few ? norm_rows_kernel<1, true> : norm_rows_kernel<1, false>) : pieces <= 2 ? (few ? norm_rows_kernel<2, true> : norm_rows_kernel<2, false>)
                : pieces <= 4 ? (few ? norm_rows_kernel<4, true> : norm_rows_kernel<4, false>) : pieces <= 8 ? norm_rows_kernel<8, false> : norm_rows_kernel<16, false>;
    l.q.launch(kernel, grid, dim3(THREADS), reinterpret_cast<const float4 *>(x.data), x.ld / 4, static_cast<const float4 *>(w.data), static_cast<const float4 *>(b.data),
               y->params.norm.eps, layer, reinterpret_cast<uint2 *>(out.data), out.ld / 4, C);
}

void run_pointwise(Launch &l, const Step &s) {
    const bnb_tensor *y = s.y, *b = y->src[1];
    bool row = b && b->n_dims == 1;
    l.q.launch(pointwise_kernel, dim3(blocks(y->shape[1], THREADS), static_cast<unsigned>(y->shape[0])), dim3(THREADS), y->op, l.rows(y->src[0]),
               row ? Rows{} : l.rows(b), row ? l.numbers(b) : Numbers{}, y->op == BNB_OP_SCALE ? y->params.scale.factor : 0.0f,
               l.rows(y), static_cast<int>(y->shape[1]));
}

void run_softmax(Launch &l, const Step &s) {
    l.q.launch(softmax_kernel, dim3(static_cast<unsigned>(s.y->shape[0])), dim3(THREADS), l.rows(s.y->src[0]), l.rows(s.y),
               static_cast<int>(s.y->shape[1]));
}

void run_argmax(Launch &l, const Step &s) {
    l.q.launch(argmax_kernel, dim3(static_cast<unsigned>(s.y->shape[0])), dim3(1024), l.rows(s.y->src[0]), static_cast<int *>(s.y->plane[0]),
               static_cast<int>(s.y->src[0]->shape[1]));
}

bool fits_draw(const Compiled &, const Step &s) {
    const bnb_draw_rule &r = s.y->params.draw;
    return r.temp <= 0 || (r.top_k > 0 && r.top_k <= DRAW_MOST) || s.y->src[0]->shape[1] <= DRAW_MOST;
}
void run_draw(Launch &l, const Step &s) {
    const bnb_draw_rule &r = s.y->params.draw;
    int C = static_cast<int>(s.y->src[0]->shape[1]), k = r.temp <= 0 ? 1 : r.top_k > 0 && r.top_k < C ? r.top_k : C;
    l.q.launch(draw_kernel, dim3(static_cast<unsigned>(s.y->shape[0])), dim3(DRAW_THREADS), l.rows(s.y->src[0]), static_cast<const int *>(s.y->src[1]->plane[0]), r, k,
               static_cast<int *>(s.y->plane[0]), C);
}

// Columns that share a scale; 0: there are no scales.
int int8_block(const bnb_tensor *cache) { return cache->type == BNB_INT8_KV ? cache->quant.blocksize : 0; }

void run_set_rows(Launch &l, const Step &s) {
    const bnb_tensor *a = s.nodes[0], *b = s.nodes.size() > 1 ? s.nodes[1] : nullptr;
    const Rows x = l.rows(a->src[1]), x2 = b ? l.rows(b->src[1]) : Rows{};
    const Cache cache = l.cache(a->src[0]), cache2 = b ? l.cache(b->src[0]) : Cache{};
    const int *rows = static_cast<const int *>(a->src[2]->plane[0]);
    const int R = static_cast<int>(a->shape[0]), C = static_cast<int>(a->shape[1]);
    const unsigned T = static_cast<unsigned>(a->src[1]->shape[0]);
    const bool fast = C % 8 == 0 && x.f16 && cache.rows.f16 && (!b || (x2.f16 && cache2.rows.f16)) &&
                      (x.ld | cache.rows.ld | x2.ld | cache2.rows.ld) % 8 == 0 &&
                      aligned16({x.data, cache.rows.data, x2.data, cache2.rows.data});
    int *const fault = l.plan.device->fault;
    if (const int B = int8_block(a))
        l.q.launch(set_rows_int8_kernel, dim3(blocks(C / B, GROUPS), T), dim3(LANES, GROUPS), x, cache, x2, cache2,
                   rows, R, C, B, fault, l.node());
    else if (fast)
        l.q.launch(copy_rows_kernel, dim3(blocks(C / 8, THREADS), T), dim3(THREADS), x, cache.rows, x2, cache2.rows,
                   rows, R, C / 8, fault, l.node());
    else
        l.q.launch(set_rows_kernel, dim3(blocks(C, THREADS), T), dim3(THREADS), x, cache.rows, x2, cache2.rows, rows, R,
                   C, fault, l.node());
}

void run_linear(Launch &l, const Step &s) {
    for (const bnb_tensor *node : s.nodes) {
        const bnb_tensor *y = s.nodes.size() > 1 ? node : s.y;
        l.q.launch(linear_kernel, dim3(blocks(y->shape[1], GROUPS), blocks(y->shape[0], PLAIN_ROWS)), dim3(LANES, GROUPS), l.rows(node->src[0]),
                   l.weight(node->src[1]), l.epilogue(s, node), l.rows(y), static_cast<int>(y->shape[0]));
    }
}

#ifdef __CUDACC__
// x as f16, in scratch if it does not lie so already.
uint64_t half_bytes(const bnb_tensor *x) { return align_up(static_cast<uint64_t>(bnb_tensor_elements(x)) * 2); }
Rows half_rows(Launch &l, const bnb_tensor *x, char *scratch) {
    Rows from = l.rows(x);
    if (from.f16) return from;
    Rows to = {scratch, static_cast<long>(x->shape[1]), 1};
    l.q.launch(pointwise_kernel, dim3(blocks(x->shape[1], THREADS), static_cast<unsigned>(x->shape[0])), dim3(THREADS), int{BNB_OP_NONE}, from, Rows{}, Numbers{},
               0.0f, to, static_cast<int>(x->shape[1]));
    return to;
}

bool fits_dense(const Compiled &plan, const Step &s) {
    const bnb_tensor *x = s.nodes[0]->src[0], *w = s.nodes[0]->src[1];
    return plan.f16 && plan.device->dense && plan.device->dense->handle && w->type == BNB_F16 && w->op == BNB_OP_NONE && w->shape[1] % 8 == 0 &&
           w->shape[0] % 8 == 0 && x->shape[0] > 8 && x->op != BNB_OP_COLUMNS && !(s.act && s.residual);
}
uint64_t scratch_dense(const Compiled &, const Step &s) { return DENSE_WORKSPACE + half_bytes(s.nodes[0]->src[0]); }
// Rows [n0, n0 + rows) of every weight at a time. weight_of(w, n0, rows): where these lie as f16.
template <class F> void run_dense(Launch &l, const Step &s, int rows_at_once, F weight_of) {
    const bnb_tensor *x = s.nodes[0]->src[0];
    Rows h = half_rows(l, x, l.scratch + DENSE_WORKSPACE);
    for (const bnb_tensor *node : s.nodes) {
        const bnb_tensor *y = s.nodes.size() > 1 ? node : s.y;
        int M = static_cast<int>(y->shape[0]), N = static_cast<int>(y->shape[1]);
        Rows out = l.rows(y);
        Epilogue e = l.epilogue(s, node);
        const void *bias = nullptr; // uploaded ones lie as f32 and as f16
        if (node->src[2] && node->src[2]->layout == LAYOUT_NUMBERS) {
            bias = node->src[2]->plane[out.f16];
            e.bias = {};
        }
        const bool all = !e.bias.data && dense_does(e.act);
        for (int n0 = 0; n0 < N; n0 += rows_at_once) {
            const int rows = std::min(rows_at_once, N - n0), size = out.f16 ? 2 : 4;
            auto columns = [&](Rows y) {
                if (y.data) y.data += static_cast<size_t>(n0) * (y.f16 ? 2 : 4);
                return y;
            };
            if (!dense_product(*l.plan.device->dense, l.q.stream, h, weight_of(node->src[1], n0, rows), bias ? static_cast<const char *>(bias) + static_cast<size_t>(n0) * size : nullptr,
                               all ? e.act : int{BNB_OP_NONE}, columns(e.residual), columns(out), M, rows, static_cast<int>(x->shape[1]), l.scratch))
                l.q.note(cudaErrorUnknown);
        }
        e.residual = {};
        if (all) e.act = BNB_OP_NONE;
        if (e.bias.data || e.act) l.q.launch(finish_kernel, dim3(blocks(N, THREADS), static_cast<unsigned>(M)), dim3(THREADS), e, out, N);
    }
}
void run_dense_f16(Launch &l, const Step &s) {
    run_dense(l, s, INT32_MAX, [](const bnb_tensor *w, int, int) -> const void * { return w->plane[0]; });
}
#endif

#ifdef __CUDACC__
// ---- the kernels of [TILE4] and [TILE8] --------------------------------------------------------------------------

int tile_act(int op) {
    switch (op) {
    case BNB_OP_RELU: return 1;
    case BNB_OP_GELU: return 2;
    case BNB_OP_GELU_TANH: return 3;
    case BNB_OP_SILU: return 4;
    default: return 0;
    }
}

bool is_f32(const bnb_tensor *t) { return !t || t->layout == LAYOUT_NUMBERS || t->type == BNB_F32; }

// What all of them ask for: f16 products, f32 biases that are weights, a result that fits one launch. takes_norm: whether a
// kernel for this M and K computes a norm in front.
bool fits_tile(const Compiled &plan, const Step &s, int layout, bool has, bool (*takes_norm)(int M, int K)) {
    const bnb_tensor *w = s.nodes[0]->src[1];
    if (!plan.f16 || !has || w->layout != layout || s.y->shape[0] < 1) return false;
    for (const bnb_tensor *node : s.nodes)
        if (!is_f32(node->src[2])) return false;
    if (!s.norm) return true;
    const bnb_tensor *n = s.norm; // f32 weights, and x as it lies
    return n->src[0]->op != BNB_OP_COLUMNS && n->shape[0] <= 8 && n->shape[1] <= tile4::kNormMax && takes_norm(static_cast<int>(n->shape[0]), static_cast<int>(n->shape[1])) &&
           is_f32(n->src[1]) && is_f32(n->src[2]) && n->src[1] && (n->op == BNB_OP_RMS_NORM || n->src[2]);
}
bool one_row(int M, int) { return M == 1; }
bool fits_tile4(const Compiled &plan, const Step &s) { return fits_tile(plan, s, LAYOUT_TILE4, plan.device->mma, tile4::linear4_takes_norm); }
// ---- many rows of x: the weights become f16 once, in scratch, and cuBLASLt multiplies ----

// A tile of 64 rows by 64 columns to f16 w [N, K], one block each: code -> value * absmax, rounded once.
__global__ void tile4_dense_kernel(const char *units, Numbers map, int N, int K, __half *w) {
    __shared__ float2 pairs[256];                    // byte of two codes -> their values
    __shared__ __align__(16) __half2 rows[64][36];   // [64 rows][32 pairs], padded
    const int thread = threadIdx.x, quarter = thread / 64, half = thread & 1, t = thread >> 1 & 3, g = thread >> 3 & 7;
    pairs[thread] = make_float2(get(map, thread >> 4), get(map, thread & 15));
    __syncthreads();
    wait_for_previous();
    const char *unit = units + (static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x) * tile4::kTileBytes + quarter * tile4::kUnitBytes;
    const uint2 packed = *reinterpret_cast<const uint2 *>(unit + (4 * g + t) * 16 + half * 8);
    const float absmax = reinterpret_cast<const float *>(unit + tile4::kCodeBytes)[2 * g + half];
    const unsigned char *bytes = reinterpret_cast<const unsigned char *>(&packed);
    for (int e = 0; e < 8; e++) {
        float2 v = pairs[bytes[e]];
        rows[quarter * 16 + 2 * g + half][tile4::unit_byte(t, e)] = __floats2half2_rn(v.x * absmax, v.y * absmax);
    }
    __syncthreads();
    for (int i = thread; i < 64 * 8; i += THREADS) { // 16 bytes at a time
        const long row = static_cast<long>(blockIdx.y) * 64 + i / 8;
        if (row < N) *reinterpret_cast<uint4 *>(w + row * K + blockIdx.x * 64 + i % 8 * 8) = *reinterpret_cast<const uint4 *>(&rows[i / 8][i % 8 * 4]);
    }
}

// Where this may be faster than linear4: what it costs to write N K numbers is shared by M rows. An estimate for
// linear4_mma; linear4_wgmma is the faster one whatever M.
bool fits_tile4_dense(const Compiled &plan, const Step &s) {
    const bnb_tensor *w = s.nodes[0]->src[1];
    return fits_tile4(plan, s) && !plan.device->tiles && plan.device->dense && plan.device->dense->handle && !s.norm &&
           !(s.act && s.residual) && w->shape[0] % 8 == 0 && s.y->shape[0] >= 256;
}
// Rows of a weight that are f16 at the same time, whole blocks of 64: as many as DENSE_CHUNK holds.
constexpr int64_t DENSE_CHUNK = 64 << 20; // whole matrices are less than 1 % faster
int64_t dense_rows(const bnb_tensor *w) { return std::max<int64_t>(DENSE_CHUNK / (w->shape[1] * 2) / 64 * 64, 64); }
uint64_t dense_bytes(const Step &s) {
    uint64_t most = 0;
    for (const bnb_tensor *node : s.nodes)
        most = std::max(most, static_cast<uint64_t>(std::min(node->src[1]->shape[0], dense_rows(node->src[1])) * node->src[1]->shape[1] * 2));
    return align_up(most);
}
uint64_t scratch_tile4_dense(const Compiled &plan, const Step &s) { return scratch_dense(plan, s) + dense_bytes(s); }
void run_tile4_dense(Launch &l, const Step &s) {
    char *w = l.scratch + scratch_dense(l.plan, s);
    const bnb_tensor *weight = s.nodes[0]->src[1];
    const Numbers map = {weight->type == BNB_NF4 ? l.plan.device->maps : l.plan.device->maps + 16, BNB_F32};
    run_dense(l, s, static_cast<int>(dense_rows(weight)), [&](const bnb_tensor *t, int n0, int rows) -> const void * {
        const int K = static_cast<int>(t->shape[1]);
        const char *tiles = static_cast<const char *>(t->plane[0]) + n0 / tile4::kBlockRows * tile4::block_bytes(K);
        l.q.launch(tile4_dense_kernel, dim3(static_cast<unsigned>(K / 64), blocks(rows, 64)), dim3(THREADS), tiles, map, rows, K, reinterpret_cast<__half *>(w));
        return w;
    });
}

bool fits_int8_codes(const Compiled &plan, const Step &s, bool has) {
    const bnb_tensor *w = s.nodes[0]->src[1];
    return w->type == BNB_INT8 && fits_tile(plan, s, w->layout, has, tile8::linear8_takes_norm) && tile8::linear8_fits(static_cast<int>(w->shape[0]), static_cast<int>(w->shape[1]));
}
bool fits_tile8(const Compiled &plan, const Step &s) { return fits_int8_codes(plan, s, plan.device->tiles); }
bool fits_mma8(const Compiled &plan, const Step &s) { return fits_int8_codes(plan, s, plan.device->mma); }
bool fits_tile16(const Compiled &plan, const Step &s) {
    const bnb_tensor *w = s.nodes[0]->src[1];
    return w->type == BNB_F16 && w->op == BNB_OP_NONE && fits_tile(plan, s, w->layout, plan.device->mma, one_row) &&
           tile4::linear16_fits(static_cast<int>(s.y->shape[0]), static_cast<int>(w->shape[1]), plan.device->max_shared, plan.device->tiles);
}

const bnb_tensor *input_of(const Step &s) { return s.norm ? s.norm->src[0] : s.nodes[0]->src[0]; }
uint64_t scratch_tile(const Compiled &, const Step &s) { return half_bytes(input_of(s)); }

// What the choice of a kernel in [TILE4] needs.
void fill_shape(Launch &l, const Step &s, tile4::LinearCall *c) {
    c->M = static_cast<int>(s.y->shape[0]);
    c->K = static_cast<int>(s.nodes[0]->src[1]->shape[1]);
    c->n_sm = l.plan.device->n_sm;
    c->max_shared = l.plan.device->max_shared;
    c->hopper = l.plan.device->tiles;
}
// Fills what the calls have in common; x: where it lies in a form that the kernel takes.
template <class Call> void fill_tile(Launch &l, const Step &s, const Rows &x, Call *c) {
    c->x = x.data;
    c->ldx = x.ld;
    c->x_f32 = !x.f16;
    c->act = tile_act(s.act);
    Rows r = l.rows(s.residual);
    c->residual = reinterpret_cast<const float *>(r.data);
    c->ldr = r.ld;
    c->y_f32 = !l.rows(s.nodes.size() > 1 ? s.nodes[0] : s.y).f16;
}
template <class Call> void fill_norm(Launch &l, const Step &s, Call *c) {
    if (!s.norm) return;
    c->norm_kind = s.norm->op == BNB_OP_LAYER_NORM ? 1 : 2;
    c->norm_w = static_cast<const float *>(s.norm->src[1]->plane[0]);
    c->norm_b = s.norm->src[2] ? static_cast<const float *>(s.norm->src[2]->plane[0]) : nullptr;
    c->norm_eps = s.norm->params.norm.eps;
    (void)l;
}
template <class Part> void fill_part(Launch &l, const Step &s, const bnb_tensor *node, Part *p) {
    Rows y = l.rows(s.nodes.size() > 1 ? node : s.y);
    p->N = static_cast<int>(node->src[1]->shape[0]);
    p->bias = node->src[2] ? static_cast<const float *>(node->src[2]->plane[0]) : nullptr;
    p->y = y.data;
    p->ldy = y.ld;
}

// x as the kernels take it: f16 with aligned rows; f32 where `wide` allows it.
Rows tile_input(Launch &l, const Step &s, bool wide) {
    Rows x = l.rows(input_of(s));
    bool aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.ld % 8 == 0;
    if (aligned && (x.f16 || wide)) return x;
    Rows to = {l.scratch, static_cast<long>(input_of(s)->shape[1]), 1};
    l.q.launch(pointwise_kernel, dim3(blocks(to.ld, THREADS), static_cast<unsigned>(input_of(s)->shape[0])), dim3(THREADS), int{BNB_OP_NONE}, x, Rows{}, Numbers{},
               0.0f, to, static_cast<int>(to.ld));
    return to;
}

void run_tile4(Launch &l, const Step &s) {
    tile4::Linear4 c = {};
    fill_shape(l, s, &c);
    std::memcpy(c.map, s.nodes[0]->src[1]->type == BNB_NF4 ? bnb_nf4_map : bnb_fp4_map, sizeof c.map);
    for (const bnb_tensor *node : s.nodes) {
        tile4::Linear4Part &p = c.part[c.n_parts++];
        fill_part(l, s, node, &p);
        p.units = node->src[1]->plane[0];
    }
    fill_tile(l, s, tile_input(l, s, tile4::linear4_takes_f32(c)), &c);
    fill_norm(l, s, &c);
    l.q.note(tile4::linear4(l.q.stream, c, l.q.overlap));
}

void run_tile16(Launch &l, const Step &s) {
    tile4::Linear16 c = {};
    fill_shape(l, s, &c);
    fill_tile(l, s, tile_input(l, s, true), &c);
    fill_norm(l, s, &c);
    for (const bnb_tensor *node : s.nodes) {
        fill_part(l, s, node, &c);
        c.w = node->src[1]->plane[0];
        l.q.note(tile4::linear16(l.q.stream, c, l.q.overlap));
    }
}

tile8::Linear8 call_tile8(const Step &s) {
    tile8::Linear8 c = {};
    const bnb_tensor *w = s.nodes[0]->src[1];
    c.M = static_cast<int>(s.y->shape[0]);
    c.K = static_cast<int>(w->shape[1]);
    c.threshold = w->quant.threshold;
    c.outlier_rule = w->quant.outlier_rule;
    for (const bnb_tensor *node : s.nodes) c.part[c.n_parts++].N = static_cast<int>(node->src[1]->shape[0]);
    return c;
}
uint64_t scratch_tile8(const Compiled &, const Step &s) { return half_bytes(input_of(s)) + tile8::linear8_scratch(call_tile8(s)); }
tile8::Linear8 filled_tile8(Launch &l, const Step &s) {
    tile8::Linear8 c = call_tile8(s);
    fill_tile(l, s, tile_input(l, s, true), &c);
    fill_norm(l, s, &c);
    c.scratch = l.scratch + half_bytes(input_of(s));
    for (size_t i = 0; i < s.nodes.size(); i++) {
        fill_part(l, s, s.nodes[i], &c.part[i]);
        c.part[i].w = s.nodes[i]->src[1]->plane[0];
        c.part[i].scb = static_cast<const float *>(s.nodes[i]->src[1]->plane[1]);
    }
    return c;
}
void run_tile8(Launch &l, const Step &s) { l.q.note(tile8::linear8(l.q.stream, filled_tile8(l, s), l.q.overlap)); }
void run_mma8(Launch &l, const Step &s) { l.q.note(tile8::linear8_mma(l.q.stream, filled_tile8(l, s), l.q.overlap)); }

bool fits_attention(const Compiled &plan, const Step &s, bool has) {
    const bnb_tensor *y = s.y, *k = y->src[1], *v = y->src[2];
    int64_t heads = y->params.attention.n_head, D = y->shape[1] / heads;
    return plan.f16 && has && y->shape[0] > 0 && (k->type == BNB_F16 || k->type == BNB_INT8_KV) &&
           k->stride[0] == v->stride[0] && D % 8 == 0 && D <= 256 && k->shape[1] % 8 == 0 && k->shape[0] > 0;
}
bool fits_attention_tile(const Compiled &plan, const Step &s) { return fits_attention(plan, s, plan.device->tiles); }
bool fits_attention_mma(const Compiled &plan, const Step &s) { return fits_attention(plan, s, plan.device->mma); }

tile8::Attention call_attention(const Step &s) {
    const bnb_tensor *y = s.y;
    tile8::Attention a = {};
    a.T = static_cast<int>(y->shape[0]);
    a.n_head = y->params.attention.n_head;
    a.n_head_kv = y->params.attention.n_head_kv;
    a.D = static_cast<int>(y->shape[1] / a.n_head);
    a.kv_int8 = y->src[1]->type == BNB_INT8_KV;
    a.R = static_cast<int>(y->src[1]->shape[0]);
    return a;
}
// Of widened caches: k_wide, v_wide.
uint64_t scratch_attention_tile(const Compiled &, const Step &s) {
    const tile8::Attention a = call_attention(s);
    return a.kv_int8 && a.T > tile8::decode_most ? 2 * half_bytes(s.y->src[1]) : 0;
}
// A call widens caches or divides spans, never both: one memory serves.
uint64_t scratch_attention_mma(const Compiled &plan, const Step &s) {
    const uint64_t split = tile8::attention_scratch(call_attention(s), plan.device->n_sm);
    return std::max(scratch_attention_tile(plan, s), split);
}
tile8::Attention filled_attention(Launch &l, const Step &s) {
    const bnb_tensor *y = s.y;
    Rows k_new = {}, v_new = {};
    if (!s.writes.empty()) {
        k_new = l.rows(s.writes[0]->src[1]);
        v_new = l.rows(s.writes[1]->src[1]);
        const uintptr_t addresses = reinterpret_cast<uintptr_t>(k_new.data) | reinterpret_cast<uintptr_t>(v_new.data);
        if (!k_new.f16 || !v_new.f16 || addresses % 16 || k_new.ld % 8 || k_new.ld != v_new.ld) { // not as the kernel reads them
            Step apart;
            apart.nodes = s.writes;
            run_set_rows(l, apart);
            k_new = v_new = {};
        }
    }
    const Rows q = l.rows(y->src[0]), out = l.rows(y);
    const Cache k = l.cache(y->src[1]), v = l.cache(y->src[2]);
    tile8::Attention a = call_attention(s);
    a.q = q.data;
    a.ldq = q.ld;
    a.q_f32 = !q.f16;
    a.k = k.rows.data;
    a.v = v.rows.data;
    a.ldkv = k.rows.ld;
    a.k_absmax = k.absmax;
    a.v_absmax = v.absmax;
    a.k_wide = l.scratch;
    a.v_wide = l.scratch + half_bytes(y->src[1]);
    a.span = static_cast<const int *>(y->src[3]->plane[0]);
    a.scale = y->params.attention.scale;
    a.y = out.data;
    a.ldy = out.ld;
    a.y_f32 = !out.f16;
    a.k_new = k_new.data;
    a.v_new = v_new.data;
    a.ld_new = k_new.ld;
    if (a.k_new) a.row = static_cast<const int *>(s.writes[0]->src[2]->plane[0]);
    a.fault = l.plan.device->fault;
    a.node = l.node();
    a.scratch = reinterpret_cast<float *>(l.scratch);
    return a;
}
void run_attention_tile(Launch &l, const Step &s) { l.q.note(tile8::attention(l.q.stream, filled_attention(l, s), l.q.overlap)); }
void run_attention_mma(Launch &l, const Step &s) { l.q.note(tile8::attention_mma(l.q.stream, filled_attention(l, s), l.q.overlap)); }
#endif

uint64_t scratch_linear_int8(const Compiled &, const Step &s) {
    uint64_t M = static_cast<uint64_t>(s.y->shape[0]), K = static_cast<uint64_t>(s.nodes[0]->src[1]->shape[1]);
    return 4 * M + M * K + K;
}

void run_linear_int8(Launch &l, const Step &s) {
    const bnb_tensor *x = s.nodes[0]->src[0];
    int M = static_cast<int>(x->shape[0]), K = static_cast<int>(x->shape[1]);
    const bnb_quant &quant = s.nodes[0]->src[1]->quant;
    int by_column = M > 1 && quant.outlier_rule == BNB_OUTLIER_COLUMN;
    char *codes = l.scratch + 4 * static_cast<uint64_t>(M);
    Int8Rows q = {reinterpret_cast<float *>(l.scratch), reinterpret_cast<signed char *>(codes),
                  reinterpret_cast<unsigned char *>(codes + static_cast<uint64_t>(M) * static_cast<uint64_t>(K))};
    l.q.launch(int8_rows_kernel, dim3(static_cast<unsigned>(M)), dim3(THREADS), l.rows(x), quant.threshold, q, K);
    l.q.launch(int8_columns_kernel, dim3(blocks(K, THREADS)), dim3(THREADS), l.rows(x), quant.threshold, by_column, q, M, K);
    for (const bnb_tensor *node : s.nodes) {
        const bnb_tensor *y = s.nodes.size() > 1 ? node : s.y;
        l.q.launch(linear_int8_kernel, dim3(blocks(y->shape[1], GROUPS), blocks(M, PLAIN_ROWS)), dim3(LANES, GROUPS), l.rows(x),
                   l.weight(node->src[1]), q, by_column, l.epilogue(s, node), l.rows(y), M);
    }
}

void run_attention(Launch &l, const Step &s) {
    const bnb_tensor *y = s.y, *k = y->src[1];
    int heads = y->params.attention.n_head;
    l.q.launch(attention_kernel, dim3(static_cast<unsigned>(heads), static_cast<unsigned>(y->shape[0])), dim3(THREADS), l.rows(y->src[0]), l.cache(k),
               l.cache(y->src[2]), static_cast<const int *>(y->src[3]->plane[0]), static_cast<int>(k->shape[0]),
               static_cast<int>(y->shape[1] / heads), heads / y->params.attention.n_head_kv, y->params.attention.scale, l.rows(y),
               l.plan.device->fault, l.node());
}

bool fits_head(const Compiled &, const Step &s) { return s.y->shape[1] / s.y->params.attention.n_head <= PLAIN_HEAD; }
bool fits_int8(const Compiled &, const Step &s) { return s.nodes[0]->src[1]->type == BNB_INT8; }
bool fits_canonical(const Compiled &, const Step &s) { return s.nodes[0]->src[1]->type != BNB_INT8; }

enum {
    TAKES_NORM = 1, // a linear kernel that can apply the norm in front of it
    TAKES_ROWS = 2  // an attention kernel that can write as many rows of its caches itself as it has rows of q, up to DECODE_MOST
};

// Best first; the first row that fits a step runs it.
struct Kernel {
    const char *name;
    int op;
    bool (*fits)(const Compiled &, const Step &); // NULL: always
    uint64_t (*scratch)(const Compiled &, const Step &); // NULL: none
    void (*run)(Launch &, const Step &);
    int flags;
};

const Kernel kernels[] = {
    {"embed", BNB_OP_EMBED, nullptr, nullptr, run_embed, 0},
#ifdef __CUDACC__
    {"linear_tile4_cublaslt", BNB_OP_LINEAR, fits_tile4_dense, scratch_tile4_dense, run_tile4_dense, 0},
    {"linear_tile4", BNB_OP_LINEAR, fits_tile4, scratch_tile, run_tile4, TAKES_NORM},
    {"linear_tile8", BNB_OP_LINEAR, fits_tile8, scratch_tile8, run_tile8, TAKES_NORM},
    {"linear_tile16", BNB_OP_LINEAR, fits_tile16, nullptr, run_tile16, TAKES_NORM},
    {"attention_tile", BNB_OP_ATTENTION, fits_attention_tile, scratch_attention_tile, run_attention_tile, TAKES_ROWS},
    {"linear_mma8", BNB_OP_LINEAR, fits_mma8, scratch_tile8, run_mma8, 0},
    {"attention_mma", BNB_OP_ATTENTION, fits_attention_mma, scratch_attention_mma, run_attention_mma, TAKES_ROWS},
    {"linear_f16_cublaslt", BNB_OP_LINEAR, fits_dense, scratch_dense, run_dense_f16, 0},
#endif
    {"linear_int8", BNB_OP_LINEAR, fits_int8, scratch_linear_int8, run_linear_int8, 0},
    {"linear", BNB_OP_LINEAR, fits_canonical, nullptr, run_linear, 0},
    {"layer_norm", BNB_OP_LAYER_NORM, nullptr, nullptr, run_norm, 0},
    {"rms_norm", BNB_OP_RMS_NORM, nullptr, nullptr, run_norm, 0},
    {"add", BNB_OP_ADD, nullptr, nullptr, run_pointwise, 0},
    {"mul", BNB_OP_MUL, nullptr, nullptr, run_pointwise, 0},
    {"scale", BNB_OP_SCALE, nullptr, nullptr, run_pointwise, 0},
    {"gelu", BNB_OP_GELU, nullptr, nullptr, run_pointwise, 0},
    {"gelu_tanh", BNB_OP_GELU_TANH, nullptr, nullptr, run_pointwise, 0},
    {"relu", BNB_OP_RELU, nullptr, nullptr, run_pointwise, 0},
    {"silu", BNB_OP_SILU, nullptr, nullptr, run_pointwise, 0},
    {"softmax", BNB_OP_SOFTMAX, nullptr, nullptr, run_softmax, 0},
    {"argmax", BNB_OP_ARGMAX, nullptr, nullptr, run_argmax, 0},
    {"draw", BNB_OP_DRAW, fits_draw, nullptr, run_draw, 0},
    {"set_rows", BNB_OP_SET_ROWS, nullptr, nullptr, run_set_rows, 0},
    {"attention", BNB_OP_ATTENTION, fits_head, nullptr, run_attention, 0},
};

bool is_activation(int op) { return op >= BNB_OP_GELU && op <= BNB_OP_SILU; }
bool is_norm(int op) { return op == BNB_OP_LAYER_NORM || op == BNB_OP_RMS_NORM; }

// Turns a graph into steps.
class Compiler {
public:
    Compiler(Compiled &plan, bnb_node_plan *nodes) : plan_(plan), out_(nodes) {
        for (int i = 0; i < bnb_graph_size(plan.graph); i++) {
            bnb_tensor *t = bnb_graph_node(plan.graph, i);
            nodes_.push_back(t);
            index_[t] = i;
            users_[t];
            for (bnb_tensor *s : t->src)
                if (s) users_[s].push_back(t);
        }
        taken_.resize(nodes_.size());
        plan.names.assign(nodes_.size(), "fused");
    }

    bool run(uint64_t *scratch, bnb_error *err) {
        for (size_t i = 0; i < nodes_.size(); i++) {
            if (nodes_[i]->op == BNB_OP_COLUMNS) plan_.names[i] = "view";
            else if (!taken_[i] && !make(nodes_[i], err)) return false;
        }
        fuse_norms();
        fuse_rows();
        std::stable_sort(plan_.steps.begin(), plan_.steps.end(), [](const Step &a, const Step &b) { return a.at < b.at; });
        choose_halves();
        *scratch = 0;
        for (const Step &s : plan_.steps) {
            plan_.names[static_cast<size_t>(index_[s.y])] = s.kernel->name;
            if (s.kernel->scratch) *scratch = std::max(*scratch, s.kernel->scratch(plan_, s));
        }
        return true;
    }

private:
    Compiled &plan_;
    bnb_node_plan *out_;
    std::vector<bnb_tensor *> nodes_;
    std::unordered_map<const bnb_tensor *, int> index_;
    std::unordered_map<const bnb_tensor *, std::vector<bnb_tensor *>> users_;
    std::vector<char> taken_; // belongs to a step

    int index(const bnb_tensor *t) const { return index_.at(t); }

    // The only node that reads t, or NULL.
    bnb_tensor *only_user(const bnb_tensor *t) const {
        const std::vector<bnb_tensor *> &users = users_.at(t);
        return users.size() == 1 && !(t->flags & BNB_FLAG_OUTPUT) ? users[0] : nullptr;
    }

    // Node t runs with the step that runs at `at`; hidden: its result is not written.
    void take(const bnb_tensor *t, int at, bool hidden) {
        size_t i = static_cast<size_t>(index(t));
        taken_[i] = 1;
        out_[i].at = at;
        if (hidden) out_[i].bytes = 0;
    }

    bool make(bnb_tensor *t, bnb_error *err) {
        Step s;
        s.op = t->op;
        s.nodes = {t};
        s.y = t;
        if (t->op == BNB_OP_LINEAR) follow(&s);
        s.at = index(s.y);
        for (const Kernel &k : kernels)
            if (k.op == s.op && (!k.fits || k.fits(plan_, s))) {
                s.kernel = &k;
                break;
            }
        if (!s.kernel) {
            bnb_fail(err, BNB_E_UNSUPPORTED, "%s: %s has no kernel for it", t->name, GPU_NAME);
            return false;
        }
        for (const bnb_tensor *u = t; u != s.y; u = only_user(u)) take(u, s.at, true);
        take(s.y, s.at, false);
        if (t->op == BNB_OP_LINEAR && s.y == t) join_products(&s);
        if (t->op == BNB_OP_SET_ROWS) join_caches(&s);
        if (t->op == BNB_OP_ADD) join_embeddings(&s);
        plan_.steps.push_back(s);
        return true;
    }

    // The activation behind a product, and the sum behind that.
    void follow(Step *s) const {
        bnb_tensor *u = only_user(s->y);
        if (u && is_activation(u->op)) {
            s->act = u->op;
            s->y = u;
            u = only_user(u);
        }
        if (!u || u->op != BNB_OP_ADD || u->src[1]->n_dims != 2) return;
        s->residual = u->src[0] == s->y ? u->src[1] : u->src[0];
        s->y = u;
    }

    // Products of the same x with weights of one kind: q, k and v. They run with the first; only weights may be missing
    // by then, and those are always there.
    void join_products(Step *s) {
        const bnb_tensor *first = s->nodes[0], *w = first->src[1];
        for (bnb_tensor *t : users_.at(first->src[0])) {
            const bnb_tensor *v = t->src[1];
            if (s->nodes.size() == 3) break;
            if (t == first || t->op != BNB_OP_LINEAR || t->src[0] != first->src[0] || taken_[static_cast<size_t>(index(t))]) continue;
            if (w->op != BNB_OP_NONE || v->op != BNB_OP_NONE || (t->src[2] && t->src[2]->op != BNB_OP_NONE) || v->type != w->type || v->layout != w->layout || v->quant.threshold != w->quant.threshold ||
                v->quant.outlier_rule != w->quant.outlier_rule)
                continue;
            Step alone;
            alone.y = t;
            follow(&alone);
            if (alone.y != t) continue;
            s->nodes.push_back(t);
            take(t, s->at, false);
        }
    }

    // Keys and values that go to the same rows of their caches: written by one kernel, at the later place.
    void join_caches(Step *s) {
        for (Step &other : plan_.steps) {
            const bnb_tensor *a = other.nodes[0], *b = s->nodes[0];
            if (other.op != BNB_OP_SET_ROWS || other.nodes.size() > 1 || a->src[2] != b->src[2] || a->shape[0] != b->shape[0] ||
                a->shape[1] != b->shape[1] || int8_block(a) != int8_block(b) || a->src[0] == b->src[0])
                continue;
            bool early = false; // somebody reads the first cache before the second is written
            for (const bnb_tensor *u : users_.at(a)) early = early || index(u) < s->at;
            for (int i = index(a); i < s->at; i++) // or overwrites what is to be written: x lives on by `at`
                early = early || (nodes_[static_cast<size_t>(i)] != a && nodes_[static_cast<size_t>(i)]->view == a->view && nodes_[static_cast<size_t>(i)]->op == BNB_OP_SET_ROWS);
            if (early) continue;
            take(a, s->at, false);
            s->nodes = {a, b};
            other = plan_.steps.back();
            plan_.steps.pop_back();
            return;
        }
    }

    // Token and position: table[ids] + table2[ids2].
    void join_embeddings(Step *s) {
        const bnb_tensor *y = s->y, *a = y->src[0], *b = y->src[1];
        auto joins = [&](const bnb_tensor *t) { return t->op == BNB_OP_EMBED && t->src[0]->op == BNB_OP_NONE && only_user(t) == y; };
        if (a == b || b->n_dims != 2 || !joins(a) || !joins(b)) return;
        plan_.steps.erase(std::remove_if(plan_.steps.begin(), plan_.steps.end(), [&](const Step &o) { return o.y == a || o.y == b; }), plan_.steps.end());
        take(a, s->at, true);
        take(b, s->at, true);
        s->op = BNB_OP_EMBED;
        s->nodes = {a, b};
        for (const Kernel &k : kernels)
            if (k.op == BNB_OP_EMBED) s->kernel = &k;
    }

    // A norm that only one step reads, if that step's kernel computes it itself. Not if the result goes where the norm's
    // input lies: blocks that are still computing the norm would read it.
    void fuse_norms() {
        for (Step &s : plan_.steps) {
            const bnb_tensor *norm = s.op == BNB_OP_LINEAR ? s.nodes[0]->src[0] : nullptr;
            if (!norm || !is_norm(norm->op) || !(s.kernel->flags & TAKES_NORM) || (norm->flags & BNB_FLAG_OUTPUT)) continue;
            if (users_.at(norm).size() != s.nodes.size() || s.residual == norm->src[0]) continue;
            Step with = s;
            with.norm = norm;
            if (s.kernel->fits(plan_, with)) {
                s.norm = norm;
                take(norm, s.at, true);
            }
        }
        plan_.steps.erase(std::remove_if(plan_.steps.begin(), plan_.steps.end(),
                                         [&](const Step &s) { return is_norm(s.op) && !out_[index(s.y)].bytes; }),
                          plan_.steps.end());
    }

    // The keys and the values of few new tokens, if only their own attention reads the caches after they were written.
    void fuse_rows() {
        for (Step &s : plan_.steps) {
            if (s.op != BNB_OP_ATTENTION || !(s.kernel->flags & TAKES_ROWS) || s.y->shape[0] > DECODE_MOST) continue;
            const bnb_tensor *k = s.y->src[1], *v = s.y->src[2];
            const auto writes = [&](const bnb_tensor *t) { return t->op == BNB_OP_SET_ROWS && t->src[1]->shape[0] == s.y->shape[0]; };
            if (k == v || !writes(k) || !writes(v) || only_user(k) != s.y || only_user(v) != s.y) continue;
            auto rows = std::find_if(plan_.steps.begin(), plan_.steps.end(), [&](const Step &o) {
                return o.op == BNB_OP_SET_ROWS && o.nodes.size() == 2 && ((o.nodes[0] == k && o.nodes[1] == v) || (o.nodes[0] == v && o.nodes[1] == k));
            });
            if (rows == plan_.steps.end()) continue;
            s.writes = {k, v};
            take(k, s.at, false);
            take(v, s.at, false);
            rows->op = BNB_OP_NONE;
        }
        plan_.steps.erase(std::remove_if(plan_.steps.begin(), plan_.steps.end(), [](const Step &s) { return s.op == BNB_OP_NONE; }), plan_.steps.end());
    }

    // A result lies as f16 when everything that reads it would round it to f16 or to 8 bits anyway.
    bool takes_half(const bnb_tensor *user, const bnb_tensor *t) const {
        switch (user->op) {
        case BNB_OP_LINEAR: return user->src[0] == t && user->src[1]->type != BNB_F32;
        case BNB_OP_SET_ROWS: return user->src[1] == t && user->type != BNB_F32;
        case BNB_OP_ATTENTION: return user->src[0] == t;
        case BNB_OP_COLUMNS: return every_user_takes_half(user);
        default: return false;
        }
    }
    bool every_user_takes_half(const bnb_tensor *t) const {
        const std::vector<bnb_tensor *> &users = users_.at(t);
        return !(t->flags & BNB_FLAG_OUTPUT) && !users.empty() &&
               std::all_of(users.begin(), users.end(), [&](const bnb_tensor *u) { return takes_half(u, t); });
    }
    void choose_halves() {
        for (const Step &s : plan_.steps) {
            if (!plan_.f16 || s.op == BNB_OP_SET_ROWS || s.residual) continue;
            std::vector<const bnb_tensor *> results = {s.y};
            if (s.op == BNB_OP_LINEAR && s.nodes.size() > 1) results = s.nodes; // written by one kernel: all or none
            if (!std::all_of(results.begin(), results.end(), [&](const bnb_tensor *t) { return every_user_takes_half(t); })) continue;
            for (const bnb_tensor *t : results) {
                plan_.halves[t] = true;
                out_[index(t)].bytes /= 2;
            }
        }
    }
};

void *device_compile(void *dev, const bnb_graph *g, const bnb_plan_params *params, bnb_node_plan *nodes, uint64_t *scratch, bnb_error *err) {
    Device &d = *static_cast<Device *>(dev);
    if (params->compute_dtype == BNB_BF16) {
        bnb_fail(err, BNB_E_TYPE, "the compute dtype must be f32 or f16 on %s", GPU_NAME);
        return nullptr;
    }
    forget_unpacked(d);
    try {
        std::unique_ptr<Compiled> plan(new Compiled{});
        plan->device = &d;
        plan->graph = g;
        plan->params = params;
        plan->f16 = params->compute_dtype != BNB_F32;
        return Compiler(*plan, nodes).run(scratch, err) ? plan.release() : nullptr;
    } catch (const std::bad_alloc &) {
        bnb_fail(err, BNB_E_NOMEM, "out of memory for a plan of %d nodes", bnb_graph_size(g));
        return nullptr;
    }
}

const char *device_describe(const void *compiled, int32_t node) {
    return static_cast<const Compiled *>(compiled)->names[static_cast<size_t>(node)];
}

void device_release(void *dev, void *compiled) {
    Device &d = *static_cast<Device *>(dev);
    Use use(d);
    Compiled *plan = static_cast<Compiled *>(compiled);
    (void)GPU(StreamSynchronize)(d.queue.stream);
    if (plan->exec) (void)GPU(GraphExecDestroy)(plan->exec);
    delete plan;
}

/* ==== [RUN] ===================================================================================================== */

void launch_step(const Compiled &plan, Queue &q, char *scratch, const Step &s) {
    Launch l = {plan, q, scratch, s.at};
    s.kernel->run(l, s);
}

void launch_feeds(const Compiled &plan, Queue &q) {
    Feeds f = {};
    f.n = plan.params->n_feeds;
    for (int i = 0; i < f.n; i++) {
        const bnb_feed &feed = plan.params->feeds[i];
        f.item[i] = {static_cast<const int *>(feed.from->plane[0]), static_cast<int *>(feed.to->plane[0]),
                     static_cast<int>(bnb_tensor_elements(feed.to)), {feed.add[0], feed.add[1]}};
    }
    if (f.n) q.launch(feed_kernel, dim3(1), dim3(THREADS), f);
}

// Where tensors lie now is where they lay when the graph was captured; if not, notes it and says no. Called for every
// token: nothing is allocated but the first time.
bool same_addresses(Compiled &plan, const char *scratch) {
    size_t n = 0;
    bool same = true;
    auto visit = [&](const void *address) {
        if (n == plan.addresses.size()) plan.addresses.push_back(nullptr);
        same = same && plan.addresses[n] == address;
        plan.addresses[n++] = address;
    };
    visit(scratch);
    for (int i = 0; i < bnb_graph_size(plan.graph); i++) {
        const bnb_tensor *t = bnb_graph_node(plan.graph, i);
        visit(t->plane[0]);
        for (const bnb_tensor *s : t->src)
            if (s && s->op == BNB_OP_NONE) visit(s->plane[0]);
    }
    return same;
}

bnb_status capture(Compiled &plan, Queue &q, char *scratch, bnb_error *err) {
    GPU(Graph_t) graph = nullptr;
    if (plan.exec) {
        q.note(GPU(StreamSynchronize)(q.stream));
        q.note(GPU(GraphExecDestroy)(plan.exec));
        plan.exec = nullptr;
    }
    q.note(GPU(StreamBeginCapture)(q.stream, GPU(StreamCaptureModeThreadLocal)));
    for (const Step &s : plan.steps) launch_step(plan, q, scratch, s);
    launch_feeds(plan, q);
    error_t ended = GPU(StreamEndCapture)(q.stream, &graph);
    q.note(ended);
    if (q.status == GPU(Success)) q.note(graph_instantiate(&plan.exec, graph));
    if (graph) (void)GPU(GraphDestroy)(graph);
    return queue_status(*plan.device, err, "capturing a plan");
}

// Step by step, with the time of each; waits for the device.
bnb_status run_timed(Compiled &plan, Queue &q, char *scratch, double *times, bnb_error *err) {
    GPU(Event_t) from = nullptr, to = nullptr;
    q.note(GPU(EventCreate)(&from));
    q.note(GPU(EventCreate)(&to));
    std::memset(times, 0, static_cast<size_t>(bnb_graph_size(plan.graph)) * sizeof *times);
    for (const Step &s : plan.steps) {
        float ms = 0;
        if (q.status != GPU(Success)) break;
        q.note(GPU(EventRecord)(from, q.stream));
        launch_step(plan, q, scratch, s);
        q.note(GPU(EventRecord)(to, q.stream));
        q.note(GPU(EventSynchronize)(to));
        q.note(GPU(EventElapsedTime)(&ms, from, to));
        times[s.at] += 1e-3 * ms;
    }
    launch_feeds(plan, q);
    if (from) (void)GPU(EventDestroy)(from);
    if (to) (void)GPU(EventDestroy)(to);
    return queue_status(*plan.device, err, "running a plan");
}

bnb_status device_run(void *dev, void *compiled, void *scratch, double *times, bnb_error *err) {
    Device &d = *static_cast<Device *>(dev);
    Use use(d);
    Compiled &plan = *static_cast<Compiled *>(compiled);
    char *work = static_cast<char *>(scratch);
    try {
        if (times) return run_timed(plan, d.queue, work, times, err);
        const bool same = same_addresses(plan, work);
        if (!plan.exec || !same)
            if (bnb_status s = capture(plan, d.queue, work, err)) return s;
    } catch (const std::bad_alloc &) {
        return bnb_fail(err, BNB_E_NOMEM, "out of memory for running a plan");
    }
    d.queue.note(GPU(GraphLaunch)(plan.exec, d.queue.stream));
    return queue_status(d, err, "running a plan");
}

/* ==== [WEIGHTS] ================================================================================================= */

uint64_t plane_bytes(const bnb_tensor *t, int p) { return bnb_plane_bytes(t->type, &t->quant, t->n_dims, t->shape, p); }

// Bytes of a plane in t's layout.
uint64_t layout_plane(const bnb_tensor *t, int p) {
    switch (t->layout) {
    case LAYOUT_NUMBERS: return p < 2 ? static_cast<uint64_t>(bnb_tensor_elements(t)) * (p == 0 ? 4 : 2) : 0;
#ifdef __CUDACC__
    case LAYOUT_TILE4:
        if (p == 0) return tile4::tile4_bytes(static_cast<int>(t->shape[0]), static_cast<int>(t->shape[1]));
        return t->quant.double_quant ? plane_bytes(t, p) : 0;
#endif
    default: break;
    }
    return plane_bytes(t, p);
}

void device_place(void *dev, bnb_tensor *t, int32_t compute_dtype) {
    const Device &d = *static_cast<const Device *>(dev);
    const bool vector = t->n_dims == 1 && (t->type == BNB_F32 || t->type == BNB_F16 || t->type == BNB_BF16);
    t->layout = vector ? LAYOUT_NUMBERS : LAYOUT_PLANES;
#ifdef __CUDACC__
    if (d.mma && compute_dtype != BNB_F32 && t->n_dims == 2 && t->shape[0] < INT32_MAX && t->shape[1] < INT32_MAX) {
        int N = static_cast<int>(t->shape[0]), K = static_cast<int>(t->shape[1]);
        if (bnb_type_bits(t->type) == 4 && tile4::linear4_fits(N, K, t->quant.blocksize)) t->layout = LAYOUT_TILE4;
    }
#endif
    (void)d, (void)compute_dtype;
    t->layout_bytes = 0;
    for (int p = 0; p < BNB_MAX_PLANES; p++) t->layout_bytes += align_up(layout_plane(t, p));
}

// The address of each plane, from that of the first.
void find_planes(bnb_tensor *t) {
    char *at = static_cast<char *>(t->plane[0]);
    for (int p = 0; p < BNB_MAX_PLANES; p++) {
        uint64_t bytes = layout_plane(t, p);
        t->plane[p] = bytes || p == 0 ? at : nullptr;
        at += align_up(bytes);
    }
}

// Room for canonical planes beside the kernels' own layout: kept until a plan is compiled, so that a model's weights
// need one allocation.
char *unpacked(Device &d, uint64_t bytes, bnb_error *err) {
    if (bytes > d.unpacked_bytes) {
        (void)GPU(StreamSynchronize)(d.queue.stream); // somebody may still be reading
        forget_unpacked(d);
        d.unpacked = static_cast<char *>(device_alloc(&d, bytes, err));
        d.unpacked_bytes = d.unpacked ? bytes : 0;
    }
    return d.unpacked;
}

// absmax or SCB of a quantized tensor: how many.
int64_t scales_of(const bnb_tensor *t) {
    if (t->type == BNB_INT8) return t->shape[0];
    return bnb_type_is_quantized(t->type) ? (bnb_tensor_elements(t) + t->quant.blocksize - 1) / t->quant.blocksize : 0;
}

// A quantized weight in canonical planes on the device, wherever it comes from: written as it is, or made from plain
// numbers. planes: where, [4]; of double-quantized tensors absmax, f32 [nb], is filled as well.
bnb_status upload_planes(Device &d, bnb_tensor *t, const bnb_tensor *src, char *const *planes, float *absmax, char *room, bnb_error *err) {
    const int64_t n = bnb_tensor_elements(t), nb = scales_of(t);
    if (bnb_type_is_quantized(src->type) || !bnb_type_is_quantized(t->type)) {
        for (int p = 0; p < BNB_MAX_PLANES; p++)
            if (bnb_status s = plane_bytes(t, p) ? device_write(&d, planes[p], src->plane[p], plane_bytes(t, p), err) : BNB_OK) return s;
        if (absmax && t->quant.double_quant) {
            Weight w = {};
            for (int p = 1; p < BNB_MAX_PLANES; p++) w.plane[p] = planes[p];
            w.quant = t->quant;
            d.queue.launch(absmax_kernel, dim3(blocks(nb, THREADS)), dim3(THREADS), w, absmax, static_cast<long>(nb));
        }
        return queue_status(d, err, "uploading a weight");
    }
    if (bnb_status s = device_write(&d, room, src->plane[0], plane_bytes(src, 0), err)) return s;
    Numbers a = {room, src->type};
    if (t->type == BNB_INT8) {
        d.queue.launch(quantize8_kernel, dim3(blocks(nb, 1)), dim3(THREADS), a, static_cast<int>(t->shape[1]), reinterpret_cast<signed char *>(planes[0]), reinterpret_cast<float *>(planes[1]));
        return queue_status(d, err, "quantizing a weight");
    }
    float *scales = t->quant.double_quant ? absmax : reinterpret_cast<float *>(planes[1]);
    d.queue.launch(quantize4_kernel, dim3(blocks(nb, GROUPS)), dim3(LANES, GROUPS), a, static_cast<long>(n), *bnb_quant_rule4(t->type, BNB_COMPAT_CUDA), t->quant.blocksize,
                   reinterpret_cast<unsigned char *>(planes[0]), scales);
    if (bnb_status s = queue_status(d, err, "quantizing a weight")) return s;
    if (!t->quant.double_quant) return BNB_OK;
    // the second level is a thousandth of the work and has a sum over everything: the host does it
    const size_t bytes = align_up(plane_bytes(t, 1)) + align_up(plane_bytes(t, 2)) + align_up(plane_bytes(t, 3)), all = bytes + static_cast<size_t>(nb) * 4;
    char *host = static_cast<char *>(bnb_alloc(d.env, all, err));
    if (!host) return BNB_E_NOMEM;
    bnb_tensor second = *t;
    second.plane[1] = host;
    second.plane[2] = host + align_up(plane_bytes(t, 1));
    second.plane[3] = host + align_up(plane_bytes(t, 1)) + align_up(plane_bytes(t, 2));
    float *read = reinterpret_cast<float *>(host + bytes);
    bnb_status s = device_read(&d, read, absmax, static_cast<uint64_t>(nb) * 4, err);
    if (!s) s = bnb_quantize_absmax(d.env, read, &second, BNB_COMPAT_CUDA, err);
    t->quant.nested_offset = second.quant.nested_offset;
    for (int p = 1; p < BNB_MAX_PLANES && !s; p++) s = device_write(&d, planes[p], second.plane[p], plane_bytes(t, p), err);
    Weight w = {};
    for (int p = 1; p < BNB_MAX_PLANES; p++) w.plane[p] = planes[p];
    w.quant = t->quant;
    d.queue.launch(absmax_kernel, dim3(blocks(nb, THREADS)), dim3(THREADS), w, absmax, static_cast<long>(nb));
    bnb_free(d.env, host, all);
    return s ? s : queue_status(d, err, "quantizing a weight");
}

// Vectors are widened on the host: they are small.
bnb_status upload_numbers(Device &d, bnb_tensor *t, const bnb_tensor *src, bnb_error *err) {
    const int64_t n = bnb_tensor_elements(t);
    float *wide = static_cast<float *>(bnb_alloc(d.env, static_cast<size_t>(n) * 4, err));
    if (!wide) return BNB_E_NOMEM;
    bnb_status s = BNB_OK;
    for (int p = 0; p < 2 && !s; p++) {
        s = bnb_convert(src->type, src->plane[0], p == 0 ? BNB_F32 : BNB_F16, wide, n, err);
        if (!s) s = device_write(&d, t->plane[p], wide, layout_plane(t, p), err);
    }
    bnb_free(d.env, wide, static_cast<size_t>(n) * 4);
    return s;
}

bnb_status device_upload(void *dev, bnb_tensor *t, const bnb_tensor *src, bnb_error *err) {
    Device &d = *static_cast<Device *>(dev);
    Use use(d);
    find_planes(t);
    if (t->layout == LAYOUT_NUMBERS) return upload_numbers(d, t, src, err);
    const bool tiles = t->layout != LAYOUT_PLANES, four = bnb_type_bits(t->type) == 4;
    const uint64_t codes = tiles ? align_up(plane_bytes(t, 0)) : 0;
    const uint64_t scales = four ? align_up(static_cast<uint64_t>(scales_of(t)) * 4) : 0;
    const uint64_t source = src->type != t->type ? plane_bytes(src, 0) : 0;
    char *room = codes + scales + source ? unpacked(d, codes + scales + source, err) : nullptr;
    if (codes + scales + source && !room) return BNB_E_NOMEM;
    char *planes[BNB_MAX_PLANES];
    for (int p = 0; p < BNB_MAX_PLANES; p++) planes[p] = static_cast<char *>(t->plane[p]);
    if (tiles) planes[0] = room;
    if (t->layout == LAYOUT_TILE4 && !t->quant.double_quant) planes[1] = room + codes;
    float *absmax = reinterpret_cast<float *>(room + codes);
    if (bnb_status s = upload_planes(d, t, src, planes, four ? absmax : nullptr, room + codes + scales, err)) return s;
#ifdef __CUDACC__
    const int N = static_cast<int>(t->shape[0]), K = static_cast<int>(t->shape[1]);
    if (t->layout == LAYOUT_TILE4) d.queue.note(tile4::tile4_pack(d.queue.stream, reinterpret_cast<const uint8_t *>(room), absmax, t->quant.blocksize, N, K, t->plane[0]));
#endif
    return queue_status(d, err, "arranging a weight");
}

bnb_status device_download(void *dev, const bnb_tensor *t, bnb_tensor *dst, bnb_error *err) {
    Device &d = *static_cast<Device *>(dev);
    Use use(d);
    const void *planes[BNB_MAX_PLANES];
    std::memcpy(planes, t->plane, sizeof planes);
    if (t->layout == LAYOUT_NUMBERS) {
        const int64_t n = bnb_tensor_elements(t);
        float *wide = static_cast<float *>(bnb_alloc(d.env, static_cast<size_t>(n) * 4, err));
        if (!wide) return BNB_E_NOMEM;
        bnb_status s = device_read(dev, wide, t->plane[0], static_cast<uint64_t>(n) * 4, err);
        if (!s) s = bnb_convert(BNB_F32, wide, dst->type, dst->plane[0], n, err);
        bnb_free(d.env, wide, static_cast<size_t>(n) * 4);
        return s;
    }
#ifdef __CUDACC__
    if (t->layout == LAYOUT_TILE4) {
        const int N = static_cast<int>(t->shape[0]), K = static_cast<int>(t->shape[1]);
        const uint64_t codes = align_up(plane_bytes(t, 0)), nb = static_cast<uint64_t>(scales_of(t));
        char *room = unpacked(d, codes + nb * 4, err);
        if (!room) return BNB_E_NOMEM;
        planes[0] = room;
        d.queue.note(tile4::tile4_unpack(d.queue.stream, t->plane[0], t->quant.blocksize, N, K, reinterpret_cast<uint8_t *>(room), reinterpret_cast<float *>(room + codes)));
        if (!t->quant.double_quant) planes[1] = room + codes;
    }
#endif
    for (int p = 0; p < BNB_MAX_PLANES; p++)
        if (bnb_status s = plane_bytes(t, p) ? device_read(dev, dst->plane[p], planes[p], plane_bytes(t, p), err) : BNB_OK) return s;
    return BNB_OK;
}

/* ==== [API] ===================================================================================================== */

// The devices that can run our kernels, by the runtime's numbers.
struct Usable {
    int n = 0, ordinals[64];
    Usable() {
        int listed = 0;
        if (GPU(GetDeviceCount)(&listed) != GPU(Success)) listed = 0; // no driver
        (void)GPU(GetLastError)();
        for (int i = 0; i < listed && n < 64; i++)
            if (has_code(i)) ordinals[n++] = i;
    }
};
const Usable &usable() {
    static const Usable once;
    return once;
}

int32_t device_count() { return usable().n; }

void device_close(void *dev) {
    Device *d = static_cast<Device *>(dev);
    {
        Use use(*d);
        if (d->queue.stream) (void)GPU(StreamSynchronize)(d->queue.stream);
        forget_unpacked(*d);
        device_free(d, const_cast<float *>(d->maps), 32 * sizeof(float));
        if (d->dense) dense_close(*d->dense);
        delete d->dense;
        for (int i = 0; i < 2; i++) {
            if (d->staging[i]) (void)host_free(d->staging[i]);
            if (d->staged[i]) (void)GPU(EventDestroy)(d->staged[i]);
        }
        for (GPU(Event_t) done : d->fetch_done)
            if (done) (void)GPU(EventDestroy)(done);
        if (d->fetched) (void)host_free(d->fetched);
        if (d->fault) (void)host_free(d->fault);
        if (d->queue.stream) (void)GPU(StreamDestroy)(d->queue.stream);
    }
    delete d;
}

// The best of several readings of a buffer that no cache holds.
bnb_status measure_bandwidth(Device &d, double *bytes_per_s, bnb_error *err) {
    const uint64_t bytes = uint64_t{1} << 30;
    Queue &q = d.queue;
    char *buffer = static_cast<char *>(device_alloc(&d, bytes + ALIGN, err));
    if (!buffer) return BNB_E_NOMEM;
    GPU(Event_t) from = nullptr, to = nullptr;
    float best = INFINITY;
    q.note(GPU(EventCreate)(&from));
    q.note(GPU(EventCreate)(&to));
    q.note(GPU(MemsetAsync)(buffer, 1, bytes + ALIGN, q.stream));
    for (int i = 0; i < 12 && q.status == GPU(Success); i++) {
        float ms = 0;
        q.note(GPU(EventRecord)(from, q.stream));
        q.launch(read_kernel, dim3(static_cast<unsigned>(d.n_sm * 8)), dim3(THREADS), reinterpret_cast<const uint4 *>(buffer), static_cast<long>(bytes / 16),
                 reinterpret_cast<unsigned *>(buffer + bytes));
        q.note(GPU(EventRecord)(to, q.stream));
        q.note(GPU(EventSynchronize)(to));
        q.note(GPU(EventElapsedTime)(&ms, from, to));
        best = ms < best ? ms : best;
    }
    if (from) (void)GPU(EventDestroy)(from);
    if (to) (void)GPU(EventDestroy)(to);
    device_free(&d, buffer, bytes + ALIGN);
    *bytes_per_s = static_cast<double>(bytes) / (1e-3 * static_cast<double>(best));
    return queue_status(d, err, "measuring the device's bandwidth");
}

bnb_status device_info(void *dev, int32_t measure, bnb_device_info *info, bnb_error *err) {
    Device &d = *static_cast<Device *>(dev);
    Use use(d);
    size_t free = 0, total = 0;
    d.queue.note(GPU(MemGetInfo)(&free, &total));
    std::snprintf(info->description, sizeof info->description, "%s", d.description);
    info->total_bytes = total;
    info->free_bytes = free;
    info->used_bytes = d.bytes;
    info->peak_bytes = d.bytes_peak;
    if (bnb_status s = queue_status(d, err, "asking for the device's memory")) return s;
    return measure ? measure_bandwidth(d, &info->read_bandwidth, err) : BNB_OK;
}

#ifdef __CUDACC__
// What this program has code for, as the device finds it: the kernels of [TILE4] and [TILE8] are always there, but empty
// where the code that runs lacks their instructions.
enum { CODE_MMA = 1, CODE_OVERLAP = 2, CODE_HOPPER = 4 };
__global__ void code_kernel(int *has) {
    int code = 0;
#ifdef BNB__MMA
    code |= CODE_MMA;
#endif
#if __CUDA_ARCH__ >= 900
    code |= CODE_OVERLAP; // wait_for_previous waits
#endif
#ifdef BNB__HOPPER
    code |= CODE_HOPPER;
#endif
    *has = code;
}
int code_of(Device &d) {
    d.queue.launch(code_kernel, dim3(1), dim3(1), d.fault);
    d.queue.note(cudaStreamSynchronize(d.queue.stream));
    int code = d.queue.status == cudaSuccess ? *d.fault : 0;
    *d.fault = 0;
    d.queue.status = cudaSuccess;
    (void)cudaGetLastError();
    return code;
}
#endif

void *device_open(bnb_env *env, int32_t index, bnb_error *err) {
    Device *d = new (std::nothrow) Device{};
    if (!d) {
        bnb_fail(err, BNB_E_NOMEM, "out of memory for a device");
        return nullptr;
    }
    d->env = env;
    d->index = index;
    d->ordinal = usable().ordinals[index];
    Use use(*d);
    GPU_PROPERTIES properties;
    Queue &q = d->queue;
    q.note(GPU(GetDeviceProperties)(&properties, d->ordinal));
    q.note(load_tables());
    q.note(GPU(StreamCreateWithFlags)(&q.stream, GPU(StreamNonBlocking)));
    for (int i = 0; i < 2; i++) {
        q.note(host_alloc(reinterpret_cast<void **>(&d->staging[i]), STAGING_BYTES));
        q.note(GPU(EventCreateWithFlags)(&d->staged[i], GPU(EventDisableTiming)));
    }
    for (GPU(Event_t) &done : d->fetch_done) q.note(GPU(EventCreateWithFlags)(&done, GPU(EventDisableTiming)));
    q.note(host_alloc(reinterpret_cast<void **>(&d->fetched), BNB_FETCH_SLOTS * BNB_FETCH_BYTES));
    q.note(host_alloc(reinterpret_cast<void **>(&d->fault), sizeof *d->fault));
    if (d->fault) *d->fault = 0;
    bnb_status s = queue_status(*d, err, "opening the device");
    float *maps = s ? nullptr : static_cast<float *>(device_alloc(d, 32 * sizeof(float), err));
    d->maps = maps;
    if (!s && maps) s = device_write(d, maps, bnb_nf4_map, sizeof bnb_nf4_map, err);
    if (!s && maps) s = device_write(d, maps + 16, bnb_fp4_map, sizeof bnb_fp4_map, err);
    if (s || !maps) {
        device_close(d);
        return nullptr;
    }
    d->n_sm = properties.multiProcessorCount;
    d->major = properties.major;
    d->minor = properties.minor;
    std::snprintf(d->description, sizeof d->description, "%.80s, %d multiprocessors, %d.%d", properties.name, d->n_sm, d->major, d->minor);
    d->dense = new (std::nothrow) DenseLibrary{};
    if (d->dense) dense_open(*d->dense);
#ifdef __CUDACC__
    const int code = code_of(*d);
    q.overlap = d->major >= 9 && code & CODE_OVERLAP;
    if (code & CODE_MMA)
        d->mma = cudaDeviceGetAttribute(&d->max_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, d->ordinal) == cudaSuccess &&
                 tile4::linear4_init(d->ordinal, d->max_shared, false) == cudaSuccess && tile8::linear8_mma_init() == cudaSuccess &&
                 tile8::attention_mma_init() == cudaSuccess;
    if (code & CODE_HOPPER)
        d->tiles = d->mma && tile4::linear4_init(d->ordinal, d->max_shared, true) == cudaSuccess && tile8::linear8_init(d->ordinal) == cudaSuccess &&
                   tile8::attention_init(d->ordinal) == cudaSuccess;
    (void)cudaGetLastError();
#endif
    return d;
}

} // namespace

#ifdef __HIP_DEVICE_COMPILE__ // clang would give the device a copy of the table, and miss the functions there
[[maybe_unused]] static
#else
extern "C"
#endif
const bnb_backend_api GPU_TABLE = {
    sizeof(bnb_backend_api), GPU_NAME, device_count, device_open, device_close, device_sync, device_info, device_alloc, device_free, device_write, device_read,
    device_fetch_begin, device_fetch_end, device_place, device_upload, device_download, device_compile, device_release, device_describe, device_run,
};
