"""prepare_sft.py: what is written, its mask and the report; nothing gets lost uncounted."""

import json
import re
import subprocess
import sys
import zlib
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT, run


def pairs(n, answer="好的。"):
    return [
        {"instruction": f"第{i}个问题是什么？", "input": "", "output": answer + str(i)}
        for i in range(n)
    ]


def long_dialogue(i, turns):
    return {
        "messages": [{"role": "system", "content": f"你是{i}号。"}]
        + [
            {"role": role, "content": f"{i}-{t}{'问' if role == 'user' else '答'}"}
            for t in range(turns)
            for role in ("user", "assistant")
        ]
    }


@pytest.fixture(scope="module")
def made(tok, tmp_path_factory):
    """A folder with awkward input, and what two runs with 1 and 2 workers made of it."""
    folder = tmp_path_factory.mktemp("sft")
    alpaca = pairs(900) + pairs(5)
    alpaca += [
        {"instruction": "问题", "input": "", "output": ""},
        {"instruction": "长", "output": "答" * 300},
    ]
    lines = [json.dumps(record, ensure_ascii=False) for record in alpaca] + [
        '{"instruction": "half',
        "17",
    ]
    (folder / "alpaca.jsonl").write_text("\n".join(lines), encoding="utf-8")
    chat = [long_dialogue(i, 1 + i % 12) for i in range(200)]
    chat += [
        {
            "messages": [
                {"role": "user", "content": "第7个问题是什么？"},
                {"role": "assistant", "content": f"另一个回答{i}"},
            ]
        }
        for i in range(20)
    ]  # a question of the other file, with other answers
    (folder / "chat.json").write_text(json.dumps(chat, ensure_ascii=False), encoding="utf-8")
    outs = [
        run(
            "prepare_sft.py",
            folder,
            "--corpora=alpaca:alpaca.jsonl,messages:chat.json",
            f"--tokenizer={tok.name}",
            f"--data_dir=d{workers}",
            f"--workers={workers}",
            "--max_seq_len=60",
            "--max_answer=250",
            "--val_fraction=0.1",
            "--test_fraction=0.1",
            f"--show={2 * (workers == 2)}",
        )
        for workers in (1, 2)
    ]
    for out in outs:
        assert out.rc == 0, out.err
    return folder, alpaca, chat, outs[1].out


def read(folder, split):
    """[(ids, mask)] of a split."""
    bin_, mask, idx = (
        np.fromfile(folder / f"{split}.{kind}", dtype)
        for kind, dtype in (("bin", "<u2"), ("mask", "u1"), ("idx", "<i8"))
    )
    assert len(bin_) == len(mask) == idx[-1]
    assert idx[0] == 0
    assert (np.diff(idx) > 0).all()
    return [(bin_[a:b].tolist(), mask[a:b].tolist()) for a, b in zip(idx[:-1], idx[1:])]


def test_same_bytes_for_any_number_of_workers(made):
    names = sorted(path.name for path in (made[0] / "d1").iterdir())
    assert names == [
        "meta.json",
        "test.jsonl",
        "train.bin",
        "train.idx",
        "train.mask",
        "val.bin",
        "val.idx",
        "val.mask",
    ]
    for name in names:
        assert (made[0] / "d1" / name).read_bytes() == (made[0] / "d2" / name).read_bytes(), name


def parse(tok, ids):
    """The messages of rendered ids, by an own reading of the template."""
    assert ids[0] == 1
    messages = []
    names = {4: "system", 5: "user", 6: "assistant"}
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
    read_back = {
        split: [parse(tok, ids) for ids, _ in read(folder, split)] for split in ("train", "val")
    }
    with open(folder / "test.jsonl", encoding="utf-8") as f:
        return read_back | {"test": [json.loads(line)["messages"] for line in f]}


def test_everything_is_used_once_or_dropped_for_its_reason(made, tok):
    _, alpaca, chat, _ = made
    want = {
        json.dumps(
            [
                {"role": "user", "content": r["instruction"]},
                {"role": "assistant", "content": r["output"]},
            ]
        )
        for r in alpaca[:900]
    }
    kept = Counter()
    for record in chat:
        messages = record["messages"]
        system = record["messages"][:1] * (record["messages"][0]["role"] == "system")
        rest = messages[len(system) :]
        while (
            len(tok.render(system + rest)[0]) > 60
        ):  # whole early exchanges go, the system text stays
            rest = rest[2:]
        kept[json.dumps(system + rest)] += 1
    got = Counter(json.dumps(m) for messages in all_examples(made, tok).values() for m in messages)
    assert got == Counter(want) + kept
    assert (
        sum(len(json.loads(m)) > 3 for m in kept) > 50
    )  # the test means something: several turns do fit


def test_report_adds_up(made, tok):
    folder, alpaca, chat, out = made
    meta = json.loads((folder / "d1/meta.json").read_text(encoding="utf-8"))
    first = meta["corpora"]["alpaca:alpaca.jsonl"]
    second = meta["corpora"]["messages:chat.json"]
    assert first["records"] == len(alpaca) + 2
    assert first["examples"] == 900
    assert sorted(first["dropped"].values()) == [1, 1, 1, 1, 5]
    assert first["dropped"]["duplicate"] == 5
    assert first["dropped"]["answer too long"] == 1
    assert second["records"] == second["examples"] == len(chat) == 220
    assert not second["dropped"]
    assert (
        second["shortened"]
        == sum(len(tok.render(record["messages"])[0]) > 60 for record in chat)
        > 50
    )
    for split in "train", "val":
        examples = read(folder / "d1", split)
        assert meta[split]["examples"] == len(examples) > 10
        assert meta[split]["tokens"] == sum(len(ids) for ids, _ in examples)
        assert meta[split]["targets"] == sum(sum(mask) for _, mask in examples)
        assert meta[split]["longest"] == max(len(ids) for ids, _ in examples) <= 60
    for name in "examples", "tokens", "targets":
        assert first[name] + second[name] == sum(
            meta[split][name] for split in ("train", "val", "test")
        )
    for name, crc in meta["crc32"].items():
        assert crc == zlib.crc32((folder / "d1" / name).read_bytes())
    assert len(meta["crc32"]) == 7
    assert meta["pairs"] is False
    assert meta["dtype"] == "uint16"
    assert meta["tokenizer_sha256"] == tok.sha256
    assert meta["format"] == 1
    assert meta["vocab_size"] == 400
    table = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    columns = table["records"]  # the head of the table begins with it
    assert table["train"] == [f"{meta['train'][column]:,}" for column in columns]
    assert table["messages:chat.json"] == [
        f"{second[column]:,}" for column in ("records", *columns)
    ]
    assert "5 dropped: duplicate (alpaca:alpaca.jsonl)" in out
    assert all(
        f"{column}: " in out for column in ("targets", "shortened", "augmented")
    )  # what they mean
    assert "dropped as longer" not in out


def test_mask_is_every_answer_with_its_end_and_nothing_else(made, tok):
    for ids, mask in read(made[0] / "d1", "train"):
        role = None
        want = []
        for id in ids:
            header = id in (4, 5, 6)
            role = id if header else role
            want.append(int(role == 6 and not header))
        assert mask == want
        assert sum(mask) >= 2
        assert mask[ids.index(6) + 1] == 1
        assert mask[-1] == 1  # the first answer token, and the end of the turn


def test_a_question_stands_on_one_side_only(made, tok):
    sides = {
        split: {
            next(m["content"] for m in messages if m["role"] == "user") for messages in examples
        }
        for split, examples in all_examples(made, tok).items()
    }
    assert not sides["train"] & sides["val"]
    assert not sides["train"] & sides["test"]
    assert not sides["val"] & sides["test"]
    assert all(len(side) > 20 for side in sides.values())


def test_show_marks_exactly_the_answers(made, tok):
    shown = re.split(
        r"--- an example of (\d+) tokens, of which (\d+) count in the loss.*\n", made[3]
    )[1:]
    examples = {tuple(ids): mask for ids, mask in read(made[0] / "d2", "train")}
    assert len(shown) == 3 * 4  # two of each corpus
    for n, n_counted, text in zip(shown[::3], shown[1::3], shown[2::3]):
        text = text.split("\n\n")[0].strip()
        contents = re.findall(r"<\|(\w+)\|>【?(.*?)<\|end\|>", text, re.S)
        messages = [{"role": role, "content": content} for role, content in contents]
        ids, mask = tok.render(messages)
        assert examples[tuple(ids)] == mask
        assert (len(ids), sum(mask)) == (int(n), int(n_counted))
        assert re.findall(r"【(.*?)】", text, re.S) == [
            m["content"] + "<|end|>" for m in messages if m["role"] == "assistant"
        ]
        assert re.sub(r"【|】", "", text) == "<bos>" + "".join(
            f"<|{m['role']}|>{m['content']}<|end|>" for m in messages
        )


def test_show_shows_the_first_of_every_corpus(tok, tmp_path):
    for name, n in ("a", 20), ("b", 3), ("c", 1):
        records = pairs(n, f"{name}的回答")
        for record in records:
            record["instruction"] = name + record["instruction"]
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(map(json.dumps, records)), encoding="utf-8"
        )
    for show, expected in (0, ""), (1, "abc"), (4, "aaaabbbc"):
        done = run(
            "prepare_sft.py",
            tmp_path,
            "--corpora=alpaca:a.jsonl,alpaca:b.jsonl,alpaca:c.jsonl",
            f"--show={show}",
            f"--tokenizer={tok.name}",
            "--val_fraction=0",
            "--test_fraction=0",
            "--workers=1",
        )
        shown = re.findall(r"--- an example.*\n.*【(.)的回答(\d)", done.out)
        assert "".join(name for name, _ in shown) == expected, (done.out, done.err)
        assert [int(i) for name, i in shown if name == "a"] == list(range(expected.count("a")))


def test_where_most_dialogues_share_a_question_whole_dialogues_are_split(tok, tmp_path):
    """As in data sets where a role or a task is given first, and the same in every record."""
    rows = [[("扮演医生。", "好的。"), (f"第{i}个问题", f"答{i}")] for i in range(300)]
    rows += [[(f"另外第{i}个问题", "答")] for i in range(200)]
    with open(tmp_path / "shared.jsonl", "w", encoding="utf-8") as f:
        for turns in rows:
            messages = [
                {"role": role, "content": content}
                for turn in turns
                for role, content in zip(("user", "assistant"), turn)
            ]
            f.write(json.dumps({"messages": messages}) + "\n")
    other = pairs(50) + [{**record, "output": "另一个回答"} for record in pairs(5)]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, other)), encoding="utf-8")
    done = run(
        "prepare_sft.py",
        tmp_path,
        "--corpora=messages:shared.jsonl,alpaca:other.jsonl",
        f"--tokenizer={tok.name}",
        "--val_fraction=0.2",
        "--test_fraction=0.2",
        "--workers=2",
    )
    assert done.rc == 0
    assert re.findall(r"(.*): most dialogues begin with the same", done.out) == [
        "messages:shared.jsonl"
    ]
    begin = tok.encode("扮演医生。")
    n = {
        split: sum(
            ids[2 : 2 + len(begin)] == begin for ids, _ in read(tmp_path / "data/sft", split)
        )
        for split in ("train", "val")
    }
    assert n["train"] > 120
    assert n["val"] > 30
    assert 300 - sum(n.values()) > 30


def test_many_records_that_are_too_long_are_said_with_the_cure(tok, tmp_path):
    records = pairs(20) + [{"instruction": f"长{i}", "output": "答" * 20} for i in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    command = [
        "prepare_sft.py",
        tmp_path,
        "--corpora=alpaca:a.jsonl",
        f"--tokenizer={tok.name}",
        "--workers=1",
    ]
    said = run(*command, "--max_seq_len=60").out
    assert "dropped as longer than --max_seq_len=60: 10 of 30 records. A larger one" in said
    assert "dropped as longer" not in run(*command, "--max_seq_len=120").out


def test_a_single_exchange_that_is_too_long_is_dropped_not_cut(made, tok, tmp_path):
    records = pairs(20) + pairs(1, "答" * 100)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    done = run(
        "prepare_sft.py",
        tmp_path,
        "--corpora=alpaca:a.jsonl",
        f"--tokenizer={tok.name}",
        "--max_seq_len=60",
        "--val_fraction=0",
        "--test_fraction=0",
        "--workers=1",
    )
    meta = json.loads((tmp_path / "data/sft/meta.json").read_text(encoding="utf-8"))
    assert meta["corpora"]["alpaca:a.jsonl"]["dropped"] == {"longer than max_seq_len": 1}
    assert "1 dropped: longer than max_seq_len" in done.out
    assert len(read(tmp_path / "data/sft", "train")) == 20
    assert read(tmp_path / "data/sft", "val") == []


def test_the_limits_are_inclusive_and_each_has_its_reason(tok, tmp_path):
    records = [
        {
            "messages": [
                {"role": "user", "content": "问" * n},
                {"role": "assistant", "content": "答" * m},
            ]
        }
        for n, m in ((2, 3), (9, 3), (2, 8), (1, 3), (10, 3), (2, 2), (2, 9))
    ]
    records.append(
        {"messages": [*records[0]["messages"][:1], {**records[1]["messages"][1], "weight": 0}]}
    )
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    longest = max(len(tok.render(record["messages"])[0]) for record in records[:3])
    for more, reasons in (0, {}), (-1, {"longer than max_seq_len": 1}):
        run(
            "prepare_sft.py",
            tmp_path,
            "--corpora=messages:a.jsonl",
            f"--tokenizer={tok.name}",
            "--min_prompt=2",
            "--workers=1",
            "--max_prompt=9",
            "--min_answer=3",
            "--max_answer=8",
            "--val_fraction=0",
            "--test_fraction=0",
            f"--max_seq_len={longest + more}",
        )
        meta = json.loads((tmp_path / "data/sft/meta.json").read_text(encoding="utf-8"))
        assert meta["corpora"]["messages:a.jsonl"]["dropped"] == {
            "prompt too short": 1,
            "prompt too long": 1,
            "answer too short": 1,
            "answer too long": 1,
            "no target": 1,
            **reasons,
        }


def test_augmentation_changes_questions_only_and_is_repeatable(made, tok, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, pairs(200))), encoding="utf-8")
    options = [
        "--corpora=alpaca:a.jsonl",
        f"--tokenizer={tok.name}",
        "--augment=0.5",
        "--augment_delete=0.2",
        "--augment_repeat=0.2",
        "--val_fraction=0.2",
    ]
    for folder, more in (
        ("a", ["--workers=1"]),
        ("b", ["--workers=2"]),
        ("c", ["--workers=1", "--seed=1"]),
    ):
        assert run("prepare_sft.py", tmp_path, *options, f"--data_dir={folder}", *more).rc == 0
    a, b, c = ((tmp_path / folder / "train.bin").read_bytes() for folder in "abc")
    assert a == b != c
    plain = {r["output"]: r["instruction"] for r in pairs(200)}
    changed = longer = shorter = 0
    for split in "train", "val":
        for ids, _ in read(tmp_path / "a", split):
            question, answer = parse(tok, ids)
            same = plain[answer["content"]] == question["content"]  # answers are never touched
            assert same or split == "train"
            changed += not same
            assert set(question["content"]) <= set(plain[answer["content"]])
            longer += len(question["content"]) > len(plain[answer["content"]])
            shorter += len(question["content"]) < len(plain[answer["content"]])
    meta = json.loads((tmp_path / "a/meta.json").read_text(encoding="utf-8"))
    assert (
        0.3 * meta["train"]["examples"]
        < changed
        <= meta["train"]["augmented"]
        < 0.7 * meta["train"]["examples"]
    )
    assert meta["val"]["augmented"] == 0
    assert longer > 10
    assert shorter > 10


def test_pairs_are_two_examples_with_the_same_prompt_in_one_split(tok, tmp_path):
    def exchange(i, turns):
        return [
            {"role": role, "content": f"{i}-{t}{role[0]}"}
            for t in range(turns)
            for role in ("user", "assistant")
        ][:-1]

    records = [
        {
            "prompt": exchange(i, 1 + i % 9),
            "chosen": f"好{i}",
            "rejected": "坏" * (1 + i % 5) + str(i),
        }
        for i in range(300)
    ]
    bad = [
        {**records[0], "rejected": "好0"},
        {**records[1], "chosen": ""},
        records[2],
        {**records[3], "rejected": "坏" * 60},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records + bad)), encoding="utf-8")
    for workers in 1, 2:
        done = run(
            "prepare_sft.py",
            tmp_path,
            "--corpora=preference:a.jsonl",
            f"--tokenizer={tok.name}",
            "--max_seq_len=60",
            "--val_fraction=0.2",
            "--test_fraction=0.1",
            f"--workers={workers}",
            f"--data_dir=d{workers}",
            "--augment=0.2",
        )
        assert done.rc == 0, done.err
    for path in (tmp_path / "d1").iterdir():
        assert path.read_bytes() == (tmp_path / "d2" / path.name).read_bytes()
    meta = json.loads((tmp_path / "d1/meta.json").read_text(encoding="utf-8"))
    row = meta["corpora"]["preference:a.jsonl"]
    seen = Counter()
    assert meta["pairs"] is True
    assert row["records"] == 304
    assert row["examples"] == 600
    assert row["dropped"] == {
        "both sides are equal": 1,
        "no chosen": 1,
        "duplicate": 1,
        "longer than max_seq_len": 1,
    }
    n_shortened = n_noisy = 0
    for split in "train", "val":
        examples = read(tmp_path / "d1", split)
        assert len(examples) == meta[split]["examples"] > 50
        for sides in zip(examples[::2], examples[1::2]):
            (*prompt, chosen), (*other_prompt, rejected) = [parse(tok, ids) for ids, _ in sides]
            number = int(chosen["content"][1:])
            whole = records[number]["prompt"]
            assert prompt == other_prompt
            assert chosen["content"] == records[number]["chosen"]
            assert rejected["content"] == records[number]["rejected"]
            for (ids, mask), answer in zip(sides, (chosen, rejected)):  # the last answer only
                n = len(tok.encode(answer["content"])) + 1
                assert mask == [0] * (len(ids) - n) + [1] * n
            kept = whole[len(whole) - len(prompt) :]
            assert (
                split == "train"
                and [m["role"] for m in prompt] == [m["role"] for m in kept]
                or prompt == kept
            )
            if len(kept) < len(whole):  # one exchange more does not fit
                n_shortened += 1
                longer = whole[len(whole) - len(prompt) - 2 :]
                assert max(len(tok.render(longer + [side])[0]) for side in (chosen, rejected)) > 60
            n_noisy += prompt != kept
            seen[split, number] += 1
    with open(tmp_path / "d1/test.jsonl", encoding="utf-8") as f:
        for line in map(json.loads, f):
            number = int(line["messages"][-1]["content"][1:])
            assert line["rejected"] == records[number]["rejected"]
            seen["test", number] += 1
    assert sorted(number for _, number in seen) == list(range(300))
    assert set(seen.values()) == {1}
    assert n_shortened > 50
    assert 0.1 * meta["train"]["examples"] / 2 < n_noisy <= row["augmented"]


@pytest.mark.parametrize(
    "option, sentence",
    [
        ("--corpora=alpaca:a.jsonl,preference:a.jsonl", "two runs"),
        ("", "no dialogue is left"),
        ("--val_fraction=0.5 --test_fraction=0.5", "below 1"),
        ("--max_seq_len=0", "at least 1"),
        ("--corpora=alpaca:b.jsonl", "b.jsonl"),
        ("--tokenizer=b.model", "b.model"),
        ("--augment=2", "between 0 and 1"),
        ("--augment_delete=0.6 --augment_repeat=0.6", "not be over 1"),
        ("--min_answer=0", "at least 1"),
        ("--corpora=alpaca:few.jsonl", "none is held out for validation; try --val_fraction=0.5"),
    ],
)
def test_mistakes_end_in_one_sentence(tok, tmp_path, option, sentence):
    (tmp_path / "few.jsonl").write_text("\n".join(map(json.dumps, pairs(5))), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"instruction": "问", "output": ""}), encoding="utf-8"
    )
    done = run(
        "prepare_sft.py",
        tmp_path,
        "--corpora=alpaca:a.jsonl",
        f"--tokenizer={tok.name}",
        "--workers=1",
        *option.split(),
    )
    assert (
        done.rc == 1
        and sentence in done.err
        and "Traceback" not in done.err
        and done.err.count("\n") == 1
    ), done.err
    assert not list(tmp_path.glob("data/sft/*"))  # nothing half-written stays


def test_preparing_loads_no_torch():
    code = (
        "import prepare_pretrain, prepare_sft, sys, train_tokenizer\n"
        "print([name for name in sys.modules if name == 'torch'])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        ).stdout
        == "[]\n"
    )
