"""`understudy serve`: a teacher behind HTTP, for runs whose teacher is `server`."""

import ipaddress
import socket
from typing import Annotated, Any

import typer

from ..terminal import show, working
from .options import quiet

_LOCAL = ("localhost", "ip6-localhost")


def serve(
    teacher: Annotated[
        str, typer.Argument(help="A model by name or folder, or playground:arithmetic.", show_default=False)
    ],
    host: Annotated[str, typer.Option(help="The address to listen at; any but this machine's own needs a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8765,
    token: Annotated[
        str | None,
        typer.Option(envvar="UNDERSTUDY_TOKEN", help="Answer only those who send this bearer token."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="The dtype to load the model in; auto is the checkpoint's own.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Where to load it, such as cuda:1 or auto.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Padded tokens per forward.")] = 16384,
) -> None:
    """Serve a teacher's scores, and responses, over HTTP."""
    if not _is_loopback(host) and not token:
        raise ValueError(
            f"{host} can be reached from other machines: set a token by --token or the environment variable "
            "UNDERSTUDY_TOKEN, or listen at 127.0.0.1"
        )
    try:
        import uvicorn
    except ImportError:
        raise ImportError("`understudy serve` needs starlette and uvicorn: pip install 'understudy[serve]'") from None
    quiet()
    from rich import get_console

    with _listening(host, port) as listener:
        with working("loading the teacher", get_console()):
            app, fingerprint = _application(teacher, token, dtype, device, batch_tokens)
        address = f"[{host}]" if ":" in host else host
        show(f"{teacher} at http://{address}:{listener.getsockname()[1]} (weights {fingerprint})")
        config = uvicorn.Config(app, log_level="warning", timeout_keep_alive=75, lifespan="off")
        uvicorn.Server(config).run(sockets=[listener])


def _application(name: str, token: str | None, dtype: str, device: str | None, batch_tokens: int) -> tuple[Any, str]:
    """The web application of the model of that name, and the fingerprint of its weights."""
    import torch

    from ..models.load import load_tokenizer
    from ..rollouts.generate import GenerateRollout
    from ..serving.app import application
    from ..serving.scoring import Scorer
    from ..teachers.local import LocalTeacher

    tokenizer = load_tokenizer(name)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    teacher = LocalTeacher(name, dtype=dtype, device=device or (None if accelerator is None else str(accelerator)))
    scorer = Scorer(teacher, tokenizer, name, GenerateRollout(), batch_tokens)
    return application(scorer, token), scorer.info.fingerprint


def _listening(host: str, port: int) -> socket.socket:
    """A socket at an address, which is taken before the model is loaded."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OSError(
            f"no server can listen at {host}, port {port} ({error.strerror}): choose another --port"
        ) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in _LOCAL
