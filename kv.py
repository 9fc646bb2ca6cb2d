#!/usr/bin/env python3
"""kv: a read-only key-value server in one file.

    python kv.py serve example.data     answers GET /KEY with the value of KEY in that file
    python kv.py get KEY                asks such a server

A line becomes a pair of a dict, a request a look-up in it: this file reads in that order.
"""
import sys
if sys.version_info < (3, 7):  # what follows parses on older ones too, down to 2.7
    sys.exit("kv: needs Python 3.7 or newer, and this is Python %d.%d" % sys.version_info[:2])

import argparse
import contextlib
import email.utils
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
RELOAD_BYTES = 1 << 14    # the same in a reload, beside which requests are answered
RELOAD_PAUSE = 0.002      # seconds between two such pieces
BAD_LINES_SHOWN = 10      # of a refused file; the others are counted
PROGRESS_SECONDS = 1      # that a load takes before a terminal shows how far it is
LISTEN_QUEUE = 1000       # connections that the system keeps until they are accepted
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
    text = "".join(c if c.isprintable() else "\\x%02x" % ord(c) for c in text)
    with contextlib.suppress(AttributeError, OSError, ValueError):  # that nobody reads is no fault
        sys.stderr.write(("\r\x1b[K" if sys.stderr.isatty() else "") + form % text)
        sys.stderr.flush()


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


def load(path, after_piece=lambda done, size, pairs: None, piece_bytes=PIECE_BYTES):
    """Return the pairs in the file at `path` (str, "-" for standard input), {key: value}, bytes.

    Calls `after_piece(bytes read, bytes in the file, pairs)` again and again. Raises BadData.
    """
    name = "standard input" if path == "-" else path
    pairs, lines, done, bad, more = {}, 0, 0, [], 0
    try:
        with open(0 if path == "-" else path, "rb", piece_bytes, closefd=path != "-") as file:
            before = os.fstat(file.fileno())
            for piece in iter(lambda: file.read1(piece_bytes) + file.readline(), b""):
                done += len(piece)
                piece += b"" if piece.endswith(b"\n") else b"\n"  # the last line may lack it
                known, count, found = len(pairs), piece.count(b"\n"), all_pairs(piece)
                pairs.update(found)
                if not count == len(found) == len(pairs) - known:  # look at each line
                    while len(pairs) > known:  # take out again what came in last
                        pairs.popitem()
                    bad += take_lines(piece[:-1].split(b"\n"), lines + 1, pairs)
                    more += len(bad[BAD_LINES_SHOWN:])
                    del bad[BAD_LINES_SHOWN:]
                lines += count
                after_piece(done, before.st_size, pairs)
            after = os.fstat(file.fileno()) if file.seekable() else before
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                bad, more = [" changed while it was read"], 0
    except (OSError, MemoryError) as error:
        bad, more = [" " + getattr(error, "strerror", "too large for the memory")], 0
    if more:
        bad.append(" and %d more bad lines" % more)
    if bad or not pairs:
        raise BadData(*["%s:%s" % (name, text) for text in bad or [" no pair in it"]])
    return pairs


# From a head to a look-up: the grammar of RFC 9112, to which the sections below refer
TOKEN = br"[!#$%&'*+.^_`|~0-9A-Za-z-]+"                        # RFC 9110 section 5.6.2
FIELD = TOKEN + br":[\t -~\x80-\xff]*\r\n"                     # section 5
NAME = br"(?:[0-9A-Za-z._~!$&'()*+;=-]|%[0-9A-Fa-f]{2})+"      # RFC 3986 section 3.2.2, no lists
HOST = br"(?:\[[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*\]|" + NAME + b")(?::[0-9]{0,5})?"
# the plain head: GET of a key, and no field that changes what that means
PLAIN = (br"(?:(?!(?i:Host|Connection|Expect|Content-Length|Transfer-Encoding):)" + FIELD
         + br"|(?i:Connection:[\t ]*(?:keep-alive|(close)))[\t ]*\r\n)*")
plain_head = re.compile(b"GET /((?i:" + KEY + br")) HTTP/1\.1\r\n" + PLAIN + br"(?i:Host):[\t ]*"
                        + HOST + br"[\t ]*\r\n" + PLAIN + br"\r\n").match
next_head = re.compile(br"(?s)(?:\r\n)?(.*?\r\n\r\n|.*)").match      # section 2.2
TARGET = br"(?:[!$&-;=?-Z\[\]_a-z~]|%[0-9A-Fa-f]{2})+"          # RFC 3986 appendix A
request_line = re.compile(b"(%b) (%b) HTTP/([0-9]\\.[0-9])\r\n" % (TOKEN, TARGET)).match
is_fields = re.compile(b"(?:" + FIELD + br")*\r\n").fullmatch
is_chunked = re.compile(br"(?i)(?:(?!chunked[\t ,])" + TOKEN + br"[\t ]*,[\t ]*)*chunked").fullmatch
path = re.compile(b"(?:(?i:http)://" + HOST + b"(?![^/?])|(?=/))/?(.*)").fullmatch


def rules(head):
    """Yield of each rule whether `head` (bytes) keeps it, and if not the status, text and end of
    its answer: the text of a 200 is a key, and status 0 asks for more of the head.
    """
    yield not re.match(br"[^\r\n]{%d}" % (LINE_BYTES + 1), head), 414, b"too long a line"
    yield (re.fullmatch(br"(?:[^\r\n]+(?:\r\n[^\r\n]*)*)?\r?", head[:HEAD_BYTES + 1]),
           400, b"a CR or LF where none belongs (section 2.2)")
    yield len(head) <= HEAD_BYTES, 431, b"a head over %d bytes" % HEAD_BYTES
    yield head.endswith(b"\r\n\r\n"), 0, b""
    line = request_line(head)
    yield line, 400, b"not METHOD TARGET HTTP/1.1 (section 3)"
    yield is_fields(head, line.end()), 400, b"a line that is not NAME: VALUE (section 5)"
    method, target, version = line.groups()
    fields = {}
    for name, value in re.findall(br"\n([^:\r]+):(.*)\r", head):  # an LF between repeated ones
        name, value = name.lower(), value.strip(b"\t ").lower()
        fields[name] = fields[name] + b"\n" + value if name in fields else value
    size, coding = fields.get(b"content-length", b"0"), fields.get(b"transfer-encoding")
    has_body = size != b"0" or coding is not None
    yield version in (b"1.0", b"1.1"), 505, b"a version other than 1.1 and 1.0 (section 2.3)"
    yield (re.fullmatch(HOST, fields.get(b"host", b"" if version == b"1.1" else b"none")),
           400, b"not exactly one Host with host or host:port (section 3.2)")
    yield (path(target) or method == b"CONNECT" or (method, target) == (b"OPTIONS", b"*"),
           400, b"a target that is neither /KEY nor http://HOST/KEY (section 3.2)")
    yield (is_chunked(coding) and b"content-length" not in fields if coding is not None
           else size.isdigit(), 400, b"a body of unknown size (section 6.3)")
    yield not has_body or method not in (b"GET", b"HEAD"), 400, b"a body on GET or HEAD"
    yield fields.get(b"expect") in (None, b"100-continue"), 417, b"expects not 100-continue"
    options = map(bytes.strip, re.split(b"[\n,]", fields.get(b"connection", b"")))
    last = has_body or version == b"1.0" or b"close" in options  # sections 6.3 and 9.3
    yield method != b"OPTIONS", 204, b"", last
    yield (method not in (b"POST", b"PUT", b"DELETE", b"CONNECT", b"TRACE", b"PATCH"),
           405, b"a method other than GET and HEAD", last)
    yield method in (b"GET", b"HEAD"), 501, b"a method that HTTP does not have", last
    key = path(target).group(1).lower()
    yield not key or is_key(key), 400, b"a path that is not / and a version 4 UUID", last
    yield False, 200, key, last


# From a look-up to an answer
BUSY = float("inf")  # since when a connection waits whose client has nothing to send
STATUS = {s.value: b"HTTP/1.1 %d %b\r\n" % (s, s.phrase.encode()) for s in http.HTTPStatus}
CONTENT = (b"Content-Type: text/plain; charset=utf-8\r\nX-Content-Type-Options: nosniff\r\n"
           b"Content-Length: %d\r\n")


class Handler(http.server.BaseHTTPRequestHandler):
    """A connection: `request` is its socket, `head` what it asks, `received` what came after."""
    head, received, size = b"", b"", 0

    def setup(self):
        self.state = self.server.connections[self.request]
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)

    def allow(self, seconds, waits=True):
        """Have the server end the connection after that; `waits` is for the client to send."""
        now = time.monotonic()
        self.state[0], self.state[1] = now + seconds, now if waits else BUSY

    def handle_one_request(self):
        """Answer the next head; `close_connection` then says whether it was the last one."""
        if not self.received:
            self.allow(IDLE_SECONDS)
            self.received = self.request.recv(RECEIVE_BYTES)
        self.head = self.received
        plain = plain_head(self.head)
        if plain:
            self.received = self.head[plain.end():]
            return self.answer(200, plain.group(1).lower(), plain.lastindex > 1)
        self.allow(HEAD_SECONDS)
        more = self.close_connection = True
        while more:  # what breaks a rule is refused as soon as it is there, however the bytes come
            found = next_head(self.received)
            self.head = found.group(1)
            answer = next(rule[1:] for rule in rules(self.head) if not rule[0])
            if answer[0]:
                self.received = self.received[found.end():]
                return self.answer(*answer)
            more = self.request.recv(RECEIVE_BYTES)
            self.received += more

    def answer(self, status, text, last=True):
        """Send `status` (int) and a line of `text` (bytes), with 200 the value of that key."""
        body = text + b"\n"
        if status == 200:
            pairs, body = None, self.server.summary
            try:
                while text and pairs is not self.server.pairs:  # a reload empties the old ones
                    pairs = self.server.pairs
                    body = pairs.get(text)
            except Exception as error:
                log("fault in answering %s: %r" % (self.client_address[0], error))
                status, body = 500, b"the server failed, its log says how\n"
            if body is None:
                status, body = 404, b"the data has no such key\n"
        self.close_connection = last or self.server.stopping
        fields = self.server.fields
        if self.close_connection:
            fields += b"Connection: close\r\n"
        if status in (204, 405):
            fields += b"Allow: GET, HEAD, OPTIONS\r\n"
        if status != 204:  # RFC 9110 section 8.6
            fields += CONTENT % len(body)
        if status == 204 or self.head.startswith(b"HEAD "):
            body = b""
        if self.server.verbose:  # in Common Log Format
            line = self.head.partition(b"\r\n")[0].decode("latin-1").encode("unicode_escape")
            log('%s - - [%s] "%s" %d %d' % (
                self.client_address[0], time.strftime("%d/%b/%Y:%H:%M:%S %z"),
                line.decode().replace('"', r'\"'), status, len(body)), "%s\n")
        self.size = len(body)
        self.allow(ANSWER_SECONDS + self.size // ANSWER_BYTES, False)
        self.request.sendall(b"%b%b\r\n%b" % (STATUS[status], fields, body))

    def finish(self):
        """Read on for a moment where more may come, or the close would take the answer with it."""
        if self.received or self.size > RECEIVE_BYTES or not plain_head(self.head):
            self.request.shutdown(socket.SHUT_WR)
            self.allow(LAST_SECONDS)
            while self.request.recv(RECEIVE_BYTES):
                pass


class Server(http.server.ThreadingHTTPServer):
    """The pairs, the port, and the threads, each of which is used again and again."""
    request_queue_size = LISTEN_QUEUE
    allow_reuse_address = os.name == "posix"  # elsewhere it lets two programs share a port
    allow_reuse_port = False                  # as this does, which newer Pythons turn on
    server_bind = socketserver.TCPServer.server_bind  # HTTPServer's makes a reverse DNS look-up

    def __init__(self, host, port, max_connections, verbose):
        """Take the port, not listening yet. Raises OSError if it is not to be had."""
        self.max_connections, self.verbose, self.stopping = max_connections, verbose, False
        self.connections = {}  # socket: [when its time is up, since when it waits for its client]
        self.accepted, self.closed = queue.SimpleQueue(), threading.Event()
        self.threads, self.next_look = 0, 0  # the latter is when service_actions has to do
        self.address_family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        super().__init__(address, Handler, bind_and_activate=False)
        if self.address_family == socket.AF_INET6:  # let `::` take both families
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, False)
        self.server_bind()

    def use(self, pairs, name):
        """Answer from `pairs`, anything with `get`, that come from the file called `name` (str)."""
        text = "%d pairs of %s, since %s\nask for one by GET /KEY, a version 4 UUID\n" % (
            len(pairs), os.path.basename(name), email.utils.formatdate(usegmt=True))
        self.pairs, self.summary = pairs, text.encode("utf-8", "backslashreplace")

    def reload(self, path, name):
        """Read the file again, beside answering, and answer from it unless it is refused."""
        if path == "-":
            return log("standard input cannot be read again, the data stays as it was")
        start, old = time.monotonic(), self.pairs
        try:
            self.use(load(path, lambda *_: time.sleep(RELOAD_PAUSE), RELOAD_BYTES), name)
        except BadData as error:
            for line in error.args + ("the data stays as it was",):
                log(line)
            return
        log("%d pairs of %s, reloaded in %.2f s" % (
            len(self.pairs), name, time.monotonic() - start))
        while old:  # to forget millions at once would hold up all threads
            for _ in range(min(len(old), RELOAD_BYTES // 32)):
                old.popitem()
            time.sleep(RELOAD_PAUSE)

    def service_actions(self):
        """Called by serve_forever every POLL_SECONDS and after each new connection."""
        now = time.monotonic()
        if now >= self.next_look:
            self.next_look = now + POLL_SECONDS
            self.fields = ("Server: kv/%s\r\nDate: %s\r\n" % (
                __version__, email.utils.formatdate(usegmt=True))).encode()
            for request, (end, since) in self.connections.copy().items():
                if now > end:
                    self.end(request, socket.SHUT_RDWR if since == BUSY else socket.SHUT_RD)

    def end(self, request, how=socket.SHUT_RD):
        """Wake the thread of a connection; with SHUT_RD it still answers what it has received."""
        with contextlib.suppress(OSError):
            request.shutdown(how)

    def make_room(self):
        """End the connection that waits longest for its client; wait until any is closed."""
        self.closed.clear()
        request, state = min(self.connections.copy().items(), key=lambda item: item[1][1],
                             default=(None, [0, BUSY]))
        if state[1] != BUSY:
            state[1] = BUSY  # not to be chosen twice
            self.end(request)
        self.closed.wait(POLL_SECONDS)

    def get_request(self):
        """Accept a connection. Raises OSError if there is no room, having tried to make some."""
        if len(self.connections) < self.max_connections:
            with contextlib.suppress(OSError):  # such as for too many open files
                return super().get_request()
        self.make_room()
        raise OSError("no room")

    def process_request(self, request, client_address):
        """Hand a connection to the threads, and add one if there are more connections."""
        self.connections[request] = [time.monotonic() + IDLE_SECONDS, time.monotonic()]
        self.accepted.put((request, client_address))
        if len(self.connections) > self.threads:
            try:
                threading.Thread(target=self.work, daemon=True).start()
                self.threads += 1
            except RuntimeError:  # the system has no more: one of those there are has to do
                self.make_room()

    def work(self):
        """The life of a thread: one connection after the other."""
        while True:
            request, client_address = self.accepted.get()
            self.process_request_thread(request, client_address)
            del self.connections[request]
            self.closed.set()

    def stop(self):
        """Stop listening, answer what has been received, close all connections."""
        self.stopping, end = True, time.monotonic() + LAST_SECONDS
        self.shutdown()
        self.server_close()
        for request in self.connections.copy():
            self.end(request)
        while self.connections and time.monotonic() < end:
            time.sleep(POLL_SECONDS / 10)

    def handle_error(self, request, client_address):
        """Called when a handler raised; that a client went away is no fault."""
        if not isinstance(sys.exc_info()[1], OSError):
            log("fault in answering %s: %r" % (client_address[0], sys.exc_info()[1]))


def serve(file, host, port, max_connections, verbose):
    """Load `file` and answer from it until SIGTERM or Ctrl-C. Returns the exit code."""
    def show(done, size, pairs):
        seconds = time.monotonic() - start
        if seconds > PROGRESS_SECONDS and sys.stderr and sys.stderr.isatty():
            log("%s %% read, %d pairs, %d a second" % (
                done * 100 // size if size else "?", len(pairs), len(pairs) / seconds), "%s ")

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    start, name = time.monotonic(), "standard input" if file == "-" else file
    reload, server = threading.Lock(), None
    reload.acquire()  # until SIGHUP releases it
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda *_: reload.locked() and reload.release())
    try:
        server = Server(host, port, max_connections, verbose)
        server.use(load(file, show), name)
        with contextlib.suppress(ImportError, OSError, ValueError):
            import resource  # which Windows has not
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            if 0 <= hard < max_connections:
                log("a limit of %d open files is too low for --max-connections" % hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        server.service_actions()
        server.server_activate()
        if hasattr(os, "sched_setaffinity") and getattr(sys, "_is_gil_enabled", lambda: True)():
            cpus = sorted(os.sched_getaffinity(0))  # on several, threads only fight for the GIL
            os.sched_setaffinity(0, [cpus[server.server_address[1] % len(cpus)]])
        log("%d pairs of %s in %.2f s, on http://%s:%d" % (
            len(server.pairs), name, time.monotonic() - start,
            "[%s]" % host if ":" in host else host, server.server_address[1]))
        threading.Thread(target=server.serve_forever, args=(POLL_SECONDS,), daemon=True).start()
        while True:
            if reload.acquire(timeout=POLL_SECONDS):
                server.reload(file, name)
    except KeyboardInterrupt:
        if server and server.threads:
            server.stop()
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

    Raises ValueError for a key that is no version 4 UUID, KeyError for one that the data does not
    have, OSError if no answer comes; `timeout` is how many seconds the server may keep silent.
    """
    if uuid.UUID(key).version != 4:
        raise ValueError("not a version 4 UUID")
    try:
        request = urllib.request.Request("%s/%s" % (url.rstrip("/"), uuid.UUID(key)))
        local = re.match(r"(localhost|127\.[0-9.]+|\[::1\])(:|$)", (request.host or "").lower())
        opener = urllib.request.build_opener(*[urllib.request.ProxyHandler({})] if local else [])
        with opener.open(request, timeout=timeout) as answer:
            return answer.read()
    except (OSError, OverflowError, ValueError, http.client.HTTPException) as error:
        if getattr(error, "code", None) == 404:
            error.close()
            raise KeyError(key)
        raise OSError("cannot ask %s: %s (is kv.py serve running there? --url names another)" % (
            url, getattr(error, "reason", error)))


def print_values(keys, url, timeout):
    """Print the values of `keys` (str, "-" for those on standard input). Returns the exit code."""
    code = 0
    try:
        output = open(1, "wb", closefd=False)
        for key in (line.strip() for key in keys for line in (
                filter(str.strip, open(0, encoding="latin-1", closefd=False))
                if key == "-" else [key])):
            try:
                output.write(get(key, url, timeout) + b"\n")
                output.flush()
            except KeyError:
                log("%s: not found" % key)
                code = max(code, 1)
            except ValueError as error:
                log("%s: %s" % (key, error))
                code = 2
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where what was not written goes in the end
        if not isinstance(error, BrokenPipeError):  # `| head` has what it wants
            log(str(error))
            return 2
    return code


# The command line
class Parser(argparse.ArgumentParser):
    def error(self, message):  # in one line, without all the choices that there would be
        self.exit(2, "kv: %s (%s --help says more)\n" % (message.partition(" (ch")[0], self.prog))


def main():
    """Run the command that `sys.argv` names. Returns the exit code."""
    parser = Parser(prog="kv.py", description="A read-only key-value server in one file.")
    parser.add_argument("--version", action="version", version="kv " + __version__)
    commands = parser.add_subparsers(metavar="serve | get", required=True)
    command = commands.add_parser("serve", help="answer requests for the pairs in a file")
    command.set_defaults(run=serve)
    option = command.add_argument
    option("file", metavar="FILE", help="lines of KEY, a space and VALUE; - is standard input")
    option("--host", default="127.0.0.1", help="its address, :: for all, default %(default)s")
    option("--port", metavar="PORT", type=int, choices=range(1 << 16), default=8000,
           help="0 for a free one, default %(default)s")
    option("--max-connections", metavar="COUNT", type=int, choices=range(1, 1 << 20), default=1000,
           help="at once, default %(default)s: a newcomer takes the place of the longest silent")
    option("--verbose", action="store_true", help="log each request to standard error")
    command = commands.add_parser("get", help="print the values of keys")
    command.set_defaults(run=print_values)
    option = command.add_argument
    option("keys", metavar="KEY", nargs="+", help="a version 4 UUID; - reads standard input")
    option("--url", default=DEFAULT_URL, help="its URL, default $KV_URL or http://127.0.0.1:8000")
    option("--timeout", type=float, default=10, help="seconds to wait, default %(default)s")
    arguments = vars(parser.parse_args())
    try:
        return arguments.pop("run")(**arguments)
    except KeyboardInterrupt:  # a second one, where the first has its meaning
        return 130


if __name__ == "__main__":
    sys.exit(main())
