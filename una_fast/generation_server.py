"""Settings of a vLLM server that samples for a run, on GPUs of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

from una_fast.checks import check_types
from una_fast.rewards.settings import is_url, shown_url


@dataclass(frozen=True)
class ServerOptions:
    """A vLLM server, and the directory of the weights for the server."""

    url: str = field(default="", repr=False)
    """Address of the server, without /v1, such as http://host:8000. Required."""
    model: str | None = None
    """Name of the run's model at the server; null: the first model that the server lists."""
    weights_dir: str | None = None
    """Directory that run and server both see, for weights; null: output_dir/handed_over."""
    api_key_env: str | None = None
    """Environment variable that holds the server's key; null: no key."""
    timeout: float = 900.0
    """Seconds for a request: for all samples of a prompt, or until the weights are loaded."""
    retries: int = 3
    """Further attempts after a failed connection, a timeout, or HTTP 408, 429 and 5xx."""
    concurrency: int = 64
    """Prompts that a rank asks for at a time."""
    tolerance: float = 0.1
    """Largest mean difference of the server's log-probs from the policy's, in nats per token."""

    def __post_init__(self) -> None:
        check_types(self)
        if not is_url(self.url) or self.url.rstrip("/").endswith("/v1"):
            raise ValueError(
                f"generation_server.url={shown_url(self.url)!r} must be the address of a vLLM "
                "server without /v1, such as http://host:8000"
            )
        for name in ("timeout", "tolerance"):
            if not getattr(self, name) > 0:
                raise ValueError(f"generation_server.{name}={getattr(self, name)} must be positive")
        for name, least in (("retries", 0), ("concurrency", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"generation_server.{name}={getattr(self, name)} must be at least {least}"
                )
        if self.api_key_env == "":
            raise ValueError(
                "generation_server.api_key_env must be the name of an environment variable, or null"
            )
