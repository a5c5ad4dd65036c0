#!/usr/bin/env python3
"""Makes the small checkpoints under checkpoints/, quantized by bitsandbytes in each of its formats, and what it and
transformers say is in them.

    python3 make_checkpoints.py [OUT]    # needs torch, transformers, accelerate, bitsandbytes (CPU is enough); a minute

Each checkpoints/NAME/ is what transformers' save_pretrained wrote (minGPT: a state dict of bitsandbytes' modules,
without a config.json). checkpoints/NAME.expect holds, little-endian:
    i32 n_prompt, n_vocab, n_greedy, n_weights
    i32 prompt [n_prompt], i32 greedy [n_greedy]        greedy: what follows the prompt by these logits
    f32 logits [n_prompt, n_vocab]                      4 bits: of the dequantized weights in f32; 8 bits: bitsandbytes'
    n_weights times: name as 64 bytes (zero-padded), u32 CRC-32 of the dequantized weight, f32 [out, in], -0 as +0

The networks are random, with one outlier feature behind each norm. What it does not do: test anything.
"""
import json
import os
import shutil
import struct
import sys
import tempfile
import zlib

import bitsandbytes as bnb
import torch
import transformers
from safetensors.torch import save_file
from transformers import (AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, OPTConfig,
                          OPTForCausalLM)

from make_models import is_conv1d, randomize

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = sys.argv[1] if len(sys.argv) > 1 else os.path.join(HERE, "checkpoints")
N_PROMPT, N_GREEDY, V, P, C = 9, 64, 64, 72, 64

GPT2 = dict(vocab_size=V, n_positions=P, n_embd=C, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0)
OPT = dict(vocab_size=V, max_position_embeddings=P, hidden_size=C, num_hidden_layers=1, num_attention_heads=4,
           ffn_dim=128)
NETWORKS = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_inner=2 * C, **GPT2)),
    "opt": (OPTForCausalLM, OPTConfig(word_embed_proj_dim=C, **OPT)),
    # as OPT-350m
    "opt-post": (OPTForCausalLM, OPTConfig(word_embed_proj_dim=C // 2, do_layer_norm_before=False, **OPT)),
    # no file says how many heads there are
    "mingpt": (GPT2LMHeadModel, GPT2Config(**{**GPT2, "tie_word_embeddings": False, "n_head": 1})),
    "mingpt-trainer": (GPT2LMHeadModel, GPT2Config(**{**GPT2, "tie_word_embeddings": False})),
}


def four_bits(kind, nested=False, storage=torch.uint8, **more):
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested,
                              bnb_4bit_quant_storage=storage, bnb_4bit_compute_dtype=torch.float32, **more)


def eight_bits(**more):
    return BitsAndBytesConfig(load_in_8bit=True, **more)


F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
# name: network, how transformers quantizes it, type of the rest, largest shard
TRANSFORMERS = {
    "gpt2-nf4": ("gpt2", four_bits("nf4"), F16, None),
    "gpt2-fp4": ("gpt2", four_bits("fp4"), F32, None),
    "gpt2-nf4-nested": ("gpt2", four_bits("nf4", True), BF16, None),
    "gpt2-fp4-nested-as-f16": ("gpt2", four_bits("fp4", True, F16), F16, None),
    "gpt2-nf4-as-bf16-sharded": ("gpt2", four_bits("nf4", False, BF16), BF16, "20KB"),
    "gpt2-nf4-as-f32": ("gpt2", four_bits("nf4", False, F32), F16, None),
    "gpt2-nf4-skip": ("gpt2", four_bits("nf4", llm_int8_skip_modules=["attn.c_proj", "lm_head"]), F16, None),
    "gpt2-int8": ("gpt2", eight_bits(), F16, None),
    "gpt2-int8-sharded": ("gpt2", eight_bits(llm_int8_threshold=3.0), F16, "30KB"),
    "opt-nf4-nested": ("opt", four_bits("nf4", True), F16, None),
    "opt-int8": ("opt", eight_bits(), F16, None),
    "opt-post-fp4": ("opt-post", four_bits("fp4"), F16, None),
    "opt-post-int8": ("opt-post", eight_bits(), F32, None),
}
# name: blocksize, 4-bit type (None: 8 bits), nested, storage, how it is saved
MINGPT = {
    "mingpt-nf4-32": (32, "nf4", False, torch.uint8, "safetensors"),
    "mingpt-nf4-nested-128": (128, "nf4", True, torch.uint8, "zip"),
    "mingpt-fp4-4096-as-f16": (4096, "fp4", False, F16, "legacy"),
    "mingpt-trainer-int8": (None, None, False, None, "zip"),
    "mingpt-int8-string": (None, None, False, None, "zip"),  # weight_format as bitsandbytes before 0.43.1 wrote it
}


@torch.no_grad()
def logits_of(model, ids):
    return model(torch.tensor([ids])).logits[0].float()


def dequantized(p, scb=None):
    """The weight's values in f32, [out, in]."""
    if isinstance(p, bnb.nn.Params4bit):
        state, shape = p.quant_state, p.quant_state.shape
        dtype, state.dtype = state.dtype, F32
        state.shape = torch.Size([1, shape.numel()])  # the CPU kernel wants K % B == 0
        w = bnb.functional.dequantize_4bit(p.data, state).reshape(shape)
        state.dtype, state.shape = dtype, shape
        return w
    return bnb.functional.int8_vectorwise_dequant(p.data, scb)


def quantized_weights(model):
    """name -> f32 [out, in], of the modules that are quantized."""
    return {name + ".weight": dequantized(m.weight, getattr(m.weight, "SCB", None)) for name, m in model.named_modules()
            if isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))}


def plain_model(cls, config, state, weights):
    """The network in f32 with these weights in place of the quantized ones."""
    model = cls(config).eval().float()
    names = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in names.items():
            w = weights.get(name, state.get(name))
            p.copy_(w.t() if name in weights and is_conv1d(name) else w)
    return model


def write_expect(name, model, weights):
    g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    prompt = torch.randint(3, V - 3, (N_PROMPT,), generator=g).tolist()
    logits, tokens = logits_of(model, prompt), list(prompt)
    for _ in range(N_GREEDY):
        tokens.append(int(logits_of(model, tokens)[-1].argmax()))
    with open(os.path.join(OUT, name + ".expect"), "wb") as f:
        f.write(struct.pack("<4i", N_PROMPT, V, N_GREEDY, len(weights)))
        f.write(struct.pack("<%di" % len(tokens), *tokens) + logits.contiguous().numpy().astype("<f4").tobytes())
        for key, w in sorted(weights.items()):
            values = (w.float().contiguous() + 0.0).numpy().astype("<f4").tobytes()
            f.write(key.encode().ljust(64, b"\0") + struct.pack("<I", zlib.crc32(values)))
    print(name, len(weights), "quantized weights,", len(set(tokens[N_PROMPT:])), "distinct greedy tokens")


def make_network(name, path):
    cls, config = NETWORKS[name]
    config._attn_implementation = "eager"
    model = cls(config).eval().float()
    randomize(model, zlib.crc32(name.encode()))
    model.tie_weights()
    model.save_pretrained(path)
    return model


def by_transformers(name, sources):
    network, how, dtype, shard = TRANSFORMERS[name]
    cls, config = NETWORKS[network]
    path = os.path.join(OUT, name)
    m = cls.from_pretrained(sources[network], quantization_config=how, dtype=dtype, device_map="cpu")
    m.save_pretrained(path, **({"max_shard_size": shard} if shard else {}))
    m = AutoModelForCausalLM.from_pretrained(path, dtype=F32, attn_implementation="eager", device_map="cpu").eval()
    weights = quantized_weights(m)
    for p in m.parameters():  # what 8-bit checkpoints keep in f16 stays f16 when it is loaded
        p.data = p.data.float() if p.dtype in (F16, BF16) and not isinstance(p, bnb.nn.Params4bit) else p.data
    model = m if how.load_in_8bit else plain_model(cls, config, m.state_dict(), weights)
    write_expect(name, model, weights)


def save(state, path, how):
    os.makedirs(path)
    if how == "safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, os.path.join(path, "model.safetensors"))
    else:
        torch.save(state, os.path.join(path, "model.pt"), _use_new_zipfile_serialization=how == "zip")


def by_hand(name, networks):
    """Under minGPT's names: Linear layout, mask buffers, an unquantized head of its own, as accelerate does."""
    blocksize, kind, nested, storage, how = MINGPT[name]
    state, weights = {}, {}
    trainer = "trainer" in name
    network = networks["mingpt-trainer" if trainer else "mingpt"]
    model = GPT2LMHeadModel(network.config).eval().float()
    model.load_state_dict(network.state_dict())
    for key, m in model.named_modules():
        if not is_conv1d(key + ".weight"):
            continue
        w = m.weight.data.t().contiguous()
        if kind:
            q = bnb.nn.Linear4bit(w.shape[1], w.shape[0], compress_statistics=nested, quant_type=kind,
                                  quant_storage=storage)
            q.weight = bnb.nn.Params4bit(w, requires_grad=False, blocksize=blocksize, compress_statistics=nested,
                                         quant_type=kind, quant_storage=storage, module=q)
        else:
            q = bnb.nn.Linear8bitLt(w.shape[1], w.shape[0], has_fp16_weights=False, threshold=6.0)
            q.weight = bnb.nn.Int8Params(w, requires_grad=False, has_fp16_weights=False)
        q.bias.data = m.bias.data
        q = q.to("cpu").eval()
        if kind is None and q.weight.dtype != torch.int8:
            raise SystemExit("bitsandbytes did not quantize")
        state.update({key + "." + k: v.clone() for k, v in q.state_dict().items()})
        weights[key + ".weight"] = dequantized(q.weight, getattr(q.weight, "SCB", None))
        if kind is None:
            model.set_submodule(key, q)
    for key, p in network.state_dict().items():
        if key not in state and not is_conv1d(key):
            state[key] = p.clone()
    if trainer:
        state["transformer.h.0.attn.bias"] = torch.tril(torch.ones(P, P)).view(1, 1, P, P)
    if name.endswith("string"):
        state.update({k: "row" for k in state if k.endswith("weight_format")})
    save(state, os.path.join(OUT, name), how)
    if trainer:  # what minGPT's trainer writes beside its model.pt
        with open(os.path.join(OUT, name, "config.json"), "w") as f:
            json.dump({"system": {"seed": 3407, "work_dir": "./out"}, "data": {"block_size": P},
                       "model": {"model_type": None, "n_layer": 1, "n_head": 4, "n_embd": C, "vocab_size": V,
                                 "block_size": P},
                       "trainer": {"device": "auto", "max_iters": 100}}, f, indent=4)
    if kind:
        model = plain_model(GPT2LMHeadModel, model.config, network.state_dict(), weights)
    write_expect(name, model, weights)


def main():
    print("torch", torch.__version__, "transformers", transformers.__version__, "bitsandbytes", bnb.__version__)
    shutil.rmtree(OUT, ignore_errors=True)
    os.makedirs(OUT)
    with tempfile.TemporaryDirectory() as tmp:
        sources = {name: os.path.join(tmp, name) for name in NETWORKS}
        networks = {name: make_network(name, path) for name, path in sources.items()}
        for name in TRANSFORMERS:
            by_transformers(name, sources)
        for name in MINGPT:
            by_hand(name, networks)


if __name__ == "__main__":
    main()
