"""Data, state and command lines that a generator has spoilt: each is used or counted or refused.

    pytest tests/test_fuzz.py                                400 cases
    python tests/test_fuzz.py --cases=10000 --seed=2         a soak
    python tests/test_fuzz.py --seed=2 --first=17 --cases=1  one case again

Here are files of data, texts and dialogues; fuzz_state.py has what stages leave to each other, and
command lines.
"""
import ast
import base64
import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import pickle
import random
import sys
import tempfile
import time
import unicodedata
from collections import Counter, defaultdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import cleaning                                                                # noqa: E402
import config                                                                  # noqa: E402
import corpora                                                                 # noqa: E402
import prepare_pretrain                                                        # noqa: E402
import prepare_sft                                                             # noqa: E402
import readers                                                                 # noqa: E402
import tokenizer                                                               # noqa: E402
from conftest import story, train_tokenizer                                    # noqa: E402
from corpora import CHAT, PREFERENCE, TEXT, Bad                                # noqa: E402
from damage import SIGNS, STRANGE, mutate                                      # noqa: E402
from fuzz_state import command_line, state_file                                # noqa: E402

cases = 400    # how many
seed  = 1      # of all of them; a case depends on the seed and its own number only
first = 0      # number of the first one
config.override(globals())


# ---- texts, records, files -----------------------------------------------------------------------

HOSTILE = [
    *tokenizer.CONTROLS, "<s>", "</s>", "<pad>", "<unk>", "<0x0A>", "<|endoftext|>", "<bos>",
    "<eos>", "\u2581", "\x00", "\x1b", "\x7f", "\x85", "\u2028", "\ufeff", "\u200b", "\u3000",
    "\ufffd", "\ud800", "\udfff\ud800", "\r", "\r\n", "\n\n\n", "\t ", '"', "'", "\\", "{", "}",
    "[", "]", ",", ":", "\\u0000", "<b>", "</p>", "<a href='x'>", "<!--", "-->", "<script>",
    "&amp;lt;", "&#0;", "&nbsp;", "&#xD800;", "！！！！！", "………", "......", "电话：010-62345678",
    "QQ：12345", "a@b.cn", "http://a.cn/b", "（", "）", "\u0301", "\u0387" * 9, "\nHuman: ",
    "\nAssistant：", "Human:", "😀", "e\u0323\u0301"]


def text(rng, spoilt=0.3):
    """Chinese sentences, among them what somebody might write to do harm."""
    parts = [story(rng, rng.randrange(1, 5)) for _ in range(rng.randrange(1, 4))]
    while rng.random() < spoilt:
        alien = "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(1, 9)))
        parts.insert(
            rng.randrange(len(parts) + 1),
            rng.choice([*HOSTILE, alien]) * rng.choice([1, 1, 1, 2, 5]),
        )
    return "".join(parts)


def turns(rng, who, what, names):
    return [{who: names[i % 2], what: text(rng)} for i in range(rng.randrange(1, 6))]


def record(rng):
    """A record as one of the public data sets has it."""
    flat = rng.choice(
        [
            "text",
            "title text author",
            "completion",
            "title content",
            "story story_zh",
            "title desc content",
            "title desc answer",
            "INSTRUCTION RESPONSE",
            "instruction input output",
            "prompt response",
            "question answer",
            "department title ask answer",
            "nested",
        ]
    ).split()
    if flat != ["nested"]:
        return {name: text(rng) for name in flat}
    return rng.choice(
        [
            lambda: {"conversations": turns(rng, "from", "value", ["human", "gpt"])},
            lambda: {
                "messages": turns(rng, "role", "content", ["user", "assistant"]),
                "system": text(rng),
            },
            lambda: {"prompt": text(rng), "chosen": text(rng), "rejected": text(rng)},
            lambda: {
                name: turns(rng, "role", "content", ["user", "assistant"])
                for name in ("chosen", "rejected")
            },
            lambda: {
                "title": text(rng),
                "summary": text(rng),
                "sections": turns(rng, "title", "content", ["一", "二"]),
            },
            lambda: {"文件名": "a", "段落": turns(rng, "行号", "内容", [1, 2])},
        ]
    )()


def spoil(rng, record):
    """The record with a field that is missing or holds no text, or something else than a record."""
    record = json.loads(json.dumps(record))
    name = rng.choice(list(record))
    if rng.random() < 0.2:
        return rng.choice(STRANGE)
    if rng.random() < 0.3:
        del record[name]
    elif isinstance(record[name], list) and rng.random() < 0.7:
        inside = rng.choice(record[name])
        inside[rng.choice(list(inside))] = rng.choice(STRANGE)
    else:
        record[name] = rng.choice(STRANGE)
    return record


def sound(record):
    """The record without halves of surrogate pairs, which have no UTF-8."""
    return json.loads(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace"))


def as_csv(records, delimiter=","):
    columns = list(dict.fromkeys(name for r in records if isinstance(r, dict) for name in r)) or [
        "text"
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, delimiter=delimiter, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(r for r in records if isinstance(r, dict))
    return out.getvalue()


def as_parquet(records):
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    rows = [{"text": str(r).encode("utf-8", "replace").decode()} for r in records]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out, compression="none")
    return out.getvalue()


def dump(value, **how):
    return json.dumps(value, **how)


def lines(records, **how):
    return "\n".join(dump(r, **how) for r in records)


FORMATS = {  # name: (records -> str or bytes, suffix)
    "jsonl": (lines, ".jsonl"),
    "jsonl utf-8": (lambda rs: lines(rs, ensure_ascii=False), ".jsonl"),
    "array": (dump, ".json"),
    "array utf-8": (lambda rs: dump(rs, ensure_ascii=False), ".json"),
    "pretty array": (lambda rs: dump(rs, ensure_ascii=False, indent=2), ".json"),
    "pretty objects": (lambda rs: lines(rs, indent=4), ".json"),
    "array by lines": (lambda rs: "[\n" + ",\n".join(map(dump, rs)) + "\n]", ".json"),
    "csv": (as_csv, ".csv"),
    "tsv": (lambda rs: as_csv(rs, "\t"), ".tsv"),
    "csv gbk": (as_csv, ".csv"),
    "csv gb18030": (as_csv, ".csv"),
    "txt": (lambda rs: "\n\n".join(map(str, rs)), ".txt"),
    "txt gb18030": (lambda rs: "\n".join(map(str, rs)), ".txt"),
    "csv utf-16": (as_csv, ".csv"),
    "jsonl gb18030": (lambda rs: lines(rs, ensure_ascii=False), ".jsonl"),
    "jsonl utf-16": (lines, ".jsonl"),
    "array utf-16": (lambda rs: dump(rs, ensure_ascii=False), ".json"),
}
if find_spec("pyarrow"):
    FORMATS["parquet"] = as_parquet, ".parquet"


def as_bytes(form, records):
    content = FORMATS[form][0](records)
    encoding = form.split()[-1] if form.endswith(("gbk", "gb18030", "utf-16")) else "utf-8"
    handler = "surrogatepass" if encoding == "utf-8" else "replace"
    return content if isinstance(content, bytes) else content.encode(encoding, handler)


def compress(rng, data):
    """(the bytes, perhaps compressed, the suffix for that)."""
    if rng.random() < 0.75:
        return data, ""
    if find_spec("zstandard") and rng.random() < 0.4:
        import zstandard

        return zstandard.compress(data), ".zst"
    if rng.random() < 0.4:
        return rng.choice([(bz2.compress(data), ".bz2"), (lzma.compress(data), ".xz")])
    return gzip.compress(data[:99]) + gzip.compress(data[99:]), ".gz"


def write(folder, name, data):
    path = folder / name
    path.write_bytes(data)
    return str(path)


# ---- what must hold ------------------------------------------------------------------------------


def check_text(t):
    """A clean text: nothing in it that cannot be seen or written, and nothing left to clean."""
    t.encode("utf-8")
    assert not [
        c
        for c in t
        if unicodedata.category(c) in ("Cc", "Cs", "Co") and c not in "\n\t" and ord(c) < 0xF900
    ], repr(t)
    assert cleaning.normalise(t) == t, repr(t)


def check_codes(toks, t):
    """Text -> ids -> text, and no id of a control token, whatever the text says."""
    for tok in toks:
        ids = tok.encode(t)
        assert tok.decode(ids) == tokenizer.whole_characters(t), repr(t)
        assert not set(ids) & {
            tok.bos_id,
            tok.eos_id,
            tok.pad_id,
            tok.end_id,
            *tok.controls.values(),
        }, repr(t)
        assert "<|end|>" not in tok.controls or min(ids, default=8) >= 8, repr(t)


def check_dialogue(toks, messages):
    """The loss counts on the answers with the token that ends them, and on nothing else."""
    for tok in toks:
        ids, mask = tok.render(messages)
        answers = [tok.encode(m["content"]) for m in messages if m["role"] == "assistant"]
        assert [i for i, counts in zip(ids, mask) if counts] == [
            i for answer in answers for i in (*answer, tok.end_id)
        ]
        assert len(ids) == len(mask) and set(mask) <= {0, 1}
        starts = [at for at, counts in enumerate(mask) if counts and not mask[at - 1]]
        assert len(starts) == len(answers) and not mask[0]
        for at, answer in zip(starts, answers):  # whole, behind its own question
            assert (
                ids[at : at + len(answer) + 1] == [*answer, tok.end_id]
                and sum(mask[at : at + len(answer) + 2]) == len(answer) + 1
            )
        if "<|end|>" in tok.controls:  # and no string of a turn opens or ends one
            assert sum(i < 8 for i in ids) == 1 + 2 * len(messages)


def used_or_counted(table, name, record, toks):
    """What becomes of a record: "used", or the reason."""
    try:
        result = (
            corpora.document(name, record)
            if table is TEXT
            else corpora.read(table, name, "", record)
        )
    except Bad as bad:
        assert str(bad) and "\n" not in str(bad)
        return str(bad)
    if table is TEXT:
        check_text(result)
        assert cleaning.quality(result) is None
        return "used"
    prompt, *answers = result if table is PREFERENCE else (result[:-1], result[-1]["content"])
    assert len(set(answers)) == len(answers) == (2 if table is PREFERENCE else 1)
    for answer in answers:
        messages = [*prompt, {"role": "assistant", "content": answer}]
        assert [m["role"] for m in messages if m["role"] != "system"] == ["user", "assistant"] * (
            len(messages) // 2
        )
        assert all(m["content"].strip() for m in messages)
        for message in messages:
            check_text(message["content"])
        check_dialogue(toks, messages)
    return "used"


# ---- the cases -----------------------------------------------------------------------------------


def any_file(rng, folder, toks):
    """A damaged file of any format, through every data set of both tables."""
    form, block, longest = rng.choice(list(FORMATS)), readers.BLOCK, readers.MAX_RECORD
    records = [record(rng) for _ in range(rng.randrange(1, 9))]
    records = [spoil(rng, r) if rng.random() < 0.3 else r for r in records]
    data, packed = compress(rng, as_bytes(form, records))
    for _ in range(rng.randrange(5)):
        data = mutate(rng, data)
    suffix = FORMATS[form][1] if rng.random() < 0.7 else rng.choice([*readers.SUFFIXES, ""])
    path = write(folder, f"any{suffix}{packed if rng.random() < 0.8 else ''}", data)
    readers.BLOCK = rng.choice([1 << 20, 1 << 20, 50, 16])
    readers.MAX_RECORD = rng.choice([1 << 28, 1 << 28, 300])
    outcomes = Counter()
    try:
        for table in TEXT, CHAT, PREFERENCE:
            for cut in sorted({data_set.cut for data_set in table.values()}):
                for found in readers.records(path, cut):
                    outcomes.update(
                        used_or_counted(table, name, found, toks)
                        for name in table
                        if table[name].cut == cut
                    )
    except SystemExit as stopped:  # a package that is not installed
        assert (
            isinstance(stopped.code, str)
            and stopped.code.startswith(path)
            and "\n" not in stopped.code
        )
    finally:
        readers.BLOCK, readers.MAX_RECORD = block, longest
    return outcomes


def whole_file(rng, folder, toks):
    """An undamaged file of any format gives exactly its records."""
    form = rng.choice([name for name in FORMATS if name != "parquet"])
    records = [sound(record(rng)) for _ in range(rng.randrange(1, 9))]
    clean = lambda value: cleaning.clean(value) or "空"  # nothing that GBK or CSV cannot hold
    if FORMATS[form][1] in (".csv", ".tsv"):
        records = [{"ask": clean(text(rng)), "answer": clean(text(rng, 0))} for _ in records]
    if FORMATS[form][1] == ".txt":
        records = [
            " ".join(clean(text(rng)).replace("\ufffd", "").split()) or "空" for _ in records
        ]
    if form.endswith("gbk"):
        records = [
            {k: v.encode("gbk", "ignore").decode("gbk") or "空" for k, v in r.items()}
            for r in records
        ]
    before = [b"", b"", b"\n", b"\r\n"]
    before += [b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"] * (not form.endswith(("gbk", "gb18030")))
    before = [b""] if form.endswith("utf-16") else before
    data, packed = compress(rng, rng.choice(before) + as_bytes(form, records))
    found = list(readers.records(write(folder, f"whole{FORMATS[form][1]}{packed}", data)))
    assert found == records, (
        form,
        [(a, b) for a, b in zip(found, records) if a != b][:1] or (len(found), len(records)),
    )
    return Counter(used=len(found))


def one_bad_record(rng, folder, toks):
    """The readable records of a file with one broken one are all there, in order."""
    records = [
        {"id": f"{rng.randrange(1 << 64):x}", **sound(record(rng))}
        for _ in range(rng.randrange(2, 9))
    ]
    indent = rng.choice([None, None, 0, 2])
    parts = [dump(r, ensure_ascii=rng.random() < 0.5, indent=indent).encode() for r in records]
    at, at_line_starts = rng.randrange(len(records)), rng.random() < 0.8 or indent is not None
    del records[at]
    signs = [
        sign for sign in SIGNS if b"\n" not in sign and sign != b"\x1f\x8b"
    ]  # with that a file would be a .gz
    if rng.random() < 0.5:
        broken = parts[at][: rng.randrange(1, len(parts[at]))]  # cut off
    elif rng.random() < 0.3:
        broken = rng.choice(signs)
    else:
        broken = mutate(rng, parts[at], signs)
    if not at_line_starts or indent is None:
        broken = broken.replace(b"\n", b" ")
    if at_line_starts:
        form = rng.choice(["lines", "array"])
    else:  # all in one line: a lost brace would hide the next
        form, broken = "array", rng.choice(
            [b'{"text": nothing}', b'{"text" "a"}', b'{"text": 1 2}', b"{,}", b'{"a": "\\x"}']
        )
    parts[at] = broken
    end = rng.choice([b"\n", b"\r\n"]) if at_line_starts else b""
    data = (
        end.join(parts) if form == "lines" else b"[" + end + (b"," + end).join(parts) + end + b"]"
    )
    data, packed = compress(rng, data)
    path, block = (
        write(folder, f"one{rng.choice(['.json', '.jsonl'])}{packed}", data),
        readers.BLOCK,
    )
    readers.BLOCK = rng.choice([1 << 20, 50, 16])
    try:
        found = list(readers.records(path))
    finally:
        readers.BLOCK = block
    ids = {r["id"] for r in records}
    got = [r for r in found if isinstance(r, dict) and r.get("id") in ids]
    assert (
        got == records
    ), f"{len(got)} of {len(records)} with {broken[-100:]} at {at} of {data[:300]}"
    return Counter(used=len(records)) + Counter(str(r) for r in found if isinstance(r, Bad))


def any_text(rng, folder, toks):
    """A text through cleaning, quality and the tokenizers."""
    t = text(rng, 0.9)
    check_text(cleaning.normalise(t))
    cleaned = cleaning.clean(t)
    check_text(cleaned)
    if not set("<&") & set(cleaned):  # else a page shows &lt;b&gt;, which is <b>, as text
        assert cleaning.clean(cleaned) == cleaned, (t, cleaned, cleaning.clean(cleaned))
    check_codes(toks, t)
    return Counter([cleaning.quality(cleaned) or "used"])


def any_dialogue(rng, folder, toks):
    """Turns of any sort and order, as a data set holds them, and as chat encoding gets them."""
    turns = [
        (
            rng.choice(
                [*corpora.ROLES, "USER", "tool", None, 1, []]
                if rng.random() < 0.2
                else ["user", "assistant"]
            ),
            text(rng, 0.8),
        )
        for _ in range(rng.randrange(1, 7))
    ]
    if rng.random() < 0.7:
        turns = [(("human", "gpt")[i % 2], content) for i, (_, content) in enumerate(turns)]
    if rng.random() < 0.3:
        turns.insert(0, ("system", text(rng)))
    result = used_or_counted(
        CHAT, "sharegpt", {"conversations": [{"from": a, "value": b} for a, b in turns]}, toks
    )
    raw = [
        {"role": role, "content": content}
        for role, (_, content) in zip(["user", "assistant"] * 3, turns)
    ]
    check_dialogue(toks, raw)  # also what nobody has cleaned
    return Counter([result])


class Pool:
    """ProcessPoolExecutor without processes: what goes to a worker is pickled all the same."""

    def __init__(self, n_workers, context, start, how):
        readers.stopped, begin, arguments = how
        begin(*arguments)

    def submit(self, outer, function, item):
        result = outer(function, pickle.loads(pickle.dumps(item)))
        return SimpleNamespace(result=lambda: result)

    def shutdown(self, **_):
        pass


def corpus(rng, folder):
    """A spoilt JSONL corpus on the disk: (its path, the records that a reader yields)."""
    records = [record(rng) for _ in range(rng.randrange(5, 40))]
    records = [spoil(rng, r) if rng.random() < 0.2 else r for r in records + rng.sample(records, 3)]
    parts = [
        mutate(rng, dump(r).encode()) if rng.random() < 0.1 else dump(r).encode() for r in records
    ]
    if rng.random() < 0.3:
        depth = rng.choice([50, 300, 900, 3000])
        parts.insert(rng.randrange(len(parts)), b'{"text": ' + b"[" * depth + b"]" * depth + b"}")
    path = write(folder, "corpus.jsonl", b"\n".join(parts))
    return path, sum(1 for _ in readers.records(path))


def prepared(stage, **constants):
    """Run main() of a prepare script in this process, its workers as well; returns meta.json."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(
        io.StringIO()
    ), contextlib.redirect_stderr(io.StringIO()):
        for name, value in dict(constants, workers=2).items():
            patch.setattr(stage, name, value)
        patch.setattr(corpora, "BATCH_CHARS", 999)
        patch.setattr(readers, "ProcessPoolExecutor", Pool)
        stage.main()
    with open(f"{constants['data_dir']}/meta.json", encoding="utf-8") as f:
        return json.load(f)


def counted(meta, numbers):
    """Counter of what became of the records of each corpus; numbers: of records that there are."""
    reasons = Counter()
    for row, n in zip(meta["corpora"].values(), numbers):
        used = row["documents"] if "documents" in row else row["examples"]
        assert row["records"] == n == used + sum(row["dropped"].values())
        reasons += Counter(used=used, **row["dropped"])
    return reasons


def prepared_to_pretrain(rng, folder, toks):
    """prepare_pretrain.py: its report accounts for all records, its bins hold what it says."""
    path, n = corpus(rng, folder)
    good = [
        {"text": f"第{i}个：{story(random.Random(i), 4)}"} for i in range(12)
    ]  # enough for either bin
    names = rng.sample([name for name in TEXT if TEXT[name].cut == "line"], 2)
    spec = ",".join(
        [f"{name}:{path}" for name in names]
        + ["text:" + write(folder, "good.jsonl", lines(good).encode())]
    )
    meta = prepared(
        prepare_pretrain,
        corpora=spec,
        tokenizer=toks[0].name,
        data_dir=str(folder / "bins"),
        val_fraction=0.3,
        dedup=rng.random() < 0.7,
    )
    for part in "train", "val":
        ids = np.fromfile(folder / f"bins/{part}.bin", "<u2")
        assert len(ids) == meta[part]["tokens"] and (ids == 2).sum() == meta[part]["documents"]
        assert not ((ids < 8) & (ids != 2)).any()  # no text became a control token
    return counted(meta, (n, n, 12))


def prepared_to_fine_tune(rng, folder, toks):
    """prepare_sft.py: its report accounts for every record, its files hold what the report says."""
    path, n = corpus(rng, folder)
    good = [
        {"prompt": f"第{i}个问题", "response": story(random.Random(i), 1)}
        for i in range(12)
    ]
    spec = ",".join(
        [f"{name}:{path}" for name in rng.sample(sorted(CHAT), 2)]
        + ["prompt:" + write(folder, "good.jsonl", lines(good).encode())]
    )
    meta = prepared(
        prepare_sft,
        corpora=spec,
        tokenizer=toks[0].name,
        data_dir=str(folder / "bins"),
        augment=0.5,
        max_seq_len=rng.choice([60, 512]),
        val_fraction=0.2,
        test_fraction=0.2,
    )
    for part in "train", "val":
        ids = np.fromfile(folder / f"bins/{part}.bin", "<u2")
        mask, idx = np.fromfile(folder / f"bins/{part}.mask", "u1"), np.fromfile(
            folder / f"bins/{part}.idx", "<i8"
        )
        assert (
            len(ids) == len(mask) == meta[part]["tokens"] == idx[-1]
            and len(idx) == meta[part]["examples"] + 1
        )
        assert (
            mask.sum() == meta[part]["targets"]
            and (ids[idx[:-1]] == 1).all()
            and (ids == 1).sum() == len(idx) - 1
        )
        assert not (ids == 0).any() and not (ids == 3).any()
    with open(folder / "bins/test.jsonl", encoding="utf-8") as f:
        assert len([json.loads(line) for line in f]) == meta["test"]["examples"]
    return counted(meta, (n, n, 12))


KINDS = (
    [any_file] * 5 + [one_bad_record] * 4 + [any_text] * 4 + [whole_file] * 2 + [any_dialogue] * 3
    + [prepared_to_pretrain, prepared_to_fine_tune] + [state_file] * 8 + [command_line])


def own_tokenizers(folder):
    """One of sentencepiece with our control tokens, one of tiktoken ranks without."""
    pieces = [bytes([b]) for b in range(256)] + ["小".encode(), b" a", b"<|", b"|>", b"end"]
    (folder / "tiny.tiktoken").write_bytes(
        b"".join(b"%s %d\n" % (base64.b64encode(p), i) for i, p in enumerate(pieces))
    )
    return [
        train_tokenizer(folder / "tok.model", 400),
        tokenizer.load(str(folder / "tiny.tiktoken")),
    ]


def fuzz(folder, cases, seed, first=0):
    """Run the cases; returns [(number, kind, error)] of those that went wrong.

    Prints them, and at the end what became of the records, by kind of case.
    """
    toks, wrong, slowest, table = own_tokenizers(folder), [], (0, 0), defaultdict(Counter)
    (folder / "bins").mkdir()
    began = time.monotonic()
    for number in range(first, first + cases):
        rng = random.Random(f"{seed} {number}")
        kind, start = rng.choice(KINDS), time.monotonic()
        table[kind.__name__]["cases"] += 1
        try:
            table[kind.__name__] += kind(rng, folder, toks)
        except (Exception, SystemExit) as error:
            wrong.append((number, kind.__name__, f"{type(error).__name__}: {error}"[:600]))
            print("case {}, {}: {}".format(*wrong[-1]), flush=True)
        slowest = max(slowest, (time.monotonic() - start, number))
        if (number + 1) % 5000 == 0:
            print(f"up to case {number}: {len(wrong)} went wrong", flush=True)
    seconds = time.monotonic() - began
    print(f"seed {seed}, {cases} cases in {seconds:.0f} s, {len(wrong)} went wrong; "
          "the slowest took {:.1f} s: case {}".format(*slowest))
    for kind, counts in sorted(table.items()):
        n, used = counts.pop("cases"), counts.pop("used", 0)
        reasons = [f"{count:,} {reason}" for reason, count in counts.most_common()]
        print(f"  {kind:<22} {n:>6,} cases: {used:>8,} used; not: {', '.join(reasons)}")
    return wrong


def test_nothing_that_a_file_holds_is_lost_or_ends_a_run(tmp_path):
    assert fuzz(tmp_path, cases, seed, first) == []


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "big5"])
def test_a_damaged_byte_among_ascii_does_not_decide_the_encoding(tmp_path, encoding):
    escaped = [{"id": i, "text": "天" * 1000} for i in range(50)]           # 300 KB, all ASCII
    plain = [{"id": i, "text": "月亮在山上" * 50} for i in range(50, 60)]
    data = lines(escaped).encode() + b"\n" + lines(plain, ensure_ascii=False).encode(encoding)
    at = data.index(b"\\u5929", 9000)
    found = list(readers.records(write(tmp_path, "a.jsonl", data[:at] + b"\xb2" + data[at:])))
    assert len(found) == 60
    assert sum(record in escaped + plain for record in found) == 59


def test_objects_over_several_lines_are_read_behind_an_empty_one(tmp_path):
    good = [{"id": i, "text": "好"} for i in range(9)]
    path = write(tmp_path, "a.json", b"{}\n" + lines(good, indent=1).encode())
    assert list(readers.records(path)) == [{}, *good]


def test_texts_that_composing_changes_are_clean_after_one_pass():
    for text in (
        "\u0387" * 9,
        "天\u1fef气",
        "问\u037e",
        "e\u200b\u0301",
        "\u2126\u212b",
        "\u2001\u2000一",
    ):
        check_text(cleaning.clean(text))
        assert cleaning.clean(cleaning.clean(text)) == cleaning.clean(text)


@pytest.mark.parametrize("form", ["lines", "array"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "damage",
    [
        '{"id": 1, "text":',
        '{"id": 1, "list": [',
        '{"id": 1, "list": [{"a": 1}',
        '{"a": ' * 2000,
        "[" * 50,
        "null",
        "NaN",
        "1" * 5000,
    ],
)
def test_records_behind_one_that_is_cut_off_inside_a_list_or_before_a_value_are_used(
    tmp_path, form, indent, damage
):
    good = [{"id": i, "sections": [{"title": "题", "content": "文"}] * 2} for i in range(9)]
    parts = [damage, *(dump(r, indent=indent) for r in good)]
    data = "\n".join(parts) if form == "lines" else "[\n" + ",\n".join(parts) + "\n]"
    found = list(readers.records(write(tmp_path, "a.json", data.encode())))
    assert [r for r in found if r in good] == good


@pytest.mark.parametrize(
    "depth, used", [(5, True), (90, True), (102, False), (600, False), (100_000, False)]
)
def test_what_is_nested_too_deeply_to_be_sent_to_a_worker_is_counted(tmp_path, depth, used):
    data = b'{"text": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}\n{}"
    one, two = readers.records(write(tmp_path, "a.jsonl", data))
    assert two == {} and isinstance(one, dict) == used
    assert used or str(one) in ("nested too deeply", "broken JSON")
    pickle.loads(pickle.dumps(one))
    corpora.n_chars(one)


# ---- the command line ----------------------------------------------------------------------------

SCRIPTS = sorted(
    path.stem
    for path in ROOT.glob("*.py")
    if path.stem != "config" and "override(globals())" in path.read_text("utf-8")
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_constant_refuses_what_it_cannot_be_in_one_sentence(script, tmp_path):
    module = import_module(script)

    def refused(argument):
        with pytest.raises(SystemExit) as stopped:
            config.override({**vars(module), "__name__": "__main__"}, [argument])
        assert (
            isinstance(stopped.value.code, str)
            and "\n" not in stopped.value.code
            and script in stopped.value.code
        )
        return stopped.value.code

    for name in config.constants_of(ROOT / f"{script}.py"):
        default = getattr(module, name)
        wrong = {
            int: ["x", "1.5", "-1", "", "1e3", "0x10", "一", "open('x')"],
            float: ["x", "nan", "inf", "-1", "", "1e999"],
            bool: ["2", "-1", "maybe", ""],
            str: [],
        }[type(default)]
        for value in wrong:
            assert name in refused(f"--{name}={value}")
        assert isinstance(default, bool) or "needs a value" in refused(f"--{name}")
        assert f"--{name}=" in refused(f"--{name}z=1")  # the nearest name is suggested
        assert "--name=value" in refused(f"{name}=1")


def test_nothing_evaluates_text_or_unpickles_objects():
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in (
                    "eval",
                    "exec",
                    "compile",
                    "os.system",
                    "pickle.load",
                    "pickle.loads",
                ), path.name
                assert called != "torch.load" or "weights_only=True" in ast.unparse(node), path.name
                assert "shell=True" not in ast.unparse(
                    node
                ) and "allow_pickle=True" not in ast.unparse(node), path.name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        raise SystemExit(bool(fuzz(Path(folder), cases, seed, first)))
