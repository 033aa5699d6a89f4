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
    shape = ModelConfig(tok.vocab_size, 32, 2, 2, max_seq_len=128)
    model = Model(shape)
    model.embedding.weight.data *= 20                       # far from uniform predictions
    return model.eval()


def naive_log_likelihood(model, tok, text):
    ids, total = [tok.bos_id], 0.0
    for token in tok.encode(text):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        logs = logits.double().log_softmax(-1)
        total += logs[token].item()
        ids.append(token)
    return total


@pytest.mark.parametrize("make", endings.SETS)
def test_four_different_texts_of_one_length(make):
    questions = list(make(Random(3)))
    assert len(questions) >= 50
    assert questions == list(make(Random(3)))
    for texts in questions:
        assert len(set(texts)) == 4
        assert len(set(map(len, texts))) == 1


def only_the_first(make, is_right):
    for texts in make(Random(4)):
        assert [is_right(text) for text in texts] == [True, False, False, False]


def test_only_the_first_text_is_right():
    def is_right_sum(text):
        a, b, c = re.findall(r"\d+", text)
        return int(a) + int(b) == int(c)

    def is_right_measure(text):
        found = text[text.index("一") + 1:-1]
        return found[1:] in endings.MEASURES[found[0]].split()

    def is_right_antonym(text):
        words = re.findall("“(.)”|不是(.)，而是(.)", text)
        pair = "".join("".join(word) for word in words)
        return pair in endings.ANTONYMS or pair[::-1] in endings.ANTONYMS

    known = [story + ending for story, ending in endings.STORIES.items()]
    only_the_first(endings.sums, is_right_sum)
    only_the_first(endings.measure_words, is_right_measure)
    only_the_first(endings.antonyms, is_right_antonym)
    only_the_first(endings.idioms, lambda text: text[:-1] in endings.IDIOMS)
    only_the_first(endings.stories, known.__contains__)


def test_probabilities_are_those_of_a_loop(model, tok):
    questions = [next(make(Random(6))) for make in endings.SETS]
    for texts, found in zip(questions, endings.answer(model, tok, questions)):
        logs = [naive_log_likelihood(model, tok, text) for text in texts]
        expected = torch.tensor(logs).double().softmax(0)
        found = torch.tensor(found).double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_table_stands_beside_the_checkpoint(model, tok, tmp_path, monkeypatch, capsys):
    shutil.copy(tok.name, tmp_path / "tok.model")
    here = tokenizers.load(str(tmp_path / "tok.model"))
    path = tmp_path / "best.pt"
    checkpoints.save(path, {
        "stage": "pretrain",
        "model": model.state_dict(),
        "shape": vars(model.config),
        "tokenizer": here.name,
        "tokenizer_sha256": here.sha256})
    monkeypatch.setattr(endings, "checkpoint", str(path))
    monkeypatch.setattr(endings, "n_questions", 7)
    monkeypatch.setattr(endings, "device", "cpu")
    endings.main()
    page = (tmp_path / "endings.md").read_text("utf-8")
    assert page.strip() in capsys.readouterr().out
    rows = re.findall(r"^\| ([a-z ]+) \| (\d+) \| ([\d.]+)", page, re.M)
    assert [name for name, _, _ in rows] == [
        "measure words", "antonyms", "sums", "idioms", "stories", "mean of the sets"]
    n_questions = [int(n) for _, n, _ in rows]
    assert n_questions == [7, 7, 7, 7, 7, 35]
    shares = [float(share) for *_, share in rows]
    mean = sum(shares[:5]) / 5
    assert shares[-1] == pytest.approx(mean, abs=0.1)
    assert f"endings, {shares[-1]} % right" in page
