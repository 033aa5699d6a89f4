"""What both training loops need and neither is there to teach: processes, precision, the order of the data,
the progress and its picture. Knows nothing of what is inside the network.
"""
import ctypes
import functools
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
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoints
import config
from model import Model

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
        constants = config.override(namespace, outlives_reader=True)
        if not constants["resume"]:
            return constants
        path = f"{constants['out_dir']}/last.pt"
        earlier = checkpoints.read_constants(path, constants)
        namespace.update(earlier)              # the defaults of this run; the command line again goes above
        constants = config.override(namespace, outlives_reader=True)
        changed = [f"{name} (then {value!r}, now {constants[name]!r})" for name, value in earlier.items()
                   if constants[name] != value]
        if earlier and os.environ.get("RANK", "0") == "0":
            print(f"the constants of {path}; changed: {', '.join(changed) or 'none'}", flush=True)
        return constants


def only_run_in(out_dir):
    """Refuse a second run in this folder; one process locks it for all."""
    is_main = os.environ.get("RANK", "0") == "0"
    return config.only_user_of("out_dir", out_dir) if is_main else nullcontext()


def finish(code):
    """The exit code of a run; one of several processes ends here with it.

    Ending in the usual way could wait for ever: DDP's destructor holds Python's lock while it joins a
    thread of gloo, and that thread may need the lock to free a tensor.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


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
        dist.destroy_process_group()
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


def load_model(path, tokenizer="", device="auto", dtype="auto"):
    """(model, tokenizer, checkpoint) of a checkpoint, ready to generate; the checkpoint is the dict of
    checkpoints.load() without the weights.

    tokenizer: as in checkpoints.load_with_tokenizer(); device: as in start(); dtype: of the weights, as in precision().
    """
    saved, tok = checkpoints.load_with_tokenizer(path, tokenizer)
    device = start(device).device
    name, _, _ = precision(device, dtype)
    model = Model.from_state(saved["shape"], saved.pop("model"))
    return model.to(device, getattr(torch, name)).eval(), tok, saved


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
    """True once SIGINT or SIGTERM came: the loop then ends its step, saves, and ends with `code`.

    A second SIGINT quits at once. Each process gets the signal, the main one speaks.
    """

    def __init__(self):
        self.code, self.is_main = 0, os.environ.get("RANK", "0") == "0"
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.code and number == signal.SIGINT:
            self.say("stopped at once; what was saved last is whole")
            os._exit(130)
        if not self.code:
            self.code = 128 + number           # the exit code that shells give a signal: 130 or 143
            again = " (Ctrl-C again: at once)" if number == signal.SIGINT else ""
            self.say(f"stopping after this step{again}")

    def say(self, sentence):
        if self.is_main:
            with suppress(OSError):            # sys.stderr may be in the middle of a write
                os.write(2, f"\n{sentence}\n".encode())

    def __bool__(self):
        return self.code > 0


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
# progress

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
            with config.only_watching(path), config.whole_file(path) as f:
                json.dump([*checkpoints.read_run(path, self.start), session], f, indent=1)

    def close(self):
        self.bar.close()


def draw_curve(out_dir, title):
    """log.csv -> curve.png, loss over steps; returns the picture's path, or a sentence why it is not drawn."""
    try:
        import matplotlib
    except ImportError:
        return "no curve drawn: pip install matplotlib"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = checkpoints.read_log(f"{out_dir}/log.csv")
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
