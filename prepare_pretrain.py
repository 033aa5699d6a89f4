"""Raw corpora -> cleaned, deduplicated, encoded and shuffled: train.bin, val.bin and meta.json.

    python prepare_pretrain.py --corpora=wikipedia_cn:data/wikipedia,text:my_texts

Worker processes turn records into token ids and MinHash signatures, which the main process appends
to scratch files in data_dir. When everything is read, it marks the duplicates, shuffles the other
documents and copies them, one by one, to the bins.

Memory grows by less than 100 bytes per document, whatever their length. Nothing is truncated. The
same input and constants give the same bytes with any number of workers. corpora.py lists the data
sets, cleaning.py says what is cleaned.

train.corpus and val.corpus beside the bins tell where their documents are from: a np.uint16 for
each, the place of its corpus among the "corpora" of meta.json. filter_pretrain.py counts by them.
"""
import hashlib
import os
import tempfile
from collections import Counter
from contextlib import closing

import numpy as np
from tqdm import tqdm

import config
from cleaning import pieces
from corpora import TEXT, Bad, batches, document, sources
from readers import in_order, interruptible, print_report
from tokenizer import load

corpora        = "text:data/demo/stories.jsonl"  # name:path,name:path; python corpora.py lists them
tokenizer      = "data/tokenizer.model"  # of train_tokenizer.py or others; gpt2; a tiktoken file
data_dir       = "data/pretrain"         # for train.bin, val.bin, meta.json, and scratch space
val_fraction   = 0.01      # share of the documents in val.bin, chosen by a hash of their text
dedup          = True      # drop exact and near duplicates; the first in the input stays
jaccard        = 0.8       # similarity of the sets of shingles that makes two documents the same
shingle        = 5         # characters per shingle
n_permutations = 256       # minima in a signature, a byte each; more of them estimate better
n_bands        = 32        # documents that agree on a band are compared; divides n_permutations
seed           = 1337      # of the shuffle and the hash functions, from 0 up
workers        = 0         # processes that clean and encode; 0 = one per core
constants = config.override(globals())

PIECE_CHARS = 1 << 20      # longer documents are encoded in pieces: encoders need memory by length
BLOCK = 1 << 14            # signatures that are in memory at a time
GATHER_TOKENS = 1 << 26    # tokens of the shuffled bin that are in memory at a time
# what is kept in memory of every document
DOCUMENT = np.dtype([("hash", "<u8"), ("tokens", "<u4"), ("bytes", "<u4"), ("input", "<u2")])


# ---- in the workers: records -> token ids, signatures --------------------------------------------

def begin(tokenizer, hashing):
    """Load what a worker needs for all batches."""
    global worker_tokenizer, worker_hashing
    worker_tokenizer, worker_hashing = load(tokenizer), hashing


def encode_batch(batch):
    """[(input number, corpus name, place, record)] -> (ids, documents, signatures, dropped).

    ids: of all documents, an eos after each; documents: array of DOCUMENT; signatures (documents,
    n_permutations) uint8, b"" without deduplication; dropped: {(input number, Bad): count}.
    """
    ids, texts, rows, dropped = [], [], [], Counter()
    for number, name, place, record in batch:
        try:
            text = document(name, record, place)
        except Bad as bad:
            dropped[number, bad] += 1
            continue
        start = len(ids)
        for piece in pieces(text, PIECE_CHARS):
            ids += worker_tokenizer.encode(piece)
        ids.append(worker_tokenizer.eos_id)
        raw = text.encode("utf-8")
        digest = hashlib.blake2b(raw, digest_size=8).digest()
        texts.append(text)
        rows.append((int.from_bytes(digest, "little"), len(ids) - start, len(raw), number))
    documents = np.array(rows, DOCUMENT)
    minima = b""
    if worker_hashing:
        minima = signatures(texts, documents["hash"], **worker_hashing)
    return np.array(ids, worker_tokenizer.id_dtype), documents, minima, dropped


def signatures(texts, hashes, shingle, n_permutations, seed):
    """MinHash signatures (texts, n_permutations) uint8.

    The share of equal bytes in two rows estimates the Jaccard similarity of the two sets of
    shingles, substrings of `shingle` characters (plus 1/256 for bytes that are equal by chance).
    White space and the width of punctuation are left out, as copies often differ only in these. A
    text too short for a single shingle gets a signature of its own hash, similar to no other.
    Sources: Broder 1997, "On the resemblance and containment of documents"; keeping only the low
    bits of each minimum: Li and Konig 2010, "b-bit minwise hashing".
    """
    x, counts = shingle_hashes(texts, shingle)
    has_some = counts > 0                             # reduceat knows no empty ranges
    counts = counts[has_some]
    starts = np.cumsum(counts) - counts
    rng = np.random.default_rng(seed)
    factors = 2 * rng.integers(0, 1 << 31, n_permutations, np.uint32) + 1
    minima = np.empty((n_permutations, len(texts)), np.uint8)
    own = hashes[~has_some, None].view(np.uint8).T    # (8, texts without a shingle)
    minima[:, ~has_some] = np.resize(own, (n_permutations, own.shape[1]))
    if len(starts):
        for row, factor in zip(minima, factors):
            permuted = x * factor                     # times an odd number: a permutation of all x
            row[has_some] = np.minimum.reduceat(permuted, starts).astype(np.uint8)
    return np.ascontiguousarray(minima.T)


def shingle_hashes(texts, shingle):
    """The 32-bit hashes of all shingles, one text after the other, and their number per text."""
    texts = ["".join(text.split()) for text in texts]
    lengths = np.array([len(text) for text in texts], np.int64)
    ends = np.cumsum(lengths)
    raw = "".join(texts).encode("utf-32-le")
    characters = np.frombuffer(raw, "<u4").astype(np.uint32)
    is_wide = characters - 0xFF01 < 94                # ，！？ and others of full width
    characters[is_wide] -= 0xFEE0
    for wide, narrow in zip("。、“”‘’", ".,\"\"''"):
        characters[characters == ord(wide)] = ord(narrow)
    n = len(characters)
    x = np.zeros(n, np.uint32)                        # at each character: of the shingle from there
    for i in range(shingle):
        x[:n - i] *= 0x01000193
        x[:n - i] += characters[i:]
    # The end of Austin Appleby's MurmurHash3: every bit of the input changes every bit of x
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    x ^= x >> 16
    inside = np.ones(n, bool)                         # false where it would end in the next text
    for i in range(1, shingle):
        inside[np.maximum(ends - i, 0)] = False
    return x[inside], np.maximum(lengths - shingle + 1, 0)


# ---- in the main process: collect ----------------------------------------------------------------

def collect(inputs, ids_file, signature_file):
    """Run all records through the workers and write what they make: (documents, dropped)."""
    hashing = dict(shingle=shingle, n_permutations=n_permutations, seed=seed) if dedup else None
    batched = batches(inputs, TEXT, "clean and encode")
    results = in_order(encode_batch, batched, workers, begin, tokenizer, hashing)
    documents, dropped = [], Counter()
    with closing(results):
        for ids, new, minima, reasons in results:
            ids_file.write(ids)
            signature_file.write(minima)
            documents.append(new)
            dropped.update(reasons)
    ids_file.flush()
    signature_file.flush()
    return np.concatenate(documents), dropped


# ---- duplicates ----------------------------------------------------------------------------------

def exact_duplicates(hashes):
    """(n,) bool: the same 64-bit hash stands earlier."""
    again = np.ones(len(hashes), bool)
    again[np.unique(hashes, return_index=True)[1]] = False
    return again


def near_duplicates(file, gone, n_permutations, n_bands, jaccard):
    """(n,) bool: an earlier document is estimated to have at least this Jaccard similarity.

    file: the n signatures; gone (n,) bool: documents to leave out. Documents that agree on a whole
    band of their signatures are candidates: each is compared with the first of them, then those
    that differ from it again among themselves, for a few rounds. So a band costs as much as sorting
    it, even if a million documents agree.
    Sources: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, ch. 3.4; Lee et al. 2021,
    arXiv:2107.06499.
    """
    near = np.zeros(len(gone), bool)
    rows = n_permutations // n_bands
    bands = range(n_bands if len(gone) else 0)        # no file of no bytes can be mapped
    for band in tqdm(bands, desc="near duplicates", unit=" bands", disable=None):
        keys = band_keys(file, n_permutations, band * rows, rows)
        left = np.flatnonzero(~(gone | near)).astype(np.uint32)
        left = left[np.argsort(keys[left], kind="stable")]
        for _ in range(8):
            sorted_keys = keys[left]
            places = np.searchsorted(sorted_keys, sorted_keys)    # of the first with the same key
            firsts = left[places]
            is_other = firsts != left
            firsts, left = firsts[is_other], left[is_other]
            same = similarity(file, n_permutations, firsts, left) >= jaccard
            near[left[same]] = True
            left = left[~same]
    return near


def open_signatures(file, n_permutations):
    """The signatures (n, n_permutations). Opening them anew frees the memory of what was read."""
    return np.asarray(np.memmap(file, np.uint8, "r")).reshape(-1, n_permutations)


def band_keys(file, n_permutations, first, rows):
    """A 64-bit key of each document (n,): a hash of `rows` minima, beginning with the first."""
    rng = np.random.default_rng(0)
    factors = rng.integers(1 << 63, size=rows, dtype=np.uint64) | 1
    keys = np.zeros(len(open_signatures(file, n_permutations)), np.uint64)
    for start in range(0, len(keys), BLOCK):
        part = slice(start, start + BLOCK)
        minima = open_signatures(file, n_permutations)
        keys[part] = minima[part, first:first + rows] @ factors
    return keys


def similarity(file, n_permutations, a, b):
    """The estimated Jaccard similarity of documents a and b, two arrays of numbers."""
    shares = np.zeros(len(a))
    for start in range(0, len(a), BLOCK):
        part = slice(start, start + BLOCK)
        minima = open_signatures(file, n_permutations)
        equal = minima[a[part]] == minima[b[part]]
        shares[part] = equal.mean(1)
    return shares


# ---- shuffle, split, write -----------------------------------------------------------------------

def write_bin(bin_file, ids_file, dtype, documents, order):
    """Write the ids of the documents in this order, GATHER_TOKENS at a time."""
    lengths = documents["tokens"].astype(np.int64)
    ends = lengths.cumsum()
    starts = ends - lengths
    written = lengths[order].cumsum()
    cuts = np.flatnonzero(np.diff(written // GATHER_TOKENS)) + 1
    for part in np.split(order, cuts):
        ids = np.asarray(np.memmap(ids_file, dtype, "r"))
        # disks like to be read in order
        gathered = {i: ids[starts[i]:ends[i]].copy() for i in np.sort(part)}
        bin_file.write(np.concatenate([gathered[i] for i in part]))


def held_out(hashes, val_fraction):
    """Which documents go to val.bin, by the hashes of their texts."""
    return hashes < np.uint64(val_fraction * 2 ** 64)


def count(documents, in_val, n_inputs):
    """How many documents, tokens and bytes there are: (inputs, train or val, 3)."""
    counts = np.zeros((n_inputs, 2, 3), np.int64)
    places = documents["input"], in_val.astype(int)
    for figure, numbers in enumerate((1, documents["tokens"], documents["bytes"])):
        np.add.at(counts[..., figure], places, numbers)
    return counts


def named(counts):
    return dict(zip(("documents", "tokens", "bytes"), counts.tolist()))


def report(inputs, counts, dropped):
    """{corpus: {records, documents, tokens, bytes, bytes_per_token, dropped}} for meta.json."""
    rows = {}
    for number, (corpus, _, _) in enumerate(inputs):
        reasons = {str(bad): n for (of, bad), n in dropped.items() if of == number}
        row = named(counts[number].sum(0))
        rows[corpus] = {"records": row["documents"] + sum(reasons.values()), **row,
                        "bytes_per_token": round(row["bytes"] / max(row["tokens"], 1), 3),
                        "dropped": dict(sorted(reasons.items()))}
    return rows


def new_meta(tok, inputs, counts, dropped, corpora, tokenizer, val_fraction, seed, **others):
    """meta.json without the checksums, which it also prints; the last arguments are the constants.

    counts: of what is kept, as of count(). SystemExit if a bin would be empty.
    """
    rows = report(inputs, counts, dropped)
    train, val = map(named, counts.sum(0))
    print_report({**rows, "train": train, "val": val})
    if not (train["documents"] or val["documents"]):
        raise SystemExit(f"{corpora}: no document is left; the table above says why")
    if not (train["documents"] and val["documents"]):
        raise SystemExit(f"{corpora}: too little text: --val_fraction={val_fraction} leaves "
                         f"{train['documents']} documents for train.bin and {val['documents']} "
                         "for val.bin; both need one")
    return {"format": 1,
            "tokenizer": tokenizer, "tokenizer_sha256": tok.sha256,
            "vocab_size": tok.vocab_size,
            "bos_id": tok.bos_id, "eos_id": tok.eos_id,
            "dtype": tok.id_dtype,
            "seed": seed,
            "train": train, "val": val,
            "corpora": rows,
            "crc32": {}}


def mark_duplicates(documents, signature_file, dropped):
    """(n,) bool: which documents are duplicates; counts them in dropped."""
    gone = exact_duplicates(documents["hash"])
    near = near_duplicates(signature_file, gone, n_permutations, n_bands, jaccard)
    for is_one, reason in (gone, Bad("exact duplicate")), (near, Bad("near duplicate")):
        dropped.update((number, reason) for number in documents["input"][is_one])
    return gone | near


def check(val_fraction, jaccard, shingle, n_permutations, n_bands, **others):
    """SystemExit for the first constant of a run that is out of range."""
    config.check_range(1e-6, 0.9, val_fraction=val_fraction)
    config.check_range(0.1, 1, jaccard=jaccard)
    config.check_range(1, 100, shingle=shingle)
    config.check_range(1, n_permutations, n_bands=n_bands)
    if n_permutations % n_bands:
        raise SystemExit(f"--n_permutations={n_permutations}: must be a multiple of "
                         f"n_bands={n_bands}")


def main():
    check(**constants)
    inputs = sources(corpora, TEXT)
    tok = load(tokenizer)
    n_files = sum(len(files) for _, _, files in inputs)
    print(f"files: {n_files}; tokenizer {tokenizer} of {tok.vocab_size:,} pieces")
    os.makedirs(data_dir, exist_ok=True)
    with config.disk_space(data_dir), tempfile.TemporaryFile(dir=data_dir) as ids_file, \
            tempfile.TemporaryFile(dir=data_dir) as signature_file:
        documents, dropped = collect(inputs, ids_file, signature_file)
        kept = np.ones(len(documents), bool)
        if dedup:
            kept = ~mark_duplicates(documents, signature_file, dropped)
        in_val = held_out(documents["hash"], val_fraction)
        counts = count(documents[kept], in_val[kept], len(inputs))
        meta = new_meta(tok, inputs, counts, dropped, **constants)
        order = np.random.default_rng(seed).permutation(np.flatnonzero(kept))
        names = "val.corpus", "val.bin", "train.corpus", "train.bin"
        with config.whole_bins(data_dir, names, meta) as files:
            for split, is_its in ("val", in_val), ("train", ~in_val):
                chosen = order[is_its[order]]
                write_bin(files[f"{split}.bin"], ids_file, tok.id_dtype, documents, chosen)
                files[f"{split}.corpus"].write(documents["input"][chosen])
    print(f"wrote train.bin, val.bin and meta.json to {data_dir}")


if __name__ == "__main__":
    with interruptible(data_dir), config.only_user_of("data_dir", data_dir):
        main()
