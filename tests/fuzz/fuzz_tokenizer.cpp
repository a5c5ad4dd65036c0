// fuzz_tokenizer.cpp: any bytes as the tokenizer of a .bnb file and as a text for it.
//
// Fuzz:    clang++ -std=c++17 -g -O1 -fsanitize=fuzzer,address,undefined -DBNB_FUZZ tests/fuzz/fuzz_tokenizer.cpp models/tokenizer.cpp bnb.o
//              -lm -pthread -o fuzz_tokenizer, then ./fuzz_tokenizer corpus/ tests/attacks/tokenizer/
// Replay:  with -DBNB_FUZZ_REPLAY instead; tests/test_fuzz.cpp does the same in every run of the tests.
//
// The input is a u16 length, the text of that many bytes, and the tokenizer's chunk.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../models/tokenizer.h"

namespace {

void require_tokenizer(bool ok, const char *what) {
    if (ok) return;
    std::fprintf(stderr, "fuzz_tokenizer: %s\n", what);
    std::abort();
}

} // namespace

// 1: the chunk is one, 2: and is a tokenizer. Aborts where a promise was broken.
int fuzz_tokenizer(const uint8_t *data, size_t size) {
    size_t n = size >= 2 ? data[0] | data[1] << 8 : 0;
    if (size < 2 || n > size - 2) return 0;
    const std::string text(reinterpret_cast<const char *>(data + 2), n);
    const std::vector<uint8_t> chunk(data + 2 + n, data + size); // a copy: reads behind its end are seen
    bnb_error err = {};
    bnb::TokenizerData parsed;
    if (!bnb::parse(chunk.data(), chunk.size(), &parsed, &err)) {
        require_tokenizer(err.code < 0 && err.msg[0] && !std::strchr(err.msg, '\n'), "no sentence for a chunk that is refused");
        return 0;
    }
    bnb::TokenizerData again;
    const std::string stored = bnb::serialize(parsed);
    require_tokenizer(bnb::parse(stored.data(), stored.size(), &again, &err), "what serialize wrote cannot be parsed");
    require_tokenizer(again.tokens == parsed.tokens && again.flags == parsed.flags && again.merges.size() == parsed.merges.size(), "serialize lost something");
    std::unique_ptr<bnb::Tokenizer> t = bnb::Tokenizer::create(std::move(parsed), &err);
    if (!t) {
        require_tokenizer(err.code < 0 && err.msg[0] && !std::strchr(err.msg, '\n'), "no sentence for a tokenizer that is refused");
        return 1;
    }
    for (uint32_t flags = 0; flags < 8; flags++) {
        std::vector<int32_t> ids;
        t->encode(text.data(), text.size(), flags, &ids);
        bnb::Utf8Stream stream;
        std::string out;
        for (int32_t id : ids) {
            require_tokenizer(id >= 0 && id < t->size(), "an id that is not in the vocabulary");
            stream.push(t->bytes(id), &out);
        }
        stream.flush(&out);
    }
    t->bytes(-1);
    t->bytes(INT32_MAX);
    t->flags(INT32_MIN);
    t->find(text);
    return 2;
}

#ifdef BNB_FUZZ_REPLAY
#include "replay.h"
int main(int argc, char **argv) { return replay(argc, argv, fuzz_tokenizer); }
#elif defined(BNB_FUZZ)
extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_tokenizer(data, size);
    return 0;
}
#endif
