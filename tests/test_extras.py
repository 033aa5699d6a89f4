"""extras/: what the scripts there share.

They run as modules, and nothing of the top level needs them.
"""
import ast
from collections import defaultdict

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from test_training import constants, save_model

from extras import positions
from model import Model, ModelConfig

MODULES = sorted(ROOT.glob("extras/*.py"))
SCRIPTS = [path.stem for path in MODULES if "__main__" in path.read_text("utf-8")]


def imported(path):
    """The names of all modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_the_top_level_imports_nothing_of_extras():
    found = {path.name: set(imported(path)) for path in ROOT.glob("*.py")}
    assert "model" in found["pretrain.py"]
    assert len(found) > 9
    for name, modules in found.items():
        assert "extras" not in {module.split(".")[0] for module in modules}, name


@pytest.mark.parametrize("name", SCRIPTS)
def test_usage_names_the_command_that_runs_it(name, tmp_path):
    helped = run(f"extras.{name}", tmp_path, "--help")
    assert helped.rc == 0, helped.err
    assert f"python -m extras.{name}" in helped.out
    assert "constants and their defaults" in helped.out


def test_a_wrong_constant_is_answered_with_the_command_for_help(tmp_path):
    wrong = run("extras.export", tmp_path, "--xyzxyz=1")
    assert wrong.rc == 1
    assert wrong.err.count("\n") == 1
    assert "see python -m extras.export --help" in wrong.err


@pytest.mark.parametrize("argument", ["--out=a_file", "--docs=nowhere"])
def test_pictures_that_cannot_be_drawn_end_in_a_sentence_before_the_work(tmp_path, argument):
    (tmp_path / "a_file").touch()
    wrong = run("extras.draw", tmp_path, argument)
    assert wrong.rc == 1
    assert wrong.err.count("\n") == 1
    assert argument.split("=")[1] in wrong.err


def test_the_loss_by_position_is_that_of_each_document_alone(tok, pretrain_dir, tmp_path, capsys):
    torch.manual_seed(0)
    T = 32
    model = Model(ModelConfig(tok.vocab_size, 32, 1, 2, max_seq_len=40))
    save_model(tmp_path / "best.pt", model, tok, "pretrain")
    settings = dict(
        checkpoint=str(tmp_path / "best.pt"),
        data_dir=str(pretrain_dir),
        max_seq_len=T,
        n_rows=3,
        batch_size=2,
        device="cpu",
        dtype="float32",
    )
    with constants(positions, **settings):
        positions.main()
    ids = np.fromfile(pretrain_dir / "val.bin", "<u2").astype(int).tolist()
    nats_of = defaultdict(list)  # {bucket of positions: nats of its targets}
    for start in range(0, 3 * T, T):
        tokens = ids[start : start + T + 1]  # the last row is shorter
        n = max(0, len(tokens) - 1)
        starts = [0] + [i for i in range(1, n) if tokens[i] == tok.eos_id] + [n]
        for a, b in zip(starts, starts[1:]):
            seen = [tok.bos_id if i == tok.eos_id else i for i in tokens[a:b]]
            log_p = model(torch.tensor([seen]))[0].log_softmax(-1)
            for position, target in enumerate(tokens[a + 1 : b + 1]):
                bucket = (position + 1).bit_length()
                nats_of[bucket].append(-log_p[position, target].item())
    table = capsys.readouterr().out.splitlines()[2:]
    assert len(table) == len(nats_of) > 3
    for line, bucket in zip(table, sorted(nats_of)):
        n, mean = line.split("|")[2:4]
        expected = nats_of[bucket]
        assert int(n) == len(expected)
        assert float(mean) == pytest.approx(sum(expected) / len(expected), abs=1e-4)
