"""The pictures and the tables of corpora in README and docs, made by code.

    python -m extras.draw      assets/pipeline.svg, assets/network.svg, the tables in docs/data*.md

A table is written from corpora.py. The Chinese descriptions live in docs/data_zh.md itself: a new
corpus gets its English one there, to be translated in place; the translation then stays.
"""
import config                                  # before torch: sets how its threads wait
import os
import re

import corpora

out  = "assets"  # folder of the pictures
docs = "docs"    # folder of data.md and data_zh.md, whose tables are rewritten
config.override(globals())

TABLE = re.compile("(<!-- corpora.(\\w+), by python -m extras.draw -->\n)(.*?)(<!-- end -->)", re.S)
HEADS = {"data.md": ("name", "what it is; licence", "how to get it"),
         "data_zh.md": ("名称", "内容；许可证", "获取方法")}
COLOURS = {"script": ("#1f5fa8", "#1f5fa8", "white"), "file": ("white", "#777777", "#222222"),
           "part": ("#dbe8f6", "#1f5fa8", "#222222"), "sum": ("#f7d58a", "#b07a00", "#222222")}


# ---- the tables of corpora -----------------------------------------------------------------------

def with_tables(page, text):
    """The text of docs/data.md or data_zh.md with its tables written anew."""
    def written(match):
        begin, name, old, end = match.groups()
        rows = re.findall(r"^\| `(\w+)` \| (.*?) \| ", old, re.M)
        earlier = dict(rows) if page == "data_zh.md" else {}
        return begin + table(getattr(corpora, name), HEADS[page], earlier) + end
    return TABLE.sub(written, text)


def table(data_sets, head, earlier):
    """A table of corpora.py in Markdown. earlier: {name: description} that stand there already."""
    lines = [f"| {' | '.join(head)} |", "|---|---|---|"]
    for name in sorted(data_sets):
        data_set = data_sets[name]
        what = earlier.get(name, data_set.what)
        get = data_set.get
        if get.startswith((corpora.HF, "git ")):
            get = f"`{get}`"
        lines.append(f"| `{name}` | {what} | {get} |")
    return "\n".join(lines) + "\n"


# ---- the pictures --------------------------------------------------------------------------------

def picture(width, height):
    """An empty figure whose unit is an inch, and its axes."""
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "", "font.family": "DejaVu Sans"})  # the same bytes
    import matplotlib.pyplot as plt
    figure = plt.figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return figure, axes


def box(axes, x, y, width, height, text, kind):
    """A box with its centre at (x, y)."""
    from matplotlib.patches import FancyBboxPatch
    fill, edge, ink = COLOURS[kind]
    corner = x - width / 2, y - height / 2
    style = "round,pad=0,rounding_size=0.08"
    patch = FancyBboxPatch(corner, width, height, style)
    patch.set(facecolor=fill, edgecolor=edge, linewidth=1.4)
    axes.add_patch(patch)
    size = 12.5 if kind == "script" else 11
    write(axes, x, y, text, ink, ha="center", size=size, linespacing=1.35)


def write(axes, x, y, text, colour="#222222", **options):
    axes.text(x, y, text, va="center", color=colour, **options)


def arrow(axes, *points):
    """A line through the points, (x, y) each, with its head at the last."""
    xs, ys = zip(*points)
    axes.plot(xs[:-1], ys[:-1], color="#555555", linewidth=1.6)
    axes.annotate("", points[-1], points[-2], arrowprops=dict(
        arrowstyle="-|>", color="#555555", linewidth=1.6, shrinkA=0, shrinkB=0))


def pipeline():
    """The way from text to chat: scripts, and the files between them."""
    figure, axes = picture(7, 10.6)
    left = 1.8
    right = 5.2
    middle = 3.5
    pretraining = [
        "raw text",
        "prepare_pretrain.py",
        "data/pretrain/\ntrain.bin  val.bin  meta.json",
        "pretrain.py",
        "out/pretrain/\nbest.pt  last.pt  log.csv",
        "sample.py",
        "text, continued"]
    tuning = [
        "questions and answers,\ndialogues",
        "prepare_sft.py",
        "data/sft/\ntrain.bin .mask .idx  test.jsonl",
        "sft.py",
        "out/sft/\nbest.pt  last.pt  log.csv",
        "sample.py   eval_bleu.py",
        "chat; BLEU-4 and a table"]
    rows = [10.1, 7.5, 6.45, 5.4, 4.35, 3.3, 2.35]
    heights = [0.68, 0.55, 0.68, 0.55, 0.68, 0.55, 0.55]
    for x, texts in (left, pretraining), (right, tuning):
        for y, height, text in zip(rows, heights, texts):
            kind = "script" if ".py" in text else "file"
            box(axes, x, y, 3.1, height, text, kind)
        for i in range(1, len(rows) - 1):
            arrow(axes, (x, rows[i] - heights[i] / 2), (x, rows[i + 1] + heights[i + 1] / 2))
    box(axes, middle, 9.15, 2.6, 0.5, "train_tokenizer.py", "script")
    box(axes, middle, 8.35, 2.6, 0.5, "data/tokenizer.model", "file")
    arrow(axes, (middle, 8.9), (middle, 8.6))
    for x, side in (left, -1), (right, 1):
        edge, beside = middle + side * 1.3, x - side * 0.25
        arrow(axes, (x, 9.76), (x, 9.15), (edge, 9.15))
        arrow(axes, (x, 9.15), (x, 7.775))
        arrow(axes, (edge, 8.35), (beside, 8.35), (beside, 7.775))
    arrow(axes, (left + 1.55, 4.35), (middle, 4.35), (middle, 5.4), (right - 1.55, 5.4))
    preferences(axes, right + 1.55, 4.35)
    others = "from any best.pt:  extras.exams   extras.report   extras.export"
    write(axes, 0.25, 0.45, others, size=11)
    return figure


def preferences(axes, x, y):
    """What may follow: from pairs of answers, and from the best.pt at (x, y), to out/dpo."""
    row = 1.35
    parts = [
        (1.0, 1.5, "pairs of answers"),
        (2.75, 1.5, "prepare_sft.py"),
        (4.35, 1.1, "data/dpo/"),
        (5.9, 1.2, "dpo.py")]
    end = None
    for at, width, text in parts:
        kind = "script" if ".py" in text else "file"
        box(axes, at, row, width, 0.55, text, kind)
        if end:
            arrow(axes, (end, row), (at - width / 2, row))
        end = at + width / 2
    beside = x + 0.13
    arrow(axes, (x, y), (beside, y), (beside, row), (end, row))
    box(axes, 5.9, 0.45, 1.7, 0.55, "out/dpo/  best.pt", "file")
    arrow(axes, (5.9, row - 0.275), (5.9, 0.725))


def network():
    """The network of model.py: the whole of it, and one block."""
    figure, axes = picture(7, 9.4)
    x = 1.35
    whole = [
        (0.55, "token ids  (B, T)", "file"),
        (1.6, "embedding", "part"),
        (4.0, "block\n\n× n_layers", "part"),
        (6.3, "RMSNorm", "part"),
        (7.4, "logits()", "part"),
        (8.6, "scores  (B, T, V)", "file")]
    for y, text, kind in whole:
        height = 1.5 if "block" in text else 0.55
        box(axes, x, y, 2.2, height, text, kind)
    start = 0.825
    for y, text, kind in whole[1:]:
        half = 0.75 if "block" in text else 0.275
        arrow(axes, (x, start), (x, y - half))
        start = y + half
    for y in 2.5, 5.4, 6.83:
        write(axes, x + 0.12, y, "(B, T, C)", size=10.5)
    frame = axes.inset_axes([2.85, 0.2, 4.0, 9.0], transform=axes.transData)
    frame.set(facecolor="#f6f9fd", xticks=[], yticks=[])
    for y, corner in (3.25, 0.2), (4.75, 9.2):                 # the block is drawn larger beside it
        axes.plot((2.45, 2.85), (y, corner), ":", color="#1f5fa8", linewidth=1.4)
    x, skip = 4.72, 6.6
    parts = [
        (1.25, 0.45, "RMSNorm", "part"),
        (2.15, 0.72, "wq  wk  wv\nq (B, T, H, D)   k, v (B, T, K, D)", "part"),
        (3.15, 0.65, "RMSNorm of q and k heads,\nrotary positions", "part"),
        (4.15, 0.72, "softmax(q kᵀ / √D) v\n(B, T, H, D)", "part"),
        (5.0, 0.42, "wo", "part"),
        (5.65, 0.36, "+", "sum"),
        (6.35, 0.45, "RMSNorm", "part"),
        (7.35, 0.95, "SwiGLU:\nw2 (silu(w1 x) · w3 x)\ninside (B, T, hidden_dim)", "part"),
        (8.2, 0.36, "+", "sum")]
    for y, height, text, kind in parts:
        width = 0.5 if kind == "sum" else 3.1
        box(frame, x, y, width, height, text, kind)
    frame.set(xlim=(2.85, 6.85), ylim=(0.2, 9.2))
    start = 0.6
    for y, height, *_ in [*parts, (8.75, 0, "", "")]:
        arrow(frame, (x, start), (x, y - height / 2))
        start = y + height / 2
    for y, to in (0.78, 5.65), (5.94, 8.2):                    # the residual stream
        arrow(frame, (x, y), (skip, y), (skip, to), (x + 0.25, to))
    for y in 0.42, 8.95:
        write(frame, x, y, "x  (B, T, C)", ha="center", size=11)
    return figure


def main():
    config.check_output("out", f"{out}/pipeline.svg")
    for page in HEADS:
        if not os.path.isfile(f"{docs}/{page}"):
            raise SystemExit(f"--docs={docs}: there is no {page}; run this in the project's folder")
    for name, draw in ("pipeline", pipeline), ("network", network):
        with config.whole_file(f"{out}/{name}.svg", "wb") as f:
            draw().savefig(f, format="svg", metadata={"Date": None})
        print(f"{out}/{name}.svg")
    for page in HEADS:
        with open(f"{docs}/{page}", encoding="utf-8") as f:
            text = f.read()
        with config.whole_file(f"{docs}/{page}") as f:
            f.write(with_tables(page, text))
        print(f"{docs}/{page}")


if __name__ == "__main__":
    main()
