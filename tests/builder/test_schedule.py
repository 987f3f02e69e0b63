"""A large model's calls: in forked processes, some beside others, as far as memory allows."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from lcm_compile.builder.schedule import scheduling
from lcm_compile.bundles.manifest import read_manifest
from lcm_compile.errors import BundleError, LcmCompileError
from lcm_compile.system.child_process import ForkServer
from lcm_compile.system.memory import SharedMemory


@pytest.fixture(scope="module")
def server():
    with ForkServer(["colorsys", "no_such_module"]) as server:
        yield server


def test_calls_begin_with_what_the_server_has_imported(server):
    assert server.call(eval, "'colorsys' in __import__('sys').modules")
    assert server.call(sorted, [3, 1, 2]) == [1, 2, 3]
    pids = {server.call(os.getpid) for _ in range(3)}
    assert len(pids) == 3 and os.getpid() not in pids


def test_errors_and_ends_are_told(server, tmp_path):
    with pytest.raises(BundleError, match="is not a bundle") as caught:
        server.call(read_manifest, tmp_path)
    assert caught.value.hint
    with pytest.raises(LcmCompileError, match=r"_exit ended without a result \(exit code 7\)"):
        server.call(os._exit, 7)
    with pytest.raises(LcmCompileError, match="memory ran out"):
        server.call(exec, "import os; os.kill(os.getpid(), 9)")
    assert server.call(len, "it goes on") == 10


def test_threads_call_at_the_same_time(server):
    big, found = bytes(3_000_000), []
    callers = [
        threading.Thread(target=lambda: found.append(server.call(bytes.__len__, big))) for _ in range(8)
    ]
    [caller.start() for caller in callers]
    [caller.join() for caller in callers]
    assert found == [len(big)] * 8


def test_a_call_does_not_wait_for_a_longer_one_that_began_after_it():
    def call_longer():
        with suppress(LcmCompileError):  # it is killed with the server
            server.call(time.sleep, 60)

    with ForkServer([]) as server:
        shorter = threading.Thread(target=server.call, args=(time.sleep, 0.5))
        longer = threading.Thread(target=call_longer)
        shorter.start()
        time.sleep(0.1)
        longer.start()
        shorter.join(30)
        assert not shorter.is_alive() and longer.is_alive()
    longer.join(30)


def test_what_still_runs_is_killed_with_the_server():
    def call():
        with pytest.raises(LcmCompileError, match="ended without a result"):
            server.call(time.sleep, 60)
        told.append(True)

    told = []
    with ForkServer([]) as server:
        caller = threading.Thread(target=call)
        caller.start()
        child = server.call(os.getppid)  # the server itself
    caller.join(10)
    assert told
    assert not alive(child)


def test_a_build_that_is_killed_leaves_no_process(tmp_path):
    code = (
        "import os, threading; from lcm_compile.system.child_process import ForkServer\n"
        "with ForkServer([]) as s:\n"
        "    print(s.call(os.getppid), flush=True)\n"
        f"    s.call(exec, \"open({str(tmp_path / 'pid')!r}, 'w').write(str(__import__('os').getpid()));\"\n"
        "    \"__import__('time').sleep(60)\")\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    server = int(process.stdout.readline())
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.01)
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    for one in (server, int(pid.read_text())):
        while alive(one) and time.monotonic() < end:
            time.sleep(0.01)
        assert not alive(one)


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_parts_of_memory_wait_for_each_other():
    memory, held, most = SharedMemory(10), [], []
    turn = threading.Lock()

    def take(size):
        with memory.part(size):
            with turn:
                held.append(size)
                most.append(list(held))
            time.sleep(0.02)
            with turn:
                held.remove(size)

    takers = [threading.Thread(target=take, args=(size,)) for size in (6, 6, 4, 3, 12, 1)]
    [taker.start() for taker in takers]
    [taker.join() for taker in takers]
    assert max(len(one) for one in most) > 1
    assert all(sum(one) <= 10 or one == [12] for one in most)


def test_the_foreground_goes_first():
    memory, order = SharedMemory(10), []

    def take(name, first):
        with memory.part(10, first):
            order.append(name)

    with memory.part(10):
        waiting = [threading.Thread(target=take, args=("beside", False))]
        waiting[0].start()
        time.sleep(0.05)
        waiting.append(threading.Thread(target=take, args=("first", True)))
        waiting[1].start()
        time.sleep(0.05)
    [thread.join() for thread in waiting]
    assert order == ["first", "beside"]


def test_an_error_beside_ends_the_build_at_its_next_call():
    with pytest.raises(ZeroDivisionError), scheduling(True, 1 << 20, []) as schedule:
        failed = schedule.beside("engines", schedule.call_beside, 1, nullcontext(), divmod, 1, 0)
        never = schedule.beside("engines", schedule.call_beside, 1, nullcontext(), time.sleep, 60)
        assert isinstance(failed.exception(), ZeroDivisionError)
        schedule.call(1, nullcontext(), len, "")
    assert never.cancelled() or never.exception() is not None


def test_a_small_model_runs_in_this_process_at_once():
    with scheduling(False, 1, ["no_such_module"]) as schedule:
        assert schedule.call(1, nullcontext(), os.getpid) == os.getpid()
        assert (
            schedule.beside("engines", schedule.call_beside, 1, nullcontext(), os.getpid).result()
            == os.getpid()
        )
        with pytest.raises(ZeroDivisionError):
            schedule.beside("engines", divmod, 1, 0)
