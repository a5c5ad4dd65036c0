// test_plan.cpp: graphs and plans: memory known in advance, offsets that never overlap while both tensors live, results
// that do not depend on reuse, runs or threads, and what is refused.
#include "graphs.h"

#include <algorithm>
#include <atomic>
#include <thread>

using namespace test;

namespace {

// ---- liveness, worked out again --------------------------------------------------------------------------------------

bnb_tensor *root(bnb_tensor *t) {
    while (t->view) t = t->view;
    return t;
}

struct Line { // of bnb_plan_describe
    int32_t index;
    std::string op, kernel;
    uint64_t offset, bytes;
};

std::vector<Line> describe_lines(const Net &net) {
    std::vector<Line> lines;
    std::istringstream in(net.describe());
    for (std::string s; std::getline(in, s);) {
        Line l;
        std::istringstream words(s);
        words >> l.index >> l.op >> l.kernel;
        size_t at = s.find(" @");
        REQUIRE(at != std::string::npos);
        std::istringstream numbers(s.substr(at + 2));
        numbers >> l.offset >> l.bytes;
        REQUIRE(!numbers.fail());
        lines.push_back(l);
    }
    return lines;
}

// Which nodes share bytes, and whether they may. Returns how many nodes took over the bytes of their input.
int check_offsets(Net &net) {
    struct Life {
        bnb_tensor *t;
        int32_t first, last;
        uint64_t begin, end;
    };
    const int32_t n = bnb_graph_size(net.graph);
    std::vector<Line> lines = describe_lines(net);
    REQUIRE(static_cast<int32_t>(lines.size()) == n);
    std::vector<Life> lives;
    std::map<bnb_tensor *, size_t> index;
    const char *arena = nullptr;
    bnb_memory memory;
    bnb_plan_memory(net.plan, &memory);
    for (int32_t i = 0; i < n; i++) {
        bnb_tensor *t = bnb_graph_node(net.graph, i);
        const Line &l = lines[static_cast<size_t>(i)];
        CHECK(l.index == i);
        CHECK(l.op == bnb_op_name(t->op));
        if (t->view) continue;
        CHECK(l.bytes >= bnb_tensor_bytes(t));
        CHECK(l.offset % 64 == 0);
        CHECK(l.offset + l.bytes <= memory.work);
        index[t] = lives.size();
        lives.push_back({t, i, i, l.offset, l.offset + bnb_tensor_bytes(t)});
        const char *base = static_cast<const char *>(t->plane[0]) - l.offset;
        if (!arena) arena = base;
        CHECK(arena == base); // describe tells the truth
    }
    for (int32_t i = 0; i < n; i++) {
        bnb_tensor *t = bnb_graph_node(net.graph, i);
        for (bnb_tensor *s : t->src) {
            if (!s) continue;
            bnb_tensor *r = root(s);
            if (r->op == BNB_OP_NONE) {
                if (!(r->flags & BNB_FLAG_INPUT) || index.count(r)) continue;
                uint64_t at = static_cast<uint64_t>(static_cast<const char *>(r->plane[0]) - arena);
                index[r] = lives.size();
                lives.push_back({r, -1, n, at, at + bnb_tensor_bytes(r)}); // inputs keep their values from run to run
                continue;
            }
            REQUIRE(index.count(r));
            lives[index[r]].last = std::max(lives[index[r]].last, i);
        }
        if ((t->flags & BNB_FLAG_OUTPUT) && index.count(root(t))) lives[index[root(t)]].last = n;
    }
    int taken_over = 0;
    for (const Life &a : lives)
        for (const Life &b : lives) {
            if (a.first >= b.first || b.first > a.last || a.end <= b.begin || b.end <= a.begin) continue;
            // both live when b is written, and they share bytes: only b in the place of its first input
            bool inplace = b.first == a.last && b.t->src[0] == a.t && a.begin == b.begin && a.end == b.end && b.t->op != BNB_OP_LINEAR &&
                           b.t->op != BNB_OP_EMBED && b.t->op != BNB_OP_ATTENTION;
            CHECK_MESSAGE(inplace, a.t->name, " and ", b.t->name, " overlap\n", net.describe());
            taken_over += inplace;
        }
    return taken_over;
}

std::vector<Floats> results(Net &net, const std::vector<bnb_tensor *> &outputs) {
    std::vector<Floats> all;
    for (bnb_tensor *t : outputs) all.push_back(net.read(t));
    return all;
}

bool same(const std::vector<Floats> &a, const std::vector<Floats> &b) {
    bool ok = a.size() == b.size();
    for (size_t i = 0; ok && i < a.size(); i++) ok = same_bits(a[i], b[i]);
    return ok;
}

bnb_memory memory_of(const Net &net) {
    bnb_memory m;
    bnb_plan_memory(net.plan, &m);
    return m;
}

} // namespace

TEST_SUITE("plan") {

TEST_CASE("plan: the memory of a 175B model is known while it is metadata") {
    Env env;
    bnb_error err = {};
    bnb_backend *cpu = env.cpu();
    const uint64_t before = bnb_env_bytes(env);
    Ctx ctx(bnb_ctx_create(env, &err));
    bnb_ctx *c = ctx.get();
    const int64_t L = 96, C = 12288, V = 50272, T = 1, R = 2048;
    uint64_t weights = 0, state = 0;
    auto leaf = [&](int32_t type, Shape shape, uint64_t &sum) {
        bnb_quant q = quant4(type, 64, type == BNB_NF4);
        bnb_tensor *t = bnb_tensor_new(c, type, &q, static_cast<int32_t>(shape.size()), shape.data(), "t");
        REQUIRE(t);
        CHECK(bnb_tensor_state(t) == BNB_META);
        CHECK(bnb_tensor_plane(t, 0) == nullptr);
        sum += bnb_tensor_bytes(t);
        return t;
    };
    auto linear = [&](bnb_tensor *x, int64_t out, int64_t in) { return bnb_linear(c, x, leaf(BNB_NF4, {out, in}, weights), leaf(BNB_F16, {out}, weights)); };
    auto norm = [&](bnb_tensor *x) { return bnb_layer_norm(c, x, leaf(BNB_F16, {C}, weights), leaf(BNB_F16, {C}, weights), 1e-5f); };
    const int64_t n[] = {T, 2};
    bnb_tensor *ids = bnb_input(c, BNB_I32, 1, n, "ids"), *rows = bnb_input(c, BNB_I32, 1, n, "rows"), *span = bnb_input(c, BNB_I32, 2, n, "span");
    bnb_tensor *table = leaf(BNB_F16, {V, C}, weights), *x = bnb_embed(c, table, ids);
    for (int64_t i = 0; i < L; i++) {
        bnb_tensor *h = norm(x), *k = bnb_set_rows(c, leaf(BNB_F16, {R, C}, state), linear(h, C, C), rows);
        bnb_tensor *v = bnb_set_rows(c, leaf(BNB_F16, {R, C}, state), linear(h, C, C), rows);
        x = bnb_add(c, x, linear(bnb_attention(c, linear(h, C, C), k, v, span, 96, 96, 0.1f), C, C));
        x = bnb_add(c, x, linear(bnb_relu(c, linear(norm(x), 4 * C, C)), C, 4 * C));
    }
    bnb_tensor *y = bnb_linear(c, norm(x), table, nullptr);
    bnb_graph *g = bnb_graph_create(c, &y, 1, &err);
    REQUIRE_MESSAGE(g, text(err));
    Plan plan(bnb_plan_create(cpu, g, nullptr, &err));
    REQUIRE_MESSAGE(plan, text(err));
    bnb_memory m;
    bnb_plan_memory(plan.get(), &m);
    CHECK(m.weights == weights);
    CHECK(m.weights > 87000000000u);
    CHECK(m.state == state);
    CHECK(m.state == static_cast<uint64_t>(L * 2 * R * C * 2));
    CHECK(m.work > 4 * C * 4);
    CHECK(m.work < 64 << 20);
    CHECK(bnb_tensor_state(table) == BNB_META);
    const uint64_t used = bnb_env_bytes(env) - before;
    CHECK_MESSAGE(used < 4 << 20, used, " bytes of metadata");
    CHECK(bnb_ctx_bytes(c) <= used);
    CHECK(bnb_plan_run(plan.get(), &err) == BNB_E_ARG); // nothing has memory
    plan.reset();
    ctx.reset();
    CHECK(bnb_env_bytes(env) == before);
}

TEST_CASE("plan: tensors that live at the same time never overlap") {
    Env env;
    int taken_over = 0;
    for (uint64_t seed = 0; seed < 150; seed++) {
        CAPTURE(seed);
        Net net(env);
        Rng rng(seed);
        net.prepare(random_graph(net, rng));
        net.again();
        taken_over += check_offsets(net);
    }
    CHECK(taken_over > 20); // in-place happens
    for (int32_t type : WEIGHT_TYPES) {
        CAPTURE(type_name(type));
        Net net(env);
        net.prepare(build_block(net, type, 5).outputs);
        net.again();
        CHECK(check_offsets(net) > 2);
    }
}

TEST_CASE("plan: without reuse more memory, the same bits") {
    Env env(2);
    for (uint64_t seed = 0; seed < 60; seed++) {
        CAPTURE(seed);
        std::vector<Floats> got[2];
        for (int no_reuse = 0; no_reuse < 2; no_reuse++) {
            Net net(env);
            Rng rng(seed);
            net.params.no_reuse = no_reuse;
            std::vector<bnb_tensor *> outputs = random_graph(net, rng);
            net.prepare(outputs);
            net.again();
            if (no_reuse) CHECK(check_offsets(net) == 0);
            got[no_reuse] = results(net, outputs);
        }
        CHECK(same(got[0], got[1]));
    }
    for (int32_t type : WEIGHT_TYPES)
        for (int64_t T : {1, 7}) {
            CAPTURE(type_name(type));
            std::vector<Floats> got[2];
            bnb_memory memory[2];
            for (int no_reuse = 0; no_reuse < 2; no_reuse++) {
                Net net(env);
                net.params.no_reuse = no_reuse;
                Block b = build_block(net, type, T);
                net.prepare(b.outputs);
                net.again();
                got[no_reuse] = results(net, b.outputs);
                memory[no_reuse] = memory_of(net);
            }
            CHECK(same(got[0], got[1]));
            CHECK(memory[0].work < memory[1].work);
            CHECK(memory[0].weights == memory[1].weights);
        }
}

TEST_CASE("plan: the same bits in every run, with any number of threads, for every type of weight") {
    for (int32_t type : WEIGHT_TYPES)
        for (int64_t T : {1, 21}) {
            CAPTURE(type_name(type));
            CAPTURE(T);
            std::vector<Floats> first;
            for (int32_t threads : {1, 2, 3, 5}) {
                CAPTURE(threads);
                Env env(threads);
                CHECK(bnb_env_threads(env) == threads);
                Net net(env);
                Block b = build_block(net, type, T);
                net.prepare(b.outputs);
                for (int run = 0; run < 2; run++) {
                    net.again();
                    std::vector<Floats> now = results(net, b.outputs);
                    for (const Floats &v : now)
                        for (float f : v) REQUIRE(std::isfinite(f));
                    if (first.empty()) first = now;
                    CHECK(same(first, now));
                }
            }
        }
}

TEST_CASE("plan: two threads run plans of their own on the weights of one env") {
    Env env(3);
    Net shared(env);
    Rng rng(1);
    const int64_t C = 64, T = 5;
    std::vector<bnb_tensor *> w;
    for (int32_t type : WEIGHT_TYPES) w.push_back(shared.weight(type, {C, C}, rng.normals(C * C, 0.2)));
    Floats x = rng.normals(T * C);
    bnb_tensor *y = shared.input({T, C}, x);
    for (bnb_tensor *t : w) y = bnb_gelu(shared.ctx, bnb_linear(shared.ctx, y, t, nullptr));
    Floats want = shared.run(y);
    std::atomic<int> good{0};
    auto session = [&](int64_t rows) {
        bnb_error e = {};
        Backend cpu(bnb_backend_open(env, "cpu", &e));
        for (int round = 0; round < 5; round++) {
            Ctx ctx(bnb_ctx_create(env, &e));
            const int64_t shape[] = {rows, C};
            bnb_tensor *in = bnb_input(ctx.get(), BNB_F32, 2, shape, "x"), *out = in;
            for (bnb_tensor *t : w) out = bnb_gelu(ctx.get(), bnb_linear(ctx.get(), out, t, nullptr));
            bnb_graph *g = bnb_graph_create(ctx.get(), &out, 1, &e);
            Plan plan(g ? bnb_plan_create(cpu.get(), g, nullptr, &e) : nullptr);
            if (!plan || bnb_plan_alloc(plan.get(), &e)) return;
            if (bnb_tensor_write(in, 0, x.data(), static_cast<uint64_t>(rows * C) * 4, &e)) return;
            Floats got(static_cast<size_t>(rows * C)), again(got);
            for (Floats *f : {&got, &again})
                if (bnb_plan_run(plan.get(), &e) || bnb_tensor_read(out, 0, f->data(), f->size() * 4, &e)) return;
            if (!same_bits(got, again)) return;
            if (rows == T && !same_bits(got, want)) return;
            good++;
        }
    };
    std::thread a(session, T), b(session, T), c(session, 1);
    a.join();
    b.join();
    c.join();
    CHECK(good == 15);
}

TEST_CASE("plan: memory is what the arena takes, and comes back") {
    Env env;
    bnb_error err = {};
    env.cpu();
    const uint64_t empty = bnb_env_bytes(env);
    {
        Net net(env);
        Block b = build_block(net, BNB_NF4, 3);
        bnb_graph *g = bnb_graph_create(net.ctx, b.outputs.data(), 2, &err);
        REQUIRE(g);
        net.plan = bnb_plan_create(env.cpu(), g, nullptr, &err);
        REQUIRE(net.plan);
        bnb_memory m = memory_of(net);
        uint64_t before = bnb_env_bytes(env);
        CHECK(bnb_tensor_state(b.outputs[0]) != BNB_RESIDENT);
        REQUIRE(bnb_plan_alloc(net.plan, &err) == BNB_OK);
        CHECK(bnb_env_bytes(env) - before == m.work);
        CHECK(bnb_tensor_state(b.outputs[0]) == BNB_RESIDENT);
        REQUIRE(bnb_plan_alloc(net.plan, &err) == BNB_OK); // once
        CHECK(bnb_env_bytes(env) - before == m.work);
        before = bnb_env_bytes(env);
        REQUIRE(bnb_ctx_alloc(net.ctx, env.cpu(), &err) == BNB_OK);
        CHECK(bnb_env_bytes(env) - before >= m.weights + m.state);
        CHECK(bnb_env_bytes(env) - before <= m.weights + m.state + 256 * 100);
        before = bnb_env_bytes(env);
        REQUIRE(bnb_ctx_alloc(net.ctx, env.cpu(), &err) == BNB_OK); // nothing is left to do
        CHECK(bnb_env_bytes(env) == before);
    }
    CHECK(bnb_env_bytes(env) == empty);
    CHECK(bnb_env_bytes_peak(env) > empty);
}

TEST_CASE("plan: a freed plan leaves no addresses behind, and the graph can have another") {
    Env env;
    bnb_error err = {};
    Net net(env);
    bnb_tensor *x = net.input({2, 3}, {1, 2, 3, 4, 5, 6}), *y = bnb_relu(net.ctx, x);
    net.prepare({y});
    net.again();
    CHECK(bnb_plan_create(env.cpu(), net.graph, nullptr, &err) == nullptr); // one at a time
    CHECK(err.code == BNB_E_ARG);
    CHECK_MESSAGE(is_sentence(err), text(err));
    bnb_plan_free(net.plan);
    float out[6];
    CHECK(bnb_tensor_state(y) != BNB_RESIDENT);
    CHECK(bnb_tensor_state(x) != BNB_RESIDENT);
    CHECK(bnb_tensor_plane(y, 0) == nullptr);
    if (bnb_tensor_state(y) != BNB_RESIDENT) CHECK(bnb_tensor_read(y, 0, out, sizeof out, &err) == BNB_E_ARG);
    net.plan = bnb_plan_create(env.cpu(), net.graph, nullptr, &err);
    REQUIRE_MESSAGE(net.plan, text(err));
    REQUIRE(bnb_plan_alloc(net.plan, &err) == BNB_OK);
    net.set<float>(x, {-1, 2, -3, 4, -5, 6});
    REQUIRE(bnb_plan_run(net.plan, &err) == BNB_OK);
    CHECK(net.read(y) == Floats{0, 2, 0, 4, 0, 6});
}

TEST_CASE("plan: a cache that is bound to other memory is used there") {
    Env env;
    bnb_error err = {};
    Ctx ctx(bnb_ctx_create(env, &err));
    const int64_t shape[] = {2, 3}, two[] = {2};
    bnb_tensor *cache = bnb_tensor_new(ctx.get(), BNB_F32, nullptr, 2, shape, "cache"), *x = bnb_input(ctx.get(), BNB_F32, 2, shape, "x"), *rows = bnb_input(ctx.get(), BNB_I32, 1, two, "rows");
    bnb_tensor *y = bnb_scale(ctx.get(), bnb_set_rows(ctx.get(), cache, x, rows), 2);
    bnb_graph *g = bnb_graph_create(ctx.get(), &y, 1, &err);
    REQUIRE(g);
    Plan plan(bnb_plan_create(env.cpu(), g, nullptr, &err));
    REQUIRE(plan);
    REQUIRE(bnb_plan_alloc(plan.get(), &err) == BNB_OK);
    const int32_t order[] = {1, 0};
    REQUIRE(bnb_tensor_write(rows, 0, order, sizeof order, &err) == BNB_OK);
    std::vector<Floats> memories(3, Floats(6, -7));
    for (size_t i = 0; i < memories.size(); i++) {
        const float v = static_cast<float>(10 * i);
        const Floats values = {v + 1, v + 2, v + 3, v + 4, v + 5, v + 6};
        Floats got(6);
        void *planes[BNB_MAX_PLANES] = {memories[i].data(), nullptr, nullptr, nullptr};
        REQUIRE(bnb_tensor_write(x, 0, values.data(), 24, &err) == BNB_OK);
        REQUIRE(bnb_tensor_bind(cache, planes, &err) == BNB_OK);
        REQUIRE(bnb_plan_run(plan.get(), &err) == BNB_OK);
        CHECK(memories[i] == Floats{v + 4, v + 5, v + 6, v + 1, v + 2, v + 3});
        REQUIRE(bnb_tensor_read(y, 0, got.data(), 24, &err) == BNB_OK);
        CHECK(got == Floats{2 * v + 8, 2 * v + 10, 2 * v + 12, 2 * v + 2, 2 * v + 4, 2 * v + 6});
    }
}

TEST_CASE("plan: describe") {
    Env env;
    Net net(env);
    net.prepare(build_block(net, BNB_FP4, 3).outputs);
    std::string all = net.describe();
    CHECK(bnb_plan_describe(net.plan, nullptr, 0) == all.size());
    std::vector<Line> lines = describe_lines(net);
    CHECK(static_cast<int32_t>(lines.size()) == bnb_graph_size(net.graph));
    for (const Line &l : lines) CHECK(!l.kernel.empty());
    for (size_t cap : {size_t{1}, size_t{2}, size_t{50}, size_t{99}, all.size(), all.size() + 1, all.size() + 9}) {
        std::vector<char> out(cap + 8, '#');
        CHECK(bnb_plan_describe(net.plan, out.data(), cap) == all.size());
        CHECK(std::string(out.data()) == all.substr(0, cap - 1));
        CHECK(std::count(out.begin() + static_cast<ptrdiff_t>(cap), out.end(), '#') == 8);
    }
    CHECK(bnb_graph_node(net.graph, -1) == nullptr);
    CHECK(bnb_graph_node(net.graph, bnb_graph_size(net.graph)) == nullptr);
}

TEST_CASE("plan: times") {
    Env env(2);
    bnb_error err = {};
    Net net(env);
    Block b = build_block(net, BNB_INT8, 9);
    net.prepare(b.outputs);
    CHECK(bnb_plan_times(net.plan) == nullptr);
    net.again();
    CHECK(bnb_plan_times(net.plan) == nullptr);
    std::vector<Floats> before = results(net, b.outputs);
    REQUIRE(bnb_plan_profile(net.plan, 1, &err) == BNB_OK);
    REQUIRE(bnb_plan_profile(net.plan, 1, &err) == BNB_OK);
    for (int run = 0; run < 2; run++) {
        net.again();
        const double *times = bnb_plan_times(net.plan);
        REQUIRE(times);
        double sum = 0;
        for (int32_t i = 0; i < bnb_graph_size(net.graph); i++) {
            CHECK(times[i] >= 0);
            if (bnb_graph_node(net.graph, i)->op == BNB_OP_COLUMNS) CHECK(times[i] == 0);
            sum += times[i];
        }
        CHECK(sum > 0);
        CHECK(sum < 10);
    }
    CHECK(same(before, results(net, b.outputs)));
    REQUIRE(bnb_plan_profile(net.plan, 0, &err) == BNB_OK);
    REQUIRE(bnb_plan_profile(net.plan, 0, nullptr) == BNB_OK);
    CHECK(bnb_plan_times(net.plan) == nullptr);
    net.again();
}

TEST_CASE("plan: graphs hold what their outputs need, sources first") {
    Env env;
    bnb_error err = {};
    Net net(env);
    bnb_tensor *x = net.input({1, 4}, {1, 2, 3, 4}), *a = bnb_relu(net.ctx, x), *b = bnb_silu(net.ctx, a), *unused = bnb_gelu(net.ctx, b), *d = bnb_add(net.ctx, b, a);
    REQUIRE(unused);
    bnb_tensor *outputs[] = {d, b, d};
    bnb_graph *g = bnb_graph_create(net.ctx, outputs, 3, &err);
    REQUIRE_MESSAGE(g, text(err));
    REQUIRE(bnb_graph_size(g) == 3);
    CHECK(bnb_graph_node(g, 0) == a);
    CHECK(bnb_graph_node(g, 1) == b);
    CHECK(bnb_graph_node(g, 2) == d);
    // a second graph of the same ctx, with some of the same nodes
    bnb_graph *g2 = bnb_graph_create(net.ctx, &unused, 1, &err);
    REQUIRE(g2);
    CHECK(bnb_graph_size(g2) == 3);
    // deep, and with shared sources: every node once
    bnb_tensor *y = a;
    for (int i = 0; i < 20000; i++) y = i % 2 ? bnb_scale(net.ctx, y, 1) : bnb_add(net.ctx, y, a);
    bnb_graph *deep = bnb_graph_create(net.ctx, &y, 1, &err);
    REQUIRE(deep);
    CHECK(bnb_graph_size(deep) == 20001);
    Plan plan(bnb_plan_create(env.cpu(), deep, nullptr, &err));
    REQUIRE(plan);
    REQUIRE(bnb_plan_alloc(plan.get(), &err) == BNB_OK);
    net.set<float>(x, {1, 2, 3, -4});
    REQUIRE(bnb_plan_run(plan.get(), &err) == BNB_OK);
    CHECK(net.read(y) == Floats{10001, 20002, 30003, 0});
    bnb_memory m;
    bnb_plan_memory(plan.get(), &m);
    CHECK(m.work < 64 << 10);
}

TEST_CASE("plan: what a graph cannot be made of is refused") {
    Env env;
    bnb_error err = {};
    Net net(env), other(env);
    bnb_tensor *x = net.input({1, 4}, {1, 2, 3, 4}), *y = bnb_relu(net.ctx, x), *w = net.weight(BNB_F32, {4, 4}, Floats(16));
    bnb_tensor *foreign_input = other.input({1, 4}, {1, 2, 3, 4}, "foreign input"), *foreign = bnb_relu(other.ctx, foreign_input);
    bnb_tensor *none = nullptr;
    for (bnb_tensor *bad : {none, x, w, foreign}) {
        bnb_tensor *outputs[] = {y, bad};
        err = {};
        CHECK(bnb_graph_create(net.ctx, outputs, 2, &err) == nullptr);
        CHECK(err.code == BNB_E_ARG);
        CHECK_MESSAGE(is_sentence(err), text(err));
    }
    bnb_tensor *mixed = bnb_add(net.ctx, y, foreign); // a node of another ctx within
    REQUIRE(mixed);
    err = {};
    CHECK(bnb_graph_create(net.ctx, &mixed, 1, &err) == nullptr);
    CHECK(err.code == BNB_E_ARG);
    CHECK_MESSAGE(is_sentence(err), text(err));
    bnb_tensor *borrowed = bnb_add(net.ctx, y, foreign_input); // an input of another ctx: whose plan would hold it?
    REQUIRE(borrowed);
    bnb_graph *g = bnb_graph_create(net.ctx, &borrowed, 1, &err);
    err = {};
    CHECK((!g || !bnb_plan_create(env.cpu(), g, nullptr, &err)));
    if (g) {
        CHECK(err.code == BNB_E_ARG);
        CHECK_MESSAGE(contains(text(err), "foreign input"), text(err));
    }
    g = bnb_graph_create(net.ctx, &y, 1, &err); // the refusals left nothing behind
    REQUIRE_MESSAGE(g, text(err));
    CHECK(bnb_graph_size(g) == 1);
    Plan plan(bnb_plan_create(env.cpu(), g, nullptr, &err));
    REQUIRE_MESSAGE(plan, text(err));
    CHECK(bnb_plan_run(plan.get(), &err) == BNB_OK);
}

TEST_CASE("plan: no outputs is a graph of nothing") {
    Env env;
    bnb_error err = {};
    Ctx ctx(bnb_ctx_create(env, &err));
    bnb_graph *g = bnb_graph_create(ctx.get(), nullptr, 0, &err);
    if (!g) {
        CHECK_MESSAGE(is_sentence(err), text(err));
        return;
    }
    CHECK(bnb_graph_size(g) == 0);
    Plan plan(bnb_plan_create(env.cpu(), g, nullptr, &err));
    REQUIRE(plan);
    CHECK(bnb_plan_run(plan.get(), &err) == BNB_OK);
    CHECK(bnb_plan_describe(plan.get(), nullptr, 0) == 0);
}

TEST_CASE("plan: compute types") {
    Env env;
    bnb_error err = {};
    for (int32_t dtype : {int32_t{BNB_F16}, int32_t{BNB_NF4}, int32_t{77}, int32_t{-2}}) {
        Net net(env);
        bnb_tensor *y = bnb_relu(net.ctx, net.input({1, 4}, Floats(4)));
        bnb_graph *g = bnb_graph_create(net.ctx, &y, 1, &err);
        REQUIRE(g);
        net.params.compute_dtype = dtype;
        err = {};
        CHECK(bnb_plan_create(env.cpu(), g, &net.params, &err) == nullptr);
        CHECK(err.code == BNB_E_TYPE);
        CHECK_MESSAGE(is_sentence(err), text(err));
        net.params.compute_dtype = BNB_BF16;
        net.plan = bnb_plan_create(env.cpu(), g, &net.params, &err);
        CHECK(net.plan);
    }
}

TEST_CASE("plan: a tensor without memory is named") {
    Env env;
    bnb_error err = {};
    Net net(env), weights(env);
    bnb_tensor *w = weights.weight(BNB_F32, {4, 4}, Floats(16), nullptr, "lonely weight");
    bnb_tensor *y = bnb_linear(net.ctx, net.input({1, 4}, Floats(4)), w, nullptr);
    bnb_graph *g = bnb_graph_create(net.ctx, &y, 1, &err);
    REQUIRE(g);
    net.plan = bnb_plan_create(env.cpu(), g, nullptr, &err);
    REQUIRE(net.plan);
    CHECK(bnb_plan_run(net.plan, &err) == BNB_E_ARG);
    CHECK_MESSAGE(contains(text(err), "lonely weight"), text(err));
    CHECK(bnb_plan_run(net.plan, nullptr) == BNB_E_ARG);
    REQUIRE(bnb_ctx_alloc(weights.ctx, env.cpu(), &err) == BNB_OK);
    CHECK(bnb_plan_run(net.plan, &err) == BNB_OK); // it can be helped
}

TEST_CASE("plan: reading, writing and binding check their ranges") {
    Env env;
    bnb_error err = {};
    Net net(env);
    bnb_tensor *x = net.input({2, 3}, {1, 2, 3, 4, 5, 6}, "the input"), *y = bnb_relu(net.ctx, x), *view = bnb_columns(net.ctx, x, 1, 2), *w = net.weight(BNB_F32, {3}, {1, 2, 3}, nullptr, "the weight");
    bnb_tensor *z = bnb_scale(net.ctx, view, 1);
    float out[8] = {};
    for (bnb_tensor *t : {x, y, w}) { // META
        err = {};
        CHECK(bnb_tensor_read(t, 0, out, 4, &err) == BNB_E_ARG);
        CHECK_MESSAGE(contains(text(err), bnb_tensor_name(t)), text(err));
        CHECK(bnb_tensor_write(t, 0, out, 4, &err) == BNB_E_ARG);
        CHECK(bnb_tensor_plane(t, 0) == nullptr);
    }
    net.prepare({y, z});
    net.again();
    struct Range {
        uint64_t offset, n;
    };
    for (Range r : {Range{0, 25}, Range{24, 1}, Range{25, 0}, Range{UINT64_MAX, 1}, Range{8, UINT64_MAX}, Range{UINT64_MAX, UINT64_MAX}, Range{1, UINT64_MAX - 1}})
        for (bnb_tensor *t : {x, y}) {
            err = {};
            CHECK(bnb_tensor_read(t, r.offset, out, r.n, &err) == BNB_E_ARG);
            CHECK_MESSAGE(is_sentence(err), text(err));
            CHECK(bnb_tensor_write(t, r.offset, out, r.n, nullptr) == BNB_E_ARG);
        }
    CHECK(bnb_tensor_read(y, 24, out, 0, &err) == BNB_OK);
    CHECK(bnb_tensor_read(y, 20, out, 4, &err) == BNB_OK);
    CHECK(out[0] == 6);
    CHECK(bnb_tensor_read(view, 0, out, 4, &err) == BNB_E_ARG); // its rows are not one after the other
    CHECK(bnb_tensor_plane(y, -1) == nullptr);
    CHECK(bnb_tensor_plane(y, BNB_MAX_PLANES) == nullptr);

    void *planes[BNB_MAX_PLANES] = {out, nullptr, nullptr, nullptr}, *nothing[BNB_MAX_PLANES] = {};
    for (bnb_tensor *t : {x, y, view}) CHECK(bnb_tensor_bind(t, planes, &err) == BNB_E_ARG);
    err = {};
    CHECK(bnb_tensor_bind(w, nothing, &err) == BNB_E_ARG);
    CHECK_MESSAGE(contains(text(err), "the weight"), text(err));
    bnb_tensor *q = net.weight(BNB_NF4, {3}, {1, 2, 3}, nullptr, "the code");
    CHECK(bnb_tensor_bind(q, planes, &err) == BNB_E_ARG); // absmax is missing
    CHECK(bnb_tensor_state(q) == BNB_META);
}

TEST_CASE("plan: tensors tell their sizes") {
    Env env;
    bnb_error err = {};
    Ctx ctx(bnb_ctx_create(env, &err));
    const int64_t shape[] = {5, 33};
    bnb_quant q = quant4(BNB_NF4, 32, true);
    bnb_tensor *t = bnb_tensor_new(ctx.get(), BNB_NF4, &q, 2, shape, "t");
    REQUIRE(t);
    const uint64_t codes = (5 * 33 + 1) / 2, absmax = (5 * 33 + 31) / 32;
    CHECK(bnb_tensor_elements(t) == 165);
    CHECK(bnb_tensor_footprint(t) == codes);
    CHECK(bnb_tensor_bytes(t) == codes + absmax + 4 + 1024);
    CHECK(bnb_tensor_n_dims(t) == 2);
    CHECK(bnb_tensor_shape(t)[2] == 1);
    CHECK(bnb_tensor_shape(t)[3] == 1);
    CHECK(bnb_tensor_type(t) == BNB_NF4);
    CHECK(bnb_tensor_quant(t)->blocksize == 32);
    CHECK(bnb_plane_bytes(BNB_INT8, &q, 3, shape, 0) == UINT64_MAX);
    CHECK(bnb_plane_bytes(BNB_F32, nullptr, 2, shape, 0) == 660);
    CHECK(bnb_plane_bytes(BNB_F32, nullptr, 2, shape, 1) == 0);
    CHECK(bnb_plane_bytes(99, nullptr, 2, shape, 0) == UINT64_MAX);
    CHECK(bnb_plane_bytes(BNB_NF4, nullptr, 2, shape, 0) == UINT64_MAX);
}

TEST_CASE("plan: devices that are not there are refused") {
    Env env;
    for (const char *name : {"", ":", "cpu:", "cpu:x", "cpu:-1", "cpu:0x0", "cpu:0 ", "cpu:99999999999999999999", "cp", "cpus", "CPU", "nope:0", "cpu:1", "cpu:4096", "cpu:4097"}) {
        bnb_error err = {};
        CAPTURE(std::string(name));
        CHECK(bnb_backend_open(env, name, &err) == nullptr);
        CHECK((err.code == BNB_E_ARG || err.code == BNB_E_DEVICE || err.code == BNB_E_UNSUPPORTED));
        CHECK_MESSAGE(is_sentence(err), text(err));
        CHECK(bnb_backend_open(env, name, nullptr) == nullptr);
    }
    bnb_error err = {};
    Backend zero(bnb_backend_open(env, "cpu:0", &err));
    REQUIRE(zero);
    CHECK(std::string(bnb_backend_name(zero.get())) == "cpu:0");
}

TEST_CASE("plan: freeing the env frees everything, whatever was made first") {
    for (int order = 0; order < 2; order++) {
        Env env;
        bnb_error err = {};
        bnb_backend *cpu = order ? bnb_backend_open(env, "cpu", &err) : nullptr;
        bnb_ctx *ctx = bnb_ctx_create(env, &err);
        if (!cpu) cpu = bnb_backend_open(env, "cpu", &err); // younger than what gets memory from it
        REQUIRE(cpu);
        const int64_t shape[] = {2, 3};
        bnb_tensor *w = bnb_tensor_new(ctx, BNB_F32, nullptr, 1, &shape[1], "w"), *y = bnb_add(ctx, bnb_input(ctx, BNB_F32, 2, shape, "x"), w);
        REQUIRE(bnb_ctx_alloc(ctx, cpu, &err) == BNB_OK);
        bnb_graph *g = bnb_graph_create(ctx, &y, 1, &err);
        bnb_plan *plan = bnb_plan_create(cpu, g, nullptr, &err);
        REQUIRE(plan);
        REQUIRE(bnb_plan_profile(plan, 1, &err) == BNB_OK);
        REQUIRE(bnb_plan_run(plan, &err) == BNB_OK);
        env.close();
    }
    bnb_env_free(nullptr); // all free functions take NULL
    bnb_ctx_free(nullptr);
    bnb_plan_free(nullptr);
    bnb_file_free(nullptr);
    bnb_backend_close(nullptr);
    Env env;
    bnb_free(env, nullptr, 10);
}

} // TEST_SUITE
