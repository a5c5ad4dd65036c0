// quant_state.h: weights as bitsandbytes stores them, several tensors of a checkpoint for one quantized weight.
//
//     4 bits   X.weight               codes: U8 [(n+1)/2, 1], or the same bytes as F16, BF16 or F32 (quant_storage)
//              X.weight.absmax        F32 [nb], or U8 [nb] where it is quantized as well (nested)
//              X.weight.quant_map     F32 [16]: code -> value
//              X.weight.nested_absmax F32 [ceil(nb / 256)]   X.weight.nested_quant_map F32 [256]
//              X.weight.quant_state.bitsandbytes__nf4 (or __fp4): U8, a JSON text with shape, blocksize and dtype
//     8 bits   X.weight I8 [N, K]     X.SCB F32 [N]          X.weight_format U8 []: 0, rows; not in old files
//
// Not: no other quantizer's formats, no layouts of 8-bit weights but rows, no code maps but bitsandbytes' own.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "load_policy.h"
#include "safetensors.h"

namespace bnb {

// The quantized weights of a checkpoint as tensors whose planes lie in the mapped files.
class QuantizedWeights {
public:
    // What 8-bit tensors do not say themselves, see bnb_quant.
    int32_t int8_dtype = BNB_F16;
    float int8_threshold = bnb_quant_default(BNB_INT8).threshold;

    // Replaces the tensors of each quantized weight by one whose SourceTensor::tensor is set; this object owns that.
    // where: what messages begin with.
    bool fold(bnb_env *env, const std::string &where, std::vector<SourceTensor> *tensors, bnb_error *err);

private:
    struct Folder;
    std::shared_ptr<TensorStore> store_;
    std::vector<std::unique_ptr<uint8_t[]>> copies_; // planes that are not aligned, or not dense, in their file
};

// One tensor of a file: what a quantized weight (or a plain one) is written as.
struct StoredPart {
    std::string name, dtype; // safetensors' spelling
    std::vector<int64_t> shape;
    uint64_t bytes;
    int32_t plane; // of the tensor; -1: quant_map, -2: the JSON text (bytes: at most), -3: weight_format
};
std::vector<StoredPart> stored_parts(const std::string &name, int32_t type, const bnb_quant &quant,
                                     const std::vector<int64_t> &shape);
// The contents of a part that is no plane.
std::string stored_contents(const StoredPart &part, const bnb_tensor *t);

const char *torch_dtype_name(int32_t type);             // "float16"; NULL: no plain float
int32_t torch_dtype_from_name(const std::string &name); // -1: none of float32, float16, bfloat16

} // namespace bnb
