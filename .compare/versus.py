#!/usr/bin/env python3
"""Measure `kv.py serve` beside other servers of the same data, all up at once, a short wrk run of each in turn.

    python3 .compare/versus.py DATA      from the folder of kv.py
      --rounds N     how many times round (default 5)   --seconds S   a run's length (default 2)
      --conns LIST   connections, default 1,16,64,256   --close       a new connection for each request
      --only NAMES   e.g. kv,stock,asgi                 --serve ARGS  more arguments for `kv.py serve`
      --other FILE   another kv.py beside this one, called other (an earlier version, say)
      --depth N      requests that a client sends at once, pipelined (default 1)

Prints the median rate, p50 and p99 of each server, and kv's ratio to it: taken round by round, then the median,
because machines drift. A rate ratio above 1 is good; a latency ratio below 1 is good. Servers:
    kv      this project                           stock   the plainest http.server version (stock.py)
    fastapi FastAPI on uvicorn, uvloop, httptools  asgi    a bare ASGI app on the same uvicorn
    go      Go's net/http, GOMAXPROCS=1            nginx   one worker, each value a file
    floor   the same fixed answer to all, in C (floor.c): no server can be much quicker than this on this machine
A server whose program is not installed is left out, and that is said. To have them all:
    apt-get install wrk golang-go nginx-light gcc
    python3 -m venv ~/.cache/kv-peers && ~/.cache/kv-peers/bin/pip install fastapi 'uvicorn[standard]'
"""
import argparse
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
UVICORN = os.path.expanduser("~/.cache/kv-peers/bin/uvicorn")
LUA = """
local keys = {}
for line in io.lines("%s") do keys[#keys+1] = line:sub(1,36); if #keys >= 100000 then break end end
local n = #keys; local i = math.random(n)
local function one() i = i %% n + 1; return "GET /" .. keys[i] .. " HTTP/1.1\\r\\nHost: localhost\\r\\n%s\\r\\n" end
request = function()
  if %d == 1 then return one() end
  local t = {}; for j = 1, %d do t[j] = one() end; return table.concat(t)
end
"""
NGINX = """daemon off; master_process off; worker_processes 1; pid {d}/pid; error_log {d}/err;
events {{ worker_connections 4096; }}
http {{ access_log off; keepalive_requests 10000000; open_file_cache max=200000; default_type text/plain;
  client_body_temp_path {d}/b; proxy_temp_path {d}/p; fastcgi_temp_path {d}/f; uwsgi_temp_path {d}/u; scgi_temp_path {d}/s;
  server {{ listen 127.0.0.1:{port}; root {d}/www; }} }}
"""
UNIT = {"us": 1, "ms": 1e3, "s": 1e6}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def servers(data, scratch, extra, other):
    """name -> (command, environment, port) of every server that can run here."""
    env = {"DATA": data}
    port = {n: free_port() for n in ("kv", "other", "stock", "fastapi", "asgi", "go", "nginx", "floor")}
    found = {"kv": ([sys.executable, "kv.py", "serve", data, "--port", str(port["kv"])] + extra, {}),
             "stock": ([sys.executable, os.path.join(HERE, "stock.py"), data, str(port["stock"])], {})}
    if other:
        found["other"] = ([sys.executable, other, "serve", data, "--port", str(port["other"])] + extra, {})
    if os.path.exists(UVICORN):
        for name in ("fastapi", "asgi"):
            found[name] = ([UVICORN, "--app-dir", HERE, f"asgi:{name}_app", "--port", str(port[name]),
                            "--no-access-log", "--log-level", "error"], env)
    if shutil.which("go"):
        binary = os.path.join(scratch, "server_go")
        subprocess.run(["go", "build", "-o", binary, os.path.join(HERE, "server.go")], check=True,
                       env={**os.environ, "GOCACHE": os.path.join(scratch, "gocache"), "GO111MODULE": "off"})
        found["go"] = ([binary], {**env, "GOMAXPROCS": "1", "PORT": str(port["go"])})
    if shutil.which("nginx"):
        os.mkdir(os.path.join(scratch, "www"))
        with open(data, "rb") as lines:
            for n, line in enumerate(lines):
                if n == 20000:
                    break
                with open(os.path.join(scratch, "www", line[:36].decode()), "wb") as f:
                    f.write(line[37:].rstrip(b"\n"))
        conf = os.path.join(scratch, "nginx.conf")
        with open(conf, "w") as f:
            f.write(NGINX.format(d=scratch, port=port["nginx"]))
        os.chmod(scratch, 0o755)
        found["nginx"] = (["nginx", "-c", conf], {})
    if shutil.which("gcc"):
        binary = os.path.join(scratch, "floor")
        subprocess.run(["gcc", "-O2", "-o", binary, os.path.join(HERE, "floor.c")], check=True)
        found["floor"] = ([binary, str(port["floor"])], {})
    return {name: (cmd, e, port[name]) for name, (cmd, e) in found.items()}


def microseconds(text):
    m = re.match(r"([\d.]+)(us|ms|s)", text)
    return max(1.0, float(m[1]) * UNIT[m[2]])   # wrk says 0 for what is too quick for it


def wrk(lua, port, connections, seconds):
    out = subprocess.run(["wrk", "-t1", f"-c{connections}", f"-d{seconds}", "--latency", "-s", lua,
                          f"http://127.0.0.1:{port}/"], capture_output=True, text=True).stdout
    trouble = re.search(r"Non-2xx.*|Socket errors.*", out)
    return (float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1]), microseconds(re.search(r"\s50%\s+(\S+)", out)[1]),
            microseconds(re.search(r"\s99%\s+(\S+)", out)[1]), trouble[0] if trouble else "")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--seconds", default="2")
    p.add_argument("--conns", default="1,16,64,256")
    p.add_argument("--close", action="store_true")
    p.add_argument("--only", default="")
    p.add_argument("--serve", default="")
    p.add_argument("--other", default="")
    p.add_argument("--depth", type=int, default=1)
    a = p.parse_args()
    if not shutil.which("wrk"):
        sys.exit("versus: wrk is not installed")
    data = os.path.abspath(a.data)
    started = []
    with tempfile.TemporaryDirectory() as scratch:
        lua = os.path.join(scratch, "keys.lua")
        with open(lua, "w") as f:
            f.write(LUA % (data, "Connection: close\\r\\n" if a.close else "", a.depth, a.depth))
        chosen = servers(data, scratch, a.serve.split(), a.other)
        missing = [n for n in ("stock", "fastapi", "asgi", "go", "nginx", "floor") if n not in chosen]
        if a.close:
            chosen.pop("floor", None)   # it does not say that it closes, and wrk takes that for an error
        if a.only:
            chosen = {n: chosen[n] for n in a.only.split(",") if n in chosen}
        elif missing:
            print("left out, not installed:", ", ".join(missing))
        try:
            for name, (cmd, env, port) in chosen.items():
                process = subprocess.Popen(cmd, env={**os.environ, **env}, stdin=subprocess.DEVNULL,
                                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
                started.append(process)
                for _ in range(240):
                    try:
                        socket.create_connection(("127.0.0.1", port), 1).close()
                        break
                    except OSError:
                        if process.poll() is not None:
                            sys.exit(f"versus: {name} ended before it listened: {' '.join(cmd)}")
                        time.sleep(0.25)
                else:
                    sys.exit(f"versus: {name} did not listen")
            for connections in a.conns.split(","):
                got = {name: [] for name in chosen}
                for _ in range(a.rounds):
                    for name in chosen:
                        got[name].append(wrk(lua, chosen[name][2], connections, a.seconds))
                first = next(iter(chosen))
                for name, runs in got.items():
                    rate, p50, p99 = (statistics.median(r[i] for r in runs) for i in range(3))
                    ratio = [statistics.median(k[i] / r[i] for k, r in zip(got[first], runs)) for i in range(3)]
                    trouble = next((r[3] for r in runs if r[3]), "")
                    print(f"c{connections:>3} {name:8} {rate:8.0f}/s  p50 {p50:6.0f} us  p99 {p99:7.0f} us | {first} is "
                          f"{ratio[0]:5.2f}x its rate  {ratio[1]:5.2f}x its p50  {ratio[2]:5.2f}x its p99  {trouble}", flush=True)
        finally:
            for process in started:
                for how in (signal.SIGTERM, signal.SIGKILL):
                    try:
                        os.killpg(process.pid, how)
                        process.wait(1)
                    except (OSError, subprocess.TimeoutExpired):
                        pass


if __name__ == "__main__":
    main()
