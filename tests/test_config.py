"""config.py: constants from the command line, and files that are whole or absent."""
import ast
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run

import config

ROOT = Path(config.__file__).parent
SCRIPT = '''"""A script."""
import math
LETTERS = ["a"]
steps   = 1_000              # optimizer steps
rate    = 3e-4               # of learning; "#" stands in here
shift   = 1                  # of the start
name    = "out/a # b"        # a folder
compile = False              # faster
limit   = 10                 # of documents; 0: all
constants = config.override(globals())
later   = 3                  # no constant: it stands below
'''


# The constants of SCRIPT.
CONSTANTS = {
    "steps": 1000,
    "rate": 3e-4,
    "shift": 1,
    "name": "out/a # b",
    "compile": False,
    "limit": 10}


@pytest.fixture
def override(tmp_path):
    """override(*arguments) -> the constants of SCRIPT, run with them."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")

    def call(*argv):
        namespace = {
            "__name__": "__main__",
            "__file__": str(path),
            "__doc__": "A script.",
            "later": 3,
            "LETTERS": ["a"],
            **CONSTANTS}
        constants = config.override(namespace, list(argv))
        assert all(namespace[key] == value for key, value in constants.items())
        return constants
    return call


def refused(call, *argv):
    with pytest.raises(SystemExit) as stopped:
        call(*argv)
    assert isinstance(stopped.value.code, str)
    assert "\n" not in stopped.value.code  # one sentence, exit code 1
    return stopped.value.code


@pytest.mark.parametrize("argument, said", [
    ("--rate=1e300", "at most 1e12"), ("--name=\udcd6\udcd0.jsonl", "not in UTF-8")])
def test_what_later_code_cannot_take_is_refused_at_once(override, argument, said):
    assert said in refused(override, argument)


def test_a_name_in_no_encoding_reaches_a_text_file_and_comes_back(tmp_path):
    with config.whole_file(str(tmp_path / "meta.json")) as f:
        json.dump({"第一": "\udcd6\udcd0.txt"}, f, ensure_ascii=False)
    assert json.loads((tmp_path / "meta.json").read_text("utf-8")) == {"第一": "\udcd6\udcd0.txt"}


def test_without_arguments_the_constants_are_those_of_the_file(override):
    assert override() == CONSTANTS


@pytest.mark.parametrize("argument, name, value", [
    ("--steps=7", "steps", 7),
    ("--steps=0", "steps", 0),
    ("--rate=1", "rate", 1.0),
    ("--rate=0", "rate", 0.0),
    ("--rate=1e-3", "rate", 1e-3),
    ("--compile", "compile", True),
    ("--compile=true", "compile", True),
    ("--compile=False", "compile", False),
    ("--compile=0", "compile", False),
    ("--limit=0", "limit", 0),
    ("--name=a=b", "name", "a=b"),
    ("--name=", "name", ""),
    ("--name=从前", "name", "从前")])
def test_a_value_takes_the_type_of_its_default(override, argument, name, value):
    changed = override(argument)
    assert changed[name] == value
    assert type(changed[name]) is type(value)
    assert {**override(), name: value} == changed


@pytest.mark.parametrize("argument, said", [
    ("--steps=1.5", "whole number"),
    ("--steps=", "whole number"),
    ("--steps", "write --steps=1000"),
    ("--steps=-3", "at least 0"),
    ("--limit=-1", "at least 0"),
    ("--limit=12345678901234567890123", "2^63"),
    ("--rate=fast", "a number"),
    ("--rate=nan", "a number"),
    ("--rate=inf", "a number"),
    ("--rate=-1e-3", "at least 0"),
    ("--compile=maybe", "true or false"),
    ("steps=3", "--name=value"),
    ("--step=3", "--steps"),
    ("--nmae=x", "--name"),
    ("--zzzz=1", "--help"),
    ("--later=4", "no constant"),
    ("--LETTERS=b", "no constant"),
    ("--=1", "no constant"),
    ("--__name__=x", "no constant")])
def test_what_does_not_fit_is_refused_in_one_sentence(override, argument, said):
    assert said in refused(override, argument)


def test_a_value_behind_a_space_is_answered_with_the_form_that_works(override):
    assert refused(override, "--name", "明月").endswith("write --name=明月")


def test_a_range_is_named_in_the_refusal():
    config.check_range(1, steps=1, rows=5)
    config.check_drawing(0.0, 1.0, 1.0)
    with pytest.raises(SystemExit, match="--rows=0: must be at least 1"):
        config.check_range(1, steps=1, rows=0)
    with pytest.raises(SystemExit, match="--share=2: must be between 0 and 1"):
        config.check_range(0, 1, share=2)
    out_of_range = [
        {"temperature": 1e-300},
        {"temperature": 1e-38},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-300}]
    for constant in out_of_range:
        with pytest.raises(SystemExit):
            config.check_drawing(**constant)


def test_a_value_is_never_evaluated(override, tmp_path):
    attack = f"open({str(tmp_path / 'ran')!r}, 'w')"
    assert override(f"--name={attack}")["name"] == attack
    refused(override, f"--steps={attack}")
    refused(override, "--steps=3+4")
    assert not (tmp_path / "ran").exists()


def test_help_prints_every_constant_with_default_and_comment(override, capsys):
    with pytest.raises(SystemExit) as stopped:
        override("--help")
    assert stopped.value.code == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    shown = {line[1]: line[-1].strip() for line in lines if len(line) > 1}
    assert shown == {
        "--steps=1000": "optimizer steps",
        "--rate=0.0003": 'of learning; "#" stands in here',
        "--shift=1": "of the start",
        "--name='out/a # b'": "a folder",
        "--compile=False": "faster",
        "--limit=10": "of documents; 0: all"}


def test_an_imported_script_ignores_the_command_line(override, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pytest", "--steps=9", "-q"])
    path = tmp_path / "script.py"
    namespace = {"__name__": "script", "__file__": str(path), "__doc__": "", **CONSTANTS}
    assert config.override(namespace)["steps"] == 1000
    spawned = {**namespace, "__name__": "__mp_main__"}  # as in a spawned worker
    assert config.override(spawned, ["--steps=9"])["steps"] == 9


SCRIPTS = [
    path for path in [*ROOT.glob("*.py"), *ROOT.glob("extras/*.py")]
    if path.name != "config.py" and "override(globals())" in path.read_text("utf-8")]


@pytest.mark.parametrize("script", sorted(str(path.relative_to(ROOT)) for path in SCRIPTS))
def test_every_constant_of_every_script_has_a_comment(script):
    comments = config.constants_of(ROOT / script)
    assert comments
    assert [name for name, comment in comments.items() if not comment] == []
    tree = ast.parse((ROOT / script).read_text("utf-8"))
    assert ast.get_docstring(tree), "--help prints the docstring"


def test_what_only_shows_a_run_may_fail(capsys):
    with config.only_watching("curve"):
        raise SystemExit("no\nroom")
    assert capsys.readouterr().out == "curve: not shown (no room)\n"
    with pytest.raises(KeyboardInterrupt), config.only_watching("curve"):
        raise KeyboardInterrupt


def test_a_whole_file_takes_its_name_only_at_the_end(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with config.whole_file(str(path)) as f:
        f.write("从前\n")
        assert not path.exists()
    assert path.read_bytes() == "从前\n".encode()  # UTF-8 and \n on every system
    assert os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), KeyboardInterrupt(), OSError(errno.EIO, "broken disk")])
def test_when_the_writer_raises_the_old_file_stays_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)):
        with config.whole_file(str(path), "wb") as f:
            f.write(b"new")
            raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_full_disk_ends_in_one_sentence_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write():
        with config.whole_file(str(path), "wb") as f:
            f.write(b"new")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    said = refused(write)
    assert "disk is full" in said
    assert str(path) in said
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
# the small one fails in flush(), the large one in write() already
@pytest.mark.parametrize("numbers", [10, 100_000])
def test_a_checkpoint_on_a_full_disk_ends_in_one_sentence(tmp_path, numbers):
    torch, checkpoints = pytest.importorskip("torch"), pytest.importorskip("checkpoints")
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")
    os.symlink("/dev/full", f"{path}.tmp")
    assert "disk is full" in refused(checkpoints.save, str(path), {"x": torch.zeros(numbers)})
    assert path.read_bytes() == b"old"


def script(folder, body, **namespace):
    """A script with constants and this body, and the command that runs it."""
    path = folder / "script.py"
    path.write_text(
        f'"""A script: 明月."""\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\nimport config\n'
        "lines = 3      # how many; 照\n"
        "config.override(globals(), outlives_reader='outlives' in sys.argv[0])"
        f"\n{body}", encoding="utf-8")
    return [sys.executable, str(path)]


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "cp1252", "utf-8"])
@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_no_character_ends_a_script_whatever_the_encoding_of_its_output(
        tmp_path, encoding, arguments):
    command = script(
        tmp_path,
        "print('明月 😀 \\ud800', file=sys.stderr)\n"
        "print('明月 😀 \\ud800 the end')")
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([*command, *arguments], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr, done.stderr
    assert (b"--lines=3" if arguments else b"the end") in done.stdout
    assert ("明月".encode(encoding, "backslashreplace")) in done.stdout


def test_a_lost_console_ends_nothing(tmp_path):
    command = script(
        tmp_path,
        "print('x', flush=True)\nsys.stdout.flush()\nprint('y', file=sys.stderr)\n"
        "try:\n    input()\nexcept EOFError:\n    open('whole', 'w').close()")
    shell = subprocess.run(["sh", "-c", '"$0" "$1" <&- >&- 2>&-', *command], cwd=tmp_path)
    assert shell.returncode == 0
    assert (tmp_path / "whole").exists()


@pytest.mark.parametrize("outlives, code", [(False, 141), (True, 0)])
@pytest.mark.parametrize("flush", [True, False])
def test_a_script_whose_reader_has_gone_ends_quietly_or_goes_on(tmp_path, outlives, code, flush):
    command = script(
        tmp_path,
        f"for i in range(100_000): print('明月', i, flush={flush})\n"
        "open('whole', 'w').close()")
    if outlives:
        command[1] = shutil.copy(command[1], tmp_path / "outlives.py")
    with open(tmp_path / "err", "wb") as err:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=err)
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=60) == code
        assert (tmp_path / "whole").exists() == outlives
    assert (tmp_path / "err").read_bytes() == b""


def test_the_last_words_of_a_script_may_find_no_reader(tmp_path):
    command = script(tmp_path, "sys.stdin.read()\nprint('x')")
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) in (0, 141)  # 141: unbuffered


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
def test_a_log_on_a_full_disk_ends_a_script_with_a_sentence(tmp_path):
    command = script(tmp_path, "for _ in range(9): print('x', flush=True)")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "standard output cannot be written" in done.stderr
    assert done.stderr.count("\n") == 1


# ---- outputs -------------------------------------------------------------------------------------

def outputs(folder):
    """Paths below the folder that cannot be written."""
    (folder / "file").write_text("x")
    (folder / "folder").mkdir()
    return [
        "",
        f"{folder}/folder",
        f"{folder}/folder/",
        f"{folder}/file/a",
        f"{folder}/file/a/b/c",
        "a\0b",
        "x" * 300,
        "/proc/nothing/a"]


def test_an_output_that_cannot_be_written_is_refused_and_the_check_leaves_nothing(
        tmp_path, monkeypatch):
    bad = outputs(tmp_path)
    if hasattr(os, "mkfifo"):                  # like /dev/null, not to be replaced by a file
        os.mkfifo(tmp_path / "pipe")
        bad.append(f"{tmp_path}/pipe")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for path in bad:
        assert "--out=" in refused(config.check_output, "out", path), path
    for path in "a", f"{tmp_path}/a", f"{tmp_path}/new/b/c", "new/b", f"{tmp_path}/file":
        config.check_output("out", path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("script, name", [
    ("train_tokenizer.py", "out"),
    ("prepare_pretrain.py", "data_dir"),
    ("prepare_sft.py", "data_dir"),
    ("pretrain.py", "out_dir"),
    ("sft.py", "out_dir"),
    ("eval_bleu.py", "out")])
def test_a_script_refuses_an_output_before_its_work(tmp_path, script, name):
    (tmp_path / name).mkdir()
    # an empty --out of eval_bleu.py is its default: beside the checkpoint
    for path in [""] * (script != "eval_bleu.py") + [outputs(tmp_path / name)[3]]:
        done = run(script, tmp_path, f"--{name}={path}")
        assert done.rc == 1, done.err
        assert f"--{name}=" in done.err, done.err
        assert done.err.count("\n") == 1, done.err


def test_a_folder_has_one_user_and_an_unused_new_one_vanishes(tmp_path):
    folder = tmp_path / "new" / "out"
    body = (
        f"with config.only_user_of('out_dir', {str(folder)!r}):\n"
        "    print('in', flush=True)\n    sys.stdin.read()")
    command = script(tmp_path, body)
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"in\n"
    second = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert second.returncode == 1
    assert "another process" in second.stderr
    assert second.stderr.count("\n") == 1
    first.kill()
    first.wait()
    # the lock does not outlive a kill -9
    assert subprocess.run(command, stdin=subprocess.DEVNULL).returncode == 0
    with config.only_user_of("out_dir", str(folder)), config.whole_file(str(folder / "a")) as f:
        f.write("x")
    assert os.listdir(folder) == ["a"]
    for path in "", "a\0b", str(folder / "a"):
        assert "--out_dir=" in refused(config.only_user_of("out_dir", path).__enter__)
    with config.only_user_of("out_dir", str(tmp_path / "unused")):
        pass
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("script", [
    "pretrain", "sft", "sample", "eval_bleu", "extras.exams", "extras.report", "extras.bench"])
def test_the_threads_of_torch_do_not_wait_in_a_loop(script):
    """The variable is there before torch, and a user's own value stays."""
    code = (
        "import os, sys\nclass Finder:\n    def find_spec(name, *more):\n"
        "        if name == 'torch':\n            print(os.environ.get('GOMP_SPINCOUNT'))\n"
        "            sys.stdout.flush(); os._exit(0)\n"
        f"sys.meta_path.insert(0, Finder)\nimport {script}")
    environment = dict(os.environ)
    environment.pop("GOMP_SPINCOUNT", None)
    for own, expected in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**environment, **own}, cwd=ROOT,
            capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr
