"""Every class and function of the engine's module, called with what it does not take: an error of
Python or of the package, never the end of the process."""

from __future__ import annotations

from child_process import check_python

# What the children share: the objects of every class, in every state, and values of all kinds.
SUBJECTS = """
import inspect, itertools, os, random
import numpy as np
from tidaldecode import _core
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.config import DecodeConfig
from tidaldecode.engine_config import core_config, core_model, core_weights

folder = read_model_folder(tidaldecode.demo_model_dir())
settings = DecodeConfig(device="cpu", max_seq_len=128, max_batch_size=32, num_threads=1)

def new_decoder():
    return _core.Decoder(core_model(folder.model), core_config(settings, None, folder),
                         core_weights(folder))

decoder = new_decoder()

def quantized_weight():
    entry = core_weights(folder)[0]
    scheme = ("float8", (1, 2))
    return _core.QuantizedWeight("a", [2, 2], *scheme, entry, entry, None, 0, False, None, "")

def params():
    made = _core.SamplingParams()
    made.max_new_tokens = 3
    return made

def generation():
    return decoder.start([[5, 6]], [params()])

def end(made):
    while not made.done:
        made.advance()
    return made

def scored():
    params = _core.SamplingParams()
    params.max_new_tokens = 1
    made = end(new_decoder().start([[5, 6]], [params], logprobs=2))
    return made.results()[0].logprobs[0]

def finished():
    return end(generation())

def replay():
    made = decoder.start_replay([[5, 6]], 4)
    end(made.read())
    return made

eventfd = os.eventfd(0, os.EFD_NONBLOCK)

def inbox():
    return decoder.open_inbox(eventfd)

def session():
    return decoder.start_session(64)

def closed(make):
    made = make()
    made.close()
    return made

# A class without an entry fails the test.
MAKERS = {
    "RopeConfig": [_core.RopeConfig],
    "LayerConfig": [_core.LayerConfig],
    "ModelConfig": [_core.ModelConfig],
    "PlanConfig": [_core.PlanConfig],
    "DecodeConfig": [_core.DecodeConfig],
    "SamplingParams": [params],
    "WeightFileEntry": [lambda: core_weights(folder)[0]],
    "QuantizedWeight": [quantized_weight],
    "Verification": [lambda: finished().results()[0].verification],
    "SequenceResult": [lambda: finished().results()[0]],
    "TokenLogprobs": [scored],
    "Generation": [generation, finished, lambda: closed(generation)],
    "Inbox": [inbox, lambda: closed(inbox)],
    "Session": [session, lambda: closed(session)],
    "GuideDesk": [lambda: decoder.guide_desk(), lambda: closed(decoder.guide_desk)],
    "Replay": [replay, lambda: closed(replay)],
    "Decoder": [lambda: decoder, lambda: closed(new_decoder)],
}
classes = {name: value for name, value in vars(_core).items() if inspect.isclass(value)}
functions = {name: value for name, value in vars(_core).items()
             if callable(value) and not inspect.isclass(value)}
assert classes.keys() == MAKERS.keys(), classes.keys() ^ MAKERS.keys()

class Raises:
    def __index__(self): raise ZeroDivisionError("index")
    def __float__(self): raise ZeroDivisionError("float")
    def __len__(self): raise ZeroDivisionError("len")
    def __iter__(self): raise ZeroDivisionError("iter")
    def __getitem__(self, key): raise ZeroDivisionError("item")
    def __bool__(self): raise ZeroDivisionError("bool")

BAD = [
    None, True, -1, 0, 3, 2**31, 2**32 - 1, 2**63, -(2**63) - 1, 2**200, 1.5, float("nan"), 1j,
    "", "x", "stop", "auto", "\\ud800", b"\\xff", [], [[]], [[-1]], [[2**31]], [2**70], ["x"],
    [None], [[["x"]]], [Raises()], {}, {1: 2}, object(), Raises(), lambda *_: None, type,
    np.zeros(3), np.zeros((2, 2), "i8"), np.array(["x"]), np.array([2**40]), np.float32(1),
    np.int8(3), iter([1]), range(3),
]
ALLOWED = (TypeError, ValueError, TidalError, ZeroDivisionError)  # the last of Raises

def tolerate(action):
    "Runs it; whatever it raises is of a kind that is allowed."
    try:
        action()
    except ALLOWED:
        pass
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error

def methods(name):
    return [key for key, value in inspect.getmembers(classes[name])
            if (not key.startswith("_") or key == "__init__") and callable(value)]

def properties(name):
    return [key for key, value in inspect.getmembers(classes[name]) if isinstance(value, property)]

def objects(name):
    return [make() for make in MAKERS[name]]

def uninitialised(name):
    return classes[name].__new__(classes[name])
"""


def test_wrong_types_and_counts():
    out = check_python(
        SUBJECTS
        + """
rng = random.Random(7)
calls = 0
for name in classes:
    for made in [*objects(name), uninitialised(name)]:
        for key in methods(name):
            if name == "Decoder" and made is decoder and key in ("close", "__init__"):
                continue
            lists = [[], *([one] for one in BAD)]
            values = [*BAD, *objects(name)]
            lists += [rng.choices(values, k=rng.choice([2, 2, 3, 3, 4, 5])) for _ in range(120)]
            for arguments in lists:
                tolerate(lambda: getattr(made, key)(*arguments))
                calls += 1
            tolerate(lambda: getattr(made, key)(wrong=1))
    for arguments in [[], *([one] for one in BAD)]:
        tolerate(lambda: classes[name](*arguments))
for key, function in functions.items():
    for arguments in [[], *([one] for one in BAD), *itertools.product(BAD[:8], BAD[20:])]:
        tolerate(lambda: function(*arguments))
        calls += 1
want = finished().results()[0].token_ids
assert len(want) == 3
print(calls)
""",
        timeout=300,
    )
    assert int(out) > 5000


def test_calls_that_are_right_but_for_one_argument():
    check_python(
        SUBJECTS
        + """
RIGHT = {
    decoder.start: ([[5, 6]], [params()]),
    decoder.start_session: (64,),
    decoder.start_replay: ([[5, 6]], 4),
    decoder.score: ([5, 6], 1, 1),
    decoder.measure_steps: ([5], 1, 0, "auto"),
    decoder.selection: (0,),
    generation().stop: (0, "stop"),
    decoder.open_inbox: (eventfd,),
    inbox().add: (generation(), 1),
    inbox().remove: (generation(),),
    decoder.guide_desk().wait: (0.01,),
    decoder.guide_desk().answer: ([(1, 1, b"", True, "")],),
    session().append: ([5],),
    session().start: ([5], params(), None),
    session().truncate: (0,),
    replay().step_logits: (core_config(settings, None, folder), [[5]]),
    replay().greedy: (core_config(settings, None, folder), 3, [1]),
    _core.read_weights: (core_weights(folder),),
    _core.plan_memory: (core_model(folder.model), core_config(settings, None, folder), None),
    _core.Decoder: (core_model(folder.model), core_config(settings, None, folder), None, None),
    _core.WeightFileEntry: ("a", "float32", [1], "path", 0, (1, 2, 3, 4), [], ""),
    _core.QuantizedWeight: ("a", [2, 2], "float8", (1, 2), core_weights(folder)[0],
                            core_weights(folder)[1], None, 0, False, None, ""),
}
def as_number(value):
    "What may be taken for a number: before numpy 2.4 an array of one, too."
    try:
        return int(value)
    except Exception:
        return 0

for call, arguments in RIGHT.items():
    for index in range(len(arguments)):
        for bad in BAD:
            # Numbers of steps are taken at their word.
            if call == decoder.measure_steps and as_number(bad) > 3:
                continue
            changed = [*arguments]
            changed[index] = bad
            tolerate(lambda: call(*changed))
assert len(finished().results()[0].token_ids) == 3
""",
        timeout=200,
    )


def test_properties_of_every_object():
    check_python(
        SUBJECTS
        + """
for name in classes:
    for made in [*objects(name), uninitialised(name)]:
        for key in properties(name):
            tolerate(lambda: getattr(made, key))
            for bad in BAD:
                try:
                    tolerate(lambda: setattr(made, key, bad))
                except AssertionError as error:
                    assert isinstance(error.__cause__, AttributeError), error  # read only
"""
    )


def test_what_was_never_initialised_is_refused():
    check_python(
        SUBJECTS
        + """
for name in classes:
    for key in properties(name):
        refused(TypeError, lambda: getattr(uninitialised(name), key))
    class Derived(classes[name]):
        def __init__(self): pass
    refused(TypeError, Derived)
refused(TypeError, lambda: decoder.start([[5]], [uninitialised("SamplingParams")]))
model = uninitialised("ModelConfig")
refused(TypeError, lambda: _core.plan_memory(model, _core.DecodeConfig(), None))
"""
    )


def test_what_was_started_outlives_its_decoder():
    check_python(
        SUBJECTS
        + """
for make in (generation, session, replay):
    decoder = new_decoder()
    made = make()
    del decoder
    gc.collect()
    if make is generation:
        while not made.done:
            made.advance()
        assert len(made.results()[0].token_ids) == 3
    elif make is session:
        reading = made.append([5, 6])
        while not reading.done:
            reading.advance()
        assert made.fork().token_ids() == [5, 6]
    else:
        ended = end(made.greedy(core_config(settings, None, folder), 3, []))
        assert len(ended.results()[0].token_ids) == 3
    made.close()
"""
    )
