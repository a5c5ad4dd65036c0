// bnb_image.h: a .bnb file in memory whose every field can be spoiled. Written from bnb.h, [FILE], and not from the writer
// in models/, so that reader and writer are tested against a third description of the format.
//
// Use:   Image file = Image::sample();
//        file.record(0).shape[1]++;
//        file.seal();                        // the hash is right again: what is tested lies behind it
// Not:   no large files, no streaming.
#pragma once

#include "util.h"

#include <algorithm>

namespace test {

struct ImageKey {
    std::string name;
    uint32_t kind;
    uint64_t value;    // i64, f64
    std::string bytes; // of a string or an array
};

struct ImageTensor {
    std::string name;
    int32_t type;
    bnb_quant quant;
    Shape shape;
};

struct ImageSpec {
    std::vector<ImageKey> keys;
    std::vector<ImageTensor> tensors; // in the order of their data
    std::vector<std::pair<std::string, std::string>> chunks;
    uint32_t alignment = 64;
    uint64_t behind = 0;    // zero bytes after the last plane
    bool sorted = true;     // false: keys and tensors as they are listed
    uint64_t seed = 1;      // of the data
    bool with_data = true;  // false: bytes ends where data begins (for sparse files)
    std::vector<std::string> order = {"KEYS", "TYPE", "TENS", "STRS"}; // chunks as they are written
};

class Image {
public:
    std::vector<uint8_t> bytes;
    uint64_t keys_at = 0, types_at = 0, records_at = 0, strs_at = 0; // offsets of payloads
    uint64_t n_keys = 0, n_types = 0, n_records = 0, n_strs = 0;
    std::vector<uint64_t> chunks_at; // offsets of chunk headers

    explicit Image(const ImageSpec &spec) { build(spec); }

    // Every kind of key, type and tensor.
    static ImageSpec sample_spec() {
        ImageSpec s;
        const int64_t list[] = {1, -2, INT64_MAX};
        double half = 0.5;
        uint64_t half_bits;
        std::memcpy(&half_bits, &half, 8);
        s.keys = {{"a.number", BNB_KEY_I64, static_cast<uint64_t>(-5), ""},
                  {"b.fraction", BNB_KEY_F64, half_bits, ""},
                  {"c.text", BNB_KEY_STR, 0, std::string("words\0more", 10)},
                  {"d.list", BNB_KEY_I64_ARRAY, 0, std::string(reinterpret_cast<const char *>(list), sizeof list)},
                  {"e.empty", BNB_KEY_STR, 0, ""},
                  {"f.none", BNB_KEY_I64_ARRAY, 0, ""}};
        s.tensors = {{"first.weight", BNB_F32, bnb_quant_default(BNB_F32), {3, 5}},
                     {"int8.weight", BNB_INT8, bnb_quant_default(BNB_INT8), {4, 7}},
                     {"nf4.weight", BNB_NF4, quant4(BNB_NF4, 32, true), {3, 33}},
                     {"fp4.weight", BNB_FP4, quant4(BNB_FP4, 64, false), {70}},
                     {"empty.weight", BNB_F32, bnb_quant_default(BNB_F32), {0, 4}},
                     {"half.weight", BNB_F16, bnb_quant_default(BNB_F16), {2, 1, 3, 2}}};
        s.chunks = {{"tokn", "tokenizer"}, {"prov", ""}};
        return s;
    }
    static ImageSpec small_spec() { // for files that are kept
        ImageSpec s = sample_spec();
        s.tensors = {s.tensors[0], s.tensors[3], {"second", BNB_F32, bnb_quant_default(BNB_F32), {2}}};
        return s;
    }

    bnb_file_header &header() { return at<bnb_file_header>(0); }
    bnb_file_key &key(uint64_t i) { return at<bnb_file_key>(keys_at + i * sizeof(bnb_file_key)); }
    bnb_file_type &type(uint64_t i) { return at<bnb_file_type>(types_at + i * sizeof(bnb_file_type)); }
    bnb_file_record &record(uint64_t i) { return at<bnb_file_record>(records_at + i * sizeof(bnb_file_record)); }
    // By name: records are sorted by hash.
    uint64_t find(const std::string &name) {
        for (uint64_t i = 0; i < n_records; i++)
            if (name_of(i) == name) return i;
        FAIL("no such tensor: ", name);
        return 0;
    }
    bnb_file_record &record(const std::string &name) { return record(find(name)); }
    std::string name_of(uint64_t i) {
        const bnb_file_record &r = record(i);
        return std::string(reinterpret_cast<const char *>(bytes.data() + strs_at + r.name_offset), r.name_bytes);
    }
    template <class T> T &at(uint64_t offset) {
        REQUIRE(offset + sizeof(T) <= bytes.size());
        REQUIRE(offset % alignof(T) == 0);
        return *reinterpret_cast<T *>(bytes.data() + offset);
    }
    uint64_t metadata_end() const { return metadata_end_; }

    void seal() {
        bnb_file_header &h = header();
        uint64_t n = std::min<uint64_t>(h.metadata_bytes, bytes.size() - sizeof h);
        h.hash = bnb_hash64(bytes.data() + sizeof h, n, bnb_hash64(bytes.data(), 56, 0));
    }

private:
    uint64_t metadata_end_ = 0;

    static uint64_t up(uint64_t n, uint64_t align) { return (n + align - 1) / align * align; }
    template <class T> static void append(std::string &out, const T &v) { out.append(reinterpret_cast<const char *>(&v), sizeof v); }

    void build(const ImageSpec &spec) {
        std::string strs, keys, types, records;
        auto intern = [&](const std::string &s, uint64_t align) {
            strs.resize(up(strs.size(), align));
            strs += s;
            return strs.size() - s.size();
        };
        std::vector<ImageKey> sorted_keys = spec.keys;
        if (spec.sorted) std::sort(sorted_keys.begin(), sorted_keys.end(), [](const ImageKey &a, const ImageKey &b) { return a.name < b.name; });
        for (const ImageKey &k : sorted_keys) {
            bnb_file_key r = {};
            r.name_offset = static_cast<uint32_t>(intern(k.name, 1));
            r.name_bytes = static_cast<uint32_t>(k.name.size());
            r.kind = k.kind;
            r.value = k.kind >= BNB_KEY_STR ? intern(k.bytes, k.kind == BNB_KEY_I64_ARRAY ? 8 : 1) : k.value;
            r.count = k.kind == BNB_KEY_I64_ARRAY ? k.bytes.size() / 8 : k.bytes.size();
            append(keys, r);
        }
        std::vector<bnb_file_record> list;
        for (size_t i = 0; i < spec.tensors.size(); i++) {
            const ImageTensor &t = spec.tensors[i];
            bnb_file_type y = {};
            y.id = static_cast<uint32_t>(t.type);
            y.bits = static_cast<uint32_t>(bnb_type_bits(t.type));
            y.blocksize = static_cast<uint32_t>(t.quant.blocksize);
            y.double_quant = static_cast<uint32_t>(t.quant.double_quant);
            y.nested_blocksize = static_cast<uint32_t>(t.quant.nested_blocksize);
            y.dtype = static_cast<uint32_t>(t.quant.dtype);
            y.outlier_rule = static_cast<uint32_t>(t.quant.outlier_rule);
            y.threshold = t.quant.threshold;
            if (y.bits == 4) std::memcpy(y.quant_map, t.type == BNB_NF4 ? bnb_nf4_map : bnb_fp4_map, sizeof y.quant_map);
            append(types, y);
            bnb_file_record r = {};
            r.name_hash = bnb_hash64(t.name.data(), t.name.size(), 0);
            r.name_offset = static_cast<uint32_t>(intern(t.name, 1));
            r.name_bytes = static_cast<uint32_t>(t.name.size());
            r.type = static_cast<uint32_t>(i);
            r.n_dims = static_cast<uint32_t>(t.shape.size());
            for (size_t d = 0; d < BNB_MAX_DIMS; d++) r.shape[d] = d < t.shape.size() ? static_cast<uint64_t>(t.shape[d]) : 1;
            r.nested_offset = 0.125f;
            list.push_back(r);
        }
        const size_t n = list.size();
        auto payload = [&](const std::string &tag) -> std::string {
            return tag == "KEYS" ? keys : tag == "TYPE" ? types : tag == "TENS" ? std::string(n * sizeof(bnb_file_record), '\0') : strs;
        };
        std::string meta;
        auto chunk = [&](const std::string &tag, const std::string &body) {
            chunks_at.push_back(64 + meta.size());
            meta += tag;
            append(meta, uint32_t{0});
            append(meta, uint64_t{body.size()});
            meta += body;
            meta.resize(up(meta.size(), 8));
            return 64 + meta.size() - up(body.size(), 8);
        };
        for (const std::string &tag : spec.order) {
            uint64_t at = chunk(tag, payload(tag));
            if (tag == "KEYS") keys_at = at, n_keys = spec.keys.size();
            if (tag == "TYPE") types_at = at, n_types = n;
            if (tag == "TENS") records_at = at, n_records = n;
            if (tag == "STRS") strs_at = at, n_strs = strs.size();
        }
        for (auto &c : spec.chunks) chunk(c.first, c.second);
        metadata_end_ = 64 + meta.size();

        // planes: each at the next multiple of the alignment
        Rng rng(spec.seed);
        uint64_t end = up(metadata_end_, spec.alignment);
        const uint64_t data_offset = end;
        std::vector<std::pair<uint64_t, std::string>> planes;
        for (size_t i = 0; i < n; i++) {
            const ImageTensor &t = spec.tensors[i];
            for (int32_t p = 0; p < BNB_MAX_PLANES; p++) {
                uint64_t size = bnb_plane_bytes(t.type, &t.quant, static_cast<int32_t>(t.shape.size()), t.shape.data(), p);
                REQUIRE(size != UINT64_MAX);
                if (!size && p) continue;
                uint64_t at = up(end, spec.alignment);
                std::string data;
                if (spec.with_data) {
                    bool floats = (p > 0 && !(p == 1 && bnb_type_bits(t.type) == 4 && t.quant.double_quant)) || (p == 0 && t.type == BNB_F32);
                    for (uint64_t b = 0; b < size / 4 && floats; b++) append(data, rng.normal());
                    for (uint64_t b = 0; b < size / 2 && (t.type == BNB_F16 || t.type == BNB_BF16); b++) {
                        const float v = rng.normal();
                        uint16_t h;
                        REQUIRE(bnb_convert(BNB_F32, &v, t.type, &h, 1, nullptr) == BNB_OK);
                        append(data, h);
                    }
                    while (data.size() < size) data += static_cast<char>(rng.range(1, 255));
                }
                list[i].planes[p] = {at, size, spec.with_data ? bnb_hash64(data.data(), size, 0) : 0};
                planes.emplace_back(at, data);
                end = at + size;
            }
        }
        if (spec.sorted)
            std::sort(list.begin(), list.end(), [&](const bnb_file_record &a, const bnb_file_record &b) {
                auto name = [&](const bnb_file_record &r) { return strs.substr(r.name_offset, r.name_bytes); };
                return a.name_hash != b.name_hash ? a.name_hash < b.name_hash : name(a) < name(b);
            });
        bnb_file_header h = {};
        std::memcpy(h.magic, BNB_FILE_MAGIC, 8);
        h.major = BNB_FILE_MAJOR;
        h.file_bytes = end + spec.behind;
        h.metadata_offset = 64;
        h.metadata_bytes = meta.size();
        h.data_offset = data_offset;
        h.alignment = spec.alignment;
        bytes.assign(spec.with_data ? h.file_bytes : metadata_end_, 0);
        std::memcpy(bytes.data(), &h, sizeof h);
        std::memcpy(bytes.data() + 64, meta.data(), meta.size());
        if (records_at && n) std::memcpy(bytes.data() + records_at, list.data(), n * sizeof list[0]);
        for (auto &p : planes)
            if (!p.second.empty()) std::memcpy(bytes.data() + p.first, p.second.data(), p.second.size());
        seal();
    }
};

} // namespace test
