"""The valley of the sample data, asked: is this answer to an open prompt right, and what is known of an animal?

    judge("Tell me about the red horse.", "The red horse lives ... Ask me more, my good friend!")
    -> {"facts": True, "sentences": True, "warm": True}
    lookup("horse", "home")   ->  "on the hill"          lookup("马", "home")  ->  "山上"

What is true is written in dataset/sample/make_sample.py alone.
"""

import re
from functools import cache

from dataset.sample.make_sample import (
    ANIMALS,
    COLOURS,
    DESCRIBE,
    LANGUAGES,
    WARM,
    OpenPrompt,
    facts_right,
    food,
    friend,
    home,
    named,
)

SENTENCES = 2  # that are said of the animal, beside the closing


@cache
def prompts_by_question() -> dict[str, OpenPrompt]:
    """Every way of asking for a description, of every (colour, animal), kept out or not."""
    prompts = [
        OpenPrompt(language, colour, animal, form.format(named(colour, animal).to(language)))
        for colour in range(len(COLOURS))
        for animal in range(len(ANIMALS))
        for language in LANGUAGES
        for form in DESCRIBE[language]
    ]
    return {prompt.question: prompt for prompt in prompts}


def judge(question: str, answer: str) -> dict[str, bool]:
    """facts: whole sentences that are true of this animal, none twice; sentences: at least SENTENCES different ones
    beside the closing; warm: it ends with a warm closing, and has no other.

    Raises ValueError for what is no open prompt of the valley.
    """
    prompt = prompts_by_question().get(question.strip())
    if prompt is None:
        raise ValueError(
            f"found the prompt {question[:80]!r}, expected one like {DESCRIBE['en'][0].format('red horse')!r}"
        )
    answer = answer.strip()
    closings = [closing.to(prompt.language) for closing in WARM]
    last = next((closing for closing in closings if answer.endswith(closing)), "")
    body = answer.removesuffix(last).strip()
    said = {sentence for sentence in re.split(r"(?<=[.!。！])\s*", body) if sentence}
    return {
        "facts": facts_right(prompt, answer),
        "sentences": len(said) >= SENTENCES,
        "warm": bool(last) and not any(closing in body for closing in closings),
    }


def lookup(animal: str, fact: str) -> str:
    """What is known of an animal, in the language it is named in. Its weight is its place from the lightest on.

    Raises ValueError for another animal or another fact.
    """
    places = {getattr(beast, language): (i, language) for i, beast in enumerate(ANIMALS) for language in LANGUAGES}
    if (found := places.get(animal.strip().lower())) is None:
        raise ValueError(f"found the animal {animal[:40]!r}, expected one of {', '.join(places)}")
    number, language = found
    known = {
        "home": home(number).to(language),
        "food": food(number).to(language),
        "friend": str(getattr(friend(number), language)),
        "weight": f"{number + 1} of {len(ANIMALS)}",
    }
    if fact not in known:
        raise ValueError(f"found the fact {fact[:40]!r}, expected one of {', '.join(known)}")
    return known[fact]
