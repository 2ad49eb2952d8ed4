"""`ng-sample serve` under load and abuse, for minutes: what `make soak` runs.

    python3 tests/soak/soak.py EXPORT --program target/release/ng-sample [--requests 10000]

Needs nothing but Python. Every image that comes back is compared with the first of its seed. Ends with 1
if a promise was not kept; prints what was measured.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import os
import random
import re
import signal
import statistics
import sys
import time

HEAD = "POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
QUEUE = 32
TAKEN = 4  # Images taken from the queue at a time.
failed = []


def check(holds, what):
    print(f"  {'ok    ' if holds else 'FAILED'} {what}", flush=True)
    if not holds:
        failed.append(what)


class Server:
    """The program, and what the system says of it."""

    def __init__(self, program, export, *more):
        self.command = [program, "serve", "--model", export, "--listen", "127.0.0.1:0",
                        "--queue", str(QUEUE), "--batch", str(TAKEN), *more]

    async def __aenter__(self):
        self.process = await asyncio.create_subprocess_exec(
            *self.command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL)
        line = (await self.process.stdout.readline()).decode()
        self.port = int(line.rsplit(":", 1)[1])
        return self

    async def __aexit__(self, *_):
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        await self.process.wait()

    def megabytes(self):
        with open(f"/proc/{self.process.pid}/status") as file:
            return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) / 1024

    def files(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def connect(self):
        return asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)

    async def get(self, path):
        reader, writer = await self.connect()
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        return status_of(answer), answer.partition(b"\r\n\r\n")[2].decode()

    async def metric(self, name):
        _, text = await self.get("/metrics")
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines()
                   if re.match(rf"ng_sample_{name}[ {{]", line))


def status_of(answer):
    return int(answer[9:12]) if answer.startswith(b"HTTP/1.1 ") else 0


class Client:
    """One connection that is kept."""

    def __init__(self, server):
        self.server, self.reader, self.writer = server, None, None

    async def post(self, body):
        """Status, headers, body and seconds until the whole answer is there."""
        start = time.monotonic()
        if self.writer is None:
            self.reader, self.writer = await self.server.connect()
        payload = json.dumps(body).encode()
        self.writer.write(f"{HEAD}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        length = int(re.search(r"content-length: (\d+)", head)[1])
        answer = await self.reader.readexactly(length)
        return status_of(head.encode()), head, json.loads(answer), time.monotonic() - start

    def close(self):
        if self.writer is not None:
            self.writer.close()


class Images:
    """Files by their seeds: the first is what all others must be."""

    def __init__(self):
        self.files, self.wrong = {}, 0

    def see(self, seed, answer):
        file = base64.b64decode(answer["data"][0]["b64_json"])
        self.wrong += self.files.setdefault(seed, file) != file


def wish(seed, steps=2):
    return {"prompt": 'red "HAT"', "seed": seed, "num_inference_steps": steps}


async def closed_loop(server, images, n_clients, n_requests):
    """`n_clients` that each send the next request when the last is answered, and come again where there
    was no room."""
    left, seconds, statuses = n_requests, [], {}

    async def client():
        nonlocal left
        connection = Client(server)
        while left > 0:
            left -= 1
            seed = left % 17
            status, _, answer, taken = await connection.post(wish(seed))
            statuses[status] = statuses.get(status, 0) + 1
            if status == 200:
                images.see(seed, answer)
                seconds.append(taken)
            elif status == 429:
                left += 1
                await asyncio.sleep(0.05)
        connection.close()

    start = time.monotonic()
    await asyncio.gather(*(client() for _ in range(n_clients)))
    rate = len(seconds) / (time.monotonic() - start)
    seconds.sort()
    p50, p99 = statistics.median(seconds), seconds[int(len(seconds) * 0.99)]
    print(f"  {n_clients:3} clients: {rate:6.1f} images/s, p50 {1e3 * p50:.1f} ms, "
          f"p99 {1e3 * p99:.1f} ms, answers {statuses}")
    return statuses


async def clients(server, images):
    print("closed loop")
    for n_clients in (1, 8, 64):
        statuses = await closed_loop(server, images, n_clients, 600)
        allowed = {200} if n_clients <= QUEUE else {200, 429}
        check(set(statuses) <= allowed and statuses[200] > 0, f"{n_clients} clients: only {allowed}")


async def twice_capacity(server, images):
    print("twice as many at once as there is room for")
    n = 2 * (QUEUE + TAKEN)
    connections = [Client(server) for _ in range(n)]
    for connection in connections:
        connection.reader, connection.writer = await server.connect()
    answers = await asyncio.gather(*(c.post(wish(s % 17, 40)) for s, c in enumerate(connections)))
    served = [a for a in answers if a[0] == 200]
    refused = [a for a in answers if a[0] == 429]
    for seed, answer in enumerate(answers):
        if answer[0] == 200:
            images.see(("slow", seed % 17), answer[2])
    slowest = max((a[3] for a in refused), default=0)
    print(f"  {len(served)} served, {len(refused)} refused, slowest refusal {1e3 * slowest:.1f} ms")
    check(len(served) + len(refused) == n and len(served) >= QUEUE, "all are served or refused")
    check(refused and slowest < 0.05, "refusals come within 50 ms")
    check(all("retry-after" in a[1] and a[2]["error"]["code"] == "queue_full" for a in refused),
          "refusals say when to come again")
    for connection in connections:
        connection.close()


async def memory(server, images, n_requests):
    print(f"{n_requests} requests")
    await closed_loop(server, images, 16, n_requests // 10)
    before, files = server.megabytes(), server.files()
    marks = []
    for _ in range(9):
        await closed_loop(server, images, 16, n_requests // 10)
        marks.append(server.megabytes())
    print(f"  resident: {before:.1f} MB after a tenth, then " + " ".join(f"{m:.1f}" for m in marks))
    check(marks[-1] - before < 8, "memory is flat")
    check(server.files() <= files + 4, "so is the number of open files")


async def vanish(server, n_clients=1000):
    print(f"{n_clients} clients that go away")
    for _ in range(n_clients // 50):
        writers = []
        for _ in range(50):
            _, writer = await server.connect()
            payload = json.dumps({**wish(1, 100), "n": 1}).encode()
            writer.write(f"{HEAD}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
            writers.append(writer)
        await asyncio.sleep(0.02)
        for writer in writers:
            writer.transport.abort()
    start = time.monotonic()
    while await server.metric("num_requests_waiting") + await server.metric("num_requests_running"):
        if time.monotonic() - start > 30:
            break
        await asyncio.sleep(0.01)
    taken = time.monotonic() - start
    print(f"  all slots free {1e3 * taken:.0f} ms after the last went")
    check(taken < 1, "slots are free within a second")
    check((await server.get("/health"))[0] == 200, "health is 200")


async def slow(server, images, n_slow=200):
    print(f"{n_slow} connections that send a byte a second")
    statuses = {}

    async def crawl(text):
        reader, writer = await server.connect()
        try:
            for byte in text:
                writer.write(bytes([byte]))
                await writer.drain()
                if reader.at_eof():
                    break
                try:
                    answer = await asyncio.wait_for(reader.read(64), 1)
                    statuses[status_of(answer)] = statuses.get(status_of(answer), 0) + 1
                    return
                except TimeoutError:
                    pass
        except ConnectionError:
            statuses[0] = statuses.get(0, 0) + 1
        finally:
            writer.close()

    body = f"{HEAD}Content-Length: 99\r\n\r\n".encode()
    half = n_slow // 2
    crawls = [asyncio.create_task(crawl(HEAD.encode())) for _ in range(half)]

    async def slow_body():
        reader, writer = await server.connect()
        writer.write(body)
        for _ in range(30):
            writer.write(b" ")
            try:
                answer = await asyncio.wait_for(reader.read(64), 1)
                statuses[status_of(answer)] = statuses.get(status_of(answer), 0) + 1
                break
            except TimeoutError:
                pass
        writer.close()

    crawls += [asyncio.create_task(slow_body()) for _ in range(n_slow - half)]
    await asyncio.sleep(2)
    await closed_loop(server, images, 1, 200)
    await asyncio.gather(*crawls)
    print(f"  their answers: {statuses}")
    check(statuses == {408: n_slow}, "each gets 408")
    check((await server.get("/health"))[0] == 200, "health is 200")


def bad_bodies():
    """Bodies that no request has, each with what is wrong."""
    ok = {"prompt": "a"}
    yield "empty", b""
    yield "no JSON", b"prompt=a"
    yield "an array", b"[]"
    yield "half an object", b'{"prompt": "a"'
    yield "deep", b'{"prompt":' + b"[" * 10_000 + b"]" * 10_000 + b"}"
    yield "twice the same key", b'{"prompt": "a", "prompt": "b"}'
    yield "NaN", b'{"prompt": "a", "guidance_scale": NaN}'
    yield "infinity", b'{"prompt": "a", "guidance_scale": 1e999}'
    yield "not UTF-8", b'{"prompt": "\xff\xfe"}'
    yield "a lone surrogate", b'{"prompt": "\\ud800"}'
    yield "a control character", b'{"prompt": "a\\u0000b"}'
    yield "10 MB prompt", json.dumps({"prompt": "a" * 10_000_000}).encode()
    yield "9 KB prompt", json.dumps({"prompt": "a" * 9000}).encode()
    for name, value in [
        ("n", 0), ("n", -1), ("n", 10**9), ("n", 1.5), ("n", "1"), ("n", True), ("n", 2**80),
        ("size", "0x0"), ("size", "-32x32"), ("size", "1000000000x32"), ("size", "32"),
        ("size", "99999999999999999999999x32"), ("size", "33x32"), ("size", 32), ("size", "32X32"),
        ("num_inference_steps", 0), ("num_inference_steps", 10**9), ("num_inference_steps", -5),
        ("seed", -2), ("seed", 2**64), ("seed", "7"), ("guidance_scale", -1), ("guidance_scale", []),
        ("output_format", "bmp"), ("output_compression", 101), ("response_format", "url"),
        ("quality", "best"), ("stream", "yes"), ("partial_images", 4), ("partial_images", 1),
        ("lora", "x"), ("lora", {"path": "/etc/passwd"}), ("model", "../other"), ("prompt", 1),
        ("unknown", 1), ("negative_prompt", "x"), ("background", "transparent"), ("solver", "magic"),
    ]:
        yield f"{name} = {value}"[:60], json.dumps({**ok, name: value}).encode()


async def bad_requests(server, n_fuzzed):
    print("bad requests")
    wrong = []

    async def send(what, raw):
        reader, writer = await server.connect()
        answer = b""
        try:
            writer.write(raw)
            with contextlib.suppress(OSError):  # It may have answered and closed before all was sent.
                writer.write_eof()
            answer = await asyncio.wait_for(reader.read(), 30)
        except (ConnectionError, TimeoutError):
            pass
        writer.close()
        if not 400 <= status_of(answer) < 500:
            wrong.append((what, answer[:60]))

    def framed(body, head=HEAD):
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    bodies = list(bad_bodies())
    for what, body in bodies:
        await send(what, framed(body))
    good = json.dumps(wish(1)).encode()
    other = HEAD.replace("application/json", "text/plain")
    chunks = f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode()
    raw = {
        "another type": framed(good, other),
        "a foreign host": framed(good, HEAD.replace("127.0.0.1", "evil.example")),
        "a foreign origin": framed(good, HEAD + "Origin: http://evil.example\r\n"),
        "no host": framed(good, HEAD.replace("Host: 127.0.0.1\r\n", "")),
        "two lengths": f"{HEAD}Content-Length: 5\r\nContent-Length: 9\r\n\r\n".encode() + good,
        "a negative length": f"{HEAD}Content-Length: -1\r\n\r\n".encode() + good,
        "a length beyond the body": f"{HEAD}Content-Length: 99999\r\n\r\n".encode() + good,
        "65,537 chunks": chunks + b"1\r\n \r\n" * 65_537 + b"0\r\n\r\n",
        "a chunk of no size": chunks + b"zz\r\n \r\n",
        "half a head": HEAD.encode(),
        "a large head": HEAD.encode() + b"X: " + b"a" * 100_000 + b"\r\n\r\n",
        "another method": framed(good, HEAD.replace("POST", "DELETE")),
        "another place": framed(good, HEAD.replace("/v1/images/generations", "/v1/images/edits")),
        "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 200,
    }
    for what, data in raw.items():
        await send(what, data)
    check(not wrong, f"{len(bodies) + len(raw)} bad requests get a 4xx {wrong}")
    chance = random.Random(7)
    wrong.clear()
    for done in range(0, n_fuzzed, 50):
        batch = []
        for _ in range(50):
            data = bytearray(good)
            for _ in range(chance.randrange(1, 6)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            batch.append(bytes(data))
        await asyncio.gather(*(send("fuzzed", framed(data)) for data in batch if not sound(data)))
    check(not wrong, f"{n_fuzzed} fuzzed bodies get a 4xx or are sound {wrong[:3]}")
    check((await server.get("/health"))[0] == 200, "health is 200")


def sound(body):
    """Whether a fuzzed body is still a request that may be served, or that a client may be slow over."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and set(fields) == {"prompt", "seed", "num_inference_steps"}


async def shutdown(args):
    print("SIGTERM under load")
    async with Server(args.program, args.export) as server:
        answers = [asyncio.create_task(Client(server).post(wish(seed, 40))) for seed in range(24)]
        while await server.metric("num_requests_running") == 0:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.05)
        late = await asyncio.gather(Client(server).post(wish(1)), return_exceptions=True)
        answers = await asyncio.gather(*answers)
        status = await server.process.wait()
    check([a[0] for a in answers] == [200] * 24, "what was accepted is answered")
    check(late[0][0] == 503, "what comes later gets 503")
    check(status == 0, "the program ends with 0")


async def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export")
    parser.add_argument("--program", required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--fuzzed", type=int, default=20_000)
    args = parser.parse_args()
    images = Images()
    async with Server(args.program, args.export) as server:
        await clients(server, images)
        await twice_capacity(server, images)
        await vanish(server)
        await slow(server, images)
        await bad_requests(server, args.fuzzed)
        await memory(server, images, args.requests)
        check(images.wrong == 0, "every image has the bits of the first of its seed")
    await shutdown(args)
    if failed:
        sys.exit("error: not kept: " + "; ".join(failed))
    print("all promises kept")


if __name__ == "__main__":
    asyncio.run(main())
