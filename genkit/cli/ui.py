"""`genkit ui`: a page for the browser."""

from __future__ import annotations

from typing import Annotated

from genkit.cli.common import Debug, Device, check_device, command, option, resolve_device

_PAGE = "Page"


def ui(
    port: Annotated[int, option(_PAGE, "Port on this machine.", min=1, max=65535)] = 7860,
    show: Annotated[bool, option(_PAGE, "Open the browser.", "--open/--no-open")] = True,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Sample with guidance, classify, detect and assemble in the browser, with the embedded models.

    The page is for this machine alone (127.0.0.1), and nothing leaves it. Stop it with Ctrl-C. Needs gradio:
    pip install 'genkit-diffusion\\[ui]'.

    Example:

        [bold]genkit ui --port 7861[/bold]
    """
    with command(as_json=False, quiet=False, debug=debug) as output:
        check_device(device)
        from genkit.ui import build

        page = build(resolve_device(device))
        output.note(f"http://127.0.0.1:{port} - Ctrl-C stops it.")
        page.launch(server_name="127.0.0.1", server_port=port, share=False, inbrowser=show, quiet=True, show_error=True)
