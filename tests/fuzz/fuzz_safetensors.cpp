// fuzz_safetensors.cpp: any bytes as a safetensors file, whose quantized weights are put together and every plane read.
//
// Fuzz:    make fuzz; ./build/fuzz/fuzz_safetensors corpus/ tests/attacks/safetensors/
// Replay:  tests/test_fuzz.cpp, in every run of the tests
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../../models/quant_state.h"
#include "../../models/safetensors.h"
#include "check.h"

namespace fuzz {

inline void read_tensor(bnb_env *env, const bnb::SourceTensor &t) {
    if (!t.tensor) return touch(t.data, t.bytes);
    for (int32_t p = 0; p < BNB_MAX_PLANES; p++) {
        const uint64_t n = bnb_plane_bytes(t.type, &t.tensor->quant, t.tensor->n_dims, t.tensor->shape, p);
        require(n != UINT64_MAX && (n == 0 || bnb_tensor_plane(t.tensor, p)), "a quantized weight without a plane");
        touch(bnb_tensor_plane(t.tensor, p), n);
    }
    std::vector<float> values(size_t(bnb_tensor_elements(t.tensor)));
    bnb_error err = {};
    bnb_ctx *ctx = bnb_ctx_create(env, &err);
    bnb_tensor *out = bnb_tensor_new(ctx, BNB_F32, nullptr, t.tensor->n_dims, t.tensor->shape, "out");
    void *planes[BNB_MAX_PLANES] = {values.data()};
    if (!values.empty() && bnb_tensor_bind(out, planes, &err) == BNB_OK)
        require(bnb_dequantize(env, t.tensor, out, &err) == BNB_OK, "a quantized weight that cannot be dequantized");
    bnb_ctx_free(ctx);
}

} // namespace fuzz

// 1: it is a safetensors file, 2: its quantized weights are whole as well. Aborts where the reader broke a promise.
int fuzz_safetensors(const uint8_t *data, size_t size) {
    using fuzz::require;
    const std::unique_ptr<uint8_t[]> copy(new uint8_t[size]); // of exactly this length: reads behind the end are seen
    if (size) std::memcpy(copy.get(), data, size);
    std::vector<bnb::SourceTensor> tensors;
    bnb_error err = {};
    if (!bnb::safetensors_parse(copy.get(), size, "fuzz.safetensors", &tensors, &err))
        return fuzz::require_sentence(err), 0;
    const uint8_t *end = copy.get() + size;
    for (const bnb::SourceTensor &t : tensors) {
        const uint8_t *p = static_cast<const uint8_t *>(t.data);
        require(p >= copy.get() && p <= end && t.bytes <= uint64_t(end - p), "a tensor does not lie in its file");
    }
    bnb_env_params params;
    bnb_env_params_default(&params, sizeof params);
    params.n_threads = 1;
    bnb_env *env = bnb_env_create(&params, &err);
    if (!env) return 0;
    int result = 1;
    {
        bnb::QuantizedWeights quantized;
        if (quantized.fold(env, "fuzz", &tensors, &err)) {
            for (const bnb::SourceTensor &t : tensors) fuzz::read_tensor(env, t);
            result = 2;
        } else {
            fuzz::require_sentence(err);
        }
    }
    require(bnb_env_bytes(env) == 0, "memory was not given back");
    bnb_env_free(env);
    return result;
}

#ifdef BNB_FUZZ
extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_safetensors(data, size);
    return 0;
}
#endif
