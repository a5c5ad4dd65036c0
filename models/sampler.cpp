// sampler.cpp: from logits to a token.
//
// Build: c++ -std=c++17 -O2 -c sampler.cpp
// Not:   no state: the draw for a step is a function of (seed, step, logits, settings), so the same seed gives the same
//        text whatever was cached or batched. Other runtimes' draws cannot be reproduced (their generators differ).
#include <algorithm>
#include <cmath>
#include <vector>

#include "arch.h"

namespace {

// Each id in the window once, whatever it scored: s > 0 ? s / penalty : s * penalty
void penalize(std::vector<float> &logits, const bnb_sampling &p, const int32_t *history, int64_t n) {
    int64_t first = p.repeat_last_n < 0 ? 0 : std::max<int64_t>(0, n - p.repeat_last_n);
    std::vector<int32_t> seen(history + first, history + n);
    std::sort(seen.begin(), seen.end());
    seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
    for (int32_t id : seen) {
        if (id < 0 || static_cast<size_t>(id) >= logits.size()) continue;
        float &s = logits[static_cast<size_t>(id)];
        s = s > 0 ? s / p.repeat_penalty : s * p.repeat_penalty;
    }
}

int32_t sample(const float *logits, int64_t n_vocab, const bnb_sampling &p, const int32_t *history, int64_t n_history,
               uint64_t step, bnb_error *err) {
    std::vector<float> penalized;
    if (p.repeat_penalty != 1.0f && p.repeat_last_n != 0) {
        penalized.assign(logits, logits + n_vocab);
        penalize(penalized, p, history, n_history);
        logits = penalized.data();
    }
    const bnb_draw_rule rule = bnb::draw_rule(p);
    std::vector<int64_t> scratch(static_cast<size_t>(rule.top_k > 0 ? std::min<int64_t>(rule.top_k, n_vocab) : n_vocab));
    int32_t id = bnb_draw_row(logits, n_vocab, &rule, static_cast<int32_t>(step), scratch.data());
    for (int64_t i = 0; i < n_vocab && id < 0; i++)
        if (!std::isfinite(logits[i]) && !(logits[i] < 0))
            return bnb_fail(err, BNB_E_NUMERIC, "the logit of token %d is not a number: the model's weights may hold NaN or infinity", static_cast<int>(i));
    return id < 0 ? bnb_fail(err, BNB_E_NUMERIC, "no logit is a finite number: the model's weights may hold infinity") : id;
}

} // namespace

bnb_draw_rule bnb::draw_rule(const bnb_sampling &p) {
    return {std::max(p.temp, 0.0f), p.top_p, p.min_p, std::max(p.top_k, 0), p.seed};
}

void bnb_sampling_default(bnb_sampling *s, uint32_t struct_size) {
    bnb::params_write(s, struct_size, bnb_sampling{struct_size, 0.8f, 40, 0.95f, 0.05f, 1.0f, 64, 0});
}

int32_t bnb_sample(const float *logits, int64_t n_vocab, const bnb_sampling *params, const int32_t *history,
                   int64_t n_history, uint64_t step, bnb_error *err) {
    bnb_sampling p = bnb::params_read(params, bnb_sampling_default);
    if (n_vocab < 1 || n_vocab > INT32_MAX) return bnb_fail(err, BNB_E_ARG, "there are %lld logits", static_cast<long long>(n_vocab));
    if (!(p.top_p > 0) || !(p.min_p >= 0 && p.min_p <= 1) || !(p.repeat_penalty > 0) || std::isnan(p.temp))
        return bnb_fail(err, BNB_E_ARG, "sampling needs top_p > 0, 0 <= min_p <= 1, repeat_penalty > 0 and a temperature");
    return bnb::guarded(err, int32_t{BNB_E_NOMEM}, [&] { return sample(logits, n_vocab, p, history, n_history, step, err); });
}
