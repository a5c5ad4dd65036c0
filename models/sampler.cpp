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

struct Candidate {
    int32_t id;
    float logit;
};

bool better(const Candidate &a, const Candidate &b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

// A counter-based generator (splitmix64's finalizer): 53 bits in [0, 1).
double uniform(uint64_t seed, uint64_t step) {
    uint64_t z = seed + 0x9E3779B97F4A7C15u * (step + 1);
    for (int round = 0; round < 2; round++) {
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        z ^= z >> 31;
    }
    return static_cast<double>(z >> 11) * 0x1p-53;
}

// Each id in the window once, whatever it scored: s > 0 ? s / penalty : s * penalty
void penalize(std::vector<Candidate> &c, const bnb_sampling &p, const int32_t *history, int64_t n) {
    if (p.repeat_penalty == 1.0f || p.repeat_last_n == 0) return;
    int64_t first = p.repeat_last_n < 0 ? 0 : std::max<int64_t>(0, n - p.repeat_last_n);
    std::vector<int32_t> seen(history + first, history + n);
    std::sort(seen.begin(), seen.end());
    seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
    for (int32_t id : seen) {
        if (id < 0 || static_cast<size_t>(id) >= c.size()) continue;
        float &s = c[static_cast<size_t>(id)].logit; // not sorted yet: index = id
        s = s > 0 ? s / p.repeat_penalty : s * p.repeat_penalty;
    }
}

// exp(logit / temp - max), unnormalized; candidates are sorted
std::vector<double> weights(const std::vector<Candidate> &c, double temp) {
    std::vector<double> w(c.size());
    for (size_t i = 0; i < c.size(); i++) w[i] = std::exp((static_cast<double>(c[i].logit) - c[0].logit) / temp);
    return w;
}

// The smallest head of the sorted candidates whose probability reaches p.
void keep_top_p(std::vector<Candidate> &c, double p) {
    std::vector<double> w = weights(c, 1.0);
    double total = 0, sum = 0;
    for (double v : w) total += v;
    size_t n = 0;
    while (n < c.size() && (n == 0 || sum < p * total)) sum += w[n++];
    c.resize(n);
}

void keep_min_p(std::vector<Candidate> &c, double p) {
    double least = c[0].logit + std::log(p);
    size_t n = 1;
    while (n < c.size() && c[n].logit >= least) n++;
    c.resize(n);
}

int32_t sample(const float *logits, int64_t n_vocab, const bnb_sampling &p, const int32_t *history, int64_t n_history,
               uint64_t step, bnb_error *err) {
    std::vector<Candidate> c(static_cast<size_t>(n_vocab));
    for (size_t i = 0; i < c.size(); i++) {
        c[i] = {static_cast<int32_t>(i), logits[i]};
        if (std::isnan(logits[i]))
            return bnb_fail(err, BNB_E_NUMERIC, "the logit of token %d is not a number: the model's weights may hold NaN or infinity", c[i].id);
    }
    penalize(c, p, history, n_history);
    if (p.temp <= 0) return std::min_element(c.begin(), c.end(), better)->id;

    size_t k = p.top_k > 0 ? std::min(c.size(), static_cast<size_t>(p.top_k)) : c.size();
    std::partial_sort(c.begin(), c.begin() + static_cast<std::ptrdiff_t>(k), c.end(), better);
    c.resize(k);
    if (!std::isfinite(c[0].logit)) return bnb_fail(err, BNB_E_NUMERIC, "the largest logit is infinite: the model's weights may hold infinity");
    if (p.top_p < 1) keep_top_p(c, p.top_p);
    if (p.min_p > 0) keep_min_p(c, p.min_p);

    std::vector<double> w = weights(c, p.temp);
    double total = 0;
    for (double v : w) total += v;
    double at = uniform(p.seed, step) * total;
    for (size_t i = 0; i < c.size(); i++)
        if ((at -= w[i]) < 0) return c[i].id;
    return c.back().id;
}

} // namespace

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
