"""Wordings of the supervised tasks of jaxprompt-mini: templates, verbalizers and text styles.

Called by `tasks.py`. A template holds named slots in braces; `fill` chooses one and fills it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

_TREEBANK = (
    (re.compile(r"\(|\["), " -lrb- "),
    (re.compile(r"\)|\]"), " -rrb- "),
    (re.compile(r"(\.\.\.|--|[,;:!?])"), r" \1 "),
    (re.compile(r"\b(\w+)n't\b"), r"\1 n't"),
    (re.compile(r"(\w)('s|'re|'ve|'ll|'d|'m)\b"), r"\1 \2"),
    (re.compile(r"\"([^\"]*)\""), r" `` \1 '' "),
    (re.compile(r"([^.\s])\.(?=\s|$)"), r"\1 ."),
    (re.compile(r"\s+"), " "),
)


def treebank(text: str) -> str:
    """Lower case with spaces round the punctuation: `a gorgeous , witty film .`"""
    text = text.lower().replace("’", "'")
    for pattern, replacement in _TREEBANK:
        text = pattern.sub(replacement, text)
    return text.strip()


def fill(rng: random.Random, templates: Sequence[str], **slots: str) -> str:
    """Fills one of the templates; half of them are used without their capital letters."""
    template = rng.choice(templates)
    if rng.random() < 0.5:
        template = template.lower()
    for name, value in slots.items():
        template = template.replace("{" + name + "}", value)
    return template.strip()


def options(rng: random.Random, words: Sequence[str]) -> str:
    """The words in random order as one list, in one of several spellings."""
    words = rng.sample(list(words), len(words))
    style = rng.randrange(4)
    if style == 0:
        return ", ".join(words)
    if style == 1:
        return " / ".join(words)
    if style == 2:
        return ", ".join(words[:-1]) + " or " + words[-1]
    return " ".join(f"- {word}" for word in words)


@dataclass(frozen=True)
class Verbalizer:
    """Words for an unfavourable and a favourable text, with the wordings that ask for them."""

    words: tuple[str, str]
    weight: float
    templates: tuple[str, ...]


# {x} is the text, {n} what it is called, {o} the list of answers.
NOUNS = "review text sentence comment opinion snippet passage statement critique remark".split()

_GENERIC = (
    "{x} Options: {o}.",
    "Classify the {n} as {o}: {x}",
    "{x} Is this {n} {o}?",
    "Is the following {n} {o}? {x}",
    "{n}: {x} choices: {o} answer:",
    "Choose from {o}. {n}: {x} label:",
    "Pick one of {o} for this {n}. {x}",
    "Given the options {o}, label this: {x}",
)

SENTIMENT = (
    Verbalizer(
        ("negative", "positive"),
        0.52,
        (
            *_GENERIC,
            "sentiment: {x}",
            "{x} sentiment:",
            "{x} The sentiment is",
            "{x} Overall, the sentiment of this {n} was",
            "What is the sentiment of this {n}? {x}",
            "{x} What is the sentiment expressed in this {n}?",
            "Classify the sentiment. {x}",
            "Classify the sentiment of the {n}: {x}",
            "Decide whether the {n} is positive or negative. {n}: {x}",
            "Read the {n} and say how its author feels about the film. {x} feeling:",
            "The following {n} expresses what sentiment? {x}",
            "How does the writer feel? {x}",
            "{n}: {x} sentiment:",
            "{n}: {x} Positive or negative?",
            "Tell me the tone of this {n}. {x}",
            "Movie review: {x} verdict:",
            "{x} Did the critic write a positive or a negative {n}?",
            "Sentiment analysis. input: {x} output:",
            "polarity: {x}",
            "Label the {n} by its attitude towards the movie: {x}",
            "task: sentiment classification. {x}",
            'Here is a {n} about a film. "{x}" The attitude of the {n} is',
            'Is the opinion below positive or negative? "{x}"',
            "{x}",
        ),
    ),
    Verbalizer(
        ("bad", "good"),
        0.1,
        (
            *_GENERIC,
            "{x} The movie was",
            "{x} In short, the film is",
            "{x} It was",
            "{x} Good or bad?",
            "Does the writer think the film is good or bad? {x}",
            "rating: {x}",
            "According to this {n}, how is the film? {x}",
            "good or bad: {x}",
        ),
    ),
    Verbalizer(
        ("terrible", "great"),
        0.09,
        (
            *_GENERIC,
            "{x} It was",
            "{x} All in all, it was",
            "{x} The film is great or terrible?",
            "great or terrible: {x}",
            "A film was described like this: {x} So the film was",
            "Would the author call it great or terrible? {x}",
        ),
    ),
    Verbalizer(
        ("no", "yes"),
        0.1,
        (
            "Is this {n} positive? {x}",
            "{x} Is this {n} positive?",
            "{x} Did the author like the movie?",
            "Did the writer enjoy the film? {x}",
            "{x} Question: is the sentiment positive? Answer:",
            "Does the {n} speak well of the film? {x}",
            "{x} Would this person watch it again?",
            "yes or no: is the {n} favorable? {x}",
            "Would the author tell a friend to see it? {n}: {x}",
        ),
    ),
    Verbalizer(
        ("yes", "no"),
        0.05,
        (
            "Is this {n} negative? {x}",
            "{x} Is this {n} negative?",
            "{x} Did the author dislike the movie?",
            "Is the writer disappointed? {x}",
            "{x} Question: is the sentiment negative? Answer:",
            "Does the {n} speak badly of the film? {x}",
            "yes or no: is the {n} unfavorable? {x}",
        ),
    ),
    Verbalizer(
        ("avoid", "recommend"),
        0.04,
        (
            *_GENERIC,
            "recommend or avoid: {x}",
            "{x} Should I see it or skip it?",
            "{x} Recommend or avoid?",
            "Based on this {n}, would you recommend or avoid the movie? {x}",
        ),
    ),
    Verbalizer(
        ("false", "true"),
        0.04,
        (
            "True or false: the author liked the film. {x}",
            "{x} Claim: the reviewer enjoyed the movie. True or false?",
            "{x} statement: this is a favorable {n}. true or false?",
            'The sentiment of "{x}" is positive. true or false?',
        ),
    ),
    Verbalizer(
        ("hated", "loved"),
        0.02,
        (*_GENERIC, "{x} The author", "How did the viewer react? {x}", "{x} They ___ it."),
    ),
    Verbalizer(
        ("dislike", "like"), 0.02, (*_GENERIC, "{x} like or dislike?", "like or dislike: {x}")
    ),
    Verbalizer(
        ("unhappy", "happy"),
        0.02,
        (*_GENERIC, "Was the viewer happy or unhappy? {x}", "{x} The viewer was"),
    ),
)

# Answers that carry no meaning of their own: the instruction says what they stand for.
FREE_WORDS = "a b c d one two left right red blue green up down first second x y".split()
FREE_SENTIMENT = (
    "If the {n} is positive write {pos}, if it is negative write {neg}. {x}",
    "{pos} means the author liked it, {neg} means the author disliked it. {x}",
    "{x} Answer {neg} for a negative {n} and {pos} for a positive one.",
    "positive = {pos}, negative = {neg}. {x}",
    "Write {neg} when the {n} is bad, {pos} when it is good: {x}",
)
STARS = (
    "How many stars out of ten? {x}",
    "{x} Rating from 1 to 10:",
    "Predict the rating (1-10) of this review: {x}",
    "stars: {x}",
    "{x} On a scale of 1 to 10, this viewer gives",
)
KIND_WORDS = (
    ("film review", "encyclopedia article", "novel"),
    ("review", "encyclopedia", "novel"),
    ("review", "article", "story"),
    ("opinion", "facts", "fiction"),
)
KIND = (
    "What kind of text is this? {x}",
    "{x} Where does this text come from? Options: {o}.",
    "Source of the passage ({o}): {x}",
    "{x} This text is from a",
    "Choose from {o}. {x}",
    "genre: {x}",
    "Classify the passage by its kind: {o}. {x} kind:",
    "{x} text type:",
    "Is this {o}? {x}",
)
KIND_NAMES = ("a film review", "an encyclopedia article", "a novel")
KIND_YES_NO = (
    "Is this from {k}? {x}",
    "{x} Does this text come from {k}?",
    "yes or no: the text below is taken from {k}. {x}",
    "{x} question: is it part of {k}? answer:",
)
THING = (
    "What kind of thing is described? {x}",
    "{x} What is it? Options: {o}",
    "Is this a {o}? {x}",
    "{x} The article is about a",
    "Choose from {o}. {x}",
    "Which of these is it: {o}? {x}",
    "{x} Name its kind:",
    "kind of thing ({o}): {x}",
)
TITLE = (
    "What is the title of this article? {x}",
    "{x} Title:",
    "Give this text a title. {x}",
    "title: {x}",
    "Which subject is described? {x}",
    "{x} The article is about",
    "Name the person, place or thing described here: {x}",
    "Write the headline for the following entry. {x}",
)
TITLE_YES_NO = (
    "Is this text about {t}? {x}",
    '{x} Does this passage belong to the article "{t}"?',
    "title: {t} text: {x} Do they match?",
    "{x} Question: is {t} the subject? yes or no:",
    "Does the title {t} fit? passage: {x}",
)
TITLE_CHOICE = (
    "Which title fits? {o} text: {x}",
    "{x} What is it about? Options: {o}",
    "Choose the title of the passage: {o} passage: {x}",
    "{x} Is this article about {o}?",
    "titles: {o} article: {x} answer:",
)
TOPIC = (
    "What is the topic of this text? {x}",
    "topic: {x}",
    "{x} Topic:",
    "{x} This text is about",
    "Classify the text by topic. Options: {o}. {x}",
    "Which of these topics fits: {o}? {x}",
    "{x} Choose a topic: {o}.",
    "Subject area? {x}",
    "{x} What is this about, {o}?",
    "Name the category of this text: {x} category:",
    "Choose from {o}. Text: {x} label:",
    "category: {x}",
    "In one word, what is being discussed? {x}",
    "Is the text about {o}? {x}",
)
TOPIC_YES_NO = (
    "Is this text about {t}? {x}",
    "{x} Is the topic {t}?",
    "yes or no: this is about {t}. {x}",
    "Does the following have to do with {t}? {x}",
)
FOLLOWS = (
    "Does the second sentence follow the first? first: {a} second: {b}",
    "{a} Next sentence: {b} Is that right?",
    'Could "{b}" come right after "{a}"?',
    "sentence1: {a} sentence2: {b} Do they follow each other?",
    "Text: {a} Is this how it goes on? {b}",
    "{a} {b} Is the last sentence a true continuation? yes or no:",
)
CLOZE = (
    "Which word is missing? {x} Options: {o}",
    "Fill in the blank ({o}): {x}",
    "{x} The missing word is: {o}",
    "Choose the word for the gap. {o} text: {x}",
    "{x} Answer with one of {o}.",
)
AUTHOR = (
    "Who wrote this? {o} {x}",
    "{x} The author of this passage is one of {o}:",
    "Which novelist wrote the text below? Options: {o}. {x}",
    "author ({o}): {x}",
)
ORDER_WORDS = (("swapped", "right"), ("no", "yes"), ("wrong", "correct"))
ORDER = (
    "Are the two sentences in the right order? {o} {a} {b}",
    "{a} {b} Is the order of these sentences right or were they swapped? Answer {o}.",
    "order ({o}): {a} {b}",
    "first: {a} second: {b} Is this the original order? {o}",
)
SAME_WORDS = (("different", "same"), ("no", "yes"))
SAME = (
    "Are these from the same text? Answer {o}. 1: {a} 2: {b}",
    "text 1: {a} text 2: {b} same text or different texts? {o}",
    "Do both passages belong to one document ({o})? {a} | {b}",
    "passage a: {a} passage b: {b} Same source? {o}:",
)
SHUFFLED_WORDS = (("shuffled", "natural"), ("yes", "no"))
SHUFFLED = (
    (
        "Is the word order natural or shuffled? {x}",
        "{x} natural or shuffled?",
        "word order: {x}",
        "Say whether the words were shuffled: natural or shuffled. {x}",
    ),
    (
        "Have the words of this sentence been mixed up? {x}",
        "{x} Is the order of the words broken? yes or no:",
        "Were these words put in a random order? {x}",
    ),
)
ANSWER = (
    "question: {q} context: {c}",
    "context: {c} question: {q}",
    "Answer the question from the text. {q} {c}",
    "{c} {q}",
    "Read this and answer. text: {c} question: {q} answer:",
    "{c} Q: {q} A:",
    "{q} The answer is in this text: {c}",
)
COPA = (
    "What is the {q}? {p} choices: {a} or {b}",
    "{p} What is the {q}? 1: {a} 2: {b}",
    "copa premise: {p} question: {q} choice1: {a} choice2: {b}",
    'Pick the more likely {q} of "{p}" - {a} - {b}',
)
NLI = (
    "premise: {a} hypothesis: {b}",
    '{a} Based on that, "{b}"? {o}',
    "Does the first text support the second? {a} | {b} Answer {o}.",
    "Suppose {a} Can we infer that {b}? {o}",
    "cb hypothesis: {b} premise: {a}",
    "{a} Claim: {b} Options: {o}.",
)
NLI_WORDS = (("entailment", "contradiction", "neutral"), ("yes", "no", "maybe"))
