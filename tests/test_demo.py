"""The demo corpus: the same bytes every time, every sum right, every story whole, and nothing held out that is trained on."""
import importlib.util
import json
import os
import re
import subprocess
import sys
from random import Random

import pytest

SCRIPT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data", "make_demo.py")
SUM = re.compile(r"(\d+)(加|减|\+|-)(\d+)(?:等于|是|=)(\d+)")
FILES = ["stories.jsonl", "chat.jsonl", "heldout.jsonl"]


def records(folder, name):
    with open(folder / name, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def contents(dialogues, role):
    return [message["content"] for dialogue in dialogues for message in dialogue["messages"] if message["role"] == role]


def sums(texts):
    """{("加", 3, 4, 7), ...}: every sum that one of the texts states."""
    return {("减" if op in "-减" else "加", int(x), int(y), int(z)) for text in texts for x, op, y, z in SUM.findall(text)}


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
    for hash_seed in ("1", "2"):
        subprocess.run([sys.executable, SCRIPT, "--scale=0.01", f"--out_dir={tmp_path / hash_seed}"], check=True,
                       env=os.environ | {"PYTHONHASHSEED": hash_seed})
    for name in FILES:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert [len(records(tmp_path / "1", name)) for name in FILES] == [60, 140, 300]


def test_stories_are_whole_and_different(full, demo):
    texts = [record["text"] for record in full["stories.jsonl"]]
    assert len(set(texts)) == len(texts) == 6000
    boys, girls = ([child["name"] for child in demo.CHILDREN if child["ta"] == ta] for ta in "他她")
    for text in texts:
        assert not re.search(r"[\[\]{}|\sA-Za-z0-9]|[，。！？：][，。！？：]", text) and text[-1] in "。！”", text
        assert re.fullmatch("[^“”]*(“[^“”]+”[^“”]*)*", text), text                 # quotes open, then close
        assert ("他" in text) <= any(name in text for name in boys), text
        assert ("她" in text) <= any(name in text for name in girls), text


def test_what_is_lost_is_found_and_who_found_it_is_thanked(demo):
    rng = Random(0)
    told = [story for story in (demo.story(rng) for _ in range(1000)) if story[1]["topic"] == "找东西"]
    assert len(told) > 30
    for text, who in told:
        finder, thing = re.search(r"，(\w+?)在\w+?(?:找到了|看见了)(\w+)。", text).groups()
        assert finder == who["b"] and f"说：“谢谢你，{finder}！" in text
        assert f"发现{thing}不见了" in text and thing == who["x"]


def test_dialogues_are_well_formed(full):
    for dialogue in full["chat.jsonl"] + full["heldout.jsonl"]:
        roles = [message["role"] for message in dialogue["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
        assert all(set(message) == {"role", "content"} and message["content"].strip() for message in dialogue["messages"])
        assert not any(re.search(r"[\[\]{}|→\s]", message["content"]) for message in dialogue["messages"])
    assert len(full["heldout.jsonl"]) == 300 and all(len(dialogue["messages"]) == 2 for dialogue in full["heldout.jsonl"])
    chats = {tuple(m["content"] for m in dialogue["messages"] if m["role"] != "system") for dialogue in full["chat.jsonl"]}
    assert len(chats) == len(full["chat.jsonl"]) == 14000


def test_every_sum_is_right(full):
    for name in ("chat.jsonl", "heldout.jsonl"):
        for dialogue in full[name]:
            for asked, answered in zip(contents([dialogue], "user"), contents([dialogue], "assistant")):
                for x, op, y, z in SUM.findall(answered):
                    assert int(x) + (int(y) if op in "加+" else -int(y)) == int(z), answered
                    assert asked.startswith("再") or re.findall(r"\d+", asked) == [x, y], (asked, answered)
    assert len(sums(contents(full["chat.jsonl"], "assistant"))) == 462 - 44        # all sums up to 20 but the withheld


def test_withheld_sums_are_in_no_training_phrasing(full):
    trained, tested = (sums(contents(full[name], "assistant")) for name in ("chat.jsonl", "heldout.jsonl"))
    assert len(tested) == 44 and not trained & tested
    assert all(("加", y, x, z) in trained for op, x, y, z in tested if op == "加")    # but what they follow from is


@pytest.fixture(scope="module")
def asked(full, demo):
    """Every question of the training dialogues, with and without the words before it."""
    questions = contents(full["chat.jsonl"], "user")
    frames = [frame for frame in demo.ASKING + demo.LISTENING if frame]
    return set(questions) | {question.removeprefix(frame) for question in questions for frame in frames}


def test_held_out_questions_are_never_asked_in_training(full, asked):
    held_out = contents(full["heldout.jsonl"], "user")
    assert len(set(held_out)) == 300 and not asked & set(held_out)


def test_held_out_facts_are_asked_in_other_phrasings_and_texts_hold_their_answers(full, demo, asked):
    held_out = dict(zip(contents(full["heldout.jsonl"], "user"), contents(full["heldout.jsonl"], "assistant")))
    facts = [[question.format_map(row) for question, _ in fact["phrasings"]] for fact in demo.FACTS for row in fact["rows"]]
    hidden = [row for row in facts if held_out.keys() & row]
    assert len(hidden) > 150 and all(asked & set(row) for row in hidden)
    texts = {question: answer for question, answer in held_out.items() if "。" in question}
    assert len(texts) > 60 and all(set(answer) <= set(question) for question, answer in texts.items())
