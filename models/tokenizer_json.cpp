// tokenizer_json.cpp: reads and writes the tokenizer files of Hugging Face directories.
//
//     [FILE]     JSON and its members: these files come from strangers
//     [VOCAB]    tokens, merges and added tokens, gathered from whichever files have them
//     [PIPELINE] tokenizer.json: normalizer, pre_tokenizer, model, post_processor
//     [PAIR]     vocab.json + merges.txt
//     [CONFIG]   tokenizer_config.json, special_tokens_map.json, added_tokens.json
//     [WRITE]    tokenizer.json
//
// Nothing here throws but std::bad_alloc: every value's type is looked at first.
#include "tokenizer_json.h"

#include <map>
#include <unordered_map>

#include <nlohmann/json.hpp>

#include "files.h"

namespace bnb {

using Json = nlohmann::json;

// ---- [FILE] ---------------------------------------------------------------------------------------------------------

enum { MAX_FILE_BYTES = 128 << 20 };

// A text from a file, fit for an error message.
static std::string quote(const std::string &text) {
    std::string out = "'";
    for (const char c : text.substr(0, 60)) out.push_back(uint8_t(c) < 32 || c == 127 ? '?' : c);
    return out + (text.size() > 60 ? "...'" : "'");
}

static bool fail(bnb_error *err, bnb_status code, const std::string &path, const std::string &what) {
    bnb_fail(err, code, "%s: %s", path.c_str(), what.c_str());
    return false;
}

static bool read_object(const std::string &path, Json *out, bnb_error *err) {
    return json_read(path, out, err) && (out->is_object() || fail(err, BNB_E_FORMAT, path, "expected a JSON object"));
}

static bool read_json_if_there(const std::string &path, Json *out, bnb_error *err) {
    *out = Json::object();
    return !file_exists(path) || read_object(path, out, err);
}

// Members of an object; what is absent, null or of another type reads as the default.
static const Json &member(const Json &object, const char *key) {
    static const Json null; // never written
    if (!object.is_object()) return null;
    const auto found = object.find(key);
    return found == object.end() ? null : *found;
}

static bool flag(const Json &object, const char *key, bool otherwise) {
    const Json &v = member(object, key);
    return v.is_boolean() ? *v.get_ptr<const Json::boolean_t *>() : otherwise;
}

static std::string text_of(const Json &v) {
    return v.is_string() ? *v.get_ptr<const Json::string_t *>() : std::string();
}

static std::string text(const Json &object, const char *key) { return text_of(member(object, key)); }

static bool is_id(const Json &v, int32_t *id) {
    if (!v.is_number_unsigned()) return false;
    const uint64_t n = *v.get_ptr<const Json::number_unsigned_t *>();
    if (n >= TOKENIZER_MAX_TOKENS) return false;
    *id = int32_t(n);
    return true;
}

// ---- [VOCAB] --------------------------------------------------------------------------------------------------------

namespace {

// Data while it is being gathered: strings as the files write them are looked up by name.
struct Vocab {
    TokenizerData data;
    std::unordered_map<std::string, int32_t> ids;   // vocabulary string, in the byte alphabet -> id
    std::unordered_map<std::string, int32_t> added; // text of an added token -> id

    int32_t find(const std::string &token) const // -1: no such token
    {
        for (const auto *names : {&added, &ids}) {
            const auto found = names->find(token);
            if (found != names->end()) return found->second;
        }
        return -1;
    }

    bool is_free(int32_t id) const { return size_t(id) >= data.tokens.size() || data.tokens[size_t(id)].empty(); }

    void set(int32_t id, std::string bytes, uint8_t flags) {
        if (size_t(id) >= data.tokens.size()) {
            data.tokens.resize(size_t(id) + 1);
            data.flags.resize(size_t(id) + 1);
        }
        data.tokens[size_t(id)] = std::move(bytes);
        data.flags[size_t(id)] = flags;
    }
};

} // namespace

static bool add_token(const std::string &path, const std::string &name, int32_t id, Vocab *v, bnb_error *err) {
    if (!v->is_free(id))
        return fail(err, BNB_E_FORMAT, path,
                    "id " + std::to_string(id) + " is given to two tokens, one is " + quote(name));
    std::string bytes;
    if (!alphabet_to_bytes(name, &bytes)) bytes = name; // as ByteLevel decodes what is not in its alphabet
    v->set(id, std::move(bytes), 0);
    v->ids.emplace(name, id);
    return true;
}

static bool add_vocab(const std::string &path, const Json &vocab, Vocab *v, bnb_error *err) {
    if (!vocab.is_object() || vocab.empty())
        return fail(err, BNB_E_FORMAT, path, "the vocabulary is not an object {token: id}");
    v->ids.reserve(vocab.size());
    for (const auto &item : vocab.items()) {
        int32_t id = 0;
        if (!is_id(item.value(), &id))
            return fail(err, BNB_E_FORMAT, path, "token " + quote(item.key()) + " has no id between 0 and 2097151");
        if (!add_token(path, item.key(), id, v, err)) return false;
    }
    return true;
}

static bool add_merge(const std::string &path, size_t number, const std::string &left, const std::string &right,
                      Vocab *v, bnb_error *err) {
    int32_t ids[3];
    const std::string names[3] = {left, right, left + right};
    for (int i = 0; i < 3; ++i) {
        const auto found = v->ids.find(names[i]);
        if (found == v->ids.end())
            return fail(err, BNB_E_FORMAT, path,
                        "merge " + std::to_string(number) + " needs token " + quote(names[i]) +
                            ", which is not in the vocabulary");
        ids[i] = found->second;
    }
    v->data.merges.push_back({ids[0], ids[1], ids[2]});
    return true;
}

// "left right", split at its only space
static bool add_merge_line(const std::string &path, size_t number, const std::string &line, Vocab *v, bnb_error *err) {
    const size_t space = line.find(' ');
    if (space == std::string::npos || space == 0 || line.find(' ', space + 1) != std::string::npos ||
        space + 1 == line.size())
        return fail(err, BNB_E_FORMAT, path, "merge " + std::to_string(number) + " is not two tokens: " + quote(line));
    return add_merge(path, number, line.substr(0, space), line.substr(space + 1), v, err);
}

static uint8_t token_flags(const Json &token, bool special) {
    return uint8_t(TOKEN_ADDED | TOKEN_SPECIAL * special | TOKEN_LSTRIP * flag(token, "lstrip", false) |
                   TOKEN_RSTRIP * flag(token, "rstrip", false) | TOKEN_SINGLE_WORD * flag(token, "single_word", false) |
                   TOKEN_NORMALIZED * flag(token, "normalized", !special));
}

static bool add_added(const std::string &path, const std::string &content, int32_t id, uint8_t flags, Vocab *v,
                      bnb_error *err) {
    if (content.empty()) return fail(err, BNB_E_FORMAT, path, "added token " + std::to_string(id) + " has no text");
    const int32_t known = v->find(content);
    if (known != id && (known >= 0 || !v->is_free(id)))
        return fail(err, BNB_E_FORMAT, path,
                    "added token " + quote(content) + " has id " + std::to_string(id) +
                        ", which does not fit the vocabulary");
    v->set(id, content, flags);
    v->added.emplace(content, id);
    return true;
}

// A token that a configuration names: "text" or {"content": "text", ...}; special whether or not it says so.
static int32_t named_token(const Json &token, Vocab *v) {
    const std::string content = token.is_object() ? text(token, "content") : text_of(token);
    const int32_t id = content.empty() ? -1 : v->find(content);
    if (id < 0) return -1;
    if (v->added.emplace(content, id).second) v->set(id, content, token_flags(token, true));
    else v->data.flags[size_t(id)] |= TOKEN_SPECIAL;
    return id;
}

// ---- [PIPELINE] -----------------------------------------------------------------------------------------------------

// One processing step or the parts of a Sequence, whose list has a name of its own in each place.
static std::vector<Json> steps_of(const Json &v, const char *list) {
    if (v.is_null()) return {};
    if (text(v, "type") != "Sequence") return {v};
    std::vector<Json> steps;
    const Json &items = member(v, list);
    if (items.is_array()) steps.assign(items.begin(), items.end());
    return steps;
}

static std::string kinds(const std::vector<Json> &steps) {
    std::string names;
    for (const Json &s : steps) names += (names.empty() ? "" : " + ") + text(s, "type");
    return names.empty() ? "(none)" : quote(names);
}

// Known are those of pattern_find(): ByteLevel; Digits + ByteLevel; Split + ByteLevel without its own regex.
static bool read_pre_tokenizer(const std::string &path, const Json &v, Vocab *out, bnb_error *err) {
    const std::vector<Json> steps = steps_of(v, "pretokenizers");
    const auto refuse = [&](const std::string &why) { return fail(err, BNB_E_UNSUPPORTED, path, why); };
    const std::string all = kinds(steps);
    if (steps.empty() || steps.size() > 2 || text(steps.back(), "type") != "ByteLevel")
        return refuse("pre_tokenizer " + all + " is not supported: it is not byte-level BPE");
    const bool own_regex = flag(steps.back(), "use_regex", true);
    const bool prefix = flag(steps.back(), "add_prefix_space", true);
    out->data.add_prefix_space = prefix;
    const Json &first = steps.front();
    const std::string kind = text(first, "type");
    if (steps.size() == 1) {
        out->data.pattern = PATTERN_GPT2;
        return own_regex || refuse("pre_tokenizer ByteLevel without regex is not supported");
    }
    if (prefix) return refuse("pre_tokenizer " + all + " with add_prefix_space is not supported");
    if (kind == "Digits") {
        out->data.pattern = PATTERN_GPT2_DIGITS;
        return (own_regex && flag(first, "individual_digits", false)) ||
               refuse("pre_tokenizer Digits is supported only with individual_digits and a ByteLevel with regex");
    }
    if (kind != "Split" || own_regex) return refuse("pre_tokenizer " + all + " is not supported");
    const std::string regex = text(member(first, "pattern"), "Regex");
    if (text(first, "behavior") != "Isolated" || flag(first, "invert", false))
        return refuse("pre_tokenizer Split is supported only with behavior Isolated");
    for (int32_t id = 0; const Pattern *p = pattern_find(id); ++id) {
        if (p->digits_apart || regex != p->regex) continue;
        out->data.pattern = id;
        return true;
    }
    return refuse("pre_tokenizer Split with an unknown pattern: " + quote(regex));
}

static bool read_normalizer(const std::string &path, const Json &v, bnb_error *err) {
    const std::vector<Json> steps = steps_of(v, "normalizers");
    return steps.empty() || fail(err, BNB_E_UNSUPPORTED, path, "normalizer " + kinds(steps) + " is not supported");
}

static bool read_merges(const std::string &path, const Json &merges, Vocab *v, bnb_error *err) {
    if (!merges.is_array()) return fail(err, BNB_E_FORMAT, path, "model.merges is not a list");
    v->data.merges.reserve(merges.size());
    for (size_t i = 0; i < merges.size(); ++i) {
        const Json &m = merges[i];
        if (m.is_string()) {
            if (!add_merge_line(path, i, text_of(m), v, err)) return false;
        } else if (m.is_array() && m.size() == 2 && m[0].is_string() && m[1].is_string()) {
            if (!add_merge(path, i, text_of(m[0]), text_of(m[1]), v, err)) return false;
        } else {
            return fail(err, BNB_E_FORMAT, path, "merge " + std::to_string(i) + " is neither \"a b\" nor [a, b]");
        }
    }
    return true;
}

static bool read_model(const std::string &path, const Json &model, Vocab *v, bnb_error *err) {
    const std::string type = text(model, "type");
    if (type != "BPE" && !(type.empty() && model.is_object() && model.contains("merges")))
        return fail(err, BNB_E_UNSUPPORTED, path, "model type " + quote(type) + " is not supported, only BPE is");
    if (flag(model, "byte_fallback", false))
        return fail(err, BNB_E_UNSUPPORTED, path, "BPE with byte_fallback (SentencePiece) is not supported");
    for (const char *key : {"continuing_subword_prefix", "end_of_word_suffix"})
        if (!text(model, key).empty())
            return fail(err, BNB_E_UNSUPPORTED, path, std::string(key) + " is not supported");
    const Json &dropout = member(model, "dropout");
    if (!dropout.is_null() && dropout != 0)
        return fail(err, BNB_E_UNSUPPORTED, path, "BPE with dropout is not supported");
    v->data.ignore_merges = flag(model, "ignore_merges", false);
    return add_vocab(path, member(model, "vocab"), v, err) && read_merges(path, member(model, "merges"), v, err);
}

static bool read_added_tokens(const std::string &path, const Json &list, Vocab *v, bnb_error *err) {
    if (list.is_null()) return true;
    if (!list.is_array()) return fail(err, BNB_E_FORMAT, path, "added_tokens is not a list");
    for (const Json &token : list) {
        int32_t id = 0;
        if (!is_id(member(token, "id"), &id)) return fail(err, BNB_E_FORMAT, path, "an added token has no id");
        const uint8_t flags = token_flags(token, flag(token, "special", false));
        if (!add_added(path, text(token, "content"), id, flags, v, err)) return false;
    }
    return true;
}

// The id that a template's special token stands for.
static bool template_id(const std::string &path, const Json &post, const std::string &name, int32_t *id,
                        bnb_error *err) {
    const Json &ids = member(member(member(post, "special_tokens"), name.c_str()), "ids");
    if (ids.is_array() && ids.size() == 1 && is_id(ids[0], id)) return true;
    return fail(err, BNB_E_UNSUPPORTED, path, "post_processor: " + quote(name) + " does not stand for exactly one id");
}

// TemplateProcessing: [one token] text [one token]
static bool read_template(const std::string &path, const Json &post, Vocab *v, bnb_error *err) {
    const Json &single = member(post, "single");
    if (!single.is_array()) return fail(err, BNB_E_FORMAT, path, "post_processor: the template has no list \"single\"");
    int n_texts = 0;
    for (const Json &item : single) {
        if (item.contains("Sequence")) {
            ++n_texts;
            continue;
        }
        bool *add = n_texts == 0 ? &v->data.add_bos : &v->data.add_eos;
        if (*add)
            return fail(err, BNB_E_UNSUPPORTED, path, "post_processor adds more than one token at an end of the text");
        *add = true;
        int32_t *id = n_texts == 0 ? &v->data.bos : &v->data.eos;
        if (!template_id(path, post, text(member(item, "SpecialToken"), "id"), id, err)) return false;
    }
    return n_texts == 1 ||
           fail(err, BNB_E_UNSUPPORTED, path, "post_processor: the template is not [token] text [token]");
}

// RobertaProcessing and BertProcessing: {"cls": [text, id], "sep": [text, id]} around the text
static bool read_cls_sep(const std::string &path, const Json &post, Vocab *v, bnb_error *err) {
    const Json &cls = member(post, "cls"), &sep = member(post, "sep");
    if (!cls.is_array() || cls.size() != 2 || !is_id(cls[1], &v->data.bos) || !sep.is_array() || sep.size() != 2 ||
        !is_id(sep[1], &v->data.eos))
        return fail(err, BNB_E_FORMAT, path, "post_processor: cls and sep are not [text, id]");
    v->data.add_bos = v->data.add_eos = true;
    return true;
}

static bool read_post_processor(const std::string &path, const Json &v, Vocab *out, bnb_error *err) {
    for (const Json &step : steps_of(v, "processors")) {
        const std::string type = text(step, "type");
        if (type == "TemplateProcessing") {
            if (!read_template(path, step, out, err)) return false;
        } else if (type == "RobertaProcessing" || type == "BertProcessing") {
            if (!read_cls_sep(path, step, out, err)) return false;
        } else if (type != "ByteLevel") { // which changes offsets only
            return fail(err, BNB_E_UNSUPPORTED, path, "post_processor " + quote(type) + " is not supported");
        }
    }
    return true;
}

static bool read_tokenizer_json(const std::string &path, Vocab *v, bnb_error *err) {
    Json j;
    if (!read_object(path, &j, err) || !read_normalizer(path, member(j, "normalizer"), err)) return false;
    // Before the pre-tokenizer: "byte_fallback" says more than "no ByteLevel" does.
    return read_model(path, member(j, "model"), v, err) &&
           read_pre_tokenizer(path, member(j, "pre_tokenizer"), v, err) &&
           read_added_tokens(path, member(j, "added_tokens"), v, err) &&
           read_post_processor(path, member(j, "post_processor"), v, err);
}

// ---- [PAIR] ---------------------------------------------------------------------------------------------------------

// Lines of merges.txt, without the "#version" line. Other lines may begin with '#': it is a token.
static std::vector<std::string> merge_lines(std::string_view text) {
    std::vector<std::string> lines;
    for (size_t at = 0; at < text.size();) {
        size_t end = text.find('\n', at);
        if (end == std::string_view::npos) end = text.size();
        std::string line(text.substr(at, end - at));
        if (!line.empty() && line.back() == '\r') line.pop_back();
        const bool skip = line.empty() || (at == 0 && line.compare(0, 8, "#version") == 0);
        if (!skip) lines.push_back(std::move(line));
        at = end + 1;
    }
    return lines;
}

// GPT-2 numbers the bytes in the order of the alphabet, then the merges, then <|endoftext|>.
static bool number_as_gpt2(const std::string &path, const std::vector<std::string> &lines, Vocab *v, bnb_error *err) {
    std::map<std::string, char> in_alphabet_order;
    for (int b = 0; b < 256; ++b) in_alphabet_order[bytes_to_alphabet(std::string(1, char(b)))] = char(b);
    int32_t id = 0;
    for (const auto &item : in_alphabet_order)
        if (!add_token(path, item.first, id++, v, err)) return false;
    for (std::string name : lines) {
        const size_t space = name.find(' ');
        if (space != std::string::npos) name.erase(space, 1);
        if (id >= TOKENIZER_MAX_TOKENS - 1) return fail(err, BNB_E_LIMIT, path, "too many merges");
        if (!add_token(path, name, id++, v, err)) return false;
    }
    return add_token(path, "<|endoftext|>", id, v, err);
}

// The file among those that exists; its path is empty if none does.
static std::string first_of(const std::string &dir, std::initializer_list<const char *> names) {
    for (const char *name : names)
        if (file_exists(dir + "/" + name)) return dir + "/" + name;
    return std::string();
}

static bool read_pair(const std::string &dir, const std::string &merges_path, Vocab *v, bnb_error *err) {
    const std::unique_ptr<MappedFile> file = MappedFile::open(merges_path, err);
    if (!file) return false;
    if (file->size() > MAX_FILE_BYTES)
        return fail(err, BNB_E_LIMIT, merges_path, "larger than 128 MiB, which no tokenizer file is");
    const std::vector<std::string> lines =
        merge_lines({reinterpret_cast<const char *>(file->data()), size_t(file->size())});
    const std::string vocab_path = first_of(dir, {"vocab.json", "encoder.json"});
    if (!vocab_path.empty()) {
        Json vocab;
        if (!read_object(vocab_path, &vocab, err) || !add_vocab(vocab_path, vocab, v, err)) return false;
    } else if (merges_path == dir + "/vocab.bpe") { // OpenAI's name; OPT's merges.txt has other ids for the same merges
        if (!number_as_gpt2(merges_path, lines, v, err)) return false;
    } else {
        return fail(err, BNB_E_IO, dir, "there is a merges.txt but no vocab.json");
    }
    v->data.merges.reserve(lines.size());
    for (size_t i = 0; i < lines.size(); ++i)
        if (!add_merge_line(merges_path, i, lines[i], v, err)) return false;
    return true;
}

// ---- [CONFIG] -------------------------------------------------------------------------------------------------------

namespace {

struct Config {
    std::string path;      // of tokenizer_config.json
    Json main, map, added; // tokenizer_config.json, special_tokens_map.json, added_tokens.json; {} where absent

    const Json &token(const char *key) const {
        const Json &v = member(main, key);
        return v.is_null() ? member(map, key) : v;
    }
};

} // namespace

static bool read_config(const std::string &dir, Config *c, bnb_error *err) {
    c->path = dir + "/tokenizer_config.json";
    return read_json_if_there(c->path, &c->main, err) &&
           read_json_if_there(dir + "/special_tokens_map.json", &c->map, err) &&
           read_json_if_there(dir + "/added_tokens.json", &c->added, err);
}

// {"id": {content, ...}}
static bool apply_added_tokens_decoder(const Config &c, Vocab *v, bnb_error *err) {
    const Json &decoder = member(c.main, "added_tokens_decoder");
    if (!decoder.is_object()) return true;
    for (const auto &item : decoder.items()) {
        const Json number = Json::parse(item.key(), nullptr, false);
        int32_t id = 0;
        if (!is_id(number, &id))
            return fail(err, BNB_E_FORMAT, c.path, "added_tokens_decoder: bad id " + quote(item.key()));
        const uint8_t flags = token_flags(item.value(), flag(item.value(), "special", false));
        if (!add_added(c.path, text(item.value(), "content"), id, flags, v, err)) return false;
    }
    return true;
}

// added_tokens.json, which older libraries wrote: {content: id}
static bool apply_added_tokens_json(const std::string &dir, const Config &c, Vocab *v, bnb_error *err) {
    const std::string path = dir + "/added_tokens.json";
    for (const auto &item : c.added.items()) {
        int32_t id = 0;
        if (!is_id(item.value(), &id))
            return fail(err, BNB_E_FORMAT, path, "token " + quote(item.key()) + " has no id");
        if (v->added.count(item.key())) continue;
        if (!add_added(path, item.key(), id, TOKEN_ADDED | TOKEN_NORMALIZED, v, err)) return false;
    }
    return true;
}

static void apply_named(const Config &c, Vocab *v) {
    TokenizerData &d = v->data;
    const struct {
        const char *key;
        int32_t *id;
    } names[] = {{"bos_token", &d.bos}, {"eos_token", &d.eos}, {"unk_token", &d.unk}, {"pad_token", &d.pad}};
    for (const auto &name : names) {
        const int32_t id = named_token(c.token(name.key), v);
        if (id >= 0 && *name.id < 0) *name.id = id; // a template has said it already
    }
    for (const char *key : {"sep_token", "cls_token", "mask_token"}) named_token(c.token(key), v);
    for (const char *key : {"additional_special_tokens", "extra_special_tokens"}) {
        const Json &list = c.token(key);
        if (!list.is_array() && !list.is_object()) continue;
        for (const Json &token : list) named_token(token, v);
    }
}

static bool is_gpt2_class(const std::string &name) {
    return name.empty() || name == "GPT2Tokenizer" || name == "GPT2TokenizerFast";
}

// What GPT2Tokenizer assumes when the configuration is silent.
static void apply_gpt2_defaults(const Config &c, Vocab *v) {
    const Json end_of_text = "<|endoftext|>";
    const struct {
        const char *key;
        int32_t *id;
    } names[] = {{"bos_token", &v->data.bos}, {"eos_token", &v->data.eos}, {"unk_token", &v->data.unk}};
    for (const auto &name : names)
        if (*name.id < 0 && c.token(name.key).is_null()) *name.id = named_token(end_of_text, v);
    // Of the models with this class only OPT begins with </s>; a configuration may fail to say add_bos_token.
    const Json &bos = c.token("bos_token");
    if ((bos.is_object() ? text(bos, "content") : text_of(bos)) == "</s>") v->data.add_bos = true;
}

static bool apply_config(const std::string &dir, const Config &c, bool has_tokenizer_json, Vocab *v, bnb_error *err) {
    const std::string name = text(c.main, "tokenizer_class");
    if (!has_tokenizer_json && !is_gpt2_class(name) && name.compare(0, 16, "CodeGenTokenizer") != 0)
        return fail(err, BNB_E_UNSUPPORTED, c.path,
                    "tokenizer_class " + quote(name) + " without a tokenizer.json is not supported");
    if (!apply_added_tokens_decoder(c, v, err) || !apply_added_tokens_json(dir, c, v, err)) return false;
    apply_named(c, v);
    if (!has_tokenizer_json && is_gpt2_class(name)) apply_gpt2_defaults(c, v);
    TokenizerData &d = v->data;
    d.add_bos = flag(c.main, "add_bos_token", d.add_bos) && d.bos >= 0;
    d.add_eos = flag(c.main, "add_eos_token", d.add_eos) && d.eos >= 0;
    if (d.pattern == PATTERN_GPT2) d.add_prefix_space = flag(c.main, "add_prefix_space", d.add_prefix_space);
    return true;
}

static bool read_vocabulary(const std::string &dir, bool *is_json, Vocab *v, bnb_error *err) {
    const std::string json = dir + "/tokenizer.json";
    *is_json = file_exists(json);
    if (*is_json) return read_tokenizer_json(json, v, err);
    const std::string merges = first_of(dir, {"merges.txt", "vocab.bpe"});
    if (!merges.empty()) return read_pair(dir, merges, v, err);
    if (file_exists(dir + "/tokenizer.model"))
        return fail(err, BNB_E_UNSUPPORTED, dir + "/tokenizer.model", "SentencePiece tokenizers are not supported");
    return fail(err, BNB_E_IO, dir, "there is no tokenizer (neither tokenizer.json nor vocab.json and merges.txt)");
}

bool tokenizer_from_dir(const std::string &dir, TokenizerData *data, bnb_error *err) {
    Vocab v;
    Config config;
    bool is_json = false;
    if (!read_vocabulary(dir, &is_json, &v, err) || !read_config(dir, &config, err) ||
        !apply_config(dir, config, is_json, &v, err))
        return false;
    bnb_error why;
    if (!check(v.data, &why)) return fail(err, why.code, dir, why.msg);
    *data = std::move(v.data);
    return true;
}

// ---- [WRITE] --------------------------------------------------------------------------------------------------------

static std::string vocab_name(const TokenizerData &data, size_t id) {
    return (data.flags[id] & TOKEN_ADDED) ? data.tokens[id] : bytes_to_alphabet(data.tokens[id]);
}

static Json added_to_json(const TokenizerData &data) {
    Json list = Json::array();
    for (size_t i = 0; i < data.tokens.size(); ++i) {
        const uint8_t f = data.flags[i];
        if (!(f & TOKEN_ADDED) || data.tokens[i].empty()) continue;
        list.push_back({{"id", i},
                        {"content", data.tokens[i]},
                        {"single_word", (f & TOKEN_SINGLE_WORD) != 0},
                        {"lstrip", (f & TOKEN_LSTRIP) != 0},
                        {"rstrip", (f & TOKEN_RSTRIP) != 0},
                        {"normalized", (f & TOKEN_NORMALIZED) != 0},
                        {"special", (f & TOKEN_SPECIAL) != 0}});
    }
    return list;
}

static Json byte_level(bool add_prefix_space, bool use_regex) {
    return {{"type", "ByteLevel"},
            {"add_prefix_space", add_prefix_space},
            {"trim_offsets", true},
            {"use_regex", use_regex}};
}

static Json pre_tokenizer_to_json(const TokenizerData &data) {
    const Pattern *pattern = pattern_find(data.pattern);
    if (!pattern || data.pattern == PATTERN_GPT2) return byte_level(data.add_prefix_space, true);
    Json steps = Json::array();
    if (pattern->digits_apart) steps.push_back({{"type", "Digits"}, {"individual_digits", true}});
    else
        steps.push_back(
            {{"type", "Split"}, {"pattern", {{"Regex", pattern->regex}}}, {"behavior", "Isolated"}, {"invert", false}});
    steps.push_back(byte_level(false, pattern->digits_apart));
    return {{"type", "Sequence"}, {"pretokenizers", steps}};
}

static Json post_processor_to_json(const TokenizerData &data) {
    if (!data.add_bos && !data.add_eos) return nullptr;
    Json single = Json::array(), pair = Json::array(), special = Json::object();
    const auto add_token = [&](int32_t id) {
        const std::string &name = data.tokens[size_t(id)];
        single.push_back({{"SpecialToken", {{"id", name}, {"type_id", 0}}}});
        pair.push_back(single.back());
        special[name] = {{"id", name}, {"ids", Json::array({id})}, {"tokens", Json::array({name})}};
    };
    const Json a = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}, b = {{"Sequence", {{"id", "B"}, {"type_id", 0}}}};
    if (data.add_bos) add_token(data.bos);
    single.push_back(a);
    pair.push_back(a);
    pair.push_back(b);
    if (data.add_eos) add_token(data.eos);
    return {{"type", "TemplateProcessing"}, {"single", single}, {"pair", pair}, {"special_tokens", special}};
}

static Json model_to_json(const TokenizerData &data) {
    // Added tokens go in as well, so that each keeps its id whatever the order they are added in.
    Json vocab = Json::object();
    for (size_t i = 0; i < data.tokens.size(); ++i)
        if (!data.tokens[i].empty()) vocab[vocab_name(data, i)] = i;
    Json merges = Json::array();
    for (const TokenizerData::Merge &m : data.merges)
        merges.push_back(vocab_name(data, size_t(m.left)) + " " + vocab_name(data, size_t(m.right)));
    Json unk = nullptr;
    if (data.unk >= 0) unk = vocab_name(data, size_t(data.unk));
    return {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", unk},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"ignore_merges", data.ignore_merges},
            {"vocab", vocab},
            {"merges", merges}};
}

std::string tokenizer_to_json(const TokenizerData &data) {
    const Json j = {{"version", "1.0"},
                    {"truncation", nullptr},
                    {"padding", nullptr},
                    {"added_tokens", added_to_json(data)},
                    {"normalizer", nullptr},
                    {"pre_tokenizer", pre_tokenizer_to_json(data)},
                    {"post_processor", post_processor_to_json(data)},
                    {"decoder", byte_level(data.add_prefix_space, true)},
                    {"model", model_to_json(data)}};
    return j.dump(1, ' ', false, Json::error_handler_t::replace); // replace: nothing is thrown for ill-formed text
}

} // namespace bnb
