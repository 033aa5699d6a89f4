"""Readers, data sets, cleaning, quality: no input is lost uncounted, ordinary text is kept."""
import bz2
import gzip
import itertools
import json
import lzma
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
import unicodedata
import zipfile
from collections import Counter

import pytest

import cleaning
import corpora
import readers
from cleaning import clean, normalise, quality
from conftest import ROOT, run, story
from corpora import CHAT, PREFERENCE, TEXT, Bad, dialogues, documents
from readers import records
from test_datasets import talk

DOCS = [{"text": f"第{i}篇：春天来了，小河边的柳树发芽了。"} for i in range(7)]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def read(path, cut="line"):
    """(usable records, reasons) of a file."""
    found = list(records(str(path), cut))
    reasons = [str(record) for record in found if isinstance(record, Bad)]
    return [record for record in found if not isinstance(record, Bad)], reasons


def read_back(path, content, cut="line"):
    """(usable records, reasons) of a file with this content."""
    return read(write(path, content), cut)


def results(parse, spec):
    """What documents() or dialogues() makes of each record, without the number of its corpus."""
    return [result for _, result in parse(spec)]


def dump(record, **options):
    return json.dumps(record, ensure_ascii=False, **options)


def dump_lines(records):
    return "\n".join(map(dump, records))


JSON_FORMS = {
    "lines": dump_lines(DOCS),
    "lines, CRLF and BOM": "\ufeff" + "\r\n".join(map(dump, DOCS)) + "\r\n",
    "array": dump(DOCS),
    "array, pretty-printed": dump(DOCS, indent=4),
    "array, a line each": "[\n" + ",\n".join(map(dump, DOCS)) + "\n]",
    "objects, pretty-printed": "\n".join(dump(d, indent=2) for d in DOCS),
    "objects without separators": "".join(map(dump, DOCS)),
    "escaped": json.dumps(DOCS)}


@pytest.mark.parametrize("form", JSON_FORMS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", "", ".json.gz", ".jsonl.zst"])
def test_json_is_recognised_by_content_whatever_the_name(tmp_path, form, suffix):
    data = JSON_FORMS[form].encode("utf-8")
    if suffix.endswith(".gz"):
        # several members, as pigz and cat make them
        data = gzip.compress(data[:50]) + gzip.compress(data[50:])
    if suffix.endswith(".zst"):
        data = pytest.importorskip("zstandard").compress(data)
    assert read_back(tmp_path / f"a{suffix}", data) == (DOCS, [])


def test_records_of_every_size_across_block_borders(tmp_path, monkeypatch):
    rng = random.Random(0)
    docs = [{"text": "字" * rng.randrange(200), "n": i} for i in range(50)]
    forms = dump(docs), dump_lines(docs), dump(docs, indent=1)
    for block, form in itertools.product((1, 7, 64, 1000), forms):
        monkeypatch.setattr(readers, "BLOCK", block)
        assert read_back(tmp_path / "a.json", form) == (docs, []), block


def test_a_line_of_50_megabytes(tmp_path):
    docs = [{"text": "长" * 17_000_000}, {"text": "短"}]
    for form in dump_lines(docs), dump(docs):
        assert read_back(tmp_path / "a.jsonl", form) == (docs, [])


def test_broken_lines_are_counted_and_the_others_used(tmp_path):
    lines = list(map(dump, DOCS))
    lines[2] = lines[2][:-9]
    lines.insert(4, "not json")
    lines.insert(5, '{"text": "' + "[" * 100_000)
    lines.insert(6, "[" * 100_000)
    lines.append('{"text": "cut off')
    kept, reasons = read_back(tmp_path / "a.jsonl", "\n".join(lines))
    assert kept == DOCS[:2] + DOCS[3:]
    assert reasons == ["broken JSON"] * 5


@pytest.mark.parametrize("indent", [None, 0, 4])
@pytest.mark.parametrize("damage", [
    '{"text": "no end',
    '{"text" "no colon"}',
    '{"text": 12 34}',
    '{"text": nothing}',
    "}",
    "garbage"])
@pytest.mark.parametrize("position", [0, 3, 7])
def test_an_array_goes_on_after_a_broken_element(tmp_path, indent, damage, position):
    parts = [dump(d, indent=indent) for d in DOCS]
    parts.insert(position, damage)
    kept, reasons = read_back(tmp_path / "a.json", "[\n" + ",\n".join(parts) + "\n]")
    assert kept == DOCS
    assert set(reasons) == {"broken JSON"}


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("form", ["lines", "array", "array, pretty-printed"])
def test_truncated_archives_are_used_as_far_as_they_go_and_counted(tmp_path, form, suffix):
    compress = gzip.compress
    if suffix == "zst":
        # zstd's command writes a checksum, too
        compress = pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress
    rng = random.Random(3)
    hanzi = range(0x4E00, 0x9FA5)
    docs = [{"text": "".join(map(chr, rng.choices(hanzi, k=99)))} for _ in range(9000)]
    data = dump_lines(docs)
    if form != "lines":
        data = dump(docs, indent=None if form == "array" else 1)
    packed = compress(data.encode("utf-8"))
    half = len(packed) // 2
    kept, reasons = read_back(tmp_path / f"a.json.{suffix}", packed[:half])
    assert len(docs) // 4 < len(kept) < len(docs)
    assert kept == docs[:len(kept)]
    assert sorted(reasons) == ["broken JSON", "truncated compression"]
    noise = packed[:half] + bytes(1000) + packed[half + 1000:]
    kept, reasons = read_back(tmp_path / f"b.json.{suffix}", noise)
    assert kept[:99] == docs[:99]
    assert "broken compression" in reasons


def test_csv_in_utf8_and_gbk_with_line_feeds_and_quotes(tmp_path):
    text = 'ask,answer\r\n"头痛\r\n怎么""办""？",多休息\r\n\r\n发烧,"喝水,\n休息"\r\n'
    rows = [
        {"ask": '头痛\r\n怎么"办"？', "answer": "多休息"},
        {"ask": "发烧", "answer": "喝水,\n休息"}]
    for encoding in "utf-8", "utf-8-sig", "gbk", "gb18030":
        assert read_back(tmp_path / "a.csv", text.encode(encoding)) == (rows, []), encoding
    ascii_first = b"ask,answer\n" + b"a,b\n" * 600_000 + "头痛,休息\n".encode("gbk")
    kept, _ = read_back(tmp_path / "b.csv", ascii_first)
    assert kept[-1] == {"ask": "头痛", "answer": "休息"}


def test_csv_with_bad_bytes_short_rows_and_an_open_quote(tmp_path):
    data = (
        "ask,answer\n头痛,休息\n".encode("gbk")
        + b"\xff\xff,ok\nonly one\na,\x00b\n"
        + '"开,口'.encode("gbk"))
    kept, reasons = read_back(tmp_path / "a.csv", data)
    assert len(kept) == 3
    assert kept[0] == {"ask": "头痛", "answer": "休息"}
    assert kept[1]["answer"] == "ok"
    assert kept[2] == {"ask": "a", "answer": "b"}
    assert reasons == ["broken CSV"] * 2
    assert read_back(tmp_path / "empty.csv", b"") == ([], [])
    assert read_back(tmp_path / "head.csv", b"ask,answer\n") == ([], [])


PASSAGE = "这是一段普通的文字，里面有常见的字和标点。他说：“我们明天去学校看书吧！”"
TRADITIONAL = "這是一段普通的文字，裡面有常見的字和標點。他說：「我們明天去學校看書吧！」"


@pytest.mark.parametrize("encoding", [
    "utf-8", "gbk", "gb18030", "utf-16", "utf-16-le", "utf-16-be", "big5"])
@pytest.mark.parametrize("packed", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_every_format_in_every_encoding_and_compression(tmp_path, encoding, packed):
    text = TRADITIONAL if encoding == "big5" else PASSAGE
    compress = {
        "": bytes,
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress}
    if packed == ".zst":
        compress[".zst"] = pytest.importorskip("zstandard").compress
    row = {"prompt": text, "response": text[::-1]}
    forms = {
        "a.jsonl": (dump(row) + "\n") * 9,
        "a.json": dump([row] * 9),
        "b.json": dump([row] * 9, indent=2),
        "a.csv": "prompt,response\n" + f"{text},{text[::-1]}\n" * 9,
        "a.txt": (text + "\n") * 9}
    for name, content in forms.items():
        data = compress[packed](content.encode(encoding))
        expected = text if name == "a.txt" else row
        assert read_back(tmp_path / (name + packed), data) == ([expected] * 9, []), name
    assert len(readers.files_at(str(tmp_path))) == 5


def test_a_few_bad_bytes_do_not_change_the_encoding_and_drop_their_dialogue_only(tmp_path):
    rows = [{"prompt": f"{i}：{PASSAGE}", "response": PASSAGE} for i in range(9)]
    data = dump_lines(rows).encode().split(b"\n")
    data[3] = data[3].replace("学校".encode(), b"\xe5\xad")
    found = results(dialogues, "prompt:" + write(tmp_path / "a.jsonl", b"\n".join(data)))
    assert str(found[3]) == "broken characters"
    assert sum(isinstance(d, list) for d in found) == 8
    data = ("prompt,response\n" + "a,b\n" * 9999 + "é,b\n").encode()
    data += b"\x81,b\n" + PASSAGE.encode() + b",b\n"
    rows = list(records(write(tmp_path / "c.csv", data)))
    assert [row["prompt"] for row in rows[-3:]] == ["é", "\ufffd", PASSAGE]
    data = "prompt,response\nçà et là,déjà vu à l'été\n".encode("latin-1")
    found = results(dialogues, "prompt:" + write(tmp_path / "b.csv", data))
    assert [str(d) for d in found] == ["broken characters"]


def test_archives_and_binary_files_are_refused_by_name(tmp_path):
    inner = write(tmp_path / "inner.jsonl", dump_lines(DOCS))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.write(inner)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as file:
        file.add(inner, "文件.jsonl")
    for name, kind in {"a.zip": "zip archive", "a.tar.gz": "tar archive"}.items():
        assert read(tmp_path / name) == ([], [f"{kind}, not text: unpack or convert it first"])
    found = results(documents, f"text:{tmp_path}")  # also in a folder
    assert len(found) == 9
    assert sum("archive" in str(d) for d in found) == 2
    folder = tmp_path / "refused"
    folder.mkdir()
    starts = {
        "a.7z": b"7z\xbc\xaf",
        "b.rar": b"Rar!",
        "c.pdf": b"%PDF-1.7",
        "d.txt": b"\xd0\xcf\x11\xe0"}
    for name, start in starts.items():
        write(folder / name, start + bytes(99))
    kinds = [str(d).partition(",")[0] for d in results(documents, f"text:{folder}")]
    assert kinds == ["7z archive", "rar archive", "PDF", "old Office file"]
    expected = [], ["binary file, not text: unpack or convert it first"]
    for data in random.Random(0).randbytes(9999), bytes(9999), bytes(range(256)) * 9:
        assert read_back(tmp_path / "a.txt", data) == expected


def test_csv_rows_of_another_length_and_an_open_quote_spoil_themselves_only(tmp_path):
    rows = [
        "问一,答一",
        '问二,"答二',
        "问三,答三",
        "问四,答四,多余",
        "问五,答五,,",
        "只有问",
        "问六,答六"]
    kept, reasons = read_back(tmp_path / "a.csv", "\n".join(["prompt,answer", *rows]))
    assert [tuple(row.values()) for row in kept] == [(f"问{n}", f"答{n}") for n in "一三五六"]
    assert reasons == ["broken CSV"] * 3
    many = "a,b\n" + 'x"y,"z\n' * 3000  # each row opens a quote again
    kept, reasons = read_back(tmp_path / "b.csv", many)
    assert kept == []
    assert reasons
    assert set(reasons) == {"broken CSV"}


def test_an_open_quote_in_a_large_file_costs_one_row(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_CELL", 1000)
    rows = [f"问{i},答{i}" for i in range(999)]
    rows[5] = '问5,"答5'
    kept, reasons = read_back(tmp_path / "a.csv", "\n".join(["prompt,answer", *rows]))
    expected = [f"问{i}" for i in range(999) if i != 5]
    assert [row["prompt"] for row in kept] == expected
    assert reasons == ["broken CSV"]


@pytest.mark.parametrize("data, n", [
    (dump(DOCS)[:-1], 7),
    ("[", 0),
    ("[\n" + dump(DOCS[0]) + ",", 1)])
def test_an_array_without_its_end_is_counted(tmp_path, data, n):
    reasons = ["JSON array without an end"]
    assert read_back(tmp_path / "a.json", data) == (DOCS[:n], reasons)


@pytest.mark.parametrize("unit, n", [
    ('{"a":}{', 150_000),
    ('{"a":\n', 30_000),
    ('{"a":', 50_000)])
def test_files_of_nothing_but_broken_json_take_linear_time(tmp_path, unit, n):
    start = time.process_time()
    kept, reasons = read_back(tmp_path / "a.json", unit * n)
    assert not kept
    assert reasons
    assert time.process_time() - start < 15


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
def test_a_compressed_bomb_is_read_in_small_memory(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    line = dump({"text": "字" * 20}).encode() + b"\n"
    data = {"a.jsonl.zst": zstandard.compress, "a.jsonl.gz": gzip.compress}
    for name, compress in data.items():
        path = write(tmp_path / name, compress(line * 1_000_000))  # 0.1 GB in a few KB
        code = (
            f"import re, readers\nn = sum(1 for _ in readers.records({path!r}))\n"
            "print(n, re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])")
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        n, kilobytes = map(int, done.stdout.split())
        assert n == 1_000_000, name
        assert kilobytes < 100_000, name


def test_parquet_without_dates_and_times(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    texts = [d["text"] for d in DOCS]
    long = pyarrow.array([2**61] * 7, pyarrow.duration("s"))
    parquet.write_table(pyarrow.table({"text": texts, "long": long}), tmp_path / "b.parquet")
    found = results(documents, f"text:{tmp_path}/b.parquet")
    assert [str(d) for d in found] == ["broken parquet"] * 7
    turn = pyarrow.struct([
        ("role", pyarrow.string()),
        ("content", pyarrow.string()),
        ("at", pyarrow.timestamp("ns"))])
    messages = [
        {"role": "user", "content": "一", "at": 1},
        {"role": "assistant", "content": "二", "at": 2}]
    table = pyarrow.table({
        "date": pyarrow.array([3_000_000] * 7, pyarrow.date32()),
        "text": texts,
        "time": pyarrow.array([10**15] * 7, pyarrow.timestamp("ms")),
        "messages": pyarrow.array([messages] * 7, pyarrow.list_(turn))})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert results(documents, f"text:{tmp_path}/a.parquet") == texts
    assert results(dialogues, f"messages:{tmp_path}/a.parquet") == [talk("一", "二")] * 7


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.Table.from_pylist(DOCS), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == (DOCS, [])
    data = (tmp_path / "a.parquet").read_bytes()
    assert read_back(tmp_path / "b.parquet", data[:-9]) == ([], ["broken parquet"])


def test_text_files(tmp_path):
    text = "第一行\r\n第二行\r\n\r\n　\r\n第三行\n"
    for data in ("\ufeff" + text).encode("utf-8"), text.encode("gb18030"):
        path = write(tmp_path / "a.txt", data)
        assert read(path) == (["第一行", "第二行", "第三行"], [])
        assert read(path, "blank") == (["第一行\n第二行\n", "第三行"], [])
        [whole] = read(path, "file")[0]
        assert whole.split() == ["第一行", "第二行", "第三行"]
    line = '{"text": "一"}'
    assert read_back(tmp_path / "b.txt", line + "\n", "file") == ([line], [])
    assert read_back(tmp_path / "c.txt", "") == ([], [])


def test_a_worker_that_dies_ends_in_one_sentence_and_ctrl_c_works_again():
    with pytest.raises(SystemExit, match=r"a worker process died.*smaller --workers \(it was 2\)"):
        list(readers.in_order(os._exit, itertools.repeat(1, 100), 2, int))
    if hasattr(signal, "pthread_sigmask"):
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_workers_in_the_middle_of_a_large_result_end_when_nobody_wants_it():
    code = (
        "import itertools, readers\n"
        "for _ in range(3):\n"
        "    results = readers.in_order(bytes, itertools.repeat(30_000_000), 2, int)\n"
        "    print(len(next(results)))\n"
        "    results.close()\n")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["30000000"] * 3
    assert not done.returncode


def test_pieces_are_cut_behind_line_feeds_where_there_are_any():
    assert list(cleaning.pieces("一二\n三四五\n六", 4)) == ["一二\n", "三四五\n", "六"]
    assert list(cleaning.pieces("一二三四五六七八九", 4)) == ["一二三四", "五六七八", "九"]
    assert list(cleaning.pieces("一二三四", 4)) == ["一二三四"]


def test_the_indentation_of_a_first_line_reaches_the_dialogue():
    code = "    if x:\n        return 1"
    record = {"prompt": " 问 ", "response": f"\n{code}\n"}
    assert CHAT["prompt"].read(record) == talk("问", code)
    assert TEXT["text"].read({"text": f"\n{code}\n"}) == code


def test_inner_lists_hold_records_or_one_dialogue_each(tmp_path):
    alpaca = [
        [{"instruction": "一", "input": "", "output": "二"}],
        [{"instruction": "三", "output": "四"}]]
    path = write(tmp_path / "a.json", dump(alpaca))
    assert results(dialogues, f"alpaca:{path}") == [talk("一", "二"), talk("三", "四")]
    smile = [{"role": "client", "content": "一"}, {"role": "counselor", "content": "二"}]
    path = write(tmp_path / "b.json", dump([smile] * 2))
    assert results(dialogues, f"sharegpt:{path}") == [talk("一", "二")] * 2


STRANGE = [
    None, 0, 1.5, True, "", "字", [], ["字"], [[]], {}, {"": None},
    {"text": {"text": "字"}}, "\ud800\udfff\x00", [None], [{}]]
FIELDS = (
    "text title author completion summary sections content story_zh desc answer INSTRUCTION "
    "RESPONSE 段落 instruction input output prompt response question ask conversations messages "
    "system chosen rejected chat plain_text tools conversation").split()


def strange_record(rng):
    return {field: rng.choice(STRANGE) for field in rng.sample(FIELDS, 9)}


def test_no_record_however_strange_is_fatal():
    rng = random.Random(1)
    for table in TEXT, CHAT, PREFERENCE:
        for name in table:
            for record in [*STRANGE, *(strange_record(rng) for _ in range(285))]:
                try:
                    if table is TEXT:
                        result = corpora.document(name, record)
                    else:
                        result = corpora.read(table, name, "", record)
                    json.dumps(result, ensure_ascii=False).encode("utf-8")
                except Bad as bad:
                    assert str(bad), (name, record)
                    assert "Error in" not in str(bad), (name, record)


# ---- cleaning ------------------------------------------------------------------------------------

ORDINARY = [
    "class boss is 1.5 kg",
    "He said: \"yes, it's 3.14!\" (p. 42)",
    "a < b and c > d, x<y>z, List<String> a = b<c>();",
    "if (a<b && c>d) { return x[i] ? 1 : 0; }",
    "vector<int> v; Map<String, List<a>> m;",
    "#include <stdio.h>",
    "cmd <source> <link>",
    "<|user|>你好<|end|><s></s><unk>",
    "用 `<div>` 和 `</div>` 包起来",
    "for i in range(10):\n    if i > 3:\n\tprint(i)",
    "价格是 ￥1,299.00，打 8.5 折，约合 $180。",
    "时间：2023-07-20 12:30:45，比分 3:2。",
    "版本 3.11.4，IP 192.168.1.1:8080，路径 C:\\a\\b 和 /usr/bin/env。",
    "他想了想……说：“好吧……”——然后走了。",
    "Wait... what?! No!!",
    "床前明月光，\n疑是地上霜。\n\n举头望明月，\n低头思故乡。",
    "公式：E = mc²，H₂O，½，①②③，Ⅳ，℃，㎡，(a+b)^2 = a^2 + 2ab + b^2。",
    "报警电话是110，急救电话是120。",
    "2008年全国人口1328020000人。",
    "他的手机号码有十一位，比如 13800138000 这样的。",
    "QQ 是腾讯的软件，1999年2月发布。",
    "请看 https://example.com/a?b=1&c=2 上的说明。",
    "ssh root@example.com\ngit clone git@github.com:karpathy/nanoGPT.git",
    "@property\ndef f(self): ...",
    "AT&T、R&D 和 &x 取地址；a && b",
    "# 标题\n\n- 一\n- 二\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\nx = a ** 2  # 平方\n```",
    "----------\n==========\n****",
    "比例尺1∶50000，北纬39°54′，“引号”‘单引号’《书名》〈篇名〉【括号】「日」",
    "👨‍👩‍👧 表情 ❤️ 和 🇨🇳",
    "中文ABC中文123中文，,。.！!？?；;：:",
    "Ça va? Über naïve façade, Привет, こんにちは, 안녕하세요",
    "3<5 且 7>6，所以 x<3 或 x>7。",
    "电话铃响了：“喂，是谁？”",
    "邮箱：在学校门口右边，绿色的那个。",
    "报名请拨打热线：010-62345678咨询王老师。",
    "他的QQ：123456789是八位数吗？",
    "地址：北京市海淀区中关村大街1号，邮编100080",
    "<p> 标签表示段落，</p> 标签表示结束",
    "def f(a: int = 1, *args, **kw) -> dict[str, list]:",
    "升级到 lodash@4.17.20 和 vue@3.2.45 之后就好了。",
    "for (1..@header.num) { }",
    "Lou@N.T.乐队",
    "苹果5kg@2.5元一份",
    "user@receiver.com 是收件人的地址。",
    "MAIL FROM:<user@receiver.com>",
    "git config user.email <a@b.com>",
    '请看：\n```html\n<div class="a">\n    <p>段落</p>  \n\n\n\n    <br>\n</div>\n```\n完毕',
    '学习 HTML：<p class="a">段落</p> 是一段，<br> 换行。',
    "`&lt;` 表示小于号",
    "传真：1949-1999，五十年的历史",
    "请填空：中国的首都是————————，最长的河是________。",
    "    def f():\n        return 1",
    "    1 + 1\n得到 2",
    "　　床前明月光，\n疑是地上霜。",
    "　君不见，\n　　　黄河之水天上来",
    "def f():\n    pass\n\n\ndef g():\n    pass",
    "می\u200cخواهم"]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_stays_as_it_is(text):
    assert clean(text) == text
    assert normalise(text) == text


@pytest.mark.parametrize("dirty, expected", [
    ("e\u0301 一\u0323", "\u00e9 一\u0323"),
    ("，。！？＆％＋", "，。！？＆％＋"),
    ("ＡＢＣ１２３ｘｙｚ", "ABC123xyz"),
    ("一\u3000二\xa0三\u2003四", "一 二 三 四"),
    ("\u3000\u3000第一段\n\u3000\u3000第二段", "第一段\n第二段"),
    ("一  \n二\t\n三 ", "一\n二\n三"),
    ("一\n\n\n\n\n二", "一\n\n二"),
    ("一\r\n二\r三\u2028四", "一\n二\n三\n四"),
    ("零\u200b宽\ufeff字\u200f符\xad", "零宽字符"),
    ("控\x00制\x07字\x1b符\x7f\x85", "控制字符"),
    ("半\ud800个", "半\ufffd个"),
    ("私\ue000用", "私用"),
    ("增长了９．０９％", "增长了9.09％"),
    ("标题\n\u3000\u3000第一段\n\n\u3000\u3000第二段", "标题\n第一段\n\n第二段"),
    (" 一\n", "一"),
    ("\n \n  一\n二", "  一\n二"),
    ('一<br/>\n```\n<br/>\x00二\n```\n三<br/>', "一\n\n```\n<br/>二\n```\n三"),
    ("<p>第一段</p><p class=\"x\">第二<b>段</b></p>", "第一段\n\n第二段"),
    ("一<br/>二<BR>三", "一\n二\n三"),
    ("图<img src='a.png' alt=\"b\">片<a href=\"http://a.cn\">链接</a>", "图片链接"),
    ("注<!-- 看不见 -->释", "注释"),
    ("<script type='a'>var x = 1 < 2;</script>正文<style>p {}</style>", "正文"),
    ("&lt;标签&gt;&nbsp;A&amp;B&#39;&#x4e2d;", "<标签> A&B'中"),
    ("欢迎光临。电话：010-62345678，QQ群：123456789", "欢迎光临。"),
    ("欢迎（联系电话：13800138000）光临", "欢迎光临"),
    ("正文\nTel: +86 10 6234 5678\n尾", "正文\n\n尾"),
    ("正文，邮箱：someone@example.com。", "正文。"),
    ("正文\nhttps://www.example.com/a.html\n尾", "正文\n尾"),
    ("作者（someone@example.com）写道", "作者写道"),
    ("官网：www.example.com.cn\n正文", "正文"),
    ("好！！！！！！", "好！！！"),
    ("啊？？？？？是!!!!!!吗，，，，", "啊？？？是!!!吗，，，"),
    ("等等……………………", "等等……"),
    ("目录............12", "目录......12")])
def test_each_rule(dirty, expected):
    assert clean(dirty) == expected
    assert clean(expected) == expected  # nothing is left to do


def test_dialogues_keep_html_and_lose_control_characters():
    answer = '<p class="a">段</p>\n电话：010-62345678'
    record = {"prompt": "写\x00一段", "response": answer + "  \n"}
    assert CHAT["prompt"].read(record) == talk("写一段", answer)


def test_rules_take_linear_time():
    units = [
        "<", "&", "@", " ", "\n", "！", "a@", "电话：", "<!--", "<script></", "（", "电话：0",
        "\u3000", "http://", "<a b=", "1-", "0.", "a.a@", "}\n", "电话：0 "]
    for unit in units:
        clean(unit * 50_000)  # would take minutes if quadratic
        quality(unit * 50_000)


@pytest.mark.parametrize("text, reason", [
    ("很好。", "too short"),
    ("1234567890 - 2345678901 | 3456789 == 45", "too little Chinese or letters"),
    ("好的" * 50, "too few different characters"),
    ("今天天气真不错，我们出去玩吧。" * 9, "too much repetition"),
    ("一二三四五六七八九十甲乙丙丁。" * 7, "too much repetition"),
    ("一二三四五六七八九十甲乙丙丁。" * 6, None),
    ("这一行字里面有一些坏掉的\ufffd\ufffd字节", "broken characters"),
    ("床前明月光，疑是地上霜。举头望明月，低头思故乡。", None),
    ("The quick brown fox jumps over the lazy dog.", None),
    ("第一条 为了保障公民权利，制定本法。\n第二条 本法所称公民，是指具有国籍的自然人。", None),
    ("鸡蛋 2 个、面粉 100 克、盐 5 克，搅拌 3 分钟，大火蒸 10 分钟即可。", None)])
def test_quality(text, reason):
    assert quality(text) == reason


MULTIPLICATION = "\n".join(
    "  ".join(f"{j}×{i}={i * j}" for j in range(1, i + 1))
    for i in range(1, 10))


@pytest.mark.parametrize("text", [
    "わたしはきのうともだちとえいがをみにいきました。とてもおもしろかったです。",
    "コンピューターのプログラムをつくるのはたのしい。",
    "สวัสดีครับ วันนี้อากาศดีมาก เราไปเดินเล่นในสวนกันเถอะ",
    "བོད་ཡིག་ནི་བོད་མི་རིགས་ཀྱི་ཡི་གེ་ཡིན། འདི་ནི་ཤིན་ཏུ་གནའ་བོ་ཡིན།",
    "नमस्ते, आज मौसम बहुत अच्छा है और हम बगीचे में घूमने जा रहे हैं।",
    MULTIPLICATION,
    "| 姓名 | 年龄 | 城市 |\n|------|------|------|\n| 张三 | 18 | 北京 |\n| 李四 | 20 | 上海 |",
    "| 年份 | 2019 | 2020 | 2021 |\n|---|---|---|---|\n"
    "| 产量 | 12.5 | 13.8 | 14.2 |\n| 增长 | 3.1% | 10.4% | 2.9% |",
    "$$\\frac{-b \\pm \\sqrt{b^2-4ac}}{2a} = x_{1,2}, \\sum_{i=1}^{n} i = \\frac{n(n+1)}{2}$$"])
def test_other_scripts_tables_and_formulas_are_kept(text):
    assert quality(clean(text)) is None


# What the rules of cleaning and the thresholds of quality look at.
DIRT = [
    "<p>", "</div>", "<br>", "&amp;", "\r", "\x85", "\u2028", "　", "\u200b", "\0", "１２ａ", "\xa0",
    "\t\n", " \n", "\n\n\n", "电话：010-62345678", "，QQ群:123456789。", "\nwww.abc.com\n",
    "\nhttps://x.y/\n", "a@b.com", "!!!!", "。。。。", "～～～～", "……………", "————", "........",
    "········", "\ufffd", "e\u0301", "12345", "☆☆☆"]


def fragments(rng):
    """A text of ordinary clauses, perhaps repeated, with more or less dirt among them."""
    clauses = [story(rng, 1) for _ in range(rng.choice([1, 3, 30]))]
    parts = rng.choices(clauses, k=rng.choice([1, 4, 9, 30]))
    parts += rng.choices(DIRT, k=rng.choice([0, 0, 1, 5, 30]))
    rng.shuffle(parts)
    length = rng.choice([11, 12, 40, 999])
    return "".join(parts)[:length]


def cleaned(rules, text):
    """The text after all rules, each of which is tried, unlike in cleaning.apply."""
    for _, hint, pattern, replacement in rules:
        if hint is None or hint.search(text):
            text = pattern.sub(replacement, text)
    lines = unicodedata.normalize("NFC", text).rstrip().split("\n")
    while len(lines) > 1 and not lines[0].strip():
        del lines[0]
    return "\n".join(lines) if len(lines) > 1 else lines[0].strip()


def fault(text):
    """The reason for which quality() drops a text, or None: each condition in full."""
    if len(text) < 12:
        return "too short"
    letters = "".join(re.findall(r"[^\W\d_]", text))
    without_frames = re.sub(r"[\s|\-]", "", text)
    if len(letters) < 0.4 * max(1, len(without_frames)):
        return "too little Chinese or letters"
    if text.count("\ufffd") > 0.001 * len(text):
        return "broken characters"
    start = text[:200]
    if len(set(start)) < 4 + len(start) / 20:
        return "too few different characters"
    clauses = re.split("[，！？；\n .,。]", text)
    different = "".join(set(clauses))
    if len(clauses) > 7 and len(different) < 0.4 * len("".join(clauses)):
        return "too much repetition"
    return None


def test_the_quick_looks_change_nothing():
    rng, reasons = random.Random(4), set()
    for _ in range(3000):
        dirty = fragments(rng)
        for rules in cleaning.NORMAL, cleaning.WEB:
            assert cleaning.apply(rules, dirty) == cleaned(rules, dirty), repr(dirty)
        text = clean(dirty)
        expected = fault(text)
        assert quality(text) == expected, repr(text)
        reasons.add(expected)
    assert len(reasons) == 6


# ---- specs ---------------------------------------------------------------------------------------

def test_all_files_of_a_list_a_folder_and_a_pattern_are_read(tmp_path):
    (tmp_path / "sub").mkdir()
    names = ["b.jsonl", "a.json", "sub/c.jsonl", "sub/README.md", ".hidden.json"]
    for number, name in zip("一二三四五", names):
        write(tmp_path / name, dump({"text": f"第{number}个文件里的一篇小文章"}))

    def order(spec):
        return "".join(text[1] for text in results(documents, spec))
    assert order(f"text:{tmp_path}") == "二一三"
    assert order(f"text:{tmp_path}/*.json*, txt_file:{tmp_path}/sub/*.md") == "二一" + '"'
    assert order(f"text:{tmp_path}/b.jsonl,text:{tmp_path}/a.json") == "一二"


def test_a_link_to_a_folder_above_counts_no_file_twice(tmp_path):
    inner = tmp_path / "data" / "inner"
    inner.mkdir(parents=True)
    write(inner / "a.jsonl", dump(DOCS[0]))
    for name in "up", "again":
        (inner / name).symlink_to(tmp_path / "data", target_is_directory=True)
    assert len(list(documents(f"text:{tmp_path}/data"))) == 1
    (tmp_path / "linked").symlink_to(inner, target_is_directory=True)
    assert len(list(documents(f"text:{tmp_path}/linked"))) == 1
    (inner / "again").unlink()
    assert len(list(documents(f"text:{tmp_path}/data/**/*.jsonl"))) == 1


def test_a_path_may_hold_a_comma(tmp_path):
    a = write(tmp_path / "一,二.jsonl", dump(DOCS[0]))
    b = write(tmp_path / "三.jsonl", dump(DOCS[1]))
    texts = [d["text"] for d in DOCS[:2]]
    assert results(documents, f"text:{a},text:{b},") == texts
    with pytest.raises(SystemExit, match="name:path for every part"):
        next(documents(f"text:{a},{b}"))


@pytest.mark.parametrize("spec, parts", [
    ("wikipedia_cn:nowhere.json",
     ["nowhere.json", "Wikipedia", "hf download --repo-type dataset pleisto/"]),
    ("wikipedia:a.json", ["wikipedia:a.json", "perhaps wikipedia_cn:a.json"]),
    ("a.json", ["name:path"]),
    ("", ["none given"])])
def test_a_wrong_spec_ends_in_one_line(spec, parts):
    with pytest.raises(SystemExit) as error:
        next(documents(spec))
    assert all(part in str(error.value) for part in parts)
    assert "\n" not in str(error.value)


def test_every_data_set_says_what_it_is_and_how_to_get_it():
    for table in TEXT, CHAT, PREFERENCE:
        for name, data_set in table.items():
            assert len(data_set.what) > 10, name
            assert len(data_set.get) > 10, name
            assert "\n" not in data_set.what + data_set.get, name


def test_records_in_are_documents_plus_reasons(tmp_path):
    bad = ["broken", '{"text": null}', '{"text": "短"}', "[1]", '{"text": ["a"]}']
    path = write(tmp_path / "a.jsonl", "\n".join([*map(dump, DOCS), *bad]))
    found = results(documents, f"text:{path}")
    assert sum(isinstance(d, str) for d in found) == 7
    assert sorted(str(d) for d in found if isinstance(d, Bad)) == [
        "broken JSON", "no text", "no text", "not an object", "too short"]


@pytest.fixture
def new_set():
    """A data set as a user adds it, with a mistake in it."""
    @corpora.corpus(TEXT, "new_set", "a data set with a mistake", "nowhere")
    def my_reader(record):
        return record["title"] + record["text"]
    yield
    del TEXT["new_set"]


def test_a_mistake_in_a_data_set_is_counted_and_names_the_first_record(tmp_path, new_set):
    rows = [
        {"title": "题", **DOCS[0]},
        *DOCS[1:],
        {"title": 1, "text": "字"}]
    path = write(tmp_path / "a.jsonl", dump_lines(rows))
    found = results(documents, f"new_set:{path}")
    assert found[0] == "题" + DOCS[0]["text"]
    assert len(found) == 8
    counted = {str(bad): n for bad, n in Counter(found[1:]).items()}
    assert list(counted.values()) == [6, 1]
    first, second = counted
    assert first == f"KeyError in my_reader(); first in {path}, record 2: 'title'"
    assert second.startswith("TypeError in my_reader(); first in")
    assert "record 8" in second
    assert "\n" not in second
    assert str(pickle.loads(pickle.dumps(found[1]))) == first  # as workers send it


@pytest.mark.parametrize("script, table", [
    ("prepare_pretrain.py", "TEXT"),
    ("prepare_sft.py", "CHAT")])
def test_the_report_counts_a_mistake_in_a_data_set_under_one_reason(tmp_path, tok, script, table):
    good = "record['text']"
    if table == "CHAT":
        good = f"corpora.pair({good}, {good})"
    code = (
        "import corpora\n"
        f"@corpora.corpus(corpora.{table}, 'new_set', 'what it is', 'how to get it')\n"
        f"def mine(record): return {good}")
    rows = [{"text": f"第{i}篇：{story(random.Random(i), 9)}"} for i in range(40)]
    rows += [{"title": str(i)} for i in range(300)]
    path = write(tmp_path / "a.jsonl", dump_lines(rows))
    done = run(
        script, tmp_path, f"--corpora=new_set:{path}", f"--tokenizer={tok.name}",
        "--data_dir=out", "--workers=1", "--val_fraction=0.3", code=code)
    assert done.rc == 0, done.err
    meta = json.loads((tmp_path / "out/meta.json").read_text("utf-8"))
    reason = f"KeyError in mine(); first in {path}, record 41: 'text'"
    assert meta["corpora"][f"new_set:{path}"]["dropped"] == {reason: 300}
    assert "record 41: 'text'" in done.out
