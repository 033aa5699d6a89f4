"""Answer held-out questions and compare with their references: BLEU-4, and a table to read.

    python eval_bleu.py                                     100 questions of data/sft/test.jsonl

BLEU (Papineni et al. 2002) as sacrebleu computes it with its `zh` tokenizer. It says how many words
an answer shares with the reference, not whether it is right: read the table.
"""
import config                                  # before torch: sets how its threads wait
import math
import os
import re
from collections import Counter

from tqdm import tqdm

import checkpoints
import corpora
import runtime
from model import generate

checkpoint         = "out/sft/best.pt"     # of sft.py
tokenizer          = ""                    # empty: the one that the checkpoint names
questions          = "data/sft/test.jsonl" # {"messages": ...} a line; the last is the reference
n_questions        = 100                   # take this many from the front of the file; 0: all
batch_size         = 16                    # questions answered side by side
max_new_tokens     = 256                   # of an answer at most
temperature        = 0.0                   # 0: always the most likely token
repetition_penalty = 1.0                   # above 1: tokens that have occurred become less likely
out                = ""                    # the table to read; empty: bleu.md beside the checkpoint
device             = "auto"                # auto | cuda | mps | cpu
dtype              = "auto"                # auto (bfloat16 if fast) | bfloat16 | float16 | float32
config.override(globals())

# Characters that are words by themselves: ideographs, full-width forms, CJK punctuation, symbols.
# The second line has sacrebleu's reading of two five-digit escapes: it ends at U+2A6D and U+2FA1.
CHINESE = ("\u3400-\u4db5\u4e00-\u9fbb\uf900-\ufa2d\ufa30-\ufa6a\ufa70-\ufad9\uff00-\uffef"
           "\u2001-\u2a6d\u2f81-\u2fa1"
           "\u2e80-\u2eff\u3000-\u303f\u31c0-\u31ef\u2f00-\u2fdf\u2ff0-\u2fff\u3100-\u312f"
           "\u31a0-\u31bf\ufe10-\ufe1f\ufe30-\ufe4f\u3200-\u33ff")
SPLITS = [(f"([{CHINESE}])", r" \1 "),
          (r"([!-&(-+:-@/\[-`{-~ ])", r" \1 "),                # ASCII punctuation but ' , - .
          (r"([^0-9])([.,])", r"\1 \2 "),                      # . and , stay inside numbers only
          (r"([.,])([^0-9])", r" \1 \2"),
          (r"([0-9])(-)", r"\1 \2 ")]


def words(text):
    """The tokens that BLEU counts: Chinese characters, else words and punctuation."""
    text = text.strip()
    for pattern, spaced in SPLITS:
        text = re.sub(pattern, spaced, text)
    return text.split()


def ngram_counts(tokens):
    """For n = 1 to 4, how often each n-gram occurs."""
    return [Counter(zip(*(tokens[i:] for i in range(n)))) for n in range(1, 5)]


def statistics(answer, reference):
    """What BLEU sums over all answers: the lengths of answer and reference in tokens, then for
    n = 1 to 4 the number of n-grams that both have, then the number that the answer has."""
    a, r = words(answer), words(reference)
    found, expected = ngram_counts(a), ngram_counts(r)
    shared = [(x & y).total() for x, y in zip(found, expected)]
    return [len(a), len(r), *shared, *(x.total() for x in found)]


def bleu(stats, is_sentence=False):
    """BLEU-4 in percent: the geometric mean of the four precisions, times at most 1 for answers
    that are shorter than their references.

    stats: those of statistics(), summed over the answers. Where no n-gram of a length is shared,
    1/2, 1/4, ... of one is counted (Chen and Cherry 2014, method 3). is_sentence: fewer than four
    tokens are judged by the n-grams that there are; a whole corpus of them scores 0.
    """
    length, expected, shared, found = stats[0], stats[1], stats[2:6], stats[6:10]
    if not any(shared):
        return 0.0
    logs, missing = [], 1
    for s, n in zip(shared, found):
        if n == 0:
            break
        if s == 0:
            missing *= 2
            s = 1 / missing
        logs.append(math.log(s / n))
    if len(logs) < 4 and not is_sentence:
        return 0.0
    brevity = min(1.0, math.exp(1 - expected / length))
    return 100 * brevity * math.exp(sum(logs) / len(logs))


def read_questions():
    """[(messages before the last answer, that answer)]; SystemExit if the file has none."""
    other = "run python prepare_sft.py, or name another file with --questions="
    if not os.path.exists(questions):
        raise SystemExit(f"{questions}: not there; {other}")
    pairs = []
    for _, dialogue in corpora.dialogues(f"messages:{questions}"):
        if isinstance(dialogue, corpora.Bad):
            raise SystemExit(f"{questions}: not all of it is dialogues ({dialogue}); {other}")
        *messages, answer = dialogue
        pairs.append((messages, answer["content"]))
    if not pairs:
        raise SystemExit(f"{questions}: no dialogue in it; prepare_sft.py --test_fraction= sets "
                         "how many go there")
    return pairs[:n_questions] if n_questions else pairs


def answer_all(model, tok, prompts):
    """The answers to prompts, lists of ids, as texts. Prompts of like length share a batch."""
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for at in tqdm(range(0, len(order), batch_size), unit="batch", disable=None):
        batch = order[at:at + batch_size]
        steps = generate(model, [prompts[i] for i in batch], max_new_tokens, temperature,
                         repetition_penalty=repetition_penalty, stop_ids=tok.stop_ids)
        for i, ids in zip(batch, zip(*steps)):                 # (steps, batch) -> (batch, steps)
            answers[i] = tok.decode([id for id in ids if id is not None])
    return answers


def cell(text):
    return text.replace("|", "\\|").replace("\n", "<br>")


def main():
    config.check_range(1, batch_size=batch_size, max_new_tokens=max_new_tokens)
    config.check_drawing(temperature, repetition_penalty=repetition_penalty)
    page = out or os.path.join(os.path.dirname(checkpoint), "bleu.md")
    config.check_output("out", page)
    model, tok, _ = runtime.load_model(checkpoint, tokenizer, device, dtype)
    pairs = read_questions()
    context = model.config.max_seq_len
    asked = []
    for messages, reference in pairs:
        ids = tok.prompt(messages)
        if len(ids) < context:
            asked.append((messages[-1]["content"], reference, ids))
    if not asked:
        raise SystemExit(f"{questions}: no question fits into the {context} tokens that "
                         f"{checkpoint} reads; name another file with --questions=")
    if len(asked) < len(pairs):
        print(f"left out, as they are longer than the context: {len(pairs) - len(asked)} of "
              f"{len(pairs)} questions")
    answers = answer_all(model, tok, [ids for _, _, ids in asked])
    rows = [(question, reference, answer)
            for (question, reference, _), answer in zip(asked, answers)]

    stats = [statistics(answer, reference) for _, reference, answer in rows]
    sums = [sum(column) for column in zip(*stats)]
    scores = [bleu(s, is_sentence=True) for s in stats]
    exact = sum(reference.strip() == answer.strip() for _, reference, answer in rows)
    summary = (f"BLEU-4 {bleu(sums):.2f} on {len(rows)} questions; "
               f"mean sentence BLEU {sum(scores) / len(rows):.2f}; "
               f"length ratio {sums[0] / max(1, sums[1]):.3f}; "
               f"answers equal to the reference: {exact}")
    with config.whole_file(page) as f:                         # the report compares the fingerprint
        f.write(f"{checkpoint} ({checkpoints.fingerprint(checkpoint)}): {summary}\n\n"
                "| question | reference | answer | BLEU |\n|---|---|---|---|\n")
        for row, score in zip(rows, scores):
            f.write(f"| {' | '.join(map(cell, row))} | {score:.1f} |\n")
    for question, reference, answer in rows[::max(1, len(rows) // 8)][:8]:
        difference = f"   (reference: {reference})" if answer != reference else ""
        print(f"  | {question} -> {answer}{difference}")
    print(f"{summary}\ntable: {page}")


if __name__ == "__main__":
    main()
