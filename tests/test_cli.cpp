// test_cli.cpp: the programs as users meet them: exit status, stdout, stderr, files, Ctrl-C.
//
// Build: make test       (needs the programs in $BNB_BIN_DIR, the model in models/demo, and to run where README.md is)
// Not:   no speed and no terminal but one: what programs print on a real terminal is looked at by eye.
#include <doctest/doctest.h>
#include <sys/mount.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "../bnb.h"
#include "process.h"

using nlohmann::json;
using process::exists, process::How, process::read_file, process::Result, process::run, process::TempDir,
    process::write_file;

namespace {

const char *const DEMO = "models/demo/demo-nf4.bnb", *const DEMO_HF = "models/demo";
const char *const PROGRAMS[] = {"main", "quantize", "inspect", "bench", "perplexity"};

using Args = std::vector<std::string>;

Args operator+(Args a, const Args &b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
}

// ./main on the demo model: greedy, and nothing but the text on stdout, unless more says otherwise.
Result generate(const Args &more, const How &how = {}) {
    return run(Args{"main", "-m", DEMO, "--no-echo", "--temp", "0"} + more, how);
}

bool contains(const std::string &s, const std::string &part) { return s.find(part) != std::string::npos; }
long lines(const std::string &s) { return std::count(s.begin(), s.end(), '\n'); }

// One sentence on stderr that names what is wrong, nothing on stdout.
void check_failure(const Args &args, int status, const std::string &named, const How &how = {}) {
    const Result r = run(args, how);
    std::string command;
    for (const std::string &a : args) command += a + " ";
    INFO(command, "\n", r.err);
    CHECK(r.status == status);
    CHECK(r.out == "");
    CHECK(lines(r.err) == 1);
    CHECK(contains(r.err, named));
    CHECK(contains(r.err, "--help") == (status == 2));
}

std::string damaged_copy(const TempDir &dir, size_t at) {
    std::string bytes = read_file(DEMO);
    bytes.at(at) = char(bytes[at] ^ 0x40);
    write_file(dir / "damaged.bnb", bytes);
    return dir / "damaged.bnb";
}

} // namespace

TEST_SUITE_BEGIN("cli");

TEST_CASE("cli: --help and --version go to stdout") {
    for (const std::string program : PROGRAMS) {
        const Result help = run({program, "--help"}), version = run({program, "--version"});
        CAPTURE(program);
        CHECK(help.status == 0);
        CHECK(help.err == "");
        CHECK(contains(help.out, "usage: " + program + " "));
        CHECK(contains(help.out, "Exit status: 0 done"));
        CHECK(contains(help.out, "--threads"));
        CHECK(version.status == 0);
        CHECK(version.out == "bnb " BNB_VERSION "\n");
        size_t longest = 0;
        std::istringstream text(help.out);
        for (std::string line; std::getline(text, line);) longest = std::max(longest, line.size());
        CHECK(longest <= 120);
    }
    const std::string help = run({"main", "-h"}).out;
    for (const std::string option : {"-m, --model MODEL", "--temp T", "(default: 0.8)", "(default: 0.95)",
                                     "--no-display-prompt", "-ctk, --cache-type, --kv-type auto|f16|f32|int8"})
        CHECK_MESSAGE(contains(help, option), option);
}

TEST_CASE("cli: wrong usage ends with status 2 and one sentence") {
    check_failure({"main", "--frobnicate"}, 2, "--frobnicate");
    check_failure({"main", "-p", "x"}, 2, "-m MODEL");
    check_failure({"main", "-m", DEMO, "extra"}, 2, "extra");
    check_failure({"main", "-m", DEMO, "-n"}, 2, "-n");
    check_failure({"main", "-m", DEMO, "-n", "ten"}, 2, "'ten'");
    check_failure({"main", "-m", DEMO, "-n", "1.5"}, 2, "'1.5'");
    check_failure({"main", "-m", DEMO, "-n", "99999999999999999999"}, 2, "whole number");
    check_failure({"main", "-m", DEMO, "--temp", "nan"}, 2, "--temp");
    check_failure({"main", "-m", DEMO, "--temp", "-1"}, 2, "--temp");
    check_failure({"main", "-m", DEMO, "--top-p", "1.5"}, 2, "--top-p");
    check_failure({"main", "-m", DEMO, "-t", "-3"}, 2, "-t");
    check_failure({"main", "-m", DEMO, "--top-k="}, 2, "--top-k");
    check_failure({"main", "-m", DEMO, "--no-echo=1"}, 2, "--no-echo");
    check_failure({"main", "-m", DEMO, "-p", "x", "-f", "y"}, 2, "-p");
    check_failure({"main", "-m", DEMO, "-i", "--json"}, 2, "--json");
    check_failure({"main", "-m", DEMO, "--stop", ""}, 2, "--stop");
    check_failure({"main", "-m", DEMO, "--load-in-4bit", "--load-in-8bit"}, 2, "--load-in-8bit");
    check_failure({"main", "-m", DEMO, "--load-in-4bit", "--quant-type", "q4_0"}, 2, "q4_0");
    check_failure({"main", "-m", DEMO, "--quant-type", "fp4"}, 2, "--load-in-4bit");
    check_failure({"main", "-m", DEMO, "--load-in-8bit", "--double-quant"}, 2, "--double-quant");
    check_failure({"main", "-m", DEMO, "--load-in-4bit", "--blocksize", "100"}, 2, "--blocksize");
    check_failure({"main", "-m", DEMO, "--compute-dtype", "int4"}, 2, "--compute-dtype");
    for (const std::string program : {"main", "bench", "perplexity"})
        check_failure({program, "-m", DEMO, "--cache-type", "q8_0"}, 2, "--cache-type");
    check_failure({"main", "-m", DEMO, "--device-map", "balanced"}, 2, "--device-map");
    check_failure({"quantize", DEMO_HF, "--type", "nf4"}, 2, "SRC OUT");
    check_failure({"quantize", DEMO_HF, "/tmp/x.bnb"}, 2, "--type");
    check_failure({"inspect"}, 2, "MODEL");
    check_failure({"inspect", DEMO, "--synthetic", "gpt2"}, 2, "--synthetic");
    check_failure({"bench", "-m", DEMO, "-b", "2,3"}, 2, "--batch");
    check_failure({"bench", "--ops", "--shape", "64"}, 2, "--shape");
    check_failure({"bench", "--ops", "-b", "1,x"}, 2, "'x'");
    check_failure({"perplexity", "-m", DEMO}, 2, "-f TEXT");
}

TEST_CASE("cli: files that are missing or are not models") {
    const TempDir dir;
    write_file(dir / "empty.bnb", "");
    write_file(dir / "text.bnb",
               "this is no model, it is a text that is longer than the 64 bytes of a header would be");
    for (const std::string program : {"main", "bench"}) {
        check_failure({program, "-m", dir / "none.bnb"}, 1, "none.bnb");
        check_failure({program, "-m", dir / "empty.bnb"}, 1, "empty.bnb");
        check_failure({program, "-m", dir / "text.bnb"}, 1, "text.bnb");
        check_failure({program, "-m", dir.path()}, 1, dir.path());
    }
    check_failure({"inspect", dir / "text.bnb"}, 1, "text.bnb");
    check_failure({"perplexity", "-m", DEMO, "-f", dir / "none.txt"}, 1, "none.txt");
    check_failure({"perplexity", "-m", DEMO, "-f", dir / "empty.bnb"}, 1, "empty.bnb");
    check_failure({"main", "-m", DEMO, "-f", dir.path()}, 1, dir.path());
    check_failure({"quantize", dir / "none", dir / "out.bnb", "--type", "nf4"}, 1, "none");
    check_failure({"quantize", DEMO_HF, dir / "no/such/out.bnb", "--type", "nf4"}, 1, "no/such/out.bnb");
    check_failure({"main", "-m", DEMO, "--load-in-8bit"}, 1, "quantize");
    check_failure({"bench", "--synthetic", "gpt-17"}, 1, "gpt-17");
    CHECK(!exists(dir / "out.bnb"));
}

TEST_CASE("cli: devices that are not there") { // whatever this program was built for, on any machine
    const Args commands[] = {{"main", "-m", DEMO, "-p", "x"},
                             {"bench", "-m", DEMO},
                             {"bench", "--ops"},
                             {"perplexity", "-m", DEMO, "-f", "README.md"}};
    for (const std::string device : {"nonsense", "cuda:99", "hip:99", "cpu:1", "cuda:", "hip:x", "cpu:-1", ""})
        for (Args args : commands) {
            args.insert(args.end(), {"--device", device});
            check_failure(args, 1, "'" + device + "'");
        }
    check_failure({"main", "-m", DEMO, "--device", std::string(5000, 'x')}, 1, "'xxxx");
}

TEST_CASE("cli: a .bnb that was cut off or damaged is refused") {
    const TempDir dir;
    const std::string whole = read_file(DEMO);
    REQUIRE(whole.size() > 4096);
    for (size_t n : {size_t(1), size_t(7), size_t(8), size_t(63), size_t(64), size_t(4095), size_t(4096),
                     whole.size() / 2, whole.size() - 1}) {
        write_file(dir / "cut.bnb", whole.substr(0, n));
        check_failure({"main", "-m", dir / "cut.bnb", "-p", "x"}, 1, "cut.bnb");
    }
    for (size_t at : {size_t(0), size_t(9), size_t(17), size_t(40), size_t(57), size_t(64), size_t(200), size_t(3000)})
        check_failure({"main", "-m", damaged_copy(dir, at), "-p", "x"}, 1, "damaged.bnb");
    CHECK(run({"inspect", DEMO, "--check"}).status == 0); // damage to weights is found on request
    check_failure({"inspect", damaged_copy(dir, whole.size() - whole.size() / 4), "--check"}, 1, "damaged.bnb");
}

TEST_CASE("cli: stdout is the prompt and the text, or the text only") {
    const Result text = generate({"-p", "And God said", "-n", "12"});
    INFO(text.err);
    REQUIRE(text.status == 0);
    CHECK(!text.out.empty());
    CHECK(text.out.back() != '\n'); // nothing is added
    const Result both = run({"main", "-m", DEMO, "--temp", "0", "-p", "And God said", "-n", "12"});
    CHECK(both.out == "And God said" + text.out + "\n");
    CHECK(generate({"--no-display-prompt", "-p", "And God said", "-n", "12"}).out == text.out);
    for (const std::string line :
         {"load time", "prompt eval time", "eval time", "tokens per second", "total time", "memory", "compute"})
        CHECK_MESSAGE(contains(text.err, line), line);
    CHECK(!contains(text.err, "\r")); // no progress bar: stderr is no terminal
    CHECK(generate({"-p", "x", "-n", "0"}).out == "");
}

TEST_CASE("cli: the progress bar is drawn on a terminal") {
    const int terminal = posix_openpt(O_RDWR | O_NOCTTY);
    if (terminal < 0 || grantpt(terminal) < 0 || unlockpt(terminal) < 0) return; // no pseudo-terminals here
    const TempDir dir;
    How how;
    how.stderr_fd = open(ptsname(terminal), O_RDWR | O_NOCTTY);
    REQUIRE(how.stderr_fd >= 0);
    CHECK(run({"quantize", DEMO_HF, dir / "out.bnb", "--type", "nf4"}, how).status == 0);
    char buffer[4096] = {};
    CHECK(read(terminal, buffer, sizeof buffer - 1) > 0);
    CHECK(contains(buffer, "\r"));
    CHECK(contains(buffer, "%"));
    close(how.stderr_fd);
    close(terminal);
}

TEST_CASE("cli: prompts: files, stdin, escapes, empty, too long") {
    const TempDir dir;
    write_file(dir / "prompt.txt", "And God said\n");
    const std::string text = generate({"-p", "And God said", "-n", "8"}).out;
    CHECK(generate({"-f", dir / "prompt.txt", "-n", "8"}).out == text);
    How how;
    how.input = "And God said\n";
    CHECK(generate({"-f", "-", "-n", "8"}, how).out == text);
    CHECK(run({"main", "-m", DEMO, "-n", "0", "-p", "a\\n\\t\\x41\\q"}).out == "a\n\tA\\q\n");
    CHECK(run({"main", "-m", DEMO, "-n", "0", "-p", "a\\n", "--no-escape"}).out == "a\\n\n");
    CHECK(generate({"-n", "8"}).out != "");
    CHECK(generate({"-p", "", "-n", "8"}).out == generate({"-n", "8"}).out);
    std::string many;
    for (int i = 0; i < 2000; i++) many += "word ";
    check_failure({"main", "-m", DEMO, "-p", many}, 1, "tokens");
    check_failure({"main", "-m", DEMO, "-c", "4", "-p", "And God said, Let there be light"}, 1, "context");
    CHECK(generate({"-c", "16", "-p", "And God said", "--ignore-eos"}).status == 0); // ends where the context does
    CHECK(generate({"-p", "ill-formed \xff\xc3 bytes", "-n", "4"}).status == 0);
}

TEST_CASE("cli: greedy text is the same at any number of threads, seeds repeat it") {
    const std::string text = generate({"-p", "In the beginning", "-n", "48", "-t", "1"}).out;
    CHECK(!text.empty());
    for (const char *threads : {"2", "3", "8"})
        CHECK(generate({"-p", "In the beginning", "-n", "48", "-t", threads}).out == text);
    CHECK(generate({"-p", "In the beginning", "-n", "48", "--no-mmap"}).out == text);
    const auto draw = [](const char *seed) {
        return generate({"-p", "In the beginning", "-n", "32", "--temp", "1", "-s", seed});
    };
    CHECK(draw("7").out == draw("7").out);
    CHECK(draw("7").out != draw("8").out);
    CHECK(contains(draw("-1").err, "seed "));
}

TEST_CASE("cli: text ends before a stop string") {
    const std::string text = generate({"-p", "And God said", "-n", "32"}).out;
    REQUIRE(text.size() > 24);
    for (size_t at : {size_t(0), size_t(5), size_t(12)})
        for (size_t n : {size_t(1), size_t(3), size_t(9)}) {
            const std::string stop = text.substr(at, n);
            CAPTURE(stop);
            CHECK(generate({"-p", "And God said", "-n", "32", "--no-escape", "--stop", stop}).out ==
                  text.substr(0, text.find(stop)));
        }
    CHECK(generate({"-p", "And God said", "-n", "32", "--stop", "never met \\n\\n\\n"}).out == text);
    const std::string first = text.substr(3, 2), second = text.substr(9, 4);
    CHECK(generate({"-p", "And God said", "-n", "32", "--no-escape", "--stop", second, "--stop", first}).out ==
          text.substr(0, std::min(text.find(first), text.find(second))));
}

TEST_CASE("cli: --json prints one object and nothing else") {
    const Result r = run({"main", "-m", DEMO, "--temp", "0", "-p", "And \"God\"\n\x01\xff", "-n", "8", "--json"});
    const json j = json::parse(r.out); // throws: the test fails
    CHECK(j["text"] == generate({"-p", "And \"God\"\n\x01\xff", "-n", "8"}).out);
    CHECK(j["prompt"] == "And \"God\"\n\x01\xEF\xBF\xBD");
    CHECK(j["n_generated"] == 8);
    CHECK(j["stop_reason"] == "length");
    for (const std::string name : {"load_s", "prefill_tok_s", "decode_tok_s", "footprint_gib", "peak_bytes"})
        CHECK_MESSAGE(j[name].is_number(), name);

    const json bench = json::parse(run({"bench", "-m", DEMO, "-p", "16", "-n", "4", "-r", "1", "--json"}).out);
    for (const std::string name :
         {"decode_tok_s", "prefill_tok_s", "load_s", "footprint_gib", "peak_bytes", "pct_of_bandwidth", "read_gb_s"})
        CHECK_MESSAGE(bench[name].get<double>() > 0, name);
    const json ops = json::parse(
        run({"bench", "--ops", "--shape", "64,128", "--type", "int8", "-b", "1,4", "-r", "1", "--json"}).out);
    REQUIRE(ops["ops"].size() == 2);
    CHECK(ops["ops"][1]["rows"] == 4);
    CHECK(ops["ops"][1]["us"].get<double>() > 0);
    for (const std::string name : {"f16_us", "speedup_over_f16"}) CHECK_MESSAGE(ops["ops"][1][name].get<double>() > 0, name);
    const json f16 = json::parse(run({"bench", "--ops", "--shape", "64,128", "--type", "f16", "-r", "1", "--json"}).out);
    CHECK_FALSE(f16["ops"][0].contains("f16_us")); // it is its own peer

    const json model = json::parse(run({"inspect", DEMO, "--tensors", "--check", "--json"}).out);
    CHECK(model["arch"] == "gpt2");
    CHECK(model["n_layer"] == 6);
    CHECK(model["linear_type"] == "nf4");
    CHECK(model["tensors"].size() > 50);
    const json ppl =
        json::parse(run({"perplexity", "-m", DEMO, "-f", "models/demo/README.md", "-c", "64", "--json"}).out);
    CHECK(ppl["perplexity"].get<double>() > 1);
}

TEST_CASE("cli: Ctrl-C ends generation cleanly") {
    How how;
    how.interrupt_after = 1;
    const Args args = {"-p", "In the beginning", "--ignore-eos", "-t", "1"};
    const Result r = generate(args, how);
    CHECK(r.status == 0);
    CHECK(!r.out.empty());
    CHECK(contains(r.err, "eval time"));
    const std::string whole = generate(args).out;
    CHECK(r.out.size() < whole.size());
    CHECK(whole.compare(0, r.out.size(), r.out) == 0);
}

TEST_CASE("cli: -i continues the conversation line by line") {
    How how;
    how.input = "And God said\nAnd Moses said\n";
    const Result r = generate({"-i", "-n", "6"}, how);
    INFO(r.err);
    CHECK(r.status == 0);
    const std::string first = generate({"-p", "And God said\\n", "-n", "6"}).out;
    REQUIRE(!first.empty());
    CHECK(r.out.compare(0, first.size(), first) == 0);
    const std::string middle = first.back() == '\n' ? "" : "\n";
    const std::string second =
        generate({"--no-escape", "-p", "And God said\n" + first + middle + "And Moses said\n", "-n", "6"}).out;
    CHECK(r.out == first + second);
    how.input = "";
    CHECK(generate({"-i"}, how).status == 0); // the end of input ends it
}

TEST_CASE("cli: quantize, inspect and main agree") {
    const TempDir dir;
    for (const std::string type : {"nf4", "fp4", "int8", "f16", "bf16", "f32"}) {
        CAPTURE(type);
        const Result r = run({"quantize", DEMO_HF, dir / "out.bnb", "--type", type});
        INFO(r.err);
        CHECK(r.status == 0);
        CHECK(r.err == "");
        CHECK(contains(r.out, "GB/s"));
        const json j = json::parse(run({"inspect", dir / "out.bnb", "--check", "--json"}).out);
        CHECK(j["linear_type"] == type);
        CHECK(run({"main", "-m", dir / "out.bnb", "-p", "And God said", "-n", "4"}).status == 0);
    }
    // Quantizing on load and beforehand is the same model.
    const Args ask = {"--no-echo", "--temp", "0", "-p", "And God said", "-n", "24"};
    for (const Args &how : {Args{"--load-in-4bit"}, Args{"--load-in-4bit", "--double-quant"}, Args{"--load-in-8bit"}}) {
        const Args type = how[0] == "--load-in-8bit" ? Args{"--type", "int8"} : Args{"--type", "nf4"};
        CHECK(run(Args{"quantize", DEMO_HF, dir / "out.bnb"} + type + Args(how.begin() + 1, how.end())).status == 0);
        const Result converted = run(Args{"main", "-m", dir / "out.bnb"} + ask),
                     loaded = run(Args{"main", "-m", DEMO_HF} + how + ask);
        CHECK(loaded.status == 0);
        CHECK(loaded.out == converted.out);
        CHECK(!loaded.out.empty());
    }
    // A Hugging Face directory of the same weights is the same model, and says where its loading time went.
    CHECK(run({"quantize", dir / "out.bnb", dir / "hf", "--format", "hf", "--shard-size", "0.001"}).status == 0);
    CHECK(run(Args{"main", "-m", dir / "hf"} + ask).out == run(Args{"main", "-m", dir / "out.bnb"} + ask).out);
    const json loading = json::parse(run(Args{"main", "-m", DEMO_HF, "--load-in-4bit", "--json"} + ask).out);
    CHECK(loading["quantize_s"] > 0);
    CHECK(double(loading["read_s"]) + double(loading["quantize_s"]) <= loading["load_s"]);
    CHECK(double(loading["load_s"]) + double(loading["prompt_s"]) <= loading["first_token_s"]);
    CHECK(contains(run(Args{"main", "-m", dir / "hf"} + ask).err, "first token"));
    CHECK(json::parse(run({"inspect", dir / "hf", "--check", "--json"}).out)["linear_type"] == "int8");
    const json bench = json::parse(run({"bench", "--load", "-m", dir / "hf", "-r", "2", "--json"}).out)["load"];
    REQUIRE(bench.size() == 2);
    for (const json &row : bench) CHECK(row["gb_s"] > 0);
    check_failure({"quantize", DEMO_HF, dir / "hf", "--format", "hf"}, 1, "is not an empty directory");
    check_failure({"quantize", DEMO_HF, dir / "x", "--type", "nf4", "--shard-size", "1"}, 2, "--shard-size");
    const Result verbose = run({"quantize", DEMO_HF, dir / "out.bnb", "--type", "nf4", "--verbose"});
    CHECK(lines(verbose.err) > 50);
    CHECK(contains(verbose.err, "nf4"));
}

TEST_CASE("cli: an old file survives a full disk") {
    const TempDir dir;
    write_file(dir / "out.bnb", "precious");
    How how;
    how.max_file_bytes = 100000;
    check_failure({"quantize", DEMO_HF, dir / "out.bnb", "--type", "nf4"}, 1, "out.bnb", how);
    CHECK(read_file(dir / "out.bnb") == "precious");
    CHECK(run({"quantize", DEMO_HF, dir / "none.bnb", "--type", "nf4"}, how).status == 1);
    CHECK(!exists(dir / "none.bnb"));
    CHECK(!exists(dir / "out.bnb.tmp"));
    if (mount("none", dir.path().c_str(), "tmpfs", 0, "size=256k") == 0) { // root outside of containers
        check_failure({"quantize", DEMO_HF, dir / "full.bnb", "--type", "nf4"}, 1, "full.bnb");
        CHECK(!exists(dir / "full.bnb"));
        CHECK(umount(dir.path().c_str()) == 0);
    }
    how = {};
    how.stdout_to = "/dev/full";
    const Result r = generate({"-p", "x", "-n", "8"}, how);
    CHECK(r.status == 1);
    CHECK(contains(r.err, "stdout"));
}

TEST_CASE("cli: footprints of known models, as transformers prints them") {
    const struct {
        std::string name, type, gib;
    } known[] = {
        {"opt-1.3b", "int8", "1.326"}, {"opt-1.3b", "nf4", "0.763"},  {"opt-1.3b", "f16", "2.451"},
        {"opt-1.3b", "f32", "4.902"},  {"opt-350m", "nf4", "0.194"},  {"opt-350m", "int8", "0.335"},
        {"opt-350m", "f16", "0.617"},  {"opt-350m", "f32", "1.234"},  {"opt-6.7b", "nf4", "3.402"},
        {"opt-6.7b", "int8", "6.402"}, {"opt-6.7b", "f16", "12.402"}, {"opt-6.7b", "f32", "24.805"},
    };
    for (const auto &k : known) {
        CAPTURE(k.name);
        CAPTURE(k.type);
        const Result r = run({"inspect", "--synthetic", k.name, "--type", k.type, "--n-ctx", "128"});
        CHECK(r.status == 0);
        CHECK(contains(r.out, k.gib + " GiB\n"));
    }
    const json huge = json::parse(run({"inspect", "--synthetic", "opt-66b", "--type", "nf4", "--json"}).out);
    CHECK(huge["weight_bytes"].get<double>() > 30e9); // and none of it was allocated
    CHECK(huge["kv_bytes"].get<double>() > 1e9);
}

TEST_CASE("cli: perplexity") {
    const TempDir dir;
    write_file(dir / "text.txt", read_file("models/demo/heldout.txt").substr(0, 4000));
    const Args ask = {"perplexity", "-f", dir / "text.txt", "-c", "256"};
    const Result nf4 = run(ask + Args{"-m", DEMO, "-t", "2"}), one = run(ask + Args{"-m", DEMO, "-t", "1"});
    CHECK(nf4.status == 0);
    CHECK(contains(nf4.out, "Final estimate: PPL = "));
    CHECK(lines(nf4.out) == 1);
    CHECK(contains(nf4.err, "[1]"));
    CHECK(one.out == nf4.out);
    const auto ppl = [&](const Args &more) {
        return json::parse(run(ask + more + Args{"--json"}).out)["perplexity"].get<double>();
    };
    const double full = ppl({"-m", DEMO_HF}), quantized = ppl({"-m", DEMO});
    CHECK(full > 1);
    CHECK(quantized == doctest::Approx(full).epsilon(0.1));
    CHECK(ppl({"-m", DEMO, "--all"}) > quantized); // less context for each token on average
    check_failure({"perplexity", "-m", DEMO, "-f", "models/demo/heldout.txt", "-c", "100000"}, 1, "tokens");
}

TEST_CASE("cli: the README's commands are there") {
    const std::string readme = read_file("README.md"), makefile = read_file("Makefile");
    for (const std::string target : {"demo", "test"}) {
        CHECK_MESSAGE(contains(readme, "make " + target), target);
        CHECK_MESSAGE(contains(makefile, "\n" + target + ":"), target);
    }
    for (const std::string program : PROGRAMS) CHECK_MESSAGE(contains(readme, "./" + program), program);
}

TEST_SUITE_END();
