"""Conversations: what is read, refused and held out; packed whole and without leaks."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from goldens.tokenizer_cases import CHATS

from gemma_jax.data.chat import mark_chat
from gemma_jax.data.conversations import Conversations, read_all, read_conversations
from gemma_jax.data.loader import conversation_stream
from gemma_jax.data.packed_conversations import PackedConversations
from gemma_jax.data.tokenizer import END_OF_TURN, Tokenizer
from gemma_jax.errors import UserError

SEQ_LEN = 64


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(Path(__file__).parents[1] / "goldens" / "tokenizer_tiny.model")


def lines(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def turns(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture
def packed(tmp_path: Path, tokenizer: Tokenizer) -> PackedConversations:
    rows = [{"prompt": f"number {i}", "completion": "x" * (i % 17 + 1)} for i in range(60)]
    data = Conversations(sources=(lines(tmp_path / "a.jsonl", rows),), valid_fraction=0.2)
    found = read_conversations(data, tokenizer, SEQ_LEN)
    assert 12 <= len(found.valid) < 30
    assert len(found.valid) + len(found.train) == 60
    return PackedConversations(found.train, SEQ_LEN, seed=3)


def test_labels_and_masks_are_those_of_the_chat(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Every segment of every sequence is one whole conversation, with positions from 0."""
    chats = [chat for chat in CHATS if any(m["role"] in ("assistant", "model") for m in chat)]
    chats = [chat for chat in chats if all(m["content"].strip() for m in chat)]
    assert len(chats) > 1
    path = lines(tmp_path / "a.jsonl", [{"messages": chat} for chat in chats])
    data = Conversations(sources=(path,), valid=(path,))
    found = read_conversations(data, tokenizer)
    stream = PackedConversations(found.train, 300, seed=0)
    batch = stream.read(range(stream.count(1)))
    seen = []
    for row in range(len(batch["tokens"])):
        assert (batch["segment_ids"][row] == 0).sum() == 300 - np.count_nonzero(
            batch["segment_ids"][row]
        )
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            where = batch["segment_ids"][row] == segment
            ids = [*batch["tokens"][row][where], batch["labels"][row][where][-1]]
            assert batch["labels"][row][where].tolist() == ids[1:]
            assert batch["positions"][row][where].tolist() == list(range(len(ids) - 1))
            seen.append((tuple(ids), tuple(batch["loss_mask"][row][where].tolist())))
    wanted = []
    for chat in chats:
        ids, spoken = zip(*mark_chat(tokenizer, chat), strict=True)
        wanted.append((ids, tuple(map(float, spoken[1:]))))
    assert sorted(seen) == sorted(wanted)
    assert not batch["loss_mask"][batch["segment_ids"] == 0].any()


def test_prompts_and_completions_may_be_lists_of_messages(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """The same ids as all messages in one; labels are those of the completion."""
    chat = turns("a", "b", "c", "d", "e", "f")
    system = {"role": "system", "content": "s"}
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": turns("a"), "completion": turns("a", "b")[1:], "tag": 3},
        {"prompt": chat[:3], "completion": "d"},
        {"prompt": [system, *chat[:3]], "completion": chat[3:]},
    ]
    path = lines(tmp_path / "a.jsonl", rows)
    text, listed, later, long = read_all((path,), tokenizer)
    np.testing.assert_array_equal(text.ids, listed.ids)
    np.testing.assert_array_equal(text.spoken, listed.spoken)
    assert listed.row["tag"] == 3
    assert listed.row["messages"] == turns("a", "b")
    for one, messages, answers in ((later, chat[:4], "d"), (long, [system, *chat], "df")):
        ids, spoken = zip(*mark_chat(tokenizer, messages), strict=True)
        assert one.ids.tolist() == list(ids)
        labels = [i for i, mine in zip(one.ids.tolist(), one.spoken, strict=True) if mine]
        said = "".join(tokenizer.decode([i]) for i in labels if i != END_OF_TURN)
        assert said.replace(" ", "") == answers
        assert labels.count(END_OF_TURN) == len(answers)
        assert not (one.spoken & ~np.array(spoken)).any()


def test_every_conversation_comes_once_an_epoch(packed: PackedConversations) -> None:
    once = Counter(tuple(ids) for ids in packed._ids)
    orders = []
    for epoch in range(3):
        first, last = packed.count(epoch), packed.count(epoch + 1)
        batch = packed.read(range(first, last))
        ends = (batch["labels"] == END_OF_TURN) & (batch["loss_mask"] > 0)
        assert ends.sum() == sum(once.values())
        filled = np.sort(np.count_nonzero(batch["segment_ids"], axis=1))
        assert filled[0] + filled[1] > SEQ_LEN  # else the two would have been one
        orders.append(batch["tokens"].tobytes())
    assert len(set(orders)) == 3


def test_the_most_conversations_of_a_sequence_are_known_beforehand(packed: PackedConversations):
    for count in (1, packed.count(1), packed.count(2) + 1):
        epochs = next(n for n in range(4) if packed.count(n) >= count)
        rows = packed.read(range(packed.count(epochs)))["segment_ids"]
        runs = max(1 + int(np.count_nonzero(np.diff(row))) for row in rows)
        assert packed.most_documents(count) == runs


def test_a_sequence_does_not_depend_on_what_was_read_before(packed: PackedConversations) -> None:
    number = packed.count(2) + 1
    fresh = PackedConversations.__new__(PackedConversations)
    fresh.__dict__.update(packed.__dict__)
    later = packed.read([number])
    again = packed.read([0, number])
    for name, rows in later.items():
        np.testing.assert_array_equal(rows[0], again[name][1])


def test_hosts_share_a_batch_and_the_last_one_is_padded(packed: PackedConversations) -> None:
    count = packed.count(1)
    size = {"batch_size": 4, "num_batches": -(-count // 4), "limit": count}
    whole = list(conversation_stream(packed, **size))
    parts = [list(conversation_stream(packed, **size, rows=rows)) for rows in ((0, 1), (2, 3))]
    for batch, *own in zip(whole, *parts, strict=True):
        for name, rows in batch.items():
            np.testing.assert_array_equal(rows, np.concatenate([part[name] for part in own]))
    rows = np.concatenate([batch["segment_ids"] for batch in whole])
    assert (rows.max(axis=1) > 0).tolist() == [True] * count + [False] * (len(rows) - count)


def test_a_stream_goes_on_where_it_was(packed: PackedConversations) -> None:
    size = {"batch_size": 2, "num_batches": 30}
    stream = iter(conversation_stream(packed, **size))
    for _ in range(11):
        next(stream)
    resumed = iter(conversation_stream(packed, **size))
    resumed.set_state(stream.get_state())
    for name, rows in next(stream).items():
        np.testing.assert_array_equal(rows, next(resumed)[name] if name == "tokens" else rows)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("{", r"line 2 is not JSON"),
        ([1], r"line 2 must have either a list `messages`.*it has: list"),
        ({"text": "x"}, r"line 2 must have either.*it has: text"),
        ({"prompt": "x"}, r"line 2 must have either"),
        ({"prompt": "x", "completion": 3}, r"line 2 must have either"),
        ({"prompt": [], "completion": "b"}, r"line 2: the prompt must end with .* the user .*None"),
        (
            {"prompt": turns("a", "b"), "completion": "c"},
            r"line 2: the prompt must end with a message of the user .*assistant",
        ),
        (
            {"prompt": "a", "completion": turns("b")},
            r"line 2: the completion must begin with a message of the assistant .*user",
        ),
        (
            {"prompt": [*turns("a"), *turns("b")], "completion": "c"},
            r"line 2: message 2 is of the user, but the assistant speaks there",
        ),
        (
            {"prompt": "a", "completion": [{"role": "assistant", "content": " "}]},
            r"line 2: message 2 is empty",
        ),
        ({"messages": []}, r"line 2: the conversation has no user message"),
        ({"messages": turns("a")}, r"line 2: the conversation has no turn of the assistant"),
        ({"messages": turns("a", "b")[::-1]}, r"line 2: message 1 is of the assistant"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            r"line 2: message 1 has the role 'tool'",
        ),
        ({"messages": turns("a", "  ")}, r"line 2: message 2 is empty"),
        ({"prompt": "x", "completion": ""}, r"line 2: message 2 is empty"),
        (
            {"messages": [*turns("a", "b"), *turns("c"), *turns("d")]},
            r"line 2: message 4 is of the",
        ),
        ({"prompt": "x", "completion": "\ud800"}, r"line 2: message 2 holds half a surrogate"),
        (
            '{"prompt": "x", "completion": "y", "prompt": "z"}',
            r"line 2 has 'prompt' twice in one object",
        ),
        (
            {"messages": [*turns("a"), {**turns("", "b")[1], "weight": 0}]},
            r"line 2: message 2 has weight=0, but all turns of the assistant count alike",
        ),
        (
            {"messages": [*turns("a"), {**turns("", "b")[1], "tool_calls": [{"id": 1}]}]},
            r"line 2: message 2 has tool_calls, for which Gemma's chat format has no place",
        ),
        ({"prompt": "x", "completion": "y" * 200}, r"line 2: the conversation is .* tokens long"),
    ],
)
def test_bad_lines_are_refused(tmp_path: Path, tokenizer: Tokenizer, row: object, match: str):
    path = tmp_path / "bad.jsonl"
    text = row if isinstance(row, str) else json.dumps(row)
    path.write_text(json.dumps({"prompt": "fine", "completion": "ok"}) + "\n" + text + "\n")
    with pytest.raises(UserError, match=match) as caught:
        read_conversations(Conversations(sources=(str(path),)), tokenizer, SEQ_LEN)
    assert str(path) in str(caught.value)


def test_windows_files_are_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A byte order mark, CR LF between lines, and what only Python takes for the end of one."""
    rows = [{"prompt": "a\u2028b\x85c", "completion": "d\r\ne"}, {"messages": turns("f", "g")}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n")
    first, second = read_all((str(tmp_path / "a.jsonl"),), tokenizer)
    assert first.row["messages"] == turns("a\u2028b\x85c", "d\r\ne")
    assert second.row["messages"] == turns("f", "g")


def test_long_ones_are_cut_on_request(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture
) -> None:
    rows = [
        {"prompt": "x", "completion": "y " * 200},
        {"prompt": "z " * 200, "completion": "never reached"},
        {"prompt": "fine", "completion": "ok"},
    ]
    path = lines(tmp_path / "a.jsonl", rows)
    data = Conversations(sources=(path,), valid=(path,), too_long="cut")
    found = read_conversations(data, tokenizer, SEQ_LEN)
    assert len(found.train[0].ids) == SEQ_LEN + 1
    assert len(found.train) == 2
    assert "1 conversation(s)" in capsys.readouterr().err


def test_what_is_held_out_does_not_depend_on_the_order(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows = [{"prompt": f"q{i}", "completion": f"a{i}", "label": i} for i in range(40)]
    held = []
    for name, order in (("a", rows), ("b", rows[::-1])):
        data = Conversations(sources=(lines(tmp_path / f"{name}.jsonl", order),))
        held.append({one.row["label"] for one in read_conversations(data, tokenizer).valid})
    assert held[0] == held[1] != set()
    with pytest.raises(UserError, match=r"no conversation of .* is held out"):
        read_conversations(
            Conversations(sources=(str(tmp_path / "a.jsonl"),), valid_fraction=0.0), tokenizer
        )
