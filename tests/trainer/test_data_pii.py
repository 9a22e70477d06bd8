"""Personal data: found where it was planted, left alone where there is none, replaced so that a text stays readable."""

from __future__ import annotations

import base64
import ipaddress
import random
import string
from collections import Counter
from collections.abc import Callable
from pydoc_data.topics import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_trainer.data.pii import Redactor, find, pseudonym, redact_row

SENTENCES = (
    "please write to {} before friday",
    "my details: {}.",
    "call me ({}) or wait",
    "{}",
    "is {} still on file?\nthanks",
    'she said "{}", then left',
)


def luhn(rng: random.Random, prefix: str, length: int) -> str:
    body = prefix + "".join(rng.choices(string.digits, k=length - len(prefix) - 1))
    doubled = [int(digit) if at % 2 else sum(divmod(2 * int(digit), 10)) for at, digit in enumerate(reversed(body))]
    return body + str(-sum(doubled) % 10)


def card(rng: random.Random) -> str:
    number = luhn(rng, rng.choice(["4", "51", "37", "6011", "2221"]), rng.choice([16, 16, 15]))
    return rng.choice([number, " ".join(number[at : at + 4] for at in range(0, len(number), 4)), number])


def iban(rng: random.Random) -> str:
    country, length = rng.choice([("DE", 18), ("GB", 18), ("FR", 23), ("NO", 11), ("ES", 20)])
    letters = "".join(rng.choices(string.ascii_uppercase, k=4)) if country == "GB" else ""
    body = letters + "".join(rng.choices(string.digits, k=length - len(letters)))
    check = 98 - int("".join(str(int(character, 36)) for character in f"{body}{country}00")) % 97
    packed = f"{country}{check:02d}{body}"
    return rng.choice([packed, " ".join(packed[at : at + 4] for at in range(0, len(packed), 4))])


def email(rng: random.Random) -> str:
    name = rng.choice(["mia.k", "jo+desk", "a_b", "zoe", "m.o-n", "ünal", "x99"])
    return (
        f"{name}{rng.randrange(99)}@{rng.choice(['example.org', 'mail.example.co.uk', 'bücher.example', 'a-b.test'])}"
    )


def phone(rng: random.Random) -> str:
    def digits(count: int) -> str:
        return "".join(rng.choices("123456789", k=1) + rng.choices(string.digits, k=count - 1))

    return rng.choice(
        [
            f"+49 {digits(3)} {digits(7)}",
            f"+1-{rng.randint(201, 989)}-{rng.randint(201, 989)}-{digits(4)}",
            f"({rng.randint(201, 989)}) {rng.randint(201, 989)}-{digits(4)}",
            f"{rng.randint(201, 989)}.{rng.randint(201, 989)}.{digits(4)}",
            f"0{digits(3)} {digits(6)}",
            f"0{digits(2)}/{digits(7)}",
            f"+44 (0)20 {digits(4)} {digits(4)}",
            f"0033 {digits(1)} {digits(2)} {digits(2)} {digits(2)} {digits(2)}",
        ]
    )


def ip(rng: random.Random) -> str:
    if rng.random() < 0.7:
        return f"{rng.randint(1, 223)}.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(256)}".replace(
            "127.", "128.", 1
        )
    address = ipaddress.IPv6Address((0x2001_0DB8 << 96) | rng.getrandbits(96))
    return rng.choice([address.compressed, address.exploded, f"2001:db8::{rng.randrange(1, 65535):x}"])


def national_id(rng: random.Random) -> str:
    number = rng.randrange(100_000_000)
    return rng.choice(
        [
            f"{rng.randint(1, 665):03d}-{rng.randint(1, 99):02d}-{rng.randint(1, 9999):04d}",
            f"AB{rng.randrange(1_000_000):06d}C",
            f"{number:08d}{'TRWAGMYFPDXBNJZSQVHLCKE'[number % 23]}",
        ]
    )


def secret(rng: random.Random) -> str:
    def letters(alphabet: str, count: int) -> str:
        return "".join(rng.choices(alphabet, k=count))

    word = string.ascii_letters + string.digits
    return rng.choice(
        [
            "AKIA" + letters(string.ascii_uppercase + string.digits, 16),
            "ghp_" + letters(word, 36),
            base64.b64encode(rng.randbytes(30)).decode(),
            f"eyJ{letters(word, 20)}.eyJ{letters(word, 40)}.{letters(word, 30)}",
            letters(word, 40),
        ]
    )


GENERATORS: dict[str, Callable[[random.Random], str]] = {
    "EMAIL": email,
    "PHONE": phone,
    "IBAN": iban,
    "CARD": card,
    "IP": ip,
    "NATIONAL_ID": national_id,
    "SECRET": secret,
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_planted_values_are_replaced_by_their_kind(kind: str) -> None:
    """Recall of at least 0.95: the whole value gone, under its own name."""
    rng = random.Random(f"pii/{kind}")
    missed = []
    for at in range(400):
        value = GENERATORS[kind](rng)
        text = SENTENCES[at % len(SENTENCES)].format(value)
        if Redactor().text(text) != SENTENCES[at % len(SENTENCES)].format(f"<{kind}_1>"):
            missed.append(text)
    assert len(missed) / 400 <= 0.05, missed[:5]


def test_prose_about_programs_is_left_alone() -> None:
    """465 KB of Python's own documentation, which is full of numbers, dotted names and hexadecimal digits."""
    text = "\n".join(topics.values())
    found = [(span.kind, text[span.start : span.end]) for span in find(text)]
    assert len(text) > 400_000
    assert len(found) <= 5, found


@pytest.mark.parametrize(
    "text",
    [
        "version 1.2.3 of 2026-03-01 at 10:30:00",
        "4111 1111 1111 1112 has a wrong check digit",
        "DE89 3704 1144 1532 1130 01 has wrong check digits",
        "listening on 127.0.0.1 and ::1 and 0.0.0.0",
        "order 12345678901234 of 3 items, 20,000 in all",
        "1.2.3.4.5 and 999.1.1.1",
        "std::vector and a::b",
        "see sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "@mention and user@localhost",
        "00000000 and 11111111",
        "averyveryveryverylongidentifierwithoutdigits",
    ],
)
def test_what_only_looks_alike_stays(text: str) -> None:
    assert find(text) == []


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("4111 1111 1111 1111 12/26", "<CARD_1> 12/26"),
        ("4111-1111-1111-1111-123", "<CARD_1>-123"),
        ("4111111111111111 123", "<CARD_1> 123"),
        ("on 12 May 2024 4111 1111 1111 1111", "on 12 May 2024 <CARD_1>"),
        ("case 5312 4111 1111 1111 1111", "case 5312 <CARD_1>"),
        ("BE68 5390 0754 7034 BIC GEBABEBB", "<IBAN_1> BIC GEBABEBB"),
        ("AT61 1904 3002 3457 3201 EUR 5", "<IBAN_1> EUR 5"),
    ],
)
def test_a_number_is_found_beside_what_looks_like_more_of_it(text: str, clean: str) -> None:
    """People give a card with its expiry, and an account with its bank."""
    assert Redactor().text(text) == clean


def test_years_are_no_card() -> None:
    assert find(" ".join(map(str, range(2000, 2100)))) == []


def test_one_value_has_one_placeholder_in_a_record() -> None:
    row = {
        "prompt": [{"role": "user", "content": "i am a@example.org, not b@example.org"}],
        "response_a": "hello A@example.org",
        "response_b": "call +49 30 1234567 or +49301234567",
        "rater_id": "rater@example.org",  # pseudonymised, not redacted
    }
    clean, counts = redact_row(row)
    assert clean["prompt"][0]["content"] == "i am <EMAIL_1>, not <EMAIL_2>"
    assert clean["response_a"] == "hello <EMAIL_1>"
    assert clean["response_b"] == "call <PHONE_1> or <PHONE_1>"
    assert clean["rater_id"] == row["rater_id"]
    assert counts == Counter(EMAIL=3, PHONE=2)


def test_what_users_add_to_a_record_is_redacted_too() -> None:
    """An annotator's comment is written out with the row that is called clean."""
    row = {
        "prompt": [{"role": "user", "content": "hi", "name": "mia@example.org"}],
        "comment": "ask mia@example.org",
        "meta": {"notes": ["or +49 30 1234567", 3]},
        "annotation_id": "mia@example.org-1",
    }
    clean, counts = redact_row(row)
    assert clean["prompt"][0]["name"] == "<EMAIL_1>"
    assert (clean["comment"], clean["meta"]) == ("ask <EMAIL_1>", {"notes": ["or <PHONE_1>", 3]})
    assert clean["annotation_id"] == row["annotation_id"]
    assert counts == Counter(EMAIL=2, PHONE=1)


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.one_of(st.text(max_size=8), st.sampled_from(["a@b.org", "+49 30 1234567", "10.1.2.3"]))))
def test_redacting_twice_changes_nothing_more(parts: list[str]) -> None:
    once = Redactor().text(" ".join(parts))
    assert Redactor().text(once) == once


def test_long_texts_take_linear_time() -> None:
    """No pattern may backtrack its way through a hostile text."""
    for piece in ("a.", "1", "1 ", "a@", "+1(", ":", "aA1", "eyJ", "0-", "AB12 "):
        find(piece * 20_000)


def test_a_pseudonym_is_stable_keyed_and_one_way() -> None:
    one = pseudonym("mia@example.org", b"key")
    assert one == pseudonym("mia@example.org", b"key") == pseudonym(one, b"other")
    assert one != pseudonym("mia@example.org", b"other")
    assert one != pseudonym("mio@example.org", b"key")
    assert "mia" not in one
