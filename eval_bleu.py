"""Answer held-out questions and compare with their references: BLEU-4 on Chinese characters, and a table to read.

    python eval_bleu.py                                     100 questions of data/sft/test.jsonl

BLEU (Papineni et al. 2002) as sacrebleu computes it with its `zh` tokenizer. It says how many words an answer shares
with the reference, not whether it is right: read the table.
"""
import config                                  # before torch: sets how its threads wait
import json
import math
import os
import re
from collections import Counter

import torch
from tqdm import tqdm

import checkpoints
import corpora
import runtime
from model import Model, generate

checkpoint         = "out/sft/best.pt"      # of sft.py
tokenizer          = ""                     # empty: the one that the checkpoint names
questions          = "data/sft/test.jsonl"  # {"messages": [...]} a line; the last assistant turn is the reference
n_questions        = 100                    # take this many from the front of the file; 0: all
batch_size         = 16                     # questions answered side by side
max_new_tokens     = 256                    # of an answer at most
temperature        = 0.0                    # 0: always the most likely token
repetition_penalty = 1.0                    # above 1: tokens that have occurred become less likely
out                = ""                     # the table of answers and scores; empty: bleu.md beside the checkpoint
device             = "auto"                 # auto | cuda | mps | cpu
dtype              = "auto"                 # auto (bfloat16 where the device has it) | bfloat16 | float16 | float32
config.override(globals())

# Characters that stand alone: ideographs and their radicals and strokes, full-width forms, CJK punctuation, symbols.
# The second line reproduces sacrebleu's reading of two five-digit escapes, which makes it end at U+2A6D and U+2FA1.
CHINESE = ("\u3400-\u4db5\u4e00-\u9fbb\uf900-\ufa2d\ufa30-\ufa6a\ufa70-\ufad9\uff00-\uffef\u2e80-\u2eff\u3000-\u303f"
           "\u2001-\u2a6d\u2f81-\u2fa1"
           "\u31c0-\u31ef\u2f00-\u2fdf\u2ff0-\u2fff\u3100-\u312f\u31a0-\u31bf\ufe10-\ufe1f\ufe30-\ufe4f\u3200-\u33ff")
SPLITS = [(re.compile(f"([{CHINESE}])"), r" \1 "),
          (re.compile(r"([!-&(-+:-@/\[-`{-~ ])"), r" \1 "),    # ASCII punctuation but ' , - .
          (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),          # a point or comma stays inside a number only
          (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
          (re.compile(r"([0-9])(-)"), r"\1 \2 ")]


def words(text):
    """The tokens of a text as BLEU counts them: Chinese characters one by one, the rest by words and punctuation."""
    text = text.strip()
    for pattern, spaced in SPLITS:
        text = pattern.sub(spaced, text)
    return text.split()


def ngram_counts(tokens):
    """For n = 1 to 4, how often each n-gram occurs."""
    return [Counter(tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1)) for n in range(1, 5)]


def statistics(answer, reference):
    """What BLEU adds up over a corpus: (length of answer, of reference, 4 counts of shared n-grams, 4 of all)."""
    a, r = words(answer), words(reference)
    shared = [sum((x & y).values()) for x, y in zip(ngram_counts(a), ngram_counts(r))]
    return [len(a), len(r), *shared, *(max(0, len(a) - n + 1) for n in range(1, 5))]


def bleu(stats, is_sentence=False):
    """BLEU-4 in percent, from summed statistics: the geometric mean of the four precisions, times a penalty, at most 1,
    for answers that are shorter than the references.

    Where no n-gram of a length is shared, 1/2, 1/4, ... of one is counted (Chen and Cherry 2014, method 3). A sentence
    of fewer than four tokens is judged by the lengths that it has.
    """
    length, expected, shared, every = stats[0], stats[1], stats[2:6], stats[6:10]
    if not any(shared):
        return 0.0
    logs, missing = [], 1
    for s, e in zip(shared, every):
        if e == 0:
            break
        missing *= 2 if s == 0 else 1
        logs.append(math.log(s / e if s else 1 / (missing * e)))
    if len(logs) < 4 and not is_sentence:
        return 0.0
    return 100 * min(1.0, math.exp(1 - expected / length)) * math.exp(sum(logs) / len(logs))


def read_questions():
    """[(messages before the last answer, that answer)]; SystemExit if the file has none."""
    try:
        with open(questions, encoding="utf-8") as f:
            dialogues = [corpora.messages("messages", json.loads(line)) for line in f if line.strip()]
        pairs = [(d[:-1], d[-1]["content"]) for d in dialogues if len(d) > 1 and d[-1]["role"] == "assistant"]
    except (OSError, ValueError, RecursionError, corpora.Bad) as error:
        raise SystemExit(f"{questions}: cannot be read as JSONL with messages ({error}); "
                         "run python prepare_sft.py, or name another with --questions=") from None
    if not pairs:
        raise SystemExit(f"{questions}: no dialogue that ends in an answer; prepare_sft.py --test_fraction= sets how "
                         "many go there")
    return pairs[:n_questions] if n_questions else pairs


def answer_all(model, tok, prompts):
    """The answers to lists of ids, as texts; those of similar length share a batch, which wastes little on padding."""
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for at in tqdm(range(0, len(order), batch_size), unit="batch", disable=None):
        batch = order[at:at + batch_size]
        steps = list(generate(model, [prompts[i] for i in batch], max_new_tokens, temperature,
                              repetition_penalty=repetition_penalty, stop_ids=tok.stop_ids))
        for i, ids in zip(batch, zip(*steps)):
            answers[i] = tok.decode([id for id in ids if id is not None])
    return answers


def main():
    config.check_range(1, batch_size=batch_size, max_new_tokens=max_new_tokens)
    config.check_drawing(temperature, repetition_penalty=repetition_penalty)
    page = out or os.path.join(os.path.dirname(checkpoint), "bleu.md")
    config.check_output("out", page)
    saved, tok = checkpoints.load_with_tokenizer(checkpoint, tokenizer)
    pairs = read_questions()
    where = runtime.start(device).device
    kind = getattr(torch, runtime.precision(where, dtype)[0])
    model = Model.from_state(saved["shape"], saved.pop("model")).to(where, kind).eval()
    prompts = [tok.prompt(messages) for messages, _ in pairs]
    fits = [i for i, ids in enumerate(prompts) if len(ids) < model.config.max_seq_len]
    if not fits:
        raise SystemExit(f"{questions}: all {len(pairs)} questions are longer than the {model.config.max_seq_len} tokens "
                         f"that {checkpoint} reads; name another with --questions=")
    if len(fits) < len(pairs):
        print(f"{len(pairs) - len(fits)} questions are longer than the context and are left out")
    answers = answer_all(model, tok, [prompts[i] for i in fits])
    rows = [(pairs[i][0][-1]["content"], pairs[i][1], answer) for i, answer in zip(fits, answers)]

    stats = [statistics(answer, reference) for _, reference, answer in rows]
    sums = [sum(column) for column in zip(*stats)]
    scores = [bleu(s, is_sentence=True) for s in stats]
    exact = sum(reference.strip() == answer.strip() for _, reference, answer in rows)
    summary = (f"BLEU-4 {bleu(sums):.2f} on {len(rows)} questions; mean sentence BLEU {sum(scores) / len(rows):.2f}; "
               f"length ratio {sums[0] / max(1, sums[1]):.3f}; {exact} answers equal to the reference")
    cell = lambda text: text.replace("|", "\\|").replace("\n", "<br>")
    with config.whole_file(page) as f:               # report.py compares the fingerprint
        f.write(f"{checkpoint} ({checkpoints.fingerprint(checkpoint)}): {summary}\n\n| question | reference | answer | BLEU |\n|---|---|---|---|\n")
        for (question, reference, answer), score in zip(rows, scores):
            f.write(f"| {cell(question)} | {cell(reference)} | {cell(answer)} | {score:.1f} |\n")
    for question, reference, answer in rows[::max(1, len(rows) // 8)][:8]:
        print(f"  | {question} -> {answer}" + f"   (reference: {reference})" * (answer != reference))
    print(f"{summary}\ntable: {page}")


if __name__ == "__main__":
    main()
