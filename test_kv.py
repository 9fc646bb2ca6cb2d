"""Tests of kv.py: they run it as a program and talk to it over real sockets.

    python -m unittest                  all tests, in about a minute
    python test_kv.py bench [FILE]      the benchmark, with 1,000,000 made-up pairs without FILE

The classes stand in the order of kv.py. Most tests go through a table near the top of their
class. To add a case, add a row:

    a line that is refused, an odd value    Lines.BAD, Lines.VALUES
    a file that is refused                  Lines.REFUSED
    a request and its answer                Judge.KEPT, Judge.CLOSED, Judge.AT_ONCE
    a list of keys                          SeveralKeys.LISTS
    a limit                                 Limits.DEADLINES
    an answer that is not kv's              Get.STRANGE
    a key or a URL for get                  Get.ROWS
    wrong usage                             CommandLine.WRONG
"""
import collections
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
KEY = b"3479d894-3271-4935-88cf-a06f3cbb80a5"        # in example.data, with the value
VALUE = b"this is a value"
OTHER_KEY = b"f8a24bb8-eff8-41dc-929b-10b4c3e49e05"  # also in it, with the value
OTHER_VALUE = b"1234"
ABSENT = b"00000000-0000-4000-8000-000000000000"     # not in it
PATIENCE = 30                                        # seconds until a test gives up waiting
ON_POSIX = unittest.skipUnless(os.name == "posix", "needs POSIX")
ON_LINUX = unittest.skipUnless(os.path.exists("/proc/self/status"), "needs /proc")
ON_CPYTHON = unittest.skipUnless(
    platform.python_implementation() == "CPython", "other Pythons manage memory differently")


# What all tests use

def key(number):
    """Return the version 4 UUID (bytes) with this number at its end."""
    return b"a0000000-0000-4000-8000-%012x" % number


def head(method, target, *fields, version="1.1", host="Host: kv"):
    """Return the head of a request. All parts are str or bytes; `host` may be empty."""
    words = [method, target, "HTTP/" + version]
    lines = [b" ".join(map(as_bytes, words))] + [as_bytes(f) for f in (host,) + fields if f]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def as_bytes(text):
    return text.encode("latin-1") if isinstance(text, str) else text


def ask_for(path, *fields):
    """Return the head of a GET request for a path (bytes), given without its slash."""
    return head("GET", b"/" + path, *fields)


GET_KEY = ask_for(KEY)


def command(*arguments):
    """Return the command that runs kv.py with these arguments (str or bytes)."""
    return [sys.executable, os.path.join(HERE, "kv.py")] + list(map(os.fsdecode, arguments))


def environment(**changed):
    """Return the environment without proxies and $KV_URL, but with what is given."""
    kept = {name: value for name, value in os.environ.items()
            if not name.lower().endswith("_proxy") and name != "KV_URL"}
    return dict(kept, **changed)


def finished(command_line, stdin=b"", **env):
    """Run a command to its end; return exit code, standard output and standard error."""
    done = subprocess.run(command_line, input=stdin, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=environment(**env), timeout=PATIENCE)
    return done.returncode, done.stdout, done.stderr


def run(*arguments, stdin=b"", **env):
    """Run kv.py to its end; return what `finished` returns."""
    return finished(command(*arguments), stdin, **env)


def side_by_side(work, rows):
    """Call `work(*row)` for each row, several at a time; yield each row and its future."""
    rows = list(rows)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        yield from zip(rows, [pool.submit(work, *row) for row in rows])


@contextlib.contextmanager
def data_file(content):
    """Yield the path of a file in a folder of its own, which is gone afterwards."""
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


def until(condition):
    """Wait until `condition()` is true and return what it returned."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def proc(pid, pattern, file="status"):
    """Return the number that follows `pattern` in a file of /proc/PID, as "VmRSS:" (kB)."""
    with open("/proc/%d/%s" % (pid, file)) as opened:
        return int(re.search(pattern + r"\s*(\d+)", opened.read()).group(1))


class Serving:
    """`kv.py serve`, from when it is ready until it is stopped; `log` is its standard error.

    `limits` changes constants of kv.py by their names; `prefix` is put before the command.
    """

    def __init__(self, *arguments, limits=None, prefix=(), command_line=None, **how):
        if not command_line:
            command_line = command("serve", *arguments, "--port", "0")
        if limits:
            changed = ("import sys; sys.path.insert(0, %r); import kv\n"
                       "vars(kv).update(%r); sys.exit(kv.main())" % (HERE, limits))
            command_line[1:2] = ["-c", changed]
        how = dict({"stdin": subprocess.DEVNULL, "env": environment()}, **how)
        self.process = subprocess.Popen(
            list(prefix) + command_line, stderr=subprocess.PIPE, **how)
        self.pid = self.process.pid
        self.log = b""
        self.reader = threading.Thread(target=self.read_log, daemon=True)
        self.reader.start()

    def read_log(self):
        for line in self.process.stderr:
            self.log += line

    def __enter__(self):
        try:
            until(lambda: b" s, on " in self.log or self.process.poll() is not None)
            self.url = re.search(r" s, on (\S+)\n", self.log.decode()).group(1)
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
        """End the process; return its exit code. Then `log` is complete."""
        self.send_signal(how)
        code = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        return code

    def send_signal(self, number):
        self.process.send_signal(number)

    def reload(self):
        """Send SIGHUP, and wait for what comes of it."""
        logged = len(self.log)
        self.send_signal(signal.SIGHUP)
        until(lambda: re.search(rb" s, reloaded .*\n|stays as it was\n", self.log[logged:]))

    def threads(self):
        return proc(self.pid, "Threads:")

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
        self.received = b""
        is_unix = isinstance(address, str)
        family = socket.AF_UNIX if is_unix else socket.AF_INET
        if ":" in address[0]:
            family = socket.AF_INET6
        self.socket = socket.socket(family)
        self.socket.settimeout(PATIENCE)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            self.socket.connect(address)
        except BaseException:
            self.socket.close()
            raise
        if not is_unix:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)

    def receive(self):
        """Receive more; return it, b"" if the server has closed the connection."""
        more = self.socket.recv(1 << 16)
        self.received += more
        return more

    def take(self, size):
        """Return the next `size` bytes."""
        pieces = [self.received]
        missing = size - len(self.received)
        while missing > 0:
            pieces.append(self.socket.recv(min(missing, 1 << 20)))
            missing -= len(pieces[-1])
            if not pieces[-1]:
                raise EOFError("the answer breaks off: %r" % pieces[0][:100])
        data = b"".join(pieces)
        self.received = data[size:]
        return data[:size]

    def answer(self, method="GET"):
        """Return status (int), fields (lower-case str: str) and body of the next answer."""
        while b"\r\n\r\n" not in self.received:
            if not self.receive():
                raise EOFError("no answer, but %r" % self.received)
        line, *lines = self.take(self.received.index(b"\r\n\r\n")).decode().split("\r\n")
        self.take(4)
        fields = {}
        for name, value in (line.split(": ", 1) for line in lines):
            assert name.lower() not in fields, lines
            fields[name.lower()] = value
        status = int(re.match(r"HTTP/1\.1 (\d{3}) \S", line).group(1))
        has_body = method != "HEAD" and status != 204
        return status, fields, self.take(int(fields["content-length"]) if has_body else 0)

    def ask(self, path, *fields, method="GET"):
        """Send a request for a path, given without its slash, and return the answer."""
        self.send(head(method, b"/" + path, *fields))
        return self.answer(method)

    def rest(self):
        """Return all that comes until the server closes the connection."""
        while self.receive():
            pass
        return self.take(len(self.received))

    def reset_on_close(self):
        """Close the connection as a program does that is killed: by a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def setUpModule():
    # A script's `python -m unittest &` ignores Ctrl-C, as would the programs it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


class WithExample(unittest.TestCase):
    """All tests of a class that comes of this one share a server of example.data."""

    @classmethod
    def setUpClass(cls):
        cls.server = Serving(EXAMPLE).__enter__()

    @classmethod
    def tearDownClass(cls):
        cls.server.__exit__()


def example_pairs():
    """Return the pairs of example.data, by the plainest means."""
    with open(EXAMPLE, "rb") as file:
        return dict(line.rstrip(b"\n").split(b" ", 1) for line in file)


def all_pass(test, work, rows):
    for row, running in side_by_side(work, rows):
        with test.subTest(row):
            running.result()


class Lines(unittest.TestCase):
    """The data file: what a line may hold, and what refuses a file."""

    K = key(1)
    VALUES = (
        b"", b" ", b" starts with a space", b"ends with spaces  ", b"\t", b"a\tb", b"\r",
        b"carriage\rreturn", b"ends with one\r", b"\0", b"n\0u\0l", b"\x0b", b"\x0c",
        b"\x1c", b"\x85", b"\xc2\x85", b"\xe2\x80\xa8", b"\xff\xfe no UTF-8 \x80", K,
        b"%s %d %%", "\u00e4\u20ac\U0001f600".encode(), b"\xef\xbb\xbf",
        bytes(set(range(256)) - {10}), b"x" * 70000, b"HTTP/1.1 200 OK\r")

    NO_KEY = "no version 4 UUID at the start of the line"
    NO_SPACE = "no space after the key"
    TWICE = "duplicate key, first on an earlier line"
    VERSION = "a UUID, but version %s, not 4"
    VARIANT = "a UUID, but not of the RFC 9562 variant"
    UNSORTED = "a key below the one before it; sort the file with LC_ALL=C sort"
    UPPER = "a key in upper case, which --sorted does not accept"
    BAD_LINES = (  # what is wrong, and lines of which this is true
        (NO_SPACE, K, K + b"\tv", K + b",v", K + b"\0v", K + b"\r", K + b"0 v"),
        (NO_KEY, b"nonsense", b" ", b"\r", b" " + K + b" v", b"# a comment", b"key value",
         b'"' + K + b'" v', b"{" + K + b"} v", b"{1f}", K[:-1] + b" v", b"x" * 99,
         K.replace(b"a", b"g") + b" v", K.replace(b"1", b"\xb9") + b" v"),
        ("a UUID without hyphens",
         K.replace(b"-", b"") + b" v", K.replace(b"-", b"").upper()),
        (VERSION % 1, K.replace(b"-4", b"-1") + b" v"),
        (VERSION % 7, K.replace(b"-4", b"-7").upper() + b" v"),
        (VERSION % "f", K.replace(b"-4", b"-F") + b" v"),
        (VARIANT, K.replace(b"-8", b"-7") + b" v", K.replace(b"-8", b"-c") + b" v"),
        ("a byte order mark before the key",
         b"\xef\xbb\xbf" + K + b" v", b"\xff\xfe" + K + b" v"))
    BAD = (  # if --sorted (None: either way), a file, number and fault of each bad line
        (None, K + b" v\r" + key(2) + b" w\n" + key(2), (2, NO_SPACE)),
        (None, K + b" v\n" + K + b" w\n" + key(2) + b" x", (2, TWICE)),
        (False, K + b" v\n\n" + K.upper() + b" v", (3, TWICE)),
        (False, K.upper() + b" v\n" + K + b" v", (2, TWICE)),
        (False, key(2) + b" v\nbad\n\n%b w\nworse\n%b again\n" % (K, K) + b"x" * 99,
         (2, NO_KEY), (5, NO_KEY), (6, TWICE), (7, NO_KEY)),
        (True, key(2) + b" v\n\n" + K + b" w\n" + key(3) + b" x", (3, UNSORTED)),
        (True, K + b" v\n" + key(10).upper() + b" w\n" + key(11) + b" x", (2, UPPER)),
        (True, key(10).upper() + b" v", (1, UPPER)),
        (True, key(2) + b" v\nbad\n" + K + b" w\n" + key(3) + b" x\n" + b"x" * 99,
         (2, NO_KEY), (3, UNSORTED), (5, NO_KEY)))

    COMPRESSED = "%s data; decompress it first, as in: %s FILE | python kv.py serve -"
    REFUSED = (  # a file, and why it is refused
        (b"", "contains no pair"), (b"\n\n\n", "contains no pair"),
        (gzip.compress(K + b" v\n"), COMPRESSED % ("gzip", "zcat")),
        (b"BZh91AY&SY" + b"\n" * 20, COMPRESSED % ("bzip2", "bzcat")),
        (b"\xfd7zXZ\0\0\4", COMPRESSED % ("xz", "xzcat")),
        (b"\x28\xb5\x2f\xfd\x04\x58", COMPRESSED % ("zstd", "zstdcat")))
    PATHS = (  # a path that cannot be served, its name in the message, and why
        ("/no/such/file", "/no/such/file", "No such file or directory"),
        (HERE, HERE, "Is a directory"), ("", "''", "No such file or directory"),
        ("new\nline", r"new\nline", "No such file or directory"),
        ("/dev/zero", "/dev/zero", "a device, not a file"))
    CUT_OFF = "the last line has no newline; was the file cut off?"
    WINDOWS = "all values end in \\r; does the file have Windows line endings?"
    MISTAKES = (  # a file that is served (@ is a second key), what the log says of it
        (K + b" v\n@ w", CUT_OFF), (K + b" v\r\n@ w\r", CUT_OFF), (K + b" v\n\n", None),
        (K + b" v\r\n@ w\r\n", WINDOWS), (K + b" v\r\n@ w\n", None))

    def test_every_value_arrives_as_it_is(self):
        pairs = {key(n): value for n, value in enumerate(self.VALUES)}
        lines = [k + b" " + v for k, v in pairs.items()]

        def arrives(content, *options):
            with data_file(content) as path, Serving(path, *options) as server:
                if not options:
                    self.assertEqual(kv.load(path), pairs)
                out = b"".join(v + b"\n" for v in pairs.values())
                self.assertEqual(run("get", "--url", server.url, *pairs), (0, out, b""))
                with server.connect() as client:
                    for k, value in pairs.items():
                        self.assertEqual(client.ask(k)[::2], (200, value))

        all_pass(self, arrives, (
            (b"\n".join(lines),), (b"\n".join(lines) + b"\n",),
            (b"\n\n" + b"\n\n".join(reversed(lines)) + b"\n\n",),
            (b"\n".join(lines), "--sorted"), (b"\n".join(lines) + b"\n", "--sorted"),
            (b"\n\n" + b"\n\n".join(lines) + b"\n\n", "--sorted", "--no-check")))

    def test_keys_in_either_case(self):
        b = key(11).replace(b"-8", b"-b")
        content = key(10).upper() + b" X\n" + b.replace(b"-b", b"-B") + b" x"
        with data_file(content) as path:
            self.assertEqual(kv.load(path), {key(10): b"X", b: b"x"})

    @staticmethod
    def named(content, bad):
        """Return the lines that name bad lines of a file F."""
        lines = content.split(b"\n")
        return ["F:%d: %s: %r" % (n, fault, lines[n - 1][:50]) for n, fault in bad]

    def names(self, content, bad, is_sorted, more=()):
        """Check that the parser names bad lines, and says `more`."""
        with self.subTest(content[:200]), data_file(content) as path:
            with open(path, "rb") as file, self.assertRaises(ValueError) as caught:
                list(kv.parse(file, "F", kv.Sorted(file) if is_sorted else {}))
            self.assertEqual(str(caught.exception).split("\n"),
                             self.named(content, bad) + list(more))

    def test_bad_lines_are_named(self):
        for fault, *lines in self.BAD_LINES:
            for line, before, end, is_sorted in itertools.product(
                    lines, (b"", b"\n" + key(0) + b" v\n"), (b"", b"\n"), (False, True)):
                number = before.count(b"\n") + 1
                self.names(before + line + end, [(number, fault)], is_sorted)
        for either, content, *bad in self.BAD:
            for is_sorted in (False, True) if either is None else (either,):
                self.names(content, bad, is_sorted)
        for count in (9, 10, 11, 25):
            bad = [(n + 2, self.NO_KEY) for n in range(min(count, 10))]
            more = ["F: and %d more bad lines" % (count - 10)] * (count > 10)
            self.names(self.K + b" v\n" + b"bad\n" * count, bad, False, more)

    def test_the_program_names_bad_lines(self):
        """Also far down, with all that follows still looked at."""
        lines = [key(n) + b" value" for n in range(9000)]
        lines[5000], lines[8000] = key(3) + b" other", b"bad"
        for is_sorted, content, *bad in (
                *(row for row in self.BAD if len(row) > 4),
                (False, b"\n".join(lines), (5001, self.TWICE), (8001, self.NO_KEY)),
                (True, b"\n".join(lines), (5001, self.UNSORTED), (8001, self.NO_KEY))):
            option = ["--sorted"] * is_sorted
            with data_file(content) as path:
                code, out, err = run("serve", "--port", "0", path, *option)
            self.assertEqual((code, out), (1, b""))
            self.assertEqual(err.decode().replace(path, "F").splitlines(),
                             ["kv: " + line for line in self.named(content, bad)])

    def refused(self, path, name, reason):
        self.assertEqual(run("serve", "--port", "0", path),
                         (1, b"", ("kv: %s: %s\n" % (name, reason)).encode()))

    def test_files_that_are_refused(self):
        def refused(content, reason):
            with data_file(content) as path:
                self.refused(path, path, reason)

        all_pass(self, refused, self.REFUSED)

    @ON_POSIX
    def test_paths_that_cannot_be_served(self):
        all_pass(self, self.refused, self.PATHS)

    def test_what_is_probably_a_mistake_is_served_and_told(self):
        def told(content, mistake):
            content = content.replace(b"@", key(2))
            with data_file(content) as path, Serving(path) as server:
                self.assertEqual(server.lines()[:-1],
                                 ["kv: %s: %s" % (path, mistake)] if mistake else [])
                with server.connect() as client:
                    value = re.search(b"(?m)^" + self.K + b" (.*)$", content).group(1)
                    self.assertEqual(client.ask(self.K)[2], value)

        all_pass(self, told, self.MISTAKES)

    def test_the_parser_works_in_short_steps(self):
        """However long the lines are, so that a reload holds up nobody."""
        for size in (1, 100, 1000, 10000, 100000):
            value = b" " + b"x" * size + b"\n"
            lines = [key(n) + value for n in range(400000 // size + 1)]
            with data_file(b"".join(lines)) as path, open(path, "rb") as file:
                places = [0] + [file.tell() for _ in kv.parse(file, path, {})]
            longest = max(b - a for a, b in zip(places, places[1:]))
            self.assertLessEqual(longest, kv.STEP_BYTES + len(lines[0]))

    def test_a_file_that_changes_while_it_is_read(self):
        """Its size or its time is changed again and again, from the start to the end."""
        def grow(path):
            with open(path, "ab") as file:
                file.write(b"\n")

        def noticed(change, *options):
            with data_file(b"".join(key(n) + b" v\n" for n in range(200000))) as path:
                serve = command("serve", "--port", "0", path, *options)
                process = subprocess.Popen(serve, stderr=subprocess.PIPE)
                try:
                    until(lambda: change(path) or process.poll() is not None)
                finally:
                    process.kill()
                    err = process.communicate()[1].decode()
                self.assertEqual((process.returncode, err),
                                 (1, "kv: %s: changed while it was read\n" % path))

        all_pass(self, noticed, [(grow,), (os.utime,), (os.utime, "--sorted")])

    @ON_POSIX
    def test_standard_input_and_pipes(self):
        def served(server, name):
            with server, server.connect() as client:
                self.assertIn("kv: 9000 pairs of %s in " % name, server.lines()[0])
                self.assertEqual(client.ask(key(8999))[2], b"8999")

        lines = b"".join(key(n) + b" %d\n" % n for n in range(9000))
        with data_file(lines) as path, open(path, "rb") as file:
            served(Serving("-", stdin=file), "standard input")
            pipe = path + ".pipe"
            os.mkfifo(pipe)
            server = Serving(pipe)
            self.addCleanup(server.__exit__)  # also if nobody opens the pipe
            finished(["sh", "-c", 'exec cat "$0" > "$1"', path, pipe])
            served(server, pipe)
        self.assertEqual(run("serve", "--port", "0", "-", stdin=b"bad"), (
            1, b"", ("kv: standard input:1: %s: b'bad'\n" % self.NO_KEY).encode()))


def random_key(chance):
    return str(uuid.UUID(int=chance.getrandbits(128), version=4)).encode()


class Counted(kv.Sorted):
    """The pairs of a sorted file, which counts how often it is read."""

    reads = 0

    def read(self, *arguments, **named):
        self.reads += 1
        return super().read(*arguments, **named)


@unittest.skipUnless(hasattr(os, "pread"), "needs os.pread")
class SortedFiles(unittest.TestCase):
    """Look-ups in the file itself."""

    LINES = 200000
    CHANGES = (  # what becomes of a file in place, which is opened in this mode
        ("r+b", lambda file, content: file.write(content)),
        ("r+b", lambda file, content: file.truncate(len(content) // 3)),
        ("wb", lambda file, content: file.write(content[:-10])),
        ("rb", lambda file, content: os.utime(file.name, (1, 1))))

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
        """Find every `step`th of `pairs` (a dict) in a file of them, none of `absent`.

        Returns how often the file was read for a pair, on average and at most.
        """
        reads = []
        lines = [k + b" " + v for k, v in sorted(pairs.items())]
        with data_file(b"\n".join(lines) + end) as path, open(path, "rb") as file:
            found = Counted(file)
            if check:
                collections.deque(kv.parse(file, path, found), 0)
            self.assertEqual(len(found), len(pairs) if check else 0)
            for k, value in itertools.islice(pairs.items(), 0, None, step):
                found.reads = 0
                self.assertEqual(self.get(found, k), value)
                reads.append(found.reads)
            for k in absent:
                self.assertIsNone(found.get(k, wait=True), k)
        return statistics.mean(reads), max(reads)

    @staticmethod
    def neighbours(pairs):
        """Yield keys one digit off some of those of `pairs`, each in another place."""
        for number, k in enumerate(itertools.islice(pairs, 360)):
            for digit in b"0123456789abcdef":
                other = k[:number % 36] + bytes([digit]) + k[number % 36 + 1:]
                if kv.KEY_RE.fullmatch(other) and other not in pairs:
                    yield other

    def test_random_keys(self):
        """One read nearly always, where the file was checked; else places are guessed."""
        chance = random.Random(6)
        pairs = {random_key(chance): b"%d" % n * (n % 9) for n in range(100000)}
        absent = [random_key(chance) for _ in range(9000)] + list(self.neighbours(pairs))
        for check, mean_limit in ((True, 1.1), (False, 2.2)):
            mean, most = self.find_all(pairs, absent, step=4, check=check)
            self.assertLess(mean, mean_limit)
            self.assertLess(most, 9)

    def test_pages_hardly_longer_than_a_line(self):
        """So that every cut through a line occurs, with marks everywhere or nowhere."""
        chance, mark = random.Random(7), kv.MARK_BYTES
        self.addCleanup(setattr, kv, "PAGE_BYTES", kv.PAGE_BYTES)
        self.addCleanup(setattr, kv, "MARK_BYTES", mark)
        last = b"ffffffff-ffff-4fff-bfff-ffffffffffff"
        for kv.PAGE_BYTES, count in itertools.product(
                [*range(38, 80), 150, 1000], (1, 2, 3, 10, 60)):
            kv.MARK_BYTES = chance.choice((1, 100, mark))
            pairs = {random_key(chance): b"v" * chance.choice((0, 1, 30, 31, 500))
                     for _ in range(count)}
            self.find_all(pairs, [random_key(chance), ABSENT, last],
                          end=chance.choice((b"", b"\n", b"\n" * 99)))

    def test_values_of_all_lengths(self):
        """Short ones between those that no page holds, with keys in them."""
        chance = random.Random(8)
        sizes = (0, 1, 27, 50, 100, 107, 108, 430, 431, 1000, 26000)
        for end, check in ((b"", True), (b"\n", False)):
            pairs = {random_key(chance): b" %b " % random_key(chance)
                     * chance.choice(sizes) for _ in range(200)}
            inside = [v[1:37] for v in pairs.values() if v]
            self.assertLess(self.find_all(pairs, inside, end=end, check=check)[1], 2000)

    def test_keys_far_from_random(self):
        """However they crowd, reads grow with the logarithm of the size."""
        bits, some = random.Random(9).getrandbits, range(20000)
        clusters = b"0000000%x-0000-4000-8000-0%011x", b"ffffffff-ffff-4fff-bfff-%x%011x"
        for name, keys in (
                ("alike", [key(0)[:31] + b"%05x" % bits(20) for _ in some]),
                ("clusters", [clusters[n % 2] % (bits(4), bits(44)) for n in some]),
                ("sequential", map(key, some)),
                ("powers", [b"%08x" % (1 << n % 32) + key(n)[8:] for n in some])):
            pairs = dict.fromkeys(keys, b"a value")
            limit = 4 * math.log2(45 * len(pairs) / kv.PAGE_BYTES) + 4
            for check in (True, False):
                with self.subTest(name, check=check):
                    absent = self.neighbours(pairs)
                    _, most = self.find_all(pairs, absent, step=9, check=check)
                    self.assertLessEqual(most, limit)

    def test_unchecked(self):
        """Nothing is read before it listens, and what stands in order is found."""
        content = b"no pair\n%b one\n%b two\n%b again\n" % (key(1), key(2), key(2))
        options = "--sorted", "--no-check"
        with data_file(content) as path, Serving(path, *options) as server:
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
                if between:
                    self.assertRaises(BlockingIOError, found.get, key(2))
                self.assertIsNone(found.get(key(2), wait=True))
                self.assertEqual(found.get(key(3), wait=True), b"three")

    @contextlib.contextmanager
    def large_file(self, folder=None):
        """Yield a sorted file, opened, that takes some time to read from a disk."""
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.writelines(key(n) + b" %d %020d\n" % (n, 0) for n in range(self.LINES))
            file.flush()
            os.fsync(file.fileno())
            yield file

    @staticmethod
    def drop_pages(file):
        """Put a file's pages out of memory, as if it was larger than that."""
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    @unittest.skipUnless(hasattr(os, "RWF_NOWAIT"), "needs preadv with RWF_NOWAIT")
    def test_pages_that_are_not_in_memory(self):
        """Threads wait for them, and the loop answers others meanwhile."""
        def ask(first):
            with server.connect() as client:
                for n in range(first, self.LINES, 600):
                    client.send(ask_for(key(n)) + ask_for(key(n + 1)))
                    for number in (n, n + 1):
                        self.assertEqual(client.answer()[2].split()[0], b"%d" % number)

        with self.large_file() as file:
            pairs = kv.Sorted(file)
            self.drop_pages(file)
            with contextlib.suppress(BlockingIOError):
                pairs.get(key(self.LINES // 2))
                self.skipTest("this file system does not say what is in memory")
            self.assertEqual(pairs.get(key(7), wait=True)[:2], b"7 ")
            with Serving(file.name, "--sorted") as server, server.connect() as other:
                with concurrent.futures.ThreadPoolExecutor(8) as pool:
                    clients = [pool.submit(ask, n) for n in range(0, 600, 75)]
                    while not all(client.done() for client in clients):
                        self.drop_pages(file)
                        self.assertEqual(other.ask(b"")[0], 200)
                for client in clients:
                    client.result()
                until(lambda: server.threads() == 1)

    def test_where_the_system_does_not_say_what_is_in_memory(self):
        flag = getattr(os, "RWF_NOWAIT", None)
        for folder in filter(os.path.isdir, (tempfile.gettempdir(), "/dev/shm")):
            with self.subTest(folder), self.large_file(folder) as file:
                if flag and folder != "/dev/shm":
                    del os.RWF_NOWAIT
                try:
                    pairs = kv.Sorted(file)
                finally:
                    if flag:
                        os.RWF_NOWAIT = flag
                if hasattr(os, "posix_fadvise"):
                    self.drop_pages(file)
                for n in range(0, self.LINES, 1000):
                    self.assertEqual(pairs.get(key(n)).split()[0], b"%d" % n)

    def test_a_file_that_changes_in_place(self):
        """Answers are right, or a 500, told once; after a reload, all is right again."""
        def content(value):
            return b"".join(key(n) + b" %d %b\n" % (n, value) for n in range(2000))

        def noticed(mode, change):
            with contextlib.ExitStack() as stack:
                path = stack.enter_context(data_file(content(b"old")))
                server = stack.enter_context(Serving(path, "--sorted"))
                client = stack.enter_context(server.connect())
                self.assertEqual(client.ask(b"")[0], 200)
                for n in range(500):
                    self.assertEqual(client.ask(key(n))[2], b"%d old" % n)
                with open(path, mode) as file:
                    change(file, content(b"new"))
                for asked in [key(n) for n in range(500)] + [b""]:
                    self.assertEqual(client.ask(asked)[0], 500)
                until(lambda: len(server.lines()) > 1)
                self.assertEqual(server.lines()[1:], [
                    "kv: %s: changed in place; send SIGHUP to reload it" % path])
                replace(path, content(b"new"))
                server.reload()
                for n in range(0, 2000, 100):
                    self.assertEqual(client.ask(key(n))[2], b"%d new" % n)
                self.assertEqual(client.ask(b"")[0], 200)

        all_pass(self, noticed, self.CHANGES)

    def test_a_file_that_changes_all_the_time(self):
        """No value of another key comes, and none that is half old and half new."""
        values = [b"%d " % n * (20000 if n < 3 else 900) for n in range(13)]
        contents = [b"".join(b"%b %b\n" % (key(n), v) for n in range(60)) for v in values]
        stop = threading.Event()

        def rewrite(path):
            with open(path, "r+b", 0) as file:
                for content in itertools.cycle(contents):
                    if stop.is_set():
                        break
                    os.pwrite(file.fileno(), content, 0)

        with contextlib.ExitStack() as stack:
            path = stack.enter_context(data_file(contents[0]))
            server = stack.enter_context(Serving(path, "--sorted"))
            pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor())
            stack.callback(stop.set)
            client = stack.enter_context(server.connect())
            for n in range(600):
                if n == 100:
                    writing = pool.submit(rewrite, path)
                try:
                    status, _, body = client.ask(key(n % 60))
                    self.assertTrue(status == 500 or body in values, body[:99])
                except (EOFError, ConnectionError):  # the answer breaks off
                    client.socket.close()
                    client = stack.enter_context(server.connect())
                if n % 100 == 50:
                    server.send_signal(signal.SIGHUP)
            stop.set()
            writing.result(PATIENCE)


def rows(status, *words, form=b"%b"):
    """Return rows (status, request): `form` with each of `words` in its gap."""
    return tuple((status, form % as_bytes(word)) for word in words)


class Judge(WithExample):
    """Requests: raw bytes in, and what must come of them."""

    K = KEY.decode()
    PATH = "/" + K
    REQUEST_LINE = b"%b\r\nHost: kv\r\n\r\n"        # forms with a gap for a word
    METHOD = head("%b", PATH)
    TARGET = head("GET", "%b")
    VERSION = b"GET /" + KEY + b" %b\r\nHost: kv\r\n\r\n"
    FIELDS = head("GET", PATH, "%b", host="")           # with all fields of a request
    FIELD = head("GET", PATH, "%b")                     # with one more than Host
    HOST = head("GET", PATH, host="Host: %b")
    POST = head("POST", PATH, "%b")
    HTTP_1_0 = head("GET", PATH, "%b", host="", version="1.0")
    HEAD_KEY = METHOD % b"HEAD"
    LINE_BYTES, ROOM = kv.LINE_BYTES, kv.HEAD_BYTES - len(GET_KEY)

    # The tables have rows of the status of the answer and all that is sent.
    KEPT = (  # the connection stays open
        *rows(200, GET_KEY, b"\r\n" + GET_KEY, HEAD_KEY, b"\r\n" + HEAD_KEY),
        *rows(200, "hOST: kv", "Host:kv", "Accept: */*\r\nHost: kv\r\nUser-Agent: x",
              "content-length:0 \r\nHost: kv", form=FIELDS),
        *rows(200, "\t kv \t ", "kv:8000", "kv:", "127.0.0.1:8000", "[::1]:8000",
              "[2001:db8::ffff:192.0.2.1]", "a-b_c.~!$&'()*+;=%20", form=HOST),
        *rows(200, "!#$%&'*+-.^_`|~09azAZ: any token", "X:", "X: \t ",
              "X: a\tb \x80\xff !~", "Connection: keep-alive",
              "Connection: Keep-Alive, X-Close\r\nx-close: 1",
              "Connection:", "Content-Length: 0", "Expect: 100-continue",
              "expect: 100-Continue", "Expect: 100-continue,\r\nExpect: 100-continue",
              "Upgrade: h2c\r\nConnection: upgrade", "Range: 0-1\r\nIf-None-Match: *",
              "X: " + "x" * (ROOM - 5), "a:b\r\n" * 1999 + "a:b", form=FIELD),
        *rows(200, head("GET", "http://kv" + PATH, host="Host: other")),
        *rows(200, "HTTP://[::1]:80" + PATH, PATH + "?", PATH.upper() + "?a=b&c=%20/?",
              PATH.replace("-", "%2D"), PATH.replace("-", "%2d", 1), f"http://kv{PATH}?x",
              PATH.upper(), "/", "/?health", "http://kv", "http://kv?x", form=TARGET),
        *rows(200, "HTTP/1.2", "HTTP/1.9", form=VERSION),
        *rows(204, "OPTIONS * HTTP/1.1", "\r\nOPTIONS * HTTP/1.1", "OPTIONS / HTTP/1.1",
              "OPTIONS / HTTP/1.1\r\nContent-Length: 0", "OPTIONS http://kv HTTP/1.1",
              f"OPTIONS {PATH} HTTP/1.1", form=REQUEST_LINE),
        *rows(400, "/favicon.ico", "/" + "x" * (LINE_BYTES - 14), PATH + "0", PATH[:-1],
              PATH + "/", "/" + PATH, PATH.replace("-4", "-1"), PATH.replace("-8", "-7"),
              PATH.replace("-", ""), "/%33" + K[1:], form=TARGET),
        *rows(404, ask_for(ABSENT)), *rows(405, "Content-Length: 0", form=POST),
        *rows(405, "POST", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", form=METHOD),
        *rows(405, "CONNECT kv:80 HTTP/1.1", "TRACE / HTTP/1.1", "POST / HTTP/1.1",
              form=REQUEST_LINE),
        *rows(501, "get", "BREW", "G", "!#$%&'*+-.^_`|~09azAZ", form=METHOD))

    CLOSED = (  # the connection is closed after the answer
        *rows(200, "Connection: close", "Connection: close\r\nConnection: keep-alive",
              "Connection: keep-alive , close", "Connection: close,x", form=FIELD),
        *rows(200, "connection:Close\t\r\nHost: kv", form=FIELDS),
        *rows(200, head("GET", PATH, host="", version="1.0")),
        *rows(200, "Host: kv\r\nConnection: keep-alive", form=HTTP_1_0),
        *rows(404, ask_for(ABSENT, "Connection: close")),
        *rows(405, head("POST", PATH, host="", version="1.0")),
        # the request line
        *rows(400, "\r\n\r\n", b"\r\n\r\n" + GET_KEY, b"\n" + GET_KEY, b" " + GET_KEY,
              "GET /\r\n\r\n"),
        *rows(400, "GET", f"GET {PATH}", f"{PATH} HTTP/1.1", f"GET  {PATH} HTTP/1.1",
              f"GET\t{PATH} HTTP/1.1", f"GET {PATH}  HTTP/1.1", f"GET {PATH}\tHTTP/1.1",
              f"GET {PATH} x HTTP/1.1", f"GET {PATH} HTTP/1.1 ", "POST * HTTP/1.1",
              "POST /#x HTTP/1.1", form=REQUEST_LINE),
        *rows(400, "G(T", "G\0T", "G\xe4T", "", form=METHOD),
        *rows(400, "\0", "\x7f", "\x80", "\xc3\xa4", "\x1b", "#x", "?#x",
              form=ask_for(KEY + b"%b")),
        *rows(400, "/%zz", "/<>", K, "x" + K, "*", "kv:80", "ftp://kv" + PATH,
              "http://" + PATH, "http://me@kv" + PATH, "http:" + PATH, form=TARGET),
        # the version
        *rows(505, "HTTP/2.0", "HTTP/0.9", form=VERSION),
        *rows(505, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        *rows(400, "HTTP/1", "HTTP/1.10", "HTTP/01.1", "HTTP/1,1", "http/1.1",
              "HTTPS/1.1", "HTTP /1.1", form=VERSION),
        # line ends
        *rows(400, GET_KEY.replace(b"\r\n", b"\n"), GET_KEY.replace(b"\r\n", b"\n", 1),
              GET_KEY.replace(b"\r\n", b"\r", 1)),
        *rows(400, "Host: kv\n\r\n", "Host: kv\r\n\n", form=FIELDS[:-4]),
        *rows(400, "X: a\rb", "X: a\nb: c", "X: a\r", form=FIELD),
        # fields
        *rows(400, "X : a", "X\t: a", "X: a\r\n folded", "X: a\r\n\tfolded", "no colon",
              ": no name", "X(: a", "X\xe4: a", "X\0: a", "X: \0", "X: a\x01", "X: \x0b",
              "X: \x7f", "Host: kv", "X: a\r\nhost: kv2", form=FIELD),
        *rows(400, "Host : kv", " Host: kv", " X: a\r\nHost: kv", "X: a", form=FIELDS),
        *rows(400, "no colon", "Host: kv\r\nHost: kv", "Host: a b", form=HTTP_1_0),
        # Host
        *rows(400, head("GET", PATH, host=""), head("GET", PATH, host="", version="1.2")),
        *rows(400, "", " ", "a, b", "a,b", "a b", "me@kv", "kv/", "http://kv", "kv:port",
              "kv:80:80", "kv:-1", "kv:123456", "kv?", "kv#", "k\\v", "k%v", "k%2", "k<v",
              "k\"v", "k\xe4v", "[::1", "::1", "[]", "[1]", "[::1]x", "[::1][::1]",
              "[g::]", "[::1%25eth0]", "[fe80::/10]", ":80", form=HOST),
        # bodies: never read, so what follows the head is never a request
        *rows(400, "Content-Length: 1\r\n\r\nx", b"Content-Length: %d\r\n\r\n%b" % (
                  len(GET_KEY), GET_KEY), "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
              form=FIELD[:-4]),
        *rows(400, "Content-Length: 00", "Content-Length: 0\r\nContent-Length: 0",
              "Content-Length: 0, 0", "Content-Length:", "Content-Length: -0",
              "Transfer-Encoding: identity", "transfer-encoding:", form=FIELD),
        *rows(405, "Content-Length: 5\r\n\r\nhello", b"Content-Length: %d\r\n\r\n%b" % (
                  len(GET_KEY), GET_KEY),
              "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
              form=POST[:-4]),
        *rows(405, "Content-Length: 00", "Content-Length: 99999999999999999999999",
              "Transfer-Encoding: gzip , Chunked", "Transfer-Encoding: , chunked",
              "Expect: 100-continue\r\nContent-Length: 5", form=POST),
        *rows(204, head("OPTIONS", "/", "Content-Length: 5") + b"hello"),
        *rows(501, head("BREW", PATH, "Content-Length: 5") + b"hello"),
        *rows(400, head("BREW", "/", "Content-Length: x")),
        *rows(400, " +5", " -5", " 5, 5", " 5\r\nContent-Length: 5", " 0x5", " 5_0",
              " 5 0", " 5\r\ncontent-length: 6", " five", "", " \xb2",
              " 5\r\nTransfer-Encoding: chunked", form=POST % b"Content-Length:%b"),
        *rows(400, "chunked\r\nContent-Length: 5", "chunked, gzip",
              "chunked\r\nTransfer-Encoding: chunked", "xchunked", "\x0bchunked",
              "chunked;x", form=POST % b"Transfer-Encoding: %b"),
        # expectations
        *rows(417, "Expect: 200-ok", "Expect:", "Expect: 100-continue, more",
              "Expect: 100-continue\r\nExpect: more", form=FIELD),
        *rows(417, "Expect: x", form=POST),
        # lengths
        *rows(414, ask_for(b"x" * (LINE_BYTES - 13)), "\r\nGET /" + "x" * LINE_BYTES,
              "UPDATEREDIRECTREF " + "x" * LINE_BYTES),
        *rows(501, "x" * (LINE_BYTES + 1), "UPDATEREDIRECTREFS " + "x" * LINE_BYTES),
        *rows(431, "X: " + "x" * (ROOM - 4), "a:b\r\n" * 3999 + "a:b", form=FIELD),
        *rows(431, b"GET /" + KEY + b" HTTP/1.1\r\n" + b"x" * kv.HEAD_BYTES))

    AT_ONCE = (  # refused before the head is complete
        *rows(400, "EHLO x\r\n", "SSH-2.0-OpenSSH_9.2\r\n", "PING\r\n",
              "*1\r\n$4\r\nPING\r\n", "GET /\r\n", "\x16\x03\x01\x02\x00\x01", "\0", "{",
              " ", "GET\t", "\r\n{", f"GET {PATH} HTTP/1.1\n",
              "GET / HTTP/1.1\r\nHost: kv\n",
              "GET / HTTP/1.1\r\nX: \rx", f"GET {PATH} HTTP/1.10\r\n",
              "GET /<> HTTP/1.1\r\n", "GET kv HTTP/1.1\r\nHost", GET_KEY + b"EHLO x\r\n"),
        *rows(505, "GET / HTTP/2.0\r\n"), *rows(414, "GET /" + "x" * LINE_BYTES),
        *rows(501, "x" * (LINE_BYTES + 1)),
        *rows(431, "GET / HTTP/1.1\r\n" + "x" * kv.HEAD_BYTES))

    TEXTS = (  # a request, and the body of its answer
        (ask_for(ABSENT), b"key not found\n"), (ask_for(b"x"), b"not a version 4 UUID\n"),
        (METHOD % b"POST", b"method not allowed: use GET or HEAD\n"),
        (FIELD % b"Expect: x", b"unsupported Expect header (RFC 9110 section 10.1.1)\n"),
        (head("GET", PATH, host=""), b"missing Host header (RFC 9112 section 3.2)\n"))

    CHANGING = re.compile(  # what differs from answer to answer: the date, the counts
        rb"(?<=Date: )[^\r]*|(?<=Content-Length: )\d+(?=\r\n\r\n10000 pairs )"
        rb"|\d+ requests answered, \d+ connections open")

    def all_answers(self, ways, pause=0):
        """Send each of `ways`, a list of pieces, on a new connection.

        Returns what is answered on each up to its end, without what is CHANGING. With a
        `pause` in seconds, the first pieces are most likely received by themselves.
        """
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(self.server.connect()) for _ in ways]
            for client, pieces in zip(clients, ways):
                client.send(pieces[0])
            time.sleep(pause)
            for client, pieces in zip(clients, ways):
                with contextlib.suppress(ConnectionError):  # it may be closed already
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
                    method = request.split(None, 1)[0].decode()
                    client.send(request)
                    got, fields, body = client.answer(method)
                    self.assertEqual(got, status, body)
                    self.has_right_fields(method, status, fields, body)

    def has_right_fields(self, method, status, fields, body):
        self.assertRegex(fields.pop("date"),
                         r"^[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} [\d:]{8} GMT$")
        expected = {"server": "kv/" + kv.__version__, "cache-control": "no-cache",
                    "x-content-type-options": "nosniff"}
        if status != 204:
            size = str(len(VALUE if method == "HEAD" else body))
            expected.update({"content-type": "text/plain; charset=utf-8",
                             "content-length": size})
        if status in (204, 405):
            expected["allow"] = "GET, HEAD, OPTIONS"
        self.assertEqual(fields, expected)
        if status >= 400:
            self.assertRegex(body, br"\A[ -;=-~]+\n\Z")  # printable, and no HTML

    def test_what_closes_the_connection(self):
        """Right requests before it are answered; one behind it gets nothing."""
        for (status, request), before in itertools.product(self.CLOSED, (0, 2)):
            if before and request.startswith(b"\r\n"):
                continue  # one empty line more would be another request
            with self.subTest(request[:150], before=before):
                answers = self.answers(GET_KEY * before + request + GET_KEY)
                self.assertEqual(re.findall(br"HTTP/1\.1 (\d+)", answers),
                                 [b"200"] * before + [b"%d" % status])
                self.assertEqual(answers.count(b"\r\nConnection: close\r\n"), 1)
                if status >= 400:
                    self.assertRegex(answers, br"\r\n\r\n[ -~]+\n\Z")

    def test_what_is_refused_at_once(self):
        """While the client waits for an answer and sends nothing more."""
        for status, beginning in self.AT_ONCE:
            with self.subTest(beginning[:150]), self.server.connect() as client:
                client.send(beginning)
                if beginning.startswith(GET_KEY):
                    self.assertEqual(client.answer()[2], VALUE)
                got, fields, _ = client.answer()
                self.assertEqual((got, fields["connection"]), (status, "close"))
                self.assertEqual(client.rest(), b"")

    def test_the_same_however_the_bytes_come(self):
        """Cut at each byte or eighth, and byte by byte; long ones at their limits."""
        for kept, (_, request) in ([(True, row) for row in self.KEPT]
                                   + [(False, row) for row in self.CLOSED]):
            size = len(request)
            cuts = range(1, size, 1 if kept else 8)
            if size > 400:
                cuts = [n for limit in (kv.LINE_BYTES, kv.HEAD_BYTES, size)
                        for n in range(limit - 3, limit + 3) if n < size]
            ways = [[request[:n], request[n:]] for n in cuts]
            if size <= 400:
                ways.append([request[n:n + 1] for n in range(size)])
            with self.subTest(request[:150]):
                whole = self.answers(request)
                self.assertTrue(whole)
                if kept:
                    pieces = itertools.chain(*ways)
                    self.assertEqual(self.answers(*pieces), whole * len(ways))
                else:
                    self.assertEqual(self.all_answers(ways), [whole] * len(ways))

    def test_the_same_when_a_head_comes_in_two_parts(self):
        """Cut in the middle and before the last byte, so that the server has to wait."""
        heads = [request for _, request in self.KEPT + self.CLOSED]
        for some in (heads[n:n + 100] for n in range(0, len(heads), 100)):
            whole = self.all_answers([[request] for request in some])
            self.assertTrue(all(whole))
            for cuts in ([len(r) // 2 for r in some], [len(r) - 1 for r in some]):
                ways = [[r[:cut], r[cut:]] for r, cut in zip(some, cuts)]
                for r, one, two in zip(some, whole, self.all_answers(ways, pause=0.1)):
                    with self.subTest(r[:150]):
                        self.assertEqual(two, one)

    def test_a_head_request_has_no_body(self):
        for _, request in self.KEPT + self.CLOSED:
            if request.startswith(b"GET ") and len(request) < 400:
                full = self.answers(request)
                size = int(re.search(br"Content-Length: (\d+)", full).group(1))
                if b"\r\n\r\n10000 pairs " not in full:  # whose length changes
                    with self.subTest(request):
                        bare = self.answers(b"HEAD" + request[3:])
                        self.assertEqual(bare, full[:-size])

    def test_texts_of_errors(self):
        for request, text in self.TEXTS:
            with self.subTest(request), self.server.connect() as client:
                client.send(request)
                self.assertEqual(client.answer()[2], text)

    def test_the_status_page(self):
        with self.server.connect() as client:
            status, fields, body = client.ask(b"")
            bare = client.ask(b"", method="HEAD")
            self.assertEqual((status, bare[0], set(bare[1])), (200, 200, set(fields)))
            client.send(head("GET", b"http://" + KEY))  # the host of the target is no key
            self.assertIn(b"pairs of example.data", client.answer()[2])
        self.assertRegex(body, rb"\A10000 pairs of example\.data, since [^\n]* GMT\n"
                               rb"\d+ requests answered, \d+ connections open\n"
                               rb"[^\n]*/KEY[^\n]*\n\Z")
        self.assertNotIn(HERE, body.decode())

    def test_the_remembered_verdict(self):
        """It is one on the fields as they are, not on others, however many there are."""
        for field, status in (("X: a", 200), ("X: a", 200), ("x: A", 200), ("X : a", 400),
                              ("X: a\r\nExpect: x", 417), ("X: a\r\nexpect: X", 417)):
            for method in ("GET", "HEAD", "GET"):
                with self.server.connect() as client:
                    got, _, body = client.ask(KEY, field, method=method)
                    self.assertEqual((got, bool(body)), (status, method == "GET"))
                    if status != 200:
                        self.assertEqual(client.rest(), b"")
        with self.server.connect() as client:
            for n in [*range(0, kv.VERDICTS * 3, 50)] * 2:
                client.send(b"".join(ask_for(KEY, "X: %d" % (n + i)) for i in range(50)))
                for _ in range(50):
                    self.assertEqual(client.answer()[2], VALUE)
                self.assertEqual(client.ask(KEY, "X: %d" % n, method="POST")[0], 405)
            self.assertEqual(client.ask(KEY, "X: 1", "Connection: close")[0], 200)
            self.assertEqual(client.rest(), b"")

    def test_heads_that_take_long_to_judge(self):
        """Time grows with the bytes, not with their square: nobody else is answered."""
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
        lines = (GET_KEY.partition(b"Host")[0], (self.METHOD % b"POST")[:-2])
        starts = [line + filler for line in lines for filler in fillers]
        starts += [(self.TARGET % (b"http://[" + text * (7900 // len(text))))[:-2]
                   for text in (b":", b"%41", b"a:")]
        for start in starts:
            with self.subTest(start[:100]):
                before = time.process_time()
                for last in ("", "Host: kv\r\n", "Content-Length: 5x\r\n",
                             "Expect: x\r\n", "Connection: close x\r\n",
                             "Host: [" + "1:" * 40 + "\r\n"):
                    kv.judge((start + as_bytes(last))[:-2])
                    kv.judge_beginning(start + as_bytes(last))
                self.assertLess(time.process_time() - before, 0.3)  # most take 0.005

    # What a request must be so that it is not refused, said once more and in another way:
    # kv.py takes a head apart, these match it whole.
    TCHAR = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
    ORACLE_LINE = re.compile(
        rb"(?:\r\n)?(?P<method>" + TCHAR + rb"+) "
        rb"(?P<target>(?:[!$&-;=?-Z\[\]_a-z~]|%[0-9A-Fa-f]{2})+) "
        rb"HTTP/(?P<version>\d[.]\d)\r\n")
    ORACLE_FIELDS = re.compile(rb"(?:" + TCHAR + rb"+:[\t\x20-\x7e\x80-\xff]*\r\n)*\r\n")
    ORACLE_HOST = (rb"(?:\[[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:.]*\]"
                   rb"|(?:[\w.~!$&'()*+;=-]|%[0-9A-Fa-f]{2})+)(?::\d{0,5})?")
    ORACLE_PATH = rb"(?:(?i:http)://" + ORACLE_HOST + rb")?((?:/[^?]*)?)(?:\?.*)?"
    ORACLE_CODINGS = rb"(?:(?!chunked\s*,)" + TCHAR + rb"*\s*,\s*)*chunked[\s,]*"
    OTHERS = dict.fromkeys(b"POST PUT DELETE TRACE PATCH CONNECT".split(), 405)
    OTHERS[b"OPTIONS"] = 204
    ORACLE_KEY = rb"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"

    def expected(self, request):
        """Return the status of the answer to a request, and whether it is the last."""
        def values(name):
            field = rb"(?mi)^%b:[\t ]*(.*?)[\t ]*\r$" % name
            return re.findall(field, request[line.end():].lower())

        line = self.ORACLE_LINE.match(request)
        if not line:
            return 400, True
        method, target, version = line.group("method", "target", "version")
        if not version.startswith(b"1."):
            return 505, True
        hosts, lengths, codings, connections, expectations = map(values, (
            b"Host", b"Content-Length", b"Transfer-Encoding", b"Connection", b"Expect"))
        body = codings or lengths not in ([], [b"0"])
        path = target[:1] != b"?" and re.fullmatch(self.ORACLE_PATH, target)
        if (not self.ORACLE_FIELDS.fullmatch(request, line.end())
                or len(hosts) != 1 and (hosts or version != b"1.0")
                or hosts and not re.fullmatch(self.ORACLE_HOST, hosts[0])
                or body and method in (b"GET", b"HEAD") or codings and lengths
                or lengths and not re.fullmatch(rb"\d+", b"/".join(lengths))
                or codings and not re.fullmatch(self.ORACLE_CODINGS, b",".join(codings))
                or not (path or method == b"CONNECT"
                        or (method, target) == (b"OPTIONS", b"*"))):
            return 400, True
        options = re.split(rb"[\t ]*,[\t ]*", b",".join(connections))
        last = bool(body) or version == b"1.0" or b"close" in options
        if expectations and not re.fullmatch(
                rb"(,?\s*100-continue\s*,?)+", b",".join(expectations)):
            return 417, True
        if method not in (b"GET", b"HEAD"):
            return self.OTHERS.get(method, 501), last
        asked = re.sub(rb"(?i)%2d", b"-", path[1][1:].lower())
        if asked in (b"", KEY):
            return 200, last
        return 404 if re.fullmatch(self.ORACLE_KEY, asked) else 400, last

    ANSWER = re.compile(  # the counts of the status page are 0, being CHANGING
        rb"HTTP/1\.1 (\d+) [A-Z][ -~]*\r\n((?:[A-Z][A-Za-z-]*: [ -~]+\r\n)+)\r\n"
        rb"(?:10000 pairs.*\n0\n.*\n|this is a value|[ -~]+\n)?")

    def test_mutated_heads(self):
        """Each is answered as the rules above say, by whole answers and nothing else."""
        chance = random.Random(9112)
        heads = [request for _, request in self.KEPT + self.CLOSED if len(request) < 400]
        pieces = (b"\r", b"\n", b"\r\n", b" ", b"\t", b":", b"\0", b",", b"0", b"/", b"?",
                  b"%2d", b"Host: x\r\n", b"\xff" * 9)
        seen = set()
        for _ in range(4000):
            sent = bytearray(chance.choice(heads))
            for _ in range(chance.choice((0, 1, 1, 1, 2, 5))):
                where = chance.randrange(len(sent))
                what = chance.choice(pieces + (bytes([chance.randrange(256)]),))
                sent[where:where + chance.choice((0, 1, 1, 4))] = what
            sent = bytes(sent)
            got = self.answers(sent)
            self.assertEqual(self.ANSWER.sub(b"", got), b"", sent)
            statuses = [(int(status), b"Connection: close\r\n" in fields)
                        for status, fields in self.ANSWER.findall(got)]
            expected = []
            for request in re.findall(rb"(?s)(.*?\r\n\r\n)", sent):
                if not expected or not expected[-1][1]:
                    expected.append(self.expected(request))
            if len(statuses) == len(expected) + 1:  # the rest was refused before its end
                self.assertIn(statuses.pop(), ((400, True), (505, True)), sent)
            self.assertEqual(statuses, expected, sent)
            seen.update(status for status, _ in statuses)
        self.assertEqual(seen, {200, 204, 400, 404, 405, 417, 501, 505})
        with self.server.connect() as client:
            self.assertEqual(client.ask(KEY)[2], VALUE)
        self.assertEqual(self.server.log.count(b"\n"), 1, self.server.log)


# What the tests of many clients use

SIZE = 20000000  # bytes of the value of KEY here, which no socket takes at once
LARGE = KEY + b" " + b"x" * SIZE + b"\n" + OTHER_KEY + b" " + OTHER_VALUE + b"\n"


@contextlib.contextmanager
def serving(content, *arguments, **how):
    """Yield a server of a file with this content, which is at server.path."""
    with data_file(content) as path, Serving(path, *arguments, **how) as server:
        server.path = path
        yield server


def soon(client, path=OTHER_KEY):
    """Ask for a path and return the body of the answer, which must come soon."""
    start = time.monotonic()
    body = client.ask(path)[2]
    assert time.monotonic() - start < 1
    return body


def raise_descriptor_limit(needed):
    """Let this process open enough files, for its clients and servers."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        if hard < needed:
            raise unittest.SkipTest(f"needs {needed} open files")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def limit_memory(pid, kilobytes):
    """Let a process have this much memory more than it has; None: as much as it likes."""
    import resource
    limit = resource.RLIM_INFINITY
    if kilobytes is not None:
        limit = (proc(pid, "VmSize:") + kilobytes) * 1024
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


@contextlib.contextmanager
def clients_asking(address, keys=(KEY,), again=False, is_kept=True, count=8):
    """Ask on and on, on `count` connections; yield a list of (key, status, body).

    A connection is closed after an answer that says so, or if not `is_kept`. Its client
    makes a new one if it shall ask `again`. What it cannot do, it raises in the end.
    """
    answers, stop = [], threading.Event()

    def ask(number):
        wanted = itertools.islice(itertools.cycle(keys), number, None)
        fields = {}
        while not stop.is_set() and (again or not fields):
            with Client(address) as client:
                for k in wanted:
                    status, fields, body = client.ask(k)
                    answers.append((k, status, body))
                    if not is_kept or "connection" in fields or stop.is_set():
                        break

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        clients = [pool.submit(ask, number) for number in range(count)]
        try:
            until(lambda: len(answers) > 100)
            yield answers
        finally:
            stop.set()
        for client in clients:
            client.result(PATIENCE)


class Loop(WithExample):
    """Answers to many clients at once, and what is handed to a thread and back."""

    def test_all_of_the_example_over_one_connection(self):
        pairs = list(example_pairs().items())
        with self.server.connect() as client:
            for k, value in pairs:
                self.assertEqual(client.ask(k)[::2], (200, value))
            data = b"".join(ask_for(k) for k, _ in pairs[:500])
            for size in (1000, len(data)):  # of the pieces in which requests come
                for n in range(0, len(data), size):
                    client.send(data[n:n + size])
                for _, value in pairs[:500]:
                    self.assertEqual(client.answer()[::2], (200, value))

    def test_fifty_clients_at_once(self):
        pairs = list(example_pairs().items())[:5000]
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(self.server.connect()) for _ in range(50)]
            while pairs:
                asked = [(client, *pairs.pop()) for client in clients]
                for client, k, _ in asked:
                    client.send(ask_for(k))
                for client, _, value in random.sample(asked, len(asked)):
                    self.assertEqual(client.answer()[::2], (200, value))

    def test_answers_are_not_held_back(self):
        """By Nagle's algorithm: one that goes out while another is not acknowledged."""
        options = kv.make_parser().parse_args(["serve", EXAMPLE, "--port", "0"])
        log = kv.Log(False)
        server = kv.Server(options, kv.Data(options, log), log, kv.Signals())
        server.server_activate()
        with server.selector, server.socket, Client(server.socket.getsockname()):
            with server.get_request()[0] as accepted:
                nodelay = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                self.assertTrue(nodelay)

    @ON_LINUX
    def test_clients_that_need_no_thread(self):
        """Plain requests, 2,000 idle connections, 500 heads that trickle in."""
        raise_descriptor_limit(2700)
        with Serving(EXAMPLE) as server, contextlib.ExitStack() as stack:
            clients = [stack.enter_context(server.connect()) for _ in range(2500)]
            idle, trickling = clients[:2000], clients[2000:]
            for n in range(0, len(GET_KEY) - 1, 10):
                for client in trickling:
                    client.send(GET_KEY[n:-1][:10])
                self.assertEqual(server.threads(), 1)
                self.assertEqual(idle[n].ask(KEY)[2], VALUE)
            for client in trickling:
                client.send(GET_KEY[-1:])
                self.assertEqual(client.answer()[2], VALUE)
            for client in idle[::100]:
                self.assertEqual(client.ask(ABSENT)[0], 404)
            self.assertEqual(server.threads(), 1)

    @ON_LINUX
    def test_hand_over_and_back(self):
        """An answer that is not taken whole, and requests behind it, before and after."""
        behind = ask_for(OTHER_KEY) + ask_for(ABSENT) + ask_for(OTHER_KEY)
        with serving(LARGE) as server:
            with server.connect() as client:
                for _ in range(3):
                    client.send(ask_for(OTHER_KEY) + GET_KEY + behind + behind[:40])
                    until(lambda: server.threads() == 2)
                    self.assertEqual(client.answer()[2], OTHER_VALUE)
                    self.assertEqual(len(client.answer()[2]), SIZE)
                    client.send(behind[40:])
                    statuses = [client.answer()[0] for _ in range(6)]
                    self.assertEqual(statuses, [200, 404, 200] * 2)
                    until(lambda: server.threads() == 1)
                    self.assertEqual(client.ask(OTHER_KEY)[2], OTHER_VALUE)
                client.send(GET_KEY * 5)
                for _ in range(5):
                    self.assertEqual(len(client.answer()[2]), SIZE)
                client.send(GET_KEY + b"EHLO x\r\n")  # which cannot become a head
                self.assertEqual(len(client.answer()[2]), SIZE)
                self.assertEqual(client.answer()[0], 400)
                self.assertEqual(client.rest(), b"")
            until(lambda: server.threads() == 1)

    def test_others_are_answered_meanwhile(self):
        """While a head trickles in, an answer is not taken, 100 connections linger."""
        with serving(LARGE) as server, contextlib.ExitStack() as stack:
            trickling, stuck, other, *bad = (
                stack.enter_context(server.connect()) for _ in range(103))
            trickling.send(GET_KEY[:20])
            stuck.send(GET_KEY)
            stuck.receive()
            for client in bad:
                client.send(b"bad\r\n\r\n")
                self.assertEqual(client.answer()[0], 400)
            for _ in range(50):
                self.assertEqual(soon(other), OTHER_VALUE)
            trickling.send(GET_KEY[20:])
            self.assertEqual(len(trickling.answer()[2]), SIZE)
            self.assertEqual(len(stuck.answer()[2]), SIZE)
            self.assertEqual(soon(other), OTHER_VALUE)

    def test_the_answer_arrives_although_the_client_still_sends(self):
        for status, request in (
                (405, head("POST", "/", "Content-Length: 50000000")), (501, b"x" * 20000),
                (400, ask_for(KEY, "bad")), (414, b"GET /" + b"x" * 20000)):
            with self.subTest(status), self.server.connect() as client:
                client.send(request)
                client.send(b"x" * 200000)  # in flight while the answer comes
                answered, fields, _ = client.answer()
                self.assertEqual((answered, fields["connection"]), (status, "close"))
                self.assertEqual(client.rest(), b"")  # the end, and no reset

    def test_a_large_last_answer_arrives_whatever_is_sent_behind_its_request(self):
        with serving(LARGE) as server:
            for behind in (b"\r\n", GET_KEY * 200):
                with self.subTest(behind[:9]), server.connect() as client:
                    client.send(ask_for(KEY, "Connection: close"))
                    client.receive()  # it is on its way
                    client.send(behind)
                    self.assertEqual(len(client.answer()[2]), SIZE)
                    self.assertEqual(client.rest(), b"")

    def test_clients_that_vanish(self):
        """Before they ask, while they ask, while they are answered."""
        with serving(LARGE) as server:
            for request in b"", b"GET", ask_for(ABSENT), ask_for(KEY, "bad"), GET_KEY:
                for _ in range(20):
                    client = server.connect()
                    client.send(request)
                    if request == GET_KEY:
                        client.receive()
                    client.reset_on_close()
            with server.connect() as client:
                self.assertEqual(soon(client), OTHER_VALUE)
            self.assertEqual(len(server.lines()), 1, server.log)

    def test_a_fault_is_a_line_and_a_500(self):
        with Serving(EXAMPLE, limits={"judge_path": None}) as server:  # no function
            with server.connect() as client:
                for number in (1, 2):
                    status, _, body = client.ask(ABSENT)
                    self.assertEqual((status, body), (500, kv.INTERNAL_ERROR))
                    self.assertEqual(client.ask(KEY)[2], VALUE)
                    until(lambda: len(server.lines()) > number)
                    self.assertRegex(server.lines()[number],
                                     r"^kv: fault in answering 127\.0\.0\.1: TypeError\(")

    @ON_LINUX
    @ON_CPYTHON
    def test_too_few_threads(self):
        """A client that would need one is closed, all others go on."""
        with serving(LARGE) as server, server.connect() as other:
            self.assertEqual(soon(other), OTHER_VALUE)
            limit_memory(server.pid, 1000)  # kB: too little for the stack of a thread
            for number in range(1, 6):
                with server.connect(receive_buffer=4096) as client:
                    client.send(GET_KEY)
                    until(lambda: len(server.lines()) > number)
                    self.assertRegex(server.lines()[number],
                                     r"^kv: cannot start a thread for 127\.0\.0\.1: ")
                    self.assertLess(len(client.rest()), SIZE)
                self.assertEqual(soon(other), OTHER_VALUE)
            limit_memory(server.pid, None)
            self.assertEqual(len(other.ask(KEY)[2]), SIZE)

    def test_without_what_windows_lacks(self):
        lacking = ("import os, signal, socket, sys; sys.path.insert(0, %r)\n"
                   "for module, name in ((signal, 'SIGHUP'), (os, 'sched_getaffinity'),\n"
                   "    # nor is any name looked up\n"
                   "    (socket, 'getfqdn'), (socket, 'gethostbyaddr')):\n"
                   "    if hasattr(module, name): delattr(module, name)\n"
                   "sys.modules['resource'] = None\n"
                   "import kv; kv.CAN_GATHER = False; sys.exit(kv.main())" % HERE)
        serve = [sys.executable, "-c", lacking, "serve", EXAMPLE, "--port", "0"]
        with Serving(command_line=serve) as server, server.connect() as client:
            client.send(GET_KEY * 20)
            for _ in range(20):
                self.assertEqual(client.answer()[2], VALUE)
            self.assertEqual(server.stop(), 0)


def unsent_bytes(server, client, after=0):
    """Return how many bytes the system holds that a client here has not taken."""
    time.sleep(after)
    ports = [b":%04X" % port for port in (server.port, client.socket.getsockname()[1])]
    with open("/proc/net/tcp", "rb") as file:
        for fields in map(bytes.split, file):
            if [address[-5:] for address in fields[1:3]] == ports:
                return int(fields[4].partition(b":")[0], 16)
    return 0


class Unread(Serving):
    """A server whose log, a pipe or a terminal, is read only until it is ready."""

    def __init__(self, reading, writing, *arguments):
        self.reading = reading
        super().__init__(*arguments, pass_fds=(writing,), prefix=(
            "sh", "-c", f'exec "$@" 2>/dev/fd/{writing}', "sh"))

    def read_log(self):
        while b" s, on " not in self.log:
            self.log += os.read(self.reading, 1000).replace(b"\r", b"")


@ON_LINUX
class Limits(unittest.TestCase):
    """Slow, silent and too many clients, and too little of all."""

    IDLE = {"IDLE_SECONDS": 0.7, "HEAD_SECONDS": 9}
    WHOLE = {"IDLE_SECONDS": 9, "HEAD_SECONDS": 1}
    DEADLINES = (  # limits; what a client sends first, then on and on; the seconds until
                   # its end, and the status that it gets before that
        (IDLE, b"", b"", 0.7, None), (IDLE, b"\r\n", b"", 0.7, None),
        (IDLE, GET_KEY, b"", 0.7, 200), (WHOLE, b"GET", b"", 1, 408),
        (IDLE, GET_KEY + b"\r\n" + GET_KEY, b"", 0.7, 200), (WHOLE, b"", b"a", 1, 408),
        (WHOLE, b"GET / HTTP/1.1\r\n", b"a:b\r\n", 1, 408),
        (WHOLE, GET_KEY + b"GET", b"a", 1, 408), (WHOLE, b"\r\nG", b"", 1, 408),
        ({"LINGER_SECONDS": 0.7}, b"bad\r\n", b"x", 0.7, 400),
    )
    TAKE = {"ANSWER_SECONDS": 9, "ANSWER_BYTES_A_SECOND": 10**9, "STALL_SECONDS": 9}
    NOT_TAKEN = (  # limits, one of them 0.7 s; bytes that a client takes now and then
        (dict(TAKE, STALL_SECONDS=0.7), 0), (dict(TAKE, ANSWER_SECONDS=0.7), 0),
        (dict(TAKE, ANSWER_SECONDS=0.7), 1000),
    )
    TAKEN = (  # limits; bytes that a client takes at once; tenths of a second in which
               # it then takes 100,000 each, before it takes the rest
        ({"ANSWER_SECONDS": 0.2, "ANSWER_BYTES_A_SECOND": 500000}, 0, 5),
        ({"STALL_SECONDS": 3, "ANSWER_BYTES_A_SECOND": 100000}, 6000000, 40),
    )

    def kept(self, limits, first, on_and_on, _, status):
        """Return for how many seconds the server keeps a client."""
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
        for row, running in side_by_side(self.kept, self.DEADLINES):
            with self.subTest(row):
                self.assertGreaterEqual(running.result(), row[3])
                self.assertLess(running.result(), row[3] + 3)

    def sending(self, limits, taken):
        """Return for how many seconds the server sends what a client does not take."""
        with serving(LARGE, limits=limits) as server:
            with server.connect(receive_buffer=4096) as client:
                start = time.monotonic()
                client.send(GET_KEY)
                until(lambda: server.threads() == 2)
                until(lambda: taken and client.socket.recv(taken) and False
                      or server.threads() == 1)
                return time.monotonic() - start

    def test_answers_that_are_not_taken(self):
        for row, running in side_by_side(self.sending, self.NOT_TAKEN):
            with self.subTest(row):
                self.assertGreaterEqual(running.result(), 0.7)
                self.assertLess(running.result(), 6)

    def whole(self, limits, at_once, tenths):
        """Return the size of an answer that a client takes slowly, but steadily."""
        with serving(LARGE, limits=limits) as server, server.connect() as client:
            client.send(GET_KEY)
            client.received = client.take(at_once)
            for _ in range(tenths):
                time.sleep(0.1)
                client.received += client.socket.recv(100000)
            return len(client.answer()[2])

    def test_clients_that_take_their_answers_slowly_get_them_whole(self):
        for row, running in side_by_side(self.whole, self.TAKEN):
            with self.subTest(row):
                self.assertEqual(running.result(), SIZE)

    def test_newcomers_take_the_place_of_who_has_waited_longest(self):
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(Serving(EXAMPLE, "--max-connections", "3"))
            first, second, third = (stack.enter_context(server.connect()) for _ in "123")
            for client in (second, first, third):
                self.assertEqual(client.ask(KEY)[2], VALUE)
            fourth = stack.enter_context(server.connect())
            self.assertEqual(fourth.ask(KEY)[2], VALUE)
            self.assertEqual(second.rest(), b"")
            for client in (first, third, fourth):
                self.assertEqual(client.ask(KEY)[2], VALUE)

    def test_who_has_asked_is_not_evicted(self):
        """Even if its request and a newcomer are seen in the same round of the loop."""
        with Serving(EXAMPLE, "--max-connections", "2") as server:
            with server.connect() as first, server.connect() as second:
                self.assertEqual(first.ask(KEY)[2], VALUE)
                self.assertEqual(second.ask(KEY)[2], VALUE)
                server.send_signal(signal.SIGSTOP)
                with server.connect() as third:
                    third.send(GET_KEY)
                    first.send(GET_KEY)
                    server.send_signal(signal.SIGCONT)
                    self.assertEqual(first.answer()[2], VALUE)
                    self.assertEqual(third.answer()[2], VALUE)
                    self.assertEqual(second.rest(), b"")

    def test_connections_that_come_back_from_threads_and_are_evicted(self):
        """At the same moment, again and again."""
        content = KEY + b" " + b"x" * 400000 + b"\n"
        with serving(content, "--max-connections", "1") as server:
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

    def test_whatever_they_wait_for(self):
        """The rest of a head, a request, more of an answer to be taken, a last byte."""
        def idle(client):
            self.assertEqual(client.ask(OTHER_KEY)[2], OTHER_VALUE)

        def trickle(client):
            client.send(GET_KEY[:9])

        def stick(client):
            client.send(GET_KEY)
            until(lambda: unsent_bytes(server, client)
                  == unsent_bytes(server, client, after=0.4) > 0)

        def linger(client):
            client.send(b"bad\r\n")
            self.assertEqual(client.answer()[0], 400)

        slow = {"STALL_SECONDS": PATIENCE, "LINGER_SECONDS": PATIENCE}
        with serving(LARGE, "--max-connections", "2", limits=slow) as server:
            ways = (idle, trickle, stick)
            for longest, wait in itertools.product(ways + (linger,), ways):
                until(lambda: server.threads() == 1)
                with self.subTest(longest=longest, wait=wait), \
                        server.connect(receive_buffer=4096) as first, \
                        server.connect(receive_buffer=4096) as second:
                    idle(second)
                    longest(first)
                    idle(second)
                    wait(second)
                    with server.connect() as third:
                        idle(third)
                        with contextlib.suppress(ConnectionError):
                            self.assertLess(len(first.rest()), SIZE)
                        if wait == trickle:
                            second.send(GET_KEY[9:])
                        if wait != idle:
                            self.assertEqual(len(second.answer()[2]), SIZE)
                        idle(second)
                        idle(third)

    @ON_CPYTHON
    def test_clients_that_take_nothing_lock_nobody_out(self):
        with serving(LARGE, "--max-connections", "200") as server:
            before = proc(server.pid, "VmRSS:")
            with contextlib.ExitStack() as stack:
                for _ in range(200):
                    stack.enter_context(server.connect()).send(GET_KEY)
                until(lambda: server.threads() == 201)
                for _ in range(250):
                    newcomer = stack.enter_context(server.connect())
                    self.assertEqual(soon(newcomer), OTHER_VALUE)
                self.assertLess(proc(server.pid, "VmRSS:") - before, 12000)
                until(lambda: server.threads() == 1)
            self.assertEqual(len(server.lines()), 1, server.log)

    @ON_CPYTHON
    def test_memory_of_answers_that_are_not_taken(self):
        """A large value is not copied for each client, nor all that one asks for."""
        many = KEY + b" " + b"x" * 16000 + b"\n"
        for (content, clients, requests, most), options in itertools.product(
                ((LARGE, 50, 1, 10000), (many, 100, 130, 40000)), ((), ("--sorted",))):
            with self.subTest(most, options=options), contextlib.ExitStack() as stack:
                server = stack.enter_context(serving(content, *options))
                before = proc(server.pid, "VmRSS:")
                for _ in range(clients):
                    client = stack.enter_context(server.connect(receive_buffer=4096))
                    client.send(GET_KEY * requests)
                until(lambda: server.threads() == clients + 1)
                self.assertLess(proc(server.pid, "VmRSS:") - before, most)
                for method in ("GET", "HEAD"):
                    for _ in range(requests):
                        self.assertEqual(client.answer(method)[0], 200)
                    client.send(head("HEAD", b"/" + KEY) * requests)

    CROWDED = (  # what limits the connections, and the first line of the log
        ("", ("--max-connections", "20"), ""),
        ("ulimit -n 50; ", (), ""),
        ("ulimit -n 50; ", ("--max-connections", "1000"),
         "kv: --max-connections 1000 needs 1032 open files, but the limit is 50"
         "; raise it with ulimit -n, or LimitNOFILE under systemd"),
    )

    def crowded(self, ulimit, options, told):
        """Others connect and may begin to ask, few or many between two requests."""
        prefix = ("sh", "-c", ulimit + 'exec "$@"', "sh")
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(Serving(EXAMPLE, *options, prefix=prefix))
            self.assertEqual(server.lines()[:-1], [told] if told else [])
            client = stack.enter_context(server.connect())

            def ask():
                nonlocal client
                try:
                    body = soon(client, KEY)
                except (EOFError, ConnectionError):  # it was its turn to go
                    client = stack.enter_context(server.connect())
                    body = soon(client, KEY)
                self.assertEqual(body, VALUE)

            for newcomers in (1, 10, 60) * 4:
                for number in range(newcomers):
                    other = stack.enter_context(server.connect())
                    with contextlib.suppress(ConnectionError):
                        other.send(b"GET" * (number % 2))
                ask()
            before = proc(server.pid, "", "schedstat")
            time.sleep(1)  # in which it does not spin
            self.assertLess(proc(server.pid, "", "schedstat") - before, 3 * 10**8)  # ns
            ask()

    def test_a_crowd_leaves_room(self):
        for row, running in side_by_side(self.crowded, self.CROWDED):
            with self.subTest(row):
                running.result()

    def test_it_raises_its_limit_of_open_files(self):
        raise_descriptor_limit(600)
        prefix = ("sh", "-c", 'ulimit -Sn 60; ulimit -Hn 600; exec "$@"', "sh")
        for options, limit in (((), 600), (("--max-connections", "300"), 332)):
            with self.subTest(limit), Serving(EXAMPLE, *options, prefix=prefix) as server:
                self.assertEqual(proc(server.pid, "Max open files", "limits"), limit)
                self.assertEqual(len(server.lines()), 1, server.log)

    @unittest.skipUnless(shutil.which("strace"), "needs strace")
    def test_what_the_system_refuses(self):
        for fault, told, makes_room in (
                ("accept4:error=ECONNABORTED:when=3", "", False),  # that client has gone
                ("accept4:error=EMFILE:when=3", "", True),
                ("prlimit64:error=EPERM:when=3+",
                 "kv: cannot raise the limit of open files: ", False)):
            prefix = ("sh", "-c", 'ulimit -Sn 64; exec "$@"', "sh", "strace", "-D", "-f",
                      "-qq", "-o", os.devnull, "-e", "inject=" + fault)
            with self.subTest(fault), Serving(EXAMPLE, prefix=prefix) as server:
                self.assertTrue(server.lines()[0].startswith(told))
                with server.connect() as first, server.connect() as second:
                    self.assertEqual(second.ask(KEY)[2], VALUE)
                    with server.connect() as third:
                        self.assertEqual(third.ask(KEY)[2], VALUE)
                        if makes_room:
                            self.assertEqual(first.rest(), b"")
                        else:
                            self.assertEqual(first.ask(KEY)[2], VALUE)

    @ON_CPYTHON
    def test_memory_does_not_grow_with_requests(self):
        others = ask_for(ABSENT) + head("HEAD", b"/" + KEY, "X: y") + ask_for(b"x")
        with Serving(EXAMPLE) as server:
            sizes = []
            for _ in range(200):
                with server.connect() as client:  # 996 that keep it, one that does not
                    client.send(GET_KEY * 498 + others * 166 + b"bad\r\n\r\n")
                    client.socket.shutdown(socket.SHUT_WR)
                    self.assertEqual(client.rest().count(b"\r\nServer: "), 997)
                sizes.append(proc(server.pid, "VmRSS:"))
            self.assertLess(sizes[199] - sizes[19], 300)  # kB: under 2 bytes a request

    def test_a_log_that_nobody_reads(self):
        """A full pipe, or a stopped terminal: answers come, lines are lost."""
        for make, *options in (
                (os.pipe, "--verbose"), (os.openpty, "--verbose"), (os.pipe,)):
            reading, writing = make()
            with self.subTest(make, options=options), open(reading, "wb"), \
                    open(writing, "wb"), data_file(KEY + b" old\n") as path, \
                    Unread(reading, writing, path, *options) as server:
                if make == os.openpty:
                    os.write(reading, b"\x13")  # Ctrl-S
                else:
                    os.set_blocking(writing, False)
                    for piece in (b"x" * 4096, b"x"):
                        with contextlib.suppress(BlockingIOError):
                            while True:
                                os.write(writing, piece)
                with server.connect() as client:
                    for _ in range(2000):
                        self.assertEqual(client.ask(KEY)[2], b"old")
                    replace(path, KEY + b" new\n")
                    server.send_signal(signal.SIGHUP)
                    until(lambda: client.ask(KEY)[2] == b"new")
                self.assertEqual(server.stop(), 0)


@ON_POSIX
class ReloadAndStop(unittest.TestCase):
    """New data, and the end."""

    COUNT = 2000

    @staticmethod
    def content(word, count=COUNT):
        return b"".join(b"%b %b %b\n" % (key(n), word, key(n)) for n in range(count))

    def test_reload_under_load(self):
        keys = [key(n) for n in range(self.COUNT)]
        for options in ((), ("--sorted",)):
            with self.subTest(options), \
                    serving(self.content(b"old"), *options) as server, \
                    server.connect() as client:
                with clients_asking(("127.0.0.1", server.port), keys) as answers:
                    for turn in range(5):
                        done = len(answers)
                        count = self.COUNT + turn
                        replace(server.path, self.content(b"new%d" % turn, count))
                        server.reload()
                        self.assertRegex(
                            server.lines()[-1],
                            rf"^kv: {count} pairs of {server.path} in \d+\.\d\d s, "
                            rf"reloaded \({count - bool(turn)} before\)$")
                        for k in keys[:100]:
                            self.assertEqual(client.ask(k)[2], b"new%d %b" % (turn, k))
                        until(lambda: len(answers) > done + 100)
                for k, status, body in answers:
                    self.assertEqual(status, 200)
                    self.assertRegex(body, b"^(old|new[0-4]) %b$" % k)

    @ON_LINUX
    def test_others_are_answered_while_a_reload_runs(self):
        bodies = [b"old " + key(7), b"new " + key(7)]
        with serving(self.content(b"old", 100000)) as server, server.connect() as client:
            replace(server.path, self.content(b"new", 100000))
            server.send_signal(signal.SIGHUP)
            for asked in range(10**6):
                self.assertIn(soon(client, key(7)), bodies)
                if b"reloaded" in server.log:
                    break
            self.assertIn(b"reloaded", server.log)
            self.assertGreater(asked, 50)
            self.assertEqual(server.threads(), 1)

    NO_FILE = ": not a file that can be read again"
    BAD = (  # how the file is made, from what, and what is said of it
        (replace, b"bad", ":1: no version 4 UUID at the start of the line: b'bad'"),
        (replace, b"", ": contains no pair"),
        (replace, key(1) + b" v\n" + key(2)[:20],
         f":2: no version 4 UUID at the start of the line: {key(2)[:20]}"),
        (lambda path, _: None, None, ": No such file or directory"),
        (os.mkfifo, 0o600, NO_FILE),
        (lambda path, target: os.symlink(target, path), "/dev/zero", NO_FILE),
    )

    def test_bad_files_leave_the_data(self):
        for options in ((), ("--sorted",)):
            with serving(self.content(b"old"), *options) as server, \
                    server.connect() as client:
                for make, what, fault in self.BAD:
                    with self.subTest(fault, options=options):
                        with contextlib.suppress(FileNotFoundError):
                            os.remove(server.path)
                        make(server.path, what)
                        server.reload()
                        self.assertEqual(server.lines()[-2:], [
                            f"kv: {server.path}{fault}", "kv: the data stays as it was"])
                        for k in map(key, range(0, self.COUNT, 100)):
                            self.assertEqual(client.ask(k)[2], b"old " + k)

    def test_standard_input_cannot_be_reloaded(self):
        with open(EXAMPLE) as file, Serving("-", stdin=file) as server:
            server.reload()
            self.assertEqual(server.lines()[1], "kv: standard input" + self.NO_FILE)
            with server.connect() as client:
                self.assertEqual(client.ask(KEY)[2], VALUE)

    def test_half_a_file_is_served_and_told(self):
        with serving(self.content(b"old")) as server, server.connect() as client:
            replace(server.path, self.content(b"new")[:-1])
            server.reload()
            self.assertEqual(
                server.lines()[1],
                f"kv: {server.path}: the last line has no newline; was the file cut off?")
            self.assertRegex(server.lines()[2], r"reloaded \(2000 before\)$")
            self.assertEqual(client.ask(key(7))[2], b"new " + key(7))

    def test_a_signal_during_a_reload_causes_one_more(self):
        def again():
            server.send_signal(signal.SIGHUP)
            return client.ask(key(1))[2] == b"new " + key(1)

        with serving(self.content(b"old", 50000)) as server, server.connect() as client:
            server.send_signal(signal.SIGHUP)
            replace(server.path, self.content(b"new", 50000))
            until(again)  # a reload takes many times as long as a look does
            until(lambda: server.log.count(b"reloaded") == 2)
            self.assertEqual(server.stop(), 0)
            self.assertLessEqual(server.log.count(b"reloaded"), 3)

    def test_a_storm_of_signals(self):
        with Serving(EXAMPLE) as server, server.connect() as client:
            for _ in range(20):
                for _ in range(1000):
                    server.send_signal(signal.SIGHUP)
                self.assertEqual(client.ask(KEY)[2], VALUE)
            self.assertEqual(server.stop(), 0)

    @ON_LINUX
    @ON_CPYTHON
    def test_a_reload_without_enough_memory(self):
        value = b"x" * 500 + b" " + key(7)
        with serving(self.content(b"x" * 500, 60000)) as server:
            limit_memory(server.pid, 12000)
            answered = 0

            def failed():
                nonlocal answered
                with contextlib.suppress(EOFError, ConnectionError):
                    with server.connect() as client:
                        self.assertEqual(client.ask(key(7))[2], value)
                    answered += 1
                return server.lines()[-1] == "kv: the data stays as it was"

            for number in (1, 2, 3):
                server.send_signal(signal.SIGHUP)
                until(lambda: failed() and server.log.count(b"too large") == number)
                self.assertIn(
                    f"kv: {server.path}: too large for the memory; --sorted needs less",
                    server.lines()[-3:])
            self.assertGreater(answered, 3)
            limit_memory(server.pid, None)
            server.reload()
            self.assertRegex(server.lines()[-1], r"reloaded \(60000 before\)$")

    def test_stop_under_load(self):
        """What was read is answered whole; the last answer of a connection says so."""
        for how in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(how), Serving(EXAMPLE) as server, server.connect() as idle:
                with clients_asking(("127.0.0.1", server.port)) as answers:
                    start = time.monotonic()
                    self.assertEqual(server.stop(how), 0)
                    self.assertLess(time.monotonic() - start, 5)
                self.assertEqual(set(answers), {(KEY, 200, VALUE)})
                self.assertEqual(idle.rest(), b"")
                self.assertTrue(self.refuses(server))
                self.assertEqual(server.lines()[-1], "kv: stopped")

    def test_stop_answers_each_of_the_requests_that_came_together(self):
        def ask():
            with contextlib.suppress(EOFError, ConnectionError):
                while True:
                    counts.append(0)
                    client.send(GET_KEY * 40)
                    for _ in range(40):
                        self.assertEqual(client.answer()[::2], (200, VALUE))
                        counts[-1] += 1

        for _ in range(3):
            counts = []
            with Serving(EXAMPLE) as server, server.connect() as client:
                for _, asking in side_by_side(ask, [()]):
                    until(lambda: len(counts) > 20)
                    self.assertEqual(server.stop(), 0)
                    asking.result(PATIENCE)
            self.assertLessEqual(set(counts), {0, 40})

    @contextlib.contextmanager
    def stuck(self):
        """Yield a server that waits for a client that takes nothing, and that client."""
        with serving(LARGE, limits={"DRAIN_SECONDS": 1}) as server:
            with server.connect(receive_buffer=4096) as client:
                client.send(GET_KEY)
                client.receive()
                yield server, client

    def refuses(self, server):
        with contextlib.suppress(ConnectionError):
            server.connect().__exit__()
            return False
        return True

    def test_a_stop_waits_for_answers_but_not_for_ever(self):
        with self.stuck() as (server, client):
            server.send_signal(signal.SIGTERM)
            until(lambda: self.refuses(server))
            server.send_signal(signal.SIGTERM)  # which changes nothing
            self.assertEqual(len(client.answer()[2]), SIZE)
            self.assertEqual(server.process.wait(PATIENCE), 0)
        with self.stuck() as (server, client):
            start = time.monotonic()
            self.assertEqual(server.stop(), 0)
            self.assertLess(time.monotonic() - start, 5)

    def test_a_second_interrupt_ends_it_at_once(self):
        """Whether the stop has begun or has only been noted."""
        for has_begun in (True, False):
            with self.subTest(has_begun), self.stuck() as (server, _), \
                    server.connect() as other:
                self.assertEqual(soon(other), OTHER_VALUE)
                server.send_signal(signal.SIGINT)
                if has_begun:
                    until(lambda: self.refuses(server))
                else:
                    self.assertEqual(soon(other), OTHER_VALUE)  # the signal has come
                self.assertEqual(server.stop(signal.SIGINT), 130)

    def test_killed_and_started_again_on_the_same_port(self):
        with Serving(EXAMPLE) as server, self.assertRaises((EOFError, ConnectionError)):
            with clients_asking(("127.0.0.1", server.port)):
                server.stop(signal.SIGKILL)
        again = command("serve", EXAMPLE, "--port", str(server.port))
        with Serving(command_line=again) as server, server.connect() as client:
            self.assertEqual(client.ask(KEY)[2], VALUE)

    @contextlib.contextmanager
    def loading(self):
        """Yield a server that loads, and the path and the file of the pipe it reads."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "data")
            os.mkfifo(path)
            with open(path, "r+b", 0) as pipe, contextlib.ExitStack() as stack:
                server = Serving(path)
                stack.callback(server.__exit__)
                pipe.write(key(1) + b" first\n")
                until(lambda: not select.select([pipe], [], [], 0)[0])  # it has read that
                yield server, path, pipe

    def test_signals_end_a_load(self):
        for how in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(how), self.loading() as (server, _, _):
                self.assertEqual(server.stop(how), 0)
                self.assertEqual(server.lines(), ["kv: stopped"])

    def test_a_hangup_during_the_first_load(self):
        """It causes a reload, once the data is there."""
        with self.loading() as (server, path, pipe):
            server.send_signal(signal.SIGHUP)
            replace(path, key(1) + b" second\n")
            pipe.close()
            with server, server.connect() as client:
                until(lambda: client.ask(key(1))[2] == b"second")

    @contextlib.contextmanager
    def terminal_closed(self, *prefix):
        """Yield a server whose terminal was closed, so that the system sent it SIGHUP."""
        master, slave = os.openpty()
        with open(slave, "wb", 0), contextlib.ExitStack() as stack:
            with open(master, "wb", 0):  # a session's first terminal becomes its own
                to_open = 'exec "$@" 3<>' + os.ttyname(slave)
                server = stack.enter_context(Serving(
                    EXAMPLE, prefix=("sh", "-c", to_open, "sh") + prefix,
                    stdout=subprocess.DEVNULL, start_new_session=True))
            yield server

    @ON_LINUX
    def test_the_terminal_is_closed(self):
        """Then it ends, like any program there."""
        with self.terminal_closed() as server:
            self.assertEqual(server.process.wait(PATIENCE), 0)
            until(lambda: server.lines()[-1] == "kv: stopped")

    @ON_LINUX
    @ON_CPYTHON  # see Limitations
    def test_the_terminal_is_closed_under_nohup(self):
        """Then SIGHUP reloads."""
        with self.terminal_closed("nohup") as server, server.connect() as client:
            until(lambda: b"reloaded" in server.log)
            self.assertEqual(client.ask(KEY)[2], VALUE)
            self.assertEqual(server.stop(), 0)


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
                    got, fields, _ = client.ask(path, method="HEAD")
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
                    before = proc(server.pid, "VmRSS:")
                    clients = [stack.enter_context(server.connect(receive_buffer=4096))
                               for _ in range(19)] + [stack.enter_context(server.connect())]
                    for client in clients:
                        client.send(ask_for(path) + ask_for(key(3)))
                    until(lambda: server.threads() == 21)
                    if sys.implementation.name == "cpython":
                        self.assertLess(proc(server.pid, "VmRSS:") - before, 10000)
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

    def on_port(self, port):
        return Serving(command_line=command(
            "serve", EXAMPLE, "--reuse-port", "--port", str(port)))

    def test_two_servers_on_one_port(self):
        """Both are asked, by new connections; one that does not share it is refused."""
        with Serving(EXAMPLE, "--reuse-port") as one, data_file(KEY + b" other\n") as path:
            with Serving(command_line=command(
                    "serve", path, "--reuse-port", "--port", str(one.port))):
                seen = set()

                def ask():
                    with one.connect() as client:
                        seen.add(client.ask(KEY)[2])
                    return len(seen) == 2

                until(ask)
                self.assertEqual(seen, {VALUE, b"other"})
        with Serving(EXAMPLE, "--reuse-port") as one:
            code, out, err = run("serve", EXAMPLE, "--port", str(one.port))
            self.assertEqual((code, out), (1, b""))
            self.assertIn(b"Address already in use", err)

    def test_a_rolling_restart(self):
        with contextlib.ExitStack() as servers:
            server = servers.enter_context(Serving(EXAMPLE, "--reuse-port"))
            address = ("127.0.0.1", server.port)
            with clients_asking(address, again=True) as answers:
                for _ in range(3):
                    old, server = server, servers.enter_context(self.on_port(server.port))
                    self.assertEqual(old.stop(), 0)
                    answered = len(answers)
                    until(lambda: len(answers) > answered + 100)
            self.assertEqual(set(answers), {(KEY, 200, VALUE)})

    def test_who_waits_to_be_accepted_is_answered(self):
        with Serving(EXAMPLE) as server, contextlib.ExitStack() as stack:
            server.send_signal(signal.SIGSTOP)
            clients = [stack.enter_context(server.connect()) for _ in range(50)]
            for client in clients:
                client.send(GET_KEY)
            server.send_signal(signal.SIGTERM)
            server.send_signal(signal.SIGCONT)
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
            with clients_asking(address, again=True, is_kept=False) as answers:
                for _ in range(3):
                    self.assertEqual(server.stop(), 0)
                    server = servers.enter_context(Serving(**self.handed_down(listener)))
                    answered = len(answers)
                    until(lambda: len(answers) > answered + 100)
            self.assertEqual(set(answers), {(KEY, 200, VALUE)})

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


class Commands(WithExample):
    """What classes have in common that run commands to their ends."""

    def expect(self, rows):
        """Run rows: arguments, exit code, standard output, messages, and how to run it.

        Arguments have one space between them. How: `stdin`, redirections for `sh`, and
        variables of the environment. $KEY and others are filled in.
        """
        names = {"KEY": KEY.decode(), "OTHER": OTHER_KEY.decode(), "ABSENT": ABSENT.decode(),
                 "FILE": EXAMPLE, "URL": self.server.url, "PORT": str(self.server.port)}

        def fill(text):
            return re.sub(r"\$([A-Z]+)", lambda name: names[name.group(1)], text)

        def work(arguments, code, out, err, how={}):
            how = {name: fill(text) for name, text in dict({"KV_URL": "$URL"}, **how).items()}
            words = command(*map(fill, arguments.split(" ") if arguments else []))
            if "sh" in how:
                words = ["sh", "-c", 'exec "$@" ' + how.pop("sh"), "sh"] + words
            return finished(words, as_bytes(how.pop("stdin", "")), **how)

        for (arguments, code, out, err, *how), running in side_by_side(work, rows):
            with self.subTest(arguments=arguments, how=how):
                got = running.result()
                self.assertEqual(got[:2], (code, out), got)
                self.assertRegex(got[2].decode(), saying(fill(err)))


def like(text):
    """Return a pattern of `text`, in which * stands for anything within a line."""
    return re.escape(text).replace(r"\*", ".*")


def saying(text):
    """Return a pattern of messages, one for each line of `text`, which is as in `like`."""
    return r"\A%s\Z" % "".join("kv: %s\n" % like(line) for line in text.split("\n") if line)


class Get(Commands):
    """The client: what it prints, what it says, how it exits."""

    V, O = VALUE + b"\n", OTHER_VALUE + b"\n"
    MISSING, NONSENSE = "$ABSENT: not found\n", "nonsense: not a UUID\n"
    VERSION_1 = "3479d894-3271-1935-88cf-a06f3cbb80a5"
    CLOSED = "http://127.0.0.1:1"
    NOBODY = ("cannot ask %s: Connection refused; start a server with `python kv.py serve "
              "FILE`, or name another with --url" % CLOSED)
    ROWS = (  # arguments after `get`, exit code, values, messages, how to run it
        ("$KEY", 0, V, ""), (KEY.decode().upper(), 0, V, ""), ("{$KEY}", 0, V, ""),
        ("urn:uuid:$KEY", 0, V, ""), (KEY.decode().replace("-", ""), 0, V, ""),
        ("$OTHER $KEY $OTHER", 0, O + V + O, ""), ("$KEY --timeout 9.5", 0, V, ""),
        ("-", 0, O + V, "", {"stdin": "$OTHER\n$KEY"}), ("-", 0, b"", "", {"stdin": ""}),
        ("$KEY - $KEY", 0, V + O + V, "", {"stdin": "$OTHER"}),
        ("-", 0, O, "", {"stdin": "\n\r\n$OTHER\r\n\n"}),
        ("-", 2, V, "*: not a UUID", {"stdin": "\xff\xfe\n$KEY"}),
        ("$ABSENT", 1, b"", MISSING), ("$ABSENT $KEY $ABSENT", 1, V, MISSING * 2),
        ("nonsense $KEY", 2, V, NONSENSE), ("nonsense $ABSENT", 2, b"", NONSENSE + MISSING),
        ("$ABSENT nonsense", 2, b"", MISSING + NONSENSE), ("", 2, b"", ": not a UUID"),
        (VERSION_1, 2, b"", VERSION_1 + ": a UUID, but not of version 4"),
        ("a\x1bb\nc", 2, b"", r"a\x1bb\nc: not a UUID"),
        ("nonsense", 2, b"", NONSENSE, {"KV_URL": CLOSED}),
        ("$KEY", 2, b"", NOBODY, {"KV_URL": CLOSED}),
        ("--url %s $KEY $KEY" % CLOSED, 2, b"", NOBODY),
        ("$KEY --url http://a..b", 2, b"", "cannot ask http://a..b: *"),
        ("$KEY --url http://no.host.invalid", 2, b"", "cannot ask http://no.host.invalid: *"),
        ("$KEY", 2, b"", "--url: 127.0.0.1:80: add http://*", {"KV_URL": "127.0.0.1:80"}),
        ("$KEY --url $URL/", 0, V, "", {"KV_URL": CLOSED}),
        ("$KEY", 0, V, "", {"http_proxy": CLOSED}),
        ("$KEY --url http://LOCALHOST:$PORT", 0, V, "", {"http_proxy": CLOSED}),
        ("$KEY --url http://kv.example", 0, V, "", {"http_proxy": "$URL"}),
        ("$KEY --url http://kv.example", 2, b"", "cannot ask http://kv.example: *",
         {"http_proxy": "$URL", "no_proxy": "kv.example"}),
        ("$KEY --url http://kv.example", 2, b"",
         "cannot ask http://kv.example through the proxy 127.0.0.1:1: Connection refused",
         {"http_proxy": "http://me:secret@127.0.0.1:1"}),
        ("$KEY --url https://127.0.0.1:$PORT", 2, b"",
         "cannot ask https://127.0.0.1:$PORT: the server does not speak TLS; use http://"),
        ("$KEY --url $URL/below", 2, b"",
         "$URL/below answered 400 Bad Request: not a version 4 UUID"))
    STREAMS = (  # the same, but with `get`
        ("get $KEY", 2, b"", "standard output is closed", {"sh": ">&-"}),
        ("get $KEY", 2, b"", "standard output: No space left on device", {"sh": ">/dev/full"}),
        ("get $KEY", 0, V, "", {"sh": "2>&-"}), ("get $ABSENT", 1, b"", "", {"sh": "2>/dev/full"}),
        ("get -", 2, b"", "standard input is closed", {"sh": "<&-"}),
        ("serve - --port 0", 1, b"", "standard input: closed", {"sh": "<&-"}))

    OK = b"HTTP/1.1 200 OK\r\n"
    TWO = OK + b"Content-Length: 2\r\n"
    LENGTH = "cannot ask URL: missing, repeated or malformed Content-Length"
    CODING = "cannot ask URL: unexpected Content-Encoding or Transfer-Encoding"
    STRANGE = (  # what something else answers, and what is said of it
        (b"", "cannot ask URL: the connection was closed without an answer"),
        (b"SSH-2.0-x\r\n", "cannot ask URL: not an HTTP server: SSH-2.0-x"),
        (b"HTTP/1.1 500 Broken\r\n\r\n", "URL answered 500 Broken: "),
        (b"HTTP/1.1 500 B\x1bd\r\n\r\nit \x1b[2J broke\nmore",
         r"URL answered 500 B\x1bd: it \x1b[2J broke"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n<html>", "URL answered 404 Not Found: <html>"),
        (b"HTTP/1.1 404 Not Found\r\nServer: kv/2.0\r\nContent-Length: 3\r\n\r\nno\n",
         "URL answered 404 Not Found: no"),
        (b"HTTP/1.1 404 No\r\n\r\n" + b"x" * 9000, "URL answered 404 No: %s..." % ("x" * 192)),
        (b"HTTP/1.1 301 Moved\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
         "URL answered 301 Moved: "),
        (b"HTTP/1.1 302 Found\r\nLocation: ftp://kv/\r\nContent-Length: 0\r\n\r\n",
         "URL answered 302 Found: "),
        (b"HTTP/1.1 204 None\r\n\r\n", "cannot ask URL: unexpected status 204 None"),
        (b"HTTP/1.1 206 Part\r\nContent-Length: 2\r\n\r\nab",
         "cannot ask URL: unexpected status 206 Part"),
        (TWO + b"Content-Type: text/html\r\n\r\nab",
         "cannot ask URL: unexpected Content-Type; is this another kind of server?"),
        (OK + b"\r\nendless", LENGTH), (TWO + b"Content-Length: 2\r\n\r\nab", LENGTH),
        (TWO + b"Content-Length: 3\r\n\r\nabc", LENGTH),
        (OK + b"Content-Length: 2, 2\r\n\r\nab", LENGTH),
        (OK + b"Content-Length: -2\r\n\r\nab", LENGTH),
        (OK + b"Content-Length: 9\r\n\r\nshort", "cannot ask URL: the answer ended 4 bytes early"),
        (OK + b"Content-Length: 10000000000000\r\n\r\n" + b"x" * 100000,
         "URL answered with 10000000000000 bytes, which is too much"),
        (TWO + b"Content-Encoding: gzip\r\n\r\nab", CODING),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n", CODING),
        (OK + b"X: y\r\n" * 200 + b"\r\n", "cannot ask URL: *"),
        (OK + b"X: " + b"y" * 70000 + b"\r\n\r\n", "cannot ask URL: *"))

    def test_output_messages_and_exit_codes(self):
        self.expect(("get " + arguments, *row) for arguments, *row in self.ROWS)

    @ON_LINUX
    def test_streams_that_are_closed_or_full(self):
        self.expect(self.STREAMS)

    def test_answers_that_are_not_from_kv(self):
        def answer_all():
            for _ in self.STRANGE:
                with listener.accept()[0] as client, contextlib.suppress(OSError):
                    client.settimeout(PATIENCE)
                    number = client.recv(1000).split(b"/")[1]
                    client.sendall(self.STRANGE[int(number)][0])

        with socket.socket() as listener, concurrent.futures.ThreadPoolExecutor(1) as pool:
            listener.bind(("127.0.0.1", 0))
            listener.listen(10)
            listener.settimeout(PATIENCE)
            answering = pool.submit(answer_all)
            place = "http://127.0.0.1:%d/" % listener.getsockname()[1]
            asked = side_by_side(lambda number: run("get", KEY, "--url", place + str(number)),
                                 ((number,) for number in range(len(self.STRANGE))))
            for (number,), running in asked:
                with self.subTest(self.STRANGE[number]):
                    code, out, err = running.result()
                    self.assertEqual((code, out), (2, b""))
                    err = err.decode().replace(place + str(number), "URL")
                    self.assertRegex(err, saying(self.STRANGE[number][1]))
            answering.result(PATIENCE)

    def test_a_server_that_does_not_answer(self):
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen(1)
            url = "http://127.0.0.1:%d" % silent.getsockname()[1]
            self.expect([("get $KEY --timeout 0.2 --url " + url, 2, b"",
                          "cannot ask %s: no answer within 0.2 s" % url)])

    @contextlib.contextmanager
    def asking(self):
        """Yield a `get -` that has printed the value of its first key."""
        with subprocess.Popen(
                command("get", "-", "--url", self.server.url), env=environment(), bufsize=0,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                process.stdin.write(KEY + b"\n")
                self.assertTrue(select.select([process.stdout], [], [], PATIENCE)[0])
                self.assertEqual(process.stdout.read(1000), self.V)
                yield process
            finally:
                process.kill()

    @ON_POSIX
    def test_a_reader_that_has_enough(self):
        """Like `kv.py get ... | head -1`: the pipe is closed before the second value comes."""
        with self.asking() as process:
            process.stdout.close()
            process.stdin.write((KEY + b"\n") * 3)
            process.stdin.close()
            self.assertEqual((process.wait(PATIENCE), process.stderr.read()), (0, b""))

    @ON_POSIX
    def test_interrupted_get(self):
        with self.asking() as process:
            process.send_signal(signal.SIGINT)
            self.assertEqual((process.wait(PATIENCE), process.stderr.read()), (130, b""))

    def test_as_a_module(self):
        k, url = KEY.decode(), self.server.url
        self.assertEqual(kv.get(k.upper(), url), VALUE)
        self.assertEqual(kv.get(uuid.UUID(k), url), VALUE)
        for error, *arguments in (
                (KeyError, ABSENT.decode(), url), (ValueError, "nonsense", url),
                (ValueError, self.VERSION_1, url), (OSError, k, self.CLOSED),
                (ValueError, k, "127.0.0.1"), (ValueError, k, url, 0)):
            with self.subTest(arguments), self.assertRaises(error):
                kv.get(*arguments)


def has_ipv6():
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True


class CommandLine(Commands):
    """Options, messages and exit codes of the command."""

    WRONG = (  # arguments, and what is said of them before "(see kv.py COMMAND --help)"
        ("", "the following arguments are required: serve | get"),
        ("fetch", "fetch: neither serve nor get"),
        ("$FILE", "did you mean `kv.py serve $FILE`?"),
        ("$KEY", "did you mean `kv.py get $KEY`?"),
        ("--verbose serve $FILE", "unrecognized arguments: --verbose"),
        ("serve", "the following arguments are required: FILE"),
        ("serve $FILE b", "unrecognized arguments: b"),
        ("serve $FILE --prot 1", "unrecognized arguments: --prot 1"),
        ("serve $FILE --port 99999", "--port: 99999 is not between 0 and 65535"),
        ("serve $FILE --port -1", "--port: -1 is not between 0 and 65535"),
        ("serve $FILE --port http", "--port: http is not between 0 and 65535"),
        ("serve $FILE --max-connections 0",
         "--max-connections: 0 is not between 1 and 1000000"),
        ("serve - --sorted", "--sorted is for files, not for standard input or a pipe"),
        ("serve - --sorted --no-check", "--sorted is for files, *"),
        ("serve $FILE --no-check", "--no-check requires --sorted"),
        ("get", "the following arguments are required: KEY"),
        ("get $KEY --url localhost:80", "--url: localhost:80: add http:// before it"),
        ("get $KEY --url 127.0.0.1:8000", "--url: 127.0.0.1:8000: add http:// before it"),
        ("get $KEY --url ftp://kv", "--url: ftp://kv: the scheme must be http or https"),
        ("get $KEY --url file:///etc/passwd", "--url: *: the scheme must be http or https"),
        ("get $KEY --url http://kv#x", "--url: *: a query or a fragment is not allowed"),
        ("get $KEY --url http://kv?x", "--url: *: a query or a fragment is not allowed"),
        ("get $KEY --url http://me@kv",
         "--url: http://me@kv: user names and passwords are not supported"),
        ("get $KEY --url http://", "--url: http://: the host is missing"),
        ("get $KEY --url http://h:73536", "--url: *: the port must be a number from 1 to 65535"),
        ("get $KEY --url http://h:port", "--url: http://h:port: the port must be a number *"),
        ("get $KEY --url http://h:00", "--url: http://h:00: the port must be a number *"),
        ("get $KEY --url http://[::1", "--url: *"),
        ("get $KEY --timeout 0", "--timeout: 0 is not above 0 and at most 1000000 seconds"),
        ("get $KEY --timeout -1", "--timeout: -1 is not above 0 *"),
        ("get $KEY --timeout nan", "--timeout: nan is not above 0 *"),
        ("get $KEY --timeout 1e10", "--timeout: 1e+10 is not above 0 *"),
        ("get $KEY --timeout x", "--timeout: *'x'"))
    CANNOT_LISTEN = (  # where, and why it is said to be impossible
        ("no.host.invalid:8000", "*"), ("a..b:8000", "not a valid host name"),
        ("203.0.113.1:8000", "Can* assign requested address"), ("[2001:db8::1]:8000", "*"),
        ("127.0.0.1:$PORT", "Address already in use (--port takes another)"))
    HELP = (  # arguments, what is among the output
        ("--help", "serve", "get", "--version"), ("--version", "kv " + kv.__version__),
        ("serve --help", "127.0.0.1", "8000", "--verbose", "10000", "--sorted"),
        ("get --help", "http://127.0.0.1:8000", "KV_URL", "10 s"))
    HOSTS = (  # --host, the same in the URL, hosts that clients name
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"), ("localhost", "localhost", "localhost"),
        ("0.0.0.0", "0.0.0.0", "127.0.0.1"), ("::1", "[::1]", "[::1]"),
        ("[::1]", "[::1]", "[::1]"), ("::", "[::]", "[::1]", "127.0.0.1"))
    REQUESTS = (  # method, path, the end of the line in the log, where * stands for anything
        ("GET", KEY, 'GET /%s HTTP/1.1" 200 15' % KEY.decode()),
        ("HEAD", KEY, 'HEAD /%s HTTP/1.1" 200 0' % KEY.decode()),
        ("GET", b"\x1b[2J\"\\\x7f\xe9", r'GET /\x1b[2J\"\\\x7f\xe9 HTTP/1.1" 400 *'),
        ("GET", b"x" * 7900, 'GET /xxx*x" 400 21'))
    PROGRESS = (  # TERM, PROGRESS_SECONDS, FILE, its name, what is shown before it is served
        ("xterm", 0, "-", "standard input", rb"(\r\x1b\[K\? % read, \d+ pairs, \d+ a second)+"
                                            rb"\r\x1b\[K"),
        ("xterm", 0, EXAMPLE, EXAMPLE, rb"(\r\x1b\[K\d+ % read, \d+ pairs, \d+ a second)+"
                                       rb"\r\x1b\[K"),
        ("xterm", 1000, "-", "standard input", b""), ("dumb", 0, "-", "standard input", b""))

    def test_wrong_usage(self):
        def page(arguments):
            return "".join(re.findall("serve |get ", arguments + " "))

        self.expect((arguments, 2, b"", "%s (see kv.py %s--help)" % (said, page(arguments)))
                    for arguments, said in self.WRONG)

    def test_what_cannot_be_listened_on(self):
        """That is found out before anything is loaded."""
        self.expect(("serve /no/such/file --host %s --port %s" % tuple(place.rsplit(":", 1)), 1,
                     b"", "cannot listen on %s: %s" % (place, why))
                    for place, why in self.CANNOT_LISTEN)

    def test_help_and_version(self):
        for (arguments, *words), running in side_by_side(
                lambda arguments, *_: run(*arguments.split()), self.HELP):
            with self.subTest(arguments):
                code, out, err = running.result()
                self.assertEqual((code, err), (0, b""))
                for word in words:
                    self.assertIn(word, out.decode())

    def test_the_log(self):
        """With times, and with --verbose in Common Log Format: long lines are cut."""
        time_, date = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[-+]\d\d:\d\d", r"\d\d/[A-Z][a-z]{2}/\d{4}"
        ready = time_ + r" kv: 10000 pairs of %s in \d+\.\d\d s, on http://127\.0\.0\.1:\d+"
        request = r'127\.0\.0\.1 - - \[%s:\d\d:\d\d:\d\d [-+]\d{4}\] "' % date
        for options, requests in (((), ()), (("--verbose",), self.REQUESTS)):
            with Serving(EXAMPLE, *options) as server:
                for method, path, _ in self.REQUESTS:
                    with server.connect() as client:
                        client.ask(path, method=method)
                self.assertEqual(server.stop(), 0)
            lines = server.log.decode("ascii").splitlines()
            patterns = [ready % re.escape(EXAMPLE), *(request + like(end) for *_, end in requests),
                        time_ + " kv: stopped"]
            self.assertEqual(len(lines), len(patterns))
            for line, pattern in zip(lines, patterns):
                self.assertRegex(line, r"\A%s\Z" % pattern)
        self.assertLess(max(map(len, lines)), kv.LOG_LINE_BYTES)  # no pipe tears these

    @ON_POSIX
    def test_progress_on_a_terminal(self):
        def shows(text):
            nonlocal shown
            if select.select([terminal], [], [], 0)[0]:
                shown += os.read(terminal, 1 << 16)
            return text in shown

        for term, seconds, path, name, progress in self.PROGRESS:
            shown, (terminal, stderr) = b"", os.openpty()
            with self.subTest(term=term, seconds=seconds, path=path), contextlib.ExitStack() as stack:
                stack.callback(os.close, terminal)
                stack.callback(os.close, stderr)
                server = Serving(
                    path, limits={"PROGRESS_SECONDS": seconds}, env=environment(TERM=term),
                    prefix=("sh", "-c", 'exec "$@" 2>' + os.ttyname(stderr), "sh"),
                    stdin=subprocess.PIPE)
                stack.callback(server.__exit__)
                with server.process.stdin as stdin:
                    stdin.write(b"".join(key(n) + b" v\n" for n in range(1000)))
                until(lambda: shows(b" on http://"))
                self.assertEqual(server.stop(), 0)
                until(lambda: shows(b"stopped\r\n"))
                self.assertRegex(shown, rb"\A%b\Z" % (
                    progress + rb"kv: \d+ pairs of %b in \d+\.\d\d s, on http://127.0.0.1:\d+\r\n"
                    rb"kv: stopped\r\n" % re.escape(name).encode()))

    def test_hosts(self):
        def serves(host, shown, *names):
            with Serving(EXAMPLE, "--host", host) as server:
                self.assertEqual(server.url, "http://%s:%d" % (shown, server.port))
                for name in names:
                    url = "http://%s:%d" % (name, server.port)
                    self.assertEqual(run("get", KEY, "--url", url), (0, VALUE + b"\n", b""))

        rows = self.HOSTS if has_ipv6() else self.HOSTS[:3]
        for (host, *_), running in side_by_side(serves, rows):
            with self.subTest(host):
                running.result()

    @ON_LINUX
    @unittest.skipUnless(shutil.which("strace"), "needs strace")
    @unittest.skipUnless(has_ipv6(), "needs IPv6")
    def test_where_ipv6_cannot_be_without_ipv4(self):
        """As on OpenBSD: only `::` needs that option of the socket, and fails without it."""
        failing = "inject=setsockopt:error=ENOPROTOOPT:when=1"
        strace = ["strace", "-qq", "-o", os.devnull, "-e", failing]
        code, _, err = finished(strace + command("serve", EXAMPLE, "--host", "::", "--port", "0"))
        self.assertEqual(code, 1)
        self.assertRegex(err.decode(), saying("cannot listen on [::]:0: Protocol not available"))
        with tempfile.NamedTemporaryFile() as trace:
            strace = ("strace", "-D", "-qq", "-o", trace.name, "-e", "trace=setsockopt")
            with Serving(EXAMPLE, "--host", "::1", prefix=strace) as server:
                server.stop()
            traced = trace.read()
        self.assertIn(b"TCP_NODELAY", traced)
        self.assertNotIn(b"V6ONLY", traced)

    def test_older_pythons_are_told(self):
        pyenv = os.path.join(os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv")), "versions")
        paths = [os.path.join(pyenv, version, "bin", "python")
                 for version in (os.listdir(pyenv) if os.path.isdir(pyenv) else ())
                 if version.startswith("3.6.")]
        path = paths[0] if paths else shutil.which("python3.6")
        if not path or "shims" in path:
            self.skipTest("no Python 3.6 here")
        code, out, err = finished([path, os.path.join(HERE, "kv.py"), "--version"])
        self.assertEqual((code, out), (1, b""))
        self.assertRegex(err.decode(), saying("needs Python 3.7 or newer, but this is 3.6"))


README = ""
with contextlib.suppress(OSError), open(os.path.join(HERE, "README.md"), "rb") as file_:
    README = file_.read().decode()
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/local/sbin:/usr/sbin:/sbin")


@ON_POSIX
@unittest.skipUnless(README, "needs README.md")
class Readme(unittest.TestCase):
    """What README.md shows, word for word, in a folder with only kv.py and example.data."""

    SERVE = "python kv.py serve example.data"
    BLOCKS = re.findall(r"(?m)^    \$ .*\n(?:(?:    .*)?\n)*", README)
    EXAMPLES = [(line, output) for block in BLOCKS  # commands, and what they print
                for line, output in re.findall(r"(?m)^    \$ (.*)\n((?:(?:    (?!\$ ).*)?\n)*)", block)]
    DIFFERS = (  # what is not the same each time: a pattern, and what is put in its place
        (r"\r\n", "\n"), (r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", "DATE"),
        (r"(?m)^\d{4}-\d\d-\d\dT\S+ kv: ", "kv: "), (r" in \d+\.\d\d s\b", " in SECONDS"))

    def test_its_length_its_width_and_its_top(self):
        lines = README.splitlines()
        self.assertLessEqual(len(lines), 330)
        self.assertLessEqual(max(map(len, lines)), 100)
        for text in (self.SERVE, "python kv.py get "):
            self.assertIn(text, "\n".join(lines[:20]))

    @unittest.skipUnless(shutil.which("systemd-analyze"), "needs systemd")
    def test_its_units(self):
        with tempfile.TemporaryDirectory() as folder:
            paths = [os.path.join(folder, name) for name in ("kv.socket", "kv.service")]
            for path in paths:
                name = re.escape(os.path.basename(path))
                block = re.search(r"(?m)^    # %s\n((?:    .*\n)+)" % name, README).group(1)
                with open(path, "w") as file:
                    file.write(re.sub(r"(?m)^    ", "", block))
            done = finished(["systemd-analyze", "verify"] + paths)
            self.assertEqual(done, (0, b"", b""))

    def same(self, output, shown):
        """Compare what a command has written (bytes) with what README.md shows (str)."""
        both = [output.decode(), re.sub("(?m)^    ", "", shown)]
        for pattern, put in self.DIFFERS:
            both = [re.sub(pattern, put, text).strip("\n") for text in both]
        self.assertEqual(*both)

    @contextlib.contextmanager
    def folder(self):
        """Yield a folder for the examples, and the environment that they run in."""
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as programs:
            for name in ("kv.py", "example.data"):
                shutil.copy(os.path.join(HERE, name), folder)
            for name, content in (("python", '#!/bin/sh\nexec "%s" "$@"\n' % sys.executable),
                                  (".curlrc", "silent\n")):  # as it is when on a terminal
                with open(os.path.join(programs, name), "w") as file:
                    file.write(content)
                os.chmod(file.name, 0o700)
            path = programs + os.pathsep + os.environ["PATH"]
            yield folder, {"PATH": path, "CURL_HOME": programs}

    def test_examples(self):
        self.assertIn("python kv.py get", [line[:16] for line, _ in self.EXAMPLES])
        with self.folder() as (folder, env), contextlib.ExitStack() as server:
            for line, shown in [(self.SERVE + " &", "")] + self.EXAMPLES:
                with self.subTest(line):
                    if "curl " in line and not shutil.which("curl"):
                        self.skipTest("needs curl")
                    if " serve " not in line or not line.endswith("&") and " on http" not in shown:
                        script = 'cd "$0" && eval "$1" 2>&1'
                        self.same(finished(["sh", "-c", script, folder, line], **env)[1], shown)
                        continue
                    server.close()  # the one before
                    port = int((re.findall(r"--port (\d+)", line) or [8000])[0])
                    with contextlib.suppress(OSError), Client(("127.0.0.1", port)):
                        self.skipTest("port %d is taken" % port)
                    words = ["sh", "-c", "exec " + line.rstrip(" &")]
                    started = server.enter_context(
                        Serving(command_line=words, cwd=folder, env=environment(**env)))
                    self.same(started.log, shown or started.log.decode())


@ON_POSIX
@unittest.skipUnless(README and NGINX, "needs README.md and nginx")
class PastOneMachine(unittest.TestCase):
    """README.md's configurations of nginx, with other ports, in front of real servers."""

    ODD = [(b"%x" % (n % 16) + key(n)[1:], value) for n, value in enumerate(Lines.VALUES)]
    ODD_PATHS = (b"F" + ABSENT[1:], ABSENT, KEY[1:], b"%33" + KEY[1:], KEY + b"?", b"/" + KEY,
                 b"nonsense")
    KEYS = [key(number) for number in range(100, 1100)]

    def setUp(self):
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        self.folder = self.stack.enter_context(tempfile.TemporaryDirectory())

    def held_port(self):
        """Return a port that the system gives to nobody else, but to those who ask for it."""
        holder = self.stack.enter_context(socket.socket())
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        return holder.getsockname()[1]

    def start(self, name, port):
        """Start a server of a file in the folder."""
        words = command("serve", os.path.join(self.folder, name), "--port", str(port))
        return self.stack.enter_context(Serving(command_line=words))

    def start_proxy(self, name, servers):
        """Run what README.md has the file `name` for; return where it answers."""
        how, content = re.search(
            r"(?m)^    # %s, run by: nginx (.*)\n((?:    .*\n)+)" % name, README).groups()
        address = ("127.0.0.1", self.held_port())
        places = {"8080": "%s:%d" % address}
        places.update((str(n), str(server.port)) for n, server in enumerate(servers, 8001))
        with open(os.path.join(self.folder, name), "w") as file:
            file.write(re.sub(r"\b80\d\d\b", lambda port: places.pop(port.group()), content))
        self.assertEqual(places, {})  # it has each of them once
        nginx = Serving(command_line=[NGINX] + how.split(), cwd=self.folder)
        self.stack.callback(nginx.__exit__)
        self.stack.callback(nginx.stop)

        def listens():
            self.assertIsNone(nginx.process.poll(), nginx.log)
            with contextlib.suppress(OSError), Client(address):
                return True

        until(listens)
        return address

    def expect_answers_as_of(self, server, address):
        """Whatever is asked at `address` is answered as by `server`."""
        with Client(address) as client, server.connect() as direct:
            for k, value in self.ODD:
                self.assertEqual(client.ask(k)[::2], (200, value))
                self.assertEqual(client.ask(k.upper())[::2], (200, value))
            paths = [k for k, _ in self.ODD] + list(self.ODD_PATHS)
            for method, path in itertools.product(("GET", "HEAD", "POST"), paths):
                with self.subTest(method=method, path=path):
                    answers = [connection.ask(path, "Accept-Encoding: gzip", method=method)
                               for connection in (client, direct)]
                    for _, fields, _ in answers:
                        fields.pop("connection", None)
                        fields.update(date="", server="")
                    self.assertEqual(*answers)

    def ask(self, address, keys):
        """Ask on one connection for as long as it is kept; yield key, status and body."""
        client = None
        with contextlib.ExitStack() as stack:
            for k in keys:
                client = client or stack.enter_context(Client(address))
                status, fields, body = client.ask(k)
                if fields.get("connection") == "close":
                    client = stack.close()
                yield k, status, body

    def test_shards(self):
        with open(EXAMPLE, "rb") as file:
            lines = file.read().split(b"\n")[:-1]
        odd = [k.upper() + b" " + value for k, value in self.ODD]
        replace(os.path.join(self.folder, "example.data"), b"\n\n".join(lines + odd) + b"\n")
        script = 'cd "$0"\n' + "".join(re.findall(r"(?m)^    (.* grep .*\n)", README))
        self.assertEqual(finished(["sh", "-e", "-c", script, self.folder]), (0, b"", b""))
        servers = [self.start("%d.data" % n, 0) for n in range(4)]
        address = self.start_proxy("shards.conf", servers)
        self.expect_answers_as_of(self.start("example.data", 0), address)
        with Client(address) as client:
            self.assertRegex(client.ask(b"")[2], br"\A\d{4} pairs of 0\.data, ")

        def ask(*part):
            return list(self.ask(address, [line[:36] for line in part]))

        for part, running in side_by_side(ask, [lines[n::4] for n in range(4)]):
            self.assertEqual(running.result(), [(line[:36], 200, line[37:]) for line in part])

    def write(self, name, word):
        """Write a file in which the value of each of KEYS is `word` and the key."""
        pairs = [(k, word + b" " + k) for k in self.KEYS] + self.ODD
        replace(os.path.join(self.folder, name), b"".join(b"%b %b\n" % pair for pair in pairs))

    def test_replicas(self):
        """Restart one after the other, then reload both, while clients ask on."""
        seen, stop = set(), threading.Event()

        def ask():
            keys = itertools.takewhile(lambda _: not stop.is_set(), itertools.cycle(self.KEYS))
            for k, status, body in self.ask(address, keys):
                self.assertEqual((status, body[-37:]), (200, b" " + k), body)
                seen.add(body[:-37])

        def wait(*words):  # until answers with all of these have come from now on
            seen.clear()
            until(lambda: seen.issuperset(words) or any(client.done() for client in clients))

        names = ("0.data", "1.data")
        for name in names:
            self.write(name, b"first " + name.encode())
        servers = [self.start(name, self.held_port()) for name in names]
        address = self.start_proxy("replicas.conf", servers)
        self.expect_answers_as_of(servers[0], address)
        pool = self.stack.enter_context(concurrent.futures.ThreadPoolExecutor(4))
        self.stack.callback(stop.set)
        clients = [pool.submit(ask) for _ in range(4)]
        wait(b"first 0.data", b"first 1.data")
        for name, server, other in zip(names, servers, (b"first 1.data", b"again 0.data")):
            self.write(name, b"again " + name.encode())
            self.assertEqual(server.stop(), 0)
            wait(other)
            servers[names.index(name)] = self.start(name, server.port)
            wait(b"again " + name.encode())
        for name, server in zip(names, servers):
            self.write(name, b"reloaded " + name.encode())
            server.reload()
        wait(b"reloaded 0.data", b"reloaded 1.data")
        stop.set()
        for client in clients:
            client.result(PATIENCE)


# The benchmark

APART = {"env": environment(PYTHONPATH=HERE), "start_new_session": True}  # from Ctrl-C
ROUNDS, SECONDS = 5, 1  # how many, of which the median counts; of asking in each
PLAIN_LOAD = r'''
def load(path):
    pairs = {}
    with open(path, "rb") as file:
        for line in file:
            key, _, value = line.rstrip(b"\n").partition(b" ")
            pairs[key] = value
    pairs.pop(b"", None)  # from empty lines
    return pairs
'''
PLAIN = PLAIN_LOAD + r'''
import http.server, os, sys
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
pairs = load(sys.argv[1])
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.socket.listen(1000)  # its own 5 make some of many clients wait for a second
print("plain: in 0 s, on http://127.0.0.1:%d" % server.server_port, file=sys.stderr, flush=True)
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
pairs = load(sys.argv[1])
print(time.perf_counter() - start, len(pairs))
'''
GET = command("get", "--url")
MEASURED = (  # name, what defines its load, commands: before FILE, before URL KEY
    ("kv", "from kv import load", command("serve", "--port", "0"), GET),
    ("sorted", CHECK, command("serve", "--port", "0", "--sorted"), GET),
    ("plain", PLAIN_LOAD, [sys.executable, "-c", PLAIN], [sys.executable, "-c", PLAIN_GET]))
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
        identifier = uuid.UUID(int=chance.getrandbits(128), version=4)
        value = " ".join(chance.choices(words, k=chance.randint(1, 10)))
        yield b"%s %s\n" % (str(identifier).encode(), value.encode())


def client(port, path, fields, connections, drop):
    """Ask for the lines of a file for SECONDS; print answers a second, p50, p99 in us.

    Before each request, the pages of the file `drop`, if any, are put out of memory.
    """
    with open(path, "rb") as file, open(drop or os.devnull, "rb") as dropped:
        lines = file.read().split(b"\n")[:-1]
        random.shuffle(lines)
        lines = itertools.cycle(lines)
        print("ready", flush=True)
        sys.stdin.readline()
        idle, waiting, took, start = [None] * connections, {}, [], time.perf_counter()
        while idle or waiting:
            for link in idle:
                if drop:
                    os.posix_fadvise(dropped.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                line, since = next(lines), time.perf_counter()
                link = link or socket.create_connection(("127.0.0.1", port), PATIENCE)
                link.sendall(b"GET /%b HTTP/1.1\r\nHost: kv\r\n%b\r\n" % (line[:36], fields))
                waiting[link] = line[37:], since
            idle = []
            readable = select.select(list(waiting), [], [], PATIENCE)[0]
            for link in readable or sys.exit("no answer"):
                value, since = waiting.pop(link)
                is_kept = receive(link, value)
                took.append(time.perf_counter() - since)
                idle.append(link if is_kept else link.close())
            if time.perf_counter() > start + SECONDS:
                idle = []
    print(len(took) / (time.perf_counter() - start), statistics.median(took) * 1e6,
          sorted(took)[len(took) * 99 // 100] * 1e6)


def receive(link, value):
    """Receive the answer with `value`, or fail; return whether the connection is kept."""
    answer, more, end, body = b"", True, b"", b""
    while more and not (end and len(body) >= len(value)):
        more = link.recv(1 << 16)
        answer += more
        first, end, body = answer.partition(b"\r\n\r\n")
    length = b"\r\nContent-Length: %d\r\n" % len(value)
    if first[8:13] != b" 200 " or length not in first + b"\r\n" or body != value:
        sys.exit("wrong: %r where %r was to come" % (answer, value))
    return first.startswith(b"HTTP/1.1") and b"\r\nConnection: close" not in first


def printed(words):
    """Run a command to its end; return what it printed."""
    return subprocess.run(words, stdout=subprocess.PIPE, check=True, **APART).stdout


def clients(server, sample, fields=b"", processes=1, connections=1, drop=None):
    """Run clients that start to ask together; return the sums of what they print."""
    asking = "import test_kv; test_kv.client(%d, %r, %r, %d, %r)" % (
        server.port, sample, fields, connections, drop)
    with contextlib.ExitStack() as stack:
        running = []
        for _ in range(processes):
            running.append(stack.enter_context(subprocess.Popen(
                [sys.executable, "-c", asking], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, **APART)))
            stack.callback(running[-1].kill)
        for process in running:
            process.stdout.readline()
        for process in running:
            process.stdin.write(b"\n")
            process.stdin.flush()
        columns = zip(*(process.communicate()[0].split() for process in running))
        if any(process.returncode for process in running):
            raise AssertionError("a client of %s failed" % server.name)
        return [sum(map(float, column)) for column in columns]


def resident(server):
    """Return the bytes of memory that a server holds, 0 where the system does not say."""
    return proc(server.pid, "VmRSS:") * 1024 if os.path.exists("/proc/self/status") else 0


def measure(server, count, sample, line):
    """Yield the figures of one round one by one, so that the servers take turns.

    They are pairs of a name and a number, or None for what cannot be measured.
    """
    yield "start, until it listens: ms", server.start * 1e3
    yield "memory: MB resident", server.memory / 1e6
    yield "memory: bytes a pair", (server.memory - server.empty) / count
    tell("loading: " + server.name)
    words = [sys.executable, "-c", server.definition + TIMED, server.path]
    seconds, loaded = map(float, printed(words).split())
    if loaded != count:
        raise AssertionError("%s loaded %d pairs of %d" % (server.name, loaded, count))
    yield "loading or checking: pairs a second", count / seconds
    yield "loading or checking: MB a second", os.path.getsize(server.path) / 1e6 / seconds
    tell("one request after the other: " + server.name)
    can_drop = server.name == "sorted" and hasattr(os, "posix_fadvise")
    for title, how in (
            ("one connection *", {}),
            ("the same, pages not in memory **", {"drop": server.path}),
            ("a new connection each", {"fields": b"Connection: close\r\n"})):
        is_possible = can_drop or "drop" not in how
        _, p50, p99 = clients(server, sample, **how) if is_possible else [None] * 3
        yield title + ": p50 in us", p50
        yield title + ": p99 in us", p99
    tell("many requests at once: " + server.name)
    many = clients(server, sample, processes=4, connections=4)
    yield "16 connections *: answers a second", many[0]
    tell("get: " + server.name)
    start = time.perf_counter()
    value = printed(server.get + [server.url, line[:36].decode()])
    seconds = time.perf_counter() - start
    if value != line[37:]:
        raise AssertionError("%s got %r, not %r" % (server.name, value, line[37:]))
    yield "get, as a process: ms", seconds * 1e3


def start_measured(stack, row, path, one):
    """Start a server of `path`, and before it one of `one`, a file with a single pair."""
    name, definition, serve, get = row
    tell("starting: " + name)
    with Serving(command_line=serve + [one], start_new_session=True) as server:
        empty = resident(server)  # the same program, with no data to speak of
    start = time.perf_counter()
    server = stack.enter_context(
        Serving(command_line=serve + [path], start_new_session=True))
    server.start = time.perf_counter() - start
    server.name, server.definition, server.get, server.path = name, definition, get, path
    server.empty, server.memory = empty, resident(server)
    return server


def bench(path=None):
    """Print the figures of all MEASURED with a data file, or with one that is made up."""
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
        servers = [start_measured(stack, row, ordered if row[0] == "sorted" else path, one)
                   for row in MEASURED]
        figures = {}  # by name, for each round those of all servers
        for _ in range(ROUNDS):
            for pairs in zip(*(measure(server, count, sample, some[0]) for server in servers)):
                names, values = zip(*pairs)
                figures.setdefault(names[0], []).append(values)
        tell("")
        print("%s processors, %s %s, %s; %d pairs, %.1f MB; medians of %d rounds" % (
            os.cpu_count(), platform.python_implementation(), platform.python_version(),
            platform.platform(), count, os.path.getsize(path) / 1e6, ROUNDS))
        print(" " * 44 + "".join("%11s" % row[0] for row in MEASURED) + "  kv better by")
        for name, rounds in figures.items():
            print_figure(name, [None if None in column else statistics.median(column)
                                for column in zip(*rounds)])
        print(NOTES)


def print_figure(name, values):
    """Print one figure of all MEASURED, and by how much the first is better than the last.
    """
    shown = "".join("%11s" % ("-" if v is None else f"{v:,.0f}") for v in values)
    first, *_, last = values
    better = ""
    if first and last:
        ratio = first / last if name.endswith("a second") else last / first
        better = "%12.1f x" % ratio
    print("%-44s" % name + shown + better)


if __name__ == "__main__":
    if sys.argv[1:2] == ["bench"]:
        try:
            bench(*sys.argv[2:3])
        except KeyboardInterrupt:
            sys.exit("stopped")
    else:
        unittest.main()
