"""The demo corpus: the same bytes every time, every sum right, every story whole.

Nothing that is held out is trained on.
"""
import importlib.util
import json
import os
import re
import subprocess
import sys
from random import Random

import pytest
from conftest import ROOT

SCRIPT = str(ROOT / "data" / "make_demo.py")
SUM = re.compile(r"(\d+)(加|减|\+|-)(\d+)(?:等于|是|=)(\d+)")
FILES = ["stories.jsonl", "chat.jsonl", "heldout.jsonl"]


def records(folder, name):
    with open(folder / name, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def contents(dialogues, role):
    messages = [message for dialogue in dialogues for message in dialogue["messages"]]
    return [message["content"] for message in messages if message["role"] == role]


def sums(texts):
    """{("加", 3, 4, 7), ...}: every sum that one of the texts states."""
    found = set()
    for text in texts:
        for x, op, y, z in SUM.findall(text):
            found.add(("减" if op in "-减" else "加", int(x), int(y), int(z)))
    return found


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("make_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    subprocess.run([sys.executable, SCRIPT, f"--out_dir={folder}"], check=True)
    return {name: records(folder, name) for name in FILES}


def test_same_bytes_whatever_the_hash_seed(tmp_path):
    folders = tmp_path / "1", tmp_path / "2"
    for folder in folders:
        command = [sys.executable, SCRIPT, "--scale=0.01", f"--out_dir={folder}"]
        env = os.environ | {"PYTHONHASHSEED": folder.name}
        subprocess.run(command, check=True, env=env)
    one, two = folders
    for name in FILES:
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert [len(records(one, name)) for name in FILES] == [60, 140, 300]


def test_stories_are_whole_and_different(full, demo):
    texts = [record["text"] for record in full["stories.jsonl"]]
    assert len(set(texts)) == len(texts) == 6000
    boys = [child["name"] for child in demo.CHILDREN if child["ta"] == "他"]
    girls = [child["name"] for child in demo.CHILDREN if child["ta"] == "她"]
    left_over = re.compile(r"[\[\]{}|\sA-Za-z0-9]|[，。！？：][，。！？：]")
    for text in texts:
        assert not left_over.search(text), text
        assert text[-1] in "。！”", text
        # quotes open, then close
        assert re.fullmatch("[^“”]*(“[^“”]+”[^“”]*)*", text), text
        assert ("他" in text) <= any(name in text for name in boys), text
        assert ("她" in text) <= any(name in text for name in girls), text


def test_what_is_lost_is_found_and_who_found_it_is_thanked(demo):
    rng = Random(0)
    stories = [demo.story(rng) for _ in range(1000)]
    told = [story for story in stories if story[1]["topic"] == "找东西"]
    assert len(told) > 30
    find = re.compile(r"，(\w+?)在\w+?(?:找到了|看见了)(\w+)。")
    for text, who in told:
        finder, thing = find.search(text).groups()
        assert finder == who["b"]
        assert thing == who["x"]
        assert f"说：“谢谢你，{finder}！" in text
        assert f"发现{thing}不见了" in text


def test_dialogues_are_well_formed(full):
    for dialogue in full["chat.jsonl"] + full["heldout.jsonl"]:
        roles = [message["role"] for message in dialogue["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        for message in dialogue["messages"]:
            assert set(message) == {"role", "content"}
            assert message["content"].strip()
            assert not re.search(r"[\[\]{}|→\s]", message["content"])
    assert len(full["heldout.jsonl"]) == 300
    for dialogue in full["heldout.jsonl"]:
        assert len(dialogue["messages"]) == 2
    chats = set()
    for dialogue in full["chat.jsonl"]:
        turns = [m["content"] for m in dialogue["messages"] if m["role"] != "system"]
        chats.add(tuple(turns))
    assert len(chats) == len(full["chat.jsonl"]) == 14000


def test_every_sum_is_right(full):
    dialogues = full["chat.jsonl"] + full["heldout.jsonl"]
    questions = contents(dialogues, "user")
    answers = contents(dialogues, "assistant")
    for asked, answered in zip(questions, answers, strict=True):
        numbers = re.findall(r"\d+", asked)
        for x, op, y, z in SUM.findall(answered):
            change = int(y) if op in "加+" else -int(y)
            assert int(x) + change == int(z), answered
            assert asked.startswith("再") or numbers == [x, y], (asked, answered)
    # all sums up to 20 but the withheld
    assert len(sums(contents(full["chat.jsonl"], "assistant"))) == 462 - 44


def test_withheld_sums_are_in_no_training_phrasing(full):
    trained = sums(contents(full["chat.jsonl"], "assistant"))
    tested = sums(contents(full["heldout.jsonl"], "assistant"))
    assert len(tested) == 44
    assert not trained & tested
    # a withheld sum follows from the one with its numbers exchanged, which is trained
    for op, x, y, z in tested:
        assert op == "减" or ("加", y, x, z) in trained


@pytest.fixture(scope="module")
def asked(full, demo):
    """Every question of the training dialogues, with and without the words before it."""
    questions = set(contents(full["chat.jsonl"], "user"))
    found = set(questions)
    for frame in filter(None, demo.ASKING + demo.LISTENING):
        found |= {question.removeprefix(frame) for question in questions}
    return found


def test_held_out_questions_are_never_asked_in_training(full, asked):
    held_out = set(contents(full["heldout.jsonl"], "user"))
    assert len(held_out) == 300
    assert not asked & held_out


def test_held_out_facts_are_asked_in_other_phrasings_and_texts_hold_their_answers(
    full, demo, asked
):
    questions = contents(full["heldout.jsonl"], "user")
    answers = contents(full["heldout.jsonl"], "assistant")
    held_out = dict(zip(questions, answers))
    hidden = []  # for each fact with a phrasing that is held out, all its phrasings
    for fact in demo.FACTS:
        for row in fact["rows"]:
            phrasings = {question.format_map(row) for question, _ in fact["phrasings"]}
            if held_out.keys() & phrasings:
                hidden.append(phrasings)
    assert len(hidden) > 150
    assert all(asked & phrasings for phrasings in hidden)
    texts = [question for question in held_out if "。" in question]
    assert len(texts) > 60
    for question in texts:
        assert set(held_out[question]) <= set(question)
