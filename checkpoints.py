"""What a run reads and writes: meta.json and the bins, checkpoints, log.csv, run.json. All of it is checked here, at
the door: what is damaged, foreign or of another run ends in one sentence.
"""
import csv
import json
import math
import os

import numpy as np
import torch

import config
import tokenizer as tokenizers

FORMAT = 1                                    # of checkpoints and bins; others are rejected


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


def save(path, state):
    with config.whole_file(path, "wb") as f:
        torch.save({"format": FORMAT, **state}, f)


def load(path, device="cpu"):
    """The dict that save() wrote; SystemExit if it is missing, not whole, newer, or holds more than data.

    A folder is one of Hugging Face, and read as if it were a checkpoint.
    weights_only: a checkpoint from elsewhere can carry tensors and plain values, but no code that runs.
    """
    if os.path.isdir(path):
        import huggingface                                    # needs safetensors, which few runs do
        return {"format": FORMAT, **huggingface.read_folder(path)}
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


def load_with_tokenizer(path, tokenizer=""):
    """The checkpoint of load() and its tokenizer: the one at `tokenizer`, or where the checkpoint says.
    SystemExit if it is not the one that the model was trained with."""
    saved = load(path)
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
    saved = load(path)
    if saved["stage"] != stage or "optimizers" not in saved:
        raise SystemExit(f"{path}: made by {saved['stage']}.py{', as best.pt' * ('optimizers' not in saved)}; only the "
                         f"last.pt of {stage}.py can be resumed here")
    differ = [f"{name} (then {saved['identity'].get(name)}, now {value})" for name, value in identity.items()
              if saved["identity"].get(name) != value]
    if differ:
        raise SystemExit(f"{path} is of a run with another {', '.join(differ)}; resume it with the constants it had")
    return saved


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
