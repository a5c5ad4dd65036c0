#!/usr/bin/env python3
"""Makes the small hostile checkpoints that test_checkpoint.cpp replays: each must be refused with one sentence.

    python3 make_attacks.py          # needs nothing but Python; writes safetensors/, directories/ and config/ beside itself

safetensors/NAME.safetensors is a file, directories/NAME/ a Hugging Face directory, config/NAME.bin two JSON texts (see
fuzz_config.cpp). A file whose name begins with good is one that fuzzers start from. Files in bnb/ are not made here.
Adding one: a line below; the tests take whatever lies there.
"""
import json
import os
import shutil
import struct

HERE = os.path.dirname(os.path.abspath(__file__))


def raw(header, data=b"", length=None):
    if isinstance(header, str):
        header = header.encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def tensors(entries, data):
    return raw(json.dumps(entries), data)


def gpt2(skip=(), change=None, C=8, L=1, V=5, P=4):
    """A complete tiny GPT-2 in f32, as a list of (name, shape, bytes)."""
    names = [("wte.weight", [V, C]), ("wpe.weight", [P, C])]
    for i in range(L):
        h = f"h.{i}."
        names += [(h + "ln_1.weight", [C]), (h + "ln_1.bias", [C]), (h + "attn.c_attn.weight", [C, 3 * C]), (h + "attn.c_attn.bias", [3 * C]),
                  (h + "attn.c_proj.weight", [C, C]), (h + "attn.c_proj.bias", [C]), (h + "ln_2.weight", [C]), (h + "ln_2.bias", [C]),
                  (h + "mlp.c_fc.weight", [C, 4 * C]), (h + "mlp.c_fc.bias", [4 * C]), (h + "mlp.c_proj.weight", [4 * C, C]),
                  (h + "mlp.c_proj.bias", [C])]
    names += [("ln_f.weight", [C]), ("ln_f.bias", [C])]
    header, data = {}, b""
    for name, shape in names:
        if name in skip:
            continue
        n = 4
        for d in shape:
            n *= d
        header[name] = entry(shape, len(data), len(data) + n)
        data += bytes(n)
    if change:
        header, data = change(header, data)
    return tensors(header, data)


CONFIG = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 4, "vocab_size": 5}
WEIGHT = "h.0.attn.c_attn.weight"

FILES = {
    "empty": b"",
    "seven-bytes": b"\0" * 7,
    "eight-bytes": b"\0" * 8,
    "length-max": b"\xff" * 8 + b"{}",
    "length-max-minus-8": struct.pack("<Q", 2**64 - 8) + b"{}",
    "length-over-limit": raw("{}", length=100_000_001),
    "length-over-file": raw("{}", length=1000),
    "length-into-data": raw('{"x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"{}", length=55),
    "not-utf8": raw(b'{"\xff\xfe":{}}'),
    "surrogate": raw(r'{"\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
    "overlong-utf8": raw(b'{"\xc0\x80":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
    "nul-after-json": raw(b"{}\0\0\0"),
    "byte-order-mark": raw(b"\xef\xbb\xbf{}"),
    "nested-arrays": raw("[" * 5000),
    "nested-objects": raw('{"a":' * 5000),
    "nested-in-unknown-key": raw('{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"y":' + "[" * 5000 + "]" * 5000 + "}}"),
    "nested-metadata": raw('{"__metadata__":{"a":{"b":{}}}}'),
    "metadata-number": raw('{"__metadata__":{"format":1}}'),
    "open-string": raw('{"x'),
    "unknown-dtype": tensors({"x": entry([1], 0, 4, "F31")}, bytes(4)),
    "no-dtype": raw('{"x":{"shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "name-twice": raw('{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', bytes(2)),
    "name-nul": raw(r'{"a\u0000b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', bytes(1)),
    "name-escape-codes": raw(r'{"\u001b[2J\u0007\n":{"dtype":"zzz","shape":[1],"data_offsets":[0,1]}}', bytes(1)),
    "name-long": tensors({"n" * 5000: entry([1], 0, 4)}, bytes(4)),
    "offset-hole": tensors({"x": entry([1], 4, 8)}, bytes(8)),
    "offset-overlap": tensors({"x": entry([2], 0, 8), "y": entry([2], 4, 12)}, bytes(12)),
    "offset-reversed": tensors({"x": entry([1], 8, 4)}, bytes(8)),
    "offset-beyond-file": tensors({"x": entry([1 << 20], 0, 4 << 20)}, bytes(4)),
    "offset-wraps": tensors({"x": entry([1], 2**64 - 4, 0)}, bytes(4)),
    "offset-over-64-bits": raw('{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,18446744073709551617]}}', bytes(1)),
    "offset-float": raw('{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1.0]}}', bytes(1)),
    "shape-negative": raw('{"x":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}', bytes(1)),
    "shape-overflow": tensors({"x": entry([2**32, 2**32, 2**32], 0, 0)}, b""),
    "shape-overflow-in-bits": tensors({"x": entry([2**61], 0, 0, "F64")}, b""),
    "shape-wraps-to-size": tensors({"x": entry([2**62, 4], 0, 0)}, b""),
    "shape-lies": tensors({"x": entry([100], 0, 4)}, bytes(4)),
    "shape-rank-1000": tensors({"x": entry([1] * 1000, 0, 4)}, bytes(4)),
    "bytes-appended": tensors({"x": entry([1], 0, 4)}, bytes(5)),
    "zip": b"PK\x03\x04" + bytes(64),
    "gguf": b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63),
    "pickle": bytes.fromhex("80028a0a6cfc9c46f9206aa850192e") + bytes(16),
    "valid-but-no-model": tensors({"x": entry([1], 0, 4)}, bytes(4)),
    "huge-layer-number": tensors({"wte.weight": entry([1, 64], 0, 256), "wpe.weight": entry([1, 64], 256, 512),
                                  "h.999999.attn.c_attn.weight": entry([1], 512, 516)}, bytes(516)),
    "huge-vocabulary": tensors({"wte.weight": entry([2**40, 0], 0, 0), "wpe.weight": entry([1, 64], 0, 256), WEIGHT: entry([1], 256, 260)}, bytes(260)),
}


NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170036776941, 0.7229568362236023, 1.0]


def four_bits(change=None, nested=True, **blob):
    """One weight [2, 64] as bitsandbytes stores it; change(parts) may alter its tensors, blob its JSON text."""
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [2, 64]}
    if nested:
        state.update(nested_blocksize=256, nested_dtype="float32", nested_offset=0.5)
    text = json.dumps({**state, **blob}).encode()
    parts = {"x.weight": (list(range(64)), [64, 1], "U8", "64B"), "x.weight.quant_map": (NF4, [16], "F32", "<16f")}
    if nested:
        parts["x.weight.absmax"] = ([1, 2], [2], "U8", "2B")
        parts["x.weight.nested_absmax"] = ([1.5], [1], "F32", "<f")
        parts["x.weight.nested_quant_map"] = ([i / 256 for i in range(256)], [256], "F32", "<256f")
    else:
        parts["x.weight.absmax"] = ([0.5, 2.0], [2], "F32", "<2f")
    parts["x.weight.quant_state.bitsandbytes__nf4"] = (text, [len(text)], "U8", None)
    if change:
        change(parts)
    header, data = {}, b""
    for name, (values, shape, dtype, pack) in parts.items():
        raw_bytes = struct.pack(pack, *values) if pack else values
        header[name] = entry(shape, len(data), len(data) + len(raw_bytes), dtype)
        data += raw_bytes
    return tensors(header, data)


def eight_bits(**more):
    parts = {"x.weight": (bytes(range(128)), [2, 64], "I8"), "x.SCB": (struct.pack("<2f", 1, 2), [2], "F32"),
             "x.weight_format": (b"\0", [], "U8"), **more}
    header, data = {}, b""
    for name, (raw_bytes, shape, dtype) in parts.items():
        header[name.replace("__", ".")] = entry(shape, len(data), len(data) + len(raw_bytes), dtype)
        data += raw_bytes
    return tensors(header, data)


FILES.update({
    "good-plain": tensors({"x": entry([2, 3], 0, 24)}, bytes(24)),
    "good-nf4": four_bits(nested=False),
    "good-nf4-nested": four_bits(),
    "good-int8": eight_bits(),
    "nf4-without-absmax": four_bits(lambda p: p.pop("x.weight.absmax")),
    "nf4-without-weight": four_bits(lambda p: p.pop("x.weight")),
    "nf4-blocksize-0": four_bits(blocksize=0),
    "nf4-blocksize-huge": four_bits(blocksize=2**31),
    "nf4-shape-huge": four_bits(shape=[2**62, 4]),
    "nf4-shape-lies": four_bits(shape=[2, 65]),
    "nf4-shape-deep": four_bits(shape=[[[2]], 64]),
    "nf4-offset-text": four_bits(nested_offset="0.5"),
    "nf4-unknown-key": four_bits(code=1),
    "nf4-state-of-zeros": four_bits(lambda p: p.update({"x.weight.quant_state.bitsandbytes__nf4": (bytes(50), [50], "U8", None)})),
    "nf4-other-map": four_bits(lambda p: p.update({"x.weight.quant_map": ([0.0] * 16, [16], "F32", "<16f")})),
    "int8-scb-short": eight_bits(**{"x.SCB": (struct.pack("<f", 1), [1], "F32")}),
    "int8-turing": eight_bits(**{"x.weight_format": (b"\2", [], "U8")}),
})


def config_input(config, generation=""):
    config = config if isinstance(config, str) else json.dumps(config)
    return struct.pack("<H", len(config)) + config.encode() + (generation or "").encode()


OPT = {"model_type": "opt", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 128,
       "max_position_embeddings": 8, "vocab_size": 5, "word_embed_proj_dim": 32, "do_layer_norm_before": False}
CONFIGS = {
    "good-gpt2": config_input(CONFIG, '{"eos_token_id": [1, 2], "temperature": 0.7, "top_k": 40, "do_sample": true}'),
    "good-opt": config_input(OPT),
    "good-int8": config_input({**CONFIG, "torch_dtype": "bfloat16", "quantization_config":
                               {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 4.5}}),
    "mingpt-trainer": config_input({"system": {}, "data": {}, "model": {"n_head": 2}, "trainer": {}}),
    "generation-list": config_input(CONFIG, "[]"),
    "generation-cut": config_input(CONFIG, '{"eos'),
    "threshold-nan": config_input('{"model_type":"gpt2","quantization_config":{"load_in_8bit":true,"llm_int8_threshold":1e999}}'),
    "deep": config_input('{"a":' * 3000),
    "empty": config_input(""),
}


def directory(config=CONFIG, weights=None, **more):
    files = {"config.json": config if isinstance(config, (str, bytes)) else json.dumps(config),
             "model.safetensors": gpt2() if weights is None else weights}
    files.update({name.replace("__", "."): value for name, value in more.items()})
    return {name: value for name, value in files.items() if value is not None}


def config(**more):
    return directory({**CONFIG, **more})


def index(text):
    return {"config.json": json.dumps(CONFIG), "model.safetensors.index.json": text if isinstance(text, str) else json.dumps(text)}


def nan(header, data):
    begin = header[WEIGHT]["data_offsets"][0]
    return header, data[:begin] + struct.pack("<f", float("nan")) + data[begin + 4:]


def reshape(name, shape, dtype="F32"):
    def change(header, data):
        header[name].update(shape=shape, dtype=dtype)
        return header, data
    return change


DIRECTORIES = {
    "config-empty": directory(""),
    "config-not-json": directory("model_type: gpt2"),
    "config-not-utf8": directory(b'{"model_type":"gpt2\xff"}'),
    "config-nul": directory(b"{}\0"),
    "config-list": directory("[]"),
    "config-deep": directory('{"a":' + "[" * 4000 + "]" * 4000 + "}"),
    "config-key-twice": directory('{"model_type":"gpt2","n_embd":8,"n_embd":16}'),
    "config-unknown-type": config(model_type="bert"),
    "config-type-with-newline": config(model_type="a\nb\u001b[31m"),
    "config-width-zero": config(n_embd=0),
    "config-width-negative": config(n_embd=-8),
    "config-width-huge": config(n_embd=2**63),
    "config-width-float": config(n_embd=8.5),
    "config-heads-zero": config(n_head=0),
    "config-heads-uneven": config(n_head=3),
    "config-layers-huge": config(n_layer=2**31),
    "config-vocabulary-huge": config(vocab_size=2**40),
    "config-inner-negative": config(n_inner=-1),
    "config-norm-zero": config(layer_norm_epsilon=0),
    "config-activation-unknown": config(activation_function="mish"),
    "config-activation-number": config(activation_function=1),
    "config-eos-strings": config(eos_token_id=["a", "b"]),
    "config-eos-long": config(eos_token_id=[1] * 2000),
    "config-quantized": config(quantization_config={"quant_method": "awq"}),
    "config-layers-more-than-stored": config(n_layer=2),
    "generation-config-broken": directory(**{"generation_config__json": "{"}),
    "tensor-missing": directory(weights=gpt2(skip=["ln_f.bias"])),
    "tensor-reshaped": directory(weights=gpt2(change=reshape("ln_f.bias", [2, 4]))),
    "tensor-of-integers": directory(weights=gpt2(change=reshape("ln_f.bias", [8], "I32"))),
    "tensor-scalar": directory(weights=gpt2(change=lambda h, d: ({**h, "h.0.attn.c_proj.weight": entry([], *h["ln_f.bias"]["data_offsets"])}, d))),
    "tensor-nan": directory(weights=gpt2(change=nan)),
    "weights-cut": directory(weights=gpt2()[:-1]),
    "index-outside": index({"weight_map": {"x": "../../../../etc/passwd"}}),
    "index-absolute": index({"weight_map": {"x": "/dev/zero"}}),
    "index-itself": index({"weight_map": {"x": "model.safetensors.index.json"}}),
    "index-missing-file": index({"weight_map": {"x": "none.safetensors"}}),
    "index-number": index({"weight_map": {"x": 1}}),
    "index-empty": index({"weight_map": {}}),
    "index-backslash": index({"weight_map": {"x": "..\\\\model.safetensors"}}),
    "index-nul": index({"weight_map": {"x": "model.safetensors\0"}}),
    "index-not-utf8": {"config.json": json.dumps(CONFIG), "model.safetensors.index.json": b'{"weight_map":{"x\xff":"a"}}'},
    "index-of-directory": {**index({"weight_map": {"x": "weights"}}), "weights/nothing": ""},
    "config-threshold-negative": config(quantization_config={"load_in_8bit": True, "llm_int8_threshold": -1}),
    "config-quantization-deep": directory('{"quantization_config":' + '{"a":' * 100 + "1" + "}" * 101),
    "quantized-nothing-else": {"config.json": json.dumps(CONFIG), "model.safetensors": four_bits()},
    "index-deep": index('{"weight_map":' + '{"a":' * 3000),
    "index-name-twice": index('{"weight_map":{"x":"a","x":"b"}}'),
    "tokenizer-broken": directory(**{"tokenizer__json": "{\"model\":"}),
}


def write(path, data):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(data.encode() if isinstance(data, str) else data)


def main():
    for kind in ("safetensors", "directories", "config"):
        shutil.rmtree(os.path.join(HERE, kind), ignore_errors=True)
    for name, data in FILES.items():
        write(os.path.join(HERE, "safetensors", name + ".safetensors"), data)
    for name, data in CONFIGS.items():
        write(os.path.join(HERE, "config", name + ".bin"), data)
    for name, files in DIRECTORIES.items():
        for file, data in files.items():
            write(os.path.join(HERE, "directories", name, file), data)


if __name__ == "__main__":
    main()
