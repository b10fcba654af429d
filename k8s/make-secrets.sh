#!/bin/sh
# Prints the Secrets that k8s/ refers to, for `kubectl apply -f -`. Every run draws new passwords for the runtime roles. To
# rotate them, run it again, delete the Job espalier-migrate, apply the overlay and restart the processes.
#
#   OWNER_URL=postgresql://owner:...@db.example.com:5432/espalier?sslmode=require REDIS_URL=rediss://:...@redis.example.com:6379/0 \
#       S3_ACCESS_KEY=... S3_SECRET_KEY=... k8s/make-secrets.sh | kubectl apply -f -
#   k8s/make-secrets.sh --dev | kubectl apply -f -    # for the servers of the overlay dev: everything is drawn
#
# The overlay keda-metrics-api needs one more Secret. Printing it does not change the passwords:
#   OPERATOR_KEY=esp_oper_... k8s/make-secrets.sh --operator-key | kubectl apply -f -
# `espalier operators create keda --read-only` makes that key.
#
# No secret is an argument of a program, where every user of the machine could read it. Only shell builtins see them.
set -eu

fail() { printf 'make-secrets.sh: %s\n' "$1" >&2; exit 1; }

# Hexadecimal, so that a password needs no escaping in a URL.
draw() { od -An -tx1 -N24 /dev/urandom | tr -d ' \n'; }

quoted() { # VALUE: as YAML wants it between single quotes
    rest=$1
    while [ "${rest#*\'}" != "$rest" ]; do
        printf "%s''" "${rest%%\'*}"
        rest=${rest#*\'}
    done
    printf %s "$rest"
}

secret() { # NAME KEY VALUE [KEY VALUE]...
    printf -- '---\napiVersion: v1\nkind: Secret\nmetadata:\n  name: %s\n  namespace: espalier\nstringData:\n' "$1"
    shift
    while [ $# -gt 1 ]; do
        printf "  %s: '%s'\n" "$1" "$(quoted "$2")"
        shift 2
    done
}

check_owner_url() { # With no login to replace, or with another one behind it, every role would log in as the owner.
    place=${OWNER_URL#*://}
    case "${place%%[/?#]*}" in
        *@*@*) ;;
        [!:]*:?*@?*) case "$OWNER_URL" in
            *[?\&]user=* | *[?\&]password=*) ;;
            *://*) return ;;
        esac ;;
    esac
    fail 'OWNER_URL must be postgresql://LOGIN:PASSWORD@HOST/DATABASE, other characters than letters and digits percent-encoded.'
}

role_url() { # ROLE PASSWORD: the owner's URL with another login
    printf '%s://%s:%s@%s' "${OWNER_URL%%://*}" "$1" "$2" "${OWNER_URL#*@}"
}

case "${1:-}" in
    --operator-key)
        : "${OPERATOR_KEY:?the key that espalier operators create has printed}"
        secret espalier-operator-key operator-key "$OPERATOR_KEY"
        exit ;;
    --dev)
        postgres_password=$(draw) redis_password=$(draw)
        OWNER_URL="postgresql://espalier:$postgres_password@espalier-dev-postgresql:5432/espalier"
        REDIS_URL="redis://:$redis_password@espalier-dev-redis:6379/0"
        S3_ACCESS_KEY=espalier S3_SECRET_KEY=$(draw) ;;
    '') ;;
    *) fail "unknown argument: give none, --dev or --operator-key (with the key in OPERATOR_KEY)." ;;
esac
[ -z "${OPERATOR_KEY:-}" ] || fail 'OPERATOR_KEY goes with --operator-key; without it every password is drawn anew.'
: "${OWNER_URL:?the URL of the database owner}" "${REDIS_URL:?}" "${S3_ACCESS_KEY:?}" "${S3_SECRET_KEY:?}"
check_owner_url

[ "${1:-}" != --dev ] ||
    secret espalier-dev-servers postgres-password "$postgres_password" redis-password "$redis_password"
api=$(draw) schedule=$(draw) worker=$(draw) scaler=$(draw)
secret espalier-owner owner-database-url "$OWNER_URL" \
    api-password "$api" schedule-password "$schedule" worker-password "$worker" scaler-password "$scaler"
secret espalier-api database-url "$(role_url espalier_api "$api")" redis-url "$REDIS_URL"
secret espalier-schedule database-url "$(role_url espalier_schedule "$schedule")" redis-url "$REDIS_URL"
secret espalier-worker database-url "$(role_url espalier_worker "$worker")" redis-url "$REDIS_URL"
secret espalier-s3 s3-access-key "$S3_ACCESS_KEY" s3-secret-key "$S3_SECRET_KEY"
secret espalier-scaler connection "$(role_url espalier_scaler "$scaler")"
