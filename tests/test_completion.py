"""Text in, text out: stop strings, streams, batches and conversations of a small random model."""

import pytest
from models import TOKENIZER, config, make_run

from gemma_jax.completion import Conversation, TextGenerator
from gemma_jax.data.tokenizer import BOS, END_OF_TURN, EOS, Tokenizer
from gemma_jax.errors import UserError
from gemma_jax.generation.sampling import Sampling
from gemma_jax.generation.text import Writer

SETTINGS = {"max_new_tokens": 12, "sampling": Sampling(temperature=0.8, top_k=20)}


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    small = config(
        embed_dim=32,
        mlp_dim=64,
        num_layers=2,
        head_dim=8,
        attn_pattern="LG",
        tied_embedding=False,
    )
    return TextGenerator(make_run(tmp_path_factory.mktemp("model") / "random", small))


def test_a_stream_says_what_a_batch_says(generator):
    prompts = ["def f(x):", "import", ""]
    results = generator.complete(prompts, seeds=[3, 4, 5], **SETTINGS)
    for prompt, seed, result in zip(prompts, (3, 4, 5), results, strict=True):
        pieces = list(generator.stream(prompt, seed=seed, **SETTINGS))
        assert "".join(pieces) == result.text
        assert len(pieces) > 1
        assert len(result.tokens) == len(result.logprobs) == 12
        assert generator.tokenizer.decode(result.tokens) == result.text


def test_a_stop_string_ends_a_text_before_it(generator):
    (whole,) = generator.complete(["import"], **SETTINGS)
    stop = whole.text[4:7]
    (cut,) = generator.complete(["import"], stop=["no such text", stop], **SETTINGS)
    assert cut.stopped
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert "".join(generator.stream("import", stop=[stop], **SETTINGS)) == cut.text


def test_a_conversation_is_one_text(generator):
    """Two turns in a kept cache, against each turn read anew from its ids."""
    greedy = Sampling(temperature=0.0)
    talk = Conversation(generator, max_new_tokens=6, sampling=greedy)
    answers = ["".join(talk.say(text)) for text in ("One?", "Two?")]
    other = Conversation(generator, max_new_tokens=6, sampling=greedy)
    assert "".join(other.say("One?")) == answers[0]
    other._state = None  # so that the second turn reads all of it again
    assert "".join(other.say("Two?")) == answers[1]
    assert talk._ids == other._ids
    assert talk._ids.count(BOS) == 1
    assert talk._ids.count(END_OF_TURN) >= 3


def test_a_conversation_that_fills_the_context_is_refused(generator):
    talk = Conversation(generator, max_new_tokens=200)
    with pytest.raises(UserError, match="leave the context of 256"):
        list(talk.say("word " * 40))


def test_characters_come_whole():
    tokenizer = Tokenizer.load(TOKENIZER)
    ids = tokenizer.encode("a🙂b")
    writer = Writer(tokenizer, ())
    pieces = [writer.add([token], [0.0]) for token in ids]
    assert "".join(pieces) == "a🙂b"
    assert not any("\ufffd" in piece for piece in pieces)
    broken = Writer(tokenizer, ())
    assert broken.add(ids[1:3], [0.0, 0.0]) + broken.rest() == "\ufffd"


def test_what_may_begin_a_stop_string_is_held_back():
    tokenizer = Tokenizer.load(TOKENIZER)
    writer = Writer(tokenizer, ["abc"])
    ids = [i for letter in "xaby" for i in tokenizer.encode(letter)]
    pieces = [writer.add([token], [0.0]) for token in ids] + [writer.rest()]
    assert "".join(pieces) == "xaby"
    assert pieces[2] == "x"
    ended = Writer(tokenizer, ())
    assert ended.add([*ids, EOS, *ids], [0.0] * 9) == "xaby"
    assert ended.stopped


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompts": ["\ud800"]}, "prompt 1: the prompt holds half a surrogate pair"),
        ({"prompts": ["a"], "stop": [""]}, "a stop string is empty"),
        ({"prompts": ["a"], "seeds": [1, 2]}, "2 seeds for 1 prompts"),
        ({"prompts": ["a", [{"role": "robot", "content": "x"}]]}, "prompt 2: message 1 .*robot"),
        (
            {"prompts": [[{"role": "user", "content": "\udc00"}]]},
            "prompt 1: message 1 holds half a surrogate pair",
        ),
        ({"prompts": ["a", "a " * 300]}, "prompt 2: a prompt of .* leave the model's context"),
        ({"prompts": ["a", "b"], "adapters": [None, "x"]}, "prompt 2: there is no adapter 'x'"),
    ],
)
def test_bad_requests_are_refused(generator, call, message):
    with pytest.raises(UserError, match=message):
        generator.complete(**call)
