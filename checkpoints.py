"""What a run reads and writes: meta.json and the bins, checkpoints, log.csv and run.json.

All of it is checked here, at the door: what is damaged, foreign or of another run is refused in one
sentence, so that no other file has to expect it.
"""
import csv
import hashlib
import json
import math
import os
import re
import zipfile
import zlib
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

import config
import lora
import sharding
from model import ROPE_SCALING, Model, ModelConfig
from tokenizer import load as load_tokenizer

FORMAT = 1                     # of checkpoints and bins; others are rejected
COUNTS = {"prepare_pretrain.py": ("documents", "tokens", "bytes"),
          "prepare_sft.py": ("examples", "tokens", "targets")}
META = {"format": int, "dtype": str, "tokenizer": str, "tokenizer_sha256": str, "train": dict,
        "val": dict, "corpora": dict, "crc32": dict}
TOKENS = {"uint16": "<u2", "uint32": "<u4"}                    # meta.json's dtype, and numpy's name
CHECKPOINT = {"stage": str, "model": dict, "shape": dict, "tokenizer": str, "tokenizer_sha256": str}
RESUMABLE = {"step": int, "best": float, "skipped": int, "identity": dict, "constants": dict,
             "optimizers": list, "scaler": dict}
OPTIONAL = {**RESUMABLE, "val_loss": float, "val_bpb": float}
SCALER = {"scale": float, "growth_factor": float, "backoff_factor": float, "growth_interval": int,
          "_growth_tracker": int}
SHAPE = {field.name: field.type for field in fields(ModelConfig) if field.name != "rope_scaling"}
# what every checkpoint names; constants of the network that came later had their defaults before
FIRST = "vocab_size dim n_layers n_heads n_kv_heads head_dim hidden_dim max_seq_len".split()
LATER = {field.name: field.default for field in fields(ModelConfig) if field.name not in FIRST}
RUN_LATER = {**LATER, "lora_rank": 0}          # likewise of a run
LOG = {"step": int, "tokens": int, "lr": float, "loss": float, "grad_norm": float,
       "val_loss": float}          # the first columns of every log.csv; others are floats
SESSION = {"from_step": int, "to_step": int, "seconds": float, "timed_tokens": int,
           "timed_seconds": float, "date": str, "device": str, "memory": str}


def is_a(value, kind):
    """Whether a value is of this type; whole numbers are floats, too, and truth values are not."""
    if kind is int:
        return type(value) is int and 0 <= value < 1 << 62
    if kind is float:
        return type(value) in (int, float) and (abs(value) < 1 << 62 or value == math.inf)
    return isinstance(value, kind)


def has(table, kinds):
    """The first name of `kinds` whose value in the table is missing or of another type, or None.

    A table that is no dict has nothing.
    """
    table = table if isinstance(table, dict) else {}
    return next((name for name, kind in kinds.items() if not is_a(table.get(name), kind)), None)


# -----------------------------------------------------------------------------------------------
# the data

def read_meta(path, tokenizer, made_by):
    """meta.json beside the bins of `made_by`.

    SystemExit if it is missing, damaged, of another script or format, or belongs to another
    tokenizer.
    """
    again = f"run python {made_by} again"
    try:
        found = json.loads(Path(path).read_text("utf-8"))
        meta = {"corpora": {}, "crc32": {}, "dtype": "uint16", **found}
    except FileNotFoundError:
        raise SystemExit(f"{path}: not there; run python {made_by} first") from None
    except (OSError, ValueError, TypeError, RecursionError):
        raise SystemExit(f"{path}: not a whole JSON file of {made_by}; {again}") from None
    if wrong := has(meta, META):
        raise SystemExit(f"{path}: not what {made_by} writes, its {wrong!r} is wrong; {again}")
    if meta["format"] != FORMAT:
        raise SystemExit(f"{path}: format {meta['format']}, this code reads {FORMAT}; {again}")
    if meta["dtype"] not in TOKENS:
        raise SystemExit(f"{path}: its dtype is {meta['dtype']!r}, not {' or '.join(TOKENS)}; "
                         f"{again}")
    counts = dict.fromkeys(COUNTS[made_by], int)
    for name, row in {"train": meta["train"], "val": meta["val"], **meta["corpora"]}.items():
        if wrong := has(row, counts):
            raise SystemExit(f"{path}: not what {made_by} writes, {name!r} has no number of "
                             f"{wrong}; {again}")
    if meta["tokenizer_sha256"] != tokenizer.sha256:
        made_with = f"{meta['tokenizer']} ({meta['tokenizer_sha256'][:8]})"
        raise SystemExit(f"{path}: made with {made_with}, but {tokenizer.name} is "
                         f"{tokenizer.sha256[:8]}; {again}, or name the other with --tokenizer=")
    return meta


def open_bin(path, dtype, length, meta, made_by, below=None):
    """A flat array of `length` numbers on disk, read where it is touched; None: as many as it has.

    SystemExit if its length or its checksum is not what meta.json says, or if a number in it is not
    below `below`. Bins made before there were checksums have none.
    """
    again = f"run python {made_by} again"
    if not os.path.isfile(path):
        raise SystemExit(f"{path}: missing; {again}")
    n_bytes = os.path.getsize(path)
    n, rest = divmod(n_bytes, np.dtype(dtype).itemsize)
    if rest or length not in (None, n):
        raise SystemExit(f"{path}: its {n_bytes:,} bytes are not what meta.json says; {again}")
    data = np.memmap(path, dtype, "r") if n else np.zeros(0, dtype)
    crc = 0
    for at in range(0, n, 1 << 24):
        part = data[at:at + (1 << 24)]
        crc = zlib.crc32(part, crc)
        if below is not None and (largest := part.max()) >= below:
            raise SystemExit(f"{path}: holds {largest}, and all must be below {below:,}; {again}")
    if meta["crc32"].get(Path(path).name, crc) != crc:
        raise SystemExit(f"{path}: damaged, its checksum is not that of meta.json; {again}")
    return data


class Shards:
    """Arrays that are read as one: it has a length and slices, which are copies."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.starts = np.cumsum([0, *map(len, arrays)])

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, part):
        start, stop, _ = part.indices(len(self))
        stop = max(start, stop)
        first, last = np.searchsorted(self.starts[1:-1], (start, stop), "right")
        pieces = [array[max(start - begin, 0):stop - begin]
                  for array, begin in zip(self.arrays[first:last + 1], self.starts[first:])]
        return np.concatenate(pieces)


def open_shards(path, dtype, length, meta, made_by, below=None):
    """open_bin() for a file that may be cut into shards: train.bin, or train-00000.bin and so on.

    meta.json lists the shards among the checksums. Shards are returned as one, see Shards.
    """
    file = Path(path)
    shard = re.escape(file.stem) + r"-\d+" + re.escape(file.suffix)
    names = sorted(filter(re.compile(shard).fullmatch, meta["crc32"]))
    if not names:
        return open_bin(path, dtype, length, meta, made_by, below)
    shards = Shards([open_bin(file.with_name(name), dtype, None, meta, made_by, below)
                     for name in names])
    if len(shards) != length:
        raise SystemExit(f"{file.with_suffix('')}-*{file.suffix}: {len(shards):,} numbers in all, "
                         f"where meta.json says {length:,}; run python {made_by} again")
    return shards


def open_tokens(path, length, meta, made_by, vocab_size):
    """open_shards() for token ids, in the type that meta.json names."""
    return open_shards(path, TOKENS[meta["dtype"]], length, meta, made_by, vocab_size)


def open_examples(data_dir, part, meta, size, vocab_size):
    """The examples of one split, from prepare_sft.py.

    Returns tokens (N,), mask (N,): 1 where the loss counts, starts (n + 1,): where the examples
    begin, and of each example the inputs, (n,), and the tokens that count, (n,). SystemExit if an
    example has more than `size` inputs.
    """
    path, made_by = f"{data_dir}/{part}", "prepare_sft.py"
    n, n_tokens = meta[part]["examples"], meta[part]["tokens"]
    tokens = open_tokens(f"{path}.bin", n_tokens, meta, made_by, vocab_size)
    mask = open_bin(f"{path}.mask", "u1", n_tokens, meta, made_by, below=2)
    starts = open_bin(f"{path}.idx", "<i8", n + 1, meta, made_by)
    lengths = np.diff(starts) - 1              # n tokens are n - 1 inputs, each with a target
    if starts[0] != 0 or starts[-1] != n_tokens or lengths.min(initial=1) < 1:
        raise SystemExit(f"{path}.idx: does not cut {path}.bin into examples; run python "
                         f"{made_by} again")
    if lengths.max(initial=0) > size:
        raise SystemExit(f"{path}.bin: its longest example has {lengths.max() + 1} tokens and a "
                         f"row of this run {size}: run python {made_by} --max_seq_len={size}")
    targets = np.add.reduceat(mask, starts[:-1], dtype=np.int64)
    if targets.min(initial=1) < 1:
        raise SystemExit(f"{path}.mask: an example has no token on which the loss counts; run "
                         f"python {made_by} again")
    return tokens, mask, starts, lengths, targets


def data_hash(meta):
    """A short text that differs between two preparations; "" where there are no checksums."""
    trained_on = {name: crc for name, crc in meta["crc32"].items()
                  if "test" not in name and not name.endswith(".corpus")}
    sums = sorted(trained_on.items())
    return f"{zlib.crc32(json.dumps(sums).encode()):08x}" if sums else ""


# -----------------------------------------------------------------------------------------------
# checkpoints

def save(path, state):
    with config.whole_file(path, "wb") as f:
        torch.save({"format": FORMAT, **state}, f)


def load(path, to_resume=False):
    """The dict that save() wrote, LoRA's updates merged into the weights unless it is to_resume.

    SystemExit if it is missing, damaged, of another format, or no model that can work.
    weights_only: a checkpoint from elsewhere holds tensors and plain values, but no code that runs.
    """
    if os.path.isdir(path):
        raise SystemExit(f"{path}: a folder, not a checkpoint; `python -m extras.import_weights "
                         f"--source={path}` makes one of a Hugging Face folder")
    try:
        with zipfile.ZipFile(path) as archive:                # PyTorch does not look at the sums
            if archive.testzip():
                raise ValueError("not whole")
        state = torch.load(path, map_location="cpu", weights_only=True)
        merged = check(state)
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such checkpoint; train one first, or name another") from None
    except Exception as error:                                # a damaged file raises anything
        reason = " ".join(str(error).split())[:300]
        if "weights_only" in str(error):
            reason = "it holds more than tensors and plain values"
        raise SystemExit(f"{path}: refused, not a whole checkpoint of this version: {reason}; take "
                         "another") from None
    return state if to_resume else {**state, "model": merged}


def check(state):
    """Complete the shape of a checkpoint's network; returns its weights with LoRA's updates merged.

    Raises ValueError, or what PyTorch raises, if something in it cannot be.
    """
    if has(state, {"format": int}) or state["format"] != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    optional = {name: kind for name, kind in OPTIONAL.items() if name in state}
    if wrong := has(state, {**CHECKPOINT, **optional}):
        raise ValueError(f"its {wrong!r} is missing or wrong")
    shape, weights = {**LATER, **state["shape"]}, lora.merge(state["model"])
    if wrong := has(shape, SHAPE):
        raise ValueError(f"the {wrong} of its network is {shape.get(wrong, 'missing')!r}")
    scaling = shape["rope_scaling"]
    if scaling is not None and has(scaling, dict.fromkeys(ROPE_SCALING, float)):
        raise ValueError(f"the rope_scaling of its network is {scaling}")
    if shape["n_layers"] > len(weights) or shape["max_seq_len"] > 1 << 24:
        raise ValueError(f"its network of {shape['n_layers']} layers for {shape['max_seq_len']} "
                         f"tokens cannot be one of {len(weights)} weights")
    with torch.device("meta"):                                # the shapes without the memory
        network = Model(ModelConfig(**shape))
    network.load_state_dict(weights, assign=True)
    for name, weight in weights.items():
        if weight.dtype != torch.float32:
            raise ValueError(f"the weight {name} is of {weight.dtype}, not torch.float32")
        if not is_finite(weight):
            raise ValueError(f"the weight {name} is not finite")
    state["shape"] = vars(network.config)
    return weights


def is_finite(tensor):
    """Whether all numbers are finite. One NaN makes the extremes NaN: faster than isfinite()."""
    tensor = sharding.local(tensor)
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def fingerprint(path):
    """The first 8 hex digits of a file's SHA-256: says which checkpoint a score belongs to."""
    data = np.memmap(path, "u1", "r")
    return hashlib.sha256(data).hexdigest()[:8]


def load_for(path, tok):
    """The checkpoint of load(); SystemExit if it was trained with another tokenizer than tok."""
    saved = load(path)
    if saved["tokenizer_sha256"] != tok.sha256:
        raise SystemExit(f"{path} was trained with {saved['tokenizer']}, which is not {tok.name}")
    return saved


def load_with_tokenizer(path, tokenizer=""):
    """The checkpoint of load() and its tokenizer: at `tokenizer`, or where the checkpoint says.

    SystemExit if there is none, or not the one that the model was trained with.
    """
    saved = load(path)
    name = tokenizer or saved["tokenizer"]
    try:
        tok = load_tokenizer(name)
    except SystemExit as stopped:
        if tokenizer:
            raise
        raise SystemExit(f"{path} was trained with the tokenizer {name!r}, which cannot be read "
                         f"({stopped}); --tokenizer= names another place") from None
    if tok.sha256 != saved["tokenizer_sha256"]:
        raise SystemExit(f"{path} was trained with {saved['tokenizer']} as it was then, which is "
                         f"not {tok.name}")
    return saved, tok


def read_constants(path, constants, stage):
    """The constants that the run of a last.pt had, those of them that still are of the same type.

    Where and how this process was started is no part of them. There are none in a damaged file and
    in one of another stage, which open_run() refuses.
    """
    try:
        # mapped: the weights are not read, nor sent to the card that they were on
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        earlier = saved["constants"] if saved["stage"] == stage else {}
        return {name: value for name, value in earlier.items()
                if type(value) is type(constants.get(name))
                and name not in ("out_dir", "resume", "overwrite")}
    except Exception:
        return {}


def open_run(out_dir, resume, overwrite, stage, identity):
    """The checkpoint to go on with, or None to start anew.

    identity: what makes a run this one, {name: value}: the model's shape, the tokenizer, the data
    and their order. SystemExit rather than lose a run or mix two.
    """
    path = f"{out_dir}/last.pt"
    if not resume:
        if os.path.exists(path) and not overwrite:
            raise SystemExit(f"{path} is there: --resume goes on with it, --out_dir=... starts "
                             "beside it, --overwrite starts anew in its place")
        return None
    if not os.path.exists(path):
        config.say(f"--resume: there is no {path}, so this run begins at step 0; if you meant "
                   "another run, stop and name its folder with --out_dir=")
        return None
    saved = load(path, to_resume=True)
    if saved["stage"] != stage:
        raise SystemExit(f"{path}: made by {saved['stage']}.py; only the last.pt of {stage}.py can "
                         "be resumed here")
    if wrong := has(saved, RESUMABLE):
        raise SystemExit(f"{path}: cannot be resumed, its {wrong!r} is missing or wrong; only "
                         "last.pt holds all")
    # what came later had its default then, or was not looked at
    then = {**identity, **RUN_LATER, **saved["identity"]}
    if differ := [f"{name} (then {then[name]}, now {value})" for name, value in identity.items()
                  if repr(then[name]) != repr(value)]:         # it may hold anything, tensors too
        raise SystemExit(f"{path} is of a run with another {', '.join(differ)}; resume it with the "
                         "constants and the data that it had")
    config.say(f"going on with {path} from step {saved['step']}")
    return saved


def restore(saved, model, optimizers, scaler):
    """Put a saved run's state back; returns (steps done, best validation loss, steps skipped).

    That is all there is: the order of the data is a function of the step, and nothing else is
    random in training.
    """
    if saved is None:
        return 0, math.inf, 0
    parameters = model.state_dict()
    model.load_state_dict({name: sharding.share(weight, parameters[name])
                           for name, weight in saved["model"].items()})
    if len(optimizers) != len(saved["optimizers"]):
        raise SystemExit("last.pt is of a run with Muon and this one is without, or the reverse: "
                         "give muon_lr as then")
    for optimizer, state in zip(optimizers, saved["optimizers"]):
        groups = optimizer.param_groups
        parameters = [p for group in groups for p in group["params"]]
        try:
            shares = {i: {name: sharding.share(moment, parameters[i])
                          for name, moment in moments.items()}
                      for i, moments in state["state"].items()}
            # "fused" decides where AdamW's step is: where the weights of now want it
            then = [{**group, "fused": now.get("fused")}
                    for group, now in zip(state["param_groups"], groups, strict=True)]
            optimizer.load_state_dict({"state": shares, "param_groups": then})
            for p, moments in optimizer.state.items():
                if not all(v.shape in (p.shape, ()) and is_finite(v) for v in moments.values()):
                    raise ValueError
        except Exception:                                     # PyTorch looks at nothing before use
            raise SystemExit("last.pt: refused: the state of its optimizer does not fit the "
                             "network") from None
        optimizer.param_groups = groups        # keep the current rates, restore the moments
    if saved["scaler"] and scaler.is_enabled():               # one of them may not be in float16
        if wrong := has(saved["scaler"], SCALER):
            raise SystemExit(f"last.pt: refused: the {wrong!r} of its scaler is missing or wrong")
        scaler.load_state_dict(saved["scaler"])
    return saved["step"], saved["best"], saved["skipped"]


# -----------------------------------------------------------------------------------------------
# what a run writes

class Run:
    """The files of a run: last.pt and best.pt, and log.csv with a row per step.

    about: what every checkpoint says of the run; columns: of log.csv besides those of LOG. Only the
    main process writes. Rows of log.csv after last_step are dropped, so that resuming repeats none.
    """

    def __init__(self, out_dir, about, last_step, process, columns=("val_bpb",)):
        self.out_dir, self.about, self.is_main = out_dir, about, process.is_main
        if not self.is_main:
            return
        path = f"{out_dir}/log.csv"
        kept = [row for row in read_log(path) if int(row["step"]) <= last_step]
        columns = [*LOG, *columns]
        with config.whole_file(path) as f:
            writer = csv.DictWriter(f, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
        self.file = open(path, "a", encoding="utf-8", newline="")
        self.writer = csv.DictWriter(self.file, columns, lineterminator="\n")

    def refuse(self, step, reason):
        raise SystemExit(f"step {step}: {reason}; nothing of it was saved: --resume goes on from "
                         f"{self.out_dir}/last.pt, perhaps with a lower learning rate")

    def log(self, row):
        if self.is_main:
            with config.disk_space(self.file.name):
                self.writer.writerow(row)

    def flush(self):
        """Bring the rows of log.csv to the disk."""
        if self.is_main:
            with config.disk_space(self.file.name):
                self.file.flush()
                os.fsync(self.file.fileno())

    def save(self, name, model, step, **more):
        """Write a checkpoint, in best.pt with LoRA's updates merged; every process calls it.

        SystemExit, on every process, if a weight is no longer finite.
        """
        if not all(is_finite(w.detach()) for w in model.parameters()):
            self.refuse(step, "the weights are no longer finite")
        self.flush()                                          # the log is never behind a checkpoint
        state = sharding.whole({"model": model.state_dict(), **more})
        if self.is_main:
            weights = state["model"]
            if name == "best.pt":              # merged as load() does it, and not on a full card
                weights = lora.merge({key: weight.cpu() for key, weight in weights.items()})
            if model.config.tie_embeddings:                   # moved, they are two copies
                weights["head.weight"] = weights["embedding.weight"]
            save(f"{self.out_dir}/{name}", {**self.about, "step": step, **state, "model": weights})


def read_log(path):
    """The rows of a log.csv as dicts of strings.

    Left out are a last line that was being written when the run died, and whatever is no row.
    """
    if not os.path.exists(path):
        return []
    head, *lines = Path(path).read_text("utf-8", "replace").split("\n")
    names, rows = head.split(","), []
    if names[:len(LOG)] != list(LOG):
        return []
    for line in lines[:-1]:                    # what follows the last line feed is not whole
        with suppress(ValueError):             # of what is no row
            row = dict(zip(names, line.split(","), strict=True))       # no cell holds a comma
            for name, cell in row.items():
                if cell or not name.startswith("val_"):
                    LOG.get(name, float)(cell)
            if int(row["step"]) > 0:
                rows.append(row)
    return rows


def read_run(path, last_step=math.inf):
    """The sessions in a run.json that ended at last_step or before; none if it cannot be read."""
    try:
        sessions = list(json.loads(Path(path).read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return []
    return [session for session in sessions
            if not has(session, SESSION) and session["to_step"] <= last_step]
