// tool_logits.cpp: what a model makes of some tokens, for tests/golden/check_exports.py.
//
// Build: make test; it is build/test/tool_logits
// Run:   tool_logits MODEL N ID... > logits      f32 [n_ids, n_vocab] computed in f32, then the N greedy tokens that
//                                                follow, i32
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../models/checkpoint.h"

static int fail(const bnb_error &err) { return std::fprintf(stderr, "tool_logits: %s\n", err.msg), 1; }

int main(int argc, char **argv) {
    if (argc < 4) return std::fputs("usage: tool_logits MODEL N ID...\n", stderr), 2;
    bnb_error err = {};
    const std::unique_ptr<bnb_env, void (*)(bnb_env *)> env(bnb_env_create(nullptr, &err), bnb_env_free);
    bnb_model_params p;
    bnb_model_params_default(&p, sizeof p);
    p.kv_type = p.compute_dtype = BNB_F32;
    const std::unique_ptr<bnb_model, void (*)(bnb_model *)> model(
        env ? bnb_model_load(env.get(), argv[1], nullptr, &p, &err) : nullptr, bnb_model_free);
    const std::unique_ptr<bnb_session, void (*)(bnb_session *)> session(
        model ? bnb_session_create(model.get(), 0, &err) : nullptr, bnb_session_free);
    if (!session) return fail(err);
    bnb_model_info info = {};
    info.struct_size = sizeof info;
    bnb_model_get_info(model.get(), &info);

    std::vector<int32_t> tokens;
    for (int i = 3; i < argc; i++) tokens.push_back(std::atoi(argv[i]));
    const size_t n = tokens.size(), n_vocab = size_t(info.n_vocab);
    std::vector<float> logits(n * n_vocab); // [n, n_vocab]
    if (bnb_session_logits_all(session.get(), tokens.data(), int64_t(n), logits.data(), &err) < 0) return fail(err);
    bnb_sampling greedy;
    bnb_sampling_default(&greedy, sizeof greedy);
    greedy.temp = 0;
    for (int i = std::atoi(argv[2]); i > 0; i--) {
        if (bnb_session_sync(session.get(), tokens.data(), int64_t(tokens.size()), &err) < 0) return fail(err);
        const float *last = bnb_session_logits(session.get(), nullptr);
        tokens.push_back(bnb_sample(last, info.n_vocab, &greedy, nullptr, 0, 0, &err));
        if (tokens.back() < 0) return fail(err);
    }
    return std::fwrite(logits.data(), 4, logits.size(), stdout) != logits.size() ||
           std::fwrite(tokens.data() + n, 4, tokens.size() - n, stdout) != tokens.size() - n;
}
