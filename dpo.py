"""Direct preference optimization: pairs of answers and a fine-tuned checkpoint -> a model that
prefers the better one.

    python dpo.py                                   one GPU, a Mac, or the CPU
    torchrun --nproc_per_node=4 dpo.py              four GPUs of one machine

For every question there is a chosen and a rejected answer. The model learns to make the chosen one
likelier than the rejected one, compared with the model that it started from, the reference
(Rafailov et al. 2023, arXiv:2305.18290). The loop is that of sft.py; `diff sft.py dpo.py` shows
what is different. Writes to out_dir: last.pt, best.pt, log.csv, run.json, curve.png.
"""
import config                                  # before torch: sets how its threads wait
import math
import os
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoints
import lora
import runtime
from model import IGNORE, Model, generate
from optim import make_optimizers
from tokenizer import load as load_tokenizer

# data
checkpoint      = "out/sft/best.pt"       # the model to start from, and the reference
tokenizer       = "data/tokenizer.model"  # the one that prepare_sft.py was given
data_dir        = "data/dpo"              # {train,val}.{bin,mask,idx} of pairs, meta.json
out_dir         = "out/dpo"               # last.pt, best.pt, log.csv, curve.png
resume          = False                   # go on from out_dir/last.pt exactly, if it is there
overwrite       = False                   # start anew although out_dir holds a run
max_seq_len     = 0                       # tokens of an example at most; 0: as the model reads
# optimization; a step is an optimizer step
batch_pairs     = 32                      # pairs per step over all processes
micro_batch     = 4                       # pairs per process and pass; fewer need less memory
epochs          = 1.0                     # passes over the pairs
max_steps       = 0                       # steps; 0: as many as epochs asks for
beta            = 0.1                     # larger: the model stays closer to the reference
label_smoothing = 0.0                     # share of the pairs that may be the wrong way round
nll_weight      = 0.2                     # of the chosen answers' loss: it keeps them likely
lr              = 1e-4                    # peak learning rate of AdamW (embeddings, head, norms)
muon_lr         = 1e-4                    # peak learning rate of Muon (the rest); 0: AdamW for all
lr_min          = 0.1                     # where the cosine ends, as a fraction of the peak
warmup          = 0.1                     # linear warm-up, a share of the steps, 500 at most; 0: no
weight_decay    = 0.0                     # on matrices only
grad_clip       = 1.0                     # clip the gradient's norm to this; 0: off
lora_rank       = 0                       # train updates of this rank only (lora.py); 0: everything
lora_alpha      = 32.0                    # the updates count lora_alpha / lora_rank times
seed            = 1337                    # of the order of the data and of LoRA's first updates
# machine
shard           = ""                      # optimizer | full: processes share it (sharding.py)
offload         = False                   # with shard: the shares are in the host's memory
recompute       = False                   # compute blocks twice: less memory, a third more time
device          = "auto"                  # auto | cuda | mps | cpu
dtype           = "auto"                  # auto (bfloat16 if fast) | bfloat16 | float16 | float32
# watching
eval_interval   = 50                      # steps between validations; saves last.pt, best.pt
eval_pairs      = 500                     # validate on this many pairs at most
save_interval   = 0                       # steps between further saves of last.pt; 0: none
log_interval    = 10                      # steps between printed lines
sample_prompts  = "你好！|你是谁？"         # answered at validations; separated by |; empty: none
sample_tokens   = 80                      # tokens of each answer at most
constants = runtime.override(globals())

# columns of log.csv, see evaluate()
COLUMNS = "val_accuracy val_margin val_preferred val_chosen val_rejected".split()


def prepare(folder):
    """What to do, in words, if there are no pairs."""
    return (f"run python prepare_sft.py --data_dir={folder} with a corpus of preferences "
            "(python corpora.py lists them)")


class Pairs:
    """The pairs of one split: examples 2 i and 2 i + 1 of the bins are the chosen and the rejected
    answer to one question.

    n: their number; longest: inputs of the longest example; chosen_targets (n,): tokens of each
    chosen answer; reference (2, n): see log_probs_of().
    """

    def __init__(self, part, meta, size, vocab_size):
        n = meta[part]["examples"]
        if not meta.get("pairs") or n % 2:
            raise SystemExit(f"{data_dir}: holds no pairs of answers; {prepare('data/dpo')}")
        self.tokens, self.mask, self.starts, lengths, targets = checkpoints.open_examples(
            data_dir, part, meta, size, vocab_size)
        self.n, self.longest = n // 2, int(lengths.max(initial=0))
        self.chosen_targets, self.reference = targets[::2], None


def read_batch(data, pairs, tok, device):
    """Inputs and targets (2 n, T) of n pairs: the n chosen answers first, then the n rejected.

    A row is one example, padded to the longest of them. Padding stands behind the text, where no
    token looks at it, and its targets do not count.
    """
    examples = np.concatenate((2 * pairs, 2 * pairs + 1))
    starts, ends = data.starts[examples], data.starts[examples + 1]
    shape = len(examples), int((ends - starts).max()) - 1
    x, y = np.full(shape, tok.pad_id), np.full(shape, IGNORE)
    for b, (start, end) in enumerate(zip(starts, ends)):
        ids, mask = data.tokens[start:end].astype(np.int64), data.mask[start:end]
        x[b, :len(ids) - 1] = ids[:-1]
        y[b, :len(ids) - 1] = np.where(mask[1:], ids[1:], IGNORE)
    return [runtime.to_device(a, device) for a in (x, y)]


def log_probs(model, x, y):
    """The log-probability of each answer in nats, (2, n) float32: those chosen, those rejected."""
    return -model(x, y, per_token=True).sum(1).view(2, -1)


def preferences(logp, reference):
    """The loss of each pair, (n,), and its reward margin in nats, (n,).

    logp, reference (2, n): log-probabilities under the model and under the reference. Rafailov et
    al. 2023, equation 7; label smoothing: Mitchell 2023, "A note on DPO with noisy preferences".
    """
    chosen, rejected = beta * (logp - reference)
    margin = chosen - rejected
    right, wrong = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return (1 - label_smoothing) * right + label_smoothing * wrong, margin


def schedule(step):
    """Learning rate of a step (from 1) as a fraction of its peak: warm-up, then a cosine."""
    warmup_steps = min(500, round(warmup * max_steps))
    if step <= warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return lr_min + (1 - lr_min) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def log_probs_of(model, data, n, tok, autocast, process):
    """The log-probabilities of the first n pairs, (2, n) float32; each process computes a share."""
    found = np.zeros((2, n))
    # some twice, so that all processes have as many
    order = np.resize(np.arange(n), math.ceil(n / process.world_size) * process.world_size)
    rounds = runtime.micro_batches(order, micro_batch, process)
    for pairs in tqdm(rounds, leave=False, disable=None if process.is_main else True):
        x, y = read_batch(data, pairs, tok, process.device)
        with autocast:
            found[:, pairs] = log_probs(model, x, y).cpu().numpy()
    sums = runtime.total(found.flatten(), process)             # 0 where another process computed
    return (np.reshape(sums, (2, n)) / np.bincount(order)).astype(np.float32)


def saved_reference(saved, part, n):
    """The reference's log-probabilities of a split in last.pt, (2, n) float32."""
    found = saved.get("reference")
    found = found.get(part) if isinstance(found, dict) else None
    fits = torch.is_tensor(found) and found.shape == (2, n) and found.isfinite().all()
    if not fits:
        raise SystemExit(f"{out_dir}/last.pt: refused: the reference's log-probabilities of the "
                         f"{n} pairs of {part} are missing or wrong; start anew with --overwrite")
    return found.float().numpy()


def evaluate(model, data, n, tok, autocast, process):
    """{column of log.csv: value} on the first n pairs.

    accuracy: share of pairs whose margin is above 0; preferred: share of pairs whose chosen answer
    is the likelier one; chosen, rejected: mean log-probability of an answer in nats.
    """
    logp = log_probs_of(model, data, n, tok, autocast, process)
    reference = torch.from_numpy(data.reference[:, :n])
    loss, margin = preferences(torch.from_numpy(logp), reference)
    values = (loss.mean(), (margin > 0).float().mean(), margin.mean(), (logp[0] > logp[1]).mean(),
              *logp.mean(1))
    return dict(zip(("val_loss", *COLUMNS), map(float, values)))


def sample(model, tok, autocast, process):
    """Print the most likely answers to sample_prompts."""
    for prompt in filter(None, sample_prompts.split("|")):
        ids = tok.prompt([{"role": "user", "content": prompt}])
        if len(ids) >= model.config.max_seq_len:
            print(f"  | {prompt[:20]}... ({len(ids)} tokens: too long for the context, left out)")
            continue
        with autocast:
            steps = generate(model, [ids], sample_tokens, temperature=0, stop_ids=tok.stop_ids)
            new = [token for (token,) in steps]
        print(f"  | {prompt} -> {tok.decode(new)}".replace("\n", "\n  | "), flush=True)


def main():
    global max_steps, max_seq_len
    config.check_range(1, batch_pairs=batch_pairs, micro_batch=micro_batch, eval_pairs=eval_pairs,
                       eval_interval=eval_interval, log_interval=log_interval)
    config.check_range(0, beta=beta, nll_weight=nll_weight, lora_rank=lora_rank)
    config.check_range(0, 0.5, label_smoothing=label_smoothing)
    made_by = "prepare_sft.py"
    tok = load_tokenizer(tokenizer)
    if not os.path.exists(f"{data_dir}/meta.json"):
        raise SystemExit(f"{data_dir}/meta.json: not there; {prepare(data_dir)}")
    meta = checkpoints.read_meta(f"{data_dir}/meta.json", tok, made_by)
    pretrained = checkpoints.load_for(checkpoint, tok)
    shape = pretrained["shape"]
    max_seq_len = max_seq_len or shape["max_seq_len"]
    if max_seq_len > shape["max_seq_len"]:
        raise SystemExit(f"--max_seq_len={max_seq_len}: the model of {checkpoint} reads "
                         f"{shape['max_seq_len']} at most")
    train, val = (Pairs(part, meta, max_seq_len, tok.vocab_size) for part in ("train", "val"))
    n_val = min(val.n, eval_pairs)
    max_steps = max_steps or math.ceil(epochs * train.n / batch_pairs)
    if not (train.n and n_val and max_steps):
        raise SystemExit(f"{data_dir}: {train.n} pairs to train on, {n_val} to validate on, "
                         f"epochs is {epochs}: none of them may be 0; {made_by} with "
                         "more pairs, or a larger val_fraction")
    identity = {**shape, "max_seq_len": max_seq_len, "tokenizer": tok.sha256,
                "pairs": train.n, "data": checkpoints.data_hash(meta), "batch_pairs": batch_pairs,
                "seed": seed, "lora_rank": lora_rank, "lora_alpha": lora_rank and lora_alpha,
                "beta": beta, "nll_weight": nll_weight, "label_smoothing": label_smoothing}
    saved = checkpoints.open_run(out_dir, resume, overwrite, "dpo", identity)
    must_agree = {**constants, "the step of last.pt": saved and saved["step"]}
    process = runtime.start(device, batch_pairs, must_agree, offload)
    dtype_name, autocast, scaler = runtime.precision(process.device, dtype)
    runtime.check_sharding(shard, offload, "off", dtype_name, batch_pairs, process)

    model = Model.from_state(shape, pretrained.pop("model"))
    model.recompute = recompute
    if lora_rank:
        lora.add(model, lora_rank, lora_alpha, seed)
    forward = runtime.parallel(model, process, shard, dtype_name, offload)
    optimizers = make_optimizers(model, lr, 0 if lora_rank else muon_lr, weight_decay, dtype_name)
    # computed once, with the first model; after the optimizers, as it leaves the weights gathered
    for part, data in (("train", train), ("val", val)):
        if saved:
            data.reference = saved_reference(saved, part, data.n)
        else:
            data.reference = log_probs_of(model, data, data.n, tok, autocast, process)
    start, best, skipped = checkpoints.restore(saved, model, optimizers, scaler)
    saved = None                               # frees the host's memory
    facts = runtime.announce(model, process, dtype_name, max_steps - start, 2 * batch_pairs,
                             2 * micro_batch, 2 * train.n, max(train.longest, val.longest))
    about = {"stage": "dpo", "shape": shape, "identity": identity,
             "constants": constants, "tokenizer": tok.name, "tokenizer_sha256": tok.sha256}
    run = checkpoints.Run(out_dir, about, start, process, COLUMNS)
    reference = {"train": torch.from_numpy(train.reference), "val": torch.from_numpy(val.reference)}
    tokens_per_pair = len(train.tokens) / train.n
    meter = runtime.Meter(start, max_steps, process)
    stop, stopping = runtime.StopRequest(), False

    for step in range(start + 1, max_steps + 1):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * schedule(step)

        # the global batch is the same, however processes and rounds share its pairs
        pairs = runtime.batch_rows(step - 1, batch_pairs, train.n, seed)
        n_targets = int(train.chosen_targets[pairs].sum())
        rounds = runtime.micro_batches(pairs, micro_batch, process)
        losses = torch.zeros((), device=process.device)        # summed there, without waiting
        for i, share in enumerate(rounds):
            x, y = read_batch(train, share, tok, process.device)
            known = runtime.to_device(train.reference[:, share], process.device)
            # gradients are exchanged in the last round only; DDP decides that in the forward pass
            with nullcontext() if i == len(rounds) - 1 else forward.no_sync():
                with autocast:
                    logp = log_probs(forward, x, y)            # (2, n)
                # means over the global batch: of the pairs, and of the tokens of chosen answers
                loss, _ = preferences(logp, known)
                loss = loss.sum() / batch_pairs - nll_weight * logp[0].sum() / n_targets
                # DDP averages over processes, world_size undoes it
                scaler.scale(loss * process.world_size).backward()
            losses += loss.detach()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        grad_norm = runtime.clip_gradient(model, grad_clip)
        train_loss, stopping = runtime.total([losses, stop.code], process)
        if math.isfinite(grad_norm + train_loss):
            for optimizer in optimizers:
                optimizer.step()
        elif scaler.is_enabled() and scaler.get_scale() > 2**-64:
            skipped += 1                       # float16 overflowed: the scaler halves its scale
        else:
            run.refuse(step, f"the loss is {train_loss}, the gradient's norm {grad_norm}")
        scaler.update()
        runtime.clear_gradients(forward, optimizers)

        row = dict(step=step, tokens=round(step * batch_pairs * tokens_per_pair),
                   lr=lr * schedule(step), loss=train_loss, grad_norm=grad_norm)
        meter.step(row, skipped, log_interval)
        evaluating = step % eval_interval == 0 or step == max_steps
        if evaluating:
            with meter.paused():
                figures = evaluate(model, val, n_val, tok, autocast, process)
                process.print(f"step {step:>6}  validation: " + ", ".join(
                    f"{name.removeprefix('val_')} {value:.4f}" for name, value in figures.items()))
                row.update(figures)
                if figures["val_loss"] < best:
                    best = figures["val_loss"]
                    run.save("best.pt", model, step, **figures)
        run.log(row)
        if evaluating or stopping or (save_interval and step % save_interval == 0):
            run.save("last.pt", model, step, optimizers=[o.state_dict() for o in optimizers],
                     scaler=scaler.state_dict(), best=best, skipped=skipped,
                     reference=reference)
            meter.save(f"{out_dir}/run.json", facts)
        if evaluating and process.is_main and not shard:       # after saving, as it may fail
            with meter.paused(), config.only_watching("samples"):
                sample(model, tok, autocast, process)
        if stopping:
            process.print(f"stopped after step {step}, saved in {out_dir}/last.pt; --resume goes "
                          "on")
            break
    meter.close()
    run.flush()
    code = (stop.code or 143) if stopping else 0               # not 0, or a script would go on
    return runtime.finish(process, code, max(start, max_steps), best, out_dir,
                          f"preferences, {model.n_params() / 1e6:.1f} M parameters")


if __name__ == "__main__":
    with runtime.ending_together(), runtime.memory_advice(globals()), runtime.only_run_in(out_dir):
        code = main()
    raise SystemExit(code)
