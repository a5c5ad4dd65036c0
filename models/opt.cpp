// opt.cpp: OPT, 125m to 175b, with the post-norm layers and projections of 350m.
//
// Build: c++ -std=c++17 -O2 -c opt.cpp
// Not:   raw metaseq checkpoints, left padding.
#include "arch.h"

namespace bnb {
namespace {

void defaults(Config &c) {
    c.act = "relu";
    c.n_vocab = 50272;
    c.n_ctx = 2048;
    c.n_embd = 768;
    c.n_layer = c.n_head = 12;
    c.bos = 2;
    c.pad = 1;
    c.eos = {2};
}

bool has_final_norm(const Config &c) { return c.norm_before && c.norm_final; }

std::vector<TensorInfo> tensors(const Config &c) {
    std::vector<TensorInfo> list;
    int64_t C = c.n_embd, W = c.n_embd_word;
    auto norm = [&](const std::string &name) {
        if (!c.norm_affine) return;
        list.push_back({name + ".weight", {C}, Role::Norm});
        list.push_back({name + ".bias", {C}, Role::Norm});
    };
    auto linear = [&](const std::string &name, int64_t out, int64_t in, bool bias) {
        list.push_back({name + ".weight", {out, in}, Role::Linear});
        if (bias) list.push_back({name + ".bias", {out}, Role::Bias});
    };
    list.push_back({"embed_tokens.weight", {c.n_vocab, W}, Role::Embedding});
    list.push_back({"embed_positions.weight", {c.n_ctx + opt_arch.position_offset, C}, Role::Embedding});
    if (W != C) linear("project_in", C, W, false);
    if (W != C) linear("project_out", W, C, false);
    for (int64_t i = 0; i < c.n_layer; i++) {
        std::string l = "layers." + std::to_string(i) + ".";
        for (const char *name : {"q_proj", "k_proj", "v_proj", "out_proj"}) linear(l + "self_attn." + name, C, C, c.bias);
        norm(l + "self_attn_layer_norm");
        linear(l + "fc1", c.n_ff, C, c.bias);
        linear(l + "fc2", C, c.n_ff, c.bias);
        norm(l + "final_layer_norm"); // the layer's second norm, in spite of its name
    }
    if (has_final_norm(c)) norm("final_layer_norm");
    if (!c.tied) list.push_back({"lm_head.weight", {c.n_vocab, W}, Role::Head});
    return list;
}

bool may_be_transposed(const std::string &) { return false; }

// h = x + f(norm(x)), or norm(x + f(x)) in the post-norm model
template <class F> bnb_tensor *residual(const Build &b, bnb_tensor *x, const std::string &norm, F f) {
    bnb_tensor *y = bnb_add(b.ctx, x, f(b.config.norm_before ? b.norm(x, norm) : x));
    return b.config.norm_before ? y : b.norm(y, norm);
}

bnb_tensor *build(const Build &b) {
    bool projected = b.config.n_embd_word != b.config.n_embd;
    bnb_tensor *x = b.embed("embed_tokens.weight", b.ids); // [T, W]
    if (projected) x = b.linear(x, "project_in");
    x = bnb_add(b.ctx, x, b.embed("embed_positions.weight", b.positions)); // [T, C]
    for (int64_t i = 0; i < b.config.n_layer; i++) {
        std::string l = "layers." + std::to_string(i) + ".", a = l + "self_attn.";
        x = residual(b, x, l + "self_attn_layer_norm", [&](bnb_tensor *h) {
            bnb_tensor *o = b.attend(i, b.linear(h, a + "q_proj"), b.linear(h, a + "k_proj"), b.linear(h, a + "v_proj"));
            return b.linear(o, a + "out_proj");
        });
        x = residual(b, x, l + "final_layer_norm",
                     [&](bnb_tensor *h) { return b.linear(b.act(b.linear(h, l + "fc1")), l + "fc2"); });
    }
    x = b.pick(x);
    if (has_final_norm(b.config)) x = b.norm(x, "final_layer_norm");
    if (projected) x = b.linear(x, "project_out");
    return b.head(x, "embed_tokens.weight");
}

const char *const prefixes[] = {"model.decoder.", "decoder.", nullptr};
const char *const ignored[] = {nullptr};

const HfKey hf_keys[] = {
    {"hidden_size", "n_embd"},
    {"num_hidden_layers", "n_layer"},
    {"num_attention_heads", "n_head"},
    {"ffn_dim", "n_ff"},
    {"max_position_embeddings", "n_ctx"},
    {"vocab_size", "n_vocab"},
    {"word_embed_proj_dim", "n_embd_word"},
    {"do_layer_norm_before", "norm_before"},
    {"_remove_final_layer_norm", "!norm_final"},
    {"layer_norm_elementwise_affine", "norm_affine"},
    {"enable_bias", "bias"},
    {"activation_function", "act"},
    {"tie_word_embeddings", "tied"},
    {nullptr, nullptr},
};

// name, layers, heads, embd, vocab, ctx, word embd, norm before, tied
const Preset presets[] = {
    {"opt-125m", 12, 12, 768, 50272, 2048, 0, true, true},
    {"opt-350m", 24, 16, 1024, 50272, 2048, 512, false, true},
    {"opt-1.3b", 24, 32, 2048, 50272, 2048, 0, true, true},
    {"opt-2.7b", 32, 32, 2560, 50272, 2048, 0, true, true},
    {"opt-6.7b", 32, 32, 4096, 50272, 2048, 0, true, true},
    {"opt-13b", 40, 40, 5120, 50272, 2048, 0, true, true},
    {"opt-30b", 48, 56, 7168, 50272, 2048, 0, true, true},
    {"opt-66b", 64, 72, 9216, 50272, 2048, 0, true, true},
    {"opt-175b", 96, 96, 12288, 50272, 2048, 0, true, true},
    {nullptr, 0, 0, 0, 0, 0, 0, false, false},
};

} // namespace

const Arch opt_arch = {"opt",    "OPTForCausalLM", prefixes, ignored, hf_keys, presets, ".self_attn.out_proj.weight", 2,
                       defaults, tensors, may_be_transposed, build};

} // namespace bnb
