-- Shuts a shard of the sessions that is being moved: every act on it is refused from now on. See lib/session.lua.
-- KEYS  1 rev
-- ARGV  1 why: !left it is on another server, !arriving it is on its way here
-- returns 1
-- flags: allow-oom

local LONGEST_MS = '31622400000' -- 366 days: no session is longer
redis.call('ZREM', KEYS[1], '!left', '!arriving')
redis.call('ZADD', KEYS[1], 0, ARGV[1])
redis.call('PEXPIRE', KEYS[1], LONGEST_MS)
return 1
