"""Chat templates: how a dialogue is written around its texts, as a table. Text only, no ids.

A dialogue is a list of {"role": "system" | "user" | "assistant", "content": str}. Two questions in
a row, or a system text where the template has no place for one, are joined into one question.

A vocabulary is known by its control tokens. A folder that also holds a chat template in Jinja gets
that of the table which renders the same text, for sample dialogues, or none at all.
"""
import re
from typing import NamedTuple


class Template(NamedTuple):
    """The text around each turn: {} is what was said, {bos} and {eos} are those two tokens."""
    name: str
    marks: tuple               # control tokens: a vocabulary with all of them was made for this
    begin: str                 # before the first turn
    user: str                  # a question
    header: str                # before an answer: a prompt ends with it
    answer: str                # the loss counts on it
    tail: str = ""             # after an answer
    system: str = ""           # empty: a system text joins the question
    joint: str = "\n"          # between texts that are joined
    strip: tuple = ()          # roles whose texts lose the white space at both ends
    no_thoughts: str = ""      # after the last header, so that the model answers at once
    preface: str = ""          # before the system text
    default: str = ""          # the system turn of a dialogue without one

    def written(self, messages, ask=False):
        """Yield (form, text, counts): the pieces of a dialogue, in order.

        The piece is the form with the text in the place of {}; counts: whether it is learnt. The
        last header belongs to a message that is still to come where `ask` is true.
        """
        turns = self.turns(messages)
        yield self.begin, "", False
        for i, turn in enumerate(turns, 1):
            role, text = turn["role"], turn["content"]
            if role == "assistant":
                yield self.header + self.no_thoughts * (i == len(turns)), "", False
                yield self.answer, text, turn.get("train", True)
                yield self.tail, "", False
            else:
                yield getattr(self, role), text, False
        if ask:
            yield self.header + self.no_thoughts, "", False

    def turns(self, messages):
        """The messages as the template wants them: texts stripped, or joined; a system text."""
        turns = [{**message, "content": message["content"].strip()}
                 if message["role"] in self.strip else message for message in messages]
        if not self.system:
            return joined(turns, self.joint)
        first = turns[0] if turns else {}
        if first.get("role") == "system":
            return [{**first, "content": self.preface + first["content"]}, *turns[1:]]
        return [{"role": "system", "content": self.default}] * bool(self.default) + turns

    def text(self, messages, ask, tokens):
        """A dialogue as one text. tokens: {"bos": text, "eos": text}"""
        pieces = self.written(messages, ask)
        return "".join(form.format(text, **tokens) for form, text, _ in pieces)


def joined(messages, joint):
    """The messages with every system text and question joined to the question that follows."""
    turns = []
    for message in messages:
        if message["role"] == "assistant":
            turns.append(message)
        elif turns and turns[-1]["role"] == "user":
            turns[-1]["content"] += joint + message["content"]
        else:
            turns.append({**message, "role": "user"})
    return turns


OURS = Template(
    "ours", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "{bos}",
    system="<|system|>{}<|end|>", user="<|user|>{}<|end|>",
    header="<|assistant|>", answer="{}<|end|>")
CHATML = Template(
    "ChatML", ("<|im_start|>", "<|im_end|>"), "",
    system="<|im_start|>system\n{}<|im_end|>\n", user="<|im_start|>user\n{}<|im_end|>\n",
    header="<|im_start|>assistant\n", answer="{}<|im_end|>", tail="\n")
LLAMA3 = Template(
    "Llama 3", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "{bos}",
    system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
    header="<|start_header_id|>assistant<|end_header_id|>\n\n", answer="{}<|eot_id|>",
    strip=("system", "user", "assistant"))
MISTRAL = Template(                                            # version 0.3
    "Mistral", ("[INST]", "[/INST]"), "{bos}", user="[INST] {}[/INST]",
    header="", answer=" {}{eos}", joint="\n\n", strip=("assistant",))
ZEPHYR = Template(                                             # TinyLlama-Chat's, too
    "Zephyr", (), "", system="<|system|>\n{}{eos}\n", user="<|user|>\n{}{eos}\n",
    header="<|assistant|>\n", answer="{}{eos}", tail="\n")
QUESTION = Template(                                           # as baby-llama2-chinese writes it
    "question<bos>answer", (), "", user="{}", header="{bos}", answer="{}{eos}")
HUMAN = Template(
    "Human/Assistant", (), "", user="Human: {}\n", header="Assistant: ", answer="{}{eos}")
NO_THOUGHTS = "<think>\n\n</think>\n\n"
TEMPLATES = [
    OURS, CHATML, LLAMA3, MISTRAL, ZEPHYR, HUMAN, QUESTION,
    CHATML._replace(name="Qwen3", no_thoughts=NO_THOUGHTS),
    CHATML._replace(name="Qwen3 of TRL", header=CHATML.header + NO_THOUGHTS),
    MISTRAL._replace(name="Mistral 0.2", marks=(), user=" [INST] {} [/INST]", strip=()),
    MISTRAL._replace(name="Mistral 0.1", marks=(), user="[INST] {} [/INST]", answer="{}{eos}",
                     strip=()),
    MISTRAL._replace(name="Mistral Nemo", user="[INST]{}[/INST]", answer="{}{eos}", strip=())]


# ---- which of them a vocabulary wants -----------------------------------------------------------

def find(controls, tokens, jinja, otherwise):
    """The template of a vocabulary; None if its folder has a Jinja template that is not known.

    controls: its control tokens; tokens: {"bos": text, "eos": text}; jinja: "" if there is none;
    otherwise: the template of a vocabulary that shows no sign of any.
    """
    possible = [template for template in TEMPLATES if controls.keys() >= set(template.marks)]
    if jinja:
        return of_jinja(jinja, possible, tokens)
    return next((template for template in possible if template.marks), otherwise)


def of_jinja(source, possible, tokens):
    """The possible template that writes dialogues as a Jinja template does; None if none does.

    tokens: {"bos": text, "eos": text}. The texts around a system text are read from what it
    renders. It may refuse a system text, or put it elsewhere in a longer dialogue, as Mistral's.
    """
    try:
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise SystemExit("pip install jinja2 to read chat templates") from None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])   # as transformers has it
    names = dict(bos_token=tokens["bos"], eos_token=tokens["eos"], enable_thinking=False,
                 tools=None, documents=None)                   # no date: Llama 3 takes a fixed one

    def render(messages, ask=False):
        try:                     # a template may raise anything; raise_exception() is undefined
            return environment.from_string(source).render(
                messages=messages, add_generation_prompt=ask, **names)
        except Exception:
            return None

    system, question, answer = (
        {"role": role, "content": f" {text} "}                 # the blanks show whether it strips
        for role, text in (("system", "简短。"), ("user", "你好"), ("assistant", "好。")))
    dialogue = [question, answer, question]
    samples = [(dialogue, True), ([*dialogue, answer], False), ([system, question], True)]
    # the blocks that mark answers for the loss write nothing
    source = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1if true", source)
    source = re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endif", source)
    expected = [render(*sample) for sample in samples]
    if None in expected[:2]:
        return None
    for template in possible:
        if template.system:
            text = template.turns([system])[0]["content"]
            default, given = (
                system_text(template, render(messages) or "", tokens)
                for messages in ([question], [system, question]))
            template = template._replace(default=default, preface=given.removesuffix(text))
        if all(found in (None, template.text(*sample, tokens))
               for found, sample in zip(expected, samples)):
            return template
    return None


def system_text(template, rendered, tokens):
    """What stands in the place of the system text before a first question; "" where none does."""
    messages = {"role": "system", "content": "\0"}, {"role": "user", "content": " 你好 "}
    frame = map(re.escape, template.text(messages, False, tokens).split("\0"))
    found = re.fullmatch("(.*)".join(frame), rendered, re.DOTALL)
    return found[1] if found else ""
