// test_fuzz.cpp: the fuzz targets over the files of tests/attacks, so that they cannot rot. Run from the repository's root.
#include "bnb_image.h"

#include "fuzz/fuzz_bnb.cpp"
#include "fuzz/fuzz_tokenizer.cpp"

using namespace test;

namespace {

std::string base_name(const std::string &path) { return path.substr(path.rfind('/') + 1); }

// A vocabulary of all bytes, a few merges and special tokens.
bnb::TokenizerData small_vocabulary() {
    bnb::TokenizerData d;
    for (int b = 0; b < 256; b++) d.tokens.push_back(std::string(1, static_cast<char>(b)));
    auto merge = [&](int32_t left, int32_t right) {
        int32_t id = static_cast<int32_t>(d.tokens.size());
        d.tokens.push_back(d.tokens[static_cast<size_t>(left)] + d.tokens[static_cast<size_t>(right)]);
        d.merges.push_back({left, right, id});
        return id;
    };
    int32_t he = merge('h', 'e'), ll = merge('l', 'l');
    merge(merge(he, ll), 'o');
    d.flags.assign(d.tokens.size(), 0);
    d.tokens.push_back("<|end|>");
    d.flags.push_back(bnb::TOKEN_ADDED | bnb::TOKEN_SPECIAL);
    d.eos = d.bos = static_cast<int32_t>(d.tokens.size()) - 1;
    d.add_bos = true;
    return d;
}

std::vector<uint8_t> tokenizer_input(const std::string &text, const std::string &chunk) {
    std::vector<uint8_t> v = {static_cast<uint8_t>(text.size()), static_cast<uint8_t>(text.size() >> 8)};
    v.insert(v.end(), text.begin(), text.end());
    v.insert(v.end(), chunk.begin(), chunk.end());
    return v;
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
    for (const std::string &path : TempDir::list("tests/attacks/tokenizer")) {
        std::vector<uint8_t> bytes = read_bytes(path);
        fuzz_tokenizer(bytes.data(), bytes.size());
    }
    const std::string text = "hello <|end|> world \xff\xc3", chunk = bnb::serialize(small_vocabulary());
    const std::vector<uint8_t> good = tokenizer_input(text, chunk);
    CHECK(fuzz_tokenizer(good.data(), good.size()) == 2);
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

} // TEST_SUITE
