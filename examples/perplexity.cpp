// perplexity: how well a model predicts a text. Lower is better; exp of the mean negative log probability of a token.
//
// Build: make     or  cc -O2 -c bnb.c
//                && c++ -std=c++17 -O2 -o perplexity examples/perplexity.cpp models/*.cpp bnb.o -pthread
// Use:   ./perplexity -m model.bnb -f text.txt
// Not:   numbers of models with different tokenizers cannot be compared. No Kullback-Leibler divergence yet.
//
// Two ways to count. llama.cpp's (default): windows of n_ctx tokens, each evaluated on its own, of which the second
// half is scored, so that every scored token has at least n_ctx / 2 tokens before it; a rest at the end is dropped.
// --all: every token but the first of a window is scored, the short last window too, as in transformers with
// stride = max_length.
#include "cli.h"

namespace {

struct Options {
    cli::Common common;
    cli::ModelOptions model;
    cli::QuantOptions quant;
    std::string file;
    int64_t n_ctx = 512;
    bool all = false;
};

cli::Program program(Options &o) {
    return {"measures how well a model predicts a text",
            {"-m MODEL -f TEXT [options]"},
            cli::Rows{cli::heading("Model")} + o.model.row_path() + o.model.rows() + o.quant.rows_load_in() +
                o.quant.rows() +
                cli::Rows{cli::heading("Text"),
                          {"-f, --file", "TEXT", &o.file, "the text, UTF-8; -: stdin"},
                          {"-c, --ctx-size", "N", &o.n_ctx, "tokens in a window", 4, 1 << 24},
                          {"--all", "", &o.all, "score all tokens of a window, not only its second half"},
                          cli::heading("Other")} +
                o.common.rows(),
            "The running value goes to stderr, the result to stdout. The error is the standard error of the mean over "
            "tokens.\n"};
}

// ---- -log p of each next token, by all threads --------------------------------------------------------------------

struct Window {
    const float *logits;    // [n, n_vocab]
    const int32_t *tokens;  // [n]
    int64_t n_vocab, first; // tokens from first + 1 on are scored
    std::vector<double> nll;

    static void score(void *self, int64_t i) {
        Window &w = *static_cast<Window *>(self);
        const float *l = w.logits + (w.first + i) * w.n_vocab;
        const float max = *std::max_element(l, l + w.n_vocab);
        double sum = 0;
        for (int64_t v = 0; v < w.n_vocab; v++) sum += double(expf(l[v] - max));
        w.nll[size_t(i)] = std::log(sum) + double(max) - double(l[w.tokens[w.first + i + 1]]);
    }
};

struct Estimate {
    double sum = 0, squares = 0;
    int64_t n = 0;

    void add(double nll) { sum += nll, squares += nll * nll, n++; }
    double ppl() const { return std::exp(sum / double(n)); }
    double error() const { // standard error of the mean, carried through exp
        const double mean = sum / double(n), variance = squares / double(n) - mean * mean;
        return n > 1 && variance > 0 ? std::sqrt(variance / double(n - 1)) * ppl() : 0;
    }
};

std::vector<int32_t> text_tokens(const Options &o, const bnb_model *model) {
    if (!cli::model_info(model).has_tokenizer) cli::fail("the model has no tokenizer, so it cannot read a text");
    std::vector<int32_t> ids = cli::tokenize(model, cli::read_file(o.file), BNB_TOKENIZE_SPECIAL);
    const size_t needed = o.all ? 2 : 2 * size_t(o.n_ctx);
    if (ids.size() < needed)
        cli::fail(cli::format("%s: %zu tokens are too few, at least %zu are needed%s", o.file.c_str(), ids.size(),
                              needed, o.all ? "" : " (two windows): lower -c or give --all"));
    return ids;
}

// The tokens of window k. A model whose texts start with a certain token sees it first in every window.
std::vector<int32_t> window_tokens(const std::vector<int32_t> &ids, int64_t k, int64_t n_ctx,
                                   const std::vector<int32_t> &start) {
    const auto first = ids.begin() + k * n_ctx, last = std::min(first + n_ctx, ids.end());
    std::vector<int32_t> window(first, last);
    if (!start.empty() && !window.empty()) window[0] = start[0];
    return window;
}

class Scorer {
public:
    Scorer(const Options &options, bnb_env *e, bnb_model *m) : o(options), env(e), n_vocab(cli::model_info(m).n_vocab) {
        bnb_error err;
        session.reset(cli::need(bnb_session_create(m, o.n_ctx, &err), err));
    }
    void add(const std::vector<int32_t> &tokens, Estimate &sum) {
        const int64_t n = int64_t(tokens.size());
        bnb_error err;
        logits.resize(size_t(n * n_vocab));
        cli::need(bnb_session_logits_all(session.get(), tokens.data(), n, logits.data(), &err), err);
        Window w = {logits.data(), tokens.data(), n_vocab, o.all ? 0 : n / 2, {}};
        w.nll.resize(size_t(n - 1 - w.first));
        bnb_parallel(env, int64_t(w.nll.size()), Window::score, &w);
        for (double nll : w.nll) sum.add(nll); // in order: the same sum at any number of threads
        if (!std::isfinite(sum.sum)) cli::fail("the model's logits are not finite");
        cli::stop_if_interrupted();
    }

private:
    const Options &o;
    bnb_env *env;
    int64_t n_vocab;
    cli::Session session;
    std::vector<float> logits;
};

Estimate score_text(const Options &o, bnb_env *env, bnb_model *model, const std::vector<int32_t> &ids,
                    int64_t n_windows) {
    const std::vector<int32_t> start = cli::tokenize(model, "", BNB_TOKENIZE_SPECIAL); // OPT: </s>; GPT-2: nothing
    Scorer scorer(o, env, model);
    Estimate sum;
    for (int64_t k = 0; k < n_windows; k++) {
        const std::vector<int32_t> window = window_tokens(ids, k, o.n_ctx, start);
        if (window.size() < 2) break;
        scorer.add(window, sum);
        fprintf(stderr, "[%lld]%.4f,", static_cast<long long>(k + 1), sum.ppl());
    }
    fprintf(stderr, "\n");
    return sum;
}

int body(int argc, char **argv) {
    Options o;
    const cli::Given given = cli::parse(program(o), argc, argv);
    if (o.file.empty()) cli::usage("a text is needed: -f TEXT");
    const cli::Env env = o.common.open_env();
    const cli::Model model = o.model.load(env.get(), given, o.quant);
    const std::vector<int32_t> ids = text_tokens(o, model.get());
    const int64_t n = int64_t(ids.size()), n_windows = o.all ? (n + o.n_ctx - 1) / o.n_ctx : n / o.n_ctx;
    cli::console.bar = false; // the running value is the progress
    const double start = cli::now();
    const Estimate e = score_text(o, env.get(), model.get(), ids, n_windows);
    const double seconds = cli::now() - start;
    fprintf(stderr, "%lld tokens scored in %.2f s\n", static_cast<long long>(e.n), seconds);
    if (o.common.json)
        cli::print(cli::Json()
                       .add("model", o.model.path)
                       .add("perplexity", e.ppl())
                       .add("error", e.error())
                       .add("n_scored", e.n)
                       .add("n_tokens", n)
                       .add("n_ctx", o.n_ctx)
                       .add("all", o.all)
                       .add("seconds", seconds)
                       .add("compute", bnb_model_compute(model.get()))
                       .text() +
                   "\n");
    else cli::print(cli::format("Final estimate: PPL = %.4f +/- %.5f\n", e.ppl(), e.error()));
    return cli::DONE;
}

} // namespace

int main(int argc, char **argv) {
    return cli::run(argc, argv, [&] { return body(argc, argv); });
}
