"""Question/answer and chat files -> tokens, and a mask of the tokens that count in the loss.

    python prepare_sft.py                                               the demo corpus
    python prepare_sft.py --corpora=alpaca:data/alpaca,sharegpt:a.jsonl public ones, or your own
    python prepare_sft.py --show=3                                      print some examples
    python prepare_sft.py --corpora=preference:pairs.jsonl              pairs for dpo.py

The loss counts on every answer and the token that ends it, and on nothing else. Answers are never
cut: a dialogue that is too long loses whole early turns, or is dropped. Every record is used or
counted under a reason. Writes to data_dir, for train and val alike:

    train.bin  uint16  the tokens of all examples (uint32 for vocabularies above 65,536)
    train.mask uint8   as many: 1 where the loss of predicting this token counts
    train.idx  int64   where each example begins, and the end of the last one
    test.jsonl         held-out dialogues for eval_bleu.py: {"messages": [...], "corpus": "..."}
    meta.json          the report, and the tokenizer of the bins

Of preferences, examples 2 i and 2 i + 1 are the better and the worse answer to one prompt, and the
loss counts on the last answer only; meta.json says "pairs": true.

The same input and constants give the same bytes with any number of workers.
"""
import itertools
import json
import random
import sys
from collections import Counter
from contextlib import closing

import numpy as np

import config
from cleaning import hash64
from corpora import CHAT, PREFERENCE, Bad, batches, contents, read, sources
from readers import in_order, interruptible, print_report
from tokenizer import load

corpora        = "messages:data/demo/chat.jsonl"  # name:path,name:path; see python corpora.py
tokenizer      = "data/tokenizer.model"           # the one that the model was pretrained with
data_dir       = "data/sft"                       # where the result goes
max_seq_len    = 512                              # tokens of a dialogue, at most the model's
min_prompt     = 1                                # characters of the shortest user turn
max_prompt     = 4096                             # characters of the longest user turn
min_answer     = 1                                # characters of the shortest answer
max_answer     = 4096                             # characters of the longest answer
val_fraction   = 0.01                             # of the questions, for the validation loss
test_fraction  = 0.01                             # of the questions, for eval_bleu.py
augment        = 0.0                              # share of training dialogues with noisy questions
augment_delete = 0.05                             # probability to leave out one of its characters
augment_repeat = 0.05                             # probability to write one of them twice
workers        = 0                                # processes; 0: one per core
seed           = 1337                             # of the augmentation, from 0 up
show           = 0                                # print so many training examples of each corpus
config.override(globals())

TOO_LONG = "longer than max_seq_len"              # a reason to drop a record
FILES = ("train.bin", "train.mask", "train.idx", "val.bin", "val.mask", "val.idx", "test.jsonl")
TABLE = CHAT | PREFERENCE
SAMPLE = 1000                                     # records read to see if they share a question


# ---- one record, in a worker ---------------------------------------------------------------------

def begin(name, inputs):
    """Load what a worker needs for all batches. inputs: the numbers of those split by dialogue."""
    global worker_tokenizer, split_by_dialogue
    worker_tokenizer, split_by_dialogue = load(name), inputs


def examples(batch):
    """[(input number, example(), or Bad for what is dropped)] of a batch of records."""
    results = []
    for number, name, place, record in batch:
        try:
            dialogues = dialogues_of(read(TABLE, name, place, record))
            results.append((number, example(dialogues, number in split_by_dialogue)))
        except Bad as bad:
            results.append((number, bad))
    return results


def dialogues_of(content):
    """[the dialogue], or of a preference [the one with the better answer, with the worse one].

    content: what corpora.read() returns.
    """
    if isinstance(content, list):
        return [content]
    prompt, *answers = content
    prompt = [{**m, "train": False} if m["role"] == "assistant" else m for m in prompt]
    return [prompt + [{"role": "assistant", "content": answer}] for answer in answers]


def example(dialogues, by_dialogue=False):
    """What is written of a record, as a dict; raises Bad with the reason to drop it.

    key: hash of the whole record, to find duplicates. split: by the hash of the first question, so
    that no question is in two splits; by_dialogue: by the key.
    """
    check_lengths(dialogues)
    key = hash64("".join(map(json.dumps, dialogues)))
    kept, rendered = fit(dialogues)
    split = split_of(key if by_dialogue else hash64(first_question(kept)))
    augmented = False
    if split == "train":
        noisy = [with_noise(messages, random.Random(f"{seed} {key}")) for messages in kept]
        if noisy != kept and (fitting := render(noisy)):
            rendered, augmented = fitting, True
    if not all(any(mask) for _, mask in rendered):
        raise Bad("no target")
    dtype = worker_tokenizer.id_dtype
    return {"key": key, "split": split, "dialogues": kept, "augmented": augmented,
            "shortened": len(kept[0]) < len(dialogues[0]),
            "rendered": [(np.array(ids, dtype), np.array(mask, "u1")) for ids, mask in rendered]}


def check_lengths(dialogues):
    """Raise Bad if a turn is shorter or longer than the constants allow."""
    for message in itertools.chain.from_iterable(dialogues):
        n = len(message["content"])
        if message["role"] == "user" and not min_prompt <= n <= max_prompt:
            raise Bad("prompt too short" if n < min_prompt else "prompt too long")
        if message["role"] == "assistant" and not min_answer <= n <= max_answer:
            raise Bad("answer too short" if n < min_answer else "answer too long")


def render(dialogues):
    """[(ids, mask)] of the dialogues; None if one of them is too long."""
    rendered = [worker_tokenizer.render(messages) for messages in dialogues]
    return rendered if max(len(ids) for ids, _ in rendered) <= max_seq_len else None


def fit(dialogues):
    """The dialogues without as few early turns as make them fit, and their (ids, mask).

    A system text stays, and what follows begins with a turn of the user. Raises Bad if not even the
    last exchange fits.
    """
    messages = dialogues[0]                           # the other has the same turns but the last
    n_system = int(messages[0]["role"] == "system")
    longest = None
    for start in reversed(range(n_system, len(messages))):        # few steps for a long dialogue
        if messages[start]["role"] == "user":
            kept = [turns[:n_system] + turns[start:] for turns in dialogues]
            rendered = render(kept)
            if not rendered:
                break
            longest = kept, rendered
    if not longest:
        raise Bad(TOO_LONG)
    return longest


def first_question(dialogues):
    return next(message["content"] for message in dialogues[0] if message["role"] == "user")


def split_of(hash):
    """The split that 64 evenly distributed bits stand for."""
    position = hash / 2**64
    if position < test_fraction:
        return "test"
    return "val" if position < test_fraction + val_fraction else "train"


def with_noise(messages, rng):
    """A share of all dialogues with typos in the questions, the others as they are."""
    if rng.random() >= augment:
        return messages
    return [{**m, "content": with_typos(m["content"], rng)} if m["role"] == "user" else m
            for m in messages]


def with_typos(text, rng):
    """The text with some characters left out and some twice: a question as people type it."""
    typed = ""
    for character in text:
        draw = rng.random()
        if draw >= augment_delete:
            typed += character * (2 if draw > 1 - augment_repeat else 1)
    return typed or text


# ---- all records, in order -----------------------------------------------------------------------

def sharing_a_question(inputs):
    """The numbers of the inputs whose first records mostly begin with the same question."""
    found = set()
    for number, source in enumerate(inputs):
        questions = Counter()
        for _, content in itertools.islice(contents([source], TABLE), SAMPLE):
            if not isinstance(content, Bad):          # the bad ones are counted by write()
                questions[first_question(dialogues_of(content))] += 1
        most = max(questions.values(), default=0)
        if most > 1 and most > questions.total() / 2:
            found.add(number)
            print(f"{source[0]}: most dialogues begin with the same question, so they are split by "
                  "a hash of the whole dialogue")
    return found


def write(files, results, inputs, rows):
    """Write the examples as they come and count them in rows, {corpus or split: figures}.

    results: [(input number, example or Bad)] of every batch. Returns (ids, mask) of the first
    `show` training examples of each corpus.
    """
    seen, shown, n_shown, ends = set(), [], Counter(), Counter()
    for split in "train", "val":
        files[f"{split}.idx"].write(bytes(8))         # the first example begins at 0
    for number, result in itertools.chain.from_iterable(results):
        corpus = inputs[number][0]
        row = rows[corpus]
        row["records"] += 1
        if not isinstance(result, Bad) and result["key"] in seen:
            result = Bad("duplicate")
        if isinstance(result, Bad):
            row["dropped"][result] += 1
            continue
        seen.add(result["key"])
        split = result["split"]
        count(result, row)
        count(result, rows[split])
        if split == "test":
            messages, *other = result["dialogues"]
            line = {"messages": messages, "corpus": corpus}
            if other:
                line["rejected"] = other[0][-1]["content"]
            text = json.dumps(line, ensure_ascii=False) + "\n"
            files["test.jsonl"].write(text.encode("utf-8"))
            continue
        if split == "train" and n_shown[corpus] < show:
            n_shown[corpus] += 1
            shown += result["rendered"]
        for ids, mask in result["rendered"]:
            ends[split] += len(ids)
            files[f"{split}.bin"].write(ids)
            files[f"{split}.mask"].write(mask)
            files[f"{split}.idx"].write(np.array([ends[split]], "<i8"))
    return shown


def count(result, row):
    """Add the figures of a record to a row of the report."""
    for ids, mask in result["rendered"]:
        row["examples"] += 1
        row["tokens"] += len(ids)
        row["targets"] += int(mask.sum())
        row["longest"] = max(row["longest"], len(ids))
    row["shortened"] += result["shortened"]
    row["augmented"] += result["augmented"]


# ---- what the user sees --------------------------------------------------------------------------

def print_figures(rows):
    """The report, what its figures mean, and a hint where many dialogues were too long."""
    print_report(rows)
    print("targets: tokens that count in the loss; shortened: dialogues that lost early turns to "
          "fit max_seq_len; augmented: those whose questions were changed")
    n_records = sum(row.get("records", 0) for row in rows.values())
    n_too_long = sum(row.get("dropped", {}).get(TOO_LONG, 0) for row in rows.values())
    if n_too_long > n_records / 20:
        print(f"dropped as longer than --max_seq_len={max_seq_len}: {n_too_long:,} of "
              f"{n_records:,} records. A larger one keeps them, for a model whose context is as "
              "long")


def print_examples(tok, shown):
    """Print examples with the tokens that count in the loss highlighted."""
    on, off = ("\033[7m", "\033[0m") if sys.stdout.isatty() else ("【", "】")
    pieces = list(tok.pieces)
    for name, id in {**tok.controls, "<bos>": tok.bos_id, "<eos>": tok.eos_id}.items():
        pieces[id] = name.encode()
    for ids, mask in shown:
        print(f"\n--- an example of {len(ids)} tokens, of which {mask.sum()} count in the loss, "
              f"marked {on}like this{off}")
        for counts, run in itertools.groupby(zip(ids, mask), key=lambda token: token[1]):
            data = b"".join(pieces[id] for id, _ in run)
            text = data.decode("utf-8", "replace")
            print(on + text + off if counts else text, end="")
        print()


def check_constants():
    """SystemExit with one sentence for constants that cannot work."""
    config.check_range(0, 0.9, val_fraction=val_fraction, test_fraction=test_fraction)
    config.check_range(0, 1, augment=augment, augment_delete=augment_delete,
                       augment_repeat=augment_repeat)
    config.check_range(1, max_seq_len=max_seq_len, min_prompt=min_prompt, max_prompt=max_prompt,
                       min_answer=min_answer, max_answer=max_answer)
    if val_fraction + test_fraction >= 1 or augment_delete + augment_repeat > 1:
        raise SystemExit("val_fraction + test_fraction must leave something to train on (below 1), "
                         "and augment_delete + augment_repeat must not be over 1")


def main():
    check_constants()
    tok = load(tokenizer)
    tok.prompt([])                             # refuses a chat template that is not known
    inputs = sources(corpora, TABLE)
    kinds = {name in PREFERENCE for _, name, _ in inputs}
    if len(kinds) == 2:
        raise SystemExit(f"{corpora}: dialogues and preferences need two runs, each with a "
                         "--data_dir of its own")
    are_pairs = True in kinds
    if are_pairs and data_dir == "data/sft":
        raise SystemExit(f"{corpora}: preferences go to a folder of their own: --data_dir=data/dpo")
    names = "examples", "tokens", "targets", "longest", "shortened", "augmented"
    figures = dict.fromkeys(names, 0)
    by_corpus = {corpus: {"records": 0, **figures, "dropped": Counter()} for corpus, _, _ in inputs}
    splits = {split: dict(figures) for split in ("train", "val", "test")}
    rows = {**by_corpus, **splits}             # filled in below, for meta.json as well
    meta = {"format": 1, "tokenizer": tok.name, "tokenizer_sha256": tok.sha256,
            "vocab_size": tok.vocab_size, "bos_id": tok.bos_id, "eos_id": tok.eos_id,
            "dtype": tok.id_dtype, "pairs": are_pairs, **splits, "corpora": by_corpus}
    with config.whole_bins(data_dir, FILES, meta) as files:
        by_dialogue = sharing_a_question(inputs)
        batched = batches(inputs, TABLE, "preparing")
        results = in_order(examples, batched, workers, begin, tokenizer, by_dialogue)
        with closing(results):
            shown = write(files, results, inputs, rows)
        for row in by_corpus.values():
            row["dropped"] = {str(bad): n for bad, n in row["dropped"].items()}
        print_figures(rows)
        print_examples(tok, shown)
        n_train = splits["train"]["examples"]
        if not n_train:
            raise SystemExit(f"{corpora}: no dialogue is left to train on")
        if val_fraction and not splits["val"]["examples"]:
            raise SystemExit(f"{corpora}: too few dialogues for --val_fraction={val_fraction}: "
                             "none is held out for validation; try --val_fraction="
                             f"{min(0.5, 5 / n_train):.2g}, or add dialogues")
    print(f"\nwrote {data_dir}")


if __name__ == "__main__":
    with interruptible(data_dir), config.only_user_of("data_dir", data_dir):
        main()
