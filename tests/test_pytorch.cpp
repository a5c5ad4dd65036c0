// test_pytorch.cpp: files of torch.save: what torch wrote is read bit for bit, what nobody should have written is
// refused.
//
// Golden: golden/pytorch, made and checked by torch (see golden/make_pytorch.py). Hostile: attacks/pytorch (see
// attacks/make_pytorch.py), every opcode, every cut of a file, and random changes. Run from the repository's root.
#include <doctest/doctest.h>

#include <algorithm>
#include <set>

#include "../models/checkpoint.h"
#include "../models/pytorch.h"
#include "util.h"

#include "fuzz/fuzz_pytorch.cpp"

#ifndef BNB_SOURCE_DIR
#define BNB_SOURCE_DIR "."
#endif

namespace {

using namespace test;

using Bytes = std::vector<uint8_t>;

const std::string golden = BNB_SOURCE_DIR "/tests/golden/pytorch", attacks = BNB_SOURCE_DIR "/tests/attacks/pytorch";

std::string base_name(const std::string &path) { return path.substr(path.rfind('/') + 1); }

bool begins_with(const std::string &s, const std::string &begin) { return s.compare(0, begin.size(), begin) == 0; }

std::vector<std::string> split(const std::string &s, char at) {
    std::vector<std::string> parts(1);
    for (char c : s) {
        if (c == at) parts.emplace_back();
        else parts.back() += c;
    }
    return parts;
}

// A file with the tensors in it.
struct Loaded {
    Bytes bytes;
    std::vector<bnb::SourceTensor> tensors;
    std::vector<std::string> notes;
    bnb_error err = {};
    bool ok = false;

    explicit Loaded(Bytes b) : bytes(std::move(b)) {
        ok = bnb::pytorch_parse(bytes.data(), bytes.size(), "dir/x.pt", &tensors, &notes, &err);
        CHECK(ok == bnb::pytorch_parse(bytes.data(), bytes.size(), "dir/x.pt", &again_, nullptr,
                                       nullptr)); // both may be NULL
        if (!ok) CHECK(is_sentence(err));
        if (!ok) CHECK_MESSAGE(begins_with(err.msg, "dir/x.pt: "), err.msg);
    }
    explicit Loaded(const std::string &b) : Loaded(Bytes(b.begin(), b.end())) {}

    const bnb::SourceTensor *find(const std::string &name) const {
        for (const bnb::SourceTensor &t : tensors)
            if (t.name == name) return &t;
        return nullptr;
    }

private:
    std::vector<bnb::SourceTensor> again_;
};

void check_refused(const Loaded &file, bnb_status code, const std::string &words) {
    CHECK(!file.ok);
    CHECK_MESSAGE(file.err.code == code, file.err.msg);
    CHECK_MESSAGE(contains(file.err.msg, words), "'" << file.err.msg << "' lacks '" << words << "'");
}

Bytes dense(const bnb::SourceTensor &t) {
    const uint8_t *p = static_cast<const uint8_t *>(t.data);
    if (t.data) return Bytes(p, p + t.bytes);
    REQUIRE(t.strided);
    Bytes out(t.bytes);
    bnb::strided_gather(*t.strided, 0, t.shape[0], out.data());
    return out;
}

Bytes from_hex(const std::string &hex) {
    Bytes out;
    for (size_t i = 0; i + 1 < hex.size(); i += 2) out.push_back(uint8_t(std::stoul(hex.substr(i, 2), nullptr, 16)));
    return out;
}

// ---- pickles for tests
// ---------------------------------------------------------------------------------------------------

std::string le(uint64_t n, size_t bytes) {
    std::string s;
    pytorch_fuzz::put(&s, n, bytes);
    return s;
}

std::string text_op(const std::string &s) { return "X" + le(s.size(), 4) + s; }
std::string int_op(int64_t n) { return "\x8A\x08" + le(uint64_t(n), 8); }
std::string global_op(const std::string &module, const std::string &name) { return "c" + module + "\n" + name + "\n"; }

std::string ints_op(const Shape &list) {
    std::string s = "(";
    for (int64_t n : list) s += int_op(n);
    return s + "t";
}

std::string tensor_op(const std::string &storage_class, const std::string &key, int64_t count, const Shape &shape,
                      const Shape &strides) {
    return global_op("torch._utils", "_rebuild_tensor_v2") + "((" + text_op("storage") +
           global_op("torch", storage_class) + text_op(key) + text_op("cpu") + int_op(count) + "tQ" + int_op(0) +
           ints_op(shape) + ints_op(strides) + "\x89" + global_op("collections", "OrderedDict") + ")RtR";
}

Shape dense_strides(const Shape &shape) {
    Shape strides(shape.size(), 1);
    for (size_t d = shape.size(); d-- > 1;) strides[d - 1] = strides[d] * shape[d];
    return strides;
}

// What torch.save would make of these tensors.
std::string saved(const std::vector<bnb::SourceTensor> &tensors) {
    std::string pickle = "\x80\x02}(";
    std::vector<std::pair<std::string, std::string>> entries(1);
    for (const bnb::SourceTensor &t : tensors) {
        const std::string key = std::to_string(entries.size() - 1);
        REQUIRE(t.type == BNB_F32);
        pickle +=
            text_op(t.name) + tensor_op("FloatStorage", key, int64_t(t.bytes / 4), t.shape, dense_strides(t.shape));
        entries.emplace_back("model/data/" + key, std::string(static_cast<const char *>(t.data), t.bytes));
    }
    entries[0] = {"model/data.pkl", pickle + "u."};
    return pytorch_fuzz::zip_image(entries);
}

Loaded pickle(const std::string &ops) { return Loaded(pytorch_fuzz::wrap_pickle("\x80\x02" + ops)); }

// ---- directories
// -------------------------------------------------------------------------------------------------------

Bytes converted(Env &env, const std::string &src, const std::string &dst, int32_t type) {
    bnb_load_params load;
    bnb_load_params_default(&load, sizeof load);
    load.type = type;
    bnb_error err = {};
    const bnb_status status = bnb_convert_checkpoint(env, src.c_str(), dst.c_str(), &load, nullptr, nullptr, &err);
    REQUIRE_MESSAGE(status == BNB_OK, err.msg);
    return read_bytes(dst);
}

// Loading fails with these words.
void check_load_refused(Env &env, const std::string &path, bnb_status code, const std::string &words) {
    bnb_error err = {};
    bnb_model *m = bnb_model_load(env, path.c_str(), nullptr, nullptr, &err);
    CHECK_MESSAGE(!m, path);
    bnb_model_free(m);
    CHECK(is_sentence(err));
    CHECK_MESSAGE(err.code == code, err.msg);
    CHECK_MESSAGE(contains(err.msg, words), "'" << err.msg << "' lacks '" << words << "'");
}

} // namespace

TEST_SUITE_BEGIN("pytorch");

// ---- what torch wrote
// ---------------------------------------------------------------------------------------------------

TEST_CASE("pytorch: golden files are read as torch reads them, bit for bit") {
    const Bytes expect = read_bytes(golden + "/expect.txt");
    std::map<std::string, std::vector<std::vector<std::string>>> files;
    for (const std::string &line : split(std::string(expect.begin(), expect.end()), '\n'))
        if (!line.empty()) files[split(line, '\t')[0]].push_back(split(line, '\t'));
    CHECK(files.size() >= 26);
    for (const auto &f : files) {
        CAPTURE(f.first);
        const Loaded file(read_bytes(golden + "/" + f.first + ".pt"));
        REQUIRE_MESSAGE(file.ok, file.err.msg);
        CHECK(bnb::pytorch_is(file.bytes.data(), file.bytes.size()));
        CHECK(file.tensors.size() == f.second.size());
        for (const std::vector<std::string> &fields : f.second) {
            REQUIRE(fields.size() == 5);
            CAPTURE(fields[1]);
            const bnb::SourceTensor *t = file.find(fields[1]);
            REQUIRE(t);
            CHECK(t->dtype == fields[2]);
            CHECK((t->dtype == "F32") == (t->type == BNB_F32));
            CHECK((t->dtype == "BF16") == (t->type == BNB_BF16));
            Shape shape;
            if (fields[3] != "-")
                for (const std::string &d : split(fields[3], ',')) shape.push_back(std::stoll(d));
            CHECK(t->shape == shape);
            CHECK(dense(*t) == from_hex(fields[4] == "-" ? "" : fields[4]));
        }
    }
}

TEST_CASE("pytorch: dense tensors are views into the file, tied ones the same view") {
    for (const char *name : {"tied", "legacy-tied", "rezipped", "zip64"}) {
        CAPTURE(name);
        const Loaded file(read_bytes(golden + "/" + name + ".pt"));
        REQUIRE_MESSAGE(file.ok, file.err.msg);
        for (const bnb::SourceTensor &t : file.tensors) {
            const uint8_t *p = static_cast<const uint8_t *>(t.data);
            CHECK((p >= file.bytes.data() && p + t.bytes <= file.bytes.data() + file.bytes.size()));
        }
        CHECK(file.find("wte.weight")->data == file.find("lm_head.weight")->data);
        CHECK(static_cast<const char *>(file.find("k")->data) ==
              static_cast<const char *>(file.find("qkv")->data) + 12);
    }
    const Loaded views(read_bytes(golden + "/views.pt"));
    for (const char *name : {"transposed", "columns", "column", "expanded", "permuted", "overlapping", "four"}) {
        CAPTURE(name);
        CHECK((!views.find(name)->data && views.find(name)->strided));
    }
    for (const char *name : {"whole", "rows", "row", "one.wide"}) {
        CAPTURE(name);
        CHECK((views.find(name)->data && !views.find(name)->strided));
    }
}

TEST_CASE("pytorch: notes say what was left out") {
    const Loaded training(read_bytes(golden + "/training.pt")), appended(read_bytes(golden + "/legacy-appended.pt"));
    REQUIRE(training.notes.size() == 1);
    CHECK(training.notes[0] == "only what lies under 'model' is used");
    REQUIRE(appended.notes.size() == 1);
    CHECK(contains(appended.notes[0], "4 bytes follow"));
    const Loaded more = pickle("}(" + text_op("w") + tensor_op("FloatStorage", "0", 16, {16}, {1}) + text_op("epoch") +
                               "K\x03K\x07Nu.");
    REQUIRE(more.notes.size() == 1);
    CHECK(more.notes[0] == "2 values that are no tensors are left out, the first under 'epoch'");
}

TEST_CASE("pytorch: checksums are compared on request") {
    bnb_error err = {};
    for (const char *name : {"tied", "zip64", "no-crc", "legacy-tied"}) {
        const Bytes good = read_bytes(golden + "/" + name + ".pt");
        CHECK_MESSAGE(bnb::pytorch_check_crc(good.data(), good.size(), "x", &err), name << ": " << err.msg);
    }
    const Loaded file(read_bytes(golden + "/tied.pt"));
    const uint8_t *weight = static_cast<const uint8_t *>(file.find("wte.weight")->data);
    Bytes bad = file.bytes;
    bad[size_t(weight - file.bytes.data())] ^= 1;
    CHECK(Loaded(bad).ok);
    CHECK(!bnb::pytorch_check_crc(bad.data(), bad.size(), "x", &err));
    CHECK(contains(err.msg, "x: the checksum of the zip's entry 'archive/data/0' is wrong"));
}

TEST_CASE("pytorch: strided tensors are gathered row by row") {
    Rng rng(5);
    for (int i = 0; i < 300; i++) {
        const uint32_t bytes = 1u << rng.range(0, 3);
        const size_t rank = size_t(rng.range(1, 5));
        bnb::StridedView v;
        v.element_bytes = bytes;
        int64_t elements = 1, last = 0;
        for (size_t d = 0; d < rank; d++) {
            v.shape.push_back(rng.range(1, d + 2 < rank ? 3 : 70));
            v.strides.push_back(rng.chance(0.3) ? 1 : rng.range(0, 90));
            elements *= v.shape[d];
            last += (v.shape[d] - 1) * v.strides[d];
        }
        if (elements > 40000) continue;
        const std::unique_ptr<uint8_t[]> storage(new uint8_t[size_t(last + 1) * bytes]);
        for (size_t b = 0; b < size_t(last + 1) * bytes; b++) storage[b] = uint8_t(rng.next());
        v.first = storage.get();
        CHECK(bnb::strided_extent(v) == uint64_t(last + 1) * bytes);
        Bytes all(size_t(elements) * bytes), want;
        bnb::strided_gather(v, 0, v.shape[0], all.data());
        for (int64_t e = 0; e < elements; e++) { // the definition: each index by itself
            int64_t rest = e, at = 0;
            for (size_t d = rank; d-- > 0; rest /= v.shape[d]) at += rest % v.shape[d] * v.strides[d];
            want.insert(want.end(), storage.get() + size_t(at) * bytes, storage.get() + size_t(at + 1) * bytes);
        }
        CHECK(all == want);
        const int64_t first = rng.range(0, v.shape[0] - 1), n = rng.range(0, v.shape[0] - first),
                      row = elements / v.shape[0] * bytes;
        Bytes part(size_t(n * row) + 1, 0xEE);
        bnb::strided_gather(v, first, n, part.data());
        CHECK(std::equal(part.begin(), part.end() - 1, want.begin() + first * row));
        CHECK(part.back() == 0xEE);
    }
}

// ---- what nobody should have written
// -----------------------------------------------------------------------------------

TEST_CASE("pytorch: the kept attacks are refused with a sentence each") {
    std::vector<std::string> files = TempDir::list(attacks);
    CHECK(files.size() >= 280);
    for (const std::string &path : files) {
        CAPTURE(path);
        const Bytes bytes = read_bytes(path);
        const bool good = begins_with(base_name(path), "good");
        CHECK((fuzz_pytorch(bytes.data(), bytes.size()) == 2) == good);
        std::string image(bytes.begin(), bytes.end());
        if (pytorch_fuzz::is_pickle(image)) image = pytorch_fuzz::wrap_pickle(image);
        CHECK(Loaded(image).ok == good);
    }
}

TEST_CASE("pytorch: what a pickle calls is refused by name") {
    for (const char *name : {"os.system", "posix.system", "subprocess.Popen", "builtins.eval", "builtins.exec",
                             "__builtin__.apply", "torch.load", "torch.storage._load_from_bytes", "pickle.loads",
                             "builtins.getattr", "numpy.core.multiarray._reconstruct"}) {
        const Bytes bytes = read_bytes(attacks + "/call-" + name + ".pkl");
        REQUIRE(!bytes.empty());
        check_refused(Loaded(pytorch_fuzz::wrap_pickle(std::string(bytes.begin(), bytes.end()))), BNB_E_UNSUPPORTED,
                      "data.pkl, byte 2: the pickle uses '" + std::string(name) + "'");
    }
    // also where it is not called, and with the listed names in another module
    for (const char *module : {"os", "torch.nn", "builtins", "torch._utils.x", "", "torch "})
        for (const char *name :
             {"OrderedDict", "_rebuild_tensor_v2", "FloatStorage", "Parameter", "float16", "set ", "encode"})
            check_refused(pickle(global_op(module, name) + "."), BNB_E_UNSUPPORTED,
                          "the pickle uses '" + std::string(module) + "." + name + "'");
    check_refused(pickle("X" + le(2, 4) + "osX" + le(6, 4) + "system\x93."), BNB_E_UNSUPPORTED, "'os.system'");
}

TEST_CASE("pytorch: every opcode that is not listed is refused by name") {
    const std::string listed = ".(cRb)t]ae}suNJKMGXUBChjqrQ\x80\x81\x85\x86\x87\x88\x89\x8A\x8C\x8F\x93\x94\x95";
    CHECK(listed.size() == 40);
    for (int code = 0; code < 256; code++) {
        CAPTURE(code);
        const Loaded file = pickle(std::string(1, char(code)) + std::string(40, '\0'));
        char name[8];
        std::snprintf(name, sizeof name, "0x%02x ", code);
        CHECK(!file.ok);
        const bool unlisted = contains(file.err.msg, "data.pkl, byte 2: the pickle's opcode " + std::string(name));
        CHECK_MESSAGE(unlisted == (listed.find(char(code)) == listed.npos), file.err.msg);
    }
    check_refused(pickle("i"), BNB_E_UNSUPPORTED, "0x69 (INST)");
    check_refused(pickle("\x92"), BNB_E_UNSUPPORTED, "0x92 (NEWOBJ_EX)");
    check_refused(pickle("\xff"), BNB_E_UNSUPPORTED, "no opcode of Python's");
}

TEST_CASE("pytorch: attacks are refused for what they are") {
    static const struct {
        const char *file;
        bnb_status code;
        const char *words;
    } cases[] = {
        {"zip-compressed.pt", BNB_E_UNSUPPORTED, "'a/data/0' is compressed (method 8)"},
        {"zip-encrypted.pt", BNB_E_UNSUPPORTED, "'a/data/0' is encrypted"},
        {"zip-bomb-size.pt", BNB_E_FORMAT, "claims 4294967294 bytes, but 64 are stored"},
        {"zip-bomb-both-sizes.pt", BNB_E_FORMAT, "reaches behind the data's end"},
        {"zip-bomb-zip64-size.pt", BNB_E_FORMAT, "is not at byte 18446744073709551586"},
        {"zip-overlap-by-length.pt", BNB_E_FORMAT, "'a/data.pkl' and 'a/data/0' overlap"},
        {"zip-name-twice.pt", BNB_E_FORMAT, "two entries 'a/data/0'"},
        {"zip-torchscript.pt", BNB_E_UNSUPPORTED, "TorchScript"},
        {"zip-big-endian.pt", BNB_E_UNSUPPORTED, "only little-endian"},
        {"stream-big-endian.pt", BNB_E_UNSUPPORTED, "big-endian"},
        {"stream-module.pt", BNB_E_UNSUPPORTED, "a whole pickled module"},
        {"tar.pt", BNB_E_UNSUPPORTED, "a tar file"},
        {"pytorch1.pt", BNB_E_UNSUPPORTED, "a PyTorch file in a layout of 2018"},
        {"bare-pickle.pt", BNB_E_UNSUPPORTED, "a pickle, but none that torch.save wrote"},
        {"stream-view-wraps.pt", BNB_E_FORMAT, "reaches behind its storage '0' of 16"},
        {"stream-data-short.pt", BNB_E_FORMAT, "the storage '0' of 64 bytes reaches behind the file's end"},
    };
    for (const auto &c : cases) check_refused(Loaded(read_bytes(attacks + "/" + c.file)), c.code, c.words);
    static const struct {
        const char *file;
        bnb_status code;
        const char *words;
    } pickles[] = {
        {"tensor-stride-negative", BNB_E_FORMAT, "byte 138: tensor 'x' has a negative size or stride"},
        {"tensor-size-overflow-to-small", BNB_E_FORMAT, "tensor 'x' has a size that overflows 64 bits"},
        {"tensor-outside", BNB_E_FORMAT,
         "tensor 'x' of shape [17] at offset 0 reaches behind its storage '0' of 16 elements"},
        {"tensor-hidden-in-optimizer", BNB_E_FORMAT, "tensor 'y' of shape [99]"},
        {"tensor-rank-9", BNB_E_LIMIT, "tensor 'x' has 9 dimensions"},
        {"tensor-expanded-terabytes", BNB_E_LIMIT,
         "tensor 'x' of shape [1099511627776] would have 4398046511104 bytes"},
        {"tensor-metadata-negated", BNB_E_UNSUPPORTED, "tensor 'x' has metadata"},
        {"deep-tuples", BNB_E_LIMIT, "nested more than 1000 deep"},
        {"memo-far", BNB_E_FORMAT, "remembers a value as number 9999999"},
        {"memo-limit", BNB_E_LIMIT, "remembers more than 10000000 values"},
        {"persid-key-path", BNB_E_FORMAT, "the key '../../../etc/passwd' of a storage is not a number"},
        {"persid-two-types", BNB_E_FORMAT, "two types or sizes"},
        {"name-twice", BNB_E_FORMAT, "two tensors 'x'"},
    };
    for (const auto &c : pickles) {
        const Bytes bytes = read_bytes(attacks + "/" + c.file + ".pkl");
        check_refused(Loaded(pytorch_fuzz::wrap_pickle(std::string(bytes.begin(), bytes.end()))), c.code, c.words);
    }
}

TEST_CASE("pytorch: other files are not taken for PyTorch's") {
    // lengths of safetensors headers that look like the begin of a pickle
    for (uint64_t n : {uint64_t(0x0280), uint64_t(0x0480), uint64_t(0x0A8A0280 & 0xFFFFFF)}) {
        const std::string file = le(n, 8) + "{" + std::string(600, ' ') + "ustar";
        CHECK(!bnb::pytorch_is(file.data(), file.size()));
    }
    for (const std::string file :
         {"", "P", "PK\3", "GGUF....", "\x80", "\x80\x02", "\x80\x02\x8A\x0A\x6C\xFC\x9C\x46\xF9\x20\x6A\xA8\x50\x19"})
        CHECK((file.size() > 8 || !bnb::pytorch_is(file.data(), file.size())));
    check_refused(Loaded(std::string("GGUF....")), BNB_E_FORMAT, "not one of PyTorch's files");
    check_refused(Loaded(std::string()), BNB_E_FORMAT, "not one of PyTorch's files");
}

TEST_CASE("pytorch: a file that is cut anywhere is refused") {
    for (const char *name :
         {"tied", "legacy-tied", "legacy-python2", "legacy-training-p4", "under-module", "rezipped"}) {
        CAPTURE(name);
        const Bytes good = read_bytes(golden + "/" + name + ".pt");
        for (size_t n = 0; n < good.size(); n++) {
            if (fuzz_pytorch(good.data(), n) != 2) continue;
            CAPTURE(n);
            FAIL_CHECK("a file that is cut was read");
        }
    }
    for (const std::string &path : TempDir::list(attacks)) { // cut pickles, of which some still end well
        if (!begins_with(base_name(path), "good")) continue;
        const Bytes good = read_bytes(path);
        for (size_t n = 0; n < good.size(); n++) fuzz_pytorch(good.data(), n);
    }
}

TEST_CASE("pytorch: random changes never do harm") {
    Rng rng(17);
    std::vector<Bytes> files;
    for (const std::string &path : TempDir::list(golden))
        if (path.find(".pt") != path.npos) files.push_back(read_bytes(path));
    for (const std::string &path : TempDir::list(attacks))
        if (begins_with(base_name(path), "good")) files.push_back(read_bytes(path));
    REQUIRE(files.size() >= 30);
    int results[3] = {};
    for (int i = 0; i < 12000; i++) {
        Bytes bad = rng.pick(files);
        for (int64_t n = rng.range(1, 4); n > 0; n--) {
            const size_t at =
                size_t(rng.range(0, int64_t(std::min<size_t>(bad.size(), 4000)) - 1)); // where the pickle is
            const size_t place = rng.chance(0.2) ? bad.size() - 1 - at / 8 : at;
            if (rng.chance(0.5)) bad[place] ^= uint8_t(1 << rng.range(0, 7));
            else if (rng.chance(0.5)) bad[place] = uint8_t(rng.next());
            else if (rng.chance(0.5)) bad.erase(bad.begin() + std::ptrdiff_t(place));
            else bad.insert(bad.begin() + std::ptrdiff_t(place), bad[size_t(rng.range(0, int64_t(bad.size()) - 1))]);
        }
        results[fuzz_pytorch(bad.data(), bad.size())]++;
    }
    CHECK(results[1] > 1000);
    CHECK(results[2] > 1000);
}

TEST_CASE("pytorch: random pickles of the listed opcodes never do harm") {
    Rng rng(23);
    const std::string tensor = tensor_op("FloatStorage", "0", 16, {2, 3}, {3, 1});
    std::vector<std::string> pieces = {"(",
                                       ")",
                                       "t",
                                       "]",
                                       "a",
                                       "e",
                                       "}",
                                       "s",
                                       "u",
                                       "N",
                                       "R",
                                       "b",
                                       "Q",
                                       "\x81",
                                       "\x85",
                                       "\x86",
                                       "\x87",
                                       "\x88",
                                       "\x89",
                                       "\x8F",
                                       "\x94",
                                       "K\x03",
                                       "h\x01",
                                       "q\x01",
                                       "h\x02",
                                       "q\x02",
                                       text_op("x"),
                                       text_op("storage"),
                                       text_op("0"),
                                       text_op("cpu"),
                                       int_op(-1),
                                       int_op(16),
                                       int_op(INT64_MAX),
                                       tensor,
                                       ints_op({2, 3}),
                                       ints_op({3, 1}),
                                       ints_op({INT64_MAX, 2}),
                                       "\x93"};
    for (const char *name : {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"})
        pieces.push_back(global_op("torch._utils", name));
    for (const char *name : {"FloatStorage", "UntypedStorage", "float16", "Size"})
        pieces.push_back(global_op("torch", name));
    pieces.push_back(global_op("collections", "OrderedDict"));
    int results[3] = {};
    for (int i = 0; i < 20000; i++) {
        std::string ops = "\x80\x02}" + text_op("w") + tensor + "s";
        for (int64_t n = rng.range(0, 12); n > 0; n--) ops += rng.pick(pieces);
        ops += rng.chance(0.5) ? "0." : ".";
        results[fuzz_pytorch(reinterpret_cast<const uint8_t *>(ops.data()), ops.size())]++;
    }
    CHECK(results[1] > 1000);
    CHECK(results[2] > 100);
}

// ---- as checkpoints
// -----------------------------------------------------------------------------------------------------

TEST_CASE("pytorch: directories give the same .bnb files as safetensors do") {
    Env env;
    for (const char *name : {"single", "legacy", "strided", "sharded", "mingpt"}) {
        CAPTURE(name);
        TempDir dir;
        write_bytes(dir.file("config.json"), read_bytes(golden + "/" + name + "/config.json"));
        write_bytes(dir.file("model.safetensors"), read_bytes(golden + "/" + name + ".expect.safetensors"));
        for (int32_t type : {-1, int32_t(BNB_F16), int32_t(BNB_NF4), int32_t(BNB_INT8)}) {
            const Bytes want = converted(env, dir.file(""), dir.file("want.bnb"), type);
            CHECK(converted(env, golden + "/" + name, dir.file("got.bnb"), type) == want);
            for (const std::string &file : TempDir::list(golden + "/" + name)) // by the file's path as well
                if (base_name(file) == "pytorch_model.bin" || base_name(file) == "pytorch_model.bin.index.json" ||
                    base_name(file) == "model.pt")
                    CHECK(converted(env, file, dir.file("got.bnb"), type) == want);
        }
    }
}

TEST_CASE("pytorch: a minGPT file needs no config.json") {
    Env env;
    bnb_error err = {};
    const Bytes bytes = read_bytes(BNB_SOURCE_DIR "/tests/golden/models/mingpt/model.safetensors");
    std::vector<bnb::SourceTensor> tensors;
    REQUIRE_MESSAGE(bnb::safetensors_parse(bytes.data(), bytes.size(), "x", &tensors, &err), err.msg);
    TempDir safetensors, torch;
    write_bytes(safetensors.file("model.safetensors"), bytes);
    const Bytes want = converted(env, safetensors.file(""), safetensors.file("want.bnb"), -1);
    const std::string file = saved(tensors);
    for (const char *name : {"model.pt", "model.bin", "model.pth", "checkpoint"}) {
        CAPTURE(name);
        write_bytes(torch.file(name), Bytes(file.begin(), file.end()));
        CHECK(converted(env, torch.file(name), torch.file("got.bnb"), -1) == want);
        if (std::string(name) != "checkpoint") CHECK(converted(env, torch.file(""), torch.file("got.bnb"), -1) == want);
        ::unlink(torch.file(name).c_str());
    }
}

TEST_CASE("pytorch: the files of a directory are taken in transformers' order") {
    Env env;
    TempDir dir;
    const auto copy = [&](const std::string &from, const std::string &to) {
        write_bytes(dir.file(to), read_bytes(golden + "/" + from));
    };
    copy("single/config.json", "config.json");
    copy("single/pytorch_model.bin", "pytorch_model.bin");
    const Bytes single = converted(env, golden + "/single", dir.file("x.out"), -1),
                sharded = converted(env, golden + "/sharded", dir.file("x.out"), -1);
    CHECK(single != sharded);
    for (const char *name :
         {"pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"})
        copy("sharded/" + std::string(name), name);
    CHECK(converted(env, dir.file(""), dir.file("x.out"), -1) == single);
    copy("sharded.expect.safetensors", "model.safetensors");
    CHECK(converted(env, dir.file(""), dir.file("x.out"), -1) == sharded);
    ::unlink(dir.file("model.safetensors").c_str());
    ::unlink(dir.file("pytorch_model.bin").c_str());
    CHECK(converted(env, dir.file(""), dir.file("x.out"), -1) == sharded);
    ::unlink(dir.file("pytorch_model-00001-of-00002.bin").c_str());
    check_load_refused(env, dir.file(""), BNB_E_IO, "pytorch_model-00001-of-00002.bin cannot be opened");
    copy("sharded/pytorch_model-00002-of-00002.bin", "pytorch_model-00001-of-00002.bin");
    check_load_refused(env, dir.file(""), BNB_E_FORMAT, "but it is not");
    for (const char *name : {"../x.bin", "/etc/passwd", "a/b.bin"}) {
        const std::string index = "{\"weight_map\":{\"wte.weight\":\"" + std::string(name) + "\"}}";
        write_bytes(dir.file("pytorch_model.bin.index.json"), Bytes(index.begin(), index.end()));
        check_load_refused(env, dir.file(""), BNB_E_FORMAT, "not the plain name of a file");
    }
}

TEST_CASE("pytorch: what lies beside the weights is not taken for them") {
    Env env;
    TempDir dir;
    write_bytes(dir.file("config.json"), read_bytes(golden + "/mingpt/config.json"));
    write_bytes(dir.file("model.pt"), read_bytes(golden + "/mingpt/model.pt"));
    const Bytes want = converted(env, golden + "/mingpt", dir.file("x.out"), -1);
    for (const char *name : {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth"})
        write_bytes(dir.file(name), {1, 2, 3});
    CHECK(converted(env, dir.file(""), dir.file("x.out"), -1) == want);
    write_bytes(dir.file("other.pt"), {1, 2, 3});
    check_load_refused(env, dir.file(""), BNB_E_ARG,
                       "2 files whose names end in .pt (model.pt, ...): name the one to load");
}

TEST_CASE("pytorch: hostile checkpoints are refused by the loader") {
    Env env;
    for (const char *name :
         {"zip-compressed.pt", "stream-module.pt", "tar.pt", "bare-pickle.pt", "zip-no-pickle.pt", "good-plain.pt"}) {
        TempDir dir;
        for (const char *as : {"pytorch_model.bin", "model.safetensors", "model.pt"}) {
            write_bytes(dir.file(as), read_bytes(attacks + "/" + name));
            check_load_refused(env, dir.file(as), begins_with(name, "zip-no") ? BNB_E_FORMAT : BNB_E_UNSUPPORTED, "");
        }
    }
    const Bytes call = read_bytes(attacks + "/call-os.system.pkl");
    const std::string file = pytorch_fuzz::wrap_pickle(std::string(call.begin(), call.end()));
    TempDir dir;
    write_bytes(dir.file("pytorch_model.bin"), Bytes(file.begin(), file.end()));
    check_load_refused(env, dir.file(""), BNB_E_UNSUPPORTED,
                       "pytorch_model.bin: data.pkl, byte 2: the pickle uses 'os.system'");
    write_bytes(dir.file("pytorch_model.bin"), {'{', '}'});
    check_load_refused(env, dir.file(""), BNB_E_FORMAT, "it is not one of PyTorch's files");
}

TEST_SUITE_END();
