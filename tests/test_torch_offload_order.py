"""Offloading: what waits for what. Transfers that are late, that are on their own threads, and that fail."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import gradstep.torch
from gradstep.torch.offload import BrokenStepError, CudaTransfers, HostTransfers

from .stage_cases import case_of
from .test_torch_offload import assert_same, copies, parameters, set_grads
from .torch_cases import make

SHAPES = [(3000,), (40,), (50, 3), (9000,), (7,), (2500,)]
CHUNK = 8192


class Late:
    """Copies that are made when somebody waits for them, and no sooner: whoever does not wait gets what was there before.

    What goes up must be, when it goes, what it was when it was queued.
    """

    def __init__(self, device: Any, log: list[Any] | None = None, *, drains: bool = True) -> None:
        self.log = [] if log is None else log
        self.drains = drains
        self.queues: dict[str, list[tuple[Any, Any, Any]]] = {"down": [], "up": []}
        self.done = {"down": 0, "up": 0}

    def memory(self, nbytes: int) -> Any:
        return torch.full((nbytes,), 255, dtype=torch.uint8)  # NaN

    def begin(self) -> None:
        self.log.append(("begin",))

    def fetch(self, target: Any, source: Any) -> None:
        self.log.append(("fetch", target.data_ptr()))
        self.queues["down"].append((target, source, source.clone()))

    def fetched(self) -> Any:
        return Point(self, "down", len(self.queues["down"]))

    def send(self, target: Any, source: Any) -> None:
        self.log.append(("send", source.data_ptr()))
        self.queues["up"].append((target, source, source.clone()))

    def sent(self) -> Any:
        return Point(self, "up", len(self.queues["up"]))

    def finish(self) -> None:
        self.log.append(("finish",))
        if self.drains:
            self.run("down", len(self.queues["down"]))
            self.run("up", len(self.queues["up"]))

    def run(self, way: str, until: int) -> None:
        for at in range(self.done[way], until):
            target, source, then = self.queues[way][at]
            assert source.view(torch.uint8).equal(then.view(torch.uint8)), f"written while it was on its way {way}"
            target.copy_(source)
            self.done[way] = at + 1


class Point:
    def __init__(self, transfers: Late, way: str, at: int) -> None:
        self.transfers, self.way, self.at = transfers, way, at

    def synchronize(self) -> None:
        self.transfers.log.append(("wait", self.way, self.at))
        self.transfers.run(self.way, self.at)


class Threads(HostTransfers):
    """Copies on a thread for each way, at their own pace; pieces of memory that come down are NaN first."""

    def __init__(self, device: Any) -> None:
        super().__init__(device)
        self.ways = {way: queue.Queue() for way in ("down", "up")}
        for way in self.ways:
            threading.Thread(target=self.work, args=(way,), daemon=True).start()

    def work(self, way: str) -> None:
        pace = random.Random(way)
        while True:
            job = self.ways[way].get()
            time.sleep(pace.choice((0, 0, 0.0002, 0.001)))
            job()

    def fetch(self, target: Any, source: Any) -> None:
        def job() -> None:
            target.fill_(torch.nan)
            target.copy_(source)

        self.ways["down"].put(job)

    def send(self, target: Any, source: Any) -> None:
        self.ways["up"].put(lambda: target.copy_(source))

    def fetched(self) -> Any:
        return self.mark("down")

    def sent(self) -> Any:
        return self.mark("up")

    def mark(self, way: str) -> Any:
        class Mark:
            event = threading.Event()

            def synchronize(self) -> None:
                assert self.event.wait(30)

        mark = Mark()
        mark.event = threading.Event()
        self.ways[way].put(mark.event.set)
        return mark

    def finish(self) -> None:
        """The test's own thread is the device: it waits."""
        for way in self.ways:
            self.mark(way).synchronize()


class Watched:
    """A plan that writes down when it sweeps."""

    def __init__(self, plan: Any, log: list[Any]) -> None:
        self.plan, self.log = plan, log

    def step(self, *args: Any) -> Any:
        self.log.append(("sweep", [grad.data_ptr() for grad in args[1] if grad is not None]))
        return self.plan.step(*args)


def offloaded(transfers: Callable[[Any], Any], options: dict[str, Any], buffers: int = 2, name: str = "adamw") -> Any:
    params = parameters(SHAPES)
    others = copies(params)
    case = case_of(name)
    opt = gradstep.torch.offload(make(case, params, options), chunk_bytes=CHUNK, buffers=buffers, transfers=transfers)
    return opt, params, make(case, others, options), others


@pytest.mark.parametrize("transfers", [Late, Threads])
@pytest.mark.parametrize("buffers", [1, 2, 3, 20])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0, "zero_grad": True}, {"on_nonfinite": "skip"}], ids=str)
def test_values(transfers: Any, buffers: int, options: dict[str, Any]) -> None:
    opt, params, other, others = offloaded(transfers, options, buffers)
    for step in range(1, 6):
        for each in (params, others):
            set_grads(each, step)
            if step in (3, 4) and options.get("on_nonfinite"):
                each[3].grad[17] = torch.nan
        opt.step()
        other.step()
        assert_same(params, others, opt, other)


def test_rules_that_need_whole_tensors() -> None:
    opt, params, other, others = offloaded(Late, {}, name="lamb")
    for step in range(1, 4):
        for each, o in ((params, opt), (others, other)):
            set_grads(each, step)
            o.step()
        assert_same(params, others, opt, other)


def test_the_order_of_operations() -> None:
    """Each sweep after its gradients, each upload after its sweep, each buffer filled anew after the sweep that has read it."""
    log: list[Any] = []
    made: list[Late] = []

    def transfers(device: Any) -> Late:
        made.append(Late(device, log))
        return made[-1]

    buffers = 3
    opt, params, *_ = offloaded(transfers, {}, buffers)
    set_grads(params, 3, nones=False)
    opt._plan = Watched(opt._plan, log)
    log.clear()
    opt.step()
    assert log[0] == ("begin",) and log[-1] == ("finish",) and len(made) == 1
    sweeps = [at for at, entry in enumerate(log) if entry[0] == "sweep"]
    assert len(sweeps) == 9  # 2 + 1 + 5 + 1: the smallest three have room beside others
    fetched_at: dict[int, list[int]] = {}
    for at, entry in enumerate(log):
        if entry[0] == "fetch":
            fetched_at.setdefault(entry[1], []).append(at)
    read_at: dict[int, list[int]] = {}
    for at in sweeps:
        for address in log[at][1]:
            read_at.setdefault(address, []).append(at)
    assert fetched_at.keys() == read_at.keys()
    for address, reads in read_at.items():
        writes = fetched_at[address]
        assert len(writes) == len(reads)
        for i, (write, read) in enumerate(zip(writes, reads, strict=True)):
            assert write < read
            n = sum(entry[0] == "fetch" for entry in log[: write + 1])  # the copies down until this one
            assert any(entry[:2] == ("wait", "down") and entry[2] >= n for entry in log[write:read])
            assert i + 1 == len(writes) or read < writes[i + 1]
    # While one chunk is swept over, as many more as there are buffers are on their way.
    chunks = [len(log[at][1]) for at in sweeps]
    for k, at in enumerate(sweeps):
        queued = sum(entry[0] == "fetch" for entry in log[:at])
        assert queued == sum(chunks[: k + buffers])
        waited = max(entry[2] for entry in log[:at] if entry[:2] == ("wait", "down"))
        assert waited >= sum(chunks[: k + 1])
        sent = sum(entry[0] == "send" for entry in log[:at])
        assert sent == sum(chunks[:k])
    # And the host has not waited for one parameter to be up.
    assert not [entry for entry in log if entry[:2] == ("wait", "up")]


def test_a_step_waits_for_the_uploads_of_the_last_one() -> None:
    """They read what it is going to write. They are asserted to be what they were when they were queued."""
    made: list[Late] = []

    def transfers(device: Any) -> Late:
        made.append(Late(device, drains=False))
        return made[-1]

    opt, params, other, others = offloaded(transfers, {})
    for step in range(3, 7):
        set_grads(others, step)
        other.step()
        set_grads(params, step)
        opt.step()
        assert made[0].done["up"] == len(made[0].queues["up"]) * (step - 3) // (step - 2)  # all but this step's
    opt.synchronize()
    assert_same(params, others, opt, other)


@pytest.mark.parametrize("call", ["averaged", "swap_ema", "pull", "load_state_dict"])
def test_others_wait_too(call: str) -> None:
    made: list[Late] = []

    def transfers(device: Any) -> Late:
        made.append(Late(device, drains=False))
        return made[-1]

    opt, params, other, others = offloaded(transfers, {"ema_decay": 0.5})
    for step in (3, 4):
        for o, each in ((opt, params), (other, others)):
            set_grads(each, step)
            o.step()
    if call == "averaged":
        with opt.averaged():
            pass
    elif call == "swap_ema":
        opt.swap_ema()
        opt.swap_ema()
    elif call == "pull":
        opt.pull()
    else:
        opt.load_state_dict(opt.state_dict())
    opt.synchronize()
    assert_same(params, others, opt, other)


# ---- failures -------------------------------------------------------------------------------------------------------------


class Failing(HostTransfers):
    """Fails at the n-th copy of one way."""

    def __init__(self, device: Any) -> None:
        super().__init__(device)
        self.left: dict[str, int] = {}
        self.error: BaseException = RuntimeError("CUDA error: of a test")

    def count(self, way: str) -> None:
        if way in self.left:
            self.left[way] -= 1
            if self.left[way] == 0:
                del self.left[way]
                raise self.error

    def fetch(self, target: Any, source: Any) -> None:
        self.count("fetch")
        super().fetch(target, source)

    def send(self, target: Any, source: Any) -> None:
        self.count("send")
        super().send(target, source)

    def memory(self, nbytes: int) -> Any:
        self.count("memory")
        return super().memory(nbytes)


def failing(options: dict[str, Any] | None = None) -> Any:
    made: list[Failing] = []

    def transfers(device: Any) -> Failing:
        made.append(Failing(device))
        return made[-1]

    return (*offloaded(transfers, options or {}), made[0])


@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("way", ["fetch", "memory"])
def test_a_failure_before_the_first_sweep_changes_nothing(way: str, steps_before: int) -> None:
    if (way, steps_before) == ("memory", 1):
        pytest.skip("there is room by then")
    opt, params, other, others, transfers = failing()
    for step in range(4, 4 + steps_before):
        for o, each in ((opt, params), (other, others)):
            set_grads(each, step)
            o.step()
    set_grads(params, 6)
    set_grads(others, 6)
    transfers.left[way] = 2
    with pytest.raises(RuntimeError, match="^CUDA error: of a test$"):
        opt.step()
    assert_same(params, others, opt, other)
    assert opt.steps == steps_before
    opt.step()
    other.step()
    assert_same(params, others, opt, other)


@pytest.mark.parametrize(
    ("left", "message"),
    [
        ({"send": 1}, "1 of 9 chunks: 0 of 6 parameters have been updated, params[0] in part"),
        ({"send": 2}, "2 of 9 chunks: 3 of 6 parameters have been updated"),
        ({"fetch": 8}, "4 of 9 chunks: 3 of 6 parameters have been updated, params[3] in part"),
        ({"fetch": 12}, "7 of 9 chunks: 5 of 6 parameters have been updated"),
    ],
    ids=str,
)
def test_a_failure_in_the_middle_is_reported(left: dict[str, int], message: str) -> None:
    opt, params, other, others, transfers = failing()
    set_grads(params, 3)
    set_grads(others, 3)
    opt.step()
    other.step()
    kept = [p.detach().clone() for p in params]
    states = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, opt.state_dict())
    set_grads(params, 4)
    set_grads(others, 4)
    transfers.left.update(left)
    what = f"a step broke off after {message}; load a state dict, and the parameters that go with it"
    with pytest.raises(BrokenStepError) as caught:
        opt.step()
    assert str(caught.value) == f"AdamW.step: {what}"
    assert str(caught.value.__cause__) == "CUDA error: of a test"
    for function, call in (("step", opt.step), ("state_dict", opt.state_dict), ("averages", opt.swap_ema)):
        with pytest.raises(RuntimeError) as refused:
            call()
        assert str(refused.value) == f"AdamW.{function}: {what}"
    with torch.no_grad():
        for p, q in zip(params, kept, strict=True):
            p.copy_(q)
    opt.load_state_dict(states)
    opt.step()
    other.step()
    assert_same(params, others, opt, other)


def test_after_a_broken_step_the_parameters_on_the_device_count() -> None:
    opt, params, other, others, transfers = failing()
    for o, each in ((opt, params), (other, others)):
        set_grads(each, 3)
        o.step()
    states = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, opt.state_dict())
    set_grads(params, 4)
    transfers.left["send"] = 1
    with pytest.raises(BrokenStepError):
        opt.step()
    assert torch.equal(params[0], others[0])  # not up
    opt.load_state_dict(states)
    set_grads(others, 4)
    opt.step()
    other.step()
    assert_same(params, others, opt, other)


def test_what_a_broken_step_has_reached_is_whole() -> None:
    """Parameters that have been updated have been with their states and counts, on both sides; the others not at all."""
    opt, params, other, others, transfers = failing()
    for o, each in ((opt, params), (other, others)):
        set_grads(each, 3)
        o.step()
    before = [(p.detach().clone(), float(opt.state[p]["step"])) for p in params]
    set_grads(params, 4)
    set_grads(others, 4)
    other.step()
    transfers.left["fetch"] = 6
    with pytest.raises(BrokenStepError, match="2 of 9 chunks: 3 of 6"):
        opt.step()
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert torch.equal(p, q if i < 3 else before[i][0]), i
        assert opt.state[p]["step"] == (2 if i < 3 else 1)


def test_a_broken_step_of_parameters_with_gaps() -> None:
    """They go up as they are updated, whole; one of which a part has come is left as it was."""
    made: list[Failing] = []

    def transfers(device: Any) -> Failing:
        made.append(Failing(device))
        return made[-1]

    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(40, 200)[:, ::2]) for _ in range(3)]
    others = [torch.nn.Parameter(p.detach().contiguous()) for p in params]
    opt = gradstep.torch.offload(gradstep.torch.AdamW(params), chunk_bytes=CHUNK, buffers=1, transfers=transfers)
    other = gradstep.torch.AdamW(others)
    for p, q in zip(params, others, strict=True):
        p.grad = q.grad = torch.ones(40, 100)
    before = [p.detach().clone() for p in params]
    other.step()
    made[0].left["fetch"] = 4
    with pytest.raises(BrokenStepError, match=r"3 of 6 chunks: 1 of 3 parameters have been updated, params\[1\] in part"):
        opt.step()
    assert [torch.equal(p, q) for p, q in zip(params, others, strict=True)] == [True, False, False]
    assert torch.equal(params[1], before[1]) and torch.equal(params[2], before[2])


def test_an_interrupt_stays_one() -> None:
    opt, params, _, _, transfers = failing()
    set_grads(params, 3)
    transfers.left["send"], transfers.error = 2, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    with pytest.raises(RuntimeError, match=r"^AdamW.step: a step broke off after 2 of 9 chunks"):
        opt.step()


def test_a_state_that_is_wrong_is_found_before_anything_is_written() -> None:
    """Also in the last of all chunks."""
    opt, params, other, others = offloaded(HostTransfers, {})
    for step in (3, 4):
        set_grads(params, step)
        set_grads(others, step)
        if step == 4:
            opt.state[params[5]]["exp_avg"] = opt.state[params[5]]["exp_avg"].to(torch.int32)
            with pytest.raises(
                TypeError, match=r"^AdamW.step: state\[params\[5\]\]\['exp_avg'\] has dtype int32, must be float64"
            ):
                opt.step()
            opt.state[params[5]]["exp_avg"] = other.state[others[5]]["exp_avg"].clone()
            assert_same(params, others, opt, other)
        opt.step()
        other.step()
        assert_same(params, others, opt, other)


def test_states_that_were_replaced_are_used() -> None:
    opt, params, other, others = offloaded(HostTransfers, {})
    for step in (3, 4, 5):
        for o, each in ((opt, params), (other, others)):
            set_grads(each, step)
            if step == 4:
                o.state[each[3]]["exp_avg"] = o.state[each[3]]["exp_avg"] * 2
            if step == 5:
                o.state[each[0]] = {}
                del o.state[each[1]]
            o.step()
        for i, (p, q) in enumerate(zip(params, others, strict=True)):
            assert torch.equal(p, q), i


# ---- the calls of CUDA ----------------------------------------------------------------------------------------------------


def test_the_calls_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which stream gets what, as a stand-in of `torch.cuda` sees it."""
    log: list[Any] = []

    class Stream:
        def __init__(self, device: Any) -> None:
            self.name = f"stream {sum(entry[0] == 'made' for entry in log)}"
            log.append(("made", self.name))

        def record_event(self) -> Any:
            return Event().record(self)

        def wait_event(self, event: Any) -> None:
            log.append((self.name, "waits for", event.at))

        def wait_stream(self, stream: Any) -> None:
            log.append((self.name, "waits for", stream.name))

    class Event:
        def __init__(self, blocking: bool = False) -> None:
            self.at = ""

        def record(self, stream: Any) -> Any:
            self.at = stream.name
            return self

        def synchronize(self) -> None:
            log.append(("host", "waits for", self.at))

    class Use:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            log.append((self.stream.name, "is current"))

        def __exit__(self, *_: object) -> None:
            log.append((self.stream.name, "was current"))

    now = Stream(None)
    for name, stand_in in (("Stream", Stream), ("Event", Event), ("stream", Use), ("current_stream", lambda device: now)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: log.append(("memory held for", stream.name)))
    transfers = CudaTransfers(torch.device("cuda:0"))
    down, up = "stream 1", "stream 2"
    log.clear()
    transfers.begin()
    assert log == [(down, "waits for", "stream 0"), (up, "waits for", "stream 0")]
    log.clear()
    a, b = torch.zeros(3), torch.ones(3)
    transfers.fetch(a, b)
    transfers.fetched().synchronize()
    assert log == [("memory held for", down), (down, "is current"), (down, "was current"), ("host", "waits for", down)]
    log.clear()
    transfers.send(b, 2 * a)
    transfers.sent().synchronize()
    assert log == [("memory held for", up), (up, "is current"), (up, "was current"), ("host", "waits for", up)]
    log.clear()
    transfers.finish()
    assert log == [("stream 0", "waits for", down), ("stream 0", "waits for", up)]
    assert torch.equal(a, torch.ones(3)) and torch.equal(b, 2 * a)
