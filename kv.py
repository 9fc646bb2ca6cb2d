#!/usr/bin/env python3
"""kv: a read-only key-value server in one file.

    python kv.py serve example.data    answers GET /KEY with the value of KEY in that file
    python kv.py get KEY               asks such a server for the value of KEY

The file reads in the order that the data takes:

    Limits             every limit, with its unit
    Messages           what people read: complaints of a command, the log of a server
    The data file      parse: a line of the file becomes a pair of a dict
    Sorted files       Sorted: the pairs of a file that is too large for a dict
    Loading            Data: the pairs that are served, now and after a reload
    Requests           judge: the head of a request becomes a verdict
    Answers            answer_head: a status becomes the head of an answer
    Threads            Handler: what is done for a client that makes the server wait
    The loop           Server: all the rest, for all clients
    serve              a command becomes a server that listens
    get                an answer becomes a value on the terminal
    The command line

A request passes through four methods of Server:

    receive            takes what a client has sent
    answer_requests    cuts it into the heads of requests
    answer             has a head judged and its key looked up
    send               sends all answers at once; the rest, if any, is sent by a Handler
"""
import sys

if sys.version_info < (3, 7):
    sys.exit("kv: needs Python 3.7 or newer, but this is %d.%d" % sys.version_info[:2])

import _thread
import argparse
import bisect
import collections
import datetime
import email.utils
import errno
import functools
import http.client
import http.server
import itertools
import os
import re
import select
import selectors
import signal
import socket
import socketserver
import stat
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from typing import (
    BinaryIO, Callable, Deque, Dict, Iterable, Iterator, List, NamedTuple, Optional, Set,
    Tuple, Union)

__version__ = "2.0"


# ---------------------------------------------------------------------------
# Limits

# The data file
STEP_LINES = 256              # parsed, or pairs freed, between two looks at the requests
BAD_LINES_SHOWN = 10          # of a file that is refused; the others are counted
BAD_LINE_BYTES = 50           # shown of each
PROGRESS_SECONDS = 1.0        # a load that takes longer shows its progress

# Sorted files
PAGE_BYTES = 4096             # read at a time in a look-up
MARK_BYTES = 1 << 16          # from one mark to the next
MARKS = 20000                 # at most; in larger files they are further apart

# Requests
RECEIVE_BYTES = 8192          # taken from a connection at a time
LINE_BYTES = 8000             # of a request line, without its line end
HEAD_BYTES = 16000            # of a head, with the empty line at its end
METHOD_BYTES = 17             # of the longest method there is, UPDATEREDIRECTREF
VERDICTS = 1024               # that are remembered
VERDICT_BYTES = 2000          # of a head; the verdict on a longer one is not remembered

# Answers
PIECE_BYTES = 1 << 14         # of a value; a longer one is sent from where it lies
SENT_BYTES = 1 << 18          # at a time; a thread sends what is more
ANSWER_SECONDS = 10           # for a client to take an answer, and one more
ANSWER_BYTES_A_SECOND = 10000     # for each so many bytes of it
STALL_SECONDS = 10            # for a client that takes nothing
LINGER_SECONDS = 3            # for a client whose request was refused to stop sending

# Connections
MAX_CONNECTIONS = 10000       # without --max-connections
SPARE_DESCRIPTORS = 32        # for other files than connections
ACCEPT_QUEUE = 1000           # connections that the system keeps until they are accepted
IDLE_SECONDS = 650            # between two requests; load balancers close earlier
HEAD_SECONDS = 10             # from the first byte of a head to its last
DRAIN_SECONDS = 4             # for all connections to end when the server stops
DRAIN_IDLE_SECONDS = 0.5      # between two requests in that time

# The loop
TICK_SECONDS = 0.1            # between two looks at deadlines, signals and the date
PATIENCE_SECONDS = 0.0001     # of looking for more requests before the loop goes to sleep

# get
DEFAULT_URL = os.environ.get("KV_URL") or "http://127.0.0.1:8000"
DEFAULT_TIMEOUT = 10.0        # seconds
MAX_TIMEOUT = 1000000         # seconds; sockets do not accept much more
MAX_VALUE_BYTES = 1 << 31     # that are taken from a server


# ---------------------------------------------------------------------------
# Messages

def escape(text: str) -> str:
    """Return `text` on one line: all that does not print becomes an escape sequence."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def complain(text: str) -> None:
    """Say what is wrong to whoever runs the command, on standard error, in one or more
    lines.
    """
    if sys.stderr is not None:  # as it is if it was closed before Python started
        print("kv: " + text.replace("\n", "\nkv: "), file=sys.stderr)


class Log:
    """The log of a server, on standard error. Writing to it never waits.

    A line that standard error does not take at once is lost: neither a pipe that nobody
    reads nor a terminal that was stopped by Ctrl-S may hold up the server.
    """

    def __init__(self) -> None:
        self.descriptor = 2
        self.is_open = sys.stderr is not None
        self.is_terminal = self.is_open and os.isatty(2)
        if self.is_terminal or self.is_open and stat.S_ISFIFO(os.fstat(2).st_mode):
            # Descriptor 2 is shared with other programs, such as the shell, which must
            # not find it non-blocking. So the pipe or terminal is opened once more.
            try:
                self.descriptor = os.open(
                    "/dev/stderr", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            except (OSError, AttributeError):
                pass

    def write(self, line: str) -> None:
        """Write a line, which is given without its newline."""
        if not self.is_open:
            return
        try:
            if os.name == "posix" and not select.select([], [self.descriptor], [], 0)[1]:
                return
            os.write(self.descriptor, line.encode("utf-8", "backslashreplace") + b"\n")
        except OSError:
            pass  # nobody reads it any more

    def __call__(self, text: str) -> None:
        """Write each line of `text`, after the time unless a terminal shows it at once.
        """
        start = "kv: "
        if not self.is_terminal:
            now = datetime.datetime.now().astimezone()
            start = f"{now.isoformat(timespec='seconds')} kv: "
        for line in text.split("\n"):
            self.write(start + line)


# ---------------------------------------------------------------------------
# The data file
#
# A line is a key, one space, a value and a newline. It becomes a pair of a dict, in
# bytes.

KEY = rb"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
KEY_RE = re.compile(KEY)                                 # RFC 9562 section 5.4
KEY_BYTES = 36
KEY_IN_EITHER_CASE = KEY.replace(b"a-f]", b"a-fA-F]").replace(b"ab]", b"abAB]")
PAIR_RE = re.compile(rb"(" + KEY_IN_EITHER_CASE + rb") (.*)\n?")
SORTED_PAIR_RE = re.compile(rb"(" + KEY + rb") (.*)\n?")

# To tell what is wrong with a line
UUID_RE = re.compile(
    rb"(?i)[0-9a-f]{8}-[0-9a-f]{4}-([0-9a-f])[0-9a-f]{3}-([0-9a-f])[0-9a-f]{3}"
    rb"-[0-9a-f]{12}")
UUID_WITHOUT_HYPHENS_RE = re.compile(rb"(?i)[0-9a-f]{32}\b")
BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
COMPRESSED = (  # the first bytes of such a file, its format, what unpacks it
    (b"\x1f\x8b", "gzip", "zcat"),
    (b"BZh", "bzip2", "bzcat"),
    (b"\xfd7zXZ\0", "xz", "xzcat"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstdcat"),
)


def open_data(path: Union[str, int]) -> BinaryIO:
    """Open the data file at `path`, or standard input if that is 0. Raises OSError."""
    if path == 0 and sys.stdin is None:
        raise OSError(errno.EBADF, "it is closed")
    file = open(path, "rb", closefd=path != 0)
    mode = os.fstat(file.fileno()).st_mode
    if (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)) and not file.isatty():
        file.close()
        raise OSError(errno.EINVAL, "a device, not a file")  # /dev/zero has no end
    return file


def data_name(path: Union[str, int]) -> str:
    """Return what messages call the data file at `path`."""
    if path == 0:
        return "standard input"
    return escape(os.fsdecode(path)) or "''"


def stamp(descriptor: int) -> Tuple[int, int]:
    """Return the size and the modification time of an open file, to tell if it was
    changed.
    """
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def parse(file: BinaryIO, pairs: "Pairs") -> Iterator[None]:
    """Store the pairs of `file` in `pairs`, which is empty, and yield every STEP_LINES
    lines.

    Returns what is probably a mistake, each in a few words (a list of str). Raises
    OSError if the file cannot be read, and ValueError if it is not to be served; then the
    text says why, with a line for each bad line of the file.
    """
    name = data_name(file.name)
    pair_re = SORTED_PAIR_RE if isinstance(pairs, Sorted) else PAIR_RE
    stamp_before = stamp(file.fileno())
    faults = []
    bad_count = 0
    all_end_in_cr = True
    line = b""
    for number, line in enumerate(file, 1):
        if number % STEP_LINES == 0:
            yield
        if all_end_in_cr:
            all_end_in_cr = line.endswith(b"\r\n")
        pair = pair_re.fullmatch(line)
        if pair:
            key = pair[1].lower()
            if key not in pairs:
                pairs[key] = pair[2]
                continue
        if line == b"\n":
            continue
        if number == 1:
            refuse_compressed(line, name)
        bad_count += 1
        if bad_count <= BAD_LINES_SHOWN:
            shown = line.rstrip(b"\n")[:BAD_LINE_BYTES]
            faults.append(f"{name}:{number}: {what_is_wrong(line, pairs)}: {shown!r}")
    if bad_count > BAD_LINES_SHOWN:
        faults.append(f"{name}: and {bad_count - BAD_LINES_SHOWN} more bad lines")
    if not faults and file.seekable() and stamp(file.fileno()) != stamp_before:
        faults.append(f"{name}: changed while it was read")
    if not faults and not pairs:
        faults.append(f"{name}: no pair in it")
    if faults:
        raise ValueError("\n".join(faults))
    mistakes = []
    if not line.endswith(b"\n"):
        mistakes.append("the last line has no newline; was the file cut off?")
    if all_end_in_cr:
        mistakes.append("all values end in \\r; does the file have Windows line ends?")
    return mistakes


def refuse_compressed(line: bytes, name: str) -> None:
    """Raise ValueError if the first line of a file shows that it is compressed."""
    for beginning, kind, program in COMPRESSED:
        if line.startswith(beginning):
            raise ValueError(f"{name}: {kind} data; unpack it, as in: "
                             f"{program} FILE | python kv.py serve -")


def what_is_wrong(line: bytes, pairs: "Pairs") -> str:
    """Return what is wrong with a line that gave no new pair, in a few words."""
    if line.startswith(BYTE_ORDER_MARKS):
        return "a byte order mark before the key"
    if UUID_WITHOUT_HYPHENS_RE.match(line):
        return "a UUID without hyphens"
    identifier = UUID_RE.match(line)
    if not identifier:
        return "no version 4 UUID at the start of the line"
    if identifier[1] != b"4":
        return f"a UUID, but version {identifier[1].decode().lower()}, not 4"
    if identifier[2] not in b"89abAB":
        return "a UUID, but not of the variant of RFC 9562"
    if line[KEY_BYTES:KEY_BYTES + 1] != b" ":
        return "no space after the key"
    if isinstance(pairs, Sorted):
        if not SORTED_PAIR_RE.match(line):
            return "a key in upper case, which a sorted file cannot have"
        if line[:KEY_BYTES] < pairs.last_key:
            return "a key below the one before it; sort the file with LC_ALL=C sort"
    return "duplicate key, first on an earlier line"


# ---------------------------------------------------------------------------
# Sorted files
#
# Version 4 UUIDs are random. So where a key stands in a file that is sorted by its keys
# can be computed from the key itself, as one opens a dictionary at about the right page.

FIRST_KEY_RE = re.compile(rb"\n(" + KEY + rb") ")
LAST_KEY_RE = re.compile(rb"(?s).*\n(" + KEY + rb") ")


def key_number(key: bytes) -> int:
    """Return the 128 bits of a key as a number."""
    return int(key.replace(b"-", b""), 16)


class FileChanged(Exception):
    """A sorted file was changed in place while it is served."""


class Sorted:
    """The pairs of a file in byte order of its lower-case keys, looked up in the file
    itself.

    To the parser this is a dict that takes keys in ascending order only: `in`, item
    assignment, `len`. It does not keep them, but marks now and then what place in the
    file the parser has reached. To the server it is a dict with a `get`.

    A place is a number of bytes from the beginning of the file. Each line begins behind a
    newline; the one before the first line is taken to be at place -1.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file                         # which the parser reads, and closes
        self.descriptor = os.dup(file.fileno())  # for look-ups
        self.stamp = stamp(self.descriptor)
        self.size = self.stamp[0]
        self.count = 0
        self.last_key = b""
        # The newlines before lines with keys up to mark_numbers[n] are before
        # mark_places[n], those before all other lines are at that place or behind it.
        self.mark_numbers: List[int] = []
        self.mark_places: List[int] = []
        self.bytes_to_mark = max(MARK_BYTES, self.size // MARKS)
        self.bytes_since_mark = 0
        # The flag of preadv that makes it read only what is in memory, where there is
        # one.
        self.nowait_flag = getattr(os, "RWF_NOWAIT", 0)

    def __del__(self) -> None:
        os.close(self.descriptor)

    def __len__(self) -> int:
        return self.count

    def __contains__(self, key: bytes) -> bool:
        return key <= self.last_key

    def __setitem__(self, key: bytes, value: bytes) -> None:
        self.last_key = key
        self.count += 1
        self.bytes_since_mark += KEY_BYTES + len(value)
        if self.bytes_since_mark >= self.bytes_to_mark:
            self.bytes_since_mark = 0
            self.mark_numbers.append(key_number(key))
            self.mark_places.append(self.file.tell() - 1)

    def get(self, key: bytes, wait: bool = False) -> "Optional[Body]":
        """Return the value of `key`, or None if there is no such key.

        Raises BlockingIOError if that takes pages that are not in memory, or many pages,
        and it may not `wait` for them. Raises FileChanged if the file was changed in
        place.
        """
        if not KEY_RE.fullmatch(key):
            return None
        number = key_number(key)
        low = -1
        low_number = 0
        high = self.size
        high_number = 1 << 128
        mark = bisect.bisect_left(self.mark_numbers, number)
        if mark > 0:
            low = self.mark_places[mark - 1]
            low_number = self.mark_numbers[mark - 1]
        if mark < len(self.mark_numbers):
            high = self.mark_places[mark]
            high_number = self.mark_numbers[mark]
        # If there is a line with the key, the newline before it is at `low` or behind,
        # and before `high`. The keys of all lines of which this is true, as numbers, are
        # at least low_number and at most high_number.
        reads = 0
        while low < high:
            reads += 1
            if reads % 4 == 0:  # halve the range, in case the keys are not random
                guess = (low + high) // 2
            else:
                share = (number - low_number) / (high_number - low_number)
                guess = low + int(share * (high - low))
            start = max(low, guess - PAGE_BYTES // 2)
            place, page = self.read_page(start, high, wait)
            line = page.find(b"\n" + key + b" ")
            if line >= 0:
                return self.value_at(place, page, line + KEY_BYTES + 2, wait)
            first = FIRST_KEY_RE.search(page)
            if not first:
                high = start
            elif key < first[1]:
                high = start
                high_number = key_number(first[1])
            else:
                last = LAST_KEY_RE.match(page)
                if key < last[1]:
                    return None  # it would be between two keys of this page
                low = place + last.start(1)
                low_number = key_number(last[1])
        return None

    def read_page(self, place: int, high: int, wait: bool) -> Tuple[int, bytes]:
        """Return the first page at `place` or behind in which a line begins, after its
        place.

        Looks no further than `high`.
        """
        page = self.read(place, PAGE_BYTES, wait)
        while not FIRST_KEY_RE.search(page) and place < high:  # it lies in a long value
            unseen = place + len(page) - KEY_BYTES - 1  # where a key may be cut off
            place = self.find_newline(max(unseen, place + 1), wait)
            page = self.read(place, PAGE_BYTES, wait)
        return place, page

    def value_at(self, place: int, page: bytes, index: int, wait: bool) -> "Body":
        """Return the value that begins at `index` of the page that was read at `place`.
        """
        end = page.find(b"\n", index)
        if end >= 0:
            return page[index:end]
        size = self.find_newline(place + index, wait) - (place + index)
        if size <= PIECE_BYTES:
            return self.read(place + index, size, wait)
        return StoredValue(self, place + index, size)

    def find_newline(self, place: int, wait: bool) -> int:
        """Return the place of the first newline from `place` on, or the end of the file.
        """
        while place < self.size:
            piece = self.read(place, PIECE_BYTES, wait)
            newline = piece.find(b"\n")
            if newline >= 0:
                return place + newline
            place += len(piece)
            if not wait and place < self.size:
                raise BlockingIOError("a value is long")
        return self.size

    def read(self, place: int, size: int, wait: bool) -> bytes:
        """Return `size` bytes from `place` on, or what there is up to the end of the
        file.

        Raises BlockingIOError and FileChanged as `get` does.
        """
        before = b""
        if place < 0:
            before = b"\n"
            place = 0
        if wait or not self.nowait_flag:
            content = os.pread(self.descriptor, size, place)
        else:
            content = self.read_from_memory(place, size)
        self.check()
        return before + content

    def read_from_memory(self, place: int, size: int) -> bytes:
        """Do what os.pread does, but raise BlockingIOError if the disk has to be read."""
        content = bytearray(size)
        try:
            count = os.preadv(self.descriptor, [content], place, self.nowait_flag)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self.nowait_flag = 0  # the file system cannot tell; tmpfs is always in memory
            return os.pread(self.descriptor, size, place)
        if count < min(size, self.size - place):
            raise BlockingIOError("only a part is in memory")
        return bytes(content[:count])

    def check(self) -> None:
        """Raise FileChanged if the file was changed in place."""
        if stamp(self.descriptor) != self.stamp:
            raise FileChanged


class StoredValue:
    """A long value of a sorted file, which stays there until it is sent piece by piece.
    """

    def __init__(self, pairs: Sorted, place: int, size: int) -> None:
        self.pairs = pairs
        self.place = place
        self.size = size

    def __len__(self) -> int:
        return self.size

    def pieces(self) -> Iterator[bytes]:
        """Yield the value in pieces. Raises FileChanged."""
        end = self.place + self.size
        for place in range(self.place, end, PIECE_BYTES):
            yield self.pairs.read(place, min(PIECE_BYTES, end - place), wait=True)


Pairs = Union[Dict[bytes, bytes], Sorted]
Body = Union[bytes, StoredValue]  # of an answer


# ---------------------------------------------------------------------------
# Loading

def load(path: str) -> Dict[bytes, bytes]:
    """Return the pairs in the data file at `path`.

    Raises OSError if the file cannot be read, ValueError if it is not well formed, with a
    line of text for each bad line, and MemoryError if it is too large.
    """
    pairs: Dict[bytes, bytes] = {}
    with open_data(path) as file:
        for _ in parse(file, pairs):
            pass
    return pairs


class Data:
    """The pairs that a server answers from.

    `load` and `reload` are generators of many short steps. During a reload, requests are
    answered between them; at the start `load` is run to its end.
    """

    def __init__(self, options: argparse.Namespace, log: Log) -> None:
        self.path = options.file
        self.is_sorted = options.sorted
        self.is_checked = options.check
        self.log = log
        self.pairs: Pairs = {}
        self.new_pairs: Pairs = {}       # of a file that is being loaded
        self.new_file: Optional[BinaryIO] = None
        self.loaded = ""                 # how many pairs, from which file, in what time
        self.description = ""            # of the pairs, for the status page
        self.change_reported = False     # that a sorted file was changed in place

    def load(self) -> Iterator[None]:
        """Load the file and swap its pairs in. Raises OSError, ValueError and
        MemoryError.
        """
        start = time.monotonic()
        name = data_name(self.path)
        count = "unchecked"
        with open_data(self.path) as self.new_file:
            self.new_pairs = Sorted(self.new_file) if self.is_sorted else {}
            if self.is_checked:
                mistakes = yield from parse(self.new_file, self.new_pairs)
                for mistake in mistakes:
                    self.log(f"{name}: {mistake}")
                count = str(len(self.new_pairs))
        self.pairs = self.new_pairs
        self.change_reported = False
        self.loaded = f"{count} pairs of {name} in {time.monotonic() - start:.2f} s"
        date = email.utils.formatdate(usegmt=True)
        self.description = f"{count} pairs of {os.path.basename(name)}, since {date}"

    def reload(self) -> Iterator[None]:
        """Load the file again, then free what is no longer needed.

        What goes wrong is logged, and the pairs stay as they are.
        """
        name = data_name(self.path)
        old_pairs = self.pairs
        self.new_pairs = {}
        try:
            if self.path == 0 or not stat.S_ISREG(os.stat(self.path).st_mode):
                raise ValueError(f"{name}: not a file that can be read again")
            yield from self.load()
        except Exception as error:
            self.log(f"{load_failure(error, self.path)}\nthe data stays as it was")
            unneeded = self.new_pairs
        else:
            self.log(f"{self.loaded}, reloaded ({len(old_pairs)} before)")
            unneeded = old_pairs
        self.new_pairs = {}
        while isinstance(unneeded, dict) and unneeded:
            for _ in range(min(len(unneeded), STEP_LINES)):
                unneeded.popitem()
            yield

    def progress(self, seconds: float) -> str:
        """Return how far a load is after so many seconds."""
        percent = "?"
        if self.new_file.seekable():
            size = os.fstat(self.new_file.fileno()).st_size
            percent = str(self.new_file.tell() * 100 // max(size, 1))
        count = len(self.new_pairs)
        return f"{percent} % read, {count} pairs, {count / seconds:.0f} a second"

    def page(self) -> bytes:
        """Return what GET / shows. Raises FileChanged if look-ups would."""
        if isinstance(self.pairs, Sorted):
            self.pairs.check()
        text = (f"{self.description}\n"
                "ask for a value with GET /KEY, where KEY is a version 4 UUID\n")
        return text.encode()

    def report_change(self) -> None:
        """Log, but only once, that the file was changed in place."""
        if not self.change_reported:
            self.change_reported = True
            self.log(f"{data_name(self.path)}: changed in place; "
                     "send SIGHUP to have it read again")


def load_failure(error: Exception, path: Union[str, int]) -> str:
    """Return why the data file at `path` was not loaded, in one or more lines."""
    if isinstance(error, MemoryError):
        return f"{data_name(path)}: too large for the memory; --sorted takes less"
    if isinstance(error, OSError):
        return f"{data_name(path)}: {error.strerror}"
    return str(error)


# ---------------------------------------------------------------------------
# Requests
#
# The head of a request is judged strictly, by the grammar of RFC 9112, and in one place.
# As a client sends the same fields with each of its requests, the verdict on them is
# remembered.

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"                       # RFC 9110 section 5.6.2
TOKEN_RE = re.compile(TOKEN)
BEGINNING_RE = re.compile(                                    # of a request line
    rb"(?:" + TOKEN + rb"(?: [!-~]*){0,2})?\r?")
HEAD_METHOD_RE = re.compile(rb"(?:\r\n)?HEAD ")
VERSION_RE = re.compile(rb"HTTP/[0-9]\.[0-9]")                # RFC 9112 section 2.3
FIELD_RE = re.compile(                                        # RFC 9112 section 5
    rb"(" + TOKEN + rb"):[\t ]*([\t -~\x80-\xff]*)")
BARE_LINE_END_RE = re.compile(rb"\r[^\n]|(?<!\r)\n")          # RFC 9112 section 2.2
TARGET_RE = re.compile(                                       # RFC 3986 appendix A
    rb"(?:[!$&-;=?-Z\[\]_a-z~]|%[0-9A-Fa-f]{2})+")
HOST = rb"""
    (?: \[ [0-9A-Fa-f]{0,4} : [0-9A-Fa-f:.]* \]               # an IPv6 address, roughly
      | (?: [0-9A-Za-z._~!$&'()*+;=-] | %[0-9A-Fa-f]{2} )+    # an IPv4 address or a name
    )
    (?: : [0-9]{0,5} )?                                       # a port
    """                                                       # RFC 3986 section 3.2.2
HOST_RE = re.compile(HOST, re.VERBOSE)
ABSOLUTE_TARGET_RE = re.compile(
    rb"(?i: http:// )" + HOST + rb"(?: / ([^?]*) )? (?: \? .* )?", re.VERBOSE)
OTHER_METHODS = (b"POST", b"PUT", b"DELETE", b"CONNECT", b"TRACE", b"PATCH")


class Verdict(NamedTuple):
    """What to answer to a request."""

    status: int     # 200 if a key is to be looked up
    text: bytes     # with 200 the key, or b"" if it is not known yet; else what is wrong
    close: bool     # whether to close the connection after the answer


def refuse(status: int, text: str) -> Verdict:
    """Return a verdict after which nothing more is read from the connection."""
    return Verdict(status, text.encode(), True)


BARE_LINE_END = refuse(400, "bare CR or LF (RFC 9112 section 2.2)")
MALFORMED_LINE = refuse(
    400, "malformed request line: not METHOD TARGET HTTP/1.1 CRLF (RFC 9112 section 3)")


def judge(head: bytes) -> Tuple[Verdict, bytes]:
    """Judge a complete head, given without the empty line at its end.

    Returns the verdict and the path: the target without its first slash. If the status is
    200, nobody has looked at the path yet: nearly all paths are keys, and found as they
    are.
    """
    judge_rest = judge_fields
    if len(head) > VERDICT_BYTES:
        judge_rest = judge_fields.__wrapped__  # the function that does not remember
        too_long = judge_length(head + b"\r\n\r\n")
        if too_long:
            return too_long, b""
    try:
        method, target, rest = head.split(b" ", 2)
    except ValueError:
        return MALFORMED_LINE, b""
    verdict = judge_rest(method, rest)
    if verdict.status == 200 and target[:1] == b"/":
        return verdict, target[1:]
    return judge_target(verdict, method.lstrip(b"\r\n"), target)


def judge_length(head: bytes) -> Optional[Verdict]:
    """Return a refusal if a head is too long, or what has come of one so far; else None.
    """
    if len(head) <= LINE_BYTES:
        return None
    line = head.lstrip(b"\r\n").partition(b"\r\n")[0]
    method = line.partition(b" ")[0]
    if len(line) > LINE_BYTES and len(method) > METHOD_BYTES:
        return refuse(501, "unknown method")
    if len(line) > LINE_BYTES:
        return refuse(414, f"request line longer than {LINE_BYTES} bytes")
    if len(head) > HEAD_BYTES:
        return refuse(431, f"request head longer than {HEAD_BYTES} bytes")
    return None


@functools.lru_cache(maxsize=VERDICTS)
def judge_fields(method: bytes, rest: bytes) -> Verdict:
    """Judge all of a head but its target: the method, and what follows the target."""
    version, *lines = rest.split(b"\r\n")
    if method.startswith(b"\r\n"):  # one empty line may come first (section 2.2)
        method = method[2:]
    if not TOKEN_RE.fullmatch(method) or not VERSION_RE.fullmatch(version):
        return MALFORMED_LINE
    if not version.startswith(b"HTTP/1."):
        return refuse(505, "unsupported HTTP version: use 1.1 (RFC 9112 section 2.3)")

    fields = collections.defaultdict(list)  # the values of each name
    for line in lines:
        if b"\r" in line or b"\n" in line:
            return BARE_LINE_END
        field = FIELD_RE.fullmatch(line)
        if not field:
            return refuse(400, "malformed header field (RFC 9112 section 5)")
        fields[field[1].lower()].append(field[2].rstrip(b"\t "))

    hosts = fields[b"host"]
    if not hosts and version != b"HTTP/1.0":
        return refuse(400, "missing Host header (RFC 9112 section 3.2)")
    if len(hosts) > 1:
        return refuse(400, "more than one Host header (RFC 9112 section 3.2)")
    if hosts and not HOST_RE.fullmatch(hosts[0]):
        return refuse(400, "malformed Host header (RFC 9112 section 3.2)")

    # A body is never read, and ends the connection.
    lengths = fields[b"content-length"]
    codings = list_elements(fields[b"transfer-encoding"])
    has_body = bool(codings) or lengths not in ([], [b"0"])
    if has_body and method in (b"GET", b"HEAD"):
        return refuse(400, "GET and HEAD have no body (RFC 9110 section 9.3)")
    if lengths and codings:
        return refuse(400, "Content-Length and Transfer-Encoding (RFC 9112 section 6.2)")
    if len(lengths) > 1 or lengths and not lengths[0].isdigit():
        return refuse(400, "malformed Content-Length (RFC 9112 section 6.2)")
    if codings and not is_chunked(codings):
        return refuse(400, "malformed Transfer-Encoding (RFC 9112 section 6.1)")

    if list_elements(fields[b"expect"]) not in ([], [b"100-continue"]):
        return refuse(417, "unsupported Expect header (RFC 9110 section 10.1.1)")

    options = list_elements(fields[b"connection"])
    close = has_body or version == b"HTTP/1.0" or b"close" in options  # section 9.3
    if method == b"OPTIONS":
        return Verdict(204, b"", close)
    if method in OTHER_METHODS:
        return Verdict(405, b"method not allowed: use GET or HEAD", close)
    if method not in (b"GET", b"HEAD"):
        return Verdict(501, b"unknown method", close)
    return Verdict(200, b"", close)


def list_elements(values: List[bytes]) -> List[bytes]:
    """Return the elements of comma-separated lists, in lower case (RFC 9110 section
    5.6.1).
    """
    if not values:
        return []
    elements = b",".join(values).lower().split(b",")
    return [element.strip(b"\t ") for element in elements]


def is_chunked(codings: List[bytes]) -> bool:
    """Tell whether transfer codings are well formed: the last is chunked, and only that.
    """
    if codings[-1] != b"chunked" or codings.count(b"chunked") > 1:
        return False
    return all(TOKEN_RE.fullmatch(coding) for coding in codings)


def judge_target(verdict: Verdict, method: bytes, target: bytes) -> Tuple[Verdict, bytes]:
    """Judge a target that is not looked up, or has another form than /PATH.

    Returns what `judge` returns. RFC 9112 section 3.2 has the four forms.
    """
    if not TARGET_RE.fullmatch(target):
        return MALFORMED_LINE, b""
    if verdict.status in (400, 417, 505):
        return verdict, b""
    if target[:1] == b"/" or method == b"CONNECT" or method + target == b"OPTIONS*":
        return verdict, target[1:]
    absolute = ABSOLUTE_TARGET_RE.fullmatch(target)
    if absolute:
        return verdict, absolute[1] or b""
    return MALFORMED_LINE, b""


def judge_path(path: bytes) -> Verdict:
    """Judge a path that is not a key in the data as it is.

    With status 200, the verdict's text is the key; b"" asks for the status page.
    """
    if path and not TARGET_RE.fullmatch(path):
        return MALFORMED_LINE
    key = path.partition(b"?")[0].lower().replace(b"%2d", b"-")  # RFC 3986 section 6.2.2
    if key and not KEY_RE.fullmatch(key):
        return Verdict(400, b"not a version 4 UUID", False)
    return Verdict(200, key, False)


def judge_beginning(beginning: bytes, news: bytes) -> Optional[Verdict]:
    """Return a refusal if nothing good can come of the beginning of a head, else None.

    So nobody waits for the end of what is refused anyway. `news` is the part of it that
    came last: without a line end in it, only the length is looked at again.
    """
    too_long = judge_length(beginning)
    if too_long:
        return too_long
    if len(news) < len(beginning) and b"\r" not in news and b"\n" not in news:
        return None
    if beginning.startswith(b"\r\n"):  # one empty line may come first
        beginning = beginning[2:]
    line, line_end, _ = beginning.partition(b"\r\n")
    if not line_end:
        return None if BEGINNING_RE.fullmatch(line) else MALFORMED_LINE
    verdict, path = judge(line + b"\r\nHost: kv")  # as if all was well behind the line
    if verdict.status == 200:
        verdict = judge_path(path)
    if verdict.close and verdict.status in (400, 505):
        return verdict
    first_new = len(beginning) - len(news) - 1  # or the byte before, which may be a CR
    if BARE_LINE_END_RE.search(beginning, max(first_new, len(line) + 2)):
        return BARE_LINE_END
    return None


# ---------------------------------------------------------------------------
# Answers

KEY_NOT_FOUND = b"key not found\n"
INTERNAL_ERROR = b"internal error; the log of the server says more\n"


@functools.lru_cache(maxsize=100)
def answer_head(status: int, close: bool, date: str) -> bytes:
    """Return the head of an answer, with %d in place of the length of its body.

    It changes only with the date, once a second, and is remembered.
    """
    lines = [
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}",
        f"Server: kv/{__version__}",
        "X-Content-Type-Options: nosniff",
        "Cache-Control: no-cache",
        f"Date: {date}",
    ]
    if status in (204, 405):
        lines.append("Allow: GET, HEAD, OPTIONS")
    if close:
        lines.append("Connection: close")
    if status != 204:  # RFC 9110 section 8.6
        lines.append("Content-Type: text/plain; charset=utf-8")
        lines.append("Content-Length: %d")
    return "\r\n".join(lines + ["", ""]).encode()


# ---------------------------------------------------------------------------
# Threads

NEVER = float("inf")    # a time


class Connection:
    """What the server knows of one client."""

    __slots__ = (
        "socket", "address", "received", "unsent", "close", "linger", "waiting_since")

    def __init__(self, client_socket: socket.socket, address: str) -> None:
        self.socket = client_socket
        self.address = address
        # What was received and is not answered yet: the beginning of a head.
        self.received = b""
        # What the client has not taken yet: bytes, memoryview and StoredValue objects.
        self.unsent: list = []
        # Whether to close the connection when all is sent, and to linger before that, as
        # the client may still be sending.
        self.close = False
        self.linger = False
        # The time.monotonic() since when the client is to do something: ask, go on
        # asking, or take more of an answer. NEVER while the server is busy with it, and
        # when it is closed.
        self.waiting_since = NEVER


class Handler(socketserver.BaseRequestHandler):
    """Serves a client that makes the server wait: plain blocking code, in a thread.

    The `request` is a Connection that the loop has handed over. Afterwards it is closed
    or given back to the loop, by Server.shutdown_request.
    """

    def handle(self) -> None:
        """Send what is unsent, answer the requests that came behind, close with care."""
        connection = self.request
        self.send_unsent()
        while not connection.close and b"\r\n\r\n" in connection.received:
            self.server.answer_requests(connection, connection.received, self.get)
            self.send_unsent()
        if connection.close:
            self.linger()

    def get(self, path: bytes) -> Optional[Body]:
        """Look a path up in the pairs, as dict.get would, and wait for the disk if need
        be.
        """
        pairs = self.server.data.pairs
        if isinstance(pairs, Sorted):
            return pairs.get(path, wait=True)
        value = pairs.get(path)
        if value is None and pairs is not self.server.data.pairs:
            return self.get(path)  # it was being freed, after a reload
        return value

    def send_unsent(self) -> None:
        """Send all that is unsent. Raises OSError if the client does not take it in time.
        """
        parts = self.request.unsent
        size = sum(len(part) for part in parts)
        deadline = time.monotonic() + ANSWER_SECONDS + size / ANSWER_BYTES_A_SECOND
        for part in parts:
            if isinstance(part, StoredValue):
                for piece in part.pieces():
                    self.send(piece, deadline)
            else:
                self.send(part, deadline)
        parts.clear()

    def send(self, data: Union[bytes, memoryview], deadline: float) -> None:
        """Send `data` before the deadline, a time.monotonic(). Raises OSError."""
        connection = self.request
        rest = memoryview(data)
        while rest:
            connection.waiting_since = time.monotonic()
            seconds = min(STALL_SECONDS, deadline - connection.waiting_since)
            if seconds <= 0:
                raise socket.timeout("the answer was not taken in time")
            connection.socket.settimeout(seconds)
            sent = connection.socket.send(rest[:SENT_BYTES])
            rest = rest[sent:]
        connection.waiting_since = NEVER

    def linger(self) -> None:
        """Say that nothing more will come, and for a moment take what the client still
        sends.

        If the connection was closed at once, the system would answer that with a reset,
        and a reset can cost the client the answer.
        """
        connection = self.request
        connection.socket.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LINGER_SECONDS
        connection.waiting_since = min(connection.waiting_since, time.monotonic())
        connection.socket.settimeout(LINGER_SECONDS)
        while connection.socket.recv(RECEIVE_BYTES) and time.monotonic() < deadline:
            pass


# ---------------------------------------------------------------------------
# The loop

OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
CAN_GATHER = hasattr(socket.socket, "sendmsg")  # Windows lacks it


class Server(http.server.ThreadingHTTPServer):
    """The loop: it does all that need not wait, for all clients.

    What has to wait for one client or for the disk is handed over to a thread, in which
    ThreadingHTTPServer runs a Handler: an answer that the client does not take whole, a
    connection that has to be closed with care, a look-up in pages that are not in memory.

    Connections that wait for their client stand in one of two dicts, in the order in
    which they began to wait: `idle` ones for their next request, `beginnings` for the
    rest of a head. The first of each is the next to expire, and to make room for a
    newcomer.
    """

    request_queue_size = ACCEPT_QUEUE
    allow_reuse_address = os.name == "posix"  # elsewhere two servers could share a port
    allow_reuse_port = False

    def __init__(self, options: argparse.Namespace, data: Data, log: Log) -> None:
        """Take the port, but do not listen yet. Raises OSError and UnicodeError."""
        self.data = data
        self.log = log
        self.is_verbose = options.verbose
        self.max_connections = options.max_connections
        # Connections: each is in one of these three, or is just being handled by the
        # loop.
        self.idle: "collections.OrderedDict[Connection, None]" = collections.OrderedDict()
        self.beginnings: Dict[Connection, None] = {}
        self.handed_over: Set[Connection] = set()
        # Those that threads are done with, for the loop to take note of.
        self.returned: Deque[Connection] = collections.deque()
        self.selector = selectors.DefaultSelector()
        self.is_accepting = False
        # The loop
        self.now = time.monotonic()                # at the beginning of this round
        self.date = ""                             # as in the Date field of an answer
        self.found_head = b""                      # of answers to keys that are found
        self.next_tick = self.now
        self.was_busy = False                      # whether the last round had events
        self.is_patient = processor_count() > 1
        # Reloads
        self.reload: Optional[Iterator[None]] = None   # one that is under way
        self.next_step = self.now                  # of the reload, at the earliest
        # Signals
        self.hangup_noted = False
        self.stop_noted = False
        self.ends_with_terminal = False
        self.is_stopping = False
        self.stop_deadline = NEVER

        found = socket.getaddrinfo(
            options.host.strip("[]"), options.port, type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE)
        self.address_family, _, _, _, address = found[0]
        super().__init__(address, Handler, bind_and_activate=False)
        self.server_bind()

    def server_bind(self) -> None:
        """Bind as TCPServer does. HTTPServer would look up a name, which can take long.
        """
        if self.server_address[0] == "::":  # for IPv4, too
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Connections inherit this: no answer waits until the one before is acknowledged.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        socketserver.TCPServer.server_bind(self)

    # The loop

    def serve_forever(self, poll_interval: float = TICK_SECONDS) -> None:
        """Answer requests until a stop was asked for and all connections have ended."""
        self.socket.setblocking(False)
        while not self.is_stopped():
            try:
                self.run_round(poll_interval)
            except MemoryError:
                self.reload = None
                self.data.new_pairs = {}
                self.log("out of memory")

    def is_stopped(self) -> bool:
        """Tell whether all connections have ended after a stop, or were given time
        enough.
        """
        if not self.is_stopping:
            return False
        return self.connection_count() == 0 or self.now >= self.stop_deadline

    def run_round(self, poll_interval: float) -> None:
        """Wait for events, handle them, and do what else is due."""
        events = self.wait(poll_interval)
        self.now = time.monotonic()
        if self.returned:
            self.take_back()
        for key, _ in events:
            if key.data is None:
                self.accept()
                continue
            connection = key.data
            if connection.waiting_since == NEVER:
                continue  # it was evicted a moment ago
            try:
                self.receive(connection)
            except Exception:
                self.handle_error(connection, connection.address)
                self.close(connection)
        self.was_busy = bool(events)
        if self.now >= self.next_tick:
            self.next_tick = self.now + TICK_SECONDS
            self.service_actions()
        if self.reload:
            self.step_reload()

    def wait(self, seconds: float) -> list:
        """Return events of the selector, after a wait of so many seconds if there are
        none.

        After a round with events, it looks for more without sleeping for a moment. To
        wake a process takes longer than all else in an answer, and many clients ask again
        at once.
        """
        events = self.selector.select(0)
        if events or self.reload:
            return events
        if self.was_busy and self.is_patient:
            patience_ends = time.perf_counter() + PATIENCE_SECONDS
            while not events and time.perf_counter() < patience_ends:
                events = self.selector.select(0)
        return events or self.selector.select(seconds)

    def service_actions(self) -> None:
        """Do what is due every TICK_SECONDS."""
        self.date = email.utils.formatdate(usegmt=True)
        self.found_head = answer_head(200, False, self.date)
        self.act_on_signals()
        if not self.is_accepting and not self.is_stopping:
            self.selector.register(self.socket, selectors.EVENT_READ)
            self.is_accepting = True
        idle_seconds = DRAIN_IDLE_SECONDS if self.is_stopping else IDLE_SECONDS
        for connection in self.overdue(self.idle, idle_seconds):
            self.close(connection)
        for connection in self.overdue(self.beginnings, HEAD_SECONDS):
            verdict = refuse(408, f"no complete request in {HEAD_SECONDS} s")
            self.refuse(connection, verdict)
            self.send(connection)
            self.close(connection)

    def overdue(self, waiting: Iterable[Connection], seconds: float) -> List[Connection]:
        """Return the first of `waiting`, those that have waited for more than so many
        seconds.
        """
        latest = self.now - seconds
        return list(itertools.takewhile(lambda c: c.waiting_since < latest, waiting))

    def step_reload(self) -> None:
        """Take a step of a reload: at once if there were no events, else half of the
        time.
        """
        if self.was_busy and self.now < self.next_step:
            return
        start = time.monotonic()
        try:
            next(self.reload)
        except StopIteration:
            self.reload = None
        end = time.monotonic()
        self.next_step = end + (end - start)

    # Connections

    def accept(self) -> None:
        """Take a newcomer in; if there is no room, in the place of who has waited
        longest.
        """
        longest = None
        if self.connection_count() >= self.max_connections:
            longest = self.longest_waiting()
            if not longest:
                self.pause_accepting()
                return
        try:
            client_socket, address = self.get_request()
            client_socket.setblocking(False)
        except OSError as error:
            if error.errno in OUT_OF_RESOURCES and not self.evict(self.longest_waiting()):
                self.pause_accepting()
            return  # otherwise that client has gone already
        self.evict(longest)
        connection = Connection(client_socket, address[0])
        self.selector.register(client_socket, selectors.EVENT_READ, connection)
        self.keep(connection)

    def pause_accepting(self) -> None:
        """Leave newcomers to the system until the next tick."""
        self.selector.unregister(self.socket)
        self.is_accepting = False

    def connection_count(self) -> int:
        return len(self.idle) + len(self.beginnings) + len(self.handed_over)

    def longest_waiting(self) -> Optional[Connection]:
        """Return the connection that has waited longest for its client, if any waits."""
        candidates = list(self.handed_over)
        candidates += itertools.islice(self.idle, 1)
        candidates += itertools.islice(self.beginnings, 1)
        longest = min(candidates, key=lambda c: c.waiting_since, default=None)
        if longest and longest.waiting_since == NEVER:
            return None
        return longest

    def evict(self, connection: Optional[Connection]) -> bool:
        """Close a connection, if there is one, and tell if that made room at once."""
        if connection is None:
            return False
        if connection not in self.handed_over:
            self.close(connection)
            return True
        connection.waiting_since = NEVER
        try:
            connection.socket.shutdown(socket.SHUT_RDWR)  # which its thread will notice
        except OSError:
            pass  # it is just ending
        return False

    def keep(self, connection: Connection) -> None:
        """Put a connection last among those that wait for their client."""
        connection.waiting_since = self.now
        self.idle.pop(connection, None)
        self.beginnings.pop(connection, None)
        if connection.received:
            self.beginnings[connection] = None
        else:
            self.idle[connection] = None

    def forget(self, connection: Connection) -> None:
        """Look no longer after a connection."""
        connection.waiting_since = NEVER
        self.idle.pop(connection, None)
        self.beginnings.pop(connection, None)
        self.handed_over.discard(connection)
        try:
            self.selector.unregister(connection.socket)
        except (KeyError, ValueError):
            pass  # memory ran out while it was handed over

    def close(self, connection: Connection) -> None:
        """Close a connection that the loop looks after."""
        self.forget(connection)
        connection.socket.close()

    # Requests

    def receive(self, connection: Connection) -> None:
        """Take what a client has sent, and answer all complete requests among it."""
        try:
            news = connection.socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:  # the client has reset the connection
            news = b""
        if not news:
            self.close(connection)
            return
        beginning = connection.received
        connection.received = beginning + news
        try:
            self.answer_requests(connection, news, self.data.pairs.get)
        except BlockingIOError:  # a look-up has to wait for the disk
            self.hand_over(connection, NEVER)
            return
        is_same_head = beginning and not connection.unsent  # which is not complete yet
        if connection.unsent and not self.send(connection):
            self.hand_over(connection, self.now)
        elif connection.close:
            if connection.linger:
                self.hand_over(connection, self.now)
            else:
                self.close(connection)
        elif beginning or connection.received:
            if not is_same_head:
                self.keep(connection)
        else:
            connection.waiting_since = self.now
            self.idle.move_to_end(connection)

    def answer_requests(self, connection: Connection, news: bytes, get: Callable) -> None:
        """Answer all complete requests among what a connection has received.

        `news` is the part of it that came last. `get` looks a path up as dict.get would;
        if it raises BlockingIOError, its request and what is behind it remain in
        `received`.
        """
        heads = connection.received.split(b"\r\n\r\n")
        connection.received = heads.pop()
        pending = iter(heads)
        for head in pending:
            try:
                status, body = self.answer(connection, head, get)
            except BlockingIOError:
                rest = [head, *pending, connection.received]
                connection.received = b"\r\n\r\n".join(rest)
                connection.close = False
                raise
            except Exception as error:
                self.report_fault(error, connection.address)
                status = 500
                body = INTERNAL_ERROR
            if self.is_stopping and head is heads[-1]:
                connection.close = True
            self.add_answer(connection, head, status, body)
            if connection.close:
                if connection.received or any(pending):
                    connection.linger = True
                return
        if connection.received:
            refusal = judge_beginning(connection.received, news)
            if refusal:
                self.refuse(connection, refusal)

    def answer(
            self, connection: Connection, head: bytes, get: Callable) -> Tuple[int, Body]:
        """Return the status and the body of the answer to a request, given its head."""
        verdict, path = judge(head)
        connection.close = verdict.close
        if verdict.status == 200:
            value = get(path)
            if value is not None:
                return 200, value
            verdict = judge_path(path)
            connection.close = connection.close or verdict.close
        if verdict.status != 200:
            return verdict.status, verdict.text + b"\n"
        if not verdict.text:
            return 200, self.data.page()
        value = get(verdict.text)
        if value is None:
            return 404, KEY_NOT_FOUND
        return 200, value

    def refuse(self, connection: Connection, verdict: Verdict) -> None:
        """Answer the beginning of a head that cannot become a request."""
        connection.close = True
        self.add_answer(
            connection, connection.received, verdict.status, verdict.text + b"\n")

    def add_answer(
            self, connection: Connection, head: bytes, status: int, body: Body) -> None:
        """Put an answer together. `head` is the head of its request, or what came of it.
        """
        if status == 200 and not connection.close:
            answer = self.found_head % len(body)
        elif status == 204:
            answer = answer_head(status, connection.close, self.date)
            body = b""
        else:
            answer = answer_head(status, connection.close, self.date) % len(body)
        if head[:4] != b"GET " and HEAD_METHOD_RE.match(head):
            body = b""
        if connection.close:
            connection.linger = status not in (200, 404) or len(body) > PIECE_BYTES
        if self.is_verbose:
            self.log_request(connection.address, head, status, len(body))
        if len(body) <= PIECE_BYTES:
            connection.unsent.append(answer + body)
        else:
            connection.unsent += [answer, body]

    def log_request(self, address: str, head: bytes, status: int, size: int) -> None:
        """Log a request in Common Log Format."""
        line = repr(head.partition(b"\r\n")[0])[2:-1].replace('"', '\\"')
        now = time.strftime("%d/%b/%Y:%H:%M:%S %z")
        self.log.write(f'{address} - - [{now}] "{line}" {status} {size}')

    def send(self, connection: Connection) -> bool:
        """Send what is unsent, if it is not much and the client takes it at once.

        Tells if all was sent.
        """
        unsent = connection.unsent
        try:
            if len(unsent) == 1:
                sent = connection.socket.send(unsent[0])
            elif CAN_GATHER and sum(map(len, unsent)) <= SENT_BYTES:
                sent = connection.socket.sendmsg(unsent)
            else:
                return False
        except BlockingIOError:
            return False
        except OSError:  # the client has gone
            unsent.clear()
            connection.close = True
            connection.linger = False
            return True
        while sent >= len(unsent[0]):
            sent -= len(unsent[0])
            del unsent[0]
            if not unsent:
                return True
        unsent[0] = memoryview(unsent[0])[sent:]
        return False

    # Threads

    def hand_over(self, connection: Connection, waiting_since: float) -> None:
        """Let a Handler go on with a connection, in a thread of its own."""
        self.forget(connection)
        connection.waiting_since = waiting_since
        self.handed_over.add(connection)
        self.process_request(connection, connection.address)

    def process_request(self, request: Connection, client_address: str) -> None:
        """Start a thread, or close the connection if the system has no thread to give.

        ThreadingMixIn calls threading.Thread.start here. That waits until the thread
        runs: for ever, if the thread dies for lack of memory before that.
        """
        try:
            _thread.start_new_thread(
                self.process_request_thread, (request, client_address))
        except (RuntimeError, MemoryError) as error:
            self.log(f"no thread for {client_address}: {error}")
            request.close = True
            self.shutdown_request(request)

    def handle_error(self, request: Connection, client_address: str) -> None:
        """Report what went wrong with a connection: called while the exception is
        handled.
        """
        request.close = True
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # that a client goes away is no fault
            self.report_fault(error, client_address)

    def report_fault(self, error: Exception, client_address: str) -> None:
        """Log a fault in one line; a file that was changed, only once."""
        if not isinstance(error, FileChanged):
            self.log(f"fault in answering {client_address}: {error!r}")
        else:
            self.data.report_change()

    def shutdown_request(self, request: Connection) -> None:
        """Close a connection or give it back to the loop: called by a thread at its end.
        """
        request.waiting_since = NEVER
        if request.close:
            request.socket.close()
            self.returned.append(request)
        else:
            request.socket.setblocking(False)
            self.returned.append(request)
            # The selector takes this while the loop waits for it in another thread.
            self.selector.register(request.socket, selectors.EVENT_READ, request)

    def take_back(self) -> None:
        """Take note of the connections that threads are done with."""
        while self.returned:
            connection = self.returned.popleft()
            self.handed_over.discard(connection)
            if not connection.close:
                self.keep(connection)

    # Signals

    def handle_signals(self) -> None:
        """From now on, take note of signals, to act on them at the next tick."""
        signal.signal(signal.SIGTERM, self.note_stop)
        signal.signal(signal.SIGINT, self.note_stop)
        if hasattr(signal, "SIGHUP"):  # which Windows lacks
            under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            self.ends_with_terminal = has_terminal() and not under_nohup
            signal.signal(signal.SIGHUP, self.note_hangup)

    def note_stop(self, *_) -> None:
        self.stop_noted = True

    def note_hangup(self, *_) -> None:
        self.hangup_noted = True

    def act_on_signals(self) -> None:
        """Start a reload or a stop that a signal asked for."""
        if self.hangup_noted and self.ends_with_terminal and not has_terminal():
            self.stop_noted = True  # SIGHUP came because the terminal was closed
        elif self.hangup_noted and not self.reload:
            self.hangup_noted = False
            self.reload = self.data.reload()
        if self.stop_noted and not self.is_stopping:
            self.begin_stop()

    def begin_stop(self) -> None:
        """Stop listening. From now on, connections are closed after their next answers.
        """
        self.is_stopping = True
        self.stop_deadline = self.now + DRAIN_SECONDS
        if self.is_accepting:
            self.pause_accepting()
        self.socket.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ends it at once


def has_terminal() -> bool:
    """Tell whether this process has a terminal that can interrupt it."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def processor_count() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---------------------------------------------------------------------------
# serve

class CannotServe(Exception):
    """The server cannot be started; the text says why, in one or more lines."""


def serve(options: argparse.Namespace) -> int:
    """Serve the pairs in a file until SIGTERM or Ctrl-C. Returns the exit code."""
    log = Log()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as for Ctrl-C
    try:
        server = start_server(options, log)
    except KeyboardInterrupt:
        log("stopped")
        return 0
    except CannotServe as error:
        complain(str(error))
        return 1
    server.serve_forever()
    log("stopped")
    return 0


def start_server(options: argparse.Namespace, log: Log) -> Server:
    """Return a server that has its data and listens. Raises CannotServe."""
    allow_connections(options, log)
    data = Data(options, log)
    try:
        server = Server(options, data, log)
    except (OSError, UnicodeError) as error:
        raise CannotServe(listen_failure(error, options))
    try:
        load_with_progress(data)
    except (OSError, ValueError, MemoryError) as error:
        raise CannotServe(load_failure(error, options.file))
    server.handle_signals()
    try:
        server.server_activate()
    except OSError as error:
        raise CannotServe(listen_failure(error, options))
    port = server.socket.getsockname()[1]
    log(f"{data.loaded}, on http://{host_and_port(options.host, port)}")
    return server


def allow_connections(options: argparse.Namespace, log: Log) -> None:
    """Raise the limit of open files to what --max-connections takes, as far as possible.

    Without that option, sets it to what the limit allows.
    """
    wanted = options.max_connections or MAX_CONNECTIONS
    needed = wanted + SPARE_DESCRIPTORS
    limit = raise_file_limit(needed, log)
    if not options.max_connections:
        options.max_connections = max(1, limit - SPARE_DESCRIPTORS)
    elif limit < needed:
        log(f"--max-connections {wanted} takes {needed} open files, but the limit is "
            f"{limit}; raise it with ulimit -n, or LimitNOFILE under systemd")


def raise_file_limit(needed: int, log: Log) -> int:
    """Raise the limit of open files to `needed` if it is lower. Returns what it allows of
    it.
    """
    try:
        import resource
    except ImportError:  # on Windows, which has no such limit
        return needed
    limit = needed
    try:
        limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit == resource.RLIM_INFINITY or limit >= needed:
            return needed
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        return raised
    except (OSError, ValueError) as error:
        log(f"the limit of open files stays at {limit}: {error}")
        return limit


def load_with_progress(data: Data) -> None:
    """Load the data file in one go. If that takes long, show on a terminal how far it is.

    Raises OSError, ValueError and MemoryError.
    """
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    can_wipe = is_terminal and os.name != "nt" and os.environ.get("TERM") != "dumb"
    wipe = "\r\x1b[K"  # the line
    start = time.monotonic()
    next_shown = start + PROGRESS_SECONDS
    try:
        for _ in data.load():
            now = time.monotonic()
            if can_wipe and now >= next_shown:
                next_shown = now + TICK_SECONDS
                progress = data.progress(now - start)
                print(wipe + progress, end="", file=sys.stderr, flush=True)
    finally:
        if can_wipe and next_shown > start + PROGRESS_SECONDS:
            print(wipe, end="", file=sys.stderr, flush=True)


def listen_failure(error: Exception, options: argparse.Namespace) -> str:
    """Return why the server cannot listen where the options say."""
    reason = getattr(error, "strerror", None) or str(error)
    if isinstance(error, UnicodeError):
        reason = "not the name of a host"
    elif getattr(error, "errno", None) == errno.EADDRINUSE:
        reason += " (--port takes another)"
    return f"cannot listen on {host_and_port(options.host, options.port)}: {reason}"


def host_and_port(host: str, port: int) -> str:
    """Return a host, which may be an IPv6 address, and a port as they stand in a URL."""
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return f"{host}:{port}"


# ---------------------------------------------------------------------------
# get

LOOPBACK_RE = re.compile(r"localhost|127\.[0-9.]+|::1")


class NoAnswer(OSError):
    """A server does not answer, or not as kv does; the text says how."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes an error of a redirect: kv sends none, so another server would."""

    def redirect_request(self, *_) -> None:
        """Return None, for no other request."""


def get(key: Union[str, uuid.UUID], url: str = DEFAULT_URL,
        timeout: float = DEFAULT_TIMEOUT) -> bytes:
    """Return the value of a key from the server at `url`.

    The key is anything that uuid.UUID accepts. The time-out, in seconds, is for each
    silence of the server. Raises ValueError for a key that is no version 4 UUID, and a
    URL or a time-out that cannot be used; KeyError if the server has no such key; and
    OSError if it does not answer, or not as kv does.
    """
    path = str(version_4_uuid(key))
    check_url(url)
    check_timeout(timeout)
    proxies = {}
    place = url
    proxy = proxy_for(url)
    if proxy:
        proxies[urllib.parse.urlsplit(url).scheme] = proxy
        place = f"{url} through the proxy {proxy}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies), NoRedirect)
    try:
        with opener.open(f"{url.rstrip('/')}/{path}", timeout=timeout) as answer:
            return read_value(answer)
    except urllib.error.HTTPError as error:
        body = read_error(error)
        if error.code == 404 and body == KEY_NOT_FOUND:
            raise KeyError(path) from None
        line = body.decode("utf-8", "replace").partition("\n")[0]
        said = escape(f"{error.code} {error.reason}: {line}")
        raise NoAnswer(f"{place} answered {said}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NoAnswer(f"cannot ask {place}: {ask_failure(error, timeout)}") from None


def version_4_uuid(key: Union[str, uuid.UUID]) -> uuid.UUID:
    """Return a key as a UUID. Raises ValueError if it is not one of version 4."""
    try:
        identifier = uuid.UUID(str(key))
    except ValueError:
        raise ValueError("not a UUID") from None
    if identifier.version != 4:
        raise ValueError("a UUID, but not of version 4")
    return identifier


def check_url(url: str) -> None:
    """Raise ValueError if `url` is not the URL of a server."""
    parts = urllib.parse.urlsplit(url)
    try:
        port = parts.port or 80
        is_port = 0 < port and not parts.netloc.endswith(":0")
    except ValueError:
        is_port = False
    if "://" not in url:
        raise ValueError(f"{url}: add http:// before it")
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"{url}: the scheme must be http or https")
    if "?" in url or "#" in url:
        raise ValueError(f"{url}: a query or a fragment has no place here")
    if "@" in parts.netloc:
        raise ValueError(f"{url}: user names and passwords are not supported")
    if not parts.hostname:
        raise ValueError(f"{url}: the host is missing")
    if not is_port:
        raise ValueError(f"{url}: the port must be a number from 1 to 65535")


def check_timeout(seconds: float) -> None:
    """Raise ValueError if a time-out is not one that sockets accept."""
    if not 0 < seconds <= MAX_TIMEOUT:
        raise ValueError(f"{seconds:g} is not above 0 and up to {MAX_TIMEOUT} seconds")


def proxy_for(url: str) -> Optional[str]:
    """Return the proxy through which a URL is to be asked, if any. No loopback address
    is.
    """
    parts = urllib.parse.urlsplit(url)
    if LOOPBACK_RE.fullmatch(parts.hostname) or urllib.request.proxy_bypass(parts.netloc):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def read_value(answer: http.client.HTTPResponse) -> bytes:
    """Return the body of an answer. Raises OSError if it is not an answer of kv."""
    lengths = answer.headers.get_all("Content-Length", [])
    if answer.status != 200:
        raise OSError(f"kv does not answer {answer.status} {answer.reason}")
    if answer.getheader("Content-Encoding") or answer.getheader("Transfer-Encoding"):
        raise OSError("the answer is encoded, which kv does not do")
    if len(lengths) != 1 or not re.fullmatch("[0-9]+", lengths[0]):
        raise OSError("the answer has no proper Content-Length")
    missing = int(lengths[0])
    if missing > MAX_VALUE_BYTES:
        raise OSError(f"{missing} bytes are more than a value can have here")
    pieces = []
    try:
        while missing:
            piece = answer.read(min(missing, SENT_BYTES))
            if not piece:
                raise OSError(f"the answer breaks off {missing} bytes before its end")
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)
    except MemoryError:
        raise OSError("the value does not fit in memory") from None


def read_error(error: urllib.error.HTTPError) -> bytes:
    """Return the beginning of the body of an error."""
    try:
        with error:
            return error.read(PIECE_BYTES)
    except (OSError, http.client.HTTPException):
        return b""


def ask_failure(error: Exception, timeout: float) -> str:
    """Return why a server could not be asked, and what to do."""
    reason = getattr(error, "reason", error)  # what a URLError wraps
    if isinstance(reason, ConnectionRefusedError):
        return ("Connection refused; start a server with `python kv.py serve FILE`, "
                "or name another with --url")
    if isinstance(reason, socket.timeout):
        return f"no answer within {timeout:g} s"
    if "WRONG_VERSION_NUMBER" in str(reason) or "RECORD_LAYER" in str(reason):
        return "no TLS there, use http://"
    if isinstance(reason, http.client.RemoteDisconnected):
        return "the connection was closed without an answer"
    if isinstance(reason, http.client.BadStatusLine):
        return f"no HTTP there: {escape(str(reason).strip())}"
    return escape(getattr(reason, "strerror", None) or str(reason))


def keys_to_ask(keys: List[str]) -> Iterator[str]:
    """Yield the keys, and for a "-" those on standard input, one a line.

    Raises ValueError if that cannot be read.
    """
    for key in keys:
        if key != "-":
            yield key
            continue
        if sys.stdin is None:
            raise ValueError("standard input is closed")
        try:
            for line in sys.stdin.buffer:
                if line.strip():
                    yield line.decode("utf-8", "replace").strip()
        except OSError as error:
            raise ValueError(f"standard input: {error.strerror}")


def print_value(key: str, options: argparse.Namespace, output: BinaryIO) -> int:
    """Print the value of a key. Returns the exit code for it. Raises OSError."""
    try:
        value = get(key, options.url, options.timeout)
    except KeyError:
        complain(f"{escape(key)}: not found")
        return 1
    except ValueError as error:
        complain(f"{escape(key)}: {error}")
        return 2
    output.write(value + b"\n")
    output.flush()
    return 0


def print_values(options: argparse.Namespace) -> int:
    """Print the values of keys, a line each. Returns the exit code."""
    if sys.stdout is None:
        complain("standard output is closed")
        return 2
    code = 0
    try:
        with open(1, "wb", closefd=False) as output:
            for key in keys_to_ask(options.keys):
                code = max(code, print_value(key, options, output))
    except BrokenPipeError:  # the reader has enough, as in `kv.py get ... | head -1`
        return code
    except (NoAnswer, ValueError) as error:
        complain(str(error))
        return 2
    except OSError as error:
        complain(f"standard output: {error.strerror}")
        return 2
    return code


# ---------------------------------------------------------------------------
# The command line

class Parser(argparse.ArgumentParser):
    """Tells of wrong usage in one line."""

    def error(self, message: str) -> None:
        """Print `message` and where to read more, and exit: called by argparse."""
        message = re.sub("^argument ", "", message)
        complain(f"{escape(message)} (see {self.prog} --help)")
        sys.exit(2)


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return a function that reads a number from `low` to `high`, for argparse."""
    def read(text: str) -> int:
        if not re.fullmatch("[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return int(text)
    return read


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="kv.py",
        description="A read-only key-value server in one file, and its client.",
        epilog="Say `kv.py serve --help` or `kv.py get --help` for more.")
    parser.add_argument("--version", action="version", version=f"kv {__version__}",
                        help="Print the version and exit.")
    commands = parser.add_subparsers(metavar="serve | get", dest="command", required=True)

    command = commands.add_parser(
        "serve", help="Serve the pairs in a file.",
        description="Answer requests for the pairs in a file, until SIGTERM or Ctrl-C.")
    command.set_defaults(parser=command)
    command.add_argument(
        "file", metavar="FILE",
        help="The file with the pairs, each a line: a version 4 UUID, one space and the "
             "value. A - stands for standard input.")
    command.add_argument(
        "--host", default="127.0.0.1",
        help="The address to listen on: 0.0.0.0 for all of IPv4, :: for all of IPv4 and "
             "IPv6. By default %(default)s, which only this machine reaches.")
    command.add_argument(
        "--port", type=whole_number(0, 65535), default=8000,
        help="The port to listen on, by default %(default)s; 0 takes a free one.")
    command.add_argument(
        "--max-connections", metavar="COUNT", type=whole_number(1, 1000000),
        help="Hold at most so many connections. One more takes the place of the one that "
             "has waited longest. By default as many as the limit of open files allows, "
             f"at most {MAX_CONNECTIONS}.")
    command.add_argument(
        "--verbose", action="store_true", help="Log each request on standard error.")
    command.add_argument(
        "--sorted", action="store_true",
        help="Do not load FILE, but look keys up in it: for data larger than memory. FILE "
             "must be sorted by LC_ALL=C sort.")
    command.add_argument(
        "--no-check", dest="check", action="store_false",
        help="With --sorted: trust that FILE is in order, and listen at once.")

    command = commands.add_parser(
        "get", help="Print the values of keys.",
        description="Ask a server for the values of keys, and print each on a line.")
    command.set_defaults(parser=command)
    command.add_argument(
        "keys", metavar="KEY", nargs="+",
        help="A version 4 UUID. A - stands for keys on standard input, one a line.")
    command.add_argument(
        "--url", default=DEFAULT_URL,
        help="The URL of the server. By default $KV_URL, or http://127.0.0.1:8000.")
    command.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=DEFAULT_TIMEOUT,
        help="Give up when the server is silent for so long. By default %(default)g s.")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """End the program if options are not what they should be."""
    if options.command == "get":
        try:
            check_url(options.url)
        except ValueError as error:
            options.parser.error(f"--url: {error}")
        try:
            check_timeout(options.timeout)
        except ValueError as error:
            options.parser.error(f"--timeout: {error}")
        return
    if options.file == "-":
        options.file = 0
    if not options.check and not options.sorted:
        options.parser.error("--no-check is for --sorted files")
    if options.sorted and not hasattr(os, "pread"):
        options.parser.error("--sorted needs a system with pread, which Windows lacks")
    is_file = os.path.isfile(options.file) or not os.path.exists(options.file)
    if options.sorted and not (options.file and is_file):
        options.parser.error("--sorted is for files, not for standard input or a pipe")


def main() -> int:
    """Run the command that `sys.argv` gives. Returns the exit code."""
    parser = make_parser()
    first = "".join(sys.argv[1:2])
    if first not in ("serve", "get") and not first.startswith("-"):
        if os.path.exists(first):
            parser.error(f"did you mean `kv.py serve {first}`?")
        if KEY_RE.fullmatch(os.fsencode(first)):
            parser.error(f"did you mean `kv.py get {first}`?")
        if first:
            parser.error(f"{first}: neither serve nor get")
    options, unknown = parser.parse_known_args()
    if unknown:
        options.parser.error(f"not understood: {' '.join(unknown)}")
    check_options(options)
    try:
        if options.command == "serve":
            return serve(options)
        return print_values(options)
    except KeyboardInterrupt:  # Ctrl-C under get, or a second one under serve
        return 130


if __name__ == "__main__":
    sys.exit(main())
