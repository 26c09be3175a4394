"""Makes messages with personal data in them, and what of it is to be redacted. No real persons.

Run     python experiments/tuning/redaction_data.py OUT [--seed 0] [--train 4000] [--test 1000]

Writes OUT/train.jsonl, valid.jsonl and test.jsonl: `prompt` (the message), `completion` (a JSON
list of {"type", "text"} in the order of the message) and `text` (the message alone). The same seed
gives the same files. Sentences and names of the test, and of validation, are never in the training
set: what is learned is where such data stand, not these names. Numbers of orders, dates, prices,
firms and places of meeting are there to be left alone, and every seventh message has nothing else.
"""

import argparse
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

TYPES = ("name", "email", "phone", "iban", "address")


def _listed(text: str, between: str | None = None) -> list[str]:
    return text.strip().replace("\n", between or " ").split(between)


_FIRST = _listed(
    """
Anna Ben Carla David Elif Farid Greta Hugo Ines Jonas Katya Liam Mara Noor Otto Priya
Quentin Rosa Samir Tessa Umar Vera Wei Xenia Yusuf Zoë Amélie Björn Chiara Dragan Eilidh
Fynn Giulia Henrik Ilse Joaquín Kofi Lucía Malte Niamh Oksana Pavel Ruth Siobhán Thandiwe
Ulrike Viktor Wanda
"""
)
_LAST = _listed(
    """
Albrecht Barros Conti Dubois Eriksen Fischer Gallo Haddad Iversen Jankowski Khan Larsson
Moreau Novak Okafor Petrov Quinn Rossi Schäfer Tanaka Ünal Vogel Whitfield Xu Yilmaz
Zimmermann Ashworth Brennan Castillo Demir Engel Fontaine Grüber Hughes Ibrahim Jovanović
Kowalczyk Lindqvist Mbeki Nguyen O'Connor Papadopoulos Ramírez Sørensen Takahashi Urban
Vasquez Wójcik
"""
)
_STREETS = _listed(
    """
Lindenstraße|Hauptstraße|Am Mühlbach|Kirchgasse|Rue de la Paix|Avenue Foch|Via Garibaldi
Calle Mayor|Oak Lane|Station Road|Church Street|Kings Avenue|Prinsengracht|Storgatan
Elm Drive|Ringweg|Boulevard Voltaire|Piazza Dante|Mill Road|Harbour View
""",
    "|",
)
_CITIES = _listed(
    """
80331 München|10115 Berlin|75002 Paris|69003 Lyon|20121 Milano|28013 Madrid|Leeds LS1 4DY
Bristol BS1 5TR|1015 CJ Amsterdam|111 22 Stockholm|4051 Basel|1010 Wien
""",
    "|",
)
_DOMAINS = ("mail.example", "post.example", "web.example.org", "example.com", "firma.example.de")
_FIRMS = ("Nordwind GmbH", "Blue Heron Ltd", "Atelier Sud", "Kestrel Bank", "Öko-Markt", "ACME")
_ITEMS = ("the blue lamp", "two tickets", "my router", "the invoice", "a bicycle", "the red coat")

# {x} is replaced by a value; only the types above are to be found.
_SENTENCES = """My name is {name} and I need help with {item}.
Hi, {name} here. Please call me back on {phone}.
Could you send the receipt to {email}? Order {order}.
Please ship {item} to {address}, thanks.
I moved. The new address is {address}.
The refund should go to {iban}, account holder {name}.
{name} ({email}) asked about order {order} on {date}.
Reach me at {phone} or write to {email}.
Dear {name}, your parcel {order} left {firm} on {date}.
We spoke with {name} and with {name} about {item}.
You can transfer {price} to {iban} before {date}.
New contact: {name}, {address}, {phone}.
is {email} still the right mail for {name}?
{name} lives at {address} and pays by {iban}.
Delivery note: leave it with {name} next door, {address}.
From: {name} <{email}>
Tel. {phone}, IBAN {iban}
Signed on {date} by {name} for {firm}.
the driver could not find {address}, so he phoned {phone}
please delete {email} and {phone} from your list!!
Booked under {name}, table for four on {date}.
Invoice {order}: {price}, payable to {firm}, {iban}.
My colleague {name} will collect {item} from {firm}.
Meeting with {name} at {firm}, {date}, dial in via {phone}.
Customer {name} complains that {item} arrived broken.
I paid {price} from {iban} but got no confirmation at {email}.
Emergency contact {name}: {phone}
Name: {name} / Street: {address} / Mail: {email}
Hello, it is {name} again about {order}.
Write to {name}, {address}.""".splitlines()
_PLAIN = """Order {order} has not arrived, it was due on {date}.
I paid {price} at {firm} and want to return {item}.
When does {firm} open on {date}?
The code {order} does not work for {item}.
Thanks, {item} is great!
Can I change {order} to express for {price}?
{firm} said the price of {item} is {price}.
Is there any news about ticket {order}?""".splitlines()
_GREETINGS = ("", "", "", "Hello! ", "Hi there, ", "Good morning. ", "Hallo, ", "URGENT: ")
_ENDINGS = ("", "", "", " Thanks.", " Best regards", " Danke!", " Please hurry.", " :)")
_COUNTRIES = {"DE": 18, "NL": 10, "FR": 23, "GB": 18, "AT": 16, "ES": 20}


def _name(rng: random.Random, held_out: bool) -> str:
    first, last = (_part(names, held_out) for names in (_FIRST, _LAST))
    whole = f"{rng.choice(first)} {rng.choice(last)}"
    return rng.choice((whole, whole, whole, f"Dr. {whole}", whole.split()[1], whole.upper()))


def _part[T](values: list[T], held_out: bool) -> list[T]:
    """Every fourth value is held out."""
    return [value for i, value in enumerate(values) if (i % 4 == 3) == held_out]


def _email(rng: random.Random, held_out: bool) -> str:
    first, last = (rng.choice(_part(names, held_out)).lower() for names in (_FIRST, _LAST))
    local = rng.choice((f"{first}.{last}", f"{first[0]}{last}", f"{first}{rng.randrange(100)}"))
    local = re.sub(r"[^a-z0-9.]", "", local) or "info"
    return f"{local}@{rng.choice(_DOMAINS)}"


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


def _phone(rng: random.Random, _: bool) -> str:
    d = lambda n: _digits(rng, n)  # noqa: E731
    return rng.choice(
        (
            f"+49 {d(3)} {d(7)}",
            f"0{d(3)}/{d(6)}",
            f"+44 7{d(3)} {d(6)}",
            f"({d(3)}) 555-0{d(3)}",
            f"+33 6 {d(2)} {d(2)} {d(2)} {d(2)}",
            f"0{d(10)}",
        )
    )


def _iban(rng: random.Random, _: bool) -> str:
    """With the check digits that ISO 13616 asks for; half of them in groups of four."""
    country = rng.choice(list(_COUNTRIES))
    bank = "".join(rng.choices("ABCDEFGHKLMN", k=4)) if country in ("GB", "NL") else ""
    account = bank + _digits(rng, _COUNTRIES[country])
    number = "".join(str(int(one, 36)) for one in f"{account}{country}00")
    iban = f"{country}{98 - int(number) % 97:02}{account}"
    return iban if rng.random() < 0.5 else " ".join(re.findall(".{1,4}", iban))


def _address(rng: random.Random, held_out: bool) -> str:
    street, city = rng.choice(_part(_STREETS, held_out)), rng.choice(_part(_CITIES, held_out))
    number = rng.randrange(1, 180)
    return rng.choice((f"{street} {number}, {city}", f"{number} {street}, {city}"))


def _date(rng: random.Random, _: bool) -> str:
    day, month, year = rng.randrange(1, 29), rng.randrange(1, 13), rng.randrange(2019, 2027)
    return rng.choice((f"{day}.{month}.{year}", f"{year}-{month:02}-{day:02}", f"{day}/{month}"))


_VALUES: dict[str, Callable[[random.Random, bool], str]] = {
    "name": _name,
    "email": _email,
    "phone": _phone,
    "iban": _iban,
    "address": _address,
    "date": _date,
    "order": lambda rng, _: rng.choice((f"#{_digits(rng, 8)}", f"AB-{_digits(rng, 5)}")),
    "price": lambda rng, _: f"{rng.randrange(3, 900)}.{_digits(rng, 2)} {rng.choice('€$£')}",
    "firm": lambda rng, _: rng.choice(_FIRMS),
    "item": lambda rng, _: rng.choice(_ITEMS),
}


def message(rng: random.Random, held_out: bool) -> dict[str, str]:
    """One or two sentences, and the personal data in them."""
    plain = rng.random() < 1 / 7
    sentences = _part(_PLAIN if plain else _SENTENCES, held_out)
    chosen = rng.sample(sentences, rng.choice((1, 2)))
    text, found = rng.choice(_GREETINGS), []
    for number, sentence in enumerate(chosen):
        text += " " if number else ""
        for literal, slot in re.findall(r"([^{]*)(?:\{(\w+)\})?", sentence):
            text += literal
            if slot:
                value = _VALUES[slot](rng, held_out)
                text += value
                if slot in TYPES:
                    found.append({"type": slot, "text": value})
    text += rng.choice(_ENDINGS)
    return {
        "prompt": f"Personal data in: {text}",
        "completion": json.dumps(found, ensure_ascii=False),
        "text": text,
    }


def messages(count: int, seed: int, split: str) -> Iterator[dict[str, str]]:
    rng = random.Random(f"{seed} {split}")
    for _ in range(count):
        yield message(rng, held_out=split != "train")


def write(
    out: Path, *, seed: int = 0, train: int = 4000, valid: int = 200, test: int = 1000
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("valid", valid), ("test", test)):
        lines = [json.dumps(x, ensure_ascii=False) for x in messages(count, seed, split)]
        (out / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines), "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    for option, default in (("seed", 0), ("train", 4000), ("valid", 200), ("test", 1000)):
        parser.add_argument(f"--{option}", type=int, default=default)
    write(**vars(parser.parse_args()))
