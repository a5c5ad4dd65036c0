// cli.h: what the programs in examples/ share: the option table, errors, Ctrl-C, the progress bar and JSON.
//
// Build: header only, C++17, POSIX; each program's own build line stands on top of its file.
// Not:   no environment variables, no configuration files, no colours: what a program does stands in its command line.
//
// An option is one row of a table. The row parses it, checks its range, prints its help and its default; the default is
// what the target holds before parsing. Rows of several programs (Common, ModelOptions, QuantOptions) stand here.
#pragma once

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <set>
#include <string>
#include <variant>
#include <vector>

#include "../models/checkpoint.h"

namespace cli {

// ---- text ---------------------------------------------------------------------------------------------------------

__attribute__((format(printf, 1, 2))) inline std::string format(const char *fmt, ...) {
    va_list args, again;
    va_start(args, fmt);
    va_copy(again, args);
    std::string s(size_t(vsnprintf(nullptr, 0, fmt, args)), '\0');
    vsnprintf(s.data(), s.size() + 1, fmt, again);
    va_end(again);
    va_end(args);
    return s;
}

inline std::vector<std::string> split(const std::string &s, char separator) {
    std::vector<std::string> parts;
    for (size_t at = 0, end; at <= s.size(); at = end + 1) {
        end = std::min(s.find(separator, at), s.size());
        size_t first = s.find_first_not_of(' ', at), last = s.find_last_not_of(' ', end - 1);
        if (first < end) parts.push_back(s.substr(first, last + 1 - first));
    }
    return parts;
}

inline double gib(uint64_t bytes) { return double(bytes) / (1 << 30); }
inline std::string gib_text(uint64_t bytes) { return format("%.3f GiB", gib(bytes)); }

inline double now() { // seconds
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v.empty() ? 0 : (v[(v.size() - 1) / 2] + v[v.size() / 2]) / 2;
}

inline uint64_t peak_bytes() { // the most memory this process ever had, mapped files that were read included
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return uint64_t(usage.ru_maxrss) * 1024;
}

// ---- errors: thrown anywhere, printed once, by run() --------------------------------------------------------------

enum { DONE = 0, FAILED = 1, USAGE = 2, INTERRUPTED = 130 };

struct Exit {
    int status;
    std::string message; // one sentence; empty: nothing is printed
};

[[noreturn]] inline void fail(const std::string &message) { throw Exit{FAILED, message}; }
[[noreturn]] inline void usage(const std::string &message) { throw Exit{USAGE, message}; }

[[noreturn]] inline void fail(const bnb_error &err) {
    throw Exit{err.code == BNB_E_CANCELLED ? int(INTERRUPTED) : int(FAILED), err.msg};
}

// need(bnb_something(..., &err), err): the result, unless it is a failure.
template <class T> T *need(T *p, const bnb_error &err) { return p ? p : (fail(err), nullptr); }
inline void need(bnb_status status, const bnb_error &err) {
    if (status < 0) fail(err);
}

// ---- handles that free themselves ---------------------------------------------------------------------------------

template <auto free_function> struct Free {
    template <class T> void operator()(T *p) const { free_function(p); }
};
using Env = std::unique_ptr<bnb_env, Free<bnb_env_free>>;
using Ctx = std::unique_ptr<bnb_ctx, Free<bnb_ctx_free>>;
using Backend = std::unique_ptr<bnb_backend, Free<bnb_backend_close>>;
using Plan = std::unique_ptr<bnb_plan, Free<bnb_plan_free>>;
using File = std::unique_ptr<bnb_file, Free<bnb_file_free>>;
using Model = std::unique_ptr<bnb_model, Free<bnb_model_free>>;
using Session = std::unique_ptr<bnb_session, Free<bnb_session_free>>;

// ---- console: Ctrl-C, progress, log, stdout -----------------------------------------------------------------------

struct Console {
    std::string program;
    bool verbose = false;
    bool bar = isatty(STDERR_FILENO); // progress is drawn on terminals only
    int drawn = -1;                   // percent shown now
};
inline Console console;

inline volatile sig_atomic_t interrupts = 0; // how often Ctrl-C was pressed

// The first Ctrl-C asks the program to stop, a second one kills it (keep: it goes on counting them instead). System
// calls are not restarted, so a program that waits for input notices it.
inline void catch_interrupts(bool keep = false) {
    struct sigaction action = {};
    action.sa_handler = [](int) { interrupts = interrupts + 1; };
    action.sa_flags = keep ? 0 : int(SA_RESETHAND);
    sigaction(SIGINT, &action, nullptr);
}

inline void stop_if_interrupted() {
    if (interrupts) throw Exit{INTERRUPTED, "interrupted"};
}

inline void hide_bar() {
    if (console.drawn >= 0) fprintf(stderr, "\r\033[K");
    console.drawn = -1;
}

inline int32_t on_progress(void *, const char *phase, double fraction) {
    const int width = 40, percent = int(std::clamp(fraction, 0.0, 1.0) * 100);
    if (console.bar && percent != console.drawn) {
        std::string filled(size_t(percent * width / 100), '=');
        fprintf(stderr, "\r%-8s [%-*s] %3d %%", phase, width, filled.c_str(), percent);
        console.drawn = percent;
        if (percent == 100) hide_bar();
    }
    return interrupts == 0;
}

inline void on_log(void *, int32_t level, const char *line) {
    if (level < BNB_LOG_WARN && !console.verbose) return;
    hide_bar();
    fprintf(stderr, "%s: %s%s\n", console.program.c_str(), level == BNB_LOG_WARN ? "warning: " : "", line);
}

inline bool put(const char *bytes, size_t n) { return fwrite(bytes, 1, n, stdout) == n && fflush(stdout) == 0; }
inline void print(const std::string &text) {
    if (!put(text.data(), text.size())) fail(format("stdout: %s", strerror(errno)));
}

inline std::string read_file(const std::string &path) { // "-": stdin
    FILE *f = path == "-" ? stdin : fopen(path.c_str(), "rb");
    if (!f) fail(path + ": " + strerror(errno));
    std::string text;
    char buffer[1 << 16];
    for (size_t n; (n = fread(buffer, 1, sizeof buffer, f)) > 0;) text.append(buffer, n);
    const int error = ferror(f) ? errno : 0; // a directory opens, but cannot be read
    if (f != stdin) fclose(f);
    if (error) fail(path + ": " + strerror(error));
    return text;
}

// ---- JSON: objects of named values --------------------------------------------------------------------------------

class Json {
public:
    Json &add(const char *name, double v) { return put(name, std::isfinite(v) ? format("%.10g", v) : "null"); }
    Json &add(const char *name, int32_t v) { return put(name, std::to_string(v)); }
    Json &add(const char *name, int64_t v) { return put(name, std::to_string(v)); }
    Json &add(const char *name, uint64_t v) { return put(name, std::to_string(v)); }
    Json &add(const char *name, bool v) { return put(name, v ? "true" : "false"); }
    Json &add(const char *name, const std::string &v) { return put(name, quote(v)); }
    Json &add(const char *name, const char *v) { return put(name, quote(v)); }
    Json &add(const char *name, const Json &v) { return put(name, v.text()); }
    Json &add(const char *name, const std::vector<Json> &v) {
        std::string list;
        for (const Json &item : v) list += (list.empty() ? "" : ",\n  ") + item.text();
        return put(name, "[\n  " + list + "\n]");
    }
    Json &add(const char *name, const int64_t *v, size_t n) {
        std::string list;
        for (size_t i = 0; i < n; i++) list += (i ? "," : "") + std::to_string(v[i]);
        return put(name, "[" + list + "]");
    }
    std::string text() const { return "{" + body + "}"; }

    static std::string quote(const std::string &s) { // bytes that are not UTF-8 become U+FFFD
        std::string out = "\"";
        for (size_t i = 0; i < s.size();) {
            const unsigned char c = static_cast<unsigned char>(s[i]);
            const size_t n = utf8_length(s, i);
            if (c == '"' || c == '\\') out += '\\';
            if (n == 0) out += "\xEF\xBF\xBD";
            else if (c < 0x20 || c == 0x7F) out += format("\\u%04x", c);
            else out.append(s, i, n);
            i += std::max<size_t>(n, 1);
        }
        return out + '"';
    }

private:
    std::string body;
    Json &put(const char *name, const std::string &value) {
        body += (body.empty() ? "" : ", ") + quote(name) + ": " + value;
        return *this;
    }
    // Bytes of the character at s[i], 0 if it is ill-formed (Unicode, table 3-7).
    static size_t utf8_length(const std::string &s, size_t i) {
        const auto at = [&](size_t k) -> unsigned { return k < s.size() ? static_cast<unsigned char>(s[k]) : 0; };
        const unsigned c = at(i);
        if (c < 0x80) return 1;
        const size_t n = c >= 0xF0 ? 4 : c >= 0xE0 ? 3 : 2;
        if (c < 0xC2 || c > 0xF4) return 0;
        for (size_t k = 1; k < n; k++)
            if ((at(i + k) & 0xC0) != 0x80) return 0;
        const unsigned second = at(i + 1);
        const bool overlong = (c == 0xE0 && second < 0xA0) || (c == 0xF0 && second < 0x90);
        const bool surrogate = c == 0xED && second > 0x9F, too_large = c == 0xF4 && second > 0x8F;
        return overlong || surrogate || too_large ? 0 : n;
    }
};

// ---- the option table ---------------------------------------------------------------------------------------------

// monostate: a heading. A list collects every use of its option. The target's value before parsing is the default.
using Target = std::variant<std::monostate, bool *, int32_t *, int64_t *, float *, double *, std::string *,
                            std::vector<std::string> *>;

struct Option {
    const char *names;    // "-m, --model"; without a leading dash: a positional argument or a heading
    const char *argument; // "N"; "a|b|c" lists the only values accepted; "" for flags
    Target target;
    const char *help; // if it says "(default" itself, none is added
    double min = -std::numeric_limits<double>::infinity(), max = std::numeric_limits<double>::infinity();

    bool positional() const { return names[0] != '-' && target.index() != 0; }
    bool flag() const { return std::holds_alternative<bool *>(target); }
    const void *address() const { return std::visit(Address(), target); }

private:
    struct Address {
        const void *operator()(std::monostate) const { return nullptr; }
        const void *operator()(const void *p) const { return p; }
    };
};

using Rows = std::vector<Option>;

inline Rows operator+(Rows a, const Rows &b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
}

inline Option heading(const char *text) { return {text, "", {}, ""}; }

struct Program {
    const char *summary;
    std::vector<const char *> usage; // without the program's name
    Rows rows;
    const char *notes; // the end of --help
};

// What was given on the command line, by target.
class Given {
public:
    bool operator()(const void *target) const { return targets.count(target) != 0; }
    void insert(const void *target) { targets.insert(target); }

private:
    std::set<const void *> targets;
};

inline std::string default_text(const Option &o) {
    if (strstr(o.help, "(default")) return "";
    std::string text;
    if (auto *p = std::get_if<int32_t *>(&o.target)) text = std::to_string(**p);
    if (auto *p = std::get_if<int64_t *>(&o.target)) text = std::to_string(**p);
    if (auto *p = std::get_if<float *>(&o.target)) text = format("%g", double(**p));
    if (auto *p = std::get_if<double *>(&o.target)) text = format("%g", **p);
    if (auto *p = std::get_if<std::string *>(&o.target)) text = **p;
    return text.empty() ? "" : " (default: " + text + ")";
}

inline std::string wrap(const std::string &text, size_t indent, size_t width) {
    std::string out;
    size_t column = indent;
    for (const std::string &word : split(text, ' ')) {
        const bool fits = column + word.size() + 1 <= width;
        if (column > indent) out += fits ? " " : "\n" + std::string(indent, ' ');
        if (!fits) column = indent;
        out += word;
        column += word.size() + 1;
    }
    return out + "\n";
}

inline std::string help_text(const Program &p) {
    const size_t indent = 36, width = 118;
    std::string out = console.program + ": " + p.summary + "\n\n";
    for (const char *line : p.usage) out += "usage: " + console.program + " " + line + "\n";
    for (const Option &o : p.rows) {
        if (o.target.index() == 0) {
            out += std::string("\n") + o.names + "\n";
            continue;
        }
        std::string left = std::string(o.names[0] == '-' && o.names[1] == '-' ? "      " : "  ") + o.names;
        if (o.argument[0]) left += std::string(" ") + o.argument;
        left += left.size() + 1 > indent ? "\n" + std::string(indent, ' ') : std::string(indent - left.size(), ' ');
        out += left + wrap(o.help + default_text(o), indent, width);
    }
    return out + "\n" + p.notes +
           "\nExit status: 0 done, 1 failed (one sentence on stderr says why), 2 wrong usage, 130 stopped by Ctrl-C"
           "\nbefore there was a result. Results go to stdout; logs, progress and timings go to stderr.\n";
}

template <class Number> Number parse_number(const std::string &name, const std::string &text, const Option &o) {
    char *end = nullptr;
    errno = 0;
    double value;
    Number result;
    if constexpr (std::is_integral_v<Number>) {
        const long long v = strtoll(text.c_str(), &end, 10);
        value = double(v);
        result = Number(v);
        if (result != v) errno = ERANGE;
    } else {
        value = strtod(text.c_str(), &end);
        result = Number(value);
    }
    if (text.empty() || *end || errno == ERANGE || !std::isfinite(value))
        usage(name + ": '" + text + "' is not " + (std::is_integral_v<Number> ? "a whole number" : "a number"));
    if (value < o.min) usage(format("%s: %s is less than %g", name.c_str(), text.c_str(), o.min));
    if (value > o.max) usage(format("%s: %s is more than %g", name.c_str(), text.c_str(), o.max));
    return result;
}

inline std::string parse_string(const std::string &name, const std::string &text, const Option &o) {
    if (!strchr(o.argument, '|')) return text;
    std::string lower = text;
    for (char &c : lower)
        if (c >= 'A' && c <= 'Z') c = char(c - 'A' + 'a');
    for (const std::string &choice : split(o.argument, '|'))
        if (lower == choice) return lower;
    usage(name + ": '" + text + "' is none of " + o.argument);
}

inline void assign(const std::string &name, const std::string &text, const Option &o) {
    if (auto *p = std::get_if<bool *>(&o.target)) **p = true;
    if (auto *p = std::get_if<int32_t *>(&o.target)) **p = parse_number<int32_t>(name, text, o);
    if (auto *p = std::get_if<int64_t *>(&o.target)) **p = parse_number<int64_t>(name, text, o);
    if (auto *p = std::get_if<float *>(&o.target)) **p = parse_number<float>(name, text, o);
    if (auto *p = std::get_if<double *>(&o.target)) **p = parse_number<double>(name, text, o);
    if (auto *p = std::get_if<std::string *>(&o.target)) **p = parse_string(name, text, o);
    if (auto *p = std::get_if<std::vector<std::string> *>(&o.target)) (*p)->push_back(text);
}

inline const Option *find_option(const Rows &rows, std::string name) {
    for (char &c : name)
        if (c == '_') c = '-'; // --top_k, as llama.cpp accepts
    for (const Option &o : rows)
        for (const std::string &alias : split(o.names, ','))
            if (o.target.index() != 0 && name[0] == '-' && alias == name) return &o;
    return nullptr;
}

inline const Option &next_positional(const Rows &rows, const Given &given, const char *arg) {
    for (const Option &o : rows)
        if (o.positional() && !given(o.address())) return o;
    usage(std::string("unexpected argument '") + arg + "'");
}

// Sets the rows' targets. --name value and --name=value mean the same.
inline Given parse_arguments(const Rows &rows, int argc, char **argv) {
    Given given;
    for (int i = 1; i < argc; i++) {
        std::string name = argv[i];
        if (name[0] != '-' || name == "-") {
            const Option &o = next_positional(rows, given, argv[i]);
            assign(o.names, name, o);
            given.insert(o.address());
            continue;
        }
        const size_t equals = name.compare(0, 2, "--") == 0 ? name.find('=') : std::string::npos;
        const std::string inline_value = equals == std::string::npos ? "" : name.substr(equals + 1);
        name = name.substr(0, equals);
        const Option *o = find_option(rows, name);
        if (!o) usage("unknown option '" + name + "'");
        if (o->flag() && equals != std::string::npos) usage(name + " takes no argument");
        if (!o->flag() && equals == std::string::npos && ++i == argc) usage(name + " needs an argument " + o->argument);
        assign(name, o->flag() || equals != std::string::npos ? inline_value : argv[i], *o);
        given.insert(o->address());
    }
    return given;
}

inline Given parse(Program program, int argc, char **argv) {
    bool help = false, version = false;
    const Rows always = {
        {"-v, --verbose", "", &console.verbose, "log more to stderr"},
        {"-h, --help", "", &help, "print this help"},
        {"--version", "", &version, "print the version"},
    };
    program.rows = program.rows + always;
    const std::string text = help_text(program); // before parsing: it shows the defaults
    const Given given = parse_arguments(program.rows, argc, argv);
    if (help) print(text);
    else if (version) print(format("bnb %s\n", BNB_VERSION));
    if (help || version) throw Exit{DONE, ""};
    return given;
}

// Runs a program's body and turns what it throws into an exit status and a sentence.
template <class Body> int run(int argc, char **argv, Body body) {
    const std::string path = argc > 0 ? argv[0] : "bnb";
    console.program = path.substr(path.find_last_of('/') + 1);
    Exit end = {FAILED, ""};
    try {
        return body();
    } catch (const Exit &e) {
        end = e;
    } catch (const std::bad_alloc &) {
        end.message = "out of memory";
    } catch (const std::exception &e) {
        end.message = e.what();
    }
    hide_bar();
    if (end.status == USAGE) end.message += " (" + console.program + " --help lists the options)";
    if (!end.message.empty()) fprintf(stderr, "%s: %s\n", console.program.c_str(), end.message.c_str());
    return end.status;
}

// ---- rows that programs share -------------------------------------------------------------------------------------

struct Common {
    int32_t threads = 0;
    bool json = false;

    Rows rows() {
        return {
            {"-t, --threads", "N", &threads, "threads; 0: one for each core this process may use", 0, 4096},
            {"--json", "", &json, "print one JSON object to stdout, and nothing else"},
        };
    }
    Env open_env() const {
        catch_interrupts();
        bnb_env_params params;
        bnb_env_params_default(&params, sizeof params);
        params.n_threads = threads;
        params.log = on_log;
        params.progress = on_progress;
        bnb_error err;
        return Env(need(bnb_env_create(&params, &err), err));
    }
};

// How weights are quantized: when a checkpoint is loaded (rows_load_in) or converted (rows_type).
struct QuantOptions {
    bool in_8bit = false, in_4bit = false, double_quant = false, allow_nonfinite = false;
    std::string type, quant_type = "nf4", rest_type, compat = "cuda", skip_modules, keep_in_fp32;
    int32_t blocksize = 64;
    float threshold = 6.0f;
    int64_t seed = 0;       // of synthetic weights
    bool checksums = false; // compared before anything else

    Rows rows_load_in() {
        return {
            heading("Quantizing on load (Hugging Face directories, .safetensors and PyTorch files)"),
            {"--load-in-8bit", "", &in_8bit, "linear weights in LLM.int8()"},
            {"--load-in-4bit", "", &in_4bit, "linear weights in 4 bits, see --quant-type"},
            {"--quant-type", "nf4|fp4", &quant_type, "which 4 bits"},
        };
    }
    Rows rows_type(const char *help) { return {{"--type", "nf4|fp4|int8|f16|bf16|f32|stored", &type, help}}; }
    Rows rows() {
        return {
            {"--double-quant", "", &double_quant, "4 bits: quantize the blocks' scales as well"},
            {"--blocksize", "N", &blocksize, "4 bits: weights that share a scale: 32, 64, 128, ... 4096", 32, 4096},
            {"--threshold", "X", &threshold,
             "int8: activations of this size or more are outliers and computed in higher precision, 0: none "
             "(default: 6, or what a .bnb says)",
             0},
            {"--skip-modules", "A,B", &skip_modules,
             "modules that are not quantized; replaces the default, which is the output head"},
            {"--keep-in-fp32", "A,B", &keep_in_fp32, "modules that are kept as f32"},
            {"--rest-type", "f16|bf16|f32", &rest_type,
             "type of all that is not quantized (default: f16 beside quantized weights, else --type or as stored)"},
            {"--quant-compat", "cuda|cpu", &compat, "whose rounding to follow: bitsandbytes' CUDA or CPU code"},
            {"--allow-nonfinite", "", &allow_nonfinite,
             "quantize NaN and infinity as bitsandbytes does, not refuse them"},
        };
    }

    int32_t type_id() const {
        if (in_8bit) return BNB_INT8;
        if (in_4bit) return bnb_type_from_name(quant_type.c_str());
        return type.empty() ? -1 : bnb_type_from_name(type.c_str());
    }
    int32_t compat_id() const { return compat == "cpu" ? BNB_COMPAT_CPU : BNB_COMPAT_CUDA; }
    // The strings of the result are this object's.
    bnb_load_params params(const Given &given) const {
        check(given);
        bnb_load_params p;
        bnb_load_params_default(&p, sizeof p);
        p.type = type_id();
        if (!rest_type.empty()) p.rest_type = bnb_type_from_name(rest_type.c_str());
        p.blocksize = blocksize;
        p.double_quant = double_quant;
        p.threshold = threshold;
        p.compat = compat_id();
        p.allow_nonfinite = allow_nonfinite;
        if (given(&skip_modules)) p.skip_modules = skip_modules.c_str();
        if (given(&keep_in_fp32)) p.keep_in_fp32 = keep_in_fp32.c_str();
        p.seed = uint64_t(seed);
        p.check = checksums;
        return p;
    }

private:
    void check(const Given &given) const { // an option that would have no effect is a mistake
        const int32_t id = type_id();
        if (in_8bit + in_4bit + !type.empty() > 1) usage("give one of --load-in-8bit, --load-in-4bit and --type");
        if (given(&quant_type) && !in_4bit) usage("--quant-type needs --load-in-4bit");
        if (id != BNB_NF4 && id != BNB_FP4) {
            if (given(&double_quant)) usage("--double-quant is for 4-bit weights, which were not asked for");
            if (given(&blocksize)) usage("--blocksize is for 4-bit weights, which were not asked for");
        }
        if (blocksize & (blocksize - 1)) usage("--blocksize: not a power of two");
    }
};

struct ModelOptions {
    std::string path, device = "auto", device_map = "auto", compute = "auto", cache_type = "auto", outlier_rule;
    int64_t n_batch = 0;
    bool no_mmap = false, mlock = false;

    Rows row_path() {
        return {{"-m, --model", "MODEL", &path,
                 "a .bnb file, a Hugging Face directory, a .safetensors or a PyTorch file"}};
    }
    Rows rows() {
        return {
            {"--device", "NAME", &device, "auto, cpu, cuda, cuda:1, hip; auto takes a GPU that works"},
            {"--device-map", "SPEC", &device_map, "where layers go: auto or cpu; other maps are not offered yet"},
            {"--compute-dtype", "auto|f32|bf16|f16", &compute,
             "what linear layers compute in; auto: what is fastest here, summed in f32"},
            {"-ctk, --cache-type, --kv-type", "auto|f16|f32|int8", &cache_type,
             "type of the KV cache; auto: f32 if the weights are f32, else f16; int8: half of f16's size"},
            {"--outlier-rule", "column|row", &outlier_rule,
             "int8: an outlier takes its column out for all rows, or only for its own (default: what the model says)"},
            {"-ub, --ubatch-size", "N", &n_batch, "prompt tokens evaluated at once; 0: 512, on a GPU 2048", 0, 1 << 20},
            {"--no-mmap", "", &no_mmap, "read the file into memory instead of mapping it"},
            {"--mlock", "", &mlock, "keep the weights' pages in memory"},
        };
    }
    // The strings of the result are this object's.
    bnb_model_params params(const Given &given, const QuantOptions &quant) const {
        if (device_map != "auto" && device_map != "cpu")
            usage("--device-map: '" + device_map + "' is not offered yet, only auto and cpu are");
        bnb_model_params p;
        bnb_model_params_default(&p, sizeof p);
        p.n_batch = int32_t(n_batch);
        p.no_mmap = no_mmap;
        p.mlock = mlock;
        p.device = device_map == "cpu" ? "cpu" : device.c_str();
        if (compute != "auto") p.compute_dtype = bnb_type_from_name(compute.c_str());
        if (cache_type != "auto") p.kv_type = cache_type == "int8" ? BNB_INT8_KV : bnb_type_from_name(cache_type.c_str());
        if (given(&quant.threshold)) p.threshold = quant.threshold;
        if (!outlier_rule.empty()) p.outlier_rule = outlier_rule == "row" ? BNB_OUTLIER_ROW : BNB_OUTLIER_COLUMN;
        return p;
    }
    // result: NULL, or where it says what it did.
    Model load(bnb_env *env, const Given &given, const QuantOptions &quant,
               bnb_convert_result *result = nullptr) const {
        if (path.empty()) usage("a model is needed: -m MODEL");
        const bnb_model_params model_params = params(given, quant);
        bnb_load_params load_params = quant.params(given);
        load_params.result = result;
        bnb_error err;
        Model model(need(bnb_model_load(env, path.c_str(), &load_params, &model_params, &err), err));
        hide_bar();
        return model;
    }
};

// A model made of random numbers, in the shape of a known one.
struct SyntheticOptions {
    std::string name;

    Rows rows(QuantOptions &quant) {
        return {
            {"--synthetic", "NAME", &name,
             "instead of a model: random weights in the shape of opt-125m .. opt-175b, gpt2 .. gpt2-xl, gpt-mini, ..."},
            {"-s, --seed", "N", &quant.seed, "seed of the random weights", 0},
        };
    }
    Model make(bnb_env *env, bool meta, const Given &given, const QuantOptions &quant,
               const ModelOptions &model) const {
        const bnb_model_params model_params = model.params(given, quant);
        const bnb_load_params load_params = quant.params(given);
        bnb_error err;
        Model made(need(bnb_model_synthetic(env, name.c_str(), &load_params, meta, &model_params, &err), err));
        hide_bar();
        return made;
    }
};

inline bnb_model_info model_info(const bnb_model *model) {
    bnb_model_info info = {};
    info.struct_size = sizeof info;
    bnb_model_get_info(model, &info);
    return info;
}

inline std::vector<int32_t> tokenize(const bnb_model *model, const std::string &text, uint32_t flags) {
    bnb_error err;
    std::vector<int32_t> ids;
    int64_t n = int64_t(text.size()) + 16; // enough nearly always: a token has at least one byte, few are added
    while (n > int64_t(ids.size())) {
        ids.resize(size_t(n));
        n = bnb_tokenize(model, text.data(), text.size(), flags, ids.data(), int64_t(ids.size()), &err);
        if (n < 0) fail(err);
    }
    ids.resize(size_t(n));
    return ids;
}

} // namespace cli
