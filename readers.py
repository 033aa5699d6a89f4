"""Files -> records, and records -> results by worker processes. Knows no data set.

Nothing in a file ends a run: what cannot be used is yielded as Bad(reason) and counted by callers.
Files are streamed: memory holds a block and a record, never a file.
"""
import bz2
import codecs
import csv
import glob
import gzip
import itertools
import json
import lzma
import multiprocessing
import os
import re
import signal
import sys
import threading
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

BLOCK = 1 << 16            # bytes that are read at a time; small, as each JSON error scans them
MAX_RECORD = 1 << 28       # bytes of the longest record; a longer record counts as broken
MAX_CELL = 1 << 24         # characters of the longest cell of a CSV file
MAX_DEPTH = 100            # of nested lists and objects: pickle has a limit as well
CONTROLS = bytes([*range(9), *range(14, 27), *range(28, 32)])          # no text contains these
COMMON = re.compile("[\\s -~\u2010-\u2030\u3000-\u30ff\u4e00-\u9fff\uff00-\uffef]")
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet",     # read in a folder
            ".zip", ".tar", ".tgz", ".7z", ".rar", ".pdf")             # and refused in a folder
PACKED = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ\0": lzma}
ARCHIVES = {b"PK\3\4": "zip archive", b"7z\xbc\xaf": "7z archive", b"Rar!": "rar archive",
            b"%PDF": "PDF", b"\xd0\xcf\x11\xe0": "old Office file"}
ASCII_BASED = {"utf-8", "gb18030", "big5hkscs"}         # encodings in which ASCII is one byte
REFUSED = {*ARCHIVES.values(), "tar archive", "binary file"}
LENIENT = json.JSONDecoder(strict=False)                # takes control characters in strings


class Bad(Exception):
    """A record that cannot be used: Bad(reason) or Bad(reason, example).

    Two of the same reason are equal, so a Counter of them shows the first example.
    """

    def __str__(self):
        return "; ".join(self.args)

    def __eq__(self, other):
        return isinstance(other, Bad) and self.args[0] == other.args[0]

    def __hash__(self):
        return hash(self.args[0])


def files_at(path):
    """The files of a name, a folder (with those below it, but no hidden ones) or a pattern."""
    found = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
    seen = set()
    for folder, inner, names in os.walk(path, followlinks=True):     # of a file there is nothing
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        place = os.path.realpath(folder)
        if place in seen:                             # links to a folder above would never end
            inner.clear()
        seen.add(place)
        found += [os.path.join(folder, name) for name in names if not name.startswith(".")
                  and bare(name).endswith(SUFFIXES)]
    once = {os.path.realpath(file): file for file in sorted(found, reverse=True)}
    return sorted(file for file in once.values() if os.path.isfile(file))


def bare(name):
    """The name in lower case, without the suffix of a compression."""
    return re.sub(r"\.(gz|bz2|xz|zst)$", "", name.lower())


def records(path, cut="line", progress=None):
    """Yield the records of a file: dicts of JSON, CSV and parquet, str of text files, Bad.

    Compression, format and encoding are recognised by the content where possible, not by the name.
    cut: where a document of a text file ends: "line", "blank" (at blank lines) or "file"; the last
    two force plain text. progress(n) is called now and then with n more bytes of the file read.
    Raises SystemExit if the file cannot be opened.
    """
    try:
        raw = open(path, "rb")
    except OSError as error:
        raise SystemExit(f"{path}: cannot be opened ({error.strerror})") from None
    problems, seen = [], 0                            # problems: Bad of the file as a whole
    with raw:
        for record in itertools.chain(reader(raw, cut, problems), problems):
            if isinstance(record, (dict, list)) and is_deeper(record, MAX_DEPTH):
                yield Bad("nested too deeply")
            else:
                yield from inner_records(record)
            if progress and raw.tell() > seen:
                progress(raw.tell() - seen)
                seen = raw.tell()
        if progress:
            progress(os.path.getsize(path) - seen)


def is_deeper(value, depth):
    """Whether the lists and objects in a list or object are nested more than `depth` deep."""
    if depth == 0:
        return True
    for part in value.values() if isinstance(value, dict) else value:
        if isinstance(part, (dict, list)) and is_deeper(part, depth - 1):
            return True
    return False


def inner_records(record):
    """The objects of an inner list, as [[{...}], [{...}]] has; but turns of a dialogue stay one."""
    if isinstance(record, list) and record and all(
            isinstance(item, dict) and not item.keys() & {"role", "from"} for item in record):
        return record
    return [record]


def reader(raw, cut, problems):
    """The iterator over records that fits the content of an open file."""
    if raw.peek(4)[:4] == b"PAR1":
        return parquet_records(raw.name, problems)
    name, data = bare(raw.name), blocks(raw, problems)
    if name.endswith((".csv", ".tsv")) and cut == "line":
        return csv_records(data, "\t" if name.endswith(".tsv") else ",", problems)
    first = take(data, BLOCK, b"\n")
    looks_like_json = re.match(rb'\s*(\{\s*["}]|\[\s*[\[{"\]])', first)
    data = itertools.chain([first], data)
    if cut != "line" or not (looks_like_json or name.endswith((".json", ".jsonl"))):
        return text_records(data, cut, problems)
    return json_records(first, data, problems)


def optional_package(name, path):
    """Import a package that only some formats need; SystemExit says what to install without it."""
    try:
        return __import__(name, fromlist=["_"])
    except ImportError:
        package = name.partition(".")[0]
        raise SystemExit(f"{path}: reading this format needs a package: pip install {package}"
                         ) from None


# ---- bytes: compression and encoding -------------------------------------------------------------

def blocks(raw, problems):
    """Yield the content of an open file in blocks of UTF-8, unpacked and decoded."""
    data = unpacked(raw, problems)
    head = take(data, 4096)
    encoding = archive_of(head) or encoding_of(head)
    while head and not encoding:
        yield head                                    # ASCII is the same in all encodings
        head = take(data, 4096)
        encoding = encoding_of(head)
    while encoding in ASCII_BASED and len(head) < 1 << 20 and len(high_bytes(head)) < 256:
        more = take(data, len(head))                  # a few bytes, perhaps damage, must not decide
        if not more:
            break
        head += more
        encoding = encoding_of(head)
    if not head:
        return
    if encoding in REFUSED:
        problems.append(Bad(f"{encoding}, not text: unpack or convert it first"))
    elif encoding == "utf-8":
        yield head.removeprefix(codecs.BOM_UTF8)
        yield from data
    else:
        for text in codecs.iterdecode(itertools.chain([head], data), encoding, "replace"):
            yield text.encode("utf-8")


def archive_of(head):
    """The name of what a file is, if its first bytes are those of an archive."""
    for start, name in ARCHIVES.items():
        if head.startswith(start):
            return name
    return "tar archive" if head[257:262] == b"ustar" else None


def take(data, n, stop=b"\0\0\0\0"):
    """The next n bytes or a little more; fewer where the data end, or a block holds `stop`."""
    parts, size = [], 0
    for block in data:
        parts.append(block)
        size += len(block)
        if size >= n or stop in block:
            break
    return b"".join(parts)


def high_bytes(block):
    """The bytes that are not ASCII: those that tell encodings apart."""
    return block.translate(None, bytes(range(128)))


def encoding_of(block):
    """The encoding that fits the bytes best; None for ASCII, "binary file" if they are no text."""
    n, zeros = len(block), block.count(0)
    high = high_bytes(block)
    broken = block.decode("utf-8", "replace").count("\ufffd") * 5 > len(high)   # a few are damage
    if block[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        if broken and (zeros or 2 * len(high) > n):
            return "utf-16"
    elif 200 * zeros > n and (8 * zeros > n or 4 * len(high) > n):
        for encoding in "utf-16-le", "utf-16-be":
            text = block.decode(encoding, "replace")
            if len(COMMON.sub("", text)) < 0.1 * len(text):
                return encoding
    if n - len(block.translate(None, CONTROLS)) > n / 10:
        return "binary file"
    if not high:
        return None
    if broken:                            # count pairs in the rows of frequent characters
        pairs = re.findall(rb"[\x81-\xfe][\x40-\x7e\x80-\xfe]", block)
        gb = sum(0xA1 <= a <= 0xD7 and b >= 0xA1 for a, b in pairs)
        big5 = sum(0xA1 <= a <= 0xC6 and not 0x7F <= b < 0xA1 for a, b in pairs)
        if 2 * max(gb, big5) > 0.7 * len(high):
            return "big5hkscs" if big5 > 1.1 * gb else "gb18030"
    return "utf-8"


def unpacked(raw, problems):
    """Yield the bytes of a plain, .gz, .bz2, .xz or .zst file, as far as it can be unpacked."""
    magic = raw.peek(6)[:6]
    file = raw
    for start, module in PACKED.items():
        if magic.startswith(start):
            file = module.open(raw)
    data = iter(lambda: file.read1(BLOCK), b"")
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        data = unpacked_zst(raw)
    try:
        yield from data
    except EOFError:
        problems.append(Bad("truncated compression"))
    except (OSError, zlib.error, lzma.LZMAError):
        problems.append(Bad("broken compression"))


def unpacked_zst(raw):
    """Yield the bytes of a .zst file. Raises EOFError if it is truncated, OSError if broken."""
    zstandard = optional_package("zstandard", raw.name)
    frame = None
    for packed in iter(lambda: raw.read(1 << 10), b""):             # 1 KB can hold 32 MB of zeros
        while packed:                                               # a file may hold several frames
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                data = frame.decompress(packed)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from None
            yield from (data[i:i + BLOCK] for i in range(0, len(data), BLOCK))
            packed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame:
        raise EOFError


def lines(data, problems):
    """Yield the lines of blocks of bytes, without their line feed."""
    parts, size = [], 0                               # of a line that goes on in the next block
    for block in data:
        head, found, rest = block.partition(b"\n")
        parts.append(head)
        size += len(head)
        if found:
            yield b"".join(parts)
            *whole, last = rest.split(b"\n")
            yield from whole
            parts, size = [last], len(last)
        elif size > MAX_RECORD:
            problems.append(Bad("record too long"))
            parts, size = [], 0
    if any(parts):
        yield b"".join(parts)


# ---- formats -------------------------------------------------------------------------------------

def json_records(first, data, problems):
    """Yield the values of JSONL, of a JSON array, or of JSON objects in sequence, pretty or not."""
    value = json_line(first.lstrip().partition(b"\n")[0])
    if not isinstance(value, dict) or not value:      # {} may stand before anything
        yield from json_stream(data)
        return
    for line in lines(data, problems):
        if line and not line.isspace():
            yield json_line(line)


def json_line(line):
    """The value in a line of JSONL, or Bad."""
    try:
        return LENIENT.decode(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return Bad("broken JSON")


def json_stream(data):
    """Yield JSON values however separated; after a broken one, go on at the next object."""
    # Control characters become blanks, except the line feed: a string with one is not closed
    blank = bytes(32 if i < 32 and i != 10 else i for i in range(256))
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    scan, separators = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    next_object = re.compile(r"\n[ ,]*(?=\{)|\}[ ,]*(?=\{)")

    def read(n):                                      # more text, "" at the end
        return decode(take(data, max(n, 4)).translate(blank))    # 4 bytes hold a whole character

    text, pos, indent, in_array, ended, value = "", 0, "", False, False, None
    while True:
        if gap := separators.match(text, pos)[0]:
            pos, indent = pos + len(gap), gap.rpartition("\n")[2]
        if text[pos:pos + 1] == ("]" if in_array else "["):
            pos, in_array = pos + 1, not in_array
            continue
        try:
            found, end = scan(text, pos)
            cut_off = end == len(text)                # 12 may become 123
        except json.JSONDecodeError as error:
            found, end = Bad("broken JSON"), error.pos
            cut_off = error.pos > len(text) - 16 or error.msg.startswith("Unterminated")
        except (ValueError, RecursionError):          # 5,000 digits, or a thousand open brackets
            found, end, cut_off = Bad("broken JSON"), pos, False
        if cut_off and not ended and len(text) - pos < MAX_RECORD:
            # 3 bytes a character: doubling, so that long records stay linear
            more = read(max(BLOCK, 3 * (len(text) - pos)))
            text, pos, ended = text[pos:] + more, 0, not more
            continue
        if pos == len(text):
            if in_array and not isinstance(value, Bad):
                yield Bad("JSON array without an end")
            return
        value = found
        yield value
        if isinstance(value, Bad):
            # If a bracket was not closed, the next records were read as parts of this value. Go
            # back to the first line that begins as this value does, else to the line of the error,
            # else continue after the error
            start = text.find(f"\n{indent}{{", pos + 1, end + 1)
            if start < 0:
                start = text.rfind("\n", pos + 1, end + 1)
            if start < 0:
                start = max(end, pos + 1)
            while not (following := next_object.search(text, start)) and not ended:
                more = read(BLOCK)
                text, start, ended = text[-1:] + more, 0, not more
            end = following.end() if following else len(text)
        pos = end


def csv_records(data, delimiter, problems):
    """Yield the rows of CSV as {column: field}; fields may contain line feeds and quotes.

    If a quote is never closed, only its row is lost: the lines after it are read again.
    """
    source = (line.decode("utf-8", "replace").replace("\0", "") + "\n"
              for line in lines(data, problems))
    csv.field_size_limit(MAX_CELL)
    taken, columns, repeats = [], None, 0             # taken: lines of this row, None at the end

    def noted(source):
        for line in source:
            taken.append(line)
            yield line
        taken.append(None)

    rows = csv.reader(noted(source), delimiter=delimiter)
    while True:
        taken.clear()
        try:
            row = next(rows)
            whole = taken[-1] is not None             # else the file ended inside quotes
        except StopIteration:
            return
        except csv.Error:
            row, whole = [], False
        if not whole:
            yield Bad("broken CSV")
            if taken[1:-1] and repeats < 100:         # limits the time for files full of quotes
                repeats += 1
                source = itertools.chain(filter(None, taken[1:]), source)
                rows = csv.reader(noted(source), delimiter=delimiter)
        elif not columns:
            columns = [column.strip() for column in row]
        elif row:
            fits = len(row) >= len(columns) and not any(row[len(columns):])
            yield dict(zip(columns, row)) if fits else Bad("broken CSV")


def text_records(data, cut, problems):
    """Yield the documents of a text: a line, what stands between blank lines, or everything."""
    document, size = [], 0
    for line in lines(data, problems):
        line = line.decode("utf-8", "replace").rstrip()
        document.append(line)
        size += len(line)
        if cut == "line" or cut == "blank" and not line or size > MAX_RECORD // 4:
            if size:
                yield "\n".join(document)
            document, size = [], 0
    if size:
        yield "\n".join(document)


def parquet_records(path, problems):
    """Yield the rows of a parquet file as dicts, without dates and times.

    No text is in those, and Python has no room for all of them, as for the year 10000.
    """
    parquet = optional_package("pyarrow.parquet", path)
    try:
        file = parquet.ParquetFile(path)
        leaves = (file.schema.column(i) for i in range(len(file.schema)))
        columns = [leaf.path for leaf in leaves if leaf.physical_type != "INT96"
                   and leaf.logical_type.type not in ("DATE", "TIME", "TIMESTAMP")]
        for batch in file.iter_batches(batch_size=512, columns=columns):
            try:
                yield from batch.to_pylist()
            except (ValueError, OverflowError):       # invalid UTF-8 in some row, or a long time
                for i in range(batch.num_rows):
                    try:
                        yield from batch.slice(i, 1).to_pylist()
                    except (ValueError, OverflowError):
                        yield Bad("broken parquet")
    except (ValueError, OSError):                     # ArrowInvalid is a ValueError
        problems.append(Bad("broken parquet"))


# ---- worker processes ----------------------------------------------------------------------------

def in_order(function, items, n_workers, begin, *arguments):
    """Yield function(item) of every item, in order, from processes that called begin(*arguments).

    n_workers: 0 is one per core; with one worker all happens in this process. A few items are in
    progress at a time, so that reading does not run ahead of the workers. Raises SystemExit if a
    worker dies.
    """
    n_workers = n_workers or os.cpu_count()
    if n_workers == 1:
        begin(*arguments)
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")    # the same everywhere, and safe with threads
    stop = context.Event()
    pool = ProcessPoolExecutor(n_workers, context, start_worker, (stop, begin, arguments))
    waiting = deque()
    try:
        for item in items:
            with postponing():                        # it starts workers, one after the other
                waiting.append(pool.submit(unless_stopped, function, item))
            if len(waiting) > 2 * n_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except (KeyboardInterrupt, GeneratorExit):            # nobody wants the rest
        stop.set()                # a worker that is killed may leave half a result, and the pool
        raise                     # would wait for the other half
    except BrokenProcessPool:
        raise SystemExit("a worker process died, most likely for want of memory; try a smaller "
                         f"--workers (it was {n_workers})") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


received, postponed = [], False                       # signals; whether they wait, see postponing()


@contextmanager
def postponing():
    """Let Ctrl-C and SIGTERM wait: half-started workers would end in a traceback.

    Workers inherit that Ctrl-C is blocked, and never see it.
    """
    global postponed
    postponed = True
    if os.name != "nt":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        postponed = False
        if os.name != "nt":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    if received:
        raise KeyboardInterrupt


def unless_stopped(function, item):
    return None if stopped.is_set() else function(item)


def start_worker(stop, begin, arguments):
    """Prepare a worker, which ends when the main process is killed."""
    global stopped
    stopped = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)      # not inherited on Windows
    main_process = multiprocessing.parent_process()
    threading.Thread(target=lambda: (main_process.join(), os._exit(1)), daemon=True).start()
    begin(*arguments)


@contextmanager
def interruptible(what):
    """Let SIGTERM clean up as Ctrl-C does; both end in one sentence and the shell's exit code.

    what: the file or folder that an interrupted run leaves as it was.
    """
    def interrupt(number, frame):
        received.append(number)
        for each in signal.SIGINT, signal.SIGTERM:
            signal.signal(each, signal.SIG_IGN)       # a second Ctrl-C must not stop the clean-up
        if not postponed:
            raise KeyboardInterrupt

    received.clear()
    for number in signal.SIGINT, signal.SIGTERM:
        if signal.getsignal(number) != signal.SIG_IGN:                # nohup ignores SIGINT
            signal.signal(number, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted; {what} is as it was before, run the same command again",
              file=sys.stderr)
        raise SystemExit(128 + received[0]) from None


# ---- what the user sees --------------------------------------------------------------------------

def print_report(rows):
    """Print {name: {figure: number, "dropped": {reason: count}}}: a table, then the reasons."""
    figures = [name for name in next(iter(rows.values())) if name != "dropped"]
    table = [["", *figures]]
    for name, row in rows.items():
        table.append([name, *(f"{row[figure]:,}" if figure in row else "" for figure in figures)])
    widths = [max(map(len, column)) for column in zip(*table)]
    for name, *cells in table:
        print(f"{name:<{widths[0]}}", *map(str.rjust, cells, widths[1:]), sep="  ")
    for name, row in rows.items():
        for reason, n in Counter(row.get("dropped", {})).most_common():
            print(f"{n:>10,} dropped: {reason} ({name})")
