"""Plain reading from S3 or anything that speaks its protocol; the endpoint and keys come from boto3's usual chain."""

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cbd.errors import DataError, EnvironmentFault


@dataclass(slots=True)
class Store:
    """The objects below one prefix of a bucket."""

    client: Any
    bucket: str
    prefix: str
    told: str
    """What to call it in errors."""
    keys: dict[str, str] = field(default_factory=dict)
    """Path below the prefix: key, of everything listed."""

    def list(self) -> list[tuple[str, int]]:
        """Path below the prefix and bytes of every object; folder markers are no objects. The prefix itself may be one object."""
        found = []
        with _faults(self):
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix):
                for item in page.get("Contents", ()):
                    path = self._path(item["Key"])
                    if path and not (path.endswith("/") and item["Size"] == 0):
                        self.keys[path] = item["Key"]
                        found.append((path, int(item["Size"])))
        if not found:
            raise DataError(f"{self.told}: no objects there; check the bucket and prefix")
        return found

    def read(self, path: str) -> bytes:
        """The whole of a listed object."""
        with _faults(self):
            data: bytes = self.client.get_object(Bucket=self.bucket, Key=self.keys[path])["Body"].read()
            return data

    def download(self, path: str, folder: Path) -> Path:
        """Where in `folder` a listed object now lies, under a name of ours."""
        target = folder / uuid.uuid4().hex
        with _faults(self):
            self.client.download_file(self.bucket, self.keys[path], str(target))
        return target

    def _path(self, key: str) -> str | None:
        if key == self.prefix:
            return key.rpartition("/")[2]
        below = f"{self.prefix}/" if self.prefix else ""
        return key[len(below) :] if key.startswith(below) else None


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
def _faults(store: Store) -> Iterator[None]:
    """Turns what boto3 raises into one line."""
    from boto3.exceptions import Boto3Error
    from botocore import exceptions

    try:
        yield
    except exceptions.ClientError as error:
        raise _refused_by_server(store, error) from None
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.ProfileNotFound):
        raise EnvironmentFault(f"{store.told}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile") from None
    except exceptions.ParamValidationError:
        raise DataError(f"{store.told}: {store.bucket!r} is no valid bucket name; write s3://bucket/prefix") from None
    except (exceptions.BotoCoreError, Boto3Error, ValueError) as error:
        text = " ".join(str(error).split())[:160]
        raise EnvironmentFault(f"{store.told}: object store out of reach: {text}; check AWS_ENDPOINT_URL and the network") from None


def _refused_by_server(store: Store, error: Any) -> DataError | EnvironmentFault:
    code = str(error.response.get("Error", {}).get("Code", "unknown"))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if code == "NoSuchBucket":
        return DataError(f"{store.told}: there is no bucket {store.bucket!r}; check the address and AWS_ENDPOINT_URL")
    if code in ("NoSuchKey", "404") or status == 404:
        return DataError(f"{store.told}: an object vanished while it was read ({code}); deliver it again")
    if status in (401, 403):
        return EnvironmentFault(f"{store.told}: the object store refuses these credentials ({code}); check the keys and their rights")
    return EnvironmentFault(f"{store.told}: the object store answers {code} (HTTP {status}); try again later")
