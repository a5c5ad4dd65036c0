// model.cpp: the C API of model.h: a model from its weights, a session with its KV cache, generation.
//
// Build: c++ -std=c++17 -O2 -c model.cpp
// Not:   no file format but .bnb (checkpoint.cpp reads the others), no batch of several sequences yet.
#include <chrono>
#include <cmath>
#include <list>

#include "arch.h"

namespace bnb {

// ---- architectures: one line each ------------------------------------------------------------------------------------

static const Arch *const ARCHS[] = {
    &gpt2_arch,
    &opt_arch,
    nullptr,
};

const Arch *const *arch_list() { return ARCHS; }

const Arch *arch_find(const std::string &name) {
    for (const Arch *const *a = ARCHS; *a; a++)
        if (name == (*a)->name) return *a;
    return nullptr;
}

// ---- configuration ---------------------------------------------------------------------------------------------------

namespace {

struct Activation {
    const char *name, *means;
    bnb_tensor *(*op)(bnb_ctx *, bnb_tensor *);
};
const Activation ACTIVATIONS[] = {
    {"gelu_tanh", "gelu_tanh", bnb_gelu_tanh},
    {"gelu_new", "gelu_tanh", bnb_gelu_tanh},
    {"gelu_pytorch_tanh", "gelu_tanh", bnb_gelu_tanh},
    {"gelu_fast", "gelu_tanh", bnb_gelu_tanh},
    {"gelu", "gelu", bnb_gelu},
    {"relu", "relu", bnb_relu},
    {"silu", "silu", bnb_silu},
    {"swish", "silu", bnb_silu},
};

const Activation *activation_find(const std::string &name) {
    for (const Activation &a : ACTIVATIONS)
        if (name == a.name) return &a;
    return nullptr;
}

} // namespace

bool config_finish(Config &c, bnb_error *err) {
    if (!arch_find(c.arch)) {
        std::string known;
        for (const Arch *const *a = ARCHS; *a; a++) known += (known.empty() ? "" : ", ") + std::string((*a)->name);
        bnb_fail(err, BNB_E_UNSUPPORTED, "the architecture '%.60s' is not one of those that run here: %s", c.arch.c_str(), known.c_str());
        return false;
    }
    if (c.n_head_kv == 0) c.n_head_kv = c.n_head;
    if (c.n_ff == 0 && c.n_embd < INT32_MAX) c.n_ff = 4 * c.n_embd;
    if (c.n_embd_word == 0) c.n_embd_word = c.n_embd;
    // Ten times the largest model known, and small enough that no product of two can overflow.
    const struct { const char *name; int64_t value, most; } ranges[] = {
        {"n_vocab", c.n_vocab, 1 << 24},        {"n_ctx", c.n_ctx, 1 << 24}, {"n_embd", c.n_embd, 1 << 20},
        {"n_layer", c.n_layer, 1 << 12},        {"n_head", c.n_head, 1 << 14}, {"n_head_kv", c.n_head_kv, 1 << 14},
        {"n_ff", c.n_ff, 1 << 22},              {"n_embd_word", c.n_embd_word, 1 << 20},
    };
    for (auto &r : ranges)
        if (r.value < 1 || r.value > r.most) {
            bnb_fail(err, BNB_E_FORMAT, "the configuration says %s = %lld, not 1 to %lld", r.name, static_cast<long long>(r.value), static_cast<long long>(r.most));
            return false;
        }
    if (c.n_embd % c.n_head || c.n_head % c.n_head_kv) {
        bnb_fail(err, BNB_E_FORMAT, "the configuration says %lld heads (%lld for keys) for a width of %lld, which do not divide",
                 static_cast<long long>(c.n_head), static_cast<long long>(c.n_head_kv), static_cast<long long>(c.n_embd));
        return false;
    }
    const Activation *a = activation_find(c.act);
    if (!a) {
        bnb_fail(err, BNB_E_UNSUPPORTED, "the activation function '%.40s' is not offered", c.act.c_str());
        return false;
    }
    c.act = a->means;
    if (!(c.norm_eps > 0 && c.norm_eps < 1)) {
        bnb_fail(err, BNB_E_FORMAT, "the configuration says norm_eps = %g", c.norm_eps);
        return false;
    }
    return true;
}

bool config_preset(const std::string &name, Config *config) {
    for (const Arch *const *a = ARCHS; *a; a++)
        for (const Preset *p = (*a)->presets; p->name; p++) {
            if (name != p->name) continue;
            Config c;
            c.arch = (*a)->name;
            (*a)->defaults(c);
            c.n_layer = p->n_layer;
            c.n_head = p->n_head;
            c.n_embd = p->n_embd;
            c.n_vocab = p->n_vocab;
            c.n_ctx = p->n_ctx;
            c.n_embd_word = p->n_embd_word;
            c.norm_before = p->norm_before;
            c.tied = p->tied;
            *config = c;
            return true;
        }
    return false;
}

std::string preset_names() {
    std::string s;
    for (const Arch *const *a = ARCHS; *a; a++)
        for (const Preset *p = (*a)->presets; p->name; p++) s += (s.empty() ? "" : ", ") + std::string(p->name);
    return s;
}

namespace {

// Config::fields visitor: reads what the file has, leaves the rest at its default.
struct FileReader {
    const bnb_file *file;
    std::string key(const char *name) const { return std::string("config.") + name; }
    void operator()(const char *name, int64_t &v) const { bnb_file_i64(file, key(name).c_str(), &v); }
    void operator()(const char *name, double &v) const { bnb_file_f64(file, key(name).c_str(), &v); }
    void operator()(const char *name, bool &v) const {
        int64_t i;
        if (!bnb_file_i64(file, key(name).c_str(), &i)) v = i != 0;
    }
    void operator()(const char *name, std::string &v) const {
        uint64_t n;
        if (const char *s = bnb_file_str(file, key(name).c_str(), &n)) v.assign(s, n);
    }
    void operator()(const char *name, std::vector<int64_t> &v) const {
        uint64_t n;
        if (const int64_t *s = bnb_file_i64_array(file, key(name).c_str(), &n)) v.assign(s, s + n);
    }
};

} // namespace

bool config_from_file(const bnb_file *file, Config *config, bnb_error *err) {
    uint64_t n;
    const char *arch = bnb_file_str(file, "general.arch", &n);
    if (!arch) {
        bnb_fail(err, BNB_E_FORMAT, "the file does not say which architecture it holds (key general.arch)");
        return false;
    }
    config->arch.assign(arch, n);
    if (const Arch *a = arch_find(config->arch)) a->defaults(*config);
    config->fields(FileReader{file});
    return config_finish(*config, err);
}

// ---- graph building --------------------------------------------------------------------------------------------------

bnb_tensor *Build::weight(const std::string &name) const {
    auto it = weights.find(name);
    return it == weights.end() ? nullptr : it->second;
}

bnb_tensor *Build::embed(const char *name, bnb_tensor *which) const { return bnb_embed(ctx, weight(name), which); }

bnb_tensor *Build::norm(bnb_tensor *x, const std::string &prefix) const {
    return bnb_layer_norm(ctx, x, weight(prefix + ".weight"), weight(prefix + ".bias"), static_cast<float>(config.norm_eps));
}

bnb_tensor *Build::linear(bnb_tensor *x, const std::string &prefix) const {
    return bnb_linear(ctx, x, weight(prefix + ".weight"), weight(prefix + ".bias"));
}

bnb_tensor *Build::act(bnb_tensor *x) const { return activation_find(config.act)->op(ctx, x); }

bnb_tensor *Build::attend(int64_t layer, bnb_tensor *q, bnb_tensor *k, bnb_tensor *v) const {
    double scale = config.scale_attn ? 1 / std::sqrt(static_cast<double>(config.n_embd / config.n_head)) : 1;
    if (config.scale_attn_by_layer) scale /= static_cast<double>(layer + 1);
    size_t i = static_cast<size_t>(layer);
    return bnb_attention(ctx, q, bnb_set_rows(ctx, k_cache[i], k, rows), bnb_set_rows(ctx, v_cache[i], v, rows), span,
                         static_cast<int32_t>(config.n_head), static_cast<int32_t>(config.n_head_kv), static_cast<float>(scale));
}

bnb_tensor *Build::pick(bnb_tensor *x) const { return out ? bnb_embed(ctx, x, out) : x; }

bnb_tensor *Build::head(bnb_tensor *x, const char *tied_to) const {
    bnb_tensor *w = weight("lm_head.weight");
    return bnb_linear(ctx, x, w ? w : weight(tied_to), nullptr);
}

} // namespace bnb

// ---- model -----------------------------------------------------------------------------------------------------------

using bnb::guarded;

struct bnb_model {
    bnb_env *env;
    bnb::ModelSource source;
    const bnb::Arch *arch;
    bnb::Weights weights;
    bnb_model_params params;
    bnb_model_info info;
    bnb_backend *backend = nullptr;
    std::string compute;
    ~bnb_model() { bnb_backend_close(backend); }
};

namespace {

using namespace bnb;

struct FreeCtx { void operator()(bnb_ctx *c) const { bnb_ctx_free(c); } };
struct FreePlan { void operator()(bnb_plan *p) const { bnb_plan_free(p); } };
using Ctx = std::unique_ptr<bnb_ctx, FreeCtx>;
using Plan = std::unique_ptr<bnb_plan, FreePlan>;

// Binds the tensors to the names that the architecture asks for.
bool bind_weights(bnb_model &m, bnb_error *err) {
    std::unordered_map<std::string, bnb_tensor *> given;
    for (bnb_tensor *t : m.source.tensors) given.emplace(bnb_tensor_name(t), t);
    for (const TensorInfo &want : m.arch->tensors(m.source.config)) {
        auto it = given.find(want.name);
        if (it == given.end()) {
            if (want.optional) continue;
            bnb_fail(err, BNB_E_FORMAT, "the tensor '%s' %s is missing", want.name.c_str(), shape_text(want.shape).c_str());
            return false;
        }
        bnb_tensor *t = it->second;
        const std::vector<int64_t> shape(bnb_tensor_shape(t), bnb_tensor_shape(t) + bnb_tensor_n_dims(t));
        if (shape != want.shape) {
            bnb_fail(err, BNB_E_FORMAT, "the tensor '%s' is %s, but the configuration asks for %s", want.name.c_str(),
                     shape_text(shape).c_str(), shape_text(want.shape).c_str());
            return false;
        }
        m.weights.emplace(want.name, t);
        given.erase(it);
    }
    for (auto &left : given) bnb_log(m.env, BNB_LOG_WARN, "the tensor '%s' is not used by %s", left.first.c_str(), m.arch->name);
    return true;
}

void fill_info(bnb_model &m) {
    const Config &c = m.source.config;
    bnb_model_info &i = m.info;
    std::memset(&i, 0, sizeof i);
    i.struct_size = sizeof i;
    std::strncpy(i.arch, m.arch->name, sizeof i.arch - 1);
    i.n_vocab = c.n_vocab;
    i.n_ctx = c.n_ctx;
    i.n_embd = c.n_embd;
    i.n_layer = c.n_layer;
    i.n_head = c.n_head;
    i.has_tokenizer = m.source.tokenizer != nullptr;
    int64_t of_type[BNB_TYPE_COUNT] = {};
    for (const TensorInfo &want : m.arch->tensors(c)) {
        auto it = m.weights.find(want.name);
        if (it == m.weights.end()) continue;
        i.n_params += bnb_tensor_elements(it->second);
        i.weight_bytes += bnb_tensor_bytes(it->second);
        i.footprint += bnb_tensor_footprint(it->second);
        if (want.role == Role::Linear) of_type[bnb_tensor_type(it->second)] += bnb_tensor_elements(it->second);
    }
    i.linear_type = static_cast<int32_t>(std::max_element(of_type, of_type + BNB_TYPE_COUNT) - of_type);
}

void override_int8(bnb_model &m) {
    for (bnb_tensor *t : m.source.tensors) {
        if (t->type != BNB_INT8) continue;
        if (m.params.threshold >= 0) t->quant.threshold = m.params.threshold;
        if (m.params.outlier_rule >= 0) t->quant.outlier_rule = m.params.outlier_rule;
    }
}

// ---- caches and graphs ----

struct Caches {
    Ctx ctx;
    std::vector<bnb_tensor *> k, v; // [n_layer] of [n_ctx, n_head_kv * D]
};

bool caches_create(const bnb_model &m, int64_t n_ctx, Caches *out, bnb_error *err) {
    const Config &c = m.source.config;
    out->ctx.reset(bnb_ctx_create(m.env, err));
    if (!out->ctx) return false;
    const int64_t shape[] = {n_ctx, c.n_embd / c.n_head * c.n_head_kv};
    for (int64_t i = 0; i < c.n_layer; i++)
        for (auto *list : {&out->k, &out->v}) {
            std::string name = (list == &out->k ? "k_cache." : "v_cache.") + std::to_string(i);
            list->push_back(bnb_tensor_new(out->ctx.get(), m.params.kv_type, nullptr, 2, shape, name.c_str()));
        }
    return bnb_ctx_status(out->ctx.get(), err) == BNB_OK;
}

// A graph for T tokens, with its plan and the inputs that a run sets.
struct Step {
    int64_t n_tokens, n_out;
    Ctx ctx;
    Plan plan; // declared after ctx: freed before it
    bnb_tensor *ids, *positions, *rows, *span, *out, *logits;
};

bool step_create(const bnb_model &m, const Caches &caches, int64_t n_tokens, int64_t n_out, Step *s, bnb_error *err) {
    s->n_tokens = n_tokens;
    s->n_out = n_out;
    s->ctx.reset(bnb_ctx_create(m.env, err));
    if (!s->ctx) return false;
    bnb_ctx *c = s->ctx.get();
    const int64_t n[] = {n_tokens, 2};
    s->ids = bnb_input(c, BNB_I32, 1, n, "token ids");
    s->positions = bnb_input(c, BNB_I32, 1, n, "positions");
    s->rows = bnb_input(c, BNB_I32, 1, n, "cache rows");
    s->span = bnb_input(c, BNB_I32, 2, n, "spans");
    s->out = n_out == n_tokens ? nullptr : bnb_input(c, BNB_I32, 1, &n_out, "output rows");
    Build b = {c, m.source.config, m.weights, s->ids, s->positions, s->rows, s->span, s->out, caches.k, caches.v};
    s->logits = m.arch->build(b);
    bnb_graph *g = bnb_graph_create(c, &s->logits, 1, err);
    if (!g) return false;
    bnb_plan_params p;
    bnb_plan_params_default(&p, sizeof p);
    p.compute_dtype = m.params.compute_dtype;
    s->plan.reset(bnb_plan_create(m.backend, g, &p, err));
    return s->plan != nullptr;
}

// What would be needed for n_ctx tokens; nothing is allocated but metadata.
bool measure(const bnb_model &m, int64_t n_ctx, bnb_memory *out, std::string *compute, bnb_error *err) {
    Caches caches;
    if (!caches_create(m, n_ctx, &caches, err)) return false;
    *out = {};
    bool bf16 = false;
    for (int64_t rows : {int64_t{1}, std::min<int64_t>(m.params.n_batch, n_ctx)}) {
        Step s;
        if (!step_create(m, caches, rows, 1, &s, err)) return false;
        bnb_memory one;
        bnb_plan_memory(s.plan.get(), &one);
        *out = {one.weights, one.state, out->work + one.work};
        std::string text(bnb_plan_describe(s.plan.get(), nullptr, 0) + 1, '\0');
        bnb_plan_describe(s.plan.get(), &text[0], text.size());
        bf16 = text.find("_gemm_bf16") != std::string::npos || text.find("_amx") != std::string::npos; // kernels of bf16 products
    }
    if (compute) *compute = m.info.linear_type == BNB_INT8 ? "int8" : bf16 ? "f32, bf16 for prompts" : "f32";
    return true;
}

} // namespace

namespace bnb {

const Config &model_config(const bnb_model *m) { return m->source.config; }
const Tokenizer *model_tokenizer(const bnb_model *m) { return m->source.tokenizer.get(); }

bnb_model *model_create(bnb_env *env, ModelSource source, const bnb_model_params *params, bnb_error *err) {
    std::unique_ptr<bnb_model> m(new bnb_model());
    m->env = env;
    m->source = std::move(source);
    m->params = params_read(params, bnb_model_params_default);
    if (!config_finish(m->source.config, err)) return nullptr;
    m->arch = arch_find(m->source.config.arch);
    if (!bind_weights(*m, err)) return nullptr;
    fill_info(*m);
    override_int8(*m);
    bnb_model_params &p = m->params;
    if (p.n_batch < 1) p.n_batch = 1;
    if (p.kv_type < 0) p.kv_type = m->info.linear_type == BNB_F32 ? BNB_F32 : BNB_F16;
    if (p.kv_type != BNB_F16 && p.kv_type != BNB_F32) {
        bnb_fail(err, BNB_E_TYPE, "the KV cache can be f16 or f32, not type %d", static_cast<int>(p.kv_type));
        return nullptr;
    }
    const char *device = !p.device || !std::strcmp(p.device, "auto") ? "cpu" : p.device;
    m->backend = bnb_backend_open(env, device, err);
    bnb_memory memory;
    if (!m->backend || !measure(*m, std::min<int64_t>(m->source.config.n_ctx, p.n_batch), &memory, &m->compute, err)) return nullptr;
    return m.release();
}

} // namespace bnb

namespace {

bnb_model *open_file(bnb_env *env, bnb_file *raw, const bnb_model_params *params, bnb_error *err) {
    if (!raw) return nullptr;
    std::shared_ptr<bnb_file> file(raw, bnb_file_free);
    ModelSource s;
    s.keep = file;
    if (!config_from_file(raw, &s.config, err)) return nullptr;
    uint64_t n;
    if (const void *chunk = bnb_file_chunk(raw, "tokn", &n)) {
        TokenizerData data;
        if (!parse(chunk, n, &data, err)) return nullptr;
        s.tokenizer = Tokenizer::create(std::move(data), err);
        if (!s.tokenizer) return nullptr;
    }
    for (int32_t i = 0; i < bnb_file_tensor_count(raw); i++) s.tensors.push_back(bnb_file_tensor(raw, i));
    return model_create(env, std::move(s), params, err);
}

} // namespace

void bnb_model_params_default(bnb_model_params *p, uint32_t struct_size) {
    params_write(p, struct_size, bnb_model_params{struct_size, 0, 0, BNB_COMPUTE_AUTO, -1, 512, -1.0f, -1, nullptr});
}

bnb_model *bnb_model_open(bnb_env *env, const char *path, const bnb_model_params *params, bnb_error *err) {
    bnb_model_params p = params_read(params, bnb_model_params_default);
    uint32_t flags = 0;
    if (p.no_mmap) flags |= BNB_FILE_NO_MMAP;
    if (p.mlock) flags |= BNB_FILE_MLOCK;
    bnb_error why = {};
    bnb_model *m = guarded(&why, static_cast<bnb_model *>(nullptr),
                           [&] { return open_file(env, bnb_file_open(env, path, flags, &why), params, &why); });
    if (!m && err) { // messages from below do not all name the file
        if (std::strncmp(why.msg, path, std::strlen(path)) == 0) *err = why;
        else bnb_fail(err, why.code, "%.200s: %s", path, why.msg);
    }
    return m;
}

bnb_model *bnb_model_from_memory(bnb_env *env, const void *data, uint64_t bytes, const bnb_model_params *params, bnb_error *err) {
    return guarded(err, static_cast<bnb_model *>(nullptr),
                   [&] { return open_file(env, bnb_file_from_memory(env, data, bytes, "(memory)", err), params, err); });
}

void bnb_model_free(bnb_model *m) { delete m; }

void bnb_model_get_info(const bnb_model *m, bnb_model_info *info) {
    uint32_t size = info->struct_size;
    params_write(info, size, m->info);
    info->struct_size = size;
}

bnb_env *bnb_model_env(const bnb_model *m) { return m->env; }
const char *bnb_model_compute(const bnb_model *m) { return m->compute.c_str(); }
int32_t bnb_model_tensor_count(const bnb_model *m) { return static_cast<int32_t>(m->source.tensors.size()); }

const bnb_tensor *bnb_model_tensor(const bnb_model *m, int32_t i) {
    return i < 0 || i >= bnb_model_tensor_count(m) ? nullptr : m->source.tensors[static_cast<size_t>(i)];
}

bnb_status bnb_model_memory(const bnb_model *m, int64_t n_ctx, bnb_memory *out, bnb_error *err) {
    return guarded(err, bnb_status{BNB_E_NOMEM}, [&] {
        bnb_error why = {};
        if (measure(*m, n_ctx > 0 ? n_ctx : m->source.config.n_ctx, out, nullptr, &why)) return bnb_status{BNB_OK};
        if (err) *err = why;
        return why.code;
    });
}

// ---- text ------------------------------------------------------------------------------------------------------------

int64_t bnb_tokenize(const bnb_model *m, const char *text, size_t bytes, uint32_t flags, int32_t *ids, int64_t cap, bnb_error *err) {
    const Tokenizer *t = model_tokenizer(m);
    if (!t) return bnb_fail(err, BNB_E_UNSUPPORTED, "the model has no tokenizer");
    static_assert(int{BNB_TOKENIZE_SPECIAL} == int{ENCODE_ADD_SPECIAL} && int{BNB_TOKENIZE_PARSE_SPECIAL} == int{ENCODE_PARSE_SPECIAL} &&
                  int{BNB_TOKENIZE_RAW_BYTES} == int{ENCODE_RAW_BYTES}, "the C API hands its flags on");
    return guarded(err, int64_t{BNB_E_NOMEM}, [&] {
        std::vector<int32_t> list;
        t->encode(text, bytes, flags, &list);
        std::copy_n(list.begin(), std::min(static_cast<int64_t>(list.size()), std::max<int64_t>(cap, 0)), ids);
        return static_cast<int64_t>(list.size());
    });
}

const char *bnb_token_bytes(const bnb_model *m, int32_t id, size_t *bytes) {
    const Tokenizer *t = model_tokenizer(m);
    std::string_view s = t ? t->bytes(id) : std::string_view();
    *bytes = s.size();
    return s.empty() ? "" : s.data();
}

int32_t bnb_model_bos(const bnb_model *m) {
    const Config &c = m->source.config;
    const Tokenizer *t = model_tokenizer(m);
    if (c.bos >= 0) return static_cast<int32_t>(c.bos);
    return t ? (t->data().bos >= 0 ? t->data().bos : t->data().eos) : -1;
}

int32_t bnb_model_is_eos(const bnb_model *m, int32_t id) {
    const std::vector<int64_t> &eos = m->source.config.eos;
    if (std::find(eos.begin(), eos.end(), id) != eos.end()) return 1;
    const Tokenizer *t = model_tokenizer(m);
    return t && id >= 0 && id == t->data().eos;
}

// ---- session ---------------------------------------------------------------------------------------------------------

struct bnb_session {
    bnb_model *model;
    int64_t n_ctx;
    Caches caches;
    std::list<Step> steps;       // most recently used first
    std::vector<int32_t> tokens; // whose keys and values are in the cache
    std::vector<float> logits;   // [n_vocab] after the last token
    bool has_logits = false;
};

namespace {

// Plans are kept for the sizes in use: decoding, full prompt batches, and the last odd one.
enum { MAX_STEPS = 3 };

Step *step_find(bnb_session &s, int64_t n_tokens, int64_t n_out, bnb_error *err) {
    for (auto it = s.steps.begin(); it != s.steps.end(); ++it)
        if (it->n_tokens == n_tokens && it->n_out == n_out) {
            s.steps.splice(s.steps.begin(), s.steps, it);
            return &s.steps.front();
        }
    Step fresh;
    if (!step_create(*s.model, s.caches, n_tokens, n_out, &fresh, err)) return nullptr;
    while (s.steps.size() >= MAX_STEPS) {
        auto victim = std::prev(s.steps.end());
        if (victim->n_tokens == 1) --victim; // decoding is used again whatever came between
        s.steps.erase(victim);
    }
    s.steps.push_front(std::move(fresh));
    return &s.steps.front();
}

bnb_status write_all(bnb_tensor *t, const std::vector<int32_t> &v, bnb_error *err) {
    return bnb_tensor_write(t, 0, v.data(), v.size() * sizeof(int32_t), err);
}

// Appends tokens [n] to the conversation. all: where the logits of every token go, f32 [n, n_vocab], or NULL for the
// last one's only, which go to s.logits.
bnb_status evaluate(bnb_session &s, const int32_t *tokens, int64_t n, float *all, bnb_error *err) {
    const Config &c = s.model->source.config;
    for (int64_t at = 0; at < n;) {
        int64_t T = std::min<int64_t>(n - at, s.model->params.n_batch), begin = static_cast<int64_t>(s.tokens.size());
        bool wanted = all || at + T == n;
        Step *step = step_find(s, T, all ? T : 1, err);
        if (!step) return err ? err->code : bnb_status{BNB_E_NOMEM};
        std::vector<int32_t> ids(tokens + at, tokens + at + T), positions, rows, span;
        for (int64_t t = 0; t < T; t++) {
            int32_t row = static_cast<int32_t>(begin + t);
            positions.push_back(row + static_cast<int32_t>(s.model->arch->position_offset));
            rows.push_back(row);
            span.insert(span.end(), {0, row + 1});
        }
        bnb_status status = bnb_plan_alloc(step->plan.get(), err);
        if (!status) status = write_all(step->ids, ids, err);
        if (!status) status = write_all(step->positions, positions, err);
        if (!status) status = write_all(step->rows, rows, err);
        if (!status) status = write_all(step->span, span, err);
        if (!status && step->out) status = write_all(step->out, {static_cast<int32_t>(T - 1)}, err);
        s.tokens.reserve(s.tokens.size() + ids.size()); // nothing may fail once the cache is written
        s.has_logits = false;
        if (!status) status = bnb_plan_run(step->plan.get(), err);
        if (status) return status;
        s.tokens.insert(s.tokens.end(), ids.begin(), ids.end());
        size_t row_bytes = static_cast<size_t>(c.n_vocab) * sizeof(float);
        if (all) status = bnb_tensor_read(step->logits, 0, all + at * c.n_vocab, static_cast<size_t>(T) * row_bytes, err);
        else if (wanted) status = bnb_tensor_read(step->logits, 0, s.logits.data(), row_bytes, err);
        if (status) return status;
        s.has_logits = wanted && !all;
        at += T;
        if (n > s.model->params.n_batch && !bnb_progress(s.model->env, "prompt", static_cast<double>(at) / static_cast<double>(n)))
            return bnb_fail(err, BNB_E_CANCELLED, "evaluating the prompt was cancelled");
    }
    return BNB_OK;
}

bnb_status check_tokens(const bnb_session &s, const int32_t *tokens, int64_t n, bnb_error *err) {
    int64_t n_vocab = s.model->source.config.n_vocab;
    if (n < 1) return bnb_fail(err, BNB_E_ARG, "there is no token to evaluate");
    if (n > s.n_ctx)
        return bnb_fail(err, BNB_E_LIMIT, "%lld tokens do not fit into a context of %lld", static_cast<long long>(n), static_cast<long long>(s.n_ctx));
    for (int64_t i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= n_vocab)
            return bnb_fail(err, BNB_E_ARG, "token %lld has the id %d, outside the vocabulary of %lld", static_cast<long long>(i), tokens[i], static_cast<long long>(n_vocab));
    return BNB_OK;
}

} // namespace

bnb_session *bnb_session_create(bnb_model *m, int64_t n_ctx, bnb_error *err) {
    return guarded(err, static_cast<bnb_session *>(nullptr), [&]() -> bnb_session * {
        const Config &c = m->source.config;
        if (n_ctx == 0) n_ctx = c.n_ctx;
        if (n_ctx < 1 || n_ctx > c.n_ctx) {
            bnb_fail(err, BNB_E_LIMIT, "a context of %lld tokens was asked for; the model has positions for 1 to %lld", static_cast<long long>(n_ctx), static_cast<long long>(c.n_ctx));
            return nullptr;
        }
        std::unique_ptr<bnb_session> s(new bnb_session());
        s->model = m;
        s->n_ctx = n_ctx;
        s->logits.resize(static_cast<size_t>(c.n_vocab));
        if (!caches_create(*m, n_ctx, &s->caches, err) || bnb_ctx_alloc(s->caches.ctx.get(), m->backend, err)) return nullptr;
        return s.release();
    });
}

void bnb_session_free(bnb_session *s) { delete s; }
int64_t bnb_session_n_ctx(const bnb_session *s) { return s->n_ctx; }

bnb_status bnb_session_sync(bnb_session *s, const int32_t *tokens, int64_t n, bnb_error *err) {
    if (bnb_status status = check_tokens(*s, tokens, n, err)) return status;
    return guarded(err, bnb_status{BNB_E_NOMEM}, [&]() -> bnb_status {
        int64_t have = static_cast<int64_t>(s->tokens.size()), same = 0;
        while (same < have && same < n && s->tokens[static_cast<size_t>(same)] == tokens[same]) same++;
        if (same == n && have == n && s->has_logits) return BNB_OK;
        same = std::min(same, n - 1); // the last token is evaluated for its logits
        s->tokens.resize(static_cast<size_t>(same));
        return evaluate(*s, tokens + same, n - same, nullptr, err);
    });
}

const float *bnb_session_logits(const bnb_session *s, int64_t *n_vocab) {
    if (n_vocab) *n_vocab = s->model->source.config.n_vocab;
    return s->has_logits ? s->logits.data() : nullptr;
}

bnb_status bnb_session_logits_all(bnb_session *s, const int32_t *tokens, int64_t n, float *logits, bnb_error *err) {
    if (bnb_status status = check_tokens(*s, tokens, n, err)) return status;
    return guarded(err, bnb_status{BNB_E_NOMEM}, [&] {
        s->tokens.clear();
        return evaluate(*s, tokens, n, logits, err);
    });
}

const int32_t *bnb_session_tokens(const bnb_session *s, int64_t *n) {
    *n = static_cast<int64_t>(s->tokens.size());
    return s->tokens.data();
}

void bnb_session_memory(const bnb_session *s, bnb_memory *out) {
    *out = {s->model->info.weight_bytes, 0, 0};
    for (auto *list : {&s->caches.k, &s->caches.v})
        for (const bnb_tensor *t : *list) out->state += bnb_tensor_bytes(t);
    for (const Step &step : s->steps) {
        bnb_memory m;
        bnb_plan_memory(step.plan.get(), &m);
        out->work += m.work;
    }
}

// ---- generation ------------------------------------------------------------------------------------------------------

namespace {

// Holds text back while it may be the beginning of a stop string.
class StopFinder {
public:
    explicit StopFinder(const bnb_generate_params &p) : stops_(p.stop, p.stop + p.n_stop) {}

    // Takes text; moves what may be shown to *out. true: a stop string was met, and *out ends before it.
    bool push(const std::string &text, std::string *out) {
        held_ += text;
        size_t first = std::string::npos;
        for (const std::string &stop : stops_)
            if (!stop.empty()) first = std::min(first, held_.find(stop));
        bool met = first != std::string::npos;
        size_t show = met ? first : held_.size() - longest_beginning();
        out->append(held_, 0, show);
        held_.erase(0, show);
        return met;
    }
    void flush(std::string *out) {
        out->append(held_);
        held_.clear();
    }

private:
    std::vector<std::string> stops_;
    std::string held_;

    // length of the longest end of held_ with which a stop string begins
    size_t longest_beginning() const {
        size_t longest = 0;
        for (const std::string &stop : stops_)
            for (size_t n = std::min(stop.size(), held_.size()); n > longest; n--)
                if (held_.compare(held_.size() - n, n, stop, 0, n) == 0) longest = n;
        return longest;
    }
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

bnb_status generate(bnb_session &s, const int32_t *prompt, int64_t n_prompt, const bnb_generate_params &p, bnb_generate_result *r, bnb_error *err) {
    std::vector<int32_t> tokens(prompt, prompt + n_prompt);
    int64_t same = 0;
    while (same < n_prompt && same < static_cast<int64_t>(s.tokens.size()) && s.tokens[static_cast<size_t>(same)] == prompt[same]) same++;
    *r = {n_prompt, same, 0, 0, 0, BNB_STOP_LENGTH};
    double start = now();
    bnb_status status = bnb_session_sync(&s, prompt, n_prompt, err);
    r->prompt_s = now() - start;
    if (status) return status;

    StopFinder stops(p);
    Utf8Stream utf8;
    auto show = [&](const std::string &text) { return text.empty() || !p.on_text || p.on_text(p.user, text.data(), text.size()); };
    start = now();
    while (p.n_predict < 0 || r->n_generated < p.n_predict) {
        int64_t n_vocab, n_have = static_cast<int64_t>(tokens.size());
        const float *logits = bnb_session_logits(&s, &n_vocab);
        int32_t id = bnb_sample(logits, n_vocab, &p.sampling, tokens.data(), n_have, static_cast<uint64_t>(n_have), err);
        if (id < 0) return id;
        if (!p.ignore_eos && bnb_model_is_eos(s.model, id)) {
            r->stop_reason = BNB_STOP_EOS;
            break;
        }
        tokens.push_back(id);
        r->n_generated++;
        r->generate_s = now() - start;
        size_t n;
        const char *bytes = bnb_token_bytes(s.model, id, &n);
        std::string text, shown;
        utf8.push({bytes, n}, &text);
        bool met = stops.push(text, &shown);
        bool go_on = show(shown);
        if (met || !go_on) {
            r->stop_reason = met ? BNB_STOP_STRING : BNB_STOP_CALLER;
            return BNB_OK;
        }
        if (n_have + 1 > s.n_ctx) { // the last token is shown but has no place in the cache
            r->stop_reason = BNB_STOP_CONTEXT;
            break;
        }
        if (r->n_generated == p.n_predict) break;
        if ((status = bnb_session_sync(&s, tokens.data(), n_have + 1, err))) return status;
        r->generate_s = now() - start;
    }
    std::string text, shown;
    utf8.flush(&text);
    if (stops.push(text, &shown)) r->stop_reason = BNB_STOP_STRING;
    else stops.flush(&shown);
    show(shown);
    return BNB_OK;
}

} // namespace

void bnb_generate_params_default(bnb_generate_params *p, uint32_t struct_size) {
    bnb_generate_params d = {struct_size, {}, -1, 0, 0, nullptr, nullptr, nullptr};
    bnb_sampling_default(&d.sampling, sizeof d.sampling);
    params_write(p, struct_size, d);
}

bnb_status bnb_generate(bnb_session *s, const int32_t *prompt, int64_t n_prompt, const bnb_generate_params *params, bnb_generate_result *result, bnb_error *err) {
    bnb_generate_params p = params_read(params, bnb_generate_params_default);
    bnb_generate_result unused;
    if (bnb_status status = check_tokens(*s, prompt, n_prompt, err)) return status;
    return guarded(err, bnb_status{BNB_E_NOMEM}, [&] { return generate(*s, prompt, n_prompt, p, result ? result : &unused, err); });
}
