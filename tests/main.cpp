// main.cpp: runs every test and ends with one line that says how many passed.
//
// Build: make test       (or link it with all tests/test_*.cpp, models/*.cpp and bnb.c)
// Use:   build/test/bnb-test [--test-case=*int8*] [--test-suite=cli] [--help]
// Not:   no timing: speed is measured by ./bench.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdio>

namespace {

unsigned n_run = 0, n_failed = 0;

struct Count : doctest::IReporter {
    explicit Count(const doctest::ContextOptions &) {}
    void test_run_end(const doctest::TestRunStats &s) override {
        n_run = s.numTestCasesPassingFilters;
        n_failed = s.numTestCasesFailed;
    }
    void report_query(const doctest::QueryData &) override {}
    void test_run_start() override {}
    void test_case_start(const doctest::TestCaseData &) override {}
    void test_case_reenter(const doctest::TestCaseData &) override {}
    void test_case_end(const doctest::CurrentTestCaseStats &) override {}
    void test_case_exception(const doctest::TestCaseException &) override {}
    void subcase_start(const doctest::SubcaseSignature &) override {}
    void subcase_end() override {}
    void log_assert(const doctest::AssertData &) override {}
    void log_message(const doctest::MessageData &) override {}
    void test_case_skipped(const doctest::TestCaseData &) override {}
};
REGISTER_LISTENER("count", 1, Count);

} // namespace

int main(int argc, char **argv) {
    doctest::Context context(argc, argv);
    const int status = context.run();
    if (context.shouldExit()) return status;
    std::printf("%u passed, %u failed\n", n_run - n_failed, n_failed);
    return n_run == 0 ? 1 : status; // a filter that matches nothing has tested nothing
}
