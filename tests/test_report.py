"""extras/report.py through the scripts: a run that was interrupted, an evaluation, and the page that is made of them."""
import csv
import hashlib
import json
import re
import shutil

import pytest

import checkpoints
from conftest import run

SMALL = ["--batch_tokens=320", "--micro_batch=5", "--warmup=0.4", "--device=cpu", "--dtype=float32", "--tokenizer=tok.model"]


@pytest.fixture(scope="module")
def folder(tok, pretrain_dir, sft_dir, tmp_path_factory):
    """A folder with a pretraining run of two sessions, a fine-tuning run, the page of its BLEU, and two reports."""
    path = tmp_path_factory.mktemp("run")
    (path / "tok.model").write_bytes(open(tok.name, "rb").read())
    (path / "data").mkdir()
    for name, made in ("pretrain", pretrain_dir), ("sft", sft_dir):
        (path / "data" / name).symlink_to(made)
    meta = json.loads((sft_dir / "meta.json").read_text("utf-8"))
    (path / "q.jsonl").write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": "你好！" * n}, {"role": "assistant", "content": "好"}]}) + "\n" for n in (1, 2)), "utf-8")
    pretrain = ["pretrain.py", path, *SMALL, "--dim=32", "--n_layers=1", "--n_heads=2", "--eval_interval=3",
                f"--max_seq_len={meta['longest']}", "--sample_prompts=从前|今天"]
    for script, cwd, *arguments in (
            [*pretrain, "--max_steps=4", "--overwrite"], [*pretrain, "--max_steps=7", "--resume"],
            ["extras.report", path, "--device=cpu"],
            ["sft.py", path, *SMALL, "--max_steps=5", "--eval_interval=2", "--sample_prompts=你是谁？"],
            ["eval_bleu.py", path, "--questions=q.jsonl", "--max_new_tokens=9", "--device=cpu"],
            ["extras.report", path, "--device=cpu", "--max_new_tokens=12"]):
        done = run(script, cwd, *arguments)
        assert done.rc == 0, done.err
    return path


def read_log(folder):
    with open(folder / "log.csv", encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def best(folder):
    return min((row for row in read_log(folder) if row["val_loss"]), key=lambda row: float(row["val_loss"]))


def sections(folder):
    """The three parts of the page: scores, pretraining, fine-tuning."""
    return re.split(r"\n## .*\n", (folder / "out/sft/report.md").read_text("utf-8"))


def test_the_figures_are_those_of_the_logs(folder):
    scores, *stages = sections(folder)
    for name, of, page, step in (("pretrain", "text", stages[0], 7), ("sft", "answers", stages[1], 5)):
        lowest, end = best(folder / "out" / name), read_log(folder / "out" / name)
        assert f"**{float(lowest['val_bpb']):.4f} bits per byte** of validation {of}" in scores
        assert (f"step {lowest['step']}: {float(lowest['val_loss']):.4f} nats per token, "
                f"{float(lowest['val_bpb']):.4f} bits per byte") in page
        mean = sum(float(row["loss"]) for row in end) / len(end)
        assert (f"{step} steps, {int(end[-1]['tokens']):,} tokens; loss {float(end[0]['loss']):.4f} at first, "
                f"{mean:.4f} in the last {step} steps") in page
        for part, counts in json.loads((folder / "data" / name / "meta.json").read_text("utf-8")).items():
            if part in ("train", "val"):
                kinds = ("documents", "tokens", "bytes") if name == "pretrain" else ("examples", "tokens", "targets")
                assert f"| {part} | " + " | ".join(f"{counts[kind]:,}" for kind in kinds) + " |" in page


def test_the_summary_of_an_evaluation_is_quoted_and_its_page_linked(folder):
    summary = (folder / "out/sft/bleu.md").read_text("utf-8").split("\n\n")[0]
    assert re.search(r"BLEU-4 \d+\.\d\d on 2 questions", summary)
    assert f"- {summary} ([bleu.md](bleu.md))" in sections(folder)[0]
    assert "Report card" not in sections(folder)[0].removeprefix("# Report card"), "pretraining's own report is no evaluation"


def test_a_score_is_shown_beside_the_checkpoint_that_it_belongs_to_only(folder, tmp_path):
    """BLEU of best.pt as it was, an exam of best.pt as it is, notes in GBK, and then best.pt of another run."""
    shutil.copytree(folder / "out/sft", tmp_path / "run")
    (tmp_path / "tok.model").write_bytes((folder / "tok.model").read_bytes())
    best = tmp_path / "run/best.pt"
    saved = checkpoints.load(str(best))
    checkpoints.save(str(best), {**saved, "step": 99})
    now = hashlib.sha256(best.read_bytes()).hexdigest()[:8]
    (tmp_path / "run/ceval_val.md").write_text(f"run/best.pt ({now}): C-Eval val, 25.0 %\n\nmore\n", "utf-8")
    (tmp_path / "run/notes.md").write_bytes("笔记：BLEU 99".encode("gbk"))

    def scores():
        done = run("extras.report", tmp_path, "--device=cpu", "--max_new_tokens=1", "--pretrain_dir=", "--sft_dir=run")
        assert done.rc == 0, done.err
        return (tmp_path / "run/report.md").read_text("utf-8").split("\n## ")[0]
    assert f"- run/best.pt ({now}): C-Eval val, 25.0 % ([ceval_val.md](ceval_val.md))\n" in scores()
    assert "BLEU" not in scores() and "[bleu.md](bleu.md) scores another checkpoint" in scores()
    checkpoints.save(str(best), {**saved, "step": 100})
    assert "25.0" not in scores() and "[ceval_val.md](ceval_val.md) scores another checkpoint" in scores()


def test_the_command_to_copy_does_not_destroy_the_run(folder):
    _, pretrain, sft = sections(folder)
    for page, name in (pretrain, "pretrain"), (sft, "sft"):
        assert re.search(rf"\n    python {name}\.py --.*--max_steps=\d", page)
        assert "--overwrite" not in page and "--resume" not in page


def test_samples_continue_the_prompts_and_pictures_are_linked(folder):
    _, pretrain, sft = sections(folder)
    assert re.search("\n    从前.", pretrain) and re.search("\n    今天.", pretrain) and re.search("\n    > 你是谁？\n    .", sft)
    assert "](../pretrain/curve.png)" in pretrain and "](curve.png)" in sft
    again = run("extras.report", folder, "--device=cpu", "--max_new_tokens=12", "--out=again/card.md")
    assert again.rc == 0, again.err
    expected = "\n## ".join(["", pretrain]).replace("](../pretrain/", "](../out/pretrain/")
    assert expected.strip("\n# ") in (folder / "again/card.md").read_text("utf-8")


def test_every_session_of_a_run_is_timed(folder):
    first, second = sessions = json.loads((folder / "out/pretrain/run.json").read_text("utf-8"))
    assert [(s["from_step"], s["to_step"]) for s in sessions] == [(0, 4), (4, 7)]
    per_step = int(read_log(folder / "out/pretrain")[0]["tokens"])
    for session, steps in (first, 3), (second, 2):                     # the first step of a session is not timed
        assert session["timed_tokens"] == steps * per_step and 0 < session["timed_seconds"] < session["seconds"]
    speed = 5 * per_step / (first["timed_seconds"] + second["timed_seconds"])
    page = sections(folder)[1]
    assert f"| speed | {speed:,.0f} tokens/s; " in page
    assert "| steps 1 to 4 | " in page and "| steps 5 to 7 | " in page and second["torch"] in page


def test_either_stage_may_be_missing(folder, tmp_path):
    alone = (folder / "out/pretrain/report.md").read_text("utf-8")     # made before there was a fine-tuned model
    assert "## Pretraining" in alone and "Fine-tuning" not in alone and "](curve.png)" in alone
    for arguments in [], ["--pretrain_dir="], ["--pretrain_dir=", "--sft_dir="]:
        none = run("extras.report", tmp_path, *arguments)
        assert none.rc == 1 and none.err.count("\n") == 1 and "no best.pt in" in none.err


def test_a_checkpoint_without_a_run_is_refused(folder, tmp_path):
    saved = checkpoints.load(str(folder / "out/sft/best.pt"))
    checkpoints.save(str(tmp_path / "best.pt"), {name: saved[name] for name in saved if name != "val_bpb"})
    done = run("extras.report", folder, "--pretrain_dir=", f"--sft_dir={tmp_path}")
    assert done.rc == 1 and done.err.count("\n") == 1 and "nothing to report" in done.err


def test_data_that_are_gone_are_said_to_be_gone(folder, tmp_path):
    for name in "out", "tok.model":
        (tmp_path / name).symlink_to(folder / name)
    done = run("extras.report", tmp_path, "--device=cpu", "--max_new_tokens=1", "--sft_dir=", "--out=card.md")
    assert done.rc == 0, done.err
    page = (tmp_path / "card.md").read_text("utf-8")
    assert "The data are not known any more: data/pretrain/meta.json: not there" in page and "bits per byte" in page
