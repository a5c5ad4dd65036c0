// model.cpp: the C API of model.h: a model from its weights, a session with its KV cache, generation.
//
// Build: c++ -std=c++17 -O2 -c model.cpp
// Not:   no file format but .bnb (checkpoint.cpp reads the others), no batch of several sequences yet.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <list>
#include <map>

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
    bnb_ctx *uploaded = nullptr; // the weights in a GPU's memory
    std::string compute;
    ~bnb_model() {
        bnb_ctx_free(uploaded);
        bnb_backend_close(backend);
    }
};

namespace {

using namespace bnb;

struct FreeCtx { void operator()(bnb_ctx *c) const { bnb_ctx_free(c); } };
struct FreePlan { void operator()(bnb_plan *p) const { bnb_plan_free(p); } };
struct FreeBackend { void operator()(bnb_backend *b) const { bnb_backend_close(b); } };
using Backend = std::unique_ptr<bnb_backend, FreeBackend>;
using Ctx = std::unique_ptr<bnb_ctx, FreeCtx>;
using Plan = std::unique_ptr<bnb_plan, FreePlan>;

bool on_cpu(const bnb_model &m) { return std::strcmp(bnb_backend_name(m.backend), "cpu") == 0; }

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

// Weights for a GPU: the graphs use these twins, which get memory and values once everything has been measured.
bool place_weights(bnb_model &m, bnb_error *err) {
    m.uploaded = bnb_ctx_create(m.env, err);
    if (!m.uploaded) return false;
    for (auto &w : m.weights) w.second = bnb_tensor_place(m.uploaded, m.backend, w.second, m.params.compute_dtype);
    return bnb_ctx_status(m.uploaded, err) == BNB_OK;
}

// In the order of the source, which is that of the file.
bool upload_weights(bnb_model &m, bnb_error *err) {
    size_t done = 0;
    for (const bnb_tensor *t : m.source.tensors) {
        auto it = m.weights.find(bnb_tensor_name(t));
        auto upload = [&](const bnb_tensor *from) { return bnb_tensor_upload(it->second, from, err) == BNB_OK; };
        if (it != m.weights.end() && !(bnb_tensor_state(t) == BNB_META ? m.source.numbers(t, upload, err) : upload(t))) return false;
        if (bnb_progress(m.env, "upload", static_cast<double>(++done) / static_cast<double>(m.source.tensors.size()))) continue;
        bnb_fail(err, BNB_E_CANCELLED, "uploading the weights was cancelled");
        return false;
    }
    return bnb_backend_sync(m.backend, err) == BNB_OK; // sessions read them through backends of their own
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
    const int64_t D = c.n_embd / c.n_head, shape[] = {n_ctx, D * c.n_head_kv};
    bnb_quant quant = bnb_quant_default(m.params.kv_type);
    quant.blocksize = static_cast<int32_t>(D); // int8_kv: a scale for each head
    for (int64_t i = 0; i < c.n_layer; i++)
        for (auto *list : {&out->k, &out->v}) {
            std::string name = (list == &out->k ? "k_cache." : "v_cache.") + std::to_string(i);
            list->push_back(bnb_tensor_new(out->ctx.get(), m.params.kv_type, &quant, 2, shape, name.c_str()));
        }
    return bnb_ctx_status(out->ctx.get(), err) == BNB_OK;
}

// What a step does beside computing logits. With a rule it also draws the next tokens and feeds them back, so that the
// next run continues every sequence by one token with no input from the host.
struct StepKind {
    int64_t n_tokens, n_out;
    bool draws;
    bnb_draw_rule rule;
    bool operator==(const StepKind &o) const {
        return n_tokens == o.n_tokens && n_out == o.n_out && draws == o.draws &&
               (!draws || (rule.temp == o.rule.temp && rule.top_p == o.rule.top_p && rule.min_p == o.rule.min_p && rule.top_k == o.rule.top_k && rule.seed == o.rule.seed));
    }
};

// A graph for T tokens, with its plan and the inputs that a run sets.
struct Step {
    StepKind kind;
    Ctx ctx;
    Plan plan; // declared after ctx: freed before it
    bnb_tensor *ids, *positions, *rows, *span, *out, *steps, *logits, *next;
};

bool step_create(const bnb_model &m, bnb_backend *backend, const Caches &caches, const StepKind &kind, Step *s, bnb_error *err) {
    const int64_t n_tokens = kind.n_tokens, n_out = kind.n_out;
    s->kind = kind;
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
    s->steps = kind.draws && kind.rule.temp > 0 ? bnb_input(c, BNB_I32, 1, &n_tokens, "steps") : nullptr;
    s->next = !kind.draws ? nullptr : s->steps ? bnb_draw(c, s->logits, s->steps, &kind.rule) : bnb_argmax(c, s->logits);
    bnb_graph *g = bnb_graph_create(c, kind.draws ? &s->next : &s->logits, 1, err);
    if (!g) return false;
    bnb_plan_params p;
    bnb_plan_params_default(&p, sizeof p);
    p.compute_dtype = m.params.compute_dtype;
    for (const bnb_feed &feed : {bnb_feed{s->next, s->ids, {0, 0}}, {s->positions, s->positions, {1, 1}}, {s->rows, s->rows, {1, 1}}, {s->span, s->span, {0, 1}}, {s->steps, s->steps, {1, 1}}})
        if (kind.draws && feed.from) p.feeds[p.n_feeds++] = feed;
    s->plan.reset(bnb_plan_create(backend, g, &p, err));
    return s->plan != nullptr;
}

// What would be needed for n_ctx tokens; nothing is allocated but metadata.
bool measure(const bnb_model &m, int64_t n_ctx, bnb_memory *out, std::string *compute, bnb_error *err) {
    Caches caches;
    if (!caches_create(m, n_ctx, &caches, err)) return false;
    *out = {};
    bool bf16 = false, bf16_tokens = false;
    for (int64_t rows : {int64_t{1}, std::min<int64_t>(m.params.n_batch, n_ctx)}) {
        Step s;
        if (!step_create(m, m.backend, caches, {rows, 1, false, {}}, &s, err)) return false;
        bnb_memory one;
        bnb_plan_memory(s.plan.get(), &one);
        *out = {one.weights, one.state, out->work + one.work};
        std::string text(bnb_plan_describe(s.plan.get(), nullptr, 0) + 1, '\0');
        bnb_plan_describe(s.plan.get(), &text[0], text.size());
        auto has = [&](const char *name) { return text.find(name) != std::string::npos; };
        bf16 = has("_gemm_bf16") || has("_amx"); // kernels of bf16 products
        bf16_tokens = bf16_tokens || has("_dot_bf16");
    }
    bool f16 = !on_cpu(m) && m.params.compute_dtype != BNB_F32 && m.info.linear_type != BNB_F32;
    if (compute) *compute = m.info.linear_type == BNB_INT8 ? "int8" : f16 ? "f16" : bf16_tokens ? "bf16" : bf16 ? "f32, bf16 for prompts" : "f32";
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
    if (p.kv_type < 0) p.kv_type = m->info.linear_type == BNB_F32 ? BNB_F32 : BNB_F16;
    if (p.kv_type != BNB_F16 && p.kv_type != BNB_F32 && p.kv_type != BNB_INT8_KV) {
        bnb_fail(err, BNB_E_TYPE, "the KV cache can be f16, f32 or int8_kv, not type %d", static_cast<int>(p.kv_type));
        return nullptr;
    }
    m->backend = bnb_backend_open(env, p.device ? p.device : "auto", err);
    if (!m->backend || (!on_cpu(*m) && !place_weights(*m, err))) return nullptr;
    if (p.n_batch < 1) p.n_batch = on_cpu(*m) ? 512 : 2048;
    bnb_memory memory;
    if (!measure(*m, std::min<int64_t>(m->source.config.n_ctx, p.n_batch), &memory, &m->compute, err)) return nullptr;
    bool meta = !m->source.numbers && std::any_of(m->source.tensors.begin(), m->source.tensors.end(), [](const bnb_tensor *t) { return bnb_tensor_state(t) == BNB_META; });
    if (!on_cpu(*m) && !meta && !upload_weights(*m, err)) return nullptr;
    m->source.numbers = nullptr;
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
    params_write(p, struct_size, bnb_model_params{struct_size, 0, 0, BNB_COMPUTE_AUTO, -1, 0, -1.0f, -1, nullptr});
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
bnb_backend *bnb_model_backend(const bnb_model *m) { return m->backend; }
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
    int64_t n_ctx;               // of each sequence; sequence i has the cache rows from i * n_ctx on
    Backend backend;             // the model's device, for this session's thread
    Caches caches;               // declared after backend: freed before it
    std::list<Step> steps;       // most recently used first
    std::vector<std::vector<int32_t>> sequences; // tokens whose keys and values are in the cache
    std::vector<float> logits;   // [n_vocab] after the last token that was evaluated
    bool has_logits = false;     // they are those of sequence 0
};

namespace {

// Plans are kept for the sizes in use: decoding in two ways, full prompt batches, and the last odd one.
enum { MAX_STEPS = 4 };

Step *step_find(bnb_session &s, const StepKind &kind, bnb_error *err) {
    for (auto it = s.steps.begin(); it != s.steps.end(); ++it)
        if (it->kind == kind) {
            s.steps.splice(s.steps.begin(), s.steps, it);
            return &s.steps.front();
        }
    Step fresh;
    if (!step_create(*s.model, s.backend.get(), s.caches, kind, &fresh, err)) return nullptr;
    while (s.steps.size() >= MAX_STEPS) {
        auto victim = std::prev(s.steps.end());
        if (victim->kind.n_tokens == 1) --victim; // decoding is used again whatever came between
        s.steps.erase(victim);
    }
    s.steps.push_front(std::move(fresh));
    return &s.steps.front();
}

// The inputs of a step: for each of its tokens the sequence it continues and its place there.
struct StepInput {
    std::vector<int32_t> ids, positions, rows, span;
    void add(const bnb_session &s, size_t sequence, int64_t position, int32_t id) {
        int32_t first = static_cast<int32_t>(static_cast<int64_t>(sequence) * s.n_ctx), row = first + static_cast<int32_t>(position);
        ids.push_back(id);
        positions.push_back(static_cast<int32_t>(position + s.model->arch->position_offset));
        rows.push_back(row);
        span.insert(span.end(), {first, row + 1});
    }
    bnb_status write(const Step &step, bnb_error *err) const {
        bnb_status status = bnb_plan_alloc(step.plan.get(), err);
        for (auto &w : {std::make_pair(step.ids, &ids), {step.positions, &positions}, {step.rows, &rows}, {step.span, &span}})
            if (!status) status = bnb_tensor_write(w.first, 0, w.second->data(), w.second->size() * sizeof(int32_t), err);
        return status;
    }
};

// Appends tokens [n] to a sequence. all: where the logits of every token go, f32 [n, n_vocab], or NULL for the last one's
// only, which go to s.logits.
bnb_status evaluate(bnb_session &s, size_t sequence, const int32_t *tokens, int64_t n, float *all, bnb_error *err) {
    const Config &c = s.model->source.config;
    std::vector<int32_t> &have = s.sequences[sequence];
    for (int64_t at = 0; at < n;) {
        int64_t T = std::min<int64_t>(n - at, s.model->params.n_batch), begin = static_cast<int64_t>(have.size());
        bool wanted = all || at + T == n;
        Step *step = step_find(s, {T, all ? T : 1, false, {}}, err);
        if (!step) return err ? err->code : bnb_status{BNB_E_NOMEM};
        StepInput in;
        for (int64_t t = 0; t < T; t++) in.add(s, sequence, begin + t, tokens[at + t]);
        bnb_status status = in.write(*step, err);
        int32_t last = static_cast<int32_t>(T - 1);
        if (!status && step->out) status = bnb_tensor_write(step->out, 0, &last, sizeof last, err);
        have.reserve(have.size() + in.ids.size()); // nothing may fail once the cache is written
        s.has_logits = false;
        if (!status) status = bnb_plan_run(step->plan.get(), err);
        if (status) return status;
        have.insert(have.end(), in.ids.begin(), in.ids.end());
        size_t row_bytes = static_cast<size_t>(c.n_vocab) * sizeof(float);
        if (all) status = bnb_tensor_read(step->logits, 0, all + at * c.n_vocab, static_cast<size_t>(T) * row_bytes, err);
        else if (wanted) status = bnb_tensor_read(step->logits, 0, s.logits.data(), row_bytes, err);
        if (status) return status;
        s.has_logits = wanted && !all && sequence == 0;
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

// Decoding of one or more sequences without the host: the device draws every token and feeds it back; the host follows one step
// behind, so that the device never waits for it. Before the first step each sequence's last token has not been evaluated.
class DrawLoop {
public:
    // last: [n_seq] tokens to go on from. limit: steps that may be taken.
    bnb_status start(bnb_session &s, const std::vector<int32_t> &last, int64_t limit, const bnb_draw_rule &rule, bnb_error *err) {
        s_ = &s;
        fed_ = last;
        limit_ = limit;
        int64_t n_seq = static_cast<int64_t>(last.size());
        step_ = step_find(s, {n_seq, n_seq, true, rule}, err);
        if (!step_) return err ? err->code : bnb_status{BNB_E_NOMEM};
        StepInput in;
        std::vector<int32_t> steps; // tokens before the one that is drawn, as bnb_sample counts them
        for (size_t i = 0; i < last.size(); i++) {
            in.add(s, i, static_cast<int64_t>(s.sequences[i].size()), last[i]);
            steps.push_back(static_cast<int32_t>(s.sequences[i].size()) + 1);
            s.sequences[i].reserve(s.sequences[i].size() + static_cast<size_t>(limit)); // nothing may fail once a cache is written
        }
        s.has_logits = false;
        bnb_status status = in.write(*step_, err);
        if (!status && step_->steps) status = bnb_tensor_write(step_->steps, 0, steps.data(), steps.size() * sizeof(int32_t), err);
        return status;
    }
    // ids: [n_seq], the tokens that follow those of the step before.
    bnb_status next(int32_t *ids, bnb_error *err) {
        for (; begun_ < limit_ && begun_ < ended_ + 2; begun_++) {
            bnb_status status = bnb_plan_run(step_->plan.get(), err);
            if (!status) status = bnb_tensor_fetch_begin(step_->next, static_cast<int32_t>(begun_ % 2), err);
            if (status) return status;
        }
        bnb_status status = bnb_tensor_fetch_end(step_->next, static_cast<int32_t>(ended_++ % 2), ids, err);
        for (size_t i = 0; i < fed_.size() && !status; i++) {
            s_->sequences[i].push_back(fed_[i]);
            fed_[i] = ids[i];
            if (ids[i] < 0) return bnb_fail(err, BNB_E_NUMERIC, "a logit is not a number: the model's weights may hold NaN or infinity");
        }
        return status;
    }

private:
    bnb_session *s_ = nullptr;
    Step *step_ = nullptr;
    std::vector<int32_t> fed_; // [n_seq]: what the step that is read next was given
    int64_t limit_ = 0, begun_ = 0, ended_ = 0;
};

} // namespace

bnb_session *bnb_session_create(bnb_model *m, int64_t n_ctx, bnb_error *err) { return bnb_session_create_batch(m, n_ctx, 1, err); }

bnb_session *bnb_session_create_batch(bnb_model *m, int64_t n_ctx, int32_t n_seq, bnb_error *err) {
    return guarded(err, static_cast<bnb_session *>(nullptr), [&]() -> bnb_session * {
        const Config &c = m->source.config;
        if (n_ctx == 0) n_ctx = c.n_ctx;
        if (n_ctx < 1 || n_ctx > c.n_ctx) {
            bnb_fail(err, BNB_E_LIMIT, "a context of %lld tokens was asked for; the model has positions for 1 to %lld", static_cast<long long>(n_ctx), static_cast<long long>(c.n_ctx));
            return nullptr;
        }
        if (n_seq < 1 || n_seq > BNB_FETCH_BYTES / 4 || n_ctx > INT32_MAX / n_seq - 1) {
            bnb_fail(err, BNB_E_LIMIT, "%d sequences of %lld tokens were asked for; 1 to %d are possible", n_seq, static_cast<long long>(n_ctx), BNB_FETCH_BYTES / 4);
            return nullptr;
        }
        std::unique_ptr<bnb_session> s(new bnb_session());
        s->model = m;
        s->n_ctx = n_ctx;
        s->sequences.resize(static_cast<size_t>(n_seq));
        s->logits.resize(static_cast<size_t>(c.n_vocab));
        s->backend.reset(bnb_backend_open(m->env, bnb_backend_name(m->backend), err));
        if (!s->backend || !caches_create(*m, n_ctx * n_seq, &s->caches, err) || bnb_ctx_alloc(s->caches.ctx.get(), s->backend.get(), err)) return nullptr;
        return s.release();
    });
}

void bnb_session_free(bnb_session *s) { delete s; }
int64_t bnb_session_n_ctx(const bnb_session *s) { return s->n_ctx; }
bnb_backend *bnb_session_backend(const bnb_session *s) { return s->backend.get(); }

bnb_status bnb_session_sync(bnb_session *s, const int32_t *tokens, int64_t n, bnb_error *err) {
    if (bnb_status status = check_tokens(*s, tokens, n, err)) return status;
    return guarded(err, bnb_status{BNB_E_NOMEM}, [&]() -> bnb_status {
        std::vector<int32_t> &known = s->sequences[0];
        int64_t have = static_cast<int64_t>(known.size()), same = 0;
        while (same < have && same < n && known[static_cast<size_t>(same)] == tokens[same]) same++;
        if (same == n && have == n && s->has_logits) return BNB_OK;
        same = std::min(same, n - 1); // the last token is evaluated for its logits
        known.resize(static_cast<size_t>(same));
        return evaluate(*s, 0, tokens + same, n - same, nullptr, err);
    });
}

const float *bnb_session_logits(const bnb_session *s, int64_t *n_vocab) {
    if (n_vocab) *n_vocab = s->model->source.config.n_vocab;
    return s->has_logits ? s->logits.data() : nullptr;
}

bnb_status bnb_session_logits_all(bnb_session *s, const int32_t *tokens, int64_t n, float *logits, bnb_error *err) {
    if (bnb_status status = check_tokens(*s, tokens, n, err)) return status;
    return guarded(err, bnb_status{BNB_E_NOMEM}, [&] {
        s->sequences[0].clear();
        return evaluate(*s, 0, tokens, n, logits, err);
    });
}

const int32_t *bnb_session_tokens(const bnb_session *s, int64_t *n) {
    *n = static_cast<int64_t>(s->sequences[0].size());
    return s->sequences[0].data();
}

bnb_status bnb_session_profile(bnb_session *s, char *out, size_t cap, size_t *length, bnb_error *err) {
    if (s->sequences[0].empty()) return bnb_fail(err, BNB_E_ARG, "there is no token to evaluate");
    return guarded(err, bnb_status{BNB_E_NOMEM}, [&]() -> bnb_status {
        Step *step = step_find(*s, {1, 1, false, {}}, err);
        if (!step) return err ? err->code : bnb_status{BNB_E_NOMEM};
        StepInput in;
        in.add(*s, 0, static_cast<int64_t>(s->sequences[0].size()) - 1, s->sequences[0].back());
        std::map<std::string, std::pair<double, int>> kernels; // seconds, calls
        bnb_status status = bnb_plan_profile(step->plan.get(), 1, err);
        for (int run = 0; run < 9 && !status; run++) { // the first one warms up
            status = in.write(*step, err);
            if (!status) status = bnb_plan_run(step->plan.get(), err);
            const double *times = bnb_plan_times(step->plan.get());
            std::string text(bnb_plan_describe(step->plan.get(), nullptr, 0) + 1, '\0');
            bnb_plan_describe(step->plan.get(), &text[0], text.size());
            size_t at = 0;
            for (size_t i = 0; run && !status && at < text.size() - 1; i++, at = text.find('\n', at) + 1) {
                char name[64] = "";
                std::sscanf(text.c_str() + at, "%*s %*s %63s", name);
                kernels[name].first += times[i] / 8;
                kernels[name].second += run == 1 && times[i] > 0;
            }
        }
        (void)bnb_plan_profile(step->plan.get(), 0, nullptr);
        if (status) return status;
        std::vector<std::pair<double, std::string>> lines;
        for (auto &k : kernels) {
            char line[128];
            std::snprintf(line, sizeof line, "%10.1f us %5d x %s\n", 1e6 * k.second.first, k.second.second, k.first.c_str());
            if (k.second.second) lines.push_back({-k.second.first, line});
        }
        std::sort(lines.begin(), lines.end());
        std::string text;
        for (auto &l : lines) text += l.second;
        *length = text.size() + 1;
        if (cap) std::snprintf(out, cap, "%s", text.c_str());
        return BNB_OK;
    });
}

void bnb_session_memory(const bnb_session *s, bnb_memory *out) {
    *out = {on_cpu(*s->model) ? s->model->info.weight_bytes : 0, 0, 0};
    if (!on_cpu(*s->model))
        for (auto &w : s->model->weights) out->weights += w.second->layout_bytes;
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
    const std::vector<int32_t> &known = s.sequences[0];
    while (same < n_prompt && same < static_cast<int64_t>(known.size()) && known[static_cast<size_t>(same)] == prompt[same]) same++;
    *r = {n_prompt, same, 0, 0, 0, BNB_STOP_LENGTH};
    double start = now();
    bnb_status status = bnb_session_sync(&s, prompt, n_prompt, err);
    r->prompt_s = now() - start;
    if (status) return status;

    const bnb_draw_rule rule = draw_rule(p.sampling);
    // On the device, unless the settings look back, or need a sort of the whole vocabulary.
    const bool draws = (p.sampling.repeat_penalty == 1.0f || p.sampling.repeat_last_n == 0) && (rule.temp <= 0 || (rule.top_k > 0 && rule.top_k <= 256)) && s.sequences.size() == 1;
    DrawLoop loop;
    StopFinder stops(p);
    Utf8Stream utf8;
    auto show = [&](const std::string &text) { return text.empty() || !p.on_text || p.on_text(p.user, text.data(), text.size()); };
    start = now();
    while (p.n_predict < 0 || r->n_generated < p.n_predict) {
        int64_t n_vocab, n_have = static_cast<int64_t>(tokens.size());
        int32_t id;
        if (draws && r->n_generated > 0) {
            if ((status = loop.next(&id, err))) return status;
        } else {
            const float *logits = bnb_session_logits(&s, &n_vocab);
            id = bnb_sample(logits, n_vocab, &p.sampling, tokens.data(), n_have, static_cast<uint64_t>(n_have), err);
            if (id < 0) return id;
        }
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
        if (!draws) status = bnb_session_sync(&s, tokens.data(), n_have + 1, err);
        else if (r->n_generated == 1) status = loop.start(s, {id}, p.n_predict < 0 ? s.n_ctx - n_have : std::min(p.n_predict - 1, s.n_ctx - n_have), rule, err);
        if (status) return status;
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

bnb_status bnb_generate_batch(bnb_session *s, const int32_t *const *prompts, const int64_t *n_prompt, int64_t n_predict, int32_t *out,
                              bnb_generate_result *result, bnb_error *err) {
    const size_t n_seq = s->sequences.size();
    bnb_generate_result unused, &r = *(result ? result : &unused);
    r = {0, 0, 0, 0, 0, BNB_STOP_LENGTH};
    for (size_t i = 0; i < n_seq; i++) {
        if (bnb_status status = check_tokens(*s, prompts[i], n_prompt[i], err)) return status;
        if (n_predict < 1 || n_prompt[i] + n_predict - 1 > s->n_ctx)
            return bnb_fail(err, BNB_E_LIMIT, "%lld tokens after a prompt of %lld do not fit into a context of %lld", static_cast<long long>(n_predict),
                            static_cast<long long>(n_prompt[i]), static_cast<long long>(s->n_ctx));
        r.n_prompt += n_prompt[i];
    }
    return guarded(err, bnb_status{BNB_E_NOMEM}, [&]() -> bnb_status {
        int64_t n_vocab = s->model->source.config.n_vocab;
        std::vector<int32_t> ids(n_seq);
        double start = now();
        bnb_sampling likeliest;
        bnb_sampling_default(&likeliest, sizeof likeliest);
        likeliest.temp = 0;
        for (size_t i = 0; i < n_seq; i++) {
            s->sequences[i].clear();
            if (bnb_status status = evaluate(*s, i, prompts[i], n_prompt[i], nullptr, err)) return status;
            ids[i] = bnb_sample(s->logits.data(), n_vocab, &likeliest, nullptr, 0, 0, err);
            if (ids[i] < 0) return ids[i];
            out[i * static_cast<size_t>(n_predict)] = ids[i];
        }
        r.prompt_s = now() - start;
        start = now();
        DrawLoop loop;
        bnb_status status = n_predict > 1 ? loop.start(*s, ids, n_predict - 1, draw_rule(likeliest), err) : BNB_OK;
        for (int64_t t = 1; t < n_predict && !status; t++) {
            status = loop.next(ids.data(), err);
            for (size_t i = 0; i < n_seq && !status; i++) out[i * static_cast<size_t>(n_predict) + static_cast<size_t>(t)] = ids[i];
        }
        r.n_generated = static_cast<int64_t>(n_seq) * n_predict;
        r.generate_s = now() - start;
        return status;
    });
}
