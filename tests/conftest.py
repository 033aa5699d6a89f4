"""What several test files need: a tiny tokenizer, tiny bins, and the scripts as subprocesses."""
import io
import json
import os
import random
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# torch reads this when it is imported; with one thread each, tests share the machine and sums agree
os.environ["OMP_NUM_THREADS"] = "1"
# a shell makes its background jobs ignore Ctrl-C, and the scripts under test would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)

WHO = "小猫 小狗 老师 妈妈 弟弟 月亮 大象 船长".split()
WHERE = "河边 学校 山上 花园 家里 海上".split()
DID = "看见了一朵花 唱了一首歌 做了一个梦 丢了三块钱 找到了朋友 喝了一杯热茶".split()
QUESTIONS = {
    "你好！": "你好！",
    "你是谁？": "我是小助手。",
    "天空是什么颜色的？": "蓝色的。",
    "一加一是几？": "二。",
}
# texts that tokenizers easily change
TEXTS = [
    "",
    " ",
    "\n",
    "你好，世界！",
    "从前，小猫在河边唱歌。\n\n  第二段。",
    "a   b\t\tc  ",
    "行\r\n行\r行\x0b\x0c\x85\u2028尾",
    "👨‍👩‍👧‍👦🏳️‍🌈😀",
    "▁a▁▁ b▁",
    "\x00",
    "a\x00b\x01\x7f",
    "\x00a\x01\x7f",
    "龘靐齉𠮷㐀",
    "國語與繁體字",
    "龘靐齉𠮷㐀 國語",
    "é e\u0301 ﬁ Ａ１①",
    "\ufeff\u200b\u00a0\u3000x",
    "é e\u0301 ﬁ Ａ１①\ufeff\u200b\u00a0\u3000x",
    "3.14159 1,000",
    "<0x41><0x0A>",
    "def f(x):\n    if x:\n\t\treturn  [x] * 2  # <0x0A>\n",
    "x" * 500,
    "x" * 3000,
    " " * 40 + "哈" * 41,
]


def story(rng, sentences):
    text = "从前，"
    for _ in range(sentences):
        text += f"{rng.choice(WHO)}在{rng.choice(WHERE)}{rng.choice(DID)}。"
    return text


def dialogue(rng, turns):
    messages = [{"role": "system", "content": "简短回答。"}] * rng.randrange(2)
    for question, answer in rng.choices(list(QUESTIONS.items()), k=turns):
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    return messages


def train_tokenizer(path, vocab_size, seed=0):
    """A sentencepiece file like those of train_tokenizer.py; returns it loaded."""
    import sentencepiece
    import tokenizer
    rng = random.Random(seed)
    model = io.BytesIO()
    texts = [story(rng, 5) for _ in range(100)]
    texts += [question + answer for question, answer in QUESTIONS.items()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        control_symbols=tokenizer.CONTROLS,
        unk_id=0, bos_id=1, eos_id=2, pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return tokenizer.load(str(path))


@pytest.fixture(scope="session")
def tok(tmp_path_factory):
    """A tokenizer of 400 pieces, ours in every respect."""
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 400)


@pytest.fixture(scope="session")
def other_tok(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("other") / "other.model", 380, seed=1)


def import_weights(source, out, **constants):
    """extras/import_weights.py on a folder or a .pth; returns the path of the checkpoint."""
    from extras import import_weights as script
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(constants, source=str(source), out=str(out)).items():
            patch.setattr(script, name, value)
        script.main()
    return str(out)


def write_meta(folder, tok, dtype="uint16", **parts):
    bins = [path for path in folder.glob("*.*") if path.suffix != ".json"]
    meta = {
        "format": 1,
        "tokenizer": tok.name,
        "tokenizer_sha256": tok.sha256,
        "vocab_size": tok.vocab_size,
        "bos_id": tok.bos_id,
        "eos_id": tok.eos_id,
        "seed": 0,
        "crc32": {path.name: zlib.crc32(path.read_bytes()) for path in bins},
        "dtype": dtype,
        **parts,
    }
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def write_ids(path, ids, dtype):
    np.array(ids, dtype=np.dtype(dtype).newbyteorder("<")).tofile(path)


def write_pretrain(folder, tok, train, val, dtype="uint16"):
    """The bins of prepare_pretrain.py, from lists of texts."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {}
    for part, texts in (("train", train), ("val", val)):
        ids = []
        for text in texts:
            ids += tok.encode(text) + [tok.eos_id]
        write_ids(folder / f"{part}.bin", ids, dtype)
        parts[part] = {
            "documents": len(texts),
            "tokens": len(ids),
            "bytes": sum(len(text.encode()) for text in texts),
        }
    write_meta(folder, tok, dtype, **parts)
    return folder


def write_sft(folder, tok, train, val, dtype="uint16"):
    """The bins of prepare_sft.py, from lists of dialogues."""
    folder.mkdir(parents=True, exist_ok=True)
    parts, longest = {}, 0
    for part, dialogues in (("train", train), ("val", val)):
        ids, mask, starts = [], [], [0]
        for messages in dialogues:
            more_ids, more_mask = tok.render(messages)
            ids += more_ids
            mask += more_mask
            starts.append(len(ids))
            longest = max(longest, len(more_ids))
        write_ids(folder / f"{part}.bin", ids, dtype)
        write_ids(folder / f"{part}.mask", mask, "uint8")
        write_ids(folder / f"{part}.idx", starts, "int64")
        parts[part] = {
            "examples": len(dialogues),
            "tokens": len(ids),
            "targets": sum(mask),
            "bytes": 0,
        }
    write_meta(folder, tok, dtype, **parts, longest=longest)
    return folder


def write_pairs(folder, tok, train, val):
    """Bins of pairs, from lists of (messages, chosen, rejected).

    The loss counts the last answers only.
    """
    def both(pairs):
        dialogues = []
        for messages, *answers in pairs:
            prompt = [{**message, "train": False} for message in messages]
            for answer in answers:
                dialogues.append(prompt + [{"role": "assistant", "content": answer}])
        return dialogues

    write_sft(folder, tok, both(train), both(val))
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    meta["pairs"] = True
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def pretrain_dir(tok, tmp_path_factory):
    """train: about 1,500 tokens in documents of very different lengths; val: a few documents.

    The number of tokens is no multiple of any row.
    """
    rng = random.Random(2)
    train = [story(rng, rng.choice([1, 1, 2, 3, 9])) for _ in range(40)] + ["好"]
    val = [story(rng, 3) for _ in range(5)]
    return write_pretrain(tmp_path_factory.mktemp("pretrain"), tok, train, val)


@pytest.fixture(scope="session")
def sft_dir(tok, tmp_path_factory):
    rng = random.Random(3)
    train = [dialogue(rng, rng.choice([1, 1, 2, 3])) for _ in range(40)]
    val = [dialogue(rng, 1) for _ in range(5)]
    return write_sft(tmp_path_factory.mktemp("sft"), tok, train, val)


def run(script, cwd, *args, stdin="", torchrun=0, code=None, timeout=200):
    """Run a script, or a module of extras by its name with a dot; returns .rc, .out, .err.

    torchrun: with this many processes; code: Python that runs before it.
    """
    is_script = str(script).endswith(".py")
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={torchrun}"]
        command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    if code:
        call = f"run_path({str(ROOT / script)!r}" if is_script else f"run_module({script!r}"
        path = f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})"
        command += ["-c", f"{path}\n{code}\nrunpy.{call}, run_name='__main__')"]
    else:
        command += [str(ROOT / script)] if is_script else ["-m", script]
    done = subprocess.run(
        [*command, *map(str, args)],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
        env={**os.environ, "PYTHONUTF8": "1", "PYTHONPATH": str(ROOT)},
    )
    return SimpleNamespace(rc=done.returncode, out=done.stdout, err=done.stderr)
