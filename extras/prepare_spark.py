"""prepare_pretrain.py on a cluster: raw corpora -> shards train-00000.bin ..., val.bin, meta.json.

    python -m extras.prepare_spark --corpora=skypile:/shared/skypile --data_dir=/shared/bins
    PYTHONPATH=. spark-submit --master=yarn extras/prepare_spark.py --corpora=...

The steps are functions of prepare_pretrain.py; Apache Spark distributes them. The same input and
constants keep the same documents as there, and hold out the same ones; only their order differs. It
does not depend on the cluster either. A file is read by a single task, so that large ones should be
cut before. This folder, the corpora and data_dir have to be at the same path on all machines.
docs/spark.md tells more.
"""
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from hashlib import blake2b
from itertools import groupby
from json import dump
from operator import add, itemgetter

import numpy as np

import config
import prepare_pretrain
from corpora import TEXT, Bad, batches, sources
from readers import interruptible
from tokenizer import load

corpora        = "text:data/demo/stories.jsonl"  # name:path,name:path; python corpora.py lists them
tokenizer      = "data/tokenizer.model"  # of train_tokenizer.py or others; gpt2; a tiktoken file
data_dir       = "data/pretrain"         # for the shards, val.bin, meta.json; seen by all machines
val_fraction   = 0.01      # share of the documents in val.bin, chosen by a hash of their text
dedup          = True      # drop exact and near duplicates; the first in the input stays
jaccard        = 0.8       # similarity of the sets of shingles that makes two documents the same
shingle        = 5         # characters per shingle
n_permutations = 256       # minima in a signature, a byte each; more of them estimate better
n_bands        = 32        # documents that agree on a band are compared; divides n_permutations
seed           = 1337      # of the shuffle and the hash functions, from 0 up
shard_tokens   = 500_000_000             # tokens of a shard on average; training opens all shards
master         = ""        # spark://host:7077, yarn, ...; empty: spark-submit's, or all cores here
constants = config.override(globals())

try:
    from pyspark import SparkConf, SparkContext, StorageLevel, TaskContext
except ImportError:
    raise SystemExit("extras.prepare_spark needs Apache Spark: pip install pyspark") from None

ROOT = os.path.dirname(os.path.abspath(prepare_pretrain.__file__))
FOLDER = os.getcwd()       # relative paths begin here on every machine
PARTITION = 200_000        # documents that a task deduplicates: 100 MB, mostly signatures
FIGURES = "documents", "tokens", "bytes"


# ---- in the workers. Spark sends functions of the script it runs with the constants they name ----

def read_files(files):
    """[(number of the file, number of its input, name, path)] -> yields results of encode_batch().

    Before each stands the number of its first document: documents are numbered in reading order.
    """
    os.chdir(FOLDER)
    hashing = dict(shingle=shingle, n_permutations=n_permutations, seed=seed) if dedup else None
    prepare_pretrain.begin(tokenizer, hashing)
    for file, number, name, path in files:
        inputs = [("", name, [])] * number + [("", name, [path])]
        first = file << 40
        for batch in batches(inputs, TEXT, None):
            ids, documents, minima, dropped = prepare_pretrain.encode_batch(batch)
            yield first, ids, documents, minima, dropped
            first += len(documents)


def count_files(results):
    """Yield (number of the file, {input: documents}, {(input, Bad): count}) for every file."""
    for file, group in groupby(results, lambda result: result[0] >> 40):
        found, dropped = Counter(), Counter()
        for _, _, documents, _, reasons in group:
            found.update(documents["input"].tolist())
            dropped.update(reasons)
        yield file, found, dropped


def described(result):
    """Yield (hash, (number, input, tokens, bytes, signature)) for the documents of a batch."""
    number, _, documents, minima, _ = result
    for i, (digest, tokens, n_bytes, source) in enumerate(documents.tolist()):
        signature = minima[i].tobytes() if dedup else b""
        yield digest, (number + i, source, tokens, n_bytes, signature)


def texts(result, n_shards):
    """Yield (place, ids) for the documents of a batch."""
    number, ids, documents, _, _ = result
    ends = np.cumsum(documents["tokens"], dtype=np.int64)
    for i, part in enumerate(np.split(ids, ends[:-1]) if len(ends) else ()):
        yield (*place(int(documents["hash"][i]), number + i, n_shards), 1), part.tobytes()


def place(digest, number, n_shards):
    """(shard, position, number) of a document, which sort in random order; shard 0 is val.bin."""
    key = number.to_bytes(8, "little")
    position = int.from_bytes(blake2b(key, digest_size=8, key=str(seed).encode()).digest(), "big")
    if prepare_pretrain.held_out(digest, val_fraction):
        return 0, position, number
    return 1 + (position * n_shards >> 64), position, number


def spooled(rows):
    """The keys of (key, signature), and a file of the signatures, as prepare_pretrain.py has it."""
    file, keys = tempfile.TemporaryFile(), []
    for key, signature in rows:
        file.write(signature)
        keys.append(key)
    file.flush()
    return keys, file


def band_keys(documents, n_parts):
    """Yield (part, (keys, documents)): the keys of all bands, cut by key into n_parts."""
    hashes, file = spooled((digest, row[-1]) for digest, row in documents)
    n_rows = n_permutations // n_bands
    keys = [np.zeros(0, np.uint64)]
    for band in range(n_bands if hashes else 0):
        keys.append(prepare_pretrain.band_keys(file, n_permutations, band * n_rows, n_rows))
    keys, owners = np.concatenate(keys), np.tile(np.array(hashes, np.uint64), n_bands)
    part = keys % np.uint64(n_parts)
    order = np.argsort(part)
    cuts = np.searchsorted(part[order], np.arange(1, n_parts, dtype=np.uint64))
    yield from enumerate(zip(np.split(keys[order], cuts), np.split(owners[order], cuts)))


def candidates(parts):
    """Yield (document, another one that agrees with it on a band): stars that connect all such."""
    empty = np.zeros(0, np.uint64)
    keys, owners = zip((empty, empty), *(arrays for _, arrays in parts))
    keys, owners = np.concatenate(keys), np.concatenate(owners)
    order = np.argsort(keys)
    keys, owners = keys[order], owners[order]
    is_first = np.append(True, keys[1:] != keys[:-1])[:len(keys)]
    firsts = owners[is_first][np.cumsum(is_first) - 1]
    other = owners != firsts
    yield from zip(owners[other].tolist(), firsts[other].tolist())


def near_duplicates(documents):
    """((component, number), (hash, input, signature)) in this order -> (hash, input) of duplicates.

    Only documents of the same component agree on a band, so that leaving out all other components
    does not change what prepare_pretrain.py finds.
    """
    keys, file = spooled((row[:2], row[2]) for _, row in documents)
    if keys:
        near = prepare_pretrain.near_duplicates(
            file, np.zeros(len(keys), bool), n_permutations, n_bands, jaccard)
        yield from (keys[i] for i in np.flatnonzero(near))


def large_star(node):
    centre, others = node[0], set(node[1])
    smallest = min(centre, *others)
    return [(other, smallest) for other in others if other > centre]


def small_star(node):
    centre, others = node[0], set(node[1])
    smallest = min(others)
    return [(other, smallest) for other in {centre, *others} - {smallest}]


def write_shard(shard, rows, folder):
    """Write the kept documents of a shard: yields (shard, path without suffix, {suffix: CRC-32}).

    rows: ((shard, position, number, 0), input) of a document that is kept, and behind it
    ((shard, position, number, 1), ids), in order.
    """
    os.chdir(FOLDER)
    path = f"{folder}/{shard}.{TaskContext.get().taskAttemptId()}"      # a task may run twice
    kept, inputs = None, []
    with config.whole_file(f"{path}.bin", "wb") as bin_file, \
            config.whole_file(f"{path}.corpus", "wb") as corpus_file:
        ids_out, corpus_out = config.Checksum(bin_file), config.Checksum(corpus_file)
        for (_, _, number, is_text), value in rows:
            if not is_text:
                kept = number
                inputs.append(value)
            elif number == kept:
                ids_out.write(value)
        corpus_out.write(np.array(inputs, np.uint16))
    yield shard, path, {"bin": ids_out.crc32, "corpus": corpus_out.crc32}


# ---- in the driver -------------------------------------------------------------------------------

def connected(edges, n_parts):
    """(document, smallest document that edges connect it with) of all documents on an edge.

    Source: Kiveris et al. 2014, "Connected components in MapReduce and beyond".
    """
    before, now = None, -1
    while now != before:
        both = edges.flatMap(lambda edge: (edge, edge[::-1]))
        larger = both.groupByKey(n_parts).flatMap(large_star)
        edges = larger.groupByKey(n_parts).flatMap(small_star).distinct(n_parts).cache()
        before, now = now, edges.map(hash).sum()
    return edges.flatMap(lambda edge: (edge, (edge[1], edge[1]))).reduceByKey(min, n_parts)


def deduplicate(documents, n_parts):
    """The documents (hash, (number, input, ...)) without exact duplicates, and those near others."""
    unique = documents.reduceByKey(min, n_parts).persist(StorageLevel.DISK_ONLY)
    edges = unique.mapPartitions(lambda rows: band_keys(rows, n_parts)) \
        .partitionBy(n_parts, int).mapPartitions(candidates)
    near = unique.join(connected(edges, n_parts)).map(keyed) \
        .repartitionAndSortWithinPartitions(n_parts, itemgetter(0)).mapPartitions(near_duplicates)
    return unique, near.persist(StorageLevel.DISK_ONLY)


def keyed(row):
    """(hash, (document, component)) -> ((component, number), (hash, input, signature))."""
    digest, ((number, source, _, _, signature), component) = row
    return (component, number), (digest, source, signature)


def figures_of(document):
    """((input, whether it is held out), FIGURES) of a document."""
    digest, (_, source, tokens, n_bytes, _) = document
    is_val = bool(prepare_pretrain.held_out(digest, val_fraction))
    return (source, is_val), (1, tokens, n_bytes)


def total(figures):
    return dict(zip(FIGURES, map(sum, zip((0, 0, 0), *figures))))


def prepare(spark, inputs, tok, scratch):
    files = [(name, number, path) for number, (_, name, paths) in enumerate(inputs)
             for path in paths]
    files = [(i, number, name, path) for i, (name, number, path) in enumerate(files)]
    files.sort(key=lambda file: -os.path.getsize(file[-1]))       # large ones first
    n_tasks = min(len(files), 10_000)
    tasks = [files[i::n_tasks] for i in range(n_tasks)]
    results = spark.parallelize(tasks, n_tasks).flatMap(read_files)
    results.persist(StorageLevel.DISK_ONLY)
    found, dropped = Counter(), Counter()
    for _, n, reasons in sorted(results.mapPartitions(count_files).collect()):
        found.update(n)
        dropped.update(reasons)
    n_documents = sum(found.values())
    print(f"{n_documents:,} documents are clean and encoded", flush=True)

    n_parts = max(spark.defaultParallelism, n_documents // PARTITION)
    kept = results.flatMap(described)
    if dedup:
        unique, near = deduplicate(kept, n_parts)
        n_near = near.map(itemgetter(1)).countByValue()
        n_unique = unique.map(lambda document: document[1][1]).countByValue()
        for number in found:
            dropped[number, Bad("exact duplicate")] = found[number] - n_unique[number]
            dropped[number, Bad("near duplicate")] = n_near[number]
        kept = unique.subtractByKey(near, n_parts)
        print("duplicates are marked", flush=True)
    figures = kept.map(figures_of).reduceByKey(lambda a, b: tuple(map(add, a, b))).collectAsMap()
    train, val = (total(row for (_, is_val), row in figures.items() if is_val == which)
                  for which in (False, True))
    rows = [total(row for (number, _), row in figures.items() if number == which)
            for which in range(len(inputs))]
    rows = prepare_pretrain.report(inputs, rows, +dropped)
    meta = prepare_pretrain.new_meta(tok, train, val, rows, **constants)

    n_shards = -(-train["tokens"] // shard_tokens)
    flags = kept.map(lambda document: ((*place(document[0], document[1][0], n_shards), 0),
                                       document[1][1]))
    shards = flags.union(results.flatMap(lambda result: texts(result, n_shards))) \
        .repartitionAndSortWithinPartitions(1 + n_shards, itemgetter(0)) \
        .mapPartitionsWithIndex(lambda shard, rows: write_shard(shard, rows, scratch)).collect()
    return meta, shards


def main():
    prepare_pretrain.check(**constants)
    config.check_range(1, shard_tokens=shard_tokens)
    inputs, tok = sources(corpora, TEXT), load(tokenizer)
    with started() as spark, interruptible(data_dir), \
            tempfile.TemporaryDirectory(dir=data_dir) as scratch:
        n_files = sum(len(files) for _, _, files in inputs)
        print(f"{n_files} files, tokenizer {tokenizer} of {tok.vocab_size:,} pieces; Spark at "
              f"{spark.master}", flush=True)
        meta, shards = prepare(spark, inputs, tok, scratch)
        meta["crc32"] = {}
        with config.whole_file(f"{data_dir}/meta.json") as meta_file:
            for shard, path, sums in sorted(shards):
                name = f"train-{shard - 1:05}" if shard else "val"
                for suffix, crc32 in sums.items():
                    os.replace(f"{path}.{suffix}", f"{data_dir}/{name}.{suffix}")
                    meta["crc32"][f"{name}.{suffix}"] = crc32
            dump(meta, meta_file, ensure_ascii=False, indent=1)
    print(f"wrote {len(shards) - 1} shards, val.bin and meta.json to {data_dir}")


@contextmanager
def started():
    """A SparkContext; failures of its jobs that the user can mend end in one sentence."""
    if not (os.environ.get("JAVA_HOME") or shutil.which("java")):
        raise SystemExit("extras.prepare_spark: Spark needs Java 17 or newer; none was found")
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    conf = SparkConf().setAppName("prepare_spark").setIfMissing("spark.master", "local[*]")
    conf.setIfMissing("spark.ui.showConsoleProgress", str(sys.stderr.isatty()).lower())
    if master:
        conf.setMaster(master)
    conf.setExecutorEnv("PYTHONPATH", ROOT)
    with SparkContext(conf=conf) as spark:
        spark.setLogLevel("ERROR")
        yield spark


if __name__ == "__main__":
    with config.only_user_of("data_dir", data_dir):
        main()
