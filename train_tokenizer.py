"""Train a tokenizer: raw corpora -> data/tokenizer.model, and a report on text that it was not trained on.

    python train_tokenizer.py                                                      the demo corpus
    python train_tokenizer.py --corpora=text:my_texts --vocab_size=8000            your own texts
    python train_tokenizer.py --compare=gpt2,chatglm2/tokenizer.model              others beside it in the report

A sentencepiece BPE that loses nothing: no normalisation, digits one by one, and bytes for characters that are too
rare for a piece of their own. The report is printed and saved as <out>.report.json. The same corpora and
constants give the same bytes, in whatever order the documents come.
"""
import heapq
import io
import json
import math
import os
import re
import time
from collections import Counter

import sentencepiece
from tqdm import tqdm

import config
import corpora as corpus_reader
import tokenizer as tokenizers
from cleaning import clean, hash64

corpora            = "text:data/demo/stories.jsonl,messages:data/demo/chat.jsonl"  # name:path,... that models will see
out                = "data/tokenizer.model"  # the file to write; the report stands beside it
vocab_size         = 16_384      # number of ids, at most 65,536; 256 of them are bytes and 8 control tokens
sample_bytes       = 60_000_000  # train on so much, drawn evenly; sentencepiece takes 30 times as much memory
test_fraction      = 0.01        # of the documents, chosen by hash, is never trained on but kept for the report
test_bytes         = 1_000_000   # of each corpus at most go into the report
character_coverage = 0.9995      # share of the text whose characters get a piece each; the others become bytes
max_piece_length   = 12          # characters; longer pieces learn by heart what one corpus repeats
compare            = ""          # other tokenizers for the report: files or tiktoken names, separated by commas
constants = config.override(globals())

CHUNK = 4096          # characters: longer documents are drawn in such pieces, so that none fills the whole sample
RESERVED = 8 + 256    # ids of control tokens and bytes


class Smallest:
    """The texts with the smallest keys that fit into a number of bytes, whatever order they are offered in."""

    def __init__(self, budget):
        self.budget, self.bytes, self.limit, self.heap, self.texts = budget, 0, math.inf, [], {}

    def offer(self, key, text):
        if key >= self.limit or key in self.texts:                 # too large, or the same text again
            return
        self.texts[key] = text
        self.bytes += len(text.encode("utf-8", "replace"))
        heapq.heappush(self.heap, -key)
        while self.bytes > self.budget:
            self.limit = -heapq.heappop(self.heap)                 # nothing from here upwards, whenever it comes
            self.bytes -= len(self.texts.pop(self.limit).encode("utf-8", "replace"))


def sample(spec):
    """Read the corpora once: (texts to train on, {corpus: texts to test on}), no document in both."""
    table = corpus_reader.CHAT | corpus_reader.TEXT
    sources = corpus_reader.sources(spec, table)
    size = sum(os.path.getsize(path) for _, _, files in sources for path in files)
    train, test = Smallest(sample_bytes), {}
    with tqdm(total=size, desc="reading", unit="B", unit_scale=True, disable=None) as bar:
        for source in sources:
            corpus = source[0]
            test[corpus] = Smallest(test_bytes)
            for raw in corpus_reader.raw_records([source], table, bar.update):
                try:
                    text = corpus_reader.read(table, *raw[1:])
                except corpus_reader.Bad:
                    continue                                       # the prepare scripts count them
                if isinstance(text, list):                         # a dialogue
                    text = "\n".join(message["content"] for message in text)
                held_out = hash64(text) < test_fraction * 2**64
                for chunk in chunks(text):
                    (test[corpus] if held_out else train).offer(hash64(chunk), chunk)
    return cleaned(train), {corpus: cleaned(texts) for corpus, texts in test.items()}


def cleaned(sampled):
    """The texts of a Smallest by their keys, cleaned as prepare_pretrain.py does; only what was kept costs that."""
    return [text for key in sorted(sampled.texts) if (text := clean(sampled.texts[key]))]


def chunks(text):
    """Cut a text into pieces of at most CHUNK characters, behind a line feed where there is one."""
    while len(text) > CHUNK:
        end = text.rfind("\n", 0, CHUNK) + 1 or CHUNK
        yield text[:end]
        text = text[end:]
    yield text


def coverage(texts):
    """The share of the text whose characters get a piece each: character_coverage, or less in a small vocabulary.

    SystemExit if the vocabulary cannot even hold the characters of 98 % of the text, the least sentencepiece takes.
    """
    counts = Counter()
    for text in texts:
        counts.update(text)
    total, seen, room = sum(counts.values()), 0, (vocab_size - RESERVED) // 2      # the other half is for longer pieces
    for n, (_, count) in enumerate(counts.most_common()):
        if seen >= total * (0.98 if n >= room else character_coverage):
            break
        seen += count
    if n > 2 * room:
        raise SystemExit(f"--vocab_size={vocab_size}: too small for the {n:,} characters in 98 % of the text; "
                         f"--vocab_size={RESERVED + 2 * n} leaves room for longer pieces")
    if seen < total * character_coverage:
        print(f"character_coverage lowered from {character_coverage} to {seen / total:.6f}, {n:,} characters")
    return min(character_coverage, seen / total)


def train(texts):
    """The bytes of a sentencepiece model; SystemExit if the vocabulary and the texts do not fit each other."""
    # sentencepiece uses these two characters itself, and leaves out a sentence with the second one without a word
    texts = [text.translate({0x2581: " ", 0x2585: " "}) for text in texts]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, split_digits=True, byte_fallback=True,
            required_chars=tokenizers.SPACE,                      # or a text without blanks makes a model that has none
            character_coverage=coverage(texts), max_sentencepiece_length=max_piece_length,
            max_sentence_length=16 * CHUNK, control_symbols=tokenizers.CONTROLS, unk_id=0, bos_id=1, eos_id=2, pad_id=3,
            num_threads=1, minloglevel=2)                          # num_threads is written into the file: not all cores
    except RuntimeError as error:
        at_most = re.search(r"set it to a value <= (\d+)", str(error))
        if not at_most:
            raise
        raise SystemExit(f"{corpora}: too little text for {vocab_size:,} pieces; more text, or "
                         f"--vocab_size={at_most[1]} at most") from None
    return model.getvalue()


def measure(tok, texts):
    """How a tokenizer does on some texts: sums, which may be added up, as a Counter."""
    sums = Counter(texts=len(texts), characters=0, bytes=0, tokens=0, round_trip_failures=0)
    for text, ids in zip(texts, tok.encode_batch(texts)):
        sums += Counter(characters=len(text), bytes=len(text.encode("utf-8")), tokens=len(ids),
                        round_trip_failures=int(tok.decode(ids) != text))
    return sums


def report(toks, test):
    """{tokenizer: {corpus or "all": figures}} on the held-out texts."""
    figures = {}
    for tok in toks:
        sums = {corpus: measure(tok, texts) for corpus, texts in test.items()}
        sums["all"] = sum(sums.values(), Counter())
        figures[tok.name] = {corpus: {
            **{name: s[name] for name in ("texts", "characters", "bytes", "tokens", "round_trip_failures")},
            "characters_per_token": round(s["characters"] / max(s["tokens"], 1), 4),
            "bytes_per_token": round(s["bytes"] / max(s["tokens"], 1), 4)} for corpus, s in sums.items()}
    return figures


def print_report(figures, longest):
    """The figures as a table: a row for each corpus and tokenizer."""
    corpora, toks = list(next(iter(figures.values()))), list(figures)
    widths = max(map(len, corpora + ["held-out text"])) + 2, max(map(len, toks)) + 2
    print(f"\n{'held-out text':<{widths[0]}}{'tokenizer':<{widths[1]}}{'texts':>7}{'characters':>12}{'tokens':>10}"
          f"{'chars/token':>13}{'bytes/token':>13}{'round-trip failures':>21}")
    for corpus in corpora:
        for tok in toks:
            f = figures[tok][corpus]
            print(f"{corpus:<{widths[0]}}{tok:<{widths[1]}}{f['texts']:>7,}{f['characters']:>12,}{f['tokens']:>10,}"
                  f"{f['characters_per_token']:>13.3f}{f['bytes_per_token']:>13.3f}{f['round_trip_failures']:>21}")
    print("longest pieces: " + " ".join(longest))


def longest_pieces(tok, n=20):
    """The n longest pieces of a vocabulary, in characters, line feeds shown as \\n."""
    words = [piece.decode("utf-8", "replace") for piece in tok.pieces]
    return [json.dumps(word, ensure_ascii=False) for word in sorted(words, key=len, reverse=True)[:n]]


def check_constants():
    """SystemExit with one sentence for constants that cannot work."""
    if not RESERVED + 16 <= vocab_size <= 65_536:
        raise SystemExit(f"--vocab_size={vocab_size}: must be between {RESERVED + 16} (control tokens, bytes and a few "
                         "characters) and 65,536 (ids are stored in 16 bits)")
    if not 0 <= test_fraction < 1:
        raise SystemExit(f"--test_fraction={test_fraction}: must be at least 0 and below 1")
    if not 0.98 <= character_coverage <= 1:
        raise SystemExit(f"--character_coverage={character_coverage}: must be between 0.98 and 1")
    if not 1 <= max_piece_length <= 64:
        raise SystemExit(f"--max_piece_length={max_piece_length}: must be between 1 and 64 characters")
    if min(sample_bytes, test_bytes) < 1:
        raise SystemExit(f"--sample_bytes={sample_bytes} --test_bytes={test_bytes}: must be at least 1")


def main():
    check_constants()
    config.check_output("out", out)
    others = [tokenizers.load(name.strip()) for name in compare.split(",") if name.strip()]   # say now if one is wrong
    start = time.time()
    texts, test = sample(corpora)
    if not texts:
        raise SystemExit(f"{corpora}: no text to train on")
    print(f"training on {sum(map(len, texts)):,} characters in {len(texts):,} texts")
    model = train(texts)
    with config.whole_file(out, "wb") as f:
        f.write(model)
    toks = [tokenizers.load(out)] + others
    figures, longest = report(toks, test), longest_pieces(toks[0])
    with config.whole_file(f"{out}.report.json") as f:
        json.dump({"constants": constants, "sha256": toks[0].sha256, "held_out": figures, "longest_pieces": longest},
                  f, ensure_ascii=False, indent=1)
    print_report(figures, longest)
    print(f"wrote {out}: {vocab_size:,} pieces, sha256 {toks[0].sha256[:8]}, {time.time() - start:.0f} s")
    if not any(test.values()):
        print("the report is empty: of so few documents none was held out; perhaps --test_fraction=0.2")
    if figures[out]["all"]["round_trip_failures"]:
        raise SystemExit(f"{out}: some held-out text does not decode to itself; this is a bug, please report it")


if __name__ == "__main__":
    main()
