#!/usr/bin/env python3
"""kv: a read-only key-value server in one file.

    python kv.py serve example.data    answers GET /KEY with the value of KEY in that file
    python kv.py get KEY               asks such a server for the value of KEY

The file reads in the order in which data flows:

    Limits             every limit, with its unit
    Messages           error messages of a command, and the log of a server
    The data file      parse: a line of the file becomes a pair in a dict
    Sorted files       Sorted: the pairs of a file that is too large for a dict
    Loading            Data: the pairs that are served, now and after a reload
    Requests           judge: the head of a request becomes a verdict
    Answers            answer_head: a status becomes the head of an answer
    Threads            Handler: serves a client that would make the others wait
    The loop           Server: does everything else, for all clients
    serve              starts a server
    get                asks a server
    The command line

A request passes through four methods of Server:

    receive            takes what a client has sent
    answer_requests    cuts it into the heads of requests
    answer             has a head judged and its key looked up
    send               sends all answers together; what is left, a Handler sends
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
    BinaryIO, Callable, Deque, Dict, Generator, Iterable, Iterator, List, Optional, Set,
    Tuple, Union)

__version__ = "2.0"


# ---------------------------------------------------------------------------
# Limits

# The data file
STEP_BYTES = 1 << 14          # parsed before requests are looked at again
STEP_PAIRS = 64               # freed before requests are looked at again
BAD_LINES_SHOWN = 10          # bad lines that are named; the others are only counted
BAD_LINE_BYTES = 50           # bytes of a bad line that are shown
PROGRESS_SECONDS = 1.0        # a load that takes longer shows its progress

# Sorted files
PAGE_BYTES = 4096             # read at a time in a lookup
MARK_BYTES = 1 << 16          # distance of the marks in a file
MARKS = 20000                 # largest number of marks; large files have wider distances

# Requests
RECEIVE_BYTES = 8192          # taken from a connection at a time
LINE_BYTES = 8000             # longest request line, without its CRLF
HEAD_BYTES = 16000            # longest head, with the empty line at its end
METHOD_BYTES = 17             # longest method that HTTP defines, UPDATEREDIRECTREF
VERDICTS = 1024               # number of verdicts that are remembered
VERDICT_BYTES = 2000          # longest head whose verdict is remembered

# Answers
COPIED_BYTES = 1024           # longest value that is copied; others are sent in place
PIECE_BYTES = 1 << 14         # of a long value in a sorted file, read at a time
SENT_BYTES = 1 << 18          # most that is sent at a time; a thread sends what is more
ANSWER_SECONDS = 10           # a client has this time to take an answer, and one more
ANSWER_BYTES_A_SECOND = 10000     # second for this many bytes of it
STALL_SECONDS = 10            # a client that takes nothing for this time is closed
LINGER_SECONDS = 3            # time that a refused client has to stop sending

# Connections
MAX_CONNECTIONS = 10000       # without --max-connections
SPARE_DESCRIPTORS = 32        # open files that are not connections
ACCEPT_QUEUE = 1000           # connections that the system keeps until they are accepted
IDLE_SECONDS = 650            # between two requests; load balancers close before that
HEAD_SECONDS = 10             # from the first byte of a head to its last
DRAIN_SECONDS = 4             # from a stop to the end of the last connection
DRAIN_IDLE_SECONDS = 0.5      # between two requests after a stop

# The loop
TICK_SECONDS = 0.1            # between two looks at deadlines, signals and the date
PATIENCE_SECONDS = 0.0001     # time to poll for more requests before going to sleep

# get
DEFAULT_URL = os.environ.get("KV_URL") or "http://127.0.0.1:8000"
DEFAULT_TIMEOUT = 10.0        # seconds
MAX_TIMEOUT = 1000000         # seconds; sockets do not accept much more
MAX_VALUE_BYTES = 1 << 31     # largest value that is accepted from a server
QUOTED_CHARACTERS = 200       # of what a server says, in messages


# ---------------------------------------------------------------------------
# Messages

LOG_LINE_BYTES = getattr(select, "PIPE_BUF", 512)

def escape(text: str) -> str:
    """Return `text` on one line, with nonprintable characters escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str) -> str:
    """Return the beginning of `text`, escaped."""
    if len(text) > QUOTED_CHARACTERS:
        text = text[:QUOTED_CHARACTERS] + "..."
    return escape(text)


def complain(text: str) -> None:
    """Print an error message of one or more lines to standard error."""
    if sys.stderr is None:  # it was closed before Python started
        return
    try:
        print("kv: " + text.replace("\n", "\nkv: "), file=sys.stderr)
    except OSError:
        pass  # the reader is gone


class Log:
    """The log of a server, on standard error. Writing to it never waits.

    A line that standard error does not take immediately is lost: neither a pipe that
    nobody reads nor a terminal stopped by Ctrl-S may hold up the server.
    """

    def __init__(self) -> None:
        self.is_open = sys.stderr is not None
        self.is_terminal = self.is_open and os.isatty(2)
        self.descriptor = 2
        is_pipe = self.is_open and stat.S_ISFIFO(os.fstat(2).st_mode)
        if self.is_terminal or is_pipe:
            # Descriptor 2 is shared with other programs, such as the shell, and so it
            # must stay a blocking one. Reopened, the pipe or terminal has a mode of its
            # own.
            try:
                self.descriptor = os.open(
                    "/dev/stderr", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            except (OSError, AttributeError):  # Windows lacks these flags
                pass

    def write(self, line: str) -> None:
        """Write a line, given without its newline. A very long one is cut."""
        if not self.is_open:
            return
        data = line.encode("utf-8", "backslashreplace")
        try:
            if os.name == "posix":
                # For what could not be reopened, this look is all there is.
                _, writable, _ = select.select([], [self.descriptor], [], 0)
                if not writable:
                    return
            # A pipe that is writable takes this much at once, or nothing.
            os.write(self.descriptor, data[:LOG_LINE_BYTES - 1] + b"\n")
        except OSError:
            pass  # the reader is gone

    def __call__(self, text: str) -> None:
        """Write each line of `text`, with the time unless standard error is a terminal.
        """
        prefix = "kv: "
        if not self.is_terminal:
            now = datetime.datetime.now().astimezone()
            prefix = f"{now.isoformat(timespec='seconds')} kv: "
        for line in text.split("\n"):
            self.write(prefix + line)


# ---------------------------------------------------------------------------
# The data file
#
# A line is a key, one space, a value and a newline. It becomes a pair in a dict, in
# bytes.

# RFC 9562 section 5.4. The keys of a dict are in lower case, those in its file in either.
KEY = rb"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
KEY_IN_EITHER_CASE = (  # (?i) would do, but matches at half the speed
    rb"[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-4[0-9A-Fa-f]{3}-[89ABab][0-9A-Fa-f]{3}"
    rb"-[0-9A-Fa-f]{12}")
KEY_BYTES = 36
KEY_RE = re.compile(KEY)
PAIR_RE = re.compile(rb"(" + KEY_IN_EITHER_CASE + rb") (.*)\n?")
SORTED_PAIR_RE = re.compile(rb"(" + KEY + rb") (.*)\n?")

# To tell what is wrong with a line
UUID_RE = re.compile(
    rb"(?i)[0-9a-f]{8}-[0-9a-f]{4}-([0-9a-f])[0-9a-f]{3}-([0-9a-f])[0-9a-f]{3}"
    rb"-[0-9a-f]{12}")
UUID_WITHOUT_HYPHENS_RE = re.compile(rb"(?i)[0-9a-f]{32}\b")
BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
COMPRESSED = (  # first bytes of the file, format, program that decompresses it
    (b"\x1f\x8b", "gzip", "zcat"),
    (b"BZh", "bzip2", "bzcat"),
    (b"\xfd7zXZ\0", "xz", "xzcat"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstdcat"),
)


def open_data(path: str) -> BinaryIO:
    """Open the data file at `path`, where "-" is standard input. Raises OSError."""
    if path != "-":
        file = open(path, "rb")
    elif sys.stdin is not None:
        file = open(0, "rb", closefd=False)
    else:
        raise OSError(errno.EBADF, "closed")
    mode = os.fstat(file.fileno()).st_mode
    is_device = stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
    if is_device and not file.isatty():
        file.close()
        raise OSError(errno.EINVAL, "a device, not a file")  # /dev/zero has no end
    return file


def data_name(path: str) -> str:
    """Return the name of the data file at `path` in messages."""
    if path == "-":
        return "standard input"
    if not path:
        return "''"
    return escape(os.fsdecode(path))


def stamp(descriptor: int) -> Tuple[int, int]:
    """Return size and modification time of an open file, to detect changes."""
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def parse(file: BinaryIO, name: str, pairs: "Pairs") -> Generator[None, None, List[str]]:
    """Store the pairs of `file` in `pairs`, which is empty; yield after every STEP_BYTES.

    `name` is the name of the file in messages. Returns warnings: texts on what is
    probably a mistake. Raises OSError if the file cannot be read, and ValueError if it
    cannot be served. Then the text says why, with a line for each bad line of the file.
    """
    pair_re = SORTED_PAIR_RE if isinstance(pairs, Sorted) else PAIR_RE
    stamp_before = stamp(file.fileno())
    faults = []
    bad_count = 0
    step_bytes = 0
    all_end_in_cr = True
    line = b""
    for number, line in enumerate(file, 1):
        step_bytes += len(line)
        if step_bytes > STEP_BYTES:
            step_bytes = 0
            yield
        if all_end_in_cr:
            all_end_in_cr = line.endswith(b"\r\n")
        pair = pair_re.fullmatch(line)
        if pair:
            key = pair[1].lower()
            if key not in pairs:
                pairs[key] = pair[2]
                continue
        if line == b"\n":  # an empty line is no fault
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
        faults.append(f"{name}: contains no pair")
    if faults:
        raise ValueError("\n".join(faults))
    warnings = []
    if not line.endswith(b"\n"):
        warnings.append(f"{name}: the last line has no newline; was the file cut off?")
    if all_end_in_cr:
        warnings.append(f"{name}: all values end in \\r; has the file Windows line ends?")
    return warnings


def refuse_compressed(first_line: bytes, name: str) -> None:
    """Raise ValueError if the first line of the file `name` shows that it is compressed.
    """
    for beginning, kind, program in COMPRESSED:
        if first_line.startswith(beginning):
            raise ValueError(f"{name}: {kind} data; decompress it first, as in: "
                             f"{program} FILE | python kv.py serve -")


def what_is_wrong(line: bytes, pairs: "Pairs") -> str:
    """Return, in a few words, why `parse` rejects a line."""
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
            return "a key in upper case, which --sorted does not take"
        if line[:KEY_BYTES] < pairs.last_key:
            return "a key below the one before it; sort the file with LC_ALL=C sort"
    return "duplicate key, first on an earlier line"


# ---------------------------------------------------------------------------
# Sorted files
#
# Version 4 UUIDs are random. So the place of a key in a file that is sorted by its keys
# can be computed from the key itself, much as one opens a printed encyclopedia: S is near
# the end.

FIRST_KEY_RE = re.compile(rb"\n(" + KEY + rb") ")
LAST_KEY_RE = re.compile(rb"(?s).*\n(" + KEY + rb") ")  # .* takes all that it can


class FileChanged(Exception):
    """A sorted file was changed in place while being served."""


class Sorted:
    """The pairs of a file in byte order of its lower-case keys, looked up in the file
    itself.

    To the parser this is a dict that takes keys in ascending order only (`in`, item
    assignment, `len`). It does not keep them, but records now and then how far the parser
    has come: a mark. To the server it is a dict with a `get`.

    A place is the offset of a newline in the file, in bytes. Lines are found by the
    newline before them. The one before the first line is not in the file; its place is
    -1.
    """

    descriptor: Optional[int] = None

    def __init__(self, file: BinaryIO) -> None:
        self.file = file                         # read by the parser, closed after that
        self.descriptor = os.dup(file.fileno())  # for lookups
        self.stamp = stamp(self.descriptor)
        self.size = self.stamp[0]
        self.count = 0
        self.last_key = b""
        # Marks, in ascending order: a key, as a number, and the place that separates the
        # lines with keys up to that one from the lines with greater keys.
        self.marks = [(0, -1), (1 << 128, self.size)]
        self.bytes_to_mark = max(MARK_BYTES, self.size // MARKS)
        self.bytes_since_mark = 0
        # The flag that makes preadv read only what is in memory, or 0 where there is
        # none.
        self.nowait_flag = getattr(os, "RWF_NOWAIT", 0)

    def __del__(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)  # not earlier: a thread may read after a reload

    def __len__(self) -> int:
        return self.count

    def __contains__(self, key: bytes) -> bool:
        """Tell the parser that a key which does not ascend is there already."""
        return key <= self.last_key

    def __setitem__(self, key: bytes, value: bytes) -> None:
        self.last_key = key
        self.count += 1
        self.bytes_since_mark += KEY_BYTES + len(value)
        if self.bytes_since_mark >= self.bytes_to_mark:
            self.bytes_since_mark = 0
            place = self.file.tell() - 1  # of the newline at the end of this line
            self.marks.insert(-1, (key_number(key), place))

    def get(self, key: bytes, wait: bool = False) -> "Optional[Body]":
        """Return the value of `key`, or None if there is no such key.

        If it may not `wait`, raises BlockingIOError when pages have to come from the
        disk, or when many have to be read. Raises FileChanged if the file was changed in
        place.
        """
        if not KEY_RE.fullmatch(key):  # it is a path that was not judged
            return None
        number = key_number(key)
        mark = bisect.bisect_left(self.marks, (number,))
        low_number, low = self.marks[mark - 1]
        high_number, high = self.marks[mark]
        # The line with the key, if there is one, begins at a place from `low` on, and
        # before `high`. Lines that begin before `low` have keys up to low_number, those
        # that begin from `high` on have keys from high_number on. low_number < number <=
        # high_number.
        reads = 0
        while low < high:
            reads += 1
            if reads % 4 == 0:  # halve the range, in case the keys are not random
                guess = (low + high) // 2
            else:
                share = (number - low_number) / (high_number - low_number)
                guess = low + int(share * (high - low))
            start = max(low, guess - PAGE_BYTES // 2)
            place, page = self.page_with_key(start, high, wait)
            line = page.find(b"\n" + key + b" ")
            if line >= 0:
                return self.value_at(place, page, line + KEY_BYTES + 2, wait)
            first = FIRST_KEY_RE.search(page)
            if not first or key < first[1]:
                high = start
                if first:
                    high_number = key_number(first[1])
                continue
            last = LAST_KEY_RE.match(page)
            if key < last[1]:
                return None  # it would stand between two keys of this page
            low = place + last.start(1)  # after the newline of that line
            low_number = key_number(last[1])
        return None

    def page_with_key(self, place: int, high: int, wait: bool) -> Tuple[int, bytes]:
        """Return place and content of the first page from `place` on in which a key
        begins.

        Stops at `high`.
        """
        start = place
        page = self.read(place, PAGE_BYTES, wait)
        while place < high and not FIRST_KEY_RE.search(page):  # a page in a long value
            if not wait and place > start:
                raise BlockingIOError("a long search is left to a thread")
            cut_off = place + len(page) - KEY_BYTES - 1  # where a key may begin
            place = self.find_newline(max(cut_off, place + 1), wait)
            page = self.read(place, PAGE_BYTES, wait)
        return place, page

    def value_at(self, place: int, page: bytes, index: int, wait: bool) -> "Body":
        """Return the value that begins at `index` of the page that begins at `place`."""
        end = page.find(b"\n", index)
        if end >= 0:
            return page[index:end]
        start = place + index  # the value continues past the page
        size = self.find_newline(start, wait) - start
        if size <= PIECE_BYTES:
            return self.read(start, size, wait)
        return StoredValue(self, start, size)

    def find_newline(self, offset: int, wait: bool) -> int:
        """Return the place of the first newline from `offset` on, or the size of the
        file.
        """
        while offset < self.size:
            piece = self.read(offset, PIECE_BYTES, wait)
            newline = piece.find(b"\n")
            if newline >= 0:
                return offset + newline
            offset += len(piece)
            if not wait and offset < self.size:
                raise BlockingIOError("a long value is left to a thread")
        return self.size

    def read(self, offset: int, size: int, wait: bool) -> bytes:
        """Return `size` bytes from `offset` on, or fewer at the end of the file.

        From -1 on, returns a newline and `size` bytes. Raises what `get` raises.
        """
        if offset < 0:
            return b"\n" + self.read(0, size, wait)
        if wait or not self.nowait_flag:
            content = os.pread(self.descriptor, size, offset)
        else:
            content = self.read_from_memory(offset, size)
        self.check()
        return content

    def read_from_memory(self, offset: int, size: int) -> bytes:
        """Do as os.pread does, but raise BlockingIOError if the disk would have to be
        read.
        """
        content = bytearray(size)
        try:
            count = os.preadv(self.descriptor, [content], offset, self.nowait_flag)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise  # BlockingIOError, most likely
            self.nowait_flag = 0  # tmpfs cannot tell, but it is always in memory
            return os.pread(self.descriptor, size, offset)
        if count < min(size, self.size - offset):
            raise BlockingIOError("only a part is in memory")
        return bytes(content[:count])

    def check(self) -> None:
        """Raise FileChanged if the file was changed in place."""
        if stamp(self.descriptor) != self.stamp:
            raise FileChanged


def key_number(key: bytes) -> int:
    """Return the 128 bits of a key as a number."""
    return int(key.replace(b"-", b""), 16)


class StoredValue:
    """A long value of a sorted file, read from the file only when it is sent."""

    def __init__(self, pairs: Sorted, offset: int, size: int) -> None:
        self.pairs = pairs
        self.offset = offset
        self.size = size

    def __len__(self) -> int:
        return self.size

    def pieces(self) -> Iterator[bytes]:
        """Yield the value in pieces. Raises FileChanged."""
        end = self.offset + self.size
        for offset in range(self.offset, end, PIECE_BYTES):
            yield self.pairs.read(offset, min(PIECE_BYTES, end - offset), wait=True)


Pairs = Union[Dict[bytes, bytes], Sorted]
Body = Union[bytes, StoredValue]  # of an answer
Verdict = Tuple[int, bytes, bool]


# ---------------------------------------------------------------------------
# Loading

def load(path: str) -> Dict[bytes, bytes]:
    """Return the pairs in the data file at `path`: for those who import this file.

    Raises OSError if the file cannot be read, ValueError if it is not well formed, with a
    line of text for each bad line, and MemoryError if it is too large.
    """
    pairs: Dict[bytes, bytes] = {}
    with open_data(path) as file:
        for _ in parse(file, data_name(path), pairs):
            pass
    return pairs


class Data:
    """The pairs that a server answers from.

    `load` and `reload` are generators that work in short steps. During a reload, requests
    are answered between the steps; at the start, `load` is run to its end.
    """

    def __init__(self, options: argparse.Namespace, log: Log) -> None:
        self.path = options.file
        self.name = data_name(options.file)
        self.is_sorted = options.sorted
        self.is_checked = options.check
        self.log = log
        self.pairs: Pairs = {}
        self.size = ""                   # "10000 pairs": as messages say it
        self.since = ""                  # date of the last load
        self.new_pairs: Pairs = {}       # those of a load that is under way
        self.new_file: Optional[BinaryIO] = None   # the file of that load
        self.change_reported = False     # whether the log says that the file was changed

    def load(self) -> Iterator[None]:
        """Load the file and swap its pairs in. Raises OSError, ValueError and
        MemoryError.
        """
        size = "unchecked pairs"
        with open_data(self.path) as self.new_file:
            self.new_pairs = Sorted(self.new_file) if self.is_sorted else {}
            if self.is_checked:
                warnings = yield from parse(self.new_file, self.name, self.new_pairs)
                for warning in warnings:
                    self.log(warning)
                size = f"{len(self.new_pairs)} pairs"
        self.pairs = self.new_pairs
        self.size = size
        self.since = email.utils.formatdate(usegmt=True)
        self.change_reported = False

    def reload(self) -> Iterator[None]:
        """Load the file again, and free what is then no longer needed.

        Errors are logged, and the old pairs stay.
        """
        start = time.monotonic()
        old_pairs = self.pairs
        self.new_pairs = {}
        try:
            if self.path == "-" or not stat.S_ISREG(os.stat(self.path).st_mode):
                raise ValueError(f"{self.name}: not a file that can be read again")
            yield from self.load()
        except Exception as error:
            self.log(f"{load_failure(error, self.name)}\nthe data stays as it was")
            unneeded = self.new_pairs
        else:
            before = f" ({len(old_pairs)} before)" if self.is_checked else ""
            self.log(f"{self.description(start)}, reloaded{before}")
            unneeded = old_pairs
        self.new_pairs = {}
        # To free a dict of millions in one go would hold up all clients.
        while isinstance(unneeded, dict) and unneeded:
            for _ in range(min(len(unneeded), STEP_PAIRS)):
                unneeded.popitem()
            yield

    def description(self, start: float) -> str:
        """Return what the log says of a load that began at a time.monotonic()."""
        return f"{self.size} of {self.name} in {time.monotonic() - start:.2f} s"

    def progress(self, start: float) -> str:
        """Return how far a load has come that began at a time.monotonic()."""
        percent = "?"
        if self.new_file.seekable():
            size = os.fstat(self.new_file.fileno()).st_size
            percent = str(self.new_file.tell() * 100 // max(size, 1))
        count = len(self.new_pairs)
        rate = count / (time.monotonic() - start)
        return f"{percent} % read, {count} pairs, {rate:.0f} a second"

    def status_page(self) -> bytes:
        """Return what GET / shows. Raises FileChanged if lookups would raise it."""
        if isinstance(self.pairs, Sorted):
            self.pairs.check()
        text = (f"{self.size} of {os.path.basename(self.name)}, since {self.since}\n"
                "get a value with GET /KEY, where KEY is a version 4 UUID\n")
        return text.encode()

    def report_change(self) -> None:
        """Log, but only once, that the file was changed in place."""
        if not self.change_reported:
            self.change_reported = True
            self.log(f"{self.name}: changed in place; send SIGHUP to reload it")


def load_failure(error: Exception, name: str) -> str:
    """Return why the data file called `name` was not loaded, in one or more lines."""
    if isinstance(error, MemoryError):
        return f"{name}: too large for the memory; --sorted needs less"
    if isinstance(error, OSError):
        return f"{name}: {error.strerror or error}"
    return str(error)


# ---------------------------------------------------------------------------
# Requests
#
# The head of a request is judged strictly, by the grammar of RFC 9112, and in one place.
# As a client sends the same fields with each of its requests, the verdict on them is
# remembered.
#
# A verdict is a tuple of three: the status of the answer; a text; and whether to close
# the connection after the answer. With status 200, the text is the path that is asked
# for, else the line that says what is wrong.

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"                       # RFC 9110 section 5.6.2
TOKEN_RE = re.compile(TOKEN)
VERSION_RE = re.compile(rb"HTTP/[0-9]\.[0-9]")                # RFC 9112 section 2.3
FIELD_RE = re.compile(                                        # RFC 9112 section 5
    rb"(" + TOKEN + rb"):([\t -~\x80-\xff]*)")
TARGET_RE = re.compile(      # visible ASCII without "#<>\^`{|}, see RFC 3986 appendix A
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
LINE_BEGINNING_RE = re.compile(                               # as in "GET /x HTT"
    rb"(?:" + TOKEN + rb"(?: [!-~]*){0,2})?\r?")
OTHER_METHODS = (b"POST", b"PUT", b"DELETE", b"CONNECT", b"TRACE", b"PATCH")


def refuse(status: int, text: str) -> Verdict:
    """Return the verdict on what is not a proper request. Nothing is read after it."""
    return status, text.encode(), True


BARE_LINE_END = refuse(400, "bare CR or LF (RFC 9112 section 2.2)")
MALFORMED_LINE = refuse(
    400, "malformed request line: not METHOD TARGET HTTP/1.1 CRLF (RFC 9112 section 3)")


def judge(head: bytes) -> Verdict:
    """Judge a complete head, given without the empty line at its end.

    Paths, which come without their first slash, are left to `judge_path`: nearly all are
    keys that are found in the data as they are, and need not be judged.
    """
    judge_rest = judge_fields
    if len(head) > VERDICT_BYTES:
        judge_rest = judge_fields.__wrapped__  # the function that does not remember
        too_long = judge_length(head + b"\r\n\r\n")
        if too_long:
            return too_long
    words = head.split(b" ", 2)
    if len(words) < 3:
        return MALFORMED_LINE
    method, target, rest = words
    status, text, close = judge_rest(method, rest)
    if status == 200 and target[:1] == b"/":
        return 200, target[1:], close
    return judge_target(method, target, status, text, close)


def judge_length(head: bytes) -> Optional[Verdict]:
    """Return a refusal if a head, or the part received so far, is too long; else None."""
    if len(head) <= LINE_BYTES:
        return None
    line = head.partition(b"\r\n")[0]
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
    """Judge all of a head but its target: the method, and what follows the target.

    The section numbers are those of RFC 9112.
    """
    version, *lines = rest.split(b"\r\n")
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
        fields[field[1].lower()].append(field[2].strip(b"\t "))

    hosts = fields[b"host"]
    if not hosts and version != b"HTTP/1.0":
        return refuse(400, "missing Host header (RFC 9112 section 3.2)")
    if len(hosts) > 1:
        return refuse(400, "more than one Host header (RFC 9112 section 3.2)")
    if hosts and not HOST_RE.fullmatch(hosts[0]):
        return refuse(400, "malformed Host header (RFC 9112 section 3.2)")

    # A body is never read: it ends the connection. One of unknown length is refused, too.
    lengths = fields[b"content-length"]
    codings = fields[b"transfer-encoding"]
    has_body = bool(codings) or lengths not in ([], [b"0"])
    if has_body and method in (b"GET", b"HEAD"):
        return refuse(400, "a GET or HEAD request with a body (RFC 9110 section 9.3)")
    if lengths and codings:
        return refuse(
            400, "both Content-Length and Transfer-Encoding (RFC 9112 section 6.2)")
    if len(lengths) > 1 or lengths and not lengths[0].isdigit():
        return refuse(400, "malformed Content-Length (RFC 9112 section 6.2)")
    if codings and not are_chunked(list_elements(codings)):
        return refuse(400, "malformed Transfer-Encoding (RFC 9112 section 6.1)")

    expectations = list_elements(fields[b"expect"])
    if fields[b"expect"] and set(expectations) != {b"100-continue"}:
        return refuse(417, "unsupported Expect header (RFC 9110 section 10.1.1)")

    options = list_elements(fields[b"connection"])
    close = has_body or version == b"HTTP/1.0" or b"close" in options  # section 9.3
    if method == b"OPTIONS":
        return 204, b"", close
    if method in OTHER_METHODS:
        return 405, b"method not allowed: use GET or HEAD", close
    if method not in (b"GET", b"HEAD"):
        return 501, b"unknown method", close
    return 200, b"", close


def list_elements(values: List[bytes]) -> List[bytes]:
    """Return the elements of comma-separated lists in lower case (RFC 9110 section
    5.6.1).
    """
    elements = b",".join(values).lower().split(b",")
    stripped = [element.strip(b"\t ") for element in elements]
    return [element for element in stripped if element]


def are_chunked(codings: List[bytes]) -> bool:
    """Return whether transfer codings are tokens, of which the last and only one is
    chunked.
    """
    if codings[-1:] != [b"chunked"] or codings.count(b"chunked") > 1:
        return False
    return all(TOKEN_RE.fullmatch(coding) for coding in codings)


def judge_target(
        method: bytes, target: bytes, status: int, text: bytes, close: bool) -> Verdict:
    """Judge a target that is not simply a path, given the verdict on the rest of a head.

    RFC 9112 section 3.2 defines the four forms of a target.
    """
    if not TARGET_RE.fullmatch(target):
        return MALFORMED_LINE
    if status in (400, 417, 505):  # the rest is not a proper request
        return status, text, close
    absolute = ABSOLUTE_TARGET_RE.fullmatch(target)
    if absolute and status == 200:
        return 200, absolute[1] or b"", close
    if absolute or target.startswith(b"/"):
        return status, text, close
    if method == b"CONNECT" or (method, target) == (b"OPTIONS", b"*"):
        return status, text, close
    return MALFORMED_LINE


def judge_path(path: bytes) -> Verdict:
    """Judge a path that is not, as it is, a key in the data.

    With status 200, the text is the key that it stands for, or b"" for the status page.
    """
    if path and not TARGET_RE.fullmatch(path):
        return MALFORMED_LINE
    key = path.partition(b"?")[0].lower()
    key = key.replace(b"%2d", b"-")  # RFC 3986 section 6.2.2, as far as keys go
    if key and not KEY_RE.fullmatch(key):
        return 400, b"not a version 4 UUID", False
    return 200, key, False


def judge_beginning(beginning: bytes) -> Optional[Verdict]:
    """Return a refusal if a head that begins like this cannot become valid, else None.

    So bad requests are refused without waiting for their end.
    """
    if beginning.startswith(b"\r\n"):  # one empty line may precede (RFC 9112 section 2.2)
        beginning = beginning[2:]
    too_long = judge_length(beginning)
    if too_long:
        return too_long
    line, line_end, _ = beginning.partition(b"\r\n")
    if not line_end:
        return None if LINE_BEGINNING_RE.fullmatch(line) else MALFORMED_LINE
    verdict = judge(line + b"\r\nHost: kv")  # as if the rest of the head was valid
    if verdict[0] == 200:
        verdict = judge_path(verdict[1])
    status, _, close = verdict
    if status in (400, 505) and close:
        return verdict
    text = beginning.replace(b"\r\n", b"")
    if b"\n" in text or b"\r" in text[:-1]:  # a CR at the end may be half of a CRLF
        return BARE_LINE_END
    return None


# ---------------------------------------------------------------------------
# Answers

KEY_NOT_FOUND = b"key not found\n"
INTERNAL_ERROR = b"internal error, see the server's log\n"


@functools.lru_cache(maxsize=100)
def answer_head(status: int, close: bool, date: str) -> bytes:
    """Return the head of an answer, with %d for the length of its body if it has one.

    It changes only with the date, once a second, and so it is remembered.
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
    if status != 204:  # which has no body, RFC 9110 section 8.6
        lines.append("Content-Type: text/plain; charset=utf-8")
        lines.append("Content-Length: %d")
    return "\r\n".join(lines + ["", ""]).encode()


# ---------------------------------------------------------------------------
# Threads

NEVER = float("inf")    # the waiting_since of a connection that does not wait


class Connection:
    """What the server knows about one client."""

    __slots__ = (
        "socket", "address", "received", "unsent", "close", "linger", "waiting_since")

    def __init__(self, client_socket: socket.socket, address: str) -> None:
        self.socket = client_socket
        self.address = address
        # What was received and is not answered yet, such as the beginning of a head.
        self.received = b""
        # What the client has not taken yet: bytes, memoryview and StoredValue objects.
        self.unsent: list = []
        # Whether to close the connection when all is sent, and whether to linger before
        # that, because the client may still be sending.
        self.close = False
        self.linger = False
        # The time.monotonic() at which the server began to wait for the client: for a
        # request, for the rest of one, or for the client to take an answer.
        self.waiting_since = NEVER


class Handler(socketserver.BaseRequestHandler):
    """Serves a client that would make the others wait: plain blocking code, in a thread.

    What socketserver calls a request is here a Connection. The loop has handed it over;
    Server.shutdown_request closes it or gives it back to the loop.
    """

    def handle(self) -> None:
        """Send what is unsent, answer the requests that follow, and linger if necessary.
        """
        connection = self.request
        self.send_unsent()
        while not connection.close and b"\r\n\r\n" in connection.received:
            self.server.answer_requests(connection, self.get)
            self.send_unsent()
        if not connection.close:
            self.server.refuse_beginning(connection)
            self.send_unsent()
        if connection.close:
            self.linger()

    def get(self, key: bytes) -> Optional[Body]:
        """Look a key up in the pairs as dict.get does, waiting for the disk if necessary.
        """
        pairs = self.server.data.pairs
        if isinstance(pairs, Sorted):
            return pairs.get(key, wait=True)
        value = pairs.get(key)
        if value is None and pairs is not self.server.data.pairs:
            return self.get(key)  # after a reload, the old dict is emptied
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
        """Say that no more will be sent, and discard for a moment what the client still
        sends.

        If the connection was closed at once, the system would answer that with a reset,
        and a reset can make the client lose the answer.
        """
        connection = self.request
        connection.socket.shutdown(socket.SHUT_WR)
        now = time.monotonic()
        deadline = now + LINGER_SECONDS
        if connection.waiting_since == NEVER:
            connection.waiting_since = now
        more = True
        while more and now < deadline:
            connection.socket.settimeout(deadline - now)
            more = connection.socket.recv(RECEIVE_BYTES)
            now = time.monotonic()


# ---------------------------------------------------------------------------
# The loop

OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
CAN_GATHER = hasattr(socket.socket, "sendmsg")  # Windows lacks it


class Server(http.server.ThreadingHTTPServer):
    """The loop: does all that does not have to wait, for all clients.

    What has to wait for one client or for the disk is handed over to a thread: an answer
    that is large or that the client does not take immediately, lingering, and a lookup in
    pages that are not in memory. Of ThreadingHTTPServer this uses the socket
    (server_bind, server_activate, get_request) and what runs a Handler in a thread
    (process_request_thread, finish_request); serve_forever is its own.

    Connections that wait for their clients are in one of two dicts, in the order in which
    they began to wait: in `idle` for their next request, in `beginnings` for the rest of
    a head. So the first one of each is the next to expire, or to be evicted.
    """

    request_queue_size = ACCEPT_QUEUE
    allow_reuse_address = os.name == "posix"  # on Windows, two servers could share a port
    allow_reuse_port = False                  # for the same reason, in newer Pythons

    def __init__(self, options: argparse.Namespace, data: Data, log: Log) -> None:
        """Take the port, but do not listen yet. Raises OSError and UnicodeError."""
        self.data = data
        self.log = log
        self.is_verbose = options.verbose
        # Each connection is in one of these three, but for the one that is just handled.
        self.idle: "collections.OrderedDict[Connection, None]" = collections.OrderedDict()
        self.beginnings: Dict[Connection, None] = {}
        self.handed_over: Set[Connection] = set()
        self.returned: Deque[Connection] = collections.deque()  # by threads, for the loop
        self.max_connections = options.max_connections
        self.selector = selectors.DefaultSelector()
        self.is_accepting = False            # whether the listening socket is registered
        self.now = time.monotonic()          # at the beginning of this round of the loop
        self.next_tick = self.now
        self.date = ""                       # as in a Date field
        self.found_head = b""                # head of the answer to most requests
        self.was_busy = False                # whether the last round had requests
        self.is_patient = processor_count() > 1
        self.reload: Optional[Iterator[None]] = None   # one that is under way
        self.next_step = self.now            # earliest time for its next step
        self.is_hangup_noted = False         # SIGHUP has come
        self.is_stop_noted = False           # SIGTERM or SIGINT has come
        self.ends_with_terminal = False      # whether a closed terminal means a stop
        self.is_stopping = False
        self.stop_deadline = NEVER           # a time.monotonic()

        found = socket.getaddrinfo(
            options.host.strip("[]"), options.port, type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE)
        self.address_family, _, _, _, address = found[0]
        super().__init__(address, Handler, bind_and_activate=False)
        self.server_bind()

    def server_bind(self) -> None:
        """Bind as TCPServer does. HTTPServer would look up a name, which can take long.
        """
        if self.server_address[0] == "::":  # for IPv4 as well
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Connections inherit these. No answer waits until the last one is acknowledged.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Nor does a lot wait in the system, which would hide that a client takes it
        # slowly.
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            self.socket.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, SENT_BYTES)
        socketserver.TCPServer.server_bind(self)

    # The loop

    def serve_forever(self, poll_interval: float = TICK_SECONDS) -> None:
        """Answer requests until a signal asks for a stop and all connections have ended.
        """
        self.socket.setblocking(False)
        self.service_actions()
        while not self.is_stopped():
            try:
                self.run_round(poll_interval)
            except Exception as error:  # when memory runs out, this can be anywhere
                self.evict_longest_waiting()
                self.log(f"fault in the loop: {error!r}")

    def is_stopped(self) -> bool:
        """Return whether all connections have ended after a stop, or run out of time."""
        if not self.is_stopping:
            return False
        return self.connection_count() == 0 or self.now >= self.stop_deadline

    def run_round(self, poll_interval: float) -> None:
        """Wait for events, handle them, and do what else is due."""
        events = self.wait(poll_interval)
        self.now = time.monotonic()
        if self.returned:
            self.take_back()
        has_newcomer = False
        for key, _ in events:
            connection = key.data
            if connection is None:  # the listening socket
                has_newcomer = True
                continue
            if connection.waiting_since == NEVER:  # it was not taken back yet
                continue
            try:
                self.receive(connection)
            except Exception:
                self.handle_error(connection, connection.address)
                self.close(connection)
        if has_newcomer:  # last, as that may evict somebody who has just asked
            self.accept()
        self.was_busy = bool(events)
        if self.now >= self.next_tick:
            self.service_actions()
        if self.reload:
            self.step_reload()

    def wait(self, seconds: float) -> list:
        """Return events of the selector; wait up to `seconds` if there are none.

        Does not wait during a reload. Before it goes to sleep after a round with events,
        it polls for a moment: many clients send their next request immediately, and to
        wake a sleeping process takes longer than to answer it.
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
        self.next_tick = self.now + TICK_SECONDS
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
            self.refuse(
                connection, refuse(408, f"no complete request within {HEAD_SECONDS} s"))
            self.send(connection)
            self.close(connection)

    def overdue(self, waiting: Iterable[Connection], seconds: float) -> List[Connection]:
        """Return those at the front of `waiting` that have waited longer than `seconds`.
        """
        oldest = self.now - seconds
        return list(itertools.takewhile(lambda c: c.waiting_since < oldest, waiting))

    def step_reload(self) -> None:
        """Take a step of a reload: in half of the time, or all of it if there are no
        events.
        """
        if self.was_busy and self.now < self.next_step:
            return
        start = time.monotonic()
        try:
            next(self.reload)
        except StopIteration:
            self.reload = None
        end = time.monotonic()
        self.next_step = end + (end - start)  # requests get as long as the step took

    # Connections

    def accept(self) -> None:
        """Accept a connection, in place of the longest-waiting one if there is no room.
        """
        is_full = self.connection_count() >= self.max_connections
        if is_full and not self.evict_longest_waiting():
            self.pause_accepting()
            return
        try:
            client_socket, address = self.get_request()
        except OSError as error:
            if error.errno in OUT_OF_RESOURCES and not self.evict_longest_waiting():
                self.pause_accepting()
            return  # else the client has gone, or the next round will accept it
        connection = Connection(client_socket, address[0])
        try:
            client_socket.setblocking(False)
            self.selector.register(client_socket, selectors.EVENT_READ, connection)
        except (OSError, MemoryError):
            client_socket.close()
            return
        self.keep(connection)

    def pause_accepting(self) -> None:
        """Leave new connections in the system's queue until the next tick."""
        self.selector.unregister(self.socket)
        self.is_accepting = False

    def connection_count(self) -> int:
        """Return the number of connections."""
        return len(self.idle) + len(self.beginnings) + len(self.handed_over)

    def evict_longest_waiting(self) -> bool:
        """Close the connection that has waited longest for its client, if any waits.

        Returns whether there was one.
        """
        candidates = list(self.handed_over)
        candidates += itertools.islice(self.idle, 1)
        candidates += itertools.islice(self.beginnings, 1)
        longest = min(candidates, key=lambda c: c.waiting_since, default=None)
        if longest is None or longest.waiting_since == NEVER:
            return False
        if longest not in self.handed_over:
            self.close(longest)
            return True
        longest.waiting_since = NEVER
        try:
            longest.socket.shutdown(socket.SHUT_RDWR)  # its thread notices, and closes it
        except OSError:
            pass  # it is closed already
        return True

    def keep(self, connection: Connection) -> None:
        """Put a connection last among those that wait for their clients."""
        connection.waiting_since = self.now
        self.idle.pop(connection, None)
        self.beginnings.pop(connection, None)
        if connection.received.strip(b"\r\n"):  # more than an empty line
            self.beginnings[connection] = None
        else:
            self.idle[connection] = None

    def forget(self, connection: Connection) -> None:
        """Stop looking after a connection."""
        connection.waiting_since = NEVER
        self.idle.pop(connection, None)
        self.beginnings.pop(connection, None)
        self.handed_over.discard(connection)
        try:
            self.selector.unregister(connection.socket)
        except (KeyError, ValueError):
            pass  # hand_over did that, and then ran out of memory

    def close(self, connection: Connection) -> None:
        """Close a connection that the loop looks after."""
        self.forget(connection)
        connection.socket.close()

    # Requests

    def receive(self, connection: Connection) -> None:
        """Take what a client has sent, and answer all complete requests in it."""
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
            self.answer_requests(connection, self.data.pairs.get)
        except BlockingIOError:
            self.hand_over(connection, NEVER)  # it waits for the disk, not for its client
            return
        if connection.received and not connection.close:
            # Heads that trickle in are looked at again only where that can change a
            # thing.
            has_line_end = b"\r" in news or b"\n" in news
            is_long = len(connection.received) > LINE_BYTES
            if has_line_end or is_long or not beginning:
                self.refuse_beginning(connection)
        if not connection.unsent:  # the head is not complete yet
            if connection not in self.beginnings:
                self.keep(connection)
        elif not self.send(connection):
            self.hand_over(connection, self.now)
        elif connection.close and connection.linger:
            self.hand_over(connection, self.now)
        elif connection.close:
            self.close(connection)
        elif beginning or connection.received:
            self.keep(connection)
        else:  # what `keep` would do, but quicker
            connection.waiting_since = self.now
            self.idle.move_to_end(connection)

    def answer_requests(self, connection: Connection, get: Callable) -> None:
        """Answer all complete requests in what a connection has received.

        `get` looks a key up as dict.get does. If it raises BlockingIOError, or the
        answers are more than a thread should send at a time, the other requests remain in
        `received`, as does the beginning of a head. Threads call this, too: it changes
        nothing but the connection.
        """
        heads = connection.received.split(b"\r\n\r\n")
        connection.received = heads.pop()
        size = 0
        for number, head in enumerate(heads, 1):
            if head.startswith(b"\r\n"):  # one empty line may precede (section 2.2)
                head = head[2:]
            try:
                status, body = self.answer(connection, head, get)
            except BlockingIOError:
                self.put_back(connection, heads[number - 1:])
                connection.close = False
                raise
            except Exception as error:
                self.report_fault(error, connection.address)
                status = 500
                body = INTERNAL_ERROR
            if self.is_stopping and number == len(heads):
                connection.close = True
            size += self.add_answer(connection, head, status, body)
            if connection.close:
                if connection.received or number < len(heads):
                    connection.linger = True
                return
            if size > SENT_BYTES:
                self.put_back(connection, heads[number:])
                return

    def put_back(self, connection: Connection, heads: List[bytes]) -> None:
        """Put the heads of requests that are not answered yet back into `received`."""
        connection.received = b"\r\n\r\n".join(heads + [connection.received])

    def answer(
            self, connection: Connection, head: bytes, get: Callable) -> Tuple[int, Body]:
        """Return the status and the body of the answer to a request, given its head."""
        status, text, connection.close = judge(head)
        if status == 200:
            path = text
            value = get(path)
            if value is not None:
                return 200, value
            status, text, close = judge_path(path)
            connection.close = connection.close or close
        if status != 200:
            return status, text + b"\n"
        if not text:
            return 200, self.data.status_page()
        if text != path:
            value = get(text)
        if value is None:
            return 404, KEY_NOT_FOUND
        return 200, value

    def refuse_beginning(self, connection: Connection) -> None:
        """Refuse the beginning of a head if it cannot become valid."""
        if b"\r\n\r\n" in connection.received:
            return  # it begins with complete heads that are still to be answered
        verdict = judge_beginning(connection.received)
        if verdict:
            self.refuse(connection, verdict)

    def refuse(self, connection: Connection, verdict: Verdict) -> None:
        """Answer the beginning of a head by a refusal."""
        status, text, connection.close = verdict
        self.add_answer(connection, connection.received, status, text + b"\n")

    def add_answer(
            self, connection: Connection, head: bytes, status: int, body: Body) -> int:
        """Put an answer together, and return its size in bytes. `head` is the head of its
        request, or the beginning of it.
        """
        if status == 200 and not connection.close:
            answer = self.found_head % len(body)
        elif status == 204:
            answer = answer_head(status, connection.close, self.date)
            body = b""
        else:
            answer = answer_head(status, connection.close, self.date) % len(body)
        if head.startswith(b"HEAD "):
            body = b""
        if connection.close:
            # Refused clients may still be sending, and a long answer can be lost by a
            # reset.
            connection.linger = status not in (200, 404) or len(body) > PIECE_BYTES
        if self.is_verbose:
            self.log_request(connection.address, head, status, len(body))
        if len(body) <= COPIED_BYTES:  # a StoredValue is always longer
            connection.unsent.append(answer + body)
        else:
            connection.unsent += [answer, body]
        return len(answer) + len(body)

    def log_request(self, address: str, head: bytes, status: int, size: int) -> None:
        """Log a request in Common Log Format."""
        line = repr(head.partition(b"\r\n")[0])[2:-1]  # as in b'...', escaped
        line = line.replace('"', '\\"')
        now = time.strftime("%d/%b/%Y:%H:%M:%S %z")
        self.log.write(f'{address} - - [{now}] "{line}" {status} {size}')

    def send(self, connection: Connection) -> bool:
        """Send what is unsent, and return whether the client took all of it immediately.

        What is long is left to a thread. So there is no StoredValue here: the loop's
        lookups leave long values to a thread as well.
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
        """Start a thread, or close the connection if the system cannot start one.

        ThreadingMixIn calls threading.Thread.start here. That waits until the thread
        runs: forever, if the thread dies for lack of memory before that.
        """
        try:
            _thread.start_new_thread(
                self.process_request_thread, (request, client_address))
        except (RuntimeError, MemoryError) as error:
            self.log(f"cannot start a thread for {client_address}: {error}")
            request.close = True
            self.shutdown_request(request)

    def handle_error(self, request: Connection, client_address: str) -> None:
        """Close a connection because of an exception: called where that is handled."""
        request.close = True
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # that a client has gone is not a fault
            self.report_fault(error, client_address)

    def report_fault(self, error: Exception, client_address: str) -> None:
        """Log an exception in one line, but FileChanged only once."""
        if isinstance(error, FileChanged):
            self.data.report_change()
        else:
            self.log(f"fault in answering {client_address}: {error!r}")

    def shutdown_request(self, request: Connection) -> None:
        """Close a connection or give it back to the loop: called by a thread at its end.
        """
        request.waiting_since = NEVER
        if not request.close:
            try:
                request.socket.setblocking(False)
                # epoll and kqueue take this while the loop waits for them. Until the loop
                # has taken the connection back, it ignores its events.
                self.selector.register(request.socket, selectors.EVENT_READ, request)
            except (OSError, ValueError, MemoryError):
                request.close = True
        if request.close:
            request.socket.close()
        self.returned.append(request)

    def take_back(self) -> None:
        """Take back the connections that threads are done with."""
        while self.returned:
            connection = self.returned.popleft()
            self.handed_over.discard(connection)
            if not connection.close:
                self.keep(connection)

    # Signals

    def note_hangups(self) -> None:
        """From now on note SIGHUP, to act on it at a tick."""
        if hasattr(signal, "SIGHUP"):  # Windows lacks it
            is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            self.ends_with_terminal = has_terminal() and not is_nohup
            signal.signal(signal.SIGHUP, self.note_hangup)

    def note_stops(self) -> None:
        """From now on note SIGTERM and Ctrl-C, to act on them at a tick."""
        signal.signal(signal.SIGTERM, self.note_stop)
        signal.signal(signal.SIGINT, self.note_stop)

    def note_hangup(self, *_) -> None:
        self.is_hangup_noted = True

    def note_stop(self, *_) -> None:
        self.is_stop_noted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the next one ends it

    def act_on_signals(self) -> None:
        """Start a reload or a stop that a signal asks for."""
        if self.is_hangup_noted and self.ends_with_terminal and not has_terminal():
            self.is_stop_noted = True  # the signal came because the terminal was closed
        elif self.is_hangup_noted and not self.reload:
            self.is_hangup_noted = False
            self.reload = self.data.reload()
        if self.is_stop_noted and not self.is_stopping:
            self.begin_stop()

    def begin_stop(self) -> None:
        """Stop listening. From now on, connections are closed after their next answers.
        """
        self.is_stopping = True
        self.stop_deadline = self.now + DRAIN_SECONDS
        if self.is_accepting:
            self.pause_accepting()
        self.socket.close()


def has_terminal() -> bool:
    """Return whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError as error:
        return error.errno in OUT_OF_RESOURCES  # then one cannot know
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
    # Until the server notes stops, SIGTERM raises KeyboardInterrupt as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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
    start = time.monotonic()
    options.max_connections = allowed_connections(options.max_connections, log)
    data = Data(options, log)
    try:
        server = Server(options, data, log)
    except (OSError, UnicodeError) as error:
        raise CannotServe(listen_failure(error, options))
    server.note_hangups()
    try:
        load_with_progress(data)
    except (OSError, ValueError, MemoryError) as error:
        raise CannotServe(load_failure(error, data.name))
    server.note_stops()
    try:
        server.server_activate()
    except OSError as error:
        raise CannotServe(listen_failure(error, options))
    port = server.socket.getsockname()[1]
    log(f"{data.description(start)}, on http://{host_and_port(options.host, port)}")
    return server


def allowed_connections(wanted: Optional[int], log: Log) -> int:
    """Raise the limit of open files to what `wanted` connections need; return how many to
    hold.

    None wants what the limit allows, up to MAX_CONNECTIONS.
    """
    needed = (wanted or MAX_CONNECTIONS) + SPARE_DESCRIPTORS
    limit = needed
    try:
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and soft < needed:
            limit = soft
            raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            limit = raised
    except ImportError:  # on Windows, which has no such limit
        pass
    except (OSError, ValueError) as error:
        log(f"cannot raise the limit of open files: {error}")
    if wanted is None:
        return max(1, limit - SPARE_DESCRIPTORS)
    if limit < needed:
        log(f"--max-connections {wanted} needs {needed} open files, but the limit is "
            f"{limit}; raise it with ulimit -n, or LimitNOFILE under systemd")
    return wanted


def load_with_progress(data: Data) -> None:
    """Load the data file without a pause, and show on a terminal how far it has come.

    Raises OSError, ValueError and MemoryError.
    """
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    can_show = is_terminal and os.name != "nt" and os.environ.get("TERM") != "dumb"
    clear_line = "\r\x1b[K"
    is_shown = False
    start = time.monotonic()
    next_shown = start + PROGRESS_SECONDS
    try:
        for _ in data.load():
            if can_show and time.monotonic() >= next_shown:
                next_shown = time.monotonic() + TICK_SECONDS
                is_shown = True
                sys.stderr.write(clear_line + data.progress(start))
                sys.stderr.flush()
    finally:
        if is_shown:
            sys.stderr.write(clear_line)
            sys.stderr.flush()


def listen_failure(error: Exception, options: argparse.Namespace) -> str:
    """Return why the server cannot listen where the options say."""
    reason = getattr(error, "strerror", None) or str(error)
    if isinstance(error, UnicodeError):
        reason = "not a valid host name"
    elif getattr(error, "errno", None) == errno.EADDRINUSE:
        reason += " (--port takes another)"
    place = escape(host_and_port(options.host, options.port))
    return f"cannot listen on {place}: {reason}"


def host_and_port(host: str, port: int) -> str:
    """Return a host, which may be an IPv6 address, and a port as they appear in a URL."""
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return f"{host}:{port}"


# ---------------------------------------------------------------------------
# get

LOOPBACK_RE = re.compile(r"localhost|127\.[0-9.]+|::1")


class NoAnswer(OSError):
    """A server does not answer, or not as kv does; the text says how."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Treats a redirect as an error: kv never sends one."""

    def redirect_request(self, *_) -> None:
        """Return None: do not follow."""


def get(key: Union[str, uuid.UUID], url: str = DEFAULT_URL,
        timeout: float = DEFAULT_TIMEOUT) -> bytes:
    """Return the value of a key from the server at `url`.

    The key is anything that uuid.UUID accepts. The timeout, in seconds, is for each time
    that the server is silent. Raises ValueError for a key that is not a version 4 UUID,
    and for a URL or a timeout that cannot be used; KeyError if the server does not have
    the key; and OSError if it does not answer, or not as kv does.
    """
    path = str(version_4_uuid(key))
    check_url(url)
    check_timeout(timeout)
    proxies = {}
    place = url
    proxy = proxy_for(url)
    if proxy:
        proxies[urllib.parse.urlsplit(url).scheme] = proxy
        place = f"{url} through the proxy {proxy.rpartition('@')[2]}"  # no password
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies), NoRedirect)
    try:
        with opener.open(f"{url.rstrip('/')}/{path}", timeout=timeout) as answer:
            return read_value(answer)
    except urllib.error.HTTPError as error:
        body = read_error(error)
        if error.code == 404 and body == KEY_NOT_FOUND:
            raise KeyError(path) from None
        line = body.decode("utf-8", "replace").partition("\n")[0]
        said = shorten(f"{error.code} {error.reason}: {line}")
        raise NoAnswer(f"{place} answered {said}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = ask_failure(error, timeout)
        if reason == "Connection refused" and not proxy:
            reason += ("; start a server with `python kv.py serve FILE`, "
                       "or name another with --url")
        raise NoAnswer(f"cannot ask {place}: {reason}") from None


def version_4_uuid(key: Union[str, uuid.UUID]) -> uuid.UUID:
    """Return a key as a UUID. Raises ValueError if it is not a version 4 UUID."""
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
    if "://" not in url:
        raise ValueError(f"{url}: add http:// before it")
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"{url}: the scheme must be http or https")
    if "?" in url or "#" in url:
        raise ValueError(f"{url}: a query or a fragment is not allowed")
    if "@" in parts.netloc:
        raise ValueError(f"{url}: user names and passwords are not supported")
    if not parts.hostname:
        raise ValueError(f"{url}: the host is missing")
    try:
        is_port = parts.port != 0
    except ValueError:
        is_port = False
    if not is_port:
        raise ValueError(f"{url}: the port must be a number from 1 to 65535")


def check_timeout(seconds: float) -> None:
    """Raise ValueError if a timeout is not one that sockets accept."""
    if not 0 < seconds <= MAX_TIMEOUT:
        raise ValueError(f"{seconds:g} is not above 0 and up to {MAX_TIMEOUT} seconds")


def proxy_for(url: str) -> Optional[str]:
    """Return the proxy to use for a URL, or None. Loopback addresses never have one."""
    parts = urllib.parse.urlsplit(url)
    if LOOPBACK_RE.fullmatch(parts.hostname) or urllib.request.proxy_bypass(parts.netloc):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def read_value(answer: http.client.HTTPResponse) -> bytes:
    """Return the body of an answer. Raises OSError if it is not as kv answers."""
    if answer.status != 200:
        raise OSError(f"unexpected status {answer.status} {answer.reason}")
    if answer.getheader("Content-Encoding") or answer.getheader("Transfer-Encoding"):
        raise OSError("unexpected Content-Encoding or Transfer-Encoding")
    if answer.headers.get_content_type() != "text/plain":
        raise OSError("unexpected Content-Type; is that a server of another kind?")
    lengths = answer.headers.get_all("Content-Length", [])
    if len(lengths) != 1 or not re.fullmatch("[0-9]{1,18}", lengths[0]):
        raise OSError("missing, doubled or malformed Content-Length")
    missing = int(lengths[0])
    if missing > MAX_VALUE_BYTES:
        raise OSError(f"a value of {missing} bytes, which is too large")
    pieces = []
    try:
        while missing:
            piece = answer.read(min(missing, SENT_BYTES))
            if not piece:
                raise OSError(f"the answer ended {missing} bytes early")
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
    text = shorten(getattr(reason, "strerror", None) or str(reason).strip())
    if isinstance(reason, ConnectionRefusedError):
        return "Connection refused"
    if isinstance(reason, socket.timeout):
        return f"no answer within {timeout:g} s"
    if "WRONG_VERSION_NUMBER" in str(reason) or "RECORD_LAYER" in str(reason):
        return "the server does not speak TLS; use http://"
    if isinstance(reason, http.client.RemoteDisconnected):
        return "the connection was closed without an answer"
    if isinstance(reason, http.client.BadStatusLine):
        return f"not an HTTP server: {text}"
    return text


def keys_to_ask(keys: List[str]) -> Iterator[str]:
    """Yield the keys, and for a "-" those on standard input, one per line.

    Raises ValueError if standard input cannot be read.
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
    """Print the values of keys, one per line. Returns the exit code."""
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
    """Reports wrong usage in one line."""

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
        epilog="Run `kv.py serve --help` or `kv.py get --help` for more.")
    parser.add_argument("--version", action="version", version=f"kv {__version__}",
                        help="Print the version and exit.")
    commands = parser.add_subparsers(metavar="serve | get", dest="command", required=True)

    command = commands.add_parser(
        "serve", help="Serve the pairs in a file.",
        description="Answer requests for the pairs in a file, until SIGTERM or Ctrl-C.")
    command.set_defaults(parser=command)
    command.add_argument(
        "file", metavar="FILE",
        help="The file with the pairs, one per line: a version 4 UUID, one space and the "
             "value. A - stands for standard input.")
    command.add_argument(
        "--host", default="127.0.0.1",
        help="The address to listen on: 0.0.0.0 for all of IPv4, :: for all of IPv4 and "
             "IPv6. By default %(default)s, reachable only from this machine.")
    command.add_argument(
        "--port", type=whole_number(0, 65535), default=8000,
        help="The port to listen on, by default %(default)s; 0 picks a free one.")
    command.add_argument(
        "--max-connections", metavar="COUNT", type=whole_number(1, 1000000),
        help="Hold at most this many connections. A further one replaces the one that "
             "has been waiting longest. By default as many as the limit of open files "
             f"allows, up to {MAX_CONNECTIONS}.")
    command.add_argument(
        "--verbose", action="store_true", help="Log each request on standard error.")
    command.add_argument(
        "--sorted", action="store_true",
        help="Do not load FILE, but look keys up in it: for data larger than memory. "
             "FILE must be sorted with LC_ALL=C sort.")
    command.add_argument(
        "--no-check", dest="check", action="store_false",
        help="With --sorted: trust that FILE is in order, and listen immediately.")

    command = commands.add_parser(
        "get", help="Print the values of keys.",
        description="Ask a server for the values of keys, and print them, one per line.")
    command.set_defaults(parser=command)
    command.add_argument(
        "keys", metavar="KEY", nargs="+",
        help="A version 4 UUID. A - stands for keys on standard input, one per line.")
    command.add_argument(
        "--url", default=DEFAULT_URL,
        help="The URL of the server. By default $KV_URL, or http://127.0.0.1:8000.")
    command.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=DEFAULT_TIMEOUT,
        help="Give up when the server is silent for this long. By default %(default)g s.")
    return parser


def check_serve_options(options: argparse.Namespace) -> None:
    """End the program if options of `serve` do not go together."""
    if not options.check and not options.sorted:
        options.parser.error("--no-check requires --sorted")
    if options.sorted and not hasattr(os, "pread"):
        options.parser.error("--sorted needs a system with pread, which Windows lacks")
    is_special = os.path.exists(options.file) and not os.path.isfile(options.file)
    if options.sorted and (options.file == "-" or is_special):
        options.parser.error("--sorted is for files, not for standard input or a pipe")


def check_get_options(options: argparse.Namespace) -> None:
    """End the program if options of `get` cannot be used."""
    try:
        check_url(options.url)
    except ValueError as error:
        options.parser.error(f"--url: {error}")
    try:
        check_timeout(options.timeout)
    except ValueError as error:
        options.parser.error(f"--timeout: {error}")


def check_command(command: str, parser: Parser) -> None:
    """End the program if the first argument is none of its commands, with a guess if
    possible.
    """
    if command in ("", "serve", "get") or command.startswith("-"):
        return
    if os.path.exists(command):
        parser.error(f"did you mean `kv.py serve {command}`?")
    if KEY_RE.fullmatch(os.fsencode(command)):
        parser.error(f"did you mean `kv.py get {command}`?")
    parser.error(f"{command}: neither serve nor get")


def main() -> int:
    """Run the command that `sys.argv` gives. Returns the exit code."""
    parser = make_parser()
    if len(sys.argv) > 1:
        check_command(sys.argv[1], parser)
    options, unknown = parser.parse_known_args()
    if unknown:  # reported by the parser of the command, which knows its own --help
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        if options.command == "serve":
            check_serve_options(options)
            return serve(options)
        check_get_options(options)
        return print_values(options)
    except KeyboardInterrupt:  # Ctrl-C during get, or a second one during serve
        return 130


if __name__ == "__main__":
    sys.exit(main())
