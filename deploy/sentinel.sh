#!/bin/sh
# Starts one of the Sentinels of stack.ha.yml:
#
#   HOST=sentinel-1 PORT=26379 MASTER=stillroom FIRST="redis 6379" sentinel.sh
#
# HOST and PORT are its own address; FIRST is the primary before any failover.
# A Sentinel keeps what it knows in its file: who it is, who is the primary, who else there is. The rest of the file is
# written anew at each start, so that a new password or another patience takes effect.
# Its clients' buffers are bounded as those of the servers are: any process of the stack may log in here as `watch`.
set -eu
umask 077
file=${DATA:-/data}/sentinel.conf
facts='^sentinel (myid|monitor|config-epoch|leader-epoch|current-epoch|known-replica|known-sentinel) '

secret() { cat "${SECRETS_FOLDER:-/run/secrets}/$1_password"; }

known=$(grep -E "$facts" "$file" 2>/dev/null) || known=""
case $known in *"sentinel monitor"*) ;; *) known="sentinel monitor $MASTER $FIRST ${QUORUM:-2}" ;; esac

# Names, not addresses: a container that comes back has another address.
cat >"$file.new" <<CONFIGURATION
port $PORT
protected-mode no
dir ${DATA:-/data}
aclfile ${ACL_FILE:-/etc/redis/sentinels.acl}
maxmemory-clients 16mb
timeout 300
tcp-keepalive 60
sentinel resolve-hostnames yes
sentinel announce-hostnames yes
sentinel announce-ip $HOST
sentinel announce-port $PORT
sentinel sentinel-user sentinel
sentinel sentinel-pass $(secret sentinel)
$known
sentinel auth-user $MASTER sentinel
sentinel auth-pass $MASTER $(secret sentinel)
sentinel down-after-milliseconds $MASTER ${DOWN_AFTER_MS:-5000}
sentinel failover-timeout $MASTER ${FAILOVER_TIMEOUT_MS:-20000}
sentinel parallel-syncs $MASTER 1
CONFIGURATION
mv "$file.new" "$file"
exec redis-server "$file" --sentinel
