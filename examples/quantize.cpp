// quantize: turns a checkpoint into a .bnb file, quantizing its linear weights on the way.
//
// Build: make     or  cc -O2 -c bnb.c
//                && c++ -std=c++17 -O2 -o quantize examples/quantize.cpp models/*.cpp bnb.o -pthread
// Use:   ./quantize path/to/opt-1.3b opt-1.3b-nf4.bnb --type nf4
// Not:   no calibration, no checkpoints that are quantized already. One tensor at a time is in memory.
#include "cli.h"

namespace {

struct Options {
    cli::Common common;
    cli::QuantOptions quant;
    std::string source, target;
};

cli::Program program(Options &o) {
    return {
        "turns a checkpoint into a .bnb file, quantizing its linear weights on the way",
        {"SRC OUT.bnb --type TYPE [options]"},
        cli::Rows{cli::heading("Files"),
                  {"SRC", "", &o.source, "a Hugging Face directory, a .safetensors file or a .bnb file"},
                  {"OUT.bnb", "", &o.target,
                   "written beside itself and renamed when complete: an older file survives failures"},
                  cli::heading("Weights")} +
            o.quant.rows_type("of linear weights; needed") + o.quant.rows() + cli::Rows{cli::heading("Other")} +
            o.common.rows(),
        "Bits per linear weight: nf4 and fp4 4.5 (4.127 with --double-quant), int8 8 and 32 per row, f16 and bf16 16.\n"
        "--verbose prints a line for each tensor.\n"};
}

std::string shape_text(const bnb_tensor *t) {
    std::string s;
    for (int32_t i = 0; i < bnb_tensor_n_dims(t); i++) s += (i ? "x" : "") + std::to_string(bnb_tensor_shape(t)[i]);
    return s;
}

// The result is read back for this, so what is printed is what the file holds.
void print_tensors(bnb_env *env, const std::string &path) {
    bnb_error err;
    const cli::File file(cli::need(bnb_file_open(env, path.c_str(), 0, &err), err));
    for (int32_t i = 0; i < bnb_file_tensor_count(file.get()); i++) {
        const bnb_tensor *t = bnb_file_tensor(file.get(), i);
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
    json.add("gb_per_s", r.seconds > 0 ? double(r.bytes_in) / r.seconds / 1e9 : 0);
    json.add("peak_bytes", cli::peak_bytes());
    cli::print(json.text() + "\n");
}

int body(int argc, char **argv) {
    Options o;
    const cli::Given given = cli::parse(program(o), argc, argv);
    if (o.source.empty() || o.target.empty()) cli::usage("two files are needed: SRC OUT.bnb");
    if (o.quant.type.empty()) cli::usage("--type is needed: nf4, fp4, int8, f16, bf16 or f32");
    const bnb_load_params load = o.quant.params(given);
    const cli::Env env = o.common.open_env();
    bnb_convert_result result = {};
    bnb_error err;
    cli::need(bnb_convert_checkpoint(env.get(), o.source.c_str(), o.target.c_str(), &load, &result, &err), err);
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
