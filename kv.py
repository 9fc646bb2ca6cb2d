#!/usr/bin/env python3
"""kv: a read-only key-value server in one file, which reads in the order that the data takes.

    python kv.py serve example.data     answers GET /KEY with the value of KEY in that file
    python kv.py get KEY                asks such a server
"""
import sys
if sys.version_info < (3, 7):  # what follows parses on older ones too, down to 2.7
    sys.exit("kv: needs Python 3.7 or newer, and this is Python %d.%d" % sys.version_info[:2])

import argparse
import contextlib
import email.utils
import http.server
import operator
import os
import queue
import re
import signal
import socket
import threading
import time
import urllib.request
import uuid

__version__ = "1.0"
DEFAULT_URL = os.environ.get("KV_URL") or "http://127.0.0.1:8000"
PIECE_BYTES = 1 << 16     # of the data file, read and parsed at a time: no more than a cache holds
RELOAD_PAUSE = 0.002      # seconds between two such pieces, where requests are answered meanwhile
FORGET_PAIRS = 512        # of the old data, at a time after a reload
PAGE_BYTES = 1 << 12      # of a sorted file, read at a time in a look-up
BAD_LINES_SHOWN = 10      # of a refused file; the others are counted
PROGRESS_SECONDS = 1      # that a load takes before a terminal shows how far it is
RECEIVE_BYTES = 1 << 13   # taken from a connection at a time; a plain head has to fit in
LINE_BYTES = 8000         # of a request line, without its CRLF
HEAD_BYTES = 16000        # of a head, with its empty line
IDLE_SECONDS = 60         # from one request of a connection to the next
HEAD_SECONDS = 10         # from the first byte of a head to its last
ANSWER_SECONDS = 10       # for the client to take an answer, and one more
ANSWER_BYTES = 10000      # for each so many bytes of it
LAST_SECONDS = 3          # for a refused client to stop sending, and for all when the server stops
POLL_SECONDS = 0.1        # between two looks at the clock


def log(text, form="kv: %s\n"):
    """Write `text` to standard error, on a terminal in place of the progress of a load."""
    text = "".join(c if c.isprintable() or c == "\n" else "\\x%02x" % ord(c) for c in text)
    with contextlib.suppress(AttributeError, OSError, ValueError):  # that nobody reads is no fault
        text = form % text.replace("\n", "\nkv: ")
        sys.stderr.write("\r\x1b[K" + text if sys.stderr.isatty() else text)
        sys.stderr.flush()


# From a line to a pair
KEY = br"x{8}-x{4}-4x{3}-[89ab]x{3}-x{12}".replace(b"x", b"[0-9a-f]")   # RFC 9562 section 5.4
is_key = re.compile(KEY).fullmatch
all_pairs = re.compile(b"^(" + KEY + b") (.*)\n", re.MULTILINE).findall
stamp = operator.attrgetter("st_size", "st_mtime_ns")  # of os.fstat: changes with the file
first_and_last = re.compile(b"(?s)\n(?=(" + KEY + b") )(?:.*\n)?(" + KEY + b") ").search


class Sorted:
    """The pairs of a file in byte order of its lower-case keys, looked up in the file itself.

    Version 4 UUIDs are random, so where a key stands follows from its value: `get` reads a page
    there, narrows the range by the keys in it, and computes again: two or three reads. As every
    fourth halves the range, never over 4 log2(file / page), and log4(value / page) for a value."""
    def __init__(self, file):
        self.file, self.last, self.count = open(os.dup(file.fileno()), "rb", 0), b"", 0
        self.stamp = stamp(os.fstat(file.fileno()))

    def __len__(self):
        return self.count

    def update(self, found):  # as of a dict, with all pairs if their keys ascend, or none
        keys = [self.last] + [key for key, _ in found]
        if all(map(operator.lt, keys, keys[1:])):
            self.last, self.count = keys[-1], self.count + len(found)

    def get(self, key):
        """Return the value of `key` (both bytes) or None. Raises OSError if the file changed."""
        number, size, step = int(key.replace(b"-", b""), 16), PAGE_BYTES, 0
        low, high, least, most = 0, self.stamp[0] + 1, 0, 1 << 128  # of a newline and the file
        while low < high:
            step += 1
            share = (number - least, most - least) if step % 4 else (1, 2)
            start = max(low, low + (high - low) * share[0] // share[1] - size // 2)
            page = b"\n"[start:] + os.pread(self.file.fileno(), size, max(start - 1, 0))
            if stamp(os.fstat(self.file.fileno())) != self.stamp:
                raise OSError("the file was changed in place")
            at, found = page.find(b"\n%b " % key), first_and_last(page)
            if at >= 0:
                value, end, _ = page[at + 38:].partition(b"\n")
                if end or len(page) < size:
                    return value
                low, high, size = start + at, start + at + 1, size * 4  # it goes on
            elif not found and len(page) >= size and start + size < high + 37:
                size *= 4  # all of it belongs to one value
            elif not found or key < found.group(1):
                high, most = start, int(found.group(1).replace(b"-", b""), 16) if found else most
            elif key > found.group(2):
                low, least = start + found.start(2), int(found.group(2).replace(b"-", b""), 16)
            else:
                return None


def fault(line, is_sorted):
    """Return what is wrong (str) with a `line` (bytes) that gave no new pair."""
    return "%s: %r" % (
            "a byte order mark" if re.match(b"\xef\xbb\xbf|\xff\xfe|\xfe\xff", line)
            else "no version 4 UUID at the start of the line" if not is_key(line[:36].lower())
            else "no space after the key" if line[36:37] != b" "
            else "the key already stood on another line" if not is_sorted
            else "the key is not above the last one and in lower case (LC_ALL=C sort)", line[:50])


def load(path, is_sorted=False, check=True, pause=0):
    """Return the pairs in the file at `path` (str, 0 for standard input), {key: value} in bytes.
    Rests `pause` seconds after each piece. Raises ValueError, with a line for each bad one."""
    name, lines, done, bad, more, start = path or "standard input", 0, 0, [], 0, time.monotonic()
    try:
        with open(path, "rb", PIECE_BYTES, closefd=path != 0) as file:
            pairs, (size, date) = Sorted(file) if is_sorted else {}, stamp(os.fstat(file.fileno()))
            pieces = iter(lambda: file.read1(PIECE_BYTES) + file.readline(), b"")
            for piece in pieces if check else ():
                done += len(piece)
                piece += b"" if piece.endswith(b"\n") else b"\n"  # the last line may lack it
                known, count, found = len(pairs), piece.count(b"\n"), all_pairs(piece)
                pairs.update(found if len(found) == count else ())
                if len(pairs) - known != count:  # look at each line
                    while len(pairs) > known:  # take out again what came in last
                        pairs.popitem()
                    for number, line in enumerate(piece[:-1].split(b"\n"), lines + 1):
                        known, key = len(pairs), line[:36] if is_sorted else line[:36].lower()
                        pairs.update(all_pairs(key + line[36:] + b"\n"))
                        if line and len(pairs) == known:
                            bad.append("%s:%d: %s" % (name, number, fault(line, is_sorted)))
                    more += len(bad[BAD_LINES_SHOWN:])
                    del bad[BAD_LINES_SHOWN:]
                lines += count
                spent = time.monotonic() - start
                if spent > PROGRESS_SECONDS and sys.stderr and sys.stderr.isatty():
                    log("%s %% read, %d pairs, %d a second" % (
                        done * 100 // size if size else "?", len(pairs), len(pairs) / spent), "%s ")
                if pause:  # even none takes a while
                    time.sleep(pause)
            if stamp(os.fstat(file.fileno())) != (size, date) if file.seekable() else is_sorted:
                raise OSError(0, "changed while it was read" if file.seekable() else "a pipe")
    except (OSError, MemoryError) as error:
        raise ValueError("%s: %s" % (name, getattr(error, "strerror", "too large for the memory")))
    bad += ["%s: and %d more bad lines" % (name, more)] if more else []
    if bad or check and not pairs:
        raise ValueError("\n".join(bad) or "%s: no pair in it" % name)
    return pairs


# From a head to a look-up: the grammar of RFC 9112, to which the sections below refer
TOKEN = br"[!#$%&'*+.^_`|~0-9A-Za-z-]+"                        # RFC 9110 section 5.6.2
FIELD = TOKEN + br":[\t -~\x80-\xff]*\r\n"                     # section 5
HOST = (br"(?:\[[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:.]*\]|(?:[0-9A-Za-z._~!$&'()*+;=-]|%[0-9A-Fa-f]{2})+)"
        br"(?::[0-9]{0,5})?")                                  # RFC 3986 section 3.2.2, no lists
PLAIN = (br"(?:(?!(?i:Host|Connection|Expect|Content-Length|Transfer-Encoding):)" + FIELD
         + br"|(?i:Connection:[\t ]*(?:keep-alive|(close)))[\t ]*\r\n)*")
plain_head = re.compile(b"GET /((?i:" + KEY + br")) HTTP/1\.1\r\n" + PLAIN + br"(?i:Host):[\t ]*"
                        + HOST + br"[\t ]*\r\n" + PLAIN + br"\r\n").match
next_head = re.compile(br"(?s)(?:\r\n)?(.*?\r\n\r\n|.*)").match      # section 2.2
TARGET = br"(?:[!$&-;=?-Z\[\]_a-z~]|%[0-9A-Fa-f]{2})+"          # RFC 3986 appendix A
request_line = re.compile(b"(%b) (%b) HTTP/([0-9]\\.[0-9])\r\n" % (TOKEN, TARGET)).match
is_lines = re.compile(br"(?:[^\r\n]+(?:\r\n[^\r\n]*)*)?\r?").fullmatch
is_fields = re.compile(b"(?:" + FIELD + br")*\r\n").fullmatch
says_close = re.compile(br"(?i)\nConnection:(?:[^\r]*,)?[\t ]*close[\t ]*[,\r]").search
is_chunked = re.compile(br"(?i)(?:(?!chunked[\t ,])" + TOKEN + br"[\t ]*,[\t ]*)*chunked").fullmatch
path = re.compile(b"(?:(?i:http)://" + HOST + b"(?![^/?])|(?=/))/?(.*)").fullmatch


def rules(head):
    """Yield of each rule if `head` (bytes) keeps it, and if not the answer: status, text, end."""
    yield not re.match(br"[^\r\n]{%d}" % (LINE_BYTES + 1), head), 414, b"too long a line"
    yield is_lines(head[:HEAD_BYTES + 1]), 400, b"a CR or LF where none belongs (section 2.2)"
    yield len(head) <= HEAD_BYTES, 431, b"a head over %d bytes" % HEAD_BYTES
    yield head.endswith(b"\r\n\r\n"), 0, b"more has to come"
    line = request_line(head)
    yield line, 400, b"not METHOD TARGET HTTP/1.1 (section 3)"
    yield is_fields(head, line.end()), 400, b"a line that is not NAME: VALUE (section 5)"
    method, target, version = line.groups()
    host, size, coding, expect = (
        [value.strip(b"\t ") for value in re.findall(br"\n%b:([^\r]*)" % name, head.lower())]
        for name in (b"host", b"content-length", b"transfer-encoding", b"expect"))
    has_body = coding or size not in ([], [b"0"])
    yield version in (b"1.0", b"1.1"), 505, b"a version other than 1.1 and 1.0 (section 2.3)"
    yield (not host and version == b"1.0" or re.fullmatch(HOST, b",".join(host)),
           400, b"not exactly one Host, of host or host:port (section 3.2)")
    yield (path(target) or method == b"CONNECT" or (method, target) == (b"OPTIONS", b"*"),
           400, b"a target that is neither /KEY nor http://HOST/KEY (section 3.2)")
    yield (not has_body or method not in (b"GET", b"HEAD") and (
        is_chunked(b",".join(coding)) and not size if coding else b",".join(size).isdigit()),
           400, b"a body on GET or HEAD, or of unknown size (section 6.3)")
    yield expect in ([], [b"100-continue"]), 417, b"expects not 100-continue"
    last = has_body or version == b"1.0" or says_close(head)  # sections 6.3 and 9.3
    yield method != b"OPTIONS", 204, b"", last
    yield (method not in (b"POST", b"PUT", b"DELETE", b"CONNECT", b"TRACE", b"PATCH"),
           405, b"a method other than GET and HEAD", last)
    yield method in (b"GET", b"HEAD"), 501, b"a method that HTTP does not have", last
    key = path(target).group(1).lower()
    yield not key or is_key(key), 400, b"a path that is not / and a version 4 UUID", last
    yield False, 200, key, last


# From a look-up to an answer
NEVER = float("inf")  # a time in seconds
STATUS = {s.value: b"HTTP/1.1 %d %b\r\n" % (s, s.phrase.encode()) for s in http.HTTPStatus}
STATUS.update({s: STATUS[s] + b"Allow: GET, HEAD, OPTIONS\r\n" for s in (204, 405)})
CONTENT = b"Content-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\n"


class Handler(http.server.BaseHTTPRequestHandler):
    """A connection: `request` is its socket, `head` what it asks, `received` what came after."""
    head, received, size, end, since = b"", b"", 0, NEVER, NEVER

    def setup(self):
        self.server.connections[self.request] = self

    def allow(self, seconds, waits=True):  # until its `end`, and note `since` when it waits
        now = time.monotonic()
        self.end, self.since = now + seconds, now if waits else NEVER

    def handle_one_request(self):  # receives as much as it needs
        self.allow(IDLE_SECONDS)
        self.received = self.received or self.request.recv(RECEIVE_BYTES)
        plain = plain_head(self.received)
        if plain:
            return self.answer(plain.end(), 200, plain.group(1).lower(), plain.lastindex > 1)
        self.allow(HEAD_SECONDS)
        more = self.close_connection = True
        while more:  # what breaks a rule is refused as soon as it is there, however the bytes come
            head = next_head(self.received)
            answer = next(rule[1:] for rule in rules(head.group(1)) if not rule[0])
            if answer[0]:
                return self.answer(head.end(), *answer)
            more = self.request.recv(RECEIVE_BYTES)
            self.received += more

    def answer(self, size, status, text, last=True):
        """Answer a head of `size` bytes by a line of `text` (bytes), or at 200 that key's value."""
        self.head, self.received = self.received[:size].lstrip(), self.received[size:]
        body = text + b"\n"
        if status == 200:
            pairs = body = None
            try:
                while body is None and pairs is not self.server.pairs:  # reloads empty old ones
                    pairs = self.server.pairs
                    body = pairs.get(text) if text else self.server.summary
            except Exception as error:
                log("fault in answering %s: %r" % (self.client_address[0], error))
                status, body = 500, b"the server failed, its log says how\n"
            if body is None:
                status, body = 404, b"the data has no such key\n"
        self.close_connection = last or self.server.stopping and not self.received
        close = b"Connection: close\r\n" if self.close_connection else b""
        content = b"" if status == 204 else CONTENT % len(body)  # RFC 9110 section 8.6
        body = b"" if status == 204 or self.head.startswith(b"HEAD ") else body
        if self.server.options.verbose:  # in Common Log Format
            line = repr(self.head.partition(b"\r\n")[0])[2:-1].replace('"', r'\"')
            client, now = self.client_address[0], time.strftime("%d/%b/%Y:%H:%M:%S %z")
            log('%s - - [%s] "%s" %d %d' % (client, now, line, status, len(body)), "%s\n")
        self.size = len(body)
        self.allow(ANSWER_SECONDS + self.size // ANSWER_BYTES, False)
        self.request.sendall(b"%b%b%b%b\r\n%b" % (
            STATUS[status], self.server.fields, close, content, body))

    def finish(self):  # where more may come, the close alone would take the answer with it
        if self.received or self.size > RECEIVE_BYTES or not plain_head(self.head):
            self.request.shutdown(socket.SHUT_WR)
            self.allow(LAST_SECONDS)
            while self.request.recv(RECEIVE_BYTES):
                pass


class Server(http.server.ThreadingHTTPServer):
    """The pairs, the port, and the threads, each of which is used again and again."""
    request_queue_size = 1000  # that the system keeps until they are accepted
    allow_reuse_address, allow_reuse_port = os.name == "posix", False  # no two on one port
    server_bind = http.server.socketserver.TCPServer.server_bind  # without a DNS look-up
    stopping, threads, next_look = False, 0, 0  # the last is when service_actions has to do

    def __init__(self, options):  # takes the port, not listening yet, or raises OSError
        self.options, self.accepted, self.closed = options, queue.SimpleQueue(), threading.Event()
        self.connections = {}  # socket: Handler
        self.address_family, _, _, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        super().__init__(address, Handler, bind_and_activate=False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)  # those accepted too
        if self.address_family == socket.AF_INET6:  # let `::` take both families
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, False)
        self.server_bind()

    def read(self, pause=0):
        """Load the file and answer from it. Returns a text (str) on that. Raises ValueError."""
        start, file, now = time.monotonic(), self.options.file, email.utils.formatdate(usegmt=True)
        self.pairs = load(file, self.options.sorted, self.options.check, pause)
        count, name = len(self.pairs) or "unchecked", file or "standard input"
        self.summary = ("%s pairs of %s, since %s\nask for one by GET /KEY, a version 4 UUID\n" % (
            count, os.path.basename(name), now)).encode("utf-8", "surrogateescape")
        return "%s pairs of %s in %.2f s" % (count, name, time.monotonic() - start)

    def reload(self):  # beside answering; a file that is refused changes nothing
        if self.options.file == 0:
            return log("standard input cannot be read again, the data stays as it was")
        old = self.pairs
        try:
            log(self.read(RELOAD_PAUSE) + ", reloaded")
        except Exception as error:
            return log("%s\nthe data stays as it was" % error)
        while isinstance(old, dict) and old:  # to forget millions at once would hold up all threads
            for _ in range(min(len(old), FORGET_PAIRS)):
                old.popitem()
            time.sleep(RELOAD_PAUSE)

    def service_actions(self):  # every POLL_SECONDS and after each new connection
        now = time.monotonic()
        if now >= self.next_look:
            self.next_look = now + POLL_SECONDS
            self.fields = b"Server: kv/%b\r\nX-Content-Type-Options: nosniff\r\nDate: %b\r\n" % (
                __version__.encode(), email.utils.formatdate(usegmt=True).encode())
            for request, handler in self.connections.copy().items():
                if now > handler.end or self.stopping:
                    with contextlib.suppress(OSError):  # what has come is answered at a stop
                        request.shutdown(socket.SHUT_RD if self.stopping else socket.SHUT_RDWR)

    def get_request(self):  # raises OSError if there is no room, having tried to make some
        with contextlib.suppress(Exception):  # such as for too many open files, or threads
            if len(self.connections) < self.options.max_connections:
                if len(self.connections) == self.threads:
                    threading.Thread(target=self.work, daemon=True).start()
                    self.threads += 1
                return super().get_request()
        self.closed.clear()
        waiting = [handler for handler in self.connections.copy().values() if handler.since < NEVER]
        with contextlib.suppress(OSError, ValueError):  # there may be none
            min(waiting, key=lambda handler: handler.since).request.shutdown(socket.SHUT_RD)
        self.closed.wait(POLL_SECONDS)
        raise OSError("no room")

    def process_request(self, request, client_address):
        self.connections[request] = Handler  # until its thread has one of its own
        self.accepted.put((request, client_address))

    def work(self):
        for request, client_address in iter(self.accepted.get, None):
            self.process_request_thread(request, client_address)
            del self.connections[request]
            self.closed.set()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # that a client went away is no fault
            log("fault in answering %s: %r" % (client_address[0], sys.exc_info()[1]))

    def stop(self):  # listening, answer what has been received, close all connections
        self.stopping, end = True, time.monotonic() + LAST_SECONDS
        self.shutdown()
        self.server_close()
        while self.connections and time.monotonic() < end:
            self.service_actions()
            time.sleep(POLL_SECONDS / 10)


def serve(options):
    """Load the file and answer from it until SIGTERM or Ctrl-C. Returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server, hangup = None, threading.Lock()
    hangup.acquire()  # until SIGHUP releases it
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda *_: hangup.locked() and hangup.release())
    try:
        server = Server(options)
        ready = server.read()
        with contextlib.suppress(ImportError, OSError, ValueError):
            import resource  # which Windows has not
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            if 0 <= hard < options.max_connections:
                log("a limit of %d open files is too low for --max-connections" % hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        server.service_actions()
        server.server_activate()
        if hasattr(os, "sched_setaffinity") and getattr(sys, "_is_gil_enabled", lambda: True)():
            cpus = sorted(os.sched_getaffinity(0))  # on several, threads only fight for the GIL
            os.sched_setaffinity(0, [cpus[server.server_address[1] % len(cpus)]])
        log("%s, on http://%s:%d" % (ready, "[%s]" % options.host if ":" in options.host
                                     else options.host, server.server_address[1]))
        threading.Thread(target=server.serve_forever, args=(POLL_SECONDS,), daemon=True).start()
        while True:
            if hangup.acquire(timeout=POLL_SECONDS):
                server.reload()
    except KeyboardInterrupt:
        if server and server.threads:
            server.stop()
        return log("stopped")
    except (OSError, UnicodeError) as error:
        log("cannot listen on %s:%d: %s" % (options.host, options.port, error.args[-1]))
    except ValueError as error:
        log(str(error))
    return 1


# From an answer to the terminal
def get(key, url=DEFAULT_URL, timeout=10):
    """Return the value (bytes) of `key` (str, as uuid.UUID takes it) from the server at `url`.
    Raises ValueError for a key that is no version 4 UUID, KeyError for one that is not found, and
    OSError if the server gives no answer, or is silent for `timeout` seconds."""
    if uuid.UUID(key).version != 4:
        raise ValueError("not a version 4 UUID")
    try:
        local = re.fullmatch(r"localhost|127\.[\d.]+|::1", str(urllib.parse.urlsplit(url).hostname))
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({} if local else None))
        with opener.open("%s/%s" % (url.rstrip("/"), uuid.UUID(key)), timeout=timeout) as answer:
            return answer.read()
    except (OSError, OverflowError, ValueError, http.client.HTTPException) as error:
        if getattr(error, "code", None) == 404:
            raise KeyError("not found")
        raise OSError("cannot ask %s: %s (is kv.py serve running there? --url names another)" % (
            url, " ".join(str(getattr(error, "reason", error)).split())))


def print_values(options):
    """Print the values of the keys, "-" for those on standard input. Returns the exit code."""
    code = 0
    try:
        with contextlib.suppress(BrokenPipeError), open(1, "wb", closefd=False) as output:  # | head
            for key in (line.strip() for key in options.keys for line in (
                    filter(str.strip, open(0, encoding="latin-1", closefd=False))
                    if key == "-" else [key])):
                try:
                    output.write(get(key, options.url, options.timeout) + b"\n")
                    output.flush()
                except (KeyError, ValueError) as error:
                    log("%s: %s" % (key, error.args[0]))
                    code = max(code, 1 if isinstance(error, KeyError) else 2)
    except OSError as error:
        log(str(error))
        code = 2
    return code


# The command line
class Parser(argparse.ArgumentParser):
    def error(self, message):  # in one line, without all the choices that there would be
        self.exit(2, "kv: %s (%s --help says more)\n" % (message.partition(" (ch")[0], self.prog))


def main():
    """Run the command that `sys.argv` names. Returns the exit code."""
    parser = Parser(prog="kv.py", description="A read-only key-value server in one file.")
    parser.add_argument("--version", action="version", version="kv " + __version__)
    commands = parser.add_subparsers(metavar="serve | get", dest="command", required=True)
    option = commands.add_parser("serve", help="answer requests for pairs in a file").add_argument
    option("file", metavar="FILE", type=lambda name: 0 if name == "-" else name,
           help="lines of KEY, a space and VALUE; - is standard input")
    option("--host", default="127.0.0.1", help="its address, :: for all, default %(default)s")
    option("--port", metavar="PORT", type=int, choices=range(1 << 16), default=8000,
           help="0 for a free one, default %(default)s")
    option("--max-connections", metavar="COUNT", type=int, choices=range(1, 1 << 20), default=1000,
           help="at once, default %(default)s: a newcomer takes the place of the longest silent")
    option("--verbose", action="store_true", help="log each request to standard error")
    option("--sorted", action="store_true", help="look keys up in FILE, made by LC_ALL=C sort")
    option("--no-check", dest="check", action="store_false", help="trust that it is sorted")
    option = commands.add_parser("get", help="print the values of keys").add_argument
    option("keys", metavar="KEY", nargs="+", help="a version 4 UUID; - reads standard input")
    option("--url", default=DEFAULT_URL, help="its URL, default $KV_URL or http://127.0.0.1:8000")
    option("--timeout", type=float, default=10, help="seconds to wait, default %(default)s")
    options = parser.parse_args()
    if options.command == "serve" and not (options.file if options.sorted else options.check):
        parser.error("--sorted is for files, not standard input, and --no-check for --sorted")
    with contextlib.suppress(KeyboardInterrupt):  # a second one, where the first has its meaning
        return {"serve": serve, "get": print_values}[options.command](options)
    return 130


if __name__ == "__main__":
    sys.exit(main())
