"""extras/endings.py: its sets, and its scores beside a loop over tokens."""
import re
import shutil
from random import Random

import pytest
import torch

import checkpoints
import tokenizer as tokenizers
from extras import endings
from model import Model, ModelConfig


@pytest.fixture(scope="module")
def model(tok):
    torch.manual_seed(2)
    model = Model(ModelConfig(tok.vocab_size, 32, 2, 2, max_seq_len=128))
    model.embedding.weight.data *= 20                       # far from uniform predictions
    return model.eval()


def naive_log_likelihood(model, tok, text):
    ids, total = [tok.bos_id], 0.0
    for token in tok.encode(text):
        with torch.no_grad():
            logs = model(torch.tensor([ids]))[0, -1].double().log_softmax(-1)
        total += logs[token].item()
        ids.append(token)
    return total


@pytest.mark.parametrize("make", endings.SETS)
def test_four_different_texts_of_one_length(make):
    questions = list(make(Random(3)))
    assert len(questions) >= 50 and questions == list(make(Random(3)))
    for texts in questions:
        assert len(set(texts)) == 4 and len(set(map(len, texts))) == 1


def test_only_the_first_sum_is_right():
    for texts in endings.sums(Random(4)):
        found = [re.fullmatch(r"(\d+)加(\d+)等于(\d+)。", text).groups() for text in texts]
        assert [int(a) + int(b) == int(c) for a, b, c in found] == [True, False, False, False]


def test_only_the_first_is_in_the_tables():
    for texts in endings.idioms(Random(5)):
        assert [text[:-1] in endings.IDIOMS for text in texts] == [True, False, False, False]
    known = [story + ending for story, ending in endings.STORIES.items()]
    for texts in endings.stories(Random(5)):
        assert [text in known for text in texts] == [True, False, False, False]
    frame = endings.COUNTING[0]
    known = [frame.format(measure + noun) for measure, nouns in endings.MEASURES.items()
             for noun in nouns.split()]
    for texts in list(endings.measure_words(Random(5)))[::len(endings.COUNTING)]:
        assert [text in known for text in texts] == [True, False, False, False]


def test_probabilities_are_those_of_a_loop(model, tok):
    questions = [next(make(Random(6))) for make in endings.SETS]
    for texts, found in zip(questions, endings.answer(model, tok, questions)):
        logs = [naive_log_likelihood(model, tok, text) for text in texts]
        expected = torch.tensor(logs, dtype=torch.float64).softmax(0)
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected,
                                   rtol=1e-4, atol=1e-6)


def test_the_table_stands_beside_the_checkpoint(model, tok, tmp_path, monkeypatch, capsys):
    shutil.copy(tok.name, tmp_path / "tok.model")
    here = tokenizers.load(str(tmp_path / "tok.model"))
    path = tmp_path / "best.pt"
    checkpoints.save(path, {
        "stage": "pretrain", "model": model.state_dict(), "shape": vars(model.config),
        "tokenizer": here.name, "tokenizer_sha256": here.sha256})
    for name, value in {"checkpoint": str(path), "n_questions": 7, "device": "cpu"}.items():
        monkeypatch.setattr(endings, name, value)
    endings.main()
    page = (tmp_path / "endings.md").read_text("utf-8")
    assert page.strip() in capsys.readouterr().out
    rows = re.findall(r"^\| ([a-z ]+) \| (\d+) \| ([\d.]+)", page, re.M)
    assert [(name, int(n)) for name, n, _ in rows] == [
        ("measure words", 7), ("antonyms", 7), ("sums", 7), ("idioms", 7), ("stories", 7),
        ("mean of the sets", 35)]
    assert float(rows[-1][2]) == pytest.approx(sum(float(share) for *_, share in rows[:-1]) / 5,
                                               abs=0.1)
