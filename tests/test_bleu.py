"""eval_bleu.py against sacrebleu, and end to end."""

import hashlib
import json
import random
import re

import pytest
import sacrebleu
import torch
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

import checkpoints
import eval_bleu
from model import Model, ModelConfig, generate

ALPHABET = (
    "的一是不了人我在有他这中大来上国小猫狗花"
    "。，！？、；：“”（）《》——…·"
    "abcXYZ0123456789"
    "   \t\n"
    ".,-'!?;:\"()[]{}<>@#$%&*+/=_~`|\\^"
    "éüßñ αβ あア가"
    "㐀䶵鿿豈﨑ａ１％￥〇㎡①Ⅷ→≈☆★▲𠀀𪜀😀🏽"
    "\u200b\u3000\xa0"
)


def random_text(rng, most=40):
    if rng.random() < 0.3:  # numbers with points, dates, sentences of words
        return rng.choice(
            [
                "3.14元",
                "1,000.5",
                "2020-01-02",
                "10-20岁",
                "e.g. 约3.5kg",
                "A-B test",
                "a.b,c",
                "第1.章",
            ]
        )
    return "".join(rng.choices(ALPHABET, k=rng.randrange(most)))


def pairs(seed, n):
    """Answers that share more or less with their references; some are shorter, longer or empty."""
    rng = random.Random(seed)
    for _ in range(n):
        reference = "".join(random_text(rng) for _ in range(rng.randrange(1, 4)))
        cut = rng.randrange(len(reference) + 1)
        yield rng.choice(
            [
                reference,
                reference[:cut],
                reference[cut:] + random_text(rng),
                random_text(rng),
                reference.replace("的", "了"),
                "",
            ]
        ), reference


def test_words_are_those_of_sacrebleu():
    tokenize = TokenizerZh()
    rng = random.Random(0)
    every_7th = [chr(i) for i in range(0x20, 0x30000, 7) if not 0xD800 <= i < 0xE000]
    for text in [random_text(rng, 60) for _ in range(3000)] + every_7th:
        assert eval_bleu.words(text) == tokenize(text).split(), ascii(text)


def test_sentence_bleu_is_that_of_sacrebleu():
    scores = []
    for answer, reference in pairs(1, 1500):
        expected = sacrebleu.sentence_bleu(answer, [reference], tokenize="zh").score
        scores.append(eval_bleu.bleu(eval_bleu.statistics(answer, reference), is_sentence=True))
        assert scores[-1] == pytest.approx(expected, abs=1e-6), ascii((answer, reference))
    assert (
        min(
            sum(s == 0 for s in scores),
            sum(s > 99 for s in scores),
            sum(20 < s < 80 for s in scores),
        )
        > 50
    )


@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_corpus_bleu_is_that_of_sacrebleu(n):
    for seed in range(40 if n < 50 else 8):
        answers, references = zip(*pairs(100 * n + seed, n))
        sums = [sum(column) for column in zip(*map(eval_bleu.statistics, answers, references))]
        expected = sacrebleu.corpus_bleu(list(answers), [list(references)], tokenize="zh")
        assert eval_bleu.bleu(sums) == pytest.approx(expected.score, abs=1e-6), ascii(
            (answers, references)
        )
        assert (sums[0], sums[1]) == (expected.sys_len, expected.ref_len)


def test_a_long_answer_gets_no_bonus():
    score = lambda answer: eval_bleu.bleu(
        eval_bleu.statistics(answer, "今天天气很好我们去公园"), is_sentence=True
    )
    assert score("今天天气很好我们去公园") == pytest.approx(100)
    assert (
        score("今天天气很好我们去公园" * 3) < 50
    )  # the penalty is clipped at 1: never above precision
    assert score("今天天气很好") == pytest.approx(100 * 2.718281828 ** (1 - 11 / 6))


def test_empty_answers_score_zero():
    assert eval_bleu.bleu(eval_bleu.statistics("", "你好"), is_sentence=True) == 0
    assert eval_bleu.bleu(eval_bleu.statistics("", "你好")) == 0


def test_the_script_answers_and_writes_a_table(tok, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = Model(ModelConfig(tok.vocab_size, dim=32, n_layers=1, n_heads=2, max_seq_len=32))
    checkpoints.save(
        str(tmp_path / "best.pt"),
        {
            "stage": "sft",
            "model": model.state_dict(),
            "shape": vars(model.config),
            "tokenizer": tok.name,
            "tokenizer_sha256": tok.sha256,
        },
    )
    asked = [
        ("你好！", "你好！"),
        ("一加一是几？\n是 a|b 吗？", "二。"),
        ("天" * 100, "太长"),
        ("你是谁？", "我是小助手。"),
        ("第五", "不问"),
    ]
    with open(tmp_path / "test.jsonl", "w", encoding="utf-8") as f:
        for question, answer in asked:
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            f.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    for name, value in dict(
        checkpoint=str(tmp_path / "best.pt"),
        questions=str(tmp_path / "test.jsonl"),
        n_questions=4,
        batch_size=2,
        max_new_tokens=6,
        device="cpu",
        dtype="float32",
    ).items():
        monkeypatch.setattr(eval_bleu, name, value)
    eval_bleu.main()
    said = capsys.readouterr().out
    table = (tmp_path / "bleu.md").read_text("utf-8")
    assert "longer than the context: 1 of 4 questions" in said
    assert re.search(r"BLEU-4 \d+\.\d\d on 3 questions", said)
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 3 and all(len(re.split(r"(?<!\\)\|", row)) == 6 for row in rows), table
    digest = hashlib.sha256((tmp_path / "best.pt").read_bytes()).hexdigest()
    # beside the checkpoint, and names it
    assert table.startswith(f"{tmp_path}/best.pt ({digest[:8]}): BLEU-4 ")
    assert "一加一是几？<br>是 a\\|b 吗？" in table
    assert "第五" not in table


def test_every_prompt_gets_the_answer_that_it_gets_alone(tok, monkeypatch):
    torch.manual_seed(0)
    shape = ModelConfig(tok.vocab_size, dim=32, n_layers=1, n_heads=2, max_seq_len=32)
    model = Model(shape).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    monkeypatch.setattr(eval_bleu, "batch_size", 2)
    monkeypatch.setattr(eval_bleu, "max_new_tokens", 6)
    monkeypatch.setattr(eval_bleu, "repetition_penalty", 1.5)
    prompts = [[tok.bos_id] + [20 + i] * n for i, n in enumerate((9, 1, 4, 2, 7))]
    alone = []
    for ids in prompts:
        how = dict(temperature=0, repetition_penalty=1.5, stop_ids=tok.stop_ids)
        tokens = [token for (token,) in generate(model, [ids], 6, **how)]
        alone.append(tok.decode(tokens))
    assert len(set(alone)) == 5
    assert eval_bleu.answer_all(model, tok, prompts) == alone


def test_a_questions_file_that_cannot_be_read_ends_in_one_sentence(tmp_path, monkeypatch):
    for content in (
        "",
        "{broken\n",
        '{"no": "messages"}\n',
        '{"messages": [{"role": "user", "content": "q"}]}\n',
        "[1]\n",
        '{"messages": "text"}\n',
        '{"messages": [1, 2]}\n',
        '{"messages": [{"role": "user"}, {"role": "assistant"}]}\n',
    ):
        (tmp_path / "q.jsonl").write_text(content, encoding="utf-8")
        monkeypatch.setattr(eval_bleu, "questions", str(tmp_path / "q.jsonl"))
        with pytest.raises(SystemExit, match="q.jsonl"):
            eval_bleu.read_questions()
