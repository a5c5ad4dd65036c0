// test_file.cpp: the .bnb reader against good files and against every kind of bad one: cut, flipped, contradictory, random.
//
// The files in tests/attacks/bnb are those of attacks() below that are marked `kept`; after a change of the format write
// them anew with   BNB_WRITE_ATTACKS=tests/attacks/bnb build/test/bnb-test --test-case="file: attacks"
#include "bnb_image.h"

#include <chrono>
#include <set>

#include <fcntl.h>
#include <sys/stat.h>

using namespace test;

namespace {

const char NAME[] = "attack.bnb";

File open_bytes(Env &env, const std::vector<uint8_t> &bytes, bnb_error *err) {
    return File(bnb_file_from_memory(env, bytes.data(), bytes.size(), NAME, err));
}

// A refusal: the file's name, then one sentence.
void check_refusal(const bnb_error &err, bnb_status code = BNB_E_FORMAT) {
    CHECK_MESSAGE(err.code == code, text(err));
    CHECK_MESSAGE(is_sentence(err), text(err));
    CHECK_MESSAGE(text(err).compare(0, sizeof NAME + 1, std::string(NAME) + ": ") == 0, text(err));
}

// Reads everything a file offers: nothing may point outside of it.
void read_everything(Env &env, const bnb_file *f, const std::vector<uint8_t> &bytes) {
    auto inside = [&](const void *p, uint64_t n) {
        const uint8_t *b = static_cast<const uint8_t *>(p);
        return n <= bytes.size() && b >= bytes.data() && static_cast<uint64_t>(b - bytes.data()) <= bytes.size() - n;
    };
    bnb_error err = {};
    for (int32_t i = 0; i < bnb_file_key_count(f); i++) {
        const char *name = nullptr;
        const bnb_file_key *k = bnb_file_key_at(f, i, &name);
        REQUIRE(k);
        REQUIRE(inside(name, k->name_bytes));
        std::string key(name, k->name_bytes);
        uint64_t n = 0;
        const char *s = bnb_file_str(f, key.c_str(), &n);
        REQUIRE((!s || inside(s, n)));
        const int64_t *list = bnb_file_i64_array(f, key.c_str(), &n);
        REQUIRE((!list || (n <= bytes.size() && inside(list, n * 8) && reinterpret_cast<uintptr_t>(list) % 8 == 0)));
    }
    for (int32_t i = 0; i < bnb_file_tensor_count(f); i++) {
        bnb_tensor *t = bnb_file_tensor(f, i);
        REQUIRE(t);
        CHECK(bnb_tensor_state(t) == BNB_RESIDENT);
        CHECK(bnb_file_find(f, bnb_tensor_name(t)) == t);
        CHECK(bnb_tensor_elements(t) >= 0);
        for (int32_t p = 0; p < BNB_MAX_PLANES; p++) {
            uint64_t n = bnb_plane_bytes(t->type, &t->quant, t->n_dims, t->shape, p);
            if (n) REQUIRE(inside(bnb_tensor_plane(t, p), n));
        }
        bnb_tensor_check_finite(env, t, &err);
    }
    CHECK(bnb_file_tensor(f, -1) == nullptr);
    CHECK(bnb_file_tensor(f, bnb_file_tensor_count(f)) == nullptr);
}

// Opens bytes of any kind: a refusal is a sentence, a file that opens can be read. true: it opened.
bool survives(Env &env, const std::vector<uint8_t> &bytes) {
    bnb_error err = {};
    File f = open_bytes(env, bytes, &err);
    if (!f) {
        check_refusal(err);
        return false;
    }
    read_everything(env, f.get(), bytes);
    err = {};
    if (bnb_file_verify(f.get(), &err)) check_refusal(err);
    return true;
}

// ---- attacks ---------------------------------------------------------------------------------------------------------

struct Attack {
    std::string name;
    std::function<void(ImageSpec &)> spec; // before the file is made; may be empty
    std::function<void(Image &)> spoil;    // after; the hash is put right again
    std::vector<std::string> says;         // parts of the message
    bool kept = false;                     // in tests/attacks/bnb
    bool on_verify = false;                // found by bnb_file_verify, not at opening
};

const uint64_t M32 = UINT32_MAX, M63 = uint64_t{1} << 63, M64 = UINT64_MAX;

std::vector<Attack> attacks() {
    std::vector<Attack> a;
    auto spoil = [&](const std::string &name, std::vector<std::string> says, std::function<void(Image &)> f, bool kept = false) {
        a.push_back({name, nullptr, std::move(f), std::move(says), kept, false});
    };
    auto make = [&](const std::string &name, std::vector<std::string> says, std::function<void(ImageSpec &)> f, bool kept = false) {
        a.push_back({name, std::move(f), nullptr, std::move(says), kept, false});
    };
    auto damage = [&](const std::string &name, std::vector<std::string> says, std::function<void(Image &)> f, bool kept = false) {
        a.push_back({name, nullptr, std::move(f), std::move(says), kept, true});
    };
    auto number = [](uint64_t v) { return std::to_string(v); };

    // header
    spoil("header-magic", {"not a .bnb file"}, [](Image &f) { f.bytes[1] = 'X'; }, true);
    spoil("header-text-mode", {"text-mode"}, [](Image &f) { f.bytes[4] = '\n', f.bytes[5] = 0x1a, f.bytes[6] = '\n'; }, true);
    for (uint64_t v : {uint64_t{0}, uint64_t{2}, uint64_t{65535}}) spoil("header-major-" + number(v), {"version " + number(v)}, [v](Image &f) { f.header().major = static_cast<uint16_t>(v); }, v == 2);
    for (uint32_t v : {1u, 0x80000000u, UINT32_MAX}) spoil("header-incompatible-" + number(v), {"features"}, [v](Image &f) { f.header().incompatible = v; }, v == 1);
    for (uint64_t v : {uint64_t{0}, uint64_t{63}, M32, M63, M64}) {
        spoil("header-file-bytes-" + number(v), {number(v)}, [v](Image &f) { f.header().file_bytes = v; }, v == M64);
        spoil("header-metadata-offset-" + number(v), {"metadata"}, [v](Image &f) { f.header().metadata_offset = v; }, v == M64);
    }
    spoil("header-metadata-offset-72", {"metadata"}, [](Image &f) { f.header().metadata_offset = 72; });
    spoil("header-metadata-bytes-0", {"missing"}, [](Image &f) { f.header().metadata_bytes = 0; });
    for (uint64_t v : {M64, M64 - 7, M63, M64 - 63, uint64_t{1} << 32}) spoil("header-metadata-bytes-" + number(v), {"metadata"}, [v](Image &f) { f.header().metadata_bytes = v; }, v == M64 - 7);
    spoil("header-metadata-bytes-odd", {"metadata"}, [](Image &f) { f.header().metadata_bytes++; });
    spoil("header-metadata-cut-by-8", {"chunk"}, [](Image &f) { f.header().metadata_bytes -= 8; });
    for (uint64_t v : {uint64_t{0}, uint64_t{64}, M32, M63, M64, M64 - 63}) spoil("header-data-offset-" + number(v), {"data"}, [v](Image &f) { f.header().data_offset = v; }, v == 64);
    for (uint32_t v : {0u, 1u, 32u, 63u, 65u, 96u, 131072u, 0x80000000u, UINT32_MAX}) spoil("header-alignment-" + number(v), {"alignment"}, [v](Image &f) { f.header().alignment = v; }, v == 96);
    spoil("header-alignment-more-than-planes-have", {"plane"}, [](Image &f) { f.header().alignment = 65536; });

    // chunks
    make("chunk-unknown-upper-case", {"ABCD"}, [](ImageSpec &s) { s.chunks.emplace_back("ABCD", "?"); }, true);
    for (const char *tag : {"KEYS", "TYPE", "TENS", "STRS"}) {
        std::string t = tag;
        make("chunk-twice-" + t, {t, "twice"}, [t](ImageSpec &s) { s.chunks.emplace_back(t, ""); }, t == "TENS");
        make("chunk-missing-" + t, {t, "missing"}, [t](ImageSpec &s) { s.order.erase(std::find(s.order.begin(), s.order.end(), t)); }, t == "STRS");
        spoil("chunk-broken-record-" + t, {}, [t](Image &f) {
            for (uint64_t at : f.chunks_at)
                if (!std::memcmp(f.bytes.data() + at, t.data(), 4)) f.at<uint64_t>(at + 8) -= t == "STRS" ? 8 : 1;
        });
    }
    for (uint64_t v : {M64, M64 - 7, M64 - 15, M63, M32, uint64_t{1} << 31}) spoil("chunk-length-" + number(v), {"chunk"}, [v](Image &f) { f.at<uint64_t>(f.chunks_at[0] + 8) = v; }, v == M64 - 7);
    spoil("chunk-length-one-too-many", {"chunk"}, [](Image &f) { f.at<uint64_t>(f.chunks_at.back() + 8) = f.metadata_end() - f.chunks_at.back() - 16 + 1; });
    spoil("chunk-zero-field", {"chunk"}, [](Image &f) { f.at<uint32_t>(f.chunks_at[1] + 4) = 1; });
    spoil("chunk-header-cut", {"chunk"}, [](Image &f) { f.at<uint64_t>(f.chunks_at.back() + 8) = f.metadata_end() - f.chunks_at.back() - 16 - 8; });

    // keys
    for (uint64_t v : {M32, M32 - 7, uint64_t{1} << 31}) {
        spoil("key-name-offset-" + number(v), {"key 0"}, [v](Image &f) { f.key(0).name_offset = static_cast<uint32_t>(v); }, v == M32);
        spoil("key-name-bytes-" + number(v), {"key 0"}, [v](Image &f) { f.key(0).name_bytes = static_cast<uint32_t>(v); });
    }
    spoil("key-without-name", {"key 1"}, [](Image &f) { f.key(1).name_bytes = 0; });
    for (uint32_t v : {4u, 0x80000000u, UINT32_MAX}) spoil("key-kind-" + number(v), {"key 0", "kind"}, [v](Image &f) { f.key(0).kind = v; }, v == 4);
    spoil("keys-unsorted", {"key 1", "order"}, [](Image &f) { std::swap(f.key(0), f.key(1)); }, true);
    make("key-twice", {"twice"}, [](ImageSpec &s) { s.keys.push_back(s.keys[2]); }, true);
    for (uint64_t v : {M32, M63, M64, M64 - 9, uint64_t{1} << 61, M64 / 8 + 2}) {
        spoil("key-string-offset-" + number(v), {"key 2"}, [v](Image &f) { f.key(2).value = v; }, v == M64);
        spoil("key-string-bytes-" + number(v), {"key 2"}, [v](Image &f) { f.key(2).count = v; });
        spoil("key-array-offset-" + number(v), {"key 3"}, [v](Image &f) { f.key(3).value = v; });
        spoil("key-array-count-" + number(v), {"key 3"}, [v](Image &f) { f.key(3).count = v; }, v == uint64_t{1} << 61);
    }
    spoil("key-array-misaligned", {"key 3"}, [](Image &f) { f.key(3).value += 4; });

    // types
    for (uint64_t v : {uint64_t{6}, uint64_t{7}, uint64_t{11}, uint64_t{255}, uint64_t{1} << 31, M32}) spoil("type-id-" + number(v), {"type 0"}, [v](Image &f) { f.type(0).id = static_cast<uint32_t>(v); }, v == 6);
    spoil("type-bits", {"type 1"}, [](Image &f) { f.type(1).bits = 16; }, true);
    spoil("type-code-map", {"map"}, [](Image &f) { f.type(1).quant_map[3] = 0.5f; }, true);
    spoil("type-code-map-nan", {"map"}, [](Image &f) { f.type(1).quant_map[0] = NAN; });
    for (uint64_t v : {uint64_t{0}, uint64_t{1}, uint64_t{16}, uint64_t{48}, uint64_t{63}, uint64_t{8192}, uint64_t{1} << 31, M32}) spoil("type-blocksize-" + number(v), {"fp4.weight"}, [v](Image &f) { f.type(1).blocksize = static_cast<uint32_t>(v); }, v == 0);
    spoil("type-blocksize-that-needs-other-planes", {"fp4.weight", "plane 1"}, [](Image &f) { f.type(1).blocksize = 32; });
    for (uint32_t v : {1u, 2u, UINT32_MAX}) spoil("type-double-quant-" + number(v), {"fp4.weight"}, [v](Image &f) { f.type(1).double_quant = v; }, v == 1);
    for (uint32_t v : {3u, 9u, UINT32_MAX}) spoil("type-dtype-" + number(v), {"fp4.weight"}, [v](Image &f) { f.type(1).dtype = v; });
    spoil("type-threshold-nan", {"threshold"}, [](Image &f) { f.type(0).threshold = NAN; });
    spoil("type-threshold-negative", {"threshold"}, [](Image &f) { f.type(1).threshold = -1; });

    // tensors
    const std::string T = "first.weight";
    auto tensor = [&](const std::string &name, std::vector<std::string> says, std::function<void(bnb_file_record &)> f, bool kept = false) {
        spoil("tensor-" + name, std::move(says), [T, f](Image &image) { f(image.record(T)); }, kept);
    };
    for (uint64_t v : {M32, M32 - 11, uint64_t{1} << 31}) {
        tensor("name-offset-" + number(v), {"name of tensor"}, [v](bnb_file_record &r) { r.name_offset = static_cast<uint32_t>(v); }, v == M32);
        tensor("name-bytes-" + number(v), {"name of tensor"}, [v](bnb_file_record &r) { r.name_bytes = static_cast<uint32_t>(v); });
        tensor("type-" + number(v), {T, "type"}, [v](bnb_file_record &r) { r.type = static_cast<uint32_t>(v); });
        tensor("dimensions-" + number(v), {T, "dimensions"}, [v](bnb_file_record &r) { r.n_dims = static_cast<uint32_t>(v); });
    }
    tensor("without-name", {"name of tensor"}, [](bnb_file_record &r) { r.name_bytes = 0; });
    make("tensor-name-too-long", {"name of tensor"}, [](ImageSpec &s) { s.tensors[0].name = std::string(96, 'x'); });
    make("tensor-name-with-nul", {"NUL"}, [](ImageSpec &s) { s.tensors[0].name = std::string("a\0b", 3); }, true);
    make("tensor-twice", {"first.weight", "twice"}, [](ImageSpec &s) { s.tensors.push_back(s.tensors[0]); }, true);
    spoil("tensors-unsorted", {"order"}, [](Image &f) { std::swap(f.record(0), f.record(1)); }, true);
    tensor("name-hash", {T, "hash"}, [](bnb_file_record &r) { r.name_hash ^= 1; }, true);
    tensor("type-one-too-many", {T, "type"}, [](bnb_file_record &r) { r.type = 3; }, true);
    tensor("type-of-another", {T}, [](bnb_file_record &r) { r.type = 1; });
    for (uint32_t v : {0u, 5u}) tensor("dimensions-" + number(v), {T, "dimensions"}, [v](bnb_file_record &r) { r.n_dims = v; }, v == 5);
    for (uint64_t v : {uint64_t{0}, uint64_t{1}, uint64_t{4}, uint64_t{1} << 31, uint64_t{1} << 32, uint64_t{1} << 61, M63 - 1, M63, M64})
        for (int d = 0; d < 2; d++) tensor("shape-" + number(static_cast<uint64_t>(d)) + "-is-" + number(v), {T}, [v, d](bnb_file_record &r) { r.shape[d] = v; }, d == 0 && v == M64);
    tensor("shape-overflows", {T}, [](bnb_file_record &r) { r.shape[0] = r.shape[1] = uint64_t{1} << 32; }, true);
    tensor("shape-wraps-to-its-size", {T}, [](bnb_file_record &r) { // 2^62 * 4 * 4 bytes are 0 in 64 bits
        r.shape[0] = uint64_t{1} << 62, r.shape[1] = 4;
        r.planes[0].bytes = 0;
    });
    for (uint64_t v : {uint64_t{0}, uint64_t{59}, uint64_t{61}, M32, M63, M64}) tensor("plane-bytes-" + number(v), {T, "plane 0"}, [v](bnb_file_record &r) { r.planes[0].bytes = v; }, v == M64);
    tensor("plane-too-many", {T, "plane 1"}, [](bnb_file_record &r) { r.planes[1] = r.planes[0]; });
    for (uint64_t v : {uint64_t{0}, uint64_t{64}, uint64_t{1} << 31, uint64_t{1} << 32, M63, M64 - 63, M64}) tensor("plane-offset-" + number(v), {T, "plane 0", number(v)}, [v](bnb_file_record &r) { r.planes[0].offset = v; }, v == M64 - 63);
    tensor("plane-unaligned", {T, "plane 0"}, [](bnb_file_record &r) { r.planes[0].offset += 4; });
    spoil("plane-at-the-end", {T, "plane 0"}, [T](Image &f) { f.record(T).planes[0].offset = (f.bytes.size() + 63) / 64 * 64; });
    spoil("plane-over-the-end", {T, "plane 0"}, [T](Image &f) { f.record(T).planes[0].offset = (f.bytes.size() - 1) / 64 * 64; });
    spoil("plane-overlaps-another", {"overlaps"}, [T](Image &f) { f.record(T).planes[0].offset = f.record("fp4.weight").planes[0].offset; }, true);
    spoil("plane-overlaps-its-own", {"fp4.weight", "overlaps"}, [](Image &f) { f.record("fp4.weight").planes[1].offset = f.record("fp4.weight").planes[0].offset; });

    // what only reading everything shows
    damage("damaged-data", {T, "plane 0", "damaged"}, [T](Image &f) { f.bytes[f.record(T).planes[0].offset + 7] ^= 4; }, true);
    damage("damaged-absmax", {"fp4.weight", "plane 1", "damaged"}, [](Image &f) { f.bytes[f.record("fp4.weight").planes[1].offset] ^= 0x80; });
    damage("damaged-hash", {T, "plane 0"}, [T](Image &f) { f.record(T).planes[0].hash++; });
    damage("gap-not-zero", {"zero"}, [T](Image &f) { f.bytes[f.record(T).planes[0].offset + 61] = 1; }, true);
    damage("gap-before-the-data-not-zero", {"zero"}, [](Image &f) {
        REQUIRE(f.header().data_offset > f.metadata_end());
        f.bytes[f.metadata_end()] = 1;
    });
    a.push_back({"bytes-behind-the-data-not-zero", [](ImageSpec &s) { s.behind = 64; }, [](Image &f) { f.bytes.back() = 1; }, {"zero"}, false, true});
    return a;
}

Image make_attack(const Attack &attack) {
    ImageSpec spec = Image::small_spec();
    if (attack.spec) attack.spec(spec);
    Image image(spec);
    if (attack.spoil) attack.spoil(image);
    image.seal();
    return image;
}

int64_t resident_bytes() {
    std::ifstream in("/proc/self/statm");
    int64_t total = 0, resident = -1;
    in >> total >> resident;
    return resident < 0 ? -1 : resident * static_cast<int64_t>(sysconf(_SC_PAGESIZE));
}

} // namespace

TEST_SUITE("file") {

TEST_CASE("file: XXH64") {
    CHECK(bnb_hash64("", 0, 0) == 0xEF46DB3751D8E999u); // published values
    CHECK(bnb_hash64("a", 1, 0) == 0xD24EC4F1A98C6E5Bu);
    CHECK(bnb_hash64("abc", 3, 0) == 0x44BC2CF5AD770999u);
    CHECK(bnb_hash64(nullptr, 0, 0) == 0xEF46DB3751D8E999u);
    const char text[] = "Nobody inspects the spammish repetition";
    CHECK(bnb_hash64(text, sizeof text - 1, 0) == 0xFBCEA83C8A378BF1u);
    std::vector<uint8_t> bytes(70);
    std::set<uint64_t> seen;
    for (size_t n = 0; n <= bytes.size(); n++) CHECK(seen.insert(bnb_hash64(bytes.data(), n, 0)).second); // every length differs
    CHECK(bnb_hash64("abc", 3, 1) != bnb_hash64("abc", 3, 0));
}

TEST_CASE("file: records have the sizes that bnb.h names") {
    CHECK(sizeof(bnb_file_header) == 64);
    CHECK(offsetof(bnb_file_header, hash) == 56);
    CHECK(sizeof(bnb_file_key) == 32);
    CHECK(sizeof(bnb_file_type) == 96);
    CHECK(sizeof(bnb_file_plane) == 24);
    CHECK(sizeof(bnb_file_record) == 160);
}

TEST_CASE("file: everything in a good file is found") {
    Env env;
    bnb_error err = {};
    Image image(Image::sample_spec());
    File f = open_bytes(env, image.bytes, &err);
    REQUIRE_MESSAGE(f, text(err));
    int64_t i = 0;
    double d = 0;
    uint64_t n = 0;
    CHECK(bnb_file_i64(f.get(), "a.number", &i) == BNB_OK);
    CHECK(i == -5);
    CHECK(bnb_file_f64(f.get(), "b.fraction", &d) == BNB_OK);
    CHECK(d == 0.5);
    const char *s = bnb_file_str(f.get(), "c.text", &n);
    REQUIRE(s);
    CHECK(std::string(s, n) == std::string("words\0more", 10));
    const int64_t *list = bnb_file_i64_array(f.get(), "d.list", &n);
    REQUIRE(n == 3);
    CHECK(list[0] == 1);
    CHECK(list[1] == -2);
    CHECK(list[2] == INT64_MAX);
    CHECK(bnb_file_str(f.get(), "e.empty", &n) != nullptr);
    CHECK(n == 0);
    bnb_file_i64_array(f.get(), "f.none", &n);
    CHECK(n == 0);
    // another kind, no such key
    CHECK(bnb_file_i64(f.get(), "b.fraction", &i) == BNB_E_ARG);
    CHECK(bnb_file_f64(f.get(), "a.number", &d) == BNB_E_ARG);
    for (const char *key : {"", "a", "a.numbe", "a.number2", "zzz", "d.list"}) CHECK(bnb_file_str(f.get(), key, &n) == nullptr);
    CHECK(bnb_file_i64_array(f.get(), "c.text", &n) == nullptr);
    CHECK(i == -5); // untouched on failure
    CHECK(bnb_file_key_count(f.get()) == 6);
    const char *name = nullptr;
    CHECK(bnb_file_key_at(f.get(), -1, &name) == nullptr);
    CHECK(bnb_file_key_at(f.get(), 6, &name) == nullptr);
    REQUIRE(bnb_file_key_at(f.get(), 2, &name));
    CHECK(std::string(name, bnb_file_key_at(f.get(), 2, &name)->name_bytes) == "c.text");

    const void *chunk = bnb_file_chunk(f.get(), "tokn", &n);
    REQUIRE(chunk);
    CHECK(std::string(static_cast<const char *>(chunk), n) == "tokenizer");
    CHECK(bnb_file_chunk(f.get(), "prov", &n) != nullptr);
    CHECK(n == 0);
    CHECK(bnb_file_chunk(f.get(), "none", &n) == nullptr);

    const ImageSpec spec = Image::sample_spec();
    REQUIRE(bnb_file_tensor_count(f.get()) == static_cast<int32_t>(spec.tensors.size()));
    for (size_t k = 0; k < spec.tensors.size(); k++) {
        const ImageTensor &want = spec.tensors[k];
        bnb_tensor *t = bnb_file_tensor(f.get(), static_cast<int32_t>(k)); // in the order of the data
        CAPTURE(want.name);
        CHECK(bnb_tensor_name(t) == want.name);
        CHECK(bnb_file_find(f.get(), want.name.c_str()) == t);
        CHECK(bnb_tensor_type(t) == want.type);
        CHECK(Shape(bnb_tensor_shape(t), bnb_tensor_shape(t) + bnb_tensor_n_dims(t)) == want.shape);
        CHECK(bnb_tensor_quant(t)->blocksize == want.quant.blocksize);
        CHECK(bnb_tensor_quant(t)->double_quant == want.quant.double_quant);
        CHECK(bnb_tensor_quant(t)->threshold == want.quant.threshold);
        CHECK(bnb_tensor_quant(t)->nested_offset == 0.125f);
        uint64_t r = image.find(want.name);
        for (int32_t p = 0; p < BNB_MAX_PLANES; p++)
            if (image.record(r).planes[p].bytes) CHECK(bnb_tensor_plane(t, p) == image.bytes.data() + image.record(r).planes[p].offset);
        std::vector<float> out(static_cast<size_t>(bnb_tensor_elements(t)) + 1);
        Ctx ctx(bnb_ctx_create(env, &err));
        bnb_tensor *dst = bnb_tensor_new(ctx.get(), BNB_F32, nullptr, bnb_tensor_n_dims(t), bnb_tensor_shape(t), "out");
        void *planes[BNB_MAX_PLANES] = {out.data(), nullptr, nullptr, nullptr};
        REQUIRE(bnb_tensor_bind(dst, planes, &err) == BNB_OK);
        CHECK(bnb_dequantize(env, t, dst, &err) == BNB_OK);
        out.pop_back();
        CHECK(relative_error(out, decode(t)) < 1e-6);
    }
    for (const char *other : {"", "first", "first.weights", "none"}) CHECK(bnb_file_find(f.get(), other) == nullptr);
    CHECK(bnb_file_verify(f.get(), &err) == BNB_OK);
    read_everything(env, f.get(), image.bytes);
}

TEST_CASE("file: what may be skipped is skipped") {
    Env env;
    bnb_error err = {};
    ImageSpec spec = Image::sample_spec();
    spec.chunks.emplace_back("zzzz", std::string(100, 'z'));
    spec.chunks.emplace_back("aaaa", "");
    spec.chunks.emplace_back("aaaa", "again");
    spec.order = {"STRS", "TENS", "KEYS", "TYPE"};
    spec.alignment = 256;
    spec.behind = 128;
    Image image(spec);
    image.header().minor = 7;
    image.header().compatible = 0xffffffff;
    image.seal();
    File f = open_bytes(env, image.bytes, &err);
    REQUIRE_MESSAGE(f, text(err));
    CHECK(bnb_file_verify(f.get(), &err) == BNB_OK);
    CHECK(bnb_file_tensor_count(f.get()) == 6);
    uint64_t n;
    CHECK(bnb_file_chunk(f.get(), "zzzz", &n) != nullptr);
    CHECK(n == 100);
}

TEST_CASE("file: a file without tensors, keys or strings") {
    Env env;
    bnb_error err = {};
    ImageSpec spec;
    Image image(spec);
    File f = open_bytes(env, image.bytes, &err);
    REQUIRE_MESSAGE(f, text(err));
    CHECK(bnb_file_tensor_count(f.get()) == 0);
    CHECK(bnb_file_key_count(f.get()) == 0);
    CHECK(bnb_file_tensor(f.get(), 0) == nullptr);
    CHECK(bnb_file_find(f.get(), "x") == nullptr);
    CHECK(bnb_file_verify(f.get(), &err) == BNB_OK);
}

TEST_CASE("file: every truncation is refused") {
    Env env;
    const Image image(Image::small_spec());
    for (size_t n = 0; n < image.bytes.size(); n++) {
        bnb_error err = {};
        std::vector<uint8_t> cut(image.bytes.begin(), image.bytes.begin() + static_cast<ptrdiff_t>(n)); // its own block: reads behind it are seen
        cut.reserve(1); // an address, even for no bytes
        REQUIRE(!open_bytes(env, cut, &err));
        check_refusal(err);
    }
    for (size_t more : {1, 7, 8, 64, 4096}) {
        bnb_error err = {};
        std::vector<uint8_t> longer = image.bytes;
        longer.resize(longer.size() + more);
        CHECK(!open_bytes(env, longer, &err));
        check_refusal(err);
    }
    // and with a header that agrees with the new length
    for (size_t n = 64; n < image.bytes.size(); n++) {
        Image cut = image;
        cut.bytes.resize(n);
        cut.header().file_bytes = n;
        cut.seal();
        cut.bytes.shrink_to_fit();
        if (n < image.metadata_end()) {
            bnb_error err = {};
            CHECK(!open_bytes(env, cut.bytes, &err));
            check_refusal(err);
        } else {
            survives(env, cut.bytes);
        }
    }
}

TEST_CASE("file: every flipped bit of header and metadata is refused") {
    Env env;
    Image image(Image::sample_spec());
    for (uint64_t bit = 0; bit < image.metadata_end() * 8; bit++) {
        bnb_error err = {};
        image.bytes[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
        bool opened = open_bytes(env, image.bytes, &err) != nullptr;
        image.bytes[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
        if (opened) FAIL_CHECK("bit ", bit, " makes no difference");
        else if (err.code != BNB_E_FORMAT || !is_sentence(err)) check_refusal(err);
    }
    bnb_error err = {};
    CHECK(open_bytes(env, image.bytes, &err));
}

TEST_CASE("file: every flipped byte behind the metadata is found by verify") {
    Env env;
    ImageSpec spec = Image::sample_spec();
    spec.behind = 40;
    Image image(spec);
    Rng rng(2);
    bnb_error err = {};
    File f = open_bytes(env, image.bytes, &err);
    REQUIRE(f);
    std::string missed;
    for (uint64_t at = image.metadata_end(); at < image.bytes.size(); at++) {
        uint8_t bit = static_cast<uint8_t>(1 << rng.range(0, 7));
        image.bytes[at] ^= bit;
        err = {};
        bool found = bnb_file_verify(f.get(), &err) != BNB_OK;
        image.bytes[at] ^= bit;
        if (!found) missed += " " + std::to_string(at);
        else check_refusal(err);
    }
    CHECK_MESSAGE(missed == "", "flips at these offsets of ", image.bytes.size(), " are not found");
    CHECK(bnb_file_verify(f.get(), &err) == BNB_OK);
}

TEST_CASE("file: attacks") {
    Env env;
    const char *dir = std::getenv("BNB_WRITE_ATTACKS");
    std::set<std::string> names;
    {
        bnb_error err = {};
        Image good(Image::small_spec());
        File f = open_bytes(env, good.bytes, &err);
        REQUIRE_MESSAGE(f, text(err));
        CHECK(bnb_file_verify(f.get(), &err) == BNB_OK);
        if (dir) write_bytes(std::string(dir) + "/good.bnb", good.bytes);
    }
    for (const Attack &a : attacks()) {
        CAPTURE(a.name);
        CHECK(names.insert(a.name).second);
        Image image = make_attack(a);
        bnb_error err = {};
        File f = open_bytes(env, image.bytes, &err);
        if (a.on_verify) {
            REQUIRE_MESSAGE(f, text(err));
            CHECK(bnb_file_verify(f.get(), &err) != BNB_OK);
        } else {
            CHECK(!f);
        }
        check_refusal(err);
        for (const std::string &part : a.says) CHECK_MESSAGE(contains(text(err), part), "the message does not say '", part, "': ", text(err));
        bool opened = open_bytes(env, image.bytes, nullptr) != nullptr; // err may be NULL
        CHECK(opened == a.on_verify);
        if (dir && a.kept) write_bytes(std::string(dir) + "/" + a.name + ".bnb", image.bytes);
    }
    CHECK(names.size() > 150);
}

TEST_CASE("file: dimensions beside an empty one do not overflow") {
    Env env;
    ImageSpec spec = Image::sample_spec();
    Image image(spec);
    const uint64_t big = uint64_t{1} << 62;
    const std::vector<std::vector<uint64_t>> shapes = {{big, big, 0, 1}, {0, big, big, 1}, {big, 0, big, big}, {INT64_MAX, INT64_MAX, INT64_MAX, 0}};
    for (const std::vector<uint64_t> &shape : shapes) {
        bnb_file_record &r = image.record("empty.weight");
        r.n_dims = 4;
        std::copy(shape.begin(), shape.end(), r.shape);
        image.seal();
        survives(env, image.bytes);
        Ctx ctx(bnb_ctx_create(env, nullptr));
        const Shape dims(shape.begin(), shape.end());
        bnb_tensor *t = bnb_tensor_new(ctx.get(), BNB_F32, nullptr, 4, dims.data(), "t");
        if (t) CHECK(bnb_tensor_elements(t) == 0);
    }
}

TEST_CASE("file: every field with extreme values") {
    Env env;
    const Image good(Image::sample_spec());
    struct Field {
        uint64_t offset;
        int bytes;
    };
    std::vector<Field> fields;
    auto add = [&](uint64_t at, std::initializer_list<int> sizes) {
        for (int n : sizes) {
            fields.push_back({at, n});
            at += static_cast<uint64_t>(n);
        }
    };
    add(8, {2, 2, 4, 8, 8, 8, 8, 4, 4});
    for (uint64_t at : good.chunks_at) add(at, {4, 4, 8});
    for (uint64_t i = 0; i < good.n_keys; i++) add(good.keys_at + 32 * i, {4, 4, 4, 4, 8, 8});
    for (uint64_t i = 0; i < good.n_types; i++) add(good.types_at + 96 * i, {4, 4, 4, 4, 4, 4, 4, 4, 4, 4});
    for (uint64_t i = 0; i < good.n_records; i++) add(good.records_at + 160 * i, {8, 4, 4, 4, 4, 8, 8, 8, 8, 4, 4, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8});
    int opened = 0, refused = 0;
    for (const Field &field : fields) {
        uint64_t old = 0;
        std::memcpy(&old, good.bytes.data() + field.offset, static_cast<size_t>(field.bytes));
        const uint64_t values[] = {0, 1, 2, 0x7fffffff, 0x80000000, M32, M32 + 1, M63 - 1, M63, M64, M64 - 7, M64 / 8 + 1, old + 1, old - 1, old + 8, old - 8, old * 2, ~old};
        for (uint64_t v : values) {
            Image image = good;
            std::memcpy(image.bytes.data() + field.offset, &v, static_cast<size_t>(field.bytes));
            if (image.bytes == good.bytes) continue;
            image.seal();
            CAPTURE(field.offset);
            CAPTURE(v);
            (survives(env, image.bytes) ? opened : refused)++;
        }
    }
    CHECK(refused > 2000);
    CHECK(opened > 100); // fields that any value fits: the sweep reaches what lies behind the checks
}

TEST_CASE("file: random mutations") {
    Env env;
    const Image samples[] = {Image(Image::sample_spec()), Image(Image::small_spec())};
    Rng rng(20240607);
    int opened = 0;
    for (int round = 0; round < 4000; round++) {
        Image image = samples[round % 2];
        for (int64_t n = rng.range(1, 5); n > 0; n--) {
            uint64_t at = static_cast<uint64_t>(rng.range(8, static_cast<int64_t>(image.metadata_end()) - 1));
            switch (rng.range(0, 5)) {
            case 0: image.bytes[at] ^= static_cast<uint8_t>(1 << rng.range(0, 7)); break;
            case 1: image.bytes[at] = static_cast<uint8_t>(rng.next()); break;
            case 2: image.at<uint32_t>(at / 4 * 4) = static_cast<uint32_t>(rng.next() >> rng.range(0, 31)); break;
            case 3: image.at<uint64_t>(at / 8 * 8) = rng.next() >> rng.range(0, 63); break;
            case 4: { // a piece of the metadata over another
                uint64_t from = static_cast<uint64_t>(rng.range(8, static_cast<int64_t>(image.metadata_end()) - 1)), most = image.metadata_end() - std::max(at, from);
                std::memmove(image.bytes.data() + at, image.bytes.data() + from, std::min<uint64_t>(most, static_cast<uint64_t>(rng.range(1, 200))));
                break;
            }
            default: { // a record that is right but for one thing: its name's hash fits, its planes stand elsewhere
                bnb_file_record &r = image.record(static_cast<uint64_t>(rng.range(0, static_cast<int64_t>(image.n_records) - 1)));
                r.planes[rng.range(0, 3)].offset = static_cast<uint64_t>(rng.range(0, 80)) * 64;
                r.shape[rng.range(0, 3)] = static_cast<uint64_t>(rng.range(0, 40));
                break;
            }
            }
        }
        image.seal();
        CAPTURE(round);
        opened += survives(env, image.bytes);
    }
    CHECK(opened > 50);
}

TEST_CASE("file: mapped, read and borrowed are the same") {
    Env env;
    TempDir dir;
    bnb_error err = {};
    ImageSpec spec = Image::sample_spec();
    spec.alignment = 4096;
    Image image(spec);
    const std::string path = dir.file("model.bnb");
    write_bytes(path, image.bytes);
    std::vector<std::string> log;
    env.on_log = [&](int32_t, const char *line) { log.push_back(line); };
    const uint64_t before = bnb_env_bytes(env);
    File mapped(bnb_file_open(env, path.c_str(), 0, &err));
    REQUIRE_MESSAGE(mapped, text(err));
    CHECK(bnb_env_bytes(env) - before < image.bytes.size() + (200 << 10)); // metadata only
    File read(bnb_file_open(env, path.c_str(), BNB_FILE_NO_MMAP, &err));
    REQUIRE_MESSAGE(read, text(err));
    File locked(bnb_file_open(env, path.c_str(), BNB_FILE_MLOCK, &err)); // or a warning, where that is not allowed
    REQUIRE_MESSAGE(locked, text(err));
    for (const std::string &line : log) CHECK(contains(line, path));
    for (File *f : {&mapped, &read, &locked}) {
        CHECK(bnb_file_verify(f->get(), &err) == BNB_OK);
        REQUIRE(bnb_file_tensor_count(f->get()) == 6);
        for (int32_t i = 0; i < 6; i++) {
            bnb_tensor *a = bnb_file_tensor(mapped.get(), i), *b = bnb_file_tensor(f->get(), i);
            CHECK(std::string(bnb_tensor_name(a)) == bnb_tensor_name(b));
            for (int32_t p = 0; p < BNB_MAX_PLANES; p++) {
                uint64_t n = bnb_plane_bytes(a->type, &a->quant, a->n_dims, a->shape, p);
                if (n) CHECK(std::memcmp(bnb_tensor_plane(a, p), bnb_tensor_plane(b, p), n) == 0);
            }
        }
    }
    CHECK(bnb_tensor_plane(bnb_file_tensor(read.get(), 0), 0) != bnb_tensor_plane(bnb_file_tensor(mapped.get(), 0), 0));
}

TEST_CASE("file: paths that hold no model") {
    Env env;
    TempDir dir;
    write_bytes(dir.file("empty.bnb"), {});
    write_bytes(dir.file("text.bnb"), std::vector<uint8_t>(500, 'x'));
    write_bytes(dir.file("short.bnb"), {0x89, 'B', 'N', 'B'});
    struct Bad {
        std::string path;
        bnb_status code;
    };
    for (const Bad &b : {Bad{dir.file("none.bnb"), BNB_E_IO}, Bad{dir.file("none/none.bnb"), BNB_E_IO}, Bad{dir.file("."), BNB_E_IO}, Bad{"/dev/null", BNB_E_IO}, Bad{"", BNB_E_IO},
                         Bad{dir.file("empty.bnb"), BNB_E_FORMAT}, Bad{dir.file("text.bnb"), BNB_E_FORMAT}, Bad{dir.file("short.bnb"), BNB_E_FORMAT}})
        for (uint32_t flags : {0u, 1u}) {
            bnb_error err = {};
            CAPTURE(b.path);
            CHECK(bnb_file_open(env, b.path.c_str(), flags, &err) == nullptr);
            CHECK(err.code == b.code);
            CHECK_MESSAGE(is_sentence(err), text(err));
            CHECK_MESSAGE(contains(text(err), b.path), text(err));
            CHECK(bnb_file_open(env, b.path.c_str(), flags, nullptr) == nullptr);
        }
    std::string long_path = dir.file(std::string(3000, 'p'));
    bnb_error err = {};
    CHECK(bnb_file_open(env, long_path.c_str(), 0, &err) == nullptr);
    CHECK(err.code == BNB_E_IO);
    CHECK_MESSAGE(is_sentence(err), text(err));
}

TEST_CASE("file: damage in a real file") {
    Env env;
    TempDir dir;
    Image image(Image::small_spec());
    const std::string path = dir.file("model.bnb");
    for (size_t n : {size_t{1}, size_t{63}, size_t{64}, static_cast<size_t>(image.metadata_end()) - 1, static_cast<size_t>(image.metadata_end()), image.bytes.size() - 1})
        for (uint32_t flags : {0u, 1u}) {
            bnb_error err = {};
            write_bytes(path, std::vector<uint8_t>(image.bytes.begin(), image.bytes.begin() + static_cast<ptrdiff_t>(n)));
            CHECK(bnb_file_open(env, path.c_str(), flags, &err) == nullptr);
            CHECK(err.code == BNB_E_FORMAT);
            CHECK_MESSAGE(contains(text(err), path), text(err));
        }
    image.bytes[image.record("first.weight").planes[0].offset] ^= 1;
    write_bytes(path, image.bytes);
    bnb_error err = {};
    File f(bnb_file_open(env, path.c_str(), 0, &err));
    REQUIRE(f);
    CHECK(bnb_file_verify(f.get(), &err) == BNB_E_FORMAT);
    CHECK_MESSAGE(contains(text(err), path), text(err));
    CHECK_MESSAGE(contains(text(err), "first.weight"), text(err));
}

TEST_CASE("file: from memory at an odd address is refused") {
    Env env;
    Image image(Image::small_spec());
    std::vector<uint8_t> shifted(image.bytes.size() + 8);
    for (size_t by = 1; by < 8; by++) {
        bnb_error err = {};
        std::memcpy(shifted.data() + by, image.bytes.data(), image.bytes.size());
        CHECK(bnb_file_from_memory(env, shifted.data() + by, image.bytes.size(), NAME, &err) == nullptr);
        check_refusal(err, BNB_E_ARG);
    }
}

TEST_CASE("file: verify tells its progress and can be cancelled") {
    Env env;
    bnb_error err = {};
    Image image(Image::sample_spec());
    File f = open_bytes(env, image.bytes, &err);
    REQUIRE(f);
    Doubles seen;
    env.on_progress = [&](const char *phase, double fraction) {
        CHECK(std::string(phase) == "verify");
        seen.push_back(fraction);
        return true;
    };
    CHECK(bnb_file_verify(f.get(), &err) == BNB_OK);
    CHECK(seen.size() == 6);
    CHECK(std::is_sorted(seen.begin(), seen.end()));
    CHECK(seen.back() == 1.0);
    env.on_progress = [&](const char *, double fraction) { return fraction < 0.4; };
    CHECK(bnb_file_verify(f.get(), &err) == BNB_E_CANCELLED);
    CHECK_MESSAGE(is_sentence(err), text(err));
}

TEST_CASE("file: opening 8 GB reads the metadata only") {
    Env env;
    TempDir dir;
    ImageSpec spec = Image::sample_spec();
    spec.tensors.push_back({"large.weight", BNB_F32, bnb_quant_default(BNB_F32), {1 << 16, 1 << 15}});
    spec.with_data = false;
    spec.alignment = 4096;
    Image image(spec);
    const std::string path = dir.file("large.bnb");
    write_bytes(path, image.bytes);
    if (truncate(path.c_str(), static_cast<off_t>(image.header().file_bytes))) {
        MESSAGE("the file system has no holes: ", path);
        return;
    }
#if defined(__x86_64__)
    const double most_seconds = 0.05;
    const int64_t most_bytes = 4 << 20;
#else // qemu keeps a byte for every page that is mapped
    const double most_seconds = 1;
    const int64_t most_bytes = 64 << 20;
#endif
    double best = 1e9;
    for (int i = 0; i < 5; i++) {
        bnb_error err = {};
        int64_t before = resident_bytes();
        auto start = std::chrono::steady_clock::now();
        File f(bnb_file_open(env, path.c_str(), 0, &err));
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
        REQUIRE_MESSAGE(f, text(err));
        CHECK(bnb_tensor_bytes(bnb_file_find(f.get(), "large.weight")) == uint64_t{1} << 33);
        if (before >= 0) CHECK(resident_bytes() - before < most_bytes);
        CHECK(bnb_env_bytes(env) < 1 << 20);
    }
    CHECK(best < most_seconds);
}

} // TEST_SUITE
