// safetensors.cpp: see safetensors.h. The rules are those of the official reader (safetensors 0.8), in its order; where
// the format's text is stricter than that reader (a name that stands twice), the text is followed.
#include "safetensors.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <system_error>
#include <unordered_set>

#include "arch.h" // shape_text
#include "pytorch.h"

namespace bnb {

using nlohmann::json;
namespace fs = std::filesystem;

// Beyond the format's own rules: what no real checkpoint needs and what would cost memory or hide something.
constexpr uint64_t max_header_bytes = 100000000; // the format's
constexpr uint64_t max_index_bytes = 32 << 20;
constexpr size_t max_tensors = 1 << 20;
constexpr size_t max_name_bytes = 1024;
constexpr size_t max_rank = 8;
constexpr int max_depth = 64;

// ---- the header -----------------------------------------------------------------------------------------------------

namespace {

struct Dtype {
    const char *name;
    uint32_t bits;
    int32_t type; // -1: a type that is understood, but that no tensor of ours has
};

const Dtype dtypes[] = {
    {"F32", 32, BNB_F32}, {"F16", 16, BNB_F16}, {"BF16", 16, BNB_BF16}, {"I32", 32, BNB_I32},   {"I8", 8, BNB_I8},
    {"U8", 8, BNB_U8},    {"BOOL", 8, -1},      {"F64", 64, -1},        {"I64", 64, -1},        {"U64", 64, -1},
    {"C64", 64, -1},      {"U32", 32, -1},      {"I16", 16, -1},        {"U16", 16, -1},        {"F8_E4M3", 8, -1},
    {"F8_E5M2", 8, -1},   {"F8_E8M0", 8, -1},   {"F8_E4M3FNUZ", 8, -1}, {"F8_E5M2FNUZ", 8, -1}, {"F6_E2M3", 6, -1},
    {"F6_E3M2", 6, -1},   {"F4", 4, -1},
};

const Dtype *find_dtype(const std::string &name) {
    for (const Dtype &d : dtypes)
        if (name == d.name) return &d;
    return nullptr;
}

struct Entry {
    std::string name;
    const Dtype *dtype = nullptr;
    std::vector<uint64_t> shape, offsets;
    bool has_shape = false, has_offsets = false;
};

// Builds the list of tensors straight from the parser's events: a tree of a hostile 100 MB header would take gigabytes.
// Returning false stops the parser; `problem` is then the end of a sentence that begins with "the header".
class HeaderSax : public nlohmann::json_sax<json> {
public:
    std::vector<Entry> entries;
    std::string problem;

    bool null() override { return scalar(); }
    bool boolean(bool) override { return scalar(); }
    bool number_integer(number_integer_t) override { return scalar(); } // negative ones only
    bool number_float(number_float_t, const string_t &) override { return scalar(); }
    bool binary(binary_t &) override { return scalar(); }

    bool number_unsigned(number_unsigned_t value) override {
        if (depth_ != 3 || field_ == Other) return scalar();
        std::vector<uint64_t> &list = field_ == Shape ? entries.back().shape : entries.back().offsets;
        if (list.size() == (field_ == Shape ? max_rank : 2))
            return fail(field_ == Shape ? "has a tensor of more than 8 dimensions, " + current()
                                        : "gives more than two data_offsets to " + current());
        list.push_back(value);
        return true;
    }

    bool string(string_t &value) override {
        if (depth_ == 2 && in_metadata_) return true;
        if (depth_ != 2 || field_ != DtypeName) return scalar();
        entries.back().dtype = find_dtype(value);
        return entries.back().dtype || fail("gives " + current() + " the unknown dtype '" + printable(value) + "'");
    }

    bool start_object(size_t) override {
        if (depth_ >= 2 && !skipping()) return scalar();
        return enter();
    }

    bool start_array(size_t) override {
        if (depth_ == 0) return fail("is not a JSON object");
        bool list = depth_ == 2 && !in_metadata_ && (field_ == Shape || field_ == Offsets);
        if (!list && !skipping()) return scalar();
        return enter();
    }

    bool key(string_t &value) override {
        if (depth_ == 1) return begin_entry(value);
        if (depth_ == 2 && !in_metadata_) return begin_field(value);
        return true;
    }

    bool end_object() override {
        depth_--;
        if (depth_ != 1 || in_metadata_) return true;
        const Entry &e = entries.back();
        if (e.dtype && e.has_shape && e.has_offsets && e.offsets.size() == 2) return true;
        return fail("lacks " +
                    std::string(!e.dtype       ? "the dtype"
                                : !e.has_shape ? "the shape"
                                               : "the two data_offsets") +
                    " of " + current());
    }

    bool end_array() override {
        depth_--;
        return true;
    }

    bool parse_error(size_t position, const std::string &, const nlohmann::detail::exception &) override {
        return fail("is not valid JSON at byte " + std::to_string(position));
    }

private:
    enum Field { Other, DtypeName, Shape, Offsets };

    bool fail(const std::string &text) {
        if (problem.empty()) problem = text;
        return false;
    }

    std::string current() const { return "'" + printable(entries.back().name) + "'"; }

    // Inside a key that the format does not know: its value is passed over.
    bool skipping() const { return depth_ >= 2 && !in_metadata_ && field_ == Other; }

    bool enter() { return ++depth_ <= max_depth || fail("is nested too deep"); }

    // A value where one of another kind belongs, unless it is passed over.
    bool scalar() {
        if (depth_ == 0) return fail("is not a JSON object");
        if (skipping()) return true;
        if (in_metadata_)
            return fail(depth_ == 1 ? "has a __metadata__ that is not an object"
                                    : "has a value in __metadata__ that is not a string");
        if (depth_ == 1) return fail("gives " + current() + " no object");
        const char *kinds[] = {"", "a dtype that is not a string",
                               "a shape that is not a list of non-negative integers",
                               "data_offsets that are not a list of non-negative integers"};
        return fail("gives " + current() + " " + kinds[field_]);
    }

    bool begin_entry(const std::string &name) {
        in_metadata_ = name == "__metadata__";
        if (in_metadata_) {
            if (seen_metadata_) return fail("has two __metadata__");
            seen_metadata_ = true;
            return true;
        }
        if (entries.size() == max_tensors) return fail("lists more than 1048576 tensors");
        if (name.size() > max_name_bytes) return fail("has a name of more than 1024 bytes, '" + printable(name) + "'");
        if (name.find('\0') != std::string::npos)
            return fail("has a name with a NUL byte in it, '" + printable(name) + "'");
        if (!names_.insert(name).second) return fail("lists '" + printable(name) + "' twice");
        entries.emplace_back();
        entries.back().name = name;
        field_ = Other;
        return true;
    }

    bool begin_field(const std::string &name) {
        Entry &e = entries.back();
        field_ = name == "dtype" ? DtypeName : name == "shape" ? Shape : name == "data_offsets" ? Offsets : Other;
        bool again = field_ == DtypeName ? e.dtype != nullptr : field_ == Shape ? e.has_shape : e.has_offsets;
        if (field_ != Other && again) return fail("gives " + current() + " two " + name);
        if (field_ == Shape) e.has_shape = true;
        if (field_ == Offsets) e.has_offsets = true;
        return true;
    }

    int depth_ = 0; // containers that are open: 1 the file, 2 a tensor or __metadata__, 3 a list
    Field field_ = Other;
    bool in_metadata_ = false, seen_metadata_ = false;
    std::unordered_set<std::string> names_;
};

// Bits of a tensor; false on overflow. Left to right as the official reader does: a zero that comes late does not help.
bool tensor_bits(const Entry &e, uint64_t *bits) {
    uint64_t n = 1;
    for (uint64_t d : e.shape)
        if (__builtin_mul_overflow(n, d, &n) || d > uint64_t(INT64_MAX)) return false;
    return !__builtin_mul_overflow(n, uint64_t(e.dtype->bits), bits);
}

std::vector<int64_t> signed_shape(const Entry &e) { return {e.shape.begin(), e.shape.end()}; }

// One tensor must follow the other: no holes, no overlaps, and sizes that are exactly what shape and dtype say.
bool check_layout(const std::vector<Entry> &entries, uint64_t data_bytes, const std::string &file, bnb_error *err) {
    uint64_t end = 0;
    for (const Entry &e : entries) {
        std::string name = printable(e.name);
        unsigned long long b0 = e.offsets[0], b1 = e.offsets[1], expected = end;
        if (b0 != end || b1 < b0)
            return failed(err, BNB_E_FORMAT,
                          "%s: '%s' lies at bytes [%llu, %llu) of the data, but byte %llu should begin it (%s)",
                          file.c_str(), name.c_str(), b0, b1, expected,
                          b1 < b0    ? "its end is before its begin"
                          : b0 < end ? "it overlaps another"
                                     : "there is a hole");
        uint64_t bits = 0;
        if (!tensor_bits(e, &bits))
            return failed(err, BNB_E_FORMAT, "%s: '%s' has a shape whose size overflows 64 bits", file.c_str(),
                          name.c_str());
        if (bits % 8 != 0 || bits / 8 != b1 - b0)
            return failed(
                err, BNB_E_FORMAT,
                "%s: '%s' of shape %s and dtype %s needs %llu bits, but lies at bytes [%llu, %llu) of the data",
                file.c_str(), name.c_str(), shape_text(signed_shape(e)).c_str(), e.dtype->name,
                static_cast<unsigned long long>(bits), b0, b1);
        end = e.offsets[1];
    }
    if (end == data_bytes) return true;
    return failed(err, BNB_E_FORMAT,
                  "%s: the tensors end at byte %llu of the data, but %llu bytes are there (a cut or an appended file)",
                  file.c_str(), static_cast<unsigned long long>(end), static_cast<unsigned long long>(data_bytes));
}

// The length of the header: rules 1 to 3.
bool header_length(const uint8_t *p, uint64_t bytes, const std::string &file, uint64_t *length, bnb_error *err) {
    if (bytes < 8)
        return failed(err, BNB_E_FORMAT, "%s: %llu bytes are too few for a safetensors header", file.c_str(),
                      static_cast<unsigned long long>(bytes));
    memcpy(length, p, 8);
    if (*length > max_header_bytes)
        return failed(err, BNB_E_FORMAT,
                      "%s: not a safetensors file, its header would have %llu bytes (at most 100000000)", file.c_str(),
                      static_cast<unsigned long long>(*length));
    if (*length > bytes - 8)
        return failed(err, BNB_E_FORMAT,
                      "%s: the header says it has %llu bytes, but the file ends after %llu (cut short?)", file.c_str(),
                      static_cast<unsigned long long>(*length), static_cast<unsigned long long>(bytes - 8));
    return true;
}

// The text of the header: rules 4 and 5. The parser would take a NUL for the end of the text and skip a BOM.
bool parse_header(const char *text, size_t length, HeaderSax *sax) {
    const uint8_t *p = reinterpret_cast<const uint8_t *>(text);
    const uint8_t *bad = find_ill_formed(p, p + length);
    if (!bad) bad = static_cast<const uint8_t *>(memchr(p, 0, length));
    if (bad) {
        sax->problem = "is not valid UTF-8 text at byte " + std::to_string(bad - p);
        return false;
    }
    if (length >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0) {
        sax->problem = "begins with a byte order mark";
        return false;
    }
    if (json::sax_parse(text, text + length, sax)) return true;
    if (sax->problem.empty()) sax->problem = "is not valid JSON";
    return false;
}

} // namespace

bool safetensors_parse(const void *data, uint64_t bytes, const std::string &file, std::vector<SourceTensor> *out,
                       bnb_error *err) {
    const std::string shown = printable_path(file);
    const uint8_t *p = static_cast<const uint8_t *>(data);
    uint64_t length = 0;
    if (!header_length(p, bytes, shown, &length, err)) return false;
    HeaderSax sax;
    if (!parse_header(reinterpret_cast<const char *>(p + 8), size_t(length), &sax))
        return failed(err, BNB_E_FORMAT, "%s: the header %s", shown.c_str(), sax.problem.c_str());
    // Entries without bytes share their begin with the next one: the end decides, then the name, so order is fixed.
    std::sort(sax.entries.begin(), sax.entries.end(), [](const Entry &a, const Entry &b) {
        return a.offsets != b.offsets ? a.offsets < b.offsets : a.name < b.name;
    });
    if (!check_layout(sax.entries, bytes - 8 - length, shown, err)) return false;
    for (const Entry &e : sax.entries) {
        SourceTensor t;
        t.name = e.name;
        t.dtype = e.dtype->name;
        t.type = e.dtype->type;
        t.shape = signed_shape(e);
        t.data = p + 8 + length + e.offsets[0];
        t.bytes = e.offsets[1] - e.offsets[0];
        out->push_back(std::move(t));
    }
    return true;
}

// ---- what else a file may be ----------------------------------------------------------------------------------------

// What kind of checkpoint a file is that begins like this, if it is one that we cannot read; NULL otherwise.
static const char *foreign_format(const uint8_t *p, uint64_t n) {
    return n >= 4 && memcmp(p, "GGUF", 4) == 0 ? "a GGUF file" : nullptr;
}

static bool refuse_foreign(const std::string &path, const char *what, bnb_error *err) {
    return failed(err, BNB_E_UNSUPPORTED, "%s is %s, which is not read yet: save the model as safetensors",
                  printable_path(path).c_str(), what);
}

// Weights that others than bitsandbytes quantized are recognised by what lies beside them.
static bool refuse_quantized(const std::vector<SourceTensor> &tensors, bnb_error *err) {
    static const struct {
        const char *suffix, *what;
    } marks[] = {
        {".g_idx", "GPTQ"},
        {".qweight", "GPTQ or AWQ"},
        {".codebooks", "AQLM"},
        {".W_q", "HQQ"},
        {".weight_scale", "fp8"},
        {".weight_scale_inv", "fp8"},
    };
    for (const auto &mark : marks) {
        for (const SourceTensor &t : tensors) {
            size_t n = strlen(mark.suffix);
            if (t.name.size() < n || t.name.compare(t.name.size() - n, n, mark.suffix) != 0) continue;
            return failed(err, BNB_E_UNSUPPORTED,
                          "the checkpoint is already quantized (%s, by its tensor '%s'), which is not read yet: start "
                          "from its unquantized form",
                          mark.what, printable(t.name).c_str());
        }
    }
    return true;
}

// ---- checkpoints ----------------------------------------------------------------------------------------------------

static bool ends_with(const std::string &s, const char *end) {
    size_t n = strlen(end);
    return s.size() >= n && s.compare(s.size() - n, n, end) == 0;
}

// File names in a directory that end with `end`, sorted.
static std::vector<std::string> list_files(const std::string &dir, const char *end) {
    std::vector<std::string> names;
    std::error_code ec;
    for (fs::directory_iterator it(dir, ec), last; !ec && it != last; it.increment(ec)) {
        std::string name = it->path().filename().string();
        if (ends_with(name, end)) names.push_back(name);
    }
    std::sort(names.begin(), names.end());
    return names;
}

// What training scripts and adapters leave beside the weights.
static bool is_side_file(const std::string &name) {
    for (const char *other : {"adapter_model.safetensors", "adapter_model.bin", "training_args.bin", "optimizer.bin",
                              "optimizer.pt", "scheduler.bin", "scheduler.pt", "scaler.pt", "rng_state.pth"})
        if (name == other) return true;
    return name.compare(0, 10, "rng_state_") == 0;
}

// The file in a directory that has the weights, or the index of those that have: transformers' order, then accelerate's
// "the one index file", then the one safetensors file, then the one of PyTorch.
static bool find_weights(const std::string &dir, std::string *path, bnb_error *err) {
    for (const char *name :
         {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"}) {
        *path = dir + "/" + name;
        if (file_exists(*path)) return true;
    }
    for (const char *end : {".index.json", ".safetensors", ".bin", ".pt", ".pth"}) {
        std::vector<std::string> names = list_files(dir, end);
        names.erase(std::remove_if(names.begin(), names.end(), is_side_file), names.end());
        if (names.size() > 1)
            return failed(err, BNB_E_ARG, "%s has %zu files whose names end in %s (%s, ...): name the one to load",
                          printable_path(dir).c_str(), names.size(), end, printable(names[0]).c_str());
        *path = names.empty() ? "" : dir + "/" + names[0];
        if (!names.empty()) return true;
    }
    static const struct {
        const char *end, *what;
    } others[] = {
        {"adapter_config.json", "a LoRA adapter, not a model"},
        {".gguf", "a GGUF file"},
    };
    for (const auto &other : others) {
        std::vector<std::string> names = list_files(dir, other.end);
        if (!names.empty()) return refuse_foreign(dir + "/" + names[0], other.what, err);
    }
    return failed(err, BNB_E_IO,
                  "%s has no weights in it: model.safetensors or model.safetensors.index.json was expected",
                  printable_path(dir).c_str());
}

// What the file begins with decides, or, if that says nothing, its name.
static bool is_pytorch(const std::string &path, const MappedFile &file) {
    const bool named = ends_with(path, ".bin") || ends_with(path, ".pt") || ends_with(path, ".pth");
    return named || pytorch_is(file.data(), file.size());
}

bool Checkpoint::add_file(bnb_env *env, const std::string &path, std::vector<SourceTensor> *tensors, bnb_error *err) {
    std::unique_ptr<MappedFile> file = MappedFile::open(path, err);
    if (!file) return false;
    if (const char *what = foreign_format(file->data(), file->size())) return refuse_foreign(path, what, err);
    std::vector<std::string> notes;
    const bool ok = is_pytorch(path, *file) ? pytorch_parse(file->data(), file->size(), path, tensors, &notes, err)
                                            : safetensors_parse(file->data(), file->size(), path, tensors, err);
    if (!ok) return false;
    for (const std::string &note : notes)
        bnb_log(env, BNB_LOG_INFO, "%s: %s", printable_path(path).c_str(), note.c_str());
    files_.push_back({path, std::move(file)});
    return true;
}

bool Checkpoint::check(bnb_error *err) const {
    for (const File &f : files_)
        if (pytorch_is(f.map->data(), f.map->size()) && !pytorch_check_crc(f.map->data(), f.map->size(), f.path, err))
            return false;
    return true;
}

// A shard lies beside its index: a name that could lead elsewhere is refused.
static bool is_plain_file_name(const std::string &name) {
    return !name.empty() && name != "." && name.find("..") == std::string::npos &&
           name.find_first_of(std::string("/\\\0", 3)) == std::string::npos;
}

using ShardNames = std::map<std::string, std::unordered_set<std::string>>; // file -> tensors that it has

static bool read_index(const std::string &path, ShardNames *shards, bnb_error *err) {
    const std::string shown = printable_path(path);
    json index;
    if (!json_read(path, &index, err, max_index_bytes)) return false;
    const json *names = &index; // accelerate also takes an index that is the map itself
    if (index.is_object() && index.contains("weight_map")) names = &index["weight_map"];
    if (!names->is_object()) return failed(err, BNB_E_FORMAT, "%s: the weight_map is not an object", shown.c_str());
    for (const auto &item : names->items()) {
        if (!item.value().is_string())
            return failed(err, BNB_E_FORMAT, "%s: '%s' is not mapped to a file name", shown.c_str(),
                          printable(item.key()).c_str());
        const std::string file = item.value().get<std::string>();
        if (!is_plain_file_name(file))
            return failed(err, BNB_E_FORMAT,
                          "%s: '%s' is mapped to '%s', which is not the plain name of a file beside the index",
                          shown.c_str(), printable(item.key()).c_str(), printable(file).c_str());
        (*shards)[file].insert(item.key());
    }
    return true;
}

bool Checkpoint::add_index(bnb_env *env, const std::string &path, bnb_error *err) {
    ShardNames shards;
    if (!read_index(path, &shards, err)) return false;
    for (auto &shard : shards) {
        const std::string file = directory_ + "/" + shard.first;
        std::vector<SourceTensor> tensors;
        if (!add_file(env, file, &tensors, err)) return false;
        for (SourceTensor &t : tensors) {
            if (shard.second.erase(t.name)) tensors_.push_back(std::move(t));
            else
                bnb_log(env, BNB_LOG_WARN, "%s: '%s' is not in the index and is left out", printable_path(file).c_str(),
                        printable(t.name).c_str());
        }
        if (shard.second.empty()) continue;
        return failed(err, BNB_E_FORMAT, "%s: the index says that '%s' is in this file, but it is not",
                      printable_path(file).c_str(),
                      printable(*std::min_element(shard.second.begin(), shard.second.end())).c_str());
    }
    return true;
}

std::unique_ptr<Checkpoint> Checkpoint::open(bnb_env *env, const std::string &path, bnb_error *err) {
    std::unique_ptr<Checkpoint> c(new Checkpoint);
    std::string weights = path;
    std::error_code ec;
    if (fs::is_directory(path, ec)) {
        c->directory_ = path;
        while (c->directory_.size() > 1 && c->directory_.back() == '/') c->directory_.pop_back();
        if (!find_weights(c->directory_, &weights, err)) return nullptr;
    } else {
        size_t slash = path.rfind('/');
        c->directory_ = slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
    }
    const bool ok = ends_with(weights, ".index.json") ? c->add_index(env, weights, err)
                                                      : c->add_file(env, weights, &c->tensors_, err);
    if (!ok || !refuse_quantized(c->tensors_, err)) return nullptr;
    return c;
}

} // namespace bnb
