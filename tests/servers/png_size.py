"""A reward server that prefers images whose PNG file is small; replace `score` by your own.

    python tests/servers/png_size.py --port 8000
"""

import argparse
import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MAX_BODY = 256 << 20


def score(prompt, png, metadata):
    """Higher is better; `metadata` is the prompt's object in its file, `{}` for a line of text."""
    return -len(png) / 1000


class Handler(BaseHTTPRequestHandler):
    timeout = 60  # seconds a client may take over a read

    def do_POST(self):
        try:
            length = int(self.headers["Content-Length"])
            if not 0 <= length <= MAX_BODY:
                raise ValueError(f"{length} bytes, at most {MAX_BODY}")
            request = json.loads(self.rfile.read(length))
            images = [base64.b64decode(image, validate=True) for image in request["images"]]
            rows = zip(request["prompts"], images, request["metadata"], strict=True)
            status, answer = 200, {"scores": [score(*row) for row in rows]}
        except (KeyError, TypeError, ValueError) as error:
            status, answer = 400, {"error": str(error)}
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("--port", type=int, default=8000)
    options.add_argument("--hours", type=float, default=24.0, help="it then stops")
    options = options.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
    print(f"http://127.0.0.1:{server.server_port}/score", flush=True)
    timer = threading.Timer(options.hours * 3600, server.shutdown)
    timer.daemon = True
    timer.start()
    server.serve_forever()
