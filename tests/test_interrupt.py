"""Kill real runs at random moments, resume them, and compare with a run that nothing happened to: bit by bit.

    pytest tests/test_interrupt.py                          25 kills
    python tests/test_interrupt.py --kills=200 --seed=7     a soak
"""
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import config                                                                                # noqa: E402
from conftest import dialogue, story, train_tokenizer, write_pretrain, write_sft             # noqa: E402

kills = 25     # in all, over the kinds of run below
seed  = 1      # of the moments and the signals
config.override(globals())

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
SMALL = ["--batch_tokens=320", "--micro_batch=3", "--max_steps=30", "--warmup_steps=5", "--eval_interval=7",
         "--save_interval=2", "--log_interval=1", "--device=cpu", "--compile=off", "--sample_prompts="]
PRETRAIN = [str(ROOT / "pretrain.py"), "--tokenizer=tok.model", "--data_dir=bins", "--dim=32", "--n_layers=2", "--n_heads=2",
            "--max_seq_len=32", "--eval_tokens=640", *SMALL]
SFT = [str(ROOT / "sft.py"), "--tokenizer=tok.model", "--data_dir=sft", "--checkpoint=start/best.pt", *SMALL]
RUNS = {"pretrain": [sys.executable, *PRETRAIN, "--dtype=bfloat16"], "sft": [sys.executable, *SFT, "--dtype=float32"],
        "pretrain on two processes": [*TORCHRUN, *PRETRAIN, "--dtype=float32"]}
ENV = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")


def run(command, out_dir, cwd, kill_after=None, number=None):
    """Start a run, with a signal after some seconds if it still goes on then; returns (killed, its output)."""
    process = subprocess.Popen([*command, f"--out_dir={out_dir}"], cwd=cwd, env=ENV, text=True, encoding="utf-8",
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=kill_after)
        assert process.returncode == 0, output
        return False, output
    except subprocess.TimeoutExpired:
        # a machine that goes away takes all its processes at once
        for pid in family(process.pid) if number == signal.SIGKILL else [process.pid]:
            os.kill(pid, number)
        output, _ = process.communicate(timeout=120)
        return True, output


def family(pid):
    """A process and all below it: torchrun gives every worker a session of its own, so killing a group misses them."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):                     # without /proc: the process alone
        try:
            child, _, rest = stat.read_text().partition(" ")
        except OSError:                                                # it has just ended
            continue
        parents.setdefault(int(rest.rpartition(")")[2].split()[1]), []).append(int(child))
    found = [pid]
    for one in found:
        found += sorted(parents.get(one, []))
    return found


def final_state(out_dir):
    """What must be the same to the last bit: the log, and all tensors of the last and the best checkpoint."""
    def flat(x, path=""):
        items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, (list, tuple)) else None
        if items is None:
            return {path: x.numpy().tobytes() if isinstance(x, torch.Tensor) else x}
        return {k: v for name, value in items for k, v in flat(value, f"{path}/{name}").items()}

    states = [torch.load(out_dir / name, weights_only=True) for name in ("last.pt", "best.pt")]
    for state in states:
        state["constants"] = {k: v for k, v in state["constants"].items() if k not in ("out_dir", "resume")}
    return (out_dir / "log.csv").read_bytes(), *map(flat, states)


def soak(cwd, kills, seed):
    """Kill and resume until `kills` runs have died; AssertionError if one run's end differs from the undisturbed one."""
    rng, died, finished = random.Random(seed), 0, 0
    references = {}
    for name, command in RUNS.items():
        began = time.monotonic()
        run(command, "whole", cwd)
        references[name] = time.monotonic() - began, final_state(cwd / "whole")
        shutil.rmtree(cwd / "whole")
    while died < kills:
        name = list(RUNS)[finished % len(RUNS)]
        seconds, expected = references[name]
        killed = True
        while killed:
            moment = rng.uniform(0.2, 1.0) * seconds if died < kills else None
            number = rng.choice([signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT])
            killed, output = run([*RUNS[name], "--resume"], "killed", cwd, moment, number)
            died += killed
        assert final_state(cwd / "killed") == expected, f"{name}: the run that was killed ended otherwise"
        assert not list((cwd / "killed").glob("*.tmp")), "something half-written was left behind"
        shutil.rmtree(cwd / "killed")
        finished += 1
    print(f"seed {seed}: {died} runs killed, {finished} brought to their end, all bit-identical to undisturbed ones")


def prepare(cwd):
    """A tokenizer, bins, and a pretrained model to fine-tune."""
    tok = train_tokenizer(cwd / "tok.model", 400)
    rng = random.Random(seed)
    write_pretrain(cwd / "bins", tok, [story(rng, rng.choice([1, 2, 9])) for _ in range(60)], [story(rng, 3) for _ in range(9)])
    write_sft(cwd / "sft", tok, [dialogue(rng, rng.choice([1, 1, 2])) for _ in range(60)], [dialogue(rng, 1) for _ in range(9)])
    run([sys.executable, *PRETRAIN, "--max_seq_len=128", "--max_steps=3"], "start", cwd)


def test_killed_runs_resume_exactly(tmp_path):
    prepare(tmp_path)
    soak(tmp_path, kills, seed)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        soak(Path(folder), kills, seed)
