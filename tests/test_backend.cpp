// test_backend.cpp: every device that this program was built for and finds, against the plain CPU kernels: each op with each
// type on many shapes, whole blocks, random graphs, whole models; weights there and back; faults and what follows them.
// The CPU's own fast kernels are one of the devices, so that the suite never runs empty. BNB_TEST_DEVICE=hip in the
// environment: that device must be there. BNB_TEST_SHARE=1/5: of each five comparisons the second, where runs share them.
#include "graphs.h"
#include "tiny_model.h"

#include "../models/checkpoint.h"

#include <thread>

#ifndef BNB_SOURCE_DIR
#define BNB_SOURCE_DIR "."
#endif

using namespace test;

namespace {

struct Device {
    std::string name;
    Backend backend; // NULL: the env's CPU
};

// Devices of this env, "cpu" first.
std::vector<Device> devices(Env &env) {
    std::vector<Device> list;
    list.push_back({"cpu", nullptr});
    for (const char *name : {"cuda", "hip"}) {
        bnb_error err = {};
        Backend b(bnb_backend_open(env, name, &err));
        if (!b) CHECK_MESSAGE(is_sentence(err), text(err)); // not built in, or not there: said in a sentence
        const char *needed = std::getenv("BNB_TEST_DEVICE");
        REQUIRE_MESSAGE((b || !needed || name != std::string(needed)), text(err));
        if (b) list.push_back({name, std::move(b)});
    }
    return list;
}

bool has_cuda() {
    Env env(1);
    bnb_error err = {};
    return bool(Backend(bnb_backend_open(env, "cuda", &err)));
}

using Build = std::function<std::vector<bnb_tensor *>(Net &)>;

// Runs what build makes, nodes to compute and caches that they write, on the plain CPU kernels and on every device. tolerance: of |difference| / |result|, for results
// computed in f32 and in f16. half_only: of that, only GPUs in f16.
void compare(const Build &build, double f32, double f16, const std::string &what, bool half_only = false) {
    static int count = 0, mine = 0, sharers = 1;
    if (const char *share = std::getenv("BNB_TEST_SHARE")) REQUIRE((std::sscanf(share, "%d/%d", &mine, &sharers) == 2 && sharers > 0));
    if (count++ % sharers != mine) return;
    const unsigned cores = std::thread::hardware_concurrency(); // plain kernels take most of the time
    Env plain(static_cast<int32_t>(std::clamp(cores, 4u, 16u)), BNB_CPU_FAST), env(2);
    Net reference(plain);
    std::vector<bnb_tensor *> expected = build(reference);
    auto nodes = [](std::vector<bnb_tensor *> list) {
        list.erase(std::remove_if(list.begin(), list.end(), [](const bnb_tensor *t) { return t->op == BNB_OP_NONE; }), list.end());
        return list;
    };
    reference.prepare(nodes(expected));
    reference.again();
    for (Device &d : devices(env))
        for (int32_t compute : {BNB_F32, BNB_F16}) {
            if (compute == BNB_F32 ? half_only : !d.backend) continue;
            Net net(env, d.backend.get());
            net.params.compute_dtype = compute;
            std::vector<bnb_tensor *> outputs = build(net);
            net.prepare(nodes(outputs));
            for (int run = 0; run < 2; run++) { // a plan can be run again: the second time a GPU replays its graph
                net.again();
                for (size_t i = 0; i < outputs.size(); i++) {
                    double error = relative_error(net.read(outputs[i]), widen(reference.read(expected[i])));
                    CHECK_MESSAGE(error <= (compute == BNB_F16 ? f16 : f32), what, " on ", d.name, " in ", type_name(compute), ", output ", i,
                                  ", run ", run, ": error ", error, "\n", net.describe());
                }
            }
        }
}

int32_t pick_type(Rng &rng) { return rng.pick(WEIGHT_TYPES); }

} // namespace

TEST_SUITE("backend") {
    TEST_CASE("backend: linear, every type on many shapes") {
        for (uint64_t seed = 0; seed < 120; seed++) {
            auto build = [&](Net &net) {
                Rng rng(seed);
                const int32_t type = WEIGHT_TYPES[seed % WEIGHT_TYPES.size()];
                const int64_t shapes[][3] = {{1, 64, 128}, {1, 48, 320}, {1, 33, 100}, {5, 130, 64}, {16, 64, 192}, {33, 17, 128}, {70, 96, 256}, {130, 40, 64}};
                const int64_t *s = shapes[seed / WEIGHT_TYPES.size() % 8], M = s[0], N = s[1], K = s[2];
                bnb_quant q = bnb_quant_default(type);
                q.blocksize = rng.pick(std::vector<int32_t>{32, 64, 128, 256});
                q.double_quant = rng.chance(0.3);
                q.threshold = rng.chance(0.8) ? 2.0f : 0.0f;
                q.outlier_rule = rng.chance(0.3) ? BNB_OUTLIER_ROW : BNB_OUTLIER_COLUMN;
                bnb_tensor *x = net.input({M, K}, rng.normals(M * K));
                bnb_tensor *w = net.weight(type, {N, K}, rng.normals(N * K, 0.1), &q);
                bnb_tensor *bias = rng.chance(0.5) ? net.weight(BNB_F16, {N}, rng.normals(N, 0.1), nullptr, "bias") : nullptr;
                bnb_tensor *y = bnb_linear(net.ctx, x, w, bias);
                switch (rng.range(0, 5)) { // what may be fused behind it
                case 0: y = bnb_relu(net.ctx, y); break;
                case 1: y = bnb_gelu(net.ctx, y); break;
                case 2: y = bnb_add(net.ctx, net.input({M, N}, rng.normals(M * N), "r"), bnb_gelu_tanh(net.ctx, y)); break;
                case 3: y = bnb_add(net.ctx, y, net.input({M, N}, rng.normals(M * N), "r")); break;
                default: break;
                }
                return std::vector<bnb_tensor *>{y->op == BNB_OP_LINEAR ? bnb_scale(net.ctx, y, 1) : y};
            };
            compare(build, 2e-5, 2e-3, "linear " + std::to_string(seed));
        }
    }

    TEST_CASE("backend: large products") { // the shapes for which GPUs have kernels of their own
        for (uint64_t seed = 0; seed < 24; seed++) {
            auto build = [&](Net &net) {
                Rng rng(seed);
                const int32_t type = std::vector<int32_t>{BNB_NF4, BNB_INT8, BNB_FP4, BNB_F16}[seed % 4];
                const int64_t Ms[] = {1, 3, 16, 64, 100, 257}, M = Ms[seed / 4], N = rng.range(1, 5) * 100;
                const int64_t K = (M == 16 ? rng.range(17, 24) : rng.range(2, 9)) * 64; // long ones go around rings of copies
                bnb_quant q = bnb_quant_default(type);
                q.double_quant = seed % 3 == 0;
                q.threshold = 3.0f;
                bnb_tensor *x = net.input({M, K}, rng.normals(M * K)), *r = net.input({M, N}, rng.normals(M * N), "r");
                bnb_tensor *norm = bnb_layer_norm(net.ctx, x, net.weight(BNB_F32, {K}, rng.normals(K)), net.weight(BNB_F32, {K}, rng.normals(K)), 1e-5f);
                auto linear = [&](bnb_tensor *in) {
                    return bnb_linear(net.ctx, in, net.weight(type, {N, K}, rng.normals(N * K, 0.1), &q), net.weight(BNB_F16, {N}, rng.normals(N)));
                };
                bnb_tensor *a = linear(norm), *b = linear(norm), *c = linear(norm); // run together
                return std::vector<bnb_tensor *>{bnb_add(net.ctx, r, bnb_mul(net.ctx, a, b)), bnb_scale(net.ctx, c, 2), bnb_add(net.ctx, r, bnb_relu(net.ctx, linear(x)))};
            };
            compare(build, 3e-5, 4e-3, "products " + std::to_string(seed));
        }
    }

    // Shapes {M, N, K, where y goes} that choose a GPU's kernels of each width, for one tile and for many, with K divided and not, y
    // in f16 and in f32; the larger ones what only these choose, as K divided for the last tiles alone. They follow from the
    // estimated times of plan_wgmma and linear8_large: where those are fitted anew, shapes have to be as well.
    enum { TO_ROWS, IN_PLACE, TO_PRODUCT, WAYS }; // added to rows elsewhere, to its own, or f16 that is multiplied
    const std::vector<Shape> tiles = {{12, 208, 448, IN_PLACE}, {12, 208, 1344, TO_ROWS}, {12, 208, 2112, TO_PRODUCT},
                                      {12, 208, 3776, TO_ROWS}, {12, 208, 5120, TO_ROWS}, {12, 1552, 2112, IN_PLACE},
                                      {12, 4304, 3776, TO_PRODUCT}, {12, 4304, 3776, TO_ROWS}, {12, 8688, 1344, IN_PLACE},
                                      {20, 784, 1344, TO_PRODUCT}, {20, 1552, 2112, TO_PRODUCT}, {20, 4304, 2112, TO_ROWS},
                                      {40, 1552, 3776, TO_ROWS}, {40, 3088, 3776, TO_ROWS}, {40, 4304, 128, IN_PLACE},
                                      {40, 4304, 128, TO_PRODUCT}, {40, 4304, 128, TO_ROWS}, {50, 208, 2112, IN_PLACE},
                                      {50, 208, 3776, TO_PRODUCT}, {50, 208, 3776, TO_ROWS}, {50, 784, 2112, TO_PRODUCT},
                                      {50, 1040, 704, TO_ROWS}, {77, 208, 128, TO_PRODUCT}, {77, 4304, 1344, IN_PLACE},
                                      {100, 208, 3776, TO_ROWS}, {100, 4304, 192, IN_PLACE}, {100, 4304, 192, TO_ROWS},
                                      {100, 4304, 1344, TO_PRODUCT}, {100, 8688, 128, TO_PRODUCT}, {100, 8688, 128, TO_ROWS},
                                      {130, 1040, 192, TO_PRODUCT}, {130, 8688, 320, IN_PLACE}, {130, 8688, 320, TO_ROWS},
                                      {200, 4304, 2112, IN_PLACE}, {200, 8688, 128, TO_ROWS}, {200, 8688, 320, IN_PLACE},
                                      {230, 208, 128, TO_PRODUCT}, {230, 304, 2112, TO_PRODUCT}, {230, 304, 5120, TO_ROWS},
                                      {230, 8688, 192, TO_PRODUCT}, {230, 8688, 704, IN_PLACE}, {300, 208, 128, IN_PLACE},
                                      {300, 208, 128, TO_ROWS}, {350, 8688, 128, IN_PLACE}, {500, 3088, 3776, TO_PRODUCT},
                                      {500, 4304, 192, IN_PLACE}, {500, 4304, 320, IN_PLACE}, {600, 784, 448, IN_PLACE},
                                      {1000, 2096, 128, IN_PLACE}, {1000, 2096, 128, TO_PRODUCT}, {1000, 2096, 128, TO_ROWS},
                                      {77, 6163, 1344, IN_PLACE}, {77, 8699, 128, TO_PRODUCT}, {100, 4307, 320, IN_PLACE},
                                      {100, 4307, 704, TO_ROWS}, {130, 1043, 2112, TO_ROWS}, {300, 8699, 128, IN_PLACE}};
    const std::vector<Shape> larger_tiles = {{12, 8688, 5120, IN_PLACE}, {12, 8688, 5120, TO_ROWS},
                                             {20, 8688, 5120, TO_PRODUCT}, {40, 3088, 5120, TO_PRODUCT},
                                             {40, 4304, 3776, TO_ROWS}, {40, 6160, 5120, TO_PRODUCT},
                                             {40, 8688, 5120, TO_PRODUCT}, {77, 3088, 2112, TO_ROWS}, {77, 3088, 5120, TO_ROWS},
                                             {77, 6160, 1344, TO_PRODUCT}, {100, 2576, 2112, TO_PRODUCT},
                                             {100, 3088, 3776, TO_ROWS}, {100, 4304, 1344, TO_PRODUCT},
                                             {100, 4304, 2112, TO_ROWS}, {100, 8688, 2112, TO_ROWS},
                                             {130, 1296, 5120, IN_PLACE}, {130, 2096, 2112, TO_PRODUCT},
                                             {130, 3088, 2112, IN_PLACE}, {130, 6160, 1344, TO_ROWS},
                                             {130, 8688, 1344, TO_PRODUCT}, {170, 3088, 5120, TO_ROWS},
                                             {170, 4304, 5120, IN_PLACE}, {200, 2576, 3776, TO_PRODUCT},
                                             {200, 3088, 2112, TO_ROWS}, {200, 3088, 3776, TO_PRODUCT},
                                             {200, 4304, 5120, TO_ROWS}, {200, 6160, 1344, TO_PRODUCT},
                                             {230, 8688, 3776, IN_PLACE}, {230, 8688, 3776, TO_ROWS},
                                             {230, 8688, 4416, TO_ROWS}, {300, 8688, 2880, TO_PRODUCT},
                                             {400, 2576, 1344, TO_PRODUCT}, {450, 528, 3776, IN_PLACE},
                                             {450, 1040, 1344, TO_ROWS}, {450, 8688, 128, TO_PRODUCT},
                                             {450, 8688, 320, TO_ROWS}, {450, 11280, 2880, TO_ROWS},
                                             {500, 3088, 3776, TO_PRODUCT}, {500, 3088, 5120, TO_ROWS},
                                             {500, 8688, 320, TO_ROWS}, {700, 8688, 192, TO_PRODUCT},
                                             {700, 8688, 1344, IN_PLACE}, {900, 8688, 704, TO_ROWS},
                                             {1000, 8688, 1344, IN_PLACE}, {1248, 6160, 448, TO_PRODUCT},
                                             {100, 4307, 2112, TO_PRODUCT}, {130, 2099, 3776, TO_ROWS},
                                             {200, 2579, 3776, TO_PRODUCT}, {230, 8699, 704, TO_ROWS},
                                             {400, 2579, 2112, IN_PLACE}, {500, 3089, 3776, TO_PRODUCT}};

    void many_tiles(int32_t type, const std::vector<Shape> &shapes) {
        const bool cuda = has_cuda(); // others have no such choice, and emulation no time: some of the shapes, narrow
        for (size_t i = 0; i < shapes.size(); i += cuda ? 1 : 7) {
            const Shape &s = shapes[i];
            auto build = [&](Net &net) {
                Rng rng(i);
                const int64_t M = s[0], N = cuda ? s[1] : 20, K = s[2];
                bnb_quant q = bnb_quant_default(type);
                q.threshold = i % 2 ? 4.0f : 4.2f; // many columns with outliers, and few
                auto many = [&](int64_t n, double scale) { // again and again from a prime number of them: normals take their time
                    const Floats some = rng.normals(65521, scale);
                    Floats all(static_cast<size_t>(n));
                    for (size_t k = 0; k < all.size(); k++) all[k] = some[k % some.size()];
                    return all;
                };
                bnb_tensor *x = net.input({M, K}, many(M * K, 1)), *r = net.input({M, N}, many(M * N, 1), "r");
                bnb_tensor *y = bnb_linear(net.ctx, x, net.weight(type, {N, K}, many(N * K, 0.1), &q), net.weight(BNB_F16, {N}, rng.normals(N)));
                const int64_t way = (s[3] + (type == BNB_INT8)) % WAYS;
                if (way == IN_PLACE) return std::vector<bnb_tensor *>{bnb_add(net.ctx, bnb_scale(net.ctx, r, 2), y)};
                y = i % 2 ? bnb_relu(net.ctx, y) : i % 4 ? bnb_silu(net.ctx, y) : bnb_gelu_tanh(net.ctx, y);
                if (way == TO_ROWS) return std::vector<bnb_tensor *>{bnb_add(net.ctx, r, y)};
                return std::vector<bnb_tensor *>{bnb_linear(net.ctx, y, net.weight(BNB_F16, {24, N}, many(24 * N, 0.1)), nullptr)};
            };
            compare(build, 3e-5, 4e-3, type_name(type) + std::string(" ") + std::to_string(s[0]) + " rows", cuda);
        }
    }

    void three_together(int32_t type) { // one x, three weights, none a whole number of tiles
        const bool cuda = has_cuda();
        auto build = [&](Net &net) {
            Rng rng(3);
            const int64_t M = 700, N = cuda ? 1456 : 20, K = 448;
            bnb_quant q = bnb_quant_default(type);
            q.threshold = 3.0f;
            bnb_tensor *x = net.input({M, K}, rng.normals(M * K)), *y[3];
            for (bnb_tensor *&part : y)
                part = bnb_linear(net.ctx, x, net.weight(type, {N, K}, rng.normals(N * K, 0.1), &q), net.weight(BNB_F16, {N}, rng.normals(N)));
            return std::vector<bnb_tensor *>{bnb_mul(net.ctx, y[0], y[1]), bnb_scale(net.ctx, y[2], 2)};
        };
        compare(build, 3e-5, 4e-3, type_name(type) + std::string(" three together"), cuda);
    }

    TEST_CASE("backend: products of many tiles (4-bit), large") { many_tiles(BNB_NF4, tiles), three_together(BNB_NF4); }
    TEST_CASE("backend: products of many tiles (int8), large") { many_tiles(BNB_INT8, tiles), three_together(BNB_INT8); }
    TEST_CASE("backend: products of many rows (4-bit), large") { many_tiles(BNB_NF4, larger_tiles); }
    TEST_CASE("backend: products of many rows (int8), large") { many_tiles(BNB_INT8, larger_tiles); }

    // Up to some width, kernels for them compute the norm in front, and quantize x.
    void few_rows(int32_t type, const std::vector<int64_t> &widths) {
        const bool cuda = has_cuda();
        for (const int64_t M : {1, 2, 3, 5, 8, 9, 16})
            for (const int64_t K : widths)
                for (const int norm : {0, 1, 2}) {
                    if (K > 4160 && (norm || M > 3)) continue;
                    auto build = [&](Net &net) {
                        Rng rng(static_cast<uint64_t>(M * K + norm));
                        const int64_t N = rng.range(1, 40);
                        bnb_quant q = bnb_quant_default(type);
                        q.threshold = rng.chance(0.2) ? 0.0f : 6.0f;
                        q.outlier_rule = rng.chance(0.3) ? BNB_OUTLIER_ROW : BNB_OUTLIER_COLUMN;
                        std::vector<float> x = rng.normals(M * K, 0.8);
                        for (int64_t c = rng.range(0, 8); c > 0; c--) { // columns with outliers from some row on
                            const int64_t k = rng.range(0, K - 1);
                            for (int64_t m = rng.range(0, M - 1); m < M; m++) x[m * K + k] = static_cast<float>(rng.range(7, 30));
                        }
                        bnb_tensor *in = net.input({M, K}, x), *w = norm ? net.weight(BNB_F32, {K}, rng.normals(K)) : nullptr;
                        if (norm == 1) in = bnb_layer_norm(net.ctx, in, w, net.weight(BNB_F32, {K}, rng.normals(K)), 1e-5f);
                        if (norm == 2) in = bnb_rms_norm(net.ctx, in, w, 1e-5f);
                        auto linear = [&] { return bnb_linear(net.ctx, in, net.weight(type, {N, K}, rng.normals(N * K, 0.1), &q), nullptr); };
                        bnb_tensor *a = linear(), *b = linear(); // together
                        return std::vector<bnb_tensor *>{bnb_scale(net.ctx, a, 2), bnb_scale(net.ctx, b, 3)};
                    };
                    compare(build, 3e-5, 4e-3, std::to_string(M) + "," + std::to_string(K) + " " + type_name(type) + ", norm " + std::to_string(norm), cuda);
                }
    }
    TEST_CASE("backend: int8 products of few rows") {
        few_rows(BNB_INT8, has_cuda() ? std::vector<int64_t>{16, 496, 1600, 2064, 4112, 8208, 16400} : std::vector<int64_t>{16, 272});
    }
    TEST_CASE("backend: 4-bit products of few rows") {
        few_rows(BNB_NF4, has_cuda() ? std::vector<int64_t>{64, 768, 1024, 1088, 1600, 2048, 2112, 4096, 4160} : std::vector<int64_t>{64, 320});
    }

    TEST_CASE("backend: products of columns, and of their norms") { // which do not begin where kernels could read 16 bytes
        for (const int32_t type : {BNB_NF4, BNB_INT8, BNB_F16})
            for (const int64_t M : {1, 3, 20})
                for (const int64_t first : {0, 1, 4, 8})
                    for (const bool norm : {false, true}) {
                        auto build = [&](Net &net) {
                            Rng rng(static_cast<uint64_t>(M + first));
                            const int64_t N = 40, K = 128;
                            bnb_quant q = bnb_quant_default(type);
                            q.threshold = 3.0f;
                            bnb_tensor *x = bnb_scale(net.ctx, net.input({M, K + 12}, rng.normals(M * (K + 12))), 2);
                            bnb_tensor *in = bnb_columns(net.ctx, x, first, K);
                            if (norm) in = bnb_layer_norm(net.ctx, in, net.weight(BNB_F32, {K}, rng.normals(K)), net.weight(BNB_F32, {K}, rng.normals(K)), 1e-5f);
                            return std::vector<bnb_tensor *>{bnb_scale(net.ctx, bnb_linear(net.ctx, in, net.weight(type, {N, K}, rng.normals(N * K, 0.1), &q), nullptr), 3)};
                        };
                        compare(build, 3e-5, 4e-3, type_name(type) + std::string(" columns from ") + std::to_string(first) + (norm ? ", norm" : ""));
                    }
    }

    TEST_CASE("backend: outlier columns of many rows") { // few or many, the same in all rows and some more in single ones
        const bool cuda = has_cuda(); // emulation has no time for the large ones
        for (const int64_t M : cuda ? std::vector<int64_t>{20, 130, 300, 700, 1300} : std::vector<int64_t>{20, 130})
            for (const int64_t K : {320, 2112})
                for (const int64_t columns : {0, 3, 8, 9, 16, 17, 40})
                    for (const bool single : {false, true}) {
                        auto build = [&](Net &net) {
                            Rng rng(static_cast<uint64_t>(M + K + columns));
                            const int64_t N = cuda ? 144 : 8;
                            bnb_quant q = bnb_quant_default(BNB_INT8);
                            std::vector<float> x = rng.normals(M * K, 0.5);
                            for (int64_t m = 0; m < M; m++)
                                for (int64_t c = 0; c < columns; c++)
                                    if (rng.chance(0.7)) x[m * K + c * K / columns + 1] = static_cast<float>(rng.range(7, 30));
                            for (int64_t m = 0; single && m < M; m += M / 5) x[m * K + rng.range(0, K - 1)] = -8;
                            return std::vector<bnb_tensor *>{
                                bnb_linear(net.ctx, net.input({M, K}, x), net.weight(BNB_INT8, {N, K}, rng.normals(N * K, 0.1), &q), nullptr)};
                        };
                        compare(build, 2e-5, 2e-3, std::to_string(M) + "," + std::to_string(K) + " " + std::to_string(columns) + " outlier columns", cuda);
                    }
    }

    TEST_CASE("backend: outliers in columns whose numbers have more than 16 bits") {
        for (const int64_t M : {1, 20}) {
            auto build = [&](Net &net) {
                Rng rng(M);
                const int64_t N = 16, K = 65536 + 128;
                bnb_quant q = bnb_quant_default(BNB_INT8);
                std::vector<float> x = rng.normals(M * K, 0.5);
                for (int64_t m = 0; m < M; m += 3)
                    for (const int64_t k : {int64_t(7), int64_t(65533), int64_t(65534), int64_t(65535), K - 1}) x[m * K + k] = 9.0f + m;
                return std::vector<bnb_tensor *>{bnb_linear(net.ctx, net.input({M, K}, x), net.weight(BNB_INT8, {N, K}, rng.normals(N * K, 0.1), &q), nullptr)};
            };
            compare(build, 2e-5, 2e-3, "wide " + std::to_string(M));
        }
    }

    TEST_CASE("backend: attention, many spans and heads") {
        for (uint64_t seed = 0; seed < 60; seed++) {
            auto build = [&](Net &net) {
                Rng rng(seed);
                const int64_t Ds[] = {64, 128, 16, 80, 96, 40, 256, 21}, D = Ds[seed / 3 % 8], kv = rng.range(1, 3), heads = kv * rng.range(1, 3);
                const int64_t T = seed % 3 == 0 ? 1 : rng.range(2, 90), R = rng.range(1, 400);
                std::vector<int32_t> span;
                for (int64_t t = 0; t < T; t++) {
                    int32_t a = static_cast<int32_t>(rng.chance(0.6) ? 0 : rng.range(0, R)), b = static_cast<int32_t>(rng.range(a, R));
                    span.insert(span.end(), {a, b});
                }
                const int32_t type = std::vector<int32_t>{BNB_F16, BNB_F32, BNB_INT8_KV, BNB_INT8_KV}[seed % 4];
                const bnb_quant q = blocks_of(D);
                bnb_tensor *k = net.weight(type, {R, kv * D}, rng.normals(R * kv * D), &q), *v = net.weight(type, {R, kv * D}, rng.normals(R * kv * D), &q);
                return std::vector<bnb_tensor *>{bnb_attention(net.ctx, net.input({T, heads * D}, rng.normals(T * heads * D)), k, v, net.ids({T, 2}, span),
                                                               static_cast<int32_t>(heads), static_cast<int32_t>(kv), 1 / std::sqrt(static_cast<float>(D)))};
            };
            compare(build, 1e-5, 2e-3, "attention " + std::to_string(seed));
        }
    }

    TEST_CASE("backend: rows go to caches, and are read from there") {
        for (uint64_t seed = 0; seed < 60; seed++) {
            auto build = [&](Net &net) {
                Rng rng(seed);
                const int64_t Ds[] = {64, 128, 80, 256, 21, 8}, D = Ds[seed / 2 % 6], kv = rng.range(1, 3), heads = kv * rng.range(1, 4), C = kv * D;
                const int64_t Ts[] = {1, rng.range(2, 40), rng.range(2, 16), 16}; // up to 16 rows are written by a GPU's attention itself
                const int64_t T = Ts[seed % 4], R = T + rng.range(0, 300), scattered = rng.chance(0.4), queries = rng.chance(0.8) ? T : rng.range(1, T + 3);
                const int32_t type = seed % 3 == 2 ? BNB_F16 : BNB_INT8_KV;
                const bnb_quant q = blocks_of(D);
                std::vector<int32_t> rows, span, all;
                for (int64_t r = 0; r < R; r++) all.push_back(static_cast<int32_t>(r));
                for (int64_t r = 0; scattered && r < R; r++) std::swap(all[static_cast<size_t>(r)], all[static_cast<size_t>(rng.range(r, R - 1))]);
                const int64_t first = rng.range(0, R - T);
                for (int64_t t = 0; t < T; t++) rows.push_back(all[static_cast<size_t>(first + t)]);
                for (int64_t t = 0; t < queries; t++) {
                    const int32_t end = static_cast<int32_t>(t < T && rng.chance(0.9) ? rows[static_cast<size_t>(t)] + 1 : rng.range(0, R));
                    span.insert(span.end(), {rng.chance(0.7) ? 0 : static_cast<int32_t>(rng.range(0, end)), end});
                }
                bnb_tensor *list = net.ids({T}, rows, "rows"), *caches[2], *written[2];
                for (int i = 0; i < 2; i++) { // few digits: f16 has them, so that all devices code the same numbers
                    Floats x;
                    for (int64_t e = 0; e < T * C; e++) x.push_back(static_cast<float>(static_cast<double>(rng.range(-200, 200)) / 64));
                    caches[i] = net.weight(type, {R, C}, rng.normals(R * C), &q, i ? "v" : "k");
                    written[i] = bnb_set_rows(net.ctx, caches[i], bnb_scale(net.ctx, net.input({T, C}, x), 0.5f), list);
                }
                bnb_tensor *y = bnb_attention(net.ctx, net.input({queries, heads * D}, rng.normals(queries * heads * D)), written[0], written[1], net.ids({queries, 2}, span, "span"),
                                              static_cast<int32_t>(heads), static_cast<int32_t>(kv), 1 / std::sqrt(static_cast<float>(D)));
                return std::vector<bnb_tensor *>{y, caches[0], caches[1]};
            };
            compare(build, 1e-5, 2e-3, "cache " + std::to_string(seed));
        }
    }

    TEST_CASE("backend: blocks of every weight type") {
        for (int32_t type : WEIGHT_TYPES)
            for (int64_t T : {1, 2, 9, 40})
                compare([&](Net &net) { return build_block(net, type, T).outputs; }, type == BNB_INT8 ? 2e-2 : 1e-4, 2e-2, "block of " + type_name(type));
        for (int64_t T : {1, 5, 40})
            compare([&](Net &net) { return build_block(net, BNB_NF4, T, 3, BNB_INT8_KV).outputs; }, 1e-3, 2e-2, "block with an int8 cache");
    }

    TEST_CASE("backend: random graphs") {
        for (uint64_t seed = 0; seed < 60; seed++)
            compare([&](Net &net) { Rng rng(seed); return random_graph(net, rng); }, 1e-2, 0.3, // softmax and norms of nearly equal numbers amplify what is rounded
                    "graph " + std::to_string(seed));
    }

    TEST_CASE("backend: weights come back as they were") {
        Env env(2);
        for (Device &d : devices(env)) {
            if (!d.backend) continue;
            for (uint64_t seed = 0; seed < 60; seed++) {
                Rng rng(seed);
                bnb_error err = {};
                const int32_t type = pick_type(rng);
                bnb_quant q = bnb_quant_default(type);
                q.blocksize = rng.pick(std::vector<int32_t>{32, 64, 128, 4096});
                q.double_quant = rng.chance(0.5);
                Shape shape = {rng.range(1, 70), rng.chance(0.5) ? rng.range(1, 9) * 64 : rng.range(1, 300)};
                if (rng.chance(0.2) && type != BNB_INT8) shape = {rng.range(1, 300)};
                Net net(env);
                bnb_tensor *source = net.weight(type, shape, rng.normals(count(shape)), &q, "source"), *back = net.weight(type, shape, rng.normals(count(shape)), &q, "back");
                net.prepare({bnb_relu(net.ctx, net.input({1, 1}, {0}))}); // gives them memory and values
                Ctx on_device(bnb_ctx_create(env, &err));
                bnb_tensor *t = bnb_tensor_place(on_device.get(), d.backend.get(), source, seed % 2 ? int32_t{BNB_F32} : int32_t{BNB_COMPUTE_AUTO});
                REQUIRE(t);
                CHECK(bnb_tensor_state(t) == BNB_PLACED);
                bnb_status status = bnb_tensor_upload(t, source, &err);
                REQUIRE_MESSAGE(status == BNB_OK, text(err));
                status = bnb_tensor_download(t, back, &err);
                REQUIRE_MESSAGE(status == BNB_OK, text(err));
                for (int32_t p = 0; p < BNB_MAX_PLANES; p++) {
                    uint64_t bytes = bnb_plane_bytes(type, &q, static_cast<int32_t>(shape.size()), shape.data(), p);
                    if (bytes) CHECK_MESSAGE(std::memcmp(bnb_tensor_plane(source, p), bnb_tensor_plane(back, p), bytes) == 0, type_name(type), " plane ", p, " seed ", seed);
                }
            }
        }
    }

    TEST_CASE("backend: argmax takes the first of equals, and says when there is a NaN") {
        const float NaN = std::nanf(""), INF = INFINITY;
        Env env(2);
        for (Device &d : devices(env)) {
            Net net(env, d.backend.get());
            bnb_tensor *y = bnb_argmax(net.ctx, net.input({6, 4}, {1, 3, 3, 2, /**/ -1, -2, -3, -4, /**/ -0.0f, 0, -1, 0, /**/ 0, NaN, 5, 1, /**/ -INF, -INF, -INF, -INF, /**/ 1, INF, 2, INF}));
            net.prepare({y});
            net.again();
            std::vector<int32_t> got(6);
            bnb_error err = {};
            REQUIRE(bnb_tensor_read(y, 0, got.data(), 24, &err) == BNB_OK);
            CHECK(got == std::vector<int32_t>{1, 0, 0, -1, 0, 1});
            Rng rng(5);
            const int64_t n = 50257;
            Floats v = rng.normals(2 * n);
            Net large(env, d.backend.get());
            bnb_tensor *z = bnb_argmax(large.ctx, large.input({2, n}, v));
            large.prepare({z});
            large.again();
            REQUIRE(bnb_tensor_read(z, 0, got.data(), 8, &err) == BNB_OK);
            for (int64_t t = 0; t < 2; t++) CHECK(got[static_cast<size_t>(t)] == std::max_element(v.begin() + t * n, v.begin() + (t + 1) * n) - (v.begin() + t * n));
        }
    }

    TEST_CASE("backend: draws are the same on every device") {
        Env env(2);
        for (uint64_t seed = 0; seed < 40; seed++) {
            Rng rng(seed);
            const int64_t T = rng.range(1, 5), C = seed % 4 ? rng.range(1, 3000) : 50257;
            Floats v = rng.normals(T * C, 2);
            if (seed % 3 == 0)
                for (float &x : v) x = std::round(x); // many equals
            if (seed % 7 == 0) v[static_cast<size_t>(rng.range(0, T * C - 1))] = std::nanf("");
            if (seed % 11 == 0) v[static_cast<size_t>(rng.range(0, T * C - 1))] = -INFINITY;
            bnb_draw_rule rule = {rng.chance(0.2) ? 0.0f : 0.8f, rng.chance(0.5) ? 1.0f : 0.9f, rng.chance(0.5) ? 0.0f : 0.1f, static_cast<int32_t>(rng.range(1, 256)), rng.next()};
            std::vector<int32_t> steps, expected;
            std::vector<int64_t> scratch(256);
            for (int64_t t = 0; t < T; t++) {
                steps.push_back(static_cast<int32_t>(rng.range(0, 2000)));
                expected.push_back(bnb_draw_row(v.data() + t * C, C, &rule, steps.back(), scratch.data()));
            }
            for (Device &d : devices(env)) {
                Net net(env, d.backend.get());
                bnb_tensor *y = bnb_draw(net.ctx, net.input({T, C}, v), net.ids({T}, steps, "steps"), &rule);
                net.prepare({y});
                for (int run = 0; run < 2; run++) {
                    std::vector<int32_t> got(static_cast<size_t>(T));
                    bnb_error err = {};
                    net.again();
                    REQUIRE(bnb_tensor_read(y, 0, got.data(), got.size() * 4, &err) == BNB_OK);
                    CHECK_MESSAGE(got == expected, d.name, " seed ", seed);
                }
            }
        }
    }

    TEST_CASE("backend: a plan feeds itself") {
        Env env(2);
        for (Device &d : devices(env)) { // a chain of lookups: each id picks the row whose largest entry is the next id
            Net net(env, d.backend.get());
            bnb_error err = {};
            Floats table(25, 0);
            const int after[] = {3, 0, 4, 2, 1};
            for (size_t i = 0; i < 5; i++) table[5 * i + static_cast<size_t>(after[i])] = 1;
            bnb_tensor *ids = net.ids({2}, {0, 2}), *count = net.ids({2}, {10, 20}, "count"), *y = bnb_argmax(net.ctx, bnb_embed(net.ctx, net.weight(BNB_F32, {5, 5}, table), ids));
            bnb_tensor *counted = bnb_embed(net.ctx, net.weight(BNB_F32, {40, 1}, Floats(40, 1)), count); // makes count a part of the graph
            net.params.n_feeds = 2;
            net.params.feeds[0] = {y, ids, {0, 0}};
            net.params.feeds[1] = {count, count, {1, 2}};
            net.prepare({y, counted});
            int32_t id[2] = {0, 2}, got[2];
            for (int run = 0; run < 6; run++) { // the host follows one run behind
                REQUIRE(bnb_plan_run(net.plan, &err) == BNB_OK);
                REQUIRE(bnb_tensor_fetch_begin(y, run % 2, &err) == BNB_OK);
                if (run == 0) continue;
                for (int32_t &i : id) i = after[i];
                REQUIRE(bnb_tensor_fetch_end(y, (run - 1) % 2, got, &err) == BNB_OK);
                CHECK(std::vector<int32_t>(got, got + 2) == std::vector<int32_t>(id, id + 2));
            }
            REQUIRE(bnb_tensor_read(count, 0, got, 8, &err) == BNB_OK);
            CHECK(got[0] == 16);
            CHECK(got[1] == 32);
            CHECK(bnb_tensor_fetch_begin(y, BNB_FETCH_SLOTS, &err) == BNB_E_ARG);
            CHECK_MESSAGE(is_sentence(err), text(err));
        }
    }

    TEST_CASE("backend: feeds that fit nothing are refused") {
        Env env(1);
        Net net(env);
        bnb_error err = {};
        bnb_tensor *ids = net.ids({2}, {0, 1}), *more = net.ids({3}, {0, 1, 0}, "more"), *x = net.input({2, 2}, {1, 2, 3, 4});
        bnb_tensor *y = bnb_argmax(net.ctx, bnb_add(net.ctx, x, bnb_embed(net.ctx, x, ids))), *z = bnb_embed(net.ctx, x, more);
        bnb_tensor *outputs[] = {y, z}, *stranger = net.ids({2}, {0, 0}, "stranger");
        bnb_graph *g = bnb_graph_create(net.ctx, outputs, 2, &err);
        REQUIRE(g);
        for (bnb_feed feed : {bnb_feed{y, more, {0, 0}}, {more, ids, {0, 0}}, {y, x, {0, 0}}, {x, ids, {0, 0}}, {y, stranger, {0, 0}}, {stranger, ids, {0, 0}}, {ids, y, {0, 0}}, {nullptr, ids, {0, 0}}, {y, nullptr, {0, 0}}}) {
            bnb_plan_params p;
            bnb_plan_params_default(&p, sizeof p);
            p.n_feeds = 1;
            p.feeds[0] = feed;
            CHECK(!bnb_plan_create(env.cpu(), g, &p, &err));
            CHECK(err.code == BNB_E_ARG);
        }
    }

    TEST_CASE("backend: a checkpoint that is quantized while it is loaded") { // by the CPU, or by the device that it goes to
        Env env(2);
        for (int32_t type : {BNB_NF4, BNB_INT8}) {
            std::vector<Floats> all;
            for (Device &d : devices(env)) {
                bnb_error err = {};
                bnb_model_params p;
                bnb_model_params_default(&p, sizeof p);
                bnb_load_params l;
                bnb_load_params_default(&l, sizeof l);
                p.device = d.name.c_str();
                p.compute_dtype = BNB_F32;
                p.kv_type = BNB_F32;
                l.type = type;
                l.double_quant = 1;
                Model model(bnb_model_load(env, BNB_SOURCE_DIR "/models/demo", &l, &p, &err));
                REQUIRE_MESSAGE(model, text(err));
                Session session(bnb_session_create(model.get(), 16, &err));
                REQUIRE_MESSAGE(session, text(err));
                const int32_t tokens[] = {7, 300, 41};
                bnb_status status = bnb_session_sync(session.get(), tokens, 3, &err);
                REQUIRE_MESSAGE(status == BNB_OK, text(err));
                int64_t n;
                const float *logits = bnb_session_logits(session.get(), &n);
                all.push_back(Floats(logits, logits + n));
                CHECK_MESSAGE(relative_error(all.back(), widen(all[0])) < (type == BNB_INT8 ? 2e-2 : 1e-4), type_name(type), " on ", d.name);
            }
        }
    }

    TEST_CASE("backend: sequences decoded together say what each says alone") {
        Env env(2);
        for (int32_t type : {BNB_F32, BNB_NF4}) {
            Image file = tiny_model(type);
            for (Device &d : devices(env)) {
                bnb_error err = {};
                bnb_model_params p;
                bnb_model_params_default(&p, sizeof p);
                p.device = d.name.c_str();
                p.compute_dtype = BNB_F32;
                p.kv_type = type == BNB_NF4 ? BNB_INT8_KV : BNB_F32;
                Model model(bnb_model_from_memory(env, file.bytes.data(), file.bytes.size(), &p, &err));
                REQUIRE_MESSAGE(model, text(err));
                const std::vector<std::vector<int32_t>> prompts = {{1, 2, 3}, {200}, {7, 7, 7, 7, 7, 7, 7}, {100, 3}};
                const int64_t n_predict = 12;
                Session together(bnb_session_create_batch(model.get(), 20, 4, &err)), alone(bnb_session_create(model.get(), 20, &err));
                REQUIRE_MESSAGE(together, text(err));
                REQUIRE_MESSAGE(alone, text(err));
                std::vector<const int32_t *> list;
                std::vector<int64_t> lengths;
                for (auto &prompt : prompts) {
                    list.push_back(prompt.data());
                    lengths.push_back(static_cast<int64_t>(prompt.size()));
                }
                std::vector<int32_t> out(4 * n_predict), one(n_predict);
                bnb_generate_result r;
                bnb_status status = bnb_generate_batch(together.get(), list.data(), lengths.data(), n_predict, out.data(), &r, &err);
                REQUIRE_MESSAGE(status == BNB_OK, text(err));
                CHECK(r.n_generated == 4 * n_predict);
                for (size_t i = 0; i < 4; i++) {
                    status = bnb_generate_batch(alone.get(), &list[i], &lengths[i], n_predict, one.data(), nullptr, &err);
                    REQUIRE_MESSAGE(status == BNB_OK, text(err));
                    CHECK(std::equal(one.begin(), one.end(), out.begin() + static_cast<std::ptrdiff_t>(i) * n_predict));
                    std::vector<int32_t> tokens = prompts[i]; // and what the host finds token by token
                    for (int64_t t = 0; t < n_predict; t++) {
                        REQUIRE(bnb_session_sync(alone.get(), tokens.data(), static_cast<int64_t>(tokens.size()), &err) == BNB_OK);
                        int64_t n;
                        const float *l = bnb_session_logits(alone.get(), &n);
                        tokens.push_back(static_cast<int32_t>(std::max_element(l, l + n) - l));
                        CHECK(tokens.back() == one[static_cast<size_t>(t)]);
                    }
                }
                CHECK(bnb_generate_batch(together.get(), list.data(), lengths.data(), 15, out.data(), &r, &err) == BNB_E_LIMIT);
            }
        }
    }

    TEST_CASE("backend: quantizing on the way to a device gives bnb_quantize's codes") {
        Env env(2);
        for (Device &d : devices(env)) {
            if (!d.backend) continue;
            for (uint64_t seed = 0; seed < 90; seed++) {
                Rng rng(seed);
                bnb_error err = {};
                const int32_t type = std::vector<int32_t>{BNB_NF4, BNB_FP4, BNB_INT8}[seed % 3], from = std::vector<int32_t>{BNB_F16, BNB_F32, BNB_BF16}[seed / 3 % 3];
                bnb_quant q = bnb_quant_default(type);
                q.blocksize = rng.pick(std::vector<int32_t>{32, 64, 256, 4096});
                q.double_quant = type != BNB_INT8 && rng.chance(0.5);
                const Shape shape = {rng.range(1, 60), rng.chance(0.5) ? rng.range(1, 9) * 64 : rng.range(1, 300)};
                Floats v = rng.normals(count(shape));
                if (rng.chance(0.3)) std::fill_n(v.begin(), std::min<int64_t>(count(shape), 200), 0.0f); // blocks and rows of zeros
                if (rng.chance(0.2)) v[static_cast<size_t>(rng.range(0, count(shape) - 1))] = std::nanf("");
                if (rng.chance(0.2)) v[static_cast<size_t>(rng.range(0, count(shape) - 1))] = INFINITY;
                if (rng.chance(0.2)) v[static_cast<size_t>(rng.range(0, count(shape) - 1))] = 1e-41f;
                Net net(env);
                bnb_tensor *source = net.weight(from, shape, v, nullptr, "source"), *want = net.weight(type, shape, v, &q, "want"), *got = net.weight(type, shape, Floats(v.size(), 1), &q, "got");
                net.prepare({bnb_relu(net.ctx, net.input({1, 1}, {0}))});
                REQUIRE(bnb_quantize(env, source, want, BNB_COMPAT_CUDA, &err) == BNB_OK);
                Ctx on_device(bnb_ctx_create(env, &err));
                bnb_tensor *t = bnb_tensor_place(on_device.get(), d.backend.get(), want, seed % 2 ? int32_t{BNB_F32} : int32_t{BNB_COMPUTE_AUTO});
                REQUIRE(t);
                bnb_status status = bnb_tensor_upload(t, source, &err);
                REQUIRE_MESSAGE(status == BNB_OK, text(err));
                status = bnb_tensor_download(t, got, &err);
                REQUIRE_MESSAGE(status == BNB_OK, text(err));
                CHECK(std::memcmp(&got->quant.nested_offset, &want->quant.nested_offset, 4) == 0);
                CHECK(got->quant.dtype == from);
                for (int32_t p = 0; p < BNB_MAX_PLANES; p++) {
                    uint64_t bytes = bnb_plane_bytes(type, &q, 2, shape.data(), p);
                    if (bytes) CHECK_MESSAGE(std::memcmp(bnb_tensor_plane(got, p), bnb_tensor_plane(want, p), bytes) == 0, type_name(type), " from ", type_name(from), " plane ", p, " seed ", seed);
                }
            }
        }
    }

    TEST_CASE("backend: an index outside its table is an error, and the next run is right") {
        Env env(1);
        for (Device &d : devices(env)) {
            Net net(env, d.backend.get());
            bnb_error err = {};
            bnb_tensor *ids = net.ids({2}, {1, 2}), *y = bnb_embed(net.ctx, net.weight(BNB_F32, {3, 4}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}), ids);
            net.prepare({y});
            for (int32_t bad : {3, -1, 1 << 30}) {
                float out[8];
                net.set(ids, std::vector<int32_t>{0, bad});
                bnb_status status = bnb_plan_run(net.plan, &err);
                if (!status) status = bnb_tensor_read(y, 0, out, sizeof out, &err);
                CHECK(status == BNB_E_ARG);
                CHECK_MESSAGE(is_sentence(err), text(err));
                net.set(ids, std::vector<int32_t>{2, 0});
                net.again();
                CHECK(net.read(y) == Floats{8, 9, 10, 11, 0, 1, 2, 3});
            }
        }
    }

    TEST_CASE("backend: more memory than there is") {
        Env env(1);
        for (Device &d : devices(env)) {
            if (!d.backend) continue;
            bnb_error err = {};
            Ctx ctx(bnb_ctx_create(env, &err));
            const int64_t shape[] = {1 << 20, 1 << 24}; // 64 TiB
            bnb_tensor_new(ctx.get(), BNB_F32, nullptr, 2, shape, "huge");
            CHECK(bnb_ctx_alloc(ctx.get(), d.backend.get(), &err) == BNB_E_NOMEM);
            CHECK_MESSAGE(contains(text(err), "70368744177664"), text(err));
            Net net(env, d.backend.get()); // the device still works
            CHECK(net.run(bnb_relu(net.ctx, net.input({1, 2}, {-1, 2}))) == Floats{0, 2});
        }
    }

    TEST_CASE("backend: a model says the same on every device") {
        Env env(2);
        for (int32_t type : {BNB_F32, BNB_F16, BNB_INT8, BNB_NF4}) {
            Image file = tiny_model(type);
            std::vector<Floats> all;
            for (Device &d : devices(env)) {
                bnb_error err = {};
                bnb_model_params p;
                bnb_model_params_default(&p, sizeof p);
                p.device = d.name.c_str();
                p.compute_dtype = BNB_F32;
                p.n_batch = 7;
                Model model(bnb_model_from_memory(env, file.bytes.data(), file.bytes.size(), &p, &err));
                REQUIRE_MESSAGE(model, text(err));
                Session session(bnb_session_create(model.get(), 0, &err));
                REQUIRE_MESSAGE(session, text(err));
                std::vector<int32_t> tokens = {5, 9, 200, 31, 77, 1, 2, 3, 100};
                Floats logits;
                for (int step = 0; step < 8; step++) { // greedy
                    bnb_status status = bnb_session_sync(session.get(), tokens.data(), static_cast<int64_t>(tokens.size()), &err);
                    REQUIRE_MESSAGE(status == BNB_OK, text(err));
                    int64_t n;
                    const float *l = bnb_session_logits(session.get(), &n);
                    logits.insert(logits.end(), l, l + n);
                    tokens.push_back(static_cast<int32_t>(std::max_element(l, l + n) - l));
                }
                all.push_back(logits);
                CHECK_MESSAGE(relative_error(all.back(), widen(all[0])) < 1e-3, type_name(type), " on ", d.name);
            }
        }
    }
}
