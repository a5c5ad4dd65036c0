// hf_config.h: the configuration of a Hugging Face checkpoint: config.json and generation_config.json, or, where there
// is no config.json, what the tensors' names and shapes say.
//
// Not: no tokenizer files, and nothing in config.json that would run code (auto_map).
#pragma once

#include <string>
#include <vector>

#include "arch.h"
#include "safetensors.h"

namespace bnb {

struct HfConfig {
    Config config;
    const Arch *arch = nullptr;
    bool tied_known = true; // false: nothing but the head itself can say whether it is tied
    bool quantized = false; // config.json says that bitsandbytes quantized the weights
    int32_t dtype = -1;     // type of what is not quantized, if config.json says it; -1: it does not
    double threshold = -1;  // llm_int8_threshold; negative: not given
};

// checkpoint: whose tensors they are; its directory is where the files are looked for. Warnings go to env's log.
bool hf_config_read(bnb_env *env, const Checkpoint &checkpoint, HfConfig *out, bnb_error *err);

// The same of JSON in memory; NULL: there is no such file. dir: for messages.
bool hf_config_from_json(bnb_env *env, const std::string &dir, const nlohmann::json *config,
                         const nlohmann::json *generation, const std::vector<SourceTensor> &tensors, HfConfig *out,
                         bnb_error *err);

// A tensor's name as our files have it: without the prefix of the architecture.
std::string canonical_name(const Arch &arch, const std::string &name);

} // namespace bnb
