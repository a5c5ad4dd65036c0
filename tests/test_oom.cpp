// test_oom.cpp: the k-th allocation fails, for every k until nothing fails any more: of the env's allocator, and of
// operator new in models/. Each time the answer is BNB_E_NOMEM with a sentence, nothing leaks, and the next try works.
//
// This file replaces the program's operator new: it is malloc, unless a test here has armed it. The forms that do not throw
// never fail: std::stable_sort and the like have another way when they do.
#include "tiny_model.h"

#include "../models/checkpoint.h"

#include <atomic>
#include <filesystem>
#include <new>

// ---- operator new ----------------------------------------------------------------------------------------------------

namespace {

std::atomic<int64_t> new_fail_at{0}, new_failed{0};

void *new_or_throw(size_t n) {
    bool fails = new_fail_at.load(std::memory_order_relaxed) > 0 && new_fail_at.fetch_sub(1) == 1;
    new_failed += fails;
    void *p = fails ? nullptr : std::malloc(n ? n : 1);
    if (!p) throw std::bad_alloc();
    return p;
}

} // namespace

void *operator new(size_t n) { return new_or_throw(n); }
void *operator new[](size_t n) { return new_or_throw(n); }
void *operator new(size_t n, const std::nothrow_t &) noexcept { return std::malloc(n ? n : 1); }
void *operator new[](size_t n, const std::nothrow_t &) noexcept { return std::malloc(n ? n : 1); }
void operator delete(void *p) noexcept { std::free(p); }
void operator delete[](void *p) noexcept { std::free(p); }
void operator delete(void *p, size_t) noexcept { std::free(p); }
void operator delete[](void *p, size_t) noexcept { std::free(p); }
void operator delete(void *p, const std::nothrow_t &) noexcept { std::free(p); }
void operator delete[](void *p, const std::nothrow_t &) noexcept { std::free(p); }

using namespace test;

namespace {

// ---- failing one after the other -------------------------------------------------------------------------------------

// What a test does; it frees all that it made, whatever happens, and returns the first failure.
using Scenario = std::function<bnb_status(bnb_env *, bnb_error *)>;

void check_outcome(int64_t k, bnb_status status, const bnb_error &err) {
    CAPTURE(k);
    CHECK_MESSAGE(status == BNB_E_NOMEM, status, ": ", text(err));
    CHECK(err.code == BNB_E_NOMEM);
    CHECK_MESSAGE(is_sentence(err), text(err));
}

// Returns how many allocations there are.
int64_t fail_env_allocations(Env &env, const Scenario &scenario, bool on_and_on = false) {
    for (int64_t k = 1;; k++) {
        bnb_error err = {};
        const uint64_t before = bnb_env_bytes(env);
        const size_t blocks = env.memory.n_blocks();
        env.memory.fail(k, on_and_on);
        bnb_status status = scenario(env, &err);
        const int64_t failed = env.memory.n_failed();
        env.memory.fail(0);
        CHECK_MESSAGE(bnb_env_bytes(env) == before, "after the failure of allocation ", k);
        CHECK(env.memory.n_blocks() == blocks);
        if (failed == 0) {
            CHECK_MESSAGE(status == BNB_OK, text(err));
            return k - 1;
        }
        check_outcome(k, status, err);
        if (k % 7 == 0) { // it is no worse for it
            status = scenario(env, &err);
            CHECK_MESSAGE(status == BNB_OK, "after the failure of allocation ", k, ": ", text(err));
        }
        REQUIRE(k < 100000);
    }
}

int64_t fail_new(Env &env, const Scenario &scenario, int64_t every = 400) {
    for (int64_t k = 1;; k += 1 + (k > every) * (k / every)) { // thins out after `every`
        bnb_error err = {};
        const uint64_t before = bnb_env_bytes(env);
        new_failed = 0;
        new_fail_at = k;
        bnb_status status = scenario(env, &err);
        new_fail_at = 0;
        CHECK_MESSAGE(bnb_env_bytes(env) == before, "after the failure of operator new number ", k);
        if (new_failed == 0) {
            CHECK_MESSAGE(status == BNB_OK, text(err));
            return k - 1;
        }
        check_outcome(k, status, err);
        if (k % 50 == 0) {
            status = scenario(env, &err);
            CHECK_MESSAGE(status == BNB_OK, "after the failure of operator new number ", k, ": ", text(err));
        }
        REQUIRE(k < 1000000);
    }
}

// ---- scenarios -------------------------------------------------------------------------------------------------------

// A ctx with many tensors of all types, a graph, a plan, a run. err is what the user would have.
bnb_status run_graph(bnb_env *env, bnb_error *err) {
    static const int32_t types[] = {BNB_F32, BNB_F16, BNB_BF16, BNB_INT8, BNB_NF4, BNB_FP4};
    Backend cpu(bnb_backend_open(env, "cpu", err));
    if (!cpu) return BNB_E_NOMEM;
    Ctx ctx(bnb_ctx_create(env, err));
    if (!ctx) return BNB_E_NOMEM;
    const int64_t C = 64, T = 3, shape[] = {C, C}, rows[] = {T, C};
    bnb_ctx *c = ctx.get();
    bnb_tensor *x = bnb_input(c, BNB_F32, 2, rows, "x"), *y = x, *source = bnb_tensor_new(c, BNB_F32, nullptr, 2, shape, "source"), *w[24];
    for (int i = 0; i < 24; i++) { // more nodes than one block of the arena holds
        bnb_quant q = bnb_quant_default(types[i % 6]);
        q.double_quant = i % 2;
        w[i] = bnb_tensor_new(c, types[i % 6], &q, 2, shape, "w");
        for (int n = 0; n < 6; n++) y = bnb_scale(c, y, 0.9f);
        y = bnb_add(c, bnb_linear(c, y, w[i], nullptr), bnb_columns(c, y, 0, C));
    }
    bnb_graph *g = bnb_graph_create(c, &y, 1, err);
    if (!g) return err->code;
    Plan plan(bnb_plan_create(cpu.get(), g, nullptr, err));
    if (!plan) return err->code;
    bnb_status s = bnb_ctx_alloc(c, cpu.get(), err);
    if (!s) s = bnb_plan_alloc(plan.get(), err);
    static float values[64 * 64], out[3 * 64];
    if (!s) s = bnb_tensor_write(source, 0, values, sizeof values, err);
    for (int i = 0; i < 24 && !s; i++)
        if (bnb_type_is_quantized(types[i % 6])) s = bnb_quantize(env, source, w[i], BNB_COMPAT_CUDA, err);
        else std::memset(bnb_tensor_plane(w[i], 0), 0, bnb_tensor_bytes(w[i]));
    if (!s) s = bnb_plan_profile(plan.get(), 1, err);
    if (!s) s = bnb_tensor_write(x, 0, values, sizeof out, err);
    if (!s) s = bnb_plan_run(plan.get(), err);
    if (!s) s = bnb_tensor_read(y, 0, out, sizeof out, err);
    return s;
}

bnb_status read_file(File file, bnb_error *err) {
    if (!file) return err->code;
    return bnb_file_verify(file.get(), err);
}

bnb_status use_model(bnb_model *raw, bnb_error *err) {
    Model model(raw);
    if (!model) return err->code;
    int32_t ids[32] = {};
    const char prompt[] = "hello hello, world"; // nothing here may use operator new: it is the library's turn to fail
    int64_t n = bnb_tokenize(model.get(), prompt, sizeof prompt - 1, BNB_TOKENIZE_SPECIAL, ids, 32, err);
    if (n < 0) return static_cast<bnb_status>(n);
    CHECK(n > 5);
    CHECK(n < 16);
    bnb_memory memory;
    bnb_status s = bnb_model_memory(model.get(), 8, &memory, err);
    if (s) return s;
    Session session(bnb_session_create(model.get(), 20, err));
    if (!session) return err->code;
    bnb_generate_params p;
    bnb_generate_params_default(&p, sizeof p);
    p.n_predict = 3;
    p.ignore_eos = 1;
    p.sampling.repeat_penalty = 1.1f;
    p.sampling.seed = 3;
    const char *stop[] = {"never"};
    p.stop = stop;
    p.n_stop = 1;
    bnb_generate_result r = {};
    s = bnb_generate(session.get(), ids, n, &p, &r, err);
    if (s) {
        bnb_error again = {}; // the session is in order: the same once more
        bnb_status second = bnb_generate(session.get(), ids, n, &p, &r, &again);
        CHECK_MESSAGE((second == BNB_OK || second == BNB_E_NOMEM), text(again));
        return s;
    }
    CHECK(r.n_generated == 3);
    static float logits[4 * 300];
    bnb_model_info info = {};
    info.struct_size = sizeof info;
    bnb_model_get_info(model.get(), &info);
    CHECK(info.n_vocab <= 300);
    return bnb_session_logits_all(session.get(), ids, 4, logits, err);
}

} // namespace

TEST_SUITE("oom") {

TEST_CASE("oom: an env") {
    for (int32_t threads : {1, 3}) {
        Memory memory;
        bnb_env_params p;
        bnb_env_params_default(&p, sizeof p);
        p.n_threads = threads;
        p.alloc = Memory::hook;
        p.user = &memory;
        int64_t k = 1;
        for (;; k++) {
            bnb_error err = {};
            memory.fail(k);
            bnb_env *env = bnb_env_create(&p, &err);
            int64_t failed = memory.n_failed();
            memory.fail(0);
            bnb_env_free(env);
            CHECK(memory.n_blocks() == 0);
            CHECK(memory.fault() == "");
            if (!failed) {
                CHECK(env);
                break;
            }
            CHECK(!env);
            check_outcome(k, err.code, err);
            memory.fail(k);
            CHECK(bnb_env_create(&p, nullptr) == nullptr);
            memory.fail(0);
        }
        CHECK(k > 1);
    }
}

TEST_CASE("oom: sizes that cannot be") {
    Env env;
    for (size_t n : {SIZE_MAX, SIZE_MAX - 63, SIZE_MAX / 2 + 1, SIZE_MAX / 2, SIZE_MAX / 4}) {
        bnb_error err = {};
        const uint64_t before = bnb_env_bytes(env);
        if (n == SIZE_MAX / 2 || n == SIZE_MAX / 4) env.memory.fail(1); // what a real allocator does
        CHECK(bnb_alloc(env, n, &err) == nullptr);
        CHECK(err.code == BNB_E_NOMEM);
        CHECK_MESSAGE(contains(text(err), std::to_string(n)), text(err));
        CHECK(bnb_env_bytes(env) == before);
        CHECK(bnb_alloc(env, SIZE_MAX, nullptr) == nullptr);
        env.memory.fail(0);
    }
    uint8_t *p = static_cast<uint8_t *>(bnb_alloc(env, 1000, nullptr));
    REQUIRE(p);
    CHECK(reinterpret_cast<uintptr_t>(p) % 64 == 0);
    for (int i = 0; i < 1000; i++) CHECK(p[i] == 0);
    CHECK(bnb_env_bytes(env) == 1000);
    bnb_free(env, p, 1000);
    CHECK(bnb_env_bytes(env) == 0);
    CHECK(bnb_env_bytes_peak(env) >= 1000);
    void *nothing = bnb_alloc(env, 0, nullptr);
    CHECK(nothing);
    bnb_free(env, nothing, 0);
    CHECK(bnb_env_bytes(env) == 0);
}

TEST_CASE("oom: ctx, graph, plan, run") {
    Env env(2);
    CHECK(fail_env_allocations(env, run_graph) > 10);
    CHECK(fail_env_allocations(env, run_graph, true) > 10);
}

TEST_CASE("oom: a plan that found no memory finds it later") {
    Env env;
    bnb_error err = {};
    Net net(env);
    bnb_tensor *x = net.input({1, 4}, {-1, 2, -3, 4}), *y = bnb_relu(net.ctx, x);
    bnb_graph *g = bnb_graph_create(net.ctx, &y, 1, &err);
    REQUIRE(g);
    bnb_backend *cpu = env.cpu();
    for (int64_t k = 1;; k++) { // the graph can be planned after each failure
        env.memory.fail(k);
        net.plan = bnb_plan_create(cpu, g, nullptr, &err);
        env.memory.fail(0);
        if (net.plan) break;
        CHECK(err.code == BNB_E_NOMEM);
    }
    env.memory.fail(1);
    CHECK(bnb_plan_run(net.plan, &err) == BNB_E_NOMEM);
    CHECK_MESSAGE(contains(text(err), std::to_string([&] { bnb_memory m; bnb_plan_memory(net.plan, &m); return m.work; }())), text(err));
    env.memory.fail(0);
    REQUIRE(bnb_plan_alloc(net.plan, &err) == BNB_OK);
    net.set<float>(x, {-1, 2, -3, 4});
    CHECK(bnb_plan_run(net.plan, &err) == BNB_OK);
    CHECK(net.read(y) == Floats{0, 2, 0, 4});
}

TEST_CASE("oom: quantize, dequantize, check") {
    Env env(2);
    for (int32_t type : {BNB_NF4, BNB_FP4, BNB_INT8})
        fail_env_allocations(env, [&](bnb_env *e, bnb_error *err) -> bnb_status {
            static float values[40 * 100];
            static uint8_t codes[4000], statistics[2000], nested[200], map[1024];
            Ctx ctx(bnb_ctx_create(e, err));
            if (!ctx) return err->code;
            const int64_t shape[] = {40, 100};
            bnb_quant q = quant4(type, 32, true);
            bnb_tensor *src = bnb_tensor_new(ctx.get(), BNB_F32, nullptr, 2, shape, "src"), *dst = bnb_tensor_new(ctx.get(), type, &q, 2, shape, "dst");
            if (bnb_ctx_status(ctx.get(), err)) return err->code;
            void *from[BNB_MAX_PLANES] = {values, nullptr, nullptr, nullptr}, *to[BNB_MAX_PLANES] = {codes, statistics, nested, map};
            bnb_status s = bnb_tensor_bind(src, from, err);
            if (!s) s = bnb_tensor_bind(dst, to, err);
            if (!s) s = bnb_quantize(e, src, dst, BNB_COMPAT_CUDA, err);
            if (!s) s = bnb_dequantize(e, dst, src, err);
            if (!s) s = bnb_tensor_check_finite(e, src, err);
            return s;
        });
}

TEST_CASE("oom: opening a file") {
    Env env;
    TempDir dir;
    ImageSpec spec = Image::sample_spec();
    for (int i = 0; i < 200; i++) spec.tensors.push_back({"more." + std::to_string(i), BNB_F32, bnb_quant_default(BNB_F32), {2}});
    Image image(spec);
    const std::string path = dir.file("model.bnb");
    write_bytes(path, image.bytes);
    for (uint32_t flags : {0u, 1u}) {
        CAPTURE(flags);
        CHECK(fail_env_allocations(env, [&](bnb_env *e, bnb_error *err) { return read_file(File(bnb_file_open(e, path.c_str(), flags, err)), err); }) > 4);
    }
    CHECK(fail_env_allocations(env, [&](bnb_env *e, bnb_error *err) { return read_file(File(bnb_file_from_memory(e, image.bytes.data(), image.bytes.size(), "model.bnb", err)), err); }) > 4);
}

TEST_CASE("oom: a model, from its file to three tokens") {
    Env env;
    for (int32_t type : {BNB_F32, BNB_NF4, BNB_INT8}) {
        CAPTURE(type_name(type));
        const Image image = tiny_model(type);
        auto scenario = [&](bnb_env *e, bnb_error *err) { return use_model(bnb_model_from_memory(e, image.bytes.data(), image.bytes.size(), nullptr, err), err); };
        bnb_error err = {};
        REQUIRE_MESSAGE(scenario(env, &err) == BNB_OK, text(err));
        CHECK(fail_env_allocations(env, scenario) > 30);
        if (type == BNB_NF4) CHECK(fail_new(env, scenario) > 100);
    }
    TempDir dir;
    const Image image = tiny_model(BNB_F16);
    const std::string path = dir.file("tiny.bnb");
    write_bytes(path, image.bytes);
    bnb_model_params p;
    bnb_model_params_default(&p, sizeof p);
    p.no_mmap = 1;
    p.n_batch = 4; // a prompt in several pieces
    auto scenario = [&](bnb_env *e, bnb_error *err) { return use_model(bnb_model_open(e, path.c_str(), &p, err), err); };
    CHECK(fail_env_allocations(env, scenario, true) > 30);
    CHECK(fail_new(env, scenario, 100) > 100);
}

TEST_CASE("oom: a Hugging Face directory, quantized on the way") {
    const char source[] = "tests/golden/models/gpt2";
    if (::access(source, R_OK)) {
        MESSAGE("not found: ", std::string(source), "; the tests run in the repository's root");
        return;
    }
    Env env(2);
    TempDir dir;
    const std::string target = dir.file("converted.bnb");
    bnb_load_params p;
    bnb_load_params_default(&p, sizeof p);
    p.type = BNB_NF4;
    p.double_quant = 1;
    auto load = [&](bnb_env *e, bnb_error *err) -> bnb_status {
        Model model(bnb_model_load(e, source, &p, nullptr, err));
        return model ? bnb_status{BNB_OK} : err->code;
    };
    auto convert = [&](bnb_env *e, bnb_error *err) -> bnb_status {
        bnb_convert_result r;
        return bnb_convert_checkpoint(e, source, target.c_str(), &p, nullptr, &r, err);
    };
    CHECK(fail_env_allocations(env, load) > 10);
    auto write_directory = [&](bnb_env *e, bnb_error *err) -> bnb_status {
        bnb_save_params save;
        bnb_save_params_default(&save, sizeof save);
        save.format = BNB_FORMAT_HF;
        const bnb_status status = bnb_convert_checkpoint(e, source, dir.file("hf").c_str(), &p, &save, nullptr, err);
        std::filesystem::remove_all(dir.file("hf")); // only what succeeded is there
        return status;
    };
    CHECK(fail_env_allocations(env, convert) > 10);
    CHECK(fail_env_allocations(env, write_directory) > 10);
    // operator new is left alone here: destructors of nlohmann::json allocate, and a destructor that throws ends the process
    CHECK(TempDir::list(dir.file("")).size() == 1); // no temporary file was left
    bnb_error err = {};
    File f(bnb_file_open(env, target.c_str(), 0, &err));
    REQUIRE_MESSAGE(f, text(err));
    CHECK(bnb_file_verify(f.get(), &err) == BNB_OK);
}

} // TEST_SUITE
