"""Opens object stores with the credentials that their own tools would use."""

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, HTTPStore, ObjectStore, S3Store

from disco_jax.errors import UserError
from disco_jax.storage.urls import WEB

# Brief disturbances are dealt with by obstore, longer ones by `stores`, which also renews
# credentials. Uploads of several parts can't be repeated from outside.
RETRIES: dict[str, Any] = {"max_retries": 3, "retry_timeout": timedelta(seconds=20)}
UPLOAD_RETRIES: dict[str, Any] = {
    "max_retries": 40,
    "retry_timeout": timedelta(minutes=4),
    "backoff": {"base": 3, "max_backoff": timedelta(seconds=20)},
}
TIMEOUTS = {
    "connect_timeout": timedelta(seconds=10),
    "read_timeout": timedelta(seconds=30),  # without a byte
    "timeout": timedelta(minutes=10),  # of a request
}
# botocore renews credentials at least ten minutes before they expire.
_LIFETIME = timedelta(minutes=10)


@lru_cache(64)
def open_store(root: str, for_uploads: bool = False) -> ObjectStore:
    """Returns the store of a bucket or web server, e.g. of `s3://bucket`.

    Stores are kept for the process that opened them and can't be used after a fork. Those for
    uploads try failing requests for minutes.

    Raises:
      UserError: if credentials are missing, or the settings are wrong.
    """
    scheme, _, rest = root.partition("://")
    make = {"s3": _s3, "gs": _gcs, "az": _azure, "https": _web, "http": _web}[scheme]
    retries = UPLOAD_RETRIES if for_uploads else RETRIES
    try:
        return make(root if scheme in WEB else rest, retries)
    except (BaseError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{root} can't be opened: {reason}") from error


def _client(endpoint: str = "https://") -> dict[str, Any]:
    return TIMEOUTS | {"allow_http": endpoint.startswith("http://")}


def _s3(bucket: str, retries: dict[str, Any]) -> ObjectStore:
    if os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true"):  # a public bucket
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
        return S3Store(bucket, client_options=_client(endpoint), retry_config=retries)
    # obstore reads no profiles. botocore is what the AWS command line finds credentials with.
    import botocore.exceptions
    import botocore.session

    try:
        session = botocore.session.Session()
        if "AWS_METADATA_SERVICE_NUM_ATTEMPTS" not in os.environ:
            session.set_config_variable("metadata_service_num_attempts", 3)
        credentials = session.get_credentials()
        if credentials is not None:
            credentials.get_frozen_credentials()  # fails here rather than inside obstore
        profile = session.get_scoped_config()
        region = os.environ.get("AWS_REGION") or session.get_config_variable("region")
    except botocore.exceptions.BotoCoreError as error:
        raise UserError(f"s3://{bucket} can't be opened: {error}") from error
    if credentials is None:
        raise UserError(
            f"no credentials were found for s3://{bucket}; set AWS_PROFILE, or AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY; for a public bucket, set AWS_SKIP_SIGNATURE=true"
        )
    config = {"region": region} if region else {}
    endpoint = (
        os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
        or profile.get("endpoint_url", "")
    )
    if endpoint:
        config["endpoint"] = endpoint
    return S3Store(
        bucket,
        config=config,
        client_options=_client(endpoint),
        retry_config=retries,
        credential_provider=_provider(credentials),
    )


def _provider(credentials: Any) -> Callable[[], dict[str, Any]]:
    """Returns a function that obstore calls for the keys, again before they expire."""

    def provide() -> dict[str, Any]:
        keys = credentials.get_frozen_credentials()
        return {
            "access_key_id": keys.access_key,
            "secret_access_key": keys.secret_key,
            "token": keys.token,
            "expires_at": datetime.now(UTC) + _LIFETIME,
        }

    return provide


def _gcs(bucket: str, retries: dict[str, Any]) -> ObjectStore:
    emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
    if not emulator:
        base = os.environ.get("GOOGLE_BASE_URL", "")
        return GCSStore(bucket, client_options=_client(base), retry_config=retries)
    if "://" not in emulator:
        emulator = f"http://{emulator}"
    # With a token, obstore doesn't ask Google for one.
    config = {"base_url": emulator.rstrip("/"), "bearer_token": "emulator"}
    return GCSStore(bucket, config=config, client_options=_client(emulator), retry_config=retries)


def _azure(container: str, retries: dict[str, Any]) -> ObjectStore:
    emulator = os.environ.get("AZURE_STORAGE_USE_EMULATOR", "").lower() in ("1", "true")
    endpoint = os.environ.get("AZURE_STORAGE_ENDPOINT", "http://" if emulator else "")
    named = any(os.environ.get(f"AZURE_STORAGE_{name}") for name in ("ACCOUNT", "ACCOUNT_NAME"))
    if not named and not emulator:
        raise UserError(f"az://{container} needs the name of an account: AZURE_STORAGE_ACCOUNT")
    config = {}
    if not emulator and (account := os.environ.get("AZURE_STORAGE_ACCOUNT")):
        config["account_name"] = account  # what Azure's command line reads; obstore: ACCOUNT_NAME
    if key := os.environ.get("AZURE_STORAGE_KEY"):
        config["account_key"] = key
    return AzureStore(
        container, config=config, client_options=_client(endpoint), retry_config=retries
    )


def _web(root: str, retries: dict[str, Any]) -> ObjectStore:
    return HTTPStore.from_url(root, client_options=_client(root), retry_config=retries)
