// safetensors.h: reads safetensors files, and checkpoints that are split into several of them, by mapping them.
//
// Files of PyTorch are read by pytorch.h.
//
// Weights that bitsandbytes quantized are several tensors here; quant_state.h makes one of them.
//
// Not: no writing (hf_writer.h), no GGUF, no weights that others quantized. These are recognised and refused with a
//      sentence that says what they are.
//
// A file is trusted in nothing: every count, offset and name is checked before it is used. What the maps show is the
// file itself, so a file that another program shortens while it is mapped ends the process (SIGBUS), as with any mmap.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "files.h"

namespace bnb {

struct StridedView; // pytorch.h

// One tensor of a checkpoint.
struct SourceTensor {
    std::string name;
    std::string dtype;          // as the file spells it: "BF16"
    int32_t type = -1;          // BNB_F32, BNB_F16, ...; -1: nothing that bnb computes with
    std::vector<int64_t> shape; // outermost first
    const void *data = nullptr; // in the mapped file: may be unaligned, lives as long as the file
    uint64_t bytes = 0;
    std::shared_ptr<const StridedView> strided; // PyTorch: set if its elements lie apart; data is NULL then
    const bnb_tensor *tensor = nullptr; // .bnb files, quantized weights: a quantized type has more than `data`
};

// The tensors of the safetensors file [bytes] at `data`, in the order of their data. `file` is its name in messages.
bool safetensors_parse(const void *data, uint64_t bytes, const std::string &file, std::vector<SourceTensor> *out,
                       bnb_error *err);

// A checkpoint of one or several files.
class Checkpoint {
public:
    // path: a directory as Hugging Face lays it out, a file of safetensors or PyTorch, or an index file of several.
    // Tensors that the index does not list are left out, with a warning in env's log.
    static std::unique_ptr<Checkpoint> open(bnb_env *env, const std::string &path, bnb_error *err);

    const std::string &directory() const { return directory_; } // where config.json and the tokenizer lie
    const std::vector<SourceTensor> &tensors() const { return tensors_; }
    bool check(bnb_error *err) const; // reads the files and compares the checksums of those that have some

private:
    struct File {
        std::string path;
        std::unique_ptr<MappedFile> map;
    };
    Checkpoint() = default;
    bool add_file(bnb_env *env, const std::string &path, std::vector<SourceTensor> *tensors, bnb_error *err);
    bool add_index(bnb_env *env, const std::string &path, bnb_error *err);

    std::string directory_;
    std::vector<File> files_;
    std::vector<SourceTensor> tensors_;
};

} // namespace bnb
