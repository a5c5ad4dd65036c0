/* bnb.c: tensors, graphs, plans, the CPU backend and the .bnb reader of bnb. See bnb.h for how to use it.
 *
 * Build:  cc -O2 -c bnb.c          (C11; no flags: SIMD kernels are compiled for their own targets and picked at run time)
 * Not:    no exit, abort, print or process-wide mutable state; no dependency but libc, libm and POSIX threads. The one
 *         thing asked of the process is Linux's permission to use the AMX registers, where the CPU has them.
 *
 * Contents (search for the tag):
 *     [CONF]    platform and feature macros            [OP]     one card per op: inputs, shape rule, constructor
 *     [ENV]     allocator, log, errors, threads        [GRAPH]  topological order
 *     [UTIL]    checked arithmetic, XXH64              [CPU]    kernels: the plain reference, then the fast ones
 *     [NUM]     f16 and bf16                           [PLAN]   liveness, offsets, running
 *     [TYPE]    the table of types, planes             [DEV]    backends
 *     [TENSOR]  contexts and tensors                   [FILE]   the .bnb reader
 *     [QUANT]   bitsandbytes' arithmetic, bit for bit
 */

/* ==== [CONF] ==================================================================================================== */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* sched_getaffinity, syscall, MAP_ANONYMOUS */
#endif

#include "bnb.h"

#include <errno.h>
#include <fenv.h>      /* defines: fesetenv */
#include <float.h>     /* defines: FLT_MAX, FLT_MIN */
#include <fcntl.h>     /* defines: open */
#include <math.h>
#include <pthread.h>
#include <sched.h>     /* defines: sched_yield, sched_getaffinity */
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>     /* defines: vsnprintf; nothing is printed */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bnb needs a little-endian machine: its files are mapped as they are"
#endif

#define BNB__MIN(a, b) ((a) < (b) ? (a) : (b))
#define BNB__MAX(a, b) ((a) > (b) ? (a) : (b))
#define BNB__COUNT(array) ((int32_t)(sizeof(array) / sizeof((array)[0])))
enum { BNB__ALIGN = 64, BNB__MAX_THREADS = 256 };

/* ==== [ENV] =====================================================================================================
 * An env owns a list of everything made from it, newest first, so that freeing the env frees dependents before what
 * they depend on. The pool's threads sleep when there is nothing to do; a team call hands all of them one function. */

typedef struct bnb__owned {
    struct bnb__owned *next, *prev;
    void (*destroy)(struct bnb__owned *self); /* unlinked already */
    bnb_env *env;
} bnb__owned;

typedef void (*bnb__team_fn)(void *arg, int32_t ith, int32_t nth);

typedef struct bnb__worker_arg {
    struct bnb__pool *pool;
    int32_t ith;
} bnb__worker_arg;

typedef struct bnb__pool {
    pthread_t threads[BNB__MAX_THREADS];
    bnb__worker_arg args[BNB__MAX_THREADS];
    int32_t n;                    /* threads of a team: the caller and n - 1 workers         */
    pthread_mutex_t team_lock;    /* one team at a time                                      */
    pthread_mutex_t lock;
    pthread_cond_t wake;
    _Atomic uint32_t generation;  /* counts teams; workers wait for it to change             */
    _Atomic int32_t sleepers;     /* workers in pthread_cond_wait                            */
    _Atomic int32_t stop;
    bnb__team_fn fn;
    void *arg;
    _Atomic int32_t arrived;      /* barrier: how many came                                  */
    _Atomic uint32_t turn;        /* barrier: changes when all came                          */
} bnb__pool;

struct bnb_env {
    bnb_env_params params;
    uint32_t cpu;
    _Atomic uint64_t bytes, bytes_peak;
    pthread_mutex_t lock; /* of `owned` */
    bnb__owned owned;     /* head of a ring */
    bnb__pool pool;
};

bnb_status bnb_fail(bnb_error *err, bnb_status code, const char *format, ...) {
    if (err) {
        va_list args;
        va_start(args, format);
        err->code = code;
        vsnprintf(err->msg, sizeof err->msg, format, args);
        va_end(args);
        for (char *c = err->msg; *c; c++) /* names come from files: nothing that a terminal would obey */
            if ((unsigned char)*c < 0x20 || *c == 0x7f) *c = '?';
    }
    return code;
}

void bnb_log(bnb_env *env, int32_t level, const char *format, ...) {
    if (!env->params.log) return;
    char line[512];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    env->params.log(env->params.user, level, line);
}

int32_t bnb_progress(bnb_env *env, const char *phase, double fraction) {
    return env->params.progress ? env->params.progress(env->params.user, phase, fraction) : 1;
}

static void *bnb__default_alloc(void *user, void *old, size_t old_size, size_t new_size, size_t align) {
    (void)user;
    enum { HUGE_PAGE = 2 << 20 };
    void *p = NULL;
    int huge = new_size >= 2 * HUGE_PAGE; /* weights are read end to end: fewer page-table walks */
    if (new_size && posix_memalign(&p, huge ? HUGE_PAGE : BNB__MAX(align, sizeof(void *)), new_size)) return NULL;
#if defined(MADV_HUGEPAGE)
    if (huge) (void)madvise(p, new_size, MADV_HUGEPAGE); /* a wish: nothing depends on it */
#endif
    if (old) {
        if (p) memcpy(p, old, BNB__MIN(old_size, new_size));
        free(old);
    }
    return p;
}

/* Not zeroed: for memory that is written before it is read. */
static void *bnb__alloc_raw(bnb_env *env, size_t bytes, bnb_error *err) {
    bytes = BNB__MAX(bytes, 1);
    void *p = bytes > SIZE_MAX / 2 ? NULL : env->params.alloc(env->params.user, NULL, 0, bytes, BNB__ALIGN);
    if (!p) {
        bnb_fail(err, BNB_E_NOMEM, "out of memory: %zu bytes (%.3f GiB) could not be allocated", bytes,
                 (double)bytes / (1 << 30));
        return NULL;
    }
    uint64_t now = atomic_fetch_add(&env->bytes, bytes) + bytes, peak = atomic_load(&env->bytes_peak);
    while (now > peak && !atomic_compare_exchange_weak(&env->bytes_peak, &peak, now)) {}
    return p;
}

void *bnb_alloc(bnb_env *env, size_t bytes, bnb_error *err) {
    void *p = bnb__alloc_raw(env, bytes, err);
    if (p) memset(p, 0, bytes);
    return p;
}

void bnb_free(bnb_env *env, void *ptr, size_t bytes) {
    if (!ptr) return;
    bytes = BNB__MAX(bytes, 1);
    env->params.alloc(env->params.user, ptr, bytes, 0, BNB__ALIGN);
    atomic_fetch_sub(&env->bytes, bytes);
}

/* An object of the env: `bytes` zeroed bytes that begin with a bnb__owned. */
static void *bnb__own(bnb_env *env, size_t bytes, void (*destroy)(bnb__owned *), bnb_error *err) {
    bnb__owned *o = bnb_alloc(env, bytes, err);
    if (!o) return NULL;
    o->env = env;
    o->destroy = destroy;
    pthread_mutex_lock(&env->lock);
    o->next = env->owned.next;
    o->prev = &env->owned;
    o->next->prev = o->prev->next = o;
    pthread_mutex_unlock(&env->lock);
    return o;
}

static void bnb__disown(bnb__owned *o) {
    if (!o) return;
    pthread_mutex_lock(&o->env->lock);
    o->next->prev = o->prev;
    o->prev->next = o->next;
    pthread_mutex_unlock(&o->env->lock);
    o->destroy(o);
}

/* ---- threads ---- */

static void bnb__pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Spinning costs nothing when the others arrive within microseconds, as they do between the nodes of a graph; after
 * that the core is offered to others, because there may be fewer cores than threads. */
enum { BNB__SPINS = 4000 };

static void bnb__barrier(bnb__pool *p) {
    if (p->n == 1) return;
    uint32_t turn = atomic_load_explicit(&p->turn, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&p->arrived, 1, memory_order_acq_rel) == p->n - 1) {
        atomic_store_explicit(&p->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&p->turn, turn + 1, memory_order_release);
        return;
    }
    for (int32_t i = 0; atomic_load_explicit(&p->turn, memory_order_acquire) == turn; i++)
        if (i < BNB__SPINS) bnb__pause();
        else sched_yield();
}

static void *bnb__worker(void *arg) {
    bnb__pool *p = ((bnb__worker_arg *)arg)->pool;
    int32_t ith = ((bnb__worker_arg *)arg)->ith;
    for (uint32_t seen = 0;;) {
        int32_t spins = 0;
        while (atomic_load_explicit(&p->generation, memory_order_acquire) == seen && spins++ < 8 * BNB__SPINS) bnb__pause();
        if (atomic_load(&p->generation) == seen) {
            pthread_mutex_lock(&p->lock);
            atomic_fetch_add(&p->sleepers, 1);
            while (atomic_load(&p->generation) == seen) pthread_cond_wait(&p->wake, &p->lock);
            atomic_fetch_sub(&p->sleepers, 1);
            pthread_mutex_unlock(&p->lock);
        }
        seen = atomic_load_explicit(&p->generation, memory_order_acquire);
        if (atomic_load(&p->stop)) return NULL;
        p->fn(p->arg, ith, p->n);
        bnb__barrier(p);
    }
}

static void bnb__pool_wake(bnb__pool *p) {
    atomic_fetch_add(&p->generation, 1);
    if (atomic_load(&p->sleepers) == 0) return;
    pthread_mutex_lock(&p->lock);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
}

/* fn(arg, ith, nth) on every thread of the pool at once; returns when all returned. */
static void bnb__team(bnb_env *env, bnb__team_fn fn, void *arg) {
    bnb__pool *p = &env->pool;
    pthread_mutex_lock(&p->team_lock);
    if (p->n == 1) {
        fn(arg, 0, 1);
    } else {
        p->fn = fn;
        p->arg = arg;
        bnb__pool_wake(p);
        fn(arg, 0, p->n);
        bnb__barrier(p);
    }
    pthread_mutex_unlock(&p->team_lock);
}

static void bnb__pool_stop(bnb__pool *p) {
    atomic_store(&p->stop, 1);
    bnb__pool_wake(p);
    for (int32_t i = 1; i < p->n; i++) pthread_join(p->threads[i], NULL);
    pthread_mutex_destroy(&p->team_lock);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->wake);
}

static bnb_status bnb__pool_start(bnb__pool *p, int32_t n, bnb_error *err) {
    pthread_mutex_init(&p->team_lock, NULL);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    p->n = n;
    for (int32_t i = 1; i < n; i++) {
        p->args[i] = (bnb__worker_arg){p, i};
        if (pthread_create(&p->threads[i], NULL, bnb__worker, &p->args[i])) {
            p->n = i; /* those that run */
            bnb__pool_stop(p);
            return bnb_fail(err, BNB_E_NOMEM, "thread %d of %d could not be started", (int)i + 1, (int)n);
        }
    }
    return BNB_OK;
}

typedef struct bnb__parallel_arg {
    void (*fn)(void *arg, int64_t i);
    void *arg;
    int64_t n;
    _Atomic int64_t next;
} bnb__parallel_arg;

static void bnb__parallel_team(void *arg, int32_t ith, int32_t nth) {
    bnb__parallel_arg *a = arg;
    (void)ith, (void)nth;
    for (int64_t i; (i = atomic_fetch_add(&a->next, 1)) < a->n;) a->fn(a->arg, i);
}

void bnb_parallel(bnb_env *env, int64_t n, void (*fn)(void *arg, int64_t i), void *arg) {
    bnb__parallel_arg a = {fn, arg, n, 0};
    if (n == 1) fn(arg, 0);
    else if (n > 1) bnb__team(env, bnb__parallel_team, &a);
}

/* ---- the CPU ---- */

#if defined(__x86_64__)
static uint32_t bnb__cpu_detect(void) {
    uint32_t a, b, c, d, found = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    int fma = c >> 12 & 1, osxsave = c >> 27 & 1, f16c = c >> 29 & 1;
    if (!osxsave) return 0;
    uint32_t xcr0, xcr0_high; /* which registers the system saves: 2 ymm = 0x6, zmm = 0xe0, tiles = 0x60000 */
    __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(xcr0_high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if ((xcr0 & 0x6) == 0x6 && fma && f16c && (b >> 5 & 1)) found |= BNB_CPU_AVX2;
    int f = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1;
    if ((found & BNB_CPU_AVX2) && (xcr0 & 0xe0) == 0xe0 && f && dq && bw && vl) {
        found |= BNB_CPU_AVX512;
        if (c >> 11 & 1) found |= BNB_CPU_AVX512_VNNI;
        int tile = d >> 24 & 1, amx_int8 = d >> 25 & 1, amx_bf16 = d >> 22 & 1;
        if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1)) found |= BNB_CPU_AVX512_BF16;
#if defined(__linux__) && defined(SYS_arch_prctl)
        enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
        if (tile && amx_int8 && amx_bf16 && (xcr0 & 0x60000) == 0x60000 &&
            syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0)
            found |= BNB_CPU_AMX;
#else
        (void)tile, (void)amx_int8, (void)amx_bf16;
#endif
    }
    return found;
}
#else
static uint32_t bnb__cpu_detect(void) { return 0; }
#endif

static int32_t bnb__cpu_count(void) {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : (int32_t)n;
}

void bnb_env_params_default(bnb_env_params *params, uint32_t struct_size) {
    memset(params, 0, BNB__MIN(struct_size, sizeof *params));
    params->struct_size = struct_size;
}

bnb_env *bnb_env_create(const bnb_env_params *params, bnb_error *err) {
    bnb_env_params p;
    bnb_env_params_default(&p, sizeof p);
    if (params) memcpy(&p, params, BNB__MIN(params->struct_size, sizeof p));
    if (p.n_threads < 0 || p.n_threads > BNB__MAX_THREADS) {
        bnb_fail(err, BNB_E_ARG, "the number of threads is %d, not 0 to %d", (int)p.n_threads, BNB__MAX_THREADS);
        return NULL;
    }
    if (p.n_threads == 0) p.n_threads = BNB__MIN(bnb__cpu_count(), BNB__MAX_THREADS);
    if (!p.alloc) p.alloc = bnb__default_alloc;

    bnb_env *env = p.alloc(p.user, NULL, 0, sizeof *env, BNB__ALIGN);
    if (!env) {
        bnb_fail(err, BNB_E_NOMEM, "out of memory: %zu bytes for an env", sizeof *env);
        return NULL;
    }
    memset(env, 0, sizeof *env);
    env->params = p;
    env->owned.next = env->owned.prev = &env->owned;
    env->cpu = (bnb__cpu_detect() | BNB_CPU_FAST) & ~p.cpu_disable;
    if (p.cpu_disable & BNB_CPU_FAST) env->cpu = 0;
    if (bnb__pool_start(&env->pool, p.n_threads, err)) {
        p.alloc(p.user, env, sizeof *env, 0, BNB__ALIGN);
        return NULL;
    }
    pthread_mutex_init(&env->lock, NULL);
    return env;
}

static void bnb__backend_destroy(bnb__owned *o);

void bnb_env_free(bnb_env *env) {
    if (!env) return;
    for (bnb__owned *o = env->owned.next, *next; o != &env->owned; o = next) { /* newest first, backends last: they hold memory of the others */
        next = o->next;
        if (o->destroy != bnb__backend_destroy) bnb__disown(o);
    }
    while (env->owned.next != &env->owned) bnb__disown(env->owned.next);
    bnb__pool_stop(&env->pool);
    pthread_mutex_destroy(&env->lock);
    env->params.alloc(env->params.user, env, sizeof *env, 0, BNB__ALIGN);
}

int32_t bnb_env_threads(const bnb_env *env) { return env->pool.n; }
uint32_t bnb_env_cpu(const bnb_env *env) { return env->cpu; }
uint64_t bnb_env_bytes(const bnb_env *env) { return atomic_load(&env->bytes); }
uint64_t bnb_env_bytes_peak(const bnb_env *env) { return atomic_load(&env->bytes_peak); }

/* ==== [UTIL] ==================================================================================================== */

static double bnb__seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static uint64_t bnb__align_up(uint64_t n, uint64_t align) { return (n + align - 1) & ~(align - 1); }

static uint64_t bnb__read64(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return v; }
static uint32_t bnb__read32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return v; }
static uint64_t bnb__rotl(uint64_t v, int r) { return v << r | v >> (64 - r); }

/* XXH64 by Yann Collet: the published algorithm; fast enough that checking a file is bound by the disk. */
uint64_t bnb_hash64(const void *data, uint64_t bytes, uint64_t seed) {
    const uint64_t P1 = 0x9E3779B185EBCA87u, P2 = 0xC2B2AE3D27D4EB4Fu, P3 = 0x165667B19E3779F9u, P4 = 0x85EBCA77C2B2AE63u,
                   P5 = 0x27D4EB2F165667C5u;
    const uint8_t *p = data, *end = p + bytes;
    uint64_t h;
    if (bytes >= 32) {
        uint64_t v[4] = {seed + P1 + P2, seed + P2, seed, seed - P1};
        for (; end - p >= 32; p += 32)
            for (int i = 0; i < 4; i++) v[i] = bnb__rotl(v[i] + bnb__read64(p + 8 * i) * P2, 31) * P1;
        h = bnb__rotl(v[0], 1) + bnb__rotl(v[1], 7) + bnb__rotl(v[2], 12) + bnb__rotl(v[3], 18);
        for (int i = 0; i < 4; i++) h = (h ^ bnb__rotl(v[i] * P2, 31) * P1) * P1 + P4;
    } else {
        h = seed + P5;
    }
    h += bytes;
    for (; end - p >= 8; p += 8) h = bnb__rotl(h ^ bnb__rotl(bnb__read64(p) * P2, 31) * P1, 27) * P1 + P4;
    if (end - p >= 4) {
        h = bnb__rotl(h ^ bnb__read32(p) * P1, 23) * P2 + P3;
        p += 4;
    }
    for (; p < end; p++) h = bnb__rotl(h ^ *p * P5, 11) * P1;
    h = (h ^ h >> 33) * P2;
    h = (h ^ h >> 29) * P3;
    return h ^ h >> 32;
}

struct bnb_backend {
    bnb__owned owned;
    const bnb_backend_api *api;
    void *dev;
    char name[32];
    uint8_t fetched[BNB_FETCH_SLOTS][BNB_FETCH_BYTES]; /* of a device without fetches of its own */
};

/* Host memory: the caller's own, or the CPU backend's. */
static int bnb__on_host(const bnb_tensor *t) { return !t->backend || !strcmp(t->backend->api->name, "cpu"); }

/* ==== [NUM] ======================================================================================================
 * The bits of numbers. Everything here is exact or rounds once, to nearest even, whatever the compiler's flags are:
 * where a product is added to, bnb__rounded stands between the two. */

#if defined(__FAST_MATH__) || FLT_EVAL_METHOD == 1 || FLT_EVAL_METHOD == 2
#error "bnb.c promises bitsandbytes' bits: no -ffast-math, and no x87 arithmetic (use -msse2 -mfpmath=sse)"
#endif

/* The pattern of a number and back. Comparing and masking patterns is exact where the FPU may flush or trap. */
static uint32_t bnb__bits(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

static float bnb__float(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

/* Ends an expression. Without it gcc (and clang, within a statement) may fuse a * b + c into one rounding where the
 * target has FMA: on aarch64 and with -march=native. Pragmas and attributes against that differ by compiler; a value
 * that has passed through an asm statement cannot be fused by any. */
static inline float bnb__rounded(float x) {
#if defined(__GNUC__) && defined(__x86_64__)
    __asm__("" : "+x"(x));
    return x;
#elif defined(__GNUC__) && defined(__aarch64__)
    __asm__("" : "+w"(x));
    return x;
#else
    volatile float v = x;
    return v;
#endif
}

/* A NaN becomes quiet and keeps sign and payload in both directions, as in the F16C instructions. */
static float bnb__f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, em = h & 0x7fff, u = em << 13;
    if (em > 0x7c00) u |= 0x7fc00000;
    else if (em == 0x7c00) u = 0x7f800000;
    else if (em >= 0x0400) u += 0x38000000;
    else u = bnb__bits((float)em * 0x1p-24f);
    return bnb__float(sign | u);
}

static uint16_t bnb__f32_to_f16(float x) {
    uint32_t u = bnb__bits(x), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000) a = 0x7e00 | (a >> 13 & 0x3ff);
    else if (a >= 0x477ff000) a = 0x7c00; /* 65520, half a step above the largest, and more: infinity */
    else if (a >= 0x38800000) a = (a - 0x38000000 + 0xfff + (a >> 13 & 1)) >> 13;
    else a = bnb__bits(bnb__float(a) + 0.5f) - 0x3f000000; /* an ulp of 0.5f is 2^-24, the step of f16's subnormals */
    return (uint16_t)(sign | a);
}

/* bf16 is the upper half of an f32, so that rounding is an addition which carries. There is one NaN, as in PyTorch:
 * cutting the payload off could leave an infinity. */
static float bnb__bf16_to_f32(uint16_t h) { return bnb__float((uint32_t)h << 16); }

static uint16_t bnb__f32_to_bf16(float x) {
    uint32_t u = bnb__bits(x);
    return (uint16_t)((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}

/* CUDA's fast math: subnormals count as zeros of their sign. In bits, so that it holds in any state of the FPU. */
static float bnb__ftz(float x) {
    uint32_t u = bnb__bits(x);
    return bnb__float((u & 0x7f800000) ? u : u & 0x80000000);
}

/* 1/x as bitsandbytes' CUDA kernels see it (rcp.approx.ftz.f32): the correctly rounded quotient or a neighbour of it.
 * The neighbour was measured on an H100 over all mantissas and does not depend on the exponent. This table has the
 * mantissas of at most 10 bits, so every f16 and bf16 value is exact; with f32 weights an absmax has more bits and the
 * correctly rounded quotient stands in, which changes about one code byte in 16 million.
 * Two bits per mantissa [1024], low bits first: 0 none, 1 one ulp up, 2 one ulp down. */
const uint64_t bnb_rcp_fix[32] = {
    0x0000011420402000, 0x2000000120000002, 0x0042a00008002000, 0xa000000400050014, 0x0004014000108000,
    0x0000008200000002, 0x0880200401400000, 0x0100000000000014, 0x8000002000000100, 0x0000000500110000,
    0x0810000000000800, 0x0000004000000000, 0x8005004801400010, 0x0880400000040004, 0x0028004000101404,
    0x0044001000010004, 0x4000004100054000, 0x0000014020000040, 0x0000000000000000, 0x0000004000002000,
    0x0040000000514000, 0x0500000040000140, 0x0001010000000000, 0x0000000080000000, 0x0000045480000000,
    0x0000400004004400, 0x0000000000000000, 0x0400000011110000, 0x0041000000000000, 0x0a20200100000001,
    0x0140000000010800, 0x0002002000000400,
};

static float bnb__rcp_cuda(float x) {
    uint32_t m = bnb__bits(x) & 0x7fffff, r;
    x = bnb__ftz(x);
    r = bnb__bits(1.0f / x);
    if (m != 0 && (m & 0x1fff) == 0 && (r & 0x7fffffff) < 0x7f800000 && (r & 0x7fffffff) != 0) {
        uint32_t i = m >> 13, k = (uint32_t)(bnb_rcp_fix[i / 32] >> (2 * (i % 32))) & 3;
        r += k == 1 ? 1u : k == 2 ? 0xffffffffu : 0u;
    }
    return bnb__ftz(bnb__float(r));
}

/* How many of the ascending t [n] are below x, by halving; n + 1 is a power of two. 0 for NaN. Without a branch: which
 * way x goes cannot be predicted. */
static int32_t bnb__count_below(const float *t, int32_t n, float x) {
    int32_t r = 0;
    for (int32_t s = (n + 1) / 2; s; s /= 2) r += s & -(int32_t)(x > t[r + s - 1]);
    return r;
}

/* Reads elements [first, first + n) of base, an f32, f16 or bf16 array, as f32: dst [n]. base may be at any address,
 * because the tensors of a mapped safetensors file are. */
static void bnb__load_f32(int32_t type, const void *base, int64_t first, int64_t n, float *dst) {
    const uint8_t *p = (const uint8_t *)base + first * (type == BNB_F32 ? 4 : 2);
    if (type == BNB_F32) {
        memcpy(dst, p, (size_t)n * 4);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        uint16_t h;
        memcpy(&h, p + 2 * i, 2);
        dst[i] = type == BNB_F16 ? bnb__f16_to_f32(h) : bnb__bf16_to_f32(h);
    }
}

/* The reverse, with one rounding: src [n] -> elements [first, first + n) of base. */
static void bnb__store_f32(int32_t type, const float *src, int64_t n, void *base, int64_t first) {
    uint8_t *p = (uint8_t *)base + first * (type == BNB_F32 ? 4 : 2);
    if (type == BNB_F32) {
        memcpy(p, src, (size_t)n * 4);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        uint16_t h = type == BNB_F16 ? bnb__f32_to_f16(src[i]) : bnb__f32_to_bf16(src[i]);
        memcpy(p + 2 * i, &h, 2);
    }
}

/* ==== [TYPE] ================================================================================================== */

/* By id; unused ids have no name. */
static const struct {
    const char *name;
    int32_t bits;
} bnb__types[BNB_TYPE_COUNT] = {
#define BNB__TYPE_ROW(id, symbol, name, bits) [id] = {name, bits},
    BNB_TYPES(BNB__TYPE_ROW)
#undef BNB__TYPE_ROW
};

const char *bnb_type_name(int32_t type) { return type >= 0 && type < BNB_TYPE_COUNT ? bnb__types[type].name : NULL; }

int32_t bnb_type_bits(int32_t type) { return type >= 0 && type < BNB_TYPE_COUNT ? bnb__types[type].bits : 0; }

int32_t bnb_type_from_name(const char *name) {
    for (int32_t i = 0; name && i < BNB_TYPE_COUNT; i++) {
        if (bnb__types[i].name && strcmp(bnb__types[i].name, name) == 0) return i;
    }
    return -1;
}

int32_t bnb_type_is_quantized(int32_t type) { return type == BNB_INT8 || type == BNB_NF4 || type == BNB_FP4; }

static int bnb__type_is_float(int32_t type) { return type == BNB_F32 || type == BNB_F16 || type == BNB_BF16; }

bnb_quant bnb_quant_default(int32_t type) {
    bnb_quant q = {0};
    q.blocksize = 64;
    q.nested_blocksize = 256;
    q.dtype = BNB_F32;
    q.threshold = type == BNB_INT8 ? 6.0f : 0.0f;
    q.outlier_rule = BNB_OUTLIER_COLUMN;
    return q;
}

/* Whether q describes tensors of this type. Plain types need no description. bitsandbytes itself can only make nested
 * statistics in blocks of 256, and its fused kernels refuse any other. */
static int bnb__quant_valid(int32_t type, const bnb_quant *q) {
    if (type == BNB_INT8_KV) return q && q->blocksize > 0;
    if (!bnb_type_is_quantized(type)) return bnb_type_name(type) != NULL;
    if (!q || !bnb__type_is_float(q->dtype)) return 0;
    if (type == BNB_INT8) return q->threshold >= 0 && q->threshold <= FLT_MAX && (q->outlier_rule | 1) == 1;
    if (q->blocksize < 32 || q->blocksize > 4096 || (q->blocksize & (q->blocksize - 1))) return 0;
    return (q->double_quant | 1) == 1 && (!q->double_quant || q->nested_blocksize == 256);
}

/* UINT64_MAX: no such tensor can exist (overflow, a negative dimension, an invalid quant). A file's shape comes here
 * before anything is allocated or read, so nothing may wrap around on the way. */
uint64_t bnb_plane_bytes(int32_t type, const bnb_quant *quant, int32_t n_dims, const int64_t *shape, int32_t plane) {
    uint64_t n = 1, nb, bytes;
    int32_t empty = 0;
    if (!bnb__quant_valid(type, quant) || n_dims < 0 || n_dims > BNB_MAX_DIMS || (n_dims && !shape)) return UINT64_MAX;
    if ((type == BNB_INT8 || type == BNB_INT8_KV) && n_dims != 2) return UINT64_MAX;
    if (type == BNB_INT8_KV && shape[1] % quant->blocksize) return UINT64_MAX;
    for (int32_t i = 0; i < n_dims; i++) {
        if (shape[i] < 0) return UINT64_MAX;
        empty |= shape[i] == 0;
    }
    for (int32_t i = 0; i < n_dims; i++) { /* n * 4 must fit into int64_t, also without the dimensions that are 0 */
        if ((uint64_t)shape[i] > (uint64_t)INT64_MAX / 4 / n) return UINT64_MAX;
        if (shape[i]) n *= (uint64_t)shape[i];
    }
    if (empty) n = 0;
    switch (type) {
    case BNB_INT8:
        if (shape[0] > INT64_MAX / 4) return UINT64_MAX;
        return plane == 0 ? n : plane == 1 ? (uint64_t)shape[0] * 4 : 0;
    case BNB_INT8_KV: return plane == 0 ? n : plane == 1 ? n / (uint64_t)quant->blocksize * 4 : 0;
    case BNB_NF4:
    case BNB_FP4:
        nb = n / (uint64_t)quant->blocksize + (n % (uint64_t)quant->blocksize != 0);
        if (plane == 0) return (n + 1) / 2;
        if (plane == 1) return quant->double_quant ? nb : nb * 4;
        if (plane == 2) return quant->double_quant ? (nb + 255) / 256 * 4 : 0;
        return plane == 3 && quant->double_quant ? 256 * 4 : 0;
    default: bytes = (uint64_t)bnb_type_bits(type) / 8; return plane == 0 ? n * bytes : 0;
    }
}

/* ==== [QUANT] ====================================================================================================
 * bitsandbytes' arithmetic. Every operator below is one rounded f32 operation; a = the weight, widened exactly.
 *
 * 4 bits (QLoRA), per block of the flattened tensor: m = max |a|, x = a * (1/m), code = a search in 15 bounds.
 *   CUDA  subnormal a count as 0; m ignores NaN; 1/m is the hardware's (bnb__rcp_cuda), so a block of zeros has
 *         x = 0 * inf = NaN. A NaN is code 0. FP4 goes by |x|, and a negative x has the sign bit even when it is 0.
 *   CPU   m of a block with a NaN is NaN; 1/max(m, 1e-38). The last, short block stores max(m, 1e-38) and divides by
 *         it. A NaN is above every bound. FP4 is a search in the 16 sorted values, where -0 stands after 0.
 *   An odd count is padded with a 0 in the last low nibble.
 * 8 bits of nested statistics (dynamic tree of Dettmers et al., "8-bit Optimizers"): the same with d = m - mean(m)
 *   over 256 blocks and the 255 midpoints of a 256-entry map. CUDA: an exact midpoint goes to the even code. CPU: x
 *   goes through a table of 65,536 steps on [-1, 1].
 * LLM.int8(), per row: a is rounded to f16 first; SCB = max |a|, code = nearest integer of a * s, NaN is 0.
 *   CUDA  SCB ignores NaN; s = 127 * (1/SCB), the hardware's reciprocal.     CPU  s = RN(1/SCB) * 127.
 * Back: value[code] * m, with m = RN(map[code8] * nested_absmax) + offset;  RN(q * SCB) * RN(1/127). One more rounding
 *   to f16 or bf16. CUDA also flushes subnormal products; here they are kept, as on the CPU. */

const float bnb_nf4_map[16] = {
    -0x1p+0f,        -0x1.647362p-1f, -0x1.0cd66p-1f,  -0x1.94654p-2f, -0x1.23449ap-2f, -0x1.7a6a7ep-3f,
    -0x1.74f0e2p-4f, 0x0p+0f,         0x1.45f5fep-4f,  0x1.4995c6p-3f, 0x1.f809bap-3f,  0x1.5a0674p-2f,
    0x1.c3497p-2f,   0x1.200f56p-1f,  0x1.722766p-1f,  0x1p+0f};

/* 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4 */
const float bnb_fp4_map[16] = {
    0x0p+0f,  0x1.555556p-8f,  0x1.555556p-1f,  0x1p+0f,  0x1.555556p-2f,  0x1p-1f,  0x1.555556p-3f,  0x1p-2f,
    -0x0p+0f, -0x1.555556p-8f, -0x1.555556p-1f, -0x1p+0f, -0x1.555556p-2f, -0x1p-1f, -0x1.555556p-3f, -0x1p-2f};

/* All four 4-bit rules are one search: rank = number of bounds below x, then code[rank].
 * The CUDA rule of FP4 is "|x| > t", so its negative bounds stand one ulp lower (x > pred(-t) means x >= -t), and its
 * sign rule x < 0 is the bound -2^-126, because no x lies between that and 0 (results below 2^-126 are flushed; left
 * unflushed, as here, they fall on the same side as 0). */
#define BNB__NF4_BOUNDS                                                                                                \
    {-0x1.b239bp-1f,  -0x1.38a4ep-1f,  -0x1.d709p-2f,   -0x1.5bd4ecp-2f, -0x1.e079d8p-3f,                              \
     -0x1.1a7178p-3f, -0x1.74f0e2p-5f, 0x1.45f5fep-5f,  0x1.ec90c4p-4f,  0x1.a0cfcp-3f,                                \
     0x1.2b05a8p-2f,  0x1.8ea7f2p-2f,  0x1.00da08p-1f,  0x1.491b5ep-1f,  0x1.b913b4p-1f}

static const bnb_rule4 bnb__rules4[2][2] = { /* [compat][NF4, FP4] */
    {{BNB__NF4_BOUNDS, -1.0f, FLT_MIN, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}},
     {{-0x1.aaaaacp-1f, -0x1.2aaaa2p-1f, -0x1.aaaaaep-2f, -0x1.2aaaacp-2f, -0x1.aaaaacp-3f,
       -0x1.600002p-4f, -0x1.555574p-9f, -0x1p-126f,      0x1.555572p-9f,  0x1.6p-4f,
       0x1.aaaaaap-3f,  0x1.2aaaaap-2f,  0x1.aaaaacp-2f,  0x1.2aaaap-1f,   0x1.aaaaaap-1f},
      0.0f, FLT_MIN, {11, 10, 13, 12, 15, 14, 9, 8, 0, 1, 6, 7, 4, 5, 2, 3}}},
    {{BNB__NF4_BOUNDS, 1.0f, 0.0f, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}},
     {{-0x1.aaaaacp-1f, -0x1.2aaaacp-1f, -0x1.aaaaacp-2f, -0x1.2aaaacp-2f, -0x1.aaaaacp-3f,
       -0x1.6p-4f,      -0x1.555556p-9f, 0x0p+0f,         0x1.555556p-9f,  0x1.6p-4f,
       0x1.aaaaacp-3f,  0x1.2aaaacp-2f,  0x1.aaaaacp-2f,  0x1.2aaaacp-1f,  0x1.aaaaacp-1f},
      1.0f, 0.0f, {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3}}},
};

const bnb_rule4 *bnb_quant_rule4(int32_t type, int32_t compat) { return &bnb__rules4[compat == BNB_COMPAT_CPU][type == BNB_FP4]; }

/* A rule laid out for the search: node i of a binary tree has the children 2i and 2i + 1, so that four steps of
 * "i = 2i + (x > tree[i])" from i = 1 end at 16 + rank, and each level of the tree fits a vector register. */
typedef struct bnb__search4 {
    float tree[16]; /* [1..15] */
    float nan, smallest;
    uint8_t code[16];
} bnb__search4;

static void bnb__search4_init(bnb__search4 *s, const bnb_rule4 *rule) {
    s->tree[0] = 0;
    for (int32_t half = 8, i = 1; half; half /= 2) {
        for (int32_t at = half - 1; at < 15; at += 2 * half) s->tree[i++] = rule->bound[at];
    }
    s->nan = rule->nan;
    s->smallest = rule->smallest;
    memcpy(s->code, rule->code, 16);
}

/* The inner loops, one row per instruction set; every row gives the same bits. */
typedef struct bnb__vec {
    uint32_t cpu; /* BNB_CPU_* bits it needs */
    void (*load)(int32_t type, const void *base, int64_t first, int64_t n, float *dst);
    void (*store)(int32_t type, const float *src, int64_t n, void *base, int64_t first);
    uint32_t (*absmax)(const float *a, int64_t n); /* bits of max |a|; above 7f800000: there is a NaN            */
    /* a [n], n even -> codes of a[i] * scale, packed [n/2] */
    void (*code4)(const bnb__search4 *s, const float *a, int64_t n, float scale, uint8_t *out);
    void (*code8)(const float *a, int64_t n, float scale, int8_t *out);      /* a [n] -> rint(a * scale), NaN is 0 */
    void (*value4)(const float *v, const uint8_t *q, int64_t n, float *dst); /* v [16], q [(n+1)/2] -> v[code] [n] */
    void (*value8)(const int8_t *q, int64_t n, float scb, float *dst);
} bnb__vec;

/* Patterns of positive numbers are ordered like the numbers, and those of NaN stand above infinity. */
static uint32_t bnb__absmax_plain(const float *a, int64_t n) {
    uint32_t m = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t u = bnb__bits(a[i]) & 0x7fffffff;
        m = BNB__MAX(u, m);
    }
    return m;
}

/* The two elements of a byte side by side, so that one's comparisons fill the other's waiting time. */
static void bnb__code4_plain(const bnb__search4 *s, const float *a, int64_t n, float scale, uint8_t *out) {
    for (int64_t i = 0; i < n; i += 2) {
        uint32_t c[2];
        for (int32_t j = 0; j < 2; j++) {
            float x = (fabsf(a[i + j]) < s->smallest ? 0.0f : a[i + j]) * scale;
            c[j] = 1;
            if (x != x) x = s->nan;
            for (int32_t level = 0; level < 4; level++) c[j] = 2 * c[j] + (x > s->tree[c[j]]);
        }
        out[i / 2] = (uint8_t)(s->code[c[0] - 16] << 4 | s->code[c[1] - 16]);
    }
}

static void bnb__code8_plain(const float *a, int64_t n, float scale, int8_t *out) {
    for (int64_t i = 0; i < n; i++) {
        float x = a[i] * scale; /* within 127 and an ulp, or NaN */
        out[i] = (int8_t)(x == x ? rintf(x) : 0.0f);
    }
}

static void bnb__value4_plain(const float *v, const uint8_t *q, int64_t n, float *dst) {
    for (int64_t i = 0; i + 1 < n; i += 2) {
        dst[i] = v[q[i / 2] >> 4];
        dst[i + 1] = v[q[i / 2] & 15];
    }
    if (n & 1) dst[n - 1] = v[q[n / 2] >> 4];
}

static void bnb__value8_plain(const int8_t *q, int64_t n, float scb, float *dst) {
    for (int64_t i = 0; i < n; i++) dst[i] = (float)q[i] * scb * 0x1.020408p-7f; /* the f32 nearest to 1/127 */
}

/* AVX2. What is left of n after whole vectors goes to the plain code. Nothing here adds to a product, so nothing can be
 * fused. AVX-512 was tried and left out: 10 to 15 % faster on a Zen 5 core, for another set of functions. */
#if defined(__x86_64__) && defined(__GNUC__)
#define BNB__VEC_AVX2 __attribute__((target("avx2,f16c")))

BNB__VEC_AVX2 static void bnb__load_avx2(int32_t type, const void *base, int64_t first, int64_t n, float *dst) {
    int64_t i = 0;
    if (type != BNB_F32) {
        const uint8_t *p = (const uint8_t *)base + first * 2;
        for (; i + 8 <= n; i += 8) {
            __m128i h = _mm_loadu_si128((const __m128i *)(p + 2 * i));
            __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
            _mm256_storeu_ps(dst + i, type == BNB_F16 ? _mm256_cvtph_ps(h) : _mm256_castsi256_ps(wide));
        }
    }
    bnb__load_f32(type, base, first + i, n - i, dst + i);
}

BNB__VEC_AVX2 static void bnb__store_avx2(int32_t type, const float *src, int64_t n, void *base, int64_t first) {
    int64_t i = 0;
    uint8_t *p = (uint8_t *)base + first * 2;
    if (type == BNB_F16) {
        for (; i + 8 <= n; i += 8) {
            __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            _mm_storeu_si128((__m128i *)(p + 2 * i), h);
        }
    } else if (type == BNB_BF16) {
        const __m256i one = _mm256_set1_epi32(1), half = _mm256_set1_epi32(0x7fff), nan = _mm256_set1_epi32(0x7fc0);
        for (; i + 8 <= n; i += 8) {
            __m256 x = _mm256_loadu_ps(src + i);
            __m256i u = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), one);
            u = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, half), odd), 16);
            u = _mm256_blendv_epi8(u, nan, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
            u = _mm256_permute4x64_epi64(_mm256_packus_epi32(u, u), 0x08);
            _mm_storeu_si128((__m128i *)(p + 2 * i), _mm256_castsi256_si128(u));
        }
    }
    bnb__store_f32(type, src + i, n - i, base, first + i);
}

BNB__VEC_AVX2 static uint32_t bnb__absmax_avx2(const float *a, int64_t n) {
    const __m256i abs = _mm256_set1_epi32(0x7fffffff);
    __m256i m0 = _mm256_setzero_si256(), m1 = m0;
    uint32_t lane[8], m;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        m0 = _mm256_max_epi32(m0, _mm256_and_si256(abs, _mm256_loadu_si256((const __m256i *)(a + i))));
        m1 = _mm256_max_epi32(m1, _mm256_and_si256(abs, _mm256_loadu_si256((const __m256i *)(a + i + 8))));
    }
    m = bnb__absmax_plain(a + i, n - i);
    _mm256_storeu_si256((__m256i *)lane, _mm256_max_epi32(m0, m1));
    for (i = 0; i < 8; i++) m = BNB__MAX(lane[i], m);
    return m;
}

BNB__VEC_AVX2 static void bnb__code4_avx2(const bnb__search4 *s, const float *a, int64_t n, float scale, uint8_t *out) {
    /* a level of the tree is a table of at most 8 numbers, looked up by the place within the level */
    const __m256 t0 = _mm256_set1_ps(s->tree[1]), t1 = _mm256_loadu_ps(s->tree + 2), t2 = _mm256_loadu_ps(s->tree + 4),
                 t3 = _mm256_loadu_ps(s->tree + 8), abs = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)),
                 small = _mm256_set1_ps(s->smallest), nan = _mm256_set1_ps(s->nan), mul = _mm256_set1_ps(scale);
    const __m256i code = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)s->code)),
                  order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), pair = _mm256_set1_epi16(0x0110);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m256i c[4], p;
        for (int32_t j = 0; j < 4; j++) {
            __m256 x = _mm256_loadu_ps(a + i + 8 * j), m;
            __m256i r;
            x = _mm256_and_ps(x, _mm256_cmp_ps(_mm256_and_ps(x, abs), small, _CMP_NLT_UQ)); /* flush; a NaN stays */
            x = _mm256_mul_ps(x, mul);
            x = _mm256_blendv_ps(x, nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
            m = _mm256_cmp_ps(x, t0, _CMP_GT_OQ); /* all ones, which is -1, where x is above */
            r = _mm256_srli_epi32(_mm256_castps_si256(m), 31);
            m = _mm256_cmp_ps(x, _mm256_permutevar8x32_ps(t1, r), _CMP_GT_OQ);
            r = _mm256_sub_epi32(_mm256_add_epi32(r, r), _mm256_castps_si256(m));
            m = _mm256_cmp_ps(x, _mm256_permutevar8x32_ps(t2, r), _CMP_GT_OQ);
            r = _mm256_sub_epi32(_mm256_add_epi32(r, r), _mm256_castps_si256(m));
            m = _mm256_cmp_ps(x, _mm256_permutevar8x32_ps(t3, r), _CMP_GT_OQ);
            c[j] = _mm256_sub_epi32(_mm256_add_epi32(r, r), _mm256_castps_si256(m));
        }
        /* packing works within halves of a register: 4 elements of each set in turn, put right by `order` */
        p = _mm256_packus_epi16(_mm256_packs_epi32(c[0], c[1]), _mm256_packs_epi32(c[2], c[3]));
        p = _mm256_shuffle_epi8(code, _mm256_permutevar8x32_epi32(p, order)); /* 32 codes, a byte each */
        p = _mm256_maddubs_epi16(p, pair);                                    /* 16 * even + odd       */
        p = _mm256_permute4x64_epi64(_mm256_packus_epi16(p, p), 0x08);
        _mm_storeu_si128((__m128i *)(out + i / 2), _mm256_castsi256_si128(p));
    }
    bnb__code4_plain(s, a + i, n - i, scale, out + i / 2);
}

BNB__VEC_AVX2 static void bnb__code8_avx2(const float *a, int64_t n, float scale, int8_t *out) {
    const __m256 mul = _mm256_set1_ps(scale);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m256i c[2], p;
        for (int32_t j = 0; j < 2; j++) {
            __m256 x = _mm256_mul_ps(_mm256_loadu_ps(a + i + 8 * j), mul);
            c[j] = _mm256_cvtps_epi32(_mm256_and_ps(x, _mm256_cmp_ps(x, x, _CMP_ORD_Q))); /* nearest even; NaN is 0 */
        }
        p = _mm256_permute4x64_epi64(_mm256_packs_epi32(c[0], c[1]), 0xd8);
        p = _mm256_permute4x64_epi64(_mm256_packs_epi16(p, p), 0x08);
        _mm_storeu_si128((__m128i *)(out + i), _mm256_castsi256_si128(p));
    }
    bnb__code8_plain(a + i, n - i, scale, out + i);
}

BNB__VEC_AVX2 static void bnb__value4_avx2(const float *v, const uint8_t *q, int64_t n, float *dst) {
    const __m256 low = _mm256_loadu_ps(v), high = _mm256_loadu_ps(v + 8);
    const __m128i mask = _mm_set1_epi8(15);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m128i b = _mm_loadl_epi64((const __m128i *)(q + i / 2));
        b = _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(b, 4), mask), _mm_and_si128(b, mask)); /* high first */
        for (int32_t j = 0; j < 2; j++, b = _mm_srli_si128(b, 8)) {
            __m256i c = _mm256_cvtepu8_epi32(b);
            /* a lookup takes the lower 3 bits; the fourth, moved into the sign, chooses between two lookups */
            __m256 x = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, c), _mm256_permutevar8x32_ps(high, c),
                                        _mm256_castsi256_ps(_mm256_slli_epi32(c, 28)));
            _mm256_storeu_ps(dst + i + 8 * j, x);
        }
    }
    bnb__value4_plain(v, q + i / 2, n - i, dst + i);
}

BNB__VEC_AVX2 static void bnb__value8_avx2(const int8_t *q, int64_t n, float scb, float *dst) {
    const __m256 s = _mm256_set1_ps(scb), inv = _mm256_set1_ps(0x1.020408p-7f);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 x = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(q + i))));
        _mm256_storeu_ps(dst + i, _mm256_mul_ps(_mm256_mul_ps(x, s), inv));
    }
    bnb__value8_plain(q + i, n - i, scb, dst + i);
}
#endif

static const bnb__vec bnb__vecs[] = { /* the best first */
#if defined(__x86_64__) && defined(__GNUC__)
    {BNB_CPU_FAST | BNB_CPU_AVX2, bnb__load_avx2, bnb__store_avx2, bnb__absmax_avx2, bnb__code4_avx2, bnb__code8_avx2,
     bnb__value4_avx2, bnb__value8_avx2},
#endif
    {0, bnb__load_f32, bnb__store_f32, bnb__absmax_plain, bnb__code4_plain, bnb__code8_plain, bnb__value4_plain,
     bnb__value8_plain},
};

/* cpu: BNB_CPU_* bits; 0 gives the plain code. */
static const bnb__vec *bnb__vec_for(uint32_t cpu) {
    const bnb__vec *v = bnb__vecs;
    while (v->cpu & ~cpu) v++;
    return v;
}

/* nb */
static int64_t bnb__blocks(const bnb_tensor *t) {
    int64_t n = bnb_tensor_elements(t);
    return n / t->quant.blocksize + (n % t->quant.blocksize != 0);
}

/* The absmax of a block of a 4-bit tensor, restored with two roundings if it is stored in 8 bits. */
static float bnb__scale_of(const bnb_tensor *t, int64_t block) {
    float m, a, v;
    if (!t->quant.double_quant) {
        memcpy(&m, (const uint8_t *)t->plane[1] + block * 4, 4);
        return m;
    }
    memcpy(&a, (const uint8_t *)t->plane[2] + block / t->quant.nested_blocksize * 4, 4);
    memcpy(&v, (const uint8_t *)t->plane[3] + ((const uint8_t *)t->plane[1])[block] * 4, 4);
    return bnb__rounded(v * a) + t->quant.nested_offset;
}

/* Values of elements [first, first + n) of an int8, nf4 or fp4 tensor: dst [n]. Rows of a 4-bit tensor may start within
 * a block and, with odd rows, within a byte. Scaling the 16 values of a block first gives the same products. */
static void bnb__dequant_span(const bnb__vec *vec, const bnb_tensor *t, int64_t first, int64_t n, float *dst) {
    const uint8_t *q = (const uint8_t *)t->plane[0];
    const float *map = t->type == BNB_NF4 ? bnb_nf4_map : bnb_fp4_map;
    const int64_t run = t->type == BNB_INT8 ? t->shape[1] : t->quant.blocksize; /* elements that share a scale */
    for (int64_t m; n > 0; first += m, dst += m, n -= m) {
        float scale, v[16];
        m = BNB__MIN(run - first % run, n);
        if (t->type == BNB_INT8) {
            memcpy(&scale, (const uint8_t *)t->plane[1] + first / run * 4, 4);
            vec->value8((const int8_t *)q + first, m, scale, dst);
            continue;
        }
        scale = bnb__scale_of(t, first / run);
        for (int32_t i = 0; i < 16; i++) v[i] = map[i] * scale;
        if (first & 1) dst[0] = v[q[first / 2] & 15];
        vec->value4(v, q + (first + 1) / 2, m - (first & 1), dst + (first & 1));
    }
}

/* The same for reference kernels. */
static void bnb__dequant_row(const bnb_tensor *t, int64_t first, int64_t n, float *dst) {
    bnb__dequant_span(bnb__vec_for(0), t, first, n, dst);
}

/* Block b of a row of an int8_kv cache; x [C]: the row. Where 127 / absmax would overflow, absmax counts as 0. */
static void bnb__put_block(const bnb__vec *vec, const bnb_tensor *cache, int64_t row, int64_t b, const float *x) {
    const int64_t B = cache->quant.blocksize;
    const uint32_t top = vec->absmax(x + b * B, B);
    const float absmax = top >= 0x7f800000 ? NAN : top < 0x03800000 ? 0.0f : bnb__float(top);
    /* times 0, a NaN or an infinity is NaN, whose code is 0 */
    vec->code8(x + b * B, B, absmax > 0 ? 127.0f / absmax : 0.0f, (int8_t *)cache->plane[0] + row * cache->shape[1] + b * B);
    ((float *)cache->plane[1])[b * cache->shape[0] + row] = absmax;
}

/* Entries 128..255 of the signed dynamic map; entry 127 is 0 and the ones below mirror 254..128 with a minus. It is
 * what PyTorch computes on CPUs with AVX2, and so what ordinary files hold; other CPUs differ in the last bits. */
static const uint32_t bnb__dynamic_bits[128] = {
    0x3513a3b7, 0x365a1a94, 0x370205ff, 0x37b24206, 0x38378034, 0x388aefb3, 0x38ba1f4b, 0x3923d70b, 0x398ce705,
    0x39c7e283, 0x3a016f01, 0x3a1eecc1, 0x3a3c6a80, 0x3a59e83e, 0x3a7765ff, 0x3aa7ef9d, 0x3af1a9fc, 0x3b1db22d,
    0x3b428f5c, 0x3b676c8a, 0x3b8624dd, 0x3b989374, 0x3bab020d, 0x3bbd70a4, 0x3bcfdf3b, 0x3be24dd3, 0x3bf4bc6a,
    0x3c039581, 0x3c0ccccd, 0x3c160418, 0x3c1f3b64, 0x3c3ae148, 0x3c68f5c3, 0x3c8b851f, 0x3ca28f5d, 0x3cb9999a,
    0x3cd0a3d7, 0x3ce7ae15, 0x3cfeb852, 0x3d0ae148, 0x3d166667, 0x3d21eb85, 0x3d2d70a3, 0x3d38f5c3, 0x3d447ae1,
    0x3d500000, 0x3d5b851f, 0x3d670a3d, 0x3d728f5d, 0x3d7e147b, 0x3d84cccd, 0x3d8a8f5d, 0x3d9051eb, 0x3d96147b,
    0x3d9bd70a, 0x3da1999a, 0x3da75c2a, 0x3dad1eb8, 0x3db2e148, 0x3db8a3d7, 0x3dbe6667, 0x3dc428f7, 0x3dc9eb85,
    0x3ddb3334, 0x3df80000, 0x3e0a6666, 0x3e18cccd, 0x3e273333, 0x3e35999a, 0x3e440000, 0x3e526666, 0x3e60cccd,
    0x3e6f3333, 0x3e7d9999, 0x3e860000, 0x3e8d3334, 0x3e946666, 0x3e9b999a, 0x3ea2cccc, 0x3eaa0000, 0x3eb13333,
    0x3eb86666, 0x3ebf999a, 0x3ec6cccc, 0x3ece0000, 0x3ed53333, 0x3edc6666, 0x3ee3999a, 0x3eeacccc, 0x3ef20000,
    0x3ef93332, 0x3f003333, 0x3f03cccc, 0x3f076666, 0x3f0b0000, 0x3f0e999a, 0x3f123334, 0x3f15cccd, 0x3f196666,
    0x3f1d0000, 0x3f20999a, 0x3f243334, 0x3f27cccd, 0x3f2b6666, 0x3f2f0000, 0x3f32999a, 0x3f363334, 0x3f39cccd,
    0x3f3d6666, 0x3f410000, 0x3f44999a, 0x3f483333, 0x3f4bcccd, 0x3f4f6666, 0x3f530000, 0x3f56999a, 0x3f5a3333,
    0x3f5dcccd, 0x3f616666, 0x3f650000, 0x3f68999a, 0x3f6c3333, 0x3f6fcccd, 0x3f736666, 0x3f770000, 0x3f7a999a,
    0x3f7e3333, 0x3f800000,
};

enum {
    BNB__QUANT_SPAN = 4096,  /* elements a thread holds as f32: the largest blocksize, and half of a 32 KiB L1 */
    BNB__QUANT_CHUNK = 32768 /* elements of one bnb_parallel item: whole spans, about 10 microseconds           */
};

/* One call of the functions below, as its threads see it. */
typedef struct bnb__qjob {
    void (*chunk)(struct bnb__qjob *job, int64_t i);
    const bnb__vec *vec;
    const bnb_tensor *src;
    bnb_tensor *dst;
    int32_t compat;
    int64_t n, step;       /* things to do: elements, blocks or rows; how many make a chunk  */
    float *absmax;         /* nf4, fp4: [nb]                                                 */
    bnb__search4 search;
    float bounds[256];     /* of the dynamic map                                             */
    int64_t *bad;          /* check_finite: [chunks] place of the first bad number, or -1    */
} bnb__qjob;

/* Subnormals and rounding as IEEE has them, whatever the caller's thread is set to (programs linked with -ffast-math
 * start with subnormals switched off). */
static void bnb__qjob_item(void *arg, int64_t i) {
    bnb__qjob *job = (bnb__qjob *)arg;
    fenv_t saved;
    int restore = fegetenv(&saved) == 0 && fesetenv(FE_DFL_ENV) == 0;
    job->chunk(job, i);
    if (restore) fesetenv(&saved);
}

/* Chunk i is [i * step, this). */
static int64_t bnb__qjob_end(const bnb__qjob *job, int64_t i) {
    return i * job->step + BNB__MIN(job->n - i * job->step, job->step);
}

/* Bits of the largest |a[i]| as each side sees it: CUDA ignores a NaN, on the CPU it becomes the maximum. */
static uint32_t bnb__qjob_absmax(const bnb__qjob *job, const float *a, int64_t n) {
    uint32_t top = job->vec->absmax(a, n);
    if (top <= 0x7f800000) return top;
    if (job->compat == BNB_COMPAT_CPU) return 0x7fc00000;
    top = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t u = bnb__bits(a[i]) & 0x7fffffff;
        top = u > top && u <= 0x7f800000 ? u : top;
    }
    return top;
}

/* Blocks of a 4-bit tensor, a span of them at a time: first all scales, then all codes, so that the CPU can work on the
 * divisions of several blocks at once. Spans start at even elements and whole blocks. */
static void bnb__quantize4_chunk(bnb__qjob *job, int64_t i) {
    const int64_t end = bnb__qjob_end(job, i), B = job->dst->quant.blocksize;
    for (int64_t e = i * job->step, span; e < end; e += span) {
        _Alignas(64) float a[BNB__QUANT_SPAN];
        float scale[BNB__QUANT_SPAN / 32];
        span = BNB__MIN(end - e, BNB__QUANT_SPAN);
        job->vec->load(job->src->type, job->src->plane[0], e, span, a);
        for (int64_t b = 0; b * B < span; b++) {
            int64_t n = BNB__MIN(span - b * B, B);
            float absmax = bnb__float(bnb__qjob_absmax(job, a + b * B, n));
            if (job->compat == BNB_COMPAT_CUDA) {
                absmax = bnb__ftz(absmax);
                scale[b] = bnb__rcp_cuda(absmax);
            } else {
                float clamped = absmax < 1e-38f ? 1e-38f : absmax;
                scale[b] = 1.0f / clamped;
                if (n < B) { /* the short block: its elements are divided here */
                    for (int64_t k = b * B; k < span; k++) a[k] /= clamped;
                    scale[b] = 1.0f;
                    absmax = clamped;
                }
            }
            job->absmax[e / B + b] = absmax;
        }
        if (span & 1) a[span] = 0.0f;
        for (int64_t b = 0; b * B < span; b++) {
            int64_t n = span - b * B < B ? span + (span & 1) - b * B : B;
            job->vec->code4(&job->search, a + b * B, n, scale[b], (uint8_t *)job->dst->plane[0] + (e + b * B) / 2);
        }
    }
}

/* What all nested blocks share: the map and its midpoints, then a NaN, which equals nothing; the mean of absmax [nb].
 * PyTorch sums in an order of its own; this is the exact mean, within 2 ulp of its and the same on every machine. */
static void bnb__nested_start(bnb__qjob *job, int64_t i) {
    const int64_t nb = bnb__blocks(job->dst);
    float map[256] = {0};
    double sum = 0;
    for (i = 0; i < 128; i++) map[128 + i] = bnb__float(bnb__dynamic_bits[i]);
    for (i = 0; i < 127; i++) map[i] = -map[254 - i];
    for (i = 0; i < 255; i++) job->bounds[i] = bnb__rounded(map[i] + map[i + 1]) * 0.5f;
    job->bounds[255] = NAN;
    memcpy(job->dst->plane[3], map, sizeof map);
    for (i = 0; i < nb; i++) sum += job->absmax[i];
    job->dst->quant.nested_offset = nb ? (float)(sum / (double)nb) : 0.0f;
}

/* Blocks of nested statistics: absmax [nb] -> planes 1 and 2. */
static void bnb__nested_chunk(bnb__qjob *job, int64_t i) {
    const int64_t first = i * 256, m = BNB__MIN(job->n - first, 256);
    const int cuda = job->compat == BNB_COMPAT_CUDA;
    uint8_t *codes = (uint8_t *)job->dst->plane[1] + first;
    float d[256], absmax = 0, scale;
    for (int64_t k = 0; k < m; k++) {
        d[k] = job->absmax[first + k] - job->dst->quant.nested_offset;
        if (cuda) d[k] = bnb__ftz(d[k]);
        absmax = fabsf(d[k]) > absmax ? fabsf(d[k]) : absmax; /* both sides ignore NaN */
    }
    scale = cuda ? bnb__rcp_cuda(absmax) : 1.0f / absmax;
    memcpy((uint8_t *)job->dst->plane[2] + i * 4, &absmax, 4);
    for (int64_t k = 0; k < m; k++) {
        float x = bnb__rounded(d[k] * scale);
        int32_t c;
        if (cuda) {
            c = bnb__count_below(job->bounds, 255, x); /* a subnormal x needs no flush: no bound lies beside 0 */
            c += c & (x == job->bounds[c]); /* an exact midpoint goes to the even code */
        } else if (x != x) { /* all of a block of zeros: 0 * inf */
            c = 0;
        } else {
            /* The steps of the table have the centres -1 + 2j / 65535. j: a fused multiply-add in f32, which double
             * holds exactly before its one rounding (25 + 16 bits). */
            float y = bnb__rounded((x < -1 ? -1 : x > 1 ? 1 : x) + 1.0f) * 0.5f;
            float j = (float)((int32_t)(float)((double)y * 65535.0 + 0.5) & 0xffff);
            float centre = bnb__rounded(2.0f * j) / 65535.0f;
            c = bnb__count_below(job->bounds, 255, bnb__rounded(centre) - 1.0f);
        }
        codes[k] = (uint8_t)c;
    }
}

/* Rows of an int8 tensor. Weights go through f16 first, as bitsandbytes casts them; above 65504 they become infinite,
 * and their row's codes 0. Rows longer than a span are read twice rather than kept. */
static void bnb__quantize8_chunk(bnb__qjob *job, int64_t i) {
    const int64_t end = bnb__qjob_end(job, i), cols = job->dst->shape[1];
    const bnb_tensor *src = job->src;
    for (int64_t row = i * job->step; row < end; row++) {
        _Alignas(64) float a[BNB__QUANT_SPAN];
        uint16_t h[BNB__QUANT_SPAN];
        uint32_t top = 0, u;
        float scb = 0, scale = 0;
        for (int32_t pass = 0; pass < 2; pass++) { /* the maximum, then the codes */
            for (int64_t k = 0, m; k < cols; k += m) {
                m = BNB__MIN(cols - k, BNB__QUANT_SPAN);
                if (pass == 0 || cols > BNB__QUANT_SPAN) {
                    job->vec->load(src->type, src->plane[0], row * cols + k, m, a);
                    if (src->type != BNB_F16) {
                        job->vec->store(BNB_F16, a, m, h, 0);
                        job->vec->load(BNB_F16, h, 0, m, a);
                    }
                }
                if (pass == 1) {
                    job->vec->code8(a, m, scale, (int8_t *)job->dst->plane[0] + row * cols + k);
                    continue;
                }
                u = bnb__qjob_absmax(job, a, m);
                top = BNB__MAX(u, top);
            }
            if (pass) break;
            scb = bnb__float(top);
            scale = job->compat == BNB_COMPAT_CUDA ? 127.0f * bnb__rcp_cuda(scb) : 127.0f * bnb__rounded(1.0f / scb);
        }
        memcpy((uint8_t *)job->dst->plane[1] + row * 4, &scb, 4);
    }
}

/* Through a span of f32 that stays in L1, whatever the two types are. */
static void bnb__dequantize_chunk(bnb__qjob *job, int64_t i) {
    const int64_t end = bnb__qjob_end(job, i);
    for (int64_t e = i * job->step, m; e < end; e += m) {
        _Alignas(64) float a[BNB__QUANT_SPAN];
        m = BNB__MIN(end - e, BNB__QUANT_SPAN);
        if (bnb_type_is_quantized(job->src->type)) bnb__dequant_span(job->vec, job->src, e, m, a);
        else job->vec->load(job->src->type, job->src->plane[0], e, m, a);
        job->vec->store(job->dst->type, a, m, job->dst->plane[0], e);
    }
}

/* Reports the first NaN or infinity among the scales (quantized) or the data of job->src. */
static void bnb__finite_chunk(bnb__qjob *job, int64_t i) {
    const int64_t end = bnb__qjob_end(job, i);
    const bnb_tensor *t = job->src;
    for (int64_t e = i * job->step, m; e < end; e += m) {
        _Alignas(64) float a[BNB__QUANT_SPAN];
        m = BNB__MIN(end - e, BNB__QUANT_SPAN);
        if (t->type == BNB_INT8) job->vec->load(BNB_F32, t->plane[1], e, m, a);
        else if (!bnb_type_is_quantized(t->type)) job->vec->load(t->type, t->plane[0], e, m, a);
        else for (int64_t k = 0; k < m; k++) a[k] = bnb__scale_of(t, e + k);
        if (job->vec->absmax(a, m) < 0x7f800000) continue;
        for (int64_t k = 0; k < m; k++) {
            if (isfinite(a[k])) continue;
            job->bad[i] = e + k;
            return;
        }
    }
}

/* Runs chunk for every step of n things. What a chunk does depends on n alone, never on the number of threads. */
static void bnb__qjob_run(bnb_env *env, bnb__qjob *job, void (*chunk)(bnb__qjob *, int64_t), int64_t n, int64_t step) {
    job->chunk = chunk;
    job->n = n;
    job->step = step;
    job->vec = bnb__vec_for(bnb_env_cpu(env));
    bnb_parallel(env, n / step + (n % step != 0), bnb__qjob_item, job);
}

/* All planes of t can be read and written here, one after the other in memory. */
static bnb_status bnb__quant_ready(const bnb_tensor *t, const char *verb, bnb_error *err) {
    int64_t bytes = bnb_type_bits(t->type) / 8;
    if (t->state != BNB_RESIDENT || !bnb__on_host(t)) {
        return bnb_fail(err, BNB_E_ARG, "%s: tensor '%s' has no memory on the host", verb, t->name);
    }
    for (int32_t i = t->n_dims - 1; i >= 0 && !bnb_type_is_quantized(t->type); bytes *= t->shape[i], i--) {
        if (t->shape[i] > 1 && t->stride[i] != bytes) {
            return bnb_fail(err, BNB_E_SHAPE, "%s: tensor '%s' is a view with gaps", verb, t->name);
        }
    }
    for (int32_t i = 0; i < BNB_MAX_PLANES; i++) {
        uint64_t need = bnb_plane_bytes(t->type, &t->quant, t->n_dims, t->shape, i);
        if (need == UINT64_MAX) {
            return bnb_fail(err, BNB_E_ARG, "%s: tensor '%s' has a %s description that is not valid", verb, t->name,
                            bnb_type_name(t->type));
        }
        if (need && !t->plane[i]) {
            return bnb_fail(err, BNB_E_ARG, "%s: plane %d of tensor '%s' has no memory", verb, (int)i, t->name);
        }
    }
    return BNB_OK;
}

/* What bnb_quantize and bnb_dequantize ask of their arguments. */
static bnb_status bnb__quant_check(const bnb_env *env, const bnb_tensor *src, const bnb_tensor *dst,
                                   int32_t to_quantized, const char *verb, bnb_error *err) {
    bnb_status status;
    if (!env || !src || !dst) return bnb_fail(err, BNB_E_ARG, "%s: env, src and dst must not be NULL", verb);
    if (!bnb__type_is_float(src->type) && (to_quantized || !bnb_type_is_quantized(src->type))) {
        return bnb_fail(err, BNB_E_TYPE, "%s: tensor '%s' is %s; the source must be f32, f16%s", verb, src->name,
                        bnb_type_name(src->type), to_quantized ? " or bf16" : ", bf16, int8, nf4 or fp4");
    }
    if (to_quantized ? !bnb_type_is_quantized(dst->type) : !bnb__type_is_float(dst->type)) {
        return bnb_fail(err, BNB_E_TYPE, "%s: tensor '%s' is %s; the result must be %s", verb, dst->name,
                        bnb_type_name(dst->type), to_quantized ? "int8, nf4 or fp4" : "f32, f16 or bf16");
    }
    if (bnb_tensor_elements(src) != bnb_tensor_elements(dst)) {
        return bnb_fail(err, BNB_E_SHAPE, "%s: tensor '%s' has %lld elements and '%s' has %lld", verb, src->name,
                        (long long)bnb_tensor_elements(src), dst->name, (long long)bnb_tensor_elements(dst));
    }
    status = bnb__quant_ready(src, verb, err);
    return status == BNB_OK ? bnb__quant_ready(dst, verb, err) : status;
}

bnb_status bnb_convert(int32_t src_type, const void *src, int32_t dst_type, void *dst, int64_t n, bnb_error *err) {
    float a[1024];
    if (!bnb__type_is_float(src_type) || !bnb__type_is_float(dst_type)) {
        const char *from = bnb_type_name(src_type), *to = bnb_type_name(dst_type);
        return bnb_fail(err, BNB_E_TYPE, "convert: %s to %s; both must be f32, f16 or bf16",
                        from ? from : "an unknown type", to ? to : "an unknown type");
    }
    if (n < 0 || (n > 0 && (!src || !dst))) {
        return bnb_fail(err, BNB_E_ARG, "convert: %lld elements, or src or dst is NULL", (long long)n);
    }
    if (src_type == dst_type && n > 0) memmove(dst, src, (size_t)n * (size_t)(bnb_type_bits(src_type) / 8));
    for (int64_t i = 0, m; i < n && src_type != dst_type; i += m) {
        m = BNB__MIN(n - i, 1024);
        bnb__load_f32(src_type, src, i, m, a);
        bnb__store_f32(dst_type, a, m, dst, i);
    }
    return BNB_OK;
}

bnb_status bnb_quantize(bnb_env *env, const bnb_tensor *src, bnb_tensor *dst, int32_t compat, bnb_error *err) {
    bnb__qjob job = {0};
    int64_t nb;
    bnb_status status = bnb__quant_check(env, src, dst, 1, "quantize", err);
    if (status != BNB_OK) return status;
    if (compat != BNB_COMPAT_CUDA && compat != BNB_COMPAT_CPU) {
        return bnb_fail(err, BNB_E_ARG, "quantize: tensor '%s': compat is %d, not BNB_COMPAT_CUDA or BNB_COMPAT_CPU",
                        dst->name, (int)compat);
    }
    job.src = src;
    job.dst = dst;
    job.compat = compat;
    dst->quant.dtype = src->type;
    dst->quant.nested_offset = 0;
    if (dst->type == BNB_INT8) {
        int64_t cols = BNB__MAX(dst->shape[1], 1);
        bnb__qjob_run(env, &job, bnb__quantize8_chunk, dst->shape[0], BNB__MAX(BNB__QUANT_CHUNK / cols, 1));
        return BNB_OK;
    }
    nb = bnb__blocks(dst);
    job.absmax = (float *)dst->plane[1];
    if (dst->quant.double_quant && nb > 0) { /* the f32 statistics are only needed until they have codes */
        job.absmax = (float *)bnb_alloc(env, (size_t)nb * 4, err);
        if (!job.absmax) return BNB_E_NOMEM;
    } else if ((uintptr_t)job.absmax % 4) {
        return bnb_fail(err, BNB_E_ARG, "quantize: the absmax of tensor '%s' is not at a multiple of 4", dst->name);
    }
    bnb__search4_init(&job.search, &bnb__rules4[compat][dst->type == BNB_FP4]);
    bnb__qjob_run(env, &job, bnb__quantize4_chunk, bnb_tensor_elements(src), BNB__QUANT_CHUNK);
    if (!dst->quant.double_quant) return BNB_OK;
    status = bnb_quantize_absmax(env, job.absmax, dst, compat, err);
    if (nb > 0) bnb_free(env, job.absmax, (size_t)nb * 4);
    return status;
}

bnb_status bnb_quantize_absmax(bnb_env *env, const float *absmax, bnb_tensor *dst, int32_t compat, bnb_error *err) {
    bnb__qjob job = {0};
    (void)err;
    job.dst = dst;
    job.compat = compat;
    job.absmax = (float *)absmax; /* only read */
    bnb__qjob_run(env, &job, bnb__nested_start, 1, 1);
    bnb__qjob_run(env, &job, bnb__nested_chunk, bnb__blocks(dst), 256);
    return BNB_OK;
}

bnb_status bnb_dequantize(bnb_env *env, const bnb_tensor *src, bnb_tensor *dst, bnb_error *err) {
    bnb__qjob job = {0};
    bnb_status status = bnb__quant_check(env, src, dst, 0, "dequantize", err);
    if (status != BNB_OK) return status;
    job.src = src;
    job.dst = dst;
    bnb__qjob_run(env, &job, bnb__dequantize_chunk, bnb_tensor_elements(src), BNB__QUANT_CHUNK);
    return BNB_OK;
}

bnb_status bnb_tensor_check_finite(bnb_env *env, const bnb_tensor *t, bnb_error *err) {
    enum { CHUNKS = 256 };
    int64_t bad[CHUNKS], n;
    bnb__qjob job = {0};
    const char *what = "element";
    bnb_status status;
    if (!env || !t) return bnb_fail(err, BNB_E_ARG, "check_finite: env and tensor must not be NULL");
    if (!bnb__type_is_float(t->type) && !bnb_type_is_quantized(t->type)) return BNB_OK;
    status = bnb__quant_ready(t, "check_finite", err);
    if (status != BNB_OK) return status;
    job.src = t;
    job.bad = bad;
    n = bnb_tensor_elements(t);
    if (t->type == BNB_INT8) {
        what = "SCB of row";
        n = t->shape[0];
    } else if (bnb_type_is_quantized(t->type)) {
        what = "absmax of block";
        n = bnb__blocks(t);
    }
    for (int32_t i = 0; i < CHUNKS; i++) bad[i] = -1;
    bnb__qjob_run(env, &job, bnb__finite_chunk, n, BNB__MAX(n / CHUNKS + 1, BNB__QUANT_CHUNK));
    for (int32_t i = 0; i < CHUNKS; i++) {
        float x;
        if (bad[i] < 0) continue;
        if (t->type == BNB_INT8) bnb__load_f32(BNB_F32, t->plane[1], bad[i], 1, &x);
        else if (bnb_type_is_quantized(t->type)) x = bnb__scale_of(t, bad[i]);
        else bnb__load_f32(t->type, t->plane[0], bad[i], 1, &x);
        return bnb_fail(err, BNB_E_NUMERIC, "tensor '%s': %s %lld is %s", t->name, what, (long long)bad[i],
                        x != x ? "NaN" : "infinite");
    }
    return BNB_OK;
}

/* ==== [TENSOR] ==================================================================================================
 * A ctx is a bump arena of metadata plus the buffers that bnb_ctx_alloc made. Building code is written like algebra:
 * the first failure sticks to the ctx, later calls return NULL, and bnb_graph_create reports it. */

typedef struct bnb__block {
    struct bnb__block *next;
    size_t size, used;
} bnb__block;

typedef struct bnb__buffer {
    struct bnb__buffer *next;
    bnb_backend *backend;
    void *ptr;
    uint64_t bytes;
} bnb__buffer;

struct bnb_ctx {
    bnb__owned owned;
    bnb__block *blocks;
    bnb__buffer *buffers;
    bnb_tensor **tensors; /* [n_tensors]: all but views, in order of creation */
    int32_t n_tensors, cap_tensors;
    uint64_t bytes;
    bnb_error error; /* the first failure of graph building */
};

static void bnb__ctx_destroy(bnb__owned *o) {
    bnb_ctx *c = (bnb_ctx *)o;
    bnb_env *env = o->env;
    for (bnb__buffer *b = c->buffers; b; b = b->next) b->backend->api->free(b->backend->dev, b->ptr, b->bytes);
    bnb_free(env, c->tensors, (size_t)c->cap_tensors * sizeof *c->tensors);
    for (bnb__block *b = c->blocks, *next; b; b = next) {
        next = b->next;
        bnb_free(env, b, b->size);
    }
    bnb_free(env, c, sizeof *c);
}

bnb_ctx *bnb_ctx_create(bnb_env *env, bnb_error *err) { return bnb__own(env, sizeof(bnb_ctx), bnb__ctx_destroy, err); }
void bnb_ctx_free(bnb_ctx *ctx) { if (ctx) bnb__disown(&ctx->owned); }
uint64_t bnb_ctx_bytes(const bnb_ctx *ctx) { return ctx->bytes; }

bnb_status bnb_ctx_status(const bnb_ctx *ctx, bnb_error *err) {
    if (ctx->error.code && err) *err = ctx->error;
    return ctx->error.code;
}

/* Zeroed; lives as long as the ctx. */
static void *bnb__ctx_take(bnb_ctx *c, size_t bytes) {
    enum { BLOCK = 64 * 1024 };
    bytes = bnb__align_up(bytes, 16);
    bnb__block *b = c->blocks;
    if (!b || b->size - b->used < bytes) {
        size_t header = bnb__align_up(sizeof *b, 16), size = BNB__MAX(header + bytes, (size_t)BLOCK);
        bnb_error *err = c->error.code ? NULL : &c->error;
        if (!(b = bnb_alloc(c->owned.env, size, err))) return NULL;
        *b = (bnb__block){c->blocks, size, header};
        c->blocks = b;
        c->bytes += size;
    }
    void *p = (char *)b + b->used;
    b->used += bytes;
    return p;
}

/* NULL, after keeping the ctx's first error */
#define BNB__CTX_FAIL(c, status, ...) ((c)->error.code ? 0 : bnb_fail(&(c)->error, status, __VA_ARGS__), (bnb_tensor *)NULL)

static void bnb__shape_text(const bnb_tensor *t, char out[96]) {
    int n = snprintf(out, 96, "%s [", bnb_type_name(t->type));
    for (int32_t i = 0; i < t->n_dims; i++)
        n += snprintf(out + n, (size_t)(96 - n), i ? ", %lld" : "%lld", (long long)t->shape[i]);
    snprintf(out + n, (size_t)(96 - n), "]");
}

static bnb_tensor *bnb__tensor_alloc(bnb_ctx *c) {
    if (c->n_tensors == c->cap_tensors) {
        int32_t cap = c->cap_tensors ? 2 * c->cap_tensors : 64;
        bnb_tensor **list = bnb_alloc(c->owned.env, (size_t)cap * sizeof *list, c->error.code ? NULL : &c->error);
        if (!list) return NULL;
        if (c->n_tensors) memcpy(list, c->tensors, (size_t)c->n_tensors * sizeof *list);
        bnb_free(c->owned.env, c->tensors, (size_t)c->cap_tensors * sizeof *list);
        c->tensors = list;
        c->cap_tensors = cap;
    }
    bnb_tensor *t = bnb__ctx_take(c, sizeof *t);
    if (!t) return NULL;
    t->ctx = c;
    return c->tensors[c->n_tensors++] = t;
}

static void bnb__set_strides(bnb_tensor *t) {
    int64_t stride = bnb_type_is_quantized(t->type) ? 0 : bnb_type_bits(t->type) / 8;
    for (int32_t i = BNB_MAX_DIMS; i-- > 0; stride *= t->shape[i]) t->stride[i] = stride;
}

static bnb_tensor *bnb__leaf(bnb_ctx *c, int32_t type, const bnb_quant *quant, int32_t n_dims, const int64_t *shape,
                             const char *name, int32_t flags) {
    if (!c || c->error.code) return NULL;
    name = name ? name : "";
    if (strlen(name) >= BNB_MAX_NAME)
        return BNB__CTX_FAIL(c, BNB_E_LIMIT, "the tensor name '%.60s...' is longer than %d bytes", name, BNB_MAX_NAME - 1);
    if (!bnb_type_name(type)) return BNB__CTX_FAIL(c, BNB_E_TYPE, "tensor '%s': there is no type %d", name, (int)type);
    if (n_dims < 1 || n_dims > BNB_MAX_DIMS)
        return BNB__CTX_FAIL(c, BNB_E_LIMIT, "tensor '%s': %d dimensions, not 1 to %d", name, (int)n_dims, BNB_MAX_DIMS);
    bnb_quant q = quant ? *quant : bnb_quant_default(type);
    if (!bnb__quant_valid(type, &q))
        return BNB__CTX_FAIL(c, BNB_E_ARG, "tensor '%s': blocksize %d (double_quant %d, nested blocksize %d) is not offered for %s",
                             name, (int)q.blocksize, (int)q.double_quant, (int)q.nested_blocksize, bnb_type_name(type));
    if ((type == BNB_INT8 || type == BNB_INT8_KV) && n_dims != 2)
        return BNB__CTX_FAIL(c, BNB_E_SHAPE, "tensor '%s': %s needs 2 dimensions, not %d", name, bnb_type_name(type), (int)n_dims);
    if (type == BNB_INT8_KV && shape[1] % q.blocksize)
        return BNB__CTX_FAIL(c, BNB_E_SHAPE, "tensor '%s': %lld columns are not whole blocks of %d", name, (long long)shape[1],
                             (int)q.blocksize);
    for (int32_t i = 0; i < BNB_MAX_PLANES; i++)
        if (bnb_plane_bytes(type, &q, n_dims, shape, i) > (uint64_t)INT64_MAX)
            return BNB__CTX_FAIL(c, BNB_E_SHAPE, "tensor '%s': its dimensions are negative or overflow", name);
    bnb_tensor *t = bnb__tensor_alloc(c);
    if (!t) return NULL;
    t->type = type;
    t->n_dims = n_dims;
    t->quant = q;
    t->flags = flags;
    for (int32_t i = 0; i < BNB_MAX_DIMS; i++) t->shape[i] = i < n_dims ? shape[i] : 1;
    bnb__set_strides(t);
    memcpy(t->name, name, strlen(name) + 1);
    return t;
}

bnb_tensor *bnb_tensor_new(bnb_ctx *ctx, int32_t type, const bnb_quant *quant, int32_t n_dims, const int64_t *shape,
                           const char *name) {
    return bnb__leaf(ctx, type, quant, n_dims, shape, name, 0);
}

bnb_tensor *bnb_input(bnb_ctx *ctx, int32_t type, int32_t n_dims, const int64_t *shape, const char *name) {
    if (ctx && (bnb_type_is_quantized(type) || type == BNB_INT8_KV))
        return BNB__CTX_FAIL(ctx, BNB_E_TYPE, "input '%s': inputs are plain, not %s", name ? name : "", bnb_type_name(type));
    return bnb__leaf(ctx, type, NULL, n_dims, shape, name, BNB_FLAG_INPUT);
}

static int bnb__is_float(const bnb_tensor *t) { return t->type == BNB_F32 || t->type == BNB_F16 || t->type == BNB_BF16; }

static uint64_t bnb__plane_size(const bnb_tensor *t, int32_t plane) {
    return bnb_plane_bytes(t->type, &t->quant, t->n_dims, t->shape, plane);
}

bnb_status bnb_ctx_alloc(bnb_ctx *c, bnb_backend *backend, bnb_error *err) {
    enum { PLANE_ALIGN = 256 };
    if (bnb_ctx_status(c, err)) return c->error.code;
    uint64_t total = 0;
    int32_t n = 0; /* tensors that have no memory */
    for (int pass = 0; pass < 2; pass++) { /* measure, then place */
        char *base = NULL;
        if (pass) {
            if (!n) return BNB_OK;
            bnb__buffer *b = bnb__ctx_take(c, sizeof *b);
            if (!b) return bnb_fail(err, BNB_E_NOMEM, "%s", c->error.msg);
            base = backend->api->alloc(backend->dev, total, err);
            if (!base) return BNB_E_NOMEM;
            *b = (bnb__buffer){c->buffers, backend, base, total};
            c->buffers = b;
        }
        uint64_t at = 0;
        for (int32_t i = 0; i < c->n_tensors; i++) {
            bnb_tensor *t = c->tensors[i];
            if (t->state != BNB_META || t->op != BNB_OP_NONE || (t->flags & BNB_FLAG_INPUT)) continue;
            n++;
            for (int32_t p = 0; p < BNB_MAX_PLANES; p++) {
                uint64_t bytes = bnb__plane_size(t, p);
                if (bytes > (uint64_t)INT64_MAX - at - PLANE_ALIGN)
                    return bnb_fail(err, BNB_E_NOMEM, "tensor '%s': the tensors of this ctx overflow 64 bits", t->name);
                if (pass && bytes) t->plane[p] = base + at;
                at += bnb__align_up(bytes, PLANE_ALIGN);
            }
            if (pass) {
                if (!t->plane[0]) t->plane[0] = base; /* an empty tensor still has an address */
                t->backend = backend;
                t->state = BNB_RESIDENT;
            }
        }
        total = BNB__MAX(at, 1); /* empty tensors need an address, too */
    }
    return BNB_OK;
}

bnb_tensor *bnb_tensor_place(bnb_ctx *c, bnb_backend *backend, const bnb_tensor *like, int32_t compute_dtype) {
    bnb_tensor *t = bnb_tensor_new(c, like->type, &like->quant, like->n_dims, like->shape, like->name);
    if (!t) return NULL;
    t->backend = backend;
    t->state = BNB_PLACED;
    if (backend->api->place) backend->api->place(backend->dev, t, compute_dtype);
    return t;
}

bnb_status bnb_tensor_upload(bnb_tensor *t, const bnb_tensor *src, bnb_error *err) {
    const bnb_backend *backend = t->backend;
    int32_t quantize = bnb_type_is_quantized(t->type) && bnb__is_float(src);
    if (t->state != BNB_PLACED || src->state != BNB_RESIDENT || !bnb__on_host(src) || (src->type != t->type && !quantize) || src->n_dims != t->n_dims ||
        memcmp(src->shape, t->shape, sizeof t->shape) || (quantize && !backend->api->upload))
        return bnb_fail(err, BNB_E_ARG, "tensor '%s' cannot be uploaded: it must be placed, and the source like it and on the host", t->name);
    if (!quantize) t->quant = src->quant;
    else t->quant.dtype = src->type;
    if (!backend->api->upload) return bnb_tensor_bind(t, src->plane, err);
    bnb__buffer *b = bnb__ctx_take(t->ctx, sizeof *b);
    if (!b) return bnb_fail(err, BNB_E_NOMEM, "%s", t->ctx->error.msg);
    bnb_error why = {BNB_OK, ""};
    char *base = backend->api->alloc(backend->dev, t->layout_bytes, &why);
    if (!base) return bnb_fail(err, why.code, "tensor '%s': %.400s", t->name, why.msg);
    *b = (bnb__buffer){t->ctx->buffers, t->backend, base, t->layout_bytes};
    t->ctx->buffers = b;
    t->plane[0] = base;
    bnb_status s = backend->api->upload(backend->dev, t, src, err);
    if (!s) t->state = BNB_RESIDENT;
    return s;
}

bnb_status bnb_tensor_download(const bnb_tensor *src, bnb_tensor *dst, bnb_error *err) {
    if (src->state != BNB_RESIDENT || !src->layout || !src->backend || dst->state != BNB_RESIDENT || !bnb__on_host(dst) ||
        src->type != dst->type || src->n_dims != dst->n_dims || memcmp(src->shape, dst->shape, sizeof dst->shape))
        return bnb_fail(err, BNB_E_ARG, "tensor '%s' cannot be downloaded into '%s'", src->name, dst->name);
    dst->quant = src->quant;
    return src->backend->api->download(src->backend->dev, src, dst, err);
}

bnb_status bnb_tensor_bind(bnb_tensor *t, void *const *planes, bnb_error *err) {
    if (t->op != BNB_OP_NONE || (t->flags & BNB_FLAG_INPUT))
        return bnb_fail(err, BNB_E_ARG, "tensor '%s': only weights and caches can be bound to memory", t->name);
    for (int32_t p = 0; p < BNB_MAX_PLANES; p++) {
        if (bnb__plane_size(t, p) && !planes[p])
            return bnb_fail(err, BNB_E_ARG, "tensor '%s': plane %d is missing", t->name, (int)p);
        t->plane[p] = planes[p];
    }
    t->backend = NULL;
    t->state = BNB_RESIDENT;
    return BNB_OK;
}

static bnb_status bnb__check_range(const bnb_tensor *t, uint64_t offset, uint64_t n, const char *verb, bnb_error *err) {
    if (t->state != BNB_RESIDENT)
        return bnb_fail(err, BNB_E_ARG, "tensor '%s' cannot be %s: it has no memory yet", t->name, verb);
    if (t->view && t->n_dims == 2 && t->stride[0] != t->shape[1] * t->stride[1])
        return bnb_fail(err, BNB_E_ARG, "tensor '%s' cannot be %s: it is some columns of another", t->name, verb);
    uint64_t bytes = bnb__plane_size(t, 0);
    if (offset > bytes || n > bytes - offset)
        return bnb_fail(err, BNB_E_ARG, "tensor '%s': bytes %llu to %llu do not lie in its %llu", t->name,
                        (unsigned long long)offset, (unsigned long long)(offset + n), (unsigned long long)bytes);
    return BNB_OK;
}

bnb_status bnb_tensor_write(bnb_tensor *t, uint64_t offset, const void *src, uint64_t n, bnb_error *err) {
    bnb_status s = bnb__check_range(t, offset, n, "written", err);
    if (s || !n) return s;
    char *dst = (char *)t->plane[0] + offset;
    if (t->backend) return t->backend->api->write(t->backend->dev, dst, src, n, err);
    memcpy(dst, src, n);
    return BNB_OK;
}

bnb_status bnb_tensor_read(const bnb_tensor *t, uint64_t offset, void *dst, uint64_t n, bnb_error *err) {
    bnb_status s = bnb__check_range(t, offset, n, "read", err);
    if (s || !n) return s;
    const char *src = (const char *)t->plane[0] + offset;
    if (t->backend) return t->backend->api->read(t->backend->dev, dst, src, n, err);
    memcpy(dst, src, n);
    return BNB_OK;
}

static bnb_status bnb__check_fetch(const bnb_tensor *t, int32_t slot, bnb_error *err) {
    uint64_t bytes = bnb__plane_size(t, 0);
    if (slot < 0 || slot >= BNB_FETCH_SLOTS || bytes > BNB_FETCH_BYTES || !t->backend)
        return bnb_fail(err, BNB_E_ARG, "tensor '%s': %llu bytes cannot be fetched through slot %d", t->name, (unsigned long long)bytes, (int)slot);
    return bnb__check_range(t, 0, bytes, "fetched", err);
}

bnb_status bnb_tensor_fetch_begin(const bnb_tensor *t, int32_t slot, bnb_error *err) {
    bnb_status s = bnb__check_fetch(t, slot, err);
    if (!s && t->backend->api->fetch_begin) s = t->backend->api->fetch_begin(t->backend->dev, slot, t->plane[0], bnb__plane_size(t, 0), err);
    else if (!s) s = t->backend->api->read(t->backend->dev, t->backend->fetched[slot], t->plane[0], bnb__plane_size(t, 0), err);
    return s;
}

bnb_status bnb_tensor_fetch_end(const bnb_tensor *t, int32_t slot, void *dst, bnb_error *err) {
    bnb_status s = bnb__check_fetch(t, slot, err);
    if (!s && t->backend->api->fetch_end) s = t->backend->api->fetch_end(t->backend->dev, slot, dst, bnb__plane_size(t, 0), err);
    else if (!s) memcpy(dst, t->backend->fetched[slot], bnb__plane_size(t, 0));
    return s;
}

const char *bnb_tensor_name(const bnb_tensor *t) { return t->name; }
int32_t bnb_tensor_type(const bnb_tensor *t) { return t->type; }
const bnb_quant *bnb_tensor_quant(const bnb_tensor *t) { return &t->quant; }
int32_t bnb_tensor_n_dims(const bnb_tensor *t) { return t->n_dims; }
const int64_t *bnb_tensor_shape(const bnb_tensor *t) { return t->shape; }
int32_t bnb_tensor_state(const bnb_tensor *t) { return t->state; }

void *bnb_tensor_plane(const bnb_tensor *t, int32_t plane) {
    return plane < 0 || plane >= BNB_MAX_PLANES || t->state != BNB_RESIDENT ? NULL : t->plane[plane];
}

int64_t bnb_tensor_elements(const bnb_tensor *t) {
    int64_t n = 1; /* cannot overflow: bnb__leaf checked the bytes */
    for (int32_t i = 0; i < t->n_dims; i++) n *= t->shape[i];
    return n;
}

uint64_t bnb_tensor_bytes(const bnb_tensor *t) {
    uint64_t n = 0;
    for (int32_t p = 0; p < BNB_MAX_PLANES; p++) n += bnb__plane_size(t, p);
    return n;
}

uint64_t bnb_tensor_footprint(const bnb_tensor *t) { return bnb__plane_size(t, 0); }

/* ==== [OP] ======================================================================================================
 * A card is an op's row in bnb__ops (inputs, flags, shape rule) and its constructor. Kernels refer to ops by id. */

enum {
    BNB__VIEW = 1,    /* no kernel: the result is memory of src[0]                       */
    BNB__INPLACE = 2, /* may write over src[0] when nothing else needs it any more       */
    BNB__WRITES = 4   /* the result is src[0], a cache, after writing to it              */
};

typedef struct bnb__op_card {
    const char *name;
    int32_t n_in; /* inputs that must be there */
    int32_t flags;
    const char *(*shape)(bnb_tensor *y); /* fills type and shape from src and params; NULL or what is wrong */
} bnb__op_card;

static int bnb__is_rows(const bnb_tensor *t) { return t->type == BNB_F32 && t->n_dims == 2; }

static const char *bnb__result(bnb_tensor *y, int64_t rows, int64_t columns) {
    y->type = BNB_F32;
    y->n_dims = 2;
    y->shape[0] = rows;
    y->shape[1] = columns;
    y->shape[2] = y->shape[3] = 1;
    bnb__set_strides(y);
    return NULL;
}

static const char *bnb__shape_same(bnb_tensor *y) {
    const bnb_tensor *x = y->src[0];
    if (!bnb__is_rows(x)) return "the input must be f32 [T, C]";
    return bnb__result(y, x->shape[0], x->shape[1]);
}

static const char *bnb__shape_embed(bnb_tensor *y) {
    const bnb_tensor *table = y->src[0], *ids = y->src[1];
    if (!bnb__is_float(table) || table->n_dims != 2) return "the table must be f32, f16 or bf16 [V, C]";
    if (ids->type != BNB_I32 || ids->n_dims != 1) return "the ids must be i32 [T]";
    return bnb__result(y, ids->shape[0], table->shape[1]);
}

static int bnb__is_vector(const bnb_tensor *t, int64_t n) { return bnb__is_float(t) && t->n_dims == 1 && t->shape[0] == n; }

static const char *bnb__shape_linear(bnb_tensor *y) {
    const bnb_tensor *x = y->src[0], *w = y->src[1], *bias = y->src[2];
    if (!bnb__is_rows(x)) return "x must be f32 [T, K]";
    if (w->n_dims != 2 || !(bnb__is_float(w) || bnb_type_is_quantized(w->type))) return "the weight must be [N, K] of a type that can be multiplied";
    if (w->shape[1] != x->shape[1]) return "the weight's K is not x's";
    if (bias && !bnb__is_vector(bias, w->shape[0])) return "the bias must be f32, f16 or bf16 [N]";
    return bnb__result(y, x->shape[0], w->shape[0]);
}

static const char *bnb__shape_norm(bnb_tensor *y) {
    const bnb_tensor *x = y->src[0];
    for (int32_t i = 1; i <= 2; i++)
        if (y->src[i] && !bnb__is_vector(y->src[i], x->shape[1])) return "weight and bias must be f32, f16 or bf16 [C]";
    return bnb__shape_same(y);
}

static const char *bnb__shape_pair(bnb_tensor *y) {
    const bnb_tensor *a = y->src[0], *b = y->src[1];
    int same = bnb__is_rows(b) && b->shape[0] == a->shape[0] && b->shape[1] == a->shape[1];
    if (!same && !bnb__is_vector(b, a->shape[1])) return "b must have the shape of a, or be one row [C]";
    return bnb__shape_same(y);
}

static int bnb__is_cache(const bnb_tensor *t) {
    return (t->type == BNB_F32 || t->type == BNB_F16 || t->type == BNB_INT8_KV) && t->n_dims == 2;
}

static const char *bnb__shape_set_rows(bnb_tensor *y) {
    const bnb_tensor *cache = y->src[0], *x = y->src[1], *rows = y->src[2];
    if (!bnb__is_cache(cache)) return "the cache must be f32, f16 or int8_kv [R, C]";
    if (cache->op != BNB_OP_NONE || (cache->flags & BNB_FLAG_INPUT)) return "the cache must be a tensor made by bnb_tensor_new";
    if (!bnb__is_rows(x) || x->shape[1] != cache->shape[1]) return "x must be f32 [T, C] with the cache's C";
    if (rows->type != BNB_I32 || rows->n_dims != 1 || rows->shape[0] != x->shape[0]) return "rows must be i32 [T]";
    y->type = cache->type;
    y->quant = cache->quant;
    y->n_dims = 2;
    memcpy(y->shape, cache->shape, sizeof y->shape);
    bnb__set_strides(y);
    return NULL;
}

static const char *bnb__shape_attention(bnb_tensor *y) {
    const bnb_tensor *q = y->src[0], *k = y->src[1], *v = y->src[2], *span = y->src[3];
    int32_t heads = y->params.attention.n_head, kv = y->params.attention.n_head_kv;
    if (heads < 1 || kv < 1 || heads % kv) return "the number of heads must be a multiple of the number of key heads";
    if (!bnb__is_rows(q) || q->shape[1] % heads) return "q must be f32 [T, n_head * D]";
    int64_t D = q->shape[1] / heads, width = D * kv;
    if (!bnb__is_cache(k) || k->shape[1] != width) return "k must be f32, f16 or int8_kv [R, n_head_kv * D]";
    if (v->type != k->type || v->n_dims != 2 || v->shape[0] != k->shape[0] || v->shape[1] != width) return "v must be like k";
    if (k->type == BNB_INT8_KV && (k->quant.blocksize != D || v->quant.blocksize != D))
        return "the blocksize of int8_kv must be D";
    if (span->type != BNB_I32 || span->n_dims != 2 || span->shape[0] != q->shape[0] || span->shape[1] != 2) return "span must be i32 [T, 2]";
    return bnb__result(y, q->shape[0], q->shape[1]);
}

/* bnb_columns has checked the range: it knows `first`, which stands in view_offset. */
static const char *bnb__shape_columns(bnb_tensor *y) {
    (void)y;
    return NULL;
}

static const char *bnb__shape_argmax(bnb_tensor *y) {
    const bnb_tensor *x = y->src[0];
    if (!bnb__is_rows(x) || x->shape[1] < 1) return "the input must be f32 [T, C], C not 0";
    bnb__result(y, x->shape[0], 1);
    y->type = BNB_I32;
    y->n_dims = 1;
    bnb__set_strides(y);
    return NULL;
}

static const char *bnb__shape_draw(bnb_tensor *y) {
    const bnb_tensor *steps = y->src[1];
    const bnb_draw_rule *r = &y->params.draw;
    if (steps->type != BNB_I32 || steps->n_dims != 1 || steps->shape[0] != y->src[0]->shape[0]) return "the steps must be i32 [T]";
    if (!(r->temp >= 0) || !(r->top_p > 0) || !(r->min_p >= 0 && r->min_p <= 1) || r->top_k < 0)
        return "the rule needs temp >= 0, top_p > 0, 0 <= min_p <= 1 and top_k >= 0";
    return bnb__shape_argmax(y);
}

static const bnb__op_card bnb__ops[BNB_OP_COUNT] = {
    [BNB_OP_NONE] = {"none", 0, 0, NULL},
    [BNB_OP_EMBED] = {"embed", 2, 0, bnb__shape_embed},
    [BNB_OP_LINEAR] = {"linear", 2, 0, bnb__shape_linear},
    [BNB_OP_LAYER_NORM] = {"layer_norm", 1, BNB__INPLACE, bnb__shape_norm},
    [BNB_OP_RMS_NORM] = {"rms_norm", 1, BNB__INPLACE, bnb__shape_norm},
    [BNB_OP_ADD] = {"add", 2, BNB__INPLACE, bnb__shape_pair},
    [BNB_OP_MUL] = {"mul", 2, BNB__INPLACE, bnb__shape_pair},
    [BNB_OP_SCALE] = {"scale", 1, BNB__INPLACE, bnb__shape_same},
    [BNB_OP_GELU] = {"gelu", 1, BNB__INPLACE, bnb__shape_same},
    [BNB_OP_GELU_TANH] = {"gelu_tanh", 1, BNB__INPLACE, bnb__shape_same},
    [BNB_OP_RELU] = {"relu", 1, BNB__INPLACE, bnb__shape_same},
    [BNB_OP_SILU] = {"silu", 1, BNB__INPLACE, bnb__shape_same},
    [BNB_OP_SOFTMAX] = {"softmax", 1, BNB__INPLACE, bnb__shape_same},
    [BNB_OP_SET_ROWS] = {"set_rows", 3, BNB__WRITES, bnb__shape_set_rows},
    [BNB_OP_ATTENTION] = {"attention", 4, 0, bnb__shape_attention},
    [BNB_OP_COLUMNS] = {"columns", 1, BNB__VIEW, bnb__shape_columns},
    [BNB_OP_ARGMAX] = {"argmax", 1, 0, bnb__shape_argmax},
    [BNB_OP_DRAW] = {"draw", 2, 0, bnb__shape_draw},
};

const char *bnb_op_name(int32_t op) { return op < 0 || op >= BNB_OP_COUNT ? NULL : bnb__ops[op].name; }

/* The common constructor: checks inputs, applies the shape rule, names the node after what it works on. */
static bnb_tensor *bnb__node(bnb_ctx *c, int32_t op, bnb_params params, bnb_tensor *a, bnb_tensor *b, bnb_tensor *d,
                             bnb_tensor *e) {
    const bnb__op_card *card = &bnb__ops[op];
    if (!c || c->error.code) return NULL;
    bnb_tensor *in[4] = {a, b, d, e};
    for (int32_t i = 0; i < card->n_in; i++)
        if (!in[i]) return BNB__CTX_FAIL(c, BNB_E_ARG, "%s: input %d is missing", card->name, (int)i);
    bnb_tensor *y = bnb__tensor_alloc(c);
    if (!y) return NULL;
    y->op = op;
    y->params = params;
    memcpy(y->src, in, sizeof in);
    const char *what = op == BNB_OP_LINEAR || op == BNB_OP_EMBED ? in[op == BNB_OP_LINEAR]->name : a->name;
    snprintf(y->name, sizeof y->name, "%s(%.80s)", card->name, what);
    const char *wrong = card->shape(y);
    if (wrong) {
        char shapes[4][96] = {"", "", "", ""};
        for (int32_t i = 0; i < 4; i++)
            if (in[i]) bnb__shape_text(in[i], shapes[i]);
        return BNB__CTX_FAIL(c, BNB_E_SHAPE, "%s: %s, but the inputs are %s %s %s %s", y->name, wrong, shapes[0], shapes[1],
                             shapes[2], shapes[3]);
    }
    if (card->flags & (BNB__VIEW | BNB__WRITES)) y->view = a;
    if (card->flags & BNB__WRITES) a->flags |= BNB_FLAG_STATE;
    return y;
}

#define BNB__NO_PARAMS ((bnb_params){.norm = {0}})

bnb_tensor *bnb_embed(bnb_ctx *c, bnb_tensor *table, bnb_tensor *ids) {
    return bnb__node(c, BNB_OP_EMBED, BNB__NO_PARAMS, table, ids, NULL, NULL);
}
bnb_tensor *bnb_linear(bnb_ctx *c, bnb_tensor *x, bnb_tensor *w, bnb_tensor *bias) {
    return bnb__node(c, BNB_OP_LINEAR, BNB__NO_PARAMS, x, w, bias, NULL);
}
bnb_tensor *bnb_layer_norm(bnb_ctx *c, bnb_tensor *x, bnb_tensor *w, bnb_tensor *b, float eps) {
    return bnb__node(c, BNB_OP_LAYER_NORM, (bnb_params){.norm = {eps}}, x, w, b, NULL);
}
bnb_tensor *bnb_rms_norm(bnb_ctx *c, bnb_tensor *x, bnb_tensor *w, float eps) {
    return bnb__node(c, BNB_OP_RMS_NORM, (bnb_params){.norm = {eps}}, x, w, NULL, NULL);
}
bnb_tensor *bnb_add(bnb_ctx *c, bnb_tensor *a, bnb_tensor *b) { return bnb__node(c, BNB_OP_ADD, BNB__NO_PARAMS, a, b, NULL, NULL); }
bnb_tensor *bnb_mul(bnb_ctx *c, bnb_tensor *a, bnb_tensor *b) { return bnb__node(c, BNB_OP_MUL, BNB__NO_PARAMS, a, b, NULL, NULL); }
bnb_tensor *bnb_scale(bnb_ctx *c, bnb_tensor *x, float factor) {
    return bnb__node(c, BNB_OP_SCALE, (bnb_params){.scale = {factor}}, x, NULL, NULL, NULL);
}

#define BNB__UNARY(function, OP) \
    bnb_tensor *function(bnb_ctx *c, bnb_tensor *x) { return bnb__node(c, OP, BNB__NO_PARAMS, x, NULL, NULL, NULL); }
BNB__UNARY(bnb_gelu, BNB_OP_GELU)
BNB__UNARY(bnb_gelu_tanh, BNB_OP_GELU_TANH)
BNB__UNARY(bnb_relu, BNB_OP_RELU)
BNB__UNARY(bnb_silu, BNB_OP_SILU)
BNB__UNARY(bnb_softmax, BNB_OP_SOFTMAX)
#undef BNB__UNARY

bnb_tensor *bnb_argmax(bnb_ctx *c, bnb_tensor *x) { return bnb__node(c, BNB_OP_ARGMAX, BNB__NO_PARAMS, x, NULL, NULL, NULL); }

bnb_tensor *bnb_draw(bnb_ctx *c, bnb_tensor *x, bnb_tensor *steps, const bnb_draw_rule *rule) {
    return bnb__node(c, BNB_OP_DRAW, (bnb_params){.draw = *rule}, x, steps, NULL, NULL);
}

bnb_tensor *bnb_set_rows(bnb_ctx *c, bnb_tensor *cache, bnb_tensor *x, bnb_tensor *rows) {
    return bnb__node(c, BNB_OP_SET_ROWS, BNB__NO_PARAMS, cache, x, rows, NULL);
}

bnb_tensor *bnb_attention(bnb_ctx *c, bnb_tensor *q, bnb_tensor *k, bnb_tensor *v, bnb_tensor *span, int32_t n_head,
                          int32_t n_head_kv, float scale) {
    return bnb__node(c, BNB_OP_ATTENTION, (bnb_params){.attention = {n_head, n_head_kv, scale}}, q, k, v, span);
}

bnb_tensor *bnb_columns(bnb_ctx *c, bnb_tensor *x, int64_t first, int64_t n) {
    if (!c || c->error.code) return NULL;
    if (!x || !bnb__is_rows(x)) return BNB__CTX_FAIL(c, BNB_E_SHAPE, "columns: the input must be f32 [T, C]");
    if (first < 0 || n < 1 || first > x->shape[1] - n)
        return BNB__CTX_FAIL(c, BNB_E_SHAPE, "columns(%s): %lld columns from column %lld on do not lie in %lld", x->name,
                             (long long)n, (long long)first, (long long)x->shape[1]);
    bnb_tensor *y = bnb__node(c, BNB_OP_COLUMNS, BNB__NO_PARAMS, x, NULL, NULL, NULL);
    if (!y) return NULL;
    bnb__result(y, x->shape[0], n);
    memcpy(y->stride, x->stride, sizeof y->stride);
    y->view_offset = (uint64_t)first * sizeof(float);
    return y;
}

/* ==== [GRAPH] ===================================================================================================
 * Nodes and the leaves they need, in topological order: sources before users. */

struct bnb_graph {
    bnb_ctx *ctx;
    bnb_tensor **nodes;  /* [n_nodes]  */
    bnb_tensor **leaves; /* [n_leaves] */
    int32_t n_nodes, n_leaves;
    int32_t planned;     /* a plan gives its nodes their addresses: one plan at a time */
};

enum { BNB__UNSEEN = 0, BNB__OPEN = 1, BNB__DONE = 2 };

/* Depth first without recursion: a graph may be as deep as it is long. `mark` of nodes is left clean. Leaves may be
 * shared with other ctxs and threads, so their marks are not touched: they are found by search in the few we have. */
static int32_t bnb__visit(bnb_tensor **stack, bnb_tensor *root, bnb_graph *g) {
    int32_t depth = 0;
    stack[depth++] = root;
    while (depth) {
        bnb_tensor *t = stack[depth - 1];
        if (t->mark == BNB__DONE) { depth--; continue; }
        t->mark = BNB__OPEN;
        int32_t pushed = 0;
        for (int32_t i = BNB_MAX_SRC; i-- > 0;) {
            bnb_tensor *s = t->src[i];
            if (!s || s->op == BNB_OP_NONE) continue;
            if (s->ctx != g->ctx) return 0;
            if (s->mark == BNB__UNSEEN) { stack[depth++] = s; pushed = 1; }
        }
        if (pushed) continue;
        t->mark = BNB__DONE;
        g->nodes[g->n_nodes++] = t;
        depth--;
    }
    return 1;
}

bnb_graph *bnb_graph_create(bnb_ctx *c, bnb_tensor *const *outputs, int32_t n, bnb_error *err) {
    if (bnb_ctx_status(c, err)) return NULL;
    for (int32_t i = 0; i < n; i++)
        if (!outputs[i] || outputs[i]->ctx != c || outputs[i]->op == BNB_OP_NONE) {
            bnb_fail(err, BNB_E_ARG, "output %d of the graph is not a node of its ctx", (int)i);
            return NULL;
        }
    /* a node is pushed at most once for each of its users' inputs */
    size_t cap = (size_t)c->n_tensors, stack_bytes = (cap * BNB_MAX_SRC + 1) * sizeof(bnb_tensor *);
    bnb_graph *g = bnb__ctx_take(c, sizeof *g);
    bnb_tensor **nodes = bnb__ctx_take(c, cap * sizeof *nodes), **leaves = bnb__ctx_take(c, cap * BNB_MAX_SRC * sizeof *leaves);
    bnb_tensor **stack = bnb_alloc(c->owned.env, stack_bytes, err);
    if (!g || !nodes || !leaves || !stack) {
        bnb_free(c->owned.env, stack, stack_bytes);
        bnb_fail(err, BNB_E_NOMEM, "out of memory for a graph of %zu tensors", cap);
        return NULL;
    }
    *g = (bnb_graph){c, nodes, leaves, 0, 0, 0};
    int32_t ok = 1;
    for (int32_t i = 0; i < n && ok; i++) {
        ok = bnb__visit(stack, outputs[i], g);
        outputs[i]->flags |= BNB_FLAG_OUTPUT;
    }
    bnb_free(c->owned.env, stack, stack_bytes);
    for (int32_t i = 0; i < c->n_tensors; i++) c->tensors[i]->mark = BNB__UNSEEN;
    if (!ok) {
        bnb_fail(err, BNB_E_ARG, "the graph uses nodes of another ctx; only weights and caches may be shared");
        return NULL;
    }
    for (int32_t i = 0; i < g->n_nodes; i++)
        for (int32_t j = 0; j < BNB_MAX_SRC; j++) {
            bnb_tensor *s = g->nodes[i]->src[j];
            if (!s || s->op != BNB_OP_NONE) continue;
            int32_t k = 0;
            while (k < g->n_leaves && g->leaves[k] != s) k++;
            if (k == g->n_leaves) g->leaves[g->n_leaves++] = s;
        }
    return g;
}

int32_t bnb_graph_size(const bnb_graph *g) { return g->n_nodes; }
bnb_tensor *bnb_graph_node(const bnb_graph *g, int32_t i) { return i < 0 || i >= g->n_nodes ? NULL : g->nodes[i]; }

/* ==== [CPU] =====================================================================================================
 * A kernel is one row: what it takes and how it is cut into tiles. Rows are ordered best first and the first that fits
 * is used, so a node runs exactly if a row fits: there is no second list that says what is supported. The reference
 * kernels at the end fit everything; every fast one is checked against them. */

/* One node as its kernel sees it. Threads take tiles of a phase in any order; a barrier stands between phases. What a
 * tile computes does not depend on which thread runs it or on how many there are. */
typedef struct bnb__job {
    const bnb_tensor *y; /* the node; y->src[i] are its sources       */
    void *work;          /* shared scratch of work() bytes            */
    void *local;         /* this thread's scratch of local() bytes    */
} bnb__job;

typedef struct bnb__kernel {
    const char *name;
    int32_t op;
    int32_t type;         /* linear: of the weight; attention: of k and v; -1: any */
    int32_t compute;      /* BNB_F32, BNB_BF16; -1: has no choice                  */
    int64_t m_min, m_max; /* rows of the result                                    */
    uint32_t cpu;         /* BNB_CPU_* bits that it needs                          */
    int32_t (*fits)(const bnb_tensor *y);                 /* NULL: always */
    int32_t phases;
    int64_t (*tiles)(const bnb_tensor *y, int32_t phase);
    uint64_t (*work)(const bnb_tensor *y);                /* NULL: none */
    uint64_t (*local)(const bnb_tensor *y);               /* NULL: none */
    void (*run)(const bnb__job *job, int32_t phase, int64_t tile);
} bnb__kernel;

static const float *bnb__row(const bnb_tensor *t, int64_t row) {
    return (const float *)((const char *)t->plane[0] + row * t->stride[0]);
}
static float *bnb__row_out(const bnb_tensor *t, int64_t row) { return (float *)((char *)t->plane[0] + row * t->stride[0]); }

/* ---- [CPU] fast kernels ----------------------------------------------------------------------------------------------
 * Two shapes of product cover every weight format:
 *
 *   dot   few rows of x (decode). Lanes run along k, weights are read once, straight from the file's planes, and
 *         decoded in registers: the time is that of reading them.
 *   gemm  many rows of x (prompts). Lanes run along the rows of x: x is packed once into panels [k][mr rows], a tile of
 *         weights is decoded once into rows [n][k], and each 32-bit piece of a weight row is broadcast against a panel.
 *         One 32-bit lane holds 1 f32, 2 bf16, 2 i16 or 4 i8 numbers of k, so one driver serves all four.
 *
 * Each element of y is summed over k in one fixed order that depends on the kernel only, never on threads or tiles.
 * Code for an instruction set sits in functions with a target attribute: this file needs no compiler flags. */
#if defined(__x86_64__) && ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)) && \
    !defined(BNB_FUZZ) /* fuzzers read files: instrumenting these takes minutes, and they never run */
#include <immintrin.h> /* defines: __m512 and friends */
#include <string.h>    /* defines: memcpy, memset */

#define BNB__INLINE static inline __attribute__((always_inline))
#define BNB__AVX2 __attribute__((target("avx2,fma,f16c")))
#define BNB__AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))
#define BNB__VNNI __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define BNB__BF16 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define BNB__AMX __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-bf16,amx-int8")))
#if defined(__clang__) /* arrays of vectors live in registers only if the loops over them are unrolled */
#define BNB__UNROLL _Pragma("clang loop unroll(full)")
#else
#define BNB__UNROLL _Pragma("GCC unroll 32")
#endif

BNB__INLINE int64_t bnb__size_of(const int type) { return type == BNB_F32 ? 4 : type == BNB_INT8_KV ? 1 : 2; }

/* The numbers of a linear: y [M, N] = x [M, K] w [N, K]^T + bias [N]. */
typedef struct bnb__linear {
    const char *x;     /* f32 [M, K] (attention: also f16 and int8_kv), rows x_stride bytes apart */
    int64_t x_stride;
    int32_t x_type;
    const bnb_tensor *w, *bias;
    const uint8_t *codes; /* plane 0 of w */
    float *y;          /* [M, N] */
    int64_t M, N, K;
} bnb__linear;

static bnb__linear bnb__linear_of(const bnb_tensor *y)
{
    const bnb_tensor *x = y->src[0], *w = y->src[1];
    return (bnb__linear){(const char *)x->plane[0], x->stride[0], BNB_F32, w, y->src[2], (const uint8_t *)w->plane[0],
                         (float *)y->plane[0], x->shape[0], w->shape[0], w->shape[1]};
}

/* 4-bit rows must consist of whole blocks: then a vector of 32 weights never meets a second scale. */
static int32_t bnb__fits4(const bnb_tensor *y)
{
    const bnb_tensor *w = y->src[1];
    return w->quant.blocksize >= 32 && w->shape[1] % w->quant.blocksize == 0 &&
           (!w->quant.double_quant || w->quant.nested_blocksize == 256);
}

BNB__INLINE BNB__AVX2 float bnb__number(int32_t type, const void *p, int64_t i) /* element i of a plain array */
{
    uint16_t h;
    float f;
    if (type == BNB_F32) return memcpy(&f, (const char *)p + 4 * i, 4), f;
    memcpy(&h, (const char *)p + 2 * i, 2);
    return type == BNB_F16 ? _cvtsh_ss(h) : _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((int)((uint32_t)h << 16))));
}

BNB__INLINE BNB__AVX2 float bnb__bias(const bnb_tensor *bias, int64_t n)
{
    return bias ? bnb__number(bias->type, bias->plane[0], n) : 0.0f;
}

/* absmax of block b. The empty asm keeps the compiler from fusing two roundings into one (it may, in ISO C). */
BNB__INLINE BNB__AVX2 float bnb__absmax(const bnb_tensor *w, int64_t b)
{
    if (!w->quant.double_quant) return bnb__number(BNB_F32, w->plane[1], b);
    float a = bnb__number(BNB_F32, w->plane[3], ((const uint8_t *)w->plane[1])[b]) *
              bnb__number(BNB_F32, w->plane[2], b >> 8);
    __asm__("" : "+x"(a));
    return a + w->quant.nested_offset;
}

/* absmax of blocks [b, b + n) into local [n], to the bits of bnb__absmax(). */
static BNB__AVX2 const float *bnb__absmax_restore(const bnb_tensor *w, int64_t b, int64_t n, float *local)
{
    const uint8_t *codes = (const uint8_t *)w->plane[1] + b;
    __m256 offset = _mm256_set1_ps(w->quant.nested_offset);
    for (int64_t i = 0, end; i < n; i = end) { /* the blocks of one nested block */
        end = ((b + i) | 255) + 1 - b < n ? ((b + i) | 255) + 1 - b : n;
        __m256 scale = _mm256_set1_ps(bnb__number(BNB_F32, w->plane[2], (b + i) >> 8));
        for (; i + 8 <= end; i += 8) {
            __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(codes + i)));
            __m256 a = _mm256_mul_ps(_mm256_i32gather_ps((const float *)w->plane[3], code, 4), scale);
            __asm__("" : "+x"(a)); /* two roundings, as there */
            _mm256_storeu_ps(local + i, _mm256_add_ps(a, offset));
        }
        for (; i < end; i++) local[i] = bnb__absmax(w, b + i);
    }
    return local;
}

/* absmax of blocks [b, b + n): in place, or restored into local [n]. */
BNB__INLINE BNB__AVX2 const float *bnb__absmaxes(const bnb_tensor *w, int64_t b, int64_t n, float *local)
{
    return w->quant.double_quant ? bnb__absmax_restore(w, b, n, local) : (const float *)w->plane[1] + b;
}

BNB__INLINE BNB__AVX2 __m256 bnb__sum8(const __m256 *v) /* [8] -> lane i is the sum of v[i] */
{
    __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

/* Lanes 0 and 1 of the same, to the same bits, with half the shuffles: a short row has little else to do. */
BNB__INLINE BNB__AVX2 __m256 bnb__sum2(__m256 a, __m256 b)
{
    __m256 s = _mm256_hadd_ps(a, b);
    s = _mm256_hadd_ps(s, s);
    return _mm256_add_ps(s, _mm256_permute2f128_ps(s, s, 0x01));
}

/* ---- dot: y for M rows of x, R rows of w at a time ---- */

enum {
    BNB__DOT_BYTES = 65536,   /* of weights in a tile: some microseconds, so that threads end together              */
    BNB__DOT_PREFETCH = 4096  /* bytes ahead of what is decoded: better than 1, 2, 8 or 16 KiB                      */
};

static int64_t bnb__dot_rows(const bnb_tensor *w) /* rows of w in a tile, a multiple of 8 */
{
    int64_t bytes = (w->shape[1] * (w->type == BNB_INT8 ? 8 : bnb_type_bits(w->type)) + 7) / 8;
    int64_t rows = (BNB__DOT_BYTES / (bytes ? bytes : 1)) & ~(int64_t)7;
    return rows < 8 ? 8 : rows > 1024 ? 1024 : rows;
}

static int64_t bnb__dot_tiles(const bnb_tensor *w) { return (w->shape[0] + bnb__dot_rows(w) - 1) / bnb__dot_rows(w); }
static int64_t bnb__dot_m(int64_t M) { return M <= 4 ? M : M <= 6 ? 6 : 8; } /* M that there is code for */

/* Calls f(.., M, R) with constants. R * M <= 8 sums are reduced together. */
#define BNB__DOT_SWITCH(M, CALL)                                                                                       \
    switch (bnb__dot_m(M)) {                                                                                           \
    case 1: CALL(1, 1); break;                                                                                               \
    case 2: CALL(2, 2); break;                                                                                         \
    case 3: CALL(3, 2); break;                                                                                         \
    case 4: CALL(4, 2); break;                                                                                         \
    case 6: CALL(6, 1); break;                                                                                         \
    default: CALL(8, 1); break;                                                                                        \
    }

/* Writes y[m, n + r] = sum[r * M + m] + bias[n + r] for the l->M rows that exist. */
BNB__INLINE BNB__AVX2 void bnb__dot_store(const bnb__linear *l, int64_t n, const __m256 *sum, const int M, const int R)
{
    float s[8];
    _mm256_storeu_ps(s, R * M <= 2 ? bnb__sum2(sum[0], sum[1]) : bnb__sum8(sum));
    for (int r = 0; r < R; r++) {
        float b = bnb__bias(l->bias, n + r);
        for (int m = 0; m < M && m < l->M; m++) l->y[m * l->N + n + r] = s[r * M + m] + b;
    }
}

BNB__INLINE BNB__AVX512 void bnb__dot_store_512(const bnb__linear *l, int64_t n, const __m512 *a, const int M, const int R)
{
    __m256 sum[8];
    BNB__UNROLL for (int i = 0; i < 8; i++)
        sum[i] = i < R * M ? _mm256_add_ps(_mm512_castps512_ps256(a[i]), _mm512_extractf32x8_ps(a[i], 1)) : _mm256_setzero_ps();
    bnb__dot_store(l, n, sum, M, R);
}

BNB__INLINE BNB__AVX512 __mmask16 bnb__mask16(int64_t n) /* the first n of 16 lanes */
{
    return n >= 16 ? (__mmask16)0xffff : n <= 0 ? (__mmask16)0 : (__mmask16)((1u << n) - 1);
}

static int64_t bnb__dot4_padded(int64_t K) { return (K + 127) & ~(int64_t)127; }

/* nf4, fp4, in steps of 128 weights. A 32-bit lane holds 8 codes; a lookup reads only the low bits of its index, so that
 * shifting by 4 j bits finds the j-th code of every lane, high nibbles first. Products in
 *   f32:  vpermps, a code for each 32-bit lane, element 8 lane + (j ^ 1): 8 lookups a step
 *   bf16: vpermw, a code for each 16-bit lane, element 4 lane + (j ^ 1), and two neighbours are multiplied and added at
 *         once: half the lookups, of which decoding mostly consists, and half of x to read
 * xs: x in that order, zeros up to a multiple of 128. */
#define BNB__LOOKUP_F32(v, j, map) _mm512_castps_si512(_mm512_permutexvar_ps(_mm512_srli_epi32(v, 4 * (j)), _mm512_castsi512_ps(map)))
#define BNB__LOOKUP_BF16(v, j, map) _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 4 * (j)), map)
#define BNB__PRODUCT_F32(sum, w, x) _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(x), sum)
#define BNB__PRODUCT_BF16(sum, w, x) _mm512_dpbf16_ps(sum, (__m512bh)(w), (__m512bh)(x))

BNB__INLINE BNB__AVX512 __m512i bnb__dot4_map_f32(int32_t type) { return _mm512_loadu_si512(type == BNB_NF4 ? bnb_nf4_map : bnb_fp4_map); }
BNB__INLINE BNB__BF16 __m512i bnb__dot4_map_bf16(int32_t type) /* twice: the index of vpermw has a fifth bit */
{
    __m512 map = _mm512_castsi512_ps(bnb__dot4_map_f32(type));
    return (__m512i)_mm512_cvtne2ps_pbh(map, map);
}

BNB__INLINE BNB__AVX512 __m512 bnb__every(const float *x, const int step, int64_t n) /* lane i: x[step i] of n, or 0 */
{
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), bnb__mask16((n + step - 1) / step), _mm512_mullo_epi32(lane, _mm512_set1_epi32(step)), x, 4);
}
BNB__INLINE BNB__AVX512 __m512i bnb__dot4_x_f32(const float *x, int64_t n, int64_t at) { return _mm512_castps_si512(bnb__every(x + at, 8, n - at)); }
BNB__INLINE BNB__BF16 __m512i bnb__dot4_x_bf16(const float *x, int64_t n, int64_t at)
{
    return (__m512i)_mm512_cvtne2ps_pbh(bnb__every(x + at + 64, 4, n - at - 64), bnb__every(x + at, 4, n - at));
}

/* The scales of the `left` weights that a step still has; C: weights that surely share one; pattern: which a lane uses. */
BNB__INLINE BNB__AVX512 __m512 bnb__dot4_scales(const float *a, __m512i pattern, int64_t left, const int whole, const int C)
{
    if (whole && C == 128) return _mm512_set1_ps(*a);
    __m128 four = !whole    ? _mm_maskz_loadu_ps((__mmask8)((1u << left / C) - 1), a)
                  : C == 64 ? _mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)(const void *)a))
                            : _mm_loadu_ps(a);
    return _mm512_permutexvar_ps(pattern, _mm512_castps128_ps512(four));
}

/* ALONE: rows of w at a time for one row of x. LOOKUPS: of a step. Phase 0 puts x in their order: work is vectors
 * [dot_m(M), steps, LOOKUPS]. */
#define BNB__DOT4(NAME, TARGET, ALONE, LOOKUPS, LOOKUP, PRODUCT, MAP, X)                                               \
BNB__INLINE TARGET void NAME##_step(const uint8_t *q, int64_t row_bytes, const __m512i *xs, int64_t x_row, const float *absmax, \
                                    int64_t nb, __m512i map, __m512i pattern, int64_t left, __m512 *sum,               \
                                    const int whole, const int C, const int M, const int R)                            \
{                                                                                                                      \
    __m512 part[8];                                                                                                    \
    __m512i v[8], w[8];                                                                                                \
    BNB__UNROLL for (int r = 0; r < R; r++) {                                                                          \
        _mm_prefetch((const char *)(q + r * row_bytes + BNB__DOT_PREFETCH), _MM_HINT_T0);                              \
        v[r] = whole ? _mm512_loadu_si512(q + r * row_bytes)                                                           \
                     : _mm512_maskz_loadu_epi32((__mmask16)((1u << left / 8) - 1), q + r * row_bytes);                 \
    }                                                                                                                  \
    BNB__UNROLL for (int i = 0; i < R * M; i++) part[i] = _mm512_setzero_ps();                                         \
    BNB__UNROLL for (int j = 0; j < LOOKUPS; j++) {                                                                    \
        BNB__UNROLL for (int r = 0; r < R; r++) w[r] = LOOKUP(v[r], j, map);                                           \
        BNB__UNROLL for (int m = 0; m < M; m++)                                                                        \
            BNB__UNROLL for (int r = 0; r < R; r++) part[r * M + m] = PRODUCT(part[r * M + m], w[r], xs[m * x_row + j]); \
    }                                                                                                                  \
    BNB__UNROLL for (int r = 0; r < R; r++) {                                                                          \
        __m512 s = bnb__dot4_scales(absmax + r * nb, pattern, left, whole, C);                                         \
        BNB__UNROLL for (int m = 0; m < M; m++) sum[r * M + m] = _mm512_fmadd_ps(part[r * M + m], s, sum[r * M + m]);  \
    }                                                                                                                  \
}                                                                                                                      \
BNB__INLINE TARGET void NAME##_rows(const bnb__linear *l, int64_t n, const __m512i *xs, const float *absmax /* [R, K / B] */, \
                                    __m512i map, __m512i pattern, int shift, const int C, const int M, const int R)    \
{                                                                                                                      \
    const uint8_t *q = l->codes + n * (l->K / 2);                                                                      \
    int64_t K = l->K, x_row = bnb__dot4_padded(K) / 128 * LOOKUPS, k = 0;                                              \
    __m512 sum[8];                                                                                                     \
    BNB__UNROLL for (int i = 0; i < R * M; i++) sum[i] = _mm512_setzero_ps();                                          \
    for (; k + 128 <= K; k += 128)                                                                                     \
        NAME##_step(q + k / 2, K / 2, xs + k / 128 * LOOKUPS, x_row, absmax + (k >> shift), K >> shift, map, pattern, 128, sum, 1, C, M, R); \
    if (k < K) /* half a step of 64, or less of 32 */                                                                  \
        NAME##_step(q + k / 2, K / 2, xs + k / 128 * LOOKUPS, x_row, absmax + (k >> shift), K >> shift, map, pattern, K - k, sum, 0, C, M, R); \
    bnb__dot_store_512(l, n, sum, M, R);                                                                               \
}                                                                                                                      \
BNB__INLINE TARGET void NAME##_tile(const bnb__linear *l, int64_t n0, int64_t n1, const __m512i *xs, float *local,       \
                                    const int C, const int M, const int R)                                             \
{                                                                                                                      \
    int shift = __builtin_ctz((unsigned)l->w->quant.blocksize);                                                        \
    int64_t nb = l->K >> shift, n = n0;                                                                                \
    __m512i map = MAP(l->w->type), lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);      \
    __m512i pattern = C == 32 ? _mm512_srli_epi32(lane, 2) : _mm512_srli_epi32(lane, 3);                               \
    for (; n + R <= n1; n += R) NAME##_rows(l, n, xs, bnb__absmaxes(l->w, n * nb, R * nb, local), map, pattern, shift, C, M, R); \
    for (; n < n1; n++) NAME##_rows(l, n, xs, bnb__absmaxes(l->w, n * nb, nb, local), map, pattern, shift, C, M, 1);           \
}                                                                                                                      \
static TARGET void NAME(const bnb__job *job, int32_t phase, int64_t tile)                                              \
{                                                                                                                      \
    bnb__linear l = bnb__linear_of(job->y);                                                                            \
    __m512i *xs = (__m512i *)job->work;                                                                                \
    if (phase == 0) {                                                                                                  \
        const float *x = (const float *)(l.x + (tile < l.M ? tile : l.M - 1) * l.x_stride); /* rows beyond M: not stored */ \
        __m512i *to = xs + tile * (bnb__dot4_padded(l.K) / 128) * LOOKUPS;                                             \
        for (int64_t k = 0; k < l.K; k += 128)                                                                         \
            for (int64_t j = 0; j < LOOKUPS; j++) *to++ = X(x + k, l.K - k, j ^ 1);                                    \
        return;                                                                                                        \
    }                                                                                                                  \
    int64_t rows = bnb__dot_rows(l.w), n0 = tile * rows, n1 = n0 + rows < l.N ? n0 + rows : l.N;                       \
    float *local = (float *)job->local;                                                                                \
    switch (bnb__dot_m(l.M)) { /* R * M <= 8 sums are reduced together */                                              \
    case 1: BNB__DOT4_TILE(NAME, 1, ALONE); break;                                                                     \
    case 2: BNB__DOT4_TILE(NAME, 2, 2); break;                                                                         \
    case 3: BNB__DOT4_TILE(NAME, 3, 2); break;                                                                         \
    case 4: BNB__DOT4_TILE(NAME, 4, 2); break;                                                                         \
    case 6: BNB__DOT4_TILE(NAME, 6, 1); break;                                                                         \
    default: BNB__DOT4_TILE(NAME, 8, 1); break;                                                                        \
    }                                                                                                                  \
}
#define BNB__DOT4_TILE(NAME, M, R)                                                                                     \
    if (l.w->quant.blocksize == 32) NAME##_tile(&l, n0, n1, xs, local, 32, M, R);                                      \
    else if (l.w->quant.blocksize == 64) NAME##_tile(&l, n0, n1, xs, local, 64, M, R);                                 \
    else NAME##_tile(&l, n0, n1, xs, local, 128, M, R)
BNB__DOT4(bnb__dot4_512, BNB__AVX512, 2, 8, BNB__LOOKUP_F32, BNB__PRODUCT_F32, bnb__dot4_map_f32, bnb__dot4_x_f32)
BNB__DOT4(bnb__dot4_bf16, BNB__BF16, 1, 4, BNB__LOOKUP_BF16, BNB__PRODUCT_BF16, bnb__dot4_map_bf16, bnb__dot4_x_bf16)

static int64_t bnb__dot4_tiles_512(const bnb_tensor *y, int32_t phase)
{
    return phase == 0 ? bnb__dot_m(y->src[0]->shape[0]) : bnb__dot_tiles(y->src[1]);
}

static uint64_t bnb__dot4_work_512(const bnb_tensor *y) /* enough for both: bf16 needs half */
{
    return (uint64_t)(bnb__dot_m(y->src[0]->shape[0]) * bnb__dot4_padded(y->src[1]->shape[1])) * 4;
}

static uint64_t bnb__dot4_local(const bnb_tensor *y) /* restored absmax of two rows */
{
    const bnb_tensor *w = y->src[1];
    return w->quant.double_quant ? (uint64_t)(2 * (w->shape[1] / w->quant.blocksize)) * 4 : 0;
}

/* f32, f16, bf16, codes of int8_kv: sixteen numbers (fewer: mask) from element i as f32. */
BNB__INLINE BNB__AVX512 __m512 bnb__load_512(const int type, const void *p, int64_t i, __mmask16 mask)
{
    if (type == BNB_F32) return _mm512_maskz_loadu_ps(mask, (const char *)p + 4 * i);
    if (type == BNB_INT8_KV) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, (const char *)p + i)));
    __m256i h = _mm256_maskz_loadu_epi16(mask, (const char *)p + 2 * i);
    return type == BNB_F16 ? _mm512_cvtph_ps(h)
                           : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

BNB__INLINE __mmask64 bnb__mask64(int64_t n) { return n >= 64 ? ~0ull : n <= 0 ? 0 : (1ull << n) - 1; }

BNB__INLINE BNB__AVX512 void bnb__dot_rows_512(const bnb__linear *l, int64_t n, const int type, const int M, const int R)
{
    const float *x[8]; /* rows that do not exist repeat the last one */
    int64_t K = l->K, row = K * (type == BNB_F32 ? 4 : 2);
    const uint8_t *w = l->codes + n * row;
    __m512 sum[8], v[8];
    BNB__UNROLL for (int i = 0; i < R * M; i++) sum[i] = _mm512_setzero_ps();
    BNB__UNROLL for (int m = 0; m < M; m++) x[m] = (const float *)(l->x + (m < l->M ? m : l->M - 1) * l->x_stride);
#define BNB__STEP(mask)                                                                                                \
    BNB__UNROLL for (int r = 0; r < R; r++) v[r] = bnb__load_512(type, w + r * row, k, mask);                          \
    BNB__UNROLL for (int m = 0; m < M; m++) {                                                                          \
        __m512 xm = _mm512_maskz_loadu_ps(mask, x[m] + k);                                                             \
        BNB__UNROLL for (int r = 0; r < R; r++) sum[r * M + m] = _mm512_fmadd_ps(v[r], xm, sum[r * M + m]);            \
    }
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) {
        BNB__UNROLL for (int r = 0; r < R; r++) _mm_prefetch((const char *)(w + r * row + k * (row / K) + BNB__DOT_PREFETCH), _MM_HINT_T0);
        BNB__STEP((__mmask16)0xffff)
    }
    if (k < K) { BNB__STEP(bnb__mask16(K - k)) }
#undef BNB__STEP
    bnb__dot_store_512(l, n, sum, M, R);
}

BNB__INLINE BNB__AVX512 void bnb__dot_tile_512(const bnb__job *job, int64_t tile, const int type)
{
    bnb__linear l = bnb__linear_of(job->y);
    int64_t rows = bnb__dot_rows(l.w), n = tile * rows, n1 = n + rows < l.N ? n + rows : l.N;
#define BNB__CALL(M, R)                                                                                                \
    for (; n + R <= n1; n += R) bnb__dot_rows_512(&l, n, type, M, R);                                                  \
    for (; n < n1; n++) bnb__dot_rows_512(&l, n, type, M, 1)
    BNB__DOT_SWITCH(l.M, BNB__CALL)
#undef BNB__CALL
}

static BNB__AVX512 void bnb__dot_f32_512(const bnb__job *job, int32_t phase, int64_t tile) { (void)phase; bnb__dot_tile_512(job, tile, BNB_F32); }
static BNB__AVX512 void bnb__dot_f16_512(const bnb__job *job, int32_t phase, int64_t tile) { (void)phase; bnb__dot_tile_512(job, tile, BNB_F16); }
static BNB__AVX512 void bnb__dot_bf16_512(const bnb__job *job, int32_t phase, int64_t tile) { (void)phase; bnb__dot_tile_512(job, tile, BNB_BF16); }
static int64_t bnb__dot_plain_tiles(const bnb_tensor *y, int32_t phase) { (void)phase; return bnb__dot_tiles(y->src[1]); }

/* ---- gemm: many rows of x -------------------------------------------------------------------------------------------
 *
 *   phase 0   pack(): x -> work, [panel][group][mr] 32-bit lanes, a group being the numbers of k that share a lane
 *   phase 1   a tile is nt rows of w and up to BNB__GEMM_ROWS rows of x. For each chunk of k: fill() decodes the chunk of
 *             those rows of w into local [nt][kc]; micro() multiplies it with each panel and adds to c [panel][nt][mr];
 *             at last store() transposes c, adds the bias and writes y.
 *
 * A chunk of a panel and of nr rows of w stay in the L1 cache, c and the chunk of w in L2, whatever K is. */

enum {
    BNB__GEMM_GROUPS = 256, BNB__GEMM_ROWS = 512,
    BNB__GEMM_LD = BNB__GEMM_GROUPS + 16 /* from row to row of decoded weights: an odd number of cache lines, so that rows
                                            do not fall on the same sets; a constant, for addressing */
};

typedef struct bnb__gemm {
    int32_t mr, nt;     /* rows of x in a panel; rows of w in a tile, a multiple of what micro() takes at once         */
    int32_t group;      /* numbers of k in a 32-bit lane */
    /* Packs groups [g, g + ng) of rows [m0, m0 + mr) to out [ng][mr]; zeros beyond M and K. ng is a multiple of 16.   */
    void (*pack)(const bnb__linear *l, int64_t m0, int64_t g, int64_t ng, uint32_t *out);
    /* Decodes groups [g, g + ng) of row n of w to out [ng]; zeros beyond K. */
    void (*fill)(const bnb__linear *l, int64_t n, int64_t g, int64_t ng, uint32_t *out);
    /* c [nt][mr] (+)= w [nt][LD] times x [ng][mr]. rows: how many of the panel's exist */
    void (*micro)(int first, int64_t rows, int64_t ng, const uint32_t *x, const uint32_t *w, float *c);
    /* y[m0 + i, n0 + j] = c[j][i] + bias for the rows and columns that exist */
    void (*store)(const bnb__linear *l, int64_t m0, int64_t n0, int64_t nt, const float *c);
    void (*begin)(void), (*end)(void); /* around the calls of micro() in a tile; NULL: nothing to do */
} bnb__gemm;

typedef struct bnb__gemm_shape { int64_t groups, chunk, chunks, panels; } bnb__gemm_shape;

static bnb__gemm_shape bnb__gemm_shape_of(const bnb__gemm *g, int64_t M, int64_t K)
{
    bnb__gemm_shape s;
    s.groups = ((K + g->group - 1) / g->group + 15) & ~(int64_t)15;
    s.chunks = (s.groups + BNB__GEMM_GROUPS - 1) / BNB__GEMM_GROUPS;
    s.chunk = s.chunks ? ((s.groups + s.chunks - 1) / s.chunks + 31) & ~(int64_t)31 : 0; /* whole blocks of 32 in f32 too */
    s.chunks = s.chunk ? (s.groups + s.chunk - 1) / s.chunk : 0;
    s.panels = (M + g->mr - 1) / g->mr;
    return s;
}

static int64_t bnb__gemm_tiles(const bnb__gemm *g, const bnb_tensor *y, int32_t phase)
{
    int64_t M = y->src[0]->shape[0], N = y->src[1]->shape[0];
    bnb__gemm_shape s = bnb__gemm_shape_of(g, M, y->src[1]->shape[1]);
    if (phase == 0) return s.panels * s.chunks;
    return (N + g->nt - 1) / g->nt * ((M + BNB__GEMM_ROWS - 1) / BNB__GEMM_ROWS);
}

static uint64_t bnb__gemm_work(const bnb__gemm *g, const bnb_tensor *y)
{
    bnb__gemm_shape s = bnb__gemm_shape_of(g, y->src[0]->shape[0], y->src[1]->shape[1]);
    return (uint64_t)(s.panels * s.groups * g->mr) * 4;
}

static uint64_t bnb__gemm_local(const bnb__gemm *g, const bnb_tensor *y)
{
    int64_t M = y->src[0]->shape[0];
    bnb__gemm_shape s = bnb__gemm_shape_of(g, M < BNB__GEMM_ROWS ? M : BNB__GEMM_ROWS, y->src[1]->shape[1]);
    return (uint64_t)(g->nt * BNB__GEMM_LD + s.panels * g->mr * g->nt) * 4;
}

static void bnb__gemm_pack(const bnb__gemm *g, const bnb__job *job, int64_t tile)
{
    bnb__linear l = bnb__linear_of(job->y);
    bnb__gemm_shape s = bnb__gemm_shape_of(g, l.M, l.K);
    int64_t panel = tile / s.chunks, g0 = tile % s.chunks * s.chunk, ng = s.groups - g0 < s.chunk ? s.groups - g0 : s.chunk;
    g->pack(&l, panel * g->mr, g0, ng, (uint32_t *)job->work + (panel * s.groups + g0) * g->mr);
}

static void bnb__prefetch(const bnb__linear *l, int64_t n, int64_t k, int64_t nk) /* weights [n, k .. k + nk) */
{
    int64_t e = n * l->K + k, left = l->N * l->K - e, bits = bnb_type_bits(l->w->type);
    if (k >= l->K || left <= 0) return;
    const uint8_t *p = l->codes + e * bits / 8, *end = p + (nk < left ? nk : left) * bits / 8;
    for (; p < end; p += 64) _mm_prefetch((const char *)p, _MM_HINT_T1);
    if (l->w->type >= BNB_NF4)
        _mm_prefetch((const char *)l->w->plane[1] + e / l->w->quant.blocksize * (l->w->quant.double_quant ? 1 : 4), _MM_HINT_T1);
}

/* The products of a tile, to local: w [nt][LD], then c [panel][nt][mr]. Returns c. */
static float *bnb__gemm_tile(const bnb__gemm *g, const bnb__linear *l, const void *packed, void *local, int64_t n0,
                             int64_t m0, int64_t m1)
{
    bnb__gemm_shape s = bnb__gemm_shape_of(g, l->M, l->K);
    int64_t nt = l->N - n0 < g->nt ? l->N - n0 : g->nt;
    uint32_t *w = (uint32_t *)local;
    float *c = (float *)local + g->nt * BNB__GEMM_LD;
    if (nt < g->nt) memset(w, 0, (size_t)(g->nt * BNB__GEMM_LD) * 4);
    if (g->begin) g->begin();
    for (int64_t g0 = 0; g0 < s.groups; g0 += s.chunk) {
        int64_t ng = s.groups - g0 < s.chunk ? s.groups - g0 : s.chunk;
        for (int64_t n = 0; n < nt; n++) {
            /* Rows are read in pieces, which the hardware cannot foresee: ask for the next chunk while this one is used. */
            bnb__prefetch(l, n0 + n, (g0 + s.chunk) * g->group, s.chunk * g->group);
            if (g0 == 0) bnb__prefetch(l, n0 + n + 8, 0, s.chunk * g->group);
            g->fill(l, n0 + n, g0, ng, w + n * BNB__GEMM_LD);
        }
        for (int64_t m = m0; m < m1; m += g->mr)
            g->micro(g0 == 0, l->M - m, ng, (const uint32_t *)packed + m * s.groups + g0 * g->mr, w, c + (m - m0) * g->nt);
    }
    if (g->end) g->end();
    return c;
}

static void bnb__gemm_product(const bnb__gemm *g, const bnb__job *job, int64_t tile)
{
    bnb__linear l = bnb__linear_of(job->y);
    int64_t blocks = (l.M + BNB__GEMM_ROWS - 1) / BNB__GEMM_ROWS, n0 = tile / blocks * g->nt;
    int64_t m0 = tile % blocks * BNB__GEMM_ROWS, m1 = m0 + BNB__GEMM_ROWS < l.M ? m0 + BNB__GEMM_ROWS : l.M;
    float *c = bnb__gemm_tile(g, &l, job->work, job->local, n0, m0, m1);
    for (int64_t m = m0; m < m1; m += g->mr)
        g->store(&l, m, n0, l.N - n0 < g->nt ? l.N - n0 : g->nt, c + (m - m0) * g->nt);
}

/* The functions that a row of the table needs for gemm g. */
#define BNB__GEMM_ROW(g)                                                                                               \
    static int64_t g##_tiles(const bnb_tensor *y, int32_t phase) { return bnb__gemm_tiles(&g, y, phase); }             \
    static uint64_t g##_work(const bnb_tensor *y) { return bnb__gemm_work(&g, y); }                                    \
    static uint64_t g##_local(const bnb_tensor *y) { return bnb__gemm_local(&g, y); }                                  \
    static void g##_run(const bnb__job *job, int32_t phase, int64_t tile)                                              \
    {                                                                                                                  \
        if (phase == 0) bnb__gemm_pack(&g, job, tile);                                                                 \
        else bnb__gemm_product(&g, job, tile);                                                                         \
    }

BNB__INLINE BNB__AVX512 void bnb__transpose_512(__m512i *r) /* [16] vectors of 16 lanes */
{
    __m512i t[16];
    BNB__UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    BNB__UNROLL for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    BNB__UNROLL for (int i = 0; i < 4; i++) { /* r[4 j + i]: column 4 lane + i of rows 4 j .. 4 j + 3 */
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    BNB__UNROLL for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

static BNB__AVX512 void bnb__gemm_store_512(const bnb__linear *l, int64_t m0, int64_t n0, int64_t nt, const float *c)
{
    for (int64_t i = 0; i < 32 && m0 + i < l->M; i += 16)
        for (int64_t j = 0; j < nt; j += 16) {
            __m512i r[16];
            __mmask16 mask = bnb__mask16(nt - j);
            __m512 b = _mm512_setzero_ps();
            if (l->bias) {
                int32_t type = l->bias->type;
                const void *p = l->bias->plane[0];
                b = type == BNB_F32   ? bnb__load_512(BNB_F32, p, n0 + j, mask)
                    : type == BNB_F16 ? bnb__load_512(BNB_F16, p, n0 + j, mask)
                                      : bnb__load_512(BNB_BF16, p, n0 + j, mask);
            }
            BNB__UNROLL for (int q = 0; q < 16; q++) r[q] = _mm512_load_si512(c + (j + q) * 32 + i);
            bnb__transpose_512(r);
            BNB__UNROLL for (int q = 0; q < 16; q++)
                if (m0 + i + q < l->M)
                    _mm512_mask_storeu_ps(l->y + (m0 + i + q) * l->N + n0 + j, mask, _mm512_add_ps(_mm512_castsi512_ps(r[q]), b));
        }
}

/* acc += products of the group in each lane of x with the group w: 2 x 12 or 1 x 24 accumulators. */
#define BNB__MICRO_512(name, TARGET, MUL)                                                                              \
    BNB__INLINE TARGET void name##_block(int first, int64_t ng, const uint32_t *x, const uint32_t *w,                  \
                                         float *c, const int V, const int N)                                           \
    {                                                                                                                  \
        __m512i acc[24], v[2];                                                                                         \
        BNB__UNROLL for (int i = 0; i < V * N; i++)                                                                    \
            acc[i] = first ? _mm512_setzero_si512() : _mm512_load_si512(c + i / V * 32 + i % V * 16);                  \
        for (int64_t g = 0; g < ng; g++) {                                                                             \
            BNB__UNROLL for (int i = 0; i < V; i++) v[i] = _mm512_load_si512(x + g * 32 + i * 16);                     \
            BNB__UNROLL for (int n = 0; n < N; n++) {                                                                  \
                __m512i b = _mm512_set1_epi32((int)w[n * BNB__GEMM_LD + g]);                                                     \
                BNB__UNROLL for (int i = 0; i < V; i++) acc[n * V + i] = MUL(acc[n * V + i], v[i], b);                 \
            }                                                                                                          \
        }                                                                                                              \
        BNB__UNROLL for (int i = 0; i < V * N; i++) _mm512_store_si512(c + i / V * 32 + i % V * 16, acc[i]);           \
    }                                                                                                                  \
    static TARGET void name(int first, int64_t rows, int64_t ng, const uint32_t *x, const uint32_t *w, float *c) \
    {                                                                                                                  \
        for (int n = 0; n < 48; n += rows > 16 ? 12 : 24)                                                              \
            if (rows > 16) name##_block(first, ng, x, w + n * BNB__GEMM_LD, c + n * 32, 2, 12);                              \
            else name##_block(first, ng, x, w + n * BNB__GEMM_LD, c + n * 32, 1, 24);                                        \
    }

#define BNB__MUL_F32(a, x, w) _mm512_castps_si512(_mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), _mm512_castsi512_ps(a)))
#define BNB__MUL_BF16(a, x, w) _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(a), (__m512bh)(x), (__m512bh)(w)))
#define BNB__MUL_I8(a, x, w) _mm512_dpbusd_epi32(a, w, x)
BNB__MICRO_512(bnb__micro_f32_512, BNB__AVX512, BNB__MUL_F32)
BNB__MICRO_512(bnb__micro_bf16_512, BNB__BF16, BNB__MUL_BF16)

static BNB__AVX512 void bnb__pack_f32_512(const bnb__linear *l, int64_t m0, int64_t g, int64_t ng, uint32_t *out)
{
    for (int64_t i = 0; i < 32 && m0 + i < l->M; i += 16)
        for (int64_t k = g; k < g + ng; k += 16) {
            __m512i r[16];
            __mmask16 mask = bnb__mask16(l->K - k);
            BNB__UNROLL for (int q = 0; q < 16; q++) {
                const char *x = l->x + (m0 + i + q) * l->x_stride;
                r[q] = _mm512_setzero_si512();
                if (m0 + i + q < l->M)
                    r[q] = _mm512_castps_si512(l->x_type == BNB_F32   ? bnb__load_512(BNB_F32, x, k, mask)
                                               : l->x_type == BNB_F16 ? bnb__load_512(BNB_F16, x, k, mask)
                                                                      : bnb__load_512(BNB_INT8_KV, x, k, mask));
            }
            bnb__transpose_512(r);
            BNB__UNROLL for (int q = 0; q < 16; q++) _mm512_store_si512(out + (k - g + q) * 32 + i, r[q]);
        }
}

BNB__INLINE BNB__BF16 __m512i bnb__bf16x32(__m512 lo, __m512 hi) { return (__m512i)_mm512_cvtne2ps_pbh(hi, lo); }

static BNB__BF16 void bnb__pack_bf16_512(const bnb__linear *l, int64_t m0, int64_t g, int64_t ng, uint32_t *out)
{
    for (int64_t i = 0; i < 32 && m0 + i < l->M; i += 16)
        for (int64_t p = g; p < g + ng; p += 16) {
            __m512i r[16];
            BNB__UNROLL for (int q = 0; q < 16; q++) {
                const char *x = l->x + (m0 + i + q) * l->x_stride;
                r[q] = _mm512_setzero_si512();
                if (m0 + i + q < l->M)
                    r[q] = bnb__bf16x32(bnb__load_512(BNB_F32, x, 2 * p, bnb__mask16(l->K - 2 * p)),
                                        bnb__load_512(BNB_F32, x, 2 * p + 16, bnb__mask16(l->K - 2 * p - 16)));
            }
            bnb__transpose_512(r);
            BNB__UNROLL for (int q = 0; q < 16; q++) _mm512_store_si512(out + (p - g + q) * 32 + i, r[q]);
        }
}

/* Plain weights to f32 or bf16. */
#define BNB__FILL_512(name, TARGET, STEP, BODY)                                                                        \
    static TARGET void name(const bnb__linear *l, int64_t n, int64_t g, int64_t ng, uint32_t *out)                     \
    {                                                                                                                  \
        const uint8_t *w = l->codes; (void)w;                                                                                  \
        for (int64_t i = 0; i < ng; i += 16) {                                                                         \
            int64_t k = (g + i) * STEP, left = l->K - k, e = n * l->K + k;                                             \
            _mm512_storeu_si512(out + i, BODY);                                                                        \
        }                                                                                                              \
    }
#define BNB__F32_OF(type) _mm512_castps_si512(bnb__load_512(type, w, e, bnb__mask16(left)))
#define BNB__BF16_OF(type) bnb__bf16x32(bnb__load_512(type, w, e, bnb__mask16(left)), bnb__load_512(type, w, e + 16, bnb__mask16(left - 16)))
BNB__FILL_512(bnb__fill_f32_f32_512, BNB__AVX512, 1, BNB__F32_OF(BNB_F32))
BNB__FILL_512(bnb__fill_f16_f32_512, BNB__AVX512, 1, BNB__F32_OF(BNB_F16))
BNB__FILL_512(bnb__fill_bf16_f32_512, BNB__AVX512, 1, BNB__F32_OF(BNB_BF16))
BNB__FILL_512(bnb__fill_int8_kv_512, BNB__AVX512, 1, BNB__F32_OF(BNB_INT8_KV))
BNB__FILL_512(bnb__fill_f16_bf16_512, BNB__BF16, 2, BNB__BF16_OF(BNB_F16))
BNB__FILL_512(bnb__fill_bf16_bf16_512, BNB__BF16, 2, _mm512_maskz_loadu_epi16((__mmask32)bnb__mask64(left), w + 2 * e))

/* 4-bit weights, 32 at a time: none of these steps meets two blocks. k, and the end, are multiples of 32. */
static BNB__AVX512 void bnb__fill4_f32_512(const bnb__linear *l, int64_t n, int64_t g, int64_t ng, uint32_t *out)
{
    __m512 map = _mm512_loadu_ps(l->w->type == BNB_NF4 ? bnb_nf4_map : bnb_fp4_map);
    __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    int shift = __builtin_ctz((unsigned)l->w->quant.blocksize);
    for (int64_t i = 0; i < ng; i += 32) {
        if (g + i >= l->K) { memset(out + i, 0, (size_t)(ng - i) * 4); return; }
        int64_t e = n * l->K + g + i;
        __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(l->codes + e / 2)));
        __m512 a = _mm512_set1_ps(bnb__absmax(l->w, e >> shift));
        __m512 even = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(v, 4), map), a);
        __m512 odd = _mm512_mul_ps(_mm512_permutexvar_ps(v, map), a);
        _mm512_storeu_ps(out + i, _mm512_permutex2var_ps(even, first, odd));
        _mm512_storeu_ps(out + i + 16, _mm512_permutex2var_ps(even, second, odd));
    }
}

/* The 16 possible values of a block are rounded once; each half of a lane then picks its own from the doubled table
 * (vpermw reads 5 bits of its index). */
static BNB__BF16 void bnb__fill4_bf16_512(const bnb__linear *l, int64_t n, int64_t g, int64_t ng, uint32_t *out)
{
    __m512 map = _mm512_loadu_ps(l->w->type == BNB_NF4 ? bnb_nf4_map : bnb_fp4_map);
    __m512i table = _mm512_setzero_si512();
    int64_t e = n * l->K + 2 * g, end = n * l->K + (2 * (g + ng) < l->K ? 2 * (g + ng) : l->K), B = l->w->quant.blocksize;
    int shift = __builtin_ctz((unsigned)B);
    for (int64_t at = -1; e < end; e += 32, out += 16) {
        if (at != e >> shift) {
            at = e >> shift;
            __m512 values = _mm512_mul_ps(map, _mm512_set1_ps(bnb__absmax(l->w, at)));
            table = bnb__bf16x32(values, values);
        }
        __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(l->codes + e / 2)));
        v = _mm512_or_si512(_mm512_srli_epi32(v, 4), _mm512_slli_epi32(v, 16));
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(v, table));
    }
}

/* ---- int8: LLM.int8() -----------------------------------------------------------------------------------------------
 * Codes of w become unsigned (w ^ 0x80 is w + 128) where the instruction multiplies unsigned by signed; the sum of a
 * row's codes, times 128, is taken off afterwards. All integer sums are exact, so every kernel gives the same bits. */

typedef struct bnb__int8 { /* in work; Kp: K rounded up to 64, zeros beyond K; Mp: M rounded up to 32 */
    float *sca;      /* [Mp]       largest magnitude of a row's ordinary elements       */
    int32_t *sum;    /* [Mp]       of a row's codes                                     */
    int32_t *count;  /* [16]       count[0]: number of outlier columns                  */
    int32_t *list;   /* [K]        outlier columns, ascending                           */
    uint8_t *mask;   /* [M, Kp/8]  bit k: x[m, k] is an outlier                         */
    int8_t *codes;   /* [Mp, Kp]                                                        */
    void *packed;    /* gemm: [panel][group][mr]                                        */
    int64_t M, K, Kp;
    int32_t by_row;  /* outliers leave their own row only                               */
} bnb__int8;

static bnb__int8 bnb__int8_of(const bnb_tensor *y, void *work, uint64_t *bytes)
{
    bnb__int8 q;
    int64_t M = y->src[0]->shape[0], K = y->src[1]->shape[1], Kp = (K + 63) & ~(int64_t)63, Mp = (M + 31) & ~(int64_t)31;
    char *p = (char *)work;
    q.sca = (float *)p, p += Mp * 4;
    q.sum = (int32_t *)p, p += Mp * 4;
    q.count = (int32_t *)p, p += 64;
    q.list = (int32_t *)p, p += Kp * 4;
    q.mask = (uint8_t *)p, p += (M * Kp / 8 + 63) & ~(int64_t)63;
    q.codes = (int8_t *)p, p += Mp * Kp;
    q.packed = p;
    q.M = M, q.K = K, q.Kp = Kp, q.by_row = M == 1 || y->src[1]->quant.outlier_rule == BNB_OUTLIER_ROW;
    if (bytes) *bytes = (uint64_t)(p - (char *)work);
    return q;
}

BNB__INLINE BNB__AVX2 __m256 bnb__load_f32_256(const float *x, int64_t n) /* the first n of 8; zeros */
{
    return n >= 8 ? _mm256_loadu_ps(x)
                  : _mm256_maskload_ps(x, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
}

BNB__INLINE BNB__AVX2 __m256 bnb__round_f16_256(__m256 x) { return _mm256_cvtph_ps(_mm256_cvtps_ph(x, 0)); }

/* Row m of x: sca, mask, and codes = rint(a * (127 / sca)) for a = x in f16, 0 for outliers and NaN. Two passes. */
static BNB__AVX2 void bnb__int8_quantize(const bnb__int8 *q, const float *x, float threshold, int64_t m)
{
    __m256 max = _mm256_setzero_ps(), magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 t = _mm256_set1_ps(threshold > 0 ? threshold : __builtin_nanf("")); /* no comparison with NaN holds */
    uint8_t *mask = q->mask + m * (q->Kp / 8);
    for (int64_t k = 0; k < q->Kp; k += 8) {
        __m256 a = _mm256_and_ps(bnb__round_f16_256(bnb__load_f32_256(x + k, q->K - k)), magnitude);
        __m256 out = _mm256_cmp_ps(a, t, _CMP_GE_OQ);
        mask[k / 8] = (uint8_t)_mm256_movemask_ps(out);
        max = _mm256_max_ps(_mm256_andnot_ps(out, a), max); /* a NaN first gives the second */
    }
    float lanes[8], sca = 0;
    _mm256_storeu_ps(lanes, max);
    for (int i = 0; i < 8; i++) sca = lanes[i] > sca ? lanes[i] : sca;
    q->sca[m] = sca;
    __m256 s = _mm256_set1_ps(127.0f * bnb__rcp_cuda(sca));
    __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    for (int64_t k = 0; k < q->Kp; k += 8) {
        __m256 v = _mm256_mul_ps(bnb__round_f16_256(bnb__load_f32_256(x + k, q->K - k)), s); /* sca 0: 0 * inf is NaN */
        __m256i out = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask[k / 8]), bit), bit);
        __m256i c = _mm256_andnot_si256(out, _mm256_and_si256(_mm256_cvtps_epi32(v), _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_ORD_Q))));
        __m128i h = _mm_packs_epi32(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));
        _mm_storel_epi64((__m128i *)(q->codes + m * q->Kp + k), _mm_packs_epi16(h, h));
    }
}

static void bnb__int8_columns(const bnb__int8 *q) /* mask -> list, count */
{
    int32_t count = 0;
    for (int64_t k = 0; k < q->Kp; k += 64) {
        uint64_t any = 0, word;
        for (int64_t m = 0; m < q->M; m++) memcpy(&word, q->mask + m * (q->Kp / 8) + k / 8, 8), any |= word;
        for (; any; any &= any - 1) q->list[count++] = (int32_t)(k + __builtin_ctzll(any));
    }
    q->count[0] = count;
}

static BNB__AVX2 void bnb__int8_finish(const bnb__int8 *q, int64_t m) /* row m without the outlier columns, and its sum */
{
    int8_t *c = q->codes + m * q->Kp;
    if (!q->by_row)
        for (int32_t i = 0; i < q->count[0]; i++) c[q->list[i]] = 0;
    __m256i sum = _mm256_setzero_si256();
    for (int64_t k = 0; k < q->Kp; k += 16)
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(c + k))), _mm256_set1_epi16(1)));
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    q->sum[m] = _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

static int bnb__int8_is_outlier(const bnb__int8 *q, int64_t m, int32_t k)
{
    return !q->by_row || (q->mask[m * (q->Kp / 8) + k / 8] >> (k & 7) & 1);
}

BNB__INLINE float bnb__int8_weight(int8_t code, float scb) { return (float)code * scb * 7.874015718698502e-3f; }

/* c * sca * scb / 127^2 + bias */
BNB__INLINE BNB__AVX2 float bnb__int8_scale(int32_t c, float sca, float scb, float b)
{
    return __builtin_fmaf((float)c * sca * scb, 6.200012e-05f, b);
}

/* y[m, n] for the products c of row n with each row of x. */
BNB__INLINE BNB__AVX2 void bnb__int8_dot_store(const bnb__linear *l, const bnb__int8 *q, int64_t n, const int32_t *c)
{
    float scb = bnb__number(BNB_F32, l->w->plane[1], n), b = bnb__bias(l->bias, n), s[8] = {0};
    const int8_t *w = (const int8_t *)l->codes + n * l->K;
    for (int32_t i = 0; i < q->count[0]; i++) {
        int32_t k = q->list[i];
        float v = bnb__int8_weight(w[k], scb);
        for (int64_t m = 0; m < l->M; m++)
            if (bnb__int8_is_outlier(q, m, k)) s[m] = __builtin_fmaf(bnb__number(BNB_F32, l->x + m * l->x_stride, k), v, s[m]);
    }
    for (int64_t m = 0; m < l->M; m++) {
        float v = bnb__int8_scale(c[m], q->sca[m], scb, b);
        l->y[m * l->N + n] = q->count[0] ? v + s[m] : v;
    }
}

BNB__INLINE BNB__VNNI void bnb__dot_int8_rows_vnni(const bnb__linear *l, const bnb__int8 *q, int64_t n, const int M, const int R)
{
    __m512i acc[8], v[8], flip = _mm512_set1_epi8((char)0x80);
    const uint8_t *w = l->codes + n * l->K;
    int64_t K = l->K, k = 0;
    BNB__UNROLL for (int i = 0; i < R * M; i++) acc[i] = _mm512_setzero_si512();
#define BNB__STEP(load)                                                                                                \
    BNB__UNROLL for (int r = 0; r < R; r++) v[r] = _mm512_xor_si512(load, flip);                                       \
    BNB__UNROLL for (int m = 0; m < M; m++) {                                                                          \
        __m512i a = _mm512_loadu_si512(q->codes + m * q->Kp + k);                                                      \
        BNB__UNROLL for (int r = 0; r < R; r++) acc[r * M + m] = _mm512_dpbusd_epi32(acc[r * M + m], v[r], a);         \
    }
    for (; k + 64 <= K; k += 64) {
        BNB__UNROLL for (int r = 0; r < R; r++) _mm_prefetch((const char *)(w + r * K + k + BNB__DOT_PREFETCH), _MM_HINT_T0);
        BNB__STEP(_mm512_loadu_si512(w + r * K + k))
    }
    if (k < K) { BNB__STEP(_mm512_maskz_loadu_epi8(bnb__mask64(K - k), w + r * K + k)) }
#undef BNB__STEP
    BNB__UNROLL for (int r = 0; r < R; r++) {
        int32_t c[8];
        BNB__UNROLL for (int m = 0; m < M; m++) c[m] = m < l->M ? _mm512_reduce_add_epi32(acc[r * M + m]) - 128 * q->sum[m] : 0;
        bnb__int8_dot_store(l, q, n + r, c);
    }
}

/* Phase 0 is one tile: the few rows of x take about a hundredth of the time. */
static void bnb__int8_dot_begin(const bnb__linear *l, const bnb__int8 *q)
{
    for (int64_t m = 0; m < l->M; m++) bnb__int8_quantize(q, (const float *)(l->x + m * l->x_stride), l->w->quant.threshold, m);
    bnb__int8_columns(q);
    for (int64_t m = 0; m < l->M; m++) bnb__int8_finish(q, m);
}

static BNB__VNNI void bnb__dot_int8_vnni(const bnb__job *job, int32_t phase, int64_t tile)
{
    bnb__linear l = bnb__linear_of(job->y);
    bnb__int8 q = bnb__int8_of(job->y, job->work, NULL);
    if (phase == 0) { bnb__int8_dot_begin(&l, &q); return; }
    int64_t rows = bnb__dot_rows(l.w), n = tile * rows, n1 = n + rows < l.N ? n + rows : l.N;
#define BNB__CALL(M, R)                                                                                                \
    for (; n + R <= n1; n += R) bnb__dot_int8_rows_vnni(&l, &q, n, M, R);                                              \
    for (; n < n1; n++) bnb__dot_int8_rows_vnni(&l, &q, n, M, 1)
    BNB__DOT_SWITCH(l.M, BNB__CALL)
#undef BNB__CALL
}

static int64_t bnb__dot_int8_tiles(const bnb_tensor *y, int32_t phase) { return phase == 0 ? 1 : bnb__dot_tiles(y->src[1]); }
static uint64_t bnb__dot_int8_work(const bnb_tensor *y) { uint64_t bytes; bnb__int8_of(y, NULL, &bytes); return bytes; }

/* gemm: phases 0 quantize, 1 columns, 2 finish and pack, 3 product. */
static BNB__VNNI void bnb__pack_i8_512(const bnb__linear *l, int64_t m0, int64_t g, int64_t ng, uint32_t *out)
{
    int64_t Kp = l->x_stride; /* l describes the codes here */
    for (int64_t i = 0; i < 32 && m0 + i < l->M; i += 16)
        for (int64_t p = g; p < g + ng; p += 16) {
            __m512i r[16];
            BNB__UNROLL for (int q = 0; q < 16; q++)
                r[q] = m0 + i + q < l->M ? _mm512_loadu_si512(l->x + (m0 + i + q) * Kp + 4 * p) : _mm512_setzero_si512();
            bnb__transpose_512(r);
            BNB__UNROLL for (int q = 0; q < 16; q++) _mm512_store_si512(out + (p - g + q) * 32 + i, r[q]);
        }
}

static BNB__AVX512 void bnb__fill_i8_512(const bnb__linear *l, int64_t n, int64_t g, int64_t ng, uint32_t *out)
{
    for (int64_t i = 0; i < ng; i += 16) {
        __m512i v = _mm512_maskz_loadu_epi8(bnb__mask64(l->K - 4 * (g + i)), l->codes + n * l->K + 4 * (g + i));
        _mm512_storeu_si512(out + i, _mm512_xor_si512(v, _mm512_set1_epi8((char)0x80)));
    }
}

BNB__MICRO_512(bnb__micro_i8_512, BNB__VNNI, BNB__MUL_I8)

typedef struct bnb__int8_gemm {
    bnb__gemm g;
    int32_t offset; /* what fill() added to the codes of w */
    void (*micro_f32)(int first, int64_t rows, int64_t ng, const uint32_t *x, const uint32_t *w, float *c); /* outliers */
} bnb__int8_gemm;

/* c (i32) to the results of a panel (f32), in place: [nt][mr]. */
static BNB__AVX2 void bnb__int8_scale_panel(const bnb__gemm *g, const bnb__linear *l, const bnb__int8 *q, int32_t offset,
                                            int64_t m0, int64_t n0, int64_t nt, float *c)
{
    for (int64_t n = 0; n < nt; n++) {
        float b = bnb__bias(l->bias, n0 + n);
        __m256 scb = _mm256_set1_ps(bnb__number(BNB_F32, l->w->plane[1], n0 + n)), bias = _mm256_set1_ps(b);
        for (int64_t i = 0; i < g->mr; i += 8) {
            __m256i off = _mm256_mullo_epi32(_mm256_loadu_si256((const __m256i *)(q->sum + m0 + i)), _mm256_set1_epi32(offset));
            __m256 v = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_loadu_si256((const __m256i *)(c + n * g->mr + i)), off));
            v = _mm256_mul_ps(_mm256_mul_ps(v, _mm256_loadu_ps(q->sca + m0 + i)), scb);
            _mm256_storeu_ps(c + n * g->mr + i, _mm256_fmadd_ps(v, _mm256_set1_ps(6.200012e-05f), bias));
        }
    }
}

/* Adds the outlier part: a small f32 gemm over the listed columns, BNB__GEMM_GROUPS of them at a time.
 * w: [nt][LD], x: [GROUPS][mr], s: [nt][mr] scratch; c [panels][nt][mr] */
static void bnb__int8_outliers(const bnb__int8_gemm *g, const bnb__linear *l, const bnb__int8 *q, int64_t n0, int64_t m0,
                               int64_t m1, float *c, float *w, float *x, float *s)
{
    int64_t nt = l->N - n0 < g->g.nt ? l->N - n0 : g->g.nt, mr = g->g.mr;
    for (int64_t j0 = 0; j0 < q->count[0]; j0 += BNB__GEMM_GROUPS) {
        int64_t nj = q->count[0] - j0 < BNB__GEMM_GROUPS ? q->count[0] - j0 : BNB__GEMM_GROUPS;
        const int32_t *list = q->list + j0;
        for (int64_t n = 0; n < nt; n++) {
            float scb;
            memcpy(&scb, (const char *)l->w->plane[1] + (n0 + n) * 4, 4);
            for (int64_t j = 0; j < nj; j++) w[n * BNB__GEMM_LD + j] = bnb__int8_weight((int8_t)l->codes[(n0 + n) * l->K + list[j]], scb);
        }
        for (int64_t m = m0; m < m1; m += mr) {
            for (int64_t i = 0; i < mr; i++)
                for (int64_t j = 0; j < nj; j++) {
                    float v = 0;
                    if (m + i < l->M && bnb__int8_is_outlier(q, m + i, list[j])) memcpy(&v, l->x + (m + i) * l->x_stride + list[j] * 4, 4);
                    x[j * mr + i] = v;
                }
            g->micro_f32(1, l->M - m, nj, (const uint32_t *)x, (const uint32_t *)w, s);
            for (int64_t i = 0; i < nt * mr; i++) c[(m - m0) * g->g.nt + i] += s[i];
        }
    }
}

static void bnb__int8_gemm_run(const bnb__int8_gemm *g, const bnb__job *job, int32_t phase, int64_t tile)
{
    bnb__linear l = bnb__linear_of(job->y), codes = l;
    bnb__int8 q = bnb__int8_of(job->y, job->work, NULL);
    int64_t mr = g->g.mr;
    if (phase == 0) { bnb__int8_quantize(&q, (const float *)(l.x + tile * l.x_stride), l.w->quant.threshold, tile); return; }
    if (phase == 1) { bnb__int8_columns(&q); return; }
    if (phase == 2) { /* a tile is a panel */
        for (int64_t m = tile * mr; m < (tile + 1) * mr; m++)
            if (m < l.M) bnb__int8_finish(&q, m);
            else q.sca[m] = 0, q.sum[m] = 0;
        int64_t groups = bnb__gemm_shape_of(&g->g, l.M, l.K).groups;
        codes.x = (const char *)q.codes, codes.x_stride = q.Kp;
        g->g.pack(&codes, tile * mr, 0, groups, (uint32_t *)q.packed + tile * groups * mr);
        return;
    }
    int64_t blocks = (l.M + BNB__GEMM_ROWS - 1) / BNB__GEMM_ROWS, n0 = tile / blocks * g->g.nt;
    int64_t m0 = tile % blocks * BNB__GEMM_ROWS, m1 = m0 + BNB__GEMM_ROWS < l.M ? m0 + BNB__GEMM_ROWS : l.M;
    int64_t nt = l.N - n0 < g->g.nt ? l.N - n0 : g->g.nt;
    float *c = bnb__gemm_tile(&g->g, &l, q.packed, job->local, n0, m0, m1);
    for (int64_t m = m0; m < m1; m += mr) bnb__int8_scale_panel(&g->g, &l, &q, g->offset, m, n0, nt, c + (m - m0) * g->g.nt);
    if (q.count[0]) {
        float *x = (float *)((char *)job->local + bnb__gemm_local(&g->g, job->y));
        bnb__int8_outliers(g, &l, &q, n0, m0, m1, c, (float *)job->local, x, x + BNB__GEMM_GROUPS * mr);
    }
    codes = l, codes.bias = NULL;
    for (int64_t m = m0; m < m1; m += mr) g->g.store(&codes, m, n0, nt, c + (m - m0) * g->g.nt);
}

static int64_t bnb__int8_gemm_tiles(const bnb__int8_gemm *g, const bnb_tensor *y, int32_t phase)
{
    int64_t M = y->src[0]->shape[0];
    return phase == 0 ? M : phase == 1 ? 1 : phase == 2 ? (M + g->g.mr - 1) / g->g.mr : bnb__gemm_tiles(&g->g, y, 1);
}

#define BNB__INT8_GEMM_ROW(G)                                                                                          \
    static int64_t G##_tiles(const bnb_tensor *y, int32_t phase) { return bnb__int8_gemm_tiles(&G, y, phase); }        \
    static uint64_t G##_work(const bnb_tensor *y) { return bnb__dot_int8_work(y) + bnb__gemm_work(&G.g, y); }          \
    static uint64_t G##_local(const bnb_tensor *y)                                                                     \
    {                                                                                                                  \
        return bnb__gemm_local(&G.g, y) + (uint64_t)((BNB__GEMM_GROUPS + G.g.nt) * G.g.mr) * 4;                        \
    }                                                                                                                  \
    static void G##_run(const bnb__job *job, int32_t phase, int64_t tile) { bnb__int8_gemm_run(&G, job, phase, tile); }

static const bnb__int8_gemm bnb__gemm_i8_vnni = {
    {32, 48, 4, bnb__pack_i8_512, bnb__fill_i8_512, bnb__micro_i8_512, bnb__gemm_store_512, NULL, NULL}, 128, bnb__micro_f32_512};
BNB__INT8_GEMM_ROW(bnb__gemm_i8_vnni)

/* ---- AMX: the same panels, as tiles of 16 rows of 64 bytes. Rows of w are the left operand, a panel the right one; the
 * 3 x 2 results of 48 rows of w and 32 of x stay in tiles 0 to 5. ---- */

typedef struct bnb__amx_config { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } bnb__amx_config;

static BNB__AMX void bnb__amx_begin(void)
{
    static const bnb__amx_config config = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&config);
}

static BNB__AMX void bnb__amx_end(void) { _tile_release(); }

#define BNB__AMX_MOVE(what, n) what(0, c, 128); what(1, c + 512, 128); what(2, c + 1024, 128);                         \
    if (n) { what(3, c + 16, 128); what(4, c + 528, 128); what(5, c + 1040, 128); }
#define BNB__AMX_COLUMN(MUL, a, b, d, half) /* 16 rows of x against 48 of w */                                         \
    _tile_loadd(6, x + g * 32 + half, 128);                                                                            \
    _tile_loadd(7, w + g, BNB__GEMM_LD * 4); MUL(a, 7, 6);                                                             \
    _tile_loadd(7, w + 16 * BNB__GEMM_LD + g, BNB__GEMM_LD * 4); MUL(b, 7, 6);                                         \
    _tile_loadd(7, w + 32 * BNB__GEMM_LD + g, BNB__GEMM_LD * 4); MUL(d, 7, 6);
#define BNB__MICRO_AMX(name, MUL)                                                                                      \
    static BNB__AMX void name(int first, int64_t rows, int64_t ng, const uint32_t *x, const uint32_t *w, float *c)     \
    {                                                                                                                  \
        int both = rows > 16;                                                                                          \
        if (first) { _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); _tile_zero(4); _tile_zero(5); }       \
        else { BNB__AMX_MOVE(_tile_loadd, both) }                                                                      \
        for (int64_t g = 0; g < ng; g += 16) {                                                                         \
            BNB__AMX_COLUMN(MUL, 0, 1, 2, 0)                                                                           \
            if (both) { BNB__AMX_COLUMN(MUL, 3, 4, 5, 16) }                                                            \
        }                                                                                                              \
        BNB__AMX_MOVE(_tile_stored, both)                                                                              \
    }
BNB__MICRO_AMX(bnb__micro_bf16_amx, _tile_dpbf16ps)
BNB__MICRO_AMX(bnb__micro_i8_amx, _tile_dpbssd)

static BNB__AVX512 void bnb__fill_i8_amx(const bnb__linear *l, int64_t n, int64_t g, int64_t ng, uint32_t *out)
{
    for (int64_t i = 0; i < ng; i += 16)
        _mm512_storeu_si512(out + i, _mm512_maskz_loadu_epi8(bnb__mask64(l->K - 4 * (g + i)), l->codes + n * l->K + 4 * (g + i)));
}

static const bnb__int8_gemm bnb__gemm_i8_amx = {
    {32, 48, 4, bnb__pack_i8_512, bnb__fill_i8_amx, bnb__micro_i8_amx, bnb__gemm_store_512, bnb__amx_begin, bnb__amx_end}, 0, bnb__micro_f32_512};
BNB__INT8_GEMM_ROW(bnb__gemm_i8_amx)

/* ---- the same for AVX2 ---- */

BNB__INLINE BNB__AVX2 __m256 bnb__load_256(const int type, const void *p, int64_t i, int64_t n) /* the first n of 8; zeros */
{
    const char *at = (const char *)p + i * bnb__size_of(type);
    if (type == BNB_F32) return bnb__load_f32_256((const float *)at, n);
    if (type == BNB_INT8_KV) {
        int64_t codes = 0;
        memcpy(&codes, at, (size_t)(n >= 8 ? 8 : n > 0 ? n : 0));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(codes)));
    }
    uint16_t few[8] = {0};
    if (n < 8 && n > 0) memcpy(few, at, (size_t)n * 2);
    __m128i h = _mm_loadu_si128((const __m128i *)(n < 8 ? (const char *)few : at));
    return type == BNB_F16 ? _mm256_cvtph_ps(h) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

/* The 16 values of a 4-bit type cut into their 4 bytes, one table for vpshufb each. */
BNB__INLINE BNB__AVX2 void bnb__tables_256(int32_t type, __m256i *table /* [4] */)
{
    uint8_t t[4][16];
    for (int i = 0; i < 16; i++)
        for (int b = 0; b < 4; b++) t[b][i] = ((const uint8_t *)(type == BNB_NF4 ? bnb_nf4_map : bnb_fp4_map))[4 * i + b];
    for (int b = 0; b < 4; b++) table[b] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)t[b]));
}

BNB__INLINE BNB__AVX2 void bnb__decode4_256(const uint8_t *codes /* [16] */, const __m256i *table, __m256 *v /* [4]: 32 in order */)
{
    __m128i q = _mm_loadu_si128((const __m128i *)codes), low = _mm_set1_epi8(15);
    __m128i even = _mm_and_si128(_mm_srli_epi16(q, 4), low), odd = _mm_and_si128(q, low);
    __m256i i = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi8(even, odd)), _mm_unpackhi_epi8(even, odd), 1);
    /* the unpacks below work in halves: give the low half fours 0 2 4 6 and the high half 1 3 5 7 */
    i = _mm256_permutevar8x32_epi32(i, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    __m256i b0 = _mm256_shuffle_epi8(table[0], i), b1 = _mm256_shuffle_epi8(table[1], i);
    __m256i b2 = _mm256_shuffle_epi8(table[2], i), b3 = _mm256_shuffle_epi8(table[3], i);
    __m256i lo = _mm256_unpacklo_epi8(b0, b1), hi = _mm256_unpacklo_epi8(b2, b3);
    v[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(lo, hi)), v[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(lo, hi));
    lo = _mm256_unpackhi_epi8(b0, b1), hi = _mm256_unpackhi_epi8(b2, b3);
    v[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(lo, hi)), v[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(lo, hi));
}

/* One row of w, any type but int8. Two partial sums for each row of x where there is room: additions take time. */
BNB__INLINE BNB__AVX2 void bnb__dot_row_256(const bnb__linear *l, int64_t n, const int type, const __m256i *table, const int M)
{
    const float *x[8];
    __m256 sum[16], v[4];
    int64_t K = l->K, k = 0, first = n * K, left;
    const int P = M <= 4 ? 2 : 1;
    int shift = type >= BNB_NF4 ? __builtin_ctz((unsigned)l->w->quant.blocksize) : 0;
    BNB__UNROLL for (int i = 0; i < 16; i++) sum[i] = _mm256_setzero_ps();
    BNB__UNROLL for (int m = 0; m < M; m++) x[m] = (const float *)(l->x + (m < l->M ? m : l->M - 1) * l->x_stride);
    for (; k + 32 <= K; k += 32) {
        if (type >= BNB_NF4) {
            const uint8_t *q = l->codes + (first + k) / 2;
            if (!(k & 127)) _mm_prefetch((const char *)q + BNB__DOT_PREFETCH, _MM_HINT_T0);
            bnb__decode4_256(q, table, v);
            __m256 a = _mm256_set1_ps(bnb__absmax(l->w, (first + k) >> shift));
            BNB__UNROLL for (int i = 0; i < 4; i++) v[i] = _mm256_mul_ps(v[i], a);
        } else {
            BNB__UNROLL for (int i = 0; i < 4; i++) v[i] = bnb__load_256(type, l->codes, first + k + 8 * i, 8);
        }
        BNB__UNROLL for (int m = 0; m < M; m++)
            BNB__UNROLL for (int i = 0; i < 4; i++)
                sum[m * P + i % P] = _mm256_fmadd_ps(v[i], _mm256_loadu_ps(x[m] + k + 8 * i), sum[m * P + i % P]);
    }
    for (; type < BNB_NF4 && (left = K - k) > 0; k += 8) {
        v[0] = bnb__load_256(type, l->codes, first + k, left);
        BNB__UNROLL for (int m = 0; m < M; m++) sum[m * P] = _mm256_fmadd_ps(v[0], bnb__load_f32_256(x[m] + k, left), sum[m * P]);
    }
    if (P == 2) {
        BNB__UNROLL for (int m = 0; m < 8; m++) sum[m] = _mm256_add_ps(sum[2 * m], sum[2 * m + 1]);
    }
    bnb__dot_store(l, n, sum, M, 1);
}

static BNB__AVX2 void bnb__dot_256(const bnb__job *job, int32_t phase, int64_t tile)
{
    bnb__linear l = bnb__linear_of(job->y);
    int64_t rows = bnb__dot_rows(l.w), n = tile * rows, n1 = n + rows < l.N ? n + rows : l.N;
    __m256i table[4];
    bnb__tables_256(l.w->type, table);
    (void)phase;
#define BNB__CALL(M, R)                                                                                                \
    for (; n < n1; n++)                                                                                                \
        if (l.w->type == BNB_F32) bnb__dot_row_256(&l, n, BNB_F32, table, M);                                          \
        else if (l.w->type == BNB_F16) bnb__dot_row_256(&l, n, BNB_F16, table, M);                                     \
        else if (l.w->type == BNB_BF16) bnb__dot_row_256(&l, n, BNB_BF16, table, M);                                   \
        else bnb__dot_row_256(&l, n, BNB_NF4, table, M)
    BNB__DOT_SWITCH(l.M, BNB__CALL)
#undef BNB__CALL
}

static BNB__AVX2 void bnb__dot_int8_256(const bnb__job *job, int32_t phase, int64_t tile)
{
    bnb__linear l = bnb__linear_of(job->y);
    bnb__int8 q = bnb__int8_of(job->y, job->work, NULL);
    if (phase == 0) { bnb__int8_dot_begin(&l, &q); return; }
    int64_t rows = bnb__dot_rows(l.w), n = tile * rows, n1 = n + rows < l.N ? n + rows : l.N;
    for (; n < n1; n++) {
        __m256i acc[8];
        int32_t c[8];
        BNB__UNROLL for (int m = 0; m < 8; m++) acc[m] = _mm256_setzero_si256();
        for (int64_t k = 0; k < l.K; k += 16) {
            uint8_t few[16] = {0};
            const uint8_t *w = l.codes + n * l.K + k;
            if (l.K - k < 16) memcpy(few, w, (size_t)(l.K - k)), w = few;
            __m256i v = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w));
            BNB__UNROLL for (int m = 0; m < 8; m++)
                if (m < l.M) acc[m] = _mm256_add_epi32(acc[m], _mm256_madd_epi16(v, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(q.codes + m * q.Kp + k)))));
        }
        __m256i s = _mm256_hadd_epi32(_mm256_hadd_epi32(acc[0], acc[1]), _mm256_hadd_epi32(acc[2], acc[3]));
        __m256i t = _mm256_hadd_epi32(_mm256_hadd_epi32(acc[4], acc[5]), _mm256_hadd_epi32(acc[6], acc[7]));
        _mm256_storeu_si256((__m256i *)c, _mm256_add_epi32(_mm256_permute2x128_si256(s, t, 0x20), _mm256_permute2x128_si256(s, t, 0x31)));
        bnb__int8_dot_store(&l, &q, n, c);
    }
}

BNB__INLINE BNB__AVX2 void bnb__transpose_256(__m256i *r) /* [8] vectors of 8 lanes */
{
    __m256i t[8];
    BNB__UNROLL for (int i = 0; i < 8; i += 2) t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    BNB__UNROLL for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    BNB__UNROLL for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x20);
        t[4 + i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x31);
    }
    BNB__UNROLL for (int i = 0; i < 8; i++) r[i] = t[i];
}

static BNB__AVX2 void bnb__gemm_store_256(const bnb__linear *l, int64_t m0, int64_t n0, int64_t nt, const float *c)
{
    for (int64_t i = 0; i < 16 && m0 + i < l->M; i += 8)
        for (int64_t j = 0; j < nt; j += 8) {
            __m256i r[8], mask = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(nt - j)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
            float b[8];
            for (int q = 0; q < 8; q++) b[q] = j + q < nt ? bnb__bias(l->bias, n0 + j + q) : 0.0f;
            BNB__UNROLL for (int q = 0; q < 8; q++) r[q] = _mm256_load_si256((const __m256i *)(c + (j + q) * 16 + i));
            bnb__transpose_256(r);
            BNB__UNROLL for (int q = 0; q < 8; q++)
                if (m0 + i + q < l->M)
                    _mm256_maskstore_ps(l->y + (m0 + i + q) * l->N + n0 + j, mask, _mm256_add_ps(_mm256_castsi256_ps(r[q]), _mm256_loadu_ps(b)));
        }
}

#define BNB__MICRO_256(name, MUL)                                                                                      \
    BNB__INLINE BNB__AVX2 void name##_block(int first, int64_t ng, const uint32_t *x, const uint32_t *w, float *c,     \
                                            const int V, const int N)                                                  \
    {                                                                                                                  \
        __m256i acc[12], v[2];                                                                                         \
        BNB__UNROLL for (int i = 0; i < V * N; i++)                                                                    \
            acc[i] = first ? _mm256_setzero_si256() : _mm256_load_si256((__m256i *)(c + i / V * 16 + i % V * 8));      \
        for (int64_t g = 0; g < ng; g++) {                                                                             \
            BNB__UNROLL for (int i = 0; i < V; i++) v[i] = _mm256_load_si256((const __m256i *)(x + g * 16 + i * 8));   \
            BNB__UNROLL for (int n = 0; n < N; n++) {                                                                  \
                __m256i b = _mm256_set1_epi32((int)w[n * BNB__GEMM_LD + g]);                                           \
                BNB__UNROLL for (int i = 0; i < V; i++) acc[n * V + i] = MUL(acc[n * V + i], v[i], b);                 \
            }                                                                                                          \
        }                                                                                                              \
        BNB__UNROLL for (int i = 0; i < V * N; i++) _mm256_store_si256((__m256i *)(c + i / V * 16 + i % V * 8), acc[i]); \
    }                                                                                                                  \
    static BNB__AVX2 void name(int first, int64_t rows, int64_t ng, const uint32_t *x, const uint32_t *w, float *c)    \
    {                                                                                                                  \
        for (int n = 0; n < 48; n += rows > 8 ? 6 : 12)                                                                \
            if (rows > 8) name##_block(first, ng, x, w + n * BNB__GEMM_LD, c + n * 16, 2, 6);                          \
            else name##_block(first, ng, x, w + n * BNB__GEMM_LD, c + n * 16, 1, 12);                                  \
    }
#define BNB__MUL_F32_256(a, x, w) _mm256_castps_si256(_mm256_fmadd_ps(_mm256_castsi256_ps(x), _mm256_castsi256_ps(w), _mm256_castsi256_ps(a)))
#define BNB__MUL_I16_256(a, x, w) _mm256_add_epi32(a, _mm256_madd_epi16(x, w))
BNB__MICRO_256(bnb__micro_f32_256, BNB__MUL_F32_256)
BNB__MICRO_256(bnb__micro_i16_256, BNB__MUL_I16_256)

/* R: lanes p .. p + 8 of row m */
#define BNB__PACK_256(name, R)                                                                                         \
    static BNB__AVX2 void name(const bnb__linear *l, int64_t m0, int64_t g, int64_t ng, uint32_t *out)                 \
    {                                                                                                                  \
        for (int64_t i = 0; i < 16 && m0 + i < l->M; i += 8)                                                           \
            for (int64_t p = g; p < g + ng; p += 8) {                                                                  \
                __m256i r[8];                                                                                          \
                BNB__UNROLL for (int q = 0; q < 8; q++) {                                                              \
                    const char *x = l->x + (m0 + i + q) * l->x_stride;                                                 \
                    r[q] = m0 + i + q < l->M ? R : _mm256_setzero_si256();                                             \
                }                                                                                                      \
                bnb__transpose_256(r);                                                                                 \
                BNB__UNROLL for (int q = 0; q < 8; q++) _mm256_store_si256((__m256i *)(out + (p - g + q) * 16 + i), r[q]); \
            }                                                                                                          \
    }
BNB__PACK_256(bnb__pack_f32_256, _mm256_castps_si256(l->x_type == BNB_F32   ? bnb__load_256(BNB_F32, x, p, l->K - p)
                                                     : l->x_type == BNB_F16 ? bnb__load_256(BNB_F16, x, p, l->K - p)
                                                                            : bnb__load_256(BNB_INT8_KV, x, p, l->K - p)))
BNB__PACK_256(bnb__pack_i16_256, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(x + 2 * p))))

static BNB__AVX2 void bnb__fill_f32_256(const bnb__linear *l, int64_t n, int64_t g, int64_t ng, uint32_t *out)
{
    for (int64_t i = 0; i < ng; i += 8) {
        int64_t e = n * l->K + g + i, left = l->K - g - i;
        _mm256_storeu_ps((float *)out + i, l->w->type == BNB_F32    ? bnb__load_256(BNB_F32, l->codes, e, left)
                                           : l->w->type == BNB_F16  ? bnb__load_256(BNB_F16, l->codes, e, left)
                                           : l->w->type == BNB_BF16 ? bnb__load_256(BNB_BF16, l->codes, e, left)
                                                                    : bnb__load_256(BNB_INT8_KV, l->codes, e, left));
    }
}

static BNB__AVX2 void bnb__fill4_f32_256(const bnb__linear *l, int64_t n, int64_t g, int64_t ng, uint32_t *out)
{
    __m256i table[4];
    __m256 v[4];
    int shift = __builtin_ctz((unsigned)l->w->quant.blocksize);
    bnb__tables_256(l->w->type, table);
    for (int64_t i = 0; i < ng; i += 32) {
        if (g + i >= l->K) { memset(out + i, 0, (size_t)(ng - i) * 4); return; }
        int64_t e = n * l->K + g + i;
        bnb__decode4_256(l->codes + e / 2, table, v);
        __m256 a = _mm256_set1_ps(bnb__absmax(l->w, e >> shift));
        BNB__UNROLL for (int j = 0; j < 4; j++) _mm256_storeu_ps((float *)out + i + 8 * j, _mm256_mul_ps(v[j], a));
    }
}

static BNB__AVX2 void bnb__fill_i16_256(const bnb__linear *l, int64_t n, int64_t g, int64_t ng, uint32_t *out)
{
    for (int64_t i = 0; i < ng; i += 8) {
        int64_t k = 2 * (g + i), left = l->K - k;
        uint8_t few[16] = {0};
        const uint8_t *w = l->codes + n * l->K + k;
        if (left < 16) {
            if (left > 0) memcpy(few, w, (size_t)left);
            w = few;
        }
        _mm256_storeu_si256((__m256i *)(out + i), _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w)));
    }
}

static const bnb__int8_gemm bnb__gemm_i8_256 = {
    {16, 48, 2, bnb__pack_i16_256, bnb__fill_i16_256, bnb__micro_i16_256, bnb__gemm_store_256, NULL, NULL}, 0, bnb__micro_f32_256};
BNB__INT8_GEMM_ROW(bnb__gemm_i8_256)

#define BNB__GEMMS(X)                                                                                                  \
    X(bnb__gemm_f32_512, 1, bnb__pack_f32_512, bnb__fill_f32_f32_512, bnb__micro_f32_512, NULL, NULL)                              \
    X(bnb__gemm_f16_512, 1, bnb__pack_f32_512, bnb__fill_f16_f32_512, bnb__micro_f32_512, NULL, NULL)                              \
    X(bnb__gemm_bf16_512, 1, bnb__pack_f32_512, bnb__fill_bf16_f32_512, bnb__micro_f32_512, NULL, NULL)                            \
    X(bnb__gemm_4bit_512, 1, bnb__pack_f32_512, bnb__fill4_f32_512, bnb__micro_f32_512, NULL, NULL)                                \
    X(bnb__gemm_f16_bf16, 2, bnb__pack_bf16_512, bnb__fill_f16_bf16_512, bnb__micro_bf16_512, NULL, NULL)                          \
    X(bnb__gemm_bf16_bf16, 2, bnb__pack_bf16_512, bnb__fill_bf16_bf16_512, bnb__micro_bf16_512, NULL, NULL)                        \
    X(bnb__gemm_4bit_bf16, 2, bnb__pack_bf16_512, bnb__fill4_bf16_512, bnb__micro_bf16_512, NULL, NULL)  \
    X(bnb__gemm_f16_amx, 2, bnb__pack_bf16_512, bnb__fill_f16_bf16_512, bnb__micro_bf16_amx, bnb__amx_begin, bnb__amx_end)  \
    X(bnb__gemm_bf16_amx, 2, bnb__pack_bf16_512, bnb__fill_bf16_bf16_512, bnb__micro_bf16_amx, bnb__amx_begin, bnb__amx_end) \
    X(bnb__gemm_4bit_amx, 2, bnb__pack_bf16_512, bnb__fill4_bf16_512, bnb__micro_bf16_amx, bnb__amx_begin, bnb__amx_end)
static const bnb__gemm bnb__gemm_f32_256 = {16, 48, 1, bnb__pack_f32_256, bnb__fill_f32_256, bnb__micro_f32_256, bnb__gemm_store_256, NULL, NULL};
BNB__GEMM_ROW(bnb__gemm_f32_256)
static const bnb__gemm bnb__gemm_4bit_256 = {16, 48, 1, bnb__pack_f32_256, bnb__fill4_f32_256, bnb__micro_f32_256, bnb__gemm_store_256, NULL, NULL};
BNB__GEMM_ROW(bnb__gemm_4bit_256)
#define BNB__X(name, group, pack, fill, micro, begin, end)                                                                         \
    static const bnb__gemm name = {32, 48, group, pack, fill, micro, bnb__gemm_store_512, begin, end};                             \
    BNB__GEMM_ROW(name)
BNB__GEMMS(BNB__X)
#undef BNB__X

/* ---- attention ------------------------------------------------------------------------------------------------------
 * Both kernels go through the rows of k and v in blocks and keep a running maximum and sum (online softmax), so scratch
 * does not grow with the context. Sums over rows are in the order of the rows, in blocks counted from the first row seen.
 * Codes of int8_kv are multiplied as they are: a row's scale goes to its score (k) and to its weight (v). */

BNB__INLINE BNB__AVX2 __m256 bnb__exp_256(__m256 x) /* relative error 1e-7; 0 below -87.3, infinity above 88.7 */
{
    __m256 keep = _mm256_cmp_ps(x, _mm256_set1_ps(-87.3f), _CMP_NLT_UQ), big = _mm256_cmp_ps(x, _mm256_set1_ps(88.72f), _CMP_GT_OQ);
    x = _mm256_max_ps(_mm256_set1_ps(-87.3f), x);
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693145752f), x), p; /* ln 2 in two parts: |r| <= ln 2 / 2 */
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(1.42860677e-6f), r);
    p = _mm256_fmadd_ps(r, _mm256_set1_ps(1.38888889e-3f), _mm256_set1_ps(8.33333333e-3f)); /* Taylor: r^6 / 6! + .. */
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.16666667e-2f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.66666667e-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(_mm256_mul_ps(r, r), p, _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
    /* 2^n in two steps: n may be 128 */
    __m256i i = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(i, 1), one = _mm256_set1_epi32(127);
    p = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, one), 23)));
    p = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(i, half), one), 23)));
    return _mm256_and_ps(_mm256_blendv_ps(p, _mm256_set1_ps(__builtin_inff()), big), keep);
}

BNB__INLINE BNB__AVX2 float bnb__exp1(float x) { return _mm256_cvtss_f32(bnb__exp_256(_mm256_set1_ps(x))); }

BNB__INLINE BNB__AVX2 float bnb__max_of_256(__m256 v)
{
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

BNB__INLINE BNB__AVX2 float bnb__sum_of_256(__m256 v)
{
    __m128 m = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_add_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
}

BNB__INLINE BNB__AVX2 __m256 bnb__lanes_256(int64_t a, int64_t b) /* mask: lanes a <= i < b */
{
    __m256i i = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32((int)(a < 0 ? 0 : a > 8 ? 8 : a)), i),
                                                   _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(b < 0 ? 0 : b > 8 ? 8 : b)), i)));
}

/* s [n] holds scores, n <= BLOCK, a multiple of 8; those in [a, b), a < b, become exp(s - max), the rest 0. max and sum
 * run; returns what earlier exps must be multiplied by. */
BNB__INLINE BNB__AVX2 float bnb__online_softmax(float *s, int64_t n, int64_t a, int64_t b, float *max, float *sum)
{
    __m256 m = _mm256_set1_ps(*max), none = _mm256_set1_ps(-__builtin_inff()), t = _mm256_setzero_ps();
    for (int64_t j = a & ~(int64_t)7; j < b; j += 8)
        m = _mm256_max_ps(m, _mm256_blendv_ps(none, _mm256_loadu_ps(s + j), bnb__lanes_256(a - j, b - j)));
    float top = bnb__max_of_256(m), keep = bnb__exp1(*max - top);
    for (int64_t j = 0; j < n; j += 8) {
        __m256 e = _mm256_setzero_ps();
        if (j + 8 > a && j < b)
            e = _mm256_and_ps(bnb__exp_256(_mm256_sub_ps(_mm256_loadu_ps(s + j), _mm256_set1_ps(top))), bnb__lanes_256(a - j, b - j));
        t = _mm256_add_ps(t, e);
        _mm256_storeu_ps(s + j, e);
    }
    *max = top;
    *sum = *sum * keep + bnb__sum_of_256(t);
    return keep;
}

/* p [n], rows [a, b) of it times absmax / 127; 0 for others in the same vectors. absmax: of the row of p[0] and on. */
BNB__INLINE BNB__AVX2 void bnb__times_scales(float *p, const float *absmax, int64_t a, int64_t b)
{
    for (int64_t j = a & ~(int64_t)7; j < b; j += 8) {
        __m256 unit = _mm256_mul_ps(bnb__load_f32_256(absmax + j, b - j), _mm256_set1_ps(0x1.020408p-7f));
        _mm256_storeu_ps(p + j, _mm256_and_ps(_mm256_mul_ps(_mm256_loadu_ps(p + j), unit), bnb__lanes_256(a - j, b - j)));
    }
}

typedef struct bnb__attention {
    const char *q, *k, *v; /* q f32 [T, n_head * D], k and v [R, row], rows q_stride and kv_stride bytes apart */
    const float *k_scale, *v_scale; /* int8_kv: [n_head_kv, R]; else NULL */
    const int32_t *span;   /* [T, 2] */
    float *y;              /* [T, n_head * D] */
    int64_t T, R, D, n_head, group, row, q_stride, kv_stride;
    float scale;
} bnb__attention;

static bnb__attention bnb__attention_of(const bnb_tensor *y)
{
    const bnb_tensor *q = y->src[0], *k = y->src[1], *v = y->src[2];
    int32_t n_head = y->params.attention.n_head, n_kv = y->params.attention.n_head_kv;
    const int scaled = k->type == BNB_INT8_KV;
    return (bnb__attention){(const char *)q->plane[0], (const char *)k->plane[0], (const char *)v->plane[0],
                            scaled ? (const float *)k->plane[1] : NULL, scaled ? (const float *)v->plane[1] : NULL,
                            (const int32_t *)y->src[3]->plane[0], (float *)y->plane[0], q->shape[0], k->shape[0],
                            q->shape[1] / n_head, n_head, n_head / n_kv, k->shape[1], q->stride[0], k->stride[0],
                            y->params.attention.scale};
}

static int32_t bnb__attention_fits(const bnb_tensor *y)
{
    const bnb_tensor *k = y->src[1], *v = y->src[2];
    int64_t D = y->src[0]->shape[1] / y->params.attention.n_head, row = k->shape[1] * bnb_type_bits(k->type) / 8;
    return D % 8 == 0 && D <= BNB__GEMM_GROUPS && k->type == v->type && k->stride[0] == row && v->stride[0] == row;
}

static void bnb__attention_span(const bnb__attention *a, int64_t t, int64_t *s0, int64_t *s1) /* within [0, R) */
{
    *s0 = a->span[2 * t] < 0 ? 0 : a->span[2 * t];
    *s1 = a->span[2 * t + 1] > a->R ? a->R : a->span[2 * t + 1];
    if (*s1 < *s0) *s1 = *s0;
}

/* acc [8 C] (+)= sum over j of p[j] v[j], v: rows of numbers of a type. C vectors at a time. */
BNB__INLINE BNB__AVX2 void bnb__attention_mix(const int type, const char *v, int64_t stride, const float *p, int64_t n, float keep,
                                              float *acc, const int C)
{
    __m256 a[8];
    BNB__UNROLL for (int i = 0; i < C; i++) a[i] = _mm256_mul_ps(_mm256_loadu_ps(acc + 8 * i), _mm256_set1_ps(keep));
    for (int64_t j = 0; j < n; j++, v += stride) {
        __m256 pj = _mm256_set1_ps(p[j]);
        for (int64_t b = 0; b < C * 8 * bnb__size_of(type); b += 64) _mm_prefetch(v + 16 * stride + b, _MM_HINT_T0);
        BNB__UNROLL for (int i = 0; i < C; i++) a[i] = _mm256_fmadd_ps(pj, bnb__load_256(type, v, 8 * i, 8), a[i]);
    }
    BNB__UNROLL for (int i = 0; i < C; i++) _mm256_storeu_ps(acc + 8 * i, a[i]);
}

enum { BNB__ATTENTION_BLOCK = 128 }; /* rows of k and v at a time */

/* A tile is one head of one row: made for decode, where the time is that of reading k and v. */
BNB__INLINE BNB__AVX2 void bnb__attention_row(const bnb__attention *a, const int type, int64_t t, int64_t h)
{
    float s[BNB__ATTENTION_BLOCK], max = -__builtin_inff(), sum = 0;
    int64_t D = a->D, s0, s1, size = bnb__size_of(type), kv = h / a->group;
    const float *q = (const float *)(a->q + t * a->q_stride) + h * D;
    float *y = a->y + (t * a->n_head + h) * D;
    bnb__attention_span(a, t, &s0, &s1);
    memset(y, 0, (size_t)D * 4);
    for (int64_t r = s0; r < s1; r += BNB__ATTENTION_BLOCK) {
        int64_t n = s1 - r < BNB__ATTENTION_BLOCK ? s1 - r : BNB__ATTENTION_BLOCK, d;
        const char *k = a->k + r * a->kv_stride + kv * D * size, *v = a->v + (k - a->k);
        for (int64_t j = 0; j < n; j += 8) {
            __m256 acc[8];
            const char *row[8]; /* beyond the end: the last row again */
            BNB__UNROLL for (int i = 0; i < 8; i++) acc[i] = _mm256_setzero_ps(), row[i] = k + (j + i < n ? j + i : n - 1) * a->kv_stride;
            for (d = 0; d < D; d += 8) {
                __m256 qd = _mm256_loadu_ps(q + d);
                BNB__UNROLL for (int i = 0; i < 8; i++) acc[i] = _mm256_fmadd_ps(qd, bnb__load_256(type, row[i], d, 8), acc[i]);
            }
            _mm256_storeu_ps(s + j, _mm256_mul_ps(bnb__sum8(acc), _mm256_set1_ps(a->scale)));
            for (int i = 0; i < 8; i++)
                for (int64_t b = 0; b < D * size; b += 64) _mm_prefetch(row[i] + 16 * a->kv_stride + b, _MM_HINT_T0);
        }
        if (type == BNB_INT8_KV) bnb__times_scales(s, a->k_scale + kv * a->R + r, 0, n);
        float keep = bnb__online_softmax(s, (n + 7) & ~(int64_t)7, 0, n, &max, &sum);
        if (type == BNB_INT8_KV) bnb__times_scales(s, a->v_scale + kv * a->R + r, 0, n);
        for (d = 0; d + 64 <= D; d += 64) bnb__attention_mix(type, v + d * size, a->kv_stride, s, n, keep, y + d, 8);
        for (; d < D; d += 8) bnb__attention_mix(type, v + d * size, a->kv_stride, s, n, keep, y + d, 1);
    }
    for (int64_t d = 0; d < D && s1 > s0; d++) y[d] /= sum;
}

static BNB__AVX2 void bnb__attention_decode(const bnb__job *job, int32_t phase, int64_t tile)
{
    bnb__attention a = bnb__attention_of(job->y);
    (void)phase;
    int64_t t = tile / a.n_head, h = tile % a.n_head;
    switch (job->y->src[1]->type) {
    case BNB_F32: bnb__attention_row(&a, BNB_F32, t, h); break;
    case BNB_F16: bnb__attention_row(&a, BNB_F16, t, h); break;
    default: bnb__attention_row(&a, BNB_INT8_KV, t, h); break;
    }
}

static int64_t bnb__attention_decode_tiles(const bnb_tensor *y, int32_t phase)
{
    (void)phase;
    return y->src[0]->shape[0] * y->params.attention.n_head;
}

/* Prompts: a tile is nt = 48 rows of q and one head. Both products are gemms: scores = q (as weights) times packed k, then
 * y += exps (as weights) times v, whose rows are panels as they stand. */
typedef struct bnb__attention_local {
    float *q;           /* [48][LD]                scaled                     */
    float *p;           /* [48][LD]                exps                       */
    float *s;           /* [BLOCK / mr][48][mr]    scores                     */
    float *k;           /* [BLOCK / mr][Dp][mr]    Dp: D rounded up to 16     */
    float *v;           /* [Dv / mr][BLOCK][mr]    Dv: D rounded up to mr     */
    float *y;           /* [Dv / mr][48][mr]                                  */
    float *max, *sum;   /* [48]                                               */
    uint64_t bytes;
} bnb__attention_local;

static bnb__attention_local bnb__attention_local_of(const bnb__gemm *g, int64_t D, void *local)
{
    bnb__attention_local s;
    int64_t Dp = (D + 15) & ~(int64_t)15, Dv = (D + g->mr - 1) / g->mr * g->mr;
    float *p = (float *)local;
    s.q = p, p += g->nt * BNB__GEMM_LD;
    s.p = p, p += g->nt * BNB__GEMM_LD;
    s.s = p, p += g->nt * BNB__ATTENTION_BLOCK;
    s.k = p, p += Dp * BNB__ATTENTION_BLOCK;
    s.v = p, p += Dv * BNB__ATTENTION_BLOCK;
    s.y = p, p += Dv * g->nt;
    s.max = p, p += g->nt;
    s.sum = p, p += g->nt;
    s.bytes = (uint64_t)((char *)p - (char *)local);
    return s;
}

static BNB__AVX2 void bnb__attention_prompt(const bnb__gemm *g, const bnb__job *job, int64_t tile)
{
    bnb__attention a = bnb__attention_of(job->y);
    int64_t D = a.D, Dp = (D + 15) & ~(int64_t)15, mr = g->mr, nt = g->nt, lo = a.R, hi = 0, s0, s1;
    int64_t h = tile % a.n_head, t0 = tile / a.n_head * nt, n = a.T - t0 < nt ? a.T - t0 : nt;
    bnb__attention_local s = bnb__attention_local_of(g, D, job->local);
    const bnb_tensor *k = job->y->src[1], *v = job->y->src[2];
    int64_t kv = h / a.group * D;
    const float *k_scale = a.k_scale ? a.k_scale + h / a.group * a.R : NULL;
    const float *v_scale = a.v_scale ? a.v_scale + h / a.group * a.R : NULL;
    bnb__linear lk = {a.k + kv * bnb__size_of(k->type), a.kv_stride, k->type, NULL, NULL, NULL, NULL, 0, 0, D};
    bnb__linear lv = {NULL, 0, 0, v, NULL, (const uint8_t *)a.v, NULL, 0, 0, a.row};
    memset(s.q, 0, (size_t)(nt * BNB__GEMM_LD) * 4);
    memset(s.p, 0, (size_t)(nt * BNB__GEMM_LD) * 4);
    for (int64_t i = 0; i < n; i++) {
        const float *q = (const float *)(a.q + (t0 + i) * a.q_stride) + h * D;
        for (int64_t d = 0; d < D; d++) s.q[i * BNB__GEMM_LD + d] = q[d] * a.scale;
        s.max[i] = -__builtin_inff(), s.sum[i] = 0;
        bnb__attention_span(&a, t0 + i, &s0, &s1);
        if (s0 < s1) lo = s0 < lo ? s0 : lo, hi = s1 > hi ? s1 : hi;
    }
    lk.M = hi;
    for (int64_t r = lo; r < hi; r += BNB__ATTENTION_BLOCK) {
        int64_t rows = hi - r < BNB__ATTENTION_BLOCK ? hi - r : BNB__ATTENTION_BLOCK, padded = (rows + 7) & ~(int64_t)7;
        for (int64_t j = 0; j < rows; j += mr) {
            g->pack(&lk, r + j, 0, Dp, (uint32_t *)s.k + j * Dp);
            g->micro(1, rows - j, Dp, (const uint32_t *)s.k + j * Dp, (const uint32_t *)s.q, s.s + j * nt);
        }
        for (int64_t i = 0; i < n; i++) {
            float *p = s.p + i * BNB__GEMM_LD, keep = 1;
            for (int64_t j = 0; j < padded; j += 8) _mm256_storeu_ps(p + j, _mm256_loadu_ps(s.s + j / mr * mr * nt + i * mr + j % mr));
            bnb__attention_span(&a, t0 + i, &s0, &s1);
            s0 = s0 > r ? s0 - r : 0, s1 = s1 < r + rows ? s1 - r : rows;
            if (s0 < s1) {
                if (k_scale) bnb__times_scales(p, k_scale + r, s0, s1);
                keep = bnb__online_softmax(p, padded, s0, s1, &s.max[i], &s.sum[i]);
                if (v_scale) bnb__times_scales(p, v_scale + r, s0, s1);
            } else memset(p, 0, (size_t)padded * 4);
            for (int64_t d = 0; d < D; d += mr)
                for (int64_t j = 0; j < mr && r > lo; j += 8) {
                    float *y = s.y + d * nt + i * mr + j;
                    _mm256_storeu_ps(y, _mm256_mul_ps(_mm256_loadu_ps(y), _mm256_set1_ps(keep)));
                }
        }
        for (int64_t d = 0; d < D; d += mr) {
            float *panel = s.v + d * BNB__ATTENTION_BLOCK;
            for (int64_t j = 0; j < rows; j++) g->fill(&lv, r + j, kv + d, mr, (uint32_t *)panel + j * mr);
            g->micro(r == lo, D - d, rows, (const uint32_t *)panel, (const uint32_t *)s.p, s.y + d * nt);
        }
    }
    for (int64_t i = 0; i < n; i++) {
        float *y = a.y + ((t0 + i) * a.n_head + h) * D;
        for (int64_t d = 0; d < D; d++) y[d] = s.sum[i] > 0 || s.sum[i] != s.sum[i] ? s.y[d / mr * mr * nt + i * mr + d % mr] / s.sum[i] : 0.0f;
    }
}

static int64_t bnb__attention_prompt_tiles(const bnb_tensor *y, int32_t phase)
{
    (void)phase;
    return (y->src[0]->shape[0] + 47) / 48 * y->params.attention.n_head;
}

#define BNB__ATTENTION_ROW(name, gemm)                                                                                 \
    static uint64_t name##_local(const bnb_tensor *y)                                                                  \
    {                                                                                                                  \
        return bnb__attention_local_of(&gemm, y->src[0]->shape[1] / y->params.attention.n_head, NULL).bytes;           \
    }                                                                                                                  \
    static void name##_run(const bnb__job *job, int32_t phase, int64_t tile) { (void)phase; bnb__attention_prompt(&gemm, job, tile); }
BNB__ATTENTION_ROW(bnb__attention_f32_512, bnb__gemm_f32_512)
BNB__ATTENTION_ROW(bnb__attention_f16_512, bnb__gemm_f16_512)
static const bnb__gemm bnb__gemm_int8_kv_512 = {32, 48, 1, bnb__pack_f32_512, bnb__fill_int8_kv_512, bnb__micro_f32_512, NULL, NULL, NULL};
BNB__ATTENTION_ROW(bnb__attention_int8_kv_512, bnb__gemm_int8_kv_512)
BNB__ATTENTION_ROW(bnb__attention_256, bnb__gemm_f32_256)

/* ---- row by row: norms, activations, sums. AVX2 is enough: these take a hundredth of the time of the products ---- */

enum { BNB__CHUNK = 4096 }; /* elements of a row in a tile, at most */

static int64_t bnb__map_chunk(const bnb_tensor *y)
{
    int64_t C = y->shape[1], chunks = (C + BNB__CHUNK - 1) / BNB__CHUNK;
    return chunks ? ((C + chunks - 1) / chunks + 7) & ~(int64_t)7 : 8;
}

static int64_t bnb__map_tiles(const bnb_tensor *y, int32_t phase)
{
    int64_t c = bnb__map_chunk(y);
    (void)phase;
    return y->shape[0] * ((y->shape[1] + c - 1) / c);
}

BNB__INLINE BNB__AVX2 __m256 bnb__sigmoid_256(__m256 x) /* 1 / (1 + exp(-x)) */
{
    __m256 one = _mm256_set1_ps(1.0f);
    return _mm256_div_ps(one, _mm256_add_ps(one, bnb__exp_256(_mm256_sub_ps(_mm256_setzero_ps(), x))));
}

/* x/2 erfc(-x / sqrt 2), with erfc(z) = t exp(-z^2 + P(t)), t = 1 / (1 + z / 2): Chebyshev fit, relative error 1.2e-7
 * (Numerical Recipes, erfcc). */
BNB__INLINE BNB__AVX2 __m256 bnb__gelu_256(__m256 x)
{
    static const float c[10] = {0.17087277f, -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                                -0.18628806f, 0.09678418f, 0.37409196f, 1.00002368f, -1.26551223f};
    __m256 sign = _mm256_set1_ps(-0.0f), z = _mm256_mul_ps(_mm256_andnot_ps(sign, x), _mm256_set1_ps(0.707106781f));
    __m256 t = _mm256_div_ps(_mm256_set1_ps(1.0f), _mm256_fmadd_ps(z, _mm256_set1_ps(0.5f), _mm256_set1_ps(1.0f)));
    __m256 p = _mm256_set1_ps(c[0]);
    BNB__UNROLL for (int i = 1; i < 10; i++) p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(c[i]));
    __m256 e = _mm256_mul_ps(t, bnb__exp_256(_mm256_fnmadd_ps(z, z, p))); /* erfc(|x| / sqrt 2) */
    e = _mm256_blendv_ps(_mm256_sub_ps(_mm256_set1_ps(2.0f), e), e, x);
    return _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(0.5f), x), e);
}

BNB__INLINE BNB__AVX2 __m256 bnb__map_256(const int op, __m256 a, __m256 b)
{
    switch (op) {
    case BNB_OP_ADD: return _mm256_add_ps(a, b);
    case BNB_OP_MUL:
    case BNB_OP_SCALE: return _mm256_mul_ps(a, b);
    case BNB_OP_GELU: return bnb__gelu_256(a);
    case BNB_OP_SILU: return _mm256_mul_ps(a, bnb__sigmoid_256(a));
    default: /* gelu_tanh: 0.5 (1 + tanh u) is the sigmoid of 2 u */
        b = _mm256_fmadd_ps(_mm256_mul_ps(a, a), _mm256_set1_ps(0.044715f * 1.595769122f), _mm256_set1_ps(1.595769122f));
        return _mm256_mul_ps(a, bnb__sigmoid_256(_mm256_mul_ps(a, b)));
    }
}

BNB__INLINE BNB__AVX2 void bnb__map_tile(const bnb__job *job, int64_t tile, const int op)
{
    const bnb_tensor *y = job->y, *x = y->src[0], *b = op == BNB_OP_ADD || op == BNB_OP_MUL ? y->src[1] : NULL;
    int64_t C = y->shape[1], chunk = bnb__map_chunk(y), chunks = (C + chunk - 1) / chunk, t = tile / chunks;
    int64_t i = tile % chunks * chunk, end = i + chunk < C ? i + chunk : C;
    const float *xs = (const float *)((const char *)x->plane[0] + t * x->stride[0]), *bs = xs;
    if (b) bs = (const float *)((const char *)b->plane[0] + (b->n_dims == 1 || b->shape[0] == 1 ? 0 : t * b->stride[0]));
    float *ys = (float *)y->plane[0] + t * C;
    __m256 factor = _mm256_set1_ps(op == BNB_OP_SCALE ? y->params.scale.factor : 0.0f);
    for (; i + 8 <= end; i += 8)
        _mm256_storeu_ps(ys + i, bnb__map_256(op, _mm256_loadu_ps(xs + i), b ? _mm256_loadu_ps(bs + i) : factor));
    if (i < end)
        _mm256_maskstore_ps(ys + i, _mm256_castps_si256(bnb__lanes_256(0, end - i)),
                            bnb__map_256(op, bnb__load_f32_256(xs + i, end - i), b ? bnb__load_f32_256(bs + i, end - i) : factor));
}

/* add, mul: a row [C] of f16 or bf16 is left to the reference */
static int32_t bnb__fits_pair(const bnb_tensor *y) { return y->src[1]->type == BNB_F32; }

static BNB__AVX2 void bnb__map_run(const bnb__job *job, int32_t phase, int64_t tile)
{
    (void)phase;
    switch (job->y->op) {
    case BNB_OP_ADD: bnb__map_tile(job, tile, BNB_OP_ADD); break;
    case BNB_OP_MUL: bnb__map_tile(job, tile, BNB_OP_MUL); break;
    case BNB_OP_SCALE: bnb__map_tile(job, tile, BNB_OP_SCALE); break;
    case BNB_OP_GELU: bnb__map_tile(job, tile, BNB_OP_GELU); break;
    case BNB_OP_SILU: bnb__map_tile(job, tile, BNB_OP_SILU); break;
    default: bnb__map_tile(job, tile, BNB_OP_GELU_TANH); break;
    }
}

BNB__INLINE BNB__AVX2 __m256 bnb__load_any_256(const bnb_tensor *t, int64_t i, int64_t n, float missing) /* of a [C] */
{
    if (!t) return _mm256_set1_ps(missing);
    return t->type == BNB_F32   ? bnb__load_256(BNB_F32, t->plane[0], i, n)
           : t->type == BNB_F16 ? bnb__load_256(BNB_F16, t->plane[0], i, n)
                                : bnb__load_256(BNB_BF16, t->plane[0], i, n);
}

/* layer_norm and rms_norm: mean and variance in two passes, as in the formula. */
static BNB__AVX2 void bnb__norm_256(const bnb__job *job, int32_t phase, int64_t t)
{
    const bnb_tensor *y = job->y, *x = y->src[0], *w = y->src[1], *b = y->op == BNB_OP_LAYER_NORM ? y->src[2] : NULL;
    const float *xs = (const float *)((const char *)x->plane[0] + t * x->stride[0]);
    float *ys = (float *)y->plane[0] + t * y->shape[1];
    int64_t C = y->shape[1], i;
    __m256 s[4], mean = _mm256_setzero_ps();
    (void)phase;
    for (int pass = y->op == BNB_OP_LAYER_NORM ? 0 : 1; pass < 2; pass++) {
        BNB__UNROLL for (int j = 0; j < 4; j++) s[j] = _mm256_setzero_ps();
#define BNB__STEP(j, v, mask)                                                                                          \
    do {                                                                                                               \
        __m256 d = _mm256_and_ps(_mm256_sub_ps(v, mean), mask);                                                        \
        s[j] = pass ? _mm256_fmadd_ps(d, d, s[j]) : _mm256_add_ps(s[j], d);                                            \
    } while (0)
        __m256 all = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
        for (i = 0; i + 32 <= C; i += 32) { BNB__UNROLL for (int j = 0; j < 4; j++) BNB__STEP(j, _mm256_loadu_ps(xs + i + 8 * j), all); }
        for (; i < C; i += 8) BNB__STEP(0, bnb__load_f32_256(xs + i, C - i), bnb__lanes_256(0, C - i));
#undef BNB__STEP
        float sum = bnb__sum_of_256(_mm256_add_ps(_mm256_add_ps(s[0], s[1]), _mm256_add_ps(s[2], s[3])));
        if (pass == 0) mean = _mm256_set1_ps(sum / (float)C);
        else s[0] = _mm256_div_ps(_mm256_set1_ps(1.0f), _mm256_sqrt_ps(_mm256_set1_ps(sum / (float)C + y->params.norm.eps)));
    }
    for (i = 0; i < C; i += 8) {
        int64_t left = C - i;
        __m256 v = _mm256_mul_ps(_mm256_sub_ps(bnb__load_f32_256(xs + i, left), mean), s[0]);
        v = _mm256_fmadd_ps(v, bnb__load_any_256(w, i, left, 1.0f), bnb__load_any_256(b, i, left, 0.0f));
        if (left >= 8) _mm256_storeu_ps(ys + i, v);
        else _mm256_maskstore_ps(ys + i, _mm256_castps_si256(bnb__lanes_256(0, left)), v);
    }
}

static BNB__AVX2 void bnb__softmax_256(const bnb__job *job, int32_t phase, int64_t t)
{
    const bnb_tensor *y = job->y, *x = y->src[0];
    const float *xs = (const float *)((const char *)x->plane[0] + t * x->stride[0]);
    float *ys = (float *)y->plane[0] + t * y->shape[1];
    int64_t C = y->shape[1], i;
    __m256 max = _mm256_set1_ps(-__builtin_inff()), sum = _mm256_setzero_ps(), none = max;
    (void)phase;
    for (i = 0; i < C; i += 8) max = _mm256_max_ps(max, _mm256_blendv_ps(none, bnb__load_f32_256(xs + i, C - i), bnb__lanes_256(0, C - i)));
    max = _mm256_set1_ps(bnb__max_of_256(max));
    for (i = 0; i < C; i += 8) {
        __m256 mask = bnb__lanes_256(0, C - i), e = _mm256_and_ps(bnb__exp_256(_mm256_sub_ps(bnb__load_f32_256(xs + i, C - i), max)), mask);
        sum = _mm256_add_ps(sum, e);
        _mm256_maskstore_ps(ys + i, _mm256_castps_si256(mask), e);
    }
    float scale = 1.0f / bnb__sum_of_256(sum);
    for (i = 0; i < C; i++) ys[i] *= scale;
}

static int64_t bnb__row_tiles(const bnb_tensor *y, int32_t phase) { (void)phase; return y->shape[0]; }

/* cache[rows[t]] = x[t]. A tile is some columns (int8_kv: a block) of every row, so that of two equal row ids the later wins. */
static BNB__AVX2 void bnb__set_rows_256(const bnb__job *job, int32_t phase, int64_t tile)
{
    const bnb_tensor *cache = job->y->src[0], *x = job->y->src[1];
    const int32_t *rows = (const int32_t *)job->y->src[2]->plane[0];
    int64_t C = x->shape[1], c0 = tile * 512, c1 = c0 + 512 < C ? c0 + 512 : C;
    (void)phase;
    for (int64_t t = 0; t < x->shape[0]; t++) {
        const float *xs = (const float *)((const char *)x->plane[0] + t * x->stride[0]);
        if (rows[t] < 0 || rows[t] >= cache->shape[0]) continue;
        if (cache->type == BNB_INT8_KV) {
            bnb__put_block(bnb__vec_for(BNB_CPU_FAST | BNB_CPU_AVX2), cache, rows[t], tile, xs);
            continue;
        }
        char *to = (char *)cache->plane[0] + rows[t] * cache->stride[0];
        if (cache->type == BNB_F32) { memcpy(to + c0 * 4, xs + c0, (size_t)(c1 - c0) * 4); continue; }
        for (int64_t i = c0; i < c1; i += 8) {
            __m128i h = _mm256_cvtps_ph(bnb__load_f32_256(xs + i, c1 - i), 0);
            if (c1 - i >= 8) { _mm_storeu_si128((__m128i *)(to + 2 * i), h); continue; }
            memcpy(to + 2 * i, &h, (size_t)(c1 - i) * 2);
        }
    }
}

static int64_t bnb__set_rows_tiles(const bnb_tensor *y, int32_t phase)
{
    int64_t columns = y->type == BNB_INT8_KV ? y->quant.blocksize : 512;
    (void)phase;
    return (y->shape[1] + columns - 1) / columns;
}

#define BNB__ROW_DOT4(name, type, compute, cpu, run) {name, BNB_OP_LINEAR, type, compute, 1, 8, cpu, bnb__fits4, 2, bnb__dot4_tiles_512, bnb__dot4_work_512, bnb__dot4_local, run}
#define BNB__ROW_DOT(name, type, run) {name, BNB_OP_LINEAR, type, -1, 1, 8, BNB_CPU_AVX512, NULL, 1, bnb__dot_plain_tiles, NULL, NULL, run}
#define BNB__ROW_GEMM_FROM(m0, name, type, compute, cpu, fits, g) {name, BNB_OP_LINEAR, type, compute, m0, INT64_MAX, cpu, fits, 2, g##_tiles, g##_work, g##_local, g##_run}
#define BNB__ROW_GEMM(...) BNB__ROW_GEMM_FROM(9, __VA_ARGS__)
static const bnb__kernel bnb__fast_kernels[] = {
    /* a tile of 16 rows takes what 7 rows take one after the other */
#define BNB__CPU_AMX_ALL (BNB_CPU_AMX | BNB_CPU_AVX512 | BNB_CPU_AVX512_BF16)
    BNB__ROW_GEMM_FROM(7, "linear_nf4_gemm_amx", BNB_NF4, BNB_BF16, BNB__CPU_AMX_ALL, bnb__fits4, bnb__gemm_4bit_amx),
    BNB__ROW_GEMM_FROM(7, "linear_fp4_gemm_amx", BNB_FP4, BNB_BF16, BNB__CPU_AMX_ALL, bnb__fits4, bnb__gemm_4bit_amx),
    BNB__ROW_GEMM_FROM(7, "linear_f16_gemm_amx", BNB_F16, BNB_BF16, BNB__CPU_AMX_ALL, NULL, bnb__gemm_f16_amx),
    BNB__ROW_GEMM_FROM(7, "linear_bf16_gemm_amx", BNB_BF16, BNB_BF16, BNB__CPU_AMX_ALL, NULL, bnb__gemm_bf16_amx),
    /* where bf16 is multiplied by AMX, vdpbf16ps is slow (2.2 cycles; 0.5 an fma): f32 takes no longer, and is exact */
    BNB__ROW_DOT4("linear_nf4_dot_avx512", BNB_NF4, -1, BNB_CPU_AVX512 | BNB_CPU_AMX, bnb__dot4_512),
    BNB__ROW_DOT4("linear_fp4_dot_avx512", BNB_FP4, -1, BNB_CPU_AVX512 | BNB_CPU_AMX, bnb__dot4_512),
    BNB__ROW_DOT4("linear_nf4_dot_bf16_avx512", BNB_NF4, BNB_BF16, BNB_CPU_AVX512 | BNB_CPU_AVX512_BF16, bnb__dot4_bf16),
    BNB__ROW_DOT4("linear_fp4_dot_bf16_avx512", BNB_FP4, BNB_BF16, BNB_CPU_AVX512 | BNB_CPU_AVX512_BF16, bnb__dot4_bf16),
    BNB__ROW_DOT4("linear_nf4_dot_avx512", BNB_NF4, -1, BNB_CPU_AVX512, bnb__dot4_512),
    BNB__ROW_DOT4("linear_fp4_dot_avx512", BNB_FP4, -1, BNB_CPU_AVX512, bnb__dot4_512),
    BNB__ROW_DOT("linear_f16_dot_avx512", BNB_F16, bnb__dot_f16_512),
    BNB__ROW_DOT("linear_bf16_dot_avx512", BNB_BF16, bnb__dot_bf16_512),
    BNB__ROW_DOT("linear_f32_dot_avx512", BNB_F32, bnb__dot_f32_512),
    {"linear_int8_dot_vnni", BNB_OP_LINEAR, BNB_INT8, -1, 1, 8, BNB_CPU_AVX512 | BNB_CPU_AVX512_VNNI, NULL, 2, bnb__dot_int8_tiles, bnb__dot_int8_work, NULL, bnb__dot_int8_vnni},
    {"linear_int8_gemm_amx", BNB_OP_LINEAR, BNB_INT8, -1, 9, INT64_MAX, BNB_CPU_AMX | BNB_CPU_AVX512 | BNB_CPU_AVX512_VNNI, NULL, 4, bnb__gemm_i8_amx_tiles, bnb__gemm_i8_amx_work, bnb__gemm_i8_amx_local, bnb__gemm_i8_amx_run},
    {"linear_int8_gemm_vnni", BNB_OP_LINEAR, BNB_INT8, -1, 9, INT64_MAX, BNB_CPU_AVX512 | BNB_CPU_AVX512_VNNI, NULL, 4, bnb__gemm_i8_vnni_tiles, bnb__gemm_i8_vnni_work, bnb__gemm_i8_vnni_local, bnb__gemm_i8_vnni_run},
    BNB__ROW_GEMM("linear_nf4_gemm_bf16_avx512", BNB_NF4, BNB_BF16, BNB_CPU_AVX512 | BNB_CPU_AVX512_BF16, bnb__fits4, bnb__gemm_4bit_bf16),
    BNB__ROW_GEMM("linear_fp4_gemm_bf16_avx512", BNB_FP4, BNB_BF16, BNB_CPU_AVX512 | BNB_CPU_AVX512_BF16, bnb__fits4, bnb__gemm_4bit_bf16),
    BNB__ROW_GEMM("linear_f16_gemm_bf16_avx512", BNB_F16, BNB_BF16, BNB_CPU_AVX512 | BNB_CPU_AVX512_BF16, NULL, bnb__gemm_f16_bf16),
    BNB__ROW_GEMM("linear_bf16_gemm_bf16_avx512", BNB_BF16, BNB_BF16, BNB_CPU_AVX512 | BNB_CPU_AVX512_BF16, NULL, bnb__gemm_bf16_bf16),
    BNB__ROW_GEMM("linear_nf4_gemm_avx512", BNB_NF4, -1, BNB_CPU_AVX512, bnb__fits4, bnb__gemm_4bit_512),
    BNB__ROW_GEMM("linear_fp4_gemm_avx512", BNB_FP4, -1, BNB_CPU_AVX512, bnb__fits4, bnb__gemm_4bit_512),
    BNB__ROW_GEMM("linear_f16_gemm_avx512", BNB_F16, -1, BNB_CPU_AVX512, NULL, bnb__gemm_f16_512),
    BNB__ROW_GEMM("linear_bf16_gemm_avx512", BNB_BF16, -1, BNB_CPU_AVX512, NULL, bnb__gemm_bf16_512),
    BNB__ROW_GEMM("linear_f32_gemm_avx512", BNB_F32, -1, BNB_CPU_AVX512, NULL, bnb__gemm_f32_512),
    {"linear_int8_dot_avx2", BNB_OP_LINEAR, BNB_INT8, -1, 1, 8, BNB_CPU_AVX2, NULL, 2, bnb__dot_int8_tiles, bnb__dot_int8_work, NULL, bnb__dot_int8_256},
    {"linear_int8_gemm_avx2", BNB_OP_LINEAR, BNB_INT8, -1, 9, INT64_MAX, BNB_CPU_AVX2, NULL, 4, bnb__gemm_i8_256_tiles, bnb__gemm_i8_256_work, bnb__gemm_i8_256_local, bnb__gemm_i8_256_run},
#define BNB__ROW_DOT2(name, type, fits) {name, BNB_OP_LINEAR, type, -1, 1, 8, BNB_CPU_AVX2, fits, 1, bnb__dot_plain_tiles, NULL, NULL, bnb__dot_256}
    BNB__ROW_DOT2("linear_nf4_dot_avx2", BNB_NF4, bnb__fits4),
    BNB__ROW_DOT2("linear_fp4_dot_avx2", BNB_FP4, bnb__fits4),
    BNB__ROW_DOT2("linear_f16_dot_avx2", BNB_F16, NULL),
    BNB__ROW_DOT2("linear_bf16_dot_avx2", BNB_BF16, NULL),
    BNB__ROW_DOT2("linear_f32_dot_avx2", BNB_F32, NULL),
    BNB__ROW_GEMM("linear_nf4_gemm_avx2", BNB_NF4, -1, BNB_CPU_AVX2, bnb__fits4, bnb__gemm_4bit_256),
    BNB__ROW_GEMM("linear_fp4_gemm_avx2", BNB_FP4, -1, BNB_CPU_AVX2, bnb__fits4, bnb__gemm_4bit_256),
    BNB__ROW_GEMM("linear_f16_gemm_avx2", BNB_F16, -1, BNB_CPU_AVX2, NULL, bnb__gemm_f32_256),
    BNB__ROW_GEMM("linear_bf16_gemm_avx2", BNB_BF16, -1, BNB_CPU_AVX2, NULL, bnb__gemm_f32_256),
    BNB__ROW_GEMM("linear_f32_gemm_avx2", BNB_F32, -1, BNB_CPU_AVX2, NULL, bnb__gemm_f32_256),
    /* AVX2 serves these ops on every machine: they do not bound anything */
#define BNB__ROW_OP(name, op, type, m0, m1, cpu, fits, tiles, local, run) {name, op, type, -1, m0, m1, cpu, fits, 1, tiles, NULL, local, run}
    BNB__ROW_OP("attention_f16_decode_avx2", BNB_OP_ATTENTION, BNB_F16, 0, 11, BNB_CPU_AVX2, bnb__attention_fits, bnb__attention_decode_tiles, NULL, bnb__attention_decode),
    BNB__ROW_OP("attention_f32_decode_avx2", BNB_OP_ATTENTION, BNB_F32, 0, 11, BNB_CPU_AVX2, bnb__attention_fits, bnb__attention_decode_tiles, NULL, bnb__attention_decode),
    BNB__ROW_OP("attention_int8_kv_decode_avx2", BNB_OP_ATTENTION, BNB_INT8_KV, 0, 11, BNB_CPU_AVX2, bnb__attention_fits, bnb__attention_decode_tiles, NULL, bnb__attention_decode),
    BNB__ROW_OP("attention_f16_avx512", BNB_OP_ATTENTION, BNB_F16, 12, INT64_MAX, BNB_CPU_AVX512, bnb__attention_fits, bnb__attention_prompt_tiles, bnb__attention_f16_512_local, bnb__attention_f16_512_run),
    BNB__ROW_OP("attention_f32_avx512", BNB_OP_ATTENTION, BNB_F32, 12, INT64_MAX, BNB_CPU_AVX512, bnb__attention_fits, bnb__attention_prompt_tiles, bnb__attention_f32_512_local, bnb__attention_f32_512_run),
    BNB__ROW_OP("attention_int8_kv_avx512", BNB_OP_ATTENTION, BNB_INT8_KV, 12, INT64_MAX, BNB_CPU_AVX512, bnb__attention_fits, bnb__attention_prompt_tiles, bnb__attention_int8_kv_512_local, bnb__attention_int8_kv_512_run),
    BNB__ROW_OP("attention_f16_avx2", BNB_OP_ATTENTION, BNB_F16, 12, INT64_MAX, BNB_CPU_AVX2, bnb__attention_fits, bnb__attention_prompt_tiles, bnb__attention_256_local, bnb__attention_256_run),
    BNB__ROW_OP("attention_f32_avx2", BNB_OP_ATTENTION, BNB_F32, 12, INT64_MAX, BNB_CPU_AVX2, bnb__attention_fits, bnb__attention_prompt_tiles, bnb__attention_256_local, bnb__attention_256_run),
    BNB__ROW_OP("attention_int8_kv_avx2", BNB_OP_ATTENTION, BNB_INT8_KV, 12, INT64_MAX, BNB_CPU_AVX2, bnb__attention_fits, bnb__attention_prompt_tiles, bnb__attention_256_local, bnb__attention_256_run),
    BNB__ROW_OP("layer_norm_avx2", BNB_OP_LAYER_NORM, -1, 0, INT64_MAX, BNB_CPU_AVX2, NULL, bnb__row_tiles, NULL, bnb__norm_256),
    BNB__ROW_OP("rms_norm_avx2", BNB_OP_RMS_NORM, -1, 0, INT64_MAX, BNB_CPU_AVX2, NULL, bnb__row_tiles, NULL, bnb__norm_256),
    BNB__ROW_OP("softmax_avx2", BNB_OP_SOFTMAX, -1, 0, INT64_MAX, BNB_CPU_AVX2, NULL, bnb__row_tiles, NULL, bnb__softmax_256),
    BNB__ROW_OP("add_avx2", BNB_OP_ADD, -1, 0, INT64_MAX, BNB_CPU_AVX2, bnb__fits_pair, bnb__map_tiles, NULL, bnb__map_run),
    BNB__ROW_OP("mul_avx2", BNB_OP_MUL, -1, 0, INT64_MAX, BNB_CPU_AVX2, bnb__fits_pair, bnb__map_tiles, NULL, bnb__map_run),
    BNB__ROW_OP("scale_avx2", BNB_OP_SCALE, -1, 0, INT64_MAX, BNB_CPU_AVX2, NULL, bnb__map_tiles, NULL, bnb__map_run),
    BNB__ROW_OP("gelu_avx2", BNB_OP_GELU, -1, 0, INT64_MAX, BNB_CPU_AVX2, NULL, bnb__map_tiles, NULL, bnb__map_run),
    BNB__ROW_OP("gelu_tanh_avx2", BNB_OP_GELU_TANH, -1, 0, INT64_MAX, BNB_CPU_AVX2, NULL, bnb__map_tiles, NULL, bnb__map_run),
    BNB__ROW_OP("silu_avx2", BNB_OP_SILU, -1, 0, INT64_MAX, BNB_CPU_AVX2, NULL, bnb__map_tiles, NULL, bnb__map_run),
    BNB__ROW_OP("set_rows_avx2", BNB_OP_SET_ROWS, -1, 0, INT64_MAX, BNB_CPU_AVX2, NULL, bnb__set_rows_tiles, NULL, bnb__set_rows_256),
};
#else /* a row that no node matches: other processors have the reference kernels */
static const bnb__kernel bnb__fast_kernels[] = {{"none", BNB_OP_NONE, -1, -1, 0, 0, 0, NULL, 0, NULL, NULL, NULL, NULL}};
#endif

/* ---- reference kernels: plain C, in the order of the ops. A tile is a row unless the kernel says otherwise. ---- */

static int64_t bnb__tiles_rows(const bnb_tensor *y, int32_t phase) { (void)phase; return y->shape[0]; }
static int64_t bnb__tiles_columns(const bnb_tensor *y, int32_t phase) { (void)phase; return y->shape[1]; }

static void bnb__embed_ref(const bnb__job *j, int32_t phase, int64_t t) {
    const bnb_tensor *table = j->y->src[0];
    int64_t id = ((const int32_t *)j->y->src[1]->plane[0])[t]; /* in range: bnb__check_indices */
    (void)phase;
    bnb__load_f32(table->type, (const char *)table->plane[0] + id * table->stride[0], 0, table->shape[1], bnb__row_out(j->y, t));
}

/* y[:, n] for one n: the weight's row is restored to f32 once [K], sums are in double. */
static uint64_t bnb__linear_ref_local(const bnb_tensor *y) { return (uint64_t)y->src[0]->shape[1] * sizeof(float); }

static void bnb__linear_ref(const bnb__job *j, int32_t phase, int64_t n) {
    const bnb_tensor *y = j->y, *x = y->src[0], *w = y->src[1], *bias = y->src[2];
    int64_t M = y->shape[0], K = x->shape[1];
    float *row = j->local, b = 0;
    (void)phase;
    if (bnb_type_is_quantized(w->type)) bnb__dequant_row(w, n * K, K, row);
    else bnb__load_f32(w->type, (const char *)w->plane[0] + n * w->stride[0], 0, K, row);
    if (bias) bnb__load_f32(bias->type, bias->plane[0], n, 1, &b);
    for (int64_t m = 0; m < M; m++) {
        const float *a = bnb__row(x, m);
        double sum = b;
        for (int64_t k = 0; k < K; k++) sum += (double)a[k] * row[k];
        bnb__row_out(y, m)[n] = (float)sum;
    }
}

/* LLM.int8(). The result of the int8 product stays f32, as in bitsandbytes on a CPU with f32 activations; its CUDA kernels
 * round it to f16 here, which overflows above 65504. 6.200012e-05 is 1/127^2. Phase 0, tile m: quantize row m of x. Phase 1, one tile: columns that
 * hold an outlier. Phase 2, tile n: y[:, n]. work: codes i8 [M, K] | row scales f32 [M] | outlier columns u8 [K] */
static uint64_t bnb__int8_ref_work(const bnb_tensor *y) {
    uint64_t M = (uint64_t)y->shape[0], K = (uint64_t)y->src[0]->shape[1];
    return M * 4 + M * K + K;
}
static int64_t bnb__int8_ref_tiles(const bnb_tensor *y, int32_t phase) {
    return phase == 0 ? y->shape[0] : phase == 1 ? 1 : y->shape[1];
}

static float bnb__round_f16(float v) { return bnb__f16_to_f32(bnb__f32_to_f16(v)); }

static int bnb__is_outlier(const bnb_quant *q, float x) { return q->threshold > 0 && fabsf(bnb__round_f16(x)) >= q->threshold; }

static void bnb__int8_ref(const bnb__job *j, int32_t phase, int64_t tile) {
    const bnb_tensor *y = j->y, *x = y->src[0], *w = y->src[1], *bias = y->src[2];
    const bnb_quant *q = &w->quant;
    int64_t M = y->shape[0], K = x->shape[1];
    float *scales = j->work;
    int8_t *codes = (int8_t *)(scales + M);
    uint8_t *outlier = (uint8_t *)codes + M * K;
    int by_column = M > 1 && q->outlier_rule == BNB_OUTLIER_COLUMN;
    if (phase == 0) {
        const float *a = bnb__row(x, tile);
        float top = 0;
        for (int64_t k = 0; k < K; k++)
            if (!bnb__is_outlier(q, a[k])) top = fmaxf(top, fabsf(bnb__round_f16(a[k])));
        float s = 127.0f * bnb__rcp_cuda(top);
        for (int64_t k = 0; k < K; k++) {
            float v = rintf(bnb__round_f16(a[k]) * s);
            codes[tile * K + k] = top == 0 || bnb__is_outlier(q, a[k]) || !(fabsf(v) <= 127) ? 0 : (int8_t)v;
        }
        scales[tile] = top;
    } else if (phase == 1) {
        for (int64_t k = 0; k < K; k++) {
            outlier[k] = 0;
            for (int64_t m = 0; m < M && !outlier[k]; m++) outlier[k] = (uint8_t)bnb__is_outlier(q, bnb__row(x, m)[k]);
            for (int64_t m = 0; m < M && outlier[k] && by_column; m++) codes[m * K + k] = 0;
        }
    } else {
        const int8_t *c = (const int8_t *)w->plane[0] + tile * K;
        float scb = ((const float *)w->plane[1])[tile], b = 0;
        if (bias) bnb__load_f32(bias->type, bias->plane[0], tile, 1, &b);
        for (int64_t m = 0; m < M; m++) {
            int32_t sum = 0;
            for (int64_t k = 0; k < K; k++) sum += (int32_t)codes[m * K + k] * c[k];
            float out = fmaf((float)sum * scales[m] * scb, 6.200012e-05f, b);
            double extra = 0;
            for (int64_t k = 0; k < K; k++)
                if (outlier[k] && (by_column || bnb__is_outlier(q, bnb__row(x, m)[k])))
                    extra += (double)bnb__row(x, m)[k] * ((float)c[k] * scb * 7.874015718698502e-3f);
            bnb__row_out(y, m)[tile] = out + (float)extra;
        }
    }
}

static void bnb__norm_ref(const bnb__job *j, int32_t phase, int64_t t) {
    const bnb_tensor *y = j->y, *w = y->src[1], *b = y->src[2];
    int64_t C = y->shape[1];
    const float *x = bnb__row(y->src[0], t);
    float *out = bnb__row_out(y, t);
    double mean = 0, var = 0;
    (void)phase;
    if (y->op == BNB_OP_LAYER_NORM) {
        for (int64_t i = 0; i < C; i++) mean += x[i];
        mean /= (double)C;
    }
    for (int64_t i = 0; i < C; i++) var += (x[i] - mean) * (x[i] - mean);
    double scale = 1 / sqrt(var / (double)C + y->params.norm.eps);
    for (int64_t i = 0; i < C; i++) {
        float wi = 1, bi = 0;
        if (w) bnb__load_f32(w->type, w->plane[0], i, 1, &wi);
        if (b) bnb__load_f32(b->type, b->plane[0], i, 1, &bi);
        out[i] = (float)((x[i] - mean) * scale) * wi + bi;
    }
}

/* add, mul: b is a row of its own for each row of a, or one row for all */
static void bnb__pair_ref(const bnb__job *j, int32_t phase, int64_t t) {
    const bnb_tensor *y = j->y, *b = y->src[1];
    const float *a = bnb__row(y->src[0], t);
    float *out = bnb__row_out(y, t);
    (void)phase;
    for (int64_t i = 0; i < y->shape[1]; i++) {
        float v;
        if (b->n_dims == 2) v = bnb__row(b, t)[i];
        else bnb__load_f32(b->type, b->plane[0], i, 1, &v);
        out[i] = y->op == BNB_OP_ADD ? a[i] + v : a[i] * v;
    }
}

static float bnb__unary(const bnb_tensor *y, float x) {
    switch (y->op) {
    case BNB_OP_SCALE: return x * y->params.scale.factor;
    case BNB_OP_GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case BNB_OP_GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case BNB_OP_SILU: return x / (1.0f + expf(-x));
    default: return x > 0 ? x : x != x ? x : 0; /* relu keeps NaN */
    }
}

static void bnb__unary_ref(const bnb__job *j, int32_t phase, int64_t t) {
    const float *x = bnb__row(j->y->src[0], t);
    float *out = bnb__row_out(j->y, t);
    (void)phase;
    for (int64_t i = 0; i < j->y->shape[1]; i++) out[i] = bnb__unary(j->y, x[i]);
}

/* x [n] -> exp(x - max), returns the sum; in place is fine */
static double bnb__exp_row(const float *x, float *out, int64_t n) {
    float top = -INFINITY;
    double sum = 0;
    for (int64_t i = 0; i < n; i++) top = x[i] > top || x[i] != x[i] ? x[i] : top;
    for (int64_t i = 0; i < n; i++) sum += out[i] = expf(x[i] - top);
    return sum;
}

static void bnb__softmax_ref(const bnb__job *j, int32_t phase, int64_t t) {
    float *out = bnb__row_out(j->y, t);
    int64_t n = j->y->shape[1];
    (void)phase;
    double sum = bnb__exp_row(bnb__row(j->y->src[0], t), out, n);
    for (int64_t i = 0; i < n; i++) out[i] = (float)(out[i] / sum);
}

static void bnb__argmax_ref(const bnb__job *j, int32_t phase, int64_t t) {
    const float *x = bnb__row(j->y->src[0], t);
    int32_t at = 0;
    (void)phase;
    for (int64_t i = 0; i < j->y->src[0]->shape[1] && at >= 0; i++) at = x[i] != x[i] ? -1 : x[i] > x[at] ? (int32_t)i : at;
    ((int32_t *)j->y->plane[0])[t] = at;
}

/* ---- draw ---- */

typedef struct bnb__candidate {
    float x;
    int32_t at;
} bnb__candidate;

static int bnb__better(bnb__candidate a, bnb__candidate b) { return a.x != b.x ? a.x > b.x : a.at < b.at; }

/* c [n]: a heap with the worst on top, but for c[i], which sinks to its place. */
static void bnb__sink(bnb__candidate *c, int64_t n, int64_t i) {
    for (int64_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && bnb__better(c[child], c[child + 1])) child++;
        if (!bnb__better(c[i], c[child])) return;
        bnb__candidate t = c[i];
        c[i] = c[child];
        c[child] = t;
    }
}

/* A counter-based generator (splitmix64's finalizer, twice): 53 bits in [0, 1). */
static double bnb__uniform(uint64_t seed, uint64_t step) {
    uint64_t z = seed + 0x9E3779B97F4A7C15u * (step + 1);
    for (int round = 0; round < 2; round++) {
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        z ^= z >> 31;
    }
    return (double)(z >> 11) * 0x1p-53;
}

int32_t bnb_draw_row(const float *x, int64_t n, const bnb_draw_rule *rule, int32_t step, void *scratch) {
    bnb__candidate *c = scratch;
    int64_t k = rule->temp <= 0 ? 1 : rule->top_k > 0 ? BNB__MIN(rule->top_k, n) : n, kept = 0;
    for (int64_t i = 0; i < n; i++) { /* the k best */
        bnb__candidate new = {x[i], (int32_t)i};
        if (x[i] != x[i]) return -1;
        if (kept < k) {
            c[kept++] = new;
            for (int64_t parent = kept / 2; kept == k && parent-- > 0;) bnb__sink(c, k, parent);
        } else if (bnb__better(new, c[0])) {
            c[0] = new;
            bnb__sink(c, k, 0);
        }
    }
    for (int64_t m = k - 1; m > 0; m--) { /* the worst goes to the end: best first */
        bnb__candidate t = c[0];
        c[0] = c[m];
        c[m] = t;
        bnb__sink(c, m, 0);
    }
    if (k == 0 || !(fabsf(c[0].x) < INFINITY)) return -1;
    if (rule->temp <= 0) return c[0].at;
    double total = 0, sum = 0, best = c[0].x;
    if (rule->top_p < 1) {
        for (int64_t i = 0; i < k; i++) total += exp(c[i].x - best);
        int64_t m = 0;
        while (m < k && (m == 0 || sum < rule->top_p * total)) sum += exp(c[m++].x - best);
        k = m;
    }
    if (rule->min_p > 0) {
        double least = best + log(rule->min_p);
        int64_t m = 1;
        while (m < k && c[m].x >= least) m++;
        k = m;
    }
    total = 0;
    for (int64_t i = 0; i < k; i++) total += exp((c[i].x - best) / rule->temp);
    double at = bnb__uniform(rule->seed, (uint64_t)step) * total;
    for (int64_t i = 0; i < k; i++)
        if ((at -= exp((c[i].x - best) / rule->temp)) < 0) return c[i].at;
    return c[k - 1].at;
}

static uint64_t bnb__draw_ref_local(const bnb_tensor *y) {
    int64_t n = y->src[0]->shape[1], k = y->params.draw.top_k;
    return (uint64_t)(k > 0 ? BNB__MIN(k, n) : n) * sizeof(bnb__candidate);
}

static void bnb__draw_ref(const bnb__job *j, int32_t phase, int64_t t) {
    const bnb_tensor *y = j->y;
    int32_t step = ((const int32_t *)y->src[1]->plane[0])[t];
    (void)phase;
    ((int32_t *)y->plane[0])[t] = bnb_draw_row(bnb__row(y->src[0], t), y->src[0]->shape[1], &y->params.draw, step, j->local);
}

static int64_t bnb__set_rows_ref_tiles(const bnb_tensor *y, int32_t phase) { (void)phase; return y->src[1]->shape[0]; }

static void bnb__set_rows_ref(const bnb__job *j, int32_t phase, int64_t t) {
    const bnb_tensor *cache = j->y->src[0], *x = j->y->src[1];
    int64_t row = ((const int32_t *)j->y->src[2]->plane[0])[t]; /* in range: bnb__check_indices */
    (void)phase;
    if (cache->type != BNB_INT8_KV)
        bnb_convert(BNB_F32, bnb__row(x, t), cache->type, (char *)cache->plane[0] + row * cache->stride[0], x->shape[1], NULL);
    else
        for (int64_t b = 0; b < x->shape[1] / cache->quant.blocksize; b++)
            bnb__put_block(bnb__vec_for(0), cache, row, b, bnb__row(x, t));
}

/* Tile: one head of one row. local: scores f32 [R] | one key or value f32 [D] */
static int64_t bnb__attention_ref_tiles(const bnb_tensor *y, int32_t phase) {
    (void)phase;
    return y->shape[0] * y->params.attention.n_head;
}
static uint64_t bnb__attention_ref_local(const bnb_tensor *y) {
    return (uint64_t)(y->src[1]->shape[0] + y->shape[1] / y->params.attention.n_head) * sizeof(float);
}

/* Key or value of one head in row r: dst [D] */
static void bnb__load_head(const bnb_tensor *cache, int64_t r, int64_t head, int64_t D, float *dst) {
    const char *row = (const char *)cache->plane[0] + r * cache->stride[0];
    if (cache->type != BNB_INT8_KV) bnb__load_f32(cache->type, row, head * D, D, dst);
    else bnb__value8_plain((const int8_t *)row + head * D, D, ((const float *)cache->plane[1])[head * cache->shape[0] + r], dst);
}

static void bnb__attention_ref(const bnb__job *j, int32_t phase, int64_t tile) {
    const bnb_tensor *y = j->y, *k = y->src[1], *v = y->src[2];
    int64_t heads = y->params.attention.n_head, D = y->shape[1] / heads, t = tile / heads, h = tile % heads;
    int64_t kv = h / (heads / y->params.attention.n_head_kv);
    const int32_t *span = (const int32_t *)y->src[3]->plane[0] + 2 * t; /* in range: bnb__check_indices */
    const float *q = bnb__row(y->src[0], t) + h * D;
    float *out = bnb__row_out(y, t) + h * D, *scores = j->local, *row = scores + k->shape[0];
    int64_t n = span[1] - span[0];
    (void)phase;
    for (int64_t r = 0; r < n; r++) {
        bnb__load_head(k, span[0] + r, kv, D, row);
        double dot = 0;
        for (int64_t d = 0; d < D; d++) dot += (double)q[d] * row[d];
        scores[r] = (float)dot * y->params.attention.scale;
    }
    double sum = bnb__exp_row(scores, scores, n);
    for (int64_t d = 0; d < D; d++) out[d] = 0;
    for (int64_t r = 0; r < n; r++) {
        bnb__load_head(v, span[0] + r, kv, D, row);
        float p = (float)(scores[r] / sum);
        for (int64_t d = 0; d < D; d++) out[d] += p * row[d];
    }
}

#define BNB__ANY_M 0, INT64_MAX
static const bnb__kernel bnb__reference_kernels[] = {
    {"embed_ref", BNB_OP_EMBED, -1, -1, BNB__ANY_M, 0, NULL, 1, bnb__tiles_rows, NULL, NULL, bnb__embed_ref},
    {"linear_int8_ref", BNB_OP_LINEAR, BNB_INT8, -1, BNB__ANY_M, 0, NULL, 3, bnb__int8_ref_tiles, bnb__int8_ref_work, NULL, bnb__int8_ref},
    {"linear_ref", BNB_OP_LINEAR, -1, BNB_F32, BNB__ANY_M, 0, NULL, 1, bnb__tiles_columns, NULL, bnb__linear_ref_local, bnb__linear_ref},
    {"layer_norm_ref", BNB_OP_LAYER_NORM, -1, -1, BNB__ANY_M, 0, NULL, 1, bnb__tiles_rows, NULL, NULL, bnb__norm_ref},
    {"rms_norm_ref", BNB_OP_RMS_NORM, -1, -1, BNB__ANY_M, 0, NULL, 1, bnb__tiles_rows, NULL, NULL, bnb__norm_ref},
    {"add_ref", BNB_OP_ADD, -1, -1, BNB__ANY_M, 0, NULL, 1, bnb__tiles_rows, NULL, NULL, bnb__pair_ref},
    {"mul_ref", BNB_OP_MUL, -1, -1, BNB__ANY_M, 0, NULL, 1, bnb__tiles_rows, NULL, NULL, bnb__pair_ref},
    {"scale_ref", BNB_OP_SCALE, -1, -1, BNB__ANY_M, 0, NULL, 1, bnb__tiles_rows, NULL, NULL, bnb__unary_ref},
    {"gelu_ref", BNB_OP_GELU, -1, -1, BNB__ANY_M, 0, NULL, 1, bnb__tiles_rows, NULL, NULL, bnb__unary_ref},
    {"gelu_tanh_ref", BNB_OP_GELU_TANH, -1, -1, BNB__ANY_M, 0, NULL, 1, bnb__tiles_rows, NULL, NULL, bnb__unary_ref},
    {"relu_ref", BNB_OP_RELU, -1, -1, BNB__ANY_M, 0, NULL, 1, bnb__tiles_rows, NULL, NULL, bnb__unary_ref},
    {"silu_ref", BNB_OP_SILU, -1, -1, BNB__ANY_M, 0, NULL, 1, bnb__tiles_rows, NULL, NULL, bnb__unary_ref},
    {"softmax_ref", BNB_OP_SOFTMAX, -1, -1, BNB__ANY_M, 0, NULL, 1, bnb__tiles_rows, NULL, NULL, bnb__softmax_ref},
    {"argmax_ref", BNB_OP_ARGMAX, -1, -1, BNB__ANY_M, 0, NULL, 1, bnb__tiles_rows, NULL, NULL, bnb__argmax_ref},
    {"draw_ref", BNB_OP_DRAW, -1, -1, BNB__ANY_M, 0, NULL, 1, bnb__tiles_rows, NULL, bnb__draw_ref_local, bnb__draw_ref},
    {"set_rows_ref", BNB_OP_SET_ROWS, -1, -1, BNB__ANY_M, 0, NULL, 1, bnb__set_rows_ref_tiles, NULL, NULL, bnb__set_rows_ref},
    {"attention_ref", BNB_OP_ATTENTION, -1, -1, BNB__ANY_M, 0, NULL, 1, bnb__attention_ref_tiles, NULL, bnb__attention_ref_local, bnb__attention_ref},
};

static int bnb__kernel_fits(const bnb__kernel *k, const bnb_tensor *y, uint32_t cpu, int32_t compute) {
    if (k->op != y->op || (k->cpu & ~cpu) || (k->cpu && !(cpu & BNB_CPU_FAST))) return 0;
    int32_t type = y->op == BNB_OP_LINEAR || y->op == BNB_OP_ATTENTION ? y->src[1]->type : -1;
    if (k->type != -1 && k->type != type) return 0;
    if (k->cpu && y->op == BNB_OP_LINEAR && y->src[1]->view) return 0; /* fast kernels read a weight's planes, not some columns */
    if (y->shape[0] < k->m_min || y->shape[0] > k->m_max) return 0;
    /* f32 weights are computed in f32 unless bf16 was asked for; f32 serves where there is no bf16 kernel */
    if (k->compute == BNB_BF16 && (compute == BNB_F32 || (compute == BNB_COMPUTE_AUTO && type == BNB_F32))) return 0;
    return !k->fits || k->fits(y);
}

static const bnb__kernel *bnb__kernel_find(const bnb_tensor *y, uint32_t cpu, int32_t compute) {
    for (int32_t i = 0; i < BNB__COUNT(bnb__fast_kernels); i++)
        if (bnb__kernel_fits(&bnb__fast_kernels[i], y, cpu, compute)) return &bnb__fast_kernels[i];
    for (int32_t i = 0; i < BNB__COUNT(bnb__reference_kernels); i++)
        if (bnb__kernel_fits(&bnb__reference_kernels[i], y, cpu, compute)) return &bnb__reference_kernels[i];
    return NULL;
}

/* ---- running ---- */

typedef struct bnb__step { /* one phase of one node */
    const bnb__kernel *kernel;
    const bnb_tensor *y;
    int32_t node, phase;
    int64_t tiles;
} bnb__step;

typedef struct bnb__cpu_plan {
    bnb_env *env;
    const bnb_graph *graph;
    const bnb_plan_params *params;
    const bnb__kernel **kernels; /* [n_nodes]; NULL for views */
    bnb__step *steps;            /* [n_steps] */
    _Atomic int64_t *next;       /* [n_threads, n_steps]: the next tile of a thread's stretch; threads share no line */
    int32_t n_steps;
    uint64_t bytes;              /* of this allocation */
    uint64_t work, local;        /* scratch: shared, and for each thread */
    char *scratch;               /* of the present run */
    double *times;               /* [n_nodes] or NULL */
} bnb__cpu_plan;

static void *bnb__cpu_compile(void *dev, const bnb_graph *g, const bnb_plan_params *params, bnb_node_plan *nodes,
                              uint64_t *scratch, bnb_error *err) {
    enum { MAX_PHASES = 4 };
    (void)nodes; /* nothing is fused */
    if (params->compute_dtype == BNB_F16) {
        bnb_fail(err, BNB_E_TYPE, "the compute dtype must be f32 or bf16 on cpu");
        return NULL;
    }
    bnb_env *env = dev;
    uint64_t n = (uint64_t)g->n_nodes;
    uint64_t bytes = sizeof(bnb__cpu_plan) + n * sizeof(bnb__kernel *) + n * MAX_PHASES * (sizeof(bnb__step) + (uint64_t)env->pool.n * sizeof(int64_t));
    bnb__cpu_plan *p = bnb_alloc(env, bytes, err);
    if (!p) return NULL;
    p->env = env;
    p->graph = g;
    p->params = params;
    p->bytes = bytes;
    p->steps = (bnb__step *)(p + 1);
    p->next = (_Atomic int64_t *)(p->steps + n * MAX_PHASES);
    p->kernels = (const bnb__kernel **)(p->next + n * MAX_PHASES * (uint64_t)env->pool.n);
    for (int32_t i = 0; i < g->n_nodes; i++) {
        const bnb_tensor *y = g->nodes[i];
        if (bnb__ops[y->op].flags & BNB__VIEW) continue;
        const bnb__kernel *k = p->kernels[i] = bnb__kernel_find(y, env->cpu, params->compute_dtype);
        if (!k) {
            bnb_fail(err, BNB_E_UNSUPPORTED, "%s: the CPU has no kernel for it", y->name);
            bnb_free(env, p, bytes);
            return NULL;
        }
        if (k->work) p->work = BNB__MAX(p->work, k->work(y));
        if (k->local) p->local = BNB__MAX(p->local, k->local(y));
        for (int32_t phase = 0; phase < k->phases; phase++)
            p->steps[p->n_steps++] = (bnb__step){k, y, i, phase, k->tiles(y, phase)};
    }
    p->work = bnb__align_up(p->work, 4096); /* threads do not share pages */
    p->local = bnb__align_up(p->local, 4096);
    *scratch = p->work + p->local * (uint64_t)env->pool.n;
    return p;
}

static void bnb__cpu_release(void *dev, void *compiled) { bnb_free(dev, compiled, ((bnb__cpu_plan *)compiled)->bytes); }

static const char *bnb__cpu_describe(const void *compiled, int32_t node) {
    const bnb__kernel *k = ((const bnb__cpu_plan *)compiled)->kernels[node];
    return k ? k->name : "view";
}

/* Indices are data from outside: what they point at is checked before any kernel follows them. */
static bnb_status bnb__check_indices(const bnb_graph *g, bnb_error *err) {
    for (int32_t i = 0; i < g->n_nodes; i++) {
        const bnb_tensor *y = g->nodes[i];
        int32_t attend = y->op == BNB_OP_ATTENTION, at = attend ? 3 : y->op == BNB_OP_SET_ROWS ? 2 : y->op == BNB_OP_EMBED ? 1 : 0;
        if (!at) continue;
        const bnb_tensor *list = y->src[at];
        const int32_t *v = list->plane[0];
        int64_t rows = y->src[attend]->shape[0], n = bnb_tensor_elements(list);
        for (int64_t k = 0; k < n; k++)
            if (v[k] < 0 || v[k] > rows - !attend || (attend && k % 2 && v[k] < v[k - 1]))
                return bnb_fail(err, BNB_E_ARG, "%s: '%s'[%lld] is %d, outside the %lld rows of '%s'", y->name, list->name,
                                (long long)k, (int)v[k], (long long)rows, y->src[attend]->name);
    }
    return BNB_OK;
}

/* Where the stretch of tiles begins that belongs to a thread: neighbours read memory that follows each other. */
static int64_t bnb__stretch(const bnb__step *s, int32_t ith, int32_t nth) { return s->tiles * ith / nth; }

/* A thread takes the tiles of its own stretch, then what others have left of theirs: a quarter of what is left at a time,
 * because taking waits for loads under way and other threads' lines, and the stream of weights with it. Runs of steps
 * with a single tile (decoding has many) stay on thread 0 without barriers between them. */
static void bnb__cpu_team(void *arg, int32_t ith, int32_t nth) {
    bnb__cpu_plan *p = arg;
    double start = ith == 0 && p->times ? bnb__seconds() : 0;
    for (int32_t s = 0; s < p->n_steps; s++) {
        bnb__step *step = &p->steps[s];
        int serial = step->tiles <= 1;
        bnb__job job = {step->y, p->scratch, p->scratch + p->work + p->local * (uint64_t)ith};
        for (int32_t j = 0; !serial && j < nth; j++) {
            int32_t whose = (ith + j) % nth;
            _Atomic int64_t *next = &p->next[whose * p->n_steps + s];
            for (int64_t end = bnb__stretch(step, whose + 1, nth), i; (i = atomic_load_explicit(next, memory_order_relaxed)) < end;) {
                int64_t n = (end - i + 3) / 4; /* others may have taken some meanwhile: then these are later ones, or none */
                i = atomic_fetch_add_explicit(next, n, memory_order_relaxed);
                for (int64_t e = BNB__MIN(i + n, end); i < e; i++) step->kernel->run(&job, step->phase, i);
            }
        }
        if (serial && ith == 0 && step->tiles) step->kernel->run(&job, step->phase, 0);
        if (!serial || (s + 1 < p->n_steps && p->steps[s + 1].tiles > 1)) bnb__barrier(&p->env->pool);
        if (ith == 0 && p->times) {
            double now = bnb__seconds();
            p->times[step->node] += now - start;
            start = now;
        }
    }
}

static bnb_status bnb__cpu_run(void *dev, void *compiled, void *scratch, double *times, bnb_error *err) {
    bnb__cpu_plan *p = compiled;
    bnb_status s = bnb__check_indices(p->graph, err);
    if (s) return s;
    p->scratch = scratch;
    p->times = times;
    for (int32_t i = 0, n = p->env->pool.n; i < p->n_steps * n; i++)
        atomic_store_explicit(&p->next[i], bnb__stretch(&p->steps[i % p->n_steps], i / p->n_steps, n), memory_order_relaxed);
    if (times) memset(times, 0, (size_t)p->graph->n_nodes * sizeof *times);
    bnb__team(dev, bnb__cpu_team, p);
    for (int32_t i = 0; i < p->params->n_feeds; i++) {
        const bnb_feed *f = &p->params->feeds[i];
        int64_t n = bnb_tensor_elements(f->to);
        for (int64_t k = 0; k < n; k++)
            ((int32_t *)f->to->plane[0])[k] = (int32_t)((uint32_t)((const int32_t *)f->from->plane[0])[k] + (uint32_t)f->add[k % 2]);
    }
    return BNB_OK;
}

static int32_t bnb__cpu_devices(void) { return 1; }
static void *bnb__cpu_open(bnb_env *env, int32_t index, bnb_error *err) { (void)index, (void)err; return env; }
static void bnb__cpu_close(void *dev) { (void)dev; }
static void *bnb__cpu_alloc(void *dev, uint64_t bytes, bnb_error *err) { return bnb__alloc_raw(dev, bytes, err); }
static void bnb__cpu_free(void *dev, void *ptr, uint64_t bytes) { bnb_free(dev, ptr, bytes); }
static bnb_status bnb__cpu_copy(void *dev, void *dst, const void *src, uint64_t bytes, bnb_error *err) {
    (void)dev, (void)err;
    memcpy(dst, src, bytes);
    return BNB_OK;
}

static const bnb_backend_api bnb__cpu_api = {
    sizeof(bnb_backend_api), "cpu", bnb__cpu_devices, bnb__cpu_open, bnb__cpu_close, NULL, NULL, bnb__cpu_alloc, bnb__cpu_free, bnb__cpu_copy,
    bnb__cpu_copy, NULL, NULL, NULL, NULL, NULL, bnb__cpu_compile, bnb__cpu_release, bnb__cpu_describe, bnb__cpu_run,
};

/* ==== [DEV] ===================================================================================================== */

#ifdef BNB_CUDA
extern const bnb_backend_api bnb_cuda_api; /* bnb-cuda.cu */
#endif
#ifdef BNB_HIP
extern const bnb_backend_api bnb_hip_api; /* bnb-hip.cpp */
#endif

static const bnb_backend_api *const bnb__backends[] = { /* "auto" tries the last one first */
    &bnb__cpu_api,
#ifdef BNB_CUDA
    &bnb_cuda_api,
#endif
#ifdef BNB_HIP
    &bnb_hip_api,
#endif
};

static void bnb__backend_destroy(bnb__owned *o) {
    bnb_backend *b = (bnb_backend *)o;
    if (b->dev) b->api->close(b->dev);
    bnb_free(o->env, b, sizeof *b);
}

bnb_backend *bnb_backend_open(bnb_env *env, const char *name, bnb_error *err) {
    const char *colon = strchr(name, ':');
    size_t n = colon ? (size_t)(colon - name) : strlen(name);
    int32_t index = 0;
    if (!strcmp(name, "auto")) {
        bnb_backend *b = NULL;
        for (int32_t i = BNB__COUNT(bnb__backends) - 1; i > 0 && !b; i--) b = bnb_backend_open(env, bnb__backends[i]->name, NULL);
        return b ? b : bnb_backend_open(env, "cpu", err);
    }
    if (colon) {
        char *end;
        long v = strtol(colon + 1, &end, 10);
        if (end == colon + 1 || *end || v < 0 || v > 4096) {
            bnb_fail(err, BNB_E_ARG, "the device '%.40s' is not of the form name:number", name);
            return NULL;
        }
        index = (int32_t)v;
    }
    for (int32_t i = 0; i < BNB__COUNT(bnb__backends); i++) {
        const bnb_backend_api *api = bnb__backends[i];
        if (strlen(api->name) != n || memcmp(api->name, name, n)) continue;
        if (index >= api->device_count()) {
            bnb_fail(err, BNB_E_DEVICE, "there is no device '%.40s': %d %s device(s) were found", name, (int)api->device_count(), api->name);
            return NULL;
        }
        bnb_backend *b = bnb__own(env, sizeof *b, bnb__backend_destroy, err);
        if (!b) return NULL;
        b->api = api;
        snprintf(b->name, sizeof b->name, "%.30s", name);
        if (!(b->dev = api->open(env, index, err))) {
            bnb__disown(&b->owned);
            return NULL;
        }
        return b;
    }
    bnb_fail(err, BNB_E_UNSUPPORTED, "this program was built without support for the device '%.40s'", name);
    return NULL;
}

void bnb_backend_close(bnb_backend *b) { if (b) bnb__disown(&b->owned); }
const char *bnb_backend_name(const bnb_backend *b) { return b->name; }

bnb_status bnb_backend_sync(bnb_backend *b, bnb_error *err) { return b->api->sync ? b->api->sync(b->dev, err) : BNB_OK; }

bnb_status bnb_backend_info(bnb_backend *b, int32_t measure, bnb_device_info *info, bnb_error *err) {
    memset(info, 0, sizeof *info);
    return b->api->info ? b->api->info(b->dev, measure, info, err) : BNB_OK;
}

/* ==== [PLAN] ====================================================================================================
 * Every node that is not a view, and every input, needs bytes from its definition to its last use. A node may take over
 * its first input's bytes when it is that input's last user. Slots are placed greedily, largest first, at the lowest
 * offset that is free for their whole life: deterministic, and close to optimal for chains of layers. */

typedef struct bnb__slot {
    uint64_t bytes, offset;  /* bytes are exact; the next slot starts aligned               */
    int32_t first, last;     /* nodes [first, last] during which the bytes are in use       */
    int32_t into;            /* index of the slot whose bytes it takes over, or its own     */
} bnb__slot;

struct bnb_plan {
    bnb__owned owned;
    bnb_backend *backend;
    bnb_graph *graph;
    bnb_plan_params params;
    bnb_memory memory;
    bnb__slot *slots;        /* [n_nodes + n_leaves]: nodes, then leaves; bytes 0: needs none */
    void *compiled;
    uint64_t scratch_offset; /* in the arena */
    char *arena;
    double *times;           /* [n_nodes] when profiling */
};

enum { BNB__ARENA_ALIGN = 256 };

static bnb_tensor *bnb__plan_tensor(const bnb_plan *p, int32_t i) { /* of slot i: nodes, then leaves */
    return i < p->graph->n_nodes ? p->graph->nodes[i] : p->graph->leaves[i - p->graph->n_nodes];
}

static bnb_tensor *bnb__root(bnb_tensor *t) {
    while (t->view) t = t->view;
    return t;
}

void bnb_plan_params_default(bnb_plan_params *p, uint32_t struct_size) {
    bnb_plan_params d = {.struct_size = struct_size, .compute_dtype = BNB_COMPUTE_AUTO};
    memcpy(p, &d, BNB__MIN(struct_size, sizeof d));
}

/* mark = 1 + slot index while slots are made: nodes and inputs belong to the graph's ctx, weights stay untouched */
static bnb__slot *bnb__slot_of(const bnb_plan *p, bnb_tensor *t) {
    bnb_tensor *root = bnb__root(t);
    return root->ctx == p->graph->ctx && root->mark ? &p->slots[root->mark - 1] : NULL;
}

static void bnb__plan_lives(bnb_plan *p, const bnb_node_plan *nodes) {
    const bnb_graph *g = p->graph;
    int32_t n = g->n_nodes;
    for (int32_t i = 0; i < n + g->n_leaves; i++) {
        bnb_tensor *t = bnb__plan_tensor(p, i);
        int32_t input = i >= n && (t->flags & BNB_FLAG_INPUT), always = input || p->params.no_reuse;
        if (i < n ? t->view || !nodes[i].bytes : !input) continue;
        /* inputs keep their values from run to run */
        uint64_t bytes = i < n ? nodes[i].bytes : BNB__MAX(bnb__plane_size(t, 0), 1);
        p->slots[i] = (bnb__slot){bytes, 0, always ? 0 : nodes[i].at, always ? n : nodes[i].at, i};
        t->mark = 1 + i;
    }
    for (int32_t i = 0; i < n; i++) {
        bnb_tensor *t = g->nodes[i];
        bnb__slot *s;
        for (int32_t k = 0; k < BNB_MAX_SRC; k++)
            if (t->src[k] && (s = bnb__slot_of(p, t->src[k]))) s->last = BNB__MAX(s->last, nodes[i].at);
        if ((t->flags & BNB_FLAG_OUTPUT) && (s = bnb__slot_of(p, t))) s->last = n;
    }
}

static void bnb__plan_inplace(bnb_plan *p, const bnb_node_plan *nodes) {
    const bnb_graph *g = p->graph;
    for (int32_t i = 0; i < g->n_nodes && !p->params.no_reuse; i++) {
        bnb_tensor *t = g->nodes[i], *x = t->src[0];
        if (!(bnb__ops[t->op].flags & BNB__INPLACE) || x->view) continue;
        bnb__slot *mine = bnb__slot_of(p, t), *theirs = bnb__slot_of(p, x);
        if (!mine || !theirs || mine->bytes != theirs->bytes) continue;
        bnb__slot *base = &p->slots[theirs->into];
        if (base->last != i || nodes[i].at != i) continue;
        int shares = 0; /* another input lies in the same bytes, under another shape */
        for (int32_t k = 1; k < BNB_MAX_SRC; k++)
            if (t->src[k] && t->src[k] != x && (bnb__root(t->src[k]) == x)) shares = 1;
        if (shares) continue;
        mine->into = theirs->into;
        base->last = BNB__MAX(base->last, mine->last);
    }
}

/* order: [n] slot indices by offset, filled as we go */
static void bnb__plan_place(bnb_plan *p, int32_t *by_size, int32_t *by_offset, int32_t n) {
    int32_t count = 0, placed = 0;
    for (int32_t i = 0; i < n; i++) {
        if (!p->slots[i].bytes || p->slots[i].into != i) continue;
        int32_t at = count++;
        while (at > 0 && p->slots[by_size[at - 1]].bytes < p->slots[i].bytes) {
            by_size[at] = by_size[at - 1];
            at--;
        }
        by_size[at] = i;
    }
    for (int32_t c = 0; c < count; c++) {
        bnb__slot *s = &p->slots[by_size[c]];
        uint64_t offset = 0;
        for (int32_t k = 0; k < placed; k++) { /* ascending offsets: the first gap that is wide enough */
            const bnb__slot *o = &p->slots[by_offset[k]];
            if (o->last < s->first || o->first > s->last) continue;
            if (o->offset >= offset && o->offset - offset >= s->bytes) break;
            offset = BNB__MAX(offset, bnb__align_up(o->offset + o->bytes, BNB__ARENA_ALIGN));
        }
        s->offset = offset;
        int32_t at = placed++;
        while (at > 0 && p->slots[by_offset[at - 1]].offset > offset) {
            by_offset[at] = by_offset[at - 1];
            at--;
        }
        by_offset[at] = by_size[c];
        p->memory.work = BNB__MAX(p->memory.work, offset + s->bytes);
    }
    for (int32_t i = 0; i < n; i++)
        if (p->slots[i].bytes) p->slots[i].offset = p->slots[p->slots[i].into].offset;
}

static void bnb__plan_destroy(bnb__owned *o) {
    bnb_plan *p = (bnb_plan *)o;
    bnb_env *env = o->env;
    size_t n = (size_t)(p->graph->n_nodes + p->graph->n_leaves);
    p->graph->planned = 0;
    for (int32_t i = 0; i < (int32_t)n && p->arena; i++) { /* no tensor keeps an address in the arena */
        bnb_tensor *t = bnb__plan_tensor(p, i);
        if (i >= p->graph->n_nodes && !p->slots[i].bytes) continue; /* a weight or cache */
        t->plane[0] = NULL;
        t->backend = NULL;
        t->state = BNB_META;
    }
    if (p->compiled) p->backend->api->release(p->backend->dev, p->compiled);
    if (p->arena) p->backend->api->free(p->backend->dev, p->arena, p->memory.work);
    bnb_free(env, p->slots, n * sizeof *p->slots);
    bnb_free(env, p->times, (size_t)p->graph->n_nodes * sizeof *p->times);
    bnb_free(env, p, sizeof *p);
}

void bnb_plan_free(bnb_plan *p) { if (p) bnb__disown(&p->owned); }

bnb_plan *bnb_plan_create(bnb_backend *backend, bnb_graph *g, const bnb_plan_params *params, bnb_error *err) {
    bnb_env *env = backend->owned.env;
    bnb_plan_params d;
    bnb_plan_params_default(&d, sizeof d);
    if (params) memcpy(&d, params, BNB__MIN(params->struct_size, sizeof d));
    if (d.compute_dtype != BNB_COMPUTE_AUTO && d.compute_dtype != BNB_F32 && d.compute_dtype != BNB_BF16 && d.compute_dtype != BNB_F16) {
        bnb_fail(err, BNB_E_TYPE, "the compute dtype must be f32, bf16 or f16, not type %d", (int)d.compute_dtype);
        return NULL;
    }
    for (int32_t i = 0; i < g->n_leaves; i++)
        if ((g->leaves[i]->flags & BNB_FLAG_INPUT) && g->leaves[i]->ctx != g->ctx) {
            bnb_fail(err, BNB_E_ARG, "input '%s' belongs to another ctx", g->leaves[i]->name);
            return NULL;
        }
    for (int32_t i = 0; i < d.n_feeds; i++) {
        const bnb_tensor *from = i < BNB_MAX_FEEDS ? d.feeds[i].from : NULL, *to = from ? d.feeds[i].to : NULL;
        int32_t known = 0;
        for (int32_t k = 0; k < g->n_leaves; k++) known |= (g->leaves[k] == to) | (g->leaves[k] == from) << 1;
        if (!to || !(known & 1) || !((known & 2 ? BNB_FLAG_INPUT : BNB_FLAG_OUTPUT) & from->flags) || !(to->flags & BNB_FLAG_INPUT) ||
            from->ctx != g->ctx || from->type != BNB_I32 || to->type != BNB_I32 || bnb_tensor_elements(from) != bnb_tensor_elements(to)) {
            bnb_fail(err, BNB_E_ARG, "feed %d of the plan does not go from an i32 input or output of the graph to an input of its size", (int)i);
            return NULL;
        }
    }
    if (g->planned) {
        bnb_fail(err, BNB_E_ARG, "this graph has a plan already: free it first, or build another graph");
        return NULL;
    }
    bnb_plan *p = bnb__own(env, sizeof *p, bnb__plan_destroy, err);
    if (!p) return NULL;
    g->planned = 1;
    p->backend = backend;
    p->graph = g;
    p->params = d;
    int32_t n = g->n_nodes + g->n_leaves;
    uint64_t scratch = 0;
    int32_t *order = bnb_alloc(env, (size_t)n * 2 * sizeof *order, err);
    p->slots = bnb_alloc(env, (size_t)n * sizeof *p->slots, err);
    bnb_node_plan *nodes = bnb_alloc(env, (size_t)n * sizeof *nodes, err);
    for (int32_t i = 0; i < g->n_nodes && nodes; i++) nodes[i] = (bnb_node_plan){i, BNB__MAX(bnb__plane_size(g->nodes[i], 0), 1)};
    if (order && p->slots && nodes) p->compiled = backend->api->compile(backend->dev, g, &p->params, nodes, &scratch, err);
    if (p->compiled) {
        bnb__plan_lives(p, nodes);
        bnb__plan_inplace(p, nodes);
        bnb__plan_place(p, order, order + n, n);
        for (int32_t i = 0; i < n; i++)
            if (p->slots[i].bytes) bnb__plan_tensor(p, i)->mark = 0;
    }
    bnb_free(env, order, (size_t)n * 2 * sizeof *order);
    bnb_free(env, nodes, (size_t)n * sizeof *nodes);
    if (!p->compiled) {
        bnb__disown(&p->owned);
        return NULL;
    }
    p->scratch_offset = bnb__align_up(p->memory.work, 4096);
    p->memory.work = p->scratch_offset + scratch;
    for (int32_t i = 0; i < g->n_leaves; i++) {
        const bnb_tensor *t = g->leaves[i];
        if (t->flags & BNB_FLAG_STATE) p->memory.state += bnb_tensor_bytes(t);
        else if (!(t->flags & BNB_FLAG_INPUT)) p->memory.weights += t->layout ? t->layout_bytes : bnb_tensor_bytes(t);
    }
    return p;
}

void bnb_plan_memory(const bnb_plan *p, bnb_memory *out) { *out = p->memory; }

bnb_status bnb_plan_alloc(bnb_plan *p, bnb_error *err) {
    if (p->arena) return BNB_OK;
    const bnb_graph *g = p->graph;
    p->arena = p->backend->api->alloc(p->backend->dev, p->memory.work, err);
    if (!p->arena) return BNB_E_NOMEM;
    for (int32_t i = 0; i < g->n_nodes + g->n_leaves; i++) {
        if (!p->slots[i].bytes) continue;
        bnb_tensor *t = bnb__plan_tensor(p, i);
        t->plane[0] = p->arena + p->slots[i].offset;
        t->backend = p->backend;
        t->state = BNB_RESIDENT;
    }
    return BNB_OK;
}

/* In every run: a cache or weight may have been bound to other memory since the last one. */
static bnb_status bnb__plan_resolve(bnb_plan *p, bnb_error *err) {
    const bnb_graph *g = p->graph;
    int on_host = p->backend->api == &bnb__cpu_api;
    for (int32_t i = 0; i < g->n_leaves; i++) {
        const bnb_tensor *t = g->leaves[i];
        if (t->state != BNB_RESIDENT) return bnb_fail(err, BNB_E_ARG, "tensor '%s' has no memory: give it some with bnb_ctx_alloc or bnb_tensor_bind", t->name);
        if (t->backend ? t->backend->api != p->backend->api || (!on_host && strcmp(t->backend->name, p->backend->name)) : !on_host)
            return bnb_fail(err, BNB_E_DEVICE, "tensor '%s' is not in the memory of %s", t->name, p->backend->name);
    }
    for (int32_t i = 0; i < g->n_nodes; i++) {
        bnb_tensor *t = g->nodes[i];
        if (!t->view) continue;
        t->plane[0] = (char *)t->view->plane[0] + t->view_offset;
        t->plane[1] = t->view->plane[1]; /* of a cache after writing: the scales of int8_kv */
        t->backend = t->view->backend;
        t->state = BNB_RESIDENT;
    }
    return BNB_OK;
}

bnb_status bnb_plan_run(bnb_plan *p, bnb_error *err) {
    bnb_status s = bnb_plan_alloc(p, err);
    if (!s) s = bnb__plan_resolve(p, err);
    return s ? s : p->backend->api->run(p->backend->dev, p->compiled, p->arena + p->scratch_offset, p->times, err);
}

bnb_status bnb_plan_profile(bnb_plan *p, int32_t on, bnb_error *err) {
    size_t bytes = (size_t)p->graph->n_nodes * sizeof *p->times;
    if (!on || p->times) {
        bnb_free(p->owned.env, on ? NULL : p->times, bytes);
        if (!on) p->times = NULL;
        return BNB_OK;
    }
    p->times = bnb_alloc(p->owned.env, bytes, err);
    return p->times ? BNB_OK : BNB_E_NOMEM;
}

const double *bnb_plan_times(const bnb_plan *p) { return p->times; }

size_t bnb_plan_describe(const bnb_plan *p, char *out, size_t cap) {
    size_t used = 0;
    for (int32_t i = 0; i < p->graph->n_nodes; i++) {
        const bnb_tensor *t = p->graph->nodes[i];
        const bnb__slot *s = &p->slots[i];
        char shape[96];
        bnb__shape_text(t, shape);
        int n = snprintf(cap > used ? out + used : NULL, cap > used ? cap - used : 0, "%4d %-10s %-24s %-20s @%-10llu %10llu  %s\n",
                         (int)i, bnb__ops[t->op].name, p->backend->api->describe(p->compiled, i), shape,
                         (unsigned long long)s->offset, (unsigned long long)s->bytes, t->name);
        used += (size_t)BNB__MAX(n, 0);
    }
    return used;
}

/* ==== [FILE] ====================================================================================================
 * Opening maps the file and reads its metadata only: a header, a table of tensors, a table of keys. Nothing is believed:
 * every offset and count is checked against the bytes that are there, in this order: header, hash, chunks, strings,
 * types, tensors, planes. The tensors are made in an arena of the file's own. */

struct bnb_file {
    bnb__owned owned;
    const uint8_t *data;
    uint64_t bytes;
    int32_t mapped, locked, borrowed; /* how data is to be given back */
    const uint8_t *strs;
    uint64_t n_strs;
    const bnb_file_key *keys;         /* [n_keys] */
    const bnb_file_type *types;       /* [n_types] */
    const bnb_file_record *records;   /* [n_tensors] */
    uint64_t n_keys, n_types, n_tensors;
    uint64_t meta_begin, meta_end;
    bnb_ctx *ctx;
    bnb_tensor **tensors;             /* [n_tensors]: in the order of records */
    int32_t *order;                   /* [n_tensors]: indices in the order of the data */
    char name[256];                   /* for messages */
};

static void bnb__file_destroy(bnb__owned *o) {
    bnb_file *f = (bnb_file *)o;
    if (f->locked) munlock(f->data, f->bytes);
    if (f->mapped) munmap((void *)(uintptr_t)f->data, f->bytes);
    else if (f->data && !f->borrowed) bnb_free(o->env, (void *)(uintptr_t)f->data, f->bytes);
    bnb_free(o->env, f->tensors, f->n_tensors * sizeof *f->tensors);
    bnb_free(o->env, f->order, f->n_tensors * sizeof *f->order);
    bnb_free(o->env, f, sizeof *f);
}

void bnb_file_free(bnb_file *f) {
    if (!f) return;
    bnb_ctx_free(f->ctx);
    bnb__disown(&f->owned);
}

#define BNB__BAD(...) bnb__file_bad(f, err, __VA_ARGS__)

static bnb_status bnb__file_bad(const bnb_file *f, bnb_error *err, const char *format, ...) {
    char text[384];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return bnb_fail(err, BNB_E_FORMAT, "%.200s: %s", f->name, text);
}

typedef unsigned long long bnb__ull; /* for %llu */

static bnb_status bnb__file_header(bnb_file *f, bnb_error *err) {
    bnb_file_header h;
    if (f->bytes < sizeof h) return BNB__BAD("%llu bytes are too few for a .bnb file, which has at least %zu", (bnb__ull)f->bytes, sizeof h);
    memcpy(&h, f->data, sizeof h);
    if (memcmp(h.magic, BNB_FILE_MAGIC, 8)) {
        if (!memcmp(h.magic, "\x89" "BNB", 4)) return BNB__BAD("the file was damaged by a text-mode transfer: copy it again in binary mode");
        return BNB__BAD("not a .bnb file: it begins with other bytes");
    }
    if (h.major != BNB_FILE_MAJOR) return BNB__BAD("version %d of the .bnb format is not the version %d that this program reads", h.major, BNB_FILE_MAJOR);
    if (h.incompatible) return BNB__BAD("it needs features (0x%x) that this program does not have", (unsigned)h.incompatible);
    if (h.file_bytes != f->bytes) return BNB__BAD("the file has %llu bytes but its header says %llu: it was cut short or extended", (bnb__ull)f->bytes, (bnb__ull)h.file_bytes);
    if (h.metadata_offset != sizeof h || h.metadata_bytes > f->bytes - sizeof h || h.metadata_bytes % 8)
        return BNB__BAD("metadata of %llu bytes at offset %llu does not fit into the file", (bnb__ull)h.metadata_bytes, (bnb__ull)h.metadata_offset);
    f->meta_begin = sizeof h;
    f->meta_end = sizeof h + h.metadata_bytes;
    if (h.data_offset < f->meta_end || h.data_offset > f->bytes) return BNB__BAD("data cannot begin at offset %llu", (bnb__ull)h.data_offset);
    if (h.alignment < 64 || h.alignment > 65536 || (h.alignment & (h.alignment - 1))) return BNB__BAD("an alignment of %u is not a power of two from 64 to 65536", (unsigned)h.alignment);
#ifndef BNB_FUZZ /* a fuzzer cannot guess a hash: it tests what lies behind it */
    if (bnb_hash64(f->data + f->meta_begin, h.metadata_bytes, bnb_hash64(f->data, 56, 0)) != h.hash)
        return BNB__BAD("header or metadata is damaged: their hash does not match");
#endif
    return BNB_OK;
}

typedef struct bnb__chunk {
    char tag[4];
    uint32_t zero;
    uint64_t bytes;
} bnb__chunk;

/* The chunk at *at, which moves on; 0 at the end, -1 if it does not fit. */
static int bnb__next_chunk(const bnb_file *f, uint64_t *at, bnb__chunk *c, const uint8_t **payload) {
    if (*at == f->meta_end) return 0;
    if (f->meta_end - *at < sizeof *c) return -1;
    memcpy(c, f->data + *at, sizeof *c);
    *at += sizeof *c;
    if (c->zero || c->bytes > f->meta_end - *at) return -1;
    *payload = f->data + *at;
    *at += bnb__align_up(c->bytes, 8); /* the metadata's length is a multiple of 8 */
    return 1;
}

static bnb_status bnb__file_chunks(bnb_file *f, bnb_error *err) {
    const uint8_t *payload;
    bnb__chunk c;
    int seen = 0, more;
    uint64_t at = f->meta_begin;
    const struct { const char *tag; uint64_t record; const void **where; uint64_t *count; } known[] = {
        {"KEYS", sizeof(bnb_file_key), (const void **)&f->keys, &f->n_keys},
        {"TYPE", sizeof(bnb_file_type), (const void **)&f->types, &f->n_types},
        {"TENS", sizeof(bnb_file_record), (const void **)&f->records, &f->n_tensors},
        {"STRS", 1, (const void **)&f->strs, &f->n_strs},
    };
    while ((more = bnb__next_chunk(f, &at, &c, &payload)) > 0) {
        int k = 0;
        while (k < BNB__COUNT(known) && memcmp(c.tag, known[k].tag, 4)) k++;
        if (k == BNB__COUNT(known)) {
            if (c.tag[0] >= 'A' && c.tag[0] <= 'Z') return BNB__BAD("it has a chunk '%.4s' that a reader must understand, and this one does not", c.tag);
            continue;
        }
        if (seen >> k & 1) return BNB__BAD("the chunk '%.4s' stands in it twice", c.tag);
        if (c.bytes % known[k].record) return BNB__BAD("the chunk '%.4s' of %llu bytes does not hold whole records of %llu", c.tag, (bnb__ull)c.bytes, (bnb__ull)known[k].record);
        seen |= 1 << k;
        *known[k].where = payload;
        *known[k].count = c.bytes / known[k].record;
    }
    if (more < 0) return BNB__BAD("a chunk at offset %llu does not fit into the metadata", (bnb__ull)at);
    for (int k = 0; k < BNB__COUNT(known); k++)
        if (!(seen >> k & 1)) return BNB__BAD("the chunk '%s' is missing", known[k].tag);
    if (f->n_tensors > INT32_MAX || f->n_keys > INT32_MAX) return BNB__BAD("it has more than %d tensors or keys", INT32_MAX);
    return BNB_OK;
}

static int bnb__in_strs(const bnb_file *f, uint64_t offset, uint64_t bytes) { return offset <= f->n_strs && bytes <= f->n_strs - offset; }

static int bnb__compare_names(const bnb_file *f, uint64_t a, uint64_t a_bytes, uint64_t b, uint64_t b_bytes) {
    int c = memcmp(f->strs + a, f->strs + b, BNB__MIN(a_bytes, b_bytes));
    return c ? c : a_bytes < b_bytes ? -1 : a_bytes > b_bytes;
}

static bnb_status bnb__file_keys(bnb_file *f, bnb_error *err) {
    for (uint64_t i = 0; i < f->n_keys; i++) {
        const bnb_file_key *k = &f->keys[i];
        if (!k->name_bytes || !bnb__in_strs(f, k->name_offset, k->name_bytes)) return BNB__BAD("the name of key %llu lies outside the strings", (bnb__ull)i);
        if (i && bnb__compare_names(f, k[-1].name_offset, k[-1].name_bytes, k->name_offset, k->name_bytes) >= 0) return BNB__BAD("key %llu is out of order or stands twice", (bnb__ull)i);
        int array = k->kind == BNB_KEY_I64_ARRAY;
        if (k->kind > BNB_KEY_I64_ARRAY) return BNB__BAD("key %llu has the unknown kind %u", (bnb__ull)i, (unsigned)k->kind);
        if (k->kind >= BNB_KEY_STR && (k->count > f->n_strs || !bnb__in_strs(f, k->value, k->count * (array ? 8 : 1)) || (array && k->value % 8)))
            return BNB__BAD("the value of key %llu lies outside the strings", (bnb__ull)i);
    }
    return BNB_OK;
}

static bnb_status bnb__file_types(bnb_file *f, bnb_error *err) {
    for (uint64_t i = 0; i < f->n_types; i++) {
        const bnb_file_type *t = &f->types[i];
        if (!bnb_type_name((int32_t)t->id) || (uint32_t)bnb_type_bits((int32_t)t->id) != t->bits)
            return BNB__BAD("type %llu (id %u, %u bits) is not one that this program knows", (bnb__ull)i, (unsigned)t->id, (unsigned)t->bits);
        const float *map = t->id == BNB_NF4 ? bnb_nf4_map : t->id == BNB_FP4 ? bnb_fp4_map : NULL;
        if (map && memcmp(map, t->quant_map, sizeof t->quant_map)) return BNB__BAD("type %llu (%s) has another code map than this program", (bnb__ull)i, bnb_type_name((int32_t)t->id));
        if (!(t->threshold >= 0)) return BNB__BAD("type %llu has the outlier threshold %g", (bnb__ull)i, (double)t->threshold);
    }
    return BNB_OK;
}

static bnb_status bnb__file_tensor(bnb_file *f, uint64_t i, bnb_error *err) {
    const bnb_file_record *r = &f->records[i];
    bnb_file_header h;
    memcpy(&h, f->data, sizeof h);
    if (!r->name_bytes || r->name_bytes >= BNB_MAX_NAME || !bnb__in_strs(f, r->name_offset, r->name_bytes)) return BNB__BAD("the name of tensor %llu lies outside the strings or has more than %d bytes", (bnb__ull)i, BNB_MAX_NAME - 1);
    char name[BNB_MAX_NAME] = {0};
    memcpy(name, f->strs + r->name_offset, r->name_bytes);
    if (strlen(name) != r->name_bytes) return BNB__BAD("the name of tensor %llu contains a NUL", (bnb__ull)i);
    if (bnb_hash64(name, r->name_bytes, 0) != r->name_hash) return BNB__BAD("tensor '%s' has a wrong name hash", name);
    if (i && (r[-1].name_hash > r->name_hash || (r[-1].name_hash == r->name_hash && bnb__compare_names(f, r[-1].name_offset, r[-1].name_bytes, r->name_offset, r->name_bytes) >= 0)))
        return BNB__BAD("tensor '%s' is out of order or stands twice", name);
    if (r->type >= f->n_types) return BNB__BAD("tensor '%s' has type %u of %llu", name, (unsigned)r->type, (bnb__ull)f->n_types);
    if (r->n_dims < 1 || r->n_dims > BNB_MAX_DIMS) return BNB__BAD("tensor '%s' has %u dimensions, not 1 to %d", name, (unsigned)r->n_dims, BNB_MAX_DIMS);
    const bnb_file_type *t = &f->types[r->type];
    bnb_quant q = {(int32_t)t->blocksize, (int32_t)t->double_quant, (int32_t)t->nested_blocksize, r->nested_offset, (int32_t)t->dtype, t->threshold, (int32_t)t->outlier_rule};
    int64_t shape[BNB_MAX_DIMS];
    for (uint32_t d = 0; d < BNB_MAX_DIMS; d++) {
        if (r->shape[d] > INT64_MAX) return BNB__BAD("tensor '%s' has the dimension %llu", name, (bnb__ull)r->shape[d]);
        shape[d] = (int64_t)r->shape[d];
    }
    bnb_error why;
    bnb_tensor *x = bnb_tensor_new(f->ctx, (int32_t)t->id, &q, (int32_t)r->n_dims, shape, name);
    if (!x) {
        bnb_status s = bnb_ctx_status(f->ctx, &why);
        return s == BNB_E_NOMEM ? bnb_fail(err, s, "%s", why.msg) : BNB__BAD("%s", why.msg);
    }
    void *planes[BNB_MAX_PLANES];
    for (int32_t p = 0; p < BNB_MAX_PLANES; p++) {
        const bnb_file_plane *pl = &r->planes[p];
        uint64_t need = bnb__plane_size(x, p);
        if (pl->bytes != need) return BNB__BAD("plane %d of tensor '%s' has %llu bytes, but its shape needs %llu", (int)p, name, (bnb__ull)pl->bytes, (bnb__ull)need);
        if (need && (pl->offset < h.data_offset || pl->offset % h.alignment || pl->offset > f->bytes || need > f->bytes - pl->offset))
            return BNB__BAD("plane %d of tensor '%s' (%llu bytes at offset %llu) does not lie in the file's data", (int)p, name, (bnb__ull)need, (bnb__ull)pl->offset);
        planes[p] = need ? (void *)(uintptr_t)(f->data + pl->offset) : p ? NULL : (void *)(uintptr_t)f->data;
    }
    f->tensors[i] = x;
    return bnb_tensor_bind(x, planes, err);
}

typedef struct bnb__extent { uint64_t begin, end; int32_t tensor, plane; } bnb__extent;

static int bnb__compare_extents(const void *a, const void *b) {
    const bnb__extent *x = a, *y = b;
    return x->begin < y->begin ? -1 : x->begin > y->begin ? 1 : x->tensor != y->tensor ? x->tensor - y->tensor : x->plane - y->plane;
}

/* Planes sorted by offset must not overlap; the order of first planes is the order of the file. gaps 1: the bytes
 * between them must be zero. */
static bnb_status bnb__file_extents(bnb_file *f, int gaps, bnb_error *err) {
    size_t cap = (size_t)f->n_tensors * BNB_MAX_PLANES, n = 0;
    bnb__extent *e = bnb_alloc(f->owned.env, cap * sizeof *e, err);
    if (!e) return BNB_E_NOMEM;
    for (uint64_t i = 0; i < f->n_tensors; i++)
        for (int32_t p = 0; p < BNB_MAX_PLANES; p++) {
            const bnb_file_plane *pl = &f->records[i].planes[p];
            if (pl->bytes || p == 0) e[n++] = (bnb__extent){pl->offset, pl->offset + pl->bytes, (int32_t)i, p};
        }
    qsort(e, n, sizeof *e, bnb__compare_extents);
    bnb_status s = BNB_OK;
    uint64_t end = f->meta_end;
    for (size_t i = 0, at = 0; i < n && !s; i++) {
        if (e[i].plane == 0) f->order[at++] = e[i].tensor;
        if (e[i].begin == e[i].end) continue;
        if (e[i].begin < end) s = BNB__BAD("plane %d of tensor '%s' overlaps another at offset %llu", (int)e[i].plane, f->tensors[e[i].tensor]->name, (bnb__ull)e[i].begin);
        for (uint64_t b = end; gaps && b < e[i].begin && !s; b++)
            if (f->data[b]) s = BNB__BAD("the byte at offset %llu, between two planes, is not zero", (bnb__ull)b);
        end = e[i].end;
    }
    for (uint64_t b = end; gaps && b < f->bytes && !s; b++)
        if (f->data[b]) s = BNB__BAD("the byte at offset %llu, behind the last plane, is not zero", (bnb__ull)b);
    bnb_free(f->owned.env, e, cap * sizeof *e);
    return s;
}

static bnb_status bnb__file_parse(bnb_file *f, bnb_error *err) {
    bnb_env *env = f->owned.env;
    bnb_status s = bnb__file_header(f, err);
    uint64_t n = 0;
    if (!s) s = bnb__file_chunks(f, err);
    if (s) f->n_tensors = 0; /* nothing is allocated for them yet */
    if (!s) s = bnb__file_keys(f, err);
    if (!s) s = bnb__file_types(f, err);
    n = f->n_tensors;
    f->n_tensors = 0;
    if (s) return s;
    f->tensors = bnb_alloc(env, n * sizeof *f->tensors, err);
    f->order = f->tensors ? bnb_alloc(env, n * sizeof *f->order, err) : NULL;
    if (!f->order) {
        bnb_free(env, f->tensors, n * sizeof *f->tensors);
        f->tensors = NULL;
        return BNB_E_NOMEM;
    }
    f->n_tensors = n;
    for (uint64_t i = 0; i < n && !s; i++) s = bnb__file_tensor(f, i, err);
    return s ? s : bnb__file_extents(f, 0, err);
}

static bnb_file *bnb__file_new(bnb_env *env, const char *name, bnb_error *err) {
    bnb_file *f = bnb__own(env, sizeof *f, bnb__file_destroy, err);
    if (!f) return NULL;
    snprintf(f->name, sizeof f->name, "%s", name);
    if (!(f->ctx = bnb_ctx_create(env, err))) {
        bnb__disown(&f->owned);
        return NULL;
    }
    return f;
}

static bnb_status bnb__read_all(int fd, uint8_t *dst, uint64_t bytes, const char *path, bnb_error *err) {
    for (uint64_t at = 0; at < bytes;) {
        ssize_t n = read(fd, dst + at, BNB__MIN(bytes - at, (uint64_t)1 << 30));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return bnb_fail(err, BNB_E_IO, "%.200s: %s while reading at offset %llu", path, strerror(errno), (bnb__ull)at);
        if (n == 0) return bnb_fail(err, BNB_E_IO, "%.200s: the file ended at offset %llu of %llu while it was read", path, (bnb__ull)at, (bnb__ull)bytes);
        at += (uint64_t)n;
    }
    return BNB_OK;
}

static bnb_status bnb__file_load(bnb_file *f, const char *path, uint32_t flags, bnb_error *err) {
    /* O_NONBLOCK: a pipe without a writer would keep us waiting; it means nothing for regular files */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return bnb_fail(err, BNB_E_IO, "%.200s: %s", path, strerror(errno));
    struct stat st;
    bnb_status s = BNB_OK;
    if (fstat(fd, &st)) s = bnb_fail(err, BNB_E_IO, "%.200s: %s", path, strerror(errno));
    else if (!S_ISREG(st.st_mode)) s = bnb_fail(err, BNB_E_IO, "%.200s: not a regular file", path);
    else if (st.st_size == 0) s = bnb_fail(err, BNB_E_FORMAT, "%.200s: the file is empty", path);
    else if (flags & BNB_FILE_NO_MMAP) {
        f->data = bnb__alloc_raw(f->owned.env, (size_t)st.st_size, err);
        f->bytes = (uint64_t)st.st_size;
        s = f->data ? bnb__read_all(fd, (uint8_t *)(uintptr_t)f->data, f->bytes, path, err) : BNB_E_NOMEM;
    } else {
        void *p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
        if (p == MAP_FAILED) s = bnb_fail(err, BNB_E_IO, "%.200s: cannot be mapped: %s", path, strerror(errno));
        else {
            f->data = p;
            f->bytes = (uint64_t)st.st_size;
            f->mapped = 1;
            if (flags & BNB_FILE_MLOCK) {
                if (mlock(p, f->bytes) == 0) f->locked = 1;
                else bnb_log(f->owned.env, BNB_LOG_WARN, "%.200s: cannot be locked in memory: %s (see ulimit -l)", path, strerror(errno));
            }
        }
    }
    close(fd);
    return s;
}

bnb_file *bnb_file_open(bnb_env *env, const char *path, uint32_t flags, bnb_error *err) {
    bnb_file *f = bnb__file_new(env, path, err);
    if (f && (bnb__file_load(f, path, flags, err) || bnb__file_parse(f, err))) {
        bnb_file_free(f);
        f = NULL;
    }
    return f;
}

bnb_file *bnb_file_from_memory(bnb_env *env, const void *data, uint64_t bytes, const char *name, bnb_error *err) {
    if ((uintptr_t)data % 8) {
        bnb_fail(err, BNB_E_ARG, "%s: the bytes of a .bnb file must lie at a multiple of 8", name);
        return NULL;
    }
    bnb_file *f = bnb__file_new(env, name, err);
    if (!f) return NULL;
    f->data = data;
    f->bytes = bytes;
    f->borrowed = 1;
    if (bnb__file_parse(f, err)) {
        bnb_file_free(f);
        f = NULL;
    }
    return f;
}

int32_t bnb_file_tensor_count(const bnb_file *f) { return (int32_t)f->n_tensors; }
bnb_tensor *bnb_file_tensor(const bnb_file *f, int32_t i) { return i < 0 || (uint64_t)i >= f->n_tensors ? NULL : f->tensors[f->order[i]]; }

bnb_tensor *bnb_file_find(const bnb_file *f, const char *name) {
    uint64_t hash = bnb_hash64(name, strlen(name), 0), lo = 0, hi = f->n_tensors;
    while (lo < hi) {
        uint64_t mid = lo + (hi - lo) / 2;
        if (f->records[mid].name_hash < hash) lo = mid + 1;
        else hi = mid;
    }
    for (; lo < f->n_tensors && f->records[lo].name_hash == hash; lo++)
        if (!strcmp(f->tensors[lo]->name, name)) return f->tensors[lo];
    return NULL;
}

int32_t bnb_file_key_count(const bnb_file *f) { return (int32_t)f->n_keys; }

const bnb_file_key *bnb_file_key_at(const bnb_file *f, int32_t i, const char **name) {
    if (i < 0 || (uint64_t)i >= f->n_keys) return NULL;
    *name = (const char *)f->strs + f->keys[i].name_offset;
    return &f->keys[i];
}

static const bnb_file_key *bnb__file_key(const bnb_file *f, const char *key, uint32_t kind) {
    size_t n = strlen(key);
    for (uint64_t lo = 0, hi = f->n_keys; lo < hi;) {
        uint64_t mid = lo + (hi - lo) / 2;
        const bnb_file_key *k = &f->keys[mid];
        int c = memcmp(f->strs + k->name_offset, key, BNB__MIN(n, (size_t)k->name_bytes));
        if (!c) c = k->name_bytes < n ? -1 : k->name_bytes > n;
        if (!c) return k->kind == kind ? k : NULL;
        if (c < 0) lo = mid + 1;
        else hi = mid;
    }
    return NULL;
}

bnb_status bnb_file_i64(const bnb_file *f, const char *key, int64_t *out) {
    const bnb_file_key *k = bnb__file_key(f, key, BNB_KEY_I64);
    if (k) *out = (int64_t)k->value;
    return k ? BNB_OK : BNB_E_ARG;
}

bnb_status bnb_file_f64(const bnb_file *f, const char *key, double *out) {
    const bnb_file_key *k = bnb__file_key(f, key, BNB_KEY_F64);
    if (k) memcpy(out, &k->value, sizeof *out);
    return k ? BNB_OK : BNB_E_ARG;
}

const char *bnb_file_str(const bnb_file *f, const char *key, uint64_t *bytes) {
    const bnb_file_key *k = bnb__file_key(f, key, BNB_KEY_STR);
    *bytes = k ? k->count : 0;
    return k ? (const char *)f->strs + k->value : NULL;
}

const int64_t *bnb_file_i64_array(const bnb_file *f, const char *key, uint64_t *count) {
    const bnb_file_key *k = bnb__file_key(f, key, BNB_KEY_I64_ARRAY);
    *count = k ? k->count : 0;
    return k ? (const int64_t *)(const void *)(f->strs + k->value) : NULL;
}

const void *bnb_file_chunk(const bnb_file *f, const char *tag, uint64_t *bytes) {
    uint64_t at = f->meta_begin;
    const uint8_t *payload;
    bnb__chunk c;
    while (bnb__next_chunk(f, &at, &c, &payload) > 0)
        if (!memcmp(c.tag, tag, 4)) {
            *bytes = c.bytes;
            return payload;
        }
    *bytes = 0;
    return NULL;
}

bnb_status bnb_file_verify(bnb_file *f, bnb_error *err) {
    bnb_status s = bnb__file_extents(f, 1, err);
    if (s) return s;
    for (uint64_t i = 0; i < f->n_tensors; i++) {
        const bnb_tensor *t = f->tensors[f->order[i]];
        const bnb_file_record *r = &f->records[f->order[i]];
        for (int32_t p = 0; p < BNB_MAX_PLANES; p++) {
            const bnb_file_plane *pl = &r->planes[p];
            if (pl->bytes && bnb_hash64(f->data + pl->offset, pl->bytes, 0) != pl->hash)
                return BNB__BAD("plane %d of tensor '%s' (offset %llu) is damaged: its hash does not match", (int)p, t->name, (bnb__ull)pl->offset);
        }
        if (!bnb_progress(f->owned.env, "verify", (double)(i + 1) / (double)f->n_tensors)) return bnb_fail(err, BNB_E_CANCELLED, "%s: checking was cancelled", f->name);
    }
    return BNB_OK;
}
