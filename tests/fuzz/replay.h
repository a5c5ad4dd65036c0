// replay.h: calls a fuzz target for every file of some directories. The main of the targets where there is no libFuzzer.
#pragma once

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include <dirent.h>

inline int replay(int argc, char **argv, int (*target)(const uint8_t *, size_t)) {
    int n = 0;
    for (int i = 1; i < argc; i++) {
        DIR *d = opendir(argv[i]);
        if (!d) {
            std::fprintf(stderr, "%s: not a directory\n", argv[i]);
            return 2;
        }
        while (dirent *e = readdir(d)) {
            if (e->d_name[0] == '.') continue;
            std::ifstream in(std::string(argv[i]) + "/" + e->d_name, std::ios::binary);
            std::vector<char> bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
            target(reinterpret_cast<const uint8_t *>(bytes.data()), bytes.size());
            n++;
        }
        closedir(d);
    }
    std::printf("%d files\n", n);
    return n == 0;
}
