// test_quantized.cpp: checkpoints that bitsandbytes quantized, in; Hugging Face directories for it, out. The
// checkpoints are those of golden/make_checkpoints.py; golden/check_exports.py loads what is written here with the
// real packages.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../models/arch.h"
#include "../models/pytorch.h"
#include "../models/quant_state.h"
#include "../models/safetensors.h"
#include "safetensors_image.h"

#ifndef BNB_SOURCE_DIR
#define BNB_SOURCE_DIR "."
#endif

namespace {

using namespace test;
using nlohmann::json;

const std::string GOLDEN = BNB_SOURCE_DIR "/tests/golden/checkpoints/";

uint32_t crc32(const void *data, size_t n) {
    uint32_t c = ~0u;
    for (size_t i = 0; i < n; i++) {
        c ^= static_cast<const uint8_t *>(data)[i];
        for (int bit = 0; bit < 8; bit++) c = c >> 1 ^ (c & 1 ? 0xEDB88320u : 0);
    }
    return ~c;
}

// What bitsandbytes and transformers say of a checkpoint, see make_checkpoints.py.
struct Expect {
    int32_t n_prompt = 0, n_vocab = 0;
    std::vector<int32_t> prompt, greedy;
    Floats logits;                           // [n_prompt, n_vocab]
    std::map<std::string, uint32_t> weights; // canonical name -> CRC-32 of the dequantized values

    explicit Expect(const std::string &path) {
        std::ifstream f(path, std::ios::binary);
        int32_t n[4] = {};
        read(f, n, sizeof n);
        n_prompt = n[0], n_vocab = n[1];
        prompt.resize(size_t(n[0])), greedy.resize(size_t(n[2])), logits.resize(size_t(n[0]) * size_t(n[1]));
        read(f, prompt.data(), prompt.size() * 4);
        read(f, greedy.data(), greedy.size() * 4);
        read(f, logits.data(), logits.size() * 4);
        for (int32_t i = 0; i < n[3]; i++) {
            char name[65] = {};
            uint32_t crc = 0;
            read(f, name, 64);
            read(f, &crc, 4);
            std::string key = name;
            for (const char *prefix : {"transformer.", "model.decoder."})
                if (key.compare(0, strlen(prefix), prefix) == 0) key = key.substr(strlen(prefix));
            weights[key] = crc;
        }
        REQUIRE_MESSAGE(f, path);
    }
    static void read(std::ifstream &f, void *to, size_t n) { f.read(static_cast<char *>(to), std::streamsize(n)); }
};

std::vector<std::string> golden_names() {
    std::vector<std::string> names;
    for (const std::string &path : TempDir::list(GOLDEN))
        if (path.size() > 7 && path.compare(path.size() - 7, 7, ".expect") == 0)
            names.push_back(std::filesystem::path(path).stem().string());
    std::sort(names.begin(), names.end());
    return names;
}

// The values of a tensor as f32; -0 as +0.
Floats values_of(Env &env, const bnb_tensor *t) {
    Floats values(size_t(bnb_tensor_elements(t)));
    bnb_error err = {};
    Ctx ctx(bnb_ctx_create(env, &err));
    bnb_tensor *out = bnb_tensor_new(ctx.get(), BNB_F32, nullptr, t->n_dims, t->shape, "out");
    void *planes[BNB_MAX_PLANES] = {values.data()};
    REQUIRE(bnb_tensor_bind(out, planes, &err) == BNB_OK);
    REQUIRE_MESSAGE(bnb_dequantize(env, t, out, &err) == BNB_OK, err.msg);
    for (float &v : values) v += 0.0f;
    return values;
}

const bnb_tensor *tensor_of(const bnb_model *m, const std::string &name) {
    for (int32_t i = 0; i < bnb_model_tensor_count(m); i++)
        if (name == bnb_tensor_name(bnb_model_tensor(m, i))) return bnb_model_tensor(m, i);
    return nullptr;
}

Model loaded_in_f32(Env &env, const std::string &path, int32_t no_mmap = 0) {
    bnb_model_params p;
    bnb_model_params_default(&p, sizeof p);
    p.kv_type = p.compute_dtype = BNB_F32;
    p.no_mmap = no_mmap;
    bnb_error err = {};
    Model m(bnb_model_load(env, path.c_str(), nullptr, &p, &err));
    REQUIRE_MESSAGE(m, err.msg);
    return m;
}

// Of a file or of the shards of a directory: name -> tensor.
struct Parts {
    std::vector<Bytes> files;
    std::map<std::string, bnb::SourceTensor> tensors;

    explicit Parts(const std::string &dir) {
        std::vector<std::string> paths = TempDir::list(dir);
        std::sort(paths.begin(), paths.end());
        for (const std::string &path : paths) {
            if (std::filesystem::path(path).extension() != ".safetensors") continue;
            files.push_back(read_bytes(path));
            std::vector<bnb::SourceTensor> list;
            bnb_error err = {};
            REQUIRE_MESSAGE(bnb::safetensors_parse(files.back().data(), files.back().size(), path, &list, &err),
                            err.msg);
            for (const bnb::SourceTensor &t : list) CHECK(tensors.emplace(t.name, t).second);
        }
    }
    Bytes bytes(const std::string &name) const {
        const bnb::SourceTensor &t = tensors.at(name);
        const uint8_t *p = static_cast<const uint8_t *>(t.data);
        return Bytes(p, p + t.bytes);
    }
    std::vector<Stored> stored() const {
        std::vector<Stored> list;
        for (const auto &t : tensors) list.push_back({t.first, t.second.dtype, t.second.shape, bytes(t.first)});
        return list;
    }
};

// A copy of a golden checkpoint in which a test changes something.
struct Altered {
    TempDir dir;
    std::vector<Stored> tensors;

    explicit Altered(const std::string &name) : tensors(Parts(GOLDEN + name).stored()) {
        std::filesystem::copy(GOLDEN + name + "/config.json", dir.file("config.json"));
    }
    Stored &find(const std::string &end) { // the first whose name ends like this
        for (Stored &t : tensors)
            if (t.name.size() >= end.size() && t.name.compare(t.name.size() - end.size(), end.size(), end) == 0)
                return t;
        FAIL(end);
        return tensors[0];
    }
    void remove(const std::string &end) { tensors.erase(tensors.begin() + (&find(end) - tensors.data())); }
    void text(const std::string &bytes) { // of a quant_state
        Stored &s = find("c_attn.weight.quant_state.bitsandbytes__nf4");
        s.bytes = bytes_of(bytes);
        s.shape = {int64_t(bytes.size())};
    }
    void resize(const std::string &end, size_t n) {
        Stored &s = find(end);
        s.bytes.resize(n);
        s.shape = {int64_t(n)};
        s.dtype = "U8";
    }
    std::string write() {
        write_bytes(dir.file("model.safetensors"), safetensors(tensors));
        return dir.file("");
    }
};

bnb_error exported(Env &env, const std::string &src, const std::string &dst, int32_t type = -1,
                   uint64_t shard_bytes = 0, const bnb_load_params *load = nullptr) {
    bnb_load_params p = load ? *load : load_params(type);
    bnb_save_params save;
    bnb_save_params_default(&save, sizeof save);
    save.format = BNB_FORMAT_HF;
    if (shard_bytes) save.shard_bytes = shard_bytes;
    bnb_error err = {};
    bnb_convert_checkpoint(env, src.c_str(), dst.c_str(), &p, &save, nullptr, &err);
    return err;
}

void must_export(Env &env, const std::string &src, const std::string &dst, int32_t type = -1, uint64_t shard_bytes = 0,
                 const bnb_load_params *load = nullptr) {
    const bnb_error err = exported(env, src, dst, type, shard_bytes, load);
    REQUIRE_MESSAGE(err.code == BNB_OK, err.msg);
}

// Whether an address belongs to a mapping of a file with this name.
bool lies_in_file(const void *address, const std::string &name) {
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) {
        unsigned long long begin = 0, end = 0;
        if (sscanf(line.c_str(), "%llx-%llx", &begin, &end) != 2) continue;
        if (reinterpret_cast<uintptr_t>(address) >= begin && reinterpret_cast<uintptr_t>(address) < end)
            return line.size() > name.size() && line.compare(line.size() - name.size(), name.size(), name) == 0;
    }
    return false;
}

json json_of(const std::string &path) {
    std::ifstream f(path);
    REQUIRE_MESSAGE(f, path);
    return json::parse(f);
}

double largest_difference(const Floats &a, const Floats &b) {
    double diff = 0, top = 0;
    for (size_t i = 0; i < a.size(); i++) {
        diff = std::isnan(a[i]) ? INFINITY : std::max(diff, std::fabs(double(a[i]) - b[i]));
        top = std::max(top, std::fabs(double(b[i])));
    }
    return diff / top;
}

double distance(const Floats &a, const Floats &b) {
    double diff = 0, norm = 0;
    for (size_t i = 0; i < a.size(); i++)
        diff += (double(a[i]) - b[i]) * (double(a[i]) - b[i]), norm += double(b[i]) * b[i];
    return std::isnan(diff) ? INFINITY : std::sqrt(diff / norm);
}

} // namespace

TEST_SUITE_BEGIN("quantized");

// ---- in ------------------------------------------------------------------------------------------------------------

TEST_CASE("quantized: bitsandbytes' checkpoints hold the weights that it says, and give its logits and tokens") {
    Env env;
    CHECK(golden_names().size() >= 18);
    for (const std::string &name : golden_names())
        for (int32_t no_mmap : {0, 1}) {
            INFO(name, " ", no_mmap);
            const Expect want(GOLDEN + name + ".expect");
            const Model m = loaded_in_f32(env, GOLDEN + name, no_mmap);
            bool int8 = false;
            for (const auto &w : want.weights) {
                const bnb_tensor *t = tensor_of(m.get(), w.first);
                REQUIRE_MESSAGE(t, w.first);
                CHECK(bnb_type_is_quantized(t->type));
                int8 |= t->type == BNB_INT8;
                const Floats values = values_of(env, t);
                CHECK_MESSAGE(crc32(values.data(), values.size() * 4) == w.second, w.first);
            }
            bnb_error err = {};
            const std::unique_ptr<bnb_session, void (*)(bnb_session *)> s(bnb_session_create(m.get(), 0, &err),
                                                                          bnb_session_free);
            REQUIRE_MESSAGE(s, err.msg);
            Floats logits(want.logits.size());
            REQUIRE(bnb_session_logits_all(s.get(), want.prompt.data(), want.n_prompt, logits.data(), &err) == BNB_OK);
            // int8: a last bit that differs makes another 8-bit activation in the next layer, see test_models.cpp
            if (int8) CHECK(distance(logits, want.logits) <= 1.2e-2);
            else CHECK(largest_difference(logits, want.logits) <= 1e-5);
            std::vector<int32_t> tokens = want.prompt;
            for (size_t i = 0; !int8 && i < want.greedy.size(); i++) {
                REQUIRE(bnb_session_sync(s.get(), tokens.data(), int64_t(tokens.size()), &err) == BNB_OK);
                const float *last = bnb_session_logits(s.get(), nullptr);
                tokens.push_back(int32_t(std::max_element(last, last + want.n_vocab) - last));
                CHECK(tokens.back() == want.greedy[i]);
            }
        }
}

TEST_CASE("quantized: planes are those of the file, at the same addresses where they are aligned") {
    Env env;
    bnb_load_params load = load_params(-1);
    bnb_convert_result result = {};
    load.result = &result;
    for (const char *name : {"gpt2-nf4-nested", "opt-int8"}) {
        const Model m = loaded(env, GOLDEN + name, &load);
        const Parts file(GOLDEN + name);
        const std::string prefix = std::string(name) == "opt-int8" ? "model.decoder." : "transformer.";
        for (int32_t i = 0; i < bnb_model_tensor_count(m.get()); i++) {
            const bnb_tensor *t = bnb_model_tensor(m.get(), i);
            const std::string w = prefix + t->name;
            INFO(w);
            const std::vector<Bytes> planes = planes_of(t);
            if (t->type == BNB_NF4)
                CHECK(planes == std::vector<Bytes>{file.bytes(w), file.bytes(w + ".absmax"),
                                                   file.bytes(w + ".nested_absmax"),
                                                   file.bytes(w + ".nested_quant_map")});
            else if (t->type == BNB_INT8)
                CHECK(planes == std::vector<Bytes>{file.bytes(w), file.bytes(w.substr(0, w.size() - 6) + "SCB")});
        }
        CHECK(result.n_tensors == bnb_model_tensor_count(m.get()));
        CHECK(result.n_quantized == (std::string(name) == "opt-int8" ? 6 : 4));
        CHECK(result.bytes_in == result.bytes_out);
        CHECK(result.seconds >= result.read_s + result.quantize_s);
    }
    bnb_model_params params;
    bnb_model_params_default(&params, sizeof params);
    bnb_error err = {};
    for (int32_t no_mmap : {0, 1}) {
        params.no_mmap = params.mlock = no_mmap;
        const Model m(bnb_model_load(env, (GOLDEN + "opt-int8").c_str(), nullptr, &params, &err));
        REQUIRE_MESSAGE(m, err.msg);
        for (int32_t i = 0; i < bnb_model_tensor_count(m.get()); i++)
            for (int32_t p = 0; p < BNB_MAX_PLANES; p++)
                if (const void *plane = bnb_tensor_plane(bnb_model_tensor(m.get(), i), p))
                    CHECK(lies_in_file(plane, "model.safetensors") == !no_mmap);
    }
}

TEST_CASE("quantized: any alignment, any order of tensors, one weight in several shards") {
    Env env;
    const Model want = loaded(env, GOLDEN + "gpt2-nf4-nested");
    for (int pad = 0; pad < 8; pad++) {
        Altered a("gpt2-nf4-nested");
        if (pad % 2) std::reverse(a.tensors.begin(), a.tensors.end());
        write_bytes(a.dir.file("model.safetensors"), safetensors(a.tensors, std::string(size_t(pad), ' ')));
        const Model got = loaded(env, a.dir.file(""));
        for (int32_t i = 0; i < bnb_model_tensor_count(want.get()); i++)
            check_same_tensor(bnb_model_tensor(got.get(), i), bnb_model_tensor(want.get(), i));
    }
    Altered a("gpt2-nf4-nested");
    json map;
    for (size_t i = 0; i < a.tensors.size(); i++) { // each tensor in a file of its own
        const std::string file = "part-" + std::to_string(i) + ".safetensors";
        map[a.tensors[i].name] = file;
        write_bytes(a.dir.file(file), safetensors({a.tensors[i]}));
    }
    write_bytes(a.dir.file("model.safetensors.index.json"), bytes_of(json{{"weight_map", map}}.dump()));
    const Model got = loaded(env, a.dir.file(""));
    for (int32_t i = 0; i < bnb_model_tensor_count(want.get()); i++)
        check_same_tensor(bnb_model_tensor(got.get(), i), bnb_model_tensor(want.get(), i));
}

TEST_CASE("quantized: it is loaded as it is, dequantized, or converted to another type") {
    Env env;
    TempDir dir;
    const Model stored = loaded(env, GOLDEN + "gpt2-nf4-nested");
    const bnb_tensor *s = tensor_of(stored.get(), "h.0.attn.c_attn.weight");
    const bnb_load_params same = load_params(BNB_NF4), f32 = load_params(BNB_F32), int8 = load_params(BNB_INT8);
    check_same_tensor(tensor_of(loaded(env, GOLDEN + "gpt2-nf4-nested", &same).get(), s->name), s); // nested, as stored
    CHECK(values_of(env, tensor_of(loaded(env, GOLDEN + "gpt2-nf4-nested", &f32).get(), s->name)) == values_of(env, s));
    check_refused(env, GOLDEN + "gpt2-nf4-nested", BNB_E_UNSUPPORTED, "holds nf4 weights and is loaded as it is",
                  &int8);
    bnb_error err = {};
    REQUIRE_MESSAGE(convert(env, GOLDEN + "gpt2-nf4-nested", dir.file("x.bnb"), int8, &err) == BNB_OK, err.msg);
    const File file = open_file(env, dir.file("x.bnb"));
    CHECK(distance(values_of(env, bnb_file_find(file.get(), s->name)), values_of(env, s)) < 0.01);
}

TEST_CASE("quantized: checksums are compared where that is asked for") {
    Env env;
    TempDir dir;
    Bytes file = read_bytes(GOLDEN + "mingpt-nf4-nested-128/model.pt");
    std::vector<bnb::SourceTensor> tensors;
    bnb_error err = {};
    REQUIRE_MESSAGE(bnb::pytorch_parse(file.data(), file.size(), "model.pt", &tensors, nullptr, &err), err.msg);
    const auto wte = std::find_if(tensors.begin(), tensors.end(),
                                  [](const bnb::SourceTensor &t) { return t.name == "transformer.wte.weight"; });
    REQUIRE((wte != tensors.end() && wte->data));
    bnb_load_params check = load_params(-1);
    check.check = 1;
    write_bytes(dir.file("model.pt"), file);
    CHECK(loaded(env, dir.file(""), &check));
    file[size_t(static_cast<const uint8_t *>(wte->data) - file.data())] ^= 1; // the last bit of a weight
    write_bytes(dir.file("model.pt"), file);
    CHECK(loaded(env, dir.file("")));
    check_refused(env, dir.file(""), BNB_E_FORMAT, "checksum", &check);
    REQUIRE(convert(env, GOLDEN + "opt-int8", dir.file("x.bnb"), load_params(-1), &err) == BNB_OK);
    CHECK(loaded(env, dir.file("x.bnb"), &check));
    file = read_bytes(dir.file("x.bnb"));
    file.back() ^= 1;
    write_bytes(dir.file("x.bnb"), file);
    check_refused(env, dir.file("x.bnb"), BNB_E_FORMAT, "hash", &check);
    CHECK(convert(env, dir.file("x.bnb"), dir.file("y.bnb"), check, &err) == BNB_E_FORMAT);
}

TEST_CASE("quantized: what a hostile checkpoint says is refused with a sentence") {
    Env env;
    const std::string good =
        R"({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [192, 64], "nested_blocksize": 256, )"
        R"("nested_dtype": "float32", "nested_offset": 0.25})";
    const auto with = [&](const std::string &from, const std::string &to) {
        std::string s = good;
        const size_t at = s.find(from);
        REQUIRE(at != std::string::npos);
        return s.replace(at, from.size(), to);
    };
    {
        Altered a("gpt2-nf4-nested");
        a.text(good);
        CHECK(loaded(env, a.write()));
    }
    const struct {
        std::string text;
        bnb_status code;
        const char *words;
    } states[] = {
        {"", BNB_E_FORMAT, "is not valid JSON"},
        {"[]", BNB_E_FORMAT, "is not a JSON object"},
        {"{}", BNB_E_FORMAT, "'quant_type' is not \"nf4\""},
        {good.substr(0, 80), BNB_E_FORMAT, "is not valid JSON"},
        {good + '\0', BNB_E_FORMAT, "NUL"},
        {with("bfloat16", "bfloat\xff"), BNB_E_FORMAT, "is not valid JSON"},
        {with("\"blocksize\": 64", "\"blocksize\": 64, \"blocksize\": 128"), BNB_E_FORMAT, "stands twice"},
        {with("\"dtype\"", "\"extra\": 1, \"dtype\""), BNB_E_FORMAT, "the key 'extra' is not known"},
        {"{\"a\":" + std::string(100, '[') + std::string(100, ']') + "}", BNB_E_FORMAT, "nested too deep"},
        {good + std::string(5000, ' '), BNB_E_LIMIT, "more than 4096 bytes"},
        {with("\"nf4\"", "\"fp4\""), BNB_E_FORMAT, "'quant_type' is not \"nf4\""},
        {with("\"nf4\"", "7"), BNB_E_FORMAT, "'quant_type' is not \"nf4\""},
        {with("bfloat16", "float64"), BNB_E_FORMAT, "'dtype' is not float32, float16 or bfloat16"},
        {with("64,", "0,"), BNB_E_FORMAT, "the blocksize is 0"},
        {with("64,", "48,"), BNB_E_FORMAT, "the blocksize is 48"},
        {with("64,", "-64,"), BNB_E_FORMAT, "'blocksize' is not a whole number"},
        {with("64,", "64.0,"), BNB_E_FORMAT, "'blocksize' is not a whole number"},
        {with("64,", "18446744073709551615,"), BNB_E_FORMAT, "'blocksize' is not a whole number"},
        {with("64,", "32,"), BNB_E_FORMAT, "absmax"}, // twice as many blocks as there are scales
        {with("[192, 64]", "null"), BNB_E_FORMAT, "'shape' is not a list"},
        {with("[192, 64]", "[]"), BNB_E_FORMAT, "'shape' is not a list"},
        {with("[192, 64]", "[192, -64]"), BNB_E_FORMAT, "'shape' is not a list"},
        {with("[192, 64]", "[1,1,1,1,12288]"), BNB_E_FORMAT, "'shape' is not a list"},
        {with("[192, 64]", "[192, 65]"), BNB_E_FORMAT, "6240 are needed"},
        {with("[192, 64]", "[4294967296, 4294967296]"), BNB_E_FORMAT, "no such weight can be"},
        {with("[192, 64]", "[9223372036854775807]"), BNB_E_FORMAT, "no such weight can be"},
        {with("[192, 64]", "[18446744073709551615]"), BNB_E_FORMAT, "'shape' is not a list"},
        {with("[192, 64]", "[64, 192]"), BNB_E_SHAPE, "has the shape [64, 192]"},
        {with("256,", "128,"), BNB_E_FORMAT, "64 and 128"},
        {with("float32\",", "float16\","), BNB_E_UNSUPPORTED, "'nested_dtype' is not"},
        {with("0.25", "1e300"), BNB_E_FORMAT, "'nested_offset' is not a number"},
        {with("0.25", "null"), BNB_E_FORMAT, "'nested_offset' is not a number"},
        {with(", \"nested_offset\": 0.25", ""), BNB_E_FORMAT, "'nested_offset' is not a number"},
        {R"({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [192, 64]})", BNB_E_FORMAT,
         "F32 and 768"},
    };
    for (const auto &c : states) {
        Altered a("gpt2-nf4-nested");
        a.text(c.text);
        INFO(c.text);
        check_refused(env, a.write(), c.code, c.words);
    }
    const struct {
        const char *words;
        bnb_status code;
        std::function<void(Altered &)> change;
    } cases[] = {
        {"lacks its", BNB_E_FORMAT, [](Altered &a) { a.remove("c_attn.weight.absmax"); }},
        {"lacks its", BNB_E_FORMAT, [](Altered &a) { a.remove("c_attn.weight.quant_map"); }},
        {"lacks its", BNB_E_FORMAT, [](Altered &a) { a.remove("c_attn.weight.nested_absmax"); }},
        {"lacks its", BNB_E_FORMAT, [](Altered &a) { a.remove("c_attn.weight.nested_quant_map"); }},
        {"describes a weight that is not there", BNB_E_FORMAT, [](Altered &a) { a.remove("c_attn.weight"); }},
        {"has the shape [6144, 1]", BNB_E_SHAPE,
         [](Altered &a) { a.remove("c_attn.weight.quant_state.bitsandbytes__nf4"); }},
        {"are needed", BNB_E_FORMAT, [](Altered &a) { a.resize("c_attn.weight", 6143); }},
        {"are needed", BNB_E_FORMAT, [](Altered &a) { a.resize("c_attn.weight.absmax", 191); }},
        {"are needed", BNB_E_FORMAT, [](Altered &a) { a.resize("c_attn.weight.quant_map", 64); }},
        {"are needed", BNB_E_FORMAT, [](Altered &a) { a.resize("c_attn.weight.nested_quant_map", 0); }},
        {"is not bitsandbytes' map of nf4: its value 3", BNB_E_UNSUPPORTED,
         [](Altered &a) { a.find("c_attn.weight.quant_map").bytes[12] ^= 1; }},
        {"no 4-bit type 'af4'", BNB_E_UNSUPPORTED,
         [](Altered &a) {
             a.find("quant_state.bitsandbytes__nf4")
                 .name.replace(a.find("quant_state.bitsandbytes__nf4").name.size() - 3, 3, "af4");
         }},
        {"described twice", BNB_E_FORMAT,
         [](Altered &a) {
             Stored s = a.find("c_attn.weight.quant_state.bitsandbytes__nf4");
             s.name.replace(s.name.size() - 3, 3, "fp4");
             std::string text(s.bytes.begin(), s.bytes.end());
             text.replace(text.find("nf4"), 3, "fp4");
             s.bytes = bytes_of(text);
             a.tensors.push_back(s);
             for (int i = 0; i < 16; i++)
                 memcpy(&a.find("c_attn.weight.quant_map").bytes[size_t(i) * 4], &bnb_nf4_map[i], 4);
         }},
        {"is not a list of bytes", BNB_E_FORMAT,
         [](Altered &a) {
             a.text(std::string(8, ' '));
             a.find("c_attn.weight.quant_state.bitsandbytes__nf4").dtype = "F32";
             a.find("c_attn.weight.quant_state.bitsandbytes__nf4").shape = {2};
         }},
        {"NaN", BNB_E_NUMERIC, [](Altered &a) { memset(a.find("c_attn.weight.nested_absmax").bytes.data(), 255, 4); }},
    };
    for (const auto &c : cases) {
        Altered a("gpt2-nf4-nested");
        c.change(a);
        INFO(std::string(c.words));
        check_refused(env, a.write(), c.code, c.words);
    }
    const struct {
        const char *words;
        bnb_status code;
        std::function<void(Altered &)> change;
    } eight[] = {
        {"is not a matrix of I8", BNB_E_FORMAT, [](Altered &a) { a.remove("c_attn.weight"); }},
        {"is not a matrix of I8", BNB_E_FORMAT, [](Altered &a) { a.find("c_attn.weight").dtype = "U8"; }},
        {"is not a matrix of I8", BNB_E_FORMAT, [](Altered &a) { a.find("c_attn.weight").shape = {192 * 64}; }},
        {"has the dtype I8", BNB_E_TYPE, [](Altered &a) { a.remove("c_attn.SCB"); }},
        {"are needed", BNB_E_FORMAT, [](Altered &a) { a.resize("c_attn.SCB", 764); }},
        {"are needed", BNB_E_FORMAT,
         [](Altered &a) {
             a.find("c_attn.weight").shape = {64, 192};
         }},
        {"a layout for Turing or Ampere", BNB_E_UNSUPPORTED,
         [](Altered &a) { a.find("c_attn.weight_format").bytes[0] = 2; }},
        {"a layout for Turing or Ampere", BNB_E_UNSUPPORTED, [](Altered &a) { a.resize("c_attn.weight_format", 4); }},
        {"is infinite", BNB_E_NUMERIC,
         [](Altered &a) {
             const float inf = INFINITY;
             memcpy(a.find("c_attn.SCB").bytes.data() + 8, &inf, 4);
         }},
    };
    for (const auto &c : eight) {
        Altered a("gpt2-int8");
        c.change(a);
        INFO(std::string(c.words));
        check_refused(env, a.write(), c.code, c.words);
    }
    Altered old("gpt2-int8"); // what came before weight_format is rows
    for (int i = 0; i < 4; i++) old.remove(".weight_format");
    CHECK(loaded(env, old.write()));
    for (const char *threshold : {"-1", "\"6\"", "true", "1e39", "[]"}) {
        Altered a("gpt2-int8");
        json config = json_of(a.dir.file("config.json"));
        config["quantization_config"]["llm_int8_threshold"] = json::parse(threshold);
        write_bytes(a.dir.file("config.json"), bytes_of(config.dump()));
        check_refused(env, a.write(), BNB_E_FORMAT, "'llm_int8_threshold' is not a number from 0 on");
    }
}

// ---- memory and time -----------------------------------------------------------------------------------------------

// A GPT-2 of zeros whose file has no blocks on the disk.
uint64_t write_zeros(const TempDir &dir, int64_t C, int64_t L) {
    const bnb::Arch &arch = *bnb::arch_find("gpt2");
    bnb::Config c;
    c.n_vocab = 64, c.n_ctx = 8, c.n_embd = C, c.n_layer = L, c.n_head = 1, c.n_ff = 4 * C;
    json header, config = {{"model_type", "gpt2"}, {"n_embd", C},      {"n_layer", L},
                           {"n_head", 1},          {"n_positions", 8}, {"vocab_size", 64}};
    uint64_t bytes = 0;
    for (const bnb::TensorInfo &t : arch.tensors(c)) {
        Shape shape = t.shape;
        if (arch.may_be_transposed(t.name)) std::reverse(shape.begin(), shape.end());
        const uint64_t begin = bytes;
        bytes += uint64_t(count(shape)) * 4;
        header[t.name] = {{"dtype", "F32"}, {"shape", shape}, {"data_offsets", {begin, bytes}}};
    }
    const std::string path = dir.file("model.safetensors");
    write_bytes(path, raw_file(header.dump(), 0));
    std::filesystem::resize_file(path, std::filesystem::file_size(path) + bytes);
    write_bytes(dir.file("config.json"), bytes_of(config.dump()));
    return bytes;
}

uint64_t peak_bytes() {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return uint64_t(usage.ru_maxrss) * 1024;
}

#ifndef TEST_ASAN // which keeps what was freed
TEST_CASE("quantized: peak memory on load is the result and two of the largest tensors") {
    TempDir dir;
    const int64_t C = 768, L = 5;
    const uint64_t bytes = write_zeros(dir, C, L), largest = uint64_t(4 * C * C) * 4;
    for (int32_t type : {BNB_NF4, BNB_INT8}) {
        // In a process of its own, whose peak is that of the loading. It says by its status what was wrong.
        const pid_t child = fork();
        if (child == 0) {
            const uint64_t before = peak_bytes();
            bnb_env *env = bnb_env_create(nullptr, nullptr);
            bnb_load_params p = load_params(type);
            bnb_convert_result r = {};
            p.result = &r;
            bnb_model *m = bnb_model_load(env, dir.file("").c_str(), &p, nullptr, nullptr);
            const uint64_t peak = peak_bytes() - before, allowance = 4 << 20; // code and metadata, threads' stacks
            _exit(!m || r.bytes_in != bytes ? 1 : peak > r.bytes_out + 2 * largest + allowance ? 2 : 0);
        }
        int status = -1;
        REQUIRE(waitpid(child, &status, 0) == child);
        CHECK(WIFEXITED(status));
        CHECK(WEXITSTATUS(status) == 0);
    }
}
#endif

// ---- out -----------------------------------------------------------------------------------------------------------

TEST_CASE("export: .bnb to a Hugging Face directory and back is the same file") {
    Env env;
    for (const std::string &name : golden_names()) {
        INFO(name);
        TempDir dir;
        bnb_error err = {};
        REQUIRE_MESSAGE(convert(env, GOLDEN + name, dir.file("a.bnb"), load_params(-1), &err) == BNB_OK, err.msg);
        must_export(env, dir.file("a.bnb"), dir.file("hf"), -1, 30000);
        REQUIRE_MESSAGE(convert(env, dir.file("hf"), dir.file("b.bnb"), load_params(-1), &err) == BNB_OK, err.msg);
        CHECK(read_bytes(dir.file("a.bnb")) == read_bytes(dir.file("b.bnb")));
    }
    for (const char *name : {"gpt2", "gpt2-odd", "mingpt", "opt", "opt-post", "opt-nobias"})
        for (int32_t type : {BNB_NF4, BNB_FP4, BNB_INT8, BNB_F16, BNB_BF16, BNB_F32})
            for (int32_t double_quant : {0, 1}) {
                if (double_quant && bnb_type_bits(type) != 4) continue;
                INFO(name, " ", bnb_type_name(type), " ", double_quant);
                TempDir dir;
                bnb_load_params p = load_params(type);
                p.double_quant = double_quant;
                p.blocksize = double_quant ? 256 : 32;
                p.threshold = 3.5f;
                bnb_error err = {};
                const std::string source = BNB_SOURCE_DIR "/tests/golden/models/" + std::string(name);
                REQUIRE_MESSAGE(convert(env, source, dir.file("a.bnb"), p, &err) == BNB_OK, err.msg);
                must_export(env, dir.file("a.bnb"), dir.file("hf"));
                REQUIRE_MESSAGE(convert(env, dir.file("hf"), dir.file("b.bnb"), load_params(-1), &err) == BNB_OK,
                                err.msg);
                CHECK(read_bytes(dir.file("a.bnb")) == read_bytes(dir.file("b.bnb")));
            }
}

TEST_CASE("export: what bitsandbytes wrote is written again byte for byte") {
    Env env;
    for (const std::string &name : golden_names()) {
        const Parts source(GOLDEN + name);
        if (source.tensors.empty() || name.compare(0, 6, "mingpt") == 0) continue; // PyTorch's files; another layout
        INFO(name);
        TempDir dir;
        must_export(env, GOLDEN + name, dir.file("hf"), -1, 40000);
        const Parts copy(dir.file("hf"));
        CHECK(copy.tensors.size() == source.tensors.size());
        for (const auto &t : source.tensors) {
            INFO(t.first);
            REQUIRE(copy.tensors.count(t.first) == 1);
            CHECK(copy.bytes(t.first) == source.bytes(t.first));
            if (t.second.dtype == "U8" && t.second.shape.size() == 2) continue; // codes under another quant_storage
            if (copy.tensors.at(t.first).dtype == "U8" && copy.tensors.at(t.first).shape.size() == 2) continue;
            CHECK(copy.tensors.at(t.first).dtype == t.second.dtype);
            CHECK(copy.tensors.at(t.first).shape == t.second.shape);
        }
        json a = json_of(GOLDEN + name + "/config.json"), b = json_of(dir.file("hf/config.json"));
        for (const char *key : {"bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"}) // not a property of the weights
            for (json *c : {&a, &b}) (*c)["quantization_config"].erase(key);
        CHECK(a["quantization_config"]["quant_method"] == b["quantization_config"]["quant_method"]);
        for (const char *key : {"load_in_4bit", "load_in_8bit", "llm_int8_threshold", "bnb_4bit_use_double_quant"})
            CHECK(a["quantization_config"][key] == b["quantization_config"][key]);
        for (const auto &item : b.items())
            if (item.key() != "quantization_config" && item.key() != "torch_dtype" && a.contains(item.key()))
                CHECK_MESSAGE(item.value() == a[item.key()], item.key());
    }
}

TEST_CASE("export: shards, their index, and elements at multiples of their size") {
    Env env;
    TempDir dir;
    for (uint64_t shard : {uint64_t(1), uint64_t(20000), uint64_t(60000), uint64_t(1) << 40}) {
        const std::string out = dir.file("hf-" + std::to_string(shard));
        must_export(env, GOLDEN + "gpt2-nf4-nested", out, -1, shard);
        const Parts parts(out);
        size_t begin = 0;
        for (const auto &t : parts.tensors) {
            uint64_t size = 1;
            for (int64_t d : t.second.shape) size *= uint64_t(d);
            size = size ? t.second.bytes / size : 1;
            for (const Bytes &f : parts.files)
                if (t.second.data >= f.data() && t.second.data < f.data() + f.size())
                    begin = size_t(static_cast<const uint8_t *>(t.second.data) - f.data());
            CHECK(begin % size == 0);
        }
        if (shard == uint64_t(1) << 40) {
            CHECK(parts.files.size() == 1);
            CHECK(!std::filesystem::exists(out + "/model.safetensors.index.json"));
            continue;
        }
        CHECK(parts.files.size() == (shard == 1 ? 16u : shard == 20000 ? 3u : 1u));
        if (parts.files.size() == 1) continue;
        const json index = json_of(out + "/model.safetensors.index.json");
        uint64_t total = 0;
        for (const auto &t : parts.tensors) {
            total += t.second.bytes;
            const std::string file = index["weight_map"][t.first];
            CHECK(std::filesystem::exists(out + "/" + file));
        }
        CHECK(index["metadata"]["total_size"] == total);
        CHECK(index["weight_map"].size() == parts.tensors.size());
        check_same_tensor(tensor_of(loaded(env, out).get(), "h.0.mlp.c_fc.weight"),
                          tensor_of(loaded(env, GOLDEN + "gpt2-nf4-nested").get(), "h.0.mlp.c_fc.weight"));
    }
}

TEST_CASE("export: modules that are not quantized are named in config.json") {
    Env env;
    TempDir dir;
    const std::string tied = BNB_SOURCE_DIR "/tests/golden/models/gpt2",
                      untied = BNB_SOURCE_DIR "/tests/golden/models/gpt2-odd";
    int n = 0;
    const auto skipped = [&](const std::string &source, const char *skip) {
        bnb_load_params p = load_params(BNB_NF4);
        p.skip_modules = skip;
        const std::string out = dir.file("hf" + std::to_string(n++));
        must_export(env, source, out, -1, 0, &p);
        return json_of(out + "/config.json")["quantization_config"]["llm_int8_skip_modules"];
    };
    CHECK(skipped(tied, nullptr) == json());
    CHECK(skipped(untied, nullptr) == json());
    CHECK(skipped(tied, "") == json());
    CHECK(skipped(untied, "") == json::array()); // the head is quantized
    CHECK(skipped(untied, "h.0.attn.c_proj,lm_head") == json({"transformer.h.0.attn.c_proj", "lm_head"}));
    CHECK(skipped(untied, "h.0.attn.c_proj") == json({"transformer.h.0.attn.c_proj"}));
    must_export(env, GOLDEN + "gpt2-nf4", dir.file("dequantized"), BNB_F32); // [in, out], of what was [out, in]
    const std::string w = "h.0.mlp.c_fc.weight";
    CHECK(values_of(env, tensor_of(loaded(env, dir.file("dequantized")).get(), w)) ==
          values_of(env, tensor_of(loaded(env, GOLDEN + "gpt2-nf4").get(), w)));
    bnb_load_params all = load_params(BNB_F16);
    must_export(env, tied, dir.file("plain"), -1, 0, &all);
    CHECK(!json_of(dir.file("plain/config.json")).contains("quantization_config"));
    CHECK(json_of(dir.file("plain/config.json"))["torch_dtype"] == "float16");
    CHECK(Parts(dir.file("plain")).tensors.at("transformer.h.0.mlp.c_fc.weight").shape == Shape{64, 256}); // [in, out]
}

TEST_CASE("export: a failure leaves nothing, and nothing is overwritten") {
    Env env;
    TempDir dir;
    const std::string out = dir.file("hf");
    std::filesystem::create_directory(out);
    must_export(env, GOLDEN + "opt-int8", out); // empty: it may be taken
    const Bytes before = read_bytes(out + "/config.json");
    const bnb_error err = exported(env, GOLDEN + "gpt2-int8", out);
    CHECK(is_sentence(err));
    CHECK(contains(err.msg, "is there already and is not an empty directory"));
    CHECK(read_bytes(out + "/config.json") == before);
    CHECK(exported(env, GOLDEN + "gpt2-int8", dir.file("no/such/place")).code == BNB_E_IO);
    bnb_load_params p = load_params(BNB_F16); // it fails in the middle: the threshold's tensor is NaN
    Altered nan("gpt2-int8");
    memset(nan.find("mlp.c_proj.SCB").bytes.data(), 255, 4);
    CHECK(exported(env, nan.write(), dir.file("broken"), -1, 1, &p).code == BNB_E_NUMERIC);
    CHECK(TempDir::list(dir.file("")).size() == 1);
}

TEST_SUITE_END();
