"""Damaged state and odd command lines, for test_fuzz.py: used, or refused in one sentence.

State is what one stage leaves to the next: checkpoints, bins, tokenizers, folders of Hugging Face.
A damaged file that is accepted must also work: the model computes, the tokenizer encodes.
"""
import contextlib
import functools
import importlib.util
import io
import json
import random
import runpy
import shutil
import signal
import sys
import zlib
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import dialogue, import_weights, story, write_pairs, write_pretrain, write_sft

import checkpoints
import config
import eval_bleu
import pretrain
import runtime
import sft
import tokenizer
from damage import change_inside, mutate
from extras import export
from model import Model, ModelConfig
from optim import make_optimizers

ROOT = Path(__file__).resolve().parent.parent
SHAPE = dict(dim=8, n_layers=1, n_heads=2, hidden_dim=8, max_seq_len=64)
QUESTION = [{"role": "user", "content": "你好 a"}]


# ---- undamaged folders, and how each of their files is used --------------------------------------

def save_model(path, tok, **more):
    """A checkpoint of a tiny random model; returns the model."""
    torch.manual_seed(0)
    model = Model(ModelConfig(tok.vocab_size, **SHAPE))
    checkpoints.save(str(path), {
        "stage": "sft", "model": model.state_dict(), "shape": vars(model.config),
        "tokenizer": tok.name, "tokenizer_sha256": tok.sha256, "constants": {}, "step": 3, **more})
    return model


def use_model(path):
    """Compute one answer with the model of a checkpoint."""
    saved, tok = checkpoints.load_with_tokenizer(path)
    model = Model.from_state(saved["shape"], saved["model"])
    if model.n_params() < 1e6 and tok.template:
        ids = tok.prompt(QUESTION)[:model.config.max_seq_len]
        model(torch.tensor([ids]))


def use_tokenizer(name):
    tok = tokenizer.load(name)
    text = "从前，小猫 a<|end|>\n\u2581"
    ids = tok.encode(text)
    assert max(ids, default=0) < tok.vocab_size
    tok.decode(ids)
    if tok.template:
        assert max(tok.render(QUESTION)[0]) < tok.vocab_size


def a_run(folder, tok, rng):
    """last.pt, log.csv and run.json, which --resume reads."""
    def optimizers(model):
        return make_optimizers(model, 0.1, 0.1, 0.1, "float32")

    identity = {"seed": 1, "tokenizer": tok.sha256}
    model = save_model(folder / "last.pt", tok)
    states = [optimizer.state_dict() for optimizer in optimizers(model)]
    save_model(folder / "last.pt", tok, stage="pretrain", step=3, best=2.5, skipped=0, scaler={},
               identity=identity, constants={"lr": 0.1}, optimizers=states)
    rows = "1,64,0.1,2.5,1.0,,\n2,128,0.1,2.4,1.0,2.0,1.0\n"
    (folder / "log.csv").write_text(",".join(checkpoints.LOG) + ",val_bpb\n" + rows)
    session = {name: kind() for name, kind in checkpoints.SESSION.items()}
    (folder / "run.json").write_text(json.dumps([session, {**session, "to_step": 9}]))

    def resume():
        checkpoints.read_constants(f"{folder}/last.pt", {"lr": 0.2}, "pretrain")
        found = checkpoints.open_run(str(folder), True, False, "pretrain", identity)
        network = Model.from_state(found["shape"], found["model"])
        scaler = torch.amp.GradScaler("cpu")
        checkpoints.restore(found, network, optimizers(network), scaler)
        checkpoints.read_run(f"{folder}/run.json", 5)
        for row in checkpoints.read_log(f"{folder}/log.csv"):
            assert int(row["step"]) > 0 and float(row["loss"]) is not None
    return resume


def a_model(folder, tok, rng):
    save_model(folder / "best.pt", tok, val_loss=1.0, val_bpb=2.0)
    return lambda: use_model(f"{folder}/best.pt")


def pretraining_bins(folder, tok, rng):
    write_pretrain(folder, tok, [story(rng, 2) for _ in range(5)], [story(rng, 1)])

    def use():
        meta = checkpoints.read_meta(f"{folder}/meta.json", tok, "prepare_pretrain.py")
        for part in "train", "val":
            data = checkpoints.open_tokens(
                f"{folder}/{part}.bin", meta[part]["tokens"], meta, "prepare_pretrain.py",
                tok.vocab_size)
            pretrain.read_batch(data, [0], tok, torch.device("cpu"))
        checkpoints.data_hash(meta)
    return use


def fine_tuning_bins(folder, tok, rng):
    write_sft(folder, tok, [dialogue(rng, 1) for _ in range(5)], [dialogue(rng, 1)])
    lines = (json.dumps({"messages": dialogue(rng, 1), "corpus": "a"}) for _ in range(3))
    (folder / "test.jsonl").write_text("\n".join(lines) + "\n")

    def use():
        meta = checkpoints.read_meta(f"{folder}/meta.json", tok, "prepare_sft.py")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sft, "data_dir", str(folder))
            patch.setattr(eval_bleu, "questions", f"{folder}/test.jsonl")
            for part in "train", "val":
                data = sft.Examples(part, meta, 80, tok.vocab_size)
                sft.read_batch(data, [0], tok, torch.device("cpu"))
            assert eval_bleu.read_questions()
    return use


def a_sentencepiece_file(folder, tok, rng):
    shutil.copy(tok.name, folder / "tok.model")
    return lambda: use_tokenizer(f"{folder}/tok.model")


def a_rank_file(folder, tok, rng):
    shutil.copy(Path(tok.name).with_name("tiny.tiktoken"), folder / "tiny.tiktoken")
    return lambda: use_tokenizer(f"{folder}/tiny.tiktoken")


def an_exported_folder(folder, tok, rng, drop="tokenizer.json"):
    """A folder of Hugging Face, as extras/export.py writes it, with one of its tokenizer files."""
    save_model(folder.with_suffix(".pt"), tok)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "checkpoint", str(folder.with_suffix(".pt")))
        patch.setattr(export, "out", str(folder))
        export.main()
    for name in "README.md", drop:
        (folder / name).unlink()

    def use():
        import_weights(folder, folder.with_suffix(".out"))
        use_model(str(folder.with_suffix(".out")))
    return use


def a_byte_level_folder(folder, tok, rng):
    return an_exported_folder(folder, tok, rng, drop="tokenizer.model")


FILES = {
    a_run: "last.pt last.pt log.csv run.json", a_model: "best.pt",
    pretraining_bins: "meta.json train.bin val.bin",
    fine_tuning_bins: "meta.json train.bin train.mask train.idx val.mask val.idx test.jsonl",
    a_sentencepiece_file: "tok.model", a_rank_file: "tiny.tiktoken",
    an_exported_folder: "config.json generation_config.json tokenizer_config.json tokenizer.model "
                        "model.safetensors",
    a_byte_level_folder: "config.json tokenizer_config.json tokenizer.json model.safetensors"}
if not all(importlib.util.find_spec(name) for name in ("safetensors", "tokenizers", "jinja2")):
    del FILES[an_exported_folder], FILES[a_byte_level_folder]


@functools.cache
def undamaged(kind, folder, tok):
    """(the folder of a kind, {file: bytes}, the function that uses them)."""
    folder = folder / kind.__name__
    folder.mkdir()
    with quiet():
        use = kind(folder, tok, random.Random(0))
        use()
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}, use


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# ---- damage ------------------------------------------------------------------------------------

def damage(rng, path):
    """Change one thing inside a file whose format allows that, or its bytes."""
    data, inside = path.read_bytes(), rng.random() < 0.8
    if path.suffix == ".pt" and inside:
        torch.save(change_inside(rng, torch.load(path, weights_only=True)), path)
    elif path.suffix == ".json" and inside:
        path.write_text(json.dumps(change_inside(rng, json.loads(data)), default=str))
    elif path.suffix == ".safetensors" and inside:           # 8 bytes: the length of a JSON header
        end = 8 + int.from_bytes(data[:8], "little")
        header = change_inside(rng, json.loads(data[8:end]))
        header = json.dumps(header, default=str).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    else:
        path.write_bytes(mutate(rng, data))


def with_its_checksum(path):
    """Make meta.json vouch for the damaged file, so that what is behind the checksum is reached."""
    meta = json.loads(path.with_name("meta.json").read_bytes())
    meta["crc32"][path.name] = zlib.crc32(path.read_bytes())
    path.with_name("meta.json").write_text(json.dumps(meta))


def state_file(rng, folder, toks):
    """A damaged file of some stage's state is used, or refused in a sentence that names it."""
    kind = rng.choice(list(FILES))
    folder, files, use = undamaged(kind, folder, toks[0])
    name = rng.choice(FILES[kind].split())
    damage(rng, folder / name)
    if name.startswith(("train.", "val.")) and rng.random() < 0.5:
        with_its_checksum(folder / name)
    try:
        with quiet():
            use()
    except SystemExit as stopped:
        assert is_sentence(stopped.code), stopped.code
        assert name in stopped.code or str(folder) in stopped.code, stopped.code
        return Counter({f"{name} refused": 1})
    finally:
        for file, data in files.items():
            (folder / file).write_bytes(data)
    return Counter(used=1)


def is_sentence(code):
    return isinstance(code, str) and code.strip() and "\n" not in code


# ---- command lines -----------------------------------------------------------------------------

TOKENIZER = "--tokenizer=in/tok.model"
TRAIN = f"{TOKENIZER} --device=cpu --sample_tokens=3 --max_steps=1"
COMMANDS = {                                    # these work, before more constants are given
    "train_tokenizer.py": "--corpora=text:in/a.jsonl --vocab_size=400",
    "prepare_pretrain.py": f"--corpora=text:in/a.jsonl --workers=1 --val_fraction=0.3 {TOKENIZER}",
    "prepare_sft.py": f"--corpora=messages:in/b.jsonl --workers=1 --val_fraction=0.3 {TOKENIZER}",
    "filter_pretrain.py": f"--data_dir=in/bins --checkpoint=in/start.pt --device=cpu {TOKENIZER}",
    "pretrain.py": f"--data_dir=in/bins --dim=8 --n_layers=1 --n_heads=2 --hidden_dim=8 "
                   f"--max_seq_len=32 --batch_tokens=64 --compile=off {TRAIN}",
    "sft.py": f"--data_dir=in/sft --checkpoint=in/start.pt --batch_tokens=64 --compile=off {TRAIN}",
    "dpo.py": f"--data_dir=in/dpo --checkpoint=in/start.pt --batch_pairs=2 {TRAIN}",
    "sample.py": "--checkpoint=in/start.pt --max_new_tokens=3 --device=cpu",
    "eval_bleu.py": "--checkpoint=in/start.pt --questions=in/test.jsonl --device=cpu",
    "extras/export.py": "--checkpoint=in/start.pt",
    "extras/import_weights.py": "--source=in/exported"}
STRINGS = ["", " ", "x", "字/二", "\udcff", "a_folder", "a_file", "a_file/below", "x" * 300,
           "x,y", "text:a_file", "text:a_folder", "messages:x", "%s", "{0}", "~", "-", "..",
           "float16", "a_file|a_folder", "0", "\u2028"]
NUMBERS = ["0", "1", "2", "3", "5", "8", "0.0", "1e-300", "1e-38", "0.5", "0.999999", "1e300",
           "-1", "-0.0", "", "x", "nan", "inf", "一", "1_000", " 3", "1" * 23, str(2 ** 63)]
LARGE = ["100000", "4294967296", str(2 ** 62), str(2 ** 63 - 1)]
HUNGRY = {                                      # large ones take a larger machine, or more time
    "dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "max_seq_len", "batch_tokens",
    "batch_pairs", "n_samples", "n_permutations", "n_bands", "lora_rank", "vocab_size"}
UNTRIED = {"compile", "workers", "device", "max_steps"}      # processes or compilers; time


def prepare_inputs(tok):
    """Make the folder `in` with what the commands read."""
    rng, given = random.Random(0), Path("in")
    given.mkdir()
    shutil.copy(tok.name, "in/tok.model")
    tok = tokenizer.load("in/tok.model")
    save_model("in/start.pt", tok)
    dialogues = [dialogue(rng, 1) for _ in range(9)]
    texts = [story(rng, 3) for _ in range(20)]
    write_pretrain(given / "bins", tok, texts, texts[:2])
    write_sft(given / "sft", tok, dialogues, dialogues[:2])
    pairs = [(QUESTION, "好。", "坏。")] * 4
    write_pairs(given / "dpo", tok, pairs, pairs)
    write_lines("in/a.jsonl", [{"text": text} for text in texts])
    write_lines("in/b.jsonl", [{"messages": turns} for turns in dialogues])
    write_lines("in/test.jsonl", [{"messages": turns} for turns in dialogues[:2]])
    if an_exported_folder in FILES:
        an_exported_folder(given / "exported", tok, rng)


def write_lines(path, records):
    lines = (json.dumps(record) + "\n" for record in records)
    Path(path).write_text("".join(lines))


def odd_value(rng, name, default):
    if isinstance(default, bool):
        return rng.choice(["true", "false", "2", ""])
    if isinstance(default, str):
        return rng.choice(STRINGS)
    return rng.choice(NUMBERS if name in HUNGRY else NUMBERS + LARGE)


@contextlib.contextmanager
def workplace(folder, tok):
    """In a folder with the inputs; afterwards it holds nothing else, and signals act as before."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    is_new = not folder.exists()
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, quiet():
        patch.chdir(folder)
        if is_new:
            prepare_inputs(tok)
        Path("a_folder").mkdir()
        Path("a_file").write_text("字")
        patch.setattr(sys, "stdin", io.StringIO("你好\n"))
        patch.setattr(runtime, "draw_curve", lambda out_dir, title: "no curve")
        patch.setattr(runtime, "matmul_rate", lambda device, dtype: 1e9)
        yield patch
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for path in folder.iterdir():
        if path.is_dir() and path.name != "in":
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def command_line(rng, folder, toks):
    """A script with odd constants does its work, or ends in one sentence before or after."""
    script = rng.choice(list(COMMANDS))
    module = import_module(script.removesuffix(".py").replace("/", "."))
    names = sorted(config.constants_of(ROOT / script).keys() - UNTRIED)
    odd = rng.sample(names, min(len(names), rng.choice([1, 1, 1, 2, 3])))
    odd = [f"--{name}={odd_value(rng, name, getattr(module, name))}" for name in odd]
    with workplace(folder / "commands", toks[0]) as patch:
        patch.setattr(sys, "argv", [script, *COMMANDS[script].split(), *odd])
        code = None
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code
        except Exception as error:
            code = f"{type(error).__name__}\n{error}"              # more than one line, so refused
    if not code:
        return Counter(used=1)
    assert is_sentence(code), f"{script} {odd}: {code}"
    return Counter({f"{script} refused": 1})
