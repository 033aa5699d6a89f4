"""Raw files -> records -> texts to pretrain on, or dialogues to fine-tune on; and the cleaning of both.

    for corpus, text in documents("wikipedia_cn:data/wikipedia.json,text:my_texts/*.jsonl"): ...
    for corpus, messages in dialogues("alpaca:data/alpaca_gpt4_data_zh.json"): ...

A corpus is written `name:path`: the name of one of the functions below, which know the fields of a public data set,
and a file, a folder or a pattern. `text` is the one for texts of your own. To add a data set, add such a function.

Nothing in a file ends a run: what cannot be used comes out as a Bad, whose text is the reason it is counted under.
Files are streamed; memory holds a block and a record, never a file. `python corpora.py` prints the table of data sets.
"""
import codecs
import csv
import difflib
import glob
import hashlib
import html
import itertools
import json
import multiprocessing
import os
import re
import signal
import threading
import unicodedata
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Callable, NamedTuple

BLOCK = 1 << 20            # bytes that are read at a time
MAX_RECORD = 1 << 28       # bytes of the longest record that is tried; a longer one is broken, not long
MAX_DEPTH = 100            # of lists and objects in one another; pickle and every other recursion ends at some depth
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet")     # what is read of a folder, also with .gz, .zst


class Bad(Exception):
    """A record that cannot be used, and why, as its text. Readers yield it, the functions of the data sets raise it."""


# ---- files -> records: one reader per format ------------------------------------------------------------------------

def records(path, cut="line", progress=None):
    """Yield the records of a file: dicts of JSON, CSV and parquet, str of text files, Bad for what is broken.

    Compression and format are told by the content, not by the name, where the content tells. cut: where a document
    of a text file ends: "line", "blank" (at blank lines) or "file"; any of the last two also forces plain text.
    progress(n) is called now and then with n more bytes of the file read. Raises SystemExit if it cannot be opened.
    """
    try:
        raw = open(path, "rb")
    except OSError as error:
        raise SystemExit(f"{path}: cannot be opened ({error.strerror})") from None
    problems, seen = [], 0                                         # what a reader notices beside its records
    with raw:
        for record in itertools.chain(reader(raw, cut, problems), problems):
            yield Bad("nested too deeply") if is_deeper(record, MAX_DEPTH) else record
            if progress and raw.tell() > seen:
                progress(raw.tell() - seen)
                seen = raw.tell()
        if progress:
            progress(os.path.getsize(path) - seen)


def is_deeper(value, depth):
    """Whether lists and objects stand in one another more than `depth` times."""
    if not isinstance(value, (dict, list)) or depth == 0:
        return isinstance(value, (dict, list))
    for part in value.values() if isinstance(value, dict) else value:
        if isinstance(part, (dict, list)) and is_deeper(part, depth - 1):      # most parts are strings: no call for them
            return True
    return False


def reader(raw, cut, problems):
    """The iterator over records that fits the content of an open file."""
    if raw.peek(4)[:4] == b"PAR1":
        return parquet_records(raw.name, problems)
    name = raw.name.lower().removesuffix(".gz").removesuffix(".zst")
    if name.endswith((".csv", ".tsv")) and cut == "line":
        return csv_records(raw, "\t" if name.endswith(".tsv") else ",", problems)
    data = blocks(raw, problems)
    first = next(data, b"").removeprefix(codecs.BOM_UTF8)
    looks_like_json = re.match(rb'\s*(\{\s*["}]|\[\s*[\[{"\]])', first)
    if cut != "line" or not (looks_like_json or name.endswith((".json", ".jsonl"))):
        return text_records(raw, cut, problems)
    return json_records(first, itertools.chain([first], data), problems)


def blocks(raw, problems):
    """Yield the bytes of a plain, .gz or .zst file in blocks, as far as it can be unpacked."""
    raw.seek(0)
    magic = raw.peek(4)[:4]
    if magic[:2] == b"\x1f\x8b":
        unpacker, broken = lambda: zlib.decompressobj(wbits=31), zlib.error
    elif magic == b"\x28\xb5\x2f\xfd":
        zstandard = optional_package("zstandard", raw.name)
        unpacker, broken = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj, zstandard.ZstdError
    else:
        yield from iter(lambda: raw.read(BLOCK), b"")
        return
    unpack = None
    for packed in iter(lambda: raw.read(BLOCK // 16), b""):
        while packed:                                              # a file may hold several streams, one behind another
            unpack = unpack or unpacker()
            try:
                block = unpack.decompress(packed)
            except broken:
                problems.append(Bad("broken compression"))
                return
            if block:
                yield block
            packed, unpack = (unpack.unused_data.lstrip(b"\0"), None) if unpack.eof else (b"", unpack)
    if unpack:
        problems.append(Bad("truncated compression"))


def lines(data, problems):
    """Yield the lines of blocks of bytes, without their line feed."""
    parts = []                                                     # of a line that goes on in the next block
    for block in data:
        head, found, rest = block.partition(b"\n")
        parts.append(head)
        if found:
            yield b"".join(parts)
            *whole, last = rest.split(b"\n")
            yield from whole
            parts = [last]
        elif sum(map(len, parts)) > MAX_RECORD:
            problems.append(Bad("record too long"))
            parts = []
    if any(parts):
        yield b"".join(parts)


def json_records(first, data, problems):
    """Yield the values of JSONL, of a JSON array, or of JSON objects one behind another, pretty-printed or not."""
    line, scan = first.lstrip().partition(b"\n")[0], json.JSONDecoder(strict=False).raw_decode
    try:
        per_line = isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        per_line = False
    if not per_line:
        yield from json_stream(data)
        return
    for line in lines(data, problems):
        if not line.isspace() and line:
            text = line.decode("utf-8", "replace").strip(" \t\r\n")
            try:
                value, end = scan(text)
            except (ValueError, RecursionError):
                value, end = None, -1
            yield value if end == len(text) else Bad("broken JSON")


def json_stream(data):
    """Yield JSON values as they end, however they are separated; after a broken one, go on at the next object."""
    # Control characters become blanks, but for the line feed: inside a string it is the surest sign of a broken record
    blank = bytes(32 if i < 32 and i != 10 else i for i in range(256))
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    scan, separators = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    next_object = re.compile(r"\n[ ,]*(?=\{)|\}[ ,]*(?=\{)")

    def read(n):                                                   # about n more characters, "" at the end
        got = []
        while n > 0 and (block := next(data, b"")):
            got.append(decode(block.translate(blank)))
            n -= len(got[-1])
        return "".join(got)

    text, pos, indent, in_array, ended = "", 0, "", False, False
    while True:
        if gap := separators.match(text, pos)[0]:
            pos, indent = pos + len(gap), gap.rpartition("\n")[2]
        if text[pos:pos + 1] == ("]" if in_array else "["):
            pos, in_array = pos + 1, not in_array
            continue
        try:
            value, end = scan(text, pos)
            cut_off = end == len(text)                             # 12 may become 123
        except json.JSONDecodeError as error:
            value, end = Bad("broken JSON"), error.pos
            cut_off = error.pos > len(text) - 16 or error.msg.startswith("Unterminated")
        except (ValueError, RecursionError):                       # a number of 5,000 digits; a thousand open brackets
            value, end, cut_off = Bad("broken JSON"), pos, False
        if cut_off and not ended and len(text) - pos < MAX_RECORD:
            more = read(max(BLOCK, len(text) - pos))               # doubling: a long record is not scanned too often
            text, pos, ended = text[pos:] + more, 0, not more
            continue
        if pos == len(text):
            return
        yield value
        if isinstance(value, Bad):
            # An open bracket takes what follows for its own: go back to the first line that begins as this value does,
            start = text.find(f"\n{indent}{{", pos + 1, end + 1)
            if start < 0:                                          # or to that of the break, or go on behind it
                start = max(text.rfind("\n", pos, end + 1), pos + 1)
                start = start if text[start:start + 1] == "\n" else max(end, pos + 1)
            while not (found := next_object.search(text, start)) and not ended:
                more = read(BLOCK)
                text, start, ended = text[-1:] + more, 0, not more
            end = found.end() if found else len(text)
        pos = end


def encoding_of(raw):
    """ "utf-8", or "gb18030" if the first block that is not ASCII is no UTF-8 (a few bad bytes aside)."""
    for block in blocks(raw, []):
        if not block.isascii():
            errors, high = block.decode("utf-8", "replace").count("\ufffd"), block.translate(None, bytes(range(128)))
            return "utf-8" if errors * 5 <= len(high) else "gb18030"      # Chinese GBK as UTF-8: an error every 2 bytes
    return "utf-8"


def csv_records(raw, delimiter, problems):
    """Yield the rows of a CSV file in UTF-8 or GB18030 as {column: field}; fields may contain line feeds and quotes."""
    encoding = encoding_of(raw)
    raw_lines = lines(blocks(raw, problems), problems)
    decoded = (line.decode(encoding, "replace").replace("\0", "") + "\n" for line in raw_lines)
    csv.field_size_limit(MAX_RECORD)
    rows = csv.reader(itertools.chain([next(decoded, "").removeprefix("\ufeff")], decoded), delimiter=delimiter)
    columns = None
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error:
            yield Bad("broken CSV")
            continue
        if not columns:
            columns = [column.strip() for column in row]
        elif row:
            yield dict(zip(columns, row)) if len(row) >= len(columns) else Bad("broken CSV")


def text_records(raw, cut, problems):
    """Yield the documents of a text file in UTF-8 or GB18030: a line, what stands between blank lines, or all."""
    encoding, document, size = encoding_of(raw), [], 0
    for i, line in enumerate(lines(blocks(raw, problems), problems)):
        line = line.decode(encoding, "replace").removeprefix("\ufeff" if i == 0 else "").rstrip()
        document.append(line)
        size += len(line)
        ends = cut == "line" or cut == "blank" and not line or size > MAX_RECORD // 4     # no file is too large
        if ends:
            if size:
                yield "\n".join(document)
            document, size = [], 0
    if size:
        yield "\n".join(document)


def parquet_records(path, problems):
    """Yield the rows of a parquet file as dicts."""
    parquet = optional_package("pyarrow.parquet", path)
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=512):
            try:
                yield from batch.to_pylist()
            except ValueError:                                     # invalid UTF-8 in some row
                for i in range(batch.num_rows):
                    try:
                        yield from batch.slice(i, 1).to_pylist()
                    except ValueError:
                        yield Bad("broken parquet")
    except (ValueError, OSError):                                  # ArrowInvalid is a ValueError
        problems.append(Bad("broken parquet"))


def optional_package(name, path):
    """The package, which only some formats need; SystemExit that says what to install if it is not there."""
    try:
        return __import__(name, fromlist=["_"])
    except ImportError:
        raise SystemExit(f"{path}: reading this format needs a package: pip install {name.partition('.')[0]}") from None


# ---- records -> documents: one function per data set ----------------------------------------------------------------

class Corpus(NamedTuple):
    """A public data set: the function that knows its fields, what it is (with its licence), how to get it."""
    read: Callable
    what: str
    get: str
    cut: str = "line"


TEXT, CHAT = {}, {}
HF = "hf download --repo-type dataset "


def corpus(table, name, what, get, cut="line"):
    """Register the function below under a name in TEXT (record -> str) or CHAT (record -> messages)."""
    def register(function):
        table[name] = Corpus(function, what, get, cut)
        return function
    return register


def field(record, *names):
    """The text of the first of these fields that holds any; raises Bad if none does."""
    for name in names:
        if value := optional(record, name):
            return value
    raise Bad(f"no {names[0]}")


def optional(record, name):
    """The text of a field, "" if there is none."""
    if not isinstance(record, dict):
        raise Bad("not an object")
    value = record.get(name)
    return value.strip() if isinstance(value, str) else ""


def objects(record, name):
    """The objects in a list that a field holds; none if it holds something else."""
    value = record.get(name) if isinstance(record, dict) else None
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def joined(*parts):
    """The parts, a line each, without empty ones and without one that the next begins with (a repeated title)."""
    parts = [part for part in parts if part]
    return "\n".join(a for a, b in zip(parts, parts[1:] + [""]) if not b.startswith(a))


@corpus(TEXT, "text", "texts of your own: JSONL with `text` (perhaps `title`, `author`), or .txt, a document a line",
        'write one JSON object a line: {"text": "..."}')
@corpus(TEXT, "c4_zh", "C4 (mC4), Chinese part: cleaned web pages; ODC-BY",
        HF + 'allenai/c4 --include "multilingual/c4-zh.*" --local-dir data/c4')
@corpus(TEXT, "c4_en", "C4, English: cleaned web pages; ODC-BY", HF + 'allenai/c4 --include "en/*" --local-dir data/c4')
@corpus(TEXT, "dolma", "Dolma 1.7: English web, papers, code, books; ODC-BY",
        HF + 'allenai/dolma --include "urls/*" --local-dir dolma && wget -P data/dolma -i dolma/urls/v1_7.txt')
@corpus(TEXT, "medical", "shibing624/medical, pretrain part: medical encyclopaedia and textbooks; Apache-2.0",
        HF + 'shibing624/medical --include "pretrain/*" --local-dir data/medical')
@corpus(TEXT, "txt_line", "plain text files, a document a line", "put .txt files there")
@corpus(TEXT, "txt_blank", "plain text files, a blank line between documents", "put .txt files there", cut="blank")
@corpus(TEXT, "txt_file", "plain text files, a document a file", "put .txt files there", cut="file")
@corpus(TEXT, "clue_small", "CLUECorpusSmall: news, web forum, Wikipedia, comments; txt, blank line between documents",
        "see the links at https://github.com/CLUEbenchmark/CLUECorpus2020", cut="blank")
def plain(record):
    if isinstance(record, str):
        return record
    return joined(optional(record, "title"), optional(record, "author"), field(record, "text"))


@corpus(TEXT, "wikipedia_cn", "Chinese Wikipedia of 2023-07-20, filtered; CC BY-SA 3.0",
        HF + "pleisto/wikipedia-cn-20230720-filtered --local-dir data/wikipedia")
def wikipedia_cn(record):
    return field(record, "completion")


@corpus(TEXT, "baidubaike", "Baidu Baike, 5.63 million articles; no licence stated",
        HF + "xuqinyang/BaiduBaike-5.63M --local-dir data/baidubaike")
def baidubaike(record):
    sections = [joined(optional(s, "title"), optional(s, "content")) for s in objects(record, "sections")]
    if not (optional(record, "summary") or any(sections)):
        raise Bad("no summary")
    return joined(optional(record, "title"), optional(record, "summary"), *sections)


@corpus(TEXT, "wudao", "WuDaoCorpora Text, the open 200 GB of BAAI: cleaned web pages; terms on its page",
        "register at https://data.baai.ac.cn/details/WuDaoCorporaText and download")
def wudao(record):
    return joined(optional(record, "title"), field(record, "content"))


@corpus(TEXT, "tiny_stories_zh", "TinyStories translated into Chinese; CDLA-Sharing-1.0",
        HF + "adam89/TinyStoriesChinese --local-dir data/stories && tar xzf data/stories/*.tar.gz -C data/stories")
def tiny_stories_zh(record):
    return field(record, "story_zh")


@corpus(TEXT, "webtext2019zh", "community questions and answers, 4.1 million; MIT",
        "see the links at https://github.com/brightmart/nlp_chinese_corpus (webtext2019zh)")
def webtext2019zh(record):
    return joined(optional(record, "title"), optional(record, "desc"), field(record, "content"))


@corpus(TEXT, "baike_qa2019", "encyclopaedic questions and answers, 1.5 million; MIT",
        "see the links at https://github.com/brightmart/nlp_chinese_corpus (baike2018qa)")
def baike_qa2019(record):
    return joined(optional(record, "title"), optional(record, "desc"), field(record, "answer"))


@corpus(TEXT, "mnbvc", "MNBVC: Chinese web pages, news, Zhihu and much more; MIT",
        HF + "liwu/MNBVC --local-dir data/mnbvc  (or parts of it)")
def mnbvc(record):
    paragraphs = [optional(paragraph, "内容") for paragraph in objects(record, "段落")]
    if any(paragraphs):
        return joined(optional(record, "标题"), *paragraphs)
    return joined(optional(record, "title"), field(record, "text", "content"))


@corpus(TEXT, "medical_qa", "shibing624/medical, finetune part: questions and answers, as plain text; Apache-2.0",
        HF + 'shibing624/medical --include "finetune/*" --local-dir data/medical')
def instruction_text(record):
    return joined(field(record, "instruction"), optional(record, "input"), field(record, "output"))


ZHIHU = "Zhihu-KOL: questions and answers of Zhihu; no licence stated", HF + "wangrui6/Zhihu-KOL --local-dir data/zhihu"


@corpus(TEXT, "zhihu_kol", *ZHIHU)
def zhihu_text(record):
    return joined(field(record, "INSTRUCTION"), field(record, "RESPONSE"))


# ---- records -> dialogues -------------------------------------------------------------------------------------------

ROLES = {"system": "system", "user": "user", "human": "user", "client": "user", "prompter": "user", "问": "user",
         "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant",
         "counselor": "assistant", "model": "assistant", "答": "assistant"}


def dialogue(turns):
    """[(role, content)] -> [{"role", "content"}]: system at most once and first, then user and assistant in turn.

    A last turn of the user, which nobody answers, is left off. Raises Bad with the reason if the rest does not fit.
    """
    messages = []
    for role, content in turns:
        role, content = ROLES.get(role.lower() if isinstance(role, str) else None), normalise(content)
        expected = ("user", "assistant")[sum(message["role"] != "system" for message in messages) % 2]
        if role is None:
            raise Bad("unknown role")
        if role != expected and not (role == "system" and not messages):
            raise Bad("roles do not alternate")
        if not content:
            raise Bad("empty turn")
        messages.append({"role": role, "content": content})
    if messages and messages[-1]["role"] == "user":
        messages.pop()
    if not messages or messages[-1]["role"] == "system":
        raise Bad("no answer")
    return messages


def pair(question, answer):
    return dialogue([("user", question), ("assistant", answer)])


@corpus(CHAT, "alpaca", "instruction, input, output: alpaca-zh (GPT-4 answers) and its many relatives; research only",
        HF + "shibing624/alpaca-zh --local-dir data/alpaca")
@corpus(CHAT, "belle", "BELLE: instructions and dialogues, Chinese; GPL-3.0, research only",
        HF + "BelleGroup/train_1M_CN --local-dir data/belle")
@corpus(CHAT, "medical_qa", *TEXT["medical_qa"][1:3])
def alpaca(record):
    instruction, answer = joined(field(record, "instruction"), optional(record, "input")), field(record, "output")
    # BELLE's multi-turn records hold the dialogue so far: "Human:...\nAssistant:...\nHuman:...\nAssistant:"
    start, *parts = re.split(r"(?:^|\n)\s*(Human|Assistant)[:：]", instruction)
    if start.strip() or not parts:
        return pair(instruction, answer)
    turns = list(zip(parts[::2], parts[1::2]))
    if turns[-1][0] == "Assistant" and not turns[-1][1].strip():
        turns.pop()
    return dialogue(turns + [("Assistant", answer)])


@corpus(CHAT, "prompt", "prompt/response, prompt/answer or question/answer: pairs in JSON, CSV or parquet",
        'write one JSON object a line: {"prompt": "...", "response": "..."}')
def prompt(record):
    return pair(field(record, "prompt", "question", "instruction"),
                field(record, "response", "answer", "std_answer", "output"))


@corpus(CHAT, "medical_dialogue", "Chinese medical dialogues: questions to doctors, CSV in GBK; MIT",
        "git clone https://github.com/Toyhom/Chinese-medical-dialogue-data data/medical_dialogue")
def medical_dialogue(record):
    return pair(joined(optional(record, "title"), field(record, "ask", "title")), field(record, "answer"))


@corpus(CHAT, "zhihu_kol", *ZHIHU)
def zhihu_chat(record):
    return pair(field(record, "INSTRUCTION"), field(record, "RESPONSE"))


@corpus(CHAT, "sharegpt", "conversations[{from, value}] or [{role, content}]: ShareGPT, BELLE 3.5M, SMILE and others",
        HF + "shibing624/sharegpt_gpt4 --local-dir data/sharegpt")
@corpus(CHAT, "messages", "messages[{role, content}]: the form of OpenAI's API",
        'write one JSON object a line: {"messages": [{"role": "user", "content": "..."}, ...]}')
@corpus(CHAT, "smoltalk", "SmolTalk: English dialogues; Apache-2.0",
        HF + "HuggingFaceTB/smoltalk --local-dir data/smoltalk")
def conversation(record):
    turns = objects(record, "conversations") or objects(record, "messages")
    if not turns:
        raise Bad("no conversation")
    system = [("system", optional(record, "system"))] if optional(record, "system") else []
    return dialogue(system + [(turn.get("from", turn.get("role")), optional(turn, "value") or optional(turn, "content"))
                              for turn in turns])


# ---- cleaning -------------------------------------------------------------------------------------------------------

def characters(*rows):
    """The table of single characters, {character: replacement}, and the pattern that finds them."""
    table = {chr(code): replacement for codes, replacement in rows for code in codes}
    return re.compile("[" + "".join(f"\\U{ord(char):08x}" for char in table) + "]"), lambda match: table[match[0]]


# A rule is (name, pattern that must occur for the rule to be tried, pattern, replacement); they apply in this order.
# The second is None where the third itself is quick, as one is that begins with a plain character. NORMAL is right for
# any text, a program or a poem alike; WEB is for web pages, and would spoil an answer that shows some HTML.
NORMAL = (
    ("line ends are \\n", None, re.compile("[\r\u2028\u2029\x85]\n?"), "\n"),
    ("full-width blanks indent a printed paragraph", re.compile("\u3000"),
     re.compile("^[ \u3000]*\u3000[ \u3000]*", re.M), ""),
    ("characters nobody sees, and blanks and letters of odd width", None, *characters(
        ([*range(9), 11, 12, *range(14, 32), *range(127, 160)], ""),       # control characters
        ([0xAD, 0x200B, 0x200C, 0x200E, 0x200F, *range(0x202A, 0x202F), 0x2060, 0xFEFF], ""),      # 200D joins emoji
        (range(0xE000, 0xF900), ""),                               # private use: glyphs of some font of some web page
        (range(0xD800, 0xE000), "\ufffd"),                         # half a surrogate pair: cannot be written as UTF-8
        ([0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000], " "),      # blanks of any width
        *(([code], unicodedata.normalize("NFC", chr(code))) for code in (0x37E, 0x387, 0x1FEF)),    # Greek ; and · and `
        *(([code], chr(code - 0xFEE0)) for first, last in ("０９", "ＡＺ", "ａｚ")     # but ，！？ are Chinese as they are
          for code in range(ord(first), ord(last) + 1)))),
    ("blanks at the end of a line", re.compile("[ \t]\n"), re.compile(r"(?<![ \t])[ \t]+$", re.M), ""),
    ("more than one empty line", None, re.compile(r"\n\n\n+"), "\n\n"),
)

# A tag counts if it is unmistakable (closing, or with an attribute) or one that prose has no other use for: a command
# <source> and List<a> stay. So does what is quoted, `<div>`, or talked about: <p> 标签.
BARE = ("b|i|u|p|em|strong|span|div|font|br|hr|table|tbody|thead|tr|td|th|ul|ol|li|h[1-6]|center|blockquote|pre|html"
        "|head|body|sub|sup")
CLOSING = BARE + ("|a|img|script|style|title|code|form|input|button|label|select|option|iframe|embed|object|link|meta"
                  "|header|footer|nav|section|article|aside|main|figure|video|audio|small|big|strike|del|ins|dl|dt|dd"
                  "|ref")
TAG = re.compile(rf"""<(?: !--(?:(?!<!--).){{0,9999}}?-->
    | (script|style)\b[^<>]{{0,999}}>(?:(?!<script|<style).){{0,99999}}?</\1\s*> | (?<!`<)(?:
    (?:{BARE})\s*/?> | [a-z][a-z0-9]{{0,9}}\s+[a-z-]+\s*=\s*["'\w][^<>]{{0,999}}> | /(?:{CLOSING})\s*> )
    (?!\s*(?:标签|元素|标记|tag|element)) )""", re.X | re.I | re.S)
BLOCK_TAG = re.compile(r"</?(?:br|hr|p|div|table|tr|[uod]l|li|d[td]|h[1-6]|center|blockquote|pre|title)\b", re.I)

URL = r"(?:https?://|www\.)[\w./?=&%#:~+@!,;-]*[\w/]"
EMAIL = r"[\w.+-]{1,64}@[\w-]{1,64}(?:\.[\w-]{1,64}){1,4}"
PHONE = r"[+(（]?\d[\d()（）\-－—~/转 ]{4,30}\d"
LABEL = ("(?:电话|热线|手机|传真|邮箱|邮编|网址|官网|链接|微信|公众号|QQ|qq|Tel|tel|TEL|Fax|fax|FAX|E-mail|E-Mail|Email|email|e-mail"
         "|via)群?号?码?")
LABELLED = re.compile(rf"{LABEL}\s*[:：]")
CONTACT = rf"[\u4e00-\u9fff]{{0,6}}{LABEL}\s*[:：]\s*(?:{EMAIL}|{URL}|{PHONE}|[A-Za-z][\w-]{{4,19}}(?=\s*$))"
ENDS = r"(?=\s*(?:$|[，,、。；;|）)】]))"                             # an ordinary sentence would go on behind it

WEB = (
    ("HTML tags and comments", re.compile("</|<br|<BR|<!--|=[\"']"), TAG,
     lambda match: "\n" if BLOCK_TAG.match(match[0]) else ""),
    ("HTML entities", None, re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z]{2,8}\d?);"),
     lambda match: html.unescape(match[0])),
    *NORMAL,
    ("contacts: 电话：010-62345678, QQ群：123456", LABELLED,
     re.compile(rf"[（(【]\s*{CONTACT}(?:\s*[，,、；;|]?\s*{CONTACT})*\s*[）)】]"
                rf"|(?:^|[，,、；;|]|(?<=[。！？\s]))[ \t]*{CONTACT}{ENDS}", re.M), ""),
    ("lines of nothing but an address", re.compile(r"@|http|www\."),
     re.compile(rf"^[ \t]*(?:{URL}|{EMAIL})[ \t]*(?:\n|\Z)", re.M), ""),
    ("e-mail addresses, but not ssh user@host.com", re.compile("@"),
     re.compile(rf"[（(<]{EMAIL}[>)）]|(?<![\w.+:/@`'\"=-])(?<![A-Za-z0-9] ){EMAIL}(?![\w:/@`'\"])", re.A), ""),
    ("！！！！！ is ！！！", None, re.compile("|".join(re.escape(mark) * 4 + "+" for mark in "！!？?。，、；~～")),
     lambda match: match[0][:3]),
    ("an ellipsis or a dash has an end", None, re.compile(r"………+|———+|\.\.\.\.\.\.\.+|·······+"),
     lambda match: match[0][:2 if match[0][0] in "…—" else 6]),
    NORMAL[-2], NORMAL[-1],                                        # again, as what was removed leaves blanks and lines
)


# Most texts hold nothing that a rule looks for, and a few quick looks spare them the rules: characters that rules begin
# with and prose has no use for, marks in a row, blanks at the end of a line, addresses.
ODD = re.compile(NORMAL[2][2].pattern[:-1] + "\r\t\u2028\u2029<&@]")
RUN = re.compile(r"([！!？?。，、；~～…—.·\n])\1\1")


def is_suspicious(text):
    """Whether some rule might change the text."""
    return (ODD.search(text) or RUN.search(text) or " \n" in text or "http" in text or "www." in text
            or (":" in text or "：" in text) and LABELLED.search(text))


def apply(rules, text):
    """The text after all rules, in Unicode's composed form. Not NFKC, which would turn ， into a comma and ² into 2."""
    for _, hint, pattern, replacement in rules if is_suspicious(text) else ():
        if hint is None or hint.search(text):
            text = pattern.sub(replacement, text)
    return (text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)).strip()


def normalise(text):
    """The text of a dialogue, cleaned of what is wrong in any text."""
    return apply(NORMAL, text)


def clean(text):
    """The text of a document, cleaned of that and of what web pages bring along."""
    return apply(WEB, text)


def hash64(text):
    """64 bits of a text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


# ---- quality --------------------------------------------------------------------------------------------------------

MIN_CHARS = 12             # characters of the shortest document: a five-character quatrain has 24
MIN_LETTERS = 0.4          # share of the characters that must be Chinese or letters of any alphabet
MAX_BROKEN = 0.001         # share of U+FFFD, which stands for bytes that were no UTF-8
MAX_REPEATED = 0.6         # share of the text in clauses that occurred before (after Rae et al. 2021, arXiv:2112.11446)
# In UTF-8 a letter is recognised by its first byte: ASCII, Latin to Arabic, Chinese (E4-E9), Hangul; kana pass as none
FIRST_BYTES = bytes([*range(65, 91), *range(97, 123), *range(0xC3, 0xE0), *range(0xE4, 0xEE)])


def quality(text):
    """The reason to drop a cleaned text, None to keep it. What its first part shows is enough for most texts."""
    part = text[:len(text) * 5 // 8]
    if len(text) < MIN_CHARS:
        return "too short"
    if n_letters(part) < MIN_LETTERS * len(text) and n_letters(text) < MIN_LETTERS * len(text):
        return "too little Chinese or letters"
    if text.count("\ufffd") > MAX_BROKEN * len(text):
        return "broken characters"
    different = 4 + min(200, len(text)) / 20
    if len(set(text[:24])) < different and len(set(text[:200])) < different:
        return "too few different characters"
    whole = clauses(part)
    whole.pop()                                                    # the last one may go on behind the part
    if len("".join(set(whole))) < (1 - MAX_REPEATED) * (len(text) - len(whole)):      # each has a mark behind it
        every = clauses(text)
        if len(every) >= 8 and len("".join(set(every))) < (1 - MAX_REPEATED) * sum(map(len, every)):
            return "too much repetition"
    return None


def n_letters(text):
    raw = text.encode("utf-8")
    return len(raw) - len(raw.translate(None, FIRST_BYTES))


def clauses(text):
    for mark in "，！？；\n .,":                                     # several times as fast as re.split
        text = text.replace(mark, "。")
    return text.split("。")


# ---- all together ---------------------------------------------------------------------------------------------------

def sources(spec, table):
    """[(corpus, name, files)] of "name:path,name:path", corpus being one such part of the string as it stands.

    table: TEXT or CHAT. Raises SystemExit with one sentence for an unknown name, or files that are not there.
    """
    found = []
    for part in filter(None, map(str.strip, spec.split(","))):
        name, colon, path = part.partition(":")
        if name not in table or not path:
            near = difflib.get_close_matches(name, table, n=1)
            raise SystemExit(f"corpora: {part!r} is not of the form name:path with one of the names {', '.join(table)}"
                             + (f"; perhaps {near[0]}:{path}" if near and near[0] != name else ""))
        files = files_at(path)
        if not files:
            raise SystemExit(f"{path}: no such file, or a folder without data. {name} is {table[name].what}. "
                             f"To get it: {table[name].get}")
        if part in [corpus for corpus, _, _ in found]:
            raise SystemExit(f"corpora: {part} is listed twice")
        found.append((part, name, files))
    if not found:
        raise SystemExit("corpora: none given; it takes name:path,name:path with the names " + ", ".join(table))
    return found


def files_at(path):
    """The files that a file name, a folder (searched below, hidden files aside) or a pattern stands for, sorted."""
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        inside = glob.glob(os.path.join(glob.escape(path), "**", "*"), recursive=True)
        return sorted(f for f in inside if os.path.isfile(f)
                      and f.lower().removesuffix(".gz").removesuffix(".zst").endswith(SUFFIXES))
    return sorted(f for f in glob.glob(path, recursive=True) if os.path.isfile(f))


def document(name, record):
    """The clean text of a record of the corpus of this name; raises Bad with the reason if there is none."""
    if isinstance(record, Bad):
        raise record
    text = clean(TEXT[name].read(record))
    if reason := quality(text):
        raise Bad(reason)
    return text


def messages(name, record):
    """The dialogue in a record of the corpus of this name; raises Bad with the reason if there is none."""
    if isinstance(record, Bad):
        raise record
    return CHAT[name].read(record)


def documents(spec):
    """Yield (corpus, clean text, or Bad with the reason) for every record of the corpora, in order."""
    yield from each(spec, TEXT, document)


def dialogues(spec):
    """Yield (corpus, [{"role", "content"}, ...], or Bad with the reason) for every record of the corpora, in order."""
    yield from each(spec, CHAT, messages)


def each(spec, table, read):
    for corpus, name, files in sources(spec, table):
        for path in files:
            for record in records(path, table[name].cut):
                try:
                    yield corpus, read(name, record)
                except Bad as bad:
                    yield corpus, bad


# ---- worker processes -----------------------------------------------------------------------------------------------

def in_order(function, items, n_workers, begin, *arguments):
    """Yield function(item) of every item, in order, worked out by processes that have called begin(*arguments) first.

    A few items are under way at a time: the reading does not run away from the workers. One worker is this process
    itself. Raises SystemExit if a worker dies.
    """
    if n_workers == 1:
        begin(*arguments)
        yield from map(function, items)
        return
    context, waiting = multiprocessing.get_context("spawn"), deque()       # the same everywhere, and safe beside threads
    pool = ProcessPoolExecutor(n_workers, context, start_worker, (begin, arguments))
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * n_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise SystemExit("a worker process died, most likely for want of memory; try a smaller --workers "
                         f"(it was {n_workers})") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def start_worker(begin, arguments):
    """What a worker does first: leave Ctrl-C to the main process, but end when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main_process = multiprocessing.parent_process()
    threading.Thread(target=lambda: (main_process.join(), os._exit(1)), daemon=True).start()
    begin(*arguments)


@contextmanager
def interruptible(folder):
    """Let SIGTERM clean up on its way out, as Ctrl-C does, and both end in one sentence."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; what {folder} held before is untouched, run the same command again") from None


if __name__ == "__main__":
    for title, table in ("for pretraining", TEXT), ("for fine-tuning", CHAT):
        print(f"{title}:")
        for name, data_set in table.items():
            print(f"  {name:<17} {data_set.what}\n{'':20}{data_set.get}")
