"""Filter: bins, and a model or examples of good text -> bins without the worst documents.

    python filter_pretrain.py --checkpoint=out/pretrain/best.pt                 by bits per byte
    python filter_pretrain.py --good=text:good.jsonl --other=text:web.jsonl     by likeness
    python pretrain.py --data_dir=data/filtered --out_dir=out/filtered

Every document of train.bin gets a score. Those below the quantile drop_low and those above the
quantile 1 - drop_high are dropped. Bits per byte are few for templates and many for garbled text
(perplexity pruning, Marion et al. 2023, arXiv:2309.04564). Likeness is the mean over the tokens of
log P(n-gram | good) / P(n-gram | other), summed over the hashed n-grams of one and two tokens that
end there: a linear classifier that is trained by counting (naive Bayes, with the features of Xie et
al. 2023, arXiv:2302.03169).

val.bin is copied as it is: a filter must not choose the text that it is judged by. Look at the
documents printed from both ends, at scores.png, and at what each corpus lost, before you train on
the result.
"""
import config                                  # before torch: sets how its threads wait
import math
import os

import numpy as np
import torch
from tqdm import tqdm

import checkpoints
import corpora
import runtime
import tokenizer as tokenizers
from model import IGNORE
from readers import interruptible

data_dir     = "data/pretrain"         # the bins of prepare_pretrain.py; they are only read
out_dir      = "data/filtered"         # the same files without the worst documents, and scores.png
tokenizer    = "data/tokenizer.model"  # the one that prepare_pretrain.py was given
checkpoint   = ""                      # score by bits per byte of this model of the same tokenizer
good         = ""                      # or by likeness to these texts, name:path,name:path
other        = ""                      # rather than these; some thousands of each are enough
drop_low     = 0.1                     # share of the documents, those with the lowest scores
drop_high    = 0.0                     # share of the documents, those with the highest scores
batch_tokens = 4_096                   # scored at a time
device       = "auto"                  # auto | cuda | mps | cpu
dtype        = "auto"                  # auto (bfloat16 where fast) | bfloat16 | float16 | float32
config.override(globals())

MADE_BY = "prepare_pretrain.py"
HASH_BITS = 18                         # n-grams are counted in 2^18 buckets
# what meta.json counts of each corpus: what is kept, and by reason what is dropped
FIGURES = checkpoints.COUNTS[MADE_BY]
DROPPED = "dropped", "dropped_tokens", "dropped_bytes"


def pieces(data):
    """Yield (where it starts, int64 copy) of every batch_tokens numbers of a flat array."""
    for at in range(0, len(data), batch_tokens):
        yield at, data[at:at + batch_tokens].astype(np.int64)


@torch.no_grad()
def token_bits(model, ids, tok):
    """The loss of all ids (n + 1,) but the first in bits, (n,), in rows packed as in pretraining.

    A document that goes on in the next row starts there without its context.
    """
    T = model.config.max_seq_len
    n = len(ids) - 1
    x = np.pad(ids[:-1], (0, -n % T))                       # whole rows
    y = np.pad(ids[1:], (0, -n % T), constant_values=IGNORE)
    is_start = x == tok.eos_id
    x[is_start] = tok.bos_id                                # as pretrain.py has it
    is_start[::T] = True
    cu_seqlens = np.append(np.flatnonzero(is_start), len(x))
    arrays = (
        x.reshape(-1, T),
        y.reshape(-1, T),
        cu_seqlens.astype(np.int32))
    x, y, cu_seqlens = (runtime.to_device(a, model.norm.weight.device) for a in arrays)
    nats = model(x, y, cu_seqlens, per_token=True).flatten()[:n]
    return nats.cpu().numpy() / math.log(2)


def buckets(ids):
    """The hashed n-grams of one and of two tokens that end at ids[1:], for ids (n + 1,): (2, n)."""
    ids = ids.astype(np.uint32)
    single = ids[1:] * 0x9E3779B1
    pairs = (single ^ ids[:-1]) * 0x85EBCA6B
    return np.stack((single, pairs)) >> 32 - HASH_BITS


def log_shares(spec, tok):
    """log P(n-gram) in the texts of name:path,name:path, (2^HASH_BITS,)."""
    texts = [
        text for _, text in corpora.documents(spec)
        if not isinstance(text, corpora.Bad)]
    if not texts:
        raise SystemExit(f"{spec}: no text is left after cleaning; name other files")
    counts = np.ones(1 << HASH_BITS)                        # what was never seen counts once
    for ids in tok.encode_batch(texts):
        ids = np.array([tok.eos_id, *ids, tok.eos_id])
        np.add.at(counts, buckets(ids), 1)
    return np.log(counts / counts.sum())


def scorer(tok):
    """(what is measured, function from ids (n + 1,) to a value for all but the first)."""
    if not checkpoint:
        weights = log_shares(good, tok) - log_shares(other, tok)
        return "likeness", lambda ids: weights[buckets(ids)].sum(0)
    model, _, _ = runtime.load_model(checkpoint, tokenizer, device, dtype)
    return "bits per byte", lambda ids: token_bits(model, ids, tok)


def document_ends(train, n_documents, tok):
    """Where the documents of train.bin end, (documents,)."""
    ends = [at + 1 + np.flatnonzero(ids == tok.eos_id) for at, ids in pieces(train)]
    ends = np.concatenate([np.zeros(0, int), *ends])
    if not (len(ends) == n_documents > 0 and ends[-1] == len(train)):
        raise SystemExit(f"{data_dir}/train.bin: does not hold the documents that meta.json says; "
                         f"run python {MADE_BY} again")
    return ends


def scores(train, ends, lengths, tok):
    """(what is measured, the score of each document, its UTF-8 bytes)."""
    measure, value = scorer(tok)
    total = np.zeros(len(ends))
    n_bytes = np.zeros(len(ends), np.int64)
    token_bytes = np.array([len(piece) for piece in tok.pieces])
    before = tok.eos_id
    rounds = -(-len(train) // batch_tokens)
    for at, ids in tqdm(pieces(train), desc=measure, total=rounds, disable=None):
        places = np.arange(at, at + len(ids))
        document = np.searchsorted(ends, places, side="right")
        np.add.at(total, document, value(np.append(before, ids)))
        np.add.at(n_bytes, document, token_bytes[ids])
        before = ids[-1]
    sizes = np.maximum(n_bytes, 1) if checkpoint else lengths
    return measure, total / sizes, n_bytes


def print_extremes(measure, score, train, starts, ends, tok):
    """The beginnings of the documents with the lowest and with the highest scores."""
    order = np.argsort(score)
    for which, some in ("lowest", order[:20]), ("highest", order[:-21:-1]):
        print(f"documents with the {which} {measure}:")
        for i in some:
            ids = train[starts[i]:ends[i]][:60]
            text = tok.decode(ids.tolist())
            text = " ".join(text.split())
            print(f"{score[i]:>10.4f} | {text}")


def draw_histogram(score, limits, measure):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.hist(score, bins=100, range=np.quantile(score, [0.001, 0.999]))
    for limit in limits:
        pyplot.axvline(limit, color="black")
    pyplot.xlabel(measure)
    pyplot.ylabel("documents")
    with config.whole_file(f"{out_dir}/scores.png", "wb") as f:
        pyplot.savefig(f, format="png", dpi=120)
    pyplot.close()


def read_corpora(meta):
    """Their names, and the number of that of each document of train.bin and of val.bin.

    Bins that were prepared before there were such files have one corpus, unknown.
    """
    sizes = {part: meta[part]["documents"] for part in ("train", "val")}
    if not any(name.endswith(".corpus") for name in meta["crc32"]):
        print(f"{data_dir}: prepared before train.corpus was written; all documents are counted as "
              "one corpus, unknown")
        return ["unknown"], *(np.zeros(n, "<u2") for n in sizes.values())
    names, numbers = list(meta["corpora"]), []
    for part, n in sizes.items():
        path = f"{data_dir}/{part}.corpus"
        shards = checkpoints.open_shards(path, "<u2", n, meta, MADE_BY, len(names))
        numbers.append(shards[:])
    return names, *numbers


def report(names, reasons, totals):
    """Print for each corpus what is kept and what each reason dropped; return it for meta.json.

    names: of the corpora; totals: FIGURES of the documents of each corpus that are kept, and of
    those that are dropped for each reason, (corpora, 1 + reasons, 3).
    """
    rows = {}
    print("".join(f"{figure:>16}" for figure in FIGURES))
    lines = ["kept", *(f"dropped: {reason}" for reason in reasons)]
    for name, (kept, *lost) in zip(names, totals.tolist()):
        print(name)
        for line, numbers in zip(lines, (kept, *lost)):
            columns = "".join(f"{number:>16,}" for number in numbers)
            print(f"{columns}  {line}")
        n_records = kept[0] + sum(numbers[0] for numbers in lost)
        rows[name] = {"records": n_records, **dict(zip(FIGURES, kept))}
        for key, column in zip(DROPPED, zip(*lost)):
            rows[name][key] = dict(zip(reasons, column))
    return rows


def main():
    if bool(checkpoint) == bool(good) or bool(good) != bool(other):
        raise SystemExit("filter_pretrain.py: give either --checkpoint=FILE, or --good=name:path "
                         "and --other=name:path")
    if drop_low + drop_high >= 1:
        raise SystemExit(f"--drop_low={drop_low} --drop_high={drop_high}: nothing would be left")
    if os.path.realpath(out_dir) == os.path.realpath(data_dir):
        raise SystemExit(f"--out_dir={out_dir}: the same as data_dir; name another folder")
    tok = tokenizers.load(tokenizer)
    meta = checkpoints.read_meta(f"{data_dir}/meta.json", tok, MADE_BY)
    train, val = (
        checkpoints.open_tokens(f"{data_dir}/{part}.bin", meta[part]["tokens"],
                                meta, MADE_BY, tok.vocab_size)
        for part in ("train", "val"))
    ends = document_ends(train, meta["train"]["documents"], tok)
    names, numbers, val_numbers = read_corpora(meta)
    lengths = np.diff(ends, prepend=0)
    starts = ends - lengths
    measure, score, n_bytes = scores(train, ends, lengths, tok)
    if not np.isfinite(score).all():
        raise SystemExit(f"{checkpoint}: the {measure} of some documents is not finite; try "
                         "--dtype=float32, or another checkpoint")

    low, high = np.quantile(score, [drop_low, 1 - drop_high])
    print_extremes(measure, score, train, starts, ends, tok)
    with config.only_watching("histogram"):
        draw_histogram(score, (low, high), measure)

    reasons = f"{measure} below {low:.4f}", f"{measure} above {high:.4f}"
    fate = (score < low) + 2 * (score > high)              # 0: kept, or the number of the reason
    kept = np.flatnonzero(fate == 0)
    figures = np.stack((np.ones_like(lengths), lengths, n_bytes), 1)
    totals = np.zeros((len(names), 3, 3), np.int64)        # of each corpus, fate and figure
    np.add.at(totals, (numbers, fate), figures)
    meta["before"] = {"train": meta["train"], "corpora": meta["corpora"]}
    of_kept = totals[:, 0].sum(0).tolist()
    meta["train"] = dict(zip(FIGURES, of_kept))
    meta["corpora"] = report(names, reasons, totals)
    files = "val.corpus", "val.bin", "train.corpus", "train.bin"
    with config.whole_bins(out_dir, files, meta) as opened:
        opened["val.corpus"].write(val_numbers)
        opened["val.bin"].write(val)
        opened["train.corpus"].write(numbers[kept])
        for i in kept:
            opened["train.bin"].write(train[starts[i]:ends[i]])
    print(f"wrote {', '.join(files)} and meta.json to {out_dir}")


if __name__ == "__main__":
    with interruptible(out_dir), config.only_user_of("out_dir", out_dir):
        main()
