// pytorch.cpp: see pytorch.h. From the bottom up: the zip, the values of a pickle, the interpreter, the state dict.
//
// Inside this file a Refusal is thrown; the functions of the header catch it and make a bnb_error of it. Memory that a
// hostile file can make us take is bounded by its own length: strings are views into it, all else is counted.
#include "pytorch.h"

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string_view>
#include <unordered_map>
#include <unordered_set>

#include "arch.h" // shape_text

namespace bnb {
namespace {

constexpr uint64_t max_pickle_bytes = 256 << 20;
constexpr size_t max_memo = 10000000;
constexpr size_t max_objects = 10000000; // lists and dicts
constexpr size_t max_values = 32 << 20;  // ever pushed; a tensor takes about 25
constexpr size_t max_tensors = 1 << 20;  // also of storages
constexpr size_t max_depth = 1000;
constexpr size_t max_name_bytes = 1024;
constexpr size_t max_rank = 8;
constexpr uint64_t max_dense_ratio = 64;         // a strided tensor as a dense one, to its storage,
constexpr uint64_t small_dense_bytes = 16 << 20; // unless it has no more than this
constexpr uint64_t max_dense_bytes = uint64_t(16) << 30;

// ---- refusing -------------------------------------------------------------------------------------------------------

struct Refusal {
    bnb_status code;
    std::string text; // a sentence without the file's name
};

[[noreturn]] void refuse(bnb_status code, const std::string &text) { throw Refusal{code, text}; }

__attribute__((format(printf, 1, 2))) std::string format(const char *f, ...) {
    char text[480];
    va_list args;
    va_start(args, f);
    vsnprintf(text, sizeof text, f, args);
    va_end(args);
    return text;
}

std::string quoted(std::string_view name) { return "'" + printable(std::string(name)) + "'"; }

unsigned long long ull(uint64_t n) { return n; }

template <class T> T load(const uint8_t *p) { // little-endian, as the machines that bnb runs on
    T v;
    memcpy(&v, p, sizeof v);
    return v;
}

bool begins_with(const uint8_t *p, uint64_t n, const char *magic, size_t length) {
    return n >= length && memcmp(p, magic, length) == 0;
}

bool is_digits(std::string_view s) {
    return !s.empty() && s.size() <= 20 && s.find_first_not_of("0123456789") == s.npos; // 20: of a 64-bit address
}

// ---- zip ------------------------------------------------------------------------------------------------------------

struct ZipEntry {
    std::string_view name;
    const uint8_t *data;
    uint64_t bytes, begin; // begin: of the local header, from the file's
    uint32_t crc;
};

// The entries of a zip file. Sizes and offsets are taken from the central directory alone: PyTorch leaves them out of
// the local headers.
class Zip {
public:
    Zip(const uint8_t *p, uint64_t n) : p_(p), n_(n) {
        read_directory(find_directory());
        check_no_overlap();
    }

    const ZipEntry *find(const std::string &name) const {
        auto it = by_name_.find(name);
        return it == by_name_.end() ? nullptr : &entries_[it->second];
    }
    const std::vector<ZipEntry> &entries() const { return entries_; }

private:
    struct Directory {
        uint64_t count, bytes, offset, limit; // limit: where the records behind it begin
    };

    static constexpr uint64_t end_bytes = 22, locator_bytes = 20, end64_bytes = 56, central_bytes = 46,
                              local_bytes = 30;

    bool is_record(uint64_t at, uint8_t a, uint8_t b) const {
        return p_[at] == 'P' && p_[at + 1] == 'K' && p_[at + 2] == a && p_[at + 3] == b;
    }

    // The end record: the last place where one fits, its comment included.
    uint64_t find_end() const {
        const uint64_t lowest = n_ > end_bytes + 65535 ? n_ - end_bytes - 65535 : 0;
        for (uint64_t at = n_ < end_bytes ? 0 : n_ - end_bytes + 1; at-- > lowest;)
            if (is_record(at, 5, 6) && load<uint16_t>(p_ + at + 20) == n_ - at - end_bytes) return at;
        refuse(BNB_E_FORMAT, "it begins as a zip file, but the directory at its end is missing (cut short?)");
    }

    Directory find_directory() const {
        const uint64_t at = find_end();
        const uint8_t *e = p_ + at;
        Directory d = {load<uint16_t>(e + 10), load<uint32_t>(e + 12), load<uint32_t>(e + 16), at};
        if (at >= locator_bytes && is_record(at - locator_bytes, 6, 7)) read_zip64(at - locator_bytes, &d);
        else if (load<uint16_t>(e + 4) != 0 || load<uint16_t>(e + 6) != 0 || load<uint16_t>(e + 8) != d.count)
            refuse(BNB_E_FORMAT, "the zip is one part of several");
        if (d.offset > d.limit || d.bytes > d.limit - d.offset || d.count > d.bytes / central_bytes)
            refuse(BNB_E_FORMAT,
                   format("the zip's directory of %llu entries in %llu bytes at byte %llu does not fit in the file",
                          ull(d.count), ull(d.bytes), ull(d.offset)));
        return d;
    }

    // The 64-bit record decides. What the old record can hold must agree with it, so that all readers see one file.
    void read_zip64(uint64_t locator, Directory *d) const {
        const uint64_t at = load<uint64_t>(p_ + locator + 8);
        if (locator < end64_bytes || at > locator - end64_bytes || !is_record(at, 6, 6))
            refuse(BNB_E_FORMAT, format("the zip's 64-bit end record is not at byte %llu", ull(at)));
        const uint8_t *e = p_ + at;
        const Directory wide = {load<uint64_t>(e + 32), load<uint64_t>(e + 40), load<uint64_t>(e + 48), at};
        if (load<uint32_t>(e + 16) != 0 || load<uint32_t>(e + 20) != 0 || load<uint64_t>(e + 24) != wide.count)
            refuse(BNB_E_FORMAT, "the zip is one part of several");
        if ((d->count != 0xFFFF && d->count != wide.count) || (d->bytes != UINT32_MAX && d->bytes != wide.bytes) ||
            (d->offset != UINT32_MAX && d->offset != wide.offset))
            refuse(BNB_E_FORMAT, "the zip's two end records disagree");
        *d = wide;
    }

    void read_directory(const Directory &d) {
        uint64_t at = d.offset;
        const uint64_t end = d.offset + d.bytes;
        entries_.reserve(size_t(d.count));
        for (uint64_t i = 0; i < d.count; i++) {
            if (end - at < central_bytes || !is_record(at, 1, 2))
                refuse(BNB_E_FORMAT, format("entry %llu of the zip's directory is damaged", ull(i)));
            at = read_entry(at, end, d.offset);
        }
        if (at != end) refuse(BNB_E_FORMAT, "the zip's directory is longer than its entries");
    }

    // -> where the next one begins
    uint64_t read_entry(uint64_t at, uint64_t end, uint64_t data_end) {
        const uint8_t *c = p_ + at;
        const uint64_t name_bytes = load<uint16_t>(c + 28), extra_bytes = load<uint16_t>(c + 30);
        const uint64_t comment_bytes = load<uint16_t>(c + 32);
        if (name_bytes + extra_bytes + comment_bytes > end - at - central_bytes)
            refuse(BNB_E_FORMAT, "an entry of the zip's directory reaches behind its end");
        const uint8_t *name = c + central_bytes;
        ZipEntry e = {{reinterpret_cast<const char *>(name), size_t(name_bytes)},
                      nullptr,
                      load<uint32_t>(c + 24),
                      load<uint32_t>(c + 42),
                      load<uint32_t>(c + 16)};
        uint64_t stored_bytes = load<uint32_t>(c + 20);
        check_plain(e.name, load<uint16_t>(c + 8), load<uint16_t>(c + 10));
        read_extra(name + name_bytes, extra_bytes, &e, &stored_bytes);
        if (stored_bytes != e.bytes)
            refuse(BNB_E_FORMAT, format("the zip's entry %s claims %llu bytes, but %llu are stored",
                                        quoted(e.name).c_str(), ull(e.bytes), ull(stored_bytes)));
        locate(&e, data_end);
        if (!by_name_.emplace(e.name, entries_.size()).second)
            refuse(BNB_E_FORMAT, "the zip has two entries " + quoted(e.name));
        entries_.push_back(e);
        return at + central_bytes + name_bytes + extra_bytes + comment_bytes;
    }

    static void check_plain(std::string_view name, uint32_t flags, uint32_t method) {
        if (name.empty() || name.size() > max_name_bytes)
            refuse(BNB_E_FORMAT, "an entry of the zip has no name or a very long one");
        if (flags & (1 | 1 << 6 | 1 << 13))
            refuse(BNB_E_UNSUPPORTED, "the zip's entry " + quoted(name) + " is encrypted");
        if (flags & 1 << 5) refuse(BNB_E_UNSUPPORTED, "the zip's entry " + quoted(name) + " is a patch of other data");
        if (method != 0)
            refuse(BNB_E_UNSUPPORTED, format("the zip's entry %s is compressed (method %u), which PyTorch's never are",
                                             quoted(name).c_str(), method));
    }

    // The fields that did not fit in 32 bits stand in the extra field 1, in this order.
    static void read_extra(const uint8_t *p, uint64_t n, ZipEntry *e, uint64_t *stored_bytes) {
        uint64_t *const wide[] = {&e->bytes, stored_bytes, &e->begin};
        for (uint64_t at = 0; n - at >= 4;) {
            const uint64_t id = load<uint16_t>(p + at), bytes = load<uint16_t>(p + at + 2);
            at += 4;
            if (bytes > n - at)
                refuse(BNB_E_FORMAT, "the zip's entry " + quoted(e->name) + " has an extra field that is cut");
            uint64_t used = 0;
            for (uint64_t *field : wide) {
                if (id != 1 || *field != UINT32_MAX || bytes - used < 8) continue;
                *field = load<uint64_t>(p + at + used);
                used += 8;
            }
            at += bytes;
        }
    }

    // Finds the data. The local header must tell of the same entry: some readers go by that.
    void locate(ZipEntry *e, uint64_t data_end) const {
        const std::string name = quoted(e->name);
        if (data_end < local_bytes || e->begin > data_end - local_bytes || !is_record(e->begin, 3, 4))
            refuse(BNB_E_FORMAT, format("the zip's entry %s is not at byte %llu", name.c_str(), ull(e->begin)));
        const uint8_t *l = p_ + e->begin;
        const uint64_t name_bytes = load<uint16_t>(l + 26), head = local_bytes + name_bytes + load<uint16_t>(l + 28);
        check_plain(e->name, load<uint16_t>(l + 6), load<uint16_t>(l + 8));
        if (head > data_end - e->begin || e->bytes > data_end - e->begin - head)
            refuse(BNB_E_FORMAT,
                   format("the zip's entry %s of %llu bytes at byte %llu reaches behind the data's end at byte %llu",
                          name.c_str(), ull(e->bytes), ull(e->begin), ull(data_end)));
        if (e->name != std::string_view(reinterpret_cast<const char *>(l + local_bytes), size_t(name_bytes)))
            refuse(BNB_E_FORMAT,
                   format("the zip's entry %s has another name at byte %llu", name.c_str(), ull(e->begin)));
        e->data = l + head;
    }

    void check_no_overlap() const {
        std::vector<const ZipEntry *> order;
        for (const ZipEntry &e : entries_) order.push_back(&e);
        std::sort(order.begin(), order.end(), [](const ZipEntry *a, const ZipEntry *b) { return a->begin < b->begin; });
        for (size_t i = 1; i < order.size(); i++) {
            const ZipEntry &e = *order[i - 1];
            if (uint64_t(e.data - p_) + e.bytes > order[i]->begin)
                refuse(BNB_E_FORMAT,
                       "the zip's entries " + quoted(e.name) + " and " + quoted(order[i]->name) + " overlap");
        }
    }

    const uint8_t *p_;
    uint64_t n_;
    std::vector<ZipEntry> entries_;
    std::unordered_map<std::string_view, size_t> by_name_;
};

uint32_t crc32_of(const uint8_t *p, uint64_t n) {
    uint32_t table[256], crc = ~0u;
    for (uint32_t i = 0; i < 256; i++) {
        table[i] = i;
        for (int bit = 0; bit < 8; bit++) table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xEDB88320u : 0);
    }
    for (uint64_t i = 0; i < n; i++) crc = crc >> 8 ^ table[(crc ^ p[i]) & 255];
    return ~crc;
}

// ---- what a pickle may name -----------------------------------------------------------------------------------------

struct ElementType {
    const char *dtype; // as safetensors spells it
    uint32_t bytes;
    int32_t type;
};

constexpr ElementType f64 = {"F64", 8, -1}, f32 = {"F32", 4, BNB_F32}, f16 = {"F16", 2, BNB_F16},
                      bf16 = {"BF16", 2, BNB_BF16}, u8 = {"U8", 1, BNB_U8}, i8 = {"I8", 1, BNB_I8},
                      i16 = {"I16", 2, -1}, i32 = {"I32", 4, BNB_I32}, i64 = {"I64", 8, -1}, boolean = {"BOOL", 1, -1},
                      u16 = {"U16", 2, -1}, u32 = {"U32", 4, -1}, u64 = {"U64", 8, -1}, f8_e4m3 = {"F8_E4M3", 1, -1},
                      f8_e5m2 = {"F8_E5M2", 1, -1}, f8_e4m3fnuz = {"F8_E4M3FNUZ", 1, -1},
                      f8_e5m2fnuz = {"F8_E5M2FNUZ", 1, -1}, f8_e8m0 = {"F8_E8M0", 1, -1};

// What comes of a symbol when it is called, or what it is for.
enum class Use { Dict, Tensor, TypedTensor, Parameter, ParameterClass, Plain, Storage, Untyped, Dtype };

struct Symbol {
    const char *module, *name;
    Use use;
    const ElementType *element; // of Storage, Untyped and Dtype
    size_t min_args, max_args;  // of the others
};

// The whole list. A symbol is a name in it and nothing more; nothing is looked up anywhere else.
const Symbol symbols[] = {
    {"collections", "OrderedDict", Use::Dict, nullptr, 0, 1},
    {"torch._utils", "_rebuild_tensor", Use::Tensor, nullptr, 4, 4},
    {"torch._utils", "_rebuild_tensor_v2", Use::Tensor, nullptr, 6, 7},
    {"torch._utils", "_rebuild_tensor_v3", Use::TypedTensor, nullptr, 7, 8},
    {"torch._utils", "_rebuild_parameter", Use::Parameter, nullptr, 3, 3},
    {"torch._utils", "_rebuild_parameter_with_state", Use::Parameter, nullptr, 4, 4},
    {"torch.nn.parameter", "Parameter", Use::ParameterClass, nullptr, 1, 2},
    {"torch", "Size", Use::Plain, nullptr, 1, 1},
    {"torch", "device", Use::Plain, nullptr, 1, 2},
    {"torch.serialization", "_get_layout", Use::Plain, nullptr, 1, 1},
    {"_codecs", "encode", Use::Plain, nullptr, 1, 2},
    {"collections", "Counter", Use::Plain, nullptr, 0, 1},
    {"builtins", "set", Use::Plain, nullptr, 0, 1},
    {"torch", "FloatStorage", Use::Storage, &f32, 0, 0},
    {"torch", "HalfStorage", Use::Storage, &f16, 0, 0},
    {"torch", "BFloat16Storage", Use::Storage, &bf16, 0, 0},
    {"torch", "DoubleStorage", Use::Storage, &f64, 0, 0},
    {"torch", "ByteStorage", Use::Storage, &u8, 0, 0},
    {"torch", "CharStorage", Use::Storage, &i8, 0, 0},
    {"torch", "ShortStorage", Use::Storage, &i16, 0, 0},
    {"torch", "IntStorage", Use::Storage, &i32, 0, 0},
    {"torch", "LongStorage", Use::Storage, &i64, 0, 0},
    {"torch", "BoolStorage", Use::Storage, &boolean, 0, 0},
    {"torch.storage", "UntypedStorage", Use::Untyped, &u8, 0, 0},
    {"torch", "UntypedStorage", Use::Untyped, &u8, 0, 0},
    {"torch", "float64", Use::Dtype, &f64, 0, 0},
    {"torch", "float32", Use::Dtype, &f32, 0, 0},
    {"torch", "float16", Use::Dtype, &f16, 0, 0},
    {"torch", "bfloat16", Use::Dtype, &bf16, 0, 0},
    {"torch", "uint8", Use::Dtype, &u8, 0, 0},
    {"torch", "int8", Use::Dtype, &i8, 0, 0},
    {"torch", "int16", Use::Dtype, &i16, 0, 0},
    {"torch", "int32", Use::Dtype, &i32, 0, 0},
    {"torch", "int64", Use::Dtype, &i64, 0, 0},
    {"torch", "bool", Use::Dtype, &boolean, 0, 0},
    {"torch", "uint16", Use::Dtype, &u16, 0, 0},
    {"torch", "uint32", Use::Dtype, &u32, 0, 0},
    {"torch", "uint64", Use::Dtype, &u64, 0, 0},
    {"torch", "float8_e4m3fn", Use::Dtype, &f8_e4m3, 0, 0},
    {"torch", "float8_e5m2", Use::Dtype, &f8_e5m2, 0, 0},
    {"torch", "float8_e4m3fnuz", Use::Dtype, &f8_e4m3fnuz, 0, 0},
    {"torch", "float8_e5m2fnuz", Use::Dtype, &f8_e5m2fnuz, 0, 0},
    {"torch", "float8_e8m0fnu", Use::Dtype, &f8_e8m0, 0, 0},
};

const Symbol *find_symbol(std::string_view module, std::string_view name) {
    if (module == "__builtin__") module = "builtins"; // as Python 2 has it
    for (const Symbol &s : symbols)
        if (module == s.module && name == s.name) return &s;
    return nullptr;
}

// Opcodes that Python has and that are not run here: for messages.
const struct {
    uint8_t code;
    const char *name;
} other_opcodes[] = {
    {'0', "POP"},          {'1', "POP_MARK"},    {'2', "DUP"},          {'F', "FLOAT"},
    {'I', "INT"},          {'L', "LONG"},        {'P', "PERSID"},       {'S', "STRING"},
    {'T', "BINSTRING"},    {'V', "UNICODE"},     {'d', "DICT"},         {'l', "LIST"},
    {'g', "GET"},          {'p', "PUT"},         {'i', "INST"},         {'o', "OBJ"},
    {0x82, "EXT1"},        {0x83, "EXT2"},       {0x84, "EXT4"},        {0x8B, "LONG4"},
    {0x8D, "BINUNICODE8"}, {0x8E, "BINBYTES8"},  {0x90, "ADDITEMS"},    {0x91, "FROZENSET"},
    {0x92, "NEWOBJ_EX"},   {0x96, "BYTEARRAY8"}, {0x97, "NEXT_BUFFER"}, {0x98, "READONLY_BUFFER"},
};

const char *opcode_name(uint8_t code) {
    for (const auto &o : other_opcodes)
        if (o.code == code) return o.name;
    return "no opcode of Python's";
}

// ---- values ---------------------------------------------------------------------------------------------------------

enum class Kind : uint8_t {
    Missing,
    None,
    Bool,
    Int,
    Double,
    String,
    Bytes,
    Tuple,
    List,
    Dict,
    Symbol,
    Storage,
    Tensor,
    Opaque
};

const char *const kind_names[] = {"nothing",  "None",      "a truth value", "a number",     "a number",
                                  "a string", "bytes",     "a tuple",       "a list",       "a dict",
                                  "a symbol", "a storage", "a tensor",      "another value"};

struct Value {
    Kind kind = Kind::Missing;
    uint16_t depth = 0; // of a tuple: how many containers it is deep
    uint32_t count = 0; // of a tuple: items; of a string: bytes
    union {
        int64_t number = 0;
        double real;
        const char *text; // in the file
        size_t index;     // of what the other kinds are, in the lists that Unpickler has
    };
};
static_assert(sizeof(Value) == 16, "millions of them");

struct Object { // a list, or a dict as keys and values in turn
    std::vector<Value> items;
    size_t depth = 1;
};

struct Storage {
    std::string_view key;
    const Symbol *symbol;
    uint64_t count;      // elements
    size_t root;         // the storage that this one is a part of, or itself
    uint64_t offset;     // in the root, in elements
    const uint8_t *data; // of a root; NULL until the stream comes to it
};

struct Tensor {
    size_t storage = 0;
    const ElementType *element = nullptr;
    uint64_t offset = 0; // in the storage, in elements
    size_t rank = 0;
    std::array<int64_t, max_rank> size = {}, stride = {};
};

// ---- the interpreter ------------------------------------------------------------------------------------------------

// Runs pickles, one after another, and keeps what they made.
class Unpickler {
public:
    // part: what messages call the bytes whose offsets they give. zip NULL: a stream, where storages come last.
    Unpickler(const uint8_t *p, uint64_t n, const char *part, const Zip *zip, const std::string &folder)
        : begin_(p), pos_(p), end_(p + n), opcode_(p), first_(p), part_(part), zip_(zip), folder_(folder) {}

    // Runs the next pickle. Only the one that holds the object may have storages.
    Value run(bool storages);

    uint64_t left() const { return uint64_t(end_ - pos_); }
    std::string_view text(const Value &v) const { return {v.text, v.count}; }
    const std::vector<Value> &items(const Value &list_or_dict) const { return objects_[list_or_dict.index].items; }
    const Tensor &tensor(const Value &v) const { return tensors_[v.index]; }
    const Storage &storage(size_t i) const { return storages_[i]; }
    const Value *find(const Value &dict, std::string_view key) const;
    void read_stream_storages(const Value &keys);
    [[noreturn]] void fail(bnb_status code, const std::string &what) const;

private:
    using Args = const Value *;

    // reading
    const uint8_t *take(uint64_t n);
    template <class T> T number() { return load<T>(take(sizeof(T))); }
    std::string_view line();
    // the stack
    void count_value();
    void push(Value v);
    Value pop();
    const Value &top() const;
    size_t floor() const { return marks_.empty() ? 0 : marks_.back(); } // values beneath a mark are out of reach
    size_t pop_mark();
    // making values
    static Value make(Kind kind, int64_t number = 0);
    Value make_object(Kind kind);
    void push_text(Kind kind, size_t n);
    void push_tuple(size_t n);
    std::vector<Value> copy_of(const Value &tuple) const; // its items
    size_t depth(const Value &v) const;
    void add(const Value &container, const Value &v);
    void push_symbol(std::string_view module, std::string_view name);
    void push_integer(size_t bytes);
    void push_double();
    // opcodes
    void step(uint8_t code);
    void check_protocol(int version) const;
    void check_frame(uint64_t bytes) const;
    void push_mark();
    void push_global();
    void push_stack_global();
    void push_marked_tuple();
    void remember(size_t index);
    void recall(size_t index);
    void append_items(Kind kind, size_t first);
    void reduce(bool as_class);
    void build();
    // calls
    Value call(const Symbol &s, Args args, size_t n);
    Value call_dict(Args args, size_t n);
    Value call_tensor(const Symbol &s, Args args, size_t n);
    void expect(const Value &v, Kind kind, const char *what) const;
    Tensor make_tensor(Args args, const ElementType *dtype) const;
    void check_extent(const Tensor &t) const;
    // storages
    void push_storage();
    size_t add_storage(const Storage &s);
    size_t find_root(std::string_view key, const Symbol &symbol, int64_t count);
    size_t add_view(size_t root, const Value &view);
    const uint8_t *find_data(std::string_view key, uint64_t bytes) const;
    std::string subject() const;

    const uint8_t *begin_, *pos_, *end_, *opcode_, *first_; // opcode_: the one that runs; first_: of this pickle's
    const char *part_;
    const Zip *zip_; // NULL: a stream
    std::string folder_;
    bool storages_allowed_ = false;
    size_t n_values_ = 0;
    std::vector<Value> stack_, tuples_; // tuples_: the items of all of them
    std::vector<size_t> marks_;         // heights of the stack
    std::vector<Value> memo_;
    std::vector<Object> objects_;
    std::vector<Storage> storages_;
    std::vector<Tensor> tensors_;
    std::unordered_map<std::string_view, size_t> roots_;
};

void Unpickler::fail(bnb_status code, const std::string &what) const {
    refuse(code, format("%sbyte %llu: ", part_, ull(uint64_t(opcode_ - begin_))) + what);
}

const uint8_t *Unpickler::take(uint64_t n) {
    if (n > left()) fail(BNB_E_FORMAT, "the pickle ends in the middle of something (cut short?)");
    const uint8_t *p = pos_;
    pos_ += n;
    return p;
}

std::string_view Unpickler::line() {
    const uint8_t *p = pos_;
    const void *newline = left() ? memchr(p, '\n', size_t(left())) : nullptr;
    if (!newline) fail(BNB_E_FORMAT, "a line of the pickle does not end (cut short?)");
    pos_ = static_cast<const uint8_t *>(newline) + 1;
    return {reinterpret_cast<const char *>(p), size_t(pos_ - 1 - p)};
}

void Unpickler::count_value() {
    if (n_values_++ == max_values) fail(BNB_E_LIMIT, format("the pickle makes more than %zu values", max_values));
}

void Unpickler::push(Value v) {
    count_value();
    stack_.push_back(v);
}

Value Unpickler::pop() {
    const Value v = top();
    stack_.pop_back();
    return v;
}

const Value &Unpickler::top() const {
    if (stack_.size() <= floor()) fail(BNB_E_FORMAT, "the pickle takes a value where none is");
    return stack_.back();
}

// -> where the values above the mark begin
size_t Unpickler::pop_mark() {
    if (marks_.empty()) fail(BNB_E_FORMAT, "the pickle takes a mark where none is");
    const size_t first = marks_.back();
    marks_.pop_back();
    return first;
}

Value Unpickler::make(Kind kind, int64_t number) {
    Value v;
    v.kind = kind;
    v.number = number;
    return v;
}

void Unpickler::push_text(Kind kind, size_t n) {
    Value v;
    v.kind = kind;
    v.count = uint32_t(n);
    v.text = reinterpret_cast<const char *>(take(n));
    push(v);
}

Value Unpickler::make_object(Kind kind) {
    if (objects_.size() == max_objects)
        fail(BNB_E_LIMIT, format("the pickle makes more than %zu lists and dicts", max_objects));
    Value v;
    v.kind = kind;
    v.index = objects_.size();
    objects_.emplace_back();
    return v;
}

size_t Unpickler::depth(const Value &v) const {
    return v.kind == Kind::Tuple ? v.depth : v.kind == Kind::List || v.kind == Kind::Dict ? objects_[v.index].depth : 0;
}

// The n values on top become a tuple.
void Unpickler::push_tuple(size_t n) {
    if (stack_.size() - floor() < n) fail(BNB_E_FORMAT, "the pickle takes a value where none is");
    size_t deepest = 0;
    Value v;
    v.kind = Kind::Tuple;
    v.count = uint32_t(n);
    v.index = tuples_.size();
    for (size_t i = stack_.size() - n; i < stack_.size(); i++) {
        deepest = std::max(deepest, depth(stack_[i]));
        tuples_.push_back(stack_[i]);
    }
    if (deepest >= max_depth) fail(BNB_E_LIMIT, format("values are nested more than %zu deep", max_depth));
    v.depth = uint16_t(deepest + 1);
    stack_.resize(stack_.size() - n);
    push(v);
}

std::vector<Value> Unpickler::copy_of(const Value &tuple) const {
    const auto first = tuples_.begin() + std::ptrdiff_t(tuple.index);
    return {first, first + std::ptrdiff_t(tuple.count)};
}

void Unpickler::add(const Value &container, const Value &v) {
    Object &o = objects_[container.index];
    o.depth = std::max(o.depth, depth(v) + 1);
    if (o.depth > max_depth) fail(BNB_E_LIMIT, format("values are nested more than %zu deep", max_depth));
    o.items.push_back(v);
}

void Unpickler::push_symbol(std::string_view module, std::string_view name) {
    const Symbol *s = find_symbol(module, name);
    if (!s)
        fail(BNB_E_UNSUPPORTED,
             "the pickle uses " + quoted(std::string(module) + "." + std::string(name)) +
                 ", which is not one of the symbols that tensors are made with: nothing else is loaded");
    push(make(Kind::Symbol, s - symbols));
}

// Two's complement of any length. What does not fit is kept as a value that is good for nothing.
void Unpickler::push_integer(size_t bytes) {
    const uint8_t *p = take(bytes);
    if (bytes > 8) return push(make(Kind::Opaque));
    uint64_t n = bytes && p[bytes - 1] & 0x80 ? ~uint64_t(0) : 0;
    for (size_t i = bytes; i-- > 0;) n = n << 8 | p[i];
    push(make(Kind::Int, int64_t(n)));
}

void Unpickler::push_double() {
    const uint8_t *p = take(8);
    uint64_t bits = 0;
    for (int i = 0; i < 8; i++) bits = bits << 8 | p[i]; // the only big-endian number of a pickle
    Value v;
    v.kind = Kind::Double;
    memcpy(&v.real, &bits, 8);
    push(v);
}

Value Unpickler::run(bool storages) {
    stack_.clear();
    marks_.clear();
    memo_.clear();
    storages_allowed_ = storages;
    first_ = pos_;
    for (;;) {
        opcode_ = pos_;
        if (uint64_t(pos_ - first_) > max_pickle_bytes) fail(BNB_E_LIMIT, "the pickle has more than 256 MiB");
        const uint8_t code = number<uint8_t>();
        if (code == '.') break;
        step(code);
    }
    if (stack_.size() != 1 || !marks_.empty()) fail(BNB_E_FORMAT, "the pickle ends with more or less than one value");
    return stack_[0];
}

// The whole list of opcodes that are run.
void Unpickler::step(uint8_t code) {
    switch (code) {
    case 0x80: return check_protocol(number<uint8_t>());          // PROTO
    case 0x95: return check_frame(number<uint64_t>());            // FRAME
    case '(': return push_mark();                                 // MARK
    case 'c': return push_global();                               // GLOBAL
    case 0x93: return push_stack_global();                        // STACK_GLOBAL
    case 'R': return reduce(false);                               // REDUCE
    case 0x81: return reduce(true);                               // NEWOBJ
    case 'b': return build();                                     // BUILD
    case 'Q': return push_storage();                              // BINPERSID
    case 'q': return remember(number<uint8_t>());                 // BINPUT
    case 'r': return remember(number<uint32_t>());                // LONG_BINPUT
    case 0x94: return remember(memo_.size());                     // MEMOIZE
    case 'h': return recall(number<uint8_t>());                   // BINGET
    case 'j': return recall(number<uint32_t>());                  // LONG_BINGET
    case ')': return push_tuple(0);                               // EMPTY_TUPLE
    case 0x85: return push_tuple(1);                              // TUPLE1
    case 0x86: return push_tuple(2);                              // TUPLE2
    case 0x87: return push_tuple(3);                              // TUPLE3
    case 't': return push_marked_tuple();                         // TUPLE
    case ']': return push(make_object(Kind::List));               // EMPTY_LIST
    case 'a': return append_items(Kind::List, stack_.size() - 1); // APPEND
    case 'e': return append_items(Kind::List, pop_mark());        // APPENDS
    case '}': return push(make_object(Kind::Dict));               // EMPTY_DICT
    case 's': return append_items(Kind::Dict, stack_.size() - 2); // SETITEM
    case 'u': return append_items(Kind::Dict, pop_mark());        // SETITEMS
    case 0x8F: return push(make(Kind::Opaque));                   // EMPTY_SET: what would fill it is not listed
    case 'N': return push(make(Kind::None));                      // NONE
    case 0x88: return push(make(Kind::Bool, true));               // NEWTRUE
    case 0x89: return push(make(Kind::Bool, false));              // NEWFALSE
    case 'J': return push(make(Kind::Int, number<int32_t>()));    // BININT
    case 'K': return push(make(Kind::Int, number<uint8_t>()));    // BININT1
    case 'M': return push(make(Kind::Int, number<uint16_t>()));   // BININT2
    case 0x8A: return push_integer(number<uint8_t>());            // LONG1
    case 'G': return push_double();                               // BINFLOAT
    case 'X': return push_text(Kind::String, number<uint32_t>()); // BINUNICODE
    case 0x8C: return push_text(Kind::String, number<uint8_t>()); // SHORT_BINUNICODE
    case 'U': return push_text(Kind::String, number<uint8_t>());  // SHORT_BINSTRING: of Python 2
    case 'B': return push_text(Kind::Bytes, number<uint32_t>());  // BINBYTES
    case 'C': return push_text(Kind::Bytes, number<uint8_t>());   // SHORT_BINBYTES
    default:
        fail(BNB_E_UNSUPPORTED,
             format("the pickle's opcode 0x%02x (%s) is not one of those that state dicts are made with", code,
                    opcode_name(code)));
    }
}

void Unpickler::check_protocol(int version) const {
    if (version < 2 || version > 5) fail(BNB_E_UNSUPPORTED, format("the pickle's protocol is %d, not 2 to 5", version));
}

void Unpickler::check_frame(uint64_t bytes) const { // only a hint for readers of pipes
    if (bytes > left()) fail(BNB_E_FORMAT, "a frame of the pickle reaches behind its end (cut short?)");
}

void Unpickler::push_mark() {
    if (marks_.size() == max_depth) fail(BNB_E_LIMIT, format("values are nested more than %zu deep", max_depth));
    marks_.push_back(stack_.size());
}

void Unpickler::push_global() {
    const std::string_view module = line(), name = line();
    push_symbol(module, name);
}

void Unpickler::push_stack_global() {
    const Value name = pop(), module = pop();
    expect(module, Kind::String, "a module's name");
    expect(name, Kind::String, "a symbol's name");
    push_symbol(text(module), text(name));
}

void Unpickler::push_marked_tuple() {
    const size_t first = pop_mark();
    push_tuple(stack_.size() - first);
}

// Picklers count from 0 and take a byte or more for each: a larger number would only cost memory.
void Unpickler::remember(size_t index) {
    const Value v = top();
    if (index >= max_memo) fail(BNB_E_LIMIT, format("the pickle remembers more than %zu values", max_memo));
    if (index > size_t(opcode_ - first_))
        fail(BNB_E_FORMAT,
             format("the pickle remembers a value as number %zu, but so many did not come before", index));
    if (index >= memo_.size()) memo_.resize(index + 1);
    memo_[index] = v;
}

void Unpickler::recall(size_t index) {
    if (index >= memo_.size() || memo_[index].kind == Kind::Missing)
        fail(BNB_E_FORMAT, format("the pickle recalls value %zu, which it did not store", index));
    push(memo_[index]);
}

// Values from stack_[first] on go into the container beneath them.
void Unpickler::append_items(Kind kind, size_t first) {
    const bool wrapped = first > stack_.size();
    if (wrapped || first <= floor()) fail(BNB_E_FORMAT, "the pickle takes a value where none is");
    const Value container = stack_[first - 1];
    expect(container, kind, "what is added to");
    if (kind == Kind::Dict && (stack_.size() - first) % 2 != 0)
        fail(BNB_E_FORMAT, "a dict is given a key without a value");
    for (size_t i = first; i < stack_.size(); i++) add(container, stack_[i]);
    stack_.resize(first);
}

// Calls a symbol: the only thing that comes near to executing, and no more than a choice between the rows of a table.
void Unpickler::reduce(bool as_class) {
    const Value args = pop(), callee = pop();
    expect(callee, Kind::Symbol, "what is called");
    expect(args, Kind::Tuple, "the argument list of a call");
    const Symbol &s = symbols[callee.index];
    const std::string name = std::string(s.module) + "." + s.name;
    if (s.element || (as_class && s.use != Use::ParameterClass))
        fail(BNB_E_UNSUPPORTED, "the pickle " + std::string(as_class ? "makes an object of '" : "calls '") + name +
                                    "', which tensors are not made with");
    if (args.count < s.min_args || args.count > s.max_args)
        fail(BNB_E_FORMAT, format("'%s' is called with %u arguments", name.c_str(), args.count));
    const std::vector<Value> list = copy_of(args);
    push(call(s, list.data(), list.size()));
}

Value Unpickler::call(const Symbol &s, Args args, size_t n) {
    switch (s.use) {
    case Use::Dict: return call_dict(args, n);
    case Use::Tensor:
    case Use::TypedTensor: return call_tensor(s, args, n);
    case Use::Parameter:
    case Use::ParameterClass:
        expect(args[0], Kind::Tensor, "the data of a parameter");
        if (n > 1) expect(args[1], Kind::Bool, "requires_grad");
        return args[0];
    default: return make(Kind::Opaque);
    }
}

Value Unpickler::call_dict(Args args, size_t n) {
    Value dict = make_object(Kind::Dict);
    if (n == 0) return dict;
    expect(args[0], Kind::List, "the items of an OrderedDict");
    const std::vector<Value> pairs = objects_[args[0].index].items;
    for (const Value &pair : pairs) {
        const bool is_list = pair.kind == Kind::List;
        if (!is_list) expect(pair, Kind::Tuple, "an item of an OrderedDict");
        if ((is_list ? objects_[pair.index].items.size() : pair.count) != 2)
            fail(BNB_E_FORMAT, "an item of an OrderedDict is not a pair");
        for (size_t i = 0; i < 2; i++) {
            const Value v = is_list ? objects_[pair.index].items[i] : tuples_[pair.index + i];
            count_value();
            add(dict, v);
        }
    }
    return dict;
}

void Unpickler::expect(const Value &v, Kind kind, const char *what) const {
    if (v.kind != kind)
        fail(BNB_E_FORMAT, format("%s is %s, not %s", what, kind_names[size_t(v.kind)], kind_names[size_t(kind)]));
}

// (storage, offset, size, stride[, requires_grad, hooks[, dtype][, metadata]])
Value Unpickler::call_tensor(const Symbol &s, Args args, size_t n) {
    const bool typed = s.use == Use::TypedTensor;
    const ElementType *dtype = nullptr;
    if (typed) {
        expect(args[6], Kind::Symbol, "a dtype");
        if (symbols[args[6].index].use != Use::Dtype) fail(BNB_E_FORMAT, "a dtype is another symbol");
        dtype = symbols[args[6].index].element;
    }
    if (n > 4) expect(args[4], Kind::Bool, "requires_grad");
    const size_t metadata = typed ? 7 : 6;
    const bool marked = n > metadata && args[metadata].kind != Kind::None &&
                        (args[metadata].kind != Kind::Dict || !objects_[args[metadata].index].items.empty());
    if (marked)
        fail(BNB_E_UNSUPPORTED, subject() + " has metadata, such as that its numbers are negated or conjugated");
    if (tensors_.size() == max_tensors)
        fail(BNB_E_LIMIT, format("the pickle makes more than %zu tensors", max_tensors));
    const Tensor t = make_tensor(args, dtype);
    tensors_.push_back(t);
    return make(Kind::Tensor, int64_t(tensors_.size() - 1));
}

// (storage, offset, size, stride) -> a tensor that lies in its storage
Tensor Unpickler::make_tensor(Args args, const ElementType *dtype) const {
    expect(args[0], Kind::Storage, "the storage of a tensor");
    expect(args[1], Kind::Int, "the offset of a tensor");
    expect(args[2], Kind::Tuple, "the size of a tensor");
    expect(args[3], Kind::Tuple, "the stride of a tensor");
    Tensor t;
    t.storage = args[0].index;
    t.rank = args[2].count;
    t.element = storages_[t.storage].symbol->element;
    if (dtype && t.element != &u8) // one storage may be named as bytes and as untyped
        fail(BNB_E_FORMAT, subject() + " gives a dtype to a storage that has one");
    if (dtype) t.element = dtype;
    if (args[1].number < 0)
        fail(BNB_E_FORMAT, subject() + format(" has the offset %lld", static_cast<long long>(args[1].number)));
    t.offset = uint64_t(args[1].number);
    if (t.rank > max_rank || args[3].count != t.rank)
        fail(t.rank > max_rank ? BNB_E_LIMIT : BNB_E_FORMAT,
             subject() + format(" has %zu dimensions and %u strides (at most %zu)", t.rank, args[3].count, max_rank));
    for (size_t d = 0; d < t.rank; d++) {
        const Value &size = tuples_[args[2].index + d], &stride = tuples_[args[3].index + d];
        expect(size, Kind::Int, "a size of a tensor");
        expect(stride, Kind::Int, "a stride of a tensor");
        if (size.number < 0 || stride.number < 0) fail(BNB_E_FORMAT, subject() + " has a negative size or stride");
        t.size[d] = size.number;
        t.stride[d] = stride.number;
    }
    check_extent(t);
    return t;
}

// The last element that can be reached must be in the storage.
void Unpickler::check_extent(const Tensor &t) const {
    const Storage &s = storages_[t.storage];
    const uint64_t held = s.count * s.symbol->element->bytes / t.element->bytes;
    uint64_t last = t.offset, elements = t.element->bytes, step;
    bool overflow = false, empty = false;
    for (size_t d = 0; d < t.rank; d++) {
        const uint64_t size = uint64_t(t.size[d]);
        overflow |= __builtin_mul_overflow(elements, size, &elements);
        empty |= size == 0;
    }
    if (overflow || elements > uint64_t(INT64_MAX))
        fail(BNB_E_FORMAT, subject() + " has a size that overflows 64 bits");
    if (empty) return;
    for (size_t d = 0; d < t.rank; d++)
        overflow |= __builtin_mul_overflow(uint64_t(t.size[d] - 1), uint64_t(t.stride[d]), &step) ||
                    __builtin_add_overflow(last, step, &last);
    if (!overflow && last < held) return;
    fail(BNB_E_FORMAT, subject() + format(" of shape %s at offset %llu reaches behind its storage %s of %llu elements",
                                          shape_text({t.size.begin(), t.size.begin() + std::ptrdiff_t(t.rank)}).c_str(),
                                          ull(t.offset), quoted(s.key).c_str(), ull(held)));
}

// The state of a dict is an attribute of Python's object (_metadata). That of a tensor is another place for its data.
void Unpickler::build() {
    const Value state = pop();
    const Value target = top();
    if (target.kind == Kind::Dict) return;
    expect(target, Kind::Tensor, "what is given a state");
    expect(state, Kind::Tuple, "the state of a tensor");
    if (state.count != 4) fail(BNB_E_FORMAT, "the state of a tensor is not (storage, offset, size, stride)");
    const std::vector<Value> list = copy_of(state);
    tensors_[target.index] = make_tensor(list.data(), nullptr);
}

// What the tensor that is being made will be called: its key already lies on the stack, as the last string there.
std::string Unpickler::subject() const {
    for (size_t i = stack_.size(); i-- > 0 && stack_.size() - i < 16;)
        if (stack_[i].kind == Kind::String) return "tensor " + quoted(text(stack_[i]));
    return "a tensor";
}

// ('storage', class, key, location, count[, view])
void Unpickler::push_storage() {
    const Value id = pop();
    if (!storages_allowed_) fail(BNB_E_FORMAT, "there is a storage where none belongs");
    expect(id, Kind::Tuple, "a persistent id");
    if (id.count > 6) fail(BNB_E_FORMAT, "a persistent id is not that of a storage");
    const std::vector<Value> list = copy_of(id);
    const std::string_view tag = !list.empty() && list[0].kind == Kind::String ? text(list[0]) : "";
    if (tag == "module")
        fail(BNB_E_UNSUPPORTED, "the file holds a whole pickled module: save its state_dict() instead");
    if (tag != "storage" || list.size() < 5 || list.size() > (zip_ ? 5 : 6))
        fail(BNB_E_FORMAT, "a persistent id is not that of a storage");
    expect(list[1], Kind::Symbol, "the class of a storage");
    expect(list[2], Kind::String, "the key of a storage");
    expect(list[3], Kind::String, "the location of a storage");
    expect(list[4], Kind::Int, "the size of a storage");
    const Symbol &symbol = symbols[list[1].index];
    if (symbol.use != Use::Storage && symbol.use != Use::Untyped)
        fail(BNB_E_FORMAT, format("'%s.%s' is no class of storages", symbol.module, symbol.name));
    size_t index = find_root(text(list[2]), symbol, list[4].number);
    if (list.size() == 6 && list[5].kind != Kind::None) index = add_view(index, list[5]);
    push(make(Kind::Storage, int64_t(index)));
}

size_t Unpickler::add_storage(const Storage &s) {
    if (storages_.size() == max_tensors)
        fail(BNB_E_LIMIT, format("the pickle makes more than %zu storages", max_tensors));
    storages_.push_back(s);
    return storages_.size() - 1;
}

size_t Unpickler::find_root(std::string_view key, const Symbol &symbol, int64_t count) {
    uint64_t bytes;
    if (!is_digits(key)) fail(BNB_E_FORMAT, "the key " + quoted(key) + " of a storage is not a number");
    if (count < 0 || __builtin_mul_overflow(uint64_t(count), uint64_t(symbol.element->bytes), &bytes))
        fail(BNB_E_FORMAT, format("the storage '%s' has the impossible size %lld", std::string(key).c_str(),
                                  static_cast<long long>(count)));
    auto known = roots_.find(key);
    if (known != roots_.end()) {
        const Storage &s = storages_[known->second];
        if (s.symbol->element == symbol.element && s.count == uint64_t(count)) return known->second;
        fail(BNB_E_FORMAT, format("the storage '%s' is given two types or sizes", std::string(key).c_str()));
    }
    const uint8_t *data = zip_ ? find_data(key, bytes) : nullptr;
    const size_t index = add_storage({key, &symbol, uint64_t(count), storages_.size(), 0, data});
    roots_.emplace(key, index);
    return index;
}

const uint8_t *Unpickler::find_data(std::string_view key, uint64_t bytes) const {
    const std::string name = folder_ + "data/" + std::string(key);
    const ZipEntry *e = zip_->find(name);
    if (!e) fail(BNB_E_FORMAT, "the zip has no entry " + quoted(name) + " for a storage");
    if (e->bytes < bytes)
        fail(BNB_E_FORMAT,
             format("the storage %s needs %llu bytes, but has %llu", quoted(name).c_str(), ull(bytes), ull(e->bytes)));
    return e->data;
}

// (key, offset, count): a part of the root, in elements.
size_t Unpickler::add_view(size_t root, const Value &view) {
    expect(view, Kind::Tuple, "the view of a storage");
    const Value *v = tuples_.data() + view.index;
    if (view.count != 3 || v[1].kind != Kind::Int || v[2].kind != Kind::Int)
        fail(BNB_E_FORMAT, "the view of a storage is not (key, offset, size)");
    Storage s = storages_[root];
    const uint64_t offset = uint64_t(v[1].number), count = uint64_t(v[2].number); // a negative one is too large
    if (offset > s.count || count > s.count - offset)
        fail(BNB_E_FORMAT, format("a view of %lld elements at %lld reaches behind its storage %s of %llu",
                                  static_cast<long long>(v[2].number), static_cast<long long>(v[1].number),
                                  quoted(s.key).c_str(), ull(s.count)));
    s.count = count;
    s.offset = offset;
    s.root = root;
    return add_storage(s);
}

// The stream's last part: for each key a count and the elements.
void Unpickler::read_stream_storages(const Value &keys) {
    expect(keys, Kind::List, "the list of storages");
    size_t n_read = 0;
    for (const Value &key : items(keys)) {
        expect(key, Kind::String, "the key of a storage");
        const std::string name = quoted(text(key));
        opcode_ = pos_;
        auto it = roots_.find(text(key));
        if (it == roots_.end()) fail(BNB_E_FORMAT, "no tensor uses the storage " + name);
        Storage &s = storages_[it->second];
        if (s.data) fail(BNB_E_FORMAT, "the storage " + name + " is listed twice");
        const uint64_t count = number<uint64_t>(), bytes = s.count * s.symbol->element->bytes;
        if (count != s.count)
            fail(BNB_E_FORMAT, format("the storage %s has %llu elements, but %llu were announced", name.c_str(),
                                      ull(count), ull(s.count)));
        if (bytes > left())
            fail(BNB_E_FORMAT, format("the storage %s of %llu bytes reaches behind the file's end (cut short?)",
                                      name.c_str(), ull(bytes)));
        s.data = take(bytes);
        n_read++;
    }
    if (n_read != roots_.size())
        fail(BNB_E_FORMAT, format("%zu of %zu storages are missing", roots_.size() - n_read, roots_.size()));
}

const Value *Unpickler::find(const Value &dict, std::string_view key) const {
    const std::vector<Value> &list = items(dict);
    for (size_t i = list.size(); i >= 2; i -= 2) // the last one counts, as in Python
        if (list[i - 2].kind == Kind::String && text(list[i - 2]) == key) return &list[i - 1];
    return nullptr;
}

// ---- the state dict -------------------------------------------------------------------------------------------------

bool has_tensors(const Unpickler &u, const Value &v) {
    if (v.kind != Kind::Dict) return false;
    const std::vector<Value> &list = u.items(v);
    for (size_t i = 1; i < list.size(); i += 2)
        if (list[i].kind == Kind::Tensor) return true;
    return false;
}

// The dict that has the tensors: one that a training script put beside the optimizer's state, or the root itself. That
// of a network has no dicts in it, so the order cannot mistake one for the other.
Value find_state_dict(const Unpickler &u, const Value &root, std::vector<std::string> *notes) {
    if (root.kind != Kind::Dict)
        refuse(BNB_E_FORMAT, format("it holds %s, not a state dict", kind_names[size_t(root.kind)]));
    for (const char *key : {"state_dict", "model", "module"}) {
        const Value *inner = u.find(root, key);
        if (!inner || !has_tensors(u, *inner)) continue;
        if (notes && u.items(root).size() > 2) notes->push_back(format("only what lies under '%s' is used", key));
        return *inner;
    }
    if (has_tensors(u, root)) return root;
    refuse(BNB_E_FORMAT, "it holds a dict without tensors, also under 'state_dict', 'model' and 'module'");
}

bool is_dense(const Tensor &t) {
    int64_t expected = 1; // no overflow: check_extent multiplied the same numbers
    for (size_t d = t.rank; d-- > 0;) {
        if (t.size[d] != 1 && t.stride[d] != expected) return false;
        expected *= t.size[d];
    }
    return true;
}

void check_name(std::string_view name, std::unordered_set<std::string_view> *seen) {
    if (name.size() > max_name_bytes) refuse(BNB_E_LIMIT, "the name " + quoted(name) + " has more than 1024 bytes");
    if (name.find('\0') != name.npos || !is_utf8(std::string(name)))
        refuse(BNB_E_FORMAT, "the name " + quoted(name) + " is not UTF-8 text");
    if (!seen->insert(name).second) refuse(BNB_E_FORMAT, "there are two tensors " + quoted(name));
}

// An expanded tensor can claim any size: no more than what somebody may have meant.
void check_dense_bytes(const SourceTensor &t, uint64_t storage_bytes) {
    if (t.bytes <= small_dense_bytes || (t.bytes <= max_dense_bytes && t.bytes / max_dense_ratio <= storage_bytes))
        return;
    refuse(BNB_E_LIMIT, format("tensor %s of shape %s would have %llu bytes, made from a storage of %llu",
                               quoted(t.name).c_str(), shape_text(t.shape).c_str(), ull(t.bytes), ull(storage_bytes)));
}

SourceTensor source_tensor(const Unpickler &u, std::string_view name, const Tensor &t) {
    const Storage &s = u.storage(t.storage);
    const uint32_t bytes = t.element->bytes;
    const uint8_t *storage = u.storage(s.root).data + s.offset * s.symbol->element->bytes;
    SourceTensor out;
    out.name = std::string(name);
    out.dtype = t.element->dtype;
    out.type = t.element->type;
    out.shape.assign(t.size.begin(), t.size.begin() + std::ptrdiff_t(t.rank));
    out.bytes = bytes;
    for (int64_t d : out.shape) out.bytes *= uint64_t(d);
    const uint8_t *first = out.bytes ? storage + t.offset * bytes : storage; // the offset of an empty one says nothing
    if (out.bytes == 0 || is_dense(t)) {
        out.data = first;
        return out;
    }
    check_dense_bytes(out, s.count * s.symbol->element->bytes);
    out.strided = std::make_shared<StridedView>(
        StridedView{first, bytes, out.shape, {t.stride.begin(), t.stride.begin() + std::ptrdiff_t(t.rank)}});
    return out;
}

// bitsandbytes before 0.43.1 wrote the layout of 8-bit weights as a string. It decides what the numbers mean, so it is
// passed on, as a tensor of the dtype STR.
bool is_weight_format(std::string_view name) {
    const std::string_view end = ".weight_format";
    return name.size() > end.size() && name.substr(name.size() - end.size()) == end;
}

SourceTensor text_tensor(std::string_view name, std::string_view text) {
    SourceTensor t;
    t.name = name;
    t.dtype = "STR";
    t.shape = {int64_t(text.size())};
    t.data = text.data();
    t.bytes = text.size();
    return t;
}

void collect(const Unpickler &u, const Value &root, std::vector<SourceTensor> *out, std::vector<std::string> *notes) {
    const std::vector<Value> &list = u.items(find_state_dict(u, root, notes));
    std::unordered_set<std::string_view> seen;
    std::string first_other;
    size_t n_others = 0;
    for (size_t i = 0; i < list.size(); i += 2) {
        const bool named = list[i].kind == Kind::String;
        if (named && list[i + 1].kind == Kind::String && is_weight_format(u.text(list[i]))) {
            out->push_back(text_tensor(u.text(list[i]), u.text(list[i + 1])));
            continue;
        }
        if (list[i + 1].kind != Kind::Tensor) {
            if (n_others++ == 0) first_other = named ? quoted(u.text(list[i])) : kind_names[size_t(list[i].kind)];
            continue;
        }
        if (!named) refuse(BNB_E_FORMAT, format("the name of a tensor is %s", kind_names[size_t(list[i].kind)]));
        check_name(u.text(list[i]), &seen);
        out->push_back(source_tensor(u, u.text(list[i]), u.tensor(list[i + 1])));
    }
    if (notes && n_others)
        notes->push_back(
            format("%zu values that are no tensors are left out, the first under %s", n_others, first_other.c_str()));
}

// ---- files ----------------------------------------------------------------------------------------------------------

void parse_zip(const uint8_t *p, uint64_t n, std::vector<SourceTensor> *out, std::vector<std::string> *notes) {
    const Zip zip(p, n);
    const size_t slash = zip.entries().empty() ? std::string_view::npos : zip.entries()[0].name.find('/');
    const std::string folder(slash == std::string_view::npos ? "" : zip.entries()[0].name.substr(0, slash + 1));
    for (const ZipEntry &e : zip.entries())
        if (folder.empty() || e.name.substr(0, folder.size()) != folder)
            refuse(BNB_E_FORMAT,
                   "the zip's entry " + quoted(e.name) + " does not lie in one folder with the others: PyTorch's do");
    if (zip.find(folder + "constants.pkl"))
        refuse(BNB_E_UNSUPPORTED,
               "it is TorchScript, a program: save the model's state_dict() with torch.save instead");
    const ZipEntry *pickle = zip.find(folder + "data.pkl"), *order = zip.find(folder + "byteorder");
    if (!pickle) refuse(BNB_E_FORMAT, "it is a zip file, but not PyTorch's: there is no data.pkl in it");
    if (pickle->bytes > max_pickle_bytes) refuse(BNB_E_LIMIT, "its data.pkl has more than 256 MiB");
    const std::string_view byte_order =
        order ? std::string_view(reinterpret_cast<const char *>(order->data), size_t(order->bytes)) : "little";
    if (byte_order != "little")
        refuse(BNB_E_UNSUPPORTED,
               "its byteorder is " + quoted(byte_order.substr(0, 20)) + ", and only little-endian files are read");
    Unpickler u(pickle->data, pickle->bytes, "data.pkl, ", &zip, folder);
    const Value root = u.run(true);
    if (u.left()) u.fail(BNB_E_FORMAT, "more follows where data.pkl should end");
    collect(u, root, out, notes);
}

void parse_stream(const uint8_t *p, uint64_t n, std::vector<SourceTensor> *out, std::vector<std::string> *notes) {
    Unpickler u(p, n, "", nullptr, "");
    u.run(false); // the magic number, which pytorch_is has looked at
    const Value version = u.run(false);
    if (version.kind != Kind::Int || version.number != 1001)
        u.fail(BNB_E_UNSUPPORTED, "the stream's version is not 1001");
    const Value system = u.run(false);
    const Value *little = system.kind == Kind::Dict ? u.find(system, "little_endian") : nullptr;
    if (!little || little->kind != Kind::Bool)
        u.fail(BNB_E_FORMAT, "the stream does not say how its numbers are stored");
    if (!little->number) refuse(BNB_E_UNSUPPORTED, "its numbers are big-endian, and only little-endian files are read");
    const Value root = u.run(true);
    u.read_stream_storages(u.run(false));
    collect(u, root, out, notes);
    if (notes && u.left())
        notes->push_back(format("%llu bytes follow the last storage and are left out", ull(u.left())));
}

// A stream begins with a number, pickled by any protocol. The same bytes may be the length of a safetensors header.
bool is_stream(const uint8_t *p, uint64_t n) {
    const size_t frame = n > 2 && p[0] == 0x80 && p[2] == 0x95 ? 9 : 0; // protocol 4 and up
    return n > 2 && p[0] == 0x80 && p[1] >= 2 && p[1] <= 5 && n >= 15 + frame &&
           memcmp(p + 2 + frame, "\x8A\x0A\x6C\xFC\x9C\x46\xF9\x20\x6A\xA8\x50\x19\x2E", 13) == 0;
}

// What a file is that PyTorch or pickle wrote in a form that is not read; NULL: something else.
const char *refused_form(const uint8_t *p, uint64_t n) {
    constexpr uint64_t max_safetensors_header = 100000000; // a smaller number at the begin is such a header's length
    if (begins_with(p, n, "PYTORCH1", 8))
        return "a PyTorch file in a layout of 2018 that was given up: load it with PyTorch and save it anew";
    if (n < 8 || load<uint64_t>(p) <= max_safetensors_header) return nullptr;
    if (n >= 262 && memcmp(p + 257, "ustar", 5) == 0)
        return "a tar file, perhaps PyTorch's form before 2017: load it with PyTorch and save it anew";
    if (p[0] == 0x80 && p[1] <= 5) return "a pickle, but none that torch.save wrote";
    return nullptr;
}

bool is_zip(const uint8_t *p, uint64_t n) { return begins_with(p, n, "PK\x03\x04", 4); }

} // namespace

bool pytorch_is(const void *data, uint64_t bytes) {
    const uint8_t *p = static_cast<const uint8_t *>(data);
    return is_zip(p, bytes) || is_stream(p, bytes) || refused_form(p, bytes);
}

bool pytorch_parse(const void *data, uint64_t bytes, const std::string &file, std::vector<SourceTensor> *out,
                   std::vector<std::string> *notes, bnb_error *err) {
    const uint8_t *p = static_cast<const uint8_t *>(data);
    const std::string shown = printable_path(file);
    try {
        if (is_zip(p, bytes)) parse_zip(p, bytes, out, notes);
        else if (is_stream(p, bytes)) parse_stream(p, bytes, out, notes);
        else if (const char *form = refused_form(p, bytes)) refuse(BNB_E_UNSUPPORTED, std::string("it is ") + form);
        else refuse(BNB_E_FORMAT, "it is not one of PyTorch's files");
        return true;
    } catch (const Refusal &r) {
        return failed(err, r.code, "%s: %s", shown.c_str(), r.text.c_str());
    }
}

bool pytorch_check_crc(const void *data, uint64_t bytes, const std::string &file, bnb_error *err) {
    const uint8_t *p = static_cast<const uint8_t *>(data);
    const std::string shown = printable_path(file);
    if (!is_zip(p, bytes)) return true;
    try {
        const Zip zip(p, bytes);
        for (const ZipEntry &e : zip.entries())
            if (e.crc != 0 && crc32_of(e.data, e.bytes) != e.crc)
                refuse(BNB_E_FORMAT, "the checksum of the zip's entry " + quoted(e.name) + " is wrong");
        return true;
    } catch (const Refusal &r) {
        return failed(err, r.code, "%s: %s", shown.c_str(), r.text.c_str());
    }
}

// ---- strided tensors ------------------------------------------------------------------------------------------------

namespace {

// [rows, columns] in tiles: of a transposed matrix one of the two sides is always far apart.
template <size_t bytes> void gather_block(const uint8_t *src, int64_t rows, int64_t columns, int64_t row_stride,
                                          int64_t column_stride, uint8_t *dst) {
    constexpr int64_t tile = 32;
    for (int64_t r0 = 0; r0 < rows; r0 += tile)
        for (int64_t c0 = 0; c0 < columns; c0 += tile)
            for (int64_t r = r0; r < std::min(r0 + tile, rows); r++)
                for (int64_t c = c0; c < std::min(c0 + tile, columns); c++)
                    memcpy(dst + size_t(r * columns + c) * bytes,
                           src + size_t(r * row_stride + c * column_stride) * bytes, bytes);
}

void gather_block(uint32_t bytes, const uint8_t *src, int64_t rows, int64_t columns, int64_t row_stride,
                  int64_t column_stride, uint8_t *dst) {
    if (column_stride == 1) {
        for (int64_t r = 0; r < rows; r++)
            memcpy(dst + size_t(r * columns) * bytes, src + size_t(r * row_stride) * bytes, size_t(columns) * bytes);
        return;
    }
    auto *block = bytes == 1   ? gather_block<1>
                  : bytes == 2 ? gather_block<2>
                  : bytes == 4 ? gather_block<4>
                               : gather_block<8>;
    block(src, rows, columns, row_stride, column_stride, dst);
}

// n of dimension d, and all of the inner ones. -> behind what was written
uint8_t *gather(const StridedView &v, size_t d, const uint8_t *src, int64_t n, uint8_t *dst) {
    const size_t rank = v.shape.size();
    if (rank - d <= 2) {
        const bool last = rank - d == 1;
        const int64_t columns = last ? n : v.shape[d + 1], rows = last ? 1 : n;
        gather_block(v.element_bytes, src, rows, columns, last ? 0 : v.strides[d], v.strides[last ? d : d + 1], dst);
        return dst + size_t(rows * columns) * v.element_bytes;
    }
    for (int64_t i = 0; i < n; i++)
        dst = gather(v, d + 1, src + size_t(i * v.strides[d]) * v.element_bytes, v.shape[d + 1], dst);
    return dst;
}

} // namespace

uint64_t strided_extent(const StridedView &view) {
    uint64_t last = 0; // no overflow: check_extent added the same numbers
    for (size_t d = 0; d < view.shape.size(); d++) last += uint64_t(view.shape[d] - 1) * uint64_t(view.strides[d]);
    return (last + 1) * view.element_bytes;
}

void strided_gather(const StridedView &view, int64_t first_row, int64_t n_rows, void *dst) {
    const uint8_t *src = view.first + size_t(first_row * view.strides[0]) * view.element_bytes;
    gather(view, 0, src, n_rows, static_cast<uint8_t *>(dst));
}

} // namespace bnb
