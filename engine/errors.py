"""The errors haast raises at its edges.

    EngineError                 everything below; has a stable string ``code``
    ├── ConfigError             an option, a config file or a combination of options is wrong
    ├── CheckpointError         a weight file: missing, extra, misshapen, truncated or unsupported
    ├── RequestError            a request cannot be served as asked (HTTP 400); names the ``param``
    │   └── ContextLengthError  prompt plus answer do not fit; carries both numbers
    └── CapacityError           the engine is full, starting or stopping (HTTP 503)

Input from a user, a file or the network raises one of these and says what was found, what was expected and
where. Our own invariants are asserted instead.
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of all errors that are somebody's input and not our bug."""

    code = "engine_error"


class ConfigError(EngineError):
    """An option or a configuration value that we cannot honour."""

    code = "invalid_config"


class CheckpointError(EngineError):
    """A checkpoint that cannot be loaded; the message names file, tensor, found and expected."""

    code = "invalid_checkpoint"


class RequestError(EngineError):
    """A request that cannot be served. ``param`` is the field's name in the client's JSON, if there is
    one."""

    code = "invalid_value"

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class ContextLengthError(RequestError):
    """The prompt does not fit into the model's context."""

    code = "context_length_exceeded"

    def __init__(self, prompt_len: int, max_model_len: int) -> None:
        super().__init__(
            f"the prompt has {prompt_len} tokens, but at most {max_model_len - 1} fit "
            f"(max_model_len is {max_model_len}, one token is needed for the answer)",
            param="messages",
        )
        self.prompt_len, self.max_model_len = prompt_len, max_model_len


class CapacityError(EngineError):
    """No room for the request now; trying again later may work."""

    code = "queue_full"

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code
