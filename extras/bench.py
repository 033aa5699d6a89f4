"""Where the time goes on this machine: training, generation, preparation of data, checkpoints.

    python -m extras.bench                                              a table, and the same figures in out/bench.json
    python -m extras.bench --only=training --dim=768 --micro_batch=32   one part, another shape
    python -m extras.bench --tokenizer=data/tokenizer.model --corpora=text:my_texts       your vocabulary, your text

Every part runs in a process of its own. A machine's speed drifts: what is compared is measured in turns (A B A B ...),
and a figure is the median of the turns, or of the ratios of neighbours, with the lowest and the highest beside it.
"""
import config                                  # before torch: sets how its threads wait
import datetime
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import sentencepiece
import torch

from checkpoints import load as load_checkpoint, save as save_checkpoint
import runtime
import tokenizer as tokenizers
from corpora import TEXT, Bad, documents, sources
from model import IGNORE, Model, ModelConfig, generate
from optim import make_optimizers

only            = ""                # training | generation | preparation | checkpoints; empty: all of them
# model: the defaults of pretrain.py and train_tokenizer.py
vocab_size      = 16_384            # rows of the embedding
dim             = 512               # width
n_layers        = 8                 # depth
n_heads         = 4                 # query heads; must divide dim
n_kv_heads      = 0                 # key/value heads; 0: as many as n_heads
hidden_dim      = 0                 # width of the feed-forward layers; 0: 8/3 dim
max_seq_len     = 512               # tokens of a row, and of the longest context
tie_embeddings  = True              # one matrix embeds and scores the tokens
qk_norm         = True              # RMSNorm on queries and keys
# training
batch_tokens    = 131_072           # tokens per step; a round and the update are measured, a step computed of them
micro_batch     = 16                # rows per forward pass
document_tokens = 300               # mean length of the documents that fill the rows; the lengths are exponential
# generation
prompt_tokens   = 8                 # of the short prompt; the long one leaves just room for new_tokens
new_tokens      = 64                # to generate
# text
tokenizer       = ""                # a sentencepiece file; empty: one of 2,048 pieces, trained on the demo stories
corpora         = ""                # name:path,name:path as for prepare_pretrain.py; empty: the demo stories
text_bytes      = 4_000_000         # of it are used
# machine
device          = "auto"            # auto | cuda | mps | cpu
dtype           = "auto"            # auto (bfloat16 where the device has it) | bfloat16 | float16 | float32
compile         = "auto"            # auto (CUDA, CPUs with a C++ compiler) | on | off: torch.compile when training
repeats         = 5                 # turns of every measurement
out             = "out/bench.json"  # the same figures for programs
constants = config.override(globals())

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BOS, EOS = 1, 2
RATES = 6e-3, 5e-3, 0.1             # AdamW's and Muon's learning rate, decay: the speed does not depend on them


def network():
    try:
        return Model(ModelConfig(vocab_size, dim, n_layers, n_heads, n_kv_heads, 0, hidden_dim, max_seq_len,
                                 tie_embeddings=tie_embeddings, qk_norm=qk_norm))
    except ValueError as error:
        raise SystemExit(f"bench: {error}") from None


def now():
    """Seconds on the clock, once the device has done what it was asked."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def in_turns(*functions):
    """The seconds of each function in every turn, (functions, turns), after a turn that warms up."""
    turns = []
    for _ in range(repeats + 1):
        clock = [now()] + [(function(), now())[1] for function in functions]
        turns.append(np.diff(clock))
    return np.array(turns[1:]).T


# ---- the parts: each returns rows of (what, unit, the values of all turns) ------------------------------------------

def product_rate(where, name):
    """Floating-point operations per second of a matrix product: the best of a few sizes, each tried a few times."""
    rates = []
    for n in (4096, 8192, 16384) if where.type == "cuda" else (1024, 2048, 3072):
        a, b = (torch.randn(n, n, device=where, dtype=getattr(torch, name)) for _ in range(2))
        for _ in range(3):
            began = now()
            a @ b
            rates.append(2 * n ** 3 / (now() - began))
    return max(rates)


def packed_documents(path, n_tokens):
    """A file like train.bin, of random tokens in documents of random lengths; returns it, mapped."""
    rng = np.random.default_rng(0)
    data = rng.integers(3, min(vocab_size, 1 << 16), n_tokens, dtype=np.uint16)
    ends = np.cumsum(1 + rng.exponential(document_tokens, n_tokens).astype(np.int64))
    data[ends[ends < n_tokens]] = EOS
    data.tofile(path)
    return np.memmap(path, "<u2", "r")


def read_batch(data, rows, where, masked):
    """As in pretrain.py: inputs and targets (B, T), and the starts of the documents, or None if not masked."""
    tokens = np.full((len(rows), max_seq_len + 1), -1, dtype=np.int64)
    for line, row in zip(tokens, rows):
        piece = data[int(row) * max_seq_len:(int(row) + 1) * max_seq_len + 1]
        line[:len(piece)] = piece
    x, y = tokens[:, :-1], np.where(tokens[:, 1:] < 0, IGNORE, tokens[:, 1:])
    starts = (x == EOS) | (np.arange(max_seq_len) == 0)
    x = np.where((x == EOS) | (x < 0), BOS, x)
    cu_seqlens = np.append(np.flatnonzero(starts), x.size).astype(np.int32) if masked else None
    return [runtime.to_device(a, where) for a in (x, y, cu_seqlens)]


def optimizer_step(data, rows, masked, model, forward, optimizers, autocast, scaler):
    """A step of pretrain.py in one round: (loss, norm, the seconds of reading, of both passes, of the update)."""
    clock, n_targets = [now()], len(rows) * max_seq_len
    x, y, cu_seqlens = read_batch(data, rows, model.norm.weight.device, masked)
    clock.append(time.perf_counter())                              # the copy to a GPU need not have ended
    with autocast:
        loss = forward(x, y, cu_seqlens)
    scaler.scale(loss * (1 / n_targets)).backward()
    clock.append(now())
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    train_loss = loss.item() / n_targets
    if math.isfinite(grad_norm + train_loss):
        for optimizer in optimizers:
            optimizer.step()
    scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return train_loss, grad_norm, np.diff(clock + [now()])


def peak_memory(where):
    """The most bytes so far: of tensors on CUDA, else of this process, whose parent must be small; None on Windows."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def training():
    """Products, steps with the document mask and steps without, in turns."""
    process = runtime.start(device)
    where = process.device
    name, autocast, scaler = runtime.precision(where, dtype)
    before = peak_memory(where)
    torch.manual_seed(0)
    model = network().to(where)
    setup = dict(model=model, forward=runtime.compiled(model, compile, process, math.inf), autocast=autocast,
                 scaler=scaler, optimizers=make_optimizers(model, *RATES, name))    # inf: as for a long run
    rounds, n_rows, turns = max(1, batch_tokens / (micro_batch * max_seq_len)), 8 * micro_batch, []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        data = packed_documents(os.path.join(folder, "train.bin"), n_rows * max_seq_len + 1)
        for turn in range(repeats + 2):                            # two turns to warm up: compiling, buffers
            rows = runtime.batch_rows(turn, micro_batch, n_rows, seed=0)
            masked, whole = (optimizer_step(data, rows, mask, **setup)[2] * [rounds, rounds, 1]
                             for mask in (True, False))
            if turn == 1:
                memory = peak_memory(where)                        # before there are products
            turns.append([product_rate(where, name) if turn > 1 else 0, *masked, whole.sum()])
    peak, reading, passes, update, unmasked = np.array(turns[2:]).T
    step, flops = reading + passes + update, model.flops_per_token(max_seq_len)
    speed = rounds * micro_batch * max_seq_len / step
    return [("parameters", "M", [model.n_params() / 1e6]),
            ("training, FLOPs per token", "MFLOP", [flops / 1e6]),
            (f"peak: product of matrices, {name}", "TFLOP/s", peak / 1e12),
            ("training", "tokens/s", speed),
            ("training, share of the peak (MFU)", "%", 100 * speed * flops / peak),
            *([] if before is None else [("training, peak memory", "GiB", [(memory - before) / 2 ** 30])]),
            ("of a step: reading batches", "%", 100 * reading / step),
            ("of a step: forward and backward", "%", 100 * passes / step),
            ("of a step: clipping and update", "%", 100 * update / step),
            ("a step with the document mask / without", "times", step / unmasked)]


def generation():
    """As sample.py generates: tokens/s behind the first of each sequence, milliseconds to the first."""
    if prompt_tokens + new_tokens > max_seq_len:
        raise SystemExit(f"bench: prompt_tokens ({prompt_tokens}) and new_tokens ({new_tokens}) together are more "
                         f"than max_seq_len ({max_seq_len})")
    where = runtime.start(device).device
    torch.manual_seed(0)
    model = network().to(where, getattr(torch, runtime.precision(where, dtype)[0])).eval()
    model.norm.weight.data *= 10              # logits as far apart as trained ones: flat ones would all be sorted
    cases, found = [(B, length) for B in (1, 16) for length in (prompt_tokens, max_seq_len - new_tokens)], []
    for _ in range(repeats + 1):
        for B, length in cases:
            prompts, clock = np.random.default_rng(0).integers(3, vocab_size, (B, length)).tolist(), [now()]
            for _ in generate(model, prompts, new_tokens, temperature=0.7, top_p=0.9):
                clock.append(time.perf_counter())
            found.append((B * (new_tokens - 1) / (clock[-1] - clock[1]), 1000 * (clock[1] - clock[0])))
    found = np.array(found[len(cases):]).reshape(repeats, len(cases), 2)
    return [(f"generation, batch {B}, context {length} to {length + new_tokens}{of}", unit, found[:, i, k])
            for i, (B, length) in enumerate(cases)
            for k, (of, unit) in enumerate([("", "tokens/s"), (", first token", "ms")])]


def run(script, *arguments):
    """Run a script of the top level as it is typed; SystemExit with what it says if it fails."""
    done = subprocess.run([sys.executable, os.path.join(ROOT, script), *arguments], capture_output=True, text=True,
                          encoding="utf-8", errors="replace")
    if done.returncode:
        raise SystemExit(f"{script}: {done.stderr.strip()}")


def text(folder):
    """(tokenizer name, its text as a corpus, the clean documents, their MB); of the demo where nothing is given."""
    name, spec, used = tokenizer, corpora or f"text:{folder}/stories.jsonl", f"{folder}/used.jsonl"
    if not (tokenizer and corpora):
        run("data/make_demo.py", f"--out_dir={folder}")
    if not tokenizer:
        name = f"{folder}/tokenizer.model"
        run("train_tokenizer.py", f"--corpora=text:{folder}/stories.jsonl", f"--out={name}", "--vocab_size=2048",
            "--max_piece_length=4")
    texts, size = [], 0
    for _, document in documents(spec):
        if size >= text_bytes:
            break
        if not isinstance(document, Bad):
            texts.append(document)
            size += len(document.encode())
    with open(used, "w", encoding="utf-8", newline="\n") as f:
        f.writelines(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in texts)
    return name, f"text:{used}", texts, size / 1e6


def preparation():
    """On one core sentencepiece alone, our encoder, what comes before it; and prepare_pretrain.py as it is typed."""
    with tempfile.TemporaryDirectory() as folder:
        name, spec, texts, size = text(folder)
        tok, bare = tokenizers.load(name), sentencepiece.SentencePieceProcessor(model_file=name)
        command = ["prepare_pretrain.py", f"--tokenizer={name}", f"--corpora={spec}", f"--data_dir={folder}/data",
                   "--val_fraction=0.5"]
        alone, ours, clean, all_three, whole, with_duplicates = in_turns(
            lambda: bare.encode(texts, num_threads=1),
            lambda: tok.encode_batch(texts),
            lambda: sum(1 for _ in documents(spec)),
            lambda: tok.encode_batch([document for _, document in documents(spec)]),
            lambda: run(*command),
            lambda: run(*command, "--dedup=false"))
    return [("one core: sentencepiece alone", "MB/s", size / alone),
            ("one core: encoding", "MB/s", size / ours),
            ("one core: encoding, share of sentencepiece's speed", "%", 100 * alone / ours),
            ("one core: reading and cleaning", "MB/s", size / clean),
            ("one core: reading, cleaning, encoding, share of sentencepiece's speed", "%", 100 * alone / all_three),
            (f"prepare_pretrain.py on {size:.1f} MB, its start included", "MB/s", size / whole),
            (f"prepare_pretrain.py on {size:.1f} MB, its start included", "documents/s", len(texts) / whole),
            ("of this: removing duplicates", "%", 100 * (1 - with_duplicates / whole))]


def checkpoints():
    """last.pt of pretrain.py, saved (until it is on the disk) and loaded in turns."""
    model = network()
    optimizers = make_optimizers(model, *RATES)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()                                           # now there are moments
    state = {"stage": "pretrain", "model": model.state_dict(), "shape": vars(model.config), "tokenizer": "",
             "tokenizer_sha256": "", "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(out) or ".") as folder:          # on the disk of the runs
        path = f"{folder}/last.pt"
        save, load = in_turns(lambda: save_checkpoint(path, state), lambda: load_checkpoint(path))
        return [("last.pt", "MB", [os.path.getsize(path) / 1e6]), ("saving last.pt", "s", save),
                ("loading last.pt", "s", load)]


# ---- the table ------------------------------------------------------------------------------------------------------

PARTS = {part.__name__: part for part in (training, generation, preparation, checkpoints)}


def measured(part):
    """What a part returns, as plain numbers; run in a process of its own."""
    with runtime.memory_advice(micro_batch):
        return [(what, unit, [float(value) for value in values]) for what, unit, values in PARTS[part]()]


def machine():
    """What the figures belong to."""
    where = runtime.start(device).device
    return {"device": runtime.hardware(where), "cores": os.cpu_count(), "dtype": runtime.precision(where, dtype)[0],
            "system": platform.system(), "python": platform.python_version(), "torch": torch.__version__,
            "date": datetime.date.today().isoformat()}


def number(x):
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def main():
    if only and only not in PARTS:
        raise SystemExit(f"bench: --only={only}: choose one of {', '.join(PARTS)}")
    config.check_range(1, batch_tokens=batch_tokens, micro_batch=micro_batch, max_seq_len=max_seq_len,
                       document_tokens=document_tokens, prompt_tokens=prompt_tokens,
                       new_tokens=new_tokens, text_bytes=text_bytes, repeats=repeats)
    if tokenizer and not tokenizer.endswith(".model"):
        raise SystemExit(f"bench: --tokenizer={tokenizer}: what is compared is sentencepiece; give a *.model file")
    if corpora:
        sources(corpora, TEXT)                                     # says at once what is wrong with it
    about, results = machine(), []
    print(", ".join(f"{name} {value}" for name, value in about.items()), f"{dim} wide, {n_layers} layers, "
          f"vocabulary {vocab_size:,}, rows of {max_seq_len}, micro_batch {micro_batch}\n", sep="\n")
    print(f"| | unit | median of {repeats} | range |\n|---|---|---:|---:|", flush=True)
    for part in [only] if only else PARTS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            for what, unit, values in pool.submit(measured, part).result():
                low, median, high = min(values), statistics.median(values), max(values)
                spread = f"{number(low)} to {number(high)}" if len(values) > 1 else ""
                print(f"| {what} | {unit} | {number(median)} | {spread} |", flush=True)
                results.append(dict(part=part, what=what, unit=unit, median=median, low=low, high=high, values=values))
    with config.whole_file(out) as f:
        json.dump({"machine": about, "constants": constants, "results": results}, f, ensure_ascii=False, indent=1)
    print(f"\nwrote {out}")


if __name__ == "__main__":
    main()
