"""S3 or anything that speaks its protocol: read, put once, taken away; the endpoint and keys come from boto3's usual chain.

What is read is what was listed: every request carries the listed ETag, so that an object that changed in between is an error.
"""

import contextlib
import functools
import hashlib
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cbd.errors import DataError, EnvironmentFault
from components.parallel import Item, Result, in_order
from components.rawfiles import printable

ATTEMPTS = 3
"""At reading the body of an object; botocore repeats requests, but not a body that breaks off."""
WORKERS = 8
"""Objects that are read at the same time, and parts of a large one."""
_PLAIN_ETAG = re.compile(r'"([0-9a-f]{32})"')
"""The MD5 of the object; of an upload in parts the ETag is something else."""


class StoredObject(NamedTuple):
    """An object as it was listed."""

    key: str
    num_bytes: int
    etag: str


@dataclass(slots=True)
class Store:
    """The objects below one prefix of a bucket."""

    client: Any
    bucket: str
    prefix: str
    told: str
    """What to call it in errors."""
    objects: dict[str, StoredObject] = field(default_factory=dict)
    """By path below the prefix, everything listed."""

    def list(self) -> list[tuple[str, int]]:
        """Path below the prefix and bytes of every object; folder markers are no objects. The prefix itself may be one object."""
        found = [(path, listed.num_bytes) for path, listed in self.find()]
        if not found:
            raise DataError(f"{self.told}: no objects there; check the bucket and prefix")
        return found

    def find(self) -> Iterator[tuple[str, StoredObject]]:
        """As `list`, in the order of their names, page by page; there may be none."""
        with _faults(self):
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix):
                for item in page.get("Contents", ()):
                    path = self._path(item["Key"])
                    if path and not (path.endswith("/") and item["Size"] == 0):
                        self.objects[path] = StoredObject(item["Key"], int(item["Size"]), item["ETag"])
                        yield path, self.objects[path]

    def read(self, path: str) -> bytes:
        """The whole of a listed object, checked against its listed size and MD5; a body that breaks off is read again.

        Raises:
            DataError: the object changed since it was listed, or vanished.
            EnvironmentFault: the store is out of reach, or delivers other bytes than it lists.
        """
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        listed = self.objects[path]
        with _faults(self, path):
            for left in reversed(range(ATTEMPTS)):
                try:
                    response = self.client.get_object(Bucket=self.bucket, Key=listed.key, IfMatch=listed.etag)
                    data: bytes = response["Body"].read()
                except (HTTPClientError, IncompleteReadError):
                    if not left:
                        raise
                else:
                    break
        self._check(path, hashlib.md5(data, usedforsecurity=False).hexdigest(), len(data), response.get("ServerSideEncryption"))
        return data

    def download(self, path: str, folder: Path) -> Path:
        """Where in `folder` a listed object now lies, under a name of ours, checked as `read` does; a large one is read in parts at once.

        Raises:
            DataError, EnvironmentFault: as `read`.
        """
        from s3transfer.manager import TransferConfig, TransferManager

        target, listed = folder / uuid.uuid4().hex, self.objects[path]
        with _faults(self, path), TransferManager(self.client, TransferConfig(max_request_concurrency=WORKERS)) as manager:
            manager.download(self.bucket, listed.key, str(target), subscribers=[_AsListed(listed)]).result()
            about = self.client.head_object(Bucket=self.bucket, Key=listed.key, IfMatch=listed.etag)
        with target.open("rb") as file:
            md5 = hashlib.file_digest(file, functools.partial(hashlib.md5, usedforsecurity=False)).hexdigest()
        self._check(path, md5, target.stat().st_size, about.get("ServerSideEncryption"))
        return target

    def get(self, path: str) -> bytes | None:
        """The bytes of an object below the prefix, as the store delivers them; None if there is none of that name.

        Raises:
            EnvironmentFault: the store is out of reach, or refuses.
        """
        with _faults(self, path):
            try:
                data: bytes = self.client.get_object(**self._place(path))["Body"].read()
            except self.client.exceptions.NoSuchKey:
                return None
        return data

    def delete(self, path: str) -> None:
        """Takes away an object below the prefix, if there is one of that name.

        Raises:
            EnvironmentFault: the store is out of reach, or refuses.
        """
        with _faults(self, path):
            self.client.delete_object(**self._place(path))

    def put_once(self, path: str, data: bytes) -> bool:
        """Whether the object below the prefix is this one, which is written unless there is one of that name (If-None-Match: *).

        A bucket with object lock keeps it for its own time. A request whose answer was lost is repeated: then the object that
        stands in the way is our own, which its bytes tell.

        Raises:
            EnvironmentFault: the store is out of reach, or refuses.
        """
        return self._put_new(path, data) or self.get(path) == data

    def check_conditions(self, path: str) -> None:
        """Raises EnvironmentFault if the server puts over what is there although it is told not to, which some do in a versioned bucket."""
        if self._put_new(path, b"") and self._put_new(path, b""):
            raise EnvironmentFault(
                f"{self.told}: the object store ignores `If-None-Match: *` in bucket {self.bucket!r}, and two writers would replace each "
                "other's objects; use a bucket without versioning and object lock, or a server that knows conditional writes there"
            )

    def _put_new(self, path: str, data: bytes) -> bool:
        """Writes an object unless there is one of that name, and says whether it did."""
        from botocore.exceptions import ClientError

        with _faults(self, path):
            try:
                self.client.put_object(**self._place(path), Body=data, IfNoneMatch="*")
            except ClientError as error:
                if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") not in (409, 412):
                    raise
                return False
        return True

    def _place(self, path: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": f"{self.prefix}/{path}" if self.prefix else path}

    def read_versions(self) -> Mapping[str, Sequence[bytes]]:
        """By path below the prefix, the bytes of every version of every object; also of those that a delete marker hides.

        Raises:
            EnvironmentFault: the store is out of reach, or refuses.
        """
        found: dict[str, Any] = {}
        with _faults(self):
            for page in self.client.get_paginator("list_object_versions").paginate(Bucket=self.bucket, Prefix=f"{self.prefix}/"):
                for item in page.get("Versions", ()):
                    version = {} if item["VersionId"] == "null" else {"VersionId": item["VersionId"]}
                    body = self.client.get_object(Bucket=self.bucket, Key=item["Key"], **version)["Body"]
                    found.setdefault(self._path(item["Key"]) or "", []).append(body.read())
        return found

    def _check(self, path: str, md5: str, num_bytes: int, encryption: str | None) -> None:
        """Raises EnvironmentFault unless these bytes are the listed ones; the ETag of objects under a KMS key is no MD5."""
        listed = self.objects[path]
        plain = _PLAIN_ETAG.fullmatch(listed.etag) if encryption in (None, "AES256") else None
        if num_bytes != listed.num_bytes or (plain and plain[1] != md5):
            raise EnvironmentFault(_other_bytes(self.told, path))

    def _path(self, key: str) -> str | None:
        if key == self.prefix:
            return key.rpartition("/")[2]
        below = f"{self.prefix}/" if self.prefix else ""
        return key[len(below) :] if key.startswith(below) else None


class _AsListed:
    """Tells a download what was listed, so that it need not ask again and refuses anything else."""

    def __init__(self, listed: StoredObject) -> None:
        self.listed = listed

    def on_queued(self, future: Any, **_: Any) -> None:
        future.meta.provide_transfer_size(self.listed.num_bytes)
        future.meta.provide_object_etag(self.listed.etag)


def read_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of every item, in their order; a few calls ahead run in threads, and no more than that are held."""
    with ThreadPoolExecutor(WORKERS) as pool:
        for _, future in in_order(functools.partial(pool.submit, function), items, ahead=2 * WORKERS):
            yield future.result()


def _other_bytes(told: str, path: str) -> str:
    return f"{told}: {printable(path)!r}: the object store delivers other bytes than it lists; check the store"


def open_store(uri: str, *, told: str) -> Store:
    """The store that `s3://bucket/prefix` names; nothing is fetched yet."""
    import boto3.session
    from botocore.config import Config

    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise DataError(f"{told}: no bucket in the address; write s3://bucket/prefix")
    settings = Config(connect_timeout=5, read_timeout=60, retries={"mode": "standard", "max_attempts": 3})
    store = Store(None, bucket, prefix.strip("/"), told)
    with _faults(store):
        return Store(boto3.session.Session().client("s3", config=settings), bucket, prefix.strip("/"), told)


@contextlib.contextmanager
def _faults(store: Store, path: str | None = None) -> Iterator[None]:
    """Turns what boto3 raises into one line; `path` is the object that is read."""
    from boto3.exceptions import Boto3Error
    from botocore import exceptions
    from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError

    try:
        yield
    except exceptions.ClientError as error:
        raise _refused_by_server(store, error, path) from None
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.ProfileNotFound):
        raise EnvironmentFault(f"{store.told}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile") from None
    except exceptions.ParamValidationError:
        raise DataError(f"{store.told}: {store.bucket!r} is no valid bucket name; write s3://bucket/prefix") from None
    except S3DownloadFailedError:
        raise DataError(f"{store.told}: {printable(path or '')!r} changed while it was read; deliver it again") from None
    except (exceptions.BotoCoreError, Boto3Error, RetriesExceededError, ValueError) as error:
        text = " ".join(str(error).split())[:160]
        raise EnvironmentFault(f"{store.told}: object store out of reach: {text}; check AWS_ENDPOINT_URL and the network") from None


def _refused_by_server(store: Store, error: Any, path: str | None) -> DataError | EnvironmentFault:
    code = str(error.response.get("Error", {}).get("Code", "unknown"))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if code == "NoSuchBucket":
        return DataError(f"{store.told}: there is no bucket {store.bucket!r}; check the address and AWS_ENDPOINT_URL")
    if code in ("NoSuchKey", "404") or status == 404:
        return DataError(f"{store.told}: {printable(path or '')!r} vanished while it was read ({code}); deliver it again")
    if code == "PreconditionFailed" or status == 412:
        return DataError(f"{store.told}: {printable(path or '')!r} changed while it was read; deliver it again")
    if status in (401, 403):
        return EnvironmentFault(f"{store.told}: the object store refuses these credentials ({code}); check the keys and their rights")
    return EnvironmentFault(f"{store.told}: the object store answers {code} (HTTP {status}); try again later")
