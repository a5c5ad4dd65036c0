// fuzz_bnb.cpp: any bytes as a .bnb file: opened, read in every way there is, verified.
//
// Fuzz:    clang -g -O1 -fsanitize=fuzzer-no-link,address,undefined -DBNB_FUZZ -c bnb.c
//          clang++ -std=c++17 -g -O1 -fsanitize=fuzzer,address,undefined -DBNB_FUZZ tests/fuzz/fuzz_bnb.cpp bnb.o -lm -pthread -o fuzz_bnb
//          ./fuzz_bnb -max_len=8192 corpus/ tests/attacks/bnb/
// Replay:  c++ -std=c++17 -DBNB_FUZZ_REPLAY tests/fuzz/fuzz_bnb.cpp bnb.o -lm -pthread -o replay && ./replay tests/attacks/bnb
//          tests/test_fuzz.cpp does the same in every run of the tests.
//
// BNB_FUZZ lets bnb.c skip the hash of the metadata; without it the hash is put right here, so that both test what lies behind.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../bnb.h"

namespace {

volatile uint64_t sink; // what was read, so that reading is not optimized away

void touch(const void *p, uint64_t n) { sink = sink + (p && n ? bnb_hash64(p, n, 0) : 0); }

void require(bool ok, const char *what) {
    if (ok) return;
    std::fprintf(stderr, "fuzz_bnb: %s\n", what);
    std::abort();
}

void read_everything(bnb_env *env, bnb_file *f, const uint8_t *data, uint64_t size) {
    bnb_error err = {};
    for (int32_t i = 0; i < bnb_file_key_count(f); i++) {
        const char *name = nullptr;
        const bnb_file_key *k = bnb_file_key_at(f, i, &name);
        touch(name, k->name_bytes);
        std::vector<char> key(name, name + k->name_bytes);
        key.push_back(0);
        int64_t number;
        double real;
        uint64_t n;
        bnb_file_i64(f, key.data(), &number);
        bnb_file_f64(f, key.data(), &real);
        const char *text = bnb_file_str(f, key.data(), &n);
        touch(text, n);
        const int64_t *list = bnb_file_i64_array(f, key.data(), &n);
        touch(list, n * 8);
    }
    for (const char *tag : {"KEYS", "TYPE", "TENS", "STRS", "tokn", "none"}) {
        uint64_t n;
        const void *p = bnb_file_chunk(f, tag, &n);
        touch(p, n);
    }
    for (int32_t i = 0; i < bnb_file_tensor_count(f); i++) {
        bnb_tensor *t = bnb_file_tensor(f, i);
        require(t && bnb_tensor_state(t) == BNB_RESIDENT, "a tensor of an open file has no memory");
        require(bnb_file_find(f, bnb_tensor_name(t)) == t, "a tensor of an open file is not found by its name");
        for (int32_t p = 0; p < BNB_MAX_PLANES; p++) {
            uint64_t n = bnb_plane_bytes(bnb_tensor_type(t), bnb_tensor_quant(t), bnb_tensor_n_dims(t), bnb_tensor_shape(t), p);
            const uint8_t *plane = static_cast<const uint8_t *>(bnb_tensor_plane(t, p));
            if (!n) continue;
            require(n <= size && plane >= data && static_cast<uint64_t>(plane - data) <= size - n, "a plane does not lie in its file");
            touch(plane, n);
        }
        bnb_tensor_check_finite(env, t, &err);
        int32_t type = bnb_tensor_type(t);
        if (type != BNB_F32 && type != BNB_F16 && type != BNB_BF16 && !bnb_type_is_quantized(type)) continue;
        // bounded by the file's bytes: a plane of n bytes holds at most 2n elements
        std::vector<float> out(static_cast<size_t>(bnb_tensor_elements(t)) + 1);
        bnb_ctx *ctx = bnb_ctx_create(env, &err);
        bnb_tensor *dst = bnb_tensor_new(ctx, BNB_F32, nullptr, bnb_tensor_n_dims(t), bnb_tensor_shape(t), "out");
        void *planes[BNB_MAX_PLANES] = {out.data(), nullptr, nullptr, nullptr};
        if (dst && bnb_tensor_bind(dst, planes, &err) == BNB_OK) bnb_dequantize(env, t, dst, &err);
        bnb_ctx_free(ctx);
    }
    bnb_file_tensor(f, -1);
    bnb_file_find(f, "");
}

} // namespace

// 1: it opened, 2: its data is whole as well. Aborts where the reader broke a promise.
int fuzz_bnb(const uint8_t *data, size_t size) {
    std::vector<uint64_t> aligned(size / 8 + 1); // on the heap: reads behind the end are seen
    uint8_t *bytes = reinterpret_cast<uint8_t *>(aligned.data()) + (aligned.size() * 8 - size) / 8 * 8;
    if (size) std::memcpy(bytes, data, size);
#ifndef BNB_FUZZ
    if (size >= sizeof(bnb_file_header)) {
        bnb_file_header *h = reinterpret_cast<bnb_file_header *>(bytes);
        if (h->metadata_bytes <= size - sizeof *h) h->hash = bnb_hash64(bytes + sizeof *h, h->metadata_bytes, bnb_hash64(bytes, 56, 0));
    }
#endif
    bnb_error err = {};
    bnb_env_params p;
    bnb_env_params_default(&p, sizeof p);
    p.n_threads = 1;
    bnb_env *env = bnb_env_create(&p, &err);
    if (!env) return 0;
    bnb_file *f = bnb_file_from_memory(env, bytes, size, "fuzz.bnb", &err);
    int result = f ? 1 : 0;
    if (f) {
        read_everything(env, f, bytes, size);
        if (bnb_file_verify(f, &err) == BNB_OK) result = 2;
    }
    if (result != 2) require(err.code < 0 && !std::strchr(err.msg, '\n') && !std::strncmp(err.msg, "fuzz.bnb: ", 10), "an error that does not name the file");
    bnb_file_free(f);
    require(bnb_env_bytes(env) == 0, "memory was not given back");
    bnb_env_free(env);
    return result;
}

#ifdef BNB_FUZZ_REPLAY
#include "replay.h"
int main(int argc, char **argv) { return replay(argc, argv, fuzz_bnb); }
#elif defined(BNB_FUZZ)
extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_bnb(data, size);
    return 0;
}
#endif
