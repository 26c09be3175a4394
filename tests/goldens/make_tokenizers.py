"""Writes tokenizers.json: the ids that transformers gives for the texts of tokenizer_cases.py.

Runs in an environment of its own (transformers): see README.md. Arguments: NAME=FOLDER, a Hugging
Face folder with tokenizer.json and tokenizer_config.json for each entry.
"""

import hashlib
import json
import sys
from pathlib import Path

from tokenizer_cases import CHATS, CONTROL_TEXTS, TEXTS
from transformers import AutoTokenizer


def ids(folder: Path) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(texts: list[str]) -> list[list[int]]:
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    def chat(prompt: bool) -> list[list[int]]:
        settings = {"add_generation_prompt": prompt, "return_dict": False}
        return [tokenizer.apply_chat_template(messages, **settings) for messages in CHATS]

    def mask(messages: list[dict[str, str]]) -> list[int]:
        settings = {"return_dict": True, "return_assistant_tokens_mask": True}
        return tokenizer.apply_chat_template(messages, **settings)["assistant_masks"]

    golden = {
        "sha256": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
        "chat_template": tokenizer.chat_template,
        "texts": encode(TEXTS),
        "control_texts": encode(CONTROL_TEXTS),
        "chats": chat(False),
        "chats_with_prompt": chat(True),
    }
    if "generation -%}" in tokenizer.chat_template:  # Google's says nothing of whose turn it is
        golden["chat_masks"] = [mask(messages) for messages in CHATS]
    return golden


def main() -> None:
    folders = dict(argument.split("=", 1) for argument in sys.argv[1:])
    goldens = {name: ids(Path(folder)) for name, folder in folders.items()}
    goldens["real"].pop("chat_template", None)  # Google's
    lines = ",\n".join(
        f"{json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items())
        + "\n}"
        for name, golden in goldens.items()
    )
    Path(__file__).with_name("tokenizers.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
