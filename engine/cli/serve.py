"""``haast serve [MODEL]``: the HTTP server."""

from __future__ import annotations

import argparse
import logging
import re
import sys

import torch
import uvloop

from engine.build import Served
from engine.cli.compat import add_foreign_arguments, notes_of
from engine.cli.driver import driver_version
from engine.cli.environment import unknown_variables
from engine.cli.loading import open_engine
from engine.cli.options import add_engine_arguments, engine_config, notes
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.server.access import LOOPBACK
from engine.server.lifecycle import serve
from engine.server.state import ServerOptions
from engine.server.version import version

log = logging.getLogger("haast")

_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s@]+")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``haast serve``."""
    default = ServerOptions()
    add_engine_arguments(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default=default.host, help="address to listen on")
    group.add_argument("--port", type=int, default=default.port, help="0 picks a free one")
    group.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        default=argparse.SUPPRESS,
        help="a key that clients must send; may be repeated, and then prompts are cached for each key apart",
    )
    group.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help="names that clients may use; the first is shown in answers",
    )
    group.add_argument(
        "--max-num-queued-reqs",
        "--max-queued-requests",
        type=int,
        default=default.max_num_queued_reqs,
        metavar="N",
        help="requests that may wait; more get 503",
    )
    group.add_argument(
        "--max-num-queued-tokens",
        type=int,
        default=default.max_num_queued_tokens,
        metavar="N",
        help="tokens of prompts that may wait; more get 503, but one that comes alone is taken",
    )
    group.add_argument(
        "--sse-keep-alive-interval",
        type=float,
        default=default.keep_alive_interval,
        metavar="SECONDS",
        help="comment on a silent stream; 0 turns it off",
    )
    group.add_argument(
        "--shutdown-timeout",
        type=float,
        default=default.shutdown_timeout,
        metavar="SECONDS",
        help="time for running requests after SIGTERM",
    )
    group.add_argument(
        "--watchdog-timeout",
        type=float,
        default=default.stalled_after,
        metavar="SECONDS",
        help="without progress after which the engine counts as stalled: requests end with an error, and "
        "/health says 503 to whoever may restart the server, until it goes on; 0 turns it off",
    )
    group.add_argument(
        "--allowed-host",
        action="append",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help="a name to be called by on a loopback address, besides localhost; may be repeated",
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        metavar="ORIGIN",
        default=argparse.SUPPRESS,
        help="a web page's origin that may use the API, as https://HOST, or * for all; may be repeated",
    )
    group.add_argument(
        "--log-level",
        "--uvicorn-log-level",
        default="info",
        choices=("debug", "info", "warning", "error"),
        help="what to log",
    )
    group.add_argument(
        "--config", metavar="FILE", help="values of flags as YAML; the command line and HAAST_* win over it"
    )
    # For a process that starts a server for itself: give it a pipe as stdin and hold the other end.
    group.add_argument("--exit-with-parent", action="store_true", help=argparse.SUPPRESS)
    add_foreign_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal. Returns 0, or 1 if the engine died, which ends the server too."""
    logging.basicConfig(
        level=args.log_level.upper(),
        stream=sys.stderr,
        datefmt="%H:%M:%S",
        format="%(levelname)s %(asctime)s %(message)s",
    )
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    options = server_options(args)
    config = engine_config(args)
    log.info("haast %s, torch %s, %s", version(), torch.__version__, _device_name(config))
    given = [str(given) for given in args.given if given.flag != "--model" or args.model is None]
    if given:
        log.info("Non-default arguments: %s", ", ".join(given))
    for note in (*notes_of(args), *notes(args, config)):
        log.info("%s", note)
    for note in unknown_variables(args.known_variables):
        log.warning("%s", note)
    if options.host not in LOOPBACK and not options.api_keys:
        log.warning(
            "--host %s without --api-key: whoever reaches this machine may use the model", options.host
        )

    def load() -> Served:
        served = open_engine(args)
        _describe(served)
        return served

    parent = sys.stdin.fileno() if args.exit_with_parent else None
    return uvloop.run(serve(options, load, parent))


def server_options(args: argparse.Namespace) -> ServerOptions:
    """The options that the flags describe. Raises ConfigError naming the flag."""
    if not 0 <= args.port <= 65535:
        raise ConfigError(f"--port is {args.port}, expected 0 to 65535")
    for flag in (
        "max_num_queued_reqs",
        "max_num_queued_tokens",
        "sse_keep_alive_interval",
        "shutdown_timeout",
        "watchdog_timeout",
    ):
        if not getattr(args, flag) >= 0:
            raise ConfigError(f"--{flag.replace('_', '-')} is {getattr(args, flag)}, expected 0 or more")
    keys = getattr(args, "api_key", [])
    if not all(keys):
        raise ConfigError("--api-key is empty")
    origins = tuple(getattr(args, "cors_origin", ()))
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise ConfigError(f"--cors-origin is {origin!r}, expected https://HOST, with no path, or *")
    return ServerOptions(
        host=args.host,
        port=args.port,
        api_keys=tuple(keys),
        served_names=tuple(getattr(args, "served_model_name", ())),
        max_num_queued_reqs=args.max_num_queued_reqs,
        max_num_queued_tokens=args.max_num_queued_tokens,
        keep_alive_interval=args.sse_keep_alive_interval,
        shutdown_timeout=args.shutdown_timeout,
        stalled_after=args.watchdog_timeout,
        allowed_hosts=tuple(name.lower() for name in getattr(args, "allowed_host", ())),
        cors_origins=origins,
    )


def _describe(served: Served) -> None:
    """The lines that a newcomer looks for."""
    config = served.engine.config
    pages = served.engine.scheduler.pages
    num_tokens = pages.num_usable * pages.page_size
    log.info(
        "Available KV cache memory: %.2f GiB; KV cache size: %d tokens; maximum concurrency for %d tokens "
        "per request: %.2fx",
        config.kv_cache_memory / (1 << 30),
        num_tokens,
        config.max_model_len,
        num_tokens / config.max_model_len,
    )
    tree = config.speculation
    if served.draft_name == "none":
        log.info("speculation: OFF (there is no draft head; give one with --spec-model, or 'ngram')")
    elif tree.is_off:
        log.info("speculation: OFF (--spec-nodes %d, --spec-depth %d)", tree.nodes, tree.depth)
    else:
        longest = getattr(served.engine.draft, "max_len", None)
        log.info(
            "speculation: %s, %s%d nodes, depth %d, top-k %d, lookup %d%s",
            served.draft_name,
            "planned, at most " if config.planned else "",
            tree.nodes,
            tree.depth,
            tree.top_k,
            tree.lookup,
            "" if longest is None else f", max position {longest}",
        )


def _device_name(config: EngineConfig) -> str:
    """The device, and its driver's version where Linux says it."""
    if not config.device.startswith("cuda"):
        return f"CPU with {torch.get_num_threads()} threads"
    name, driver = torch.cuda.get_device_name(config.device), driver_version()
    return name if driver is None else f"{name}, driver {driver}"
