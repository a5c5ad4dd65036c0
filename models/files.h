// files.h: what the readers and writers of checkpoints share: files in and out, strict JSON, names fit for messages.
//
// Not: no format of its own.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include <cstdint>
#include <memory>
#include <string>

#include "../bnb.h"

namespace bnb {

// bnb_fail for functions that say with false that they failed.
template <class... Args> bool failed(bnb_error *err, bnb_status code, const char *format, Args... args) {
    bnb_fail(err, code, format, args...);
    return false;
}

// ---- text for messages ----------------------------------------------------------------------------------------------

const uint8_t *find_ill_formed(const uint8_t *p, const uint8_t *end); // the first byte that is not UTF-8, or NULL
bool is_utf8(const std::string &text);                                // well formed

// Names come from files, so control characters and ill-formed UTF-8 become '?' and long ones are cut.
std::string printable(const std::string &name);
std::string printable_path(const std::string &path); // keeps the end, which tells files apart

// ---- files in -------------------------------------------------------------------------------------------------------

bool file_exists(const std::string &path);

// A file mapped for reading. A file that another program shortens meanwhile ends the process (SIGBUS), as with any
// mmap.
class MappedFile {
public:
    static std::unique_ptr<MappedFile> open(const std::string &path, bnb_error *err); // only regular files
    ~MappedFile();
    MappedFile(const MappedFile &) = delete;
    MappedFile &operator=(const MappedFile &) = delete;

    const uint8_t *data() const { return data_; }
    uint64_t size() const { return size_; }

private:
    MappedFile() = default;
    const uint8_t *data_ = nullptr;
    uint64_t size_ = 0;
};

// These bytes of a file's mapping have been read and need not stay in memory: they are read again if they are needed.
void release_pages(const void *data, uint64_t bytes);

// Parses JSON more strictly than most: a key that stands twice in an object, nesting deeper than 64, a NUL byte, more
// than `most` bytes (a tree takes many times that) and anything that is not UTF-8 are errors. `name` begins the
// messages.
constexpr uint64_t max_json_bytes = 128 << 20; // the largest tokenizer.json known has 33 MB
bool json_parse(const void *text, uint64_t bytes, const std::string &name, nlohmann::json *out, bnb_error *err,
                uint64_t most = max_json_bytes);
bool json_read(const std::string &path, nlohmann::json *out, bnb_error *err, uint64_t most = max_json_bytes); // a file

// ---- files out ------------------------------------------------------------------------------------------------------

// A file that stands under PATH.tmp-PID until commit() renames it: one that was there before survives any failure.
class OutputFile {
public:
    static std::unique_ptr<OutputFile> create(const std::string &path, bnb_error *err);
    ~OutputFile(); // without commit(): removes what was written
    OutputFile(const OutputFile &) = delete;
    OutputFile &operator=(const OutputFile &) = delete;

    bool resize(uint64_t bytes, bnb_error *err); // what is not written is zeros
    bool write_at(const void *data, uint64_t bytes, uint64_t offset, bnb_error *err);
    bool sync(bnb_error *err);
    bool commit(bnb_error *err); // sync, close, rename

private:
    OutputFile() = default;
    bool fail_os(bnb_error *err, const char *verb) const;

    std::string path_, temporary_;
    int fd_ = -1;
};

// A whole file at once.
bool write_file(const std::string &path, const std::string &contents, bnb_error *err);

// Makes a rename in this file's directory last.
void sync_directory_of(const std::string &path);

} // namespace bnb
