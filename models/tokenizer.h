// tokenizer.h: text to token ids and back: byte-level BPE, as GPT-2, OPT, SmolLM2 and Llama 3 use it.
//
// Use:   std::unique_ptr<Tokenizer> t = Tokenizer::create(std::move(data), &err); // data: parse() or tokenizer_json.h
//        std::vector<int32_t> ids;
//        t->encode(text, n, ENCODE_ADD_SPECIAL, &ids);
//        Utf8Stream stream;                                    // one for each text that is printed piece by piece
//        stream.push(t->bytes(id), &out);
// Not:   no SentencePiece, no normalizers, no chat templates. Needs bnb.h for errors and the standard library.
//
// Texts have a length and may contain NUL. A Tokenizer never changes: any number of threads may share it.
#ifndef BNB_MODELS_TOKENIZER_H
#define BNB_MODELS_TOKENIZER_H

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "../bnb.h"

namespace bnb {

// ---- what a tokenizer is made of ------------------------------------------------------------------------------------

enum TokenFlag : uint8_t {
    TOKEN_ADDED = 1,        // found in the text as a whole, before any splitting; its bytes are its text
    TOKEN_SPECIAL = 2,      // found only with ENCODE_PARSE_SPECIAL
    TOKEN_LSTRIP = 4,       // takes the white space before it along
    TOKEN_RSTRIP = 8,       // takes the white space after it along
    TOKEN_SINGLE_WORD = 16, // not found next to a letter, mark, digit or underscore
    TOKEN_NORMALIZED = 32   // looked for after those without this flag
};

// How a text is cut into pieces before merging. Ids stand in files and are never reused.
enum : int32_t {
    PATTERN_GPT2 = 0,        // contractions, words, numbers, punctuation, white space
    PATTERN_GPT2_DIGITS = 1, // every numeric character alone, then GPT2 between them (SmolLM2)
    PATTERN_LLAMA3 = 2       // numbers in groups of three, line breaks apart
};

struct Pattern {
    int32_t id;
    const char *name;
    const char *regex; // the cut in the notation of tokenizer.json
    bool digits_apart; // numeric characters are split off first
    // End of the piece that begins at p; p < end. An ill-formed byte counts as a character of class "other".
    const uint8_t *(*piece_end)(const uint8_t *p, const uint8_t *end);
};

const Pattern *pattern_find(int32_t id); // NULL: no such pattern
void pattern_split(const Pattern &pattern, std::string_view text, std::vector<std::string_view> *pieces);

// What a .bnb file stores and what the files of a Hugging Face directory are read into.
struct TokenizerData {
    struct Merge {
        int32_t left, right, result; // ids; bytes of result = bytes of left + bytes of right
    };
    std::vector<std::string> tokens; // [n] id -> bytes; empty: there is no such token
    std::vector<uint8_t> flags;      // [n] TokenFlag bits
    std::vector<Merge> merges;       // in rank order: the first is merged first
    int32_t pattern = PATTERN_GPT2;
    bool add_prefix_space = false; // text, also after an added token, that does not begin with a space gets one
    bool ignore_merges = false;    // a piece that is a token becomes that token without merging
    bool add_bos = false, add_eos = false;
    int32_t bos = -1, eos = -1, unk = -1, pad = -1; // -1: none
};

// Several times the largest known; they bound what damaged data can make us allocate.
enum { TOKENIZER_MAX_TOKENS = 1 << 21, TOKENIZER_MAX_TOKEN_BYTES = 1 << 16 };

// Are ids, merges and the pattern what encoding needs? false: err says what is wrong.
bool check(const TokenizerData &data, bnb_error *err);

// The `tokn` chunk of a .bnb file. Numbers are LEB128 (7 bits a byte, low ones first) after a u32 version, which is 1:
//     n_tokens, n_merges, options (1 add_prefix_space, 2 ignore_merges, 4 add_bos, 8 add_eos), pattern,
//     bos + 1, eos + 1, unk + 1, pad + 1,
//     n_tokens times: length * 64 + flags, then `length` bytes,
//     n_merges times: left, right, zigzag(result - result of the merge before (at first -1) - 1).
std::string serialize(const TokenizerData &data);
bool parse(const void *bytes, size_t n, TokenizerData *data, bnb_error *err); // false: err says why, data is untouched

// vocab.json, merges.txt and tokenizer.json write each byte as one of 256 printable characters (byte 32 as U+0120).
std::string bytes_to_alphabet(std::string_view bytes);
bool alphabet_to_bytes(std::string_view text, std::string *bytes); // false: a character that is not in the alphabet

// ---- the tokenizer --------------------------------------------------------------------------------------------------

enum : uint32_t {
    ENCODE_ADD_SPECIAL = 1,   // bos before and eos after the text, where the model wants them
    ENCODE_PARSE_SPECIAL = 2, // special tokens in the text are tokens: for rendered chat templates, not for users' text
    ENCODE_RAW_BYTES = 4      // ill-formed UTF-8 is kept, so that bytes() of the ids give the text back exactly;
                              // without it each maximal ill-formed subpart becomes U+FFFD
};

class Tokenizer {
public:
    // NULL: err says what check() found.
    static std::unique_ptr<Tokenizer> create(TokenizerData data, bnb_error *err);
    ~Tokenizer();

    // Appends to ids. A byte that the vocabulary lacks becomes unk, or nothing where there is no unk.
    void encode(const char *text, size_t n, uint32_t flags, std::vector<int32_t> *ids) const;
    std::string_view bytes(int32_t id) const;   // empty for ids without a token; lives as long as the tokenizer
    int32_t find(std::string_view token) const; // the id with these bytes (an added token first), -1: none
    uint8_t flags(int32_t id) const;            // TokenFlag bits, 0 for ids without a token
    int32_t size() const;                       // ids are below this; the model may have more rows
    const TokenizerData &data() const;

private:
    struct Impl;
    explicit Tokenizer(std::unique_ptr<Impl> impl);
    std::unique_ptr<const Impl> impl_;
};

// Turns tokens' bytes, which may end within a character, into text that never does. Ill-formed parts become U+FFFD, one
// for each maximal subpart, as soon as they are known to be ill-formed.
class Utf8Stream {
public:
    void push(std::string_view bytes, std::string *text); // appends all whole characters
    void flush(std::string *text);                        // at the end: what is held back becomes one U+FFFD

private:
    char held_[3] = {}; // a proper beginning of a character
    uint8_t n_held_ = 0;
};

} // namespace bnb

#endif
