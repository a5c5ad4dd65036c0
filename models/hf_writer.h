// hf_writer.h: writes a Hugging Face directory that transformers and bitsandbytes load: safetensors (in shards, with an
// index, where they are large), config.json, generation_config.json and the tokenizer's files.
//
// Not: no pickles, no keys of config.json that inference does not need, no model cards.
#pragma once

#include "checkpoint_writer.h"

namespace bnb {

// path: a directory that is not there, or is empty. It is made beside itself and renamed by finish(). contents
// outlives it.
std::unique_ptr<CheckpointWriter> hf_writer_create(const std::string &path, const CheckpointContents &contents,
                                                   uint64_t shard_bytes, bnb_error *err);

} // namespace bnb
