// bnb-cuda.cu: every GPU kernel and the device backend, written once in vendor-neutral names.
//
// Build: make CUDA=1, or: nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -c bnb-cuda.cu, and bnb.c with
//        -DBNB_CUDA. Needs the CUDA toolkit alone. bnb-hip.cpp defines the names of [CONF] for AMD and includes this file.
// Parts: [CONF] names   [DEV] memory and errors   [DEVICE] what kernels share   [PLAIN] kernels that run on every GPU
//        [PLAN] fusion and the choice of kernels   [RUN] captured graphs   [API] the table that bnb.c asks for
// Not:   no host round trip within a run: what changes per token is input data, checked by the kernels that follow it.
//        No managed memory, no streams of its own beyond one, no device code that depends on the wave size.
#ifndef GPU
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define GPU(name) cuda##name
#define GPU_NAME "cuda"
#define GPU_TABLE bnb_cuda_api
#define GPU_OUT_OF_MEMORY cudaErrorMemoryAllocation
#define GPU_PROPERTIES cudaDeviceProp
#endif

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
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

// bnb_tensor.layout of weights here
enum { LAYOUT_NUMBERS = 1 /* vectors, widened to f32 */, LAYOUT_PLANES /* canonical */ };

struct Device {
    bnb_env *env;
    int index;   // "cuda:index"
    int ordinal; // the runtime's number of it
    Queue queue;
    char *staging[2] = {};               // pinned, [STAGING_BYTES]: what crosses the bus goes through one or the other
    GPU(Event_t) staged[2] = {};         // the copy out of staging[i] is done
    char *fetched = nullptr;             // pinned, [BNB_FETCH_SLOTS][BNB_FETCH_BYTES]
    GPU(Event_t) fetch_done[BNB_FETCH_SLOTS] = {};
    int *fault = nullptr;                // pinned: 1 + the node that met an index outside its table; 0: none
    char *unpacked = nullptr;            // weights in their canonical layout, on the way to the kernels' own
    uint64_t unpacked_bytes = 0;
    uint64_t bytes = 0, bytes_peak = 0;  // allocated on the device
    int n_sm = 0, major = 0, minor = 0;
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

// LLM.int8(), in three kernels. Scratch: row scales f32 [M] | codes i8 [M, K] | outlier columns u8 [K].
struct Int8Rows {
    float *scale;
    signed char *codes;
    unsigned char *column;
};

__device__ float to_f16(float x) { return __half2float(__float2half_rn(x)); }
__device__ bool is_outlier(float x, float threshold) { return threshold > 0 && fabsf(x) >= threshold; }

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
__global__ void __launch_bounds__(THREADS) attention_kernel(Rows q, Rows k, Rows v, const int *span, int R, int D,
                                                            int group, float scale, Rows y, int *fault, int node) {
    __shared__ float query[PLAIN_HEAD], p[THREADS];
    wait_for_previous();
    long t = blockIdx.y, h = blockIdx.x, kv = h / group * D;
    int thread = threadIdx.x, lane = thread % LANES, first = span[2 * t], end = span[2 * t + 1];
    if (first < 0 || end < first || end > R) {
        *fault = node + 1;
        first = end = 0;
    }
    if (thread < D) query[thread] = get(q, t, h * D + thread) * scale;
    float top = -INFINITY, sum = 0, out = 0;
    for (int r0 = first; r0 < end; r0 += THREADS) {
        __syncthreads();
        int n = end - r0 < THREADS ? end - r0 : THREADS;
        for (int r = thread / LANES; r < THREADS; r += GROUPS) {
            float dot = 0;
            for (int d = lane; d < D && r < n; d += LANES) dot += query[d] * get(k, r0 + r, kv + d);
            dot = lane_sum(dot);
            if (lane == 0) p[r] = r < n ? dot : -INFINITY;
        }
        __syncthreads();
        float here = p[thread], larger = fmaxf(top, block_max(here)), shrink = expf(top - larger);
        here = expf(here - larger);
        p[thread] = here;
        sum = sum * shrink + block_sum(here); // its barriers publish p
        out *= shrink;
        top = larger;
        for (int r = 0; r < n && thread < D; r++) out += p[r] * get(v, r0 + r, kv + thread);
    }
    if (thread < D) put(y, t, h * D + thread, sum > 0 ? out / sum : 0);
}

// y[t] = the first index of the largest x[t]; -1 if there is a NaN. Keys order as (number, lower index first).
__global__ void argmax_kernel(Rows x, int *y, int C) {
    wait_for_previous();
    __shared__ unsigned long long best[32];
    long t = blockIdx.x;
    unsigned long long top = 0;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        float v = get(x, t, c);
        unsigned bits = __float_as_uint(v == 0 ? 0.0f : v); // -0 ties with 0
        bits = v != v ? 0xffffffffu : bits >> 31 ? ~bits : bits | 0x80000000u;
        unsigned long long key = static_cast<unsigned long long>(bits) << 32 | (0xffffffffu - static_cast<unsigned>(c));
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

void run_norm(Launch &l, const Step &s) {
    const bnb_tensor *y = s.y;
    unsigned threads = y->shape[0] < 32 ? 1024 : THREADS; // few rows: every thread counts
    l.q.launch(norm_kernel, dim3(static_cast<unsigned>(y->shape[0])), dim3(threads), l.rows(y->src[0]), l.numbers(y->src[1]), l.numbers(y->src[2]),
               y->params.norm.eps, y->op == BNB_OP_LAYER_NORM, l.rows(y), static_cast<int>(y->shape[1]));
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

void run_set_rows(Launch &l, const Step &s) {
    const bnb_tensor *a = s.nodes[0], *b = s.nodes.size() > 1 ? s.nodes[1] : nullptr;
    l.q.launch(set_rows_kernel, dim3(blocks(a->shape[1], THREADS), static_cast<unsigned>(a->src[1]->shape[0])), dim3(THREADS), l.rows(a->src[1]),
               l.rows(a->src[0]), b ? l.rows(b->src[1]) : Rows{}, b ? l.rows(b->src[0]) : Rows{},
               static_cast<const int *>(a->src[2]->plane[0]), static_cast<int>(a->shape[0]), static_cast<int>(a->shape[1]),
               l.plan.device->fault, l.node());
}

void run_linear(Launch &l, const Step &s) {
    for (const bnb_tensor *node : s.nodes) {
        const bnb_tensor *y = s.nodes.size() > 1 ? node : s.y;
        l.q.launch(linear_kernel, dim3(blocks(y->shape[1], GROUPS), blocks(y->shape[0], PLAIN_ROWS)), dim3(LANES, GROUPS), l.rows(node->src[0]),
                   l.weight(node->src[1]), l.epilogue(s, node), l.rows(y), static_cast<int>(y->shape[0]));
    }
}

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
    l.q.launch(attention_kernel, dim3(static_cast<unsigned>(heads), static_cast<unsigned>(y->shape[0])), dim3(THREADS), l.rows(y->src[0]), l.rows(k),
               l.rows(y->src[2]), static_cast<const int *>(y->src[3]->plane[0]), static_cast<int>(k->shape[0]),
               static_cast<int>(y->shape[1] / heads), heads / y->params.attention.n_head_kv, y->params.attention.scale, l.rows(y),
               l.plan.device->fault, l.node());
}

bool fits_head(const Compiled &, const Step &s) { return s.y->shape[1] / s.y->params.attention.n_head <= PLAIN_HEAD; }
bool fits_int8(const Compiled &, const Step &s) { return s.nodes[0]->src[1]->type == BNB_INT8; }
bool fits_canonical(const Compiled &, const Step &s) { return s.nodes[0]->src[1]->type != BNB_INT8; }

enum { TAKES_NORM = 1 }; // a linear kernel that can apply the norm in front of it

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
                a->shape[1] != b->shape[1] || a->src[0] == b->src[0])
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

    // A result lies as f16 when everything that reads it would round it to f16 anyway.
    bool takes_half(const bnb_tensor *user, const bnb_tensor *t) const {
        switch (user->op) {
        case BNB_OP_LINEAR: return user->src[0] == t && user->src[1]->type != BNB_F32;
        case BNB_OP_SET_ROWS: return user->src[1] == t && user->type == BNB_F16;
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
            if (!plan_.f16 || s.op == BNB_OP_SET_ROWS) continue;
            for (const bnb_tensor *t : s.nodes.size() > 1 && s.op == BNB_OP_LINEAR ? s.nodes : std::vector<const bnb_tensor *>{s.y}) {
                if (s.residual || !every_user_takes_half(t)) continue;
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

// The addresses that a captured graph was made for: where tensors lie now.
std::vector<const void *> addresses_of(const Compiled &plan, const char *scratch) {
    std::vector<const void *> list = {scratch};
    for (int i = 0; i < bnb_graph_size(plan.graph); i++) {
        const bnb_tensor *t = bnb_graph_node(plan.graph, i);
        list.push_back(t->plane[0]);
        for (const bnb_tensor *s : t->src)
            if (s && s->op == BNB_OP_NONE) list.push_back(s->plane[0]);
    }
    return list;
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
        std::vector<const void *> now = addresses_of(plan, work);
        if (!plan.exec || now != plan.addresses) {
            if (bnb_status s = capture(plan, d.queue, work, err)) return s;
            plan.addresses = std::move(now);
        }
    } catch (const std::bad_alloc &) {
        return bnb_fail(err, BNB_E_NOMEM, "out of memory for running a plan");
    }
    d.queue.note(GPU(GraphLaunch)(plan.exec, d.queue.stream));
    return queue_status(d, err, "running a plan");
}

/* ==== [WEIGHTS] ================================================================================================= */

uint64_t align_up(uint64_t n) { return (n + ALIGN - 1) / ALIGN * ALIGN; }

uint64_t plane_bytes(const bnb_tensor *t, int p) { return bnb_plane_bytes(t->type, &t->quant, t->n_dims, t->shape, p); }

void device_place(void *dev, bnb_tensor *t, int32_t compute_dtype) {
    (void)dev, (void)compute_dtype;
    t->layout = t->n_dims == 1 && !bnb_type_is_quantized(t->type) && bnb_type_bits(t->type) >= 16 && t->type != BNB_I32 ? LAYOUT_NUMBERS : LAYOUT_PLANES;
    t->layout_bytes = 0;
    if (t->layout == LAYOUT_NUMBERS) t->layout_bytes = static_cast<uint64_t>(bnb_tensor_elements(t)) * 4;
    else
        for (int p = 0; p < BNB_MAX_PLANES; p++) t->layout_bytes += align_up(plane_bytes(t, p));
}

bnb_status device_upload(void *dev, bnb_tensor *t, const bnb_tensor *src, bnb_error *err) {
    char *base = static_cast<char *>(t->plane[0]);
    if (t->layout == LAYOUT_NUMBERS) {
        int64_t n = bnb_tensor_elements(t);
        std::vector<float> wide;
        try {
            wide.resize(static_cast<size_t>(n));
        } catch (const std::bad_alloc &) {
            return bnb_fail(err, BNB_E_NOMEM, "tensor '%s': out of memory for %lld numbers", t->name, static_cast<long long>(n));
        }
        bnb_status s = bnb_convert(src->type, src->plane[0], BNB_F32, wide.data(), n, err);
        return s ? s : device_write(dev, base, wide.data(), static_cast<uint64_t>(n) * 4, err);
    }
    for (int p = 0; p < BNB_MAX_PLANES; p++) {
        uint64_t bytes = plane_bytes(t, p);
        t->plane[p] = bytes || p == 0 ? base : nullptr;
        if (bnb_status s = bytes ? device_write(dev, base, src->plane[p], bytes, err) : BNB_OK) return s;
        base += align_up(bytes);
    }
    return BNB_OK;
}

bnb_status device_download(void *dev, const bnb_tensor *t, bnb_tensor *dst, bnb_error *err) {
    if (t->layout == LAYOUT_NUMBERS) {
        int64_t n = bnb_tensor_elements(t);
        std::vector<float> wide;
        try {
            wide.resize(static_cast<size_t>(n));
        } catch (const std::bad_alloc &) {
            return bnb_fail(err, BNB_E_NOMEM, "tensor '%s': out of memory for %lld numbers", t->name, static_cast<long long>(n));
        }
        bnb_status s = device_read(dev, wide.data(), t->plane[0], static_cast<uint64_t>(n) * 4, err);
        return s ? s : bnb_convert(BNB_F32, wide.data(), dst->type, dst->plane[0], n, err);
    }
    for (int p = 0; p < BNB_MAX_PLANES; p++) {
        uint64_t bytes = plane_bytes(t, p);
        if (bnb_status s = bytes ? device_read(dev, dst->plane[p], t->plane[p], bytes, err) : BNB_OK) return s;
    }
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
    if (bnb_status s = queue_status(*d, err, "opening the device")) {
        (void)s;
        device_close(d);
        return nullptr;
    }
    *d->fault = 0;
    d->n_sm = properties.multiProcessorCount;
    d->major = properties.major;
    d->minor = properties.minor;
    std::snprintf(d->description, sizeof d->description, "%.80s, %d multiprocessors, %d.%d", properties.name, d->n_sm, d->major, d->minor);
#ifdef __CUDACC__
    q.overlap = d->major >= 9;
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
    sizeof(bnb_backend_api), GPU_NAME, device_count, device_open, device_close, device_info, device_alloc, device_free, device_write, device_read,
    device_fetch_begin, device_fetch_end, device_place, device_upload, device_download, device_compile, device_release, device_describe, device_run,
};
