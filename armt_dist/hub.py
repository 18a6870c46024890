"""Names on the Hugging Face Hub: where it cannot be reached, they are looked up in its cache, at once and once."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from .config import ConfigError
from .deadline import within

# Longest wait for a connection; resolvers and firewalls may take minutes to say no.
LIMIT_S = 3.0
OFFLINE = "HF_HUB_OFFLINE"
# What huggingface_hub takes for yes, in capitals.
YES = ("1", "ON", "YES", "TRUE")
# One of them is in the cache if the model or tokenizer is.
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


def check_names(names: Mapping[str, str], datasets: bool = False) -> None:
    """Check that models and tokenizers, by the field that names them, can be found. Raises ConfigError.

    A folder is one that holds them; any other name is in the cache or has to be fetched. Sets HF_HUB_OFFLINE where the
    Hub cannot be reached, because every library would try again for half a minute. datasets: whether a data set is to
    be fetched too; its own library then looks it up.
    """
    names = {field: name for field, name in names.items() if not Path(name).is_dir()}
    if not names and not datasets:
        return
    offline = os.environ.get(OFFLINE, "").upper() in YES
    reason = f"{OFFLINE} is set" if offline else unreachable(endpoint())
    if reason:
        os.environ[OFFLINE] = "1"
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for field, name in names.items():
        try:
            cached = any(isinstance(try_to_load_from_cache(name, file), str) for file in FILES)
        except HFValidationError:
            raise ConfigError(
                f"{field}={name}: neither a folder nor a name of the Hugging Face Hub (NAME or OWNER/NAME)"
            ) from None
        if reason and not cached:
            raise ConfigError(
                f"{field}={name}: neither a folder nor in the cache {constants.HF_HUB_CACHE}, and {endpoint()} cannot "
                f"be reached ({reason}); give a folder, or fetch it where there is a network: hf download {name}"
            )
    if reason:
        # Read from the environment before an extension's import got here.
        constants.HF_HUB_OFFLINE = True


def endpoint() -> str:
    """Return the address of the Hub, or of the mirror that HF_ENDPOINT names."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def unreachable(url: str) -> str | None:
    """Return why the host of a URL, or the proxy before it, takes no connection; None if it does."""
    target = urlsplit(url)
    proxy = getproxies().get(target.scheme)
    if proxy and not proxy_bypass(target.hostname or ""):
        target = urlsplit(proxy if "://" in proxy else f"//{proxy}")

    def connect() -> None:
        """Resolve the name, and open and close a connection."""
        port = target.port or (80 if target.scheme == "http" else 443)
        socket.create_connection((target.hostname or "", port), timeout=LIMIT_S).close()

    try:
        # Resolving a name has no time limit.
        within(LIMIT_S, connect)
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None
