// checkpoint_writer.h: the seam between a conversion and the forms that it can write. One form is one class and one
// line in checkpoint.cpp (formats).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "arch.h"

namespace bnb {

struct OutputTensor {
    TensorInfo info; // its shape as it is written: a plain Conv1D is [in, out] in a Hugging Face checkpoint
    int32_t type;
    bnb_quant quant;
};

// All that a checkpoint holds beside the numbers.
struct CheckpointContents {
    const Arch *arch = nullptr;
    Config config;
    bool has_tokenizer = false;
    TokenizerData tokenizer;
    std::string tokenizer_dir; // a Hugging Face directory whose tokenizer files mean the same; "": none
    std::vector<OutputTensor> tensors;
};

// Nothing stands under the final name before finish(): what was there before survives any failure.
class CheckpointWriter {
public:
    virtual ~CheckpointWriter() = default;
    virtual bool write_tensor(const bnb_tensor *t, bnb_error *err) = 0; // RESIDENT on the host, in the contents' order
    virtual bool finish(bnb_error *err) = 0;
    virtual uint64_t file_bytes() const = 0; // of all files of weights, once they are written
};

} // namespace bnb
