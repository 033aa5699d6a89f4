"""Prepare fine-tuning: question/answer and chat files -> tokens, and a mask of what the model is to learn to say.

    python prepare_sft.py                                                          the demo corpus
    python prepare_sft.py --corpora=alpaca:data/alpaca,sharegpt:data/chat.jsonl    public ones, or your own
    python prepare_sft.py --show=3                                                 and look at three examples

The loss counts on every answer with the token that ends it, and on nothing else. Answers are never cut: a dialogue that
is too long loses whole early turns, or is dropped. Every record is used or counted under a reason. Writes to data_dir

    train.bin  uint16  the tokens, one example behind the other, as tokenizer.render() gives them     val.* likewise
    train.mask uint8   as many: 1 where the loss of predicting this token counts
    train.idx  int64   where each example begins, and the end of the last one
    test.jsonl         held-out dialogues for eval_bleu.py: {"messages": [...], "corpus": "..."}
    meta.json          the report, and the tokenizer that all this belongs to

The same input and constants give the same bytes, whatever the number of workers.
"""
import itertools
import json
import os
import random
import sys
from collections import Counter, defaultdict
from contextlib import ExitStack, closing

import numpy as np
from tqdm import tqdm

import config
import corpora as corpus_reader
import readers
import tokenizer as tokenizers
from cleaning import hash64

corpora        = "messages:data/demo/chat.jsonl"  # name:path,name:path to read; python corpora.py lists the names
tokenizer      = "data/tokenizer.model"           # the one that the model was pretrained with
data_dir       = "data/sft"                       # where the result goes
max_seq_len    = 512                              # tokens that a dialogue may have; not more than the model's
min_prompt     = 1                                # characters of the shortest user turn
max_prompt     = 4096                             # characters of the longest user turn
min_answer     = 1                                # characters of the shortest answer
max_answer     = 4096                             # characters of the longest answer
val_fraction   = 0.01                             # of the questions, for the validation loss
test_fraction  = 0.01                             # of the questions, for eval_bleu.py
augment        = 0.0                              # share of the training dialogues whose questions are changed so:
augment_delete = 0.05                             # probability that a character of such a question is left out
augment_repeat = 0.05                             # probability that it stands there twice
workers        = 0                                # processes; 0: one per core
seed           = 1337                             # of the augmentation, from 0 up
show           = 0                                # print so many training examples, at least one of each corpus, with what is learnt marked
constants = config.override(globals())

FORMAT = 1
TOO_LONG = "longer than max_seq_len"              # a reason to drop a record
BATCH = 100                                       # records that a worker is given at a time
NOT_IN_THE_BYTES = ("data_dir", "workers", "show")  # constants that do not change what is written
SPLITS = {"train": ("bin", "mask", "idx"), "val": ("bin", "mask", "idx"), "test": ("jsonl",)}


# ---- one record, in a worker ------------------------------------------------------------------------------------

def begin():
    """What a worker needs for all batches."""
    global tok
    tok = tokenizers.load(tokenizer)


def examples(batch):
    """[(corpus, example(...))] for a list of (corpus, name, where, record); a Bad instead for what is dropped."""
    results = []
    for corpus, name, where, record in batch:
        try:
            results.append((corpus, example(corpus_reader.messages(name, record, where))))
        except corpus_reader.Bad as bad:
            results.append((corpus, bad))
    return results


def example(messages):
    """What is written of a dialogue, and how it came about, as a dict; raises Bad with the reason to drop it.

    key: hash of the whole dialogue, to find duplicates; split: by the hash of its first question, so that the same
    question never stands on both sides.
    """
    check_lengths(messages)
    key = hash64(json.dumps(messages))
    kept, ids, mask = fit(messages)
    question = hash64(next(m["content"] for m in kept if m["role"] == "user")) / 2**64
    split = "test" if question < test_fraction else "val" if question < test_fraction + val_fraction else "train"
    rng, augmented = random.Random(f"{seed} {key}"), False
    if split == "train" and rng.random() < augment:
        changed = [{**m, "content": garbled(m["content"], rng)} if m["role"] == "user" else m for m in kept]
        longer_ids, longer_mask = tok.render(changed)
        if len(longer_ids) <= max_seq_len:
            ids, mask, augmented = longer_ids, longer_mask, True
    if not any(mask):
        raise corpus_reader.Bad("no target")
    return {"split": split, "key": key, "messages": kept, "ids": np.array(ids, "<u2"), "mask": np.array(mask, "u1"),
            "shortened": len(kept) < len(messages), "augmented": augmented}


def check_lengths(messages):
    """Raise Bad if a turn is shorter or longer than the constants allow."""
    for message in messages:
        n = len(message["content"])
        if message["role"] == "user" and not min_prompt <= n <= max_prompt:
            raise corpus_reader.Bad("prompt too short" if n < min_prompt else "prompt too long")
        if message["role"] == "assistant" and not min_answer <= n <= max_answer:
            raise corpus_reader.Bad("answer too short" if n < min_answer else "answer too long")


def fit(messages):
    """The dialogue without as few early turns as make it fit, and its ids and mask; raises Bad if no exchange fits.

    A system text stays. What is left begins with a turn of the user.
    """
    system = [m for m in messages[:1] if m["role"] == "system"]
    found = None
    for start in range(len(messages) - 1, len(system) - 1, -1):    # from the end: a long dialogue is not rendered often
        if messages[start]["role"] != "user":
            continue
        kept = system + messages[start:]
        ids, mask = tok.render(kept)
        if len(ids) > max_seq_len:
            break
        found = kept, ids, mask
    if not found:
        raise corpus_reader.Bad(TOO_LONG)
    return found


def garbled(text, rng):
    """The text with some characters left out and some twice: a question as people type it."""
    draws = [rng.random() for _ in text]
    return "".join("" if draw < augment_delete else character * (1 + (draw > 1 - augment_repeat))
                   for character, draw in zip(text, draws)) or text


# ---- all records, in order --------------------------------------------------------------------------------------

def batches():
    """Yield lists of (corpus, name, where, record), and show how far the reading is."""
    sources = corpus_reader.sources(corpora, corpus_reader.CHAT)
    size = sum(os.path.getsize(path) for _, _, files in sources for path in files)
    with tqdm(total=size, desc="preparing", unit="B", unit_scale=True, disable=None) as bar:
        records = corpus_reader.raw_records(sources, corpus_reader.CHAT, bar.update)
        while batch := list(itertools.islice(records, BATCH)):
            yield batch


def results(n_workers):
    """Yield (corpus, example or Bad) for every record in the order of the files, made by n_workers processes."""
    with closing(readers.in_order(examples, batches(), n_workers, begin)) as found:
        for batch in found:
            yield from batch


def write(files, results):
    """Write the examples as they come; returns {"train": figures, "val": ..., "test": ...}, {corpus: figures}, and
    the number of each corpus' first training example."""
    splits = {split: new_figures(dropped=False) for split in SPLITS}
    by_corpus, seen, first = defaultdict(new_figures), set(), {}
    for split in "train", "val":
        files[split, "idx"].write(np.int64(0).astype("<i8").tobytes())
    for corpus, result in results:
        total = by_corpus[corpus]
        total["records"] += 1
        if not isinstance(result, corpus_reader.Bad) and result["key"] in seen:
            result = corpus_reader.Bad("duplicate")
        if isinstance(result, corpus_reader.Bad):
            total["dropped"][result] += 1
            continue
        seen.add(result["key"])
        split = result["split"]
        for figures in total, splits[split]:
            figures["examples"] += 1
            figures["tokens"] += len(result["ids"])
            figures["targets"] += int(result["mask"].sum())
            figures["longest"] = max(figures["longest"], len(result["ids"]))
            figures["shortened"] += result["shortened"]
            figures["augmented"] += result["augmented"]
        if split == "test":
            line = {"messages": result["messages"], "corpus": corpus}
            files["test", "jsonl"].write(json.dumps(line, ensure_ascii=False).encode("utf-8") + b"\n")
        else:
            if split == "train":
                first.setdefault(corpus, splits["train"]["examples"] - 1)
            files[split, "bin"].write(result["ids"].tobytes())
            files[split, "mask"].write(result["mask"].tobytes())
            files[split, "idx"].write(np.int64(splits[split]["tokens"]).astype("<i8").tobytes())
    for figures in by_corpus.values():
        figures["dropped"] = Counter({str(bad): count for bad, count in figures["dropped"].items()})
    return splits, by_corpus, list(first.values())


def new_figures(dropped=True):
    figures = dict.fromkeys(("examples", "tokens", "targets", "longest", "shortened", "augmented"), 0)
    return {"records": 0, **figures, "dropped": Counter()} if dropped else figures


# ---- what the user sees -----------------------------------------------------------------------------------------

def print_report(splits, by_corpus):
    """A row per corpus and per split; behind it why records were dropped."""
    width = max(map(len, by_corpus)) + 2
    columns = ("records", "examples", "tokens", "targets", "longest", "shortened", "augmented")
    print(f"\n{'':<{width}}" + "".join(f"{c:>12}" for c in columns) + "   dropped")
    for name, figures in [*by_corpus.items(), *splits.items()]:
        dropped = figures.get("dropped", {})
        print(f"{name:<{width}}" + "".join(f"{figures[c]:>12,}" if c in figures else f"{'':>12}" for c in columns)
              + "   " + ", ".join(f"{n:,} {reason}" for reason, n in sorted(dropped.items())))
    print("targets: tokens that count in the loss; shortened: dialogues that lost early turns to fit max_seq_len; "
          "augmented: those whose questions were changed")
    records = sum(figures["records"] for figures in by_corpus.values())
    too_long = sum(figures["dropped"][TOO_LONG] for figures in by_corpus.values())
    if too_long > records / 20:
        print(f"{too_long:,} of {records:,} records were dropped because they are longer than "
              f"--max_seq_len={max_seq_len}: a larger one keeps them, for a model whose context is as long")


def spread(n, first, total):
    """The numbers of about n of `total` examples: as many of each corpus, at least one, and spread over all of it.

    first: the number of each corpus' first example.
    """
    numbers, ends = [], [*first[1:], total]
    for i, (begin, end) in enumerate(zip(first, ends)):
        share = max(1, n * (i + 1) // len(first) - n * i // len(first)) if n else 0
        numbers += sorted({begin + j * (end - begin) // share for j in range(share)})
    return numbers


def print_examples(tok, n, first):
    """Print n training examples, read back from the files, with everything that the loss counts on marked."""
    tokens, mask, idx = (np.memmap(f"{data_dir}/train.{kind}", dtype, "r")
                         for kind, dtype in (("bin", "<u2"), ("mask", "u1"), ("idx", "<i8")))
    on, off = ("\033[7m", "\033[0m") if sys.stdout.isatty() else ("【", "】")
    names = {id: text for text, id in tok.controls.items()}
    names |= {tok.bos_id: "<bos>", tok.eos_id: "<eos>"}
    for example in spread(n, first, len(idx) - 1):
        part = slice(idx[example], idx[example + 1])
        print(f"\n--- example {example} of train.bin: {idx[example + 1] - idx[example]} tokens, the loss counts on "
              f"{int(mask[part].sum())}, marked {on}like this{off}")
        for counts, run in itertools.groupby(zip(tokens[part].tolist(), mask[part].tolist()), key=lambda pair: pair[1]):
            data = b"".join(names[id].encode() if id in names else tok.pieces[id] for id, _ in run)
            print(on + data.decode("utf-8", "replace") + off if counts else data.decode("utf-8", "replace"), end="")
        print()


def check_constants(tok):
    """SystemExit with one sentence for constants that cannot work."""
    if tok.vocab_size > 65_536:
        raise SystemExit(f"{tokenizer}: a vocabulary of {tok.vocab_size:,} does not fit the bins, whose ids are below "
                         "65,536; take a model with a smaller one")
    for name in "val_fraction", "test_fraction", "augment", "augment_delete", "augment_repeat":
        if not 0 <= constants[name] <= 1:
            raise SystemExit(f"--{name}={constants[name]}: must be between 0 and 1")
    if val_fraction + test_fraction >= 1 or augment_delete + augment_repeat > 1:
        raise SystemExit("val_fraction + test_fraction must leave something to train on (below 1), and "
                         "augment_delete + augment_repeat must not be over 1")
    for name in "max_seq_len", "min_prompt", "max_prompt", "min_answer", "max_answer":
        if constants[name] < 1:
            raise SystemExit(f"--{name}={constants[name]}: must be at least 1")
    if workers < 0 or show < 0:
        raise SystemExit(f"--workers={workers} --show={show}: neither can be negative")


def main():
    tok = tokenizers.load(tokenizer)
    tok.prompt([])                                                 # refuses a chat template that is not known
    check_constants(tok)
    with ExitStack() as stack:                                     # meta.json last: it vouches for the others
        meta_file = stack.enter_context(config.whole_file(f"{data_dir}/meta.json"))
        files = {(split, kind): config.Checksum(stack.enter_context(config.whole_file(f"{data_dir}/{split}.{kind}", "wb")))
                 for split, kinds in SPLITS.items() for kind in kinds}
        with closing(results(workers or os.cpu_count())) as found:
            splits, by_corpus, first = write(files, found)
        if not splits["train"]["examples"]:
            reasons = sum((figures["dropped"] for figures in by_corpus.values()), Counter())
            raise SystemExit(f"{corpora}: no dialogue is left to train on; records dropped: {dict(reasons)}")
        meta = {"format": FORMAT, "tokenizer": tok.name, "tokenizer_sha256": tok.sha256, "vocab_size": tok.vocab_size,
                "bos_id": tok.bos_id, "eos_id": tok.eos_id, "seed": seed, "max_seq_len": max_seq_len,
                "longest": max(splits[split]["longest"] for split in SPLITS), **splits, "corpora": by_corpus,
                "crc32": {f"{split}.{kind}": file.crc32 for (split, kind), file in files.items()},
                "constants": {name: value for name, value in constants.items() if name not in NOT_IN_THE_BYTES}}
        json.dump(meta, meta_file, ensure_ascii=False, indent=1)
    print_report(splits, by_corpus)
    print_examples(tok, show, first)
    print(f"\nwrote {data_dir}: {splits['train']['examples']:,} examples to train on, {splits['val']['examples']:,} to "
          f"validate, {splits['test']['examples']:,} to test")


if __name__ == "__main__":
    with readers.interruptible(data_dir), config.only_user_of("data_dir", data_dir):
        main()
