"""The data sets: a short function each, raw record -> text or dialogue. Add yours here.

    for corpus, text in documents("wikipedia_cn:data/wikipedia.json,text:my_texts/*.jsonl"): ...
    for corpus, messages in dialogues("alpaca:data/alpaca_gpt4_data_zh.json"): ...

A corpus is written `name:path`: the name of a function below, and a file, a folder or a pattern.
`text` is the name for texts of your own. `python corpora.py` prints the table of all names.

To add a data set of news as {"headline": "...", "body": "...", "tags": ["...", "..."],
"comments": [{"text": "..."}, ...]}, write this function below and use it as --corpora=news:FILE:

    @corpus(TEXT, "news", "what it is, and its licence", "how to get it")
    def news(record):
        body = field(record, "body", "content")      # the first that holds text, or it is dropped
        headline = optional(record, "headline")      # "" where there is none
        tags = strings(record, "tags")               # the strings in a list, [] where there is none
        comments = [optional(c, "text") for c in objects(record, "comments")]   # dicts in a list
        return joined(headline, body, *tags, *comments)          # a line each, no empty ones

A function raises Bad("reason") to drop a record. Any other exception drops it, too, and is counted.
"""
import difflib
import itertools
import json
import os
import re
from typing import Callable, NamedTuple

from tqdm import tqdm

from cleaning import clean, normalise, quality, trimmed
from readers import Bad, files_at, records


class Corpus(NamedTuple):
    """A data set: the function that reads a record, what it is, how to get it."""
    read: Callable
    what: str
    get: str
    cut: str = "line"          # where a document of a text file ends, see readers.records


BATCH_CHARS = 1 << 17      # characters of records that a worker is given at a time: the hashes of
                           # their substrings fit into the CPU's cache
TEXT, CHAT, PREFERENCE = {}, {}, {}
HF = "hf download --repo-type dataset "


def corpus(table, name, what, get, cut="line"):
    """Register the function below in TEXT, CHAT or PREFERENCE.

    These make of a record: a str; messages; messages and two answers to them, the better one first.
    """
    def register(function):
        table[name] = Corpus(function, what, get, cut)
        return function
    return register


def field(record, *names):
    """The text of the first of these fields that holds any; raises Bad if none does."""
    for name in names:
        if value := optional(record, name):
            return value
    empty = [name for name in names if name in record]
    raise Bad(f"no {(empty or names)[0]}")


def optional(record, name):
    """The text of a field, "" if there is none."""
    if not isinstance(record, dict):
        raise Bad("not an object")
    value = record.get(name)
    return trimmed(value) if isinstance(value, str) else ""


def objects(record, name, kind=dict):
    """The objects in a list that a field holds; none if it holds something else."""
    value = record.get(name) if isinstance(record, dict) else None
    return [item for item in value if isinstance(item, kind)] if isinstance(value, list) else []


def strings(record, name):
    """The strings in a list that a field holds; none if it holds something else."""
    return objects(record, name, str)


def joined(*parts):
    """The parts, a line each, without empty ones and without a title that the next part repeats."""
    parts = [part for part in parts if part]
    return "\n".join(a for a, b in zip(parts, parts[1:] + [""]) if not b.startswith(a))


# ---- texts to pretrain on ------------------------------------------------------------------------

@corpus(TEXT, "text", "texts of your own: JSONL with `text` (perhaps `title`, `author`), or .txt, "
        "a document a line", 'write one JSON object a line: {"text": "..."}')
@corpus(TEXT, "c4_zh", "C4 (mC4), Chinese part: cleaned web pages; ODC-BY",
        HF + 'allenai/c4 --include "multilingual/c4-zh.*" --local-dir data/c4')
@corpus(TEXT, "c4_en", "C4, English: cleaned web pages; ODC-BY",
        HF + 'allenai/c4 --include "en/*" --local-dir data/c4')
@corpus(TEXT, "dolma", "Dolma 1.7: English web, papers, code, books; ODC-BY",
        HF + 'allenai/dolma --include "urls/*" --local-dir dolma && '
        "wget -P data/dolma -i dolma/urls/v1_7.txt")
@corpus(TEXT, "medical", "shibing624/medical, pretrain part: medical encyclopaedia and textbooks; "
        "Apache-2.0", HF + 'shibing624/medical --include "pretrain/*" --local-dir data/medical')
@corpus(TEXT, "skypile", "SkyPile-150B: Chinese web pages; its own licence",
        HF + "Skywork/SkyPile-150B --local-dir data/skypile  (or parts of it)")
@corpus(TEXT, "fineweb_edu_zh", "Chinese-Fineweb-Edu of OpenCSG: educational web pages; Apache-2.0",
        HF + "opencsg/chinese-fineweb-edu --local-dir data/fineweb  (or parts of it)")
@corpus(TEXT, "minimind", "minimind's texts for pretraining; Apache-2.0",
        HF + "jingyaogong/minimind_dataset pretrain_t2t_mini.jsonl --local-dir data/minimind")
@corpus(TEXT, "txt_line", "plain text files, a document a line", "put .txt files there")
@corpus(TEXT, "txt_blank", "plain text files, a blank line between documents",
        "put .txt files there", cut="blank")
@corpus(TEXT, "txt_file", "plain text files, a document a file", "put .txt files there", cut="file")
@corpus(TEXT, "clue_small", "CLUECorpusSmall: news, web forum, Wikipedia, comments; txt, "
        "blank line between documents",
        "see the links at https://github.com/CLUEbenchmark/CLUECorpus2020", cut="blank")
def plain(record):
    if isinstance(record, str):
        return record
    return joined(optional(record, "title"), optional(record, "author"), field(record, "text"))


@corpus(TEXT, "wikipedia_cn", "Chinese Wikipedia of 2023-07-20, filtered; CC BY-SA 3.0",
        HF + "pleisto/wikipedia-cn-20230720-filtered --local-dir data/wikipedia")
def wikipedia_cn(record):
    return field(record, "completion")


@corpus(TEXT, "baidubaike", "Baidu Baike, 5.63 million articles; no licence stated",
        HF + "xuqinyang/BaiduBaike-5.63M --local-dir data/baidubaike")
def baidubaike(record):
    sections = [joined(optional(section, "title"), optional(section, "content"))
                for section in objects(record, "sections")]
    article = joined(optional(record, "summary"), *sections)
    if not article:
        raise Bad("no summary")
    return joined(optional(record, "title"), article)


@corpus(TEXT, "tiny_stories_zh", "TinyStories translated into Chinese; CDLA-Sharing-1.0",
        HF + "adam89/TinyStoriesChinese --local-dir data/stories && "
        'for f in data/stories/*.tar.gz; do tar xzf "$f" -C data/stories; done')
def tiny_stories_zh(record):
    return field(record, "story_zh")


@corpus(TEXT, "wudao", "WuDaoCorpora Text, the open 200 GB of BAAI: web pages; terms on its page",
        "register at https://data.baai.ac.cn/details/WuDaoCorporaText and download")
@corpus(TEXT, "cci3", "CCI 3.0 and CCI3-HQ of BAAI: Chinese web pages; terms on their pages",
        HF + "BAAI/CCI3-HQ --local-dir data/cci3  (or parts of it)")
@corpus(TEXT, "webtext2019zh", "community questions and answers, 4.1 million; MIT",
        "see the links at https://github.com/brightmart/nlp_chinese_corpus (webtext2019zh)")
@corpus(TEXT, "baike_qa2019", "encyclopaedic questions and answers, 1.5 million; MIT",
        "see the links at https://github.com/brightmart/nlp_chinese_corpus (baike2018qa)")
def web_page(record):
    text = field(record, "text", "content", "answer")
    return joined(optional(record, "title"), optional(record, "desc"), text)


@corpus(TEXT, "mnbvc", "MNBVC: Chinese web pages, news, Zhihu and much more; MIT",
        HF + "liwu/MNBVC --local-dir data/mnbvc  (or parts of it)")
def mnbvc(record):
    paragraphs = [optional(paragraph, "内容") for paragraph in objects(record, "段落")]
    if text := joined(*paragraphs):
        return joined(optional(record, "标题"), text)
    return web_page(record)


@corpus(TEXT, "medical_qa", "shibing624/medical, finetune part: questions and answers, as text; "
        "Apache-2.0", HF + 'shibing624/medical --include "finetune/*" --local-dir data/medical')
@corpus(TEXT, "zhihu_kol", "Zhihu-KOL: questions and answers of Zhihu; no licence stated",
        HF + "wangrui6/Zhihu-KOL --local-dir data/zhihu")
def instruction_text(record):
    return joined(field(record, "instruction", "INSTRUCTION"), optional(record, "input"),
                  field(record, "output", "RESPONSE"))


# ---- dialogues to fine-tune on -------------------------------------------------------------------

# calls of a tool are the assistant's, their results take the place of the user's turns
CALLS, RESULTS = "function_call tool_call", "observation tool function tool_response"
SPEAKERS = {"system": "system developer",
            "user": f"user human client prompter 问 {RESULTS}",
            "assistant": f"assistant gpt bot chatgpt counselor model 答 moss {CALLS}"}
ROLES = {speaker: role for role, names in SPEAKERS.items() for speaker in names.split()}
TOOLS = f"{CALLS} {RESULTS}".split()


def dialogue(turns):
    """[(role, content)] -> [{"role", "content"}]: perhaps system, then user and assistant in turn.

    A third item that is False makes {"train": False}: no loss on this answer. A call of a tool
    joins the answer that it follows, several results become one turn. An answer before the first
    question and a last turn of the user are left off, empty system texts as well. Raises Bad with
    the reason if the rest does not fit.
    """
    system, messages = [], []
    for speaker, content, *train in turns:
        name = str(speaker).lower()
        role = ROLES.get(name)
        content = normalise(content)
        if role is None:
            raise Bad("unknown role", f"for example {speaker!r}"[:99])
        if "\ufffd" in content:
            raise Bad("broken characters")
        if role == "system" and not messages:
            if content and content not in system:
                system.append(content)
        elif role == ("user", "assistant")[len(messages) % 2]:
            if not content:
                raise Bad("empty turn of a tool" if name in TOOLS else "empty turn")
            messages.append({"role": role, "content": content})
            if train == [False] and role == "assistant":
                messages[-1]["train"] = False
        elif messages and name in TOOLS:
            messages[-1]["content"] += f"\n{content}" if content else ""
        elif messages or role == "system":
            raise Bad("roles do not alternate")
    if len(messages) % 2:
        messages.pop()
    if not messages:
        raise Bad("no answer")
    return [{"role": "system", "content": "\n".join(system)}] * bool(system) + messages


def pair(question, answer):
    return dialogue([("user", question), ("assistant", answer)])


@corpus(CHAT, "alpaca", "instruction, input, output: alpaca-zh (GPT-4 answers) and its relatives; "
        "research only", HF + "shibing624/alpaca-zh --local-dir data/alpaca")
@corpus(CHAT, "belle", "BELLE: instructions and dialogues, Chinese; GPL-3.0, research only",
        HF + "BelleGroup/train_1M_CN --local-dir data/belle")
@corpus(CHAT, "coig_cqia", "COIG-CQIA: instructions from Chinese forums, exams, encyclopaedias; "
        "terms on its page", HF + "m-a-p/COIG-CQIA COIG-CQIA-full.jsonl --local-dir data/cqia")
@corpus(CHAT, "medical_qa", *TEXT["medical_qa"][1:3])
def alpaca(record):
    instruction = joined(field(record, "instruction"), optional(record, "input"))
    turns = system_turns(record)
    for question, reply in objects(record, "history", list):
        turns += [("user", question), ("assistant", reply)]
    turns += spoken(instruction, "user")
    return dialogue(turns + [("assistant", field(record, "output"))])


def system_turns(record):
    """The turns that a system text and definitions of tools make; empty ones are left off later."""
    return [("system", optional(record, "system")), ("system", as_text(record.get("tools")))]


def spoken(text, speaker):
    """[(role, content)] of "Human: ...\\nAssistant: ...\\nHuman: ...", as in BELLE and HH.

    A last turn of the assistant that is empty is left off. Other texts are a turn of the speaker.
    """
    start, *parts = re.split(r"(?:^|\n)\s*(Human|Assistant)[:：]", text)
    if start.strip() or not parts:
        return [(speaker, text)]
    turns = list(zip(parts[::2], parts[1::2]))
    if turns[-1][0] == "Assistant" and not turns[-1][1].strip():
        turns.pop()
    return turns


@corpus(CHAT, "long_alpaca", "LongAlpaca-12k: long English texts and questions; CC BY-NC 4.0",
        HF + "Yukang/LongAlpaca-12k --local-dir data/long_alpaca")
def long_alpaca(record):
    answer = field(record, "output").removeprefix("Answer: ")
    return alpaca({**record, "output": answer})


@corpus(CHAT, "prompt", "prompt/response, prompt/answer or question/answer: pairs in JSON, CSV or "
        "parquet", 'write one JSON object a line: {"prompt": "...", "response": "..."}')
@corpus(CHAT, "firefly", "Firefly: 23 Chinese tasks, kind, input, target; no licence stated",
        HF + "YeungNLP/firefly-train-1.1M --local-dir data/firefly")
@corpus(CHAT, "zhihu_kol", *TEXT["zhihu_kol"][1:3])
def prompt(record):
    return pair(
        field(record, "prompt", "question", "instruction", "input", "INSTRUCTION"),
        field(record, "response", "answer", "std_answer", "output", "target", "RESPONSE"))


FEATURES = {"Dialogue": "有对话", "BadEnding": "结局不好", "MoralValue": "讲一个道理",
            "Twist": "有意外的转折", "Foreshadowing": "有伏笔", "Conflict": "有矛盾"}


@corpus(CHAT, "tiny_stories_zh", "TinyStories in Chinese: a story that is to use given words (in "
        "English) and features; CDLA-Sharing-1.0", TEXT["tiny_stories_zh"].get)
def requested_story(record):
    story, request = field(record, "story_zh"), record.get("instruction")
    words = "、".join(strings(request, "words"))
    if not words:
        raise Bad("no words")
    question = f"请用这些词讲一个故事：{words}。"
    if features := strings(request, "features"):
        question += f"故事要{'，'.join(FEATURES.get(name, name) for name in features)}。"
    return pair(question, story)


@corpus(CHAT, "medical_dialogue", "Chinese questions to doctors, CSV in GBK; MIT",
        "git clone https://github.com/Toyhom/Chinese-medical-dialogue-data data/medical_dialogue")
def medical_dialogue(record):
    question = joined(optional(record, "title"), field(record, "ask", "title"))
    return pair(question, field(record, "answer"))


@corpus(CHAT, "sharegpt", "conversations[{from, value}] or [{role, content}]: ShareGPT, "
        "BELLE 3.5M, SMILE and others", HF + "shibing624/sharegpt_gpt4 --local-dir data/sharegpt")
@corpus(CHAT, "messages", "messages[{role, content}]: the form of OpenAI's API",
        'write one JSON object a line: {"messages": [{"role": "user", "content": "..."}, ...]}')
@corpus(CHAT, "minimind", "minimind's dialogues, with reasoning and tools; Apache-2.0",
        HF + "jingyaogong/minimind_dataset sft_t2t_mini.jsonl --local-dir data/minimind")
@corpus(CHAT, "smoltalk", "SmolTalk: English dialogues; Apache-2.0",
        HF + "HuggingFaceTB/smoltalk --local-dir data/smoltalk")
@corpus(CHAT, "smoltalk_zh", "smoltalk-chinese of OpenCSG: 700,000 dialogues; Apache-2.0",
        HF + 'opencsg/smoltalk-chinese --include "data/*" --local-dir data/smoltalk_zh')
@corpus(CHAT, "magpie_zh", "Magpie: 200,000 Chinese questions and answers by Qwen2",
        HF + "Magpie-Align/Magpie-Qwen2-Pro-200K-Chinese --local-dir data/magpie")
@corpus(CHAT, "long_align", "LongAlign-10k: long texts and questions; Apache-2.0",
        HF + "THUDM/LongAlign-10k --local-dir data/long_align")
@corpus(CHAT, "firefly_moss", "MOSS 003 in Firefly's form, conversation[{human, assistant}]",
        HF + "YeungNLP/moss-003-sft-data --local-dir data/firefly_moss")
def conversation(record):
    if isinstance(record, list):                      # SMILE: the turns and nothing around them
        record = {"messages": record}
    system = system_turns(record)
    turns = list(map(turn_of, objects(record, "conversations") or objects(record, "messages")))
    for exchange in objects(record, "conversation"):
        turns += [(name, optional(exchange, name)) for name in ("human", "assistant")]
    if not turns:
        raise Bad("no conversation")
    return dialogue(system + turns)


@corpus(CHAT, "ultrachat", "UltraChat: English dialogues, as published, in Firefly's form or "
        "as messages; MIT",
        HF + "YeungNLP/ultrachat --local-dir data/ultrachat")
def ultrachat(record):
    if texts := strings(record, "data"):              # question, answer, question, ...
        return dialogue(zip(itertools.cycle(("user", "assistant")), texts))
    return conversation(record)


PARTS = "text", "reasoning", "tool_call"                # the types of content that are text


def turn_of(turn):
    """(role, text, whether it is trained on) of a turn with from and value, or role and content.

    The content may be a list of parts: OpenAI's have `text`, LLaMA-Factory's `value`. Reasoning
    stands before an answer in <think>, as Qwen3 and DeepSeek-R1 write it; definitions and calls of
    tools are text, too.
    """
    thoughts = [optional(turn, "reasoning_content")]
    texts = [optional(turn, "value") or optional(turn, "content")]
    for part in objects(turn, "content"):
        if part.get("type", "text") not in PARTS:
            raise Bad("not only text")
        goes_to = thoughts if part.get("type") == "reasoning" else texts
        goes_to.append(optional(part, "text") or optional(part, "value"))
    texts += [as_text(turn.get(name)) for name in ("tools", "tool_calls", "function_call")]
    text = joined(*texts)
    if thought := joined(*thoughts):
        text = f"<think>\n{thought}\n</think>\n\n{text}"
    weights = [turn.get(name) for name in ("weight", "loss_weight", "train")]
    is_trained = 0 not in weights                     # False is 0
    return turn.get("from", turn.get("role")), text, is_trained


def as_text(value):
    """The text itself, or the JSON of an object or a list; "" if there is nothing in it."""
    if isinstance(value, str) or not value:
        return value or ""
    return json.dumps(value, ensure_ascii=False)


@corpus(CHAT, "moss", "MOSS 002 and 003 of Fudan: dialogues, Chinese and English; CC BY-NC 4.0",
        HF + "fnlp/moss-003-sft-data --local-dir data/moss  (and unpack it)")
def moss(record):
    text = optional(record, "plain_text")             # MOSS 002
    chat = record.get("chat")
    if isinstance(chat, dict):
        if any("None<eoc>" not in field(turn, "Commands") for turn in chat.values()):
            raise Bad("uses tools")
        text = "".join(optional(turn, name) for turn in chat.values() for name in ("Human", "MOSS"))
    turns = re.findall(r"(?:<\|(\w+)\|>|\[(\w+)\]): ?(.*?)<eo[ahm]>", text, re.S)
    return dialogue([(new or old, content) for new, old, content in turns])


# ---- preferences: a better and a worse answer ----------------------------------------------------

@corpus(PREFERENCE, "preference", "chosen and rejected, each a text, a turn or all turns, with "
        "prompt, question, instruction, conversations or none: TRL's, LLaMA-Factory's, HH's forms",
        'write one JSON object a line: {"prompt": "...", "chosen": "...", "rejected": "..."}')
@corpus(PREFERENCE, "minimind_dpo", "minimind's preferences; Apache-2.0",
        HF + "jingyaogong/minimind_dataset dpo.jsonl --local-dir data/minimind")
def preference(record):
    *prompt, chosen = dialogue(side(record, "chosen"))
    *other_prompt, rejected = dialogue(side(record, "rejected"))
    if prompt != other_prompt:
        raise Bad("the sides begin with different prompts")
    if chosen["content"] == rejected["content"]:
        raise Bad("both sides are equal")
    return prompt, chosen["content"], rejected["content"]


def side(record, name):
    """The turns of a dialogue that ends with the answer in this field."""
    turns = system_turns(record)
    value = record.get(name)
    answer = [value] if isinstance(value, dict) else objects(record, name)
    answer = list(map(turn_of, answer)) or spoken(field(record, name), "assistant")
    if not answer or ROLES.get(str(answer[0][0]).lower()) != "assistant":
        return turns + answer                         # it begins with the prompt
    prompt = []
    for holder in "prompt", "conversations", "messages":
        prompt += map(turn_of, objects(record, holder))
    if not prompt:
        question = field(record, "prompt", "question", "instruction")
        prompt = spoken(joined(question, optional(record, "input")), "user")
    return turns + prompt + answer


# ---- corpora of a command line -------------------------------------------------------------------

def sources(spec, table):
    """[(corpus, name, files)] of "name:path,name:path", corpus being one such part of the string.

    table: TEXT, CHAT or PREFERENCE. Raises SystemExit with one sentence for an unknown name or
    missing files.
    """
    found = []
    for part in filter(None, map(str.strip, re.split(r",(?=\s*\w+:|\s*$)", spec))):
        name, _, path = part.partition(":")
        if name not in table or not path:
            near = difflib.get_close_matches(name, table, n=1)
            hint = f"; perhaps {near[0]}:{path or 'PATH'}" if near else ""
            raise SystemExit(f"corpora: {part!r} is not of the form name:path with one of the "
                             f"names {', '.join(table)}{hint}")
        files = files_at(path)
        if not files:
            hint = "; write name:path for every part" if "," in path else ""
            raise SystemExit(f"{path}: no such file, or a folder without data{hint}. {name} is "
                             f"{table[name].what}. To get it: {table[name].get}")
        if part in [corpus for corpus, _, _ in found]:
            raise SystemExit(f"corpora: {part} is listed twice")
        found.append((part, name, files))
    if not found:
        raise SystemExit("corpora: none given; it takes name:path,name:path with the names "
                         + ", ".join(table))
    return found


def raw_records(inputs, table, title=None):
    """Yield (number of the input, name, place, record) of all files; place: file and record number.

    inputs: as of sources(); title: of a progress bar, without one there is none.
    """
    size = sum(os.path.getsize(path) for _, _, files in inputs for path in files)
    hidden = None if title else True                  # None: hidden where there is no terminal
    with tqdm(total=size, desc=title, unit="B", unit_scale=True, disable=hidden) as bar:
        for number, (_, name, files) in enumerate(inputs):
            for path in files:
                for i, record in enumerate(records(path, table[name].cut, bar.update), 1):
                    yield number, name, f"{path}, record {i}", record


def batches(inputs, table, title):
    """Yield lists of what raw_records() yields, with about BATCH_CHARS characters each."""
    batch, size = [], 0
    for numbered in raw_records(inputs, table, title):
        batch.append(numbered)
        size += 20 + n_chars(numbered[-1])
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    yield batch


def n_chars(record):
    """Characters of the strings in a record, however deep."""
    if isinstance(record, str):
        return len(record)
    parts = record.values() if isinstance(record, dict) else record
    return sum(map(n_chars, parts)) if isinstance(record, (dict, list)) else 0


def read(table, name, place, record):
    """What the data set of this name makes of a record; raises Bad with the reason if nothing."""
    if isinstance(record, Bad):
        raise record
    function = table[name].read
    try:
        result = function(record)
        if not isinstance(result, (str, list, tuple)):
            raise TypeError(f"{type(result).__name__} is neither text nor dialogue nor pair")
        return result
    except Bad:
        raise
    except Exception as error:                        # a mistake here must not end a long run
        message = " ".join(str(error).split())[:200]
        raise Bad(f"{type(error).__name__} in {function.__name__}()",
                  f"first in {place}: {message}") from error


def document(name, record, place=""):
    """The clean text of a record of the corpus of this name; raises Bad if there is none."""
    return usable(read(TEXT, name, place, record))


def usable(text):
    """The text, clean; raises Bad if it is not worth training on."""
    text = clean(text)
    if reason := quality(text):
        raise Bad(reason)
    return text


def documents(spec):
    """Yield (corpus, clean text, or Bad with the reason) for every record, in order."""
    return contents(sources(spec, TEXT), TEXT, usable)


def dialogues(spec):
    """Yield (corpus, [{"role", "content"}, ...], or Bad with the reason) for every record."""
    return contents(sources(spec, CHAT), CHAT)


def contents(inputs, table, refine=None, title=None):
    """Yield (corpus, what read() returns, or Bad) for every record.

    inputs: as of sources(); refine: called with what read() returns, may raise Bad.
    """
    for number, name, place, record in raw_records(inputs, table, title):
        try:
            content = read(table, name, place, record)
            if refine:
                content = refine(content)
        except Bad as bad:
            content = bad
        yield inputs[number][0], content


if __name__ == "__main__":
    for title, table in (("for pretraining", TEXT), ("for fine-tuning", CHAT),
                         ("preferences, for dpo.py", PREFERENCE)):
        print(f"{title}:")
        for name, data_set in table.items():
            print(f"  {name:<17} {data_set.what}\n{'':20}{data_set.get}")
