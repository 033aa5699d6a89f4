"""Raw corpora -> cleaned, without duplicates, encoded, shuffled: train.bin, val.bin and meta.json for pretrain.py.

    python prepare_pretrain.py --corpora=wikipedia_cn:data/wikipedia,baidubaike:data/563w_baidubaike.json

Worker processes turn records into token ids and MinHash signatures, which the main process appends to scratch files in
data_dir. When all is read it marks duplicates, shuffles what is left and copies it, document by document, to the bins.
Memory grows by less than 100 bytes per document and not with their length; nothing is truncated; the same input and
constants give the same bytes with any number of workers. corpora.py knows the corpora and says what is cleaned.
"""
import errno
import hashlib
import json
import os
import struct
from collections import Counter
from contextlib import closing, contextmanager

import numpy as np
from tqdm import tqdm

import config
from corpora import TEXT, Bad, document, raw_records, sources
from readers import in_order, interruptible
from tokenizer import load

corpora        = "text:data/demo/stories.jsonl"   # name:path,name:path: files, folders, patterns; see python corpora.py
tokenizer      = "data/tokenizer.model"           # made by train_tokenizer.py, ChatGLM2's, gpt2, or a tiktoken file
data_dir       = "data/pretrain"                  # where train.bin, val.bin and meta.json go; scratch space too
val_fraction   = 0.01                             # share of the documents, chosen by a hash of their text, in val.bin
dedup          = True                             # drop exact and near duplicates; the first in the input stays
jaccard        = 0.8                              # similarity of shingle sets from which two documents are the same
shingle        = 5                                # characters per shingle
n_permutations = 256                              # minima in a signature, a byte each; more of them estimate better
n_bands        = 32                               # documents that agree on a whole band are compared; divides the above
seed           = 1337                             # of the shuffle and the hash functions, from 0 up
workers        = 0                                # processes that clean and encode; 0 = one per core
constants = config.override(globals())

BATCH_CHARS = 1 << 17      # characters of raw records that a worker gets at a time: their shingles fit its cache
PIECE_CHARS = 1 << 20      # a longer document is encoded in pieces, cut behind a line: encoders need memory by length
GATHER_TOKENS = 1 << 26    # tokens of the shuffled bin that are in memory at a time (128 MB)
# what is kept in memory of every document
DOCUMENT = np.dtype([("hash", "<u8"), ("tokens", "<u4"), ("bytes", "<u4"), ("corpus", "<u2")])


# ---- in the workers: records -> token ids, signatures ---------------------------------------------------------------

def begin(tokenizer, settings):
    """What a worker needs for all batches."""
    global worker_tokenizer, worker_settings
    worker_tokenizer, worker_settings = load(tokenizer), settings


def encode_batch(batch):
    """[(corpus number, corpus name, where, record)] -> (ids, documents, signatures, {(corpus number, Bad): dropped}).

    ids: bytes of uint16, eos behind every document; documents: array of DOCUMENT; signatures (n, n_permutations) uint8.
    """
    texts, numbers, dropped = [], [], Counter()
    for number, name, where, record in batch:
        try:
            texts.append(document(name, record, where))
            numbers.append(number)
        except Bad as bad:
            dropped[number, bad] += 1
    raw = [text.encode("utf-8") for text in texts]
    ids = encode(worker_tokenizer, texts)
    documents = np.zeros(len(texts), DOCUMENT)
    documents["hash"] = [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") for text in raw]
    documents["tokens"], documents["bytes"], documents["corpus"] = list(map(len, ids)), list(map(len, raw)), numbers
    found = signatures(texts, documents["hash"], **worker_settings) if worker_settings else None
    return b"".join(struct.pack(f"<{len(one)}H", *one) for one in ids), documents, found, dropped


def encode(tokenizer, texts):
    """The ids of every text with eos behind them."""
    parts, owners = [], []
    for i, text in enumerate(texts):
        start = 0
        while start < len(text):
            end = start + PIECE_CHARS
            end = len(text) if end >= len(text) else text.rfind("\n", start, end) + 1 or end
            parts.append(text[start:end])
            owners.append(i)
            start = end
    ids = [[] for _ in texts]
    for i, part in zip(owners, tokenizer.encode_batch(parts)):
        ids[i] = ids[i] + part if ids[i] else part
    for document in ids:
        document.append(tokenizer.eos_id)
    return ids


def signatures(texts, hashes, shingle, n_permutations, seed):
    """MinHash signatures (n, n_permutations) uint8: the share of equal bytes in two rows estimates the Jaccard
    similarity of the sets of shingles, substrings of `shingle` characters (plus 1/256 for bytes equal by chance).

    White space and the width of punctuation are left out, as copies often differ in these only.
    A text too short for a single shingle gets a signature of its own hash, similar to no other.
    Sources: Broder 1997, "On the resemblance and containment of documents"; keeping only the low bits of each minimum:
    Li and Konig 2010, "b-bit minwise hashing".
    """
    texts = ["".join(text.split()) for text in texts]
    lengths = np.array([len(text) for text in texts], np.int64)
    characters = np.frombuffer("".join(texts).encode("utf-32-le"), "<u4").astype(np.uint32)
    characters[characters - np.uint32(0xFF01) < 94] -= 0xFEE0      # ，！？ and others of full width
    for wide, narrow in zip("。、“”‘’", ".,\"\"''"):
        characters[characters == ord(wide)] = ord(narrow)
    x = np.zeros(len(characters), np.uint32)                       # hash of the shingle that begins at each character
    for i in range(shingle):
        x[:len(x) - i] = x[:len(x) - i] * np.uint32(0x01000193) + characters[i:]
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)         # the end of Austin Appleby's MurmurHash3, where
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)         # every bit of the input moves every bit of x
    x ^= x >> np.uint32(16)
    whole, ends = np.ones(len(x), bool), np.cumsum(lengths)
    for i in range(1, shingle):
        whole[np.maximum(ends - i, 0)] = False                     # begins here, but ends in the next document
    x, counts = x[whole], np.maximum(lengths - shingle + 1, 0)
    some = counts > 0                                              # reduceat knows no empty ranges
    starts = np.cumsum(counts[some]) - counts[some]
    odd = np.random.default_rng(seed).integers(0, 1 << 31, n_permutations, np.uint32) * np.uint32(2) + np.uint32(1)
    minima = np.empty((n_permutations, len(texts)), np.uint8)
    minima[:, ~some] = np.resize(hashes[~some, None].view(np.uint8).T, (n_permutations, (~some).sum()))
    for i, factor in enumerate(odd if len(starts) else ()):        # times an odd number: a permutation of all x
        minima[i, some] = np.minimum.reduceat(x * factor, starts).astype(np.uint8)
    return np.ascontiguousarray(minima.T)


# ---- in the main process: read, hand out, collect -------------------------------------------------------------------

def batches(found, progress):
    """Lists of (corpus number, corpus name, where, record), about BATCH_CHARS characters each, in input order."""
    batch, size = [], 0
    for number, source in enumerate(found):
        for _, name, where, record in raw_records([source], TEXT, progress):
            batch.append((number, name, where, record))
            size += 20 + n_chars(record)
            if size >= BATCH_CHARS:
                yield batch
                batch, size = [], 0
    yield batch


def n_chars(record):
    """Characters of the strings in a record, however deep."""
    if isinstance(record, str):
        return len(record)
    parts = record.values() if isinstance(record, dict) else record if isinstance(record, list) else ()
    return sum(map(n_chars, parts))


def collect(found, tokenizer, settings, n_workers, ids_file, signature_file):
    """Run all records through the workers and write what they make: (documents, {(corpus number, Bad): dropped})."""
    total = sum(os.path.getsize(path) for _, _, files in found for path in files)
    documents, dropped = [np.zeros(0, DOCUMENT)], Counter()
    with tqdm(total=total, unit="B", unit_scale=True, desc="clean and encode", disable=None) as bar, \
            closing(in_order(encode_batch, batches(found, bar.update), n_workers, begin, tokenizer, settings)) as results:
        for ids, new, minima, reasons in results:
            ids_file.write(ids)
            if settings:
                signature_file.write(minima)
            documents.append(new)
            dropped.update(reasons)
    return np.concatenate(documents), dropped


# ---- duplicates -----------------------------------------------------------------------------------------------------

def exact_duplicates(hashes):
    """(n,) bool: the same 64-bit hash stands earlier."""
    order = np.argsort(hashes, kind="stable")                      # stable: of equal ones the first stays in front
    again = np.zeros(len(hashes), bool)
    again[order[1:]] = hashes[order[1:]] == hashes[order[:-1]]
    return again


def near_duplicates(path, gone, n_permutations, n_bands, jaccard):
    """(n,) bool: an earlier document is estimated to have at least this Jaccard similarity.

    path: file of the n signatures; gone (n,) bool: documents to leave out. Documents that agree on a whole band of
    their signatures are candidates: each is compared with the first of them, then what is left again, for a few rounds;
    so a band costs as much as sorting it, even if a million documents agree.
    Sources: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, ch. 3.4; Lee et al. 2021, arXiv:2107.06499.
    """
    n, near = len(gone), np.zeros(len(gone), bool)
    rows, at_once = n_permutations // n_bands, 4                   # bands whose keys are in memory together
    factors = np.random.default_rng(0).integers(1 << 63, size=rows, dtype=np.uint64) | np.uint64(1)
    for band in tqdm(range(0, n_bands, at_once), desc="near duplicates", unit=" bands", unit_scale=at_once,
                     disable=None):
        keys = band_keys(path, n, n_permutations, range(band, min(band + at_once, n_bands)), factors)
        for key in keys:
            ids = np.flatnonzero(~(gone | near)).astype(np.uint32)
            ids = ids[np.argsort(key[ids], kind="stable")]
            for _ in range(8):
                first = np.r_[True, key[ids[1:]] != key[ids[:-1]]][:len(ids)]
                leaders = ids[first][np.cumsum(first) - 1][~first]
                ids = ids[~first]
                same = similarity(path, n, n_permutations, leaders, ids) >= jaccard
                near[ids[same]] = True
                ids = ids[~same]
                if not len(ids):
                    break
    return near


def band_keys(path, n, n_permutations, bands, factors):
    """A 64-bit key per band and document, (bands, n), read in one pass over the file."""
    keys, rows = np.zeros((len(bands), n), np.uint64), len(factors)
    with open(path, "rb") as f:
        for start in range(0, n, 1 << 15):
            minima = np.frombuffer(f.read(n_permutations << 15), np.uint8).reshape(-1, n_permutations)
            for i, band in enumerate(bands):
                keys[i, start:start + len(minima)] = minima[:, band * rows:(band + 1) * rows] @ factors
    return keys


def similarity(path, n, n_permutations, a, b):
    """The estimated Jaccard similarity of documents a and b, two arrays of numbers."""
    found = np.empty(len(a), np.float32)
    for start in range(0, len(a), 1 << 14):                        # mapped anew each time: what was touched is let go
        minima = np.memmap(path, np.uint8, "r", shape=(n, n_permutations))
        part = slice(start, start + (1 << 14))
        found[part] = (minima[a[part]] == minima[b[part]]).mean(1)
    return found


# ---- shuffle, split, write ------------------------------------------------------------------------------------------

def write_bin(f, ids_path, documents, offsets, order):
    """Append the ids of the documents to f, in this order; each part is read in the order of the scratch file."""
    lengths = documents["tokens"][order].astype(np.int64)
    parts = np.flatnonzero(np.diff(np.cumsum(lengths) // GATHER_TOKENS)) + 1
    with open(ids_path, "rb", buffering=0) as ids_file:
        for part in np.split(order, parts):
            lengths = documents["tokens"][part].astype(np.int64)
            gathered, starts = memoryview(bytearray(2 * int(lengths.sum()))), 2 * (np.cumsum(lengths) - lengths)
            for i in np.argsort(offsets[part]):
                ids_file.seek(offsets[part[i]])
                assert ids_file.readinto(gathered[starts[i]:starts[i] + 2 * lengths[i]]) == 2 * lengths[i]
            f.write(gathered)


def totals(documents):
    return {"documents": len(documents), "tokens": int(documents["tokens"].sum(dtype=np.int64)),
            "bytes": int(documents["bytes"].sum(dtype=np.int64))}


def report(found, documents, kept, dropped):
    """{corpus: {records, documents, tokens, bytes, bytes_per_token, dropped}} for meta.json."""
    table = {}
    for number, (corpus, _, _) in enumerate(found):
        reasons = dict(sorted((str(bad), count) for (of, bad), count in dropped.items() if of == number))
        counts = totals(documents[kept & (documents["corpus"] == number)])
        table[corpus] = {"records": counts["documents"] + sum(reasons.values()), **counts,
                         "bytes_per_token": round(counts["bytes"] / max(counts["tokens"], 1), 3), "dropped": reasons}
    return table


def print_report(table, meta):
    print(f"{'records':>10} {'documents':>10} {'tokens':>13} {'bytes/token':>11}  corpus, and what was dropped")
    for corpus, row in table.items():
        print(f"{row['records']:>10,} {row['documents']:>10,} {row['tokens']:>13,} {row['bytes_per_token']:>11.3f}  "
              f"{corpus}")
        for reason, count in sorted(row["dropped"].items(), key=lambda item: -item[1]):
            print(f"{count:>10,} dropped: {reason}")
    for split in "train", "val":
        print(f"{split}: " + ", ".join(f"{count:,} {unit}" for unit, count in meta[split].items()))


@contextmanager
def scratch(*paths):
    """Open files to write that vanish in the end, however it ends."""
    os.makedirs(os.path.dirname(paths[0]) or ".", exist_ok=True)
    files = [open(path, "wb") for path in paths]
    try:
        yield files
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise SystemExit(f"{os.path.dirname(paths[0])}: the disk is full; what was there before is untouched. Scratch "
                         "files need about as much as the raw text, and train.bin half of that") from None
    finally:
        for f in files:
            try:
                f.close()
            except OSError:                                        # the disk is full: what was buffered is of no use
                pass
            os.remove(f.name)


def check(settings):
    """SystemExit with one sentence for constants that cannot be."""
    for wrong, sentence in (
            (not 0 < settings["val_fraction"] < 1, "val_fraction={val_fraction} must lie between 0 and 1"),
            (not 0 < settings["jaccard"] <= 1, "jaccard={jaccard} must lie between 0 and 1"),
            (settings["shingle"] < 1, "shingle={shingle} must be at least 1 character"),
            (settings["workers"] < 0, "workers={workers} must be 0, for one per core, or more"),
            (settings["seed"] < 0, "seed={seed} must not be negative"),
            (min(settings["n_bands"], settings["n_permutations"]) < 1
             or settings["n_permutations"] % settings["n_bands"],
             "n_permutations={n_permutations} must be a multiple of n_bands={n_bands}")):
        if wrong:
            raise SystemExit("prepare_pretrain.py: " + sentence.format(**settings))


def main():
    check(constants)
    found, vocabulary = sources(corpora, TEXT), load(tokenizer)
    if vocabulary.vocab_size > 65_536:
        raise SystemExit(f"{tokenizer}: a vocabulary of {vocabulary.vocab_size:,} does not fit the bins, whose token "
                         "ids are below 65,536; take a smaller tokenizer")
    n_workers = workers or os.cpu_count()
    files = [path for _, _, paths in found for path in paths]
    print(f"{len(files)} files, {sum(map(os.path.getsize, files)) / 1e6:,.1f} MB, {n_workers} workers, "
          f"tokenizer {tokenizer} of {vocabulary.vocab_size:,}")
    ids_path, signature_path = os.path.join(data_dir, "ids.tmp"), os.path.join(data_dir, "signatures.tmp")
    settings = dict(shingle=shingle, n_permutations=n_permutations, seed=seed) if dedup else None
    with scratch(ids_path, signature_path) as scratch_files:
        documents, dropped = collect(found, tokenizer, settings, n_workers, *scratch_files)
        for f in scratch_files:
            f.flush()
        gone = np.zeros(len(documents), bool)
        if dedup and len(documents):
            gone = exact_duplicates(documents["hash"])
            near = near_duplicates(signature_path, gone, n_permutations, n_bands, jaccard)
            for reason, which in (Bad("exact duplicate"), gone), (Bad("near duplicate"), near):
                for number, count in zip(*np.unique(documents["corpus"][which], return_counts=True)):
                    dropped[int(number), reason] = int(count)
            gone |= near
        in_val = documents["hash"] < np.uint64(min(int(val_fraction * 2 ** 64), 2 ** 64 - 1))
        table = report(found, documents, ~gone, dropped)
        meta = {"format": 1, "tokenizer": tokenizer, "tokenizer_sha256": vocabulary.sha256,
                "vocab_size": vocabulary.vocab_size, "bos_id": vocabulary.bos_id, "eos_id": vocabulary.eos_id,
                "seed": seed, "train": totals(documents[~gone & ~in_val]), "val": totals(documents[~gone & in_val]),
                "corpora": table}
        print_report(table, meta)
        if not (meta["train"]["documents"] and meta["val"]["documents"]):
            raise SystemExit(f"{corpora}: too little text: {np.count_nonzero(~gone)} documents are left, and of those "
                             f"--val_fraction={val_fraction} puts {meta['val']['documents']} into val.bin; "
                             "train.bin and val.bin need one each")
        offsets = 2 * (np.cumsum(documents["tokens"], dtype=np.int64) - documents["tokens"])
        order = np.random.default_rng(seed).permutation(np.flatnonzero(~gone))
        paths = [os.path.join(data_dir, name) for name in ("meta.json", "val.bin", "train.bin")]
        # left in reverse: train.bin takes its name first, meta.json, which vouches for both, last
        with config.whole_file(paths[0]) as meta_file, config.whole_file(paths[1], "wb") as val_file, \
                config.whole_file(paths[2], "wb") as train_file:
            bins = {"val.bin": config.Checksum(val_file), "train.bin": config.Checksum(train_file)}
            write_bin(bins["val.bin"], ids_path, documents, offsets, order[in_val[order]])
            write_bin(bins["train.bin"], ids_path, documents, offsets, order[~in_val[order]])
            meta["crc32"] = {name: file.crc32 for name, file in bins.items()}
            json.dump(meta, meta_file, ensure_ascii=False, indent=1)
    print(f"wrote {', '.join(reversed(paths))}")


if __name__ == "__main__":
    with interruptible(data_dir), config.only_user_of("data_dir", data_dir):
        main()
