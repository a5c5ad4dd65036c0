// quant_state.cpp: see quant_state.h. What is accepted is what QuantState.from_dict of bitsandbytes accepts, and
// checked.
#include "quant_state.h"

#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <unordered_map>

#include "pytorch.h"

namespace bnb {

using nlohmann::json;

namespace {

const char *const state_key = ".quant_state.bitsandbytes__";
constexpr uint64_t max_state_bytes = 1 << 12; // real ones have 200

const struct {
    int32_t type;
    const char *name;
} torch_dtypes[] = {{BNB_F32, "float32"}, {BNB_F16, "float16"}, {BNB_BF16, "bfloat16"}};

bool ends_with(const std::string &s, const char *end) {
    const size_t n = strlen(end);
    return s.size() >= n && s.compare(s.size() - n, n, end) == 0;
}

// What the JSON text says.
struct State {
    bnb_quant quant;
    std::vector<int64_t> shape;
    bool nested = false;
};

std::string string_of(const json &object, const char *key) {
    auto v = object.find(key);
    return v != object.end() && v->is_string() ? v->get<std::string>() : "";
}

bool is_key_of_state(const std::string &key) {
    for (const char *known :
         {"quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"})
        if (key == known) return true;
    return false;
}

bool read_blocksize(const json &state, const char *key, const std::string &name, int32_t *out, bnb_error *err) {
    auto v = state.find(key);
    const bool ok = v != state.end() && v->is_number_unsigned() && v->get<uint64_t>() <= INT32_MAX;
    if (ok) *out = v->get<int32_t>();
    return ok || failed(err, BNB_E_FORMAT, "%s: '%s' is not a whole number", name.c_str(), key);
}

bool read_shape(const json &state, const std::string &name, std::vector<int64_t> *shape, bnb_error *err) {
    auto v = state.find("shape");
    bool ok = v != state.end() && v->is_array() && !v->empty() && v->size() <= BNB_MAX_DIMS;
    for (size_t i = 0; ok && i < v->size(); i++) {
        ok = (*v)[i].is_number_unsigned() && (*v)[i].get<uint64_t>() <= uint64_t(INT64_MAX);
        if (ok) shape->push_back((*v)[i].get<int64_t>());
    }
    return ok || failed(err, BNB_E_FORMAT, "%s: 'shape' is not a list of 1 to 4 whole numbers", name.c_str());
}

bool read_nested(const json &state, const std::string &name, State *out, bnb_error *err) {
    for (const char *key : {"nested_blocksize", "nested_dtype", "nested_offset"}) out->nested |= state.contains(key);
    if (!out->nested) return true;
    if (!read_blocksize(state, "nested_blocksize", name, &out->quant.nested_blocksize, err)) return false;
    if (string_of(state, "nested_dtype") != "float32")
        return failed(err, BNB_E_UNSUPPORTED, "%s: 'nested_dtype' is not \"float32\"", name.c_str());
    auto offset = state.find("nested_offset");
    if (offset == state.end() || !offset->is_number() || !std::isfinite(static_cast<float>(offset->get<double>())))
        return failed(err, BNB_E_FORMAT, "%s: 'nested_offset' is not a number that an f32 can hold", name.c_str());
    out->quant.nested_offset = static_cast<float>(offset->get<double>());
    return true;
}

bool read_state(const void *text, uint64_t bytes, int32_t type, const std::string &name, State *out, bnb_error *err) {
    json state;
    if (!json_parse(text, bytes, name, &state, err, max_state_bytes)) return false;
    if (!state.is_object()) return failed(err, BNB_E_FORMAT, "%s is not a JSON object", name.c_str());
    for (const auto &item : state.items())
        if (!is_key_of_state(item.key()))
            return failed(err, BNB_E_FORMAT, "%s: the key '%s' is not known", name.c_str(),
                          printable(item.key()).c_str());
    if (string_of(state, "quant_type") != bnb_type_name(type))
        return failed(err, BNB_E_FORMAT, "%s: 'quant_type' is not \"%s\", as its name says", name.c_str(),
                      bnb_type_name(type));
    out->quant = bnb_quant_default(type);
    out->quant.dtype = torch_dtype_from_name(string_of(state, "dtype"));
    if (out->quant.dtype < 0)
        return failed(err, BNB_E_FORMAT, "%s: 'dtype' is not float32, float16 or bfloat16", name.c_str());
    if (!read_blocksize(state, "blocksize", name, &out->quant.blocksize, err) ||
        !read_shape(state, name, &out->shape, err) || !read_nested(state, name, out, err))
        return false;
    out->quant.double_quant = out->nested;
    if (bnb_plane_bytes(type, &out->quant, int32_t(out->shape.size()), out->shape.data(), 0) != UINT64_MAX) return true;
    return failed(err, BNB_E_FORMAT, "%s: the blocksize is %d%s, the shape %s: no such weight can be", name.c_str(),
                  static_cast<int>(out->quant.blocksize),
                  out->nested ? (" and " + std::to_string(out->quant.nested_blocksize)).c_str() : "",
                  shape_text(out->shape).c_str());
}

} // namespace

const char *torch_dtype_name(int32_t type) {
    for (const auto &d : torch_dtypes)
        if (d.type == type) return d.name;
    return nullptr;
}

int32_t torch_dtype_from_name(const std::string &name) {
    for (const auto &d : torch_dtypes)
        if (name == d.name) return d.type;
    return -1;
}

// ---- reading --------------------------------------------------------------------------------------------------------

struct QuantizedWeights::Folder {
    QuantizedWeights &self;
    const std::string &where;
    std::vector<SourceTensor> &tensors;
    bnb_error *err;
    std::unordered_map<std::string, size_t> index = {}; // name -> tensor
    std::vector<bool> used = {};                        // part of a folded weight

    std::string shown(const std::string &name) const { return where + ": '" + printable(name) + "'"; }

    SourceTensor *find(const std::string &name) {
        auto it = index.find(name);
        return it == index.end() ? nullptr : &tensors[it->second];
    }

    // A tensor that the weight needs, from now on a part of it.
    SourceTensor *take(const std::string &name, const std::string &weight) {
        SourceTensor *t = find(name);
        if (t) used[index[name]] = true;
        else
            failed(err, BNB_E_FORMAT, "%s is quantized, but lacks its '%s'", shown(weight).c_str(),
                   printable(name).c_str());
        return t;
    }

    // The bytes of a tensor, where they lie if they are dense and aligned there.
    const void *dense(const SourceTensor &s, size_t alignment) {
        if (!s.strided && reinterpret_cast<uintptr_t>(s.data) % alignment == 0) return s.data;
        self.copies_.emplace_back(new uint8_t[s.bytes]);
        uint8_t *copy = self.copies_.back().get();
        if (s.strided) strided_gather(*s.strided, 0, s.shape[0], copy);
        else memcpy(copy, s.data, s.bytes);
        return copy;
    }

    bool plane(const SourceTensor *s, const char *dtype, uint64_t bytes, void **out) {
        if (!s) return false;
        if (s->dtype != dtype || s->bytes != bytes)
            return failed(err, BNB_E_FORMAT, "%s has the dtype %s and %llu bytes, but %s and %llu are needed",
                          shown(s->name).c_str(), s->dtype.c_str(), static_cast<unsigned long long>(s->bytes), dtype,
                          static_cast<unsigned long long>(bytes));
        *out = const_cast<void *>(dense(*s, strcmp(dtype, "F32") == 0 ? 4 : 1));
        return true;
    }

    // Puts the tensor that the planes make in the place of `weight`.
    bool replace(SourceTensor *weight, int32_t type, const bnb_quant &quant, const std::vector<int64_t> &shape,
                 void *const *planes) {
        const std::string name = weight->name.substr(0, BNB_MAX_NAME - 1);
        self.store_->add(name, shape, type, &quant);
        if (!self.store_->status(err)) return false;
        bnb_tensor *t = self.store_->tensors().back();
        if (bnb_tensor_bind(t, planes, err) != BNB_OK) return false;
        weight->dtype = bnb_type_name(type);
        weight->type = type;
        weight->shape = shape;
        weight->data = planes[0];
        weight->bytes = bnb_plane_bytes(type, &quant, int32_t(shape.size()), shape.data(), 0);
        weight->strided.reset();
        weight->tensor = t;
        return true;
    }

    bool check_map(const SourceTensor &map, const float *values, const char *type) {
        for (int i = 0; i < 16; i++) // as numbers: bitsandbytes writes +0 for the second zero of FP4
            if (values[i] != (strcmp(type, "nf4") == 0 ? bnb_nf4_map : bnb_fp4_map)[i])
                return failed(err, BNB_E_UNSUPPORTED,
                              "%s is not bitsandbytes' map of %s: its value %d is %.9g, and other maps are not offered",
                              shown(map.name).c_str(), type, i, static_cast<double>(values[i]));
        return true;
    }

    bool fold_4bit(const SourceTensor &state_tensor, const std::string &name, int32_t type) {
        SourceTensor *weight = find(name);
        if (!weight || weight->tensor)
            return failed(err, BNB_E_FORMAT, "%s describes a weight that is %s", shown(state_tensor.name).c_str(),
                          weight ? "described twice" : "not there");
        if (state_tensor.dtype != "U8" || state_tensor.strided)
            return failed(err, BNB_E_FORMAT, "%s is not a list of bytes", shown(state_tensor.name).c_str());
        State state;
        if (!read_state(state_tensor.data, state_tensor.bytes, type, shown(state_tensor.name), &state, err))
            return false;
        const bnb_quant &q = state.quant;
        const auto bytes = [&](int32_t p) {
            return bnb_plane_bytes(type, &q, int32_t(state.shape.size()), state.shape.data(), p);
        };
        void *planes[BNB_MAX_PLANES] = {}, *map = nullptr;
        if (weight->bytes != bytes(0))
            return failed(err, BNB_E_FORMAT, "%s has %llu bytes, but %llu are needed for the shape %s",
                          shown(name).c_str(), static_cast<unsigned long long>(weight->bytes),
                          static_cast<unsigned long long>(bytes(0)), shape_text(state.shape).c_str());
        planes[0] = const_cast<void *>(dense(*weight, 1)); // of any dtype: quant_storage names the bytes, no more
        const SourceTensor *map_tensor = take(name + ".quant_map", name);
        if (!plane(map_tensor, "F32", 64, &map) ||
            !check_map(*map_tensor, static_cast<const float *>(map), bnb_type_name(type)) ||
            !plane(take(name + ".absmax", name), q.double_quant ? "U8" : "F32", bytes(1), &planes[1]))
            return false;
        if (q.double_quant && (!plane(take(name + ".nested_absmax", name), "F32", bytes(2), &planes[2]) ||
                               !plane(take(name + ".nested_quant_map", name), "F32", bytes(3), &planes[3])))
            return false;
        return replace(weight, type, q, state.shape, planes);
    }

    // Numbers as bitsandbytes 0.43.1 and later writes them, and the names that came before.
    bool check_format(const std::string &module) {
        const SourceTensor *f = find(module + ".weight_format");
        if (!f) return true;
        used[index[f->name]] = true;
        const bool number = f->dtype == "U8" && f->bytes == 1 && !f->strided;
        const bool row = number ? *static_cast<const uint8_t *>(f->data) == 0
                         : f->dtype == "STR"
                             ? std::string(static_cast<const char *>(f->data), size_t(f->bytes)) == "row"
                             : false;
        return row || failed(err, BNB_E_UNSUPPORTED,
                             "%s names a layout for Turing or Ampere GPUs; only rows are read: load the checkpoint "
                             "with bitsandbytes 0.43 or 0.44 and save it again",
                             shown(f->name).c_str());
    }

    bool fold_8bit(const SourceTensor &scb, const std::string &module) {
        const std::string name = module + ".weight";
        SourceTensor *weight = find(name);
        if (!weight || weight->dtype != "I8" || weight->shape.size() != 2)
            return failed(err, BNB_E_FORMAT, "%s belongs to '%s', which is not a matrix of I8", shown(scb.name).c_str(),
                          printable(name).c_str());
        bnb_quant q = bnb_quant_default(BNB_INT8);
        q.dtype = self.int8_dtype;
        q.threshold = self.int8_threshold;
        void *planes[BNB_MAX_PLANES] = {};
        const std::vector<int64_t> shape = weight->shape;
        if (!check_format(module) || !plane(weight, "I8", weight->bytes, &planes[0]) ||
            !plane(&scb, "F32", bnb_plane_bytes(BNB_INT8, &q, 2, shape.data(), 1), &planes[1]))
            return false;
        return replace(weight, BNB_INT8, q, shape, planes);
    }

    bool fold_one(size_t i) {
        const SourceTensor &t = tensors[i];
        if (ends_with(t.name, ".SCB")) {
            used[i] = true;
            return fold_8bit(t, t.name.substr(0, t.name.size() - 4));
        }
        const size_t key = t.name.rfind(state_key);
        if (key == std::string::npos) return true;
        const std::string type = t.name.substr(key + strlen(state_key));
        used[i] = true;
        if (type == "nf4" || type == "fp4")
            return fold_4bit(t, t.name.substr(0, key), bnb_type_from_name(type.c_str()));
        return failed(err, BNB_E_UNSUPPORTED, "%s: there is no 4-bit type '%s'", shown(t.name).c_str(),
                      printable(type).c_str());
    }

    bool run() {
        for (size_t i = 0; i < tensors.size(); i++) index.emplace(tensors[i].name, i);
        used.resize(tensors.size());
        for (size_t i = 0; i < tensors.size(); i++)
            if (!fold_one(i)) return false;
        size_t n = 0;
        for (size_t i = 0; i < tensors.size(); i++) {
            if (used[i]) continue;
            if (n != i) tensors[n] = std::move(tensors[i]);
            n++;
        }
        tensors.resize(n);
        return true;
    }
};

bool QuantizedWeights::fold(bnb_env *env, const std::string &where, std::vector<SourceTensor> *tensors,
                            bnb_error *err) {
    store_ = TensorStore::create(env, err);
    return store_ && Folder{*this, where, *tensors, err}.run();
}

// ---- writing --------------------------------------------------------------------------------------------------------

std::vector<StoredPart> stored_parts(const std::string &name, int32_t type, const bnb_quant &quant,
                                     const std::vector<int64_t> &shape) {
    const auto bytes = [&](int32_t p) { return bnb_plane_bytes(type, &quant, int32_t(shape.size()), shape.data(), p); };
    const auto count = [&](int32_t p, uint64_t size) { return int64_t(bytes(p) / size); };
    if (type == BNB_INT8) {
        const std::string module = name.substr(0, name.rfind('.'));
        return {{name, "I8", shape, bytes(0), 0},
                {module + ".SCB", "F32", {shape[0]}, bytes(1), 1},
                {module + ".weight_format", "U8", {}, 1, -3}};
    }
    if (bnb_type_bits(type) != 4)
        return {{name, type == BNB_F32 ? "F32" : type == BNB_F16 ? "F16" : "BF16", shape, bytes(0), 0}};
    std::vector<StoredPart> parts = {{name, "U8", {count(0, 1), 1}, bytes(0), 0}};
    if (quant.double_quant) {
        parts.push_back({name + ".absmax", "U8", {count(1, 1)}, bytes(1), 1});
        parts.push_back({name + ".nested_absmax", "F32", {count(2, 4)}, bytes(2), 2});
        parts.push_back({name + ".nested_quant_map", "F32", {count(3, 4)}, bytes(3), 3});
    } else {
        parts.push_back({name + ".absmax", "F32", {count(1, 4)}, bytes(1), 1});
    }
    parts.push_back({name + ".quant_map", "F32", {16}, 64, -1});
    parts.push_back({name + state_key + bnb_type_name(type), "U8", {}, 512, -2});
    return parts;
}

// The text that bitsandbytes writes, to the letter: its keys in its order, Python's separators.
static std::string state_text(const bnb_tensor *t) {
    const bnb_quant &q = t->quant;
    std::string s = std::string("{\"quant_type\": \"") + bnb_type_name(t->type) +
                    "\", \"blocksize\": " + std::to_string(q.blocksize) + ", \"dtype\": \"" +
                    torch_dtype_name(q.dtype) + "\", \"shape\": " + shape_text({t->shape, t->shape + t->n_dims});
    if (q.double_quant)
        s += ", \"nested_blocksize\": " + std::to_string(q.nested_blocksize) +
             ", \"nested_dtype\": \"float32\", \"nested_offset\": " + json(static_cast<double>(q.nested_offset)).dump();
    return s + "}";
}

std::string stored_contents(const StoredPart &part, const bnb_tensor *t) {
    if (part.plane == -3) return std::string(1, '\0');
    if (part.plane == -2) return state_text(t);
    float map[16];
    for (int i = 0; i < 16; i++) map[i] = (t->type == BNB_NF4 ? bnb_nf4_map : bnb_fp4_map)[i] + 0.0f; // -0 becomes +0
    return std::string(reinterpret_cast<const char *>(map), sizeof map);
}

} // namespace bnb
