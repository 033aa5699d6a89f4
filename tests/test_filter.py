"""filter_pretrain.py: its scores beside a naive loop, and bins that pretrain.py reads."""
import json
import math
import random
import re
import shutil
import zlib
from collections import Counter

import numpy as np
import pytest
import torch

import checkpoints
import filter_pretrain as script
import tokenizer as tokenizers
from conftest import run, story, write_pretrain
from model import Model, ModelConfig

LIKENESS = {"good": "text:good.jsonl", "other": "text:other.jsonl"}
T = 32
SMALL = (
    f"--dim=32 --n_layers=1 --n_heads=2 --max_seq_len={T} --batch_tokens=64 --max_steps=2 "
    "--device=cpu --sample_prompts=").split()
NOISE = "abcdefghijklmnopqrstuvwxyz "


def write_texts(path, texts):
    lines = [json.dumps({"text": text}) for text in texts]
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tok, tmp_path_factory):
    """Bins of 30 stories, some longer than a row, and 10 lines of noise; a checkpoint."""
    path, rng = tmp_path_factory.mktemp("filter"), random.Random(4)
    shutil.copy(tok.name, path / "tok.model")
    here = tokenizers.load(str(path / "tok.model"))
    noise = ["".join(rng.choices(NOISE, k=40)) for _ in range(10)]
    texts = []
    for line in noise:
        texts.append(line)
        for _ in range(3):
            n_sentences = rng.choice([1, 2, 6])
            texts.append(story(rng, n_sentences))
    write_pretrain(path / "bins", here, texts, [story(rng, 2)])
    good = [story(rng, 4) for _ in range(30)]
    write_texts(path / "good.jsonl", good)
    write_texts(path / "other.jsonl", noise)
    torch.manual_seed(1)
    shape = ModelConfig(here.vocab_size, 32, 2, 2, max_seq_len=T)
    model = Model(shape)
    model.embedding.weight.data *= 20                          # far from uniform predictions
    checkpoints.save(path / "model.pt", {
        "stage": "pretrain",
        "model": model.state_dict(),
        "shape": vars(model.config),
        "tokenizer": here.name,
        "tokenizer_sha256": here.sha256})
    return path


@pytest.fixture
def filtered(folder, monkeypatch, capsys):
    """Calls the script's main() with these constants; returns what it printed."""
    monkeypatch.chdir(folder)

    def call(**constants):
        small = {
            "tokenizer": "tok.model",
            "data_dir": "bins",
            "out_dir": "out",
            "device": "cpu",
            "dtype": "float32"}
        for name, value in {**small, **constants}.items():
            monkeypatch.setattr(script, name, value)
        script.main()
        return capsys.readouterr().out
    return call


def documents(path, tok, kind="<u2"):
    ids = np.fromfile(path, kind).astype(int)
    ends = np.flatnonzero(ids == tok.eos_id) + 1
    parts = np.split(ids, ends)[:-1]
    return [part.tolist() for part in parts]


def naive_bits_per_byte(model, docs, tok):
    """Each document by itself, cut where a row of the flat file ends."""
    scores, at = [], 0
    for ids in docs:
        nats, begin = 0.0, 0
        while begin < len(ids):
            left = T - (at + begin) % T
            end = min(len(ids), begin + left)
            before = ids[begin - 1] if begin else tok.bos_id
            x = [before] + ids[begin:end - 1]
            logits = model(torch.tensor([x]))[0]
            logs = logits.double().log_softmax(-1)
            for row, target in zip(logs, ids[begin:end]):
                nats -= row[target].item()
            begin = end
        at += len(ids)
        n_bytes = len(tok.decode(ids).encode())
        scores.append(nats / math.log(2) / n_bytes)
    return np.array(scores)


def test_scores_that_are_not_finite_end_the_run(folder, filtered):
    saved = torch.load(folder / "model.pt", weights_only=True)
    saved["model"]["norm.weight"] *= 1e38                      # its logits overflow
    torch.save(saved, folder / "large.pt")
    with pytest.raises(SystemExit, match="large.pt: the bits per byte of .* not finite"):
        filtered(checkpoint="large.pt", out_dir="none")
    assert not (folder / "none/train.bin").exists()


def test_bits_per_byte_drop_both_tails(folder, tok, filtered):
    saved = checkpoints.load(folder / "model.pt")
    model = Model.from_state(saved["shape"], saved["model"])
    docs = documents(folder / "bins/train.bin", tok)
    with torch.no_grad():
        expected = naive_bits_per_byte(model, docs, tok)
    printed = filtered(
        checkpoint="model.pt", drop_low=0.1, drop_high=0.2, batch_tokens=3 * T)
    low, high = np.quantile(expected, [0.1, 0.8])
    kept = [
        ids for ids, score in zip(docs, expected)
        if low <= score <= high]
    assert len(kept) == 28
    assert documents(folder / "out/train.bin", tok) == kept
    shown = re.findall(r"^ *(\d+\.\d{4}) \|", printed, re.M)
    expected = np.sort(expected)
    expected = [*expected[:20], *expected[:-21:-1]]
    np.testing.assert_allclose(np.array(shown, float), expected, atol=1e-3)


def test_the_result_is_a_bin_like_any_other(folder, tok, filtered):
    """Counts and checksums are those of the files; pretrain.py reads it; val.bin is untouched."""
    printed = filtered(checkpoint="model.pt")
    meta = json.loads((folder / "out/meta.json").read_text("utf-8"))
    docs = documents(folder / "out/train.bin", tok)
    assert meta["train"] == sizes(docs, tok)
    assert "counted as one corpus, unknown" in printed
    row = meta["corpora"]["unknown"]
    n_dropped = sum(row["dropped"].values())
    assert row["records"] == row["documents"] + n_dropped == 40
    assert meta["before"]["train"]["documents"] == 40
    files = (folder / "out").iterdir()
    out = {path.name: path.read_bytes() for path in files}
    for name in "train.bin", "val.bin", "train.corpus", "val.corpus":
        assert meta["crc32"][name] == zlib.crc32(out[name])
    assert out["val.bin"] == (folder / "bins/val.bin").read_bytes()
    assert out["scores.png"].startswith(b"\x89PNG")
    done = run("pretrain.py", folder, "--tokenizer=tok.model", "--data_dir=out", *SMALL)
    assert done.rc == 0, done.err


def sizes(docs, tok):
    return {
        "documents": len(docs),
        "tokens": sum(map(len, docs)),
        "bytes": sum(len(tok.decode(d).encode()) for d in docs)}


def with_corpora(folder, name):
    """Bins like those of the fixture, with the corpus of each document in files beside them."""
    shutil.copytree(folder / "bins", folder / name)
    meta = json.loads((folder / "bins/meta.json").read_text("utf-8"))
    row = {"documents": 0, "tokens": 0, "bytes": 0}
    meta["corpora"] = {"text:noise": row, "text:empty": row, "text:stories": row}
    # each line of noise is followed by three stories
    numbers = np.array([0, 2, 2, 2] * 10, "<u2")
    parts = {"train": numbers, "val": numbers[-1:]}
    if name == "shards":
        parts = {
            "train-00000": numbers[:17],
            "train-00001": numbers[17:],
            "val": numbers[-1:]}
    for part, its_numbers in parts.items():
        its_numbers.tofile(folder / name / f"{part}.corpus")
        meta["crc32"][f"{part}.corpus"] = zlib.crc32(its_numbers)
    (folder / name / "meta.json").write_text(json.dumps(meta), "utf-8")


def is_story(ids, tok):
    return tok.decode(ids).startswith("从前")


@pytest.mark.parametrize("bins", ["mixed", "shards"])
def test_what_is_dropped_is_counted_by_corpus_and_reason(folder, tok, filtered, bins):
    with_corpora(folder, bins)
    out = folder / f"{bins}_out"
    printed = filtered(
        **LIKENESS, data_dir=bins, out_dir=str(out), drop_low=0.2, drop_high=0.1)
    meta = json.loads((out / "meta.json").read_text("utf-8"))
    rows = meta["corpora"]
    assert list(rows) == ["text:noise", "text:empty", "text:stories"]
    n_records = [row["records"] for row in rows.values()]
    assert n_records == [10, 0, 30]
    kept = documents(out / "train.bin", tok)
    assert len(kept) == 28
    expected = [2 if is_story(ids, tok) else 0 for ids in kept]
    assert np.fromfile(out / "train.corpus", "<u2").tolist() == expected

    before = documents(folder / bins / "train.bin", tok)
    for name, story in ("text:noise", False), ("text:stories", True):
        row = rows[name]
        its = [ids for ids in before if is_story(ids, tok) == story]
        stay = sizes([ids for ids in its if ids in kept], tok)
        lost = sizes([ids for ids in its if ids not in kept], tok)
        assert {figure: row[figure] for figure in script.FIGURES} == stay
        for key, n in zip(script.DROPPED, lost.values()):
            assert sum(row[key].values()) == n
    # the lowest are noise, the highest are stories
    low, high = rows["text:noise"]["dropped"]
    assert "below" in low and "above" in high
    assert rows["text:noise"]["dropped"] == {low: 8, high: 0}
    assert rows["text:stories"]["dropped"] == {low: 0, high: 4}

    row = rows["text:stories"]
    lines = [[row[figure] for figure in script.FIGURES]]
    for reason in low, high:
        lines.append([row[key][reason] for key in script.DROPPED])
    table = printed[printed.index("text:stories"):]
    shown = re.findall(r"^ +([\d,]+) +([\d,]+) +([\d,]+)  (?:kept|dropped: .*)$", table, re.M)
    assert shown == [tuple(f"{number:,}" for number in line) for line in lines]


def test_a_corpus_file_that_does_not_fit_is_refused(folder, filtered):
    with_corpora(folder, "broken")
    path = folder / "broken/train.corpus"
    np.array([2] * 40, "<u2").tofile(path)
    with pytest.raises(SystemExit, match="train.corpus: damaged"):
        filtered(**LIKENESS, data_dir="broken")
    path.unlink()
    with pytest.raises(SystemExit, match="train.corpus: missing"):
        filtered(**LIKENESS, data_dir="broken")


def test_bins_of_another_preparation_are_refused(folder, filtered):
    with_corpora(folder, "other")
    path = folder / "other/meta.json"
    meta = json.loads(path.read_text("utf-8"))
    meta["val"]["documents"] = 2
    path.write_text(json.dumps(meta), "utf-8")
    with pytest.raises(SystemExit, match="val.corpus: its 2 bytes are not what meta.json says"):
        filtered(**LIKENESS, data_dir="other")


@pytest.mark.parametrize("documents", [7, 1 << 50])
def test_a_number_of_documents_that_the_bin_does_not_hold_is_refused(folder, filtered, documents):
    name = f"wrong_{documents}"
    with_corpora(folder, name)
    path = folder / name / "meta.json"
    meta = json.loads(path.read_text("utf-8"))
    meta["train"]["documents"] = documents
    path.write_text(json.dumps(meta), "utf-8")
    with pytest.raises(SystemExit, match="does not hold the documents that meta.json says"):
        filtered(**LIKENESS, data_dir=name)


def test_likeness_tells_noise_from_stories(folder, tok, filtered):
    filtered(**LIKENESS, drop_low=0.25, drop_high=0.0)
    kept = documents(folder / "out/train.bin", tok)
    assert len(kept) == 30
    assert all(is_story(ids, tok) for ids in kept)


def test_bins_of_four_bytes(folder, tok, filtered):
    shutil.copytree(folder / "bins", folder / "wide")
    meta = json.loads((folder / "wide/meta.json").read_text("utf-8"))
    for name in "train.bin", "val.bin":
        ids = np.fromfile(folder / "wide" / name, "<u2").astype("<u4")
        ids.tofile(folder / "wide" / name)
        meta["crc32"][name] = zlib.crc32(ids.tobytes())
    meta["dtype"] = "uint32"
    (folder / "wide/meta.json").write_text(json.dumps(meta), "utf-8")
    filtered(**LIKENESS, out_dir="two")
    filtered(**LIKENESS, data_dir="wide", out_dir="four")
    kept = documents(folder / "two/train.bin", tok)
    assert kept and documents(folder / "four/train.bin", tok, "<u4") == kept
    meta = json.loads((folder / "four/meta.json").read_text("utf-8"))
    assert meta["dtype"] == "uint32"


@pytest.mark.parametrize("constants, sentence", [
    ({}, "give either"),
    ({"checkpoint": "model.pt", **LIKENESS}, "give either"),
    ({"good": "text:good.jsonl"}, "give either"),
    ({"checkpoint": "model.pt", "drop_low": 0.5, "drop_high": 0.5}, "nothing would be left"),
    ({"checkpoint": "model.pt", "out_dir": "./bins"}, "name another folder"),
])
def test_wrong_constants_end_in_a_sentence(folder, filtered, constants, sentence):
    before = (folder / "bins/train.bin").read_bytes()
    with pytest.raises(SystemExit, match=sentence):
        filtered(**constants)
    assert (folder / "bins/train.bin").read_bytes() == before


def test_rubbish_of_five_kinds(tmp_path):
    """The same bytes every time, and no template is left unfilled."""
    for name in "ab":
        done = run("data/make_rubbish.py", tmp_path, f"--out={name}.jsonl", "--n_documents=50")
        assert done.rc == 0, done.err
    text = (tmp_path / "a.jsonl").read_text("utf-8")
    assert text == (tmp_path / "b.jsonl").read_text("utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    assert Counter(record["kind"] for record in records) == dict.fromkeys(
        ("menu", "keywords", "shop", "boilerplate", "log"), 10)
    assert not any("{" in record["text"] for record in records)
