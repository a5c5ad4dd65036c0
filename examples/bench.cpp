// bench: how fast a model, or one matrix product, is on this machine, and how much of the machine's limit that is.
//
// Build: make     or  cc -O2 -c bnb.c && c++ -std=c++17 -O2 -o bench examples/bench.cpp models/*.cpp bnb.o -pthread
// Use:   ./bench -m model.bnb            ./bench --synthetic opt-1.3b --type nf4
//        ./bench --ops --shape 4096,4096 --type nf4 -b 1,4,16,64,512
//        ./bench --load -m path/to/opt-1.3b --type nf4
// Not:   no comparison with other programs, no control of the clock rate: look at the spread, use a quiet machine.
//
// Decoding one token reads every weight once, so its limit is memory bandwidth. That limit is measured here, with the
// same threads, and decode speed is given as a part of it.
#include "cli.h"

#include <stdlib.h>

#include <memory>
#ifndef _WIN32
#include <unistd.h>
#endif

namespace {

struct Options {
    cli::Common common;
    cli::ModelOptions model;
    cli::QuantOptions quant;
    cli::SyntheticOptions synthetic;
    std::string batch = "1", shape = "4096,4096";
    int64_t n_prompt = 512, n_gen = 128, reps = 5;
    bool ops = false, profile = false, load = false;
};

cli::Program program(Options &o) {
    return {
        "measures the speed of a model or of one matrix product, and its part of the machine's limit",
        {"-m MODEL [options]", "--synthetic NAME --type TYPE [options]", "--load -m MODEL [--type TYPE] [options]",
         "--ops [--shape N,K] [--type TYPE] [-b 1,4,16,64,512,2048] [options]"},
        cli::Rows{cli::heading("Model")} + o.model.row_path() + o.synthetic.rows(o.quant) +
            o.quant.rows_type(
                "of linear weights: of --synthetic, --ops (default there: nf4), or a checkpoint quantized on load") +
            o.quant.rows() + o.model.rows() +
            cli::Rows{cli::heading("What to measure"),
                      {"-p, --n-prompt", "N", &o.n_prompt, "prompt tokens (prefill); 0: skip", 0},
                      {"-n, --n-gen", "N", &o.n_gen, "generated tokens (decode); 0: skip", 0},
                      {"-b, --batch", "LIST", &o.batch, "sequences that a model decodes together (one number); --ops: rows of a product"},
                      {"-r, --reps", "N", &o.reps, "repetitions; the median is reported, one more warms up", 1, 10000},
                      {"--profile", "", &o.profile, "also print where the time of one token goes, kernel by kernel"},
                      {"--load", "", &o.load, "measure how fast the model is loaded, until each weight was read once"},
                      {"--ops", "", &o.ops, "measure y = x W^T instead of a model"},
                      {"--shape", "N,K", &o.shape, "of W with --ops"}} +
            cli::Rows{cli::heading("Other")} + o.common.rows(),
        "Speeds are the median of the repetitions, with the slowest and the fastest. Bandwidth is measured by adding "
        "up\n"
        "a buffer that no cache holds, on the same threads.\n"};
}

int64_t positive(const char *option, const std::string &text) {
    int64_t value = 0;
    const cli::Option row = {option, "N", &value, "", 1, 1 << 24};
    cli::assign(option, text, row);
    return value;
}

std::vector<int64_t> positive_list(const char *option, const std::string &text) {
    std::vector<int64_t> values;
    for (const std::string &s : cli::split(text, ',')) values.push_back(positive(option, s));
    if (values.empty()) cli::usage(std::string(option) + ": the list is empty");
    return values;
}

// splitmix64: the same numbers on every machine
struct Random {
    uint64_t state;
    uint64_t next() {
        uint64_t z = state += 0x9E3779B97F4A7C15u;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        return z ^ z >> 31;
    }
    float normal() { // nearly: the sum of four uniform numbers, scaled to variance 1
        const uint64_t r = next();
        float sum = 0;
        for (int i = 0; i < 4; i++) sum += float(r >> (16 * i) & 0xFFFF) / 65536.0f - 0.5f;
        return sum * 1.7320508f;
    }
};

// ---- memory bandwidth ---------------------------------------------------------------------------------------------

typedef uint64_t Vector __attribute__((vector_size(16)));

// More bytes than the caches keep from one reading to the next.
size_t beyond_caches() {
    size_t last = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
    last = size_t(std::max(sysconf(_SC_LEVEL3_CACHE_SIZE), 0L));
#endif
    return std::min(std::max(size_t(1) << 29, 2 * last), size_t(1) << 30) >> 20 << 20;
}

struct Buffer {
    static constexpr size_t part = size_t(1) << 20; // much shorter, and the stream of reads begins anew too often
    bnb_env *env;
    size_t bytes = beyond_caches();
    Vector *data = static_cast<Vector *>(bnb_alloc(env, bytes, nullptr)); // memory as weights have, in large pages
    std::vector<uint64_t> sums = std::vector<uint64_t>(bytes / part);
    explicit Buffer(bnb_env *e) : env(e) {}
    ~Buffer() { bnb_free(env, data, bytes); }

    static void fill(void *self, int64_t i) {
        memset(reinterpret_cast<char *>(static_cast<Buffer *>(self)->data) + size_t(i) * part, 1, part);
    }
    static void sum(void *self, int64_t i) { // four sums by name: an array would lie in memory where code is to be small
        Buffer &buffer = *static_cast<Buffer *>(self);
        const Vector *v = buffer.data + size_t(i) * (part / sizeof *v), *end = v + part / sizeof *v;
        Vector a = {}, b = {}, c = {}, d = {};
        for (; v < end; v += 4) {
            __builtin_prefetch(reinterpret_cast<const char *>(v) + 2048); // as kernels do: without, some CPUs read less
            a += v[0], b += v[1], c += v[2], d += v[3];
        }
        a += b + c + d;
        buffer.sums[size_t(i)] = a[0] + a[1]; // nothing is dead code
    }
};

// Bytes per second; the best of several runs, because a limit is asked for.
double read_bandwidth(bnb_env *env) {
    Buffer buffer(env);
    if (!buffer.data) cli::fail(cli::format("no memory to measure bandwidth with (%zu MiB)", buffer.bytes >> 20));
    const int64_t parts = int64_t(buffer.sums.size());
    bnb_parallel(env, parts, Buffer::fill, &buffer);
    double best = 1e30;
    for (int i = 0; i < 8; i++) {
        const double start = cli::now();
        bnb_parallel(env, parts, Buffer::sum, &buffer);
        best = std::min(best, cli::now() - start);
        cli::stop_if_interrupted();
    }
    return double(buffer.bytes) / best;
}

// ---- a model ------------------------------------------------------------------------------------------------------

struct Speed { // per second
    double median = 0, low = 0, high = 0;
    explicit Speed(const std::vector<double> &v) {
        if (v.empty()) return;
        median = cli::median(v);
        low = *std::min_element(v.begin(), v.end());
        high = *std::max_element(v.begin(), v.end());
    }
    std::string text() const { return cli::format("%.2f tok/s  (%.2f .. %.2f)", median, low, high); }
};

// Tokens that share no prefix with those of another run: nothing is found in the cache.
std::vector<int32_t> random_tokens(int64_t n, int64_t n_vocab, int64_t run) {
    Random random = {uint64_t(run) << 32};
    std::vector<int32_t> ids(size_t(std::max<int64_t>(n, 1)));
    for (int32_t &id : ids) id = int32_t(random.next() % uint64_t(n_vocab));
    ids[0] = int32_t(run % n_vocab);
    return ids;
}

void sync(bnb_session *s, const std::vector<int32_t> &ids, int64_t n) {
    bnb_error err;
    cli::need(bnb_session_sync(s, ids.data(), n, &err), err);
    cli::stop_if_interrupted();
}

// Seconds for n tokens: all at once after nothing, or one by one after one token.
double prefill_seconds(bnb_session *s, const std::vector<int32_t> &ids) {
    const double start = cli::now();
    sync(s, ids, int64_t(ids.size()));
    return cli::now() - start;
}

// Greedy, every sequence from a token of its own.
double decode_seconds(bnb_session *s, const std::vector<int32_t> &ids, int64_t n_gen) {
    bnb_error err;
    bnb_generate_result r;
    std::vector<const int32_t *> prompts;
    for (const int32_t &id : ids) prompts.push_back(&id);
    const std::vector<int64_t> lengths(ids.size(), 1);
    std::vector<int32_t> out(ids.size() * size_t(n_gen + 1));
    cli::need(bnb_generate_batch(s, prompts.data(), lengths.data(), n_gen + 1, out.data(), &r, &err), err);
    cli::stop_if_interrupted();
    return r.generate_s;
}

// Weights that one token needs: all but tables of which it reads a row. The token table is the output head as well
// where there is no other head.
uint64_t bytes_per_token(const bnb_model *model) {
    uint64_t all = 0, tables = 0, token_table = 0;
    bool own_head = false;
    for (int32_t i = 0; i < bnb_model_tensor_count(model); i++) {
        const bnb_tensor *t = bnb_model_tensor(model, i);
        const std::string name = bnb_tensor_name(t);
        const auto has = [&](const char *part) { return name.find(part) != std::string::npos; };
        all += bnb_tensor_bytes(t);
        if (has("wpe.") || has("embed_positions.")) tables += bnb_tensor_bytes(t);
        if (has("wte.") || has("embed_tokens.")) token_table += bnb_tensor_bytes(t);
        own_head = own_head || has("lm_head.");
    }
    return all - tables - (own_head ? token_table : 0);
}

struct Result {
    bnb_model_info info;
    std::string compute;
    int32_t threads;
    double load_s;
    Speed prefill, decode;
    uint64_t bytes_token, peak;
    double bandwidth; // bytes per second
    int64_t batch;    // sequences that read the weights together
    std::string device, profile;
    uint64_t device_peak, device_planned;

    double used() const { return double(bytes_token) * decode.median / double(batch); }
    double percent() const { return 100 * used() / bandwidth; }
};

Result measure(const Options &o, bnb_env *env, bnb_model *model, double load_s, int64_t batch) {
    const bnb_model_info info = cli::model_info(model);
    bnb_error err;
    const int64_t n_ctx = std::max(o.n_prompt, o.n_gen + 1);
    if (n_ctx > info.n_ctx)
        cli::fail(cli::format("%lld tokens are more than this model's context of %lld: lower -p or -n",
                              static_cast<long long>(n_ctx), static_cast<long long>(info.n_ctx)));
    const cli::Session session(cli::need(bnb_session_create_batch(model, n_ctx, int32_t(batch), &err), err));
    std::vector<double> prefill, decode;
    for (int64_t rep = 0; rep <= o.reps; rep++) { // rep 0 warms up
        const double p =
            o.n_prompt
                ? double(o.n_prompt) / prefill_seconds(session.get(), random_tokens(o.n_prompt, info.n_vocab, 2 * rep))
                : 0;
        const double d =
            o.n_gen
                ? double(batch * o.n_gen) / decode_seconds(session.get(), random_tokens(batch, info.n_vocab, 2 * rep + 1), o.n_gen)
                : 0;
        if (rep && o.n_prompt) prefill.push_back(p);
        if (rep && o.n_gen) decode.push_back(d);
        bnb_progress(env, "bench", double(rep + 1) / double(o.reps + 1));
    }
    const uint64_t peak = cli::peak_bytes(); // before the bandwidth buffer
    bnb_device_info device, limit;
    bnb_memory planned;
    std::string profile(1 << 14, '\0');
    size_t length = 1;
    if (o.profile) cli::need(bnb_session_profile(session.get(), &profile[0], profile.size(), &length, &err), err);
    profile.resize(std::min(profile.size(), length) - 1);
    bnb_backend *backend = bnb_model_backend(model);
    bnb_session_memory(session.get(), &planned);
    cli::need(bnb_backend_info(bnb_session_backend(session.get()), 0, &device, &err), err);
    cli::need(bnb_backend_info(backend, 0, &limit, &err), err);
    device.peak_bytes += limit.used_bytes; // the session's, while the weights were there
    cli::need(bnb_backend_info(backend, 1, &limit, &err), err);
    return {info,
            bnb_model_compute(model),
            bnb_env_threads(env),
            load_s,
            Speed(prefill),
            Speed(decode),
            bytes_per_token(model),
            peak,
            limit.read_bandwidth > 0 ? limit.read_bandwidth : read_bandwidth(env),
            batch,
            device.description,
            profile,
            device.peak_bytes,
            planned.weights + planned.state + planned.work};
}

void print_model(const Options &o, const std::string &name, const Result &r) {
    std::string out;
    const auto row = [&](const std::string &what, const std::string &value) {
        out += cli::format("%-18s %s\n", what.c_str(), value.c_str());
    };
    row("model", cli::format("%s, %.3f billion parameters, linear weights %s", name.c_str(),
                             double(r.info.n_params) / 1e9, bnb_type_name(r.info.linear_type)));
    if (!r.device.empty()) row("device", r.device);
    row("compute", r.device.empty() ? cli::format("%s, %d threads", r.compute.c_str(), r.threads) : r.compute);
    row("load", cli::format("%.3f s", r.load_s));
    row("footprint", cli::gib_text(r.info.footprint));
    row("peak memory", cli::gib_text(r.peak));
    if (!r.device.empty()) row("peak on device", cli::gib_text(r.device_peak) + ", planned " + cli::gib_text(r.device_planned));
    if (o.n_prompt) row(cli::format("prefill (pp%lld)", static_cast<long long>(o.n_prompt)), r.prefill.text());
    const std::string sequences = r.batch > 1 ? cli::format(", %lld sequences", static_cast<long long>(r.batch)) : "";
    if (o.n_gen) row(cli::format("decode (tg%lld)", static_cast<long long>(o.n_gen)), r.decode.text() + sequences);
    row("bandwidth", cli::format("%.2f GB/s measured by reading memory", r.bandwidth / 1e9));
    if (o.n_gen)
        row("decode reads", cli::format("%.3f GB of weights per step, %.2f GB/s, %.1f %% of that",
                                        double(r.bytes_token) / 1e9, r.used() / 1e9, r.percent()));
    cli::print(out + r.profile);
}

void print_model_json(const Options &o, const std::string &name, const Result &r) {
    cli::Json json;
    json.add("model", name).add("arch", r.info.arch).add("type", bnb_type_name(r.info.linear_type));
    json.add("n_params", r.info.n_params).add("compute", r.compute).add("threads", r.threads);
    json.add("n_prompt", o.n_prompt).add("n_gen", o.n_gen).add("batch", r.batch).add("reps", o.reps);
    json.add("prefill_tok_s", r.prefill.median)
        .add("prefill_tok_s_min", r.prefill.low)
        .add("prefill_tok_s_max", r.prefill.high);
    json.add("decode_tok_s", r.decode.median)
        .add("decode_tok_s_min", r.decode.low)
        .add("decode_tok_s_max", r.decode.high);
    json.add("load_s", r.load_s)
        .add("footprint_gib", cli::gib(r.info.footprint))
        .add("weight_bytes", r.info.weight_bytes);
    json.add("peak_bytes", r.peak).add("bytes_per_token", r.bytes_token).add("read_gb_s", r.bandwidth / 1e9);
    if (!r.device.empty()) json.add("device", r.device).add("device_peak_bytes", r.device_peak).add("device_planned_bytes", r.device_planned);
    json.add("decode_gb_s", r.used() / 1e9).add("pct_of_bandwidth", r.percent());
    cli::print(json.text() + "\n");
}

void bench_model(const Options &o, const cli::Given &given, bnb_env *env) {
    const std::vector<int64_t> batch = positive_list("--batch", o.batch);
    if (batch.size() != 1) cli::usage("--batch: one number is needed for a model");
    const bool synthetic = !o.synthetic.name.empty();
    if (synthetic == !o.model.path.empty()) cli::usage("give one of -m MODEL, --synthetic NAME and --ops");
    const double start = cli::now();
    const cli::Model model =
        synthetic ? o.synthetic.make(env, false, given, o.quant, o.model) : o.model.load(env, given, o.quant);
    const Result r = measure(o, env, model.get(), cli::now() - start, batch[0]);
    const std::string name = synthetic ? o.synthetic.name : o.model.path;
    cli::hide_bar();
    if (o.common.json) print_model_json(o, name, r);
    else print_model(o, name, r);
}

// ---- one matrix product -------------------------------------------------------------------------------------------

struct Products { // y [M, N] = x [M, K] W [N, K]^T, several times in one plan, each with its own W
    cli::Ctx ctx;
    cli::Plan plan;
};

struct Bench {
    const Options &o;
    bnb_env *env;
    int32_t type;
    int64_t n, k;
    bnb_quant quant;
    bnb_plan_params plan_params;
    cli::Backend backend, host; // host: the CPU, where w is made
    cli::Ctx weights; // holds w on the host, from which every product's own W is copied
    bnb_tensor *w;
    bool on_cpu;

    // as_f16: the same with weights in f16, to compare with
    Bench(const Options &options, const cli::Given &given, bnb_env *env, bool as_f16 = false);
    uint64_t bytes() const { return bnb_tensor_bytes(w); }
    bnb_tensor *new_weight(bnb_ctx *ctx) const {
        const int64_t shape[2] = {n, k};
        return bnb_tensor_new(ctx, type, bnb_type_is_quantized(type) ? &quant : nullptr, 2, shape, "w");
    }
    void make_weights();
    Products products(int64_t m, size_t copies) const;
    double seconds(int64_t m, std::string *kernel) const;
};

Bench::Bench(const Options &options, const cli::Given &given, bnb_env *e, bool as_f16) : o(options), env(e), w(nullptr) {
    const std::vector<int64_t> shape = positive_list("--shape", o.shape);
    if (shape.size() != 2) cli::usage("--shape: two numbers are needed, N,K");
    n = shape[0];
    k = shape[1];
    const bnb_load_params load = o.quant.params(given);
    const bnb_model_params model = o.model.params(given, o.quant);
    type = as_f16 ? int32_t{BNB_F16} : load.type;
    quant = bnb_quant_default(type);
    if (!as_f16) {
        quant.blocksize = load.blocksize;
        quant.double_quant = load.double_quant;
        quant.threshold = load.threshold;
        if (model.outlier_rule >= 0) quant.outlier_rule = model.outlier_rule;
    }
    bnb_plan_params_default(&plan_params, sizeof plan_params);
    plan_params.compute_dtype = model.compute_dtype;
    bnb_error err;
    const std::string device = model.device;
    backend.reset(cli::need(bnb_backend_open(env, device.c_str(), &err), err));
    host.reset(cli::need(bnb_backend_open(env, "cpu", &err), err));
    on_cpu = !strcmp(bnb_backend_name(backend.get()), "cpu");
    make_weights();
}

void Bench::make_weights() {
    bnb_error err;
    const int64_t shape[2] = {n, k};
    weights.reset(cli::need(bnb_ctx_create(env, &err), err));
    const cli::Ctx scratch(cli::need(bnb_ctx_create(env, &err), err));
    bnb_tensor *source = bnb_tensor_new(scratch.get(), BNB_F32, nullptr, 2, shape, "source");
    w = new_weight(weights.get());
    cli::need(bnb_ctx_alloc(scratch.get(), host.get(), &err), err);
    cli::need(bnb_ctx_alloc(weights.get(), host.get(), &err), err);
    Random random = {1};
    float *values = static_cast<float *>(bnb_tensor_plane(source, 0));
    for (int64_t i = 0; i < n * k; i++) values[i] = random.normal() * 0.02f;
    if (bnb_type_is_quantized(type)) cli::need(bnb_quantize(env, source, w, o.quant.compat_id(), &err), err);
    else cli::need(bnb_convert(BNB_F32, values, type, bnb_tensor_plane(w, 0), n * k, &err), err);
    quant = *bnb_tensor_quant(w); // with the offset that quantizing found
}

Products Bench::products(int64_t m, size_t copies) const {
    bnb_error err;
    const int64_t shape[2] = {m, k};
    Products p;
    p.ctx.reset(cli::need(bnb_ctx_create(env, &err), err));
    const int64_t sum_shape[2] = {m, n};
    bnb_tensor *x = bnb_input(p.ctx.get(), BNB_F32, 2, shape, "x"), *sum = bnb_input(p.ctx.get(), BNB_F32, 2, sum_shape, "sum");
    // as in a model: x comes from an op before, in the type that the product wants, and the results are added to one sum, each
    // where the sum lies, which also keeps products of the same x from being made by one kernel
    bnb_tensor *h = bnb_scale(p.ctx.get(), x, 1), *y = sum;
    std::vector<bnb_tensor *> ws;
    for (size_t i = 0; i < copies; i++) {
        bnb_tensor *copy = on_cpu ? new_weight(p.ctx.get())
                                  : bnb_tensor_place(p.ctx.get(), backend.get(), w, plan_params.compute_dtype);
        ws.push_back(cli::need(copy, err));
        y = bnb_add(p.ctx.get(), y, bnb_linear(p.ctx.get(), h, ws.back(), nullptr));
    }
    bnb_graph *graph = cli::need(bnb_graph_create(p.ctx.get(), &y, 1, &err), err);
    if (on_cpu) cli::need(bnb_ctx_alloc(p.ctx.get(), backend.get(), &err), err);
    for (bnb_tensor *copy : ws) {
        if (!on_cpu) cli::need(bnb_tensor_upload(copy, w, &err), err);
        for (int32_t i = 0; on_cpu && i < BNB_MAX_PLANES; i++) // uploaded to a CPU, all would share one memory
            if (const uint64_t n = bnb_plane_bytes(type, &quant, 2, bnb_tensor_shape(w), i))
                memcpy(bnb_tensor_plane(copy, i), bnb_tensor_plane(w, i), n);
    }
    p.plan.reset(cli::need(bnb_plan_create(backend.get(), graph, &plan_params, &err), err));
    cli::need(bnb_plan_alloc(p.plan.get(), &err), err);
    Random random = {2};
    std::vector<float> values(size_t(m * k));
    for (float &v : values) v = random.normal();
    cli::need(bnb_tensor_write(x, 0, values.data(), values.size() * sizeof(float), &err), err);
    values.assign(size_t(m * n), 0.5f);
    cli::need(bnb_tensor_write(sum, 0, values.data(), values.size() * sizeof(float), &err), err);
    return p;
}

// The third word of the line of a product, or of the sum that it is computed with.
std::string kernel_name(const bnb_plan *plan) {
    std::string text(bnb_plan_describe(plan, nullptr, 0) + 1, '\0');
    bnb_plan_describe(plan, text.data(), text.size());
    char op[128] = "", name[128] = "";
    for (size_t at = 0; at < text.size(); at = text.find('\n', at) + 1) {
        if (sscanf(text.c_str() + at, "%*s %127s %127s", op, name) != 2) break;
        if (strstr(name, "linear")) return name;
    }
    return "none";
}

// Of one product with m rows. Few rows: the plan goes over more weights than any cache holds, as the layers of a model
// do (if they have a megabyte each: smaller ones stay in the cache, as those of a small model would). On a GPU at least 8 to 32
// products, whatever the type, so that the op before them is a small and equal part.
double Bench::seconds(int64_t m, std::string *kernel) const {
    const uint64_t all = on_cpu ? beyond_caches() : 256u << 20;
    const uint64_t least = on_cpu ? 1 : std::clamp<uint64_t>((1u << 30) / (uint64_t(n) * uint64_t(k) * 2), 8, 32); // 1 GiB of f16
    const size_t copies = size_t(m <= 64 ? std::max(std::min<uint64_t>(all / bytes() + 2, 256), least) : least);
    const Products p = products(m, copies);
    *kernel = kernel_name(p.plan.get());
    bnb_error err;
    std::vector<double> times;
    for (int64_t rep = 0; rep <= o.reps; rep++) { // rep 0 warms up
        const double start = cli::now();
        size_t runs = 0;
        do { // for at least 0.1 s
            for (int i = 0; i < 8; i++) cli::need(bnb_plan_run(p.plan.get(), &err), err);
            runs += 8 * copies;
            cli::need(bnb_backend_sync(backend.get(), &err), err);
            cli::stop_if_interrupted();
        } while (cli::now() - start < 0.1);
        if (rep) times.push_back((cli::now() - start) / double(runs));
    }
    return cli::median(times);
}

struct OpsTable { // printed row by row, or as one JSON object at the end
    const Bench &b;
    double bandwidth; // bytes per second
    std::string device;
    bool json;
    std::vector<cli::Json> rows;

    void head() const {
        const std::string where = device.empty() ? cli::format("%d threads", bnb_env_threads(b.env)) : device;
        const std::string limit = cli::format("%s, memory reads at %.2f GB/s", where.c_str(), bandwidth / 1e9);
        if (json) return;
        cli::print(cli::format("%s [%lld, %lld], %s\n", bnb_type_name(b.type), static_cast<long long>(b.n),
                               static_cast<long long>(b.k), limit.c_str()));
        cli::print(cli::format("%8s %12s %10s %10s %8s", "rows", "us", "GB/s", "GFLOP/s", "% read"));
        if (b.type != BNB_F16) cli::print(cli::format(" %12s %8s", "f16 us", "x f16"));
        cli::print("  kernel\n");
    }
    // f16: seconds of the same product with weights in f16, or 0
    void row(int64_t m, double s, const std::string &kernel, double f16, const std::string &f16_kernel) {
        const double gb_s = double(b.bytes()) / s / 1e9, gflop_s = 2 * double(m) * double(b.n * b.k) / s / 1e9;
        const double percent = 100e9 * gb_s / bandwidth;
        rows.push_back(cli::Json()
                           .add("rows", m)
                           .add("us", s * 1e6)
                           .add("gb_s", gb_s)
                           .add("gflop_s", gflop_s)
                           .add("pct_of_bandwidth", percent)
                           .add("kernel", kernel));
        if (f16 > 0)
            rows.back().add("f16_us", f16 * 1e6).add("speedup_over_f16", f16 / s).add("f16_kernel", f16_kernel);
        if (json) return;
        cli::print(cli::format("%8lld %12.2f %10.2f %10.2f %8.1f", static_cast<long long>(m), s * 1e6, gb_s, gflop_s,
                               percent));
        if (f16 > 0) cli::print(cli::format(" %12.2f %8.2f", f16 * 1e6, f16 / s));
        cli::print("  " + kernel + (f16 > 0 ? ", f16: " + f16_kernel : "") + "\n");
    }
    void end() const {
        cli::Json object;
        object.add("type", bnb_type_name(b.type)).add("n", b.n).add("k", b.k).add("threads", bnb_env_threads(b.env));
        if (!device.empty()) object.add("device", device);
        object.add("weight_bytes", b.bytes()).add("read_gb_s", bandwidth / 1e9).add("ops", rows);
        if (json) cli::print(object.text() + "\n");
    }
};

void bench_ops(Options &o, const cli::Given &given, bnb_env *env) {
    if (!o.model.path.empty() || !o.synthetic.name.empty())
        cli::usage("give one of -m MODEL, --synthetic NAME and --ops");
    const std::vector<int64_t> batches = positive_list("--batch", o.batch);
    if (o.quant.type.empty()) o.quant.type = "nf4";
    const Bench bench(o, given, env);
    std::unique_ptr<Bench> f16; // the peer, in the same run
    if (bench.type != BNB_F16) f16.reset(new Bench(o, given, env, true));
    bnb_error err;
    bnb_device_info device;
    cli::need(bnb_backend_info(bench.backend.get(), 1, &device, &err), err);
    OpsTable table = {bench, device.read_bandwidth > 0 ? device.read_bandwidth : read_bandwidth(env), device.description, o.common.json, {}};
    table.head();
    for (int64_t m : batches) {
        std::string kernel, f16_kernel;
        const double s = bench.seconds(m, &kernel);
        table.row(m, s, kernel, f16 ? f16->seconds(m, &f16_kernel) : 0, f16_kernel);
    }
    table.end();
}

// ---- loading --------------------------------------------------------------------------------------------------------

struct Loading {
    bnb_convert_result result;
    std::vector<double> times; // until each weight was read once
};

// A plane is read in parts by all threads.
struct PlaneSum {
    static constexpr uint64_t part = 1 << 20;
    const uint8_t *data;
    uint64_t bytes;
    std::vector<uint64_t> sums; // nothing is dead code

    static void sum(void *self, int64_t i) {
        PlaneSum &p = *static_cast<PlaneSum *>(self);
        const uint64_t end = std::min(p.bytes, uint64_t(i + 1) * part);
        Vector a = {}, b = {}, c = {}, d = {}, v[4]; // the planes of a file are aligned to an element only
        for (uint64_t at = uint64_t(i) * part; at < end; at += sizeof v) {
            const size_t n = size_t(std::min<uint64_t>(sizeof v, end - at));
            if (n < sizeof v) memset(v, 0, sizeof v);
            memcpy(v, p.data + at, n);
            a += v[0], b += v[1], c += v[2], d += v[3];
        }
        a += b + c + d;
        p.sums[size_t(i)] += a[0] + a[1];
    }
};

void read_weights(bnb_env *env, const bnb_model *model) {
    for (int32_t i = 0; i < bnb_model_tensor_count(model); i++)
        for (int32_t p = 0; p < BNB_MAX_PLANES; p++) {
            const bnb_tensor *t = bnb_model_tensor(model, i);
            const uint64_t bytes = bnb_plane_bytes(t->type, bnb_tensor_quant(t), t->n_dims, bnb_tensor_shape(t), p);
            const int64_t parts = int64_t((bytes + PlaneSum::part - 1) / PlaneSum::part);
            PlaneSum sum = {static_cast<const uint8_t *>(bnb_tensor_plane(t, p)), bytes,
                            std::vector<uint64_t>(size_t(parts))};
            bnb_parallel(env, parts, PlaneSum::sum, &sum);
        }
}

Loading measure_loading(const Options &o, const cli::Given &given, bnb_env *env, bool no_mmap) {
    Loading l = {};
    cli::ModelOptions model = o.model;
    model.no_mmap = no_mmap;
    for (int64_t rep = 0; rep <= o.reps; rep++) {
        const double start = cli::now();
        const cli::Model loaded = model.load(env, given, o.quant, &l.result);
        // on a CPU they lie in the file: loading need not have read them
        const bool on_cpu = !strcmp(bnb_backend_name(bnb_model_backend(loaded.get())), "cpu");
        if (!no_mmap && on_cpu) read_weights(env, loaded.get());
        if (rep) l.times.push_back(cli::now() - start);
        cli::stop_if_interrupted();
    }
    return l;
}

void bench_load(const Options &o, const cli::Given &given, bnb_env *env) {
    std::vector<cli::Json> rows;
    for (bool no_mmap : {false, true}) {
        if (o.model.no_mmap && !no_mmap) continue;
        const Loading l = measure_loading(o, given, env, no_mmap);
        const double s = cli::median(l.times), gb_s = double(l.result.bytes_in) / s / 1e9;
        rows.push_back(cli::Json()
                           .add("no_mmap", no_mmap)
                           .add("bytes", l.result.bytes_in)
                           .add("seconds", s)
                           .add("gb_s", gb_s)
                           .add("read_s", l.result.read_s)
                           .add("quantize_s", l.result.quantize_s));
        if (!o.common.json)
            cli::print(cli::format(
                "%-8s %10.3f GB in %8.3f s (%.3f .. %.3f), %7.2f GB/s; read %.3f s, quantize %.3f s\n",
                no_mmap ? "copied" : "mapped", double(l.result.bytes_in) / 1e9, s,
                *std::min_element(l.times.begin(), l.times.end()), *std::max_element(l.times.begin(), l.times.end()),
                gb_s, l.result.read_s, l.result.quantize_s));
    }
    if (o.common.json)
        cli::print(
            cli::Json().add("model", o.model.path).add("threads", bnb_env_threads(env)).add("load", rows).text() +
            "\n");
}

int body(int argc, char **argv) {
    Options o;
    const cli::Given given = cli::parse(program(o), argc, argv);
    const cli::Env env = o.common.open_env();
    if (o.ops && o.load) cli::usage("give one of --load and --ops");
    if (o.ops) bench_ops(o, given, env.get());
    else if (o.load) bench_load(o, given, env.get());
    else bench_model(o, given, env.get());
    return cli::DONE;
}

} // namespace

int main(int argc, char **argv) {
    return cli::run(argc, argv, [&] { return body(argc, argv); });
}
