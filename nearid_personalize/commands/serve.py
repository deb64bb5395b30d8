"""`nearid serve`: scores, verdicts and subjects over HTTP."""

import os
import shutil
import socket
import tempfile
from importlib.util import find_spec
from pathlib import Path

from nearid_personalize.commands.console import DONE
from nearid_personalize.commands.options import LOCAL_HOSTS, Serve
from nearid_personalize.errors import InputError
from nearid_personalize.files import check_writable
from nearid_personalize.loading import choose_device, choose_dtype

NEEDED = ("fastapi", "uvicorn", "multipart")


def run_serve(options: Serve) -> int:
    """`nearid serve`; returns once it is interrupted."""
    token = token_of(options)
    if any(find_spec(package) is None for package in NEEDED):
        raise InputError("the service needs FastAPI: pip install nearid-personalize[serve]")
    import uvicorn

    from nearid_personalize.gallery import Gallery
    from nearid_personalize.scorer.scorer import IdentityScorer
    from nearid_personalize.service.app import Limits, Service, create_app
    from nearid_personalize.service.subjects import SubjectStore

    if options.subjects is not None:
        check_writable(options.subjects, "--subjects")
    known = None if options.gallery is None else Gallery.open(options.gallery)
    listening = listen(options)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    scorer = IdentityScorer.from_pretrained(options.model, device, dtype, trunk=options.trunk)
    folder = options.subjects or Path(tempfile.mkdtemp(prefix="nearid-subjects-"))
    limits = Limits(
        max_images=options.max_images,
        max_bytes=options.max_request_mb * 10**6,
        max_pixels=options.max_megapixels * 10**6,
        max_waiting=options.max_waiting,
    )
    service = Service(
        scorer=scorer,
        encoder=options.model,
        subjects=SubjectStore(folder),
        limits=limits,
        gallery=None if known is None else Gallery.of_store(known.store, scorer, name=options.gallery or ""),
    )
    host, port = listening.getsockname()[:2]
    print(f"NearID answers at http://{host}:{port}, described at /openapi.json (Ctrl+C ends it)", flush=True)
    server = uvicorn.Server(uvicorn.Config(create_app(service, token), log_level="warning"))
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    finally:
        if options.subjects is None:
            shutil.rmtree(folder, ignore_errors=True)
    return DONE


def token_of(options: Serve) -> str | None:
    """The token, from the flag or NEARID_TOKEN; InputError where others could reach the service without one."""
    token = options.token or os.environ.get("NEARID_TOKEN")
    if not token and options.host not in LOCAL_HOSTS:
        raise InputError(
            f"--host {options.host}: others could reach the service; give --token (or NEARID_TOKEN), or stay with "
            "--host 127.0.0.1"
        )
    return token or None


def listen(options: Serve) -> socket.socket:
    """The open port; InputError when it is taken, before any model is loaded."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family)
    except OSError as error:
        raise InputError(f"--host {options.host} --port {options.port}: {error.strerror or error}") from None
