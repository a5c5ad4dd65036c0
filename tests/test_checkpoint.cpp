// test_checkpoint.cpp: safetensors files, Hugging Face directories, quantizing them, the .bnb writer, synthetic models.
//
// What weights quantize to is tested elsewhere; here each tensor must be what bnb_quantize makes of the right numbers
// in the right layout. Hostile files: the tables below, and those in attacks/ (see make_attacks.py).
#include <doctest/doctest.h>

#include <csignal>
#include <sys/resource.h>
#include <sys/stat.h>

#include "../models/arch.h"
#include "../models/bnb_writer.h"
#include "../models/checkpoint.h"
#include "../models/safetensors.h"
#include "safetensors_image.h"
#include "util.h"

#ifndef BNB_SOURCE_DIR
#define BNB_SOURCE_DIR "."
#endif

namespace {

using namespace test;

// ---- a GPT-2 that is small enough to look at ------------------------------------------------------------------------

Floats transposed(const Floats &w, int64_t rows, int64_t columns) {
    Floats out(w.size());
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) out[size_t(c * rows + r)] = w[size_t(r * columns + c)];
    return out;
}

struct Tiny {
    bool conv1d = true, config = true, tied = true, lm_head = false, lm_head_differs = false;
    std::string prefix = "transformer.", more_config;
    int32_t type = BNB_F32;
    int64_t V = 29, P = 8, C = 64, L = 2, F = 256, H = 2;
    std::map<std::string, Floats> values; // canonical name -> [out, in]

    std::vector<Stored> tensors() {
        const bnb::Arch &arch = *bnb::arch_find("gpt2");
        bnb::Config c;
        c.n_vocab = V, c.n_ctx = P, c.n_embd = C, c.n_layer = L, c.n_head = H, c.n_ff = F, c.tied = !lm_head;
        std::vector<Stored> list;
        Rng rng(7);
        for (const bnb::TensorInfo &t : arch.tensors(c)) {
            Floats &v = values[t.name] = rng.normals(count(t.shape), 0.1);
            if (type != BNB_F32) { // what the file will hold
                const Bytes rounded = as_type(type, v);
                REQUIRE(bnb_convert(type, rounded.data(), BNB_F32, v.data(), int64_t(v.size()), nullptr) == BNB_OK);
            }
            if (t.name == "lm_head.weight" && !lm_head_differs) v = values["wte.weight"];
            const bool turn = conv1d && arch.may_be_transposed(t.name);
            const Shape shape = turn ? Shape{t.shape[1], t.shape[0]} : t.shape;
            list.push_back(stored((t.name == "lm_head.weight" ? "" : prefix) + t.name, shape,
                                  turn ? transposed(v, t.shape[0], t.shape[1]) : v, type));
        }
        return list;
    }
    std::string config_json() const {
        return "{\"model_type\":\"gpt2\",\"n_embd\":" + std::to_string(C) + ",\"n_layer\":" + std::to_string(L) +
               ",\"n_head\":" + std::to_string(H) + ",\"n_positions\":" + std::to_string(P) +
               ",\"vocab_size\":" + std::to_string(V) + (tied ? "" : ",\"tie_word_embeddings\":false") + more_config +
               "}";
    }
    void write(const TempDir &dir) { write(dir, tensors()); }
    void write(const TempDir &dir, const std::vector<Stored> &list) {
        write_bytes(dir.file("model.safetensors"), safetensors(list));
        if (config) write_bytes(dir.file("config.json"), bytes_of(config_json()));
    }
};

File converted(Env &env, const std::string &src, const std::string &dst, const bnb_load_params &load) {
    bnb_error err = {};
    const bnb_status status = convert(env, src, dst, load, &err);
    REQUIRE_MESSAGE(status == BNB_OK, err.msg);
    return open_file(env, dst);
}

// What a tensor should be: the values, rounded to `cast`, then quantized as `like` is.
void check_quantized(Env &env, const bnb_tensor *like, const Floats &values, int32_t cast, int32_t compat) {
    REQUIRE(like);
    bnb_error err = {};
    Ctx ctx(bnb_ctx_create(env, &err));
    bnb_tensor *source = bnb_tensor_new(ctx.get(), cast, nullptr, like->n_dims, like->shape, "source");
    bnb_tensor *wanted = bnb_tensor_new(ctx.get(), like->type, &like->quant, like->n_dims, like->shape, like->name);
    REQUIRE(bnb_ctx_alloc(ctx.get(), env.cpu(), &err) == BNB_OK);
    REQUIRE(bnb_convert(BNB_F32, values.data(), cast, bnb_tensor_plane(source, 0), int64_t(values.size()), &err) ==
            BNB_OK);
    REQUIRE(bnb_quantize(env, source, wanted, compat, &err) == BNB_OK);
    CHECK(like->quant.dtype == cast);
    check_same_tensor(like, wanted);
}

void check_plain(const bnb_tensor *t, const Floats &values, int32_t type) {
    REQUIRE(t);
    INFO(t->name);
    CHECK(t->type == type);
    CHECK(planes_of(t) == std::vector<Bytes>{as_type(type, values)});
}

bool is_linear(const std::string &name) { return bnb::arch_find("gpt2")->may_be_transposed(name); }

int64_t number(const File &f, const char *key) {
    int64_t v = -99;
    CHECK(bnb_file_i64(f.get(), key, &v) == BNB_OK);
    return v;
}

} // namespace

TEST_SUITE_BEGIN("checkpoint");

// ---- safetensors ---------------------------------------------------------------------------------------------------

TEST_CASE("safetensors: what the format allows is read") {
    const Floats x = {1, 2, 3, 4, 5, 6};
    std::vector<Stored> tensors = {stored("a", {2, 3}, x),         stored("b", {}, {7}, BNB_F16),
                                   {"c", "I64", {0}, {}},          {"d", "F8_E4M3", {3}, {1, 2, 3}},
                                   {"e", "F4", {2, 3}, {1, 2, 3}}, {"", "BOOL", {1}, {1}}};
    bnb_error err = {};
    for (const std::string pad : {"", " ", "\n  ", "       "}) { // with some of them the data begin at odd bytes
        const Bytes file = safetensors(tensors, pad);
        std::vector<bnb::SourceTensor> got;
        REQUIRE_MESSAGE(bnb::safetensors_parse(file.data(), file.size(), "x", &got, &err), err.msg);
        REQUIRE(got.size() == tensors.size());
        for (size_t i = 0; i < got.size(); i++) {
            CHECK(got[i].name == tensors[i].name);
            CHECK(got[i].dtype == tensors[i].dtype);
            CHECK(got[i].shape == tensors[i].shape);
            CHECK(Bytes(static_cast<const uint8_t *>(got[i].data),
                        static_cast<const uint8_t *>(got[i].data) + got[i].bytes) == tensors[i].bytes);
        }
        CHECK(got[0].type == BNB_F32);
        CHECK(got[1].type == BNB_F16);
        CHECK(got[2].type == -1);
    }
    for (const std::string header :
         {"{}", "  {}", "{}  ", "{\"__metadata__\":{}}",
          R"({"x":{"dtype":"F32","shape":[0,1099511627776,1099511627776],"data_offsets":[0,0]}})",
          R"({"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"more":{"a":[1,{"b":-1.5}],"c":null}}})",
          R"({"\u00e9":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}})"}) {
        const Bytes file = raw_file(header, 0);
        std::vector<bnb::SourceTensor> got;
        CHECK_MESSAGE(bnb::safetensors_parse(file.data(), file.size(), "x", &got, &err), header << ": " << err.msg);
    }
}

TEST_CASE("safetensors: each broken rule is refused by name") {
    const std::string f32 = R"("dtype":"F32","shape":[2],"data_offsets":[0,8])";
    const auto one = [](const std::string &fields) { return "{\"x\":{" + fields + "}}"; };
    std::string deep = "0", many_dims = "1";
    for (int i = 0; i < 100; i++) deep = "[" + deep + "]";
    for (int i = 0; i < 9; i++) many_dims += ",1";
    const struct {
        std::string header;
        size_t data;
        const char *words;
    } cases[] = {
        {std::string("{\"x\xff\":{") + f32 + "}}", 8, "not valid UTF-8 text at byte 3"},
        {std::string("{\"x\xed\xa0\x80\":{") + f32 + "}}", 8, "not valid UTF-8"},
        {std::string("{\"x\xc0\xaf\":{") + f32 + "}}", 8, "not valid UTF-8"},
        {std::string("{}\0{}", 5), 0, "not valid UTF-8"},
        {"\xEF\xBB\xBF{}", 0, "byte order mark"},
        {"", 0, "not valid JSON"},
        {"   ", 0, "not valid JSON"},
        {"{", 0, "not valid JSON"},
        {"{}x", 0, "not valid JSON"},
        {"{\"x\":{" + f32 + "},}", 8, "not valid JSON"},
        {"{\"x\":{" + f32 + "} // comment\n}", 8, "not valid JSON"},
        {"[]", 0, "not a JSON object"},
        {"7", 0, "not a JSON object"},
        {"{\"x\":7}", 0, "no object"},
        {"{\"x\":[]}", 0, "no object"},
        {"{\"x\":null}", 0, "no object"},
        {"{\"__metadata__\":7}", 0, "__metadata__ that is not an object"},
        {"{\"__metadata__\":{\"a\":7}}", 0, "not a string"},
        {"{\"__metadata__\":{\"a\":{}}}", 0, "not a string"},
        {"{\"__metadata__\":{\"a\":[]}}", 0, "not a string"},
        {"{\"__metadata__\":{},\"__metadata__\":{}}", 0, "two __metadata__"},
        {one(R"("shape":[2],"data_offsets":[0,8])"), 8, "lacks the dtype of 'x'"},
        {one(R"("dtype":"F32","data_offsets":[0,8])"), 8, "lacks the shape of 'x'"},
        {one(R"("dtype":"F32","shape":[2])"), 8, "lacks the two data_offsets of 'x'"},
        {one(R"("dtype":"F32","shape":[2],"data_offsets":[0])"), 8, "lacks the two data_offsets"},
        {one(R"("dtype":"F32","shape":[2],"data_offsets":[0,8,8])"), 8, "more than two data_offsets"},
        {one(R"("dtype":"F32","shape":2,"data_offsets":[0,8])"), 8, "a shape that is not"},
        {one(R"("dtype":"F32","shape":{},"data_offsets":[0,8])"), 8, "a shape that is not"},
        {one(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])"), 8, "a shape that is not"},
        {one(R"("dtype":"F32","shape":[2.0],"data_offsets":[0,8])"), 8, "a shape that is not"},
        {one(R"("dtype":"F32","shape":["2"],"data_offsets":[0,8])"), 8, "a shape that is not"},
        {one(R"("dtype":"F32","shape":[[2]],"data_offsets":[0,8])"), 8, "a shape that is not"},
        {one(R"("dtype":"F32","shape":[36893488147419103234],"data_offsets":[0,8])"), 8, "a shape that is not"},
        {one(R"("dtype":"F32","shape":[2],"data_offsets":[-1,8])"), 8, "data_offsets that are not"},
        {one(R"("dtype":"F32","shape":[2],"data_offsets":[0,1e1])"), 8, "data_offsets that are not"},
        {one(R"("dtype":7,"shape":[2],"data_offsets":[0,8])"), 8, "a dtype that is not a string"},
        {one(R"("dtype":["F32"],"shape":[2],"data_offsets":[0,8])"), 8, "a dtype that is not a string"},
        {one(R"("dtype":"F33","shape":[2],"data_offsets":[0,8])"), 8, "unknown dtype 'F33'"},
        {one(R"("dtype":"f32","shape":[2],"data_offsets":[0,8])"), 8, "unknown dtype 'f32'"},
        {one(f32 + R"(,"dtype":"F32")"), 8, "two dtype"},
        {one(f32 + R"(,"shape":[2])"), 8, "two shape"},
        {one(f32 + R"(,"data_offsets":[0,8])"), 8, "two data_offsets"},
        {one(f32 + ",\"more\":" + deep), 8, "nested too deep"},
        {one(R"("dtype":"F32","shape":[)" + many_dims + R"(],"data_offsets":[0,4])"), 4, "more than 8 dimensions"},
        {"{\"x\":{" + f32 + "},\"x\":{" + f32 + "}}", 8, "lists 'x' twice"},
        {"{\"x\\u0000y\":{" + f32 + "}}", 8, "NUL byte"},
        {"{\"" + std::string(1025, 'n') + "\":{" + f32 + "}}", 8, "more than 1024 bytes"},
        {one(R"("dtype":"F32","shape":[2],"data_offsets":[4,12])"), 12, "there is a hole"},
        {"{\"x\":{" + f32 + R"(},"y":{"dtype":"F32","shape":[2],"data_offsets":[12,20]}})", 20, "there is a hole"},
        {"{\"x\":{" + f32 + R"(},"y":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})", 12, "it overlaps another"},
        {"{\"x\":{" + f32 + R"(},"y":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8, "it overlaps another"},
        {one(R"("dtype":"F32","shape":[0],"data_offsets":[0,-0])"), 0, "data_offsets that are not"},
        {"{\"x\":{" + f32 + R"(},"y":{"dtype":"F32","shape":[0],"data_offsets":[8,4]}})", 8,
         "its end is before its begin"},
        {one(R"("dtype":"F32","shape":[1099511627776,1099511627776,0],"data_offsets":[0,0])"), 0, "overflows"},
        {one(R"("dtype":"F32","shape":[4611686018427387904,2],"data_offsets":[0,0])"), 0, "overflows"},
        {one(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])"), 8, "shape [3] and dtype F32 needs 96 bits"},
        {one(R"("dtype":"F4","shape":[3],"data_offsets":[0,2])"), 2, "needs 12 bits"},
        {one(R"("dtype":"F6_E2M3","shape":[3],"data_offsets":[0,3])"), 3, "needs 18 bits"},
        {one(f32), 7, "7 bytes are there"},
        {one(f32), 9, "9 bytes are there"},
        {"{}", 1, "1 bytes are there"},
    };
    for (const auto &c : cases) {
        const Bytes file = raw_file(c.header, c.data);
        std::vector<bnb::SourceTensor> got;
        bnb_error err = {};
        CHECK_FALSE_MESSAGE(bnb::safetensors_parse(file.data(), file.size(), "dir/model.safetensors", &got, &err),
                            c.header);
        CHECK(err.code == BNB_E_FORMAT);
        CHECK(is_sentence(err));
        CHECK_MESSAGE(contains(err.msg, "dir/model.safetensors: "), err.msg);
        CHECK_MESSAGE(contains(err.msg, c.words), "'" << err.msg << "' lacks '" << c.words << "'");
    }
}

TEST_CASE("safetensors: a cut file and a lying header length are refused") {
    const Bytes whole = safetensors({stored("weight", {2, 2}, {1, 2, 3, 4}), stored("bias", {2}, {5, 6})});
    for (size_t n = 0; n < whole.size(); n++) {
        const Bytes cut(whole.begin(), whole.begin() + ptrdiff_t(n)); // a copy: reading beyond it shows
        std::vector<bnb::SourceTensor> got;
        bnb_error err = {};
        CHECK_FALSE(bnb::safetensors_parse(cut.data(), cut.size(), "x", &got, &err));
        CHECK(is_sentence(err));
        if (n < 8) CHECK(contains(err.msg, "too few"));
    }
    for (uint64_t n : {uint64_t{100000001}, UINT64_MAX, UINT64_MAX - 7, uint64_t{100000000}, uint64_t(whole.size()),
                       uint64_t(whole.size() - 7)}) {
        Bytes file = whole;
        memcpy(file.data(), &n, 8);
        std::vector<bnb::SourceTensor> got;
        bnb_error err = {};
        CHECK_FALSE(bnb::safetensors_parse(file.data(), file.size(), "x", &got, &err));
        CHECK(contains(err.msg, n > 100000000 ? "at most 100000000" : "ends after"));
    }
}

TEST_CASE("safetensors: messages stay one printable sentence whatever the names are") {
    const std::string bad = "{\"a\\n\\u0007\\u001b[31m" + std::string(900, 'x') + "\":{\"dtype\":\"F99\"}}";
    const Bytes file = raw_file(bad, 0);
    std::vector<bnb::SourceTensor> got;
    bnb_error err = {};
    CHECK_FALSE(bnb::safetensors_parse(file.data(), file.size(), "/" + std::string(600, 'p') + "\n/\xff.safetensors",
                                       &got, &err));
    CHECK(is_sentence(err));
    CHECK(contains(err.msg, "unknown dtype 'F99'"));
    CHECK(contains(err.msg, "?.safetensors"));
    for (const char *p = err.msg; *p; p++) CHECK(static_cast<unsigned char>(*p) >= 0x20);
}

// ---- directories and shards ----------------------------------------------------------------------------------------

TEST_CASE("checkpoint: shards are found through their index, and only beside it") {
    Env env;
    Tiny tiny;
    const std::vector<Stored> all = tiny.tensors();
    const std::string map = [&] {
        std::string s;
        for (size_t i = 0; i < all.size(); i++)
            s += (s.empty() ? "" : ",") + ("\"" + all[i].name + "\":\"part-" + (i % 2 ? "b" : "a") + ".safetensors\"");
        return "{" + s + "}";
    }();
    std::vector<Stored> a, b;
    for (size_t i = 0; i < all.size(); i++) (i % 2 ? b : a).push_back(all[i]);
    TempDir dir;
    write_bytes(dir.file("part-a.safetensors"), safetensors(a));
    write_bytes(dir.file("config.json"), bytes_of(tiny.config_json()));
    const std::string index = dir.file("model.safetensors.index.json");
    const auto write_index = [&](const std::string &json) { write_bytes(index, bytes_of(json)); };
    write_index("{\"metadata\":{\"total_size\":1},\"weight_map\":" + map + "}");
    check_refused(env, dir.file(""), BNB_E_IO, "part-b.safetensors cannot be opened");

    write_bytes(dir.file("part-b.safetensors"), safetensors(b));
    loaded(env, dir.file(""));
    loaded(env, index); // the index itself
    write_index(map);   // accelerate: without the weight_map level
    loaded(env, dir.file(""));

    std::vector<std::string> warnings;
    env.on_log = [&](int32_t level, const char *line) {
        if (level >= BNB_LOG_WARN) warnings.push_back(line);
    };
    b.push_back(stored("extra", {1}, {1}));
    write_bytes(dir.file("part-b.safetensors"), safetensors(b));
    loaded(env, dir.file(""));
    REQUIRE(warnings.size() == 1);
    CHECK(contains(warnings[0], "part-b.safetensors: 'extra' is not in the index"));

    write_index(map.substr(0, map.size() - 1) + ",\"ghost\":\"part-a.safetensors\"}");
    check_refused(env, dir.file(""), BNB_E_FORMAT, "the index says that 'ghost' is in this file");
    for (const char *name :
         {"../part-a.safetensors", "/etc/passwd", "sub/x", "..", ".", "", "a\\\\b", "x\\u0000.safetensors"}) {
        write_index(std::string("{\"weight_map\":{\"x\":\"") + name + "\"}}");
        check_refused(env, dir.file(""), BNB_E_FORMAT, "not the plain name of a file");
    }
    for (const char *json : {"[]", "{\"weight_map\":[]}", "{\"weight_map\":{\"x\":7}}", "{\"a\":{}}"}) {
        write_index(json);
        check_refused(env, dir.file(""), BNB_E_FORMAT,
                      contains(json, "x") || contains(json, "a\":{}") ? "not mapped to a file name" : "not an object");
    }
    write_index("{\"weight_map\":{\"x\":\"config.json\"}}");
    check_refused(env, dir.file(""), BNB_E_FORMAT, "config.json: not a safetensors file");
}

TEST_CASE("checkpoint: what is no safetensors checkpoint is named") {
    Env env;
    const std::string tar = std::string(257, 'x') + "ustar" + std::string(300, 0);
    const struct {
        std::string bytes;
        const char *words;
    } files[] = {
        {"GGUF\3\0\0\0", "a GGUF file"},
        {tar, "a tar file"},
    };
    for (const auto &f : files) {
        TempDir dir;
        write_bytes(dir.file("weights"), bytes_of(f.bytes));
        check_refused(env, dir.file("weights"), BNB_E_UNSUPPORTED, f.words);
    }
    const struct {
        const char *file;
        bnb_status code;
        const char *words;
    } directories[] = {
        {"pytorch_model.bin", BNB_E_FORMAT, "pytorch_model.bin: it is not one of PyTorch's files"},
        {"model.gguf", BNB_E_UNSUPPORTED, "model.gguf is a GGUF file"},
        {"adapter_config.json", BNB_E_UNSUPPORTED, "a LoRA adapter"},
        {"readme.txt", BNB_E_IO, "model.safetensors.index.json was expected"},
    };
    for (const auto &d : directories) {
        TempDir dir;
        write_bytes(dir.file(d.file), bytes_of("{}"));
        check_refused(env, dir.file(""), d.code, d.words);
    }
    TempDir two;
    write_bytes(two.file("a.safetensors"), raw_file("{}", 0));
    write_bytes(two.file("b.safetensors"), raw_file("{}", 0));
    check_refused(env, two.file(""), BNB_E_ARG, "2 files whose names end in .safetensors");
    check_refused(env, two.file("missing"), BNB_E_IO, "cannot be opened");
    REQUIRE(mkfifo(two.file("fifo").c_str(), 0600) == 0); // must not wait for a writer
    check_refused(env, two.file("fifo"), BNB_E_IO, "not a regular file");
}

TEST_CASE("checkpoint: weights that others than bitsandbytes quantized are refused by name") {
    Env env;
    for (const auto &mark : std::map<std::string, std::string>{{"x.qweight", "GPTQ or AWQ"},
                                                               {"x.g_idx", "GPTQ"},
                                                               {"x.codebooks", "AQLM"},
                                                               {"x.W_q", "HQQ"},
                                                               {"x.weight_scale_inv", "fp8"}}) {
        TempDir dir;
        write_bytes(dir.file("model.safetensors"), safetensors({stored(mark.first, {1}, {1})}));
        check_refused(env, dir.file(""), BNB_E_UNSUPPORTED, "already quantized (" + mark.second);
    }
    for (const auto &method : std::map<std::string, std::string>{{R"({"quant_method":"gptq"})", "(gptq)"},
                                                                 {R"({"bits":4})", "(an unnamed method)"}}) {
        TempDir dir;
        Tiny tiny;
        tiny.more_config = ",\"quantization_config\":" + method.first;
        tiny.write(dir);
        check_refused(env, dir.file(""), BNB_E_UNSUPPORTED, method.second);
    }
}

// ---- config.json ---------------------------------------------------------------------------------------------------

TEST_CASE("checkpoint: config.json and generation_config.json") {
    Env env;
    TempDir dir;
    Tiny tiny;
    tiny.more_config = R"(,"activation_function":"gelu","n_inner":null,"layer_norm_epsilon":1e-6,"eos_token_id":3,)"
                       R"("scale_attn_weights":false,"bos_token_id":50256,"junk":[{}])";
    tiny.write(dir);
    write_bytes(dir.file("generation_config.json"),
                bytes_of(R"({"eos_token_id":[5,6],"pad_token_id":4,"temperature":0.7,"top_k":20,"top_p":null})"));
    const File f = converted(env, dir.file(""), dir.file("x.bnb"), load_params(-1));
    CHECK(number(f, "config.n_embd") == 64);
    CHECK(number(f, "config.n_ff") == 256);
    CHECK(number(f, "config.scale_attn") == 0);
    CHECK(number(f, "config.pad") == 4);
    CHECK(number(f, "config.top_k") == 20);
    CHECK(number(f, "config.tied") == 1);
    CHECK(number(f, "config.bos") == -1); // not in the vocabulary
    uint64_t n = 0;
    const int64_t *eos = bnb_file_i64_array(f.get(), "config.eos", &n);
    CHECK(std::vector<int64_t>(eos, eos + n) == std::vector<int64_t>{5, 6});
    double v = 0;
    CHECK((bnb_file_f64(f.get(), "config.norm_eps", &v) == BNB_OK && v == 1e-6));
    CHECK((bnb_file_f64(f.get(), "config.temperature", &v) == BNB_OK && v == 0.7));
    CHECK((bnb_file_f64(f.get(), "config.top_p", &v) == BNB_OK && v == -1));
    const char *text = bnb_file_str(f.get(), "config.act", &n);
    CHECK(std::string(text, n) == "gelu");
    text = bnb_file_str(f.get(), "general.version", &n);
    CHECK(std::string(text, n) == BNB_VERSION);
}

TEST_CASE("checkpoint: a config.json that says nonsense is refused by key") {
    Env env;
    TempDir dir;
    Tiny tiny;
    tiny.write(dir);
    std::string deep;
    for (int i = 0; i < 70; i++) deep += "[";
    const struct {
        std::string json;
        bnb_status code;
        const char *words;
    } cases[] = {
        {"", BNB_E_FORMAT, "not valid JSON"},
        {"[]", BNB_E_FORMAT, "not a JSON object"},
        {R"({"model_type":"gpt2",})", BNB_E_FORMAT, "not valid JSON at byte"},
        {"{\"a\":" + deep, BNB_E_FORMAT, "nested too deep"},
        {"{}" + std::string(4 << 20, ' '), BNB_E_LIMIT, "more than 4194304 bytes"},
        {R"({"model_type":"gpt2","n_embd":1e999})", BNB_E_FORMAT, "a number that is out of range"},
        {R"({"n_embd":64,"n_embd":65})", BNB_E_FORMAT, "'n_embd' stands twice"},
        {std::string("{}\0", 3), BNB_E_FORMAT, "NUL byte"},
        {R"({"model_type":"openai-gpt"})", BNB_E_UNSUPPORTED,
         "the model_type 'openai-gpt' is not one of those that run here: gpt2, opt"},
        {R"({"model_type":"gpt2","n_embd":"64"})", BNB_E_FORMAT, "'n_embd' is not a whole number"},
        {R"({"model_type":"gpt2","n_embd":64.5})", BNB_E_FORMAT, "'n_embd' is not a whole number"},
        {R"({"model_type":"gpt2","n_embd":18446744073709551615})", BNB_E_FORMAT, "'n_embd' is not a whole number"},
        {R"({"model_type":"gpt2","n_embd":-64})", BNB_E_FORMAT, "n_embd = -64"},
        {R"({"model_type":"gpt2","n_layer":1000000000})", BNB_E_FORMAT, "n_layer = 1000000000"},
        {R"({"model_type":"gpt2","layer_norm_epsilon":"x"})", BNB_E_FORMAT, "'layer_norm_epsilon' is not a number"},
        {R"({"model_type":"gpt2","scale_attn_weights":1})", BNB_E_FORMAT, "'scale_attn_weights' is not true or false"},
        {R"({"model_type":"gpt2","activation_function":7})", BNB_E_FORMAT, "'activation_function' is not a string"},
        {R"({"model_type":"gpt2","activation_function":"quick_gelu"})", BNB_E_UNSUPPORTED, "'quick_gelu'"},
        {R"({"model_type":"gpt2","eos_token_id":["a"]})", BNB_E_FORMAT,
         "'eos_token_id' is not a whole number or a list of them"},
        {R"({"model_type":"gpt2","n_head":7,"n_embd":64})", BNB_E_FORMAT, "do not divide"},
        {R"({"model_type":"gpt2","add_cross_attention":true})", BNB_E_UNSUPPORTED, "cross-attention"},
    };
    for (const auto &c : cases) {
        write_bytes(dir.file("config.json"), bytes_of(c.json));
        check_refused(env, dir.file(""), c.code, c.words);
    }
    write_bytes(dir.file("config.json"), bytes_of(tiny.config_json()));
    write_bytes(dir.file("generation_config.json"), bytes_of(R"({"top_k":"many"})"));
    check_refused(env, dir.file(""), BNB_E_FORMAT, "generation_config.json: 'top_k' is not a whole number");
}

TEST_CASE("checkpoint: without config.json the shapes say what it is") {
    Env env;
    TempDir dir;
    Tiny tiny;
    tiny.config = false;
    tiny.conv1d = false;
    tiny.lm_head = tiny.lm_head_differs = true;
    std::vector<std::string> warnings;
    env.on_log = [&](int32_t level, const char *line) {
        if (level >= BNB_LOG_WARN) warnings.push_back(line);
    };
    SUBCASE("a network that has no name") {
        tiny.C = 128, tiny.F = 512, tiny.L = 3;
        tiny.write(dir);
        const File f = converted(env, dir.file(""), dir.file("x.bnb"), load_params(-1));
        CHECK(number(f, "config.n_vocab") == 29);
        CHECK(number(f, "config.n_ctx") == 8);
        CHECK(number(f, "config.n_embd") == 128);
        CHECK(number(f, "config.n_layer") == 3);
        CHECK(number(f, "config.n_head") == 2);
        CHECK(number(f, "config.tied") == 0);
        REQUIRE(warnings.size() == 1);
        CHECK(contains(warnings[0], "2 heads of 64 are assumed"));
    }
    SUBCASE("one of minGPT's: the heads are known") {
        tiny.C = 48, tiny.F = 192, tiny.L = 3, tiny.lm_head_differs = false;
        tiny.write(dir);
        const File f = converted(env, dir.file(""), dir.file("x.bnb"), load_params(-1));
        CHECK(number(f, "config.n_head") == 3);
        CHECK(number(f, "config.tied") == 1); // the head is the embedding once more
        CHECK(warnings.empty());
    }
    SUBCASE("a width that cannot be guessed") {
        tiny.C = 80, tiny.F = 320;
        tiny.write(dir);
        check_refused(env, dir.file(""), BNB_E_FORMAT, "heads cannot be guessed for a width of 80");
    }
    SUBCASE("nothing known") {
        write_bytes(dir.file("model.safetensors"), safetensors({stored("x", {1}, {1})}));
        check_refused(env, dir.file(""), BNB_E_UNSUPPORTED, "names are those of none of gpt2, opt");
    }
    SUBCASE("no tables") {
        write_bytes(dir.file("model.safetensors"), safetensors({stored("h.0.attn.c_attn.weight", {1}, {1})}));
        check_refused(env, dir.file(""), BNB_E_FORMAT, "without the matrices 'wte.weight' and 'wpe.weight'");
    }
}

// ---- names and layouts ---------------------------------------------------------------------------------------------

TEST_CASE("checkpoint: Conv1D and Linear, with and without prefix, are the same model") {
    Env env(2);
    TempDir dir;
    Tiny linear;
    linear.conv1d = false;
    linear.write(dir);
    const File want = converted(env, dir.file(""), dir.file("want.bnb"), load_params(-1));
    const bnb_tensor *square = bnb_file_find(want.get(), "h.1.attn.c_proj.weight");
    REQUIRE(square);
    check_plain(square, linear.values["h.1.attn.c_proj.weight"],
                BNB_F32); // [out, in]; its transpose has the same shape
    CHECK(linear.values["h.1.attn.c_proj.weight"] != transposed(linear.values["h.1.attn.c_proj.weight"], 64, 64));
    for (bool conv1d : {false, true})
        for (const char *prefix : {"", "transformer."}) {
            Tiny tiny;
            tiny.conv1d = conv1d;
            tiny.prefix = prefix;
            tiny.write(dir);
            const File got = converted(env, dir.file(""), dir.file("got.bnb"), load_params(-1));
            CHECK(read_bytes(dir.file("got.bnb")) == read_bytes(dir.file("want.bnb")));
        }
}

TEST_CASE("checkpoint: transposing any shape") {
    Env env(3);
    TempDir dir;
    for (int64_t ff : {1, 15, 16, 17, 255, 257, 300}) {
        Tiny tiny;
        tiny.C = 34, tiny.H = 2, tiny.F = ff, tiny.L = 1;
        tiny.type = BNB_F16;
        tiny.more_config = ",\"n_inner\":" + std::to_string(ff);
        tiny.write(dir);
        const File f = converted(env, dir.file(""), dir.file("x.bnb"), load_params(BNB_F32));
        for (const auto &v : tiny.values) check_plain(bnb_file_find(f.get(), v.first.c_str()), v.second, BNB_F32);
    }
}

TEST_CASE("checkpoint: layers that disagree, missing, unused and ill-shaped tensors") {
    Env env;
    TempDir dir;
    Tiny tiny;
    std::vector<Stored> list = tiny.tensors();
    const auto at = [&](const std::string &name) -> Stored & {
        for (Stored &t : list)
            if (t.name == "transformer." + name) return t;
        FAIL("no " << name);
        return list[0];
    };
    std::vector<std::string> warnings;
    env.on_log = [&](int32_t level, const char *line) {
        if (level >= BNB_LOG_WARN) warnings.push_back(line);
    };
    SUBCASE("disagree") {
        std::swap(at("h.1.attn.c_attn.weight").shape[0], at("h.1.attn.c_attn.weight").shape[1]);
        tiny.write(dir, list);
        check_refused(env, dir.file(""), BNB_E_FORMAT, "the layers do not agree");
    }
    SUBCASE("missing") {
        at("h.1.ln_1.weight").name = "x";
        at("h.1.ln_1.bias").name = "y";
        tiny.write(dir, list);
        check_refused(env, dir.file(""), BNB_E_FORMAT,
                      "lacks 2 of the 28 tensors of the network, the first is 'h.1.ln_1.weight' of shape [64]");
    }
    SUBCASE("a shape") {
        at("h.1.ln_1.weight").shape = {64, 1};
        tiny.write(dir, list);
        check_refused(env, dir.file(""), BNB_E_SHAPE,
                      "'transformer.h.1.ln_1.weight' has the shape [64, 1], but the configuration asks for [64]");
    }
    SUBCASE("the shape of a Conv1D") {
        list.pop_back(); // ln_f.bias
        list.push_back(stored("transformer.ln_f.bias", {64}, Floats(64)));
        at("h.1.attn.c_attn.weight") = stored("transformer.h.1.attn.c_attn.weight", {64, 191}, Floats(64 * 191));
        tiny.write(dir, list);
        check_refused(env, dir.file(""), BNB_E_SHAPE,
                      "has the shape [64, 191], but the configuration asks for [64, 192]");
    }
    SUBCASE("a dtype") {
        at("ln_f.weight").dtype = "I32";
        tiny.write(dir, list);
        check_refused(env, dir.file(""), BNB_E_TYPE, "'transformer.ln_f.weight' has the dtype I32");
    }
    SUBCASE("unused") {
        list.push_back(stored("score.weight", {2, 3}, Floats(6)));
        list.push_back(stored("transformer.h.0.attn.bias", {1, 1, 8, 8}, Floats(64))); // causal masks are known
        list.push_back(stored("transformer.h.0.attn.masked_bias", {}, Floats(1)));
        tiny.write(dir, list);
        loaded(env, dir.file(""));
        REQUIRE(warnings.size() == 1);
        CHECK(contains(warnings[0], "'score.weight' of shape [2, 3] is not used by gpt2"));
    }
    SUBCASE("many unused") {
        for (int i = 0; i < 50; i++) list.push_back(stored("x" + std::to_string(i), {}, Floats(1)));
        tiny.write(dir, list);
        loaded(env, dir.file(""));
        CHECK(warnings.size() == 21);
        CHECK(contains(warnings.back(), "30 more"));
    }
    SUBCASE("cross-attention") {
        list.push_back(stored("transformer.h.0.crossattention.c_attn.weight", {1}, {1}));
        tiny.write(dir, list);
        check_refused(env, dir.file(""), BNB_E_UNSUPPORTED, "cross-attention");
    }
    SUBCASE("the same name twice") {
        list.push_back(stored("ln_f.weight", {64}, Floats(64)));
        tiny.write(dir, list);
        check_refused(env, dir.file(""), BNB_E_FORMAT,
                      "'transformer.ln_f.weight' and 'ln_f.weight' are both 'ln_f.weight'");
    }
    SUBCASE("the file alone, with its config.json beside it") {
        tiny.write(dir, list);
        loaded(env, dir.file("model.safetensors"));
    }
}

TEST_CASE("checkpoint: tied and untied heads") {
    Env env;
    std::vector<std::string> warnings;
    env.on_log = [&](int32_t level, const char *line) {
        if (level >= BNB_LOG_WARN) warnings.push_back(line);
    };
    const struct {
        bool tied, lm_head, differs, has_head;
        size_t n_warnings;
    } cases[] = {
        {true, false, false, false, 0}, {true, true, false, false, 0}, {true, true, true, true, 1},
        {false, true, false, true, 0},  {false, true, true, true, 0},
    };
    for (const auto &c : cases) {
        TempDir dir;
        Tiny tiny;
        tiny.tied = c.tied, tiny.lm_head = c.lm_head, tiny.lm_head_differs = c.differs;
        tiny.write(dir);
        warnings.clear();
        const File f = converted(env, dir.file(""), dir.file("x.bnb"), load_params(BNB_NF4));
        const bnb_tensor *head = bnb_file_find(f.get(), "lm_head.weight");
        CHECK((head != nullptr) == c.has_head);
        CHECK(number(f, "config.tied") == !c.has_head);
        if (head) check_plain(head, tiny.values["lm_head.weight"], BNB_F16);
        CHECK(warnings.size() == c.n_warnings);
        if (c.n_warnings) CHECK(contains(warnings[0], "ties 'lm_head.weight' to 'wte.weight', but they differ"));
    }
    TempDir dir;
    Tiny tiny;
    tiny.tied = false;
    tiny.write(dir);
    check_refused(env, dir.file(""), BNB_E_FORMAT, "the first is 'lm_head.weight' of shape [29, 64]");

    Tiny only_head; // tied, and only the head is there: it is the embedding
    only_head.lm_head = true;
    std::vector<Stored> list = only_head.tensors();
    list.erase(list.begin());
    only_head.write(dir, list);
    const File f = converted(env, dir.file(""), dir.file("x.bnb"), load_params(-1));
    CHECK_FALSE(bnb_file_find(f.get(), "lm_head.weight"));
    check_plain(bnb_file_find(f.get(), "wte.weight"), only_head.values["lm_head.weight"], BNB_F32);
}

// ---- what weights become -------------------------------------------------------------------------------------------

TEST_CASE("checkpoint: every tensor is what bnb_quantize makes of the right numbers") {
    Env env(2);
    TempDir dir;
    for (int32_t stored_type : {BNB_F32, BNB_F16, BNB_BF16}) {
        Tiny tiny;
        tiny.type = stored_type;
        tiny.write(dir);
        for (int32_t type : {BNB_NF4, BNB_FP4, BNB_INT8})
            for (int32_t rest : {-1, int32_t{BNB_BF16}, int32_t{BNB_F32}})
                for (int32_t compat : {BNB_COMPAT_CUDA, BNB_COMPAT_CPU}) {
                    bnb_load_params p = load_params(type);
                    p.rest_type = rest;
                    p.compat = compat;
                    p.double_quant = rest == BNB_F32 && type != BNB_INT8;
                    p.blocksize = rest == BNB_BF16 ? 128 : 64;
                    p.threshold = 3.5f;
                    const int32_t cast = rest < 0 ? int32_t{BNB_F16} : rest;
                    const File f = converted(env, dir.file(""), dir.file("x.bnb"), p);
                    for (const auto &v : tiny.values) {
                        const bnb_tensor *t = bnb_file_find(f.get(), v.first.c_str());
                        REQUIRE(t);
                        if (!is_linear(v.first)) {
                            check_plain(t, v.second, cast);
                            continue;
                        }
                        REQUIRE(t->type == type);
                        check_quantized(env, t, v.second, cast, compat);
                        if (type == BNB_INT8) CHECK(t->quant.threshold == 3.5f);
                        else CHECK((t->quant.blocksize == p.blocksize && t->quant.double_quant == p.double_quant));
                    }
                }
    }
}

TEST_CASE("checkpoint: plain types, as stored or converted") {
    Env env;
    TempDir dir;
    Tiny tiny;
    std::vector<Stored> list = tiny.tensors();
    list[2] =
        stored("transformer.h.0.ln_1.weight", {64}, tiny.values["h.0.ln_1.weight"], BNB_BF16); // dtypes may be mixed
    tiny.write(dir, list);
    const File as_is = converted(env, dir.file(""), dir.file("a.bnb"), load_params(-1));
    for (const auto &v : tiny.values)
        check_plain(bnb_file_find(as_is.get(), v.first.c_str()), v.second,
                    v.first == "h.0.ln_1.weight" ? BNB_BF16 : BNB_F32);
    for (int32_t type : {BNB_F16, BNB_BF16}) {
        bnb_load_params p = load_params(type);
        Tiny all;
        all.write(dir);
        const File f = converted(env, dir.file(""), dir.file("b.bnb"), p);
        for (const auto &v : all.values) check_plain(bnb_file_find(f.get(), v.first.c_str()), v.second, type);
        p.rest_type = BNB_F32;
        const File g = converted(env, dir.file(""), dir.file("c.bnb"), p);
        for (const auto &v : all.values)
            check_plain(bnb_file_find(g.get(), v.first.c_str()), v.second, is_linear(v.first) ? type : BNB_F32);
    }
}

TEST_CASE("checkpoint: skip_modules and keep_in_fp32 follow transformers") {
    Env env;
    TempDir dir;
    Tiny tiny;
    tiny.tied = false, tiny.lm_head = tiny.lm_head_differs = true;
    tiny.write(dir);
    // types of: h.0.attn.c_attn, h.1.attn.c_proj, h.1.mlp.c_proj, lm_head (weights), ln_f.weight, h.1.mlp.c_proj.bias
    const char *names[] = {
        "h.0.attn.c_attn.weight", "h.1.attn.c_proj.weight", "h.1.mlp.c_proj.weight", "lm_head.weight", "ln_f.weight",
        "h.1.mlp.c_proj.bias"};
    const int32_t q = BNB_NF4, h = BNB_F16, s = BNB_F32;
    const struct {
        const char *skip, *keep;
        int32_t types[6];
    } cases[] = {
        {nullptr, nullptr, {q, q, q, h, h, h}},
        {"", nullptr, {q, q, q, q, h, h}}, // a list, even an empty one, replaces the default
        {"lm_head", nullptr, {q, q, q, h, h, h}},
        {"c_proj", nullptr, {q, h, h, q, h, h}}, // a name's end
        {" mlp.c_proj , lm_head", nullptr, {q, q, h, h, h, h}},
        {"transformer.h.1,lm_head", nullptr, {q, h, h, h, h, h}},          // a name's beginning
        {"h.1", nullptr, {q, q, q, q, h, h}},                              // neither
        {"transformer.h.[0-9], lm_head", nullptr, {h, h, h, h, h, h}},
        {"transformer.h.1.ml,lm_head", nullptr, {q, q, q, h, h, h}},       // it ends within a part of the name
        {"transformer.h.1.,lm_head", nullptr, {q, h, h, h, h, h}},
        {"transformer.h.[0-9].attn,lm_head", nullptr, {h, h, q, h, h, h}}, // a regular expression
        {nullptr, "c_proj,transformer.ln_f", {q, s, s, h, s, s}},          // not quantized, and f32 with its bias
        {nullptr, "lm_head", {q, q, q, s, h, h}},
    };
    for (const auto &c : cases) {
        bnb_load_params p = load_params(BNB_NF4);
        p.skip_modules = c.skip;
        p.keep_in_fp32 = c.keep;
        const File f = converted(env, dir.file(""), dir.file("x.bnb"), p);
        for (int i = 0; i < 6; i++) {
            const bnb_tensor *t = bnb_file_find(f.get(), names[i]);
            REQUIRE(t);
            CHECK_MESSAGE(t->type == c.types[i], (std::string(c.skip ? c.skip : "-") + ": " + names[i]));
        }
    }
    bnb_load_params p = load_params(BNB_NF4);
    p.skip_modules = "a,(";
    check_refused(env, dir.file(""), BNB_E_ARG, "skip_modules: '(' is not a regular expression", &p);
    p = load_params(BNB_NF4);
    p.blocksize = 48;
    check_refused(env, dir.file(""), BNB_E_ARG, "blocksize is 48", &p);
    p = load_params(BNB_I32);
    check_refused(env, dir.file(""), BNB_E_ARG, "loaded as type 3", &p);
    p = load_params(BNB_INT8);
    p.threshold = -1;
    check_refused(env, dir.file(""), BNB_E_ARG, "threshold is -1", &p);
    p = load_params(BNB_INT8);
    p.rest_type = BNB_NF4;
    check_refused(env, dir.file(""), BNB_E_ARG, "not type 9", &p);
}

TEST_CASE("checkpoint: NaN and infinity are refused by the tensor's name") {
    Env env;
    TempDir dir;
    Tiny tiny;
    const struct {
        const char *name;
        float value;
        int32_t type;
        const char *words;
    } cases[] = {
        {"h.1.mlp.c_fc.weight", NAN, BNB_NF4, "is NaN as f16, stored as F32"},
        {"h.1.mlp.c_fc.weight", INFINITY, BNB_INT8, "is infinite"},
        {"h.0.ln_2.bias", NAN, BNB_NF4, "is NaN"},
        {"wte.weight", -INFINITY, -1, "is infinite"},
        {"h.1.mlp.c_fc.weight", 1e6f, BNB_NF4, "is infinite as f16, stored as F32"}, // does not fit
        {"h.1.mlp.c_fc.weight", 1e6f, BNB_F32, nullptr},
    };
    for (const auto &c : cases) {
        std::vector<Stored> list = tiny.tensors();
        for (Stored &t : list)
            if (t.name == std::string("transformer.") + c.name) memcpy(t.bytes.data() + 20, &c.value, 4);
        tiny.write(dir, list);
        bnb_load_params p = load_params(c.type);
        if (!c.words) {
            loaded(env, dir.file(""), &p);
            continue;
        }
        check_refused(env, dir.file(""), BNB_E_NUMERIC, c.words, &p);
        check_refused(env, dir.file(""), BNB_E_NUMERIC, std::string("'") + c.name + "'", &p);
        bnb_error err = {};
        CHECK(convert(env, dir.file(""), dir.file("x.bnb"), p, &err) == BNB_E_NUMERIC);
        CHECK(read_bytes(dir.file("x.bnb")).empty());
        p.allow_nonfinite = 1;
        loaded(env, dir.file(""), &p);
    }
    std::vector<Stored> list = tiny.tensors(); // int8 rounds to f16 even where the rest is f32
    const float large = 1e6f;
    memcpy(list[list.size() - 4].bytes.data(), &large, 4);
    REQUIRE(contains(list[list.size() - 4].name, "mlp.c_proj.weight"));
    tiny.write(dir, list);
    bnb_load_params p = load_params(BNB_INT8);
    p.rest_type = BNB_F32;
    check_refused(env, dir.file(""), BNB_E_NUMERIC, "SCB", &p);
}

TEST_CASE("checkpoint: loading gives the tensors that converting writes") {
    Env env(2);
    TempDir dir;
    for (const char *name : {"gpt2", "gpt2-odd", "mingpt", "opt", "opt-nobias", "opt-post"})
        for (int32_t type : {int32_t{-1}, int32_t{BNB_NF4}, int32_t{BNB_INT8}}) {
            const std::string src = std::string(BNB_SOURCE_DIR "/tests/golden/models/") + name;
            bnb_load_params p = load_params(type);
            p.double_quant = 1;
            const File f = converted(env, src, dir.file("x.bnb"), p);
            const Model a = loaded(env, src, &p), b = loaded(env, dir.file("x.bnb"));
            REQUIRE(bnb_model_tensor_count(a.get()) == bnb_file_tensor_count(f.get()));
            for (int32_t i = 0; i < bnb_model_tensor_count(a.get()); i++) {
                check_same_tensor(bnb_model_tensor(a.get(), i), bnb_file_tensor(f.get(), i));
                check_same_tensor(bnb_model_tensor(a.get(), i), bnb_model_tensor(b.get(), i));
            }
            bnb_model_info ia = {}, ib = {};
            ia.struct_size = ib.struct_size = sizeof ia;
            bnb_model_get_info(a.get(), &ia);
            bnb_model_get_info(b.get(), &ib);
            CHECK(memcmp(&ia, &ib, sizeof ia) == 0);
        }
}

TEST_CASE("checkpoint: a .bnb file is loaded as it is") {
    Env env;
    TempDir dir;
    Tiny tiny;
    tiny.write(dir);
    converted(env, dir.file(""), dir.file("x.bnb"), load_params(BNB_NF4));
    bnb_load_params p = load_params(BNB_NF4);
    loaded(env, dir.file("x.bnb"), &p);
    p = load_params(-1);
    loaded(env, dir.file("x.bnb"), &p);
    p = load_params(BNB_INT8);
    check_refused(env, dir.file("x.bnb"), BNB_E_UNSUPPORTED,
                  "holds nf4 weights and is loaded as it is: for int8 make another file with ./quantize", &p);
}

TEST_CASE("checkpoint: a .bnb file can be converted again") {
    Env env(2);
    TempDir dir;
    Tiny tiny;
    tiny.write(dir);
    const File f32 = converted(env, dir.file(""), dir.file("f32.bnb"), load_params(-1));
    const File nf4 = converted(env, dir.file(""), dir.file("nf4.bnb"), load_params(BNB_NF4));
    // plain: as from the checkpoint, byte for byte
    converted(env, dir.file("f32.bnb"), dir.file("again.bnb"), load_params(BNB_NF4));
    CHECK(read_bytes(dir.file("again.bnb")) == read_bytes(dir.file("nf4.bnb")));
    // the same type, or as stored: the codes are taken as they are
    converted(env, dir.file("nf4.bnb"), dir.file("again.bnb"), load_params(BNB_NF4));
    CHECK(read_bytes(dir.file("again.bnb")) == read_bytes(dir.file("nf4.bnb")));
    converted(env, dir.file("nf4.bnb"), dir.file("again.bnb"), load_params(-1));
    CHECK(read_bytes(dir.file("again.bnb")) == read_bytes(dir.file("nf4.bnb")));
    // another type: from the values that the codes stand for
    const char *name = "h.1.mlp.c_fc.weight";
    const bnb_tensor *source = bnb_file_find(nf4.get(), name);
    bnb_error err = {};
    Ctx ctx(bnb_ctx_create(env, &err));
    bnb_tensor *values = bnb_tensor_new(ctx.get(), BNB_F16, nullptr, 2, source->shape, "values");
    REQUIRE(bnb_ctx_alloc(ctx.get(), env.cpu(), &err) == BNB_OK);
    REQUIRE(bnb_dequantize(env, source, values, &err) == BNB_OK);
    Floats v(size_t(bnb_tensor_elements(values)));
    REQUIRE(bnb_convert(BNB_F16, bnb_tensor_plane(values, 0), BNB_F32, v.data(), int64_t(v.size()), &err) == BNB_OK);
    const File f16 = converted(env, dir.file("nf4.bnb"), dir.file("f16.bnb"), load_params(BNB_F16));
    check_plain(bnb_file_find(f16.get(), name), v, BNB_F16);
    const File int8 = converted(env, dir.file("nf4.bnb"), dir.file("int8.bnb"), load_params(BNB_INT8));
    check_quantized(env, bnb_file_find(int8.get(), name), v, BNB_F16, BNB_COMPAT_CUDA);
    bnb_load_params p = load_params(BNB_NF4);
    p.blocksize = 128;
    const File wide = converted(env, dir.file("nf4.bnb"), dir.file("wide.bnb"), p);
    check_quantized(env, bnb_file_find(wide.get(), name), v, BNB_F16, BNB_COMPAT_CUDA);
    // onto itself
    converted(env, dir.file("nf4.bnb"), dir.file("nf4.bnb"), load_params(BNB_INT8));
}

TEST_CASE("checkpoint: the tokenizer comes along") {
    Env env;
    TempDir dir;
    Tiny tiny;
    tiny.write(dir);
    write_bytes(dir.file("vocab.json"), bytes_of(R"({"a":0,"b":1,"ab":2})"));
    write_bytes(dir.file("merges.txt"), bytes_of("#version: 0.2\na b\n"));
    const File first = converted(env, dir.file(""), dir.file("x.bnb"), load_params(-1));
    const File second = converted(env, dir.file("x.bnb"), dir.file("y.bnb"), load_params(-1));
    uint64_t n = 0, m = 0;
    const void *a = bnb_file_chunk(first.get(), "tokn", &n), *b = bnb_file_chunk(second.get(), "tokn", &m);
    REQUIRE(a);
    REQUIRE(b);
    CHECK((n == m && memcmp(a, b, n) == 0));
    int32_t id = -1;
    for (const std::string &path : {dir.file(""), dir.file("y.bnb")}) {
        const Model model = loaded(env, path);
        CHECK(bnb_tokenize(model.get(), "ab", 2, 0, &id, 1, nullptr) == 1);
        CHECK(id == 2);
    }
    write_bytes(dir.file("merges.txt"), bytes_of("#version: 0.2\na x\n"));
    bnb_error err = {};
    CHECK_FALSE(
        Model(bnb_model_load(env, dir.file("").c_str(), nullptr, nullptr, &err))); // damaged is not the same as absent
    CHECK(contains(err.msg, "merges.txt"));
}

// ---- converting: bytes, memory, failures ---------------------------------------------------------------------------

TEST_CASE("checkpoint: the same input gives the same bytes, with any number of threads") {
    TempDir dir;
    Tiny tiny;
    tiny.write(dir);
    Bytes first;
    for (int32_t threads : {1, 2, 5}) {
        Env env(threads);
        bnb_load_params p = load_params(BNB_NF4);
        p.double_quant = 1;
        converted(env, dir.file(""), dir.file("x.bnb"), p);
        const Bytes bytes = read_bytes(dir.file("x.bnb"));
        if (first.empty()) first = bytes;
        CHECK(bytes == first);
    }
}

TEST_CASE("checkpoint: converting holds one tensor at a time") {
    TempDir dir;
    Tiny tiny;
    tiny.C = 256, tiny.F = 1024; // large beside the metadata of a tensor
    tiny.write(dir);
    Env env;
    bnb_convert_result result = {};
    bnb_error err = {};
    const uint64_t before = bnb_env_bytes_peak(env);
    std::vector<double> fractions;
    env.on_progress = [&](const char *phase, double f) {
        CHECK(std::string(phase) == "quantize");
        fractions.push_back(f);
        return true;
    };
    REQUIRE(convert(env, dir.file(""), dir.file("x.bnb"), load_params(BNB_NF4), &err, &result) == BNB_OK);
    const uint64_t n = 1024 * 256, largest = n * 2 + n / 2 + n / 64 * 4; // f16, codes, absmax
    CHECK(bnb_env_bytes_peak(env) - before < largest + n);               // n: two arenas of metadata
    CHECK(result.n_tensors == 28);
    CHECK(result.n_quantized == 8);
    CHECK(result.bytes_out == read_bytes(dir.file("x.bnb")).size());
    uint64_t in = 0;
    for (const auto &v : tiny.values) in += v.second.size() * 4;
    CHECK(result.bytes_in == in);
    CHECK(fractions.size() == 28);
    CHECK(std::is_sorted(fractions.begin(), fractions.end()));
    CHECK(fractions.back() == 1);
}

TEST_CASE("checkpoint: a failure keeps the old file and leaves no other") {
    TempDir src, dir;
    Tiny tiny;
    tiny.write(src);
    const std::string out = dir.file("x.bnb");
    const Bytes old = bytes_of("the old file");
    Env env;
    const auto check_failed = [&](bnb_status code, const char *words) {
        write_bytes(out, old);
        bnb_error err = {};
        CHECK(convert(env, src.file(""), out, load_params(BNB_NF4), &err) == code);
        CHECK(is_sentence(err));
        CHECK_MESSAGE(contains(err.msg, words), err.msg);
        CHECK(read_bytes(out) == old);
        CHECK(TempDir::list(dir.file("")).size() == 1);
    };
    SUBCASE("cancelled") {
        env.on_progress = [](const char *, double f) { return f < 0.5; };
        check_failed(BNB_E_CANCELLED, "cancelled");
    }
    SUBCASE("no room") {
        struct rlimit limit, small;
        REQUIRE(getrlimit(RLIMIT_FSIZE, &limit) == 0);
        const auto handler = std::signal(SIGXFSZ, SIG_IGN);
        small = limit;
        small.rlim_cur = 20000;
        REQUIRE(setrlimit(RLIMIT_FSIZE, &small) == 0);
        check_failed(BNB_E_IO, "File too large");
        setrlimit(RLIMIT_FSIZE, &limit);
        std::signal(SIGXFSZ, handler);
    }
    SUBCASE("a weight is not a number") {
        std::vector<Stored> list = tiny.tensors();
        memset(list.back().bytes.data(), 0xff, 4);
        tiny.write(src, list);
        check_failed(BNB_E_NUMERIC, "'ln_f.bias'");
    }
    SUBCASE("a place that cannot be written") {
        bnb_error err = {};
        CHECK(convert(env, src.file(""), dir.file("none/x.bnb"), load_params(-1), &err) == BNB_E_IO);
        CHECK_MESSAGE(contains(err.msg, "cannot be created: No such file"), err.msg);
        CHECK(convert(env, src.file(""), dir.file(""), load_params(-1), &err) == BNB_E_IO);
        CHECK_MESSAGE(contains(err.msg, "not a regular file"), err.msg);
        CHECK(convert(env, src.file(""), "/dev/full", load_params(-1), &err) == BNB_E_IO);
        CHECK_MESSAGE(contains(err.msg, "not a regular file"), err.msg);
    }
}

TEST_CASE("checkpoint: memory that runs out is an error at every place") {
    TempDir src, dir;
    Tiny tiny;
    tiny.L = 1;
    tiny.write(src);
    const bnb_load_params p = load_params(BNB_NF4);
    for (bool load : {true, false})
        for (int64_t k = 1;; k++) {
            Env env(2);
            env.memory.fail(k);
            bnb_error err = {};
            bool ok;
            if (load) ok = Model(bnb_model_load(env, src.file("").c_str(), &p, nullptr, &err)) != nullptr;
            else ok = convert(env, src.file(""), dir.file("x.bnb"), p, &err) == BNB_OK;
            if (env.memory.n_failed() == 0) {
                CHECK_MESSAGE(ok, err.msg);
                break;
            }
            if (ok) continue; // it was done without
            CHECK(err.code == BNB_E_NOMEM);
            CHECK(is_sentence(err));
        }
}

// ---- the writer ----------------------------------------------------------------------------------------------------

TEST_CASE("bnb writer: layout, keys and chunks") {
    Env env;
    TempDir dir;
    bnb_error err = {};
    Ctx ctx(bnb_ctx_create(env, &err));
    const bnb_quant dq = quant4(BNB_NF4, 64, true);
    const int64_t small[] = {3, 5}, large[] = {64, 512}, none[] = {0};
    bnb_tensor *t[] = {bnb_tensor_new(ctx.get(), BNB_F16, nullptr, 2, small, "small"),
                       bnb_tensor_new(ctx.get(), BNB_NF4, &dq, 2, large, "large"),
                       bnb_tensor_new(ctx.get(), BNB_F32, nullptr, 1, none, "none"),
                       bnb_tensor_new(ctx.get(), BNB_U8, nullptr, 2, small, "bytes")};
    REQUIRE(bnb_ctx_alloc(ctx.get(), env.cpu(), &err) == BNB_OK);
    Rng rng(3);
    for (bnb_tensor *x : t)
        for (int32_t p = 0; p < BNB_MAX_PLANES; p++)
            for (uint64_t i = 0; i < bnb_plane_bytes(x->type, &x->quant, x->n_dims, x->shape, p); i++)
                static_cast<uint8_t *>(x->plane[p])[i] = uint8_t(rng.next());
    t[1]->quant.nested_offset = 0.25f;
    const std::string path = dir.file("x.bnb");
    auto w = bnb::BnbWriter::create(path, &err);
    REQUIRE_MESSAGE(w, err.msg);
    w->add_key("z.text", "words");
    w->add_key("a.int", int64_t{-5});
    w->add_key("m.list", std::vector<int64_t>{1, -2, 3});
    w->add_key("m.empty", std::vector<int64_t>{});
    w->add_key("b.float", -0.5);
    w->add_key("b.bool", true);
    w->add_chunk("note", "abc");
    for (bnb_tensor *x : t) w->add_tensor(x->name, x->type, &x->quant, Shape(x->shape, x->shape + x->n_dims));
    for (bnb_tensor *x : t) REQUIRE_MESSAGE(w->write_tensor(x, &err), err.msg);
    CHECK(read_bytes(path).empty()); // nothing stands under the name before the end
    REQUIRE_MESSAGE(w->finish(&err), err.msg);
    CHECK(TempDir::list(dir.file("")).size() == 1);

    const Bytes bytes = read_bytes(path);
    CHECK(bytes.size() == w->file_bytes());
    const File f = open_file(env, path);
    CHECK(bnb_file_tensor_count(f.get()) == 4);
    for (bnb_tensor *x : t) {
        const bnb_tensor *y = bnb_file_find(f.get(), x->name);
        check_same_tensor(x, y);
        for (int32_t p = 0; p < BNB_MAX_PLANES; p++) {
            const uint64_t n = bnb_plane_bytes(x->type, &x->quant, x->n_dims, x->shape, p);
            if (n) CHECK(reinterpret_cast<uintptr_t>(bnb_tensor_plane(y, p)) % (n >= 4096 ? 4096 : 256) == 0);
        }
    }
    CHECK(std::string(bnb_file_tensor(f.get(), 0)->name) == "small"); // in the order in which they were added
    CHECK(std::string(bnb_file_tensor(f.get(), 3)->name) == "bytes");
    CHECK(number(f, "a.int") == -5);
    CHECK(number(f, "b.bool") == 1);
    double v = 0;
    CHECK((bnb_file_f64(f.get(), "b.float", &v) == BNB_OK && v == -0.5));
    uint64_t n = 0;
    const int64_t *list = bnb_file_i64_array(f.get(), "m.list", &n);
    CHECK(std::vector<int64_t>(list, list + n) == std::vector<int64_t>{1, -2, 3});
    CHECK((bnb_file_i64_array(f.get(), "m.empty", &n) != nullptr && n == 0));
    const char *text = bnb_file_str(f.get(), "z.text", &n);
    CHECK(std::string(text, n) == "words");
    text = static_cast<const char *>(bnb_file_chunk(f.get(), "note", &n));
    CHECK(std::string(text, n) == "abc");
}

TEST_CASE("bnb writer: what cannot be a file is refused") {
    Env env;
    TempDir dir;
    bnb_error err = {};
    Ctx ctx(bnb_ctx_create(env, &err));
    const int64_t shape[] = {2, 3};
    bnb_tensor *x = bnb_tensor_new(ctx.get(), BNB_F32, nullptr, 2, shape, "x");
    bnb_tensor *y = bnb_tensor_new(ctx.get(), BNB_F16, nullptr, 2, shape, "x");
    REQUIRE(bnb_ctx_alloc(ctx.get(), env.cpu(), &err) == BNB_OK);
    memset(bnb_tensor_plane(x, 0), 0, 24);
    const auto attempt = [&](const std::function<bool(bnb::BnbWriter &)> &f, const char *words) {
        auto w = bnb::BnbWriter::create(dir.file("x.bnb"), &err);
        REQUIRE_MESSAGE(w, err.msg);
        err = {};
        CHECK_FALSE(f(*w));
        CHECK(is_sentence(err));
        CHECK_MESSAGE(contains(err.msg, words), err.msg);
        w.reset();
        CHECK(TempDir::list(dir.file("")).empty());
    };
    const auto add = [](bnb::BnbWriter &w, const std::string &name, const Shape &s) {
        w.add_tensor(name, BNB_F32, nullptr, s);
    };
    attempt(
        [&](auto &w) {
            add(w, "x", {2, 3});
            return w.finish(&err);
        },
        "'x' was added but not written");
    attempt([&](auto &w) { return w.write_tensor(x, &err); }, "more tensors are written");
    attempt(
        [&](auto &w) {
            add(w, "x", {3, 2});
            return w.write_tensor(x, &err);
        },
        "another type or shape");
    attempt(
        [&](auto &w) {
            add(w, "x", {2, 3});
            return w.write_tensor(y, &err);
        },
        "another type or shape");
    attempt(
        [&](auto &w) {
            add(w, "y", {2, 3});
            return w.write_tensor(x, &err);
        },
        "'x' is written where 'y' was added");
    attempt(
        [&](auto &w) {
            add(w, "x", {2});
            add(w, "x", {3});
            return w.finish(&err);
        },
        "'x' was added twice");
    attempt(
        [&](auto &w) {
            w.add_key("k", true);
            w.add_key("k", 1.0);
            return w.finish(&err);
        },
        "'k' was added twice");
    attempt(
        [&](auto &w) {
            w.add_key("", true);
            return w.finish(&err);
        },
        "a key has no name");
    attempt(
        [&](auto &w) {
            add(w, std::string(96, 'n'), {2});
            return w.finish(&err);
        },
        "cannot be a tensor's name");
    attempt(
        [&](auto &w) {
            add(w, "x", {});
            return w.finish(&err);
        },
        "1 to 4 dimensions");
    attempt(
        [&](auto &w) {
            add(w, "x", {INT64_MAX, INT64_MAX});
            return w.finish(&err);
        },
        "cannot be stored");
    attempt(
        [&](auto &w) {
            add(w, "x", {-1});
            return w.finish(&err);
        },
        "cannot be stored");
}

// ---- synthetic models ----------------------------------------------------------------------------------------------

TEST_CASE("synthetic: memory footprints are those of transformers") {
    Env env;
    const struct {
        const char *name;
        int32_t type;
        double gib;
    } cases[] = {
        {"opt-350m", BNB_F32, 1.234},  {"opt-350m", BNB_F16, 0.617},  {"opt-350m", BNB_INT8, 0.335},
        {"opt-350m", BNB_NF4, 0.194},  {"opt-350m", BNB_FP4, 0.194},  {"opt-1.3b", BNB_F32, 4.902},
        {"opt-1.3b", BNB_F16, 2.451},  {"opt-1.3b", BNB_INT8, 1.326}, {"opt-1.3b", BNB_NF4, 0.763},
        {"opt-6.7b", BNB_F16, 12.402}, {"opt-6.7b", BNB_INT8, 6.402}, {"opt-6.7b", BNB_NF4, 3.402},
        {"gpt2-xl", BNB_INT8, 1.528},  {"gpt2-xl", BNB_NF4, 0.841},
    };
    for (const auto &c : cases)
        for (int32_t dq : {0, 1}) { // what scales take is not counted
            bnb_error err = {};
            bnb_load_params p = load_params(c.type);
            p.double_quant = dq;
            Model m(bnb_model_synthetic(env, c.name, &p, 1, nullptr, &err));
            REQUIRE_MESSAGE(m, err.msg);
            bnb_model_info info = {};
            info.struct_size = sizeof info;
            bnb_model_get_info(m.get(), &info);
            CHECK_MESSAGE(std::fabs(double(info.footprint) / (1 << 30) - c.gib) <= 0.0005,
                          c.name << " " << bnb_type_name(c.type));
            CHECK(info.linear_type == c.type);
        }
    CHECK(bnb_env_bytes_peak(env) < 16u << 20); // nothing but metadata was made
    bnb_error err = {};
    CHECK_FALSE(Model(bnb_model_synthetic(env, "opt-1t", nullptr, 1, nullptr, &err)));
    CHECK(contains(err.msg, "opt-125m"));
}

TEST_CASE("synthetic: weights depend on seed and name only, and look like weights") {
    std::vector<std::vector<std::vector<Bytes>>> all; // run, tensor, plane
    for (int run = 0; run < 3; run++) {
        Env env(run == 0 ? 1 : 3);
        std::vector<std::vector<Bytes>> planes;
        for (int32_t type : {BNB_F32, BNB_F16, BNB_INT8, BNB_NF4, BNB_FP4}) {
            bnb_error err = {};
            bnb_load_params p = load_params(type);
            p.seed = run == 2 ? 8 : 7;
            p.double_quant = type == BNB_FP4;
            Model m(bnb_model_synthetic(env, "gpt-nano", &p, 0, nullptr, &err));
            REQUIRE_MESSAGE(m, err.msg);
            for (int32_t i = 0; i < bnb_model_tensor_count(m.get()); i++) {
                const bnb_tensor *t = bnb_model_tensor(m.get(), i);
                planes.push_back(planes_of(t));
                CHECK_MESSAGE(bnb_tensor_check_finite(env, t, &err) == BNB_OK, err.msg);
                if (run > 0 || !contains(t->name, ".mlp.c_fc.weight")) continue;
                const Doubles v = decode(t);
                double sum = 0, squares = 0;
                for (double x : v) sum += x, squares += x * x;
                CHECK(std::fabs(sum / double(v.size())) < 0.005);
                CHECK(std::sqrt(squares / double(v.size())) == doctest::Approx(0.02).epsilon(0.2));
            }
        }
        all.push_back(planes);
    }
    CHECK(all[0] == all[1]);
    CHECK(all[0] != all[2]);
    Env env;
    bnb_error err = {};
    Model m(bnb_model_synthetic(env, "gpt-nano", nullptr, 0, nullptr, &err)); // and it runs
    REQUIRE_MESSAGE(m, err.msg);
    bnb_session *s = bnb_session_create(m.get(), 16, &err);
    REQUIRE_MESSAGE(s, err.msg);
    const int32_t tokens[] = {1, 2, 3};
    CHECK_MESSAGE(bnb_session_sync(s, tokens, 3, &err) == BNB_OK, err.msg);
    bnb_session_free(s);
}

// ---- attacks -------------------------------------------------------------------------------------------------------

TEST_CASE("attacks: every hostile file of the corpus is refused with a sentence") {
    Env env;
    const std::string root = BNB_SOURCE_DIR "/tests/attacks/";
    size_t n = 0;
    for (const char *kind : {"safetensors", "directories"})
        for (const std::string &path : TempDir::list(root + kind)) {
            INFO(path);
            TempDir out;
            bnb_error err = {};
            CHECK_FALSE(Model(bnb_model_load(env, path.c_str(), nullptr, nullptr, &err)));
            CHECK(is_sentence(err));
            err = {};
            CHECK(convert(env, path, out.file("x.bnb"), load_params(BNB_NF4), &err) != BNB_OK);
            CHECK(is_sentence(err));
            CHECK(TempDir::list(out.file("")).empty());
            n++;
        }
    CHECK(n >= 40); // the corpus is there
}

TEST_SUITE_END();
