// test_formats.cpp: types, conversions, quantize and dequantize, bit for bit as bitsandbytes does them.
//
// Golden: the vectors G1 to G9 below (G1, G2, G4 and G5 were checked on a GPU), and golden/formats.bin, 1530 small tensors
//         made by golden/make_formats.py from the real bitsandbytes (compat cpu) and a model of its GPU kernels (cuda).
// Not:    products with quantized weights: test_ops.cpp.
#include <algorithm>
#include <cfenv>
#include <limits>

#include "util.h"

#ifndef BNB_SOURCE_DIR
#define BNB_SOURCE_DIR "."
#endif

using namespace test;

namespace {

using Bytes = std::vector<uint8_t>;
using Words = std::vector<uint32_t>;

const std::vector<int32_t> BLOCKSIZES = {32, 64, 128, 256, 512, 1024, 2048, 4096};
const std::vector<int32_t> FLOAT_TYPES = {BNB_F32, BNB_F16, BNB_BF16};
const std::vector<int32_t> QUANT_TYPES = {BNB_NF4, BNB_FP4, BNB_INT8};

uint32_t bits(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
}
float from_bits(uint32_t u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}

std::string hex(const uint8_t *p, size_t n) {
    std::string s;
    for (size_t i = 0; i < n; i++) {
        s += "0123456789abcdef"[p[i] >> 4];
        s += "0123456789abcdef"[p[i] & 15];
    }
    return s;
}
std::string hex(const Bytes &b) { return hex(b.data(), b.size()); }

Words words(const Bytes &b) {
    Words w(b.size() / 4);
    if (!w.empty()) std::memcpy(w.data(), b.data(), w.size() * 4);
    return w;
}
Floats floats(const Bytes &b) {
    Floats f(b.size() / 4);
    if (!f.empty()) std::memcpy(f.data(), b.data(), f.size() * 4);
    return f;
}
std::vector<uint16_t> halves(const Bytes &b) {
    std::vector<uint16_t> h(b.size() / 2);
    if (!h.empty()) std::memcpy(h.data(), b.data(), h.size() * 2);
    return h;
}

// ---- tensors that own their bytes ------------------------------------------------------------------------------------

// Plain numbers, not in a tensor yet: bytes of n elements of a float type.
struct Data {
    int32_t type;
    Bytes bytes;
    int64_t n() const { return static_cast<int64_t>(bytes.size()) / (bnb_type_bits(type) / 8); }
};

Data to_data(const Floats &x, int32_t type = BNB_F32) {
    Data d = {type, Bytes(x.size() * static_cast<size_t>(bnb_type_bits(type) / 8))};
    REQUIRE(bnb_convert(BNB_F32, x.data(), type, d.bytes.data(), static_cast<int64_t>(x.size()), nullptr) == BNB_OK);
    return d;
}

Floats to_floats(const Data &d) {
    Floats x(static_cast<size_t>(d.n()));
    REQUIRE(bnb_convert(d.type, d.bytes.data(), BNB_F32, x.data(), d.n(), nullptr) == BNB_OK);
    return x;
}

// A tensor bound to bytes of its own. shift: bytes that every plane lies off its alignment.
class Tensor {
public:
    Tensor(bnb_env *env, int32_t type, const Shape &shape, const bnb_quant *quant = nullptr, size_t shift = 0,
           const char *name = "w")
        : shift_(shift) {
        bnb_error err = {};
        ctx_.reset(bnb_ctx_create(env, &err));
        REQUIRE_MESSAGE(ctx_, err.msg);
        t_ = bnb_tensor_new(ctx_.get(), type, quant, static_cast<int32_t>(shape.size()), shape.data(), name);
        if (!t_) bnb_ctx_status(ctx_.get(), &err);
        REQUIRE_MESSAGE(t_, err.msg);
        void *address[BNB_MAX_PLANES];
        for (int32_t p = 0; p < BNB_MAX_PLANES; p++) {
            bytes_[p] = bnb_plane_bytes(type, bnb_tensor_quant(t_), bnb_tensor_n_dims(t_), shape.data(), p);
            memory_[p].assign(bytes_[p] + shift + GUARD, 0xee);
            address[p] = memory_[p].data() + shift;
        }
        REQUIRE(bnb_tensor_bind(t_, address, &err) == BNB_OK);
    }
    ~Tensor() {
        for (int32_t p = 0; p < BNB_MAX_PLANES; p++)
            for (size_t i = bytes_[p] + shift_; i < memory_[p].size(); i++)
                if (memory_[p][i] != 0xee) {
                    CHECK_MESSAGE(false, "bytes behind a plane were written");
                    return;
                }
    }
    operator bnb_tensor *() const { return t_; }
    bnb_tensor *operator->() const { return t_; }
    Bytes plane(int32_t p) const {
        const uint8_t *a = memory_[p].data() + shift_;
        return Bytes(a, a + bytes_[p]);
    }
    void fill(int32_t p, const Bytes &b) {
        REQUIRE(b.size() == bytes_[p]);
        std::copy(b.begin(), b.end(), memory_[p].begin() + static_cast<ptrdiff_t>(shift_));
    }
    bool same(const Tensor &other) const {
        for (int32_t p = 0; p < BNB_MAX_PLANES; p++)
            if (plane(p) != other.plane(p)) return false;
        return bits(t_->quant.nested_offset) == bits(other->quant.nested_offset) && t_->quant.dtype == other->quant.dtype;
    }

private:
    enum { GUARD = 64 };
    Ctx ctx_;
    bnb_tensor *t_;
    size_t shift_;
    uint64_t bytes_[BNB_MAX_PLANES];
    Bytes memory_[BNB_MAX_PLANES];
};

using TensorPtr = std::unique_ptr<Tensor>;

TensorPtr quantize(bnb_env *env, const Data &data, int32_t type, const Shape &shape, int32_t compat = BNB_COMPAT_CUDA,
                   int32_t blocksize = 64, bool double_quant = false, size_t shift = 0) {
    bnb_error err = {};
    Tensor src(env, data.type, shape, nullptr, shift, "src");
    src.fill(0, data.bytes);
    bnb_quant q = quant4(type, blocksize, double_quant);
    TensorPtr dst(new Tensor(env, type, shape, &q));
    bnb_status status = bnb_quantize(env, src, *dst, compat, &err);
    REQUIRE_MESSAGE(status == BNB_OK, err.msg);
    CHECK((*dst)->quant.dtype == data.type);
    return dst;
}
TensorPtr quantize(bnb_env *env, const Floats &x, int32_t type, int32_t compat = BNB_COMPAT_CUDA, int32_t blocksize = 64,
                   bool double_quant = false) {
    return quantize(env, to_data(x), type, {static_cast<int64_t>(x.size())}, compat, blocksize, double_quant);
}

Bytes dequantize(bnb_env *env, const Tensor &src, int32_t type) {
    bnb_error err = {};
    Tensor dst(env, type, Shape(src->shape, src->shape + src->n_dims), nullptr, 0, "dst");
    bnb_status status = bnb_dequantize(env, src, dst, &err);
    REQUIRE_MESSAGE(status == BNB_OK, err.msg);
    return dst.plane(0);
}

// ---- inputs ----------------------------------------------------------------------------------------------------------
// The generator of the golden vectors; golden/make_formats.py has the same patterns under the same numbers.

struct Lcg {
    uint32_t s;
    explicit Lcg(uint32_t seed) : s(seed) {}
    uint32_t next() { return s = s * 1664525u + 1013904223u; }
    Floats normalish(int64_t n, float scale = 1) {
        Floats x(static_cast<size_t>(n));
        for (float &v : x) {
            int32_t t = -(1 << 25);
            for (int k = 0; k < 4; k++) t += static_cast<int32_t>(next() >> 8);
            v = static_cast<float>(t) * 0x1p-24f * scale;
        }
        return x;
    }
};

enum { NORMAL, BITS, TINY, SPARSE, ZERO, TIES, PATTERNS };

Data make_input(uint32_t pattern, int32_t quant_type, int32_t type, int32_t blocksize, uint32_t seed, int64_t n) {
    Lcg lcg(seed);
    if (pattern == NORMAL) return to_data(lcg.normalish(n, 0.02f), type);
    if (pattern == TINY) return to_data(lcg.normalish(n, 1e-38f), type);
    if (pattern == ZERO) return to_data(Floats(static_cast<size_t>(n)), type);
    if (pattern == BITS) {
        Data d = {type, Bytes()};
        for (int64_t i = 0; i < n; i++) {
            uint32_t u = lcg.next();
            const uint8_t *p = reinterpret_cast<const uint8_t *>(&u);
            d.bytes.insert(d.bytes.end(), p + (type == BNB_F32 ? 0 : 2), p + 4);
        }
        return d;
    }
    Floats map(quant_type == BNB_FP4 ? bnb_fp4_map : bnb_nf4_map, (quant_type == BNB_FP4 ? bnb_fp4_map : bnb_nf4_map) + 16);
    std::sort(map.begin(), map.end());
    Floats x;
    for (int64_t i = 0; i < n; i++) {
        uint32_t u = lcg.next();
        float v;
        if (pattern == SPARSE) {
            const float special[3] = {NAN, INFINITY, -INFINITY};
            v = u >> 31 ? 0 : static_cast<float>(u >> 8) * 0x1p-24f - 0.5f;
            if ((u >> 16 & 255) < 3) v = special[u >> 16 & 255];
        } else {
            size_t k = (u >> 16) % 15;
            v = i % blocksize ? from_bits(bits((map[k] + map[k + 1]) * 0.5f) + (u >> 8) % 3 - 1) : 1.0f;
        }
        x.push_back(v);
    }
    return to_data(x, type);
}

// One NaN, and with FP4 one zero: their bits are not part of the format.
void canonical(Floats &x, bool fp4) {
    for (float &v : x) {
        if (std::isnan(v)) v = from_bits(0x7fc00000);
        if (fp4 && v == 0) v = 0;
    }
}
Bytes canonical_bytes(const Bytes &f32_bytes, bool fp4) {
    Floats x = floats(f32_bytes);
    canonical(x, fp4);
    return to_data(x).bytes;
}

uint32_t crc32(const Bytes &b) {
    uint32_t crc = 0xffffffff;
    for (uint8_t byte : b) {
        crc ^= byte;
        for (int k = 0; k < 8; k++) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    }
    return ~crc;
}

// Every kind of number in tensors of any shape: what the plain code, the fast code and any number of threads must agree on.
Data any_data(Rng &rng, int32_t type, int64_t n) {
    uint32_t pattern = static_cast<uint32_t>(rng.range(0, PATTERNS - 1));
    return make_input(pattern, rng.pick(QUANT_TYPES), type, rng.pick(BLOCKSIZES), static_cast<uint32_t>(rng.next()), n);
}

void check_error(bnb_status status, bnb_status want, const bnb_error &err, const std::string &part) {
    INFO(err.msg);
    CHECK(status == want);
    CHECK(err.code == want);
    CHECK(is_sentence(err));
    CHECK(contains(err.msg, part));
}

} // namespace

TEST_SUITE_BEGIN("formats");

// ---- types -----------------------------------------------------------------------------------------------------------

TEST_CASE("formats: names, sizes and ids of types") {
    struct Row { int32_t id; const char *name; int32_t bits; bool quantized; };
    const Row rows[] = {{0, "f32", 32, false}, {1, "f16", 16, false}, {2, "bf16", 16, false}, {3, "i32", 32, false}, {4, "i8", 8, false},
                        {5, "u8", 8, false},   {8, "int8", 8, true},  {9, "nf4", 4, true},    {10, "fp4", 4, true},
                        {11, "int8_kv", 8, false}};
    for (const Row &r : rows) {
        CHECK(std::string(bnb_type_name(r.id)) == r.name);
        CHECK(bnb_type_bits(r.id) == r.bits);
        CHECK(bnb_type_from_name(r.name) == r.id);
        CHECK((bnb_type_is_quantized(r.id) != 0) == r.quantized);
    }
    for (int32_t id : {-1, 6, 7, 12, 1 << 30, INT32_MIN}) {
        CHECK(bnb_type_name(id) == nullptr);
        CHECK(bnb_type_bits(id) == 0);
        CHECK(!bnb_type_is_quantized(id));
    }
    for (const char *name : {"", "NF4", "nf4 ", "q4_0"}) CHECK(bnb_type_from_name(name) == -1);
}

TEST_CASE("formats: defaults are bitsandbytes'") {
    for (int32_t type : QUANT_TYPES) {
        bnb_quant q = bnb_quant_default(type);
        CHECK(q.blocksize == 64);
        CHECK(q.double_quant == 0);
        CHECK(q.nested_blocksize == 256);
        CHECK(q.dtype == BNB_F32);
        CHECK(q.threshold == (type == BNB_INT8 ? 6.0f : 0.0f));
        CHECK(q.outlier_rule == BNB_OUTLIER_COLUMN);
    }
}

TEST_CASE("formats: the codebooks, word for word") {
    const uint32_t nf4[16] = {0xBF800000, 0xBF3239B1, 0xBF066B30, 0xBECA32A0, 0xBE91A24D, 0xBE3D353F, 0xBDBA7871, 0x00000000,
                              0x3DA2FAFF, 0x3E24CAE3, 0x3E7C04DD, 0x3EAD033A, 0x3EE1A4B8, 0x3F1007AB, 0x3F3913B3, 0x3F800000};
    const uint32_t fp4[8] = {0x00000000, 0x3BAAAAAB, 0x3F2AAAAB, 0x3F800000, 0x3EAAAAAB, 0x3F000000, 0x3E2AAAAB, 0x3E800000};
    for (int i = 0; i < 16; i++) {
        CHECK(bits(bnb_nf4_map[i]) == nf4[i]);
        CHECK(bits(bnb_fp4_map[i]) == (i < 8 ? fp4[i] : fp4[i - 8] | 0x80000000));
    }
}

TEST_CASE("formats: bytes of planes") {
    auto plane = [](int32_t type, const Shape &shape, int32_t p, int32_t blocksize = 64, bool dq = false) {
        bnb_quant q = quant4(type, blocksize, dq);
        return bnb_plane_bytes(type, &q, static_cast<int32_t>(shape.size()), shape.data(), p);
    };
    auto planes = [&](int32_t type, const Shape &shape, int32_t blocksize = 64, bool dq = false) {
        std::vector<uint64_t> v;
        for (int32_t p = -1; p < 6; p++) v.push_back(plane(type, shape, p, blocksize, dq));
        CHECK(v[0] == 0);
        CHECK(v[5] + v[6] == 0);
        return std::vector<uint64_t>(v.begin() + 1, v.begin() + 5);
    };
    using V = std::vector<uint64_t>;
    CHECK(planes(BNB_F32, {3, 5}) == V{60, 0, 0, 0});
    CHECK(planes(BNB_BF16, {7}) == V{14, 0, 0, 0});
    CHECK(planes(BNB_I8, {2, 3, 4, 5}) == V{120, 0, 0, 0});
    CHECK(planes(BNB_INT8, {3, 5}) == V{15, 12, 0, 0});
    CHECK(planes(BNB_NF4, {128, 64}) == V{4096, 512, 0, 0});
    CHECK(planes(BNB_FP4, {3, 43}, 32) == V{65, 20, 0, 0});
    CHECK(planes(BNB_NF4, {128, 64}, 64, true) == V{4096, 128, 4, 1024});
    CHECK(planes(BNB_NF4, {257, 64}, 64, true) == V{8224, 257, 8, 1024});
    CHECK(planes(BNB_NF4, {0, 64}) == V{0, 0, 0, 0});
    CHECK(planes(BNB_INT8, {4, 0}) == V{0, 16, 0, 0});

    const int64_t big = INT64_MAX;
    CHECK(plane(BNB_F32, {-1, 4}, 0) == UINT64_MAX);
    CHECK(plane(BNB_F32, {0, -4}, 0) == UINT64_MAX);
    CHECK(plane(BNB_F32, {big, 2}, 0) == UINT64_MAX);
    CHECK(plane(BNB_U8, {big / 2, 4}, 0) == UINT64_MAX);
    CHECK(plane(BNB_NF4, {1ll << 32, 1ll << 32}, 0) == UINT64_MAX);
    CHECK(plane(BNB_NF4, {1ll << 40, 1ll << 40, 1ll << 40}, 1) == UINT64_MAX);
    CHECK(plane(BNB_F32, {big, big, 0}, 0) == UINT64_MAX); // nothing at all, but no index into it could be computed
    CHECK(plane(BNB_NF4, {0, 3}, 0, 48) == UINT64_MAX);
    CHECK(bnb_plane_bytes(BNB_NF4, nullptr, 1, &big, 0) == UINT64_MAX);
    CHECK(bnb_plane_bytes(99, nullptr, 1, &big, 0) == UINT64_MAX);
    for (int32_t blocksize : {0, -64, 16, 48, 65, 8192}) CHECK(plane(BNB_NF4, {64}, 0, blocksize) == UINT64_MAX);
    for (int32_t blocksize : BLOCKSIZES) CHECK(plane(BNB_NF4, {blocksize + 1}, 1, blocksize) == 8);
}

// ---- conversions -----------------------------------------------------------------------------------------------------

TEST_CASE("formats: every 16-bit number widens exactly") {
    std::vector<uint16_t> all(65536);
    for (size_t i = 0; i < all.size(); i++) all[i] = static_cast<uint16_t>(i);
    for (int32_t type : {BNB_F16, BNB_BF16}) {
        Floats x(all.size());
        REQUIRE(bnb_convert(type, all.data(), BNB_F32, x.data(), 65536, nullptr) == BNB_OK);
        std::vector<uint16_t> back(all.size());
        REQUIRE(bnb_convert(BNB_F32, x.data(), type, back.data(), 65536, nullptr) == BNB_OK);
        int64_t wrong = 0;
        for (size_t i = 0; i < all.size(); i++) {
            double want = type == BNB_F16 ? f16_value(all[i]) : bf16_value(all[i]), got = static_cast<double>(x[i]);
            bool nan = std::isnan(want);
            wrong += nan ? !std::isnan(x[i]) : got != want || std::signbit(got) != (all[i] >= 0x8000);
            wrong += nan ? !std::isnan(type == BNB_F16 ? f16_value(back[i]) : bf16_value(back[i])) : back[i] != all[i];
        }
        CHECK(wrong == 0);
    }
}

TEST_CASE("formats: numbers round to the nearest, ties to even, overflow to infinity") {
    Rng rng(1);
    for (int32_t type : {BNB_F16, BNB_BF16}) {
        // every boundary between two neighbours, and the f32 numbers beside it
        Floats x;
        uint32_t largest = type == BNB_F16 ? 0x7c00 : 0x7f80;
        for (uint32_t h = 0; h < largest; h++) {
            auto value = [&](uint32_t v) { return type == BNB_F16 ? f16_value(static_cast<uint16_t>(v)) : bf16_value(static_cast<uint16_t>(v)); };
            double low = value(h), high = h + 1 < largest ? value(h + 1) : 2 * low - value(h - 1);
            float middle = static_cast<float>((low + high) / 2);
            for (float v : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, INFINITY)}) x.insert(x.end(), {v, -v});
        }
        for (int i = 0; i < 20000; i++) x.push_back(from_bits(static_cast<uint32_t>(rng.next())));
        Data d = to_data(x, type);
        int64_t wrong = 0;
        for (size_t i = 0; i < x.size(); i++) {
            uint16_t h = halves(Bytes(d.bytes.begin() + 2 * static_cast<ptrdiff_t>(i), d.bytes.begin() + 2 * static_cast<ptrdiff_t>(i) + 2))[0];
            double got = type == BNB_F16 ? f16_value(h) : bf16_value(h), want = round_to(type, static_cast<double>(x[i]));
            wrong += std::isnan(want) ? !std::isnan(got) : got != want || std::signbit(got) != std::signbit(x[i]);
        }
        CHECK(wrong == 0);
    }
}

TEST_CASE("formats: convert takes any address, any pair, and refuses the rest") {
    Rng rng(2);
    Floats x = rng.normals(3001);
    for (int32_t from : FLOAT_TYPES)
        for (int32_t to : FLOAT_TYPES) {
            Data d = to_data(x, from);
            Bytes odd(d.bytes.size() + 1), out(x.size() * static_cast<size_t>(bnb_type_bits(to) / 8) + 2, 0xee);
            std::copy(d.bytes.begin(), d.bytes.end(), odd.begin() + 1);
            REQUIRE(bnb_convert(from, odd.data() + 1, to, out.data() + 1, d.n(), nullptr) == BNB_OK);
            CHECK(Bytes(out.begin() + 1, out.end() - 1) == to_data(to_floats(d), to).bytes);
            CHECK(out.front() == 0xee);
            CHECK(out.back() == 0xee);
        }
    bnb_error err = {};
    float f = 1;
    check_error(bnb_convert(BNB_NF4, &f, BNB_F32, &f, 1, &err), BNB_E_TYPE, err, "nf4");
    check_error(bnb_convert(BNB_F32, &f, BNB_I32, &f, 1, &err), BNB_E_TYPE, err, "i32");
    check_error(bnb_convert(BNB_F32, &f, 77, &f, 1, &err), BNB_E_TYPE, err, "unknown");
    check_error(bnb_convert(BNB_F32, &f, BNB_F16, &f, -1, &err), BNB_E_ARG, err, "-1");
    check_error(bnb_convert(BNB_F32, nullptr, BNB_F16, &f, 1, &err), BNB_E_ARG, err, "NULL");
    CHECK(bnb_convert(BNB_F32, nullptr, BNB_F16, nullptr, 0, nullptr) == BNB_OK);
}

// ---- golden vectors --------------------------------------------------------------------------------------------------

TEST_CASE("formats: golden vector G1, two blocks of 64") {
    Env env;
    Floats x = Lcg(1).normalish(128);
    CHECK(bits(x[0]) == 0xbe3d979c);
    CHECK(bits(x[3]) == 0x3f24bf68);
    x[5] = 0;
    const std::string nf4 = "652cb7589eb357175cd959e2a328adb06aac2623a2c7ce06b40b67d61a876af84687a78d7d2a6d984d57c8866e56c465a9ac715d3edb77bbabed14b7aeaa89fa";
    const std::string fp4 = "eed540e6624ce1a9e526e62d7cd6724b9775d9dd7a5942b94cb4e159a7119731f961791292d6e261c5e9561ee2fe5c9f76759af5c25499447425af40"; // then 72 or 48 72
    for (int32_t compat : {BNB_COMPAT_CUDA, BNB_COMPAT_CPU}) {
        TensorPtr n = quantize(env, x, BNB_NF4, compat), f = quantize(env, x, BNB_FP4, compat);
        CHECK(hex(n->plane(0)) == nf4);
        CHECK(hex(f->plane(0)) == fp4.substr(0, 118) + (compat == BNB_COMPAT_CUDA ? "40" : "48") + "72776637");
        CHECK(words(n->plane(1)) == Words{0x3fabfa31, 0x3fc4a98f});
        CHECK(words(f->plane(1)) == Words{0x3fabfa31, 0x3fc4a98f});
        auto first8 = [&](const Tensor &t, int32_t type) { return halves(Bytes(dequantize(env, t, type))); };
        const std::vector<uint16_t> nf4_f16 = {0xafd4, 0xb3f2, 0xb9a5, 0x38bd, 0x3744, 0x0000, 0xb3f2, 0x2ed8},
                                    nf4_bf16 = {0xbdfb, 0xbe7e, 0xbf35, 0x3f18, 0x3ee8, 0x0000, 0xbe7e, 0x3ddb},
                                    fp4_f16 = {0xb32a, 0xb32a, 0xb960, 0x3960, 0x372a, 0x0000, 0xb32a, 0x332a},
                                    fp4_bf16 = {0xbe65, 0xbe65, 0xbf2c, 0x3f2c, 0x3ee5, 0x0000, 0xbe65, 0x3e65};
        for (size_t i = 0; i < 8; i++) {
            CHECK(first8(*n, BNB_F16)[i] == nf4_f16[i]);
            CHECK(first8(*n, BNB_BF16)[i] == nf4_bf16[i]);
            CHECK(first8(*f, BNB_F16)[i] == fp4_f16[i]);
            CHECK(first8(*f, BNB_BF16)[i] == fp4_bf16[i]);
        }
    }
}

TEST_CASE("formats: golden vectors G2 and G3, an odd count and zeros") {
    Env env;
    Floats x = Lcg(2).normalish(67);
    for (int32_t compat : {BNB_COMPAT_CUDA, BNB_COMPAT_CPU}) {
        for (int32_t type : {BNB_NF4, BNB_FP4}) {
            TensorPtr t = quantize(env, x, type, compat);
            CHECK(hex(t->plane(0)).substr(64) == (type == BNB_NF4 ? "85f7" : "1e30"));
            CHECK(words(t->plane(1)) == Words{0x3fb836b2, 0x3f0d5c86});
        }
        CHECK(quantize(env, Floats(64), BNB_NF4, compat)->plane(0) == Bytes(32, compat == BNB_COMPAT_CUDA ? 0x00 : 0x77));
        CHECK(quantize(env, Floats(64), BNB_FP4, compat)->plane(0) == Bytes(32, 0x00));
        // a short block of zeros: the CPU stores the smallest divisor it allows
        CHECK(words(quantize(env, Floats(3), BNB_NF4, compat)->plane(1)) == Words{compat == BNB_COMPAT_CUDA ? 0u : 0x006ce3eeu});
    }
}

TEST_CASE("formats: golden vector G4, double quantization") {
    Env env;
    Floats x;
    for (uint32_t i = 0; i < 20; i++) {
        Floats block = Lcg(100 + i).normalish(64, static_cast<float>(0.01 * (1 + i % 7)));
        x.insert(x.end(), block.begin(), block.end());
    }
    const Words absmax = {0x3c6a6a55, 0x3cd2c721, 0x3d405257, 0x3d85b17e, 0x3d99b82e, 0x3da7f895, 0x3de2057e, 0x3c983fc6, 0x3cebf50a, 0x3d144788,
                          0x3d8a83dc, 0x3d8b4c87, 0x3d96d952, 0x3dd32b40, 0x3c471173, 0x3caf253e, 0x3d1a552e, 0x3d590690, 0x3d7120cd, 0x3da14d44};
    const Words restored = {0x3c6d12c0, 0x3cd1a2c1, 0x3d40a9d8, 0x3d861be4, 0x3d99a154, 0x3da84568, 0x3de2057e, 0x3c971270, 0x3cebaa00, 0x3d131d28,
                            0x3d8afd40, 0x3d8afd40, 0x3d96606c, 0x3dd29130, 0x3c4607e0, 0x3cb119ae, 0x3d199ef8, 0x3d58bd5a, 0x3d70e35e, 0x3da1c398};
    for (int32_t compat : {BNB_COMPAT_CUDA, BNB_COMPAT_CPU}) {
        TensorPtr plain = quantize(env, x, BNB_NF4, compat), t = quantize(env, x, BNB_NF4, compat, 64, true);
        CHECK(words(plain->plane(1)) == absmax);
        CHECK(t->plane(0) == plain->plane(0)); // codes are made with the exact absmax
        CHECK(hex(t->plane(1)) == "15233ec6d2dbff1a2730c9c9d0f5121e325dbad7");
        CHECK(words(t->plane(2)) == Words{0x3d675ce4});
        CHECK(bits((*t)->quant.nested_offset) == 0x3d5cae18);
        Words map = words(t->plane(3));
        CHECK(map[0] == bits(-0.99296874f));
        CHECK(map[127] == 0);
        CHECK(map[128] == 0x3513a3b7);
        CHECK(map[126] == (0x3513a3b7 | 0x80000000));
        CHECK(map[255] == 0x3f800000);
        CHECK(crc32(t->plane(3)) == 0x1b137aeb); // of the map that bitsandbytes makes on x86
        Floats value = floats(dequantize(env, *t, BNB_F32));
        for (size_t i = 0; i < value.size(); i++) {
            uint8_t byte = t->plane(0)[i / 2];
            float want = bnb_nf4_map[i % 2 ? byte & 15 : byte >> 4] * from_bits(restored[i / 64]);
            if (bits(value[i]) != bits(want)) FAIL("element " << i << " is " << value[i] << ", not " << want);
        }
    }
}

TEST_CASE("formats: golden vector G5, rows of int8") {
    Env env;
    Data w = to_data(Lcg(4).normalish(80, 0.05f), BNB_F16);
    for (int32_t compat : {BNB_COMPAT_CUDA, BNB_COMPAT_CPU}) {
        TensorPtr t = quantize(env, w, BNB_INT8, {5, 16}, compat);
        CHECK(hex(t->plane(0)) == "21813a43b9d8c853f699d5de7a90aa842f2c20367fece01cfd07200eee353823a9b3e0c4ffbe118138fc64bef7faf19b"
                                  "201b282221d87f4a2f0051242ef81c24826bb80b417f45240fc1ce2afd3bf2db");
        CHECK(words(t->plane(1)) == Words{0x3d45a000, 0x3da32000, 0x3d9b4000, 0x3d990000, 0x3d6c2000});
        // the same weights in f32 go through f16
        CHECK(quantize(env, to_data(Lcg(4).normalish(80, 0.05f)), BNB_INT8, {5, 16}, compat)->plane(0) == t->plane(0));
    }
}

TEST_CASE("formats: golden vector G9, special values") {
    Env env;
    Floats base = to_floats(to_data(Lcg(9).normalish(64), BNB_F16));
    auto with = [&](float v) { Floats x = base; x[3] = v; return x; };
    struct Row { Floats x; const char *code[2][2]; uint32_t absmax[2]; }; // [nf4, fp4][cuda, cpu], [cuda, cpu]
    const Row rows[] = {
        {Floats(64), {{"00000000", "77777777"}, {"00000000", "00000000"}}, {0, 0}},
        {Floats(64, 1e-39f), {{"00000000", "88888888"}, {"00000000", "66666666"}}, {0, 0x000ae398}},
        {Floats(64, 1e-38f), {{"00000000", "ffffffff"}, {"00000000", "33333333"}}, {0, 0x006ce3ee}},
        {Floats(64, 2e38f), {{"77777777", "ffffffff"}, {"00000000", "33333333"}}, {0x7f167699, 0x7f167699}},
        {with(NAN), {{"26702c2b", "ffffffff"}, {"de90d5d4", "33333333"}}, {0x3fb92000, 0x7fc00000}},
        {with(INFINITY), {{"77707777", "777f7777"}, {"00000000", "00030000"}}, {0x7f800000, 0x7f800000}},
        {with(-INFINITY), {{"77707777", "777f7777"}, {"00000000", "00030000"}}, {0x7f800000, 0x7f800000}},
    };
    for (const Row &r : rows)
        for (int32_t type : {BNB_NF4, BNB_FP4})
            for (int32_t compat : {BNB_COMPAT_CUDA, BNB_COMPAT_CPU}) {
                TensorPtr t = quantize(env, r.x, type, compat);
                CHECK(hex(t->plane(0).data(), 4) == r.code[type == BNB_FP4][compat]);
                CHECK(words(t->plane(1)) == Words{r.absmax[compat]});
            }
}

TEST_CASE("formats: golden file, many shapes of many numbers") {
    Bytes file = read_bytes(BNB_SOURCE_DIR "/tests/golden/formats.bin");
    REQUIRE(file.size() > 12);
    REQUIRE(std::memcmp(file.data(), "BNBFMT1\0", 8) == 0);
    struct Record {
        uint8_t compat, type, src_type, double_quant;
        uint32_t pattern, blocksize, rows, cols, seed;
        float nested_offset;
        uint32_t crc[4], crc_values[3];
        uint8_t first[3][16];
    };
    static_assert(sizeof(Record) == 104, "as written by make_formats.py");
    uint32_t n;
    std::memcpy(&n, &file[8], 4);
    REQUIRE(n > 1000);
    REQUIRE(file.size() == 12 + n * sizeof(Record));
    Env env(2);
    int failures = 0;
    for (uint32_t i = 0; i < n && failures < 5; i++) {
        Record r;
        std::memcpy(&r, &file[12 + i * sizeof r], sizeof r);
        int64_t elements = static_cast<int64_t>(r.rows) * r.cols;
        Data data = make_input(r.pattern, r.type, r.src_type, static_cast<int32_t>(r.blocksize), r.seed, elements);
        Shape shape = r.type == BNB_INT8 ? Shape{r.rows, r.cols} : Shape{elements};
        TensorPtr t = quantize(env, data, r.type, shape, r.compat, static_cast<int32_t>(r.blocksize), r.double_quant);
        bool fp4 = r.type == BNB_FP4, ok = true;
        std::string shown;
        for (int32_t p = 0; p < 4; p++) {
            bool f32_plane = p == 2 || (p == 1 && !r.double_quant);
            Bytes plane = f32_plane ? canonical_bytes(t->plane(p), false) : t->plane(p);
            if (crc32(plane) == r.crc[p]) continue;
            ok = false;
            plane.resize(16);
            if (p < 3) shown += " plane " + std::to_string(p) + " " + hex(plane) + " not " + hex(r.first[p], 16);
        }
        ok = ok && (bits((*t)->quant.nested_offset) == bits(r.nested_offset) || std::isnan(r.nested_offset));
        for (int32_t type : FLOAT_TYPES) {
            // canonical before the last rounding, as in the generator
            Floats values = floats(dequantize(env, *t, BNB_F32));
            canonical(values, fp4);
            bool same = crc32(to_data(values, type).bytes) == r.crc_values[type];
            Floats direct = to_floats({type, dequantize(env, *t, type)}), rounded = to_floats(to_data(values, type));
            canonical(direct, fp4);
            canonical(rounded, fp4);
            same = same && same_bits(direct, rounded);
            if (!same) shown += std::string(" dequantized to ") + bnb_type_name(type);
            ok = ok && same;
        }
        INFO("record ", i, ": ", r.compat ? "cpu " : "cuda ", bnb_type_name(r.type), " from ", bnb_type_name(r.src_type), ", double ",
             static_cast<int>(r.double_quant), ", pattern ", r.pattern, ", blocksize ", r.blocksize, ", [", r.rows, ", ", r.cols, "], seed ", r.seed, ":", shown);
        if (!ok) failures++;
        CHECK(ok);
    }
}

// ---- one result ------------------------------------------------------------------------------------------------------

TEST_CASE("formats: plain code, fast code and any number of threads give the same bytes") {
    Env plain(1, BNB_CPU_FAST), fast(1), threads(4), plain_threads(3, BNB_CPU_FAST);
    Rng rng(3);
    std::vector<Shape> shapes = {{1, 1}, {1, 31}, {3, 21}, {1, 65}, {2, 4096}, {7, 1111}, {5, 4099}, {1, 70001}, {300, 257}};
    for (int round = 0; round < 70; round++) {
        Shape shape = rng.pick(shapes);
        int32_t type = rng.pick(QUANT_TYPES), src = rng.pick(FLOAT_TYPES), blocksize = rng.pick(BLOCKSIZES);
        int32_t compat = static_cast<int32_t>(rng.range(0, 1));
        bool dq = type != BNB_INT8 && rng.chance(0.5);
        Data data = any_data(rng, src, count(shape));
        INFO(bnb_type_name(type), " from ", bnb_type_name(src), " [", shape[0], ", ", shape[1], "] blocksize ", blocksize, " compat ", compat, " double ", dq);
        TensorPtr want = quantize(plain, data, type, shape, compat, blocksize, dq);
        for (bnb_env *env : {static_cast<bnb_env *>(fast), static_cast<bnb_env *>(threads), static_cast<bnb_env *>(plain_threads)}) {
            TensorPtr got = quantize(env, data, type, shape, compat, blocksize, dq, static_cast<size_t>(rng.range(0, 3)));
            CHECK(got->same(*want));
            for (int32_t to : FLOAT_TYPES) {
                Bytes a = dequantize(env, *got, to), b = dequantize(plain, *want, to);
                if (a == b) continue;
                Floats x = to_floats({to, a}), y = to_floats({to, b}); // but for the sign of a NaN
                canonical(x, false);
                canonical(y, false);
                CHECK(same_bits(x, y));
            }
        }
        // blocks of 4-bit types run over the flattened tensor
        if (type != BNB_INT8) CHECK(quantize(fast, data, type, {count(shape)}, compat, blocksize, dq)->same(*want));
    }
}

TEST_CASE("formats: the caller's rounding mode is neither used nor lost") {
    Env env(2);
    Rng rng(4);
    Data data = any_data(rng, BNB_F32, 5000);
    for (int32_t type : {BNB_NF4, BNB_INT8}) {
        Shape shape = {50, 100};
        bool dq = type == BNB_NF4;
        data = to_data(rng.normals(5000));
        TensorPtr want = quantize(env, data, type, shape, BNB_COMPAT_CPU, 64, dq);
        Floats values = floats(dequantize(env, *want, BNB_F32));
        REQUIRE(std::fesetround(FE_UPWARD) == 0);
        TensorPtr got = quantize(env, data, type, shape, BNB_COMPAT_CPU, 64, dq);
        Floats again = floats(dequantize(env, *got, BNB_F32));
        int mode = std::fegetround();
        std::fesetround(FE_TONEAREST);
        CHECK(mode == FE_UPWARD);
        CHECK(got->same(*want));
        CHECK(same_bits(values, again));
    }
}

TEST_CASE("formats: dequantize converts plain tensors and reads any address") {
    Env env(2);
    Rng rng(5);
    Shape shape = {3, 2001};
    for (int32_t from : FLOAT_TYPES) {
        Data d = any_data(rng, from, count(shape));
        std::fill(d.bytes.end() - 400, d.bytes.end(), 0xff); // NaN, with all bits that one can have
        Tensor src(env, from, shape, nullptr, 1);
        src.fill(0, d.bytes);
        for (int32_t to : FLOAT_TYPES) {
            Floats got = to_floats({to, dequantize(env, src, to)}), want = to_floats({to, to_data(to_floats(d), to).bytes});
            canonical(got, false);
            canonical(want, false);
            CHECK(same_bits(got, want));
        }
    }
    bnb_quant q = quant4(BNB_NF4, 64, true);
    TensorPtr a = quantize(env, to_data(rng.normals(6003)), BNB_NF4, shape, BNB_COMPAT_CUDA, 64, true);
    Tensor b(env, BNB_NF4, shape, &q, 3);
    for (int32_t p = 0; p < 4; p++) b.fill(p, a->plane(p));
    b->quant.nested_offset = (*a)->quant.nested_offset;
    CHECK(dequantize(env, *a, BNB_F32) == dequantize(env, b, BNB_F32));
}

TEST_CASE("formats: rows that start within a byte and within a block") {
    Floats x = Rng(11).normals(5 * 33), one(33 * 33);
    for (size_t i = 0; i < 33; i++) one[34 * i] = 1;
    for (uint32_t disable : {0u, static_cast<uint32_t>(BNB_CPU_FAST)})
        for (int32_t type : QUANT_TYPES) {
            if (type == BNB_INT8) continue; // its products quantize x
            Env env(1, disable);
            bnb_quant q = quant4(type, 32, true);
            Floats w = floats(dequantize(env, *quantize(env, to_data(x), type, {5, 33}, BNB_COMPAT_CUDA, 32, true), BNB_F32));
            Floats y = run_op(env, [&](Net &net) { return bnb_linear(net.ctx, net.input({33, 33}, one), net.weight(type, {5, 33}, x, &q), nullptr); }, BNB_F32);
            REQUIRE(y.size() == w.size());
            for (size_t n = 0; n < 5; n++)
                for (size_t k = 0; k < 33; k++) CHECK(y[5 * k + n] == w[33 * n + k]);
        }
}

// ---- properties ------------------------------------------------------------------------------------------------------

TEST_CASE("formats: quantizing what was dequantized gives the same codes") {
    Env env(2);
    Rng rng(6);
    for (int round = 0; round < 60; round++) {
        int32_t type = rng.pick(QUANT_TYPES), blocksize = rng.pick(BLOCKSIZES), compat = static_cast<int32_t>(rng.range(0, 1));
        Shape shape = {rng.range(1, 40), rng.range(1, 400)};
        TensorPtr a = quantize(env, to_data(rng.normals(count(shape), 0.1)), type, shape, compat, blocksize);
        // int8 weights are f16 numbers: values that are not would move SCB
        TensorPtr b = quantize(env, {BNB_F32, dequantize(env, *a, BNB_F32)}, type, shape, compat, blocksize);
        Bytes x = a->plane(0), y = b->plane(0);
        if (type == BNB_FP4) // the two zeros are one number
            for (Bytes *v : {&x, &y})
                for (uint8_t &c : *v) c = static_cast<uint8_t>((c >> 4 == 8 ? 0 : c & 0xf0) | ((c & 15) == 8 ? 0 : c & 15));
        INFO(bnb_type_name(type), " [", shape[0], ", ", shape[1], "] blocksize ", blocksize, " compat ", compat);
        CHECK(x == y);
        if (type != BNB_INT8) CHECK(a->plane(1) == b->plane(1)); // +-1 is a code of both, so the maximum comes back
    }
}

TEST_CASE("formats: every element is within half a step of its code") {
    Env env(2);
    Rng rng(7);
    for (int32_t type : {BNB_NF4, BNB_FP4})
        for (int32_t compat : {BNB_COMPAT_CUDA, BNB_COMPAT_CPU}) {
            Floats x = rng.normals(10007);
            TensorPtr t = quantize(env, x, type, compat, 128);
            Doubles v = decode(*t);
            Floats absmax = floats(t->plane(1));
            const float *map = type == BNB_NF4 ? bnb_nf4_map : bnb_fp4_map;
            double worst = 0;
            for (size_t i = 0; i < x.size(); i++) {
                double best = INFINITY, m = static_cast<double>(absmax[i / 128]), at = static_cast<double>(x[i]);
                for (int k = 0; k < 16; k++) best = std::min(best, std::fabs(static_cast<double>(map[k]) * m - at));
                worst = std::max(worst, (std::fabs(v[i] - at) - best) / m);
            }
            CHECK(worst < 2e-6); // FP4's decisions on the GPU are some ulps off the middle
        }
    Floats x = rng.normals(60 * 500);
    TensorPtr t = quantize(env, to_data(x, BNB_F16), BNB_INT8, {60, 500});
    Floats scb = floats(t->plane(1)), h = to_floats(to_data(x, BNB_F16));
    Doubles v = decode(*t);
    for (size_t r = 0; r < 60; r++) {
        float top = 0;
        for (size_t k = 0; k < 500; k++) {
            top = std::max(top, std::fabs(h[r * 500 + k]));
            if (std::fabs(v[r * 500 + k] - static_cast<double>(h[r * 500 + k])) > static_cast<double>(scb[r]) * (0.5 / 127 + 1e-6)) FAIL("row " << r << " column " << k);
        }
        CHECK(scb[r] == top);
    }
}

TEST_CASE("formats: errors are those that bitsandbytes' own tests ask for") {
    Env env(2);
    const double nf4[8] = {.067746, .072798, .076831, .080337, .083547, .086610, .089592, .092547};
    const double fp4[8] = {.088925, .096543, .102969, .108684, .114115, .119333, .124556, .129536};
    Rng rng(8);
    Floats x = rng.normals(512 * 1024);
    Data data = to_data(x);
    for (int32_t type : {BNB_NF4, BNB_FP4})
        for (size_t b = 0; b < 8; b++)
            for (bool dq : {false, true}) {
                if (dq && b != 1) continue;
                TensorPtr t = quantize(env, data, type, {512, 1024}, BNB_COMPAT_CUDA, BLOCKSIZES[b], dq);
                Floats v = floats(dequantize(env, *t, BNB_F32));
                double sum = 0;
                for (size_t i = 0; i < x.size(); i++) sum += static_cast<double>(std::fabs(v[i] - x[i]));
                double error = sum / static_cast<double>(x.size()), level = (type == BNB_NF4 ? nf4 : fp4)[b];
                INFO(bnb_type_name(type), " blocksize ", BLOCKSIZES[b], " double ", dq, ": ", error, " not ", level);
                CHECK(std::fabs(error - level) < 0.01 * level);
            }
}

TEST_CASE("formats: nested codes are the nearest of the map, less the mean") {
    Env env(2);
    Rng rng(9);
    Floats x = rng.normals(64 * 700 + 10);
    for (size_t i = 0; i < x.size(); i++) x[i] *= static_cast<float>(1 + i / 64 % 11); // scales that differ
    for (int32_t compat : {BNB_COMPAT_CUDA, BNB_COMPAT_CPU}) {
        TensorPtr plain = quantize(env, x, BNB_NF4, compat), t = quantize(env, x, BNB_NF4, compat, 64, true);
        Floats absmax = floats(plain->plane(1)), nested = floats(t->plane(2)), map = floats(t->plane(3));
        Bytes codes = t->plane(1);
        double mean = 0;
        for (float m : absmax) mean += static_cast<double>(m);
        CHECK((*t)->quant.nested_offset == static_cast<float>(mean / static_cast<double>(absmax.size())));
        CHECK(std::is_sorted(map.begin(), map.end()));
        REQUIRE(nested.size() == 3);
        for (size_t i = 0; i < absmax.size(); i++) {
            float d = absmax[i] - (*t)->quant.nested_offset, m = nested[i / 256];
            double best = INFINITY, off = std::fabs(static_cast<double>(map[codes[i]]) * static_cast<double>(m) - static_cast<double>(d));
            for (float v : map) best = std::min(best, std::fabs(static_cast<double>(v) * static_cast<double>(m) - static_cast<double>(d)));
            // the CPU's table has steps of 1 / 32767.5
            if (off > best + static_cast<double>(m) * (compat == BNB_COMPAT_CUDA ? 2e-7 : 3.2e-5)) FAIL("block " << i << ": code " << static_cast<int>(codes[i]));
            CHECK(std::fabs(d) <= m);
        }
    }
}

// Blocks of 32 whose absmax, less their mean of 1, is d and -d for every d given (multiples of 2^-23 up to 1); every 256
// blocks have one of 1 and one of -1, so that they are quantized as they are. -> the codes of d and of -d in turn
std::vector<int> nested_codes(bnb_env *env, const Floats &d, int32_t compat) {
    Floats all;
    for (float v : d) {
        if (all.size() % 256 == 0) all.insert(all.end(), {1.0f, -1.0f});
        all.insert(all.end(), {v, -v});
    }
    Floats x;
    for (float v : all) x.insert(x.end(), 32, 1 + v);
    TensorPtr t = quantize(env, x, BNB_NF4, compat, 32, true);
    CHECK((*t)->quant.nested_offset == 1);
    for (float m : floats(t->plane(2))) CHECK(m == 1);
    std::vector<int> codes;
    Bytes plane = t->plane(1);
    for (size_t i = 0; i < all.size(); i++)
        if (i % 256 > 1) codes.push_back(plane[i]);
    return codes;
}

TEST_CASE("formats: nested codes at their decisions") {
    Env env(2);
    Floats map = floats(quantize(env, Floats(1), BNB_NF4, BNB_COMPAT_CUDA, 64, true)->plane(3)), bounds, ties;
    for (size_t i = 0; i < 255; i++) bounds.push_back((map[i] + map[i + 1]) * 0.5f);
    for (float b : bounds)
        if (b > 0 && std::fmod(b, 0x1p-23f) == 0) ties.push_back(b);
    REQUIRE(ties.size() > 20);
    std::vector<int> codes = nested_codes(env, ties, BNB_COMPAT_CUDA);
    for (size_t i = 0; i < codes.size(); i++) {
        int below = static_cast<int>(std::lower_bound(bounds.begin(), bounds.end(), i % 2 ? -ties[i / 2] : ties[i / 2]) - bounds.begin());
        CHECK(codes[i] == below + below % 2); // of the two neighbours the even one
    }
    // The CPU's rule, written down again. Its decisions lie between two steps of a table, not on the midpoints.
    auto cpu_code = [&](float x) {
        float half = (x + 1) * 0.5f, y = static_cast<float>(static_cast<double>(half) * 65535 + 0.5);
        float step = static_cast<float>(2 * static_cast<int32_t>(y)) / 65535, v = step - 1;
        return static_cast<int>(std::lower_bound(bounds.begin(), bounds.end(), v) - bounds.begin());
    };
    Floats near;
    for (int32_t side : {1, -1})
        for (int32_t at = 1, code = cpu_code(0); at <= 1 << 23; at++) { // too many for a bisection to be worth it
            int now = cpu_code(static_cast<float>(side * at) * 0x1p-23f);
            if (now != code)
                for (int32_t k = std::max(at - 2, 1); k <= std::min(at + 1, 1 << 23); k++) near.push_back(static_cast<float>(k) * 0x1p-23f);
            code = now;
        }
    codes = nested_codes(env, near, BNB_COMPAT_CPU);
    int64_t wrong = 0;
    for (size_t i = 0; i < codes.size(); i++) wrong += codes[i] != cpu_code(i % 2 ? -near[i / 2] : near[i / 2]);
    CHECK(codes.size() > 1000);
    CHECK(wrong == 0);
}

TEST_CASE("formats: FP4 at its decisions on the GPU") {
    const struct { uint32_t above; int code; } rows[] = {{0x3B2AAAB9, 1}, {0x3DB00000, 6}, {0x3E555555, 7}, {0x3E955555, 4},
                                                         {0x3ED55556, 5}, {0x3F155550, 2}, {0x3F555555, 3}};
    for (uint32_t disable : {0u, static_cast<uint32_t>(BNB_CPU_FAST)}) {
        Env env(1, disable);
        Floats x = {1, -1, 0.0f, -0.0f, 1e-30f, -1e-30f, 1e-40f, -1e-40f};
        std::vector<int> want = {3, 11, 0, 0, 0, 8, 0, 0};
        int before = 0;
        for (auto &r : rows) {
            for (uint32_t step : {0u, 1u, 2u}) {
                float v = from_bits(r.above - 1 + step);
                x.insert(x.end(), {v, -v});
                want.insert(want.end(), {step == 2 ? r.code : before, (step == 2 ? r.code : before) + 8});
            }
            before = r.code;
        }
        x.resize(64, 0.0f);
        want.resize(64, 0);
        Bytes codes = quantize(env, x, BNB_FP4)->plane(0);
        for (size_t i = 0; i < 64; i++) {
            INFO(x[i]);
            CHECK((i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4) == want[i]);
        }
    }
}

TEST_CASE("formats: rows of int8 round ties to even") {
    for (uint32_t disable : {0u, static_cast<uint32_t>(BNB_CPU_FAST)}) {
        Env env(1, disable);
        int found = 0;
        for (uint32_t m = 0; m < 1024; m++) {
            float scb = static_cast<float>(f16_value(static_cast<uint16_t>(0x3c00 + m))), inverse = 1 / scb, scale = inverse * 127;
            Floats row(64, 0.0f);
            row[0] = scb;
            size_t n = 1;
            for (uint32_t h = 0x2000; h < 0x3c00u + m && n < 64; h++) {
                float v = static_cast<float>(f16_value(static_cast<uint16_t>(h))), x = v * scale;
                if (x - std::floor(x) == 0.5f && static_cast<int>(x) % 2 == 0) row[n++] = v;
            }
            if (n == 1) continue;
            found++;
            Bytes codes = quantize(env, to_data(row), BNB_INT8, {1, 64}, BNB_COMPAT_CPU)->plane(0);
            for (size_t i = 1; i < n; i++) CHECK(codes[i] == static_cast<int>(std::floor(row[i] * scale)));
        }
        CHECK(found == 6);
    }
}

// ---- edges and errors ------------------------------------------------------------------------------------------------

TEST_CASE("formats: tensors without elements") {
    Env env(2);
    for (int32_t type : QUANT_TYPES)
        for (const Shape &shape : {Shape{0, 5}, Shape{4, 0}, Shape{0, 0}})
            for (bool dq : {false, true}) {
                TensorPtr t = quantize(env, Data{BNB_F16, Bytes()}, type, shape, BNB_COMPAT_CUDA, 64, dq && type != BNB_INT8);
                if (type == BNB_INT8) CHECK(t->plane(1) == Bytes(static_cast<size_t>(shape[0]) * 4));
                CHECK((*t)->quant.nested_offset == 0);
                CHECK(dequantize(env, *t, BNB_F32).empty());
                CHECK(bnb_tensor_check_finite(env, *t, nullptr) == BNB_OK);
            }
    CHECK(quantize(env, Floats(), BNB_NF4)->plane(0).empty());
}

TEST_CASE("formats: wrong arguments are named") {
    Env env(2);
    bnb_error err = {};
    const bnb_quant nf4 = bnb_quant_default(BNB_NF4), int8 = bnb_quant_default(BNB_INT8);
    Tensor f(env, BNB_F32, {4, 32}, nullptr, 0, "floats"), q(env, BNB_NF4, {4, 32}, &nf4, 0, "codes"), i(env, BNB_I32, {4, 32}, nullptr, 0, "ids"),
        other(env, BNB_F16, {4, 33}, nullptr, 0, "wider"), rows(env, BNB_INT8, {4, 32}, &int8, 0, "rows");
    f.fill(0, Bytes(512));
    q.fill(0, Bytes(64));
    q.fill(1, Bytes(8));
    check_error(bnb_quantize(env, i, q, 0, &err), BNB_E_TYPE, err, "ids");
    check_error(bnb_quantize(env, q, q, 0, &err), BNB_E_TYPE, err, "codes");
    check_error(bnb_quantize(env, f, f, 0, &err), BNB_E_TYPE, err, "floats");
    check_error(bnb_quantize(env, other, q, 0, &err), BNB_E_SHAPE, err, "wider");
    check_error(bnb_quantize(env, f, q, 2, &err), BNB_E_ARG, err, "codes");
    check_error(bnb_quantize(env, f, q, -1, &err), BNB_E_ARG, err, "compat");
    check_error(bnb_quantize(nullptr, f, q, 0, &err), BNB_E_ARG, err, "NULL");
    check_error(bnb_quantize(env, nullptr, q, 0, &err), BNB_E_ARG, err, "NULL");
    check_error(bnb_quantize(env, f, nullptr, 0, &err), BNB_E_ARG, err, "NULL");
    check_error(bnb_dequantize(env, i, f, &err), BNB_E_TYPE, err, "ids");
    check_error(bnb_dequantize(env, q, i, &err), BNB_E_TYPE, err, "ids");
    check_error(bnb_dequantize(env, q, rows, &err), BNB_E_TYPE, err, "rows");
    check_error(bnb_dequantize(env, q, other, &err), BNB_E_SHAPE, err, "codes");
    check_error(bnb_dequantize(nullptr, q, f, &err), BNB_E_ARG, err, "NULL");
    check_error(bnb_tensor_check_finite(env, nullptr, &err), BNB_E_ARG, err, "NULL");
    CHECK(bnb_quantize(env, i, q, 0, nullptr) == BNB_E_TYPE); // err may be NULL

    Ctx ctx(bnb_ctx_create(env, nullptr));
    const int64_t shape[2] = {4, 32};
    bnb_tensor *meta = bnb_tensor_new(ctx.get(), BNB_NF4, &nf4, 2, shape, "nowhere");
    REQUIRE(meta);
    check_error(bnb_quantize(env, f, meta, 0, &err), BNB_E_ARG, err, "nowhere");
    check_error(bnb_dequantize(env, meta, f, &err), BNB_E_ARG, err, "nowhere");
    check_error(bnb_tensor_check_finite(env, meta, &err), BNB_E_ARG, err, "nowhere");

    int64_t stride = f->stride[0];
    f->stride[0] *= 2;
    check_error(bnb_quantize(env, f, q, 0, &err), BNB_E_SHAPE, err, "floats");
    check_error(bnb_dequantize(env, q, f, &err), BNB_E_SHAPE, err, "floats");
    f->stride[0] = stride;

    // descriptions that a file could hold
    for (int32_t blocksize : {0, -1, 16, 63, 8192}) {
        q->quant.blocksize = blocksize;
        check_error(bnb_quantize(env, f, q, 0, &err), BNB_E_ARG, err, "codes");
        check_error(bnb_dequantize(env, q, f, &err), BNB_E_ARG, err, "codes");
    }
    q->quant = nf4;
    q->quant.double_quant = 1;
    q->plane[3] = nullptr;
    check_error(bnb_dequantize(env, q, f, &err), BNB_E_ARG, err, "codes");
    q->quant.nested_blocksize = 128;
    check_error(bnb_dequantize(env, q, f, &err), BNB_E_ARG, err, "codes");
    q->quant = nf4;
    CHECK(bnb_quantize(env, f, q, 0, &err) == BNB_OK);
}

TEST_CASE("formats: quantize without memory fails and leaves nothing behind") {
    Env env(2);
    bnb_error err = {};
    bnb_quant q = quant4(BNB_NF4, 64, true);
    Tensor src(env, BNB_F32, {1000}), dst(env, BNB_NF4, {1000}, &q);
    src.fill(0, Bytes(4000));
    uint64_t before = bnb_env_bytes(env);
    env.memory.fail(1, true);
    check_error(bnb_quantize(env, src, dst, 0, &err), BNB_E_NOMEM, err, "memory");
    env.memory.fail(0);
    CHECK(bnb_env_bytes(env) == before);
    CHECK(bnb_quantize(env, src, dst, 0, &err) == BNB_OK);
    CHECK(bnb_env_bytes(env) == before);
}

TEST_CASE("formats: NaN and infinity are found and named") {
    Rng rng(10);
    for (uint32_t disable : {0u, static_cast<uint32_t>(BNB_CPU_FAST)}) {
        Env env(3, disable);
        bnb_error err = {};
        Floats x = rng.normals(200000);
        x[7] = 3e38f; // large is not infinite
        x[8] = 1e-45f;
        for (int32_t type : FLOAT_TYPES) {
            Floats y = x;
            if (type == BNB_F16) y[7] = 65504;
            Tensor t(env, type, {200, 1000}, nullptr, 0, "weights");
            t.fill(0, to_data(y, type).bytes);
            CHECK(bnb_tensor_check_finite(env, t, &err) == BNB_OK);
            y[199999] = NAN;
            t.fill(0, to_data(y, type).bytes);
            check_error(bnb_tensor_check_finite(env, t, &err), BNB_E_NUMERIC, err, "'weights': element 199999 is NaN");
            y[131071] = -INFINITY;
            t.fill(0, to_data(y, type).bytes);
            check_error(bnb_tensor_check_finite(env, t, &err), BNB_E_NUMERIC, err, "'weights': element 131071 is inf");
        }
        x[64 * 1000] = INFINITY;
        TensorPtr t = quantize(env, x, BNB_NF4);
        check_error(bnb_tensor_check_finite(env, *t, &err), BNB_E_NUMERIC, err, "absmax of block 1000 is inf");
        t = quantize(env, to_data(x), BNB_INT8, {200, 1000});
        check_error(bnb_tensor_check_finite(env, *t, &err), BNB_E_NUMERIC, err, "SCB of row 0 is inf"); // 3e38 in f16
        x[64 * 1000] = x[7] = 0;
        t = quantize(env, x, BNB_FP4, BNB_COMPAT_CUDA, 64, true);
        CHECK(bnb_tensor_check_finite(env, *t, &err) == BNB_OK);
        (*t)->quant.nested_offset = NAN;
        check_error(bnb_tensor_check_finite(env, *t, &err), BNB_E_NUMERIC, err, "absmax of block 0 is NaN");
        Tensor ids(env, BNB_I32, {3});
        CHECK(bnb_tensor_check_finite(env, ids, &err) == BNB_OK);
    }
}

TEST_SUITE_END();
