// graphs.h: whole graphs that more than one suite runs: a transformer block of any weight type, and random ones.
//
// Use:   net.prepare(build_block(net, BNB_NF4, 5).outputs);
// Not:   no expected results: suites compare two ways of computing them.
#pragma once

#include "util.h"

#include <algorithm>

namespace test {

inline const std::vector<int32_t> WEIGHT_TYPES = {BNB_F32, BNB_F16, BNB_BF16, BNB_INT8, BNB_NF4, BNB_FP4};

// A transformer block that uses every op. T tokens after `past` ones.
struct Block {
    std::vector<bnb_tensor *> outputs;
    bnb_tensor *ids, *x, *k_cache;
};

inline Block build_block(Net &net, int32_t type, int64_t T, int64_t past = 3, int32_t cache_type = BNB_F16) {
    const int64_t C = 64, F = 96, V = 50, R = past + T + 2;
    Rng rng(static_cast<uint64_t>(type + 1));
    bnb_ctx *c = net.ctx;
    auto linear = [&](bnb_tensor *x, int64_t out, int64_t in, const char *name) {
        bnb_quant q = bnb_quant_default(type);
        q.double_quant = out % 3 == 0;
        q.threshold = 2.5f; // outliers occur
        bnb_tensor *bias = net.weight(BNB_F16, {out}, rng.normals(out, 0.1), nullptr, "bias");
        return bnb_linear(c, x, net.weight(type, {out, in}, rng.normals(out * in, 0.1), &q, name), bias);
    };
    auto vec = [&](const char *name) { return net.weight(BNB_BF16, {C}, rng.normals(C), nullptr, name); };
    std::vector<int32_t> ids, rows, span;
    for (int64_t t = 0; t < T; t++) {
        ids.push_back(static_cast<int32_t>(rng.range(0, V - 1)));
        rows.push_back(static_cast<int32_t>(past + t));
        span.insert(span.end(), {0, static_cast<int32_t>(past + t + 1)});
    }
    Block b;
    b.ids = net.ids({T}, ids);
    bnb_tensor *row_list = net.ids({T}, rows, "rows"), *spans = net.ids({T, 2}, span, "span");
    const bnb_quant heads = blocks_of(C / 4);
    b.k_cache = net.weight(cache_type, {R, C}, rng.normals(R * C), &heads, "k_cache");
    bnb_tensor *v_cache = net.weight(cache_type, {R, C}, rng.normals(R * C), &heads, "v_cache");

    b.x = bnb_embed(c, net.weight(BNB_F16, {V, C}, rng.normals(V * C), nullptr, "table"), b.ids);
    bnb_tensor *qkv = linear(bnb_layer_norm(c, b.x, vec("ln.w"), vec("ln.b"), 1e-5f), 3 * C, C, "qkv");
    bnb_tensor *k = bnb_set_rows(c, b.k_cache, bnb_columns(c, qkv, C, C), row_list), *v = bnb_set_rows(c, v_cache, bnb_columns(c, qkv, 2 * C, C), row_list);
    bnb_tensor *o = bnb_attention(c, bnb_columns(c, qkv, 0, C), k, v, spans, 4, 4, 0.25f);
    bnb_tensor *x = bnb_add(c, b.x, linear(o, C, C, "o"));
    bnb_tensor *h = bnb_rms_norm(c, x, vec("rms.w"), 1e-5f);
    bnb_tensor *gate = bnb_silu(c, linear(h, F, C, "gate")), *up = bnb_gelu(c, linear(h, F, C, "up"));
    bnb_tensor *down = linear(bnb_mul(c, gate, bnb_relu(c, up)), C, F, "down");
    x = bnb_add(c, x, bnb_scale(c, bnb_gelu_tanh(c, down), 0.5f));
    b.outputs = {bnb_softmax(c, linear(x, V, C, "head")), x};
    return b;
}

// Some tens of nodes that use each other in any way the shapes allow.
inline std::vector<bnb_tensor *> random_graph(Net &net, Rng &rng) {
    const int64_t T = rng.range(1, 9);
    bnb_ctx *c = net.ctx;
    std::vector<bnb_tensor *> pool = {net.input({T, 24}, rng.normals(T * 24), "in1"), net.input({T, 40}, rng.normals(T * 40), "in2")};
    auto like = [&](const bnb_tensor *a) { // another of the same shape; a itself if there is none
        std::vector<bnb_tensor *> fits;
        for (bnb_tensor *t : pool)
            if (t->shape[1] == a->shape[1]) fits.push_back(t);
        return rng.pick(fits);
    };
    for (int64_t i = rng.range(8, 40); i > 0; i--) {
        bnb_tensor *a = pool[static_cast<size_t>(rng.range(std::max<int64_t>(0, static_cast<int64_t>(pool.size()) - 6), static_cast<int64_t>(pool.size()) - 1))], *y = nullptr;
        const int64_t C = a->shape[1];
        switch (rng.range(0, 11)) {
        case 0: y = bnb_relu(c, a); break;
        case 1: y = bnb_silu(c, a); break;
        case 2: y = bnb_add(c, a, like(a)); break;
        case 3: y = bnb_mul(c, a, like(a)); break;
        case 4: y = bnb_softmax(c, a); break;
        case 5: y = bnb_layer_norm(c, a, net.weight(BNB_F32, {C}, rng.normals(C)), nullptr, 1e-5f); break;
        case 6: {
            int64_t n = rng.range(1, 60);
            y = bnb_linear(c, a, net.weight(BNB_F16, {n, C}, rng.normals(n * C, 0.2)), nullptr);
            break;
        }
        case 7: {
            int64_t first = rng.range(0, C - 1);
            y = bnb_columns(c, a, first, rng.range(1, C - first));
            break;
        }
        case 8: y = bnb_columns(c, a, 0, C); break; // all of it: a view that is as large as its tensor
        case 9: y = bnb_scale(c, a, 0.5f); break;
        case 10: {
            std::vector<int32_t> ids;
            for (int64_t t = 0; t < T; t++) ids.push_back(static_cast<int32_t>(rng.range(0, T - 1)));
            y = bnb_embed(c, a, net.ids({T}, ids));
            break;
        }
        default: y = bnb_linear(c, a, like(a), nullptr); break; // [T, T]: activations are weights here
        }
        REQUIRE(y);
        pool.push_back(y);
    }
    std::vector<bnb_tensor *> outputs;
    for (int64_t i = rng.range(1, 3); i > 0; i--) outputs.push_back(bnb_scale(c, rng.pick(pool), 1.5f));
    if (rng.chance(0.5) && pool.back()->op != BNB_OP_COLUMNS && pool.back()->op != BNB_OP_NONE) outputs.push_back(pool.back());
    return outputs;
}

} // namespace test
