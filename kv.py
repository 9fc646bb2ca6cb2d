#!/usr/bin/env python3
"""kv: a read-only key-value server in one file.

    python kv.py serve example.data    answers GET /KEY with the value of KEY in that file
    python kv.py get KEY               asks such a server for the value of KEY

The sections follow the flow of data:

    Limits             every limit, with its unit
    Messages           error messages of a command, and the log of a server
    The data file      parse: a line of the file becomes a pair in a dict
    Sorted files       Sorted: the pairs of a file that does not fit in memory
    Loading            Data: the pairs that are served, now and after a reload
    Requests           judge: the head of a request becomes a verdict
    Answers            answer_head: a status becomes the head of an answer
    Threads            Handler: waits for one client, or for the disk
    The loop           Server: does everything that cannot block
    serve              starts a server
    get                asks a server
    The command line

A request passes through four methods of Server:

    receive            takes what a client has sent
    answer_next        splits off the head of the next request
    answer             has the head judged, and looks the key up
    send               sends all answers together; a Handler sends what is left
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
import ipaddress
import itertools
import math
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
import weakref
from typing import (
    BinaryIO, Callable, Deque, Dict, Generator, Iterable, Iterator, List, Optional, Tuple,
    Union)

__version__ = "2.0"


# ---------------------------------------------------------------------------
# Limits

# The data file
STEP_BYTES = 1 << 14          # bytes of the file to parse in one step of a reload
STEP_PAIRS = 64               # pairs of the old dict to free in one step
BAD_LINES_SHOWN = 10          # bad lines to name; the others are only counted
BAD_LINE_BYTES = 50           # bytes of a bad line to show
PROGRESS_SECONDS = 1.0        # a load that takes longer shows its progress

# The log. A write of up to this many bytes to a pipe is atomic, and does not block if
# select says that the pipe is writable.
LOG_LINE_BYTES = getattr(select, "PIPE_BUF", 512)

# Sorted files
PAGE_BYTES = 4096             # bytes to read at a time in a lookup
MARK_BYTES = 1 << 16          # distance between marks in a file
MARKS = 20000                 # maximum number of marks; in larger files, they are spaced
                              # farther apart

# Requests
RECEIVE_BYTES = 8192          # bytes to take from a connection at a time
LINE_BYTES = 8000             # longest request line, without its CRLF
HEAD_BYTES = 16000            # longest head, with the empty line at its end
METHOD_BYTES = 17             # longest registered method, UPDATEREDIRECTREF
VERDICTS = 1024               # number of verdicts that are cached
VERDICT_BYTES = 2000          # longest head whose verdict is cached

# Answers
UNSENT_BYTES = 1 << 16        # unsent bytes that the system may queue for one client
JOINED_BYTES = 1024           # longest body that is joined to its head; a longer one is
                              # sent without being copied
JOINED_PARTS = 1024           # parts of answers to send in one call: the usual IOV_MAX
PIECE_BYTES = 1 << 15         # bytes of a long value to read at a time
TURN_BYTES = 1 << 18          # bytes to send to one client before others get a turn;
                              # longer answers get a thread
# A client must take an answer within ANSWER_SECONDS + its size / ANSWER_BYTES_PER_SECOND.
ANSWER_SECONDS = 10
ANSWER_BYTES_PER_SECOND = 10000
STALL_SECONDS = 10            # longest time a client may go without taking any data
LINGER_SECONDS = 3            # how long to wait for a client to stop sending, before its
                              # connection is closed

# Connections
MAX_CONNECTIONS = 10000       # without --max-connections
SPARE_DESCRIPTORS = 32        # descriptors that are reserved for other open files
ACCEPT_QUEUE = 1000           # connections that the system queues until they are accepted
IDLE_SECONDS = 650            # between two requests; longer than the idle timeouts of
                              # load balancers, so that they, and not kv, close first
HEAD_SECONDS = 10             # from the first byte of a head to its last
DRAIN_SECONDS = 4             # from a stop until the last connections are closed
DRAIN_IDLE_SECONDS = 0.5      # between two requests after a stop
HANGUP_SECONDS = 1.0          # after a terminal is closed, a SIGHUP within this time
                              # means a stop, and a later one a reload; see Signals
WINDOWS_SOCKETS = 512         # sockets that select can handle on Windows

# The loop
TICK_SECONDS = 0.1            # between checks of deadlines and signals
PATIENCE_SECONDS = 0.0001     # time to poll for more requests before going to sleep
EVENTS_PER_NEWCOMER = 16      # under load, accept one connection per this many events

# get
DEFAULT_URL = os.environ.get("KV_URL") or "http://127.0.0.1:8000"
DEFAULT_TIMEOUT = 10.0        # seconds
MAX_TIMEOUT = 1000000         # seconds; sockets do not accept much more
MAX_VALUE_BYTES = (1 << 31) - 1   # largest value to accept; TLS cannot read more at once
KEYS_TOGETHER = 200           # keys to ask for in one request; they fit in LINE_BYTES
TOGETHER_BYTES = 1 << 26      # largest answer to such a request; if it is larger, the
                              # keys are asked for one by one
INPUT_BYTES = 1 << 16         # bytes of keys to read at a time from standard input
QUOTED_CHARACTERS = 200       # characters of a server's answer to quote in messages


# ---------------------------------------------------------------------------
# Messages

def escape(text: str) -> str:
    """Return `text` on one line, with nonprintable characters escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str) -> str:
    """Return `text`, escaped, and truncated if it is long."""
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
    """The log of a server, on standard error.

    A line that cannot be written immediately is lost: neither a pipe that nobody reads
    nor a terminal stopped by Ctrl-S may hold up the server.
    """

    def __init__(self, is_verbose: bool) -> None:
        self.is_verbose = is_verbose         # whether to log each request
        self.is_open = sys.stderr is not None
        self.is_terminal = self.is_open and os.isatty(2)
        self.descriptor = 2
        # Where possible, as on Linux, reopen a pipe or terminal in nonblocking mode.
        # Descriptor 2 itself must stay in blocking mode, because other programs, such as
        # the shell, share it.
        is_pipe = self.is_open and stat.S_ISFIFO(os.fstat(2).st_mode)
        if os.name == "posix" and (is_pipe or self.is_terminal):
            try:
                self.descriptor = os.open(
                    "/dev/stderr", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            except OSError:
                pass

    def write(self, line: str) -> None:
        """Write a line, given without its newline. A very long line is truncated."""
        data = line.encode("utf-8", "backslashreplace")
        self.put(data[:LOG_LINE_BYTES - 1] + b"\n")

    def put(self, data: bytes) -> None:
        """Write bytes if that is possible without blocking."""
        if not self.is_open:
            return
        try:
            if os.name == "posix":  # the descriptor may still be in blocking mode
                _, writable, _ = select.select([], [self.descriptor], [], 0)
                if not writable:
                    return
            os.write(self.descriptor, data)
        except OSError:
            pass  # the pipe is full, or its reader is gone

    def __call__(self, text: str) -> None:
        """Write each line of `text`, prefixed with the time unless on a terminal."""
        prefix = "kv: "
        if not self.is_terminal:
            now = datetime.datetime.now().astimezone()
            prefix = f"{now.isoformat(timespec='seconds')} kv: "
        for line in text.split("\n"):
            self.write(prefix + line)


# ---------------------------------------------------------------------------
# The data file
#
# A line is a key, one space, a value and a newline. It becomes a pair of bytes objects in
# a dict.

# RFC 9562 section 5.4. Keys may be in either case in a file; in a dict they are in lower
# case.
KEY = rb"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
KEY_IN_EITHER_CASE = (  # (?i) would do, but matches at half the speed
    rb"[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-4[0-9A-Fa-f]{3}-[89ABab][0-9A-Fa-f]{3}"
    rb"-[0-9A-Fa-f]{12}")
KEY_BYTES = 36
KEY_RE = re.compile(KEY)
PAIR_RE = re.compile(rb"(" + KEY_IN_EITHER_CASE + rb") (.*)\n?")
SORTED_PAIR_RE = re.compile(rb"(" + KEY + rb") (.*)\n?")

# For explaining what is wrong with a line
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
    """Return the name that messages use for the data file at `path`."""
    if path == "-":
        return "standard input"
    return escape(os.fsdecode(path)) or "''"


def stamp(descriptor: int) -> Tuple[int, int]:
    """Return the size and modification time of an open file, to detect changes."""
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def parse(file: BinaryIO, name: str, pairs: "Pairs") -> Generator[None, None, List[str]]:
    """Store the pairs of `file` in `pairs`, which must be empty.

    `name` is the name of the file in messages. Yields after every STEP_BYTES. Returns
    warnings about likely mistakes. Raises OSError if the file cannot be read, and
    ValueError if it must not be served; the message says why, with one line for each bad
    line.
    """
    pair_re = PAIR_RE
    if isinstance(pairs, Sorted):
        pair_re = SORTED_PAIR_RE
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
        pair = pair_re.fullmatch(line)
        if pair:
            key = pair[1].lower()
            # For a Sorted, `in` is also true for a key that is out of order.
            if key not in pairs:
                value = pair[2]
                pairs[key] = value
                if all_end_in_cr:
                    all_end_in_cr = value.endswith(b"\r")
                continue
        if line == b"\n":  # empty lines are allowed
            continue
        # The line is not a pair, or its key must be refused.
        if number == 1:
            refuse_compressed(line, name)
        bad_count += 1
        if bad_count <= BAD_LINES_SHOWN:
            shown = line.rstrip(b"\n")[:BAD_LINE_BYTES]
            faults.append(f"{name}:{number}: {what_is_wrong(line, pairs)}: {shown!r}")
    if bad_count > BAD_LINES_SHOWN:
        faults.append(f"{name}: and {bad_count - BAD_LINES_SHOWN} more bad lines")
    if file.seekable() and stamp(file.fileno()) != stamp_before:
        raise ValueError(f"{name}: changed while it was being read")
    if faults:
        raise ValueError("\n".join(faults))
    if not pairs:
        raise ValueError(f"{name}: contains no pairs")
    warnings = []
    if not line.endswith(b"\n"):
        warnings.append(f"{name}: the last line has no newline; was the file cut off?")
    if all_end_in_cr:
        warnings.append(
            f"{name}: all values end in \\r; does the file have Windows line endings?")
    return warnings


def refuse_compressed(first_line: bytes, name: str) -> None:
    """Raise ValueError if this is the first line of a compressed file."""
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
        return "a UUID, but not of the RFC 9562 variant"
    if line[KEY_BYTES:KEY_BYTES + 1] != b" ":
        return "no space after the key"
    if isinstance(pairs, Sorted):
        if not SORTED_PAIR_RE.match(line):
            return "a key in upper case, which --sorted does not accept"
        if line[:KEY_BYTES] < pairs.last_key:
            return "a key out of order; sort the file with LC_ALL=C sort"
    return "duplicate key, first on an earlier line"


# ---------------------------------------------------------------------------
# Sorted files
#
# Version 4 UUIDs are random. The place of a key in a file that is sorted by its keys can
# therefore be estimated from the key itself, much as one opens a printed encyclopedia
# near its end for "submarine".

FIRST_KEY_RE = re.compile(rb"\n(" + KEY + rb") ")         # first key in a page
LAST_KEY_RE = re.compile(rb"(?s).*\n(" + KEY + rb") ")    # last one, as .* is greedy
PREFIX_BYTES = 1 + KEY_BYTES + 1      # what these match: a newline, a key and a space


class FileChanged(Exception):
    """A sorted file was changed in place while being served: args[0] is its Sorted."""


class Unreadable(Exception):
    """A part of a sorted file cannot be read; the message says why."""


class Sorted:
    """The pairs of a file that is sorted by its lower-case keys, looked up in the file.

    To the parser this is a dict that takes keys in ascending order only (`in`, item
    assignment, `len`). It keeps none of the pairs; it only notes a key and its offset in
    the file about every MARK_BYTES. To the server it has a `get` like that of a dict.

    A lookup reads pages of PAGE_BYTES, at any offset. It recognizes the beginning of a
    line by a newline, a key and a space. So in this class, a line begins with the newline
    before it, and the first one at offset -1. These PREFIX_BYTES are called its prefix. A
    line whose prefix is cut off by the end of a page is not found in that page. Empty
    lines do not count.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file                         # the parser reads this one
        self.descriptor = os.dup(file.fileno())  # for lookups
        # A reload must not close it, because a thread may still be reading. It is closed
        # when nothing refers to these pairs any more.
        weakref.finalize(self, os.close, self.descriptor)
        self.stamp = stamp(self.descriptor)
        self.size = self.stamp[0]
        self.count = 0
        self.last_key = b""
        # The marks: keys as numbers of 128 bits, and the offsets at which their lines
        # begin. The first and the last of them stand for the ends of the file.
        self.mark_numbers = [0, 1 << 128]
        self.mark_offsets = [-1, self.size]
        self.bytes_to_mark = max(MARK_BYTES, self.size // MARKS)
        self.bytes_since_mark = 0
        # The flag that makes preadv read only what is in memory; 0 if there is none.
        self.nowait_flag = getattr(os, "RWF_NOWAIT", 0)
        self.is_change_logged = False    # whether a change in place has been logged

    def __len__(self) -> int:
        return self.count

    def __contains__(self, key: bytes) -> bool:
        """Return whether the parser must refuse `key`: a duplicate, or out of order."""
        return key <= self.last_key

    def __setitem__(self, key: bytes, value: bytes) -> None:
        """Note the key of the line that the parser has just read."""
        self.last_key = key
        self.count += 1
        line_bytes = PREFIX_BYTES + len(value)
        self.bytes_since_mark += line_bytes
        if self.bytes_since_mark >= self.bytes_to_mark:
            self.bytes_since_mark = 0
            # The parser has also read the newline with which the next line begins. (It
            # may be missing at the end of the file. Then the mark is one byte too low,
            # perhaps even -2. That does no harm, as a lookup searches from there on.)
            line_end = self.file.tell() - 1
            self.mark_numbers.insert(-1, key_number(key))
            self.mark_offsets.insert(-1, max(-1, line_end - line_bytes))

    def get(self, key: bytes, wait: bool = False) -> "Optional[Value]":
        """Return the value of `key`, or None if there is no such key.

        Threads set `wait`. Without it, raises BlockingIOError instead of reading a long
        value, or pages that are not in memory. (Pages are read anyway where the system
        cannot tell whether they are in memory.) Raises FileChanged and Unreadable.
        """
        if not KEY_RE.fullmatch(key):  # callers pass paths that are not validated
            return None
        number = key_number(key)
        mark = bisect.bisect_right(self.mark_numbers, number)
        low = self.mark_offsets[mark - 1]
        low_number = self.mark_numbers[mark - 1]
        high = self.mark_offsets[mark]
        high_number = self.mark_numbers[mark]
        # If the key is in the file, the offset of its line is in the range low <= offset
        # < high. Each round reads a page at `probe`, in this range, and then moves `high`
        # down to it, or `low` beyond it. The numbers are those of keys near the ends, and
        # serve only for estimates: low_number <= number < high_number.
        probes = 0
        while low < high:
            probes += 1
            if probes % 4 == 0:  # halve the range, in case the keys are not random
                guess = (low + high) // 2
            else:
                share = (number - low_number) / (high_number - low_number)
                guess = low + int(share * (high - low))
            probe = max(low, guess - PAGE_BYTES // 2)
            found = self.first_page_with_line(probe, high, wait)
            if not found:  # no line begins between `probe` and `high`
                high = probe
                continue
            offset, page, first_key = found
            line = page.find(b"\n" + key + b" ")
            if line >= 0:
                return self.value_in(page, offset, line + PREFIX_BYTES, wait)
            last = LAST_KEY_RE.match(page)  # this may be the first one again
            if key < first_key:  # no line begins between `probe` and that of first_key
                high = probe
                high_number = key_number(first_key)
            elif key > last[1]:
                low = offset + last.end()
                low_number = key_number(last[1])
            else:  # its line would be in this page
                return None
        return None

    def first_page_with_line(
            self, offset: int, high: int, wait: bool
    ) -> Optional[Tuple[int, bytes, bytes]]:
        """Return the page at `offset`, or the next one that has a line in it.

        Returns its offset, the page, and the first key in it. Returns None if no line
        begins between `offset` and `high`. Raises the same exceptions as `get`.
        """
        start = offset
        while offset < high:
            if not wait and offset > start + PIECE_BYTES:
                raise BlockingIOError("a long search is left to a thread")
            page = self.read_page(offset, wait)
            first = FIRST_KEY_RE.search(page)
            if first:
                return offset, page, first[1]
            # The page is inside a long value, or it has only empty lines. A line that
            # begins after `last_offset` is cut off by the end of the page, so look for
            # the next line from there.
            last_offset = offset + PAGE_BYTES - PREFIX_BYTES
            offset = self.find_newline(last_offset + 1, wait)
        return None

    def read_page(self, offset: int, wait: bool) -> bytes:
        """Return the page at `offset`. Raises the same exceptions as `get`."""
        if offset == -1:  # the file does not have the newline before the first line
            return b"\n" + self.read(0, PAGE_BYTES - 1, wait)
        return self.read(offset, PAGE_BYTES, wait)

    def value_in(self, page: bytes, offset: int, index: int, wait: bool) -> "Value":
        """Return the value that begins at `index` of the page at `offset`.

        With `wait`, in a thread, a long value is returned as a StoredValue, which is read
        piece by piece when it is sent. The loop always gets bytes. Raises the same
        exceptions as `get`.
        """
        start = offset + index
        newline = page.find(b"\n", index)
        if newline >= 0:
            size = newline - index
        else:  # the value continues past the page
            size = self.find_newline(start, wait) - start
        if wait and size > JOINED_BYTES:
            return StoredValue(self, start, size)
        if newline >= 0:
            return page[index:newline]
        return self.read(start, size, wait)

    def find_newline(self, offset: int, wait: bool) -> int:
        """Return the offset of the first newline at or after `offset`, or the file size.

        Raises the same exceptions as `get`.
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
        """Return the `size` bytes at `offset`, or fewer at the end of the file.

        Raises the same exceptions as `get`.
        """
        try:
            if wait or not self.nowait_flag:
                content = os.pread(self.descriptor, size, offset)
            else:
                content = self.read_from_memory(offset, size)
            self.check()
        except BlockingIOError:
            raise
        except OSError as error:
            raise Unreadable(error.strerror)
        end = offset + len(content)
        if len(content) < size and end < self.size:
            raise Unreadable(f"cannot be read beyond byte {end}")
        return content

    def read_from_memory(self, offset: int, size: int) -> bytes:
        """Read like os.pread, but raise BlockingIOError if that would read the disk."""
        content = bytearray(size)
        try:
            count = os.preadv(self.descriptor, [content], offset, self.nowait_flag)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise  # BlockingIOError, most likely
            self.nowait_flag = 0  # some systems and file systems, such as tmpfs, lack it
            return os.pread(self.descriptor, size, offset)
        if count < size and offset + count < self.size:
            raise BlockingIOError("only a part of this range is in memory")
        del content[count:]
        return bytes(content)

    def check(self) -> None:
        """Raise FileChanged if the file was changed in place."""
        if stamp(self.descriptor) != self.stamp:
            raise FileChanged(self)


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
        """Yield the value in pieces. Raises FileChanged and Unreadable."""
        end = self.offset + self.size
        for offset in range(self.offset, end, PIECE_BYTES):
            yield self.pairs.read(offset, min(PIECE_BYTES, end - offset), wait=True)


Pairs = Union[Dict[bytes, bytes], Sorted]
Value = Union[bytes, StoredValue]
Body = Union[Value, List[Value]]     # of an answer; a list contains its parts


# ---------------------------------------------------------------------------
# Loading

def load(path: str) -> Dict[bytes, bytes]:
    """Return the pairs in the data file at `path`, for programs that import this module.

    Raises OSError if the file cannot be read, MemoryError if it is too large, and
    ValueError if it is malformed; the message has one line for each bad line.
    """
    pairs: Dict[bytes, bytes] = {}
    with open_data(path) as file:
        for _ in parse(file, data_name(path), pairs):
            pass
    return pairs


class Data:
    """The pairs that a server answers from.

    `load` and `reload` are generators that work in short steps. During a reload, requests
    are answered between the steps; at the start, `load` is run to completion.
    """

    def __init__(self, options: argparse.Namespace, log: Log) -> None:
        self.options = options
        self.name = data_name(options.file)
        self.log = log
        self.pairs: Pairs = {}
        self.summary = ""                # for messages, such as "10000 pairs"
        self.since = ""                  # date of the last load
        self.report = ""                 # what the log says about the last load
        self.load_start = 0.0            # time.monotonic() at the start of a load
        self.new_pairs: Pairs = {}       # the pairs of a load in progress
        self.new_file: Optional[BinaryIO] = None   # the file of that load

    def load(self) -> Iterator[None]:
        """Load the file and swap its pairs in.

        Raises OSError, ValueError and MemoryError.
        """
        self.load_start = time.monotonic()
        self.new_pairs = {}
        warnings: List[str] = []
        summary = "unchecked pairs"
        with open_data(self.options.file) as file:
            self.new_file = file
            if self.options.sorted:
                self.new_pairs = Sorted(file)
            if self.options.check:  # it is false only with --sorted
                warnings = yield from parse(file, self.name, self.new_pairs)
                summary = f"{len(self.new_pairs)} pairs"
        seconds = time.monotonic() - self.load_start
        success = f"{summary} of {self.name} in {seconds:.2f} s"
        self.report = "\n".join(warnings + [success])
        self.summary = summary
        self.since = email.utils.formatdate(usegmt=True)
        self.pairs = self.new_pairs
        self.new_pairs = {}

    def reload(self) -> Iterator[None]:
        """Load the file again, then free what is no longer needed.

        Errors are logged, and the old pairs stay.
        """
        old_pairs = self.pairs
        failure = None
        try:
            path = self.options.file
            if path == "-" or not stat.S_ISREG(os.stat(path).st_mode):
                raise ValueError(f"{self.name}: not a file that can be read again")
            yield from self.load()
        except Exception as error:
            failure = error.with_traceback(None)  # frames in it refer to the new pairs
            unneeded = self.new_pairs
            self.new_pairs = {}
        else:
            success = f"{self.report}, reloaded"
            if self.options.check:  # then the old pairs were counted, too
                success += f" ({len(old_pairs)} before)"
            self.log(success)
            unneeded = old_pairs
        # Freeing a dict with millions of pairs at once would hold up all clients. No
        # thread uses it: only a lookup in a Sorted is ever handed over to one.
        while isinstance(unneeded, dict) and unneeded:
            for _ in range(min(len(unneeded), STEP_PAIRS)):
                unneeded.popitem()
            yield
        if failure:  # if memory ran out, there is now enough to log this
            self.log(f"{load_failure(failure, self.name)}\nthe data stays as it was")

    def progress(self) -> str:
        """Return the progress of a load as text. Called between the steps of `load`."""
        percent = "?"
        if self.new_file.seekable():
            size = os.fstat(self.new_file.fileno()).st_size
            percent = str(self.new_file.tell() * 100 // max(size, 1))
        count = len(self.new_pairs)
        rate = count / (time.monotonic() - self.load_start)
        return f"{percent}% read, {count} pairs, {rate:.0f} pairs/s"


def load_failure(error: Exception, name: str) -> str:
    """Return why the data file called `name` was not loaded, in one or more lines."""
    if isinstance(error, MemoryError):
        return f"{name}: does not fit in memory; try --sorted, which needs less"
    if isinstance(error, OSError):
        return f"{name}: {error.strerror or error}"
    return str(error)


# ---------------------------------------------------------------------------
# Requests
#
# The head of a request is judged strictly, by the grammar of RFC 9112, and in one place.
# As a client sends the same fields with each of its requests, the verdict on them is
# cached.
#
# A verdict is a tuple (status, text, must_close): the status of the answer; a line that
# says what is wrong, or b"" if nothing is; and whether to close the connection after the
# answer.

Verdict = Tuple[int, bytes, bool]

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"                       # RFC 9110 section 5.6.2
TOKEN_RE = re.compile(TOKEN)
VERSION_RE = re.compile(rb"HTTP/[0-9]\.[0-9]")                # RFC 9112 section 2.3
VERSION_1_RE = re.compile(rb"HTTP/1\.[0-9]")
FIELD_RE = re.compile(                                        # RFC 9112 section 5
    rb"(" + TOKEN + rb"):([\t -~\x80-\xff]*)")
CODING_RE = re.compile(                                       # RFC 9112 section 7
    TOKEN + rb"(?:[\t ]*;[\t ]*" + TOKEN + rb"[\t ]*=[\t ]*(?:" + TOKEN
    + rb'|"[^"\\]*"))*')
# RFC 3986 appendix A, but with [ and ] anywhere, as browsers do not escape these
TARGET_RE = re.compile(
    rb"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?\[\]-]|%[0-9A-Fa-f]{2})+")
# RFC 3986 section 3.2.2: an IPv6 address, of which only the characters are checked, or a
# name; optionally, a port. A name must not have a comma, as in a list of two hosts.
HOST = (
    rb"(?:\[[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:.]*\]"
    rb"|(?:[A-Za-z0-9._~!$&'()*+;=-]|%[0-9A-Fa-f]{2})+)"
    rb"(?::[0-9]{0,5})?")
HOST_RE = re.compile(HOST)
ABSOLUTE_TARGET_RE = re.compile(rb"(?i:http)://" + HOST + rb"(?:/([^?]*))?(?:\?.*)?")
# A CR at the very end does not match, as its LF may still come.
BARE_LINE_END_RE = re.compile(rb"\r[^\n]|(?<!\r)\n")
# What a request line may look like before it is complete, such as b"", b"GET /x HT" and
# b"GET /x HTTP/1.1\r"
LINE_BEGINNING_RE = re.compile(rb"(?:" + TOKEN + rb"(?: [!-~]*){0,2})?\r?")
OTHER_METHODS = (b"POST", b"PUT", b"DELETE", b"CONNECT", b"TRACE", b"PATCH")


def refusal(status: int, text: str) -> Verdict:
    """Return a verdict that refuses a request and closes the connection."""
    return status, f"{text}\n".encode(), True


BARE_LINE_END = refusal(400, "bare CR or LF (RFC 9112 section 2.2)")
MALFORMED_LINE = refusal(
    400, "malformed request line: not METHOD TARGET HTTP/1.1 CRLF (RFC 9112 section 3)")
WRONG_FORM = refusal(
    400, "the request target must be /KEY or http://HOST/KEY (RFC 9112 section 3.2)")
OTHER_VERSION = refusal(
    505, "unsupported HTTP version: use 1.1 (RFC 9112 section 2.3)")


def judge(head: bytes) -> Tuple[bytes, Verdict]:
    """Judge a complete head, given without the empty line at its end.

    Returns the path in it, without its first slash, and the verdict. If the status of the
    verdict is 200, all but the path is valid. Nearly all paths are keys in the data, so
    the caller first looks the path up, and calls `judge_path` only if it is not a key.
    """
    judge_rest = judge_fields_cached
    if len(head) > VERDICT_BYTES:  # shorter ones are within all limits
        judge_rest = judge_fields  # a cache of long heads would use much memory
        too_long = judge_length(head + b"\r\n\r\n")
        if too_long:
            return b"", too_long
    line, _, fields = head.partition(b"\r\n")
    words = line.split(b" ")
    if len(words) != 3:
        return b"", MALFORMED_LINE
    method, target, version = words
    # If this is 200, the method and the version are valid.
    verdict = judge_rest(method, version, fields)
    if verdict[0] == 200 and target.startswith(b"/"):  # nearly always
        return target[1:], verdict
    # In other cases, the line is judged in full, and its refusal takes precedence.
    path, line_refused = judge_line(line)
    return path, line_refused or verdict


def judge_length(head: bytes) -> Optional[Verdict]:
    """Return a refusal if a head, or the beginning of one, is too long; else None."""
    line = head.partition(b"\r\n")[0].rstrip(b"\r")  # the LF may not be there yet
    if len(line) > LINE_BYTES:
        # What comes after LINE_BYTES is not judged, so that the status does not depend on
        # how much of it has arrived.
        if not LINE_BEGINNING_RE.fullmatch(line[:LINE_BYTES]):
            return MALFORMED_LINE
        # RFC 9112 section 3: 501 if the method is too long, 414 if the target is.
        method = line.partition(b" ")[0]
        if len(method) > METHOD_BYTES:
            return refusal(501, "unknown method (RFC 9110 section 9.1)")
        return refusal(414, f"request line longer than {LINE_BYTES} bytes")
    if len(head) > HEAD_BYTES:
        return refusal(431, f"request head longer than {HEAD_BYTES} bytes")
    return None


def judge_line(line: bytes) -> Tuple[bytes, Optional[Verdict]]:
    """Judge a complete request line.

    Returns the path in it, without its first slash, and a refusal or None.
    """
    words = line.split(b" ")
    if len(words) != 3:
        return b"", MALFORMED_LINE
    method, target, version = words
    if not TOKEN_RE.fullmatch(method):
        return b"", MALFORMED_LINE
    if not TARGET_RE.fullmatch(target):
        return b"", MALFORMED_LINE
    if not VERSION_RE.fullmatch(version):
        return b"", MALFORMED_LINE
    if not version.startswith(b"HTTP/1."):
        return b"", OTHER_VERSION
    # The forms of a target in HTTP/1.1 (RFC 9112 section 3.2). A query is ignored.
    if target.startswith(b"/"):
        return target[1:], None
    absolute = ABSOLUTE_TARGET_RE.fullmatch(target)
    if absolute:
        return absolute[1] or b"", None
    if method == b"CONNECT" or (method, target) == (b"OPTIONS", b"*"):
        return b"", None  # these two have no path
    return b"", WRONG_FORM


def judge_fields(method: bytes, version: bytes, fields: bytes) -> Verdict:
    """Judge all of a head except its target.

    If the method or the version is invalid, the verdict is not 200. Then `judge` calls
    `judge_line`, whose refusal takes precedence.
    """
    if not VERSION_1_RE.fullmatch(version):
        return OTHER_VERSION
    lines = []
    if fields:
        lines = fields.split(b"\r\n")
    values = collections.defaultdict(list)  # the values of each field name
    for line in lines:
        if b"\r" in line or b"\n" in line:
            return BARE_LINE_END
        field = FIELD_RE.fullmatch(line)
        if not field:
            return refusal(400, "malformed header field (RFC 9112 section 5)")
        values[field[1].lower()].append(field[2].strip(b"\t "))

    hosts = values[b"host"]
    if not hosts and version != b"HTTP/1.0":
        return refusal(400, "missing Host header (RFC 9112 section 3.2)")
    if len(hosts) > 1:
        return refusal(400, "more than one Host header (RFC 9112 section 3.2)")
    if hosts and not HOST_RE.fullmatch(hosts[0]):
        return refusal(400, "malformed Host header (RFC 9112 section 3.2)")

    # A body is never read: the connection is closed after the answer.
    lengths = values[b"content-length"]
    codings = values[b"transfer-encoding"]
    has_body = bool(codings) or lengths not in ([], [b"0"])
    if lengths and codings:
        return refusal(
            400, "both Content-Length and Transfer-Encoding (RFC 9112 section 6.2)")
    if len(lengths) > 1 or (lengths and not lengths[0].isdigit()):
        return refusal(400, "malformed Content-Length (RFC 9112 section 6.2)")
    if codings:
        names = list_elements(codings)
        is_chunked = names[-1:] == [b"chunked"] and names.count(b"chunked") == 1
        if not is_chunked or not all(map(CODING_RE.fullmatch, names)):
            return refusal(400, "malformed Transfer-Encoding (RFC 9112 section 6.1)")
    if has_body and method in (b"GET", b"HEAD"):
        return refusal(400, "a GET or HEAD request with a body (RFC 9110 section 9.3)")

    expectations = list_elements(values[b"expect"])
    if values[b"expect"] and set(expectations) != {b"100-continue"}:
        return refusal(417, "unsupported Expect header (RFC 9110 section 10.1.1)")

    options = list_elements(values[b"connection"])  # RFC 9112 section 9.3
    must_close = has_body or version == b"HTTP/1.0" or b"close" in options
    if method == b"OPTIONS":
        return 204, b"", must_close
    if method in OTHER_METHODS:
        return 405, b"method not allowed: use GET or HEAD\n", must_close
    if method not in (b"GET", b"HEAD"):
        return 501, b"unknown method (RFC 9110 section 9.1)\n", must_close
    return 200, b"", must_close


judge_fields_cached = functools.lru_cache(maxsize=VERDICTS)(judge_fields)


def list_elements(values: List[bytes]) -> List[bytes]:
    """Return the elements of comma-separated lists in lower case (RFC 9110 5.6.1)."""
    elements = b",".join(values).lower().split(b",")
    stripped = [element.strip(b"\t ") for element in elements]
    return [element for element in stripped if element]


def judge_path(path: bytes) -> Tuple[List[bytes], Optional[Verdict]]:
    """Judge a path that is not itself a key in the data.

    Returns the keys in it (none for the status page), and a refusal or None.
    """
    if path and not TARGET_RE.fullmatch(path):
        return [], MALFORMED_LINE
    text = path.partition(b"?")[0].lower()
    text = text.replace(b"%2d", b"-")  # some clients escape hyphens, RFC 3986 6.2.2.2
    if not text:
        return [], None
    keys = text.split(b",")
    if not all(map(KEY_RE.fullmatch, keys)):
        return [], (400, b"not a version 4 UUID\n", False)
    return keys, None


def judge_beginning(beginning: bytes, seen_bytes: int = 0) -> Optional[Verdict]:
    """Return a refusal if the beginning of a head is already invalid, or None.

    Judges the length, the request line and line ends, so that bad requests are refused
    before they are complete. Fields are judged when the head is complete. The line ends
    in the first `seen_bytes` are known to be valid.
    """
    too_long = judge_length(beginning)
    if too_long:
        return too_long
    line, line_end, _ = beginning.partition(b"\r\n")
    if line_end:
        _, line_refused = judge_line(line)
        if line_refused:
            return line_refused
    elif not LINE_BEGINNING_RE.fullmatch(line):
        return MALFORMED_LINE
    # Search from the last byte that was seen, which may be a CR. If it is an LF, the
    # lookbehind finds the CR before it, although the search begins after that.
    if BARE_LINE_END_RE.search(beginning, max(0, seen_bytes - 1)):
        return BARE_LINE_END
    return None


# ---------------------------------------------------------------------------
# Answers

KEY_NOT_FOUND = b"key not found\n"
INTERNAL_ERROR = b"internal error; see the server's log\n"


@functools.lru_cache(maxsize=100)
def answer_head(status: int, close: bool, date: str) -> bytes:
    """Return the head of an answer, with %d in place of the length if it has a body.

    The result is cached, as it changes only once a second.
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
    if status != 204:  # a 204 has no body, RFC 9110 section 8.6
        lines.append("Content-Type: text/plain; charset=utf-8")
        lines.append("Content-Length: %d")
    return "\r\n".join(lines + ["", ""]).encode()


def pair_lines(keys: List[bytes], get: Callable) -> Body:
    """Return lines with the keys that `get` finds, and their values.

    Raises what `get` raises.
    """
    parts = []
    for key in dict.fromkeys(keys):  # each key only once
        value = get(key)
        if value is not None:
            parts += [key + b" ", value, b"\n"]
    if sum(map(len, parts)) > JOINED_BYTES:
        return parts
    return b"".join(parts)  # none is a StoredValue, as these are longer


# ---------------------------------------------------------------------------
# Threads

class Connection:
    """What the server knows about one client."""

    __slots__ = (
        "socket", "address", "queue", "waiting_since", "received", "has_skipped_line",
        "seen_bytes", "needs_disk", "unsent", "must_close", "must_linger")

    def __init__(self, client_socket: socket.socket, address: str) -> None:
        self.socket = client_socket
        self.address = address
        # Which of the server's queues the connection is in; at first, it is in none.
        self.queue: dict = {}
        # The time.monotonic() at which the server began to wait for the client: for a
        # request, for the rest of one, or for the client to take more of an answer. While
        # the server itself is at work, it is math.inf, which prevents an eviction.
        self.waiting_since = math.inf
        # Received data that is not answered yet, such as the beginning of a head.
        self.received = b""
        # Whether an empty line before that head was skipped.
        self.has_skipped_line = False
        # How many bytes of that beginning refuse_beginning has seen. Line ends in these
        # are valid.
        self.seen_bytes = 0
        # Whether the lookup for the next request has to wait for the disk.
        self.needs_disk = False
        # What the client has not taken yet: bytes, memoryview, StoredValue.
        self.unsent: list = []
        # Whether to close the connection once everything has been sent.
        self.must_close = False
        # Whether to linger before closing it.
        self.must_linger = False


class Handler(socketserver.BaseRequestHandler):
    """Waits for one client, or for the disk: plain blocking code, in a thread.

    What socketserver calls a request is a Connection here. A new thread runs
    ThreadingMixIn.process_request_thread, which calls

        Handler()                  whose __init__ calls `handle`
        Server.handle_error        if there was an exception
        Server.shutdown_request    always: gives the connection back to the loop
    """

    def handle(self) -> None:
        """Do what may block, and leave everything else to the loop."""
        connection = self.request
        self.send_unsent()  # answers to earlier requests
        if connection.needs_disk:
            connection.needs_disk = False
            connection.waiting_since = math.inf
            self.server.answer_next(connection, wait=True)
            self.send_unsent()

    def send_unsent(self) -> None:
        """Send what is unsent. Raises OSError if the client does not take it in time."""
        parts = self.request.unsent
        size = sum(len(part) for part in parts)
        deadline = time.monotonic() + ANSWER_SECONDS + size / ANSWER_BYTES_PER_SECOND
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
            sent = connection.socket.send(rest)
            rest = rest[sent:]
        connection.waiting_since = math.inf


# ---------------------------------------------------------------------------
# The loop

OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
CAN_GATHER = hasattr(socket.socket, "sendmsg")  # Windows lacks it


class Server(http.server.ThreadingHTTPServer):
    """The loop: does everything that cannot block.

    What may block is handed over to a thread: an answer that is large or that the client
    does not take immediately, and a lookup in pages that are not in memory. Making the
    socket and running a Handler in a thread are inherited from ThreadingHTTPServer;
    serve_forever is overridden.

    Each connection is in one of four queues (or in none, after it was evicted while a
    thread owned it). They say what it is waiting for:

        idle           the client's next request
        beginnings     the rest of a request
        lingering      the client to close a connection that the server has shut down
        handed_over    a thread, which puts it into `returned` and wakes the loop when it
                       is done

    In the first three, the first connection has waited longest, so it is the next one to
    expire or to be evicted. Only the loop touches the selector and the queues, and closes
    connections. Threads call answer_next, handle_error and shutdown_request, each for its
    own connection.
    """

    request_queue_size = ACCEPT_QUEUE
    allow_reuse_address = False          # server_bind decides whether to set SO_REUSEADDR
    allow_reuse_port = False             # __init__ sets SO_REUSEPORT itself

    def __init__(self, options: argparse.Namespace, data: Data, log: Log,
                 signals: "Signals", listener: Optional[socket.socket] = None) -> None:
        """Bind to the port, but do not listen yet. Raises OSError and UnicodeError.

        `listener` is a listening socket to use instead of a new one.
        """
        self.data = data
        self.log = log
        self.signals = signals
        self.idle = collections.OrderedDict()    # used as an ordered set of Connections
        self.beginnings = collections.OrderedDict()
        self.lingering = collections.OrderedDict()
        self.handed_over = collections.OrderedDict()
        self.returned: Deque[Connection] = collections.deque()
        self.max_connections = options.max_connections
        self.selector = selectors.DefaultSelector()
        # Threads wake the loop by sending a byte from one of these sockets to the other.
        self.wake_receiver, self.wake_sender = socket.socketpair()
        self.is_accepting = False            # whether the listening socket is registered
        self.now = time.monotonic()          # at the beginning of this round of the loop
        self.next_tick = self.now
        self.date = ""                       # as in a Date field
        self.found_head = b""                # what answer_head returns for most requests
        self.answer_count = 0
        self.was_busy = False                # whether the last round had events
        # On a single processor, polling would take time from the clients.
        self.can_poll = processor_count() > 1
        self.reload: Optional[Iterator[None]] = None   # the one in progress, if any
        self.next_step = self.now            # earliest time for its next step
        self.is_stopping = False
        self.stop_deadline = math.inf        # a time.monotonic()

        if listener:
            self.address_family = listener.family
            address = listener.getsockname()
        else:
            found = socket.getaddrinfo(
                options.host.strip("[]"), options.port, type=socket.SOCK_STREAM)
            # For a name that has several addresses, such as localhost, prefer IPv4.
            found.sort(key=lambda info: info[0] != socket.AF_INET)
            self.address_family, _, _, _, address = found[0]
        super().__init__(address, Handler, bind_and_activate=False)
        if listener:  # it replaces the one that TCPServer made
            self.socket.close()
            self.socket = listener
        if isinstance(address, tuple):  # the address of a Unix socket is a path
            self.set_tcp_options()
        if not listener:
            if options.reuse_port:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self.server_bind()

    def set_tcp_options(self) -> None:
        """Set options of the listening socket, which connections inherit."""
        # Without Nagle's algorithm, an answer does not wait until the client has
        # acknowledged the one before it.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # When a client is slow, more can be sent only once the system's queue of unsent
        # data is shorter than this. By default, the queue can be some megabytes long, and
        # a `send` to a client that takes 100 kB/s could seem to stall for many seconds.
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            self.socket.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)

    def server_bind(self) -> None:
        """Bind like TCPServer: HTTPServer would look up a name, which can be slow.

        SO_REUSEADDR decides which other sockets on the port are tolerated:

            without it    none
            with it       those that have it, too, and do not listen: connections that an
                          earlier server has left (in TIME_WAIT)

        So it is used only if binding without it fails. Then it is cleared until the
        server listens, so that no other server can bind while this one loads its data.
        """
        if self.server_address[0] == "::":  # for IPv4 as well
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            socketserver.TCPServer.server_bind(self)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or os.name != "posix":
                raise
            self.allow_reuse_address = True
            socketserver.TCPServer.server_bind(self)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)

    def server_activate(self) -> None:
        """Listen. Raises OSError."""
        if os.name == "posix":
            # The next server can tolerate the connections of this one only if they have
            # the option, too. They inherit it.
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        super().server_activate()

    # The loop

    def serve_forever(self) -> None:
        """Answer requests until a signal asks for a stop and no connection is left."""
        for own_socket in (self.socket, self.wake_receiver, self.wake_sender):
            own_socket.setblocking(False)
        self.selector.register(self.wake_receiver, selectors.EVENT_READ)
        self.now = time.monotonic()
        self.service_actions()
        while not self.is_stopped():
            try:
                self.run_round()
            except Exception as error:  # MemoryError, for instance, can occur anywhere
                self.recover(error)

    def recover(self, error: Exception) -> None:
        """Log an exception that was not handled. If memory has run out, free some."""
        time.sleep(TICK_SECONDS)  # in case the fault occurs in every round
        try:
            if isinstance(error, MemoryError):
                self.evict(self.longest_waiting())
            self.log(f"fault in the loop: {error!r}")
        except MemoryError:
            pass  # the next round may succeed

    def is_stopped(self) -> bool:
        """Return whether, after a stop, no connection is left or the time is up."""
        if not self.is_stopping:
            return False
        return self.connection_count() == 0 or self.now >= self.stop_deadline

    def run_round(self) -> None:
        """Wait for events, handle them, and do any other work that is due."""
        events = self.wait()
        self.now = time.monotonic()
        has_newcomer = False
        for key, _ in events:
            connection = key.data
            if connection:
                self.receive(connection)
            elif key.fileobj is self.socket:
                has_newcomer = True
            else:
                self.wake_receiver.recv(RECEIVE_BYTES)
        while self.returned:
            self.take_back(self.returned.popleft())
        if has_newcomer:
            # This comes last, as it may evict a client that has an event in this round.
            # Newcomers get a share of each round, so that neither new nor other clients
            # wait long.
            for _ in range(1 + len(events) // EVENTS_PER_NEWCOMER):
                if not self.accept():
                    break
        self.was_busy = bool(events)
        if self.now >= self.next_tick:
            self.service_actions()
        if self.reload:
            self.step_reload()

    def wait(self) -> list:
        """Return events of the selector; wait up to TICK_SECONDS if there are none."""
        events = self.selector.select(0)
        if events or self.reload:  # there is something to do
            return events
        if self.was_busy and self.can_poll:
            # Many clients send their next request immediately, and waking a process that
            # sleeps takes longer than answering a request.
            polling_end = time.perf_counter() + PATIENCE_SECONDS
            while not events and time.perf_counter() < polling_end:
                events = self.selector.select(0)
        return events or self.selector.select(TICK_SECONDS)

    def service_actions(self) -> None:
        """Do what is due every TICK_SECONDS, and at the start."""
        self.next_tick = self.now + TICK_SECONDS
        self.date = email.utils.formatdate(usegmt=True)
        self.found_head = answer_head(200, False, self.date)
        self.act_on_signals()
        if not self.is_accepting and not self.is_stopping:
            self.selector.register(self.socket, selectors.EVENT_READ)
            self.is_accepting = True
        idle_seconds = IDLE_SECONDS
        linger_seconds = LINGER_SECONDS
        if self.is_stopping:
            idle_seconds = DRAIN_IDLE_SECONDS
            linger_seconds = DRAIN_IDLE_SECONDS
        for connection in self.overdue(self.idle, idle_seconds):
            if not has_sent_more(connection):  # a request may just have arrived
                self.close(connection)
        for connection in self.overdue(self.lingering, linger_seconds):
            self.close(connection)
        for connection in self.overdue(self.beginnings, HEAD_SECONDS):
            verdict = refusal(408, f"no complete request within {HEAD_SECONDS} s")
            self.refuse(connection, verdict)
            self.go_on(connection)

    def overdue(
            self, queue: collections.OrderedDict, seconds: float) -> List[Connection]:
        """Return the connections in a queue that have waited longer than `seconds`."""
        limit = self.now - seconds
        return list(itertools.takewhile(lambda c: c.waiting_since < limit, queue))

    def step_reload(self) -> None:
        """Take a step of a reload.

        Under load, each step is followed by an equally long time for requests only.
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

    def accept(self) -> bool:
        """Accept a connection, and return whether another one may be waiting.

        If there is no room for it, it replaces the one that has waited longest. (If a
        thread owns that one, its descriptor is closed a little later.)
        """
        longest_waiting = None
        if self.connection_count() >= self.max_connections:
            longest_waiting = self.longest_waiting()
            if not longest_waiting:  # all are busy
                self.pause_accepting()
                return False
        try:
            client_socket, address = self.get_request()
        except BlockingIOError:  # none is waiting: another process may have accepted it
            return False
        except OSError as error:
            if error.errno == errno.ECONNABORTED:  # this client has disconnected
                return True
            if error.errno in OUT_OF_RESOURCES and self.evict(self.longest_waiting()):
                return True  # the next try may succeed
            self.pause_accepting()
            return False
        except MemoryError:
            self.pause_accepting()
            return False
        self.evict(longest_waiting)  # not earlier, as there may be no newcomer
        name = "unix:"  # a client of a Unix socket has no address
        if isinstance(address, tuple):
            name = address[0]
        connection = Connection(client_socket, name)
        if self.register(connection):
            # Often, the request is already there. It is taken now, before more newcomers
            # are accepted, which might evict this one.
            self.receive(connection)
        return True

    def register(self, connection: Connection) -> bool:
        """Register a connection with the selector, and wait for requests from now on.

        If that is impossible, closes the connection and returns False.
        """
        try:
            connection.socket.setblocking(False)
            self.selector.register(connection.socket, selectors.EVENT_READ, connection)
        except (OSError, ValueError, MemoryError) as error:
            self.close(connection)
            self.log(f"cannot wait for {connection.address}: {error!r}")
            return False
        self.wait_for(self.idle, connection)
        return True

    def pause_accepting(self) -> None:
        """Leave new connections in the system's queue until the next tick."""
        if self.is_accepting:
            self.selector.unregister(self.socket)
            self.is_accepting = False

    def connection_count(self) -> int:
        """Return the number of connections."""
        return (len(self.idle) + len(self.beginnings) + len(self.lingering)
                + len(self.handed_over))

    def longest_waiting(self) -> Optional[Connection]:
        """Return the connection that has waited longest for its client, if any waits."""
        candidates = list(self.handed_over)
        for queue in (self.idle, self.beginnings, self.lingering):
            candidates += itertools.islice(queue, 1)
        longest = min(candidates, key=lambda c: c.waiting_since, default=None)
        if longest and longest.waiting_since == math.inf:
            return None
        return longest

    def evict(self, connection: Optional[Connection]) -> bool:
        """Close a connection, if there is one, to make room for another.

        Returns whether its descriptor is free now. It is not while a thread owns it.
        """
        if not connection:
            return False
        if connection.queue is not self.handed_over:
            self.close(connection)
            return True
        try:
            connection.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the client has disconnected
        # Now its thread cannot send any more, and returns the connection, which is closed
        # then. (If all had been sent, it is closed when the loop tries to receive.)
        del self.handed_over[connection]
        connection.queue = {}
        return False

    def wait_for(self, queue: collections.OrderedDict, connection: Connection) -> None:
        """Put a connection last in a queue, waiting for its client from now on."""
        connection.waiting_since = self.now
        if connection.queue is not queue:
            queue[connection] = None
            connection.queue.pop(connection, None)
            connection.queue = queue
        queue.move_to_end(connection)

    def linger(self, connection: Connection) -> None:
        """Shut down the sending side, and wait until the client closes the connection.

        If the connection were closed at once, the system would answer what the client
        still sends with a reset, and a reset can make the client lose the answer.
        """
        try:
            connection.socket.shutdown(socket.SHUT_WR)
        except OSError:  # the client has disconnected
            self.close(connection)
            return
        self.wait_for(self.lingering, connection)

    def close(self, connection: Connection) -> None:
        """Close a connection that does not belong to a thread."""
        self.unregister(connection)
        connection.socket.close()
        connection.queue.pop(connection, None)

    def unregister(self, connection: Connection) -> None:
        """Remove a connection from the selector, if it is there."""
        try:
            self.selector.unregister(connection.socket)
        except (KeyError, ValueError):
            pass

    # Requests

    def receive(self, connection: Connection) -> None:
        """Take what a client has sent, and go on with its connection."""
        try:
            data = connection.socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:  # the client has reset the connection
            data = b""
        if not data:
            self.close(connection)
        elif connection.queue is not self.lingering:  # otherwise, `data` is discarded
            self.go_on(connection, data)

    def go_on(self, connection: Connection, data: bytes = b"") -> None:
        """Answer requests, and decide what to do next with a connection.

        `data` is what has just been received. If anything fails, logs it and closes the
        connection.
        """
        size = 0  # of the answers
        try:
            connection.received += data
            while connection.received and size < TURN_BYTES and not connection.must_close:
                answer_size = self.answer_next(connection)
                if answer_size == 0:  # it is incomplete, or needs the disk
                    break
                size += answer_size
            needs_thread = connection.needs_disk or size >= TURN_BYTES
            if connection.unsent and not needs_thread:
                needs_thread = not self.send(connection)
            if needs_thread:
                self.hand_over(connection)
            elif connection.must_linger:
                self.linger(connection)
            elif connection.must_close:
                self.close(connection)
            elif not connection.received:
                self.wait_for(self.idle, connection)
            elif size == 0 and connection.queue is self.beginnings:
                pass  # the request is the same, and still incomplete: keep its deadline
            else:  # a request has begun
                self.wait_for(self.beginnings, connection)
        except Exception:
            self.close(connection)
            self.handle_error(connection, connection.address)

    def answer_next(self, connection: Connection, wait: bool = False) -> int:
        """Answer the next request if it is complete, or if it can already be refused.

        Returns the size of the answer, or 0 if there is none. If a lookup has to wait for
        the disk, and `wait` is false, the request remains in `received`, and `needs_disk`
        is set. Handlers call this, too.
        """
        # Skip one empty line before a head (RFC 9112 section 2.2).
        if connection.received.startswith(b"\r\n") and not connection.has_skipped_line:
            connection.received = connection.received[2:]
            connection.has_skipped_line = True
            connection.seen_bytes = 0
        head, head_end, rest = connection.received.partition(b"\r\n\r\n")
        if not head_end:
            return self.refuse_beginning(connection)
        try:
            status, body, must_close = self.answer(head, connection.address, wait)
        except BlockingIOError:
            connection.needs_disk = True
            return 0
        connection.received = rest
        connection.has_skipped_line = False
        connection.seen_bytes = 0
        if self.is_stopping and not has_sent_more(connection):  # it is the last request
            must_close = True
        connection.must_close = must_close
        return self.add_answer(connection, head, status, body)

    def answer(self, head: bytes, address: str, wait: bool) -> Tuple[int, Body, bool]:
        """Return status and body of an answer, and whether to close its connection.

        If there is a fault, logs it and returns an answer that says so. Raises
        BlockingIOError if a lookup has to wait for the disk, unless `wait` is true.
        """
        must_close = True  # if `judge` fails, it is not known whether a body follows
        try:
            path, verdict = judge(head)
            status, _, must_close = verdict
            if status != 200:
                return verdict
            pairs = self.data.pairs
            get = pairs.get
            if wait:  # only a lookup in a Sorted ever waits
                get = functools.partial(get, wait=True)
            value = get(path)
            if value is not None:
                return 200, value, must_close
            # The path itself is not a key in the data.
            keys, refused = judge_path(path)
            if refused:
                status, text, refusal_closes = refused
                return status, text, must_close or refusal_closes
            if not keys:
                return 200, self.status_page(), must_close
            if len(keys) > 1:
                if isinstance(pairs, Sorted) and not wait:
                    raise BlockingIOError("many lookups are left to a thread")
                return 200, pair_lines(keys, get), must_close
            if keys[0] != path:  # the path may have upper-case letters, for example
                value = get(keys[0])
            if value is None:
                return 404, KEY_NOT_FOUND, must_close
            return 200, value, must_close
        except BlockingIOError:
            raise
        except Exception as error:
            self.report_fault(error, address)
            return 500, INTERNAL_ERROR, must_close

    def status_page(self) -> bytes:
        """Return what GET / shows. Raises FileChanged if lookups would raise it."""
        data = self.data
        if isinstance(data.pairs, Sorted):
            data.pairs.check()
        return (
            f"{data.summary} of {os.path.basename(data.name)}, since {data.since}\n"
            f"{self.answer_count} requests answered, "
            f"{self.connection_count()} connections open\n"
            "get a value with GET /KEY, where KEY is a version 4 UUID\n").encode()

    def refuse_beginning(self, connection: Connection) -> int:
        """Refuse the beginning of a head if it cannot become valid.

        Returns the size of the answer, or 0 if there is none.
        """
        seen_bytes = connection.seen_bytes
        connection.seen_bytes = len(connection.received)
        if seen_bytes > 0:
            # Judging it again after each byte would take quadratic time. It is judged
            # again only if a line end has arrived, or it has just exceeded LINE_BYTES,
            # which matters only within the first line, or HEAD_BYTES.
            recent = connection.received[seen_bytes - 1:]  # its first byte may be a CR
            has_line_end = b"\r" in recent or b"\n" in recent
            exceeds_limit = any(
                seen_bytes <= limit < len(connection.received)
                for limit in (LINE_BYTES, HEAD_BYTES))
            if not has_line_end and not exceeds_limit:
                return 0
        verdict = judge_beginning(connection.received, seen_bytes)
        if not verdict:
            return 0
        return self.refuse(connection, verdict)

    def refuse(self, connection: Connection, verdict: Verdict) -> int:
        """Answer the beginning of a head with a refusal; return the answer's size."""
        status, text, connection.must_close = verdict
        return self.add_answer(connection, connection.received, status, text)

    def add_answer(
            self, connection: Connection, head: bytes, status: int, body: Body) -> int:
        """Put an answer together, and return its size in bytes.

        `head` is the head of its request, or the beginning of it.
        """
        self.answer_count += 1  # an increment may be lost if two threads do this at once
        if isinstance(body, list):
            size = sum(map(len, body))
        else:
            size = len(body)
        if status == 200 and not connection.must_close:
            answer = self.found_head % size
        else:
            answer = answer_head(status, connection.must_close, self.date)
            if status != 204:
                answer %= size
            connection.must_linger = self.must_linger(connection, status, size)
        if head.startswith(b"HEAD "):
            body = b""
            size = 0
        if self.log.is_verbose:
            self.log_request(connection.address, head, status, size)
        if size <= JOINED_BYTES:  # it is bytes, as lists and StoredValues are longer
            connection.unsent.append(answer + body)
        elif isinstance(body, list):
            connection.unsent += [answer, *body]
        else:
            connection.unsent += [answer, body]
        return len(answer) + size

    def must_linger(self, connection: Connection, status: int, size: int) -> bool:
        """Return whether to linger after an answer that has a body of `size` bytes.

        That is necessary if the client may still be sending. Otherwise, it only wastes
        time.
        """
        if not connection.must_close:
            return False
        if status not in (200, 404):  # the request may have a body, or be incomplete
            return True
        if connection.received:
            return True
        if self.is_stopping:  # it may not be the client who wants to close the connection
            return True
        # The client has asked to close the connection, so it should not send more. If it
        # does, a reset may overtake a long answer, but hardly a short one.
        return size > PIECE_BYTES

    def log_request(self, address: str, head: bytes, status: int, size: int) -> None:
        """Log a request in Common Log Format."""
        line = head.partition(b"\r\n")[0]
        # Even if each byte becomes four characters, they are at most half of what fits.
        line = line[:LOG_LINE_BYTES // 8]
        line = repr(line)[2:-1].replace('"', '\\"')  # without the b and its quotes
        now = time.strftime("%d/%b/%Y:%H:%M:%S %z")
        self.log.write(f'{address} - - [{now}] "{line}" {status} {size}')

    def send(self, connection: Connection) -> bool:
        """Send what is unsent. Return False if a thread has to send the rest.

        No part is a StoredValue: only threads get these, and they do not call this.
        """
        unsent = connection.unsent
        try:
            if len(unsent) == 1:  # a short answer, joined to its body
                sent = connection.socket.send(unsent[0])
            elif CAN_GATHER:
                sent = connection.socket.sendmsg(unsent[:JOINED_PARTS])
            else:
                return False
        except BlockingIOError:
            return False
        except OSError:  # the client has disconnected
            unsent.clear()
            connection.must_close = True
            return True
        while sent >= len(unsent[0]):  # this part was sent, or is empty
            sent -= len(unsent[0])
            del unsent[0]
            if not unsent:
                return True
        unsent[0] = memoryview(unsent[0])[sent:]
        return False

    # Threads

    def hand_over(self, connection: Connection) -> None:
        """Leave a connection to a Handler, in a thread of its own."""
        self.unregister(connection)
        self.wait_for(self.handed_over, connection)
        if connection.needs_disk:  # then it is not waiting for its client
            connection.waiting_since = math.inf
        self.process_request(connection, connection.address)

    def process_request(self, request: Connection, client_address: str) -> None:
        """Start a thread, or abandon the connection if the system cannot start one.

        This avoids threading.Thread.start, which ThreadingMixIn uses: it waits until the
        new thread runs, and waits forever if memory runs out before that.
        """
        try:
            _thread.start_new_thread(
                self.process_request_thread, (request, client_address))
        except (RuntimeError, MemoryError) as error:
            request.must_close = True
            self.shutdown_request(request)
            self.log(f"cannot start a thread for {client_address}: {error}")

    def handle_error(self, request: Connection, client_address: str) -> None:
        """Abandon a connection, and log the current exception if it is a fault."""
        request.must_close = True
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            return  # the client has disconnected or stalled, which is not a fault
        self.report_fault(error, client_address)

    def report_fault(self, error: Exception, client_address: str) -> None:
        """Log an exception in one line, but FileChanged only once per file."""
        if not isinstance(error, FileChanged):
            self.log(f"fault in answering {client_address}: {error!r}")
            return
        pairs = error.args[0]
        if not pairs.is_change_logged:
            pairs.is_change_logged = True
            self.log(f"{self.data.name}: changed in place; send SIGHUP to reload it")

    def shutdown_request(self, request: Connection) -> None:
        """Give a connection back to the loop: a thread's last step."""
        request.waiting_since = math.inf
        self.returned.append(request)
        try:
            self.wake_sender.send(b"\0")
        except BlockingIOError:
            pass  # so many wake-ups are under way that one more is not needed

    def take_back(self, connection: Connection) -> None:
        """Take back a connection from its thread, and go on with it."""
        # A failure leaves something unsent, or a request that still needs the disk. (In
        # other cases, must_close is set.)
        if connection.unsent or connection.needs_disk:
            self.close(connection)
        elif self.register(connection):
            self.go_on(connection)

    # Signals

    def act_on_signals(self) -> None:
        """Start a reload or a stop that a signal asks for."""
        self.signals.look_at_terminal(self.now)
        if self.signals.wants_reload and not self.reload:
            self.signals.wants_reload = False
            self.reload = self.data.reload()
        if self.signals.wants_stop and not self.is_stopping:
            self.begin_stop()

    def begin_stop(self) -> None:
        """Stop listening; close each connection when its requests have been answered."""
        self.is_stopping = True
        self.stop_deadline = self.now + DRAIN_SECONDS
        # Clients in the queue are served, too. Linux queues one more than requested.
        for _ in range(ACCEPT_QUEUE + 1):
            if not self.accept():
                break
        self.pause_accepting()
        self.socket.close()


class Signals:
    """The signals received so far, for the loop to act on.

    A SIGHUP asks for a reload. But if it comes because the terminal of the server was
    closed, it asks for a stop, just as it ends other programs. That is assumed if

        the server was started from a terminal, and without nohup
        the terminal was open less than HANGUP_SECONDS ago
        the terminal is not open now

    `hangup_may_stop` covers the first two conditions.
    """

    def __init__(self) -> None:
        self.wants_stop = False          # after SIGTERM or Ctrl-C
        self.wants_reload = False        # after a SIGHUP
        self.hangup_may_stop = False     # whether a SIGHUP may ask for a stop
        self.terminal_seen = 0.0         # time.monotonic() when it was last seen open

    def catch_hangups(self) -> None:
        """Catch SIGHUP from now on."""
        if hasattr(signal, "SIGHUP"):  # Windows lacks it
            is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            self.hangup_may_stop = has_terminal() and not is_nohup
            self.terminal_seen = time.monotonic()
            signal.signal(signal.SIGHUP, self.on_hangup)

    def look_at_terminal(self, now: float) -> None:
        """Note whether the terminal is open.

        When it has been closed for HANGUP_SECONDS, any later SIGHUP asks for a reload.
        """
        if not self.hangup_may_stop:
            return
        if has_terminal():
            self.terminal_seen = now
        elif now > self.terminal_seen + HANGUP_SECONDS:
            self.hangup_may_stop = False

    def on_hangup(self, *_) -> None:
        """Handle SIGHUP."""
        if self.hangup_may_stop and not has_terminal():
            # During the first load, SIGTERM has another handler, and `wants_stop` is not
            # checked.
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.wants_reload = True

    def on_stop(self, number: int, _) -> None:
        """Handle SIGTERM and SIGINT."""
        self.wants_stop = True
        if number == signal.SIGINT:  # the next Ctrl-C ends the server at once
            signal.signal(signal.SIGINT, signal.default_int_handler)


def has_sent_more(connection: Connection) -> bool:
    """Return whether another request was received, or data is waiting to be received.

    An incomplete request in `received` does not count.
    """
    if b"\r\n\r\n" in connection.received:
        return True
    connection.socket.setblocking(False)  # a Handler sets a timeout before it sends
    try:
        return bool(connection.socket.recv(1, socket.MSG_PEEK))
    except OSError:
        return False


def has_terminal() -> bool:
    """Return whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError as error:
        return error.errno in OUT_OF_RESOURCES  # then assume that there is one
    return True


def processor_count() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---------------------------------------------------------------------------
# serve

class CannotServe(Exception):
    """The server cannot be started; the message says why, in one or more lines."""


def serve(options: argparse.Namespace) -> int:
    """Serve the pairs in a file until SIGTERM or Ctrl-C. Returns the exit code.

    Until the data is loaded, both signals raise KeyboardInterrupt. After that, they are
    handled by Signals.on_stop.
    """
    log = Log(options.verbose)
    signal.signal(signal.SIGTERM, end_load)
    try:
        server = start_server(options, log)
    except KeyboardInterrupt:
        log("stopped")
        return 0
    except CannotServe as error:
        complain(str(error))
        return 1
    server.serve_forever()
    block_sigterm()
    log("stopped")
    return 0


def end_load(*_) -> None:
    """Handle SIGTERM as Python handles Ctrl-C."""
    block_sigterm()
    raise KeyboardInterrupt


def block_sigterm() -> None:
    """Block SIGTERM, as another one could change the exit code while Python exits."""
    if hasattr(signal, "pthread_sigmask"):  # Windows lacks it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def start_server(options: argparse.Namespace, log: Log) -> Server:
    """Return a server that has its data and listens. Raises CannotServe."""
    options.max_connections = allowed_connections(options.max_connections, log)
    data = Data(options, log)
    signals = Signals()
    listener = handed_down_socket()
    place = host_and_port(options.host, options.port)
    if listener:
        place = "the socket from systemd"
    try:
        # Take the port before loading the data, so that a port in use fails at once.
        server = Server(options, data, log, signals, listener)
        signals.catch_hangups()  # until now, SIGHUP would have ended the program
        load_with_progress(data, log)  # this turns an OSError into a CannotServe
        signal.signal(signal.SIGTERM, signals.on_stop)
        # Shells start background jobs of scripts with SIGINT ignored. Keep it ignored.
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, signals.on_stop)
        server.server_activate()
    except (OSError, UnicodeError) as error:
        raise CannotServe(f"cannot listen on {escape(place)}: {listen_failure(error)}")
    address = server.socket.getsockname()
    if isinstance(address, tuple):
        place = f"http://{host_and_port(*address[:2])}"
    else:  # a Unix socket has a path, or an abstract address, which is bytes
        place = f"unix:{os.fsdecode(address)}"
    log(f"{data.report}, on {escape(place)}")
    return server


def handed_down_socket() -> Optional[socket.socket]:
    """Return the listening socket that systemd hands down, or None: sd_listen_fds(3).

    Raises CannotServe if it is not a single listening stream socket.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = os.environ.get("LISTEN_FDS", "")
    if count != "1":
        raise CannotServe(f"LISTEN_FDS is {escape(count)!r}, but must be 1: one socket")
    try:
        listener = socket.socket(fileno=3)
        is_listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise CannotServe(f"descriptor 3 from systemd: {error.strerror}")
    if not is_listening:
        raise CannotServe("descriptor 3 from systemd: not a listening stream socket")
    return listener


def allowed_connections(wanted: Optional[int], log: Log) -> int:
    """Raise the limit of open files, and return how many connections to hold.

    Returns `wanted`. If it is None, returns as many as the limit allows, up to
    MAX_CONNECTIONS.
    """
    needed = (wanted or MAX_CONNECTIONS) + SPARE_DESCRIPTORS
    limit = allowed_files(needed, log)
    if wanted is None:
        return max(1, limit - SPARE_DESCRIPTORS)
    if limit < needed:
        log(f"--max-connections {wanted} needs {needed} open files, but the limit is "
            f"{limit}; raise it with ulimit -n, or LimitNOFILE under systemd")
    return wanted


def allowed_files(needed: int, log: Log) -> int:
    """Raise the limit of open files to `needed` if possible; return how many it allows.

    The result is at most `needed`.
    """
    try:
        import resource
    except ImportError:  # on Windows
        return min(needed, WINDOWS_SOCKETS)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return needed
    target = needed
    if hard != resource.RLIM_INFINITY:
        target = min(needed, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    except (OSError, ValueError) as error:
        log(f"cannot raise the limit of open files: {error}")
        return soft
    return target


def load_with_progress(data: Data, log: Log) -> None:
    """Load the data file, and show progress on a terminal. Raises CannotServe."""
    is_dumb = os.name == "nt" or os.environ.get("TERM") == "dumb"
    can_show = log.is_terminal and not is_dumb
    clear_line = b"\r\x1b[K"
    is_shown = False
    next_shown = time.monotonic() + PROGRESS_SECONDS
    try:
        for _ in data.load():
            if can_show and time.monotonic() >= next_shown:
                next_shown = time.monotonic() + TICK_SECONDS
                is_shown = True
                log.put(clear_line + data.progress().encode())
    except (OSError, ValueError, MemoryError) as error:
        raise CannotServe(load_failure(error, data.name))
    finally:
        if is_shown:
            log.put(clear_line)


def listen_failure(error: Exception) -> str:
    """Return why the server cannot listen."""
    if isinstance(error, UnicodeError):
        return "not a valid host name"
    reason = error.strerror or str(error)
    if error.errno == errno.EADDRINUSE:
        reason += " (--port takes another)"
    return reason


def host_and_port(host: str, port: int) -> str:
    """Return a host, which may be an IPv6 address, and a port as they appear in a URL."""
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return f"{host}:{port}"


# ---------------------------------------------------------------------------
# get

Key = Union[str, uuid.UUID]


class AskError(OSError):
    """A server did not give a usable answer; the message says why."""


class BadAnswer(AskError):
    """A server answered, but not as kv does, or not completely."""


class AnyStatus(urllib.request.HTTPErrorProcessor):
    """Returns answers of any status.

    The original method passes them on to handlers that follow redirects or raise errors.
    """

    def http_response(self, request, response):
        return response

    https_response = http_response


def get(key: Key, url: str = DEFAULT_URL, timeout: float = DEFAULT_TIMEOUT) -> bytes:
    """Return the value of a key from the server at `url`.

    The key is anything that uuid.UUID accepts. The timeout, in seconds, limits each wait
    for the server, not the total time. Raises ValueError for a key that is not a version
    4 UUID, and for a URL or a timeout that cannot be used; KeyError if the server does
    not have the key; and OSError if it does not answer, or if its answer is not one of
    kv's.
    """
    return ask(version_4_uuid(key), url, timeout, MAX_VALUE_BYTES)


def get_many(keys: Iterable[Key], url: str = DEFAULT_URL,
             timeout: float = DEFAULT_TIMEOUT) -> Dict[Key, bytes]:
    """Return {key as given: value} for those keys that the server has.

    Any number of keys may be given. Raises what `get` raises, except KeyError.
    """
    names = {key: version_4_uuid(key) for key in keys}
    values = find(list(names.values()), url, timeout)
    return {key: value for key, value in zip(names, values) if value is not None}


def find(names: List[str], url: str, timeout: float) -> Iterator[Optional[bytes]]:
    """Yield the value of each key, or None if the server does not have it.

    No request is sent until the first value is requested. KEYS_TOGETHER keys are asked
    for in one request, and one by one if the server cannot answer such requests.
    """
    for start in range(0, len(names), KEYS_TOGETHER):
        together = names[start:start + KEYS_TOGETHER]
        values = ask_together(together, url, timeout)
        for name in together:
            if values is not None:
                yield values.get(name)
                continue
            try:
                yield ask(name, url, timeout, MAX_VALUE_BYTES)
            except KeyError:
                yield None


def ask_together(
        names: List[str], url: str, timeout: float) -> Optional[Dict[str, bytes]]:
    """Return {name: value} for those keys that the server has, after one request.

    Returns None if they have to be asked for one by one.
    """
    if len(names) == 1:
        return None
    try:
        body = ask(",".join(names), url, timeout, TOGETHER_BYTES)
    except (KeyError, BadAnswer):
        # Perhaps the answer is too long. Older versions of kv refuse lists, as do proxies
        # that choose one of several servers by the key.
        return None
    # The answer should look like a data file, and have no keys but these.
    values = {}
    *lines, rest = body.split(b"\n")
    for line in lines:
        key, space, value = line.partition(b" ")
        if space:
            values[key.decode("latin-1")] = value
    if rest or len(values) < len(lines):  # the last line is cut off, or another is bad
        return None
    if not values.keys() <= set(names):
        return None
    return values


def ask(path: str, url: str, timeout: float, max_bytes: int) -> bytes:
    """Return the body of the server's answer to GET /path.

    Raises ValueError for a URL or a timeout that cannot be used; KeyError if the answer
    is that the key is not found; BadAnswer if the answer is another error, is longer than
    `max_bytes`, is not as kv's answers are, or is not complete; and AskError if there is
    no answer.
    """
    check_url(url)
    check_timeout(timeout)
    place = url
    proxy = proxy_for(url)
    if proxy:
        shown = escape(proxy.rpartition("@")[2])  # without the password
        place = f"{url} through the proxy {shown}"
    opener = opener_for(urllib.parse.urlsplit(url).scheme, proxy)
    try:
        answer = opener.open(f"{url.rstrip('/')}/{path}", timeout=timeout)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = ask_failure(error, timeout, proxy)
        raise AskError(f"cannot ask {place}: {reason}") from None
    with answer:
        if answer.status != 200:
            raise error_in(answer, place, path)
        try:
            return body_of(answer, max_bytes)
        except (OSError, http.client.HTTPException, ValueError, MemoryError) as error:
            reason = ask_failure(error, timeout, proxy)
            raise BadAnswer(f"cannot ask {place}: {reason}") from None


def error_in(answer: http.client.HTTPResponse, place: str, path: str) -> Exception:
    """Return a KeyError if an answer says that the key is not found; else a BadAnswer."""
    try:
        body = answer.read(PIECE_BYTES)
    except (OSError, http.client.HTTPException, ValueError):
        body = b""
    if answer.status == 404 and body == KEY_NOT_FOUND:
        return KeyError(path)
    said = f"{answer.status} {answer.reason}"
    line = body.decode("utf-8", "replace").partition("\n")[0]
    if line:
        said += f": {line}"
    return BadAnswer(f"{place} answered {shorten(said)}")


@functools.lru_cache(maxsize=100)
def opener_for(scheme: str, proxy: Optional[str]) -> urllib.request.OpenerDirector:
    """Return a URL opener. It is cached, as making one for TLS can take 20 ms."""
    proxies = {}
    if proxy:
        proxies[scheme] = proxy
    return urllib.request.build_opener(urllib.request.ProxyHandler(proxies), AnyStatus)


def version_4_uuid(key: Key) -> str:
    """Return a key in lower case, with hyphens.

    Raises ValueError unless it is a version 4 UUID.
    """
    shown = escape(str(key)) or "''"
    try:
        identifier = uuid.UUID(str(key))
    except ValueError:
        raise ValueError(f"{shown}: not a UUID") from None
    if identifier.version != 4:
        raise ValueError(f"{shown}: a UUID, but not of version 4")
    return str(identifier)


def check_url(url: str) -> None:
    """Raise ValueError if `url` is not the URL of a server."""
    if not url:
        raise ValueError("the URL is empty")
    if " " in url or not url.isprintable():
        raise ValueError(f"{escape(url)}: spaces and control characters are not allowed")
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise ValueError(f"{url}: {error}") from None
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
        is_valid = parts.port != 0  # None, for the default port, is valid
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError(f"{url}: the port must be a number from 1 to 65535")


def check_timeout(seconds: float) -> None:
    """Raise ValueError if a timeout is not one that sockets accept."""
    if not 0 < seconds <= MAX_TIMEOUT:
        raise ValueError(f"timeout {seconds:g}: must be above 0 and at most "
                         f"{MAX_TIMEOUT} seconds")


def proxy_for(url: str) -> Optional[str]:
    """Return the proxy to use for a URL, or None. Loopback addresses never have one."""
    parts = urllib.parse.urlsplit(url)
    if is_loopback(parts.hostname) or urllib.request.proxy_bypass(parts.netloc):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def is_loopback(host: str) -> bool:
    """Return whether a host is `localhost` or a loopback address, in any of its forms."""
    if host == "localhost":
        return True
    try:
        if ":" not in host:
            return socket.inet_aton(host)[0] == 127
        address = ipaddress.IPv6Address(host)
        return (address.ipv4_mapped or address).is_loopback
    except (OSError, ValueError):
        return False  # it is a name


def body_of(answer: http.client.HTTPResponse, max_bytes: int) -> bytes:
    """Return the body of an answer.

    Raises OSError or HTTPException if the answer is not as kv's answers are, is longer
    than `max_bytes`, or is not complete, and MemoryError if it does not fit in memory.
    """
    fields = answer.headers
    if fields.defects:
        raise OSError("malformed header fields")
    if "Content-Encoding" in fields or "Transfer-Encoding" in fields:
        raise OSError("unexpected Content-Encoding or Transfer-Encoding")
    types = fields.get_all("Content-Type", [])
    if len(types) != 1 or not types[0].startswith("text/plain"):
        raise OSError("unexpected Content-Type; is this another kind of server?")
    lengths = fields.get_all("Content-Length", [])
    if len(lengths) != 1 or not re.fullmatch("[0-9]{1,18}", lengths[0]):
        raise OSError("missing, repeated or malformed Content-Length")
    if int(lengths[0]) > max_bytes:
        raise OSError(f"the answer has {lengths[0]} bytes, more than {max_bytes}")
    return answer.read()


def ask_failure(error: Exception, timeout: float, proxy: Optional[str]) -> str:
    """Return why a server could not be asked."""
    reason = error
    if isinstance(error, urllib.error.URLError):
        reason = error.reason  # the error that it wraps
    text = shorten(getattr(reason, "strerror", None) or str(reason).strip())
    if isinstance(reason, ConnectionRefusedError) and not proxy:
        return (f"{text}; start a server with `python kv.py serve FILE`, "
                "or name another with --url")
    if isinstance(reason, socket.timeout):
        return f"no answer within {timeout:g} s"
    if isinstance(reason, http.client.IncompleteRead):
        missing = reason.expected  # bytes that were still expected
        return f"the answer ended {missing} bytes early"
    if isinstance(reason, MemoryError):
        return "the value does not fit in memory"
    if "WRONG_VERSION_NUMBER" in str(reason) or "RECORD_LAYER" in str(reason):
        return "the server does not speak TLS; use http://"
    if isinstance(reason, http.client.RemoteDisconnected):  # a kind of BadStatusLine
        return "the connection was closed without an answer"
    if isinstance(reason, (http.client.BadStatusLine, http.client.UnknownProtocol)):
        return f"not an HTTP/1.1 server: {text}"
    if isinstance(reason, UnicodeError):
        return "not a valid host name or path"
    return text


def print_values(keys: List[str], options: argparse.Namespace, output: BinaryIO) -> int:
    """Print the values of keys, one per line. Returns the exit code. Raises OSError.

    The output is the same as if the keys were asked for one by one.
    """
    names = []
    faults = {}
    for key in keys:
        try:
            names.append(version_4_uuid(key))
        except ValueError as error:
            faults[key] = str(error)
    values = find(names, options.url, options.timeout)
    code = 0
    for key in keys:
        value = None
        if key not in faults:
            value = next(values)  # they come in the order of `names`
        if value is not None:
            output.write(value)
            output.write(b"\n")
            continue
        output.flush()  # so that values and messages are in order on a terminal
        if key in faults:
            complain(faults[key])
            code = 2
        else:
            complain(f"{escape(key)}: not found")
            code = max(code, 1)
    output.flush()
    return code


def keys_to_ask(keys: List[str]) -> Iterator[List[str]]:
    """Yield the keys in lists, with each "-" replaced by the keys on standard input."""
    batch: List[str] = []
    for key in keys:
        if key != "-":
            batch.append(key)
            continue
        yield batch
        batch = []
        yield from keys_from_standard_input()
    yield batch


def keys_from_standard_input() -> Iterator[List[str]]:
    """Yield lists of the keys on standard input, one per line, as soon as they arrive.

    Raises ValueError if standard input cannot be read.
    """
    rest = b""  # the beginning of a line
    while True:
        try:
            data = os.read(0, INPUT_BYTES)
        except OSError as error:
            # run_get would report an OSError as one of standard output.
            raise ValueError(f"standard input: {error.strerror}")
        if not data:  # the end of the input, which also terminates the last line
            rest += b"\n"
        *lines, rest = (rest + data).split(b"\n")
        yield [line.decode("utf-8", "replace").strip() for line in lines if line.strip()]
        if not data:
            return
        if len(rest) > INPUT_BYTES:
            raise ValueError("standard input: a line is too long for a key")


def run_get(options: argparse.Namespace) -> int:
    """Print the values of keys, one per line. Returns the exit code."""
    code = 0
    try:
        check_url(options.url)  # first, because keys may come much later
        check_timeout(options.timeout)
        with open(1, "wb", closefd=False) as output:
            for keys in keys_to_ask(options.keys):
                code = max(code, print_values(keys, options, output))
    except BrokenPipeError:  # the reader has exited, as in `kv.py get ... | head -1`
        return code
    except (AskError, ValueError) as error:
        complain(str(error))
        return 2
    except OSError as error:
        complain(f"standard output: {error.strerror}")
        return 2
    return code


# ---------------------------------------------------------------------------
# The command line

class Parser(argparse.ArgumentParser):
    """Reports usage errors in one line."""

    def error(self, message: str) -> None:
        """Print `message` and a pointer to the help, and exit. argparse calls this."""
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
    command.set_defaults(parser=command)  # for reporting usage errors
    command.add_argument(
        "file", metavar="FILE",
        help="The file with the pairs, one per line: a version 4 UUID, one space and the "
             "value. Use - for standard input.")
    command.add_argument(
        "--host", default="127.0.0.1",
        help="The address to listen on: 0.0.0.0 for all of IPv4, :: for all of IPv4 and "
             "IPv6. The default, %(default)s, is reachable only from this machine.")
    command.add_argument(
        "--port", type=whole_number(0, 65535), default=8000,
        help="The port to listen on, by default %(default)s; 0 picks a free one.")
    command.add_argument(
        "--max-connections", metavar="COUNT", type=whole_number(1, 1000000),
        help="Hold at most this many connections. Beyond that, a new one replaces the "
             "one that has been waiting longest. By default, as many as the limit on "
             f"open files allows, up to {MAX_CONNECTIONS}.")
    command.add_argument(
        "--reuse-port", action="store_true",
        help="Share the port with other servers that were started with this option. The "
             "system spreads new connections among them.")
    command.add_argument(
        "--verbose", action="store_true", help="Log each request on standard error.")
    command.add_argument(
        "--sorted", action="store_true",
        help="Look keys up in FILE instead of loading it, for data larger than memory. "
             "Its keys must be in lower case, and it must be sorted with LC_ALL=C sort.")
    command.add_argument(
        "--no-check", dest="check", action="store_false",
        help="With --sorted: do not check FILE, and listen immediately.")

    command = commands.add_parser(
        "get", help="Print the values of keys.",
        description="Ask a server for the values of keys, and print them, one per line.")
    command.set_defaults(parser=command)
    command.add_argument(
        "keys", metavar="KEY", nargs="+",
        help="A version 4 UUID. Use - to read keys from standard input, one per line.")
    command.add_argument(
        "--url", default=DEFAULT_URL,
        help="The URL of the server. By default $KV_URL, or http://127.0.0.1:8000.")
    command.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=DEFAULT_TIMEOUT,
        help="Give up when the server has been silent for this long. By default "
             "%(default)g s.")
    return parser


def check_serve_options(options: argparse.Namespace) -> None:
    """End the program if options of `serve` conflict, or are not supported here."""
    if options.reuse_port and not hasattr(socket, "SO_REUSEPORT"):
        options.parser.error("--reuse-port needs SO_REUSEPORT, which this system lacks")
    if not options.check and not options.sorted:
        options.parser.error("--no-check requires --sorted")
    if options.sorted and not hasattr(os, "pread"):
        options.parser.error("--sorted needs a system with pread, which Windows lacks")
    is_special = os.path.exists(options.file) and not os.path.isfile(options.file)
    if options.sorted and (options.file == "-" or is_special):
        options.parser.error("--sorted is only for regular files")


def main() -> int:
    """Run the command given in `sys.argv`. Returns the exit code."""
    parser = make_parser()
    if "serve" not in sys.argv and "get" not in sys.argv:
        for argument in sys.argv[1:]:
            if os.path.exists(argument):
                parser.error(f"did you mean `kv.py serve {argument}`?")
            if KEY_RE.fullmatch(os.fsencode(argument.lower())):
                parser.error(f"did you mean `kv.py get {argument}`?")
    options, unknown = parser.parse_known_args()
    if unknown:  # reported by the parser of the command, which knows its own --help
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        if options.command == "serve":
            check_serve_options(options)
            return serve(options)
        return run_get(options)
    except KeyboardInterrupt:  # Ctrl-C during get, or a second one during serve
        return 130


if __name__ == "__main__":
    sys.exit(main())
