"""Cleaning and quality: rules that repair a text, and reasons to drop it. Knows no data set.

A rule that cannot know what the author meant leaves the text alone.
"""
import hashlib
import html
import re
import string
import unicodedata


def characters(*rows):
    """A pattern for single characters and its replacement, of rows (codes, replacement)."""
    table = {chr(code): replacement for codes, replacement in rows for code in codes}
    pattern = f"[{re.escape(''.join(table))}]"
    return re.compile(pattern), lambda match: table[match[0]]


# A rule is (name, hint, pattern, replacement); rules apply in this order. A rule is tried only
# where its hint occurs; the hint is None where the pattern itself is fast. NORMAL is right for any
# text, program or poem; WEB is for web pages and would spoil an answer that shows HTML.
CODE = (
    ("line ends are \\n", None, re.compile("[\r\u2028\u2029\x85]\n?"), "\n"),
    ("the point in ９．０９", re.compile("．"), re.compile("(?<=[０-９])．(?=[０-９])"), "."),
    ("invisible characters, blanks and letters of odd width", None, *characters(
        ([*range(9), 11, 12, *range(14, 32), *range(127, 160)], ""),       # control characters
        # not the joiners 200C and 200D: Persian and emoji are written with them
        ([0xAD, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), 0x2060, 0xFEFF], ""),
        (range(0xE000, 0xF900), ""),                         # private use: glyphs of some web font
        (range(0xD800, 0xE000), "\ufffd"),                   # half a surrogate pair has no UTF-8
        ([0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F], " "),
        ([0x37E], ";"), ([0x387], "\xb7"), ([0x1FEF], "`"),  # what NFC makes of them
        # digits and letters of full width, but not ，！？
        *(([ord(char) + 0xFEE0], char) for char in string.digits + string.ascii_letters))))
BLANKS = (
    ("blanks at the end of a line", re.compile("[ \t\u3000]\n"),
     re.compile(r"(?<![ \t\u3000])[ \t\u3000]+$", re.M), ""),
    ("more than two empty lines", None, re.compile(r"\n\n\n\n+"), "\n\n"))
NORMAL = (
    *CODE,
    ("full-width blanks, but for indentation", re.compile("\u3000"), re.compile(r"(?<=\S)\u3000+"),
     lambda match: " " * len(match[0])),
    *BLANKS)

# A tag counts if it is unmistakable (closing, or with an attribute) or has no other use in prose: a
# command <source> and List<a> stay. So does a quoted `<div>`, and a tag before a word for "tag".
BARE = ("b|i|u|p|em|strong|span|div|font|br|hr|table|tbody|thead|tr|td|th|ul|ol|li|h[1-6]|center"
        "|blockquote|pre|html|head|body|sub|sup")
CLOSING = BARE + ("|a|img|script|style|title|code|form|input|button|label|select|option|iframe"
                  "|embed|object|link|meta|header|footer|nav|section|article|aside|main|figure"
                  "|video|audio|small|big|strike|del|ins|dl|dt|dd|ref")
TAG = re.compile(rf"""<(?: !--(?:(?!<!--).){{0,9999}}?-->
    | (script|style)\b[^<>]{{0,999}}>(?:(?!<script|<style).){{0,99999}}?</\1\s*> | (?<!`<)(?:
    (?:{BARE})\s*/?> | [a-z][a-z0-9]{{0,9}}\s+[a-z-]+\s*=\s*["'\w][^<>]{{0,999}}>
    | /(?:{CLOSING})\s*> ) (?!\s*(?:标签|元素|标记|tag|element)) )""", re.X | re.I | re.S)
BLOCK_TAG = re.compile(r"</?(?:br|hr|p|div|table|tr|[uod]l|li|d[td]|h[1-6]|center|blockquote|pre"
                       r"|title)\b", re.I)
# A text about web pages shows tags on purpose
ABOUT_TAGS = r"(?<![</])HTML|标签(?!\s*[:：])|XML|CSS|JavaScript|前端"

URL = r"(?:https?://|www\.)[\w./?=&%#:~+@!,;-]*[\w/]"
EMAIL = (r"(?<![\w.+@-])[A-Za-z0-9](?:[A-Za-z0-9_.+-]{0,62}[A-Za-z0-9_])?@"
         r"(?:[A-Za-z0-9-]{2,63}\.){1,4}[A-Za-z]{2,9}(?![\w-])")
YEARS = r"(?:1\d|20)\d\d\s*[-－—~]\s*(?:1\d|20)\d\d(?!\d)"
PHONE = rf"(?!{YEARS})[+(（]?\d[\d()（）\-－—~/转 ]{{4,30}}\d"
LABEL = ("(?:电话|热线|手机|传真|邮箱|邮编|网址|官网|链接|微信|公众号|QQ|qq|Tel|tel|TEL|Fax|fax|FAX"
         "|E-mail|E-Mail|Email|email|e-mail|via)群?号?码?")
LABELLED = re.compile(rf"{LABEL}\s*[:：]")
CONTACT = (rf"[\u4e00-\u9fff]{{0,6}}{LABEL}\s*[:：]\s*"
           rf"(?:{EMAIL}|{URL}|{PHONE}|[A-Za-z][\w-]{{4,19}}(?=\s*$))")
ENDS = r"(?=\s*(?:$|[，,、。；;|）)】]))"               # an ordinary sentence would continue here

WEB = (
    ("HTML tags and comments",
     re.compile(rf"(?s:\A(?!.*(?:{ABOUT_TAGS})).*?)(?:</|<br|<BR|<!--|=[\"'])"), TAG,
     lambda match: "\n" if BLOCK_TAG.match(match[0]) else ""),
    ("HTML entities", None,
     re.compile(r"(?<!`)&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z]{2,8}\d?);"),
     lambda match: html.unescape(match[0])),
    *NORMAL,
    ("printed paragraphs: all lines, but perhaps a title, indented by two full-width blanks",
     re.compile("\u3000"),
     re.compile("\\A(?:[^\u3000\n].*\n+)?(?:\u3000\u3000(?!\u3000).*(?:\n+|\\Z))+\\Z"),
     lambda match: re.sub("^\u3000\u3000", "", match[0], flags=re.M)),
    ("contacts: 电话：010-62345678, QQ群：123456", LABELLED,
     re.compile(rf"[（(【]\s*{CONTACT}(?:\s*[，,、；;|]?\s*{CONTACT})*\s*[）)】]"
                rf"|(?:^|[，,、；;|]|(?<=[。！？\s]))[ \t]*{CONTACT}{ENDS}", re.M), ""),
    ("lines of nothing but an address", re.compile(r"@|http|www\."),
     re.compile(rf"^[ \t]*(?:{URL}|{EMAIL})[ \t]*(?:\n|\Z)", re.M), ""),
    ("the address of an author: 张三（someone@example.com）", re.compile("@"),
     re.compile(rf"(?<=[\u4e00-\u9fff])[（(]{EMAIL}[)）]"), ""),
    ("！！！！！ is ！！！", None, re.compile(r"([！!？?。，、；~～])\1\1\1+"), r"\1\1\1"),
    ("an ellipsis has an end", None, re.compile(r"………+|\.\.\.\.\.\.\.+|·······+"),
     lambda match: match[0][:2 if match[0][0] == "…" else 6]),
    *BLANKS,                                          # again, as the removals leave blanks
)

# No rule applies to most texts; these patterns find out three times as fast as the rules
ODD = re.compile(CODE[2][2].pattern[:-1] + "\r\t\u2028\u2029\u3000<&@]")
RUN = re.compile(r"([！!？?。，、；~～….·\n])\1\1")
FENCE = r"^[ \t]*(?:```|~~~).*$"                             # opens or closes a block of code
FENCED = re.compile(f"({FENCE}(?s:.*?){FENCE})", re.M)


def is_suspicious(text):
    """Whether some rule might change the text."""
    return (ODD.search(text) or RUN.search(text) or " \n" in text or "http" in text
            or "www." in text or (":" in text or "：" in text) and LABELLED.search(text))


def apply(rules, text):
    """The text after all rules, in Unicode's composed form; code between fences gets CODE only.

    Not NFKC, which would turn ， into a comma and ² into 2.
    """
    if is_suspicious(text):
        parts = FENCED.split(text)                    # in turn outside and inside of fences
        for i, part in enumerate(parts):
            parts[i] = apply_all(CODE if i % 2 else rules, part)
        text = "".join(parts)
    return trimmed(unicodedata.normalize("NFC", text))


def trimmed(text):
    """The text without blanks around it; but if it has several lines, the first stays indented."""
    text = text.rstrip()
    return text[re.match(r"(\s*\n)?", text).end():] if "\n" in text.strip() else text.strip()


def apply_all(rules, text):
    for _, hint, pattern, replacement in rules:
        if hint is None or hint.search(text):
            text = pattern.sub(replacement, text)
    return text


def normalise(text):
    """The text of a dialogue, without what is wrong in any text."""
    return apply(NORMAL, text)


def clean(text):
    """The text of a document, also without what web pages add."""
    return apply(WEB, text)


def hash64(text):
    """64 bits of a text, the same on every machine."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def pieces(text, size):
    """Cut a text into pieces of at most `size` characters, after a line feed where there is one."""
    start = 0
    while len(text) - start > size:
        end = text.rfind("\n", start, start + size) + 1 or start + size
        yield text[start:end]
        start = end
    yield text[start:]


# ---- quality -------------------------------------------------------------------------------------

MIN_CHARS = 12             # characters of the shortest document: a five-character quatrain has 24
MIN_LETTERS = 0.4          # share of the characters that must be letters of any alphabet
MAX_BROKEN = 0.001         # share of U+FFFD, which stands for bytes that could not be decoded
MAX_REPEATED = 0.6         # share of the text in repeated clauses (after Rae et al. 2021,
                           # arXiv:2112.11446)
# First bytes of letters in UTF-8: ASCII, Latin to Arabic, Chinese (E4-E9), Hangul. They are counted
# first, as that is fast; is_readable() then decides about texts with few of them.
FIRST_BYTES = bytes([*range(65, 91), *range(97, 123), *range(0xC3, 0xE0), *range(0xE4, 0xEE)])
ARITHMETIC = re.compile(r"^\|.*\|$|\d{1,4}\s?[-+×xX*÷/]\s?\d{1,4}\s?=\s?\d{1,8}", re.M)
MARKUP = re.compile(r"[\s|\-:{}()\[\]\\^_$&#*=<>+~`\u2500-\u257f]")     # of tables and formulas


def quality(text):
    """The reason to drop a cleaned text, None to keep it."""
    if len(text) < MIN_CHARS:
        return "too short"
    raw = text.encode("utf-8")
    n_letters = len(raw) - len(raw.translate(None, FIRST_BYTES))
    if n_letters < MIN_LETTERS * len(text) and not is_readable(text):
        return "too little Chinese or letters"
    if text.count("\ufffd") > MAX_BROKEN * len(text):
        return "broken characters"
    if len(set(text[:200])) < 4 + min(200, len(text)) / 20:
        return "too few different characters"
    every = clauses(text)
    different = len("".join(set(every)))
    if len(every) >= 8 and different < (1 - MAX_REPEATED) * sum(map(len, every)):
        return "too much repetition"
    return None


def is_readable(text):
    """Whether enough is letters and marks, not markup; tables and equations count as letters."""
    text = MARKUP.sub("", ARITHMETIC.sub("letters", text))
    letters = sum(unicodedata.category(character)[0] in "LM" for character in text)
    return letters >= max(1, MIN_LETTERS * len(text))


def clauses(text):
    for mark in "，！？；\n .,":                        # several times as fast as re.split
        text = text.replace(mark, "。")
    return text.split("。")
