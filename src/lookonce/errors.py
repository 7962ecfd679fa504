"""Every error that Lookonce raises, and nothing else.

    LookonceError
    ├── InputError (also ValueError)   what the caller gave cannot be used
    │   ├── PictureError               a picture cannot be opened, or is beyond the limits
    │   ├── ModelFileError             a GGUF is missing, damaged, of the wrong kind, or does not fit its partner
    │   ├── SavedLookError             a saved look or chat is damaged
    │   ├── MismatchError              a look or chat was made with another projector, width or text model
    │   ├── PromptError                an alias, a message, a grammar or a sampling option cannot be used
    │   ├── ContextError               the prompt does not fit the context
    │   └── DeviceError                the native build lacks the device that was asked for
    ├── NativeError                    llama.cpp failed at something that should have worked; carries its log lines
    │   └── NotFiniteError             a model gave values that are not finite
    ├── DownloadError                  a model's files cannot be fetched, or are not what was expected
    ├── StoreError                     the store's folder cannot be used at all
    └── ClosedError                    a model, store or chat was used after close()

Messages are one sentence: the value, what was expected, what to do.
"""

__all__ = [
    "ClosedError",
    "ContextError",
    "DeviceError",
    "DownloadError",
    "InputError",
    "LookonceError",
    "MismatchError",
    "ModelFileError",
    "NativeError",
    "NotFiniteError",
    "PictureError",
    "PromptError",
    "SavedLookError",
    "StoreError",
]


class LookonceError(Exception):
    """Root of every error that the library raises on purpose.

    `item` is the number, from 0, of the one among many that the error is about; None where there was only one.
    """

    item: int | None = None


class InputError(LookonceError, ValueError):
    """What the caller gave cannot be used; the command line ends with status 2."""


class PictureError(InputError):
    """A picture cannot be opened, or is beyond the limits."""


class ModelFileError(InputError):
    """A GGUF file is missing, damaged, of the wrong kind, or does not fit its partner."""


class SavedLookError(InputError):
    """A saved look or chat is damaged or is not one."""


class MismatchError(InputError):
    """A look or chat was made with another projector, width or text model than the one it is given to."""


class PromptError(InputError):
    """An alias, a message, a grammar or a sampling option cannot be used."""


class ContextError(InputError):
    """The prompt does not fit the context."""


class DeviceError(InputError):
    """The native build lacks the device that was asked for."""


class NativeError(LookonceError):
    """llama.cpp failed at something that should have worked.

    `log` holds the native library's own lines from the failing call, oldest first.
    """

    def __init__(self, message: str, log: tuple[str, ...] = ()) -> None:
        super().__init__(with_log(message, log))
        self.log = log


class NotFiniteError(NativeError):
    """A model gave values that are not finite: for one text or picture, or for all, as a damaged file does."""


def with_log(message: str, log: tuple[str, ...]) -> str:
    """A message with the native library's own lines after it."""
    return ": ".join([message, *([" | ".join(log)] if log else [])])


class DownloadError(LookonceError):
    """A model's files cannot be fetched: no hub answers, it refuses, the disk is full, or the bytes are wrong."""


class StoreError(LookonceError):
    """The store's folder cannot be used at all: it cannot be made, read or locked."""


class ClosedError(LookonceError):
    """A model, store or chat was used after `close()`."""
