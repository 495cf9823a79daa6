"""The process neither dies nor hangs and no token is wrong, whatever happens beside it: threads,
forks, the end of the interpreter, missing memory."""

from __future__ import annotations

import contextlib
import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from child_process import check_python, run_python
from tidaldecode import Decoder, InvalidArgument, TidalError, UnsupportedError, demo_model_dir
from tidaldecode.batch import make_request

IDS = list(range(5, 60))


@pytest.fixture(autouse=True)
def quick_switches() -> Iterator[None]:
    """Makes threads change places as often as Python allows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with Decoder(demo_model_dir(), device="cpu", max_seq_len=512, num_threads=1) as made:
        yield made


def run_all(*actions: Callable[[], object]) -> list[BaseException]:
    """Runs actions at once, each in a thread. Returns: what they raised."""
    errors: list[BaseException] = []

    def run(action: Callable[[], object]) -> None:
        barrier.wait()
        try:
            action()
        except BaseException as error:
            errors.append(error)

    barrier = threading.Barrier(len(actions))
    threads = [threading.Thread(target=run, args=[action]) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    return errors


class TestThreads:
    def test_two_threads_read_one_stream(self, decoder: Decoder):
        want = decoder.generate(IDS, max_new_tokens=24, ignore_eos=True)
        for _ in range(10):
            stream = decoder.stream(IDS, max_new_tokens=24, ignore_eos=True)
            pieces: list[str] = []
            errors = run_all(*[lambda s=stream, p=pieces: p.extend(s)] * 3)
            assert not errors
            assert stream.token_ids == list(want.token_ids)
            assert stream.result is not None and stream.result.text == want.text
            assert sorted("".join(pieces)) == sorted(want.text)

    def test_one_thread_closes_a_stream_that_others_read(self, decoder: Decoder):
        free = decoder.num_free_pages
        want = decoder.generate(IDS, max_new_tokens=200, ignore_eos=True)
        for _ in range(20):
            stream = decoder.stream(IDS, max_new_tokens=200, ignore_eos=True)
            assert not run_all(lambda s=stream: list(s), lambda s=stream: list(s), stream.close)
            assert stream.result is not None
            count = len(stream.result.token_ids)
            assert stream.result.token_ids == want.token_ids[:count]
            assert decoder.num_free_pages == free

    def test_a_session_is_closed_while_others_use_it(self, decoder: Decoder):
        free = decoder.num_free_pages
        for _ in range(10):
            session = decoder.session()
            session.append(IDS)
            errors = run_all(
                lambda s=session: s.append(IDS * 4),
                lambda s=session: s.generate(IDS, max_new_tokens=20),
                lambda s=session: list(s.stream(max_new_tokens=20)),
                lambda s=session: s.fork().close(),
                lambda s=session: s.token_ids,
                session.close,
            )
            assert all(isinstance(error, InvalidArgument) for error in errors), errors
            assert decoder.num_free_pages == free

    def test_a_stream_that_begins_forgets_nothing_of_others(
        self, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
    ):
        session, appended = decoder.session(), threading.Event()

        def append() -> None:
            with contextlib.suppress(InvalidArgument):  # the stream runs
                session.append([7, 8, 9])
                appended.set()

        other = threading.Thread(target=append)

        def make_late(*args: object) -> object:
            other.start()
            appended.wait(0.5)  # as long as a thread may have to wait for its turn
            return make_request(*args)

        session.append(IDS)
        monkeypatch.setattr("tidaldecode.session.make_request", make_late)
        list(session.stream([5], max_new_tokens=1, ignore_eos=True))
        other.join()
        assert len(session) == len(IDS) + 2 + 3 * appended.is_set()

    def test_a_decoder_is_closed_while_others_use_it(self):
        for _ in range(6):
            decoder = Decoder(demo_model_dir(), device="cpu", max_seq_len=512, max_batch_size=4)
            session, stream = decoder.session(), decoder.stream(IDS, max_new_tokens=300)
            replay = decoder.replay([IDS], max_new_tokens=30)
            errors = run_all(
                lambda d=decoder: d.generate([IDS] * 3, max_new_tokens=100, ignore_eos=True),
                lambda s=session: s.generate(IDS, max_new_tokens=100),
                lambda s=stream: list(s),
                lambda d=decoder: list(d.stream(IDS, max_new_tokens=100)),
                lambda d=decoder: d.measure_steps(100, steps=200),
                lambda d=decoder: [d.selection() for _ in range(100)],
                lambda d=decoder: d.step_logits(IDS, 5),
                lambda r=replay: r.greedy(30),
                lambda d=decoder: d.session(),
                lambda d=decoder: [repr(d) for _ in range(100)],
                decoder.close,
                decoder.close,
            )
            assert all(isinstance(error, InvalidArgument) for error in errors), errors
            assert "closed" in repr(decoder)

    def test_a_generator_ends_when_its_decoder_does(self, decoder: Decoder):
        stream = decoder.stream(IDS, max_new_tokens=100, ignore_eos=True)
        next(stream)
        decoder.close()
        assert list(stream) == []
        assert stream.result is not None and stream.result.finish_reason == "abort"

    def test_a_callback_closes_what_calls_it(self, decoder: Decoder):
        stream = decoder.stream(IDS, max_new_tokens=9, on_prefill=lambda *_: stream.close())
        assert list(stream) == []

        def close_and_say(says: bool) -> bool:
            stream.close()
            return says

        for says in (True, False):
            stream = decoder.stream(IDS, max_new_tokens=9, should_stop=partial(close_and_say, says))
            assert list(stream) == [] and stream.result.finish_reason == "abort"
        session = decoder.session()
        with pytest.raises(InvalidArgument, match="session: it is closed"):
            session.append(IDS, on_prefill=lambda *_: session.close())
        with pytest.raises(InvalidArgument, match="decoder: it is closed"):
            decoder.generate(IDS, max_new_tokens=9, on_prefill=lambda *_: decoder.close())


BUSY = {
    "generates": "decoder.generate(IDS, max_new_tokens=1900, ignore_eos=True)",
    "streams": "list(decoder.stream(IDS, max_new_tokens=1900, ignore_eos=True))",
    "is called back": "decoder.generate(IDS, max_new_tokens=1900, ignore_eos=True, "
    "should_stop=lambda: False)",
    "converses": "decoder.session().generate(IDS, max_new_tokens=1900, ignore_eos=True)",
    "loads": "make(progress=lambda *_: time.sleep(0.001))",
    "reads": "decoder.logits(IDS * 35)",
    "measures": "decoder.measure_steps(1000, steps=10**6)",
    "plays": "decoder.replay([IDS], max_new_tokens=1900).greedy(1900)",
}

ENDS = {
    "": 0,
    "sys.exit(3)": 3,
    "raise RuntimeError('of the program')": 1,
    "os.kill(os.getpid(), signal.SIGINT); time.sleep(5)": -2,
}


class TestExit:
    def exits(self, busy: str, end: str, code: int) -> None:
        done = run_python(f"""
            decoder = make()
            decoder.generate([5], max_new_tokens=1)
            begun = threading.Event()

            def work():
                while True:
                    begun.set()
                    {busy}

            for _ in range(3):
                threading.Thread(target=work, daemon=True).start()
            begun.wait()
            time.sleep(0.2)
            {end}
        """)
        assert done.returncode == code, done.stderr
        for word in ("terminate", "Fatal", "Thread-", "exception not rethrown"):
            assert word not in done.stderr

    @pytest.mark.parametrize("busy", BUSY.values(), ids=list(BUSY))
    def test_while_a_daemon_thread(self, busy: str):
        self.exits(busy, "", 0)

    def test_while_arrays_are_looked_up_for_the_first_time(self):
        done = run_python("""
            import numpy

            begun = threading.Event()
            made = numpy.lib.NumpyVersion

            def slow(version):
                begun.set()
                for _ in range(50):
                    time.sleep(0.01)
                return made(version)

            numpy.lib.NumpyVersion = slow
            threading.Thread(target=lambda: make().logits(IDS), daemon=True).start()
            assert begun.wait(60)
        """)
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.parametrize("end", list(ENDS)[1:])
    def test_by(self, end: str):
        self.exits(BUSY["streams"], end, ENDS[end])

    def test_what_the_program_does_at_its_end_still_runs(self):
        out = check_python("""
            decoder = make()
            stream = decoder.stream(IDS, max_new_tokens=1900)
            threading.Thread(target=lambda: list(stream), daemon=True).start()

            def last():
                print(len(decoder.generate(IDS, max_new_tokens=3, ignore_eos=True).token_ids))
                decoder.close()
                print("closed")

            atexit.register(last)
        """)
        assert out.split() == ["3", "closed"]


class TestFork:
    def test_what_was_made_before_is_refused_and_the_parent_goes_on(self):
        check_python("""
            decoder = make()
            session, replay = decoder.session(), decoder.replay([IDS], max_new_tokens=5)
            session.append(IDS)
            want = decoder.generate(IDS, max_new_tokens=8).token_ids
            stream = decoder.stream(IDS, max_new_tokens=8)
            request = decoder.submit(IDS, max_new_tokens=8)
            next(stream)

            def child():
                for action in (
                    lambda: decoder.generate(IDS, max_new_tokens=2),
                    lambda: decoder.stream(IDS, max_new_tokens=2),
                    lambda: decoder.session(),
                    lambda: decoder.logits(IDS),
                    lambda: decoder.step_logits(IDS, 3),
                    lambda: decoder.selection(),
                    lambda: decoder.measure_steps(9),
                    lambda: decoder.num_free_pages,
                    lambda: decoder.replay([IDS], max_new_tokens=2),
                    lambda: next(stream),
                    lambda: session.generate(max_new_tokens=2),
                    lambda: session.append(IDS),
                    lambda: session.token_ids,
                    lambda: session.fork(),
                    lambda: request.result(),
                    lambda: replay.greedy(2),
                    lambda: replay.read(),
                ):
                    refused(UnsupportedError, action)
                for thing in (session, request):
                    assert "another process" in repr(thing)
                for thing in (stream, session, replay, decoder):
                    thing.close()
                globals().update(stream=None, session=None, replay=None, decoder=None)
                gc.collect()

            assert in_child(child) == 0
            list(stream)
            assert stream.result.token_ids == want
            assert decoder.generate(IDS, max_new_tokens=8).token_ids == want
            assert len(session.generate(max_new_tokens=4).token_ids) == 4
        """)

    @pytest.mark.parametrize("threads", [1, 2])
    def test_a_child_makes_a_decoder_of_its_own(self, threads: int):
        check_python(f"""
            decoder = make(num_threads={threads})
            want = decoder.generate(IDS * 8, max_new_tokens=8).token_ids

            def child():
                own = make(num_threads={threads})
                assert own.generate(IDS * 8, max_new_tokens=8).token_ids == want
                def grandchild():
                    refused(UnsupportedError, lambda: own.generate(IDS, max_new_tokens=1))
                    assert make().generate(IDS * 8, max_new_tokens=8).token_ids == want
                assert in_child(grandchild) == 0

            assert in_child(child) == 0
            assert in_child(lambda: sys.exit(0)) == 0
        """)

    def test_while_other_threads_generate_and_load(self):
        check_python("""
            decoder = make()
            want = decoder.generate(IDS * 8, max_new_tokens=4).token_ids
            ending = threading.Event()

            def until_end(action):
                while not ending.is_set():
                    action()

            threads = [threading.Thread(target=until_end, args=[action]) for action in (
                lambda: decoder.generate(IDS * 8, max_new_tokens=4), make)]
            for thread in threads:
                thread.start()

            def child():
                refused(UnsupportedError, lambda: decoder.generate(IDS, max_new_tokens=1))
                assert make().generate(IDS * 8, max_new_tokens=4).token_ids == want

            codes = [in_child(child) for _ in range(8)]
            ending.set()
            for thread in threads:
                thread.join()
            assert codes == [0] * 8, codes
        """)

    def test_a_child_that_exits_as_python_does_waits_for_nobody(self):
        check_python("""
            decoder = make()
            threading.Thread(
                target=lambda: decoder.generate(IDS, max_new_tokens=1900, ignore_eos=True),
                daemon=True,
            ).start()
            time.sleep(0.2)
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                sys.exit(5)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
        """)

    def test_multiprocessing_with_the_method_fork(self):
        check_python("""
            decoder = make()
            want = decoder.generate(IDS, max_new_tokens=4).token_ids

            def work(_):
                refused(UnsupportedError, lambda: decoder.generate(IDS, max_new_tokens=4))
                return make().generate(IDS, max_new_tokens=4).token_ids

            with multiprocessing.get_context("fork").Pool(2) as pool:
                assert pool.map_async(work, range(4)).get(timeout=60) == [want] * 4
        """)

    def test_from_a_callback_of_the_loading(self):
        check_python("""
            codes = []
            def fork_once(done, total):
                if not codes:
                    codes.append(in_child(lambda: make().generate(IDS, max_new_tokens=2)))
            make(progress=fork_once).generate(IDS, max_new_tokens=2)
            assert codes == [0]
        """)


class TestCopies:
    """The copy of what is open closed it when it was dropped."""

    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
    def test_what_is_closed_is_not_copied(
        self, decoder: Decoder, copied: Callable[[object], object]
    ):
        want = decoder.generate(IDS, max_new_tokens=8, ignore_eos=True)
        with (
            decoder.session() as session,
            decoder.replay([IDS], max_new_tokens=2) as replay,
            decoder.stream(IDS, max_new_tokens=8, ignore_eos=True) as stream,
        ):
            for each in (decoder, session, replay, stream):
                with pytest.raises(UnsupportedError, match=f"{type(each).__name__}: .* share it"):
                    copied(each)
            assert "".join(stream) == want.text
            assert session.generate(IDS, max_new_tokens=8, ignore_eos=True).text == want.text


class TestMemory:
    def test_that_ends_after_the_loading(self):
        """OpenBLAS would end the process where it finds no memory for a buffer."""
        check_python("""
            prompt = [5] * 1200
            decoder = make(max_batch_size=1, max_seq_len=4096)
            decoder.logits([5, 6, 7])
            pages = int(open("/proc/self/statm").read().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 2_000_000,) * 2)
            first = decoder.logits(prompt)
            # 98 MB; a thread's heap, which is there already, has 64 MiB.
            refused(OutOfMemoryError, lambda: decoder.logits([5] * 3000, 3000))
            assert (decoder.logits(prompt) == first).all()
        """)

    @pytest.mark.parametrize("room", [0, 1, 4, 10, 20, 40, 70, 120, 200])
    def test_that_ends_while_loading(self, room: int):
        out = check_python(f"""
            make(num_threads=1).close()
            pages = int(open("/proc/self/statm").read().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + {room} * 10**6,) * 2)
            try:
                make(num_threads=8).logits(IDS * 20)
                print("loaded")
            except (OutOfMemoryError, MemoryError):
                print("typed")
        """)
        assert out.strip() in ("loaded", "typed")

    def test_plans_with_its_libraries(self, decoder: Decoder):
        assert decoder.memory_plan().scratch["buffers of OpenBLAS"] >= 2**20

    def test_more_threads_than_the_engine_takes(self):
        with pytest.raises(TidalError, match="num_threads: got 100000"):
            Decoder(demo_model_dir(), device="cpu", num_threads=100_000)


class TestNumberOfThreads:
    """By default; quotas are tested in tests/cpp/container_test.cc."""

    @pytest.mark.parametrize(
        ("before", "threads"),
        [
            ("os.environ['OMP_NUM_THREADS'] = '3'", 3),
            ("os.environ['OMP_NUM_THREADS'] = '3,2'", 3),
            ("os.environ['OMP_NUM_THREADS'] = '0'; os.sched_setaffinity(0, {least})", 1),
            ("os.environ.pop('OMP_NUM_THREADS', 0); os.sched_setaffinity(0, {least})", 1),
        ],
    )
    def test_follows_the_environment_and_the_affinity(self, before: str, threads: int):
        out = check_python(f"""
            from tidaldecode import _core

            def num_tasks(num_threads):
                with make(num_threads=num_threads) as decoder:
                    decoder.logits(IDS * 10)
                    return len(os.listdir("/proc/self/task"))

            least = min(os.sched_getaffinity(0))
            {before}
            print(_core.list_devices()[0]["hardware"])
            print(num_tasks(None) - num_tasks(1))
        """)
        hardware, started = out.splitlines()
        assert f", {threads} thread" in hardware
        assert int(started) == threads - 1
