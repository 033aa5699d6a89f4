"""Likelihood of right against wrong endings: a score that ranks models too small for the exams.

    python -m extras.endings --checkpoint=out/pretrain/best.pt

Each question is one beginning with four endings of the same number of characters, and the model
answers with the text that it finds most likely: chance is 25 %. The mean probability that it gives
to the right one of the four is the finer score. All texts are ours and made below: measure words,
antonyms, sums, idioms, ends of stories. Method: Gao et al. 2021, the lm-evaluation-harness.
"""
import config                                  # before torch: sets how its threads wait
import os
from random import Random
from statistics import fmean

import torch

import checkpoints
import runtime
from extras.exams import score, standard_error

checkpoint  = "out/pretrain/best.pt"  # of pretrain.py or sft.py; read as text, without a template
tokenizer   = ""                      # empty: the one that the checkpoint names
n_questions = 200                     # of each set at most
batch_size  = 32                      # questions side by side
out         = ""                      # the table; empty: endings.md beside the checkpoint
device      = "auto"                  # auto | cuda | mps | cpu
dtype       = "float32"               # float32 | bfloat16 | float16 | auto
config.override(globals())

SEED = 1                              # of the wrong endings; another one asks other questions
# measure word: nouns that take it
MEASURES = {
    "本": "书 杂志 词典 小说", "只": "鸟 鸡 羊 兔子", "条": "河 鱼 裤子 裙子", "张": "纸 桌子 床 照片",
    "辆": "汽车 卡车 自行车 出租车", "棵": "树 草 白菜 松树", "座": "山 桥 城市 高楼",
    "把": "钥匙 刀 伞 剪刀", "件": "衣服 衬衫 毛衣 礼物", "朵": "花 云 玫瑰 白云",
    "匹": "马 骏马 白马 布", "位": "老师 医生 客人 先生", "首": "歌 诗 民歌 曲子",
    "颗": "星星 珍珠 牙齿 钻石", "艘": "军舰 航母 潜艇 巨轮", "顶": "帽子 帐篷 轿子 草帽"}
COUNTING = "这里有一{}。", "我看见了一{}。", "那是一{}。"
ANTONYMS = ("大小 多少 高低 长短 冷热 黑白 上下 左右 前后 里外 快慢 新旧 远近 轻重 早晚 好坏 开关 "
            "买卖 男女 老少 强弱 胖瘦 深浅 粗细 东西 南北 生死 真假 进退 天地").split()
OPPOSITES = "“{}”的反义词是“{}”。", "不是{}，而是{}。"
IDIOMS = ("画蛇添足 守株待兔 亡羊补牢 井底之蛙 刻舟求剑 狐假虎威 对牛弹琴 掩耳盗铃 半途而废 自相矛盾 "
          "一心一意 三心二意 七上八下 五颜六色 四面八方 千军万马 百发百中 十全十美 一帆风顺 万事如意 "
          "马到成功 龙飞凤舞 虎头蛇尾 鸡犬不宁 水落石出 风和日丽 山清水秀 鸟语花香 春暖花开 人山人海 "
          "实事求是 兴高采烈 聚精会神 全神贯注 自言自语 无边无际 无影无踪 大惊小怪 同甘共苦 异口同声 "
          "坐井观天 愚公移山 滥竽充数 叶公好龙 杯弓蛇影 惊弓之鸟 胸有成竹 熟能生巧 亲密无间 艰苦奋斗").split()
# beginning: its right ending, of six characters and a mark; the others of the table are wrong
STORIES = {
    "天黑了，小明觉得很困，": "他上床睡觉了。", "外面下起了大雨，妈妈没有带伞，": "她全身都湿了。",
    "弟弟摔了一跤，膝盖很疼，": "他大声哭起来。", "小猫很饿，看见盘子里有一条鱼，": "它把鱼吃光了。",
    "爷爷口渴了，孙子端来一杯水，": "爷爷喝完了水。", "小红考试得了第一名，": "老师表扬了她。",
    "妹妹生病发烧了，爸爸很着急，": "带她去看医生。", "冬天到了，天气很冷，": "人们穿上棉衣。",
    "春天来了，天气暖和了，": "花园里花开了。", "小狗看见主人回家，": "高兴地摇尾巴。",
    "公共汽车来了，大家排好队，": "一个个上了车。", "灯突然灭了，屋里一片漆黑，": "奶奶点起蜡烛。",
    "作业写完了，小刚收拾好书包，": "就出去踢球了。", "猎人举起枪，对准了大灰狼，": "一枪打中了它。",
    "农民种下种子，每天浇水，": "田里长出苗来。", "小偷听见警察的声音，": "吓得转身就跑。",
    "他把钱包丢了，到处都找不到，": "心里非常难过。", "今天是奶奶的生日，": "全家一起吃饭。",
    "风很大，帽子被吹走了，": "他跑着追帽子。", "小鸟的翅膀受伤了，": "它飞不起来了。"}


def measure_words(rng):
    for right, nouns in MEASURES.items():
        for noun in nouns.split():
            others = [measure for measure, known in MEASURES.items() if noun not in known.split()]
            wrong = rng.sample([other for other in others if other != right], 3)
            for frame in COUNTING:
                yield [frame.format(measure + noun) for measure in (right, *wrong)]


def antonyms(rng):
    for pair in ANTONYMS:
        for word, right in (pair, pair[::-1]):
            wrong = rng.sample([other[0] for other in ANTONYMS if other != pair], 3)
            for frame in OPPOSITES:
                yield [frame.format(word, answer) for answer in (right, *wrong)]


def sums(rng):
    for _ in range(n_questions):
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        digits = range(10, 19) if a + b > 9 else range(2, 10)
        wrong = rng.sample([number for number in digits if number != a + b], 3)
        yield [f"{a}加{b}等于{number}。" for number in (a + b, *wrong)]


def idioms(rng):
    for idiom in IDIOMS:
        last = {other[3] for other in IDIOMS} - {idiom[3]}
        yield [idiom[:3] + end + "。" for end in (idiom[3], *rng.sample(sorted(last), 3))]


def stories(rng):
    for beginning, right in STORIES.items():
        others = [ending for ending in STORIES.values() if ending != right]
        for _ in range(3):
            yield [beginning + ending for ending in (right, *rng.sample(others, 3))]


SETS = measure_words, antonyms, sums, idioms, stories


def answer(model, tok, questions):
    """For each question the probabilities of its texts, which sum to 1; the right one is first.

    questions: lists of texts. A text is scored as a whole, from bos on: however the vocabulary cuts
    it, the beginning that the texts share cancels out.
    """
    texts = [[tok.encode(text) for text in question] for question in questions]
    found = score(model, [], [[tok.bos_id]] * len(texts), texts, batch_size)
    return torch.tensor(found, dtype=torch.float64).softmax(-1).tolist()


def main():
    config.check_range(1, n_questions=n_questions, batch_size=batch_size)
    page = out or os.path.join(os.path.dirname(checkpoint), "endings.md")
    config.check_output("out", page)
    model, tok, _ = runtime.load_model(checkpoint, tokenizer, device, dtype)
    torch.set_float32_matmul_precision("highest")             # as in the exams

    shares, means, n = [], [], 0
    lines = ["| set | questions | right, % | probability of the right one, % |",
             "|---|---|---|---|"]
    for make in SETS:
        rng = Random(SEED)
        questions = list(make(rng))
        questions = rng.sample(questions, min(n_questions, len(questions)))
        answers = answer(model, tok, questions)
        share = fmean(p[0] == max(p) for p in answers)
        mean = fmean(p[0] for p in answers)
        error = standard_error(share, len(answers))
        shares, means, n = [*shares, share], [*means, mean], n + len(answers)
        name = make.__name__.replace("_", " ")
        lines.append(f"| {name} | {len(answers)} | {100 * share:.1f} ± {100 * error:.1f} | "
                     f"{100 * mean:.1f} |")
    lines.append(f"| mean of the sets | {n} | {100 * fmean(shares):.1f} | "
                 f"{100 * fmean(means):.1f} |")
    title = (f"{checkpoint} ({checkpoints.fingerprint(checkpoint)}): endings, "
             f"{100 * fmean(shares):.1f} % right; chance is 25 %")
    table = "\n".join([title, "", *lines])
    with config.whole_file(page) as f:
        f.write(table + "\n")
    print(f"{table}\n\ntable: {page}")


if __name__ == "__main__":
    main()
