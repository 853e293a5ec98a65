"""A local server with the part of the Hugging Face hub API that downloads of models need."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


@contextmanager
def serve_hub(model: str, revision: str, folder: Path) -> Iterator[tuple[str, set[str]]]:
    """Serves a folder as a revision of a model.

    Yields the URL of the hub, and the set of the file names that were downloaded so far.
    """
    commit = hashlib.sha1(revision.encode()).hexdigest()
    fetched: set[str] = set()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
            for known in (revision, commit):
                if path == f"/api/models/{model}/revision/{known}":
                    siblings = [{"rfilename": name} for name in files]
                    return self._answer_json({"id": model, "sha": commit, "siblings": siblings})
                if path == f"/api/models/{model}/tree/{known}":
                    kinds = {"type": "file", "oid": commit}
                    tree = [{"path": name, "size": len(files[name]), **kinds} for name in files]
                    return self._answer_json(tree)
                name = path.removeprefix(f"/{model}/resolve/{known}/")
                if name in files:
                    fetched.add(name)
                    return self._answer(files[name])
            code = "RevisionNotFound" if path.startswith(f"/api/models/{model}/") else "RepoNotFound"
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _answer_json(self, content: object) -> None:
            self._answer(json.dumps(content).encode())

        def _answer(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
