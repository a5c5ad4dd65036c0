/* checkpoint.h: Hugging Face directories, safetensors and PyTorch files in, .bnb files out, quantizing on the way.
 *
 * Use:   beside model.h's files compile checkpoint.cpp files.cpp hf_config.cpp load_policy.cpp safetensors.cpp pytorch.cpp
 *        bnb_writer.cpp synthetic.cpp and tokenizer_json.cpp (they need the header nlohmann/json.hpp, Debian's nlohmann-json3-dev).
 * Not:   checkpoints that are already quantized: these come with a later version. */
#ifndef BNB_CHECKPOINT_H
#define BNB_CHECKPOINT_H

#include "model.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What to do with the weights: the counterpart of transformers' BitsAndBytesConfig and accelerate's BnbQuantizationConfig. */
typedef struct bnb_load_params {
    uint32_t struct_size;
    int32_t type;             /* of linear weights: BNB_NF4, BNB_FP4, BNB_INT8, BNB_F16, BNB_BF16, BNB_F32; -1: as stored */
    int32_t rest_type;        /* of everything else; -1: f16 with a quantized type (as transformers does), else `type`    */
    int32_t blocksize;        /* nf4, fp4: 64                                                                             */
    int32_t double_quant;     /* nf4, fp4: 0                                                                              */
    float threshold;          /* int8: 6.0                                                                                */
    int32_t compat;           /* BNB_COMPAT_CUDA, BNB_COMPAT_CPU                                                          */
    int32_t allow_nonfinite;  /* 1: NaN and infinity are quantized as bitsandbytes does; 0: refused by name               */
    const char *skip_modules; /* "a,b": not quantized. NULL: the head; a list replaces that default, as in transformers   */
    const char *keep_in_fp32; /* "a,b": not quantized, kept as f32; NULL: none                                            */
    uint64_t seed;            /* of synthetic weights                                                                     */
} bnb_load_params;

void bnb_load_params_default(bnb_load_params *p, uint32_t struct_size);

/* Opens a .bnb file, a Hugging Face directory, or a file of safetensors or PyTorch with its config.json beside it (minGPT
 * has none). load NULL: as stored. A .bnb is mapped as it is; asking it for another type is an error (BNB_E_UNSUPPORTED) that names ./quantize. */
bnb_model *bnb_model_load(bnb_env *env, const char *path, const bnb_load_params *load, const bnb_model_params *params,
                          bnb_error *err);
/* A known configuration ("opt-125m" .. "opt-175b", "gpt2" .. "gpt2-xl", "gpt-mini", ...) with seeded random weights.
 * meta 1: no memory behind the tensors, to ask what it would need. */
bnb_model *bnb_model_synthetic(bnb_env *env, const char *name, const bnb_load_params *load, int32_t meta,
                               const bnb_model_params *params, bnb_error *err);

typedef struct bnb_convert_result {
    int64_t n_tensors, n_quantized;
    uint64_t bytes_in, bytes_out;
    double seconds;
} bnb_convert_result;

/* Reads src tensor by tensor (at most one tensor and its result are in memory), writes dst.tmp, then renames it: an old
 * dst survives any failure. src may be a .bnb as well. Progress goes to the env's hook as "quantize". */
bnb_status bnb_convert_checkpoint(bnb_env *env, const char *src, const char *dst, const bnb_load_params *load,
                                  bnb_convert_result *result, bnb_error *err);

#ifdef __cplusplus
}
#endif
#endif
