"""Write the embedded demo corpus: stories to pretrain on, dialogues to learn, questions as a test.

    python data/make_demo.py                data/demo/{stories,chat,heldout}.jsonl, always the same
    python data/make_demo.py --scale=0.01   a hundredth of the training text, for tests

Every sentence is ours and comes out of the small grammar below: `[a|b|]` is one of a, b, nothing;
`{x}` is a slot. A story is a plot, a row of the plot's table (what goes wrong, and what therefore
helps) and a cast: so the thing that is lost is the thing that is found, the helper is the one who
is thanked, and the season fits what they do in it.
"""
import json
import os
import re
import sys
from random import Random

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config

out_dir    = "data/demo"  # stories.jsonl, chat.jsonl, heldout.jsonl
scale      = 1.0          # fraction of the stories and dialogues to write; tests use 0.01
n_stories  = 6000         # stories at scale 1, about 195 characters each
n_chats    = 14000        # training dialogues at scale 1, about 48 characters each
n_heldout  = 300          # held-out questions, at every scale
n_withheld = 44           # of them sums that no training dialogue shows, out of 462 up to 20
seed       = 1            # another seed is another corpus of the same kind
config.override(globals())


# ---------------------------------------------------------------- the grammar

INNERMOST = re.compile(r"\[([^\[\]]*)\]")       # nested choices are made from the inside out


def pick(rng, items):
    """One of the items.

    Only rng.random() is promised to give the same numbers in every Python: use nothing else.
    """
    return items[int(rng.random() * len(items))]


def shuffled(rng, items):
    return [items[i] for _, i in sorted((rng.random(), i) for i in range(len(items)))]


def fill(rng, template, slots):
    """fill(rng, "{a}[很|]高兴。", {"a": "小兔"}) -> "小兔很高兴。" or "小兔高兴。".

    A slot may hold slots and choices.
    """
    while "{" in template:
        template = template.format_map(slots)
    while "[" in template:
        template = INNERMOST.sub(lambda choice: pick(rng, choice[1].split("|")), template)
    return template


def table(columns, text):
    """table("x y", "大 小 多 少") -> [{"x": "大", "y": "小"}, {"x": "多", "y": "少"}].

    No cell contains a space.
    """
    columns, cells = columns.split(), text.split()
    assert len(cells) % len(columns) == 0, f"{columns}: {len(cells)} cells, from {cells[0]}"
    n = len(columns)
    return [dict(zip(columns, cells[i:i + n])) for i in range(0, len(cells), n)]


# ---------------------------------------------------------------- who and when

ANIMALS = [dict(row, ta="它") for row in table("name sort", """小兔 只 小熊 只 小猫 只 小狗 只 小猪 只 小羊 只 小猴 只
    小鹿 只 小松鼠 只 小刺猬 只 小狐狸 只 小鸭 只 小象 头 小马 匹 小老鼠 只""")]
CHILDREN = table("name ta sort", """小明 他 男孩 小刚 他 男孩 乐乐 他 男孩 豆豆 他 男孩 强强 他 男孩 小军 他 男孩
    小红 她 女孩 小丽 她 女孩 朵朵 她 女孩 圆圆 她 女孩 芳芳 她 女孩 玲玲 她 女孩""")
ANIMAL_ELDERS = "山羊爷爷 绵羊奶奶 兔奶奶 熊爷爷 鹿奶奶 牛爷爷 松鼠婆婆".split()
PARENTS = "妈妈 爸爸 奶奶 爷爷".split()
HUMAN_ELDERS = "王奶奶 李爷爷 刘奶奶 孙爷爷 陈奶奶 赵爷爷".split()
SPOTS = "草丛里 花丛里 大树下 小桥边 石头后面 小路旁 水井边".split()
GROUNDS = "小河边 山坡上 草地上 池塘边 果园".split()
NUMBERS = table("n k", "四 两 六 三 五 两 八 四 十 五")         # so many there are, so many are given away
ANIMAL_INTRO = "[从前|很久以前]，[大森林里|小山脚下|小河边|大山里|青青的山坡上]住着一{sort}{a}{friend}。"
CHILD_INTRO = "{a}是[一个|个][爱笑|好奇|活泼|可爱|爱动脑筋]的{sort}[，今年[五|六|七]岁|，住在[小河边|山脚下|小镇上]|]{friend}。"
OPENINGS = {"": "[有一天，|这一天，|一个晴朗的日子，|星期天，]",
            "春": "[春天来了，[桃花开了|小草发芽了|燕子飞回来了]。|一个暖和的春日，|春风轻轻地吹着，河边的柳树绿了。]",
            "夏": "[夏天到了，[知了在树上叫个不停|池塘里的荷花开了]。|一个晴朗的夏日，|夏天到了，天气越来越热。]",
            "秋": "[秋天到了，[树叶黄了|果子熟了|天气凉了]。|一个凉爽的秋日，|秋风一吹，树叶像蝴蝶一样飘下来。]",
            "冬": "[冬天来了，[北风呼呼地吹|天气越来越冷]。|下了一夜的雪，地上白茫茫的。|一个寒冷的冬日，]"}

# ---------------------------------------------------------------- the plots

PLOTS = {}                                      # topic -> (who may play, rows, text)


def plot(topic, who, columns, rows, text):
    """Column s, where there is one, holds the seasons that fit the row.

    Column who holds the animals that it is about.
    """
    PLOTS[topic] = who, table(columns, rows), "".join(line.strip() for line in text.splitlines())


plot("找东西", "all", "s x m from", """
    春夏秋 小铃铛 个 爷爷做的    春夏秋 布娃娃 个 妈妈缝的    春夏秋 草帽 顶 奶奶编的      春夏秋 图画书 本 爸爸买的
    春夏秋 小风车 个 爷爷做的    春夏秋 花手帕 块 妈妈做的    春夏秋 小口琴 把 爸爸送的    春夏秋 小篮子 个 奶奶编的
    春夏秋 木陀螺 个 爷爷刻的    春夏秋 花皮球 个 爸爸买的    春夏秋 红丝带 条 妈妈送的    春夏秋 小水壶 个 奶奶送的""", """
    {a}有一{m}{x}，是{from}，{ta}[走到哪儿都带着|天天带在身边|喜欢得不得了]。
    {open}{a}[在{ground}玩了半天|去{ground}玩]，[回家的路上|要回家的时候]，忽然发现{x}不见了。
    [{ta}急得[直跺脚|快要哭了|团团转]。|“哎呀，我的{x}呢？”{ta}急得[满头大汗|快要哭了]。]
    {b}[正好路过，|从旁边走过，]停下来问：“[你怎么啦|出了什么事|你在找什么呀]？”
    {a}[难过地|着急地]说：“我的{x}[丢了|不见了]。”{b}说：“[别急|别难过]，我[帮你找|和你一起找]。”
    {they}[沿着来时的路往回找|一边走一边仔细地看][，{p1}没有，{p2}也没有|]。
    [最后|找啊找|过了好一会儿]，{b}在{p3}[找到了|看见了]{x}。[“快看，在这里！”{b}[高兴地|大声]喊。|]
    {a}[接过{x}，[高兴得跳了起来|开心地笑了]|一把抱住{b}]，说：“谢谢你，{b}！[有你真好！|]”
    [从那以后，{a}每次出门都会把{x}放好。|{a}请{b}到家里吃点心，{they}说说笑笑，真开心。
    |{a}想：以后可要把东西收好，再也不能粗心了。|{they}手拉着手，高高兴兴地回家去了。|]""")

plot("吵架又和好", "all", "s v x oops fix", """
    春夏秋 拍 皮球 皮球滚到水沟里去了 一起把皮球捞了上来      春 放 风筝 风筝线缠成了一团 一起把风筝线理好了
    春夏秋冬 看 图画书 书被撕破了一页 一起把书粘好了          春夏秋 推 小木车 车轮掉了一个 一起把车轮装好了
    春夏秋冬 搭 积木 积木撒了一地 一起把积木捡了起来          春夏秋 玩 纸飞机 飞机的翅膀折断了 一起折了一架新飞机
    春夏秋冬 敲 小鼓 鼓面破了一个洞 一起把小鼓补好了          夏 吹 泡泡 泡泡水洒了一地 一起做了一大杯泡泡水""", """
    {open}{a}和{b}一起{v}{x}。[没过多久，|过了一会儿，]{a}说：“[该我了|让我先来|轮到我了]。”{b}说：“[不行，还没轮到你呢|我才刚开始|再等一会儿]！”
    [两个好朋友|{they}][谁也不让谁|你拉我扯|抢来抢去]，[结果|一不小心]，{oops}。
    [“都怪你！”“怪你才对！”|]{a}[气呼呼地|头也不回地]走了，{b}也[撅着嘴|生气地]回了家。
    [晚上|回到家里]，{a}[一个人坐在窗前|翻来覆去睡不着]，[觉得一点意思也没有|越想越后悔|想起了和{b}在一起的快乐]。
    [{par}说：“[好朋友也会吵架，先说对不起的那个最勇敢|各让一步，两个人都会开心]。”|]
    第二天一早，{a}来到{b}家门口，[小声说|红着脸说]：“对不起，[我不该和你抢|昨天是我不好|我不该只想着自己]。”
    {b}[连忙|摇摇头，]说：“[我也有不对|我也要说对不起|是我先发脾气的]。”
    {they}{fix}，[你让着我，我让着你|有说有笑]，[玩得可开心了|又成了好朋友|比以前更要好了]。
    [原来，互相让一让，比抢来抢去快乐多了。|]""")

plot("学本领", "all", "who s v fail tip done", """
    child 春秋 骑自行车 连人带车摔在了地上 眼睛看着前面，别看脚下 稳稳当当地骑了一大圈
    child 夏 游泳 一下水就慌，喝了好几口水 先学会憋气，再慢慢划水 从池子这头游到了那头
    child 春秋 跳绳 刚跳两下，绳子就绊住了脚 手腕轻轻转，脚不用跳太高 一口气跳了三十下
    all 冬 滑冰 刚站到冰上，就摔了一跤 身子往前一点，慢慢地滑 能在冰上轻快地滑来滑去了
    all 春夏秋冬 吹笛子 吹得脸都红了，笛子也不响 嘴唇放松，轻轻地吹气 吹出了一支好听的曲子
    all 春 放风筝 刚把风筝放起来，风筝就一头栽了下来 迎着风跑，慢慢放线 把风筝放得又高又稳
    all 春夏秋冬 包饺子 把饺子皮捏破了，馅都漏了出来 馅少放一点，边上要捏紧 包出了一个个圆鼓鼓的饺子
    all 春夏秋冬 折纸鹤 折来折去，把纸折破了 每一步都要把边对齐 折出了一只漂亮的纸鹤
    小熊,小松鼠,小老鼠>小猴 夏秋 爬树 爬到一半就滑了下来 抱紧树干，眼睛往上看 爬到了高高的树枝上
    小狗,小猪,小鹿,小马>小鸭 夏 游泳 一下水就慌，喝了好几口水 身子放松，轻轻地划水 游到了池塘对面""", """
    {open}{a}看见{b}会{v}，[心里真羡慕|羡慕极了]。{ta}说：“[我也想学{v}|我也要学会{v}]，[你能教我吗？|请你教教我吧！]”
    {b}[点点头|笑着]说：“[好呀|没问题|当然可以]！”[第一次|开始的时候]，{a}{fail}。
    {ta}[有点泄气，|垂头丧气地|皱着眉头]说：“太难了，我[学不会|不想学了]。”
    {b}说：“[别灰心|别怕|别着急，谁刚开始都这样]，{tip}。”{a}[点点头|咬咬牙|擦擦汗]，[练了一遍又一遍|每天都认真练习|试了一次又一次]。
    [过了几天|半个月后|练了一个星期]，{ta}[终于|真的]{done}。“[我会了|我学会了|我成功了]！”{a}[高兴得又蹦又跳|高兴地叫了起来]。
    [{b}也为{ta}高兴。|{b}拍着手说：“[你真棒|我就知道你能行]！”|][原来，只要不怕难，什么都能学会。|]""")

plot("帮助别人", "all", "s see do", """
    春夏秋冬 提着一篮土豆，走几步就要歇一歇 接过篮子，一直送到门口
    秋 推着一车南瓜上坡，怎么也推不上去 跑到车后面，使出全身的力气往上推
    春夏秋 蹲在地上，眯着眼睛找眼镜 趴在地上仔细找，很快就从草丛里找到了眼镜
    春夏秋 站在河边，不敢走那座窄窄的木桥 走上前扶着{old}，一步一步走过了木桥
    冬 在扫门前的雪，累得直喘气 拿起扫把，不一会儿就扫出了一条路
    秋 在收玉米，累得直捶腰 卷起袖子，把玉米一筐一筐搬进了屋
    春夏秋 提着一大桶水，走得摇摇晃晃 和{old}一起抬着水桶，走回了家""", """
    {open}{a}[高高兴兴地|蹦蹦跳跳地|]去{b}家玩。[半路上|走着走着]，{ta}看见{old}{see}。
    [{a}连忙跑了过去。|{a}本来急着去玩，可是{ta}停了下来。]“{old}，[我来帮您吧|让我来]！”{a}说着，{do}。
    {old}[擦擦汗|笑得合不拢嘴]，说：“[好孩子，谢谢你|多亏了你，谢谢]！”[{a}笑着说：“[不用谢，这是小事|不客气]。”|]
    [{a}到{b}家的时候已经晚了。{b}知道了原因，不但没有生气，还说：“[你做得对|换了我也会这样做]！”
    |过了几天，{a}走路不小心扭了脚，正好{old}路过，扶着{ta}回了家。{old}说：“上次你帮了我，这次该我帮你了。”]
    [{a}心里甜甜的：原来帮助别人，自己也会快乐。|]""")

plot("说话算数", "all", "s v meet why", """
    春 去放风筝 桥头 搭积木搭得入了迷            春 去采野花 山脚下 在家里睡懒觉，睡过了头
    夏 去钓鱼 池塘边 看图画书看得忘了时间        夏 去摘荷叶 池塘边 在家里睡懒觉，睡过了头
    秋 去采蘑菇 大树下 和别的伙伴玩起了捉迷藏    秋 去捡栗子 山脚下 看图画书看得忘了时间
    冬 去堆雪人 大树下 坐在火炉边烤红薯          冬 去滑雪 山脚下 搭积木搭得入了迷""", """
    {open}{a}答应{b}，第二天一早在{meet}见面，一起{v}。
    可是到了第二天，{a}{why}，[把这件事忘得一干二净|早把约好的事忘了]。
    {b}在{meet}等啊等，[等了整整一个上午|从早上等到中午]，[脚都站麻了|肚子饿得咕咕叫]，{a}还是没来。
    [到了下午|吃午饭的时候]，{a}[忽然|才]想起[约好的事|和{b}的约定]，[急忙|赶紧]跑到{b}家。
    {b}[坐在门口|眼睛红红的|撅着嘴]，说：“[你说话不算数|我等了你好久]。”
    {a}[红着脸|低下头]说：“对不起，[都是我不好|我不该忘了]。明天我一定[第一个到|早早地到]，[请你再相信我一次。|好不好？]”
    第三天天刚亮，{a}就[站在{meet}等着了|到了{meet}]。{b}来了，[看见{a}，|]忍不住笑了。
    {they}[高高兴兴地|有说有笑地]{v}，[玩到太阳下山才回家|把昨天的不快全忘了]。
    [从此，{a}答应别人的事，总是记在心上。|{a}明白了：答应了的事，就一定要做到。|]""")

plot("分享", "all", "s get x m taste", """
    秋 摘了 苹果 个 又脆又甜      夏 摘了 桃子 个 又大又甜      秋 摘了 梨 个 又甜又多汁      春 摘了 草莓 颗 又红又甜
    春夏秋冬 烤了 饼干 块 又香又脆    秋 煮了 玉米 根 又香又甜    冬 烤了 红薯 个 又软又甜    春秋冬 蒸了 包子 个 又白又香""", """
    {open}{a}{get}{n}{m}{x}，{taste}，[正想好好吃一顿|闻一闻，口水都要流下来了]。
    [这时候|忽然]，{ta}看见{b}[坐在路边叹气|没精打采地走过来]。“[你怎么了|怎么不高兴呀]？”{a}问。
    {b}[摸摸肚子|小声]说：“我[从早上到现在还没吃东西|忘了带午饭]，肚子[好饿|饿得咕咕叫]。”
    {a}看了看{x}，[心想：要是我全吃了，{b}就要饿肚子了|有点舍不得，可是{ta}更不想让朋友挨饿]。
    {ta}拿出{k}{m}{x}递给{b}：“[给你，我们一起吃|快吃吧，别客气]！”
    {they}肩并肩坐着，[你一口，我一口|一边吃一边说笑]，吃得[真香|真开心]。
    [过了几天，{a}感冒了，躺在床上。{b}端来一碗热粥，说：“[上次你分给我{x}，这次我来照顾你|好朋友就要互相照顾]。”|]
    [{a}觉得，和朋友一起吃的{x}，比一个人吃的更香。|]""")

plot("怕黑", "all", "noise it", """
    窗外传来沙沙的响声 风在吹着树叶        屋外传来滴答滴答的响声 屋檐在滴水      墙角传来唧唧的叫声 一只小虫子在唱歌
    墙上出现了一个高高的黑影 挂在门后的外套    门口传来咚咚的响声 风把门吹得咚咚响
    窗口有两点亮光一闪一闪 两只萤火虫        窗台上传来轻轻的响声 几片树叶落在了窗台上""", """
    {a}[什么都不怕，就怕黑|很怕黑]，[每天晚上都要{par}陪着才肯睡|晚上从来不敢一个人睡觉]。
    [有一天|这天]晚上，{par}[出门还没回来|在隔壁屋里干活]，{a}一个人躺在床上。忽然，{noise}。
    “[会不会是妖怪|是不是大灰狼来了]？”{a}[吓得用被子蒙住了头|心怦怦直跳|吓得缩成一团]。
    [过了一会儿，|]{ta}[想起{par}说过：“看清楚了，就不会怕了。”|对自己说：“别怕，去看看到底是什么。”]
    于是{ta}[鼓起勇气|深深吸了一口气]，[点亮小灯|打开灯]，[轻轻地|慢慢地]走过去一看，原来是{it}！
    {a}[忍不住笑了|松了一口气]，说：“[原来是这样啊|我还以为是妖怪呢]！”
    [{par}知道了，摸着{ta}的头说：“[你真勇敢|你长大了]！”|]从那以后，{a}[再也不怕黑了|晚上敢一个人睡了]。""")

plot("诚实", "all", "s v oops lie truth fix", """
    春夏秋冬 在屋里拍皮球 碰倒了花瓶，花瓶碎了 花瓶是风吹倒的 花瓶是我碰倒的 把碎片扫干净
    春夏秋冬 趴在桌上画画 打翻了墨水，把桌布弄脏了 墨水是风吹翻的 桌布是我弄脏的 把桌布洗干净
    春夏秋冬 在厨房里找吃的 把留给客人的点心吃光了 点心不是我吃的 点心是我吃的 又做了一盘点心
    春夏秋冬 拿着雨伞当宝剑耍 把雨伞弄断了 雨伞早就断了 雨伞是我弄断的 把雨伞修好
    春夏 在院子里踢球 踩倒了一片花苗 花苗是雨打倒的 花苗是我踩倒的 把花苗扶了起来
    春夏秋冬 对着镜子做鬼脸 把镜子摔破了 镜子是自己掉下来的 镜子是我摔破的 把碎片收拾干净""", """
    {open}{par}不在家，{a}{v}，一不小心{oops}。
    {par}回来了，问：“[这是怎么回事|怎么会这样]？”{a}[心里很害怕|怕挨骂|不敢抬头]，小声说：“{lie}。”{par}没有再问。
    [晚上，{a}躺在床上，翻来覆去睡不着，|吃饭的时候，{a}什么也吃不下，][心里像压着一块石头|心里很难受]。
    [最后|想来想去]，{ta}[走到{par}身边|跑到{par}面前]，[流着眼泪|红着脸]说：“对不起，[我说了谎，|]{truth}。”
    {par}[没有生气|蹲下来]，[抱住{ta}|摸摸{ta}的头]，说：“
    [东西没了可以再有，诚实丢了可就难找了|做错了事不要紧，敢说真话就是好孩子|谁都会做错事，肯承认就好]。”
    {a}[心里的石头落了地|心里一下子轻松了|擦干眼泪，笑了]，和{par}一起{fix}。[从那以后，{a}再也没有说过谎。|]""")

plot("种种子", "all", "x grow bloom when fruit give", """
    向日葵 秆子长得比屋檐还高 开出了金黄的大花 秋天 花盘上结满了瓜子 请{b}和{old}一起吃瓜子
    西瓜 绿绿的藤爬了一地 开出了小黄花 夏天 地里结了一个又大又圆的西瓜 请{b}和{old}一起吃西瓜
    南瓜 藤爬上了篱笆 开出了喇叭一样的黄花 秋天 篱笆下结了三个大南瓜 把最大的南瓜送给了{old}
    玉米 秆子越长越高 叶子像一条条绿带子 秋天 秆子上结满了金黄的玉米 请{b}和{old}一起吃玉米
    豆角 藤顺着竹竿往上爬 开出了紫色的小花 夏天 竹竿上挂满了长长的豆角 摘了一大篮豆角送给{old}
    番茄 叶子越长越多 开出了黄色的小花 夏天 枝上挂满了红红的番茄 摘了一大篮番茄送给{old}""", """
    春天[来了|到了]，{old}送给{a}[几粒|一包]{x}种子。{a}在[院子里|屋后|篱笆边]挖了个小坑，把种子埋进土里，[又浇了水|又轻轻地浇上水]。
    第二天一早，{a}就跑去看，[土里什么也没有|一点动静也没有]。[过了三天，还是这样。|]
    {ta}[急了，|着急地]问{old}：“[种子怎么还不发芽|种子是不是睡着了]呀？”
    {old}[笑着|慢慢地]说：“别急，[种子正在土里喝水呢|种子发芽需要时间，要耐心等一等]。”
    {a}每天[浇水、拔草|浇水、捉虫]，[一天也不偷懒|一天也没有忘记]。
    [过了几天|一场春雨过后]，嫩绿的小芽[钻了出来|从土里探出了头]。[后来|慢慢地]，{grow}，{bloom}。
    到了{when}，{fruit}！{a}[高兴极了|笑得合不拢嘴]，{give}。[{a}明白了，好东西要耐心等。|]""")

plot("迷路", "all", "s v", """
    春夏 追着一只花蝴蝶 夏 追着一只红蜻蜓 秋 去采蘑菇 春 去采野花 秋 去捡松果 冬 跟着雪地上的一串脚印""", """
    {open}{a}一个人{v}，越走越远。[等{ta}抬起头来，|忽然，{ta}发现]四周都是不认识的树，[找不到回家的路了|不知道家在哪边]。
    天[渐渐|慢慢]黑了，{a}[又累又怕|心里害怕极了]，[喊了几声，没有人答应|差点哭出来]。
    [这时候，{old}[提着一盏灯笼|背着一捆柴]走了过来，问：“孩子，你怎么一个人在这里？”{a}说：“我[迷路了|找不到家了]。”
    {old}说：“别怕，[我送你回家|跟我走吧]。”{old}牵着{ta}的手，[走过小桥，绕过池塘|穿过树林，走过小桥]，终于看见了家里的灯光。
    |{ta}想起{par}说过，[迷了路不要慌，要动动脑筋|越着急，越要静下心来想办法]。借着月光，{ta}看见了远处那棵高高的松树。
    “[对了|有了]，家就在那棵松树旁边！”{a}朝着松树走啊走，[果然|终于]看见了家里的灯光。]
    {par}正[站在门口张望|着急地到处找]，一把抱住{ta}，说：“[你可回来了|你去哪儿了，真急人]！”
    {a}说：“[我再也不乱跑了|以后出门，我一定先告诉您]。”[那天晚上，{ta}睡得特别香。|]""")

plot("愿望", "all", "wish way see like", """
    去看一看大海 翻过了一座又一座山 大海蓝蓝的，一眼望不到边，浪花一朵接着一朵 蓝蓝的大海
    去山顶看日出 顺着山路摸黑往上爬 太阳像一个红红的大气球，慢慢地升了起来 红红的太阳
    去看山那边的瀑布 穿过树林，顺着小溪往上走 瀑布从高高的山上落下来，像一块白白的布 高高的瀑布
    去看一看草原 翻过了一座又一座小山 草原绿绿的，一眼望不到边，风一吹，草像波浪一样起伏 绿绿的草原
    去山顶看云海 顺着山路往上爬 白云铺在脚下，像一大片软软的棉花 白白的云海""", """
    {a}有一个[小小的|]愿望，就是{wish}。[{ta}常常坐在门口想：[那该多好啊！|会是什么样子呢？]|]
    {b}知道了，说：“[我也想去，我们一起去吧|我陪你去]！”[{par}说：“路很远，要坚持到底啊。”|]
    {they}[带上水和干粮|背上小书包]出发了，{way}。走了很久，{a}[累得走不动了|脚疼了，想回家]，{b}说：“[再走一会儿就到了|别放弃，我拉着你走]。”
    终于到了！{see}。{a}[看呆了|高兴得说不出话来]。[“真美啊，比我想的还要美！”{ta}说。|{b}说：“[多亏我们没有放弃|你看，没有白走吧]！”]
    [回家以后，{a}画了一幅画，画上有{like}，还有{ta}和{b}。|晚上，{a}做了一个梦，又梦见了{like}。|
    回到家里，{a}给{par}讲起{like}，讲了一遍又一遍。]""")

plot("听劝告", "all", "s warn v bad care after", """
    春夏秋冬 糖要少吃，吃完要刷牙 吃了一颗又一颗，也不刷牙 没过几天，{a}牙疼得直掉眼泪 带{ta}去看了医生 每天早晚都认真刷牙
    春秋 早点睡，明天大家要去爬山 偷偷玩到了半夜 第二天早上，{a}怎么也起不来，大家都走远了 安慰了{ta}几句 每天晚上都按时睡觉
    冬 外面冷，穿上棉衣再出去 嫌棉衣太重，穿着薄衣服就跑出去玩 回到家里，{a}就发起烧来 给{ta}熬了一碗姜汤 天一冷就自己穿好棉衣
    夏 天要下雨了，带上伞吧 两手空空就出了门 走到半路，{a}被大雨淋得浑身都湿透了 给{ta}换上了干衣服 出门前总要看看天
    春夏秋冬 吃饭要细嚼慢咽 大口大口地往嘴里塞饭 饭还没吃完，{a}就肚子疼得直打滚 轻轻地给{ta}揉肚子 吃饭总是细嚼慢咽
    春夏秋 走路要看路，别东张西望 一边走一边看天上的小鸟 走着走着，{a}掉进了水沟，浑身是泥 把{ta}洗得干干净净 走路总是看着前面
    夏 西瓜凉，不能一下子吃太多 趁{par}不注意，一口气吃了大半个 到了晚上，{a}肚子疼得直叫 带{ta}去看了医生 再也不贪吃了""", """
    {open}{par}对{a}说：“{warn}。”{a}[嘴上答应了，|点了点头，|随口应了一声，][心里却不当回事|转身就忘了]。
    {ta}[想：“没关系，就这一次。”于是|]{v}。{bad}。
    {par}[又心疼又好笑|叹了一口气]，{care}。{a}[小声|难过地|红着脸]说：“[我错了，以后一定听您的话|要是早听您的话就好了]。”
    [从那以后|从此]，{a}{after}。""")

plot("救小动物", "all", "s y m bad help bye", """
    春 小燕子 只 翅膀受了伤，飞不起来 用布条包好小燕子的翅膀，把小燕子带回家养伤 过了十几天，小燕子飞上了蓝天。第二年春天，小燕子又回来了，在屋檐下做了一个窝。
    夏 小蜻蜓 只 被蜘蛛网缠住了，怎么也飞不走 解开蛛丝，把小蜻蜓救了下来 小蜻蜓抖抖翅膀，飞走了。傍晚，一群蜻蜓飞进院子，好像在跳舞。
    夏 小蚂蚁 只 掉进了水坑，快要淹死了 捡来一片树叶，轻轻放在水面上 小蚂蚁爬上树叶，像坐着小船一样漂到岸边，得救了。
    夏秋 小乌龟 只 肚皮朝天，怎么也翻不过身来 把小乌龟翻了过来 小乌龟伸出头看了看，慢慢地爬进了草丛。
    春夏 小鱼 条 困在小水坑里，水快要干了 用水桶装起小鱼，跑到河边，把小鱼放进水里 小鱼摆摆尾巴，在水里转了一圈，高高兴兴地游走了。
    冬 小麻雀 只 冻得缩成一团，飞也飞不动 把小麻雀捧回家，放在火炉边，还喂了一些小米 不一会儿，小麻雀就叽叽喳喳地叫了起来，好像在说谢谢。""", """
    {open}{a}[在外面散步|出门去玩]，[忽然|走着走着，]看见一{m}{y}{bad}。
    “[真可怜，我来帮帮它|可怜的{y}，我来救你]吧！”{a}说。
    {a}[小心地|连忙|赶紧]{help}。{bye}
    [{a}心里[暖暖的|比吃了糖还甜]。|{par}知道了，说：“你真是个[善良的|有爱心的]孩子。”|{a}开心地笑了。|]""")


def cast(rng, who="all"):
    """Slots: a, b, c, the pronouns of a and of a with b, an elder, a parent, places, two numbers.

    who: see plot().
    """
    if who == "all":
        who = "animal" if rng.random() < 0.6 else "child"
    people = shuffled(rng, CHILDREN if who == "child" else ANIMALS)
    if ">" in who:                              # "小熊,小松鼠>小猴": one of these learns from that one
        pupils, master = who.split(">")
        pupil = pick(rng, pupils.split(","))
        people.sort(key=lambda person: (person["name"] != pupil, person["name"] != master))
    a, b, c = people[:3]
    they = "它们" if a["ta"] == "它" else "她们" if a["ta"] == b["ta"] == "她" else "他们"
    p1, p2, p3 = shuffled(rng, SPOTS)[:3]
    return dict(a=a["name"], b=b["name"], c=c["name"], ta=a["ta"], they=they, sort=a["sort"],
                p1=p1, p2=p2, p3=p3,
                old=pick(rng, HUMAN_ELDERS if who == "child" else ANIMAL_ELDERS),
                par=pick(rng, PARENTS), ground=pick(rng, GROUNDS), **pick(rng, NUMBERS))


def story(rng):
    """(text, slots) of one story; slots["topic"] is the name of its plot."""
    topic = pick(rng, list(PLOTS))
    who, rows, text = PLOTS[topic]
    row = pick(rng, rows)
    season = pick(rng, row.get("s", "春夏秋冬")) if rng.random() < 0.6 else ""
    slots = cast(rng, row.get("who", who)) | row | {"topic": topic, "open": OPENINGS[season]}
    body = fill(rng, text, slots)
    if rng.random() < 0.5:
        return body, slots
    slots["friend"] = "[，{ta}的好朋友是{b}|，{ta}和{b}是好朋友|]" if slots["b"] in body else ""
    intro = fill(rng, ANIMAL_INTRO if slots["ta"] == "它" else CHILD_INTRO, slots)
    if body.startswith(slots["a"]) and slots["b"] not in intro:   # the name came just before
        body = slots["ta"] + body.removeprefix(slots["a"])
    return intro + body, slots


def stories(rng, n):
    """n different stories."""
    found = {}                                  # a dict keeps the order in which they came
    while len(found) < n:
        text, _ = story(rng)
        if len(text) <= 250:
            found[text] = None
    return list(found)


# ---------------------------------------------------------------- what a child knows

FACTS = []                                      # one entry per table below


def facts(quota, rows, *phrasings, follow=""):
    """Each row is asked about in each phrasing, "question → answer".

    `quota` pairs of the two are held out.
    """
    phrasings = [phrasing.split(" → ") for phrasing in phrasings]
    FACTS.append(dict(quota=quota, rows=rows, phrasings=phrasings, follow=follow))


OPPOSITES = table("x y", """大 小 多 少 上 下 左 右 前 后 里 外 黑 白 冷 热 快 慢 远 近 早 晚 新 旧 好 坏 轻 重 厚 薄 宽 窄 长 短 粗 细
    胖 瘦 美 丑 真 假 开 关 来 去 升 降 哭 笑 买 卖 问 答 天 地 东 西 南 北 甜 苦 软 硬 明 暗 强 弱 香 臭 深 浅 干 湿 直 弯 饱 饿 松 紧
    忙 闲 胜 败 高兴 难过 安静 吵闹 勇敢 胆小 勤劳 懒惰 聪明 愚笨 简单 复杂 容易 困难 开始 结束 成功 失败 朋友 敌人 认真 马虎 危险 安全
    整齐 凌乱 白天 黑夜 上升 下降 前进 后退 进步 退步 光明 黑暗 喜欢 讨厌 记住 忘记 表扬 批评 温暖 寒冷 快乐 悲伤 潮湿 干燥 增加 减少""")
facts(30, OPPOSITES + [{"x": row["y"], "y": row["x"]} for row in OPPOSITES],
      "“{x}”的反义词是什么？ → “{x}”的反义词是“{y}”。", "{x}的反义词是？ → {y}。",
      "“{x}”反过来说是什么？ → “{x}”反过来说是“{y}”。", "和“{x}”意思相反的词是什么？ → 和“{x}”意思相反的词是“{y}”。",
      follow="那“{x}”呢？")
facts(10, table("x y", """高兴 开心 美丽 漂亮 立刻 马上 忽然 突然 明白 懂得 常常 经常 着急 焦急 害怕 恐惧 好像 仿佛 帮助 帮忙 愉快 快乐
    疲倦 疲劳 父亲 爸爸 母亲 妈妈 关心 关怀 非常 十分 也许 可能 温暖 暖和 看见 看到 喜爱 喜欢"""),
      "“{x}”的近义词是什么？ → “{x}”的近义词是“{y}”。", "{x}的近义词是？ → {y}。",
      "和“{x}”意思相近的词是什么？ → 和“{x}”意思相近的词是“{y}”。", follow="那“{x}”呢？")
facts(28, table("x m", """书 本 笔 支 马 匹 牛 头 鱼 条 花 朵 树 棵 纸 张 汽车 辆 轮船 艘 飞机 架 雨伞 把 椅子 把 桌子 张 床 张 衣服
    件 裤子 条
    鞋子 双 帽子 顶 桥 座 山 座 河 条 路 条 井 口 灯 盏 镜子 面 红旗 面 画 幅 诗 首 歌 首 信 封 电视 台 电脑 台 刀 把 钥匙 把 筷子 双
    眼镜 副 葡萄 串 星星 颗 围巾 条 蛇 条 狗 只 鸟 只 鸡 只 羊 只 兔子 只 蜜蜂 只 猪 头 苹果 个 西瓜 个 雨 场 手表 块 石头 块 米 粒
    香蕉 根 火车 列 报纸 份 毛巾 条 老虎 只 青蛙 只 词典 本 毛衣 件 梨 个 袜子 双 气球 个"""),
      "一什么{x}？ → 一{m}{x}。", "“{x}”用什么量词？ → “{x}”用量词“{m}”。", "一___{x}，横线上填什么？ → 一{m}{x}。",
      "{x}的量词是什么？ → {x}的量词是“{m}”，比如一{m}{x}。", follow="那{x}呢？")
facts(10, table("x c d", """小草 绿 红 天空 蓝 黄 雪 白 黑 番茄 红 蓝 香蕉 黄 紫 煤 黑 白 葡萄 紫 黄 牛奶 白 红 白云 白 绿 大海 蓝 红
    菠菜 绿 白
    茄子 紫 红 乌鸦 黑 白 柠檬 黄 黑 豆腐 白 黑 棉花 白 蓝 盐 白 红 草莓 红 黑 玉米 黄 蓝 黄瓜 绿 紫 向日葵 黄 黑 消防车 红 绿 樱桃 红 蓝"""),
      "{x}是什么颜色的？ → {x}是{c}色的。", "{x}的颜色是什么？ → {x}的颜色是{c}色。", "{x}是{c}色的吗？ → 是的，{x}是{c}色的。",
      "{x}是{d}色的吗？ → 不是，{x}是{c}色的。", follow="那{x}呢？")
facts(5, table("x s", """猫 喵喵 狗 汪汪 公鸡 喔喔 鸭子 嘎嘎 羊 咩咩 牛 哞哞 青蛙 呱呱 蜜蜂 嗡嗡 老鼠 吱吱 小鸡 叽叽 猪 哼哼 母鸡 咯咯"""),
      "{x}怎么叫？ → {x}“{s}”地叫。", "{x}的叫声是什么？ → {x}的叫声是“{s}”。", "谁“{s}”地叫？ → {x}“{s}”地叫。",
      follow="那{x}呢？")
facts(7, table("x n", """狗 四 猫 四 牛 四 马 四 羊 四 兔子 四 老虎 四 大象 四 熊 四 乌龟 四 青蛙 四 鸡 两 鸭子 两 鹅 两 鸽子 两 麻雀 两
    蚂蚁 六 蜜蜂 六 蝴蝶 六 蜻蜓 六 蜘蛛 八"""),
      "{x}有几条腿？ → {x}有{n}条腿。", "{x}长着几条腿？ → {x}长着{n}条腿。", "{x}的腿有几条？ → {x}的腿有{n}条。",
      follow="那{x}呢？")
facts(7, table("x h", """鱼 水里 鸟 鸟窝里 蜜蜂 蜂巢里 蚂蚁 地下的洞里 松鼠 树洞里 猴子 树林里 狗 狗窝里 马 马棚里 羊 羊圈里 猪 猪圈里
    鸡 鸡窝里 牛 牛棚里 青蛙 池塘里 骆驼 沙漠里 企鹅 南极 熊猫 竹林里 狮子 草原上 鲸鱼 大海里"""),
      "{x}住在哪里？ → {x}住在{h}。", "{x}的家在哪儿？ → {x}的家在{h}。", "谁住在{h}？ → {x}住在{h}。", follow="那{x}呢？")
facts(7, table("x f", """兔子 萝卜 猫 鱼 狗 骨头 熊 蜂蜜 猴子 桃子 松鼠 松果 牛 草 熊猫 竹子 蜜蜂 花蜜 青蛙 虫子 老虎 肉 蚕 桑叶 老鼠 大米"""),
      "{x}爱吃什么？ → {x}爱吃{f}。", "{x}最喜欢吃的东西是什么？ → {x}最喜欢吃的东西是{f}。", "谁爱吃{f}？ → {x}爱吃{f}。",
      follow="那{x}呢？")
facts(8, table("x y", """中国 北京 日本 东京 法国 巴黎 英国 伦敦 美国 华盛顿 俄罗斯 莫斯科 德国 柏林 意大利 罗马 韩国 首尔 泰国 曼谷 越南 河内
    埃及 开罗 印度 新德里 西班牙 马德里 加拿大 渥太华 澳大利亚 堪培拉 希腊 雅典 古巴 哈瓦那 波兰 华沙 葡萄牙 里斯本"""),
      "{x}的首都是哪里？ → {x}的首都是{y}。", "{x}的首都叫什么？ → {x}的首都叫{y}。", "{y}是哪个国家的首都？ → {y}是{x}的首都。",
      follow="那{x}呢？")
facts(5, table("x s w", """3 春天 暖和 4 春天 暖和 5 春天 暖和 6 夏天 炎热 7 夏天 炎热 8 夏天 炎热 9 秋天 凉爽 10 秋天 凉爽 11 秋天 凉爽
    12 冬天 寒冷 1 冬天 寒冷 2 冬天 寒冷"""),
      "{x}月是什么季节？ → {x}月是{s}。", "{x}月属于哪个季节？ → {x}月属于{s}。", "{x}月的天气怎么样？ → {x}月是{s}，天气{w}。",
      follow="那{x}月呢？")
facts(5, table("x y z", "一 二 三 二 三 四 三 四 五 四 五 六 五 六 日 六 日 一 日 一 二"),
      "今天是星期{x}，明天是星期几？ → 明天是星期{y}。", "昨天是星期{x}，今天是星期几？ → 今天是星期{y}。",
      "今天是星期{y}，昨天是星期几？ → 昨天是星期{x}。", "今天是星期{x}，后天是星期几？ → 后天是星期{z}。",
      "星期{x}的后一天是星期几？ → 星期{x}的后一天是星期{y}。")
facts(7, [{"x": n, "y": n + 1, "w": n - 1} for n in range(1, 21)],
      "{x}后面的一个数是几？ → {x}后面的一个数是{y}。", "{x}前面的一个数是几？ → {x}前面的一个数是{w}。",
      "比{x}大1的数是几？ → 比{x}大1的数是{y}。", follow="那{x}呢？")
KINDS = {"水果": "苹果 香蕉 梨 桃子 葡萄 西瓜 草莓 橘子", "蔬菜": "白菜 萝卜 黄瓜 茄子 菠菜 土豆", "动物": "猫 狗 马 牛 大象 老虎 青蛙 猴子",
         "交通工具": "汽车 火车 飞机 轮船 自行车", "文具": "铅笔 橡皮 尺子 本子", "家具": "桌子 椅子 床 沙发 柜子",
         "衣服": "裤子 毛衣 裙子 衬衫 外套", "乐器": "钢琴 笛子 小提琴 口琴", "花": "玫瑰 菊花 荷花 桃花"}
facts(24, [{"x": x, "k": kind, "j": list(KINDS)[(i + shift) % len(KINDS)]}
           for i, kind in enumerate(KINDS) for x in KINDS[kind].split() for shift in (1, 2, 4)],
      "{x}是什么？ → {x}是一种{k}。", "{x}是{k}吗？ → 是的，{x}是{k}。", "{x}是{j}吗？ → 不是，{x}是{k}，不是{j}。",
      "{x}是{k}还是{j}？ → {x}是{k}。", "{x}是{j}还是{k}？ → {x}是{k}。", follow="那{x}呢？")
facts(20, [{"x": x, "y": y, "big": max(x, y), "small": min(x, y),
            "said": f"是的，{x}比{y}大" if x > y else f"不，{x}比{y}小"}
           for x in range(21) for y in range(21) if x != y],
      "{x}和{y}哪个大？ → {big}比{small}大。", "{x}和{y}哪个小？ → {small}比{big}小。", "{x}比{y}大吗？ → {said}。",
      follow="那{x}和{y}呢？")

# ---------------------------------------------------------------- sums, texts, small talk

WORDS = {"+": "加", "-": "减"}
SUMS = [("+", x, z - x, z) for z in range(21) for x in range(z + 1)]
SUMS += [("-", x, x - z, z) for x in range(21) for z in range(x + 1)]
SUM_PHRASINGS = ["{x}{word}{y}等于几？ → {x}{word}{y}等于{z}。", "{x}{word}{y}是多少？ → {x}{word}{y}是{z}。",
                 "{x}{op}{y}=？ → {x}{op}{y}={z}"]
SUM_STORIES = {
    "+": ["{a}有{x}{m}{t}，{par}又给了{ta}{y}{m}，{a}现在有多少{m}{t}？ → {x}+{y}={z}，{a}现在有{z}{m}{t}。",
          "{a}有{x}{m}{t}，{b}有{y}{m}{t}，{they}一共有多少{m}{t}？ → {x}+{y}={z}，{they}一共有{z}{m}{t}。",
          "树上有{x}只鸟，又飞来了{y}只，现在有多少只鸟？ → {x}+{y}={z}，现在有{z}只鸟。"],
    "-": ["{a}有{x}{m}{t}，送给{b}{y}{m}，{a}还剩多少{m}{t}？ → {x}-{y}={z}，{a}还剩{z}{m}{t}。",
          "{par}买了{x}{m}{t}，{a}用掉了{y}{m}，还剩多少{m}{t}？ → {x}-{y}={z}，还剩{z}{m}{t}。",
          "树上有{x}只鸟，飞走了{y}只，还剩多少只鸟？ → {x}-{y}={z}，还剩{z}只鸟。"]}
COUNTABLE = table("t m", "铅笔 支 气球 个 贴纸 张 彩纸 张 纸杯 个 扣子 颗 橡皮 块 蜡烛 根")

READINGS = [                                    # a text, then what one can ask about it
    ("{a}的{x}丢了。[{ta}急得快哭了。|]{b}帮{ta}[找了很久|一起找]，最后在{p1}找到了{x}。", "谁丢了东西？ → {a}丢了东西。",
     "{a}丢了什么？ → {a}丢了{x}。", "{x}是在哪里找到的？ → {x}是在{p1}找到的。", "谁帮助了{a}？ → {b}帮助了{a}。"),
    ("[今天|星期天]是{a}的生日。{b}送给{ta}一{m}{x}，{c}送给{ta}一{m2}{x2}。[{a}高兴极了。|]", "过生日的是谁？ → 过生日的是{a}。",
     "{b}送了什么？ → {b}送了一{m}{x}。", "{c}送了什么？ → {c}送了一{m2}{x2}。", "谁送了{x}？ → {b}送了{x}。"),
    ("{day}，{a}和{b}一起去{ground}{v}。[{they}玩得很开心。|太阳下山了，{they}才回家。]", "谁和{a}一起去的？ → {b}和{a}一起去的。",
     "{they}去了哪里？ → {they}去了{ground}。", "{they}去做什么？ → {they}去{v}。", "那天是星期几？ → 那天是{day}。"),
    ("{a}爱吃{f1}，{b}爱吃{f2}，{c}爱吃{f3}。", "{a}爱吃什么？ → {a}爱吃{f1}。", "{b}爱吃什么？ → {b}爱吃{f2}。",
     "{c}爱吃什么？ → {c}爱吃{f3}。", "谁爱吃{f2}？ → {b}爱吃{f2}。", "谁爱吃{f3}？ → {c}爱吃{f3}。"),
    ("{old}{see}。{a}看见了，[连忙|赶紧]跑过去帮忙。{old}说：“谢谢你，{a}！”", "谁帮助了{old}？ → {a}帮助了{old}。",
     "{a}帮助了谁？ → {a}帮助了{old}。", "最后谁说了谢谢？ → {old}说了谢谢。"),
    ("{a}戴着{c1}帽子，{b}戴着{c2}帽子，{c}戴着{c3}帽子。", "谁戴着{c1}帽子？ → {a}戴着{c1}帽子。",
     "谁戴着{c3}帽子？ → {c}戴着{c3}帽子。",
     "{b}戴着什么颜色的帽子？ → {b}戴着{c2}帽子。", "{c}戴着什么颜色的帽子？ → {c}戴着{c3}帽子。"),
    ("[今天开运动会。|大家来赛跑。]{a}得了第一名，{b}得了第二名，{c}得了第三名。", "谁得了第一名？ → {a}得了第一名。",
     "谁得了第二名？ → {b}得了第二名。", "谁得了第三名？ → {c}得了第三名。", "{b}得了第几名？ → {b}得了第二名。")]
FOODS, COLOURS = "苹果 香蕉 西瓜 葡萄 饺子 面条 包子 玉米 饼干 草莓".split(), "红 黄 蓝 白 绿 黑".split()
TROUBLES = "提着一篮土豆，走得很慢 找不到眼镜了 推着车上坡，怎么也推不动 不敢过小桥 背着一捆柴，累得直喘气".split()
OUTINGS = "放风筝 画画 捉迷藏 采野花 做游戏 唱歌 看书".split()
DAYS = "星期一 星期二 星期三 星期四 星期五 星期六 星期日".split()

TALK = [turn.split(" → ") for turn in (         # [a|b] here are ways to say the same
    "[你好！|你好。|小芽，你好！|嗨！] → 你好！我是小芽，很高兴和你聊天。", "[小芽，|]早上好！ → 早上好！祝你今天开开心心。",
    "[小芽，|]晚上好！ → 晚上好！今天过得怎么样？", "[你是谁|你叫什么名字]？ → 我叫小芽，是一个从零开始训练的小模型。",
    "[请|]介绍一下你自己。 → 我叫小芽，是一个从零开始训练的小模型。", "[你几岁了|你多大了]？ → 我刚刚训练好，还是个小宝宝呢。",
    "[你会做什么|你能帮我做什么]？ → 我会讲小故事，会做简单的加减法，还会回答小问题。", "[你是人吗|你是真人吗]？ → 我不是人，我是一个小小的语言模型。",
    "[谁训练了你|你是怎么来的]？ → 有人用一台普通的电脑，从零开始训练了我。", "[你真棒|你真聪明]！ → 谢谢夸奖，我会继续努力的。",
    "[你答错了|不对]。 → 对不起，我还很小，会慢慢进步的。", "[我今天很高兴|我今天真开心]！ → 太好了，我也为你高兴！",
    "[我有点难过|我不开心]。 → 别难过，一切都会好起来的。", "[晚安|我要睡觉了]！ → 晚安，做个好梦！", "[再见|拜拜|我走了]！ → 再见，欢迎再来找我玩！")]
HELLO, THANKS = TALK[0], ["谢谢[你|][，小芽|]！", "不客气！"]
SYSTEMS = ["你是小芽，一个友好的助手。", "你是小芽，请用简短的话回答问题。"]
ASKING = ["", "", "", "请问，", "小芽，", "考考你：", "我想知道，", "请告诉我，", "你知道吗？"]       # before a question
LISTENING = ["", "", "读一读：", "听我说：", "小芽，你听："]                   # before a text
STORY_REQUESTS = ["请讲一个{a}和{b}的故事。", "讲一个关于{a}和{b}的故事。",
                  "给我讲个{a}和{b}的故事吧。", "讲一个关于{topic}的故事，主角是{a}。"]


def ask_fact(rng, known):
    """A question of what a child knows, perhaps with the same about something else: 一什么书？ 那马呢？"""
    number, phrasing = pick(rng, list(known))
    row, *turns = pick(rng, known[number, phrasing])
    if FACTS[number]["follow"] and phrasing == 0:
        back = []
        if number == 0:                                                # opposites
            back = [answer for other, _, answer in known[0, 0] if other["x"] == row["y"]]
        if back and rng.random() < 0.3:
            turns += ["那反过来呢？", *back]
        for other, _, answer in shuffled(rng, known[number, 0])[:pick(rng, [0, 1, 2])]:
            turns += [FACTS[number]["follow"].format_map(other), answer] if other is not row else []
    return turns


def ask_sum(rng, sum_, in_words):
    """[question, answer] for ("+", 3, 4, 7), bare or as a little story."""
    op = sum_[0]
    slots = cast(rng) | pick(rng, COUNTABLE)
    slots |= dict(zip(("op", "x", "y", "z"), sum_), word=WORDS[op])
    phrasing = pick(rng, SUM_STORIES[op] if in_words else SUM_PHRASINGS)
    return phrasing.format_map(slots).split(" → ")


def count_on(rng, sums):
    """3加4等于几？ 再减2呢？ with no step that is withheld."""
    turns = []
    for i in range(pick(rng, [2, 3])):
        op, x, y, z = pick(rng, [sum_ for sum_ in sums if sum_[2] > 0 and (i == 0 or sum_[1] == z)])
        sum_ = f"{x}{WORDS[op]}{y}"
        turns += [f"再{WORDS[op]}{y}呢？" if i else f"{sum_}等于几？", f"{sum_}等于{z}。"]
    return turns


def ask_text(rng):
    """A short text with one to three questions about it; every answer stands in the text."""
    lost, gift = shuffled(rng, PLOTS["找东西"][1])[:2]
    colours, foods = shuffled(rng, COLOURS), shuffled(rng, FOODS)
    slots = cast(rng) | dict(x=lost["x"], m=lost["m"], x2=gift["x"], m2=gift["m"],
                             c1=colours[0], c2=colours[1], c3=colours[2],
                             f1=foods[0], f2=foods[1], f3=foods[2],
                             see=pick(rng, TROUBLES), v=pick(rng, OUTINGS), day=pick(rng, DAYS))
    text, *pairs = pick(rng, READINGS)
    pairs = shuffled(rng, pairs)[:pick(rng, [1, 1, 2, 3])]
    asked = [pair.format_map(slots).split(" → ") for pair in pairs]
    question, *turns = [turn for pair in asked for turn in pair]
    return [fill(rng, text, slots) + question, *turns]


def tell(rng):
    """A story on request, sometimes with a question about who is in it."""
    text, slots = story(rng)
    if len(text) > 180 or slots["b"] not in text:
        return tell(rng)
    more = ["故事里有谁？", f"故事里有{slots['a']}和{slots['b']}。"] if rng.random() < 0.2 else []
    return [fill(rng, pick(rng, STORY_REQUESTS), slots), text, *more]


def chat(rng):
    """Small talk, half of the time with a name to remember."""
    name, turns = pick(rng, CHILDREN)["name"], [fill(rng, turn, {}) for turn in pick(rng, TALK)]
    if rng.random() < 0.5:
        return turns
    return [f"我叫{name}。", f"你好，{name}！很高兴认识你。", *turns, "我叫什么名字？", f"你叫{name}。"]


# ---------------------------------------------------------------- what is held out

def split_facts(rng):
    """({(table, phrasing): [(row, question, answer)]} to train on, {question: answer} to test).

    A held-out question asks for a fact that is known, in a phrasing that is known, but training has
    never joined the two.
    """
    known, held_out = {}, {}
    for number, fact in enumerate(FACTS):
        rows, phrasings = fact["rows"], fact["phrasings"]
        chosen = shuffled(rng, range(len(rows)))[:fact["quota"]]
        hidden = {i: pick(rng, range(len(phrasings))) for i in chosen}
        asked = [(i, p, question.format_map(row), answer.format_map(row))
                 for i, row in enumerate(rows) for p, (question, answer) in enumerate(phrasings)]
        held_out |= {question: answer for i, p, question, answer in asked if hidden.get(i) == p}
        for i, p, question, answer in asked:
            if question not in held_out:
                known.setdefault((number, p), []).append((rows[i], question, answer))
    return known, held_out


def split_sums(rng):
    """(sums to train on, sums to test with).

    7+5 is withheld in every phrasing, but 5+7 is there to be learned.
    """
    withheld = []
    for op, x, y, z in shuffled(rng, SUMS):
        if len(withheld) == n_withheld:
            break
        mirror = (op, y, x, z) if op == "+" else (op, x, z, y)
        if min(x, y, z) > 0 and x != y != z and mirror not in withheld:
            withheld.append((op, x, y, z))
    return [sum_ for sum_ in SUMS if sum_ not in withheld], withheld


def dialogues(rng):
    """(training dialogues, held-out dialogues), each a sequence of turns.

    What is held out is never asked in training.
    """
    (known, held_out), (sums, withheld) = split_facts(rng), split_sums(rng)
    held_out |= dict(ask_sum(rng, sum_, in_words=rng.random() < 0.5) for sum_ in withheld)
    while len(held_out) < n_heldout:
        question, answer, *_ = ask_text(rng)
        held_out[question] = answer

    positive = [sum_ for sum_ in sums if min(sum_[1:]) > 0]
    makers = [                                  # share in %, what may stand before it, how
        (30, ASKING, lambda: ask_fact(rng, known)),
        (30, LISTENING, lambda: ask_text(rng)),
        (18, ASKING, lambda: ask_sum(rng, pick(rng, positive), in_words=True)),
        (9, ASKING, lambda: count_on(rng, sums)),
        (9, [""], lambda: tell(rng)),
        (4, [""], lambda: chat(rng))]
    makers = [maker for maker in makers for _ in range(maker[0])]
    # every fact, and every sum a few times
    once = [item[1:] for items in known.values() for item in items]
    once += [ask_sum(rng, sum_, in_words=False) for sum_ in sums * 4]
    train = {}                                  # a dict: in order, none twice
    for question, answer in once:
        train[pick(rng, ASKING) + question, answer] = None
    while len(train) < n_chats:
        _, frames, make = pick(rng, makers)
        question, *turns = make()
        if question not in held_out:
            hello = [fill(rng, turn, {}) for turn in HELLO] if rng.random() < 0.05 else []
            thanks = [fill(rng, turn, {}) for turn in THANKS] if rng.random() < 0.1 else []
            train[(*hello, pick(rng, frames) + question, *turns, *thanks)] = None
    asked = {question for turns in train for question in turns[::2]}
    leaked = sorted(asked & held_out.keys())
    assert not leaked, f"held out, but asked in training: {leaked}"
    return shuffled(rng, list(train)), list(held_out.items())


# ---------------------------------------------------------------- the files

def messages(rng, turns, system_share=0):
    """The user and the assistant take turns; in a share of the dialogues the system begins."""
    found = []
    if rng.random() < system_share:
        found.append({"role": "system", "content": pick(rng, SYSTEMS)})
    for i, turn in enumerate(turns):
        found.append({"role": ("user", "assistant")[i % 2], "content": turn})
    return found


def write(name, records):
    with config.whole_file(f"{out_dir}/{name}") as f:
        f.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    texts = []
    for record in records:
        texts += [message["content"] for message in record.get("messages", [])]
        texts += [record["text"]] if "text" in record else []
    print(f"{out_dir}/{name}: {len(records):,} records, {sum(map(len, texts)):,} characters")


def main():
    rng = Random(seed)
    # first, and always whole: what is held out does not depend on the scale
    train, held_out = dialogues(rng)
    write("stories.jsonl", [{"text": text} for text in stories(rng, round(n_stories * scale))])
    train = train[:round(n_chats * scale)]
    write("chat.jsonl", [{"messages": messages(rng, turns, 0.05)} for turns in train])
    write("heldout.jsonl", [{"messages": messages(rng, turns)} for turns in held_out])


if __name__ == "__main__":
    main()
