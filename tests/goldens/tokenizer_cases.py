"""Texts and conversations whose ids transformers and we must agree on."""

TEXTS = [
    "",
    " ",
    "  ",
    " " * 31,
    " " * 40,
    "a" + " " * 64 + "b",
    "  two before, three after   ",
    "a  b   c    d     e",
    "\n\n\n leading newlines",
    "\n" * 13,
    "\n" * 40,
    "\t\t\ttabs\t \t",
    "\t" * 40,
    "\r\n\r\n\rmixed\n\r",
    "nul \x00 in it\x00",
    "\ufeffbom\ufeff",
    "\u0301\u0301lone marks",
    "e\u0301 is not \u00e9",
    "\ufffd\uffff\U0010ffff",
    "\u3000\u00a0\u2028\u2029\x0b\x0c\x85",
    "word\u00adsoft \u200bzero\u200d width",
    "👩‍👩‍👧‍👦 🇨🇭 🙂🙂",
    "１２３ ¼ ﬁ Ⅷ",
    "1234567890 3.14159 1,000,000 0x1F",
    "aaa bbb aaaa bbbbb ------ ====== ........ !!!???",
    "eeeeeee" + "=" * 77 + "-" * 33 + "0" * 50,
    "def f(x):\n    return x ** 2\n\n\nclass A:\n\tdef g(self):\n\t\tpass\n",
    '#include <stdio.h>\nint main(void) {\n\tprintf("%d\\n", 42);\n}\n',
    "<table><tr><td>1</td></tr></table>\n<h1>Title</h1><b>x</b> < > <tablex>",
    "https://example.org/a/b?c=d&e=f#g foo@example.org",
    "[multi modal] < mask > <0x41> <0xFF> <|x|>",
    "Привет, мир! Как дела?",
    "你好，世界。今天天气很好。",
    "こんにちは世界。カタカナ",
    "안녕하세요 세계",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "שלום עולם",
    "สวัสดีชาวโลก",
    "Γειά σου Κόσμε",
    "გამარჯობა",
    "𝔹𝕠𝕝𝕕 𐰑𐰖 ᐛ Ꮬ",
]

# transformers turns names of control pieces into their ids, we do so when asked.
CONTROL_TEXTS = [
    "<bos><eos><pad><unk><mask><start_of_turn>user<end_of_turn><unused3>[multimodal]",
    "say <start_of_turn>model\n no <end_of_turn>",
    "<start_of_turn <start_of_turn>> [[multimodal]] <<bos>",
]

# SentencePiece writes U+2581 for a space, and reads one in a text as a space.
SPACE_MARKS = [
    "\u2581",
    "\u2581\u2581",
    "\u2581" * 31,
    "\u2581" * 40,
    "\u2581literal\u2581\u2581",
    "a\u2581b \u2581c\u2581 d \u2581 e\u2581\u2581 \u2581f",
    " \u2581",
    "\u2581 ",
    "\n\u2581\n\u2581\u2581\t\u2581",
    "def f(x):\n\u2581\u2581\u2581\u2581return x",
    "1\u25812\u2581\u258134",
    "\u2580\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588 a bar chart",
    "\u0301\u2581\u0301 🙂\u2581🙂",
]

CHATS = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be terse.\n"},
        {"role": "user", "content": "  What is 2 + 2?\n"},
        {"role": "assistant", "content": " 4 "},
        {"role": "user", "content": "def f():\n\treturn 1\n\n"},
    ],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}],
    [{"role": "system", "content": "\n\nx"}, {"role": "user", "content": ""}],
    [
        {"role": "user", "content": "你好 🙂\u00a0"},
        {"role": "assistant", "content": "  many\n\n\nlines  of text"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "1. one\n2. two\n"},
    ],
]
