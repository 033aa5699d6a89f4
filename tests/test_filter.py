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
    """Bins of 30 stories, some longer than a row, with 10 lines of noise in between; a checkpoint."""
    path, rng = tmp_path_factory.mktemp("filter"), random.Random(4)
    shutil.copy(tok.name, path / "tok.model")
    here = tokenizers.load(str(path / "tok.model"))
    noise = ["".join(rng.choices(NOISE, k=40)) for _ in range(10)]
    texts = []
    for line in noise:
        texts.append(line)
        texts += [story(rng, rng.choice([1, 2, 6])) for _ in range(3)]
    write_pretrain(path / "bins", here, texts, [story(rng, 2)])
    write_texts(path / "good.jsonl", [story(rng, 4) for _ in range(30)])
    write_texts(path / "other.jsonl", noise)
    torch.manual_seed(1)
    model = Model(ModelConfig(here.vocab_size, 32, 2, 2, max_seq_len=T))
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
    return [d.tolist() for d in np.split(ids, ends)[:-1]]


def naive_bits_per_byte(model, docs, tok):
    """Each document by itself, cut where a row of the flat file ends."""
    scores, at = [], 0
    for ids in docs:
        nats, begin = 0.0, 0
        while begin < len(ids):
            end = min(len(ids), begin + T - (at + begin) % T)
            before = ids[begin - 1] if begin else tok.bos_id
            x = torch.tensor([[before] + ids[begin:end - 1]])
            logs = model(x)[0].double().log_softmax(-1)
            for row, target in zip(logs, ids[begin:end]):
                nats -= row[target].item()
            begin = end
        at += len(ids)
        scores.append(nats / math.log(2) / len(tok.decode(ids).encode()))
    return np.array(scores)


def test_bits_per_byte_drop_both_tails(folder, tok, filtered):
    saved = checkpoints.load(folder / "model.pt")
    model = Model.from_state(saved["shape"], saved["model"])
    docs = documents(folder / "bins/train.bin", tok)
    with torch.no_grad():
        expected = naive_bits_per_byte(model, docs, tok)
    printed = filtered(checkpoint="model.pt", drop_low=0.1, drop_high=0.2, batch_tokens=3 * T)
    low, high = np.quantile(expected, [0.1, 0.8])
    kept = [d for d, score in zip(docs, expected) if low <= score <= high]
    assert len(kept) == 28
    assert documents(folder / "out/train.bin", tok) == kept
    shown = re.findall(r"^ *(\d+\.\d{4}) \|", printed, re.M)
    shown, expected = np.array(shown, float), np.sort(expected)
    np.testing.assert_allclose(shown[:20], expected[:20], atol=1e-3)
    np.testing.assert_allclose(shown[20:], expected[:-21:-1], atol=1e-3)


def test_the_result_is_a_bin_like_any_other(folder, tok, filtered):
    """Counts and checksums are those of the files; pretrain.py reads it; val.bin is untouched."""
    filtered(checkpoint="model.pt")
    meta = json.loads((folder / "out/meta.json").read_text("utf-8"))
    docs = documents(folder / "out/train.bin", tok)
    assert meta["train"] == {
        "documents": len(docs),
        "tokens": sum(map(len, docs)),
        "bytes": sum(len(tok.decode(d).encode()) for d in docs)}
    row = meta["corpora"]["bins"]
    assert row["records"] == row["documents"] + sum(row["dropped"].values()) == 40
    assert meta["before"]["train"]["documents"] == 40
    out = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    for name in "train.bin", "val.bin":
        assert meta["crc32"][name] == zlib.crc32(out[name])
    assert out["val.bin"] == (folder / "bins/val.bin").read_bytes()
    assert out["scores.png"].startswith(b"\x89PNG")
    done = run("pretrain.py", folder, "--tokenizer=tok.model", "--data_dir=out", *SMALL)
    assert done.rc == 0, done.err


def test_likeness_tells_noise_from_stories(folder, tok, filtered):
    filtered(**LIKENESS, drop_low=0.25, drop_high=0.0)
    kept = [tok.decode(d) for d in documents(folder / "out/train.bin", tok)]
    assert len(kept) == 30 and all(text.startswith("从前") for text in kept)


def test_bins_of_four_bytes(folder, tok, filtered):
    shutil.copytree(folder / "bins", folder / "wide")
    meta = json.loads((folder / "wide/meta.json").read_text("utf-8"))
    for name in "train.bin", "val.bin":
        ids = np.fromfile(folder / "wide" / name, "<u2").astype("<u4")
        ids.tofile(folder / "wide" / name)
        meta["crc32"][name] = zlib.crc32(ids.tobytes())
    (folder / "wide/meta.json").write_text(json.dumps({**meta, "dtype": "uint32"}), "utf-8")
    filtered(**LIKENESS, out_dir="two")
    filtered(**LIKENESS, data_dir="wide", out_dir="four")
    kept = documents(folder / "two/train.bin", tok)
    assert kept and documents(folder / "four/train.bin", tok, "<u4") == kept
    assert json.loads((folder / "four/meta.json").read_text("utf-8"))["dtype"] == "uint32"


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
