"""Train a tokenizer: raw corpora -> data/tokenizer.model, and a report on text that it was not trained on.

    python train_tokenizer.py                                                      the demo corpus
    python train_tokenizer.py --corpora=text:my_texts --vocab_size=8000            your own texts
    python train_tokenizer.py --compare=gpt2,chatglm2/tokenizer.model              others beside it in the report

A sentencepiece BPE that loses nothing: no normalisation, digits one by one, and bytes for characters that are too
rare for a piece of their own. The report is printed and saved as <tokenizer>.report.json. The same corpora and
constants give the same bytes, in whatever order the documents come.
"""
import hashlib
import heapq
import io
import json
import math
import re
import time
from collections import Counter, defaultdict

import sentencepiece
from tqdm import tqdm

import config
import corpora as corpus_reader
import tokenizer as tokenizers

corpora            = "text:data/demo/stories.jsonl"  # what to read: name:path,name:path (python corpora.py lists the names)
tokenizer          = "data/tokenizer.model"          # the file to write
vocab_size         = 16_384                          # number of ids, at most 65,536; 256 of them are bytes, 8 control tokens
sample_bytes       = 60_000_000                      # train on that much, drawn evenly; sentencepiece takes 27 times as much memory
test_fraction      = 0.01                            # of the documents, chosen by hash, is never trained on: for the report
test_bytes         = 1_000_000                       # of each corpus at most in the report
character_coverage = 0.9995                          # share of the text whose characters get a piece each; the rest is bytes
max_piece_length   = 12                              # characters; longer pieces learn by heart what one corpus repeats
compare            = ""                              # other tokenizers for the report: files or tiktoken names, by commas
constants = config.override(globals())

CHUNK = 4096          # characters that a training sentence may have: sentencepiece cannot take a word of 65,536
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
            self.limit = -heapq.heappop(self.heap)                 # from now on nothing from here upwards: order is all one
            self.bytes -= len(self.texts.pop(self.limit).encode("utf-8", "replace"))

    def cleaned(self):
        """The texts in the order of their keys, as prepare_pretrain.py cleans them; only what is kept costs that."""
        return [text for key in sorted(self.texts) if (text := corpus_reader.clean(self.texts[key]))]


def hash64(text):
    """64 bits of a text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def sample(spec):
    """Read the corpora once: (texts to train on, {corpus: texts to test on}), no document in both."""
    train, test = Smallest(sample_bytes), defaultdict(lambda: Smallest(test_bytes))
    for corpus, text in tqdm(corpus_reader.documents(spec), desc="reading", unit=" documents"):
        if isinstance(text, corpus_reader.Bad):
            continue                                               # prepare_pretrain.py counts them
        key = hash64(text)
        if key < test_fraction * 2**64:
            test[corpus].offer(key, text)
            continue
        for chunk in chunks(text):
            train.offer(hash64(chunk), chunk)
    return train.cleaned(), {corpus: texts.cleaned() for corpus, texts in test.items()}


def chunks(text):
    """Cut a text into pieces of at most CHUNK characters, behind a line feed where there is one."""
    while len(text) > CHUNK:
        end = text.rfind("\n", 0, CHUNK) + 1 or CHUNK
        yield text[:end]
        text = text[end:]
    yield text


def coverage(texts):
    """character_coverage, or less where the characters would take over half of the vocabulary; and how many they are."""
    counts = Counter()
    for text in texts:
        counts.update(text)
    total, seen = sum(counts.values()), 0
    for n, (_, count) in enumerate(counts.most_common()):
        if seen >= character_coverage * total or n == (vocab_size - RESERVED) // 2:
            break
        seen += count
    return min(character_coverage, seen / total), n


def train(texts):
    """The bytes of a sentencepiece model; SystemExit if the vocabulary and the texts do not fit each other."""
    # sentencepiece uses these two characters itself, and leaves out a sentence with the second one without a word
    texts = [text.translate({0x2581: " ", 0x2585: " "}) for text in texts]
    covered, characters = coverage(texts)
    if covered < character_coverage:
        print(f"character_coverage lowered from {character_coverage} to {covered:.6f}: {characters:,} characters, half of the "
              "vocabulary, get a piece of their own; a larger vocab_size holds more")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, split_digits=True, byte_fallback=True, character_coverage=covered,
            max_sentencepiece_length=max_piece_length, max_sentence_length=16 * CHUNK, control_symbols=tokenizers.CONTROLS,
            unk_id=0, bos_id=1, eos_id=2, pad_id=3, num_threads=1, minloglevel=2)      # the file names its num_threads
    except RuntimeError as error:
        at_most = re.search(r"set it to a value <= (\d+)", str(error))
        if not at_most:
            raise
        raise SystemExit(f"{corpora}: too little text for {vocab_size:,} pieces; more text, or "
                         f"--vocab_size={at_most[1]} at most") from None
    return model.getvalue()


def measure(tok, texts):
    """How a tokenizer does on some texts: sums, which may be added up, as a Counter."""
    sums = Counter(documents=len(texts), characters=0, bytes=0, tokens=0, round_trip_failures=0)
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
            **{name: s[name] for name in ("documents", "characters", "bytes", "tokens", "round_trip_failures")},
            "characters_per_token": round(s["characters"] / max(s["tokens"], 1), 4),
            "bytes_per_token": round(s["bytes"] / max(s["tokens"], 1), 4)} for corpus, s in sums.items()}
    return figures


def print_report(figures, toks, longest):
    """The figures as a table, one row per tokenizer and corpus."""
    print(f"\nheld-out text{'':<21}{'vocabulary':>12}{'documents':>11}{'characters':>12}{'tokens':>10}"
          f"{'chars/token':>13}{'bytes/token':>13}{'not the same':>14}")
    for tok in toks:
        for corpus, f in figures[tok.name].items():
            print(f"{tok.name[-22:]:<23}{corpus[:10]:<11}{tok.vocab_size:>12,}{f['documents']:>11,}{f['characters']:>12,}"
                  f"{f['tokens']:>10,}{f['characters_per_token']:>13.3f}{f['bytes_per_token']:>13.3f}"
                  f"{f['round_trip_failures']:>14}")
    print("not the same: documents that decoding does not give back exactly\nlongest pieces: " + " ".join(longest))


def longest_pieces(tok, n=20):
    """The n longest pieces of a vocabulary, in characters, line feeds shown as \\n."""
    words = [piece.decode("utf-8", "replace") for piece in tok.pieces]
    return [json.dumps(word, ensure_ascii=False) for word in sorted(words, key=len, reverse=True)[:n]]


def main():
    if not RESERVED + 16 <= vocab_size <= 65_536:
        raise SystemExit(f"--vocab_size={vocab_size}: must be between {RESERVED + 16} (control tokens, bytes and a few "
                         "characters) and 65,536 (ids are stored in 16 bits)")
    others = [tokenizers.load(name.strip()) for name in compare.split(",") if name.strip()]     # a wrong name: say so now
    start = time.time()
    texts, test = sample(corpora)
    if not texts:
        raise SystemExit(f"{corpora}: no text to train on")
    print(f"training on {sum(map(len, texts)):,} characters in {len(texts):,} pieces of text, {time.time() - start:.0f} s so far")
    model = train(texts)
    with config.whole_file(tokenizer, "wb") as f:
        f.write(model)
    toks = [tokenizers.load(tokenizer)] + others
    figures, longest = report(toks, test), longest_pieces(toks[0])
    with config.whole_file(f"{tokenizer}.report.json") as f:
        json.dump({"constants": constants, "sha256": toks[0].sha256, "held_out": figures, "longest_pieces": longest},
                  f, ensure_ascii=False, indent=1)
    print_report(figures, toks, longest)
    print(f"wrote {tokenizer} ({toks[0].vocab_size:,} pieces, sha256 {toks[0].sha256[:8]}) in {time.time() - start:.0f} s")
    if not test:
        print(f"no document was held out of so few: the report is empty; --test_fraction={min(test_fraction * 10, 0.5)} takes more")
    if figures[tokenizer]["all"]["round_trip_failures"]:
        raise SystemExit(f"{tokenizer}: some held-out text does not decode to itself; this is a bug, please report it")


if __name__ == "__main__":
    main()
