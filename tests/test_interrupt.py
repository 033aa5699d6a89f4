"""Kill real runs at random moments, resume them, and compare with undisturbed runs, bit by bit.

    pytest tests/test_interrupt.py                          7 kills of training, 6 of preparing
    python tests/test_interrupt.py --kills=200 --seed=7     a soak
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import checkpoints                                                             # noqa: E402
import config                                                                  # noqa: E402
import conftest                                                                # noqa: E402
import runtime                                                                 # noqa: E402
from conftest import (                                                         # noqa: E402
    dialogue, story, train_tokenizer, write_pairs, write_pretrain, write_sft)

kills = 7      # of training, over the kinds of run below; in a soak as many of preparing
seed  = 1      # of the moments and the signals
config.override(globals())

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
            "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
SMALL = ["--tokenizer=tok.model", "--micro_batch=3", "--max_steps=30", "--warmup=0.17",
         "--eval_interval=7", "--save_interval=2", "--log_interval=1", "--device=cpu",
         "--sample_prompts="]
PRETRAIN = [str(ROOT / "pretrain.py"), "--data_dir=bins", "--dim=32", "--n_layers=2",
            "--n_heads=2", "--max_seq_len=32", "--eval_tokens=640", "--batch_tokens=320",
            "--compile=off", *SMALL]
SFT = [str(ROOT / "sft.py"), "--data_dir=sft", "--checkpoint=start/best.pt",
       "--batch_tokens=320", "--compile=off", *SMALL]
DPO = [str(ROOT / "dpo.py"), "--data_dir=dpo", "--checkpoint=start/best.pt", "--batch_pairs=8",
       *SMALL]
RUNS = {"pretrain": [sys.executable, *PRETRAIN, "--dtype=bfloat16"],
        "sft": [sys.executable, *SFT, "--dtype=float32"],
        "pretrain on two processes": [*TORCHRUN, *PRETRAIN, "--dtype=float32"],
        "dpo": [sys.executable, *DPO, "--dtype=float32"]}
READ = ["--tokenizer=tok.model", "--workers=2", "--val_fraction=0.2"]
PREPARE = {
    name: [sys.executable, str(ROOT / f"{name}.py"), f"--corpora={corpus}", *READ]
    for name, corpus in (("prepare_pretrain", "text:stories.jsonl"),
                         ("prepare_sft", "messages:chat.jsonl"))}
ALONE = [sys.executable, *PRETRAIN, "--dtype=float32"]
ENV = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")


def run(command, cwd, kill_after=None, number=None):
    """Start a run, with a signal after some seconds if it still goes on then.

    Returns (whether it was killed, its output).
    """
    process = subprocess.Popen(
        command, cwd=cwd, env=ENV, text=True, encoding="utf-8", stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=kill_after)
        assert process.returncode == 0, output
        return False, output
    except subprocess.TimeoutExpired:
        # a machine that goes away takes all its processes at once
        for pid in family(process.pid) if number == signal.SIGKILL else [process.pid]:
            with suppress(ProcessLookupError):                # it has just ended by itself
                os.kill(pid, number)
        output, _ = process.communicate(timeout=300)
        return True, output


def family(pid):
    """A process and all below it.

    torchrun gives every worker a session of its own, so killing a process group misses them.
    """
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):            # without /proc: the process alone
        try:
            child, _, rest = stat.read_text().partition(" ")
        except OSError:                                       # it has just ended
            continue
        parent = int(rest.rpartition(")")[2].split()[1])
        children.setdefault(parent, []).append(int(child))
    found = [pid]
    for one in found:
        found += sorted(children.get(one, []))
    return found


def flat(value, path=""):
    """{path: value} of nested dicts and lists, tensors as bytes."""
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {path: value.numpy().tobytes() if isinstance(value, torch.Tensor) else value}
    found = {}
    for name, inner in value.items():
        found |= flat(inner, f"{path}/{name}")
    return found


def final_state(out_dir):
    """What must be equal to the last bit: the log, all tensors of last.pt and of best.pt."""
    states = [torch.load(out_dir / name, weights_only=True) for name in ("last.pt", "best.pt")]
    for state in states:
        for name in "out_dir", "resume":
            del state["constants"][name]
    return (out_dir / "log.csv").read_bytes(), *map(flat, states)


def soak(cwd, kills, seed):
    """Kill and resume until `kills` runs have died.

    AssertionError if the end of one of them differs from that of the undisturbed run.
    """
    rng, died, finished = random.Random(seed), 0, 0
    references = {}
    for name, command in RUNS.items():
        began = time.monotonic()
        run([*command, "--out_dir=whole"], cwd)
        references[name] = time.monotonic() - began, final_state(cwd / "whole")
        shutil.rmtree(cwd / "whole")
    while died < kills:
        name = list(RUNS)[finished % len(RUNS)]
        seconds, expected = references[name]
        killed = True
        while killed:
            moment = rng.uniform(0.2, 1.0) * seconds if died < kills else None
            number = rng.choice([signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT])
            killed, output = run([*RUNS[name], "--out_dir=killed", "--resume"], cwd, moment, number)
            died += killed
        assert final_state(cwd / "killed") == expected, f"{name}: it ended otherwise"
        assert not list((cwd / "killed").glob("*.tmp")), "something half-written was left behind"
        shutil.rmtree(cwd / "killed")
        finished += 1
        if finished % 50 == 0:
            print(f"{died} killed, {finished} finished", flush=True)
    print(f"seed {seed}: {died} runs killed, {finished} brought to their end, all bit-identical to "
          "undisturbed ones", flush=True)


def contents(folder):
    """{file: its bytes}."""
    return {path.name: path.read_bytes() for path in folder.glob("*")}


def soak_preparing(cwd, kills, seed):
    """Kill the making of bins, in a folder with other ones.

    A file under its name is the old or the new one, and whole.
    """
    rng, died = random.Random(seed), 0
    for name, command in PREPARE.items():
        run([*command, "--val_fraction=0.4", "--data_dir=killed"], cwd)
        old, began = contents(cwd / "killed"), time.monotonic()
        run([*command, "--data_dir=whole"], cwd)
        seconds, new = time.monotonic() - began, contents(cwd / "whole")
        assert old.keys() == new.keys()
        assert all(old[file] != new[file] for file in ("train.bin", "meta.json"))
        for _ in range(kills // len(PREPARE)):
            number = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            before, moment = contents(cwd / "killed"), rng.uniform(0.2, 1.0) * seconds
            killed, output = run([*command, "--data_dir=killed"], cwd, moment, number)
            died += killed                                    # run() also waits for the workers
            after = contents(cwd / "killed")
            for file, data in after.items():
                assert file.endswith(".tmp") or data in (old[file], new[file]), file
            assert "interrupted" not in output or after.keys() <= before.keys(), output
        run([*command, "--data_dir=killed"], cwd)
        assert contents(cwd / "killed") == new
        for folder in "killed", "whole":
            shutil.rmtree(cwd / folder)
    print(f"seed {seed}: {died} preparations killed, all files old or new and whole, and the same "
          "bytes in the end")


def prepare(cwd):
    """A tokenizer, bins, and a pretrained model to fine-tune."""
    tok = train_tokenizer(cwd / "tok.model", 400)
    rng = random.Random(seed)
    texts = [story(rng, rng.choice([1, 2, 9])) for _ in range(60)]
    write_pretrain(cwd / "bins", tok, texts, [story(rng, 3) for _ in range(9)])
    dialogues = [dialogue(rng, rng.choice([1, 1, 2])) for _ in range(60)]
    write_sft(cwd / "sft", tok, dialogues, [dialogue(rng, 1) for _ in range(9)])
    pairs = [(dialogue(rng, 1)[:-1], story(rng, 1), story(rng, 1)) for _ in range(40)]
    write_pairs(cwd / "dpo", tok, pairs[:30], pairs[30:])
    write_lines(cwd / "stories.jsonl", ({"text": f"{i}：{story(rng, 40)}"} for i in range(1500)))
    write_lines(cwd / "chat.jsonl", ({"messages": [
        {"role": role, "content": f"{i}：{story(rng, 3)}"} for role in ("user", "assistant")]}
        for i in range(3000)))
    start = "--max_seq_len=128", "--max_steps=3", "--out_dir=start"
    run([sys.executable, *PRETRAIN, *start], cwd)


def write_lines(path, records):
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    prepare(folder)
    return folder


@pytest.fixture(scope="module")
def whole(prepared):
    """The end of a run that nothing happened to."""
    run([*ALONE, "--out_dir=undisturbed"], prepared)
    return final_state(prepared / "undisturbed")


def test_killed_runs_resume_exactly(prepared):
    soak(prepared, kills, seed)


def test_killed_preparations_leave_whole_files(prepared):
    soak_preparing(prepared, 6, seed)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the workers in Linux's /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("name", PREPARE)
def test_workers_end_with_the_main_process_also_where_ctrl_c_is_ignored(
        prepared, tmp_path, name, number):
    """As behind nohup, and in a shell script for what it starts with &."""
    large = tmp_path / "large.jsonl"
    kind, _, small = PREPARE[name][2].partition(":")
    large.write_bytes((prepared / small).read_bytes() * 40)
    command = [*PREPARE[name][:2], f"{kind}:{large}", *READ, f"--data_dir={tmp_path / 'bins'}"]
    process = subprocess.Popen(
        command, cwd=prepared, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    while len(workers := family(process.pid)[1:]) < 3:        # two, and Python's own helper
        assert process.poll() is None and not time.sleep(0.01)
    process.send_signal(number)
    try:
        output, _ = process.communicate(timeout=30)           # the workers, too, have closed theirs
    finally:
        for pid in family(process.pid) + workers:
            if os.path.exists(f"/proc/{pid}"):
                os.kill(pid, signal.SIGKILL)
    assert process.returncode == (143 if number == signal.SIGTERM else -9)
    if number == signal.SIGTERM:
        assert "interrupted" in output and "Traceback" not in output
        assert contents(tmp_path / "bins") == {}


TWO_SIGNALS = """
import os, signal, runtime
rows = runtime.batch_rows
def interrupted(step, *rest):
    for _ in range(2 if step == 4 else 0):
        os.kill(os.getpid(), signal.SIGINT)
    return rows(step, *rest)
runtime.batch_rows = interrupted
"""


def test_a_second_ctrl_c_quits_in_the_middle_of_the_step(prepared, tmp_path, whole):
    done = conftest.run("pretrain.py", prepared, *ALONE[2:], f"--out_dir={tmp_path}/out",
                        code=TWO_SIGNALS)
    assert done.rc == 130 and "Traceback" not in done.err
    assert done.err.index("stopping after this step") < done.err.index("stopped at once")
    assert checkpoints.load(f"{tmp_path}/out/last.pt")["step"] == 4
    run([*ALONE, f"--out_dir={tmp_path}/out", "--resume"], prepared)
    assert final_state(tmp_path / "out") == whole


def test_a_process_that_outlives_torchrun_from_its_start_ends_in_one_sentence(prepared, tmp_path):
    """torchrun died while its process loaded PyTorch, so that nobody listens at its address."""
    orphan = dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="9",
                  TORCHELASTIC_USE_AGENT_STORE="True")
    code = (f"import os; os.environ.update({orphan}); import runtime; "
            "runtime.TORCHRUN_ANSWERS = runtime.timedelta(seconds=1)")
    done = conftest.run("pretrain.py", prepared, *ALONE[2:], f"--out_dir={tmp_path}", code=code,
                        timeout=60)
    assert done.rc == 1 and "Traceback" not in done.err
    assert "the others did not come" in done.err.splitlines()[-1]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]
    if not hasattr(os, "geteuid") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes a Linux and its root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def fill(disk, leave):
    """Take all the space but so many bytes; returns the file that does."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "ballast").write_bytes(bytes(max(0, free - leave)))
    return disk / "ballast"


# no room for the log at the start; for its rows; for a checkpoint
@pytest.mark.parametrize("leave", [0, 8192, 100_000])
def test_training_on_a_full_disk_ends_in_one_sentence_and_resumes_exactly(
        prepared, small_disk, whole, leave):
    command = [*ALONE[2:], f"--out_dir={small_disk}/out", "--resume"]
    killed = conftest.run("pretrain.py", prepared, *command, code=TWO_SIGNALS)
    ballast, before = fill(small_disk, leave), (small_disk / "out/last.pt").read_bytes()
    full = conftest.run("pretrain.py", prepared, *command)
    assert killed.rc == 130 and full.rc == 1, full.err
    assert "disk is full" in full.err and "Traceback" not in full.err, full.err
    assert not list((small_disk / "out").glob("*.tmp"))
    assert (small_disk / "out/last.pt").read_bytes() == before
    assert checkpoints.load(f"{small_disk}/out/last.pt")["step"] == 4
    ballast.unlink()
    assert conftest.run("pretrain.py", prepared, *command).rc == 0
    assert final_state(small_disk / "out") == whole


@pytest.mark.parametrize("leave", [0, 100_000])
@pytest.mark.parametrize("name", PREPARE)
def test_preparing_on_a_full_disk_ends_in_one_sentence_and_leaves_nothing(
        prepared, small_disk, name, leave):
    fill(small_disk, leave)
    done = conftest.run(f"{name}.py", prepared, *PREPARE[name][2:], f"--data_dir={small_disk}/bins")
    assert done.rc == 1 and "disk is full" in done.err and "Traceback" not in done.err, done.err
    assert contents(small_disk / "bins") == {}


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9 GB). Tried to allocate 256 bytes"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:113] DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_ends_in_one_sentence_that_halves_the_micro_batch(error):
    def training(micro_batch):
        constants = {"micro_batch": micro_batch}
        with pytest.raises(SystemExit) as stopped, runtime.memory_advice(constants):
            raise error
        assert "\n" not in stopped.value.code and "out of memory" in stopped.value.code
        return stopped.value.code
    assert "--micro_batch=8:" in training(16) and "--micro_batch=1:" in training(3)
    assert "--max_seq_len" in training(1)


def test_memory_that_really_runs_out_ends_in_one_sentence(prepared):
    """A matrix of 2^17 by 2^17 numbers, 64 GiB, in a process that may have 64 GiB in all."""
    large = ["--dim=131072", "--n_heads=1024", "--hidden_dim=64", "--n_layers=1"]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 36, 1 << 36))"
    done = conftest.run("pretrain.py", prepared, "--data_dir=bins", "--tokenizer=tok.model",
                        "--out_dir=large", "--device=cpu", *large, code=limit)
    assert done.rc == 1, done.err
    last = done.err.strip().splitlines()[-1]
    assert last.startswith("out of memory; try rows of half the length"), done.err
    assert "Traceback" not in done.err and not (prepared / "large/last.pt").exists()


@pytest.mark.parametrize("error", [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("x"),
    KeyboardInterrupt()])
def test_other_errors_pass_through_as_they_are(error):
    with pytest.raises(type(error)) as raised, runtime.memory_advice(16):
        raise error
    assert raised.value is error


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        soak(Path(folder), kills, seed)
        soak_preparing(Path(folder), kills, seed)
