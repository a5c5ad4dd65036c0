// quantize: turns a checkpoint into a .bnb file or a Hugging Face directory, quantizing its linear weights on the way.
//
// Build: make     or  cc -O2 -c bnb.c
//                && c++ -std=c++17 -O2 -o quantize examples/quantize.cpp models/*.cpp bnb.o -pthread
// Use:   ./quantize path/to/opt-1.3b opt-1.3b-nf4.bnb --type nf4
//        ./quantize opt-1.3b-nf4.bnb opt-1.3b-nf4 --format hf            for transformers and bitsandbytes
// Not:   no calibration. One tensor at a time is in memory.
#include "cli.h"

namespace {

struct Options {
    cli::Common common;
    cli::QuantOptions quant;
    std::string source, target, format = "bnb";
    double shard_gb = 5;
};

cli::Program program(Options &o) {
    return {
        "turns a checkpoint into a .bnb file or a Hugging Face directory, quantizing its linear weights on the way",
        {"SRC OUT.bnb --type TYPE [options]", "SRC OUT --format hf [--type TYPE] [options]"},
        cli::Rows{cli::heading("Files"),
                  {"SRC", "", &o.source, "a .bnb file, a Hugging Face directory, a .safetensors or a PyTorch file"},
                  {"OUT", "", &o.target,
                   "written beside itself and renamed when complete: an older file survives failures; a directory must "
                   "be new or empty"},
                  {"--format", "bnb|hf", &o.format, "a .bnb file, or a directory for transformers and bitsandbytes"},
                  {"--shard-size", "GB", &o.shard_gb, "hf: more weights than this go to several files, in 1e9 bytes",
                   1e-6, 1e9},
                  cli::heading("Weights")} +
            o.quant.rows_type(
                "of linear weights; stored: as they are. Needed, but for --format hf (default there: stored)") +
            o.quant.rows() + cli::Rows{cli::heading("Other")} + o.common.rows(),
        "Bits per linear weight: nf4 and fp4 4.5 (4.127 with --double-quant), int8 8 and 32 per row, f16 and bf16 16.\n"
        "--verbose prints a line for each tensor.\n"};
}

std::string shape_text(const bnb_tensor *t) {
    std::string s;
    for (int32_t i = 0; i < bnb_tensor_n_dims(t); i++) s += (i ? "x" : "") + std::to_string(bnb_tensor_shape(t)[i]);
    return s;
}

// The result is read back for this, so what is printed is what it holds.
void print_tensors(bnb_env *env, const std::string &path) {
    bnb_error err;
    const cli::Model model(cli::need(bnb_model_load(env, path.c_str(), nullptr, nullptr, &err), err));
    for (int32_t i = 0; i < bnb_model_tensor_count(model.get()); i++) {
        const bnb_tensor *t = bnb_model_tensor(model.get(), i);
        const int32_t type = bnb_tensor_type(t),
                      before = bnb_type_is_quantized(type) ? bnb_tensor_quant(t)->dtype : type;
        const uint64_t bytes = uint64_t(bnb_tensor_elements(t)) * uint64_t(bnb_type_bits(before)) / 8;
        fprintf(stderr, "%-48s %-14s %-5s %10.3f MiB -> %-5s %10.3f MiB\n", bnb_tensor_name(t), shape_text(t).c_str(),
                bnb_type_name(before), double(bytes) / (1 << 20), bnb_type_name(type),
                double(bnb_tensor_bytes(t)) / (1 << 20));
    }
}

void print_totals(const bnb_convert_result &r) {
    const auto n = [](int64_t v) { return static_cast<long long>(v); };
    cli::print(
        cli::format("%lld tensors, %lld of them quantized\n%.3f GiB -> %.3f GiB (%.1f %%) in %.2f s, %.2f GB/s\n",
                    n(r.n_tensors), n(r.n_quantized), cli::gib(r.bytes_in), cli::gib(r.bytes_out),
                    r.bytes_in ? 100.0 * double(r.bytes_out) / double(r.bytes_in) : 0, r.seconds,
                    r.seconds > 0 ? double(r.bytes_in) / r.seconds / 1e9 : 0));
}

void print_json(const bnb_convert_result &r) {
    cli::Json json;
    json.add("n_tensors", r.n_tensors).add("n_quantized", r.n_quantized);
    json.add("bytes_in", r.bytes_in).add("bytes_out", r.bytes_out).add("seconds", r.seconds);
    json.add("read_s", r.read_s).add("quantize_s", r.quantize_s);
    json.add("gb_per_s", r.seconds > 0 ? double(r.bytes_in) / r.seconds / 1e9 : 0);
    json.add("peak_bytes", cli::peak_bytes());
    cli::print(json.text() + "\n");
}

int body(int argc, char **argv) {
    Options o;
    const cli::Given given = cli::parse(program(o), argc, argv);
    const bool hf = o.format == "hf";
    if (o.source.empty() || o.target.empty()) cli::usage("two files are needed: SRC OUT");
    if (o.quant.type.empty() && !hf) cli::usage("--type is needed: nf4, fp4, int8, f16, bf16, f32 or stored");
    if (given(&o.shard_gb) && !hf) cli::usage("--shard-size is for --format hf");
    bnb_save_params save;
    bnb_save_params_default(&save, sizeof save);
    save.format = hf ? BNB_FORMAT_HF : BNB_FORMAT_BNB;
    save.shard_bytes = uint64_t(o.shard_gb * 1e9);
    const bnb_load_params load = o.quant.params(given);
    const cli::Env env = o.common.open_env();
    bnb_convert_result result = {};
    bnb_error err;
    cli::need(bnb_convert_checkpoint(env.get(), o.source.c_str(), o.target.c_str(), &load, &save, &result, &err), err);
    cli::hide_bar();
    if (cli::console.verbose) print_tensors(env.get(), o.target);
    if (o.common.json) print_json(result);
    else print_totals(result);
    return cli::DONE;
}

} // namespace

int main(int argc, char **argv) {
    return cli::run(argc, argv, [&] { return body(argc, argv); });
}
