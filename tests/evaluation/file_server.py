"""A small HTTP server over a directory, with ranges, that can break off."""

from __future__ import annotations

import contextlib
import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path


class FileServer:
    """``url`` serves ``root``. ``asked``: path and range of each request. ``limit``: bytes after which an answer breaks off.
    ``ranges``: whether parts of files are sent."""

    def __init__(self, root: Path) -> None:
        self.asked: list[tuple[str, str]] = []
        self.limit: int | None = None
        self.ranges = True
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range", "")
                outer.asked.append((self.path, wanted))
                file = root / self.path.split("?")[0].lstrip("/")
                if not file.is_file():
                    return self.reply(404, b"")
                data = file.read_bytes()
                start = re.fullmatch(r"bytes=(\d+)-", wanted)
                if start is None or not outer.ranges:
                    return self.reply(200, data)
                return self.reply(206 if int(start[1]) < len(data) else 416, data[int(start[1]) :])

            def reply(self, status: int, data: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: outer.limit])

            def log_message(self, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"


@contextlib.contextmanager
def serving(root: Path) -> Iterator[FileServer]:
    """Runs one."""
    server = FileServer(root)
    threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
