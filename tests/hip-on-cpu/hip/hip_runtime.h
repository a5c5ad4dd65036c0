// hip_runtime.h: runs HIP kernels on the CPU, so that they are tested where there is no AMD GPU.
//
// Build: g++ -std=c++17 -Itests/hip-on-cpu -DEMU_WAVE=64 -c bnb-hip.cpp       (waves of 64 lanes, or of 32)
// Use:   EMU_SCHED=0, 1 or 2: lanes, waves and blocks run forward, backward or in a random order, by EMU_SEED.
//        There are two devices; for the first one no code was compiled.
// Finds: missing barriers (results that depend on the order), lanes that part before a shuffle or a barrier, memory
//        that is read before it is written (device and shared memory start as NaN), host code that does not wait (a
//        stream's work is done as late as HIP allows), wrong launches and copies; overruns with -fsanitize=address.
// Not:   no dynamic shared memory, no matrix cores, no managed memory. One host thread at a time. Within a wave memory
//        is ordered more strictly than on the hardware. Only what bnb-cuda.cu uses is here. x86-64.
//
// How: every thread of a block is a fiber. It runs until it meets others: at a shuffle those of its wave, at a barrier
// those of its block. When all have come they go on. Blocks run one after the other.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <vector>

#ifndef EMU_WAVE
#error "define EMU_WAVE: the lanes of a wave, 32 or 64"
#endif
#ifndef __x86_64__
#error "the switch from fiber to fiber is written for x86-64"
#endif

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __launch_bounds__(...)
#ifdef __SANITIZE_ADDRESS__ // puts red zones round variables that have no section
#define __shared__ static
extern "C" void __sanitizer_start_switch_fiber(void **fake, const void *stack, size_t bytes);
extern "C" void __sanitizer_finish_switch_fiber(void *fake, const void **stack, size_t *bytes);
#else
#define __shared__ static __attribute__((section("emu_shared")))
extern "C" char __start_emu_shared[] __attribute__((weak)), __stop_emu_shared[] __attribute__((weak)); // by the linker
#endif

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
    uint64_t count() const { return uint64_t{x} * y * z; }
};

struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
struct float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emu {

constexpr size_t STACK_BYTES = 64 << 10, SLOT_BYTES = 16;

enum State { FRESH, READY, AT_WAVE, AT_BLOCK, DONE };

struct Fiber {
    std::vector<char> memory; // its stack; none for the host
    void *sp = nullptr;
    const void *stack = nullptr; // [bytes], for AddressSanitizer
    size_t bytes = 0;
    void *fake = nullptr; // its other stack
    int lane = -1;        // of the block: the thread that it runs
};

struct Lane { // a thread of the block
    dim3 index;
    State state = FRESH;
    Fiber *fiber = nullptr;
    const char *meeting = ""; // the function in which it waits, and the line that called it
    int line = 0;
    unsigned n_meetings = 0;
};

// What lanes show each other. Two sets, used in turn: a fast lane may write the next while a slow one reads this one.
struct Wave {
    alignas(16) unsigned char slots[2][EMU_WAVE][SLOT_BYTES];
    uint64_t present; // lanes that take part
};

struct Machine {
    dim3 grid, block, at; // at: the block that runs
    std::vector<Lane> lanes;
    std::vector<Wave> waves;
    std::function<void()> kernel;
    Fiber host, *running = nullptr, *before = nullptr;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Fiber *> idle;
    int first = 0, end = 0, next = 0, step = 1, left = 0; // the wave's lanes [first, end), and whose turn is next
    int order = 0;
    uint64_t random = 1;
    Machine() {
        if (const char *s = std::getenv("EMU_SCHED")) order = std::atoi(s);
        if (const char *s = std::getenv("EMU_SEED")) random = std::strtoull(s, nullptr, 0) | 1;
    }
    uint64_t draw() { // xorshift
        random ^= random << 13;
        random ^= random >> 7;
        return random ^= random << 17;
    }
};
inline Machine m;

inline Lane &lane() { return m.lanes[static_cast<size_t>(m.running->lane)]; }
inline int lane_of_wave() { return m.running->lane % EMU_WAVE; }
inline Wave &wave() { return m.waves[static_cast<size_t>(m.running->lane / EMU_WAVE)]; }

[[noreturn]] inline void die(const char *what) {
    static const char *const states[] = {"not started", "ready", "waits for its wave", "waits for its block", "done"};
    std::fprintf(stderr, "hip-on-cpu: %s, in block (%u, %u, %u)\n", what, m.at.x, m.at.y, m.at.z);
    const Lane *shown = nullptr;
    for (const Lane &l : m.lanes) {
        if (shown && l.state == shown->state && l.line == shown->line) continue;
        std::fprintf(stderr, "  from thread (%u, %u, %u): %s in %s, line %d\n", l.index.x, l.index.y, l.index.z,
                     states[l.state], l.meeting, l.line);
        shown = &l;
    }
    std::abort();
}

/* ---- fibers ---- */

// Saves what a callee must keep and its stack in *from, and goes on where `to` was saved.
extern "C" void emu_switch(void **from, void *to);
asm(R"(
.weak emu_switch
.type emu_switch,@function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp,(%rdi)
    movq %rsi,%rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emu_switch,.-emu_switch
)");

inline void arrived() { // on another stack
#ifdef __SANITIZE_ADDRESS__
    const void *stack;
    size_t bytes;
    __sanitizer_finish_switch_fiber(m.running->fake, &stack, &bytes);
    if (m.before == &m.host) m.host.stack = stack, m.host.bytes = bytes;
#endif
}

inline void switch_to(Fiber *to) {
    Fiber *from = m.before = m.running;
    m.running = to;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from->fake, to->stack, to->bytes);
#endif
    emu_switch(&from->sp, to->sp);
    arrived();
}

inline int next_lane() { // of the wave, that can run; -1: none
    while (m.left > 0) {
        int i = m.next;
        m.left--;
        m.next += m.step;
        if (m.next == m.end) m.next = m.first;
        else if (m.next < m.first) m.next = m.end - 1;
        if (m.lanes[static_cast<size_t>(i)].state <= READY) return i;
    }
    return -1;
}

// Lanes one after the other: a new fiber is needed only behind one that waits.
[[noreturn]] inline void fiber_main();

inline Fiber *take_fiber() {
    if (!m.idle.empty()) {
        Fiber *f = m.idle.back();
        m.idle.pop_back();
        return f;
    }
    m.fibers.push_back(std::make_unique<Fiber>());
    Fiber *f = m.fibers.back().get();
    f->memory.resize(STACK_BYTES);
    f->stack = f->memory.data();
    f->bytes = f->memory.size();
    uintptr_t top = reinterpret_cast<uintptr_t>(f->stack) + f->bytes;
    top -= m.fibers.size() * 320 % 8192; // stacks at equal distances would fall on the same lines of the cache
    void **sp = reinterpret_cast<void **>(top / 64 * 64 - 8); // a function finds its stack 8 below a multiple of 16
    *--sp = reinterpret_cast<void *>(fiber_main);
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    f->sp = sp;
    return f;
}

// From a lane that waits or is done to the next one, or back to run_wave.
inline void pass_on() {
    int i = next_lane();
    if (i < 0) return switch_to(&m.host);
    Lane &l = m.lanes[static_cast<size_t>(i)];
    if (l.state == FRESH) {
        l.fiber = take_fiber();
        l.fiber->lane = i;
    }
    l.state = READY;
    if (l.fiber != m.running) switch_to(l.fiber);
}

inline void fiber_main() {
    arrived();
    for (Fiber *self = m.running;;) {
        m.kernel();
        lane().state = DONE;
        m.idle.push_back(self); // so that a fresh lane starts on this stack
        pass_on();
    }
}

/* ---- waves, blocks, grids ---- */

// All lanes of a wave show a value, wait for each other, and may then read what any lane showed.
struct Shown {
    const unsigned char (*slots)[SLOT_BYTES];
    template <class T> T by(int lane) const {
        T v;
        if (wave().present >> lane & 1) std::memcpy(&v, slots[lane], sizeof v);
        else std::memset(&v, 0xff, sizeof v); // that lane is gone: undefined on a GPU
        return v;
    }
};
template <class T> Shown show(T v, const char *meeting, int line) {
    static_assert(sizeof v <= SLOT_BYTES && std::is_trivially_copyable<T>::value, "too large for a slot");
    Lane &l = lane();
    auto slots = wave().slots[l.n_meetings++ % 2];
    std::memcpy(slots[lane_of_wave()], &v, sizeof v);
    l.meeting = meeting;
    l.line = line;
    l.state = AT_WAVE;
    pass_on();
    return {slots};
}

inline void run_wave(int w) { // until each of its lanes is done or waits for the block
    m.first = w * EMU_WAVE;
    m.end = std::min(static_cast<int>(m.lanes.size()), m.first + EMU_WAVE);
    for (;;) {
        m.left = m.end - m.first;
        m.next = m.order == 1 ? m.end - 1 : m.first;
        m.step = m.order == 1 ? -1 : 1;
        if (m.order == 2) {
            m.next += static_cast<int>(m.draw() % static_cast<unsigned>(m.left));
            m.step = m.draw() % 2 ? 1 : -1;
        }
        m.running = &m.host;
        pass_on();
        uint64_t present = 0;
        const Lane *one = nullptr; // that waits for the wave
        bool block = false;
        for (int i = m.first; i < m.end; i++) {
            const Lane &l = m.lanes[static_cast<size_t>(i)];
            block = block || l.state == AT_BLOCK;
            if (l.state != AT_WAVE) continue;
            present |= uint64_t{1} << (i - m.first);
            if (one && (l.line != one->line || l.meeting != one->meeting))
                die("lanes of one wave meet at different places");
            one = &l;
        }
        if (!one) return;
        if (block) die("some lanes of a wave meet, others wait for the block");
        m.waves[static_cast<size_t>(w)].present = present;
        for (int i = m.first; i < m.end; i++)
            if (m.lanes[static_cast<size_t>(i)].state == AT_WAVE) m.lanes[static_cast<size_t>(i)].state = READY;
    }
}

inline void run_block() {
    for (Lane &l : m.lanes) l.state = FRESH, l.n_meetings = 0;
    std::vector<int> order(m.waves.size());
    for (bool more = true; more;) {
        std::iota(order.begin(), order.end(), 0);
        if (m.order == 1) std::reverse(order.begin(), order.end());
        for (size_t i = order.size(); m.order == 2 && i > 1; i--) std::swap(order[i - 1], order[m.draw() % i]);
        for (int w : order) run_wave(w);
        const Lane *one = nullptr; // that waits for the block
        for (Lane &l : m.lanes) {
            if (l.state != AT_BLOCK) continue;
            if (one && l.line != one->line) die("threads of one block wait at different barriers");
            one = &l;
        }
        more = one;
        for (Lane &l : m.lanes)
            if (l.state == AT_BLOCK) l.state = READY;
    }
}

inline dim3 nth(dim3 of, uint64_t i) {
    return dim3(static_cast<unsigned>(i % of.x), static_cast<unsigned>(i / of.x % of.y),
                static_cast<unsigned>(i / of.x / of.y));
}

inline void run_grid(dim3 grid, dim3 block, const std::function<void()> &kernel) {
    m.grid = grid;
    m.block = block;
    m.kernel = kernel;
    m.lanes.resize(block.count());
    m.waves.resize((block.count() + EMU_WAVE - 1) / EMU_WAVE);
    for (size_t i = 0; i < m.lanes.size(); i++) m.lanes[i].index = nth(block, i);
    for (uint64_t n = grid.count(), i = 0; i < n; i++) {
        m.at = nth(grid, m.order == 1 ? n - 1 - i : i);
#ifndef __SANITIZE_ADDRESS__
        std::fill(__start_emu_shared, __stop_emu_shared, '\xff');
#endif
        run_block();
    }
}

} // namespace emu

/* ---- what kernels call ---- */

#define threadIdx (::emu::lane().index)
#define blockIdx (::emu::m.at)
#define blockDim (::emu::m.block)
#define gridDim (::emu::m.grid)

inline void __syncthreads(int line = __builtin_LINE()) {
    emu::Lane &l = emu::lane();
    l.meeting = "__syncthreads";
    l.line = line;
    l.state = emu::AT_BLOCK;
    emu::pass_on();
}

template <class T> T __shfl_xor(T v, int mask, int width = EMU_WAVE, int line = __builtin_LINE()) {
    emu::Shown shown = emu::show(v, "__shfl_xor", line);
    int l = emu::lane_of_wave(), from = l ^ mask;
    return from / width > l / width ? v : shown.by<T>(from); // beyond the group: its own
}

// Lanes change only where they wait for each other, so nothing comes between.
template <class T> T atomicAdd(T *p, T v) {
    const T before = *p;
    *p += v;
    return before;
}
inline unsigned __float_as_uint(float x) {
    unsigned u;
    std::memcpy(&u, &x, sizeof u);
    return u;
}
inline float __uint_as_float(unsigned u) {
    float x;
    std::memcpy(&x, &u, sizeof x);
    return x;
}

#include "hip_host.h"
