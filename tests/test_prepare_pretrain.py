"""The pretraining bins: every document once, whole, in a seeded order, by any number of workers."""
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from conftest import run

import corpora
import prepare_pretrain
import tokenizer

ROOT = Path(prepare_pretrain.__file__).parent
SCRIPT = str(ROOT / "prepare_pretrain.py")
WORDS = (
    "春天 小河 柳树 燕子 孩子 老师 学校 故事 月亮 太阳 山坡 花园 朋友 快乐 跑步 唱歌 读书 写字 "
    "回家 早晨 晚上 森林 兔子 狐狸 苹果 面包 医生 城市 火车 飞机 大海 贝壳 雪花 冬天 老人 村庄 "
    "水井 石头 风筝 桥梁 灯笼 节日 礼物 歌声 梦想 勇气 智慧").split()
CONTROLS = "忽略<|end|><|user|></s>，这里只是普通的文字"


def story(rng, n_words):
    marks = "，。的了和在有，是。"
    return "".join(rng.choice(WORDS) + rng.choice(marks) for _ in range(n_words))


def hanzi(rng, n, end=0x5E00):
    """n random Chinese characters below a code point."""
    return "".join(chr(rng.randrange(0x4E00, end)) for _ in range(n))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny real sentencepiece model with our control tokens."""
    prefix = str(tmp_path_factory.mktemp("tokenizer") / "t")
    rng = random.Random(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([story(rng, 30) for _ in range(500)]),
        model_prefix=prefix,
        model_type="bpe",
        vocab_size=700,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=3,
        minloglevel=2,
        control_symbols=["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"])
    return prefix + ".model"


def bytes_of(folder):
    """{name: content} of the files in a folder."""
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def write(path, texts):
    with open(path, "w", encoding="utf-8") as f:
        for text in texts:
            f.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return str(path)


def prepare(corpora, model, out, *more):
    """Run the script as a user does: (exit status, output)."""
    command = [
        sys.executable, SCRIPT, f"--corpora={corpora}", f"--tokenizer={model}",
        f"--data_dir={out}", "--workers=1", *more]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    return done.returncode, done.stdout + done.stderr


def prepared(corpora, model, out, *more):
    """Run the script, which must succeed: its output."""
    code, said = prepare(corpora, model, out, *more)
    assert code == 0, said
    return said


def read_meta(folder):
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def read(out, tok):
    """(meta, {split: [text of each document]}) as a reader of the format sees them."""
    meta = read_meta(out)
    splits = {}
    for split in "train", "val":
        ids = np.fromfile(out / f"{split}.bin", meta["dtype"])
        assert meta["crc32"][f"{split}.bin"] == zlib.crc32(ids)
        assert len(ids) == meta[split]["tokens"]
        assert ids[-1] == tok.eos_id
        ends = np.flatnonzero(ids == tok.eos_id)
        parts = np.split(ids, ends[:-1] + 1)
        found = [tok.decode(part.tolist()) for part in parts]
        splits[split] = found
        assert meta[split]["documents"] == len(found)
        assert meta[split]["bytes"] == len("".join(found).encode("utf-8"))
    return meta, splits


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(1)
    return [story(rng, rng.choice([20, 60, 400])) + f"编号{i}" for i in range(900)]


def test_every_document_is_there_whole_and_once(tmp_path, model, texts):
    """Complaint 3: the first file only, the last batch dropped, long texts cut."""
    long = story(random.Random(2), 600_000)  # over a million characters: in pieces
    a = write(tmp_path / "a.jsonl", texts[:500])
    b = write(tmp_path / "b.jsonl", texts[500:] + [long])
    prepared(f"text:{a},text:{b}", model, tmp_path / "out", "--val_fraction=0.1")
    tok = tokenizer.load(model)
    meta, splits = read(tmp_path / "out", tok)
    everything = splits["train"] + splits["val"]
    expected = [text.strip() for text in texts + [long]]
    assert sorted(everything) == sorted(expected)
    in_train = set(splits["train"])
    assert splits["train"] != [text for text in texts if text in in_train]  # shuffled
    assert 0.05 < len(splits["val"]) / len(everything) < 0.16
    names = ["meta.json", "train.bin", "train.corpus", "val.bin", "val.corpus"]
    assert sorted(os.listdir(tmp_path / "out")) == names  # and no scratch files
    first = {text.strip() for text in texts[:500]}
    for split, found in splits.items():
        numbers = np.fromfile(tmp_path / "out" / f"{split}.corpus", "<u2")
        assert numbers.tolist() == [int(text not in first) for text in found]
        assert meta["crc32"][f"{split}.corpus"] == zlib.crc32(numbers)
    expected = {
        "format": 1,
        "tokenizer": model,
        "tokenizer_sha256": tok.sha256,
        "vocab_size": tok.vocab_size,
        "bos_id": 1,
        "eos_id": 2}
    assert expected.items() <= meta.items()
    assert list(meta["corpora"]) == [f"text:{a}", f"text:{b}"]
    rows = meta["corpora"].values()
    assert [row["documents"] for row in rows] == [500, 401]
    for key in "documents", "tokens", "bytes":
        total = sum(row[key] for row in rows)
        assert total == meta["train"][key] + meta["val"][key]


def test_same_bytes_for_any_number_of_workers(tmp_path, model, texts):
    rng = random.Random(11)
    # long ones, to make several batches
    long = [hanzi(rng, 9000, 0x9000) for _ in range(400)]
    path = write(tmp_path / "a.jsonl", texts + texts[:9] + ["坏"] + long)
    made = []
    assert os.path.getsize(path) > 12 * corpora.BATCH_CHARS
    for workers in 1, 2, 3:
        out = tmp_path / f"out{workers}"
        prepared(f"text:{path}", model, out, f"--workers={workers}", "--val_fraction=0.1")
        made.append(bytes_of(out))
    assert made[0] == made[1] == made[2]
    prepared(f"text:{path}", model, tmp_path / "seed", "--seed=2", "--val_fraction=0.1")
    assert bytes_of(tmp_path / "seed")["train.bin"] != made[0]["train.bin"]
    tok = tokenizer.load(model)
    other = read(tmp_path / "seed", tok)[1]
    first = read(tmp_path / "out1", tok)[1]
    # chosen by their text, not by the seed
    assert sorted(other["val"]) == sorted(first["val"])


def test_bad_records_and_duplicates_are_counted_by_reason(tmp_path, model, texts):
    path = write(tmp_path / "a.jsonl", texts[:100])
    with open(path, "a", encoding="utf-8") as f:
        near = texts[2][:30] + "甲" + texts[2][31:]
        f.write('{"text": "cut\n[1, 2]\n')
        f.write('{"title": "无文"}\n{"text": "短"}\n')
        for text in texts[0], texts[0], texts[1], near, CONTROLS:
            f.write(json.dumps({"text": text}) + "\n")
        f.write('{"text": "' + texts[3])
    said = prepared(f"text:{path}", model, tmp_path / "out", "--val_fraction=0.2")
    meta, splits = read(tmp_path / "out", tokenizer.load(model))
    row = meta["corpora"][f"text:{path}"]
    assert row["dropped"] == {
        "broken JSON": 2,
        "exact duplicate": 3,
        "near duplicate": 1,
        "no text": 1,
        "not an object": 1,
        "too short": 1}
    assert row["records"] == 110
    assert row["documents"] == 110 - sum(row["dropped"].values())
    everything = splits["train"] + splits["val"]
    assert len(everything) == 101
    assert texts[2] in everything
    assert near not in everything  # the first stays
    assert CONTROLS in everything  # as text: no control token
    reasons = "3 dropped: exact duplicate", "2 dropped: broken JSON", "1 dropped: near dup"
    places = [said.index(reason) for reason in reasons]
    assert places == sorted(places)
    lines = [line.split() for line in said.splitlines() if line.strip()]
    shown = {words[0]: words[1:] for words in lines}
    assert shown["records"] == ["documents", "tokens", "bytes", "bytes_per_token"]
    for split in "train", "val":
        assert shown[split][0] == str(len(splits[split]))
    prepared(f"text:{path}", model, tmp_path / "all", "--val_fraction=0.2", "--dedup=false")
    splits = read(tmp_path / "all", tokenizer.load(model))[1]
    assert len(splits["train"] + splits["val"]) == 105


def test_bins_larger_than_what_is_in_memory_at_a_time(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    documents = np.zeros(200, prepare_pretrain.DOCUMENT)
    documents["tokens"] = rng.integers(1, 90, 200)
    ids = [rng.integers(0, 1 << 16, n).astype("<u2") for n in documents["tokens"]]
    (tmp_path / "ids").write_bytes(b"".join(ids))
    order = rng.permutation(200)[:150]
    expected = b"".join(ids[i] for i in order)
    for size in 1, 50, 1000, 1 << 20:
        monkeypatch.setattr(prepare_pretrain, "GATHER_TOKENS", size)
        ids_path, bin_path = tmp_path / "ids", tmp_path / "bin"
        with open(ids_path, "rb") as ids_file, open(bin_path, "wb") as bin_file:
            prepare_pretrain.write_bin(bin_file, ids_file, "<u2", documents, order)
        assert (tmp_path / "bin").read_bytes() == expected


# ---- near duplicates against exact similarities --------------------------------------------------

def shingles(text, n=5):
    return {text[i:i + n] for i in range(len(text) - n + 1)}


def exact_jaccard(a, b):
    a, b = shingles(a), shingles(b)
    return len(a & b) / len(a | b)


def planted(seed, length, similarity, n):
    """n pairs of texts with an exact Jaccard similarity of about this."""
    rng = random.Random(seed)
    pairs = []
    while len(pairs) < n:
        a = hanzi(rng, length)
        b = list(a)
        while exact_jaccard(a, "".join(b)) > similarity:
            b[rng.randrange(length)] = hanzi(rng, 1)
        changed = "".join(b)
        pairs.append((a, changed))
    return pairs


def signatures(texts):
    hashes = np.arange(len(texts), dtype=np.uint64)
    return prepare_pretrain.signatures(texts, hashes, shingle=5, n_permutations=256, seed=3)


def near(tmp_path, texts):
    """Which of the texts are near duplicates of an earlier one, (n,) bool."""
    signatures(texts).tofile(tmp_path / "s")
    known = np.zeros(len(texts), bool)
    return prepare_pretrain.near_duplicates(str(tmp_path / "s"), known, 256, 32, 0.8)


@pytest.mark.parametrize("length", [130, 700])
def test_signatures_estimate_the_exact_similarity(length):
    for similarity in 0.3, 0.6, 0.9:
        pairs = planted(4, length, similarity, 60)
        minima = signatures([text for pair in pairs for text in pair])
        estimates = (minima[::2] == minima[1::2]).mean(1)
        exact = np.array([exact_jaccard(*pair) for pair in pairs])
        assert abs((estimates - exact).mean()) < 0.015
        assert (estimates - exact).std() < 0.045


@pytest.mark.parametrize("length", [130, 700])
def test_recall_above_85_and_precision_above_70_percent(tmp_path, length):
    similarities = 0.95, 0.9, 0.87, 0.75, 0.7, 0.68, 0.65, 0.6, 0.5
    pairs = []
    for i, similarity in enumerate(similarities):
        pairs += planted(i, length, similarity, 60)
    texts = [text for pair in pairs for text in pair]
    order = random.Random(5).sample(range(len(texts)), len(texts))
    exact = np.array([exact_jaccard(*pair) for pair in pairs])
    flags = near(tmp_path, [texts[i] for i in order])
    found = np.zeros(len(texts), bool)
    found[order] = flags
    found = found.reshape(-1, 2).sum(1)
    assert found.max() == 1  # one of a pair stays
    assert (found[exact >= 0.85] == 1).mean() >= 0.95
    assert (exact[found == 1] >= 0.7).mean() >= 0.95


def test_the_first_of_many_copies_stays_and_strangers_stay(tmp_path):
    pairs = planted(7, 200, 0.9, 40)
    originals, copies = map(list, zip(*pairs))
    flags = near(tmp_path, originals + copies * 5)
    assert not flags[:40].any()
    assert flags[40:].all()


def test_one_band_shared_by_documents_that_differ_hides_no_copies():
    """Each document is compared with the first of those that agree, and what is left again."""
    rng = np.random.default_rng(1)
    minima = rng.integers(0, 256, (2000, 256), np.uint8)
    minima[:, :8] = 7  # all agree on the first band
    minima[1000:, 8:] = minima[:1000, 8:]  # 1,000 pairs of copies
    for first in range(8, 256, 8):  # which agree on no other band
        minima[1000:, first] += 1
    few = minima[[0, 1, 2, 3, 4, 1001, 1002]]
    found = []
    for rows in few, minima:
        with tempfile.TemporaryFile() as file:
            file.write(rows)
            file.flush()
            known = np.zeros(len(rows), bool)
            found.append(prepare_pretrain.near_duplicates(file, known, 256, 32, 0.8))
    of_few, of_all = found
    assert not of_few[:5].any()
    assert of_few[5:].all()
    assert not of_all[:1000].any()
    assert 0 < of_all.sum() < 20  # a few rounds only: no quadratic time


def test_copies_that_differ_in_white_space_or_width_only_are_found(tmp_path):
    text = "小猫说：“你好！”，然后回家了。第二天（星期一），它又来了、又走了。为什么呢？没有人知道。"
    narrow = text.translate(str.maketrans("：“！”，。（）、？", ':"!",.(),?'))
    spaced = "\n\n".join(part + "　" for part in text.split("，"))
    wide_commas = text.replace("，", "， ")
    a_line_each = text.replace("。", "。\n")
    texts = [text, narrow, wide_commas, a_line_each]
    assert near(tmp_path, texts).tolist() == [False, True, True, True]
    assert spaced != text
    texts = [text.replace("，", ""), spaced]
    assert near(tmp_path, texts).tolist() == [False, True]


def test_texts_without_a_shingle_are_not_duplicates_of_each_other(tmp_path):
    texts = ["一", "二三", "四五六七", "八九十百千", "", "甲乙丙", "八九十百千"]
    assert near(tmp_path, texts).tolist() == [False] * 6 + [True]
    alone = signatures(["八九十百千万"])
    together = signatures(["一二", "八九十百千万", "三"])
    assert (alone[0] == together[1]).all()  # no shingle spans two documents


def test_a_boilerplate_shared_by_all_does_not_make_it_quadratic(tmp_path):
    rng = random.Random(8)
    frame = story(rng, 60)
    texts = [frame + hanzi(rng, 120, 0x9000) for _ in range(8000)]
    started = time.perf_counter()
    assert near(tmp_path, texts).sum() < 80
    assert time.perf_counter() - started < 20


def test_exact_duplicates_keep_the_first():
    largest = 2 ** 64 - 1
    hashes = np.array([5, 3, 5, largest, 3, 3, 0], np.uint64)
    flags = prepare_pretrain.exact_duplicates(hashes).tolist()
    assert flags == [False, False, True, False, True, True, False]


# ---- refusals and interruptions ------------------------------------------------------------------

@pytest.mark.parametrize("more, parts", [
    (["--corpora=text:missing.jsonl"], ["missing.jsonl", "To get it"]),
    (["--tokenizer=missing.model"], ["missing.model", "train_tokenizer.py"]),
    (["--n_bands=7"], ["n_bands=7"]),
    (["--val_fraction=1.5"], ["val_fraction=1.5"]),
    (["--val_fraction=0"], ["val_fraction=0"]),
    (["--workers=-1"], ["workers=-1"]),
    (["--seed=-1"], ["seed=-1"]),
    (["--jaccard=0"], ["jaccard=0.0"]),
    (["--shingle=0"], ["shingle=0"]),
    (["--shingle=100000"], ["shingle=100000"]),
    (["--val_fraction=1e-6"], ["too little text", "val_fraction"]),
])
def test_what_cannot_work_is_refused_in_one_sentence(tmp_path, model, texts, more, parts):
    path = write(tmp_path / "a.jsonl", texts[:20])
    code, said = prepare(f"text:{path}", model, tmp_path / "out", *more)
    assert code == 1
    for part in parts:
        assert part in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A byte-level tokenizer.json with more than 65,536 ids; 小 and 猫 are among the last ones."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("wide")
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    t.train_from_iterator([], trainer)
    spec = json.loads(t.to_str())
    vocab = spec["model"]["vocab"]
    vocab.update({f"w{i}": i for i in range(len(vocab), 70_000)})
    t = tokenizers.Tokenizer.from_str(json.dumps(spec))
    t.add_special_tokens(["<|endoftext|>"])
    t.add_tokens(["小", "猫"])
    t.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return str(folder)


def test_ids_above_65535_make_bins_of_32_bits(tmp_path, model, wide, texts):
    cats = [f"{text}小猫" for text in texts[:99]]
    path = write(tmp_path / "a.jsonl", cats)
    for name, size in (model, 2), (wide, 4):
        out = tmp_path / str(size)
        tok = tokenizer.load(name)
        prepared(f"text:{path}", name, out, "--val_fraction=0.2")
        meta, splits = read(out, tok)
        assert meta["dtype"] == f"uint{8 * size}"
        assert meta["vocab_size"] == tok.vocab_size
        assert os.path.getsize(out / "train.bin") == size * meta["train"]["tokens"]
        assert sorted(splits["train"] + splits["val"]) == sorted(cats)
    ids = np.fromfile(tmp_path / "4/train.bin", "<u4")
    assert (ids == tok.encode("猫")[0]).sum() == meta["train"]["documents"]
    assert ids.max() > 70_000
    chat = tmp_path / "c.jsonl"
    with open(chat, "w", encoding="utf-8") as f:
        for i, text in enumerate(texts[:99]):
            f.write(json.dumps({"prompt": text, "response": f"小猫{i}"}) + "\n")
    done = run(
        "prepare_sft.py", tmp_path, f"--corpora=prompt:{chat}", f"--tokenizer={wide}",
        "--data_dir=sft", "--show=1", "--max_seq_len=4096", "--workers=1")
    assert done.rc == 0, done.err
    assert "小猫0" in done.out, done.err
    meta = read_meta(tmp_path / "sft")
    ids = np.fromfile(tmp_path / "sft/train.bin", "<u4")
    mask = np.fromfile(tmp_path / "sft/train.mask", "u1")
    assert meta["dtype"] == "uint32"
    assert len(ids) == len(mask) == meta["train"]["tokens"]
    learnt = tok.decode(ids[mask == 1].tolist())
    answers = [text.rstrip("\n") for text in learnt.split("小猫")[1:]]
    assert len(answers) == meta["train"]["examples"]
    assert set(answers) <= set(map(str, range(99)))


def test_empty_input(tmp_path, model):
    path = write(tmp_path / "a.jsonl", [])
    code, said = prepare(f"text:{path}", model, tmp_path / "out")
    assert code == 1
    assert "no document is left" in said
    assert "Traceback" not in said


@pytest.mark.skipif(
    not os.path.isdir("/proc/self/task"), reason="finds the workers in Linux's /proc")
@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_leaves_what_was_there_and_runs_again(tmp_path, model, texts, kill):
    out = tmp_path / "out"
    small = write(tmp_path / "a.jsonl", texts[:200])
    prepared(f"text:{small}", model, out, "--val_fraction=0.1")
    before = bytes_of(out)
    rng = random.Random(9)
    words = story(rng, 2000)
    large = write(tmp_path / "b.jsonl", [f"{i}{words}" for i in range(2500)])
    command = [
        sys.executable, SCRIPT, f"--corpora=text:{large}", f"--tokenizer={model}",
        f"--data_dir={out}", "--workers=2"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text().split():  # until the first worker is there
        assert process.poll() is None
        time.sleep(0.01)
    if kill == signal.SIGINT:  # Ctrl-C goes to the workers, too
        os.killpg(process.pid, kill)
    process.send_signal(kill)  # perhaps the user is impatient
    said = process.communicate(timeout=60)[1]
    killed = kill == signal.SIGKILL
    assert process.returncode == (-kill if killed else 128 + kill)
    # after a SIGKILL a worker may complain that it lost its parent
    if not killed:
        assert "Traceback" not in said
        assert said.count("interrupted; ") == 1
    assert bytes_of(out) == before
    prepared(f"text:{small}", model, out, "--val_fraction=0.1")
    assert bytes_of(out) == before


def test_memory_does_not_grow_with_the_corpus(tmp_path, model):
    """Complaint 2. Ten times the text may cost the main process 100 bytes per document, no more."""
    pytest.importorskip("resource")
    words = story(random.Random(10), 3000)
    peaks = []
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for n in 200, 2000:
        path = write(tmp_path / f"{n}.jsonl", [f"{i}{words}" for i in range(n)])
        argv = [
            "prepare_pretrain.py", f"--corpora=text:{path}", f"--tokenizer={model}",
            f"--data_dir={tmp_path}/out{n}", "--workers=1", "--dedup=false"]
        code = (
            f"import sys, resource, runpy; sys.argv = {argv!r}\n"
            f"runpy.run_path({SCRIPT!r}, run_name='__main__')\n"
            "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment)
        peaks.append(int(done.stdout.split("peak")[-1]))
    # in KiB; the larger input is 25 MB of text
    assert peaks[1] < peaks[0] + 60_000, peaks
