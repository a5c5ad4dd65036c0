// tokenizer_json.h: tokenizers of Hugging Face directories. Needs nlohmann/json (Debian: nlohmann-json3-dev), which
// only tokenizer_json.cpp includes; a program that runs .bnb files does without both.
#ifndef BNB_MODELS_TOKENIZER_JSON_H
#define BNB_MODELS_TOKENIZER_JSON_H

#include <string>

#include "tokenizer.h"

namespace bnb {

// Reads tokenizer.json, else vocab.json + merges.txt (or encoder.json + vocab.bpe; vocab.bpe alone gives GPT-2's ids),
// then tokenizer_config.json, special_tokens_map.json and added_tokens.json where they exist. What cannot be honoured
// is refused by name. false: err says which file is wrong and how; data is untouched.
bool tokenizer_from_dir(const std::string &dir, TokenizerData *data, bnb_error *err);

// The text of a tokenizer.json that means the same to the Hugging Face libraries.
std::string tokenizer_to_json(const TokenizerData &data);

} // namespace bnb

#endif
