/* abi.c: the headers as C sees them, and what must never change: ids, codes, sizes of structs in files. test_abi.cpp links
 * this file, and compiles it as C99, C11 and C++11. */
#include "../bnb.h"
#include "../models/model.h"
#include "../models/checkpoint.h"

#include <stddef.h>

/* A failing line is an array of negative size. */
#define FROZEN(name, condition) typedef char bnb_frozen_##name[(condition) ? 1 : -1]

FROZEN(status, BNB_OK == 0 && BNB_E_NOMEM == -1 && BNB_E_ARG == -2 && BNB_E_SHAPE == -3 && BNB_E_TYPE == -4 && BNB_E_IO == -5 &&
       BNB_E_FORMAT == -6 && BNB_E_UNSUPPORTED == -7 && BNB_E_DEVICE == -8 && BNB_E_CANCELLED == -9 && BNB_E_LIMIT == -10 &&
       BNB_E_NUMERIC == -11);
FROZEN(types, BNB_F32 == 0 && BNB_F16 == 1 && BNB_BF16 == 2 && BNB_I32 == 3 && BNB_I8 == 4 && BNB_U8 == 5 && BNB_INT8 == 8 &&
       BNB_NF4 == 9 && BNB_FP4 == 10);
FROZEN(ops, BNB_OP_NONE == 0 && BNB_OP_EMBED == 1 && BNB_OP_LINEAR == 2 && BNB_OP_LAYER_NORM == 3 && BNB_OP_RMS_NORM == 4 &&
       BNB_OP_ADD == 5 && BNB_OP_MUL == 6 && BNB_OP_SCALE == 7 && BNB_OP_GELU == 8 && BNB_OP_GELU_TANH == 9 && BNB_OP_RELU == 10 &&
       BNB_OP_SILU == 11 && BNB_OP_SOFTMAX == 12 && BNB_OP_SET_ROWS == 13 && BNB_OP_ATTENTION == 14 && BNB_OP_COLUMNS == 15);
FROZEN(log, BNB_LOG_DEBUG == 0 && BNB_LOG_INFO == 1 && BNB_LOG_WARN == 2 && BNB_LOG_ERROR == 3);
FROZEN(cpu, BNB_CPU_AVX2 == 1 && BNB_CPU_AVX512 == 2 && BNB_CPU_AVX512_VNNI == 4 && BNB_CPU_AVX512_BF16 == 8 && BNB_CPU_AMX == 16 &&
       BNB_CPU_FAST == 1 << 30);
FROZEN(states, BNB_META == 0 && BNB_PLACED == 1 && BNB_RESIDENT == 2);
FROZEN(rules, BNB_OUTLIER_COLUMN == 0 && BNB_OUTLIER_ROW == 1 && BNB_COMPAT_CUDA == 0 && BNB_COMPAT_CPU == 1 && BNB_COMPUTE_AUTO == -1);
FROZEN(limits, BNB_MAX_DIMS == 4 && BNB_MAX_PLANES == 4 && BNB_MAX_NAME == 96);
FROZEN(keys, BNB_KEY_I64 == 0 && BNB_KEY_F64 == 1 && BNB_KEY_STR == 2 && BNB_KEY_I64_ARRAY == 3);
FROZEN(file, BNB_FILE_MAJOR == 1 && BNB_FILE_NO_MMAP == 1 && BNB_FILE_MLOCK == 2);
FROZEN(model, BNB_TOKENIZE_SPECIAL == 1 && BNB_TOKENIZE_PARSE_SPECIAL == 2 && BNB_TOKENIZE_RAW_BYTES == 4);
FROZEN(stop, BNB_STOP_LENGTH == 0 && BNB_STOP_EOS == 1 && BNB_STOP_STRING == 2 && BNB_STOP_CALLER == 3 && BNB_STOP_CONTEXT == 4);

/* what stands in files */
FROZEN(header, sizeof(bnb_file_header) == 64 && offsetof(bnb_file_header, file_bytes) == 16 && offsetof(bnb_file_header, metadata_offset) == 24 &&
       offsetof(bnb_file_header, metadata_bytes) == 32 && offsetof(bnb_file_header, data_offset) == 40 &&
       offsetof(bnb_file_header, alignment) == 48 && offsetof(bnb_file_header, hash) == 56);
FROZEN(key, sizeof(bnb_file_key) == 32 && offsetof(bnb_file_key, kind) == 8 && offsetof(bnb_file_key, value) == 16 && offsetof(bnb_file_key, count) == 24);
FROZEN(type, sizeof(bnb_file_type) == 96 && offsetof(bnb_file_type, threshold) == 28 && offsetof(bnb_file_type, quant_map) == 32);
FROZEN(plane, sizeof(bnb_file_plane) == 24);
FROZEN(record, sizeof(bnb_file_record) == 160 && offsetof(bnb_file_record, type) == 16 && offsetof(bnb_file_record, shape) == 24 &&
       offsetof(bnb_file_record, nested_offset) == 56 && offsetof(bnb_file_record, planes) == 64);

/* what programs that were compiled before hand to us: structs may grow at their ends only */
FROZEN(error, sizeof(bnb_error) == 512 && offsetof(bnb_error, msg) == 4);
FROZEN(quant, offsetof(bnb_quant, double_quant) == 4 && offsetof(bnb_quant, nested_offset) == 12 && offsetof(bnb_quant, dtype) == 16 &&
       offsetof(bnb_quant, threshold) == 20 && offsetof(bnb_quant, outlier_rule) == 24 && sizeof(bnb_quant) == 28);
FROZEN(env_params, offsetof(bnb_env_params, struct_size) == 0 && offsetof(bnb_env_params, n_threads) == 4 &&
       offsetof(bnb_env_params, cpu_disable) == 8 && offsetof(bnb_env_params, alloc) == 12 + (sizeof(void *) == 8 ? 4 : 0));
FROZEN(plan_params, offsetof(bnb_plan_params, struct_size) == 0 && offsetof(bnb_plan_params, compute_dtype) == 4 && offsetof(bnb_plan_params, no_reuse) == 8);
FROZEN(memory, sizeof(bnb_memory) == 24);
FROZEN(model_params, offsetof(bnb_model_params, struct_size) == 0 && offsetof(bnb_model_params, no_mmap) == 4);
FROZEN(model_info, offsetof(bnb_model_info, struct_size) == 0 && offsetof(bnb_model_info, arch) == 4);
FROZEN(sampling, offsetof(bnb_sampling, struct_size) == 0 && offsetof(bnb_sampling, temp) == 4 && offsetof(bnb_sampling, seed) == 32);
FROZEN(generate_params, offsetof(bnb_generate_params, struct_size) == 0);
FROZEN(load_params, offsetof(bnb_load_params, struct_size) == 0 && offsetof(bnb_load_params, type) == 4);

#ifdef __cplusplus
extern "C" {
#endif

/* The first program of bnb.h, as C: returns the sum of y, or a negative status. */
double bnb_abi_first_program(void);
int bnb_abi_version(void);
size_t bnb_abi_sizes(size_t *sizes, size_t cap);

int bnb_abi_version(void) { return BNB_API_VERSION; }

/* sizes that this compiler sees, in the order of test_abi.cpp */
size_t bnb_abi_sizes(size_t *sizes, size_t cap) {
    const size_t all[] = {sizeof(bnb_error),        sizeof(bnb_env_params),  sizeof(bnb_quant),          sizeof(bnb_plan_params),
                          sizeof(bnb_memory),       sizeof(bnb_tensor),      sizeof(bnb_backend_api),    sizeof(bnb_model_params),
                          sizeof(bnb_model_info),   sizeof(bnb_sampling),    sizeof(bnb_generate_params), sizeof(bnb_generate_result),
                          sizeof(bnb_load_params),  sizeof(bnb_convert_result)};
    size_t n = sizeof all / sizeof all[0], i;
    for (i = 0; i < n && i < cap; i++) sizes[i] = all[i];
    return n;
}

double bnb_abi_first_program(void) {
    bnb_error err;
    bnb_env *env = bnb_env_create(NULL, &err);
    bnb_backend *cpu;
    bnb_ctx *ctx;
    bnb_tensor *w, *x, *y, *source;
    bnb_graph *g;
    bnb_plan *p;
    bnb_quant nf4 = bnb_quant_default(BNB_NF4);
    const int64_t w_shape[] = {128, 64}, x_shape[] = {1, 64};
    float data[64], result[128], weights[128 * 64];
    void *planes[BNB_MAX_PLANES] = {NULL, NULL, NULL, NULL};
    double sum = 0;
    int i;
    bnb_status s;
    if (!env) return err.code;
    for (i = 0; i < 64; i++) data[i] = 1;
    for (i = 0; i < 128 * 64; i++) weights[i] = i % 2 ? 1.0f : -1.0f;
    for (i = 0; i < 128; i++) weights[64 * i] = 0; /* a row sums to 1 */
    cpu = bnb_backend_open(env, "cpu", &err);
    ctx = bnb_ctx_create(env, &err);
    w = bnb_tensor_new(ctx, BNB_NF4, &nf4, 2, w_shape, "w");
    source = bnb_tensor_new(ctx, BNB_F32, NULL, 2, w_shape, "source");
    x = bnb_input(ctx, BNB_F32, 2, x_shape, "x");
    y = bnb_linear(ctx, x, w, NULL);
    g = bnb_graph_create(ctx, &y, 1, &err);
    p = g ? bnb_plan_create(cpu, g, NULL, &err) : NULL;
    planes[0] = weights;
    s = p ? bnb_tensor_bind(source, planes, &err) : err.code;
    if (!s) s = bnb_ctx_alloc(ctx, cpu, &err);
    if (!s) s = bnb_quantize(env, source, w, BNB_COMPAT_CUDA, &err);
    if (!s) s = bnb_plan_alloc(p, &err);
    if (!s) s = bnb_tensor_write(x, 0, data, sizeof data, &err);
    if (!s) s = bnb_plan_run(p, &err);
    if (!s) s = bnb_tensor_read(y, 0, result, sizeof result, &err);
    for (i = 0; i < 128; i++) sum += s ? 0 : (double)result[i];
    bnb_env_free(env);
    return s ? s : sum;
}

#ifdef __cplusplus
}
#endif
