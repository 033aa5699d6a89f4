"""Constants at the top of a script, changed from the command line; output that ends no run; files
that are either whole or absent.

Every script of this project begins with a block of constants:

    lr      = 6e-4            # peak learning rate
    compile = False           # torch.compile the model
    out_dir = "out/pretrain"  # checkpoint, log.csv, curve.png
    constants = config.override(globals())

`python pretrain.py --lr=1e-3 --compile --out_dir=out/b` changes three of them, `--help` prints all
with the comments of the file. The values are parsed, never evaluated. No torch in here: the scripts
that only prepare text start at once.
"""
import difflib
import errno
import json
import math
import os
import re
import stat
import sys
import tempfile
import zlib
from contextlib import ExitStack, contextmanager
from pathlib import Path

# PyTorch's threads on a CPU wait for each other in a loop, which on a machine that also does
# something else takes the time that the others need. This ends the loop soon; it is read when
# torch is loaded, so that scripts import this file first.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

IS_MAIN = os.environ.get("RANK", "0") == "0"   # the first of the processes that torchrun started


# A constant of a script: its name, a plain value, and a comment
CONSTANT = re.compile(r'^(\w+) *= *(?:"[^"\n]*"|-?\d[\w.+-]*|True|False) *(?:# *(.*))?$', re.M)
LARGEST = {int: 2**63 - 1, float: 1e12}        # products of larger floats overflow in float32
EXPECTED = {bool: "true or false",
            int: "a whole number, at least 0 and below 2^63",
            float: "a number, at least 0 and at most 1e12",
            str: "text, and this is not in UTF-8: rename the file, or name the folder that "
                 "holds it"}
BOOLS = {"true": True, "1": True, "false": False, "0": False}


def override(namespace, argv=None, outlives_reader=False):
    """Change the constants that stand above this call by `--name=value`, and return them as a dict.

    namespace: the calling script's globals(); argv: the arguments, by default those of the command
    line when the script is run (and none when it is imported). A value takes the type of the
    default: bool (`--name` alone means true), int, float or str. outlives_reader: the script goes
    on when nobody reads its output any more. Raises SystemExit with one sentence for anything that
    does not fit.
    """
    # a spawned worker runs the script again, as __mp_main__
    is_script = namespace["__name__"] in ("__main__", "__mp_main__")
    if is_script:
        guard_streams(outlives_reader)
    if argv is None:
        argv = sys.argv[1:] if is_script else []
    comments = constants_of(namespace["__file__"])
    if "--help" in argv or "-h" in argv:
        print(f"{namespace['__doc__'].strip()}\n\nconstants and their defaults:")
        for name, comment in comments.items():
            constant = f"--{name}={namespace[name]!r}"
            print(f"  {constant:<38}  {comment}")
        raise SystemExit(0)
    module = namespace.get("__spec__")         # of python -m extras.NAME
    script = f"python -m {module.name}" if module else Path(namespace["__file__"]).name
    for i, argument in enumerate(argv):
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            raise SystemExit(f"{script}: {argument!r} is not of the form --name=value; "
                             f"see {script} --help")
        if name not in comments:
            near = difflib.get_close_matches(name, comments, n=1)
            hint = f"perhaps --{near[0]}=..." if near else f"see {script} --help"
            raise SystemExit(f"{script}: there is no constant {name!r}; {hint}")
        default = namespace[name]
        type_ = type(default)
        if not equals and type_ is not bool:
            value = [*argv[i + 1:], default][0]
            raise SystemExit(f"{script}: --{name} needs a value: write --{name}={value}")
        try:
            text.encode("utf-8")               # bytes in no encoding came as surrogates
            namespace[name] = parse(text if equals else "true", type_)
        except (KeyError, ValueError):
            raise SystemExit(f"{script}: --{name}={text}: must be {EXPECTED[type_]}; the default "
                             f"is {default!r}") from None
    return {name: namespace[name] for name in comments}


def parse(text, type_):
    """The value of this type that text spells; KeyError or ValueError if there is none."""
    if type_ is bool:
        return BOOLS[text.lower()]
    value = type_(text)
    if type_ is not str and not 0 <= value <= LARGEST[type_]:  # also what is not a number
        raise ValueError
    return value


def constants_of(path):
    """{name: comment} of the plain constants above the script's call of override()."""
    above, _, _ = Path(path).read_text("utf-8").partition("override(globals()")
    return dict(CONSTANT.findall(above))


class Output:
    """Standard output or standard error; its reader may go away, as in `| head`.

    Then a script ends with 141, as a shell reports SIGPIPE, or it goes on unread (outlives).
    """

    def __init__(self, stream, outlives):
        self.stream, self.outlives, self.end = stream, outlives, None

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        if self.end is not None and not self.outlives:
            raise SystemExit(self.end)
        return self.guarded(self.stream.write, text)

    def flush(self):
        self.guarded(self.stream.flush)

    def guarded(self, call, *arguments):
        try:
            return call(*arguments)
        except OSError as error:
            # Windows has EINVAL for a closed pipe; a log file can also meet a full disk
            closed = error.errno in (errno.EPIPE, errno.EINVAL)
            self.end = 141 if closed else f"standard output cannot be written: {error.strerror}"
            # what is still buffered goes nowhere, or flushing it at the exit would raise again
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def guard_streams(outlives):
    """Let no character, closed pipe or missing console end a script: text is there to be watched.

    The encoding stays the system's: a terminal on a Chinese Windows, and PowerShell's `> log.txt`,
    expect GBK, which holds nearly all Chinese. Other characters are written as \\uXXXX.
    """
    for name in "stdin", "stdout", "stderr":
        stream = getattr(sys, name)
        if stream is None:                    # closed by the parent, or pythonw
            stream = open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace" if name == "stdin" else "backslashreplace")
        if name != "stdin" and not isinstance(stream, Output):
            stream = Output(stream, outlives)
        setattr(sys, name, stream)


def say(sentence):
    """Print on the first of the processes."""
    if IS_MAIN:
        print(sentence, flush=True)


@contextmanager
def only_watching(what):
    """Around what only shows how a run goes: when it fails, say so and go on."""
    try:
        yield
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"{what}: not shown ({reason})", flush=True)


def check_range(low, high=math.inf, **constants):
    """SystemExit for the first of the constants that is not between low and high."""
    for name, value in constants.items():
        if not low <= value <= high:
            limits = f"between {low} and {high}" if high < math.inf else f"at least {low}"
            raise SystemExit(f"--{name}={value}: must be {limits}")


def check_drawing(temperature=1.0, top_p=1.0, repetition_penalty=1.0):
    """SystemExit for constants of sampling whose quotients no float32 holds."""
    if temperature:                                           # 0: nothing is drawn
        check_range(0.001, 1000, temperature=temperature)
    check_range(0.000_001, 1, top_p=top_p)
    check_range(0.01, 100, repetition_penalty=repetition_penalty)


def check_output(name, path):
    """SystemExit, before the work, if no file can be written to `path`, the constant `name`."""
    try:
        try:
            is_file = stat.S_ISREG(os.stat(path).st_mode)      # not a folder, /dev/null, a pipe
        except FileNotFoundError:
            is_file = os.path.basename(path)
        if not is_file:
            raise OSError(errno.EINVAL, "no file can have this name")
        parents = Path(path).absolute().parents
        folder = next(filter(os.path.lexists, parents), path)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:     # ValueError: a NUL in the name
        raise SystemExit(f"--{name}={path!r}: cannot be written: "
                         f"{getattr(error, 'strerror', None) or error}") from None


@contextmanager
def only_user_of(name, folder):
    """Around all work on a folder, the constant `name`: SystemExit if another process does such.

    The lock belongs to the process, so that it ends with it, however that ends. Where the file
    system knows no locks there is none.
    """
    if not folder:
        raise SystemExit(f"--{name}=: must name a folder")
    check_output(name, f"{folder}/x")
    missing = not os.path.exists(folder)
    os.makedirs(folder, exist_ok=True)
    file = locked(folder)
    try:
        yield
    finally:
        os.close(file)
        if missing and not os.listdir(folder):                # it was made for nothing
            os.rmdir(folder)


def locked(folder):
    """A file that is open as long as this process has the folder to itself."""
    if os.name == "nt":
        import msvcrt
        file = os.open(f"{folder}/.lock", os.O_RDWR | os.O_CREAT)
        lock = lambda: msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl
        file = os.open(folder, os.O_RDONLY)
        lock = lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        lock()
    except OSError as error:                  # others: a file system without locks
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            raise SystemExit(f"{folder}: another process is writing there; wait for its end, or "
                             "name another folder") from None
    return file


@contextmanager
def whole_file(path, mode="w"):
    """Open a file that takes its name only when it is whole: written aside, flushed, then renamed.

    Whatever interrupts the writing, `path` holds what it held before; a full disk ends in one
    sentence.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    aside = f"{path}.tmp"
    text = {} if "b" in mode else {
        "encoding": "utf-8", "errors": "backslashreplace",    # names of files can be in no encoding
        "newline": "\n"}
    try:
        with disk_space(path), open(aside, mode, **text) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


class Checksum:
    """A file that is being written, and the CRC-32 of what was written so far."""

    def __init__(self, file):
        self.file, self.crc32 = file, 0

    def write(self, data):
        self.crc32 = zlib.crc32(data, self.crc32)
        self.file.write(data)


@contextmanager
def whole_bins(folder, names, meta):
    """Open files of a folder of bins, {name: Checksum}; meta goes to meta.json, with their sums.

    meta.json is opened first and gets its name last: it proves that the other files are whole.
    """
    with ExitStack() as stack:
        meta_file = stack.enter_context(whole_file(f"{folder}/meta.json"))
        files = {}
        for name in names:
            file = whole_file(f"{folder}/{name}", "wb")
            files[name] = Checksum(stack.enter_context(file))
        yield files
        meta["crc32"] = {name: file.crc32 for name, file in files.items()}
        json.dump(meta, meta_file, ensure_ascii=False, indent=1)


@contextmanager
def disk_space(path):
    """Turn a full disk into one sentence."""
    try:
        yield
    except Exception as error:
        cause = error                          # torch.save raises another exception on top
        while cause and getattr(cause, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            cause = cause.__context__
        if cause is None:
            raise
        raise SystemExit(f"{path}: the disk is full; what was saved before is whole, free some "
                         "space and run the same command again") from None
