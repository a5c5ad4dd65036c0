// test_ops.cpp: every op with every type, many shapes and every set of kernels that this machine has, against references
// in double precision written here; LLM.int8() also bit for bit. Shapes are drawn from seeds, so a failure repeats.
#include "util.h"

#include <algorithm>
#include <cfloat>
#include <limits>

using namespace test;

namespace {

const float NaN = std::numeric_limits<float>::quiet_NaN(), INF = std::numeric_limits<float>::infinity();

// ---- references ------------------------------------------------------------------------------------------------------

// A matrix of numbers, row-major.
struct Matrix {
    int64_t rows, columns;
    Doubles v;
    double &at(int64_t r, int64_t c) { return v[static_cast<size_t>(r * columns + c)]; }
    double at(int64_t r, int64_t c) const { return v[static_cast<size_t>(r * columns + c)]; }
};

Matrix zeros(int64_t rows, int64_t columns) { return {rows, columns, Doubles(static_cast<size_t>(rows * columns))}; }

// Also what a tensor of this type holds after the value was written to it.
Doubles rounded(int32_t type, const Floats &v) {
    Doubles out;
    for (float x : v) out.push_back(round_to(type, static_cast<double>(x)));
    return out;
}

// The same for caches: rows [R, C], of which int8_kv scales B columns together.
Doubles cached(int32_t type, const Floats &v, int64_t R, int64_t C, int64_t B) {
    if (type != BNB_INT8_KV) return rounded(type, v);
    Int8Kv kv = int8_kv_of(v, R, C, B);
    return widen(int8_kv_values(kv.codes.data(), kv.absmax.data(), R, C, B));
}

Matrix product(const Matrix &x, const Matrix &w, const Doubles &bias) { // x w^T + bias
    Matrix y = zeros(x.rows, w.rows);
    for (int64_t t = 0; t < x.rows; t++)
        for (int64_t n = 0; n < w.rows; n++) {
            double sum = bias.empty() ? 0 : bias[static_cast<size_t>(n)];
            const double *a = x.v.data() + t * x.columns, *b = w.v.data() + n * w.columns;
            for (int64_t k = 0; k < x.columns; k++) sum += a[k] * b[k];
            y.at(t, n) = sum;
        }
    return y;
}

double unary(int32_t op, double x, double factor) {
    switch (op) {
    case BNB_OP_SCALE: return x * factor;
    case BNB_OP_GELU: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case BNB_OP_GELU_TANH: return 0.5 * x * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
    case BNB_OP_RELU: return x > 0 || std::isnan(x) ? x : 0;
    default: return x / (1 + std::exp(-x)); // silu
    }
}

Doubles softmax(Doubles v) {
    double top = -INFINITY, sum = 0;
    for (double x : v) top = std::max(top, x);
    for (double &x : v) sum += x = std::exp(x - top);
    for (double &x : v) x /= sum;
    return v;
}

// ---- inputs ----------------------------------------------------------------------------------------------------------

// f32 [T, C] as an op gets it: a tensor of its own, or some columns of a wider one that is NaN elsewhere.
struct Rows {
    bnb_tensor *tensor;
    Matrix values;
};

Rows rows_of(Net &net, Rng &rng, int64_t T, int64_t C, double scale = 1, double mean = 0, const char *name = "x") {
    Rows r = {nullptr, zeros(T, C)};
    bool strided = rng.chance(0.4) && C > 0;
    int64_t before = strided ? rng.range(0, 9) : 0, width = before + C + (strided ? rng.range(1, 9) : 0);
    Floats all(static_cast<size_t>(T * width), NaN);
    for (int64_t t = 0; t < T; t++)
        for (int64_t c = 0; c < C; c++) {
            float v = rng.normal(scale) + static_cast<float>(mean);
            r.values.at(t, c) = static_cast<double>(all[static_cast<size_t>(t * width + before + c)] = v);
        }
    r.tensor = net.input({T, width}, all, name);
    if (strided) r.tensor = bnb_columns(net.ctx, r.tensor, before, C);
    REQUIRE(r.tensor);
    return r;
}

int64_t draw_T(Rng &rng) {
    static const std::vector<int64_t> some = {1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 23, 31, 32, 33, 40};
    return rng.pick(some);
}

int64_t draw_C(Rng &rng) {
    static const std::vector<int64_t> some = {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48, 64, 65, 100, 127, 128, 256, 300};
    return rng.pick(some);
}

// ---- one case of each op ---------------------------------------------------------------------------------------------

struct Case {
    bnb_tensor *y;                         // the node to run
    std::function<Doubles()> want;         // of its elements; called after the run, when weights can be decoded
    double tolerance = 2e-6;
    bnb_tensor *read = nullptr;            // what to read; NULL: y
    bool may_be_bf16 = false;
};

Case embed_case(Net &net, Rng &rng, int32_t type, int64_t T) {
    int64_t V = rng.range(1, 60), C = draw_C(rng);
    std::vector<int32_t> ids;
    for (int64_t t = 0; t < T; t++) ids.push_back(static_cast<int32_t>(rng.range(0, V - 1)));
    bnb_tensor *list = net.ids({T}, ids), *table;
    Matrix values;
    if (type == BNB_F32 && rng.chance(0.5)) { // rows of an activation, also of some of its columns
        Rows r = rows_of(net, rng, V, C);
        table = r.tensor;
        values = r.values;
    } else {
        Floats v = rng.normals(V * C);
        table = net.weight(type, {V, C}, v);
        values = {V, C, rounded(type, v)};
    }
    auto want = [=] {
        Matrix y = zeros(T, C);
        for (int64_t t = 0; t < T; t++)
            for (int64_t c = 0; c < C; c++) y.at(t, c) = values.at(ids[static_cast<size_t>(t)], c);
        return y.v;
    };
    return {bnb_embed(net.ctx, table, list), want, 0};
}

Case linear_case(Net &net, Rng &rng, int32_t type, int64_t T) {
    static const std::vector<int64_t> depths = {1, 5, 31, 32, 33, 64, 64, 96, 100, 128, 192, 256, 320, 512};
    static const std::vector<int64_t> widths = {1, 2, 3, 8, 15, 16, 17, 47, 48, 49, 64, 70};
    static const std::vector<int32_t> blocks = {32, 64, 64, 64, 128, 256, 512};
    static const std::vector<int32_t> bias_types = {BNB_F32, BNB_F16, BNB_BF16};
    int64_t K = rng.pick(depths), N = rng.pick(widths);
    bnb_quant q = bnb_quant_default(type);
    if (bnb_type_bits(type) == 4) q = quant4(type, rng.pick(blocks), rng.chance(0.5));
    if (type == BNB_INT8) q.threshold = 0; // outliers have tests of their own
    Rows x = rows_of(net, rng, T, K);
    bnb_tensor *w = type == BNB_F32 && rng.chance(0.2) ? nullptr : net.weight(type, {N, K}, rng.normals(N * K, 0.1), &q);
    Matrix activation = zeros(0, 0);
    if (!w) { // an activation as the weight, also some of its columns
        Rows r = rows_of(net, rng, N, K, 0.1);
        w = r.tensor;
        activation = r.values;
    }
    bnb_tensor *bias = nullptr;
    Doubles b;
    if (rng.chance(0.5)) {
        int32_t bias_type = rng.pick(bias_types);
        Floats v = rng.normals(N);
        bias = net.weight(bias_type, {N}, v, nullptr, "bias");
        b = rounded(bias_type, v);
    }
    auto want = [=] { return product(x.values, activation.rows ? activation : Matrix{N, K, decode(w)}, b).v; };
    // int8 rounds x to 8 bits
    Case c = {bnb_linear(net.ctx, x.tensor, w, bias), want, type == BNB_INT8 ? 0.03 : 2e-6};
    c.may_be_bf16 = type != BNB_INT8;
    return c;
}

Case norm_case(Net &net, Rng &rng, int32_t op, int32_t type, int64_t T) {
    int64_t C = std::max<int64_t>(draw_C(rng), 2);
    float eps = rng.chance(0.5) ? 1e-5f : 0.5f;
    Rows x = rows_of(net, rng, T, C, 1.5, 0.7);
    bnb_tensor *w = nullptr, *b = nullptr;
    Doubles wv(static_cast<size_t>(C), 1), bv(static_cast<size_t>(C), 0);
    if (rng.chance(0.7)) {
        Floats v = rng.normals(C);
        w = net.weight(type, {C}, v);
        wv = rounded(type, v);
    }
    if (op == BNB_OP_LAYER_NORM && rng.chance(0.7)) {
        Floats v = rng.normals(C);
        b = net.weight(type, {C}, v, nullptr, "b");
        bv = rounded(type, v);
    }
    auto want = [=] {
        Matrix y = zeros(T, C);
        for (int64_t t = 0; t < T; t++) {
            double mean = 0, var = 0;
            for (int64_t c = 0; c < C && op == BNB_OP_LAYER_NORM; c++) mean += x.values.at(t, c) / static_cast<double>(C);
            for (int64_t c = 0; c < C; c++) var += std::pow(x.values.at(t, c) - mean, 2) / static_cast<double>(C);
            for (int64_t c = 0; c < C; c++) {
                size_t i = static_cast<size_t>(c);
                y.at(t, c) = (x.values.at(t, c) - mean) / std::sqrt(var + static_cast<double>(eps)) * wv[i] + bv[i];
            }
        }
        return y.v;
    };
    return {op == BNB_OP_LAYER_NORM ? bnb_layer_norm(net.ctx, x.tensor, w, b, eps) : bnb_rms_norm(net.ctx, x.tensor, w, eps), want, 3e-6};
}

Case pair_case(Net &net, Rng &rng, int32_t op, int32_t type, int64_t T) {
    int64_t C = draw_C(rng);
    Rows a = rows_of(net, rng, T, C, 1, 0, "a");
    Matrix b = zeros(T, C);
    bnb_tensor *second;
    if (type == BNB_F32 && rng.chance(0.6)) { // the shape of a, once in a while a itself
        Rows r = rng.chance(0.2) ? a : rows_of(net, rng, T, C, 1, 0, "b");
        second = r.tensor;
        b = r.values;
    } else {
        Floats v = rng.normals(C);
        second = net.weight(type, {C}, v, nullptr, "b");
        Doubles one = rounded(type, v);
        for (int64_t t = 0; t < T; t++)
            for (int64_t c = 0; c < C; c++) b.at(t, c) = one[static_cast<size_t>(c)];
    }
    auto want = [=] {
        Doubles y = a.values.v;
        for (size_t i = 0; i < y.size(); i++) y[i] = op == BNB_OP_ADD ? y[i] + b.v[i] : y[i] * b.v[i];
        return y;
    };
    return {op == BNB_OP_ADD ? bnb_add(net.ctx, a.tensor, second) : bnb_mul(net.ctx, a.tensor, second), want, 2e-7};
}

Case unary_case(Net &net, Rng &rng, int32_t op, int64_t T) {
    float factor = rng.normal();
    Rows x = rows_of(net, rng, T, draw_C(rng), rng.chance(0.3) ? 30 : 2);
    bnb_tensor *y = op == BNB_OP_SCALE ? bnb_scale(net.ctx, x.tensor, factor) : op == BNB_OP_GELU ? bnb_gelu(net.ctx, x.tensor)
                  : op == BNB_OP_GELU_TANH ? bnb_gelu_tanh(net.ctx, x.tensor) : op == BNB_OP_RELU ? bnb_relu(net.ctx, x.tensor)
                                                                                 : bnb_silu(net.ctx, x.tensor);
    auto want = [=] {
        Doubles v = x.values.v;
        for (double &e : v) e = unary(op, e, static_cast<double>(factor));
        return v;
    };
    return {y, want, 1e-6};
}

Case softmax_case(Net &net, Rng &rng, int64_t T) {
    int64_t C = draw_C(rng);
    Rows x = rows_of(net, rng, T, C, 3, rng.chance(0.3) ? 200 : 0);
    auto want = [=] {
        Doubles y;
        for (int64_t t = 0; t < T; t++) {
            Doubles row = softmax(Doubles(x.values.v.begin() + t * C, x.values.v.begin() + (t + 1) * C));
            y.insert(y.end(), row.begin(), row.end());
        }
        return y;
    };
    return {bnb_softmax(net.ctx, x.tensor), want, 4e-6};
}

Case set_rows_case(Net &net, Rng &rng, int32_t type, int64_t T) {
    int64_t R = T + rng.range(1, 20), C = draw_C(rng);
    std::vector<int64_t> divisors;
    for (int64_t b = 1; b <= C; b++)
        if (C % b == 0) divisors.push_back(b);
    const int64_t B = rng.pick(divisors);
    const bnb_quant q = blocks_of(B);
    Floats old = rng.normals(R * C);
    bnb_tensor *cache = net.weight(type, {R, C}, old, &q, "cache");
    Rows x = rows_of(net, rng, T, C);
    std::vector<int32_t> rows; // a row is written once
    for (int32_t r = 0; r < R; r++) rows.push_back(r);
    for (size_t i = rows.size(); i > 1; i--) std::swap(rows[i - 1], rows[static_cast<size_t>(rng.range(0, static_cast<int64_t>(i) - 1))]);
    rows.resize(static_cast<size_t>(T));
    auto want = [=] {
        Floats v = old;
        for (int64_t t = 0; t < T; t++)
            for (int64_t c = 0; c < C; c++) v[static_cast<size_t>(rows[static_cast<size_t>(t)] * C + c)] = static_cast<float>(x.values.at(t, c));
        return cached(type, v, R, C, B);
    };
    Case c = {bnb_set_rows(net.ctx, cache, x.tensor, net.ids({T}, rows, "rows")), want, 0};
    c.read = cache;
    return c;
}

Case attention_case(Net &net, Rng &rng, int32_t type, int64_t T) {
    static const std::vector<int64_t> sizes = {1, 3, 8, 16, 20, 32, 64, 80, 128};
    int64_t D = rng.pick(sizes), kv = rng.range(1, 3), group = rng.range(1, 3), H = kv * group, R = rng.range(1, 90);
    float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(D)));
    Rows q = rows_of(net, rng, T, H * D, 1, 0, "q");
    Rows k, v;
    if (type == BNB_F32 && rng.chance(0.4)) { // activations, also some of their columns
        k = rows_of(net, rng, R, kv * D, 1, 0, "k");
        v = rows_of(net, rng, R, kv * D, 1, 0, "v");
    } else {
        for (Rows *r : {&k, &v}) {
            Floats values = rng.normals(R * kv * D);
            const bnb_quant quant = blocks_of(D);
            *r = {net.weight(type, {R, kv * D}, values, &quant, r == &k ? "k" : "v"), {R, kv * D, cached(type, values, R, kv * D, D)}};
        }
    }
    std::vector<int32_t> span;
    for (int64_t t = 0; t < T; t++) {
        int64_t first = rng.range(0, R), last = rng.range(first, R);
        if (rng.chance(0.5)) first = 0;
        span.push_back(static_cast<int32_t>(first));
        span.push_back(static_cast<int32_t>(last));
    }
    auto want = [=] {
        Matrix y = zeros(T, H * D);
        for (int64_t t = 0; t < T; t++)
            for (int64_t h = 0; h < H; h++) {
                int64_t first = span[static_cast<size_t>(2 * t)], last = span[static_cast<size_t>(2 * t + 1)], at = h / group * D;
                Doubles scores;
                for (int64_t r = first; r < last; r++) {
                    double dot = 0;
                    for (int64_t d = 0; d < D; d++) dot += q.values.at(t, h * D + d) * k.values.at(r, at + d);
                    scores.push_back(dot * static_cast<double>(scale));
                }
                scores = softmax(scores);
                for (int64_t r = first; r < last; r++)
                    for (int64_t d = 0; d < D; d++) y.at(t, h * D + d) += scores[static_cast<size_t>(r - first)] * v.values.at(r, at + d);
            }
        return y.v;
    };
    return {bnb_attention(net.ctx, q.tensor, k.tensor, v.tensor, net.ids({T, 2}, span, "span"), static_cast<int32_t>(H), static_cast<int32_t>(kv), scale), want, 4e-6};
}

Case columns_case(Net &net, Rng &rng, int64_t T) {
    int64_t C = draw_C(rng), first = rng.range(0, C - 1), n = rng.range(1, C - first);
    Rows x = rows_of(net, rng, T, C);
    bnb_tensor *view = bnb_columns(net.ctx, x.tensor, first, n);
    REQUIRE(view);
    CHECK(view->shape[1] == n);
    auto want = [=] {
        CHECK(view->plane[0] == static_cast<char *>(x.tensor->plane[0]) + first * 4); // no copy
        Matrix y = zeros(T, n);
        for (int64_t t = 0; t < T; t++)
            for (int64_t c = 0; c < n; c++) y.at(t, c) = x.values.at(t, first + c);
        return y.v;
    };
    return {bnb_scale(net.ctx, view, 1), want, 0}; // a view cannot be read by itself
}

Case argmax_case(Net &net, Rng &rng, int64_t T) {
    Rows x = rows_of(net, rng, T, draw_C(rng));
    auto want = [=] {
        Doubles y;
        for (int64_t t = 0; t < T; t++) {
            int64_t at = 0;
            for (int64_t c = 1; c < x.values.columns; c++)
                if (x.values.at(t, c) > x.values.at(t, at)) at = c;
            y.push_back(static_cast<double>(at));
        }
        return y;
    };
    return {bnb_argmax(net.ctx, x.tensor), want, 0};
}

// What a draw leaves over, by sorting everything; the draw itself is looked at in test_backend.cpp and by the sampler's tests.
Case draw_case(Net &net, Rng &rng, int64_t T) {
    Rows x = rows_of(net, rng, T, draw_C(rng), 3);
    bnb_draw_rule rule = {rng.chance(0.3) ? 0.0f : 0.7f, rng.chance(0.5) ? 1.0f : 0.8f, rng.chance(0.5) ? 0.0f : 0.05f, static_cast<int32_t>(rng.range(0, 12)), rng.next()};
    std::vector<int32_t> steps;
    for (int64_t t = 0; t < T; t++) steps.push_back(static_cast<int32_t>(rng.range(0, 1000)));
    auto want = [=] {
        Doubles y;
        for (int64_t t = 0; t < T; t++) {
            Floats row;
            for (int64_t c = 0; c < x.values.columns; c++) row.push_back(static_cast<float>(x.values.at(t, c)));
            std::vector<int64_t> scratch(row.size());
            int32_t id = bnb_draw_row(row.data(), static_cast<int64_t>(row.size()), &rule, steps[static_cast<size_t>(t)], scratch.data());
            int64_t better = 0;
            for (float v : row) better += v > row[static_cast<size_t>(id)];
            CHECK(better < (rule.temp <= 0 ? 1 : rule.top_k > 0 ? rule.top_k : static_cast<int64_t>(row.size())));
            if (rule.temp > 0 && rule.min_p > 0) CHECK(static_cast<double>(row[static_cast<size_t>(id)]) >= static_cast<double>(*std::max_element(row.begin(), row.end())) + std::log(0.05) - 1e-5);
            y.push_back(id);
        }
        return y;
    };
    return {bnb_draw(net.ctx, x.tensor, net.ids({T}, steps, "steps"), &rule), want, 0};
}

// type: of the weight, table, cache, or second operand.
Case make_case(int32_t op, Net &net, Rng &rng, int32_t type, int64_t T) {
    switch (op) {
    case BNB_OP_EMBED: return embed_case(net, rng, type, T);
    case BNB_OP_LINEAR: return linear_case(net, rng, type, T);
    case BNB_OP_LAYER_NORM:
    case BNB_OP_RMS_NORM: return norm_case(net, rng, op, type, T);
    case BNB_OP_ADD:
    case BNB_OP_MUL: return pair_case(net, rng, op, type, T);
    case BNB_OP_SCALE:
    case BNB_OP_GELU:
    case BNB_OP_GELU_TANH:
    case BNB_OP_RELU:
    case BNB_OP_SILU: return unary_case(net, rng, op, T);
    case BNB_OP_SOFTMAX: return softmax_case(net, rng, T);
    case BNB_OP_SET_ROWS: return set_rows_case(net, rng, type, T);
    case BNB_OP_ATTENTION: return attention_case(net, rng, type, T);
    case BNB_OP_COLUMNS: return columns_case(net, rng, T);
    case BNB_OP_ARGMAX: return argmax_case(net, rng, T);
    case BNB_OP_DRAW: return draw_case(net, rng, T);
    default: FAIL("this op has no test: ", op_name(op)); return {};
    }
}

std::vector<int32_t> types_of(int32_t op) {
    switch (op) {
    case BNB_OP_EMBED:
    case BNB_OP_LAYER_NORM:
    case BNB_OP_RMS_NORM:
    case BNB_OP_ADD:
    case BNB_OP_MUL: return {BNB_F32, BNB_F16, BNB_BF16};
    case BNB_OP_LINEAR: return {BNB_F32, BNB_F16, BNB_BF16, BNB_INT8, BNB_NF4, BNB_FP4};
    case BNB_OP_SET_ROWS:
    case BNB_OP_ATTENTION: return {BNB_F32, BNB_F16, BNB_INT8_KV};
    default: return {BNB_F32};
    }
}

// Runs a case and compares. Returns the result.
Floats run_case(Env &env, int32_t op, int32_t type, int64_t T, uint64_t seed, int32_t compute) {
    Net net(env);
    Rng rng(seed);
    net.params.compute_dtype = compute;
    net.params.no_reuse = static_cast<int32_t>(seed % 2);
    Case c = make_case(op, net, rng, type, T);
    REQUIRE(c.y);
    net.prepare({c.y});
    net.again();
    Floats got = net.read(c.read ? c.read : c.y);
    // bf16 where it was asked for; where the CPU multiplies bf16 also for 4-bit weights, and in prompts for all but f32
    bool bf16_here = (bnb_env_cpu(env) & (BNB_CPU_AVX512_BF16 | BNB_CPU_AMX)) != 0;
    bool chosen = compute == BNB_COMPUTE_AUTO && type != BNB_F32 && bf16_here && (T > 1 || bnb_type_bits(type) == 4);
    bool bf16 = c.may_be_bf16 && (compute == BNB_BF16 || chosen);
    double error = relative_error(got, c.want()), most = bf16 ? 6e-3 : c.tolerance;
    CHECK_MESSAGE(error <= most, "relative error ", error, " is more than ", most, "\n", net.describe());
    return got;
}

void run_op_cases(int32_t op, const std::vector<Level> &levels, int64_t n_cases) {
    for (const Level &level : levels) {
        Env env(2, level.disable);
        for (int32_t type : types_of(op))
            for (int64_t i = 0; i < n_cases; i++) {
                uint64_t seed = static_cast<uint64_t>(op * 1000 + type * 100 + i);
                Rng rng(seed + 77);
                int64_t T = i == 0 ? 1 : i == 1 ? 130 + rng.range(0, 30) : draw_T(rng);
                static const int32_t computes[] = {BNB_COMPUTE_AUTO, BNB_COMPUTE_AUTO, BNB_F32, BNB_BF16};
                int32_t compute = op == BNB_OP_LINEAR ? computes[i % 4] : int32_t{BNB_COMPUTE_AUTO};
                CAPTURE(op_name(op));
                CAPTURE(type_name(type));
                CAPTURE(level.name);
                CAPTURE(seed);
                CAPTURE(T);
                run_case(env, op, type, T, seed, compute);
            }
    }
}

// ---- LLM.int8() from its definition ----------------------------------------------------------------------------------

float to_f16(double v) { return static_cast<float>(round_to(BNB_F16, v)); }

struct Int8Problem {
    int64_t T, N, K;
    Floats x, w, bias;
    int32_t bias_type = -1; // -1: no bias
    float threshold = 6;
    int32_t rule = BNB_OUTLIER_COLUMN;
};

struct Int8Tensor {
    std::vector<int8_t> codes;
    Floats scb;
};

// bnb_quantize, which the golden vectors test, is the rule for rows of weights and of activations.
Int8Tensor quantize_rows(Env &env, const Floats &values, int64_t rows, int64_t columns) {
    bnb_error err = {};
    Int8Tensor out = {std::vector<int8_t>(values.size()), Floats(static_cast<size_t>(rows))};
    if (values.empty()) return out;
    Ctx ctx(bnb_ctx_create(env, &err));
    const int64_t shape[] = {rows, columns};
    bnb_tensor *src = bnb_tensor_new(ctx.get(), BNB_F32, nullptr, 2, shape, "source"), *dst = bnb_tensor_new(ctx.get(), BNB_INT8, nullptr, 2, shape, "codes");
    void *from[BNB_MAX_PLANES] = {const_cast<float *>(values.data()), nullptr, nullptr, nullptr}, *to[BNB_MAX_PLANES] = {out.codes.data(), out.scb.data(), nullptr, nullptr};
    REQUIRE(bnb_tensor_bind(src, from, &err) == BNB_OK);
    REQUIRE(bnb_tensor_bind(dst, to, &err) == BNB_OK);
    REQUIRE(bnb_quantize(env, src, dst, BNB_COMPAT_CUDA, &err) == BNB_OK);
    return out;
}

struct Int8Result {
    Floats y;
    Int8Tensor a; // codes of x
    bool outliers = false;
};

// in_f16: as bitsandbytes computes for an f16 x, rounding the int8 product and the outliers' weights to f16; for an f32 x
// (ours always is) nothing is rounded on the way.
Int8Result int8_reference(Env &env, const Int8Problem &p, bool in_f16 = false) {
    Int8Result r;
    size_t K = static_cast<size_t>(p.K), N = static_cast<size_t>(p.N), T = static_cast<size_t>(p.T);
    Int8Tensor w = quantize_rows(env, p.w, p.N, p.K);
    Floats inliers = p.x;
    std::vector<bool> element(p.x.size()), column(K);
    for (size_t i = 0; i < p.x.size(); i++) {
        if (!(p.threshold > 0 && std::fabs(round_to(BNB_F16, static_cast<double>(p.x[i]))) >= static_cast<double>(p.threshold))) continue;
        element[i] = column[i % K] = r.outliers = true;
        inliers[i] = 0;
    }
    r.a = quantize_rows(env, inliers, p.T, p.K);
    bool by_column = p.T > 1 && p.rule == BNB_OUTLIER_COLUMN;
    for (size_t i = 0; i < p.x.size() && by_column; i++)
        if (column[i % K]) r.a.codes[i] = 0;
    for (size_t t = 0; t < T; t++)
        for (size_t n = 0; n < N; n++) {
            int32_t sum = 0;
            double extra = 0;
            for (size_t k = 0; k < K; k++) {
                sum += static_cast<int32_t>(r.a.codes[t * K + k]) * w.codes[n * K + k];
                if (!(by_column ? column[k] : element[t * K + k])) continue;
                volatile float scaled = static_cast<float>(w.codes[n * K + k]) * w.scb[n];
                float weight = scaled * 7.874015718698502e-3f;
                if (in_f16) weight = to_f16(static_cast<double>(weight));
                extra += static_cast<double>(p.x[t * K + k]) * static_cast<double>(weight);
            }
            float b = p.bias_type < 0 ? 0 : static_cast<float>(round_to(p.bias_type, static_cast<double>(p.bias[n])));
            volatile float v = static_cast<float>(sum) * r.a.scb[t];
            v = v * w.scb[n];
            float out = std::fmaf(v, 6.200012e-05f, b);
            if (in_f16) out = to_f16(static_cast<double>(out));
            r.y.push_back(out + static_cast<float>(extra));
        }
    return r;
}

Floats int8_run(Env &env, const Int8Problem &p) {
    return run_op(env, [&](Net &net) {
        bnb_quant q = bnb_quant_default(BNB_INT8);
        q.threshold = p.threshold;
        q.outlier_rule = p.rule;
        bnb_tensor *w = net.weight(BNB_INT8, {p.N, p.K}, p.w, &q);
        bnb_tensor *bias = p.bias_type < 0 ? nullptr : net.weight(p.bias_type, {p.N}, p.bias, nullptr, "bias");
        return bnb_linear(net.ctx, net.input({p.T, p.K}, p.x), w, bias);
    });
}

Int8Problem int8_problem(uint64_t seed, double outlier_chance) {
    static const std::vector<int64_t> depths = {1, 3, 16, 31, 32, 63, 64, 65, 100, 128, 200, 256, 512, 1100};
    static const std::vector<int64_t> widths = {1, 2, 5, 8, 15, 16, 17, 33, 48, 64, 65};
    static const std::vector<int32_t> bias_types = {-1, BNB_F32, BNB_F16, BNB_BF16};
    Rng rng(seed);
    Int8Problem p;
    p.T = seed % 7 == 6 ? 135 : draw_T(rng);
    p.K = rng.pick(depths);
    p.N = rng.pick(widths);
    p.x = rng.normals(p.T * p.K);
    p.w = rng.normals(p.N * p.K, 0.05);
    p.bias_type = rng.pick(bias_types);
    p.bias = rng.normals(p.N);
    p.threshold = rng.chance(0.3) ? 0.0f : 6.0f;
    p.rule = rng.chance(0.5) ? BNB_OUTLIER_COLUMN : BNB_OUTLIER_ROW;
    for (float &v : p.x) {
        if (p.threshold > 0 && std::fabs(v) > 5) v = 1;
        if (rng.chance(outlier_chance)) v = std::copysign(static_cast<float>(6 + 30 * rng.uniform()), v);
    }
    return p;
}

// ---- golden vector G5 of the specification (section 9) ---------------------------------------------------------------

Floats lcg(uint32_t seed, size_t n, float scale, bool f16) {
    uint32_t s = seed;
    Floats v;
    for (size_t i = 0; i < n; i++) {
        int64_t t = -(int64_t{1} << 25);
        for (int draw = 0; draw < 4; draw++) {
            s = s * 1664525u + 1013904223u;
            t += s >> 8;
        }
        volatile float f = static_cast<float>(t);
        f = f * 0x1p-24f;
        f = f * scale;
        v.push_back(f16 ? to_f16(static_cast<double>(f)) : f);
    }
    return v;
}

Int8Problem g5(float threshold) {
    Int8Problem p;
    p.T = 4, p.K = 16, p.N = 5;
    p.x = lcg(3, 64, 2.0f, true);
    p.x[1 * 16 + 3] = 7.5f;
    p.x[2 * 16 + 3] = -6.0f;
    p.x[3 * 16 + 9] = -20.0f;
    p.w = lcg(4, 80, 0.05f, true);
    p.bias = lcg(5, 5, 0.1f, true);
    p.bias_type = BNB_F16;
    p.threshold = threshold;
    return p;
}

std::string hex(const std::vector<int8_t> &v) {
    std::string s;
    char two[3];
    for (int8_t b : v) {
        std::snprintf(two, sizeof two, "%02x", static_cast<unsigned>(static_cast<uint8_t>(b)));
        s += two;
    }
    return s;
}

// Distance in units of the last place of f16.
int f16_distance(float got, uint16_t want) {
    uint16_t h;
    bnb_convert(BNB_F32, &got, BNB_F16, &h, 1, nullptr);
    auto order = [](uint16_t v) { return v & 0x8000 ? -(v & 0x7fff) : int{v}; };
    return std::abs(order(h) - order(want));
}

} // namespace

// ---- the tests -------------------------------------------------------------------------------------------------------

TEST_SUITE("ops") {

TEST_CASE("ops: the table of ops is complete") {
    for (int32_t op = 0; op < BNB_OP_COUNT; op++) {
        REQUIRE(bnb_op_name(op));
        CHECK(std::strlen(bnb_op_name(op)) > 0);
    }
    CHECK(bnb_op_name(-1) == nullptr);
    CHECK(bnb_op_name(BNB_OP_COUNT) == nullptr);
}

TEST_CASE("ops: rounding of this file's references") {
    CHECK(round_to(BNB_F16, 65519.0) == 65504.0);
    CHECK(std::isinf(round_to(BNB_F16, 65520.0)));
    CHECK(round_to(BNB_F16, 1 + 0x1p-11) == 1.0);
    CHECK(round_to(BNB_F16, 1 + 3 * 0x1p-11) == 1 + 0x1p-9);
    CHECK(round_to(BNB_F16, -0x1p-25) == 0.0);
    CHECK(round_to(BNB_BF16, 1 + 0x1p-8) == 1.0);
    Rng rng(5);
    for (int i = 0; i < 2000; i++) {
        float f = rng.normal(std::pow(10.0, static_cast<double>(rng.range(-8, 6))));
        for (int32_t type : {int32_t{BNB_F16}, int32_t{BNB_BF16}}) {
            uint16_t h;
            REQUIRE(bnb_convert(BNB_F32, &f, type, &h, 1, nullptr) == BNB_OK);
            double want = round_to(type, static_cast<double>(f)), got = type == BNB_F16 ? f16_value(h) : bf16_value(h);
            REQUIRE_MESSAGE(got == want, f);
        }
    }
}

TEST_CASE("ops: every op, type and shape against double precision, with every set of kernels") {
    const std::vector<Level> levels = cpu_levels();
    for (int32_t op = 1; op < BNB_OP_COUNT; op++) run_op_cases(op, levels, op == BNB_OP_LINEAR ? 24 : op == BNB_OP_ATTENTION ? 16 : 12);
}

TEST_CASE("ops: large linears of whole and broken blocks") {
    for (const Level &level : cpu_levels()) {
        if (level.disable == BNB_CPU_FAST) continue; // slow, and what the others are compared with
        Env env(2, level.disable);
        for (int32_t type : types_of(BNB_OP_LINEAR))
            for (int64_t T : {1, 3, 40})
                for (int64_t K : {1536, 1537}) {
                    if (T == 40 && K == 1537 && bnb_type_bits(type) != 4) continue;
                    Rng rng(static_cast<uint64_t>(type * 10 + T));
                    Floats x = rng.normals(T * K), w = rng.normals(130 * K, 0.05);
                    bnb_quant q = bnb_quant_default(type);
                    q.threshold = 0;
                    CAPTURE(level.name);
                    CAPTURE(type_name(type));
                    CAPTURE(T);
                    CAPTURE(K);
                    Net net(env);
                    net.params.compute_dtype = BNB_F32;
                    bnb_tensor *weight = net.weight(type, {130, K}, w, &q);
                    Floats got = net.run(bnb_linear(net.ctx, net.input({T, K}, x), weight, nullptr));
                    double error = relative_error(got, product({T, K, widen(x)}, {130, K, decode(weight)}, {}).v);
                    CHECK_MESSAGE(error <= (type == BNB_INT8 ? 0.03 : 2e-6), error, "\n", net.describe());
                }
    }
}

TEST_CASE("ops: a norm of numbers far from zero keeps its digits") {
    for (const Level &level : cpu_levels()) {
        Env env(1, level.disable);
        Rng rng(3);
        Floats x;
        for (int i = 0; i < 3 * 200; i++) x.push_back(1000 + rng.normal());
        Floats got = run_op(env, [&](Net &net) { return bnb_layer_norm(net.ctx, net.input({3, 200}, x), nullptr, nullptr, 1e-5f); });
        Doubles want;
        for (size_t t = 0; t < 3; t++) {
            double mean = 0, var = 0;
            for (size_t c = 0; c < 200; c++) mean += static_cast<double>(x[t * 200 + c]) / 200;
            for (size_t c = 0; c < 200; c++) var += std::pow(static_cast<double>(x[t * 200 + c]) - mean, 2) / 200;
            for (size_t c = 0; c < 200; c++) want.push_back((static_cast<double>(x[t * 200 + c]) - mean) / std::sqrt(var + 1e-5));
        }
        CAPTURE(level.name);
        CHECK(relative_error(got, want) <= 2e-4);
    }
}

TEST_CASE("ops: no tokens, no columns") {
    for (const Level &level : cpu_levels()) {
        Env env(2, level.disable);
        CAPTURE(level.name);
        for (int32_t op = 1; op < BNB_OP_COUNT; op++)
            for (int32_t type : types_of(op)) {
                CAPTURE(op_name(op));
                CAPTURE(type_name(type));
                Net net(env);
                Rng rng(static_cast<uint64_t>(op));
                Case c = make_case(op, net, rng, type, 0);
                REQUIRE(c.y);
                net.prepare({c.y});
                net.again();
                CHECK(net.read(c.read ? c.read : c.y).size() == c.want().size());
            }
        for (int32_t type : types_of(BNB_OP_LINEAR)) { // K = 0: the bias is left
            CAPTURE(type_name(type));
            Floats y = run_op(env, [&](Net &net) {
                bnb_tensor *bias = net.weight(BNB_F32, {3}, {1, 2, 3}, nullptr, "bias");
                return bnb_linear(net.ctx, net.input({2, 0}, {}), net.weight(type, {3, 0}, {}), bias);
            });
            CHECK(y == Floats{1, 2, 3, 1, 2, 3});
        }
        CHECK(run_op(env, [&](Net &net) { return bnb_linear(net.ctx, net.input({2, 8}, Floats(16)), net.weight(BNB_F32, {0, 8}, {}), nullptr); }).empty());
        CHECK(run_op(env, [&](Net &net) { return bnb_embed(net.ctx, net.weight(BNB_F32, {0, 8}, {}), net.ids({0}, {})); }).empty());
    }
}

TEST_CASE("ops: a weight without elements gets memory") {
    Env env;
    bnb_error err = {};
    Ctx ctx(bnb_ctx_create(env, &err));
    const int64_t shape[] = {0, 8};
    bnb_tensor *t = bnb_tensor_new(ctx.get(), BNB_F32, nullptr, 2, shape, "empty");
    REQUIRE(t);
    CHECK(bnb_ctx_alloc(ctx.get(), env.cpu(), &err) == BNB_OK);
    CHECK(bnb_tensor_state(t) == BNB_RESIDENT); // or a graph that uses it could never run
}

TEST_CASE("ops: a bad number stays in its row") {
    // x[1] holds one NaN or infinity. Rows 0 and 2 must not change; row 1 must show it where the formula does.
    for (const Level &level : cpu_levels()) {
        Env env(1, level.disable);
        for (float bad : {NaN, INF, -INF})
            for (int32_t op = 1; op < BNB_OP_COUNT; op++) {
                if (op == BNB_OP_COLUMNS) continue;
                for (int32_t type : types_of(op)) {
                    if (op == BNB_OP_EMBED && type != BNB_F32) continue;
                    const int64_t T = 3, C = 64;
                    CAPTURE(level.name);
                    CAPTURE(op_name(op));
                    CAPTURE(type_name(type));
                    CAPTURE(bad);
                    Floats results[2];
                    for (int with = 0; with < 2; with++) {
                        Net net(env);
                        net.params.compute_dtype = BNB_F32;
                        Rng rng(9);
                        Floats v = rng.normals(T * C), other = rng.normals(C);
                        if (with) v[1 * C + 10] = bad;
                        bnb_tensor *x = net.input({T, C}, v), *y = nullptr, *read = nullptr;
                        bnb_quant q = bnb_quant_default(type);
                        if (type == BNB_INT8_KV) q = blocks_of(16);
                        q.outlier_rule = BNB_OUTLIER_ROW; // an outlier takes its column from all rows by the other rule
                        switch (op) {
                        case BNB_OP_EMBED: y = bnb_embed(net.ctx, x, net.ids({3}, {0, 1, 2})); break;
                        case BNB_OP_LINEAR: y = bnb_linear(net.ctx, x, net.weight(type, {20, C}, rng.normals(20 * C), &q), nullptr); break;
                        case BNB_OP_LAYER_NORM: y = bnb_layer_norm(net.ctx, x, net.weight(type, {C}, other), nullptr, 1e-5f); break;
                        case BNB_OP_RMS_NORM: y = bnb_rms_norm(net.ctx, x, net.weight(type, {C}, other), 1e-5f); break;
                        case BNB_OP_ADD: y = bnb_add(net.ctx, x, net.weight(type, {C}, other)); break;
                        case BNB_OP_MUL: y = bnb_mul(net.ctx, x, net.weight(type, {C}, other)); break;
                        case BNB_OP_SCALE: y = bnb_scale(net.ctx, x, 2); break;
                        case BNB_OP_GELU: y = bnb_gelu(net.ctx, x); break;
                        case BNB_OP_GELU_TANH: y = bnb_gelu_tanh(net.ctx, x); break;
                        case BNB_OP_RELU: y = bnb_relu(net.ctx, x); break;
                        case BNB_OP_SILU: y = bnb_silu(net.ctx, x); break;
                        case BNB_OP_SOFTMAX: y = bnb_softmax(net.ctx, x); break;
                        case BNB_OP_ARGMAX: y = bnb_argmax(net.ctx, x); break; // -1 for a NaN, which is looked for below
                        case BNB_OP_DRAW: {
                            bnb_draw_rule rule = {0.8f, 0.9f, 0, 5, 1};
                            y = bnb_draw(net.ctx, x, net.ids({3}, {1, 2, 3}, "steps"), &rule);
                            break;
                        }
                        case BNB_OP_SET_ROWS:
                            read = net.weight(type, {T, C}, Floats(static_cast<size_t>(T * C)), &q, "cache");
                            y = bnb_set_rows(net.ctx, read, x, net.ids({3}, {0, 1, 2}));
                            break;
                        case BNB_OP_ATTENTION: {
                            bnb_tensor *kv = net.weight(type, {5, C}, rng.normals(5 * C), &q);
                            y = bnb_attention(net.ctx, x, kv, kv, net.ids({3, 2}, {0, 5, 0, 5, 0, 5}, "span"), 4, 4, 0.25f);
                            break;
                        }
                        default: FAIL("this op has no test: ", op_name(op));
                        }
                        net.prepare({y});
                        net.again();
                        results[with] = net.read(read ? read : y);
                    }
                    size_t n = results[0].size() / 3, bad_numbers = 0;
                    for (size_t i = 0; i < results[0].size(); i++) {
                        if (i / n == 1) bad_numbers += !std::isfinite(results[1][i]) || ((op == BNB_OP_ARGMAX || op == BNB_OP_DRAW) && results[1][i] < 0);
                        else CHECK(std::memcmp(&results[0][i], &results[1][i], 4) == 0);
                    }
                    // LLM.int8() quantizes a NaN to 0, as bitsandbytes does; max(-inf, 0) is 0, exp(-inf) is 0, and
                    // an infinite norm makes the rest 0
                    bool may_vanish = (op == BNB_OP_LINEAR && type == BNB_INT8 && std::isnan(bad)) || (op != BNB_OP_LINEAR && !std::isnan(bad));
                    if (!may_vanish) CHECK(bad_numbers > 0);
                    for (size_t i = 0; i < n && std::isnan(bad) && op == BNB_OP_LINEAR && type != BNB_INT8; i++) CHECK(std::isnan(results[1][n + i]));
                }
            }
    }
}

TEST_CASE("ops: a NaN in a weight reaches its column only") {
    for (const Level &level : cpu_levels()) {
        Env env(1, level.disable);
        for (int32_t type : {BNB_F32, BNB_F16, BNB_BF16})
            for (int64_t T : {1, 2, 12, 40}) {
                CAPTURE(level.name);
                CAPTURE(type_name(type));
                CAPTURE(T);
                Rng rng(4);
                Floats w = rng.normals(40 * 70), x = rng.normals(T * 70);
                w[17 * 70 + 69] = NaN;
                Floats y = run_op(env, [&](Net &net) { return bnb_linear(net.ctx, net.input({T, 70}, x), net.weight(type, {40, 70}, w), nullptr); });
                for (size_t i = 0; i < y.size(); i++) CHECK(std::isnan(y[i]) == (i % 40 == 17));
            }
    }
}

// ---- LLM.int8() ----

TEST_CASE("ops: int8 golden vector G5") {
    const uint16_t with6[] = {0x31c8, 0xae2b, 0xb46d, 0x2f3f, 0xa1ec, 0x3483, 0x3145, 0xad60, 0x3024, 0x97f2,
                              0xb48b, 0xb399, 0x202d, 0x29df, 0x9ca7, 0x398d, 0xb44f, 0x2dda, 0x9baf, 0x3833};
    const uint16_t with0[] = {0x31c6, 0xae2b, 0xb46d, 0x2f40, 0xa205, 0x3484, 0x3140, 0xad1d, 0x3018, 0x9a83,
                              0xb489, 0xb38d, 0x20a0, 0x29f6, 0x9c89, 0x39a4, 0xb45e, 0x2d28, 0x9d86, 0x3836};
    for (const Level &level : cpu_levels()) {
        CAPTURE(level.name);
        Env env(1, level.disable);
        Int8Tensor w = quantize_rows(env, g5(6).w, 5, 16);
        CHECK(hex(w.codes) == "21813a43b9d8c853f699d5de7a90aa842f2c20367fece01cfd07200eee353823a9b3e0c4ffbe118138fc64bef7faf19b201b282221d87f4a2f00"
                              "51242ef81c24826bb80b417f45240fc1ce2afd3bf2db");
        Int8Result reference = int8_reference(env, g5(6)), as_f16 = int8_reference(env, g5(6), true);
        CHECK(hex(reference.a.codes) == "3a24de008bd9553d8100f8001d0fefd8d8f6cd0000f7defd310028ed22b84881fa613a00be0d40c31b00da367f1e5f13e926f500d62216f6230"
                                        "03e81c1c7a35b");
        Floats y6 = int8_run(env, g5(6)), y0 = int8_run(env, g5(0));
        for (size_t i = 0; i < 20; i++) {
            CHECK(f16_distance(y0[i], with0[i]) == 0);
            CHECK(f16_distance(as_f16.y[i], with6[i]) == 0);
            CHECK(std::fabs(static_cast<double>(y6[i]) - f16_value(with6[i])) <= 20 * 0.1 * 0x1p-11); // an outlier times a rounding of its weight
        }
        CHECK(same_bits(int8_reference(env, g5(0)).y, y0));
        CHECK(relative_error(y6, widen(reference.y)) <= 1e-6);
    }
}

TEST_CASE("ops: int8 is exact without outliers and within 1e-6 with them") {
    const std::vector<Level> levels = cpu_levels();
    int with = 0, without = 0;
    for (uint64_t seed = 0; seed < 40; seed++) {
        Int8Problem p = int8_problem(seed, seed % 2 ? 0.01 : 0);
        CAPTURE(seed);
        CAPTURE(p.T);
        CAPTURE(p.N);
        CAPTURE(p.K);
        CAPTURE(p.threshold);
        CAPTURE(p.rule);
        CAPTURE(p.bias_type);
        Floats plain;
        for (const Level &level : levels) {
            CAPTURE(level.name);
            Env env(2, level.disable);
            Int8Result want = int8_reference(env, p);
            Floats got = int8_run(env, p);
            if (plain.empty()) plain = got;
            (want.outliers ? with : without)++;
            if (want.outliers) {
                double error = relative_error(got, widen(want.y)), between = relative_error(got, widen(plain));
                CHECK(error <= 1e-6);
                CHECK(between <= 1e-6);
            } else {
                CHECK(same_bits(got, want.y));
                CHECK(same_bits(got, plain));
            }
        }
    }
    CHECK(with > 20);
    CHECK(without > 20);
}

TEST_CASE("ops: int8 where many columns, a whole row, or everything is an outlier") {
    for (const Level &level : cpu_levels()) {
        CAPTURE(level.name);
        Env env(2, level.disable);
        for (int32_t rule : {BNB_OUTLIER_COLUMN, BNB_OUTLIER_ROW})
            for (int what = 0; what < 4; what++) {
                Rng rng(static_cast<uint64_t>(what));
                Int8Problem p;
                p.T = 9, p.N = 21, p.K = 160;
                p.x = rng.normals(p.T * p.K);
                p.w = rng.normals(p.N * p.K, 0.1);
                p.rule = rule;
                for (int64_t i = 0; i < p.T * p.K; i++) {
                    float &v = p.x[static_cast<size_t>(i)];
                    if (what == 0 && i % p.K % 2 == 0 && i / p.K == 3) v += 10; // half of the columns
                    if (what == 1 && i / p.K == 4) v += 10;                     // all of a row
                    if (what == 2) v += 20;                                     // everything
                    if (what == 3 && i / p.K == 5) v = 0;                       // a row of zeros
                }
                CAPTURE(rule);
                CAPTURE(what);
                Int8Result want = int8_reference(env, p);
                CHECK(relative_error(int8_run(env, p), widen(want.y)) <= 1e-6);
            }
    }
}

TEST_CASE("ops: the threshold counts magnitudes after rounding to f16, and itself") {
    for (const Level &level : cpu_levels()) {
        CAPTURE(level.name);
        Env env(1, level.disable);
        for (float v : {6.0f, 5.9990234f, 5.998f, -6.0f, 5.996f}) // f16 has steps of 1/256 there: 5.9990234 becomes 6
            for (int64_t T : {1, 2, 12}) {
                Int8Problem p;
                p.T = T, p.N = 3, p.K = 8;
                p.x = Floats(static_cast<size_t>(8 * T), 0.5f);
                p.x[2] = v;
                p.w = Rng(1).normals(24);
                CAPTURE(v);
                CAPTURE(T);
                Int8Result want = int8_reference(env, p);
                CHECK(want.outliers == (std::fabs(v) > 5.9980f));
                CHECK(relative_error(int8_run(env, p), widen(want.y)) <= 1e-6);
            }
    }
}

TEST_CASE("ops: with the row rule a row does not depend on its neighbours") {
    for (const Level &level : cpu_levels()) {
        CAPTURE(level.name);
        Env env(1, level.disable);
        Int8Problem p = int8_problem(1, 0.02);
        p.rule = BNB_OUTLIER_ROW;
        p.threshold = 6;
        p.T = 6;
        p.x.resize(static_cast<size_t>(p.T * p.K), 0.25f);
        p.x[0] = 9;
        Floats all = int8_run(env, p);
        for (int64_t t = 0; t < p.T; t++) {
            Int8Problem one = p;
            one.T = 1;
            one.x = Floats(p.x.begin() + t * p.K, p.x.begin() + (t + 1) * p.K);
            Floats y = int8_run(env, one);
            CHECK(relative_error(y, Doubles(all.begin() + t * p.N, all.begin() + (t + 1) * p.N)) <= 1e-6);
        }
    }
}

// ---- errors ----

TEST_CASE("ops: what does not fit is refused with a sentence, when the graph is made") {
    Env env;
    struct Bad {
        const char *op;
        std::function<bnb_tensor *(bnb_ctx *)> build;
    };
    auto input = [](bnb_ctx *c, int32_t type, Shape shape) { return bnb_input(c, type, static_cast<int32_t>(shape.size()), shape.data(), "thing"); };
    auto f32 = [input](bnb_ctx *c, int64_t rows, int64_t columns) { return input(c, BNB_F32, {rows, columns}); };
    auto vec = [input](bnb_ctx *c, int64_t n) { return input(c, BNB_F32, {n}); };
    auto i32 = [input](bnb_ctx *c, int64_t n) { return input(c, BNB_I32, {n}); };
    auto leaf = [](bnb_ctx *c, int32_t type, Shape shape) { return bnb_tensor_new(c, type, nullptr, static_cast<int32_t>(shape.size()), shape.data(), "thing"); };
    auto heads = [](bnb_ctx *c, int64_t D) { // an int8 cache
        const int64_t shape[] = {5, 8};
        const bnb_quant q = blocks_of(D);
        return bnb_tensor_new(c, BNB_INT8_KV, &q, 2, shape, "cache");
    };
    static const bnb_draw_rule fair = {1, 1, 0, 1, 0}, unfair = {1, 0, 0, 1, 0};
    const std::vector<Bad> bad = {
        {"embed", [=](bnb_ctx *c) { return bnb_embed(c, nullptr, i32(c, 3)); }},
        {"embed", [=](bnb_ctx *c) { return bnb_embed(c, f32(c, 4, 8), nullptr); }},
        {"embed", [=](bnb_ctx *c) { return bnb_embed(c, f32(c, 4, 8), vec(c, 3)); }},
        {"embed", [=](bnb_ctx *c) { return bnb_embed(c, f32(c, 4, 8), input(c, BNB_I32, {3, 1})); }},
        {"embed", [=](bnb_ctx *c) { return bnb_embed(c, leaf(c, BNB_INT8, {4, 8}), i32(c, 3)); }},
        {"embed", [=](bnb_ctx *c) { return bnb_embed(c, leaf(c, BNB_NF4, {4, 8}), i32(c, 3)); }},
        {"embed", [=](bnb_ctx *c) { return bnb_embed(c, vec(c, 8), i32(c, 3)); }},
        {"embed", [=](bnb_ctx *c) { return bnb_embed(c, input(c, BNB_I32, {4, 8}), i32(c, 3)); }},
        {"linear", [=](bnb_ctx *c) { return bnb_linear(c, nullptr, f32(c, 4, 8), nullptr); }},
        {"linear", [=](bnb_ctx *c) { return bnb_linear(c, f32(c, 2, 8), nullptr, nullptr); }},
        {"linear", [=](bnb_ctx *c) { return bnb_linear(c, f32(c, 2, 8), f32(c, 4, 9), nullptr); }},
        {"linear", [=](bnb_ctx *c) { return bnb_linear(c, vec(c, 8), f32(c, 4, 8), nullptr); }},
        {"linear", [=](bnb_ctx *c) { return bnb_linear(c, leaf(c, BNB_F16, {2, 8}), f32(c, 4, 8), nullptr); }},
        {"linear", [=](bnb_ctx *c) { return bnb_linear(c, f32(c, 2, 8), f32(c, 4, 8), vec(c, 5)); }},
        {"linear", [=](bnb_ctx *c) { return bnb_linear(c, f32(c, 2, 8), f32(c, 4, 8), f32(c, 1, 4)); }},
        {"linear", [=](bnb_ctx *c) { return bnb_linear(c, f32(c, 2, 8), f32(c, 4, 8), i32(c, 4)); }},
        {"linear", [=](bnb_ctx *c) { return bnb_linear(c, f32(c, 2, 8), input(c, BNB_I32, {4, 8}), nullptr); }},
        {"linear", [=](bnb_ctx *c) { return bnb_linear(c, f32(c, 2, 8), input(c, BNB_I8, {4, 8}), nullptr); }},
        {"linear", [=](bnb_ctx *c) { return bnb_linear(c, f32(c, 2, 8), input(c, BNB_U8, {4, 8}), nullptr); }},
        {"linear", [=](bnb_ctx *c) { return bnb_linear(c, f32(c, 2, 8), leaf(c, BNB_NF4, {8}), nullptr); }},
        {"linear", [=](bnb_ctx *c) { return bnb_linear(c, f32(c, 2, 8), leaf(c, BNB_F32, {2, 2, 8}), nullptr); }},
        {"layer_norm", [=](bnb_ctx *c) { return bnb_layer_norm(c, nullptr, nullptr, nullptr, 1e-5f); }},
        {"layer_norm", [=](bnb_ctx *c) { return bnb_layer_norm(c, f32(c, 2, 8), vec(c, 7), nullptr, 1e-5f); }},
        {"layer_norm", [=](bnb_ctx *c) { return bnb_layer_norm(c, f32(c, 2, 8), vec(c, 8), vec(c, 9), 1e-5f); }},
        {"layer_norm", [=](bnb_ctx *c) { return bnb_layer_norm(c, f32(c, 2, 8), i32(c, 8), nullptr, 1e-5f); }},
        {"layer_norm", [=](bnb_ctx *c) { return bnb_layer_norm(c, vec(c, 8), nullptr, nullptr, 1e-5f); }},
        {"rms_norm", [=](bnb_ctx *c) { return bnb_rms_norm(c, nullptr, nullptr, 1e-5f); }},
        {"rms_norm", [=](bnb_ctx *c) { return bnb_rms_norm(c, f32(c, 2, 8), f32(c, 2, 8), 1e-5f); }},
        {"rms_norm", [=](bnb_ctx *c) { return bnb_rms_norm(c, leaf(c, BNB_BF16, {2, 8}), nullptr, 1e-5f); }},
        {"add", [=](bnb_ctx *c) { return bnb_add(c, nullptr, f32(c, 2, 8)); }},
        {"add", [=](bnb_ctx *c) { return bnb_add(c, f32(c, 2, 8), nullptr); }},
        {"add", [=](bnb_ctx *c) { return bnb_add(c, f32(c, 2, 8), f32(c, 3, 8)); }},
        {"add", [=](bnb_ctx *c) { return bnb_add(c, f32(c, 2, 8), f32(c, 1, 8)); }},
        {"add", [=](bnb_ctx *c) { return bnb_add(c, f32(c, 2, 8), vec(c, 2)); }},
        {"add", [=](bnb_ctx *c) { return bnb_add(c, vec(c, 8), vec(c, 8)); }},
        {"mul", [=](bnb_ctx *c) { return bnb_mul(c, f32(c, 2, 8), f32(c, 2, 7)); }},
        {"mul", [=](bnb_ctx *c) { return bnb_mul(c, f32(c, 2, 8), i32(c, 8)); }},
        {"mul", [=](bnb_ctx *c) { return bnb_mul(c, f32(c, 2, 8), leaf(c, BNB_F16, {2, 8})); }},
        {"scale", [=](bnb_ctx *c) { return bnb_scale(c, nullptr, 1); }},
        {"scale", [=](bnb_ctx *c) { return bnb_scale(c, i32(c, 8), 1); }},
        {"gelu", [=](bnb_ctx *c) { return bnb_gelu(c, nullptr); }},
        {"gelu", [=](bnb_ctx *c) { return bnb_gelu(c, leaf(c, BNB_F16, {2, 8})); }},
        {"gelu_tanh", [=](bnb_ctx *c) { return bnb_gelu_tanh(c, vec(c, 8)); }},
        {"relu", [=](bnb_ctx *c) { return bnb_relu(c, leaf(c, BNB_F32, {2, 8, 1})); }},
        {"silu", [=](bnb_ctx *c) { return bnb_silu(c, leaf(c, BNB_NF4, {2, 8})); }},
        {"softmax", [=](bnb_ctx *c) { return bnb_softmax(c, i32(c, 8)); }},
        {"set_rows", [=](bnb_ctx *c) { return bnb_set_rows(c, nullptr, f32(c, 2, 8), i32(c, 2)); }},
        {"set_rows", [=](bnb_ctx *c) { return bnb_set_rows(c, leaf(c, BNB_F16, {9, 8}), nullptr, i32(c, 2)); }},
        {"set_rows", [=](bnb_ctx *c) { return bnb_set_rows(c, leaf(c, BNB_F16, {9, 8}), f32(c, 2, 8), nullptr); }},
        {"set_rows", [=](bnb_ctx *c) { return bnb_set_rows(c, leaf(c, BNB_F16, {9, 8}), f32(c, 2, 8), i32(c, 3)); }},
        {"set_rows", [=](bnb_ctx *c) { return bnb_set_rows(c, leaf(c, BNB_F16, {9, 8}), f32(c, 2, 7), i32(c, 2)); }},
        {"set_rows", [=](bnb_ctx *c) { return bnb_set_rows(c, leaf(c, BNB_BF16, {9, 8}), f32(c, 2, 8), i32(c, 2)); }},
        {"set_rows", [=](bnb_ctx *c) { return bnb_set_rows(c, leaf(c, BNB_INT8, {9, 8}), f32(c, 2, 8), i32(c, 2)); }},
        {"set_rows", [=](bnb_ctx *c) { return bnb_set_rows(c, heads(c, 8), f32(c, 2, 7), i32(c, 2)); }},
        {"set_rows", [=](bnb_ctx *c) { return bnb_set_rows(c, f32(c, 9, 8), f32(c, 2, 8), i32(c, 2)); }}, // an input is the plan's
        {"set_rows", [=](bnb_ctx *c) { return bnb_set_rows(c, bnb_relu(c, f32(c, 9, 8)), f32(c, 2, 8), i32(c, 2)); }},
        {"attention", [=](bnb_ctx *c) { return bnb_attention(c, nullptr, f32(c, 5, 8), f32(c, 5, 8), input(c, BNB_I32, {2, 2}), 2, 2, 1); }},
        {"attention", [=](bnb_ctx *c) { return bnb_attention(c, f32(c, 2, 8), nullptr, f32(c, 5, 8), input(c, BNB_I32, {2, 2}), 2, 2, 1); }},
        {"attention", [=](bnb_ctx *c) { return bnb_attention(c, f32(c, 2, 8), f32(c, 5, 8), nullptr, input(c, BNB_I32, {2, 2}), 2, 2, 1); }},
        {"attention", [=](bnb_ctx *c) { return bnb_attention(c, f32(c, 2, 8), f32(c, 5, 8), f32(c, 5, 8), nullptr, 2, 2, 1); }},
        {"attention", [=](bnb_ctx *c) { return bnb_attention(c, f32(c, 2, 8), f32(c, 5, 8), f32(c, 5, 8), input(c, BNB_I32, {2, 2}), 3, 3, 1); }},
        {"attention", [=](bnb_ctx *c) { return bnb_attention(c, f32(c, 2, 8), f32(c, 5, 8), f32(c, 5, 8), input(c, BNB_I32, {2, 2}), 4, 3, 1); }},
        {"attention", [=](bnb_ctx *c) { return bnb_attention(c, f32(c, 2, 8), f32(c, 5, 8), f32(c, 5, 8), input(c, BNB_I32, {2, 2}), 0, 0, 1); }},
        {"attention", [=](bnb_ctx *c) { return bnb_attention(c, f32(c, 2, 8), f32(c, 5, 8), f32(c, 5, 8), input(c, BNB_I32, {2, 2}), -2, -1, 1); }},
        {"attention", [=](bnb_ctx *c) { return bnb_attention(c, f32(c, 2, 8), f32(c, 5, 8), f32(c, 5, 8), input(c, BNB_I32, {2, 2}), 2, 1, 1); }},
        {"attention", [=](bnb_ctx *c) { return bnb_attention(c, f32(c, 2, 8), f32(c, 5, 8), f32(c, 6, 8), input(c, BNB_I32, {2, 2}), 2, 2, 1); }},
        {"attention", [=](bnb_ctx *c) { return bnb_attention(c, f32(c, 2, 8), f32(c, 5, 8), leaf(c, BNB_F16, {5, 8}), input(c, BNB_I32, {2, 2}), 2, 2, 1); }},
        {"attention", [=](bnb_ctx *c) { return bnb_attention(c, f32(c, 2, 8), leaf(c, BNB_BF16, {5, 8}), leaf(c, BNB_BF16, {5, 8}), input(c, BNB_I32, {2, 2}), 2, 2, 1); }},
        {"attention", [=](bnb_ctx *c) { return bnb_attention(c, f32(c, 2, 8), f32(c, 5, 8), f32(c, 5, 8), input(c, BNB_I32, {2, 3}), 2, 2, 1); }},
        {"attention", [=](bnb_ctx *c) { return bnb_attention(c, f32(c, 2, 8), f32(c, 5, 8), f32(c, 5, 8), input(c, BNB_I32, {3, 2}), 2, 2, 1); }},
        {"attention", [=](bnb_ctx *c) { return bnb_attention(c, f32(c, 2, 8), f32(c, 5, 8), f32(c, 5, 8), i32(c, 4), 2, 2, 1); }},
        {"attention", [=](bnb_ctx *c) { return bnb_attention(c, f32(c, 2, 8), heads(c, 8), heads(c, 8), input(c, BNB_I32, {2, 2}), 2, 2, 1); }}, // 4 columns to a head
        {"attention", [=](bnb_ctx *c) { return bnb_attention(c, f32(c, 2, 8), heads(c, 4), heads(c, 2), input(c, BNB_I32, {2, 2}), 2, 2, 1); }},
        {"attention", [=](bnb_ctx *c) { return bnb_attention(c, f32(c, 2, 8), heads(c, 4), leaf(c, BNB_F16, {5, 8}), input(c, BNB_I32, {2, 2}), 2, 2, 1); }},
        {"linear", [=](bnb_ctx *c) { return bnb_linear(c, f32(c, 2, 8), heads(c, 8), nullptr); }},
        {"columns", [=](bnb_ctx *c) { return bnb_columns(c, nullptr, 0, 1); }},
        {"columns", [=](bnb_ctx *c) { return bnb_columns(c, f32(c, 2, 8), -1, 1); }},
        {"columns", [=](bnb_ctx *c) { return bnb_columns(c, f32(c, 2, 8), 0, 9); }},
        {"columns", [=](bnb_ctx *c) { return bnb_columns(c, f32(c, 2, 8), 8, 1); }},
        {"columns", [=](bnb_ctx *c) { return bnb_columns(c, f32(c, 2, 8), 0, 0); }},
        {"columns", [=](bnb_ctx *c) { return bnb_columns(c, f32(c, 2, 8), 0, -1); }},
        {"columns", [=](bnb_ctx *c) { return bnb_columns(c, f32(c, 2, 8), INT64_MAX, 1); }},
        {"columns", [=](bnb_ctx *c) { return bnb_columns(c, f32(c, 2, 8), 1, INT64_MAX); }},
        {"columns", [=](bnb_ctx *c) { return bnb_columns(c, f32(c, 2, 8), INT64_MAX, INT64_MAX); }},
        {"columns", [=](bnb_ctx *c) { return bnb_columns(c, f32(c, 2, 8), INT64_MIN, 1); }},
        {"columns", [=](bnb_ctx *c) { return bnb_columns(c, leaf(c, BNB_F16, {2, 8}), 0, 1); }},
        {"argmax", [=](bnb_ctx *c) { return bnb_argmax(c, nullptr); }},
        {"draw", [=](bnb_ctx *c) { return bnb_draw(c, f32(c, 2, 8), leaf(c, BNB_I32, {3}), &fair); }},
        {"draw", [=](bnb_ctx *c) { return bnb_draw(c, f32(c, 2, 8), leaf(c, BNB_F32, {2}), &fair); }},
        {"draw", [=](bnb_ctx *c) { return bnb_draw(c, f32(c, 2, 8), leaf(c, BNB_I32, {2}), &unfair); }},
        {"argmax", [=](bnb_ctx *c) { return bnb_argmax(c, f32(c, 2, 0)); }},
        {"argmax", [=](bnb_ctx *c) { return bnb_argmax(c, leaf(c, BNB_F16, {2, 8})); }},
    };
    std::map<std::string, int> tested;
    for (size_t i = 0; i < bad.size(); i++) {
        CAPTURE(i);
        CAPTURE(std::string(bad[i].op));
        bnb_error err = {}, first = {}, again = {};
        Ctx ctx(bnb_ctx_create(env, &err));
        bnb_tensor *x = f32(ctx.get(), 2, 8), *good = bnb_relu(ctx.get(), x);
        REQUIRE(good);
        CHECK(bnb_ctx_status(ctx.get(), &first) == BNB_OK);
        CHECK(bad[i].build(ctx.get()) == nullptr);
        bnb_status status = bnb_ctx_status(ctx.get(), &first);
        CHECK((status == BNB_E_SHAPE || status == BNB_E_TYPE || status == BNB_E_ARG));
        CHECK_MESSAGE(is_sentence(first), text(first));
        CHECK_MESSAGE(contains(text(first), bad[i].op), text(first));
        // whatever comes later is NULL, and the first error is the one that is told
        CHECK(bnb_relu(ctx.get(), good) == nullptr);
        CHECK(bnb_add(ctx.get(), good, bad[i].build(ctx.get())) == nullptr);
        CHECK(leaf(ctx.get(), BNB_F32, {-1}) == nullptr);
        bnb_tensor *none = nullptr;
        CHECK(bnb_graph_create(ctx.get(), &none, 1, &err) == nullptr);
        CHECK(bnb_graph_create(ctx.get(), &good, 1, &again) == nullptr);
        CHECK(err.code == status);
        CHECK(text(err) == text(first));
        CHECK(text(again) == text(first));
        CHECK(bnb_graph_create(ctx.get(), &good, 1, nullptr) == nullptr);
        tested[bad[i].op]++;
    }
    for (int32_t op = 1; op < BNB_OP_COUNT; op++) CHECK_MESSAGE(tested[op_name(op)] > 0, op_name(op));
}

TEST_CASE("ops: all ops take a NULL ctx") {
    CHECK(bnb_embed(nullptr, nullptr, nullptr) == nullptr);
    CHECK(bnb_linear(nullptr, nullptr, nullptr, nullptr) == nullptr);
    CHECK(bnb_layer_norm(nullptr, nullptr, nullptr, nullptr, 0) == nullptr);
    CHECK(bnb_rms_norm(nullptr, nullptr, nullptr, 0) == nullptr);
    CHECK(bnb_add(nullptr, nullptr, nullptr) == nullptr);
    CHECK(bnb_mul(nullptr, nullptr, nullptr) == nullptr);
    CHECK(bnb_scale(nullptr, nullptr, 0) == nullptr);
    CHECK(bnb_gelu(nullptr, nullptr) == nullptr);
    CHECK(bnb_gelu_tanh(nullptr, nullptr) == nullptr);
    CHECK(bnb_relu(nullptr, nullptr) == nullptr);
    CHECK(bnb_silu(nullptr, nullptr) == nullptr);
    CHECK(bnb_softmax(nullptr, nullptr) == nullptr);
    CHECK(bnb_set_rows(nullptr, nullptr, nullptr, nullptr) == nullptr);
    CHECK(bnb_attention(nullptr, nullptr, nullptr, nullptr, nullptr, 1, 1, 1) == nullptr);
    CHECK(bnb_columns(nullptr, nullptr, 0, 1) == nullptr);
}

TEST_CASE("ops: tensors that cannot be are refused with a sentence") {
    Env env;
    struct Bad {
        bnb_status code;
        std::function<bnb_tensor *(bnb_ctx *)> build;
    };
    const int64_t two[] = {2, 64}, huge[] = {INT64_MAX, INT64_MAX, 2, 2}, negative[] = {2, -1}, three[] = {2, 2, 2};
    bnb_quant odd = quant4(BNB_NF4, 48, false), tiny = quant4(BNB_NF4, 16, false), large = quant4(BNB_FP4, 8192, false), zero = quant4(BNB_NF4, 0, false), seven = blocks_of(7);
    bnb_quant nested = quant4(BNB_NF4, 64, true), dtype = quant4(BNB_NF4, 64, false), threshold = bnb_quant_default(BNB_INT8), rule = threshold;
    nested.nested_blocksize = 64;
    dtype.dtype = BNB_I32;
    threshold.threshold = NaN;
    rule.outlier_rule = 2;
    std::string long_name(BNB_MAX_NAME, 'n'), fits(BNB_MAX_NAME - 1, 'n');
    const std::vector<Bad> bad = {
        {BNB_E_TYPE, [&](bnb_ctx *c) { return bnb_tensor_new(c, 6, nullptr, 2, two, "t"); }},
        {BNB_E_TYPE, [&](bnb_ctx *c) { return bnb_tensor_new(c, -1, nullptr, 2, two, "t"); }},
        {BNB_E_TYPE, [&](bnb_ctx *c) { return bnb_tensor_new(c, BNB_TYPE_COUNT, nullptr, 2, two, "t"); }},
        {BNB_E_LIMIT, [&](bnb_ctx *c) { return bnb_tensor_new(c, BNB_F32, nullptr, 0, two, "t"); }},
        {BNB_E_LIMIT, [&](bnb_ctx *c) { return bnb_tensor_new(c, BNB_F32, nullptr, 5, two, "t"); }},
        {BNB_E_LIMIT, [&](bnb_ctx *c) { return bnb_tensor_new(c, BNB_F32, nullptr, -1, two, "t"); }},
        {BNB_E_LIMIT, [&](bnb_ctx *c) { return bnb_tensor_new(c, BNB_F32, nullptr, 2, two, long_name.c_str()); }},
        {BNB_E_SHAPE, [&](bnb_ctx *c) { return bnb_tensor_new(c, BNB_F32, nullptr, 2, negative, "t"); }},
        {BNB_E_SHAPE, [&](bnb_ctx *c) { return bnb_tensor_new(c, BNB_F32, nullptr, 4, huge, "t"); }},
        {BNB_E_SHAPE, [&](bnb_ctx *c) { return bnb_tensor_new(c, BNB_NF4, nullptr, 4, huge, "t"); }},
        {BNB_E_SHAPE, [&](bnb_ctx *c) { return bnb_tensor_new(c, BNB_U8, nullptr, 1, huge, "t"); }},
        {BNB_E_SHAPE, [&](bnb_ctx *c) { return bnb_tensor_new(c, BNB_INT8, nullptr, 3, three, "t"); }},
        {BNB_E_SHAPE, [&](bnb_ctx *c) { return bnb_tensor_new(c, BNB_INT8_KV, nullptr, 3, three, "t"); }},
        {BNB_E_SHAPE, [&](bnb_ctx *c) { return bnb_tensor_new(c, BNB_INT8_KV, &seven, 2, two, "t"); }},
        {BNB_E_ARG, [&](bnb_ctx *c) { return bnb_tensor_new(c, BNB_INT8_KV, &zero, 2, two, "t"); }},
        {BNB_E_ARG, [&](bnb_ctx *c) { return bnb_tensor_new(c, BNB_NF4, &odd, 2, two, "t"); }},
        {BNB_E_ARG, [&](bnb_ctx *c) { return bnb_tensor_new(c, BNB_NF4, &tiny, 2, two, "t"); }},
        {BNB_E_ARG, [&](bnb_ctx *c) { return bnb_tensor_new(c, BNB_FP4, &large, 2, two, "t"); }},
        {BNB_E_ARG, [&](bnb_ctx *c) { return bnb_tensor_new(c, BNB_NF4, &zero, 2, two, "t"); }},
        {BNB_E_ARG, [&](bnb_ctx *c) { return bnb_tensor_new(c, BNB_NF4, &nested, 2, two, "t"); }},
        {BNB_E_ARG, [&](bnb_ctx *c) { return bnb_tensor_new(c, BNB_NF4, &dtype, 2, two, "t"); }},
        {BNB_E_ARG, [&](bnb_ctx *c) { return bnb_tensor_new(c, BNB_INT8, &threshold, 2, two, "t"); }},
        {BNB_E_ARG, [&](bnb_ctx *c) { return bnb_tensor_new(c, BNB_INT8, &rule, 2, two, "t"); }},
        {BNB_E_TYPE, [&](bnb_ctx *c) { return bnb_input(c, BNB_NF4, 2, two, "t"); }},
        {BNB_E_TYPE, [&](bnb_ctx *c) { return bnb_input(c, BNB_INT8, 2, two, "t"); }},
        {BNB_E_TYPE, [&](bnb_ctx *c) { return bnb_input(c, BNB_INT8_KV, 2, two, "t"); }},
        {BNB_E_TYPE, [&](bnb_ctx *c) { return bnb_input(c, BNB_INT8, 2, two, nullptr); }},
    };
    for (size_t i = 0; i < bad.size(); i++) {
        CAPTURE(i);
        bnb_error err = {};
        Ctx ctx(bnb_ctx_create(env, nullptr));
        CHECK(bad[i].build(ctx.get()) == nullptr);
        CHECK_MESSAGE(bnb_ctx_status(ctx.get(), &err) == bad[i].code, text(err));
        CHECK_MESSAGE(is_sentence(err), text(err));
    }
    Ctx ctx(bnb_ctx_create(env, nullptr));
    bnb_tensor *t = bnb_tensor_new(ctx.get(), BNB_F32, nullptr, 2, two, fits.c_str());
    REQUIRE(t);
    CHECK(bnb_tensor_name(t) == fits);
    CHECK(bnb_tensor_new(ctx.get(), BNB_F32, nullptr, 2, two, nullptr) != nullptr);
}

TEST_CASE("ops: ids, rows and spans outside what they point into are refused by name") {
    struct Bad {
        const char *input;
        std::vector<int32_t> values;
        int at; // which value is wrong
    };
    const int32_t most = INT32_MAX, least = INT32_MIN;
    Env env;
    Net net(env);
    bnb_tensor *ids = net.ids({3}, {0, 1, 2}, "the ids"), *rows = net.ids({3}, {0, 1, 2}, "the rows");
    bnb_tensor *span = net.ids({3, 2}, {0, 1, 0, 2, 0, 3}, "the spans");
    bnb_tensor *x = bnb_embed(net.ctx, net.weight(BNB_F32, {5, 8}, Rng(1).normals(40), nullptr, "table"), ids);
    bnb_tensor *cache = net.weight(BNB_F16, {7, 8}, Floats(56), nullptr, "cache");
    bnb_tensor *kv = bnb_set_rows(net.ctx, cache, x, rows);
    net.prepare({bnb_attention(net.ctx, x, kv, kv, span, 2, 2, 1)});
    net.again();
    const std::vector<Bad> bad = {
        {"the ids", {0, 5, 0}, 1}, {"the ids", {-1, 0, 0}, 0}, {"the ids", {0, 0, most}, 2}, {"the ids", {least, 0, 0}, 0},
        {"the rows", {7, 1, 0}, 0}, {"the rows", {0, 1, -1}, 2}, {"the rows", {0, most, 1}, 1}, {"the rows", {0, least, 1}, 1},
        {"the spans", {0, 8, 0, 0, 0, 0}, 1}, {"the spans", {0, 0, 8, 8, 0, 0}, 2}, {"the spans", {0, 0, 0, 0, 3, 2}, 5},
        {"the spans", {-1, 3, 0, 0, 0, 0}, 0}, {"the spans", {0, -1, 0, 0, 0, 0}, 1}, {"the spans", {0, 0, 0, most, 0, 0}, 3},
        {"the spans", {0, 0, least, most, 0, 0}, 2},
    };
    for (const Bad &b : bad) {
        bnb_error err = {};
        bnb_tensor *t = std::string(b.input) == "the ids" ? ids : std::string(b.input) == "the rows" ? rows : span;
        std::vector<int32_t> good = t == span ? std::vector<int32_t>{0, 7, 7, 7, 0, 0} : std::vector<int32_t>{4, 0, 3};
        Floats before = net.read(cache);
        net.set(t, b.values);
        CHECK(bnb_plan_run(net.plan, &err) == BNB_E_ARG);
        CHECK_MESSAGE(is_sentence(err), text(err));
        CHECK_MESSAGE(contains(text(err), b.input), text(err));
        CHECK_MESSAGE(contains(text(err), std::to_string(b.values[static_cast<size_t>(b.at)])), text(err));
        CHECK(same_bits(before, net.read(cache))); // nothing was computed
        CHECK(bnb_plan_run(net.plan, nullptr) == BNB_E_ARG);
        net.set(t, good);
        CHECK(bnb_plan_run(net.plan, &err) == BNB_OK);
    }
}

TEST_CASE("ops: codes of an int8 cache, against double precision; what is not a number, and what is too small") {
    const int64_t B = 21, R = 3, C = 4 * B;
    for (const Level &level : cpu_levels()) {
        CAPTURE(level.name);
        Env env(2, level.disable);
        for (double scale : {1.0, 1e-30, 1e-36, 3e37, 1e-38, 0.0}) { // the last two are below 2^-120
            CAPTURE(scale);
            Net net(env);
            Floats x = Rng(3).normals(R * C, scale);
            for (float &v : x) v = std::max(-FLT_MAX, std::min(v, FLT_MAX));
            x[0 * C + 5] = NaN;          // row 0, block 0
            x[1 * C + B + 20] = -INF;    // row 1, block 1
            x[1 * C + 2 * B] = FLT_MAX;  // row 1, block 2: the others are nothing beside it
            const bnb_quant q = blocks_of(B);
            bnb_tensor *cache = net.weight(BNB_INT8_KV, {R, C}, Rng(4).normals(R * C), &q, "cache");
            net.run(bnb_set_rows(net.ctx, cache, net.input({R, C}, x), net.ids({R}, {2, 0, 1}, "rows")));
            const int8_t *codes = static_cast<const int8_t *>(bnb_tensor_plane(cache, 0));
            const float *absmax = static_cast<const float *>(bnb_tensor_plane(cache, 1));
            for (int64_t t = 0; t < R; t++)
                for (int64_t b = 0; b < 4; b++) {
                    const int64_t r = (t + 2) % 3;
                    const bool bad = (t == 0 && b == 0) || (t == 1 && b == 1);
                    double top = 0;
                    for (int64_t i = 0; i < B && !bad; i++) top = std::max(top, std::fabs(static_cast<double>(x[static_cast<size_t>(t * C + b * B + i)])));
                    if (top < 0x1p-120) top = 0;
                    const double got = static_cast<double>(absmax[b * R + r]);
                    CHECK((bad ? std::isnan(got) : got == top));
                    for (int64_t i = 0; i < B; i++) {
                        const double code = codes[r * C + b * B + i], v = static_cast<double>(x[static_cast<size_t>(t * C + b * B + i)]);
                        if (bad || top == 0) CHECK(code == 0);
                        else CHECK(std::fabs(code - 127 * v / top) <= 0.5 + 1e-4);
                    }
                }
        }
    }
}

TEST_CASE("ops: a cache is read as it is after the write, in the same graph") {
    for (const Level &level : cpu_levels()) {
        CAPTURE(level.name);
        Env env(2, level.disable);
        for (int32_t type : types_of(BNB_OP_SET_ROWS)) {
            Net net(env);
            Rng rng(8);
            const int64_t R = 12, C = 32;
            const bnb_quant quant = blocks_of(8);
            Floats k = rng.normals(3 * C), v = rng.normals(3 * C), q = rng.normals(3 * C);
            bnb_tensor *rows = net.ids({3}, {9, 2, 5}, "rows"), *span = net.ids({3, 2}, {9, 10, 2, 3, 5, 6}, "span");
            bnb_tensor *kc = net.weight(type, {R, C}, Floats(static_cast<size_t>(R * C), NaN), &quant, "k"), *vc = net.weight(type, {R, C}, Floats(static_cast<size_t>(R * C), NaN), &quant, "v");
            bnb_tensor *kw = bnb_set_rows(net.ctx, kc, net.input({3, C}, k), rows), *vw = bnb_set_rows(net.ctx, vc, net.input({3, C}, v), rows);
            Floats y = net.run(bnb_attention(net.ctx, net.input({3, C}, q), kw, vw, span, 4, 4, 0.3f)); // each sees its own row only
            CHECK(relative_error(y, cached(type, v, 3, C, 8)) <= 1e-6);
        }
    }
}

} // TEST_SUITE
