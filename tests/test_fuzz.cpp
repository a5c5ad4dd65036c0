// test_fuzz.cpp: the fuzz targets over the files of tests/attacks, so that they cannot rot. Run from the repository's root.
#include "tiny_model.h"

#include "fuzz/fuzz_bnb.cpp"
#include "fuzz/fuzz_config.cpp"
#include "fuzz/fuzz_safetensors.cpp"
#include "fuzz/fuzz_tokenizer.cpp"

using namespace test;

namespace {

std::string base_name(const std::string &path) { return path.substr(path.rfind('/') + 1); }

std::vector<uint8_t> tokenizer_input(const std::string &text, const std::string &chunk) {
    std::vector<uint8_t> v = {static_cast<uint8_t>(text.size()), static_cast<uint8_t>(text.size() >> 8)};
    v.insert(v.end(), text.begin(), text.end());
    v.insert(v.end(), chunk.begin(), chunk.end());
    return v;
}

// tests/attacks/tokenizer: what a fuzzer starts from.
void write_seeds(const std::string &dir, const std::string &text) {
    const std::string chunk = bnb::serialize(tiny_vocabulary());
    auto put = [&](const std::string &name, const std::string &bytes) { write_bytes(dir + "/" + name + ".bin", tokenizer_input(text, bytes)); };
    bnb::TokenizerData digits = tiny_vocabulary(), llama = tiny_vocabulary(), loop = tiny_vocabulary(), outside = tiny_vocabulary();
    digits.pattern = bnb::PATTERN_GPT2_DIGITS;
    digits.add_prefix_space = true;
    llama.pattern = bnb::PATTERN_LLAMA3;
    llama.ignore_merges = true;
    loop.merges[0].result = loop.merges[0].left; // not the concatenation
    outside.merges[0].right = 1 << 20;
    put("good-gpt2", chunk);
    put("good-digits", bnb::serialize(digits));
    put("good-llama3", bnb::serialize(llama));
    put("merge-result", bnb::serialize(loop));
    put("merge-outside", bnb::serialize(outside));
    put("cut", chunk.substr(0, chunk.size() / 2));
    put("too-many-tokens", std::string("\1\0\0\0\xff\xff\xff\x7f\0\0\0\0\0\0\0", 15));
}

} // namespace

TEST_SUITE("fuzz") {

TEST_CASE("fuzz: the kept attacks on the reader") {
    std::vector<std::string> files = TempDir::list("tests/attacks/bnb");
    CHECK(files.size() >= 30);
    for (const std::string &path : files) {
        CAPTURE(path);
        std::vector<uint8_t> bytes = read_bytes(path);
        int result = fuzz_bnb(bytes.data(), bytes.size());
        CHECK((base_name(path).compare(0, 4, "good") == 0) == (result == 2));
    }
}

TEST_CASE("fuzz: the target reaches what lies behind the hash") {
    Image image(Image::sample_spec());
    CHECK(fuzz_bnb(image.bytes.data(), image.bytes.size()) == 2);
    image.header().hash ^= 1;
    CHECK(fuzz_bnb(image.bytes.data(), image.bytes.size()) == 2);
    image.bytes.back() ^= 1;
    CHECK(fuzz_bnb(image.bytes.data(), image.bytes.size()) == 1);
    CHECK(fuzz_bnb(nullptr, 0) == 0);
    Rng rng(3);
    for (int i = 0; i < 200; i++) { // noise, with and without the magic
        std::vector<uint8_t> noise(static_cast<size_t>(rng.range(0, 300)));
        for (uint8_t &b : noise) b = static_cast<uint8_t>(rng.next());
        if (i % 2 && noise.size() > 64) std::memcpy(noise.data(), image.bytes.data(), 64);
        CHECK(fuzz_bnb(noise.data(), noise.size()) == 0);
    }
}

TEST_CASE("fuzz: tokenizers") {
    const std::string text = "hello <|end|> world \xff\xc3", chunk = bnb::serialize(tiny_vocabulary());
    const std::vector<uint8_t> good = tokenizer_input(text, chunk);
    CHECK(fuzz_tokenizer(good.data(), good.size()) == 2);
    if (const char *dir = std::getenv("BNB_WRITE_ATTACKS")) write_seeds(std::string(dir) + "/../tokenizer", text);
    std::vector<std::string> files = TempDir::list("tests/attacks/tokenizer");
    CHECK(files.size() >= 5);
    for (const std::string &path : files) {
        CAPTURE(path);
        std::vector<uint8_t> bytes = read_bytes(path);
        CHECK((base_name(path).compare(0, 4, "good") == 0) == (fuzz_tokenizer(bytes.data(), bytes.size()) == 2));
    }
    for (size_t n = 0; n < good.size(); n++) CHECK(fuzz_tokenizer(good.data(), n) == 0);
    Rng rng(11);
    int results[3] = {};
    for (int i = 0; i < 3000; i++) {
        std::vector<uint8_t> bad = good;
        // half of the changes hit the numbers before the tokens and those of the merges
        for (int64_t n = rng.range(1, 3); n > 0; n--) {
            int64_t end = static_cast<int64_t>(bad.size()), head = static_cast<int64_t>(2 + text.size());
            int64_t at = rng.chance(0.3) ? rng.range(head, head + 16) : rng.chance(0.3) ? rng.range(end - 12, end - 1) : rng.range(0, end - 1);
            bad[static_cast<size_t>(at)] = static_cast<uint8_t>(rng.chance(0.5) ? rng.next() : rng.range(0, 3));
        }
        results[fuzz_tokenizer(bad.data(), bad.size())]++;
    }
    for (int r : results) CHECK(r > 20); // refused as bytes, refused as a tokenizer, used
}

// Replays a corpus, then changes some bytes of its good files.
void replay_and_mutate(const std::string &dir, int (*target)(const uint8_t *, size_t), size_t least) {
    const std::vector<std::string> files = TempDir::list(dir);
    CHECK(files.size() >= least);
    Rng rng(17);
    int results[3] = {};
    for (const std::string &path : files) {
        CAPTURE(path);
        const std::vector<uint8_t> bytes = read_bytes(path);
        const bool good = base_name(path).compare(0, 4, "good") == 0;
        const int result = target(bytes.data(), bytes.size());
        if (good) CHECK(result == 2);
        for (int i = 0; good && i < 1000; i++) {
            std::vector<uint8_t> bad = bytes;
            for (int64_t n = rng.range(1, 3); n > 0; n--)
                bad[size_t(rng.range(0, int64_t(bad.size()) - 1))] =
                    uint8_t(rng.chance(0.5) ? rng.next() : '0' + rng.next() % 10);
            if (rng.chance(0.1)) bad.resize(size_t(rng.range(0, int64_t(bad.size()))));
            results[target(bad.data(), bad.size())]++;
        }
    }
    for (int r : results) CHECK(r > 20); // no file of the kind, one that is refused, one that is used
}

TEST_CASE("fuzz: safetensors and the quantized weights in them") {
    replay_and_mutate("tests/attacks/safetensors", fuzz_safetensors, 60);
}

TEST_CASE("fuzz: config.json and generation_config.json") {
    replay_and_mutate("tests/attacks/config", fuzz_config, 9);
}

} // TEST_SUITE
