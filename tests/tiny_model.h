// tiny_model.h: a GPT-2 of two layers with random weights and a vocabulary of bytes, as the bytes of a .bnb file: enough to
// go through everything that a model does, in a millisecond.
//
// Use:   Image file = tiny_model(BNB_NF4);   // file.bytes
// Not:   no sensible text.
#pragma once

#include "bnb_image.h"

#include "../models/model.h"
#include "../models/tokenizer.h"

namespace test {

// All bytes, a few merges and one special token, which begins every text.
inline bnb::TokenizerData tiny_vocabulary() {
    bnb::TokenizerData d;
    for (int b = 0; b < 256; b++) d.tokens.push_back(std::string(1, static_cast<char>(b)));
    auto merge = [&](int32_t left, int32_t right) {
        int32_t id = static_cast<int32_t>(d.tokens.size());
        d.tokens.push_back(d.tokens[static_cast<size_t>(left)] + d.tokens[static_cast<size_t>(right)]);
        d.merges.push_back({left, right, id});
        return id;
    };
    int32_t he = merge('h', 'e'), ll = merge('l', 'l');
    merge(merge(he, ll), 'o');
    d.flags.assign(d.tokens.size(), 0);
    d.tokens.push_back("<|end|>");
    d.flags.push_back(bnb::TOKEN_ADDED | bnb::TOKEN_SPECIAL);
    d.eos = d.bos = static_cast<int32_t>(d.tokens.size()) - 1;
    d.add_bos = true;
    return d;
}

inline Image tiny_model(int32_t type, bool with_tokenizer = true) {
    const int64_t C = 32, layers = 2, ctx = 24, F = 4 * C;
    const bnb::TokenizerData vocabulary = tiny_vocabulary();
    const int64_t V = static_cast<int64_t>(vocabulary.tokens.size());
    ImageSpec s;
    s.keys = {{"general.arch", BNB_KEY_STR, 0, "gpt2"}};
    for (auto &k : std::vector<std::pair<std::string, int64_t>>{{"n_vocab", V}, {"n_ctx", ctx}, {"n_embd", C}, {"n_layer", layers}, {"n_head", 4}, {"n_head_kv", 4}, {"n_ff", F}})
        s.keys.push_back({"config." + k.first, BNB_KEY_I64, static_cast<uint64_t>(k.second), ""});
    const int64_t no_eos[] = {-1};
    s.keys.push_back({"config.eos", BNB_KEY_I64_ARRAY, 0, std::string(reinterpret_cast<const char *>(no_eos), 8)});
    auto add = [&](const std::string &name, int32_t t, Shape shape) {
        bnb_quant q = bnb_quant_default(t);
        if (t == BNB_NF4) q.double_quant = 1;
        s.tensors.push_back({name, t, q, shape});
    };
    auto norm = [&](const std::string &name) {
        add(name + ".weight", BNB_F32, {C});
        add(name + ".bias", BNB_F32, {C});
    };
    auto linear = [&](const std::string &name, int64_t out, int64_t in) {
        add(name + ".weight", type, {out, in});
        add(name + ".bias", BNB_F32, {out});
    };
    add("wte.weight", BNB_F32, {V, C});
    add("wpe.weight", BNB_F32, {ctx, C});
    for (int64_t i = 0; i < layers; i++) {
        std::string h = "h." + std::to_string(i) + ".";
        norm(h + "ln_1");
        linear(h + "attn.c_attn", 3 * C, C);
        linear(h + "attn.c_proj", C, C);
        norm(h + "ln_2");
        linear(h + "mlp.c_fc", F, C);
        linear(h + "mlp.c_proj", C, F);
    }
    norm("ln_f");
    if (with_tokenizer) s.chunks = {{"tokn", bnb::serialize(vocabulary)}};
    return Image(s);
}

struct FreeModel { void operator()(bnb_model *m) const { bnb_model_free(m); } };
struct FreeSession { void operator()(bnb_session *s) const { bnb_session_free(s); } };
using Model = std::unique_ptr<bnb_model, FreeModel>;
using Session = std::unique_ptr<bnb_session, FreeSession>;

} // namespace test
