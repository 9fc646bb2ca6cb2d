#!/usr/bin/env python3
"""kv: a read-only key-value server in one file.

    python kv.py serve example.data     answers GET /KEY with the value of KEY in that file
    python kv.py get KEY                asks such a server

A line of the file becomes a pair in a dict, a request a look-up in it, and the value the answer.
This file reads in that order: line, pair, head, answer, server, client, command line.
"""
import sys
if sys.version_info < (3, 7):  # what follows parses on older ones too, down to 2.7
    sys.exit("kv: needs Python 3.7 or newer, and this is Python %d.%d" % sys.version_info[:2])

import argparse
import email.utils
import http.client
import http.server
import os
import queue
import re
import signal
import socket
import socketserver
import threading
import time
import urllib.request
import uuid

__version__ = "1.0"
DEFAULT_URL = os.environ.get("KV_URL") or "http://127.0.0.1:8000"

PIECE_BYTES = 1 << 16     # of the data file, read and parsed at a time: no more than a cache holds
BAD_LINES_SHOWN = 10      # of a refused file; the others are counted
PROGRESS_SECONDS = 1      # that a load takes before a terminal shows how far it is
LISTEN_QUEUE = 1000       # connections that the system keeps until they are accepted
RECEIVE_BYTES = 1 << 13   # taken from a connection at a time; a plain head has to fit in
LINE_BYTES = 8000         # of a request line, without its CRLF
HEAD_BYTES = 16000        # of a head, with its empty line
DRAIN_SECONDS = 2         # read on for, so that a client that still sends gets its answer
POLL_SECONDS = 0.5        # between two looks at the clock


def log(text, form="kv: %s\n"):
    """Write `text` to standard error, on a terminal in place of the progress of a load."""
    text = "".join(c if c.isprintable() else "\\x%02x" % ord(c) for c in text)
    try:
        sys.stderr.write(("\r\x1b[K" if sys.stderr.isatty() else "") + form % text)
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):  # nobody reads it any more: no reason to stop
        pass


# From a line to a pair

KEY = br"x{8}-x{4}-4x{3}-[89ab]x{3}-x{12}".replace(b"x", b"[0-9a-f]")   # RFC 9562 section 5.4
is_key = re.compile(KEY).fullmatch
all_pairs = re.compile(b"^(" + KEY + b") (.*)\n", re.MULTILINE).findall


class BadData(ValueError):
    """A data file that is not to be served; each of `args` (str) is one thing wrong with it."""


def take_lines(lines, first, pairs):
    """Add the good ones of `lines` (bytes) to `pairs`; yield "NUMBER: what is wrong" of the bad."""
    for number, line in enumerate(lines, first):
        key = line[:36].lower()
        wrong = ("a byte order mark, where a key should begin"
                 if line.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"))
                 else "no version 4 UUID at the start of the line" if not is_key(key)
                 else "no space after the key" if line[36:37] != b" "
                 else "the key already stood on another line" if key in pairs else None)
        if line and wrong:
            yield "%d: %s: %r" % (number, wrong, line[:50])
        elif line:
            pairs[key] = line[37:]


def load(path, after_piece=lambda done, size, pairs: None):
    """Return the pairs in the file at `path` (str, "-" for standard input), {key: value}, bytes.

    One findall takes all pairs of a piece; only where the counts do not match are its lines looked
    at singly. Calls `after_piece(bytes read, bytes in the file, pairs)`. Raises BadData.
    """
    name = "standard input" if path == "-" else path
    pairs, lines, done, bad, bad_lines = {}, 0, 0, [], 0
    try:
        with open(0 if path == "-" else path, "rb", PIECE_BYTES, closefd=path != "-") as file:
            before = os.fstat(file.fileno())
            for piece in iter(lambda: file.read1(PIECE_BYTES) + file.readline(), b""):
                done += len(piece)
                if not piece.endswith(b"\n"):  # the end of the file
                    piece += b"\n"
                known, count, found = len(pairs), piece.count(b"\n"), all_pairs(piece)
                pairs.update(found)
                if not count == len(found) == len(pairs) - known:
                    while len(pairs) > known:  # take out again what came in last
                        pairs.popitem()
                    for fault in take_lines(piece[:-1].split(b"\n"), lines + 1, pairs):
                        bad_lines += 1
                        if bad_lines <= BAD_LINES_SHOWN:
                            bad.append("%s:%s" % (name, fault))
                lines += count
                after_piece(done, before.st_size, pairs)
            after = os.fstat(file.fileno())
            if file.seekable() and (before.st_size, before.st_mtime_ns) != (
                    after.st_size, after.st_mtime_ns):
                raise BadData("%s: changed while it was read" % name)
    except (OSError, MemoryError) as error:
        raise BadData("%s: %s" % (name, getattr(error, "strerror", "too large for the memory")))
    if bad_lines > BAD_LINES_SHOWN:
        bad.append("%s: and %d more bad lines" % (name, bad_lines - BAD_LINES_SHOWN))
    if bad or not pairs:
        raise BadData(*bad or ["%s: no pair in it" % name])
    return pairs


# From a head to a look-up: the grammar of RFC 9112, in expressions

ANY_KEY = KEY.replace(b"a-f", b"a-fA-F").replace(b"ab]", b"abAB]")
TOKEN = br"[!#$%&'*+.^_`|~0-9A-Za-z-]+"                        # RFC 9110 section 5.6.2
FIELD = TOKEN + br":[\t -~\x80-\xff]*\r\n"                     # RFC 9112 section 5
BYTE = br"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"     # RFC 3986 section 3.2.2
IPV6 = (br"(?:x:){6}(?:x:x|v)|(?!(?::*x\b){8}|(?::*x\b){7}\.)(?:x(?::x)*)?::(?:(?:x:)*(?:x|v))?"
        .replace(b"x", b"[0-9A-Fa-f]{1,4}").replace(b"v", br"\.".join([BYTE] * 4)))
NAME = br"(?:[0-9A-Za-z._~!$&'()*+;=-]|%[0-9A-Fa-f]{2})+"      # without the comma: not a list
HOST = br"(?:\[(?:" + IPV6 + br")\]|" + NAME + b")(?::[0-9]{0,5})?"
SIZES = b"Content-Length|Transfer-Encoding"


def fields(names, but=b"(?!)"):
    """Return an expression: any number of fields with none of `names` (a|b|c), or such as `but`."""
    return br"(?:(?!(?i:" + names + b"):)" + FIELD + b"|(?i:" + but + br")[\t ]*\r\n)*"


def one(field, names, times=b""):
    """Return an expression: a head in which just one field has one of `names`, and is `field`."""
    return (br"[^\n]*\n" + fields(names) + b"(?:(?i:" + field + br")[\t ]*\r\n" + fields(names)
            + b")" + times + br"\r\n")


# The plain head: GET of a key, and no field that changes what that means.
PLAIN = fields(b"Host|Connection|Expect|" + SIZES, br"Connection:[\t ]*(?:keep-alive|(close))")
plain_head = re.compile(b"GET /(" + ANY_KEY + br") HTTP/1\.1\r\n" + PLAIN + br"(?i:Host):[\t ]*"
                        + HOST + br"[\t ]*\r\n" + PLAIN + br"\r\n").match

# What any other head matches, or else the status and text of its answer. Sections are RFC 9112's.
BEGINNING = (  # of a head, as far as HEAD_BYTES + 1
    (br"(?!(?:\r\n)?[^\r\n]{%d})" % (LINE_BYTES + 1), 414, b"a line over %d bytes" % LINE_BYTES),
    (br"[^\r\n]*(?:\r\n[^\r\n]*)*\r?\Z", 400, b"a CR or LF on its own (section 2.2)"),
    (br"(?s).{0,%d}\Z" % HEAD_BYTES, 431, b"a head over %d bytes" % HEAD_BYTES))
WHOLE = (      # head; where it does not match this, the connection is closed
    (TOKEN + br" [!-~]+ HTTP/[0-9]\.[0-9]\r\n", 400, b"not METHOD TARGET HTTP/1.1 (section 3)"),
    (br"[^\n]*\n(?:" + FIELD + br")*\r\n", 400, b"a line that is not NAME: VALUE (section 5)"),
    (br"[^\n]*/1\.[01]\r\n", 505, b"a version other than 1.1 and 1.0 (section 2.3)"),
    (one(br"Host:[\t ]*" + HOST, b"Host") + br"|[^\n]*0\r\n" + fields(b"Host") + br"\r\n",
     400, b"not exactly one Host with host or host:port (section 3.2)"),
    (b"[^ ]+ (?:/|(?i:http)://" + HOST + br"[/? ])|OPTIONS \* |CONNECT ",
     400, b"a target that is neither /KEY nor http://HOST/KEY (section 3.2)"),
    (one(br"Content-Length:[\t ]*[0-9]+|Transfer-Encoding:[\t ]*(?:" + TOKEN
         + br"[\t ]*,[\t ]*)*chunked", SIZES, b"?"), 400, b"a body of unknown size (section 6.3)"),
    (b"(?!GET |HEAD )|" + one(br"Content-Length:[\t ]*0", SIZES, b"?"),
     400, b"a body, which GET and HEAD have not"),
    (one(br"Expect:[\t ]*100-continue", b"Expect", b"?"), 417, b"expects not 100-continue"))
SERVED = (     # where it does not match this, the connection is kept if it would be
    (b"(?!OPTIONS )", 204, b""),
    (b"(?!(?:POST|PUT|DELETE|CONNECT|TRACE|PATCH) )", 405, b"a method other than GET and HEAD"),
    (b"GET |HEAD ", 501, b"a method that HTTP does not have"),
    (b"[A-Z]+ (?:(?i:http)://[^/?]*)?(?:/(" + ANY_KEY + b")|/?) ",
     400, b"a path that is not / and a version 4 UUID"))
is_last = re.compile(                                          # sections 6.3 and 9.3
    br"(?im)\A.*0\r$|^Transfer-Encoding:|^Content-Length:[\t ]*(?![\t ]|0[\t ]*\r$)"
    br"|^Connection:(?:.*,)?[\t ]*close[\t ]*[,\r]").search


# From a look-up to an answer

STATUS = {s.value: b"HTTP/1.1 %d %b\r\n" % (s, s.phrase.encode()) for s in http.HTTPStatus}
CONTENT = (b"Content-Type: text/plain; charset=utf-8\r\nX-Content-Type-Options: nosniff\r\n"
           b"Content-Length: %d\r\n")


class Handler(http.server.BaseHTTPRequestHandler):
    """A connection: `request` is its socket, `head` the head that is being answered.

    http.server reads heads leniently and slowly. Here one expression knows the plain head, the
    tables see to all others, and both ways give the same answers.
    """

    head = received = b""  # `received` is what came after `head`

    def setup(self):
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)

    def handle_one_request(self):
        """Answer the next head; `close_connection` then says whether it was the last one."""
        self.head = self.received = self.received or self.request.recv(RECEIVE_BYTES)
        plain = plain_head(self.head)
        if plain:
            self.received = self.head[plain.end():]
            self.close_connection = plain.lastindex > 1
            return self.answer_key(plain.group(1))
        self.close_connection = True
        if self.read_head() and self.matches(WHOLE):
            self.close_connection = bool(is_last(self.head))
            served = self.matches(SERVED)
            if served and served.group(1):
                self.answer_key(served.group(1))
            elif served:
                self.answer(200, self.server.summary)

    def read_head(self):
        """Move the next head from `received` to `head`; return whether it is there whole.

        What breaks BEGINNING is refused at once, so the answer is the same however bytes come.
        """
        while True:
            head, end, rest = self.received.partition(b"\r\n\r\n")
            self.head = (head + end)[:HEAD_BYTES + 1]
            if not self.matches(BEGINNING):
                return False
            if end:
                break
            more = self.request.recv(RECEIVE_BYTES)
            if not more:
                return False
            self.received += more
        self.received = rest
        if head.startswith(b"\r\n"):  # one empty line before it is allowed (section 2.2)
            self.head = self.head[2:]
        return True

    def matches(self, table):
        """Return the last match of `head` with the table; None if one failed and was answered."""
        for expression, status, text in table:
            match = re.match(expression, self.head)
            if not match:
                return self.answer(status, text and text + b"\n")
        return match

    def answer_key(self, key):
        """Answer with the value of `key` (bytes, in either case)."""
        try:
            value = self.server.pairs.get(key.lower())
        except Exception as error:
            log("fault in answering %s: %r" % (self.client_address[0], error))
            self.answer(500, b"the server failed, its log says how\n")
        else:
            self.answer(*(404, b"the data has no such key\n") if value is None else (200, value))

    def answer(self, status, body):
        """Send `status` (int) and `body` (bytes) in one piece."""
        fields = self.server.fields
        if self.close_connection or self.server.stopping:
            self.close_connection = True
            fields += b"Connection: close\r\n"
        if status in (204, 405):
            fields += b"Allow: GET, HEAD, OPTIONS\r\n"
        if status != 204:  # RFC 9110 section 8.6
            fields += CONTENT % len(body)
        if self.head.startswith(b"HEAD "):
            body = b""
        if self.server.verbose:
            self.log_request(status, len(body))
        self.request.sendall(b"%b%b\r\n%b" % (STATUS[status], fields, body))

    def log_request(self, code="-", size="-"):
        """Log in Common Log Format."""
        line = self.head.partition(b"\r\n")[0].decode("latin-1").encode("unicode_escape").decode()
        log('%s - - [%s] "%s" %s %s' % (
            self.client_address[0], time.strftime("%d/%b/%Y:%H:%M:%S %z"),
            line.replace('"', r'\"'), code, size), "%s\n")

    def finish(self):
        """Read on for a moment where more may come, or the close would take the answer with it."""
        if not plain_head(self.head):
            self.request.shutdown(socket.SHUT_WR)
            self.request.settimeout(DRAIN_SECONDS)
            end = time.monotonic() + DRAIN_SECONDS
            while time.monotonic() < end and self.request.recv(RECEIVE_BYTES):
                pass


class Server(http.server.ThreadingHTTPServer):
    """The pairs, the port, and the threads, each of which is used again and again."""

    request_queue_size = LISTEN_QUEUE
    allow_reuse_address = os.name == "posix"  # elsewhere it lets two programs share a port
    allow_reuse_port = False                  # as this does, which newer Pythons turn on
    server_bind = socketserver.TCPServer.server_bind  # HTTPServer's makes a reverse DNS look-up

    def __init__(self, host, port, verbose):
        """Take the port, not listening yet. Raises OSError if it is not to be had."""
        self.verbose, self.stopping = verbose, False
        self.threads, self.open, self.waiting = 0, set(), queue.SimpleQueue()
        self.address_family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        super().__init__(address, Handler, bind_and_activate=False)
        if self.address_family == socket.AF_INET6:  # let `::` take both families
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, False)
        self.server_bind()
        # Linux would let others bind to it as long as it does not listen
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, False)
        self.url = "http://%s:%d" % (
            "[%s]" % host if ":" in host else host, self.server_address[1])

    def use(self, pairs, name):
        """Answer from `pairs`, anything with `get`, that come from the file called `name` (str)."""
        self.pairs = pairs
        self.summary = ("%d pairs of %s, since %s\nask for one by GET /KEY, a version 4 UUID\n" % (
            len(pairs), os.path.basename(name), email.utils.formatdate(usegmt=True))
        ).encode("utf-8", "backslashreplace")

    def service_actions(self):
        """Called by serve_forever every POLL_SECONDS and after each new connection."""
        self.fields = ("Server: kv/%s\r\nDate: %s\r\n" % (
            __version__, email.utils.formatdate(usegmt=True))).encode()

    def process_request(self, request, client_address):
        """Hand a connection to the threads, and add one if there are more connections."""
        self.open.add(request)
        self.waiting.put((request, client_address))
        if len(self.open) > self.threads:
            threading.Thread(target=self.work, daemon=True).start()
            self.threads += 1

    def work(self):
        """The life of a thread: one connection after the other."""
        while True:
            request, client_address = self.waiting.get()
            self.process_request_thread(request, client_address)
            self.open.remove(request)

    def handle_error(self, request, client_address):
        """Called when a handler raised; that a client went away is no fault."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            log("fault in answering %s: %r" % (client_address[0], error))


def serve(file, host, port, verbose):
    """Load `file` and answer from it until SIGTERM or Ctrl-C. Returns the exit code."""
    def show(done, size, pairs):
        seconds = time.monotonic() - start
        if seconds > PROGRESS_SECONDS and sys.stderr and sys.stderr.isatty():
            log("%s %% read, %d pairs, %d a second" % (
                done * 100 // size if size else "?", len(pairs), len(pairs) / seconds), "%s ")

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    start, name = time.monotonic(), "standard input" if file == "-" else file
    try:
        server = Server(host, port, verbose)
        server.use(load(file, show), name)
        server.service_actions()
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, server.allow_reuse_address)
        server.server_activate()
        if hasattr(os, "sched_setaffinity") and getattr(sys, "_is_gil_enabled", lambda: True)():
            # threads that wake on other processors only fight for the GIL
            processors = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, [processors[server.server_address[1] % len(processors)]])
        log("%d pairs of %s in %.2f s, on %s" % (
            len(server.pairs), name, time.monotonic() - start, server.url))
        server.serve_forever(POLL_SECONDS)
    except KeyboardInterrupt:
        log("stopped")
        return 0
    except BadData as error:
        for line in error.args:
            log(line)
    except (OSError, UnicodeError) as error:
        log("cannot listen on %s:%d: %s" % (host, port, getattr(error, "strerror", error)))
    return 1


# From an answer to the terminal

def get(key, url=DEFAULT_URL, timeout=10):
    """Return the value (bytes) of `key` (str, as uuid.UUID takes it) from the server at `url`.

    `timeout` is how many seconds it may keep silent. Raises ValueError for a key that is no version
    4 UUID, KeyError for one the data does not have, OSError or http.client.HTTPException for an
    answer that does not come.
    """
    if uuid.UUID(key).version != 4:
        raise ValueError("not a version 4 UUID")
    try:
        request = urllib.request.Request("%s/%s" % (url.rstrip("/"), uuid.UUID(key)))
        local = re.match(r"(localhost|127\.[0-9.]+|\[::1\])(:|$)", (request.host or "").lower())
        opener = urllib.request.build_opener(*[urllib.request.ProxyHandler({})] if local else [])
        with opener.open(request, timeout=timeout) as answer:
            return answer.read()
    except (OSError, OverflowError, ValueError) as error:
        if getattr(error, "code", None) == 404:
            raise KeyError(key)
        raise OSError(getattr(error, "reason", error))


def print_values(keys, url, timeout):
    """Print the values of `keys` (str, "-" for those on standard input). Returns the exit code."""
    code = 0
    try:
        for key in (line.strip() for key in keys for line in (
                filter(str.strip, open(0, encoding="latin-1", closefd=False))
                if key == "-" else [key])):
            try:
                value = get(key, url, timeout)
            except KeyError:
                log("%s: not found" % key)
                code = code or 1
            except ValueError as error:
                log("%s: %s" % (key, error))
                code = 2
            except (OSError, http.client.HTTPException) as error:
                log("cannot ask %s: %s (is kv.py serve running there? --url names another)"
                    % (url, error))
                return 2
            else:
                sys.stdout.buffer.write(value + b"\n")
                sys.stdout.buffer.flush()
    except BrokenPipeError:  # of `| head`, which has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (AttributeError, OSError) as error:
        log("standard input or output failed: %s" % error)
        return 2
    return code


# The command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        """Called for wrong usage: one line, without all the choices that there would be."""
        self.exit(2, "kv: %s (%s --help says more)\n" % (message.partition(" (ch")[0], self.prog))


def main():
    """Run the command that `sys.argv` names. Returns the exit code."""
    parser = Parser(prog="kv.py", description="A read-only key-value server in one file.")
    parser.add_argument("--version", action="version", version="kv " + __version__)
    commands = parser.add_subparsers(metavar="serve | get", required=True)
    command = commands.add_parser("serve", help="answer requests for the pairs in a file")
    command.set_defaults(run=serve)
    option = command.add_argument
    option("file", metavar="FILE", help="the data: lines of KEY, a space and VALUE, each KEY a "
           "version 4 UUID; - reads standard input")
    option("--host", default="127.0.0.1", help="the address to listen on: 0.0.0.0 is all of IPv4, "
           ":: all of IPv4 and IPv6, default %(default)s")
    option("--port", metavar="PORT", type=int, choices=range(1 << 16), default=8000,
           help="the port to listen on, 0 for a free one, default %(default)s")
    option("--verbose", action="store_true", help="log each request to standard error")
    command = commands.add_parser("get", help="print the values of keys")
    command.set_defaults(run=print_values)
    option = command.add_argument
    option("keys", metavar="KEY", nargs="+", help="a version 4 UUID; - reads them from standard input")
    option("--url", default=DEFAULT_URL,
           help="where the server is, default $KV_URL or http://127.0.0.1:8000")
    option("--timeout", type=float, default=10,
           help="seconds that the server may keep silent, default %(default)s")
    arguments = vars(parser.parse_args())
    try:
        return arguments.pop("run")(**arguments)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
