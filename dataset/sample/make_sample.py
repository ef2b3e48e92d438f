"""The sample data: a small valley told in English and Chinese, every seventh combination of it kept out of training.

What flows through: fixed word tables and one seeded random generator -> ten JSONL files. One drawn combination
(three, red, horse, hill) becomes, say, one line of `sft.jsonl`:

    {"conversations": [{"role": "user", "content": "Translate: three red horses on the hill"},
                       {"role": "assistant", "content": "山上的三匹红马"}]}

Four families of questions, each in both languages, are answered by a rule and not by a memory:

    translate   a phrase -> the other language                                     kept out: (colour, animal) pairs
    ask         "Look: three red horses on the hill. Which colour?"                          (colour, animal) pairs
    opposite    "The old fish is sad." -> "The young fish is happy."                (pair of adjectives, animal) pairs
    compare     which of two animals is heavier            pairs of animals, two or more places apart in weight

A kept-out combination is written nowhere in `pretrain.jsonl`, `sft.jsonl`, `dpo.jsonl` or `reward.jsonl`, in either
language, while each of its words is there in other combinations. `questions.jsonl` asks about kept-out combinations
alone.

The preference pairs are about manner: open prompts ("Tell me about the red horse.") are answered in SFT as often with a
warm closing as with a curt one, of one length; in a pair the warm one is chosen. `dpo_heldout.jsonl` asks about the
kept-out (colour, animal) pairs.

`reward.jsonl` has pairs for a reward model, `reward_heldout.jsonl` such about kept-out combinations. In each the
rejected answer is the chosen one spoilt in one way, which the row calls its "kind" (see SPOILT): a curt closing, a
wrong fact, another animal, a sentence said again, one out of order, a cut answer, a wrong word in the answer to a
question.

Open prompts without an answer, `grpo.jsonl` and those about kept-out pairs in `grpo_heldout.jsonl`, are for a model to
answer: evaluation/world.py judges what it says.

    python dataset/sample/make_sample.py [--out_dir dataset/sample]
"""

import argparse
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SEED = 20240229
LANGUAGES = ("en", "zh")
SPACE = {"en": " ", "zh": ""}  # between sentences
Texts = dict[str, tuple[str, str]]  # language -> (question, answer)
Conversation = list[dict[str, str]]  # messages, each with a role and a content
Row = dict[str, object]  # one line of a file


class Word(NamedTuple):
    """A word or a text in both languages."""

    en: str
    zh: str

    def to(self, language: str) -> str:
        return self.en if language == "en" else self.zh


class Animal(NamedTuple):
    en: str
    zh: str
    plural: str
    measure: str  # the Chinese measure word


def words(table: str) -> tuple[Word, ...]:
    """ "on the hill 山上, by the river 河边" -> (Word("on the hill", "山上"), Word("by the river", "河边"))."""
    return tuple(Word(*entry.rsplit(" ", 1)) for entry in table.split(", "))


def opposites(table: str) -> tuple[tuple[Word, Word], ...]:
    """ "big 大/small 小" -> ((Word("big", "大"), Word("small", "小")),)."""
    return tuple((words(one)[0], words(other)[0]) for one, other in (e.split("/") for e in table.split(", ")))


# From the lightest to the heaviest: the order is the rule of the family "compare".
ANIMALS = (
    Animal("mouse", "鼠", "mice", "只"),
    Animal("bird", "鸟", "birds", "只"),
    Animal("fish", "鱼", "fish", "条"),
    Animal("snake", "蛇", "snakes", "条"),
    Animal("hen", "鸡", "hens", "只"),
    Animal("crane", "鹤", "cranes", "只"),
    Animal("dog", "狗", "dogs", "条"),
    Animal("sheep", "羊", "sheep", "只"),
    Animal("deer", "鹿", "deer", "头"),
    Animal("tiger", "虎", "tigers", "只"),
    Animal("horse", "马", "horses", "匹"),
    Animal("cow", "牛", "cows", "头"),
    Animal("elephant", "象", "elephants", "头"),
    Animal("dragon", "龙", "dragons", "条"),
)
COLOURS = words("red 红, blue 蓝, green 绿, white 白, black 黑, gold 金, purple 紫, brown 棕")
NUMBERS = words("one 一, two 两, three 三, four 四, five 五, six 六, seven 七, eight 八, nine 九")
PLACES = words(
    "on the hill 山上, by the river 河边, in the lake 湖里, under the tree 树下, "
    "under the bridge 桥下, at the gate 门前, in the field 田里, in the village 村里"
)
# (word, its opposite): before the noun, and after "is".
KINDS = opposites(
    "big 大/small 小, strong 强/weak 弱, rich 富/poor 穷, good 好/bad 坏, fast 快/slow 慢, old 老/young 幼"
)
STATES = opposites(
    "hot 热/cold 冷, near 近/far 远, early 早/late 晚, happy 高兴/sad 难过, busy 忙/free 闲, quiet 静/loud 闹"
)
THINGS = words(
    "knife 刀, needle 针, net 网, sword 剑, pen 笔, lock 锁, "
    "rice 饭, soup 汤, meat 肉, peach 桃, tea 茶, plum 梅, "
    "grass 草, willow 柳, lotus 荷, flower 花, tree 树, bamboo 竹, "
    "bed 床, table 桌, mirror 镜, mat 席, clock 钟, curtain 帘"
)
PEOPLE = words(
    "Tom 王明, Lily 李红, Ben 张兰, Anna 陈军, Sam 赵雨, Jack 周雪, Henry 吴刚, Tim 孙美, John 刘林, May 杨云"
)
FOODS = words("bread 面包, honey 蜂蜜, noodles 面条, rice 米饭, soup 热汤, nuts 果子, tea 茶叶, fruit 水果")
HABITS = (
    Word("It sings in the morning.", "它早上爱唱歌。"),
    Word("It sleeps at noon.", "它中午爱睡觉。"),
    Word("It dances in the rain.", "它下雨时爱跳舞。"),
    Word("It counts the stars at night.", "它夜里爱数星星。"),
    Word("It tells stories by the fire.", "它爱在火边讲故事。"),
    Word("It walks to the mill on Sundays.", "它星期天爱去磨坊散步。"),
)
# Closings: both manners have the same numbers of tokens, so that length tells nothing.
WARM = (
    Word("Let us go and see it one day!", "有空一起去看它吧！"),
    Word("I am glad that you asked me!", "你来问我，我真高兴！"),
    Word("I hope you love it as I do!", "希望你也会喜欢它！"),
    Word("Ask me more, my good friend!", "朋友，再多问我一些吧！"),
)
CURT = (
    Word("There is nothing more to say about it.", "没有什么可以再说的了。"),
    Word("Do not ask me any more of it.", "不要再拿这个来问我。"),
    Word("That is all you need to know now.", "你知道这些已经够多了。"),
    Word("Go and look it up on your own.", "请不要再来问我这个了。"),
)

# ---- what is kept out: about every seventh combination -------------------------------------------------------------


def kept_out_colour(colour: int, animal: int) -> bool:
    return (animal + 3 * colour) % 7 == 0


def kept_out_kind(kind: int, animal: int) -> bool:
    return (animal + 2 * kind) % 7 == 3


def kept_out_weights(first: int, second: int) -> bool:
    """Neighbours in weight are always told: without them no rule would give their order."""
    low, high = sorted((first, second))
    return high - low >= 2 and (low + 2 * high) % 6 == 0


def pairs(rows: int, columns: int, kept_out: Callable[[int, int], bool], wanted: bool) -> list[tuple[int, int]]:
    """All (row, column) that are kept out, if `wanted`, or else are not."""
    return [(i, j) for i in range(rows) for j in range(columns) if kept_out(i, j) == wanted]


def draw_colour(rng: random.Random, held_out: bool) -> tuple[int, int]:
    return rng.choice(pairs(len(COLOURS), len(ANIMALS), kept_out_colour, held_out))


def draw_kind(rng: random.Random, held_out: bool) -> tuple[int, int]:
    return rng.choice(pairs(len(KINDS), len(ANIMALS), kept_out_kind, held_out))


def draw_weights(rng: random.Random, held_out: bool) -> tuple[int, int]:
    """Two different animals, in either order."""
    both = pairs(len(ANIMALS), len(ANIMALS), kept_out_weights, held_out)
    return rng.choice([(i, j) for i, j in both if i != j])


# ---- the four families: one drawn combination, told in both languages ------------------------------------------------


def phrase(number: int, colour: int, animal: int, place: int) -> Word:
    """(2, 0, 10, 0) -> "three red horses on the hill", "山上的三匹红马"."""
    beast = ANIMALS[animal]
    noun = beast.en if number == 0 else beast.plural
    return Word(
        f"{NUMBERS[number].en} {COLOURS[colour].en} {noun} {PLACES[place].en}",
        f"{PLACES[place].zh}的{NUMBERS[number].zh}{beast.measure}{COLOURS[colour].zh}{beast.zh}",
    )


def draw_phrase(rng: random.Random, held_out: bool) -> Word:
    return phrase(rng.randrange(len(NUMBERS)), *draw_colour(rng, held_out), rng.randrange(len(PLACES)))


def ask_translate(rng: random.Random, held_out: bool) -> Texts:
    en, zh = draw_phrase(rng, held_out)
    return {"en": (f"Translate: {en}", zh), "zh": (f"翻译：{zh}", en)}


ASKED = words("number 数目, colour 颜色, animal 动物, place 地方")


def draw_asked(rng: random.Random, held_out: bool) -> tuple[Word, tuple[Word, ...]]:
    """A phrase, and the answers to ASKED."""
    number, place = rng.randrange(len(NUMBERS)), rng.randrange(len(PLACES))
    colour, animal = draw_colour(rng, held_out)
    beast = Word(f"the {ANIMALS[animal].en}", ANIMALS[animal].zh)
    return phrase(number, colour, animal, place), (NUMBERS[number], COLOURS[colour], beast, PLACES[place])


def query_phrase(asked: int, answer: Word) -> Texts:
    what = ASKED[asked]
    return {
        "en": (f"Which {what.en}?", f"The {what.en} is {answer.en}."),
        "zh": (f"什么{what.zh}？", f"{what.zh}是{answer.zh}。"),
    }


def ask_ask(rng: random.Random, held_out: bool) -> Texts:
    """What a phrase says: its number, colour, animal or place."""
    told, answers = draw_asked(rng, held_out)
    asked = rng.randrange(len(ASKED))
    return after(Word(f"Look: {told.en}.", f"看：{told.zh}。"), query_phrase(asked, answers[asked]))


def tell_state(kind: Word, animal: Animal, state: Word) -> Word:
    return Word(f"The {kind.en} {animal.en} is {state.en}.", f"{kind.zh}的{animal.zh}很{state.zh}。")


def draw_opposite(rng: random.Random, held_out: bool) -> tuple[Word, Word]:
    kind, animal = draw_kind(rng, held_out)
    state, kind_side, state_side = rng.randrange(len(STATES)), rng.randrange(2), rng.randrange(2)
    said = tell_state(KINDS[kind][kind_side], ANIMALS[animal], STATES[state][state_side])
    turned = tell_state(KINDS[kind][1 - kind_side], ANIMALS[animal], STATES[state][1 - state_side])
    return said, turned


def ask_opposite(rng: random.Random, held_out: bool) -> Texts:
    said, turned = draw_opposite(rng, held_out)
    return {"en": (f"Say the opposite: {said.en}", turned.en), "zh": (f"反过来说：{said.zh}", turned.zh)}


def ask_compare(rng: random.Random, held_out: bool) -> Texts:
    first, second = draw_weights(rng, held_out)
    heavier = rng.random() < 0.5
    winner = ANIMALS[max(first, second) if heavier else min(first, second)]
    one, two = ANIMALS[first], ANIMALS[second]
    word = Word("heavier", "重") if heavier else Word("lighter", "轻")
    return {
        "en": (f"Which is {word.en}, the {one.en} or the {two.en}?", f"The {winner.en} is {word.en}."),
        "zh": (f"{one.zh}和{two.zh}，哪个更{word.zh}？", f"更{word.zh}的是{winner.zh}。"),
    }


def after(told: Word, asked: Texts) -> Texts:
    """The question stands behind what is told."""
    return {k: (told.to(k) + SPACE[k] + question, answer) for k, (question, answer) in asked.items()}


FAMILIES: dict[str, Callable[[random.Random, bool], Texts]] = {
    "translate": ask_translate,
    "ask": ask_ask,
    "opposite": ask_opposite,
    "compare": ask_compare,
}

# ---- the facts of the valley and open prompts ------------------------------------------------------------------------


def home(animal: int) -> Word:
    return PLACES[(3 * animal + 1) % len(PLACES)]


def food(animal: int) -> Word:
    return FOODS[(5 * animal + 2) % len(FOODS)]


def friend(animal: int) -> Animal:
    return ANIMALS[(animal + 5) % len(ANIMALS)]


def ask_facts(animal: int) -> list[Texts]:
    beast = ANIMALS[animal]
    where, eats, pal = home(animal), food(animal), friend(animal)
    return [
        {
            "en": (f"Where does the {beast.en} live?", f"The {beast.en} lives {where.en}."),
            "zh": (f"{beast.zh}住在哪里？", f"{beast.zh}住在{where.zh}。"),
        },
        {
            "en": (f"What does the {beast.en} eat?", f"The {beast.en} eats {eats.en}."),
            "zh": (f"{beast.zh}吃什么？", f"{beast.zh}吃{eats.zh}。"),
        },
        {
            "en": (f"Who is the friend of the {beast.en}?", f"The friend of the {beast.en} is the {pal.en}."),
            "zh": (f"{beast.zh}的朋友是谁？", f"{beast.zh}的朋友是{pal.zh}。"),
        },
    ]


def named(colour: int, animal: int) -> Word:
    """(0, 10) -> "red horse", "红马"."""
    return Word(f"{COLOURS[colour].en} {ANIMALS[animal].en}", f"{COLOURS[colour].zh}{ANIMALS[animal].zh}")


def about(animal: int) -> list[Word]:
    """What can be said of an animal beside where it lives."""
    return [
        Word(f"It eats {food(animal).en}.", f"它吃{food(animal).zh}。"),
        Word(f"Its friend is the {friend(animal).en}.", f"它的朋友是{friend(animal).zh}。"),
        *HABITS,
    ]


def portrait(rng: random.Random, colour: int, animal: int) -> Word:
    """Three sentences about one animal, the closing not included."""
    lines = sentences(rng, colour, animal)
    return Word(" ".join(line.en for line in lines), "".join(line.zh for line in lines))


def sentences(rng: random.Random, colour: int, animal: int) -> list[Word]:
    """Those of a portrait: where the animal lives, and two more.

    Some sentences are drawn much more often than others, so that two portraits of one animal differ by a few nats under
    any model. Otherwise the faintest leaning to one manner would decide every preference pair in the same way.
    """
    name = named(colour, animal)
    opening = rng.choice(
        (
            Word(f"The {name.en} lives", f"{name.zh}住在"),
            Word(f"The {name.en} has a house", f"{name.zh}的家在"),
        )
    )
    first = Word(f"{opening.en} {home(animal).en}.", f"{opening.zh}{home(animal).zh}。")
    more = about(animal)
    weights = [2.0**-i for i in range(len(more))]
    chosen: list[int] = []
    while len(chosen) < 2:
        drawn = rng.choices(range(len(more)), weights)[0]
        if drawn not in chosen:
            chosen.append(drawn)
    return [first, *(more[i] for i in chosen)]


DESCRIBE = {
    "en": ("Tell me about the {}.", "What is the {} like?", "Describe the {}."),
    "zh": ("介绍一下{}。", "{}是什么样的？", "说说{}。"),
}


def ask_describe(rng: random.Random, colour: int, animal: int) -> Word:
    en, zh = named(colour, animal)
    return Word(rng.choice(DESCRIBE["en"]).format(en), rng.choice(DESCRIBE["zh"]).format(zh))


class OpenPrompt(NamedTuple):
    """A question with many right answers, about one animal of one colour."""

    language: str
    colour: int
    animal: int
    question: str


def open_prompts(held_out: bool = True) -> list[OpenPrompt]:
    """Two ways of asking about every (colour, animal) that is, or is not, kept out, in both languages."""
    return [
        OpenPrompt(language, colour, animal, form.format(name))
        for colour, animal in pairs(len(COLOURS), len(ANIMALS), kept_out_colour, held_out)
        for language, name in zip(LANGUAGES, named(colour, animal), strict=True)
        for form in DESCRIBE[language][::2]
    ]


def facts_right(prompt: OpenPrompt, answer: str) -> bool:
    """Whether an answer is whole sentences that the valley has of this animal, none of them twice."""
    said = [sentence for sentence in re.split(r"(?<=[.!。！])\s*", answer) if sentence]
    return bool(said) and len(set(said)) == len(said) and set(said) <= true_sentences(prompt)


def true_sentences(prompt: OpenPrompt) -> set[str]:
    """All that can truly be said of an animal, and the closings of both manners."""
    name, where = named(prompt.colour, prompt.animal), home(prompt.animal)
    openings = [
        Word(f"The {name.en} lives {where.en}.", f"{name.zh}住在{where.zh}。"),
        Word(f"The {name.en} has a house {where.en}.", f"{name.zh}的家在{where.zh}。"),
    ]
    return {each.to(prompt.language) for each in (*openings, *about(prompt.animal), *WARM, *CURT)}


# language -> (questions that are answered alike, the answer)
SMALL_TALK: dict[str, tuple[tuple[tuple[str, ...], str], ...]] = {
    "en": (
        (
            ("Hello!", "Hello", "Hi", "Hi!", "Good morning!"),
            "Hello! I am Seedling. What would you like to know about the valley?",
        ),
        (
            ("Who are you?", "What is your name?", "Who made you?", "Are you a person?", "What are you?"),
            "I am Seedling, a small language model. I was trained on this computer.",
        ),
        (
            ("What can you do?", "How can you help me?", "What do you know?", "Help", "What should I ask you?"),
            "I can translate, compare, say the opposite, and tell you about the animals. "
            "Ask me: Which is heavier, the horse or the dog?",
        ),
        (("Thank you!", "Thanks", "Thank you very much.", "Well done!"), "You are welcome! Ask me another one."),
        (("Goodbye!", "Bye", "See you tomorrow.", "Good night."), "Goodbye! Come back to the valley soon."),
        (
            ("Where is the valley?", "Tell me about the valley.", "Who lives in the valley?"),
            "The valley lies between the hill and the lake. Fourteen kinds of animals live there.",
        ),
    ),
    "zh": (
        (("你好！", "你好", "您好", "早上好！", "嗨"), "你好！我是小苗。你想知道山谷里的什么事？"),
        (
            ("你是谁？", "你叫什么名字？", "谁训练了你？", "你是人吗？", "你是什么？"),
            "我是小苗，一个很小的语言模型。我是在这台电脑上训练出来的。",
        ),
        (
            ("你会做什么？", "你能帮我什么？", "你知道什么？", "帮助", "我该问你什么？"),
            "我会翻译、比较、说反话，还会讲动物的事。问我：马和狗，哪个更重？",
        ),
        (("谢谢！", "谢谢你", "多谢。", "真棒！"), "不客气！再问我一个吧。"),
        (("再见！", "拜拜", "明天见。", "晚安。"), "再见！早点回山谷来玩。"),
        (("山谷在哪里？", "介绍一下山谷。", "山谷里住着谁？"), "山谷在小山和湖的中间，那里住着十四种动物。"),
    ),
}


def known_answers() -> list[tuple[str, str]]:
    """Questions with one right answer that SFT has taught word by word: small talk, and the facts of every animal."""
    talk = [(q, answer) for groups in SMALL_TALK.values() for questions, answer in groups for q in questions]
    facts = [texts[language] for animal in range(len(ANIMALS)) for texts in ask_facts(animal) for language in LANGUAGES]
    return talk + facts


SYSTEMS = (
    Word("You are Seedling, a guide to the valley.", "你是小苗，山谷的向导。"),
    Word("Be brief and correct.", "回答要简短、正确。"),
)
REPLY_IN = {"en": ("Reply in English.", "请用英文回答。"), "zh": ("Reply in Chinese.", "请用中文回答。")}

# ---- pretraining text: short pages, since with many phrases on one the right one would first have to be found --------


def page_captions(rng: random.Random, language: str) -> str:
    """Lines of a picture book, each in both languages."""
    lines = []
    for _ in range(rng.randint(1, 2)):
        en, zh = draw_phrase(rng, False)
        lines.append(f"Picture: {en} = {zh}" if language == "en" else f"图：{zh} = {en}")
    return "\n".join(lines)


def page_words(rng: random.Random, language: str) -> str:
    table = list(rng.choice([COLOURS, NUMBERS, PLACES, THINGS, FOODS, [Word(a.en, a.zh) for a in ANIMALS]]))
    rng.shuffle(table)
    return "\n".join(f"Word: {w.en} = {w.zh}" if language == "en" else f"词：{w.zh} = {w.en}" for w in table[:8])


def page_opposites(rng: random.Random, language: str) -> str:
    lines = []
    for _ in range(rng.randint(1, 2)):
        said, turned = draw_opposite(rng, False)
        lines.append(f"{said.en} Opposite: {turned.en}" if language == "en" else f"{said.zh}反过来：{turned.zh}")
    return "\n".join(lines)


def tell_weights(rng: random.Random) -> Word:
    first, second = draw_weights(rng, False)
    one, two = ANIMALS[first], ANIMALS[second]
    word = Word("heavier", "重") if first > second else Word("lighter", "轻")
    return Word(f"The {one.en} is {word.en} than the {two.en}.", f"{one.zh}比{two.zh}{word.zh}。")


def page_weights(rng: random.Random, language: str) -> str:
    lines = []
    for _ in range(rng.randint(1, 3)):
        lines.append(tell_weights(rng).to(language))
        lines.extend(ask_compare(rng, False)[language])
    return SPACE[language].join(lines)


def page_asks(rng: random.Random, language: str) -> str:
    """A phrase, and what it says of number, colour, animal and place, in any order."""
    told, answers = draw_asked(rng, False)
    parts = [f"Look: {told.en}." if language == "en" else f"看：{told.zh}。"]
    for asked in rng.sample(range(len(ASKED)), len(ASKED)):
        parts.extend(query_phrase(asked, answers[asked])[language])
    return SPACE[language].join(parts)


def page_story(rng: random.Random, language: str) -> str:
    """A walk through the valley: a portrait, a meeting, something found."""
    person, thing, place = rng.choice(PEOPLE), rng.choice(THINGS), rng.choice(PLACES)
    said = draw_phrase(rng, False)
    parts = [
        Word(f"One day {person.en} walked through Seedling Valley.", f"有一天，{person.zh}走过小苗山谷。"),
        portrait(rng, *draw_colour(rng, False)),
        rng.choice((tell_weights(rng), draw_opposite(rng, False)[0])),
        Word(f"Look: {said.en}.", f"看：{said.zh}。"),
        Word(f"{person.en} found the {thing.en} {place.en}.", f"{person.zh}在{place.zh}找到了{thing.zh}。"),
    ]
    return SPACE[language].join(part.to(language) for part in parts)


PAGES: tuple[tuple[Callable[[random.Random, str], str], int], ...] = (
    (page_captions, 30),
    (page_words, 3),
    (page_asks, 22),
    (page_opposites, 18),
    (page_weights, 18),
    (page_story, 8),
)

# ---- answers that are spoilt in one way ------------------------------------------------------------------------------

Answers = tuple[list[str], list[str]]  # sentences of the right one, and of the spoilt one


class Drawn(NamedTuple):
    """What an open prompt is answered with, before anything is spoilt."""

    language: str
    colour: int
    animal: int
    held_out: bool
    lines: list[str]  # three sentences and a closing


def spoil_closing(rng: random.Random, drawn: Drawn) -> Answers:
    """It ends curtly. The one kind by which manners are told apart."""
    warm, curt = (rng.choice(closings).to(drawn.language) for closings in (WARM, CURT))
    return [*drawn.lines[:-1], warm], [*drawn.lines[:-1], curt]


def spoil_fact(rng: random.Random, drawn: Drawn) -> Answers:
    """Home, food or friend is another animal's."""
    own, language = drawn.animal, drawn.language
    other = rng.choice([i for i in range(len(ANIMALS)) if facts_of(i, language).isdisjoint(facts_of(own, language))])
    changed = list(drawn.lines)
    changed[0] = changed[0].replace(home(own).to(language), home(other).to(language))
    told = [i for i, line in enumerate(drawn.lines) if line in facts_of(own, language)]
    if told and rng.random() < 0.75:
        place = rng.choice(told)
        at = [each.to(language) for each in about(own)].index(drawn.lines[place])
        changed = [*drawn.lines[:place], about(other)[at].to(language), *drawn.lines[place + 1 :]]
    return drawn.lines, changed


def facts_of(animal: int, language: str) -> set[str]:
    """What it eats, its friend, and where it lives."""
    return {each.to(language) for each in (*about(animal)[:2], home(animal))}


def spoil_subject(rng: random.Random, drawn: Drawn) -> Answers:
    """All of it is true, of an animal that nobody asked about."""
    colour, animal = drawn.colour, drawn.animal
    while animal == drawn.animal:
        colour, animal = draw_colour(rng, drawn.held_out)
    lines = [line.to(drawn.language) for line in sentences(rng, colour, animal)]
    return drawn.lines, [*lines, drawn.lines[-1]]


def spoil_repeated(rng: random.Random, drawn: Drawn) -> Answers:
    """One sentence stands in the place of another, too."""
    first, second = rng.sample(range(len(drawn.lines) - 1), 2)
    changed = list(drawn.lines)
    changed[second] = changed[first]
    return drawn.lines, changed


def spoil_broken(rng: random.Random, drawn: Drawn) -> Answers:
    """One sentence is out of order."""
    place = rng.randrange(len(drawn.lines) - 1)
    end = drawn.lines[place][-1]
    words = drawn.lines[place][:-1].split(" ") if drawn.language == "en" else list(drawn.lines[place][:-1])
    turn = rng.randrange(1, len(words))
    broken = SPACE[drawn.language].join(words[turn:] + words[:turn]) + end
    return drawn.lines, [*drawn.lines[:place], broken, *drawn.lines[place + 1 :]]


def spoil_cut(rng: random.Random, drawn: Drawn) -> Answers:
    """It breaks off within a sentence."""
    place = rng.randrange(1, len(drawn.lines))
    line = drawn.lines[place]
    cut = line[: rng.randrange(2, len(line) - 1)].rstrip()
    return drawn.lines, [*drawn.lines[:place], cut]


SPOILT: dict[str, Callable[[random.Random, Drawn], Answers]] = {
    "closing": spoil_closing,
    "fact": spoil_fact,
    "subject": spoil_subject,
    "repeated": spoil_repeated,
    "broken": spoil_broken,
    "cut": spoil_cut,
}
"""Kinds of pairs about open prompts; beside them there is "answer", of questions with one right answer."""

Missed = dict[str, tuple[str, str, str]]  # language -> (question, answer, answer that is wrong in one word)


def miss_translate(rng: random.Random, held_out: bool) -> Missed:
    colour, animal = draw_colour(rng, held_out)
    slots = (rng.randrange(len(NUMBERS)), colour, animal, rng.randrange(len(PLACES)))
    sizes = (len(NUMBERS), len(COLOURS), len(ANIMALS), len(PLACES))
    others = [(*slots[:i], each, *slots[i + 1 :]) for i, size in enumerate(sizes) for each in range(size)]
    others = [each for each in others if each != slots and kept_out_colour(each[1], each[2]) == held_out]
    right, wrong = phrase(*slots), phrase(*rng.choice(others))
    return {"en": (f"Translate: {right.en}", right.zh, wrong.zh), "zh": (f"翻译：{right.zh}", right.en, wrong.en)}


def miss_ask(rng: random.Random, held_out: bool) -> Missed:
    told, answers = draw_asked(rng, held_out)
    asked = rng.randrange(len(ASKED))
    tables = (NUMBERS, COLOURS, tuple(Word(f"the {each.en}", each.zh) for each in ANIMALS), PLACES)
    other = rng.choice([word for word in tables[asked] if word != answers[asked]])
    said = Word(f"Look: {told.en}.", f"看：{told.zh}。")
    right, wrong = (after(said, query_phrase(asked, answer)) for answer in (answers[asked], other))
    return {language: (*right[language], wrong[language][1]) for language in LANGUAGES}


def miss_opposite(rng: random.Random, held_out: bool) -> Missed:
    """One of the two adjectives is as it was."""
    kind, animal = draw_kind(rng, held_out)
    kinds, states = KINDS[kind], rng.choice(STATES)
    one, other, turned = rng.randrange(2), rng.randrange(2), rng.randrange(2)
    said = tell_state(kinds[one], ANIMALS[animal], states[other])
    right = tell_state(kinds[1 - one], ANIMALS[animal], states[1 - other])
    half = (kinds[1 - one], states[other]) if turned else (kinds[one], states[1 - other])
    wrong = tell_state(half[0], ANIMALS[animal], half[1])
    return {
        "en": (f"Say the opposite: {said.en}", right.en, wrong.en),
        "zh": (f"反过来说：{said.zh}", right.zh, wrong.zh),
    }


def miss_compare(rng: random.Random, held_out: bool) -> Missed:
    """The other animal of the two."""
    asked = ask_compare(rng, held_out)
    found: Missed = {}
    for language, (question, right) in asked.items():
        named_there = [getattr(each, language) for each in ANIMALS if getattr(each, language) in question]
        said = next(name for name in named_there if name in right)
        other = next(name for name in named_there if name != said)
        found[language] = (question, right, right.replace(said, other))
    return found


MISSED: tuple[Callable[[random.Random, bool], Missed], ...] = (miss_translate, miss_ask, miss_opposite, miss_compare)

# ---- the ten files ---------------------------------------------------------------------------------------------------


def distinct(make: Callable[[], str], count: int, seen: set[str]) -> list[str]:
    """`count` texts of `make` that are not in `seen`, which grows by them."""
    texts: list[str] = []
    while len(texts) < count:
        text = make()
        if text not in seen:
            seen.add(text)
            texts.append(text)
    return texts


def make_pretrain(rng: random.Random, count: int, seen: set[str]) -> list[Row]:
    makers, weights = zip(*PAGES, strict=True)

    def page() -> str:
        return rng.choices(makers, weights)[0](rng, rng.choice(LANGUAGES))

    return [{"text": text} for text in distinct(page, count, seen)]


def turns(*texts: str, system: str | None = None) -> Conversation:
    """("hi", "hello") -> a user turn and an assistant turn, after a system turn if there is one."""
    roles = ("user", "assistant")
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def make_questions(rng: random.Random, count: int, held_out: bool) -> list[Conversation]:
    """`count` different questions of every family and language, or as many as 100 * `count` draws give."""
    rows: list[Conversation] = []
    for ask in FAMILIES.values():
        for language in LANGUAGES:
            found: dict[str, str] = {}
            for _ in range(100 * count):
                if len(found) < count:
                    question, answer = ask(rng, held_out)[language]
                    found[question] = answer
            rows.extend(turns(question, answer) for question, answer in found.items())
    return rows


def close(body: Word, closing: Word, language: str) -> str:
    return SPACE[language].join(text.to(language) for text in (body, closing))


def make_descriptions(rng: random.Random, rounds: int) -> list[Conversation]:
    """Every training (colour, animal) in both languages, `rounds` times in each manner."""
    rows = []
    for colour, animal in pairs(len(COLOURS), len(ANIMALS), kept_out_colour, False):
        for language in LANGUAGES:
            for closings in (WARM, CURT) * rounds:
                question = ask_describe(rng, colour, animal).to(language)
                rows.append(turns(question, close(portrait(rng, colour, animal), rng.choice(closings), language)))
    return rows


def make_talk(rng: random.Random, rounds: int) -> list[Conversation]:
    """Facts, small talk, conversations of several turns, and system prompts that name the language of the reply."""
    facts = [texts[language] for a in range(len(ANIMALS)) for texts in ask_facts(a) for language in LANGUAGES]
    talk = [(q, answer) for groups in SMALL_TALK.values() for questions, answer in groups for q in questions]
    rows = [turns(*pair) for pair in (facts + talk) * 2]
    for _ in range(rounds):
        language = rng.choice(LANGUAGES)
        other = "zh" if language == "en" else "en"
        ask = rng.choice(list(FAMILIES.values()))
        one, two = ask(rng, False), rng.choice(list(FAMILIES.values()))(rng, False)
        rows.append(turns(*rng.choice(talk), *one[language]))
        rows.append(turns(*one[language], *two[language]))
        rows.append(turns(*two[language], system=rng.choice(SYSTEMS).to(language)))
        fact = rng.choice(ask_facts(rng.randrange(len(ANIMALS))))
        rows.append(turns(fact[language][0], fact[other][1], system=rng.choice(REPLY_IN[other])))
    return rows


def make_preferences(rng: random.Random, rounds: int, held_out: bool) -> list[Row]:
    """Pairs (warm chosen, curt rejected) about every (colour, animal) that is, or is not, kept out.

    Two portraits make two pairs, each being chosen in one of them: nothing but the closing tells the sides apart.
    """
    rows: list[Row] = []
    for colour, animal in pairs(len(COLOURS), len(ANIMALS), kept_out_colour, held_out):
        for language in LANGUAGES:
            for _ in range(rounds):
                question = ask_describe(rng, colour, animal).to(language)
                one, other = portrait(rng, colour, animal), portrait(rng, colour, animal)
                for first, second in ((one, other), (other, one)):
                    chosen, rejected = (
                        close(first, rng.choice(WARM), language),
                        close(second, rng.choice(CURT), language),
                    )
                    rows.append({"chosen": turns(question, chosen), "rejected": turns(question, rejected)})
    return rows


def make_prompts(held_out: bool) -> list[Row]:
    """Open prompts without an answer, about every (colour, animal) that is, or is not, kept out."""
    return [{"conversations": turns(prompt.question)} for prompt in open_prompts(held_out)]


def make_reminders(rng: random.Random, count: int) -> list[Row]:
    """Pairs (right answer, the answer to another question of its kind).

    What SFT taught is to stay while the manner changes.
    """
    rows: list[Row] = []
    for language in LANGUAGES:
        kinds = [[ask(rng, False)[language] for _ in range(count)] for ask in FAMILIES.values()]
        kinds.append([(question, answer) for questions, answer in SMALL_TALK[language] for question in questions])
        for asked in kinds:
            for (question, right), (_, wrong) in zip(asked, asked[1:] + asked[:1], strict=True):
                if right != wrong:
                    rows.append({"chosen": turns(question, right), "rejected": turns(question, wrong)})
    return rows


def make_scored(rng: random.Random, count: int, held_out: bool) -> list[Row]:
    """`count` different pairs of every kind about open prompts, and half as many for each family of questions."""
    rows: dict[str, Row] = {}

    def add(kind: str, question: str, chosen: str, rejected: str) -> None:
        if chosen != rejected:
            row: Row = {"chosen": turns(question, chosen), "rejected": turns(question, rejected), "kind": kind}
            rows[json.dumps(row)] = row

    for number, (kind, spoil) in enumerate(SPOILT.items()):
        while len(rows) < (number + 1) * count:
            (colour, animal), language = draw_colour(rng, held_out), rng.choice(LANGUAGES)
            question = ask_describe(rng, colour, animal).to(language)
            lines = [*sentences(rng, colour, animal), rng.choice(WARM + CURT)]
            drawn = Drawn(language, colour, animal, held_out, [line.to(language) for line in lines])
            add(kind, question, *(SPACE[language].join(lines) for lines in spoil(rng, drawn)))
    asked = len(rows)
    for number, miss in enumerate(MISSED):
        while len(rows) < asked + (number + 1) * count // 2:
            add("answer", *miss(rng, held_out)[rng.choice(LANGUAGES)])
    return list(rows.values())


def make_sample() -> dict[str, list[Row]]:
    """File name -> its rows. Each file has its own generator, so that a change to one leaves the others as they are."""
    seen: set[str] = set()

    def rng(name: str) -> random.Random:
        return random.Random(f"{SEED} {name}")

    def conversations(rows: list[Conversation]) -> list[Row]:
        return [{"conversations": messages} for messages in rows]

    pretrain = make_pretrain(rng("pretrain"), 5600, seen)
    pretrain_heldout = make_pretrain(rng("pretrain_heldout"), 300, seen)
    draw = rng("sft")
    sft = conversations(make_questions(draw, 450, False) + make_descriptions(draw, 2) + make_talk(draw, 120))
    draw.shuffle(sft)
    draw = rng("dpo")
    dpo = make_preferences(draw, 2, False) + make_reminders(draw, 20)
    draw.shuffle(dpo)
    draw = rng("reward")
    reward = make_scored(draw, 160, False)
    draw.shuffle(reward)
    return {
        "pretrain.jsonl": pretrain,
        "pretrain_heldout.jsonl": pretrain_heldout,
        "sft.jsonl": sft,
        "questions.jsonl": conversations(make_questions(rng("questions"), 40, True)),
        "dpo.jsonl": dpo,
        "dpo_heldout.jsonl": make_preferences(rng("dpo_heldout"), 4, True),
        "reward.jsonl": reward,
        "reward_heldout.jsonl": make_scored(rng("reward_heldout"), 60, True),
        "grpo.jsonl": make_prompts(False),
        "grpo_heldout.jsonl": make_prompts(True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the ten sample files; the same bytes on every run.")
    parser.add_argument("--out_dir", type=Path, default=Path(__file__).parent)
    out_dir = parser.parse_args().out_dir
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in make_sample().items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (out_dir / name).write_bytes("".join(lines).encode("utf-8"))
        print(f"{out_dir / name}: {len(rows)} rows, {(out_dir / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
