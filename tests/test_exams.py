"""extras/exams.py against a loop without cache, batches or prefixes, and against transformers."""
import base64
import csv
import hashlib
import io
import json
import math
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch

import checkpoints
import runtime
import tokenizer as tokenizers
from extras import exams
from extras.exams import score
from model import Model, ModelConfig

from conftest import DID, WHERE, WHO, story
from test_model import like_transformers

LETTERS = "ABCD"


def network(vocab_size, **options):
    """A tiny network with weights large enough that its answers differ."""
    torch.manual_seed(0)
    shape = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, max_seq_len=256)
    shape.update(qk_norm=True)
    shape.update(options)
    model = Model(ModelConfig(vocab_size, **shape)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.2)
    return model


def alone(logits_of, prompt, answer):
    """log P(answer | prompt) from one forward pass over nothing but the two, in float64."""
    with torch.no_grad():
        logits = logits_of(torch.tensor([prompt + answer[:-1]]))[0]
    log_p = logits.double().log_softmax(-1)
    start = len(prompt) - 1
    return sum(log_p[start + i, id].item() for i, id in enumerate(answer))


# ---- score() -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize(
    "options", [{}, dict(qk_norm=False, qkv_bias=True, n_kv_heads=4, tie_embeddings=False)]
)
def test_scores_are_those_of_each_answer_alone(options, batch_size, monkeypatch):
    # the logits come in several pieces
    monkeypatch.setattr("model.loss_rows", lambda device, vocab_size: 7)
    model, rng = network(97, max_seq_len=40, **options), random.Random(0)
    ids = lambda n: [rng.randrange(97) for _ in range(n)]
    prefix = ids(20)
    prompts = [
        prefix + ids(5),
        prefix + ids(11),
        prefix[:13] + ids(4),
        prefix[:13],
        prefix,
        ids(30),
        ids(1),
        prefix + [5],
    ]
    answers = []
    for _ in prompts:
        n_answers = rng.randrange(1, 6)
        answers.append([ids(rng.randrange(1, 10)) for _ in range(n_answers)])
    answers[0] = [[3], [4], [5], [3, 4, 5], [3, 4, 6]]
    answers[1] = [ids(10), ids(1)]  # fills the context: its last id is not read
    for known in (prefix, [], prefix + ids(10), ids(3)):
        found = score(model, known, prompts, answers, batch_size)
        for prompt, choices, scores in zip(prompts, answers, found, strict=True):
            assert scores == pytest.approx(
                [alone(model, prompt, answer) for answer in choices], abs=2e-4
            )
    assert score(model, [], [], [], batch_size) == []


def test_the_prefix_goes_through_the_network_once(monkeypatch):
    model, read = network(97), []
    hidden = model.hidden

    def noted(x, *more):
        read.append(tuple(x.shape))
        return hidden(x, *more)

    monkeypatch.setattr(model, "hidden", noted)
    prefix = list(range(60))
    score(
        model,
        prefix,
        [prefix + [i, 7] for i in range(10)],
        [[[1, 2], [3], [4, 5, 6]]] * 10,
        batch_size=4,
    )
    assert read == [(1, 60), (4, 5), (4, 5), (2, 5)]  # two ids of the prompt, one, none, two


@pytest.mark.parametrize("prompt, answer", [([1] * 39, [1] * 3), ([], [1]), ([1], [])])
def test_what_cannot_be_scored_is_refused(prompt, answer):
    model = network(97, max_seq_len=40)
    with pytest.raises(ValueError, match="max_seq_len"):
        score(model, [], [prompt], [[answer]], 1)
    assert len(score(model, [], [[1] * 39], [[[1] * 2]], 1)) == 1


# ---- an exam -------------------------------------------------------------------------------------


def question(rng):
    """Question and four options, of very different lengths.

    Commas, quotes and line feeds are as in the real files.
    """
    asked = f'{rng.choice(WHO)}在{rng.choice(WHERE)}，"看见",____？'
    asked += ("\n" + story(rng, rng.randrange(4))) * rng.randrange(2)
    options = [
        *rng.sample(WHO, 2),
        str(rng.randrange(99)),
        rng.choice(DID) + "。",
        story(rng, 1),
        "A",
    ]
    return [asked, *rng.sample(options, 4)]


FORMATS = {
    "ceval": ("{}_{}.csv", ["id", "question", *LETTERS, "answer"]),
    "mmlu": ("{}_{}.csv", None),
    "cmmlu": ("{}.csv", ["", "Question", *LETTERS, "Answer"]),
}
NAMES = {
    "ceval": {"logic": "逻辑学", "marxism": "马克思主义基本原理", "my_own": "my own"},
    "cmmlu": {"agronomy": "农学", "ancient_chinese": "古汉语"},
    "mmlu": {"anatomy": "anatomy", "formal_logic": "formal logic"},
}


def write_csv(path, rows, header=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows([header] * bool(header) + rows)


def write_exam(folder, exam, split, n=7):
    """Writes the files of an exam; returns {subject: (examples, questions)}.

    Both are lists of [question, A, B, C, D, answer].
    """
    rng, name, made = random.Random(exam), FORMATS[exam], {}
    for i, subject in enumerate(NAMES[exam]):
        made[subject] = tuple(
            [question(rng) + [rng.choice(LETTERS)] for _ in range(k)] for k in (5, n + i)
        )
        for part, rows in zip(("dev", split), made[subject]):
            numbered = [[i, *row] for i, row in enumerate(rows)] if name[1] else rows
            if exam == "ceval" and part == "dev":
                write_csv(
                    folder / part / name[0].format(subject, part),
                    [[*r, "因为\n所以"] for r in numbered],
                    name[1] + ["explanation"],
                )
            else:
                write_csv(folder / part / name[0].format(subject, part), numbered, name[1])
    return made


def expected(exam, model, logits_of, tok, is_chat, name, examples, row, shots, by_text):
    """(scores, shots) of one question by hand, with as many shots as there is room for, or None."""
    if exam == "ceval":
        first = f"以下是中国关于{name}考试的单项选择题，请选出其中的正确答案。"
        before, behind, gap = "", "答案：", ""
    elif exam == "cmmlu":
        first = f"以下是关于{name}的单项选择题，请直接给出正确答案的选项。"
        before, behind, gap = "题目：", "答案是：", ""
    else:
        first = f"The following are multiple choice questions (with answers) about {name}."
        before, behind, gap = "", "Answer:", " "

    def asked(row):
        options = [f"{letter}. {text}" for letter, text in zip(LETTERS, row[1:5])]
        if by_text:
            options = []
        return "\n".join([before + row[0], *options, behind])

    answers = row[1:5] if by_text else list(LETTERS)
    for n in range(shots, -1, -1):
        solved = []
        for example in examples[:n]:
            letter = example[5]
            solution = example[1 + LETTERS.index(letter)] if by_text else letter
            solved.append((asked(example), solution))
        if is_chat:
            turns = [*(text for pair in solved for text in pair), asked(row)]
            turns[0] = f"{first}\n\n{turns[0]}"
            ids = [tok.bos_id]
            for i, text in enumerate(turns):
                ids += [
                    tok.controls["<|assistant|>" if i % 2 else "<|user|>"],
                    *tok.encode(text),
                    tok.end_id,
                ]
            ids.append(tok.controls["<|assistant|>"])
        else:
            text = "\n\n".join([first, *(f"{q}{gap}{a}" for q, a in solved), asked(row)])
            ids = [tok.bos_id] + tok.encode(text)
        choices = [tok.encode(gap * (not is_chat) + answer) for answer in answers]
        if max(len(ids) + len(c) - 1 for c in choices) <= model.config.max_seq_len:
            return [
                alone(logits_of, ids, c) / (len(a) if by_text else 1)
                for c, a in zip(choices, answers)
            ], n
    return None


def save(path, model, tok, stage):
    checkpoints.save(
        str(path),
        {
            "stage": stage,
            "model": model.state_dict(),
            "shape": vars(model.config),
            "tokenizer": tok.name,
            "tokenizer_sha256": tok.sha256,
        },
    )


@pytest.fixture
def sit(tmp_path, monkeypatch, capsys):
    """Run the script on tmp_path/best.pt and tmp_path/exam; returns what it said and wrote."""

    def run(exam, split, **constants):
        usual = dict(
            exam=exam,
            split=split,
            data_dir=str(tmp_path / "exam"),
            batch_size=3,
            device="cpu",
            checkpoint=str(tmp_path / "best.pt"),
            dtype="float32")
        for name, value in {**usual, **constants}.items():
            monkeypatch.setattr(exams, name, value)
        exams.main()
        files = {kind: tmp_path / f"{exam}_{split}.{kind}" for kind in ("md", "csv", "json")}
        rows = list(csv.DictReader(files["csv"].read_text("utf-8").splitlines(keepends=True)))
        answers = None
        if files["json"].exists():
            answers = json.loads(files["json"].read_text("utf-8"))
        return SimpleNamespace(
            said=capsys.readouterr().out,
            page=files["md"].read_text("utf-8"),
            rows=rows,
            json=answers)

    return run


def check(exam, made, sat, of_question):
    """Every row of the table against of_question(subject, row, by_text).

    Returns {figure: {subject: [right or not]}}.
    """
    rows, rights, different = iter(sat.rows), {"letter": {}, "text": {}}, set()
    for subject, (_, questions) in sorted(made.items()):
        for i, asked in enumerate(questions):
            row = next(rows)
            found = {
                figure: of_question(subject, asked, figure == "text")
                for figure in rights}
            assert (row["subject"], row["id"], row["answer"]) == (subject, str(i), asked[5])
            assert row["question"] == asked[0].strip()
            for figure, hand in found.items():
                if None in found.values():  # counted, not scored
                    assert bool(row[f"by {figure}"]) == bool(hand)
                    continue
                scores, n = hand
                assert [float(row[f"{c} {figure}"]) for c in LETTERS] == pytest.approx(
                    scores, abs=5e-4
                )
                best = LETTERS[scores.index(max(scores))]
                assert (row[f"by {figure}"], row[f"shots {figure}"]) == (best, str(n))
                rights[figure].setdefault(subject, []).append(best == asked[5])
                different.add((figure, best))
    assert next(rows, None) is None and len(different) >= 5, different  # not always the same letter
    return rights


def shares(rights):
    """The figures of a row of the page, the long way, from {subject: [right or not]}."""
    mean = lambda x: sum(x) / len(x)

    def variance(x):  # Wilson: |q - mean| is one deviation of q
        n, p = len(x), mean(x)
        larger, smaller = np.roots([1 + 1 / n, -2 * p - 1 / n, p * p])
        return ((larger - smaller) / 2) ** 2

    together = [y for x in rights.values() for y in x]
    error = math.sqrt(sum(map(variance, rights.values()))) / len(rights)
    macro = mean([mean(x) for x in rights.values()]), error
    micro = mean(together), math.sqrt(variance(together))
    return [f"{100 * p:.1f} ± {100 * e:.1f}" for p, e in (macro, micro)]


@pytest.mark.parametrize(
    "exam, stage, shots, size",
    [
        ("ceval", "pretrain", 5, 400),
        ("ceval", "sft", 3, 300),
        ("cmmlu", "pretrain", 5, 300),
        ("cmmlu", "sft", 5, 900),
        ("mmlu", "pretrain", 2, 900),
        ("mmlu", "pretrain", 0, 900),
        ("ceval", "pretrain", 4, 150),
    ],
)
def test_an_exam_is_that_of_a_loop_over_questions_and_options(
    exam, stage, shots, size, tok, tmp_path, sit
):
    model = network(tok.vocab_size, max_seq_len=size)
    save(tmp_path / "best.pt", model, tok, stage)
    made = write_exam(tmp_path / "exam", exam, "val" if exam == "ceval" else "test")
    sat = sit(exam, "val" if exam == "ceval" else "test", shots=shots)
    found = {}

    def of_question(subject, row, by_text):
        stripped = lambda r: [field.strip() for field in r]
        examples, key = list(map(stripped, made[subject][0])), (subject, *row, by_text)
        name, row = NAMES[exam][subject], stripped(row)
        found[key] = expected(
            exam, model, model, tok, stage == "sft", name, examples, row, shots, by_text)
        return found[key]

    rights = check(exam, made, sat, of_question)
    figures = [share for figure in ("letter", "text") for share in shares(rights[figure])]
    n = sum(map(len, rights["text"].values()))
    assert f"| all | {n} | {' | '.join(figures)} |" in sat.page.splitlines()
    summary = sat.page.splitlines()[0]
    digest = hashlib.sha256((tmp_path / "best.pt").read_bytes()).hexdigest()
    assert summary.startswith(f"{tmp_path}/best.pt ({digest[:8]}): ")  # report.py compares it
    assert f"by letter {figures[0]} %, by text {figures[2]} %, chance 25 %" in summary
    assert sat.page in sat.said
    for subject in made:
        assert f"| {subject} | {len(rights['text'][subject])} | " in sat.page
    whole = [
        key for key in found
        if found[key[:-1] + (False,)] and found[key[:-1] + (True,)]]
    dropped = [
        sum(shots - found[key][1] for key in whole if key[-1] == by_text)
        for by_text in (False, True)
    ]
    if shots:
        counts = f"{dropped[0]:,} by letter and {dropped[1]:,} by text of {shots * n:,} each"
        assert counts in summary
    left_out = len(found) // 2 - n
    is_said = f"{left_out} questions longer than 150 tokens left out" in summary
    assert is_said == bool(left_out) == (size == 150)
    assert bool(dropped[0]) == (size < 900)


@pytest.mark.parametrize("kind, options", [("Llama", dict(qk_norm=False)), ("Qwen3", {})])
def test_accuracy_and_predictions_are_those_of_transformers(kind, options, tok, tmp_path, sit):
    model = network(tok.vocab_size, max_seq_len=700, tie_embeddings=False, **options)
    save(tmp_path / "best.pt", model, tok, "pretrain")
    theirs = like_transformers(kind, model.config, model.state_dict())
    made = write_exam(tmp_path / "exam", "ceval", "val", n=12)
    sat = sit("ceval", "val", shots=3)
    strip = lambda rows: [[field.strip() for field in row] for row in rows]

    def of_question(subject, row, by_text):
        name, examples = NAMES["ceval"][subject], strip(made[subject][0])
        logits_of = lambda x: theirs(x).logits
        row = strip([row])[0]
        return expected(
            "ceval", model, logits_of, tok, False, name, examples, row, 3, by_text)

    rights = check("ceval", made, sat, of_question)
    figures = [share for figure in ("letter", "text") for share in shares(rights[figure])]
    assert f"| all | {12 + 13 + 14} | {' | '.join(figures)} |" in sat.page


# ---- what is in the files ------------------------------------------------------------------------

GOOD = [
    ["谁在河边？", *WHO[:4], "A"],
    ["谁在山上？", *WHO[2:6], "C"],
    ["谁在家里？", *WHO[1:5], "D"],
]
HEADER = ["id", "question", *LETTERS, "answer"]


def numbered(rows):
    return [[i, *row] for i, row in enumerate(rows)]


def test_broken_rows_are_counted_by_file_and_not_scored(tok, tmp_path, sit):
    save(tmp_path / "best.pt", network(tok.vocab_size), tok, "pretrain")
    folder = tmp_path / "exam" / "val"
    bad = [
        ["少了", "一", "二", "三"],
        ["问", "一", "二", "三", "四", "E"],
        ["问", "一", "", "三", "四", "A"],
        ["多了", "一", "二", "三", "四", "五", "A"],
        [" ", "一", "二", "三", "四", "B"],
        ["问", "一", "二", "三", "四", ""],
        ["问", "一", "二 ", "三", "二", "A"],
    ]
    write_csv(folder / "logic_val.csv", numbered([GOOD[0], *bad, *GOOD[1:]]), HEADER)
    write_csv(folder / "law_val.csv", numbered(GOOD), HEADER)
    with open(folder / "law_val.csv", "a", encoding="utf-8") as f:
        f.write('3,"没有结束,一,二,三,四,A\n4,被吞掉了,一,二,三,四,B\n')
    sat = sit("ceval", "val", shots=0)
    scored = [row["subject"] + row["id"] for row in sat.rows]
    assert scored == "law0 law1 law2 logic0 logic8 logic9".split()
    assert "of all 6 questions together" in sat.page
    assert "; 8 rows left out" in sat.page.splitlines()[0]
    for note in (
        "logic_val.csv: 1 rows left out, 5 fields instead of 7 (line 3)",
        "(line 4, 8)",
        "missing (line 5, 7)",
        "8 fields instead of 7 (line 6)",
        "two options are equal (line 9)",
        "law_val.csv: 1 rows left out, broken CSV",
        "(line 5)",
    ):
        assert note in sat.said, note


@pytest.mark.parametrize(
    "exam, header, blank", [("ceval", HEADER[:6], []), ("ceval", HEADER, [""]), ("mmlu", None, [])]
)
def test_files_without_answers_are_answered_for_submission(exam, header, blank, tok, tmp_path, sit):
    save(tmp_path / "best.pt", network(tok.vocab_size), tok, "sft")
    dev = numbered(GOOD) if header else GOOD
    name = "logic" if header else "anatomy"
    write_csv(tmp_path / f"exam/dev/{name}_dev.csv", dev, header and HEADER)
    write_csv(tmp_path / f"exam/test/{name}_test.csv", [row[:-1] + blank for row in dev], header)
    sat = sit(exam, "test", shots=2)
    assert sat.json == {name: {row["id"]: row["by letter"] for row in sat.rows}}
    assert len(sat.rows) == 3 and set(sat.json[name].values()) <= set(LETTERS)
    assert "accuracy" not in sat.said and "|" not in sat.page
    assert "3 questions have no answer in their file" in sat.said
    write_csv(tmp_path / "exam/test/other_test.csv", dev, header and HEADER)  # one of each
    sat = sit(exam, "test", shots=2)
    assert sat.json.keys() == {name}
    assert "| all | 3 |" in sat.page and "other: 0 solved questions" in sat.page
    assert "shots dropped for lack of room: 0 by letter and 0 by text of 6 each" in sat.page


def test_encodings_are_detected_and_an_archive_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "logic_val.csv"
    lines = [",".join(map(str, row)) for row in [HEADER, *numbered(GOOD)]]
    text = "\r\n".join(lines) + "\r\n"
    path.write_bytes(text.encode("utf-8"))
    questions, bad = exams.read_questions(str(path))
    columns = "question", *LETTERS, "answer"
    assert not bad and [[q[column] for column in columns] for q in questions] == GOOD
    for encoding in ("gbk", "utf-8-sig", "utf-16"):
        path.write_bytes(text.encode(encoding))
        assert exams.read_questions(str(path)) == (questions, {})
    path.write_bytes(text.encode("utf-8").replace("山上".encode(), b"\xe5\xb1"))
    expected = [questions[0], questions[2]], {"broken characters": [3]}
    assert exams.read_questions(str(path)) == expected
    path.write_bytes(b"PK\3\4" + bytes(99))
    with pytest.raises(SystemExit, match="logic_val.csv.*zip archive"):
        exams.read_questions(str(path))
    path.write_text("id,question,A,B,C,answer\n0,问,一,二,三,A\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="logic_val.csv.*D are needed"):
        exams.read_questions(str(path))


def test_float32_is_not_tf32(tok, tmp_path, sit, monkeypatch):
    """As on a GPU, where runtime.start() allows TF32."""
    save(tmp_path / "best.pt", network(tok.vocab_size), tok, "pretrain")
    write_csv(tmp_path / "exam/val/logic_val.csv", numbered(GOOD), HEADER)
    start, before = runtime.start, torch.get_float32_matmul_precision()

    def start_with_tf32(device):
        torch.set_float32_matmul_precision("high")
        return start(device)

    monkeypatch.setattr(runtime, "start", start_with_tf32)
    sit("ceval", "val", shots=0)
    now = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)
    assert now == "highest"


def test_of_few_questions_the_error_is_not_zero(monkeypatch):
    monkeypatch.setattr(exams, "choice", lambda question, figure: "A")
    three = [{"answer": "A"}] * 3
    # Wilson: 1 / 8, 1 / 14
    assert exams.accuracy([three, three], "text") == ["100.0 ± 8.8", "100.0 ± 7.1"]
    many = [{"answer": "A"}] * 1000 + [{"answer": "B"}] * 1000
    assert exams.accuracy([many], "text") == ["50.0 ± 1.1"] * 2  # sqrt(1 / 4 / 2000)


def test_folders_without_questions_or_examples_end_in_a_sentence(tok, tmp_path, sit):
    save(tmp_path / "best.pt", network(tok.vocab_size), tok, "pretrain")
    for constants, said in (
        (dict(exam="cevl"), "ceval, cmmlu, mmlu"),
        ({}, "exam/val: no questions"),
    ):
        with pytest.raises(SystemExit, match=said):
            sit(**{"exam": "ceval", "split": "val", **constants})
    write_csv(tmp_path / "exam/val/logic_val.csv", numbered(GOOD), HEADER)
    with pytest.raises(SystemExit, match="exam/dev: no solved questions.*--shots=0"):
        sit("ceval", "val", shots=5)
    (tmp_path / "exam/val/x.csv").mkdir()                      # is no file, and left out
    assert len(sit("ceval", "val", shots=0, n_questions=2).rows) == 2


def test_the_tables_of_subjects_are_whole():
    """52, 67 and 57 subjects, each in one category; all Chinese ones have a name.

    Of CMMLU's, 15 are in a second category.
    """
    for exam, n, sizes in (
        ("ceval", 52, [20, 10, 11, 11]),
        ("cmmlu", 67, [17, 22, 13, 15]),
        ("mmlu", 57, [18, 12, 13, 14]),
    ):
        first = [words.split() for words in exams.SUBJECTS[exam].values()][:4]
        assert [len(words) for words in first] == sizes and sum(sizes) == n
        words = [word for words in first for word in words]
        assert len({word.partition("=")[0] for word in words}) == n
        form = r"[a-z_]+" if exam == "mmlu" else r"[a-z_]+=[\u4e00-\u9fff]+"
        assert all(re.fullmatch(form, word) for word in words)
    ours = exams.SUBJECTS["cmmlu"]["China specific"].split()
    everything = " ".join(exams.SUBJECTS["cmmlu"].values())
    assert len(set(ours)) == 15 and all(f"{name}=" in everything for name in ours)


@pytest.mark.parametrize("dummy", [True, False])
def test_an_answer_that_the_tokenizer_melts_into_the_prompt(dummy, tmp_path, monkeypatch):
    """Prompt and answer together are the ids of the whole text, and all of the answer is scored.

    With GPT-2's byte pairs, and with a sentencepiece model of words that has a dummy space.
    """
    if dummy:
        model = io.BytesIO()
        texts = [
            "The answer: A cat sat on the mat. Answer:A Answer:B Answer:C Answer:D Answer: A"
        ] * 20
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=400,
            byte_fallback=True,
            split_by_whitespace=False,
            split_by_unicode_script=False,
            minloglevel=2,
            num_threads=1,
            hard_vocab_limit=False,
        )
        (tmp_path / "words.model").write_bytes(model.getvalue())
        tok = tokenizers.load(str(tmp_path / "words.model"))
        assert tok.dummy_space
    else:
        ranks = [bytes([b]) for b in range(256)] + [b":A", b"er", b"An", b" A", b" B"]
        lines = "".join(
            f"{base64.b64encode(piece).decode()} {i}\n" for i, piece in enumerate(ranks)
        )
        (tmp_path / "ranks.tiktoken").write_text(lines, encoding="utf-8")
        tok = tokenizers.load(str(tmp_path / "ranks.tiktoken"))
    monkeypatch.setattr(exams, "exam", "mmlu")
    melted = 0
    for gap in (" ", ""):
        monkeypatch.setitem(
            exams.EXAMS, "mmlu", ("", "", "", "About {}.\n\n", "", "\nAnswer:", gap)
        )
        options = "A cat", "sat on", "mat", "the mat."
        question = {"question": "The cat?", **dict(zip(LETTERS, options))}
        for figure, answers in ("letter", LETTERS), ("text", options):
            prompt, found = exams.encode(tok, False, "cats", [], question, figure)
            listed = "\nA. A cat\nB. sat on\nC. mat\nD. the mat." * (figure == "letter")
            text = f"About cats.\n\nThe cat?{listed}\nAnswer:"
            assert [prompt + ids for ids in found] == [
                [tok.bos_id] + tok.encode(f"{text}{gap}{a}") for a in answers
            ]
            assert all(tok.decode(ids).endswith(a) for ids, a in zip(found, answers))
            melted += prompt != [tok.bos_id] + tok.encode(text)
    assert melted or not dummy
