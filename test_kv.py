"""Tests of kv.py: they run it as a program and talk to it over real sockets.

    python -m unittest                  all tests
    python test_kv.py bench [FILE]      the benchmark, with 1,000,000 made-up pairs without FILE
"""
import concurrent.futures
import contextlib
import itertools
import math
import os
import platform
import random
import re
import select
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
ABSENT = b"00000000-0000-4000-8000-000000000000"   # not in it
PATIENCE = 30                                      # seconds until a test gives up waiting
ON_POSIX = unittest.skipUnless(os.name == "posix", "needs POSIX")


def key(number):
    """Return the version 4 UUID (bytes) with this number at its end."""
    return b"a0000000-0000-4000-8000-%012x" % number


def command(*arguments):
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


def side_by_side(work, rows):
    """Call `work(*row)` for each of `rows`, a few at a time; yield each row and its future."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        yield from zip(rows, [pool.submit(work, *row) for row in rows])


@contextlib.contextmanager
def data_file(content):
    """A file in a folder of its own, called test.data, that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "test.data")
        with open(path, "wb") as file:
            file.write(content)
        yield path


def free_port(remainder, divisor):
    """Return a port that nobody listens on, and that leaves this remainder."""
    while True:
        port = random.randrange(10000, 30000)  # systems choose from higher ones by themselves
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            if port % divisor == remainder:
                return port


def until(condition):
    """Wait until `condition()` is true and return what it returned."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError("waited in vain for %s" % condition)


class Serving:
    """`kv.py serve`, from when it is ready until it is stopped; `log` is its standard error."""

    def __init__(self, *arguments, **how):
        self.process = subprocess.Popen(
            how.pop("command", None) or command("serve", "--port", "0", *arguments),
            stderr=subprocess.PIPE, env=environment(), **how)
        self.log = b""
        self.reader = threading.Thread(target=self.read_log)
        self.reader.start()

    def read_log(self):
        for line in self.process.stderr:
            self.log += line

    def __enter__(self):
        try:
            until(lambda: b" on http://" in self.log or self.process.poll() is not None)
            self.url, self.port = re.search(r" on (http://.*:(\d+))\n", self.log.decode()).groups()
            self.port = int(self.port)
        except BaseException:
            self.__exit__()
            raise
        return self

    def stop(self, how=signal.SIGTERM):
        """End the process; return its exit code."""
        self.process.send_signal(how)
        return self.process.wait(PATIENCE)

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.stop(signal.SIGKILL)
        self.reader.join()
        self.process.stderr.close()
        assert b"Traceback" not in self.log, self.log.decode()

    def connect(self):
        return Connection(("127.0.0.1", self.port))


class Connection:
    """A client with nothing clever in it: bytes out, answers in."""

    def __init__(self, address):
        self.socket = socket.create_connection(address, PATIENCE)
        self.received = b""

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

    def answer(self, method="GET"):
        """Return status (int), fields (lower-case str: str) and body (bytes) of the next answer."""
        while b"\r\n\r\n" not in self.received:
            if not self.receive():
                raise EOFError("no answer, but %r" % self.received)
        head, _, self.received = self.received.partition(b"\r\n\r\n")
        line, *lines = head.decode("latin-1").split("\r\n")
        fields = {}
        for name, value in (line.split(": ", 1) for line in lines):
            assert name.lower() not in fields, head
            fields[name.lower()] = value
        status = int(re.match(r"HTTP/1\.1 (\d{3}) \S", line).group(1))
        size = 0 if method == "HEAD" or status == 204 else int(fields["content-length"])
        while len(self.received) < size:
            if not self.receive():
                raise EOFError("the answer breaks off: %r" % self.received)
        body, self.received = self.received[:size], self.received[size:]
        return status, fields, body

    def ask(self, key, method="GET", fields=b""):
        self.send(method.encode() + b" /" + key + b" HTTP/1.1\r\nHost: kv\r\n" + fields + b"\r\n")
        return self.answer(method)

    def rest(self):
        """Return all that comes until the server closes the connection."""
        while self.receive():
            pass
        return self.received


def setUpModule():
    # a script's `python -m unittest &` ignores Ctrl-C, and what it starts would do so too
    signal.signal(signal.SIGINT, signal.default_int_handler)


class ExampleTest(unittest.TestCase):
    """All tests of a class that comes of this one share a server of example.data."""

    @classmethod
    def setUpClass(cls):
        cls.server = Serving(EXAMPLE).__enter__()

    @classmethod
    def tearDownClass(cls):
        cls.server.__exit__()


class DataFileTest(unittest.TestCase):
    """Section 1: what a line may hold, and what refuses the file."""

    VALUES = (b"", b" ", b" starts with a space", b"ends with spaces  ", b"\t", b"a\tb", b"\r",
              b"carriage\rreturn", b"ends with one\r", b"\0", b"n\0u\0l", b"\x0b", b"\x0c", b"\x1c",
              b"\x85", b"\xc2\x85", b"\xe2\x80\xa8", b"\xff\xfe no UTF-8 \x80", key(1), b"%s %d %%",
              "\u00e4\u20ac\U0001f600".encode(), b"\xef\xbb\xbf", bytes(set(range(256)) - {10}),
              b"x" * 70000, b"HTTP/1.1 200 OK\r")

    def test_every_value_arrives_as_it_is(self):
        pairs = {key(n): value for n, value in enumerate(self.VALUES)}
        lines = [k + b" " + v for k, v in pairs.items()]
        for content, *options in (
                (b"\n".join(lines),), (b"\n".join(lines) + b"\n",),
                (b"\n\n" + b"\n\n".join(reversed(lines)) + b"\n\n",),
                (b"\n".join(lines), "--sorted"), (b"\n".join(lines) + b"\n", "--sorted"),
                (b"\n\n" + b"\n\n".join(lines) + b"\n\n", "--sorted", "--no-check")):
            with data_file(content) as path, Serving(path, *options) as server:
                if not options:
                    self.assertEqual(kv.load(path), pairs)
                if content == b"\n".join(lines):
                    code, out, err = run("get", "--url", server.url, *pairs)
                    self.assertEqual((code, err), (0, b""))
                    self.assertEqual(out, b"".join(v + b"\n" for v in pairs.values()))
                with server.connect() as client:
                    for k, value in pairs.items():
                        self.assertEqual(client.ask(k)[::2], (200, value))

    def test_keys_in_either_case(self):
        lines = (b"A0000000-0000-4000-8000-00000000000A upper\n"
                 b"a0000000-0000-4000-B000-00000000000b x")
        with data_file(lines) as path:
            self.assertEqual(kv.load(path), {key(10): b"upper",
                                             b"a0000000-0000-4000-b000-00000000000b": b"x"})

    def test_many_pieces(self):
        """Blank lines, upper case and long values wherever a piece may end."""
        pairs = {key(n): b"v" * (n % 97) for n in range(20000)}
        pairs[key(777)] = b"long" * kv.PIECE_BYTES
        content = b"".join(
            (k.upper() if n % 5000 == 1 else k) + b" " + v + b"\n" * (1 + (n % 7000 == 2))
            for n, (k, v) in enumerate(pairs.items()))
        with data_file(content) as path:
            self.assertEqual(kv.load(path), pairs)

    K = key(1)
    NO_KEY = "no version 4 UUID at the start of the line"
    BAD = (  # what the file holds, then the number, fault and bytes of each line to be named
        (K, (1, "no space after the key", K)),
        (K + b"\tv\n", (1, "no space after the key", K + b"\tv")),
        (K + b"\x00v\n", (1, "no space after the key", K + b"\x00v")),
        (K + b"\r\n", (1, "no space after the key", K + b"\r")),
        (b"nonsense\n", (1, NO_KEY, b"nonsense")),
        (b" " + K + b" v\n", (1, NO_KEY, b" " + K + b" v")),
        (b"\r\n", (1, NO_KEY, b"\r")),
        (b" \n", (1, NO_KEY, b" ")),
        (K[:-1] + b" v\n", (1, NO_KEY, K[:-1] + b" v")),
        (K + b"0 v\n", (1, "no space after the key", K + b"0 v")),
        (K.replace(b"-", b"") + b" v\n", (1, NO_KEY, K.replace(b"-", b"") + b" v")),
        (b"{" + K + b"} v\n", (1, NO_KEY, b"{" + K + b"} v")),
        (K.replace(b"-4", b"-1") + b" v\n", (1, NO_KEY, K.replace(b"-4", b"-1") + b" v")),
        (K.replace(b"-8", b"-7") + b" v\n", (1, NO_KEY, K.replace(b"-8", b"-7") + b" v")),
        (K.replace(b"-8", b"-c") + b" v\n", (1, NO_KEY, K.replace(b"-8", b"-c") + b" v")),
        (K.replace(b"a", b"g") + b" v\n", (1, NO_KEY, K.replace(b"a", b"g") + b" v")),
        (K.replace(b"1", b"\xb9") + b" v\n", (1, NO_KEY, K.replace(b"1", b"\xb9") + b" v")),
        (b"\xef\xbb\xbf" + K + b" v\n", (1, "a byte order mark", b"\xef\xbb\xbf" + K + b" v")),
        (b"\xff\xfe" + K + b" v\n", (1, "a byte order mark", b"\xff\xfe" + K + b" v")),
        (K + b" v\r" + key(2) + b" w\n" + key(2), (2, "no space after the key", key(2))),
    )
    REPEATED = "the key already stood on another line"
    BAD_IN_A_DICT = (
        (K + b" v\n" + K + b" w\n", (2, REPEATED, K + b" w")),
        (K + b" v\n\n" + K.upper() + b" v", (3, REPEATED, K.upper() + b" v")),
        (K.upper() + b" v\n" + K + b" v", (2, REPEATED, K + b" v")),
        (key(2) + b" v\nbad\n\n" + K + b" w\nworse\n" + K + b" again\n" + b"x" * 99,
         (2, NO_KEY, b"bad"), (5, NO_KEY, b"worse"), (6, REPEATED, K + b" again"),
         (7, NO_KEY, b"x" * 99)),
    )
    UNSORTED = "the key is not above the last one and in lower case (LC_ALL=C sort)"
    BAD_IF_SORTED = (
        (K + b" v\n" + K + b" w\n" + key(2) + b" x", (2, UNSORTED, K + b" w")),
        (key(2) + b" v\n\n" + K + b" w\n" + key(3) + b" x", (3, UNSORTED, K + b" w")),
        (K + b" v\n" + key(10).upper() + b" w\n" + key(11) + b" x",
         (2, UNSORTED, key(10).upper() + b" w")),
        (key(10).upper() + b" v", (1, UNSORTED, key(10).upper() + b" v")),
        (key(2) + b" v\nbad\n" + K + b" w\n" + key(3) + b" x\n" + b"x" * 99,
         (2, NO_KEY, b"bad"), (3, UNSORTED, K + b" w"), (5, NO_KEY, b"x" * 99)),
    )

    def test_bad_lines_are_named(self):
        for is_sorted, table in ((False, self.BAD + self.BAD_IN_A_DICT),
                                 (True, self.BAD + self.BAD_IF_SORTED)):
            for content, *bad in table:
                with self.subTest(content, is_sorted=is_sorted), data_file(content) as path:
                    with self.assertRaises(ValueError) as caught:
                        kv.load(path, is_sorted)
                    self.assertEqual(str(caught.exception).split("\n"), self.named(path, bad))

    def named(self, path, bad):
        return ["%s:%d: %s: %r" % (path, number, fault, line[:50]) for number, fault, line in bad]

    def test_the_program_names_bad_lines(self):
        for table, *options in ((self.BAD_IN_A_DICT,), (self.BAD_IF_SORTED, "--sorted")):
            content, *bad = table[-1]
            with data_file(content) as path:
                expected = "".join("kv: %s\n" % line for line in self.named(path, bad))
                self.assertEqual(run("serve", "--port", "0", path, *options),
                                 (1, b"", expected.encode()))

    def test_a_bad_line_far_down(self):
        """Keys that repeat across pieces, with all that follows still looked at."""
        lines = [key(n) + b" value" for n in range(9000)]
        lines[5000], lines[8000] = key(3) + b" other", b"bad"
        for is_sorted, fault in ((False, self.REPEATED), (True, self.UNSORTED)):
            with data_file(b"\n".join(lines)) as path:
                with self.assertRaises(ValueError) as caught:
                    kv.load(path, is_sorted)
            self.assertEqual(str(caught.exception).replace(path, "F").split("\n"), [
                "F:5001: %s: %r" % (fault, lines[5000]), "F:8001: %s: b'bad'" % self.NO_KEY])

    def test_ten_bad_lines_are_named_and_the_others_counted(self):
        def refused(count):
            with data_file(key(1) + b" v\n" + b"bad\n" * count) as path:
                return (path,) + run("serve", "--port", "0", path)

        for (count,), running in side_by_side(refused, ((9,), (10,), (11,), (25,))):
            with self.subTest(count):
                path, code, out, err = running.result()
                expected = ["kv: %s:%d: %s: b'bad'" % (path, n + 2, self.NO_KEY)
                            for n in range(min(count, 10))]
                if count > 10:
                    expected.append("kv: %s: and %d more bad lines" % (path, count - 10))
                self.assertEqual((code, out, err.decode().splitlines()), (1, b"", expected))

    def test_files_that_are_not_to_be_served(self):
        with data_file(b"") as empty, data_file(b"\n\n\n") as blank:
            rows = ((empty, "no pair in it"), (blank, "no pair in it"),
                    (empty + ".gone", "No such file or directory"),
                    (os.path.dirname(empty), "Is a directory"))
            for (path, reason), running in side_by_side(
                    lambda path, _: run("serve", "--port", "0", path), rows):
                with self.subTest(reason):
                    self.assertEqual(running.result(),
                                     (1, b"", ("kv: %s: %s\n" % (path, reason)).encode()))

    def test_a_file_that_changes_while_it_is_read(self):
        """Its size or its time is changed again and again, from before the start to the end."""
        def grow(path):
            with open(path, "ab") as file:
                file.write(b"\n")

        def touch(path):
            os.utime(path)

        for change, *options in ((grow,), (touch,), (touch, "--sorted")):
            with self.subTest(change, options=options), data_file(b"".join(
                    key(n) + b" value\n" for n in range(300000))) as path:
                process = subprocess.Popen(command("serve", "--port", "0", path, *options),
                                           stderr=subprocess.PIPE, env=environment())
                while process.poll() is None:
                    change(path)
                err = process.communicate()[1].decode()
                self.assertEqual((process.returncode, err),
                                 (1, "kv: %s: changed while it was read\n" % path))

    def test_standard_input(self):
        with tempfile.TemporaryFile() as file:
            file.write(key(1) + b" value\n")
            file.seek(0)
            with Serving("-", stdin=file) as server:
                self.assertIn(b"kv: 1 pairs of standard input in ", server.log)
                with server.connect() as client:
                    self.assertEqual(client.ask(key(1))[2], b"value")
        self.assertEqual(run("serve", "--port", "0", "-", stdin=b"bad"), (
            1, b"", ("kv: standard input:1: %s: b'bad'\n" % self.NO_KEY).encode()))

    @ON_POSIX
    def test_a_pipe_is_read_to_its_end(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "pipe")
            os.mkfifo(path)
            server = Serving(path)
            with open(path, "wb") as pipe:
                pipe.write(b"".join(key(n) + b" %d\n" % n for n in range(9000)))
            with server, server.connect() as client:
                self.assertEqual(client.ask(key(8999))[2], b"8999")


@ON_POSIX
class LoadingTest(unittest.TestCase):
    """What is seen and can be done while a load takes long: its input stays open here."""

    def start(self, stderr):
        process = subprocess.Popen(command("serve", "--port", "0", "-"), stdin=subprocess.PIPE,
                                   stderr=stderr, env=environment())
        self.addCleanup(process.stdin.close)
        return process

    def feed(self, process, numbers, piece=2000):
        """Write pairs, more than a pipe holds, so that the program has begun to read them."""
        process.stdin.write(b"".join(key(next(numbers)) + b" value\n" for _ in range(piece)))
        process.stdin.flush()

    def test_signals_end_it(self):
        for how in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(how):
                process = self.start(subprocess.PIPE)
                self.feed(process, iter(range(10000)), 5000)
                process.send_signal(how)
                self.assertEqual(process.wait(PATIENCE), 0)
                self.assertEqual(process.stderr.read(), b"kv: stopped\n")
                process.stderr.close()

    def test_progress_on_a_terminal_only(self):
        import pty
        terminal, stderr = pty.openpty()
        process = self.start(stderr)
        os.close(stderr)
        shown, numbers = [b""], iter(range(1 << 40))
        end = time.monotonic() + PATIENCE
        reader = threading.Thread(target=self.read_terminal, args=(terminal, shown))
        reader.start()
        while not re.search(br"pairs, \d+ a second", shown[0]) and time.monotonic() < end:
            self.feed(process, numbers)
        process.stdin.close()
        until(lambda: b" on http://" in shown[0])
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(PATIENCE), 0)
        reader.join()
        os.close(terminal)
        self.assertRegex(shown[0], br"^(\r\x1b\[K\? % read, \d+ pairs, \d+ a second )+"
                                   br"\r\x1b\[Kkv: \d+ pairs of standard input in ")

    @staticmethod
    def read_terminal(terminal, shown):
        with contextlib.suppress(OSError):  # how Linux tells that the other side is closed
            while True:
                shown[0] += os.read(terminal, 1 << 16)


@unittest.skipUnless(hasattr(os, "pread"), "needs os.pread")
class SortedTest(unittest.TestCase):
    """Section 6: look-ups in the file itself."""

    def check(self, pairs, absent=(), end=b"\n", step=1):
        """Find every `step`th of `pairs` {key: value} in a file of them, and none of `absent`.

        Returns how often the file was read for a pair, on average and at most.
        """
        lines = [k + b" " + v for k, v in sorted(pairs.items())]
        reads, calls, pread = [], [], os.pread
        with data_file(b"\n".join(lines) + end) as path:
            found = kv.load(path, True)
            self.assertEqual(len(found), len(pairs))
            os.pread = lambda *arguments: calls.append(1) or pread(*arguments)
            try:
                for k, value in itertools.islice(pairs.items(), 0, None, step):
                    self.assertEqual(found.get(k), value)
                    reads.append(len(calls))
                    calls.clear()
                for k in absent:
                    self.assertIsNone(found.get(k), k)
            finally:
                os.pread = pread
                found.file.close()
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
                if kv.is_key(other) and other not in pairs:
                    yield other

    def test_random_keys(self):
        chance = random.Random(6)
        pairs = {self.random_key(chance): b"%d" % n * (n % 9) for n in range(100000)}
        absent = [self.random_key(chance) for _ in range(100000)]
        mean, most = self.check(pairs, absent + list(self.neighbours(pairs)))
        self.assertLess(mean, 2.2)
        self.assertLess(most, 9)

    def test_pages_hardly_longer_than_a_line(self):
        """So that every cut through a line occurs."""
        chance, page = random.Random(7), kv.PAGE_BYTES
        try:
            for kv.PAGE_BYTES in list(range(38, 80)) + [150, 1000]:
                for count in (1, 2, 3, 10, 60):
                    pairs = {self.random_key(chance): b"v" * chance.choice((0, 1, 30, 31, 500))
                             for _ in range(count)}
                    absent = [self.random_key(chance), b"f" * 8 + b"-ffff-4fff-bfff-" + b"f" * 12,
                              ABSENT]
                    self.check(pairs, absent, end=chance.choice((b"", b"\n", b"\n\n")))
        finally:
            kv.PAGE_BYTES = page

    def test_values_of_all_lengths(self):
        """Short ones between those that no page holds, with keys in them."""
        chance = random.Random(8)
        for end in (b"", b"\n"):
            pairs = {self.random_key(chance): b" %b " % self.random_key(chance) * chance.choice(
                (0, 1, 50, 100, 107, 108, 1000, 26000)) for _ in range(200)}
            mean, most = self.check(pairs, [v[1:37] for v in pairs.values() if v], end=end)
            self.assertLess(most, 60)

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
            with self.subTest(name):
                pairs = dict.fromkeys(keys, b"a value")
                mean, most = self.check(pairs, self.neighbours(pairs), step=9)
                self.assertLessEqual(most, 4 * math.log2(45 * len(pairs) / kv.PAGE_BYTES) + 4)

    def test_unchecked(self):
        """Nothing is read before it listens, and what stands in order is found."""
        content = b"no pair\n" + key(1) + b" one\n" + key(2) + b" two\n" + key(2) + b" again\n"
        with data_file(content) as path, Serving(path, "--sorted", "--no-check") as server:
            self.assertIn(b"kv: unchecked pairs of " + path.encode(), server.log)
            with server.connect() as client:
                self.assertEqual(client.ask(key(1))[2], b"one")
                self.assertEqual(client.ask(key(3))[0], 404)
                self.assertIn(b"unchecked pairs of test.data", client.ask(b"")[2])

    CHANGES = (  # what becomes of a file in place, and how it is opened for that
        ("r+b", lambda file, content: file.write(content)),
        ("r+b", lambda file, content: file.truncate(len(content) // 3)),
        ("wb", lambda file, content: file.write(content[:-10])))

    def test_a_file_that_changes_in_place(self):
        """An answer is right, or a 500 that is logged; after a reload, all is right again."""
        def content(value):
            return b"".join(key(n) + b" %d %b\n" % (n, value) for n in range(2000))

        for mode, change in self.CHANGES:
            with self.subTest(mode), data_file(content(b"old")) as path:
                with Serving(path, "--sorted") as server, server.connect() as client:
                    statuses = []
                    for n in range(2000):
                        if n == 500:
                            with open(path, mode) as file:
                                change(file, content(b"new"))
                        status, _, body = client.ask(key(n))
                        statuses.append(status)
                        if status == 200:
                            self.assertIn(body, (b"%d old" % n, b"%d new" % n))
                    self.assertEqual(statuses, [200] * 500 + [500] * 1500)
                    until(lambda: server.log.count(b"'the file was changed in place'") == 1500)
                    with open(path + ".new", "wb") as file:
                        file.write(content(b"new"))
                    os.replace(path + ".new", path)
                    server.process.send_signal(signal.SIGHUP)
                    until(lambda: b" s, reloaded\n" in server.log)
                    for n in range(0, 2000, 100):
                        self.assertEqual(client.ask(key(n))[2], b"%d new" % n)

    def test_a_file_that_changes_all_the_time(self):
        """While clients ask: no value of another key, none that is half old and half new."""
        values = [b"%d " % n * 900 for n in range(10)]
        lines = [b"".join(key(n) + b" " + value + b"\n" for n in range(300)) for value in values]
        with data_file(lines[0]) as path, Serving(path, "--sorted") as server:
            stop = threading.Event()

            def rewrite():
                with open(path, "r+b", 0) as file:
                    for content in itertools.cycle(lines):
                        if stop.is_set():
                            break
                        os.pwrite(file.fileno(), content, 0)

            writer = threading.Thread(target=rewrite)
            with server.connect() as client:
                for n in range(2000):
                    if n == 100:
                        writer.start()
                    status, _, body = client.ask(key(n % 300))
                    self.assertTrue(status == 500 or body in values, body)
                stop.set()
                writer.join()
                self.assertEqual(client.ask(b"")[0], 200)


class CommandLineTest(ExampleTest):
    """Section 2: exit codes and messages."""

    def check(self, arguments, code, out, err, **how):
        self.check_all([(arguments, code, out, err, how)])

    def check_all(self, rows):
        def work(arguments, code, out, err, how):
            return run(*arguments, **how)

        for (arguments, code, out, err, how), running in side_by_side(work, list(rows)):
            with self.subTest(arguments=arguments, how=how):
                got = running.result()
                self.assertEqual(got[:2], (code, out), got)
                self.assertRegex(got[2].decode(), r"\A%s\Z" % err)

    def test_get(self):
        url = self.server.url
        hexadecimal = KEY.replace(b"-", b"")
        other = b"f8a24bb8-eff8-41dc-929b-10b4c3e49e05"
        absent, version_1 = ABSENT.decode(), "3479d894-3271-1935-88cf-a06f3cbb80a5"
        missing = "kv: %s: not found\n" % absent
        no_uuid = "kv: %s: badly formed hexadecimal UUID string\n"
        closed = "http://127.0.0.1:1"
        nobody = "kv: cannot ask %s: .*[Rr]efused.* --url .*\n" % closed
        rows = (
            ((KEY,), 0, VALUE + b"\n", "", {}),
            ((KEY.upper(),), 0, VALUE + b"\n", "", {}),
            ((b"{" + KEY + b"}",), 0, VALUE + b"\n", "", {}),
            ((b"urn:uuid:" + KEY,), 0, VALUE + b"\n", "", {}),
            ((hexadecimal,), 0, VALUE + b"\n", "", {}),
            ((other, KEY, other), 0, b"1234\n" + VALUE + b"\n1234\n", "", {}),
            (("-",), 0, b"1234\n" + VALUE + b"\n", "", {"stdin": other + b"\n" + KEY}),
            ((KEY, "-", KEY), 0, VALUE + b"\n1234\n" + VALUE + b"\n", "", {"stdin": other}),
            (("-",), 0, b"", "", {"stdin": b""}),
            (("-",), 0, b"1234\n", "", {"stdin": b"\n\r\n" + other + b"\r\n\n"}),
            (("-",), 2, VALUE + b"\n", "kv: .*: badly formed [^\n]*\n",
             {"stdin": b"\xff\xfe\n" + KEY}),
            ((absent,), 1, b"", missing, {}),
            ((absent, KEY, absent), 1, VALUE + b"\n", missing * 2, {}),
            (("nonsense", KEY), 2, VALUE + b"\n", no_uuid % "nonsense", {}),
            (("nonsense", absent), 2, b"", no_uuid % "nonsense" + missing, {}),
            ((absent, "nonsense"), 2, b"", missing + no_uuid % "nonsense", {}),
            ((version_1,), 2, b"", "kv: %s: not a version 4 UUID\n" % version_1, {}),
            (("",), 2, b"", no_uuid % "", {}),
            ((KEY, "--url", url + "/"), 0, VALUE + b"\n", "", {"KV_URL": closed}),
            (("--url", closed, KEY), 2, b"", nobody, {}),
            ((KEY, "--timeout", "9.5"), 0, VALUE + b"\n", "", {}),
            ((KEY,), 0, VALUE + b"\n", "", {"http_proxy": closed}),
            ((KEY, "--url", url.replace("127.0.0.1", "LOCALHOST")), 0, VALUE + b"\n", "",
             {"http_proxy": closed}),
            (("nonsense",), 2, b"", no_uuid % "nonsense", {"KV_URL": closed}),
            ((KEY, "--url", "localhost:80"), 2, b"", "kv: cannot ask localhost:80: .*\n", {}),
            ((KEY, "--url", "127.0.0.1:80"), 2, b"", "kv: cannot ask 127.0.0.1:80: .*\n", {}),
            ((KEY, "--url", "http://a..b"), 2, b"", r"kv: cannot ask http://a\.\.b: .*\n", {}),
            ((KEY, "--url", "http://host:port"), 2, b"",
             "kv: cannot ask http://host:port: .*\n", {}),
            ((KEY, "--url", "http://[::1"), 2, b"", r"kv: cannot ask http://\[::1: .*\n", {}),
            ((KEY, "--timeout", "0"), 2, b"", "kv: cannot ask .*\n", {}),
            ((KEY, "--timeout", "x"), 2, b"", "kv: argument --timeout: [^\n]*\n", {}),
            ((), 2, b"", "kv: the following arguments are required: KEY [^\n]*\n", {}))
        self.check_all((("get",) + arguments, code, out, err, dict({"KV_URL": url}, **how))
                       for arguments, code, out, err, how in rows)

    def test_other_hosts_are_asked_through_the_proxy(self):
        self.check(("get", KEY, "--url", "http://kv.example"), 0, VALUE + b"\n", "",
                   http_proxy=self.server.url)  # which takes the absolute form that a proxy gets

    def test_a_server_that_does_not_answer(self):
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen(1)
            url = "http://127.0.0.1:%d" % silent.getsockname()[1]
            self.check(("get", KEY, "--url", url, "--timeout", "0.2"), 2, b"",
                       "kv: cannot ask %s: timed out [^\n]*\n" % url)

    def test_answers_that_are_none_of_kv(self):
        for answer, reason in ((b"", "Remote end closed connection"),
                               (b"SSH-2.0\r\n", "SSH-2.0"),
                               (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort",
                                "IncompleteRead"),
                               (b"HTTP/1.1 500 Broken\r\n\r\n", "Broken")):
            with self.subTest(answer), socket.socket() as listener:
                listener.bind(("127.0.0.1", 0))
                listener.listen(1)

                def once():
                    with listener.accept()[0] as connection:
                        connection.recv(1000)
                        connection.sendall(answer)

                thread = threading.Thread(target=once)
                thread.start()
                self.check(("get", KEY, "--url", "http://127.0.0.1:%d" % listener.getsockname()[1]),
                           2, b"", "kv: cannot ask http://[^\n]*%s[^\n]*\n" % re.escape(reason))
                thread.join()

    @ON_POSIX
    def test_a_reader_that_has_enough(self):
        """Like `kv.py get ... | head -1`: the pipe is closed before the second value comes."""
        process = subprocess.Popen(command("get", "-", "--url", self.server.url),
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, env=environment())
        process.stdin.write(KEY + b"\n")
        process.stdin.flush()
        self.assertEqual(process.stdout.readline(), VALUE + b"\n")
        process.stdout.close()
        process.stdin.write((KEY + b"\n") * 3)
        process.stdin.close()
        self.assertEqual((process.wait(PATIENCE), process.stderr.read()), (0, b""))
        process.stderr.close()

    def test_as_a_module(self):
        self.assertEqual(kv.get(KEY.decode().upper(), self.server.url), VALUE)
        with self.assertRaises(KeyError):
            kv.get(ABSENT.decode(), self.server.url)
        for wrong in ("nonsense", "3479d894-3271-1935-88cf-a06f3cbb80a5"):
            with self.assertRaises(ValueError):
                kv.get(wrong, self.server.url)
        with self.assertRaises(OSError):
            kv.get(KEY.decode(), "http://127.0.0.1:1")

    def test_wrong_usage_and_what_cannot_be_listened_on(self):
        taken = str(self.server.port)
        rows = (
            ((), 2, r"kv: [^\n]*serve \| get[^\n]*\n"),
            (("fetch",), 2, "kv: [^\n]*fetch[^\n]*\n"),
            (("serve",), 2, "kv: [^\n]*FILE[^\n]*\n"),
            (("serve", "-", "--sorted"), 2, "kv: --sorted is for files[^\n]*\n"),
            (("serve", "-", "--sorted", "--no-check"), 2, "kv: --sorted is for files[^\n]*\n"),
            (("serve", EXAMPLE, "--no-check"), 2, "kv: [^\n]* --no-check for --sorted[^\n]*\n"),
            (("serve", EXAMPLE, EXAMPLE), 2, "kv: unrecognized arguments: [^\n]*\n"),
            (("serve", EXAMPLE, "--port", "65536"), 2,
             r"kv: argument --port: invalid choice: 65536 \([^\n]*\n"),
            (("serve", EXAMPLE, "--port", "-1"), 2, "kv: argument --port: [^\n]*\n"),
            (("serve", EXAMPLE, "--port", "http"), 2, "kv: argument --port: [^\n]*\n"),
            (("serve", EXAMPLE, "--port", taken), 1,
             "kv: cannot listen on 127.0.0.1:%s: Address already in use\n" % taken),
            (("serve", "/no/such/file", "--port", taken), 1,
             "kv: cannot listen on 127.0.0.1:%s: Address already in use\n" % taken),
            (("serve", EXAMPLE, "--host", "no.such.host.invalid"), 1,
             "kv: cannot listen on no.such.host.invalid:8000: [^\n]*\n"),
            (("serve", EXAMPLE, "--host", "a..b"), 1,
             r"kv: cannot listen on a..b:8000: [^\n]*\n"),
            (("serve", EXAMPLE, "--host", "203.0.113.1"), 1,
             "kv: cannot listen on 203.0.113.1:8000: Cannot assign requested address\n"))
        self.check_all((arguments, code, b"", err, {}) for arguments, code, err in rows)

    def test_help_and_version(self):
        rows = ((["--help"], ["serve", "get", "--version"]),
                (["serve", "--help"], ["127.0.0.1", "8000", "--verbose"]),
                (["get", "--help"], ["http://127.0.0.1:8000", "KV_URL", "10"]),
                (["--version"], ["kv " + kv.__version__]))
        for (_, words), running in side_by_side(lambda arguments, _: run(*arguments), rows):
            code, out, err = running.result()
            self.assertEqual((code, err), (0, b""))
            for word in words:
                self.assertIn(word, out.decode())

    def test_ready_line_names_pairs_file_time_and_address(self):
        self.assertRegex(self.server.log.decode(), r"\Akv: 10000 pairs of %s in \d+\.\d\d s, on "
                         r"http://127\.0\.0\.1:\d+\n\Z" % re.escape(EXAMPLE))

    @ON_POSIX
    def test_signals_stop_it(self):
        for how in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(how), Serving(EXAMPLE) as server, server.connect() as client:
                self.assertEqual(client.ask(KEY)[0], 200)
                self.assertEqual(server.stop(how), 0)
                server.reader.join()
                self.assertEqual(server.log.decode().splitlines()[1:], ["kv: stopped"])

    def test_hosts(self):
        def can(family, address):
            with contextlib.suppress(OSError), socket.socket(family) as probe:
                probe.bind((address, 0))
                return True

        def serves(host, url, addresses):
            with Serving(EXAMPLE, "--host", host) as server:
                self.assertIn("on http://%s:%d\n" % (url, server.port), server.log.decode())
                for address in addresses:
                    with Connection((address, server.port)) as client:
                        self.assertEqual(client.ask(KEY)[2], VALUE)
                    name = "[%s]" % address if ":" in address else address
                    self.assertEqual(run("get", KEY, "--url", "http://%s:%d" % (name, server.port)),
                                     (0, VALUE + b"\n", b""))

        rows = [("127.0.0.1", "127.0.0.1", ["127.0.0.1"]),
                ("localhost", "localhost", ["localhost"]),
                ("0.0.0.0", "0.0.0.0", ["127.0.0.1"])]
        if can(socket.AF_INET6, "::1"):
            rows += [("::1", "[::1]", ["::1"]), ("::", "[::]", ["::1", "127.0.0.1"])]
        for (host, _, _), running in side_by_side(serves, rows):
            with self.subTest(host):
                running.result()

    def test_verbose_logs_in_common_log_format(self):
        requests = ((KEY, "GET", KEY.decode(), 200, 15), (KEY, "HEAD", KEY.decode(), 200, 0),
                    (b"\x1b[2J\"\\\x7f\xe9", "GET", r'\\x1b\[2J\\"\\\\\\x7f\\xe9', 400, r"\d+"))
        with Serving(EXAMPLE, "--verbose") as server:
            for number, (target, method, *_) in enumerate(requests, 1):
                with server.connect() as client:
                    client.ask(target, method)
                    until(lambda: server.log.count(b"\n") == number + 1)
        for line, (_, method, request, status, size) in zip(
                server.log.decode("ascii").splitlines()[1:], requests):
            self.assertRegex(line, r'^127\.0\.0\.1 - - \[\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d '
                                   r'[-+]\d{4}\] "%s /%s HTTP/1\.1" %d %s$'
                             % (method, request, status, size))

    @ON_POSIX
    def test_streams_that_are_closed_or_full(self):
        """No traceback, whatever the shell gives."""
        get = "exec %s get %s --url %s " % (" ".join(command()), KEY.decode(), self.server.url)
        for shell, code, out, err in (
                (get + ">&-", 2, b"", br"kv: \[Errno \d+\] [^\n]*\n"),
                (get + ">/dev/full", 2, b"", br"kv: \[Errno \d+\] [^\n]*\n"),
                (get + "2>&-", 0, VALUE + b"\n", b""),
                (get.replace("get", "get -") + "<&-", 2, b"",
                 br"kv: \[Errno \d+\] [^\n]*\n")):
            with self.subTest(shell):
                done = subprocess.run(shell, shell=True, stdout=subprocess.PIPE, timeout=PATIENCE,
                                      stderr=subprocess.PIPE, env=environment())
                self.assertEqual((done.returncode, done.stdout), (code, out), done.stderr)
                self.assertRegex(done.stderr, br"\A%b\Z" % err)

    @ON_POSIX
    def test_interrupted_get(self):
        process = subprocess.Popen(command("get", "-", "--url", self.server.url),
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, env=environment())
        with process:
            process.stdin.write(KEY + b"\n")
            process.stdin.flush()
            self.assertEqual(process.stdout.readline(), VALUE + b"\n")
            process.send_signal(signal.SIGINT)
            self.assertEqual((process.wait(PATIENCE), process.stderr.read()), (130, b""))

    def test_older_pythons_are_told(self):
        olds = [path for version in ("2.7", "3.4", "3.5", "3.6") for path in old_pythons(version)]
        if not olds:
            self.skipTest("no Python before 3.7 here")
        for path in olds:
            with self.subTest(path):
                done = subprocess.run([path, os.path.join(HERE, "kv.py"), "--version"],
                                      timeout=PATIENCE, stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE)
                self.assertEqual((done.returncode, done.stdout), (1, b""))
                self.assertRegex(done.stderr, br"\Akv: needs Python 3\.7 or newer[^\n]*\n\Z")


def old_pythons(version):
    """Return the paths of interpreters of this version that pyenv or PATH have and that run."""
    import glob
    import shutil
    root = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    found = glob.glob(os.path.join(root, "versions", version + ".*", "bin", "python"))
    return found or [path for path in [shutil.which("python" + version)]
                     if path and "shims" not in path]


class AnswerTest(ExampleTest):
    """Section 3: what is answered to what."""

    STATUS = (  # method, target without its first /, status, body (None: any one line of text)
        ("GET", KEY, 200, VALUE),
        ("GET", KEY.upper(), 200, VALUE),
        ("GET", ABSENT, 404, None),
        ("GET", ABSENT[:-1], 400, None),
        ("GET", ABSENT + b"0", 400, None),
        ("GET", KEY + b"/", 400, None),
        ("GET", KEY + b"?", 400, None),
        ("GET", b"/" + KEY, 400, None),
        ("GET", b"favicon.ico", 400, None),
        ("GET", KEY.replace(b"-4", b"-1"), 400, None),
        ("GET", KEY.replace(b"-8", b"-7"), 400, None),
        ("GET", KEY.replace(b"-", b""), 400, None),
        ("GET", b"%33" + KEY[1:], 400, None),
        ("POST", KEY, 405, None), ("PUT", KEY, 405, None), ("DELETE", KEY, 405, None),
        ("PATCH", KEY, 405, None), ("TRACE", KEY, 405, None), ("CONNECT", KEY, 405, None),
        ("POST", b"", 405, None),
        ("OPTIONS", KEY, 204, b""), ("OPTIONS", b"", 204, b""),
        ("BREW", KEY, 501, None), ("get", KEY, 501, None), ("G", KEY, 501, None))

    def test_status_fields_and_body(self):
        with self.server.connect() as client:
            for method, target, status, body in self.STATUS:
                with self.subTest(method=method, target=target):
                    got, fields, text = client.ask(target, method)
                    self.assertEqual(got, status)
                    self.check(fields, status, text, body)
                    if method == "GET":
                        head = client.ask(target, "HEAD")
                        self.assertEqual(head[0], status)
                        self.assertEqual(dict(head[1], date=""), dict(fields, date=""))

    def check(self, fields, status, text, body):
        fields = dict(fields)
        self.assertEqual(fields.pop("server"), "kv/" + kv.__version__)
        self.assertRegex(fields.pop("date"),
                         r"^[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} [\d:]{8} GMT$")
        self.assertEqual(fields.pop("x-content-type-options"), "nosniff")
        if status != 204:
            self.assertEqual(fields.pop("content-type"), "text/plain; charset=utf-8")
            self.assertEqual(fields.pop("content-length"), str(len(text)))
        if status in (204, 405):
            self.assertEqual(fields.pop("allow"), "GET, HEAD, OPTIONS")
        self.assertEqual(fields, {})
        if body is None:
            self.assertRegex(text, br"\A[ -~]+\n\Z")
            self.assertNotIn(b"<", text)
        else:
            self.assertEqual(text, body)

    def test_root_says_what_is_served(self):
        with self.server.connect() as client:
            status, _, body = client.ask(b"")
            self.assertEqual((status, client.ask(b"", "HEAD")[0]), (200, 200))
        self.assertRegex(body.decode(), r"\A10000 pairs of example\.data, since [^\n]* GMT\n"
                                        r"[^\n]*/KEY[^\n]*\n\Z")
        self.assertNotIn(HERE, body.decode())

    def test_asterisk_and_absolute_form(self):
        for line, status, body in ((b"OPTIONS *", 204, b""), (b"GET http://kv/" + KEY, 200, VALUE),
                                   (b"GET HTTP://[::1]:80/" + KEY.upper(), 200, VALUE),
                                   (b"GET http://kv/" + ABSENT, 404, None),
                                   (b"GET http://kv/", 200, None), (b"GET http://kv", 200, None),
                                   (b"OPTIONS http://kv", 204, b"")):
            with self.subTest(line), self.server.connect() as client:
                client.send(line + b" HTTP/1.1\r\nHost: kv\r\n\r\n")
                answer = client.answer()
                self.assertEqual(answer[0], status)
                self.assertNotIn("connection", answer[1])
                if body is not None:
                    self.assertEqual(answer[2], body)

    def test_all_of_the_example_over_one_connection(self):
        with open(EXAMPLE, "rb") as file, self.server.connect() as client:
            count = 0
            for line in file:
                k, _, value = line.rstrip(b"\n").partition(b" ")
                self.assertEqual(client.ask(k)[::2], (200, value))
                count += 1
        self.assertEqual(count, 10000)

    def test_fifty_clients_at_once(self):
        with open(EXAMPLE, "rb") as file:
            lines = [line.rstrip(b"\n").partition(b" ") for line in file][:5000]
        wrong, start = [], threading.Barrier(50)

        def client(pairs):
            with self.server.connect() as connection:
                start.wait(PATIENCE)  # all are connected before the first asks
                for k, _, value in pairs:
                    answer = connection.ask(k)
                    if answer[::2] != (200, value):
                        wrong.append(answer)
            wrong.append(None)

        threads = [threading.Thread(target=client, args=(lines[n::50],)) for n in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [None] * 50)


class StrictTest(ExampleTest):
    """Section 3, strictly: raw bytes in, and what must come of them."""

    LINE = b"GET /" + KEY + b" HTTP/1.1\r\n"
    HOST = b"Host: kv\r\n"
    PLAIN = LINE + HOST + b"\r\n"
    POST = b"POST /" + KEY + b" HTTP/1.1\r\n" + HOST

    KEPT = (  # what follows is fine: status, head; the connection stays open
        (200, PLAIN),
        (200, b"\r\n" + PLAIN),
        (404, PLAIN.replace(KEY, ABSENT)),
        (400, PLAIN.replace(KEY, b"favicon.ico")),
        (200, PLAIN.replace(b"Host", b"hOST")),
        (200, LINE + b"Host:kv\r\n\r\n"),
        (200, LINE + b"Host: \t kv \t \r\n\r\n"),
        (200, LINE + b"Host: kv:8000\r\n\r\n"),
        (200, LINE + b"Host: kv:\r\n\r\n"),
        (200, LINE + b"Host: 127.0.0.1:8000\r\n\r\n"),
        (200, LINE + b"Host: [::1]:8000\r\n\r\n"),
        (200, LINE + b"Host: [2001:db8::ffff:192.0.2.1]\r\n\r\n"),
        (200, LINE + b"Host: a-b_c.~!$&'()*+;=%20\r\n\r\n"),
        (200, LINE + b"Accept: */*\r\n" + HOST + b"User-Agent: x\r\n\r\n"),
        (200, LINE + HOST + b"!#$%&'*+-.^_`|~09azAZ: any token\r\n\r\n"),
        (200, LINE + HOST + b"X:\r\n\r\n"),
        (200, LINE + HOST + b"X: \t \r\n\r\n"),
        (200, LINE + HOST + b"X: a\tb \x80\xff !~\r\n\r\n"),
        (200, LINE + HOST + b"Connection: keep-alive\r\n\r\n"),
        (200, LINE + HOST + b"Connection: Keep-Alive, X-Close\r\nx-close: 1\r\n\r\n"),
        (200, LINE + HOST + b"Connection:\r\n\r\n"),
        (200, LINE + HOST + b"Content-Length: 0\r\n\r\n"),
        (200, LINE + b"content-length:0 \r\n" + HOST + b"\r\n"),
        (200, LINE + HOST + b"Expect: 100-continue\r\n\r\n"),
        (200, LINE + HOST + b"expect: 100-Continue\r\n\r\n"),
        (200, LINE + HOST + b"Upgrade: h2c\r\nConnection: upgrade\r\n\r\n"),
        (200, LINE + HOST + b"Range: bytes=0-1\r\nIf-None-Match: *\r\n\r\n"),
        (200, LINE.replace(b"/", b"http://kv/", 1) + b"Host: other\r\n\r\n"),
        (200, LINE.replace(b"/", b"HTTP://[::1]:80/", 1) + HOST + b"\r\n"),
        (200, b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"),
        (200, b"GET http://kv HTTP/1.1\r\n" + HOST + b"\r\n"),
        (204, b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n"),
        (204, b"OPTIONS / HTTP/1.1\r\n" + HOST + b"Content-Length: 0\r\n\r\n"),
        (405, POST + b"\r\n"),
        (405, POST + b"Content-Length: 0\r\n\r\n"),
        (405, b"CONNECT kv:80 HTTP/1.1\r\n" + HOST + b"\r\n"),
        (405, b"TRACE / HTTP/1.1\r\n" + HOST + b"\r\n"),
        (501, PLAIN.replace(b"GET", b"get")),
        (501, PLAIN.replace(b"GET", b"!#$%&'*+-.^_`|~09azAZ")),
        (200, LINE + HOST + b"X: " + b"x" * (kv.HEAD_BYTES - len(PLAIN) - 5) + b"\r\n\r\n"),
        (200, LINE + HOST + b"a:b\r\n" * 2000 + b"\r\n"),
        (400, b"GET /" + b"x" * (kv.LINE_BYTES - 14) + b" HTTP/1.1\r\n" + HOST + b"\r\n"),
    )

    CLOSED = (  # answered, and then the connection is closed: status, head
        (200, LINE + HOST + b"Connection: close\r\n\r\n"),
        (200, LINE + b"connection:Close\t\r\n" + HOST + b"\r\n"),
        (200, LINE + HOST + b"Connection: close\r\nConnection: keep-alive\r\n\r\n"),
        (200, LINE + HOST + b"Connection: keep-alive , close\r\n\r\n"),
        (200, LINE + HOST + b"Connection: close,x\r\n\r\n"),
        (404, LINE.replace(KEY, ABSENT) + HOST + b"Connection: close\r\n\r\n"),
        (200, b"GET /" + KEY + b" HTTP/1.0\r\n\r\n"),
        (200, b"GET /" + KEY + b" HTTP/1.0\r\n" + HOST + b"Connection: keep-alive\r\n\r\n"),
        # the request line
        (400, b"\r\n\r\n"),
        (400, b"\r\n\r\n" + PLAIN),
        (400, b"\n" + PLAIN),
        (400, b" " + PLAIN),
        (400, b"GET\r\n" + HOST + b"\r\n"),
        (400, b"GET /\r\n\r\n"),
        (400, PLAIN.replace(b" HTTP/1.1", b"")),
        (400, PLAIN.replace(b"GET ", b"")),
        (400, PLAIN.replace(b"GET ", b"GET  ")),
        (400, PLAIN.replace(b"GET ", b"GET\t")),
        (400, PLAIN.replace(b" HTTP", b"  HTTP")),
        (400, PLAIN.replace(b" HTTP", b"\tHTTP")),
        (400, PLAIN.replace(b" HTTP", b" x HTTP")),
        (400, PLAIN.replace(b"1.1\r\n", b"1.1 \r\n")),
        (400, PLAIN.replace(b"GET", b"G(T")),
        (400, PLAIN.replace(b"GET", b"G\x00T")),
        (400, PLAIN.replace(b"GET", b"G\xe4T")),
        (400, PLAIN.replace(b"GET", b"")),
        (400, PLAIN.replace(KEY, KEY + b"\x00")),
        (400, PLAIN.replace(KEY, KEY + b"\x7f")),
        (400, PLAIN.replace(KEY, KEY + b"\x80")),
        (400, PLAIN.replace(KEY, KEY + b"\xc3\xa4")),
        (400, PLAIN.replace(KEY, KEY + b"\x1b")),
        (400, PLAIN.replace(b"/" + KEY, KEY)),
        (400, PLAIN.replace(b"/" + KEY, b"*")),
        (400, PLAIN.replace(b"/" + KEY, b"kv:80")),
        (400, PLAIN.replace(b"/" + KEY, b"ftp://kv/" + KEY)),
        (400, PLAIN.replace(b"/" + KEY, b"http:///" + KEY)),
        (400, PLAIN.replace(b"/" + KEY, b"http://me@kv/" + KEY)),
        (400, PLAIN.replace(b"/" + KEY, b"http:/" + KEY)),
        (400, b"POST * HTTP/1.1\r\n" + HOST + b"\r\n"),
        (400, PLAIN.replace(KEY, KEY + b"#x")),
        (400, PLAIN.replace(KEY, b"%zz")),
        (400, PLAIN.replace(KEY, b"<>")),
        (400, POST.replace(KEY, b"#x") + b"\r\n"),
        # the version
        (505, PLAIN.replace(b"1.1", b"1.2")),
        (505, PLAIN.replace(b"1.1", b"2.0")),
        (505, PLAIN.replace(b"1.1", b"0.9")),
        (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        (400, PLAIN.replace(b"1.1", b"1")),
        (400, PLAIN.replace(b"1.1", b"1.10")),
        (400, PLAIN.replace(b"1.1", b"01.1")),
        (400, PLAIN.replace(b"1.1", b"1,1")),
        (400, PLAIN.replace(b"HTTP", b"http")),
        (400, PLAIN.replace(b"HTTP", b"HTTPS")),
        (400, PLAIN.replace(b"HTTP/", b"HTTP /")),
        # line ends
        (400, PLAIN.replace(b"\r\n", b"\n")),
        (400, PLAIN.replace(b"\r\n", b"\n", 1)),
        (400, PLAIN.replace(b"\r\n", b"\r", 1)),
        (400, LINE + b"Host: kv\n\r\n"),
        (400, LINE + HOST + b"\n"),
        (400, LINE + HOST + b"X: a\rb\r\n\r\n"),
        (400, LINE + HOST + b"X: a\nb: c\r\n\r\n"),
        (400, LINE + HOST + b"X: a\r\r\n\r\n"),
        # fields
        (400, LINE + HOST + b"X : a\r\n\r\n"),
        (400, LINE + HOST + b"X\t: a\r\n\r\n"),
        (400, LINE + b"Host : kv\r\n\r\n"),
        (400, LINE + b" " + HOST + b"\r\n"),
        (400, LINE + b" X: a\r\n" + HOST + b"\r\n"),
        (400, LINE + HOST + b"X: a\r\n folded\r\n\r\n"),
        (400, LINE + HOST + b"X: a\r\n\tfolded\r\n\r\n"),
        (400, LINE + HOST + b"no colon\r\n\r\n"),
        (400, LINE + HOST + b": no name\r\n\r\n"),
        (400, LINE + HOST + b"X(: a\r\n\r\n"),
        (400, LINE + HOST + b"X\xe4: a\r\n\r\n"),
        (400, LINE + HOST + b"X\x00: a\r\n\r\n"),
        (400, LINE + HOST + b"X: \x00\r\n\r\n"),
        (400, LINE + HOST + b"X: a\x01\r\n\r\n"),
        (400, LINE + HOST + b"X: \x0b\r\n\r\n"),
        (400, LINE + HOST + b"X: \x7f\r\n\r\n"),
        (400, b"GET /" + KEY + b" HTTP/1.0\r\nno colon\r\n\r\n"),
        # Host
        (400, LINE + b"\r\n"),
        (400, LINE + b"X: a\r\n\r\n"),
        (400, LINE + HOST + HOST + b"\r\n"),
        (400, LINE + HOST + b"X: a\r\nhost: kv2\r\n\r\n"),
        (400, b"GET /" + KEY + b" HTTP/1.0\r\n" + HOST + HOST + b"\r\n"),
        (400, b"GET /" + KEY + b" HTTP/1.0\r\nHost: a b\r\n\r\n"),
    ) + tuple((400, b"GET /" + KEY + b" HTTP/1.1\r\nHost: " + host + b"\r\n\r\n") for host in (
        b"", b" ", b"a, b", b"a,b", b"a b", b"me@kv", b"kv/", b"http://kv", b"kv:port", b"kv:80:80",
        b"kv:-1", b"kv:123456", b"kv?", b"kv#", b"k\\v", b"k%v", b"k%2", b"k<v", b"k\"v", b"k\xe4v",
        b"[::1", b"::1", b"[]", b"[1]",
        b"[::1]x", b"[::1][::1]", b"[g::]", b"[::1%25eth0]", b"[fe80::/10]", b":80")) + (
        # bodies: never read, so what follows the head is never a request
        (400, LINE + HOST + b"Content-Length: 1\r\n\r\nx"),
        (400, LINE + HOST + b"Content-Length: %d\r\n\r\n" % len(PLAIN) + PLAIN),
        (400, LINE + HOST + b"Content-Length: 00\r\n\r\n"),
        (400, LINE + HOST + b"Content-Length: 0\r\nContent-Length: 0\r\n\r\n"),
        (400, LINE + HOST + b"Content-Length: 0, 0\r\n\r\n"),
        (400, LINE + HOST + b"Content-Length:\r\n\r\n"),
        (400, LINE + HOST + b"Content-Length: -0\r\n\r\n"),
        (400, LINE + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        (400, LINE + HOST + b"Transfer-Encoding: identity\r\n\r\n"),
        (400, LINE + HOST + b"transfer-encoding:\r\n\r\n"),
        (405, POST + b"Content-Length: 5\r\n\r\nhello"),
        (405, POST + b"Content-Length: 00\r\n\r\n"),
        (405, POST + b"Content-Length: %d\r\n\r\n" % len(PLAIN) + PLAIN),
        (405, POST + b"Content-Length: 99999999999999999999999\r\n\r\n"),
        (405, POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
        (405, POST + b"Transfer-Encoding: gzip , Chunked\r\n\r\n"),
        (405, POST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n"),
        (501, POST.replace(b"POST", b"BREW") + b"Content-Length: 5\r\n\r\nhello"),
        (204, b"OPTIONS / HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\nhello"),
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
        (400, b"BREW / HTTP/1.1\r\n" + HOST + b"Content-Length: x\r\n\r\n"),
        # expectations
        (417, LINE + HOST + b"Expect: 200-ok\r\n\r\n"),
        (417, LINE + HOST + b"Expect:\r\n\r\n"),
        (417, LINE + HOST + b"Expect: 100-continue, more\r\n\r\n"),
        (417, LINE + HOST + b"Expect: 100-continue\r\nExpect: more\r\n\r\n"),
        (417, POST + b"Expect: x\r\n\r\n"),
        # lengths
        (414, b"GET /" + b"x" * (kv.LINE_BYTES - 13) + b" HTTP/1.1\r\n" + HOST + b"\r\n"),
        (414, b"\r\nGET /" + b"x" * kv.LINE_BYTES),
        (414, b"x" * (kv.LINE_BYTES + 1)),
        (431, LINE + HOST + b"X: " + b"x" * (kv.HEAD_BYTES - len(PLAIN) - 4) + b"\r\n\r\n"),
        (431, LINE + HOST + b"a:b\r\n" * 4000 + b"\r\n"),
        (431, LINE + b"x" * kv.HEAD_BYTES),
    )

    def answers(self, pieces):
        """Send the pieces on a new connection; return all answers up to its end, without Date."""
        return self.all_answers([pieces])[0]

    def all_answers(self, ways, pause=0):
        """The same for several connections at once, to each of which one of `ways` is sent.

        A `pause` after the first piece of all, in seconds, makes it likely that this is received
        before the second one comes.
        """
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(self.server.connect()) for _ in ways]
            for client, pieces in zip(clients, ways):
                client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client.send(pieces[0])
            time.sleep(pause)
            for client, pieces in zip(clients, ways):
                with contextlib.suppress(ConnectionError):  # it may be closed before all is sent
                    for piece in pieces[1:]:
                        client.send(piece)
                    client.socket.shutdown(socket.SHUT_WR)
            return [re.sub(b"Date: [^\r]*\r\n", b"", client.rest()) for client in clients]

    def test_what_keeps_the_connection(self):
        with self.server.connect() as client:
            for status, head in self.KEPT:
                with self.subTest(head[:150]):
                    client.send(head)
                    answer = client.answer(head.lstrip().split(b" ")[0].decode())
                    self.assertEqual(answer[0], status, answer)
                    self.assertNotIn("connection", answer[1])

    def test_what_closes_the_connection(self):
        """A right request behind it gets nothing, and the answer says that it is the last."""
        for status, head in self.CLOSED:
            with self.subTest(head[:150]):
                answers = self.answers([head + self.PLAIN])
                self.assertEqual(len(re.findall(br"HTTP/1\.1 \d", answers)), 1, answers)
                self.assertRegex(answers, b"^HTTP/1.1 %d " % status)
                self.assertIn(b"\r\nConnection: close\r\n", answers)
                if status >= 400:
                    self.assertRegex(answers, br"\r\n\r\n[ -~]+\n\Z")

    def test_the_same_however_the_bytes_come(self):
        """Split at every byte (each eighth, where that takes a connection) and byte by byte."""
        for kept, table in ((True, self.KEPT), (False, self.CLOSED)):
            for status, head in table:
                if len(head) > 400:  # those are split at their limits
                    cuts = [n for limit in (kv.LINE_BYTES, kv.HEAD_BYTES, len(head))
                            for n in range(limit - 3, limit + 3) if 0 < n < len(head)]
                    ways = [[head[:n], head[n:]] for n in cuts]
                else:
                    ways = [[head[:n], head[n:]] for n in range(1, len(head), 1 if kept else 8)]
                    ways.append([head[n:n + 1] for n in range(len(head))])
                with self.subTest(head[:150]):
                    whole = self.answers([head])
                    self.assertTrue(whole)
                    if kept:
                        pieces = [piece for way in ways for piece in way]
                        self.assertEqual(self.answers(pieces), whole * len(ways))
                    else:
                        self.assertEqual(self.all_answers(ways), [whole] * len(ways))

    def test_the_same_when_a_head_comes_in_two_parts(self):
        """Split in the middle and before the last byte, so that the server waits for the rest."""
        heads = [head for _, head in self.KEPT + self.CLOSED]
        for some in (heads[n:n + 100] for n in range(0, len(heads), 100)):
            whole = self.all_answers([[head] for head in some])
            for cut in (lambda head: len(head) // 2, lambda head: len(head) - 1):
                ways = [[head[:cut(head)], head[cut(head):]] for head in some]
                for head, one, two in zip(some, whole, self.all_answers(ways, pause=0.1)):
                    with self.subTest(head[:150]):
                        self.assertTrue(one)
                        self.assertEqual(two, one)

    def test_a_bad_request_between_good_ones(self):
        for status, head in self.CLOSED:
            if status >= 400 and not head.startswith(b"\r\n"):
                with self.subTest(head[:150]):
                    answers = self.answers([self.PLAIN * 2 + head + self.PLAIN])
                    self.assertEqual(re.findall(br"HTTP/1\.1 (\d+)", answers),
                                     [b"200", b"200", b"%d" % status])

    def test_pipelined_requests_are_answered_in_order(self):
        with open(EXAMPLE, "rb") as file:
            lines = [line.rstrip(b"\n").partition(b" ") for line in file][:500]
        heads = [self.PLAIN.replace(KEY, k) if n % 3 else  # every third takes the general way
                 b"\r\n" + self.PLAIN.replace(KEY, k) for n, (k, _, _) in enumerate(lines)]
        with self.server.connect() as client:
            data = b"".join(heads)
            for pieces in ([data], [data[n:n + 1000] for n in range(0, len(data), 1000)]):
                thread = threading.Thread(target=lambda: [client.send(piece) for piece in pieces])
                thread.start()
                for _, _, value in lines:
                    self.assertEqual(client.answer()[::2], (200, value))
                thread.join()

    def test_both_ways_answer_the_same(self):
        for target in (KEY, KEY.upper(), ABSENT):
            for fields in (b"", b"Connection: close\r\n", b"Connection: keep-alive\r\n",
                           b"Accept: */*\r\nUser-Agent: x\r\n"):
                for host in (b"Host: kv\r\n", b"HOST:[::1]:1\r\n", b"host:\tkv:8000 \r\n"):
                    line = self.LINE.replace(KEY, target)
                    for head in (line + host + fields + b"\r\n", line + fields + host + b"\r\n"):
                        general = head[:-2] + b"Content-Length: 0\r\n\r\n"
                        self.assertTrue(kv.plain_head(head), head)
                        self.assertFalse(kv.plain_head(general), general)
                        with self.subTest(head):
                            self.assertEqual(self.answers([head]), self.answers([general]))

    def test_the_plain_way_takes_nothing_that_the_rules_refuse(self):
        for status, head in self.KEPT + self.CLOSED:
            plain = kv.plain_head(head[:kv.RECEIVE_BYTES])
            if plain:
                self.assertIn(status, (200, 404), head)
                self.assertEqual(plain.end(), len(head))

    def test_a_head_has_no_body(self):
        for status, head in self.KEPT + self.CLOSED:
            if head.startswith(b"GET ") and len(head) < 400:
                with self.subTest(head):
                    got, with_body = self.answers([b"HEAD" + head[3:]]), self.answers([head])
                    size = int(re.search(br"Content-Length: (\d+)", with_body).group(1))
                    self.assertEqual(got, with_body[:-size])

    def test_the_answer_arrives_although_the_client_still_sends(self):
        for head in (self.POST + b"Content-Length: 50000000\r\n\r\n", self.LINE + b"bad\r\n\r\n",
                     b"x" * 20000):
            with self.subTest(head[:100]), self.server.connect() as client:
                client.send(head)
                client.send(b"x" * 200000)  # in flight while the answer comes
                status, fields, body = client.answer()
                self.assertIn(status, (400, 405, 414))
                self.assertEqual(fields["connection"], "close")
                self.assertEqual(client.rest(), b"")  # the end, and no reset

    def test_heads_that_take_long_to_match(self):
        """Heads as long as they may be, and what breaks a rule at their end: time must grow with
        the bytes, not with their square, as nobody else is answered while a head is matched."""
        room = kv.HEAD_BYTES - 200
        fillers = [filler * (room // len(filler)) for filler in (
            b"a:\r\n", b"a: \t \r\n", b"Connection: keep-alive\r\n", b"Host: kv\r\n",
            b"Connection: ,,,,close,,,\tx\r\n", b"X:" + b" " * 5000 + b"\r\n",
            b"Content-Length: 0\r\n", b"Expect: 100-continue\r\n")]
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
                    head = start + last + b"\r\n"
                    self.assertLessEqual(len(head), kv.HEAD_BYTES)
                    kv.plain_head(head)
                    next(rule for rule in kv.rules(head) if not rule[0])
                self.assertLess(time.process_time() - before, 0.2)  # most take 0.005

    def test_the_host_of_the_target_is_no_key(self):
        with self.server.connect() as client:
            client.send(b"GET http://" + KEY + b" HTTP/1.1\r\nHost: kv\r\n\r\n")
            self.assertIn(b"pairs of example.data", client.answer()[2])

    def test_clients_that_reset_before_they_ask(self):
        for data in (b"", b"GET", self.PLAIN, self.LINE + b"bad\r\n\r\n"):
            for _ in range(20):
                with self.server.connect() as client:
                    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                             struct.pack("ii", 1, 0))
                    client.send(data)
        with self.server.connect() as client:
            self.assertEqual(client.ask(KEY)[2], VALUE)
        self.assertEqual(self.server.log.count(b"\n"), 1, self.server.log)

    def test_a_large_last_answer_arrives_whatever_is_sent_behind_its_request(self):
        with data_file(KEY + b" " + b"x" * 8000000) as path, Serving(path) as server:
            for fields in (b"Connection: close\r\n", b"Connection: close, x\r\n"):
                for behind in (b"\r\n", self.PLAIN * 200):
                    with self.subTest(fields + behind[:9]), server.connect() as client:
                        client.send(self.LINE + self.HOST + fields + b"\r\n")
                        client.receive()  # it is on its way
                        client.send(behind)
                        self.assertEqual(len(client.answer()[2]), 8000000)
                        self.assertEqual(client.rest(), b"")

    def test_mutated_heads(self):
        """Each is answered as the rules say, by whole answers and nothing else."""
        chance = random.Random(9112)
        heads = [head for _, head in self.KEPT + self.CLOSED if len(head) < 400]
        pieces = (b"\r", b"\n", b"\r\n", b" ", b"\t", b":", b"\0", b",", b"0", b"/",
                  b"Host: x\r\n", b"\xff" * 9)
        statuses = set()
        for _ in range(3000):
            sent = bytearray(chance.choice(heads))
            for _ in range(chance.choice((1, 1, 1, 2, 5))):
                where = chance.randrange(len(sent))
                what = chance.choice(pieces + (bytes([chance.randrange(256)]),))
                sent[where:where + chance.choice((0, 1, 1, 4))] = what
            sent = bytes(sent)
            rest = self.answers([sent])
            for head, status, last in self.ruled(sent):
                statuses.add(status)
                answer = re.match(br"HTTP/1\.1 %d [A-Z][ -~]*\r\n"
                                  br"(?:[A-Z][A-Za-z-]*: [ -~]+\r\n)+\r\n" % status, rest)
                self.assertTrue(answer, (sent, status, rest))
                self.assertEqual(b"\r\nConnection: close\r\n" in answer.group(), last, sent)
                rest = rest[answer.end():]
                size = re.search(br"Content-Length: (\d+)", answer.group())
                if size and not head.startswith(b"HEAD "):
                    self.assertGreaterEqual(len(rest), int(size.group(1)), sent)
                    rest = rest[int(size.group(1)):]
            self.assertEqual(rest, b"", sent)
        self.assertEqual(statuses, {200, 204, 400, 404, 405, 417, 501, 505})
        with self.server.connect() as client:
            self.assertEqual(client.ask(KEY)[2], VALUE)
        self.assertEqual(self.server.log.count(b"\n"), 1, self.server.log)

    def ruled(self, received):
        """Yield each head in `received`, the status that kv.rules gives it, and if it is the last.
        """
        while received:
            found = kv.next_head(received)
            head, received = found.group(1), received[found.end():]
            _, status, text, *last = next(rule for rule in kv.rules(head) if not rule[0])
            if not status:  # it breaks off
                return
            last = not last or bool(last[0])  # what is refused without a word about it is so
            yield head, 404 if status == 200 and text not in (b"", KEY) else status, last
            if last:
                return

    @unittest.skipUnless(os.path.exists("/proc/self/status"), "needs /proc")
    def test_threads_are_used_again(self):
        def threads():
            with open("/proc/%d/status" % self.server.process.pid) as file:
                return int(re.search(r"Threads:\s+(\d+)", file.read()).group(1))

        with Serving(EXAMPLE) as self.server:
            descriptors = "/proc/%d/fd" % self.server.process.pid
            for _ in range(300):
                self.assertIn(VALUE, self.answers([self.PLAIN]))
            self.assertLess(threads(), 10)
            until(lambda: len(os.listdir(descriptors)) < 20)  # and descriptors given back


@ON_POSIX
class LimitsTest(unittest.TestCase):
    """Section 4: what a server meets in years."""

    def changed(self, statements, *arguments):
        """Return a server of kv.py with some of it changed first, such as a limit shortened."""
        program = "import sys, kv\n%s\nsys.exit(kv.main())" % statements
        return Serving(command=[sys.executable, "-c", program, "serve", "--port", "0"]
                       + list(arguments), cwd=HERE)

    def seconds(self, server, sent, answers, trickle, _):
        """Return how long the server keeps a client that gets `answers` and then sends `trickle`
        all the time.
        """
        start = time.monotonic()
        with server.connect() as client, contextlib.suppress(ConnectionError):
            client.send(sent)
            for _ in range(answers):
                self.assertEqual(client.answer()[0], 200)
            client.socket.settimeout(0.05)
            more = True
            while more and time.monotonic() < start + PATIENCE:
                client.send(trickle)
                with contextlib.suppress(socket.timeout):
                    more = client.receive()
            self.assertEqual(client.received, b"")
        return time.monotonic() - start

    def test_silent_and_trickling_clients_are_ended_at_their_deadline(self):
        asked = b"GET / HTTP/1.1\r\nHost: kv\r\n\r\n"
        with self.changed("kv.IDLE_SECONDS, kv.HEAD_SECONDS = 0.7, 1.4", EXAMPLE) as server:
            for row, running in side_by_side(self.seconds, (
                    (server, b"", 0, b"", 0.7),
                    (server, asked, 1, b"", 0.7),
                    (server, b"", 0, b"a", 1.4),
                    (server, asked + b"GET", 1, b"a", 1.4))):
                with self.subTest(row[1:]):
                    self.assertGreaterEqual(running.result(), row[-1])
                    self.assertLess(running.result(), 8)

    def test_a_client_that_does_not_take_its_answer(self):
        """While it is being answered it keeps its place, until its time is up."""
        with data_file(key(1) + b" " + b"x" * 20000000 + b"\n" + key(2) + b" short") as path:
            with self.changed("kv.ANSWER_SECONDS, kv.ANSWER_BYTES = 0.7, 10**9",
                              path, "--max-connections", "1") as server, server.connect() as client:
                start = time.monotonic()
                client.send(b"GET /" + key(1) + b" HTTP/1.1\r\nHost: kv\r\n\r\n")
                client.receive()
                with server.connect() as other:
                    self.assertEqual(other.ask(key(2))[2], b"short")
                    self.assertGreaterEqual(time.monotonic() - start, 0.7)

    def test_a_client_that_is_being_answered_is_not_one_that_waits(self):
        with data_file(key(1) + b" " + b"x" * 20000000 + b"\n" + key(2) + b" short") as path:
            with Serving(path, "--max-connections", "2") as server, server.connect() as client:
                client.send(b"GET /" + key(1) + b" HTTP/1.1\r\nHost: kv\r\n\r\n")
                client.receive()
                with server.connect() as idle, server.connect() as other:
                    self.assertEqual(other.ask(key(2))[2], b"short")
                    self.assertEqual(idle.rest(), b"")
                    self.assertEqual(len(client.answer()[2]), 20000000)
                    self.assertEqual(client.ask(key(2))[2], b"short")

    def test_a_client_that_takes_its_answer_slowly_gets_it_whole(self):
        with data_file(key(1) + b" " + b"x" * 20000000) as path:
            with self.changed("kv.ANSWER_SECONDS, kv.ANSWER_BYTES = 0.2, 500000", path) as server:
                with server.connect() as client:  # 40 s and more by those figures
                    client.send(b"GET /" + key(1) + b" HTTP/1.1\r\nHost: kv\r\n\r\n")
                    for _ in range(5):
                        client.receive()
                        time.sleep(0.1)
                    self.assertEqual(len(client.answer()[2]), 20000000)

    def test_a_refused_client_that_stays_is_left_in_the_end(self):
        with self.changed("kv.LAST_SECONDS = 0.5", EXAMPLE, "--max-connections", "1") as server:
            with server.connect() as client, server.connect() as other:
                client.send(b"bad\r\n\r\n")
                self.assertEqual(client.answer()[0], 400)
                self.assertEqual(other.ask(KEY)[2], VALUE)

    def test_no_name_is_looked_up(self):
        """HTTPServer asks for the name of its address, which may take long without a DNS server."""
        with self.changed("import socket; del socket.getfqdn, socket.gethostbyaddr",
                          EXAMPLE) as server:
            with server.connect() as client:
                self.assertEqual(client.ask(KEY)[2], VALUE)

    def test_answers_are_not_held_back(self):
        """By Nagle's algorithm: an answer that goes out while another is not acknowledged yet."""
        tell = ("import socket\n"
                "finish = kv.Handler.finish\n"
                "def tell(handler):\n"
                "    kv.log('%s' % bool(handler.request.getsockopt(\n"
                "        socket.IPPROTO_TCP, socket.TCP_NODELAY)))\n"
                "    finish(handler)\n"
                "kv.Handler.finish = tell\n")
        with self.changed(tell, EXAMPLE) as server:
            with server.connect() as client:
                self.assertEqual(client.ask(KEY)[2], VALUE)
            until(lambda: server.log.count(b"\n") == 2)
        self.assertTrue(server.log.endswith(b"\nkv: True\n"), server.log)

    @unittest.skipUnless(hasattr(os, "sched_getaffinity") and os.path.exists("/proc/self/task"),
                         "needs /proc and what tells the processors of a process")
    def test_all_threads_run_on_the_one_processor_that_the_port_names(self):
        allowed = sorted(os.sched_getaffinity(0))
        if len(allowed) < 2 or not getattr(sys, "_is_gil_enabled", lambda: True)():
            self.skipTest("needs several processors and a GIL")
        for number, processor in enumerate(allowed[:2]):  # Linux itself gives out odd ports only
            serve = command("serve", EXAMPLE, "--port", str(free_port(number, len(allowed))))
            with Serving(command=serve) as server, server.connect() as client:
                client.ask(KEY)
                for thread in os.listdir("/proc/%d/task" % server.process.pid):
                    self.assertEqual(os.sched_getaffinity(int(thread)), {processor})

    def test_newcomers_take_the_place_of_those_that_wait_longest(self):
        tell = ("allow = kv.Handler.allow\n"
                "def tell(*arguments):\n"
                "    allow(*arguments)\n"
                "    kv.log('deadline')\n"
                "kv.Handler.allow = tell\n")
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(self.changed(tell, EXAMPLE, "--max-connections", "3"))
            first, second, third = (stack.enter_context(server.connect()) for _ in range(3))
            for asked, client in enumerate((second, first, third), 1):
                self.assertEqual(client.ask(KEY)[2], VALUE)
                # until it waits again: each has a deadline first of all, for an answer, after it
                until(lambda: server.log.count(b"kv: deadline\n") == 3 + 2 * asked)
            fourth = stack.enter_context(server.connect())
            self.assertEqual(fourth.ask(KEY)[2], VALUE)
            self.assertEqual(second.rest(), b"")
            for client in (first, third, fourth):
                self.assertEqual(client.ask(KEY)[2], VALUE)

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
            crowd.join()

    @unittest.skipUnless(os.path.exists("/proc/self/stat"), "needs /proc")
    def test_too_few_descriptors(self):
        """All connect, the later ones instead of the earlier; and it does not spin meanwhile."""
        import resource

        def processor_seconds():
            with open("/proc/%d/stat" % server.process.pid) as file:
                fields = file.read().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))
        with Serving(EXAMPLE, preexec_fn=limit) as server, contextlib.ExitStack() as stack:
            self.assertIn(b"kv: a limit of 50 open files is too low for --max-connections\n",
                          server.log)
            self.crowd(stack, server, 200)
            with server.connect() as client:
                self.assertEqual(client.ask(KEY)[2], VALUE)
                start, before = time.monotonic(), processor_seconds()
                time.sleep(1)
                self.assertLess(processor_seconds() - before, 0.3 * (time.monotonic() - start))
                self.assertEqual(client.ask(KEY)[2], VALUE)

    def test_too_few_threads(self):
        """As when the system has no more of them: those there are serve all, one by one."""
        few = ("start = kv.threading.Thread.start\n"
               "def start_few(thread):\n"
               "    if kv.threading.active_count() >= 5: raise RuntimeError('no more threads')\n"
               "    start(thread)\n"
               "kv.threading.Thread.start = start_few\n")
        with self.changed(few, EXAMPLE) as server, contextlib.ExitStack() as stack:
            self.crowd(stack, server, 20)
            for _ in range(20):
                with server.connect() as client:
                    self.assertEqual(client.ask(KEY)[2], VALUE)

    def test_a_fault_is_a_line_and_a_500(self):
        broken = ("kv.load = lambda *_: type('Broken', (dict,), "
                  "{'get': lambda *_: {}['a fault'], '__len__': lambda _: 1})()")
        with self.changed(broken, EXAMPLE) as server, server.connect() as client:
            for _ in range(2):
                status, fields, body = client.ask(KEY)
                self.assertEqual(status, 500)
                self.assertRegex(body, br"\A[^\n]+\n\Z")
            self.assertEqual(client.ask(b"")[0], 200)
            until(lambda: server.log.count(b"\n") == 3)
            self.assertEqual(server.log.count(b"kv: fault in answering 127.0.0.1: KeyError"), 2)

    def test_clients_that_reset_while_they_are_answered(self):
        with data_file(key(1) + b" " + b"x" * 5000000) as path, Serving(path) as server:
            for _ in range(20):
                with server.connect() as client:
                    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                             struct.pack("ii", 1, 0))
                    client.send(b"GET /" + key(1) + b" HTTP/1.1\r\nHost: kv\r\n\r\n")
                    client.receive()
            with server.connect() as client:
                self.assertEqual(len(client.ask(key(1))[2]), 5000000)
            self.assertEqual(server.log.count(b"\n"), 1, server.log)

    def test_memory_does_not_grow_with_requests(self):
        def resident():
            with open("/proc/%d/status" % server.process.pid) as file:
                return int(re.search(r"VmRSS:\s+(\d+)", file.read()).group(1))

        valid = b"GET /" + KEY + b" HTTP/1.1\r\nHost: kv\r\n\r\n"
        missing = valid.replace(KEY, ABSENT) + b"HEAD" + valid[3:] + valid.replace(KEY, b"x")
        with Serving(EXAMPLE) as server:
            sizes = []
            for n in range(200):
                with server.connect() as client:  # 996 that keep the connection, one that does not
                    client.send(valid * 498 + missing * 166 + b"bad\r\n\r\n")
                    client.socket.shutdown(socket.SHUT_WR)
                    self.assertEqual(client.rest().count(b"\r\nServer: "), 997)
                    client.received = b""
                if n in (19, 199) and os.path.exists("/proc/self/status"):
                    sizes.append(resident())
            if platform.python_implementation() == "CPython" and sizes:
                self.assertLess(sizes[1] - sizes[0], 300)  # kB: less than 2 bytes a request

    def test_without_what_windows_lacks(self):
        with self.changed("import signal; del signal.SIGHUP; sys.modules['resource'] = None; "
                          "sys.modules.pop('kv'); import kv", EXAMPLE) as server:
            with server.connect() as client:
                self.assertEqual(client.ask(KEY)[2], VALUE)
            self.assertEqual(server.stop(), 0)


@ON_POSIX
class ReloadTest(unittest.TestCase):
    """Section 4: new data, and the end."""

    COUNT = 2000

    def write(self, path, value, count=COUNT):
        """Replace the file as the README says it: write another one and move it there."""
        with open(path + ".new", "wb") as file:
            file.writelines(key(n) + b" %b %d\n" % (value, n) for n in range(count))
        os.replace(path + ".new", path)

    @contextlib.contextmanager
    def load(self, server, connections=8):
        """Ask on, on many connections; yields a list of what is answered, each (number, answer)."""
        answers, stop = [], threading.Event()

        def ask(number):
            with server.connect() as client:
                while not stop.is_set():
                    try:
                        answers.append((number % self.COUNT, client.ask(key(number % self.COUNT))))
                    except (EOFError, ConnectionError) as error:
                        return answers.append((client.received, error))
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
                thread.join()

    def test_reload_under_load(self):
        with data_file(b"") as path:
            self.write(path, b"old")
            with Serving(path) as server, self.load(server) as answers, server.connect() as client:
                for turn in range(5):
                    done = len(answers)
                    self.write(path, b"new%d" % turn)
                    server.process.send_signal(signal.SIGHUP)
                    until(lambda: server.log.count(b" s, reloaded\n") == turn + 1)
                    for n in range(100):
                        self.assertEqual(client.ask(key(n))[::2], (200, b"new%d %d" % (turn, n)))
                    until(lambda: len(answers) > done + 100)
            for number, (status, _, body) in answers:
                self.assertRegex(body, b"^(old|new[0-4]) %d$" % number)
                self.assertEqual(status, 200)
            self.assertRegex(server.log, br"kv: 2000 pairs of [^\n]* in \d+\.\d\d s, reloaded\n")

    def test_bad_files_leave_the_data(self):
        for options in ((), ("--sorted",)):
            with self.subTest(options), data_file(b"") as path:
                self.write(path, b"old")
                self.check_bad_files(path, options)

    def check_bad_files(self, path, options):
        with Serving(path, *options) as server, server.connect() as client:
            for content, fault in ((b"bad", b":1: no version 4 UUID"),
                                   (b"", b": no pair in it"),
                                   (None, b": No such file or directory"),
                                   (key(1) + b" v\n" + key(2)[:20], b":2: no version 4 UUID")):
                os.path.exists(path) and os.remove(path)
                if content is not None:
                    with open(path, "wb") as file:
                        file.write(content)
                logged = len(server.log)
                server.process.send_signal(signal.SIGHUP)
                until(lambda: server.log.endswith(b"kv: the data stays as it was\n", logged))
                self.assertIn(b"kv: " + path.encode() + fault, server.log[logged:])
                for n in range(0, self.COUNT, 10):
                    self.assertEqual(client.ask(key(n))[2], b"old %d" % n)

    def test_standard_input_cannot_be_reloaded(self):
        with data_file(key(1) + b" value") as path, open(path) as file:
            with Serving("-", stdin=file) as server, server.connect() as client:
                server.process.send_signal(signal.SIGHUP)
                until(lambda: b"kv: standard input cannot be read again" in server.log)
                self.assertEqual(client.ask(key(1))[2], b"value")

    def test_many_signals_during_a_reload_are_one(self):
        def again():
            server.process.send_signal(signal.SIGHUP)
            return client.ask(key(1))[2] == b"new 1"

        with data_file(b"") as path:
            self.write(path, b"old", 20000)
            with Serving(path) as server, server.connect() as client:
                server.process.send_signal(signal.SIGHUP)
                self.write(path, b"new", 20000)
                until(again)  # a reload takes many times as long as a look does
                self.assertEqual(server.stop(), 0)
                server.reader.join()
                self.assertLessEqual(server.log.count(b" s, reloaded\n"), 3)

    def test_stop_under_load(self):
        """All that was read is answered whole; the last answer of a connection says so."""
        for how in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(how), data_file(b"") as path:
                self.write(path, b"value")
                with Serving(path) as server, server.connect() as idle:
                    with self.load(server) as answers:
                        start = time.monotonic()
                        self.assertEqual(server.stop(how), 0)
                        self.assertLess(time.monotonic() - start, 5)
                    self.assertEqual(idle.rest(), b"")
                    with self.assertRaises(ConnectionError):
                        server.connect()
                for number, answer in answers:
                    if isinstance(answer, Exception):  # not read: there is nothing of an answer
                        self.assertEqual(number, b"")
                    else:
                        self.assertEqual(answer[::2], (200, b"value %d" % number))

    def test_stop_answers_each_of_the_requests_that_came_together(self):
        batch = b"GET /" + KEY + b" HTTP/1.1\r\nHost: kv\r\n\r\n"
        counts = []

        def ask(client):
            with contextlib.suppress(EOFError, ConnectionError):
                while True:
                    counts.append(0)
                    client.send(batch * 40)
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
                asking.join()
        self.assertLessEqual(set(counts), {0, 40})

    def test_a_second_signal_ends_it_now(self):
        with data_file(key(1) + b" " + b"x" * 20000000) as path, Serving(path) as server:
            with server.connect() as client:
                client.send(b"GET /" + key(1) + b" HTTP/1.1\r\nHost: kv\r\n\r\n")
                client.receive()  # and takes no more, which would keep the server for a while
                start = time.monotonic()
                server.process.send_signal(signal.SIGINT)
                with self.assertRaises(ConnectionError):
                    until(lambda: server.connect().__exit__())
                server.stop(signal.SIGINT)
                self.assertLess(time.monotonic() - start, 3)

    def test_killed_and_started_again_on_the_same_port(self):
        with Serving(EXAMPLE) as server, self.load(server, 4):
            server.stop(signal.SIGKILL)
        with Serving(command=command("serve", EXAMPLE, "--port", str(server.port))) as again:
            with again.connect() as client:
                self.assertEqual(client.ask(KEY)[2], VALUE)


def readme():
    """Return the text (str) of README.md, "" where the tests were copied without it."""
    with contextlib.suppress(OSError), open(os.path.join(HERE, "README.md"), "rb") as file:
        return file.read().decode()
    return ""


def program(name):
    """Return the path of a program, on PATH or where only root's PATH leads, or None."""
    import shutil
    return shutil.which(name) or shutil.which(name, path="/usr/local/sbin:/usr/sbin:/sbin")


@ON_POSIX
@unittest.skipUnless(readme(), "needs README.md")
class ReadmeTest(unittest.TestCase):
    """What README.md shows, word for word, in a folder with nothing but kv.py and example.data."""

    ATTENDED = r"\b(sudo|systemctl|unittest|bench|nginx|haproxy)\b"  # not run by a test

    def test_its_length_and_its_top(self):
        lines = readme().splitlines()
        self.assertLessEqual(len(lines), 300)
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
                with open(os.path.join(HERE, name), "rb") as file:
                    content = file.read()
                with open(os.path.join(folder, name), "wb") as file:
                    file.write(content)
            for name, content in (("python", '#!/bin/sh\nexec "%s" "$@"\n' % sys.executable),
                                  (".curlrc", "silent\n")):  # as it is when on a terminal
                with open(os.path.join(programs, name), "w") as file:
                    file.write(content)
                os.chmod(file.name, 0o700)

            def serve(line, lines):
                server.close()  # the one before, on the same port
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", 8000), 1):
                    self.skipTest("port 8000 is taken")
                started = Serving(command=["sh", "-c", "exec " + line.rstrip(" &")], cwd=folder)
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
class ProxyTest(unittest.TestCase):
    """README.md's configurations of proxies, with other ports, in front of real servers."""

    ODD = [(b"%x" % (n % 16) + key(n)[1:], value) for n, value in enumerate(DataFileTest.VALUES)]
    COUNT = 1000

    @contextlib.contextmanager
    def proxy(self, name, folder, servers):
        """Run what README.md has the file `name` for, in `folder`; yields where it answers."""
        block = re.search(r"(?m)^    # %s, run by: (.*)\n((?:    .*\n)+)" % name, readme())
        arguments = block.group(1).split()
        arguments[0] = program(arguments[0]) or self.skipTest("needs " + arguments[0])
        address = ("127.0.0.1", free_port(0, 1))
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
                with contextlib.suppress(OSError), Connection(address):
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
        with Connection(address) as client, server.connect() as direct:
            for k, value in self.ODD:
                self.assertEqual(client.ask(k)[::2], (200, value))
                self.assertEqual(client.ask(k.upper())[::2], (200, value))
            for method, target in itertools.product(("GET", "HEAD", "POST"), keys + [
                    b"F" + ABSENT[1:], ABSENT, KEY[1:], b"%33" + KEY[1:], KEY + b"?", b"/" + KEY,
                    b"nonsense"]):
                with self.subTest(method=method, target=target):
                    answers = [connection.ask(target, method, b"Accept-Encoding: gzip\r\n")
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
                client = client or stack.enter_context(Connection(address))
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
                file.write(b"\n\n".join(lines + odd))
            script = "".join(re.findall(r"(?m)^    (.* grep .*\n)", readme()))
            subprocess.run(["sh", "-e", "-c", script], cwd=folder, check=True, timeout=PATIENCE)
            servers = [stack.enter_context(Serving(os.path.join(folder, "%d.data" % n)))
                       for n in range(4)]
            address = stack.enter_context(self.proxy("shards.conf", folder, servers))
            self.check(address, stack.enter_context(Serving(path)))
            with Connection(address) as client:
                self.assertRegex(client.ask(b"")[2], br"\A\d{4} pairs of 0\.data, ")

            def ask(*lines):
                return list(self.ask(address, (line[:36] for line in lines)))

            for part, running in side_by_side(ask, [lines[n::4] for n in range(4)]):
                self.assertEqual(running.result(), [(200, line[37:]) for line in part])
            self.assertEqual(len(lines), 10000)

    def test_replicas(self):
        rows = (("replicas.conf",), ("haproxy.cfg",))
        for row, running in side_by_side(self.replicas, rows):
            with self.subTest(*row):
                running.result()

    def write(self, path, word):
        with open(path + ".new", "wb") as file:
            file.writelines(key(n + 100) + b" %b %d\n" % (word, n) for n in range(self.COUNT))
            file.writelines(k + b" " + value + b"\n" for k, value in self.ODD)
        os.replace(path + ".new", path)

    def replicas(self, name):
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
                servers[n] = stack.enter_context(Serving(paths[n], "--port", str(port)))

            for n, path in enumerate(paths):
                self.write(path, b"first%d" % n)
                start(n, free_port(0, 1))
            address = stack.enter_context(self.proxy(name, folder, servers))
            self.check(address, servers[0])
            stack.callback(stop.set)
            clients = [pool.submit(ask) for _ in range(4)]
            wait(b"first0", b"first1")
            for n, path in enumerate(paths):
                self.write(path, b"again%d" % n)
                self.assertEqual(servers[n].stop(), 0)
                wait(*[b"first1", b"again0"][n:n + 1])
                time.sleep(0.2)  # while only the other one answers
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
TIMED = "\nimport sys, time; start = time.perf_counter(); pairs = load(sys.argv[2])" \
        "\nprint(time.perf_counter() - start, len(pairs))"
MEASURED = (  # name, what defines its load, what Python runs: before FILE, before URL KEY
    ("kv", "from kv import load", command("serve", "--port", "0")[1:], command("get", "--url")[1:]),
    ("sorted", "import kv\nload = lambda path: kv.load(path, True)",
     command("serve", "--port", "0", "--sorted")[1:], command("get", "--url")[1:]),
    ("plain", PLAIN, ["-c", PLAIN, "serve"], ["-c", PLAIN_GET]))  # the last: what others relate to
FIGURES = (   # what `figures` yields, and whether more is better
    ("start, until it listens: ms", 0), ("memory: MB resident", 0), ("memory: bytes a pair", 0),
    ("loading or checking: pairs a second", 1), ("loading or checking: MB a second", 1),
    ("one connection *: p50 in us", 0), ("one connection *: p99 in us", 0),
    ("a new connection each: p50 in us", 0), ("a new connection each: p99 in us", 0),
    ("16 connections *: answers a second", 1), ("get, as a process: ms", 0))


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


def client(port, path, fields, connections):
    """Ask for the lines of a file for SECONDS; print answers a second, p50 and p99 in us."""
    with open(path, "rb") as file:
        lines = list(file)
    random.shuffle(lines)
    lines = itertools.cycle(lines)
    print("ready", flush=True)
    sys.stdin.readline()
    idle, waiting, took, start = [None] * connections, {}, [], time.perf_counter()
    while idle or waiting:
        for link in idle:
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
        head, end, body = answer.partition(b"\r\n\r\n")
        right = (head[8:13] == b" 200 "
                 and b"\r\nContent-Length: %d\r\n" % len(value) in head + b"\r\n")
        if end and (not right or len(body) >= len(value)):
            break
    if not right or body != value:
        sys.exit("wrong: %r where %r was to come" % (answer, value))
    return head.startswith(b"HTTP/1.1") and b"\r\nConnection: close" not in head


def python(*arguments):
    """Run Python to its end; return what it printed."""
    return subprocess.run((sys.executable,) + arguments, stdout=subprocess.PIPE, check=True,
                          **APART).stdout


def clients(server, sample, fields=b"", processes=1, connections=1):
    """Run clients, which all start to ask at the same time; return what they print, summed up."""
    asking = "import test_kv; test_kv.client(%d, %r, %r, %d)" % (
        server.port, sample, fields, connections)
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
    if not os.path.exists("/proc/self/status"):
        return 0
    with open("/proc/%d/status" % server.process.pid) as file:
        return int(re.search(r"VmRSS:\s+(\d+) kB", file.read()).group(1)) * 1024


def figures(server, count, sample, line):
    """Yield the FIGURES of one round one by one, so that the servers take turns."""
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
    for fields in (b"", b"Connection: close\r\n"):
        tell("one request after the other: " + name)
        _, median, high = clients(server, sample, fields)
        yield median
        yield high
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
        folder = stack.enter_context(tempfile.TemporaryDirectory())
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
        del lines
        servers = []
        for row in MEASURED:
            tell("starting: " + row[0])
            serve = [sys.executable] + row[2]
            with Serving(command=serve + [one], start_new_session=True) as server:
                empty = resident(server)  # the same program, with no data to speak of
            here = ordered if row[0] == "sorted" else path
            start = time.perf_counter()
            server = stack.enter_context(Serving(command=serve + [here], start_new_session=True))
            server.start, server.path = time.perf_counter() - start, here
            server.row, server.empty, server.memory = row, empty, resident(server)
            servers.append(server)
        rounds = [list(zip(*(figures(server, count, sample, some[0]) for server in servers)))
                  for _ in range(ROUNDS)]
        tell("")
        print("%s processors, %s %s, %s; %d pairs, %.1f MB; medians of %d rounds" % (
            os.cpu_count(), platform.python_implementation(), platform.python_version(),
            platform.platform(), count, os.path.getsize(path) / 1e6, ROUNDS))
        print("%-36s" % "" + "".join("%11s" % row[0] for row in MEASURED) + "   kv better by")
        for number, (title, more) in enumerate(FIGURES):
            values = [statistics.median(v) for v in zip(*(r[number] for r in rounds))]
            if all(values):
                print("%-36s" % title + "".join("{:11,.0f}".format(v) for v in values)
                      + "%13.1f x" % (values[0] / values[-1] if more else values[-1] / values[0]))
        print("* plain speaks HTTP/1.0 and closes: a new connection for each request")


if __name__ == "__main__":
    if sys.argv[1:2] == ["bench"]:
        try:
            bench(*sys.argv[2:3])
        except KeyboardInterrupt:
            sys.exit("stopped")
    else:
        unittest.main()
