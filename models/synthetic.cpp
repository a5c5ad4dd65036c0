// synthetic.cpp: models of a known shape with random weights, to measure any size without a checkpoint.
//
// Quantized weights are made as codes and scales, not as numbers that are then quantized, so that making a model takes
// little more than writing its memory. What they decode to has the deviation of an untrained network, 0.02.
// Every value depends on the seed, the tensor's name and the element's index only, not on the number of threads.
// Not: no weights that compute anything, and no tokenizer.
#include <cmath>

#include "arch.h"
#include "checkpoint.h"
#include "load_policy.h"
#include "files.h"

namespace bnb {
namespace {

constexpr double deviation = 0.02; // GPT-2's and OPT's initialisation
constexpr int64_t chunk = 1 << 16; // values made by one piece of work
constexpr int quantile_bits = 12;

// A random number for each index (SplitMix64, Steele et al. 2014, as a hash of a counter).
uint64_t random_at(uint64_t key, uint64_t index) {
    uint64_t z = key + (index + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

double uniform_at(uint64_t key, uint64_t index) { return double(random_at(key, index) >> 11) * 0x1p-53; } // [0, 1)

double normal_below(double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); }

// The middle quantiles of the normal distribution in 2^12 equal parts: a random number picks one, which is faster than
// any formula. Beyond 3.7 deviations nothing is ever drawn.
std::vector<float> normal_quantiles() {
    const int n = 1 << quantile_bits;
    std::vector<float> q(static_cast<size_t>(n));
    double x = 0;
    for (int i = n / 2; i < n; i++) { // Newton's method from the neighbour; the other half mirrors it
        const double p = (i + 0.5) / n;
        for (int step = 0; step < 6; step++) x -= (normal_below(x) - p) * std::sqrt(2 * M_PI) * std::exp(0.5 * x * x);
        q[size_t(i)] = float(x);
        q[size_t(n - 1 - i)] = float(-x);
    }
    return q;
}

// ---- filling planes -------------------------------------------------------------------------------------------------

// fill writes values [first, first + n) of a plane.
struct FillJob {
    uint64_t key;
    int64_t n;
    uint8_t *dst;
    const uint8_t *table; // 2^12 numbers in the plane's type
    size_t size;          // bytes of a number
    double low, high;
    void (*fill)(const FillJob &job, int64_t first, int64_t n);
};

void fill_part(void *arg, int64_t i) {
    const FillJob &job = *static_cast<const FillJob *>(arg);
    job.fill(job, i * chunk, std::min(chunk, job.n - i * chunk));
}

void run(bnb_env *env, FillJob job) { bnb_parallel(env, (job.n + chunk - 1) / chunk, fill_part, &job); }

// The key of one plane: planes and tensors must not repeat each other.
uint64_t plane_key(uint64_t seed, const bnb_tensor *t, int32_t plane) {
    const char *name = bnb_tensor_name(t);
    return bnb_hash64(name, strlen(name), random_at(seed, uint64_t(plane)));
}

// Four numbers of 12 random bits from each draw. chunk is a multiple of 4, so that a draw belongs to one piece of work.
template <class T> void draw_table(const FillJob &job, int64_t first, int64_t n) {
    T *dst = reinterpret_cast<T *>(job.dst) + first;
    const T *table = reinterpret_cast<const T *>(job.table);
    for (int64_t i = 0; i < n; i += 4) {
        const uint64_t r = random_at(job.key, uint64_t(first + i) / 4);
        for (int64_t k = 0; k < std::min<int64_t>(4, n - i); k++)
            dst[i + k] = table[r >> (16 * k) & ((1 << quantile_bits) - 1)];
    }
}

// Bytes, eight from each draw; a nibble is a 4-bit code.
void draw_bytes(const FillJob &job, int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; i += 8) {
        const uint64_t r = random_at(job.key, uint64_t(first + i) / 8);
        memcpy(job.dst + first + i, &r, size_t(std::min<int64_t>(8, n - i)));
    }
}

void draw_uniform(const FillJob &job, int64_t first, int64_t n) {
    float *dst = reinterpret_cast<float *>(job.dst) + first;
    for (int64_t i = 0; i < n; i++)
        dst[i] = float(job.low + (job.high - job.low) * uniform_at(job.key, uint64_t(first + i)));
}

FillJob plane_job(uint64_t seed, bnb_tensor *t, int32_t plane, size_t size) {
    FillJob job = {};
    job.key = plane_key(seed, t, plane);
    job.size = size;
    job.n = int64_t(bnb_plane_bytes(t->type, &t->quant, t->n_dims, t->shape, plane) / size);
    job.dst = static_cast<uint8_t *>(bnb_tensor_plane(t, plane));
    return job;
}

void fill_uniform(bnb_env *env, uint64_t seed, bnb_tensor *t, int32_t plane, double low, double high) {
    FillJob job = plane_job(seed, t, plane, 4);
    job.low = low;
    job.high = high;
    job.fill = draw_uniform;
    run(env, job);
}

void fill_bytes(bnb_env *env, uint64_t seed, bnb_tensor *t, int32_t plane) {
    FillJob job = plane_job(seed, t, plane, 1);
    job.fill = draw_bytes;
    run(env, job);
}

// ---- filling tensors ------------------------------------------------------------------------------------------------

void fill_plain(bnb_env *env, uint64_t seed, const std::vector<float> &quantiles, bnb_tensor *t) {
    std::vector<float> numbers;
    for (float q : quantiles) numbers.push_back(float(q * deviation));
    std::vector<uint8_t> table(numbers.size() * 4);
    (void)bnb_convert(BNB_F32, numbers.data(), t->type, table.data(), int64_t(numbers.size()), nullptr);
    FillJob job = plane_job(seed, t, 0, size_t(bnb_type_bits(t->type) / 8));
    job.table = table.data();
    job.fill = job.size == 4 ? draw_table<uint32_t> : draw_table<uint16_t>;
    run(env, job);
}

// A normal distribution whose largest code is 127; SCB is what that makes of the deviation.
void fill_int8(bnb_env *env, uint64_t seed, const std::vector<float> &quantiles, bnb_tensor *t) {
    const double largest = quantiles.back();
    std::vector<uint8_t> table;
    for (float q : quantiles) table.push_back(uint8_t(int8_t(std::lrint(q * 127 / largest))));
    FillJob job = plane_job(seed, t, 0, 1);
    job.table = table.data();
    job.fill = draw_table<uint8_t>;
    run(env, job);
    fill_uniform(env, seed, t, 1, 0.8 * largest * deviation, 1.2 * largest * deviation);
}

// The map of nested scales belongs to the quantizer: it is taken from a small tensor that went through it.
bool copy_nested_map(bnb_env *env, bnb_tensor *t, bnb_error *err) {
    std::shared_ptr<TensorStore> store = TensorStore::create(env, err);
    if (!store) return false;
    store->add("source", {1, 64}, BNB_F32, nullptr);
    store->add("result", {1, 64}, t->type, &t->quant);
    if (!store->status(err) || !store->alloc(err)) return false;
    bnb_tensor *source = store->tensors()[0], *result = store->tensors()[1];
    memset(bnb_tensor_plane(source, 0), 0, 64 * 4);
    if (bnb_quantize(env, source, result, BNB_COMPAT_CUDA, err) != BNB_OK) return false;
    memcpy(bnb_tensor_plane(t, 3), bnb_tensor_plane(result, 3), 256 * 4);
    return true;
}

// Every code is as likely as any other; absmax is what gives the codes' values the deviation.
bool fill_4bit(bnb_env *env, uint64_t seed, bnb_tensor *t, bnb_error *err) {
    const float *map = t->type == BNB_NF4 ? bnb_nf4_map : bnb_fp4_map;
    double squares = 0;
    for (int i = 0; i < 16; i++) squares += double(map[i]) * double(map[i]);
    const double absmax = deviation / std::sqrt(squares / 16);
    fill_bytes(env, seed, t, 0);
    if (bnb_tensor_elements(t) % 2) { // the last low nibble belongs to no element
        uint8_t *last = static_cast<uint8_t *>(bnb_tensor_plane(t, 0)) + bnb_tensor_elements(t) / 2;
        *last &= 0xF0;
    }
    if (!t->quant.double_quant) {
        fill_uniform(env, seed, t, 1, 0.8 * absmax, 1.2 * absmax);
        return true;
    }
    fill_bytes(env, seed, t, 1);
    fill_uniform(env, seed, t, 2, 0.2 * absmax, 0.3 * absmax);
    t->quant.nested_offset = float(absmax);
    return copy_nested_map(env, t, err);
}

void fill_constant(bnb_tensor *t, float value) {
    std::vector<float> values(size_t(bnb_tensor_elements(t)), value);
    (void)bnb_convert(BNB_F32, values.data(), t->type, bnb_tensor_plane(t, 0), bnb_tensor_elements(t), nullptr);
}

bool fill(bnb_env *env, uint64_t seed, const std::vector<float> &quantiles, const TensorInfo &info, bnb_tensor *t,
          bnb_error *err) {
    const std::string &name = info.name;
    const bool bias = name.size() >= 5 && name.compare(name.size() - 5, 5, ".bias") == 0;
    if (info.role == Role::Norm) fill_constant(t, bias ? 0.0f : 1.0f);
    else if (t->type == BNB_INT8) fill_int8(env, seed, quantiles, t);
    else if (bnb_type_is_quantized(t->type)) return fill_4bit(env, seed, t, err);
    else fill_plain(env, seed, quantiles, t);
    return true;
}

// ---- the model ------------------------------------------------------------------------------------------------------

bool fill_all(bnb_env *env, uint64_t seed, const std::vector<TensorInfo> &infos, const TensorStore &store,
              bnb_error *err) {
    const std::vector<float> quantiles = normal_quantiles();
    for (size_t i = 0; i < infos.size(); i++) {
        if (!fill(env, seed, quantiles, infos[i], store.tensors()[i], err)) return false;
        if (bnb_progress(env, "load", double(i + 1) / double(infos.size()))) continue;
        return failed(err, BNB_E_CANCELLED, "it was cancelled before the end");
    }
    return true;
}

bnb_model *synthetic(bnb_env *env, const std::string &name, const bnb_load_params *load, bool meta,
                     const bnb_model_params *params, bnb_error *err) {
    ModelSource model;
    if (!config_preset(name, &model.config)) {
        bnb_fail(err, BNB_E_ARG, "there is no configuration '%.40s'; known are %s", name.c_str(),
                 preset_names().c_str());
        return nullptr;
    }
    if (!config_finish(model.config, err)) return nullptr;
    const Arch &arch = *arch_find(model.config.arch);
    std::unique_ptr<LoadPolicy> policy = LoadPolicy::create(arch, load, err);
    std::shared_ptr<TensorStore> store = policy ? TensorStore::create(env, err) : nullptr;
    if (!store) return nullptr;
    const std::vector<TensorInfo> infos = arch.tensors(model.config);
    for (const TensorInfo &info : infos) {
        const Target t =
            policy->target(info, BNB_F16, nullptr); // f16: what released checkpoints of this size are stored as
        store->add(info.name, info.shape, t.type, &t.quant);
    }
    if (!store->status(err)) return nullptr;
    if (!meta && (!store->alloc(err) || !fill_all(env, policy->params().seed, infos, *store, err))) return nullptr;
    model.tensors = store->tensors();
    model.keep = store;
    return model_create(env, std::move(model), params, err);
}

} // namespace
} // namespace bnb

bnb_model *bnb_model_synthetic(bnb_env *env, const char *name, const bnb_load_params *load, int32_t meta,
                               const bnb_model_params *params, bnb_error *err) {
    return bnb::guarded(err, static_cast<bnb_model *>(nullptr),
                        [&] { return bnb::synthetic(env, name, load, meta != 0, params, err); });
}
