"""Open the page: safe by default, nothing leaves the machine."""

import atexit
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nearid_personalize.attention import check_attention
from nearid_personalize.commands.options import Demo
from nearid_personalize.errors import InputError
from nearid_personalize.loading import choose_device, choose_dtype

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Ubuntu", "sans-serif"]


@dataclass(frozen=True)
class Server:
    """A page that is open. url: where. close: shut it, and delete what visitors left."""

    url: str
    page: object
    root: Path

    def close(self) -> None:
        self.page.close()  # type: ignore[attr-defined]
        shutil.rmtree(self.root, ignore_errors=True)


def credentials(options: Demo, public: bool = False) -> tuple[str, str] | None:
    """User and password, from the flag or NEARID_DEMO_AUTH.

    public: a host for everybody is meant, as a Space's is. Raises InputError when they are none, or are needed.
    """
    told = options.auth or os.environ.get("NEARID_DEMO_AUTH")
    if told:
        user, _, password = told.partition(":")
        if not user or not password:
            raise InputError("--auth: must be user:password, both at least one character long")
        return user, password
    if options.host not in LOCAL_HOSTS and not public:
        raise InputError(
            f"--host {options.host}: others could reach the page; give --auth user:password (or NEARID_DEMO_AUTH), "
            "or stay with --host 127.0.0.1"
        )
    return None


def serve(options: Demo, public: bool = False, block: bool = True) -> Server:
    """Load the models, open the page, and stay until interrupted unless told not to `block`.

    Raises InputError for a host without a password, a port that is taken, or a model that cannot be loaded.
    """
    auth = credentials(options, public)
    root = Path(tempfile.mkdtemp(prefix="nearid-demo-"))
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    os.environ["GRADIO_TEMP_DIR"] = str(root / "cache")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if find_spec("gradio") is None:
        raise InputError("the page needs gradio: pip install nearid-personalize[demo]")
    from nearid_personalize.demo.page import STYLE, build
    from nearid_personalize.demo.studio import Studio
    from nearid_personalize.demo.visitors import Visitors
    from nearid_personalize.scorer.scorer import IdentityScorer

    device = choose_device(options.device)
    check_attention(options.attention, device)
    studio = Studio(
        IdentityScorer.from_pretrained(options.encoder, device, trunk=options.trunk),
        options.encoder,
        options.base_model,
        device,
        choose_dtype(options.dtype, device),
        options.lora_steps,
        options.attention,
    )
    room = options.max_visitor_mb * 10**6
    visitors = Visitors(root / "visitors", options.keep_hours * 3600, options.max_photos, room)
    visitors.sweep_forever()
    page = build(studio, visitors, options.steps, options.lora)
    try:
        _, url, _ = page.queue().launch(
            server_name=options.host,
            server_port=options.port,
            auth=auth,
            share=False,
            allowed_paths=[],
            max_file_size=f"{options.max_upload_mb}mb",
            max_threads=100,
            theme=theme(),
            css_paths=[STYLE],
            footer_links=["api"],
            run_history=False,
            mcp_server=find_spec("mcp") is not None,
            prevent_thread_lock=True,
            quiet=True,
        )
    except OSError as error:
        raise InputError(f"--port {options.port}: {error}") from None
    if fault := getattr(page, "mcp_error", None):
        print(
            f"no tools for agents: {fault}; mcp {version('mcp')} is installed, this gradio may need another", flush=True
        )
    server = Server(url, page, root)
    if block:
        print(f"My dog in space is open at {url} (Ctrl+C ends it)", flush=True)
        page.block_thread()
    return server


def theme() -> Any:
    """Dark green on calm grey, with fonts that every system has; white on the green is legible (contrast 5.0)."""
    import gradio as gr

    look = gr.themes.Soft(primary_hue="green", font=FONTS, font_mono=["ui-monospace", "monospace"])
    green, darker = "*primary_700", "*primary_800"
    return look.set(
        button_primary_background_fill=green,
        button_primary_background_fill_dark=green,
        button_primary_background_fill_hover=darker,
        button_primary_background_fill_hover_dark=darker,
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        block_title_text_color=green,
        block_label_text_color=green,
        block_title_text_color_dark="*primary_200",
        block_label_text_color_dark="*primary_200",
        slider_color=green,
        checkbox_label_background_fill_selected=green,
        checkbox_label_background_fill_selected_dark=green,
    )
