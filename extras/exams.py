"""Sit the multiple-choice exams that everyone quotes: C-Eval, CMMLU, MMLU.

    python -m extras.exams                                      C-Eval's validation split, 5 shots
    python -m extras.exams --exam=mmlu --shots=0 --checkpoint=out/pretrain/best.pt

Every question is answered in two ways. By letter: the question with its options as each exam's
authors ask it, and the most likely of A, B, C and D. By text: the question alone, and the option
whose text is the most likely per character; a small model, which cannot tell letters apart yet,
shows there what it knows (Gu et al. 2024, arXiv:2406.08446).

Takes the files as they are published: a CSV for each subject, under the folders dev, val and test.
Questions without an answer in the file are answered for submission, not scored.
"""
import config                                  # before torch: sets how its threads wait
import csv
import io
import json
import math
import os
from glob import escape, glob

import torch
from tqdm import tqdm

import checkpoints
import readers
import runtime
from extras.subjects import SUBJECTS
from model import empty_caches

checkpoint  = "out/sft/best.pt"  # of sft.py: it gets a dialogue; of pretrain.py: a text to continue
tokenizer   = ""                 # empty: the one that the checkpoint names
exam        = "ceval"            # ceval | cmmlu | mmlu: the wording and the subjects' names
data_dir    = ""                 # the folder with dev, val and test; empty: data/<exam>
split       = ""                 # the folder to answer; empty: val for ceval, test for the others
shots       = 5                  # solved questions of dev ahead of each question, 0 to 5
n_questions = 0                  # of each subject at most; 0: all
batch_size  = 16                 # questions side by side
out         = ""                 # <out>.md, .csv, .json; empty: beside the checkpoint
device      = "auto"             # auto | cuda | mps | cpu
dtype       = "float32"          # float32 | bfloat16 | float16 | auto: half turns close calls
config.override(globals())

# exam: its name, its data set on the Hugging Face hub, the split to answer; the first line, what
# stands before a question, behind it, and before the answer, in the words of the exam's repository
EXAMS = {
    "ceval": ("C-Eval", "ceval/ceval-exam", "val",
              "以下是中国关于{}考试的单项选择题，请选出其中的正确答案。\n\n", "", "\n答案：", ""),
    "cmmlu": ("CMMLU", "haonan-li/cmmlu", "test",
              "以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n", "题目：", "\n答案是：", ""),
    "mmlu": ("MMLU", "cais/mmlu", "test",
             "The following are multiple choice questions (with answers) about {}.\n\n",
             "", "\nAnswer:", " ")}
LETTERS, FIGURES = "ABCD", ("letter", "text")


# ---- files ---------------------------------------------------------------------------------------

def read_rows(path):
    """[(line number, fields)] of a CSV file, and {reason: [lines]} of what is broken."""
    with open(path, "rb") as f:
        problems = []
        raw = b"".join(readers.blocks(f, problems))
    if problems:
        raise SystemExit(f"{path}: {problems[0]}")
    text = io.StringIO(raw.decode("utf-8", "replace"), newline="")
    rows, bad = [], {}
    reader = csv.reader(text, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return rows, bad
        except csv.Error as error:             # a quote that nothing closes takes all that follows
            bad.setdefault(f"broken CSV ({error})", []).append(line)
            continue
        if fields:
            rows.append((line, [field.strip() for field in fields]))


def read_questions(path):
    """The questions of a file, and {reason: [lines]} of the rows that are left out.

    A question is a dict of id, question, A, B, C, D and answer, "" where the file has none.

    Columns go by the header; without one they are MMLU's.
    """
    rows, bad = read_rows(path)
    first = rows[0][1] if rows else []
    columns = [name.lower() for name in first]
    if "question" in columns:
        if not set("abcd") <= set(columns):
            raise SystemExit(f"{path}: its columns are {', '.join(first)}; question, A, B, C "
                             "and D are needed")
        del rows[0]
    else:
        widest = max((len(fields) for _, fields in rows), default=0)
        columns = ["question", "a", "b", "c", "d", "answer"][:widest]
    questions = []
    named = [dict(zip(columns, fields)) for _, fields in rows]
    has_answers = any(row.get("answer") for row in named)
    for number, (line, fields) in enumerate(rows):
        row = named[number]
        options = [row.get(letter) for letter in "abcd"]
        if len(fields) != len(columns):
            reason = f"{len(fields)} fields instead of {len(columns)}"
        elif "\ufffd" in "".join(fields):
            reason = "broken characters"
        elif not row["question"] or not all(options):
            reason = "a question or option is missing"
        elif len(set(options)) < 4:
            reason = "two options are equal"
        elif has_answers and row["answer"] not in list(LETTERS):
            reason = "the answer is not A, B, C or D"
        else:
            questions.append({
                "id": row.get("id") or row.get("") or str(number),
                "question": row["question"],
                "answer": row.get("answer", ""),
                **dict(zip(LETTERS, options))})
            continue
        bad.setdefault(reason, []).append(line)
    return questions, bad


def read_split(folder, name):
    """{subject: questions} of a split, and {sentence about a file: number of rows left out}."""
    subjects, notes = {}, {}
    for path in filter(os.path.isfile, sorted(glob(f"{escape(folder)}/{name}/*.csv"))):
        questions, bad = read_questions(path)
        subject = os.path.basename(path).removesuffix(".csv").removesuffix(f"_{name}")
        subjects[subject] = questions
        for reason, lines in bad.items():
            numbers = ", ".join(map(str, lines[:9]))
            if len(lines) > 9:
                numbers += ", ..."
            notes[f"{path}: {len(lines)} rows left out, {reason} (line {numbers})"] = len(lines)
    return subjects, notes


# ---- questions -> tokens -> answers --------------------------------------------------------------

def wording(question, figure):
    """A question as the exam's authors write it; by text without its options."""
    *_, before, behind, _ = EXAMS[exam]
    text = before + question["question"]
    if figure == "letter":
        for letter in LETTERS:
            text += f"\n{letter}. {question[letter]}"
    return text + behind


def encode(tok, is_chat, name, examples, question, figure):
    """A question behind its solved examples: the ids up to the answer, and those of the 4 answers.

    A chat model sees each example as an earlier turn: its template, not a blank line, tells where
    an answer stands, and the one that counts begins where fine-tuning made answers begin. Elsewhere
    all is one text. It is encoded with every answer as a whole, as it would be in training, and an
    answer begins where the ids of the five first differ: nothing is assumed about how a tokenizer
    joins texts.
    """
    *_, title, _, _, gap = EXAMS[exam]
    texts = [wording(q, figure) for q in (*examples, question)]
    texts[0] = title.format(name) + texts[0]
    solutions, answers = [q["answer"] for q in examples], list(LETTERS)
    if figure == "text":
        solutions = [q[q["answer"]] for q in examples]
        answers = [question[letter] for letter in LETTERS]
    if is_chat:
        messages = []
        for text, solution in zip(texts, solutions):
            messages += [{"role": "user", "content": text},
                         {"role": "assistant", "content": solution}]
        messages.append({"role": "user", "content": texts[-1]})
        return tok.prompt(messages), tok.encode_batch(answers)
    shown = [f"{text}{gap}{solution}\n\n" for text, solution in zip(texts, solutions)]
    text = "".join(shown) + texts[-1]
    whole_texts = [text + gap + answer for answer in answers]
    ids, *whole = tok.encode_batch([text, *whole_texts])
    n = min(n_shared(ids, w) for w in whole)
    return [tok.bos_id] + ids[:n], [w[n:] for w in whole]


def answer(model, tok, is_chat, name, examples, questions, figure):
    """Set question[figure] of every question to (scores of the four options, number of examples).

    The score of a letter is its log-likelihood in nats, that of a text its log-likelihood per
    character. None where the question is too long for the context even without an example, or the
    tokenizer knows nothing of an option.
    """
    encoded = []
    for question in questions:
        question[figure] = None
        for n in range(len(examples), -1, -1):                # the last example is the first to go
            prompt, answers = encode(tok, is_chat, name, examples[:n], question, figure)
            length = len(prompt) + max(map(len, answers))
            if all(answers) and length <= model.config.max_seq_len + 1:
                encoded.append((n, prompt, answers, question))
                break
    encoded.sort(key=lambda row: -row[0])                     # those with most examples first
    prompts = [prompt for _, prompt, *_ in encoded]
    choices = [answers for _, _, answers, _ in encoded]
    prefix = []
    if len(prompts) > 1:
        prefix = prompts[0][:n_shared(*prompts[:2])]
    scores = score(model, prefix, prompts, choices, batch_size)
    for (n, _, _, question), nats in zip(encoded, scores):
        if figure == "text":
            nats = [x / len(question[letter]) for x, letter in zip(nats, LETTERS)]
        question[figure] = nats, n


# ---- likelihood of given answers -----------------------------------------------------------------

def n_shared(a, b):
    """How many elements two lists begin with together."""
    n = 0
    for x, y in zip(a, b):
        if x != y:
            break
        n += 1
    return n


def answer_tree(prompt, answers, start):
    """A prompt from its id `start` on, followed by all answers to it, as one row for the network.

    Returns lists: ids; positions, that of each id in its own text; branches, 0 for the prompt and
    1, 2, ... for the answers; and for every token of the answers, one answer after another, the
    index in the row of the token that predicts it.
    """
    ids = prompt[start:]
    positions = list(range(start, len(prompt)))
    branches, sources = [0] * len(ids), []
    last = len(ids) - 1
    for branch, answer in enumerate(answers, start=1):
        n = len(answer) - 1                    # the last token of an answer is never an input
        sources += [last, *range(len(ids), len(ids) + n)]
        ids = ids + answer[:n]
        positions += range(len(prompt), len(prompt) + n)
        branches += [branch] * n
    return ids, positions, branches, sources


def tree_mask(positions, branches, starts):
    """Who sees whom, (B, 1, T, S + T) bool: S = max(starts) tokens of the prefix, T of the row.

    A token sees its own text: the prefix up to where its row starts, the prompt, and of its own
    answer what came before. Padding (branch -1) sees padding, or its softmax would be NaN.
    """
    B, T = positions.shape
    S = int(starts.max())
    prefix = torch.arange(S, device=starts.device) < starts[:, None]                 # (B, S)
    prefix = prefix[:, None].expand(B, T, S)
    is_prompt = branches[:, None] == 0
    same_branch = branches[:, None] == branches[:, :, None]                          # (B, T, T)
    earlier = positions[:, None] <= positions[:, :, None]
    row = (is_prompt | same_branch) & earlier
    mask = torch.cat((prefix, row), dim=-1)
    return mask[:, None]


def caches_after(model, known, S, B, T):
    """Caches of B rows for T more tokens behind the first S of `known`, caches of one row, as
    model.hidden() takes them."""
    caches = empty_caches(model, B, S + T)
    for cache, filled in zip(caches, known):
        for new, old in zip(cache, filled):
            new[:, :, :S] = old[:, :, :S]
    slots = torch.arange(S, S + T, device=model.norm.weight.device)
    return [(*cache, slots) for cache in caches]


@torch.inference_mode()
def score(model, prefix, prompts, answers, batch_size):
    """log P(answer | prompt) in nats: for each prompt a list of floats, one for each answer.

    prefix: ids that go through the network once; every prompt reuses as many of them as it begins
    with. prompts: lists of ids; answers: for each prompt a list of lists of ids, none empty. A
    prompt with an answer has at most max_seq_len + 1 ids, as the last one is no input (ValueError
    otherwise). batch_size: prompts at a time. All answers to a prompt stand in its row, so that the
    prompt is read once: a tree of tokens as in Miao et al. 2023, arXiv:2305.09781.
    """
    device, size = model.norm.weight.device, model.config.max_seq_len
    for prompt, choices in zip(prompts, answers, strict=True):
        n, lengths = len(prompt), list(map(len, choices))
        if not n or not all(lengths) or n + max(lengths) > size + 1:
            raise ValueError(f"a prompt of {n} tokens with answers of {lengths}; each needs at "
                             f"least 1, both together at most max_seq_len + 1 ({size + 1})")
    n_used = max((n_shared(prefix, prompt) for prompt in prompts), default=0)
    prefix = prefix[:n_used]
    known = caches_after(model, [], 0, 1, len(prefix))
    if prefix:
        ids = torch.tensor([prefix], device=device)                                  # (1, S)
        positions = torch.arange(len(prefix), device=device)
        causal = (positions <= positions[:, None])[None, None]                       # (1, 1, S, S)
        model.hidden(ids, model.rope[:, positions], causal, known)
    scores = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))         # little padding
    for at in range(0, len(order), batch_size):
        batch = order[at:at + batch_size]
        starts, rows = [], []
        for i in batch:
            start = min(n_shared(prefix, prompts[i]), len(prompts[i]) - 1)
            starts.append(start)
            rows.append(answer_tree(prompts[i], answers[i], start))
        ids, positions, branches, sources = zip(*rows)
        T = max(map(len, ids))
        x, positions, branches = (
            padded(part, T, fill).to(device)
            for part, fill in ((ids, 0), (positions, 0), (branches, -1)))            # (B, T)
        mask = tree_mask(positions, branches, torch.tensor(starts, device=device))
        caches = caches_after(model, known, max(starts), len(batch), T)
        h = model.hidden(x, model.rope[:, positions], mask, caches)                  # (B, T, C)
        h = torch.cat([h[b, at] for b, at in enumerate(sources)])              # (answer tokens, C)
        y = [id for i in batch for answer in answers[i] for id in answer]
        nats = model.loss(h, torch.tensor(y, device=device), per_token=True)
        log_p = iter((-nats).tolist())
        for i in batch:
            scores[i] = [sum(next(log_p) for _ in answer) for answer in answers[i]]
    return scores


def padded(rows, length, fill):
    """Lists of ints as one tensor (B, length)."""
    whole = [row + [fill] * (length - len(row)) for row in rows]
    return torch.tensor(whole)


# ---- figures -------------------------------------------------------------------------------------

def choice(question, figure):
    """The letter of the best option."""
    scores, _ = question[figure]
    return LETTERS[scores.index(max(scores))]


def standard_error(share, n):
    """Standard error of a share of n questions: half the width of Wilson's interval for z = 1.

    The usual sqrt(share (1 - share) / n) is 0 when all of three answers are right. Wilson 1927.
    """
    variance = share * (1 - share) / n
    return math.sqrt(variance + 1 / (4 * n * n)) / (1 + 1 / n)


def accuracy(subjects, figure):
    """Accuracy on lists of questions, one a subject, in percent with standard errors: [mean of the
    subjects, share of all their questions together]."""
    n_right, n_all, shares, errors = 0, 0, [], []
    for questions in subjects:
        right, n = sum(choice(q, figure) == q["answer"] for q in questions), len(questions)
        shares.append(right / n)
        errors.append(standard_error(right / n, n))
        n_right, n_all = n_right + right, n_all + n
    share = n_right / n_all
    macro = sum(shares) / len(shares), math.hypot(*errors) / len(errors)
    micro = share, standard_error(share, n_all)
    return [f"{100 * share:.1f} ± {100 * error:.1f}" for share, error in (macro, micro)]


def report(summary, notes, scored):
    """The page in Markdown. Its first paragraph is the summary. scored: {subject: questions}."""
    lines = [summary]
    if notes:
        lines += ["", *(f"- {note}" for note in notes)]
    if scored:
        lines += ["", "| | questions | by letter: mean of subjects | of questions "
                  "| by text: mean of subjects | of questions |", "|---|---|---|---|---|---|"]
    groups = {}
    for category, words in SUBJECTS[exam].items():
        groups[category] = [word.partition("=")[0] for word in words.split()]
    groups["all"] = list(scored)
    groups |= {subject: [subject] for subject in scored}
    for name, members in groups.items():
        if subjects := [scored[subject] for subject in members if subject in scored]:
            figures = [share for figure in FIGURES for share in accuracy(subjects, figure)]
            lines.append(f"| {name} | {sum(map(len, subjects))} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def write_predictions(path, subjects):
    """Every question with its answer, our choices, and the scores that they follow from, as CSV."""
    with config.whole_file(path) as f:
        writer = csv.writer(f, lineterminator="\n")
        columns = [f"{what} {figure}" for figure in FIGURES for what in ("by", "shots", *LETTERS)]
        writer.writerow(["subject", "id", "answer", *columns, "question"])
        for subject, questions in subjects.items():
            for q in questions:
                row = [subject, q["id"], q["answer"]]
                for figure in FIGURES:
                    if q[figure]:
                        scores, n = q[figure]
                        row += [choice(q, figure), n, *(f"{x:.5f}" for x in scores)]
                    else:                                     # it is too long
                        row += [""] * 6
                writer.writerow([*row, q["question"]])


def main():
    if exam not in EXAMS:
        raise SystemExit(f"--exam={exam}: it is one of {', '.join(EXAMS)}")
    config.check_range(1, batch_size=batch_size)
    title, hub, usual, *_ = EXAMS[exam]
    folder, part = data_dir or f"data/{exam}", split or usual
    files = out or os.path.join(os.path.dirname(checkpoint), f"{exam}_{part}")
    config.check_output("out", f"{files}.md")
    subjects, notes = read_split(folder, part)
    examples, dev_notes = read_split(folder, "dev") if shots else ({}, {})
    if not any(subjects.values()):
        raise SystemExit(f"{folder}/{part}: no questions in *.csv there; {title}'s files are "
                         f"in the data set {hub} of the Hugging Face hub; --data_dir= names the "
                         "folder that holds dev, val and test")
    if shots and not any(examples.values()):
        raise SystemExit(f"{folder}/dev: no solved questions in *.csv there for {shots} shots; "
                         "--shots=0 asks without")
    model, tok, saved = runtime.load_model(checkpoint, tokenizer, device, dtype)
    torch.set_float32_matmul_precision("highest")             # the 10 bits of TF32 turn close calls

    words = " ".join(SUBJECTS[exam].values()).split()
    names = dict(word.split("=") for word in words if "=" in word)
    answered, offered, dropped = {}, 0, dict.fromkeys(FIGURES, 0)
    for subject, questions in tqdm(subjects.items(), unit="subject", disable=None):
        del questions[n_questions or len(questions):]
        solved = [q for q in examples.get(subject, []) if q["answer"]][:shots]
        if len(solved) < shots:
            dev_notes[f"{subject}: {len(solved)} solved questions in {folder}/dev, {shots} were "
                      "asked for"] = 0
        name = names.get(subject, subject.replace("_", " "))
        for figure in FIGURES:
            answer(model, tok, saved["stage"] != "pretrain", name, solved, questions, figure)
        answered[subject] = [q for q in questions if all(q[figure] for figure in FIGURES)]
        offered += len(solved) * len(answered[subject])
        for figure in FIGURES:
            n_used = [q[figure][1] for q in answered[subject]]
            dropped[figure] += len(solved) * len(n_used) - sum(n_used)

    scored, unscored = {}, {}
    for subject, questions in answered.items():
        if questions:
            (scored if questions[0]["answer"] else unscored)[subject] = questions
    n_asked, n_scored, n_unscored = (sum(map(len, group.values()))
                                     for group in (subjects, scored, unscored))
    fingerprint = checkpoints.fingerprint(checkpoint)
    summary = [f"{checkpoint} ({fingerprint}): {title} {part}, {shots} shots"]
    if scored:
        letter, letters = accuracy(scored.values(), "letter")
        text, texts = accuracy(scored.values(), "text")
        summary.append(f"accuracy by letter {letter} %, by text {text} %, chance 25 % (mean of "
                       f"{len(scored)} subjects ± standard error; {letters} and {texts} of all "
                       f"{n_scored:,} questions together)")
    if unscored:
        summary.append(f"{n_unscored:,} questions have no answer in their file, ours are in "
                       f"{files}.json")
        choices = {
            subject: {q["id"]: choice(q, "letter") for q in questions}
            for subject, questions in unscored.items()}
        with config.whole_file(f"{files}.json") as f:
            json.dump(choices, f, indent=1)
    if shots:
        summary.append(f"shots dropped for lack of room: {dropped['letter']:,} by letter and "
                       f"{dropped['text']:,} by text of {offered:,} each")
    if n_long := n_asked - n_scored - n_unscored:
        summary.append(f"{n_long} questions longer than {model.config.max_seq_len} tokens left out")
    if notes:
        summary.append(f"{sum(notes.values())} rows left out")
    page = report("; ".join(summary), [*notes, *dev_notes], scored)
    with config.whole_file(f"{files}.md") as f:
        f.write(page)
    write_predictions(f"{files}.csv", subjects)
    print(f"{page}\n{files}.md, {files}.csv")


if __name__ == "__main__":
    main()
