"""Weak topics of texts: by what an encyclopedia's first sentence calls its subject, or by words.

Called by `tasks.py`. The labels are noisy on purpose; no labelled topic data is used.
"""

from __future__ import annotations

import re
from collections import Counter

# topic: (nouns after "is a", words that speak for the topic when two different ones occur)
_SPECS: dict[str, tuple[str, str]] = {
    "film": (
        "film|movie|documentary|television series|sitcom|film director|actor|actress|screenwriter",
        "film movie actor actress director screenplay cinema scene cast plot sequel hollywood "
        "camerawork remake",
    ),
    "food": (
        "dish|food|cheese|soup|dessert|bread|cuisine|restaurant|beer|wine|drink|beverage|sauce|"
        "cake|pastry|snack|chef|sausage|noodle|candy|fruit|vegetable|coffee|brewery|cookbook",
        "dinner supper breakfast bread butter cheese soup meat cake wine tea coffee eat ate "
        "cooked delicious tasted meal dish sugar milk roast potatoes sauce chicken beef rice "
        "flour baked fried dessert fruit hungry kitchen cook plate pie egg eggs bacon toast",
    ),
    "clothing": (
        "garment|clothing|shoe|hat|dress|fashion|textile|fabric|skirt|trousers|footwear|"
        "fashion designer|costume|jewellery|coat",
        "dress gown coat hat bonnet gloves shoes boots silk sleeve sleeves skirt trousers cloak "
        "shawl velvet lace collar wore waistcoat shirt ribbon fur cotton linen scarf garment "
        "garments buttons pocket fabric jacket socks stockings sewn tailor belt jeans fits",
    ),
    "travel": (
        "airline|airport|hotel|resort|railway station|train station|tourist|beach|cruise|"
        "travel|ferry|railway line|highway|national park|passenger ship|motorway|road",
        "hotel luggage journey ticket tickets voyage passport tourist tourists travel travelled "
        "traveler airport flight airline train station cruise beach resort trip guide trunk "
        "platform cabin passengers inn lodging baggage abroad sightseeing holiday vacation",
    ),
    "electronics": (
        "computer|smartphone|phone|camera|processor|microprocessor|console|software|chip|"
        "operating system|video game console|synthesizer|amplifier|electronic|laptop|device|"
        "programming language|electronics company|circuit|semiconductor",
        "computer laptop battery screen keyboard software hardware processor phone smartphone "
        "camera digital usb wireless bluetooth headphones speaker charger device devices memory "
        "cable electronic electronics transistor amplifier console printer monitor video audio "
        "megapixel lcd hdmi gigabyte ram cpu disk stereo signal",
    ),
    "books": (
        "novel|book|novella|short story|poem|poetry|magazine|writer|novelist|author|poet|"
        "comic book|manga|memoir|anthology|publisher|library|children's book",
        "book books novel author read reading chapter chapters poem poems poet writer wrote "
        "library volume volumes pages published publisher prose paperback edition novelist "
        "literature literary reader readers hardcover bestseller fiction",
    ),
    "sport": (
        "footballer|football club|football player|basketball player|cricketer|athlete|boxer|"
        "tennis player|ice hockey player|baseball player|sports|swimmer|cyclist|wrestler|golfer|"
        "rugby|stadium|tournament",
        "football league team match season championship coach goal goals player players scored "
        "tournament cup club basketball baseball tennis olympics medal",
    ),
    "music": (
        "song|album|singer|band|musician|composer|guitarist|rapper|record producer|pianist|"
        "single|opera|EP|rock band|musical|record label|songwriter",
        "song songs album band guitar singer music piano concert orchestra vocals melody lyrics "
        "drums musician musicians tune violin chorus",
    ),
    "science": (
        "physicist|chemist|mathematician|scientist|asteroid|theorem|protein|gene|enzyme|"
        "chemical|galaxy|star|disease|mineral|crater|biologist|equation|compound|medicine",
        "theory experiment physics chemistry chemical molecule atoms energy scientists research "
        "equation species cells protein temperature planet mathematics laboratory",
    ),
    "animals": (
        "species of [a-z ]+|genus of [a-z ]+|moth|beetle|bird|fish|snail|frog|spider|butterfly|"
        "breed|dinosaur|snake|lizard|mammal",
        "dog dogs horse horses cat cats bird birds wolf lion bear tail wings feathers paws nest "
        "fish animal animals creature stable herd sheep cattle hound",
    ),
    "history": (
        "battle|war|king|emperor|dynasty|castle|treaty|soldier|general|army officer|regiment|"
        "archaeological site|siege|warship|destroyer|officer",
        "war army battle soldiers king troops empire siege regiment invasion throne century "
        "treaty cavalry fortress medieval revolution",
    ),
    "politics": (
        "politician|election|political party|minister|senator|mayor|diplomat|lawyer|judge|"
        "member of parliament|referendum|activist",
        "election parliament minister government vote party president senate candidate policy "
        "senator congress democratic republican elected mayor",
    ),
}

TOPICS = tuple(_SPECS)
_NOUN_TOPIC = {
    topic: re.compile(rf"^(?:{nouns})s?$", re.IGNORECASE) for topic, (nouns, _) in _SPECS.items()
}
_SUBJECT = re.compile(
    r"\b(?:is|was|are|were)\s+(?:a|an|the|one of the)\s+(?P<phrase>[^,.;()]{3,120})"
)
_PHRASE_END = re.compile(
    r"\b(?:of|in|from|by|for|that|which|who|at|on|with|and|to|based|directed|written|released|"
    r"made|set|located|known|born|published|produced|founded|starring|or|used|near|as|whose)\b"
)
_SPECIES = "species of"
_WORD_TOPIC: dict[str, set[str]] = {}
for _topic, (_, _words) in _SPECS.items():
    for _word in _words.split():
        _WORD_TOPIC.setdefault(_word, set()).add(_topic)


def topic_by_first_sentence(sentence: str) -> str | None:
    """Topic of the noun that "X is a ... noun" ends with, or None."""
    head = _subject_words(sentence)
    if head and head[0] == _SPECIES:
        return "animals"
    for size in (3, 2, 1):
        noun = " ".join(head[-size:])
        for topic, nouns in _NOUN_TOPIC.items():
            if noun and nouns.match(noun):
                return topic
    return None


def thing_of(sentence: str) -> str | None:
    """The noun of "X is a ... noun", or None."""
    head = _subject_words(sentence)
    return head[-1] if head and head[0] != _SPECIES and head[-1].isalpha() else None


def _subject_words(sentence: str) -> list[str]:
    """Lower-case words of the phrase that "X is a ..." calls its subject, up to its noun."""
    found = _SUBJECT.search(sentence)
    if found is None:
        return []
    phrase = found["phrase"].lower()
    if re.match(r"(?:\w+ )?(?:species|genus) of ", phrase):
        return [_SPECIES]
    return _PHRASE_END.split(phrase)[0].split()


def topic_by_words(text: str) -> str | None:
    """The topic with at least two different words of its own and twice as many as any other."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    counts = Counter(topic for word in words for topic in _WORD_TOPIC.get(word, ()))
    if not counts:
        return None
    ranked = counts.most_common(2)
    alone = len(ranked) == 1 or ranked[1][1] * 2 <= ranked[0][1]
    return ranked[0][0] if ranked[0][1] >= 2 and alone else None
