// test_embed.cpp: the smallest app in the README is the one in examples/embed, and its own build line builds it.
//
// Build: make test       (runs cc and c++ in a directory that holds copies of the sources and nothing else)
#include <doctest/doctest.h>

#include <algorithm>

#include "process.h"

using process::How, process::read_file, process::Result, process::run, process::run_command, process::TempDir;

namespace {

std::string between(const std::string &s, const std::string &first, const std::string &last) {
    const size_t begin = s.find(first), end = s.find(last, begin == std::string::npos ? 0 : begin + first.size());
    if (begin == std::string::npos || end == std::string::npos) return "";
    return s.substr(begin + first.size(), end - begin - first.size());
}

// What stands behind "Build:" in a C file's opening comment, as one shell command.
std::string build_command(const std::string &source) {
    std::string text = between(source, "* Build: ", "\n * Use:"), command;
    for (size_t at; (at = text.find("\\\n *")) != std::string::npos;) text.replace(at, 4, "");
    return text;
}

} // namespace

TEST_SUITE_BEGIN("embed");

TEST_CASE("embed: the listing in the README is the file") {
    const std::string source = read_file("examples/embed/embed.c");
    REQUIRE(!source.empty());
    CHECK(between(read_file("README.md"), "<!-- examples/embed/embed.c -->\n```c\n", "```\n<!-- end -->") == source);
    CHECK(std::count(source.begin(), source.end(), '\n') <= 60);
}

TEST_CASE("embed: copied files build with the command in the banner and generate") {
    const TempDir dir;
    const std::string command = build_command(read_file("examples/embed/embed.c"));
    REQUIRE(!command.empty());
    const std::string copy =
        "mkdir " + dir / "models" + " && cp bnb.h bnb.c examples/embed/embed.c " + dir.path() +
        " && cd models && cp model.h model.cpp arch.h gpt2.cpp opt.cpp tokenizer.h tokenizer.cpp unicode.inc"
        " sampler.cpp " +
        dir / "models";
    REQUIRE(run_command({"sh", "-c", copy}).status == 0);
    How how;
    how.directory = dir.path();
    const Result build = run_command({"sh", "-c", command}, how);
    INFO(command, "\n", build.err);
    REQUIRE(build.status == 0);
    CHECK(build.err == "");

    const std::string embed = dir / "embed", demo = "models/demo/demo-nf4.bnb";
    const Result r = run_command({embed, demo, "And God said"});
    CHECK(r.status == 0);
    CHECK(r.out == run({"main", "-m", demo, "--no-echo", "--temp", "0", "-n", "64", "-p", "And God said"}).out + "\n");
    CHECK(run_command({embed}).status == 2);
    const Result missing = run_command({embed, dir / "none.bnb", "x"});
    CHECK(missing.status == 1);
    CHECK(missing.err.find("none.bnb") != std::string::npos);
}

TEST_SUITE_END();
