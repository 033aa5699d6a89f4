"""Train a tokenizer: raw corpora -> data/tokenizer.model, and a report on text it has not seen.

    python train_tokenizer.py                                                the demo corpus
    python train_tokenizer.py --corpora=text:my_texts --vocab_size=8000      your own texts
    python train_tokenizer.py --compare=gpt2,chatglm2/tokenizer.model        compared with others

A sentencepiece BPE that loses nothing: no normalisation, digits one by one, and bytes for
characters that are too rare for a piece of their own. The report is printed and saved as
<out>.report.json. The same corpora and constants give the same bytes, in whatever order the
documents come.
"""
import heapq
import io
import json
import math
import re
from collections import Counter
from multiprocessing.pool import ThreadPool

import numpy as np
import sentencepiece

import config
from cleaning import clean, hash64, pieces
from corpora import CHAT, TEXT, Bad, contents, sources
from readers import interruptible, print_report
from tokenizer import CONTROLS, SPACE, load

corpora            = "text:data/demo/stories.jsonl,messages:data/demo/chat.jsonl"  # name:path,...
out                = "data/tokenizer.model"  # the file to write; the report is written beside it
vocab_size         = 16_384      # number of ids; 256 of them are bytes, 8 are control tokens
sample_bytes       = 60_000_000  # text to train on; sentencepiece needs 30 times as much memory
test_fraction      = 0.01        # of the documents, chosen by hash, is kept for the report
test_bytes         = 1_000_000   # of each corpus at most go into the report
character_coverage = 0.9995      # share of the text whose characters get a piece; others are bytes
max_piece_length   = 12          # characters; longer ones memorise what a corpus repeats
compare            = ""          # other tokenizers for the report: files or names, with commas
constants = config.override(globals())

CHUNK = 4096          # characters: longer documents are sampled in pieces of this length
RESERVED = 8 + 256    # ids of control tokens and bytes


class Smallest:
    """The texts with the smallest keys that fit into a number of bytes, offered in any order."""

    def __init__(self, budget):
        self.budget, self.bytes, self.limit, self.heap, self.texts = budget, 0, math.inf, [], {}

    def offer(self, key, text):
        if key >= self.limit or key in self.texts:                 # too large, or the same text
            return
        self.texts[key] = text
        self.bytes += len(text.encode("utf-8", "replace"))
        heapq.heappush(self.heap, -key)
        while self.bytes > self.budget:
            self.limit = -heapq.heappop(self.heap)                 # refuses all keys from here on
            self.bytes -= len(self.texts.pop(self.limit).encode("utf-8", "replace"))

    def cleaned(self):
        """The texts in the order of their keys, cleaned as prepare_pretrain.py does."""
        texts = [clean(self.texts[key]) for key in sorted(self.texts)]
        return [text for text in texts if text]


def sample(spec):
    """Read the corpora once: (texts to train on, {corpus: texts to test on}).

    Both are chosen by hashes, so that they do not depend on the order of the documents; no
    document is in both.
    """
    table = CHAT | TEXT
    inputs = sources(spec, table)
    train = Smallest(sample_bytes)
    test = {corpus: Smallest(test_bytes) for corpus, _, _ in inputs}
    for corpus, text in contents(inputs, table, title="reading"):
        if isinstance(text, Bad):
            continue                                               # the prepare scripts count them
        if isinstance(text, list):                                 # a dialogue
            text = "\n".join(message["content"] for message in text)
        held_out = hash64(text) < test_fraction * 2**64
        for piece in pieces(text, CHUNK):
            (test[corpus] if held_out else train).offer(hash64(piece), piece)
    return train.cleaned(), {corpus: texts.cleaned() for corpus, texts in test.items()}


def coverage(texts):
    """The share of the text whose characters get a piece each.

    It is character_coverage, or less in a small vocabulary, where half of the pieces are kept for
    longer ones. SystemExit if the vocabulary cannot even hold the characters of 98 % of the text,
    the least that sentencepiece takes.
    """
    counts = sorted(Counter("".join(texts)).values(), reverse=True)
    covered = np.cumsum(counts) / sum(counts)                      # by the n + 1 most frequent ones
    wanted, least = np.searchsorted(covered, [character_coverage, 0.98]) + 1
    room = (vocab_size - RESERVED) // 2
    n = min(wanted, max(room, least))
    if n > 2 * room:
        raise SystemExit(f"--vocab_size={vocab_size}: too small for the {n:,} characters in 98 % "
                         f"of the text; --vocab_size={RESERVED + 2 * n} leaves room for longer "
                         "pieces")
    if n < wanted:
        print(f"vocab_size={vocab_size} is small for this text: only {n:,} of {len(counts):,} "
              f"characters, {covered[n - 1]:.2%} of the text, get a piece of their own")
    return min(character_coverage, covered[n - 1])


def train(texts):
    """The bytes of a sentencepiece model; SystemExit if vocab_size and the texts do not fit."""
    # sentencepiece uses these two characters itself, and drops sentences with the second one
    texts = [text.translate({0x2581: " ", 0x2585: " "}) for text in texts]
    model = io.BytesIO()
    arguments = dict(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe",
        vocab_size=vocab_size, character_coverage=coverage(texts), byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, split_digits=True,
        required_chars=SPACE,                                      # also where no text has a space
        max_sentencepiece_length=max_piece_length, max_sentence_length=16 * CHUNK,
        control_symbols=CONTROLS, unk_id=0, bos_id=1, eos_id=2, pad_id=3, minloglevel=2,
        num_threads=1)                                             # it is written into the file
    try:
        # In another thread, as Ctrl-C has to wait while the main thread runs C++
        ThreadPool(1).apply(sentencepiece.SentencePieceTrainer.train, (), arguments)
    except RuntimeError as error:
        at_most = re.search(r"set it to a value <= (\d+)", str(error))
        if not at_most:
            raise
        raise SystemExit(f"{corpora}: too little text for {vocab_size:,} pieces; more text, or "
                         f"--vocab_size={at_most[1]} at most") from None
    return model.getvalue()


def measure(tok, texts):
    """How a tokenizer does on some texts."""
    encoded = tok.encode_batch(texts)
    n_tokens = sum(map(len, encoded))
    everything = "".join(texts)
    n_characters, n_bytes = len(everything), len(everything.encode("utf-8"))
    failures = sum(tok.decode(ids) != text for text, ids in zip(texts, encoded))
    return {"texts": len(texts), "characters": n_characters, "bytes": n_bytes, "tokens": n_tokens,
            "round_trip_failures": failures,
            "characters_per_token": round(n_characters / max(n_tokens, 1), 4),
            "bytes_per_token": round(n_bytes / max(n_tokens, 1), 4)}


def check_constants():
    """SystemExit with one sentence for constants that cannot work."""
    config.check_range(RESERVED + 16, 65_536, vocab_size=vocab_size)     # ids of 16 bits
    config.check_range(0, 0.9, test_fraction=test_fraction)
    config.check_range(0.98, 1, character_coverage=character_coverage)
    config.check_range(1, 64, max_piece_length=max_piece_length)
    config.check_range(1, sample_bytes=sample_bytes, test_bytes=test_bytes)


def main():
    check_constants()
    config.check_output("out", out)
    others = [load(name.strip()) for name in compare.split(",") if name.strip()]
    texts, test = sample(corpora)
    if not texts:
        raise SystemExit(f"{corpora}: no text to train on")
    print(f"training on {sum(map(len, texts)):,} characters; texts: {len(texts):,}")
    model = train(texts)
    with config.whole_file(out, "wb") as f:
        f.write(model)
    tok = load(out)
    test["all"] = sum(test.values(), [])
    figures = {f"{each.name} on {corpus}": measure(each, held_out)
               for each in (tok, *others) for corpus, held_out in test.items()}
    with config.whole_file(f"{out}.report.json") as f:
        json.dump({"constants": constants, "sha256": tok.sha256, "held_out": figures}, f,
                  ensure_ascii=False, indent=1)
    print("on held-out text:")
    print_report(figures)
    longest = sorted((piece.decode("utf-8", "replace") for piece in tok.pieces), key=len)[-20:]
    print("longest pieces:", longest)
    print(f"wrote {out}: {vocab_size:,} pieces, sha256 {tok.sha256[:8]}")
    if not test["all"]:
        print("the report is empty: of so few documents none was held out; perhaps "
              "--test_fraction=0.2")
    if figures[f"{out} on all"]["round_trip_failures"]:
        raise SystemExit(f"{out}: some held-out text does not decode to itself; this is a bug, "
                         "please report it")


if __name__ == "__main__":
    with interruptible(out):
        main()
