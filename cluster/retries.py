"""Asking again what a network has lost: which errors may pass by themselves, and how long they are waited for."""

import logging
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from cluster.errors import StorageError

Result = TypeVar("Result")

TRIES = 7
FIRST_PAUSE_S = 0.5
"""Before the second try; doubled before each further one: half a minute in all, beside the client's own tries."""

_LASTING = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
_CLIENT_ERRORS = {"botocore.exceptions": "BotoCoreError", "aiohttp": "ClientError"}

logger = logging.getLogger(__name__)


def retried(operation: Callable[[], Result], description: str, *, tries: int | None = None) -> Result:
    """The result of an operation on an object store; again after errors that may pass.

    Raises: StorageError with the last error after the last try, or at once for what the store does not allow; what
    says that a file is there or not is raised as it is.
    """
    tries = tries or TRIES
    for attempt in range(tries):
        try:
            return operation()
        except _LASTING:
            raise
        except PermissionError as error:
            raise StorageError(
                f"{description} must be allowed, and the store says: {error}; look at the address, at the credentials "
                "and at what they may do"
            ) from error
        except _passing() as error:
            if attempt == tries - 1:
                raise StorageError(
                    f"{description} must be answered, and failed {tries} times, at last with "
                    f"{type(error).__name__}: {error}; look at the store and the network, then start again"
                ) from error
            pause_s = FIRST_PAUSE_S * 2**attempt
            logger.warning(
                "%s failed (%s: %s); again in %.1f s", description, type(error).__name__, error, pause_s
            )
            time.sleep(pause_s)
    raise AssertionError("at least one try")


def _passing() -> tuple[type[BaseException], ...]:
    """Errors of the clients that are no OSError, where such a client is in use."""
    found = (
        getattr(sys.modules[module], name) for module, name in _CLIENT_ERRORS.items() if module in sys.modules
    )
    return (OSError, *found)
