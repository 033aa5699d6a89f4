"""One page to keep and to show of a run: report.md beside the checkpoint.

    python -m extras.report     of out/pretrain and out/sft, or the one that is there

It computes nothing anew: the data are in meta.json, the losses in log.csv and best.pt, the speed in run.json, the score
of an evaluation in the first paragraph of the page that it wrote beside the checkpoint, with the fingerprint of that
checkpoint. Only the samples are drawn now.
"""
import config                                  # before torch: sets how its threads wait
import os
import re
import shlex
from glob import escape, glob
from statistics import fmean

import torch

import checkpoints
import runtime
from model import generate

pretrain_dir       = "out/pretrain"  # out_dir of pretrain.py; empty, or not there: the report is without it
sft_dir            = "out/sft"       # out_dir of sft.py; the same
out                = ""              # the page; empty: report.md in sft_dir, or in pretrain_dir if that is all there is
max_new_tokens     = 120             # of a sample at most; the prompts are the sample_prompts of the training
temperature        = 0.7             # of the samples; 0: always the most likely token
top_p              = 0.9             # draw from the fewest tokens whose probabilities reach this; 1: from all
repetition_penalty = 1.1             # above 1: tokens that have occurred become less likely
seed               = 1337            # of the draws, from 0 up
device             = "auto"          # auto | cuda | mps | cpu
dtype              = "auto"          # auto (bfloat16 where the device has it) | bfloat16 | float16 | float32
config.override(globals())

TITLE = "# Report card"


def table(head, rows):
    """Lines of a Markdown table; numbers get their commas."""
    cell = lambda value: f"{value:,}" if isinstance(value, (int, float)) else str(value).replace("|", "\\|")
    return ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head),
            *(f"| {' | '.join(map(cell, row))} |" for row in rows), ""]


def figures(folder, saved, n_params):
    """Lines: what was trained, how far, how well, how fast."""
    log, sessions = checkpoints.read_log(f"{folder}/log.csv"), checkpoints.read_run(f"{folder}/run.json")
    total = lambda name: sum(session[name] for session in sessions)
    rows = [("parameters", n_params), ("shape", ", ".join(f"{name} {value}" for name, value in saved["shape"].items())),
            ("tokenizer", saved["tokenizer"]),
            ("best.pt", f"step {saved['step']:,}: {saved['val_loss']:.4f} nats per token, {saved['val_bpb']:.4f} bits per "
                        "byte of the validation split")]
    if log:
        end = [float(row["loss"]) for row in log[-20:]]
        rows.append(("training", f"{int(log[-1]['step']):,} steps, {int(log[-1]['tokens']):,} tokens; loss "
                                 f"{float(log[0]['loss']):.4f} at first, {fmean(end):.4f} in the last {len(end)} steps"))
    if sessions:
        speed = total("timed_tokens") / max(1e-9, total("timed_seconds"))
        rows += [("speed", f"{speed:,.0f} tokens/s; {runtime.seconds_as_text(total('seconds'))} in all, with validation"),
                 ("memory, estimated", sessions[-1]["memory"])]
    return table([folder, ""], rows + [
        (f"steps {session['from_step'] + 1:,} to {session['to_step']:,}",
         f"{session['date']}, {session['device']}, PyTorch {session['torch']}") for session in sessions])


def data(saved, tok):
    """Lines: a row for each split and each corpus of meta.json; why, if that is no longer what was trained on."""
    path, columns = f"{saved['constants']['data_dir']}/meta.json", {"pretrain": ("documents", "tokens", "bytes"),
                                                                    "sft": ("examples", "tokens", "targets")}
    try:
        meta = checkpoints.read_meta(path, tok, f"prepare_{saved['stage']}.py")
    except SystemExit as sentence:
        return [f"The data are not known any more: {sentence}."]
    columns, corpora = columns[saved["stage"]], meta.get("corpora", {})
    return table([path, *columns, "dropped"], [
        [name, *(row[column] for column in columns),
         ", ".join(f"{n:,} {reason}" for reason, n in row.get("dropped", {}).items())]
        for name, row in {"train": meta["train"], "val": meta["val"], **corpora}.items()])


def samples(model, saved, tok):
    """Lines: what the model makes of each of the sample_prompts that it was watched with."""
    answers, lines = saved["stage"] == "sft", []
    for prompt in filter(None, saved["constants"]["sample_prompts"].split("|")):
        ids = tok.prompt([{"role": "user", "content": prompt}]) if answers else [tok.bos_id] + tok.encode(prompt)
        if len(ids) < model.config.max_seq_len:
            generator = torch.Generator(model.norm.weight.device).manual_seed(seed)
            new = [row[0] for row in generate(model, [ids], max_new_tokens, temperature, 0, top_p, repetition_penalty,
                                              tok.stop_ids if answers else {tok.eos_id}, generator=generator)]
            text = f"> {prompt}\n{tok.decode(new)}" if answers else tok.decode(ids + new)
            lines += ["", *(f"    {line}" for line in text.splitlines())]       # indented: Markdown leaves it as it is
    return lines + ["", "All constants:", ""]


def evaluations(folder, link):
    """A line for each page of eval_bleu.py or the exams in a folder: its scores, if they are those of best.pt."""
    lines, now = [], checkpoints.fingerprint(f"{folder}/best.pt")
    for path in sorted(glob(f"{escape(folder)}/*.md")):
        with open(path, encoding="utf-8", errors="replace") as f:
            summary = " ".join(f.read().partition("\n\n")[0].split())
        page = f"[{os.path.basename(path)}]({link(path)})"
        if scored := re.match(r"\S.*? \(([0-9a-f]{8})\): ", summary):
            lines.append(f"{summary} ({page})" if scored[1] == now else
                         f"{page} scores another checkpoint than best.pt is now: evaluate again")
    return lines


def main():
    folders = [folder for folder in (pretrain_dir, sft_dir) if folder and os.path.exists(f"{folder}/best.pt")]
    if not folders:
        raise SystemExit(f"no best.pt in {pretrain_dir or '-'} or {sft_dir or '-'}: train first, or name the folders with "
                         "--pretrain_dir= and --sft_dir=")
    config.check_range(1, max_new_tokens=max_new_tokens)
    config.check_drawing(temperature, top_p, repetition_penalty)
    page = out or f"{folders[-1]}/report.md"
    config.check_output("out", page)
    scores, lines = [], []
    link = lambda path: os.path.relpath(path, os.path.dirname(page) or ".").replace(os.sep, "/")
    for folder in folders:
        model, tok, saved = runtime.load_model(f"{folder}/best.pt", "", device, dtype)
        if not {"val_bpb", "constants"} <= saved.keys():
            raise SystemExit(f"{folder}/best.pt: no run of pretrain.py or sft.py wrote it, there is nothing to report")
        is_sft = saved["stage"] == "sft"
        scores.append(f"{folder}: {model.n_params() / 1e6:.1f} M parameters, **{saved['val_bpb']:.4f} bits per byte** of "
                      f"validation {'answers' if is_sft else 'text'}")
        scores += evaluations(folder, link)
        lines += ["", f"## {'Fine-tuning' if is_sft else 'Pretraining'}", *figures(folder, saved, model.n_params())]
        if os.path.exists(f"{folder}/curve.png"):
            lines.append(f"![loss over steps]({link(f'{folder}/curve.png')})")
        constants = shlex.join(f"--{name}={value}" for name, value in saved["constants"].items()
                               if name not in ("resume", "overwrite"))      # a copied command must not destroy the run
        lines += [*data(saved, tok), *samples(model, saved, tok), f"    python {saved['stage']}.py {constants}"]
    with config.whole_file(page) as f:
        f.write("\n".join([TITLE, "", *(f"- {score}" for score in scores), *lines]) + "\n")
    print("\n".join(scores) + f"\nreport: {page}")


if __name__ == "__main__":
    main()
