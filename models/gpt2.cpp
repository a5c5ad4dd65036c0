// gpt2.cpp: GPT-2 of all sizes and minGPT, which differ in their checkpoints' layout only.
//
// Build: c++ -std=c++17 -O2 -c gpt2.cpp
// Not:   cross-attention, token types, left padding.
#include "arch.h"

namespace bnb {
namespace {

void defaults(Config &c) {
    c.act = "gelu_tanh";
    c.n_vocab = 50257;
    c.n_ctx = 1024;
    c.n_embd = 768;
    c.n_layer = c.n_head = 12;
    c.bos = 50256;
    c.eos = {50256};
}

std::vector<TensorInfo> tensors(const Config &c) {
    std::vector<TensorInfo> list;
    int64_t C = c.n_embd;
    auto norm = [&](const std::string &name) {
        list.push_back({name + ".weight", {C}, Role::Norm});
        list.push_back({name + ".bias", {C}, Role::Norm});
    };
    auto linear = [&](const std::string &name, int64_t out, int64_t in) {
        list.push_back({name + ".weight", {out, in}, Role::Linear});
        list.push_back({name + ".bias", {out}, Role::Bias});
    };
    list.push_back({"wte.weight", {c.n_vocab, C}, Role::Embedding});
    list.push_back({"wpe.weight", {c.n_ctx, C}, Role::Embedding});
    for (int64_t i = 0; i < c.n_layer; i++) {
        std::string h = "h." + std::to_string(i) + ".";
        norm(h + "ln_1");
        linear(h + "attn.c_attn", 3 * C, C);
        linear(h + "attn.c_proj", C, C);
        norm(h + "ln_2");
        linear(h + "mlp.c_fc", c.n_ff, C);
        linear(h + "mlp.c_proj", C, c.n_ff);
    }
    norm("ln_f");
    if (!c.tied) list.push_back({"lm_head.weight", {c.n_vocab, C}, Role::Head});
    return list;
}

// Hugging Face stores these as Conv1D, [in, out]; minGPT as Linear, [out, in].
bool may_be_transposed(const std::string &name) {
    for (const char *suffix : {".attn.c_attn.weight", ".attn.c_proj.weight", ".mlp.c_fc.weight", ".mlp.c_proj.weight"}) {
        std::string s = suffix;
        if (name.size() >= s.size() && name.compare(name.size() - s.size(), s.size(), s) == 0) return true;
    }
    return false;
}

bnb_tensor *build(const Build &b) {
    int64_t C = b.config.n_embd;
    bnb_tensor *x = bnb_add(b.ctx, b.embed("wte.weight", b.ids), b.embed("wpe.weight", b.positions)); // [T, C]
    for (int64_t i = 0; i < b.config.n_layer; i++) {
        std::string h = "h." + std::to_string(i) + ".";
        bnb_tensor *qkv = b.linear(b.norm(x, h + "ln_1"), h + "attn.c_attn"); // [T, 3C]
        bnb_tensor *o = b.attend(i, bnb_columns(b.ctx, qkv, 0, C), bnb_columns(b.ctx, qkv, C, C),
                                 bnb_columns(b.ctx, qkv, 2 * C, C));
        x = bnb_add(b.ctx, x, b.linear(o, h + "attn.c_proj"));
        bnb_tensor *f = b.act(b.linear(b.norm(x, h + "ln_2"), h + "mlp.c_fc")); // [T, n_ff]
        x = bnb_add(b.ctx, x, b.linear(f, h + "mlp.c_proj"));
    }
    return b.head(b.norm(b.pick(x), "ln_f"), "wte.weight");
}

const char *const prefixes[] = {"transformer.", nullptr};
const char *const ignored[] = {".attn.bias", ".attn.masked_bias", nullptr}; // causal masks

const HfKey hf_keys[] = {
    {"hidden_size", "n_embd"},
    {"n_embd", "n_embd"},
    {"num_hidden_layers", "n_layer"},
    {"n_layer", "n_layer"},
    {"num_attention_heads", "n_head"},
    {"n_head", "n_head"},
    {"n_ctx", "n_ctx"},
    {"n_positions", "n_ctx"},
    {"n_inner", "n_ff"},
    {"vocab_size", "n_vocab"},
    {"activation_function", "act"},
    {"layer_norm_epsilon", "norm_eps"},
    {"scale_attn_weights", "scale_attn"},
    {"scale_attn_by_inverse_layer_idx", "scale_attn_by_layer"},
    {"tie_word_embeddings", "tied"},
    {nullptr, nullptr},
};

// name, layers, heads, embd, vocab, ctx, word embd, norm before, tied (minGPT's head is a matrix of its own)
const Preset presets[] = {
    {"gpt2", 12, 12, 768, 50257, 1024, 0, true, true},
    {"gpt2-medium", 24, 16, 1024, 50257, 1024, 0, true, true},
    {"gpt2-large", 36, 20, 1280, 50257, 1024, 0, true, true},
    {"gpt2-xl", 48, 25, 1600, 50257, 1024, 0, true, true},
    {"distilgpt2", 6, 12, 768, 50257, 1024, 0, true, true},
    {"gpt-nano", 3, 3, 48, 50257, 1024, 0, true, false},
    {"gpt-micro", 4, 4, 128, 50257, 1024, 0, true, false},
    {"gpt-mini", 6, 6, 192, 50257, 1024, 0, true, false},
    {"gopher-44m", 8, 16, 512, 50257, 1024, 0, true, false},
    {nullptr, 0, 0, 0, 0, 0, 0, false, false},
};

} // namespace

const Arch gpt2_arch = {"gpt2",   "GPT2LMHeadModel", prefixes, ignored, hf_keys, presets, ".attn.c_attn.weight", 0,
                        defaults, tensors, may_be_transposed, build};

} // namespace bnb
