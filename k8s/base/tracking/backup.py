"""Between the folder of a dump and the object store: `backup.py upload FILE`, `backup.py download FILE`.

The bucket is BACKUP_BUCKET, the prefix BACKUP_PREFIX; `download` takes the object BACKUP_NAME, or the newest. boto3 reads the rest (keys,
region, AWS_ENDPOINT_URL) from the environment.
"""

import os
import sys
import time

import boto3


def main() -> None:
    """Moves the dump and says what was moved."""
    action, file = sys.argv[1:]
    bucket, prefix = os.environ["BACKUP_BUCKET"], os.environ["BACKUP_PREFIX"]
    store = boto3.client("s3")
    if action == "upload":
        name = f"{prefix}/{time.strftime('%Y-%m-%dT%H%M%SZ', time.gmtime())}.dump"
        store.upload_file(file, bucket, name)
    elif action == "download":
        name = os.environ.get("BACKUP_NAME") or _newest(store, bucket, prefix)
        store.download_file(bucket, name, file)
    else:
        sys.exit(f"{action}: expected upload or download")
    print(f"{action}: s3://{bucket}/{name}, {os.path.getsize(file)} bytes")


def _newest(store, bucket: str, prefix: str) -> str:
    pages = store.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    names = [each["Key"] for page in pages for each in page.get("Contents", []) if each["Key"].endswith(".dump")]
    return max(names) if names else sys.exit(f"s3://{bucket}/{prefix}/: no dump there")


if __name__ == "__main__":
    main()
