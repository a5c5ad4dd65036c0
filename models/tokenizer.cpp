// tokenizer.cpp: byte-level BPE. A text goes through five steps, one section each:
//
//     [UTF8]    ill-formed bytes are replaced by U+FFFD
//     [ADDED]   added and special tokens are cut out
//     [PATTERN] the rest is split into pieces: words, numbers, punctuation, white space
//     [WORDS]   a piece that is known to become one token is looked up whole: 9 of 10 in English
//     [MERGE]   the bytes of other pieces are merged pair by pair
//
// then [TOKENIZER] puts them together, and [CHUNK] and [ALPHABET] are the two notations a vocabulary is stored in.
// Method: Sennrich et al. 2016 (arXiv:1508.07909), on bytes as in GPT-2 (Radford et al. 2019).
#include "tokenizer.h"

#include <algorithm>
#include <array>
#include <climits>
#include <cstring>
#include <functional>
#include <unordered_map>

#include "unicode.inc"

namespace bnb {

using Byte = uint8_t;

static const Byte *bytes_of(std::string_view s) { return reinterpret_cast<const Byte *>(s.data()); }

static std::string_view view(const Byte *begin, const Byte *end) {
    return {reinterpret_cast<const char *>(begin), size_t(end - begin)};
}

// ---- [UTF8] ---------------------------------------------------------------------------------------------------------

enum Form { WELL_FORMED, ILL_FORMED, UNFINISHED }; // UNFINISHED: more bytes could make it a character

struct Decoded {
    Form form;
    uint32_t code;  // the code point, if well-formed
    uint32_t bytes; // of the character, or of the maximal ill-formed subpart: at least 1
};

// Table 3-7 of the Unicode standard: which bytes may follow which. p < end.
static Decoded decode(const Byte *p, const Byte *end) {
    const uint32_t lead = *p;
    if (lead < 0x80) return {WELL_FORMED, lead, 1};
    if (lead < 0xC2 || lead > 0xF4) return {ILL_FORMED, 0, 1};
    const uint32_t n = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    uint32_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;  // no overlong forms
    uint32_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF; // no surrogates, nothing above U+10FFFF
    uint32_t code = lead & (0x7Fu >> n);
    for (uint32_t i = 1; i < n; ++i) {
        if (p + i == end) return {UNFINISHED, 0, i};
        if (p[i] < low || p[i] > high) return {ILL_FORMED, 0, i};
        code = code << 6 | (p[i] & 0x3Fu);
        low = 0x80, high = 0xBF;
    }
    return {WELL_FORMED, code, n};
}

static const Byte *skip_ascii(const Byte *p, const Byte *end) {
    for (uint64_t eight; end - p >= 8; p += 8) {
        std::memcpy(&eight, p, 8);
        if (eight & 0x8080808080808080u) break;
    }
    while (p < end && *p < 0x80) ++p;
    return p;
}

static bool is_well_formed(const Byte *p, const Byte *end) {
    while ((p = skip_ascii(p, end)) < end) {
        const Decoded c = decode(p, end);
        if (c.form != WELL_FORMED) return false;
        p += c.bytes;
    }
    return true;
}

static const char replacement[] = "\xEF\xBF\xBD"; // U+FFFD

void Utf8Stream::push(std::string_view bytes, std::string *text) {
    std::string joined;
    if (n_held_ > 0) {
        joined.assign(held_, n_held_).append(bytes);
        bytes = joined;
        n_held_ = 0;
    }
    const Byte *p = bytes_of(bytes), *end = p + bytes.size();
    const Byte *good = p; // [good, p) is well-formed and not yet written
    while ((p = skip_ascii(p, end)) < end) {
        const Decoded c = decode(p, end);
        if (c.form == UNFINISHED) {
            n_held_ = Byte(end - p);
            std::memcpy(held_, p, n_held_);
            break;
        }
        if (c.form == ILL_FORMED) {
            text->append(view(good, p)).append(replacement);
            good = p + c.bytes;
        }
        p += c.bytes;
    }
    text->append(view(good, p));
}

void Utf8Stream::flush(std::string *text) {
    if (n_held_ > 0) text->append(replacement);
    n_held_ = 0;
}

// ---- [PATTERN] ------------------------------------------------------------------------------------------------------
// Scanners that do what the regular expressions say, without a regex engine: one look at each character, a few at most.

enum Class : Byte { LETTER = 'L', NUMBER = 'N', SPACE = 'S', OTHER = 'O' };

static const Byte word_bit = 0x20; // lower case in the table: part of a word, for added tokens with single_word

static Byte properties(uint32_t code) { return Byte(unicode_pages[unicode_page_of[code >> 8]][code & 0xFF]); }

struct Char {
    Byte cls;
    Byte bytes;
    bool is_word;
};

static Char wide_char_at(const Byte *p, const Byte *end) {
    const Decoded c = decode(p, end);
    if (c.form != WELL_FORMED) return {OTHER, 1, false}; // ENCODE_RAW_BYTES only
    const Byte props = properties(c.code);
    return {Byte(props & ~word_bit), Byte(c.bytes), (props & word_bit) != 0};
}

static inline Byte ascii_class(Byte c) { return Byte(unicode_pages[0][c] & ~word_bit); }

static inline Char char_at(const Byte *p, const Byte *end) {
    if (*p >= 0x80) return wide_char_at(p, end);
    return {ascii_class(*p), 1, (unicode_pages[0][*p] & word_bit) != 0};
}

static inline Byte class_at(const Byte *p, const Byte *end) {
    return *p < 0x80 ? ascii_class(*p) : wide_char_at(p, end).cls;
}

// End of the run of characters of this class.
static inline const Byte *run_end(const Byte *p, const Byte *end, Byte cls) {
    while (p < end) {
        if (*p < 0x80) {
            if (ascii_class(*p) != cls) break;
            ++p;
        } else {
            const Char c = wide_char_at(p, end);
            if (c.cls != cls) break;
            p += c.bytes;
        }
    }
    return p;
}

// \s+(?!\S)|\s+ : a run of white space leaves its last character to what follows it, if it has another one.
static const Byte *space_end(const Byte *p, const Byte *end) {
    const Byte *last = p, *e = p;
    while (e < end) {
        const Char c = char_at(e, end);
        if (c.cls != SPACE) break;
        last = e;
        e += c.bytes;
    }
    return e < end && last > p ? last : e;
}

// Bytes of 's 't 're 've 'm 'll 'd at p, where an apostrophe stands; 0: none.
static size_t contraction(const Byte *p, const Byte *end) {
    if (end - p >= 2 && (p[1] == 's' || p[1] == 't' || p[1] == 'm' || p[1] == 'd')) return 2;
    if (end - p < 3) return 0;
    if ((p[1] == 'r' || p[1] == 'v') && p[2] == 'e') return 3;
    return p[1] == 'l' && p[2] == 'l' ? 3 : 0;
}

static const Byte *gpt2_piece(const Byte *p, const Byte *end) {
    if (*p == '\'') {
        const size_t n = contraction(p, end);
        if (n > 0) return p + n;
    }
    const Byte *q = p; // where the run begins: after a space that something follows
    if (*p == ' ' && p + 1 < end && class_at(p + 1, end) != SPACE) ++q;
    const Char c = char_at(q, end);
    return c.cls == SPACE ? space_end(p, end) : run_end(q + c.bytes, end, c.cls);
}

// (?i:'s|'t|'re|'ve|'m|'ll|'d); U+017F, the long s, is an s when case is ignored.
static size_t contraction_any_case(const Byte *p, const Byte *end) {
    if (end - p >= 3 && p[1] == 0xC5 && p[2] == 0xBF) return 3;
    Byte lower[3] = {'\'', 0, 0};
    const size_t n = std::min<size_t>(size_t(end - p), 3);
    for (size_t i = 1; i < n; ++i) lower[i] = p[i] >= 'A' && p[i] <= 'Z' ? Byte(p[i] | 0x20) : p[i];
    return contraction(lower, lower + n);
}

static bool is_line_break(Byte c) { return c == '\r' || c == '\n'; }

// \s*[\r\n]+ : white space up to the last line break of its run; NULL: the run has none.
static const Byte *line_break_end(const Byte *p, const Byte *end) {
    const Byte *found = nullptr;
    while (p < end) {
        const Char c = char_at(p, end);
        if (c.cls != SPACE) break;
        if (is_line_break(*p)) found = p + 1;
        p += c.bytes;
    }
    return found;
}

static const Byte *number_end(const Byte *p, const Byte *end, int most) {
    for (int i = 0; i < most && p < end; ++i) {
        const Char c = char_at(p, end);
        if (c.cls != NUMBER) break;
        p += c.bytes;
    }
    return p;
}

static const Byte *llama3_piece(const Byte *p, const Byte *end) {
    if (*p == '\'') {
        const size_t n = contraction_any_case(p, end);
        if (n > 0) return p + n;
    }
    const Char c = char_at(p, end);
    const Byte *q = p + c.bytes;
    if (c.cls == LETTER) return run_end(q, end, LETTER);
    if (c.cls == NUMBER) return number_end(p, end, 3);
    const Byte next = q < end ? class_at(q, end) : Byte(SPACE);
    if (next == LETTER && !is_line_break(*p)) return run_end(q, end, LETTER);
    if (c.cls == OTHER || (*p == ' ' && next == OTHER)) {
        q = run_end(q, end, OTHER);
        while (q < end && is_line_break(*q)) ++q;
        return q;
    }
    const Byte *line = line_break_end(p, end);
    return line ? line : space_end(p, end);
}

static const char gpt2_regex[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
static const char llama3_regex[] = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}"
                                   "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

static const Pattern patterns[] = {
    {PATTERN_GPT2, "gpt2", gpt2_regex, false, gpt2_piece},
    {PATTERN_GPT2_DIGITS, "gpt2-digits", gpt2_regex, true, gpt2_piece},
    {PATTERN_LLAMA3, "llama3", llama3_regex, false, llama3_piece},
};

const Pattern *pattern_find(int32_t id) {
    for (const Pattern &p : patterns)
        if (p.id == id) return &p;
    return nullptr;
}

// Calls f(begin, end) for every piece, in order.
template <class F> static void for_each_piece(const Pattern &pattern, const Byte *p, const Byte *end, F f) {
    while (p < end) {
        const Byte *stop = end;
        if (pattern.digits_apart) {
            stop = number_end(p, end, 1);
            if (stop == p)
                while (stop < end && class_at(stop, end) != NUMBER) stop += char_at(stop, end).bytes;
        }
        while (p < stop) {
            const Byte *e = pattern.piece_end(p, stop);
            f(p, e);
            p = e;
        }
    }
}

void pattern_split(const Pattern &pattern, std::string_view text, std::vector<std::string_view> *pieces) {
    const Byte *p = bytes_of(text);
    for_each_piece(pattern, p, p + text.size(), [&](const Byte *b, const Byte *e) { pieces->push_back(view(b, e)); });
}

// ---- [MERGE] --------------------------------------------------------------------------------------------------------
// The adjacent pair of lowest rank is merged first, the leftmost of equals. Short pieces search for it, long ones keep
// a heap; both give the same result, which the tests compare with a third form.

static const int32_t no_rank = INT32_MAX;

// Slots of an open-addressing table that holds n entries: a power of two, at most half full.
static int table_bits(size_t n) {
    int bits = 4;
    while ((size_t(1) << bits) < 2 * n) ++bits;
    return bits;
}

static inline size_t table_slot(uint64_t a, uint64_t b, int bits) {
    uint64_t h = (a ^ (b * 0x9E3779B97F4A7C15u)) * 0xFF51AFD7ED558CCDu; // golden ratio; MurmurHash3's finalizer
    h = (h ^ (h >> 32)) * 0xC4CEB9FE1A85EC53u;
    return size_t(h >> (64 - bits));
}

class Merger {
public:
    void build(const TokenizerData &data) {
        merges_ = &data.merges;
        fill_byte_ids(data);
        bits_ = table_bits(data.merges.size());
        slots_.assign(size_t(1) << bits_, Slot());
        for (size_t i = 0; i < data.merges.size(); ++i) {
            const TokenizerData::Merge &m = data.merges[i];
            slots_[slot(m.left, m.right)] = {m.left, m.right, int32_t(i)}; // of a pair listed twice the last one counts
        }
    }

    // The ids of a piece; -1 for a byte that has no token.
    void merge(const Byte *p, size_t n, std::vector<int32_t> *ids) const {
        if (n > short_piece) return merge_long(p, n, ids);
        int32_t symbols[short_piece];
        n = merge_short(p, n, symbols);
        ids->insert(ids->end(), symbols, symbols + n);
    }

    // Does this piece become the one token `id`?
    bool becomes(const Byte *p, size_t n, int32_t id) const {
        if (n <= short_piece) {
            int32_t symbols[short_piece];
            return merge_short(p, n, symbols) == 1 && symbols[0] == id;
        }
        std::vector<int32_t> ids;
        merge_long(p, n, &ids);
        return ids.size() == 1 && ids[0] == id;
    }

private:
    enum { short_piece = 48 };                    // bytes; above it the heap is faster
    static const size_t longest_piece = 1u << 30; // positions in the heap have 32 bits: longer ones are cut

    struct Slot {
        int32_t left = -1, right = -1, rank = no_rank;
    };
    const std::vector<TokenizerData::Merge> *merges_ = nullptr;
    std::vector<Slot> slots_; // [1 << bits_]
    int bits_ = 0;
    std::array<int32_t, 256> byte_ids_; // -1: no token

    void fill_byte_ids(const TokenizerData &data) {
        byte_ids_.fill(-1);
        for (size_t i = data.tokens.size(); i-- > 0;) { // backwards: the lowest id counts
            if (data.tokens[i].size() != 1 || (data.flags[i] & TOKEN_SPECIAL)) continue;
            byte_ids_[Byte(data.tokens[i][0])] = int32_t(i);
        }
    }

    // Where the pair stands or would stand. There is always an empty slot: the table is half full.
    size_t slot(int32_t left, int32_t right) const {
        size_t i = table_slot(uint32_t(left), uint32_t(right), bits_);
        while (slots_[i].rank != no_rank && (slots_[i].left != left || slots_[i].right != right))
            i = (i + 1) & (slots_.size() - 1);
        return i;
    }

    int32_t rank(int32_t left, int32_t right) const { return slots_[slot(left, right)].rank; }

    int32_t result(int32_t rank) const { return (*merges_)[size_t(rank)].result; }

    // symbols: [n], of which the first (the returned number) are the result.
    size_t merge_short(const Byte *p, size_t n, int32_t *symbols) const {
        int32_t ranks[short_piece]; // of symbols i and i + 1; no_rank for the last
        for (size_t i = 0; i < n; ++i) symbols[i] = byte_ids_[p[i]];
        for (size_t i = 0; i + 1 < n; ++i) ranks[i] = rank(symbols[i], symbols[i + 1]);
        while (n > 1) {
            const size_t best = size_t(std::min_element(ranks, ranks + n - 1) - ranks);
            if (ranks[best] == no_rank) break;
            symbols[best] = result(ranks[best]);
            std::copy(symbols + best + 2, symbols + n, symbols + best + 1);
            std::copy(ranks + best + 1, ranks + n - 1, ranks + best);
            --n;
            if (best > 0) ranks[best - 1] = rank(symbols[best - 1], symbols[best]);
            if (best + 1 < n) ranks[best] = rank(symbols[best], symbols[best + 1]);
        }
        return n;
    }

    struct Symbol { // of a doubly linked list
        int32_t id;
        int32_t rank; // with the next one; changes make older heap entries stale
        uint32_t prev, next;
    };
    static const uint32_t none = UINT32_MAX;

    void merge_long(const Byte *p, size_t n, std::vector<int32_t> *ids) const {
        for (; n > longest_piece; p += longest_piece, n -= longest_piece) merge_list(p, longest_piece, ids);
        merge_list(p, n, ids);
    }

    void merge_list(const Byte *p, size_t n, std::vector<int32_t> *ids) const {
        std::vector<Symbol> list(n);
        for (uint32_t i = 0; i < n; ++i)
            list[i] = {byte_ids_[p[i]], no_rank, i > 0 ? i - 1 : none, i + 1 < n ? i + 1 : none};
        std::vector<uint64_t> heap; // rank << 32 | position: the smallest is the next to merge
        for (uint32_t i = 0; i < n; ++i)
            if (update_rank(list, i)) heap.push_back(heap_entry(list, i));
        std::make_heap(heap.begin(), heap.end(), std::greater<uint64_t>());
        while (!heap.empty()) {
            std::pop_heap(heap.begin(), heap.end(), std::greater<uint64_t>());
            const uint64_t entry = heap.back();
            heap.pop_back();
            const uint32_t at = uint32_t(entry);
            if (list[at].rank != int32_t(entry >> 32)) continue; // one of the pair has been merged since
            join(list, at);
            for (const uint32_t i : {list[at].prev, at}) {
                if (i == none || !update_rank(list, i)) continue;
                heap.push_back(heap_entry(list, i));
                std::push_heap(heap.begin(), heap.end(), std::greater<uint64_t>());
            }
        }
        for (uint32_t i = 0; i != none; i = list[i].next) ids->push_back(list[i].id);
    }

    bool update_rank(std::vector<Symbol> &list, uint32_t i) const {
        Symbol &s = list[i];
        s.rank = s.next == none ? no_rank : rank(s.id, list[s.next].id);
        return s.rank != no_rank;
    }

    static uint64_t heap_entry(const std::vector<Symbol> &list, uint32_t i) { return uint64_t(list[i].rank) << 32 | i; }

    // Symbol i takes the next one in.
    void join(std::vector<Symbol> &list, uint32_t i) const {
        Symbol &s = list[i];
        Symbol &gone = list[s.next];
        s.id = result(s.rank);
        s.next = gone.next;
        if (s.next != none) list[s.next].prev = i;
        gone.rank = no_rank;
    }
};

// ---- [WORDS] --------------------------------------------------------------------------------------------------------
// Pieces that are one token: a table, filled once, instead of a cache that threads would have to share. A token whose
// own bytes merge into something else is left out, so looking up never changes a result.

class Words {
public:
    void build(const TokenizerData &data, const Merger &merger) {
        bits_ = table_bits(data.tokens.size());
        slots_.assign(size_t(1) << bits_, Slot());
        for (size_t i = 0; i < data.tokens.size(); ++i) {
            const std::string &token = data.tokens[i];
            if (token.empty() || (data.flags[i] & TOKEN_ADDED)) continue;
            if (data.ignore_merges || merger.becomes(bytes_of(token), token.size(), int32_t(i))) add(token, int32_t(i));
        }
    }

    int32_t find(const Byte *p, size_t n) const // -1: not a word
    {
        if (n > short_word) {
            const auto found = long_words_.find(view(p, p + n));
            return found == long_words_.end() ? -1 : found->second;
        }
        return slots_[slot(key(p, n), n)].id;
    }

private:
    enum { short_word = 16 }; // bytes; they fit a slot, so that a look-up touches one cache line

    struct Key {
        uint64_t low = 0, high = 0;
    };
    struct Slot {
        Key key;
        int32_t id = -1;
        uint32_t bytes = 0;
    };
    std::vector<Slot> slots_; // [1 << bits_]
    int bits_ = 0;
    std::unordered_map<std::string_view, int32_t> long_words_; // into TokenizerData::tokens

    static uint64_t load(const Byte *p, size_t n) // n: 8, 4
    {
        uint64_t v = 0;
        std::memcpy(&v, p, n);
        return v;
    }

    // A different key for each string of n bytes, without reading beyond it: overlapping loads.
    static Key key(const Byte *p, size_t n) {
        if (n >= 8) return {load(p, 8), load(p + n - 8, 8)};
        if (n >= 4) return {load(p, 4) | load(p + n - 4, 4) << 32, 0};
        return {uint64_t(p[0]) | uint64_t(p[n / 2]) << 8 | uint64_t(p[n - 1]) << 16, 0};
    }

    size_t slot(const Key &k, size_t n) const {
        size_t i = table_slot(k.low + n, k.high, bits_);
        while (slots_[i].id >= 0 &&
               !(slots_[i].key.low == k.low && slots_[i].key.high == k.high && slots_[i].bytes == n))
            i = (i + 1) & (slots_.size() - 1);
        return i;
    }

    void add(const std::string &token, int32_t id) {
        if (token.size() > short_word) {
            long_words_.emplace(token, id);
            return;
        }
        const Key k = key(bytes_of(token), token.size());
        Slot &s = slots_[slot(k, token.size())];
        if (s.id < 0) s = {k, id, uint32_t(token.size())};
    }
};

// ---- [ADDED] --------------------------------------------------------------------------------------------------------
// Added tokens are found in the text as it is, the leftmost first, the longest of those that begin there. The order of
// the tests (special, single word, strip) and what a rejected match skips are those of the tokenizers package.

class AddedTokens {
public:
    // pass: 0 or TOKEN_NORMALIZED
    void build(const TokenizerData &data, Byte pass) {
        data_ = &data;
        starts_.fill(false);
        for (size_t i = 0; i < data.tokens.size(); ++i) {
            if (data.tokens[i].empty() || !(data.flags[i] & TOKEN_ADDED)) continue;
            if ((data.flags[i] & TOKEN_NORMALIZED) != pass) continue;
            sorted_.push_back(int32_t(i));
            starts_[Byte(data.tokens[i][0])] = true;
        }
        std::stable_sort(sorted_.begin(), sorted_.end(), [&](int32_t a, int32_t b) { return text(a) < text(b); });
    }

    // Appends the tokens that are found in [begin, end) and calls rest(b, e) for what lies between them, all in order.
    template <class Rest>
    void cut(const Byte *begin, const Byte *end, bool parse_special, std::vector<int32_t> *ids, Rest rest) const {
        const Byte *done = begin;
        for (const Byte *p = begin; (p = next_start(p, end)) < end;) {
            const int32_t id = longest_at(p, end);
            if (id < 0) {
                ++p;
                continue;
            }
            const Byte *start = p;
            p += text(id).size();
            if (!wanted(id, begin, start, p, end, parse_special)) continue;
            const Byte flags = data_->flags[size_t(id)];
            if (flags & TOKEN_LSTRIP) start = spaces_before(done, start);
            const Byte *stop = flags & TOKEN_RSTRIP ? run_end(std::max(p, done), end, SPACE) : p;
            if (done < start) rest(done, start);
            ids->push_back(id);
            done = stop;
        }
        if (done < end) rest(done, end);
    }

private:
    const TokenizerData *data_ = nullptr;
    std::vector<int32_t> sorted_;  // by text
    std::array<bool, 256> starts_; // [first byte of a token]

    const std::string &text(int32_t id) const { return data_->tokens[size_t(id)]; }

    const Byte *next_start(const Byte *p, const Byte *end) const {
        if (sorted_.empty()) return end;
        while (p < end && !starts_[*p]) ++p;
        return p;
    }

    // The longest token that [p, end) begins with, -1: none. Walks the sorted list as if it were a tree.
    int32_t longest_at(const Byte *p, const Byte *end) const {
        int32_t best = -1;
        auto first = sorted_.begin(), last = sorted_.end(); // those that agree with the text so far
        for (size_t depth = 0; first != last; ++depth) {
            if (text(*first).size() == depth) best = *first;
            while (first != last && text(*first).size() == depth) ++first;
            if (p + depth == end) break;
            const auto byte = [&](int32_t id) { return Byte(text(id)[depth]); };
            const Byte want = p[depth];
            first = std::lower_bound(first, last, want, [&](int32_t id, Byte c) { return byte(id) < c; });
            last = std::upper_bound(first, last, want, [&](Byte c, int32_t id) { return c < byte(id); });
        }
        return best;
    }

    bool wanted(int32_t id, const Byte *begin, const Byte *start, const Byte *stop, const Byte *end,
                bool parse_special) const {
        const Byte flags = data_->flags[size_t(id)];
        if ((flags & TOKEN_SPECIAL) && !parse_special) return false;
        if (!(flags & TOKEN_SINGLE_WORD)) return true;
        const bool joined_left = start > begin && char_at(char_before(begin, start), end).is_word;
        const bool joined_right = stop < end && char_at(stop, end).is_word;
        return !joined_left && !joined_right;
    }

    // Where the character that ends at p begins; begin < p.
    static const Byte *char_before(const Byte *begin, const Byte *p) {
        for (const Byte *q = p - 1; q >= begin && p - q <= 4; --q) {
            if ((*q & 0xC0) == 0x80) continue;
            return decode(q, p).form == WELL_FORMED && q + decode(q, p).bytes == p ? q : p - 1;
        }
        return p - 1;
    }

    static const Byte *spaces_before(const Byte *begin, const Byte *p) {
        while (p > begin) {
            const Byte *q = char_before(begin, p);
            if (char_at(q, p).cls != SPACE) break;
            p = q;
        }
        return p;
    }
};

// ---- [TOKENIZER] ----------------------------------------------------------------------------------------------------

struct Tokenizer::Impl {
    TokenizerData data;
    const Pattern *pattern = nullptr;
    AddedTokens first, second; // without and with TOKEN_NORMALIZED
    Merger merger;
    Words words;

    explicit Impl(TokenizerData d) : data(std::move(d)) {
        pattern = pattern_find(data.pattern);
        first.build(data, 0);
        second.build(data, TOKEN_NORMALIZED);
        merger.build(data);
        words.build(data, merger);
    }

    void encode_piece(const Byte *p, size_t n, std::vector<int32_t> *ids) const {
        const int32_t id = words.find(p, n);
        if (id >= 0) return ids->push_back(id);
        const size_t from = ids->size();
        merger.merge(p, n, ids);
        if (std::find(ids->begin() + ptrdiff_t(from), ids->end(), -1) != ids->end()) replace_missing(from, ids);
    }

    void replace_missing(size_t from, std::vector<int32_t> *ids) const {
        const auto begin = ids->begin() + ptrdiff_t(from);
        if (data.unk >= 0) std::replace(begin, ids->end(), -1, data.unk);
        else ids->erase(std::remove(begin, ids->end(), -1), ids->end());
    }

    // Text between added tokens; p < end.
    void encode_text(const Byte *p, const Byte *end, std::vector<int32_t> *ids) const {
        std::string spaced;
        if (data.add_prefix_space && *p != ' ') {
            spaced.assign(1, ' ').append(view(p, end));
            p = bytes_of(spaced);
            end = p + spaced.size();
        }
        for_each_piece(*pattern, p, end, [&](const Byte *b, const Byte *e) { encode_piece(b, size_t(e - b), ids); });
    }
};

static bool check_id(int32_t id, const char *what, const TokenizerData &data, bnb_error *err) {
    if (id >= -1 && id < int32_t(data.tokens.size())) return true;
    bnb_fail(err, BNB_E_FORMAT, "tokenizer: the %s token has id %d, but ids end at %d", what, int(id),
             int(data.tokens.size()) - 1);
    return false;
}

static bool check_merge(size_t i, const TokenizerData &data, bnb_error *err) {
    const TokenizerData::Merge &m = data.merges[i];
    for (const int32_t id : {m.left, m.right, m.result}) {
        if (id >= 0 && id < int32_t(data.tokens.size()) && !data.tokens[size_t(id)].empty()) continue;
        bnb_fail(err, BNB_E_FORMAT, "tokenizer: merge %d uses id %d, which is not in the vocabulary", int(i), int(id));
        return false;
    }
    const std::string &left = data.tokens[size_t(m.left)], &right = data.tokens[size_t(m.right)];
    const std::string &result = data.tokens[size_t(m.result)];
    if (result.size() == left.size() + right.size() && result.compare(0, left.size(), left) == 0 &&
        result.compare(left.size(), right.size(), right) == 0)
        return true;
    bnb_fail(err, BNB_E_FORMAT, "tokenizer: merge %d joins tokens %d and %d, but token %d is not their concatenation",
             int(i), int(m.left), int(m.right), int(m.result));
    return false;
}

static bool check_tokens(const TokenizerData &data, bnb_error *err) {
    const size_t n = data.tokens.size();
    if (n == 0 || n > TOKENIZER_MAX_TOKENS || data.flags.size() != n || data.merges.size() > INT32_MAX) {
        bnb_fail(err, BNB_E_FORMAT,
                 "tokenizer: %zu tokens with %zu flags and %zu merges; a vocabulary has 1 to %d tokens", n,
                 data.flags.size(), data.merges.size(), int(TOKENIZER_MAX_TOKENS));
        return false;
    }
    for (size_t i = 0; i < n; ++i) {
        if (data.tokens[i].size() <= TOKENIZER_MAX_TOKEN_BYTES) continue;
        bnb_fail(err, BNB_E_LIMIT, "tokenizer: token %zu has %zu bytes; at most %d are allowed", i,
                 data.tokens[i].size(), int(TOKENIZER_MAX_TOKEN_BYTES));
        return false;
    }
    return true;
}

bool check(const TokenizerData &data, bnb_error *err) {
    if (!check_tokens(data, err)) return false;
    if (!pattern_find(data.pattern)) {
        bnb_fail(err, BNB_E_UNSUPPORTED, "tokenizer: pre-tokenizer %d is not known to this program", int(data.pattern));
        return false;
    }
    if (!check_id(data.bos, "bos", data, err) || !check_id(data.eos, "eos", data, err) ||
        !check_id(data.unk, "unk", data, err) || !check_id(data.pad, "pad", data, err))
        return false;
    if ((data.add_bos && data.bos < 0) || (data.add_eos && data.eos < 0)) {
        bnb_fail(err, BNB_E_FORMAT, "tokenizer: texts are to get a %s token, but there is none",
                 data.bos < 0 ? "bos" : "eos");
        return false;
    }
    for (size_t i = 0; i < data.merges.size(); ++i)
        if (!check_merge(i, data, err)) return false;
    return true;
}

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;

std::unique_ptr<Tokenizer> Tokenizer::create(TokenizerData data, bnb_error *err) {
    if (!check(data, err)) return nullptr;
    return std::unique_ptr<Tokenizer>(new Tokenizer(std::make_unique<Impl>(std::move(data))));
}

void Tokenizer::encode(const char *text, size_t n, uint32_t flags, std::vector<int32_t> *ids) const {
    const Impl &t = *impl_;
    const Byte *p = reinterpret_cast<const Byte *>(text), *end = p + n;
    std::string repaired;
    if (!(flags & ENCODE_RAW_BYTES) && !is_well_formed(p, end)) {
        Utf8Stream stream;
        stream.push({text, n}, &repaired);
        stream.flush(&repaired);
        p = bytes_of(repaired);
        end = p + repaired.size();
    }
    const bool parse_special = (flags & ENCODE_PARSE_SPECIAL) != 0;
    if ((flags & ENCODE_ADD_SPECIAL) && t.data.add_bos) ids->push_back(t.data.bos);
    t.first.cut(p, end, parse_special, ids, [&](const Byte *b, const Byte *e) {
        t.second.cut(b, e, parse_special, ids, [&](const Byte *b2, const Byte *e2) { t.encode_text(b2, e2, ids); });
    });
    if ((flags & ENCODE_ADD_SPECIAL) && t.data.add_eos) ids->push_back(t.data.eos);
}

std::string_view Tokenizer::bytes(int32_t id) const {
    return id >= 0 && id < size() ? std::string_view(data().tokens[size_t(id)]) : std::string_view();
}

uint8_t Tokenizer::flags(int32_t id) const { return id >= 0 && id < size() ? data().flags[size_t(id)] : uint8_t(0); }

int32_t Tokenizer::find(std::string_view token) const {
    int32_t found = -1;
    for (int32_t i = 0; !token.empty() && i < size(); ++i) {
        if (bytes(i) != token) continue;
        if (flags(i) & TOKEN_ADDED) return i;
        if (found < 0) found = i;
    }
    return found;
}

int32_t Tokenizer::size() const { return int32_t(data().tokens.size()); }

const TokenizerData &Tokenizer::data() const { return impl_->data; }

// ---- [CHUNK] --------------------------------------------------------------------------------------------------------

enum : uint32_t {
    CHUNK_VERSION = 1,
    OPTION_PREFIX_SPACE = 1,
    OPTION_IGNORE_MERGES = 2,
    OPTION_ADD_BOS = 4,
    OPTION_ADD_EOS = 8
};

static void put_number(std::string *out, uint32_t v) {
    for (; v >= 0x80; v >>= 7) out->push_back(char(v | 0x80));
    out->push_back(char(v));
}

std::string serialize(const TokenizerData &data) {
    const char version[4] = {char(CHUNK_VERSION), 0, 0, 0};
    std::string out(version, sizeof version);
    const uint32_t options = OPTION_PREFIX_SPACE * data.add_prefix_space | OPTION_IGNORE_MERGES * data.ignore_merges |
                             OPTION_ADD_BOS * data.add_bos | OPTION_ADD_EOS * data.add_eos;
    for (const size_t v : {data.tokens.size(), data.merges.size(), size_t(options), size_t(data.pattern)})
        put_number(&out, uint32_t(v));
    for (const int32_t id : {data.bos, data.eos, data.unk, data.pad}) put_number(&out, uint32_t(id + 1));
    for (size_t i = 0; i < data.tokens.size(); ++i) {
        put_number(&out, uint32_t(data.tokens[i].size()) << 6 | (data.flags[i] & 63u));
        out += data.tokens[i];
    }
    uint32_t expected = 0;
    for (const TokenizerData::Merge &m : data.merges) {
        const uint32_t step = uint32_t(m.result) - expected;
        put_number(&out, uint32_t(m.left));
        put_number(&out, uint32_t(m.right));
        put_number(&out, step << 1 ^ (step >> 31 ? ~0u : 0u)); // zigzag: 0, -1, 1, -2, ...
        expected = uint32_t(m.result) + 1;
    }
    return out;
}

namespace {

struct ChunkReader {
    const Byte *p, *end;
    bool ok = true; // false: the bytes ended, or a number has more than 32 bits

    size_t left() const { return size_t(end - p); }

    uint32_t number() {
        uint64_t v = 0;
        for (int shift = 0; shift < 35; shift += 7) {
            if (p == end) break;
            v |= uint64_t(*p & 0x7F) << shift;
            if (*p++ >= 0x80) continue;
            if (v <= UINT32_MAX) return uint32_t(v);
            break;
        }
        ok = false;
        return 0;
    }

    int32_t id() { return int32_t(number() - 1); } // stored + 1; create() checks the range
};

} // namespace

static bool read_header(ChunkReader *r, size_t *n_tokens, size_t *n_merges, TokenizerData *data, bnb_error *err) {
    uint32_t version = 0;
    if (r->left() < 4) {
        bnb_fail(err, BNB_E_FORMAT, "tokenizer data: only %zu bytes", r->left());
        return false;
    }
    for (int i = 0; i < 4; ++i) version |= uint32_t(*r->p++) << (8 * i);
    if (version != CHUNK_VERSION) {
        bnb_fail(err, BNB_E_UNSUPPORTED, "tokenizer data: version %u, but this program reads version %u",
                 unsigned(version), unsigned(CHUNK_VERSION));
        return false;
    }
    *n_tokens = r->number();
    *n_merges = r->number();
    const uint32_t options = r->number();
    data->pattern = int32_t(r->number());
    data->bos = r->id();
    data->eos = r->id();
    data->unk = r->id();
    data->pad = r->id();
    if (options > 15) {
        bnb_fail(err, BNB_E_UNSUPPORTED, "tokenizer data: options %#x are not known to this program",
                 unsigned(options));
        return false;
    }
    data->add_prefix_space = (options & OPTION_PREFIX_SPACE) != 0;
    data->ignore_merges = (options & OPTION_IGNORE_MERGES) != 0;
    data->add_bos = (options & OPTION_ADD_BOS) != 0;
    data->add_eos = (options & OPTION_ADD_EOS) != 0;
    // Nothing is allocated for a count that the bytes cannot back: a token takes 1 byte or more, a merge 3.
    if (r->ok && *n_tokens <= TOKENIZER_MAX_TOKENS && *n_tokens <= r->left() && *n_merges <= r->left() / 3) return true;
    bnb_fail(err, BNB_E_FORMAT, "tokenizer data: %zu tokens and %zu merges do not fit in %zu bytes", *n_tokens,
             *n_merges, r->left());
    return false;
}

static bool read_tokens(ChunkReader *r, size_t n, TokenizerData *data, bnb_error *err) {
    data->tokens.reserve(n);
    data->flags.reserve(n);
    for (size_t i = 0; i < n; ++i) {
        const uint32_t head = r->number();
        const size_t bytes = head >> 6;
        if (!r->ok || bytes > r->left()) {
            bnb_fail(err, BNB_E_FORMAT, "tokenizer data: token %zu is cut off", i);
            return false;
        }
        data->tokens.emplace_back(view(r->p, r->p + bytes));
        data->flags.push_back(Byte(head & 63));
        r->p += bytes;
    }
    return true;
}

static bool read_merges(ChunkReader *r, size_t n, TokenizerData *data, bnb_error *err) {
    data->merges.reserve(n);
    uint32_t expected = 0;
    for (size_t i = 0; i < n; ++i) {
        const uint32_t left = r->number(), right = r->number(), zigzag = r->number();
        const uint32_t result = expected + (zigzag >> 1 ^ (zigzag & 1 ? ~0u : 0u));
        if (!r->ok) {
            bnb_fail(err, BNB_E_FORMAT, "tokenizer data: merge %zu is cut off", i);
            return false;
        }
        data->merges.push_back({int32_t(left), int32_t(right), int32_t(result)});
        expected = result + 1;
    }
    return true;
}

bool parse(const void *bytes, size_t n, TokenizerData *data, bnb_error *err) {
    const Byte *p = static_cast<const Byte *>(bytes);
    ChunkReader r{p, p + n};
    TokenizerData read;
    size_t n_tokens = 0, n_merges = 0;
    if (!read_header(&r, &n_tokens, &n_merges, &read, err)) return false;
    if (!read_tokens(&r, n_tokens, &read, err) || !read_merges(&r, n_merges, &read, err)) return false;
    if (r.left() > 0) {
        bnb_fail(err, BNB_E_FORMAT, "tokenizer data: %zu bytes too many", r.left());
        return false;
    }
    *data = std::move(read);
    return true;
}

// ---- [ALPHABET] -----------------------------------------------------------------------------------------------------
// 188 bytes stand for themselves (as Latin-1 characters); the 68 others, in order, are U+0100 to U+0143.

static constexpr bool stands_for_itself(uint32_t byte) {
    return (byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173 && byte <= 255);
}

static constexpr std::array<uint32_t, 256> make_alphabet() {
    std::array<uint32_t, 256> codes{};
    uint32_t next = 0x100;
    for (uint32_t b = 0; b < 256; ++b) codes[b] = stands_for_itself(b) ? b : next++;
    return codes;
}

static constexpr std::array<uint32_t, 256> alphabet = make_alphabet(); // [byte] code point

std::string bytes_to_alphabet(std::string_view bytes) {
    std::string text;
    for (const char c : bytes) {
        const uint32_t code = alphabet[Byte(c)];
        if (code >= 0x80) text.push_back(char(0xC0 | code >> 6));
        text.push_back(char(code >= 0x80 ? 0x80 | (code & 0x3F) : code));
    }
    return text;
}

static int byte_of(uint32_t code) // -1: not in the alphabet
{
    if (code < 0x100) return stands_for_itself(code) ? int(code) : -1;
    const auto found = std::find(alphabet.begin(), alphabet.end(), code);
    return found == alphabet.end() ? -1 : int(found - alphabet.begin());
}

bool alphabet_to_bytes(std::string_view text, std::string *bytes) {
    std::string result;
    const Byte *p = bytes_of(text), *end = p + text.size();
    while (p < end) {
        const Decoded c = decode(p, end);
        const int byte = c.form == WELL_FORMED ? byte_of(c.code) : -1;
        if (byte < 0) return false;
        result.push_back(char(byte));
        p += c.bytes;
    }
    *bytes = std::move(result);
    return true;
}

} // namespace bnb
