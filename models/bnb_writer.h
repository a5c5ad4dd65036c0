// bnb_writer.h: writes a .bnb file (bnb.h, [FILE]) tensor by tensor, so that only one has to be in memory.
//
// Use:   auto w = BnbWriter::create("model.bnb", &err);
//        w->add_key("general.arch", std::string("opt"));
//        w->add_tensor("embed_tokens.weight", BNB_F16, nullptr, {50272, 768});   // all of them, in the file's order
//        w->write_tensor(tensor, &err);                                        // each of them, in the same order
//        w->finish(&err);
// Not:   no editing of files, no shards.
//
// What is written stands in PATH.tmp-PID until finish() renames it: a file that was there before survives any failure.
// The same calls write the same bytes.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "files.h"

namespace bnb {

class BnbWriter {
public:
    static std::unique_ptr<BnbWriter> create(const std::string &path, bnb_error *err);

    // Metadata: before the first write_tensor.
    void add_key(const std::string &name, int64_t value);
    void add_key(const std::string &name, double value);
    void add_key(const std::string &name, const std::string &value);
    void add_key(const std::string &name, const std::vector<int64_t> &values);
    void add_key(const std::string &name, bool value) { add_key(name, int64_t(value)); }
    void add_key(const std::string &name, const char *value) { add_key(name, std::string(value)); }
    void add_chunk(const char *tag, std::string payload); // tag: 4 characters, see [FILE]
    void add_tensor(const std::string &name, int32_t type, const bnb_quant *quant, const std::vector<int64_t> &shape);

    bool write_tensor(const bnb_tensor *t, bnb_error *err); // RESIDENT on the host, as it was added
    bool finish(bnb_error *err);
    uint64_t file_bytes() const { return file_bytes_; } // known from the first write_tensor on

private:
    struct Key {
        std::string name;
        bnb_file_key record;
        std::string value; // bytes in STRS: of a string or of i64 values
    };
    struct Tensor {
        std::string name;
        std::vector<int64_t> shape;
        bnb_quant quant;
        int32_t id;
        bnb_file_record record;
    };
    struct Chunk {
        std::string tag, payload;
    };

    BnbWriter() = default;
    Key &new_key(const std::string &name, uint32_t kind);
    bool fail(bnb_status code, bnb_error *err, const std::string &text) const;
    bool freeze(bnb_error *err);
    bool check_names(bnb_error *err) const;
    bool place(Tensor *t, bnb_error *err);
    std::string metadata();

    std::string path_;
    std::unique_ptr<OutputFile> out_;
    bool frozen_ = false;
    size_t n_written_ = 0;
    uint64_t file_bytes_ = 0;
    bnb_file_header header_ = {};
    std::vector<Key> keys_;
    std::vector<bnb_file_type> types_;
    std::vector<Tensor> tensors_; // in the order of their data
    std::vector<Chunk> chunks_;
};

} // namespace bnb
