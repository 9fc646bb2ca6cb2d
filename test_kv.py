"""Tests of kv.py: they run it as a program and talk to it over real sockets.

    python -m unittest                  all tests, in under a minute
    python test_kv.py bench [FILE]      the benchmark, with 1,000,000 made-up pairs without FILE

The classes stand in the order of kv.py. Most tests go through a table near the top of their
class. To add a case, add a row:

    a line that is refused, an odd value    Lines.BAD, Lines.VALUES
    a file that is refused                  Lines.REFUSED
    a request and its answer                Judge.KEPT, Judge.CLOSED, Judge.AT_ONCE
    a limit                                 Limits.DEADLINES
    an answer that is not kv's              Get.STRANGE
    a key or a URL for get                  Get.ROWS
    wrong usage                             CommandLine.WRONG
"""
import concurrent.futures
import contextlib
import gzip
import http.server
import itertools
import math
import os
import platform
import random
import re
import select
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import uuid

import kv

HERE = os.path.dirname(os.path.abspath(__file__))
EXAMPLE = os.path.join(HERE, "example.data")
KEY = b"3479d894-3271-4935-88cf-a06f3cbb80a5"      # in example.data, with the value
VALUE = b"this is a value"
OTHER_KEY = b"f8a24bb8-eff8-41dc-929b-10b4c3e49e05"    # also in it, with the value
OTHER_VALUE = b"1234"
ABSENT = b"00000000-0000-4000-8000-000000000000"   # not in it
PATIENCE = 30                                      # seconds until a test gives up waiting
ON_POSIX = unittest.skipUnless(os.name == "posix", "needs POSIX")
ON_LINUX = unittest.skipUnless(os.path.exists("/proc/self/task"), "needs /proc")
IS_CPYTHON = platform.python_implementation() == "CPython"


# What the tests have in common

def key(number):
    """Return the version 4 UUID (bytes) with this number at its end."""
    return b"a0000000-0000-4000-8000-%012x" % number


def head(method, target, *fields, version=b"1.1", host=b"Host: kv"):
    """Return a head: a request line, Host unless that is empty, and other fields (all bytes)."""
    lines = [b"%b %b HTTP/%b" % (method, target, version)]
    return b"\r\n".join(lines + [host] * bool(host) + list(fields)) + b"\r\n\r\n"


def ask_for(path, *fields):
    """Return the head of a GET request for a path (bytes), given without its slash."""
    return head(b"GET", b"/" + path, *fields)


GET_KEY = ask_for(KEY)


def command(*arguments):
    """Return the command that runs kv.py."""
    return [sys.executable, os.path.join(HERE, "kv.py")] + [os.fsdecode(a) for a in arguments]


def environment(**changed):
    """Return this process's environment without proxies and $KV_URL, but with what is given."""
    kept = {name: value for name, value in os.environ.items()
            if not name.lower().endswith("_proxy") and name != "KV_URL"}
    return dict(kept, **changed)


def run(*arguments, stdin=b"", **env):
    """Run kv.py to its end; return its exit code, standard output and standard error (bytes)."""
    done = subprocess.run(command(*arguments), input=stdin, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=environment(**env), timeout=PATIENCE)
    return done.returncode, done.stdout, done.stderr


def shell(script, **env):
    """Run a shell script in which $KV is the command of kv.py; return what `run` returns."""
    kv_command = " ".join(command())
    done = subprocess.run(["sh", "-c", script], stdin=subprocess.DEVNULL, timeout=PATIENCE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=environment(KV=kv_command, **env))
    return done.returncode, done.stdout, done.stderr


def side_by_side(work, rows):
    """Call `work(*row)` for each of `rows`, several at a time; yield each row and its future."""
    rows = list(rows)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        yield from zip(rows, [pool.submit(work, *row) for row in rows])


@contextlib.contextmanager
def data_file(content):
    """A file in a folder of its own, called test.data, that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "test.data")
        with open(path, "wb") as file:
            file.write(content)
        yield path


def replace(path, content):
    """Replace a file as the README says it: write another one and move it there."""
    with open(path + ".new", "wb") as file:
        file.write(content)
    os.replace(path + ".new", path)


def example_pairs():
    """Return the pairs of example.data, by the plainest means."""
    with open(EXAMPLE, "rb") as file:
        return dict(line.rstrip(b"\n").split(b" ", 1) for line in file)


def free_port():
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition):
    """Wait until `condition()` is true and return what it returned."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError("waited in vain for %s" % condition)


def proc(pid, name):
    """Return a number that Linux has on a process in /proc/PID/status, such as VmRSS (kB)."""
    with open("/proc/%d/status" % pid) as file:
        return int(re.search(name + r":\s+(\d+)", file.read()).group(1))


def processor_seconds(pid):
    """Return the time that a process has run on a processor."""
    with open("/proc/%d/stat" % pid) as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Serving:
    """`kv.py serve`, from when it is ready until it is stopped; `log` is its standard error.

    `limits` changes constants of kv.py by their names, before it starts.
    """

    def __init__(self, *arguments, limits=None, command_line=None, **how):
        if command_line is None:
            command_line = command("serve", *arguments, "--port", "0")
        if limits:
            program = ("import sys; sys.path.insert(0, %r); import kv\n"
                       "vars(kv).update(%r); sys.exit(kv.main())" % (HERE, limits))
            command_line[1:2] = ["-c", program]
        how.setdefault("stdin", subprocess.DEVNULL)
        how.setdefault("env", environment())
        self.process = subprocess.Popen(command_line, stderr=subprocess.PIPE, **how)
        self.pid = self.process.pid
        self.log = b""
        self.reader = threading.Thread(target=self.read_log)
        self.reader.start()

    def read_log(self):
        for line in self.process.stderr:
            self.log += line

    def __enter__(self):
        try:
            until(lambda: b" s, on " in self.log or self.process.poll() is not None)
            self.url = re.search(r" on (\S+)\n", self.log.decode()).group(1)
            if not self.url.startswith("unix:"):
                self.port = int(self.url.rpartition(":")[2])
        except BaseException:
            self.__exit__()
            raise
        return self

    def lines(self):
        """Return the lines of the log without their time."""
        return [re.sub(r"^[\dT:+-]+ ", "", line) for line in self.log.decode().splitlines()]

    def stop(self, how=signal.SIGTERM):
        """End the process; return its exit code."""
        self.process.send_signal(how)
        return self.process.wait(PATIENCE)

    def reload(self):
        """Send SIGHUP, and wait for what comes of it."""
        logged = len(self.log)
        self.process.send_signal(signal.SIGHUP)
        until(lambda: re.search(b" s, reloaded .*\n|stays as it was\n", self.log[logged:]))

    def threads(self):
        return len(os.listdir("/proc/%d/task" % self.pid))

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.stop(signal.SIGKILL)
        self.reader.join(PATIENCE)
        self.process.stderr.close()
        assert b"Traceback" not in self.log, self.log.decode()

    def connect(self, **how):
        return Client(("127.0.0.1", self.port), **how)


class Client:
    """A client with nothing clever in it: bytes out, answers in."""

    def __init__(self, address, receive_buffer=None):
        is_unix = isinstance(address, str)
        family = socket.AF_UNIX if is_unix else socket.AF_INET
        if ":" in address[0]:
            family = socket.AF_INET6
        self.socket = socket.socket(family)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(PATIENCE)
        if not is_unix:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self.socket.connect(address)
        except BaseException:
            self.socket.close()
            raise
        self.received = bytearray()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)

    def receive(self):
        more = self.socket.recv(1 << 16)
        self.received += more
        return more

    def answer(self, method=b"GET"):
        """Return status (int), fields (lower-case str: str) and body (bytes) of the next answer."""
        while b"\r\n\r\n" not in self.received:
            if not self.receive():
                raise EOFError("no answer, but %r" % self.received)
        answer_head = self.take(self.received.index(b"\r\n\r\n") + 4)[:-4]
        line, *lines = answer_head.decode("latin-1").split("\r\n")
        fields = {}
        for name, value in (line.split(": ", 1) for line in lines):
            assert name.lower() not in fields, answer_head
            fields[name.lower()] = value
        status = int(re.match(r"HTTP/1\.1 (\d{3}) \S", line).group(1))
        size = 0 if method == b"HEAD" or status == 204 else int(fields["content-length"])
        while len(self.received) < size:
            if not self.receive():
                raise EOFError("the answer breaks off: %r" % self.received[:100])
        return status, fields, self.take(size)

    def take(self, size):
        """Return the first bytes of what was received, and forget them."""
        taken = bytes(self.received[:size])
        del self.received[:size]
        return taken

    def ask(self, path, *fields, method=b"GET"):
        """Send a request for a path, given without its slash, and return the answer."""
        self.send(head(method, b"/" + path, *fields))
        return self.answer(method)

    def rest(self):
        """Return all that comes until the server closes the connection."""
        while self.receive():
            pass
        return self.take(len(self.received))

    def reset(self):
        """Close the connection as a program does that is killed: by a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def setUpModule():
    # a script's `python -m unittest &` ignores Ctrl-C, and what it starts would do so too
    signal.signal(signal.SIGINT, signal.default_int_handler)


class WithExample(unittest.TestCase):
    """All tests of a class that comes of this one share a server of example.data."""

    @classmethod
    def setUpClass(cls):
        cls.server = Serving(EXAMPLE).__enter__()

    @classmethod
    def tearDownClass(cls):
        cls.server.__exit__()


class Lines(unittest.TestCase):
    """The data file: what a line may hold, and what refuses a file."""

    VALUES = (b"", b" ", b" starts with a space", b"ends with spaces  ", b"\t", b"a\tb", b"\r",
              b"carriage\rreturn", b"ends with one\r", b"\0", b"n\0u\0l", b"\x0b", b"\x0c",
              b"\x1c", b"\x85", b"\xc2\x85", b"\xe2\x80\xa8", b"\xff\xfe no UTF-8 \x80", key(1),
              b"%s %d %%", "\u00e4\u20ac\U0001f600".encode(), b"\xef\xbb\xbf",
              bytes(set(range(256)) - {10}), b"x" * 70000, b"HTTP/1.1 200 OK\r")

    K = key(1)
    NO_KEY = "no version 4 UUID at the start of the line"
    NO_SPACE = "no space after the key"
    TWICE = "duplicate key, first on an earlier line"
    NO_HYPHENS = "a UUID without hyphens"
    ORDER_MARK = "a byte order mark before the key"
    BAD = (  # what the file holds, then the number, fault and bytes of each line to be named
        (K, (1, NO_SPACE, K)),
        (K + b"\tv\n", (1, NO_SPACE, K + b"\tv")),
        (K + b",v\n", (1, NO_SPACE, K + b",v")),
        (K + b"\x00v\n", (1, NO_SPACE, K + b"\x00v")),
        (K + b"\r\n", (1, NO_SPACE, K + b"\r")),
        (K + b"0 v\n", (1, NO_SPACE, K + b"0 v")),
        (b"nonsense\n", (1, NO_KEY, b"nonsense")),
        (b" " + K + b" v\n", (1, NO_KEY, b" " + K + b" v")),
        (b"\r\n", (1, NO_KEY, b"\r")),
        (b" \n", (1, NO_KEY, b" ")),
        (b"# a comment\n", (1, NO_KEY, b"# a comment")),
        (b"key value\n", (1, NO_KEY, b"key value")),
        (b'"' + K + b'" v\n', (1, NO_KEY, b'"' + K + b'" v')),
        (b"{" + K + b"} v\n", (1, NO_KEY, b"{" + K + b"} v")),
        (b"{1f}\n", (1, NO_KEY, b"{1f}")),
        (K[:-1] + b" v\n", (1, NO_KEY, K[:-1] + b" v")),
        (K.replace(b"a", b"g") + b" v\n", (1, NO_KEY, K.replace(b"a", b"g") + b" v")),
        (K.replace(b"1", b"\xb9") + b" v\n", (1, NO_KEY, K.replace(b"1", b"\xb9") + b" v")),
        (K.replace(b"-", b"") + b" v\n", (1, NO_HYPHENS, K.replace(b"-", b"") + b" v")),
        (K.replace(b"-", b"").upper(), (1, NO_HYPHENS, K.replace(b"-", b"").upper())),
        (K.replace(b"-4", b"-1") + b" v\n",
         (1, "a UUID, but version 1, not 4", K.replace(b"-4", b"-1") + b" v")),
        (K.replace(b"-4", b"-7").upper() + b" v\n",
         (1, "a UUID, but version 7, not 4", K.replace(b"-4", b"-7").upper() + b" v")),
        (K.replace(b"-4", b"-F") + b" v\n",
         (1, "a UUID, but version f, not 4", K.replace(b"-4", b"-F") + b" v")),
        (K.replace(b"-8", b"-7") + b" v\n",
         (1, "a UUID, but not of the RFC 9562 variant", K.replace(b"-8", b"-7") + b" v")),
        (K.replace(b"-8", b"-c") + b" v\n",
         (1, "a UUID, but not of the RFC 9562 variant", K.replace(b"-8", b"-c") + b" v")),
        (b"\xef\xbb\xbf" + K + b" v\n", (1, ORDER_MARK, b"\xef\xbb\xbf" + K + b" v")),
        (b"\xff\xfe" + K + b" v\n", (1, ORDER_MARK, b"\xff\xfe" + K + b" v")),
        (K + b" v\r" + key(2) + b" w\n" + key(2), (2, NO_SPACE, key(2))),
        (K + b" v\n" + K + b" w\n", (2, TWICE, K + b" w")),
    )
    BAD_IN_A_DICT = (
        (K + b" v\n\n" + K.upper() + b" v", (3, TWICE, K.upper() + b" v")),
        (K.upper() + b" v\n" + K + b" v", (2, TWICE, K + b" v")),
        (key(2) + b" v\nbad\n\n" + K + b" w\nworse\n" + K + b" again\n" + b"x" * 99,
         (2, NO_KEY, b"bad"), (5, NO_KEY, b"worse"), (6, TWICE, K + b" again"),
         (7, NO_KEY, b"x" * 99)),
    )
    UNSORTED = "a key below the one before it; sort the file with LC_ALL=C sort"
    UPPER = "a key in upper case, which --sorted does not accept"
    BAD_IF_SORTED = (
        (K + b" v\n" + K + b" w\n" + key(2) + b" x", (2, TWICE, K + b" w")),
        (key(2) + b" v\n\n" + K + b" w\n" + key(3) + b" x", (3, UNSORTED, K + b" w")),
        (K + b" v\n" + key(10).upper() + b" w\n" + key(11) + b" x",
         (2, UPPER, key(10).upper() + b" w")),
        (key(10).upper() + b" v", (1, UPPER, key(10).upper() + b" v")),
        (key(2) + b" v\nbad\n" + K + b" w\n" + key(3) + b" x\n" + b"x" * 99,
         (2, NO_KEY, b"bad"), (3, UNSORTED, K + b" w"), (5, NO_KEY, b"x" * 99)),
    )
    UNPACK = " data; decompress it first, as in: %s FILE | python kv.py serve -"
    REFUSED = (  # a file's content, and the one line that says why it is refused
        (b"", "contains no pair"),
        (b"\n\n\n", "contains no pair"),
        (gzip.compress(K + b" v\n"), "gzip" + UNPACK % "zcat"),
        (b"BZh91AY&SY" + b"\n" * 20, "bzip2" + UNPACK % "bzcat"),
        (b"\xfd7zXZ\0\0\4", "xz" + UNPACK % "xzcat"),
        (b"\x28\xb5\x2f\xfd\x04\x58", "zstd" + UNPACK % "zstdcat"),
    )
    MISTAKES = (  # a file that is served, and what the log says of it
        (K + b" v\n" + key(2) + b" w", "the last line has no newline; was the file cut off?"),
        (K + b" v\r\n" + key(2) + b" w\r\n",
         "all values end in \\r; does the file have Windows line endings?"),
        (K + b" v\r\n" + key(2) + b" w\n", None),
        (K + b" v\n\n", None),
        (K + b" v\n" + key(2) + b" w\r",
         "the last line has no newline; was the file cut off?"),
    )

    def test_every_value_arrives_as_it_is(self):
        pairs = {key(n): value for n, value in enumerate(self.VALUES)}
        lines = [k + b" " + v for k, v in pairs.items()]
        rows = [(b"\n".join(lines),), (b"\n".join(lines) + b"\n",),
                (b"\n\n" + b"\n\n".join(reversed(lines)) + b"\n\n",),
                (b"\n".join(lines), "--sorted"), (b"\n".join(lines) + b"\n", "--sorted"),
                (b"\n\n" + b"\n\n".join(lines) + b"\n\n", "--sorted", "--no-check")]

        def check(content, *options):
            with data_file(content) as path, Serving(path, *options) as server:
                if not options:
                    self.assertEqual(kv.load(path), pairs)
                code, out, err = run("get", "--url", server.url, *pairs)
                self.assertEqual((code, err), (0, b""))
                self.assertEqual(out, b"".join(v + b"\n" for v in pairs.values()))
                with server.connect() as client:
                    for k, value in pairs.items():
                        self.assertEqual(client.ask(k)[::2], (200, value))

        for row, running in side_by_side(check, rows):
            with self.subTest(row[1:]):
                running.result()

    def test_keys_in_either_case(self):
        lines = (b"A0000000-0000-4000-8000-00000000000A upper\n"
                 b"a0000000-0000-4000-B000-00000000000b x")
        with data_file(lines) as path:
            self.assertEqual(kv.load(path), {key(10): b"upper",
                                             b"a0000000-0000-4000-b000-00000000000b": b"x"})

    def named(self, path, bad):
        """Return the lines that name bad lines."""
        return ["%s:%d: %s: %r" % (path, number, fault, line[:50]) for number, fault, line in bad]

    def test_bad_lines_are_named(self):
        for is_sorted, table in ((False, self.BAD + self.BAD_IN_A_DICT),
                                 (True, self.BAD + self.BAD_IF_SORTED)):
            for content, *bad in table:
                with self.subTest(content, is_sorted=is_sorted), data_file(content) as path:
                    with open(path, "rb") as file, self.assertRaises(ValueError) as caught:
                        for _ in kv.parse(file, path, kv.Sorted(file) if is_sorted else {}):
                            pass
                    self.assertEqual(str(caught.exception).split("\n"), self.named(path, bad))

    def test_the_program_names_bad_lines(self):
        for table, *options in ((self.BAD_IN_A_DICT,), (self.BAD_IF_SORTED, "--sorted")):
            content, *bad = table[-1]
            with data_file(content) as path:
                expected = "".join("kv: %s\n" % line for line in self.named(path, bad))
                self.assertEqual(run("serve", "--port", "0", path, *options),
                                 (1, b"", expected.encode()))

    def test_a_bad_line_far_down(self):
        """With all that follows still looked at."""
        lines = [key(n) + b" value" for n in range(9000)]
        lines[5000], lines[8000] = key(3) + b" other", b"bad"
        for options, fault in (((), self.TWICE), (("--sorted",), self.UNSORTED)):
            with data_file(b"\n".join(lines)) as path:
                code, out, err = run("serve", "--port", "0", path, *options)
            self.assertEqual(err.decode().replace(path, "F").splitlines(), [
                "kv: F:5001: %s: %r" % (fault, lines[5000]), "kv: F:8001: %s: b'bad'" % self.NO_KEY])

    def test_ten_bad_lines_are_named_and_the_others_counted(self):
        for count in (9, 10, 11, 25):
            with self.subTest(count), data_file(key(1) + b" v\n" + b"bad\n" * count) as path:
                with self.assertRaises(ValueError) as caught:
                    kv.load(path)
                expected = self.named(path, [(n + 2, self.NO_KEY, b"bad")
                                             for n in range(min(count, 10))])
                if count > 10:
                    expected.append("%s: and %d more bad lines" % (path, count - 10))
                self.assertEqual(str(caught.exception).split("\n"), expected)

    def test_files_that_are_refused(self):
        def refused(content, _):
            with data_file(content) as path:
                return path, run("serve", "--port", "0", path)

        for (_, reason), running in side_by_side(refused, self.REFUSED):
            with self.subTest(reason):
                path, result = running.result()
                self.assertEqual(result, (1, b"", ("kv: %s: %s\n" % (path, reason)).encode()))

    @ON_POSIX
    def test_paths_that_cannot_be_served(self):
        rows = (("/no/such/file", "/no/such/file: No such file or directory"),
                (HERE, HERE + ": Is a directory"),
                ("", "'': No such file or directory"),
                ("new\nline", r"new\\nline: No such file or directory"),
                ("/dev/zero", "/dev/zero: a device, not a file"))
        for (path, line), running in side_by_side(
                lambda path, _: run("serve", "--port", "0", path), rows):
            with self.subTest(path):
                self.assertEqual(running.result()[:2], (1, b""))
                self.assertEqual(running.result()[2].decode(),
                                 "kv: %s\n" % line.replace("\\\\", "\\"))

    def test_what_is_probably_a_mistake_is_served_and_told(self):
        for content, mistake in self.MISTAKES:
            with self.subTest(content), data_file(content) as path, Serving(path) as server:
                told = ["kv: %s: %s" % (path, mistake)] if mistake else []
                self.assertEqual(server.lines()[:-1], told)
                with server.connect() as client:
                    value = re.search(b"(?m)^" + self.K + b" (.*)$", content).group(1)
                    self.assertEqual(client.ask(self.K)[2], value)

    def test_the_parser_works_in_short_steps(self):
        """However long the lines are, so that a reload holds up nobody."""
        for size in (1, 100, 1000, 10000, 100000):
            lines = [key(n) + b" " + b"x" * size + b"\n" for n in range(400000 // size + 1)]
            with data_file(b"".join(lines)) as path, open(path, "rb") as file:
                bytes_read = [0]
                for _ in kv.parse(file, path, {}):
                    bytes_read.append(file.tell())
                steps = [b - a for a, b in zip(bytes_read, bytes_read[1:])]
                self.assertLessEqual(max(steps), kv.STEP_BYTES + len(lines[0]))

    def test_a_file_that_changes_while_it_is_read(self):
        """Its size or its time is changed again and again, from before the start to the end."""
        def grow(path):
            with open(path, "ab") as file:
                file.write(b"\n")

        def refused(change, *options):
            lines = b"".join(key(n) + b" value\n" for n in range(300000))
            with data_file(lines) as path:
                process = subprocess.Popen(command("serve", "--port", "0", path, *options),
                                           stderr=subprocess.PIPE, env=environment())
                try:
                    deadline = time.monotonic() + PATIENCE
                    while process.poll() is None and time.monotonic() < deadline:
                        change(path)
                finally:
                    process.kill()
                return path, process.returncode, process.communicate()[1].decode()

        for row, running in side_by_side(refused, ((grow,), (os.utime,), (os.utime, "--sorted"))):
            with self.subTest(row):
                path, code, err = running.result()
                self.assertEqual((code, err), (1, "kv: %s: changed while it was read\n" % path))

    @ON_POSIX
    def test_standard_input_and_pipes(self):
        lines = b"".join(key(n) + b" %d\n" % n for n in range(9000))
        with data_file(lines) as path, open(path, "rb") as file:
            with Serving("-", stdin=file) as server, server.connect() as client:
                self.assertIn("kv: 9000 pairs of standard input in ", server.lines()[0])
                self.assertEqual(client.ask(key(8999))[2], b"8999")
        self.assertEqual(run("serve", "--port", "0", "-", stdin=b"bad"), (
            1, b"", ("kv: standard input:1: %s: b'bad'\n" % self.NO_KEY).encode()))
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "pipe")
            os.mkfifo(path)
            server = Serving(path)
            with open(path, "wb") as pipe:
                pipe.write(lines)
            with server, server.connect() as client:
                self.assertEqual(client.ask(key(8999))[2], b"8999")


class Counted(kv.Sorted):
    """The pairs of a sorted file, which counts how often it is read."""

    reads = 0

    def read(self, *arguments, **named):
        self.reads += 1
        return super().read(*arguments, **named)


@unittest.skipUnless(hasattr(os, "pread"), "needs os.pread")
class SortedFiles(unittest.TestCase):
    """Look-ups in the file itself."""

    @contextlib.contextmanager
    def sorted_file(self, pairs, end=b"\n", check=True):
        """Yield a Counted of `pairs` {key: value} in a file."""
        lines = [k + b" " + v for k, v in sorted(pairs.items())]
        with data_file(b"\n".join(lines) + end) as path, open(path, "rb") as file:
            found = Counted(file)
            for _ in kv.parse(file, path, found) if check else ():
                pass
            yield found

    @staticmethod
    def get(pairs, k):
        """Return a value as bytes, however long it is."""
        value = pairs.get(k, wait=True)
        if isinstance(value, kv.StoredValue):
            pieces = b"".join(value.pieces())
            assert len(pieces) == len(value), k
            return pieces
        return value

    def find_all(self, pairs, absent=(), end=b"\n", step=1, check=True):
        """Find every `step`th of `pairs` {key: value} in a file of them, and none of `absent`.

        Returns how often the file was read for a pair, on average and at most.
        """
        reads = []
        with self.sorted_file(pairs, end, check) as found:
            self.assertEqual(len(found), len(pairs) if check else 0)
            for k, value in itertools.islice(pairs.items(), 0, None, step):
                found.reads = 0
                self.assertEqual(self.get(found, k), value)
                reads.append(found.reads)
            for k in absent:
                self.assertIsNone(found.get(k, wait=True), k)
        return statistics.mean(reads), max(reads)

    @staticmethod
    def random_key(chance):
        return str(uuid.UUID(int=chance.getrandbits(128), version=4)).encode()

    @staticmethod
    def neighbours(pairs):
        """Yield keys that are one digit off some of those of `pairs`, each in another place."""
        for number, k in enumerate(itertools.islice(pairs, 360)):
            for digit in b"0123456789abcdef":
                other = k[:number % 36] + bytes([digit]) + k[number % 36 + 1:]
                if kv.KEY_RE.fullmatch(other) and other not in pairs:
                    yield other

    def test_random_keys(self):
        """One read nearly always, where the file was checked; else the place is only guessed."""
        chance = random.Random(6)
        pairs = {self.random_key(chance): b"%d" % n * (n % 9) for n in range(100000)}
        absent = [self.random_key(chance) for _ in range(10000)] + list(self.neighbours(pairs))
        for check, mean_limit in ((True, 1.1), (False, 2.2)):
            mean, most = self.find_all(pairs, absent, step=3, check=check)
            self.assertLess(mean, mean_limit)
            self.assertLess(most, 9)

    def test_pages_hardly_longer_than_a_line(self):
        """So that every cut through a line occurs, with marks everywhere and with none."""
        chance, page, mark = random.Random(7), kv.PAGE_BYTES, kv.MARK_BYTES
        self.addCleanup(setattr, kv, "PAGE_BYTES", page)
        self.addCleanup(setattr, kv, "MARK_BYTES", mark)
        for kv.PAGE_BYTES in list(range(38, 80)) + [150, 1000]:
            for count in (1, 2, 3, 10, 60):
                kv.MARK_BYTES = chance.choice((1, 100, mark))
                pairs = {self.random_key(chance): b"v" * chance.choice((0, 1, 30, 31, 500))
                         for _ in range(count)}
                absent = [self.random_key(chance), ABSENT,
                          b"f" * 8 + b"-ffff-4fff-bfff-" + b"f" * 12]
                self.find_all(pairs, absent, end=chance.choice((b"", b"\n", b"\n" * 99)))

    def test_values_of_all_lengths(self):
        """Short ones between those that no page holds, with keys in them."""
        chance = random.Random(8)
        for end, check in ((b"", True), (b"\n", False)):
            pairs = {self.random_key(chance): b" %b " % self.random_key(chance) * chance.choice(
                (0, 1, 50, 100, 107, 108, 430, 431, 1000, 26000)) for _ in range(200)}
            inside = [v[1:37] for v in pairs.values() if v]
            mean, most = self.find_all(pairs, inside, end=end, check=check)
            self.assertLess(most, 2000)

    def test_keys_far_from_random(self):
        """However they crowd, the number of reads grows with the logarithm of the size."""
        chance = random.Random(9)
        clusters = (b"0000000%x-0000-4000-8000-0%011x", b"ffffffff-ffff-4fff-bfff-%x%011x")
        for name, keys in (
                ("alike", (b"01234567-89ab-4cde-8f01-2345678%05x" % chance.getrandbits(20)
                           for _ in range(20000))),
                ("clusters", (form % (chance.getrandbits(4), chance.getrandbits(44))
                              for form in clusters for _ in range(10000))),
                ("sequential", map(key, range(20000))),
                ("powers", (b"%08x-0000-4000-8000-%012x" % (1 << n % 32, n)
                            for n in range(20000)))):
            for check in (True, False):
                with self.subTest(name, check=check):
                    pairs = dict.fromkeys(keys, b"a value") if check else pairs
                    _, most = self.find_all(pairs, self.neighbours(pairs), step=9, check=check)
                    limit = 4 * math.log2(45 * len(pairs) / kv.PAGE_BYTES) + 4
                    self.assertLessEqual(most, limit)

    def test_unchecked(self):
        """Nothing is read before it listens, and what stands in order is found."""
        content = b"no pair\n" + key(1) + b" one\n" + key(2) + b" two\n" + key(2) + b" again\n"
        with data_file(content) as path, Serving(path, "--sorted", "--no-check") as server:
            self.assertIn("kv: unchecked pairs of " + path, server.lines()[0])
            with server.connect() as client:
                self.assertEqual(client.ask(key(1))[2], b"one")
                self.assertEqual(client.ask(key(3))[0], 404)
                self.assertIn(b"unchecked pairs of test.data", client.ask(b"")[2])

    @ON_POSIX
    def test_pipes_are_refused_before_they_are_read(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "pipe")
            os.mkfifo(path)
            code, out, err = run("serve", "--sorted", path)
        self.assertEqual((code, out), (2, b""))
        self.assertRegex(err, rb"\Akv: --sorted is for files, [^\n]*\n\Z")

    def test_long_searches_are_left_to_a_thread(self):
        """Through blank lines, and through long values of other keys."""
        for between in (b"\n" * 100000, b"", b" " + b"x" * 100000):
            content = key(1) + b" one" + between + b"\n" + key(3) + b" three\n"
            with self.subTest(between[:9]), data_file(content) as path:
                with open(path, "rb") as file:
                    found = kv.Sorted(file)
                    if len(content) > 200:
                        with self.assertRaises(BlockingIOError):
                            found.get(key(2))
                    self.assertIsNone(found.get(key(2), wait=True))
                    self.assertEqual(found.get(key(3), wait=True), b"three")

    LINES = 300000

    @contextlib.contextmanager
    def large_file(self, folder=None):
        """Yield the path of a sorted file that takes some time to read from a disk."""
        with tempfile.TemporaryDirectory(dir=folder) as folder:
            path = os.path.join(folder, "large.data")
            with open(path, "wb") as file:
                file.writelines(key(n) + b" %d %s\n" % (n, b"x" * 20) for n in range(self.LINES))
                file.flush()
                os.fsync(file.fileno())
            yield path

    @staticmethod
    def drop_pages(path):
        """Put a file's pages out of memory, as if it was larger than that."""
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    @unittest.skipUnless(hasattr(os, "RWF_NOWAIT"), "needs preadv with RWF_NOWAIT")
    def test_pages_that_are_not_in_memory(self):
        with self.large_file() as path, open(path, "rb") as file:
            pairs = kv.Sorted(file)
            self.drop_pages(path)
            try:
                pairs.get(key(self.LINES // 2))
            except BlockingIOError:
                pass
            else:
                self.skipTest("this file system does not say what is in memory")
            self.assertEqual(pairs.get(key(7), wait=True)[:2], b"7 ")
            with Serving(path, "--sorted") as server, server.connect() as other:
                wrong = []

                def ask(first):
                    with server.connect() as client:
                        for n in range(first, self.LINES, 600):
                            client.send(ask_for(key(n)) + ask_for(key(n + 1)))
                            for number in (n, n + 1):
                                if client.answer()[2].split()[0] != b"%d" % number:
                                    wrong.append(number)

                clients = [threading.Thread(target=ask, args=(n,)) for n in range(0, 600, 75)]
                for client in clients:
                    client.start()
                while any(client.is_alive() for client in clients):
                    self.drop_pages(path)
                    self.assertEqual(other.ask(b"")[0], 200)
                for client in clients:
                    client.join(PATIENCE)
                self.assertEqual(wrong, [])
                until(lambda: server.threads() == 1)

    def test_where_the_system_does_not_say_what_is_in_memory(self):
        folders = [folder for folder in (None, "/dev/shm") if not folder or os.path.isdir(folder)]
        flag = getattr(os, "RWF_NOWAIT", None)
        for folder in folders:
            with self.subTest(folder), self.large_file(folder) as path:
                with open(path, "rb") as file:
                    if flag and not folder:
                        del os.RWF_NOWAIT
                    try:
                        pairs = kv.Sorted(file)
                    finally:
                        if flag:
                            os.RWF_NOWAIT = flag
                    if hasattr(os, "posix_fadvise"):
                        self.drop_pages(path)
                    for n in range(0, self.LINES, 1000):
                        self.assertEqual(pairs.get(key(n)).split()[0], b"%d" % n)

    CHANGES = (  # what becomes of a file in place, which is opened in this mode
        ("r+b", lambda file, content: file.write(content)),
        ("r+b", lambda file, content: file.truncate(len(content) // 3)),
        ("wb", lambda file, content: file.write(content[:-10])),
        ("rb", lambda file, content: os.utime(file.name, (1, 1))))

    def test_a_file_that_changes_in_place(self):
        """An answer is right, or a 500, and told once; after a reload, all is right again."""
        def content(value):
            return b"".join(key(n) + b" %d %b\n" % (n, value) for n in range(2000))

        for number, (mode, change) in enumerate(self.CHANGES):
            with self.subTest(number), data_file(content(b"old")) as path:
                with Serving(path, "--sorted") as server, server.connect() as client:
                    self.assertEqual(client.ask(b"")[0], 200)
                    for n in range(500):
                        self.assertEqual(client.ask(key(n))[2], b"%d old" % n)
                    with open(path, mode) as file:
                        change(file, content(b"new"))
                    for n in range(500):
                        self.assertEqual(client.ask(key(n))[0], 500)
                    self.assertEqual(client.ask(b"")[0], 500)
                    until(lambda: len(server.lines()) > 1)
                    self.assertEqual(server.lines()[1:], [
                        "kv: %s: changed in place; send SIGHUP to reload it" % path])
                    replace(path, content(b"new"))
                    server.reload()
                    for n in range(0, 2000, 100):
                        self.assertEqual(client.ask(key(n))[2], b"%d new" % n)
                    self.assertEqual(client.ask(b"")[0], 200)

    def test_a_file_that_changes_all_the_time(self):
        """While clients ask: no value of another key, none that is half old and half new."""
        values = [b"%d " % n * 900 for n in range(10)] + [b"%d " % n * 20000 for n in range(3)]
        lines = [b"".join(key(n) + b" " + value + b"\n" for n in range(60)) for value in values]
        with data_file(lines[0]) as path, Serving(path, "--sorted") as server:
            stop = threading.Event()

            def rewrite():
                with open(path, "r+b", 0) as file:
                    for content in itertools.cycle(lines):
                        if stop.is_set():
                            break
                        os.pwrite(file.fileno(), content, 0)

            writer = threading.Thread(target=rewrite)
            client = server.connect()
            for n in range(600):
                if n == 100:
                    writer.start()
                try:
                    status, _, body = client.ask(key(n % 60))
                    self.assertTrue(status == 500 or body in values, body[:99])
                except (EOFError, ConnectionError):  # the answer breaks off
                    client.socket.close()
                    client = server.connect()
                if n % 100 == 50:
                    server.process.send_signal(signal.SIGHUP)
            stop.set()
            writer.join(PATIENCE)
            client.socket.close()


class Judge(WithExample):
    """Requests: raw bytes in, and what must come of them."""

    LINE = b"GET /" + KEY + b" HTTP/1.1\r\n"
    HOST = b"Host: kv\r\n"
    POST = b"POST /" + KEY + b" HTTP/1.1\r\n" + HOST
    HTTP_1_0 = b"GET /" + KEY + b" HTTP/1.0\r\n"

    KEPT = (  # what follows is fine: status, head; the connection stays open
        (200, GET_KEY),
        (200, b"\r\n" + GET_KEY),
        (200, GET_KEY.replace(b"GET", b"HEAD")),
        (200, b"\r\n" + GET_KEY.replace(b"GET", b"HEAD")),
        (404, ask_for(ABSENT)),
        (400, ask_for(b"favicon.ico")),
        (200, GET_KEY.replace(b"Host", b"hOST")),
        (200, LINE + b"Host:kv\r\n\r\n"),
        (200, LINE + b"Host: \t kv \t \r\n\r\n"),
        (200, LINE + b"Host: kv:8000\r\n\r\n"),
        (200, LINE + b"Host: kv:\r\n\r\n"),
        (200, LINE + b"Host: 127.0.0.1:8000\r\n\r\n"),
        (200, LINE + b"Host: [::1]:8000\r\n\r\n"),
        (200, LINE + b"Host: [2001:db8::ffff:192.0.2.1]\r\n\r\n"),
        (200, LINE + b"Host: a-b_c.~!$&'()*+;=%20\r\n\r\n"),
        (200, LINE + b"Accept: */*\r\n" + HOST + b"User-Agent: x\r\n\r\n"),
        (200, ask_for(KEY, b"!#$%&'*+-.^_`|~09azAZ: any token")),
        (200, ask_for(KEY, b"X:")),
        (200, ask_for(KEY, b"X: \t ")),
        (200, ask_for(KEY, b"X: a\tb \x80\xff !~")),
        (200, ask_for(KEY, b"Connection: keep-alive")),
        (200, ask_for(KEY, b"Connection: Keep-Alive, X-Close", b"x-close: 1")),
        (200, ask_for(KEY, b"Connection:")),
        (200, ask_for(KEY, b"Content-Length: 0")),
        (200, LINE + b"content-length:0 \r\n" + HOST + b"\r\n"),
        (200, ask_for(KEY, b"Expect: 100-continue")),
        (200, ask_for(KEY, b"expect: 100-Continue")),
        (200, ask_for(KEY, b"Expect: 100-continue,", b"Expect: 100-continue")),
        (200, ask_for(KEY, b"Upgrade: h2c", b"Connection: upgrade")),
        (200, ask_for(KEY, b"Range: bytes=0-1", b"If-None-Match: *")),
        (200, LINE.replace(b"/", b"http://kv/", 1) + b"Host: other\r\n\r\n"),
        (200, LINE.replace(b"/", b"HTTP://[::1]:80/", 1) + HOST + b"\r\n"),
        (200, LINE.replace(KEY, KEY + b"?") + HOST + b"\r\n"),
        (200, LINE.replace(KEY, KEY.upper() + b"?a=b&c=%20/?") + HOST + b"\r\n"),
        (200, LINE.replace(KEY, KEY.replace(b"-", b"%2D")) + HOST + b"\r\n"),
        (200, LINE.replace(KEY, KEY.replace(b"-", b"%2d", 1)) + HOST + b"\r\n"),
        (200, LINE.replace(b"/", b"http://kv/", 1).replace(KEY, KEY + b"?x") + HOST + b"\r\n"),
        (200, GET_KEY.replace(b"1.1", b"1.2")),
        (200, GET_KEY.replace(b"1.1", b"1.9")),
        (200, ask_for(b"")),
        (200, ask_for(b"?health")),
        (200, head(b"GET", b"http://kv")),
        (200, head(b"GET", b"http://kv?x")),
        (204, head(b"OPTIONS", b"*")),
        (204, b"\r\n" + head(b"OPTIONS", b"*")),
        (204, head(b"OPTIONS", b"/", b"Content-Length: 0")),
        (204, head(b"OPTIONS", b"http://kv")),
        (405, POST + b"\r\n"),
        (405, POST + b"Content-Length: 0\r\n\r\n"),
        (405, head(b"CONNECT", b"kv:80")),
        (405, head(b"TRACE", b"/")),
        (501, GET_KEY.replace(b"GET", b"get")),
        (501, GET_KEY.replace(b"GET", b"!#$%&'*+-.^_`|~09azAZ")),
        (200, ask_for(KEY, b"X: " + b"x" * (kv.HEAD_BYTES - len(GET_KEY) - 5))),
        (200, ask_for(KEY, *[b"a:b"] * 2000)),
        (400, ask_for(b"x" * (kv.LINE_BYTES - 14))),
    )

    CLOSED = (  # answered, and then the connection is closed: status, head
        (200, ask_for(KEY, b"Connection: close")),
        (200, LINE + b"connection:Close\t\r\n" + HOST + b"\r\n"),
        (200, ask_for(KEY, b"Connection: close", b"Connection: keep-alive")),
        (200, ask_for(KEY, b"Connection: keep-alive , close")),
        (200, ask_for(KEY, b"Connection: close,x")),
        (404, ask_for(ABSENT, b"Connection: close")),
        (200, HTTP_1_0 + b"\r\n"),
        (200, HTTP_1_0 + HOST + b"Connection: keep-alive\r\n\r\n"),
        (405, HTTP_1_0.replace(b"GET", b"POST") + b"\r\n"),
        # the request line
        (400, b"\r\n\r\n"),
        (400, b"\r\n\r\n" + GET_KEY),
        (400, b"\n" + GET_KEY),
        (400, b" " + GET_KEY),
        (400, b"GET\r\n" + HOST + b"\r\n"),
        (400, b"GET /\r\n\r\n"),
        (400, GET_KEY.replace(b" HTTP/1.1", b"")),
        (400, GET_KEY.replace(b"GET ", b"")),
        (400, GET_KEY.replace(b"GET ", b"GET  ")),
        (400, GET_KEY.replace(b"GET ", b"GET\t")),
        (400, GET_KEY.replace(b" HTTP", b"  HTTP")),
        (400, GET_KEY.replace(b" HTTP", b"\tHTTP")),
        (400, GET_KEY.replace(b" HTTP", b" x HTTP")),
        (400, GET_KEY.replace(b"1.1\r\n", b"1.1 \r\n")),
        (400, GET_KEY.replace(b"GET", b"G(T")),
        (400, GET_KEY.replace(b"GET", b"G\x00T")),
        (400, GET_KEY.replace(b"GET", b"G\xe4T")),
        (400, GET_KEY.replace(b"GET", b"")),
        (400, ask_for(KEY + b"\x00")),
        (400, ask_for(KEY + b"\x7f")),
        (400, ask_for(KEY + b"\x80")),
        (400, ask_for(KEY + b"\xc3\xa4")),
        (400, ask_for(KEY + b"\x1b")),
        (400, ask_for(KEY + b"#x")),
        (400, ask_for(KEY + b"?#x")),
        (400, ask_for(b"%zz")),
        (400, ask_for(b"<>")),
        (400, head(b"GET", KEY)),
        (400, head(b"GET", b"x" + KEY)),
        (400, head(b"GET", b"*")),
        (400, head(b"GET", b"kv:80")),
        (400, head(b"GET", b"ftp://kv/" + KEY)),
        (400, head(b"GET", b"http:///" + KEY)),
        (400, head(b"GET", b"http://me@kv/" + KEY)),
        (400, head(b"GET", b"http:/" + KEY)),
        (400, head(b"POST", b"*")),
        (400, POST.replace(KEY, b"#x") + b"\r\n"),
        # the version
        (505, GET_KEY.replace(b"1.1", b"2.0")),
        (505, GET_KEY.replace(b"1.1", b"0.9")),
        (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        (400, GET_KEY.replace(b"1.1", b"1")),
        (400, GET_KEY.replace(b"1.1", b"1.10")),
        (400, GET_KEY.replace(b"1.1", b"01.1")),
        (400, GET_KEY.replace(b"1.1", b"1,1")),
        (400, GET_KEY.replace(b"HTTP", b"http")),
        (400, GET_KEY.replace(b"HTTP", b"HTTPS")),
        (400, GET_KEY.replace(b"HTTP/", b"HTTP /")),
        # line ends
        (400, GET_KEY.replace(b"\r\n", b"\n")),
        (400, GET_KEY.replace(b"\r\n", b"\n", 1)),
        (400, GET_KEY.replace(b"\r\n", b"\r", 1)),
        (400, LINE + b"Host: kv\n\r\n"),
        (400, LINE + HOST + b"\n"),
        (400, ask_for(KEY, b"X: a\rb")),
        (400, ask_for(KEY, b"X: a\nb: c")),
        (400, ask_for(KEY, b"X: a\r")),
        # fields
        (400, ask_for(KEY, b"X : a")),
        (400, ask_for(KEY, b"X\t: a")),
        (400, LINE + b"Host : kv\r\n\r\n"),
        (400, LINE + b" " + HOST + b"\r\n"),
        (400, LINE + b" X: a\r\n" + HOST + b"\r\n"),
        (400, ask_for(KEY, b"X: a", b" folded")),
        (400, ask_for(KEY, b"X: a", b"\tfolded")),
        (400, ask_for(KEY, b"no colon")),
        (400, ask_for(KEY, b": no name")),
        (400, ask_for(KEY, b"X(: a")),
        (400, ask_for(KEY, b"X\xe4: a")),
        (400, ask_for(KEY, b"X\x00: a")),
        (400, ask_for(KEY, b"X: \x00")),
        (400, ask_for(KEY, b"X: a\x01")),
        (400, ask_for(KEY, b"X: \x0b")),
        (400, ask_for(KEY, b"X: \x7f")),
        (400, HTTP_1_0 + b"no colon\r\n\r\n"),
        # Host
        (400, LINE + b"\r\n"),
        (400, LINE + b"X: a\r\n\r\n"),
        (400, GET_KEY.replace(b"1.1", b"1.2").replace(HOST, b"")),
        (400, ask_for(KEY, b"Host: kv")),
        (400, ask_for(KEY, b"X: a", b"host: kv2")),
        (400, HTTP_1_0 + HOST + HOST + b"\r\n"),
        (400, HTTP_1_0 + b"Host: a b\r\n\r\n"),
    ) + tuple((400, b"GET /" + KEY + b" HTTP/1.1\r\nHost: " + host + b"\r\n\r\n") for host in (
        b"", b" ", b"a, b", b"a,b", b"a b", b"me@kv", b"kv/", b"http://kv", b"kv:port",
        b"kv:80:80", b"kv:-1", b"kv:123456", b"kv?", b"kv#", b"k\\v", b"k%v", b"k%2", b"k<v",
        b"k\"v", b"k\xe4v", b"[::1", b"::1", b"[]", b"[1]", b"[::1]x", b"[::1][::1]", b"[g::]",
        b"[::1%25eth0]", b"[fe80::/10]", b":80")) + (
        # bodies: never read, so what follows the head is never a request
        (400, ask_for(KEY, b"Content-Length: 1") + b"x"),
        (400, ask_for(KEY, b"Content-Length: %d" % len(GET_KEY)) + GET_KEY),
        (400, ask_for(KEY, b"Content-Length: 00")),
        (400, ask_for(KEY, b"Content-Length: 0", b"Content-Length: 0")),
        (400, ask_for(KEY, b"Content-Length: 0, 0")),
        (400, ask_for(KEY, b"Content-Length:")),
        (400, ask_for(KEY, b"Content-Length: -0")),
        (400, ask_for(KEY, b"Transfer-Encoding: chunked") + b"0\r\n\r\n"),
        (400, ask_for(KEY, b"Transfer-Encoding: identity")),
        (400, ask_for(KEY, b"transfer-encoding:")),
        (405, POST + b"Content-Length: 5\r\n\r\nhello"),
        (405, POST + b"Content-Length: 00\r\n\r\n"),
        (405, POST + b"Content-Length: %d\r\n\r\n" % len(GET_KEY) + GET_KEY),
        (405, POST + b"Content-Length: 99999999999999999999999\r\n\r\n"),
        (405, POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
        (405, POST + b"Transfer-Encoding: gzip , Chunked\r\n\r\n"),
        (405, POST + b"Transfer-Encoding: , chunked\r\n\r\n"),
        (405, POST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n"),
        (501, POST.replace(b"POST", b"BREW") + b"Content-Length: 5\r\n\r\nhello"),
        (204, head(b"OPTIONS", b"/", b"Content-Length: 5") + b"hello"),
        (400, POST + b"Content-Length: +5\r\n\r\n"),
        (400, POST + b"Content-Length: -5\r\n\r\n"),
        (400, POST + b"Content-Length: 5, 5\r\n\r\n"),
        (400, POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n"),
        (400, POST + b"Content-Length: 5\r\ncontent-length: 6\r\n\r\n"),
        (400, POST + b"Content-Length: 0x5\r\n\r\n"),
        (400, POST + b"Content-Length: 5_0\r\n\r\n"),
        (400, POST + b"Content-Length: 5 0\r\n\r\n"),
        (400, POST + b"Content-Length: five\r\n\r\n"),
        (400, POST + b"Content-Length:\r\n\r\n"),
        (400, POST + b"Content-Length: \xb2\r\n\r\n"),
        (400, POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"),
        (400, POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n"),
        (400, POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n"),
        (400, POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n"),
        (400, POST + b"Transfer-Encoding: xchunked\r\n\r\n"),
        (400, POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n"),
        (400, POST + b"Transfer-Encoding: chunked;x\r\n\r\n"),
        (400, head(b"BREW", b"/", b"Content-Length: x")),
        # expectations
        (417, ask_for(KEY, b"Expect: 200-ok")),
        (417, ask_for(KEY, b"Expect:")),
        (417, ask_for(KEY, b"Expect: 100-continue, more")),
        (417, ask_for(KEY, b"Expect: 100-continue", b"Expect: more")),
        (417, POST + b"Expect: x\r\n\r\n"),
        # lengths
        (414, ask_for(b"x" * (kv.LINE_BYTES - 13))),
        (414, b"\r\nGET /" + b"x" * kv.LINE_BYTES),
        (501, b"x" * (kv.LINE_BYTES + 1)),
        (501, b"UPDATEREDIRECTREFS " + b"x" * kv.LINE_BYTES),
        (414, b"UPDATEREDIRECTREF " + b"x" * kv.LINE_BYTES),
        (431, ask_for(KEY, b"X: " + b"x" * (kv.HEAD_BYTES - len(GET_KEY) - 4))),
        (431, ask_for(KEY, *[b"a:b"] * 4000)),
        (431, LINE + b"x" * kv.HEAD_BYTES),
    )

    AT_ONCE = (  # refused before the head is complete: status, all that is sent
        (400, b"EHLO x\r\n"),
        (400, b"SSH-2.0-OpenSSH_9.2\r\n"),
        (400, b"PING\r\n"),
        (400, b"*1\r\n$4\r\nPING\r\n"),
        (400, b"GET /\r\n"),
        (400, b"\x16\x03\x01\x02\x00\x01"),
        (400, b"\x00"),
        (400, b"{"),
        (400, b" "),
        (400, b"GET\t"),
        (400, b"\r\n{"),
        (400, b"GET /" + KEY + b" HTTP/1.1\n"),
        (400, b"GET / HTTP/1.1\r\nHost: kv\n"),
        (400, b"GET / HTTP/1.1\r\nX: \rx"),
        (400, b"GET /" + KEY + b" HTTP/1.10\r\n"),
        (400, b"GET /<> HTTP/1.1\r\n"),
        (400, b"GET kv HTTP/1.1\r\nHost"),
        (505, b"GET / HTTP/2.0\r\n"),
        (414, b"GET /" + b"x" * kv.LINE_BYTES),
        (501, b"x" * (kv.LINE_BYTES + 1)),
        (431, b"GET / HTTP/1.1\r\n" + b"x" * kv.HEAD_BYTES),
        (400, GET_KEY + b"EHLO x\r\n"),
    )

    CHANGING = re.compile(  # what differs from answer to answer: the date, the counts
        rb"(?<=Date: )[^\r]*|(?<=Content-Length: )\d+(?=\r\n\r\n10000 pairs )"
        rb"|\d+ requests answered, \d+ connections open")

    def all_answers(self, ways, pause=0):
        """Send each of `ways`, a list of pieces, on a new connection.

        Returns all that is answered on each up to its end, without Date. A `pause` after the
        first piece of all, in seconds, makes it likely that it is received by itself.
        """
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(self.server.connect()) for _ in ways]
            for client, pieces in zip(clients, ways):
                client.send(pieces[0])
            time.sleep(pause)
            for client, pieces in zip(clients, ways):
                with contextlib.suppress(ConnectionError):  # it may be closed before all is sent
                    for piece in pieces[1:]:
                        client.send(piece)
                    client.socket.shutdown(socket.SHUT_WR)
            return [self.CHANGING.sub(b"0", client.rest()) for client in clients]

    def answers(self, *pieces):
        """The same for one connection."""
        return self.all_answers([pieces])[0]

    def test_what_keeps_the_connection(self):
        with self.server.connect() as client:
            for status, request in self.KEPT:
                with self.subTest(request[:150]):
                    client.send(request)
                    answer = client.answer(request.lstrip().split(b" ")[0])
                    self.assertEqual(answer[0], status, answer)
                    self.assertNotIn("connection", answer[1])

    def test_what_closes_the_connection(self):
        """A right request behind it gets nothing, and the answer says that it is the last."""
        for status, request in self.CLOSED:
            with self.subTest(request[:150]):
                answers = self.answers(request + GET_KEY)
                self.assertEqual(len(re.findall(br"HTTP/1\.1 \d", answers)), 1, answers)
                self.assertRegex(answers, b"^HTTP/1.1 %d " % status)
                self.assertIn(b"\r\nConnection: close\r\n", answers)
                if status >= 400:
                    self.assertRegex(answers, br"\r\n\r\n[ -~]+\n\Z")

    def test_what_is_refused_at_once(self):
        """While the client waits for an answer and sends nothing more."""
        for status, beginning in self.AT_ONCE:
            with self.subTest(beginning[:150]), self.server.connect() as client:
                client.send(beginning)
                if beginning.startswith(GET_KEY):
                    self.assertEqual(client.answer()[2], VALUE)
                got, fields, body = client.answer()
                self.assertEqual((got, fields["connection"]), (status, "close"))
                self.assertEqual(client.rest(), b"")

    def test_the_same_however_the_bytes_come(self):
        """Split at every byte (each eighth, where that takes a connection) and byte by byte."""
        for kept, table in ((True, self.KEPT), (False, self.CLOSED)):
            for status, request in table:
                if len(request) > 400:  # those are split at their limits
                    cuts = [n for limit in (kv.LINE_BYTES, kv.HEAD_BYTES, len(request))
                            for n in range(limit - 3, limit + 3) if 0 < n < len(request)]
                    ways = [[request[:n], request[n:]] for n in cuts]
                else:
                    cuts = range(1, len(request), 1 if kept else 8)
                    ways = [[request[:n], request[n:]] for n in cuts]
                    ways.append([request[n:n + 1] for n in range(len(request))])
                with self.subTest(request[:150]):
                    whole = self.answers(request)
                    self.assertTrue(whole)
                    if kept:
                        pieces = [piece for way in ways for piece in way]
                        self.assertEqual(self.answers(*pieces), whole * len(ways))
                    else:
                        self.assertEqual(self.all_answers(ways), [whole] * len(ways))

    def test_the_same_when_a_head_comes_in_two_parts(self):
        """Split in the middle and before the last byte, so that the server waits for the rest."""
        heads = [request for _, request in self.KEPT + self.CLOSED]
        for some in (heads[n:n + 100] for n in range(0, len(heads), 100)):
            whole = self.all_answers([[request] for request in some])
            for cut in (lambda request: len(request) // 2, lambda request: len(request) - 1):
                ways = [[request[:cut(request)], request[cut(request):]] for request in some]
                for request, one, two in zip(some, whole, self.all_answers(ways, pause=0.1)):
                    with self.subTest(request[:150]):
                        self.assertTrue(one)
                        self.assertEqual(two, one)

    def test_a_bad_request_between_good_ones(self):
        for status, request in self.CLOSED:
            if status >= 400 and not request.startswith(b"\r\n"):
                with self.subTest(request[:150]):
                    answers = self.answers(GET_KEY * 2 + request + GET_KEY)
                    self.assertEqual(re.findall(br"HTTP/1\.1 (\d+)", answers),
                                     [b"200", b"200", b"%d" % status])

    def test_a_head_request_has_no_body(self):
        for status, request in self.KEPT + self.CLOSED:
            if request.startswith(b"GET ") and len(request) < 400:
                with self.subTest(request):
                    bare = self.answers(b"HEAD" + request[3:])
                    full = self.answers(request)
                    if b"\r\n\r\n10000 pairs " in full:
                        continue  # whose length changes with its counts
                    size = int(re.search(br"Content-Length: (\d+)", full).group(1))
                    self.assertEqual(bare, full[:-size])

    TEXTS = (  # what the body of an answer says
        (ask_for(ABSENT), b"key not found\n"),
        (ask_for(b"x"), b"not a version 4 UUID\n"),
        (POST + b"\r\n", b"method not allowed: use GET or HEAD\n"),
        (ask_for(KEY, b"Expect: x"), b"unsupported Expect header (RFC 9110 section 10.1.1)\n"),
        (LINE + b"\r\n", b"missing Host header (RFC 9112 section 3.2)\n"))

    def test_texts_of_errors(self):
        for request, text in self.TEXTS:
            with self.subTest(request), self.server.connect() as client:
                client.send(request)
                self.assertEqual(client.answer()[2], text)

    STATUS = (  # method, path, status
        (b"GET", KEY, 200), (b"GET", KEY.upper(), 200), (b"GET", b"", 200),
        (b"GET", ABSENT, 404), (b"GET", ABSENT[:-1], 400), (b"GET", ABSENT + b"0", 400),
        (b"GET", KEY + b"/", 400), (b"GET", b"/" + KEY, 400), (b"GET", b"favicon.ico", 400),
        (b"GET", KEY.replace(b"-4", b"-1"), 400), (b"GET", KEY.replace(b"-8", b"-7"), 400),
        (b"GET", KEY.replace(b"-", b""), 400), (b"GET", b"%33" + KEY[1:], 400),
        (b"POST", KEY, 405), (b"PUT", KEY, 405), (b"DELETE", KEY, 405), (b"PATCH", KEY, 405),
        (b"TRACE", KEY, 405), (b"CONNECT", KEY, 405), (b"POST", b"", 405),
        (b"OPTIONS", KEY, 204), (b"OPTIONS", b"", 204),
        (b"BREW", KEY, 501), (b"get", KEY, 501), (b"G", KEY, 501))

    def test_status_fields_and_body(self):
        with self.server.connect() as client:
            for method, path, status in self.STATUS:
                with self.subTest(method=method, path=path):
                    got, fields, body = client.ask(path, method=method)
                    self.assertEqual(got, status)
                    self.check(dict(fields), status, body)
                    if method == b"GET":
                        bare = client.ask(path, method=b"HEAD")
                        self.assertEqual(bare[0], status)
                        self.assertEqual(dict(bare[1], date=""), dict(fields, date=""))

    def check(self, fields, status, body):
        self.assertEqual(fields.pop("server"), "kv/" + kv.__version__)
        self.assertRegex(fields.pop("date"),
                         r"^[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} [\d:]{8} GMT$")
        self.assertEqual(fields.pop("x-content-type-options"), "nosniff")
        self.assertEqual(fields.pop("cache-control"), "no-cache")
        if status != 204:
            self.assertEqual(fields.pop("content-type"), "text/plain; charset=utf-8")
            self.assertEqual(fields.pop("content-length"), str(len(body)))
        if status in (204, 405):
            self.assertEqual(fields.pop("allow"), "GET, HEAD, OPTIONS")
        self.assertEqual(fields, {})
        if status >= 400:
            self.assertRegex(body, br"\A[ -~]+\n\Z")
            self.assertNotIn(b"<", body)

    def test_the_status_page(self):
        with self.server.connect() as client:
            status, _, body = client.ask(b"")
            self.assertEqual((status, client.ask(b"", method=b"HEAD")[0]), (200, 200))
            client.send(head(b"GET", b"http://" + KEY))  # the host of the target is no key
            self.assertIn(b"pairs of example.data", client.answer()[2])
        self.assertRegex(body.decode(), r"\A10000 pairs of example\.data, since [^\n]* GMT\n"
                                        r"\d+ requests answered, \d+ connections open\n"
                                        r"[^\n]*/KEY[^\n]*\n\Z")
        self.assertNotIn(HERE, body.decode())

    def test_the_remembered_verdict(self):
        """It is one on the fields as they are, not on others, however many there are."""
        with self.server.connect() as client:
            for fields, status in (
                    ((b"X: a",), 200), ((b"X: a",), 200), ((b"x: A",), 200), ((b"X : a",), 400),
                    ((b"X: a", b"Expect: x"), 417), ((b"X: a", b"expect: X"), 417)):
                for method in (b"GET", b"HEAD", b"GET"):
                    if status != 200:
                        client.__exit__()
                        client = self.server.connect()
                    got, answered, body = client.ask(KEY, *fields, method=method)
                    self.assertEqual(got, status)
                    self.assertEqual(bool(body), method == b"GET")
            self.assertEqual(client.rest(), b"")
            client.__exit__()
        with self.server.connect() as client:
            for turn in range(2):
                for n in range(0, kv.VERDICTS * 3, 50):
                    requests = b"".join(ask_for(KEY, b"X: %d" % (n + i)) for i in range(50))
                    client.send(requests)
                    for _ in range(50):
                        self.assertEqual(client.answer()[2], VALUE)
                    self.assertEqual(client.ask(KEY, b"X: %d" % n, method=b"POST")[0], 405)
            self.assertEqual(client.ask(KEY, b"X: 1", b"Connection: close")[0], 200)
            self.assertEqual(client.rest(), b"")

    def test_heads_that_take_long_to_judge(self):
        """Heads as long as they may be, and what breaks a rule at their end: time must grow
        with the bytes, not with their square, as nobody else is answered meanwhile."""
        room = kv.HEAD_BYTES - 200
        fillers = [filler * (room // len(filler)) for filler in (
            b"a:\r\n", b"a: \t \r\n", b"Connection: keep-alive\r\n", b"Host: kv\r\n",
            b"Connection: ,,,,close,,,\tx\r\n", b"X:" + b" " * 5000 + b"\r\n",
            b"Content-Length: 0\r\n", b"Expect: 100-continue\r\n",
            b"X:" + b" " * 15000 + b"\x01\r\n")]
        fillers += [b"%b: [%b]x\r\n" % (name, text * (room // len(text)))
                    for text in (b" ", b":", b",", b"a , ", b"1", b"%41")
                    for name in (b"Host", b"Connection", b"Content-Length",
                                 b"Transfer-Encoding", b"Expect")]
        starts = [line + filler for line in (self.LINE, self.POST) for filler in fillers]
        starts += [b"GET http://[%b HTTP/1.1\r\nHost: kv\r\n" % (text * (7900 // len(text)))
                   for text in (b":", b"%41", b"a:")]
        for start in starts:
            with self.subTest(start[:100]):
                before = time.process_time()
                for last in (b"", self.HOST, b"Content-Length: 5x\r\n", b"Expect: x\r\n",
                             b"Connection: close x\r\n", b"Host: [" + b"1:" * 40 + b"\r\n"):
                    kv.judge((start + last)[:-2])
                    kv.judge_beginning(start + last)
                self.assertLess(time.process_time() - before, 0.3)  # most take 0.005

    # What a request must be to be answered otherwise than by a refusal, said once more and in
    # another way: kv.py takes a head apart, these match it whole.
    TCHAR = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
    ORACLE_LINE = re.compile(
        rb"(?:\r\n)?(?P<method>" + TCHAR + rb"+) (?P<target>(?:[!$&-;=?-Z\[\]_a-z~]|%[0-9A-Fa-f]{2})+)"
        rb" HTTP/(?P<version>[0-9][.][0-9])\r\n")
    ORACLE_FIELDS = re.compile(rb"(?:" + TCHAR + rb"+:[\t\x20-\x7e\x80-\xff]*\r\n)*\r\n")
    ORACLE_HOST = (rb"(?:\[[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:.]*\]|(?:[\w.~!$&'()*+;=-]|%[0-9A-Fa-f]{2})+)"
                   rb"(?::\d{0,5})?")

    def expected(self, sent):
        """Yield the status of each answer to the bytes `sent`, and whether it is the last."""
        last = False
        while b"\r\n\r\n" in sent and not last:
            request, end, sent = sent.partition(b"\r\n\r\n")
            status, last = self.expected_of(request + end)
            yield status, last

    def expected_of(self, request):
        line = self.ORACLE_LINE.match(request)
        if not line:
            return 400, True
        method, target, version = line.group("method", "target", "version")
        if not version.startswith(b"1."):
            return 505, True
        if not self.ORACLE_FIELDS.fullmatch(request, line.end()):
            return 400, True

        def values(name):
            found = re.findall(rb"(?mi)^%b:[\t ]*(.*?)[\t ]*\r$" % name, request[line.end():])
            return [value.lower() for value in found]

        hosts, lengths, codings = map(values, (b"Host", b"Content-Length", b"Transfer-Encoding"))
        if len(hosts) != 1 and (hosts or version != b"1.0"):
            return 400, True
        if hosts and not re.fullmatch(self.ORACLE_HOST, hosts[0]):
            return 400, True
        body = codings or lengths not in ([], [b"0"])
        if body and (method in (b"GET", b"HEAD") or codings and lengths
                     or lengths and not re.fullmatch(rb"\d+", b"/".join(lengths))
                     or codings and not re.fullmatch(
                         rb"(?:(?!chunked\s*,)" + self.TCHAR + rb"*\s*,\s*)*chunked[\s,]*",
                         b",".join(codings))):
            return 400, True
        options = re.split(rb"[\t ]*,[\t ]*", b",".join(values(b"Connection")))
        last = bool(body) or version == b"1.0" or b"close" in options
        path = re.fullmatch(rb"(?:(?i:http)://" + self.ORACLE_HOST + rb")?((?:/[^?]*)?)(?:\?.*)?",
                            target)
        has_path = path and target[:1] != b"?"
        if not has_path and method != b"CONNECT" and (method, target) != (b"OPTIONS", b"*"):
            return 400, True
        if not re.fullmatch(rb"(,?\s*100-continue\s*,?)+|none", b",".join(
                values(b"Expect") or [b"none"])):
            return 417, True
        if method == b"OPTIONS":
            return 204, last
        if method in (b"POST", b"PUT", b"DELETE", b"TRACE", b"PATCH", b"CONNECT"):
            return 405, last
        if method not in (b"GET", b"HEAD"):
            return 501, last
        asked = re.sub(rb"(?i)%2d", b"-", path[1][1:].lower())
        if asked in (b"", KEY):
            return 200, last
        hexadecimal = rb"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
        return 404 if re.fullmatch(hexadecimal, asked) else 400, last

    def test_mutated_heads(self):
        """Each is answered as the rules above say, by whole answers and nothing else."""
        chance = random.Random(9112)
        heads = [request for _, request in self.KEPT + self.CLOSED if len(request) < 400]
        pieces = (b"\r", b"\n", b"\r\n", b" ", b"\t", b":", b"\0", b",", b"0", b"/", b"?", b"%2d",
                  b"Host: x\r\n", b"\xff" * 9)
        seen = set()
        for _ in range(4000):
            sent = bytearray(chance.choice(heads))
            for _ in range(chance.choice((0, 1, 1, 1, 2, 5))):
                where = chance.randrange(len(sent))
                what = chance.choice(pieces + (bytes([chance.randrange(256)]),))
                sent[where:where + chance.choice((0, 1, 1, 4))] = what
            sent = bytes(sent)
            got = self.answers(sent)
            statuses = []
            while got:
                answer = re.match(br"HTTP/1\.1 (\d+) [A-Z][ -~]*\r\n"
                                  br"(?:[A-Z][A-Za-z-]*: [ -~]+\r\n)+\r\n", got)
                self.assertTrue(answer, (sent, got))
                status = int(answer.group(1))
                statuses.append((status, b"\r\nConnection: close\r\n" in answer.group()))
                got = got[answer.end():]
                text = re.match(rb"10000 pairs.*\n0\n.*\n|this is a value|[ -~]+\n", got)
                got = got[text.end() if text else 0:]
            expected = list(self.expected(sent))
            if len(statuses) == len(expected) + 1:  # the rest was refused before its end
                self.assertIn(statuses.pop(), ((400, True), (505, True)), sent)
            self.assertEqual(statuses, expected, sent)
            seen.update(status for status, _ in statuses)
        self.assertEqual(seen, {200, 204, 400, 404, 405, 417, 501, 505})
        with self.server.connect() as client:
            self.assertEqual(client.ask(KEY)[2], VALUE)
        self.assertEqual(self.server.log.count(b"\n"), 1, self.server.log)


class Loop(WithExample):
    """Connections: answers to many at once, and what is handed to a thread and back."""

    SIZE = 8000000  # bytes of a value that no socket takes at once

    @contextlib.contextmanager
    def serving_large(self, *arguments, **how):
        """Yield a server with one large value, of KEY, and OTHER_KEY as in example.data."""
        content = KEY + b" " + b"x" * self.SIZE + b"\n" + OTHER_KEY + b" " + OTHER_VALUE + b"\n"
        with data_file(content) as path, Serving(path, *arguments, **how) as server:
            yield server

    def test_all_of_the_example_over_one_connection(self):
        with self.server.connect() as client:
            for k, value in example_pairs().items():
                self.assertEqual(client.ask(k)[::2], (200, value))

    def test_fifty_clients_at_once(self):
        pairs = list(example_pairs().items())[:5000]
        wrong, start = [], threading.Barrier(50)

        def client(pairs):
            with self.server.connect() as connection:
                start.wait(PATIENCE)  # all are connected before the first asks
                for k, value in pairs:
                    answer = connection.ask(k)
                    if answer[::2] != (200, value):
                        wrong.append(answer)
            wrong.append(None)

        threads = [threading.Thread(target=client, args=(pairs[n::50],)) for n in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual(wrong, [None] * 50)

    def test_pipelined_requests_are_answered_in_order(self):
        pairs = list(example_pairs().items())[:500]
        data = b"".join(ask_for(k) for k, _ in pairs)
        with self.server.connect() as client:
            for pieces in ([data], [data[n:n + 1000] for n in range(0, len(data), 1000)]):
                thread = threading.Thread(target=lambda: [client.send(piece) for piece in pieces])
                thread.start()
                for _, value in pairs:
                    self.assertEqual(client.answer()[::2], (200, value))
                thread.join(PATIENCE)

    def test_answers_are_not_held_back(self):
        """By Nagle's algorithm: an answer that goes out while another is not acknowledged."""
        options = kv.argparse.Namespace(host="127.0.0.1", port=0, verbose=False,
                                        max_connections=9, file="", sorted=False, check=True,
                                        reuse_port=False)
        server = kv.Server(options, kv.Data(options, kv.Log(False)), kv.Log(False))
        server.server_activate()
        with server.socket, Client(server.socket.getsockname()):
            with server.get_request()[0] as accepted:
                self.assertTrue(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        server.selector.close()

    @ON_LINUX
    def test_clients_that_need_no_thread(self):
        """Plain requests, 2,000 idle connections, 500 heads that trickle in."""
        resource_limit = min(kv.MAX_CONNECTIONS, 2600)
        raise_descriptor_limit(resource_limit + 100)
        with Serving(EXAMPLE) as server, contextlib.ExitStack() as stack:
            clients = [stack.enter_context(server.connect()) for _ in range(2000)]
            trickling = [stack.enter_context(server.connect()) for _ in range(500)]
            for n in range(0, len(GET_KEY) - 1, 10):
                for client in trickling:
                    client.send(GET_KEY[n:n + 10][:len(GET_KEY) - 1 - n])
                self.assertEqual(server.threads(), 1)
                self.assertEqual(clients[n].ask(KEY)[2], VALUE)
            for client in trickling:
                client.send(GET_KEY[-1:])
                self.assertEqual(client.answer()[2], VALUE)
            for client in clients[::100]:
                self.assertEqual(client.ask(ABSENT)[0], 404)
            self.assertEqual(server.threads(), 1)

    @ON_LINUX
    def test_hand_over_and_back(self):
        """An answer that is not taken whole, and requests behind it, before and after."""
        behind = ask_for(OTHER_KEY) + ask_for(ABSENT) + ask_for(OTHER_KEY)
        with self.serving_large() as server:
            with server.connect() as client:
                for _ in range(3):
                    client.send(ask_for(OTHER_KEY) + GET_KEY + behind + behind[:40])
                    until(lambda: server.threads() == 2)
                    self.assertEqual(client.answer()[2], OTHER_VALUE)
                    self.assertEqual(len(client.answer()[2]), self.SIZE)
                    client.send(behind[40:])
                    self.assertEqual([client.answer()[0] for _ in range(6)],
                                     [200, 404, 200] * 2)
                    until(lambda: server.threads() == 1)
                    self.assertEqual(client.ask(OTHER_KEY)[2], OTHER_VALUE)
                client.send(GET_KEY * 5)
                for _ in range(5):
                    self.assertEqual(len(client.answer()[2]), self.SIZE)
                client.send(GET_KEY + b"EHLO x\r\n")  # what cannot become a head behind it
                self.assertEqual(len(client.answer()[2]), self.SIZE)
                self.assertEqual(client.answer()[0], 400)
                self.assertEqual(client.rest(), b"")
            until(lambda: server.threads() == 1)

    @ON_LINUX
    @unittest.skipUnless(IS_CPYTHON, "PyPy has its own ideas of memory")
    def test_a_large_value_is_not_copied_for_each_client(self):
        for options in ((), ("--sorted",)):
            with self.subTest(options), self.serving_large(*options) as server:
                with contextlib.ExitStack() as stack:
                    before = proc(server.pid, "VmRSS")
                    for _ in range(50):
                        client = stack.enter_context(server.connect(receive_buffer=4096))
                        client.send(GET_KEY)
                    until(lambda: server.threads() == 51)
                    self.assertLess(proc(server.pid, "VmRSS") - before, 10000)

    def asks_on(self, server, turns=50):
        """Ask, on an own connection; all answers must come soon."""
        with server.connect() as client:
            for _ in range(turns):
                start = time.monotonic()
                self.assertEqual(client.ask(OTHER_KEY)[2], OTHER_VALUE)
                self.assertLess(time.monotonic() - start, 1)

    def test_others_are_answered_meanwhile(self):
        """While a head trickles in, an answer is not taken, 100 connections linger."""
        with self.serving_large() as server, contextlib.ExitStack() as stack:
            trickling, stuck = (stack.enter_context(server.connect()) for _ in range(2))
            trickling.send(GET_KEY[:20])
            stuck.send(GET_KEY)
            stuck.receive()
            for _ in range(100):
                client = stack.enter_context(server.connect())
                client.send(b"bad\r\n\r\n")
                self.assertEqual(client.answer()[0], 400)
            self.asks_on(server)
            trickling.send(GET_KEY[20:])
            self.assertEqual(len(trickling.answer()[2]), self.SIZE)
            self.assertEqual(len(stuck.answer()[2]), self.SIZE)
            self.asks_on(server, 5)

    def test_the_answer_arrives_although_the_client_still_sends(self):
        for request in (head(b"POST", b"/", b"Content-Length: 50000000"),
                        ask_for(KEY, b"bad"), b"x" * 20000, b"GET /" + b"x" * 20000):
            with self.subTest(request[:100]), self.server.connect() as client:
                client.send(request)
                client.send(b"x" * 200000)  # in flight while the answer comes
                status, fields, body = client.answer()
                self.assertIn(status, (400, 405, 414, 501))
                self.assertEqual(fields["connection"], "close")
                self.assertEqual(client.rest(), b"")  # the end, and no reset

    def test_a_large_last_answer_arrives_whatever_is_sent_behind_its_request(self):
        with self.serving_large() as server:
            for behind in (b"\r\n", GET_KEY * 200):
                with self.subTest(behind[:9]), server.connect() as client:
                    client.send(ask_for(KEY, b"Connection: close"))
                    client.receive()  # it is on its way
                    client.send(behind)
                    self.assertEqual(len(client.answer()[2]), self.SIZE)
                    self.assertEqual(client.rest(), b"")

    def test_clients_that_vanish(self):
        """Before they ask, while they ask, while they are answered."""
        with self.serving_large() as server:
            for request in (b"", b"GET", ask_for(OTHER_KEY), ask_for(KEY, b"bad"), GET_KEY):
                for _ in range(20):
                    client = server.connect()
                    client.send(request)
                    if request == GET_KEY:
                        client.receive()
                    client.reset()
            self.asks_on(server, 5)
            self.assertEqual(len(server.lines()), 1, server.log)

    def test_a_fault_is_a_line_and_a_500(self):
        with Serving(EXAMPLE, limits={"judge_path": None}) as server:  # it cannot be called
            with server.connect() as client:
                for _ in range(2):
                    status, _, body = client.ask(ABSENT)
                    self.assertEqual((status, body[-1:]), (500, b"\n"))
                    self.assertEqual(client.ask(KEY)[2], VALUE)
            until(lambda: len(server.lines()) == 3)
            for line in server.lines()[1:]:
                self.assertRegex(line, r"^kv: fault in answering 127\.0\.0\.1: TypeError\(")

    @ON_LINUX
    @unittest.skipUnless(IS_CPYTHON, "PyPy has its own ideas of memory")
    def test_too_few_threads(self):
        """A client that would need one is closed, all others go on."""
        with self.serving_large() as server, contextlib.ExitStack() as stack:
            limit_memory(server.pid, 1000)  # kB: too little for the stack of a thread
            for number in range(1, 6):
                client = stack.enter_context(server.connect(receive_buffer=4096))
                client.send(GET_KEY)
                until(lambda: len(server.lines()) > number)
                self.assertRegex(server.lines()[number], r"^kv: cannot start a thread for 127\.0\.0\.1: ")
                self.assertLess(len(client.rest()), self.SIZE)
                self.asks_on(server, 2)
            limit_memory(server.pid, None)
            with server.connect() as client:
                self.assertEqual(len(client.ask(KEY)[2]), self.SIZE)

    def test_without_what_windows_lacks(self):
        program = ("import os, signal, socket, sys; sys.path.insert(0, %r)\n"
                   "del signal.SIGHUP\n"
                   "if hasattr(os, 'sched_getaffinity'): del os.sched_getaffinity\n"
                   "sys.modules['resource'] = None\n"
                   "del socket.getfqdn, socket.gethostbyaddr  # nor is any name looked up\n"
                   "import kv; kv.CAN_GATHER = False; sys.exit(kv.main())" % HERE)
        serve = [sys.executable, "-c", program, "serve", EXAMPLE, "--port", "0"]
        with Serving(command_line=serve) as server:
            with server.connect() as client:
                client.send(GET_KEY * 20)
                for _ in range(20):
                    self.assertEqual(client.answer()[2], VALUE)
            self.assertEqual(server.stop(), 0)


def raise_descriptor_limit(needed):
    """Let this process open enough files, for its clients and servers."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        if hard < needed:
            raise unittest.SkipTest("needs %d open files" % needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def limit_memory(pid, kilobytes):
    """Let a process have only so much memory more than it has; with None, as much as it likes."""
    import resource
    limit = resource.RLIM_INFINITY
    if kilobytes is not None:
        limit = (proc(pid, "VmSize") + kilobytes) * 1024
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def unsent_bytes(server, client, after=0):
    """Return how many bytes the system holds that a client on this machine has not taken."""
    time.sleep(after)
    ports = [b":%04X" % port for port in (server.port, client.socket.getsockname()[1])]
    with open("/proc/net/tcp", "rb") as file:
        for fields in map(bytes.split, file):
            if [address[-5:] for address in fields[1:3]] == ports:
                return int(fields[4].partition(b":")[0], 16)
    return 0


@ON_POSIX
class Limits(unittest.TestCase):
    """What a server meets in years: slow, silent and too many clients, and too little of all."""

    IDLE, WHOLE = {"IDLE_SECONDS": 0.7, "HEAD_SECONDS": 9}, {"IDLE_SECONDS": 9, "HEAD_SECONDS": 1}
    TAKE = {"ANSWER_SECONDS": 9, "ANSWER_BYTES_A_SECOND": 10**9, "STALL_SECONDS": 9}
    DEADLINES = (  # the limits; what a client sends first, then on and on; seconds until its end,
                   # and a status that it gets before that
        (IDLE, b"", b"", 0.7, None),
        (IDLE, GET_KEY, b"", 0.7, 200),
        (IDLE, GET_KEY + b"\r\n" + GET_KEY, b"", 0.7, 200),
        (WHOLE, b"GET", b"", 1, 408),
        (WHOLE, b"", b"a", 1, 408),
        (WHOLE, b"GET / HTTP/1.1\r\n", b"a:b\r\n", 1, 408),
        (WHOLE, GET_KEY + b"GET", b"a", 1, 408),
        (IDLE, b"\r\n", b"", 0.7, None),
        (WHOLE, b"\r\nG", b"", 1, 408),
        ({"LINGER_SECONDS": 0.7}, b"bad\r\n", b"x", 0.7, 400),
    )

    def seconds(self, limits, first, on_and_on, _, status):
        """Return how long the server keeps a client."""
        with Serving(EXAMPLE, limits=limits) as server, server.connect() as client:
            start = time.monotonic()
            client.send(first)
            client.socket.settimeout(0.05)
            more = True
            with contextlib.suppress(ConnectionError):
                while (more or on_and_on) and time.monotonic() < start + PATIENCE:
                    with contextlib.suppress(socket.timeout):
                        more = client.receive()
                    client.send(on_and_on)
            statuses = re.findall(rb"HTTP/1.1 (\d+)", client.received)
            self.assertEqual(statuses[-1:], [b"%d" % status] if status else [])
            return time.monotonic() - start

    def test_deadlines(self):
        for row, running in side_by_side(self.seconds, self.DEADLINES):
            with self.subTest(row):
                self.assertGreaterEqual(running.result(), row[3])
                self.assertLess(running.result(), row[3] + 3)

    LARGE = KEY + b" " + b"x" * 20000000 + b"\n" + OTHER_KEY + b" " + OTHER_VALUE + b"\n"
    NOT_TAKEN = (  # the limits, and whether the client goes on taking a little
        (dict(TAKE, STALL_SECONDS=0.7), False),
        (dict(TAKE, ANSWER_SECONDS=0.7), False),
        (dict(TAKE, ANSWER_SECONDS=0.7), True),
    )

    def not_taken(self, limits, takes_some):
        """Return how long the server keeps a client that does not take all of its answer."""
        with data_file(self.LARGE) as path, Serving(path, limits=limits) as server:
            with server.connect(receive_buffer=4096) as client:
                start = time.monotonic()
                client.send(GET_KEY)
                until(lambda: server.threads() == 2)
                while server.threads() == 2 and time.monotonic() < start + PATIENCE:
                    time.sleep(0.02)
                    if takes_some:
                        client.socket.recv(1000)
                return time.monotonic() - start

    @ON_LINUX
    def test_answers_that_are_not_taken(self):
        for row, running in side_by_side(self.not_taken, self.NOT_TAKEN):
            with self.subTest(row):
                self.assertGreaterEqual(running.result(), 0.7)
                self.assertLess(running.result(), 6)

    def test_a_client_that_takes_its_answer_slowly_gets_it_whole(self):
        limits = {"ANSWER_SECONDS": 0.2, "ANSWER_BYTES_A_SECOND": 500000}
        with data_file(self.LARGE) as path, Serving(path, limits=limits) as server:
            with server.connect() as client:  # 40 s and more by those figures
                client.send(GET_KEY)
                for _ in range(5):
                    client.receive()
                    time.sleep(0.1)
                self.assertEqual(len(client.answer()[2]), 20000000)

    @ON_LINUX
    def test_a_client_that_takes_its_answer_slowly_but_steadily(self):
        """It is not one that takes nothing, although the system holds a lot for it."""
        limits = {"STALL_SECONDS": 0.5, "ANSWER_BYTES_A_SECOND": 100000}
        with data_file(self.LARGE) as path, Serving(path, limits=limits) as server:
            with server.connect() as client:
                client.send(GET_KEY)
                while len(client.received) < 6000000:
                    client.receive()
                for _ in range(20):
                    time.sleep(0.1)
                    client.received += client.socket.recv(100000)
                self.assertEqual(len(client.answer()[2]), 20000000)

    def test_who_has_asked_is_not_evicted(self):
        """Even if its request and a newcomer are seen in the same round of the loop."""
        with Serving(EXAMPLE, "--max-connections", "2") as server:
            with server.connect() as first, server.connect() as second:
                self.assertEqual(first.ask(KEY)[2], VALUE)
                self.assertEqual(second.ask(KEY)[2], VALUE)
                server.process.send_signal(signal.SIGSTOP)
                with server.connect() as third:
                    third.send(GET_KEY)
                    first.send(GET_KEY)
                    server.process.send_signal(signal.SIGCONT)
                    self.assertEqual(first.answer()[2], VALUE)
                    self.assertEqual(third.answer()[2], VALUE)
                    self.assertEqual(second.rest(), b"")

    def test_connections_that_come_back_from_threads_and_are_evicted(self):
        """At the same moment, again and again."""
        with data_file(KEY + b" " + b"x" * 400000 + b"\n") as path:
            with Serving(path, "--max-connections", "1") as server:
                stop = time.monotonic() + 1.5

                def ask():
                    answers = 0
                    while time.monotonic() < stop:
                        with contextlib.suppress(EOFError, ConnectionError):
                            with server.connect() as client:
                                while time.monotonic() < stop:
                                    answers += len(client.ask(KEY)[2]) == 400000
                    return answers

                answers = [running.result() for _, running in side_by_side(ask, [()] * 6)]
                self.assertGreater(min(answers), 0)
                self.assertEqual(len(server.lines()), 1, server.log)

    def test_newcomers_take_the_place_of_who_has_waited_longest(self):
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(Serving(EXAMPLE, "--max-connections", "3"))
            first, second, third = (stack.enter_context(server.connect()) for _ in range(3))
            for client in (second, first, third):
                self.assertEqual(client.ask(KEY)[2], VALUE)
            fourth = stack.enter_context(server.connect())
            self.assertEqual(fourth.ask(KEY)[2], VALUE)
            self.assertEqual(second.rest(), b"")
            for client in (first, third, fourth):
                self.assertEqual(client.ask(KEY)[2], VALUE)

    @ON_LINUX
    def test_whatever_they_wait_for(self):
        """The rest of a head, the next request, more of an answer to be taken, a last byte."""
        def idle(client):
            self.assertEqual(client.ask(OTHER_KEY)[2], OTHER_VALUE)

        def trickle(client):
            client.send(GET_KEY[:9])

        def stick(client):
            client.send(GET_KEY)
            until(lambda: unsent_bytes(server, client)
                  == unsent_bytes(server, client, after=0.1) > 0)

        def linger(client):
            client.send(b"bad\r\n")
            self.assertEqual(client.answer()[0], 400)

        def small(server):
            return server.connect(receive_buffer=4096)

        with data_file(self.LARGE) as path, contextlib.ExitStack() as stack:
            server = stack.enter_context(Serving(path, "--max-connections", "2"))
            for wait_longest in (idle, trickle, stick, linger):
                for wait in (idle, trickle, stick):
                    with self.subTest(wait_longest=wait_longest, wait=wait):
                        until(lambda: server.threads() == 1)
                        with small(server) as first, small(server) as second:
                            self.assertEqual(second.ask(OTHER_KEY)[2], OTHER_VALUE)
                            wait_longest(first)
                            self.assertEqual(second.ask(OTHER_KEY)[2], OTHER_VALUE)
                            wait(second)
                            with server.connect() as third:
                                idle(third)
                                with contextlib.suppress(ConnectionError):
                                    self.assertLess(len(first.rest()), 20000000)
                                if wait == trickle:
                                    second.send(GET_KEY[9:])
                                if wait in (trickle, stick):
                                    self.assertEqual(len(second.answer()[2]), 20000000)
                                idle(second)
                                idle(third)

    @ON_LINUX
    @unittest.skipUnless(IS_CPYTHON, "PyPy has its own ideas of memory")
    def test_clients_that_take_nothing_lock_nobody_out(self):
        size = 200
        with data_file(self.LARGE) as path, contextlib.ExitStack() as stack:
            server = stack.enter_context(Serving(path, "--max-connections", str(size)))
            before = proc(server.pid, "VmRSS")
            stuck = [stack.enter_context(server.connect()) for _ in range(size)]
            for client in stuck:
                client.send(GET_KEY)
            until(lambda: server.threads() == size + 1)
            for _ in range(size + 50):
                start = time.monotonic()
                newcomer = stack.enter_context(server.connect())
                self.assertEqual(newcomer.ask(OTHER_KEY)[2], OTHER_VALUE)
                self.assertLess(time.monotonic() - start, 1)
            self.assertLess(proc(server.pid, "VmRSS") - before, 12000)
            until(lambda: server.threads() == 1)
            self.assertEqual(len(server.lines()), 1, server.log)

    @ON_LINUX
    @unittest.skipUnless(IS_CPYTHON, "PyPy has its own ideas of memory")
    def test_pipelining_does_not_multiply_memory(self):
        content = KEY + b" " + b"x" * 16000 + b"\n"
        for options in ((), ("--sorted",)):
            with data_file(content) as path, Serving(path, *options) as server:
                with contextlib.ExitStack() as stack:
                    before = proc(server.pid, "VmRSS")
                    for _ in range(100):
                        client = stack.enter_context(server.connect(receive_buffer=4096))
                        client.send(GET_KEY * 130)
                    until(lambda: server.threads() == 101)
                    self.assertLess(proc(server.pid, "VmRSS") - before, 40000)
                    client.send(b"")
                    for _ in range(130):
                        self.assertEqual(len(client.answer()[2]), 16000)
                    client.send(head(b"HEAD", b"/" + KEY) * 130)
                    for _ in range(130):
                        self.assertEqual(client.answer(b"HEAD")[0], 200)

    def crowd(self, stack, server, size):
        """Connect clients of which every other one sends the beginning of a head."""
        for number in range(size):
            client = stack.enter_context(server.connect())
            with contextlib.suppress(ConnectionError):
                client.send(b"GET" * (number % 2))

    def test_a_crowd_leaves_room(self):
        with Serving(EXAMPLE, "--max-connections", "20") as server, contextlib.ExitStack() as stack:
            crowd = threading.Thread(target=self.crowd, args=(stack, server, 200))
            crowd.start()
            asked, client = 0, server.connect()
            while crowd.is_alive() or asked < 200:
                start = time.monotonic()
                try:
                    answer = client.ask(KEY)
                except (EOFError, ConnectionError):  # it was its turn: as any client, once more
                    client.__exit__()
                    client = server.connect()
                    answer = client.ask(KEY)
                self.assertEqual(answer[2], VALUE)
                self.assertLess(time.monotonic() - start, 1)
                asked += 1
            client.__exit__()
            crowd.join(PATIENCE)

    @ON_LINUX
    def test_too_few_descriptors(self):
        """All connect, the later ones instead of the earlier; and it does not spin meanwhile."""
        for options, told in ((("--max-connections", "1000"), 1), ((), 0)):
            with contextlib.ExitStack() as stack:
                serve = ["sh", "-c", 'ulimit -n 50; exec "$@"', "sh"] + command(
                    "serve", EXAMPLE, "--port", "0", *options)
                server = stack.enter_context(Serving(command_line=serve))
                self.assertEqual(server.lines()[:-1], [
                    "kv: --max-connections 1000 needs 1032 open files, but the limit is 50"
                    "; raise it with ulimit -n, or LimitNOFILE under systemd"][:told])
                self.crowd(stack, server, 200)
                with server.connect() as client:
                    self.assertEqual(client.ask(KEY)[2], VALUE)
                    before = processor_seconds(server.pid)
                    time.sleep(1)
                    self.assertLess(processor_seconds(server.pid) - before, 0.3)
                    self.assertEqual(client.ask(KEY)[2], VALUE)

    @ON_LINUX
    def test_it_raises_its_limit_of_open_files(self):
        import resource
        raise_descriptor_limit(600)
        for options, soft in (((), 600), (("--max-connections", "300"), 332)):
            serve = ["sh", "-c", 'ulimit -Sn 60; ulimit -Hn 600; exec "$@"', "sh"] + command(
                "serve", EXAMPLE, "--port", "0", *options)
            with Serving(command_line=serve) as server:
                self.assertEqual(resource.prlimit(server.pid, resource.RLIMIT_NOFILE)[0], soft)
                self.assertEqual(len(server.lines()), 1, server.log)

    @ON_LINUX
    @unittest.skipUnless(shutil.which("strace"), "needs strace")
    def test_what_the_system_refuses(self):
        """An accept that fails as that client has gone; a higher limit of open files."""
        for fault, told in (("accept4:error=ECONNABORTED:when=3", None),
                            ("accept4:error=EMFILE:when=3", None),
                            ("prlimit64:error=EPERM:when=3+", "cannot raise the limit of open files: ")):
            trace = ["strace", "-f", "-qq", "-o", os.devnull, "-e", "inject=" + fault]
            serve = ["sh", "-c", 'ulimit -Sn 64; exec "$@"', "sh"] + trace + command(
                "serve", EXAMPLE, "--port", "0")
            with self.subTest(fault), Serving(command_line=serve) as server:
                try:
                    self.assertEqual(told in server.lines()[0] if told else True, True)
                    with server.connect() as first, server.connect() as second:
                        self.assertEqual(second.ask(KEY)[2], VALUE)
                        with server.connect() as third:
                            self.assertEqual(third.ask(KEY)[2], VALUE)
                            if "EMFILE" not in fault:  # which makes room
                                self.assertEqual(first.ask(KEY)[2], VALUE)
                finally:
                    subprocess.run(["pkill", "-P", str(server.pid)])  # strace would be left

    @ON_LINUX
    def test_memory_does_not_grow_with_requests(self):
        missing = ask_for(ABSENT) + ask_for(KEY, b"X: y").replace(b"GET", b"HEAD") + ask_for(b"x")
        with Serving(EXAMPLE) as server:
            sizes = []
            for n in range(200):
                with server.connect() as client:  # 996 that keep the connection, one that does not
                    client.send(GET_KEY * 498 + missing * 166 + b"bad\r\n\r\n")
                    client.socket.shutdown(socket.SHUT_WR)
                    self.assertEqual(client.rest().count(b"\r\nServer: "), 997)
                if n in (19, 199):
                    sizes.append(proc(server.pid, "VmRSS"))
            if IS_CPYTHON:
                self.assertLess(sizes[1] - sizes[0], 300)  # kB: less than 2 bytes a request

    @ON_LINUX
    def test_a_log_that_nobody_reads(self):
        """A pipe that is full, or a terminal that was stopped: answers come, lines are lost."""
        for make, options in ((os.pipe, ("--verbose",)), (self.pseudo_terminal, ("--verbose",)),
                              (os.pipe, ())):
            with self.subTest(make, options=options):
                reading, writing = make()
                port = free_port()
                process = subprocess.Popen(
                    command("serve", EXAMPLE, "--port", str(port), *options), stderr=writing,
                    env=environment(), stdin=subprocess.DEVNULL)
                try:
                    log = b""
                    while b" on http://" not in log:
                        self.assertTrue(select.select([reading], [], [], PATIENCE)[0], log)
                        log += os.read(reading, 1000)
                    if make is os.pipe:
                        self.fill(writing)
                    else:
                        os.write(reading, b"\x13")  # Ctrl-S
                    with Client(("127.0.0.1", port)) as client:
                        for _ in range(2000):
                            self.assertEqual(client.ask(KEY)[2], VALUE)
                        process.send_signal(signal.SIGHUP)
                        time.sleep(0.3)
                        self.assertEqual(client.ask(KEY)[2], VALUE)
                    process.send_signal(signal.SIGTERM)
                    self.assertEqual(process.wait(5), 0)
                finally:
                    process.kill()
                    process.wait(PATIENCE)
                    os.close(reading)
                    os.close(writing)

    @staticmethod
    def pseudo_terminal():
        import pty
        return pty.openpty()

    @staticmethod
    def fill(pipe):
        """Fill a pipe to the brim, and leave it as it was otherwise."""
        os.set_blocking(pipe, False)
        for piece in (b"x" * 4096, b"x"):
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(pipe, piece)
        os.set_blocking(pipe, True)


@ON_POSIX
class ReloadAndStop(unittest.TestCase):
    """New data, and the end."""

    COUNT = 2000

    def content(self, value, count=COUNT):
        return b"".join(key(n) + b" %b %d\n" % (value, n) for n in range(count))

    @contextlib.contextmanager
    def clients_asking(self, server, connections=8):
        """Ask on, on many connections; yields a list of what is answered, each (number, answer).

        The number of an exception in place of an answer is what had come of it.
        """
        answers, stop = [], threading.Event()

        def ask(number):
            with server.connect() as client:
                while not stop.is_set():
                    try:
                        answers.append((number % self.COUNT, client.ask(key(number % self.COUNT))))
                    except (EOFError, ConnectionError) as error:
                        return answers.append((bytes(client.received), error))
                    if answers[-1][1][1].get("connection") == "close":
                        return
                    number += connections

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(connections)]
        for thread in threads:
            thread.start()
        try:
            until(lambda: len(answers) > 100)
            yield answers
        finally:
            stop.set()
            for thread in threads:
                thread.join(PATIENCE)

    def test_reload_under_load(self):
        for options in ((), ("--sorted",)):
            with self.subTest(options), data_file(self.content(b"old")) as path:
                with Serving(path, *options) as server, server.connect() as client:
                    with self.clients_asking(server) as answers:
                        for turn in range(5):
                            done = len(answers)
                            count = self.COUNT + turn
                            replace(path, self.content(b"new%d" % turn, count))
                            server.reload()
                            self.assertRegex(server.lines()[-1], r"^kv: %d pairs of %s in \d+\.\d\d"
                                             r" s, reloaded \(%d before\)$" % (
                                                 count, path, count - bool(turn)))
                            for n in range(100):
                                self.assertEqual(client.ask(key(n))[::2],
                                                 (200, b"new%d %d" % (turn, n)))
                            until(lambda: len(answers) > done + 100)
                    for number, (status, _, body) in answers:
                        self.assertRegex(body, b"^(old|new[0-4]) %d$" % number)
                        self.assertEqual(status, 200)

    @ON_LINUX
    def test_others_are_answered_while_a_reload_runs(self):
        with data_file(self.content(b"old", 100000)) as path, Serving(path) as server:
            with server.connect() as client:
                replace(path, self.content(b"new", 100000))
                server.process.send_signal(signal.SIGHUP)
                asked = 0
                deadline = time.monotonic() + PATIENCE
                while b"reloaded" not in server.log and time.monotonic() < deadline:
                    start = time.monotonic()
                    self.assertIn(client.ask(key(7))[2], (b"old 7", b"new 7"))
                    self.assertLess(time.monotonic() - start, 1)
                    asked += 1
                self.assertGreater(asked, 50)
                self.assertEqual(server.threads(), 1)

    BAD = (  # what the file is replaced with (None: nothing), and what is said of it
        (b"bad", ":1: no version 4 UUID at the start of the line: b'bad'"),
        (b"", ": contains no pair"),
        (None, ": No such file or directory"),
        (key(1) + b" v\n" + key(2)[:20], ":2: no version 4 UUID at the start of the line: %r"
         % key(2)[:20]),
        ("a pipe", ": not a file that can be read again"),
        ("/dev/zero", ": not a file that can be read again"),
    )

    def test_bad_files_leave_the_data(self):
        for options in ((), ("--sorted",)):
            with data_file(self.content(b"old")) as path, Serving(path, *options) as server:
                with server.connect() as client:
                    for content, fault in self.BAD:
                        with self.subTest(content, options=options):
                            os.path.lexists(path) and os.remove(path)
                            if content == "a pipe":
                                os.mkfifo(path)
                            elif content == "/dev/zero":
                                os.symlink(content, path)
                            elif content is not None:
                                replace(path, content)
                            logged = len(server.lines())
                            server.reload()
                            self.assertEqual(server.lines()[logged:], [
                                "kv: " + path + fault, "kv: the data stays as it was"])
                            for n in range(0, self.COUNT, 100):
                                self.assertEqual(client.ask(key(n))[2], b"old %d" % n)

    def test_half_a_file_is_served_and_told(self):
        with open(EXAMPLE, "rb") as file:
            whole = file.read()
        with data_file(whole) as path, Serving(path) as server, server.connect() as client:
            replace(path, whole[:300000])
            server.reload()
            self.assertEqual(server.lines()[1], "kv: %s: the last line has no newline; was the "
                                                "file cut off?" % path)
            self.assertRegex(server.lines()[2], r"reloaded \(10000 before\)$")
            self.assertEqual(client.ask(KEY)[2], VALUE)

    def test_standard_input_cannot_be_reloaded(self):
        with data_file(key(1) + b" value\n") as path, open(path) as file:
            with Serving("-", stdin=file) as server, server.connect() as client:
                server.reload()
                self.assertEqual(server.lines()[1], "kv: standard input: not a file that can be "
                                                    "read again")
                self.assertEqual(client.ask(key(1))[2], b"value")

    def test_a_signal_during_a_reload_causes_one_more(self):
        def again():
            server.process.send_signal(signal.SIGHUP)
            return client.ask(key(1))[2] == b"new 1"

        with data_file(self.content(b"old", 50000)) as path:
            with Serving(path) as server, server.connect() as client:
                server.process.send_signal(signal.SIGHUP)
                replace(path, self.content(b"new", 50000))
                until(again)  # a reload takes many times as long as a look does
                until(lambda: server.log.count(b"reloaded") == 2)
                self.assertEqual(server.stop(), 0)
                server.reader.join(PATIENCE)
                self.assertLessEqual(server.log.count(b"reloaded"), 3)

    def test_a_storm_of_signals(self):
        with Serving(EXAMPLE) as server, server.connect() as client:
            for _ in range(20):
                for _ in range(1000):
                    server.process.send_signal(signal.SIGHUP)
                self.assertEqual(client.ask(KEY)[2], VALUE)
            self.assertEqual(server.stop(), 0)

    @ON_LINUX
    @unittest.skipUnless(IS_CPYTHON, "PyPy has its own ideas of memory")
    def test_a_reload_without_enough_memory(self):
        with data_file(self.content(b"x" * 500, 60000)) as path, Serving(path) as server:
            limit_memory(server.pid, 12000)
            answered = 0
            for _ in range(3):
                logged = len(server.lines())
                server.process.send_signal(signal.SIGHUP)
                deadline = time.monotonic() + PATIENCE
                while ("kv: the data stays as it was" not in server.lines()[logged:]
                       and time.monotonic() < deadline):
                    with contextlib.suppress(EOFError, ConnectionError), server.connect() as client:
                        self.assertEqual(client.ask(key(7))[2], b"x" * 500 + b" 7")
                        answered += 1
                self.assertIn("kv: %s: too large for the memory; --sorted needs less" % path,
                              server.lines()[logged:])
            self.assertGreater(answered, 20)
            limit_memory(server.pid, None)
            server.reload()
            self.assertRegex(server.lines()[-1], r"reloaded \(60000 before\)$")

    def test_stop_under_load(self):
        """All that was read is answered whole; the last answer of a connection says so."""
        for how in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(how), data_file(self.content(b"value")) as path:
                with Serving(path) as server, server.connect() as idle:
                    with self.clients_asking(server) as answers:
                        start = time.monotonic()
                        self.assertEqual(server.stop(how), 0)
                        self.assertLess(time.monotonic() - start, 5)
                    self.assertEqual(idle.rest(), b"")
                    with self.assertRaises(ConnectionError):
                        server.connect()
                self.assertEqual(server.lines()[-1], "kv: stopped")
                for number, answer in answers:
                    self.assertEqual(answer[::2], (200, b"value %d" % number))

    def test_stop_answers_each_of_the_requests_that_came_together(self):
        counts = []

        def ask(client):
            with contextlib.suppress(EOFError, ConnectionError):
                while True:
                    counts.append(0)
                    client.send(GET_KEY * 40)
                    for _ in range(40):
                        self.assertEqual(client.answer()[::2], (200, VALUE))
                        counts[-1] += 1

        for _ in range(3):
            with Serving(EXAMPLE) as server, server.connect() as client:
                asked = len(counts)
                asking = threading.Thread(target=ask, args=(client,))
                asking.start()
                until(lambda: len(counts) > asked + 20)
                self.assertEqual(server.stop(), 0)
                asking.join(PATIENCE)
        self.assertLessEqual(set(counts), {0, 40})

    def stuck(self, stack):
        """Return a server that stops, but waits for a client that takes nothing."""
        path = stack.enter_context(data_file(Limits.LARGE))
        server = stack.enter_context(Serving(path, limits={"DRAIN_SECONDS": 1}))
        client = stack.enter_context(server.connect(receive_buffer=4096))
        client.send(GET_KEY)
        client.receive()
        return server, client

    def refuses_connections(self, server):
        with contextlib.suppress(ConnectionError):
            server.connect().__exit__()
            return False
        return True

    def test_a_stop_waits_for_answers_but_not_for_ever(self):
        with contextlib.ExitStack() as stack:
            server, client = self.stuck(stack)
            start = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            until(lambda: self.refuses_connections(server))
            server.process.send_signal(signal.SIGTERM)  # which changes nothing
            self.assertEqual(len(client.answer()[2]), 20000000)
            self.assertEqual(server.process.wait(PATIENCE), 0)
        with contextlib.ExitStack() as stack:
            server, client = self.stuck(stack)
            start = time.monotonic()
            self.assertEqual(server.stop(), 0)
            self.assertLess(time.monotonic() - start, 5)

    def test_a_second_interrupt_ends_it_at_once(self):
        with contextlib.ExitStack() as stack:
            server, client = self.stuck(stack)
            server.process.send_signal(signal.SIGINT)
            until(lambda: self.refuses_connections(server))
            start = time.monotonic()
            self.assertEqual(server.stop(signal.SIGINT), 130)
            self.assertLess(time.monotonic() - start, 2)

    def test_two_interrupts_in_a_row(self):
        with Serving(EXAMPLE) as server, server.connect() as client:
            client.send(GET_KEY[:9])
            self.assertEqual(client.socket.sendall(GET_KEY[9:20]), None)
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.01)  # two signals at once would be one
            self.assertEqual(server.stop(signal.SIGINT), 130)

    def test_killed_and_started_again_on_the_same_port(self):
        with Serving(EXAMPLE) as server, self.clients_asking(server, 4):
            server.stop(signal.SIGKILL)
        again = command("serve", EXAMPLE, "--port", str(server.port))
        with Serving(command_line=again) as server, server.connect() as client:
            self.assertEqual(client.ask(KEY)[2], VALUE)

    def test_signals_end_a_load(self):
        for how in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(how):
                process = subprocess.Popen(
                    command("serve", "--port", "0", "-"), stdin=subprocess.PIPE,
                    stderr=subprocess.PIPE, env=environment())
                with process:
                    process.stdin.write(self.content(b"value", 5000))  # more than a pipe holds
                    process.stdin.flush()
                    process.send_signal(how)
                    self.assertEqual(process.wait(PATIENCE), 0)
                    self.assertRegex(process.stderr.read(), rb"^[\dT:+-]+ kv: stopped\n$")

    def test_a_hangup_during_the_first_load(self):
        """It causes a reload, once the data is there."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "data")
            os.mkfifo(path)
            server = Serving(path, start_new_session=True)
            with open(path, "wb") as pipe:
                pipe.write(self.content(b"first"))
                pipe.flush()
                until(lambda: not select.select([], [pipe], [], 0)[1] or True)
                time.sleep(0.5)  # the signal is for a process that loads, not one that starts
                server.process.send_signal(signal.SIGHUP)
                replace(path, self.content(b"second"))
            with server, server.connect() as client:
                until(lambda: client.ask(key(1))[2] == b"second 1")

    @ON_LINUX
    def test_the_terminal_is_closed(self):
        """Then it ends, like any program there; but not under nohup, where SIGHUP reloads."""
        import pty
        ways = (([], False), (["nohup"], True))
        for prefix, survives in ways if IS_CPYTHON else ways[:1]:  # see Limitations
            with self.subTest(prefix), tempfile.TemporaryDirectory() as folder:
                log_path = os.path.join(folder, "log")
                port = free_port()
                pid, terminal = pty.fork()
                if not pid:
                    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                    os.dup2(log, 2)
                    os.dup2(log, 1)
                    serve = prefix + command("serve", EXAMPLE, "--port", str(port))
                    os.execvpe(serve[0], serve, environment())

                def log():
                    with contextlib.suppress(OSError), open(log_path) as file:
                        return file.read()
                    return ""

                try:
                    until(lambda: " on http://" in log())
                    os.close(terminal)  # the kernel sends SIGHUP
                    until(lambda: ("reloaded" if survives else "stopped") in log() or survives)
                    if survives:
                        os.kill(pid, signal.SIGHUP)
                        until(lambda: "reloaded" in log())
                        with Client(("127.0.0.1", port)) as client:
                            self.assertEqual(client.ask(KEY)[2], VALUE)
                        os.kill(pid, signal.SIGTERM)
                    ended = until(lambda: os.waitpid(pid, os.WNOHANG)[0] and "ended")
                    self.assertEqual(ended, "ended")
                except BaseException:
                    os.kill(pid, signal.SIGKILL)
                    raise

class SeveralKeys(WithExample):
    """GET /KEY,KEY,... and those who ask for many keys."""

    LINE, OTHER_LINE = KEY + b" " + VALUE + b"\n", OTHER_KEY + b" " + OTHER_VALUE + b"\n"
    LISTS = (  # path, status, body
        (KEY + b"," + OTHER_KEY, 200, LINE + OTHER_LINE),
        (OTHER_KEY.upper() + b"," + KEY, 200, OTHER_LINE + LINE),
        (KEY + b"," + KEY + b"," + OTHER_KEY + b"," + KEY.upper(), 200, LINE + OTHER_LINE),
        (ABSENT + b"," + KEY, 200, LINE),
        (ABSENT + b"," + key(1), 200, b""),
        (KEY.replace(b"-", b"%2D") + b"," + OTHER_KEY + b"?x,y", 200, LINE + OTHER_LINE),
        (KEY + b",", 400, b"not a version 4 UUID\n"),
        (b"," + KEY, 400, b"not a version 4 UUID\n"),
        (KEY + b"%2C" + KEY, 400, b"not a version 4 UUID\n"),
        (KEY + b"," + KEY.replace(b"-4", b"-1"), 400, b"not a version 4 UUID\n"))

    def test_lists(self):
        with self.server.connect() as client:
            for path, status, body in self.LISTS:
                with self.subTest(path):
                    self.assertEqual(client.ask(path)[::2], (status, body))
                    got, fields, _ = client.ask(path, method=b"HEAD")
                    self.assertEqual((got, fields["content-length"]), (status, str(len(body))))

    def test_as_many_as_the_request_line_holds(self):
        with open(EXAMPLE, "rb") as file:
            lines = list(itertools.islice(file, 216))
        with self.server.connect() as client:
            status, _, body = client.ask(b",".join(line[:36] for line in lines[:215]))
            self.assertEqual((status, body), (200, b"".join(lines[:215])))
            self.assertEqual(client.ask(b",".join(line[:36] for line in lines))[0], 414)

    @ON_LINUX
    def test_large_answers_are_not_joined(self):
        """20 clients that ask for 15 MB each, of which one takes them."""
        lines = [key(n) + b" " + b"%d" % n * size + b"\n"
                 for n, size in enumerate((5000000, 9, 5000000, 0, 5000000))]
        path = b",".join(map(key, range(5)))
        for options in ((), ("--sorted",)):
            with self.subTest(options), data_file(b"".join(lines)) as file:
                with Serving(file, *options) as server, contextlib.ExitStack() as stack:
                    before = proc(server.pid, "VmRSS")
                    clients = [stack.enter_context(server.connect(receive_buffer=4096))
                               for _ in range(19)] + [stack.enter_context(server.connect())]
                    for client in clients:
                        client.send(ask_for(path) + ask_for(key(3)))
                    until(lambda: server.threads() == 21)
                    if IS_CPYTHON:
                        self.assertLess(proc(server.pid, "VmRSS") - before, 10000)
                    self.assertEqual(clients[-1].answer()[2], b"".join(lines))
                    self.assertEqual(clients[-1].answer()[2], b"")
                    until(lambda: server.threads() == 20)

    def test_get_many(self):
        pairs = dict(itertools.islice(example_pairs().items(), 1000))
        asked = [k.decode() for k in pairs] + [ABSENT.decode()]
        found = kv.get_many(asked, self.server.url)
        self.assertEqual(found, {k.decode(): value for k, value in pairs.items()})
        forms = [uuid.UUID(KEY.decode()), KEY.decode().upper(), "{%s}" % KEY.decode()]
        self.assertEqual(kv.get_many(iter(forms), self.server.url), dict.fromkeys(forms, VALUE))
        self.assertEqual(kv.get_many([], self.server.url), {})
        for error, keys, url in ((ValueError, ["x"], self.server.url),
                                 (OSError, asked, "http://127.0.0.1:1")):
            with self.assertRaises(error):
                kv.get_many(keys, url)

    def test_all_of_the_example(self):
        """As if asked for one by one: in the order asked, the same key twice."""
        pairs = list(example_pairs().items())
        stdin = b"\n".join([k for k, _ in pairs] + [ABSENT, b"nonsense", pairs[0][0]])
        code, out, err = run("get", "-", "--url", self.server.url, stdin=stdin)
        self.assertEqual(out, b"".join(v + b"\n" for _, v in pairs + pairs[:1]))
        self.assertEqual((code, err.decode()), (
            2, "kv: %s: not found\nkv: nonsense: not a UUID\n" % ABSENT.decode()))

    ALONE = (  # what a server answers to two keys together that is then asked one by one
        (400, b"not / and a version 4 UUID\n"), (414, b"too long\n"), (200, b"x" * 2000),
        (200, KEY + b" " + VALUE), (200, key(1) + b" value\n"), (200, b"hello\n"))

    def test_servers_that_do_not_know_lists(self):
        self.addCleanup(setattr, kv, "TOGETHER_BYTES", kv.TOGETHER_BYTES)
        kv.TOGETHER_BYTES = 1000
        for answer in self.ALONE:
            asked = []

            class Older(http.server.BaseHTTPRequestHandler):
                def do_GET(self):
                    asked.append(self.path)
                    status, body = answer if "," in self.path else (200, self.path.encode())
                    self.send_response(status)
                    self.send_header("Content-Type", "text/plain")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

                def log_message(self, *_):
                    pass

            names = [KEY.decode(), OTHER_KEY.decode()]
            with self.subTest(answer), http.server.HTTPServer(("127.0.0.1", 0), Older) as old:
                thread = threading.Thread(target=old.serve_forever, args=(0.01,))
                thread.start()
                try:
                    url = "http://127.0.0.1:%d" % old.server_port
                    self.assertEqual(kv.get_many(names, url),
                                     {name: b"/" + name.encode() for name in names})
                    self.assertEqual(asked, ["/" + ",".join(names)] + ["/" + n for n in names])
                finally:
                    old.shutdown()
                    thread.join(PATIENCE)


@ON_POSIX
class Sockets(unittest.TestCase):
    """Sockets that servers share, and those that systemd hands down."""

    HAND_DOWN = (  # what systemd does between fork and exec, with the socket as descriptor 4
        "import os, sys; os.dup2(int(sys.argv[1]), 3)\n"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=sys.argv[2])\n"
        "os.execv(sys.executable, [sys.executable] + sys.argv[3:])")

    def handed_down(self, handed, *arguments, count="1"):
        """Return the command that serves on an open socket, and its keyword arguments."""
        descriptor = handed.fileno()
        prefix = [sys.executable, "-c", self.HAND_DOWN, str(descriptor), count]
        serve = command("serve", *(arguments or (EXAMPLE,)))[1:]
        return {"command_line": prefix + serve, "pass_fds": (descriptor,)}

    @staticmethod
    @contextlib.contextmanager
    def listening(family=socket.AF_INET):
        """Yield a listening socket and its address."""
        with tempfile.TemporaryDirectory() as folder, socket.socket(family) as listener:
            is_unix = family == socket.AF_UNIX
            listener.bind(os.path.join(folder, "kv.sock") if is_unix else ("127.0.0.1", 0))
            listener.listen(100)
            yield listener, listener.getsockname()

    @contextlib.contextmanager
    def clients_asking(self, address, is_kept, count=8):
        """Ask on and on, on `count` connections; yields the list of what is answered.

        A connection is only closed after an answer that says so, or if not `is_kept`.
        """
        answers, stop = [], threading.Event()

        def ask():
            client = None
            while not stop.is_set():
                client = client or Client(address)
                status, fields, body = client.ask(KEY)
                answers.append((status, body))
                if not is_kept or fields.get("connection") == "close":
                    client.__exit__()
                    client = None
            if client:
                client.__exit__()

        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            clients = [pool.submit(ask) for _ in range(count)]
            try:
                until(lambda: len(answers) > 100)
                yield answers
            finally:
                stop.set()
            for client in clients:
                client.result(PATIENCE)
        self.assertEqual(set(answers), {(200, VALUE)})

    def on_port(self, port):
        return Serving(command_line=command(
            "serve", EXAMPLE, "--reuse-port", "--port", str(port)))

    def test_two_servers_on_one_port(self):
        with Serving(EXAMPLE, "--reuse-port") as one, self.on_port(one.port) as two:
            seen = set()

            def ask():
                with one.connect() as client:
                    client.ask(KEY)
                    count = int(re.search(rb"(\d+) requests", client.ask(b"")[2]).group(1))
                seen.add(count % 2 and count)
                return all(b"10000 pairs" in s.log for s in (one, two)) and len(seen) > 20

            until(ask)
            counts = []
            for server in (one, two):
                server.stop()
            with self.assertRaises(ConnectionError):
                one.connect()
        with Serving(EXAMPLE, "--reuse-port") as one:
            code, out, err = run("serve", EXAMPLE, "--port", str(one.port))
            self.assertEqual((code, out), (1, b""))
            self.assertIn(b"Address already in use", err)

    def test_a_rolling_restart(self):
        with contextlib.ExitStack() as servers:
            server = servers.enter_context(Serving(EXAMPLE, "--reuse-port"))
            address = ("127.0.0.1", server.port)
            with self.clients_asking(address, is_kept=True) as answers:
                for _ in range(3):
                    old, server = server, servers.enter_context(self.on_port(server.port))
                    self.assertEqual(old.stop(), 0)
                    answered = len(answers)
                    until(lambda: len(answers) > answered + 100)

    def test_who_waits_to_be_accepted_is_answered(self):
        with Serving(EXAMPLE) as server, contextlib.ExitStack() as stack:
            server.process.send_signal(signal.SIGSTOP)
            clients = [stack.enter_context(server.connect()) for _ in range(50)]
            for client in clients:
                client.send(GET_KEY)
            server.process.send_signal(signal.SIGTERM)
            server.process.send_signal(signal.SIGCONT)
            for client in clients:
                self.assertEqual(client.answer()[::2], (200, VALUE))
            self.assertEqual(server.process.wait(PATIENCE), 0)

    def test_a_socket_that_is_handed_down(self):
        for family, place in ((socket.AF_INET, "http://127.0.0.1:%d"),
                              (socket.AF_UNIX, "unix:%s")):
            with self.subTest(family), self.listening(family) as (listener, address):
                how = self.handed_down(listener, EXAMPLE, "--verbose", "--port", "1")
                with Serving(**how) as server, Client(address) as client:
                    if family == socket.AF_INET:
                        address = address[1]
                    self.assertEqual(server.url, place % address)
                    self.assertEqual(client.ask(KEY)[2], VALUE)
                    until(lambda: len(server.lines()) == 2)
                    host = "127.0.0.1" if family == socket.AF_INET else "unix:"
                    self.assertTrue(server.lines()[1].startswith(host + " - - ["))
                    self.assertEqual(server.stop(), 0)

    def test_restarts_on_a_socket_that_is_handed_down(self):
        """Each answer on a connection of its own: none is refused, none is lost."""
        with self.listening() as (listener, address), contextlib.ExitStack() as servers:
            server = servers.enter_context(Serving(**self.handed_down(listener)))
            with self.clients_asking(address, is_kept=False) as answers:
                for _ in range(3):
                    self.assertEqual(server.stop(), 0)
                    server = servers.enter_context(Serving(**self.handed_down(listener)))
                    answered = len(answers)
                    until(lambda: len(answers) > answered + 100)

    def test_what_cannot_be_handed_down(self):
        with open(EXAMPLE, "rb") as file, socket.socket() as idle, self.listening() as (good, _):
            with socket.socket(type=socket.SOCK_DGRAM) as datagrams:
                for handed, count, said in (
                        (good, "2", "LISTEN_FDS is '2', but must be 1: one socket"),
                        (good, "x", "LISTEN_FDS is 'x', but must be 1: one socket"),
                        (file, "1", "descriptor 3 from systemd: Socket operation on non-socket"),
                        (idle, "1", "descriptor 3 from systemd: not a stream socket that listens"),
                        (datagrams, "1",
                         "descriptor 3 from systemd: not a stream socket that listens")):
                    with self.subTest(said):
                        how = self.handed_down(handed, count=count)
                        done = subprocess.run(
                            how["command_line"], pass_fds=how["pass_fds"], timeout=PATIENCE,
                            stderr=subprocess.PIPE, env=environment())
                        self.assertEqual((done.returncode, done.stderr.decode()),
                                         (1, "kv: %s\n" % said))
        with Serving(EXAMPLE, env=environment(LISTEN_PID="1", LISTEN_FDS="1")) as server:
            with server.connect() as client:  # the socket is for another process
                self.assertEqual(client.ask(KEY)[2], VALUE)

    @unittest.skipUnless(shutil.which("systemd-socket-activate"), "needs systemd")
    def test_systemd_socket_activate(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "kv.sock")
            process = subprocess.Popen(
                ["systemd-socket-activate", "-l", path] + command("serve", EXAMPLE),
                stderr=subprocess.PIPE, env=environment())
            try:
                until(lambda: os.path.exists(path))
                with Client(path) as client:  # this starts it
                    self.assertEqual(client.ask(KEY)[2], VALUE)
                    process.terminate()
                    log = process.communicate(timeout=PATIENCE)[1]
                self.assertEqual(process.returncode, 0)
                self.assertIn(b" s, on unix:" + path.encode(), log)
            finally:
                process.kill()
                process.wait(PATIENCE)


class Get(WithExample):
    """The client: what it prints, what it says, how it exits."""

    HEXADECIMAL = KEY.replace(b"-", b"")
    NO_KEY = ABSENT.decode()
    VERSION_1 = "3479d894-3271-1935-88cf-a06f3cbb80a5"
    MISSING = "kv: %s: not found\n" % NO_KEY
    CLOSED = "http://127.0.0.1:1"
    NOBODY = ("kv: cannot ask %s: Connection refused; start a server with `python kv.py serve "
              "FILE`, or name another with --url\n" % CLOSED)
    SEE = r" \(see kv\.py get --help\)\n"
    ROWS = (  # arguments, exit code, standard output, a pattern of standard error, how to run it
        ((KEY,), 0, VALUE + b"\n", "", {}),
        ((KEY.upper(),), 0, VALUE + b"\n", "", {}),
        ((b"{" + KEY + b"}",), 0, VALUE + b"\n", "", {}),
        ((b"urn:uuid:" + KEY,), 0, VALUE + b"\n", "", {}),
        ((HEXADECIMAL,), 0, VALUE + b"\n", "", {}),
        ((OTHER_KEY, KEY, OTHER_KEY), 0, b"1234\n" + VALUE + b"\n1234\n", "", {}),
        (("-",), 0, b"1234\n" + VALUE + b"\n", "", {"stdin": OTHER_KEY + b"\n" + KEY}),
        ((KEY, "-", KEY), 0, VALUE + b"\n1234\n" + VALUE + b"\n", "", {"stdin": OTHER_KEY}),
        (("-",), 0, b"", "", {"stdin": b""}),
        (("-",), 0, b"1234\n", "", {"stdin": b"\n\r\n" + OTHER_KEY + b"\r\n\n"}),
        (("-",), 2, VALUE + b"\n", "kv: [^\n]*: not a UUID\n", {"stdin": b"\xff\xfe\n" + KEY}),
        ((NO_KEY,), 1, b"", MISSING, {}),
        ((NO_KEY, KEY, NO_KEY), 1, VALUE + b"\n", MISSING * 2, {}),
        (("nonsense", KEY), 2, VALUE + b"\n", "kv: nonsense: not a UUID\n", {}),
        (("nonsense", NO_KEY), 2, b"", "kv: nonsense: not a UUID\n" + MISSING, {}),
        ((NO_KEY, "nonsense"), 2, b"", MISSING + "kv: nonsense: not a UUID\n", {}),
        ((VERSION_1,), 2, b"", "kv: %s: a UUID, but not of version 4\n" % VERSION_1, {}),
        (("a\x1bb\nc",), 2, b"", r"kv: a\\x1bb\\nc: not a UUID\n", {}),
        (("",), 2, b"", "kv: : not a UUID\n", {}),
        (("nonsense",), 2, b"", "kv: nonsense: not a UUID\n", {"KV_URL": CLOSED}),
        ((KEY,), 2, b"", NOBODY, {"KV_URL": CLOSED}),
        (("--url", CLOSED, KEY, KEY), 2, b"", NOBODY, {}),
        ((KEY, "--timeout", "9.5"), 0, VALUE + b"\n", "", {}),
        ((KEY,), 0, VALUE + b"\n", "", {"http_proxy": CLOSED}),
        ((KEY, "--url", "http://kv.example"), 2, b"",
         "kv: cannot ask http://kv.example through the proxy %s: Connection refused\n"
         % CLOSED[7:], {"http_proxy": CLOSED.replace("//", "//me:secret@")}),
        ((KEY, "--url", "localhost:80"), 2, b"",
         "kv: --url: localhost:80: add http:// before it" + SEE, {}),
        ((KEY, "--url", "127.0.0.1:8000"), 2, b"",
         "kv: --url: 127.0.0.1:8000: add http:// before it" + SEE, {}),
        ((KEY, "--url", "ftp://kv"), 2, b"",
         "kv: --url: ftp://kv: the scheme must be http or https" + SEE, {}),
        ((KEY, "--url", "file:///etc/passwd"), 2, b"", "kv: --url: [^\n]*scheme[^\n]*\n", {}),
        ((KEY, "--url", "http://kv#x"), 2, b"",
         "kv: --url: http://kv#x: a query or a fragment is not allowed" + SEE, {}),
        ((KEY, "--url", "http://kv?x"), 2, b"", "kv: --url: [^\n]*query[^\n]*\n", {}),
        ((KEY, "--url", "http://me@kv"), 2, b"",
         "kv: --url: http://me@kv: user names and passwords are not supported" + SEE, {}),
        ((KEY, "--url", "http://"), 2, b"", "kv: --url: http://: the host is missing" + SEE, {}),
        ((KEY, "--url", "http://h:73536"), 2, b"",
         "kv: --url: http://h:73536: the port must be a number from 1 to 65535" + SEE, {}),
        ((KEY, "--url", "http://h:port"), 2, b"", "kv: --url: [^\n]*the port must[^\n]*\n", {}),
        ((KEY, "--url", "http://h:00"), 2, b"", "kv: --url: [^\n]*the port must[^\n]*\n", {}),
        ((KEY, "--url", "http://[::1"), 2, b"", r"kv: --url: [^\n]*\n", {}),
        ((KEY, "--url", "http://a..b"), 2, b"", r"kv: cannot ask http://a\.\.b: [^\n]*\n", {}),
        ((KEY, "--url", "http://no.such.host.invalid"), 2, b"",
         r"kv: cannot ask http://no\.such\.host\.invalid: [^\n]*\n", {}),
        ((KEY,), 2, b"", "kv: --url: 127.0.0.1:80: add http://[^\n]*\n",
         {"KV_URL": "127.0.0.1:80"}),
        ((KEY, "--timeout", "0"), 2, b"",
         r"kv: --timeout: 0 is not above 0 and at most 1000000 seconds" + SEE, {}),
        ((KEY, "--timeout", "-1"), 2, b"", "kv: --timeout: -1 is not above 0 [^\n]*\n", {}),
        ((KEY, "--timeout", "nan"), 2, b"", "kv: --timeout: nan is not above 0 [^\n]*\n", {}),
        ((KEY, "--timeout", "1e10"), 2, b"", r"kv: --timeout: 1e\+10 is not above 0 [^\n]*\n",
         {}),
        ((KEY, "--timeout", "x"), 2, b"", "kv: --timeout: [^\n]*'x'" + SEE, {}),
        ((), 2, b"", "kv: the following arguments are required: KEY" + SEE, {}))

    def check(self, rows):
        def work(arguments, code, out, err, how):
            return run("get", *arguments, **dict({"KV_URL": self.server.url}, **how))

        for (arguments, code, out, err, how), running in side_by_side(work, rows):
            with self.subTest(arguments=arguments, how=how):
                got = running.result()
                self.assertEqual(got[:2], (code, out), got)
                self.assertRegex(got[2].decode(), r"\A%s\Z" % err)

    def test_output_messages_and_exit_codes(self):
        self.check(self.ROWS)

    def test_urls_of_this_server(self):
        loopback = self.server.url.replace("127.0.0.1", "LOCALHOST")
        self.check((
            ((KEY, "--url", self.server.url + "/"), 0, VALUE + b"\n", "", {"KV_URL": self.CLOSED}),
            ((KEY, "--url", loopback), 0, VALUE + b"\n", "", {"http_proxy": self.CLOSED}),
            # the server takes the absolute form that a proxy gets
            ((KEY, "--url", "http://kv.example"), 0, VALUE + b"\n", "",
             {"http_proxy": self.server.url}),
            ((KEY, "--url", "http://kv.example"), 2, b"", "kv: cannot ask http://kv.example: .*\n",
             {"http_proxy": self.server.url, "no_proxy": "kv.example"}),
            ((KEY, "--url", self.server.url.replace("http", "https")), 2, b"",
             "kv: cannot ask https://[^\n]*: the server does not speak TLS; use http://\n", {}),
            ((KEY, "--url", self.server.url + "/below"), 2, b"",
             "kv: http://[^\n]*/below answered 400 Bad Request: not a version 4 UUID\n", {})))

    OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n"
    STRANGE = (  # what something else answers, and what is said of it
        (b"", "cannot ask URL: the connection was closed without an answer"),
        (b"SSH-2.0-x\r\n", "cannot ask URL: not an HTTP server: SSH-2.0-x"),
        (b"HTTP/1.1 500 Broken\r\n\r\n", "URL answered 500 Broken: "),
        (b"HTTP/1.1 500 B\x1bd\r\n\r\nit \x1b[2J broke\nmore",
         r"URL answered 500 B\\x1bd: it \\x1b\[2J broke"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n<html>", "URL answered 404 Not Found: <html>"),
        (b"HTTP/1.1 404 Not Found\r\nServer: kv/2.0\r\nContent-Length: 3\r\n\r\nno\n",
         "URL answered 404 Not Found: no"),
        (b"HTTP/1.1 301 Moved\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
         "URL answered 301 Moved: "),
        (b"HTTP/1.1 302 Found\r\nLocation: ftp://kv/\r\nContent-Length: 0\r\n\r\n",
         "URL answered 302 Found: "),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "cannot ask URL: unexpected status 204 No Content"),
        (b"HTTP/1.1 206 Partial Content\r\nContent-Length: 2\r\n\r\nab",
         "cannot ask URL: unexpected status 206 Partial Content"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\nab",
         "cannot ask URL: unexpected Content-Type; [^\n]*"),
        (b"HTTP/1.1 404 No\r\n\r\n" + b"x" * 9000, "URL answered 404 No: x{192}[.]{3}"),
        (b"HTTP/1.1 200 OK\r\n\r\nendless", "cannot ask URL: missing, repeated or "
                                            "malformed Content-Length"),
        (OK + b"Content-Length: 2\r\n\r\nab", "cannot ask URL: [^\n]*Content-Length"),
        (OK + b"Content-Length: 3\r\n\r\nabc", "cannot ask URL: [^\n]*Content-Length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nab", "[^\n]*Content-Length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nab", "[^\n]*Content-Length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort",
         "cannot ask URL: the answer ended 4 bytes early"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000000\r\n\r\n" + b"x" * 100000,
         "cannot ask URL: a value of 10000000000000 bytes, which is too large"),
        (OK + b"Content-Encoding: gzip\r\n\r\nab", "cannot ask URL: unexpected Content-Encoding or Transfer-Encoding"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
         "cannot ask URL: unexpected Content-Encoding or Transfer-Encoding"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n", "cannot ask URL: [^\n]*"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70000 + b"\r\n\r\n", "cannot ask URL: [^\n]*"),
    )

    @contextlib.contextmanager
    def something_else(self, answer):
        """Yield the URL of a listener that answers once, whatever it is asked."""
        def once():
            with contextlib.suppress(OSError), listener.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1000)

        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            thread = threading.Thread(target=once)
            thread.start()
            yield "http://127.0.0.1:%d" % listener.getsockname()[1]
            with contextlib.suppress(OSError):
                socket.create_connection(listener.getsockname(), 1).close()
            thread.join(PATIENCE)

    def test_answers_that_are_not_from_kv(self):
        def ask(answer, _):
            with self.something_else(answer) as url:
                return url, run("get", KEY, "--url", url)

        for (answer, said), running in side_by_side(ask, self.STRANGE):
            with self.subTest(answer):
                url, (code, out, err) = running.result()
                self.assertEqual((code, out), (2, b""))
                self.assertRegex(err.decode().replace(url, "URL"), r"\Akv: %s\n\Z" % said)

    def test_a_server_that_does_not_answer(self):
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen(1)
            url = "http://127.0.0.1:%d" % silent.getsockname()[1]
            self.assertEqual(run("get", KEY, "--url", url, "--timeout", "0.2"), (
                2, b"", ("kv: cannot ask %s: no answer within 0.2 s\n" % url).encode()))

    @ON_LINUX
    def test_streams_that_are_closed_or_full(self):
        get = "exec $KV get %s --url %s " % (KEY.decode(), self.server.url)
        for script, code, out, err in (
                (get + ">&-", 2, b"", b"kv: standard output is closed\n"),
                (get + ">/dev/full", 2, b"", b"kv: standard output: No space left on device\n"),
                (get + "2>&-", 0, VALUE + b"\n", b""),
                (get.replace("get", "get -") + "<&-", 2, b"", b"kv: standard input is closed\n"),
                (get.replace(KEY.decode(), self.NO_KEY) + "2>/dev/full", 1, b"", b""),
                ("exec $KV serve - <&-", 1, b"", b"kv: standard input: closed\n")):
            with self.subTest(script):
                self.assertEqual(shell(script), (code, out, err))

    def get_process(self):
        return subprocess.Popen(command("get", "-", "--url", self.server.url),
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, env=environment())

    @ON_POSIX
    def test_a_reader_that_has_enough(self):
        """Like `kv.py get ... | head -1`: the pipe is closed before the second value comes."""
        with self.get_process() as process:
            process.stdin.write(KEY + b"\n")
            process.stdin.flush()
            self.assertEqual(process.stdout.readline(), VALUE + b"\n")  # one at a time comes
            process.stdout.close()
            process.stdin.write((KEY + b"\n") * 3)
            process.stdin.close()
            self.assertEqual((process.wait(PATIENCE), process.stderr.read()), (0, b""))

    @ON_POSIX
    def test_interrupted_get(self):
        with self.get_process() as process:
            process.stdin.write(KEY + b"\n")
            process.stdin.flush()
            self.assertEqual(process.stdout.readline(), VALUE + b"\n")
            process.send_signal(signal.SIGINT)
            self.assertEqual((process.wait(PATIENCE), process.stderr.read()), (130, b""))

    def test_as_a_module(self):
        url = self.server.url
        self.assertEqual(kv.get(KEY.decode().upper(), url), VALUE)
        self.assertEqual(kv.get(uuid.UUID(KEY.decode()), url), VALUE)
        for error, k, *arguments in (
                (KeyError, ABSENT.decode(), url), (ValueError, "nonsense", url),
                (ValueError, self.VERSION_1, url), (OSError, KEY.decode(), self.CLOSED),
                (ValueError, KEY.decode(), "127.0.0.1"), (ValueError, KEY.decode(), url, 0)):
            with self.subTest(k, arguments=arguments), self.assertRaises(error):
                kv.get(k, *arguments)


class CommandLine(WithExample):
    """Options, messages and exit codes of the command."""

    SEE = r" \(see kv\.py%s --help\)\n"
    SERVE = SEE % " serve"
    WRONG = (  # arguments, a pattern of the one line that says what is wrong
        ((), r"the following arguments are required: serve \| get" + SEE % ""),
        (("fetch",), "fetch: neither serve nor get" + SEE % ""),
        ((EXAMPLE,), r"did you mean `kv\.py serve %s`\?" % re.escape(EXAMPLE) + SEE % ""),
        ((KEY,), r"did you mean `kv\.py get %s`\?" % KEY.decode() + SEE % ""),
        (("--verbose", "serve", EXAMPLE), "unrecognized arguments: --verbose" + SERVE),
        (("serve",), "the following arguments are required: FILE" + SERVE),
        (("serve", EXAMPLE, "b"), "unrecognized arguments: b" + SERVE),
        (("serve", EXAMPLE, "--prot", "1"), "unrecognized arguments: --prot 1" + SERVE),
        (("serve", EXAMPLE, "--port", "99999"),
         "--port: 99999 is not between 0 and 65535" + SERVE),
        (("serve", EXAMPLE, "--port", "-1"), "--port: -1 is not between 0 and 65535" + SERVE),
        (("serve", EXAMPLE, "--port", "http"), "--port: http is not between 0 and 65535" + SERVE),
        (("serve", EXAMPLE, "--max-connections", "0"),
         "--max-connections: 0 is not between 1 and 1000000" + SERVE),
        (("serve", "-", "--sorted"), "--sorted is for files, not for standard input or a pipe"
         + SERVE),
        (("serve", "-", "--sorted", "--no-check"), "--sorted is for files, [^\n]*\n"),
        (("serve", EXAMPLE, "--no-check"), "--no-check requires --sorted" + SERVE))

    CANNOT_LISTEN = (  # arguments, a pattern of the one line that says why
        (("--host", "no.such.host.invalid"), r"no\.such\.host\.invalid:8000: [^\n]+"),
        (("--host", "a..b"), r"a\.\.b:8000: not a valid host name"),
        (("--host", "203.0.113.1"), r"203\.0\.113\.1:8000: Cannot assign requested address"),
        (("--host", "[2001:db8::1]"), r"\[2001:db8::1\]:8000: [^\n]+"))

    def fails(self, rows, code):
        for (arguments, said), running in side_by_side(lambda arguments, _: run(*arguments), rows):
            with self.subTest(arguments):
                got = running.result()
                self.assertEqual(got[:2], (code, b""), got)
                self.assertRegex(got[2].decode(), r"\Akv: %s\n?\Z" % said)

    def test_wrong_usage(self):
        self.fails(self.WRONG, 2)

    def test_what_cannot_be_listened_on(self):
        taken = r"127\.0\.0\.1:%d: Address already in use \(--port takes another\)"
        rows = self.CANNOT_LISTEN + (
            (("--port", str(self.server.port)), taken % self.server.port),)
        self.fails([(("serve", EXAMPLE) + arguments, "cannot listen on " + said)
                    for arguments, said in rows], 1)
        port = str(self.server.port)  # that is found out before anything is loaded
        self.assertIn(b"Address already in use", run("serve", "/no/such/file", "--port", port)[2])

    def test_help_and_version(self):
        rows = ((["--help"], ["serve", "get", "--version"]),
                (["serve", "--help"], ["127.0.0.1", "8000", "--verbose", "10000", "--sorted"]),
                (["get", "--help"], ["http://127.0.0.1:8000", "KV_URL", "10 s"]),
                (["--version"], ["kv " + kv.__version__]))
        for (_, words), running in side_by_side(lambda arguments, _: run(*arguments), rows):
            code, out, err = running.result()
            self.assertEqual((code, err), (0, b""))
            for word in words:
                self.assertIn(word, out.decode())

    def test_the_log(self):
        """Its lines, with their time unless a terminal shows them."""
        ready = r"kv: 10000 pairs of %s in \d+\.\d\d s, on http://127\.0\.0\.1:\d+"
        self.assertRegex(self.server.log.decode(), r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[-+]\d\d:\d\d "
                         + ready % re.escape(EXAMPLE) + r"\n\Z")
        with Serving(EXAMPLE) as server:
            server.stop()
        self.assertEqual(server.lines()[1:], ["kv: stopped"])

    def on_a_terminal(self, *arguments, **env):
        """Return a serving process, and a function that returns what its terminal shows."""
        import pty
        terminal, stderr = pty.openpty()
        process = subprocess.Popen(command("serve", "--port", "0", *arguments), stderr=stderr,
                                   stdin=subprocess.PIPE, env=environment(**env))
        os.close(stderr)
        shown = []

        def read():
            with contextlib.suppress(OSError):  # how Linux tells that the other side is closed
                while True:
                    shown.append(os.read(terminal, 1 << 16))

        reader = threading.Thread(target=read)
        reader.start()
        self.addCleanup(os.close, terminal)
        self.addCleanup(reader.join)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        self.addCleanup(process.stdin.close)
        return process, lambda: b"".join(shown)

    @ON_POSIX
    def test_progress_on_a_terminal(self):
        for term, progress in (("xterm", rb"(\r\x1b\[K\? % read, \d+ pairs, \d+ a second)+\r\x1b\[K"),
                               ("dumb", rb"")):
            process, shown = self.on_a_terminal("-", TERM=term)
            numbers = itertools.count()
            start = time.monotonic()
            while b"a second" not in shown() and time.monotonic() < start + 3:
                process.stdin.write(b"".join(key(next(numbers)) + b" v\n" for _ in range(2000)))
                process.stdin.flush()
                time.sleep(0.01)
            process.stdin.close()
            until(lambda: b" on http://" in shown())
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(PATIENCE), 0)
            until(lambda: b"stopped" in shown())
            self.assertRegex(shown(), rb"\A" + progress + rb"kv: \d+ pairs of standard input in "
                             rb"\d+\.\d\d s, on http://127.0.0.1:\d+\r\nkv: stopped\r\n\Z")

    def test_hosts(self):
        def can(family, address):
            with contextlib.suppress(OSError), socket.socket(family) as probe:
                probe.bind((address, 0))
                return True

        def serves(host, url, addresses):
            with Serving(EXAMPLE, "--host", host) as server:
                self.assertIn("on http://%s:%d\n" % (url, server.port), server.log.decode())
                for address in addresses:
                    with Client((address, server.port)) as client:
                        self.assertEqual(client.ask(KEY)[2], VALUE)
                    name = "[%s]" % address if ":" in address else address
                    self.assertEqual(run("get", KEY, "--url", "http://%s:%d" % (name, server.port)),
                                     (0, VALUE + b"\n", b""))

        rows = [("127.0.0.1", "127.0.0.1", ["127.0.0.1"]),
                ("localhost", "localhost", ["127.0.0.1"]),
                ("0.0.0.0", "0.0.0.0", ["127.0.0.1"])]
        if can(socket.AF_INET6, "::1"):
            rows += [("::1", "[::1]", ["::1"]), ("[::1]", "[::1]", ["::1"]),
                     ("::", "[::]", ["::1", "127.0.0.1"])]
        for (host, _, _), running in side_by_side(serves, rows):
            with self.subTest(host):
                running.result()

    @ON_LINUX
    @unittest.skipUnless(shutil.which("strace"), "needs strace")
    def test_where_ipv6_cannot_be_without_ipv4(self):
        """As on OpenBSD: only `::` needs that option of the socket, and fails without it."""
        for host, code in (("::1", 0), ("::", 1)):
            trace = ["timeout", "-s", "TERM", "2", "strace", "-qq", "-o", os.devnull, "-e",
                     "inject=setsockopt:error=ENOPROTOOPT:when=%d" % (9 if host == "::1" else 1)]
            done = subprocess.run(trace + command("serve", EXAMPLE, "--host", host, "--port", "0"),
                                  stderr=subprocess.PIPE, env=environment(), timeout=PATIENCE)
            with self.subTest(host):
                if code:
                    self.assertRegex(done.stderr, rb"\Akv: cannot listen on \[::\]:0: [^\n]*\n\Z")
                else:
                    self.assertIn(b" on http://[::1]:", done.stderr)

    def test_verbose_logs_in_common_log_format(self):
        requests = ((KEY, b"GET", KEY.decode(), 200, 15), (KEY, b"HEAD", KEY.decode(), 200, 0),
                    (b"\x1b[2J\"\\\x7f\xe9", b"GET", r'\\x1b\[2J\\"\\\\\\x7f\\xe9', 400, r"\d+"))
        with Serving(EXAMPLE, "--verbose") as server:
            for number, (path, method, *_) in enumerate(requests, 1):
                with server.connect() as client:
                    client.ask(path, method=method)
                    until(lambda: server.log.count(b"\n") == number + 1)
        for line, (_, method, request, status, size) in zip(
                server.log.decode("ascii").splitlines()[1:], requests):
            self.assertRegex(line, r'^127\.0\.0\.1 - - \[\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d '
                                   r'[-+]\d{4}\] "%s /%s HTTP/1\.1" %d %s$'
                             % (method.decode(), request, status, size))

    def test_long_lines_of_the_log_are_cut(self):
        """To what a pipe takes at once, so that no line is torn."""
        with Serving(EXAMPLE, "--verbose") as server, server.connect() as client:
            for _ in range(3):
                self.assertEqual(client.ask(b"x" * 7900)[0], 400)
            until(lambda: server.log.count(b"\n") == 4)
            for line in server.lines()[1:]:
                self.assertRegex(line, r"^127\.0\.0\.1 - - \[.*\] \"GET /x+\" 400 \d+$")
                self.assertLess(len(line), kv.LOG_LINE_BYTES)

    def test_older_pythons_are_told(self):
        paths = [path for version in ("3.6",) for path in old_pythons(version)]
        if not paths:
            self.skipTest("no Python 3.6 here")
        for path in paths:
            with self.subTest(path):
                done = subprocess.run([path, os.path.join(HERE, "kv.py"), "--version"],
                                      timeout=PATIENCE, stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE)
                self.assertEqual((done.returncode, done.stdout), (1, b""))
                self.assertRegex(done.stderr, br"\Akv: needs Python 3\.7 or newer[^\n]*\n\Z")


def old_pythons(version):
    """Return the paths of interpreters of this version that pyenv or PATH have and that run."""
    import glob
    root = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    found = glob.glob(os.path.join(root, "versions", version + ".*", "bin", "python"))
    return found or [path for path in [shutil.which("python" + version)]
                     if path and "shims" not in path]


def readme():
    """Return the text (str) of README.md, "" where the tests were copied without it."""
    with contextlib.suppress(OSError), open(os.path.join(HERE, "README.md"), "rb") as file:
        return file.read().decode()
    return ""


def program(name):
    """Return the path of a program, on PATH or where only root's PATH leads, or None."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/sbin:/usr/sbin:/sbin")


@ON_POSIX
@unittest.skipUnless(readme(), "needs README.md")
class Readme(unittest.TestCase):
    """What README.md shows, word for word, in a folder with nothing but kv.py and example.data."""

    ATTENDED = r"\b(sudo|systemctl|unittest|bench|nginx)\b"  # not run by a test

    @unittest.skipUnless(shutil.which("systemd-analyze"), "needs systemd")
    def test_its_units(self):
        with tempfile.TemporaryDirectory() as folder:
            paths = [os.path.join(folder, name) for name in ("kv.socket", "kv.service")]
            for path in paths:
                name = re.escape(os.path.basename(path))
                block = re.search(r"(?m)^    # %s\n((?:    .*\n)+)" % name, readme()).group(1)
                with open(path, "w") as file:
                    file.write(re.sub(r"(?m)^    ", "", block))
            done = subprocess.run(["systemd-analyze", "verify"] + paths, timeout=PATIENCE,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            self.assertEqual((done.returncode, done.stdout), (0, b""))

    def test_its_length_its_width_and_its_top(self):
        lines = readme().splitlines()
        self.assertLessEqual(len(lines), 330)
        self.assertLessEqual(max(map(len, lines)), 100)
        for text in ("python kv.py serve example.data", "python kv.py get "):
            self.assertIn(text, "\n".join(lines[:20]))

    def examples(self):
        """Return each command after `    $ ` and the list of the indented lines after it."""
        found, inside = [], False
        for line in readme().splitlines():
            starts = line.startswith("    $ ")
            inside = starts or inside and (line.startswith("    ") or not line)
            if starts:
                found.append((line[6:], []))
            elif inside:
                found[-1][1].append(line[4:])
        return found

    def same(self, output, lines):
        """Compare what a command has written (bytes) with lines of README.md, save the times."""
        def plain(text):
            text = re.sub(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", "DATE", text)
            text = re.sub(r"(?m)^\d{4}-\d\d-\d\dT\S+ kv: ", "kv: ", text)
            return re.sub(r" in \d+\.\d\d s\b", " in SECONDS", text).strip("\n").split("\n")

        self.assertEqual(plain(output.decode().replace("\r\n", "\n")), plain("\n".join(lines)))

    def test_examples(self):
        from unittest import mock
        examples = self.examples()
        self.assertIn("python kv.py get", [line[:16] for line, _ in examples])
        with contextlib.ExitStack() as stack, contextlib.ExitStack() as server:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            programs = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(mock.patch.dict(
                os.environ, PATH=programs + os.pathsep + os.environ["PATH"], CURL_HOME=programs))
            for name in ("kv.py", "example.data"):
                shutil.copy(os.path.join(HERE, name), folder)
            for name, content in (("python", '#!/bin/sh\nexec "%s" "$@"\n' % sys.executable),
                                  (".curlrc", "silent\n")):  # as it is when on a terminal
                with open(os.path.join(programs, name), "w") as file:
                    file.write(content)
                os.chmod(file.name, 0o700)

            def serve(line, lines):
                server.close()  # the one before, on the same port
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", 8000), 1):
                    self.skipTest("port 8000 is taken")
                started = Serving(command_line=["sh", "-c", "exec " + line.rstrip(" &")],
                                  cwd=folder, env=environment())
                server.enter_context(started)
                self.same(started.log, lines or [started.log.decode()])

            serve("python kv.py serve example.data", [])
            for line, lines in examples:
                with self.subTest(line):
                    if re.search(self.ATTENDED, line):
                        self.skipTest("not for a test")
                    if "curl " in line and not program("curl"):
                        self.skipTest("needs curl")
                    if " serve " in line and (line.endswith("&") or " on http://" in str(lines)):
                        serve(line, lines)
                        continue
                    done = subprocess.run(
                        ["sh", "-c", line], cwd=folder, env=environment(), timeout=PATIENCE,
                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                    self.same(done.stdout, lines)


@ON_POSIX
@unittest.skipUnless(readme(), "needs README.md")
class PastOneMachine(unittest.TestCase):
    """README.md's configurations of nginx, with other ports, in front of real servers."""

    ODD = [(b"%x" % (n % 16) + key(n)[1:], value) for n, value in enumerate(Lines.VALUES)]
    COUNT = 1000

    @contextlib.contextmanager
    def proxy(self, name, folder, servers):
        """Run what README.md has the file `name` for, in `folder`; yields where it answers."""
        block = re.search(r"(?m)^    # %s, run by: (.*)\n((?:    .*\n)+)" % name, readme())
        arguments = block.group(1).split()
        arguments[0] = program(arguments[0]) or self.skipTest("needs " + arguments[0])
        address = ("127.0.0.1", free_port())
        ports = {"8080": address[1]}
        ports.update(("%d" % n, server.port) for n, server in enumerate(servers, 8001))
        with open(os.path.join(folder, name), "w") as file:
            file.write(re.sub(r"\b80\d\d\b", lambda port: str(ports.pop(port.group())),
                              block.group(2)))
        self.assertEqual(ports, {})
        with open(os.path.join(folder, "log"), "w+") as log:
            process = subprocess.Popen(arguments, cwd=folder, stdout=log, stderr=log)

            def listens():
                if process.poll() is not None:
                    log.seek(0)
                    self.fail(log.read())
                with contextlib.suppress(OSError), Client(address):
                    return True

            try:
                until(listens)
                yield address
            finally:
                process.terminate()
                process.wait(PATIENCE)

    def check(self, address, server):
        """Whatever is asked at `address` is answered as by `server`."""
        keys = [k for k, _ in self.ODD]
        with Client(address) as client, server.connect() as direct:
            for k, value in self.ODD:
                self.assertEqual(client.ask(k)[::2], (200, value))
                self.assertEqual(client.ask(k.upper())[::2], (200, value))
            for method, path in itertools.product((b"GET", b"HEAD", b"POST"), keys + [
                    b"F" + ABSENT[1:], ABSENT, KEY[1:], b"%33" + KEY[1:], KEY + b"?", b"/" + KEY,
                    b"nonsense"]):
                with self.subTest(method=method, path=path):
                    answers = [connection.ask(path, b"Accept-Encoding: gzip", method=method)
                               for connection in (client, direct)]
                    for _, fields, _ in answers:
                        fields.pop("connection", None)
                        fields.update(date="", server="")
                    self.assertEqual(*answers)

    def ask(self, address, keys):
        """Ask for `keys` on one connection for as long as it is kept; yield statuses and bodies."""
        client = None
        with contextlib.ExitStack() as stack:
            for k in keys:
                client = client or stack.enter_context(Client(address))
                status, fields, body = client.ask(k)
                if fields.get("connection") == "close":
                    client = stack.close()
                yield status, body

    def test_shards(self):
        with open(EXAMPLE, "rb") as file:
            lines = file.read().split(b"\n")[:-1]
        odd = [k.upper() + b" " + value for k, value in self.ODD]
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            path = os.path.join(folder, "example.data")
            with open(path, "wb") as file:
                file.write(b"\n\n".join(lines + odd) + b"\n")
            script = "".join(re.findall(r"(?m)^    (.* grep .*\n)", readme()))
            subprocess.run(["sh", "-e", "-c", script], cwd=folder, check=True, timeout=PATIENCE)
            servers = [stack.enter_context(Serving(os.path.join(folder, "%d.data" % n)))
                       for n in range(4)]
            address = stack.enter_context(self.proxy("shards.conf", folder, servers))
            self.check(address, stack.enter_context(Serving(path)))
            with Client(address) as client:
                self.assertRegex(client.ask(b"")[2], br"\A\d{4} pairs of 0\.data, ")

            def ask(*lines):
                return list(self.ask(address, (line[:36] for line in lines)))

            for part, running in side_by_side(ask, [lines[n::4] for n in range(4)]):
                self.assertEqual(running.result(), [(200, line[37:]) for line in part])
            self.assertEqual(len(lines), 10000)

    def write(self, path, word):
        lines = [key(n + 100) + b" %b %d\n" % (word, n) for n in range(self.COUNT)]
        replace(path, b"".join(lines + [k + b" " + value + b"\n" for k, value in self.ODD]))

    def test_replicas(self):
        """Restart one after the other, then reload both, while clients ask on."""
        asked, seen, stop = itertools.cycle(range(self.COUNT)), set(), threading.Event()

        def ask():
            numbers, asking = [], itertools.takewhile(lambda _: not stop.is_set(), asked)
            for status, body in self.ask(address, (
                    numbers.append(n) or key(n + 100) for n in asking)):
                self.assertEqual((status, body.split()[1:]), (200, [b"%d" % numbers[-1]]), body)
                seen.add(body.split()[0])

        def wait(*words):  # until these are the first ones of answers that have come since
            seen.clear()
            until(lambda: seen.issuperset(words) or any(client.done() for client in clients))

        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(4))
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            paths = [os.path.join(folder, name) for name in ("one", "two")]
            servers = [None, None]

            def start(n, port):
                serve = command("serve", paths[n], "--port", str(port))
                servers[n] = stack.enter_context(Serving(command_line=serve))

            for n, path in enumerate(paths):
                self.write(path, b"first%d" % n)
                start(n, free_port())
            address = stack.enter_context(self.proxy("replicas.conf", folder, servers))
            self.check(address, servers[0])
            stack.callback(stop.set)
            clients = [pool.submit(ask) for _ in range(4)]
            wait(b"first0", b"first1")
            for n, path in enumerate(paths):
                self.write(path, b"again%d" % n)
                self.assertEqual(servers[n].stop(), 0)
                wait(*[b"first1", b"again0"][n:n + 1])
                start(n, servers[n].port)
                wait(b"again%d" % n)
            for n, path in enumerate(paths):
                self.write(path, b"reloaded%d" % n)
                servers[n].process.send_signal(signal.SIGHUP)
            wait(b"reloaded0", b"reloaded1")
            stop.set()
            for client in clients:
                client.result()


# The benchmark

APART = {"env": environment(PYTHONPATH=HERE), "start_new_session": True}  # out of reach of Ctrl-C
ROUNDS, SECONDS = 5, 1  # how many, of which the median counts, and how long clients ask in each
PLAIN = r'''
import http.server, os, sys
def load(path):
    pairs = {}
    with open(path, "rb") as file:
        for line in file:
            key, _, value = line.rstrip(b"\n").partition(b" ")
            pairs[key] = value
    pairs.pop(b"", None)  # from empty lines
    return pairs
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        value = pairs[self.path[1:].encode()]
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(value)))
        self.end_headers()
        self.wfile.write(value)
    def log_message(self, *_):  # kv does not log requests either
        pass
if sys.argv[1] == "serve":
    pairs = load(sys.argv[2])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket.listen(1000)  # its own 5 make some of many clients wait for a second
    print("plain: on http://127.0.0.1:%d" % server.server_port, file=sys.stderr, flush=True)
    sys.stderr = open(os.devnull, "w")  # it would tell of each client that Ctrl-C takes away
    server.serve_forever()
'''
PLAIN_GET = r'''
import sys, urllib.request
url, key = sys.argv[1:]
with urllib.request.urlopen(url + "/" + key) as answer:
    sys.stdout.buffer.write(answer.read() + b"\n")
'''
CHECK = r'''
import kv
def load(path):
    with open(path, "rb") as file:
        pairs = kv.Sorted(file)
        for _ in kv.parse(file, path, pairs):
            pass
    return pairs
'''
TIMED = r'''
import sys, time
start = time.perf_counter()
pairs = load(sys.argv[2])
print(time.perf_counter() - start, len(pairs))
'''
GET = command("get", "--url")[1:]
MEASURED = (  # name, what defines its load, what Python runs: before FILE, before URL KEY
    ("kv", "from kv import load", command("serve", "--port", "0")[1:], GET),
    ("sorted", CHECK, command("serve", "--port", "0", "--sorted")[1:], GET),
    ("plain", PLAIN, ["-c", PLAIN, "serve"], ["-c", PLAIN_GET]))  # what others relate to
FIGURES = (  # in the order in which `measure` yields them, and whether more is better
    ("start, until it listens: ms", False),
    ("memory: MB resident", False),
    ("memory: bytes a pair", False),
    ("loading or checking: pairs a second", True),
    ("loading or checking: MB a second", True),
    ("one connection *: p50 in us", False),
    ("one connection *: p99 in us", False),
    ("the same, pages not in memory **: p50 in us", False),
    ("the same, pages not in memory **: p99 in us", False),
    ("a new connection each: p50 in us", False),
    ("a new connection each: p99 in us", False),
    ("16 connections *: answers a second", True),
    ("get, as a process: ms", False))
NOTES = ("* plain speaks HTTP/1.0 and closes: a new connection for each request\n"
         "** all put out of memory before each request, by os.posix_fadvise")


def tell(text):
    """Replace the progress line, where standard error is a terminal."""
    sys.stderr.write("\r\x1b[K" + text if sys.stderr.isatty() else "")
    sys.stderr.flush()


def made_up(count):
    """Yield the lines (bytes) of a data file, the same ones each time."""
    chance = random.Random(4)
    words = ["".join(chance.choices("aeioulnrst", k=n % 8 + 2)) for n in range(1000)]
    for _ in range(count):
        yield b"%s %s\n" % (str(uuid.UUID(int=chance.getrandbits(128), version=4)).encode(),
                            " ".join(chance.choices(words, k=chance.randint(1, 10))).encode())


def client(port, path, fields, connections, drop=None):
    """Ask for the lines of a file for SECONDS; print answers a second, p50 and p99 in us.

    Before each request, the pages of the file `drop`, if any, are put out of memory.
    """
    with open(path, "rb") as file:
        lines = list(file)
    random.shuffle(lines)
    lines = itertools.cycle(lines)
    print("ready", flush=True)
    sys.stdin.readline()
    idle, waiting, took, start = [None] * connections, {}, [], time.perf_counter()
    while idle or waiting:
        for link in idle:
            if drop:
                SortedFiles.drop_pages(drop)
            line, since = next(lines).rstrip(b"\n"), time.perf_counter()
            link = link or socket.create_connection(("127.0.0.1", port), PATIENCE)
            link.sendall(b"GET /%b HTTP/1.1\r\nHost: kv\r\n%b\r\n" % (line[:36], fields))
            waiting[link] = line[37:], since
        idle = []
        for link in select.select(list(waiting), [], [], PATIENCE)[0] or sys.exit("no answer"):
            value, since = waiting.pop(link)
            kept = receive(link, value)
            took.append(time.perf_counter() - since)
            idle.append(link if kept else link.close())
        if time.perf_counter() > start + SECONDS:
            idle = []
    print(len(took) / (time.perf_counter() - start), statistics.median(took) * 1e6,
          sorted(took)[len(took) * 99 // 100] * 1e6, flush=True)


def receive(link, value):
    """Receive the answer with `value`, or fail; return whether the connection stays open."""
    answer, more = b"", True
    while more:
        more = link.recv(1 << 16)
        answer += more
        answer_head, end, body = answer.partition(b"\r\n\r\n")
        right = (answer_head[8:13] == b" 200 "
                 and b"\r\nContent-Length: %d\r\n" % len(value) in answer_head + b"\r\n")
        if end and (not right or len(body) >= len(value)):
            break
    if not right or body != value:
        sys.exit("wrong: %r where %r was to come" % (answer, value))
    return answer_head.startswith(b"HTTP/1.1") and b"\r\nConnection: close" not in answer_head


def python(*arguments):
    """Run Python to its end; return what it printed."""
    return subprocess.run((sys.executable,) + arguments, stdout=subprocess.PIPE, check=True,
                          **APART).stdout


def clients(server, sample, fields=b"", processes=1, connections=1, drop=None):
    """Run clients, which all start to ask at the same time; return what they print, summed up."""
    asking = "import test_kv; test_kv.client(%d, %r, %r, %d, %r)" % (
        server.port, sample, fields, connections, drop)
    with contextlib.ExitStack() as stack:
        running = []
        for _ in range(processes):
            running.append(stack.enter_context(subprocess.Popen(
                [sys.executable, "-c", asking], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                **APART)))
            stack.callback(running[-1].kill)
        for process in running:
            process.stdout.readline()
        for process in running:
            process.stdin.write(b"\n")
            process.stdin.flush()
        printed = [process.communicate()[0].split() for process in running]
        if any(process.returncode for process in running):
            raise AssertionError("a client of %s failed" % server.row[0])
        return [sum(map(float, column)) for column in zip(*printed)]


def resident(server):
    """Return the bytes of memory that a server holds, 0 where the system does not say."""
    return proc(server.pid, "VmRSS") * 1024 if os.path.exists("/proc/self/status") else 0


def measure(server, count, sample, line):
    """Yield the FIGURES of one round one by one, so that the servers take turns.

    None stands for what cannot be measured.
    """
    name, definition, _, get = server.row
    yield server.start * 1e3
    yield server.memory / 1e6
    yield (server.memory - server.empty) / count
    tell("loading: " + name)
    seconds, loaded = map(float, python("-c", definition + TIMED, "load", server.path).split())
    if loaded != count:
        raise AssertionError("%s loaded %d pairs of %d" % (name, loaded, count))
    yield count / seconds
    yield os.path.getsize(server.path) / 1e6 / seconds
    tell("one request after the other: " + name)
    yield from clients(server, sample)[1:]
    if name == "sorted" and hasattr(os, "posix_fadvise"):
        yield from clients(server, sample, drop=server.path)[1:]
    else:
        yield from (None, None)
    yield from clients(server, sample, b"Connection: close\r\n")[1:]
    tell("many requests at once: " + name)
    yield clients(server, sample, processes=4, connections=4)[0]
    tell("get: " + name)
    start = time.perf_counter()
    printed = python(*get + [server.url, line[:36].decode()])
    seconds = time.perf_counter() - start
    if printed != line[37:]:
        raise AssertionError("%s got %r, not %r" % (name, printed, line[37:]))
    yield seconds * 1e3


def bench(path=None):
    """Print the FIGURES of all MEASURED with the data file at `path`, or one that is made up."""
    global PATIENCE
    PATIENCE = 3600  # for large files
    for name in {"SIGTERM", "SIGHUP"}.intersection(dir(signal)):
        signal.signal(getattr(signal, name), signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        stack.callback(tell, "")
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=HERE, prefix=".bench-"))
        made, ordered, sample, one = (os.path.join(folder, name)
                                      for name in ("data", "sorted", "sample", "one"))
        if not path:
            tell("making up data")
            with open(made, "wb") as file:
                file.writelines(made_up(1000000))
        path = os.path.abspath(path or made)
        with open(path, "rb") as file:
            lines = [line.rstrip(b"\n") + b"\n" for line in file if line != b"\n"]
        count, some = len(lines), random.sample(lines, min(1000, len(lines)))
        lines = sorted(line[:36].lower() + line[36:] for line in lines)
        for name, part in ((ordered, lines), (sample, some), (one, some[:1])):
            with open(name, "wb") as file:
                file.writelines(part)
                os.fsync(file.fileno())  # pages that are not on the disk stay in memory
        del lines
        servers = []
        for row in MEASURED:
            tell("starting: " + row[0])
            serve = [sys.executable] + row[2]
            with Serving(command_line=serve + [one], start_new_session=True) as server:
                empty = resident(server)  # the same program, with no data to speak of
            here = ordered if row[0] == "sorted" else path
            start = time.perf_counter()
            server = Serving(command_line=serve + [here], start_new_session=True)
            servers.append(stack.enter_context(server))
            server.start, server.path = time.perf_counter() - start, here
            server.row, server.empty, server.memory = row, empty, resident(server)
        rounds = [list(zip(*(measure(server, count, sample, some[0]) for server in servers)))
                  for _ in range(ROUNDS)]
        tell("")
        print("%s processors, %s %s, %s; %d pairs, %.1f MB; medians of %d rounds" % (
            os.cpu_count(), platform.python_implementation(), platform.python_version(),
            platform.platform(), count, os.path.getsize(path) / 1e6, ROUNDS))
        print("%-44s" % "" + "".join("%11s" % row[0] for row in MEASURED) + "  kv better by")
        for number, (title, is_more_better) in enumerate(FIGURES):
            columns = zip(*(figures[number] for figures in rounds))
            values = [None if None in column else statistics.median(column) for column in columns]
            shown = "".join("%11s" % ("-" if v is None else "{:,.0f}".format(v)) for v in values)
            better = ""
            if values[0] and values[-1]:
                first, last = values[0], values[-1]
                better = "%12.1f x" % (first / last if is_more_better else last / first)
            print("%-44s" % title + shown + better)
        print(NOTES)


if __name__ == "__main__":
    if sys.argv[1:2] == ["bench"]:
        try:
            bench(*sys.argv[2:3])
        except KeyboardInterrupt:
            sys.exit("stopped")
    else:
        unittest.main()
