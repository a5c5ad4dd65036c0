// files.cpp: see files.h.
#include "files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <system_error>
#include <unordered_set>
#include <vector>

namespace bnb {

using nlohmann::json;

// ---- text for messages ----------------------------------------------------------------------------------------------

// Bytes of the well-formed UTF-8 character at p, 0 if there is none (RFC 3629: no overlong forms, no surrogates).
static size_t utf8_length(const uint8_t *p, const uint8_t *end) {
    if (p[0] < 0x80) return 1;
    size_t n = p[0] >= 0xF0 ? 4 : p[0] >= 0xE0 ? 3 : 2;
    if (p[0] < 0xC2 || p[0] > 0xF4 || size_t(end - p) < n) return 0;
    for (size_t i = 1; i < n; i++)
        if ((p[i] & 0xC0) != 0x80) return 0;
    bool overlong = (p[0] == 0xE0 && p[1] < 0xA0) || (p[0] == 0xF0 && p[1] < 0x90);
    bool surrogate = p[0] == 0xED && p[1] > 0x9F, too_large = p[0] == 0xF4 && p[1] > 0x8F;
    return overlong || surrogate || too_large ? 0 : n;
}

const uint8_t *find_ill_formed(const uint8_t *p, const uint8_t *end) {
    while (p < end) {
        size_t n = utf8_length(p, end);
        if (n == 0) return p;
        p += n;
    }
    return nullptr;
}

bool is_utf8(const std::string &text) {
    const uint8_t *p = reinterpret_cast<const uint8_t *>(text.data());
    return !find_ill_formed(p, p + text.size());
}

static std::string printable_all(const std::string &s) {
    std::string out;
    const uint8_t *p = reinterpret_cast<const uint8_t *>(s.data()), *end = p + s.size();
    while (p < end) {
        size_t n = utf8_length(p, end);
        if (n == 0 || *p < 0x20 || *p == 0x7F) {
            out += '?';
            p++;
        } else {
            out.append(reinterpret_cast<const char *>(p), n);
            p += n;
        }
    }
    return out;
}

std::string printable(const std::string &name) {
    constexpr size_t longest = 100;
    if (name.size() <= longest) return printable_all(name);
    size_t cut = longest;
    while (cut > 0 && (uint8_t(name[cut]) & 0xC0) == 0x80) cut--; // not inside a character
    return printable_all(name.substr(0, cut)) + "...";
}

std::string printable_path(const std::string &path) {
    constexpr size_t longest = 160;
    if (path.size() <= longest) return printable_all(path);
    size_t cut = path.size() - longest;
    while (cut < path.size() && (uint8_t(path[cut]) & 0xC0) == 0x80) cut++;
    return "..." + printable_all(path.substr(cut));
}

static std::string os_message(int code) { return std::generic_category().message(code); }

// ---- files in -------------------------------------------------------------------------------------------------------

bool file_exists(const std::string &path) {
    std::error_code ec;
    return std::filesystem::exists(path, ec);
}

std::unique_ptr<MappedFile> MappedFile::open(const std::string &path, bnb_error *err) {
    std::string shown = printable_path(path);
    int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK); // NONBLOCK: opening a FIFO must not wait
    if (fd < 0) {
        bnb_fail(err, BNB_E_IO, "%s cannot be opened: %s", shown.c_str(), os_message(errno).c_str());
        return nullptr;
    }
    std::unique_ptr<MappedFile> file(new MappedFile);
    struct stat st;
    bool ok = false;
    if (fstat(fd, &st) != 0) {
        bnb_fail(err, BNB_E_IO, "%s cannot be examined: %s", shown.c_str(), os_message(errno).c_str());
    } else if (!S_ISREG(st.st_mode)) {
        bnb_fail(err, BNB_E_IO, "%s is not a regular file", shown.c_str());
    } else if (st.st_size == 0) {
        ok = true; // nothing to map
    } else {
        void *p = mmap(nullptr, size_t(st.st_size), PROT_READ, MAP_PRIVATE, fd, 0);
        ok = p != MAP_FAILED;
        if (ok) {
            file->data_ = static_cast<const uint8_t *>(p);
            file->size_ = uint64_t(st.st_size);
        } else {
            bnb_fail(err, BNB_E_IO, "%s cannot be mapped: %s", shown.c_str(), os_message(errno).c_str());
        }
    }
    close(fd);
    if (!ok) file.reset();
    return file;
}

MappedFile::~MappedFile() {
    if (data_) munmap(const_cast<uint8_t *>(data_), size_t(size_));
}

void release_pages(const void *data, uint64_t bytes) {
    const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), begin = reinterpret_cast<uintptr_t>(data);
    const uintptr_t first = (begin + page - 1) / page * page,
                    end = (begin + bytes) / page * page; // whole pages: neighbours need the rest
    if (first < end) madvise(reinterpret_cast<void *>(first), end - first, MADV_DONTNEED);
}

// ---- JSON -----------------------------------------------------------------------------------------------------------

static constexpr int max_depth = 64;

bool json_parse(const void *data, uint64_t bytes, const std::string &name, json *out, bnb_error *err, uint64_t most) {
    const char *text = static_cast<const char *>(data);
    if (bytes > most)
        return failed(err, BNB_E_LIMIT, "%s has more than %llu bytes", name.c_str(),
                      static_cast<unsigned long long>(most));
    if (bytes && memchr(text, 0, size_t(bytes))) // the parser would take it for the end of the text
        return failed(err, BNB_E_FORMAT, "%s has a NUL byte in it", name.c_str());
    std::vector<std::unordered_set<std::string>> open; // keys of the objects that we are in
    auto watch = [&](int depth, json::parse_event_t event, json &value) {
        if (depth > max_depth) throw std::runtime_error("it is nested too deep");
        if (event == json::parse_event_t::object_start) open.emplace_back();
        if (event == json::parse_event_t::object_end) open.pop_back();
        if (event == json::parse_event_t::key && !open.back().insert(value.get<std::string>()).second)
            throw std::runtime_error("'" + printable(value.get<std::string>()) + "' stands twice in an object");
        return true;
    };
    try {
        *out = json::parse(text, text + bytes, watch);
        return true;
    } catch (const json::parse_error &e) {
        bnb_fail(err, BNB_E_FORMAT, "%s is not valid JSON at byte %zu", name.c_str(), e.byte);
    } catch (const json::exception &) { // of what is well formed: a number that no double holds
        bnb_fail(err, BNB_E_FORMAT, "%s has a number that is out of range", name.c_str());
    } catch (const std::runtime_error &e) {
        bnb_fail(err, BNB_E_FORMAT, "%s: %s", name.c_str(), e.what());
    }
    return false;
}

bool json_read(const std::string &path, json *out, bnb_error *err, uint64_t most) {
    std::unique_ptr<MappedFile> file = MappedFile::open(path, err);
    return file && json_parse(file->data(), file->size(), printable_path(path), out, err, most);
}

// ---- files out ------------------------------------------------------------------------------------------------------

bool OutputFile::fail_os(bnb_error *err, const char *verb) const {
    const int code = errno;
    return failed(err, BNB_E_IO, "%s cannot be %s: %s", printable_path(temporary_).c_str(), verb,
                  os_message(code).c_str());
}

std::unique_ptr<OutputFile> OutputFile::create(const std::string &path, bnb_error *err) {
    std::unique_ptr<OutputFile> f(new OutputFile);
    f->path_ = path;
    struct stat st;
    if (stat(path.c_str(), &st) == 0 && !S_ISREG(st.st_mode)) {
        bnb_fail(err, BNB_E_IO, "%s: it exists and is not a regular file", printable_path(path).c_str());
        return nullptr;
    }
    // A name that is taken belongs to another writer of this process, or to a dead process that had our number.
    for (int i = 0; i < 100 && f->fd_ < 0; i++) {
        f->temporary_ = path + ".tmp-" + std::to_string(getpid()) + (i ? "-" + std::to_string(i) : "");
        f->fd_ = open(f->temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (f->fd_ < 0 && errno != EEXIST) break;
    }
    if (f->fd_ >= 0) return f;
    f->fail_os(err, "created");
    return nullptr;
}

OutputFile::~OutputFile() {
    if (fd_ < 0) return;
    close(fd_);
    unlink(temporary_.c_str());
}

bool OutputFile::resize(uint64_t bytes, bnb_error *err) {
    return ftruncate(fd_, off_t(bytes)) == 0 || fail_os(err, "extended to its size");
}

bool OutputFile::write_at(const void *data, uint64_t bytes, uint64_t offset, bnb_error *err) {
    const char *p = static_cast<const char *>(data);
    while (bytes > 0) {
        ssize_t n = pwrite(fd_, p, size_t(std::min<uint64_t>(bytes, 1 << 30)), off_t(offset));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
            if (n == 0) errno = ENOSPC; // no progress and no reason given
            return fail_os(err, "written");
        }
        p += n;
        bytes -= uint64_t(n);
        offset += uint64_t(n);
    }
    return true;
}

bool OutputFile::sync(bnb_error *err) { return fsync(fd_) == 0 || fail_os(err, "written to the disk"); }

bool OutputFile::commit(bnb_error *err) {
    if (!sync(err)) return false;
    int fd = fd_;
    fd_ = -1; // close() releases it even when it fails
    if (close(fd) != 0 || rename(temporary_.c_str(), path_.c_str()) != 0) {
        fail_os(err, "closed and renamed");
        unlink(temporary_.c_str());
        return false;
    }
    sync_directory_of(path_);
    return true;
}

bool write_file(const std::string &path, const std::string &contents, bnb_error *err) {
    std::unique_ptr<OutputFile> f = OutputFile::create(path, err);
    return f && f->write_at(contents.data(), contents.size(), 0, err) && f->commit(err);
}

// The rename has happened already, and some file systems cannot do this, so a failure is no failure.
void sync_directory_of(const std::string &path) {
    size_t slash = path.rfind('/');
    std::string dir = slash == std::string::npos ? "." : path.substr(0, slash + 1);
    int fd = open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return;
    (void)fsync(fd);
    close(fd);
}

} // namespace bnb
