// inspect: says what is in a model and what memory it needs.
//
// Build: make     or  cc -O2 -c bnb.c && c++ -std=c++17 -O2 -o inspect examples/inspect.cpp models/*.cpp bnb.o -pthread
// Use:   ./inspect model.bnb --tensors        ./inspect --synthetic opt-66b --type nf4 --n-ctx 2048
// Not:   changes nothing, computes nothing; a synthetic model stays a list of shapes.
#include "cli.h"

#include <map>

namespace {

struct Options {
    cli::Common common;
    cli::ModelOptions model;
    cli::QuantOptions quant;
    cli::SyntheticOptions synthetic;
    int64_t n_ctx = 0;
    bool tensors = false;
};

cli::Program program(Options &o) {
    return {
        "says what is in a model and what memory it needs",
        {"MODEL [options]", "--synthetic NAME --type TYPE [--n-ctx N] [options]"},
        cli::Rows{cli::heading("Model"),
                  {"MODEL", "", &o.model.path, "a .bnb file, a Hugging Face directory, a .safetensors or a PyTorch file"}} +
            o.synthetic.rows(o.quant) + o.quant.rows_type("as if linear weights had this type") + o.quant.rows() +
            o.model.rows() +
            cli::Rows{cli::heading("What to print"),
                      {"-c, --n-ctx, --ctx-size", "N", &o.n_ctx, "context to plan memory for; 0: the model's own", 0},
                      {"--tensors", "", &o.tensors, "a line for each tensor"},
                      {"--check", "", &o.quant.checksums, "read everything: checksums of .bnb and PyTorch files, NaN and infinity"}} +
            o.common.rows(),
        "The footprint is what get_memory_footprint() of transformers counts: codes, without scales.\n"};
}

std::string number(int64_t v) { return std::to_string(v); }

std::string shape_text(const bnb_tensor *t) {
    std::string s;
    for (int32_t i = 0; i < bnb_tensor_n_dims(t); i++) s += (i ? ", " : "") + number(bnb_tensor_shape(t)[i]);
    return "[" + s + "]";
}

std::string quant_text(const bnb_tensor *t) {
    const bnb_quant *q = bnb_tensor_quant(t);
    if (!bnb_type_is_quantized(bnb_tensor_type(t))) return "";
    if (bnb_tensor_type(t) == BNB_INT8) return cli::format("threshold %g", double(q->threshold));
    return cli::format("blocksize %d%s", q->blocksize, q->double_quant ? ", double_quant" : "");
}

struct TypeTotal {
    int64_t tensors = 0, elements = 0;
    uint64_t bytes = 0;
};

struct Report {
    bnb_model *model;
    bnb_model_info info;
    bnb_memory memory; // of a session of n_ctx tokens
    int64_t n_ctx;
    std::map<int32_t, TypeTotal> types;
    std::vector<std::pair<std::string, std::string>> config; // name, value; of .bnb files
};

void count_types(Report &r) {
    for (int32_t i = 0; i < bnb_model_tensor_count(r.model); i++) {
        const bnb_tensor *t = bnb_model_tensor(r.model, i);
        TypeTotal &total = r.types[bnb_tensor_type(t)];
        total.tensors += 1;
        total.elements += bnb_tensor_elements(t);
        total.bytes += bnb_tensor_bytes(t);
    }
}

std::string key_value(const bnb_file *file, const std::string &name, const bnb_file_key *key) {
    int64_t i = 0;
    double f = 0;
    uint64_t n = 0;
    if (key->kind == BNB_KEY_I64 && bnb_file_i64(file, name.c_str(), &i) == BNB_OK) return number(i);
    if (key->kind == BNB_KEY_F64 && bnb_file_f64(file, name.c_str(), &f) == BNB_OK) return cli::format("%.10g", f);
    if (const char *s = key->kind == BNB_KEY_STR ? bnb_file_str(file, name.c_str(), &n) : nullptr)
        return n > 80 ? cli::Json::quote(std::string(s, 80)) + "..." : cli::Json::quote(std::string(s, size_t(n)));
    std::string list;
    if (const int64_t *v = key->kind == BNB_KEY_I64_ARRAY ? bnb_file_i64_array(file, name.c_str(), &n) : nullptr)
        for (uint64_t k = 0; k < std::min<uint64_t>(n, 8); k++) list += (k ? ", " : "") + number(v[k]);
    return "[" + list + (n > 8 ? ", ..." : "") + "]";
}

void read_config(Report &r, const bnb_file *file) {
    for (int32_t i = 0; i < bnb_file_key_count(file); i++) {
        const char *bytes = nullptr;
        const bnb_file_key *key = bnb_file_key_at(file, i, &bytes);
        const std::string name(bytes, key->name_bytes);
        r.config.push_back({name, key_value(file, name, key)});
    }
}

bool is_bnb_file(const std::string &path) {
    char magic[8] = {};
    FILE *f = fopen(path.c_str(), "rb");
    const bool is = f && fread(magic, 1, 8, f) == 8 && memcmp(magic, BNB_FILE_MAGIC, 8) == 0;
    if (f) fclose(f);
    return is;
}

void check(bnb_env *env, const Report &r) {
    bnb_error err;
    const int32_t n = bnb_model_tensor_count(r.model);
    for (int32_t i = 0; i < n; i++) {
        cli::need(bnb_tensor_check_finite(env, bnb_model_tensor(r.model, i), &err), err);
        if (!bnb_progress(env, "check", double(i + 1) / n)) cli::stop_if_interrupted();
    }
}

std::string token_text(const bnb_model *model, int32_t id) {
    size_t n = 0;
    const char *bytes = bnb_token_bytes(model, id, &n);
    return cli::Json::quote(std::string(bytes, n));
}

void print_text(const Options &o, const Report &r) {
    const bnb_model_info &m = r.info;
    std::string out = cli::format("%s: %s, %.3f billion parameters, linear weights %s\n",
                                  o.synthetic.name.empty() ? o.model.path.c_str() : o.synthetic.name.c_str(), m.arch,
                                  double(m.n_params) / 1e9, bnb_type_name(m.linear_type));
    const auto row = [&](const char *name, const std::string &value) {
        out += cli::format("  %-22s %s\n", name, value.c_str());
    };
    row("layers", number(m.n_layer));
    row("heads", number(m.n_head));
    row("n_embd", number(m.n_embd));
    row("n_vocab", number(m.n_vocab));
    row("n_ctx", number(m.n_ctx));
    const int32_t bos = bnb_model_bos(r.model);
    row("tokenizer", !m.has_tokenizer ? "none"
                     : bos < 0        ? "yes"
                                      : "yes, text starts with " + number(bos) + " " + token_text(r.model, bos));
    row("compute", bnb_model_compute(r.model));
    out += "\nbytes by type\n";
    for (const auto &[type, total] : r.types)
        row(bnb_type_name(type),
            cli::format("%5lld tensors %16lld numbers %s", static_cast<long long>(total.tensors),
                        static_cast<long long>(total.elements), cli::gib_text(total.bytes).c_str()));
    out += "\nmemory\n";
    row("footprint", cli::gib_text(m.footprint));
    row("weights", cli::gib_text(r.memory.weights));
    row("KV cache", cli::gib_text(r.memory.state) + cli::format(" for %lld tokens", static_cast<long long>(r.n_ctx)));
    row("work", cli::gib_text(r.memory.work));
    row("total (cpu)", cli::gib_text(r.memory.weights + r.memory.state + r.memory.work));
    if (!r.config.empty()) out += "\nkeys\n";
    for (const auto &[name, value] : r.config) row(name.c_str(), value);
    if (o.tensors) out += "\ntensors\n";
    for (int32_t i = 0; o.tensors && i < bnb_model_tensor_count(r.model); i++) {
        const bnb_tensor *t = bnb_model_tensor(r.model, i);
        out += cli::format("  %-44s %-18s %-5s %12llu bytes  %s\n", bnb_tensor_name(t), shape_text(t).c_str(),
                           bnb_type_name(bnb_tensor_type(t)), static_cast<unsigned long long>(bnb_tensor_bytes(t)),
                           quant_text(t).c_str());
    }
    if (o.quant.checksums) out += o.synthetic.name.empty() ? "\nchecked: no damage, no NaN, no infinity\n" : "";
    cli::print(out);
}

std::vector<cli::Json> types_json(const Report &r) {
    std::vector<cli::Json> list;
    for (const auto &[type, total] : r.types)
        list.push_back(cli::Json()
                           .add("type", bnb_type_name(type))
                           .add("n_tensors", total.tensors)
                           .add("n_elements", total.elements)
                           .add("bytes", total.bytes));
    return list;
}

std::vector<cli::Json> tensors_json(const Report &r) {
    std::vector<cli::Json> list;
    for (int32_t i = 0; i < bnb_model_tensor_count(r.model); i++) {
        const bnb_tensor *t = bnb_model_tensor(r.model, i);
        cli::Json row;
        row.add("name", bnb_tensor_name(t)).add("type", bnb_type_name(bnb_tensor_type(t)));
        row.add("shape", bnb_tensor_shape(t), size_t(bnb_tensor_n_dims(t))).add("bytes", bnb_tensor_bytes(t));
        if (bnb_type_is_quantized(bnb_tensor_type(t))) row.add("quant", quant_text(t));
        list.push_back(row);
    }
    return list;
}

void print_json(const Options &o, const Report &r) {
    const bnb_model_info &m = r.info;
    cli::Json json;
    json.add("model", o.synthetic.name.empty() ? o.model.path : o.synthetic.name).add("arch", m.arch);
    json.add("n_params", m.n_params).add("n_layer", m.n_layer).add("n_head", m.n_head).add("n_embd", m.n_embd);
    json.add("n_vocab", m.n_vocab).add("n_ctx", m.n_ctx).add("linear_type", bnb_type_name(m.linear_type));
    json.add("has_tokenizer", m.has_tokenizer != 0).add("bos", bnb_model_bos(r.model));
    json.add("compute", bnb_model_compute(r.model));
    json.add("footprint_bytes", m.footprint).add("footprint_gib", cli::gib(m.footprint));
    json.add("plan_n_ctx", r.n_ctx).add("weight_bytes", r.memory.weights).add("kv_bytes", r.memory.state);
    json.add("work_bytes", r.memory.work).add("total_gib", cli::gib(r.memory.weights + r.memory.state + r.memory.work));
    json.add("types", types_json(r));
    if (o.tensors) json.add("tensors", tensors_json(r));
    if (o.quant.checksums) json.add("checked", true);
    cli::print(json.text() + "\n");
}

int body(int argc, char **argv) {
    Options o;
    const cli::Given given = cli::parse(program(o), argc, argv);
    const bool synthetic = !o.synthetic.name.empty();
    if (synthetic == !o.model.path.empty()) cli::usage("give either MODEL or --synthetic NAME");
    const cli::Env env = o.common.open_env();
    bnb_error err;
    cli::File file;
    if (!synthetic && is_bnb_file(o.model.path))
        file.reset(cli::need(bnb_file_open(env.get(), o.model.path.c_str(), 0, &err), err));
    const cli::Model model = synthetic ? o.synthetic.make(env.get(), true, given, o.quant, o.model)
                                       : o.model.load(env.get(), given, o.quant);
    Report r = {model.get(), cli::model_info(model.get()), {}, 0, {}, {}};
    r.n_ctx = o.n_ctx ? o.n_ctx : r.info.n_ctx;
    cli::need(bnb_model_memory(r.model, r.n_ctx, &r.memory, &err), err);
    count_types(r);
    if (file) read_config(r, file.get());
    if (o.quant.checksums && !synthetic) check(env.get(), r);
    cli::hide_bar();
    if (o.common.json) print_json(o, r);
    else print_text(o, r);
    return cli::DONE;
}

} // namespace

int main(int argc, char **argv) {
    return cli::run(argc, argv, [&] { return body(argc, argv); });
}
