// hip_host.h: the host's side of HIP for kernels on the CPU; see hip_runtime.h, which includes it.
//
// A stream is a list of work that is done when something waits for it, or when memory is freed: a result that was not
// waited for is not there yet.
#pragma once

enum hipError_t {
    hipSuccess = 0,
    hipErrorInvalidValue = 1,
    hipErrorOutOfMemory = 2,
    hipErrorInvalidConfiguration = 9,
    hipErrorInvalidDevice = 101,
    hipErrorNoBinaryForGpu = 209,
    hipErrorStreamCaptureUnsupported = 900
};
enum hipMemcpyKind { hipMemcpyHostToHost, hipMemcpyHostToDevice, hipMemcpyDeviceToHost, hipMemcpyDeviceToDevice };
enum hipStreamCaptureMode { hipStreamCaptureModeGlobal, hipStreamCaptureModeThreadLocal, hipStreamCaptureModeRelaxed };
enum { hipStreamNonBlocking = 1, hipEventDisableTiming = 2, hipHostMallocDefault = 0 };

struct hipDeviceProp_t {
    char name[256], gcnArchName[256];
    int multiProcessorCount, major, minor;
};

namespace emu {

constexpr uint64_t MEMORY_BYTES = 1 << 30;
constexpr int LARGEST_BLOCK = 1024, N_DEVICES = 2;

using Work = std::vector<std::function<void()>>;
struct Stream {
    std::deque<std::function<void()>> work;
    Work *capture = nullptr;
};
struct Event {
    Stream *stream = nullptr;
    uint64_t recorded = 0, done = 0;
};

struct Host {
    Stream standard; // NULL means this one
    std::vector<Stream *> streams = {&standard};
    std::map<char *, uint64_t> memory; // address -> bytes, of the device
    uint64_t bytes = 0;
    hipError_t last = hipSuccess;
    int device = 0;
};
inline Host host;

inline Stream *stream(Stream *s) { return s ? s : &host.standard; }

inline hipError_t result(hipError_t e) {
    if (e) host.last = e;
    return e;
}

inline void run_next(Stream *s) {
    std::function<void()> work = std::move(s->work.front());
    s->work.pop_front();
    work();
}
inline void finish(Stream *s) {
    while (!s->work.empty()) run_next(s);
}
inline void finish_all() {
    for (Stream *s : host.streams) finish(s);
}

inline hipError_t submit(Stream *s, std::function<void()> work) {
    s = stream(s);
    if (s->capture) s->capture->push_back(std::move(work));
    else s->work.push_back(std::move(work));
    return hipSuccess;
}

inline bool on_device(const void *p, uint64_t bytes) {
    char *at = static_cast<char *>(const_cast<void *>(p));
    auto it = host.memory.upper_bound(at);
    return it != host.memory.begin() && (--it, at + bytes <= it->first + it->second);
}

template <class... P> void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, Stream *s, P... args) {
    if (!grid.count() || !block.count() || block.count() > LARGEST_BLOCK || shared)
        result(hipErrorInvalidConfiguration);
    else if (host.device == 0) result(hipErrorNoBinaryForGpu);
    else submit(s, [=] { run_grid(grid, block, [=] { kernel(args...); }); });
}

} // namespace emu

#define hipLaunchKernelGGL(...) ::emu::launch(__VA_ARGS__)

using hipStream_t = emu::Stream *;
using hipEvent_t = emu::Event *;
using hipGraph_t = emu::Work *;
using hipGraphExec_t = emu::Work *;

inline const char *hipGetErrorString(hipError_t e) {
    switch (e) {
    case hipSuccess: return "no error";
    case hipErrorOutOfMemory: return "out of memory";
    case hipErrorInvalidConfiguration: return "invalid configuration argument";
    case hipErrorInvalidDevice: return "invalid device ordinal";
    case hipErrorNoBinaryForGpu: return "no kernel image is available for execution on the device";
    case hipErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    default: return "invalid argument";
    }
}
inline hipError_t hipGetLastError() {
    hipError_t e = emu::host.last;
    emu::host.last = hipSuccess;
    return e;
}

inline hipError_t hipGetDeviceCount(int *n) {
    *n = emu::N_DEVICES;
    return hipSuccess;
}
inline hipError_t hipGetDevice(int *device) {
    *device = emu::host.device;
    return hipSuccess;
}
inline hipError_t hipSetDevice(int device) {
    if (device < 0 || device >= emu::N_DEVICES) return emu::result(hipErrorInvalidDevice);
    emu::host.device = device;
    return hipSuccess;
}
inline hipError_t hipGetDeviceProperties(hipDeviceProp_t *p, int device) {
    if (device < 0 || device >= emu::N_DEVICES) return emu::result(hipErrorInvalidDevice);
    *p = {"CPU", "none", 4, 0, 0};
    return hipSuccess;
}

/* ---- memory ---- */

template <class T> hipError_t hipMalloc(T **p, size_t bytes) {
    *p = nullptr;
    if (bytes > emu::MEMORY_BYTES - emu::host.bytes) return emu::result(hipErrorOutOfMemory);
    char *memory = static_cast<char *>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
    std::memset(memory, 0xff, bytes);
    emu::host.memory[memory] = bytes;
    emu::host.bytes += bytes;
    *p = reinterpret_cast<T *>(memory);
    return hipSuccess;
}
inline hipError_t hipFree(void *p) {
    emu::finish_all();
    if (!p) return hipSuccess;
    auto it = emu::host.memory.find(static_cast<char *>(p));
    if (it == emu::host.memory.end()) return emu::result(hipErrorInvalidValue);
    emu::host.bytes -= it->second;
    emu::host.memory.erase(it);
    std::free(p);
    return hipSuccess;
}
inline hipError_t hipMemGetInfo(size_t *free, size_t *total) {
    *free = emu::MEMORY_BYTES - emu::host.bytes;
    *total = emu::MEMORY_BYTES;
    return hipSuccess;
}
inline hipError_t hipHostMalloc(void **p, size_t bytes, unsigned) {
    *p = std::memset(std::malloc(bytes), 0xff, bytes);
    return hipSuccess;
}
inline hipError_t hipHostFree(void *p) {
    emu::finish_all();
    std::free(p);
    return hipSuccess;
}
inline hipError_t hipMemcpyAsync(void *dst, const void *src, size_t bytes, hipMemcpyKind kind, hipStream_t s) {
    bool from = kind == hipMemcpyDeviceToHost || kind == hipMemcpyDeviceToDevice; // the device
    bool to = kind == hipMemcpyHostToDevice || kind == hipMemcpyDeviceToDevice;
    if (emu::on_device(src, bytes) != from || emu::on_device(dst, bytes) != to)
        return emu::result(hipErrorInvalidValue);
    return emu::submit(s, [=] { std::memmove(dst, src, bytes); });
}

inline hipError_t hipMemsetAsync(void *dst, int value, size_t bytes, hipStream_t s) {
    if (!emu::on_device(dst, bytes)) return emu::result(hipErrorInvalidValue);
    return emu::submit(s, [=] { std::memset(dst, value, bytes); });
}
#define HIP_SYMBOL(name) (&(name))
inline hipError_t hipMemcpyToSymbol(void *symbol, const void *src, size_t bytes, size_t offset, hipMemcpyKind) {
    std::memcpy(static_cast<char *>(symbol) + offset, src, bytes);
    return hipSuccess;
}

/* ---- streams, events, graphs ---- */

inline hipError_t hipStreamCreateWithFlags(hipStream_t *s, unsigned) {
    *s = new emu::Stream;
    emu::host.streams.push_back(*s);
    return hipSuccess;
}
inline hipError_t hipStreamDestroy(hipStream_t s) {
    emu::finish(s);
    std::vector<hipStream_t> &all = emu::host.streams;
    all.erase(std::find(all.begin(), all.end(), s));
    delete s;
    return hipSuccess;
}
inline hipError_t hipStreamSynchronize(hipStream_t s) {
    s = emu::stream(s);
    if (s->capture) return emu::result(hipErrorStreamCaptureUnsupported);
    emu::finish(s);
    return hipSuccess;
}

inline hipError_t hipEventCreateWithFlags(hipEvent_t *e, unsigned) {
    *e = new emu::Event;
    return hipSuccess;
}
inline hipError_t hipEventCreate(hipEvent_t *e) { return hipEventCreateWithFlags(e, 0); }
inline hipError_t hipEventRecord(hipEvent_t e, hipStream_t s) {
    uint64_t n = ++e->recorded;
    e->stream = emu::stream(s);
    return emu::submit(s, [=] { e->done = n; });
}
inline hipError_t hipEventSynchronize(hipEvent_t e) {
    while (e->done < e->recorded) emu::run_next(e->stream);
    return hipSuccess;
}
inline hipError_t hipEventDestroy(hipEvent_t e) {
    (void)hipEventSynchronize(e);
    delete e;
    return hipSuccess;
}
inline hipError_t hipEventElapsedTime(float *ms, hipEvent_t, hipEvent_t) {
    *ms = 0.001f;
    return hipSuccess;
}

inline hipError_t hipStreamBeginCapture(hipStream_t s, hipStreamCaptureMode) {
    s->capture = new emu::Work;
    return hipSuccess;
}
inline hipError_t hipStreamEndCapture(hipStream_t s, hipGraph_t *g) {
    *g = s->capture;
    s->capture = nullptr;
    return hipSuccess;
}
inline hipError_t hipGraphInstantiate(hipGraphExec_t *exec, hipGraph_t g, void *, char *, size_t) {
    *exec = new emu::Work(*g);
    return hipSuccess;
}
inline hipError_t hipGraphLaunch(hipGraphExec_t exec, hipStream_t s) {
    for (const std::function<void()> &work : *exec) emu::submit(s, work);
    return hipSuccess;
}
inline hipError_t hipGraphExecDestroy(hipGraphExec_t exec) {
    delete exec;
    return hipSuccess;
}
inline hipError_t hipGraphDestroy(hipGraph_t g) {
    delete g;
    return hipSuccess;
}
