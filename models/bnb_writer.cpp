// bnb_writer.cpp: see bnb_writer.h. The size of the metadata is known before the hashes in it are, so the planes are
// written first, each at its final place, and the metadata and the header last: a file cut short has no header.
#include "bnb_writer.h"

#include <algorithm>
#include <cstring>

#include "arch.h" // shape_text

namespace bnb {

// Planes of a page or more begin on a page, so that they can be mapped, locked and released alone. Smaller ones need
// only their cache lines and would waste most of a page, so they stand closer; the header states what holds for all.
constexpr uint64_t page_alignment = BNB_FILE_ALIGNMENT, small_alignment = 256;

static uint64_t align_up(uint64_t n, uint64_t alignment) { return (n + alignment - 1) / alignment * alignment; }

// What TYPE says of a tensor's type. Fields that the type does not use are zero, so that equal types are equal bytes.
static bnb_file_type describe(int32_t id, const bnb_quant &q) {
    bnb_file_type t = {};
    t.id = uint32_t(id);
    t.bits = uint32_t(bnb_type_bits(id));
    if (bnb_type_is_quantized(id)) t.dtype = uint32_t(q.dtype);
    if (id == BNB_INT8) {
        t.threshold = q.threshold;
        t.outlier_rule = uint32_t(q.outlier_rule);
    }
    if (bnb_type_bits(id) == 4) {
        t.blocksize = uint32_t(q.blocksize);
        t.double_quant = uint32_t(q.double_quant);
        t.nested_blocksize = q.double_quant ? uint32_t(q.nested_blocksize) : 0;
        memcpy(t.quant_map, id == BNB_NF4 ? bnb_nf4_map : bnb_fp4_map, sizeof t.quant_map);
    }
    return t;
}

bool BnbWriter::fail(bnb_status code, bnb_error *err, const std::string &text) const {
    return failed(err, code, "%s: %s", printable_path(path_).c_str(), text.c_str());
}

std::unique_ptr<BnbWriter> BnbWriter::create(const std::string &path, bnb_error *err) {
    std::unique_ptr<BnbWriter> w(new BnbWriter);
    w->path_ = path;
    w->out_ = OutputFile::create(path, err);
    if (!w->out_) w.reset();
    return w;
}

// ---- metadata -------------------------------------------------------------------------------------------------------

BnbWriter::Key &BnbWriter::new_key(const std::string &name, uint32_t kind) {
    keys_.emplace_back();
    keys_.back().name = name;
    keys_.back().record = {};
    keys_.back().record.kind = kind;
    return keys_.back();
}

void BnbWriter::add_key(const std::string &name, int64_t value) {
    new_key(name, BNB_KEY_I64).record.value = uint64_t(value);
}

void BnbWriter::add_key(const std::string &name, double value) {
    memcpy(&new_key(name, BNB_KEY_F64).record.value, &value, 8);
}

void BnbWriter::add_key(const std::string &name, const std::string &value) {
    Key &k = new_key(name, BNB_KEY_STR);
    k.value = value;
    k.record.count = value.size();
}

void BnbWriter::add_key(const std::string &name, const std::vector<int64_t> &values) {
    Key &k = new_key(name, BNB_KEY_I64_ARRAY);
    k.value.assign(reinterpret_cast<const char *>(values.data()), values.size() * 8);
    k.record.count = values.size();
}

void BnbWriter::add_chunk(const char *tag, std::string payload) {
    chunks_.push_back({std::string(tag, 4), std::move(payload)});
}

void BnbWriter::add_tensor(const std::string &name, int32_t type, const bnb_quant *quant,
                           const std::vector<int64_t> &shape) {
    tensors_.push_back({name, shape, quant ? *quant : bnb_quant_default(type), type, {}});
}

static void append_chunk(std::string *out, const std::string &tag, const std::string &payload) {
    const uint32_t zero = 0;
    const uint64_t bytes = payload.size();
    out->append(tag);
    out->append(reinterpret_cast<const char *>(&zero), 4);
    out->append(reinterpret_cast<const char *>(&bytes), 8);
    out->append(payload);
    out->resize(align_up(out->size(), 8));
}

template <class Record> static void append_record(std::string *out, const Record &r) {
    out->append(reinterpret_cast<const char *>(&r), sizeof r);
}

// The chunks as they are now. The length depends only on what was added, not on hashes or offsets.
std::string BnbWriter::metadata() {
    std::string keys, types, tensors, strings, out;
    auto intern = [&strings](const std::string &bytes) {
        strings.resize(align_up(strings.size(), 8)); // arrays need it; strings do not mind
        strings += bytes;
        return strings.size() - bytes.size();
    };
    std::sort(keys_.begin(), keys_.end(), [](const Key &a, const Key &b) { return a.name < b.name; });
    for (Key &k : keys_) {
        k.record.name_offset = uint32_t(intern(k.name));
        k.record.name_bytes = uint32_t(k.name.size());
        if (k.record.kind >= BNB_KEY_STR) k.record.value = intern(k.value);
        append_record(&keys, k.record);
    }
    for (const bnb_file_type &t : types_) append_record(&types, t);
    std::vector<Tensor *> sorted;
    for (Tensor &t : tensors_) sorted.push_back(&t);
    std::sort(sorted.begin(), sorted.end(), [](const Tensor *a, const Tensor *b) {
        return a->record.name_hash != b->record.name_hash ? a->record.name_hash < b->record.name_hash
                                                          : a->name < b->name;
    });
    for (Tensor *t : sorted) {
        t->record.name_offset = uint32_t(intern(t->name));
        append_record(&tensors, t->record);
    }
    append_chunk(&out, "KEYS", keys);
    append_chunk(&out, "TYPE", types);
    append_chunk(&out, "TENS", tensors);
    append_chunk(&out, "STRS", strings);
    for (const Chunk &c : chunks_) append_chunk(&out, c.tag, c.payload);
    return out;
}

// ---- layout ---------------------------------------------------------------------------------------------------------

bool BnbWriter::check_names(bnb_error *err) const {
    std::vector<std::string> keys, tensors;
    uint64_t bytes = 0;
    for (const Key &k : keys_) {
        keys.push_back(k.name);
        bytes += k.name.size() + k.value.size() + 16; // 16: alignment
    }
    for (const Tensor &t : tensors_) {
        tensors.push_back(t.name);
        bytes += t.name.size() + 8;
        if (t.name.empty() || t.name.size() >= BNB_MAX_NAME || t.name.find('\0') != std::string::npos)
            return fail(BNB_E_LIMIT, err,
                        "'" + printable(t.name) +
                            "' cannot be a tensor's name: it is empty, has a NUL or more than 95 bytes");
    }
    for (std::vector<std::string> *names : {&keys, &tensors}) {
        std::sort(names->begin(), names->end());
        auto twice = std::adjacent_find(names->begin(), names->end());
        if (twice != names->end()) return fail(BNB_E_ARG, err, "'" + printable(*twice) + "' was added twice");
        if (!names->empty() && names->front().empty()) return fail(BNB_E_ARG, err, "a key has no name");
    }
    return bytes <= UINT32_MAX || fail(BNB_E_LIMIT, err, "the keys and names have more than 4 GiB");
}

// Gives a tensor its place after what has been placed so far, [0, file_bytes_).
bool BnbWriter::place(Tensor *t, bnb_error *err) {
    if (t->shape.empty() || t->shape.size() > BNB_MAX_DIMS)
        return fail(BNB_E_SHAPE, err,
                    "'" + printable(t->name) + "' of shape " + shape_text(t->shape) +
                        " does not have 1 to 4 dimensions");
    std::fill(t->record.shape, t->record.shape + BNB_MAX_DIMS, 1);
    std::copy(t->shape.begin(), t->shape.end(), t->record.shape);
    for (int32_t p = 0; p < BNB_MAX_PLANES; p++) {
        uint64_t bytes = bnb_plane_bytes(t->id, &t->quant, int32_t(t->shape.size()), t->shape.data(), p);
        if (bytes > uint64_t(INT64_MAX) - file_bytes_ - page_alignment)
            return fail(BNB_E_SHAPE, err,
                        "'" + printable(t->name) + "' of shape " + shape_text(t->shape) + " cannot be stored");
        if (bytes == 0 && p > 0) continue; // the type has no such plane
        t->record.planes[p].offset =
            bytes ? align_up(file_bytes_, bytes >= page_alignment ? page_alignment : small_alignment) : file_bytes_;
        t->record.planes[p].bytes = bytes;
        file_bytes_ = t->record.planes[p].offset + bytes;
    }
    return true;
}

// All is known but the contents: decides where everything stands.
bool BnbWriter::freeze(bnb_error *err) {
    if (frozen_) return true;
    if (!check_names(err)) return false;
    for (Tensor &t : tensors_) {
        bnb_file_type type = describe(t.id, t.quant);
        auto same = std::find_if(types_.begin(), types_.end(),
                                 [&](const bnb_file_type &x) { return memcmp(&x, &type, sizeof x) == 0; });
        t.record.type = uint32_t(same - types_.begin());
        if (same == types_.end()) types_.push_back(type);
        t.record.n_dims = uint32_t(t.shape.size());
        t.record.name_hash = bnb_hash64(t.name.data(), t.name.size(), 0);
        t.record.name_bytes = uint32_t(t.name.size());
    }
    memcpy(header_.magic, BNB_FILE_MAGIC, 8);
    header_.major = BNB_FILE_MAJOR;
    header_.minor = BNB_FILE_MINOR;
    header_.metadata_offset = sizeof header_;
    header_.metadata_bytes = metadata().size();
    header_.alignment = small_alignment;
    header_.data_offset = file_bytes_ = align_up(sizeof header_ + header_.metadata_bytes, page_alignment);
    for (Tensor &t : tensors_)
        if (!place(&t, err)) return false;
    header_.file_bytes = file_bytes_;
    if (!out_->resize(file_bytes_, err)) return false; // the gaps are zeros from here on
    frozen_ = true;
    return true;
}

// ---- contents -------------------------------------------------------------------------------------------------------

bool BnbWriter::write_tensor(const bnb_tensor *t, bnb_error *err) {
    if (!freeze(err)) return false;
    if (n_written_ == tensors_.size()) return fail(BNB_E_ARG, err, "more tensors are written than were added");
    Tensor &to = tensors_[n_written_];
    const std::vector<int64_t> shape(bnb_tensor_shape(t), bnb_tensor_shape(t) + bnb_tensor_n_dims(t));
    bnb_file_type type = describe(bnb_tensor_type(t), *bnb_tensor_quant(t));
    if (to.name != bnb_tensor_name(t) || to.shape != shape || memcmp(&type, &types_[to.record.type], sizeof type) != 0)
        return fail(BNB_E_ARG, err,
                    "'" + printable(bnb_tensor_name(t)) + "' is written where '" + printable(to.name) +
                        "' was added, or with another type or shape");
    if (bnb_type_bits(to.id) == 4 && to.quant.double_quant)
        to.record.nested_offset = bnb_tensor_quant(t)->nested_offset;
    for (int32_t p = 0; p < BNB_MAX_PLANES; p++) {
        bnb_file_plane &plane = to.record.planes[p];
        if (plane.bytes == 0) continue;
        const void *data = bnb_tensor_plane(t, p);
        if (!data) return fail(BNB_E_ARG, err, "'" + printable(to.name) + "' has no memory");
        plane.hash = bnb_hash64(data, plane.bytes, 0);
        if (!out_->write_at(data, plane.bytes, plane.offset, err)) return false;
    }
    n_written_++;
    return true;
}

bool BnbWriter::finish(bnb_error *err) {
    if (!freeze(err)) return false;
    if (n_written_ != tensors_.size())
        return fail(BNB_E_ARG, err, "'" + printable(tensors_[n_written_].name) + "' was added but not written");
    const std::string data = metadata();
    header_.hash = bnb_hash64(data.data(), data.size(), bnb_hash64(&header_, 56, 0));
    return out_->sync(err) && out_->write_at(data.data(), data.size(), header_.metadata_offset, err) &&
           out_->write_at(&header_, sizeof header_, 0, err) && out_->commit(err);
}

} // namespace bnb
