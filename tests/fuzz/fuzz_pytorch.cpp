// fuzz_pytorch.cpp: any bytes as a file of torch.save: opened, and every tensor in it read.
//
// Fuzz:    make fuzz, or: clang++ -std=c++17 -g -O1 -fsanitize=fuzzer,address,undefined -DBNB_FUZZ
// tests/fuzz/fuzz_pytorch.cpp
//              models/pytorch.cpp models/safetensors.cpp models/files.cpp bnb.o -lm -pthread -o fuzz_pytorch, then
//              ./fuzz_pytorch corpus/ tests/attacks/pytorch/
// Replay:  with -DBNB_FUZZ_REPLAY instead; tests/test_pytorch.cpp does the same in every run of the tests.
//
// Bytes that are only a pickle become the data.pkl of a zip with four storages of 64 bytes, so that a fuzzer need not
// find out how to make a zip.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../../models/pytorch.h"

namespace pytorch_fuzz {

volatile uint64_t sink; // what was read, so that reading is not optimized away

inline void require(bool ok, const char *what) {
    if (ok) return;
    std::fprintf(stderr, "fuzz_pytorch: %s\n", what);
    std::abort();
}

inline void put(std::string *out, uint64_t n, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) out->push_back(i < 8 ? char(n >> 8 * i) : '\0');
}

// A zip of stored entries, as short as the format allows.
inline std::string zip_image(const std::vector<std::pair<std::string, std::string>> &entries) {
    std::string out, directory;
    for (const auto &e : entries) {
        const uint64_t begin = out.size(), name = e.first.size(), bytes = e.second.size();
        put(&out, 0x04034b50, 4), put(&out, 0, 22), put(&out, name, 2), put(&out, 0, 2);
        out += e.first + e.second;
        put(&directory, 0x02014b50, 4), put(&directory, 0, 16), put(&directory, bytes, 4), put(&directory, bytes, 4);
        put(&directory, name, 2), put(&directory, 0, 8), put(&directory, 0, 4), put(&directory, begin, 4);
        directory += e.first;
    }
    const uint64_t n = entries.size(), begin = out.size(), bytes = directory.size();
    out += directory;
    put(&out, 0x06054b50, 4), put(&out, 0, 4), put(&out, n, 2), put(&out, n, 2), put(&out, bytes, 4),
        put(&out, begin, 4), put(&out, 0, 2);
    return out;
}

// A pickle as a file of PyTorch.
inline std::string wrap_pickle(const std::string &pickle) {
    const std::string storage(64, '\1');
    return zip_image({{"a/data.pkl", pickle},
                      {"a/data/0", storage},
                      {"a/data/1", storage},
                      {"a/data/2", storage},
                      {"a/data/3", storage}});
}

// A pickle that is not the begin of a stream.
inline bool is_pickle(const std::string &s) {
    return s.size() > 2 && s[0] == '\x80' && s.compare(2, 2, "\x8A\x0A") != 0 && s[2] != '\x95';
}

inline void touch(const void *p, uint64_t n) {
    for (uint64_t i = 0; i < n; i++) sink = sink + static_cast<const uint8_t *>(p)[i];
}

// Every element, or, where an expanded tensor has very many, some rows of it.
inline void read_tensor(const bnb::SourceTensor &t, const uint8_t *begin, uint64_t bytes) {
    uint64_t elements = 1;
    for (int64_t d : t.shape) elements *= uint64_t(d);
    require(!t.name.size() || t.name.find('\0') == std::string::npos, "a name with a NUL byte");
    require(elements == 0 ? t.bytes == 0 : t.bytes % elements == 0, "a size that is not the shape's");
    require(!t.data != !t.strided, "a tensor is neither dense nor strided");
    if (t.data) {
        const uint8_t *p = static_cast<const uint8_t *>(t.data);
        require(t.bytes == 0 || (p >= begin && p <= begin + bytes && t.bytes <= uint64_t(begin + bytes - p)),
                "a tensor does not lie in its file");
        return touch(p, t.bytes);
    }
    require(t.shape == t.strided->shape && t.strided->strides.size() == t.shape.size(),
            "a strided tensor of another shape");
    constexpr uint64_t most = 1 << 16;
    const uint64_t row = t.bytes / uint64_t(t.shape[0]), rows = uint64_t(t.shape[0]);
    if (row > most) return; // expanded: too much for a fuzzer
    const uint64_t n = std::min(rows, most / row);
    const std::unique_ptr<uint8_t[]> out(new uint8_t[n * row]);
    for (uint64_t first : {uint64_t(0), rows - n}) {
        bnb::strided_gather(*t.strided, int64_t(first), int64_t(n), out.get());
        touch(out.get(), n * row);
    }
}

} // namespace pytorch_fuzz

// 1: it is recognised, 2: it has tensors. Aborts where the reader broke a promise.
int fuzz_pytorch(const uint8_t *data, size_t size) {
    using namespace pytorch_fuzz;
    std::string image(reinterpret_cast<const char *>(data), size);
    if (is_pickle(image)) image = wrap_pickle(image);
    const std::unique_ptr<uint8_t[]> copy(
        new uint8_t[image.size()]); // of exactly this length: reads behind the end are seen
    std::memcpy(copy.get(), image.data(), image.size());
    const uint64_t bytes = image.size();
    std::vector<bnb::SourceTensor> tensors;
    std::vector<std::string> notes;
    bnb_error err = {};
    const bool known = bnb::pytorch_is(copy.get(), bytes);
    bnb_error crc = {};
    bnb::pytorch_check_crc(copy.get(), bytes, "fuzz.pt", &crc);
    if (!bnb::pytorch_parse(copy.get(), bytes, "fuzz.pt", &tensors, &notes, &err)) {
        require(err.code < 0 && !std::strchr(err.msg, '\n') && !std::strncmp(err.msg, "fuzz.pt: ", 9),
                "an error that does not name the file");
        return known;
    }
    require(known, "a file was read that is not recognised");
    for (const std::string &note : notes)
        require(!note.empty() && note.find('\n') == note.npos, "a note that is no sentence");
    for (const bnb::SourceTensor &t : tensors) read_tensor(t, copy.get(), bytes);
    return 2;
}

#ifdef BNB_FUZZ_REPLAY
#include "replay.h"
int main(int argc, char **argv) { return replay(argc, argv, fuzz_pytorch); }
#elif defined(BNB_FUZZ)
extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_pytorch(data, size);
    return 0;
}
#endif
