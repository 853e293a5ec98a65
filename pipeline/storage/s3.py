"""Amazon S3 and S3-compatible services."""

# ruff: noqa: D102 - `Storage` documents the methods

import http.client
import os
from typing import BinaryIO

import boto3
from botocore import UNSIGNED, exceptions
from botocore.config import Config
from botocore.parsers import ResponseParserError

from pipeline.storage.buckets import (
    ATTEMPTS,
    MISSING_FIELD,
    Buckets,
    Page,
    access_denied,
    bucket_not_found,
    malformed_response,
    split_uri,
)
from pipeline.storage.limits import KEPT_CONNECTIONS, RequestLimits, limited_pools
from pipeline.storage.objects import ABSENT, ObjectChanged, ObjectInfo, ObjectNotFound, StorageError
from pipeline.storage.retrying import CONNECTION_ERRORS, Failure, describe_error

_PAYER = {"x-amz-request-payer": "requester"}
# botocore accepts a response that is cut off in its head or directly after the head, so fields are missing.
_MALFORMED = (*MISSING_FIELD, ValueError, ResponseParserError)
# This module retries instead of boto3, which ignores incomplete bodies and does not count its retries.
_CONNECTION = (exceptions.HTTPClientError, exceptions.IncompleteReadError, *CONNECTION_ERRORS)
_NOT_FOUND = {"404", "NoSuchKey", "NotFound"}
_CHANGED = {"412", "PreconditionFailed", "416", "InvalidRange"}
_REJECTED = {"AuthorizationHeaderMalformed", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken"}
_REJECTED |= {"RequestTimeTooSkewed", "SignatureDoesNotMatch", "TokenRefreshRequired"}
_DENIED = {"403", "AccessDenied", "AccountProblem", "AllAccessDisabled", "Forbidden"}
_OTHER_REGION = {"301", "307", "400", "PermanentRedirect"}
_BUSY = {"ConditionalRequestConflict", "OperationAborted", "RequestTimeout", "SlowDown", "Throttling"}


def connect(  # noqa: D103
    limits: RequestLimits, endpoint_url: str | None, region: str | None, anonymous: bool, requester_pays: bool
) -> "S3":
    endpoint = endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    # Some S3-compatible services support neither virtual hosts nor AWS's newer checksums.
    checksums = "when_required" if endpoint else None
    config = Config(
        signature_version=UNSIGNED if anonymous else None,
        connect_timeout=min(10, limits.timeout_s),
        max_pool_connections=KEPT_CONNECTIONS,
        retries={"total_max_attempts": 1},
        s3={"addressing_style": "path"} if endpoint else None,
        request_checksum_calculation=checksums,
        response_checksum_validation=checksums,
    )
    session = boto3.session.Session()
    try:
        client = session.client("s3", endpoint_url=endpoint or None, region_name=region, config=config)
    except (exceptions.BotoCoreError, ValueError) as error:
        raise StorageError("s3://", f"cannot create the S3 client: {describe_error(error)}") from error
    pools = client._endpoint.http_session._pool_classes_by_scheme  # botocore has no public way
    pools.update(limited_pools(pools, limits))
    if requester_pays:  # a header of every kind of request, which is signed
        client.meta.events.register("before-call.s3", lambda params, **_: params["headers"].update(_PAYER))
    return S3(client, anonymous, requester_pays)


class S3(Buckets):
    """S3, accessed with a boto3 client."""

    def object_store_options(self) -> dict[str, str]:
        endpoint = str(self._client.meta.endpoint_url)
        options = {
            "endpoint_url": endpoint,
            "aws_endpoint_url_s3": endpoint,  # or the variable has precedence
            "allow_http": "true" if endpoint.startswith("http://") else None,
            "region": self._client.meta.region_name,
            "aws_request_payer": "true" if self._requester_pays else None,
            "aws_skip_signature": "true" if self._anonymous else None,
        }
        if not self._anonymous:
            try:
                credentials = boto3.session.Session().get_credentials()
                if credentials is None:
                    raise exceptions.NoCredentialsError
                key = credentials.get_frozen_credentials()
            except exceptions.BotoCoreError as error:
                raise self._explain("s3://", error, 1).error from error
            options["aws_access_key_id"], options["aws_secret_access_key"] = key.access_key, key.secret_key
            options["aws_session_token"] = key.token
        return {name: value for name, value in options.items() if value}

    def _page(self, start: str, delimiter: str, token: str | None, limit: int | None) -> Page:
        bucket, prefix = split_uri(start)
        options = {"Delimiter": delimiter, "ContinuationToken": token, "MaxKeys": limit}
        page = self._client.list_objects_v2(
            Bucket=bucket, Prefix=prefix, **{name: value for name, value in options.items() if value}
        )
        return Page(
            [_info(f"s3://{bucket}/{x['Key']}", x["ETag"], x["Size"]) for x in page.get("Contents", [])],
            [f"s3://{bucket}/{x['Prefix']}" for x in page.get("CommonPrefixes", []) if delimiter],
            page.get("NextContinuationToken", "") if page["IsTruncated"] else None,
        )

    def _head(self, uri: str) -> ObjectInfo:
        head = self._client.head_object(**_object(uri))
        return _info(uri, head["ETag"], head["ContentLength"])

    def _get(self, info: ObjectInfo, start: int, stop: int) -> bytes:
        part = {"Range": f"bytes={start}-{stop - 1}"} if stop else {}
        response = self._client.get_object(**_object(info.uri), **part)
        with response["Body"] as body:
            content_range = response.get("ContentRange", f"/{response.get('ContentLength')}")
            served, _, size = content_range.rpartition("/")
            # Not If-Match, which never matches a weak ETag.
            if _info(info.uri, response["ETag"], size).version != info.version:
                raise ObjectChanged(info.uri)
            if served not in ("", f"bytes {start}-{stop - 1}"):
                raise http.client.HTTPException(f"asked for bytes {start}-{stop - 1}, got {served}")
            return bytes(body.read(stop - start + 1))

    def _put(self, uri: str, data: BinaryIO, expected: str | None) -> ObjectInfo:
        condition = {"IfNoneMatch": "*"} if expected == ABSENT else _if_match(expected)
        data.seek(0)
        response = self._client.put_object(**_object(uri), Body=data, **condition)
        return _info(uri, response["ETag"], data.seek(0, os.SEEK_END))

    def _delete(self, uri: str, expected: str | None) -> None:
        self._client.delete_object(**_object(uri), **_if_match(expected))

    def _explain(self, uri: str, error: Exception, attempts: int) -> Failure:
        def failure(cause: str, attempts: int = attempts) -> Failure:
            return Failure(StorageError(uri, cause), attempts, type(error).__name__)

        if isinstance(error, exceptions.ClientError):
            return _explain_response(uri, error)
        if isinstance(error, exceptions.NoCredentialsError):
            hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, an instance role"
            return failure(f"no usable AWS credentials: {hint}, or storage.anonymous for a public bucket", 1)
        source = error.kwargs.get("error") if isinstance(error, exceptions.HTTPClientError) else None
        if isinstance(source, ValueError):  # not sent; the message contains credentials
            if "Invalid header" in str(error):
                return failure("cannot send a request; the AWS credentials contain a line break", 1)
            return failure("cannot send a request; check the address of the proxy", 1)
        if isinstance(error, exceptions.ConnectionError):
            endpoint = self._client.meta.endpoint_url
            return failure(f"cannot reach the endpoint {endpoint}: {describe_error(error)}")
        if isinstance(error, _MALFORMED):
            return malformed_response(uri, error, attempts)
        if isinstance(error, _CONNECTION):
            return failure(f"failed after retries, last with {describe_error(error)}")
        if isinstance(error, exceptions.BotoCoreError):
            return failure(describe_error(error), 1)
        raise error


def _explain_response(uri: str, error: exceptions.ClientError) -> Failure:
    """Explains a request that the service refused."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    message = str(error.response.get("Error", {}).get("Message", "")) or code
    attempts = 1
    if code == "NoSuchBucket":
        return Failure(bucket_not_found(uri))
    if code in _NOT_FOUND:
        return Failure(ObjectNotFound(uri, "no such object"))
    if code in _CHANGED:
        return Failure(ObjectChanged(uri))
    if code == "NotImplemented":
        message += "; for a store without conditional writes, see storage.conditional_writes"
    elif code in _REJECTED:
        message = f"the credentials were rejected: {message}"
    elif code in _DENIED:
        return access_denied(uri, f"{message} ({code})", code)
    elif code in _OTHER_REGION:
        message = f"the bucket is in another region (set storage.region): {message}"
    elif code in _BUSY or status == 429 or status >= 500:
        attempts = ATTEMPTS  # a listing too: the endpoint answers
    return Failure(StorageError(uri, f"{message} ({code})"), attempts, code)


def _object(uri: str) -> dict[str, str]:
    bucket, key = split_uri(uri)
    return {"Bucket": bucket, "Key": key}


def _info(uri: str, etag: str, size: int | str) -> ObjectInfo:
    tag = etag.removeprefix("W/").strip('"')  # compressing proxies make weak ETags
    if not tag:
        raise ValueError("the ETag is empty")
    return ObjectInfo(uri, int(size), f"{tag}-{size}")


def _if_match(version: str | None) -> dict[str, str]:
    return {} if version is None else {"IfMatch": '"' + version.rpartition("-")[0] + '"'}
