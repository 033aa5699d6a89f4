"""sample.py: continuing a text, answering, and the chat in the terminal; tiny random models."""

import io
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import run

import config
from checkpoints import save
import sample
from model import Model, ModelConfig, generate

SIZE = 64  # tokens of the context


@pytest.fixture(scope="module")
def checkpoints(tok, tmp_path_factory):
    """{stage: path} of one random network, and the network."""
    torch.manual_seed(0)
    model = Model(
        ModelConfig(
            tok.vocab_size, dim=32, n_layers=1, n_heads=2, max_seq_len=SIZE, tie_embeddings=False
        )
    ).eval()
    for p in model.parameters():  # large enough to say different things
        torch.nn.init.normal_(p, std=0.3)
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {}
    for stage in ("pretrain", "sft"):
        paths[stage] = str(folder / f"{stage}.pt")
        save(
            paths[stage],
            {
                "stage": stage,
                "model": model.state_dict(),
                "shape": vars(model.config),
                "tokenizer": tok.name,
                "tokenizer_sha256": tok.sha256,
            },
        )
    return paths, model


@pytest.fixture
def say(checkpoints, monkeypatch, capsys):
    """say(stage, **constants) -> (what sample.py prints, what it remarks on stderr)."""

    def call(stage, stdin="", **constants):
        defaults = dict(
            checkpoint=checkpoints[0][stage], device="cpu", dtype="float32", max_new_tokens=12
        )
        for name, value in {**defaults, **constants}.items():
            monkeypatch.setattr(sample, name, value)
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        sample.main()
        return capsys.readouterr()

    return call


def continuation(model, tok, ids, n, stop_ids):
    """The greedy text, from generate(), which test_model.py checks."""
    with torch.no_grad():
        return tok.decode(
            [row[0] for row in generate(model, [ids], n, temperature=0, stop_ids=stop_ids)]
        )


def test_a_pretrained_model_continues_the_prompt(say, tok, checkpoints):
    said = say("pretrain", prompt="从前，小猫", temperature=0.0)
    expected = continuation(
        checkpoints[1], tok, [tok.bos_id] + tok.encode("从前，小猫"), 12, {tok.eos_id}
    )
    assert expected
    assert said.out == "从前，小猫" + expected + "\n"
    assert "tokens/s" in said.err


@pytest.mark.parametrize("continues, text", [(True, " upon"), (False, "upon")])
def test_a_space_is_part_of_a_continuation_but_does_not_begin_an_answer(
    monkeypatch, capsys, continues, text
):
    """Llama 2's kind of vocabulary: a text begins with a space that is not its own."""
    tok = SimpleNamespace(piece=[b" once", b" upon"].__getitem__, dummy_space="always")
    model = SimpleNamespace(config=SimpleNamespace(max_seq_len=SIZE))
    monkeypatch.setattr(sample, "generate", lambda *args, **named: iter([[1]]))
    assert sample.stream(model, tok, [0], (), None, continues) == text
    assert capsys.readouterr().out == text + "\n"


def test_compiled_steps_say_the_same(say):
    plain, compiled = (
        say("pretrain", prompt="从前，小猫", compile=choice).out for choice in (False, True)
    )
    assert compiled == plain


def test_a_fine_tuned_model_answers_the_prompt(say, tok, checkpoints):
    said = say("sft", prompt="你是谁？", temperature=0.0)
    expected = continuation(
        checkpoints[1], tok, tok.prompt([{"role": "user", "content": "你是谁？"}]), 12, tok.stop_ids
    )
    assert said.out == expected + "\n"


def test_an_empty_prompt_gives_a_text_from_nothing(say, tok, checkpoints):
    assert (
        say("pretrain", temperature=0.0).out
        == continuation(checkpoints[1], tok, [1], 12, {2}) + "\n"
    )


def test_several_samples_differ_and_the_same_seed_repeats_them(say):
    how = dict(prompt="今天", n_samples=3, temperature=1.0, top_p=1.0)
    first, again, other = (say("pretrain", **how, seed=seed).out for seed in (7, 7, 8))
    assert first == again != other
    parts = re.split(
        r"^--- (\d) of 3 ---\n", first, flags=re.M
    )  # told apart whatever their lines are
    assert parts[0] == ""
    assert parts[1::2] == ["1", "2", "3"]
    assert len(set(parts[2::2])) == 3
    assert all(text.startswith("今天") for text in parts[2::2])
    assert "---" not in say("pretrain", **{**how, "n_samples": 1}).out


def test_seed_0_is_different_every_time(say):
    assert (
        len(
            {
                say("pretrain", prompt="今天", temperature=1.0, top_p=1.0, seed=0).out
                for _ in range(4)
            }
        )
        > 1
    )


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize(
    "length", [SIZE - 14, SIZE - 13, SIZE - 12, SIZE - 11, SIZE - 1, SIZE, SIZE + 1, 500]
)
def test_of_a_prompt_longer_than_the_context_the_end_is_read(say, tok, monkeypatch, stage, length):
    heard = []
    text = ("0123456789" * 60)[:length]  # a token each
    answer = lambda model, prompts, *rest, **named: heard.extend(prompts) or iter([[20]])
    monkeypatch.setattr(sample, "generate", answer)
    said = say(stage, prompt=text, temperature=0.0)
    assert ("only its end is read" in said.err) == (
        length + (1 if stage == "pretrain" else 4) > SIZE - 12
    )
    [ids] = heard
    text_ids = tok.encode(text)
    header = 1 if stage == "pretrain" else 2  # bos, or bos and the role
    if len(ids) == length + (1 if stage == "pretrain" else 4):
        assert ids[header : header + length] == text_ids
    else:
        tail = len(ids) - 1  # one token of the beginning, then the end
        whole = (
            [tok.bos_id] + text_ids
            if stage == "pretrain"
            else tok.prompt([{"role": "user", "content": text}])
        )
        assert len(ids) == SIZE - 12
        assert ids == whole[:1] + whole[-tail:]


@pytest.mark.parametrize("max_new_tokens", [1, SIZE // 2, SIZE, 1000])
def test_any_max_new_tokens_leaves_room_for_the_prompt(say, max_new_tokens):
    for length in (1, SIZE // 2, SIZE):
        assert (
            "tokens/s" in say("pretrain", prompt="好" * length, max_new_tokens=max_new_tokens).err
        )


@pytest.fixture
def heard(monkeypatch):
    """The prompts of a chat as texts; the answers are 回答1。 and so on."""
    heard = []
    stream = (
        lambda model, tok, ids, stop_ids, generator: heard.append(tok.decode(ids))
        or f"回答{len(heard)}。"
    )
    monkeypatch.setattr(sample, "stream", stream)
    return heard


def test_a_chat_remembers_its_turns_until_it_is_told_to_forget(say, heard):
    said = say("sft", stdin="你好\n\n  \n你是谁\n/new\n天空\n", max_new_tokens=1)
    assert heard == ["你好", "你好回答1。你是谁", "天空"]  # an empty line does nothing
    assert "/new" in said.err.splitlines()[0]


@pytest.mark.parametrize("max_new_tokens", [SIZE // 2, 256])
def test_a_long_answer_that_may_come_does_not_cost_the_history(say, heard, max_new_tokens):
    say("sft", stdin="你好\n你是谁\n天空\n", max_new_tokens=max_new_tokens)
    assert heard[2] == "你好回答1。你是谁回答2。天空"


def test_ctrl_c_clears_the_line_and_a_second_one_ends_the_chat(say, heard, monkeypatch):
    lines = iter(
        [
            "你好",
            KeyboardInterrupt,
            "你是谁",
            KeyboardInterrupt,
            "天空",
            KeyboardInterrupt,
            KeyboardInterrupt,
            "不",
        ]
    )

    def keyboard(prompt):
        line = next(lines)
        if line is KeyboardInterrupt:
            raise line
        return line

    monkeypatch.setattr("builtins.input", keyboard)
    said = say("sft", max_new_tokens=1)
    assert heard == ["你好", "你好回答1。你是谁", "你好回答1。你是谁回答2。天空"]
    assert said.err.count("Ctrl-C again") == 3
    assert list(lines) == ["不"]


def test_ctrl_c_between_an_answer_and_the_next_question_does_not_end_the_chat(
    say, heard, monkeypatch
):
    answer = sample.stream
    interrupts = iter([True, False])

    def stream(*args):
        if next(interrupts):  # in stream(), behind the last token
            raise KeyboardInterrupt
        return answer(*args)

    monkeypatch.setattr(sample, "stream", stream)
    say("sft", stdin="你好\n你是谁\n", max_new_tokens=1)
    assert heard == ["你是谁"]  # what was not answered is no history


def test_a_full_context_is_said(say):
    assert (
        "the context is full"
        in say("pretrain", prompt="好" * SIZE, max_new_tokens=100, temperature=0.0).err
    )
    assert (
        "the context is full"
        not in say("pretrain", prompt="好", max_new_tokens=3, temperature=0.0).err
    )


def test_a_chat_forgets_the_oldest_turns_when_the_context_is_full(say, tok, monkeypatch):
    heard = []
    monkeypatch.setattr(
        sample, "stream", lambda model, tok, ids, stop_ids, generator: heard.append(ids) or "好。"
    )
    say("sft", stdin="".join(f"老师{i}在河边吗\n" for i in range(9)), max_new_tokens=12)
    assert len(heard) == 9
    assert all(len(ids) + 12 <= SIZE for ids in heard)
    asked = [[text for text in tok.decode(ids).split("老师")[1:]] for ids in heard]
    assert all(ids[:2] == [tok.bos_id, tok.controls["<|user|>"]] for ids in heard)
    assert [questions[-1] for questions in asked] == [f"{i}在河边吗" for i in range(9)]
    assert asked[1][0] == "0在河边吗好。"
    assert 2 <= len(asked[-1]) < 9  # what fits is remembered, the rest forgotten


def test_ctrl_c_ends_the_answer_and_not_the_chat(say, monkeypatch):
    def interrupted(*args, **named):
        yield [20]
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "generate", interrupted)
    said = say("sft", stdin="你好\n你是谁\n")
    assert said.out.count("[stopped]") == 2
    assert said.err.count("[tokens: 1,") == 2


def test_the_script_chats_through_stdin_and_ends_with_it(checkpoints, tmp_path):
    done = run(
        "sample.py",
        tmp_path,
        f"--checkpoint={checkpoints[0]['sft']}",
        "--device=cpu",
        "--dtype=float32",
        "--max_new_tokens=8",
        stdin="你好！\n你是谁？\n",
    )
    assert done.rc == 0
    assert "Traceback" not in done.err
    assert done.out.startswith("> 你好！\n") and "> 你是谁？\n" in done.out
    assert done.out.count("> ") == 3
    assert done.err.count("tokens/s") == 2


def test_a_checkpoint_whose_tokenizer_has_changed_is_refused(say, other_tok):
    with pytest.raises(SystemExit, match="was trained with"):
        say("pretrain", tokenizer=other_tok.name)


@pytest.mark.parametrize(
    "argument",
    [
        "--temperature=-1",
        "--temperature=1e-300",
        "--temperature=1e-38",
        "--top_k=-1",
        "--top_p=0",
        "--top_p=-0.5",
        "--max_new_tokens=0",
        "--max_new_tokens=-3",
        "--repetition_penalty=0",
        "--repetition_penalty=-1",
        "--n_samples=0",
    ],
)
def test_a_constant_that_cannot_work_is_refused(say, argument):
    name = argument[2:].partition("=")[0]
    with pytest.raises(SystemExit, match=name):
        changed = config.override({**vars(sample), "__name__": "__main__"}, [argument])
        say("pretrain", prompt="今天", **{name: changed[name]})
