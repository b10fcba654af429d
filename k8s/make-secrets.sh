#!/bin/sh
# Prints the Secrets that k8s/ refers to, for `kubectl apply -f -`. Every run draws new passwords for the runtime roles: run
# it again, delete the Job espalier-migrate, apply the overlay and restart the processes, and they are rotated.
#
#   OWNER_URL=postgresql://owner:...@db.example.com:5432/espalier?sslmode=require REDIS_URL=rediss://:...@redis.example.com:6379/0 \
#       S3_ACCESS_KEY=... S3_SECRET_KEY=... k8s/make-secrets.sh | kubectl apply -f -
#   k8s/make-secrets.sh --dev | kubectl apply -f -    # for the servers of the overlay dev: everything is drawn
#
# OPERATOR_KEY=esp_oper_... (of `espalier operators create keda --read-only`) adds what the overlay keda-metrics-api needs.
# Passwords in URLs are hexadecimal: nothing to quote.
set -eu

draw() { od -An -tx1 -N24 /dev/urandom | tr -d ' \n'; }

secret() { # NAME KEY VALUE [KEY VALUE]...
    printf -- '---\napiVersion: v1\nkind: Secret\nmetadata:\n  name: %s\n  namespace: espalier\nstringData:\n' "$1"
    shift
    while [ $# -gt 1 ]; do
        printf "  %s: '%s'\n" "$1" "$(printf %s "$2" | sed "s/'/''/g")"
        shift 2
    done
}

role_url() { # ROLE PASSWORD: the owner's URL with another login
    printf %s "$OWNER_URL" | sed "s#://[^@/]*@#://$1:$2@#"
}

if [ "${1:-}" = --dev ]; then
    postgres_password=$(draw) redis_password=$(draw)
    OWNER_URL="postgresql://espalier:$postgres_password@espalier-dev-postgresql:5432/espalier"
    REDIS_URL="redis://:$redis_password@espalier-dev-redis:6379/0"
    S3_ACCESS_KEY=espalier S3_SECRET_KEY=$(draw)
    secret espalier-dev-servers postgres-password "$postgres_password" redis-password "$redis_password"
fi
: "${OWNER_URL:?the URL of the database's owner}" "${REDIS_URL:?}" "${S3_ACCESS_KEY:?}" "${S3_SECRET_KEY:?}"

api=$(draw) schedule=$(draw) worker=$(draw) scaler=$(draw)
secret espalier-owner owner-database-url "$OWNER_URL" \
    api-password "$api" schedule-password "$schedule" worker-password "$worker" scaler-password "$scaler"
secret espalier-api database-url "$(role_url espalier_api "$api")" redis-url "$REDIS_URL"
secret espalier-schedule database-url "$(role_url espalier_schedule "$schedule")" redis-url "$REDIS_URL"
secret espalier-worker database-url "$(role_url espalier_worker "$worker")" redis-url "$REDIS_URL"
secret espalier-s3 s3-access-key "$S3_ACCESS_KEY" s3-secret-key "$S3_SECRET_KEY"
secret espalier-scaler connection "$(role_url espalier_scaler "$scaler")" operator-key "${OPERATOR_KEY:-}"
