"""The texts on which the real model is compared, here and in its goldens (`make_goldens.py`)."""

from pathlib import Path

# The licence of this repository never changes and runs past the window of 512 tokens.
_LONG = (Path(__file__).parents[2] / "LICENSE").read_text()[:4400]

PROMPTS = {
    "one_token": "The",
    "capital": "The capital of France is Paris, and the capital of Italy is",
    "story": "Once upon a time, in a village by the sea, there lived a fisherman who had never",
    "question": "Q: Why is the sky blue?\nA: Because shorter wavelengths of light are scattered",
    "list": "Shopping list:\n- milk\n- eggs\n- bread\n- butter\n- ",
    "python": "def fib(n):\n    a, b = 0, 1\n    while n:\n        a, b, n = b, a + b, n - 1\n",
    "c": '#include <stdio.h>\n\nint main(void) {\n\tprintf("%d\\n", 42);\n\treturn 0;\n}\n',
    "sql": "SELECT name, COUNT(*) FROM orders WHERE year = 2019 GROUP BY name HAVING",
    "html": "<html>\n  <body>\n    <h1>Title</h1>\n    <p>Some <b>bold</b> text</p>\n",
    "json": '{"name": "Ada", "born": 1815, "tags": ["mathematics", "poetry"], "alive": false}',
    "digits": "3.14159265358979323846264338327950288419716939937510582097494459230781640628",
    "sums": "12 + 34 = 46\n1234 * 10 = 12340\n99 - 100 = -1\n7 / 2 = 3.5\n2 ** 10 =",
    "russian": "Жили-были старик со старухой у самого синего моря; они жили в ветхой землянке",
    "chinese": "床前明月光，疑是地上霜。举头望明月，低头思故乡。这首诗的作者是",
    "japanese": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "korean": "나는 어제 친구와 함께 서울에 있는 큰 시장에 갔습니다. 우리는",
    "arabic": "كان يا ما كان في قديم الزمان ملك عادل يحب شعبه",
    "hindi": "भारत एक विशाल देश है जहाँ बहुत सी भाषाएँ बोली जाती हैं।",
    "hebrew": "בראשית ברא אלהים את השמים ואת הארץ",
    "thai": "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย",
    "greek": "Ἐν ἀρχῇ ἦν ὁ λόγος, καὶ ὁ λόγος ἦν πρὸς τὸν θεόν",
    "german": "Der Rindfleischetikettierungsüberwachungsaufgabenübertragungsgesetz hieß ein Gesetz",
    "emoji": "I love pizza 🍕 and cats 🐱👩‍👩‍👧‍👦 🇨🇭🇯🇵 so much 😂😂😂 !!!",
    "whitespace": "a  b   c    d\t\te\n\n\n\nf" + " " * 20 + "g\r\n \n\t\n" + " " * 40 + "h",
    "rare": "\u0301\u200b\ufffd 𝔹𝕠𝕝𝕕 ᐛ 𐰑𐰖 \x00 ½ ﬁ Ⅷ １２３",
    "repeats": "ab " * 60 + "=" * 40 + "-" * 40,
    "markup": "# Notes\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n* **x**: $e^{i\\pi} + 1 = 0$\n",
    "long": _LONG,
}
