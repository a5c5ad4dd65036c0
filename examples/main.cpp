// main: generates text with a language model, once (-p, -f) or in turns with you (-i).
//
// Build: make     or  cc -O2 -c bnb.c && c++ -std=c++17 -O2 -o main examples/main.cpp models/*.cpp bnb.o -pthread
// Use:   ./main -m model.bnb -p "Once upon a time"
// Not:   no chat templates, no server, no context shift: generation ends where the context does.
#include "cli.h"

#include <stdlib.h>

#include <random>

namespace {

struct Options {
    cli::Common common;
    cli::ModelOptions model;
    cli::QuantOptions quant;
    bnb_sampling sampling;
    std::string prompt, file;
    std::vector<std::string> stop;
    int64_t n_predict = -1, n_ctx = 0, seed = -1;
    bool interactive = false, no_echo = false, ignore_eos = false, escape = true, no_escape = false;

    Options() { bnb_sampling_default(&sampling, sizeof sampling); }
};

cli::Program program(Options &o) {
    const cli::Rows text = {
        cli::heading("Text"),
        {"-p, --prompt", "TEXT", &o.prompt, "text to continue; an empty one starts from the model's first token"},
        {"-f, --file", "FILE", &o.file, "take the prompt from a file as it is, less one final newline; -: from stdin"},
        {"-e, --escape", "", &o.escape,
         "in -p and --stop, \\n \\r \\t \\\\ \\\" \\' and \\xHH stand for what they do in C (default)"},
        {"--no-escape", "", &o.no_escape, "a backslash is a backslash"},
        {"-n, --predict, --n-predict", "N", &o.n_predict, "tokens to generate; -1: until the model or the context ends",
         -2},
        {"-c, --ctx-size", "N", &o.n_ctx, "context in tokens; 0: as long as the model was trained for", 0},
        {"--stop", "TEXT", &o.stop, "end before this text; may be given several times"},
        {"--ignore-eos", "", &o.ignore_eos, "go on when the model wants to end"},
        {"--no-echo, --no-display-prompt", "", &o.no_echo, "stdout is exactly the generated text, without the prompt"},
        {"-i, --interactive", "", &o.interactive,
         "after each turn, read a line from stdin and go on; Ctrl-C ends the turn, at the prompt the program"},
    };
    const cli::Rows sampling = {
        cli::heading("Sampling"),
        {"-s, --seed", "N", &o.seed, "seed of the random draws; -1: a random one, which is printed", -1},
        {"--temp", "T", &o.sampling.temp, "temperature; 0: always the likeliest token", 0},
        {"--top-k", "K", &o.sampling.top_k, "keep the K likeliest tokens; 0: all", 0},
        {"--top-p", "P", &o.sampling.top_p, "keep the likeliest tokens that have P of the probability; 1: all", 1e-6,
         1},
        {"--min-p", "P", &o.sampling.min_p, "keep tokens with P of the likeliest one's probability; 0: all", 0, 1},
        {"--repeat-penalty", "R", &o.sampling.repeat_penalty, "make tokens that were used less likely; 1: off", 0.01,
         100},
        {"--repeat-last-n", "N", &o.sampling.repeat_last_n, "tokens that count as used; -1: all", -1},
    };
    return {
        "generates text with a language model in a bitsandbytes format",
        {"-m MODEL -p PROMPT [options]", "-m MODEL -i [options]"},
        cli::Rows{cli::heading("Model")} + o.model.row_path() + o.model.rows() + o.quant.rows_load_in() +
            o.quant.rows() + text + sampling + cli::Rows{cli::heading("Other")} + o.common.rows(),
        "stdout is the prompt, then the text, as it is made. Ctrl-C stops generation: if there was text, that is a\n"
        "result (exit status 0). A second Ctrl-C ends the program at once.\n"};
}

int hex_digit(char c) {
    const char *digits = "0123456789abcdef", *at = c ? strchr(digits, c >= 'A' && c <= 'F' ? c + 32 : c) : nullptr;
    return at ? int(at - digits) : -1;
}

std::string unescape(const std::string &s) { // llama.cpp's rules: what is not an escape stays as it is
    const std::string names = "nrt'\"\\", values = "\n\r\t'\"\\";
    std::string out;
    for (size_t i = 0; i < s.size(); i++) {
        const size_t known = s[i] == '\\' && i + 1 < s.size() ? names.find(s[i + 1]) : std::string::npos;
        const bool hex =
            s.compare(i, 2, "\\x") == 0 && i + 3 < s.size() && hex_digit(s[i + 2]) >= 0 && hex_digit(s[i + 3]) >= 0;
        if (known != std::string::npos) out += values[known], i += 1;
        else if (hex) out += char(hex_digit(s[i + 2]) * 16 + hex_digit(s[i + 3])), i += 3;
        else out += s[i];
    }
    return out;
}

void settle(Options &o, const cli::Given &given) {
    if (given(&o.prompt) && given(&o.file)) cli::usage("give one of -p and -f");
    if (o.interactive && o.common.json) cli::usage("give one of -i and --json");
    if (o.interactive && o.file == "-") cli::usage("-f - and -i both read stdin");
    if (!o.no_escape) {
        o.prompt = unescape(o.prompt);
        for (std::string &s : o.stop) s = unescape(s);
    }
    for (const std::string &s : o.stop)
        if (s.empty()) cli::usage("--stop: the text is empty");
    if (given(&o.file)) {
        o.prompt = cli::read_file(o.file);
        if (!o.prompt.empty() && o.prompt.back() == '\n') o.prompt.pop_back();
    }
    o.sampling.seed = o.seed >= 0 ? uint64_t(o.seed) : std::random_device{}();
}

std::vector<int32_t> prompt_tokens(const bnb_model *model, const std::string &text) {
    if (!cli::model_info(model).has_tokenizer) cli::fail("the model has no tokenizer, so there is no text to generate");
    std::vector<int32_t> ids = cli::tokenize(model, text, BNB_TOKENIZE_SPECIAL | BNB_TOKENIZE_PARSE_SPECIAL);
    if (ids.empty() && bnb_model_bos(model) >= 0) ids.push_back(bnb_model_bos(model));
    if (ids.empty()) cli::fail("an empty prompt: this model does not say what text starts with");
    return ids;
}

// What is printed, and what is remembered of it.
struct Output {
    bool to_stdout, failed;
    std::string text;

    static int32_t on_text(void *self, const char *bytes, size_t n) {
        Output &o = *static_cast<Output *>(self);
        o.text.append(bytes, n);
        if (o.to_stdout && !cli::put(bytes, n)) o.failed = true;
        return !o.failed && !cli::interrupts;
    }
};

struct Turn {
    bnb_generate_result result;
    int64_t n_eval; // generated tokens that were evaluated: not the last one if nothing follows it
    std::string text;

    int64_t n_prompt_eval() const { return result.n_prompt - result.n_reused; }
    void add(const Turn &other) {
        result.n_prompt += other.result.n_prompt;
        result.n_reused += other.result.n_reused;
        result.n_generated += other.result.n_generated;
        result.prompt_s += other.result.prompt_s;
        result.generate_s += other.result.generate_s;
        n_eval += other.n_eval;
    }
};

// One conversation. Its transcript is tokenized again each turn; the session keeps what the tokens have in common.
class Conversation {
public:
    Conversation(bnb_model *m, const Options &options) : model(m), o(options) {
        bnb_error err;
        session.reset(cli::need(bnb_session_create(model, o.n_ctx, &err), err));
        for (const std::string &s : o.stop) stop.push_back(s.c_str());
    }

    Turn turn(const std::string &added, bool echo) {
        if (!transcript.empty() && transcript.back() != '\n') transcript += '\n'; // what is typed is a line of its own
        transcript += added;
        const std::vector<int32_t> ids = prompt_tokens(model, transcript);
        const int64_t n_ctx = bnb_session_n_ctx(session.get());
        if (int64_t(ids.size()) > n_ctx)
            cli::fail(
                cli::format("the prompt has %zu tokens, the context has room for %lld: shorten the prompt or raise -c",
                            ids.size(), static_cast<long long>(n_ctx)));
        if (echo) cli::print(added);
        Turn t = generate(ids);
        transcript += t.text;
        return t;
    }
    bnb_memory memory() const {
        bnb_memory m = {};
        bnb_session_memory(session.get(), &m);
        return m;
    }

private:
    bnb_model *model;
    const Options &o;
    cli::Session session;
    std::vector<const char *> stop;
    std::string transcript;

    Turn generate(const std::vector<int32_t> &ids) {
        Output output = {!o.common.json, false, ""};
        bnb_generate_params p;
        bnb_generate_params_default(&p, sizeof p);
        p.sampling = o.sampling;
        p.n_predict = std::max<int64_t>(o.n_predict, -1);
        p.ignore_eos = o.ignore_eos;
        p.n_stop = int32_t(stop.size());
        p.stop = stop.data();
        p.on_text = Output::on_text;
        p.user = &output;
        Turn t = {};
        bnb_error err;
        const bnb_status status = bnb_generate(session.get(), ids.data(), int64_t(ids.size()), &p, &t.result, &err);
        if (output.failed) cli::fail("stdout cannot be written");
        const bool cut = status == BNB_E_CANCELLED && !output.text.empty(); // Ctrl-C with text before it is no failure
        if (!cut) cli::need(status, err);
        int64_t n_tokens = 0;
        bnb_session_tokens(session.get(), &n_tokens);
        t.n_eval = std::max<int64_t>(n_tokens - int64_t(ids.size()), 0);
        t.text = std::move(output.text);
        return t;
    }
};

const char *stop_name(int32_t reason) {
    switch (reason) {
    case BNB_STOP_LENGTH: return "length";
    case BNB_STOP_EOS: return "eos";
    case BNB_STOP_STRING: return "stop";
    case BNB_STOP_CALLER: return "interrupted";
    case BNB_STOP_CONTEXT: return "context";
    }
    return "unknown";
}

double rate(int64_t n, double seconds) { return seconds > 0 ? double(n) / seconds : 0; }

// What came before the first token, in seconds.
struct Start {
    bnb_convert_result load;
    double load_s, session_s;
};

// The lines that users paste into issues; "prompt eval" and "eval" are llama.cpp's words.
void report(const Options &o, const bnb_model *model, const Conversation &c, const Turn &t, const Start &start,
            double total_s) {
    const auto line = [](const char *what, int64_t n, double s, const char *unit) {
        fprintf(stderr, "%-16s = %10.2f ms / %5lld %s (%8.2f ms per token, %8.2f tokens per second)\n", what, s * 1e3,
                static_cast<long long>(n), unit, n ? s * 1e3 / double(n) : 0, rate(n, s));
    };
    const bnb_memory m = c.memory();
    fprintf(stderr, "\n%-16s = %10.2f ms (read %.2f ms, quantize %.2f ms)\n", "load time", start.load_s * 1e3,
            start.load.read_s * 1e3, start.load.quantize_s * 1e3);
    if (!o.interactive)
        fprintf(stderr, "%-16s = %10.2f ms after the start\n", "first token",
                (start.load_s + start.session_s + t.result.prompt_s) * 1e3);
    line("prompt eval time", t.n_prompt_eval(), t.result.prompt_s, "tokens");
    line("eval time", t.n_eval, t.result.generate_s, "runs  ");
    fprintf(stderr, "%-16s = %10.2f ms\n", "total time", total_s * 1e3);
    fprintf(stderr, "%-16s = weights %s, KV cache %s, work %s\n", "memory", cli::gib_text(m.weights).c_str(),
            cli::gib_text(m.state).c_str(), cli::gib_text(m.work).c_str());
    fprintf(stderr, "%-16s = %s\n", "compute", bnb_model_compute(model));
    if (o.sampling.temp > 0)
        fprintf(stderr, "%-16s = %llu\n", "seed", static_cast<unsigned long long>(o.sampling.seed));
}

void print_json(const Options &o, bnb_model *model, const Conversation &c, const Turn &t, const Start &start) {
    const bnb_model_info info = cli::model_info(model);
    const bnb_generate_result &r = t.result;
    const bnb_memory m = c.memory();
    cli::Json json;
    json.add("model", o.model.path).add("arch", info.arch).add("compute", bnb_model_compute(model));
    json.add("threads", bnb_env_threads(bnb_model_env(model))).add("seed", o.sampling.seed);
    json.add("prompt", o.prompt).add("text", t.text).add("stop_reason", stop_name(r.stop_reason));
    json.add("n_prompt", r.n_prompt).add("n_reused", r.n_reused).add("n_generated", r.n_generated);
    json.add("load_s", start.load_s).add("read_s", start.load.read_s).add("quantize_s", start.load.quantize_s);
    json.add("first_token_s", start.load_s + start.session_s + r.prompt_s);
    json.add("prompt_s", r.prompt_s).add("generate_s", r.generate_s);
    json.add("prefill_tok_s", rate(t.n_prompt_eval(), r.prompt_s)).add("decode_tok_s", rate(t.n_eval, r.generate_s));
    json.add("footprint_gib", cli::gib(info.footprint)).add("weight_bytes", m.weights).add("kv_bytes", m.state);
    json.add("work_bytes", m.work).add("peak_bytes", cli::peak_bytes());
    cli::print(json.text() + "\n");
}

bool read_line(std::string *line) { // false: end of input, or Ctrl-C
    if (isatty(STDIN_FILENO)) fprintf(stderr, "\n> ");
    char *buffer = nullptr;
    size_t capacity = 0;
    const ssize_t n = getline(&buffer, &capacity, stdin);
    line->assign(n > 0 ? buffer : "", size_t(std::max<ssize_t>(n, 0)));
    free(buffer);
    return n > 0 && !cli::interrupts;
}

Turn converse(Conversation &c, const Options &o) {
    Turn sum = {};
    cli::catch_interrupts(true);
    std::string line = o.prompt;
    if (line.empty() && !read_line(&line)) return sum;
    for (bool echo = !o.prompt.empty() && !o.no_echo;; echo = false) {
        sum.add(c.turn(line, echo));
        cli::interrupts = 0;
        if (!read_line(&line)) return sum;
    }
}

int body(int argc, char **argv) {
    Options o;
    const cli::Given given = cli::parse(program(o), argc, argv);
    settle(o, given);
    const double start = cli::now();
    const cli::Env env = o.common.open_env();
    Start before = {};
    const cli::Model model = o.model.load(env.get(), given, o.quant, &before.load);
    before.load_s = cli::now() - start;
    cli::console.bar = false; // from here on the terminal shows text
    Conversation conversation(model.get(), o);
    before.session_s = cli::now() - start - before.load_s;

    Turn t;
    if (o.interactive) t = converse(conversation, o);
    else t = conversation.turn(o.prompt, !o.no_echo && !o.common.json);
    if (o.common.json) print_json(o, model.get(), conversation, t, before);
    else if (!o.interactive && (!o.no_echo || isatty(STDOUT_FILENO))) cli::print("\n");
    report(o, model.get(), conversation, t, before, cli::now() - start);
    return cli::interrupts && !o.interactive && t.result.n_generated == 0 ? int(cli::INTERRUPTED) : int(cli::DONE);
}

} // namespace

int main(int argc, char **argv) {
    return cli::run(argc, argv, [&] { return body(argc, argv); });
}
