// test_tokenizer.cpp: models/tokenizer.h and models/tokenizer_json.h against golden ids, against slow references that
// are written here from the definitions, and against damaged data.
#include <doctest/doctest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <set>
#include <sstream>
#include <thread>

#include <nlohmann/json.hpp>

#include "../models/tokenizer.h"
#include "../models/tokenizer_json.h"

#ifndef BNB_SOURCE_DIR
#define BNB_SOURCE_DIR "."
#endif

TEST_SUITE_BEGIN("tokenizer");

using bnb::Tokenizer;
using bnb::TokenizerData;
using Ids = std::vector<int32_t>;
using Strings = std::vector<std::string>;
using Json = nlohmann::json;

namespace {

// ---- help -----------------------------------------------------------------------------------------------------------

const char gpt2_dir[] = BNB_SOURCE_DIR "/tests/golden/gpt2";

std::string read_file(const std::string &path) {
    std::ifstream in(path, std::ios::binary);
    std::stringstream text;
    text << in.rdbuf();
    return text.str();
}

std::vector<Json> read_lines(const std::string &name) {
    std::vector<Json> lines;
    std::stringstream in(read_file(std::string(gpt2_dir) + "/" + name));
    for (std::string line; std::getline(in, line);) lines.push_back(Json::parse(line));
    REQUIRE(!lines.empty());
    return lines;
}

std::string from_hex(const std::string &hex) {
    std::string bytes;
    for (size_t i = 0; i + 1 < hex.size(); i += 2) bytes.push_back(char(std::stoi(hex.substr(i, 2), nullptr, 16)));
    return bytes;
}

TokenizerData load(const std::string &dir) {
    bnb_error err{};
    TokenizerData data;
    const bool ok = bnb::tokenizer_from_dir(dir, &data, &err);
    INFO(err.msg);
    REQUIRE(ok);
    return data;
}

std::unique_ptr<Tokenizer> create(TokenizerData data) {
    bnb_error err{};
    auto t = Tokenizer::create(std::move(data), &err);
    INFO(err.msg);
    REQUIRE(t);
    return t;
}

const Tokenizer &gpt2() {
    static const std::unique_ptr<Tokenizer> t = create(load(gpt2_dir));
    return *t;
}

Ids encode(const Tokenizer &t, const std::string &text, uint32_t flags = 0) {
    Ids ids;
    t.encode(text.data(), text.size(), flags, &ids);
    return ids;
}

std::string decode(const Tokenizer &t, const Ids &ids) {
    std::string bytes;
    for (const int32_t id : ids) bytes += t.bytes(id);
    return bytes;
}

Strings tokens(const Tokenizer &t, const Ids &ids) {
    Strings out;
    for (const int32_t id : ids) out.emplace_back(t.bytes(id));
    return out;
}

std::string utf8(uint32_t c) {
    if (c < 0x80) return {char(c)};
    if (c < 0x800) return {char(0xC0 | c >> 6), char(0x80 | (c & 63))};
    if (c < 0x10000) return {char(0xE0 | c >> 12), char(0x80 | (c >> 6 & 63)), char(0x80 | (c & 63))};
    return {char(0xF0 | c >> 18), char(0x80 | (c >> 12 & 63)), char(0x80 | (c >> 6 & 63)), char(0x80 | (c & 63))};
}

// Texts that exercise class changes, white space, contractions, merges and marks. The generator is the same everywhere.
struct RandomText {
    std::mt19937 rng;
    explicit RandomText(uint32_t seed) : rng(seed) {}
    uint32_t below(uint32_t n) { return rng() % n; }

    std::vector<uint32_t> make() {
        // clang-format off
        static const std::vector<std::u32string> alphabets = {
            U" ab", U" \n\ta1.", U"'stremvdl a", U"'STREMVDL\u017F a", U"a1 \u00A0\u3000\u2028\u0085",
            U" \r\nab12!'", U"aaaaab ", U"0123456789 a\u00B2\u2167", U" .,;:!?-_()[]{}",
            U"e\u0301\u0302 \u0928\u092E\u0938\u094D", U"\u4F60\u597D\uFF0C \u3053\u1112",
            U"\U0001F468\u200D\U0001F469\uFE0F a", U"the of and ing er 's", U"\x01\x1C\x7F\u0080 a",
            U"\uFEFF\u200B\u180E\uFFFD a1", U"etaoin shrdlu"};
        // clang-format on
        const std::u32string &alphabet = alphabets[below(uint32_t(alphabets.size()))];
        std::vector<uint32_t> text(1 + below(below(4) == 0 ? 60 : 12));
        for (uint32_t &c : text) c = below(50) == 0 ? 0 : uint32_t(alphabet[below(uint32_t(alphabet.size()))]);
        return text;
    }
};

std::string to_utf8(const std::vector<uint32_t> &text) {
    std::string s;
    for (const uint32_t c : text) s += utf8(c);
    return s;
}

// ---- references: slow, from the definitions -------------------------------------------------------------------------

// Backtracking matcher of the two regular expressions, alternative by alternative, over code points.
struct ReferenceSplitter {
    std::vector<char> classes = std::vector<char>(0x110000, 'O');

    ReferenceSplitter() {
        std::stringstream in(read_file(std::string(gpt2_dir) + "/unicode-classes.txt"));
        for (std::string line; std::getline(in, line);) {
            std::stringstream fields(line);
            std::string name, first, last;
            if (line.empty() || line[0] == '#' || !(fields >> name >> first >> last)) continue;
            for (unsigned long c = std::stoul(first, nullptr, 16); c <= std::stoul(last, nullptr, 16); ++c)
                classes[c] = name[0];
        }
    }

    using Text = std::vector<uint32_t>;

    char at(const Text &t, size_t i) const { return i < t.size() ? classes[t[i]] : '$'; }

    size_t run(const Text &t, size_t i, const std::string &wanted) const {
        size_t n = 0;
        while (wanted.find(at(t, i + n)) != std::string::npos) ++n;
        return n;
    }

    static bool is_break(const Text &t, size_t i) { return i < t.size() && (t[i] == '\r' || t[i] == '\n'); }

    static size_t contraction(const Text &t, size_t i, bool any_case) {
        for (const std::string word : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"}) {
            size_t n = 0;
            for (; n < word.size() && i + n < t.size(); ++n) {
                uint32_t c = t[i + n];
                if (any_case && c >= 'A' && c <= 'Z') c += 32;
                if (any_case && c == 0x17F) c = 's';
                if (c != uint32_t(word[n])) break;
            }
            if (n == word.size()) return n;
        }
        return 0;
    }

    // \s+(?!\S)|\s+
    size_t spaces(const Text &t, size_t i) const {
        const size_t all = run(t, i, "S");
        for (size_t n = all; n > 0; --n)
            if (at(t, i + n) == 'S' || at(t, i + n) == '$') return n;
        return all;
    }

    size_t gpt2(const Text &t, size_t i) const {
        if (size_t n = contraction(t, i, false)) return n;
        for (const char *wanted : {"L", "N", "O"}) {
            const size_t space = t[i] == ' ' ? 1 : 0;
            for (const size_t skip : {space, size_t(0)})
                if (size_t n = run(t, i + skip, wanted)) return skip + n;
        }
        return spaces(t, i);
    }

    size_t llama3(const Text &t, size_t i) const {
        if (size_t n = contraction(t, i, true)) return n;
        const bool may_lead = !is_break(t, i) && at(t, i) != 'L' && at(t, i) != 'N';
        for (const size_t skip : {size_t(may_lead), size_t(0)})
            if (size_t n = run(t, i + skip, "L")) return skip + n;
        if (size_t n = run(t, i, "N")) return std::min<size_t>(n, 3);
        for (const size_t skip : {size_t(t[i] == ' '), size_t(0)})
            if (size_t n = run(t, i + skip, "O")) {
                n += skip;
                while (is_break(t, i + n)) ++n;
                return n;
            }
        for (size_t n = run(t, i, "S"); n > 0; --n) // \s* gives back until [\r\n]+ matches
            if (is_break(t, i + n - 1)) return n;
        return spaces(t, i);
    }

    Strings split(int32_t pattern, const Text &text) const {
        Strings pieces;
        const auto pieces_of = [&](const Text &t) {
            for (size_t i = 0, n; i < t.size(); i += n) {
                n = pattern == bnb::PATTERN_LLAMA3 ? llama3(t, i) : gpt2(t, i);
                pieces.push_back(to_utf8(Text(t.begin() + ptrdiff_t(i), t.begin() + ptrdiff_t(i + n))));
            }
        };
        Text part;
        for (const uint32_t c : text) {
            if (pattern == bnb::PATTERN_GPT2_DIGITS && classes[c] == 'N') {
                pieces_of(part);
                pieces_of({c});
                part.clear();
            } else {
                part.push_back(c);
            }
        }
        pieces_of(part);
        return pieces;
    }
};

const ReferenceSplitter &reference_splitter() {
    static const ReferenceSplitter r;
    return r;
}

// Merges all occurrences of the pair of lowest rank, left to right, until no pair has a rank.
struct ReferenceBpe {
    std::map<std::pair<std::string, std::string>, size_t> ranks;
    std::map<std::string, int32_t> ids;

    explicit ReferenceBpe(const TokenizerData &data) {
        for (size_t i = 0; i < data.tokens.size(); ++i) ids.emplace(data.tokens[i], int32_t(i));
        for (size_t i = 0; i < data.merges.size(); ++i)
            ranks[{data.tokens[size_t(data.merges[i].left)], data.tokens[size_t(data.merges[i].right)]}] = i;
    }

    void encode(const std::string &piece, Ids *out) const {
        Strings symbols;
        for (const char c : piece) symbols.emplace_back(1, c);
        for (;;) {
            auto best = ranks.end();
            for (size_t i = 0; i + 1 < symbols.size(); ++i) {
                const auto found = ranks.find({symbols[i], symbols[i + 1]});
                if (found != ranks.end() && (best == ranks.end() || found->second < best->second)) best = found;
            }
            if (best == ranks.end()) break;
            Strings merged;
            for (size_t i = 0; i < symbols.size(); ++i) {
                if (i + 1 < symbols.size() && symbols[i] == best->first.first && symbols[i + 1] == best->first.second)
                    merged.push_back(symbols[i] + symbols[i + 1]), ++i;
                else merged.push_back(symbols[i]);
            }
            symbols = merged;
        }
        for (const std::string &s : symbols) out->push_back(ids.at(s));
    }
};

// Replaces maximal ill-formed subparts, knowing only which byte strings begin the encoding of a code point.
struct ReferenceRepair {
    std::set<std::string> beginnings; // proper ones

    ReferenceRepair() {
        for (uint32_t c = 0x80; c < 0x110000; ++c) {
            if (c == 0xD800) c = 0xE000;
            const std::string s = utf8(c);
            if (c % 64 == 0)
                for (size_t n = 1; n < s.size(); ++n) beginnings.insert(s.substr(0, n));
        }
    }

    std::string repair(const std::string &bytes) const {
        std::string text;
        for (size_t i = 0, n; i < bytes.size(); i += n) {
            for (n = 0; i + n < bytes.size() && beginnings.count(bytes.substr(i, n + 1));) ++n;
            const uint8_t lead = uint8_t(bytes[i]);
            const size_t length = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
            const bool last_fits = i + n < bytes.size() && (length == 1 || uint8_t(bytes[i + n]) >> 6 == 2);
            const bool whole = n + 1 == length && last_fits;
            text += whole ? bytes.substr(i, length) : "\uFFFD";
            n = whole ? length : std::max<size_t>(n, 1);
        }
        return text;
    }
};

const ReferenceBpe &reference_bpe() {
    static const ReferenceBpe r(gpt2().data());
    return r;
}

Strings split(int32_t pattern, const std::string &text) {
    std::vector<std::string_view> views;
    bnb::pattern_split(*bnb::pattern_find(pattern), text, &views);
    return Strings(views.begin(), views.end());
}

// ---- small vocabularies ---------------------------------------------------------------------------------------------

int32_t add(TokenizerData *d, const std::string &token, uint8_t flags = 0) {
    d->tokens.push_back(token);
    d->flags.push_back(flags);
    return int32_t(d->tokens.size()) - 1;
}

int32_t add_merge(TokenizerData *d, int32_t left, int32_t right) {
    const int32_t result = add(d, d->tokens[size_t(left)] + d->tokens[size_t(right)]);
    d->merges.push_back({left, right, result});
    return result;
}

// All bytes (id = byte), "ab", "abab", " ab", and the special token </s>.
TokenizerData small_vocabulary() {
    TokenizerData d;
    for (int b = 0; b < 256; ++b) add(&d, std::string(1, char(b)));
    const int32_t ab = add_merge(&d, 'a', 'b');
    add_merge(&d, ab, ab);
    add_merge(&d, ' ', ab);
    d.bos = d.eos = d.unk = add(&d, "</s>", bnb::TOKEN_ADDED | bnb::TOKEN_SPECIAL);
    return d;
}

bool same(const TokenizerData &a, const TokenizerData &b) {
    const auto same_merge = [](const TokenizerData::Merge &x, const TokenizerData::Merge &y) {
        return x.left == y.left && x.right == y.right && x.result == y.result;
    };
    return a.tokens == b.tokens && a.flags == b.flags && a.merges.size() == b.merges.size() &&
           std::equal(a.merges.begin(), a.merges.end(), b.merges.begin(), same_merge) && a.pattern == b.pattern &&
           a.add_prefix_space == b.add_prefix_space && a.ignore_merges == b.ignore_merges && a.add_bos == b.add_bos &&
           a.add_eos == b.add_eos && a.bos == b.bos && a.eos == b.eos && a.unk == b.unk && a.pad == b.pad;
}

// A directory for Hugging Face files, removed at the end of the test.
struct Directory {
    std::filesystem::path path;

    Directory() {
        static int n = 0;
        std::random_device random;
        path = std::filesystem::temp_directory_path() /
               ("bnb-tokenizer-" + std::to_string(random()) + "-" + std::to_string(n++));
        std::filesystem::create_directories(path);
    }
    Directory(const Directory &) = delete;
    ~Directory() { std::filesystem::remove_all(path); }

    Directory &write(const std::string &name, const std::string &text) {
        std::ofstream(path / name, std::ios::binary) << text;
        return *this;
    }

    std::string error() const // what tokenizer_from_dir says; "" if it succeeds
    {
        bnb_error err{};
        TokenizerData data;
        return bnb::tokenizer_from_dir(path.string(), &data, &err) ? "" : err.msg;
    }
};

bool contains(const std::string &text, const std::string &part) { return text.find(part) != std::string::npos; }

// vocab.json of all bytes, "ab" and some tokens of OPT's kind
Json small_vocab_json() {
    Json vocab = {{"<s>", 0}, {"<pad>", 1}, {"</s>", 2}, {"<unk>", 3}};
    for (int b = 0; b < 256; ++b) vocab[bnb::bytes_to_alphabet(std::string(1, char(b)))] = 4 + b;
    vocab["ab"] = 260;
    return vocab;
}

Json small_tokenizer_json() {
    return {{"added_tokens", Json::array()},
            {"normalizer", nullptr},
            {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}}},
            {"post_processor", nullptr},
            {"model", {{"type", "BPE"}, {"vocab", small_vocab_json()}, {"merges", {"a b"}}}}};
}

} // namespace

// ---- GPT-2 ----------------------------------------------------------------------------------------------------------

TEST_CASE("tokenizer: GPT-2 conformance") {
    for (const Json &line : read_lines("conformance.jsonl")) {
        const std::string text = from_hex(line["utf8_hex"]);
        INFO(line["id"].get<std::string>());
        CHECK(split(bnb::PATTERN_GPT2, text) == line["pieces"].get<Strings>());
        CHECK(encode(gpt2(), text) == line["gpt2_ids"].get<Ids>());
        CHECK(decode(gpt2(), encode(gpt2(), text)) == text);
    }
}

TEST_CASE("tokenizer: GPT-2 conformance, ill-formed UTF-8") {
    for (const Json &line : read_lines("conformance-invalid-utf8.jsonl")) {
        const std::string text = from_hex(line["bytes_hex"]);
        INFO(line["id"].get<std::string>());
        CHECK(encode(gpt2(), text) == line["replace_ids"].get<Ids>());
        CHECK(decode(gpt2(), encode(gpt2(), text)) == line["replaced_text"].get<std::string>());
        CHECK(encode(gpt2(), text, bnb::ENCODE_RAW_BYTES) == line["raw_ids"].get<Ids>());
        CHECK(decode(gpt2(), encode(gpt2(), text, bnb::ENCODE_RAW_BYTES)) == text);
    }
}

TEST_CASE("tokenizer: vocab.bpe alone determines GPT-2's ids") {
    Directory d;
    d.write("vocab.bpe", read_file(std::string(gpt2_dir) + "/merges.txt"));
    CHECK(same(load(d.path.string()), gpt2().data()));
    d.write("encoder.json", read_file(std::string(gpt2_dir) + "/vocab.json"));
    CHECK(same(load(d.path.string()), gpt2().data()));
    CHECK(gpt2().size() == 50257);
    CHECK(gpt2().data().eos == 50256);
    CHECK(gpt2().data().add_bos == false);
}

TEST_CASE("tokenizer: special tokens in GPT-2 text") {
    const std::string text = "a<|endoftext|>b";
    CHECK(encode(gpt2(), text, bnb::ENCODE_PARSE_SPECIAL) == Ids{64, 50256, 65});
    CHECK(encode(gpt2(), text).size() == 9);
    CHECK(encode(gpt2(), "", bnb::ENCODE_ADD_SPECIAL).empty());
    CHECK(gpt2().find("<|endoftext|>") == 50256);
    CHECK(gpt2().find(" the") == 262);
    CHECK(gpt2().find("no such token") == -1);
    CHECK(gpt2().bytes(-1).empty());
    CHECK(gpt2().bytes(50257).empty());
    CHECK(gpt2().flags(50256) == (bnb::TOKEN_ADDED | bnb::TOKEN_SPECIAL));
}

// ---- against the references -----------------------------------------------------------------------------------------

TEST_CASE("tokenizer: every code point is split as the class list says") {
    for (uint32_t page = 0; page < 0x110000; page += 256) {
        if (page >= 0xD800 && page < 0xE000) continue; // surrogates
        std::vector<uint32_t> text;
        for (uint32_t c = page; c < page + 256; ++c) text.insert(text.end(), {'a', c, 'a', ' ', c, '1', c, '.'});
        INFO(page);
        CHECK(split(bnb::PATTERN_GPT2, to_utf8(text)) == reference_splitter().split(bnb::PATTERN_GPT2, text));
    }
}

TEST_CASE("tokenizer: random texts are split as the regular expressions say") {
    RandomText random(1);
    for (int i = 0; i < 40000; ++i) {
        const std::vector<uint32_t> text = random.make();
        for (const int32_t pattern : {bnb::PATTERN_GPT2, bnb::PATTERN_GPT2_DIGITS, bnb::PATTERN_LLAMA3}) {
            const Strings pieces = split(pattern, to_utf8(text)), expected = reference_splitter().split(pattern, text);
            if (pieces == expected) continue;
            INFO(Json(expected).dump(-1, ' ', true));
            CHECK(pieces == expected);
        }
    }
}

TEST_CASE("tokenizer: random texts are encoded as by plain BPE") {
    RandomText random(2);
    for (int i = 0; i < 4000; ++i) {
        const std::vector<uint32_t> text = random.make();
        Ids expected;
        for (const std::string &piece : reference_splitter().split(bnb::PATTERN_GPT2, text))
            reference_bpe().encode(piece, &expected);
        if (encode(gpt2(), to_utf8(text)) != expected) CHECK(encode(gpt2(), to_utf8(text)) == expected);
    }
}

TEST_CASE("tokenizer: short and long pieces are merged alike") {
    std::mt19937 rng(3);
    for (const std::string alphabet : {"a", "ab", "aab", "etaoinsh", "-", "=-_", "thequickbrownfox"})
        for (size_t n : {1, 2, 3, 15, 16, 17, 46, 47, 48, 49, 50, 63, 64, 65, 100, 257, 700}) {
            std::string piece;
            for (size_t i = 0; i < n; ++i) piece += alphabet[rng() % alphabet.size()];
            Ids expected;
            reference_bpe().encode(piece, &expected);
            CHECK(encode(gpt2(), piece) == expected);
        }
}

TEST_CASE("tokenizer: any bytes come back with ENCODE_RAW_BYTES") {
    std::mt19937 rng(4);
    for (int i = 0; i < 3000; ++i) {
        std::string text;
        for (size_t n = rng() % 40; n > 0; --n) text += rng() % 2 ? char(rng()) : " a'\xE2\x82\xED\xF0\x9F"[rng() % 8];
        const Ids ids = encode(gpt2(), text, bnb::ENCODE_RAW_BYTES | bnb::ENCODE_PARSE_SPECIAL);
        if (decode(gpt2(), ids) != text) CHECK(decode(gpt2(), ids) == text);
        CHECK(std::count(ids.begin(), ids.end(), -1) == 0);
    }
}

TEST_CASE("tokenizer: long texts without a break") {
    const std::string same_letter(1 << 20, 'a');
    const Ids ids = encode(gpt2(), same_letter); // quadratic work would take hours here
    CHECK(decode(gpt2(), ids) == same_letter);
    CHECK(ids.size() == (1 << 18)); // "aaaa" is the longest
    std::mt19937 rng(5);
    std::string no_spaces;
    for (int i = 0; i < 100000; ++i) no_spaces += char('a' + rng() % 26);
    CHECK(decode(gpt2(), encode(gpt2(), no_spaces)) == no_spaces);
    const std::string spaces(1 << 20, ' ');
    CHECK(decode(gpt2(), encode(gpt2(), spaces)) == spaces);
    const std::string brackets(1 << 20, '<'); // each could begin <|endoftext|>
    CHECK(decode(gpt2(), encode(gpt2(), brackets, bnb::ENCODE_PARSE_SPECIAL)) == brackets);
}

TEST_CASE("tokenizer: threads share one tokenizer") {
    const std::string text = read_file(std::string(gpt2_dir) + "/conformance.jsonl");
    const Ids expected = encode(gpt2(), text);
    std::vector<Ids> results(4);
    std::vector<std::thread> threads;
    for (Ids &r : results) threads.emplace_back([&] { r = encode(gpt2(), text); });
    for (std::thread &t : threads) t.join();
    for (const Ids &r : results) CHECK(r == expected);
}

// ---- other patterns -------------------------------------------------------------------------------------------------

TEST_CASE("tokenizer: the patterns of Llama 3 and SmolLM2") {
    CHECK(split(bnb::PATTERN_LLAMA3, "1234567") == Strings{"123", "456", "7"});
    CHECK(split(bnb::PATTERN_LLAMA3, "a\r\n\nb") == Strings{"a", "\r\n\n", "b"});
    CHECK(split(bnb::PATTERN_LLAMA3, "I'M \n  x!!\n\n") == Strings{"I", "'M", " \n", " ", " x", "!!\n\n"});
    CHECK(split(bnb::PATTERN_LLAMA3, "'\u017Fx'K") == Strings{"'\u017F", "x", "'K"});
    CHECK(split(bnb::PATTERN_LLAMA3, "a\tb \t c") == Strings{"a", "\tb", " \t", " c"});
    CHECK(split(bnb::PATTERN_GPT2_DIGITS, "a 12 b") == Strings{"a", " ", "1", "2", " b"});
    CHECK(split(bnb::PATTERN_GPT2_DIGITS, "x1\u00B2") == Strings{"x", "1", "\u00B2"});
    CHECK(split(bnb::PATTERN_GPT2_DIGITS, "a  1") == Strings{"a", "  ", "1"});
}

TEST_CASE("tokenizer: ignore_merges takes a whole piece that is a token") {
    TokenizerData d = small_vocabulary();
    const int32_t word = add(&d, "abc"); // no merge makes it
    const Strings longer = {"abcdefghijklmnop", "abcdefghijklmnopq",
                            "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz"};
    const int32_t first = add(&d, longer[0]);
    for (size_t i = 1; i < longer.size(); ++i) add(&d, longer[i]);
    CHECK(encode(*create(d), "abc") == Ids{256, 'c'});
    d.ignore_merges = true;
    CHECK(encode(*create(d), "abc") == Ids{word});
    CHECK(encode(*create(d), "abcd") == Ids{256, 'c', 'd'});
    for (size_t i = 0; i < longer.size(); ++i) CHECK(encode(*create(d), longer[i]) == Ids{first + int32_t(i)});
}

// ---- added tokens ---------------------------------------------------------------------------------------------------

TEST_CASE("tokenizer: bos, eos, unk and the prefix space") {
    TokenizerData d = small_vocabulary();
    d.add_bos = true; // as OPT does
    const int32_t end = d.eos;
    CHECK(encode(*create(d), "ab", bnb::ENCODE_ADD_SPECIAL) == Ids{end, 256});
    CHECK(encode(*create(d), "", bnb::ENCODE_ADD_SPECIAL) == Ids{end});
    CHECK(encode(*create(d), "ab") == Ids{256});
    d.add_eos = true;
    CHECK(encode(*create(d), "ab", bnb::ENCODE_ADD_SPECIAL) == Ids{end, 256, end});

    d.add_prefix_space = true;
    CHECK(tokens(*create(d), encode(*create(d), "ab</s>ab</s> ab</s></s>", bnb::ENCODE_PARSE_SPECIAL)) ==
          Strings{" ab", "</s>", " ab", "</s>", " ab", "</s>", "</s>"});
    CHECK(encode(*create(d), "").empty());

    TokenizerData sparse;
    add(&sparse, "a");
    CHECK(encode(*create(sparse), "aba") == Ids{0, 0}); // no unk: nothing
    sparse.unk = add(&sparse, "<unk>", bnb::TOKEN_ADDED | bnb::TOKEN_SPECIAL);
    CHECK(encode(*create(sparse), "aba") == Ids{0, 1, 0});
}

TEST_CASE("tokenizer: added tokens are cut out, the longest first, with their options") {
    TokenizerData d = small_vocabulary();
    add(&d, "fo", bnb::TOKEN_ADDED | bnb::TOKEN_NORMALIZED);
    add(&d, "food", bnb::TOKEN_ADDED);
    add(&d, "foo", bnb::TOKEN_ADDED | bnb::TOKEN_SINGLE_WORD);
    add(&d, "[L]", bnb::TOKEN_ADDED | bnb::TOKEN_LSTRIP);
    add(&d, "[R]", bnb::TOKEN_ADDED | bnb::TOKEN_RSTRIP);
    add(&d, " B", bnb::TOKEN_ADDED);
    const auto t = create(d);
    const auto cut = [&](const std::string &text) { return tokens(*t, encode(*t, text)); };
    // Expected values: the tokenizers package, 0.23.
    CHECK(cut("foods") == Strings{"food", "s"});
    CHECK(cut("foo") == Strings{"foo"});
    CHECK(cut("foo.") == Strings{"foo", "."});
    CHECK(cut("foox") == Strings{"fo", "o", "x"});
    CHECK(cut("_foo") == Strings{"_", "fo", "o"});
    CHECK(cut("foo1") == Strings{"fo", "o", "1"});
    CHECK(cut("foo\u0301") == Strings{"fo", "o", "\xCC", "\x81"});
    CHECK(cut("\u00BDfoo") == Strings{"\xC2", "\xBD", "foo"}); // a number, but not part of a word
    CHECK(cut("foo\u200B") == Strings{"foo", "\xE2", "\x80", "\x8B"});
    CHECK(cut("x  [L]  y") == Strings{"x", "[L]", " ", " ", "y"});
    CHECK(cut("[R]  [L]") == Strings{"[R]", "[L]"});
    CHECK(cut("[R] \u3000x") == Strings{"[R]", "x"});
    CHECK(cut("[R] B") == Strings{"[R]", " B"});
    CHECK(cut("x\xE3[L]").back() == "[L]"); // ill-formed text before a token
    CHECK(cut("</s>").size() == 4);
    const Ids raw = encode(*t,
                           "\x80\x80[L]\xFF"
                           "foo\xE2",
                           bnb::ENCODE_RAW_BYTES);
    CHECK(tokens(*t, raw) == Strings{"\x80", "\x80", "[L]", "\xFF", "foo", "\xE2"});
}

TEST_CASE("tokenizer: no vocabulary makes added tokens quadratic") {
    TokenizerData d = small_vocabulary();
    add(&d, "  ", bnb::TOKEN_ADDED | bnb::TOKEN_LSTRIP | bnb::TOKEN_RSTRIP);
    for (size_t n = 2; n < 300; ++n) add(&d, std::string(n, '<'), bnb::TOKEN_ADDED | bnb::TOKEN_SINGLE_WORD);
    const auto t = create(d);
    CHECK(!encode(*t, std::string(1 << 20, ' ')).empty());
    CHECK(!encode(*t, std::string(1 << 20, '<')).empty());
}

// ---- the chunk ------------------------------------------------------------------------------------------------------

TEST_CASE("tokenizer: serialize and parse are inverse") {
    TokenizerData d = small_vocabulary();
    d.pad = add(&d, std::string("\0x", 2));
    d.bos = add(&d, "");
    d.merges.push_back({'a', 'c', add(&d, "ac")});
    std::swap(d.merges[0], d.merges[1]); // results not in order
    d.pattern = bnb::PATTERN_LLAMA3;
    for (int options = 0; options < 16; ++options) {
        d.add_prefix_space = options & 1, d.ignore_merges = options & 2, d.add_bos = options & 4,
        d.add_eos = options & 8;
        const std::string chunk = bnb::serialize(d);
        TokenizerData back;
        REQUIRE(bnb::parse(chunk.data(), chunk.size(), &back, nullptr));
        CHECK(same(d, back));
        CHECK(bnb::serialize(back) == chunk);
    }
    const std::string chunk = bnb::serialize(gpt2().data());
    TokenizerData back;
    REQUIRE(bnb::parse(chunk.data(), chunk.size(), &back, nullptr));
    CHECK(same(gpt2().data(), back));
    CHECK(chunk.size() < 700000);
}

TEST_CASE("tokenizer: truncated and damaged chunks") {
    const std::string chunk = bnb::serialize(small_vocabulary());
    for (size_t n = 0; n < chunk.size(); ++n) {
        bnb_error err{};
        TokenizerData data;
        const std::vector<char> exact(chunk.begin(), chunk.begin() + ptrdiff_t(n)); // so that ASan sees reads beyond it
        CHECK(!bnb::parse(exact.data(), n, &data, &err));
        CHECK(err.code != 0);
        CHECK(contains(err.msg, "tokenizer data"));
        CHECK(data.tokens.empty());
    }
    CHECK(!bnb::parse((chunk + "x").data(), chunk.size() + 1, nullptr, nullptr));
    size_t accepted = 0;
    for (size_t bit = 0; bit < chunk.size() * 8; ++bit) {
        std::string damaged = chunk;
        damaged[bit / 8] = char(damaged[bit / 8] ^ (1 << bit % 8));
        bnb_error err{};
        TokenizerData data;
        if (!bnb::parse(damaged.data(), damaged.size(), &data, &err)) {
            CHECK(contains(err.msg, "tokenizer data"));
            continue;
        }
        const auto t = Tokenizer::create(std::move(data), &err);
        if (!t) CHECK(contains(err.msg, "tokenizer: "));
        if (!t) continue;
        ++accepted;
        CHECK(encode(*t, "abab ab </s>\xFF", bnb::ENCODE_ADD_SPECIAL | bnb::ENCODE_PARSE_SPECIAL).size() < 100);
    }
    CHECK(accepted > 0); // letters of tokens that no merge uses, for one
}

TEST_CASE("tokenizer: huge counts allocate nothing") {
    for (const std::string header :
         {"\xFF\xFF\xFF\xFF\x0F\x00", "\x01\xFF\xFF\xFF\xFF\x0F", "\xFF\xFF\xFF\xFF\xFF\x0F"}) {
        std::string chunk = std::string("\1\0\0\0", 4) + header + std::string(20, '\0');
        bnb_error err{};
        TokenizerData data;
        CHECK(!bnb::parse(chunk.data(), chunk.size(), &data, &err));
        CHECK(err.code == BNB_E_FORMAT);
    }
    bnb_error err{};
    TokenizerData data;
    CHECK(!bnb::parse("\1\0\0\0\xFF\xFF\x7F\0\0\0\0\0\0\0\0\0", 16, &data, &err)); // 2097151 tokens
    CHECK(contains(err.msg, "do not fit"));
    CHECK(!bnb::parse("\2\0\0\0\0\0\0\0", 8, &data, &err));
    CHECK(err.code == BNB_E_UNSUPPORTED);
}

TEST_CASE("tokenizer: create names what is wrong") {
    const auto error = [](void (*damage)(TokenizerData *)) {
        TokenizerData d = small_vocabulary();
        damage(&d);
        bnb_error err{};
        return Tokenizer::create(std::move(d), &err) ? std::string() : std::string(err.msg);
    };
    CHECK(contains(error([](TokenizerData *d) { d->bos = 260; }), "bos token has id 260"));
    CHECK(contains(error([](TokenizerData *d) { d->pad = -2; }), "pad token has id -2"));
    CHECK(contains(error([](TokenizerData *d) { d->merges[1].result = 1000; }), "merge 1 uses id 1000"));
    CHECK(contains(error([](TokenizerData *d) { d->merges[1].left = -1; }), "merge 1 uses id -1"));
    CHECK(contains(error([](TokenizerData *d) { d->merges[2].left = 'x'; }), "merge 2 joins"));
    CHECK(contains(error([](TokenizerData *d) { d->tokens['a'].clear(); }), "merge 0 uses id 97"));
    CHECK(contains(error([](TokenizerData *d) { d->pattern = 99; }), "pre-tokenizer 99"));
    CHECK(contains(error([](TokenizerData *d) { d->flags.pop_back(); }), "flags"));
    CHECK(contains(error([](TokenizerData *d) { *d = TokenizerData(); }), "0 tokens"));
    CHECK(contains(error([](TokenizerData *d) { d->add_bos = true, d->bos = -1; }), "bos"));
    CHECK(contains(error([](TokenizerData *d) { d->tokens[0].assign(70000, 'x'); }), "70000 bytes"));
    CHECK(Tokenizer::create(TokenizerData(), nullptr) == nullptr);
}

// ---- UTF-8 ----------------------------------------------------------------------------------------------------------

TEST_CASE("tokenizer: a stream in any parts gives the same text") {
    const auto all_at_once = [](const std::string &bytes) {
        bnb::Utf8Stream s;
        std::string text;
        s.push(bytes, &text);
        s.flush(&text);
        return text;
    };
    const Strings cases = {"abc",
                           "\u00E9\u20AC\U0001F600",
                           "\xE2\x82",
                           "\xE2\x82x",
                           "\xF0\x9F\x98",
                           "\xF0\x9F\x98\x80\xF0\x9F",
                           "\xC3",
                           "\xFF\xFE",
                           "\xC0\xAF",
                           "\xED\xA0\x80",
                           "\xE0\x80\x80",
                           "\xF4\x90\x80\x80",
                           "\xF5\x80\x80\x80",
                           "\x80\x80",
                           "a\xE2\x82\xE2\x82\xAC"
                           "b",
                           "\xF0\x90\x80\xF0\x90\x80\x80",
                           std::string("\0\xC3\0", 3)};
    for (const std::string &bytes : cases) {
        const std::string expected = all_at_once(bytes);
        for (uint32_t cuts = 0; cuts < (1u << (bytes.size() - 1)); ++cuts) { // bit i: a part ends after byte i
            bnb::Utf8Stream s;
            std::string text, part;
            for (size_t i = 0; i < bytes.size(); ++i) {
                part += bytes[i];
                if (i + 1 < bytes.size() && !(cuts >> i & 1)) continue;
                s.push(part, &text);
                CHECK(all_at_once(text) == text); // well-formed after every part
                part.clear();
            }
            s.flush(&text);
            CHECK(text == expected);
        }
    }
    for (const Json &line : read_lines("conformance-invalid-utf8.jsonl"))
        CHECK(all_at_once(from_hex(line["bytes_hex"])) == line["replaced_text"].get<std::string>());
}

TEST_CASE("tokenizer: random bytes are repaired as the definition says") {
    const std::string bytes("\x00\x41\x7F\x80\x8F\x90\x9F\xA0\xBF\xC0\xC1\xC2\xDF\xE0\xE1\xEC\xED\xEE\xEF\xF0\xF1\xF3"
                            "\xF4\xF5\xFF\x80\x80\xBF",
                            28);
    const ReferenceRepair reference;
    std::mt19937 rng(7);
    for (int i = 0; i < 50000; ++i) {
        std::string text, got;
        for (size_t n = 1 + rng() % 6; n > 0; --n) text += bytes[rng() % bytes.size()];
        bnb::Utf8Stream s;
        s.push(text, &got);
        s.flush(&got);
        if (got != reference.repair(text)) CHECK(got == reference.repair(text));
        if (i % 10 == 0) CHECK(encode(gpt2(), text) == encode(gpt2(), got));
    }
}

TEST_CASE("tokenizer: a stream holds back only what can still become a character") {
    bnb::Utf8Stream s;
    std::string text;
    s.push(gpt2().bytes(47249), &text); // F0 9F 98
    CHECK(text.empty());
    s.push(gpt2().bytes(222), &text); // 80
    CHECK(text == "\U0001F600");
    s.push("\xE0", &text);
    s.push("\x80", &text); // after E0 only A0..BF can follow: both are wrong at once
    CHECK(text == "\U0001F600\uFFFD\uFFFD");
    s.push("\xC3", &text);
    s.flush(&text);
    s.push("a", &text);
    CHECK(text == "\U0001F600\uFFFD\uFFFD\uFFFDa");
}

TEST_CASE("tokenizer: the byte alphabet") {
    std::string all;
    for (int b = 0; b < 256; ++b) all += char(b);
    std::string back;
    CHECK(bnb::alphabet_to_bytes(bnb::bytes_to_alphabet(all), &back));
    CHECK(back == all);
    CHECK(bnb::bytes_to_alphabet(" \n\x7F\xA0\xAD") == "\u0120\u010A\u0121\u0142\u0143");
    for (const std::string bad : {" ", "\u0144", "\u00AD", "\u4E00", "\xFF"})
        CHECK(!bnb::alphabet_to_bytes(bad, &back));
}

// ---- Hugging Face directories ---------------------------------------------------------------------------------------

TEST_CASE("tokenizer: OPT's rules from vocab.json, merges.txt and tokenizer_config.json") {
    Json config = {{"tokenizer_class", "GPT2Tokenizer"},
                   {"add_bos_token", true},
                   {"bos_token", {{"content", "</s>"}}},
                   {"eos_token", "</s>"},
                   {"unk_token", "</s>"},
                   {"pad_token", "<pad>"}};
    Directory d;
    d.write("vocab.json", small_vocab_json().dump()).write("merges.txt", "#version: 0.2\na b\n");
    d.write("tokenizer_config.json", config.dump());
    TokenizerData data = load(d.path.string());
    CHECK(data.add_bos);
    CHECK(!data.add_eos);
    CHECK(data.bos == 2);
    CHECK(data.eos == 2);
    CHECK(data.pad == 1);
    CHECK(encode(*create(data), "ab", bnb::ENCODE_ADD_SPECIAL) == Ids{2, 260});

    config.erase("add_bos_token"); // old copies do not have it
    d.write("tokenizer_config.json", config.dump());
    CHECK(load(d.path.string()).add_bos);
    config["add_bos_token"] = false;
    d.write("tokenizer_config.json", config.dump());
    CHECK(!load(d.path.string()).add_bos);

    std::filesystem::remove(d.path / "tokenizer_config.json");
    d.write("special_tokens_map.json", R"({"eos_token": "</s>", "additional_special_tokens": ["<s>"]})");
    d.write("added_tokens.json", R"({"<new>": 261})");
    data = load(d.path.string());
    CHECK(data.eos == 2);
    CHECK(data.bos == -1);
    CHECK(data.tokens[261] == "<new>");
    CHECK(data.flags[261] == (bnb::TOKEN_ADDED | bnb::TOKEN_NORMALIZED));
    CHECK(data.flags[0] == (bnb::TOKEN_ADDED | bnb::TOKEN_SPECIAL));
}

TEST_CASE("tokenizer: merges may contain '#' and CRLF line ends") {
    Json vocab = small_vocab_json();
    vocab["##"] = 261;
    Directory d;
    d.write("vocab.json", vocab.dump()).write("merges.txt", "# #\r\na b\r\n");
    const TokenizerData data = load(d.path.string());
    CHECK(data.merges.size() == 2);
    CHECK(encode(*create(data), "##ab") == Ids{261, 260});
}

TEST_CASE("tokenizer: tokenizer.json comes back from tokenizer_to_json") {
    TokenizerData d = small_vocabulary();
    d.add_bos = d.add_eos = true;
    add(&d, "[L R]", bnb::TOKEN_ADDED | bnb::TOKEN_LSTRIP | bnb::TOKEN_RSTRIP | bnb::TOKEN_SINGLE_WORD);
    add(&d, "\u00E9", bnb::TOKEN_ADDED | bnb::TOKEN_NORMALIZED | bnb::TOKEN_SPECIAL);
    for (const int32_t pattern : {bnb::PATTERN_GPT2, bnb::PATTERN_GPT2_DIGITS, bnb::PATTERN_LLAMA3}) {
        d.pattern = pattern;
        d.ignore_merges = pattern == bnb::PATTERN_LLAMA3;
        d.add_prefix_space = pattern == bnb::PATTERN_GPT2;
        d.tokens.back() = "<\u00E9 >"; // not in the byte alphabet
        Directory dir;
        dir.write("tokenizer.json", bnb::tokenizer_to_json(d));
        TokenizerData back = load(dir.path.string());
        CHECK(back.unk == -1); // named by tokenizer_config.json
        back.unk = d.unk;
        CHECK(same(d, back));
    }
}

TEST_CASE("tokenizer: tokenizer.json with a template, added tokens and a configuration") {
    Json j = small_tokenizer_json();
    j["model"]["merges"] = Json::array({Json::array({"a", "b"})}); // the newer form
    j["added_tokens"] = {{{"id", 2}, {"content", "</s>"}, {"special", true}},
                         {{"id", 300}, {"content", "<x>"}, {"rstrip", true}}};
    j["post_processor"] = {{"type", "Sequence"},
                           {"processors",
                            {{{"type", "ByteLevel"}},
                             {{"type", "TemplateProcessing"},
                              {"single", {{{"SpecialToken", {{"id", "<s>"}}}}, {{"Sequence", {{"id", "A"}}}}}},
                              {"special_tokens", {{"<s>", {{"ids", {0}}}}}}}}}};
    Directory d;
    d.write("tokenizer.json", j.dump());
    TokenizerData data = load(d.path.string());
    CHECK(data.add_bos);
    CHECK(data.bos == 0);
    CHECK(data.eos == -1);
    CHECK(data.tokens.size() == 301);
    CHECK(data.tokens[299].empty());
    CHECK(data.flags[300] == (bnb::TOKEN_ADDED | bnb::TOKEN_RSTRIP | bnb::TOKEN_NORMALIZED));
    CHECK(tokens(*create(data), encode(*create(data), "ab<x> ab")) == Strings{"ab", "<x>", "ab"});
    d.write("tokenizer_config.json",
            R"({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": false, "add_eos_token": true,
                "add_prefix_space": true,
                "added_tokens_decoder": {"301": {"content": "<y>", "special": true}}})");
    data = load(d.path.string());
    CHECK(!data.add_bos);
    CHECK(data.add_eos);
    CHECK(data.eos == 2);
    CHECK(data.add_prefix_space);
    CHECK(data.flags[301] == (bnb::TOKEN_ADDED | bnb::TOKEN_SPECIAL));
}

TEST_CASE("tokenizer: what is not supported is refused by name") {
    const auto error = [](const std::string &pointer, const Json &value) {
        Json j = small_tokenizer_json();
        j[Json::json_pointer(pointer)] = value;
        Directory d;
        return d.write("tokenizer.json", j.dump()).error();
    };
    CHECK(error("/normalizer", nullptr) == "");
    CHECK(contains(error("/normalizer", {{"type", "NFC"}}), "NFC"));
    CHECK(contains(
        error("/normalizer", {{"type", "Sequence"}, {"normalizers", {{{"type", "Prepend"}}, {{"type", "Replace"}}}}}),
        "Prepend + Replace"));
    CHECK(contains(error("/pre_tokenizer", {{"type", "Metaspace"}}), "Metaspace"));
    CHECK(contains(error("/pre_tokenizer", nullptr), "(none)"));
    CHECK(contains(error("/pre_tokenizer/use_regex", false), "without regex"));
    const Json byte_level = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
    const Json split = {{"type", "Split"}, {"pattern", {{"Regex", "x+"}}}, {"behavior", "Isolated"}};
    CHECK(contains(error("/pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", {split, byte_level}}}),
                   "unknown pattern: 'x+'"));
    const Json punctuation = {{"type", "Punctuation"}};
    CHECK(contains(error("/pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", {punctuation, byte_level}}}),
                   "Punctuation"));
    CHECK(contains(error("/model/type", "Unigram"), "Unigram"));
    CHECK(contains(error("/model/byte_fallback", true), "byte_fallback"));
    CHECK(contains(error("/model/end_of_word_suffix", "</w>"), "end_of_word_suffix"));
    CHECK(contains(error("/model/dropout", 0.1), "dropout"));
    CHECK(contains(error("/post_processor", {{"type", "Odd"}}), "Odd"));
    CHECK(contains(
        error("/post_processor", {{"type", "TemplateProcessing"}, {"single", {{{"SpecialToken", {{"id", "<s>"}}}}}}}),
        "<s>"));
    CHECK(contains(error("/model/vocab/x", -1), "'x'"));
    CHECK(contains(error("/model/vocab/x", 4000000), "'x'"));
    CHECK(contains(error("/model/vocab/xx", 5), "id 5 is given to two tokens"));
    CHECK(contains(error("/model/vocab", Json::array()), "vocabulary"));
    CHECK(contains(error("/model/merges", {"a c"}), "'ac'"));
    CHECK(contains(error("/model/merges", {"a  b"}), "merge 0"));
    CHECK(contains(error("/model/merges", {1}), "merge 0"));
    CHECK(contains(error("/model/merges", 1), "merges"));
    CHECK(contains(error("/model", 1), "model"));
    CHECK(contains(error("/added_tokens", {{{"id", 5}, {"content", "<new>"}}}), "'<new>' has id 5"));
    CHECK(contains(error("/added_tokens", {{{"id", 2}, {"content", ""}}}), "no text"));
    CHECK(contains(error("/added_tokens", {{{"content", "x"}}}), "no id"));
}

TEST_CASE("tokenizer: missing and damaged files are named") {
    Directory d;
    CHECK(contains(d.error(), "there is no tokenizer"));
    d.write("tokenizer.model", "x");
    CHECK(contains(d.error(), "SentencePiece"));
    d.write("merges.txt", "a b\n");
    CHECK(contains(d.error(), "no vocab.json"));
    d.write("vocab.json", "{");
    CHECK(contains(d.error(), "vocab.json is not valid JSON"));
    d.write("vocab.json", "[1]");
    CHECK(contains(d.error(), "vocab.json: expected a JSON object"));
    d.write("vocab.json", std::string(100000, '['));
    CHECK(contains(d.error(), "nested too deep"));
    d.write("vocab.json", small_vocab_json().dump());
    CHECK(d.error() == "");
    d.write("merges.txt", "a b\nab\n");
    CHECK(contains(d.error(), "merges.txt: merge 1 is not two tokens: 'ab'"));
    d.write("merges.txt", "a b\n").write("tokenizer_config.json", "\xFF");
    CHECK(contains(d.error(), "tokenizer_config.json is not valid JSON"));
    d.write("tokenizer_config.json", R"({"tokenizer_class": "BertTokenizer"})");
    CHECK(contains(d.error(), "'BertTokenizer'"));
    d.write("tokenizer_config.json", R"({"added_tokens_decoder": {"x": {}}})");
    CHECK(contains(d.error(), "'x'"));
    d.write("tokenizer_config.json",
            R"({"bos_token": 7, "added_tokens_decoder": 7, "add_bos_token": "yes", "extra_special_tokens": 1})");
    CHECK(d.error() == "");
    d.write("added_tokens.json", R"({"ab": 3})");
    CHECK(contains(d.error(), "'ab' has id 3"));
    std::filesystem::create_directory(d.path / "tokenizer.json");
    CHECK(contains(d.error(), "tokenizer.json "));
}

TEST_CASE("tokenizer: damaged tokenizer.json never crashes") {
    const std::string text = small_tokenizer_json().dump();
    std::mt19937 rng(6);
    Directory d;
    for (int i = 0; i < 500; ++i) {
        std::string damaged = text;
        const size_t at = rng() % damaged.size();
        if (i % 3 == 0) damaged.resize(at);
        else damaged[at] = i % 3 == 1 ? "{}[]\",:0n"[rng() % 9] : char(rng());
        bnb_error err{};
        TokenizerData data;
        d.write("tokenizer.json", damaged);
        if (bnb::tokenizer_from_dir(d.path.string(), &data, &err)) CHECK(create(data));
        else CHECK(contains(err.msg, d.path.string()));
    }
}

TEST_SUITE_END();
