// load_policy.h: what the loaders (checkpoint.cpp, synthetic.cpp) share: the rule that says what each tensor becomes,
// and the memory that loaded tensors live in.
//
// Not: no files, no arithmetic.
#pragma once

#include <memory>
#include <string>
#include <vector>

#if defined(__GNUC__) && !defined(__clang__) // GCC 12 gives false alarms in <regex> with -fsanitize (its bug 105562)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <regex>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include "arch.h"
#include "checkpoint.h"

namespace bnb {

bool is_plain_float(int32_t type); // f32, f16, bf16

// What one tensor becomes.
struct Target {
    int32_t type = -1;
    int32_t cast = -1; // plain type that its values are rounded to before they are quantized; `type` if that is plain
    bnb_quant quant = {}; // of a quantized type
    bool copy = false;    // the source is this already: its planes are taken as they are
};

// Names of modules as transformers 5 understands them in skip_modules: a pattern matches a name if, as a regular
// expression, it matches the name's first parts, or if the name ends with it.
class ModuleList {
public:
    bool parse(const char *list, const char *option, bnb_error *err); // comma separated; NULL: empty
    bool matches(const Arch &arch, const TensorInfo &info) const;

private:
    struct Pattern {
        std::string text;
        std::regex regex;
    };
    std::vector<Pattern> patterns_;
};

// bnb_load_params made into a rule, which is transformers': linear weights are quantized, but for the head; embeddings,
// norms and biases take rest_type, and so do linear weights before they are quantized.
class LoadPolicy {
public:
    static std::unique_ptr<LoadPolicy> create(const Arch &arch, const bnb_load_params *load, bnb_error *err);

    // stored: the source's type, quant: its description if that is quantized.
    Target target(const TensorInfo &info, int32_t stored, const bnb_quant *quant) const;
    const bnb_load_params &params() const { return params_; }

private:
    explicit LoadPolicy(const Arch &arch) : arch_(arch) {}
    bool check(bnb_error *err) const;
    bool quantizes(const TensorInfo &info) const;
    int32_t plain_type(const TensorInfo &info) const; // of what is not quantized, and before it is; -1: as stored

    const Arch &arch_;
    bnb_load_params params_;
    ModuleList skip_, keep_in_fp32_;
};

// Tensors and their memory: made together, freed together.
class TensorStore {
public:
    static std::shared_ptr<TensorStore> create(bnb_env *env, bnb_error *err);
    ~TensorStore();
    TensorStore(const TensorStore &) = delete;
    TensorStore &operator=(const TensorStore &) = delete;

    void add(const std::string &name, const std::vector<int64_t> &shape, int32_t type, const bnb_quant *quant); // META
    bool status(bnb_error *err) const;                                    // false: an add failed
    bool alloc(bnb_error *err);                                           // gives memory to all of them
    void lock(bnb_env *env);                                              // keeps their pages in memory, if it may
    const std::vector<bnb_tensor *> &tensors() const { return tensors_; } // as they were added

private:
    TensorStore() = default;
    bnb_backend *backend_ = nullptr;
    bnb_ctx *ctx_ = nullptr;
    std::vector<bnb_tensor *> tensors_;
    std::vector<std::pair<void *, uint64_t>> locked_;
};

} // namespace bnb
