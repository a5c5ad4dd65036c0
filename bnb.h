/* bnb.h: tensors, quantized in the bitsandbytes formats, and graphs that compute with them.
 *
 * Use:   copy bnb.h and bnb.c into your program and compile bnb.c with any C11 compiler:
 *            cc -O2 -c bnb.c            (no flags are needed; link with -lm -pthread)
 *        To run language models, copy models/ as well and start from models/model.h.
 * Read:  C99 or C++11 can include this header. Every array has its shape in a comment, sizes are in bytes unless
 *        another unit is named, shapes are written outermost first as PyTorch does: a weight is [out, in].
 * Not:   the library never exits, aborts, prints or keeps process-wide mutable state; it has no training (yet), no
 *        networking, no dependency but libc, libm and POSIX threads, and it needs a little-endian machine.
 *
 * A first program: y = x * W^T with W in NF4.
 *
 *     bnb_error   err;
 *     bnb_env    *env = bnb_env_create(NULL, &err);                       // threads and allocator
 *     bnb_backend*cpu = bnb_backend_open(env, "cpu", &err);
 *     bnb_ctx    *ctx = bnb_ctx_create(env, &err);                        // owns tensors and graphs
 *     bnb_quant   nf4 = bnb_quant_default(BNB_NF4);
 *     bnb_tensor *w   = bnb_tensor_new(ctx, BNB_NF4, &nf4, 2, (int64_t[]){128, 64}, "w");
 *     bnb_tensor *x   = bnb_input(ctx, BNB_F32, 2, (int64_t[]){1, 64}, "x");
 *     bnb_tensor *y   = bnb_linear(ctx, x, w, NULL);                      // wrong shapes are reported below
 *     bnb_graph  *g   = bnb_graph_create(ctx, &y, 1, &err);
 *     bnb_plan   *p   = bnb_plan_create(cpu, g, NULL, &err);              // memory is known from here on
 *     bnb_ctx_alloc(ctx, cpu, &err);                                      // gives w its memory
 *     bnb_quantize(env, source, w, BNB_COMPAT_CUDA, &err);
 *     bnb_tensor_write(x, 0, data, 64 * 4, &err);
 *     bnb_plan_run(p, &err);
 *     bnb_tensor_read(y, 0, result, 128 * 4, &err);
 *     bnb_env_free(env);                                                  // frees everything made from it
 *
 * Contents: [STATUS] [ENV] [TYPE] [TENSOR] [QUANT] [OP] [GRAPH] [PLAN] [FILE] [BACKEND]
 *
 * Stability: BNB_API_VERSION changes when a symbol outside [BACKEND] changes its meaning. Numbers of types, ops and
 * status codes are never reused. [BACKEND] is for files that add a device and may change with any version.
 */
#ifndef BNB_H
#define BNB_H

#include <stddef.h> /* defines: size_t */
#include <stdint.h> /* defines: int32_t and friends */

#ifdef __cplusplus
extern "C" {
#endif

#define BNB_API_VERSION 1
#define BNB_VERSION "0.1.0"

/* ---- [STATUS] ------------------------------------------------------------------------------------------------------
 * Whatever can fail takes a bnb_error as its last argument. It may be NULL; it is written only on failure. */

typedef int32_t bnb_status;

enum {
    BNB_OK = 0,
    BNB_E_NOMEM = -1,       /* the allocator (or a device) had no memory; the message says how many bytes   */
    BNB_E_ARG = -2,         /* an argument outside its documented range                                     */
    BNB_E_SHAPE = -3,       /* shapes that do not fit each other                                            */
    BNB_E_TYPE = -4,        /* a type that the operation does not take                                      */
    BNB_E_IO = -5,          /* the operating system refused to open, read, map or write                     */
    BNB_E_FORMAT = -6,      /* a file is damaged or is not what it claims to be                             */
    BNB_E_UNSUPPORTED = -7, /* understood, but not offered here                                             */
    BNB_E_DEVICE = -8,      /* a device failed or is missing                                                */
    BNB_E_CANCELLED = -9,   /* a progress hook returned 0                                                   */
    BNB_E_LIMIT = -10,      /* more than fits: context length, name length, number of dimensions            */
    BNB_E_NUMERIC = -11     /* NaN or infinity where a number is needed                                     */
};

typedef struct bnb_error {
    bnb_status code;
    char msg[508]; /* one sentence, NUL-terminated, no newline */
} bnb_error;

/* ---- [ENV] ---------------------------------------------------------------------------------------------------------
 * The only root: allocator, log, progress and a thread pool. A process may have any number of them. An env and
 * everything resident in it may be shared by threads; a ctx, plan or backend belongs to one thread at a time. */

typedef struct bnb_env bnb_env;

enum { BNB_LOG_DEBUG = 0, BNB_LOG_INFO = 1, BNB_LOG_WARN = 2, BNB_LOG_ERROR = 3 };

/* CPU features: what kernels may use. bnb_env_cpu() gives what was found, less cpu_disable. */
enum {
    BNB_CPU_AVX2 = 1 << 0,       /* with FMA and F16C                                   */
    BNB_CPU_AVX512 = 1 << 1,     /* F, BW, VL, DQ                                       */
    BNB_CPU_AVX512_VNNI = 1 << 2,
    BNB_CPU_AVX512_BF16 = 1 << 3,
    BNB_CPU_AMX = 1 << 4,        /* TILE, BF16 and INT8, and the kernel's permission    */
    BNB_CPU_FAST = 1 << 30       /* any kernel but the plain reference ones             */
};

typedef struct bnb_env_params {
    uint32_t struct_size; /* set by bnb_env_params_default: how growth of this struct is told apart                 */
    int32_t n_threads;    /* 0: one for each core this process may use                                              */
    uint32_t cpu_disable; /* BNB_CPU_* bits that kernels must not use                                               */
    /* Like realloc: old == NULL allocates, new_size == 0 frees and returns NULL. align is a power of two <= 4096.
     * NULL: the C library's. Called from any thread that uses the env. */
    void *(*alloc)(void *user, void *old, size_t old_size, size_t new_size, size_t align);
    void (*log)(void *user, int32_t level, const char *line);           /* NULL: silent                             */
    int32_t (*progress)(void *user, const char *phase, double fraction); /* NULL: none; return 0 to cancel           */
    void *user;
} bnb_env_params;

void bnb_env_params_default(bnb_env_params *params, uint32_t struct_size);
bnb_env *bnb_env_create(const bnb_env_params *params, bnb_error *err); /* params NULL: defaults                      */
void bnb_env_free(bnb_env *env); /* frees what was made from it; every free function accepts NULL                    */
int32_t bnb_env_threads(const bnb_env *env);
uint32_t bnb_env_cpu(const bnb_env *env);
uint64_t bnb_env_bytes(const bnb_env *env);      /* allocated through this env now                                  */
uint64_t bnb_env_bytes_peak(const bnb_env *env); /* the most it ever was                                            */
void *bnb_alloc(bnb_env *env, size_t bytes, bnb_error *err); /* 64-byte aligned, zeroed                             */
void bnb_free(bnb_env *env, void *ptr, size_t bytes);        /* bytes as given to bnb_alloc                         */
void bnb_log(bnb_env *env, int32_t level, const char *format, ...);
int32_t bnb_progress(bnb_env *env, const char *phase, double fraction); /* 0: the user wants to stop                */
bnb_status bnb_fail(bnb_error *err, bnb_status code, const char *format, ...); /* fills err, returns code           */

/* Runs fn(arg, i) for every i in [0, n) on the env's threads; returns when all are done. Not from inside fn. */
void bnb_parallel(bnb_env *env, int64_t n, void (*fn)(void *arg, int64_t i), void *arg);

/* ---- [TYPE] ---------------------------------------------------------------------------------------------------------
 * id, symbol, name, bits of one element's code. Ids stand in files and are never reused. */

#define BNB_TYPES(X)        \
    X(0, F32, "f32", 32)    \
    X(1, F16, "f16", 16)    \
    X(2, BF16, "bf16", 16)  \
    X(3, I32, "i32", 32)    \
    X(4, I8, "i8", 8)       \
    X(5, U8, "u8", 8)       \
    X(8, INT8, "int8", 8)   /* LLM.int8(): rows of int8 with SCB (the row's largest magnitude); run-time outliers   */ \
    X(9, NF4, "nf4", 4)     /* blocks of 4-bit NormalFloat codes with absmax                                        */ \
    X(10, FP4, "fp4", 4)    /* blocks of 4-bit float codes with absmax                                              */ \
    X(11, INT8_KV, "int8_kv", 8) /* a cache, no weight: rows of int8 with a scale for each block (head) of a row    */

enum {
#define BNB_TYPE_ENUM(id, symbol, name, bits) BNB_##symbol = id,
    BNB_TYPES(BNB_TYPE_ENUM)
#undef BNB_TYPE_ENUM
    BNB_TYPE_COUNT = 12
};

const char *bnb_type_name(int32_t type);      /* "nf4"; NULL for an unknown id */
int32_t bnb_type_bits(int32_t type);          /* 4; 0 for an unknown id */
int32_t bnb_type_from_name(const char *name); /* -1: no such type */
int32_t bnb_type_is_quantized(int32_t type);  /* a type of quantized weights: int8, nf4, fp4 */

/* Converts n numbers between f32, f16 and bf16 (round to nearest even, overflow to infinity). Unaligned src is fine. */
bnb_status bnb_convert(int32_t src_type, const void *src, int32_t dst_type, void *dst, int64_t n, bnb_error *err);

enum { BNB_MAX_DIMS = 4, BNB_MAX_SRC = 6, BNB_MAX_PLANES = 4, BNB_MAX_NAME = 96 };

/* How a quantized tensor was made. bnb_quant_default() gives bitsandbytes' defaults. */
typedef struct bnb_quant {
    int32_t blocksize;        /* nf4, fp4: elements that share an absmax: 32 64 128 256 512 1024 2048 4096;
                                 int8_kv: columns that share a scale, those of a head: any divisor of a row          */
    int32_t double_quant;     /* nf4, fp4: 1 = absmax is stored in 8 bits, in blocks of nested_blocksize             */
    int32_t nested_blocksize; /* 256                                                                                 */
    float nested_offset;      /* mean of the absmax, taken off before they were quantized                            */
    int32_t dtype;            /* type before quantization (f32, f16, bf16): what bitsandbytes dequantizes to         */
    float threshold;          /* int8: activations with |x| >= threshold are outliers, 0 = never                     */
    int32_t outlier_rule;     /* int8: BNB_OUTLIER_COLUMN (bitsandbytes) or BNB_OUTLIER_ROW                          */
} bnb_quant;

enum {
    BNB_OUTLIER_COLUMN = 0, /* one outlier takes its column out of the int8 product for all rows of the batch        */
    BNB_OUTLIER_ROW = 1     /* only for its own row: a row's result does not depend on its neighbours                */
};

bnb_quant bnb_quant_default(int32_t type);

/* Planes of a tensor of n elements, nb = ceil(n / blocksize):
 *   plain types   0: data
 *   int8 [N, K]   0: codes i8 [N, K]         1: SCB f32 [N]
 *   nf4, fp4      0: codes u8 [(n+1)/2]      1: absmax f32 [nb], or u8 [nb] with double_quant
 *                 2: nested_absmax f32 [ceil(nb / nested_blocksize)]      3: nested_quant_map f32 [256]
 *   int8_kv [R, C]  0: codes i8 [R, C]     1: absmax f32 [C / blocksize, R]: the rows of one head side by side
 * Element 2i stands in the high nibble of codes[i]; blocks run over the flattened tensor and ignore rows. */
uint64_t bnb_plane_bytes(int32_t type, const bnb_quant *quant, int32_t n_dims, const int64_t *shape, int32_t plane);
extern const float bnb_nf4_map[16]; /* code -> value */
extern const float bnb_fp4_map[16]; /* code -> value; code 8 is -0.0 */

/* ---- [TENSOR] ------------------------------------------------------------------------------------------------------
 * META: shape and type only -> PLACED: a device and an offset are chosen -> RESIDENT: there is memory behind it.
 * Building the graph of a 175B model allocates kilobytes. */

typedef struct bnb_ctx bnb_ctx;         /* arena of tensors and graphs                      */
typedef struct bnb_tensor bnb_tensor;   /* owned by its ctx                                 */
typedef struct bnb_backend bnb_backend; /* a device that runs plans; owned by its env       */

enum { BNB_META = 0, BNB_PLACED = 1, BNB_RESIDENT = 2 };

bnb_ctx *bnb_ctx_create(bnb_env *env, bnb_error *err);
void bnb_ctx_free(bnb_ctx *ctx); /* with its tensors, graphs, and the memory that bnb_ctx_alloc gave them             */
uint64_t bnb_ctx_bytes(const bnb_ctx *ctx); /* of metadata                                                           */

/* A tensor to be filled by the caller: a weight or a cache. quant: NULL for plain types. shape: [n_dims], outermost
 * first. NULL on failure; the first failure of a ctx is kept and reported by bnb_graph_create or bnb_ctx_status. */
bnb_tensor *bnb_tensor_new(bnb_ctx *ctx, int32_t type, const bnb_quant *quant, int32_t n_dims, const int64_t *shape,
                           const char *name);
bnb_tensor *bnb_input(bnb_ctx *ctx, int32_t type, int32_t n_dims, const int64_t *shape, const char *name); /* memory: the plan's */
bnb_status bnb_ctx_status(const bnb_ctx *ctx, bnb_error *err);

/* Gives memory to every META tensor that was made by bnb_tensor_new in ctx. */
bnb_status bnb_ctx_alloc(bnb_ctx *ctx, bnb_backend *backend, bnb_error *err);
/* A twin of a host tensor for a device: PLACED, which reserves nothing but fixes the layout that the device's kernels
 * want (bnb_plan_memory counts it), until bnb_tensor_upload gives it memory and the values of src, which is RESIDENT on
 * the host and shaped as it; plain numbers for a quantized twin are quantized on the way (BNB_COMPAT_CUDA).
 * compute_dtype: as in bnb_plan_params. On "cpu" the twin borrows src's memory, if nothing is to be quantized. */
bnb_tensor *bnb_tensor_place(bnb_ctx *ctx, bnb_backend *backend, const bnb_tensor *like, int32_t compute_dtype);
bnb_status bnb_tensor_upload(bnb_tensor *t, const bnb_tensor *src, bnb_error *err);
/* The reverse, exactly: dst is RESIDENT on the host and gets every plane of src in the canonical layout. */
bnb_status bnb_tensor_download(const bnb_tensor *src, bnb_tensor *dst, bnb_error *err);
/* Points a tensor's planes [BNB_MAX_PLANES] at host memory that the caller keeps alive and unchanged. */
bnb_status bnb_tensor_bind(bnb_tensor *t, void *const *planes, bnb_error *err);

/* Copies bytes of plane 0 to or from the host; the tensor must be RESIDENT (inputs and outputs: after bnb_plan_alloc). */
bnb_status bnb_tensor_write(bnb_tensor *t, uint64_t offset, const void *src, uint64_t n, bnb_error *err);
bnb_status bnb_tensor_read(const bnb_tensor *t, uint64_t offset, void *dst, uint64_t n, bnb_error *err);

/* A read in two halves, so that a device need not stand still: begin notes the present value (plane 0, at most
 * BNB_FETCH_BYTES) in a slot of t's device, end waits for it and copies it to dst. One fetch at a time for each slot. */
enum { BNB_FETCH_SLOTS = 4, BNB_FETCH_BYTES = 4096 };
bnb_status bnb_tensor_fetch_begin(const bnb_tensor *t, int32_t slot, bnb_error *err);
bnb_status bnb_tensor_fetch_end(const bnb_tensor *t, int32_t slot, void *dst, bnb_error *err);

const char *bnb_tensor_name(const bnb_tensor *t);
int32_t bnb_tensor_type(const bnb_tensor *t);
const bnb_quant *bnb_tensor_quant(const bnb_tensor *t);
int32_t bnb_tensor_n_dims(const bnb_tensor *t);
const int64_t *bnb_tensor_shape(const bnb_tensor *t); /* [BNB_MAX_DIMS]; 1 beyond n_dims */
int32_t bnb_tensor_state(const bnb_tensor *t);
void *bnb_tensor_plane(const bnb_tensor *t, int32_t plane); /* address on its device; NULL unless RESIDENT            */
int64_t bnb_tensor_elements(const bnb_tensor *t);
uint64_t bnb_tensor_bytes(const bnb_tensor *t);     /* all planes                                                    */
uint64_t bnb_tensor_footprint(const bnb_tensor *t); /* codes only: what get_memory_footprint() of transformers counts */

/* ---- [QUANT] --------------------------------------------------------------------------------------------------------
 * bitsandbytes' arithmetic, bit for bit. Its CUDA and its CPU code differ in a few codes; either can be asked for.
 * Source: QLoRA (NF4, FP4, double quantization), LLM.int8(); the exact rules stand in bnb.c, section [QUANT]. */

enum {
    BNB_COMPAT_CUDA = 0, /* what bitsandbytes computes on an NVIDIA GPU: the default everywhere */
    BNB_COMPAT_CPU = 1   /* what it computes on an x86 CPU                                      */
};

/* src: f32, f16 or bf16, RESIDENT on the host, as many elements as dst. dst: int8 (2 dimensions), nf4 or fp4, RESIDENT
 * on the host; its quant says blocksize and double_quant; nested_offset and dtype are set. Uses all threads. */
bnb_status bnb_quantize(bnb_env *env, const bnb_tensor *src, bnb_tensor *dst, int32_t compat, bnb_error *err);
/* dst: f32, f16 or bf16. Plain sources are converted. */
bnb_status bnb_dequantize(bnb_env *env, const bnb_tensor *src, bnb_tensor *dst, bnb_error *err);
/* BNB_E_NUMERIC naming the tensor and its first NaN or infinity, if it has one (in data, absmax or SCB). */
bnb_status bnb_tensor_check_finite(bnb_env *env, const bnb_tensor *t, bnb_error *err);

/* ---- [OP] ------------------------------------------------------------------------------------------------------------
 * id, symbol, name. Graph building never fails loudly: a failing op keeps the ctx's first error (op, shapes, names)
 * and returns NULL, and ops accept NULL. Activations are f32 [T, C]: T rows (tokens) of C numbers. */

#define BNB_OPS(X)                                                                             \
    X(0, NONE, "none")           /* a leaf: weight, cache or input                          */ \
    X(1, EMBED, "embed")         /* y[t] = table[ids[t]]                                    */ \
    X(2, LINEAR, "linear")       /* y = x W^T + b                                           */ \
    X(3, LAYER_NORM, "layer_norm")                                                             \
    X(4, RMS_NORM, "rms_norm")                                                                 \
    X(5, ADD, "add")                                                                           \
    X(6, MUL, "mul")                                                                           \
    X(7, SCALE, "scale")                                                                       \
    X(8, GELU, "gelu")           /* 0.5 x (1 + erf(x / sqrt 2))                             */ \
    X(9, GELU_TANH, "gelu_tanh") /* 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))         */ \
    X(10, RELU, "relu")                                                                        \
    X(11, SILU, "silu")                                                                        \
    X(12, SOFTMAX, "softmax")                                                                  \
    X(13, SET_ROWS, "set_rows")  /* cache[rows[t]] = x[t]                                   */ \
    X(14, ATTENTION, "attention")                                                              \
    X(15, COLUMNS, "columns")    /* a view of some columns                                  */ \
    X(16, ARGMAX, "argmax")      /* y[t] = where x[t] is largest                            */ \
    X(17, DRAW, "draw")          /* y[t] = an index, drawn by the probabilities of x[t]     */

enum {
#define BNB_OP_ENUM(id, symbol, name) BNB_OP_##symbol = id,
    BNB_OPS(BNB_OP_ENUM)
#undef BNB_OP_ENUM
    BNB_OP_COUNT = 18
};

const char *bnb_op_name(int32_t op);

/* table: [V, C] f32, f16 or bf16; ids: i32 [T], each in [0, V). Also picks rows of an activation. -> f32 [T, C] */
bnb_tensor *bnb_embed(bnb_ctx *ctx, bnb_tensor *table, bnb_tensor *ids);
/* x: f32 [T, K]; w: [N, K] of any type but i32, i8, u8; bias: f32, f16 or bf16 [N], or NULL. -> f32 [T, N] */
bnb_tensor *bnb_linear(bnb_ctx *ctx, bnb_tensor *x, bnb_tensor *w, bnb_tensor *bias);
/* y = (x - mean) / sqrt(var + eps) * w + b over each row; w, b: f32, f16 or bf16 [C], or NULL */
bnb_tensor *bnb_layer_norm(bnb_ctx *ctx, bnb_tensor *x, bnb_tensor *w, bnb_tensor *b, float eps);
/* y = x / sqrt(mean(x^2) + eps) * w */
bnb_tensor *bnb_rms_norm(bnb_ctx *ctx, bnb_tensor *x, bnb_tensor *w, float eps);
/* b: the shape of a, or one row [C] that is used for every row of a */
bnb_tensor *bnb_add(bnb_ctx *ctx, bnb_tensor *a, bnb_tensor *b);
bnb_tensor *bnb_mul(bnb_ctx *ctx, bnb_tensor *a, bnb_tensor *b);
bnb_tensor *bnb_scale(bnb_ctx *ctx, bnb_tensor *x, float factor);
bnb_tensor *bnb_gelu(bnb_ctx *ctx, bnb_tensor *x);
bnb_tensor *bnb_gelu_tanh(bnb_ctx *ctx, bnb_tensor *x);
bnb_tensor *bnb_relu(bnb_ctx *ctx, bnb_tensor *x);
bnb_tensor *bnb_silu(bnb_ctx *ctx, bnb_tensor *x);
bnb_tensor *bnb_softmax(bnb_ctx *ctx, bnb_tensor *x); /* over each row */
/* cache: f32, f16 or int8_kv [R, C], RESIDENT memory that outlives the plan; x: f32 [T, C]; rows: i32 [T], each in [0, R)
 * and none twice. int8_kv: code = rint(x * (127 / absmax)), value = code * absmax / 127, absmax that of the row's block; below
 * 2^-120 it is stored as 0, and as NaN if the block has a NaN or an infinity, so that all of the block reads as NaN.
 * Returns the cache as it is after the writes: use this handle to read it in the same graph. */
bnb_tensor *bnb_set_rows(bnb_ctx *ctx, bnb_tensor *cache, bnb_tensor *x, bnb_tensor *rows);
/* Attention over cached keys and values. q: f32 [T, n_head * D]; k, v: f32, f16 or int8_kv (blocksize D) [R, n_head_kv * D];
 * span: i32 [T, 2]: row t sees the cache rows span[t][0] <= r < span[t][1] (causality, windows and batches are data,
 * not topology). y[t, h] = softmax(scale * q[t, h] . k[r, h']) v[r, h'], h' = h / (n_head / n_head_kv). -> f32 [T, n_head * D];
 * an empty span gives zeros. */
bnb_tensor *bnb_attention(bnb_ctx *ctx, bnb_tensor *q, bnb_tensor *k, bnb_tensor *v, bnb_tensor *span, int32_t n_head,
                          int32_t n_head_kv, float scale);
/* View of columns [first, first + n) of x [T, C]. -> f32 [T, n], no copy */
bnb_tensor *bnb_columns(bnb_ctx *ctx, bnb_tensor *x, int64_t first, int64_t n);

/* The first index of each row's largest number; -1 if the row has a NaN. -> i32 [T] */
bnb_tensor *bnb_argmax(bnb_ctx *ctx, bnb_tensor *x);

/* How an index is drawn from a row of logits: the top_k largest (0: all; of equals the first), of these the fewest whose
 * probabilities reach top_p together, of these those with at least min_p times the largest probability, and of these one by
 * exp(x / temp). temp 0: the largest. The draw depends on seed, step and x only. */
typedef struct bnb_draw_rule {
    float temp, top_p, min_p;
    int32_t top_k;
    uint64_t seed;
} bnb_draw_rule;
/* steps: i32 [T]. -1 for a row with a NaN or whose largest number is infinite. -> i32 [T] */
bnb_tensor *bnb_draw(bnb_ctx *ctx, bnb_tensor *x, bnb_tensor *steps, const bnb_draw_rule *rule);
/* The same for x [n] on the host. scratch: 8 min(top_k, n) bytes, 4-byte aligned (8 n if top_k is 0). */
int32_t bnb_draw_row(const float *x, int64_t n, const bnb_draw_rule *rule, int32_t step, void *scratch);

/* ---- [GRAPH] ---------------------------------------------------------------------------------------------------------*/

typedef struct bnb_graph bnb_graph; /* owned by its ctx */

/* What outputs [n] need, in topological order. This is where errors of graph building are reported. */
bnb_graph *bnb_graph_create(bnb_ctx *ctx, bnb_tensor *const *outputs, int32_t n, bnb_error *err);
int32_t bnb_graph_size(const bnb_graph *g);                   /* number of nodes */
bnb_tensor *bnb_graph_node(const bnb_graph *g, int32_t i);    /* NULL outside [0, size) */

/* ---- [PLAN] ----------------------------------------------------------------------------------------------------------
 * A graph made ready for one device: a kernel for each node, an offset for each tensor, the division of work. What
 * changes per token (positions, lengths, row ids) is input data, so a plan is run any number of times.
 * Same plan, same device, same inputs: the same bits, at any number of threads. */

typedef struct bnb_plan bnb_plan; /* owned by its env; free it before the ctx of its graph. A graph has one plan at a time */

enum {
    BNB_COMPUTE_AUTO = -1 /* what is fastest. CPU: f32; where it multiplies bf16 that, summed in f32, for 4-bit weights and
                             for prompts (with AMX for prompts only). GPU: f16 products summed in f32. f32 if the weights
                             are f32 */
};

/* What a plan feeds back: after a run, to[i] = from[i] + add[i % 2]. Both are i32 of one size, `to` an input of the graph
 * and `from` an input or an output. So a plan that ends in argmax can write token after token with no host in between. */
typedef struct bnb_feed {
    bnb_tensor *from, *to;
    int32_t add[2];
} bnb_feed;

enum { BNB_MAX_FEEDS = 8 };

typedef struct bnb_plan_params {
    uint32_t struct_size;
    int32_t compute_dtype; /* of linear with f16, bf16 and 4-bit weights: BNB_F32, BNB_BF16 (cpu), BNB_F16 (gpu) or AUTO   */
    int32_t no_reuse;      /* 1: no memory is used twice (for debugging)                                              */
    int32_t n_feeds;
    bnb_feed feeds[BNB_MAX_FEEDS]; /* [n_feeds], carried out in this order                                            */
} bnb_plan_params;

typedef struct bnb_memory {
    uint64_t weights; /* RESIDENT or META leaves, all planes                    */
    uint64_t state;   /* caches: leaves that set_rows writes                    */
    uint64_t work;    /* the plan's own arena: inputs, activations, scratch     */
} bnb_memory;

void bnb_plan_params_default(bnb_plan_params *params, uint32_t struct_size);
bnb_plan *bnb_plan_create(bnb_backend *backend, bnb_graph *graph, const bnb_plan_params *params, bnb_error *err);
void bnb_plan_free(bnb_plan *plan);
void bnb_plan_memory(const bnb_plan *plan, bnb_memory *out);      /* valid while everything is META                  */
bnb_status bnb_plan_alloc(bnb_plan *plan, bnb_error *err);        /* the arena; bnb_plan_run does it if need be      */
bnb_status bnb_plan_run(bnb_plan *plan, bnb_error *err);
/* One line per node: index, op, kernel, shape, offset, bytes. Writes at most cap bytes with the NUL; returns the length. */
size_t bnb_plan_describe(const bnb_plan *plan, char *out, size_t cap);
/* Seconds spent per node in the last run, [bnb_graph_size]; NULL unless bnb_plan_profile(plan, 1) came before. */
const double *bnb_plan_times(const bnb_plan *plan);
bnb_status bnb_plan_profile(bnb_plan *plan, int32_t on, bnb_error *err);

/* ---- [FILE] ----------------------------------------------------------------------------------------------------------
 * The .bnb file: little-endian, mapped into memory, canonical layout only (hardware tiling is made at load).
 *
 *     header 64 bytes | metadata: chunks | planes, each aligned to `alignment`
 *
 * A chunk is tag [4], u32 zero, u64 length, payload, zeros to a multiple of 8. An upper-case first letter means that a
 * reader must understand it, lower case that it may skip it (as in PNG).
 *     KEYS  bnb_file_key [n], sorted by name            TYPE  bnb_file_type [n]
 *     TENS  bnb_file_record [n], sorted by (hash, name)  STRS  bytes that the others point into
 *     tokn  tokenizer (models/tokenizer.cpp)
 * Planes lie within the file, do not overlap, and the bytes between them are zero. Opening checks the metadata's hash and
 * every offset, length and count; bnb_file_verify also checks the data's hashes: they find damage, not tampering. */

#define BNB_FILE_MAGIC "\x89" "BNB\r\n\x1a\n"
enum { BNB_FILE_MAJOR = 1, BNB_FILE_MINOR = 0, BNB_FILE_ALIGNMENT = 4096 };

typedef struct bnb_file_header { /* 64 bytes at offset 0 */
    uint8_t magic[8];
    uint16_t major, minor;    /* another major is refused; minor adds what may be skipped  */
    uint32_t incompatible;    /* feature bits: an unknown one is refused                   */
    uint64_t file_bytes;
    uint64_t metadata_offset; /* 64 */
    uint64_t metadata_bytes;
    uint64_t data_offset;
    uint32_t alignment;       /* of planes: a power of two, 64 to 65536                    */
    uint32_t compatible;      /* feature bits that may be ignored                          */
    uint64_t hash;            /* bnb_hash64(metadata, metadata_bytes, bnb_hash64(these 56 bytes before, 56, 0)) */
} bnb_file_header;

enum { BNB_KEY_I64 = 0, BNB_KEY_F64 = 1, BNB_KEY_STR = 2, BNB_KEY_I64_ARRAY = 3 };

typedef struct bnb_file_key {    /* 32 bytes */
    uint32_t name_offset, name_bytes; /* in STRS */
    uint32_t kind, reserved;
    uint64_t value;              /* i64, bits of an f64, or offset in STRS of a string or of i64 values [count] */
    uint64_t count;              /* bytes of a string, values of an array */
} bnb_file_key;

typedef struct bnb_file_type {   /* 96 bytes: enough to decode a tensor without knowing the id */
    uint32_t id, bits, blocksize, double_quant, nested_blocksize, dtype, outlier_rule;
    float threshold;
    float quant_map[16];         /* 4-bit types: code -> value */
} bnb_file_type;

typedef struct bnb_file_plane { uint64_t offset, bytes, hash; } bnb_file_plane; /* hash: XXH64, seed 0 */

typedef struct bnb_file_record { /* 160 bytes */
    uint64_t name_hash;          /* XXH64, seed 0 */
    uint32_t name_offset, name_bytes;
    uint32_t type, n_dims;       /* type: index into TYPE */
    uint64_t shape[BNB_MAX_DIMS];
    float nested_offset;
    uint32_t reserved;
    bnb_file_plane planes[BNB_MAX_PLANES];
} bnb_file_record;

typedef struct bnb_file bnb_file; /* an open file; owns its mapping and its tensors */

enum { BNB_FILE_NO_MMAP = 1, BNB_FILE_MLOCK = 2 };

bnb_file *bnb_file_open(bnb_env *env, const char *path, uint32_t flags, bnb_error *err);
bnb_file *bnb_file_from_memory(bnb_env *env, const void *data, uint64_t bytes, const char *name, bnb_error *err); /* data stays the caller's */
void bnb_file_free(bnb_file *f);
int32_t bnb_file_tensor_count(const bnb_file *f);
bnb_tensor *bnb_file_tensor(const bnb_file *f, int32_t i);                  /* in the order of their data */
bnb_tensor *bnb_file_find(const bnb_file *f, const char *name);             /* NULL: no such tensor */
bnb_status bnb_file_i64(const bnb_file *f, const char *key, int64_t *out);  /* BNB_E_ARG: no such key, or another kind */
bnb_status bnb_file_f64(const bnb_file *f, const char *key, double *out);
const char *bnb_file_str(const bnb_file *f, const char *key, uint64_t *bytes);         /* not NUL-terminated */
const int64_t *bnb_file_i64_array(const bnb_file *f, const char *key, uint64_t *count); /* 8-byte aligned */
int32_t bnb_file_key_count(const bnb_file *f);
const bnb_file_key *bnb_file_key_at(const bnb_file *f, int32_t i, const char **name);  /* name: [name_bytes], not NUL-terminated */
const void *bnb_file_chunk(const bnb_file *f, const char *tag, uint64_t *bytes);       /* NULL: absent */
bnb_status bnb_file_verify(bnb_file *f, bnb_error *err);                    /* reads everything, checks every plane's hash */
uint64_t bnb_hash64(const void *data, uint64_t bytes, uint64_t seed);       /* XXH64 */

/* ---- [BACKEND] -------------------------------------------------------------------------------------------------------
 * "cpu", "cuda:0", "hip:1". A device file fills one bnb_backend_api and is listed in bnb.c. Not stable. */

bnb_backend *bnb_backend_open(bnb_env *env, const char *name, bnb_error *err); /* "auto": a GPU that works, else "cpu" */
void bnb_backend_close(bnb_backend *backend);
const char *bnb_backend_name(const bnb_backend *backend); /* "cpu" */
/* Waits until everything that was asked of it is done, and reports what went wrong. Tensors of one device may be used by all
 * its backends (one for each thread, say), once this was called by the one that filled them. */
bnb_status bnb_backend_sync(bnb_backend *backend, bnb_error *err);

typedef struct bnb_device_info {
    char description[128];           /* "NVIDIA H100 80GB HBM3, 132 multiprocessors, sm_90"; "" for the CPU            */
    uint64_t total_bytes, free_bytes;
    uint64_t used_bytes, peak_bytes; /* allocated through this backend, now and at most                               */
    double read_bandwidth;           /* bytes per second of plain reading; 0 unless measure was asked for (about 0.1 s) */
} bnb_device_info;
/* All zeros for the CPU: see bnb_env_bytes. */
bnb_status bnb_backend_info(bnb_backend *backend, int32_t measure, bnb_device_info *info, bnb_error *err);

extern const uint64_t bnb_rcp_fix[32]; /* where the 1/x of NVIDIA GPUs is not the rounded quotient; explained in bnb.c */

typedef union bnb_params {
    struct { float eps; } norm;
    struct { float factor; } scale;
    struct { int32_t n_head, n_head_kv; float scale; } attention;
    bnb_draw_rule draw;
} bnb_params;

enum { BNB_FLAG_INPUT = 1, BNB_FLAG_OUTPUT = 2, BNB_FLAG_STATE = 4 };

struct bnb_tensor {
    int32_t type, n_dims;
    int64_t shape[BNB_MAX_DIMS];  /* outermost first; 1 beyond n_dims                                    */
    int64_t stride[BNB_MAX_DIMS]; /* bytes; plain types only; the last one is the element's size          */
    bnb_quant quant;
    int32_t op, flags, state;
    int32_t mark;                 /* scratch of graph building                                           */
    bnb_params params;
    bnb_tensor *src[BNB_MAX_SRC];
    bnb_tensor *view;             /* NULL, or the tensor whose memory this is                            */
    uint64_t view_offset;         /* bytes into it                                                       */
    bnb_ctx *ctx;
    bnb_backend *backend;         /* whose memory; NULL: the host's                                      */
    int32_t layout;               /* 0: canonical planes; else the backend's own (weights on a device)   */
    uint64_t layout_bytes;        /* of all planes together, if layout is not 0                          */
    void *plane[BNB_MAX_PLANES];  /* addresses on that device                                            */
    char name[BNB_MAX_NAME];
};

/* What compile decides about node i. It comes with at = i and the bytes of the f32 result. */
typedef struct bnb_node_plan {
    int32_t at;     /* the node with which it is computed: until then its sources live, from then on its result     */
    uint64_t bytes; /* of its result in the arena; 0: it is never written, another kernel computes it on the way    */
} bnb_node_plan;

/* What a device needs to quantize as bnb_quantize does: the 4-bit rule of BNB_COMPAT_CUDA, which is a search (a number's
 * code is code[how many bounds are below it]), and the second level of a double-quantized tensor: absmax f32 [nb] ->
 * planes 1 to 3 of dst, which are host addresses, and its nested_offset. */
typedef struct bnb_rule4 {
    float bound[15];  /* ascending                    */
    float nan;        /* what a NaN counts as         */
    float smallest;   /* |a| below this counts as 0   */
    uint8_t code[16]; /* rank -> code                 */
} bnb_rule4;
const bnb_rule4 *bnb_quant_rule4(int32_t type, int32_t compat);
bnb_status bnb_quantize_absmax(bnb_env *env, const float *absmax, bnb_tensor *dst, int32_t compat, bnb_error *err);

typedef struct bnb_backend_api {
    uint32_t struct_size;
    const char *name;                                                  /* "cuda" */
    int32_t (*device_count)(void);                                     /* 0 without a driver */
    void *(*open)(bnb_env *env, int32_t index, bnb_error *err);
    void (*close)(void *dev);
    bnb_status (*sync)(void *dev, bnb_error *err);                     /* NULL: nothing is ever left undone */
    bnb_status (*info)(void *dev, int32_t measure, bnb_device_info *info, bnb_error *err); /* NULL: nothing to say */
    void *(*alloc)(void *dev, uint64_t bytes, bnb_error *err);         /* device memory, 256-byte aligned */
    void (*free)(void *dev, void *ptr, uint64_t bytes);
    bnb_status (*write)(void *dev, void *dst, const void *src, uint64_t bytes, bnb_error *err);
    bnb_status (*read)(void *dev, void *dst, const void *src, uint64_t bytes, bnb_error *err);
    /* bnb_tensor_fetch_*; NULL where a read does not wait */
    bnb_status (*fetch_begin)(void *dev, int32_t slot, const void *src, uint64_t bytes, bnb_error *err);
    bnb_status (*fetch_end)(void *dev, int32_t slot, void *dst, uint64_t bytes, bnb_error *err);
    /* Weights on a device; all NULL where they are used as they lie in host memory. place sets layout and layout_bytes;
     * upload fills planes that start at t->plane[0], layout_bytes long; download restores dst's canonical planes. */
    void (*place)(void *dev, bnb_tensor *t, int32_t compute_dtype);
    bnb_status (*upload)(void *dev, bnb_tensor *t, const bnb_tensor *src, bnb_error *err);
    bnb_status (*download)(void *dev, const bnb_tensor *t, bnb_tensor *dst, bnb_error *err);
    /* Chooses a kernel for every node; nodes: [bnb_graph_size]; *scratch: device bytes it needs beside the tensors.
     * NULL: err says which node has no kernel. describe gives the kernel's name of node i. run is called when every
     * tensor has its address, and carries out params->feeds at its end; it may return before the device is done: read
     * waits, and reports what went wrong. params outlive what is compiled. */
    void *(*compile)(void *dev, const bnb_graph *graph, const bnb_plan_params *params, bnb_node_plan *nodes,
                     uint64_t *scratch, bnb_error *err);
    void (*release)(void *dev, void *compiled);
    const char *(*describe)(const void *compiled, int32_t node);
    bnb_status (*run)(void *dev, void *compiled, void *scratch, double *times, bnb_error *err);
} bnb_backend_api;

#ifdef __cplusplus
}
#endif
#endif
