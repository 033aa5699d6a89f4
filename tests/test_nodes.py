"""Processes of several machines: two torchrun on the loopback interface, each in its own folder."""
import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT, run
from test_interrupt import family, final_state

import checkpoints

# 5 rows a step: no two processes have the same share.
SETTINGS = [
    "--tokenizer=tok.model", "--data_dir=bins", "--out_dir=out", "--sample_prompts=",
    "--dim=32", "--n_layers=2", "--n_heads=2", "--max_seq_len=32",
    "--batch_tokens=160", "--micro_batch=2", "--max_steps=12", "--warmup=0.17",
    "--eval_interval=5", "--save_interval=3", "--log_interval=1",
    "--device=cpu", "--dtype=float32", "--compile=off"]
pytestmark = pytest.mark.skipif(
    not os.path.isdir("/proc/self"), reason="finds the processes to kill in Linux's /proc")


@pytest.fixture(scope="module")
def machine(tok, pretrain_dir, tmp_path_factory):
    """machine() -> a new folder with a tokenizer and bins, as one machine has them."""
    def new():
        folder = tmp_path_factory.mktemp("machine")
        shutil.copy(tok.name, folder / "tok.model")
        shutil.copytree(pretrain_dir, folder / "bins")
        return folder
    return new


@pytest.fixture(scope="module")
def alone(machine):
    """The folder of a run that one process made from beginning to end."""
    folder = machine()
    done = run("pretrain.py", folder, *SETTINGS)
    assert done.rc == 0, done.err
    return folder


@pytest.fixture(scope="module")
def together(machine):
    """The folders of a run that two nodes made from beginning to end."""
    nodes = start([machine(), machine()])
    for node in ended(nodes):
        assert node.rc == 0, node.said
    return [node.folder for node in nodes]


def start(folders, *more, each=((), ()), script=ROOT / "pretrain.py"):
    """Start a torchrun of one process in every folder, with arguments for all and for `each`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    nodes = []
    for rank, folder in enumerate(folders):
        command = [
            "-m", "torch.distributed.run", f"--nnodes={len(folders)}", "--nproc_per_node=1",
            f"--node_rank={rank}", "--master_addr=127.0.0.1", f"--master_port={port}",
            str(script), *SETTINGS, *more, *each[rank]]
        nodes.append(torchrun(command, folder))
    return nodes


def torchrun(command, folder):
    """Start it; what it says goes to a file, which can be read while it runs."""
    with open(folder / "said.txt", "w", encoding="utf-8") as said:
        process = subprocess.Popen(
            [sys.executable, "-u", *command], cwd=folder, start_new_session=True,
            stdout=said, stderr=subprocess.STDOUT,
            env=dict(os.environ, PYTHONUNBUFFERED="1", PYTHONUTF8="1"))
    return SimpleNamespace(process=process, folder=folder)


def said(node):
    return (node.folder / "said.txt").read_text("utf-8")


def until(condition, seconds=120):
    """Wait until it holds; AssertionError after that many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def ended(nodes, seconds=120):
    """Wait for all; [.rc, .said, .folder]. Kills what still runs after that, and fails the test."""
    try:
        until(lambda: all(node.process.poll() is not None for node in nodes), seconds)
    finally:
        kill(nodes)
    return [
        SimpleNamespace(rc=node.process.returncode, said=said(node), folder=node.folder)
        for node in nodes]


def kill(nodes):
    """All their processes at once, as when the machines lose their power."""
    running = [node.process.pid for node in nodes if node.process.poll() is None]
    for pid in [pid for first in running for pid in family(first)]:
        os.kill(pid, signal.SIGKILL)
    for node in nodes:
        node.process.wait()


def at_step(folder, step, signal_name):
    """The path of a pretrain.py that sends itself a signal behind a step."""
    path = folder / "stopping.py"
    path.write_text(f"""import os, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import runtime
count = runtime.Meter.step
def step(self, row, *rest):
    count(self, row, *rest)
    if row["step"] == {step}:
        os.kill(os.getpid(), signal.{signal_name})
runtime.Meter.step = step
runpy.run_path({str(ROOT / "pretrain.py")!r}, run_name="__main__")
""", encoding="utf-8")
    return path


def filled(row):
    """The names of the columns of a row of the log that hold a value."""
    return {name for name, value in row.items() if value}


def read_log(folder):
    with open(folder / "out/log.csv", encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def assert_same_losses(a, b):
    """Every step once, and the same numbers but for the order in which processes add them up."""
    a, b = read_log(a), read_log(b)
    steps = [str(i) for i in range(1, 13)]
    assert [row["step"] for row in a] == steps
    assert [row["step"] for row in b] == steps
    for one, other in zip(a, b):
        assert filled(one) == filled(other)
        for name in filled(one):
            expected = pytest.approx(float(other[name]), rel=1e-5)
            assert float(one[name]) == expected, (one, other)


def test_two_nodes_have_the_losses_of_one_process_and_only_the_first_writes(together, alone):
    assert_same_losses(together[0], alone)
    written = {path.name for path in (together[0] / "out").iterdir()}
    assert {"last.pt", "best.pt", "log.csv"} <= written
    assert sorted(path.name for path in together[1].iterdir()) == ["bins", "said.txt", "tok.model"]
    assert "2 x cpu" in (together[0] / "said.txt").read_text("utf-8")
    assert "step " not in (together[1] / "said.txt").read_text("utf-8")


def test_two_nodes_that_lost_their_power_resume_exactly(machine, together):
    first, second = machine(), machine()
    # the nodes stop there and wait to be killed
    nodes = start([first, second], script=at_step(first, 8, "SIGSTOP"))
    until(lambda: "step      8/12" in said(nodes[0]))
    kill(nodes)
    assert (first / "out/last.pt").exists()
    assert not list((first / "out").glob("*.tmp"))
    (second / "out").mkdir()
    shutil.copy(first / "out/last.pt", second / "out")
    for node in ended(start([first, second], "--resume")):
        assert node.rc == 0, node.said
    assert "step      6/12" not in said(nodes[0])                   # it did go on
    assert final_state(first / "out") == final_state(together[0] / "out")


@pytest.mark.parametrize("what", ["last.pt", "lr", "max_steps"])
def test_nodes_that_differ_end_in_one_sentence(machine, together, what):
    folders, each = [machine(), machine()], ((), ())
    if what == "last.pt":
        shutil.copytree(together[0] / "out", folders[0] / "out")
        each = ("--resume",), ("--resume",)
    else:
        each = (), (f"--{what}=11",)
    before = {path.name: path.read_bytes() for path in folders[0].glob("out/*")}
    differs = "the step of last.pt" if what == "last.pt" else what
    for node in ended(start(folders, each=each)):
        assert node.rc != 0, node.said
        assert f"do not agree on {differs}" in node.said, node.said
        # below it stands torchrun's own report, but no traceback of ours
        assert "pretrain.py\", line" not in node.said
    assert before == {path.name: path.read_bytes() for path in folders[0].glob("out/*")}


def test_a_node_that_cannot_start_does_not_leave_the_other_waiting(machine):
    folders = [machine(), machine()]
    os.remove(folders[1] / "bins/train.bin")
    one, two = ended(start(folders), seconds=60)
    assert one.rc != 0
    assert two.rc != 0
    assert "train.bin: " in two.said
    assert "process 1 cannot begin: " in one.said
    assert "train.bin: " in one.said


@pytest.mark.parametrize("wrong", ["--max_steps=many", "--mask_document=0"])
def test_a_constant_that_is_wrong_on_one_node_ends_both(machine, wrong):
    sentence = {
        "--max_steps=many": "--max_steps=many: must be a whole number",
        "--mask_document=0": "there is no constant 'mask_document'; perhaps --mask_documents",
    }[wrong]
    nodes = start([machine(), machine()], each=((), (wrong,)))
    one, two = ended(nodes, seconds=60)
    assert one.rc != 0
    assert two.rc != 0
    assert sentence in two.said
    assert "process 1 cannot begin: " in one.said
    assert sentence in one.said


def endless_run(folder):
    """Start two processes on one machine that would train forever; returns them after step 8."""
    command = [
        "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0", str(ROOT / "pretrain.py")]
    node = torchrun([*command, *SETTINGS, "--max_steps=1000000"], folder)
    until(lambda: "step      8/" in said(node))
    return node


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_takes_the_others_with_it(machine, rank):
    node = endless_run(machine())
    workers = family(node.process.pid)[1:]
    os.kill(workers[rank], signal.SIGKILL)
    [done] = ended([node], seconds=60)
    assert done.rc != 0
    assert "Signal 9" in done.said
    assert len(workers) == 2
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)
    assert checkpoints.load(str(node.folder / "out/last.pt"))["step"] >= 6


def test_workers_do_not_outlive_their_torchrun(machine):
    """Else they go on unseen, and write over what a resumed run writes."""
    node = endless_run(machine())
    workers = family(node.process.pid)[1:]
    os.kill(node.process.pid, signal.SIGKILL)
    node.process.wait()
    try:
        until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers), seconds=20)
    finally:
        for pid in workers:
            if os.path.exists(f"/proc/{pid}"):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("micro_batches", [(1, 3, 5)])
def test_resuming_with_other_numbers_of_processes_and_rows_gives_the_same_losses(
        machine, alone, micro_batches):
    """1 -> 2 -> 1 processes, each with another micro-batch."""
    folder = machine()
    for processes, micro_batch, last in zip((0, 2, 0), micro_batches, (5, 9, 12)):
        script = at_step(folder, last - 1, "SIGTERM")
        settings = [*SETTINGS, "--resume", f"--micro_batch={micro_batch}"]
        done = run(script, folder, *settings, torchrun=processes)
        assert done.rc != 0, done.err  # it was stopped
        assert f"{max(processes, 1)} x cpu" in done.out, done.err
        assert f"stopped after step {last}, saved" in done.out
    assert_same_losses(folder, alone)
