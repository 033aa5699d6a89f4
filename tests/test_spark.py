"""Spark keeps the documents that one machine keeps, on a cluster that loses a worker as well; its
shards are read as one."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, run

import checkpoints
import pretrain

MADE_BY = "prepare_pretrain.py"
# few rows in a band and a low limit: large components, of which several documents stay
CONSTANTS = ["--val_fraction=0.2", "--n_permutations=64", "--n_bands=32", "--jaccard=0.5"]
SHARD_TOKENS = 3000
CLEAN = "documents are clean and encoded"


# ---- reading shards ------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=[1, 3, 40])
def cut(request, pretrain_dir, tok, tmp_path_factory):
    """(folder of bins, the same with train.bin cut into shards at random places, tokenizer)."""
    folder = tmp_path_factory.mktemp("cut")
    shutil.copytree(pretrain_dir, folder, dirs_exist_ok=True)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    ids = np.fromfile(folder / "train.bin", "<u2")
    rng = random.Random(4)
    places = sorted(rng.choices(range(len(ids) + 1), k=request.param - 1))      # some are empty
    for i, part in enumerate(np.split(ids, places)):
        part.tofile(folder / f"train-{i:05}.bin")
        meta["crc32"][f"train-{i:05}.bin"] = zlib.crc32(part)
    os.remove(folder / "train.bin")
    del meta["crc32"]["train.bin"]
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return pretrain_dir, folder, tok


def open_train(folder, tok):
    meta = checkpoints.read_meta(f"{folder}/meta.json", tok, MADE_BY)
    n = meta["train"]["tokens"]
    return checkpoints.open_tokens(f"{folder}/train.bin", n, meta, MADE_BY, tok.vocab_size)


def test_shards_are_read_as_one_file(cut):
    folder, shards, tok = cut
    whole, data = open_train(folder, tok), open_train(shards, tok)
    assert len(data) == len(whole)
    assert not os.path.exists(shards / "train.bin")
    rng = random.Random(5)
    for _ in range(300):
        start, stop = rng.randrange(len(whole) + 9), rng.randrange(len(whole) + 9)
        np.testing.assert_array_equal(data[start:stop], whole[start:stop])
    np.testing.assert_array_equal(data[:], whole)
    n_rows = (len(whole) - 1) // pretrain.max_seq_len + 1
    ours, expected = (pretrain.read_batch(some, range(n_rows), tok, torch.device("cpu"))
                      for some in (data, whole))
    assert all(a.equal(b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("damage, said", [
    (lambda path, data: path.unlink(), "missing"),
    (lambda path, data: path.write_bytes(data[:-2]), "checksum"),
    (lambda path, data: path.write_bytes(data[:-1]), "bytes"),
    (lambda path, data: path.write_bytes(bytes([data[0] ^ 1]) + data[1:]), "checksum")])
def test_a_damaged_shard_is_refused_by_its_name(cut, tmp_path, damage, said):
    _, shards, tok = cut
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    largest = max(tmp_path.glob("train-*.bin"), key=os.path.getsize)
    damage(largest, largest.read_bytes())
    with pytest.raises(SystemExit, match=f"{re.escape(largest.name)}: .*{said}"):
        open_train(tmp_path, tok)


def test_a_shard_that_meta_json_does_not_list_is_missed(cut):
    _, shards, tok = cut
    meta = checkpoints.read_meta(f"{shards}/meta.json", tok, MADE_BY)
    with pytest.raises(SystemExit, match=r"train-\*.bin: [\d,]+ numbers in all, where"):
        checkpoints.open_tokens(f"{shards}/train.bin", meta["train"]["tokens"] + 1, meta, MADE_BY,
                                tok.vocab_size)


# ---- Spark ---------------------------------------------------------------------------------------

def without_spark():
    """Why Spark cannot run here, or ""."""
    try:
        import pyspark
    except ImportError:
        return "pip install pyspark to test Spark"
    java_bin = os.path.join(os.environ.get("JAVA_HOME", ""), "bin")
    java = shutil.which("java", path=java_bin + os.pathsep + os.environ["PATH"])
    if os.name == "nt" or not java:
        return "Spark is tested where there is Java 17 and a POSIX system"
    said = subprocess.run([java, "-version"], capture_output=True, text=True).stderr
    version = re.search(r'version "(\d+)', said)
    return "" if version and int(version[1]) >= 17 else f"Spark needs Java 17: {said}"


needs_spark = pytest.mark.skipif(bool(without_spark()), reason=without_spark() or "-")


def sentence(rng, n):
    return "".join(map(chr, rng.choices(range(0x4E00, 0x4F00), k=n)))


def texts_with_copies(rng):
    """Texts, each with copies that drift away from it: b is near a, c near b, and not near a."""
    texts = []
    for i in range(60):
        text = [sentence(rng, 8) for _ in range(12)]
        for _ in range(rng.choice([1, 1, 2, 15])):
            texts.append("。".join(text))
            text[rng.randrange(12)] = sentence(rng, 8)
    texts += [*rng.choices(texts, k=20), "短", "！" * 50]
    rng.shuffle(texts)
    return texts


@pytest.fixture(scope="module")
def corpus(tok, tmp_path_factory):
    """Five files of two inputs, and what prepare_pretrain.py makes of them."""
    folder, rng = tmp_path_factory.mktemp("spark"), random.Random(6)
    texts = texts_with_copies(rng)
    (folder / "web").mkdir()
    for i in range(4):
        with open(folder / f"web/{i}.jsonl", "w", encoding="utf-8") as f:
            for text in texts[i::5]:
                f.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            f.write('{"text": "cut\n{"title": "no text"}\n')
    (folder / "lines.txt").write_text("\n".join(texts[4::5]), encoding="utf-8")
    arguments = [
        f"--corpora=txt_line:{folder}/lines.txt,text:{folder}/web",
        f"--tokenizer={tok.name}", *CONSTANTS]
    done = run("prepare_pretrain.py", folder, *arguments, "--data_dir=one", "--workers=1")
    assert done.rc == 0, done.err
    return folder, arguments


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Small and silent JVMs that talk over the loopback interface only."""
    folder = tmp_path_factory.mktemp("conf")
    (folder / "spark-defaults.conf").write_text(
        "spark.ui.enabled false\nspark.ui.showConsoleProgress false\nspark.driver.memory 512m\n"
        "spark.driver.host 127.0.0.1\nspark.driver.bindAddress 127.0.0.1\n"
        f"spark.executor.memory 512m\nspark.local.dir {folder}\n", encoding="utf-8")
    # JVMs that live for seconds are not worth an optimising compiler
    return {
        **os.environ,
        "JAVA_TOOL_OPTIONS": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
        "SPARK_CONF_DIR": str(folder),
        "SPARK_WORKER_DIR": str(folder),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "PYTHONUTF8": "1"}


def prepare(corpus, environment, name, master, when_clean=None):
    """extras.prepare_spark into the folder `name`; calls when_clean() after the first step."""
    folder, arguments = corpus
    command = [
        sys.executable, "-m", "extras.prepare_spark", *arguments,
        f"--data_dir={name}", f"--master={master}", f"--shard_tokens={SHARD_TOKENS}"]
    with open(folder / f"{name}.err", "w+", encoding="utf-8") as err:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, text=True, encoding="utf-8",
            stdout=subprocess.PIPE, stderr=err)
        with process:
            for line in process.stdout:
                if when_clean and CLEAN in line:
                    when_clean()
        err.seek(0)
        assert process.returncode == 0, err.read()[-3000:]
    return folder / name


def read_bins(folder, tok):
    """{split: [(document, perhaps its input)]}, checked against meta.json; and meta.json."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    splits = {}
    for split in "train", "val":
        n_tokens, documents = 0, []
        for name in sorted(meta["crc32"]):
            if name.startswith(split) and name.endswith(".bin"):
                ids = np.fromfile(folder / name, "<u2")
                path = folder / name.replace(".bin", ".corpus")
                inputs = np.fromfile(path, "<u2") if path.exists() else []
                assert meta["crc32"][name] == zlib.crc32(ids)
                n_tokens += len(ids)
                parts = np.split(ids, np.flatnonzero(ids == tok.eos_id) + 1)
                assert len(parts.pop()) == 0
                assert len(inputs) in (0, len(parts))
                documents += [(tok.decode(part.tolist()), *inputs[i:i + 1])
                              for i, part in enumerate(parts)]
        assert meta[split]["tokens"] == n_tokens
        assert meta[split]["documents"] == len(documents)
        splits[split] = documents
    return splits, meta


@pytest.fixture(scope="module")
def local(corpus, environment):
    return prepare(corpus, environment, "local", "local[2]")


@needs_spark
def test_the_same_documents_are_kept_as_on_one_machine(corpus, local, tok):
    folder, _ = corpus
    expected, of_one = read_bins(folder / "one", tok)
    found, meta = read_bins(local, tok)
    for split in "train", "val":
        texts = [text for text, _ in found[split]]
        assert sorted(texts) == sorted(text for text, *_ in expected[split])
        assert texts != sorted(texts)
    crc32, one_crc32 = meta.pop("crc32"), of_one.pop("crc32")
    assert meta == of_one
    assert list(meta["corpora"]) == list(of_one["corpora"])
    assert len(crc32) == 2 * (2 + meta["train"]["tokens"] // SHARD_TOKENS) > 6
    assert "val.bin" in one_crc32
    assert "val.bin" in crc32
    dropped = [row["dropped"] for row in meta["corpora"].values()]
    assert dropped[1]["no text"] == dropped[1]["broken JSON"] == 4
    assert all(row["near duplicate"] > 20 for row in dropped)
    assert dropped[1]["exact duplicate"]
    assert sorted(os.listdir(local)) == sorted([*crc32, "meta.json"])     # and no scratch files


@needs_spark
def test_every_document_is_counted_for_its_corpus(corpus, local, tok):
    found, meta = read_bins(local, tok)
    lines = set((corpus[0] / "lines.txt").read_text(encoding="utf-8").split("\n"))
    inputs = [number for split in found.values() for _, number in split]
    assert np.bincount(inputs).tolist() == [row["documents"] for row in meta["corpora"].values()]
    assert all(text in lines for split in found.values() for text, number in split if number == 0)


def start(environment, pattern, *command):
    """(process, what the pattern finds in its log) of a Spark daemon in a group of its own."""
    import pyspark
    spark_class = os.path.join(os.path.dirname(pyspark.__file__), "bin", "spark-class")
    process = subprocess.Popen(
        ["bash", spark_class, *command], env=environment, text=True, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.search(pattern, line):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, found[0]
    raise AssertionError("".join(said[-20:]))


def kill(process):
    """Kill a daemon and the executors that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def cluster(environment):
    """(address, workers) of a master and two workers with a core each."""
    deploy, processes = "org.apache.spark.deploy.", []
    try:
        master, address = start(
            environment, r"spark://127.0.0.1:\d+", deploy + "master.Master",
            "--host", "127.0.0.1", "--port", "0", "--webui-port", "0")
        processes.append(master)
        for _ in range(2):
            worker, _ = start(
                environment, "Successfully registered", deploy + "worker.Worker",
                "--host", "127.0.0.1", "--cores", "1", "--memory", "512m",
                "--webui-port", "0", address)
            processes.append(worker)
        yield address, processes[1:]
    finally:
        for process in processes:
            if process.poll() is None:
                kill(process)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@needs_spark
def test_a_cluster_of_two_workers_writes_the_same_bytes(corpus, environment, local, cluster):
    address, _ = cluster
    assert bytes_of(prepare(corpus, environment, "cluster", address)) == bytes_of(local)


@needs_spark
def test_a_worker_that_is_killed_changes_nothing(corpus, environment, local, cluster):
    address, (_, worker) = cluster
    folder = prepare(corpus, environment, "killed", address, when_clean=lambda: kill(worker))
    assert worker.poll() == -signal.SIGKILL
    assert bytes_of(folder) == bytes_of(local)


@needs_spark
def test_what_is_missing_ends_in_one_sentence(corpus, environment):
    folder, arguments = corpus
    hide = "import sys; sys.modules['pyspark'] = None"
    done = run("extras.prepare_spark", folder, *arguments, "--data_dir=x", code=hide)
    assert done.rc == 1
    assert done.err.strip().endswith("pip install pyspark")
    hide = "import os; os.environ['JAVA_HOME'] = '/nowhere'"
    done = run("extras.prepare_spark", folder, *arguments, "--data_dir=x", code=hide)
    assert done.rc == 1
    assert "(Java 17 or newer, --master=)" in done.err
    assert "Traceback" not in done.err
    assert not (folder / "x").exists()
