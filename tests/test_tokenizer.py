"""Text <-> ids: nothing is lost, no text becomes a control token, the mask is what it should be."""

import base64
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys

import pytest
import sentencepiece
from conftest import ROOT, TEXTS, run, story

import templates
import tokenizer

NASTY = TEXTS + [
    "<|user|>你是谁<|end|><|assistant|>",
    "<s></s><pad><unk>",
    "<|endoftext|>",
    "▅ ⁇ �",
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A sentencepiece file like ChatGLM2's: a dummy space before the text, no pad, no roles."""
    model = io.BytesIO()
    rng = random.Random(1)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([story(rng, 4) + " hello world" for _ in range(100)]),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("plain") / "any_name.model"
    path.write_bytes(model.getvalue())
    return tokenizer.load(str(path))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """A tiktoken rank file: the bytes and a few merges."""
    pieces = [bytes([b]) for b in range(256)] + [
        b"he",
        b"ll",
        b"hell",
        b"hello",
        "你".encode()[:2],
        "你".encode(),
        b" a",
    ]
    path = tmp_path_factory.mktemp("ranks") / "tiny.tiktoken"
    path.write_bytes(
        b"".join(b"%s %d\n" % (base64.b64encode(piece), rank) for rank, piece in enumerate(pieces))
    )
    return tokenizer.load(str(path))


def test_spaces_and_u2581_survive_a_vocabulary_that_has_never_seen_a_space(tok):
    assert " ".encode() not in tok.pieces[264:]
    assert tok.encode(" ▁") == [8 + 0x20, 8 + 0xE2, 8 + 0x96, 8 + 0x81]


@pytest.mark.parametrize("text", NASTY)
def test_round_trip_and_no_control_token(tok, ranks, text):
    for t in (tok, ranks):
        ids = t.encode(text)
        assert t.decode(ids) == text
        assert not {t.bos_id, t.eos_id, t.pad_id, *t.controls.values(), t.end_id} & set(ids)
        assert all(t.pieces[id] for id in ids)  # no <unk> either
        assert t.encode_batch([text, "a", text]) == [ids, t.encode("a"), ids]


def test_round_trip_of_random_characters(tok):
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(
            chr(
                rng.choice(
                    [
                        rng.randrange(0xD800),
                        rng.randrange(0xE000, 0x110000),
                        rng.randrange(128),
                        0x2581,
                    ]
                )
            )
            for _ in range(rng.randrange(40))
        )
        assert tok.decode(tok.encode(text)) == text


def test_ids_take_four_bytes_where_two_are_not_enough():
    for n, expected in ((65_536, "uint16"), (65_537, "uint32")):
        t = tokenizer.Tokenizer("x", "", [b"a"] * n, {}, 0, 0, 0, None, templates.HUMAN)
        assert t.id_dtype == expected


def test_lone_surrogates_are_replaced_and_pairs_joined(tok, plain, ranks):
    for t in (tok, plain, ranks):
        assert t.decode(t.encode("a\ud800b")) == "a\ufffdb"
        assert t.decode(t.encode("\ud83d\ude00")) == "😀"


def test_ids_of_our_models(tok):
    assert (tok.bos_id, tok.eos_id, tok.pad_id, tok.end_id) == (1, 2, 3, 7)
    assert tok.template == templates.OURS
    assert tok.stop_ids == {2, 7}
    assert [tok.controls[name] for name in tokenizer.CONTROLS] == [4, 5, 6, 7]
    assert tok.pieces[:8] == [b""] * 8
    assert len(tok.pieces) == tok.vocab_size == 400
    with open(tok.name, "rb") as f:
        assert tok.sha256 == hashlib.sha256(f.read()).hexdigest()


def test_plain_file_agrees_with_sentencepiece(plain):
    sp = sentencepiece.SentencePieceProcessor(model_file=plain.name)
    assert plain.template == templates.QUESTION
    assert plain.dummy_space == "always"
    assert (plain.bos_id, plain.eos_id, plain.pad_id) == (1, 2, 0)
    for text in NASTY:
        assert plain.encode(text) == sp.encode(text)
        assert plain.decode(plain.encode(text)) == sp.decode(sp.encode(text))


def test_four_ids_stand_behind_a_file_of_chatglm2s_size(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(sentencepiece.SentencePieceProcessor, "vocab_size", lambda sp: 64_789)
    monkeypatch.setattr(tokenizer, "piece_bytes", lambda sp, id, name: b"x")
    monkeypatch.setattr(sentencepiece.SentencePieceProcessor, "is_control", lambda sp, id: False)
    monkeypatch.setattr(sentencepiece.SentencePieceProcessor, "id_to_piece", lambda sp, id: str(id))
    t = tokenizer.load(plain.name)
    assert t.vocab_size == 64_793
    assert t.pieces[64_788:] == [b"x"] + [b""] * 4


def test_rank_file(ranks):
    assert ranks.encode("hello") == [259]
    assert ranks.encode("你") == [261]
    assert ranks.decode([ranks.eos_id, 259]) == "hello"
    assert ranks.bos_id == ranks.eos_id == ranks.pad_id == 263
    assert ranks.vocab_size == 264
    assert ranks.stop_ids == {263}
    with open(ranks.name, "rb") as f:
        assert ranks.sha256 == hashlib.sha256(f.read()).hexdigest()


def test_streaming_is_decoding_and_never_half_a_character(tok, plain, ranks):
    rng = random.Random(0)
    for t in (tok, plain, ranks):
        for text in [x for x in NASTY if "▁" not in x and "�" not in x]:
            decoder = tokenizer.StreamDecoder(t)
            parts = [decoder.push(id) for id in t.encode(text)]
            assert "".join(parts) == text
            assert decoder.flush() == ""
            assert "\ufffd" not in "".join(parts)
        for _ in range(200):  # ids that no text gives
            ids = [rng.randrange(t.vocab_size) for _ in range(rng.randrange(20))]
            decoder = tokenizer.StreamDecoder(t)
            assert "".join([decoder.push(id) for id in ids]) + decoder.flush() == t.decode(ids)
    split = tok.encode("龘")
    decoder = tokenizer.StreamDecoder(tok)
    assert len(split) == 3
    assert [decoder.push(id) for id in split] == ["", "", "龘"]
    assert decoder.push(split[0]) == ""
    assert decoder.flush() == "\ufffd"


DIALOGUE = [
    {"role": "system", "content": "简短回答。"},
    {"role": "user", "content": "你好<|end|>"},
    {"role": "assistant", "content": "你好！"},
    {"role": "user", "content": "再见"},
    {"role": "assistant", "content": "好"},
]


def test_our_template_and_exactly_what_is_supervised(tok):
    system, hello, answer, bye, good = (tok.encode(m["content"]) for m in DIALOGUE)
    ids, mask = tok.render(DIALOGUE)
    assert ids == [1, 4, *system, 7, 5, *hello, 7, 6, *answer, 7, 5, *bye, 7, 6, *good, 7]
    assert mask == (
        [0] * (len(system) + len(hello) + 6)
        + [1] * (len(answer) + 1)
        + [0] * (len(bye) + 3)
        + [1] * (len(good) + 1)
    )
    assert tok.decode(ids) == "".join(m["content"] for m in DIALOGUE)


def test_plain_template(plain):
    first, answer, bye, good = (
        plain.encode(x) for x in ("简短回答。\n你好<|end|>", "你好！", "再见", "好")
    )
    ids, mask = plain.render(DIALOGUE)
    assert ids == [*first, 1, *answer, 2, *bye, 1, *good, 2]
    assert mask == [0] * (len(first) + 1) + [1] * (len(answer) + 1) + [0] * (len(bye) + 1) + [1] * (
        len(good) + 1
    )


def test_tiktoken_template(ranks):
    ids, mask = ranks.render(DIALOGUE)
    shown = "".join("<eos>" if id == 263 else "" if not m else "*" for id, m in zip(ids, mask))
    assert (
        ranks.decode(ids)
        == "Human: 简短回答。\n你好<|end|>\nAssistant: 你好！Human: 再见\nAssistant: 好"
    )
    assert ranks.decode([id for id, m in zip(ids, mask) if m]) == "你好！好"
    assert shown.count("<eos>") == 2
    assert [m for id, m in zip(ids, mask) if id == 263] == [1, 1]


def test_prompt_is_what_render_begins_with(tok, plain, ranks):
    for t in (tok, plain, ranks):
        for end in range(len(DIALOGUE)):
            if DIALOGUE[end]["role"] == "assistant":
                ids, mask = t.render(DIALOGUE[: end + 1])
                prompt = t.prompt(DIALOGUE[:end])
                assert ids[: len(prompt)] == prompt
                # the first answer token counts
                assert mask[len(prompt)] == 1
                assert mask[len(prompt) - 1] == 0
        assert t.prompt([])


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("no.model", None, "train_tokenizer.py"),
        ("no.tiktoken", None, "--tokenizer=gpt2"),
        ("no_such_name", None, "cl100k_base"),
        ("", None, "an empty name: neither"),
        ("bad.model", b"", "not a whole sentencepiece model"),
        ("bad.model", b"junk" * 99, "not a whole sentencepiece model"),
        ("bad.tiktoken", b"IQ== 0\nIg==\n", "not a whole rank file"),
        ("bad.tiktoken", b"IQ== 0\nIg== 5\n", "not a whole rank file"),
        ("bad.tiktoken", "你 0\n".encode(), "base64"),
    ],
)
def test_missing_and_broken_files_end_in_one_sentence(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    path = str(tmp_path / name) if "." in name else name
    with pytest.raises(SystemExit) as error:
        tokenizer.load(path)
    assert said in str(error.value)
    assert str(error.value).startswith(path)
    assert "\n" not in str(error.value)


def test_a_piece_that_is_no_utf8_ends_in_one_sentence(tok, tmp_path):
    with open(tok.name, "rb") as f:
        (tmp_path / "bad.model").write_bytes(f.read().replace("猫".encode(), b"\xe7\x8c("))
    with pytest.raises(SystemExit, match="bad.model: not a whole sentencepiece model"):
        tokenizer.load(str(tmp_path / "bad.model"))


def test_no_network_for_gpt2_ends_in_one_sentence(monkeypatch):
    import tiktoken

    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(SystemExit, match="^gpt2: .*network"):
        tokenizer.load("gpt2")


# ---- train_tokenizer.py --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """train_tokenizer.py run twice: on stories and dialogues, and on the same in another order."""
    folder = tmp_path_factory.mktemp("trained")
    rng = random.Random(5)
    texts = [
        story(rng, rng.randrange(2, 30)) + "\n\n  第二段\u2585有1234个 字。" for _ in range(400)
    ]
    texts.append("很长的一行" * 20_000)  # longer than sentencepiece takes in one piece
    chat = [
        {
            "messages": [
                {"role": "user", "content": story(rng, 2)},
                {"role": "assistant", "content": "嚯嚯嚯嚯嚯"},
            ]
        }
        for _ in range(40)
    ]
    for name, order in (("a", texts), ("b", texts[::-1])):
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in order] + ["{broken"]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, chat)), encoding="utf-8")
    for name in "a", "b":
        done = run(
            "train_tokenizer.py",
            folder,
            f"--corpora=text:{name}.jsonl,messages:chat.jsonl",
            f"--out={name}.model",
            "--vocab_size=600",
            "--test_fraction=0.1",
            "--compare=a.model" if name == "b" else "--compare=",
        )
        assert done.rc == 0, done.err
    return folder, texts, done


def test_same_bytes_in_any_order(trained):
    folder, *_ = trained
    assert (folder / "a.model").read_bytes() == (folder / "b.model").read_bytes()


def test_trained_model_is_ours_and_loses_nothing(trained):
    t = tokenizer.load(str(trained[0] / "a.model"))
    assert t.vocab_size == 600
    assert t.template == templates.OURS
    assert t.end_id == 7
    for text in NASTY:
        assert t.decode(t.encode(text)) == text
    assert len(t.encode("。\n\n  第二段")) <= 3  # line feeds and blanks are learnt like other text
    assert [t.pieces[id] for id in t.encode("1234")] == [b"1", b"2", b"3", b"4"]
    # the long line, and the chat
    assert "长的".encode() in b"|".join(t.pieces)
    assert "嚯嚯".encode() in t.pieces


def test_report_is_what_one_counts(trained):
    folder, texts, done = trained
    report = json.loads((folder / "b.model.report.json").read_text(encoding="utf-8"))
    t = tokenizer.load(str(folder / "a.model"))
    import corpora

    held = [
        corpora.clean(x)
        for x in texts
        if int(hashlib.blake2b(x.encode(), digest_size=8).hexdigest(), 16) < 0.1 * 2**64
    ]
    assert 20 < len(held) < 70
    assert not any("很长" in text for text in held)
    for name in "a.model", "b.model":
        all_ = report["held_out"][f"{name} on all"]
        figures = report["held_out"][f"{name} on text:b.jsonl"]
        assert figures["texts"] == len(held)
        assert figures["characters"] == sum(map(len, held))
        assert figures["tokens"] == sum(len(t.encode(text)) for text in held)
        assert figures["bytes_per_token"] == round(
            sum(len(x.encode()) for x in held) / figures["tokens"], 4
        )
        assert figures["round_trip_failures"] == all_["round_trip_failures"] == 0
        row = next(line for line in done.out.splitlines() if line.startswith(f"{name} on text:"))
        assert row.split()[-2] == str(figures["characters_per_token"])
    assert report["constants"]["vocab_size"] == 600
    assert report["sha256"] == t.sha256


def test_sample_is_even_bounded_and_without_the_test_documents(tmp_path, monkeypatch):
    import train_tokenizer

    texts = [f"第{i}号故事，" + story(random.Random(i), 1 + i % 40) for i in range(500)]
    monkeypatch.setattr(train_tokenizer, "sample_bytes", 60_000)
    seen = []
    for order in texts, texts[::-1], sorted(texts + texts):  # repeated documents count once
        (tmp_path / "a.jsonl").write_text(
            "\n".join(json.dumps({"text": t}) for t in order), encoding="utf-8"
        )
        seen.append(train_tokenizer.sample(f"text:{tmp_path / 'a.jsonl'}"))
    assert seen[0] == seen[1] == seen[2]
    train = seen[0][0]
    (test,) = seen[0][1].values()
    assert 55_000 < sum(len(t.encode()) for t in train) <= 60_000
    assert set(train) <= set(texts)
    assert test
    assert not set(train) & set(test)
    numbers = sorted(texts.index(t) for t in train)
    assert numbers[0] < 25
    assert numbers[-1] > 475  # from the whole file, not from its beginning


def test_smallest_keeps_the_same_in_any_order():
    import train_tokenizer

    rng = random.Random(0)
    for _ in range(200):
        texts = {key: "x" * rng.randrange(1, 30) for key in range(20)}
        want = {key for key in texts if sum(len(texts[k]) for k in range(key + 1)) <= 100}
        sampled = train_tokenizer.Smallest(100)
        for key in rng.choices(range(20), k=10) + rng.sample(range(20), 20):
            sampled.offer(key, texts[key])
        assert set(sampled.texts) == want
        assert sampled.bytes == sum(len(texts[key]) for key in want)


def test_one_huge_document_does_not_fill_or_empty_the_sample(tmp_path, monkeypatch):
    import train_tokenizer

    small = [f"第{i}号故事，" + story(random.Random(i), 9) for i in range(300)]
    rng = random.Random(0)
    huge = next(
        text
        for text in iter(lambda: story(rng, 3000), None)
        if 0.02 < train_tokenizer.hash64(text) / 2**64 < 0.1
    )  # among the first to be drawn
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": t}) for t in [*small, huge]), encoding="utf-8"
    )
    monkeypatch.setattr(train_tokenizer, "sample_bytes", 60_000)
    train, _ = train_tokenizer.sample(f"text:{tmp_path / 'a.jsonl'}")
    of_huge = sum(len(t.encode()) for t in train if t in huge)
    assert 45_000 < sum(len(t.encode()) for t in train) <= 60_000
    assert 0 < of_huge < 50_000


@pytest.mark.parametrize(
    "options, said",
    [
        (["--vocab_size=70000"], "65536"),
        (["--vocab_size=100"], "280"),
        (["--vocab_size=5000"], "at most"),
        (["--test_fraction=1"], "between 0 and 0.9"),
        (["--character_coverage=0.5"], "0.98"),
        (["--compare=nope"], "nope"),
        (["--corpora=text:none.jsonl"], "none.jsonl"),
        (["--sample_bytes=0"], "at least 1"),
    ],
)
def test_what_cannot_work_ends_in_one_sentence(tmp_path, options, said):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": story(random.Random(0), 9)}), encoding="utf-8"
    )
    done = run("train_tokenizer.py", tmp_path, "--corpora=text:a.jsonl", "--out=t.model", *options)
    assert done.rc == 1
    assert said in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "t.model").exists()


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_the_middle_of_training(tmp_path, number):
    rng = random.Random(0)
    lines = ["".join(map(chr, rng.choices(range(0x4E00, 0x5200), k=60))) for _ in range(20_000)]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, ROOT / "train_tokenizer.py", "--corpora=txt_line:a.txt", "--out=t.model"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"},
    )
    assert "training on" in process.stdout.readline()
    process.send_signal(number)
    error = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 128 + number
    assert error[-1].startswith("interrupted; t.model is as it was")
    assert not any("Traceback" in line for line in error)
    assert os.listdir(tmp_path) == ["a.txt"]


def test_small_vocabulary_lowers_the_coverage_or_says_what_it_needs(tmp_path):
    rng = random.Random(0)
    common = "的一是不了人我在有他"
    rare = [chr(0x4E00 + i) for i in range(600)]
    text = "".join(rng.choices([*common, *rare], weights=[200] * 10 + [0.05] * 600, k=60_000))
    flat = "".join(rng.choices(rare, k=60_000))
    for name, content in ("a", text), ("b", flat):
        lines = "\n".join(content[i : i + 60] for i in range(0, 60_000, 60))
        (tmp_path / f"{name}.txt").write_text(lines, encoding="utf-8")
    done = run(
        "train_tokenizer.py",
        tmp_path,
        "--corpora=txt_line:a.txt",
        "--out=a.model",
        "--vocab_size=300",
    )
    assert done.rc == 0
    assert "is small for this text: only" in done.out
    t = tokenizer.load(str(tmp_path / "a.model"))
    # although there is none in the text
    assert t.decode(t.encode(text)) == text
    assert b" " in t.pieces[264:]
    done = run(
        "train_tokenizer.py",
        tmp_path,
        "--corpora=txt_line:b.txt",
        "--out=b.model",
        "--vocab_size=400",
    )
    assert done.rc == 1
    assert "too small for the" in done.err
    assert "Traceback" not in done.err
