#!/bin/sh
# Starts one of the servers of stack.ha.yml, as the primary or as a replica of the one that the Sentinels name:
#
#   HOST=redis PORT=6379 MASTER=stillroom SENTINELS="sentinel-1:26379 …" redis-member.sh OPTION...
#
# HOST and PORT are its own address; the options are redis-server's. All have the same priority: Sentinels look at it
# before they look at who has copied most, and would promote a server that was away, or is empty, or lags behind.
# A server that was away does not know who has taken its place. Started as what it was, it would be a second primary
# until a Sentinel notices. So it asks, and waits until most Sentinels name the same server.
# A primary whose volume was lost, and that is back before a Sentinel notices, would have its replicas copy nothing. So
# it stays silent, until one of them is the primary. Its files are in the working folder.
set -eu
self="$HOST $PORT"

secret() { cat "${SECRETS_FOLDER:-/run/secrets}/$1_password"; }

named() {  # what each Sentinel says, one line each: "host port"
  for sentinel in $SENTINELS; do
    REDISCLI_AUTH=$(secret watch) timeout 2 redis-cli -h "${sentinel%:*}" -p "${sentinel#*:}" --user watch \
      sentinel get-master-addr-by-name "$MASTER" 2>/dev/null | tr '\n' ' ' && echo
  done
}

is_empty() { [ -z "$(ls appendonlydir/*.manifest appendonly.aof 2>/dev/null)" ]; }  # a dump.rdb is not read

is_followed() {  # unless most Sentinels answer that they know no replica of the primary
  alone=0
  for sentinel in $SENTINELS; do
    replicas=$(REDISCLI_AUTH=$(secret watch) timeout 2 redis-cli -e -h "${sentinel%:*}" -p "${sentinel#*:}" \
      --user watch sentinel replicas "$MASTER" 2>/dev/null) || continue
    ! echo "$replicas" | grep -qx runid || return 0
    alone=$((alone + 1))
  done
  [ $((2 * alone)) -le "$count" ]
}

# shellcheck disable=SC2086  # a list of words
count=$(set -- $SENTINELS && echo $#)
while
  primary=$(named | sort | uniq -c | awk -v count="$count" '2 * $1 > count && NF == 3 {print $2, $3}')
  [ -z "$primary" ] || { [ "$primary" = "$self" ] && is_empty && is_followed; }
do
  case $primary in
    "") echo "Waiting until most of the Sentinels name a primary: $SENTINELS" ;;
    *) echo "Waiting until the Sentinels name another primary: this has no data, and replicas of it may have some." \
      "If there are none any more: SENTINEL RESET $MASTER, at each Sentinel" ;;
  esac >&2
  sleep 1
done

replicaof=""
[ "$primary" = "$self" ] || replicaof="--replicaof $primary"
echo "The Sentinels name $primary; this is $self" >&2
# The password comes from the standard input: it is on no command line and in no file.
# shellcheck disable=SC2086
exec redis-server "$@" --port "$PORT" --replica-announce-ip "$HOST" --replica-announce-port "$PORT" \
  $replicaof - <<CONFIGURATION
masteruser replica
masterauth $(secret replica)
CONFIGURATION
