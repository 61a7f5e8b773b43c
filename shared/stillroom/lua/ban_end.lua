-- Ends a ban in one shard of the limits. May be sent again.
-- KEYS  1 ban  2 lifted
-- ARGV  1 a number that no other lift has: see ban_spread  2 how long that is kept, ms
-- returns 1 if it held
-- flags: allow-oom

local held = redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
return held
