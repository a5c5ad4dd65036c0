// tool_encode.cpp: encodes records for tests/golden/compare_tokenizers.py and measures encoding speed.
//
// Build: make test; it is build/test/tool_encode
// Run:   tool_encode DIR [add] [parse] [raw] [time] [export] < records > ids
//
// A record is a u32 length (little-endian) and that many bytes; each gives one line of ids. add, parse and raw are the
// flags of Tokenizer::encode; time encodes everything for a second of CPU time and reports MB/s on stderr; export
// writes tokenizer_to_json() to stdout instead. The vocabulary takes the way through a .bnb file's chunk.
#include <cstdio>
#include <cstring>
#include <ctime>
#include <string>
#include <vector>

#include "../models/tokenizer.h"
#include "../models/tokenizer_json.h"

static std::string read_all(std::FILE *f) {
    std::string text;
    char buffer[65536];
    for (size_t n; (n = std::fread(buffer, 1, sizeof buffer, f)) > 0;) text.append(buffer, n);
    return text;
}

static std::vector<std::string> split_records(const std::string &text) {
    std::vector<std::string> records;
    for (size_t at = 0; at + 4 <= text.size();) {
        uint32_t n = 0;
        std::memcpy(&n, &text[at], 4);
        records.push_back(text.substr(at + 4, n));
        at += 4 + size_t(n);
    }
    return records;
}

static void encode_all(const bnb::Tokenizer &t, const std::vector<std::string> &records, uint32_t flags, bool print) {
    std::vector<int32_t> ids;
    std::string line;
    for (const std::string &r : records) {
        ids.clear();
        t.encode(r.data(), r.size(), flags, &ids);
        if (!print) continue;
        line.clear();
        for (const int32_t id : ids) line += std::to_string(id) + ' ';
        if (!line.empty()) line.pop_back();
        std::puts(line.c_str());
    }
}

static void report_speed(const bnb::Tokenizer &t, const std::vector<std::string> &records, uint32_t flags) {
    size_t bytes = 0, rounds = 0;
    for (const std::string &r : records) bytes += r.size();
    encode_all(t, records, flags, false);    // warm up
    const std::clock_t start = std::clock(); // CPU time: the machine may have other work
    double seconds = 0;
    while (seconds < 1) {
        encode_all(t, records, flags, false);
        ++rounds;
        seconds = double(std::clock() - start) / CLOCKS_PER_SEC;
    }
    std::fprintf(stderr, "%.1f MB/s (%zu bytes, %zu rounds)\n", double(bytes) * double(rounds) / seconds / 1e6, bytes,
                 rounds);
}

int main(int argc, char **argv) {
    uint32_t flags = 0;
    bool time = false, export_json = false;
    for (int i = 2; i < argc; ++i) {
        const std::string a = argv[i];
        if (a == "add") flags |= bnb::ENCODE_ADD_SPECIAL;
        else if (a == "parse") flags |= bnb::ENCODE_PARSE_SPECIAL;
        else if (a == "raw") flags |= bnb::ENCODE_RAW_BYTES;
        else if (a == "time") time = true;
        else if (a == "export") export_json = true;
        else argc = 0;
    }
    if (argc < 2)
        return std::fputs("usage: tool_encode DIR [add] [parse] [raw] [time] [export] < records\n", stderr), 2;
    bnb_error err;
    bnb::TokenizerData data, stored;
    if (!bnb::tokenizer_from_dir(argv[1], &data, &err)) return std::fprintf(stderr, "%s\n", err.msg), 1;
    if (export_json) return std::fputs(bnb::tokenizer_to_json(data).c_str(), stdout), 0;
    const std::string chunk = bnb::serialize(data);
    const std::clock_t start = std::clock();
    if (!bnb::parse(chunk.data(), chunk.size(), &stored, &err)) return std::fprintf(stderr, "%s\n", err.msg), 1;
    const auto t = bnb::Tokenizer::create(std::move(stored), &err);
    if (!t) return std::fprintf(stderr, "%s\n", err.msg), 1;
    const double ms = double(std::clock() - start) * 1000 / CLOCKS_PER_SEC;
    const std::vector<std::string> records = split_records(read_all(stdin));
    if (time) {
        std::fprintf(stderr, "chunk of %zu bytes, ready in %.1f ms\n", chunk.size(), ms);
        report_speed(*t, records, flags);
    } else {
        encode_all(*t, records, flags, true);
    }
    return 0;
}
