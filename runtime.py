"""What both training loops need and neither is there to teach: processes, precision, the order of the data,
checkpoints, the log and its picture. Knows nothing of what is inside the network.
"""
import csv
import ctypes
import functools
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import config
import tokenizer as tokenizers

FORMAT = 1                                    # of checkpoints and bins; a newer one is refused, not guessed at
NEEDS = (2, 6)                                # the oldest PyTorch that the tests were run with

if tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) < NEEDS:
    raise SystemExit(f"PyTorch {torch.__version__} is installed, but this needs {NEEDS[0]}.{NEEDS[1]} or newer: "
                     "pip install --upgrade torch")


# -----------------------------------------------------------------------------------------------------------------
# processes and precision

@dataclass
class Process:
    """This process among those that train together."""
    rank: int
    local_rank: int                           # among the processes of this machine
    world_size: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0

    def print(self, *words):
        """Print, on the main process only and above the progress bar."""
        if self.is_main:
            tqdm.write(" ".join(map(str, words)))
            sys.stdout.flush()


def start(device, batch_rows=1, constants=()):
    """Join the processes that torchrun started, or be the only one; returns a Process.

    device: auto (CUDA, else Apple's MPS, else CPU) or one of cuda, mps, cpu. CUDA processes talk through NCCL, CPU
    processes through gloo. Raises SystemExit, before any process waits for another, where the device is not there or
    batch_rows, the rows of the global batch, do not give every process one; and behind that if the processes were
    started with different constants.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(name for name, is_usable in usable.items() if is_usable) if device == "auto" else device
    problem = None if usable["cuda"] else unusable_card()
    if not usable.get(kind):
        raise SystemExit(f"--device={device} is not usable here, but {', '.join(d for d in usable if usable[d])} is"
                         + f". {problem}" * (kind == "cuda" and problem is not None))
    if device == "auto" and problem and rank == 0:
        print(problem, flush=True)
    if kind == "mps" and world_size > 1:
        raise SystemExit("Apple's MPS has one device and no collective operations: run without torchrun")
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise SystemExit(f"{local_size} processes on this machine, but {torch.cuda.device_count()} GPUs: "
                             f"torchrun --nproc_per_node={torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")          # TF32 for what is left in float32
    if kind == "cpu" and world_size > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, os.cpu_count() // local_size))         # torchrun sets 1 where nothing is set
    if batch_rows < world_size:
        raise SystemExit(f"batch_tokens is {batch_rows} rows of max_seq_len tokens, and each of the {world_size} processes "
                         "needs one at least")
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if world_size > 1:
        threading.Thread(target=end_without_parent, args=(os.getppid(),), daemon=True).start()
        wait_for_others(rank, world_size)
        nccl = kind == "cuda" and dist.is_nccl_available()     # PyTorch for Windows has none
        dist.init_process_group("nccl" if nccl else "gloo", store=dist.PrefixStore("group", message_store()),
                                rank=rank, world_size=world_size, device_id=device if nccl else None)
    process = Process(rank, local_rank, world_size, device)
    check_equal(constants, process)
    return process


def unusable_card():
    """A sentence about an NVIDIA card that PyTorch cannot use, and what to do; None if there is no such card."""
    if not (os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi")):
        return None
    if not torch.version.cuda:
        return (f"This machine has an NVIDIA card, but PyTorch {torch.__version__} was built without CUDA: install "
                "another build (the README has the commands)")
    try:
        torch.cuda.init()
        reason = "PyTorch sees no device; check nvidia-smi and CUDA_VISIBLE_DEVICES"
    except (RuntimeError, AssertionError) as error:            # its text names an old driver, for example
        reason = str(error).splitlines()[0]
    return f"This machine has an NVIDIA card that PyTorch {torch.__version__} cannot use: {reason}"


def end_without_parent(parent):
    """Exit if torchrun died: an orphan would keep writing beside the resumed run."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


store = None


def message_store(timeout=timedelta(minutes=30)):
    """The store in which the processes leave messages before they form a group, and with which they form it: a second
    one in the same place fails outside of torchrun."""
    global store
    store = store or next(dist.rendezvous("env://", timeout=timeout))[0]
    return store


def wait_for_others(rank, world_size):
    """Wait until all processes are about to begin; SystemExit if one of them, perhaps on another machine, cannot."""
    try:
        message_store().set(f"process {rank}", "")
        sentences = [message_store().get(f"process {other}").decode() for other in range(world_size)]
    except dist.DistError as error:
        raise SystemExit(f"process {rank}: the others did not come ({error}); see what they say") from None
    for other, sentence in enumerate(sentences):
        if sentence:
            raise SystemExit(f"process {other} cannot begin: {sentence}")


@contextmanager
def ending_together():
    """Tell the processes that wait for this one if it ends before it joins them: they would wait for half an hour."""
    try:
        yield
    except SystemExit as stopped:
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if world_size > 1 and stopped.code and not dist.is_initialized():
            minute = timedelta(minutes=1)
            try:
                message_store(minute).set(f"process {rank}", str(stopped.code))
                message_store().wait([f"process {other}" for other in range(world_size)], minute)
            except dist.DistError:                                  # they have ended, too
                pass
        raise


def override(namespace):
    """config.override() for the scripts that torchrun starts: a constant that is wrong on one machine ends all."""
    with ending_together():
        return config.override(namespace)


def finish():
    if dist.is_initialized():
        dist.destroy_process_group()


def total(values, process):
    """The sums over all processes of a list of numbers, as floats."""
    if process.world_size == 1:
        return [float(v) for v in values]
    sums = torch.tensor([float(v) for v in values], dtype=torch.float64, device=process.device)
    dist.all_reduce(sums)
    return sums.tolist()


def check_equal(constants, process):
    """All processes must run the same constants; SystemExit on every one of them names those that differ."""
    if process.world_size == 1:
        return
    everyone = [None] * process.world_size
    dist.all_gather_object(everyone, constants)
    differ = [name for name in constants if any(other.get(name) != everyone[0].get(name) for other in everyone)]
    if differ:
        finish()
        raise SystemExit(f"the processes do not agree on {', '.join(differ)}: start them with the same constants, and "
                         "on several machines with the same files (or one shared folder)")


def precision(device, dtype):
    """(name, autocast context, GradScaler) for dtype = auto | bfloat16 | float16 | float32.

    auto: bfloat16 where the device multiplies it natively (CUDA from Ampere on, CPUs with AVX512-BF16 or AMX),
    float16 on older CUDA cards, float32 elsewhere. Weights stay float32; only the products are in half precision.
    Only float16 needs its loss scaled (Micikevicius et al. 2017, arXiv:1710.03740): the scaler is off otherwise.
    """
    kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype == "auto":
        dtype = "bfloat16" if has_fast_bfloat16(device) else "float16" if device.type == "cuda" else "float32"
    if dtype not in kinds:
        raise SystemExit(f"--dtype={dtype}: choose auto, bfloat16, float16 or float32")
    half = dtype != "float32"
    autocast = torch.autocast(device.type, dtype=kinds[dtype]) if half else nullcontext()
    return dtype, autocast, torch.amp.GradScaler(device.type, enabled=dtype == "float16")


def has_fast_bfloat16(device):
    """Whether matrix products in bfloat16 are faster than in float32 there: CUDA from Ampere on, recent CPUs."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def compiled(model, choice, process, tokens):
    """The model; its blocks compiled, one for all as they are alike, if choice (auto | on | off) says so.

    auto: on CUDA where Triton is installed, and on a CPU with a C++ compiler for runs of many tokens: the speed of the
    steps (1.4 times on a CPU) then repays the half minute at the start. A function of the whole run, not of what is left.
    """
    if choice not in ("auto", "on", "off"):
        raise SystemExit(f"--compile={choice}: choose auto, on or off")
    if choice == "auto":
        if process.device.type == "cuda":
            choice = "on" if importlib.util.find_spec("triton") else "off"
        elif process.device.type == "cpu":
            header = os.path.join(sysconfig.get_path("include"), "Python.h")
            there = os.path.exists(header) and (shutil.which("g++") or shutil.which("clang++"))
            choice = "on" if there and tokens * model.flops_per_token(0) > 2e14 else "off"
    if choice == "on":
        model.compile()
    return model


def keep_freed_memory():
    """Have glibc keep what it is given back, for generation: else it takes every tensor of more than 128 KiB from the
    kernel anew, page by page. Batches of 16 become 1.08 times as fast; training gains nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):              # not Linux, or another C library
        return
    mallopt(-3, 32 << 20)                     # M_MMAP_THRESHOLD, its maximum
    mallopt(-1, 2**31 - 1)                    # M_TRIM_THRESHOLD


def matmul_rate(device, dtype):
    """Floating-point operations per second of a large matrix product in this dtype, measured now (well under 1 s)."""
    n, seconds = 128, 0.0
    while n < 8192 and seconds < 0.01:         # a product of the size that this device computes in some 10 ms or more
        n *= 2
        a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
        times = []
        for _ in range(3):                     # the first warms up; .item() waits for the device
            begin = time.perf_counter()
            (a @ a)[0, 0].item()
            times.append(time.perf_counter() - begin)
        seconds = min(times)
    return 2 * n**3 / seconds


def parallel(model, process):
    """The model in DistributedDataParallel, with one process as it is; both have no_sync()."""
    if process.world_size == 1:
        model.no_sync = nullcontext
        return model
    return DistributedDataParallel(model, device_ids=[process.local_rank] if process.device.type == "cuda" else None,
                                   gradient_as_bucket_view=True)            # no second copy of the gradients


def rows_that_fit(model, process, dtype, batch_rows, T):
    """As many rows of T tokens, a power of two, as the free memory of a CUDA device holds by the model's own estimate.
    Elsewhere 16: more are not faster there."""
    if process.device.type != "cuda":
        return 16
    free, itemsize = 0.9 * torch.cuda.mem_get_info(process.device)[0], 4 if dtype == "float32" else 2
    already = 4 * model.n_params()             # the weights lie there
    rows = 1
    while rows < batch_rows / process.world_size and \
            model.bytes_to_train(2 * rows * T, itemsize) - already < free:
        rows *= 2
    return rows


def hardware(device):
    """What computes, in words: the graphics card's name, or the processor's and the threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            name = next((line.partition(":")[2].strip() for line in f if line.startswith("model name")), name)
    return f"{name}, threads: {torch.get_num_threads()}"


def announce(model, process, dtype, steps, batch_rows, micro_batch, n_rows, T):
    """Say before the first step what the run, of rows of T tokens, is and what it will cost; returns {what: sentence}."""
    tokens, a_round = steps * batch_rows * T, min(micro_batch, math.ceil(batch_rows / process.world_size))
    memory = model.bytes_to_train(a_round * T, 4 if dtype == "float32" else 2)
    flops, rate = model.flops_per_token(T), matmul_rate(process.device, dtype)
    seconds, rate = tokens * flops / (0.35 * rate * process.world_size), f"{process.world_size} x {rate:.3g} FLOP/s"
    said = {
        "device": f"{process.world_size} x {process.device.type} ({hardware(process.device)}), PyTorch "
                  f"{torch.__version__}, products in {dtype}",
        "attention": "packed documents by FlashAttention" if model.has_packed_attention(getattr(torch, dtype)) else
                     "packed documents by a mask over whole rows",
        "parameters": f"{model.n_params():,}, of which {model.embedding.weight.numel():,} embed the tokens",
        "step": f"{batch_rows * T:,} tokens = {batch_rows} rows of {T}, at most {a_round} at a time in each process",
        "training": f"{steps:,} steps = {tokens:,} tokens = {steps * batch_rows / n_rows:.2f} epochs of {n_rows:,} rows",
        "memory": f"about {memory / 2**30:.1f} GiB a process: weights, gradients, moments, activations of {a_round} rows, "
                  "logits",
        "time": f"about {seconds_as_text(seconds)} = {tokens:.3g} tokens x {flops:.3g} FLOP / (35 % of {rate} measured)",
    }
    process.print("\n".join(f"{what:<11} {sentence}" for what, sentence in said.items()))
    return said


def to_device(array, device):
    """A numpy array, or None, as a tensor there; the copy to a GPU does not wait for the GPU's work."""
    if array is None:
        return None
    t = torch.from_numpy(array)
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


def seconds_as_text(seconds):
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else \
        f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


class StopRequest:
    """True once SIGINT or SIGTERM came: the loop then ends its step and saves. A second SIGINT quits at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.asked and number == signal.SIGINT:
            sys.stderr.write("\nstopped at once; what was saved last is whole\n")
            os._exit(130)
        self.asked = True
        sys.stderr.write("\nstopping after this step (Ctrl-C again: at once)\n")

    def __bool__(self):
        return self.asked


# -----------------------------------------------------------------------------------------------------------------
# the order of the data

@functools.lru_cache(maxsize=2)
def epoch_order(n_rows, seed, epoch):
    """All rows in the random order of one epoch, (n_rows,) uint32: a function of seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(np.arange(n_rows, dtype=np.uint32))


def batch_rows(step, batch_size, n_rows, seed):
    """The rows of the global batch of `step`, (batch_size,): the step-th slice of epoch after epoch without end.

    It depends on nothing that has happened before, so a resumed run continues exactly, and on nothing else than the
    step, so any number of processes sees the same batches. Every row comes once per epoch.
    """
    at = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([epoch_order(n_rows, seed, int(i // n_rows))[i % n_rows] for i in at])


def micro_batches(rows, micro_batch, process):
    """This process's share of the global batch, cut into pieces of at most micro_batch rows."""
    mine = rows[process.rank::process.world_size]
    return [mine[i:i + micro_batch] for i in range(0, len(mine), micro_batch)]


# -----------------------------------------------------------------------------------------------------------------
# files

def read_meta(path, tokenizer, made_by):
    """meta.json beside the bins; SystemExit if it is not there, is newer, or belongs to another tokenizer."""
    if not os.path.exists(path):
        raise SystemExit(f"{path}: not there; run python {made_by} first")
    try:
        with open(path, encoding="utf-8") as f:
            meta = json.load(f)
    except ValueError:
        raise SystemExit(f"{path}: not a whole JSON file; run python {made_by} again") from None
    if not isinstance(meta, dict) or not {"format", "tokenizer", "tokenizer_sha256", "train", "val"} <= meta.keys():
        raise SystemExit(f"{path}: not what {made_by} writes; run python {made_by} again")
    if meta["format"] != FORMAT:
        raise SystemExit(f"{path}: format {meta['format']}, this code reads {FORMAT}; run python {made_by} again")
    if meta["tokenizer_sha256"] != tokenizer.sha256:
        made_with = f"{meta['tokenizer']} ({meta['tokenizer_sha256'][:8]})"
        raise SystemExit(f"{path}: made with {made_with}, but {tokenizer.name} is {tokenizer.sha256[:8]}; "
                         f"run python {made_by} again, or name the other with --tokenizer=")
    return meta


def open_bin(path, dtype, length, made_by, below=None):
    """A flat array on disk, read where it is touched.

    SystemExit if it has not the length that meta.json says, or holds a number that is not below `below`.
    """
    expected = length * np.dtype(dtype).itemsize
    there = os.path.getsize(path) if os.path.exists(path) else "missing"
    if there != expected:
        raise SystemExit(f"{path}: {there}, where meta.json says {expected} bytes; run python {made_by} again")
    data = np.memmap(path, dtype=dtype, mode="r") if length else np.zeros(0, dtype)
    for at in range(0, length if below else 0, 1 << 24):
        if (largest := data[at:at + (1 << 24)].max()) >= below:
            raise SystemExit(f"{path}: holds token {largest}, but the tokenizer has {below:,}; "
                             f"run python {made_by} again")
    return data


def save_checkpoint(path, state):
    with config.whole_file(path, "wb") as f:
        torch.save({"format": FORMAT, **state}, f)


def load_checkpoint(path, device="cpu"):
    """The dict that save_checkpoint() wrote; SystemExit if it is missing, not whole, newer, or holds more than data.

    weights_only: a checkpoint from elsewhere can carry tensors and plain values, but no code that runs.
    """
    if os.path.isdir(path):
        raise SystemExit(f"{path}: a folder, not a checkpoint; `python -m extras.import_weights --source={path}` makes "
                         "one of a Hugging Face folder")
    if not os.path.exists(path):
        raise SystemExit(f"{path}: no such checkpoint; train one first, or name another")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:                                # a damaged pickle raises almost anything
        reason = "refused: it holds more than tensors and plain values" if "weights_only" in str(error) else "not whole"
        raise SystemExit(f"{path}: {reason}; take another checkpoint") from None
    needed = {"stage", "model", "shape", "tokenizer", "tokenizer_sha256"}
    if not isinstance(state, dict) or state.get("format") != FORMAT or not needed <= state.keys():
        raise SystemExit(f"{path}: not a checkpoint of this version (format {FORMAT})")
    return state


def fingerprint(path):
    """The first 8 hex digits of a file's SHA-256: says which checkpoint a score belongs to."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:8]


def load_with_tokenizer(path, tokenizer=""):
    """The checkpoint of load_checkpoint() and its tokenizer: the one at `tokenizer`, or where the checkpoint says.
    SystemExit if it is not the one that the model was trained with."""
    saved = load_checkpoint(path)
    tok = tokenizers.load(tokenizer or saved["tokenizer"])
    if tok.sha256 != saved["tokenizer_sha256"]:
        raise SystemExit(f"{path} was trained with {saved['tokenizer']} as it was then, which is not {tok.name}")
    return saved, tok


def open_run(out_dir, resume, overwrite, stage, identity):
    """The checkpoint to go on with, or None to start anew. SystemExit rather than lose a run or mix two.

    identity: what makes a run this one, {name: value}: the model's shape, the tokenizer, the order of the data.
    """
    path = f"{out_dir}/last.pt"
    if not os.path.exists(path):
        if resume:
            print(f"{path}: not there yet, nothing to resume; starting at step 0", flush=True)
        return None
    if not resume and not overwrite:
        raise SystemExit(f"{path} is there: --resume goes on with it, --out_dir=... starts beside it, --overwrite "
                         "starts anew in its place")
    if not resume:
        return None
    saved = load_checkpoint(path)
    if saved["stage"] != stage or "optimizers" not in saved:
        raise SystemExit(f"{path}: made by {saved['stage']}.py{', as best.pt' * ('optimizers' not in saved)}; only the "
                         f"last.pt of {stage}.py can be resumed here")
    differ = [f"{name} (then {saved['identity'].get(name)}, now {value})" for name, value in identity.items()
              if saved["identity"].get(name) != value]
    if differ:
        raise SystemExit(f"{path} is of a run with another {', '.join(differ)}; resume it with the constants it had")
    return saved


@contextmanager
def memory_advice(constants):
    """Turn running out of memory into a sentence that says what to lower. constants: the script's globals()."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        rows = constants["micro_batch"]
        advice = f"--micro_batch={rows // 2}: half the activations, the same batch and the same result" \
            if rows > 1 else "rows of half the length (--max_seq_len), or a smaller model"
        raise SystemExit(f"out of memory; try {advice}") from None


def restore(saved, model, optimizers, scaler):
    """Put a saved run's state back; returns (steps done, best validation loss, steps skipped).

    That is all there is: the order of the data is a function of the step, and nothing else is random in training.
    """
    if saved is None:
        return 0, math.inf, 0
    model.load_state_dict(saved["model"])
    if len(optimizers) != len(saved["optimizers"]):
        raise SystemExit("last.pt is of a run with Muon and this one is without, or the reverse: give muon_lr as then")
    for optimizer, state in zip(optimizers, saved["optimizers"]):
        now = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, constants in zip(optimizer.param_groups, now):
            group.update(constants)            # learning rates and decay are those of now, the moments those of then
    scaler.load_state_dict(saved["scaler"])
    return saved["step"], saved["best"], saved["skipped"]


def refuse_to_save_nan(model, step, out_dir):
    """SystemExit, on every process, if a weight is no longer finite: last.pt then still is."""
    if not all(bool(w.isfinite().all()) for w in model.parameters()):
        raise SystemExit(f"step {step}: the weights are no longer finite; nothing of it was saved: --resume goes on "
                         f"from {out_dir}/last.pt, with a lower learning rate for instance")


class Meter:
    """The progress bar, a printed line every few steps with the speed since the last one, and the speed of it all."""

    def __init__(self, start, max_steps, process):
        self.start, self.max_steps, self.process = start, max_steps, process
        self.bar = tqdm(total=max_steps, initial=start, unit="step", disable=None if process.is_main else True)
        self.began = self.clock = time.perf_counter()
        self.last, self.step_1 = start, 0.0

    def step(self, row, skipped, interval):
        """Count a step, whose row for the log this is; say how it goes at every interval-th."""
        self.bar.update()
        self.now = row
        if row["step"] == self.start + 1:      # it compiled, perhaps: the speed of all is measured from here on
            self.step_1 = time.perf_counter()
        if row["step"] % interval and row["step"] != self.max_steps:
            return
        steps_per_s = (row["step"] - self.last) / (time.perf_counter() - self.clock)
        speed, left = steps_per_s * row["tokens"] / row["step"], (self.max_steps - row["step"]) / steps_per_s
        self.process.print(f"step {row['step']:>6}/{self.max_steps}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
                           f"norm {row['grad_norm']:.2f}  {speed:,.0f} tokens/s  {seconds_as_text(left)} left"
                           + f"  {skipped} skipped" * (skipped > 0))
        self.clock, self.last = time.perf_counter(), row["step"]

    @contextmanager
    def paused(self):
        """Validation does not count in the speed of training."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self.clock, self.step_1 = self.clock + seconds, self.step_1 + seconds

    def save(self, path, said):
        """Note in run.json how long the run took so far, session by session: log.csv holds no times, it is to be the
        same after resuming. said: what announce() returned.
        """
        if self.process.is_main:
            step, now = self.now["step"], time.perf_counter()
            session = {"from_step": self.start, "to_step": step, "seconds": now - self.began,
                       "timed_tokens": self.now["tokens"] // step * (step - self.start - 1),
                       "timed_seconds": now - self.step_1, "date": time.strftime("%Y-%m-%d"),
                       "torch": torch.__version__, **said}
            with config.whole_file(path) as f:
                json.dump([*read_run(path, self.start), session], f, indent=1)

    def close(self):
        self.bar.close()


def read_run(path, last_step=math.inf):
    """The sessions in a run.json that ended at last_step or before; none if there is no such file."""
    try:
        with open(path, encoding="utf-8") as f:
            return [session for session in json.load(f) if session["to_step"] <= last_step]
    except (OSError, ValueError, TypeError, KeyError):                  # no reason to end a run that trains well
        return []


class Log:
    """log.csv, one row a step, written by the main process only. After resuming no step is there twice."""

    def __init__(self, path, last_step, process):
        columns = ["step", "tokens", "lr", "loss", "grad_norm", "val_loss", "val_bpb"]
        self.file = None
        if process.is_main:
            kept = [row for row in read_log(path) if int(row["step"]) <= last_step]
            with config.whole_file(path) as f:
                writer = csv.DictWriter(f, columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(kept)
            self.file = open(path, "a", encoding="utf-8", newline="")
            self.writer = csv.DictWriter(self.file, columns, lineterminator="\n")

    def row(self, **values):
        if self.file:
            with config.disk_space(self.file.name):
                self.writer.writerow(values)

    def flush(self):
        """Bring the rows to the disk: before a checkpoint, so that the log is never behind it."""
        if self.file:
            with config.disk_space(self.file.name):
                self.file.flush()
                os.fsync(self.file.fileno())


def read_log(path):
    """The rows of a log.csv as dicts of strings; a last line that was being written when the run died is left out."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", newline="") as f:
        text = f.read()
    return list(csv.DictReader(text[:text.rfind("\n") + 1].splitlines()))


def draw_curve(out_dir, title):
    """log.csv -> curve.png, loss over steps; returns the picture's path, or a sentence why it is not drawn."""
    try:
        import matplotlib
    except ImportError:
        return "no curve drawn: pip install matplotlib"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = read_log(f"{out_dir}/log.csv")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([int(r["step"]) for r in rows], [float(r["loss"]) for r in rows], lw=1, alpha=0.6, label="training")
    seen = [r for r in rows if r["val_loss"]]
    axes.plot([int(r["step"]) for r in seen], [float(r["val_loss"]) for r in seen], "o-", ms=3, label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = f"{out_dir}/curve.png"
    with config.whole_file(picture, "wb") as f:
        figure.savefig(f, format="png", dpi=120)
    plt.close(figure)
    return picture
