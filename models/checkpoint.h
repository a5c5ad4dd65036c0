/* checkpoint.h: Hugging Face directories, safetensors and PyTorch files in, .bnb files and Hugging Face directories
 * out, quantizing on the way.
 *
 * Use:   beside model.h's files compile checkpoint.cpp files.cpp hf_config.cpp load_policy.cpp safetensors.cpp
 *        pytorch.cpp quant_state.cpp bnb_writer.cpp hf_writer.cpp synthetic.cpp and tokenizer_json.cpp (they need the header
 *        nlohmann/json.hpp, Debian's nlohmann-json3-dev).
 * Not:   checkpoints that others than bitsandbytes quantized (GPTQ, AWQ, ...), adapters, GGUF. */
#ifndef BNB_CHECKPOINT_H
#define BNB_CHECKPOINT_H

#include "model.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What was read and made, and the time that took. */
typedef struct bnb_convert_result {
    int64_t n_tensors, n_quantized;
    uint64_t bytes_in, bytes_out;
    double seconds;            /* all of it                                                                           */
    double read_s, quantize_s; /* of that: until the weights were in memory, until they were in the form asked for     */
} bnb_convert_result;

/* What to do with the weights: the counterpart of transformers' BitsAndBytesConfig and accelerate's
 * BnbQuantizationConfig. load_in_8bit, load_in_4bit and bnb_4bit_quant_type are `type`, torch_dtype is `rest_type`,
 * keep_in_fp32_modules is keep_in_fp32; bnb_4bit_compute_dtype is bnb_model_params.compute_dtype. In transformers 5 the
 * default of rest_type is the checkpoint's own type, in transformers 4 and accelerate it is f16, as here. Modules are
 * matched as transformers does: by a regular expression for the first parts of the name, or by the name's end
 * (accelerate also takes a part in the middle: ".*self_attn"). */
typedef struct bnb_load_params {
    uint32_t struct_size;
    int32_t type;             /* of linear weights: BNB_NF4, BNB_FP4, BNB_INT8, BNB_F16, BNB_BF16, BNB_F32; -1: as stored */
    int32_t rest_type;        /* of everything else; -1: f16 with a quantized type, else `type` */
    int32_t blocksize;        /* nf4, fp4: 64 */
    int32_t double_quant;     /* nf4, fp4: 0 */
    float threshold;          /* int8: 6.0 */
    int32_t compat;           /* BNB_COMPAT_CUDA, BNB_COMPAT_CPU */
    int32_t allow_nonfinite;  /* 1: NaN and infinity are quantized as bitsandbytes does; 0: refused by name */
    const char *skip_modules; /* "a,b": not quantized. NULL: the head; a list replaces that default, as in transformers */
    const char *keep_in_fp32; /* "a,b": not quantized, kept as f32; NULL: none */
    uint64_t seed;            /* of synthetic weights */
    int32_t check;            /* 1: compare the checksums of .bnb and PyTorch files first */
    bnb_convert_result *result; /* bnb_model_load: NULL, or where it says what it did */
} bnb_load_params;

void bnb_load_params_default(bnb_load_params *p, uint32_t struct_size);

/* Opens a .bnb file, a Hugging Face directory, or a file of safetensors or PyTorch with its config.json beside it (minGPT
 * has none). load NULL: as stored. Tensors that need no change stay in the mapped files, unless params says no_mmap. A
 * .bnb and what bitsandbytes quantized are taken as they are; asking them for another quantized type, or a .bnb for any
 * other type, is an error (BNB_E_UNSUPPORTED) that names ./quantize. */
bnb_model *bnb_model_load(bnb_env *env, const char *path, const bnb_load_params *load, const bnb_model_params *params,
                          bnb_error *err);
/* A known configuration ("opt-125m" .. "opt-175b", "gpt2" .. "gpt2-xl", "gpt-mini", ...) with seeded random weights.
 * meta 1: no memory behind the tensors, to ask what it would need. */
bnb_model *bnb_model_synthetic(bnb_env *env, const char *name, const bnb_load_params *load, int32_t meta,
                               const bnb_model_params *params, bnb_error *err);

enum { BNB_FORMAT_BNB = 0, BNB_FORMAT_HF = 1 };

typedef struct bnb_save_params {
    uint32_t struct_size;
    int32_t format;       /* BNB_FORMAT_BNB: a file; BNB_FORMAT_HF: a directory for transformers and bitsandbytes     */
    uint64_t shard_bytes; /* BNB_FORMAT_HF: more weights than this go to several files: 5e9                           */
} bnb_save_params;

void bnb_save_params_default(bnb_save_params *p, uint32_t struct_size);

/* Reads src tensor by tensor (at most one tensor and its result are in memory), writes beside dst, then renames it: an
 * old file dst survives any failure; a directory dst must be new or empty. src may be a .bnb as well; load NULL: as stored,
 * which loses nothing either way. Progress goes to the env's hook as "quantize". */
bnb_status bnb_convert_checkpoint(bnb_env *env, const char *src, const char *dst, const bnb_load_params *load,
                                  const bnb_save_params *save, bnb_convert_result *result, bnb_error *err);

#ifdef __cplusplus
}
#endif
#endif
