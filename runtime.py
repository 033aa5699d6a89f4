"""What both training loops share and is not the lesson: processes, precision, the order of the
data, validation, the progress and its picture. Knows nothing of what is inside the network.
"""
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
import timeit
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoints
import config
import sharding
from model import IGNORE, Model

OLDEST = "2.6"                 # the oldest PyTorch that the tests were run with
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
RANK = int(os.environ.get("RANK", 0))                          # torchrun sets these
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))              # among those of this machine
LOCAL_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
EVERYONE = [f"process {rank}" for rank in range(WORLD_SIZE)]   # named so to each other
# columns of log.csv in the picture; nats per token, but per pair of answers in dpo.py
CURVES = [("loss", "-", "training"), ("val_loss", "o-", "validation"),
          ("val_accuracy", "s-", "accuracy of held-out pairs")]
COMPILE_NEEDS = ("torch.compile needs a C++ compiler and Python.h, on a graphics card also Triton, "
                 "and the card must be of 2017 (Volta) or newer")
TORCHRUN_ANSWERS = timedelta(seconds=30)

if torch.__version__ < OLDEST:
    raise SystemExit(f"PyTorch {torch.__version__} is installed, but this needs {OLDEST} or newer: "
                     "pip install --upgrade torch")


# -----------------------------------------------------------------------------------------------
# processes

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

    def print(self, sentence):
        """Print, on the main process only and above the progress bar."""
        if self.is_main:
            tqdm.write(sentence)
            sys.stdout.flush()


def start(device, batch_rows=1, constants={}, offload=False):
    """Join the processes that torchrun started, or be the only one; returns a Process.

    device: auto (CUDA, else Apple's MPS, else CPU) or one of cuda, mps, cpu. offload: they will
    also exchange tensors in the host's memory. Raises SystemExit if the device is not there or
    batch_rows, the rows of the global batch, do not give every process one; then also if the
    processes were started with different constants.
    """
    device = choose_device(device)
    if device.type == "mps" and WORLD_SIZE > 1:
        raise SystemExit("Apple's MPS has one device and no collective operations: run without "
                         "torchrun")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")             # TF32 for what is left in float32
        torch.backends.cuda.enable_cudnn_sdp(False)            # makes a plan for every new length
    if device.type == "cpu" and WORLD_SIZE > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, os.cpu_count() // LOCAL_SIZE))      # torchrun's default is 1
    if batch_rows < WORLD_SIZE:
        raise SystemExit(f"a batch of {batch_rows} rows or pairs (batch_tokens / max_seq_len, or "
                         f"batch_pairs), but {WORLD_SIZE} processes need one each at least")
    if WORLD_SIZE > 1:
        threading.Thread(target=end_without_parent, args=(os.getppid(),), daemon=True).start()
        wait_for_others()
        nccl = device.type == "cuda" and dist.is_nccl_available()        # not on Windows
        backend = "nccl" if nccl else "gloo"
        if nccl and offload:
            backend = sharding.CARD_AND_HOST
        dist.init_process_group(backend, rank=RANK, world_size=WORLD_SIZE,
                                store=dist.PrefixStore("group", message_store()),
                                timeout=timedelta(hours=1),    # one saves, the others wait for it
                                device_id=device if nccl else None)
        check_equal(constants)
    return Process(RANK, LOCAL_RANK, WORLD_SIZE, device)


def choose_device(name):
    """The torch.device of this process; SystemExit if it is not there."""
    usable = ["cpu"]
    if torch.backends.mps.is_available():
        usable.insert(0, "mps")
    if torch.cuda.is_available():
        usable.insert(0, "cuda")
    problem = "" if "cuda" in usable else unusable_card()
    if name == "auto":
        name = usable[0]
        if problem:
            config.say(problem)
    if name not in usable:
        sentence = f"--device={name} is not usable here, but {', '.join(usable)} is. {problem}"
        raise SystemExit(sentence.rstrip())
    if name != "cuda":
        return torch.device(name)
    n_cards = torch.cuda.device_count()
    if LOCAL_RANK >= n_cards:
        raise SystemExit(f"{LOCAL_SIZE} processes on this machine, but {n_cards} GPUs: "
                         f"torchrun --nproc_per_node={n_cards}")
    return torch.device(name, LOCAL_RANK)


def unusable_card():
    """A sentence about an NVIDIA card that PyTorch cannot use; "" if there is no such card."""
    if not (os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi")):
        return ""
    if not torch.version.cuda:
        return (f"This machine has an NVIDIA card, but PyTorch {torch.__version__} was built "
                "without CUDA: install another build (the README has the commands)")
    try:
        torch.cuda.init()
        reason = "PyTorch sees no device; check nvidia-smi and CUDA_VISIBLE_DEVICES"
    except (RuntimeError, AssertionError) as error:            # its text names an old driver
        reason = str(error).splitlines()[0]
    return f"This machine has an NVIDIA card that PyTorch {torch.__version__} cannot use: {reason}"


def end_without_parent(parent):
    """Exit if torchrun died: an orphan would keep writing beside the resumed run."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@functools.cache
def message_store():
    """The store for messages before the processes form a group, and for forming it.

    There is only one: outside of torchrun a second one in the same place fails. torchrun's own is
    there before the processes start, so one that does not answer means that torchrun has died.
    """
    is_there = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    patience = TORCHRUN_ANSWERS if is_there else timedelta(minutes=30)
    store = next(dist.rendezvous("env://", timeout=patience))[0]
    store.set_timeout(timedelta(minutes=30))
    return store


def wait_for_others():
    """Wait until all processes are about to begin; SystemExit if one of them cannot."""
    try:
        message_store().set(f"process {RANK}", "")
        messages = [message_store().get(name) for name in EVERYONE]
    except dist.DistError as error:
        raise SystemExit(f"process {RANK}: the others did not come ({error}); see what they say"
                         ) from None
    for name, message in zip(EVERYONE, messages):
        if message:
            raise SystemExit(f"{name} cannot begin: {message.decode()}")


@contextmanager
def ending_together():
    """Tell the waiting processes if this one ends before it joins them."""
    try:
        yield
    except SystemExit as stopped:
        is_sentence = isinstance(stopped.code, str)
        if WORLD_SIZE > 1 and dist.is_initialized():
            if is_sentence:
                print(stopped, file=sys.stderr, flush=True)
            end_at_once(1 if is_sentence else stopped.code)
        if WORLD_SIZE > 1 and stopped.code:
            with suppress(dist.DistError):                     # the others may have ended, too
                message_store().set(f"process {RANK}",
                                    stopped.code if is_sentence else "it was stopped")
                message_store().wait(EVERYONE, timedelta(minutes=1))
        raise


def override(namespace):
    """config.override() for the scripts that torchrun starts.

    A constant that is wrong on one machine ends all. With --resume the run's own constants replace
    the defaults. A signal ends the script from here on in a sentence.
    """
    if namespace["__name__"] == "__main__":
        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, end_before_training)
    with ending_together():
        constants = config.override(namespace, outlives_reader=True)
        if not constants["resume"]:
            return constants
        path = f"{constants['out_dir']}/last.pt"
        stage = Path(namespace["__file__"]).stem
        earlier = checkpoints.read_constants(path, constants, stage)
        namespace.update(earlier)
        constants = config.override(namespace, outlives_reader=True)     # the command line again
        changed = [f"{name} (then {value!r}, now {constants[name]!r})"
                   for name, value in earlier.items() if constants[name] != value]
        if earlier:
            config.say(f"the constants of {path}; changed: {', '.join(changed) or 'none'}")
        return constants


def only_run_in(out_dir):
    """Refuse a second run in this folder; one process locks it for all."""
    return config.only_user_of("out_dir", out_dir) if config.IS_MAIN else nullcontext()


def total(values, process):
    """The sums over all processes of a list of numbers, as floats."""
    values = [float(value) for value in values]
    if process.world_size == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64, device=process.device)
    dist.all_reduce(sums)
    return sums.tolist()


def check_equal(constants):
    """SystemExit on every process if they run different constants; names those that differ."""
    everyone = [None] * WORLD_SIZE
    dist.all_gather_object(everyone, constants)
    differ = [name for name, value in constants.items()
              if any(other.get(name) != value for other in everyone)]
    if differ:
        raise SystemExit(f"the processes do not agree on {', '.join(differ)}: start them with the "
                         "same constants, and on several machines with the same files (or one "
                         "shared folder)")


def check_sharding(shard, offload, compile, dtype, batch, process):
    """SystemExit if this run cannot be sharded. batch: rows or pairs of the global batch."""
    if shard not in sharding.MODES:
        raise SystemExit(f"--shard={shard}: choose optimizer or full, or leave it empty")
    if offload and not shard:
        raise SystemExit("--offload keeps the shares of --shard in the host's memory: add "
                         "--shard=full; one process is enough")
    if offload and process.device.type == "mps":
        raise SystemExit("--offload: Apple's MPS has no memory of its own, nothing would be gained")
    if not shard:
        return
    if process.device.type == "cuda" and not dist.is_nccl_available():
        raise SystemExit(f"--shard={shard} needs NCCL on a graphics card, and this PyTorch has "
                         "none (on Windows it never has)")
    if torch.__version__ < sharding.OLDEST:
        raise SystemExit(f"--shard={shard} needs PyTorch {sharding.OLDEST} or newer, this is "
                         f"{torch.__version__}")
    n = process.world_size
    if n == 1 and not offload:
        raise SystemExit(f"--shard={shard} shares a model among processes: start several with "
                         "torchrun --nproc_per_node=, or add --offload")
    if batch % n:
        raise SystemExit(f"--shard={shard}: {n} processes cannot share a batch of {batch} evenly; "
                         "choose a batch that they divide")
    if dtype == "float16" or compile == "on":
        raise SystemExit(f"--shard={shard} works with neither --dtype=float16 nor --compile=on")
    process.print(f"--shard={shard}: no samples are drawn and nothing is compiled")


def parallel(model, process, shard, dtype, offload=False):
    """The model on its device, ready for several processes; the result has no_sync().

    shard, offload: see sharding.py. Otherwise DistributedDataParallel, or with one process the
    model itself.
    """
    if shard:
        return sharding.shard(model, process, shard, DTYPES[dtype], offload)
    model.to(process.device)
    if process.world_size == 1:
        model.no_sync = nullcontext
        return model
    devices = [process.device] if process.device.type == "cuda" else None
    # it never changes, but would be sent in every step
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["rope"])
    # as views of the buckets the gradients are not there twice, see clear_gradients()
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def clear_gradients(forward, optimizers):
    """Ready for the next step. forward: of parallel(); DDP's gradients stay in its buckets."""
    in_buckets = isinstance(forward, DistributedDataParallel)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=not in_buckets)


def finish(process, code, step, best, out_dir, title):
    """Say what a run has made, unless a signal ended it; returns its exit code.

    One of several processes ends here.
    """
    if process.is_main and not code:
        print(f"finished at step {step}: lowest validation loss {best:.4f}; {out_dir}/best.pt, "
              f"{out_dir}/log.csv")
        with config.only_watching("curve"):
            print(draw_curve(out_dir, title))
    if dist.is_initialized():
        dist.destroy_process_group()
    if process.world_size > 1:
        end_at_once(code)
    return code


def end_at_once(code):
    """End one of several processes; in the usual way it could wait for ever.

    The destructors of DDP and of the group hold Python's lock while they join a thread of gloo,
    which may need the lock, too.
    """
    sys.stdout.flush()
    os._exit(code)


# -----------------------------------------------------------------------------------------------
# signals

def say_once(sentence):
    """Write a line on the main process from a signal handler: sys.stderr may be in use."""
    if config.IS_MAIN:
        with suppress(OSError):
            os.write(2, f"\n{sentence}\n".encode())


def end_before_training(number, frame):
    say_once("stopped before the first step")
    raise SystemExit(128 + number)             # the exit code that shells give a signal


class StopRequest:
    """Its code is 130 or 143 once SIGINT or SIGTERM came; the loop then ends its step and saves.

    A second SIGINT quits at once. Every process gets the signal, the main one speaks.
    """

    def __init__(self):
        self.code = 0
        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.code and number == signal.SIGINT:
            say_once("stopped at once; what was saved last is whole")
            os._exit(130)
        if not self.code:
            self.code = 128 + number
            again = " (Ctrl-C again: at once)" if number == signal.SIGINT else ""
            say_once(f"stopping after this step{again}")


# -----------------------------------------------------------------------------------------------
# precision and speed

def precision(device, dtype):
    """(name, autocast context, GradScaler) for dtype = auto | bfloat16 | float16 | float32.

    auto: bfloat16 where the device multiplies it natively (CUDA from Ampere on, CPUs with
    AVX512-BF16 or AMX), float16 on older CUDA cards, float32 elsewhere. Weights stay float32; only
    the products are in half precision. Only float16 needs its loss scaled (Micikevicius et al.
    2017, arXiv:1710.03740): the scaler is off otherwise.
    """
    if dtype == "auto" and has_fast_bfloat16(device):
        dtype = "bfloat16"
    elif dtype == "auto":
        dtype = "float16" if device.type == "cuda" else "float32"
    if dtype not in DTYPES:
        raise SystemExit(f"--dtype={dtype}: choose auto, bfloat16, float16 or float32")
    autocast = nullcontext()
    if dtype != "float32":
        autocast = torch.autocast(device.type, dtype=DTYPES[dtype])
    return dtype, autocast, torch.amp.GradScaler(device.type, enabled=dtype == "float16")


def has_fast_bfloat16(device):
    """Whether matrix products are faster in bfloat16 than in float32 there."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported()
                                     or torch.cpu._is_amx_tile_supported())


def load_model(path, tokenizer="", device="auto", dtype="auto"):
    """(model, tokenizer, checkpoint) of a checkpoint, ready to generate.

    The checkpoint is the dict of checkpoints.load() without the weights. tokenizer: as in
    checkpoints.load_with_tokenizer(); device: as in start(); dtype: of the weights, as in
    precision().
    """
    saved, tok = checkpoints.load_with_tokenizer(path, tokenizer)
    device = start(device).device
    name, _, _ = precision(device, dtype)
    model = Model.from_state(saved["shape"], saved.pop("model"))
    return model.to(device, DTYPES[name]).eval(), tok, saved


def compiled(model, choice, process, tokens):
    """Compile the model if choice (auto | on | off) says so.

    auto: where can_compile(), on a CPU only for runs of many tokens: the speed of the steps (1.4
    times on a CPU) then repays the half minute at the start. It depends on the whole run, so that
    resuming decides the same.
    """
    if choice not in ("auto", "on", "off"):
        raise SystemExit(f"--compile={choice}: choose auto, on or off")
    on_card, works = process.device.type == "cuda", can_compile(process.device)
    if choice == "auto" and on_card and not works:
        process.print(f"nothing is compiled: {COMPILE_NEEDS}")
    is_long = on_card or tokens * model.flops_per_token(0) > 2e14
    if choice == "on" or choice == "auto" and is_long and works:
        model.compile()


def can_compile(device):
    """Whether torch.compile works there; Triton, too, compiles a little C for each machine."""
    header = Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h")
    compiler = shutil.which("g++") or shutil.which("clang++")
    has_compiler = bool(compiler) and header.exists()
    if device.type == "cuda":
        brings_compiler = os.name == "nt"      # Triton for Windows
        return ((has_compiler or brings_compiler)
                and importlib.util.find_spec("triton") is not None
                and torch.cuda.get_device_capability(device)[0] >= 7)
    return device.type == "cpu" and has_compiler


def rows_that_fit(model, process, dtype, batch_rows, T):
    """As many rows of T tokens, a power of two, as the free memory of every CUDA device holds.

    By the model's own estimate. Elsewhere 16: more are not faster there.
    """
    if process.device.type != "cuda":
        return 16
    free, _ = torch.cuda.mem_get_info(process.device)
    # of the estimate, what is there already
    weights = 0 if model.offloads else 4 * model.n_params() / model.shares
    rows, share = 1, batch_rows / process.world_size
    while rows < share and (model.bytes_to_train(2 * rows, T, DTYPES[dtype]) - weights
                            < 0.9 * free):
        rows *= 2
    if dist.is_initialized():                  # sharded, all must run the model equally often
        everyone = [None] * process.world_size
        dist.all_gather_object(everyone, rows)
        rows = min(everyone)
    return rows


def to_device(array, device):
    """A numpy array, or None, as a tensor there; the copy to a GPU does not wait for its work."""
    if array is None:
        return None
    t = torch.from_numpy(array)
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


# -----------------------------------------------------------------------------------------------
# what a run will cost

def matmul_rate(device, dtype):
    """Floating-point operations per second of a large matrix product, measured in less than 1 s."""
    n, seconds = 128, 0.0
    while n < 8192 and seconds < 0.01:         # until a product takes 10 ms
        n *= 2
        a = torch.randn(n, n, device=device, dtype=DTYPES[dtype])
        product = lambda: (a @ a)[0, 0].item()                 # .item() waits for the device
        # the first of the three warms up
        seconds = min(timeit.repeat(product, timer=time.perf_counter, repeat=3, number=1))
    return 2 * n**3 / seconds


def hardware(device):
    """What computes, in words: the graphics card's name, or the processor's and the threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search("model name\\s*: (.*)", cpuinfo.read_text("utf-8"))
        name = found[1] if found else name
    return f"{name}, threads: {torch.get_num_threads()}"


def announce(model, process, dtype, steps, batch_rows, micro_batch, n_rows, T):
    """Say what a run, of rows of T tokens, is and will cost; returns {what: sentence}."""
    n, device = process.world_size, process.device
    tokens, rows = steps * batch_rows * T, min(micro_batch, math.ceil(batch_rows / n))
    flops, rate = model.flops_per_token(T), matmul_rate(device, dtype)
    seconds = tokens * flops / (0.35 * rate * n)
    packed = model.has_packed_attention(DTYPES[dtype])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts = {
        "device": f"{n} x {device.type} ({hardware(device)}), PyTorch {torch.__version__}, "
                  f"products in {dtype}",
        "attention": "packed documents by "
                     + ("FlashAttention" if packed else "a mask over whole rows"),
        "parameters": f"{model.n_params():,}, of which {model.embedding.weight.numel():,} embed "
                      f"the tokens; {trained:,} are trained",
        "step": f"{batch_rows * T:,} tokens = {batch_rows} rows of {T}, at most {rows} at a time "
                "in each process",
        "training": f"steps: {steps:,}, tokens: {tokens:,}, epochs: "
                    f"{steps * batch_rows / n_rows:.2f} (rows: {n_rows:,})",
        "memory": memory_as_text(model, rows, T, DTYPES[dtype]),
        "time": f"about {seconds_as_text(seconds)} = {tokens:.3g} tokens x {flops:.3g} FLOP / "
                f"(35 % of {n} x {rate:.3g} FLOP/s measured); the lines of the steps say what is "
                "left by their own speed"}
    facts["compiled"] = ("yes, which takes half a minute of the first steps" if model.is_compiled
                         else "no")
    if device.type == "cpu" and LOCAL_SIZE == 1:
        load, cores, threads = busy_threads(), os.cpu_count(), torch.get_num_threads()
        if load and 1 < threads > cores - load:
            facts["load"] = (f"{load} other threads are busy on {cores} cores: fewer of ours may "
                             "be faster (OMP_NUM_THREADS=1)")
    process.print("\n".join(f"{what:<11} {sentence}" for what, sentence in facts.items()))
    return facts


def busy_threads():
    """How many threads of others compute at the moment; 0 where the system does not say."""
    counts = []
    for _ in range(5):                         # the average of a minute would count our last run
        with suppress(OSError):
            runnable = Path("/proc/loadavg").read_text("utf-8").split()[3].partition("/")[0]
            counts.append(int(runnable) - 1)   # one is this
        time.sleep(0.02)
    return min(counts, default=0)


def memory_as_text(model, rows, T, dtype):
    """The estimate for a process; where processes share the model, also for 1, 2, 8 of them."""
    gib = model.bytes_to_train(rows, T, dtype) / 2**30
    kept = "weights, gradients, moments"
    sentence = f"about {gib:.1f} GiB a process: {kept}, activations of {rows} rows, logits"
    numbers = [model.bytes_to_train(rows, T, dtype, n) / 2**30 for n in (1, 2, 8)]
    if model.offloads:
        numbers = [model.bytes_kept(n) / 2**30 for n in (1, 2, 8)]
        sentence = (f"about {gib:.1f} GiB a process: weights in use, activations of {rows} rows, "
                    f"logits; {model.bytes_kept() / 2**30:.1f} GiB in the host's memory: {kept}")
    if model.shares > 1 or model.offloads:
        sentence += " ({:.1f}, {:.1f}, {:.1f} GiB with 1, 2, 8 processes)".format(*numbers)
    return sentence


def seconds_as_text(seconds):
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86_400:.1f} days"


@contextmanager
def memory_advice(constants):
    """Turn running out of memory into a sentence that says what to lower.

    constants: the script's globals().
    """
    try:
        yield
    except RuntimeError as error:
        if not re.search("out of memory|allocate memory|ALLOC_FAILED", str(error)):
            raise
        rows = constants["micro_batch"]
        advice = "rows of half the length (--max_seq_len), --recompute, or a smaller model"
        if rows > 1:
            advice = (f"--micro_batch={rows // 2}: half the activations, the same batch and the "
                      "same result")
        raise SystemExit(f"out of memory; try {advice}") from None


# -----------------------------------------------------------------------------------------------
# the order of the data

@functools.lru_cache(maxsize=2)
def epoch_order(n_rows, seed, epoch):
    """All rows in the random order of one epoch, (n_rows,) uint32, by seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(np.arange(n_rows, dtype=np.uint32))


def batch_rows(step, batch_size, n_rows, seed):
    """The rows of the global batch of `step` (from 0), (batch_size,).

    It is the step-th slice of epoch after epoch without end. It depends on nothing that has
    happened before, so a resumed run continues exactly, and not on the process, so any number of
    processes sees the same batches. Every row comes once per epoch.
    """
    at = range(step * batch_size, (step + 1) * batch_size)
    return np.array([epoch_order(n_rows, seed, i // n_rows)[i % n_rows] for i in at])


def micro_batches(rows, micro_batch, process):
    """This process's share of the global batch, cut into pieces of at most micro_batch rows."""
    share = rows[process.rank::process.world_size]
    return np.split(share, range(micro_batch, len(share), micro_batch))


# -----------------------------------------------------------------------------------------------
# validation and progress

def even_rounds(n_rows, past_the_end, micro_batch, process):
    """micro_batches() of the first n_rows rows, equally many in each process.

    Where the processes do not divide the rows, some get the row past the end, which has no tokens:
    processes that share a model must all run it equally often.
    """
    missing = np.full(-n_rows % process.world_size, past_the_end)
    return micro_batches(np.concatenate((np.arange(n_rows), missing)), micro_batch, process)


def clip_gradient(model, largest):
    """Scale the gradient down to this norm where it is larger; returns the norm that it had."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest or math.inf)
    return (norm.full_tensor() if sharding.is_cut(norm) else norm).item()


@torch.no_grad()
def evaluate(model, batches, token_bytes, autocast, process):
    """Mean loss in nats per token and in bits per byte of text, over the batches of all processes.

    batches: (x, y, cu_seqlens) of this process; token_bytes (V,): UTF-8 bytes of each token.
    """
    nats, targets, n_bytes = 0.0, 0, 0
    for x, y, cu_seqlens in batches:
        with autocast:
            nats += model(x, y, cu_seqlens).item()
        counted = y[y != IGNORE].cpu().numpy()
        targets += len(counted)
        n_bytes += int(token_bytes[counted].sum())
    nats, targets, n_bytes = total([nats, targets, n_bytes], process)
    return nats / targets, nats / math.log(2) / n_bytes


class Meter:
    """The progress bar, a printed line every few steps with the speed since the last, run.json."""

    def __init__(self, start, max_steps, process):
        self.start, self.max_steps, self.process = start, max_steps, process
        self.bar = tqdm(total=max_steps, initial=start, unit="step",
                        disable=None if process.is_main else True)
        self.began = self.clock = self.first_ended = time.perf_counter()
        self.last = start                      # the last step that was printed

    def step(self, row, skipped, interval):
        """Count a step and print every `interval` steps. row: of the log."""
        self.bar.update()
        self.row, step = row, row["step"]
        now = time.perf_counter()
        if step == self.start + 1:             # it may include compilation, so it is not timed
            self.first_ended = now
        if step % interval and step != self.max_steps:
            return
        steps_per_s = (step - self.last) / (now - self.clock)
        tokens_per_s = steps_per_s * row["tokens"] / step
        left = seconds_as_text((self.max_steps - step) / steps_per_s)
        overflows = f"  {skipped} skipped" if skipped else ""
        self.process.print(
            f"step {step:>6}/{self.max_steps}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
            f"norm {row['grad_norm']:.2f}  {tokens_per_s:,.0f} tokens/s  {left} left{overflows}")
        self.clock, self.last = now, step

    @contextmanager
    def paused(self):
        """Validation does not count in the speed of training."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self.clock += seconds
        self.first_ended += seconds

    def save(self, path, facts):
        """Note in run.json how long the run took, session by session. facts: of announce().

        log.csv holds no times, as it is to be the same after resuming.
        """
        if not self.process.is_main:
            return
        step, now = self.row["step"], time.perf_counter()
        tokens_per_step = self.row["tokens"] // step
        session = {"from_step": self.start, "to_step": step, "seconds": now - self.began,
                   "timed_tokens": tokens_per_step * (step - self.start - 1),
                   "timed_seconds": now - self.first_ended, "date": time.strftime("%Y-%m-%d"),
                   "torch": torch.__version__, **facts}
        with config.only_watching(path), config.whole_file(path) as f:
            json.dump([*checkpoints.read_run(path, self.start), session], f, indent=1)

    def close(self):
        self.bar.close()


def draw_curve(out_dir, title):
    """log.csv -> curve.png, loss over steps; returns the picture's path, or why there is none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no curve drawn: pip install matplotlib"
    rows = checkpoints.read_log(f"{out_dir}/log.csv")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, style, label in CURVES:
        points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        if points:
            axes.plot(*zip(*points), style, lw=1, ms=3, alpha=0.7, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss, nats", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = f"{out_dir}/curve.png"
    with config.whole_file(picture, "wb") as f:
        figure.savefig(f, format="png", dpi=120)
    return picture
