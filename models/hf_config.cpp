// hf_config.cpp: see hf_config.h.
#include "hf_config.h"

#include <cfloat>
#include <cmath>
#include <nlohmann/json.hpp>
#include <type_traits>

#include "quant_state.h" // torch_dtype_from_name

namespace bnb {

using nlohmann::json;

std::string canonical_name(const Arch &arch, const std::string &name) {
    for (const char *const *prefix = arch.prefixes; *prefix; prefix++)
        if (name.compare(0, strlen(*prefix), *prefix) == 0) return name.substr(strlen(*prefix));
    return name;
}

static std::string arch_names() {
    std::string names;
    for (const Arch *const *a = arch_list(); *a; a++) names += (names.empty() ? "" : ", ") + std::string((*a)->name);
    return names;
}

static const Arch *arch_by_tensors(const std::vector<SourceTensor> &tensors) {
    for (const Arch *const *a = arch_list(); *a; a++) {
        const std::string end = (*a)->signature;
        for (const SourceTensor &t : tensors)
            if (t.name.size() >= end.size() && t.name.compare(t.name.size() - end.size(), end.size(), end) == 0)
                return *a;
    }
    return nullptr;
}

// ---- JSON values to fields ------------------------------------------------------------------------------------------

// Sets a field from a value; otherwise says what the value should have been. A null leaves the field as it is.
static const char *assign(int64_t &field, const json &v) {
    if (!v.is_number_integer() || (v.is_number_unsigned() && v.get<uint64_t>() > uint64_t(INT64_MAX)))
        return "a whole number";
    field = v.get<int64_t>();
    return nullptr;
}

static const char *assign(double &field, const json &v) {
    if (!v.is_number() || !std::isfinite(v.get<double>())) return "a number";
    field = v.get<double>();
    return nullptr;
}

static const char *assign(bool &field, const json &v) {
    if (!v.is_boolean()) return "true or false";
    field = v.get<bool>();
    return nullptr;
}

static const char *assign(std::string &field, const json &v) {
    if (!v.is_string() || v.get_ref<const std::string &>().find('\0') != std::string::npos) return "a string";
    field = v.get<std::string>();
    return nullptr;
}

// One number or a list of them, as eos_token_id may be.
static const char *assign(std::vector<int64_t> &field, const json &v) {
    constexpr size_t most = 1024;
    const json list = v.is_array() ? v : json::array({v});
    std::vector<int64_t> values(std::min(list.size(), most + 1));
    if (values.size() > most) return "a list of at most 1024 numbers";
    for (size_t i = 0; i < values.size(); i++)
        if (assign(values[i], list[i])) return "a whole number or a list of them";
    field = values;
    return nullptr;
}

// Reads the keys of one file into the fields that they stand for.
static bool read_keys(const json &object, const HfKey *keys, const std::string &path, Config *config, bnb_error *err) {
    for (const HfKey *key = keys; key->hf; key++) {
        auto value = object.find(key->hf);
        if (value == object.end() || value->is_null()) continue;
        const bool negated = key->field[0] == '!';
        const char *expected = nullptr;
        config->fields([&](const char *name, auto &field) {
            if (strcmp(name, key->field + negated) != 0) return;
            expected = assign(field, *value);
            if constexpr (std::is_same_v<decltype(field), bool &>) field = field != negated;
        });
        if (!expected) continue;
        return failed(err, BNB_E_FORMAT, "%s: '%s' is not %s", printable_path(path).c_str(), key->hf, expected);
    }
    return true;
}

// Keys that all architectures share. generation_config.json is read last, so it decides.
static const HfKey token_keys[] = {
    {"bos_token_id", "bos"}, {"eos_token_id", "eos"}, {"pad_token_id", "pad"}, {nullptr, nullptr}};
static const HfKey sampling_keys[] = {
    {"temperature", "temperature"},
    {"top_p", "top_p"},
    {"top_k", "top_k"},
    {"repetition_penalty", "repetition_penalty"},
    {"do_sample", "do_sample"},
    {nullptr, nullptr},
};

// ---- config.json ----------------------------------------------------------------------------------------------------

static std::string string_or_empty(const json &object, const char *key) {
    auto v = object.find(key);
    return v != object.end() && v->is_string() ? v->get<std::string>() : "";
}

static bool is_true(const json &object, const char *key) {
    auto v = object.find(key);
    return v != object.end() && v->is_boolean() && v->get<bool>();
}

// What the weights were quantized with. Very old bitsandbytes configurations lack quant_method.
static std::string quant_method(const json &quantization) {
    const std::string method = string_or_empty(quantization, "quant_method");
    if (!method.empty()) return method;
    return is_true(quantization, "load_in_8bit") || is_true(quantization, "load_in_4bit") ? "bitsandbytes"
                                                                                          : "an unnamed method";
}

// How 4-bit weights were quantized stands beside each of them; here stands only what 8-bit ones need to run.
static bool read_quantization(const json &config, const std::string &shown, HfConfig *out, bnb_error *err) {
    auto q = config.find("quantization_config");
    if (q == config.end() || !q->is_object()) return true;
    const std::string method = quant_method(*q);
    if (method != "bitsandbytes")
        return failed(
            err, BNB_E_UNSUPPORTED,
            "%s: the weights are already quantized (%s), which is not read: start from their unquantized form",
            shown.c_str(), printable(method).c_str());
    out->quantized = true;
    auto threshold = q->find("llm_int8_threshold");
    if (threshold == q->end() || threshold->is_null()) return true;
    const char *expected = assign(out->threshold, *threshold);
    if (!expected && out->threshold >= 0 && out->threshold <= double(FLT_MAX)) return true;
    return failed(err, BNB_E_FORMAT, "%s: 'llm_int8_threshold' is not a number from 0 on", shown.c_str());
}

static void read_dtype(const json &config, HfConfig *out) {
    for (const char *key : {"torch_dtype", "dtype"}) { // transformers 4, 5
        const int32_t type = torch_dtype_from_name(string_or_empty(config, key));
        if (type >= 0) out->dtype = type;
    }
}

// minGPT's trainer writes a config.json of its own beside its state dict. The model's part may name a preset and no
// sizes.
static bool is_mingpt(const json &config) {
    return !config.contains("model_type") && config.contains("system") && config.contains("trainer") &&
           config.contains("model") && config["model"].is_object();
}

static bool read_config_json(const json &config, const std::string &path, const std::vector<SourceTensor> &tensors,
                             HfConfig *out, bnb_error *err) {
    const std::string shown = printable_path(path);
    if (is_true(config, "add_cross_attention"))
        return failed(err, BNB_E_UNSUPPORTED, "%s: the model has cross-attention, which is not offered", shown.c_str());
    if (!read_quantization(config, shown, out, err)) return false;
    read_dtype(config, out);
    const std::string type = string_or_empty(config, "model_type");
    out->arch = type.empty() ? arch_by_tensors(tensors) : arch_find(type);
    if (!out->arch)
        return failed(err, BNB_E_UNSUPPORTED, "%s: the model_type '%s' is not one of those that run here: %s",
                      shown.c_str(), printable(type).c_str(), arch_names().c_str());
    out->config.arch = out->arch->name;
    out->arch->defaults(out->config);
    return read_keys(config, out->arch->hf_keys, path, &out->config, err) &&
           read_keys(config, token_keys, path, &out->config, err) &&
           read_keys(config, sampling_keys, path, &out->config, err); // old models have these here
}

static bool read_generation_config(const json &generation, const std::string &path, Config *config, bnb_error *err) {
    return read_keys(generation, token_keys, path, config, err) &&
           read_keys(generation, sampling_keys, path, config, err);
}

// ---- without config.json --------------------------------------------------------------------------------------------

namespace {

// How an architecture calls its tables and its layers: asked of the card, with a network of one layer.
struct Names {
    std::string tokens, positions, layer; // layer: "h."
};

Names names_of(const Arch &arch) {
    Config probe;
    arch.defaults(probe);
    probe.n_layer = probe.n_head = 1;
    probe.n_ff = probe.n_embd_word = probe.n_embd;
    Names names;
    for (const TensorInfo &t : arch.tensors(probe)) {
        size_t number = t.name.find(".0.");
        if (number != std::string::npos) names.layer = t.name.substr(0, number + 1);
        if (t.role == Role::Embedding) (names.tokens.empty() ? names.tokens : names.positions) = t.name;
    }
    return names;
}

// The number that follows `prefix` in a name, -1: none.
int64_t layer_number(const std::string &name, const std::string &prefix) {
    if (name.compare(0, prefix.size(), prefix) != 0) return -1;
    size_t end = name.find('.', prefix.size());
    if (end == std::string::npos || end == prefix.size() || end - prefix.size() > 6) return -1;
    int64_t n = 0;
    for (size_t i = prefix.size(); i < end; i++) {
        if (name[i] < '0' || name[i] > '9') return -1;
        n = n * 10 + (name[i] - '0');
    }
    return n;
}

// The number of heads stands in no shape: minGPT's configuration may say it, it is known for the models that have a
// name, and guessed for others.
bool find_heads(bnb_env *env, const Arch &arch, const json &mingpt, Config *c, bnb_error *err) {
    auto stated = mingpt.find("n_head");
    if (stated != mingpt.end() && !assign(c->n_head, *stated)) return true;
    for (const Preset *p = arch.presets; p->name; p++) {
        if (p->n_layer != c->n_layer || p->n_embd != c->n_embd ||
            (p->n_embd_word ? p->n_embd_word : p->n_embd) != c->n_embd_word)
            continue;
        c->n_head = p->n_head;
        c->norm_before = p->norm_before;
        return true;
    }
    if (c->n_embd % 64 != 0)
        return failed(err, BNB_E_FORMAT,
                      "there is no config.json, and the number of heads cannot be guessed for a width of %lld",
                      static_cast<long long>(c->n_embd));
    c->n_head = c->n_embd / 64;
    bnb_log(env, BNB_LOG_WARN, "there is no config.json: %lld heads of 64 are assumed, which may be wrong",
            static_cast<long long>(c->n_head));
    return true;
}

// mingpt: the model's part of its trainer's configuration, or {}.
bool derive_config(bnb_env *env, const std::string &dir, const std::vector<SourceTensor> &tensors, const json &mingpt,
                   HfConfig *out, bnb_error *err) {
    const std::string shown = printable_path(dir);
    out->arch = arch_by_tensors(tensors);
    if (!out->arch)
        return failed(err, BNB_E_UNSUPPORTED, "%s has no config.json, and the tensors' names are those of none of %s",
                      shown.c_str(), arch_names().c_str());
    Config &c = out->config;
    c.arch = out->arch->name;
    out->arch->defaults(c);
    out->tied_known = false;
    c.n_layer = 0;
    const Names names = names_of(*out->arch);
    const SourceTensor *tokens = nullptr, *positions = nullptr;
    for (const SourceTensor &t : tensors) {
        const std::string name = canonical_name(*out->arch, t.name);
        if (name == names.tokens) tokens = &t;
        if (name == names.positions) positions = &t;
        c.n_layer = std::max(c.n_layer, layer_number(name, names.layer) + 1);
    }
    if (!tokens || !positions || tokens->shape.size() != 2 || positions->shape.size() != 2)
        return failed(err, BNB_E_FORMAT,
                      "%s has no config.json, and its shapes cannot be told without the matrices '%s' and '%s'",
                      shown.c_str(), names.tokens.c_str(), names.positions.c_str());
    c.n_vocab = tokens->shape[0];
    c.n_embd_word = tokens->shape[1];
    c.n_ctx = positions->shape[0] - out->arch->position_offset;
    c.n_embd = positions->shape[1];
    return find_heads(env, *out->arch, mingpt, &c, err);
}

} // namespace

// A model with another vocabulary than its architecture's usual one may not have the usual special tokens.
static void drop_unknown_tokens(Config *c) {
    auto unknown = [&](int64_t id) { return id < 0 || id >= c->n_vocab; };
    if (unknown(c->bos)) c->bos = -1;
    if (unknown(c->pad)) c->pad = -1;
    c->eos.erase(std::remove_if(c->eos.begin(), c->eos.end(), unknown), c->eos.end());
}

bool hf_config_from_json(bnb_env *env, const std::string &dir, const json *config, const json *generation,
                         const std::vector<SourceTensor> &tensors, HfConfig *out, bnb_error *err) {
    const std::string path = dir + "/config.json", generation_path = dir + "/generation_config.json";
    for (const auto &file : {std::make_pair(config, &path), std::make_pair(generation, &generation_path)})
        if (file.first && !file.first->is_object())
            return failed(err, BNB_E_FORMAT, "%s is not a JSON object", printable_path(*file.second).c_str());
    const bool ok = !config              ? derive_config(env, dir, tensors, json::object(), out, err)
                    : is_mingpt(*config) ? derive_config(env, dir, tensors, (*config)["model"], out, err)
                                         : read_config_json(*config, path, tensors, out, err);
    if (!ok || (generation && !read_generation_config(*generation, generation_path, &out->config, err))) return false;
    drop_unknown_tokens(&out->config);
    return config_finish(out->config, err);
}

constexpr uint64_t max_config_bytes = 4 << 20; // real ones have some KB

bool hf_config_read(bnb_env *env, const Checkpoint &checkpoint, HfConfig *out, bnb_error *err) {
    const std::string &dir = checkpoint.directory();
    json files[2];
    const json *given[2] = {};
    for (int i = 0; i < 2; i++) {
        const std::string path = dir + (i == 0 ? "/config.json" : "/generation_config.json");
        if (!file_exists(path)) continue;
        if (!json_read(path, &files[i], err, max_config_bytes)) return false;
        given[i] = &files[i];
    }
    return hf_config_from_json(env, dir, given[0], given[1], checkpoint.tensors(), out, err);
}

} // namespace bnb
