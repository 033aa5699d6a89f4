"""prepare_sft.py: what is written is what was said, mask and report are right, nothing gets lost uncounted."""
import json
import re
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT, run


def pairs(n, answer="好的。"):
    return [{"instruction": f"第{i}个问题是什么？", "input": "", "output": answer + str(i)} for i in range(n)]


def long_dialogue(i, turns):
    return {"messages": [{"role": "system", "content": f"你是{i}号。"}] + [
        {"role": role, "content": f"{i}-{t}{'问' if role == 'user' else '答'}"}
        for t in range(turns) for role in ("user", "assistant")]}


@pytest.fixture(scope="module")
def made(tok, tmp_path_factory):
    """A folder with awkward input, and what two runs with 1 and 2 workers made of it."""
    folder = tmp_path_factory.mktemp("sft")
    alpaca = pairs(900) + pairs(5)
    alpaca += [{"instruction": "问题", "input": "", "output": ""}, {"instruction": "长", "output": "答" * 300}]
    lines = [json.dumps(record, ensure_ascii=False) for record in alpaca] + ['{"instruction": "half', "17"]
    (folder / "alpaca.jsonl").write_text("\n".join(lines), encoding="utf-8")
    chat = [long_dialogue(i, 1 + i % 12) for i in range(200)]
    chat += [{"messages": [{"role": "user", "content": "第7个问题是什么？"}, {"role": "assistant", "content": f"另一个回答{i}"}]}
             for i in range(20)]                                   # a question of the other file, with other answers
    (folder / "chat.json").write_text(json.dumps(chat, ensure_ascii=False), encoding="utf-8")
    outs = [run("prepare_sft.py", folder, "--corpora=alpaca:alpaca.jsonl,messages:chat.json", f"--tokenizer={tok.name}",
                f"--data_dir=d{workers}", f"--workers={workers}", "--max_seq_len=60", "--max_answer=250",
                "--val_fraction=0.1", "--test_fraction=0.1", f"--show={4 * (workers == 2)}") for workers in (1, 2)]
    for out in outs:
        assert out.rc == 0, out.err
    return folder, alpaca, chat, outs[1].out


def read(folder, split):
    """[(ids, mask)] of a split."""
    bin_, mask, idx = (np.fromfile(folder / f"{split}.{kind}", dtype) for kind, dtype in
                       (("bin", "<u2"), ("mask", "u1"), ("idx", "<i8")))
    assert len(bin_) == len(mask) == idx[-1] and idx[0] == 0 and (np.diff(idx) > 0).all()
    return [(bin_[a:b].tolist(), mask[a:b].tolist()) for a, b in zip(idx[:-1], idx[1:])]


def test_same_bytes_for_any_number_of_workers(made):
    names = sorted(path.name for path in (made[0] / "d1").iterdir())
    assert names == ["meta.json", "test.jsonl", "train.bin", "train.idx", "train.mask", "val.bin", "val.idx",
                     "val.mask"]
    for name in names:
        assert (made[0] / "d1" / name).read_bytes() == (made[0] / "d2" / name).read_bytes(), name


def parse(tok, ids):
    """The messages of rendered ids, by an own reading of the template."""
    assert ids[0] == 1
    messages, names = [], {4: "system", 5: "user", 6: "assistant"}
    for id in ids[1:]:
        if id in names:
            messages.append({"role": names[id], "content": []})
        elif id == 7:
            messages[-1]["content"] = tok.decode(messages[-1]["content"])
        else:
            messages[-1]["content"].append(id)
    return messages


def all_examples(made, tok):
    folder = made[0] / "d1"
    read_back = {split: [parse(tok, ids) for ids, _ in read(folder, split)] for split in ("train", "val")}
    with open(folder / "test.jsonl", encoding="utf-8") as f:
        return read_back | {"test": [json.loads(line)["messages"] for line in f]}


def test_everything_is_used_once_or_dropped_for_its_reason(made, tok):
    _, alpaca, chat, _ = made
    want = {json.dumps([{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": r["output"]}])
            for r in alpaca[:900]}
    kept = Counter()
    for record in chat:
        messages, system = record["messages"], record["messages"][:1] * (record["messages"][0]["role"] == "system")
        rest = messages[len(system):]
        while len(tok.render(system + rest)[0]) > 60:              # whole early exchanges go, the system text stays
            rest = rest[2:]
        kept[json.dumps(system + rest)] += 1
    got = Counter(json.dumps(m) for messages in all_examples(made, tok).values() for m in messages)
    assert got == Counter(want) + kept
    assert sum(len(json.loads(m)) > 3 for m in kept) > 50          # the test means something: several turns do fit


def test_report_adds_up(made, tok):
    folder, alpaca, chat, out = made
    meta = json.loads((folder / "d1/meta.json").read_text(encoding="utf-8"))
    first, second = meta["corpora"]["alpaca:alpaca.jsonl"], meta["corpora"]["messages:chat.json"]
    assert first["records"] == len(alpaca) + 2 and first["examples"] == 900
    assert sorted(first["dropped"].values()) == [1, 1, 1, 1, 5] and first["dropped"]["duplicate"] == 5
    assert first["dropped"]["answer too long"] == 1
    assert second["records"] == second["examples"] == len(chat) == 220 and not second["dropped"]
    assert second["shortened"] == sum(len(tok.render(record["messages"])[0]) > 60 for record in chat) > 50
    for split in "train", "val":
        examples = read(folder / "d1", split)
        assert meta[split]["examples"] == len(examples) > 10
        assert meta[split]["tokens"] == sum(len(ids) for ids, _ in examples)
        assert meta[split]["targets"] == sum(sum(mask) for _, mask in examples)
        assert meta[split]["longest"] == max(len(ids) for ids, _ in examples) <= 60
    for name in "examples", "tokens", "targets":
        assert first[name] + second[name] == sum(meta[split][name] for split in ("train", "val", "test"))
    assert meta["longest"] == max(meta[split]["longest"] for split in ("train", "val", "test"))
    assert meta["tokenizer_sha256"] == tok.sha256 and meta["format"] == 1 and meta["vocab_size"] == 400
    assert f"{meta['train']['targets']:,}" in out and "5 duplicate" in out
    assert all(f"{column}: " in out for column in ("targets", "shortened", "augmented"))     # what they mean
    assert "were dropped because" not in out


def test_mask_is_every_answer_with_its_end_and_nothing_else(made, tok):
    for ids, mask in read(made[0] / "d1", "train"):
        role, want = None, []
        for id in ids:
            header = id in (4, 5, 6)
            role = id if header else role
            want.append(int(role == 6 and not header))
        assert mask == want and sum(mask) >= 2
        assert mask[ids.index(6) + 1] == 1 and mask[-1] == 1       # the first answer token, and the end of the turn


def test_a_question_stands_on_one_side_only(made, tok):
    sides = {split: {next(m["content"] for m in messages if m["role"] == "user") for messages in examples}
             for split, examples in all_examples(made, tok).items()}
    assert not sides["train"] & sides["val"] and not sides["train"] & sides["test"] and not sides["val"] & sides["test"]
    assert all(len(side) > 20 for side in sides.values())


def test_show_marks_exactly_the_answers(made, tok):
    shown = made[3][made[3].index("--- example"):]
    examples, by_number = read(made[0] / "d2", "train"), re.split(r"--- example (\d+) of .*\n", shown)[1:]
    assert len(by_number) == 8
    for number, text in zip(by_number[::2], by_number[1::2]):
        messages = parse(tok, examples[int(number)][0])
        assert text.startswith("<bos><|")
        answers = [m["content"] + "<|end|>" for m in messages if m["role"] == "assistant"]
        assert re.findall(r"【(.*?)】", text, re.S) == answers
        assert re.sub(r"【|】", "", text.split("\n\n")[0]).strip() == "<bos>" + "".join(
            f"<|{m['role']}|>{m['content']}<|end|>" for m in messages)


def test_show_shows_some_of_every_corpus(tok, tmp_path):
    """Also of a small one beside a large one, and one of each where there are more corpora than examples asked for."""
    for name, n in ("a", 200), ("b", 3), ("c", 1):
        records = pairs(n, f"{name}的回答")
        for record in records:
            record["instruction"] = name + record["instruction"]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    for names, show, expected in ("ab", 3, "abb"), ("abc", 2, "abc"), ("abc", 12, "aaaabbbc"), ("a", 2, "aa"):
        corpora = ",".join(f"alpaca:{name}.jsonl" for name in names)
        done = run("prepare_sft.py", tmp_path, f"--corpora={corpora}", f"--tokenizer={tok.name}", f"--show={show}",
                   "--val_fraction=0", "--test_fraction=0", "--workers=1")
        shown = re.findall(r"--- example (\d+) of .*\n.*【(.)的回答", done.out)
        assert "".join(name for _, name in shown) == expected, (done.out, done.err)
        assert len({number for number, _ in shown}) == len(expected)


def test_many_records_that_are_too_long_are_said_with_the_cure(tok, tmp_path):
    records = pairs(20) + [{"instruction": f"长{i}", "output": "答" * 20} for i in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    command = ["prepare_sft.py", tmp_path, "--corpora=alpaca:a.jsonl", f"--tokenizer={tok.name}", "--workers=1"]
    said = run(*command, "--max_seq_len=60").out
    assert "10 of 30 records were dropped because they are longer than --max_seq_len=60: a larger one" in said
    assert "were dropped because" not in run(*command, "--max_seq_len=120").out


def test_a_single_exchange_that_is_too_long_is_dropped_not_cut(made, tok, tmp_path):
    records = pairs(20) + pairs(1, "答" * 100)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    done = run("prepare_sft.py", tmp_path, "--corpora=alpaca:a.jsonl", f"--tokenizer={tok.name}", "--max_seq_len=60",
               "--val_fraction=0", "--test_fraction=0", "--workers=1")
    meta = json.loads((tmp_path / "data/sft/meta.json").read_text(encoding="utf-8"))
    assert meta["corpora"]["alpaca:a.jsonl"]["dropped"] == {"longer than max_seq_len": 1}
    assert "1 longer than max_seq_len" in done.out
    assert len(read(tmp_path / "data/sft", "train")) == 20 and read(tmp_path / "data/sft", "val") == []


def test_augmentation_changes_questions_only_and_is_repeatable(made, tok, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, pairs(200))), encoding="utf-8")
    options = ["--corpora=alpaca:a.jsonl", f"--tokenizer={tok.name}", "--augment=0.5", "--augment_delete=0.2",
               "--augment_repeat=0.2", "--val_fraction=0.2"]
    for folder, more in (("a", ["--workers=1"]), ("b", ["--workers=2"]), ("c", ["--workers=1", "--seed=1"])):
        assert run("prepare_sft.py", tmp_path, *options, f"--data_dir={folder}", *more).rc == 0
    a, b, c = ((tmp_path / folder / "train.bin").read_bytes() for folder in "abc")
    assert a == b != c
    plain = {r["output"]: r["instruction"] for r in pairs(200)}
    changed = 0
    for split in "train", "val":
        for ids, _ in read(tmp_path / "a", split):
            question, answer = parse(tok, ids)
            same = plain[answer["content"]] == question["content"]             # answers are never touched
            assert same or split == "train"
            changed += not same
            assert set(question["content"]) <= set(plain[answer["content"]])
    meta = json.loads((tmp_path / "a/meta.json").read_text(encoding="utf-8"))
    assert 0.3 * meta["train"]["examples"] < changed <= meta["train"]["augmented"] < 0.7 * meta["train"]["examples"]
    assert meta["val"]["augmented"] == 0


def test_a_vocabulary_over_16_bits_and_other_mistakes_end_in_one_sentence(tok, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "问", "output": ""}), encoding="utf-8")
    given = ["--corpora=alpaca:a.jsonl", f"--tokenizer={tok.name}", "--workers=1"]
    big = f"import tokenizer; t = tokenizer.load({tok.name!r}); t.vocab_size = 65_537; tokenizer.load = lambda name: t"
    for options, code, said in (
            ([], big, "65,536"), ([], None, "no output"),
            (["--val_fraction=0.9", "--test_fraction=0.2"], None, "below 1"),
            (["--max_seq_len=0"], None, "at least 1"), (["--corpora=alpaca:b.jsonl"], None, "b.jsonl"),
            (["--tokenizer=b.model"], None, "b.model"), (["--augment=2"], None, "between 0 and 1")):
        done = run("prepare_sft.py", tmp_path, *given, *options, code=code)
        assert done.rc == 1 and said in done.err and "Traceback" not in done.err, done.err
        assert not list(tmp_path.glob("data/sft/*"))               # nothing half-written stays


def test_no_torch():
    for script in "tokenizer.py", "train_tokenizer.py", "prepare_sft.py", "corpora.py", "config.py":
        assert "import torch" not in (ROOT / script).read_text(encoding="utf-8")
