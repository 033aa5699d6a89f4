"""The data sets of corpora.py: records in the schemas of each, and what is made of them."""
import itertools
from functools import partial

import pytest

import corpora
from corpora import CHAT, PREFERENCE, TEXT, Bad

SECTIONS = [{"title": "作者", "content": "曹雪芹。"}, None]
RECORDS = {
    "wikipedia_cn": (
        {"completion": "正文", "source": "wikipedia.zh2307"},
        "正文"),
    "baidubaike": (
        {"title": "红楼梦", "summary": "长篇小说。", "sections": SECTIONS, "tags": [], "url": ""},
        "红楼梦\n长篇小说。\n作者\n曹雪芹。"),
    "c4_zh": (
        {"text": "正文", "timestamp": "", "url": ""},
        "正文"),
    "c4_en": (
        {"text": "a text"},
        "a text"),
    "dolma": (
        {"id": "1", "text": "a text", "source": "x"},
        "a text"),
    "wudao": (
        {"id": 1, "title": "标题", "content": "正文"},
        "标题\n正文"),
    "medical": (
        {"text": "正文"},
        "正文"),
    "medical_qa": (
        {"instruction": "问", "input": "", "output": "答"},
        "问\n答"),
    "tiny_stories_zh": (
        {"story": "Once", "story_zh": "从前"},
        "从前"),
    "webtext2019zh": (
        {"title": "问题", "desc": "问题补充", "topic": "t", "star": 3, "content": "答案"},
        "问题补充\n答案"),
    "baike_qa2019": (
        {"category": "c", "title": "问题", "desc": "", "answer": "答案"},
        "问题\n答案"),
    "zhihu_kol": (
        {"INSTRUCTION": "问", "RESPONSE": "答", "SOURCE": "Zhihu", "METADATA": "{}"},
        "问\n答"),
    "clue_small": ("正文", "正文"),
    "mnbvc": (
        {"文件名": "a", "段落": [{"行号": 1, "内容": "一"}, {"行号": 2, "内容": "二"}]},
        "一\n二"),
    "txt_line": ("正文", "正文"),
    "txt_blank": ("正文", "正文"),
    "txt_file": ("正文", "正文"),
    "skypile": (
        {"text": "正文"},
        "正文"),
    "fineweb_edu_zh": (
        {"text": "正文", "score": 0.9, "source": "x"},
        "正文"),
    "minimind": (
        {"text": "正文"},
        "正文"),
    "cci3": (
        {"id": "1", "text": "正文", "score": 3.1},
        "正文"),
    "text": (
        {"title": "静夜思", "author": "李白", "text": "床前明月光"},
        "静夜思\n李白\n床前明月光")}


def test_every_text_data_set_in_its_own_schema():
    assert RECORDS.keys() <= TEXT.keys()
    for name, (record, text) in RECORDS.items():
        assert TEXT[name].read(record) == text, name
    record = {"id": "1", "title": "标题", "content": "正文"}
    assert TEXT["cci3"].read(record) == "标题\n正文"
    assert TEXT["mnbvc"].read({"text": "知乎"}) == "知乎"
    assert TEXT["mnbvc"].read({"content": "新闻"}) == "新闻"


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


system, user, assistant, tool = (
    partial(turn, role) for role in ("system", "user", "assistant", "tool"))


def said(speaker, value):
    return {"from": speaker, "value": value}


def exchange(question, answer):
    return {"human": question, "assistant": answer}


def part(kind, value):
    return {"type": kind, "value": value}


def talk(*contents, system=None):
    """The messages of a user and an assistant in turn."""
    roles = itertools.cycle(("user", "assistant"))
    turns = [turn(role, content) for role, content in zip(roles, contents)]
    return [turn("system", system), *turns] if system else turns


def moss_turn(question, answer):
    return {
        "Human": f"<|Human|>: {question}<eoh>\n",
        "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
        "Commands": "<|Commands|>: None<eoc>\n",
        "Tool Responses": "<|Results|>: None<eor>\n",
        "MOSS": f"<|MOSS|>: {answer}<eom>\n"}


NONE = {"reasoning_content": "", "tools": "", "tool_calls": ""}
CALL = '[{"name": "now"}]'
DIALOGUES = [
    ("alpaca",
     {"instruction": "翻译", "input": "你好", "output": "Hello"},
     talk("翻译\n你好", "Hello")),
    ("alpaca",
     {"instruction": "三", "input": "", "output": "四", "history": [["一", "二"]], "system": "简短"},
     talk("一", "二", "三", "四", system="简短")),
    ("alpaca",
     {"instruction": "一", "output": "二", "tools": [{"name": "now"}]},
     talk("一", "二", system=CALL)),
    ("belle",
     {"instruction": "Human:一\nAssistant:二\nHuman:三\nAssistant:", "input": "", "output": "四"},
     talk("一", "二", "三", "四")),
    ("belle",
     {"instruction": "解释 Human: 是什么", "input": None, "output": "人"},
     talk("解释 Human: 是什么", "人")),
    ("medical_qa",
     {"instruction": "问", "input": "", "output": "答"},
     talk("问", "答")),
    ("prompt",
     {"prompt": "问", "response": "答"},
     talk("问", "答")),
    ("prompt",
     {"prompt": "问", "answer": "答"},
     talk("问", "答")),
    ("medical_dialogue",
     {"department": "内科", "title": "头痛", "ask": "头痛三天，怎么办？", "answer": "休息"},
     talk("头痛三天，怎么办？", "休息")),
    ("zhihu_kol",
     {"INSTRUCTION": "问", "RESPONSE": "答"},
     talk("问", "答")),
    ("firefly",
     {"kind": "NLI", "input": "问", "target": "答"},
     talk("问", "答")),
    ("firefly_moss",
     {"conversation_id": 1, "category": "c", "conversation": [exchange("一", "二")]},
     talk("一", "二")),
    ("coig_cqia",
     {"instruction": "问", "input": "", "output": "答", "task_type": {"major": ["问答"]},
      "metadata": None},
     talk("问", "答")),
    ("long_alpaca",
     {"file": "", "input": "", "instruction": "a long text, and?", "output": "b"},
     talk("a long text, and?", "b")),
    ("long_alpaca",
     {"instruction": "a", "output": "Answer: b"},
     talk("a", "b")),
    ("long_align",
     {"id": "1", "messages": [user("a"), assistant("b")], "length": 9},
     talk("a", "b")),
    ("smoltalk",
     {"messages": [user("a"), assistant("b")]},
     talk("a", "b")),
    ("smoltalk_zh",
     {"conversations": [said("user", "问"), said("assistant", "答")]},
     talk("问", "答")),
    ("magpie_zh",
     {"uuid": "1", "instruction": "问", "response": "答", "gen_input_configs": {},
      "conversations": [said("human", "问"), said("gpt", "答")]},
     talk("问", "答")),
    ("ultrachat",
     {"conversation": [exchange("一", "二"), exchange("三", "四")]},
     talk("一", "二", "三", "四")),
    ("ultrachat",
     {"id": "0", "data": ["一", "二", "三", "四"]},
     talk("一", "二", "三", "四")),
    ("ultrachat",
     {"prompt": "一", "messages": [user("一"), assistant("二")]},
     talk("一", "二")),
    ("tiny_stories_zh",
     {"story": "Once", "story_zh": "从前", "summary": "A", "source": "GPT-4", "instruction": {
         "prompt:": "Write", "words": ["hang", "foot"], "features": ["Dialogue", "Rhyme"]}},
     talk("请用这些词讲一个故事：hang、foot。故事要有对话，Rhyme。", "从前")),
    ("tiny_stories_zh",
     {"story_zh": "从前", "instruction": {"words": ["hang"], "features": []}},
     talk("请用这些词讲一个故事：hang。", "从前")),
    ("moss",
     {"conversation_id": 1, "meta_instruction": "You are an AI assistant", "num_turns": 2,
      "chat": {"turn_1": moss_turn("一", "二"), "turn_2": moss_turn("三\n三", "四")}},
     talk("一", "二", "三\n三", "四")),
    ("moss",
     {"id": 0, "plain_text": "[Human]: 一<eoh> [MOSS]: 二<eoa> [Human]: 三<eoh> [MOSS]: 四<eoa>"},
     talk("一", "二", "三", "四")),
    # names of roles, texts of the system
    ("sharegpt",
     {"conversations": [said("human", "一"), said("gpt", "二")]},
     talk("一", "二")),
    ("sharegpt",
     {"conversations": [
         turn("client", "一"), turn("counselor", "二"), turn("client", "三")]},
     talk("一", "二")),
    ("sharegpt",
     [turn("client", "一"), turn("counselor", "二")],
     talk("一", "二")),
    ("sharegpt",
     {"conversation": [exchange("一", "二"), exchange("三", "四")]},
     talk("一", "二", "三", "四")),
    ("messages",
     {"messages": [system("简短"), user("一"), assistant("二")]},
     talk("一", "二", system="简短")),
    ("messages",
     {"system": "简短",
      "messages": [system("简短"), system("礼貌"), user("一"), assistant("二")]},
     talk("一", "二", system="简短\n礼貌")),
    # an answer before the first question, an empty text of the system, OpenAI's parts
    ("sharegpt",
     {"conversations": [said("gpt", "零"), said("human", "一"), said("gpt", "二")]},
     talk("一", "二")),
    ("sharegpt",
     {"system": "",
      "conversations": [said("system", " "), said("human", "一"), said("gpt", "二")]},
     talk("一", "二")),
    ("messages",
     {"messages": [
         turn("developer", "简短"),
         assistant("零"),
         user([{"type": "text", "text": "一"}, {"type": "text", "text": "又一"}]),
         assistant("二")]},
     talk("一\n又一", "二", system="简短")),
    # reasoning, definitions, calls and results of tools
    ("minimind",
     {"conversations": [
         system("简短", **{**NONE, "tools": CALL}),
         user("几点？", **NONE),
         assistant("", **{**NONE, "reasoning_content": "要查。", "tool_calls": CALL}),
         tool("三点", **NONE),
         assistant("三点。", **NONE)]},
     talk("几点？", f"<think>\n要查。\n</think>\n\n{CALL}", "三点", "三点。",
          system=f"简短\n{CALL}")),
    ("sharegpt",
     {"conversations": [
         said("human", "一"),
         said("function_call", "{}"),
         said("observation", "三"),
         said("gpt", "四")]},
     talk("一", "{}", "三", "四")),
    ("messages",
     {"messages": [
         user("一"),
         assistant(None, tool_calls=[{"id": 1}]),
         tool("三"),
         assistant("四")]},
     talk("一", '[{"id": 1}]', "三", "四")),
    ("messages",
     {"tools": [{"type": "function"}],
      "messages": [user("一"), assistant("查一下", tool_calls=[{"id": 1}])]},
     talk("一", '查一下\n[{"id": 1}]', system='[{"type": "function"}]')),
    # several calls and several results, in one message or one after another
    ("messages",
     {"messages": [
         user("一"),
         assistant("", tool_calls=[{"id": 1}, {"id": 2}]),
         tool("三", tool_call_id="1"),
         tool("四", tool_call_id="2"),
         assistant("五")]},
     talk("一", '[{"id": 1}, {"id": 2}]', "三\n四", "五")),
    ("messages",
     {"messages": [
         user("一"),
         assistant("查"),
         turn("tool_call", "{}"),
         turn("tool_response", "三"),
         assistant("四")]},
     talk("一", "查\n{}", "三", "四")),
    # LLaMA-Factory's parts
    ("messages",
     {"tools": CALL, "messages": [
         user([part("text", "一")], loss_weight=0.0),
         assistant([part("reasoning", "想"), part("tool_call", "{}"), part("tool_call", "[]")],
                   loss_weight=1.0),
         tool([part("text", "三")]),
         assistant([part("text", "四")], loss_weight=0.0)]},
     [*talk("一", "<think>\n想\n</think>\n\n{}\n[]", "三", system=CALL),
      assistant("四", train=False)])]


def test_every_chat_data_set_in_its_own_schema():
    assert {name for name, _, _ in DIALOGUES} == CHAT.keys()
    for name, record, messages in DIALOGUES:
        assert CHAT[name].read(record) == messages


@pytest.mark.parametrize("turns, reason", [
    ([("human", "一"), ("human", "二"), ("gpt", "三")], "roles do not alternate"),
    ([("human", "一"), ("system", "二"), ("gpt", "三")], "roles do not alternate"),
    ([("human", "一"), ("function_call", "{}"), ("gpt", "二")], "roles do not alternate"),
    ([("human", "一"), ("function_call", "{}"), ("tool", "")], "empty turn of a tool"),
    ([("human", "一"), ("gpt", "坏\ufffd字")], "broken characters"),
    ([("human", "一"), ("narrator", "二")], "unknown role"),
    ([(None, "一")], "unknown role"),
    ([(["x"], "一")], "unknown role"),
    ([("gpt", "一")], "no answer"),
    ([("human", "一")], "no answer"),
    ([("system", "一")], "no answer"),
    ([("human", "一"), ("gpt", None)], "empty turn"),
    ([("human", ["一"]), ("gpt", "二")], "empty turn")])
def test_dialogues_that_do_not_fit_have_a_reason(turns, reason):
    record = {"conversations": [said(speaker, value) for speaker, value in turns]}
    with pytest.raises(Bad, match=reason):
        CHAT["sharegpt"].read(record)


@pytest.mark.parametrize("record, reason", [
    ({"input": "一"}, "no response"),                     # the first of the names that it may have
    ({"input": "一", "target": " "}, "no target"),        # the one that this record has
    ({"instruction": "", "input": "", "target": "二"}, "no instruction")])
def test_a_missing_text_is_counted_under_the_name_that_the_record_has(record, reason):
    with pytest.raises(Bad, match=reason):
        CHAT["firefly"].read(record)


ALL_TURNS = {
    "chosen": [user("问"), assistant("好")],
    "rejected": [user("问"), assistant("坏")]}
ANSWERS = {"chosen": "好", "rejected": "坏"}
HH = "\n\nHuman: 一\n\nAssistant: 二\n\nHuman: 三\n\nAssistant:"
PREFERENCES = {
    "MedicalGPT": (
        {"conversations": [said("human", "问")], **ANSWERS},
        talk("问")),
    "LLaMA-Factory": (
        {"conversations": [said("human", "问")], "chosen": said("gpt", "好"),
         "rejected": said("gpt", "坏")},
        talk("问")),
    "LLaMA-Factory's alpaca": (
        {"instruction": "翻译", "input": "你好", "system": "简短", **ANSWERS},
        talk("翻译\n你好", system="简短")),
    "minimind": (
        ALL_TURNS,
        talk("问")),
    "with system": (
        {"system": "简短", **ALL_TURNS},
        talk("问", system="简短")),
    "ultrafeedback": (
        {"prompt": "问", **ALL_TURNS},
        talk("问")),
    "TRL, texts": (
        {"prompt": "问", **ANSWERS},
        talk("问")),
    "TRL, messages": (
        {"prompt": [user("问"), assistant("中"), user("问")],
         "chosen": [assistant("好")],
         "rejected": [assistant("坏")]},
        talk("问", "中", "问")),
    "question": (
        {"question": "问", **ANSWERS},
        talk("问")),
    "HH": (
        {"chosen": HH + " 好", "rejected": HH + " 坏"},
        talk("一", "二", "三")),
    "HH with prompt": (
        {"prompt": HH, "chosen": " 好", "rejected": " 坏"},
        talk("一", "二", "三"))}


@pytest.mark.parametrize("form", PREFERENCES)
def test_preferences_in_every_form(form):
    record, prompt = PREFERENCES[form]
    for name in PREFERENCE:
        assert corpora.read(PREFERENCE, name, "", record) == (prompt, "好", "坏")


@pytest.mark.parametrize("change, reason", [
    ({"rejected": "好"}, "both sides are equal"),
    ({"chosen": " "}, "no chosen"),
    ({"chosen": "Assistant:"}, "no answer"),
    ({"rejected": None}, "no rejected"),
    ({"prompt": ""}, "no prompt"),
    ({"rejected": "坏\ufffd"}, "broken characters"),
    ({"rejected": [user("另问"), assistant("坏")]}, "different prompts"),
    ({"chosen": [assistant("")]}, "empty turn"),
    ({"prompt": [turn("x", "一")]}, "unknown role")])
def test_pairs_that_teach_nothing_have_a_reason(change, reason):
    with pytest.raises(Bad, match=reason):
        corpora.read(PREFERENCE, "preference", "", {"prompt": "问", **ANSWERS, **change})


def test_a_tool_of_moss_drops_the_dialogue():
    called = {**moss_turn("一", "二"), "Commands": '<|Commands|>: Search("x")<eoc>\n'}
    with pytest.raises(Bad, match="uses tools"):
        CHAT["moss"].read({"chat": {"turn_1": called}})


def test_a_picture_among_the_parts_of_a_turn_drops_the_dialogue():
    question = user([{"type": "image_url"}, {"type": "text", "text": "这是什么？"}])
    with pytest.raises(Bad, match="not only text"):
        CHAT["messages"].read({"messages": [question, assistant("猫")]})


@pytest.mark.parametrize("mark", [
    {"weight": 0}, {"weight": 0.0}, {"loss_weight": 0.0}, {"train": False}])
def test_turns_that_are_not_to_be_trained_on_have_no_loss(tok, mark):
    turns = [user("一"), assistant("二", **mark), user("三"), assistant("四")]
    messages = CHAT["messages"].read({"messages": turns})
    ids, loss_mask = tok.render(messages)
    trained_on = [i for i, counts in zip(ids, loss_mask) if counts]
    assert trained_on == [*tok.encode("四"), tok.end_id]
    assert ids == tok.render(talk("一", "二", "三", "四"))[0]
    assert CHAT["messages"].read({"messages": messages}) == messages   # test.jsonl is read again
