"""URLs of folders in an object store: `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX`, or `file:///FOLDER`.

Only the text is looked at here; `deploy.run.storage` opens such a place. Credentials come from the environment, never
from the URL, since settings, logs and command lines show URLs.
"""

from __future__ import annotations

import re

from latent_grpo.common.errors import ConfigError

SCHEMES = ("s3", "gs", "file")


def is_url(place: object) -> bool:
    """Whether a text is a URL and no path of this machine.

    >>> is_url("s3://bucket/runs"), is_url("runs"), is_url("hf:owner/name")
    (True, False, False)
    """
    return isinstance(place, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", place) is not None


def checked_url(place: str) -> str:
    """Returns a URL without a slash at its end; a path of this machine as it is.

    Raises ConfigError for a scheme that is not known, credentials, options, or no bucket. The message never repeats
    what may be a secret.
    """
    if not is_url(place):
        return place
    scheme, _, rest = place.partition(":/")
    scheme = scheme.lower()
    if scheme not in SCHEMES:
        raise ConfigError(f"{scheme}://: expected s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, file:///FOLDER or a path")
    if not rest.startswith("/"):
        raise ConfigError(f"{scheme}:/: a URL has two slashes there: {scheme}://...")
    if "@" in rest:
        raise ConfigError(
            f"{scheme}://: a URL with credentials (...@) is refused, since config.json and logs would show them; set "
            "them in the environment (docs/cluster.md)"
        )
    if re.search(r"[?#]", rest):
        raise ConfigError(
            f"{scheme}://: a URL with options (?...) is refused; the environment has them: AWS_ENDPOINT_URL, AWS_REGION"
        )
    rest = rest.rstrip("/")
    if scheme == "file" and not rest.startswith("//"):
        raise ConfigError(f"{place}: a file URL has three slashes, as in file:///shared/runs")
    if scheme != "file" and not re.fullmatch(r"/[A-Za-z0-9][\w.-]+(/[^/]+)*", rest):
        raise ConfigError(f"{place}: expected {scheme}://BUCKET/PREFIX")
    if any(part in (".", "..") for part in rest.split("/")):
        raise ConfigError(f"{place}: a URL has no parts `.` or `..`")
    return f"{scheme}:/{rest}"


def joined(url: str, name: str) -> str:
    """Returns the URL of `name` below a checked URL."""
    return f"{url}/{name}"
