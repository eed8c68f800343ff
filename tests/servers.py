"""An HTTP server in a thread, which stands in for one of another project."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading


@contextlib.contextmanager
def running(respond):
    """A server whose `respond(number, path, body)` gives what is sent as JSON, or status and bytes."""
    log, lock = [], threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *message):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(log)
                log.append({"path": self.path, "body": body, "key": self.headers["Authorization"]})
            found = respond(number, self.path, body)
            status, text = found if isinstance(found, tuple) else (200, json.dumps(found).encode())
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}", log
    finally:
        httpd.shutdown()
        httpd.server_close()
