-- Drops expired bans from the index.
-- KEYS  1 bans
-- ARGV  none
-- returns how many were dropped
-- include: time own

own(KEYS[1], 'zset')
return redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', plain(math.floor(now_us() / 1000)))
