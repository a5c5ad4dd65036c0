// pytorch.h: reads the files of torch.save, the zip format and the older stream of pickles, without executing anything.
//
// A pickle is a program: here it may only build plain values and tensors. A list of opcodes and symbols says what is
// known; everything else is refused with a sentence that names it. Storages stay where they are in the mapped file.
//
// Not: no TorchScript, no pickled modules, no tar files of the years before 2017, no big-endian files, no checksums
//      unless they are asked for.
#pragma once

#include "safetensors.h"

namespace bnb {

// A tensor whose elements lie apart: transposed, a slice of columns, expanded. All of them lie in the file.
struct StridedView {
    const uint8_t *first = nullptr; // element [0, 0, ...]
    uint32_t element_bytes = 0;
    std::vector<int64_t> shape, strides; // outermost first; strides in elements, not negative, 0 where expanded
};

// Copies rows [first_row, first_row + n_rows) of the outermost dimension to dst, densely.
void strided_gather(const StridedView &view, int64_t first_row, int64_t n_rows, void *dst);

// Bytes of the file from its first element to behind its last one.
uint64_t strided_extent(const StridedView &view);

// Whether a file that begins like this is one of PyTorch's, among them those that pytorch_parse refuses by name.
bool pytorch_is(const void *data, uint64_t bytes);

// Appends the tensors of the file [bytes] at `data`, which must outlive them. `file` is its name in messages. A state
// dict may be the whole file or lie under 'state_dict', 'model' or 'module' in it. notes (may be NULL): sentences about
// what was left out.
bool pytorch_parse(const void *data, uint64_t bytes, const std::string &file, std::vector<SourceTensor> *out,
                   std::vector<std::string> *notes, bnb_error *err);

// Compares the checksums of a zip with its bytes, which pytorch_parse does not: it reads the whole file. The stream has
// none, and neither have zips that PyTorch was told to write without.
bool pytorch_check_crc(const void *data, uint64_t bytes, const std::string &file, bnb_error *err);

} // namespace bnb
