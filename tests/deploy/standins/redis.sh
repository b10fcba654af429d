#!/bin/sh
# Told as the published image is: a server that root starts becomes the server's own user.
set -eu
if [ "$1" = valkey-server ] && [ "$(id -u)" = 0 ]; then
    chown redis:redis /data
    # The published server listens on every address; Debian's asks to be told.
    exec setpriv --reuid=redis --regid=redis --init-groups "$@" --bind 0.0.0.0 --protected-mode no --dir /data
fi
exec "$@"
