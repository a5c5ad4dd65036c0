// util.h: what the suites share: seeded numbers, an env whose memory is watched, a graph that is filled and run in a few
// lines, and files that disappear again.
//
// Use:   Env env;                                              // one thread, all kernels; checks its memory at the end
//        Net net(env);
//        bnb_tensor *x = net.input({2, 3}, {1, 2, 3, 4, 5, 6});
//        std::vector<float> y = net.run(bnb_relu(net.ctx, x)); // or run_op(env, [](Net &net) { ... })
// Not:   nothing here depends on models/.
#pragma once

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#include <dirent.h>
#include <unistd.h>

#include "../bnb.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TEST_ASAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define TEST_ASAN 1
#endif
#ifdef TEST_ASAN
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

namespace test {

using Shape = std::vector<int64_t>;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

// ---- random numbers --------------------------------------------------------------------------------------------------

class Rng { // splitmix64: any seed is a good one
public:
    explicit Rng(uint64_t seed) : state_(seed) {}

    uint64_t next() {
        uint64_t z = state_ += 0x9E3779B97F4A7C15u;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        return z ^ z >> 31;
    }
    int64_t range(int64_t low, int64_t high) { return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1)); } // both ends
    double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
    bool chance(double p) { return uniform() < p; }
    float normal(double scale = 1) { // Box and Muller
        double u = 1 - uniform(), v = uniform();
        return static_cast<float>(scale * std::sqrt(-2 * std::log(u)) * std::cos(6.283185307179586 * v));
    }
    Floats normals(int64_t n, double scale = 1) {
        Floats v(static_cast<size_t>(n));
        for (float &x : v) x = normal(scale);
        return v;
    }
    template <class T> const T &pick(const std::vector<T> &list) { return list[static_cast<size_t>(next() % list.size())]; }

private:
    uint64_t state_;
};

// ---- 16-bit numbers, written from their definition -------------------------------------------------------------------

inline double f16_value(uint16_t h) {
    int e = h >> 10 & 31, m = h & 1023;
    double v = e == 31 ? (m ? NAN : INFINITY) : e ? std::ldexp(1024 + m, e - 25) : std::ldexp(m, -24);
    return h >> 15 ? -v : v;
}

inline double bf16_value(uint16_t h) {
    uint32_t u = static_cast<uint32_t>(h) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

// The nearest value of a 16-bit type, ties to even: through the neighbours' values, not through their bits.
inline double round_to(int32_t type, double v) {
    if (type == BNB_F32 || std::isnan(v)) return type == BNB_F32 ? static_cast<float>(v) : v;
    uint16_t largest = type == BNB_F16 ? 0x7bff : 0x7f7f, low = 0, high = largest;
    auto value = [&](uint16_t h) { return type == BNB_F16 ? f16_value(h) : bf16_value(h); };
    double a = std::fabs(v), top = value(largest), step = top - value(static_cast<uint16_t>(largest - 1));
    if (a >= top + step / 2) return std::copysign(INFINITY, v);
    while (high - low > 1) {
        uint16_t mid = static_cast<uint16_t>((low + high) / 2);
        (value(mid) <= a ? low : high) = mid;
    }
    double down = a - value(low), up = value(high) - a;
    return std::copysign(value(down < up || (down == up && low % 2 == 0) ? low : high), v);
}

// ---- memory ----------------------------------------------------------------------------------------------------------

// The allocator of a test's env. New memory is full of 0xff (NaN as f32, -1 as i32), so what is read before it is written
// shows. Bytes around every block are guarded: by AddressSanitizer where it is on, else by a look when they are freed.
// Nothing here uses operator new, which may be made to fail as well (test_oom.cpp).
class Memory {
public:
    // The allocation to fail: 1 is the next one, 0 none. on_and_on: the ones after it as well.
    void fail(int64_t which, bool on_and_on = false) {
        std::lock_guard<std::mutex> hold(lock_);
        fail_at_ = which;
        on_and_on_ = on_and_on;
        n_failed_ = 0;
    }
    int64_t n_failed() const { return n_failed_; }
    size_t n_blocks() const { return n_blocks_; }
    std::string fault() const { return fault_; } // the first thing that went wrong, or ""

    // The block that p points into: its bytes. 0: none
    size_t block_of(const void *p, const uint8_t **begin) {
        std::lock_guard<std::mutex> hold(lock_);
        for (const Block *b = first_; b; b = b->next) {
            *begin = reinterpret_cast<const uint8_t *>(b) + sizeof(Block) + GUARD;
            if (p >= *begin && p < *begin + b->size) return b->size;
        }
        return 0;
    }

    static void *hook(void *user, void *old, size_t old_size, size_t new_size, size_t align) {
        Memory *m = static_cast<Memory *>(user);
        std::lock_guard<std::mutex> hold(m->lock_);
        void *p = new_size ? m->take(new_size, align) : nullptr;
        if (new_size && !p) return nullptr;
        if (old && p) std::memcpy(p, old, old_size < new_size ? old_size : new_size);
        if (old) m->give(static_cast<uint8_t *>(old), old_size);
        return p;
    }

private:
    enum { GUARD = 64, GUARD_BYTE = 0xA5, NEW_BYTE = 0xff, OLD_BYTE = 0xdd };
    struct Block { // then GUARD bytes, then the caller's, then GUARD bytes
        Block *next, *previous;
        size_t size, front; // front: from what malloc gave to the caller's bytes
        uint64_t magic;
    };
    static constexpr uint64_t MAGIC = 0x626e62746d656d21;
    std::mutex lock_;
    Block *first_ = nullptr;
    char fault_[160] = "";
    int64_t fail_at_ = 0, n_failed_ = 0;
    size_t n_blocks_ = 0;
    bool on_and_on_ = false;

    void *take(size_t size, size_t align) {
        if (fail_at_ > 0 && --fail_at_ == 0) {
            if (on_and_on_) fail_at_ = 1;
            n_failed_++;
            return nullptr;
        }
        if (align == 0 || (align & (align - 1)) || align > 4096) return note("an alignment that is not a power of two up to 4096", align), nullptr;
        size_t front = align < 128 ? 128 : align;
        static_assert(sizeof(Block) + GUARD <= 128, "the front holds both");
        void *raw = nullptr;
        if (size > SIZE_MAX / 2 || posix_memalign(&raw, front, front + size + GUARD)) return nullptr;
        uint8_t *p = static_cast<uint8_t *>(raw) + front;
        Block *b = reinterpret_cast<Block *>(p - GUARD - sizeof(Block));
        *b = {first_, nullptr, size, front, MAGIC};
        if (first_) first_->previous = b;
        first_ = b;
        n_blocks_++;
        std::memset(p - GUARD, GUARD_BYTE, GUARD);
        std::memset(p, NEW_BYTE, size);
        std::memset(p + size, GUARD_BYTE, GUARD);
        ASAN_POISON_MEMORY_REGION(p - GUARD, GUARD);
        ASAN_POISON_MEMORY_REGION(p + size, GUARD);
        return p;
    }
    void give(uint8_t *p, size_t old_size) {
        Block *b = reinterpret_cast<Block *>(p - GUARD - sizeof(Block));
        if (b->magic != MAGIC) return note("memory that was not allocated here, or was freed before, is freed", old_size);
        if (old_size != b->size) note("a block is freed with another size", old_size);
        ASAN_UNPOISON_MEMORY_REGION(p - GUARD, GUARD + b->size + GUARD);
        for (size_t i = 0; i < GUARD; i++) {
            if (p[-1 - static_cast<ptrdiff_t>(i)] != GUARD_BYTE) note("bytes before a block were written, of size", b->size);
            if (p[b->size + i] != GUARD_BYTE) note("bytes behind a block were written, of size", b->size);
        }
        (b->previous ? b->previous->next : first_) = b->next;
        if (b->next) b->next->previous = b->previous;
        n_blocks_--;
        b->magic = 0;
        std::memset(p, OLD_BYTE, b->size);
        std::free(p - b->front);
    }
    void note(const char *what, size_t number) {
        if (!fault_[0]) std::snprintf(fault_, sizeof fault_, "%s: %zu", what, number);
    }
};

// ---- messages --------------------------------------------------------------------------------------------------------

inline std::string text(const bnb_error &err) { return std::string(err.msg, strnlen(err.msg, sizeof err.msg)); }
inline std::string type_name(int32_t type) { return bnb_type_name(type) ? bnb_type_name(type) : "?"; }
inline std::string op_name(int32_t op) { return bnb_op_name(op) ? bnb_op_name(op) : "?"; }
inline bool contains(const std::string &text, const std::string &part) { return text.find(part) != std::string::npos; }

// One sentence: some words, no newline, ended by NUL within the array.
inline bool is_sentence(const bnb_error &err) {
    std::string s = text(err);
    return s.size() > 8 && s.size() < sizeof err.msg && !contains(s, "\n") && contains(s, " ") && !contains(s, "(null)");
}

// ---- env -------------------------------------------------------------------------------------------------------------

class Env {
public:
    Memory memory;
    std::function<void(int32_t level, const char *line)> on_log;
    std::function<bool(const char *phase, double fraction)> on_progress; // false: cancel

    explicit Env(int32_t threads = 1, uint32_t cpu_disable = 0) {
        bnb_error err = {};
        bnb_env_params p;
        bnb_env_params_default(&p, sizeof p);
        p.n_threads = threads;
        p.cpu_disable = cpu_disable;
        p.alloc = alloc;
        p.log = log;
        p.progress = progress;
        p.user = this;
        env_ = bnb_env_create(&p, &err);
        REQUIRE_MESSAGE(env_, text(err));
    }
    ~Env() { close(); }
    Env(const Env &) = delete;
    Env &operator=(const Env &) = delete;

    // Frees the env early. Nothing may be left of it.
    void close() {
        bnb_env_free(env_);
        if (env_) CHECK_MESSAGE(memory.n_blocks() == 0, "memory was not given back when the env was freed");
        env_ = nullptr;
        CHECK(memory.fault() == "");
    }
    operator bnb_env *() const { return env_; }
    bnb_backend *cpu() {
        bnb_error err = {};
        if (!cpu_) cpu_ = bnb_backend_open(env_, "cpu", &err);
        REQUIRE_MESSAGE(cpu_, text(err));
        return cpu_;
    }

private:
    bnb_env *env_ = nullptr;
    bnb_backend *cpu_ = nullptr;

    static void *alloc(void *user, void *old, size_t old_size, size_t new_size, size_t align) {
        return Memory::hook(&static_cast<Env *>(user)->memory, old, old_size, new_size, align);
    }
    static void log(void *user, int32_t level, const char *line) {
        const Env *self = static_cast<Env *>(user);
        if (self->on_log) self->on_log(level, line);
    }
    static int32_t progress(void *user, const char *phase, double fraction) {
        const Env *self = static_cast<Env *>(user);
        return !self->on_progress || self->on_progress(phase, fraction);
    }
};

// The sets of kernels to test: whatever this machine lacks is left out.
struct Level {
    std::string name;
    uint32_t disable;
};

inline std::vector<Level> cpu_levels() {
    const uint32_t amx = BNB_CPU_AMX, with_bf16 = amx | BNB_CPU_AVX512_BF16 | BNB_CPU_AVX512_VNNI;
    std::vector<Level> levels;
    std::vector<uint32_t> seen;
    for (Level l : {Level{"plain", BNB_CPU_FAST}, Level{"AVX2", with_bf16 | BNB_CPU_AVX512}, Level{"AVX-512", with_bf16},
                    Level{"AVX-512 with VNNI and BF16", amx}, Level{"everything", 0}}) {
        Env env(1, l.disable);
        uint32_t cpu = bnb_env_cpu(env);
        CHECK((cpu & l.disable) == 0);
        bool known = false;
        for (uint32_t s : seen) known |= s == cpu;
        if (known) continue;
        seen.push_back(cpu);
        levels.push_back(l);
    }
    return levels;
}

struct FreeCtx { void operator()(bnb_ctx *c) const { bnb_ctx_free(c); } };
struct FreePlan { void operator()(bnb_plan *p) const { bnb_plan_free(p); } };
struct FreeFile { void operator()(bnb_file *f) const { bnb_file_free(f); } };
struct FreeBackend { void operator()(bnb_backend *b) const { bnb_backend_close(b); } };
using Ctx = std::unique_ptr<bnb_ctx, FreeCtx>;
using Plan = std::unique_ptr<bnb_plan, FreePlan>;
using File = std::unique_ptr<bnb_file, FreeFile>;
using Backend = std::unique_ptr<bnb_backend, FreeBackend>;

inline int64_t count(const Shape &shape) {
    int64_t n = 1;
    for (int64_t s : shape) n *= s;
    return n;
}

inline bnb_quant quant4(int32_t type, int32_t blocksize, bool double_quant) {
    bnb_quant q = bnb_quant_default(type);
    q.blocksize = blocksize;
    q.double_quant = double_quant;
    return q;
}

inline bnb_quant blocks_of(int64_t columns) { // of int8_kv
    bnb_quant q = bnb_quant_default(BNB_INT8_KV);
    q.blocksize = static_cast<int32_t>(columns);
    return q;
}

// Rows of numbers [R, C] as an int8_kv tensor keeps them: the rule that stands at bnb_set_rows.
struct Int8Kv {
    std::vector<int8_t> codes; // [R, C]
    Floats absmax;             // [C / B, R]
};
inline Int8Kv int8_kv_of(const Floats &x, int64_t R, int64_t C, int64_t B) {
    Int8Kv kv = {std::vector<int8_t>(x.size()), Floats(static_cast<size_t>(R * C / B))};
    for (int64_t r = 0; r < R; r++)
        for (int64_t b = 0; b < C / B; b++) {
            const float *block = x.data() + r * C + b * B;
            float top = 0;
            bool finite = true;
            for (int64_t i = 0; i < B; i++) finite = finite && std::isfinite(block[i]), top = std::max(top, std::fabs(block[i]));
            if (top < 0x1p-120f) top = 0;
            for (int64_t i = 0; i < B; i++) {
                volatile float scale = 127.0f / top, v = block[i] * scale; // two roundings
                kv.codes[static_cast<size_t>(r * C + b * B + i)] = finite && top > 0 ? static_cast<int8_t>(std::rint(v)) : int8_t{0};
            }
            kv.absmax[static_cast<size_t>(b * R + r)] = finite ? top : NAN;
        }
    return kv;
}
inline Floats int8_kv_values(const int8_t *codes, const float *absmax, int64_t R, int64_t C, int64_t B) {
    Floats v;
    for (int64_t i = 0; i < R * C; i++)
        v.push_back(static_cast<float>(codes[i] * static_cast<double>(absmax[i % C / B * R + i / C]) / 127));
    return v;
}

// What a tensor holds, decoded here from its planes: contiguous, RESIDENT on the host.
inline Doubles decode(const bnb_tensor *t) {
    int64_t n = bnb_tensor_elements(t);
    const bnb_quant *q = bnb_tensor_quant(t);
    int32_t type = bnb_tensor_type(t);
    const uint8_t *codes = static_cast<const uint8_t *>(bnb_tensor_plane(t, 0));
    auto f32 = [&](int32_t plane, int64_t i) {
        float f;
        std::memcpy(&f, static_cast<const char *>(bnb_tensor_plane(t, plane)) + 4 * i, 4);
        return static_cast<double>(f);
    };
    Doubles v(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; i++) {
        double &x = v[static_cast<size_t>(i)];
        uint16_t h;
        if (type == BNB_F32) {
            x = f32(0, i);
        } else if (type == BNB_F16 || type == BNB_BF16) {
            std::memcpy(&h, codes + 2 * i, 2);
            x = type == BNB_F16 ? f16_value(h) : bf16_value(h);
        } else if (type == BNB_INT8) {
            x = static_cast<int8_t>(codes[i]) * f32(1, i / bnb_tensor_shape(t)[1]) / 127;
        } else {
            int64_t block = i / q->blocksize;
            double absmax = q->double_quant ? f32(3, static_cast<const uint8_t *>(bnb_tensor_plane(t, 1))[block]) * f32(2, block / 256) + static_cast<double>(q->nested_offset)
                                            : f32(1, block);
            uint8_t code = i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4;
            x = absmax * static_cast<double>((type == BNB_NF4 ? bnb_nf4_map : bnb_fp4_map)[code]);
        }
    }
    return v;
}

// ---- a graph with its values -----------------------------------------------------------------------------------------

class Net {
public:
    bnb_ctx *ctx;
    bnb_plan *plan = nullptr;
    bnb_graph *graph = nullptr;
    bnb_plan_params params;

    // device: NULL for the env's CPU; else weights are uploaded to it and the plan runs there
    explicit Net(Env &env, bnb_backend *device = nullptr) : env_(env), device_(device) {
        bnb_error err = {};
        bnb_plan_params_default(&params, sizeof params);
        ctx = bnb_ctx_create(env, &err);
        REQUIRE_MESSAGE(ctx, text(err));
    }
    ~Net() {
        bnb_plan_free(plan);
        bnb_ctx_free(ctx);
    }
    Net(const Net &) = delete;
    Net &operator=(const Net &) = delete;

    Env &env() { return env_; }

    bnb_tensor *input(const Shape &shape, const Floats &values, const char *name = "x") {
        return keep(bnb_input(ctx, BNB_F32, dims(shape), shape.data(), name), bytes_of(values), true);
    }
    bnb_tensor *ids(const Shape &shape, const std::vector<int32_t> &values, const char *name = "ids") {
        return keep(bnb_input(ctx, BNB_I32, dims(shape), shape.data(), name), bytes_of(values), true);
    }
    // A weight or a cache of any type from f32 values.
    bnb_tensor *weight(int32_t type, const Shape &shape, const Floats &values, const bnb_quant *quant = nullptr, const char *name = "w") {
        if (device_) return uploaded(type, shape, values, quant, name);
        return keep(bnb_tensor_new(ctx, type, quant, dims(shape), shape.data(), name), bytes_of(values), false);
    }

    // Graph, plan, memory and values: everything before the first run.
    void prepare(const std::vector<bnb_tensor *> &outputs) {
        bnb_error err = {};
        graph = bnb_graph_create(ctx, outputs.data(), static_cast<int32_t>(outputs.size()), &err);
        REQUIRE_MESSAGE(graph, text(err));
        bnb_backend *backend = device_ ? device_ : env_.cpu();
        plan = bnb_plan_create(backend, graph, &params, &err);
        REQUIRE_MESSAGE(plan, text(err));
        bnb_status status = bnb_ctx_alloc(ctx, backend, &err);
        REQUIRE_MESSAGE(status == BNB_OK, text(err));
        status = bnb_plan_alloc(plan, &err);
        REQUIRE_MESSAGE(status == BNB_OK, text(err));
        for (Value &v : values_) v.input ? write(v) : fill(v);
    }
    // Runs the plan and looks at what it must not change: inputs, weights, and with no_reuse the bytes between tensors.
    void again() {
        bnb_error err = {};
        std::vector<uint64_t> before = hashes();
        bnb_status status = bnb_plan_run(plan, &err);
        REQUIRE_MESSAGE(status == BNB_OK, text(err));
        CHECK_MESSAGE(before == hashes(), "running the plan changed an input or a weight");
        if (params.no_reuse && !device_) check_gaps();
    }
    Floats run(bnb_tensor *output) {
        prepare({output});
        again();
        return read(output);
    }
    Floats read(const bnb_tensor *t) {
        bnb_error err = {};
        Floats v(static_cast<size_t>(bnb_tensor_elements(t)));
        std::vector<uint8_t> raw(v.size() * static_cast<size_t>(bnb_type_bits(bnb_tensor_type(t)) / 8));
        bnb_status status = bnb_tensor_read(t, 0, raw.data(), raw.size(), &err);
        REQUIRE_MESSAGE(status == BNB_OK, text(err));
        if (bnb_tensor_type(t) == BNB_INT8_KV) {
            const int64_t R = t->shape[0], C = t->shape[1], B = t->quant.blocksize;
            Floats absmax(static_cast<size_t>(R * C / B));
            bnb_tensor scales = *t; // reading reads plane 0
            scales.type = BNB_F32, scales.n_dims = 1, scales.shape[0] = R * C / B, scales.shape[1] = 1, scales.plane[0] = t->plane[1];
            status = bnb_tensor_read(&scales, 0, absmax.data(), absmax.size() * 4, &err);
            REQUIRE_MESSAGE(status == BNB_OK, text(err));
            return int8_kv_values(reinterpret_cast<const int8_t *>(raw.data()), absmax.data(), R, C, B);
        }
        if (bnb_tensor_type(t) == BNB_I32) {
            for (size_t i = 0; i < v.size(); i++) {
                int32_t n;
                std::memcpy(&n, &raw[4 * i], 4);
                v[i] = static_cast<float>(n);
            }
            return v;
        }
        status = bnb_convert(bnb_tensor_type(t), raw.data(), BNB_F32, v.data(), static_cast<int64_t>(v.size()), &err);
        REQUIRE_MESSAGE(status == BNB_OK, text(err));
        return v;
    }
    // Gives an input other values.
    template <class T> void set(bnb_tensor *t, const std::vector<T> &values) {
        bnb_error err = {};
        bnb_status status = bnb_tensor_write(t, 0, values.data(), values.size() * sizeof(T), &err);
        REQUIRE_MESSAGE(status == BNB_OK, text(err));
    }
    std::string describe() const {
        std::string all(bnb_plan_describe(plan, nullptr, 0) + 1, '\0');
        bnb_plan_describe(plan, &all[0], all.size());
        all.pop_back();
        return all;
    }

private:
    struct Value {
        bnb_tensor *tensor;
        std::vector<uint8_t> bytes; // inputs: as they are; weights: f32 values
        bool input;
    };
    Env &env_;
    bnb_backend *device_;
    std::vector<Value> values_;

    bnb_tensor *uploaded(int32_t type, const Shape &shape, const Floats &values, const bnb_quant *quant, const char *name) {
        bnb_error err = {};
        Net host(env_);
        bnb_tensor *src = host.weight(type, shape, values, quant, name);
        bnb_status status = bnb_ctx_alloc(host.ctx, env_.cpu(), &err);
        REQUIRE_MESSAGE(status == BNB_OK, text(err));
        host.fill(host.values_[0]);
        bnb_tensor *t = bnb_tensor_place(ctx, device_, src, params.compute_dtype);
        if (!t) bnb_ctx_status(ctx, &err);
        REQUIRE_MESSAGE(t, text(err));
        status = bnb_tensor_upload(t, src, &err);
        REQUIRE_MESSAGE(status == BNB_OK, text(err));
        return t;
    }

    static int32_t dims(const Shape &shape) { return static_cast<int32_t>(shape.size()); }
    template <class T> static std::vector<uint8_t> bytes_of(const std::vector<T> &v) {
        const uint8_t *p = reinterpret_cast<const uint8_t *>(v.data());
        return v.empty() ? std::vector<uint8_t>() : std::vector<uint8_t>(p, p + v.size() * sizeof(T));
    }
    bnb_tensor *keep(bnb_tensor *t, std::vector<uint8_t> bytes, bool input) {
        bnb_error err = {};
        if (!t) bnb_ctx_status(ctx, &err);
        REQUIRE_MESSAGE(t, text(err));
        values_.push_back({t, std::move(bytes), input});
        return t;
    }
    void write(Value &v) {
        bnb_error err = {};
        if (bnb_tensor_state(v.tensor) != BNB_RESIDENT) return; // not part of the graph
        REQUIRE(v.bytes.size() == bnb_tensor_bytes(v.tensor));
        bnb_status status = bnb_tensor_write(v.tensor, 0, v.bytes.data(), v.bytes.size(), &err);
        REQUIRE_MESSAGE(status == BNB_OK, text(err));
    }
    void fill(Value &v) {
        bnb_error err = {};
        int64_t n = bnb_tensor_elements(v.tensor);
        REQUIRE(static_cast<int64_t>(v.bytes.size()) == 4 * n);
        bnb_status status = BNB_OK;
        if (v.tensor->type == BNB_INT8_KV) {
            Floats x(static_cast<size_t>(n));
            if (n) std::memcpy(x.data(), v.bytes.data(), v.bytes.size());
            Int8Kv kv = int8_kv_of(x, v.tensor->shape[0], v.tensor->shape[1], v.tensor->quant.blocksize);
            std::copy(kv.codes.begin(), kv.codes.end(), static_cast<int8_t *>(v.tensor->plane[0]));
            std::copy(kv.absmax.begin(), kv.absmax.end(), static_cast<float *>(v.tensor->plane[1]));
        } else if (bnb_type_is_quantized(bnb_tensor_type(v.tensor))) {
            Ctx scratch(bnb_ctx_create(env_, &err));
            bnb_tensor *src = bnb_tensor_new(scratch.get(), BNB_F32, nullptr, bnb_tensor_n_dims(v.tensor), bnb_tensor_shape(v.tensor), "source");
            void *planes[BNB_MAX_PLANES] = {v.bytes.data(), nullptr, nullptr, nullptr};
            status = bnb_tensor_bind(src, planes, &err);
            if (!status) status = bnb_quantize(env_, src, v.tensor, BNB_COMPAT_CUDA, &err);
        } else {
            status = bnb_convert(BNB_F32, v.bytes.data(), bnb_tensor_type(v.tensor), bnb_tensor_plane(v.tensor, 0), n, &err);
        }
        REQUIRE_MESSAGE(status == BNB_OK, text(err));
    }
    std::vector<uint64_t> hashes() const {
        std::vector<uint64_t> list;
        for (const Value &v : values_) {
            const bnb_tensor *t = v.tensor;
            if (t->state != BNB_RESIDENT || (t->flags & BNB_FLAG_STATE) || device_) continue;
            for (int32_t p = 0; p < BNB_MAX_PLANES; p++) {
                uint64_t bytes = bnb_plane_bytes(t->type, &t->quant, t->n_dims, t->shape, p);
                if (bytes) list.push_back(bnb_hash64(t->plane[p], bytes, 0));
            }
        }
        return list;
    }
    // Without reuse every tensor has bytes of its own, and nobody may touch those between them.
    void check_gaps() {
        const uint8_t *arena = nullptr;
        size_t bytes = 0;
        std::map<const uint8_t *, const uint8_t *> used;
        auto add = [&](const bnb_tensor *t) {
            if (t->view) return;
            const uint8_t *p = static_cast<const uint8_t *>(t->plane[0]);
            used[p] = p + bnb_tensor_bytes(t);
            bytes = env_.memory.block_of(p, &arena);
        };
        for (int32_t i = 0; i < bnb_graph_size(graph); i++) add(bnb_graph_node(graph, i));
        for (const Value &v : values_)
            if (v.input && v.tensor->state == BNB_RESIDENT) add(v.tensor);
        if (used.empty()) return;
        REQUIRE(bytes > 0);
        const uint8_t *at = arena;
        size_t touched = 0;
        for (auto &u : used) {
            CHECK(u.first >= at); // tensors lie apart
            for (; at < u.first; at++) touched += *at != 0xff;
            at = u.second;
        }
        for (; at < arena + bytes && (at - arena) % 256; at++) touched += *at != 0xff; // behind the last one
        CHECK_MESSAGE(touched == 0, "bytes between the tensors of the arena were written");
    }
};

// A graph of one op (or a few): build makes it and returns its output.
inline Floats run_op(Env &env, const std::function<bnb_tensor *(Net &)> &build, int32_t compute = BNB_COMPUTE_AUTO) {
    Net net(env);
    net.params.compute_dtype = compute;
    return net.run(build(net));
}

// |got - want| / |want|; infinity if one is NaN where the other is not.
inline double relative_error(const Floats &got, const Doubles &want) {
    if (got.size() != want.size()) return INFINITY;
    double diff = 0, norm = 0;
    for (size_t i = 0; i < got.size(); i++) {
        double g = static_cast<double>(got[i]), w = want[i];
        if (std::isnan(g) != std::isnan(w) || std::isinf(g) != std::isinf(w)) return INFINITY;
        if (std::isnan(w)) continue;
        if (std::isinf(w)) {
            if (g != w) return INFINITY;
            continue;
        }
        diff += (g - w) * (g - w);
        norm += w * w;
    }
    return diff == 0 ? 0 : norm == 0 ? INFINITY : std::sqrt(diff / norm);
}

inline Doubles widen(const Floats &v) { return Doubles(v.begin(), v.end()); }

inline bool same_bits(const Floats &a, const Floats &b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// ---- files -----------------------------------------------------------------------------------------------------------

class TempDir { // removed with all that is in it
public:
    TempDir() {
        const char *base = std::getenv("TMPDIR");
        std::string name = std::string(base && *base ? base : "/tmp") + "/bnb-test-XXXXXX";
        REQUIRE(mkdtemp(&name[0]));
        path_ = name;
    }
    ~TempDir() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }
    TempDir(const TempDir &) = delete;
    TempDir &operator=(const TempDir &) = delete;

    std::string file(const std::string &name) const { return path_ + "/" + name; }

    static std::vector<std::string> list(const std::string &dir) {
        std::vector<std::string> files;
        if (DIR *d = ::opendir(dir.c_str())) {
            while (dirent *e = ::readdir(d))
                if (e->d_name[0] != '.') files.push_back(dir + "/" + e->d_name);
            ::closedir(d);
        }
        return files;
    }

private:
    std::string path_;
};

inline std::vector<uint8_t> read_bytes(const std::string &path) {
    std::ifstream in(path, std::ios::binary);
    std::stringstream all;
    all << in.rdbuf();
    std::string s = all.str();
    return std::vector<uint8_t>(s.begin(), s.end());
}

inline void write_bytes(const std::string &path, const std::vector<uint8_t> &bytes) {
    std::ofstream out(path, std::ios::binary);
    out.write(reinterpret_cast<const char *>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    out.close();
    REQUIRE(out.good());
}

} // namespace test
