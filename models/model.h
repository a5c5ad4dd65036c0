/* model.h: a language model and a conversation with it. C and C++ programs start here.
 *
 * Use:   compile bnb.c (C11) and model.cpp gpt2.cpp opt.cpp tokenizer.cpp sampler.cpp (C++17); link with -lm -pthread.
 *        That is all a program needs that runs .bnb files; examples/embed is the smallest one.
 *        Hugging Face directories and quantizing: checkpoint.h.
 * Not:   no chat templates, no networking.
 *
 * A model is immutable and may be shared by threads; a session is one conversation with its KV cache and belongs to
 * one thread at a time. Functions that can fail take a bnb_error (see bnb.h). Everything is freed by its owner:
 * bnb_model_free after its sessions, bnb_env_free last. */
#ifndef BNB_MODEL_H
#define BNB_MODEL_H

#include "../bnb.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct bnb_model bnb_model;
typedef struct bnb_session bnb_session;

/* ---- model --------------------------------------------------------------------------------------------------------*/

typedef struct bnb_model_params {
    uint32_t struct_size;
    int32_t no_mmap;       /* 1: read the file into memory instead of mapping it                                     */
    int32_t mlock;         /* 1: keep the pages in memory                                                            */
    int32_t compute_dtype; /* BNB_COMPUTE_AUTO, BNB_F32; BNB_BF16 on a CPU, BNB_F16 on a GPU                         */
    int32_t kv_type;       /* of the KV cache: BNB_F16, BNB_F32, BNB_INT8_KV; -1: f32 if the weights are f32, else f16 */
    int32_t n_batch;       /* prompt tokens evaluated at once; 0: 512, on a GPU 2048                                 */
    float threshold;       /* int8 outlier threshold; negative: the file's                                           */
    int32_t outlier_rule;  /* BNB_OUTLIER_*; -1: the file's                                                          */
    const char *device;    /* "cpu", "cuda", "cuda:1", "hip"; NULL, "auto": the first GPU that works, else the CPU   */
} bnb_model_params;

typedef struct bnb_model_info {
    uint32_t struct_size;
    char arch[32];                                    /* "gpt2", "opt" */
    int64_t n_vocab, n_ctx, n_embd, n_layer, n_head;  /* n_ctx: the longest context it was trained for               */
    int64_t n_params;                                 /* weights, a tied head counted once                           */
    uint64_t weight_bytes;                            /* all planes of all tensors                                   */
    uint64_t footprint;                               /* what get_memory_footprint() of transformers counts          */
    int32_t linear_type;                              /* type of most linear weights                                 */
    int32_t has_tokenizer;
} bnb_model_info;

void bnb_model_params_default(bnb_model_params *params, uint32_t struct_size);
bnb_model *bnb_model_open(bnb_env *env, const char *path, const bnb_model_params *params, bnb_error *err); /* a .bnb file */
bnb_model *bnb_model_from_memory(bnb_env *env, const void *data, uint64_t bytes, const bnb_model_params *params,
                                 bnb_error *err); /* the bytes of a .bnb; they stay the caller's */
void bnb_model_free(bnb_model *model);
void bnb_model_get_info(const bnb_model *model, bnb_model_info *info); /* info->struct_size is set by the caller */
bnb_env *bnb_model_env(const bnb_model *model);
bnb_backend *bnb_model_backend(const bnb_model *model); /* the device that it runs on; the model's */
const char *bnb_model_compute(const bnb_model *model); /* "f32", "f32, bf16 for prompts", "bf16": what linear layers multiply */
/* Bytes that a session of n_ctx tokens would need, without reading or allocating any weight. */
bnb_status bnb_model_memory(const bnb_model *model, int64_t n_ctx, bnb_memory *out, bnb_error *err);
int32_t bnb_model_tensor_count(const bnb_model *model);
const bnb_tensor *bnb_model_tensor(const bnb_model *model, int32_t i);

/* ---- text ---------------------------------------------------------------------------------------------------------*/

enum {
    BNB_TOKENIZE_SPECIAL = 1,       /* add what the model wants at the start (OPT: </s>)                             */
    BNB_TOKENIZE_PARSE_SPECIAL = 2, /* "<|endoftext|>" in the text is the token, not nine pieces                     */
    BNB_TOKENIZE_RAW_BYTES = 4      /* keep ill-formed UTF-8 as bytes instead of U+FFFD                              */
};

/* Writes at most cap ids; returns how many the text has (may exceed cap), or a negative bnb_status. */
int64_t bnb_tokenize(const bnb_model *model, const char *text, size_t bytes, uint32_t flags, int32_t *ids, int64_t cap,
                     bnb_error *err);
const char *bnb_token_bytes(const bnb_model *model, int32_t id, size_t *bytes); /* "" for unknown ids; not UTF-8 by itself */
int32_t bnb_model_bos(const bnb_model *model);                    /* what an empty prompt starts with; -1: none       */
int32_t bnb_model_is_eos(const bnb_model *model, int32_t id);     /* 1: generation ends here                          */

/* ---- session ------------------------------------------------------------------------------------------------------*/

bnb_session *bnb_session_create(bnb_model *model, int64_t n_ctx, bnb_error *err); /* n_ctx 0: the model's own          */
/* n_seq conversations of n_ctx tokens each, which bnb_generate_batch continues together; the other functions see the
 * first one. */
bnb_session *bnb_session_create_batch(bnb_model *model, int64_t n_ctx, int32_t n_seq, bnb_error *err);
void bnb_session_free(bnb_session *s);
/* Makes tokens [n] the conversation: what it shares with the present one is kept, the rest is evaluated. Afterwards
 * bnb_session_logits are those after the last token. On failure the session holds the part that was evaluated. */
bnb_status bnb_session_sync(bnb_session *s, const int32_t *tokens, int64_t n, bnb_error *err);
const float *bnb_session_logits(const bnb_session *s, int64_t *n_vocab); /* f32 [n_vocab]; valid until the next call   */
/* Evaluates tokens [n] from an empty cache and writes the logits after each of them: f32 [n, n_vocab]. */
bnb_status bnb_session_logits_all(bnb_session *s, const int32_t *tokens, int64_t n, float *logits, bnb_error *err);
int64_t bnb_session_n_ctx(const bnb_session *s);
bnb_backend *bnb_session_backend(const bnb_session *s); /* the model's device once more, for the session's thread */
const int32_t *bnb_session_tokens(const bnb_session *s, int64_t *n); /* the conversation */
void bnb_session_memory(const bnb_session *s, bnb_memory *out);
/* Where the time of one more token goes: evaluates it (again) with every node timed, and writes a line per kernel:
 * microseconds, calls, name. At most cap bytes with the NUL; *length: what all of it needs. The conversation must not
 * be empty and is not changed. */
bnb_status bnb_session_profile(bnb_session *s, char *out, size_t cap, size_t *length, bnb_error *err);

/* ---- sampling -----------------------------------------------------------------------------------------------------*/

typedef struct bnb_sampling {
    uint32_t struct_size;
    float temp;           /* 0: greedy, the largest logit, the lowest id on a tie            */
    int32_t top_k;        /* 0: off                                                          */
    float top_p, min_p;   /* 1 and 0: off                                                    */
    float repeat_penalty; /* 1: off; on the last repeat_last_n tokens, -1: all               */
    int32_t repeat_last_n;
    uint64_t seed;        /* the draw for a step depends on (seed, step) and the logits only */
} bnb_sampling;

void bnb_sampling_default(bnb_sampling *s, uint32_t struct_size); /* llama.cpp's: 0.8, 40, 0.95, 0.05, 1.0, 64 */
/* Order: penalty, top-k, top-p, min-p, temperature (llama.cpp's). Returns a token id, or a negative bnb_status:
 * BNB_E_NUMERIC if a logit is NaN. */
int32_t bnb_sample(const float *logits, int64_t n_vocab, const bnb_sampling *params, const int32_t *history,
                   int64_t n_history, uint64_t step, bnb_error *err);

/* ---- generation ---------------------------------------------------------------------------------------------------*/

enum { BNB_STOP_LENGTH = 0, BNB_STOP_EOS = 1, BNB_STOP_STRING = 2, BNB_STOP_CALLER = 3, BNB_STOP_CONTEXT = 4 };

typedef struct bnb_generate_params {
    uint32_t struct_size;
    bnb_sampling sampling;
    int64_t n_predict;                                       /* tokens; -1: until the context is full                */
    int32_t ignore_eos;
    int32_t n_stop;
    const char *const *stop;                                 /* [n_stop] strings that end generation; not emitted    */
    int32_t (*on_text)(void *user, const char *utf8, size_t bytes); /* whole characters; return 0 to stop. May be NULL */
    void *user;
} bnb_generate_params;

typedef struct bnb_generate_result {
    int64_t n_prompt, n_reused;  /* tokens; reused: found in the session's cache */
    int64_t n_generated;
    double prompt_s, generate_s; /* seconds */
    int32_t stop_reason;         /* BNB_STOP_* */
} bnb_generate_result;

void bnb_generate_params_default(bnb_generate_params *p, uint32_t struct_size);
bnb_status bnb_generate(bnb_session *s, const int32_t *prompt, int64_t n_prompt, const bnb_generate_params *params,
                        bnb_generate_result *result, bnb_error *err);
/* Greedy: continues every sequence of the session, from an empty cache, by n_predict tokens, whatever they are.
 * prompts: [n_seq] of [n_prompt[i]]; out: i32 [n_seq, n_predict]. */
bnb_status bnb_generate_batch(bnb_session *s, const int32_t *const *prompts, const int64_t *n_prompt, int64_t n_predict, int32_t *out,
                              bnb_generate_result *result, bnb_error *err);

#ifdef __cplusplus
}
#endif
#endif
