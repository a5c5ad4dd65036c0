// test_abi.cpp: the headers in every language they are promised for, numbers that are frozen, and structs of older programs.
#include "tiny_model.h"

#include "../models/checkpoint.h"

using namespace test;

// tests/abi.c, compiled as C. Weak: a build that forgot it fails this suite and not the linker.
extern "C" {
double bnb_abi_first_program(void) __attribute__((weak));
int bnb_abi_version(void) __attribute__((weak));
size_t bnb_abi_sizes(size_t *sizes, size_t cap) __attribute__((weak));
}

namespace {

// Runs a command; its output, and whether it succeeded.
bool shell(const std::string &command, std::string *output) {
    FILE *p = ::popen((command + " 2>&1").c_str(), "r");
    if (!p) return false;
    char buffer[512];
    while (size_t n = std::fread(buffer, 1, sizeof buffer, p)) output->append(buffer, n);
    return ::pclose(p) == 0;
}

} // namespace

TEST_SUITE("abi") {

TEST_CASE("abi: ids, names and bits never change") {
    struct Type {
        int32_t id;
        const char *name;
        int32_t bits;
        bool quantized;
    };
    const std::vector<Type> types = {{0, "f32", 32, false}, {1, "f16", 16, false}, {2, "bf16", 16, false}, {3, "i32", 32, false}, {4, "i8", 8, false},
                                     {5, "u8", 8, false},   {8, "int8", 8, true},  {9, "nf4", 4, true},     {10, "fp4", 4, true},
                                     {11, "int8_kv", 8, false}};
    int known = 0;
    for (int32_t id = -3; id < 300; id++) known += bnb_type_name(id) != nullptr;
    CHECK(known == static_cast<int>(types.size())); // a new type is a new line here
    for (const Type &t : types) {
        CAPTURE(std::string(t.name));
        REQUIRE(bnb_type_name(t.id));
        CHECK(std::string(bnb_type_name(t.id)) == t.name);
        CHECK(bnb_type_bits(t.id) == t.bits);
        CHECK(bnb_type_from_name(t.name) == t.id);
        CHECK((bnb_type_is_quantized(t.id) != 0) == t.quantized);
    }
    for (int32_t id : {-1, 6, 7, 12, 1000, INT32_MAX, INT32_MIN}) {
        CHECK(bnb_type_name(id) == nullptr);
        CHECK(bnb_type_bits(id) == 0);
        CHECK(bnb_type_is_quantized(id) == 0);
    }
    for (const char *name : {"", "F32", "nf", "nf44", "float32"}) CHECK(bnb_type_from_name(name) == -1);
    CHECK(bnb_type_from_name(nullptr) == -1);

    const std::vector<std::string> ops = {"none", "embed", "linear", "layer_norm", "rms_norm", "add", "mul", "scale", "gelu", "gelu_tanh", "relu", "silu", "softmax", "set_rows", "attention", "columns", "argmax", "draw"};
    CHECK(ops.size() == BNB_OP_COUNT);
    for (size_t i = 0; i < ops.size(); i++) CHECK(op_name(static_cast<int32_t>(i)) == ops[i]);
}

TEST_CASE("abi: the code maps never change") {
    const uint32_t nf4[16] = {0xBF800000, 0xBF3239B1, 0xBF066B30, 0xBECA32A0, 0xBE91A24D, 0xBE3D353F, 0xBDBA7871, 0x00000000,
                              0x3DA2FAFF, 0x3E24CAE3, 0x3E7C04DD, 0x3EAD033A, 0x3EE1A4B8, 0x3F1007AB, 0x3F3913B3, 0x3F800000};
    const uint32_t fp4[16] = {0x00000000, 0x3BAAAAAB, 0x3F2AAAAB, 0x3F800000, 0x3EAAAAAB, 0x3F000000, 0x3E2AAAAB, 0x3E800000,
                              0x80000000, 0xBBAAAAAB, 0xBF2AAAAB, 0xBF800000, 0xBEAAAAAB, 0xBF000000, 0xBE2AAAAB, 0xBE800000};
    CHECK(std::memcmp(bnb_nf4_map, nf4, sizeof nf4) == 0);
    CHECK(std::memcmp(bnb_fp4_map, fp4, sizeof fp4) == 0);
}

TEST_CASE("abi: bitsandbytes' defaults") {
    bnb_quant q = bnb_quant_default(BNB_NF4), i = bnb_quant_default(BNB_INT8);
    CHECK(q.blocksize == 64);
    CHECK(q.double_quant == 0);
    CHECK(q.nested_blocksize == 256);
    CHECK(i.threshold == 6.0f);
    CHECK(i.outlier_rule == BNB_OUTLIER_COLUMN);
}

TEST_CASE("abi: C and C++ agree, and the first program of bnb.h runs as C") {
    const size_t want[] = {sizeof(bnb_error),       sizeof(bnb_env_params), sizeof(bnb_quant),           sizeof(bnb_plan_params),
                           sizeof(bnb_memory),      sizeof(bnb_tensor),     sizeof(bnb_backend_api),     sizeof(bnb_model_params),
                           sizeof(bnb_model_info),  sizeof(bnb_sampling),   sizeof(bnb_generate_params), sizeof(bnb_generate_result),
                           sizeof(bnb_load_params), sizeof(bnb_convert_result)};
    size_t got[32] = {};
    REQUIRE_MESSAGE(bnb_abi_sizes, "tests/abi.c is not linked into this program");
    REQUIRE(bnb_abi_sizes(got, 32) == sizeof want / sizeof want[0]);
    for (size_t i = 0; i < sizeof want / sizeof want[0]; i++) CHECK_MESSAGE(got[i] == want[i], i);
    CHECK(bnb_abi_version() == BNB_API_VERSION);
    double sum = bnb_abi_first_program();
    CHECK(sum == doctest::Approx(128).epsilon(1e-5));
}

TEST_CASE("abi: the headers compile as C99, C11 and C++11") {
    std::string out;
    const bool c = shell("cc --version", &out), cxx = shell("c++ --version", &out);
    if (!c || !cxx) {
        MESSAGE("there is no compiler here to try the headers with");
        return;
    }
    for (const char *command : {"cc -std=c99", "cc -std=c11", "cc -std=c2x", "c++ -std=c++11 -x c++", "c++ -std=c++17 -x c++"}) {
        out.clear();
        CAPTURE(std::string(command));
        bool ok = shell(std::string(command) + " -fsyntax-only -Wall -Wextra -pedantic-errors -Werror tests/abi.c", &out);
        CHECK_MESSAGE(ok, out);
        for (const char *header : {"bnb.h", "models/model.h", "models/checkpoint.h"}) { // each alone, with nothing before it
            out.clear();
            ok = shell("echo '#include \"" + std::string(header) + "\"' | " + command + (command[1] == 'c' ? " -x c" : "") + " -I. -fsyntax-only -Wall -Wextra -pedantic-errors -Werror -", &out);
            CHECK_MESSAGE(ok, header, ": ", out);
        }
    }
}

TEST_CASE("abi: the structs of older and newer programs") {
    // env: a program that knew only n_threads
    bnb_error err = {};
    struct {
        uint32_t struct_size;
        int32_t n_threads;
        uint8_t behind[200];
    } old_env;
    std::memset(&old_env, 0x5a, sizeof old_env);
    bnb_env_params_default(reinterpret_cast<bnb_env_params *>(&old_env), 8);
    CHECK(old_env.struct_size == 8);
    CHECK(old_env.n_threads == 0);
    for (uint8_t b : old_env.behind) CHECK(b == 0x5a); // nothing behind its end is written, or read
    old_env.n_threads = 2;
    bnb_env *env = bnb_env_create(reinterpret_cast<bnb_env_params *>(&old_env), &err);
    REQUIRE_MESSAGE(env, text(err));
    CHECK(bnb_env_threads(env) == 2);

    // plan: one that knew compute_dtype
    struct {
        uint32_t struct_size;
        int32_t compute_dtype;
        int32_t behind;
    } old_plan = {0, 0, 0x5a5a5a5a};
    bnb_plan_params_default(reinterpret_cast<bnb_plan_params *>(&old_plan), 8);
    CHECK(old_plan.struct_size == 8);
    CHECK(old_plan.compute_dtype == BNB_COMPUTE_AUTO);
    CHECK(old_plan.behind == 0x5a5a5a5a);
    Ctx ctx(bnb_ctx_create(env, &err));
    const int64_t shape[] = {1, 4};
    bnb_tensor *y = bnb_relu(ctx.get(), bnb_input(ctx.get(), BNB_F32, 2, shape, "x"));
    bnb_graph *g = bnb_graph_create(ctx.get(), &y, 1, &err);
    bnb_backend *cpu = bnb_backend_open(env, "cpu", &err);
    Plan plan(bnb_plan_create(cpu, g, reinterpret_cast<bnb_plan_params *>(&old_plan), &err));
    CHECK_MESSAGE(plan, text(err));
    plan.reset();
    ctx.reset();

    // a newer program: its struct is longer than ours
    struct {
        bnb_env_params known;
        uint8_t unknown[64];
    } new_env;
    std::memset(&new_env, 0x77, sizeof new_env);
    bnb_env_params_default(&new_env.known, sizeof new_env);
    CHECK(new_env.known.struct_size == sizeof new_env);
    CHECK(new_env.known.n_threads == 0);
    new_env.known.n_threads = 1;
    bnb_env *env2 = bnb_env_create(&new_env.known, &err);
    REQUIRE_MESSAGE(env2, text(err));
    bnb_env_free(env2);

    // models/
    const Image image = tiny_model(BNB_F32);
    struct {
        uint32_t struct_size;
        int32_t no_mmap;
        uint8_t behind[100];
    } old_model;
    std::memset(&old_model, 0x5a, sizeof old_model);
    bnb_model_params_default(reinterpret_cast<bnb_model_params *>(&old_model), 8);
    CHECK(old_model.struct_size == 8);
    for (uint8_t b : old_model.behind) CHECK(b == 0x5a);
    Model model(bnb_model_from_memory(env, image.bytes.data(), image.bytes.size(), reinterpret_cast<bnb_model_params *>(&old_model), &err));
    REQUIRE_MESSAGE(model, text(err));
    struct {
        uint32_t struct_size;
        char arch[32];
        uint8_t behind[200];
    } old_info;
    std::memset(&old_info, 0x5a, sizeof old_info);
    old_info.struct_size = 36;
    bnb_model_get_info(model.get(), reinterpret_cast<bnb_model_info *>(&old_info));
    CHECK(old_info.struct_size == 36);
    CHECK(std::string(old_info.arch) == "gpt2");
    for (uint8_t b : old_info.behind) CHECK(b == 0x5a);
    struct {
        uint32_t struct_size;
        float temp;
        uint8_t behind[100];
    } old_sampling;
    std::memset(&old_sampling, 0x5a, sizeof old_sampling);
    bnb_sampling_default(reinterpret_cast<bnb_sampling *>(&old_sampling), 8);
    for (uint8_t b : old_sampling.behind) CHECK(b == 0x5a);
    old_sampling.temp = 0;
    const float logits[] = {1, 3, 2};
    CHECK(bnb_sample(logits, 3, reinterpret_cast<bnb_sampling *>(&old_sampling), nullptr, 0, 0, &err) == 1);
    model.reset();
    bnb_env_free(env);
}

TEST_CASE("abi: fail fills the error, cuts long messages, and takes NULL") {
    bnb_error err = {};
    CHECK(bnb_fail(&err, BNB_E_IO, "%s is %d", "x", 5) == BNB_E_IO);
    CHECK(err.code == BNB_E_IO);
    CHECK(text(err) == "x is 5");
    const std::string long_text(2000, 'y');
    CHECK(bnb_fail(&err, BNB_E_ARG, "%s", long_text.c_str()) == BNB_E_ARG);
    CHECK(text(err).size() < sizeof err.msg);
    CHECK(text(err) == long_text.substr(0, text(err).size()));
    CHECK(bnb_fail(nullptr, BNB_E_LIMIT, "%d", 1) == BNB_E_LIMIT);
}

TEST_CASE("abi: log and progress reach their hooks") {
    Env env;
    std::vector<std::string> lines;
    env.on_log = [&](int32_t level, const char *line) { lines.push_back(std::to_string(level) + " " + line); };
    bnb_log(env, BNB_LOG_WARN, "%d of %s", 3, "them");
    bnb_log(env, BNB_LOG_DEBUG, "%s", std::string(3000, 'z').c_str());
    REQUIRE(lines.size() == 2);
    CHECK(lines[0] == "2 3 of them");
    CHECK(lines[1].size() > 100);
    env.on_progress = [&](const char *phase, double fraction) { return std::string(phase) == "go" && fraction < 0.5; };
    CHECK(bnb_progress(env, "go", 0.25) != 0);
    CHECK(bnb_progress(env, "go", 0.75) == 0);
    bnb_env *silent = bnb_env_create(nullptr, nullptr);
    REQUIRE(silent);
    bnb_log(silent, BNB_LOG_ERROR, "nobody hears this");
    CHECK(bnb_progress(silent, "go", 1) != 0);
    bnb_env_free(silent);
}

} // TEST_SUITE
