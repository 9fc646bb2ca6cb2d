"""Tests of kv.py: they run it as a program and talk to it over real sockets.

    python -m unittest                  all tests, in about a minute
    python test_kv.py bench [FILE]      the benchmark, without FILE with made-up pairs

The classes stand in the order of kv.py. Most tests go through a table near the top of
their class. To add a case, add a row:

    a line that is refused, an odd value    Lines.BAD_LINES, Lines.VALUES
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
import glob
import gzip
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
import unittest.mock
import uuid

import kv

HERE = os.path.dirname(os.path.abspath(__file__))
EXAMPLE = os.path.join(HERE, "example.data")
KEY = b"3479d894-3271-4935-88cf-a06f3cbb80a5"        # in example.data, with the value
VALUE = b"this is a value"
OTHER_KEY = b"f8a24bb8-eff8-41dc-929b-10b4c3e49e05"  # also in it, with the value
OTHER_VALUE = b"1234"
ABSENT = b"00000000-0000-4000-8000-000000000000"     # not in it
SIZE = 12000000   # bytes of the value of KEY in LARGE, which no socket takes at once
LARGE = KEY + b" " + b"x" * SIZE + b"\n" + OTHER_KEY + b" " + OTHER_VALUE + b"\n"
PATIENCE = 30     # seconds until a test gives up waiting
GONE = (EOFError, ConnectionError)
ON_POSIX = unittest.skipUnless(os.name == "posix", "needs POSIX")
ON_LINUX = unittest.skipUnless(os.path.exists("/proc/self/status"), "needs /proc")
ON_CPYTHON = unittest.skipUnless(
    platform.python_implementation() == "CPython", "another Python, other memory")
NEEDS_STRACE = unittest.skipUnless(shutil.which("strace"), "needs strace")


def key(number):
    """Return the version 4 UUID (bytes) with this number at its end."""
    return b"a0000000-0000-4000-8000-%012x" % number


def head(method, target, *fields, version="1.1", host="Host: kv"):
    """Return the head of a request. All parts are str or bytes; `host` may be empty."""
    line = b" ".join(map(as_bytes, (method, target, "HTTP/" + version)))
    fields = [as_bytes(field) for field in (host,) + fields if field]
    return b"\r\n".join([line] + fields) + b"\r\n\r\n"


def as_bytes(text):
    return text.encode("latin-1") if isinstance(text, str) else text


def ask_for(path, *fields):
    """Return the head of a GET request for a path (bytes), given without its slash."""
    return head("GET", b"/" + path, *fields)


GET_KEY = ask_for(KEY)


def command(*arguments):
    """Return the command that runs kv.py with these arguments (str or bytes)."""
    return [sys.executable, os.path.join(HERE, "kv.py"), *map(os.fsdecode, arguments)]


def environment(**changed):
    """Return the environment without proxies and $KV_URL, but with what is given."""
    kept = {name: value for name, value in os.environ.items()
            if not name.lower().endswith("_proxy") and name != "KV_URL"}
    return dict(kept, **changed)


def finished(words, stdin=b"", pass_fds=(), **env):
    """Run a command to its end; return exit code, standard output and standard error."""
    done = subprocess.run(
        words, input=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        pass_fds=pass_fds, env=environment(**env), timeout=PATIENCE)
    return done.returncode, done.stdout, done.stderr


def run(*arguments, stdin=b""):
    """Run kv.py to its end; return what `finished` returns."""
    return finished(command(*arguments), stdin)


@contextlib.contextmanager
def data_file(content):
    """Yield the path of a file in a folder of its own, which is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "test.data")
        replace(path, content)
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
        time.sleep(0.005)
    raise AssertionError("waited in vain")


def proc(pid, pattern, file="status"):
    """Return the number that follows `pattern` in a file of /proc/PID."""
    with open("/proc/%d/%s" % (pid, file)) as opened:
        return int(re.search(pattern + r"\s*(\d+)", opened.read()).group(1))


class Serving:
    """`kv.py serve` of a file, or of bytes, which are then in a file at `path`.

    It can be entered when it is ready, and is killed in the end; `log` is what it has
    written to standard error. `limits` changes constants of kv.py by name.
    """

    CHANGED = ("import sys; sys.path.insert(0, %r); import kv\n"
               "vars(kv).update(%r); sys.exit(kv.main())")

    def __init__(self, data=EXAMPLE, *options, limits=None, prefix=(), words=None, **how):
        self.stack = contextlib.ExitStack()
        self.path = data
        if isinstance(data, bytes):
            self.path = self.stack.enter_context(data_file(data))
        words = words or command("serve", self.path, *options, "--port", "0")
        if limits:
            words[1:2] = ["-c", self.CHANGED % (HERE, limits)]
        how = dict({"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE,
                    "env": environment()}, **how)
        self.process = self.stack.enter_context(
            subprocess.Popen(list(prefix) + words, **how))
        self.pid = self.process.pid
        self.send_signal = self.process.send_signal
        self.log = b""
        self.reader = threading.Thread(target=self.read_log, daemon=True)
        self.reader.start()

    def read_log(self):
        for line in self.process.stderr:
            self.log += line

    def __enter__(self):
        ready = re.compile(rb" s, on (\S+)\s")
        try:
            until(lambda: ready.search(self.log) or self.process.poll() is not None)
            self.url = ready.search(self.log).group(1).decode()
            if not self.url.startswith("unix:"):
                self.port = int(self.url.rpartition(":")[2])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.stop(signal.SIGKILL)
        self.reader.join(PATIENCE)
        self.stack.close()
        assert b"Traceback" not in self.log, self.log.decode()

    def lines(self):
        """Return the lines of the log without their time."""
        return re.sub(r"(?m)^[\dT:+-]+ ", "", self.log.decode()).splitlines()

    def stop(self, how=signal.SIGTERM):
        """End the process; return its exit code. Then `log` is complete."""
        self.send_signal(how)
        self.reader.join(PATIENCE)
        return self.process.wait(PATIENCE)  # alone, this would poll for it

    def reload(self):
        """Send SIGHUP, and wait for what comes of it."""
        logged = len(self.log)
        self.send_signal(signal.SIGHUP)
        told = rb" s, reloaded .*\n|stays as it was\n"
        until(lambda: re.search(told, self.log[logged:]))

    def threads(self):
        return proc(self.pid, "Threads:")

    def memory(self):
        """Return how much it holds, in kB."""
        return proc(self.pid, "VmRSS:")

    def connect(self, receive_buffer=None):
        """Return a new client, which is closed with the server, if not before."""
        client = Client(("127.0.0.1", self.port), receive_buffer)
        self.stack.callback(client.close)
        return client

    def ask(self, *arguments, **named):
        """Ask on a connection of its own; return what Client.ask does."""
        with contextlib.closing(Client(("127.0.0.1", self.port))) as client:
            return client.ask(*arguments, **named)


class Client:
    """A client with nothing clever in it: bytes out, answers in."""

    def __init__(self, address, receive_buffer=None):
        is_tcp = isinstance(address, tuple)
        self.socket = socket.socket(socket.AF_INET if is_tcp else socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            self.socket.connect(address)
        except BaseException:
            self.socket.close()
            raise
        if is_tcp:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")
        self.send = self.socket.sendall
        self.rest = self.file.read    # all that comes until the server closes it
        self.await_more = self.file.peek

    def close(self):
        self.file.close()
        self.socket.close()

    def reset_on_close(self):
        """Close the connection as a program does that is killed: by a reset."""
        at_once = struct.pack("ii", 1, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        self.close()

    def line(self):
        line = self.file.readline()
        if not line.endswith(b"\r\n"):
            raise EOFError("no line, but %r" % line)
        return line[:-2].decode()

    def answer(self, method="GET"):
        """Return status (int), fields (dict, all in lower case) and body of an answer."""
        status = int(re.match(r"HTTP/1\.1 (\d{3}) \S", self.line()).group(1))
        lines = list(iter(self.line, ""))
        fields = dict(line.lower().split(": ", 1) for line in lines)
        assert len(fields) == len(lines), lines
        size = 0
        if method != "HEAD" and status != 204:
            size = int(fields["content-length"])
        body = self.file.read(size)
        if len(body) < size:
            raise EOFError("the answer breaks off: %r" % body[:100])
        return status, fields, body

    def ask(self, path, *fields, method="GET"):
        """Send a request for a path, given without its slash, and return the answer."""
        self.send(head(method, b"/" + path, *fields))
        return self.answer(method)


def setUpModule():
    # A script's `python -m unittest &` ignores Ctrl-C, as would the programs it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Test(unittest.TestCase):
    """What tests share. What a test enters is left at its end."""

    def enter(self, context):
        self.addCleanup(context.__exit__, None, None, None)
        return context.__enter__()

    def serve(self, *arguments, **how):
        """Return a server: Serving, entered."""
        return self.enter(Serving(*arguments, **how))

    def side_by_side(self, work, rows):
        """Call `work(*row)` for each row, several at a time."""
        rows = list(rows)
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            for row, running in zip(rows, [pool.submit(work, *row) for row in rows]):
                with self.subTest(repr(row)[:200]):
                    running.result()


class WithExample(Test):
    """All tests of a class that comes of this one share a server of example.data."""

    @classmethod
    def setUpClass(cls):
        cls.server = Serving().__enter__()

    @classmethod
    def tearDownClass(cls):
        cls.server.__exit__()


def example_pairs():
    """Return the pairs of example.data, by the plainest means."""
    with open(EXAMPLE, "rb") as file:
        return dict(line.rstrip(b"\n").split(b" ", 1) for line in file)


class Lines(Test):
    """The data file: what a line may hold, and what refuses a file."""

    K = key(1)
    VALUES = (
        b"", b" ", b" starts with a space", b"ends with spaces  ", b"\t", b"a\tb", b"\r",
        b"carriage\rreturn", b"ends with one\r", b"\0", b"n\0u\0l", b"\x0b", b"\x0c",
        b"\x1c", b"\x85", b"\xc2\x85", b"\xe2\x80\xa8", b"\xff\xfe no UTF-8 \x80", K,
        b"%s %d %%", "\u00e4\u20ac\U0001f600".encode(), b"\xef\xbb\xbf",
        bytes(set(range(256)) - {10}), b"x" * 2000, b"x" * 20000, b"x" * 70000,
        b"HTTP/1.1 200 OK\r")

    NO_KEY = "no version 4 UUID at the start of the line"
    NO_SPACE = "no space after the key"
    TWICE = "duplicate key, first on an earlier line"
    VERSION = "a UUID, but version %s, not 4"
    VARIANT = "a UUID, but not of the RFC 9562 variant"
    UNSORTED = "a key out of order; sort the file with LC_ALL=C sort"
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
         (2, NO_KEY), (3, UNSORTED), (5, NO_KEY)),
        (None, K + b" v\n" + b"\n" * 9000 + b"bad", (9002, NO_KEY)))

    NO_FILE = " No such file or directory"
    COMPRESSED = " %s data; decompress it first, as in: %s FILE | python kv.py serve -"
    REFUSED = (  # a file (bytes) or a path, and why it is refused
        (b"bad\n%b v\nbad" % K, "1: %s: b'bad'" % NO_KEY, "3: %s: b'bad'" % NO_KEY),
        (b"", " contains no pairs"), (b"\n\n\n", " contains no pairs"),
        (gzip.compress(K + b" v\n"), COMPRESSED % ("gzip", "zcat")),
        (b"BZh91AY&SY" + b"\n" * 20, COMPRESSED % ("bzip2", "bzcat")),
        (b"\xfd7zXZ\0\0\4", COMPRESSED % ("xz", "xzcat")),
        (b"\x28\xb5\x2f\xfd\x04\x58", COMPRESSED % ("zstd", "zstdcat")),
        ("/no/such/file", NO_FILE), ("", NO_FILE), ("new\nline", NO_FILE),
        (HERE, " Is a directory"), ("/dev/zero", " a device, not a file"))
    CUT_OFF = "the last line has no newline; was the file cut off?"
    WINDOWS = "all values end in \\r; does the file have Windows line endings?"
    MISTAKES = (  # a file that is served (@ is a second key), what the log says of it
        (K + b" v\n@ w", CUT_OFF), (K + b" v\r\n@ w\r", CUT_OFF, WINDOWS),
        (K + b" v\n\n",), (K + b" v\r\n@ w\r\n", WINDOWS), (K + b" v\r\n@ w\n",),
        (K + b" v\r\n\n@ w\r\n\n", WINDOWS))

    def test_every_value_arrives_as_it_is(self):
        """Whatever the case of the keys, unless they are sorted."""
        pairs = {key(n).replace(b"-8", b"-b"): v for n, v in enumerate(self.VALUES)}
        lines = [k + b" " + v for k, v in pairs.items()]
        upper = [k.upper() + b" " + v for k, v in reversed(list(pairs.items()))]
        out = b"".join(v + b"\n" for v in pairs.values())

        def arrives(content, *options):
            with Serving(content, *options) as server:
                if not options:
                    self.assertEqual(kv.load(server.path), pairs)
                self.assertEqual(run("get", "--url", server.url, *pairs), (0, out, b""))
                client = server.connect()
                for k, value in pairs.items():
                    self.assertEqual(client.ask(k)[::2], (200, value))

        self.side_by_side(arrives, (
            (b"\n\n" + b"\n\n".join(upper) + b"\n\n",),
            (b"\n".join(lines),), (b"\n".join(lines), "--sorted"),
            (b"\n\n" + b"\n\n".join(lines) + b"\n\n", "--sorted", "--no-check")))

    def names(self, content, bad, is_sorted, more=()):
        """Check that the parser names bad lines, and says `more`."""
        lines = content.split(b"\n")
        named = ["F:%d: %s: %r" % (n, fault, lines[n - 1][:50]) for n, fault in bad]
        with self.subTest(content[:200]), data_file(content) as path:
            with open(path, "rb") as file, self.assertRaises(ValueError) as caught:
                list(kv.parse(file, "F", kv.Sorted(file) if is_sorted else {}))
            self.assertEqual(str(caught.exception).split("\n"), named + list(more))

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

    @ON_POSIX
    def test_files_that_are_refused(self):
        def refused(data, *reasons):
            path = data
            if isinstance(data, bytes):
                path = self.enter(data_file(data))
            shown = path.replace("\n", "\\n") or "''"
            said = "".join("kv: %s:%s\n" % (shown, reason) for reason in reasons)
            self.assertEqual(run("serve", "--port", "0", path), (1, b"", said.encode()))

        self.side_by_side(refused, self.REFUSED)

    def test_what_is_probably_a_mistake_is_served_and_told(self):
        def told(content, *mistakes):
            content = content.replace(b"@", key(2))
            with Serving(content) as server:
                self.assertEqual(server.lines()[:-1], [
                    "kv: %s: %s" % (server.path, mistake) for mistake in mistakes])
                value = re.search(b"(?m)^" + self.K + b" (.*)$", content).group(1)
                self.assertEqual(server.ask(self.K)[2], value)

        self.side_by_side(told, self.MISTAKES)

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

        def shrink(path):
            os.truncate(path, os.path.getsize(path) - 30)

        def noticed(change, *options):
            path = self.enter(data_file(content))
            serve = command("serve", "--port", "0", path, *options)
            with subprocess.Popen(serve, stderr=subprocess.PIPE) as process:
                try:
                    until(lambda: change(path) or process.poll() is not None)
                finally:
                    process.kill()
                said = process.stderr.read().decode()
            self.assertEqual((process.returncode, said),
                             (1, "kv: %s: changed while it was being read\n" % path))

        content = b"".join(key(n) + b" v\n" for n in range(200000))
        self.side_by_side(noticed, [
            (grow,), (shrink,), (os.utime,), (os.utime, "--sorted")])

    @ON_POSIX
    def test_standard_input_and_pipes(self):
        lines = b"".join(key(n) + b" %d\n" % n for n in range(9000))
        path = self.enter(data_file(lines))
        pipe = path + ".pipe"
        os.mkfifo(pipe)
        from_pipe = Serving(pipe)
        self.addCleanup(from_pipe.__exit__)  # also if nobody opens the pipe
        finished(["sh", "-c", 'exec cat "$0" > "$1"', path, pipe])
        with open(path, "rb") as file:
            from_input = self.serve("-", stdin=file)
        for server, name in (from_input, "standard input"), (from_pipe.__enter__(), pipe):
            self.assertIn("kv: 9000 pairs of %s in " % name, server.lines()[0])
            self.assertEqual(server.ask(key(8999))[2], b"8999")
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
class SortedFiles(Test):
    """Look-ups in the file itself."""

    LINES = 100000
    CHANGES = (  # what becomes of a file in place, which is opened in this mode
        ("r+b", lambda file, content: file.write(content)),
        ("r+b", lambda file, content: file.truncate(len(content) // 3)),
        ("wb", lambda file, content: file.write(content[:-10])),
        ("rb", lambda file, content: os.utime(file.name, (1, 1))))

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
                got = found.get(k, wait=True)
                reads.append(found.reads)
                if isinstance(got, kv.StoredValue):
                    got = b"".join(got.pieces())
                self.assertEqual(got, value)
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
        pairs = {random_key(chance): b"%d" % n * (n % 9) for n in range(20000)}
        absent = [random_key(chance) for _ in range(9000)] + list(self.neighbours(pairs))
        for check, mean_limit in ((True, 1.1), (False, 2.2)):
            mean, most = self.find_all(pairs, absent, step=4, check=check)
            self.assertLess(mean, mean_limit)
            self.assertLess(most, 9)

    def test_there_are_not_too_many_marks(self):
        lines = b"".join(key(n) + b" v\n" for n in range(5000))
        with data_file(lines) as path, open(path, "rb") as file:
            for marks, mark_bytes, count in ((10, 1, 10), (5000, 20000, 9)):
                with unittest.mock.patch.multiple(kv, MARKS=marks, MARK_BYTES=mark_bytes):
                    file.seek(0)
                    pairs = kv.Sorted(file)
                    collections.deque(kv.parse(file, path, pairs), 0)
                self.assertTrue(count - 1 <= len(pairs.mark_numbers) - 2 <= count)

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
        bits, some = random.Random(9).getrandbits, range(5000)
        clusters = b"0000000%x-0000-4000-8000-0%011x", b"ffffffff-ffff-4fff-bfff-%x%011x"
        for keys in ([key(0)[:31] + b"%05x" % bits(20) for _ in some],
                     [clusters[n % 2] % (bits(4), bits(44)) for n in some],
                     [b"%08x" % (1 << n % 32) + key(n)[8:] for n in some]):
            pairs = dict.fromkeys(keys, b"a value")
            limit = 4 * math.log2(45 * len(pairs) / kv.PAGE_BYTES) + 4
            for check in (True, False):
                absent = itertools.islice(self.neighbours(pairs), 1500)
                most = self.find_all(pairs, absent, step=19, check=check)[1]
                self.assertLessEqual(most, limit)

    def test_unchecked(self):
        """Nothing is read before it listens, and what stands in order is found."""
        content = b"no pair\n%b one\n%b two\n%b again\n" % (key(1), key(2), key(2))
        server = self.serve(content, "--sorted", "--no-check")
        self.assertIn("kv: unchecked pairs of " + server.path, server.lines()[0])
        self.assertEqual(server.ask(key(1))[2], b"one")
        self.assertEqual(server.ask(key(3))[0], 404)
        self.assertIn(b"unchecked pairs of test.data", server.ask(b"")[2])

    def test_long_searches_are_left_to_a_thread(self):
        """Through blank lines, and through long values of other keys."""
        for between in (b"\n" * 100000, b" " + b"x" * 100000):
            content = key(1) + b" one" + between + b"\n" + key(3) + b" three\n"
            with data_file(content) as path, open(path, "rb") as file:
                found = kv.Sorted(file)
                self.assertRaises(BlockingIOError, found.get, key(2))
                self.assertIsNone(found.get(key(2), wait=True))
                self.assertEqual(found.get(key(3), wait=True), b"three")
        for end in (b"", b"\n", b"\n\n"):  # behind the last line, none is long
            with data_file(key(1) + b" one" + end) as path, open(path, "rb") as file:
                self.assertIsNone(kv.Sorted(file).get(key(2)))

    def large_file(self, folder=None):
        """Return a sorted file, opened, that takes some time to read from a disk."""
        file = self.enter(tempfile.NamedTemporaryFile(dir=folder))
        file.writelines(key(n) + b" %d %020d\n" % (n, 0) for n in range(self.LINES))
        file.flush()
        os.fsync(file.fileno())
        return file

    @staticmethod
    def drop_pages(file):
        """Put a file's pages out of memory, as if it was larger than that."""
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    @unittest.skipUnless(hasattr(os, "RWF_NOWAIT"), "needs preadv with RWF_NOWAIT")
    def test_pages_that_are_not_in_memory(self):
        """Threads wait for them, and the loop answers others meanwhile."""
        def ask(first):
            client = server.connect()
            for n in range(first, self.LINES, 600):
                client.send(ask_for(key(n)) + ask_for(key(n + 1)))
                for number in (n, n + 1):
                    self.assertEqual(client.answer()[2].split()[0], b"%d" % number)

        file = self.large_file()
        pairs = kv.Sorted(file)
        self.drop_pages(file)
        with contextlib.suppress(BlockingIOError):
            pairs.get(key(self.LINES // 2))
            self.skipTest("this file system does not say what is in memory")
        self.assertEqual(pairs.get(key(7), wait=True)[:2], b"7 ")
        server = self.serve(file.name, "--sorted")
        other = server.connect()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            clients = [pool.submit(ask, n) for n in range(0, 600, 75)]
            while not all(client.done() for client in clients):
                self.drop_pages(file)
                self.assertEqual(other.ask(b"")[0], 200)
        for client in clients:
            client.result()
        until(lambda: server.threads() == 1)

    def test_short_reads(self):
        """Only a part of a page is in memory; a disk fails in the middle of one."""
        pairs = kv.Sorted(self.large_file())
        self.assertTrue(pairs.get(key(7), wait=True))
        if pairs.nowait_flag:
            with unittest.mock.patch("os.preadv", lambda *_: 99):
                self.assertRaises(BlockingIOError, pairs.get, key(7))
        with unittest.mock.patch("os.pread", lambda *_: b"x" * 99):
            self.assertRaises(kv.Unreadable, pairs.get, key(7), wait=True)

    @unittest.skipUnless(hasattr(os, "RWF_NOWAIT"), "needs preadv with RWF_NOWAIT")
    def test_where_the_system_does_not_say_what_is_in_memory(self):
        for folder in filter(os.path.isdir, (tempfile.gettempdir(), "/dev/shm")):
            file = self.large_file(folder)
            flag = os.RWF_NOWAIT
            if folder != "/dev/shm":
                del os.RWF_NOWAIT
            try:
                pairs = kv.Sorted(file)
            finally:
                os.RWF_NOWAIT = flag
            self.drop_pages(file)
            for n in range(0, self.LINES, 1000):
                self.assertEqual(pairs.get(key(n)).split()[0], b"%d" % n)

    def test_a_file_that_changes_in_place(self):
        """Answers are right, or a 500, told once; after a reload, all is right again."""
        def content(value):
            return b"".join(key(n) + b" %d %b\n" % (n, value) for n in range(2000))

        def noticed(mode, change):
            with Serving(content(b"old"), "--sorted") as server:
                client = server.connect()
                for n in range(0, 2000, 9):
                    self.assertEqual(client.ask(key(n))[2], b"%d old" % n)
                with open(server.path, mode) as file:
                    change(file, content(b"new"))
                for asked in [key(n) for n in range(500)] + [b""]:
                    self.assertEqual(client.ask(asked)[0], 500)
                until(lambda: len(server.lines()) > 1)
                self.assertEqual(server.lines()[1:], [
                    "kv: %s: changed in place; send SIGHUP to reload it" % server.path])
                replace(server.path, content(b"new"))
                server.reload()
                for n in range(0, 2000, 100):
                    self.assertEqual(client.ask(key(n))[2], b"%d new" % n)
                self.assertEqual(client.ask(b"")[0], 200)

        self.side_by_side(noticed, self.CHANGES)

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

        server = self.serve(contents[0], "--sorted")
        client = server.connect()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            try:
                for n in range(600):
                    if n == 100:
                        writing = pool.submit(rewrite, server.path)
                    try:
                        status, _, body = client.ask(key(n % 60))
                        self.assertTrue(status == 500 or body in values, body[:99])
                    except GONE:  # the answer breaks off
                        client = server.connect()
                    if n % 100 == 50:
                        server.send_signal(signal.SIGHUP)
            finally:
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
        *rows(404, ask_for(ABSENT)), *rows(200, PATH + "?~", form=TARGET),
        *rows(405, "Content-Length: 0", form=POST),
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
        *rows(400, "/%zz", "/<>", PATH + "?|", K, "x" + K, "*", "kv:80", "http:" + PATH,
              "ftp://kv" + PATH, "http://" + PATH, "http://me@kv" + PATH, form=TARGET),
        # the version
        *rows(505, "HTTP/2.0", "HTTP/0.9", form=VERSION),
        *rows(505, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        *rows(400, "HTTP/1", "HTTP/11", "HTTP/1.10", "HTTP/01.1", "HTTP/1,1", "http/1.1",
              "HTTPS/1.1", "HTTP /1.1", form=VERSION),
        # line ends
        *rows(400, GET_KEY.replace(b"\r\n", b"\n"), GET_KEY.replace(b"\r\n", b"\n", 1),
              GET_KEY.replace(b"\r\n", b"\r", 1)),
        *rows(400, "Host: kv\n\r\n", "Host: kv\r\n\n", form=FIELDS[:-4]),
        *rows(400, "X: a\rb", "X: a\nb: c", "X: a\r", form=FIELD),
        # fields
        *rows(400, "X : a", "X\t: a", "X: a\r\n folded", "X: a\r\n\tfolded", "no colon",
              ": no name", "X(: a", "X/: a", "X\xe4: a", "X\0: a", "X: \0", "X: a\x01",
              "X: \x0b", "X: \x7f", "Host: kv", "X: a\r\nhost: kv2", form=FIELD),
        *rows(400, "Host : kv", " Host: kv", " X: a\r\nHost: kv", "X: a", form=FIELDS),
        *rows(400, "no colon", "Host: kv\r\nHost: kv", "Host: a b", form=HTTP_1_0),
        # Host
        *rows(400, head("GET", PATH, host=""), head("GET", PATH, host="", version="1.2")),
        *rows(400, "", " ", "a, b", "a,b", "a b", "me@kv", "kv/", "http://kv", "kv:port",
              "kv:80:80", "kv:-1", "kv:123456", "kv?", "kv#", "k\\v", "k%v", "k%2zv",
              "k<v", "k\"v", "k\xe4v", "[::1", "::1", "[]", "[1]", "[::1]x", "[::1][::1]",
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
              "Transfer-Encoding: gzip;a=b ; c = d, chunked",
              "Transfer-Encoding: gzip;a=\"b c\", chunked",
              "Expect: 100-continue\r\nContent-Length: 5", form=POST),
        *rows(204, head("OPTIONS", "/", "Content-Length: 5") + b"hello"),
        *rows(501, head("BREW", PATH, "Content-Length: 5") + b"hello"),
        *rows(400, head("BREW", "/", "Content-Length: x")),
        *rows(400, " +5", " -5", " 5, 5", " 5\r\nContent-Length: 5", " 0x5", " 5_0",
              " 5 0", " 5\r\ncontent-length: 6", " five", "", " \xb2",
              " 5\r\nTransfer-Encoding: chunked", form=POST % b"Content-Length:%b"),
        *rows(400, "chunked\r\nContent-Length: 5", "chunked, gzip",
              "chunked\r\nTransfer-Encoding: chunked", "xchunked", "\x0bchunked",
              "chunked;x", "gzip;a=\"b, chunked", "g zip, chunked",
              form=POST % b"Transfer-Encoding: %b"),
        # expectations
        *rows(417, "Expect: 200-ok", "Expect:", "Expect: 100-continue, more",
              "Expect: 100-continue\r\nExpect: more", form=FIELD),
        *rows(417, "Expect: x", form=POST),
        # lengths
        *rows(414, ask_for(b"x" * (LINE_BYTES - 13)), "\r\nGET /" + "x" * LINE_BYTES,
              "UPDATEREDIRECTREF " + "x" * LINE_BYTES,
              "GET /" + "x" * LINE_BYTES + "\r\n\r\n"),
        *rows(501, "x" * (LINE_BYTES + 1), "UPDATEREDIRECTREFS " + "x" * LINE_BYTES),
        *rows(431, "X: " + "x" * (ROOM - 4), "a:b\r\n" * 3999 + "a:b", form=FIELD),
        *rows(431, b"GET /" + KEY + b" HTTP/1.1\r\n" + b"x" * kv.HEAD_BYTES),
        *rows(400, "(" * 9000, "GET /\x80" + "x" * 9000, "GET / HTTP/1.1\n" + "x" * 9000))

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

    CHANGING = re.compile(  # what differs from answer to answer: the date, the counts
        rb"(?<=Date: )[^\r]*|(?<=Content-Length: )\d+(?=\r\n\r\n10000 pairs )"
        rb"|\d+ requests answered, \d+ connections open")

    def all_answers(self, ways):
        """Send each of `ways`, a list of pieces, on a new connection.

        Returns what is answered on each up to its end, without what is CHANGING. The
        first pieces are received by themselves.
        """
        clients = [self.server.connect() for _ in ways]
        for client, pieces in zip(clients, ways):
            client.send(pieces[0])
        self.server.ask(KEY)  # a newcomer is answered after those who came before it
        for client, pieces in zip(clients, ways):
            with contextlib.suppress(ConnectionError):  # it may be closed already
                for piece in pieces[1:]:
                    client.send(piece)
                client.socket.shutdown(socket.SHUT_WR)
        answers = [self.CHANGING.sub(b"0", client.rest()) for client in clients]
        for client in clients:
            client.close()
        return answers

    def answers(self, *pieces):
        """The same for one connection."""
        return self.all_answers([pieces])[0]

    def test_what_keeps_the_connection(self):
        client = self.server.connect()
        for status, request in self.KEPT:
            with self.subTest(request[:150]):
                method = request.split(None, 1)[0].decode()
                client.send(request)
                got, fields, body = client.answer(method)
                self.assertEqual(got, status, body)
                self.has_right_fields(method, status, fields, body)

    def has_right_fields(self, method, status, fields, body):
        self.assertRegex(fields.pop("date"),
                         r"^[a-z]{3}, \d\d [a-z]{3} \d{4} [\d:]{8} gmt$")
        expected = {"server": "kv/" + kv.__version__, "cache-control": "no-cache",
                    "x-content-type-options": "nosniff"}
        if status != 204:
            size = str(len(VALUE if method == "HEAD" else body))
            expected.update({"content-type": "text/plain; charset=utf-8",
                             "content-length": size})
        if status in (204, 405):
            expected["allow"] = "get, head, options"
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
            with self.subTest(beginning[:150]):
                client = self.server.connect()
                client.send(beginning)
                if beginning.startswith(GET_KEY):
                    self.assertEqual(client.answer()[2], VALUE)
                got, fields, _ = client.answer()
                self.assertEqual((got, fields["connection"]), (status, "close"))
                self.assertEqual(client.rest(), b"")
        for beginning, more in ((b"GET / HTTP/1.1\r", b"X"), (b"\r\n", b"\r\n"),
                                (b"GET / HTTP/1.1\r\nHost: kv\r", b"X")):
            client = self.server.connect()
            client.send(beginning)
            self.server.ask(KEY)  # when this is answered, the beginning has come
            client.send(more)
            self.assertEqual(client.answer()[0], 400)

    def test_the_same_however_the_bytes_come(self):
        """Cut at each byte or third, and byte by byte; long ones at their limits."""
        for step, rows in ((1, self.KEPT), (3, self.CLOSED)):
            for _, request in rows:
                size = len(request)
                cuts = range(1, size, step)
                if size > 400:
                    cuts = [n for limit in (kv.LINE_BYTES, kv.HEAD_BYTES, size)
                            for n in range(limit - 3, limit + 3) if n < size]
                ways = [[request[:n], request[n:]] for n in cuts]
                ways.append([request[n:n + 1] for n in range(min(size, 400))])
                ways[-1].append(request[400:])
                with self.subTest(request[:150]):
                    whole = self.answers(request)
                    self.assertTrue(whole)
                    self.assertEqual(set(self.all_answers(ways)), {whole})

    TEXTS = (  # a request, and the text that refuses it
        (ask_for(ABSENT), "key not found"), (ask_for(b"x"), "not a version 4 UUID"),
        (POST % b"X: y", "method not allowed: use GET or HEAD"),
        (FIELD % b"Expect: x", "unsupported Expect header (RFC 9110 section 10.1.1)"),
        (TARGET % b"*", "the request target must be /KEY or http://HOST/KEY"
                        " (RFC 9112 section 3.2)"),
        (b"EHLO x\r\n", "malformed request line: not METHOD TARGET HTTP/1.1 CRLF"
                        " (RFC 9112 section 3)"),
        (head("GET", PATH, host=""), "missing Host header (RFC 9112 section 3.2)"),
        (FIELD % b"X: a\rb", "bare CR or LF (RFC 9112 section 2.2)"))

    def test_texts(self):
        for request, text in self.TEXTS:
            self.assertEqual(self.answers(request).split(b"\r\n\r\n")[1],
                             text.encode() + b"\n")

    def test_a_head_request_has_no_body(self):
        for _, request in self.KEPT + self.CLOSED:
            if request.startswith(b"GET ") and len(request) < 400:
                full = self.answers(request)
                size = int(re.search(br"Content-Length: (\d+)", full).group(1))
                if b"\r\n\r\n10000 pairs " not in full:  # whose length changes
                    bare = self.answers(b"HEAD" + request[3:])
                    self.assertEqual(bare, full[:-size], request)

    def test_the_status_page(self):
        client = self.server.connect()
        status, fields, body = client.ask(b"")
        bare = client.ask(b"", method="HEAD")
        self.assertEqual((status, bare[0], set(bare[1])), (200, 200, set(fields)))
        client.send(head("GET", b"http://" + KEY))  # the host of the target is no key
        self.assertIn(b"pairs of example.data", client.answer()[2])
        self.assertRegex(body, rb"\A10000 pairs of example\.data, since [^\n]* GMT\n"
                               rb"\d+ requests answered, \d+ connections open\n"
                               rb"[^\n]*/KEY[^\n]*\n\Z")

    def test_what_the_status_page_counts(self):
        def counts():
            told = re.search(rb"since (.*)\n(\d+) requests answered, (\d+) connections",
                             first.ask(b"")[2])
            return told.group(1), int(told.group(2)), int(told.group(3))

        server = self.serve()
        first = server.connect()
        since, answered, connections = counts()
        self.assertEqual((answered, connections), (0, 1))
        others = [server.connect() for _ in range(3)]
        for other in others:
            self.assertEqual(other.ask(KEY)[2], VALUE)
            self.assertEqual(other.ask(ABSENT)[0], 404)
        self.assertEqual(counts(), (since, 7, 4))
        others[0].close()
        until(lambda: counts()[2] == 3)
        date = first.ask(KEY)[1]["date"]
        until(lambda: first.ask(KEY)[1]["date"] != date)
        server.reload()
        self.assertNotEqual(counts()[0], since)

    def test_the_remembered_verdict(self):
        """It is one on the fields as they are, not on others, however many there are."""
        for field, status in (("X: a", 200), ("X: a", 200), ("x: A", 200), ("X : a", 400),
                              ("X: a\r\nExpect: x", 417), ("X: a\r\nexpect: X", 417)):
            for method in ("GET", "HEAD", "GET"):
                client = self.server.connect()
                got, _, body = client.ask(KEY, field, method=method)
                self.assertEqual((got, bool(body)), (status, method == "GET"))
                if status != 200:
                    self.assertEqual(client.rest(), b"")
        client = self.server.connect()
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
                             "Expect: x\r\n", "Host: [" + "1:" * 40 + "\r\n"):
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
    ORACLE_PARAMETERS = (rb"(?:\s*;\s*" + TCHAR + rb"+\s*=\s*(?:" + TCHAR
                         + rb'+|"[^",\\]*"))*')
    ORACLE_CODINGS = (rb"(?:(?!chunked\s*,)(?:" + TCHAR + rb"+" + ORACLE_PARAMETERS
                      + rb")?\s*,\s*)*chunked[\s,]*")
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
        for _ in range(3000):
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
        self.assertEqual(self.server.log.count(b"\n"), 1, self.server.log)


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
            with contextlib.closing(Client(address)) as client:
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


def server_here(test):
    """Return a server in this process, which does not run, until the end of a test."""
    options = kv.make_parser().parse_args(
        ["serve", EXAMPLE, "--port", "0", "--max-connections", "9"])
    log = kv.Log(False)
    server = kv.Server(options, kv.Data(options, log), log, kv.Signals())
    server.service_actions()
    for opened in (server.selector, server.socket, server.wake_receiver,
                   server.wake_sender):
        test.addCleanup(opened.close)
    return server


def connection_here(test):
    """Return a kv.Connection, and the client's socket at its other end."""
    ours, client = (test.enter(one) for one in socket.socketpair())
    client.settimeout(PATIENCE)
    return kv.Connection(ours, "a client"), client


class Loop(WithExample):
    """Answers to many clients at once, and what is handed to a thread and back."""

    def test_all_of_the_example(self):
        """Over one connection, pipelined, and by fifty clients at once."""
        pairs = list(example_pairs().items())
        client = self.server.connect()
        for k, value in pairs:
            self.assertEqual(client.ask(k)[::2], (200, value))
        data = b"".join(ask_for(k) for k, _ in pairs[:500])
        for size in (1000, len(data)):  # of the pieces in which requests come
            for n in range(0, len(data), size):
                client.send(data[n:n + size])
            for _, value in pairs[:500]:
                self.assertEqual(client.answer()[::2], (200, value))
        clients = [self.server.connect() for _ in range(50)]
        while pairs:
            asked = [(client, *pairs.pop()) for client in clients]
            for client, k, _ in asked:
                client.send(ask_for(k))
            for client, _, value in random.sample(asked, len(asked)):
                self.assertEqual(client.answer()[::2], (200, value))

    LIMITS = {  # as the contract and README.md have them
        "IDLE_SECONDS": 650, "HEAD_SECONDS": 10, "ANSWER_SECONDS": 10,
        "ANSWER_BYTES_PER_SECOND": 10000, "STALL_SECONDS": 10, "MAX_CONNECTIONS": 10000,
        "LINE_BYTES": 8000, "HEAD_BYTES": 16000, "TICK_SECONDS": 0.1,
        "PATIENCE_SECONDS": 0.0001, "BAD_LINES_SHOWN": 10, "PROGRESS_SECONDS": 1,
        "MARK_BYTES": 65536, "MARKS": 20000, "PAGE_BYTES": 4096, "DEFAULT_TIMEOUT": 10,
        "KEYS_TOGETHER": 200, "HANGUP_SECONDS": 1}

    def test_limits(self):
        self.assertEqual({name: getattr(kv, name) for name in self.LIMITS}, self.LIMITS)
        self.assertTrue(0 < kv.LINGER_SECONDS <= 3 and 0 < kv.DRAIN_SECONDS < 5)

    def test_options_of_sockets(self):
        """No answer waits for an acknowledgement; little waits in the system."""
        server = server_here(self)
        server.server_activate()
        client = Client(server.socket.getsockname())
        with contextlib.closing(client):
            with server.get_request()[0] as accepted:
                for name in ("TCP_NODELAY", "TCP_NOTSENT_LOWAT"):
                    if hasattr(socket, name):
                        option = getattr(socket, name)
                        value = accepted.getsockopt(socket.IPPROTO_TCP, option)
                        self.assertTrue(0 < value <= kv.UNSENT_BYTES, name)

    def test_a_beginning_is_not_judged_at_each_byte(self):
        server = server_here(self)
        connection, client = connection_here(self)
        with unittest.mock.patch("kv.judge_beginning", return_value=None) as judged:
            client.send(GET_KEY[:-2] + b"X: ")
            server.receive(connection)
            for _ in range(kv.HEAD_BYTES):
                client.send(b"x")
                server.receive(connection)
        self.assertLess(judged.call_count, 6)

    def test_nor_are_all_of_its_lines_at_each_line(self):
        server = server_here(self)
        connection, _ = connection_here(self)
        connection.received = GET_KEY[:-2]
        before = time.process_time()
        for _ in range(3900):
            connection.received += b"a:\r\n"
            self.assertEqual(server.answer_next(connection), 0)
        self.assertLess(time.process_time() - before, 0.4)  # most take 0.05

    def test_each_request_has_its_own_deadline(self):
        """It does not move while more of the request comes."""
        server = server_here(self)
        connection, client = connection_here(self)
        for data, is_new in ((GET_KEY[:9], True), (GET_KEY[9:20], False),
                             (GET_KEY[20:] + GET_KEY[:9], True), (GET_KEY[9:], True)):
            expected = connection.waiting_since
            server.now += 5
            if is_new:
                expected = server.now
            client.send(data)
            server.receive(connection)
            self.assertEqual(connection.waiting_since, expected, data)

    def test_it_polls_before_it_sleeps(self):
        """If it had something to do a moment ago, and has more than one processor."""
        server = server_here(self)
        server.data.pairs = {}
        for was_busy, can_poll, is_reloading, polls, sleeps in (
                (True, True, False, True, True), (True, False, False, False, True),
                (False, True, False, False, True), (True, True, True, False, False)):
            server.was_busy, server.can_poll = was_busy, can_poll
            server.reload = is_reloading
            with unittest.mock.patch.object(
                    server.selector, "select", return_value=[]) as waiting:
                self.assertEqual(server.wait(), [])
            timeouts = [call[0][0] for call in waiting.call_args_list]
            self.assertEqual((timeouts[0], timeouts.count(0) > 1), (0, polls))
            self.assertEqual(timeouts[-1], kv.TICK_SECONDS if sleeps else 0)

    def test_newcomers_get_a_share_of_each_round(self):
        server = server_here(self)
        server.server_activate()
        clients = [Client(server.socket.getsockname()) for _ in range(9)]
        for client in clients:
            self.addCleanup(client.close)
        found = [(unittest.mock.Mock(fileobj=server.socket, data=None), 1)]
        connection, _ = connection_here(self)
        connection.socket.setblocking(False)
        others = [(unittest.mock.Mock(data=connection), 1)] * kv.EVENTS_PER_NEWCOMER
        server.socket.setblocking(False)
        for events, count in ((found, 1), (found + others * 2, 4)):
            with unittest.mock.patch.object(server, "wait", return_value=events):
                server.run_round()
            self.assertEqual(server.connection_count(), count)
        for connection in list(server.idle):
            server.close(connection)

    def test_what_a_thread_may_run_into(self):
        """Many end at the same moment; and a connection that cannot be waited for."""
        server = server_here(self)
        server.wake_sender.setblocking(False)
        server.log = unittest.mock.Mock()
        connection, client = connection_here(self)
        for _ in range(5000):  # more than the socket holds that wakes the loop
            server.shutdown_request(connection)
        self.assertEqual(len(server.returned), 5000)
        server.wait_for(server.handed_over, connection)
        with unittest.mock.patch.object(
                server.selector, "register", side_effect=OSError("no")):
            server.take_back(connection)
        self.assertEqual(client.recv(1), b"")
        self.assertEqual(server.log.call_count, 1)

    def test_a_fault_in_keeping_what_has_come(self):
        """After that, what follows would be read as the beginning of a request."""
        server = server_here(self)
        server.log = unittest.mock.Mock()
        connection, client = connection_here(self)
        connection.received = None
        client.send(b"GET")
        server.receive(connection)
        self.assertEqual(client.recv(1), b"")
        self.assertEqual(server.log.call_count, 1)

    def test_a_thread_sends_before_it_waits_for_the_disk(self):
        """It answers the request that has to wait, and leaves those behind to the loop.
        """
        class Slow(dict):
            def get(self, k, wait):
                return client.recv(1) + self[k]  # waits for the answer before this one

        server = server_here(self)
        server.data.pairs = Slow({KEY: VALUE})
        connection, client = connection_here(self)
        connection.unsent.append(b"a")
        connection.received = GET_KEY + ask_for(OTHER_KEY)
        connection.needs_disk = True
        kv.Handler(connection, connection.address, server)
        self.assertTrue(client.recv(9999).endswith(b"\r\n\r\na" + VALUE))
        self.assertEqual(connection.received, ask_for(OTHER_KEY))

    @ON_LINUX
    def test_clients_that_need_no_thread(self):
        """Plain requests, 2,000 idle connections, 500 heads that trickle in."""
        raise_descriptor_limit(2700)
        server = self.serve()
        clients = [server.connect() for _ in range(2500)]
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
        server = self.serve(LARGE)
        client = server.connect()
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
        client.send(GET_KEY * 5 + b"EHLO x\r\n")  # which cannot become a head
        for _ in range(5):
            self.assertEqual(len(client.answer()[2]), SIZE)
        self.assertEqual(client.answer()[0], 400)
        self.assertEqual(client.rest(), b"")
        client.close()
        until(lambda: server.threads() == 1)

    def test_requests_behind_just_as_much_as_the_loop_sends(self):
        client = self.server.connect()
        client.send(ask_for(KEY, "Connection: close"))
        size = len(client.rest().replace(b"Connection: close\r\n", b""))
        client = self.serve(limits={"TURN_BYTES": 2 * size}).connect()
        client.send(GET_KEY * 5)
        for _ in range(5):
            self.assertEqual(client.answer()[2], VALUE)

    def test_a_thread_wakes_the_loop(self):
        client = self.serve(LARGE, limits={"TICK_SECONDS": PATIENCE}).connect()
        for _ in range(3):
            self.assertEqual(len(client.ask(KEY)[2]), SIZE)
            self.assertEqual(soon(client), OTHER_VALUE)

    def test_others_are_answered_meanwhile(self):
        """While a head trickles in, an answer is not taken, 100 connections linger."""
        server = self.serve(LARGE)
        trickling, stuck, other, *bad = (server.connect() for _ in range(103))
        trickling.send(GET_KEY[:20])
        stuck.send(GET_KEY)
        stuck.await_more()
        for client in bad:
            client.send(b"bad\r\n\r\n")
            self.assertEqual(client.answer()[0], 400)
        for _ in range(50):
            self.assertEqual(soon(other), OTHER_VALUE)
        if sys.platform == "linux":
            self.assertEqual(server.threads(), 2)  # the other one is that of `stuck`
        trickling.send(GET_KEY[20:])
        self.assertEqual(len(trickling.answer()[2]), SIZE)
        self.assertEqual(len(stuck.answer()[2]), SIZE)
        self.assertEqual(soon(other), OTHER_VALUE)

    def test_last_answers_arrive_although_the_client_still_sends(self):
        medium = key(1) + b" " + b"x" * 40000 + b"\n"  # sent by the loop itself
        server = self.serve(medium + key(2) + b" two\n" + LARGE,
                            limits={"HEAD_SECONDS": 0.7})
        for status, request, behind in (
                (408, b"GET / HTTP/1.1\r\n", b"X: x\r\n" * 2000),
                (405, head("POST", "/", "Content-Length: 50000000"), b"x" * 200000),
                (501, b"x" * 20000, b"x" * 200000),
                (400, ask_for(KEY, "bad"), b"x" * 200000),
                (414, b"GET /" + b"x" * 20000, b"x" * 200000),
                (200, ask_for(key(1), "Connection: close"), b"\r\n"),
                (200, ask_for(OTHER_KEY, "Connection: close") + GET_KEY * 2000, b""),
                (200, ask_for(KEY, "Connection: close"), b"\r\n"),
                (200, ask_for(KEY, "Connection: close") + GET_KEY[:9], GET_KEY[9:]),
                (200, ask_for(KEY, "Connection: close"), GET_KEY * 200)):
            with self.subTest(status):
                client = server.connect(receive_buffer=4096)
                client.send(request)
                client.await_more()  # the answer is on its way
                client.send(behind)
                self.assertEqual(soon(server.connect(), key(2)), b"two")
                client.send(b"x")  # what was sent before would have caused a reset by now
                answered, fields, _ = client.answer()
                self.assertEqual((answered, fields["connection"]), (status, "close"))
                self.assertEqual(client.rest(), b"")  # the end, and no reset

    def test_clients_that_vanish(self):
        """Before they ask, while they ask, while they are answered."""
        server = self.serve(LARGE)
        for request in b"", b"GET", ask_for(ABSENT), ask_for(KEY, "bad"), GET_KEY:
            for _ in range(20):
                client = server.connect()
                client.send(request)
                if request == GET_KEY:
                    client.await_more()
                client.reset_on_close()
        self.assertEqual(soon(server.connect()), OTHER_VALUE)
        self.assertEqual(len(server.lines()), 1, server.log)

    def test_a_fault_is_a_line_and_a_500(self):
        for name in ("judge_path", "judge"):
            server = self.serve(limits={name: None})  # no function
            client = server.connect()
            for number in (1, 2):
                status, _, body = client.ask(ABSENT)
                self.assertEqual((status, body), (500, kv.INTERNAL_ERROR))
                if name == "judge":  # then it is not known what to do next
                    self.assertEqual(client.rest(), b"")
                    client = server.connect()
                else:
                    self.assertEqual(client.ask(KEY)[2], VALUE)
                until(lambda: len(server.lines()) > number)
                self.assertRegex(server.lines()[number],
                                 r"^kv: fault in answering 127\.0\.0\.1: TypeError\(")

    @ON_LINUX
    @ON_CPYTHON
    def test_too_few_threads(self):
        """A client that would need one is closed, all others go on."""
        server = self.serve(LARGE)
        other = server.connect()
        self.assertEqual(soon(other), OTHER_VALUE)
        limit_memory(server.pid, 1000)  # kB: too little for the stack of a thread
        for number in range(1, 6):
            client = server.connect(receive_buffer=4096)
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
        server = self.serve(words=[
            sys.executable, "-c", lacking, "serve", EXAMPLE, "--port", "0"])
        client = server.connect()
        client.send(GET_KEY * 20)
        for _ in range(20):
            self.assertEqual(client.answer()[2], VALUE)
        client.close()
        self.assertEqual(server.stop(), 0)


def unsent_bytes(server, client):
    """Return how many bytes the system holds that a client here has not taken."""
    ports = server.port, client.socket.getsockname()[1]
    with open("/proc/net/tcp") as file:
        found = re.search(r":%04X \w+:%04X 01 (\w+)" % ports, file.read())
    return int(found.group(1), 16)


class Unread(Serving):
    """A server whose log, a pipe or a terminal, is read only until it is ready."""

    def __init__(self, make, *arguments, **how):
        self.reading, self.writing = make()
        super().__init__(*arguments, stderr=self.writing, **how)
        self.stack.callback(os.close, self.reading)
        self.stack.callback(os.close, self.writing)

    def read_log(self):
        while not re.search(rb" s, on \S+\s", self.log):
            self.log += os.read(self.reading, 1000)


@ON_LINUX
class Limits(Test):
    """Slow, silent and too many clients, and too little of all."""

    IDLE = {"IDLE_SECONDS": 0.7, "HEAD_SECONDS": 9}
    WHOLE = {"IDLE_SECONDS": 9, "HEAD_SECONDS": 1, "LINGER_SECONDS": 0.2}
    DEADLINES = (  # limits; what a client sends first, then on and on; the seconds until
                   # its end, and the status that it gets before that
        (IDLE, b"", b"", 0.7, None), (IDLE, b"\r\n", b"", 0.7, None),
        (IDLE, GET_KEY, b"", 0.7, 200), (WHOLE, b"GET", b"", 1, 408),
        (IDLE, GET_KEY + b"\r\n" + GET_KEY, b"", 0.7, 200), (WHOLE, b"", b"a", 1, 408),
        (WHOLE, b"GET / HTTP/1.1\r\n", b"a:b\r\n", 1, 408),
        (WHOLE, GET_KEY + b"GET", b"a", 1, 408), (WHOLE, b"\r\nG", b"", 1, 408),
        ({"LINGER_SECONDS": 0.7}, b"bad\r\n", b"x", 0.7, 400))
    TAKE = {"ANSWER_SECONDS": 9, "ANSWER_BYTES_PER_SECOND": 10**9, "STALL_SECONDS": 9}
    NOT_TAKEN = (  # limits, one of them 0.7 s; bytes that a client takes now and then
        (dict(TAKE, STALL_SECONDS=0.7), 0), (dict(TAKE, ANSWER_SECONDS=0.7), 0),
        (dict(TAKE, ANSWER_SECONDS=0.7), 1000))
    TAKEN = (  # limits; bytes that a client takes at once; tenths of a second in which
               # it then takes so many bytes each, before it takes the rest
        ({"ANSWER_SECONDS": 0.2, "ANSWER_BYTES_PER_SECOND": 500000}, 0, 5, 100000),
        ({"STALL_SECONDS": 1, "ANSWER_BYTES_PER_SECOND": 100000}, 6000000, 15, 100000),
        ({"STALL_SECONDS": 1}, 0, 18, 9000))

    def asks_too_slowly(self, limits, first, on_and_on, seconds, status):
        server = self.serve(limits=limits)
        start = time.monotonic()
        client = server.connect()
        client.send(first)
        client.socket.settimeout(0.05)
        more, received = True, b""
        with contextlib.suppress(ConnectionError):
            while (more or on_and_on) and time.monotonic() < start + PATIENCE:
                with contextlib.suppress(socket.timeout):
                    more = client.socket.recv(1 << 16)
                    received += more
                client.send(on_and_on)
        statuses = re.findall(rb"HTTP/1.1 (\d+)", received)
        self.assertEqual(statuses[-1:], [b"%d" % status] if status else [])
        self.assertTrue(seconds <= time.monotonic() - start < seconds + 6)

    def takes_too_little(self, limits, taken):
        server = self.serve(LARGE, limits=limits)
        client = server.connect(receive_buffer=4096)
        start = time.monotonic()
        client.send(GET_KEY)
        until(lambda: server.threads() == 2)
        until(lambda: taken and client.socket.recv(taken) and False
              or server.threads() == 1)
        self.assertTrue(0.7 <= time.monotonic() - start < 6)

    def gets_it_whole(self, limits, at_once, tenths, size):
        client = self.serve(LARGE, limits=limits).connect(receive_buffer=4096)
        client.send(ask_for(KEY, "Connection: close"))
        received = client.file.read(at_once)
        for _ in range(tenths):
            time.sleep(0.1)
            received += client.file.read(size)
        received += client.rest()
        self.assertEqual(len(received.partition(b"\r\n\r\n")[2]), SIZE)

    def test_deadlines(self):
        self.side_by_side(lambda check, *row: check(*row), (
            *((self.asks_too_slowly, *row) for row in self.DEADLINES),
            *((self.takes_too_little, *row) for row in self.NOT_TAKEN),
            *((self.gets_it_whole, *row) for row in self.TAKEN)))

    def test_who_has_asked_is_not_evicted(self):
        """Even if its request and a newcomer are seen in the same round of the loop."""
        server = self.serve(EXAMPLE, "--max-connections", "2")
        first, second = server.connect(), server.connect()
        self.assertEqual(first.ask(KEY)[2], VALUE)
        self.assertEqual(second.ask(KEY)[2], VALUE)
        server.send_signal(signal.SIGSTOP)
        third = server.connect()
        third.send(GET_KEY)
        first.send(GET_KEY)
        server.send_signal(signal.SIGCONT)
        self.assertEqual(first.answer()[2], VALUE)
        self.assertEqual(third.answer()[2], VALUE)
        self.assertEqual(second.rest(), b"")

    def test_connections_that_come_back_from_threads_and_are_evicted(self):
        """At the same moment, again and again."""
        def ask():
            answers = 0
            while answers < 30:
                client = server.connect()
                with contextlib.suppress(*GONE):
                    while answers < 30:
                        self.assertEqual(len(client.ask(KEY)[2]), 400000)
                        answers += 1

        server = self.serve(KEY + b" " + b"x" * 400000 + b"\n", "--max-connections", "1")
        self.side_by_side(ask, [()] * 6)
        self.assertEqual(len(server.lines()), 1, server.log)

    def test_who_has_waited_longest_makes_room(self):
        """For a request, the rest of a head, an answer to be taken, or a last byte."""
        def idle(server, client):
            self.assertEqual(client.ask(OTHER_KEY)[2], OTHER_VALUE)

        def trickle(server, client):
            client.send(GET_KEY[:9])

        def stick(server, client):
            client.send(GET_KEY)
            until(lambda: 0 < unsent_bytes(server, client) == (
                time.sleep(0.1) or unsent_bytes(server, client)))

        def linger(server, client):
            client.send(b"bad\r\n")
            self.assertEqual(client.answer()[0], 400)

        def is_evicted(*waits):
            server = self.serve(LARGE, "--max-connections", "4", limits={
                "STALL_SECONDS": PATIENCE, "LINGER_SECONDS": PATIENCE})
            clients = [server.connect(receive_buffer=4096) for _ in waits]
            for client in clients:
                idle(server, client)
            for wait, client in zip(waits, clients):
                wait(server, client)
            idle(server, server.connect())
            with contextlib.suppress(ConnectionError):
                self.assertLess(len(clients[0].rest()), SIZE)
            for wait, client in list(zip(waits, clients))[1:]:
                if wait == trickle:
                    client.send(GET_KEY[9:])
                if wait in (trickle, stick):
                    self.assertEqual(len(client.answer()[2]), SIZE)
                if wait != linger:
                    idle(server, client)

        kinds = [idle, trickle, stick, linger]
        self.side_by_side(is_evicted, [kinds[n:] + kinds[:n] for n in range(4)])

    @ON_CPYTHON
    def test_clients_that_take_nothing(self):
        """They lock nobody out, and a value, or all that one asks for, is not copied."""
        def lock_nobody_out(content, requests, most, *options):
            server = self.serve(content, *options, "--max-connections", "30")
            before = server.memory()
            stuck = [server.connect(receive_buffer=4096) for _ in range(30)]
            for client in stuck:
                client.send(GET_KEY * requests)
            for client in stuck:
                client.await_more()  # the answer is on its way
            self.assertEqual(server.threads(), 31)
            start = time.monotonic()
            for _ in range(40):
                self.assertEqual(server.connect().ask(OTHER_KEY)[2], OTHER_VALUE)
            self.assertLess(time.monotonic() - start, 9)  # none waits for a stall
            self.assertLess(server.memory() - before, most)
            for client in stuck:
                client.close()
            until(lambda: server.threads() == 1)
            self.assertEqual(len(server.lines()), 1, server.log)

        many = KEY + b" " + b"x" * 16000 + b"\n" + OTHER_KEY + b" " + OTHER_VALUE + b"\n"
        self.side_by_side(lock_nobody_out, (
            (LARGE, 1, 10000), (LARGE, 1, 10000, "--sorted"),
            (many, 130, 10000), (many, 130, 30000, "--sorted")))

    CROWDED = (  # what limits the connections, and the first line of the log
        ("", ("--max-connections", "20"), ""), ("ulimit -n 50; ", (), ""),
        ("ulimit -n 50; ", ("--max-connections", "1000"),
         "kv: --max-connections 1000 needs 1032 open files, but the limit is 50"
         "; raise it with ulimit -n, or LimitNOFILE under systemd"))

    def test_a_crowd_leaves_room(self):
        """Others connect and may begin to ask, few or many between two requests."""
        def leaves_room(ulimit, options, told):
            def ask():
                nonlocal client
                try:
                    body = soon(client, KEY)
                except GONE:  # it was its turn to go
                    client = server.connect()
                    body = soon(client, KEY)
                self.assertEqual(body, VALUE)

            prefix = ("sh", "-c", ulimit + 'exec "$@"', "sh")
            server = self.serve(EXAMPLE, *options, prefix=prefix)
            self.assertEqual(server.lines()[:-1], [told] if told else [])
            client = server.connect()
            for newcomers in (1, 10, 60) * 4:
                for number in range(newcomers):
                    other = server.connect()
                    with contextlib.suppress(ConnectionError):
                        other.send(b"GET" * (number % 2))
                ask()
            before = proc(server.pid, "", "schedstat")
            time.sleep(0.5)  # in which it does not spin
            self.assertLess(proc(server.pid, "", "schedstat") - before, 1.5e8)  # ns
            ask()

        self.side_by_side(leaves_room, self.CROWDED)

    def test_it_raises_its_limit_of_open_files(self):
        raise_descriptor_limit(600)
        prefix = ("sh", "-c", 'ulimit -Sn 60; ulimit -Hn 600; exec "$@"', "sh")
        for options, limit in (((), 600), (("--max-connections", "300"), 332)):
            server = self.serve(EXAMPLE, *options, prefix=prefix)
            self.assertEqual(proc(server.pid, "Max open files", "limits"), limit)
            self.assertEqual(len(server.lines()), 1, server.log)

    @NEEDS_STRACE
    def test_what_the_system_refuses(self):
        def goes_on(fault, told, makes_room):
            prefix = ("sh", "-c", 'ulimit -Sn 64; exec "$@"', "sh", "strace", "-D", "-f",
                      "-qq", "-o", os.devnull, "-e", "inject=" + fault)
            server = self.serve(prefix=prefix)
            self.assertTrue(server.lines()[0].startswith(told))
            first, second = server.connect(), server.connect()
            self.assertEqual(second.ask(KEY)[2], VALUE)
            self.assertEqual(server.ask(KEY)[2], VALUE)
            if makes_room:
                self.assertEqual(first.rest(), b"")
            else:
                self.assertEqual(first.ask(KEY)[2], VALUE)

        self.side_by_side(goes_on, (
            ("accept4:error=ECONNABORTED:when=3", "", False),  # that client has gone
            ("accept4:error=EMFILE:when=3", "", True),
            ("prlimit64:error=EPERM:when=3+",
             "kv: cannot raise the limit of open files: ", False)))

    def test_accepting_pauses_without_memory(self):
        server = server_here(self)
        with unittest.mock.patch.object(server, "get_request", side_effect=MemoryError):
            self.assertFalse(server.accept())
        self.assertFalse(server.is_accepting)

    def test_a_lookup_for_which_no_thread_can_start(self):
        server = server_here(self)
        server.log = unittest.mock.Mock()
        connection, client = connection_here(self)
        connection.received = GET_KEY
        connection.needs_disk = True
        with unittest.mock.patch("_thread.start_new_thread", side_effect=RuntimeError):
            server.hand_over(connection)
            server.take_back(server.returned.popleft())
        self.assertEqual(client.recv(1), b"")
        self.assertFalse(server.returned)
        self.assertEqual(server.connection_count(), 0)

    def test_a_thread_that_ends_before_it_begins(self):
        """For lack of memory. Nobody has to wait for it."""
        server = server_here(self)
        connection, client = connection_here(self)
        connection.unsent.append(b"x")
        with unittest.mock.patch("_thread.start_new_thread"):
            server.hand_over(connection)
        server.evict(server.longest_waiting())
        self.assertEqual(client.recv(1), b"")
        self.assertEqual(server.connection_count(), 0)

    def test_who_waits_for_the_disk_is_not_evicted(self):
        """Else there would be a thread for each of those, while more and more come."""
        server = server_here(self)
        connection, client = connection_here(self)
        connection.needs_disk = True
        with unittest.mock.patch("_thread.start_new_thread"):
            server.hand_over(connection)
        self.assertIsNone(server.longest_waiting())

    def test_faults_in_each_round_keep_no_processor_busy(self):
        server = server_here(self)
        server.log = unittest.mock.Mock()
        for error in (ValueError(), MemoryError()):
            with unittest.mock.patch("time.sleep") as sleep:
                server.recover(error)
            sleep.assert_called_once_with(kv.TICK_SECONDS)

    def test_a_newcomer_for_whom_memory_runs_out(self):
        """It does not stay in a queue, in which nobody behind it would be looked at."""
        server = server_here(self)
        connection, _ = connection_here(self)
        with unittest.mock.patch.object(
                server, "get_request", return_value=(connection.socket, "")), \
                unittest.mock.patch.object(server, "register", side_effect=MemoryError):
            self.assertRaises(MemoryError, server.accept)
        self.assertEqual(server.connection_count(), 0)

    def test_memory_that_runs_out_costs_a_connection(self):
        server = server_here(self)
        connection, client = connection_here(self)
        server.wait_for(server.idle, connection)
        server.log = unittest.mock.Mock()
        server.recover(ValueError())
        self.assertEqual(list(server.idle), [connection])
        server.recover(MemoryError())
        self.assertEqual(client.recv(1), b"")

    def test_the_loop_goes_on_if_memory_runs_out_twice(self):
        """In a round, and in what is done about that."""
        def run_round():
            server.is_stopping = rounds.call_count == 2
            raise MemoryError

        server = server_here(self)
        with unittest.mock.patch.object(server, "run_round", side_effect=run_round) \
                as rounds, unittest.mock.patch.object(
                    server, "evict", side_effect=MemoryError):
            server.serve_forever()
        self.assertEqual(rounds.call_count, 2)

    def test_nobody_is_evicted_twice(self):
        """While a thread ends whose client is evicted, the next one is another."""
        server = server_here(self)
        clients = []
        for number in range(2):
            connection, client = connection_here(self)
            server.wait_for(server.handed_over, connection)
            connection.waiting_since = number
            clients.append(client)
        for client in clients:
            self.assertFalse(server.evict(server.longest_waiting()))
            self.assertEqual(client.recv(1), b"")

    @NEEDS_STRACE
    def test_it_does_not_spin_where_nobody_can_be_accepted(self):
        prefix = ("strace", "-D", "-f", "-qq", "-o", os.devnull,
                  "-e", "inject=accept4:error=EMFILE:when=1+")
        server = self.serve(prefix=prefix)
        server.connect()
        before = proc(server.pid, "", "schedstat")
        time.sleep(0.5)
        self.assertLess(proc(server.pid, "", "schedstat") - before, 1.5e8)  # ns

    @ON_CPYTHON
    def test_memory_does_not_grow_with_requests(self):
        others = ask_for(ABSENT) + head("HEAD", b"/" + KEY, "X: y") + ask_for(b"x")
        server = self.serve()
        sizes = []
        for _ in range(200):
            client = server.connect()  # 996 that keep it, one that does not
            client.send(GET_KEY * 498 + others * 166 + b"bad\r\n\r\n")
            client.socket.shutdown(socket.SHUT_WR)
            self.assertEqual(client.rest().count(b"\r\nServer: "), 997)
            sizes.append(server.memory())
        self.assertLess(sizes[199] - sizes[19], 300)  # kB: under 2 bytes a request

    def test_a_log_that_nobody_reads(self):
        """A full pipe, a full or a stopped terminal: answers come, lines are lost."""
        def goes_on(make, is_full, *options):
            server = self.enter(Unread(make, KEY + b" old\n", *options))
            if is_full:
                os.set_blocking(server.writing, False)
                for piece in (b"x" * 4096, b"x"):
                    with contextlib.suppress(BlockingIOError):
                        while True:
                            os.write(server.writing, piece)
                os.read(server.reading, 20)  # a terminal has room, but not for a line
            else:
                os.write(server.reading, b"\x13")  # Ctrl-S
            client = server.connect()
            for _ in range(400):
                self.assertEqual(client.ask(KEY)[2], b"old")
            replace(server.path, KEY + b" new\n")
            server.send_signal(signal.SIGHUP)
            until(lambda: client.ask(KEY)[2] == b"new")
            client.close()
            self.assertEqual(server.stop(), 0)

        self.side_by_side(goes_on, (
            (os.pipe, True, "--verbose"), (os.pipe, True),
            (os.openpty, True, "--verbose"), (os.openpty, False, "--verbose")))


@ON_POSIX
class ReloadAndStop(Test):
    """New data, and the end."""

    COUNT = 2000

    @staticmethod
    def content(word, count=COUNT):
        return b"".join(b"%b %b %b\n" % (key(n), word, key(n)) for n in range(count))

    def test_reload_under_load(self):
        """Whatever comes is old or new; and in the end, all is new."""
        def reloads(*options):
            server = self.serve(self.content(b"old"), *options)
            address = ("127.0.0.1", server.port)
            with clients_asking(address, [key(n) for n in range(self.COUNT)]) as answers:
                for turn in range(3):
                    done = len(answers)
                    count = self.COUNT + turn
                    replace(server.path, self.content(b"new%d" % turn, count))
                    server.reload()
                    self.assertRegex(server.lines()[-1], (
                        rf"^kv: {count} pairs of {server.path} in \d+\.\d\d s, "
                        rf"reloaded \({count - bool(turn)} before\)$"))
                    for k in map(key, range(100)):
                        self.assertEqual(server.ask(k)[2], b"new%d %b" % (turn, k))
                    until(lambda: len(answers) > done + 100)
            for k, status, body in answers:
                self.assertEqual(status, 200)
                self.assertRegex(body, b"^(old|new[0-2]) %b$" % k)

        self.side_by_side(reloads, [(), ("--sorted",)])

    @ON_LINUX
    def test_others_are_answered_while_a_reload_runs(self):
        bodies = [b"old " + key(7), b"new " + key(7)]
        server = self.serve(self.content(b"old", 100000))
        client = server.connect()
        for was, becomes in (bodies, reversed(bodies)):
            asked = 0
            replace(server.path, self.content(becomes[:3], 100000))
            server.send_signal(signal.SIGHUP)
            while client.ask(key(7))[2] == was:
                asked += 1
            self.assertEqual(soon(client, key(7)), becomes)
            self.assertGreater(asked, 50)
            until(lambda: b"reloaded" in server.log)
            self.assertEqual(server.threads(), 1)

    NO_FILE = ": not a file that can be read again"
    BAD = (  # how the file is made, from what, and what is said of it
        (replace, b"bad", ":1: no version 4 UUID at the start of the line: b'bad'"),
        (replace, b"", ": contains no pairs"),
        (replace, key(1) + b" v\n" + key(2)[:20],
         f":2: no version 4 UUID at the start of the line: {key(2)[:20]}"),
        (lambda path, _: None, None, ": No such file or directory"),
        (os.mkfifo, 0o600, NO_FILE),
        (lambda path, target: os.symlink(target, path), "/dev/zero", NO_FILE))

    def test_bad_files_leave_the_data(self):
        def leave(*options):
            server = self.serve(self.content(b"old"), *options)
            for make, what, fault in self.BAD:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(server.path)
                make(server.path, what)
                server.reload()
                self.assertEqual(server.lines()[-2:], [
                    f"kv: {server.path}{fault}", "kv: the data stays as it was"])
                for k in map(key, range(0, self.COUNT, 100)):
                    self.assertEqual(server.ask(k)[2], b"old " + k)

        self.side_by_side(leave, [(), ("--sorted",)])
        with open(EXAMPLE) as file:
            server = self.serve("-", stdin=file)
        server.reload()
        self.assertEqual(server.lines()[1], "kv: standard input" + self.NO_FILE)
        self.assertEqual(server.ask(KEY)[2], VALUE)

    @ON_LINUX
    @ON_CPYTHON
    def test_a_refused_reload_keeps_nothing_of_the_file(self):
        server = self.serve(self.content(b"old"), "--sorted")
        descriptors = "/proc/%d/fd" % server.pid
        before = len(os.listdir(descriptors))
        replace(server.path, self.content(b"new") + b"bad\n")
        server.reload()
        until(lambda: len(os.listdir(descriptors)) == before)

    def test_a_reload_takes_half_of_the_time_under_load(self):
        """After each step, requests get as long as it took, if there are any."""
        server = server_here(self)
        server.reload = (time.sleep(0.02) for _ in range(9))
        start = time.monotonic()
        server.step_reload()
        self.assertGreaterEqual(server.next_step, start + 0.04)
        for is_busy, seconds, steps in ((True, -0.01, False), (False, -0.01, True),
                                        (True, 0, True)):
            before = server.next_step
            server.was_busy = is_busy
            server.now = before + seconds
            server.step_reload()
            self.assertEqual(server.next_step > before, steps)

    def test_a_reload_works_in_short_steps(self):
        """The old pairs are not freed at once, either."""
        options = kv.make_parser().parse_args(["serve", EXAMPLE])
        data = kv.Data(options, kv.Log(False))
        collections.deque(data.load(), 0)
        old_pairs = data.pairs
        with unittest.mock.patch.object(kv.Log, "put"):
            steps = sum(1 for _ in data.reload())
        self.assertEqual((len(data.pairs), len(old_pairs)), (10000, 0))
        self.assertGreater(steps, 10000 / kv.STEP_PAIRS + 700000 / kv.STEP_BYTES)

    def test_half_a_file_is_served_and_told(self):
        server = self.serve(self.content(b"old"))
        replace(server.path, self.content(b"new")[:-1])
        server.reload()
        self.assertEqual(server.lines()[1], f"kv: {server.path}: {Lines.CUT_OFF}")
        self.assertRegex(server.lines()[2], r"reloaded \(2000 before\)$")
        self.assertEqual(server.ask(key(7))[2], b"new " + key(7))

    @ON_LINUX
    def test_signals_during_a_reload(self):
        """However many come, they cause one more after it."""
        def has_begun():
            with contextlib.suppress(FileNotFoundError):
                return server.path in map(os.readlink, glob.glob(descriptors))

        server = self.serve(self.content(b"old", 100000))
        descriptors = "/proc/%d/fd/*" % server.pid
        server.send_signal(signal.SIGHUP)
        until(has_begun)
        for _ in range(100):
            server.send_signal(signal.SIGHUP)
        until(lambda: server.log.count(b"reloaded") == 2)
        for _ in range(20):
            for _ in range(1000):
                server.send_signal(signal.SIGHUP)
            self.assertEqual(server.ask(key(7))[2], b"old " + key(7))
        self.assertEqual(server.stop(), 0)

    @ON_LINUX
    @ON_CPYTHON
    def test_a_reload_without_enough_memory(self):
        value = b"x" * 500 + b" " + key(7)
        server = self.serve(self.content(b"x" * 500, 60000))
        limit_memory(server.pid, 12000)
        answered = 0

        def failed():
            nonlocal answered
            with contextlib.suppress(*GONE):
                self.assertEqual(server.ask(key(7))[2], value)
                answered += 1
            return server.lines()[-1] == "kv: the data stays as it was"

        for number in (1, 2, 3):
            server.send_signal(signal.SIGHUP)
            until(lambda: failed() and server.log.count(b"not fit") == number)
            self.assertIn(
                f"kv: {server.path}: does not fit in memory; "
                "try --sorted, which needs less",
                server.lines()[-3:])
        self.assertGreater(answered, 3)
        limit_memory(server.pid, None)
        server.reload()
        self.assertRegex(server.lines()[-1], r"reloaded \(60000 before\)$")

    def refuses(self, server):
        with contextlib.suppress(ConnectionError):
            server.connect().close()
            return False
        return True

    def test_stop_under_load(self):
        """What was read is answered whole; the last answer of a connection says so."""
        def stops(how):
            server = self.serve()
            idle = server.connect()
            with clients_asking(("127.0.0.1", server.port)) as answers:
                start = time.monotonic()
                self.assertEqual(server.stop(how), 0)
                self.assertLess(time.monotonic() - start, 5)
            self.assertEqual(set(answers), {(KEY, 200, VALUE)})
            self.assertEqual(idle.rest(), b"")
            self.assertTrue(self.refuses(server))
            self.assertEqual(server.lines()[-1], "kv: stopped")

        self.side_by_side(stops, [(signal.SIGTERM,), (signal.SIGINT,)])

    def test_stop_answers_each_of_the_requests_that_came_together(self):
        def ask():
            with contextlib.suppress(*GONE):
                while True:
                    counts.append(0)
                    client.send(GET_KEY * 40)
                    for _ in range(40):
                        self.assertEqual(client.answer()[::2], (200, VALUE))
                        counts[-1] += 1

        for _ in range(2):
            counts = []
            server = self.serve()
            client = server.connect()
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                asking = pool.submit(ask)
                until(lambda: len(counts) > 20)
                try:
                    self.assertEqual(server.stop(), 0)
                finally:
                    server.send_signal(signal.SIGKILL)
                asking.result(PATIENCE)
            self.assertLessEqual(set(counts), {0, 40})

    def stuck(self, drain_seconds):
        """Return a server that waits for a client that takes nothing, and that client."""
        server = self.serve(LARGE, limits={
            "DRAIN_SECONDS": drain_seconds, "STALL_SECONDS": 2 * PATIENCE})
        client = server.connect(receive_buffer=4096)
        client.send(GET_KEY)
        client.await_more()
        return server, client

    def test_a_stop_waits_for_answers_but_not_for_ever(self):
        def stops(takes_the_answer, drain_seconds):
            server, client = self.stuck(drain_seconds)
            server.send_signal(signal.SIGTERM)
            if takes_the_answer:
                until(lambda: self.refuses(server))
                server.send_signal(signal.SIGTERM)  # which changes nothing
                self.assertEqual(len(client.answer()[2]), SIZE)
            self.assertEqual(server.process.wait(PATIENCE), 0)

        self.assertLess(kv.DRAIN_SECONDS, 5)
        self.side_by_side(stops, [(True, 2 * PATIENCE), (False, 0.5)])

    def test_a_stop_does_not_wait_long_for_clients_to_close(self):
        limits = dict.fromkeys(("LINGER_SECONDS", "DRAIN_SECONDS"), 2 * PATIENCE)
        server = self.serve(limits=limits)
        client = server.connect()
        client.send(b"bad\r\n")
        self.assertEqual(client.answer()[0], 400)
        self.assertEqual(server.stop(), 0)

    def test_a_stop_does_not_close_where_a_request_has_come(self):
        server = server_here(self)
        connection, client = connection_here(self)
        server.wait_for(server.idle, connection)
        server.is_stopping = True
        server.now += 1
        client.send(GET_KEY)
        server.service_actions()
        self.assertEqual(list(server.idle), [connection])
        connection.socket.recv(999)
        server.service_actions()
        self.assertEqual(client.recv(1), b"")

    def test_a_stop_lingers_where_the_client_has_not_asked_to_close(self):
        server = server_here(self)
        server.data.pairs = {KEY: VALUE}
        server.is_stopping = True
        for request, queue in ((GET_KEY, [True]), (b"", [])):
            connection, client = connection_here(self)
            connection.received = request
            server.go_on(connection)
            self.assertEqual([c is connection for c in server.lingering], queue)
            server.close(connection)

    def test_a_second_interrupt_ends_it_at_once(self):
        """Whether the stop has begun or has only been noted, or SIGTERM came before."""
        def ends(has_begun, *signals):
            server, _ = self.stuck(2 * PATIENCE)
            other = server.connect()
            self.assertEqual(soon(other), OTHER_VALUE)
            for number in signals:
                server.send_signal(number)
                if has_begun:
                    until(lambda: self.refuses(server))
                else:
                    self.assertEqual(soon(other), OTHER_VALUE)  # the signal has come
            time.sleep(0.1)
            self.assertIsNone(server.process.poll())
            self.assertEqual(server.stop(signal.SIGINT), 130)

        self.side_by_side(ends, (
            (True, signal.SIGINT), (False, signal.SIGINT),
            (True, signal.SIGTERM, signal.SIGINT)))

    @ON_CPYTHON  # see Limitations
    def test_an_interrupt_that_is_ignored(self):
        """As a script's shell has it ignored by jobs in the background."""
        prefix = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")
        server = self.serve(prefix=prefix)
        server.send_signal(signal.SIGINT)
        self.assertEqual(soon(server.connect()), OTHER_VALUE)
        time.sleep(3 * kv.TICK_SECONDS)  # in which it would act on the signal
        self.assertEqual(soon(server.connect()), OTHER_VALUE)
        self.assertEqual(server.stop(), 0)

    def test_killed_and_started_again_on_the_same_port(self):
        server = self.serve()
        with self.assertRaises(GONE), clients_asking(("127.0.0.1", server.port)):
            server.stop(signal.SIGKILL)
        again = command("serve", EXAMPLE, "--port", str(server.port))
        self.assertEqual(self.serve(words=again).ask(KEY)[2], VALUE)

    def loading(self, path, **how):
        """Return a server that loads, and the pipe that it reads, at `path`."""
        os.mkfifo(path)
        pipe = self.enter(open(path, "r+b", 0))
        server = Serving(path, **how)
        self.addCleanup(server.__exit__)
        pipe.write(key(1) + b" first\n")
        until(lambda: not select.select([pipe], [], [], 0)[0])  # it has read that
        return server, pipe

    def pipe_path(self):
        return os.path.join(self.enter(tempfile.TemporaryDirectory()), "pipe")

    def test_signals_during_the_first_load(self):
        """They end it, but SIGHUP causes a reload, once the data is there."""
        for how in (signal.SIGINT, signal.SIGTERM):
            server, _ = self.loading(self.pipe_path())
            self.assertEqual(server.stop(how), 0)
            self.assertEqual(server.lines(), ["kv: stopped"])
        for _ in range(3):
            server, _ = self.loading(self.pipe_path())
            while server.process.poll() is None:
                server.send_signal(signal.SIGTERM)  # one more changes nothing
            self.assertEqual(server.stop(), 0)
            self.assertEqual(server.lines(), ["kv: stopped"])
        path = self.pipe_path()
        server, pipe = self.loading(path)
        server.send_signal(signal.SIGHUP)
        replace(path, key(1) + b" second\n")
        pipe.close()
        with server:
            until(lambda: server.ask(key(1))[2] == b"second")

    def test_its_port_is_taken_during_the_first_load(self):
        """From the beginning, also where an earlier server has left connections."""
        with Serving() as earlier:
            client = earlier.connect()
            client.send(ask_for(KEY, "Connection: close"))
            client.rest()  # so the server has closed first, which leaves TIME_WAIT
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            free_port = unused.getsockname()[1]
        for port in (earlier.port, free_port):
            path = self.pipe_path()
            words = command("serve", path, "--port", str(port))
            server, pipe = self.loading(path, words=words)
            code, _, err = run("serve", EXAMPLE, "--port", str(port))
            self.assertEqual((code, err.count(b"already in use")), (1, 1))
            with self.assertRaises(ConnectionRefusedError):  # it does not listen yet
                socket.create_connection(("127.0.0.1", port))
            pipe.close()
            with server:
                self.assertEqual(server.ask(key(1))[2], b"first")

    def on_terminal(self, *prefix):
        """Return how to serve on a new terminal, and the terminal's other side."""
        master, slave = os.openpty()
        self.enter(open(slave, "wb", 0))
        # A session's first terminal becomes its own.
        prefix = ("sh", "-c", 'exec "$@" 3<>' + os.ttyname(slave), "sh") + prefix
        how = {"prefix": prefix, "stdout": subprocess.DEVNULL, "start_new_session": True,
               "limits": {"HANGUP_SECONDS": 0}}
        return how, self.enter(open(master, "wb", 0))

    @ON_LINUX
    def test_the_terminal_is_closed(self):
        """Then it ends, like any program there, even if it still loads."""
        for is_loading in (False, True):
            how, terminal = self.on_terminal()
            if is_loading:
                server, _ = self.loading(self.pipe_path(), **how)
            else:
                server = self.serve(**how)
                server.reload()  # while the terminal is open
                self.assertRegex(server.lines()[-1], r"reloaded \(10000 before\)$")
            terminal.close()  # the system sends SIGHUP
            self.assertEqual(server.process.wait(PATIENCE), 0)
            until(lambda: server.lines()[-1:] == ["kv: stopped"])

    @ON_LINUX
    @ON_CPYTHON  # see Limitations
    def test_the_terminal_is_closed_under_nohup(self):
        """Then SIGHUP reloads."""
        how, terminal = self.on_terminal("nohup")
        server = self.serve(**how)
        terminal.close()
        until(lambda: b"reloaded" in server.log)
        self.assertEqual(server.ask(KEY)[2], VALUE)
        self.assertEqual(server.stop(), 0)

    @ON_LINUX
    def test_the_terminal_ends_without_a_signal(self):
        """As it does for a shell's jobs in the background: later, SIGHUP reloads."""
        shell = ("import os, sys\nif os.fork(): os.wait()\n"
                 "os.setpgid(0, 0); os.execv(sys.argv[1], sys.argv[1:])")
        how, terminal = self.on_terminal(sys.executable, "-c", shell)
        server = self.serve(**how)
        job = proc(server.pid, "", f"task/{server.pid}/children")
        self.addCleanup(lambda: b"stopped" in server.log or os.kill(job, signal.SIGKILL))
        terminal.close()
        self.assertEqual(server.process.wait(PATIENCE), -signal.SIGHUP)
        time.sleep(3 * kv.TICK_SECONDS)
        os.kill(job, signal.SIGHUP)
        until(lambda: b"reloaded" in server.log)
        os.kill(job, signal.SIGTERM)
        until(lambda: b"stopped" in server.log)


class SeveralKeys(WithExample):
    """GET /KEY,KEY,... and those who ask for many keys."""

    LINE, OTHER_LINE = KEY + b" " + VALUE + b"\n", OTHER_KEY + b" " + OTHER_VALUE + b"\n"
    LISTS = (  # path, status, body
        (KEY + b"," + OTHER_KEY, 200, LINE + OTHER_LINE),
        (OTHER_KEY.upper() + b"," + KEY, 200, OTHER_LINE + LINE),
        (b",".join((KEY, KEY, OTHER_KEY, KEY.upper())), 200, LINE + OTHER_LINE),
        (ABSENT + b"," + KEY, 200, LINE), (ABSENT + b"," + key(1), 200, b""),
        (KEY.replace(b"-", b"%2D") + b"," + OTHER_KEY + b"?x,y", 200, LINE + OTHER_LINE),
        (KEY + b",", 400, b"not a version 4 UUID\n"),
        (b"," + KEY, 400, b"not a version 4 UUID\n"),
        (KEY + b"%2C" + KEY, 400, b"not a version 4 UUID\n"))

    def test_lists(self):
        client = self.server.connect()
        for path, status, body in self.LISTS:
            with self.subTest(path):
                self.assertEqual(client.ask(path)[::2], (status, body))
                got, fields, _ = client.ask(path, method="HEAD")
                size = int(fields["content-length"])
                self.assertEqual((got, size), (status, len(body)))

    def test_as_many_as_the_request_line_holds(self):
        with open(EXAMPLE, "rb") as file:
            lines = list(itertools.islice(file, 216))
        status, _, body = self.server.ask(b",".join(line[:36] for line in lines[:215]))
        self.assertEqual((status, body), (200, b"".join(lines[:215])))
        self.assertEqual(self.server.ask(b",".join(line[:36] for line in lines))[0], 414)

    def test_two_lists_that_come_together(self):
        """They have more parts than a system call takes."""
        content = b"".join(key(n) + b" %d" % n * 9 + b"\n" for n in range(215))
        server = self.serve(content)
        client = server.connect()
        request = ask_for(b",".join(map(key, range(215))))
        client.send(request[:-1])
        server.ask(key(1))  # when this is answered, the beginning has come
        client.send(request[-1:] + request)
        for _ in range(2):
            self.assertEqual(client.answer()[2], content)

    def test_answers_of_middle_size_among_others(self):
        """A thread sends them, and answers what comes behind."""
        content = b"".join(b"%b %b\n" % (key(n), b"x" * 9000) for n in range(5))
        client = self.serve(content).connect()
        path = b",".join(map(key, range(5)))
        for _ in range(3):
            client.send(ask_for(key(1)) + head("HEAD", b"/" + path) + ask_for(path)
                        + ask_for(b"x"))
            self.assertEqual(len(client.answer()[2]), 9000)
            fields = client.answer("HEAD")[1]
            self.assertEqual(int(fields["content-length"]), len(content))
            self.assertEqual(client.answer()[2], content)
            self.assertEqual(client.answer()[0], 400)

    @ON_LINUX
    def test_large_answers_are_not_joined(self):
        """10 clients that ask for megabytes each, of which one takes them."""
        def is_not_joined(sizes, *options):
            content = b"".join(key(n) + b" " + b"%d" % (n % 10) * size + b"\n"
                               for n, size in enumerate(sizes))
            path = b",".join(map(key, range(len(sizes))))
            server = self.serve(content, *options)
            before = server.memory()
            clients = [server.connect(receive_buffer=4096) for _ in range(9)]
            clients.append(server.connect())
            for client in clients:
                client.send(ask_for(path) + ask_for(key(3)))
            until(lambda: server.threads() == 11)
            if sys.implementation.name == "cpython":
                self.assertLess(server.memory() - before, 20000)
            self.assertEqual(client.answer()[2], content)
            self.assertEqual(client.answer()[2], b"")
            until(lambda: server.threads() == 10)

        sizes = (5000000, 9, 5000000, 0, 5000000)
        self.side_by_side(is_not_joined, (
            (sizes,), (sizes, "--sorted"),
            ([30000] * 3 + [0] + [30000] * 196, "--sorted")))

    def test_get_many(self):
        url = self.server.url
        pairs = dict(itertools.islice(example_pairs().items(), 1000))
        asked = [k.decode() for k in pairs] + [ABSENT.decode()]
        found = {k.decode(): value for k, value in pairs.items()}
        self.assertEqual(kv.get_many(asked, url), found)
        forms = [uuid.UUID(KEY.decode()), KEY.decode().upper(), "{%s}" % KEY.decode()]
        self.assertEqual(kv.get_many(iter(forms), url), dict.fromkeys(forms, VALUE))
        self.assertEqual(kv.get_many([], url), {})
        self.assertRaises(ValueError, kv.get_many, ["x"], url)
        self.assertRaises(OSError, kv.get_many, asked, Get.CLOSED)

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
        (404, b"key not found\n"), (200, KEY + b" " + VALUE), (200, b"hello\n"),
        (200, key(1) + b" value\n"))

    def test_servers_that_do_not_know_lists(self):
        self.addCleanup(setattr, kv, "TOGETHER_BYTES", kv.TOGETHER_BYTES)
        kv.TOGETHER_BYTES = 1000
        names = [KEY.decode(), OTHER_KEY.decode()]
        answers = [framed(status, body) for status, body in self.ALONE]
        answers += [framed(200, b"cut off")[:-1], Get.OK + b"X: no length\r\n\r\n"]
        for first in answers:
            alone = [framed(200, VALUE), framed(200, OTHER_VALUE)]
            with self.subTest(first), answering([first] + alone) as (url, asked):
                found = kv.get_many(names, url)
                self.assertEqual(found, dict(zip(names, (VALUE, OTHER_VALUE))))
                self.assertEqual(asked, [",".join(names)] + names)

    def test_a_server_that_fails_in_the_middle(self):
        """The values that came before that are printed."""
        with answering([framed(500, b""), framed(200, OTHER_VALUE),
                        framed(500, b"why")]) as (url, _):
            got = run("get", "--url", url, OTHER_KEY, "nonsense", KEY, ABSENT)
        said = "kv: nonsense: not a UUID\nkv: %s answered 500 X: why\n" % url
        self.assertEqual(got, (2, OTHER_VALUE + b"\n", said.encode()))


@ON_POSIX
class Sockets(Test):
    """Sockets that servers share, and those that systemd hands down."""

    HAND_DOWN = (  # what systemd does between fork and exec
        "import os, sys; os.dup2(int(sys.argv[1]), 3)\n"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=sys.argv[2])\n"
        "os.execv(sys.executable, [sys.executable] + sys.argv[3:])")
    NO_STREAM = "descriptor 3 from systemd: not a listening stream socket"

    def handed_down(self, handed, *arguments, count="1"):
        """Return how to serve on an open socket: the keyword arguments of Serving."""
        descriptor = handed.fileno()
        prefix = [sys.executable, "-c", self.HAND_DOWN, str(descriptor), count]
        serve = command("serve", *(arguments or (EXAMPLE,)))[1:]
        return {"words": prefix + serve, "pass_fds": (descriptor,)}

    def listening(self, address=("127.0.0.1", 0)):
        """Return a listening socket and its address."""
        is_unix = isinstance(address, str)
        family = socket.AF_UNIX if is_unix else socket.AF_INET
        listener = self.enter(socket.socket(family))
        listener.bind(address)
        listener.listen(100)
        return listener, listener.getsockname()

    def on_port(self, path, port):
        return self.serve(words=command(
            "serve", path, "--reuse-port", "--port", str(port)))

    def test_two_servers_on_one_port(self):
        """Both are asked, by new connections; one that does not share it is refused."""
        one = self.serve(EXAMPLE, "--reuse-port")
        code, _, err = run("serve", EXAMPLE, "--port", str(one.port))
        self.assertEqual(code, 1)
        self.assertIn(b"Address already in use", err)
        self.on_port(self.enter(data_file(KEY + b" other\n")), one.port)
        seen = set()
        until(lambda: seen.add(one.ask(KEY)[2]) or len(seen) == 2)
        self.assertEqual(seen, {VALUE, b"other"})

    def test_restarts(self):
        """With a port shared, or a socket handed down, none is refused or lost."""
        def lose_nothing(server, where, is_kept, start):
            with clients_asking(where, again=True, is_kept=is_kept) as answers:
                for _ in range(2):
                    old = server
                    if is_kept:
                        server = start()
                    self.assertEqual(old.stop(), 0)
                    if not is_kept:
                        server = start()
                    answered = len(answers)
                    until(lambda: len(answers) > answered + 100)
            self.assertEqual(set(answers), {(KEY, 200, VALUE)})

        listener, address = self.listening()
        shared = self.serve(EXAMPLE, "--reuse-port")
        down = self.serve(**self.handed_down(listener))
        self.side_by_side(lose_nothing, (
            (shared, ("127.0.0.1", shared.port), True,
             lambda: self.on_port(EXAMPLE, shared.port)),
            (down, address, False, lambda: self.serve(**self.handed_down(listener)))))

    def test_who_waits_to_be_accepted_is_answered(self):
        """Even many requests, and those of more clients than may be connected."""
        def is_answered(count, requests, *options):
            server = self.serve(EXAMPLE, *options)
            server.send_signal(signal.SIGSTOP)
            clients = [server.connect() for _ in range(count)]
            for client in clients:
                client.send(GET_KEY * requests)
            server.send_signal(signal.SIGTERM)
            time.sleep(2 * kv.TICK_SECONDS)  # so that it acts on the signal at once
            server.send_signal(signal.SIGCONT)
            for client in clients:
                statuses = re.findall(rb"HTTP/1.1 (\d+)", client.rest())
                self.assertEqual(statuses, [b"200"] * requests)
            self.assertEqual(server.process.wait(PATIENCE), 0)

        self.side_by_side(is_answered, [(20, 300), (200, 1, "--max-connections", "10")])

    def test_a_socket_that_is_handed_down(self):
        def is_used(address, place, host):
            listener, address = self.listening(address)
            server = self.serve(
                **self.handed_down(listener, EXAMPLE, "--verbose", "--port", "1"))
            with contextlib.closing(Client(address)) as client:
                self.assertEqual(client.ask(KEY)[2], VALUE)
            self.assertTrue(server.url.startswith(place), server.url)
            until(lambda: len(server.lines()) == 2)
            self.assertTrue(server.lines()[1].startswith(host + " - - ["))
            self.assertEqual(server.stop(), 0)

        path = os.path.join(self.enter(tempfile.TemporaryDirectory()), "kv.sock")
        rows = [(("127.0.0.1", 0), "http://127.0.0.1:", "127.0.0.1"),
                (path, "unix:" + path, "unix:")]
        if sys.platform.startswith("linux"):  # an abstract one
            rows.append(("\0kv-%d" % os.getpid(), r"unix:\x00kv", "unix:"))
        self.side_by_side(is_used, rows)

    def test_what_cannot_be_handed_down(self):
        def is_refused(handed, count, said):
            how = self.handed_down(handed, count=count)
            got = finished(how["words"], pass_fds=how["pass_fds"])
            self.assertEqual(got, (1, b"", b"kv: %b\n" % said.encode()))

        file, idle = self.enter(open(EXAMPLE, "rb")), self.enter(socket.socket())
        datagrams = self.enter(socket.socket(type=socket.SOCK_DGRAM))
        self.side_by_side(is_refused, (
            (idle, "2", "LISTEN_FDS is '2', but must be 1: one socket"),
            (idle, "x", "LISTEN_FDS is 'x', but must be 1: one socket"),
            (file, "1", "descriptor 3 from systemd: Socket operation on non-socket"),
            (idle, "1", self.NO_STREAM), (datagrams, "1", self.NO_STREAM)))
        server = self.serve(env=environment(LISTEN_PID="1", LISTEN_FDS="1"))
        self.assertEqual(server.ask(KEY)[2], VALUE)  # the socket is for another process

    @unittest.skipUnless(shutil.which("systemd-socket-activate"), "needs systemd")
    def test_systemd_socket_activate(self):
        path = os.path.join(self.enter(tempfile.TemporaryDirectory()), "kv.sock")
        process = self.enter(subprocess.Popen(
            ["systemd-socket-activate", "-l", path] + command("serve", EXAMPLE),
            stderr=subprocess.PIPE, env=environment()))
        self.addCleanup(process.kill)
        self.assertIn(b"Listening on", process.stderr.readline())
        client = Client(path)
        self.addCleanup(client.close)
        self.assertEqual(client.ask(KEY)[2], VALUE)  # this starts it
        process.terminate()
        log = process.communicate(timeout=PATIENCE)[1]
        self.assertEqual(process.returncode, 0)
        self.assertIn(b" s, on unix:" + path.encode(), log)


class Commands(WithExample):
    """What classes have in common that run commands to their ends."""

    def expect(self, rows):
        """Run rows: arguments, exit code, standard output, messages, and how to run it.

        Arguments have one space between them. How: `stdin`, redirections for `sh`, and
        variables of the environment. $KEY and others are filled in.
        """
        names = {"KEY": KEY.decode(), "OTHER": OTHER_KEY.decode(), "FILE": EXAMPLE,
                 "ABSENT": ABSENT.decode(), "URL": self.server.url,
                 "PORT": str(self.server.port)}

        def fill(text):
            return re.sub(r"\$([A-Z]+)", lambda name: names[name.group(1)], text)

        def work(arguments, code, out, err, how={}):
            how = dict({"KV_URL": "$URL"}, **how)
            how = {name: fill(text) for name, text in how.items()}
            words = command(*map(fill, arguments.split(" ") if arguments else []))
            if "sh" in how:
                words = ["sh", "-c", 'exec "$@" ' + how.pop("sh"), "sh"] + words
            got = finished(words, as_bytes(how.pop("stdin", "")), **how)
            self.assertEqual(got[:2], (code, out), got)
            self.assertRegex(got[2].decode(), saying(fill(err)))

        self.side_by_side(work, rows)


def like(text):
    """Return a pattern of `text`, in which * stands for anything within a line."""
    return re.escape(text).replace(r"\*", ".*")


def saying(text):
    """Return a pattern of messages, one for each line of `text`, as `like` takes it."""
    return r"\A%s\Z" % "".join("kv: %s\n" % like(line) for line in text.splitlines())


def framed(status, body):
    """Return an answer with a body, as `get` expects it."""
    return b"HTTP/1.0 %d X\r\n%bContent-Length: %d\r\n\r\n%b" % (
        status, b"Content-Type: text/plain\r\n", len(body), body)


@contextlib.contextmanager
def answering(answers):
    """Yield the URL of a server that gives one of `answers` after the other, whatever it
    is asked, and a list of the paths that it was asked for.
    """
    def answer_all():
        for answer in answers:
            with listener.accept()[0] as client, contextlib.suppress(OSError):
                client.settimeout(PATIENCE)
                asked.append(client.recv(9999).split()[1][1:].decode())
                client.sendall(answer)

    asked = []
    with socket.socket() as listener, concurrent.futures.ThreadPoolExecutor(1) as pool:
        listener.bind(("127.0.0.1", 0))
        listener.listen(10)
        listener.settimeout(PATIENCE)
        running = pool.submit(answer_all)
        try:
            yield "http://127.0.0.1:%d" % listener.getsockname()[1], asked
        except BaseException:
            listener.shutdown(socket.SHUT_RDWR)  # nobody will ask any more
            raise
        running.result(PATIENCE)


class Get(Commands):
    """The client: what it prints, what it says, how it exits."""

    V, O = VALUE + b"\n", OTHER_VALUE + b"\n"
    MISSING, NONSENSE = "$ABSENT: not found\n", "nonsense: not a UUID\n"
    VERSION_1 = "3479d894-3271-1935-88cf-a06f3cbb80a5"
    CLOSED = "http://127.0.0.1:1"
    NOBODY = ("cannot ask %s: Connection refused; start a server with "
              "`python kv.py serve FILE`, or name another with --url" % CLOSED)
    ROWS = (  # arguments after `get`, exit code, values, messages, how to run it
        ("$KEY", 0, V, ""), (KEY.decode().upper(), 0, V, ""), ("{$KEY}", 0, V, ""),
        ("urn:uuid:$KEY", 0, V, ""), (KEY.decode().replace("-", ""), 0, V, ""),
        ("$OTHER $KEY $OTHER", 0, O + V + O, ""), ("$KEY --timeout 9.5", 0, V, ""),
        ("-", 0, O + V, "", {"stdin": "$OTHER\n$KEY"}), ("-", 0, b"", "", {"stdin": ""}),
        ("$KEY - $KEY", 0, V + O + V, "", {"stdin": "$OTHER"}),
        ("-", 0, O, "", {"stdin": "\n\r\n$OTHER\r\n\n"}),
        ("-", 2, V, "*: not a UUID", {"stdin": "\xff\xfe\n$KEY"}),
        ("$ABSENT", 1, b"", MISSING), ("$ABSENT $KEY $ABSENT", 1, V, MISSING * 2),
        ("nonsense $KEY", 2, V, NONSENSE), ("", 2, b"", "'': not a UUID"),
        ("-", 2, b"", "standard input: a line is too long for a key",
         {"stdin": "x" * 100000}),
        ("-", 2, O, "standard input: a line is too long for a key",
         {"stdin": "$OTHER\n" + "x" * 100000}),
        ("nonsense $ABSENT", 2, b"", NONSENSE + MISSING),
        ("$ABSENT nonsense", 2, b"", MISSING + NONSENSE),
        (VERSION_1, 2, b"", VERSION_1 + ": a UUID, but not of version 4"),
        ("a\x1bb\nc", 2, b"", r"a\x1bb\nc: not a UUID"),
        ("nonsense", 2, b"", NONSENSE, {"KV_URL": CLOSED}),
        ("$KEY", 2, b"", NOBODY, {"KV_URL": CLOSED}),
        ("nonsense $KEY x", 2, b"", NONSENSE + NOBODY, {"KV_URL": CLOSED}),
        ("--url %s $KEY $KEY" % CLOSED, 2, b"", NOBODY),
        ("$KEY --url http://a..b", 2, b"",
         "cannot ask http://a..b: not a valid host name or path"),
        ("$KEY --url $URL/\xe4", 2, b"",
         "cannot ask $URL/\xe4: not a valid host name or path"),
        ("$KEY --url http://no.host.invalid", 2, b"",
         "cannot ask http://no.host.invalid: *"),
        ("$KEY", 2, b"", "127.0.0.1:80: add http://*", {"KV_URL": "127.0.0.1:80"}),
        ("$KEY --url $URL/", 0, V, "", {"KV_URL": CLOSED}),
        ("$KEY", 0, V, "", {"http_proxy": CLOSED}),
        ("$KEY --url http://LOCALHOST:$PORT", 0, V, "", {"http_proxy": CLOSED}),
        ("$KEY --url http://127.1:$PORT", 0, V, "", {"http_proxy": CLOSED}),
        ("$KEY --url http://[0:0:0:0:0:0:0:1]:1", 2, b"",
         "cannot ask http://[0:0:0:0:0:0:0:1]:1: *", {"http_proxy": "$URL"}),
        ("$KEY --url http://[::ffff:127.0.0.1]:1", 2, b"",
         "cannot ask http://[::ffff:127.0.0.1]:1: *", {"http_proxy": "$URL"}),
        ("$KEY --url http://kv.example", 0, V, "", {"http_proxy": "$URL"}),
        ("$KEY --url http://kv.example", 2, b"", "cannot ask http://kv.example: *",
         {"http_proxy": "$URL", "no_proxy": "kv.example"}),
        ("$KEY --url http://kv.example", 2, b"",
         "cannot ask http://kv.example through the proxy 127.0.0.1:1: Connection refused",
         {"http_proxy": "http://me:secret@127.0.0.1:1"}),
        ("$KEY --url https://127.0.0.1:$PORT", 2, b"", "cannot ask "
         "https://127.0.0.1:$PORT: the server does not speak TLS; use http://"),
        ("$KEY --url $URL/below", 2, b"",
         "$URL/below answered 400 Bad Request: not a version 4 UUID"))
    STREAMS = (  # the same, but with `get`
        ("get $KEY", 2, b"", "standard output: Bad file descriptor", {"sh": ">&-"}),
        ("get $KEY", 2, b"", "standard output: No space left on device",
         {"sh": ">/dev/full"}),
        ("get $KEY", 0, V, "", {"sh": "2>&-"}),
        ("get $ABSENT", 1, b"", "", {"sh": "2>/dev/full"}),
        ("get -", 2, b"", "standard input: Bad file descriptor", {"sh": "<&-"}),
        ("serve - --port 0", 1, b"", "standard input: closed", {"sh": "<&-"}))

    OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
    TWO = OK + b"Content-Length: 2\r\n"
    TYPE = "cannot ask URL: unexpected Content-Type; is this another kind of server?"
    LENGTH = "cannot ask URL: missing, repeated or malformed Content-Length"
    CODING = "cannot ask URL: unexpected Content-Encoding or Transfer-Encoding"
    MOVED = b"HTTP/1.1 %b\r\nLocation: %b\r\nContent-Length: 0\r\n\r\n"
    STRANGE = (  # what something else answers, and what is said of it
        (b"", "cannot ask URL: the connection was closed without an answer"),
        (b"SSH-2.0-x\r\n", "cannot ask URL: not an HTTP/1.1 server: SSH-2.0-x"),
        (b"HTTP/2 200 OK\r\n\r\n", "cannot ask URL: not an HTTP/1.1 server: HTTP/2"),
        (b"HTTP/1.1 500 Broken\r\n\r\n", "URL answered 500 Broken"),
        (b"HTTP/1.1 500 B\x1bd\r\n\r\nit \x1b[2J broke\nmore",
         r"URL answered 500 B\x1bd: it \x1b[2J broke"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n<html>", "URL answered 404 Not Found: <html>"),
        (b"HTTP/1.1 404 Not Found\r\nServer: kv/2.0\r\nContent-Length: 3\r\n\r\nno\n",
         "URL answered 404 Not Found: no"),
        (b"HTTP/1.1 404 No\r\n\r\n" + b"x" * 9000,
         "URL answered 404 No: %s..." % ("x" * 192)),
        (MOVED % (b"301 Moved", b"http://127.0.0.1:1/"), "URL answered 301 Moved"),
        (MOVED % (b"302 Found", b"http://[::1"), "URL answered 302 Found"),
        (b"HTTP/1.1 204 None\r\n\r\n", "URL answered 204 None"),
        (b"HTTP/1.1 206 Part\r\nContent-Length: 2\r\n\r\nab",
         "URL answered 206 Part: ab"),
        (TWO + b"Content-Type: text/html\r\n\r\nab", TYPE),
        (TWO.replace(b"text/plain", b"text/html") + b"\r\nab", TYPE),
        (TWO.replace(b"text/plain", b"html") + b"\r\nab", TYPE),
        (TWO.replace(b"Content-Type", b"X") + b"\r\nab", TYPE),
        (TWO + b"garbage\r\nContent-Length: 3\r\n\r\nabc",
         "cannot ask URL: malformed header fields"),
        (OK + b"\r\nendless", LENGTH), (TWO + b"Content-Length: 2\r\n\r\nab", LENGTH),
        (TWO + b"Content-Length: 3\r\n\r\nabc", LENGTH),
        (OK + b"Content-Length: 2, 2\r\n\r\nab", LENGTH),
        (OK + b"Content-Length: -2\r\n\r\nab", LENGTH),
        (OK + b"Content-Length: 9\r\n\r\nshort",
         "cannot ask URL: the answer ended 4 bytes early"),
        (OK + b"Content-Length: 10000000000000\r\n\r\n" + b"x" * 100000,
         "cannot ask URL: the answer has 10000000000000 bytes, more than 2147483647"),
        (TWO + b"Content-Encoding: gzip\r\n\r\nab", CODING),
        (TWO + b"Content-Encoding:\r\n\r\nab", CODING),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n", CODING),
        (b"HTTP/1.1 500 X\r\nTransfer-Encoding: chunked\r\n\r\nx", "URL answered 500 X"),
        (b"HTTP/1.1 500 X\r\nTransfer-Encoding: chunked\r\n\r\n-e\r\nno\r\n0\r\n\r\n",
         "URL answered 500 X"),
        (OK + b"X: y\r\n" * 200 + b"\r\n", "cannot ask URL: *"),
        (OK + b"X: " + b"y" * 70000 + b"\r\n\r\n", "cannot ask URL: *"))

    QUERY = "a query or a fragment is not allowed"
    UNUSABLE = (  # options, and what is said of them
        ("--url localhost:80", "localhost:80: add http:// before it"),
        ("--url ", "the URL is empty"),
        ("--url ftp://kv", "ftp://kv: the scheme must be http or https"),
        ("--url file:///x", "file:///x: the scheme must be http or https"),
        ("--url http://kv#x", "http://kv#x: " + QUERY),
        ("--url http://kv?x", "http://kv?x: " + QUERY),
        ("--url http://me@kv",
         "http://me@kv: user names and passwords are not supported"),
        ("--url http://", "http://: the host is missing"),
        ("--url http://h:73536",
         "http://h:73536: the port must be a number from 1 to 65535"),
        ("--url http://h:port", "http://h:port: the port must be a number *"),
        ("--url http://h:00", "http://h:00: the port must be a number *"),
        ("--url http://[::1", "http://[::1: Invalid IPv6 URL"),
        ("--url http://\x1b\n", r"http://\x1b\n: spaces and control *"),
        ("--timeout 0", "timeout 0: must be above 0 and at most 1000000 seconds"),
        ("--timeout nan", "timeout nan: must be above 0 *"),
        ("--timeout 1e10", "timeout 1e+10: must be above 0 *"))

    def test_output_messages_and_exit_codes(self):
        self.expect(("get " + arguments, *row) for arguments, *row in self.ROWS)
        self.expect(("get - " + options, 2, b"", said, {"stdin": ""})  # before any key
                    for options, said in self.UNUSABLE)

    @ON_LINUX
    def test_streams_that_are_closed_or_full(self):
        self.expect(self.STREAMS)

    def test_answers_that_are_not_from_kv(self):
        def is_told(answer, said):
            with answering([answer]) as (url, _):
                code, out, err = run("get", KEY, "--url", url)
            self.assertEqual((code, out), (2, b""))
            self.assertRegex(err.decode().replace(url, "URL"), saying(said))

        self.side_by_side(is_told, self.STRANGE)

    def test_a_server_that_does_not_answer(self):
        silent = self.enter(socket.socket())
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        url = "http://127.0.0.1:%d" % silent.getsockname()[1]
        self.expect([("get $KEY $OTHER --timeout 0.2 --url " + url, 2, b"",
                      "cannot ask %s: no answer within 0.2 s" % url)])

    @ON_POSIX
    def test_a_get_that_waits_for_more_keys(self):
        """It ends in silence if its reader has enough, or after Ctrl-C."""
        for how, code in ((None, 0), (signal.SIGINT, 130)):
            process = self.enter(subprocess.Popen(
                command("get", "-", "--url", self.server.url), env=environment(),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                bufsize=0))
            self.addCleanup(process.kill)
            process.stdin.write(KEY + b"\n")
            self.assertTrue(select.select([process.stdout], [], [], PATIENCE)[0])
            self.assertEqual(process.stdout.read(1000), self.V)
            if how:
                process.send_signal(how)
            else:  # like `kv.py get ... | head -1`
                process.stdout.close()
                process.stdin.write((KEY + b"\n") * 3)
                process.stdin.close()
            self.assertEqual((process.wait(PATIENCE), process.stderr.read()), (code, b""))

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

    UNKNOWN = "unrecognized arguments: "
    COUNT, PORT = " is not between 1 and 1000000", " is not between 0 and 65535"
    WRONG = (  # arguments, and what is said of them before "(see kv.py COMMAND --help)"
        ("", "the following arguments are required: serve | get"),
        ("fetch", "serve | get: invalid choice: 'fetch' (choose from *)"),
        ("$FILE", "did you mean `kv.py serve $FILE`?"),
        ("--port 1 $FILE", "did you mean `kv.py serve $FILE`?"),
        ("$KEY", "did you mean `kv.py get $KEY`?"),
        ("--verbose serve $FILE", UNKNOWN + "--verbose"),
        ("serve", "the following arguments are required: FILE"),
        ("serve $FILE b", UNKNOWN + "b"), ("serve $FILE --prot 1", UNKNOWN + "--prot 1"),
        ("serve $FILE --port 99999", "--port: 99999" + PORT),
        ("serve $FILE --port -1", "--port: -1" + PORT),
        ("serve $FILE --port http", "--port: http" + PORT),
        ("serve $FILE --max-connections 0", "--max-connections: 0" + COUNT),
        ("serve - --sorted", "--sorted is only for regular files"),
        ("serve /dev/null --sorted", "--sorted is only for regular files"),
        ("serve $FILE --no-check", "--no-check requires --sorted"),
        ("get", "the following arguments are required: KEY"),
        ("get $KEY --timeout x", "--timeout: invalid float value: 'x'"))
    CANNOT_LISTEN = (  # where, and why it is said to be impossible
        ("no.host.invalid:8000", "*"), ("a..b:8000", "not a valid host name"),
        ("203.0.113.1:8000", "Can* assign requested address"),
        ("[2001:db8::1]:8000", "*"),
        ("127.0.0.1:$PORT", "Address already in use (--port takes another)"))
    HELP = (  # arguments, what is among the output
        ("--help", "serve", "get", "--version"), ("--version", "kv " + kv.__version__),
        ("serve --help", "127.0.0.1", "8000", "--verbose", "10000", "--sorted"),
        ("get --help", "http://127.0.0.1:8000", "KV_URL", "10 s"))
    HOSTS = (  # --host, the same in the URL, hosts that clients name
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"), ("localhost", "*", "localhost"),
        ("0.0.0.0", "0.0.0.0", "127.0.0.1"), ("::1", "[::1]", "[::1]"),
        ("[::1]", "[::1]", "[::1]"), ("::", "[::]", "[::1]", "127.0.0.1"))
    REQUESTS = (  # method, path, the end of the line in the log, where * is anything
        ("GET", KEY, 'GET /%s HTTP/1.1" 200 15' % KEY.decode()),
        ("HEAD", KEY, 'HEAD /%s HTTP/1.1" 200 0' % KEY.decode()),
        ("GET", b"\x1b[2J\"\\\x7f\xe9", r'GET /\x1b[2J\"\\\x7f\xe9 HTTP/1.1" 400 *'),
        ("GET", b"x" * 7900, 'GET /xxx*x" 400 21'))
    SHOWN = rb"(\r\x1b\[K%b%% read, \d+ pairs, \d+ pairs/s)+\r\x1b\[K"
    PROGRESS = (  # TERM, PROGRESS_SECONDS, FILE, its name, what is shown at first
        ("xterm", 0, "-", "standard input", SHOWN % rb"\?"),
        ("xterm", 0, EXAMPLE, EXAMPLE, SHOWN % rb"\d+"),
        ("xterm", 1000, "-", "standard input", b""),
        ("dumb", 0, "-", "standard input", b""))

    def test_wrong_usage(self):
        def page(arguments):
            return "".join(re.findall("serve |get ", arguments + " "))

        self.expect((line, 2, b"", "%s (see kv.py %s--help)" % (said, page(line)))
                    for line, said in self.WRONG)

    def test_what_cannot_be_listened_on(self):
        """That is found out before anything is loaded."""
        self.expect(("serve /no/such/file --host %s --port %s" % tuple(
            place.rsplit(":", 1)), 1, b"", "cannot listen on %s: %s" % (place, why))
                    for place, why in self.CANNOT_LISTEN)

    def test_help_and_version(self):
        for arguments, *words in self.HELP:
            code, out, err = run(*arguments.split())
            self.assertEqual((code, err), (0, b""))
            for word in words:
                self.assertIn(word, out.decode())

    def test_the_log(self):
        """With times, and with --verbose in Common Log Format: long lines are cut."""
        moment = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[-+]\d\d:\d\d"
        ready = r" kv: 10000 pairs of %s in \d+\.\d\d s, on http://127\.0\.0\.1:\d+"
        request = (r'127\.0\.0\.1 - - \[\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d '
                   r'[-+]\d{4}\] "')
        for options, requests in (((), ()), (("--verbose",), self.REQUESTS)):
            server = self.serve(EXAMPLE, *options)
            for method, path, _ in self.REQUESTS:
                server.ask(path, method=method)
            self.assertEqual(server.stop(), 0)
            lines = server.log.decode("ascii").splitlines()
            patterns = [moment + ready % re.escape(EXAMPLE),
                        *(request + like(end) for *_, end in requests),
                        moment + " kv: stopped"]
            self.assertEqual(len(lines), len(patterns))
            for line, pattern in zip(lines, patterns):
                self.assertRegex(line, r"\A%s\Z" % pattern)
        self.assertLess(max(map(len, lines)), kv.LOG_LINE_BYTES)  # no pipe tears these

    @ON_POSIX
    def test_progress_on_a_terminal(self):
        def is_shown(term, seconds, path, name, progress):
            server = Unread(
                os.openpty, path, limits={"PROGRESS_SECONDS": seconds},
                env=environment(TERM=term), stdin=subprocess.PIPE)
            self.addCleanup(server.__exit__)
            with server.process.stdin as stdin:
                stdin.write(b"".join(key(n) + b" v\n" for n in range(1000)))
            with server:
                self.assertRegex(server.log, rb"\A%b\Z" % (
                    progress + rb"kv: \d+ pairs of %b in \d+\.\d\d s, on http://\S+\r\n"
                    % re.escape(name).encode()))

        self.side_by_side(is_shown, self.PROGRESS)

    @ON_POSIX
    def test_a_terminal_as_data_file(self):
        master, slave = os.openpty()
        self.addCleanup(os.close, master)
        self.addCleanup(os.close, slave)
        os.write(master, KEY + b" typed\n\x04")  # Ctrl-D
        self.assertEqual(self.serve(os.ttyname(slave)).ask(KEY)[2], b"typed")

    def test_a_name_that_has_addresses_of_both_families(self):
        found = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
                 (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]
        with unittest.mock.patch("socket.getaddrinfo", return_value=found):
            self.assertEqual(server_here(self).socket.family, socket.AF_INET)

    def test_hosts(self):
        def serves(host, shown, *names):
            server = self.serve(EXAMPLE, "--host", host)
            self.assertRegex(server.url, like("http://%s:%d" % (shown, server.port)))
            for name in names:
                url = "http://%s:%d" % (name, server.port)
                self.assertEqual(run("get", KEY, "--url", url), (0, VALUE + b"\n", b""))

        self.side_by_side(serves, self.HOSTS if has_ipv6() else self.HOSTS[:3])

    @ON_LINUX
    @NEEDS_STRACE
    @unittest.skipUnless(has_ipv6(), "needs IPv6")
    def test_where_ipv6_cannot_be_without_ipv4(self):
        """As on OpenBSD: only `::` needs that option of the socket."""
        failing = "inject=setsockopt:error=ENOPROTOOPT:when=1"
        strace = ["strace", "-qq", "-o", os.devnull, "-e", failing]
        code, _, err = finished(
            strace + command("serve", EXAMPLE, "--host", "::", "--port", "0"))
        self.assertEqual(code, 1)
        said = saying("cannot listen on [::]:0: Protocol not available")
        self.assertRegex(err.decode(), said)
        trace = self.enter(tempfile.NamedTemporaryFile())
        strace = ("strace", "-D", "-qq", "-o", trace.name, "-e", "trace=setsockopt")
        self.serve(EXAMPLE, "--host", "::1", prefix=strace).stop()
        self.assertNotIn(b"V6ONLY", trace.read())

    def test_older_pythons_are_told(self):
        root = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
        paths = glob.glob(root + "/versions/3.6.*/bin/python")
        if not paths:
            self.skipTest("no Python 3.6 here")
        code, out, err = finished([paths[0], os.path.join(HERE, "kv.py"), "--version"])
        self.assertEqual((code, out), (1, b""))
        self.assertRegex(
            err.decode(), saying("needs Python 3.7 or newer, but this is 3.6"))


README = ""
with contextlib.suppress(OSError), open(os.path.join(HERE, "README.md"), "rb") as file_:
    README = file_.read().decode()
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/local/sbin:/usr/sbin")


@ON_POSIX
@unittest.skipUnless(README, "needs README.md")
class Readme(Test):
    """What README.md shows, word for word, where only kv.py and example.data are."""

    SERVE = "python kv.py serve example.data"
    BLOCKS = re.findall(r"(?m)^    \$ .*\n(?:(?:    .*)?\n)*", README)
    EXAMPLES = [  # commands, and what they print
        example for block in BLOCKS for example in re.findall(
            r"(?m)^    \$ (.*)\n((?:(?:    (?!\$ ).*)?\n)*)", block)]
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
        folder = self.enter(tempfile.TemporaryDirectory())
        paths = []
        for name in ("kv.socket", "kv.service"):
            block = re.search(r"(?m)^    # %s\n((?:    .*\n)+)" % name, README).group(1)
            paths.append(os.path.join(folder, name))
            replace(paths[-1], re.sub(r"(?m)^    ", "", block).encode())
        done = finished(["systemd-analyze", "verify"] + paths)
        self.assertEqual(done, (0, b"", b""))

    def same(self, output, shown):
        """Compare what a command has written (bytes) with what README.md shows (str)."""
        both = [output.decode(), re.sub("(?m)^    ", "", shown)]
        for pattern, put in self.DIFFERS:
            both = [re.sub(pattern, put, text).strip("\n") for text in both]
        self.assertEqual(*both)

    def folder(self):
        """Return a folder for the examples, and the environment that they run in."""
        folder = self.enter(tempfile.TemporaryDirectory())
        for name in ("kv.py", "example.data"):
            shutil.copy(os.path.join(HERE, name), folder)
        programs = self.enter(tempfile.TemporaryDirectory())
        python = os.path.join(programs, "python")
        replace(python, b'#!/bin/sh\nexec "%b" "$@"\n' % os.fsencode(sys.executable))
        os.chmod(python, 0o700)
        replace(os.path.join(programs, ".curlrc"), b"silent\n")  # as on a terminal
        path = programs + os.pathsep + os.environ["PATH"]
        return folder, {"PATH": path, "CURL_HOME": programs}

    def test_examples(self):
        self.assertIn("python kv.py get", [line[:16] for line, _ in self.EXAMPLES])
        folder, env = self.folder()
        server = self.enter(contextlib.ExitStack())
        for line, shown in [(self.SERVE + " &", "")] + self.EXAMPLES:
            with self.subTest(line):
                if "curl " in line and not shutil.which("curl"):
                    self.skipTest("needs curl")
                is_server = line.endswith("&") or "on http" in shown
                if " serve " not in line or not is_server:
                    script = 'cd "$0" && eval "$1" 2>&1'
                    done = finished(["sh", "-c", script, folder, line], **env)
                    self.same(done[1], shown)
                    continue
                server.close()  # the one before
                port = int((re.findall(r"--port (\d+)", line) or [8000])[0])
                with contextlib.suppress(OSError):
                    Client(("127.0.0.1", port)).close()
                    self.skipTest("port %d is taken" % port)
                words = ["sh", "-c", "exec " + line.rstrip(" &")]
                started = server.enter_context(
                    Serving(words=words, cwd=folder, env=environment(**env)))
                self.same(started.log, shown or started.log.decode())


@ON_POSIX
@unittest.skipUnless(README and NGINX, "needs README.md and nginx")
class PastOneMachine(Test):
    """README.md's configurations of nginx, with other ports, in front of real servers."""

    ODD = [(b"%x" % (n % 16) + key(n)[1:], value) for n, value in enumerate(Lines.VALUES)]
    ODD_PATHS = (b"F" + ABSENT[1:], ABSENT, KEY[1:], b"%33" + KEY[1:], KEY + b"?",
                 b"/" + KEY, b"nonsense")
    KEYS = [key(number) for number in range(100, 1100)]

    def setUp(self):
        self.folder = self.enter(tempfile.TemporaryDirectory())

    def held_port(self):
        """Return a port that the system gives only to those who ask for it."""
        holder = self.enter(socket.socket())
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        return holder.getsockname()[1]

    def start(self, name, port):
        """Start a server of a file in the folder."""
        path = os.path.join(self.folder, name)
        return self.serve(words=command("serve", path, "--port", str(port)))

    def start_proxy(self, name, servers):
        """Run what README.md has the file `name` for; return where it answers."""
        how, content = re.search(
            r"(?m)^    # %s, run by: nginx (.*)\n((?:    .*\n)+)" % name, README).groups()
        address = ("127.0.0.1", self.held_port())
        places = {"8080": "%s:%d" % address}
        for number, server in enumerate(servers, 8001):
            places[str(number)] = str(server.port)
        content = re.sub(r"\b80\d\d\b", lambda port: places.pop(port.group()), content)
        replace(os.path.join(self.folder, name), content.encode())
        self.assertEqual(places, {})  # it has each of them once
        nginx = Serving(words=[NGINX] + how.split(), cwd=self.folder)
        self.addCleanup(nginx.__exit__)
        self.addCleanup(nginx.stop)

        def listens():
            self.assertIsNone(nginx.process.poll(), nginx.log)
            with contextlib.suppress(OSError):
                Client(address).close()
                return True

        until(listens)
        return address

    def expect_answers_as_of(self, server, address):
        """Whatever is asked at `address` is answered as by `server`."""
        client, direct = self.enter(contextlib.closing(Client(address))), server.connect()
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

    def test_shards(self):
        with open(EXAMPLE, "rb") as file:
            lines = file.read().split(b"\n")[:-1]
        odd = [k.upper() + b" " + value for k, value in self.ODD]
        content = b"\n\n".join(lines + odd) + b"\n"
        replace(os.path.join(self.folder, "example.data"), content)
        script = 'cd "$0"\n' + "".join(re.findall(r"(?m)^    (.* grep .*\n)", README))
        done = finished(["sh", "-e", "-c", script, self.folder])
        self.assertEqual(done, (0, b"", b""))
        servers = [self.start("%d.data" % n, 0) for n in range(4)]
        address = self.start_proxy("shards.conf", servers)
        self.expect_answers_as_of(self.start("example.data", 0), address)
        values = {line[:36]: line[37:] for line in lines}
        keys = [line[:36].decode() for line in lines[:1000]]
        found = kv.get_many(keys, "http://%s:%d" % address)
        self.assertEqual(found, {k: values[k.encode()] for k in keys})
        with clients_asking(address, list(values), again=True) as answers:
            until(lambda: len(answers) > 3000)
        for k, status, body in answers:
            self.assertEqual((status, body), (200, values[k]))

    def write(self, name, word):
        """Write a file in which the value of each of KEYS is `word` and the key."""
        pairs = [(k, word + b" " + k) for k in self.KEYS] + self.ODD
        content = b"".join(b"%b %b\n" % pair for pair in pairs)
        replace(os.path.join(self.folder, name), content)

    def test_replicas(self):
        """Restart one, stop the other, reload the first, while clients ask on."""
        def wait(*words):  # until answers with all of these have come from now on
            begin = len(answers)
            until(lambda: words == tuple(
                word for word in words if any(body.startswith(word)
                                              for *_, body in answers[begin:])))

        names = ("0.data", "1.data")
        for name in names:
            self.write(name, b"first " + name.encode())
        servers = [self.start(name, self.held_port()) for name in names]
        address = self.start_proxy("replicas.conf", servers)
        self.expect_answers_as_of(servers[0], address)
        with clients_asking(address, self.KEYS, again=True, count=4) as answers:
            wait(b"first 0.data", b"first 1.data")
            self.write("0.data", b"again 0.data")
            self.assertEqual(servers[0].stop(), 0)
            wait(b"first 1.data")
            again = self.start("0.data", servers[0].port)
            wait(b"again 0.data")
            self.assertEqual(servers[1].stop(), 0)
            wait(b"again 0.data")
            self.write("0.data", b"reloaded 0.data")
            again.reload()
            wait(b"reloaded 0.data")
        for k, status, body in answers:
            self.assertEqual((status, body[-37:]), (200, b" " + k))


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
ready = "plain: in 0 s, on http://127.0.0.1:%d" % server.server_port
print(ready, file=sys.stderr, flush=True)
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
    ("plain", PLAIN_LOAD,
     [sys.executable, "-c", PLAIN], [sys.executable, "-c", PLAIN_GET]))
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
                link.sendall(ask_for(line[:36], fields))
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
            ("a new connection each", {"fields": b"Connection: close"})):
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
    with Serving(words=serve + [one], start_new_session=True) as server:
        empty = resident(server)  # the same program, with no data to speak of
    start = time.perf_counter()
    server = stack.enter_context(
        Serving(words=serve + [path], start_new_session=True))
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
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(dir=HERE, prefix=".bench-"))
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
            served = ordered if row[0] == "sorted" else path
            servers.append(start_measured(stack, row, served, one))
        figures = {}  # by name, for each round those of all servers
        for _ in range(ROUNDS):
            measuring = [measure(server, count, sample, some[0]) for server in servers]
            for pairs in zip(*measuring):
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
    """Print one figure of all MEASURED, and how much the first is better than the last.
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
