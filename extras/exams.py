"""Sit the multiple-choice exams that everyone quotes: C-Eval, CMMLU, MMLU.

    python -m extras.exams                                                     C-Eval's validation split, 5 shots
    python -m extras.exams --exam=mmlu --shots=0 --checkpoint=out/pretrain/best.pt

Every question is answered in two ways. By letter: the question with its options as each exam's authors ask it, and the
most likely of A, B, C and D. By text: the question alone, and the option whose text is the most likely per character;
a small model, which cannot tell letters apart yet, shows there what it knows (Gu et al. 2024, arXiv:2406.08446).

Takes the files as they are published: a CSV for each subject, under the folders dev, val and test. Questions without
an answer in the file are answered for submission, not scored.
"""
import config                                  # before torch: sets how its threads wait
import csv
import io
import json
import math
import os
from glob import escape, glob

import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoints
import readers
import runtime
from model import empty_caches, loss_rows

checkpoint  = "out/sft/best.pt"  # of sft.py: asked through the chat template; of pretrain.py: as text to continue
tokenizer   = ""                 # empty: the one that the checkpoint names
exam        = "ceval"            # ceval | cmmlu | mmlu: the wording of the questions and the subjects' names
data_dir    = ""                 # the folder with dev, val and test; empty: data/<exam>
split       = ""                 # the folder to answer; empty: val for ceval, test for the others
shots       = 5                  # solved questions of dev ahead of each question, 0 to 5
n_questions = 0                  # of each subject at most; 0: all
batch_size  = 16                 # questions side by side
out         = ""                 # <out>.md, .csv and for submission .json; empty: <exam>_<split> beside the checkpoint
device      = "auto"             # auto | cuda | mps | cpu
dtype       = "float32"          # float32 | bfloat16 | float16 | auto: half precision is faster and turns close calls
config.override(globals())

# exam: its name, its data set on the Hugging Face hub, the split to answer, the first line, then what stands before a
# question, behind it, and before the answer. The wordings are those of the exams' own repositories.
EXAMS = {
    "ceval": ("C-Eval", "ceval/ceval-exam", "val", "以下是中国关于{}考试的单项选择题，请选出其中的正确答案。\n\n", "", "\n答案：", ""),
    "cmmlu": ("CMMLU", "haonan-li/cmmlu", "test", "以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n", "题目：", "\n答案是：", ""),
    "mmlu": ("MMLU", "cais/mmlu", "test", "The following are multiple choice questions (with answers) about {}.\n\n",
             "", "\nAnswer:", " ")}

# exam: category: subject=name (those of MMLU are named by their files), again from the exams' own repositories
SUBJECTS = {"ceval": {
    "STEM": "computer_network=计算机网络 operating_system=操作系统 computer_architecture=计算机组成 college_programming=大学编程 "
            "college_physics=大学物理 college_chemistry=大学化学 advanced_mathematics=高等数学 probability_and_statistics=概率统计 "
            "discrete_mathematics=离散数学 electrical_engineer=注册电气工程师 metrology_engineer=注册计量师 "
            "high_school_mathematics=高中数学 high_school_physics=高中物理 high_school_chemistry=高中化学 "
            "high_school_biology=高中生物 middle_school_mathematics=初中数学 middle_school_biology=初中生物 "
            "middle_school_physics=初中物理 middle_school_chemistry=初中化学 veterinary_medicine=兽医学",
    "Social Sciences": "college_economics=大学经济学 business_administration=工商管理 marxism=马克思主义基本原理 "
                       "mao_zedong_thought=毛泽东思想和中国特色社会主义理论体系概论 education_science=教育学 "
                       "teacher_qualification=教师资格 high_school_politics=高中政治 high_school_geography=高中地理 "
                       "middle_school_politics=初中政治 middle_school_geography=初中地理",
    "Humanities": "modern_chinese_history=近代史纲要 ideological_and_moral_cultivation=思想道德修养与法律基础 logic=逻辑学 law=法学 "
                  "chinese_language_and_literature=中国语言文学 art_studies=艺术学 professional_tour_guide=导游资格 "
                  "legal_professional=法律职业资格 high_school_chinese=高中语文 high_school_history=高中历史 "
                  "middle_school_history=初中历史",
    "Other": "civil_servant=公务员 sports_science=体育学 plant_protection=植物保护 basic_medicine=基础医学 clinical_medicine=临床医学 "
             "urban_and_rural_planner=注册城乡规划师 accountant=注册会计师 fire_engineer=注册消防工程师 tax_accountant=税务师 "
             "environmental_impact_assessment_engineer=环境影响评价工程师 physician=医师资格"}, "cmmlu": {
    "STEM": "anatomy=解剖学 astronomy=天文学 college_actuarial_science=大学精算学 college_engineering_hydrology=大学工程水文学 "
            "college_mathematics=大学数学 college_medical_statistics=大学医学统计 conceptual_physics=概念物理学 "
            "electrical_engineering=电气工程 elementary_mathematics=初等数学 genetics=遗传学 high_school_biology=高中生物 "
            "high_school_chemistry=高中化学 computer_science=计算机科学 high_school_mathematics=高中数学 "
            "high_school_physics=高中物理学 machine_learning=机器学习 virology=病毒学",
    "Social Sciences": "ancient_chinese=古汉语 business_ethics=商业伦理 chinese_civil_service_exam=中国公务员考试 "
                       "chinese_food_culture=中国饮食文化 chinese_foreign_policy=中国外交政策 economics=经济学 education=教育学 "
                       "chinese_teacher_qualification=中国教师资格 college_education=大学教育学 elementary_chinese=小学语文 "
                       "ethnology=民族学 high_school_geography=高中地理 high_school_politics=高中政治 journalism=新闻学 "
                       "management=管理学 marketing=市场营销 modern_chinese=现代汉语 professional_accounting=专业会计 "
                       "professional_psychology=专业心理学 public_relations=公共关系 security_study=安全研究 sociology=社会学",
    "Humanities": "arts=艺术学 chinese_history=中国历史 chinese_literature=中国文学 college_law=大学法律 global_facts=全球事实 "
                  "international_law=国际法学 jurisprudence=法理学 logical=逻辑学 marxist_theory=马克思主义理论 philosophy=哲学 "
                  "professional_law=专业法学 world_history=世界历史 world_religions=世界宗教",
    "Other": "agronomy=农学 chinese_driving_rule=中国驾驶规则 clinical_knowledge=临床知识 college_medicine=大学医学 "
             "computer_security=计算机安全 construction_project_management=建设工程管理 elementary_commonsense=小学常识 "
             "elementary_information_and_technology=小学信息技术 food_science=食品科学 human_sexuality=人类性行为 "
             "legal_and_moral_basis=法律与道德基础 nutrition=营养学 professional_medicine=专业医学 sports_science=体育学 "
             "traditional_chinese_medicine=中医中药",
    "China specific": "ancient_chinese chinese_civil_service_exam chinese_driving_rule chinese_food_culture "
                      "chinese_foreign_policy chinese_history chinese_literature chinese_teacher_qualification "
                      "construction_project_management elementary_chinese elementary_commonsense ethnology "
                      "high_school_politics modern_chinese traditional_chinese_medicine"}, "mmlu": {
    "STEM": "abstract_algebra astronomy college_biology college_chemistry college_computer_science college_mathematics "
            "college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics "
            "high_school_biology high_school_chemistry high_school_computer_science high_school_mathematics "
            "high_school_physics high_school_statistics machine_learning",
    "Social Sciences": "econometrics high_school_geography high_school_government_and_politics human_sexuality "
                       "high_school_macroeconomics high_school_microeconomics high_school_psychology "
                       "professional_psychology public_relations security_studies sociology us_foreign_policy",
    "Humanities": "formal_logic high_school_european_history high_school_us_history high_school_world_history "
                  "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy "
                  "prehistory professional_law world_religions",
    "Other": "anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management "
             "marketing medical_genetics miscellaneous nutrition professional_accounting professional_medicine "
             "virology"}}
LETTERS, FIGURES = "ABCD", ("letter", "text")


# ---- files ----------------------------------------------------------------------------------------------------------

def read_questions(path):
    """The questions of a file, dicts with id, question, A, B, C, D and answer ("" where the file has none), and
    {reason: [lines]} of the rows that are left out. Columns go by the header, without one they are MMLU's.
    """
    with open(path, "rb") as f:
        problems = []
        text = b"".join(readers.blocks(f, problems)).decode("utf-8", "replace")
    if problems:
        raise SystemExit(f"{path}: {problems[0]}")
    rows, bad, reader = [], {}, csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            rows.append((line, next(reader)))
        except StopIteration:
            break
        except csv.Error as error:                            # a quote that nothing closes takes all that follows
            bad.setdefault(f"broken CSV ({error})", []).append(line)
    rows = [(line, list(map(str.strip, fields))) for line, fields in rows if fields]
    columns = [name.lower() for name in rows[0][1]] if rows else []
    if "question" not in columns:
        columns = ["question", *"abcd", "answer"][:max((len(fields) for _, fields in rows), default=0)]
    elif not set("abcd") <= set(columns):
        raise SystemExit(f"{path}: its columns are {', '.join(rows[0][1])}; question, A, B, C and D are needed")
    else:
        del rows[0]
    has_answers = any(dict(zip(columns, fields)).get("answer") for _, fields in rows)
    questions = []
    for number, (line, fields) in enumerate(rows):
        row = dict(zip(columns, fields))
        reason = (f"{len(fields)} fields instead of {len(columns)}" if len(fields) != len(columns) else
                  "broken characters" if "\ufffd" in "".join(fields) else
                  "a question or option is missing" if not all(map(row.get, ("question", *"abcd"))) else
                  "two options are equal" if len({row[c] for c in "abcd"}) < 4 else
                  "the answer is not A, B, C or D" if has_answers and row["answer"] not in list(LETTERS) else None)
        if reason:
            bad.setdefault(reason, []).append(line)
        else:
            questions.append({"id": row.get("id") or row.get("") or str(number), "question": row["question"],
                              "answer": row.get("answer", ""), **{c: row[c.lower()] for c in LETTERS}})
    return questions, bad


def read_split(folder, name):
    """{subject: questions} of a split, and {sentence about a file: number of its rows that are left out}."""
    subjects, notes = {}, {}
    for path in sorted(glob(f"{escape(folder)}/{name}/*.csv")):
        questions, bad = read_questions(path)
        subjects[os.path.basename(path).removesuffix(".csv").removesuffix(f"_{name}")] = questions
        for reason, lines in bad.items():
            where = ", ".join(map(str, lines[:9])) + ", ..." * (len(lines) > 9)
            notes[f"{path}: {len(lines)} rows left out, {reason} (line {where})"] = len(lines)
    return subjects, notes


# ---- questions -> tokens -> answers ---------------------------------------------------------------------------------

def encode(tok, is_chat, name, examples, question, figure):
    """A question behind its solved examples: the ids up to the answer, and those of the four answers.

    A chat model sees each example as an earlier turn: its template, not a blank line, tells where an answer stands, and
    the one that counts begins where fine-tuning made answers begin. Elsewhere all is one text. It is encoded with every
    answer as a whole, as it would be in training, and an answer begins where the ids of the five first differ: nothing
    is assumed about what a tokenizer does at the seam.
    """
    *_, title, before, behind, gap = EXAMS[exam]
    by_text = figure == "text"
    asked = [before + q["question"] + "".join(f"\n{c}. {q[c]}" for c in LETTERS if not by_text) + behind
             for q in (*examples, question)]
    asked[0] = title.format(name) + asked[0]
    solved = [q[q["answer"]] if by_text else q["answer"] for q in examples]
    answers = [question[c] if by_text else c for c in LETTERS]
    if is_chat:
        messages = [{"role": role, "content": content} for pair in zip(asked, solved)
                    for role, content in zip(("user", "assistant"), pair)]
        return tok.prompt(messages + [{"role": "user", "content": asked[-1]}]), tok.encode_batch(answers)
    text = "".join(f"{q}{gap}{a}\n\n" for q, a in zip(asked, solved)) + asked[-1]
    ids, *whole = tok.encode_batch([text] + [text + gap + answer for answer in answers])
    n = min(n_shared(ids, w) for w in whole)
    return [tok.bos_id] + ids[:n], [w[n:] for w in whole]


def answer(model, tok, is_chat, name, examples, questions, figure):
    """Give every question the score of each option and the number of its examples, under the figure's name; None where
    it is too long for the context even without any, or the tokenizer knows nothing of an option. The score of a letter
    is its log-likelihood in nats, that of a text its log-likelihood per character.
    """
    asked = []
    for question in questions:
        question[figure] = None
        for n in range(len(examples), -1, -1):                # the last example is the first to go
            prompt, answers = encode(tok, is_chat, name, examples[:n], question, figure)
            if all(answers) and len(prompt) + max(map(len, answers)) <= model.config.max_seq_len + 1:
                asked.append((n, prompt, answers, question))
                break
    asked.sort(key=lambda a: -a[0])
    prompts = [prompt for _, prompt, *_ in asked]
    prefix = prompts[0][:n_shared(*prompts[:2])] if len(prompts) > 1 else []       # with as many examples as any
    scores = score(model, prefix, prompts, [answers for _, _, answers, _ in asked], batch_size)
    for (n, _, _, question), nats in zip(asked, scores):
        lengths = [len(question[c]) if figure == "text" else 1 for c in LETTERS]
        question[figure] = [x / length for x, length in zip(nats, lengths)], n


# ---- likelihood of given answers -----------------------------------------------------------------

def n_shared(a, b):
    """How many elements two lists begin with together."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def answer_tree(prompt, answers, start):
    """A prompt from its id `start` on, followed by all answers to it, as one row for the network.

    Returns lists: ids; positions, that of each id in its own text; branches, 0 for the prompt and
    1, 2, ... for the answers; and for every token of the answers, one answer after another, the
    index in the row of the token that predicts it.
    """
    ids, positions = prompt[start:], list(range(start, len(prompt)))
    branches, sources, last = [0] * len(ids), [], len(ids) - 1
    for branch, answer in enumerate(answers, start=1):
        n = len(answer) - 1                    # the last token of an answer is never an input
        sources += [last, *range(len(ids), len(ids) + n)]
        ids = ids + answer[:n]
        positions += range(len(prompt), len(prompt) + n)
        branches += [branch] * n
    return ids, positions, branches, sources


def tree_mask(positions, branches, starts):
    """Who sees whom: (B, 1, T, S + T) bool, S = max(starts) tokens of the prefix before T of the row.

    A token sees its own text: the prefix up to where its row starts, the prompt, and of its own
    answer what came before. Padding (branch -1) sees padding, or its softmax would be NaN.
    """
    B, T = positions.shape
    S = int(starts.max())
    prefix = torch.arange(S, device=starts.device) < starts[:, None]                 # (B, S)
    same_text = (branches[:, None] == 0) | (branches[:, None] == branches[:, :, None])
    earlier = positions[:, None] <= positions[:, :, None]                            # (B, T, T)
    mask = torch.cat((prefix[:, None].expand(B, T, S), same_text & earlier), dim=-1)
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
    """log P(answer | prompt) in nats, for each prompt a list of floats, one for each of its answers.

    prefix: ids that go through the network once; every prompt reuses as many of them as it begins
    with. prompts: lists of ids; answers: for each prompt a list of lists of ids, none empty. A
    prompt with an answer has at most max_seq_len + 1 ids, as the last one is no input (ValueError
    otherwise). batch_size: prompts at a time. All answers to a prompt stand in its row, so that the
    prompt is read once: a tree of tokens as in Miao et al. 2023, arXiv:2305.09781.
    """
    device, size = model.norm.weight.device, model.config.max_seq_len
    for prompt, choices in zip(prompts, answers, strict=True):
        if not prompt or not all(choices) or len(prompt) + max(map(len, choices)) > size + 1:
            raise ValueError(f"a prompt of {len(prompt)} tokens with answers of "
                             f"{list(map(len, choices))}; each needs at least 1, both together at "
                             f"most max_seq_len + 1 ({size + 1})")
    prefix = prefix[:max(n_shared(prefix, prompt) for prompt in prompts)] if prompts else []
    known = caches_after(model, [], 0, 1, len(prefix))
    if prefix:
        ids, positions = torch.tensor([prefix], device=device), torch.arange(len(prefix), device=device)
        causal = (positions <= positions[:, None])[None, None]                       # (1, 1, S, S)
        model.hidden(ids, model.rope[:, positions], causal, known)
    scores = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))               # little padding
    for at in range(0, len(order), batch_size):
        batch = order[at:at + batch_size]
        starts = [min(n_shared(prefix, prompts[i]), len(prompts[i]) - 1) for i in batch]
        rows = [answer_tree(prompts[i], answers[i], start) for i, start in zip(batch, starts)]
        T = max(len(ids) for ids, *_ in rows)
        padded = lambda part, fill: torch.tensor(
            [row[part] + [fill] * (T - len(row[part])) for row in rows], device=device)
        x, positions, branches = padded(0, 0), padded(1, 0), padded(2, -1)           # (B, T)
        mask = tree_mask(positions, branches, torch.tensor(starts, device=device))
        caches = caches_after(model, known, max(starts), len(batch), T)
        h = model.hidden(x, model.rope[:, positions], mask, caches)                  # (B, T, C)
        h = torch.cat([h[b, row[3]] for b, row in enumerate(rows)])                  # (answer tokens, C)
        y = [id for i in batch for answer in answers[i] for id in answer]
        log_p = iter(log_likelihoods(model, h, torch.tensor(y, device=device)))
        for i in batch:
            scores[i] = [sum(next(log_p) for _ in answer) for answer in answers[i]]
    return scores


def log_likelihoods(model, h, y):
    """log P of each token y (N,) after the hidden state h (N, C), as a list."""
    n = loss_rows(h.device, model.config.vocab_size)      # all logits at once would be large
    nats = [F.cross_entropy(model.logits(part).float(), target, reduction="none")
            for part, target in zip(h.split(n), y.split(n))]
    return (-torch.cat(nats)).tolist()


# ---- figures --------------------------------------------------------------------------------------------------------

def choice(question, figure):
    """The letter of the best option."""
    scores, _ = question[figure]
    return LETTERS[scores.index(max(scores))]


def standard_error(share, n):
    """Standard error of a share of n questions: half the width of Wilson's interval for z = 1.

    The usual sqrt(share (1 - share) / n) is 0 when all of three answers are right. Wilson 1927.
    """
    return math.sqrt(share * (1 - share) / n + 1 / (4 * n * n)) / (1 + 1 / n)


def accuracy(subjects, figure):
    """Accuracy on lists of questions, one a subject, in percent with standard errors: [mean of the subjects, share of
    all their questions together]."""
    rights = [[choice(q, figure) == q["answer"] for q in questions] for questions in subjects]
    shares, n = [sum(right) / len(right) for right in rights], sum(map(len, rights))
    macro, micro = sum(shares) / len(shares), sum(map(sum, rights)) / n
    errors = [standard_error(share, len(right)) for share, right in zip(shares, rights)]
    both = (macro, math.hypot(*errors) / len(errors)), (micro, standard_error(micro, n))
    return [f"{100 * share:.1f} ± {100 * error:.1f}" for share, error in both]


def report(summary, notes, scored):
    """The page in Markdown: its first paragraph says it all in short. scored: {subject: answered questions}."""
    lines = [summary, *([""] if notes else []), *(f"- {note}" for note in notes)]
    groups = {name: [word.partition("=")[0] for word in words.split()] for name, words in SUBJECTS[exam].items()}
    groups |= {"all": list(scored), **{subject: [subject] for subject in scored}}
    lines += ["", "| | questions | by letter: mean of subjects | of questions | by text: mean of subjects "
              "| of questions |", "|---|---|---|---|---|---|"]
    for name, members in groups.items():
        if subjects := [scored[subject] for subject in members if subject in scored]:
            figures = [share for figure in FIGURES for share in accuracy(subjects, figure)]
            lines.append(f"| {name} | {sum(map(len, subjects))} | {' | '.join(figures)} |")
    return "\n".join(lines if scored else lines[:-3]) + "\n"


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
        raise SystemExit(f"{folder}/{part}: no questions in *.csv there; {title}'s files are in the data set {hub} of "
                         "the Hugging Face hub, and --data_dir= names the folder that holds dev, val and test")
    if shots and not any(examples.values()):
        raise SystemExit(f"{folder}/dev: no solved questions in *.csv there for {shots} shots; --shots=0 asks without")
    model, tok, saved = runtime.load_model(checkpoint, tokenizer, device, dtype)
    torch.set_float32_matmul_precision("highest")             # TF32 was allowed, whose 10 bits turn close calls

    names = dict(word.split("=") for words in SUBJECTS[exam].values() for word in words.split() if "=" in word)
    answered, offered, dropped = {}, 0, dict.fromkeys(FIGURES, 0)
    for subject, questions in tqdm(subjects.items(), unit="subject", disable=None):
        del questions[n_questions or len(questions):]
        solved = [q for q in examples.get(subject, []) if q["answer"]][:shots]
        if len(solved) < shots:
            dev_notes[f"{subject}: {len(solved)} solved questions in {folder}/dev, {shots} were asked for"] = 0
        name = names.get(subject, subject.replace("_", " "))
        for figure in FIGURES:
            answer(model, tok, saved["stage"] != "pretrain", name, solved, questions, figure)
        answered[subject] = [q for q in questions if all(map(q.get, FIGURES))]
        offered += len(solved) * len(answered[subject])
        for figure in FIGURES:
            dropped[figure] += sum(len(solved) - q[figure][1] for q in answered[subject])

    scored = {subject: questions for subject, questions in answered.items() if questions and questions[0]["answer"]}
    n_asked, n_answered, n_scored = (sum(map(len, part.values())) for part in (subjects, answered, scored))
    said = [f"{checkpoint} ({checkpoints.fingerprint(checkpoint)}): {title} {part}, {shots} shots"]
    if scored:
        (letter, letters), (text, texts) = (accuracy(scored.values(), figure) for figure in FIGURES)
        said.append(f"accuracy by letter {letter} %, by text {text} %, chance 25 % (mean of {len(scored)} subjects ± "
                    f"standard error; {letters} and {texts} of all {n_scored:,} questions together)")
    if n_answered > n_scored:
        said.append(f"{n_answered - n_scored:,} questions have no answer in their file, ours are in {files}.json")
        with config.whole_file(f"{files}.json") as f:
            json.dump({subject: {q["id"]: choice(q, "letter") for q in questions}
                       for subject, questions in answered.items() if questions and subject not in scored}, f, indent=1)
    if shots:
        said.append(f"shots dropped for lack of room: {dropped['letter']:,} by letter and {dropped['text']:,} by text "
                    f"of {offered:,} each")
    if n_answered < n_asked:
        said.append(f"{n_asked - n_answered} questions longer than {model.config.max_seq_len} tokens left out")
    if notes:
        said.append(f"{sum(notes.values())} rows left out")
    page = report("; ".join(said), [*notes, *dev_notes], scored)
    with config.whole_file(f"{files}.md") as f:
        f.write(page)
    with config.whole_file(f"{files}.csv") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(["subject", "id", "answer", *(f"{what} {figure}" for figure in FIGURES
                                                     for what in ("by", "shots", *LETTERS)), "question"])
        for subject, questions in subjects.items():
            for q in questions:                               # no prediction where a question is too long
                by_letter, by_text = ([choice(q, figure), q[figure][1], *(f"{x:.5f}" for x in q[figure][0])]
                                      if q[figure] else [""] * 6 for figure in FIGURES)
                writer.writerow([subject, q["id"], q["answer"], *by_letter, *by_text, q["question"]])
    print(f"{page}\n{files}.md, {files}.csv")


if __name__ == "__main__":
    main()
