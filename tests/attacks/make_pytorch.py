#!/usr/bin/env python3
"""Makes the small hostile PyTorch files under pytorch/ that test_pytorch.cpp replays: each is refused with a sentence.

    python3 make_pytorch.py          # needs nothing but Python

NAME.pt is a file. NAME.pkl is a pickle alone: the test (see fuzz/fuzz_pytorch.cpp) makes it the data.pkl of a zip with
the storages "0" to "3" of 64 bytes. Names that begin with "good" must be read. Nothing is ever run: the reader runs
nothing, and this script only writes.
"""

import os
import shutil
import struct

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pytorch")
P = b"\x80\x02"


# ---- pickles ---------------------------------------------------------------------------------------------------------


def s(text):
    text = text.encode() if isinstance(text, str) else text
    return b"X" + struct.pack("<I", len(text)) + text


def n(value):
    """LONG1: of any length."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def sym(module, name):
    return f"c{module}\n{name}\n".encode()


def tup(*items):
    return b"(" + b"".join(items) + b"t"


ODICT = sym("collections", "OrderedDict") + b")R"


def storage(key="0", cls="FloatStorage", count=16, module="torch", tag="storage", location="cpu", more=()):
    return tup(s(tag), sym(module, cls), s(key), s(location), n(count), *more) + b"Q"


def tensor(size=(4,), stride=(1,), offset=0, st=None, fn="_rebuild_tensor_v2", tail=None):
    tail = [b"\x89", ODICT] if tail is None else tail
    return (
        sym("torch._utils", fn)
        + tup(storage() if st is None else st, n(offset), tup(*map(n, size)), tup(*map(n, stride)), *tail)
        + b"R"
    )


def state(**items):
    return P + b"}(" + b"".join(s(k) + v for k, v in items.items()) + b"u."


def one(t):
    return state(x=t)


def call(module, name, *args):
    return sym(module, name) + tup(*args) + b"R"


# ---- zips ------------------------------------------------------------------------------------------------------------


def zipped(entries, count=None, cd_offset=None, cd_bytes=None, comment=b"", tail=b""):
    """entries: (name, data, {field of the headers: value})"""
    out, cd = b"", b""
    for name, data, change in entries:
        f = dict(
            flags=0,
            method=0,
            csize=len(data),
            usize=len(data),
            at=len(out),
            name=name.encode(),
            local_name=name.encode(),
            extra=b"",
            local_extra=b"",
            local_flags=0,
            local_method=0,
        )
        f.update(change)
        out += struct.pack(
            "<IHHHHHIIIHH",
            0x04034B50,
            0,
            f["local_flags"],
            f["local_method"],
            0,
            0,
            0,
            0,
            0,
            len(f["local_name"]),
            len(f["local_extra"]),
        )
        out += f["local_name"] + f["local_extra"] + data
        cd += (
            struct.pack(
                "<IHHHHHHIIIHHHHHII",
                0x02014B50,
                0,
                0,
                f["flags"],
                f["method"],
                0,
                0,
                0,
                f["csize"],
                f["usize"],
                len(f["name"]),
                len(f["extra"]),
                0,
                0,
                0,
                0,
                f["at"],
            )
            + f["name"]
            + f["extra"]
        )
    n_entries = len(entries) if count is None else count
    end = struct.pack(
        "<IHHHHIIH",
        0x06054B50,
        0,
        0,
        n_entries & 0xFFFF,
        n_entries & 0xFFFF,
        len(cd) if cd_bytes is None else cd_bytes,
        len(out) if cd_offset is None else cd_offset,
        len(comment),
    )
    return out + cd + tail + end + comment


GOOD = one(tensor())
BODY = ("a/data.pkl", GOOD, {})
DATA = ("a/data/0", bytes(64), {})


def change(**fields):
    return zipped([BODY, (*DATA[:2], fields)])


def zip64_tail(at, count=2, size=0, offset=0, locator=None, disks=1, signature=0x06064B50):
    return struct.pack("<IQHHIIQQQQ", signature, 44, 45, 45, 0, 0, count, count, size, offset) + struct.pack(
        "<IIQI", 0x07064B50, 0, at if locator is None else locator, disks
    )


def zip64(**fields):
    plain = zipped([BODY, DATA])
    end = plain.rindex(b"PK\5\6")
    cd = plain.index(b"PK\1\2")
    args = dict(at=end, size=end - cd, offset=cd)
    args.update(fields)
    tail = zip64_tail(**args)
    return plain[:end] + tail + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)


EXTRA = struct.pack("<HHQQQ", 1, 24, 2**63, 2**63, 2**64 - 30)
SATURATED = dict(csize=2**32 - 1, usize=2**32 - 1, at=2**32 - 1)

ZIPS = {
    "good-plain": zipped([BODY, DATA]),
    "good-zip64": zip64(),
    "good-comment": zipped([BODY, DATA], comment=b"PK\5\6" + bytes(30)),
    "empty-zip-with-magic": b"PK\3\4" + zipped([]),
    "only-magic": b"PK\3\4",
    "no-entries": b"PK\3\4" + bytes(30) + zipped([])[-22:],
    "zip-compressed": change(method=8),
    "zip-compressed-locally": change(local_method=8),
    "zip-bzip2-pickle": zipped([(*BODY[:2], dict(method=12)), DATA]),
    "zip-bomb-size": change(usize=2**32 - 2),
    "zip-bomb-both-sizes": change(usize=2**32 - 2, csize=2**32 - 2),
    "zip-bomb-zip64-size": zipped([BODY, (*DATA[:2], dict(SATURATED, extra=EXTRA))]),
    "zip-bomb-shared-data": zipped(
        [BODY, DATA, ("a/data/1", b"", dict(at=len(zipped([BODY]).split(b"PK\1\2")[0]), local_name=b""))]
    ),
    "zip-overlap": zipped([BODY, (*DATA[:2], dict(at=0, name=b"a/data.pkl2"))]),
    "zip-overlap-by-length": zipped([(*BODY[:2], dict(usize=len(GOOD) + 8, csize=len(GOOD) + 8)), DATA]),
    "zip-same-entry-twice": zipped([BODY, (*DATA[:2], dict(at=0, name=b"a/data.pkl", local_name=b"a/data.pkl"))]),
    "zip-name-twice": zipped([BODY, DATA, DATA]),
    "zip-encrypted": change(flags=1),
    "zip-encrypted-locally": change(local_flags=1),
    "zip-strong-encryption": change(flags=64),
    "zip-hidden-headers": change(flags=1 << 13),
    "zip-patch-data": change(flags=32),
    "zip-other-local-name": change(local_name=b"a/data/1"),
    "zip-offset-outside": change(at=2**32 - 2),
    "zip-offset-in-directory": change(at=300),
    "zip-extra-cut": change(extra=struct.pack("<HH", 1, 100)),
    "zip-local-extra-long": change(local_extra=bytes(60)).replace(b"<\0a/data/0", b"\xff\xffa/data/0"),
    "zip-count-large": zipped([BODY, DATA], count=60000),
    "zip-count-small": zipped([BODY, DATA], count=1),
    "zip-directory-outside": zipped([BODY, DATA], cd_offset=2**32 - 2),
    "zip-directory-long": zipped([BODY, DATA], cd_bytes=2**32 - 2),
    "zip-two-folders": zipped([BODY, DATA, ("b/data.pkl", GOOD, {})]),
    "zip-no-folder": zipped([("data.pkl", GOOD, {}), ("data/0", bytes(64), {})]),
    "zip-leading-slash": zipped([("/etc/passwd", b"", {}), BODY, DATA]),
    "zip-no-pickle": zipped([DATA]),
    "zip-empty-pickle": zipped([("a/data.pkl", b"", {}), DATA]),
    "zip-empty-name": zipped([BODY, ("", b"", {})]),
    "zip-long-name": zipped([BODY, ("a/" + "n" * 2000, b"", {})]),
    "zip-escape-codes": zipped([BODY, ("\x1b[2J\n", b"", {})]),
    "zip-torchscript": zipped([BODY, DATA, ("a/constants.pkl", P + b").", {})]),
    "zip-big-endian": zipped([BODY, DATA, ("a/byteorder", b"big", {})]),
    "zip-strange-endian": zipped([BODY, DATA, ("a/byteorder", b"\x1b" * 100, {})]),
    "zip-storage-missing": zipped([BODY]),
    "zip-storage-short": zipped([BODY, ("a/data/0", bytes(63), {})]),
    "zip-storage-is-pickle": zipped([("a/data.pkl", one(tensor(st=storage("../data.pkl"))), {}), DATA]),
    "zip-pickle-followed": zipped([("a/data.pkl", GOOD + GOOD, {}), DATA]),
    "zip-of-other": zipped([("word/document.xml", b"<xml/>", {})]),
    "zip64-record-outside": zip64(locator=2**64 - 1),
    "zip64-record-wraps": zip64(locator=2**64 - 57),
    "zip64-record-elsewhere": zip64(locator=0),
    "zip64-count": zip64(count=2**64 - 1),
    "zip64-size": zip64(size=2**64 - 1),
    "zip64-offset": zip64(offset=2**64 - 8),
    "zip64-disagrees": zipped([BODY, DATA], tail=zip64_tail(len(zipped([BODY, DATA])) - 22, count=1)),
    "zip64-no-record": zipped([BODY, DATA], cd_offset=2**32 - 1),
}

# ---- the stream ------------------------------------------------------------------------------------------------------

MAGIC = P + n(0x1950A86A20F9469CFC6C) + b"."
VERSION = P + b"M\xe9\x03."
SYSTEM = P + b"}(" + s("protocol_version") + b"M\xe9\x03" + s("little_endian") + b"\x88" + s("type_sizes") + b"}u."


def stream(obj=None, keys=("0",), counts=(16,), data=bytes(64), version=VERSION, system=SYSTEM, view=b"N"):
    obj = one(tensor(st=storage(more=[view]))) if obj is None else obj
    out = MAGIC + version + system + obj + P + b"](" + b"".join(map(s, keys)) + b"e."
    for count in counts:
        out += struct.pack("<q", count) + data
    return out


def view(key, offset, size):
    return tup(s(key), n(offset), n(size))


STREAMS = {
    "good-stream": stream(),
    "good-stream-view": stream(view=view("7", 8, 8)),
    "stream-only-magic": MAGIC,
    "stream-version": stream(version=P + b"M\xe8\x03."),
    "stream-version-list": stream(version=P + b"]."),
    "stream-system-list": stream(system=P + b"]."),
    "stream-big-endian": stream(system=SYSTEM.replace(b"\x88", b"\x89")),
    "stream-no-endian": stream(system=P + b"}."),
    "stream-module": stream(obj=P + tup(s("module"), sym("torch", "Size"), s("m.py"), s("import os")) + b"Q."),
    "stream-storage-early": stream(system=P + storage() + b"."),
    "stream-storage-in-keys": MAGIC + VERSION + SYSTEM + GOOD + P + b"]" + storage() + b"a.",
    "stream-count-other": stream(counts=(15,)),
    "stream-count-negative": stream(counts=(-1,)),
    "stream-count-huge": stream(obj=one(tensor(st=storage(count=2**61))), counts=(2**61,)),
    "stream-count-overflow": stream(obj=one(tensor(st=storage(count=2**62))), counts=(2**62,)),
    "stream-keys-missing": stream(keys=()),
    "stream-keys-twice": stream(keys=("0", "0"), counts=(16, 16)),
    "stream-keys-unknown": stream(keys=("0", "1"), counts=(16, 16)),
    "stream-keys-numbers": MAGIC + VERSION + SYSTEM + GOOD + P + b"]K\0a.",
    "stream-keys-dict": MAGIC + VERSION + SYSTEM + GOOD + P + b"}.",
    "stream-data-short": stream(data=bytes(63)),
    "stream-view-outside": stream(view=view("7", 8, 9)),
    "stream-view-negative": stream(view=view("7", -1, 4)),
    "stream-view-wraps": stream(view=view("7", 2**63 - 1, 2**63 - 1)),
    "stream-view-smaller-than-tensor": stream(view=view("7", 0, 3)),
    "stream-view-list": stream(view=b"]"),
    "stream-cut-in-system": MAGIC + VERSION + SYSTEM[:-5],
    "tar": b"sys_info" + bytes(249) + b"ustar" + bytes(300),
    "pytorch1": b"PYTORCH1" + bytes(100),
    "bare-pickle": b"\x80\x04\x95\x20\0\0\0\0\0\0\0\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R.",
}

# ---- pickles ---------------------------------------------------------------------------------------------------------

CALLS = [
    ("os", "system"),
    ("posix", "system"),
    ("nt", "system"),
    ("subprocess", "Popen"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "getattr"),
    ("builtins", "__import__"),
    ("__builtin__", "eval"),
    ("__builtin__", "apply"),
    ("importlib", "import_module"),
    ("torch", "load"),
    ("torch", "jit.load"),
    ("torch.hub", "load"),
    ("torch.storage", "_load_from_bytes"),
    ("torch._utils", "_rebuild_qtensor"),
    ("torch._utils", "_rebuild_sparse_tensor"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch.nn.modules.linear", "Linear"),
    ("torch", "ComplexFloatStorage"),
    ("torch", "QInt8Storage"),
    ("torch", "FloatTensor"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("operator", "attrgetter"),
    ("collections", "defaultdict"),
    ("collections", "OrderedDict.__class__"),
    ("argparse", "Namespace"),
    ("codecs", "encode"),
    ("_codecs", "decode"),
    ("builtins", "bytearray"),
    ("runpy", "run_path"),
    ("webbrowser", "open"),
    ("pickle", "loads"),
    ("bitsandbytes.nn.modules", "Params4bit"),
    ("", ""),
    ("os\x1b[2J", "a b"),
]

UNLISTED = {
    "POP": b"0",
    "POP_MARK": b"1",
    "DUP": b"2",
    "FLOAT": b"F1.5\n",
    "INT": b"I1\n",
    "LONG": b"L1L\n",
    "PERSID": b"Pa\n",
    "STRING": b"S'a'\n",
    "BINSTRING": b"T\1\0\0\0a",
    "UNICODE": b"Va\n",
    "DICT": b"(d",
    "LIST": b"(l",
    "GET": b"g0\n",
    "PUT": b"p0\n",
    "INST": b"(ios\nsystem\n",
    "OBJ": b"(cos\nsystem\no",
    "EXT1": b"\x82\1",
    "EXT2": b"\x83\1\0",
    "EXT4": b"\x84\1\0\0\0",
    "LONG4": b"\x8b\1\0\0\0\1",
    "BINUNICODE8": b"\x8d\1\0\0\0\0\0\0\0a",
    "BINBYTES8": b"\x8e\1\0\0\0\0\0\0\0a",
    "ADDITEMS": b"\x8f(K\1\x90",
    "FROZENSET": b"(\x91",
    "NEWOBJ_EX": b"\x92",
    "BYTEARRAY8": b"\x96\1\0\0\0\0\0\0\0a",
    "NEXT_BUFFER": b"\x97",
    "READONLY_BUFFER": b"\x98",
    "none-0xff": b"\xff",
    "none-0x00": b"\0",
}

HUGE = 2**62
PICKLES = {
    "good-one": GOOD,
    "good-set-state": P + b"}" + s("x") + tensor() + tup(storage("1"), n(2), tup(n(2), n(2)), tup(n(1), n(2))) + b"bs.",
    "good-rank-8": one(tensor((1,) * 7 + (4,), (9,) * 7 + (1,))),
    "good-v3": one(
        tensor(
            st=storage(cls="UntypedStorage", module="torch.storage", count=64),
            fn="_rebuild_tensor_v3",
            tail=[b"\x89", ODICT, sym("torch", "float16")],
        )
    ),
    "good-everything": P
    + b"}("
    + b"".join(
        s(k) + v
        for k, v in {
            "a": tensor(),
            "n": b"N",
            "t": b"\x88",
            "f": b"\x89",
            "i": b"J\xff\xff\xff\xff",
            "k": b"K\1",
            "m": b"M\1\1",
            "l": n(-(2**70)),
            "g": b"G" + bytes(8),
            "u": b"U\1a",
            "b": b"B\1\0\0\0a",
            "c": b"C\1a",
            "sh": b"\x8c\1a",
            "e": b")",
            "t1": b"N\x85",
            "t2": b"NN\x86",
            "t3": b"NNN\x87",
            "li": b"](NNe",
            "ap": b"]Na",
            "d": b"}NNs",
            "se": b"\x8f",
            "fr": b"\x95" + struct.pack("<Q", 1) + b"N",
            "me": b"(N\x94h\0t",
            "lp": b"(Nr\0\1\0\0j\0\1\0\0t",
            "bp": b"(Nq\5h\5t",
            "sg": b"\x8c\5torch\x8c\4Size\x93)\x85R",
            "od": ODICT + b"}b",
            "op": sym("collections", "OrderedDict") + b"](NN\x86](NNee\x85R",
            "no": sym("torch.nn.parameter", "Parameter") + tensor() + b"\x88\x86\x81",
            "pa": call("torch._utils", "_rebuild_parameter", tensor(), b"\x88", ODICT),
            "ps": call("torch._utils", "_rebuild_parameter_with_state", tensor(), b"\x88", ODICT, b"}"),
            "en": call("_codecs", "encode", s("a"), s("latin1")),
            "co": call("collections", "Counter", b"}"),
            "st": call("__builtin__", "set", b"]"),
            "ly": call("torch.serialization", "_get_layout", s("torch.strided")),
            "de": call("torch", "device", s("cuda"), b"K\0"),
            "ov": tensor(fn="_rebuild_tensor", tail=[]),
        }.items()
    )
    + b"u.",
    "empty": P + b".",
    "no-stop": GOOD[:-1],
    "two-values": P + b"}}.",
    "open-mark": P + b"}(.",
    "protocol-1": b"\x80\1" + GOOD[2:],
    "protocol-6": b"\x80\6" + GOOD[2:],
    "root-list": P + b"].",
    "root-tensor": P + tensor() + b".",
    "root-none": P + b"N.",
    "root-empty-dict": P + b"}.",
    "root-dict-twice-nested": state(model=b"}" + s("model") + b"}" + s("x") + tensor() + b"ss"),
    "name-number": P + b"}K\1" + tensor() + b"s.",
    "name-tuple": P + b"})" + tensor() + b"s.",
    "name-twice": P + b"}" + (s("x") + tensor() + b"s") * 2 + b".",
    "name-nul": P + b"}" + s("a\0b") + tensor() + b"s.",
    "name-not-utf8": P + b"}" + s(b"a\xff") + tensor() + b"s.",
    "name-surrogate": P + b"}" + s(b"\xed\xa0\x80") + tensor() + b"s.",
    "name-long": P + b"}" + s("n" * 5000) + tensor() + b"s.",
    "name-escape-codes": P + b"}" + s("\x1b[2J\n") + tensor((99,)) + b"s.",
    "stack-empty-pop": P + b"a.",
    "stack-setitem-short": P + b"NNs.",
    "stack-setitem-on-none": P + b"NNNs.",
    "stack-below-mark": P + b"]}(sNN.",
    "stack-tuple3-below-mark": P + b"NN(N\x87.",
    "stack-append-below-mark": P + b"](Na.",
    "stack-setitems-odd": P + b"}(NNNu.",
    "stack-setitems-on-list": P + b"](NNu.",
    "stack-appends-on-dict": P + b"}(NNe.",
    "stack-appends-at-bottom": P + b"(NNe.",
    "stack-no-mark": P + b"NNt.",
    "stack-reduce-empty": P + b"R.",
    "stack-binput-empty": P + b"q\0.",
    "stack-memoize-empty": P + b"\x94.",
    "stack-binput-on-mark": P + b"N(q\0.",
    "call-none": P + b"N)R.",
    "call-string": P + s("os.system") + b")R.",
    "call-tensor": P + tensor() + b")R.",
    "call-list-argument": P + sym("collections", "OrderedDict") + b"]R.",
    "call-storage-class": P + sym("torch", "FloatStorage") + b")R.",
    "call-dtype": P + sym("torch", "float16") + b")R.",
    "newobj-ordereddict": P + sym("collections", "OrderedDict") + b")\x81.",
    "newobj-set": P + sym("builtins", "set") + b")\x81.",
    "newobj-storage": P + sym("torch", "FloatStorage") + b")\x81.",
    "newobj-parameter-empty": P + sym("torch.nn.parameter", "Parameter") + b")\x81.",
    "newobj-parameter-number": P + sym("torch.nn.parameter", "Parameter") + b"K\1\x85\x81.",
    "parameter-of-string": P + call("torch._utils", "_rebuild_parameter", s("x"), b"\x88", ODICT) + b".",
    "ordereddict-of-dict": P + sym("collections", "OrderedDict") + b"}\x85R.",
    "ordereddict-triples": P + sym("collections", "OrderedDict") + b"]NNN\x87a\x85R.",
    "ordereddict-numbers": P + sym("collections", "OrderedDict") + b"]K\1a\x85R.",
    "ordereddict-two-arguments": P + sym("collections", "OrderedDict") + b"]]\x86R.",
    "build-on-list": P + b"]}b.",
    "build-on-none": P + b"N}b.",
    "build-on-symbol": P + sym("collections", "OrderedDict") + b"}b.",
    "build-on-storage": P + storage() + b"}b.",
    "build-tensor-dict": P + tensor() + b"}b.",
    "build-tensor-short": P + tensor() + tup(storage(), n(0)) + b"b.",
    "build-tensor-outside": P + tensor() + tup(storage(), n(16), tup(n(1)), tup(n(1))) + b"b.",
    "global-not-closed": P + b"cos\nsystem",
    "global-one-line": P + b"cos\n",
    "stack-global-numbers": P + b"K\1K\2\x93.",
    "stack-global-os": b"\x80\4\x8c\2os\x8c\6system\x93\x8c\2id\x85R.",
    "persid-string": P + s("0") + b"Q.",
    "persid-empty-tuple": P + b")Q.",
    "persid-module": P + tup(s("module"), sym("torch", "Size"), s("m.py"), s("import os")) + b"Q.",
    "persid-other-tag": P + storage(tag="file") + b".",
    "persid-class-string": P + tup(s("storage"), s("FloatStorage"), s("0"), s("cpu"), n(16)) + b"Q.",
    "persid-class-other": P + tup(s("storage"), sym("torch", "Size"), s("0"), s("cpu"), n(16)) + b"Q.",
    "persid-class-dtype": P + tup(s("storage"), sym("torch", "float32"), s("0"), s("cpu"), n(16)) + b"Q.",
    "persid-six-fields": P + storage(more=[b"N"]) + b".",
    "persid-key-path": P + storage("../../../etc/passwd") + b".",
    "persid-key-number": P + tup(s("storage"), sym("torch", "FloatStorage"), n(0), s("cpu"), n(16)) + b"Q.",
    "persid-key-empty": P + storage("") + b".",
    "persid-key-long": P + storage("0" * 5000) + b".",
    "persid-key-sign": P + storage("-0") + b".",
    "persid-key-missing": P + storage("9") + b".",
    "persid-count-negative": P + storage(count=-1) + b".",
    "persid-count-huge": P + storage(count=2**63 - 1) + b".",
    "persid-count-wraps": P + storage(count=2**62) + b".",
    "persid-count-bignum": P + storage(count=2**64) + b".",
    "persid-count-17": P + storage(count=17) + b".",
    "persid-two-types": P
    + b"}("
    + s("a")
    + tensor()
    + s("b")
    + tensor(st=storage(cls="ByteStorage", count=64))
    + b"u.",
    "persid-two-counts": P + b"}(" + s("a") + tensor() + s("b") + tensor(st=storage(count=8)) + b"u.",
    "tensor-outside": one(tensor((17,))),
    "tensor-offset-outside": one(tensor((1,), offset=16)),
    "tensor-offset-negative": one(tensor(offset=-1)),
    "tensor-offset-wraps": one(tensor(offset=2**63 - 1)),
    "tensor-offset-bignum": one(tensor(offset=2**64 - 1)),
    "tensor-size-negative": one(tensor((-1,))),
    "tensor-size-two-negatives": one(tensor((-2, -2), (1, 1))),
    "tensor-size-bignum": one(tensor((2**64 + 4,))),
    "tensor-size-string": one(
        sym("torch._utils", "_rebuild_tensor_v2") + tup(storage(), n(0), tup(s("4")), tup(n(1)), b"\x89", ODICT) + b"R"
    ),
    "tensor-size-overflow": one(tensor((HUGE, HUGE), (0, 0))),
    "tensor-size-overflow-to-small": one(tensor((2**32, 2**32), (0, 0))),
    "tensor-size-overflow-before-zero": one(tensor((HUGE, HUGE, 0), (0, 0, 0))),
    "tensor-size-overflow-in-bytes": one(tensor((HUGE,), (0,))),
    "tensor-stride-negative": one(tensor((2,), (-1,), 4)),
    "tensor-stride-huge": one(tensor((2,), (2**63 - 1,))),
    "tensor-stride-overflow": one(tensor((5, 5), (HUGE, HUGE))),
    "tensor-stride-wraps-to-small": one(tensor((2**32 + 1, 2), (2**32, 0))),
    "tensor-stride-outside": one(tensor((4, 4), (5, 1))),
    "tensor-strides-fewer": one(tensor((2, 2), (1,))),
    "tensor-strides-more": one(tensor((2,), (1, 1))),
    "tensor-rank-9": one(tensor((1,) * 9, (1,) * 9)),
    "tensor-rank-500": one(tensor((1,) * 500, (1,) * 500)),
    "tensor-expanded-terabytes": one(tensor((2**40,), (0,))),
    "tensor-expanded-both": one(tensor((2**20, 2**21), (0, 0))),
    "tensor-expanded-32-mib": one(tensor((2**23,), (0,))),
    "tensor-expanded-unwound": one(tensor((2**28, 16), (0, 1))),
    "tensor-no-storage": one(
        sym("torch._utils", "_rebuild_tensor_v2") + tup(b"N", n(0), tup(n(1)), tup(n(1)), b"\x89", ODICT) + b"R"
    ),
    "tensor-arguments-few": one(sym("torch._utils", "_rebuild_tensor_v2") + tup(storage(), n(0)) + b"R"),
    "tensor-arguments-many": one(tensor(tail=[b"\x89", ODICT, b"N", b"N"])),
    "tensor-grad-number": one(tensor(tail=[b"K\0", ODICT])),
    "tensor-metadata-negated": one(tensor(tail=[b"\x89", ODICT, b"}" + s("neg") + b"\x88s"])),
    "tensor-v3-no-dtype": one(tensor(fn="_rebuild_tensor_v3", tail=[b"\x89", ODICT, b"N"])),
    "tensor-v3-typed-storage": one(tensor(fn="_rebuild_tensor_v3", tail=[b"\x89", ODICT, sym("torch", "float64")])),
    "tensor-v3-class-as-dtype": one(
        tensor(
            st=storage(cls="UntypedStorage", count=64),
            fn="_rebuild_tensor_v3",
            tail=[b"\x89", ODICT, sym("torch", "FloatStorage")],
        )
    ),
    "tensor-v3-outside": one(
        tensor(
            (17,),
            st=storage(cls="UntypedStorage", count=64),
            fn="_rebuild_tensor_v3",
            tail=[b"\x89", ODICT, sym("torch", "float32")],
        )
    ),
    "tensor-hidden-in-optimizer": state(x=tensor(), optimizer=b"}" + s("y") + tensor((99,)) + b"s"),
    "deep-marks": P + b"(" * 5000 + b".",
    "deep-tuples": P + b")" + b"\x85" * 5000 + b".",
    "deep-lists": P + b"](" * 5000 + b"e" * 5000 + b".",
    "deep-itself": P + b"]q\0" + b"h\0a" * 5000 + b".",
    "memo-unknown": P + b"h\0.",
    "memo-unknown-long": P + b"j\xff\xff\xff\xff.",
    "memo-sparse": P + b"}" + b"".join(b"r" + struct.pack("<I", 2**32 - 1 - i * 7919) for i in range(1000)) + b".",
    "memo-far": P + b"Nr\x7f\x96\x98\0.",
    "memo-limit": P + b"Nr\x80\x96\x98\0.",
    "memo-gap": P + b"Nq\2h\1.",
    "memo-bomb": P + b"]" + b"q\0" + b"".join(b"(" + b"h\0" * 10 + b"t" + b"q\0" for _ in range(40)) + b".",
    "string-long": P + b"X\xff\xff\xff\xffa.",
    "bytes-long": P + b"B\xff\xff\xff\xffa.",
    "frame-long": b"\x80\4N\x95" + b"\xff" * 8 + b"N.",
    "long-cut": P + b"\x8a\xff\1.",
    "float-cut": P + b"G\1\2.",
}
PICKLES.update({f"opcode-{name}": P + raw + b"." for name, raw in UNLISTED.items()})
for module, name in CALLS:
    label = "".join(c if c.isalnum() or c in "._" else "-" for c in f"{module}.{name}")
    PICKLES["call-" + label] = P + sym(module, name) + s("echo this must never run") + b"\x85R."


def main():
    shutil.rmtree(HERE, ignore_errors=True)
    os.makedirs(HERE)
    for kind, files in (("pt", ZIPS), ("pt", STREAMS), ("pkl", PICKLES)):
        for name, data in files.items():
            with open(os.path.join(HERE, f"{name}.{kind}"), "wb") as f:
                f.write(data)


if __name__ == "__main__":
    main()
