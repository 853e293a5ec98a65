"""Amazon S3 and S3-compatible services."""

# ruff: noqa: D102 - `Storage` documents the methods

import contextlib
import functools
import http.client
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, TypeVar

import boto3
import botocore.exceptions
from botocore.config import Config
from botocore.parsers import ResponseParserError

from pipeline.storage.limits import RequestLimits, limited_pools
from pipeline.storage.objects import (
    ABSENT,
    VERSION_CHANGED,
    VERSION_MISMATCH,
    ObjectChanged,
    ObjectInfo,
    ObjectNotFound,
    StorageError,
    bucket_not_found,
    check_listing,
    object_not_found,
    split_uri,
)
from pipeline.storage.ranges import RangeReader
from pipeline.storage.retrying import CONNECTION_ERRORS, TransientFailure, check_length, describe_error, retry

T = TypeVar("T")

# This module retries instead of boto3, which ignores incomplete bodies and does not count its retries.
_CONNECTION = (
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
    *CONNECTION_ERRORS,
)
_REJECTED = {
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
_DENIED = {"403", "AccessDenied", "AccountProblem", "AllAccessDisabled", "Forbidden"}
_BUSY = {"ConditionalRequestConflict", "OperationAborted", "RequestTimeout", "SlowDown", "Throttling"}
_BUSY |= {"ThrottlingException", "TooManyRequests", "RequestLimitExceeded", "BandwidthLimitExceeded"}
_ENTRY = {"Key", "ETag", "Size"}
# botocore accepts a response that is cut off in its head or directly after the head.
_IS_COMPLETE: dict[str, Callable[[dict[str, Any]], object]] = {
    "get_object": lambda response: _opaque_tag(response.get("ETag", "")),
    "head_object": lambda response: _opaque_tag(response.get("ETag", "")) and "ContentLength" in response,
    "list_objects_v2": lambda response: (
        len(response) > 1  # more than the ResponseMetadata
        and all(entry.keys() >= _ENTRY for entry in response.get("Contents", []))
    ),
    "put_object": lambda response: _opaque_tag(response.get("ETag", "")),
}


@functools.lru_cache(maxsize=8)
def make_client(
    endpoint_url: str | None,
    region: str | None,
    limits: RequestLimits,
    environment: tuple[tuple[str, str], ...],
    pid: int,
) -> Any:
    """Returns a client, one per process and set of AWS environment variables."""
    del pid
    variables = dict(environment)
    endpoint = endpoint_url or variables.get("AWS_ENDPOINT_URL_S3") or variables.get("AWS_ENDPOINT_URL")
    # Some S3-compatible services support neither virtual hosts nor AWS's newer checksums.
    checksums = "when_required" if endpoint else None
    config = Config(
        connect_timeout=min(10, limits.timeout_s),
        read_timeout=limits.timeout_s,
        max_pool_connections=32,
        tcp_keepalive=True,
        retries={"total_max_attempts": 1},
        s3={"addressing_style": "path"} if endpoint else None,
        request_checksum_calculation=checksums,
        response_checksum_validation=checksums,
    )
    session = boto3.session.Session()
    try:
        client = session.client("s3", endpoint_url=endpoint or None, region_name=region, config=config)
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise StorageError("s3://", f"cannot create the S3 client: {describe_error(error)}") from error
    pools = client._endpoint.http_session._pool_classes_by_scheme  # botocore has no public way
    pools.update(limited_pools(pools, limits))
    return client


class S3:
    """S3, accessed with a boto3 client."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def object_store_options(self) -> dict[str, str]:
        endpoint = str(self._client.meta.endpoint_url)
        try:
            credentials = boto3.session.Session().get_credentials()
            if credentials is None:
                raise botocore.exceptions.NoCredentialsError
            key = credentials.get_frozen_credentials()
        except botocore.exceptions.BotoCoreError as error:
            raise _unsent_error("s3://", error) from error
        is_default = re.fullmatch(r"https://s3(\.[a-z0-9-]+)?\.amazonaws\.com(\.cn)?", endpoint)
        options = {
            "endpoint_url": None if is_default else endpoint,
            "aws_endpoint_url_s3": None if is_default else endpoint,  # or the variable has precedence
            "allow_http": "true" if endpoint.startswith("http://") else None,
            "region": self._client.meta.region_name,
            "aws_access_key_id": key.access_key,
            "aws_secret_access_key": key.secret_key,
            "aws_session_token": key.token,
        }
        return {name: value for name, value in options.items() if value}

    def list(self, uri: str) -> Iterator[ObjectInfo]:
        key = split_uri(uri)[1]
        # Among the objects whose key starts with `key`, the object `key` itself comes first.
        first = self._page(uri, Prefix=key, MaxKeys=1)[0][:1] if key else []
        is_object = [info.uri for info in first] == [uri]
        for info in first if is_object else self._listing(uri):
            if not info.uri.endswith("/"):
                yield info

    def list_folders(self, uri: str) -> Iterator[str]:
        for entry in self._listing(uri, Delimiter="/"):
            if isinstance(entry, str):
                yield entry.rstrip("/")

    def _listing(self, uri: str, **request: str) -> Iterator[Any]:
        key = split_uri(uri)[1]
        request["Prefix"] = f"{key}/" if key else ""

        def fetch(token: str | None) -> tuple[Sequence[Any], str | None]:
            return self._page(uri, **request, **({"ContinuationToken": token} if token else {}))

        return check_listing(uri, fetch)

    def _page(self, uri: str, **request: Any) -> tuple[Sequence[Any], str | None]:
        bucket = split_uri(uri)[0]
        page = self._call(uri, "list_objects_v2", Bucket=bucket, **request)
        token = page.get("NextContinuationToken", "") if page.get("IsTruncated") else None
        found, folders = page.get("Contents", []), page.get("CommonPrefixes", [])
        folders = [f"s3://{bucket}/{x.get('Prefix')}" for x in folders if "Delimiter" in request]
        return [_info(f"s3://{bucket}/{x['Key']}", x["ETag"], x["Size"]) for x in found] + folders, token

    def stat(self, uri: str) -> ObjectInfo:
        bucket, key = split_uri(uri)
        try:
            head = self._call(uri, "head_object", Bucket=bucket, Key=key)
        except ObjectNotFound:
            # The response to HEAD has no body: only a listing distinguishes a missing bucket.
            self._call(uri, "list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)
            raise
        return _info(uri, head["ETag"], head["ContentLength"])

    def open(self, info: ObjectInfo) -> RangeReader:
        bucket, key = split_uri(info.uri)

        def fetch(start: int, stop: int) -> bytes:
            part = {"Range": f"bytes={start}-{stop - 1}"} if stop > start else {}

            def attempt() -> bytes:
                response = self._complete("get_object", Bucket=bucket, Key=key, **part)
                with response["Body"] as body:
                    served, size = response.get("ContentRange"), response.get("ContentLength", 0)
                    if served is not None:
                        served, _, size = served.rpartition("/")
                    # Not If-Match, which never matches a weak ETag.
                    if _info(info.uri, response["ETag"], size).version != info.version:
                        raise ObjectChanged(info.uri, VERSION_CHANGED)
                    if served not in (None, f"bytes {start}-{stop - 1}"):
                        raise http.client.HTTPException(f"asked for bytes {start}-{stop - 1}, got {served}")
                    return check_length(body.read(stop - start + 1), stop - start)

            return self._request(info.uri, attempt)

        if not info.size:
            fetch(0, 0)  # the only check that the object is empty
        return RangeReader(info, fetch)

    def write(self, uri: str, data: BinaryIO, expected: str | None) -> ObjectInfo:
        bucket, key = split_uri(uri)
        condition = {"IfNoneMatch": "*"} if expected == ABSENT else _if_match(expected)
        try:
            response = self._call(uri, "put_object", Bucket=bucket, Key=key, Body=data, **condition)
        except (ObjectChanged, ObjectNotFound) as error:
            if isinstance(error, ObjectNotFound) and expected in (None, ABSENT):
                raise
            raise ObjectChanged(uri, VERSION_MISMATCH) from None
        return _info(uri, response["ETag"], data.seek(0, os.SEEK_END))

    def delete(self, uri: str, expected: str | None) -> None:
        bucket, key = split_uri(uri)
        with contextlib.suppress(ObjectNotFound):
            try:
                self._call(uri, "delete_object", Bucket=bucket, Key=key, **_if_match(expected))
            except ObjectChanged:
                self.stat(uri)
                raise ObjectChanged(uri, VERSION_MISMATCH) from None

    def _call(self, uri: str, operation: str, **request: Any) -> Any:
        def attempt() -> Any:
            if "Body" in request:
                request["Body"].seek(0)
            return self._complete(operation, **request)

        # A listing is the first request of a job, and should fail soon if the endpoint is wrong.
        return self._request(uri, attempt, fail_soon="list" in operation)

    def _complete(self, operation: str, **request: Any) -> Any:
        """Returns the response of an operation; raises `HTTPException` if the response is malformed."""
        try:
            response = getattr(self._client, operation)(**request)
            if operation in _IS_COMPLETE and not _IS_COMPLETE[operation](response):
                raise http.client.IncompleteRead(b"")
        except UnicodeEncodeError as error:
            raise StorageError(f"s3://{request['Bucket']}", f"{error.object!r} is not valid UTF-8") from error
        except (KeyError, TypeError, ValueError, ResponseParserError) as error:
            raise http.client.HTTPException(f"malformed response: {error}") from error
        return response

    def _request(self, uri: str, action: Callable[[], T], fail_soon: bool = False) -> T:
        """Makes one request, with retries; raises a permanent failure as `StorageError`."""
        try:
            return retry(action, functools.partial(_transient, fail_soon=fail_soon))
        except botocore.exceptions.ClientError as error:
            raise _service_error(uri, error) from error
        except botocore.exceptions.ConnectionError as error:
            cause = f"cannot reach the endpoint {self._client.meta.endpoint_url}: {describe_error(error)}"
            raise StorageError(uri, cause) from error
        except _CONNECTION as error:
            if _is_unsendable(error):  # the message contains credentials, or the password of a proxy
                cause = "cannot send a request; check the address of the proxy"
                if "Invalid header" in str(error):
                    cause = "cannot send a request; the AWS credentials contain a line break"
                raise StorageError(uri, cause) from None
            raise StorageError(uri, f"failed after retries, last with {describe_error(error)}") from error
        except botocore.exceptions.BotoCoreError as error:
            raise _unsent_error(uri, error) from error


def _unsent_error(uri: str, error: botocore.exceptions.BotoCoreError) -> StorageError:
    """Returns the error of a request that was not sent, for example because of an invalid bucket name."""
    cause = describe_error(error)
    if isinstance(error, botocore.exceptions.NoCredentialsError):
        hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or an instance role"
        cause = f"no usable AWS credentials: {hint}"
    return StorageError(uri, cause)


def _transient(error: Exception, fail_soon: bool) -> TransientFailure | None:
    if isinstance(error, botocore.exceptions.ClientError):
        code, status = _code(error)
        if code in _BUSY or status == 429 or ((status or 0) >= 500 and code != "NotImplemented"):
            return TransientFailure(code)
        # A busy service sometimes denies access. A real denial should be reported soon.
        return TransientFailure(code, attempts=4) if code in _DENIED else None
    if isinstance(error, _CONNECTION) and not _is_unsendable(error):
        return TransientFailure(type(error).__name__, attempts=5 if fail_soon else 10)
    return None


def _is_unsendable(error: Exception) -> bool:
    """Returns whether the request was not sent: an invalid header, or an invalid proxy address."""
    cause = error.kwargs.get("error") if isinstance(error, botocore.exceptions.HTTPClientError) else None
    return isinstance(cause, ValueError)


def _code(error: botocore.exceptions.ClientError) -> tuple[str, int | None]:
    """Returns the service's error code and the HTTP status."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    return code, error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")


def _opaque_tag(etag: str) -> str:
    """Returns an ETag without quotes and the prefix of weak ETags, which compressing proxies make."""
    return etag.removeprefix("W/").strip('"')


def _info(uri: str, etag: str, size: int) -> ObjectInfo:
    return ObjectInfo(uri, size, f"{_opaque_tag(etag)}-{size}")


def _if_match(version: str | None) -> dict[str, str]:
    return {} if version is None else {"IfMatch": '"' + version.rpartition("-")[0] + '"'}


def _service_error(uri: str, error: botocore.exceptions.ClientError) -> StorageError:
    """Returns the error of a request that the service refused."""
    code, status = _code(error)
    message = str(error.response.get("Error", {}).get("Message", "")) or code
    if code == "NoSuchBucket":
        return bucket_not_found(uri)
    if code in {"404", "NoSuchKey", "NotFound"}:
        return object_not_found(uri)
    if code in {"412", "PreconditionFailed", "416", "InvalidRange"}:
        return ObjectChanged(uri, VERSION_CHANGED)
    if code == "NotImplemented":
        message += "; for a store without conditional writes, see storage.conditional_writes"
    elif code in _REJECTED:
        message = f"the credentials were rejected: {message}"
    elif code in _DENIED:
        message = f"access denied: {message}"
    elif status in {301, 307, 400} and code in {"301", "307", "400", "PermanentRedirect"}:
        message = f"the bucket is in another region (set storage.region): {message}"
    return StorageError(uri, f"{message} ({code})")
