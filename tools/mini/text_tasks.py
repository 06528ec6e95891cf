"""Builders of the tasks that are made from running text: reviews, encyclopedia, novels.

Called by `tasks.py`, which says what a builder is.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import wordings as w
from corpora import Document, sentences_of
from topics import TOPICS, thing_of
from wordings import fill, options
from world import SNIPPET_WORDS, Row, World, choose_some, snippet, spelled, styled

SENTIMENT_REPEATS = 2  # times a crop may be used, with another wording

# ---------------------------------------------------------------- sentiment


def sentiment_crops(world: World, count: int, rng: random.Random) -> Iterator[Row]:
    """Sentences, short runs of sentences and phrases that the teacher is sure about."""
    weights = [v.weight for v in w.SENTIMENT]
    crops = world.crops
    for number in range(min(count, SENTIMENT_REPEATS * 2 * len(crops[0]))):
        label = number % 2
        text = styled(crops[label][number // 2 % len(crops[label])].text, rng, 0.55)
        noun = rng.choice(w.NOUNS)
        if rng.random() < 0.06:
            pair = rng.sample(w.FREE_WORDS, 2)
            prompt = fill(rng, w.FREE_SENTIMENT, neg=pair[0], pos=pair[1], n=noun, x=text)
            yield Row(prompt, pair[label], pair)
            continue
        verbalizer = rng.choices(w.SENTIMENT, weights)[0]
        words = verbalizer.words
        prompt = fill(rng, verbalizer.templates, n=noun, o=options(rng, words), x=text)
        yield Row(prompt, words[label], list(words))


def sentiment_reviews(world: World, count: int, rng: random.Random) -> Iterator[Row]:
    """Beginnings and ends of labelled reviews, without the teacher."""
    weights = [v.weight for v in w.SENTIMENT]
    for review in _labelled_reviews(world, rng):
        words = review.text.split()
        part = words[:SNIPPET_WORDS] if rng.random() < 0.4 else words[-SNIPPET_WORDS:]
        text = styled(" ".join(part), rng, 0.45)
        verbalizer = rng.choices(w.SENTIMENT, weights)[0]
        answers = verbalizer.words
        noun = rng.choice(("review", "text", "critique"))
        prompt = fill(rng, verbalizer.templates, n=noun, o=options(rng, answers), x=text)
        yield Row(prompt, answers[review.label or 0], list(answers))


def stars(world: World, count: int, rng: random.Random) -> Iterator[Row]:
    candidates = [str(number) for number in range(1, 11)]
    for review in _labelled_reviews(world, rng):
        words = review.text.split()
        text = " ".join(words[-110:])
        yield Row(fill(rng, w.STARS, x=text), str(review.rating), candidates)


def _labelled_reviews(world: World, rng: random.Random) -> Iterator[Document]:
    labelled = [review for review in world.by_source["imdb"] if review.label is not None]
    for _ in range(4):
        yield from rng.sample(labelled, len(labelled))


# ---------------------------------------------------------------- kind and topic


def kind(world: World, count: int, rng: random.Random) -> Iterator[Row]:
    sources = ("imdb", "wikipedia", "novels")
    while True:
        index = rng.randrange(3)
        text = snippet(rng.choice(world.by_source[sources[index]]).text, rng)
        text = styled(text, rng, 0.4)
        if rng.random() < 0.3:
            asked = (index + rng.choice((0, 0, 1, 2))) % 3
            name = w.KIND_NAMES[asked]
            answer = "yes" if asked == index else "no"
            yield Row(fill(rng, w.KIND_YES_NO, k=name, x=text), answer, ["no", "yes"])
            continue
        target, candidates, listed = spelled(rng, rng.choice(w.KIND_WORDS), index)
        yield Row(fill(rng, w.KIND, o=listed, x=text), target, candidates)


def topic(world: World, count: int, rng: random.Random) -> Iterator[Row]:
    """Weak topics, every topic equally often; rare topics repeat with other wordings."""
    texts = world.topic_texts
    names = [name for name in TOPICS if texts.get(name)]
    most_repeats = 6
    for turn in range(most_repeats * max(map(len, texts.values()))):
        for name in names:
            if turn >= most_repeats * len(texts[name]):
                continue
            text = styled(texts[name][turn % len(texts[name])], rng, 0.4)
            if rng.random() < 0.2:
                asked = name if rng.random() < 0.5 else rng.choice(names)
                answer = "yes" if asked == name else "no"
                yield Row(fill(rng, w.TOPIC_YES_NO, t=asked, x=text), answer, ["no", "yes"])
                continue
            size = rng.choice((2, 3, 4, 6, len(TOPICS)))
            size = min(size, len(names))
            candidates = choose_some(rng, names, name, size)
            prompt = fill(rng, w.TOPIC, o=options(rng, candidates), x=text)
            if not all(candidate in prompt.lower() for candidate in candidates):
                candidates = list(TOPICS)
            yield Row(prompt, name, candidates)


# ---------------------------------------------------------------- encyclopedia


def thing(world: World, count: int, rng: random.Random) -> Iterator[Row]:
    """What an article's first sentence calls its subject, with that word taken out of the text."""
    found = [
        (article, noun)
        for article in world.by_source["wikipedia"]
        if (noun := thing_of(sentences_of(article.text)[0]))
    ]
    counts = Counter(noun for _, noun in found)
    least = max(2, len(found) // 5000)
    pool = [noun for noun, times in sorted(counts.items()) if times >= least]
    used: Counter[str] = Counter()
    for _ in range(4):
        for article, noun in rng.sample(found, len(found)):
            used[noun] += 1
            if counts[noun] < least or used[noun] > max(8, count // 40):
                continue
            candidates = choose_some(rng, pool, noun, min(rng.choice((2, 4, 4, 8)), len(pool)))
            hidden = re.sub(rf"\b{noun}(?=s?\b)", "___", article.text, flags=re.IGNORECASE)
            text = styled(" ".join(hidden.split()[: rng.randint(20, SNIPPET_WORDS)]), rng, 0.2)
            prompt = fill(rng, w.THING, o=options(rng, candidates), x=text)
            listed = all(candidate in prompt.lower() for candidate in candidates)
            yield Row(prompt, noun, candidates if listed else [])


def title(world: World, count: int, rng: random.Random) -> Iterator[Row]:
    for article in rng.sample(world.by_source["wikipedia"], len(world.by_source["wikipedia"])):
        text = " ".join(article.text.split()[: rng.randint(20, SNIPPET_WORDS)])
        yield Row(fill(rng, w.TITLE, x=text), article.title, [])


def title_yes_no(world: World, count: int, rng: random.Random) -> Iterator[Row]:
    articles = world.by_source["wikipedia"]
    while True:
        article = rng.choice(articles)
        answer = rng.choice(("no", "yes"))
        name = article.title if answer == "yes" else rng.choice(articles).title
        if (name == article.title) == (answer == "yes"):
            text = _article_part(article, rng)
            yield Row(fill(rng, w.TITLE_YES_NO, t=name, x=text), answer, ["no", "yes"])


def title_choice(world: World, count: int, rng: random.Random) -> Iterator[Row]:
    articles = world.by_source["wikipedia"]
    titles = [article.title for article in articles]
    while True:
        article = rng.choice(articles)
        candidates = choose_some(rng, titles, article.title, 4)
        text = _article_part(article, rng)
        prompt = fill(rng, w.TITLE_CHOICE, o=options(rng, candidates), x=text)
        yield Row(prompt, article.title, candidates)


def _article_part(article: Document, rng: random.Random) -> str:
    """Mostly the beginning, which names its subject, else any part."""
    if rng.random() < 0.6:
        return " ".join(article.text.split()[: rng.randint(15, 60)])
    return snippet(article.text, rng, 60)


# ---------------------------------------------------------------- novels and running text


def follows(world: World, count: int, rng: random.Random) -> Iterator[Row]:
    while True:
        a, b, other = _pair(rng, world.by_source[rng.choice(("novels", "novels", "wikipedia"))])
        answer = rng.choice(("no", "yes"))
        prompt = fill(rng, w.FOLLOWS, a=a, b=b if answer == "yes" else other)
        yield Row(prompt, answer, ["no", "yes"])


def cloze(world: World, count: int, rng: random.Random) -> Iterator[Row]:
    """One lower-case word of four letters or more is missing; three others as false candidates."""
    counts: Counter[str] = Counter()
    for document in rng.sample(world.documents, min(8000, len(world.documents))):
        counts.update(re.findall(r"(?<=\s)[a-z]{4,}(?=\s)", document.text))
    pool = [word for word, times in counts.most_common(6000) if times > 1]
    known = set(pool)
    while True:
        text = snippet(rng.choice(world.documents).text, rng, 50)
        words = text.split()
        places = [number for number, word in enumerate(words) if word in known]
        if not places or len(words) < 8:
            continue
        place = rng.choice(places)
        candidates = choose_some(rng, pool, words[place], 4)
        target, words[place] = words[place], "___"
        prompt = fill(rng, w.CLOZE, o=options(rng, candidates), x=" ".join(words))
        yield Row(prompt, target, candidates)


def author(world: World, count: int, rng: random.Random) -> Iterator[Row]:
    names = sorted({document.author for document in world.by_source["novels"]})
    while True:
        document = rng.choice(world.by_source["novels"])
        candidates = choose_some(rng, names, document.author, 4)
        text = snippet(document.text, rng)
        prompt = fill(rng, w.AUTHOR, o=options(rng, candidates), x=text)
        yield Row(prompt, document.author, candidates)


def order(world: World, count: int, rng: random.Random) -> Iterator[Row]:
    while True:
        a, b, _ = _pair(rng, world.documents)
        right = rng.randrange(2)
        target, candidates, listed = spelled(rng, rng.choice(w.ORDER_WORDS), right)
        first, second = (a, b) if right else (b, a)
        yield Row(fill(rng, w.ORDER, a=first, b=second, o=listed), target, candidates)


def same_document(world: World, count: int, rng: random.Random) -> Iterator[Row]:
    """Two snippets of one document, or of two documents of the same source."""
    while True:
        documents = world.by_source[rng.choice(("imdb", "wikipedia", "novels"))]
        same = rng.randrange(2)
        one = rng.choice(documents)
        two = one if same else rng.choice(documents)
        a, b = snippet(one.text, rng, 40), snippet(two.text, rng, 40)
        if a == b or (one is two) != bool(same):
            continue
        target, candidates, listed = spelled(rng, rng.choice(w.SAME_WORDS), same)
        yield Row(fill(rng, w.SAME, a=a, b=b, o=listed), target, candidates)


def shuffled_words(world: World, count: int, rng: random.Random) -> Iterator[Row]:
    while True:
        sentence = rng.choice(sentences_of(rng.choice(world.documents).text))
        words = re.findall(r"[a-z0-9'-]+", sentence.lower())
        if not 6 <= len(words) <= 25:
            continue
        natural = rng.randrange(2)
        mixed = words if natural else rng.sample(words, len(words))
        if not natural and mixed == words:
            continue
        style = rng.randrange(2)
        answers = w.SHUFFLED_WORDS[style]
        prompt = fill(rng, w.SHUFFLED[style], x=" ".join(mixed))
        yield Row(prompt, answers[natural], list(answers))


def _pair(rng: random.Random, documents: Sequence[Document]) -> tuple[str, str, str]:
    """Two neighbouring sentences and a distant third one of the same document."""
    while True:
        sentences = sentences_of(rng.choice(documents).text)
        if len(sentences) < 5:
            continue
        start = rng.randrange(len(sentences) - 1)
        far = [n for n in range(len(sentences)) if abs(n - start) > 2]
        if not far:
            continue
        chosen = [sentences[start], sentences[start + 1], sentences[rng.choice(far)]]
        if all(3 <= len(sentence.split()) <= 35 for sentence in chosen):
            return chosen[0], chosen[1], chosen[2]
