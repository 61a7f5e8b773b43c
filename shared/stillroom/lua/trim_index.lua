-- Takes the members out of an index that have run out by themselves.
-- KEYS  1 index
-- ARGV  1 most members to take out
-- returns how many were taken out
-- flags: allow-oom
-- include: time

local now_ms = plain(math.floor(now_us() / 1000))
local gone = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now_ms, 'LIMIT', 0, ARGV[1])
return #gone > 0 and redis.call('ZREM', KEYS[1], unpack(gone)) or 0
