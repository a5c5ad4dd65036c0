// fuzz_config.cpp: any text as the config.json and the generation_config.json of a Hugging Face directory, and the list
// of tensors that such a network has.
//
// Fuzz:    make fuzz; ./build/fuzz/fuzz_config corpus/ tests/attacks/config/
// Replay:  tests/test_fuzz.cpp, in every run of the tests
//
// The input is a u16 length, the config.json of that many bytes, and the generation_config.json ("": there is none).
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "../../models/hf_config.h"
#include "check.h"

// 1: both are JSON, 2: and configure a network. Aborts where a promise was broken.
int fuzz_config(const uint8_t *data, size_t size) {
    using fuzz::require, fuzz::require_sentence;
    const size_t n = size >= 2 ? data[0] | data[1] << 8 : 0;
    if (size < 2 || n > size - 2) return 0;
    const std::vector<uint8_t> text(data + 2, data + 2 + n), more(data + 2 + n, data + size);
    nlohmann::json config, generation;
    bnb_error err = {};
    if (!bnb::json_parse(text.data(), text.size(), "config.json", &config, &err) ||
        (!more.empty() && !bnb::json_parse(more.data(), more.size(), "generation_config.json", &generation, &err)))
        return require_sentence(err), 0;
    std::vector<bnb::SourceTensor> tensors(1); // what a minGPT's trainer does not say is taken from these
    tensors[0].name = "transformer.h.0.attn.c_attn.weight";
    bnb::HfConfig hf;
    const std::unique_ptr<bnb_env, void (*)(bnb_env *)> env(bnb_env_create(nullptr, &err), bnb_env_free); // for its log
    if (!env ||
        !bnb::hf_config_from_json(env.get(), "fuzz", &config, more.empty() ? nullptr : &generation, tensors, &hf, &err))
        return require_sentence(err), 1;
    const bnb::Config &c = hf.config;
    require(hf.arch && c.n_embd > 0 && c.n_head > 0 && c.n_embd % c.n_head == 0 && c.n_layer > 0,
            "a network of no size");
    if (c.n_layer <= 64)
        for (const bnb::TensorInfo &t : hf.arch->tensors(c))
            require(bnb_plane_bytes(BNB_F32, nullptr, int32_t(t.shape.size()), t.shape.data(), 0) != UINT64_MAX,
                    "a tensor that cannot be");
    return 2;
}

#ifdef BNB_FUZZ
extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_config(data, size);
    return 0;
}
#endif
