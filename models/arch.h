// arch.h: what models/ shares inside: the configuration, the card that describes an architecture, and the seam between
// where weights come from (.bnb, Hugging Face, synthetic) and the model that uses them.
//
// To add an architecture: write one file with an Arch card and list it in model.cpp (ARCHS). Nothing else changes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <unordered_map>
#include <vector>

#include "model.h"
#include "tokenizer.h"

namespace bnb {

// Parameter structs grow at their end: a caller's may be shorter or longer than ours.
template <class T> void params_write(T *out, uint32_t struct_size, const T &value) {
    std::memcpy(static_cast<void *>(out), &value, std::min<size_t>(struct_size, sizeof value));
}
template <class T> T params_read(const T *given, void (*defaults)(T *, uint32_t)) {
    T p;
    defaults(&p, sizeof p);
    if (given) std::memcpy(static_cast<void *>(&p), given, std::min<size_t>(given->struct_size, sizeof p));
    return p;
}

// What of the sampling settings is a draw: all but the repetition penalty.
bnb_draw_rule draw_rule(const bnb_sampling &sampling);

inline std::string shape_text(const std::vector<int64_t> &shape) { // "[2, 3]"
    std::string s = "[";
    for (size_t i = 0; i < shape.size(); i++) s += (i ? ", " : "") + std::to_string(shape[i]);
    return s + "]";
}

// The border between C++ and the C API: nothing is thrown across it.
template <class F, class R> R guarded(bnb_error *err, R on_failure, F f) {
    try {
        return f();
    } catch (const std::bad_alloc &) {
        bnb_fail(err, BNB_E_NOMEM, "out of memory");
    } catch (const std::exception &e) {
        bnb_fail(err, BNB_E_FORMAT, "%s", e.what());
    }
    return on_failure;
}

// Everything that decides a network's shape and arithmetic. fields() is the one list of what a .bnb stores and what a
// Hugging Face config.json may set; a new field is one line there (old files keep its default).
struct Config {
    std::string arch;                 // name of the Arch card
    int64_t n_vocab = 0;              // rows of the token embedding
    int64_t n_ctx = 0;                // longest context (rows of the position table, less any offset)
    int64_t n_embd = 0, n_layer = 0, n_head = 0;
    int64_t n_head_kv = 0;            // 0: n_head
    int64_t n_ff = 0;                 // 0: 4 n_embd
    int64_t n_embd_word = 0;          // width of the token embedding; 0: n_embd (OPT-350m: 512)
    double norm_eps = 1e-5;
    std::string act;                  // gelu, gelu_tanh, relu, silu
    bool norm_before = true;          // OPT: pre-norm (all but 350m)
    bool norm_final = true;           // a norm after the last layer
    bool norm_affine = true;          // norms have weight and bias
    bool bias = true;                 // linear layers have a bias
    bool tied = true;                 // the head is the token embedding
    bool scale_attn = true;           // scores / sqrt(D)
    bool scale_attn_by_layer = false; // scores / (layer + 1) as well
    int64_t bos = -1, pad = -1;
    std::vector<int64_t> eos;
    double temperature = -1, top_p = -1, repetition_penalty = -1; // generation_config.json; negative: not given
    int64_t top_k = -1;
    bool do_sample = false;

    template <class Visitor> void fields(Visitor &&v) {
        v("n_vocab", n_vocab);
        v("n_ctx", n_ctx);
        v("n_embd", n_embd);
        v("n_layer", n_layer);
        v("n_head", n_head);
        v("n_head_kv", n_head_kv);
        v("n_ff", n_ff);
        v("n_embd_word", n_embd_word);
        v("norm_eps", norm_eps);
        v("act", act);
        v("norm_before", norm_before);
        v("norm_final", norm_final);
        v("norm_affine", norm_affine);
        v("bias", bias);
        v("tied", tied);
        v("scale_attn", scale_attn);
        v("scale_attn_by_layer", scale_attn_by_layer);
        v("bos", bos);
        v("pad", pad);
        v("eos", eos);
        v("temperature", temperature);
        v("top_p", top_p);
        v("repetition_penalty", repetition_penalty);
        v("top_k", top_k);
        v("do_sample", do_sample);
    }
};

// What a tensor is for decides whether it is quantized and how much it is copied.
enum class Role { Linear, Head, Embedding, Norm, Bias };

struct TensorInfo {
    std::string name;           // canonical: Hugging Face's without prefix, in [out, in] layout
    std::vector<int64_t> shape; // outermost first
    Role role;
    bool optional = false;
};

using Weights = std::unordered_map<std::string, bnb_tensor *>;

// What a graph is built from: T tokens of one or more conversations, whose logits are wanted for n_out of them.
struct Build {
    bnb_ctx *ctx;
    const Config &config;
    const Weights &weights;
    bnb_tensor *ids, *positions; // i32 [T]
    bnb_tensor *rows;            // i32 [T]: the cache row that each token writes
    bnb_tensor *span;            // i32 [T, 2]: the cache rows that each token sees
    bnb_tensor *out;             // i32 [n_out]: tokens whose logits are wanted; NULL: all
    const std::vector<bnb_tensor *> &k_cache, &v_cache; // [n_layer] of [R, n_head_kv * D]

    bnb_tensor *weight(const std::string &name) const; // NULL: absent
    // Shared by architectures; prefix is the tensor's name without ".weight".
    bnb_tensor *embed(const char *name, bnb_tensor *ids) const;
    bnb_tensor *norm(bnb_tensor *x, const std::string &prefix) const;
    bnb_tensor *linear(bnb_tensor *x, const std::string &prefix) const;
    bnb_tensor *act(bnb_tensor *x) const;
    bnb_tensor *attend(int64_t layer, bnb_tensor *q, bnb_tensor *k, bnb_tensor *v) const; // writes the cache, then attends
    bnb_tensor *pick(bnb_tensor *x) const;                                                // the rows in `out`
    bnb_tensor *head(bnb_tensor *x, const char *tied_to) const;                           // lm_head, or the embedding
};

// config.json key -> Config field; "!field": its negation. Of several keys for a field, the last one found counts and the
// last one in the list is written.
struct HfKey { const char *hf, *field; };
struct Preset {
    const char *name;
    int64_t n_layer, n_head, n_embd, n_vocab, n_ctx, n_embd_word;
    bool norm_before, tied;
};

struct Arch {
    const char *name;                                        // also config.json's model_type
    const char *hf_class;                                    // config.json's architectures
    const char *const *prefixes;                             // stripped from tensor names, first match; NULL-terminated
    const char *const *ignored;                              // name suffixes of tensors that carry no weights; NULL-terminated
    const HfKey *hf_keys;                                    // NULL-terminated
    const Preset *presets;                                   // for --synthetic; NULL-terminated
    const char *signature;                                   // a tensor-name suffix that only this architecture has
    int64_t position_offset;                                 // of the position table's rows (OPT: 2)
    void (*defaults)(Config &);                              // before config.json is read
    std::vector<TensorInfo> (*tensors)(const Config &);      // the whole network, in file order
    bool (*may_be_transposed)(const std::string &name);      // GPT-2's Conv1D: stored [in, out]
    bnb_tensor *(*build)(const Build &);                     // -> logits f32 [n_out, n_vocab]
};

extern const Arch gpt2_arch, opt_arch;
const Arch *arch_find(const std::string &name); // NULL: unknown
const Arch *const *arch_list();                 // NULL-terminated
// Fills derived fields (n_ff, n_head_kv, ...) and checks every range, so that shapes cannot overflow later.
bool config_finish(Config &config, bnb_error *err);
// The configuration of a preset ("opt-125m", "gpt2-xl"); false: no such name. preset_names lists them, comma separated.
bool config_preset(const std::string &name, Config *config);
std::string preset_names();

// The seam: a ready set of weights becomes a model. `keep` owns whatever the tensors live in (a mapped file, a ctx).
struct ModelSource {
    Config config;
    std::vector<bnb_tensor *> tensors; // RESIDENT; META to ask for memory only, or if `numbers` has their values
    // For a GPU, which quantizes on its own: makes the plain numbers of a META tensor, for as long as `use` takes.
    std::function<bool(const bnb_tensor *t, const std::function<bool(const bnb_tensor *plain)> &use, bnb_error *err)> numbers;
    std::shared_ptr<void> keep;
    std::unique_ptr<Tokenizer> tokenizer; // may be null
};
bnb_model *model_create(bnb_env *env, ModelSource source, const bnb_model_params *params, bnb_error *err);
const Config &model_config(const bnb_model *model);
const Tokenizer *model_tokenizer(const bnb_model *model);

// Everything a .bnb holds beside tensors, by key: "general.arch", "config.n_embd", ... The same visitor reads and writes.
bool config_from_file(const bnb_file *file, Config *config, bnb_error *err);

} // namespace bnb
