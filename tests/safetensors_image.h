// safetensors_image.h: checkpoints as tests make and look at them: a writer of safetensors, loading, comparing tensors.
#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../models/checkpoint.h"
#include "util.h"

namespace test {

using Bytes = std::vector<uint8_t>;

// ---- safetensors ----------------------------------------------------------------------------------------------------

struct Stored {
    std::string name, dtype;
    Shape shape;
    Bytes bytes;
};

inline Bytes bytes_of(const std::string &s) { return Bytes(s.begin(), s.end()); }

inline Bytes as_type(int32_t type, const Floats &values) {
    Bytes out(values.size() * size_t(bnb_type_bits(type) / 8));
    REQUIRE(bnb_convert(BNB_F32, values.data(), type, out.data(), int64_t(values.size()), nullptr) == BNB_OK);
    return out;
}

inline std::string dtype_of(int32_t type) { return type == BNB_F32 ? "F32" : type == BNB_F16 ? "F16" : "BF16"; }

inline Stored stored(const std::string &name, const Shape &shape, const Floats &values, int32_t type = BNB_F32) {
    return {name, dtype_of(type), shape, as_type(type, values)};
}

// A file with this header and so many bytes of data.
inline Bytes raw_file(const std::string &header, size_t data_bytes) {
    const uint64_t n = header.size();
    std::string out(8, '\0');
    memcpy(&out[0], &n, 8);
    out += header;
    out.resize(out.size() + data_bytes);
    return bytes_of(out);
}

inline std::string shape_json(const Shape &shape) {
    std::string s;
    for (int64_t d : shape) s += (s.empty() ? "" : ",") + std::to_string(d);
    return "[" + s + "]";
}

inline Bytes safetensors(const std::vector<Stored> &tensors, const std::string &pad = "") {
    std::string header = "{\"__metadata__\":{\"format\":\"pt\"}";
    Bytes data;
    for (const Stored &t : tensors) {
        header += ",\"" + t.name + "\":{\"dtype\":\"" + t.dtype + "\",\"shape\":" + shape_json(t.shape) +
                  ",\"data_offsets\":[" + std::to_string(data.size()) + "," +
                  std::to_string(data.size() + t.bytes.size()) + "]}";
        data.insert(data.end(), t.bytes.begin(), t.bytes.end());
    }
    Bytes out = raw_file(header + "}" + pad, 0);
    out.insert(out.end(), data.begin(), data.end());
    return out;
}

// ---- loading and converting -----------------------------------------------------------------------------------------

inline bnb_load_params load_params(int32_t type) {
    bnb_load_params p;
    bnb_load_params_default(&p, sizeof p);
    p.type = type;
    return p;
}

inline bnb_status convert(Env &env, const std::string &src, const std::string &dst, const bnb_load_params &load,
                          bnb_error *err, bnb_convert_result *result = nullptr) {
    return bnb_convert_checkpoint(env, src.c_str(), dst.c_str(), &load, nullptr, result, err);
}

inline File open_file(Env &env, const std::string &path) {
    bnb_error err = {};
    File f(bnb_file_open(env, path.c_str(), 0, &err));
    REQUIRE_MESSAGE(f, err.msg);
    REQUIRE_MESSAGE(bnb_file_verify(f.get(), &err) == BNB_OK, err.msg);
    return f;
}

struct FreeModel {
    void operator()(bnb_model *m) const { bnb_model_free(m); }
};
using Model = std::unique_ptr<bnb_model, FreeModel>;

inline Model loaded(Env &env, const std::string &path, const bnb_load_params *load = nullptr) {
    bnb_error err = {};
    Model m(bnb_model_load(env, path.c_str(), load, nullptr, &err));
    REQUIRE_MESSAGE(m, err.msg);
    return m;
}

// Loading must fail, with a sentence that has these words in it.
inline void check_refused(Env &env, const std::string &path, bnb_status code, const std::string &words,
                          const bnb_load_params *load = nullptr) {
    bnb_error err = {};
    Model m(bnb_model_load(env, path.c_str(), load, nullptr, &err));
    CHECK_MESSAGE(!m, path);
    CHECK(is_sentence(err));
    CHECK_MESSAGE(err.code == code, err.msg);
    CHECK_MESSAGE(contains(err.msg, words), "'" << err.msg << "' lacks '" << words << "'");
}

// ---- comparing ------------------------------------------------------------------------------------------------------

inline std::vector<Bytes> planes_of(const bnb_tensor *t) {
    std::vector<Bytes> planes;
    for (int32_t p = 0; p < BNB_MAX_PLANES; p++) {
        const uint64_t bytes = bnb_plane_bytes(t->type, &t->quant, t->n_dims, t->shape, p);
        const uint8_t *data = static_cast<const uint8_t *>(bnb_tensor_plane(t, p));
        if (bytes) planes.emplace_back(data, data + bytes);
    }
    return planes;
}

inline void check_same_tensor(const bnb_tensor *a, const bnb_tensor *b) {
    REQUIRE(a);
    REQUIRE(b);
    INFO(a->name);
    CHECK(std::string(a->name) == b->name);
    CHECK(a->type == b->type);
    CHECK(std::equal(a->shape, a->shape + BNB_MAX_DIMS, b->shape));
    CHECK(planes_of(a) == planes_of(b));
    if (!bnb_type_is_quantized(a->type)) return;
    CHECK(a->quant.dtype == b->quant.dtype);
    CHECK(a->quant.nested_offset == b->quant.nested_offset);
    CHECK(a->quant.threshold == b->quant.threshold);
}

} // namespace test
