"""Descriptors over Unix sockets and by inheritance: to and from other programs, and out of descriptors."""

from __future__ import annotations

import array
import gc
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import pytest
from conftest import open_fds

from mpmemory import Memory
from mpmemory._backends import platform
from mpmemory._fds import MAX_FDS, close_all, recv_fds, send_fds
from mpmemory.testing import assert_no_leaks

KINDS = [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("backend")
def test_send_and_receive(kind: socket.SocketKind, backend: str) -> None:
    left, right = socket.socketpair(socket.AF_UNIX, kind)
    with left, right:
        memory = Memory.from_bytes(b"over a socket", name="parcel")
        memory.send(left)
        memory.close()
        arrived = Memory.receive(right)
        assert arrived.pread(13) == b"over a socket"
        assert not os.get_inheritable(arrived.fileno())
        if backend == "memfd":
            assert arrived.name == "parcel"


def test_only_the_byte_with_the_descriptor_is_read() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(b"before")
        Memory(1).send(left)
        left.sendall(b"after")
        assert right.recv(6) == b"before"
        assert Memory.receive(right).size == 1
        assert right.recv(100) == b"after"


def test_over_connections() -> None:
    left, right = multiprocessing.Pipe()
    with left, right:
        left.send("a handle follows")
        Memory.from_bytes(b"abc").send(left)
        left.send("that was it")
        assert right.recv() == "a handle follows"
        assert Memory.receive(right).pread(3) == b"abc"
        assert right.recv() == "that was it"
        assert left.fileno() != -1


def test_it_is_the_form_of_multiprocessing() -> None:
    left, right = multiprocessing.Pipe()
    with left, right:
        Memory.from_bytes(b"abc").send(left)
        with Memory.from_fd(reduction.recv_handle(right)) as received:
            assert received.pread(3) == b"abc"
        sent = Memory.from_bytes(b"def")
        reduction.send_handle(right, sent.fileno(), os.getpid())
        assert Memory.receive(left).pread(3) == b"def"


def test_timeouts_of_the_socket_hold() -> None:
    left, right = socket.socketpair()
    with left, right:
        right.settimeout(0.01)
        with pytest.raises(TimeoutError):
            Memory.receive(right)
        right.setblocking(False)
        with pytest.raises(BlockingIOError):
            Memory.receive(right)


def test_no_unix_socket() -> None:
    reader, writer = multiprocessing.Pipe(duplex=False)
    memory = Memory(1)
    with assert_no_leaks(), socket.socket() as inet, reader, writer:
        for sock, message in ((inet, "one of family AF_INET"), (writer, "a Connection on a pipe")):
            with pytest.raises(ValueError, match=f"expected a Unix socket, found {message}"):
                memory.send(sock)
            with pytest.raises(ValueError, match=f"expected a Unix socket, found {message}"):
                Memory.receive(sock)
        with pytest.raises(AttributeError):
            memory.send("socket")  # type: ignore[arg-type]
        os.fstat(reader.fileno())  # still open


def test_what_is_no_handle() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    memory = Memory(1)
    reader, writer = os.pipe()
    before = open_fds()
    with right:
        left.send(b"x")
        with pytest.raises(ValueError, match=r"one file descriptor, found 0 descriptors with b'x'"):
            Memory.receive(right)
        send_fds(left, b"x", [memory.fileno(), memory.fileno()])
        with pytest.raises(ValueError, match="one file descriptor, found 2"):
            Memory.receive(right)
        send_fds(left, b"x", [reader])
        with pytest.raises(ValueError, match="cannot be mapped: it is a pipe"):
            Memory.receive(right)
        gc.collect()
        assert open_fds() == before
        left.close()
        with pytest.raises(EOFError, match="closed the socket"):
            Memory.receive(right)
    close_all([reader, writer])


def test_as_many_as_fit_one_message() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        send_fds(left, b"many", [0] * MAX_FDS)
        data, fds = recv_fds(right, 100)
        assert data == b"many"
        assert len(set(fds)) == MAX_FDS
        assert not any(os.get_inheritable(fd) for fd in fds)
        close_all(fds)
        with pytest.raises(OSError):  # noqa: PT011
            send_fds(left, b"too many", [0] * (MAX_FDS + 1))


def test_out_of_descriptors_while_receiving(run_python: Any) -> None:
    run_python(
        "import errno, os, resource, socket, mpmemory\n"
        "from mpmemory._fds import recv_fds, send_fds\n"
        "left, right = socket.socketpair()\n"
        "memory = mpmemory.Memory(10)\n"
        "fds = lambda: sorted(os.listdir('/proc/self/fd'), key=int)\n"
        "before = fds()\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (int(before[-1]) + 2, 100))\n"
        "for receive, count in ((mpmemory.Memory.receive, 1), (lambda sock: recv_fds(sock, 1), 5)):\n"
        "    fill = []\n"
        "    while count == 1:\n"
        "        try: fill.append(os.dup(0))\n"
        "        except OSError: break\n"
        "    send_fds(left, b'x', [memory.fileno()] * count)\n"
        "    try: receive(right)\n"
        "    except OSError as error:\n"
        "        assert error.errno == errno.EMFILE and 'cannot receive a file descriptor' in str(error), error\n"
        "        assert 'ulimit -n' in str(error), error\n"
        "    else: raise SystemExit('no error')\n"
        "    for fd in fill: os.close(fd)\n"
        "    assert fds() == before, (fds(), before)\n"
        "memory.send(left); assert mpmemory.Memory.receive(right).size == 10\n"
    )


def test_concurrent_senders_and_receivers() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    arrived: list[int] = []

    def send(index: int) -> None:
        for step in range(50):
            Memory.from_bytes(bytes([index, step])).send(left)

    def receive() -> None:
        for _ in range(50):
            memory = Memory.receive(right)
            arrived.append(int.from_bytes(memory.pread(2), "big"))

    threads = [threading.Thread(target=send, args=(index,)) for index in range(4)]
    threads += [threading.Thread(target=receive) for _ in range(4)]
    with left, right:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(arrived) == [(index << 8) + step for index in range(4) for step in range(50)]


def test_a_default_timeout_for_sockets_leaves_connections_blocking() -> None:
    left, right = multiprocessing.Pipe()
    socket.setdefaulttimeout(5)
    try:
        with left, right:
            Memory(1).send(left)
            assert Memory.receive(right).size == 1
            assert os.get_blocking(left.fileno())
            assert os.get_blocking(right.fileno())
    finally:
        socket.setdefaulttimeout(None)


# --- test_memory.py ---


def test_what_a_process_sent_before_its_end_is_seen() -> None:
    """Its message first, and then its end."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, b"x")
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with platform.ProcessWatch(pid) as watch:
        watch.wait_readable(reader, time.monotonic() + 60)
        os.read(reader, 1)
        with pytest.raises(ProcessLookupError, match=f"process {pid} is gone"):
            watch.wait_readable(reader, time.monotonic() + 60)
    os.waitpid(pid, 0)
    with pytest.raises(ProcessLookupError):
        platform.ProcessWatch(pid)
    os.close(reader)
    os.close(writer)


def test_watching_a_process_without_pidfds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on systems other than Linux."""
    monkeypatch.delattr(os, "pidfd_open")
    reader, writer = os.pipe()
    watch = platform.ProcessWatch(os.getpid())
    assert not watch.wait([reader], time.monotonic() + 60)
    with pytest.raises(TimeoutError):
        watch.wait_readable(reader, time.monotonic())
    thread = threading.Thread(target=os.write, args=(writer, b"x"))
    thread.start()
    watch.wait_readable(reader, time.monotonic() + 60)
    thread.join()
    os.read(reader, 1)
    if (pid := os.fork()) == 0:
        os._exit(0)
    with platform.ProcessWatch(pid) as watch:
        os.waitpid(pid, 0)
        with pytest.raises(ProcessLookupError, match=f"process {pid} is gone"):
            watch.wait_readable(reader, time.monotonic() + 60)
    os.close(reader)
    os.close(writer)


# --- test_fds.py ---


def test_a_non_blocking_connection_stays_so() -> None:
    left, right = multiprocessing.Pipe()
    with left, right:
        os.set_blocking(left.fileno(), False)  # as asyncio's transports are
        Memory(1).send(left)
        assert not os.get_blocking(left.fileno())
        assert Memory.receive(right).size == 1


def test_the_peer_of_a_connection_is_gone() -> None:
    left, right = multiprocessing.Pipe()
    with left:
        right.close()
        with pytest.raises(BrokenPipeError):
            Memory(1).send(left)
        with pytest.raises(EOFError):
            Memory.receive(left)


# --- one line more in existing tests: test_bad_formats_and_values_write_nothing, test_what_errors_are ---


# --- other programs ---

C_PROGRAM = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

/* usage: upcase fd N (N is the memory) | upcase socket N (receive it over the Unix socket N, and send one back) */

static void upcase(int fd) {
    struct stat status;
    if (fstat(fd, &status)) { perror("fstat"); exit(2); }
    char *text = mmap(NULL, status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (text == MAP_FAILED) { perror("mmap"); exit(3); }
    for (off_t i = 0; i < status.st_size; i++)
        if (text[i] >= 'a' && text[i] <= 'z') text[i] -= 32;
}

int main(int argc, char **argv) {
    int number = atoi(argv[2]);
    if (!strcmp(argv[1], "fd")) { upcase(number); return 0; }

    char byte, control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec vector = {&byte, 1};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1};
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    if (recvmsg(number, &message, 0) != 1) { perror("recvmsg"); return 4; }
    int fd;
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    upcase(fd);

    int answer = memfd_create("from C", MFD_CLOEXEC);
    if (write(answer, "hello from C", 12) != 12) { perror("write"); return 5; }
    message.msg_controllen = sizeof control;
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET; header->cmsg_type = SCM_RIGHTS; header->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(header), &answer, sizeof answer);
    byte = '!';
    if (sendmsg(number, &message, 0) != 1) { perror("sendmsg"); return 6; }
    return 0;
}
"""


@pytest.fixture
def c_program(tmp_path: Path) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source = tmp_path / "upcase.c"
    source.write_text(C_PROGRAM)
    program = tmp_path / "upcase"
    subprocess.run([compiler, "-D_GNU_SOURCE", "-o", program, source], check=True)
    return program


def test_a_c_program_inherits_memory(c_program: Path, backend: str) -> None:
    memory = Memory.from_bytes(b"inherited by c")
    number = memory.fileno()
    subprocess.run([c_program, "fd", str(number)], pass_fds=[number], check=True)
    assert memory.pread(14) == b"INHERITED BY C"


def test_a_c_program_receives_and_sends_memory(c_program: Path, backend: str) -> None:
    memory = Memory.from_bytes(b"sent to c")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        program = subprocess.Popen([c_program, "socket", str(theirs.fileno())], pass_fds=[theirs.fileno()])
        memory.send(ours)
        answer = Memory.receive(ours)
        assert program.wait() == 0
    assert memory.pread(9) == b"SENT TO C"
    assert (answer.pread(answer.size), answer.name) == (b"hello from C", "from C")


def test_an_unrelated_python_takes_over_a_passed_descriptor() -> None:
    memory = Memory.from_bytes(b"abc")
    program = (
        "import sys, os, mpmemory\n"
        "memory = mpmemory.Memory.from_fd(int(sys.argv[1]))\n"
        "assert not os.get_inheritable(memory.fileno())\n"
        "memory.map()[:] = b'xyz'\n"
    )
    number = memory.fileno()
    subprocess.run([sys.executable, "-c", program, str(number)], pass_fds=[number], check=True)
    assert memory.pread(3) == b"xyz"


def test_a_program_without_mpmemory_sends_a_descriptor() -> None:
    """Two bytes of data, as some programs do: the second stays in the stream."""
    left, right = socket.socketpair()
    with left, right:
        fd = os.memfd_create("plain")
        os.write(fd, b"plain")
        left.sendmsg([b"ok"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
        os.close(fd)
        assert Memory.receive(right).pread(5) == b"plain"
        assert right.recv(1) == b"k"
