"""The calls of the soak: one function a kind, each with a few variants whose outcome is known.

A function gets a decoder and the number of its variant, and returns what must be the same whenever
and beside whatever it runs: soak.py asks each once, alone, and then all of them from many threads.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

from tidaldecode import Decoder, InvalidArgument, TidalError

VARIANTS = 6
_NEW_TOKENS = 6
_TEXTS = (
    "The sky over the harbour was",
    "Configuration files are read from",
    "x",
    "Ünïcödé 日本語 🎉 and numbers 12345",
    "def main():\n    return",
    "The special magic number for parity-dequeue is 4307748. " * 3,
)

Call = Callable[[Decoder, int], Any]


def _ids(variant: int, count: int = 0) -> list[int]:
    """Token ids of a prompt, from 3 to 90 of them, which the demo model is sure how to continue: a
    prompt read beside others is so to rounding, which tips what is nearly a tie."""
    draw = random.Random(270 + variant)
    return [draw.randrange(3, 8000) for _ in range(count or (3, 17, 40, 64, 31, 90)[variant])]


def _messages(variant: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": _TEXTS[variant]}]


def _greedy(**more: Any) -> dict[str, Any]:
    return {"max_new_tokens": _NEW_TOKENS, "temperature": 0, "ignore_eos": True} | more


def generate_ids(decoder: Decoder, variant: int) -> Any:
    return decoder.generate(_ids(variant), **_greedy()).token_ids


def generate_text(decoder: Decoder, variant: int) -> Any:
    result = decoder.generate(_TEXTS[variant], **_greedy())
    return result.text, result.finish_reason


def generate_batch(decoder: Decoder, variant: int) -> Any:
    prompts = [_ids((variant + i) % VARIANTS) for i in range(3)]
    return [result.token_ids for result in decoder.generate(prompts, **_greedy())]


def sample(decoder: Decoder, variant: int) -> Any:
    settings = _greedy(temperature=0.9, top_p=0.9, top_k=50, min_p=0.01, seed=variant)
    return decoder.generate(_ids(variant), **settings).token_ids


def stop_string(decoder: Decoder, variant: int) -> Any:
    result = decoder.generate(_TEXTS[variant], **_greedy(stop=["e", "a", "\n"]))
    return result.text, result.finish_reason, result.stop_reason


def should_stop(decoder: Decoder, variant: int) -> Any:
    asked = iter(range(variant))
    stopped = _greedy(should_stop=lambda: next(asked, None) is None)
    result = decoder.generate(_ids(variant), **stopped)
    # It is asked at least for every token, so the call may end sooner: with what it had by then.
    count = len(result.token_ids)
    is_known = result.token_ids == generate_ids(decoder, variant)[:count]
    return is_known, count <= variant, result.finish_reason


def stream_read(decoder: Decoder, variant: int) -> Any:
    stream = decoder.stream(_TEXTS[variant], **_greedy())
    pieces = "".join(stream)
    assert stream.result is not None and stream.result.text == pieces
    return pieces


def stream_closed(decoder: Decoder, variant: int) -> Any:
    with decoder.stream(_ids(variant), **_greedy()) as stream:
        piece = next(stream, None)
    assert stream.result is not None
    return piece, stream.result.token_ids, stream.result.finish_reason


def stream_dropped(decoder: Decoder, variant: int) -> Any:
    stream = decoder.stream(_ids(variant), **_greedy())
    return [next(stream, None) for _ in range(variant % 3)]


def submitted(decoder: Decoder, variant: int) -> Any:
    requests = [decoder.submit(_ids((variant + i) % VARIANTS), **_greedy()) for i in range(3)]
    return [request.result(60).token_ids for request in reversed(requests)]


def submitted_and_left(decoder: Decoder, variant: int) -> Any:
    request = decoder.submit(_ids(variant), **_greedy())
    if variant % 2:
        request.cancel()
    return None


def session_turns(decoder: Decoder, variant: int) -> Any:
    with decoder.session() as session:
        session.append(_ids(variant))
        first = session.generate(_TEXTS[variant], **_greedy()).token_ids
        more = session.generate(**_greedy()).token_ids
        session.truncate(len(session) - 2 * _NEW_TOKENS)
        again = session.generate(**_greedy(max_new_tokens=2 * _NEW_TOKENS)).token_ids
        return first, more, again, len(session)


def session_fork(decoder: Decoder, variant: int) -> Any:
    session = decoder.session()
    session.append(_ids(variant))
    fork = session.fork()
    answers = [s.generate(_ids(variant, 5), **_greedy()).token_ids for s in (session, fork)]
    if variant % 2:
        fork.close()
    session.close()
    return answers  # every other fork is dropped, not closed


def session_stream(decoder: Decoder, variant: int) -> Any:
    with decoder.session() as session:
        stream = session.stream(_ids(variant), **_greedy())
        piece = next(stream, None)
        stream.close()
        return piece, len(session)


def chat(decoder: Decoder, variant: int) -> Any:
    return decoder.chat(_messages(variant), **_greedy()).text


def session_chat(decoder: Decoder, variant: int) -> Any:
    messages = _messages(variant)
    with decoder.session() as session:
        answer = session.chat(messages, **_greedy()).text
        messages += [{"role": "assistant", "content": answer}, *_messages((variant + 1) % VARIANTS)]
        result = session.chat(messages, **_greedy())
        return answer, result.text, result.cached_tokens


def logits(decoder: Decoder, variant: int) -> Any:
    return decoder.logits(_ids(variant), 2).tobytes()


def step_logits(decoder: Decoder, variant: int) -> Any:
    return decoder.step_logits(_ids(variant), 2).argmax(-1).tolist()


def selection(decoder: Decoder, variant: int) -> Any:
    """Which call was the last is not known here: only what every selection must be is checked."""
    for layer, chosen in decoder.selection().items():
        assert 0 <= layer < decoder.model.num_layers
        assert ((chosen >= -1) & (chosen < decoder.config.max_seq_len)).all()


def encode_decode(decoder: Decoder, variant: int) -> Any:
    ids = decoder.encode(_TEXTS[variant])
    assert decoder.decode(ids) == _TEXTS[variant]
    return ids


def look_inside(decoder: Decoder, variant: int) -> Any:
    assert 0 <= decoder.num_free_pages <= decoder.config.num_pages
    return decoder.plan, decoder.plan_source, str(decoder.memory_plan())


def bad_argument(decoder: Decoder, variant: int) -> Any:
    """Returns the error's type and words."""
    wrong: list[Callable[[], Any]] = [
        lambda: decoder.generate([10**12]),
        lambda: decoder.generate("x", temperature=float("nan")),
        lambda: decoder.generate([1, 2], max_new_tokens=10**6),
        lambda: decoder.stream(None),
        lambda: decoder.chat([{"role": "user"}]),
        lambda: decoder.session(max_seq_len=-1),
    ]
    try:
        wrong[variant]()
    except InvalidArgument as error:
        return type(error).__name__, str(error)
    raise AssertionError("a wrong argument was taken")


CALLS: tuple[Call, ...] = (
    generate_ids, generate_text, generate_batch, sample, stop_string, should_stop, stream_read,
    stream_closed, stream_dropped, submitted, submitted_and_left, session_turns, session_fork,
    session_stream, chat, session_chat, logits, step_logits, selection, encode_decode,
    look_inside, bad_argument,
)  # fmt: skip


def shared_stream(decoder: Decoder, variant: int) -> Any:
    """Two threads read a stream, and a third closes it: each gets text or a typed error."""
    stream = decoder.stream(_ids(variant), **_greedy())
    errors: list[BaseException] = []

    def use(action: Callable[[], Any]) -> None:
        try:
            action()
        except TidalError:
            pass
        except BaseException as error:
            errors.append(error)

    actions = (lambda: list(stream), lambda: list(stream), stream.close)
    threads = [threading.Thread(target=use, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return stream.result is not None
