#!/usr/bin/env python3
"""Makes the small files of torch.save under pytorch/ and, with torch, what must be read from them.

    python3 make_pytorch.py          # needs torch and safetensors; takes seconds

pytorch/NAME.pt is a file, pytorch/NAME/ a Hugging Face directory with PyTorch files, pytorch/NAME.expect.safetensors
what a directory's tensors are. pytorch/expect.txt has a line for each tensor of each NAME.pt: NAME, tensor, dtype as
safetensors spells it, shape ("-": rank 0), bytes in hex ("-": none), separated by tabs.

Every file is loaded again with torch, also those that are changed here to look as older versions wrote them. Keys of
storages in the older format are addresses, so those files differ from run to run.
"""

import collections
import io
import json
import os
import pickletools
import shutil
import struct
import zipfile

import torch
from safetensors.torch import save

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pytorch")
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
}
NEW_DTYPES = [d for d in DTYPES if d.itemsize == 1 and d.is_floating_point] + [torch.uint16, torch.uint32, torch.uint64]


def dense_bytes(t):
    t = t.detach().clone(memory_format=torch.contiguous_format)
    return bytes(t.reshape(-1).view(torch.uint8).tolist()) if t.numel() else b""


# ---- what is saved ---------------------------------------------------------------------------------------------------


def types(dtypes):
    d = collections.OrderedDict()
    for i, dtype in enumerate(dtypes):
        numbers = torch.arange(1 + i, 7 + i).reshape(2, 3)
        d[DTYPES[dtype].lower()] = (
            numbers.to(dtype)
            if dtype not in NEW_DTYPES
            else numbers.to(torch.uint8).repeat(1, dtype.itemsize).view(dtype)
        )
    d["scalar"] = torch.tensor(1.5)
    d["empty"] = torch.zeros(0, 3)
    d["empty.late"] = torch.arange(4.0)[4:]
    d["special"] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
    return d


def views():
    m = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    h = torch.arange(24, dtype=torch.float16)
    return {
        "whole": m,
        "transposed": m.t(),
        "columns": m[:, 2:5],
        "rows": m[1:3],
        "row": m[2],
        "column": m[:, 3],
        "every.second": m[::2, 1::2],
        "expanded": torch.tensor([7.0]).expand(80),
        "expanded.rows": m[0].expand(3, 6),
        "expanded.columns": m[:, :1].expand(4, 5),
        "permuted": h.reshape(2, 3, 4).permute(2, 0, 1),
        "permuted.rows": h.reshape(2, 3, 4).permute(1, 0, 2)[1:],
        "one.wide": m.as_strided((1, 4, 1), (99, 1, 5), 2),
        "overlapping": m.as_strided((3, 4), (2, 1), 1),
        "four": torch.arange(120).reshape(2, 3, 4, 5).permute(3, 1, 0, 2),
        "bytes": torch.arange(35, dtype=torch.uint8).reshape(5, 7).t(),
        "double": torch.arange(6.0).double().reshape(2, 3).t(),
        "large": torch.arange(70 * 40, dtype=torch.int16).reshape(70, 40).t(),
    }


def untyped():
    b = torch.arange(12, dtype=torch.uint8)
    return {
        "bytes": b,
        "pairs": b.view(torch.uint16),
        "floats": b[4:].view(torch.float8_e4m3fn),
        "apart": b.view(torch.uint32)[::2],
    }


def tied():
    w = torch.arange(12.0).reshape(3, 4)
    qkv = torch.arange(18, dtype=torch.bfloat16).reshape(9, 2)
    return {"wte.weight": w, "lm_head.weight": w, "q": qkv[:3], "k": qkv[3:6], "v": qkv[6:], "qkv": qkv}


def parameters():
    p = torch.nn.Parameter(torch.arange(4.0))
    p.note = "an attribute: saved with its state"
    frozen = torch.nn.Parameter(torch.arange(3.0).half(), requires_grad=False)
    return {
        "plain": torch.nn.Parameter(torch.ones(2, 2)),
        "state": p,
        "frozen": frozen,
        "transposed": torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).t()),
    }


def module():
    torch.manual_seed(1)
    m = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), torch.nn.BatchNorm1d(2))
    return m.state_dict()  # an OrderedDict with _metadata


def training(protocol=2):
    sd = module()
    d = {
        "epoch": 3,
        "lr": 1e-3,
        "name": "a run",
        "model": sd,
        "best": torch.tensor(0.25),
        "losses": [1.5, None, True],
        "optimizer": {
            "state": {0: {"step": torch.tensor(1.0), "exp_avg": sd["0.weight"] * 2}},
            "param_groups": [{"params": [0], "betas": (0.9, 0.95)}],
        },
        "dtype": torch.float16,
        "device": torch.device("cuda", 0),
        "shape": torch.Size([2, 3]),
        "raw": b"\x00\xff",
        "set": {1, 2},
        "layout": torch.strided,
        "counter": collections.Counter("abca"),
        "big": 2**70,
        "negative": [-1, -(2**31), 2**31, 2**40, -(2**40)],
    }
    if protocol >= 4:
        d["set"] = set()  # others take an opcode that no state dict needs
    return d


def only_under(key):
    return {key: {"w": torch.arange(3.0)}, "step": 1}


# ---- rewriting pickles -----------------------------------------------------------------------------------------------


def rewrite(pickle, change):
    """The first pickle of these bytes, each opcode through change(opcode, argument, bytes); and the rest."""
    ops = list(pickletools.genops(pickle))
    ends = [at for _, _, at in ops[1:]] + [ops[-1][2] + 1]
    out = b"".join(change(op, arg, pickle[at:end]) for (op, arg, at), end in zip(ops, ends))
    return out, pickle[ends[-1] :]


def as_python2(op, arg, raw):
    if op.name == "BINUNICODE" and arg.isascii():
        return b"U" + bytes([len(arg)]) + arg.encode()
    return raw


def rewrite_stream(data, change, which):
    out = b""
    for i in range(5):
        pickle, data = rewrite(data, change if i in which else lambda op, arg, raw: raw)
        out += pickle
    return out + data


def storage_views(data):
    """The storages of the stream become views, as PyTorch 0.1 wrote them: of all elements but the first."""
    last = []

    def change(op, arg, raw):
        if op.name == "NONE" and last and last[-1] == "count":  # ('storage', class, key, location, count, None)
            count = last[-2]
            last.append("view")
            return b"(X" + struct.pack("<I", 3) + b"77%d" % count + b"K\x01K" + bytes([count - 1]) + b"t"
        if op.name == "BININT1":
            last.extend([arg, "count"])
        elif op.name != "BINPUT":
            last.append(op.name)
        return raw

    return rewrite_stream(data, change, [3])


def rezip(data, folder, skip=()):
    """As another program packs it: data begin anywhere, local headers have sizes, entries are in another order."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as src, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as dst:
        for name in sorted(src.namelist(), reverse=True):
            short = name.split("/", 1)[1]
            if short not in skip:
                dst.writestr(f"{folder}/{short}", src.read(name))
    return out.getvalue()


def zip64(data):
    """All sizes and offsets in the fields for large files, the old ones saturated."""
    out, directory, entries = b"", b"", zipfile.ZipFile(io.BytesIO(data))
    for name in entries.namelist():
        body, raw, at = entries.read(name), name.encode(), len(out)
        crc = entries.getinfo(name).CRC
        out += struct.pack("<IHHHHHIIIHH", 0x04034B50, 45, 8, 0, 0, 0, 0, 0, 0, len(raw), 0) + raw + body
        out += struct.pack("<IIQQ", 0x08074B50, crc, len(body), len(body))
        extra = struct.pack("<HHHQQQ", 7, 0, 1, 24, 0, 0)[:4] + struct.pack("<HHQQQ", 1, 24, len(body), len(body), at)
        directory += struct.pack(
            "<IHHHHHHIIIHHHHHII",
            0x02014B50,
            45,
            45,
            8,
            0,
            0,
            0,
            crc,
            2**32 - 1,
            2**32 - 1,
            len(raw),
            len(extra),
            0,
            0,
            0,
            0,
            2**32 - 1,
        )
        directory += raw + extra
    n = len(entries.namelist())
    end64 = len(out) + len(directory)
    tail = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, n, n, len(directory), len(out))
    tail += struct.pack("<IIQI", 0x07064B50, 0, end64, 1)
    tail += struct.pack("<IHHHHIIH", 0x06054B50, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 9) + b"a comment"
    return out + directory + tail


# ---- files -----------------------------------------------------------------------------------------------------------


def saved(obj, protocol=2, legacy=False):
    out = io.BytesIO()
    torch.save(obj, out, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return out.getvalue()


def files():
    """name -> (bytes, the dict of tensors that they hold)"""
    old, new = [d for d in DTYPES if d not in NEW_DTYPES], list(DTYPES)
    out = {
        "types": (saved(types(new)), types(new)),
        "views": (saved(views()), views()),
        "tied": (saved(tied()), tied()),
        "untyped": (saved(untyped()), untyped()),
        "parameters": (saved(parameters()), parameters()),
        "module": (saved(module()), module()),
        "training": (saved(training()), module()),
        "legacy-types": (saved(types(old), legacy=True), types(old)),
        "legacy-views": (saved(views(), legacy=True), views()),
        "legacy-tied": (saved(tied(), legacy=True), tied()),
        "legacy-parameters": (saved(parameters(), legacy=True), parameters()),
        "legacy-training": (saved(training(), legacy=True), module()),
    }
    for protocol in (3, 4, 5):
        out[f"training-p{protocol}"] = saved(training(protocol), protocol), module()
        out[f"legacy-training-p{protocol}"] = saved(training(protocol), protocol, legacy=True), module()
    for key in ("state_dict", "module"):
        out["under-" + key] = saved(only_under(key)), only_under(key)[key]
    out["legacy-python2"] = rewrite_stream(saved(module(), legacy=True), as_python2, [2, 3, 4]), module()
    tail = {"a": torch.arange(5.0), "b": torch.arange(3).byte()}
    out["legacy-storage-views"] = storage_views(saved({"a": tail["a"][:4], "b": tail["b"][:2]}, legacy=True)), {
        "a": tail["a"][1:],
        "b": tail["b"][1:],
    }
    out["legacy-appended"] = saved(tied(), legacy=True) + b"more", tied()
    out["rezipped"] = rezip(saved(tied()), "a folder", ["byteorder", ".format_version", ".storage_alignment"]), tied()
    out["zip64"] = zip64(saved(tied())), tied()
    torch.serialization.set_crc32_options(False)
    out["no-crc"] = saved(tied()), tied()
    torch.serialization.set_crc32_options(True)
    return out


def lines(name, tensors):
    for key, t in tensors.items():
        shape = ",".join(map(str, t.shape)) or "-"
        yield "\t".join([name, key, DTYPES[t.dtype], shape, dense_bytes(t).hex() or "-"])


def check(name, data, tensors):
    """torch itself must read the same."""
    got = torch.load(io.BytesIO(data), weights_only=False, encoding="ascii", map_location="cpu")
    for key in ("state_dict", "model", "module"):
        got = got.get(key, got)
    for key, t in tensors.items():
        assert got[key].dtype == t.dtype and got[key].shape == t.shape and dense_bytes(got[key]) == dense_bytes(t), (
            name,
            key,
        )


# ---- directories: a GPT-2 of 8 wide ----------------------------------------------------------------------------------


def gpt2(dtype=torch.float32, C=8, L=1, V=11, P=8):
    torch.manual_seed(2)
    names = [("wte.weight", [V, C]), ("wpe.weight", [P, C])]
    for i in range(L):
        h = f"h.{i}."
        names += [
            (h + "ln_1.weight", [C]),
            (h + "ln_1.bias", [C]),
            (h + "attn.c_attn.weight", [C, 3 * C]),
            (h + "attn.c_attn.bias", [3 * C]),
            (h + "attn.c_proj.weight", [C, C]),
            (h + "attn.c_proj.bias", [C]),
            (h + "ln_2.weight", [C]),
            (h + "ln_2.bias", [C]),
            (h + "mlp.c_fc.weight", [C, 4 * C]),
            (h + "mlp.c_fc.bias", [4 * C]),
            (h + "mlp.c_proj.weight", [4 * C, C]),
            (h + "mlp.c_proj.bias", [C]),
        ]
    names += [("ln_f.weight", [C]), ("ln_f.bias", [C])]
    return collections.OrderedDict((name, torch.randn(shape).to(dtype)) for name, shape in names)


def mingpt():
    sd = collections.OrderedDict()
    for name, t in gpt2().items():
        conv1d = t.dim() == 2 and name.startswith("h.")
        sd["transformer." + name] = t.t().contiguous() if conv1d else t  # minGPT has nn.Linear
    sd["transformer.h.0.attn.bias"] = torch.tril(torch.ones(8, 8)).view(1, 1, 8, 8)
    sd["lm_head.weight"] = torch.randn(11, 8)
    return sd


CONFIG = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": 11}


def directories():
    """name -> ({file: bytes}, tensors)"""
    sd, half = gpt2(), gpt2(torch.float16)
    apart = collections.OrderedDict((k, t.t().contiguous().t() if t.dim() == 2 else t) for k, t in sd.items())
    tied_head = collections.OrderedDict(sd, **{"lm_head.weight": sd["wte.weight"]})
    first = {k: t for i, (k, t) in enumerate(half.items()) if i % 2}
    second = {k: t for k, t in half.items() if k not in first}
    shards = {"pytorch_model-00001-of-00002.bin": first, "pytorch_model-00002-of-00002.bin": second}
    index = {"metadata": {"total_size": 1}, "weight_map": {k: file for file, part in shards.items() for k in part}}
    return {
        "single": ({"pytorch_model.bin": saved(tied_head)}, sd),
        "legacy": ({"pytorch_model.bin": saved(sd, legacy=True)}, sd),
        "strided": ({"pytorch_model.bin": saved(apart)}, sd),
        "sharded": (
            {
                **{file: saved(part) for file, part in shards.items()},
                "pytorch_model.bin.index.json": json.dumps(index).encode(),
            },
            half,
        ),
        "mingpt": ({"model.pt": saved(mingpt())}, {k: t for k, t in mingpt().items() if not k.endswith(".attn.bias")}),
    }


def write(path, data):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(data)


def main():
    shutil.rmtree(HERE, ignore_errors=True)
    expected = []
    for name, (data, tensors) in files().items():
        check(name, data, tensors)
        write(os.path.join(HERE, name + ".pt"), data)
        expected += lines(name, tensors)
    write(os.path.join(HERE, "expect.txt"), "".join(line + "\n" for line in expected).encode())
    for name, (parts, tensors) in directories().items():
        for file, data in parts.items():
            write(os.path.join(HERE, name, file), data)
        write(os.path.join(HERE, name, "config.json"), json.dumps(CONFIG).encode())
        write(
            os.path.join(HERE, name + ".expect.safetensors"),
            save({k: t.contiguous().clone() for k, t in tensors.items()}),
        )


if __name__ == "__main__":
    main()
