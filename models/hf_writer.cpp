// hf_writer.cpp: see hf_writer.h.
//
// A shard's header stands before its data but depends on the length of the JSON texts in them (a nested offset has as
// many digits as it needs). So those texts come last, the header's space is that of the longest ones, and it is written
// when all else is, padded with spaces as the format allows.
#include "hf_writer.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "files.h"
#include "quant_state.h"
#include "tokenizer_json.h"

namespace bnb {
namespace {

using Json = nlohmann::ordered_json;
namespace fs = std::filesystem;

// Names of modules in PyTorch: "model.decoder.layers.0.fc1.weight" is "layers.0.fc1.weight" here.
std::string hf_name(const Arch &arch, const TensorInfo &info) {
    return info.role == Role::Head || !arch.prefixes[0] ? info.name : arch.prefixes[0] + info.name;
}

std::string module_of(const std::string &name) { return name.substr(0, name.rfind('.')); }

// ---- JSON files -----------------------------------------------------------------------------------------------------

Json token_ids(const std::vector<int64_t> &ids) {
    if (ids.empty()) return nullptr;
    return ids.size() == 1 ? Json(ids[0]) : Json(ids);
}

// The inverse of reading: of several keys for one field the last one is the architecture's own.
void put_fields(Config config, const HfKey *keys, Json *out) {
    for (const HfKey *key = keys; key->hf; key++) {
        const bool negated = key->field[0] == '!';
        bool last = true;
        for (const HfKey *other = key + 1; other->hf; other++) last &= strcmp(other->field, key->field) != 0;
        if (!last) continue;
        config.fields([&](const char *name, auto &field) {
            if (strcmp(name, key->field + negated) != 0) return;
            if constexpr (std::is_same_v<decltype(field), bool &>) (*out)[key->hf] = field != negated;
            else (*out)[key->hf] = field;
        });
    }
}

std::string activation_name(const std::string &act) { return act == "gelu_tanh" ? "gelu_new" : act; }

// Type of most that is not quantized: the embeddings'.
int32_t plain_type(const CheckpointContents &c) {
    for (const OutputTensor &t : c.tensors)
        if (t.info.role == Role::Embedding) return t.type;
    return BNB_F32;
}

// transformers quantizes all linear modules but the head; a list of modules replaces "the head".
Json skipped_modules(const CheckpointContents &c) {
    Json list = Json::array();
    bool head_quantized = false;
    for (const OutputTensor &t : c.tensors) {
        const bool quantized = bnb_type_is_quantized(t.type);
        if (t.info.role == Role::Head) head_quantized = quantized;
        if (t.info.role == Role::Linear && !quantized) list.push_back(module_of(hf_name(*c.arch, t.info)));
    }
    if (list.empty() && !head_quantized) return nullptr;
    if (!head_quantized) list.push_back("lm_head");
    return list;
}

// NULL where nothing is quantized.
const OutputTensor *first_quantized(const CheckpointContents &c) {
    for (const OutputTensor &t : c.tensors)
        if (bnb_type_is_quantized(t.type)) return &t;
    return nullptr;
}

// All the keys that transformers writes, in its order.
Json quantization_config(const CheckpointContents &c, const OutputTensor &t) {
    const bool int8 = t.type == BNB_INT8;
    return {{"_load_in_4bit", !int8},
            {"_load_in_8bit", int8},
            {"bnb_4bit_compute_dtype", torch_dtype_name(plain_type(c))},
            {"bnb_4bit_quant_storage", "uint8"},
            {"bnb_4bit_quant_type", int8 ? "fp4" : bnb_type_name(t.type)},
            {"bnb_4bit_use_double_quant", !int8 && t.quant.double_quant},
            {"llm_int8_enable_fp32_cpu_offload", false},
            {"llm_int8_has_fp16_weight", false},
            {"llm_int8_skip_modules", skipped_modules(c)},
            {"llm_int8_threshold", int8 ? double(t.quant.threshold) : double(bnb_quant_default(BNB_INT8).threshold)},
            {"load_in_4bit", !int8},
            {"load_in_8bit", int8},
            {"quant_method", "bitsandbytes"}};
}

std::string text_of(const Json &json) { return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n"; }

std::string config_text(const CheckpointContents &c) {
    Json json = {{"architectures", Json::array({c.arch->hf_class})}, {"model_type", c.arch->name}};
    Config config = c.config;
    config.act = activation_name(config.act);
    put_fields(config, c.arch->hf_keys, &json);
    json["bos_token_id"] = config.bos >= 0 ? Json(config.bos) : Json(nullptr);
    json["eos_token_id"] = token_ids(config.eos);
    json["pad_token_id"] = config.pad >= 0 ? Json(config.pad) : Json(nullptr);
    json["torch_dtype"] = torch_dtype_name(plain_type(c));
    if (const OutputTensor *t = first_quantized(c)) json["quantization_config"] = quantization_config(c, *t);
    return text_of(json);
}

std::string generation_config_text(const Config &c) {
    Json json = Json::object();
    if (c.bos >= 0) json["bos_token_id"] = c.bos;
    if (!c.eos.empty()) json["eos_token_id"] = token_ids(c.eos);
    if (c.pad >= 0) json["pad_token_id"] = c.pad;
    if (c.do_sample) json["do_sample"] = true;
    if (c.temperature >= 0) json["temperature"] = c.temperature;
    if (c.top_k >= 0) json["top_k"] = c.top_k;
    if (c.top_p >= 0) json["top_p"] = c.top_p;
    if (c.repetition_penalty >= 0) json["repetition_penalty"] = c.repetition_penalty;
    return text_of(json);
}

// ---- the tokenizer --------------------------------------------------------------------------------------------------

bool copy_tokenizer(const std::string &from, const std::string &to, bnb_error *err) {
    for (const char *name : {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "encoder.json",
                             "vocab.bpe", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"}) {
        if (!file_exists(from + "/" + name)) continue;
        const std::unique_ptr<MappedFile> file = MappedFile::open(from + "/" + name, err);
        if (!file ||
            !write_file(to + "/" + name, {reinterpret_cast<const char *>(file->data()), size_t(file->size())}, err))
            return false;
    }
    return true;
}

bool write_tokenizer(const CheckpointContents &c, const std::string &to, bnb_error *err) {
    const TokenizerData &data = c.tokenizer;
    const std::string text = tokenizer_to_json(data);
    const nlohmann::json model = nlohmann::json::parse(text)["model"];
    std::string merges = "#version: 0.2\n";
    for (const auto &merge : model["merges"]) merges += merge.get<std::string>() + "\n";
    Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                   {"add_prefix_space", data.add_prefix_space},
                   {"clean_up_tokenization_spaces", false},
                   {"model_max_length", c.config.n_ctx}};
    const std::pair<const char *, int32_t> named[] = {
        {"bos_token", data.bos}, {"eos_token", data.eos}, {"unk_token", data.unk}, {"pad_token", data.pad}};
    for (const auto &n : named)
        if (n.second >= 0) config[n.first] = data.tokens[size_t(n.second)];
    return write_file(to + "/tokenizer.json", text, err) &&
           write_file(to + "/vocab.json", model["vocab"].dump(-1, ' ', false, Json::error_handler_t::replace), err) &&
           write_file(to + "/merges.txt", merges, err) &&
           write_file(to + "/tokenizer_config.json", text_of(config), err);
}

// ---- weights --------------------------------------------------------------------------------------------------------

struct PlacedPart {
    StoredPart part;
    size_t tensor;   // whose part it is
    uint64_t offset; // in the data
};

struct Shard {
    std::string file;
    size_t n_tensors = 0;
    std::vector<PlacedPart> parts; // in the order of their data
    uint64_t header_bytes = 0, data_bytes = 0;
};

size_t element_bytes(const StoredPart &p) {
    return p.dtype == "F32" ? 4 : p.dtype == "F16" || p.dtype == "BF16" ? 2 : 1;
}

constexpr int32_t state_text_plane = -2;

class HfWriter : public CheckpointWriter {
public:
    HfWriter(const std::string &path, const CheckpointContents &contents) : path_(path), contents_(contents) {}
    ~HfWriter() override {
        out_.reset();
        std::error_code ec;
        if (!directory_.empty()) fs::remove_all(directory_, ec);
    }

    bool begin(uint64_t shard_bytes, bnb_error *err) {
        if (!check_types(err) || !make_directory(err)) return false;
        plan_shards(shard_bytes);
        return true;
    }

    bool write_tensor(const bnb_tensor *t, bnb_error *err) override {
        Shard &shard = shards_[shard_];
        if (!out_) {
            out_ = OutputFile::create(directory_ + "/" + shard.file, err);
            if (!out_ || !out_->resize(8 + shard.header_bytes + shard.data_bytes, err)) return false;
        }
        for (PlacedPart &p : shard.parts)
            if (p.tensor == tensor_ && !write_part(t, &p, err)) return false;
        tensor_++;
        written_in_shard_++;
        return written_in_shard_ < shard.n_tensors || close_shard(err);
    }

    bool finish(bnb_error *err) override {
        const CheckpointContents &c = contents_;
        if (shards_.size() > 1 && !write_file(directory_ + "/model.safetensors.index.json", index_text(), err))
            return false;
        if (c.has_tokenizer && !(c.tokenizer_dir.empty() ? write_tokenizer(c, directory_, err)
                                                         : copy_tokenizer(c.tokenizer_dir, directory_, err)))
            return false;
        if (!write_file(directory_ + "/generation_config.json", generation_config_text(c.config), err) ||
            !write_file(directory_ + "/config.json", config_text(c), err))
            return false;
        std::error_code ec;
        fs::rename(directory_, path_, ec); // takes the place of an empty directory
        if (ec)
            return failed(err, BNB_E_IO, "%s cannot be made: %s", printable_path(path_).c_str(), ec.message().c_str());
        directory_.clear();
        sync_directory_of(path_);
        return true;
    }

    uint64_t file_bytes() const override { return file_bytes_; }

private:
    // transformers knows one configuration for the whole model.
    bool check_types(bnb_error *err) const {
        const OutputTensor *first = first_quantized(contents_);
        for (const OutputTensor &t : contents_.tensors)
            if (bnb_type_is_quantized(t.type) && (t.type == BNB_INT8) != (first->type == BNB_INT8))
                return failed(
                    err, BNB_E_UNSUPPORTED,
                    "%s: '%s' is %s and '%s' is %s, but a Hugging Face checkpoint has weights of 4 or of 8 bits",
                    printable_path(path_).c_str(), first->info.name.c_str(), bnb_type_name(first->type),
                    t.info.name.c_str(), bnb_type_name(t.type));
        return true;
    }

    bool make_directory(bnb_error *err) {
        std::error_code ec;
        while (path_.size() > 1 && path_.back() == '/') path_.pop_back();
        if (file_exists(path_) && !(fs::is_directory(path_, ec) && fs::is_empty(path_, ec)))
            return failed(err, BNB_E_IO, "%s is there already and is not an empty directory",
                          printable_path(path_).c_str());
        for (int i = 0; i < 100 && directory_.empty(); i++) { // a name that is taken is another writer's
            const std::string name = path_ + ".tmp-" + std::to_string(getpid()) + (i ? "-" + std::to_string(i) : "");
            if (fs::create_directory(name, ec)) directory_ = name;
            else if (ec) break;
        }
        return !directory_.empty() ||
               failed(err, BNB_E_IO, "%s cannot be created: %s", printable_path(path_).c_str(), ec.message().c_str());
    }

    void plan_shards(uint64_t shard_bytes) {
        for (size_t i = 0; i < contents_.tensors.size(); i++) {
            const OutputTensor &t = contents_.tensors[i];
            const std::vector<StoredPart> parts =
                stored_parts(hf_name(*contents_.arch, t.info), t.type, t.quant, t.info.shape);
            uint64_t bytes = 0;
            for (const StoredPart &p : parts) bytes += p.bytes;
            if (shards_.empty() || (shards_.back().data_bytes && shards_.back().data_bytes + bytes > shard_bytes))
                shards_.emplace_back();
            Shard &shard = shards_.back();
            for (const StoredPart &p : parts) shard.parts.push_back({p, i, 0});
            shard.data_bytes += bytes;
            shard.n_tensors++;
        }
        char name[64] = "model.safetensors";
        for (size_t i = 0; i < shards_.size(); i++) {
            if (shards_.size() > 1)
                snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", i + 1, shards_.size());
            shards_[i].file = name;
            place(&shards_[i]);
        }
    }

    // Large elements first, so that each lies at a multiple of its size; texts, whose length may change, last.
    static void place(Shard *shard) {
        std::stable_sort(shard->parts.begin(), shard->parts.end(), [](const PlacedPart &a, const PlacedPart &b) {
            const bool text_a = a.part.plane == state_text_plane, text_b = b.part.plane == state_text_plane;
            return text_a != text_b ? text_b : element_bytes(a.part) > element_bytes(b.part);
        });
        shard->data_bytes = 0;
        for (PlacedPart &p : shard->parts) {
            p.offset = shard->data_bytes;
            shard->data_bytes += p.part.bytes;
        }
        shard->header_bytes = (header_text(*shard).size() + 7) / 8 * 8;
    }

    static std::string header_text(const Shard &shard) {
        Json header = {{"__metadata__", {{"format", "pt"}}}};
        for (const PlacedPart &p : shard.parts) {
            const bool text = p.part.plane == state_text_plane;
            header[p.part.name] = {{"dtype", p.part.dtype},
                                   {"shape", text ? Json::array({p.part.bytes}) : Json(p.part.shape)},
                                   {"data_offsets", Json::array({p.offset, p.offset + p.part.bytes})}};
        }
        return header.dump();
    }

    bool write_part(const bnb_tensor *t, PlacedPart *p, bnb_error *err) {
        const uint64_t begin = 8 + shards_[shard_].header_bytes;
        if (p->part.plane >= 0)
            return out_->write_at(bnb_tensor_plane(t, p->part.plane), p->part.bytes, begin + p->offset, err);
        const std::string contents = stored_contents(p->part, t);
        if (p->part.plane != state_text_plane)
            return out_->write_at(contents.data(), contents.size(), begin + p->offset, err);
        texts_.push_back(contents);
        p->part.bytes = contents.size();
        return true;
    }

    bool close_shard(bnb_error *err) {
        Shard &shard = shards_[shard_];
        const uint64_t begin = 8 + shard.header_bytes;
        uint64_t end = 0, n = 0;
        for (PlacedPart &p : shard.parts) {
            p.offset = end;
            end += p.part.bytes;
            if (p.part.plane == state_text_plane &&
                !out_->write_at(texts_[n].data(), texts_[n].size(), begin + p.offset, err))
                return false;
            n += p.part.plane == state_text_plane;
        }
        std::string header = header_text(shard);
        header.resize(size_t(shard.header_bytes), ' ');
        const uint64_t length = header.size();
        header.insert(0, reinterpret_cast<const char *>(&length), 8);
        if (!out_->write_at(header.data(), header.size(), 0, err) || !out_->resize(begin + end, err) ||
            !out_->commit(err))
            return false;
        file_bytes_ += begin + end;
        data_bytes_ += end;
        out_.reset();
        texts_.clear();
        written_in_shard_ = 0;
        shard_++;
        return true;
    }

    std::string index_text() const {
        Json map = Json::object();
        for (const Shard &shard : shards_)
            for (const PlacedPart &p : shard.parts) map[p.part.name] = shard.file;
        return text_of({{"metadata", {{"total_size", data_bytes_}}}, {"weight_map", map}});
    }

    std::string path_, directory_; // directory_: where it is made
    const CheckpointContents &contents_;
    std::vector<Shard> shards_;
    std::unique_ptr<OutputFile> out_; // of the present shard
    std::vector<std::string> texts_;  // of the present shard, in the order of its parts
    size_t shard_ = 0, tensor_ = 0, written_in_shard_ = 0;
    uint64_t file_bytes_ = 0, data_bytes_ = 0;
};

} // namespace

std::unique_ptr<CheckpointWriter> hf_writer_create(const std::string &path, const CheckpointContents &contents,
                                                   uint64_t shard_bytes, bnb_error *err) {
    std::unique_ptr<HfWriter> w(new HfWriter(path, contents));
    if (!w->begin(shard_bytes, err)) w.reset();
    return w;
}

} // namespace bnb
