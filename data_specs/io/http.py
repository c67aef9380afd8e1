"""Options of fsspec's file system for http: silence that ends, no redirection to plain http, and no
more of an answer in memory than was asked for."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from data_specs.io.addresses import redacted
from data_specs.io.errors import UserError

SILENCE_S = 60.0
"""How long a server may send nothing. There is no limit on the whole: shards are large."""

MOST_PAGE_BYTES = 64 << 20
"""Of an index page: a million names."""


def http_options() -> dict[str, Any]:
    """Keywords of ``fsspec.filesystem``."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
    watch = aiohttp.TraceConfig()
    watch.on_request_redirect.append(_require_no_downgrade)
    client = {"timeout": timeout, "trust_env": True, "trace_configs": [watch]}
    return {
        "client_kwargs": client | {"response_class": _bounded_response()},
        "headers": {"Accept-Encoding": "identity"},  # sizes are then those of the files
    }


async def _require_no_downgrade(_session: Any, _context: Any, asked: Any) -> None:
    """``UserError`` where https is answered by a redirection to what is not."""
    from yarl import URL

    target = asked.url.join(URL(asked.response.headers.get("Location", "")))
    if asked.url.scheme == "https" and target.scheme != "https":
        raise UserError(
            f"{redacted(str(asked.url))}: redirects from https to {target.scheme}://: not followed"
        )


@cache
def _bounded_response() -> type:
    """aiohttp's answer, of which ``read`` takes no more into memory than was asked for.

    A server may ignore a range and send all, or send an index page without end.
    """
    import aiohttp

    class Bounded(aiohttp.ClientResponse):
        async def read(self) -> bytes:
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.request_info.headers.get("Range", ""))
            first, last = (int(asked[1]), int(asked[2])) if asked else (0, MOST_PAGE_BYTES)
            skip, most, kept = first if self.status == 200 else 0, last + 1 - first, bytearray()
            async for chunk in self.content.iter_chunked(1 << 16):
                kept += chunk[skip:]
                skip = max(0, skip - len(chunk))
                if len(kept) >= most:
                    self.close()
                    break
            if len(kept) >= most and not asked:
                raise UserError(f"its answer is longer than {most} bytes: no index page")
            self._body = bytes(kept[:most])
            return self._body

    return Bounded
