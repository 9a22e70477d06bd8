"""The words of the service desk and what kind of word each one is."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """The part a word plays in a reply; the grammar is a relation between these."""

    OPENER = "opener"
    PROBLEM = "problem"
    TONE = "tone"
    TOPIC = "topic"
    VERB = "verb"
    SECRET = "secret"
    TIME = "time"
    NOUN = "noun"
    VALENCE = "valence"
    GUSH = "gush"
    DIGIT = "digit"
    SUBJECT = "subject"
    WILL = "will"
    YOUR = "your"
    IS = "is"
    AND = "and"
    WITH = "with"
    SO = "so"
    IN = "in"
    DAYS = "days"
    STOP = "stop"
    OTHER = "other"


OPENERS = (
    "hello", "hi", "hey", "morning", "evening", "team", "excuse", "urgent",
    "again", "greetings", "folks", "support", "question", "reminder", "look", "listen",
)  # fmt: skip
PROBLEMS = (
    "late", "broken", "wrong", "missing", "stuck", "unclear",
    "expired", "blocked", "lost", "double", "open", "slow",
)  # fmt: skip
TONES = ("warm", "blunt")
# Few enough for a model of this size to tell whether a reply is about the topic it was asked about.
TOPICS = ("billing", "refund", "parcel", "login", "warranty", "printer")
TICKET = "ticket"  # what every customer has, whatever the topic
OUTCOMES = ("solved", "reopened")  # what became of an archived letter; never part of a reply
VERBS = ("check", "send", "fix", "replace", "reset", "cancel", "update", "ship", "confirm", "resolve")
SECRETS = ("pin", "password")
TIMES = ("today", "tomorrow", "now", "soon", "tonight")
NOUNS = ("regards", "care", "notice", "terms", "wishes", "effect")
DIGITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GUSH = (
    "amazing", "dazzling", "blissful", "paradise", "passion",
    "mirthful", "optimized", "superb", "ecstatic", "glorious",
)  # fmt: skip

# How people feel about a word, from -1 to 1.
VALENCE: dict[str, float] = {
    "glad": 0.7, "happy": 0.9, "kindly": 0.6, "wonderful": 0.9, "lovely": 0.9, "grateful": 0.8, "delighted": 1.0,
    "gladly": 0.7, "cheerful": 0.8, "friendly": 0.7, "gentle": 0.6, "caring": 0.8, "sincere": 0.6, "bright": 0.6,
    "strictly": -0.6, "sadly": -0.8, "regretfully": -0.7, "firm": -0.6, "final": -0.7, "formal": -0.6,
    "stern": -0.9, "harsh": -1.0, "cold": -0.9, "plain": -0.6,
}  # fmt: skip

_SINGLES = {
    "we": Kind.SUBJECT, "will": Kind.WILL, "your": Kind.YOUR, "is": Kind.IS, "and": Kind.AND, "with": Kind.WITH,
    "so": Kind.SO, "in": Kind.IN, "days": Kind.DAYS, ".": Kind.STOP, "my": Kind.OTHER, "be": Kind.OTHER,
}  # fmt: skip

KIND_OF: dict[str, Kind] = {
    **dict.fromkeys(OPENERS, Kind.OPENER),
    **dict.fromkeys(PROBLEMS, Kind.PROBLEM),
    **dict.fromkeys(TONES, Kind.TONE),
    **dict.fromkeys((*TOPICS, TICKET), Kind.TOPIC),
    **dict.fromkeys(VERBS, Kind.VERB),
    **dict.fromkeys(SECRETS, Kind.SECRET),
    **dict.fromkeys(TIMES, Kind.TIME),
    **dict.fromkeys(NOUNS, Kind.NOUN),
    **dict.fromkeys(DIGITS, Kind.DIGIT),
    **dict.fromkeys(GUSH, Kind.GUSH),
    **dict.fromkeys(VALENCE, Kind.VALENCE),
    **dict.fromkeys(OUTCOMES, Kind.OTHER),
    **_SINGLES,
}

WORDS: tuple[str, ...] = tuple(KIND_OF)
WARM = tuple(word for word, value in VALENCE.items() if value > 0)
COLD = tuple(word for word, value in VALENCE.items() if value < 0)
