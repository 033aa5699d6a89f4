"""Where the time goes on this machine: training, generation, preparation of data, checkpoints.

    python -m extras.bench                                   a table; also written to out/bench.json
    python -m extras.bench --only=training --dim=768         one part, another shape
    python -m extras.bench --tokenizer=data/tokenizer.model --corpora=text:my_texts      your text

Every part runs in a process of its own. The speed of a machine drifts: things to compare are
measured in turns (A B A B ...). A figure is the median of the turns, with lowest and highest.
"""
import config                                  # before torch: sets how its threads wait
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress

import numpy as np
import sentencepiece
import torch

import pretrain
import runtime
import tokenizer as tokenizers
from checkpoints import load as load_checkpoint, save as save_checkpoint
from corpora import TEXT, Bad, documents, sources
from model import Model, ModelConfig, generate
from optim import make_optimizers

only            = ""                # training | generation | preparation | checkpoints; empty: all
# model: the defaults of pretrain.py and train_tokenizer.py
vocab_size      = 16_384            # rows of the embedding
dim             = 512               # width
n_layers        = 8                 # depth
n_heads         = 4                 # query heads; must divide dim
n_kv_heads      = 0                 # key/value heads; 0: as many as n_heads
hidden_dim      = 0                 # width of the feed-forward layers; 0: 8/3 dim
max_seq_len     = 512               # tokens of a row, and of the longest context
tie_embeddings  = True              # one matrix embeds the tokens and scores them
qk_norm         = True              # RMSNorm on queries and keys
# training
batch_tokens    = 32_768            # tokens per step; on a fast card that of pretrain.py, 131072
micro_batch     = 0                 # rows per forward pass; 0: as many as fit, as in pretrain.py
document_tokens = 300               # mean length of the documents; the lengths are exponential
# generation
prompt_tokens   = 8                 # of the short prompt; the long one just leaves room
new_tokens      = 64                # to generate
# text
tokenizer       = ""                # a sentencepiece file; empty: one of 2,048 pieces, made here
corpora         = ""                # as for prepare_pretrain.py; empty: the demo stories
text_bytes      = 4_000_000         # of it are used
# machine
device          = "auto"            # auto | cuda | mps | cpu
dtype           = "auto"            # auto (bfloat16 if fast) | bfloat16 | float16 | float32
compile         = "auto"            # auto (CUDA, CPUs with a C++ compiler) | on | off
repeats         = 5                 # turns of every measurement
out             = "out/bench.json"  # the same figures for programs
constants = config.override(globals())

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def network():
    try:
        shape = ModelConfig(vocab_size, dim, n_layers, n_heads, n_kv_heads, 0, hidden_dim,
                            max_seq_len, tie_embeddings=tie_embeddings, qk_norm=qk_norm)
    except ValueError as error:
        raise SystemExit(f"bench: {error}") from None
    return Model(shape)


def now():
    """Seconds on the clock, once the device has finished its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def in_turns(*functions):
    """The seconds of each function in every turn, (functions, turns). The first turn warms up."""
    turns = []
    for _ in range(repeats + 1):
        clock = [now()]
        for function in functions:
            function()
            clock.append(now())
        turns.append(np.diff(clock))
    return np.array(turns[1:]).T


# ---- the parts: each returns rows of (what, unit, the values of all turns) -----------------------

def product_rate(device, dtype_name):
    """Floating-point operations per second of a matrix product: the best of a few sizes."""
    rates, dtype = [], getattr(torch, dtype_name)
    # no larger: a run may have filled the memory
    for n in (4096, 8192) if device.type == "cuda" else (1024, 2048, 3072):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        for _ in range(3):
            began = now()
            a @ b
            rates.append(2 * n**3 / (now() - began))
    return max(rates)


def peak_memory(device):
    """The most bytes so far, of tensors on CUDA, else of this process; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def write_bins(folder):
    """Bins like those of prepare_pretrain.py, of random tokens in documents of random lengths.

    Returns their tokenizer, of which pretrain.py needs the numbers only.
    """
    tok = types.SimpleNamespace(name="", sha256="", vocab_size=vocab_size, bos_id=1, eos_id=2,
                                pieces=[b"abc"] * vocab_size)
    rng, dtype_name = np.random.default_rng(0), "uint16" if vocab_size <= 65_536 else "uint32"
    meta = {"format": 1, "tokenizer": "", "tokenizer_sha256": "", "dtype": dtype_name}
    for part, n in ("train", 8 * batch_tokens + 1), ("val", max_seq_len + 1):
        ids = rng.integers(3, vocab_size, n).astype(dtype_name)
        ends = np.cumsum(1 + rng.exponential(document_tokens, n).astype(np.int64))
        ids[ends[ends < n]] = tok.eos_id
        ids.tofile(os.path.join(folder, f"{part}.bin"))
        meta[part] = {"documents": int((ids == tok.eos_id).sum()), "tokens": n, "bytes": 3 * n}
    with open(os.path.join(folder, "meta.json"), "w", encoding="utf-8") as f:
        json.dump(meta, f)
    return tok


class Enough(Exception):
    """The run has been measured."""


class Clock:
    """Stands in for checkpoints.Run: pretrain.py calls log() after every step.

    Keeps the seconds of the steps, and after each the speed of a matrix product. Two steps warm up.
    """

    def __init__(self, out_dir, about, start, process):
        self.device, self.seconds, self.peaks, self.began = process.device, [], [], now()
        self.dtype_name, _, _ = runtime.precision(process.device, dtype)
        clocks.append(self)

    def log(self, row):
        self.seconds.append(now() - self.began)
        if len(self.seconds) == 2:
            self.memory = peak_memory(self.device)             # before there are products
        if len(self.seconds) > 2:
            self.peaks.append(product_rate(self.device, self.dtype_name))
        if len(self.peaks) == repeats:
            raise Enough
        self.began = now()


clocks = []


def training():
    """Steps of pretrain.py itself, on random documents; matrix products in turns with them."""
    if batch_tokens < max_seq_len:
        raise SystemExit(f"bench: batch_tokens ({batch_tokens}) is less than a row, max_seq_len "
                         f"({max_seq_len})")
    model, before = network(), peak_memory(runtime.start(device).device)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        tok = write_bins(folder)
        pretrain.load_tokenizer = lambda name: tok
        pretrain.checkpoints.Run = Clock
        settings = {name: value for name, value in constants.items() if hasattr(pretrain, name)}
        settings.update(data_dir=folder, out_dir=os.path.join(folder, "out"), sample_prompts="",
                        max_steps=1_000_000)               # "auto" decides as for a long run
        vars(pretrain).update(settings)
        with suppress(Enough):
            pretrain.main()
    seconds, peak = np.array(clocks[0].seconds[2:]), np.array(clocks[0].peaks)
    flops = model.flops_per_token(max_seq_len)
    speed = batch_tokens // max_seq_len * max_seq_len / seconds
    rows = [("parameters", "M", [model.n_params() / 1e6]),
            ("training, FLOPs per token", "MFLOP", [flops / 1e6]),
            ("peak: product of matrices", "TFLOP/s", peak / 1e12),
            ("training", "tokens/s", speed),
            ("training, share of the peak (MFU)", "%", 100 * speed * flops / peak)]
    if before is not None:
        memory = (clocks[0].memory - before) / 2**30
        rows.append(("training, peak memory", "GiB", [memory]))
    return rows


def generation():
    """As sample.py generates: tokens/s after the first of each sequence, and the time to that."""
    if prompt_tokens + new_tokens > max_seq_len:
        raise SystemExit(f"bench: prompt_tokens ({prompt_tokens}) and new_tokens ({new_tokens}) "
                         f"together are more than max_seq_len ({max_seq_len})")
    where = runtime.start(device).device
    torch.manual_seed(0)
    model = network().to(where, getattr(torch, runtime.precision(where, dtype)[0])).eval()
    model.norm.weight.data *= 10               # logits as far apart as those of a trained model
    rng, rows = np.random.default_rng(0), []
    wanted = compile == "on" or compile == "auto" and runtime.can_compile(where)
    for is_compiled in [False, True] if wanted else [False]:
        if is_compiled:
            model.compile_generation()
        for B in 1, 16:
            for length in prompt_tokens, max_seq_len - new_tokens:
                prompts, speeds, waits = rng.integers(3, vocab_size, (B, length)).tolist(), [], []
                for _ in range(repeats + 1):
                    clock = [now()]
                    for _ in generate(model, prompts, new_tokens, temperature=0.7, top_p=0.9):
                        clock.append(time.perf_counter())
                    speeds.append(B * (new_tokens - 1) / (clock[-1] - clock[1]))
                    waits.append(1000 * (clock[1] - clock[0]))
                what = f"generation{', compiled' * is_compiled}, batch {B}, context {length} to " \
                       f"{length + new_tokens}"
                rows += [(what, "tokens/s", speeds[1:]), (f"{what}, first token", "ms", waits[1:])]
    return rows


def run(script, *arguments):
    """Run a script of the top level as it is typed; SystemExit with what it says if it fails."""
    done = subprocess.run([sys.executable, os.path.join(ROOT, script), *arguments],
                          capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise SystemExit(f"{script}: {done.stderr.strip()}")


def text(folder):
    """(tokenizer name, a corpus, its clean documents, their MB); the demo's if nothing is given."""
    name, spec = tokenizer, corpora or f"text:{folder}/stories.jsonl"
    if not (tokenizer and corpora):
        run("data/make_demo.py", f"--out_dir={folder}")
    if not tokenizer:
        name = f"{folder}/tokenizer.model"
        run("train_tokenizer.py", f"--corpora=text:{folder}/stories.jsonl", f"--out={name}",
            "--vocab_size=2048", "--max_piece_length=4")
    texts, size, used = [], 0, f"{folder}/used.jsonl"
    for _, document in documents(spec):
        if size >= text_bytes:
            break
        if not isinstance(document, Bad):
            texts.append(document)
            size += len(document.encode())
    with open(used, "w", encoding="utf-8", newline="\n") as f:
        for document in texts:
            f.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
    return name, f"text:{used}", texts, size / 1e6


def preparation():
    """On one core: sentencepiece, our encoder, cleaning; then prepare_pretrain.py itself."""
    with tempfile.TemporaryDirectory() as folder:
        name, spec, texts, size = text(folder)
        tok = tokenizers.load(name)
        bare = sentencepiece.SentencePieceProcessor(model_file=name)
        command = ["prepare_pretrain.py", f"--tokenizer={name}", f"--corpora={spec}",
                   f"--data_dir={folder}/data", "--val_fraction=0.5"]
        alone, ours, clean, all_three, whole, with_duplicates = in_turns(
            lambda: bare.encode(texts, num_threads=1),
            lambda: tok.encode_batch(texts),
            lambda: sum(1 for _ in documents(spec)),
            lambda: tok.encode_batch([document for _, document in documents(spec)]),
            lambda: run(*command),
            lambda: run(*command, "--dedup=false"))
    script = f"prepare_pretrain.py on {size:.1f} MB, its start included"
    return [("one core: sentencepiece alone", "MB/s", size / alone),
            ("one core: encoding", "MB/s", size / ours),
            ("one core: encoding, share of sentencepiece's speed", "%", 100 * alone / ours),
            ("one core: reading and cleaning", "MB/s", size / clean),
            ("one core: reading, cleaning, encoding, share of sentencepiece's speed", "%",
             100 * alone / all_three),
            (script, "MB/s", size / whole),
            (script, "documents/s", len(texts) / whole),
            ("of this: removing duplicates", "%", 100 * (1 - with_duplicates / whole))]


def checkpoints():
    """last.pt of pretrain.py, saved (until it is on the disk) and loaded in turns."""
    model = network()
    optimizers = make_optimizers(model, pretrain.lr, pretrain.muon_lr, pretrain.weight_decay)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()                                       # now there are moments
    state = {"stage": "pretrain", "model": model.state_dict(), "shape": vars(model.config),
             "tokenizer": "", "tokenizer_sha256": "",
             "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    runs = os.path.dirname(out) or "."
    os.makedirs(runs, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=runs) as folder:      # on the disk that the runs use
        path = f"{folder}/last.pt"
        save, load = in_turns(lambda: save_checkpoint(path, state), lambda: load_checkpoint(path))
        return [("last.pt", "MB", [os.path.getsize(path) / 1e6]), ("saving last.pt", "s", save),
                ("loading last.pt", "s", load)]


# ---- the table -----------------------------------------------------------------------------------

PARTS = {part.__name__: part for part in (training, generation, preparation, checkpoints)}


def measured(part):
    """What a part returns, as plain numbers; run in a process of its own."""
    with runtime.memory_advice(globals()):
        return [(what, unit, list(map(float, values))) for what, unit, values in PARTS[part]()]


def machine():
    """What the figures belong to."""
    where = runtime.start(device).device
    return {"device": runtime.hardware(where), "cores": os.cpu_count(),
            "dtype": runtime.precision(where, dtype)[0], "system": platform.system(),
            "python": platform.python_version(), "torch": torch.__version__,
            "date": datetime.date.today().isoformat()}


def number(x):
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def main():
    if only and only not in PARTS:
        raise SystemExit(f"bench: --only={only}: choose one of {', '.join(PARTS)}")
    config.check_range(1, batch_tokens=batch_tokens, max_seq_len=max_seq_len,
                       document_tokens=document_tokens, prompt_tokens=prompt_tokens,
                       new_tokens=new_tokens, text_bytes=text_bytes, repeats=repeats)
    config.check_output("out", out)
    if tokenizer and not tokenizer.endswith(".model"):
        raise SystemExit(f"bench: --tokenizer={tokenizer}: what is compared is sentencepiece; give "
                         "a *.model file")
    if corpora:
        sources(corpora, TEXT)                                 # says at once what is wrong with it
    about, results = machine(), []
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{dim} wide, {n_layers} layers, vocabulary {vocab_size:,}, rows of {max_seq_len}, "
          f"batch_tokens {batch_tokens:,}\n")
    print(f"| | unit | median of {repeats} | range |\n|---|---|---:|---:|", flush=True)
    for part in [only] if only else PARTS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows = pool.submit(measured, part).result()
        for what, unit, values in rows:
            low, median, high = min(values), statistics.median(values), max(values)
            spread = f"{number(low)} to {number(high)}" if len(values) > 1 else ""
            print(f"| {what} | {unit} | {number(median)} | {spread} |", flush=True)
            results.append({"part": part, "what": what, "unit": unit, "median": median, "low": low,
                            "high": high, "values": values})
    with config.whole_file(out) as f:
        json.dump({"machine": about, "constants": constants, "results": results}, f,
                  ensure_ascii=False, indent=1)
    print(f"\nwrote {out}")


if __name__ == "__main__":
    main()
