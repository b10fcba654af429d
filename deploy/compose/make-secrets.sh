#!/bin/sh
# Makes the secrets of docker-compose.yml, one file each, in the folder DIR (./secrets). Existing files are kept.
# Only its owner may enter the folder. Its files are readable for any user, because containers run as other users.
set -eu
DIR="${1:-secrets}"
mkdir -p "$DIR"
chmod 0700 "$DIR"

keep() { # NAME VALUE
    [ -s "$DIR/$1" ] && return
    printf '%s' "$2" > "$DIR/$1.new"
    chmod 0444 "$DIR/$1.new"
    mv "$DIR/$1.new" "$DIR/$1"
}

# Hexadecimal, so that a password needs no escaping in a URL.
random() { od -An -N"$1" -tx1 /dev/urandom | tr -d ' \n'; } # BYTES

for name in postgres_password api_password schedule_password worker_password redis_password grafana_password; do
    keep "$name" "$(random 24)"
done
# The longest key that MinIO allows.
keep s3_access_key "$(random 10)"
keep s3_secret_key "$(random 20)"
keep owner_database_url "postgresql://postgres:$(cat "$DIR/postgres_password")@postgres:5432/espalier"
for role in api schedule worker; do
    keep "${role}_database_url" \
        "postgresql://espalier_$role:$(cat "$DIR/${role}_password")@postgres:5432/espalier"
done
keep redis_url "redis://:$(cat "$DIR/redis_password")@redis:6379/0"
