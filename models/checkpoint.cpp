// checkpoint.cpp: checkpoints into models, .bnb files and Hugging Face directories.
//
// Both ways make one plan, a list that says of every tensor of the network which tensor of the source it is made from
// and what it becomes, and both fill their tensors with one function, produce(). See checkpoint.h and load_policy.h.
#include "checkpoint.h"

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <unordered_set>

#include "arch.h"
#include "bnb_writer.h"
#include "checkpoint_writer.h"
#include "hf_config.h"
#include "hf_writer.h"
#include "load_policy.h"
#include "pytorch.h"
#include "quant_state.h"
#include "safetensors.h"
#include "tokenizer_json.h"

namespace bnb {
namespace {

constexpr size_t max_warnings = 20; // of one kind; a damaged file could have a million

// ---- where weights come from ----------------------------------------------------------------------------------------

struct FreeFile {
    void operator()(bnb_file *f) const { bnb_file_free(f); }
};

// A Hugging Face checkpoint or a .bnb file: what comes after treats both alike.
struct Origin {
    std::string name; // for messages
    std::unique_ptr<Checkpoint> checkpoint;
    std::unique_ptr<bnb_file, FreeFile> file;
    HfConfig hf;
    QuantizedWeights quantized;
    std::vector<SourceTensor> tensors;
};

bool is_bnb_file(const std::string &path) {
    std::error_code ec;
    if (!std::filesystem::is_regular_file(path, ec)) return false;
    FILE *f = fopen(path.c_str(), "rb");
    char magic[4] = {};
    size_t n = f ? fread(magic, 1, 4, f) : 0;
    if (f) fclose(f);
    return n == 4 && memcmp(magic, BNB_FILE_MAGIC, 4) == 0; // where the rest is damaged, the reader of .bnb says how
}

bool open_bnb(bnb_env *env, const std::string &path, Origin *o, bnb_error *err) {
    o->file.reset(bnb_file_open(env, path.c_str(), 0, err));
    if (!o->file || !config_from_file(o->file.get(), &o->hf.config, err)) return false;
    o->hf.arch = arch_find(o->hf.config.arch);
    for (int32_t i = 0; i < bnb_file_tensor_count(o->file.get()); i++) {
        const bnb_tensor *t = bnb_file_tensor(o->file.get(), i);
        SourceTensor s;
        s.name = bnb_tensor_name(t);
        s.type = bnb_tensor_type(t);
        s.dtype = bnb_type_name(s.type);
        s.shape.assign(bnb_tensor_shape(t), bnb_tensor_shape(t) + bnb_tensor_n_dims(t));
        s.data = bnb_tensor_plane(t, 0);
        s.bytes = bnb_plane_bytes(s.type, bnb_tensor_quant(t), bnb_tensor_n_dims(t), bnb_tensor_shape(t), 0);
        s.tensor = t;
        o->tensors.push_back(std::move(s));
    }
    return true;
}

// The type of what is not quantized, where no config.json says it.
int32_t plain_dtype(const std::vector<SourceTensor> &tensors) {
    for (const SourceTensor &t : tensors)
        if (is_plain_float(t.type) && t.shape.size() == 2) return t.type;
    return BNB_F16;
}

bool open_checkpoint(bnb_env *env, const std::string &path, Origin *o, bnb_error *err) {
    o->checkpoint = Checkpoint::open(env, path, err);
    if (!o->checkpoint || !hf_config_read(env, *o->checkpoint, &o->hf, err)) return false;
    o->tensors = o->checkpoint->tensors();
    o->quantized.int8_dtype = o->hf.dtype >= 0 ? o->hf.dtype : plain_dtype(o->tensors);
    if (o->hf.threshold >= 0) o->quantized.int8_threshold = float(o->hf.threshold);
    return o->quantized.fold(env, o->name, &o->tensors, err);
}

bool open_origin(bnb_env *env, const std::string &path, Origin *o, bnb_error *err) {
    o->name = printable_path(path);
    return is_bnb_file(path) ? open_bnb(env, path, o, err) : open_checkpoint(env, path, o, err);
}

bool check_origin(const Origin &o, bnb_error *err) {
    return o.file ? bnb_file_verify(o.file.get(), err) == BNB_OK : o.checkpoint->check(err);
}

// The tokenizer, if there is one. A .bnb has it in the form in which it is written.
bool read_tokenizer(const Origin &o, bool *found, TokenizerData *data, bnb_error *err) {
    *found = false;
    if (o.file) {
        uint64_t n;
        const void *chunk = bnb_file_chunk(o.file.get(), "tokn", &n);
        *found = chunk != nullptr;
        return !chunk || parse(chunk, n, data, err);
    }
    for (const char *name : {"tokenizer.json", "vocab.json", "merges.txt", "encoder.json", "vocab.bpe"}) {
        *found = *found || file_exists(o.checkpoint->directory() + "/" + name);
    }
    return !*found || tokenizer_from_dir(o.checkpoint->directory(), data, err);
}

// ---- the plan -------------------------------------------------------------------------------------------------------

// One tensor of the result.
struct PlanItem {
    TensorInfo info;
    const SourceTensor *source;
    bool transpose; // the source is [in, out]
    Target target;
};

uint64_t source_bytes(const PlanItem &item) {
    return item.source->tensor ? bnb_tensor_bytes(item.source->tensor) : item.source->bytes;
}

struct ConversionPlan {
    Config config;
    std::vector<PlanItem> items; // in the order of the result
    uint64_t bytes_in = 0;
};

using Bound = std::unordered_map<std::string, const SourceTensor *>; // canonical name -> tensor

bool ends_with_any(const std::string &name, const char *const *ends) {
    for (; *ends; ends++) {
        size_t n = strlen(*ends);
        if (name.size() >= n && name.compare(name.size() - n, n, *ends) == 0) return true;
    }
    return false;
}

bool bind_names(const Origin &o, Bound *bound, bnb_error *err) {
    for (const SourceTensor &t : o.tensors) {
        const std::string name = canonical_name(*o.hf.arch, t.name);
        if (ends_with_any(name, o.hf.arch->ignored)) continue;
        auto added = bound->emplace(name, &t);
        if (added.second) continue;
        return failed(err, BNB_E_FORMAT, "%s: '%s' and '%s' are both '%s'", o.name.c_str(),
                      printable(added.first->second->name).c_str(), printable(t.name).c_str(), printable(name).c_str());
    }
    return true;
}

// Rows of a strided tensor, by all threads.
struct GatherJob {
    const StridedView *view;
    uint8_t *dst;
    int64_t rows;       // of a part
    uint64_t row_bytes; // dense
};

void gather_part(void *arg, int64_t i) {
    const GatherJob &j = *static_cast<const GatherJob *>(arg);
    const int64_t first = i * j.rows, n = std::min(j.rows, j.view->shape[0] - first);
    strided_gather(*j.view, first, n, j.dst + uint64_t(first) * j.row_bytes);
}

// A tensor whose elements lie side by side: what it is, or a copy in *values. env NULL: made by this thread.
SourceTensor dense_source(bnb_env *env, const SourceTensor &s, std::unique_ptr<uint8_t[]> *values) {
    if (!s.strided) return s;
    const int64_t n_rows = s.shape[0];
    values->reset(new uint8_t[s.bytes]);
    GatherJob job = {s.strided.get(), values->get(), env ? std::min<int64_t>(n_rows, 64) : n_rows,
                     s.bytes / uint64_t(n_rows)};
    const int64_t parts = (n_rows + job.rows - 1) / job.rows;
    if (env) bnb_parallel(env, parts, gather_part, &job);
    else gather_part(&job, 0);
    SourceTensor dense = s;
    dense.strided.reset();
    dense.data = values->get();
    return dense;
}

bool same_contents(const SourceTensor &a, const SourceTensor &b) {
    if (a.type != b.type || a.shape != b.shape || a.bytes != b.bytes) return false;
    std::unique_ptr<uint8_t[]> a_values, b_values;
    return memcmp(dense_source(nullptr, a, &a_values).data, dense_source(nullptr, b, &b_values).data, a.bytes) == 0;
}

// Decides whether the head is the token embedding. A head in the checkpoint is used, whatever the flag says (as in
// transformers 5), except where it is the embedding once more; where they are tied and only one is there, it is both.
void resolve_head(bnb_env *env, const Origin &o, Config *config, Bound *bound) {
    Config untied = *config;
    untied.tied = false;
    const std::vector<TensorInfo> infos = o.hf.arch->tensors(untied);
    auto head = std::find_if(infos.begin(), infos.end(), [](const TensorInfo &t) { return t.role == Role::Head; });
    if (head == infos.end()) return;
    auto table = std::find_if(infos.begin(), infos.end(),
                              [&](const TensorInfo &t) { return t.role == Role::Embedding && t.shape == head->shape; });
    if (table == infos.end()) return;
    auto find = [&](const std::string &name) {
        auto it = bound->find(name);
        return it == bound->end() ? nullptr : it->second;
    };
    const SourceTensor *h = find(head->name), *e = find(table->name);
    const bool differ = h && e && !same_contents(*h, *e);
    if (!o.hf.tied_known) config->tied = !h || (e && !differ);
    if (config->tied && differ) {
        bnb_log(env, BNB_LOG_WARN, "%s: the configuration ties '%s' to '%s', but they differ: each is used",
                o.name.c_str(), head->name.c_str(), table->name.c_str());
        config->tied = false;
    }
    if (!config->tied) return;
    if (!e && h) (*bound)[table->name] = h;
    bound->erase(head->name);
}

std::vector<int64_t> reversed(const std::vector<int64_t> &shape) { return {shape.rbegin(), shape.rend()}; }

// Whether the matrices that may be are stored [in, out]: nothing says so but the shapes of those that are not square,
// and those must agree. A square one tells nothing by itself, and a wrong guess would run and produce nonsense.
// Quantized matrices are [out, in] whatever they were before; where they leave nothing else to tell by, transformers
// made the checkpoint, whose matrices are [in, out].
bool find_layout(const Origin &o, const std::vector<TensorInfo> &infos, const Bound &bound, bool *transposed,
                 bnb_error *err) {
    const SourceTensor *decided = nullptr;
    *transposed = o.hf.quantized;
    for (const TensorInfo &info : infos) {
        auto it = bound.find(info.name);
        if (!o.hf.arch->may_be_transposed(info.name) || it == bound.end() || it->second->tensor ||
            info.shape == reversed(info.shape))
            continue;
        bool in_out = it->second->shape == reversed(info.shape);
        if (!in_out && it->second->shape != info.shape) continue; // the check of shapes says more about it
        if (decided && in_out != *transposed)
            return failed(err, BNB_E_FORMAT, "%s: '%s' is stored [%s] but '%s' is stored [%s]: the layers do not agree",
                          o.name.c_str(), printable(decided->name).c_str(), *transposed ? "in, out" : "out, in",
                          printable(it->second->name).c_str(), in_out ? "in, out" : "out, in");
        decided = it->second;
        *transposed = in_out;
    }
    return true;
}

bool check_missing(const Origin &o, const std::vector<TensorInfo> &infos, const Bound &bound, bnb_error *err) {
    const TensorInfo *first = nullptr;
    size_t n = 0;
    for (const TensorInfo &info : infos) {
        if (info.optional || bound.count(info.name)) continue;
        if (n++ == 0) first = &info;
    }
    if (n == 0) return true;
    return failed(err, BNB_E_FORMAT, "%s lacks %zu of the %zu tensors of the network, the first is '%s' of shape %s",
                  o.name.c_str(), n, infos.size(), first->name.c_str(), shape_text(first->shape).c_str());
}

// Names every tensor that the network has no place for. Cross-attention is no ballast: without it the model is another.
bool report_unused(bnb_env *env, const Origin &o, const Bound &bound, const std::vector<PlanItem> &items,
                   bnb_error *err) {
    std::unordered_set<const SourceTensor *> used;
    for (const PlanItem &item : items) used.insert(item.source);
    size_t n = 0;
    for (const SourceTensor &t : o.tensors) { // in the order of the file, so that the log is the same each time
        auto it = bound.find(canonical_name(*o.hf.arch, t.name));
        if (it == bound.end() || it->second != &t || used.count(&t)) continue;
        if (t.name.find("crossattention") != std::string::npos || t.name.find("cross_attn") != std::string::npos)
            return failed(err, BNB_E_UNSUPPORTED, "%s: '%s' belongs to cross-attention, which is not offered",
                          o.name.c_str(), printable(t.name).c_str());
        if (n++ < max_warnings)
            bnb_log(env, BNB_LOG_WARN, "%s: '%s' of shape %s is not used by %s", o.name.c_str(),
                    printable(t.name).c_str(), shape_text(t.shape).c_str(), o.hf.arch->name);
    }
    if (n > max_warnings)
        bnb_log(env, BNB_LOG_WARN, "%s: %zu more tensors are not used", o.name.c_str(), n - max_warnings);
    return true;
}

bool check_item(const Origin &o, const PlanItem &item, bnb_error *err) {
    const SourceTensor &s = *item.source;
    const std::vector<int64_t> expected = item.transpose ? reversed(item.info.shape) : item.info.shape;
    if (s.shape != expected)
        return failed(err, BNB_E_SHAPE, "%s: '%s' has the shape %s, but the configuration asks for %s", o.name.c_str(),
                      printable(s.name).c_str(), shape_text(s.shape).c_str(), shape_text(expected).c_str());
    if (is_plain_float(s.type) || bnb_type_is_quantized(s.type)) return true;
    return failed(err, BNB_E_TYPE, "%s: '%s' has the dtype %s, but weights are F32, F16 or BF16", o.name.c_str(),
                  printable(s.name).c_str(), s.dtype.c_str());
}

bool make_plan(bnb_env *env, const Origin &o, const LoadPolicy &policy, ConversionPlan *plan, bnb_error *err) {
    Bound bound;
    plan->config = o.hf.config;
    if (!bind_names(o, &bound, err)) return false;
    resolve_head(env, o, &plan->config, &bound);
    const std::vector<TensorInfo> infos = o.hf.arch->tensors(plan->config);
    bool transposed = false;
    if (!check_missing(o, infos, bound, err) || !find_layout(o, infos, bound, &transposed, err)) return false;
    for (const TensorInfo &info : infos) {
        auto it = bound.find(info.name);
        if (it == bound.end()) continue; // optional
        const SourceTensor *s = it->second;
        PlanItem item = {info, s, transposed && !s->tensor && o.hf.arch->may_be_transposed(info.name), {}};
        if (!check_item(o, item, err)) return false;
        item.target = policy.target(info, s->type, s->tensor ? bnb_tensor_quant(s->tensor) : nullptr);
        plan->bytes_in += source_bytes(item);
        plan->items.push_back(std::move(item));
    }
    return report_unused(env, o, bound, plan->items, err);
}

// ---- producing one tensor -------------------------------------------------------------------------------------------

// Numbers of one plain type and layout into another, by all threads.
struct CastJob {
    const uint8_t *src;
    uint8_t *dst;
    int32_t src_type, dst_type;
    size_t src_size, dst_size; // bytes of a number
    int64_t n;                 // numbers; of a transposition: rows of dst
    int64_t columns;           // of dst
};

constexpr int64_t cast_chunk = 1 << 16;

void cast_part(void *arg, int64_t i) {
    const CastJob &j = *static_cast<const CastJob *>(arg);
    const int64_t first = i * cast_chunk, n = std::min(cast_chunk, j.n - first);
    (void)bnb_convert(j.src_type, j.src + size_t(first) * j.src_size, j.dst_type, j.dst + size_t(first) * j.dst_size, n,
                      nullptr);
}

// A band of rows of dst is a band of columns of src, [columns, rows]: short runs of it are gathered in a tile that fits
// the cache. T: an unsigned integer of the source's size.
constexpr int64_t band_rows = 32, tile_columns = 128;

template <class T> void transpose_part(void *arg, int64_t i) {
    const CastJob &j = *static_cast<const CastJob *>(arg);
    const int64_t first = i * band_rows, rows = std::min(band_rows, j.n - first);
    T tile[band_rows][tile_columns], run[band_rows];
    for (int64_t c0 = 0; c0 < j.columns; c0 += tile_columns) {
        const int64_t columns = std::min(tile_columns, j.columns - c0);
        for (int64_t c = 0; c < columns; c++) {
            memcpy(run, j.src + size_t((c0 + c) * j.n + first) * sizeof(T),
                   size_t(rows) * sizeof(T)); // may be unaligned
            for (int64_t r = 0; r < rows; r++) tile[r][c] = run[r];
        }
        for (int64_t r = 0; r < rows; r++)
            (void)bnb_convert(j.src_type, tile[r], j.dst_type,
                              j.dst + size_t((first + r) * j.columns + c0) * j.dst_size, columns, nullptr);
    }
}

// One tensor with memory of its own.
std::shared_ptr<TensorStore> scratch_tensor(bnb_env *env, const TensorInfo &info, const Target &target,
                                            bnb_error *err) {
    std::shared_ptr<TensorStore> store = TensorStore::create(env, err);
    if (!store) return nullptr;
    store->add(info.name, info.shape, target.type, &target.quant);
    if (!store->status(err) || !store->alloc(err)) store.reset();
    return store;
}

bool fill_values(bnb_env *env, const PlanItem &item, bnb_tensor *dst, bnb_error *err);

bool fill_dequantized(bnb_env *env, const PlanItem &item, bnb_tensor *dst, bnb_error *err) {
    if (!item.transpose) return bnb_dequantize(env, item.source->tensor, dst, err) == BNB_OK;
    SourceTensor values = *item.source;
    Target plain;
    plain.type = values.type = bnb_tensor_type(dst);
    const TensorInfo info = {item.info.name, reversed(item.info.shape), item.info.role};
    const std::shared_ptr<TensorStore> store = scratch_tensor(env, info, plain, err);
    if (!store || bnb_dequantize(env, item.source->tensor, store->tensors()[0], err) != BNB_OK) return false;
    values.data = bnb_tensor_plane(store->tensors()[0], 0);
    return fill_values(env, {item.info, &values, true, item.target}, dst, err);
}

// The values of an item in the plain type of dst.
bool fill_values(bnb_env *env, const PlanItem &item, bnb_tensor *dst, bnb_error *err) {
    const SourceTensor &s = *item.source;
    if (bnb_type_is_quantized(s.type)) return fill_dequantized(env, item, dst, err);
    const int32_t type = bnb_tensor_type(dst);
    CastJob job = {static_cast<const uint8_t *>(s.data),
                   static_cast<uint8_t *>(bnb_tensor_plane(dst, 0)),
                   s.type,
                   type,
                   size_t(bnb_type_bits(s.type) / 8),
                   size_t(bnb_type_bits(type) / 8),
                   bnb_tensor_elements(dst),
                   0};
    if (item.transpose) {
        job.n = item.info.shape[0];
        job.columns = item.info.shape[1];
        bnb_parallel(env, (job.n + band_rows - 1) / band_rows,
                     job.src_size == 2 ? transpose_part<uint16_t> : transpose_part<uint32_t>, &job);
    } else {
        bnb_parallel(env, (job.n + cast_chunk - 1) / cast_chunk, cast_part, &job);
    }
    return true;
}

bool check_finite(bnb_env *env, const LoadPolicy &policy, const PlanItem &item, const bnb_tensor *t, bnb_error *err) {
    if (policy.params().allow_nonfinite) return true;
    bnb_error why;
    const bnb_status status = bnb_tensor_check_finite(env, t, &why);
    if (status == BNB_OK) return true;
    const bool changed = bnb_tensor_type(t) != item.source->type;
    return failed(err, status, "%s%s%s%s", why.msg, changed ? " as " : "",
                  changed ? bnb_type_name(bnb_tensor_type(t)) : "",
                  changed ? (", stored as " + item.source->dtype).c_str() : "");
}

uint64_t plane_bytes(const bnb_tensor *t, int32_t p) {
    return bnb_plane_bytes(t->type, &t->quant, t->n_dims, t->shape, p);
}

void copy_planes(const bnb_tensor *from, bnb_tensor *to) {
    for (int32_t p = 0; p < BNB_MAX_PLANES; p++) {
        const uint64_t bytes = plane_bytes(from, p);
        if (bytes) memcpy(bnb_tensor_plane(to, p), bnb_tensor_plane(from, p), bytes);
    }
}

// The values of an item that is to be quantized, in the type that they count as before: use(values).
template <class F> bool with_values(bnb_env *env, const LoadPolicy &policy, const PlanItem &item, bnb_error *err, F use) {
    const std::shared_ptr<TensorStore> scratch = TensorStore::create(env, err);
    if (!scratch) return false;
    scratch->add(item.info.name, item.info.shape, item.target.cast, nullptr);
    if (!scratch->status(err)) return false;
    bnb_tensor *values = scratch->tensors()[0];
    const SourceTensor &s = *item.source;
    const bool as_is = s.type == item.target.cast && !item.transpose && reinterpret_cast<uintptr_t>(s.data) % 4 == 0;
    if (as_is) { // the file itself is the source: no copy
        void *planes[BNB_MAX_PLANES] = {const_cast<void *>(s.data)};
        if (bnb_tensor_bind(values, planes, err) != BNB_OK) return false;
    } else if (!scratch->alloc(err) || !fill_values(env, item, values, err)) {
        return false;
    }
    return check_finite(env, policy, item, values, err) && use(values);
}

bool quantize_item(bnb_env *env, const LoadPolicy &policy, const PlanItem &item, bnb_tensor *dst, bnb_error *err) {
    return with_values(env, policy, item, err, [&](const bnb_tensor *values) {
        return bnb_quantize(env, values, dst, policy.params().compat, err) == BNB_OK &&
               check_finite(env, policy, item, dst, err); // int8 rounds to f16 first, which may overflow
    });
}

// From a dense source.
bool produce_dense(bnb_env *env, const LoadPolicy &policy, const PlanItem &item, bnb_tensor *dst, bnb_error *err) {
    if (bnb_type_is_quantized(item.target.type) && !item.target.copy) return quantize_item(env, policy, item, dst, err);
    if (item.target.copy) copy_planes(item.source->tensor, dst);
    else if (!fill_values(env, item, dst, err)) return false;
    return check_finite(env, policy, item, dst, err);
}

// Bytes of a file that a tensor is made from, [count].
struct Span {
    const void *data;
    uint64_t bytes;
};

std::vector<Span> source_spans(const SourceTensor &s) {
    if (s.strided) return {{s.strided->first, strided_extent(*s.strided)}};
    if (!s.tensor) return {{s.data, s.bytes}};
    std::vector<Span> spans;
    for (int32_t p = 0; p < BNB_MAX_PLANES; p++)
        spans.push_back({bnb_tensor_plane(s.tensor, p), plane_bytes(s.tensor, p)});
    return spans;
}

constexpr uint64_t read_chunk = 1 << 20, smallest_page = 4096;

void read_part(void *arg, int64_t i) {
    const Span &span = *static_cast<const Span *>(arg);
    const volatile uint8_t *p = static_cast<const uint8_t *>(span.data);
    const uint64_t begin = uint64_t(i) * read_chunk, end = std::min(span.bytes, begin + read_chunk);
    for (uint64_t at = begin; at < end; at += smallest_page) (void)p[at];
}

// Brings a tensor's pages into memory with all threads, so that what comes after computes and does not wait for a disk.
void read_source(bnb_env *env, const SourceTensor &s) {
    for (Span span : source_spans(s))
        bnb_parallel(env, int64_t((span.bytes + read_chunk - 1) / read_chunk), read_part, &span);
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Fills dst, RESIDENT and of the item's target type; shared: its memory is the source's already. Adds to the times.
bool produce(bnb_env *env, const LoadPolicy &policy, const PlanItem &item, bool shared, bnb_tensor *dst,
             bnb_convert_result *result, bnb_error *err) {
    std::unique_ptr<uint8_t[]> values;
    const SourceTensor &s = *item.source;
    const double start = now();
    read_source(env, s);
    const double read = now();
    result->read_s += read - start;
    if (shared) return check_finite(env, policy, item, dst, err); // which does not count as quantizing
    const SourceTensor dense = dense_source(env, s, &values);
    const bool ok = produce_dense(env, policy, {item.info, &dense, item.transpose, item.target}, dst, err);
    for (const Span &span : source_spans(s)) release_pages(span.data, span.bytes);
    result->quantize_s += now() - read;
    return ok;
}

bool report_progress(bnb_env *env, const char *phase, const ConversionPlan &plan, uint64_t done, bnb_error *err) {
    if (bnb_progress(env, phase, plan.bytes_in ? double(done) / double(plan.bytes_in) : 1)) return true;
    return failed(err, BNB_E_CANCELLED, "it was cancelled before the end");
}

// ---- loading --------------------------------------------------------------------------------------------------------

// What a loaded model keeps: its tensors, and the files that some of them lie in.
struct LoadedWeights {
    Origin origin;
    std::shared_ptr<TensorStore> store, deferred; // deferred: META, quantized by the device they go to
    std::unique_ptr<LoadPolicy> policy;
    ConversionPlan plan;
    std::vector<bnb_tensor *> tensors; // [plan.items]
};

// Whether a GPU can quantize this: it does so as bitsandbytes' CUDA kernels, and nothing looks at its results.
bool can_defer(const LoadPolicy &policy, const PlanItem &item) {
    return bnb_type_is_quantized(item.target.type) && !item.target.copy && policy.params().compat == BNB_COMPAT_CUDA &&
           (item.target.type != BNB_INT8 || item.target.cast == BNB_F16);
}

bool find_device(bnb_env *env, const char *device, bool *gpu, bnb_error *err) {
    bnb_backend *backend = bnb_backend_open(env, device ? device : "auto", err);
    *gpu = backend && strcmp(bnb_backend_name(backend), "cpu") != 0;
    bnb_backend_close(backend);
    return backend != nullptr;
}

// Whether the model can use the source's memory itself: the same numbers in the same order, and aligned.
bool can_share(const PlanItem &item) {
    const SourceTensor &s = *item.source;
    if (bnb_type_is_quantized(item.target.type)) return item.target.copy;
    const uintptr_t alignment = uintptr_t(bnb_type_bits(item.target.type)) / 8;
    return s.type == item.target.type && !item.transpose && !s.strided &&
           reinterpret_cast<uintptr_t>(s.data) % alignment == 0;
}

bool share(const SourceTensor &s, bnb_tensor *t, bnb_error *err) {
    void *planes[BNB_MAX_PLANES] = {const_cast<void *>(s.data)};
    for (int32_t p = 0; s.tensor && p < BNB_MAX_PLANES; p++) planes[p] = bnb_tensor_plane(s.tensor, p);
    return bnb_tensor_bind(t, planes, err) == BNB_OK;
}

bool load_weights(bnb_env *env, LoadedWeights *w, bool mapped, bool gpu, bnb_convert_result *result, bnb_error *err) {
    std::vector<bool> shared;
    for (const PlanItem &item : w->plan.items) {
        TensorStore &store = gpu && can_defer(*w->policy, item) ? *w->deferred : *w->store;
        store.add(item.info.name, item.info.shape, item.target.type, &item.target.quant);
        if (!store.status(err)) return false;
        w->tensors.push_back(store.tensors().back());
        shared.push_back(mapped && can_share(item));
        if (shared.back() && !share(*item.source, w->tensors.back(), err)) return false;
    }
    if (!w->store->alloc(err)) return false;
    uint64_t done = 0;
    for (size_t i = 0; i < w->plan.items.size(); i++) {
        const bool deferred = gpu && can_defer(*w->policy, w->plan.items[i]);
        bnb_tensor *t = w->tensors[i];
        if (!deferred && !produce(env, *w->policy, w->plan.items[i], shared[i], t, result, err)) return false;
        done += source_bytes(w->plan.items[i]);
        result->bytes_out += bnb_tensor_bytes(t);
        result->n_quantized += bnb_type_is_quantized(t->type);
        if (!report_progress(env, "load", w->plan, done, err)) return false;
    }
    result->n_tensors = int64_t(w->plan.items.size());
    result->bytes_in = w->plan.bytes_in;
    return true;
}

// ModelSource::numbers
bool deferred_numbers(bnb_env *env, const LoadedWeights &w, const bnb_tensor *t,
                      const std::function<bool(const bnb_tensor *)> &use, bnb_convert_result *result, bnb_error *err) {
    const size_t i = size_t(std::find(w.tensors.begin(), w.tensors.end(), t) - w.tensors.begin());
    const PlanItem &item = w.plan.items[i];
    std::unique_ptr<uint8_t[]> values;
    const double start = now();
    read_source(env, *item.source);
    const double read = now();
    const SourceTensor dense = dense_source(env, *item.source, &values);
    const bool ok = with_values(env, *w.policy, {item.info, &dense, item.transpose, item.target}, err, use);
    for (const Span &span : source_spans(*item.source)) release_pages(span.data, span.bytes);
    result->read_s += read - start;
    result->quantize_s += now() - read;
    return ok;
}

// Weights that are quantized are loaded as they are, as in transformers: quantizing them once more loses accuracy, so
// it is done by a conversion only.
bool check_loadable(const std::string &path, int32_t stored, int32_t wanted, bnb_error *err) {
    if (wanted < 0 || wanted == stored) return true;
    const std::string shown = printable_path(path);
    const char *type = bnb_type_name(wanted);
    return failed(
        err, BNB_E_UNSUPPORTED,
        "%s holds %s weights and is loaded as it is: for %s make another file with ./quantize %s OUT.bnb --type %s",
        shown.c_str(), bnb_type_name(stored), type ? type : "another type", shown.c_str(), type ? type : "TYPE");
}

const SourceTensor *first_quantized(const Origin &o) {
    for (const SourceTensor &t : o.tensors)
        if (bnb_type_is_quantized(t.type)) return &t;
    return nullptr;
}

bnb_model *load_checkpoint(bnb_env *env, const std::string &path, bnb_load_params load, const bnb_model_params *params,
                           bnb_convert_result *result, bnb_error *err) {
    const std::shared_ptr<LoadedWeights> loaded = std::make_shared<LoadedWeights>();
    const Origin &origin = loaded->origin;
    const bnb_model_params p = params_read(params, bnb_model_params_default);
    ModelSource model;
    if (!open_origin(env, path, &loaded->origin, err)) return nullptr;
    if (load.check && !check_origin(origin, err)) return nullptr;
    if (const SourceTensor *q = bnb_type_is_quantized(load.type) ? first_quantized(origin) : nullptr) {
        if (!check_loadable(path, q->type, load.type, err)) return nullptr;
        load.type = -1;
    }
    loaded->policy = LoadPolicy::create(*origin.hf.arch, &load, err);
    if (!loaded->policy || !make_plan(env, origin, *loaded->policy, &loaded->plan, err)) return nullptr;
    bool has_tokenizer = false;
    TokenizerData tokenizer;
    if (!read_tokenizer(origin, &has_tokenizer, &tokenizer, err)) return nullptr;
    if (has_tokenizer && !(model.tokenizer = Tokenizer::create(std::move(tokenizer), err))) return nullptr;
    loaded->store = TensorStore::create(env, err);
    loaded->deferred = TensorStore::create(env, err);
    bool gpu = false;
    if (!loaded->store || !loaded->deferred || !find_device(env, p.device, &gpu, err) || !load_weights(env, loaded.get(), !p.no_mmap, gpu, result, err))
        return nullptr;
    if (p.mlock) loaded->store->lock(env);
    model.config = loaded->plan.config;
    model.tensors = loaded->tensors;
    model.keep = loaded;
    if (gpu)
        model.numbers = [=, w = loaded.get()](const bnb_tensor *t, const std::function<bool(const bnb_tensor *)> &use,
                                              bnb_error *e) { return deferred_numbers(env, *w, t, use, result, e); };
    bnb_model *m = model_create(env, std::move(model), params, err);
    if (p.no_mmap) loaded->origin = Origin(); // nothing lies in the files
    return m;
}

// A .bnb is mapped as it is. What it is asked to be can only be checked.
bnb_model *load_bnb(bnb_env *env, const std::string &path, const bnb_load_params &load, const bnb_model_params *params,
                    bnb_convert_result *result, bnb_error *err) {
    const std::unique_ptr<bnb_file, FreeFile> file(load.check ? bnb_file_open(env, path.c_str(), 0, err) : nullptr);
    if (load.check && (!file || bnb_file_verify(file.get(), err) != BNB_OK)) return nullptr;
    bnb_model *model = bnb_model_open(env, path.c_str(), params, err);
    bnb_model_info info = {};
    info.struct_size = sizeof info;
    if (model) bnb_model_get_info(model, &info);
    result->n_tensors = model ? bnb_model_tensor_count(model) : 0;
    result->bytes_in = result->bytes_out = info.weight_bytes;
    if (!model || check_loadable(path, info.linear_type, load.type, err)) return model;
    bnb_model_free(model);
    return nullptr;
}

// ---- converting -----------------------------------------------------------------------------------------------------

// A .bnb file.
class BnbForm : public CheckpointWriter {
public:
    explicit BnbForm(std::unique_ptr<BnbWriter> writer) : writer_(std::move(writer)) {}

    static std::unique_ptr<CheckpointWriter> create(const std::string &path, const CheckpointContents &contents,
                                                    uint64_t, bnb_error *err) {
        std::unique_ptr<BnbWriter> w = BnbWriter::create(path, err);
        if (!w) return nullptr;
        Config config = contents.config;
        w->add_key("general.arch", config.arch);
        w->add_key("general.version", BNB_VERSION);
        config.fields([&](const char *name, auto &value) { w->add_key(std::string("config.") + name, value); });
        if (contents.has_tokenizer) w->add_chunk("tokn", serialize(contents.tokenizer));
        for (const OutputTensor &t : contents.tensors) w->add_tensor(t.info.name, t.type, &t.quant, t.info.shape);
        return std::make_unique<BnbForm>(std::move(w));
    }
    bool write_tensor(const bnb_tensor *t, bnb_error *err) override { return writer_->write_tensor(t, err); }
    bool finish(bnb_error *err) override { return writer_->finish(err); }
    uint64_t file_bytes() const override { return writer_->file_bytes(); }

private:
    std::unique_ptr<BnbWriter> writer_;
};

const struct Format {
    int32_t id;
    bool conv1d; // plain matrices that may be [in, out] are
    std::unique_ptr<CheckpointWriter> (*create)(const std::string &path, const CheckpointContents &,
                                                uint64_t shard_bytes, bnb_error *);
} formats[] = {
    {BNB_FORMAT_BNB, false, BnbForm::create},
    {BNB_FORMAT_HF, true, hf_writer_create},
};

const Format *find_format(int32_t id, bnb_error *err) {
    for (const Format &f : formats)
        if (f.id == id) return &f;
    bnb_fail(err, BNB_E_ARG, "there is no output format %d", static_cast<int>(id));
    return nullptr;
}

bool gather_contents(const Origin &origin, const Format &format, ConversionPlan *plan, CheckpointContents *out,
                     bnb_error *err) {
    out->arch = origin.hf.arch;
    out->config = plan->config;
    if (!read_tokenizer(origin, &out->has_tokenizer, &out->tokenizer, err)) return false;
    if (origin.checkpoint) out->tokenizer_dir = origin.checkpoint->directory();
    for (PlanItem &item : plan->items) {
        if (format.conv1d && !bnb_type_is_quantized(item.target.type) && out->arch->may_be_transposed(item.info.name)) {
            item.info.shape = reversed(item.info.shape);
            item.transpose = !item.transpose;
        }
        out->tensors.push_back({item.info, item.target.type, item.target.quant});
    }
    return true;
}

bool convert(bnb_env *env, const std::string &src, const std::string &dst, const bnb_load_params *load,
             const bnb_save_params &save, bnb_convert_result *result, bnb_error *err) {
    Origin origin;
    ConversionPlan plan;
    CheckpointContents contents;
    const Format *format = find_format(save.format, err);
    if (!format || !open_origin(env, src, &origin, err)) return false;
    if (params_read(load, bnb_load_params_default).check && !check_origin(origin, err)) return false;
    std::unique_ptr<LoadPolicy> policy = LoadPolicy::create(*origin.hf.arch, load, err);
    if (!policy || !make_plan(env, origin, *policy, &plan, err)) return false;
    if (!gather_contents(origin, *format, &plan, &contents, err)) return false;
    std::unique_ptr<CheckpointWriter> writer = format->create(dst, contents, save.shard_bytes, err);
    if (!writer) return false;
    uint64_t done = 0;
    for (const PlanItem &item : plan.items) {
        const std::shared_ptr<TensorStore> store = scratch_tensor(env, item.info, item.target, err); // one at a time
        if (!store || !produce(env, *policy, item, false, store->tensors()[0], result, err) ||
            !writer->write_tensor(store->tensors()[0], err))
            return false;
        done += source_bytes(item);
        result->n_quantized += bnb_type_is_quantized(item.target.type);
        if (!report_progress(env, "quantize", plan, done, err)) return false;
    }
    if (!writer->finish(err)) return false;
    result->n_tensors = int64_t(plan.items.size());
    result->bytes_in = plan.bytes_in;
    result->bytes_out = writer->file_bytes();
    return true;
}

} // namespace
} // namespace bnb

// ---- the C API ------------------------------------------------------------------------------------------------------

using namespace bnb;

void bnb_load_params_default(bnb_load_params *p, uint32_t struct_size) {
    bnb_load_params d = {};
    d.struct_size = struct_size;
    d.type = d.rest_type = -1;
    d.blocksize = bnb_quant_default(BNB_NF4).blocksize;
    d.threshold = bnb_quant_default(BNB_INT8).threshold;
    d.compat = BNB_COMPAT_CUDA;
    params_write(p, struct_size, d);
}

bnb_model *bnb_model_load(bnb_env *env, const char *path, const bnb_load_params *load, const bnb_model_params *params,
                          bnb_error *err) {
    const double start = now();
    const bnb_load_params p = params_read(load, bnb_load_params_default);
    bnb_convert_result r = {};
    bnb_model *model = guarded(err, static_cast<bnb_model *>(nullptr), [&] {
        return is_bnb_file(path) ? load_bnb(env, path, p, params, &r, err)
                                 : load_checkpoint(env, path, p, params, &r, err);
    });
    r.seconds = now() - start;
    if (model && p.result) *p.result = r;
    return model;
}

void bnb_save_params_default(bnb_save_params *p, uint32_t struct_size) {
    params_write(p, struct_size, bnb_save_params{struct_size, BNB_FORMAT_BNB, 5000000000});
}

bnb_status bnb_convert_checkpoint(bnb_env *env, const char *src, const char *dst, const bnb_load_params *load,
                                  const bnb_save_params *save, bnb_convert_result *result, bnb_error *err) {
    const double start = now();
    bnb_convert_result r = {};
    bnb_error why = {};
    const bnb_save_params p = params_read(save, bnb_save_params_default);
    if (!guarded(&why, false, [&] { return convert(env, src, dst, load, p, &r, &why); })) {
        if (err) *err = why;
        return why.code;
    }
    r.seconds = now() - start;
    if (result) *result = r;
    return BNB_OK;
}
