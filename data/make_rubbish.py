"""Write documents of the kinds that a crawl of the web is full of, to try filter_pretrain.py on.

    python data/make_rubbish.py                    # data/rubbish.jsonl: {"text": ..., "kind": ...}

Five kinds in equal numbers, all words ours: menus of sites, keyword spam, shop pages translated by
a machine, boilerplate, log files. Real rubbish is more varied, so a filter that fails here fails.
"""
import json
import os
import sys
from random import Random

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config

out         = "data/rubbish.jsonl"  # the file to write
n_documents = 5000                  # of all kinds together, about 1,200 bytes each
seed        = 1                     # another seed writes other documents of the same kinds
config.override(globals())

PLACES = "北京 上海 广州 深圳 杭州 成都 武汉 西安 南京 重庆 郑州 长沙 青岛 苏州 天津 合肥".split()
TRADES = ("搬家 开锁 疏通管道 空调维修 月嫂 保洁 装修 二手车 贷款 代理记账 发票查询 减肥 植发 "
          "学车 租房 美容 网站建设 手机回收 办证 婚纱摄影 防水补漏 家教 物流 彩票").split()
PRAISE = ("哪家好 多少钱 价格表 公司 电话 排名 官网 在线咨询 二十四小时 上门服务 附近 最便宜 "
          "十大品牌 怎么样 靠谱吗 优惠 免费试用 一条龙").split()
MENU = ("首页 新闻 体育 财经 娱乐 科技 汽车 房产 教育 旅游 健康 军事 游戏 博客 论坛 视频 图片 "
        "下载 专题 登录 注册 会员中心 购物车 我的订单 帮助 客服 关于我们 联系我们 网站地图 友情链接 "
        "招聘 投诉 手机版 繁体 收藏本站 设为首页 上一页 下一页 返回顶部 更多 热门 推荐 排行榜").split()
THINGS = ("手机壳 灯泡 背包 雨伞 鱼竿 耳机 水壶 拖鞋 窗帘 充电器 玩具车 手表 帽子 剪刀 键盘 帐篷 "
          "枕头 螺丝刀 狗链 瑜伽垫").split()
MATTER = "塑料 不锈钢 棉花 硅胶 木头 皮革 玻璃 铝合金 尼龙 竹子".split()
ADJECTIVES = "高质量的 全新的 时尚的 可爱的 耐用的 便携的 防水的 迷你的 豪华的 多功能的".split()
SHOP = (
    "{a}{m}{t}为男人女人孩子礼物。", "100%{a}和品牌新。", "材料：{m}。", "颜色：如图片显示的。",
    "尺寸：{n}厘米×{k}厘米（请允许1-3厘米误差由于手动测量）。", "包装包括：{k}×{t}。",
    "这个{t}是{a}，它可以被使用在家庭，办公室，旅行，等等。", "请注意：{m}不是被包括的。",
    "由于不同的显示器，颜色的{t}可能有一点不同从图片。", "容易去清洁，容易去携带。",
    "它是一个{a}选择为您的朋友或您自己的。", "如果您不是满意的，请接触我们在留下反馈之前。",
    "我们船在{k}工作天之内在付款之后。", "让您的生活更加{a}，享受它的乐趣！",
    "特征：{a}，{b}，不会褪色。", "重量：大约{n}克。", "{m}制作，感觉软和舒适到触摸。",
    "它有{k}个水平的{t}为您去选择从。", "适合为：任何人谁爱{t}。", "批发{t}免费航运从中国。")
BOILERPLATE = (
    "本网站所有内容均来源于网络，版权归原作者所有，如有侵权请联系我们删除。",
    "未经{p}{t}网书面授权，任何单位及个人不得转载、摘编或以其他方式使用上述作品。",
    "本站只提供信息存储空间，不承担任何法律责任。", "请使用{n}×{k}以上分辨率浏览本站。",
    "点击下载即表示您同意用户协议和隐私政策。", "您的浏览器版本过低，请升级后访问。",
    "该页面不存在，{k}秒后自动跳转到首页。", "扫描二维码，关注{p}{t}网，获取更多资讯。",
    "欢迎{p}各界人士投稿，稿件一经采用，稿酬从优。", "免责声明：以上信息仅供参考，不构成投资建议。",
    "本文共{n}字，阅读需要{k}分钟，点击展开全文。", "声明：该文观点仅代表作者本人。",
    "评论加载中，请稍候。", "登录后才能发表评论，还没有账号？立即注册。", "发表于{k}天前，阅读{n}次。",
    "分享到：微博、微信、空间、朋友圈。", "上一篇：{p}{t}{q}", "下一篇：{p}{u}{q}",
    "相关推荐：{p}{t}{q}，{p}{u}{q}。", "举报电话受理时间为工作日九点至十七点。",
    "我们使用缓存来改善您的体验，继续访问即表示同意。", "责任编辑：{p}{t}网小编。",
    "网站备案编号{n}{n}，增值电信业务经营许可证{n}号。", "{p}{t}网版权所有，技术支持：{p}{u}公司。")
LOGS = (
    "INFO 用户{n}登录成功，耗时{k}毫秒", "WARN 连接池已满，等待{k}毫秒", "ERROR 读取文件失败：拒绝访问",
    "DEBUG select * from orders where id={n} limit {k}", "INFO GET /index.html 200 {n}",
    "INFO GET /static/{n}.js 304 {k}", "ERROR 请求超时，第{k}次重试", "INFO 任务{n}完成，共{k}条记录",
    "WARN 磁盘使用率{k}%", "INFO 缓存命中率{k}%，清理{n}个对象", "ERROR java.lang.NullPointerException",
    "    at com.example.service.Order{n}.run(Order.java:{k})", "INFO 启动服务，端口{n}，进程{n}")


def sentences(rng, patterns, low, high, **slots):
    """low to high of the patterns, with other numbers in each."""
    return [pattern.format(n=rng.randrange(100, 9999), k=rng.randrange(1, 99), **slots)
            for pattern in rng.choices(patterns, k=rng.randint(low, high))]


def menu(rng):
    lines = [rng.sample(MENU, rng.randint(5, 15)) for _ in range(rng.randint(4, 9))]
    return "\n".join(rng.choice([" ", " | ", " > "]).join(line) for line in lines)


def keywords(rng):
    places, trades = rng.sample(PLACES, 3), rng.sample(TRADES, 3)
    words = [rng.choice(places) + rng.choice(trades) + rng.choice(PRAISE)
             for _ in range(rng.randint(30, 80))]
    return rng.choice(["，", "_", " ", "、"]).join(words)


def shop(rng):
    a, b = rng.sample(ADJECTIVES, 2)
    slots = {"a": a, "b": b, "t": rng.choice(THINGS), "m": rng.choice(MATTER)}
    return "\n".join(sentences(rng, SHOP, 12, 24, **slots))


def boilerplate(rng):
    t, u = rng.sample(TRADES, 2)
    slots = {"p": rng.choice(PLACES), "t": t, "u": u, "q": rng.choice(PRAISE)}
    return "\n".join(sentences(rng, BOILERPLATE, 10, 22, **slots))


def log(rng):
    second, lines = rng.randrange(80_000), []
    for line in sentences(rng, LOGS, 12, 30):
        second += rng.randrange(9)
        hours, minutes = second // 3600, second // 60 % 60
        lines.append(f"2024-{rng.randint(10, 12)}-{hours + 1:02} {hours:02}:{minutes:02}:"
                     f"{second % 60:02} {line}")
    return "\n".join(lines)


def main():
    rng, kinds = Random(seed), (menu, keywords, shop, boilerplate, log)
    with config.whole_file(out) as f:
        for i in range(n_documents):
            kind = kinds[i % len(kinds)]
            record = {"text": kind(rng), "kind": kind.__name__}
            f.write(json.dumps(record, ensure_ascii=False) + "\n")
    print(f"wrote {out}: {n_documents:,} documents")


if __name__ == "__main__":
    main()
