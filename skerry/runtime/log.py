"""One log record per thing that happened, with fields: JSON lines on standard output, readable text on a terminal."""

import logging
import sys
from typing import Any

import structlog


def configure(program: str) -> None:
    """Set up structlog for this process; libraries that log through ``logging`` come out as warnings and worse."""
    processors: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if sys.stdout.isatty():
        processors.append(structlog.dev.ConsoleRenderer())
    else:
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stdout),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(program=program)
    logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format=f"{program}: %(name)s: %(message)s")


def get(name: str) -> Any:
    """A logger whose records carry ``component=name``."""
    return structlog.get_logger(component=name)
