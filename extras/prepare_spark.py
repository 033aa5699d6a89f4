"""prepare_pretrain.py on a cluster: raw corpora -> shards train-00000.bin ..., val.bin, meta.json.

    python -m extras.prepare_spark --corpora=skypile:/shared/skypile --data_dir=/shared/bins

Apache Spark distributes its functions; the same documents are kept. docs/spark.md has the details.
"""
import json
import os
import random
import sys
from collections import Counter
from functools import partial
from itertools import compress
from operator import ior, itemgetter
from tempfile import TemporaryDirectory, TemporaryFile

import numpy as np

import config
import prepare_pretrain
from corpora import TEXT, Bad, batches, sources
from prepare_pretrain import DOCUMENT, held_out
from readers import interruptible
from tokenizer import load

corpora        = "text:data/demo/stories.jsonl"  # name:path,name:path; python corpora.py lists them
tokenizer      = "data/tokenizer.model"  # of train_tokenizer.py or others; gpt2; a tiktoken file
data_dir       = "data/pretrain"         # for the shards, val.bin, meta.json, and scratch space
val_fraction   = 0.01      # share of the documents in val.bin, chosen by a hash of their text
dedup          = True      # drop exact and near duplicates; the first in the input stays
jaccard        = 0.8       # similarity of the sets of shingles that makes two documents the same
shingle        = 5         # characters per shingle
n_permutations = 256       # minima in a signature, a byte each; more of them estimate better
n_bands        = 32        # documents that agree on a band are compared; divides n_permutations
seed           = 1337      # of the shuffle and the hash functions, from 0 up
shard_tokens   = 500_000_000             # mean size of a shard; training keeps all of them open
master         = ""        # such as spark://host:7077; empty: spark-submit's, or this machine
constants = config.override(globals())

try:
    from py4j.protocol import Py4JJavaError
    from pyspark import SparkConf, SparkContext, StorageLevel, TaskContext, errors
except ImportError:
    raise SystemExit("extras.prepare_spark needs a package: pip install pyspark") from None


# A document is (hash of its text, (its place in the input, DOCUMENT, signature, ids)).
def read(files):
    """Yield the documents of [(number, (input, name, path))]; per file (None, number, dropped)."""
    hashing = dict(shingle=shingle, n_permutations=n_permutations, seed=seed) if dedup else None
    prepare_pretrain.begin(tokenizer, hashing)
    for file, (source, name, path) in files:
        n, dropped = 0, Counter()
        inputs = [("", name, [])] * source + [("", name, [path])]     # this one gets the number
        for batch in batches(inputs, TEXT, None):
            ids, documents, signatures, reasons = prepare_pretrain.encode_batch(batch)
            dropped.update(reasons)
            parts = np.split(ids, np.cumsum(documents["tokens"]))
            for i, document in enumerate(documents):
                place = source, file, n + i
                signature = bytes(signatures[i]) if dedup else b""
                yield int(document["hash"]), (place, bytes(document), signature, bytes(parts[i]))
            n += len(documents)
        yield None, file, dropped


def bands(document):
    """[(band, hash)] for all bands of the signature."""
    digest, (_, _, signature) = document
    rows = n_permutations // n_bands
    return [(signature[i:i + rows], digest) for i in range(0, n_permutations, rows)]


def agreeing(pairs):
    """Yield (band, two hashes) for documents that agree on a band."""
    first = {}
    for band, digest in pairs:
        if first.setdefault(band, digest) != digest:
            yield band, {first[band], digest}


def spread(node):
    """A step of Hash-to-Min, which finds connected components (Rastogi et al. 2013)."""
    cluster, smallest = node[1], min(node[1])
    return [(smallest, cluster)] + [(member, {smallest}) for member in cluster]


def near_duplicates(rows):
    """The near duplicates among ((component, document), hash), sorted, as on one machine."""
    documents = []
    with TemporaryFile() as file:
        for (_, row), digest in rows:
            documents.append((digest, row))
            file.write(row[2])
        file.flush()
        gone = np.zeros(len(documents), bool)
        near = prepare_pretrain.near_duplicates(file, gone, n_permutations, n_bands, jaccard)
        yield from compress(documents, near)


def placed(n_shards, document):
    """((shard, random position, place), ids); shard 0 is val.bin."""
    digest, (place, _, _, ids) = document
    position = random.Random(f"{seed} {place}").random()
    shard = 0 if held_out(digest, val_fraction) else 1 + int(position * n_shards)
    return (shard, position, place), ids


def write(folder, shard, rows):
    """Yield (name, path, CRC-32) of both files of a shard."""
    name = f"train-{shard - 1:05}" if shard else "val"
    path = f"{folder}/{name}-{TaskContext.get().taskAttemptId()}"     # a task may run twice
    with config.whole_file(path, "wb") as ids_file, \
            config.whole_file(f"{path}.corpus", "wb") as inputs_file:
        ids_out, inputs_out = config.Checksum(ids_file), config.Checksum(inputs_file)
        for (_, _, (source, *_)), ids in rows:
            ids_out.write(ids)
            inputs_out.write(source.to_bytes(2, "little"))
    yield f"{name}.bin", path, ids_out.crc32
    yield f"{name}.corpus", f"{path}.corpus", inputs_out.crc32


def find_near(documents, n_parts):
    """The near duplicates: compares documents that are connected by bands they agree on."""
    clusters = documents.flatMap(bands).partitionBy(n_parts).mapPartitions(agreeing)
    before, now = None, 0
    while before != now:                 # until the smallest of each component has all of it
        clusters = clusters.flatMap(spread).reduceByKey(ior, n_parts).cache()
        before, now = now, clusters.map(lambda node: hash((node[0], sum(node[1])))).sum()
    rows = clusters.mapValues(min).join(documents, n_parts).map(lambda row: row[::-1])
    rows = rows.repartitionAndSortWithinPartitions(n_parts, itemgetter(0))
    return rows.mapPartitions(near_duplicates).partitionBy(n_parts).persist(StorageLevel.DISK_ONLY)


def count(documents, inputs):
    """prepare_pretrain.count() of documents in Spark."""
    def tally(rows):
        some = np.frombuffer(b"".join(row[1] for _, row in rows), DOCUMENT)
        in_val = held_out(some["hash"], val_fraction)
        yield prepare_pretrain.count(some, in_val, len(inputs))
    return documents.mapPartitions(tally).sum()


def run(spark, inputs, tok, scratch):
    """All steps: meta.json without checksums, and what write() yields."""
    files = [(i, name, path) for i, (_, name, paths) in enumerate(inputs) for path in paths]
    tasks = spark.parallelize(list(enumerate(files)), len(files))
    rows = tasks.mapPartitions(read).persist(StorageLevel.DISK_ONLY)
    documents = rows.filter(lambda row: row[0] is not None)
    kept = found = count(documents, inputs)
    n_found = int(found[..., 0].sum())
    print(f"{n_found:,} documents are clean and encoded", flush=True)
    reasons = sorted(rows.filter(lambda row: row[0] is None).collect())
    dropped = sum((some for _, _, some in reasons), Counter())
    if dedup:
        n_parts = max(spark.defaultParallelism, n_found // 100_000)
        unique = documents.reduceByKey(min, n_parts).persist(StorageLevel.DISK_ONLY)
        near = find_near(unique.mapValues(itemgetter(0, 1, 2)), n_parts)
        documents = unique.subtractByKey(near, n_parts)
        first, again = count(unique, inputs), count(near, inputs)
        kept = first - again
        for what, counts in ("exact duplicate", found - first), ("near duplicate", again):
            for number, n in enumerate(counts[..., 0].sum(1).tolist()):
                dropped[number, Bad(what)] += n
    meta = prepare_pretrain.new_meta(tok, inputs, kept, +dropped, **constants)
    n_shards = 1 + meta["train"]["tokens"] // shard_tokens
    rows = documents.map(partial(placed, n_shards))
    rows = rows.repartitionAndSortWithinPartitions(1 + n_shards, itemgetter(0))
    return meta, sorted(rows.mapPartitionsWithIndex(partial(write, scratch)).collect())


def main():
    prepare_pretrain.check(**constants)
    config.check_range(1, shard_tokens=shard_tokens)
    inputs = sources(corpora, TEXT)
    tok = load(tokenizer)
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    conf = SparkConf().setAppName("prepare_spark").setIfMissing("spark.log.level", "ERROR")
    conf.setMaster(master or conf.get("spark.master", "local[*]"))
    conf.setExecutorEnv("PYTHONPATH", os.pathsep.join(sys.path))
    # twice, as SparkContext sets a handler of its own
    with config.only_user_of("data_dir", data_dir), interruptible(data_dir), \
            SparkContext(conf=conf) as spark, interruptible(data_dir), \
            TemporaryDirectory(dir=os.path.abspath(data_dir)) as scratch:
        meta, files = run(spark, inputs, tok, scratch)
        with config.whole_file(f"{data_dir}/meta.json") as meta_file:
            for name, path, crc32 in files:
                os.replace(path, f"{data_dir}/{name}")
                meta["crc32"][name] = crc32
            json.dump(meta, meta_file, ensure_ascii=False, indent=1)
    print(f"wrote {len(files) // 2 - 1} shards, val.bin and meta.json to {data_dir}")


if __name__ == "__main__":
    try:
        main()
    except (errors.PySparkRuntimeError, Py4JJavaError) as error:
        reason = str(error).rpartition("SystemExit: ")[2].splitlines()[0]
        raise SystemExit(f"Spark (Java 17 or newer, --master={master}): {reason}") from None
