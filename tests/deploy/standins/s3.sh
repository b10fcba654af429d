#!/bin/sh
# SeaweedFS, told by the variables and the port that MinIO is told by.
set -eu
AWS_ACCESS_KEY_ID="$(cat "$MINIO_ROOT_USER_FILE")"
AWS_SECRET_ACCESS_KEY="$(cat "$MINIO_ROOT_PASSWORD_FILE")"
export AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY GOMEMLIMIT=400MiB TMPDIR=/data
cd /data
exec weed mini -dir=/data -ip=127.0.0.1 -ip.bind=0.0.0.0 -s3.port=9000 -master.telemetry=false \
    -admin.ui=false -webdav=false -volume.preStopSeconds=0 -s3.port.iceberg=0 -s3.port.lance=0 \
    -s3.allowDeleteBucketNotEmpty=false -s3.autoCreateBucket=false -s3.allowedOrigins=
