// load_policy.cpp: see load_policy.h.
#include "load_policy.h"

#include <sys/mman.h>

#include <cerrno>
#include <cmath>

#include "files.h"

namespace bnb {

bool is_plain_float(int32_t type) { return type == BNB_F32 || type == BNB_F16 || type == BNB_BF16; }

// ---- module names ---------------------------------------------------------------------------------------------------

static std::string trimmed(const std::string &s) {
    size_t first = s.find_first_not_of(" \t"), last = s.find_last_not_of(" \t");
    return first == std::string::npos ? "" : s.substr(first, last - first + 1);
}

bool ModuleList::parse(const char *list, const char *option, bnb_error *err) {
    constexpr size_t longest = 200; // std::regex recurses: this bounds how deep
    const std::string all = list ? list : "";
    for (size_t at = 0; at < all.size();) {
        size_t comma = std::min(all.find(',', at), all.size());
        const std::string text = trimmed(all.substr(at, comma - at));
        at = comma + 1;
        if (text.empty()) continue;
        if (text.size() > longest)
            return failed(err, BNB_E_LIMIT, "%s: '%s' has more than 200 bytes", option, printable(text).c_str());
        try {
            patterns_.push_back({text, std::regex(text)});
        } catch (const std::regex_error &) {
            return failed(err, BNB_E_ARG, "%s: '%s' is not a regular expression", option, printable(text).c_str());
        }
    }
    return true;
}

// Whether re.match(pattern) succeeds and ends where a part of the name does: "layers.1" is not for "layers.10".
static bool matches_parts(const std::string &name, const std::regex &pattern) {
    for (size_t end = 0; end <= name.size(); end++) {
        const bool boundary = end == name.size() || name[end] == '.' || (end > 0 && name[end - 1] == '.');
        if (boundary && std::regex_match(name.begin(), name.begin() + std::ptrdiff_t(end), pattern)) return true;
    }
    return false;
}

// Patterns are for the names that modules have in PyTorch: "model.decoder.layers.0.fc1" is "layers.0.fc1" here.
bool ModuleList::matches(const Arch &arch, const TensorInfo &info) const {
    const std::string module = info.name.substr(0, info.name.rfind('.')); // less ".weight" or ".bias"
    const std::string full = info.role == Role::Head || !arch.prefixes[0] ? module : arch.prefixes[0] + module;
    for (const Pattern &p : patterns_) {
        if (full.size() >= p.text.size() && full.compare(full.size() - p.text.size(), p.text.size(), p.text) == 0)
            return true;
        if (matches_parts(full, p.regex)) return true;
    }
    return false;
}

// ---- policy ---------------------------------------------------------------------------------------------------------

std::unique_ptr<LoadPolicy> LoadPolicy::create(const Arch &arch, const bnb_load_params *load, bnb_error *err) {
    std::unique_ptr<LoadPolicy> p(new LoadPolicy(arch));
    p->params_ = params_read(load, bnb_load_params_default);
    if (!p->check(err) || !p->skip_.parse(p->params_.skip_modules, "skip_modules", err) ||
        !p->keep_in_fp32_.parse(p->params_.keep_in_fp32, "keep_in_fp32", err))
        return nullptr;
    return p;
}

bool LoadPolicy::check(bnb_error *err) const {
    const bnb_load_params &p = params_;
    bnb_quant q = bnb_quant_default(BNB_NF4);
    q.blocksize = p.blocksize;
    const int64_t shape[] = {1, 1};
    if (p.type != -1 && !is_plain_float(p.type) && !bnb_type_is_quantized(p.type))
        return failed(err, BNB_E_ARG,
                      "weights cannot be loaded as type %d: f32, f16, bf16, int8, nf4 and fp4 are offered",
                      static_cast<int>(p.type));
    if (p.rest_type != -1 && !is_plain_float(p.rest_type))
        return failed(err, BNB_E_ARG, "what is not quantized can be f32, f16 or bf16, not type %d",
                      static_cast<int>(p.rest_type));
    if (bnb_plane_bytes(BNB_NF4, &q, 2, shape, 0) == UINT64_MAX)
        return failed(err, BNB_E_ARG, "the blocksize is %d, not a power of two from 32 to 4096",
                      static_cast<int>(p.blocksize));
    if (p.double_quant != 0 && p.double_quant != 1)
        return failed(err, BNB_E_ARG, "double_quant is %d, not 0 or 1", static_cast<int>(p.double_quant));
    if (!(p.threshold >= 0) || std::isinf(p.threshold))
        return failed(err, BNB_E_ARG, "the outlier threshold is %g, not a number from 0 on",
                      static_cast<double>(p.threshold));
    if (p.compat != BNB_COMPAT_CUDA && p.compat != BNB_COMPAT_CPU)
        return failed(err, BNB_E_ARG, "compat is %d, not BNB_COMPAT_CUDA or BNB_COMPAT_CPU",
                      static_cast<int>(p.compat));
    return true;
}

// A list of modules to skip replaces the default, which is the head: a head with a matrix of its own is then quantized
// unless it is on the list. A tied head is the embedding, which never is (nor is it in transformers).
bool LoadPolicy::quantizes(const TensorInfo &info) const {
    bool candidate = info.role == Role::Linear || (info.role == Role::Head && params_.skip_modules);
    return bnb_type_is_quantized(params_.type) && candidate && !skip_.matches(arch_, info) &&
           !keep_in_fp32_.matches(arch_, info);
}

int32_t LoadPolicy::plain_type(const TensorInfo &info) const {
    if (keep_in_fp32_.matches(arch_, info)) return BNB_F32;
    bool quantized = bnb_type_is_quantized(params_.type);
    if (info.role == Role::Linear && !quantized) return params_.type;
    return params_.rest_type >= 0 ? params_.rest_type : quantized ? BNB_F16 : params_.type;
}

Target LoadPolicy::target(const TensorInfo &info, int32_t stored, const bnb_quant *quant) const {
    Target t;
    const int32_t plain = plain_type(info);
    const bool as_stored = plain < 0;
    t.cast = as_stored ? stored : plain;
    t.type = quantizes(info) ? params_.type : t.cast;
    if (!bnb_type_is_quantized(t.type)) return t;
    t.quant = bnb_quant_default(t.type);
    t.quant.blocksize = params_.blocksize;
    t.quant.double_quant = params_.double_quant;
    t.quant.dtype = t.cast;
    const bool same = bnb_type_bits(t.type) != 4 ||
                      (quant && quant->blocksize == t.quant.blocksize && quant->double_quant == t.quant.double_quant);
    t.copy = stored == t.type && (as_stored || same);
    if (t.copy) t.quant = *quant;
    if (t.type == BNB_INT8 && !as_stored) t.quant.threshold = params_.threshold;
    return t;
}

// ---- tensors --------------------------------------------------------------------------------------------------------

std::shared_ptr<TensorStore> TensorStore::create(bnb_env *env, bnb_error *err) {
    std::shared_ptr<TensorStore> s(new TensorStore);
    s->backend_ = bnb_backend_open(env, "cpu", err);
    s->ctx_ = s->backend_ ? bnb_ctx_create(env, err) : nullptr;
    if (!s->ctx_) s.reset();
    return s;
}

TensorStore::~TensorStore() {
    for (const auto &l : locked_) munlock(l.first, size_t(l.second));
    bnb_ctx_free(ctx_); // before the backend that its memory is from
    bnb_backend_close(backend_);
}

void TensorStore::add(const std::string &name, const std::vector<int64_t> &shape, int32_t type,
                      const bnb_quant *quant) {
    tensors_.push_back(bnb_tensor_new(ctx_, type, quant, int32_t(shape.size()), shape.data(), name.c_str()));
}

bool TensorStore::status(bnb_error *err) const { return bnb_ctx_status(ctx_, err) == BNB_OK; }

bool TensorStore::alloc(bnb_error *err) { return bnb_ctx_alloc(ctx_, backend_, err) == BNB_OK; }

void TensorStore::lock(bnb_env *env) {
    for (const bnb_tensor *t : tensors_)
        for (int32_t p = 0; p < BNB_MAX_PLANES; p++) {
            const uint64_t bytes = bnb_plane_bytes(t->type, &t->quant, t->n_dims, t->shape, p);
            if (bytes == 0) continue;
            if (mlock(t->plane[p], size_t(bytes)) != 0)
                return bnb_log(env, BNB_LOG_WARN, "the weights cannot be locked in memory: %s (see ulimit -l)",
                               strerror(errno));
            locked_.emplace_back(t->plane[p], bytes);
        }
}

} // namespace bnb
