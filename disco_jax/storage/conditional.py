"""Objects that are written only if they are missing, or are still the version that was read."""

from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, NotSupportedError, PreconditionError

from disco_jax.errors import UserError
from disco_jax.storage import stores
from disco_jax.storage.stores import Patience

Version = dict[str, Any]  # what a store tells one version of an object from another by


def read(url: str, patience: Patience | None = None) -> tuple[bytes, Version]:
    """Returns an object's content and version.

    Raises:
      OSError, UserError, DataLost: as `stores.read`.
    """

    def get(store: Any, path: str) -> tuple[bytes, Version]:
        answer = obstore.get(store, path)
        return bytes(answer.bytes()), _version(answer.meta)

    return stores.tried(url, get, patience=patience)


def create(url: str, content: bytes, patience: Patience | None = None) -> Version | None:
    """Creates an object and returns its version, or None if there is one already.

    That one may be ours: if the answer to a request is lost, the request is repeated.

    Raises:
      OSError, UserError, DataLost: as `stores.write`.
    """
    return _put(url, content, "create", patience)


def replace(
    url: str, content: bytes, version: Version, patience: Patience | None = None
) -> Version | None:
    """Replaces a version of an object and returns the new one, or None if it is another by now.

    As in `create`, the other one may be ours.

    Raises:
      OSError, UserError, DataLost: as `stores.write`.
    """
    return _put(url, content, version, patience)


def _put(url: str, content: bytes, mode: Any, patience: Patience | None) -> Version | None:
    def put(store: Any, path: str) -> Version | None:
        try:
            result = obstore.put(store, path, content, mode=mode)
        except (AlreadyExistsError, PreconditionError, FileNotFoundError) as error:
            if isinstance(error, FileNotFoundError) and mode == "create":
                raise  # the bucket is missing
            return None
        except NotSupportedError as error:
            raise UserError(
                f"{url}: its server does not support conditional writes, which keep two runs apart"
            ) from error
        return _version(result)

    return stores.tried(url, put, "written", patience)


def _version(found: Any) -> Version:
    return {name: found[name] for name in ("e_tag", "version") if found[name]}
