// test_threads.cpp: what several threads may do at once. `make tsan` runs every test with "thread" in its name.
#include "tiny_model.h"

#include <atomic>
#include <chrono>
#include <thread>

using namespace test;

namespace {

// Counts the items of bnb_parallel that ran.
struct Counts {
    std::vector<std::atomic<int>> seen;
    explicit Counts(size_t n) : seen(n) {}
    static void item(void *arg, int64_t i) { static_cast<Counts *>(arg)->seen[static_cast<size_t>(i)]++; }
    bool all(int times) const {
        for (auto &s : seen)
            if (s != times) return false;
        return true;
    }
};

// A graph with work for several threads: two linears of every kind and an attention. Returns its output.
bnb_tensor *build(bnb_ctx *c, const std::vector<bnb_tensor *> &weights, bnb_tensor *x) {
    for (bnb_tensor *w : weights) x = bnb_layer_norm(c, bnb_add(c, bnb_linear(c, x, w, nullptr), x), nullptr, nullptr, 1e-5f);
    return x;
}

// What a session of a program does, without any assertion: those belong to the first thread.
struct Runner {
    bnb_env *env;
    const std::vector<bnb_tensor *> &weights;
    int64_t T, C;
    int rounds;
    Floats first;
    bool ok = false;

    void run() {
        bnb_error err = {};
        Backend cpu(bnb_backend_open(env, "cpu", &err));
        Ctx ctx(bnb_ctx_create(env, &err));
        const int64_t shape[] = {T, C};
        bnb_tensor *x = bnb_input(ctx.get(), BNB_F32, 2, shape, "x"), *y = build(ctx.get(), weights, x);
        bnb_graph *g = bnb_graph_create(ctx.get(), &y, 1, &err);
        Plan plan(g ? bnb_plan_create(cpu.get(), g, nullptr, &err) : nullptr);
        if (!plan || bnb_plan_alloc(plan.get(), &err)) return;
        Floats in = Rng(static_cast<uint64_t>(T)).normals(T * C), out(in.size());
        if (bnb_tensor_write(x, 0, in.data(), in.size() * 4, &err)) return;
        for (int i = 0; i < rounds; i++) {
            if (bnb_plan_run(plan.get(), &err) || bnb_tensor_read(y, 0, out.data(), out.size() * 4, &err)) return;
            if (first.empty()) first = out;
            if (!same_bits(first, out)) return;
        }
        ok = true;
    }
};

std::vector<bnb_tensor *> make_weights(Net &net, int64_t C) {
    Rng rng(5);
    std::vector<bnb_tensor *> w;
    bnb_tensor *y = net.input({1, C}, Floats(static_cast<size_t>(C)));
    for (int32_t type : {BNB_F32, BNB_F16, BNB_INT8, BNB_NF4}) w.push_back(net.weight(type, {C, C}, rng.normals(C * C, 0.1)));
    net.prepare({build(net.ctx, w, y)}); // gives them memory and values
    return w;
}

} // namespace

TEST_SUITE("threads") {

TEST_CASE("threads: more threads than cores") {
    for (int32_t threads : {1, 2, 7, 24}) {
        Env env(threads);
        CHECK(bnb_env_threads(env) == threads);
        for (int64_t n : {0, 1, 2, 23, 24, 25, 3000}) {
            Counts counts(static_cast<size_t>(n));
            for (int times = 1; times <= 5; times++) {
                bnb_parallel(env, n, Counts::item, &counts);
                CHECK(counts.all(times));
            }
        }
        bnb_parallel(env, -3, Counts::item, nullptr);
    }
}

TEST_CASE("threads: how many is checked") {
    for (int32_t threads : {-1, INT32_MIN, 257, INT32_MAX}) {
        bnb_error err = {};
        bnb_env_params p;
        bnb_env_params_default(&p, sizeof p);
        p.n_threads = threads;
        CHECK(bnb_env_create(&p, &err) == nullptr);
        CHECK(err.code == BNB_E_ARG);
        CHECK_MESSAGE(is_sentence(err), text(err));
    }
    Env env(0); // as many as there are cores
    CHECK(bnb_env_threads(env) >= 1);
}

TEST_CASE("threads: bnb_parallel from two threads at once") {
    Env env(3);
    Counts a(500), b(700), c(3);
    auto many = [&](Counts *counts) {
        for (int i = 0; i < 40; i++) bnb_parallel(env, static_cast<int64_t>(counts->seen.size()), Counts::item, counts);
    };
    std::thread first(many, &a), second(many, &b), third(many, &c);
    first.join();
    second.join();
    third.join();
    CHECK(a.all(40));
    CHECK(b.all(40));
    CHECK(c.all(40));
}

TEST_CASE("threads: a team that slept wakes up") {
    Env env(4);
    Counts counts(64);
    for (int times = 1; times <= 3; times++) {
        std::this_thread::sleep_for(std::chrono::milliseconds(20)); // longer than the workers spin
        bnb_parallel(env, 64, Counts::item, &counts);
        CHECK(counts.all(times));
    }
}

TEST_CASE("threads: envs come and go") {
    for (int i = 0; i < 60; i++) {
        Env env(1 + i % 5);
        if (i % 3 == 0) continue; // freed before its threads have begun
        Counts counts(9);
        bnb_parallel(env, 9, Counts::item, &counts);
        CHECK(counts.all(1));
    }
    std::vector<std::thread> threads; // and several at once
    std::atomic<int> good{0};
    for (int t = 0; t < 3; t++)
        threads.emplace_back([&] {
            for (int i = 0; i < 15; i++) {
                bnb_env_params p;
                bnb_env_params_default(&p, sizeof p);
                p.n_threads = 3;
                bnb_env *env = bnb_env_create(&p, nullptr);
                if (!env) continue;
                Counts counts(20);
                bnb_parallel(env, 20, Counts::item, &counts);
                good += counts.all(1);
                bnb_env_free(env);
            }
        });
    for (std::thread &t : threads) t.join();
    CHECK(good == 45);
}

TEST_CASE("threads: plans in several threads on one env") {
    Env env(3);
    const int64_t C = 64;
    Net net(env);
    std::vector<bnb_tensor *> weights = make_weights(net, C);
    Runner a{env, weights, 3, C, 6, {}}, b{env, weights, 11, C, 6, {}}, c{env, weights, 3, C, 6, {}};
    std::thread ta([&] { a.run(); }), tb([&] { b.run(); }), tc([&] { c.run(); });
    ta.join();
    tb.join();
    tc.join();
    CHECK(a.ok);
    CHECK(b.ok);
    CHECK(c.ok);
    CHECK(same_bits(a.first, c.first));
}

TEST_CASE("threads: plans in two threads on two envs") {
    Env one(2), two(3);
    const int64_t C = 64;
    Net net1(one), net2(two);
    std::vector<bnb_tensor *> w1 = make_weights(net1, C), w2 = make_weights(net2, C);
    Runner a{one, w1, 5, C, 8, {}}, b{two, w2, 5, C, 8, {}};
    std::thread ta([&] { a.run(); }), tb([&] { b.run(); });
    ta.join();
    tb.join();
    CHECK(a.ok);
    CHECK(b.ok);
    CHECK(same_bits(a.first, b.first)); // 2 threads or 3
}

TEST_CASE("threads: allocating, quantizing and opening at the same time") {
    Env env(2);
    Image image(Image::sample_spec());
    std::atomic<int> good{0};
    auto work = [&](int which) {
        bnb_error err = {};
        for (int i = 0; i < 12; i++) {
            if (which == 0) {
                void *p = bnb_alloc(env, 5000, &err);
                good += p != nullptr;
                bnb_free(env, p, 5000);
            } else if (which == 1) {
                File f(bnb_file_from_memory(env, image.bytes.data(), image.bytes.size(), "shared.bnb", &err));
                good += f && bnb_file_verify(f.get(), &err) == BNB_OK && bnb_file_find(f.get(), "nf4.weight");
            } else {
                Ctx ctx(bnb_ctx_create(env, &err));
                const int64_t shape[] = {40, 64};
                bnb_quant q = quant4(BNB_NF4, 64, true);
                bnb_tensor *src = bnb_tensor_new(ctx.get(), BNB_F32, nullptr, 2, shape, "src"), *dst = bnb_tensor_new(ctx.get(), BNB_NF4, &q, 2, shape, "dst");
                Backend cpu(bnb_backend_open(env, "cpu", &err));
                bool ok = !bnb_ctx_alloc(ctx.get(), cpu.get(), &err);
                std::memset(bnb_tensor_plane(src, 0), 0, bnb_tensor_bytes(src));
                good += ok && !bnb_quantize(env, src, dst, BNB_COMPAT_CUDA, &err) && !bnb_dequantize(env, dst, src, &err) && !bnb_tensor_check_finite(env, src, &err);
                ctx.reset(); // before its memory's backend
            }
        }
    };
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; t++) threads.emplace_back(work, t % 3);
    for (std::thread &t : threads) t.join();
    CHECK(good == 48);
    CHECK(bnb_env_bytes(env) == 0);
}

TEST_CASE("threads: one file read by several threads") {
    Env env(1);
    bnb_error err = {};
    Image image(Image::sample_spec());
    File f(bnb_file_from_memory(env, image.bytes.data(), image.bytes.size(), "shared.bnb", &err));
    REQUIRE(f);
    std::atomic<int> good{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; t++)
        threads.emplace_back([&] {
            for (int i = 0; i < 50; i++) {
                int64_t v = 0;
                uint64_t n = 0;
                good += bnb_file_find(f.get(), "int8.weight") && !bnb_file_i64(f.get(), "a.number", &v) && v == -5 && bnb_file_chunk(f.get(), "tokn", &n);
            }
        });
    for (std::thread &t : threads) t.join();
    CHECK(good == 150);
}

TEST_CASE("threads: sessions of one model") {
    Env env(2);
    bnb_error err = {};
    const Image image = tiny_model(BNB_NF4);
    Model model(bnb_model_from_memory(env, image.bytes.data(), image.bytes.size(), nullptr, &err));
    REQUIRE_MESSAGE(model, text(err));
    std::vector<std::vector<int32_t>> said(3);
    auto talk = [&](size_t which) {
        bnb_error e = {};
        int32_t ids[16];
        int64_t n = bnb_tokenize(model.get(), "hello all", 9, BNB_TOKENIZE_SPECIAL, ids, 16, &e);
        Session s(bnb_session_create(model.get(), 0, &e));
        bnb_generate_params p;
        bnb_generate_params_default(&p, sizeof p);
        p.n_predict = 6;
        p.ignore_eos = 1;
        bnb_generate_result r;
        if (!s || n < 1 || bnb_generate(s.get(), ids, n, &p, &r, &e)) return;
        int64_t total = 0;
        const int32_t *tokens = bnb_session_tokens(s.get(), &total);
        said[which].assign(tokens, tokens + total);
    };
    std::vector<std::thread> threads;
    for (size_t t = 0; t < 3; t++) threads.emplace_back(talk, t);
    for (std::thread &t : threads) t.join();
    CHECK(said[0].size() > 6);
    CHECK(said[0] == said[1]);
    CHECK(said[0] == said[2]);
}

TEST_CASE("threads: the progress hook cancels a prompt, and the session goes on") {
    Env env(2);
    bnb_error err = {};
    const Image image = tiny_model(BNB_F32);
    bnb_model_params p;
    bnb_model_params_default(&p, sizeof p);
    p.n_batch = 3;
    Model model(bnb_model_from_memory(env, image.bytes.data(), image.bytes.size(), &p, &err));
    REQUIRE_MESSAGE(model, text(err));
    Session session(bnb_session_create(model.get(), 0, &err));
    REQUIRE(session);
    const std::vector<int32_t> ids = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
    int calls = 0;
    env.on_progress = [&](const char *phase, double fraction) {
        CHECK(std::string(phase) == "prompt");
        CHECK(fraction > 0);
        CHECK(fraction <= 1);
        return ++calls < 2;
    };
    CHECK(bnb_session_sync(session.get(), ids.data(), 11, &err) == BNB_E_CANCELLED);
    CHECK_MESSAGE(is_sentence(err), text(err));
    CHECK(calls == 2);
    int64_t n = 0;
    bnb_session_tokens(session.get(), &n);
    CHECK(n == 6); // what was evaluated
    env.on_progress = nullptr;
    REQUIRE(bnb_session_sync(session.get(), ids.data(), 11, &err) == BNB_OK);
    int64_t n_vocab = 0;
    const float *logits = bnb_session_logits(session.get(), &n_vocab);
    REQUIRE(logits);
    Floats now(logits, logits + n_vocab);
    Session fresh(bnb_session_create(model.get(), 0, &err));
    REQUIRE(bnb_session_sync(fresh.get(), ids.data(), 11, &err) == BNB_OK);
    logits = bnb_session_logits(fresh.get(), &n_vocab);
    CHECK(same_bits(now, Floats(logits, logits + n_vocab)));
}

} // TEST_SUITE
